"""Room BATCHING: which inputs share a call.

All pure, but for one thing that needs the real vocabulary: that the room reserved for
an input before it is tokenized is never less than what it turns out to need.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import kit

# --- Line ---

# tokens: an input above the first is long, above both it needs the long-input context
BATCH, CONTEXT = 10, 20


def item(job: es.Job, index: int, tokens: int) -> es.Item:
    """An input of a job, with so many tokens."""
    return es.Item(np.zeros(tokens, np.int32), b"", [(job, index)])


def owner(waiting: es.Item) -> es.Job:
    """Whose it is."""
    return waiting.owners[0][0]


def job_of(*tokens: int) -> tuple[es.Job, list[es.Item]]:
    """A job whose inputs have these many tokens each."""
    job = kit.job([""] * len(tokens))
    return job, [item(job, index, n) for index, n in enumerate(tokens)]


def add(line: es.ReadyQueue, job: es.Job, items: list[es.Item]) -> None:
    """Queue them in this order."""
    for each in items:
        line.add(job, each)


def remove(line: es.ReadyQueue, job: es.Job) -> None:
    """The job is over: nothing is computed for it alone."""
    for each in job.waiting:
        each.owners = [owner for owner in each.owners if owner[0] is not job]
        if not each.owners:
            line.discard(each)
    job.waiting.clear()


def is_empty(line: es.ReadyQueue) -> bool:
    """Whether no job stands in it, not even one that is over."""
    return line.short.is_empty and line.long.is_empty


def line_of(
    *jobs: list[int], batch: int = BATCH, context: int = CONTEXT
) -> es.ReadyQueue:
    """A line where such jobs have queued in this order."""
    line = es.ReadyQueue(batch, context)
    for tokens in jobs:
        add(line, *job_of(*tokens))
    return line


def take(
    line: es.ReadyQueue,
    tokens: int = BATCH,
    inputs: int = 9,
    *,
    long_context_is_free: bool = True,
) -> list[int]:
    """The sizes of the next batch."""
    return sizes(line.take(tokens, inputs, long_context_is_free=long_context_is_free))


def next_batch(
    line: es.ReadyQueue, inputs: int = 9, tokens: int = BATCH, now: float = 0.0
) -> list[es.Item]:
    """What is taken while the long-input context is free."""
    return line.take(tokens, inputs, long_context_is_free=True, now=now)


def sizes(batch: list[es.Item]) -> list[int]:
    """Tokens of each item."""
    return [item.tokens for item in batch]


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
        pytest.param([[21]], (10, 9), [21], id="the long-input context"),
        pytest.param([[], [3]], (10, 9), [3], id="a dead job is passed over"),
        pytest.param([[], []], (10, 9), [], id="only dead jobs"),
        pytest.param([], (10, 9), [], id="nothing"),
    ],
)
def test_a_batch_is(
    jobs: list[list[int]], budget: tuple[int, int], expected: list[int]
) -> None:
    assert take(line_of(*jobs), *budget) == expected


HUGE = 2048  # inputs: OpenAI's most in one request


def test_a_job_of_one_input_behind_a_huge_one_is_in_the_next_batch() -> None:
    line = line_of([30] * HUGE, batch=256)
    small, items = job_of(30)
    add(line, small, items)
    batch = next_batch(line, 256, 256)
    assert small in [owner(item) for item in batch]
    assert len(batch) == 8, "and the rest of the batch is not wasted"


def test_a_job_that_comes_while_a_huge_one_runs_is_in_the_next_batch_but_one() -> None:
    # The huge job stands in front of it and may take one turn, no more.
    line = line_of([200] * HUGE, batch=256)
    next_batch(line, 256, 256)
    small, items = job_of(200)
    add(line, small, items)
    batches = [next_batch(line, 256, 256) for _ in range(2)]
    assert [owner(item) is small for batch in batches for item in batch] == [
        False,
        True,
    ]


def test_what_did_not_fit_leads_the_next_batch() -> None:
    line = line_of([6], [7], [3], [3])
    assert [take(line), take(line)] == [[6, 3], [7, 3]]


def test_more_of_a_job_that_is_queued_does_not_give_it_more_turns() -> None:
    line = es.ReadyQueue(BATCH, CONTEXT)
    many, first = job_of(1, 1)
    add(line, many, first)
    add(line, many, [item(many, index, 1) for index in range(2, 9)])
    add(line, *job_of(2, 2))
    assert take(line, inputs=4) == [1, 2, 1, 2]


def test_a_job_that_had_run_dry_queues_again_with_its_next_part() -> None:
    line = es.ReadyQueue(BATCH, CONTEXT)
    job, items = job_of(1, 2, 30)
    for part in items:
        add(line, job, [part])
        assert take(line) == [part.tokens]
    add(line, job, [])
    assert take(line) == []


def test_short_inputs_pass_a_long_one_so_often_and_then_it_has_its_turn() -> None:
    line = line_of([CONTEXT] * 2, *[[BATCH]] * 20)
    turns = [take(line)[0] for _ in range(2 * (es.MAX_SKIPS + 1) + 2)]
    once = [BATCH] * es.MAX_SKIPS + [CONTEXT]
    assert turns == once * 2 + [BATCH] * 2


def test_what_went_before_a_long_input_came_has_not_passed_it() -> None:
    line = line_of(*[[BATCH]] * (es.MAX_SKIPS + 2))
    for _ in range(es.MAX_SKIPS + 1):
        take(line)
    add(line, *job_of(CONTEXT))
    assert [take(line), take(line)] == [[BATCH], [CONTEXT]]


def test_a_long_input_waits_for_nobody_when_no_short_one_is_there() -> None:
    line = line_of([CONTEXT, 11, 3])
    assert [take(line) for _ in range(4)] == [[CONTEXT], [11], [3], []]


def test_what_needs_the_long_context_waits_until_it_is_free_and_lets_others_pass() -> (
    None
):
    line = line_of([21, 1], [11], [2])
    busy = [take(line, long_context_is_free=False) for _ in range(3)]
    assert busy == [[2], [11], []]
    assert line.tokens == 22
    assert [take(line), take(line)] == [[21], [1]]


def test_the_long_context_s_turn_is_kept_while_it_is_busy() -> None:
    line = line_of([21], *[[BATCH]] * 9)
    for _ in range(es.MAX_SKIPS + 2):
        assert take(line, long_context_is_free=False) == [BATCH]
    assert take(line) == [21]


def test_a_job_that_is_removed_gives_up_its_turn() -> None:
    line = es.ReadyQueue(BATCH, CONTEXT)
    unwanted = [job_of(1, 1, 30), job_of(30, 1)]
    for job, items in unwanted:
        add(line, job, items)
    add(line, *job_of(2))
    for job, _ in unwanted:
        remove(line, job)
    assert line.tokens == 2
    assert [take(line), take(line)] == [[2], []]
    assert is_empty(line), "and is forgotten"


# One input's wait, in batches: what its job's turn may cost with so many jobs before it.
# Each short batch is led by the first short job, at most one long batch comes between;
# each long batch is the first long job's, at most MAX_SKIPS short ones between.
SIZES = st.integers(1, CONTEXT + 10)
ARRIVALS = st.lists(SIZES, max_size=4)  # the inputs of a job, or none comes
BUDGETS = st.tuples(st.integers(1, 12), st.integers(1, 4))


@dataclass
class Waiting:
    """The line as one who knows only the rules would draw it: who waits, how long."""

    left: dict[es.Job, list[es.Item]] = field(default_factory=dict)
    patience: dict[es.Item, int] = field(default_factory=dict)  # batches it may wait

    def add(self, job: es.Job, items: list[es.Item]) -> None:
        if items:
            self.left[job] = list(items)
            self._now_first(job)

    def took(self, batch: list[es.Item]) -> None:
        for taken in batch:
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
        most = (len(self.left) + 1) * (es.MAX_SKIPS + 1)
        self.patience[self.left[job][0]] = most


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(ARRIVALS, BUDGETS), max_size=60))
def test_nothing_starves_whatever_goes_on_arriving(
    steps: list[tuple[list[int], tuple[int, int]]],
) -> None:
    line, waiting = es.ReadyQueue(BATCH, CONTEXT), Waiting()
    for tokens, (budget_tokens, budget_inputs) in steps:
        job, items = job_of(*tokens)
        add(line, job, items)
        waiting.add(job, items)
        waiting.took(line.take(budget_tokens, budget_inputs, long_context_is_free=True))
    while batch := next_batch(line, 1):
        waiting.took(batch)
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
    line = es.ReadyQueue(BATCH, CONTEXT)
    left: dict[es.Job, list[es.Item]] = {}

    def took(batch: list[es.Item], budget: tuple[int, int]) -> None:
        for taken in batch:
            assert left[owner(taken)].pop(0) is taken, "out of order, twice, or removed"
        assert line.tokens == sum(sum(sizes(items)) for items in left.values())
        assert len(batch) <= max(1, budget[1])
        assert sum(sizes(batch)) <= budget[0] or len(batch) == 1
        assert len(batch) <= 1 or max(sizes(batch)) <= BATCH

    for tokens, budget, long_context_is_free, removed in steps:
        job, left[job] = job_of(*tokens)
        add(line, job, list(left[job]))
        if removed is not None:
            unwanted = list(left)[removed % len(left)]
            remove(line, unwanted)
            left[unwanted] = []
        fits = CONTEXT if not long_context_is_free else 99
        could = any(items and items[0].tokens <= fits for items in left.values())
        batch = line.take(*budget, long_context_is_free=long_context_is_free)
        assert max(sizes(batch), default=0) <= fits
        assert bool(batch) == could, "idle beside work"
        took(batch, budget)
    while batch := next_batch(line, 9):
        took(batch, (BATCH, 9))
    assert not any(left.values())
    assert (line.tokens, is_empty(line)) == (0, True)


@settings(max_examples=500)
@given(
    st.lists(st.lists(st.integers(1, BATCH), max_size=8), max_size=8), st.integers(1, 8)
)
def test_no_job_takes_a_second_turn_before_another_has_had_its_first(
    jobs: list[list[int]], inputs: int
) -> None:
    # With tokens enough for all of them: else one that still fits passes.
    made = [job_of(*tokens) for tokens in jobs]
    line = es.ReadyQueue(BATCH, CONTEXT)
    for job, items in made:
        add(line, job, items)
    while True:
        before = {job for job, _ in made if job.waiting}
        batch = next_batch(line, inputs, 10**6)
        if not batch:
            break
        turns = collections.Counter(owner(item) for item in batch)
        left_out = before - set(turns)
        assert not left_out or max(turns.values()) == 1


# --- Item ---


def test_an_item_waits_with_all_its_owners_and_leaves_all_their_queues() -> None:
    line = es.ReadyQueue(BATCH, CONTEXT)
    first, (one, shared) = asked_by("import", 1, 5)
    add(line, first, [one, shared])
    second, _ = asked_by("query", 5, priority=0)
    shared.owners.append((second, 0))
    add(line, second, [shared])
    assert line.tokens == 6
    assert next_batch(line, 1) == [shared], "it moved up"
    assert next_batch(line, 9) == [one]
    assert (line.tokens, next_batch(line, 9)) == (0, [])
    assert is_empty(line)


def test_an_item_whose_urgent_owner_left_waits_where_it_was() -> None:
    line = es.ReadyQueue(BATCH, CONTEXT)
    first, items = asked_by("import", 1, 5, 2)
    add(line, first, items)
    second, _ = asked_by("query", 5, priority=0)
    items[1].owners.append((second, 0))
    add(line, second, [items[1]])
    remove(line, second)
    assert line.tokens == 8
    assert next_batch(line, 9) == items


def test_a_job_whose_next_input_was_taken_by_another_stands_where_it_should() -> None:
    # Its next one is long now, or short: neither may be taken for the other.
    for sizes_of_job in ([1, 15, 1], [15, 1, 15]):
        line = es.ReadyQueue(BATCH, CONTEXT)
        job, items = asked_by("import", *sizes_of_job)
        add(line, job, items)
        urgent, _ = asked_by("query", priority=0)
        items[0].owners.append((urgent, 0))
        add(line, urgent, [items[0]])
        taken = [next_batch(line, 9) for _ in range(3)]
        assert sorted(map(len, taken)) == [1, 1, 1]
        assert taken[0] == [items[0]]
        assert [*taken[1], *taken[2]] == items[1:]
        assert is_empty(line)
        add(line, job, [item(job, 9, 3)])
        assert take(line) == [3], "and it is queued once"
        assert is_empty(line)


# --- inputs_ahead ---


def test_a_job_waits_for_its_share_of_what_others_have() -> None:
    def waiting(client: str, inputs: int, priority: int = 1) -> es.Job:
        job, _ = asked_by(client, *[1] * inputs, priority=priority)
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


# --- turns: clients, priorities, deadlines ---


def asked_by(client: str, *tokens: int, **more: Any) -> tuple[es.Job, list[es.Item]]:
    """A job of a client's."""
    job = kit.job([""] * len(tokens), client=client, **more)
    return job, [item(job, index, n) for index, n in enumerate(tokens)]


def test_a_client_with_many_jobs_gets_no_more_turns_than_one_with_one() -> None:
    line = es.ReadyQueue(BATCH, CONTEXT)
    for _ in range(100):
        add(line, *asked_by("import", 2, 2))
    add(line, *asked_by("query", 1, 1, 1))
    assert take(line, inputs=6, tokens=99) == [2, 1, 2, 1, 2, 1]


def test_what_is_urgent_goes_first_and_what_was_passed_often_has_its_turn() -> None:
    line = es.ReadyQueue(BATCH, CONTEXT)
    add(line, *asked_by("a", *[3] * 9, priority=es.PRIORITIES.index("low")))
    add(line, *asked_by("a", *[2] * 40, priority=es.PRIORITIES.index("normal")))
    add(line, *asked_by("b", *[1] * 20, priority=es.PRIORITIES.index("high")))
    order = [take(line, inputs=1)[0] for _ in range(69)]
    assert order[: es.MAX_PASSED] == [1] * es.MAX_PASSED
    assert set(order[: es.MAX_PASSED + 2]) == {1, 2, 3}, "aged: each had a turn"
    assert max(n for n, size in enumerate(order) if size == 1) < 28
    assert sorted(order) == [1] * 20 + [2] * 40 + [3] * 9


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), max_size=60))
def test_no_urgency_waits_for_more_than_so_many_others(
    jobs: list[tuple[str, int]],
) -> None:
    line = es.ReadyQueue(BATCH, CONTEXT)
    for client, priority in jobs:
        add(line, *asked_by(client, 1, priority=priority))
    waits = [0, 0, 0]
    while batch := next_batch(line, 1):
        taken = owner(batch[0]).priority
        waits[taken] = 0
        for priority in range(3):
            left = any(owner(i).priority == priority for i in waiting_in(line))
            waits[priority] = waits[priority] + 1 if left and priority != taken else 0
        assert max(waits) <= es.MAX_PASSED + 2
    assert is_empty(line)


def waiting_in(line: es.ReadyQueue) -> Iterator[es.Item]:
    """All that is queued."""
    for clients in line.short.rows:
        for jobs in clients.values():
            for job in jobs:
                yield from job.waiting


def test_what_is_past_its_deadline_is_never_computed() -> None:
    line = es.ReadyQueue(BATCH, CONTEXT)
    late, items = asked_by("a", 1, 1)
    late.deadline_at = 5.0
    add(line, late, items)
    add(line, *asked_by("b", 2))
    assert sizes(next_batch(line, 1, now=4.9)) == [1]
    assert sizes(next_batch(line, 9, now=5.0)) == [2]
    assert line.tokens == 1, "the job has not ended yet, only lost its turn"


# --- max_tokens ---

CARD = kit.fake_card(max_input_tokens=1000)  # head and tail: one token each


@pytest.mark.parametrize("item", ["", "ab", "\x00\x7f", "\u1f82", [5, 6, 7]], ids=repr)
def test_what_is_reserved_is_enough_but_not_much_more(item: str | list[int]) -> None:
    # UTF-8 and decompositions are at most 4 times as long as the text; 2 are special.
    widest = 4 if item == "\u1f82" else 1
    assert 0 <= kit.token_bound(item, CARD) - (widest * len(item) + 2) <= 1


@pytest.mark.parametrize("item", ["x" * 5000, "é" * 5000, list(range(5000))])
def test_no_more_is_reserved_than_the_model_can_read(item: str | list[int]) -> None:
    # What is longer is refused or cut, so it never takes more room than that.
    assert kit.token_bound(item, CARD) == CARD.max_input_tokens


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
    engine: es.Engine, text: str
) -> None:
    ids = es.with_special_tokens(engine.tokenizer.encode(text), engine.card)
    assert len(ids) <= kit.token_bound(text, engine.card)


@given(st.lists(st.integers(1, 3), max_size=9))
def test_no_list_of_ids_gets_longer_than_is_reserved_for_it(ids: list[int]) -> None:
    assert len(es.with_special_tokens_once(ids, CARD)) <= kit.token_bound(ids, CARD)
