"""TEI's tokens and rarer routes on the real model.

The reference for places in a text is huggingface/tokenizers over the same vocabulary;
for vectors it is numpy over what the server's other routes give.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import both, kit
from tests.test_wordpiece import bert_form

pytestmark = pytest.mark.model

SENTENCES = [
    "The quick brown Fox jumps over the lazy dog.",
    "Café au lait, s'il vous plaît: déjà vu!",
    "Straße, Größe, naïve coöperation; ﬁne print",
    "日本語の文章 and 中文 mixed, 漢",
    "don't stop — believing… (really?)",
    "unaffable tokenization of antidisestablishmentarianism",
    "tabs\tand\nnew lines   and  spaces ",
    "e\u0301 decomposed, İstanbul, ½ and ™",
    "Ελληνικά ΚΕΦΑΛΑΙΑ ς, кириллица ЁЖ",
    "[CLS] written [SEP] in a text [MASK]",
    "1,234.56 @user #tag http://x.y/z?q=1&r=2",
]
HARD_SENTENCES = [
    "हिन्दी में लिखा",
    "👩‍👩‍👧 text",
    "☃the the",
    "an emoji 😀 and more 🦙 text after it",
    "unknown ☃ snowman, then known",
    "한국어 글 and after",
    "zero\u200bwidth, soft\u00adhyphen, \ufffd and after",
    "x" * 150 + " after a long word",
    "\u200bat once",
]


@pytest.fixture(scope="module")
def client() -> Iterator[both.Client]:
    """Of the server as it comes, with the default model as it is in its file."""
    script = str(kit.ROOT / "embellama_server.py")
    with kit.started("--weights", "f32", module=(script,)) as server:
        asked = both.Client(server.url)
        yield asked
        asked.close()


@pytest.fixture(scope="module")
def reference(default_model: Path) -> Any:
    """The tokenizer that the model was trained with."""
    fields = gguf.GGUFReader(default_model).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    vocabulary = {bert_form(token): i for i, token in enumerate(tokens)}
    return tokenizers.BertWordPieceTokenizer(vocabulary, lowercase=True)


def places(reference: Any, text: str) -> list[tuple[int, str, int, int]]:
    """Id, text and place of each token, as the reference has them."""
    found = reference.encode(text, add_special_tokens=False)
    rows = zip(found.ids, found.offsets, strict=True)
    return [(token, text[a:b], a, b) for token, (a, b) in rows]


@pytest.mark.parametrize("text", SENTENCES)
def test_tokens_stand_where_the_reference_says(
    client: both.Client, reference: Any, text: str
) -> None:
    (rows,) = client.post("/tokenize", {"inputs": text}).json
    assert [row["text"] for row in rows if row["special"]] == ["[CLS]", "[SEP]"]
    assert rows[0]["special"] and rows[-1]["special"]
    found = [
        (row["id"], row["text"], row["start"], row["stop"])
        for row in rows
        if not row["special"]
    ]
    assert found == places(reference, text)


@pytest.mark.parametrize("text", HARD_SENTENCES)
def test_so_do_those_after_a_token_that_stands_for_no_text(
    client: both.Client, reference: Any, text: str
) -> None:
    body = {"inputs": text, "add_special_tokens": False}
    (rows,) = client.post("/tokenize", body).json
    found = [(row["id"], row["text"], row["start"], row["stop"]) for row in rows]
    assert found == places(reference, text)


LETTERS = "abc XYZ äÖñ .,!'- 0189 éÈ 中文 ж Ω"


@given(st.text(st.sampled_from(LETTERS), min_size=1, max_size=40))
@settings(max_examples=300, deadline=None)
def test_places_are_the_reference_s_for_ordinary_text(
    engine: es.Engine, reference: Any, text: str
) -> None:
    ids = engine.tokenizer.encode(text)
    found = list(es.aligned(text, engine.tokenizer.pieces(ids)))
    wanted = [row[1:] for row in places(reference, text)]
    is_known = [token != 100 for token in ids]
    if all(is_known):
        assert found == wanted


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_a_token_that_has_a_place_says_what_stands_there(
    engine: es.Engine, text: str
) -> None:
    last = 0
    for said, start, stop in es.aligned(
        text, engine.tokenizer.pieces(engine.tokenizer.encode(text))
    ):
        assert (start is None) == (stop is None)
        if start is not None and stop is not None:
            assert text[start:stop] == said
            assert 0 <= last <= start < stop <= len(text)
            last = start


@pytest.mark.parametrize("gap", [" ", "\u0301"])
def test_a_text_s_places_are_found_in_one_go(gap: str) -> None:
    text = "☃" + gap * 2000 + " ☃" * 200
    read = 0

    class Counted(str):
        def __getitem__(self, at: Any) -> str:
            nonlocal read
            read += 1
            return super().__getitem__(at)

    list(es.aligned(Counted(text), ["[UNK]"] * 201))
    assert read < 10 * len(text)


def bare(text: str) -> str:
    """As BERT reads it: no case, accents or spaces."""
    plain = unicodedata.normalize("NFKD", text).lower()
    kept = (c for c in plain if not unicodedata.combining(c) and not c.isspace())
    return "".join(kept)


@pytest.mark.parametrize("text", SENTENCES[:6])
@pytest.mark.parametrize("skip", [True, False])
def test_what_tokenize_gives_decode_takes_back(
    client: both.Client, text: str, skip: bool
) -> None:
    (rows,) = client.post("/tokenize", {"inputs": text}).json
    body = {"ids": [row["id"] for row in rows], "skip_special_tokens": skip}
    (back,) = client.post("/decode", body).json
    expected = bare(text) if skip else f"[cls]{bare(text)}[sep]"
    assert bare(back) == expected
    if skip:
        (again,) = client.post("/tokenize", {"inputs": back}).json
        assert [row["id"] for row in again] == [row["id"] for row in rows]


def test_several_texts_are_decoded_each_for_itself(client: both.Client) -> None:
    rows = client.post("/tokenize", {"inputs": ["one two", "three"]}).json
    ids = [[row["id"] for row in tokens] for tokens in rows]
    assert client.post("/decode", {"ids": ids}).json == ["one two", "three"]


def test_every_id_of_the_vocabulary_can_be_decoded(client: both.Client) -> None:
    count = 30522
    for begin in range(0, count, 2048):
        ids = [[token] for token in range(begin, min(count, begin + 2048))]
        reply = client.post("/decode", {"ids": ids, "skip_special_tokens": False})
        assert reply.status == 200
        assert len(reply.json) == len(ids)
    assert client.post("/decode", {"ids": [count]}).status == 422


def test_the_mean_of_embed_all_is_embed_s_vector(client: both.Client) -> None:
    texts = [*SENTENCES[:8], "word " * 300]
    rows = client.post("/embed_all", {"inputs": texts}).json
    raw = client.post("/embed", {"inputs": texts, "normalize": False}).json
    unit = client.post("/embed", {"inputs": texts}).json
    tokens = client.post("/tokenize", {"inputs": texts}).json
    for every, whole, scaled, pieces in zip(rows, raw, unit, tokens, strict=True):
        assert len(every) == len(pieces)
        mean = np.mean(np.array(every, np.float64), axis=0)
        assert mean @ whole / np.linalg.norm(mean) / np.linalg.norm(whole) > 0.9999
        assert np.linalg.norm(mean - whole) < 1e-2 * np.linalg.norm(whole)
        assert np.allclose(whole / np.linalg.norm(whole), scaled, atol=1e-6)


def test_similarity_is_the_cosine_of_embed_s_vectors(client: both.Client) -> None:
    source, *others = SENTENCES
    body = {"inputs": {"source_sentence": source, "sentences": [*others, source]}}
    found = client.post("/similarity", body).json
    raw = np.array(
        client.post("/embed", {"inputs": [source, *others], "normalize": False}).json
    )
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    wanted = [*(unit[1:] @ unit[0]), 1.0]
    assert np.allclose(found, wanted, atol=2e-3)
    assert found[-1] == pytest.approx(1, abs=1e-6)


def test_the_small_types_keep_the_order_of_cosines(client: both.Client) -> None:
    texts = ["A cat sleeps.", "A kitten naps.", "Stocks fell sharply today."]
    exact: Any = None
    for dtype in ("float32", "float16", "int8", "uint8"):
        body = {"input": texts, "output_dtype": dtype}
        data = client.post("/v1/embeddings", body).json["data"]
        rows = np.array([item["embedding"] for item in data], np.float64)
        if dtype == "uint8":
            rows = (rows - 127.5) / 127.5
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        cosines = rows @ rows.T
        exact = cosines if exact is None else exact
        assert np.abs(cosines - exact).max() < 0.01
    body = {"input": texts, "output_dtype": "ubinary", "encoding_format": "bytes"}
    bits = np.frombuffer(client.post("/v1/embeddings", body).body, np.uint8)
    cat, kitten, stocks = np.unpackbits(bits.reshape(3, -1), axis=1)
    assert (cat ^ kitten).sum() < (cat ^ stocks).sum()


@pytest.mark.parametrize("text", [" ", "\0", "\u200b", "\n\n", "\ufffd"])
def test_a_text_without_words_is_a_text(client: both.Client, text: str) -> None:
    (row,) = client.post("/embed", {"inputs": text}).json
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-5)
    (tokens,) = client.post("/tokenize", {"inputs": text}).json
    assert [token["text"] for token in tokens] == ["[CLS]", "[SEP]"]
