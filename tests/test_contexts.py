"""Room CONTEXTS: what becomes of token ids on their way through llama.cpp and back.

With the small random models of test_engine.py where llama.cpp has to be asked.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import embellama_server as es
from tests import kit, models
from tests.test_engine import add_bpe, add_spm, bert, llama, loaded, run_python

LONGEST = 128  # tokens that these models read
# Names of the models, and how they are made.
MAKERS: dict[str, Callable[[Path], Path]] = {
    "bert": lambda path: bert(path, trained=LONGEST),
    "bpe": lambda path: llama(path, add_bpe, trained=LONGEST),
    "spm": lambda path: llama(path, add_spm, trained=LONGEST),
}


@pytest.fixture(scope="module", params=MAKERS)
def small(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[es.Engine]:
    """Each of the small models in turn."""
    name = request.param
    path = MAKERS[name](tmp_path_factory.mktemp("contexts") / f"{name}.gguf")
    with loaded(path) as engine:
        yield engine


@pytest.fixture
def context(small: es.Engine) -> Iterator[es.Context]:
    """A worker's context of it."""
    made = small.new_context()
    yield made
    made.close()


@pytest.fixture
def long_context(small: es.Engine) -> Iterator[es.Context]:
    """Its context for long inputs."""
    made = small.new_context(needs_long_context=True)
    yield made
    made.close()


@pytest.fixture
def token_context(small: es.Engine) -> Iterator[es.Context]:
    """Its context for the vectors of tokens."""
    made = small.new_context(needs_long_context=True, per_token=True)
    yield made
    made.close()


def some_ids(engine: es.Engine, *sizes: int) -> list[es.TokenIds]:
    """Inputs of so many tokens, other ones each."""
    chance = np.random.default_rng(6)
    n_vocab = engine.card.n_vocab
    return [chance.integers(5, n_vocab, size, np.int32) for size in sizes]


def cosines(one: Any, other: Any) -> Any:
    """Of each row with the same row of the other."""
    return np.einsum("ij,ij->i", kit.units(one), kit.units(other))


# --- pure parts ---


def test_rows_are_scaled_to_length_one_whatever_their_size() -> None:
    huge, tiny = np.finfo(np.float32).max, 1e-45
    raw = np.array([[3, 4], [huge, huge], [tiny, 0], [-1, 0]], np.float32)
    half = 0.5**0.5
    expected = [[0.6, 0.8], [half, half], [1, 0], [-1, 0]]
    vectors = kit.units(raw)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [[0, 0], [np.nan, 1], [np.inf, 1], [1, -np.inf]])
def test_a_vector_without_a_direction_is_nan_throughout(bad: list[float]) -> None:
    assert np.isnan(es.normalised(np.array(bad, np.float32))).all()


def test_a_texts_ids_get_special_tokens_even_when_it_has_written_them() -> None:
    card = kit.fake_card(prefix=(1,), suffix=(2,))
    assert es.with_special_tokens([5], card) == [1, 5, 2]
    assert es.with_special_tokens([1, 5, 2], card) == [1, 1, 5, 2, 2]
    assert es.with_special_tokens([], card) == [1, 2]


@pytest.mark.parametrize(
    ("prefix", "suffix", "ids", "expected"),
    [
        ((1,), (2,), [5], [1, 5, 2]),
        ((1,), (2,), [1, 5, 2], [1, 5, 2]),
        ((1,), (2,), [1, 5], [1, 1, 5, 2]),
        ((1,), (2,), [5, 2], [1, 5, 2, 2]),
        ((1,), (2,), [1, 2], [1, 2]),
        ((1,), (1,), [1], [1, 1, 1]),
        ((), (2,), [5], [5, 2]),
        ((), (2,), [5, 2], [5, 2]),
        ((1,), (), [1, 5], [1, 5]),
        ((), (), [5], [5]),
        ((1, 1), (2, 3), [1, 1, 2, 3], [1, 1, 2, 3]),
    ],
)
def test_a_clients_ids_get_special_tokens_unless_the_client_gave_them(
    prefix: tuple[int, ...],
    suffix: tuple[int, ...],
    ids: list[int],
    expected: list[int],
) -> None:
    card = kit.fake_card(prefix=prefix, suffix=suffix)
    assert es.with_special_tokens_once(ids, card) == expected


def test_truncating_keeps_the_beginning_and_the_final_special_tokens() -> None:
    ids = list(range(40))
    assert es.truncated(ids, 5, 1, 2) == [0, 1, 2, 38, 39]
    assert es.truncated(ids, 3, 1, 0) == [0, 1, 2]
    assert es.truncated(ids, 3, 0, 0) == [0, 1, 2]


def test_truncating_at_the_left_keeps_the_end_and_the_first_special_tokens() -> None:
    ids = list(range(40))
    assert es.truncated(ids, 5, 2, 1, left=True) == [0, 1, 37, 38, 39]
    assert es.truncated(ids, 3, 0, 1, left=True) == [37, 38, 39]
    assert es.truncated(ids, 3, 0, 0, left=True) == [37, 38, 39]


@given(st.data())
def test_what_is_cut_has_the_length_asked_for_and_both_its_ends(
    data: st.DataObject,
) -> None:
    size = data.draw(st.integers(2, 60))
    ids = list(range(size))
    most = data.draw(st.integers(1, size - 1))
    front = data.draw(st.integers(0, most - 1))
    end = data.draw(st.integers(0, most - 1 - front))
    for left in (False, True):
        cut = es.truncated(ids, most, front, end, left=left)
        assert len(cut) == most
        assert cut == sorted(set(cut)), "in order, and each once"
        assert cut[:front] == ids[:front]
        assert cut[most - end :] == ids[size - end :]
        gaps = sum(b - a > 1 for a, b in itertools.pairwise(cut))
        at_an_edge = (cut[0] > 0) + (cut[-1] < size - 1)
        assert gaps + at_an_edge == 1, "one piece is left out"
    assert ids == list(range(size)), "another list"


# --- small calls and large ones ---


class Encoder:
    """llama.cpp, which notes what it would have computed in which llama_context."""

    def __init__(self, context: es.Context) -> None:
        self.real = context._llama
        self.calls: list[tuple[Any, list[int]]] = []
        self.threads: dict[Any, int] = {}
        self.freed: list[Any] = []
        self._context = context
        self._row = np.zeros(context._row_length, np.float32)
        vector_of: Any = lambda pointer, row: self._row.ctypes.data
        context._vector_of = vector_of
        context._llama = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def llama_encode(self, pointer: Any, batch: Any) -> int:
        sequences = self._context._tokens.sequences[: batch.n_tokens]
        self.calls.append((pointer, np.bincount(sequences).tolist()))
        return 0

    def llama_set_n_threads(self, pointer: Any, threads: int, _: int) -> None:
        self.threads[pointer] = threads

    def llama_free(self, pointer: Any) -> None:
        self.freed.append(pointer)
        self.real.llama_free(pointer)


@pytest.fixture(scope="module")
def encoder(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[es.Context, Encoder]]:
    """A worker's context of an encoder, and what it asks of llama.cpp."""
    with loaded(bert(tmp_path_factory.mktemp("encoder") / "m.gguf")) as engine:
        made = engine.new_context()
        encoder = Encoder(made)
        yield made, encoder
        made.close()
    pointers = {pointer for pointer, _ in encoder.calls}
    assert len(pointers) == 2
    assert sorted(encoder.freed) == sorted(pointers), "both are freed, and once"


@given(
    st.lists(st.integers(1, 80), min_size=1, max_size=3)
    | st.lists(st.integers(1, 3), min_size=1, max_size=70),
    st.integers(1, 8),
)
def test_small_calls_have_a_context_of_their_own_and_large_ones_fill_a_tile(
    encoder: tuple[es.Context, Encoder], sizes: list[int], threads: int
) -> None:
    made, llama = encoder
    inputs = [np.full(size, number, np.int32) for number, size in enumerate(sizes)]
    assert len(made.embed(inputs, threads=threads)) == len(sizes)
    pointer, call = llama.calls[-1]
    assert llama.threads.get(pointer, 1) == threads
    assert pointer in (made._main.pointer, made._small.pointer if made._small else None)
    if pointer == made._main.pointer:
        assert call[: len(sizes)] == sizes
        assert len(call) <= len(sizes) + 1, "one more is what there is room for"
        assert sum(call) == max(sum(sizes), es.FLASH_TILE_TOKENS)
    else:
        assert call == sizes
        assert sum(call) <= es.FLASH_TILE_TOKENS, "what it has room for"
    if sum(sizes) < es.FLASH_TILE_TOKENS // 2:
        assert pointer != made._main.pointer, "filling up would cost more"


EDGES = (1, 10, 47, 48, 49, 60, 63, 64, 65, LONGEST)

# --- rows as the model gives them, and rows of tokens ---


def lengths(rows: Any) -> Any:
    """The Euclidean length of each."""
    return np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))


def test_rows_are_not_scaled(
    small: es.Engine, context: es.Context, long_context: es.Context
) -> None:
    for used in (context, long_context):
        rows = np.concatenate([used.embed([ids]) for ids in some_ids(small, *EDGES)])
        assert np.abs(lengths(rows) - 1).min() > 0.1


def test_inputs_of_one_call_have_the_rows_that_each_has_alone(
    small: es.Engine, context: es.Context
) -> None:
    for sizes in ((1, 2, 3), (40, 15), (20, 43), (60, 70, 3)):
        inputs = some_ids(small, *sizes)
        alone = np.concatenate([context.embed([ids]) for ids in inputs])
        together = context.embed(inputs)
        assert together.shape == alone.shape
        assert cosines(alone, together).min() > 0.9999
        np.testing.assert_allclose(lengths(together), lengths(alone), rtol=0.02)


# How the vectors of its tokens become that of an input.
POOLED: dict[str, Callable[[Any], Any]] = {
    "mean": lambda rows: rows.mean(axis=0),
    "cls": lambda rows: rows[0],
    "last": lambda rows: rows[-1],
}
MADE: dict[str, Callable[[Path], Path]] = {
    "an encoder": lambda folder: bert(folder / "m.gguf", trained=LONGEST),
    "an encoder with rotary positions": models.long_context_bert,
    "a decoder": lambda folder: models.tiny_causal(folder, context=LONGEST),
}


@pytest.mark.parametrize("pooling", POOLED)
@pytest.mark.parametrize("name", MADE)
def test_the_vectors_of_tokens_are_those_that_are_pooled(
    tmp_path: Path, name: str, pooling: str
) -> None:
    with loaded(MADE[name](tmp_path), pooling=pooling) as engine:
        assert engine.card.pooling == pooling
        by_token = engine.new_context(needs_long_context=True, per_token=True)
        long_context = engine.new_context(needs_long_context=True)
        for ids in some_ids(engine, 1, 2, 10, 63, 64, 65, LONGEST):
            rows = by_token.embed([ids])
            assert rows.shape == (len(ids), engine.card.n_embd)
            (whole,) = long_context.embed([ids])
            scale = lengths(whole[None])[0]
            pooled = POOLED[pooling](rows)
            np.testing.assert_allclose(pooled / scale, whole / scale, atol=2e-3)
        by_token.close()
        long_context.close()


# Sizes of inputs of one call: equal and not, at and around the steps in which they may be
# computed, and one that fills a call.
CALLS = (
    *((5,) * 12, (64,) * 3, (1, 200, 3, 64, 65), (513, 1, 600), (127, 128, 129, 255)),
    *((1200,), (511, 512), (30, 3, 30, 3, 30)),
)


@pytest.mark.parametrize("pooling", POOLED)
@pytest.mark.parametrize("name", ["an encoder", "rotary positions", "a decoder"])
def test_an_inputs_vector_does_not_depend_on_where_llama_cpp_cuts(
    tmp_path: Path, name: str, pooling: str
) -> None:
    path = {
        "an encoder": lambda: bert(tmp_path / "m.gguf", trained=1200),
        "rotary positions": lambda: models.long_context_bert(tmp_path, context=1200),
        "a decoder": lambda: models.tiny_causal(tmp_path, context=1200),
    }[name]()
    with loaded(path, pooling=pooling, batch_tokens=1200) as engine:
        by_token = engine.new_context(needs_long_context=True, per_token=True)
        contexts = engine.new_context(), engine.new_context(needs_long_context=True)
        for sizes in CALLS:
            inputs = some_ids(engine, *sizes)
            expected = [POOLED[pooling](by_token.embed([ids])) for ids in inputs]
            together = contexts[0].embed(inputs)
            alone = np.concatenate([contexts[1].embed([ids]) for ids in inputs])
            assert cosines(together, np.array(expected)).min() > 0.9999
            assert cosines(alone, np.array(expected)).min() > 0.9999
        for context in (by_token, *contexts):
            context.close()


def test_a_context_for_tokens_keeps_nothing_of_a_call(
    small: es.Engine, token_context: es.Context
) -> None:
    inputs = some_ids(small, *EDGES)
    before = [token_context.embed([ids]) for ids in inputs]
    for order in (inputs[::-1], inputs[::2]):
        for ids in order:
            token_context.embed([ids], fresh=True)
    for ids, rows in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(token_context.embed([ids]), rows)
        two = token_context.embed([ids], threads=2)
        assert cosines(two, rows).min() > 0.9999


def test_what_a_context_for_tokens_cannot_compute_is_an_error_and_work_goes_on(
    small: es.Engine, token_context: es.Context
) -> None:
    good, long = some_ids(small, 20, LONGEST + 1)
    expected = token_context.embed([good])
    bad = good.copy()
    bad[7] = small.card.n_vocab
    for ids in (bad, long, good[:0]):
        with pytest.raises(es.EngineError):
            token_context.embed([ids])
        np.testing.assert_array_equal(token_context.embed([good]), expected)


@pytest.mark.parametrize(
    "make", [models.tiny_cross_encoder, models.tiny_causal_reranker]
)
def test_a_reranker_gives_all_its_scores_of_a_pair(
    tmp_path: Path, make: Callable[..., Path]
) -> None:
    with loaded(make(tmp_path, labels=("a", "b", "c"))) as engine:
        assert (engine.card.n_scores, engine.card.row_length) == (3, 3)
        context = engine.new_context()
        pairs = [
            np.array(
                es.pair_with_special_tokens([*query], [*text], engine.card), np.int32
            )
            for query, text in (some_ids(engine, 3, 5), some_ids(engine, 4, 9))
        ]
        alone = np.concatenate([context.embed([ids]) for ids in pairs])
        assert alone.shape == (2, 3)
        np.testing.assert_allclose(context.embed(pairs), alone, atol=5e-3)
        if engine.card.is_probability:
            np.testing.assert_allclose(alone.sum(axis=1), 1, rtol=1e-5)
        context.close()


# --- edges ---


def test_an_input_has_one_vector_whatever_computes_it(
    small: es.Engine, context: es.Context, long_context: es.Context
) -> None:
    inputs = some_ids(small, *EDGES)
    alone = np.concatenate([context.embed([ids]) for ids in inputs])
    in_long_context = np.concatenate([long_context.embed([ids]) for ids in inputs])
    assert cosines(alone, in_long_context).min() > 0.9999
    for other in some_ids(small, 1, 2, 38, 54, 100):
        beside = [context.embed([other, ids, other[:1]])[1] for ids in inputs]
        assert cosines(alone, beside).min() > 0.9999
    # Without this, a model that gives one vector for everything would do.
    apart = kit.units(alone[3:]) @ kit.units(alone[3:]).T - np.eye(len(inputs) - 3)
    assert apart.max() < 0.9999


def test_the_edges_do_not_wear_off(small: es.Engine, context: es.Context) -> None:
    # Neither of the pair, nor what fills up, leaves anything behind in the other.
    inputs = some_ids(small, *EDGES)
    before = [context.embed([ids]) for ids in inputs]
    for order in (inputs[::-1], inputs[::2], inputs):
        for ids in order:
            context.embed([ids])
    after = [context.embed([ids]) for ids in inputs]
    np.testing.assert_array_equal(before, after)


def test_many_tiny_inputs_share_a_small_call(
    small: es.Engine, context: es.Context
) -> None:
    for count in (31, 32, 48, 49, 63, 64, 65):
        if count > small.card.batch_inputs:
            break
        inputs = some_ids(small, *[1] * count)
        alone = np.concatenate([context.embed([ids]) for ids in inputs])
        assert cosines(alone, context.embed(inputs)).min() > 0.9999


@pytest.mark.parametrize("total", [48, 49, 60, 63, 64, 65])
def test_an_error_at_an_edge_is_an_error_and_work_goes_on(
    small: es.Engine, context: es.Context, total: int
) -> None:
    (good,) = some_ids(small, total)
    expected = context.embed([good])
    bad, none = good.copy(), np.zeros(0, np.int32)
    bad[-1] = small.card.n_vocab
    for inputs in ([bad], [good, none], [none], [none, good]):
        with pytest.raises(es.EngineError):
            context.embed(inputs)
        np.testing.assert_array_equal(context.embed([good]), expected)


# --- threads ---


def test_two_threads_compute_what_one_does(
    small: es.Engine, context: es.Context
) -> None:
    batches = [some_ids(small, size) for size in EDGES] + [some_ids(small, 3, 40, 100)]
    for inputs in batches:
        one = context.embed(inputs)
        for threads in (2, 3, 1):
            vectors = context.embed(inputs, threads=threads)
            assert cosines(one, vectors).min() > 0.99999


@pytest.mark.model
def test_two_threads_compute_what_one_does_in_the_default_model(
    engine: es.Engine,
) -> None:
    context = engine.new_context()
    for sizes in ([3], [24], [48], [60], [64], [256], [512], [100, 28, 7, 120]):
        inputs = some_ids(engine, *sizes)
        one = context.embed(inputs)
        assert cosines(one, context.embed(inputs, threads=2)).min() > 0.99999
    context.close()


@pytest.mark.model
def test_the_edges_are_none_in_the_default_model(engine: es.Engine) -> None:
    context = engine.new_context()
    inputs = some_ids(engine, *EDGES)
    alone = np.concatenate([context.embed([ids]) for ids in inputs])
    for other in some_ids(engine, 1, 38, 100):
        beside = [context.embed([other, ids])[1] for ids in inputs]
        assert cosines(alone, beside).min() > 0.9999
    context.close()


# --- memory ---


@dataclasses.dataclass
class Library:
    """llama.cpp, whose calls are counted and whose encoding returns this code."""

    real: Any
    code: int | None = None
    called: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )

    def __getattr__(self, name: str) -> Any:
        self.called[name] += 1
        if name in ("llama_encode", "llama_decode") and self.code is not None:
            return lambda *_: self.code
        return getattr(self.real, name)


@contextlib.contextmanager
def watched(engine: es.Engine, *, on_gpu: bool) -> Iterator[tuple[Any, Library]]:
    """A context of an engine as one on a device would be, and its llama.cpp."""
    made = engine.new_context(needs_long_context=True)
    library = Library(made._llama)
    made._llama = library
    made._options = dataclasses.replace(made._options, on_gpu=on_gpu)
    yield made, library
    made._llama = library.real
    made.close()


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_device_is_waited_for_where_the_interpreter_is_free(
    small: es.Engine, on_gpu: bool
) -> None:
    with watched(small, on_gpu=on_gpu) as (made, library):
        made.embed(some_ids(small, 5, 6)[:1])
        assert library.called["llama_synchronize"] == on_gpu


@pytest.mark.parametrize(
    ("code", "kind"), [(-2, es.NoMemory), (-3, es.EngineError), (1, es.EngineError)]
)
def test_what_llama_cpp_returns_tells_want_of_memory_from_other_failures(
    small: es.Engine, code: int, kind: type[es.EngineError]
) -> None:
    with watched(small, on_gpu=False) as (made, library):
        made.embed(some_ids(small, 20))
        library.code = code
        for size in (20, LONGEST):  # the second needs more room first
            with pytest.raises(es.EngineError) as caught:
                made.embed(some_ids(small, size))
            assert type(caught.value) is kind
        library.code = None
        assert np.isfinite(made.embed(some_ids(small, LONGEST))).all()


@pytest.mark.parametrize("needs_long_context", [False, True])
@pytest.mark.parametrize("size", [20, LONGEST], ids=["small", "with more room"])
def test_an_abort_before_the_call_ends_it_until_it_is_forgotten(
    small: es.Engine, size: int, needs_long_context: bool
) -> None:
    context = small.new_context(needs_long_context=needs_long_context)
    context.abort()
    for _ in range(2):
        with pytest.raises(es.CallAborted):
            context.embed(some_ids(small, size))
    context.rearm()
    assert np.isfinite(context.embed(some_ids(small, size))).all()
    context.close()


# Characters are tokens, a word's first and a later one: 30,005 tokens, so that a call's
# logits are megabytes and can be seen.
WIDE_LETTERS = "".join(map(chr, range(0x4E00, 0x4E00 + 15_000)))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder with a large vocabulary."""
    folder = tmp_path_factory.mktemp("wide")
    return bert(folder / "wide.gguf", WIDE_LETTERS, trained=512)


def mebibytes(tokens: int, engine: es.Engine) -> int:
    """What the logits of so many tokens take for a moment."""
    return tokens * engine.card.n_vocab * 4 >> 20


def test_a_long_input_is_refused_in_numbers_when_memory_is_short(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(wide) as engine:
        long_context = engine.new_context(needs_long_context=True)
        (ids,) = some_ids(engine, 500)
        needed = mebibytes(512, engine)
        assert needed > 50
        monkeypatch.setattr(es, "free_memory_bytes", lambda: 3.5 * 2**20)
        with pytest.raises(es.EngineError) as caught:
            long_context.embed([ids])
        assert f"500 tokens need {needed} MiB" in str(caught.value)
        assert "3 MiB of memory are free" in str(caught.value)
        monkeypatch.undo()
        expected = long_context.embed([ids])
        # The room that was made once stays: nothing can fail it afterwards.
        monkeypatch.setattr(es, "free_memory_bytes", lambda: 0.0)
        np.testing.assert_array_equal(long_context.embed([ids]), expected)
        long_context.close()


def test_a_worker_makes_all_its_room_at_the_start_or_does_not_start(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(wide, batch_tokens=64) as engine:
        made = engine.new_context()
        monkeypatch.setattr(es, "free_memory_bytes", lambda: 0.0)
        (ids,) = some_ids(engine, engine.card.context_tokens)
        assert np.isfinite(made.embed([ids])).all()
        made.close()
        with pytest.raises(es.StartupError) as caught:
            engine.new_context()
        said = str(caught.value)
        assert "no room for another context" in said
        assert f"{len(ids)} tokens need " in said
        assert " 0 MiB of memory are free" in said


RESIDENT = """
import numpy as np

def resident_mb():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

options = es.ModelSettings()
engine = es.Engine(sys.argv[1], options, kit.quiet_log())
chance = np.random.default_rng(7)
long = chance.integers(5, engine.card.n_vocab, 512, np.int32)
batch = [long[n * 8 : n * 8 + 8] for n in range(32)]
before = resident_mb()
grown = []
contexts = []
for is_long in (False, False, False, True):
    contexts.append(engine.new_context(needs_long_context=is_long))
    contexts[-1].embed([long])
    if not is_long:
        contexts[-1].embed(batch)
        contexts[-1].embed([long[:9]])
    now = resident_mb()
    grown.append(round(now - before, 1))
    before = now
print(grown, file=sys.stderr)
assert max(grown) < 25, grown
"""


@pytest.mark.model
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives memory back")
def test_a_context_takes_little_memory_and_keeps_it_little(default_model: Path) -> None:
    # In a process of its own: what other tests left free would be used first.
    run_python(RESIDENT, default_model)
