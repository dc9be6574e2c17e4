"""Room SEGMENTS: the two texts of a pair, as BERT's rerankers were trained to see them.

What is compared with is a forward pass in numpy over the file's own tensors, which shares
no line with the server or llama.cpp.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import embellama_server as es
from tests import models
from tests.test_engine import loaded

QUERY, DOCUMENTS = (
    "time",
    ("no time", "a new year", "he said that it was like any other"),
)
HEADS = 2

# --- the reference ---


def tensors_of(path: Path) -> dict[str, Any]:
    """A file's tensors, in f32."""
    return {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for tensor in gguf.GGUFReader(path).tensors
    }


def reference_score(path: Path, first: Sequence[int], second: Sequence[int]) -> float:
    """What BertForSequenceClassification gives for a pair; both with special tokens."""
    weights = tensors_of(path)

    def linear(rows: Any, name: str) -> Any:
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(rows: Any, name: str) -> Any:
        centred = rows - rows.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    ids, types = [*first, *second], [0] * len(first) + [1] * len(second)
    rows = weights["token_embd.weight"][ids] + weights["token_types.weight"][types]
    rows = norm(rows + weights["position_embd.weight"][: len(ids)], "token_embd_norm")
    attended = np.empty_like(rows)
    for columns in np.split(np.arange(rows.shape[1]), HEADS):
        q, k, v = (linear(rows, f"blk.0.attn_{n}")[:, columns] for n in "qkv")
        shares = np.exp(q @ k.T / math.sqrt(len(columns)))
        attended[:, columns] = shares / shares.sum(-1, keepdims=True) @ v
    rows = norm(linear(attended, "blk.0.attn_output") + rows, "blk.0.attn_output_norm")
    inner = linear(rows, "blk.0.ffn_up")
    inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    rows = norm(linear(inner, "blk.0.ffn_down") + rows, "blk.0.layer_output_norm")
    pooled = np.tanh(linear(rows[0], "cls")) if "cls.weight" in weights else rows[0]
    return float(linear(pooled, "cls.output")[0])


def with_own_second_row(path: Path) -> Path:
    """A copy whose second type has a row of its own, three times as wide as others."""
    copy = path.with_name(f"own-{path.name}")
    copy.write_bytes(path.read_bytes())
    reader = gguf.GGUFReader(copy, "r+")
    (types,) = (t for t in reader.tensors if t.name == "token_types.weight")
    types.data[1] += 0.9 * np.random.default_rng(7).standard_normal(32, np.float32)
    reader.data.flush()
    return copy


def scores(engine: es.Engine, query: str, *, together: bool = False) -> list[float]:
    """Of a query with each document."""
    request = es.EmbedRequest(inputs=[es.Pair(query, text) for text in DOCUMENTS])
    read = es.Reader(engine, request).read()
    inputs = [found[0] for found in read if isinstance(found, tuple)]
    context = engine.new_context()
    calls = [inputs] if together else [[ids] for ids in inputs]
    found = [float(row[0]) for call in calls for row in context.embed(call)]
    context.close()
    return found


def segments(engine: es.Engine, query: str, text: str) -> tuple[list[int], list[int]]:
    """The ids of both, as BERT's tokenizer gives them for a pair."""
    encode = engine.tokenizer.encode
    return [2, *encode(query), 3], [*encode(text), 3]


# --- the claims ---


@pytest.mark.parametrize("head", [("cls", "cls.output"), ("cls.output",)])
@pytest.mark.parametrize("has_own_row", [False, True])
@pytest.mark.parametrize("weights", ["keep", *es.WEIGHT_TYPES])
def test_the_scores_of_pairs_are_those_of_the_models_two_segments(
    tmp_path: Path, head: Sequence[str], has_own_row: bool, weights: str
) -> None:
    path = models.tiny_cross_encoder(tmp_path, head=head)
    if has_own_row:
        path = with_own_second_row(path)
    if weights != "keep":
        with loaded(path) as engine:
            path = path.with_name("again.gguf")
            engine.reencode(str(path), weights)
    with loaded(path) as engine:
        expected = [
            reference_score(path, *segments(engine, QUERY, text)) for text in DOCUMENTS
        ]
        # With these weights llama.cpp also rounds what it multiplies them with.
        bound = {"q8_0": 0.1, "bf16": 0.03}.get(weights, 0.01)
        for together in (False, True):
            found = scores(engine, QUERY, together=together)
            np.testing.assert_allclose(found, expected, atol=bound)
        # Without this, a model whose types make no difference would do.
        first, second = segments(engine, QUERY, DOCUMENTS[0])
        assert abs(expected[0] - reference_score(path, [*first, *second], [])) > 0.1


def test_the_tiny_models_scores_are_the_reported_ones(tmp_path: Path) -> None:
    with loaded(models.tiny_cross_encoder(tmp_path, context=1024)) as engine:
        found = scores(engine, "time")
        np.testing.assert_allclose(found[:2], [2.2681, 1.1948], atol=1e-3)


def test_a_token_that_a_query_has_written_does_not_end_it(tmp_path: Path) -> None:
    path = models.tiny_cross_encoder(tmp_path)
    query = "time [SEP] a year"
    with loaded(path) as engine:
        first, second = segments(engine, query, DOCUMENTS[0])
        assert first.count(3) == 2
        found = scores(engine, query)[0]
        np.testing.assert_allclose(
            found, reference_score(path, first, second), atol=0.01
        )


def test_a_pair_ends_with_sep_though_an_older_file_does_not_say_so(
    tmp_path: Path,
) -> None:
    path = models.tiny_cross_encoder(tmp_path, closing=False)
    with loaded(path) as engine:
        expected = reference_score(path, *segments(engine, QUERY, DOCUMENTS[1]))
        np.testing.assert_allclose(scores(engine, QUERY)[1], expected, atol=0.01)


def test_what_has_one_type_or_a_template_or_embeds_has_no_segments(
    tmp_path: Path,
) -> None:
    made: tuple[Callable[[Path], Path], ...] = (
        functools.partial(models.tiny_cross_encoder, types=1),
        models.tiny_causal_reranker,
        models.tiny_bert,
    )
    for make in made:
        with loaded(make(tmp_path)) as engine:
            assert engine.card.segment_ids == 0


def readable() -> list[int]:
    """The types of weights that gguf reads too."""
    kinds = (gguf.GGMLQuantizationType(kind) for kind in es._BLOCKS)
    known = (gguf.GGMLQuantizationType.F32, *gguf.quants._type_traits)
    return [int(kind) for kind in kinds if kind in known]


@pytest.mark.parametrize("kind", readable())
@np.errstate(all="ignore")  # random scales are anything
def test_rows_of_every_type_are_what_the_gguf_package_reads(
    tmp_path: Path, kind: int
) -> None:
    per_block, block_bytes = es._BLOCKS[kind]
    rows, blocks = 5, 256 // per_block
    chance = np.random.default_rng(kind)
    raw = chance.integers(0, 256, (rows, blocks * block_bytes), np.uint8)
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType(kind))
    types = chance.standard_normal((2, 256)).astype(np.float32)
    path = tmp_path / "rows"
    path.write_bytes(types.tobytes() + raw.tobytes())
    tensors = {
        b"token_types.weight": es.Tensor(0, 0, 0, 256, 2, 1024),
        b"token_embd.weight": es.Tensor(0, 2048, kind, 256, rows, raw.shape[1]),
    }
    input_rows = es.InputRows(
        es._llama_cpp(), [str(path)], es.GgufHeader(tensors=tensors)
    )
    found = np.empty((3, 256), np.float32)
    input_rows.put(np.array([4, rows + 1, 0], np.int32), found)
    added = np.stack([types[0] * 0, types[1] - types[0], types[0] * 0])
    np.testing.assert_allclose(found, expected[[4, 1, 0]] + added, rtol=1e-5)
