"""WORDPIECE: our token ids are the reference tokenizer's, for every text there is.

The reference is huggingface/tokenizers, which made the ids these models were trained
on. It is compared on real texts, on every code point of Unicode, and on random text.
"""

from __future__ import annotations

import functools
import json
import sys
import tracemalloc
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import gguf
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import kit

REFERENCE = kit.ROOT / "tests/reference/all-MiniLM-L6-v2.jsonl"
ROWS = [json.loads(line) for line in REFERENCE.read_text("ascii").splitlines()]
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SURROGATES = range(0xD800, 0xE000)  # no text has them

# --- the reference ---


def bert_form(token: str) -> str:
    """A GGUF's token as vocab.txt had it."""
    if token in SPECIALS:
        return token
    return token[1:] if token.startswith("\u2581") else "##" + token


@pytest.fixture(scope="module")
def reference(default_model: Path) -> Any:
    """The tokenizer of all-MiniLM-L6-v2's tokenizer.json, over the GGUF's vocabulary.

    That file says BertNormalizer(clean_text, handle_chinese_chars, lowercase) and
    BertPreTokenizer; so does this class by default, see the test below.
    """
    fields = gguf.GGUFReader(default_model).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    vocabulary = {bert_form(token): i for i, token in enumerate(tokens)}
    return tokenizers.BertWordPieceTokenizer(vocabulary, lowercase=True)


def reference_ids(reference: Any, texts: list[str]) -> list[list[int]]:
    """Without [CLS] and [SEP]."""
    return [e.ids for e in reference.encode_batch(texts, add_special_tokens=False)]


def differing(engine: es.Engine, reference: Any, texts: list[str]) -> list[str]:
    """Those whose ids are not the reference's; all in one text first, ten times as fast."""
    whole = " ".join(texts)
    if [engine.tokenizer.encode(whole)] == reference_ids(reference, [whole]):
        return []
    ids = zip(texts, reference_ids(reference, texts), strict=True)
    return [text for text, expected in ids if engine.tokenizer.encode(text) != expected]


@pytest.mark.model
def test_the_reference_is_set_up_as_the_models_own_tokenizer_json(
    reference: Any,
) -> None:
    whole = json.loads(reference.to_str())
    assert whole["normalizer"] == {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    }
    assert whole["pre_tokenizer"] == {"type": "BertPreTokenizer"}
    assert whole["model"]["max_input_chars_per_word"] == 100
    assert {t["content"]: t["normalized"] for t in whole["added_tokens"]} == (
        dict.fromkeys(SPECIALS, False)
    )


# --- the real vocabulary ---


@pytest.mark.model
@pytest.mark.parametrize("row", ROWS, ids=[row["kind"] for row in ROWS])
def test_a_text_gets_the_ids_the_model_was_given_by_sentence_transformers(
    engine: es.Engine, row: dict[str, Any]
) -> None:
    ids = es.with_special_tokens(engine.tokenizer.encode(row["text"]), engine.card)
    if len(ids) > engine.card.max_input_tokens:
        ids = es.truncated(ids, engine.card.max_input_tokens, 1, 1)
    assert ids == row["ids"]


def code_points() -> Iterator[list[str]]:
    """All of Unicode in slices: a million results at once would take gigabytes."""
    yield from (
        [chr(code)] for code in range(0x80)
    )  # texts of ASCII have their own way
    for begin in range(0x80, sys.maxunicode + 1, 0x2000):
        part = range(begin, min(begin + 0x2000, sys.maxunicode + 1))
        yield [chr(code) for code in part if code not in SURROGATES]


# Alone, inside a word, before an accent.
SHAPES: tuple[Callable[[str], str], ...] = (
    lambda char: char,
    lambda char: f"a{char}b",
    lambda char: f"A{char}\u0301x",
)


@pytest.mark.model
@pytest.mark.heavy
def test_every_code_point_gets_the_ids_of_the_reference(
    engine: es.Engine, reference: Any
) -> None:
    different, compared = [], 0
    for chars in code_points():
        compared += len(chars)
        for shape in SHAPES:
            different += differing(engine, reference, [shape(char) for char in chars])
    assert not different, f"{len(different)} differ"
    assert compared == 0x110000 - len(SURROGATES)


def test_a_difference_is_found_and_named() -> None:
    ours, theirs = both(lowercase=True, strip_accents=None)
    cased, _ = both(lowercase=False, strip_accents=None)
    texts = ["no", "No", "time"]
    for words, expected in ((ours, []), (cased, ["No"])):
        engine: Any = SimpleNamespace(tokenizer=words)
        assert differing(engine, theirs, texts) == expected


# What real texts are made of, and what they are made of only to break tokenizers.
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789 \t\n\r.,;:!?-'\"()[]{}#@/\\_*&^%$+=~`|<>",
    "àéîõüçñÅØßẞſİıŉǅĳÆœŁđƠựẪ",  # Latin
    "αβγδσςΣΆΐΰϊᾳᾼῼϐ",
    "абвгдёйЁЙЇґѝӂ",
    "אבגדשׁשּׂבָּ",  # Hebrew with points
    "ابتثجحئؤأآًٌٍّْـ۔؟ﷺﷲﻻ",  # Arabic
    "कखगघिीुूेैोौ्ंक़ख़ज़",  # Devanagari
    "กขคงิีุูำเแโ",  # Thai
    "ကခဂငိီုူ",  # Burmese
    "가각한글뷁값ㄱㄴㅏㅑ\u1100\u1161\u11a8",  # Hangul, syllables and letters
    "あいうがぎぱカガパヴー々",  # Japanese
    "中文汉字漢字〇\uf900\uf901\U0002f800\U00020000\U0002b820\U00030000",  # Han
    "\u0300\u0301\u0302\u0316\u0323\u0327\u034f\u0345\u05b0\u064b\u0f71\u0f72\u302e",
    "\u200b\u200c\u200d\u200e\u00ad\ufeff\u2060\ufe0f\u180e\u061c",  # invisible
    "\u00a0\u1680\u2003\u2028\u2029\u202f\u3000\x0b\x0c\x85\x1c",  # white space
    "😀👍🏽👩\u200d🚀🇩🇪❤\u20e3\U000e0067",  # emoji
    "\x00\x07\x1b\x7f\ufffd\ue000\uffff\U0010ffff\u0378",  # broken
    "‘’“”–—…«»¿¡、。「」（）！？·؛।",
)
CHARS = st.one_of(
    *map(st.sampled_from, ALPHABETS), st.characters(exclude_categories=["Cs"])
)
WORDS = st.text(CHARS, max_size=12)
LONG_WORDS = st.builds(
    lambda char, n, end: char * n + end,
    st.sampled_from("aé가ж\u0301x中"),
    st.integers(48, 104),
    WORDS,
)
# Specials as they are, and what is nearly one.
MARKS = st.sampled_from((*SPECIALS, "[sep]", "[ SEP ]", "[SEP", "##ing", "[unused0]"))
TEXTS = st.lists(
    st.one_of(WORDS, WORDS.map(" {} ".format), LONG_WORDS, MARKS), max_size=8
).map("".join)


@pytest.mark.model
@settings(max_examples=3000, deadline=None)
@given(TEXTS)
@example("[CLS][SEP] a[SEP]b [MASK]")
@example("e\u200b\u0301 \u1100\u200d\u1161")
@example("\u212b\u2126\u1e9e\u0130\u03a3")
def test_random_text_gets_the_ids_of_the_reference(
    engine: es.Engine, reference: Any, text: str
) -> None:
    assert engine.tokenizer.encode(text) == reference_ids(reference, [text])[0]


# --- other vocabularies ---

CASED_CHARS = (
    "abcdefgxyzABCDEFGXYZ09 .,-'"
    "àÀéÉîÎõÕüÜçÇñÑåÅøØßẞſİıŉǅǄǆĳÆæœŒłŁđĐơƠựẪ"
    "αΑσςΣάΆΐϊϋῼᾳᾼ"
    "абёЁйЙЇїѝ"
    "\u0300\u0301\u0307\u0308\u0323\u0345中가"
)
FORMS = {
    form
    for char in CASED_CHARS
    for whole in (char, char.lower())
    for form in (*whole, *unicodedata.normalize("NFD", whole))
    if form != " "
}
# Every form of every character is in it, so that nothing is hidden behind [UNK].
VOCABULARY = (*SPECIALS, *sorted(FORMS), *("##" + form for form in sorted(FORMS)))


@functools.cache
def both(lowercase: bool, strip_accents: bool | None) -> tuple[es.WordPiece, Any]:
    """Ours and the reference's for the same vocabulary; None: as ``lowercase``."""
    specials = {token: VOCABULARY.index(token) for token in SPECIALS}
    tokens = [
        t if t in SPECIALS else t[2:] if t.startswith("##") else "\u2581" + t
        for t in VOCABULARY
    ]
    ours = es.WordPiece(
        tokens,
        specials,
        specials["[UNK]"],
        lowercase=lowercase,
        strip_accents=lowercase if strip_accents is None else strip_accents,
    )
    theirs = tokenizers.BertWordPieceTokenizer(
        {token: i for i, token in enumerate(VOCABULARY)},
        lowercase=lowercase,
        strip_accents=strip_accents,
    )
    return ours, theirs


def pieces(ids: list[int]) -> str:
    """Ids as readable pieces."""
    return " ".join(VOCABULARY[i] for i in ids)


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("strip_accents", [None, True, False])
@settings(max_examples=500)
@given(text=st.text(st.sampled_from(CASED_CHARS), max_size=40))
def test_every_kind_of_vocabulary_is_read_as_the_reference_reads_it(
    lowercase: bool, strip_accents: bool | None, text: str
) -> None:
    ours, theirs = both(lowercase, strip_accents)
    assert pieces(ours.encode(text)) == pieces(reference_ids(theirs, [text])[0])


@pytest.mark.parametrize(
    ("lowercase", "strip_accents", "expected"),
    [
        (False, None, "É ##A ##b"),
        (True, None, "e ##a ##b"),
        (True, False, "é ##a ##b"),
        (False, True, "E ##A ##b"),
    ],
)
def test_case_and_accents_are_kept_when_the_vocabulary_has_them(
    lowercase: bool, strip_accents: bool | None, expected: str
) -> None:
    assert pieces(both(lowercase, strip_accents)[0].encode("ÉAb")) == expected


def test_the_longest_special_token_wins() -> None:
    # Else "[S]x" would be read as "[S" and the rest, whatever order the file has.
    words = es.WordPiece(
        ["[UNK]", "[S", "[S]", "\u2581x"],
        {"[UNK]": 0, "[S": 1, "[S]": 2},
        0,
        lowercase=True,
        strip_accents=True,
    )
    assert words.encode("[S]x[Sx") == [2, 3, 1, 3]


def test_a_vocabulary_without_specials_reads_brackets_as_text() -> None:
    words = es.WordPiece(
        ["\u2581[", "\u2581a"], {}, 7, lowercase=True, strip_accents=True
    )
    assert words.encode("[a") == [0, 1]
    assert words.encode("") == []
    assert words.encode("zz") == [7]


# --- what hostile text costs ---


def test_accents_are_taken_off_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # In time that grows with the text: a whole one is never normalised.
    asked: list[str] = []
    real = unicodedata.normalize

    def normalize(form: Literal["NFD"], text: str) -> str:
        asked.append(text)
        return real(form, text)

    tokens = ["[UNK]", "\u2581a"]
    words = es.WordPiece(tokens, {}, 0, lowercase=True, strip_accents=True)
    with monkeypatch.context() as patch:
        patch.setattr(unicodedata, "normalize", normalize)
        assert words.encode("a" + "\u0301\u0316" * 100) == [1]
    assert {"\u0301", "\u0316"} <= set(asked)
    assert max(map(len, asked)) == 1


def test_long_words_are_not_kept_in_memory() -> None:
    words = both(lowercase=True, strip_accents=None)[0]
    tracemalloc.start()
    try:
        for n in range(50):
            assert len(words.encode(f"{n}" + "x" * 10_000)) == 1
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < 50_000


@pytest.mark.parametrize("glue", [" ", "\n", ".", "\u4e00", "-\u0301", "\x01 "])
def test_a_long_text_has_the_ids_of_its_parts(
    glue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Texts are read in parts; where they are cut must not show.
    ours, _ = both(lowercase=True, strip_accents=None)
    text = glue.join(row["text"] for row in ROWS) + glue + "x" * 300
    monkeypatch.setattr(es, "PART_CHARS", 2 * len(text))
    whole = ours.encode(text)
    for size in (1, 7, 64):
        monkeypatch.setattr(es, "PART_CHARS", size)
        assert ours.encode(text) == whole
