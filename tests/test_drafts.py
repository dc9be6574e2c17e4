"""Room DRAFTS, and what the generator makes of drafts: the same text, in fewer steps."""

from __future__ import annotations

import functools
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests.fake_steps import (
    BOOM_TOKEN,
    END,
    NAN_TOKEN,
    QUOTE_TOKEN,
    SHORT_TOKEN,
    Asked,
    Generating,
    StepEngine,
    generating,
    said_after,
)
from tests.test_generator import MAKERS, RECURRENT, engine_of, prompt, settled

DRAFT_TOKENS = 8
CLOSE = es._CLOSE_MATCH_TOKENS
LONGEST = es._MAX_MATCH_TOKENS


# --- how a text may go on ---


def in_common(ids: Sequence[int], end: int) -> int:
    """How many tokens before ``end`` are those at the end of all."""
    pairs = zip(reversed(ids[:end]), reversed(ids), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


TEXTS = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.lists(st.integers(0, 1), min_size=1, max_size=200),
    st.builds(
        lambda part, times, rest: [*part * times, *rest],
        st.lists(st.integers(0, 9), min_size=1, max_size=30),
        st.integers(1, 8),
        st.lists(st.integers(0, 9), max_size=4),
    ),
)


@settings(max_examples=60)
@given(TEXTS)
@example([1])
@example([5] * 300)
def test_a_text_goes_on_as_after_the_longest_end_that_came_before(
    ids: list[int],
) -> None:
    found = es.longest_match(np.array(ids, np.int32))
    lengths = {end: in_common(ids, end) for end in range(1, len(ids))}
    longest = min(CLOSE, max(lengths.values(), default=0))
    ends = [end for end, length in lengths.items() if min(CLOSE, length) == longest]
    if not longest:
        assert found == (0, 0)
    else:
        assert found == (ends[-1], min(LONGEST, lengths[ends[-1]]))


def test_a_match_is_found_within_a_thousandth_of_a_step() -> None:
    chance = np.random.default_rng(1)
    ids = chance.integers(0, 2000, 8192).astype(np.int32)
    ids[-20:] = ids[4000:4020]
    took_s = []
    for _ in range(50):
        begun = time.perf_counter()
        assert es.longest_match(ids) == (4020, 20)
        took_s.append(time.perf_counter() - begun)
    assert min(took_s) < 100e-6, "30 us where nothing else runs"


def guessed(ids: Sequence[int], most: int = DRAFT_TOKENS) -> list[int]:
    """What may follow."""
    lookup = es.PromptLookup(DRAFT_TOKENS)
    guess = lookup.guess(np.array(ids, np.int32), most)
    assert len(guess.ids) == len(guess.odds)
    return [*guess.ids]


def test_what_followed_is_guessed_and_a_loop_goes_on_in_it() -> None:
    assert guessed([1, 2, 3, 4, 5, 6, 9, 1, 2]) == [3, 4, 5, 6, 9, 1, 2, 3]
    assert guessed([7, 1, 2, 3, 1, 2, 3, 1]) == [2, 3, 1, 2, 3, 1, 2, 3]
    assert guessed([4, 4]) == [4] * 8
    assert guessed([1, 2, 3]) == []


@settings(max_examples=60)
@given(TEXTS, st.integers(1, 20))
def test_no_more_is_guessed_than_is_asked_for(ids: list[int], most: int) -> None:
    found = guessed(ids, most)
    assert len(found) in (0, min(most, DRAFT_TOKENS))


def odds_after(outcomes: Sequence[bool]) -> float:
    """Of a guess after so many like it were right, or not."""
    lookup, ids = es.PromptLookup(1), np.array([1, 2, 3, 4, 1, 2, 3], np.int32)
    for is_right in outcomes:
        assert [*lookup.guess(ids, 1).ids] == [4]
        lookup.learn(4 if is_right else 5)
    return lookup.guess(ids, 1).odds[0]


def test_a_reply_s_own_guesses_tell_how_likely_the_next_one_is_right() -> None:
    assert odds_after([True] * 40) > 0.9
    assert odds_after([False] * 40) < 0.05
    assert odds_after([False] * 20 + [True] * 20) > 0.5 > odds_after([])


@settings(max_examples=40)
@given(TEXTS, st.lists(st.integers(0, 9), max_size=30))
def test_odds_are_odds_whatever_came(ids: list[int], said: list[int]) -> None:
    lookup = es.PromptLookup(DRAFT_TOKENS)
    for token in said:
        found = lookup.guess(np.array(ids, np.int32), DRAFT_TOKENS)
        assert all(0 <= odds <= 1 for odds in found.odds)
        lookup.learn(token)
        ids = [*ids, token]


# --- how much of it is tried ---


def cost_of(row_s: float, first_s: float = 0.010) -> Callable[[int], float]:
    """How long steps take."""
    return lambda rows: first_s + row_s * (rows - 1)


ODDS = st.lists(st.floats(0, 1), max_size=DRAFT_TOKENS)


def expected(odds: Sequence[float], length: int) -> float:
    """How many tokens to expect of a reply."""
    return 1 + sum(math.prod(odds[: n + 1]) for n in range(length))


@settings(max_examples=60)
@given(ODDS, st.floats(0, 0.02), st.integers(0, 12))
def test_as_much_is_tried_as_is_fastest(
    odds: list[float], row_s: float, most: int
) -> None:
    cost = cost_of(row_s)
    length = es.draft_length(odds, cost, most)
    counts = range(min(most, len(odds)) + 1)
    rates = {
        n: expected(odds, n) / cost(1 + n) / (1.05 if n else 1)
        for n in counts
        if not n or (n + 1) % 4 == 0
    }
    assert rates[length] == pytest.approx(max(rates.values()))


def test_nothing_is_tried_before_a_step_was_timed() -> None:
    assert es.draft_length([1.0] * 8, lambda _: 0.0, 8) == 0


# --- in which steps ---


class Quoting(es.StepWork):
    """A reply of which all that follows is known."""

    def guess(self) -> es.Guess:
        return es.Guess([1] * 20, [1.0] * 20)


def planner(**options: Any) -> es.StepPlanner:
    """One that has timed a step."""
    rooms = {"step_s": 0.1, "batch_tokens": 64, "max_outputs": 12, "draft_tokens": 15}
    made = es.StepPlanner(es.StepSpeed(), **(rooms | options))
    made.speed.record(1, 0, 0.01)
    return made


def tried(step: es.Step[Quoting] | None) -> int:
    """How much is tried."""
    assert step is not None
    assert step.decode_rows == len(step.rows) + len(step.draft)
    return len(step.draft)


def test_a_reply_is_tried_ahead_as_far_as_there_is_room() -> None:
    one = Quoting(prompt_tokens=0)
    assert tried(planner().plan([one])) == 11
    assert tried(planner(max_outputs=5).plan([one])) == 3
    assert tried(planner(batch_tokens=10).plan([one])) == 7
    assert tried(planner(draft_tokens=4).plan([one])) == 3
    assert tried(planner(draft_tokens=0).plan([one])) == 0


def test_nothing_is_tried_where_several_replies_grow() -> None:
    for count in (2, 4, 9):
        replies = [Quoting(prompt_tokens=0) for _ in range(count)]
        assert tried(planner().plan(replies)) == 0
    one = Quoting(prompt_tokens=0)
    for prompt_tokens in (0, 300):  # in turn with those whose steps are their own
        fixed = Quoting(prompt_tokens=prompt_tokens, is_deterministic=True)
        in_turn = planner()
        steps = [in_turn.plan([one, fixed]) for _ in range(4)]
        assert [tried(step) for step in steps] == [0] * 4
        assert {step.is_deterministic for step in steps if step} == {True, False}


def test_nobody_guesses_where_nothing_can_be_tried() -> None:
    class Silent(Quoting):
        def guess(self) -> es.Guess:
            raise AssertionError

    assert tried(planner(draft_tokens=0).plan([Silent(prompt_tokens=0)])) == 0


def test_nothing_is_tried_beside_prompts_on_trial_or_where_bits_must_be_the_same() -> (
    None
):
    one, fixed = Quoting(prompt_tokens=0), Quoting(prompt_tokens=0)
    fixed.is_deterministic = True
    assert tried(planner().plan([one, Quoting(prompt_tokens=30)])) == 0
    assert tried(planner().plan([one], is_trial=True)) == 0
    assert tried(planner().plan([fixed])) == 0


# --- what the generator makes of it ---


@pytest.fixture
def daring(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as there is is tried, or less by chance, whatever it costs."""
    chance = random.Random(7)

    def length(odds: Sequence[float], _: object, most: int) -> int:
        return chance.randrange(min(most, len(odds)) + 1)

    monkeypatch.setattr(es, "draft_length", length)


drafting = functools.partial(generating, draft_tokens=DRAFT_TOKENS, draft_greedy=True)


def quoting(seed: int, length: int = 20) -> list[int]:
    """A prompt that the reply says again, and again."""
    return [*random.Random(seed).choices(range(10, END), k=length), QUOTE_TOKEN]


def drafted(running: Generating) -> tuple[int, int]:
    """How many tokens were tried, and how many of them kept."""
    tried_tokens = sum(report.draft_tokens for report in running.reports)
    kept = sum(report.accepted_tokens for report in running.reports)
    return tried_tokens, kept


@pytest.mark.usefixtures("daring")
@pytest.mark.parametrize("replies", [1, 3])
def test_a_quoting_reply_is_the_same_in_fewer_steps(replies: int) -> None:
    with drafting() as running:
        asked = list[Asked]()
        for n in range(replies):  # alone, each of them
            asked.append(one := running.ask(quoting(n), 60))
            generation = one.wait()
            assert one.text() == said_after(quoting(n), 60)
            assert (one.reason(), generation.tokens) == ("length", 60)
            assert 0 < generation.accepted_tokens < generation.draft_tokens
        tried_tokens, kept = drafted(running)
        assert kept == sum(one.generation.accepted_tokens for one in asked)
        assert tried_tokens == sum(one.generation.draft_tokens for one in asked)
        assert len(running.engine.steps) <= 61 * replies - kept
        assert sum(report.tokens for report in running.reports) == 60 * replies
        settled(running)


def test_a_model_is_asked_for_a_token_at_a_time_where_drafts_are_off() -> None:
    with generating(draft_tokens=0) as running:
        assert running.ask(quoting(1), 30).text() == said_after(quoting(1), 30)
        assert drafted(running) == (0, 0)
        assert all(
            len(row.ids) == 1 for step in running.engine.steps[1:] for row in step
        )


@pytest.mark.usefixtures("daring")
@pytest.mark.parametrize(
    ("sampling", "draft_greedy", "is_tried"),
    [
        ({"temperature": 0.0, "seed": 3}, True, False),
        ({"temperature": 0.5, "seed": 3, "top_k": 1}, True, False),
        ({"temperature": 0.0}, False, False),
        ({"temperature": 0.5, "top_k": 1}, False, False),
        ({"temperature": 0.5, "top_p": 0.0}, False, False),
        ({"temperature": 0.5, "min_p": 1.0}, False, False),
        ({"temperature": 0.0}, True, True),
        ({"temperature": 1e-3, "top_k": 2}, False, True),
    ],
)
def test_nothing_is_tried_where_the_same_text_is_wanted_again(
    sampling: dict[str, Any], draft_greedy: bool, is_tried: bool
) -> None:
    with drafting(draft_greedy=draft_greedy) as running:
        options = es.SamplingOptions(**sampling)
        one = running.ask(quoting(1), 30, sampling=options)
        assert one.text() == said_after(quoting(1), 30)
        assert bool(drafted(running)[0]) == is_tried


@pytest.mark.usefixtures("daring")
@pytest.mark.parametrize("count", range(1, 12))
def test_no_reply_is_longer_than_was_asked_for(count: int) -> None:
    with drafting(StepEngine(cells=256)) as running:
        ids = quoting(count, 8)
        for _ in range(3):
            one = running.ask(ids, count)
            assert one.text() == said_after(ids, count)
            assert one.wait().tokens == count
        for step in running.engine.steps:
            assert all(row.begin + len(row.ids) < len(ids) + count for row in step)
        settled(running)


@pytest.mark.usefixtures("daring")
def test_a_reply_ends_where_it_would_in_the_middle_of_a_draft() -> None:
    with drafting() as running:
        for n in range(8):
            ids = [*quoting(n, 9)[:-1], END, QUOTE_TOKEN]
            one = running.ask(ids, 40)
            assert one.text() == said_after(ids, 40)
            assert one.reason() == "stop"
            whole = said_after(quoting(n), 40)
            stop = whole[90 + n : 97 + n]
            one = running.ask(quoting(n), 40, stop=(stop,))
            assert (one.text(), one.reason()) == (whole[: whole.index(stop)], "stop")
        assert drafted(running)[1]
        settled(running)


@pytest.mark.usefixtures("daring")
def test_a_chat_goes_on_after_a_reply_that_was_tried_ahead() -> None:
    with drafting() as running:
        ids = quoting(3)
        for _ in range(4):
            one = running.ask(ids, 20, top_logprobs=0)
            assert one.text() == said_after(ids, 20)
            said = [entry.token for delta in one.deltas for entry in delta.logprobs]
            assert len(said) == 20
            ids = [*ids, *said, 5]
            held = next(s for s in running.engine.contexts[0].sequences if s)
            assert len(held) == len(ids) - 2, "nothing of what was rejected"
        assert one.generation.cached_tokens == len(ids) - 23
        settled(running)


@pytest.mark.usefixtures("daring")
@pytest.mark.parametrize("token", [BOOM_TOKEN, NAN_TOKEN])
def test_what_fails_within_a_draft_harms_no_neighbour(token: int) -> None:
    with drafting() as running:
        running.engine.failures[token] = 0  # while it is read as a prompt
        good = [running.ask(quoting(n), 40) for n in range(3)]
        bad = running.ask([*quoting(50, 8)[:-1], token, *quoting(51, 8)], 40)
        bad.wait_for_token()
        running.engine.failures[token] = 10**9
        error = bad.wait().error
        assert error is None or isinstance(error, es.EngineFailed)
        for n, one in enumerate(good):
            assert (one.text(), one.reason()) == (said_after(quoting(n), 40), "length")
        settled(running)


@pytest.mark.usefixtures("daring")
def test_a_step_without_cells_or_one_that_fails_once_loses_no_token() -> None:
    engine = StepEngine()
    with drafting(engine, prompt_cache_mb=0) as running:
        for n in range(7):
            running.ask(prompt(n, 40), 2).wait()
        for n in range(3):
            one = running.ask(quoting(n), 60)
            one.wait_for_token()
            engine.lies_about_room = 2
            engine.failures[QUOTE_TOKEN] = 1
            assert one.text() == said_after(quoting(n), 60)
        assert drafted(running)[1]
        settled(running)


@pytest.mark.usefixtures("daring")
def test_a_random_day_with_drafts_leaves_nothing_reserved_and_no_wrong_text() -> None:
    chance = random.Random(6)
    with drafting(StepEngine(cells=400)) as running:
        asked: list[tuple[Asked, list[int], int]] = []
        for n in range(100):
            ids = quoting(n, chance.randrange(1, 40))
            if chance.random() < 0.3:
                ids = [SHORT_TOKEN, *ids]
            count = chance.randrange(1, 40)
            n_replies = chance.choice((1, 1, 2))
            one = running.ask(ids, count, client=f"c{n % 7}", n=n_replies)
            asked.append((one, ids, count))
            if chance.random() < 0.5 and not one.generation.is_over:
                one.wait()  # so the next one may be alone
            if chance.random() < 0.2:
                running.queue.cancel(chance.choice(asked)[0].generation)
            if chance.random() < 0.05:
                running.engine.failures[SHORT_TOKEN] = 1
            if chance.random() < 0.05:
                running.engine.lies_about_room = 1
        for one, ids, count in asked:
            if not one.generation.is_over:
                one.wait()
            if one.generation.error is None and one.generation.tokens:
                reasons = [d.finish_reason for d in one.deltas if d.finish_reason]
                if reasons and one.deltas[-1].finish_reason:
                    assert one.text() == said_after(ids, count)
        assert drafted(running)[1]
        settled(running)


# --- real models with random weights ---


def alike(one: list[es.TokenLogprob], other: list[es.TokenLogprob]) -> bool:
    """Whether two replies are the same; where they part, the model was of two minds.

    Not to the bit: several rows take other kernels than one.
    """
    for entry, its in zip(one, other, strict=True):
        others = dict(its.top)
        for text, logprob in entry.top[:2]:
            assert logprob == pytest.approx(others[text], abs=0.05)
        if entry.token != its.token:
            return False
    return True


@pytest.mark.usefixtures("daring")
@pytest.mark.parametrize("make", [*MAKERS, *RECURRENT])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_a_real_model_says_the_same_with_drafts_and_without(
    make: Any, temperature: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if each had the same seed: with one of its own nothing is tried ahead.
    monkeypatch.setattr(random, "getrandbits", lambda _: 5)
    engine = engine_of(make, tmp_path)
    sampling = es.SamplingOptions(
        temperature=temperature, top_k=3, top_p=1.0, repeat_penalty=1.1
    )
    said: list[list[list[es.TokenLogprob]]] = []
    for draft_tokens in (0, DRAFT_TOKENS):
        with drafting(engine, draft_tokens=draft_tokens) as running:
            options = {"sampling": sampling, "top_logprobs": 8}
            said.append([])
            for n in range(4):
                one = running.ask([*quoting(n, 30) * 2, n], 50, **options)
                one.wait()
                entries = [e for delta in one.deltas for e in delta.logprobs]
                said[-1].append(entries)
            is_fit = make not in RECURRENT
            assert bool(drafted(running)[0]) == (draft_tokens > 0 and is_fit)
            settled(running)
    assert sum(map(alike, *said)) >= 3
    engine.close()
