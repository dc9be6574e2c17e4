"""SPELLING and TOKENIZERS: what a model's own tokenizer does and llama.cpp does not.

On small vocabularies; test_vocabularies.py has the real ones. The reference is
huggingface/tokenizers over the same tokens.
"""

from __future__ import annotations

import itertools
import json
import string
import sys
import unicodedata
from pathlib import Path
from typing import Any, Literal

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import embellama_server as es
from tests import both as over_http
from tests import chat_models, kit, vocabularies
from tests import models as tiny_models
from tests.test_templates import tokenizer_of, user
from tests.vocabularies import HARD
from tests.words import WORDS

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
    r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKED = ("<think>", "<|end|>")
MARKS = "\u0301\u0316\u0323\u0302\u0338\u05bc\u0f72\u0345\U0001d165"
JOINING = (
    MARKS + "eEậ가\u1100\u1161\u11a8\u09c7\u09be\u0958\U0001d15e\u212b=><क\u0f73 a"
)
TEXTS = st.text(st.sampled_from(JOINING), max_size=60) | st.text(max_size=20)
WRITTEN = [text for texts in HARD.values() for text in texts]


# --- composing ---


@given(TEXTS)
@example("a" + "\u0301\u0316" * 40)
@example("\u0f73" * 40 + "가\u11a8")
def test_a_composed_text_is_unicode_s_nfc_wherever_it_is_cut(text: str) -> None:
    wanted = unicodedata.normalize("NFC", text)
    assert es.composed(text) == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(es, "PART_CHARS", 1)
        assert es.composed(text) == wanted


def test_what_a_character_decomposes_to_is_never_cut() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(es, "PART_CHARS", 1)
        for code in range(sys.maxunicode + 1):
            if unicodedata.decomposition(chr(code)):
                apart = unicodedata.normalize("NFD", chr(code))
                wanted = unicodedata.normalize("NFC", apart)
                assert es.composed(apart) == wanted, hex(code)


@pytest.mark.parametrize("marks", ["\u0301\u0316", "\u0f73", "\U0001d165\u0301"])
def test_python_is_given_no_long_run_of_unordered_marks(
    marks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It sorts them by insertion: half a million took minutes, with the lock held.
    unordered = 0
    real = unicodedata.normalize

    def normalize(form: Literal["NFC", "NFD"], text: str) -> str:
        nonlocal unordered
        kinds = [unicodedata.combining(mark) for mark in real("NFD", text[:200])]
        falls = sum(a > b > 0 for a, b in itertools.pairwise(kinds))
        unordered = max(unordered, falls)
        return real(form, text)

    monkeypatch.setattr(unicodedata, "normalize", normalize)
    text = "a" + marks * 5000
    assert es.composed(text) == real("NFC", text)
    assert unordered <= 1


# --- the tokens of small vocabularies ---


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[es.Tokenizer, Any]:
    """Ours and Hugging Face's, of byte pairs as Qwen's; "</s>" is a word among them."""
    folder = tmp_path_factory.mktemp("pairs")
    whole = tokenizers.Tokenizer(models.BPE())
    whole.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    whole.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    whole.train_from_iterator([*WRITTEN, " ".join(WORDS)] * 2, trainer)
    source = folder / "tokenizer.json"
    made = json.loads(whole.to_str())
    words = made["model"]["vocab"]
    words["</s>"] = len(words)
    source.write_text(json.dumps(made))
    whole = tokenizers.Tokenizer.from_file(str(source))
    for texts, special in ((CONTROLS, True), (MARKED, False)):
        tokens = [
            tokenizers.AddedToken(text, special=special, normalized=False)
            for text in texts
        ]
        (whole.add_special_tokens if special else whole.add_tokens)(tokens)
    whole.save(str(source))
    path = vocabularies.written(source, folder / "pairs.gguf", "qwen2")
    return vocabularies.tokenizer_of(path, "qwen2"), whole


MIXED = st.lists(st.sampled_from(WRITTEN) | TEXTS, max_size=3).map("".join)


@settings(deadline=None)
@given(MIXED)
@example("a</s>b <think>e\u0301<|im_end|>\u0338</s>")
@example("<|end|>\u0338 </s>")
def test_a_text_has_the_tokens_of_the_model_s_own_tokenizer(
    both: tuple[es.Tokenizer, Any], text: str
) -> None:
    ours, theirs = both
    text = text.encode("utf-8", "replace").decode()
    ids = theirs.encode(text).ids
    assert ours.encode(text) == ids
    assert [*ours.encode_parts(text, 10_000)][-1] == ids
    assert ours.encode_prompt([es.PromptPart(text)]) == ids
    back = theirs.decode(ids, skip_special_tokens=False)
    assert ours.decode(ids, with_special=True) == back == ours.spelling.of(text)


@pytest.mark.parametrize("text", ["there is", "e\u0301 is é", "<|im_end|>", "<think>"])
def test_only_a_token_that_is_no_token_is_read_in_halves(
    both: tuple[es.Tokenizer, Any], text: str
) -> None:
    ours, _ = both
    ids = ours.encode_prompt([es.PromptPart(text, is_plain=True)])
    is_token = text in (*CONTROLS, *MARKED)
    assert (ids == ours.encode(text)) != is_token
    assert ours.decode(ids, with_special=False) == ours.spelling.of(text)


@pytest.mark.parametrize("from_end", [False, True])
def test_a_long_decomposed_text_is_read_in_parts_of_the_same_tokens(
    both: tuple[es.Tokenizer, Any], from_end: bool
) -> None:
    ours, _ = both
    text = unicodedata.normalize("NFD", "Việt 글 é") * 8000
    ids = ours.encode(text)
    *waits, part = ours.encode_parts(text, 100, from_end=from_end)
    assert not any(waits) and 100 < len(part) < len(ids)
    assert part == (ids[-len(part) :] if from_end else ids[: len(part)])


def test_a_word_is_a_token_if_a_template_writes_it(
    both: tuple[es.Tokenizer, Any], tmp_path: Path
) -> None:
    ours, _ = both
    (token,) = (t for t, (text, _) in ours.marked.items() if text == "</s>")
    assert token not in ours.encode("a</s>b")
    assert ours.decode([token], with_special=False) == "</s>"
    try:
        ours.believe("{{ bos }}</s>")
        assert token in ours.encode("a</s>b")
        assert ours.decode([token], with_special=False) == ""
    finally:
        ours.believe("")


def test_only_what_needs_it_is_composed(tmp_path: Path) -> None:
    apart = "e\u0301"
    llama_2 = tokenizer_of(chat_models.tiny_llama(tmp_path))
    assert llama_2.encode(apart) != llama_2.encode("é")
    assert llama_2.max_chars == es.MAX_TOKENIZER_CHARS
    qwen = tokenizer_of(chat_models.tiny_qwen(tmp_path))
    assert qwen.encode(apart) == qwen.encode("é")
    # The worst grows to thrice its characters, each of which takes 230 bytes of stack.
    assert qwen.max_chars * 3 * 230 < es.TOKENIZER_STACK_BYTES


def test_a_decomposed_message_has_the_tokens_of_a_composed_one(tmp_path: Path) -> None:
    qwen = tokenizer_of(chat_models.tiny_qwen(tmp_path))
    words = es.Vocabulary(qwen, chat_models.CHATML)
    template = es.ChatTemplate(chat_models.CHATML, control_texts=words.control_texts)
    ids = [
        qwen.encode_prompt(template.render([user(text)]).parts)
        for text in ("e\u0301 <|im_end|> 글", "é <|im_end|> 글")
    ]
    assert ids[0] == ids[1]


# --- places and texts of tokens ---


@settings(deadline=None)
@given(MIXED)
@example("e\u0301a\u0316 \u1100\u1161\u11a8 🦙<think>")
def test_the_places_of_tokens_cover_the_text_as_it_was_written(
    both: tuple[es.Tokenizer, Any], text: str
) -> None:
    ours, _ = both
    text = text.encode("utf-8", "replace").decode()
    places = [*es.places_of(ours, text, ours.encode(text))]
    last = 0
    for said, begin, end in places:
        assert begin is not None and end is not None
        assert text[begin:end] == said
        assert begin <= last <= end, "no character is left out"
        last = end
    assert last == len(text)


@pytest.mark.parametrize(("text", "place"), [("e\u0301", (0, 2)), ("🦙", (0, 1))])
def test_a_token_s_place_is_all_that_it_was_made_of(
    both: tuple[es.Tokenizer, Any], text: str, place: tuple[int, int]
) -> None:
    ours, _ = both
    found = {*es.places_of(ours, text + "b", ours.encode(text + "b"))}
    assert found == {(text, *place), ("b", place[1], place[1] + 1)}


@pytest.fixture(scope="module", params=["llama", "gemma3", "qwen3"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: Any) -> es.Tokenizer:
    """SentencePiece with a space in front, without, and byte pairs."""
    folder = tmp_path_factory.mktemp(request.param)
    return tokenizer_of(chat_models.GENERATING[request.param](folder))


@settings(max_examples=60, deadline=None)
@given(text=st.text(string.printable, max_size=30) | st.sampled_from(WRITTEN))
@example(text="[1 , 2] ' s .")
@example(text=" leading")
@example(text="  two")
def test_tokens_give_their_text_back_to_the_byte(tiny: es.Tokenizer, text: str) -> None:
    # SentencePiece puts a space before what follows a control token.
    text = text.replace("<s>", "").replace("</s>", "")
    ids = tiny.encode(text)
    assert tiny.decode(ids, with_special=True) == tiny.spelling.of(text)


def test_so_over_http(tmp_path: Path) -> None:
    path = str(tiny_models.tiny_causal(tmp_path))
    script = str(kit.ROOT / "embellama_server.py")
    with kit.started("--model-path", path, module=(script,)) as running:
        client = over_http.Client(running.url)
        apart, whole = " the e\u0301 [1 , 2]", " the é [1 , 2]"
        body = {"inputs": [apart, whole], "add_special_tokens": False}
        mine, theirs = client.post("/tokenize", body).json
        ids = [token["id"] for token in mine]
        assert ids == [token["id"] for token in theirs]
        assert {t["text"] for t in mine if t["start"] == 5} == {"e\u0301"}
        assert client.post("/decode", {"ids": ids}).json == [whole]
        vectors = client.post("/embed", {"inputs": [apart, whole]}).json
        assert vectors[0] == vectors[1]
        client.close()
