"""Room THROUGHPUT: how large a call is and with how many threads, what is let in, and
when the rest is told to come back. All pure.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import kit

HUGE = 2048  # inputs: OpenAI's most in one request
ONE = es.Size(1, 1)

# --- Backlog ---


def test_what_is_let_in_is_in_time_even_at_half_the_speed() -> None:
    backlog = es.Backlog(es.Size(10**6, 10**9, 1 << 40), used_part=1.0)
    backlog.throughput.record(1000, 1.0)
    size = es.Size(1, 100)
    timeout_s = 10.0
    with pytest.raises(es.Overloaded, match="would wait 5.1 of its 10 s") as caught:
        for _ in range(10**3):
            if backlog.may_be_late(timeout_s):
                backlog.refuse_late(0.0, timeout_s, backlog.inputs, size.tokens)
            assert backlog.try_reserve(size)
    halved_s = 2 * backlog.wait_s
    assert timeout_s < halved_s <= timeout_s + 2 * size.tokens / 1000
    assert (caught.value.retry_after_s or 60) <= 1.0, "in time for the next place"


def test_what_is_reserved_and_released_is_counted() -> None:
    backlog = es.Backlog(es.Size(10, 100))
    assert backlog.try_reserve(es.Size(4, 40))
    assert (backlog.inputs, backlog.tokens) == (4, 40)
    backlog.release(es.Size(1, 15))
    assert (backlog.inputs, backlog.tokens) == (3, 25)


@pytest.mark.parametrize(
    ("size", "fits"),
    [
        pytest.param(es.Size(6, 60), True, id="both full to the brim"),
        pytest.param(es.Size(7, 1), False, id="one input too many"),
        pytest.param(es.Size(1, 61), False, id="one token too many"),
    ],
)
def test_a_busy_server_refuses_beyond_either_limit(size: es.Size, fits: bool) -> None:
    backlog = es.Backlog(es.Size(10, 100))
    backlog.try_reserve(es.Size(4, 40), "somebody")
    before = dataclasses.replace(backlog, clients=backlog.clients.copy())
    assert backlog.try_reserve(size, "somebody") is fits
    assert (backlog == before) is not fits, "a refusal counts nothing"


def test_an_idle_server_takes_even_what_is_over_the_limits() -> None:
    # Else a request larger than the queue could never be served, however often it is
    # sent again, although the 503 says "try again".
    backlog = es.Backlog(ONE)
    assert backlog.try_reserve(es.Size(2048, 10**6))
    assert not backlog.try_reserve(ONE)
    backlog.release(es.Size(2048, 10**6))
    assert backlog.try_reserve(ONE)


@pytest.mark.parametrize("size", [es.Size(2, 0), es.Size(0, 2)])
def test_releasing_more_than_was_reserved_is_a_bug(size: es.Size) -> None:
    backlog = es.Backlog(es.Size(10, 10))
    backlog.try_reserve(ONE)
    with pytest.raises(AssertionError):
        backlog.release(size)


def test_a_client_may_fill_the_queue_and_others_still_get_in() -> None:
    backlog = es.Backlog(es.Size(16, 10**6))
    assert backlog.try_reserve(es.Size(16, 16), "import")
    assert not backlog.try_reserve(ONE, "import")
    assert backlog.is_full_for("import")
    assert not backlog.is_full_for("query")
    assert backlog.try_reserve(ONE, "query")
    assert backlog.try_reserve(ONE, "query"), "less than an equal part"
    for client in ("import", "query", "a third"):
        assert backlog.is_full_for(client), "the reserve is bounded"
        assert not backlog.try_reserve(ONE, client)
    backlog.release(ONE, "import")
    assert not backlog.try_reserve(ONE, "import")
    assert backlog.try_reserve(ONE, "query")


@pytest.mark.parametrize("way", es.Size._fields)
def test_what_must_be_done_before_there_is_room(way: str) -> None:
    backlog = es.Backlog(es.Size(40, 40, 40))
    backlog.try_reserve(es.Size(36, 36, 36), "one")
    more = es.Size(**{way: 9})
    assert backlog.excess(more, "one") == pytest.approx(5 / 36)
    assert backlog.excess(more, "another") == 0, "there is a reserve of 5"
    assert backlog.excess(es.Size(**{way: 90}), "one") == 1.0, "all of it"


def test_what_is_not_tokenized_counts_as_what_became_of_the_like() -> None:
    backlog = es.Backlog(es.Size(10, 10**6))
    backlog.try_reserve(es.Size(2, 1000))
    assert backlog.expected_tokens == 250, "four characters a token"
    for _ in range(100):
        backlog.tokenized(5, 3)
    assert backlog.tokens == 500 + 300
    assert backlog.expected_tokens == pytest.approx(300 + 500 * 0.6, rel=1e-3)
    backlog.release(es.Size(2, 800), bounds=500)
    assert (backlog.inputs, backlog.tokens, backlog.bounds) == (0, 0, 0)


@dataclass
class Import:
    """A client that sends all its batches at once, at a server with a clock of its own.

    Refused ones are sent again when they were told to, twice at most, as SDKs do.
    """

    batches: int
    max_inputs: int
    tokens_of_a_text: int = 20
    texts_per_s: int = 530  # what a small box did with the default model
    now: float = 0.0
    refused: int = 0
    lost: int = 0
    waits: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Until nothing is under way."""
        backlog = es.Backlog(es.Size(self.max_inputs, 1 << 24))
        backlog.throughput.record(self.texts_per_s * self.tokens_of_a_text, 1.0)
        bound = 4 * self.tokens_of_a_text  # what is reserved until it is tokenized
        to_send = [(0.0, 0)] * self.batches
        running: collections.deque[int] = collections.deque()
        while to_send or running:
            to_send.sort()
            while to_send and to_send[0][0] <= self.now:
                _, tries = to_send.pop(0)
                size = es.Size(HUGE, HUGE * bound)
                if backlog.try_reserve(size, "import"):
                    backlog.tokenized(HUGE * bound, HUGE * self.tokens_of_a_text)
                    running.append(HUGE)
                elif tries == 2:
                    self.lost += 1
                else:
                    self.refused += 1
                    said = backlog.overloaded(self.now, "import", size)
                    wait_s = float(dict(es.error_headers(said))["retry-after"])
                    self.waits.append(wait_s)
                    to_send.append((self.now + wait_s, tries + 1))
            self._compute_for_a_second(backlog, running)

    def _compute_for_a_second(
        self, backlog: es.Backlog, running: collections.deque[int]
    ) -> None:
        self.now += 1
        left = self.texts_per_s
        while left and running:
            done = min(left, running[0])
            size = es.Size(done, done * self.tokens_of_a_text)
            backlog.release(size, "import")
            running[0] -= done
            left -= done
            if not running[0]:
                running.popleft()


@pytest.mark.parametrize("batches", [10, 30])
def test_an_import_that_comes_at_once_is_let_in_at_once(batches: int) -> None:
    at = Import(batches, es.queue_limit(kit.settings()).inputs)
    at.run()
    assert (at.refused, at.lost) == (0, 0)
    assert at.now == pytest.approx(batches * HUGE / at.texts_per_s, abs=2)


@pytest.mark.parametrize("max_inputs", [2 * HUGE, 3 * HUGE])
def test_what_is_refused_comes_back_one_behind_the_other_and_is_let_in(
    max_inputs: int,
) -> None:
    at = Import(10, max_inputs)
    at.run()
    assert at.refused >= 10 - max_inputs // HUGE
    assert at.lost == 0
    assert at.now < 1.5 * 10 * HUGE / at.texts_per_s, "and no time is lost"
    assert max(at.waits) - min(at.waits) > 20, "not all at the same moment"


def test_a_wait_is_never_longer_than_clients_can_wait() -> None:
    backlog = es.Backlog(ONE, used_part=1.0)
    backlog.throughput.record(100, seconds=1.0)
    waits = [backlog.return_in_s(100.0, 40.0, 2500) for _ in range(50)]
    assert 40 <= waits[0] <= 50
    assert all(es.LONGEST_WAIT_S * 0.75 <= wait <= 60 for wait in waits[1:])
    assert backlog.return_in_s(1000.0, 2.0, 100) < 3, "what was promised is over"


# --- fair_budget ---


@pytest.mark.parametrize(
    ("waiting", "idle", "expected"),
    [
        pytest.param(100, 1, 100, id="alone: all of it"),
        pytest.param(100, 2, 50, id="half each"),
        pytest.param(101, 2, 51, id="nothing is left over"),
        pytest.param(1000, 2, 256, id="no more than a batch"),
        pytest.param(1, 8, 1, id="at least a token"),
        pytest.param(0, 8, 0, id="nothing waits"),
    ],
)
def test_an_idle_worker_takes_its_part(waiting: int, idle: int, expected: int) -> None:
    budget = es.fair_budget(waiting, 0, idle=idle, workers=8, limit=256)
    assert budget == expected


@pytest.mark.parametrize(
    ("waiting", "idle", "budget"),
    [
        (46, 2, 23),  # two texts, two workers: one each
        (47, 2, 24),  # rounded up: nothing is left for nobody
        (23, 2, 12),  # one text: goes alone, larger than the budget or not
        (1472, 2, 256),  # plenty: full batches
        (46, 1, 46),
        (0, 2, 0),
    ],
)
def test_idle_workers_get_a_part_each(waiting: int, idle: int, budget: int) -> None:
    found = es.fair_budget(waiting, 0, idle=idle, workers=2, limit=256)
    assert found == budget


@pytest.mark.parametrize(
    ("waiting", "running", "budget"),
    [
        (110, 66, 96),  # 8 texts of 22: up to 4, and something stays behind
        (704, 352, 256),  # plenty: full batches
        (400, 128, 176),  # in between: a third of all
        (66, 66, 66),  # 6 texts: too few to leave any
        (22, 22, 22),
        (22, 256, 96),  # one text: it alone, whatever the budget
    ],
)
def test_while_others_compute_a_part_is_left_for_the_next(
    waiting: int, running: int, budget: int
) -> None:
    found = es.fair_budget(waiting, running, idle=1, workers=2, limit=256)
    assert found == budget


# --- Throughput ---


def test_the_first_batch_is_believed_later_ones_a_tenth() -> None:
    throughput = es.Throughput()
    throughput.record(100, 1.0)
    assert throughput.tokens_per_s == pytest.approx(100)
    throughput.record(200, 1.0)
    assert throughput.tokens_per_s == pytest.approx(110)


def test_a_queue_is_drained_by_all_workers_at_the_measured_speed() -> None:
    backlog = es.Backlog(es.Size(9, 9999), workers=5, used_part=1.0)
    backlog.try_reserve(es.Size(1, 1000))
    assert backlog.wait_s == 0, "not known yet"
    assert 1 <= backlog.return_in_s(0.0, 1.0, 10**9) <= 1.25
    backlog.throughput.record(100, seconds=1.0)
    assert backlog.wait_s == pytest.approx(2)


def test_a_batch_that_took_no_time_is_no_division_by_zero() -> None:
    throughput = es.Throughput()
    throughput.record(10, 0.0)
    assert np.isfinite(throughput.tokens_per_s)


def test_a_batch_counts_as_much_as_one_says() -> None:
    throughput = es.Throughput(tokens_per_s=100)
    throughput.record(200, 1.0, weight=0.5)
    assert throughput.tokens_per_s == pytest.approx(150)


# --- ThreadTuner ---


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
        self.tuner = es.ThreadTuner(threads, idle)
        self.cost = cost
        self.now = 1000.0

    def one(self, tokens: int = 100, pause_s: float = 0.0) -> int:
        """Make a call; its threads."""
        self.now += pause_s
        threads = self.tuner.threads(tokens, self.now, is_alone=True)
        took = self.cost(threads) * tokens * 1e-4
        self.now += took
        self.tuner.record(tokens, threads, took, self.now)
        return threads

    def many(self, count: int, tokens: int = 100) -> list[int]:
        return [self.one(tokens) for _ in range(count)]

    def settle(self, tokens: int = 100) -> None:
        """Past the first trials, and before anything is tried again."""
        self.many(2 + 8 * es.ThreadTuner.TRIAL_CALLS, tokens)
        assert self.now < 1000.0 + es.ThreadTuner.FIRST_RETRY_S

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
        assert calls.tuner.threads(100, calls.now, is_alone=False) == 2


def test_the_only_worker_has_nobody_s_cores_to_use() -> None:
    assert set(Calls(free_cores, threads=2, idle=0).many(50)) == {2}


def test_the_first_call_alone_may_be_the_first_of_many() -> None:
    calls = Calls(free_cores)
    assert calls.one() == 1
    calls.settle()
    for is_alone in (False, True):
        first = calls.tuner.threads(100, calls.now, is_alone=is_alone)
        assert first == 1
    assert calls.one() == 2


def test_a_trial_that_is_disturbed_ends_all_the_same() -> None:
    calls = Calls(busy_neighbour)
    calls.settle()
    tried = []
    for _ in range(40):  # nothing is recorded: others came in the middle of each
        calls.now += 0.2
        tried.append(calls.tuner.threads(100, calls.now, is_alone=True))
    assert 0 < tried.count(2) <= 3 * es.ThreadTuner.TRIAL_CALLS


def test_all_threads_are_tried_for_a_few_calls_and_no_number_in_between() -> None:
    tried = Calls(busy_neighbour, idle=6).many(9)
    once = es.ThreadTuner.TRIAL_CALLS
    assert tried == [1, *[7] * once, *[1] * (9 - 1 - once)]


def test_workers_of_several_threads_lend_all_of_them() -> None:
    calls = Calls(free_cores, threads=3, idle=2)
    assert set(calls.many(30)) == {3, 9}


@pytest.mark.parametrize(
    ("cost", "best"),
    [
        pytest.param(free_cores, 4, id="free cores: all of them"),
        pytest.param(busy_neighbour, 1, id="a neighbour: one"),
    ],
)
def test_the_faster_number_of_threads_is_used(
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
    calls.many(es.ThreadTuner.TRIAL_CALLS)
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
    calls.many(2 + es.ThreadTuner.TRIAL_CALLS)
    begun = calls.now
    times = np.array([begun, *calls.trials(of=2, seconds=300.0)])
    expected = [es.ThreadTuner.FIRST_RETRY_S]
    while len(expected) < len(times) - 1:
        expected.append(min(2 * expected[-1], es.ThreadTuner.LAST_RETRY_S))
    np.testing.assert_allclose(np.diff(times), expected, atol=0.1)
    assert expected.count(es.ThreadTuner.LAST_RETRY_S) > 1, "the test says too little"


def test_a_neighbour_who_leaves_is_noticed_after_the_longest_wait_at_most() -> None:
    calls = Calls(busy_neighbour)
    assert len(list(calls.trials(of=2, seconds=100.0))) > 5
    calls.cost = free_cores
    end = calls.now + es.ThreadTuner.LAST_RETRY_S + 1
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
    end = calls.now + 5 * es.ThreadTuner.FIRST_RETRY_S
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
def test_a_call_has_its_own_threads_or_all_workers_and_its_own_if_not_alone(
    own: int, others: int, calls: list[tuple[int, bool, bool, float, float]]
) -> None:
    tuner, now = es.ThreadTuner(own, others), 0.0
    for tokens, is_alone, is_recorded, pause, took in calls:
        now += pause
        threads = tuner.threads(tokens, now, is_alone=is_alone)
        assert threads in (own, own * (1 + others))
        assert is_alone or threads == own
        if is_recorded:
            tuner.record(tokens, threads, took, now)
