"""Rooms PACE and BATCHING: how large a call is, and which inputs share it.

All pure, but for one thing that needs the real vocabulary: that the room reserved for
an input before it is tokenised is never less than what it turns out to need.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import kit

# --- Line ---

PACK, CONTEXT = (
    10,
    20,
)  # tokens: above the first an input is long, above both the lane's


def item(job: es.Job, index: int, tokens: int) -> es.Item:
    """An input of a job, with so many tokens."""
    return es.Item(np.zeros(tokens, np.int32), b"", [(job, index)])


def owner(waiting: es.Item) -> es.Job:
    """Whose it is."""
    return waiting.owners[0][0]


def job_of(*tokens: int) -> tuple[es.Job, list[es.Item]]:
    """A job whose inputs have these many tokens each."""
    job = es.Job([""] * len(tokens), lambda: None)
    return job, [item(job, index, n) for index, n in enumerate(tokens)]


def line_of(*jobs: list[int], pack: int = PACK, context: int = CONTEXT) -> es.Line:
    """A line where such jobs have queued in this order."""
    line = es.Line(pack, context)
    for tokens in jobs:
        line.add(*job_of(*tokens))
    return line


def take(
    line: es.Line,
    tokens: int = PACK,
    inputs: int = 9,
    *,
    lane_is_free: bool = True,
) -> list[int]:
    """The sizes of the next pack."""
    return sizes(line.take(tokens, inputs, lane_is_free=lane_is_free))


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
        pytest.param([[7, 1]], (3, 9), [7], id="above the budget: it goes alone"),
        pytest.param([[11]], (10, 9), [11], id="a long one goes alone"),
        pytest.param([[11], [1]], (10, 9), [1], id="but a short one passes it"),
        pytest.param([[1], [11]], (10, 9), [1], id="nor is it taken along"),
        pytest.param([[1, 11], [2]], (10, 9), [1, 2], id="nor within a job"),
        pytest.param([[4], [9], [1]], (10, 9), [4, 1], id="what still fits passes"),
        pytest.param([[21]], (10, 9), [21], id="the lane"),
        pytest.param([[], [3]], (10, 9), [3], id="a dead job is passed over"),
        pytest.param([[], []], (10, 9), [], id="only dead jobs"),
        pytest.param([], (10, 9), [], id="nothing"),
    ],
)
def test_a_pack_is(
    jobs: list[list[int]], budget: tuple[int, int], expected: list[int]
) -> None:
    assert take(line_of(*jobs), *budget) == expected


HUGE = 2048  # inputs: OpenAI's most in one request


def test_a_job_of_one_input_behind_a_huge_one_is_in_the_next_pack() -> None:
    line = line_of([30] * HUGE, pack=256)
    small, items = job_of(30)
    line.add(small, items)
    pack = line.take(256, 256, lane_is_free=True)
    assert small in [owner(item) for item in pack]
    assert len(pack) == 8, "and the rest of the pack is not wasted"


def test_a_job_that_comes_while_a_huge_one_runs_is_in_the_next_pack_but_one() -> None:
    # The huge job stands in front of it and may take one turn, no more.
    line = line_of([200] * HUGE, pack=256)
    line.take(256, 256, lane_is_free=True)
    small, items = job_of(200)
    line.add(small, items)
    packs = [line.take(256, 256, lane_is_free=True) for _ in range(2)]
    assert [owner(item) is small for pack in packs for item in pack] == [False, True]


def test_what_did_not_fit_leads_the_next_pack() -> None:
    line = line_of([6], [7], [3], [3])
    assert [take(line), take(line)] == [[6, 3], [7, 3]]


def test_more_of_a_job_that_is_queued_does_not_give_it_more_turns() -> None:
    line = es.Line(PACK, CONTEXT)
    many, first = job_of(1, 1)
    line.add(many, first)
    line.add(many, [item(many, index, 1) for index in range(2, 9)])
    line.add(*job_of(2, 2))
    assert take(line, inputs=4) == [1, 2, 1, 2]


def test_a_job_that_had_run_dry_queues_again_with_its_next_part() -> None:
    line = es.Line(PACK, CONTEXT)
    job, items = job_of(1, 2, 30)
    for part in items:
        line.add(job, [part])
        assert take(line) == [part.tokens]
    line.add(job, [])
    assert take(line) == []


def test_short_inputs_pass_a_long_one_so_often_and_then_it_has_its_turn() -> None:
    line = line_of([CONTEXT] * 2, *[[PACK]] * 20)
    turns = [take(line)[0] for _ in range(2 * (es.MOST_OVERTAKES + 1) + 2)]
    once = [PACK] * es.MOST_OVERTAKES + [CONTEXT]
    assert turns == once * 2 + [PACK] * 2


def test_what_went_before_a_long_input_came_has_not_passed_it() -> None:
    line = line_of(*[[PACK]] * (es.MOST_OVERTAKES + 2))
    for _ in range(es.MOST_OVERTAKES + 1):
        take(line)
    line.add(*job_of(CONTEXT))
    assert [take(line), take(line)] == [[PACK], [CONTEXT]]


def test_a_long_input_waits_for_nobody_when_no_short_one_is_there() -> None:
    line = line_of([CONTEXT, 11, 3])
    assert [take(line) for _ in range(4)] == [[CONTEXT], [11], [3], []]


def test_what_needs_the_lane_waits_until_it_is_free_and_lets_others_pass() -> None:
    line = line_of([21, 1], [11], [2])
    busy = [take(line, lane_is_free=False) for _ in range(3)]
    assert busy == [[2], [11], []]
    assert line.tokens == 22
    assert [take(line), take(line)] == [[21], [1]]


def test_the_lanes_turn_is_kept_while_it_is_busy() -> None:
    line = line_of([21], *[[PACK]] * 9)
    for _ in range(es.MOST_OVERTAKES + 2):
        assert take(line, lane_is_free=False) == [PACK]
    assert take(line) == [21]


def test_a_job_that_is_removed_gives_up_its_turn() -> None:
    line = es.Line(PACK, CONTEXT)
    unwanted = [job_of(1, 1, 30), job_of(30, 1)]
    for job, items in unwanted:
        line.add(job, items)
    line.add(*job_of(2))
    for job, _ in unwanted:
        line.remove_all(job)
    assert line.tokens == 2
    assert [take(line), take(line)] == [[2], []]
    assert line.is_empty, "and is forgotten"


# One input's wait, in packs: what its job's turn may cost with so many jobs before it.
# Each short pack is led by the first short job, at most one long pack comes between;
# each long pack is the first long job's, at most MOST_OVERTAKES short ones between.
SIZES = st.integers(1, CONTEXT + 10)
ARRIVALS = st.lists(SIZES, max_size=4)  # the inputs of a job, or none comes
BUDGETS = st.tuples(st.integers(1, 12), st.integers(1, 4))


@dataclass
class Waiting:
    """The line as one who knows only the rules would draw it: who waits, how long."""

    left: dict[es.Job, list[es.Item]] = field(default_factory=dict)
    patience: dict[es.Item, int] = field(default_factory=dict)  # packs it may wait

    def add(self, job: es.Job, items: list[es.Item]) -> None:
        if items:
            self.left[job] = list(items)
            self._now_first(job)

    def took(self, pack: list[es.Item]) -> None:
        for taken in pack:
            assert self.left[owner(taken)].pop(0) is taken, (
                "out of order, or not waiting"
            )
            self.patience.pop(taken)
            if self.left[owner(taken)]:
                self._now_first(owner(taken))
            else:
                del self.left[owner(taken)]
        for first in self.patience:
            self.patience[first] -= 1
            assert self.patience[first] >= 0, "starved"

    def _now_first(self, job: es.Job) -> None:
        most = (len(self.left) + 1) * (es.MOST_OVERTAKES + 1)
        self.patience[self.left[job][0]] = most


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(ARRIVALS, BUDGETS), max_size=60))
def test_nothing_starves_whatever_goes_on_arriving(
    steps: list[tuple[list[int], tuple[int, int]]],
) -> None:
    line, waiting = es.Line(PACK, CONTEXT), Waiting()
    for tokens, (budget_tokens, budget_inputs) in steps:
        job, items = job_of(*tokens)
        line.add(job, items)
        waiting.add(job, items)
        waiting.took(line.take(budget_tokens, budget_inputs, lane_is_free=True))
    while pack := line.take(PACK, 1, lane_is_free=True):
        waiting.took(pack)
    assert not waiting.left


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.tuples(ARRIVALS, BUDGETS, st.booleans(), st.none() | st.integers(0, 10)),
        max_size=30,
    )
)
def test_a_line_loses_nothing_counts_exactly_and_keeps_to_the_budgets(
    steps: list[tuple[list[int], tuple[int, int], bool, int | None]],
) -> None:
    line = es.Line(PACK, CONTEXT)
    left: dict[es.Job, list[es.Item]] = {}

    def took(pack: list[es.Item], budget: tuple[int, int]) -> None:
        for taken in pack:
            assert left[owner(taken)].pop(0) is taken, "out of order, twice, or removed"
        assert line.tokens == sum(sum(sizes(items)) for items in left.values())
        assert len(pack) <= max(1, budget[1])
        assert sum(sizes(pack)) <= budget[0] or len(pack) == 1
        assert len(pack) <= 1 or max(sizes(pack)) <= PACK

    for tokens, budget, lane_is_free, removed in steps:
        job, left[job] = job_of(*tokens)
        line.add(job, list(left[job]))
        if removed is not None:
            unwanted = list(left)[removed % len(left)]
            line.remove_all(unwanted)
            left[unwanted] = []
        fits = CONTEXT if not lane_is_free else 99
        could = any(items and items[0].tokens <= fits for items in left.values())
        pack = line.take(*budget, lane_is_free=lane_is_free)
        assert max(sizes(pack), default=0) <= fits
        assert bool(pack) == could, "idle beside work"
        took(pack, budget)
    while pack := line.take(PACK, 9, lane_is_free=True):
        took(pack, (PACK, 9))
    assert not any(left.values())
    assert (line.tokens, line.is_empty) == (0, True)


@settings(max_examples=500)
@given(
    st.lists(st.lists(st.integers(1, PACK), max_size=8), max_size=8), st.integers(1, 8)
)
def test_no_job_takes_a_second_turn_before_another_has_had_its_first(
    jobs: list[list[int]], inputs: int
) -> None:
    # With tokens enough for all of them: else one that still fits passes.
    made = [job_of(*tokens) for tokens in jobs]
    line = es.Line(PACK, CONTEXT)
    for job, items in made:
        line.add(job, items)
    while True:
        before = {job for job, _ in made if job.waiting}
        pack = line.take(10**6, inputs, lane_is_free=True)
        if not pack:
            break
        turns = collections.Counter(owner(item) for item in pack)
        left_out = before - set(turns)
        assert not left_out or max(turns.values()) == 1


# --- Item ---


def test_an_item_waits_with_all_its_owners_and_leaves_all_their_queues() -> None:
    line = es.Line(PACK, CONTEXT)
    first, (one, shared) = asked_by("import", 1, 5)
    line.add(first, [one, shared])
    second, _ = asked_by("query", 5, urgency=0)
    shared.owners.append((second, 0))
    line.add(second, [shared])
    assert line.tokens == 6
    assert line.take(PACK, 1, lane_is_free=True) == [shared], "it moved up"
    assert line.take(PACK, 9, lane_is_free=True) == [one]
    assert (line.tokens, line.take(PACK, 9, lane_is_free=True)) == (0, [])
    assert line.is_empty


def test_an_item_whose_urgent_owner_left_waits_where_it_was() -> None:
    line = es.Line(PACK, CONTEXT)
    first, items = asked_by("import", 1, 5, 2)
    line.add(first, items)
    second, _ = asked_by("query", 5, urgency=0)
    items[1].owners.append((second, 0))
    line.add(second, [items[1]])
    line.remove_all(second)
    items[1].disown(second)
    assert line.tokens == 8
    assert line.take(PACK, 9, lane_is_free=True) == items


def test_a_job_whose_next_input_was_taken_by_another_stands_where_it_should() -> None:
    # Its next one is long now, or short: neither may be taken for the other.
    for sizes_of_job in ([1, 15, 1], [15, 1, 15]):
        line = es.Line(PACK, CONTEXT)
        job, items = asked_by("import", *sizes_of_job)
        line.add(job, items)
        urgent, _ = asked_by("query", urgency=0)
        items[0].owners.append((urgent, 0))
        line.add(urgent, [items[0]])
        taken = [line.take(PACK, 9, lane_is_free=True) for _ in range(3)]
        assert sorted(map(len, taken)) == [1, 1, 1]
        assert taken[0] == [items[0]]
        assert [*taken[1], *taken[2]] == items[1:]
        assert line.is_empty
        line.add(job, [item(job, 9, 3)])
        assert take(line) == [3], "and it is queued once"
        assert line.is_empty


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
    budget = es.fair_budget(waiting, 0, idle=idle, workers=8, most=256)
    assert budget == expected


# --- inputs_ahead ---


def test_a_job_waits_for_its_share_of_what_others_have() -> None:
    def waiting(client: str, inputs: int, urgency: int = 1) -> es.Job:
        job, _ = asked_by(client, *[1] * inputs, urgency=urgency)
        job.unfinished = inputs
        return job

    line = waiting("query", 2)
    import_ = [waiting("import", 2048) for _ in range(9)]
    assert es.inputs_ahead(line, import_) == 2
    assert es.inputs_ahead(waiting("import", 2), import_) == 2 * 9
    assert es.inputs_ahead(line, [*import_, waiting("other", 1)]) == 2 + 1
    assert es.inputs_ahead(line, [waiting("query", 9), *import_]) == 2 + (2 + 2)
    assert es.inputs_ahead(line, [waiting("import", 50, 0)]) == 50, "more urgent"
    assert es.inputs_ahead(line, [waiting("import", 50, 2)]) == 0, "less so"


# --- turns: clients, urgencies, deadlines ---


def asked_by(client: str, *tokens: int, **more: Any) -> tuple[es.Job, list[es.Item]]:
    """A job of a client's."""
    job = es.Job([""] * len(tokens), lambda: None, client=client, **more)
    return job, [item(job, index, n) for index, n in enumerate(tokens)]


def test_a_client_with_many_jobs_gets_no_more_turns_than_one_with_one() -> None:
    line = es.Line(PACK, CONTEXT)
    for _ in range(100):
        line.add(*asked_by("import", 2, 2))
    line.add(*asked_by("query", 1, 1, 1))
    assert take(line, inputs=6, tokens=99) == [2, 1, 2, 1, 2, 1]


def test_what_is_urgent_goes_first_and_what_was_passed_often_has_its_turn() -> None:
    line = es.Line(PACK, CONTEXT)
    line.add(*asked_by("a", *[3] * 9, urgency=es.URGENCIES.index("low")))
    line.add(*asked_by("a", *[2] * 40, urgency=es.URGENCIES.index("normal")))
    line.add(*asked_by("b", *[1] * 20, urgency=es.URGENCIES.index("high")))
    order = [take(line, inputs=1)[0] for _ in range(69)]
    assert order[: es.MOST_PASSED] == [1] * es.MOST_PASSED
    assert set(order[: es.MOST_PASSED + 2]) == {1, 2, 3}, "aged: each had a turn"
    assert max(n for n, size in enumerate(order) if size == 1) < 28
    assert sorted(order) == [1] * 20 + [2] * 40 + [3] * 9


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), max_size=60))
def test_no_urgency_waits_for_more_than_so_many_others(
    jobs: list[tuple[str, int]],
) -> None:
    line = es.Line(PACK, CONTEXT)
    for client, urgency in jobs:
        line.add(*asked_by(client, 1, urgency=urgency))
    waits = [0, 0, 0]
    while pack := line.take(PACK, 1, lane_is_free=True):
        taken = owner(pack[0]).urgency
        waits[taken] = 0
        for urgency in range(3):
            left = any(owner(i).urgency == urgency for i in waiting_in(line))
            waits[urgency] = waits[urgency] + 1 if left and urgency != taken else 0
        assert max(waits) <= es.MOST_PASSED + 2
    assert line.is_empty


def waiting_in(line: es.Line) -> Iterator[es.Item]:
    """All that is queued."""
    for turns in line.short.rows:
        for jobs in turns.clients.values():
            for job in jobs:
                yield from job.waiting


def test_what_is_past_its_deadline_is_never_computed() -> None:
    line = es.Line(PACK, CONTEXT)
    late, items = asked_by("a", 1, 1)
    late.deadline_at = 5.0
    line.add(late, items)
    line.add(*asked_by("b", 2))
    assert sizes(line.take(PACK, 1, lane_is_free=True, now=4.9)) == [1]
    assert sizes(line.take(PACK, 9, lane_is_free=True, now=5.0)) == [2]
    assert line.tokens == 1, "the job has not ended yet, only lost its turn"


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


def test_a_pack_counts_as_much_as_one_says() -> None:
    speed = es.Speed(tokens_per_s=100)
    speed.record(200, 1.0, weight=0.5)
    assert speed.tokens_per_s == pytest.approx(150)


# --- Stretch ---


def free_cores(threads: int) -> float:
    """How long a call takes, against one thread: what was measured, carried on."""
    return float(threads**-0.8)


def busy_neighbour(threads: int) -> float:
    """With a neighbour on one of the cores, for whom all the other threads wait."""
    return 1.0 if threads == 1 else 2.0


class Calls:
    """Lone calls in a row, on a clock that moves by what each takes."""

    def __init__(
        self, cost: Callable[[int], float], *, threads: int = 1, idle: int = 1
    ) -> None:
        self.stretch = es.Stretch(threads, idle)
        self.cost = cost
        self.now = 1000.0

    def one(self, tokens: int = 100, pause_s: float = 0.0) -> int:
        """Make a call; its threads."""
        self.now += pause_s
        threads = self.stretch.threads(tokens, self.now, is_alone=True)
        took = self.cost(threads) * tokens * 1e-4
        self.now += took
        self.stretch.record(tokens, threads, took)
        return threads

    def many(self, count: int, tokens: int = 100) -> list[int]:
        return [self.one(tokens) for _ in range(count)]

    def settle(self, tokens: int = 100) -> None:
        """Past the first trials, and before anything is tried again."""
        self.many(2 + 8 * es.Stretch.TRIAL_CALLS, tokens)
        assert self.now < 1000.0 + es.Stretch.FIRST_RETRY_S

    def trials(self, *, of: int, seconds: float) -> Iterator[float]:
        """When a number of threads that was not in use was tried."""
        before, end = of, self.now + seconds
        while self.now < end:
            begun = self.now
            threads = self.one()
            if threads == of != before:
                yield begun
            before = threads


def test_while_others_wait_or_work_a_call_gets_its_own_threads() -> None:
    calls = Calls(free_cores, threads=2)
    calls.settle()
    for _ in range(20):
        assert calls.stretch.threads(100, calls.now, is_alone=False) == 2


def test_the_only_worker_has_nobody_s_cores_to_use() -> None:
    assert set(Calls(free_cores, threads=2, idle=0).many(50)) == {2}


def test_the_first_call_alone_may_be_the_first_of_many() -> None:
    calls = Calls(free_cores)
    assert calls.one() == 1
    calls.settle()
    for is_alone in (False, True):
        first = calls.stretch.threads(100, calls.now, is_alone=is_alone)
        assert first == 1
    assert calls.one() == 2


def test_a_trial_that_is_disturbed_ends_all_the_same() -> None:
    calls = Calls(busy_neighbour)
    calls.settle()
    tried = []
    for _ in range(40):  # nothing is recorded: others came in the middle of each
        calls.now += 0.2
        tried.append(calls.stretch.threads(100, calls.now, is_alone=True))
    assert 0 < tried.count(2) <= 3 * es.Stretch.TRIAL_CALLS


def test_a_number_of_threads_is_tried_for_so_many_calls_each_doubling_to_all() -> None:
    tried = Calls(free_cores, idle=6).many(2 + 3 * es.Stretch.TRIAL_CALLS)
    once = es.Stretch.TRIAL_CALLS
    assert tried == [1, *[2] * once, *[4] * once, *[7] * once, 7]


def test_workers_of_several_threads_are_stretched_in_wholes() -> None:
    calls = Calls(free_cores, threads=3, idle=2)
    assert set(calls.many(30)) == {3, 6, 9}


@pytest.mark.parametrize(
    ("cost", "best"),
    [
        pytest.param(free_cores, 4, id="free cores: all of them"),
        pytest.param(busy_neighbour, 1, id="a neighbour: one"),
        pytest.param(lambda n: abs(n - 2) + 1.0, 2, id="or what lies between"),
    ],
)
def test_the_fastest_number_of_threads_is_used(
    cost: Callable[[int], float], best: int
) -> None:
    calls = Calls(cost, idle=3)
    calls.settle()
    assert set(calls.many(20)) == {best}


def test_starting_the_threads_is_not_held_against_them() -> None:
    def worth_it(threads: int) -> float:
        return 1.0 if threads == 1 else 0.8

    calls = Calls(worth_it)
    calls.one()
    calls.cost = lambda _: 1000.0  # once
    assert calls.one() == 2
    calls.cost = worth_it
    calls.many(es.Stretch.TRIAL_CALLS)
    assert set(calls.many(9)) == {2}


def test_what_suits_long_calls_is_not_done_to_short_ones() -> None:
    calls = Calls(free_cores)
    calls.settle(tokens=400)
    calls.cost = busy_neighbour
    calls.many(9, tokens=20)
    assert [calls.one(20), calls.one(400)] == [1, 2]


def test_a_neighbour_who_comes_is_made_room_for_within_a_few_calls() -> None:
    calls = Calls(free_cores)
    calls.settle()
    calls.cost = busy_neighbour
    assert calls.many(9)[4:] == [1] * 5


def test_what_was_slower_is_tried_again_ever_more_rarely() -> None:
    calls = Calls(busy_neighbour)
    calls.many(2 + es.Stretch.TRIAL_CALLS)
    begun = calls.now
    times = np.array([begun, *calls.trials(of=2, seconds=300.0)])
    expected = [es.Stretch.FIRST_RETRY_S]
    while len(expected) < len(times) - 1:
        expected.append(min(2 * expected[-1], es.Stretch.LAST_RETRY_S))
    np.testing.assert_allclose(np.diff(times), expected, atol=0.1)
    assert expected.count(es.Stretch.LAST_RETRY_S) > 1, "the test says too little"


def test_a_neighbour_who_leaves_is_noticed_after_the_longest_wait_at_most() -> None:
    calls = Calls(busy_neighbour)
    assert len(list(calls.trials(of=2, seconds=100.0))) > 5
    calls.cost = free_cores
    end = calls.now + es.Stretch.LAST_RETRY_S + 1
    while calls.now < end:
        calls.one()
    assert set(calls.many(9)) == {2}


def test_when_something_has_changed_the_others_are_tried_again_soon() -> None:
    # The neighbour came for a moment, after a long time alone.
    calls = Calls(free_cores)
    assert len(list(calls.trials(of=1, seconds=200.0))) > 5
    calls.cost = busy_neighbour
    calls.many(9)
    calls.cost = free_cores
    end = calls.now + 5 * es.Stretch.FIRST_RETRY_S
    while calls.now < end:
        calls.one()
    assert calls.one() == 2


@settings(max_examples=200)
@given(
    st.integers(1, 4),
    st.integers(0, 9),
    st.lists(
        st.tuples(
            *(st.integers(1, 600), st.booleans(), st.booleans()),
            *(st.floats(0, 40), st.floats(1e-4, 10)),
        ),
        max_size=60,
    ),
)
def test_never_more_threads_than_all_workers_have_nor_fewer_than_ones_own(
    own: int, others: int, calls: list[tuple[int, bool, bool, float, float]]
) -> None:
    stretch, now = es.Stretch(own, others), 0.0
    for tokens, is_alone, is_recorded, pause, took in calls:
        now += pause
        threads = stretch.threads(tokens, now, is_alone=is_alone)
        assert own <= threads <= own * (1 + others)
        assert threads % own == 0
        assert is_alone or threads == own
        if is_recorded:
            stretch.record(tokens, threads, took)


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
    found = es.fair_budget(waiting, 0, idle=idle, workers=2, most=256)
    assert found == budget


@pytest.mark.parametrize(
    ("waiting", "running", "budget"),
    [
        (110, 66, 96),  # 8 texts of 22: up to 4, and something stays behind
        (704, 352, 256),  # plenty: full packs
        (400, 128, 176),  # in between: a third of all
        (66, 66, 66),  # 6 texts: too few to leave any
        (22, 22, 22),
        (22, 256, 96),  # one text: it alone, whatever the budget
    ],
)
def test_while_others_compute_a_part_is_left_for_the_next(
    waiting: int, running: int, budget: int
) -> None:
    found = es.fair_budget(waiting, running, idle=1, workers=2, most=256)
    assert found == budget
