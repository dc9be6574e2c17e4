"""Room 8: which inputs share the next call, and what is let in.

All pure, but for one thing that needs the real vocabulary: that the room reserved for
an input before it is tokenised is never less than what it turns out to need.
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import kit

# --- take_pack ---


def waiting_job(*tokens: int) -> es.Job:
    """A job whose inputs have these many tokens each, all waiting."""
    job = es.Job([""] * len(tokens), lambda: None)
    for index, n in enumerate(tokens):
        job.waiting.append(es.Item(job, index, np.zeros(n, np.int32)))
    return job


def jobs_of(*jobs: es.Job) -> collections.deque[es.Job]:
    """The queue as the pool keeps it."""
    return collections.deque(jobs)


def sizes(pack: list[es.Item]) -> list[int]:
    """Tokens of each item."""
    return [item.tokens for item in pack]


@pytest.mark.parametrize(
    ("jobs", "budget", "expected"),
    [
        pytest.param([[5]], (10, 9), [5], id="one job, one input"),
        pytest.param([[5, 5]], (10, 9), [5, 5], id="full to the last token"),
        pytest.param([[5, 6]], (10, 9), [5], id="one token too many"),
        pytest.param([[1, 2, 3]], (99, 2), [1, 2], id="the inputs run out first"),
        pytest.param([[1, 2], [3], [4, 5]], (99, 9), [1, 3, 4, 2, 5], id="in turns"),
        pytest.param([[11]], (10, 9), [11], id="a giant goes alone"),
        pytest.param([[11], [1]], (10, 9), [11], id="and takes nobody with it"),
        pytest.param([[1], [11]], (10, 9), [1], id="nor is it taken along"),
        pytest.param([[4], [9], [1]], (10, 9), [4], id="nobody overtakes"),
        pytest.param([[], [3]], (10, 9), [3], id="a dead job is passed over"),
        pytest.param([[], []], (10, 9), [], id="only dead jobs"),
        pytest.param([], (10, 9), [], id="nothing"),
    ],
)
def test_a_pack_is(
    jobs: list[list[int]], budget: tuple[int, int], expected: list[int]
) -> None:
    queue = jobs_of(*(waiting_job(*tokens) for tokens in jobs))
    assert sizes(es.take_pack(queue, *budget)) == expected


def test_a_job_of_one_input_behind_a_huge_one_is_in_the_next_pack() -> None:
    huge, small = waiting_job(*[30] * es.MAX_INPUTS), waiting_job(30)
    queue = jobs_of(huge, small)
    pack = es.take_pack(queue, 256, 256)
    assert small in [item.job for item in pack]
    assert len(pack) == 8, "and the rest of the pack is not wasted"


def test_a_job_that_comes_while_a_huge_one_runs_is_in_the_next_pack_but_one() -> None:
    # The huge job stands in front of it and may take one turn, no more.
    huge, small = waiting_job(*[200] * es.MAX_INPUTS), waiting_job(200)
    queue = jobs_of(huge)
    es.take_pack(queue, 256, 256)
    queue.append(small)
    packs = [es.take_pack(queue, 256, 256) for _ in range(2)]
    assert [item.job for pack in packs for item in pack] == [huge, small]


def test_jobs_leave_the_queue_with_their_last_input_or_when_dead() -> None:
    done, dead, more = waiting_job(1), waiting_job(), waiting_job(1, 99)
    queue = jobs_of(done, dead, more)
    es.take_pack(queue, 10, 10)
    assert list(queue) == [more]


QUEUES = st.lists(st.lists(st.integers(1, 40), max_size=8), max_size=8)
BUDGETS = st.tuples(st.integers(1, 64), st.integers(1, 8))


@settings(max_examples=1000)
@given(QUEUES, BUDGETS)
def test_packs_hold_every_input_once_in_order_within_the_budgets(
    jobs: list[list[int]], budget: tuple[int, int]
) -> None:
    tokens, inputs = budget
    made = [waiting_job(*job) for job in jobs]
    queue = jobs_of(*made)
    taken: dict[es.Job, list[int]] = {job: [] for job in made}
    while pack := es.take_pack(queue, tokens, inputs):
        assert len(pack) <= inputs
        assert sum(sizes(pack)) <= tokens or len(pack) == 1
        for item in pack:
            taken[item.job].append(item.index)
    assert not queue
    for job, indices in taken.items():
        assert indices == list(range(len(job.inputs)))


@settings(max_examples=1000)
@given(QUEUES, BUDGETS)
def test_no_job_takes_a_second_turn_before_another_has_had_its_first(
    jobs: list[list[int]], budget: tuple[int, int]
) -> None:
    queue = jobs_of(*(waiting_job(*job) for job in jobs))
    while True:
        before = {job for job in queue if job.waiting}
        pack = es.take_pack(queue, *budget)
        if not pack:
            break
        turns = collections.Counter(item.job for item in pack)
        left_out = [job for job in before - set(turns) if job.waiting]
        assert not left_out or max(turns.values()) == 1


# --- fair_budget ---


@pytest.mark.parametrize(
    ("waiting", "idle", "expected"),
    [
        pytest.param(100, 1, 100, id="alone: all of it"),
        pytest.param(100, 2, 50, id="half each"),
        pytest.param(101, 2, 51, id="nothing is left over"),
        pytest.param(1000, 2, 256, id="no more than a pack"),
        pytest.param(1, 8, 1, id="at least a token"),
        pytest.param(0, 8, 0, id="nothing waits"),
    ],
)
def test_an_idle_worker_takes_its_part(waiting: int, idle: int, expected: int) -> None:
    assert es.fair_budget(waiting, idle, 256) == expected


# --- Backlog ---


def test_what_is_reserved_and_released_is_counted() -> None:
    backlog = es.Backlog(10, 100)
    assert backlog.try_reserve(4, 40)
    assert (backlog.inputs, backlog.tokens) == (4, 40)
    backlog.release(1, 15)
    assert (backlog.inputs, backlog.tokens) == (3, 25)


@pytest.mark.parametrize(
    ("inputs", "tokens", "fits"),
    [
        pytest.param(6, 60, True, id="both full to the brim"),
        pytest.param(7, 1, False, id="one input too many"),
        pytest.param(1, 61, False, id="one token too many"),
    ],
)
def test_a_busy_server_refuses_beyond_either_limit(
    inputs: int, tokens: int, fits: bool
) -> None:
    backlog = es.Backlog(10, 100)
    backlog.try_reserve(4, 40)
    before = dataclasses.replace(backlog)
    assert backlog.try_reserve(inputs, tokens) is fits
    assert (backlog == before) is not fits, "a refusal counts nothing"


def test_an_idle_server_takes_even_what_is_over_the_limits() -> None:
    # Else a request larger than the queue could never be served, however often it is
    # sent again, although the 503 says "try again".
    backlog = es.Backlog(1, 1)
    assert backlog.try_reserve(2048, 10**6)
    assert not backlog.try_reserve(1, 1)
    backlog.release(2048, 10**6)
    assert backlog.try_reserve(1, 1)


@pytest.mark.parametrize(("inputs", "tokens"), [(2, 0), (0, 2)])
def test_releasing_more_than_was_reserved_is_a_bug(inputs: int, tokens: int) -> None:
    backlog = es.Backlog(10, 10)
    backlog.try_reserve(1, 1)
    with pytest.raises(AssertionError):
        backlog.release(inputs, tokens)


# --- most_tokens ---

CARD = kit.fake_card(max_input_tokens=1000)  # head and tail: one token each


@pytest.mark.parametrize("item", ["", "ab", "\x00\x7f", "\u1f82", [5, 6, 7]], ids=repr)
def test_what_is_reserved_is_enough_but_not_much_more(item: str | list[int]) -> None:
    # UTF-8 and decompositions are at most 4 times as long as the text; 2 are special.
    widest = 4 if item == "\u1f82" else 1
    assert 0 <= es.most_tokens(item, CARD) - (widest * len(item) + 2) <= 1


@pytest.mark.parametrize("item", ["x" * 5000, "é" * 5000, list(range(5000))])
def test_no_more_is_reserved_than_the_model_can_read(item: str | list[int]) -> None:
    # What is longer is refused or cut, so it never takes more room than that.
    assert es.most_tokens(item, CARD) == CARD.max_input_tokens


# Chars that become many tokens: decomposed Hangul (3), Greek with four accents (4),
# the longest compatibility ligature (never decomposed canonically), Han, marks.
HARD = "각값뷁ΐΰ\u1f82\u1f80\u1fa7\ufdfaﷲ\U0002f800\u0f77\U0001d160中\u0301!["
BOUNDED = st.text(
    st.one_of(
        st.sampled_from(HARD),
        st.sampled_from("aZ9 .,#-]"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)


@pytest.mark.model
@settings(max_examples=2000, deadline=None)
@given(BOUNDED)
@example(HARD)
@example("\ufdfa" * 50)
@example("\u1f82" * 50)
@example("[SEP][CLS]!?")
def test_no_text_has_more_tokens_than_are_reserved_for_it(
    engine: es.LlamaEngine, text: str
) -> None:
    ids = es.framed(engine.tokenise(text), engine.card)
    assert len(ids) <= es.most_tokens(text, engine.card)


@given(st.lists(st.integers(1, 3), max_size=9))
def test_no_list_of_ids_gets_longer_than_is_reserved_for_it(ids: list[int]) -> None:
    assert len(es.framed_once(ids, CARD)) <= es.most_tokens(ids, CARD)


# --- Speed ---


def test_the_first_pack_is_believed_later_ones_a_tenth() -> None:
    speed = es.Speed()
    speed.record(100, 1.0)
    assert speed.tokens_per_s == pytest.approx(100)
    speed.record(200, 1.0)
    assert speed.tokens_per_s == pytest.approx(110)


def test_a_queue_is_drained_by_all_workers_at_the_measured_speed() -> None:
    speed = es.Speed(tokens_per_s=100)
    assert speed.drain_s(1000, workers=5) == pytest.approx(2)
    assert es.Speed().drain_s(10**9, workers=1) == 1, "not known yet"


def test_a_pack_that_took_no_time_is_no_division_by_zero() -> None:
    speed = es.Speed()
    speed.record(10, 0.0)
    assert np.isfinite(speed.tokens_per_s)


# --- sharing among idle workers ---


@pytest.mark.parametrize(
    ("waiting", "idle", "budget"),
    [
        (46, 2, 23),  # two texts, two workers: one each
        (47, 2, 24),  # rounded up: nothing is left for nobody
        (23, 2, 12),  # one text: goes alone, larger than the budget or not
        (1472, 2, 256),  # plenty: full packs
        (46, 1, 46),
        (0, 2, 0),
    ],
)
def test_idle_workers_get_a_part_each(waiting: int, idle: int, budget: int) -> None:
    assert es.fair_budget(waiting, idle, 256) == budget
