"""Which token comes next, against llama.cpp's samplers over the whole vocabulary.

What is compared with is the reference below: every token of the row, one chain, as
llama-server builds it. It shares no line with the server. Rows are random; samplers ask a
model's file for little, so any file does.
"""

from __future__ import annotations

import collections
import ctypes
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import models, test_tiny_models

Row = npt.NDArray[np.float32]
Options = es.SamplingOptions
GREEDY = Options(temperature=0)
SEEDED = Options(seed=1)
NEVER = -100.0


@pytest.fixture(scope="module")
def llama() -> Any:
    """The functions of llama.cpp."""
    return test_tiny_models.llama()


@pytest.fixture(scope="module")
def vocab(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A vocabulary."""
    path = models.tiny_causal(tmp_path_factory.mktemp("vocabulary"))
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    yield llama.llama_model_get_vocab(model)
    llama.llama_model_free(model)


# --- the reference: llama.cpp over all tokens ---


class Whole:
    """A chain over all tokens of a row, as llama-server has it."""

    def __init__(
        self, llama: Any, options: Options, prompt: Sequence[int], size: int
    ) -> None:
        self._llama = llama
        self._chain = llama.llama_sampler_chain_init(
            llama.llama_sampler_chain_default_params()
        )
        biases = [
            llama.llama_logit_bias(token, -math.inf if bias <= NEVER else bias)
            for token, bias in options.logit_bias
        ]
        last = [llama.llama_sampler_init_greedy()]
        if options.temperature > 0:
            last = [
                llama.llama_sampler_init_top_k(options.top_k),
                llama.llama_sampler_init_top_p(options.top_p, 0),
                llama.llama_sampler_init_min_p(options.min_p, 0),
                llama.llama_sampler_init_temp(options.temperature),
                llama.llama_sampler_init_dist(options.seed),
            ]
        for sampler in (
            llama.llama_sampler_init_logit_bias(
                size, len(biases), (llama.llama_logit_bias * len(biases))(*biases)
            ),
            llama.llama_sampler_init_penalties(
                size,
                options.repeat_last_n,
                options.repeat_penalty,
                options.frequency_penalty,
                options.presence_penalty,
            ),
            *last,
        ):
            llama.llama_sampler_chain_add(self._chain, sampler)
        for token in prompt:
            llama.llama_sampler_accept(self._chain, token)

    def sample(self, row: Row) -> int:
        """The next token."""
        llama = self._llama
        records = np.zeros(len(row), np.dtype(llama.llama_token_data))
        records["id"], records["logit"] = np.arange(len(row)), row
        array = llama.llama_token_data_array(
            ctypes.cast(records.ctypes.data, llama.llama_token_data_p),
            len(row),
            -1,
            False,
        )
        llama.llama_sampler_apply(self._chain, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        llama.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        """Free it."""
        self._llama.llama_sampler_free(self._chain)


def both(
    llama: Any, vocab: Any, options: Options, rows: Sequence[Row], prompt: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The tokens of the reference, and ours, each with what it chose before in mind."""
    whole = Whole(llama, options, prompt, len(rows[0]))
    ours = es.Sampler(llama, vocab, options, prompt)
    chosen = [whole.sample(row) for row in rows], [ours.sample(row) for row in rows]
    whole.close()
    ours.close()
    return chosen


def made(size: int, seed: int, *, spread: float = 3.0, shift: float = -5.0) -> Row:
    """A row of random logits."""
    chance = np.random.default_rng(seed)
    return (chance.standard_normal(size) * spread + shift).astype(np.float32)


OPTIONS = st.builds(
    Options,
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([1, 5, 40, 50, 128, 129, 300]),
    top_p=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repeat_penalty=st.sampled_from([1.0, 1.1, 0.5, 2.0]),
    repeat_last_n=st.sampled_from([0, 1, 64, 100]),
    presence_penalty=st.sampled_from([0.0, 1.0, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    logit_bias=st.dictionaries(
        st.integers(0, 49), st.sampled_from([-100.0, -5.0, 5.0, 100.0]), max_size=6
    ).map(lambda biases: tuple(biases.items())),
    seed=st.integers(0, (1 << 32) - 2),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=OPTIONS,
    size=st.sampled_from([50, 1023, 5000, 40_003]),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.1, 1.0, 4.0, 20.0]),
    prompt=st.lists(st.integers(0, 49), max_size=80),
)
def test_the_token_is_the_one_that_is_chosen_among_all(
    llama: Any,
    vocab: Any,
    options: Options,
    size: int,
    seed: int,
    spread: float,
    prompt: list[int],
) -> None:
    rows = [made(size, seed + n, spread=spread) for n in range(4)]
    whole, ours = both(llama, vocab, options, rows, prompt)
    assert ours == whole


PEAKED = made(30_000, 1, spread=1)
PEAKED[-4:] = 60, 59, 40, 39.5


@pytest.mark.parametrize(
    "options",
    [
        replace(SEEDED, top_k=0),
        replace(SEEDED, top_k=0, temperature=0.05),
        replace(SEEDED, top_k=0, temperature=2),
        replace(SEEDED, top_k=0, top_p=1, temperature=1.5),
        replace(SEEDED, top_k=0, top_p=1, min_p=0.02, temperature=1),
        replace(SEEDED, top_k=0, top_p=0.95, min_p=0.02),
        replace(SEEDED, top_k=0, presence_penalty=2, temperature=2),
    ],
)
def test_so_it_is_without_top_k_but_for_rounding(
    llama: Any, vocab: Any, options: Options
) -> None:
    # Where 27,000 tokens are about as likely, 2 of 400 draws were another one.
    flat = made(30_000, 2, spread=0.5)
    rows = [row for n in range(20) for row in (PEAKED, flat, made(30_000, n))]
    whole, ours = both(llama, vocab, options, rows, range(100))
    assert sum(a != b for a, b in zip(whole, ours, strict=True)) <= 1


@pytest.mark.parametrize("top_k", [-1, 20_000, 1 << 20, (1 << 31) - 1])
def test_top_k_is_off_if_it_is_negative_or_drops_nothing_that_matters(
    llama: Any, vocab: Any, top_k: int
) -> None:
    rows = [made(30_000, n, spread=1) for n in range(20)]
    chosen = [
        [sampler.sample(row) for row in rows]
        for k in (0, top_k)
        for sampler in [es.Sampler(llama, vocab, replace(SEEDED, top_k=k), ())]
    ]
    assert chosen[0] == chosen[1]


def test_top_p_is_of_all_probability_whatever_the_temperature(
    llama: Any, vocab: Any
) -> None:
    # Ten tokens have a hundredth of it: all of them stay, although no other one can come.
    row = np.full(30_000, -3, np.float32)
    row[[*range(0, 30_000, 3000)]] = 0
    options = replace(SEEDED, top_k=0, top_p=0.9, temperature=0.05)
    sampler = es.Sampler(llama, vocab, options, ())
    assert {sampler.sample(row) for _ in range(200)} == {*range(0, 30_000, 3000)}


@pytest.mark.parametrize("shown", ["equal", "two values", "few are possible"])
def test_rows_that_leave_no_small_choice_are_sampled_too(
    llama: Any, vocab: Any, shown: str
) -> None:
    row = np.zeros(5000, np.float32)
    if shown == "two values":
        row[::2] = 1
    if shown == "few are possible":
        row[7:] = -math.inf
    sampler = es.Sampler(llama, vocab, SEEDED, ())
    chosen = {sampler.sample(row) for _ in range(50)}
    assert len(chosen) > 3
    assert np.isfinite(row[[*chosen]]).all()


def test_a_row_is_only_read(llama: Any, vocab: Any) -> None:
    row = made(5000, 1)
    row.flags.writeable = False
    options = replace(SEEDED, presence_penalty=1, logit_bias=((1, -100), (2, 5)))
    es.Sampler(llama, vocab, options, [1, 2]).sample(row)
    es.logprobs(row, 3, 5, named)


# --- greedy ---


def test_greedy_is_the_largest_logit_and_the_first_of_equals(
    llama: Any, vocab: Any
) -> None:
    row = made(5000, 1)
    row[[70, 4000, 60]] = 50
    assert es.Sampler(llama, vocab, GREEDY, ()).sample(row) == 60
    # So it is where something is excluded, which takes another path.
    without = replace(GREEDY, logit_bias=((60, NEVER), (5, 1.0)))
    assert es.Sampler(llama, vocab, without, ()).sample(row) == 70
    # And where a bias makes another one equal, before or after it.
    row[[3, 4500]] = 49
    for lifted, first in ((3, 3), (4500, 60)):
        options = replace(GREEDY, logit_bias=((lifted, 1.0),))
        assert es.Sampler(llama, vocab, options, ()).sample(row) == first


def test_a_temperature_that_no_float32_can_be_divided_by_is_greedy(
    llama: Any, vocab: Any
) -> None:
    row = made(5000, 1, shift=50)
    sampler = es.Sampler(llama, vocab, replace(SEEDED, temperature=1e-40), ())
    assert {sampler.sample(row) for _ in range(20)} == {int(row.argmax())}


# --- bias ---


def test_a_bias_lifts_a_token_that_was_out_of_reach(llama: Any, vocab: Any) -> None:
    row = made(5000, 1)
    unlikely = int(row.argmin())
    for options in (GREEDY, SEEDED, replace(SEEDED, top_k=0), replace(SEEDED, top_k=1)):
        biased = replace(options, logit_bias=((unlikely, 99.0),))
        assert es.Sampler(llama, vocab, biased, ()).sample(row) == unlikely


@pytest.mark.parametrize("options", [GREEDY, SEEDED, replace(SEEDED, top_k=0)])
def test_a_token_of_bias_minus_100_never_comes(
    llama: Any, vocab: Any, options: Options
) -> None:
    row = np.zeros(5000, np.float32)
    row[:3] = 1000, 999, 998
    excluding = replace(options, logit_bias=((0, -100.0), (2, -1000.0)))
    sampler = es.Sampler(llama, vocab, excluding, ())
    assert {sampler.sample(row) for _ in range(20)} == {1}


def test_two_biases_of_a_token_add_up(llama: Any, vocab: Any) -> None:
    row = np.zeros(5000, np.float32)
    row[7] = 30
    options = replace(GREEDY, logit_bias=((9, 20.0), (9, 20.0)))
    assert es.Sampler(llama, vocab, options, ()).sample(row) == 9
    options = replace(GREEDY, logit_bias=((7, 100.0), (7, NEVER), (8, 1.0)))
    assert es.Sampler(llama, vocab, options, ()).sample(row) == 8


@pytest.mark.parametrize("options", [GREEDY, SEEDED])
def test_end_tokens_never_come_if_they_are_ignored(
    llama: Any, vocab: Any, options: Options
) -> None:
    row = np.zeros(5000, np.float32)
    row[[2, 106, 9]] = 90, 80, 70
    ends = es.Sampler(llama, vocab, options, (), end_tokens=(2, 106))
    goes_on = es.Sampler(
        llama, vocab, replace(options, ignore_eos=True), (), end_tokens=(2, 106)
    )
    assert (ends.sample(row), goes_on.sample(row)) == (2, 9)


class Told:
    """llama.cpp, but for what a file says must never be chosen; counts what it makes."""

    def __init__(self, llama: Any, suppressed: Sequence[int] = ()) -> None:
        self._llama = llama
        self._suppressed = (ctypes.c_int32 * len(suppressed))(*suppressed)
        self.calls = collections.Counter[str]()

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self._llama, name)

    def llama_vocab_get_suppress_tokens(self, _: Any, count: Any) -> Any:
        """Its own list, or that of the test."""
        count._obj.value = len(self._suppressed)
        return ctypes.cast(self._suppressed, ctypes.POINTER(ctypes.c_int32))


@pytest.mark.parametrize("options", [GREEDY, SEEDED])
def test_what_the_file_suppresses_never_comes(
    llama: Any, vocab: Any, options: Options
) -> None:
    row = np.zeros(5000, np.float32)
    row[[3, 4, 5]] = 90, 80, 70
    lifted = replace(options, logit_bias=((3, 50.0),))
    sampler = es.Sampler(Told(llama, [3, 4]), vocab, lifted, ())
    assert sampler.sample(row) == 5


# --- penalties ---


def test_penalties_see_the_last_tokens_of_the_prompt_and_of_the_reply(
    llama: Any, vocab: Any
) -> None:
    row = np.zeros(5000, np.float32)
    row[[1, 2, 3, 4]] = 1.9, 1.8, 1.7, 1.6
    options = replace(GREEDY, presence_penalty=2, repeat_last_n=2)
    sampler = es.Sampler(llama, vocab, options, [4, 1, 2])
    # 4 is too long ago; then 1 and 2 are; then 3.
    assert [sampler.sample(row) for _ in range(4)] == [3, 1, 2, 3]


def test_a_negative_penalty_lifts_a_token_that_was_out_of_reach(
    llama: Any, vocab: Any
) -> None:
    row = made(40_000, 1, spread=1, shift=0)
    unlikely = int(row.argmin())
    options = replace(GREEDY, frequency_penalty=-2)
    sampler = es.Sampler(llama, vocab, options, [unlikely] * 20)
    assert sampler.sample(row) == unlikely


def test_penalties_look_at_8192_tokens_at_most(llama: Any, vocab: Any) -> None:
    row = np.zeros(20_000, np.float32)
    row[[1, 2, 3]] = 1.9, 1.8, 1.7
    for last_n in (-1, es.MAX_REPEAT_LAST_N, 1 << 40):
        options = replace(GREEDY, presence_penalty=2, repeat_last_n=last_n)
        prompt = [1, 2, *[9] * (es.MAX_REPEAT_LAST_N - 1)]
        assert es.Sampler(llama, vocab, options, prompt).sample(row) == 1


# --- seeds ---


@pytest.mark.parametrize("seed", [0, 7, -5, 0xFFFFFFFF, (1 << 64) - 1, 1 << 70])
def test_the_same_seed_gives_the_same_tokens(llama: Any, vocab: Any, seed: int) -> None:
    # 0xFFFFFFFF is random to llama.cpp.
    row, options = made(5000, 1, spread=0.1), replace(SEEDED, seed=seed, top_p=1.0)
    one, other = (es.Sampler(llama, vocab, options, ()) for _ in range(2))
    assert [one.sample(row) for _ in range(20)] == [
        other.sample(row) for _ in range(20)
    ]


def test_seeds_are_taken_by_their_last_32_bits(llama: Any, vocab: Any) -> None:
    row, options = made(5000, 1, spread=0.1), replace(SEEDED, top_p=1.0)
    chosen = [
        [sampler.sample(row) for _ in range(20)]
        for seed in (5, 5 + (1 << 32), 6, 5 + (1 << 31))
        for sampler in [es.Sampler(llama, vocab, replace(options, seed=seed), ())]
    ]
    assert chosen[0] == chosen[1]
    assert chosen[0] not in chosen[2:]


def test_without_a_seed_each_reply_is_another_one(llama: Any, vocab: Any) -> None:
    row, options = made(5000, 1, spread=0.1), Options(top_p=1.0)
    one, other = (es.Sampler(llama, vocab, options, ()) for _ in range(2))
    assert [one.sample(row) for _ in range(40)] != [
        other.sample(row) for _ in range(40)
    ]


# --- what cannot be sampled ---


ALL = tuple((token, NEVER) for token in range(5000))
KINDS = [
    GREEDY,
    replace(GREEDY, presence_penalty=1),
    SEEDED,
    replace(SEEDED, top_k=1),
    replace(SEEDED, top_k=0),
    replace(SEEDED, top_k=300, presence_penalty=1),
]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 391, 392, 2500, 4999])
def test_a_logit_that_is_no_number_is_an_error(
    llama: Any, vocab: Any, options: Options, bad: float, place: int
) -> None:
    row = made(5000, 1)
    row[place] = bad
    sampler = es.Sampler(llama, vocab, options, [1])
    with pytest.raises(es.NonFiniteLogits, match=str(bad)):
        sampler.sample(row)
    with pytest.raises(es.NonFiniteLogits):
        es.logprobs(row, 1, 5, named)
    # The next row is none of its business.
    row[place] = 0
    sampler.sample(row)


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("size", [50, 5000])
def test_a_row_without_any_possible_token_is_an_error(
    llama: Any, vocab: Any, options: Options, size: int
) -> None:
    row = np.full(size, -math.inf, np.float32)
    with pytest.raises(es.NonFiniteLogits, match="-inf"):
        es.Sampler(llama, vocab, options, [1]).sample(row)


@pytest.mark.parametrize("options", KINDS)
def test_biases_that_leave_no_token_are_an_error(
    llama: Any, vocab: Any, options: Options
) -> None:
    sampler = es.Sampler(llama, vocab, replace(options, logit_bias=ALL), ())
    with pytest.raises(es.NothingToSample, match="bias"):
        sampler.sample(made(5000, 1))


# --- memory ---


def test_what_llama_cpp_made_is_freed_once(llama: Any, vocab: Any) -> None:
    told = Told(llama)
    for options in KINDS:
        sampler = es.Sampler(told, vocab, options, [1, 2])
        sampler.sample(made(5000, 1))
        sampler.close()
        sampler.close()
    # What takes the most likely token needs none.
    chains = sum(kind.temperature > 0 and kind.top_k != 1 for kind in KINDS)
    assert told.calls["llama_sampler_chain_init"] == chains
    assert told.calls["llama_sampler_free"] == chains


# --- logprobs ---


def named(token: int) -> bytes:
    """A token's bytes."""
    return b"<%d>" % token


@pytest.mark.parametrize("size", [50, 5000, 40_003])
def test_logprobs_are_those_of_the_whole_row(size: int) -> None:
    row = made(size, 1)
    exact = row.astype(np.float64)
    exact -= exact.max() + math.log(np.exp(exact - exact.max()).sum())
    entry = es.logprobs(row, 17, 20, named)
    order = np.argsort(-exact)[:20]
    assert (entry.token, entry.text) == (17, b"<17>")
    assert entry.logprob == pytest.approx(exact[17], abs=1e-5)
    assert [text for text, _ in entry.top] == [named(token) for token in order]
    assert [value for _, value in entry.top] == pytest.approx(exact[order], abs=1e-5)


def test_of_equal_tokens_the_first_are_the_most_likely() -> None:
    entry = es.logprobs(np.zeros(5000, np.float32), 4000, 3, named)
    assert [text for text, _ in entry.top] == [b"<0>", b"<1>", b"<2>"]
    assert entry.logprob == pytest.approx(-math.log(5000))


def test_no_more_are_listed_than_there_are_or_were_asked_for() -> None:
    row = made(5, 1)
    assert es.logprobs(row, 1, 0, named).top == ()
    assert len(es.logprobs(row, 1, 20, named).top) == 5


def test_what_cannot_come_has_openai_s_lowest_logprob() -> None:
    row = np.zeros(5000, np.float32)
    row[1:] = -math.inf
    entry = es.logprobs(row, 9, 2, named)
    assert entry.logprob == -9999
    assert entry.top == ((b"<0>", 0.0), (b"<1>", -9999.0))


# --- what a file says ---


def test_a_file_s_sampling_options_are_the_defaults() -> None:
    values: dict[str, object] = {
        "general.sampling.temp": 1.0,
        "general.sampling.top_k": 64,
        "general.sampling.top_p": 0.95,
        "general.sampling.min_p": 0.0,
        "general.sampling.penalty_repeat": 1.05,
        "general.sampling.penalty_last_n": -1,
        "general.sampling.mirostat": 2,
    }
    assert es.defaults_from(values) == Options(
        temperature=1.0,
        top_k=64,
        top_p=0.95,
        min_p=0.0,
        repeat_penalty=1.05,
        repeat_last_n=-1,
    )


def test_numbers_of_a_file_become_whole_or_not_as_the_options_are() -> None:
    found = es.defaults_from(
        {"general.sampling.temp": 1, "general.sampling.top_k": 40.0}
    )
    assert (type(found.temperature), type(found.top_k)) == (float, int)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -7, 1 << 70, "0.3", (), None])
def test_what_a_file_says_out_of_range_counts_for_nothing(bad: object) -> None:
    keys = [named.gguf_key for named in es.SAMPLING_RANGES.values() if named.gguf_key]
    assert len(keys) == 6
    assert es.defaults_from(dict.fromkeys(keys, bad)) == Options()


def test_every_numeric_option_has_a_range_that_holds_its_default() -> None:
    ours = Options()
    for name, (low, high, _) in es.SAMPLING_RANGES.items():
        assert low <= getattr(ours, name) <= high
