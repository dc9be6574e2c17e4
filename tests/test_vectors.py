"""Rooms 5 to 7 with the real model: our vectors are those of sentence-transformers.

The reference (tests/reference) was computed in float32, one text at a time. Here every
text is computed alone and at several places of a batch, because what llama.cpp does with
a sequence must not depend on its neighbours.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import embellama_server as es
from tests import kit

pytestmark = pytest.mark.model

REFERENCE = kit.ROOT / "tests/reference/all-MiniLM-L6-v2.jsonl"
ROWS = [json.loads(line) for line in REFERENCE.read_text("ascii").splitlines()]
IDS = [np.array(row["ids"], np.int32) for row in ROWS]
KINDS = [row["kind"] for row in ROWS]
TEXTS = range(len(ROWS))
EXPECTED = np.stack(
    [np.frombuffer(base64.b64decode(row["vector"]), "<f4") for row in ROWS]
)
BATCH_TOKENS = 2048  # room for three of the longest texts and more
# To the reference. The lowest are 0.999995 with f32 and f16, and 0.999952 with bf16.
LEAST_COSINE = 0.9999
WEIGHTS = ("f16", "bf16", "f32")

Engines = dict[str, es.Engine]
Batches = list[list[int]]  # of indices into ROWS


@pytest.fixture(scope="module")
def engines(
    default_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engines]:
    """The model as it is and re-encoded, with room for batches of long texts."""
    options = es.ModelSettings(batch_tokens=BATCH_TOKENS)
    folder = tmp_path_factory.mktemp("weights")
    loaded = {"f16": es.Engine(str(default_model), options, kit.quiet_log())}
    for weights in ("bf16", "f32"):
        path = str(folder / f"{weights}.gguf")
        loaded["f16"].reencode(path, weights)
        loaded[weights] = es.Engine(path, options, kit.quiet_log())
    yield loaded
    for engine in loaded.values():
        engine.close()


@pytest.fixture(scope="module")
def alone(engines: Engines) -> dict[str, Any]:
    """The vector of every text, computed one at a time."""
    return {
        name: computed(engine, [[i] for i in TEXTS]) for name, engine in engines.items()
    }


def computed(engine: es.Engine, batches: Batches) -> Any:
    """The vectors of the batches' texts, one below the other."""
    context = engine.new_context()
    try:
        rows = [context.embed([IDS[i] for i in batch]) for batch in batches]
        return kit.units(np.concatenate(rows))
    finally:
        context.close()


def assert_close(vectors: Any, texts: list[int], least: float = LEAST_COSINE) -> None:
    """Each vector is that of its text in the reference."""
    # Both have length 1 (see below), so the product is the cosine.
    cosines = np.einsum("ij,ij->i", vectors, EXPECTED[texts])
    worst = [
        f"{KINDS[text]}: {cosine:.6f}"
        for text, cosine in zip(texts, cosines, strict=True)
        if not cosine >= least
    ]
    assert not worst


def rotated_batches() -> Batches:
    """Batches of three in which every text stands first, in the middle and last."""
    n = len(ROWS)
    return [[text, (text + 5) % n, (text + 35) % n] for text in TEXTS]


# --- the vectors ---

# Sweeps of one kind of weights each day are enough.
ONE_EACH_DAY = [
    pytest.param(name, marks=[] if name == "f16" else [pytest.mark.heavy])
    for name in WEIGHTS
]


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_text_alone_has_the_references_vector(
    alone: dict[str, Any], name: str
) -> None:
    assert_close(alone[name], list(TEXTS))


@pytest.mark.parametrize("name", ONE_EACH_DAY)
def test_a_text_has_the_same_vector_wherever_it_stands_in_a_batch(
    engines: Engines, name: str
) -> None:
    batches = rotated_batches()
    assert all(sum(len(IDS[i]) for i in batch) <= BATCH_TOKENS for batch in batches)
    for place in zip(*batches, strict=True):
        assert sorted(place) == list(TEXTS), "not every text stood here"
    assert_close(computed(engines[name], batches), list(itertools.chain(*batches)))


@pytest.mark.parametrize("name", ONE_EACH_DAY)
def test_a_batch_as_full_as_it_can_be_harms_no_text(
    engines: Engines, name: str
) -> None:
    # All texts, the shortest first, into as few batches as possible.
    batches: Batches = [[]]
    for text in sorted(TEXTS, key=lambda i: len(IDS[i])):
        if sum(len(IDS[i]) for i in [*batches[-1], text]) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(text)
    assert len(batches[0]) > 50
    assert_close(computed(engines[name], batches), list(itertools.chain(*batches)))


def test_texts_with_different_ids_never_share_a_vector(alone: dict[str, Any]) -> None:
    # Equal ids must give equal vectors, and only they: a mix-up of rows, a dropped
    # last token or a wrong mask would show here even where the cosine is high.
    vectors = alone["f32"]
    for one, other in itertools.combinations(TEXTS, 2):
        gap = float(np.abs(vectors[one] - vectors[other]).max())
        if ROWS[one]["ids"] == ROWS[other]["ids"]:
            assert gap <= 1e-5, (KINDS[one], KINDS[other])
        else:
            assert gap > 5e-4, (KINDS[one], KINDS[other])


def test_some_texts_of_the_reference_do_have_equal_ids() -> None:
    # Or the test above would not test the one half of its claim.
    assert len({tuple(row["ids"]) for row in ROWS}) < len(ROWS)


def test_a_repeated_text_gets_the_same_vector_each_time(engines: Engines) -> None:
    # Not to the bit: in a larger batch llama.cpp adds in another order, and its GELU is
    # a table in half precision.
    text = KINDS.index("english-100-words")
    for engine in engines.values():
        vectors = computed(engine, [[text] * 8, [text], [0, text, 1]])
        same = vectors[[*range(9), 10]]
        assert (same @ same.T).min() >= 0.99999


def test_vectors_have_length_one(alone: dict[str, Any]) -> None:
    for vectors in (*alone.values(), EXPECTED):
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        assert np.abs(lengths - 1).max() < 1e-6
        assert vectors.dtype == np.float32


@pytest.mark.heavy
def test_two_contexts_at_once_agree_with_one(
    engines: Engines, alone: dict[str, Any]
) -> None:
    batches = [[i] for i in TEXTS]
    results: dict[int, Any] = {}
    together = threading.Barrier(2)

    def work(number: int) -> None:
        together.wait(kit.DEADLINE_S)
        results[number] = computed(engines["f16"], batches)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert np.abs(results[number] - alone["f16"]).max() <= 1e-5


# --- the file ---


def test_the_default_model_is_whole(default_model: Path) -> None:
    found = hashlib.sha256(default_model.read_bytes()).hexdigest()
    assert found == es.DEFAULT_MODEL.gguf_sha256
    reader = gguf.GGUFReader(default_model)
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    assert shapes == dict(minilm_shapes())
    assert len(shapes) == 101
    full = {"position_embd.weight", "token_types.weight"}
    full |= {name for name, shape in shapes.items() if len(shape) == 1}
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds == {name: "F32" if name in full else "F16" for name in shapes}


def minilm_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of all-MiniLM-L6-v2, from its config.json: 6 layers of 384, inner 1536."""
    embeddings = {"token_embd": 30522, "position_embd": 512, "token_types": 2}
    for name, rows in embeddings.items():
        yield f"{name}.weight", (rows, 384)
    norms = ["token_embd_norm"]
    for block in (f"blk.{n}." for n in range(6)):
        norms += [block + "attn_output_norm", block + "layer_output_norm"]
        shapes = dict.fromkeys(
            ("attn_q", "attn_k", "attn_v", "attn_output"), (384, 384)
        )
        for name, shape in {
            **shapes,
            "ffn_up": (1536, 384),
            "ffn_down": (384, 1536),
        }.items():
            yield f"{block}{name}.weight", shape
            yield f"{block}{name}.bias", shape[:1]
    for norm in norms:
        yield f"{norm}.weight", (384,)
        yield f"{norm}.bias", (384,)


def test_the_default_models_metadata_are_its_config_json(default_model: Path) -> None:
    fields = gguf.GGUFReader(default_model).fields
    expected: dict[str, object] = {
        "general.architecture": "bert",
        "general.name": "all-MiniLM-L6-v2",
        "bert.block_count": 6,
        "bert.context_length": 512,
        "bert.embedding_length": 384,
        "bert.feed_forward_length": 1536,
        "bert.attention.head_count": 12,
        "bert.attention.causal": False,
        "bert.pooling_type": 1,
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 100,
        "tokenizer.ggml.bos_token_id": 101,
        "tokenizer.ggml.seperator_token_id": 102,
    }
    assert {key: fields[key].contents() for key in expected} == expected
    epsilon = fields["bert.attention.layer_norm_epsilon"].contents()
    assert epsilon == pytest.approx(1e-12)
    words = fields["tokenizer.ggml.tokens"].contents()
    assert (len(words), words[0], words[1996]) == (30522, "[PAD]", "\u2581the")
