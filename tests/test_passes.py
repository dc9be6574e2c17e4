"""Room PASSES: decoders' vectors without their heads, compared with the plain way.

The plain way is a Context, as encoders have it: all tokens in one call with embeddings
on. Both are asked with tiny models of several kinds, one with a sliding window and two
with a state.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import embellama_server as es
from tests import chat_models, gemma, models, words
from tests.test_engine import loaded, run_python

MAKERS: dict[str, Callable[[Path], Path]] = {
    "gemma3": chat_models.tiny_gemma,
    "qwen3": chat_models.tiny_qwen,
    "llama": chat_models.tiny_llama,
    "mamba": chat_models.tiny_mamba,
    "jamba": chat_models.tiny_jamba,
}
# Around a tile of flash attention, gemma3's window, a KV cell block and a ubatch.
LENGTHS = (1, 2, 31, 33, 63, 64, 65, 127, 128, 129, 255, 257, 511, 512)
BATCHES = ((1, 1, 1), (1, 2, 65), (64, 63, 129, 1), (25,) * 8, (9,) * 32, (200, 311))
CONTEXTS = {
    "last": es.CausalContext,
    "cls": es.CausalContext,
    "mean": es.MeanContext,
}


@pytest.fixture(scope="module", params=MAKERS)
def decoder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Each of the tiny decoders in turn."""
    return MAKERS[request.param](tmp_path_factory.mktemp("passes"))


def ids_of(engine: es.Engine, *sizes: int) -> list[es.TokenIds]:
    """Inputs of so many tokens; the same inputs for the same sizes."""
    chance = np.random.default_rng(sum(sizes))
    n_vocab = engine.card.n_vocab
    return [chance.integers(5, n_vocab, size, np.int32) for size in sizes]


def plain_options(engine: es.Engine, tokens: int = 512) -> es.ContextOptions:
    """Those of a context that pools as the model does."""
    pooling = engine._pooling_types()[engine.card.pooling]
    return es.ContextOptions(max_tokens=tokens, max_inputs=4, pooling=pooling)


def plain_context(engine: es.Engine) -> es.Context:
    """What computes an input's tokens in one call, all with embeddings on."""
    return es.Context(engine._llama, engine._model, plain_options(engine))


def assert_alike(rows: Any, expected: Any) -> None:
    """Weights are f16 and products of other shapes are summed in another order."""
    rows, expected = (
        a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (rows, expected)
    )
    assert (rows * expected).sum(-1).min() > 0.9999


@given(st.lists(st.lists(st.integers(0, 9), min_size=1), min_size=1, max_size=6))
def test_each_token_is_read_once_and_only_the_last_has_an_output(
    inputs: list[list[int]],
) -> None:
    ids = [np.array(each, np.int32) for each in inputs]
    *fronts, ends = es.passes_of(ids)
    read: list[list[int]] = [[] for _ in inputs]
    for row in (row for rows in (*fronts, ends) for row in rows):
        assert row.begin == len(read[row.sequence])
        read[row.sequence] += [int(token) for token in row.ids]
    assert read == inputs
    assert not any(row.outputs for rows in fronts for row in rows)
    assert [row.sequence for row in ends] == list(range(len(inputs)))
    assert all(len(row.ids) == row.outputs == 1 for row in ends)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_each_token_is_read_once_and_has_an_output_for_a_mean(sizes: list[int]) -> None:
    steps = list(es.steps_of([np.arange(size, dtype=np.int32) for size in sizes]))
    read: list[list[int]] = [[] for _ in sizes]
    for row in (row for step in steps for row in step):
        assert row.begin == len(read[row.sequence])
        assert row.outputs == len(row.ids) > 0
        read[row.sequence] += [int(token) for token in row.ids]
    assert read == [list(range(size)) for size in sizes]
    lengths = [sum(len(row.ids) for row in step) for step in steps]
    assert max(lengths) <= 128
    assert min(lengths) >= min(64, sum(sizes))  # what is smaller is computed otherwise
    assert all(length % 64 == 0 for length in lengths[:-1])


@pytest.mark.parametrize("pooling", CONTEXTS)
def test_a_decoders_vector_is_the_one_of_the_plain_way_whatever_its_length(
    decoder: Path, pooling: str
) -> None:
    with loaded(decoder, pooling=pooling) as engine:
        worker, long = engine.new_context(), engine.new_context(needs_long_context=True)
        with closing(worker), closing(long), closing(plain_context(engine)) as plain:
            assert type(worker) is type(long) is CONTEXTS[pooling]
            for length in LENGTHS:
                inputs = ids_of(engine, length)
                expected = plain.embed(inputs)
                assert_alike(worker.embed(inputs), expected)
                np.testing.assert_array_equal(long.embed(inputs), worker.embed(inputs))


@pytest.mark.parametrize("pooling", CONTEXTS)
def test_a_decoders_vector_is_the_one_of_the_plain_way_whatever_its_neighbours(
    decoder: Path, pooling: str
) -> None:
    with loaded(decoder, pooling=pooling) as engine:
        worker, plain = engine.new_context(), plain_context(engine)
        with closing(worker), closing(plain):
            for sizes in BATCHES:
                inputs = ids_of(engine, *sizes)
                expected = np.concatenate([plain.embed([ids]) for ids in inputs])
                assert_alike(worker.embed(inputs, threads=2), expected)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_an_input_longer_than_a_ubatch_is_read_in_several(
    decoder: Path, pooling: str
) -> None:
    with loaded(decoder, pooling=pooling, batch_tokens=2000) as engine:
        (ids,) = ids_of(engine, 1500)
        worker, long = engine.new_context(), engine.new_context(needs_long_context=True)
        plain = es.Context(engine._llama, engine._model, plain_options(engine, 1500))
        with closing(worker), closing(long), closing(plain):
            expected = plain.embed([ids])
            assert_alike(worker.embed([ids]), expected)
            assert_alike(long.embed([ids]), expected)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_decoders_rows_of_tokens_are_those_of_the_plain_way(
    decoder: Path, pooling: str
) -> None:
    with loaded(decoder, pooling=pooling) as engine:
        none = int(engine._llama.LLAMA_POOLING_TYPE_NONE)
        options = es.ContextOptions(max_tokens=512, pooling=none)
        plain = es.Context(engine._llama, engine._model, options)
        made = engine.new_context(needs_long_context=True, per_token=True)
        with closing(made), closing(plain):
            assert type(made) is es.RowsContext
            for length in (1, 63, 130, 512):
                inputs = ids_of(engine, length)
                rows = made.embed(inputs)
                assert rows.shape == (length, engine.card.n_embd)
                assert_alike(rows, plain.embed(inputs))


def test_a_mean_is_that_of_the_rows_to_the_last_bit(decoder: Path) -> None:
    with loaded(decoder, pooling="mean") as engine:
        worker = engine.new_context()
        made = engine.new_context(needs_long_context=True, per_token=True)
        with closing(worker), closing(made):
            for length in LENGTHS:
                inputs = ids_of(engine, length)
                mean = made.embed(inputs).mean(axis=0, dtype=np.float64)
                np.testing.assert_allclose(worker.embed(inputs)[0], mean, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(3,), (200, 50), (5,) * 30])
def test_the_head_of_a_decoder_is_not_reached_for_a_mean(
    decoder: Path, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []
    shown: list[bytes] = []

    def recording(llama: Any) -> Any:
        kind = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)
        name_of = kind(("ggml_get_name", llama._lib))
        stopper = whole(llama)

        def wants(node: int, is_question: bool, _: object) -> bool:
            (asked if is_question else shown).append(name_of(node))
            return bool(stopper(node, is_question, None))

        kept.append(stopper)
        return llama.ggml_backend_sched_eval_callback(wants)

    kept: list[Any] = []
    whole = es.head_stopper
    monkeypatch.setattr(es, "head_stopper", recording)
    with (
        loaded(decoder, pooling="mean") as engine,
        closing(engine.new_context()) as worker,
    ):
        inputs = ids_of(engine, *sizes)
        asked.clear()
        shown.clear()
        worker.embed(inputs)
    assert set(shown) == {b"result_embd_pooled"}
    assert len(shown) >= len(list(es.steps_of(inputs)))
    assert not any(name.startswith(b"result_output") for name in asked)


def test_a_causal_reranker_scores_as_the_plain_way_does(tmp_path: Path) -> None:
    path = models.tiny_causal_reranker(tmp_path, context=512)
    with loaded(path) as engine:
        worker, plain = engine.new_context(), plain_context(engine)
        with closing(worker), closing(plain):
            assert isinstance(worker, es.CausalContext)
            inputs = ids_of(engine, 5, 70, 130, 1)
            expected = np.concatenate([plain.embed([ids]) for ids in inputs])
            np.testing.assert_allclose(worker.embed(inputs), expected, atol=2e-3)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[es.CausalContext]:
    """One that reads with last-token pooling."""
    with loaded(models.tiny_causal(tmp_path, context=512)) as engine:
        made = engine.new_context()
        assert isinstance(made, es.CausalContext)
        yield made
        made.close()


INPUTS = [np.arange(5, 5 + size, dtype=np.int32) for size in (70, 1, 3)]


def assert_abort_ends_call(
    made: es.Context, inputs: list[es.TokenIds], sizes: list[int]
) -> None:
    """The last of the calls of llama.cpp with so many tokens is ended; work goes on."""
    expected = made.embed(inputs)
    whole = made._llama.llama_decode
    calls: list[int] = []

    def decode(pointer: Any, batch: Any) -> int:
        calls.append(batch.n_tokens)
        if len(calls) == len(sizes):
            made.abort()
        return int(whole(pointer, batch))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made._llama, "llama_decode", decode)
        with pytest.raises(es.CallAborted):
            made.embed(inputs)
    assert calls == sizes
    made.rearm()
    np.testing.assert_array_equal(made.embed(inputs), expected)


@pytest.mark.parametrize("sizes", [[71], [71, 3]])
def test_an_abort_ends_either_pass_and_work_goes_on(
    worker: es.CausalContext, sizes: list[int]
) -> None:
    assert_abort_ends_call(worker, INPUTS, sizes)


@pytest.mark.parametrize("sizes", [[64], [64, 87]])
def test_an_abort_ends_any_step_of_a_mean_and_work_goes_on(
    sizes: list[int], tmp_path: Path
) -> None:
    path = models.tiny_causal(tmp_path, context=512)
    inputs = [np.arange(5, 5 + size, dtype=np.int32) for size in (120, 1, 30)]
    with loaded(path, pooling="mean") as engine, closing(engine.new_context()) as made:
        assert_abort_ends_call(made, inputs, sizes)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(
    "inputs",
    [
        [np.array([2**30], np.int32)],
        [np.array([5, 2**30], np.int32)],
        [np.array([2**30, 5], np.int32)],
        [np.array([], np.int32)],
        [],
        [np.array([5], np.int32), np.array([], np.int32)],
        [np.array([5], np.int32)] * 70,
        [np.full(600, 5, np.int32)],
    ],
    ids=lambda inputs: str([ids[:2].tolist() for ids in inputs[:2]]),
)
def test_what_cannot_be_read_is_an_error_and_work_goes_on(
    tmp_path: Path, pooling: str, inputs: list[es.TokenIds]
) -> None:
    path = models.tiny_causal(tmp_path, context=512)
    with loaded(path, pooling=pooling) as engine, closing(engine.new_context()) as made:
        expected = made.embed(INPUTS)
        with pytest.raises(es.EngineError):
            made.embed(inputs)
        np.testing.assert_array_equal(made.embed(INPUTS), expected)


# 60,000 words, 2,000 tokens: with logits it takes 960 MB, with those of 128 tokens 31.
RESIDENT = """
import numpy as np
from pathlib import Path
from tests.test_engine import add_spm, llama
from tests.test_passes import add_wide

path = llama(Path(sys.argv[1]) / "wide.gguf", add_wide, trained=4096)
options = es.ModelSettings(pooling=sys.argv[2])
engine = es.Engine(str(path), options, kit.quiet_log())

def mb(name):
    status = open("/proc/self/status").read()
    return int(status.split(name)[1].split()[0]) / 1024

before, at_first = mb("VmHWM:"), mb("VmRSS:")
context = engine.new_context(needs_long_context=True)
context.embed([np.arange(5, 2005, dtype=np.int32)])
taken = mb("VmHWM:") - before
assert taken < 60, taken
context.close()
es.trim_memory()
left = mb("VmRSS:") - at_first
assert left < 10, left
"""


def add_wide(writer: Any) -> int:
    """A SentencePiece vocabulary of 60,000 words."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["\u2581", *(f"\u2581{n}" for n in range(60_000 - len(tokens) - 1))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-1.0] * (len(tokens) - 259))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    return len(tokens)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_long_input_takes_no_memory_for_logits_and_its_context_gives_all_back(
    tmp_path: Path, pooling: str
) -> None:
    run_python(RESIDENT, tmp_path, pooling)


@pytest.mark.chat
def test_gemma_gives_the_means_that_llama_cpp_gives() -> None:
    with loaded(gemma.fetched(), pooling="mean") as engine:
        worker, plain = engine.new_context(), plain_context(engine)
        with closing(worker), closing(plain):
            inputs = [
                np.array(engine.tokenizer.encode(" ".join(words.WORDS[:size])))
                for size in (1, 20, 60, 130)
            ]
            assert_alike(worker.embed(inputs), plain.embed(inputs))
            for ids in inputs:
                assert_alike(worker.embed([ids]), plain.embed([ids]))
