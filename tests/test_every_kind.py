"""Every kind of model, pooling and --weights against the same file in f32.

What is compared with shares no line with the server: llama.cpp's own pooling, asked
through its C API, one text and one call each, without flash attention. The models are
random and tiny; texts go through the server's tokenizer, engine and contexts, as served.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import embellama_server as es
from tests import chat_models, kit, models
from tests.test_tiny_models import (
    DOCUMENTS,
    LAST,
    QUERY,
    RANK,
    RANKERS,
    direct_tokens,
    llama,
    opened,
    pair_tokens,
)

# The last is longer than a tile of flash attention, and than any sliding window here.
TEXTS = (*DOCUMENTS, " ".join(DOCUMENTS * 2))
MAX_TOKENS = 384  # of a call
POOLINGS = {"mean": 1, "cls": 2, "last": LAST}  # LLAMA_POOLING_TYPE_*
WEIGHTS = ("keep", "auto", *es.WEIGHT_TYPES)
_ENCODERS = ("bert", "modern-bert", "neo-bert", "jina-bert-v2", "jina-bert-v3")
EMBEDDERS: dict[str, Callable[[Path], Path]] = {
    "nomic-bert": models.long_context_bert,
    **{
        name: functools.partial(models.tiny_encoder, architecture=name)
        for name in (*_ENCODERS, "gemma-embedding")
    },
    "qwen3-embedding": functools.partial(models.tiny_causal, context=256),
    # Any decoder embeds if it is told how to pool.
    **{name: make for name, make in chat_models.GENERATING.items() if name != "qwen3"},
}
# The lowest cosine to f32 that is let through. Of all-MiniLM-L6-v2 README's table gives
# 0.99995 for bf16 and 0.9988 for q8_0.
MIN_COSINE, MIN_COSINES = 0.9999, {"q8_0": 0.998}
# A score's largest distance, of scores that lie 0.1 to 0.4 apart; see calmed(), which
# these models are not.
SCORES_WITHIN = {"f32": 0.005, "f16": 0.005, "bf16": 0.03, "q8_0": 0.08}


def calmed(path: Path) -> Path:
    """Make each layer add half of its input to it, or less, as in trained models.

    Random layers that add more multiply each other's roundings: with six of them bf16's
    cosine was 0.994. Returns the path.
    """
    reader = gguf.GGUFReader(path, "r+")
    for name, values in ((tensor.name, tensor.data) for tensor in reader.tensors):
        if "post_" in name:
            values *= values.dtype.type(0.25)
        elif "q_norm" in name or "k_norm" in name:
            values /= abs(values).mean()
        elif name.startswith("blk.") and values.ndim == 2 and name.endswith("weight"):
            gain = float(values.std()) * values.shape[1] ** 0.5
            values *= values.dtype.type(0.5 / gain)
    reader.data.flush()
    return path


class Shelf:
    """A file of each kind, and engines of it; see the fixture."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: dict[str, Path] = {}

    def path(self, kind: str) -> Path:
        """A kind's file, as it is served."""
        if kind not in self._paths:
            folder = self._folder / kind
            folder.mkdir()
            is_ranker = kind in RANKERS
            make = RANKERS[kind] if is_ranker else EMBEDDERS[kind]
            self._paths[kind] = make(folder) if is_ranker else calmed(make(folder))
        return self._paths[kind]

    def engine(self, kind: str, weights: str, pooling: str = "auto") -> es.Engine:
        """What a server with these settings computes with."""
        settings = es.Settings(
            model_path=str(self.path(kind)),
            pooling=pooling,
            weights=weights,
            cache_dir=str(self._folder),
            common_tokens=64,  # contexts take their memory, and time, by what they hold
            batch_tokens=MAX_TOKENS,
        )
        log = kit.quiet_log()
        file = es.model_file(settings, es.ModelFetch("", log, es.DEFAULT_MODEL))
        return es.weights_cache(settings, file, es.Engine, log).engine(weights)


# --- the reference ---


@functools.cache
def in_f32(path: Path) -> Path:
    """The same numbers in f32: nothing is lost."""
    target = path.with_name("f32.gguf")
    params = llama().llama_model_quantize_default_params()
    params.ftype = llama().LLAMA_FTYPE_ALL_F32
    raw = os.fsencode(path), os.fsencode(target)
    assert llama().llama_model_quantize(*raw, ctypes.byref(params)) == 0
    return target


@functools.cache
def expected_vectors(path: Path, pooling: str) -> Any:
    """Of TEXTS."""
    f32, number = in_f32(path), POOLINGS[pooling]
    return np.array([pooled(f32, direct_tokens(f32, text), number) for text in TEXTS])


@functools.cache
def expected_scores(path: Path) -> Any:
    """Of QUERY and DOCUMENTS."""
    f32 = in_f32(path)
    pairs = (pair_tokens(f32, QUERY, document) for document in DOCUMENTS)
    return np.array([pooled(f32, ids, RANK)[0] for ids in pairs])


def pooled(path: Path, ids: Sequence[int], pooling: int) -> Any:
    """What llama.cpp makes of a sequence in one call; the scores if it ranks."""
    params = llama().llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(ids)
    params.n_threads = params.n_threads_batch = 1
    params.embeddings = True
    params.pooling_type = pooling
    params.flash_attn_type = 0
    context = llama().llama_init_from_model(opened(path), params)
    assert context
    batch = llama().llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        batch.logits[place] = 1
    is_encoder = llama().llama_get_memory(context) is None
    call = llama().llama_encode if is_encoder else llama().llama_decode
    assert call(context, batch) == 0
    model = opened(path)
    width = llama().llama_model_n_embd(model)
    numbers = llama().llama_model_n_cls_out(model) if pooling == RANK else width
    found = llama().llama_get_embeddings_seq(context, 0)
    values = np.ctypeslib.as_array(found, (numbers,)).astype(np.float64)
    llama().llama_batch_free(batch)
    llama().llama_free(context)
    return values


# --- the claims ---


def is_close_enough(rows: Any, expected: Any, weights: str) -> bool:
    """Whether each row's cosine to what is expected is high enough."""
    cosines = (kit.units(rows) * kit.units(expected)).sum(axis=1)
    return bool(cosines.min() >= MIN_COSINES.get(weights, MIN_COSINE))


def rows_of(engine: es.Engine, inputs: Sequence[Any]) -> tuple[Any, Any]:
    """A request's rows: each input alone in its call, and all in one."""
    request = es.EmbedRequest(inputs=list(inputs))
    read = es.Reader(engine, request).read()
    ids = [found[0] for found in read if isinstance(found, tuple)]
    with closing(engine.new_context()) as context:
        alone = [context.embed([one])[0] for one in ids]
        return np.array(alone, np.float64), context.embed(ids).astype(np.float64)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    es.LLAMA_LOG.is_muted = True  # a hundred lines a model
    yield Shelf(tmp_path_factory.mktemp("kinds"))
    es.LLAMA_LOG.is_muted = False


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", EMBEDDERS)
def test_vectors_are_those_of_f32(
    shelf: Shelf,
    kind: str,
    pooling: str,
    weights: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(es, "_MEASURE_S", 0.0)  # of auto: a call each
    expected = expected_vectors(shelf.path(kind), pooling)
    with closing(shelf.engine(kind, weights, pooling)) as engine:
        assert engine.card.pooling == pooling
        assert weights in ("keep", "auto", engine.card.weights)
        for rows in rows_of(engine, TEXTS):
            assert is_close_enough(rows, expected, engine.card.weights)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", RANKERS)
def test_scores_are_those_of_f32(shelf: Shelf, kind: str, weights: str) -> None:
    expected = expected_scores(shelf.path(kind))
    pairs = [es.Pair(QUERY, document) for document in DOCUMENTS]
    with closing(shelf.engine(kind, weights)) as engine:
        assert engine.card.kind == "rank"
        for rows in rows_of(engine, pairs):
            apart = abs(rows[:, 0] - expected).max()
            assert apart <= SCORES_WITHIN[engine.card.weights]


@pytest.mark.parametrize("kind", EMBEDDERS)
def test_another_text_or_pooling_is_further_than_any_rounding(
    shelf: Shelf, kind: str
) -> None:
    # Without this, models whose vectors are all alike would do.
    found = {
        pooling: expected_vectors(shelf.path(kind), pooling) for pooling in POOLINGS
    }
    for one, other in itertools.combinations(POOLINGS, 2):
        assert not is_close_enough(found[one], found[other], "q8_0")
    is_causal = kind in (*chat_models.GENERATING, "qwen3-embedding")
    for pooling in ("mean", "last") if is_causal else POOLINGS:  # its first sees itself
        rows = kit.units(found[pooling])
        assert (rows @ rows.T - np.eye(len(rows))).max() < 0.9995
