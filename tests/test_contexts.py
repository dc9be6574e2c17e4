"""Room CONTEXTS: what becomes of token ids on their way through llama.cpp and back.

With the small random models of test_engine.py where llama.cpp has to be asked.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

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
) -> Iterator[es.LlamaEngine]:
    """Each of the small models in turn."""
    name = request.param
    path = MAKERS[name](tmp_path_factory.mktemp("contexts") / f"{name}.gguf")
    with loaded(path) as engine:
        yield engine


@pytest.fixture
def context(small: es.LlamaEngine) -> Iterator[es.Context]:
    """A worker's context of it."""
    made = small.new_context()
    yield made
    made.close()


def some_ids(engine: es.LlamaEngine, *sizes: int) -> list[es.TokenIds]:
    """Inputs of so many tokens, other ones each."""
    chance = np.random.default_rng(6)
    n_vocab = engine.card.n_vocab
    return [chance.integers(5, n_vocab, size, np.int32) for size in sizes]


def cosines(one: Any, other: Any) -> Any:
    """Of each row with the same row of the other."""
    return np.einsum("ij,ij->i", one, other)


# --- pure parts ---


def test_rows_are_scaled_to_length_one_whatever_their_size() -> None:
    huge, tiny = np.finfo(np.float32).max, 1e-45
    raw = np.array([[3, 4], [huge, huge], [tiny, 0], [-1, 0]], np.float32)
    half = 0.5**0.5
    expected = [[0.6, 0.8], [half, half], [1, 0], [-1, 0]]
    vectors = es.normalised(raw)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [[0, 0], [np.nan, 1], [np.inf, 1], [1, -np.inf]])
def test_a_row_without_a_direction_is_nan_throughout_and_harms_no_other(
    bad: list[float],
) -> None:
    vectors = es.normalised(np.array([[1, 0], bad, [0, 2]], np.float32))
    assert np.isnan(vectors[1]).all()
    np.testing.assert_array_equal(vectors[[0, 2]], [[1, 0], [0, 1]])


def test_a_shortened_vector_has_length_one_and_leaves_the_whole_one_alone() -> None:
    vector = np.array([0.6, 0.0, 0.8], np.float32)
    short = es.shortened(vector, 2)
    np.testing.assert_array_equal(short, [1, 0])
    assert short.dtype == np.float32
    assert vector[2] == np.float32(0.8)


def test_a_texts_ids_are_framed_even_when_it_says_so_itself() -> None:
    card = kit.fake_card(head=(1,), tail=(2,))
    assert es.framed([5], card) == [1, 5, 2]
    assert es.framed([1, 5, 2], card) == [1, 1, 5, 2, 2]
    assert es.framed([], card) == [1, 2]


@pytest.mark.parametrize(
    ("head", "tail", "ids", "expected"),
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
def test_a_clients_ids_are_framed_unless_the_client_did(
    head: tuple[int, ...], tail: tuple[int, ...], ids: list[int], expected: list[int]
) -> None:
    assert es.framed_once(ids, kit.fake_card(head=head, tail=tail)) == expected


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


class Recorder:
    """A Context that returns the first token of each input, and its tokens."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.hows: list[tuple[int, bool, bool]] = []
        self.is_closed = self.is_aborted = False

    def embed(
        self,
        inputs: Sequence[Any],
        *,
        threads: int = 1,
        fresh: bool = False,
        raw: bool = False,
    ) -> Any:
        self.calls.append([len(ids) for ids in inputs])
        self.hows.append((threads, fresh, raw))
        return np.array([[ids[0], len(ids)] for ids in inputs], np.float32)

    def rearm(self) -> None:
        self.is_aborted = False

    def abort(self) -> None:
        self.is_aborted = True

    def close(self) -> None:
        self.is_closed = True


@given(
    st.lists(st.integers(1, 80), min_size=1, max_size=70),
    st.tuples(st.integers(1, 8), st.booleans(), st.booleans()),
)
def test_small_calls_go_to_the_brief_one_and_large_ones_fill_a_tile(
    sizes: list[int], how: tuple[int, bool, bool]
) -> None:
    brief, full = Recorder(), Recorder()
    both = es.BriefOrFull(brief, full)
    inputs = [np.full(size, number, np.int32) for number, size in enumerate(sizes)]
    rows = both.embed(inputs, threads=how[0], fresh=how[1], raw=how[2])
    np.testing.assert_array_equal(rows, list(enumerate(sizes)))
    assert len(brief.calls) + len(full.calls) == 1
    assert brief.hows + full.hows == [how]
    for call in brief.calls:
        assert call == sizes
        assert sum(call) <= es.FLASH_TILE_TOKENS, "what it has room for"
    for call in full.calls:
        assert call[: len(sizes)] == sizes
        assert len(call) <= len(sizes) + 1, "one more is what there is room for"
        assert sum(call) == max(sum(sizes), es.FLASH_TILE_TOKENS)
    if sum(sizes) < es.FLASH_TILE_TOKENS // 2:
        assert brief.calls, "filling up would cost more than it saves"


def test_closing_the_pair_closes_both() -> None:
    brief, full = Recorder(), Recorder()
    es.BriefOrFull(brief, full).close()
    assert (brief.is_closed, full.is_closed) == (True, True)


def test_ending_a_call_reaches_both_and_so_does_forgetting_it() -> None:
    brief, full = Recorder(), Recorder()
    both = es.BriefOrFull(brief, full)
    for does, is_aborted in ((both.abort, True), (both.rearm, False)):
        does()
        assert (brief.is_aborted, full.is_aborted) == (is_aborted, is_aborted)


EDGES = (1, 10, 47, 48, 49, 60, 63, 64, 65, LONGEST)

# --- rows as the model gives them, and rows of tokens ---


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_nan_throughout_and_the_rest_as_it_was(
    bad: float,
) -> None:
    rows = np.array([[3, 4, 0], [1, bad, 2], [0, 0, 0]], np.float32)
    found = es.finite(rows.copy())
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], rows[[0, 2]])
    np.testing.assert_array_equal(es.finite(rows[[0, 2]]), rows[[0, 2]])


def lengths(rows: Any) -> Any:
    """The Euclidean length of each."""
    return np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))


def test_a_raw_vector_is_the_unit_one_times_its_length(
    small: es.LlamaEngine, context: es.Context
) -> None:
    lane = small.new_context(is_lane=True)
    inputs = some_ids(small, *EDGES)
    for used in (context, lane):
        unit = np.concatenate([used.embed([ids]) for ids in inputs])
        raw = np.concatenate([used.embed([ids], raw=True) for ids in inputs])
        np.testing.assert_allclose(lengths(unit), 1, rtol=1e-6)
        assert np.abs(lengths(raw) - 1).min() > 0.1, "the claim would say nothing"
        np.testing.assert_allclose(raw, unit * lengths(raw)[:, None], rtol=1e-5)
        np.testing.assert_array_equal(es.normalised(raw), unit)
    lane.close()


def test_raw_vectors_share_a_call_as_others_do(
    small: es.LlamaEngine, context: es.Context
) -> None:
    for sizes in ((1, 2, 3), (40, 15), (20, 43), (60, 70, 3)):
        inputs = some_ids(small, *sizes)
        alone = np.concatenate([context.embed([ids], raw=True) for ids in inputs])
        together = context.embed(inputs, raw=True)
        assert together.shape == alone.shape
        assert cosines(es.normalised(alone), es.normalised(together)).min() > 0.9999
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
        by_token = engine.new_context(is_lane=True, per_token=True)
        lane = engine.new_context(is_lane=True)
        for ids in some_ids(engine, 1, 2, 10, 63, 64, 65, LONGEST):
            rows = by_token.embed([ids], raw=True)
            assert rows.shape == (len(ids), engine.card.n_embd)
            (whole,) = lane.embed([ids], raw=True)
            scale = lengths(whole[None])[0]
            pooled = POOLED[pooling](rows)
            np.testing.assert_allclose(pooled / scale, whole / scale, atol=2e-3)
            unit = by_token.embed([ids])
            np.testing.assert_allclose(unit, es.normalised(rows), rtol=1e-5)
        by_token.close()
        lane.close()


def test_a_context_for_tokens_keeps_nothing_of_a_call(small: es.LlamaEngine) -> None:
    made = small.new_context(is_lane=True, per_token=True)
    inputs = some_ids(small, *EDGES)
    before = [made.embed([ids], raw=True) for ids in inputs]
    for order in (inputs[::-1], inputs[::2]):
        for ids in order:
            made.embed([ids], fresh=True)
    for ids, rows in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(made.embed([ids], raw=True), rows)
        two = made.embed([ids], threads=2, raw=True)
        assert cosines(es.normalised(two), es.normalised(rows)).min() > 0.9999
    made.close()


def test_what_a_context_for_tokens_cannot_compute_is_an_error_and_work_goes_on(
    small: es.LlamaEngine,
) -> None:
    made = small.new_context(is_lane=True, per_token=True)
    good, long = some_ids(small, 20, LONGEST + 1)
    expected = made.embed([good], raw=True)
    bad = good.copy()
    bad[7] = small.card.n_vocab
    for ids in (bad, long, good[:0]):
        with pytest.raises(es.EngineError):
            made.embed([ids], raw=True)
        np.testing.assert_array_equal(made.embed([good], raw=True), expected)
    made.close()


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
            np.array(es.framed_pair([*query], [*text], engine.card), np.int32)
            for query, text in (some_ids(engine, 3, 5), some_ids(engine, 4, 9))
        ]
        alone = np.concatenate([context.embed([ids], raw=True) for ids in pairs])
        assert alone.shape == (2, 3)
        np.testing.assert_allclose(context.embed(pairs, raw=True), alone, atol=5e-3)
        if engine.card.is_probability:
            np.testing.assert_allclose(alone.sum(axis=1), 1, rtol=1e-5)
        context.close()


# --- edges ---


def test_an_input_has_one_vector_whatever_computes_it(
    small: es.LlamaEngine, context: es.Context
) -> None:
    lane = small.new_context(is_lane=True)
    inputs = some_ids(small, *EDGES)
    alone = np.concatenate([context.embed([ids]) for ids in inputs])
    in_lane = np.concatenate([lane.embed([ids]) for ids in inputs])
    lane.close()
    assert cosines(alone, in_lane).min() > 0.9999
    for other in some_ids(small, 1, 2, 38, 54, 100):
        beside = [context.embed([other, ids, other[:1]])[1] for ids in inputs]
        assert cosines(alone, beside).min() > 0.9999
    # Without this, a model that gives one vector for everything would do.
    apart = alone[3:] @ alone[3:].T - np.eye(len(inputs) - 3)
    assert apart.max() < 0.9999


def test_the_edges_do_not_wear_off(small: es.LlamaEngine, context: es.Context) -> None:
    # Neither of the pair, nor what fills up, leaves anything behind in the other.
    inputs = some_ids(small, *EDGES)
    before = [context.embed([ids]) for ids in inputs]
    for order in (inputs[::-1], inputs[::2], inputs):
        for ids in order:
            context.embed([ids])
    after = [context.embed([ids]) for ids in inputs]
    np.testing.assert_array_equal(before, after)


def test_many_tiny_inputs_share_a_small_call(
    small: es.LlamaEngine, context: es.Context
) -> None:
    for count in (48, 49, 63, 64, 65):
        inputs = some_ids(small, *[1] * count)
        alone = np.concatenate([context.embed([ids]) for ids in inputs])
        assert cosines(alone, context.embed(inputs)).min() > 0.9999


@pytest.mark.parametrize("total", [48, 49, 60, 63, 64, 65])
def test_an_error_at_an_edge_is_an_error_and_work_goes_on(
    small: es.LlamaEngine, context: es.Context, total: int
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
    small: es.LlamaEngine, context: es.Context
) -> None:
    packs = [some_ids(small, size) for size in EDGES] + [some_ids(small, 3, 40, 100)]
    for inputs in packs:
        one = context.embed(inputs)
        for threads in (2, 3, 1):
            vectors = context.embed(inputs, threads=threads)
            assert cosines(one, vectors).min() > 0.99999


@pytest.mark.model
def test_two_threads_compute_what_one_does_in_the_default_model(
    engine: es.LlamaEngine,
) -> None:
    context = engine.new_context()
    for sizes in ([3], [24], [48], [60], [64], [256], [512], [100, 28, 7, 120]):
        inputs = some_ids(engine, *sizes)
        one = context.embed(inputs)
        assert cosines(one, context.embed(inputs, threads=2)).min() > 0.99999
    context.close()


@pytest.mark.model
def test_the_edges_are_none_in_the_default_model(engine: es.LlamaEngine) -> None:
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
def watched(engine: es.LlamaEngine, *, on_gpu: bool) -> Iterator[tuple[Any, Library]]:
    """A context of an engine as one on a device would be, and its llama.cpp."""
    made = cast(es.LlamaContext, engine.new_context(is_lane=True))
    library = Library(made._llama)
    made._llama, made._on_gpu = library, on_gpu
    yield made, library
    made._llama = library.real
    made.close()


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_device_is_waited_for_where_the_interpreter_is_free(
    small: es.LlamaEngine, on_gpu: bool
) -> None:
    with watched(small, on_gpu=on_gpu) as (made, library):
        made.embed(some_ids(small, 5, 6)[:1])
        assert library.called["llama_synchronize"] == on_gpu


@pytest.mark.parametrize(
    ("code", "kind"), [(-2, es.NoMemory), (-3, es.EngineError), (1, es.EngineError)]
)
def test_what_llama_cpp_returns_tells_want_of_memory_from_other_failures(
    small: es.LlamaEngine, code: int, kind: type[es.EngineError]
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


@pytest.mark.parametrize("size", [20, LONGEST], ids=["small", "with more room"])
def test_an_abort_before_the_call_ends_it_until_it_is_forgotten(
    small: es.LlamaEngine, size: int
) -> None:
    context = small.new_context(is_lane=True)
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


def mebibytes(tokens: int, engine: es.LlamaEngine) -> int:
    """What the logits of so many tokens take for a moment."""
    return tokens * engine.card.n_vocab * 4 >> 20


def test_a_long_input_is_refused_in_numbers_when_memory_is_short(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(wide) as engine:
        lane = engine.new_context(is_lane=True)
        (ids,) = some_ids(engine, 500)
        needed = mebibytes(512, engine)
        assert needed > 50
        monkeypatch.setattr(es, "free_memory_bytes", lambda: 3.5 * 2**20)
        with pytest.raises(es.EngineError) as caught:
            lane.embed([ids])
        assert f"500 tokens need {needed} MiB" in str(caught.value)
        assert "3 MiB of memory are free" in str(caught.value)
        monkeypatch.undo()
        expected = lane.embed([ids])
        # The room that was made once stays: nothing can fail it afterwards.
        monkeypatch.setattr(es, "free_memory_bytes", lambda: 0.0)
        np.testing.assert_array_equal(lane.embed([ids]), expected)
        lane.close()


def test_a_worker_makes_all_its_room_at_the_start_or_does_not_start(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(wide, pack_tokens=64) as engine:
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

options = es.EngineOptions()
engine = es.LlamaEngine(sys.argv[1], options, kit.quiet_log())
chance = np.random.default_rng(7)
long = chance.integers(5, engine.card.n_vocab, 512, np.int32)
pack = [long[n * 8 : n * 8 + 8] for n in range(32)]
before = resident_mb()
grown = []
contexts = []
for is_lane in (False, False, False, True):
    contexts.append(engine.new_context(is_lane=is_lane))
    contexts[-1].embed([long])
    if not is_lane:
        contexts[-1].embed(pack)
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
