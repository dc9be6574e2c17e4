"""Room ADMISSION: what is let in, and when the rest is told to come back. All pure."""

from __future__ import annotations

import collections
import dataclasses
from dataclasses import dataclass, field

import pytest

import embellama_server as es
from tests import kit

HUGE = 2048  # inputs: OpenAI's most in one request

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
    backlog.try_reserve(4, 40, client="somebody")
    before = dataclasses.replace(backlog, clients=backlog.clients.copy())
    assert backlog.try_reserve(inputs, tokens, client="somebody") is fits
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


def test_a_client_may_fill_the_queue_and_others_still_get_in() -> None:
    backlog = es.Backlog(16, 10**6)
    assert backlog.try_reserve(16, 16, client="import")
    assert not backlog.try_reserve(1, 1, client="import")
    assert backlog.is_full_for("import")
    assert not backlog.is_full_for("query")
    assert backlog.try_reserve(1, 1, client="query")
    assert backlog.try_reserve(1, 1, client="query"), "less than an equal part"
    for client in ("import", "query", "a third"):
        assert backlog.is_full_for(client), "the reserve is bounded"
        assert not backlog.try_reserve(1, 1, client=client)
    backlog.release(1, 1, "import")
    assert not backlog.try_reserve(1, 1, client="import")
    assert backlog.try_reserve(1, 1, client="query")


@pytest.mark.parametrize("more", [(0, 9, 0), (9, 0, 0), (0, 0, 9)], ids=str)
def test_what_must_be_done_before_there_is_room(more: tuple[int, int, int]) -> None:
    backlog = es.Backlog(40, 40, 40)
    backlog.try_reserve(36, 36, 36, client="one")
    assert backlog.excess(*more, "one") == pytest.approx(5 / 36)
    assert backlog.excess(*more, "another") == 0, "there is a reserve of 5"
    inputs, tokens, held_bytes = (10 * n for n in more)
    assert backlog.excess(inputs, tokens, held_bytes, "one") == 1.0, "all of it"


def test_what_is_not_tokenised_counts_as_what_became_of_the_like() -> None:
    backlog = es.Backlog(10, 10**6)
    backlog.try_reserve(2, 1000)
    assert backlog.expected_tokens == 250, "four characters a token"
    for _ in range(100):
        backlog.tokenised(5, 3)
    assert backlog.tokens == 500 + 300
    assert backlog.expected_tokens == pytest.approx(300 + 500 * 0.6, rel=1e-3)
    backlog.release(2, 300, bound=500)
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
        backlog = es.Backlog(self.max_inputs, 1 << 24)
        admission = es.Admission(backlog, workers=1)
        admission.speed.record(self.texts_per_s * self.tokens_of_a_text, 1.0)
        bound = 4 * self.tokens_of_a_text  # what is reserved until it is tokenised
        to_send = [(0.0, 0)] * self.batches
        running: collections.deque[int] = collections.deque()
        while to_send or running:
            to_send.sort()
            while to_send and to_send[0][0] <= self.now:
                _, tries = to_send.pop(0)
                size = (HUGE, HUGE * bound)
                if backlog.try_reserve(*size, client="import"):
                    backlog.tokenised(HUGE * bound, HUGE * self.tokens_of_a_text)
                    running.append(HUGE)
                elif tries == 2:
                    self.lost += 1
                else:
                    self.refused += 1
                    said = admission.overloaded(self.now, "import", *size)
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
            backlog.release(done, done * self.tokens_of_a_text, "import")
            running[0] -= done
            left -= done
            if not running[0]:
                running.popleft()


@pytest.mark.parametrize("batches", [10, 30])
def test_an_import_that_comes_at_once_is_let_in_at_once(batches: int) -> None:
    at = Import(batches, es.queue_room(kit.settings())[0])
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
    returns = es.Returns()
    waits = [returns.wait_s(100.0, 40.0, 25.0) for _ in range(50)]
    assert 40 <= waits[0] <= 50
    assert all(es.LONGEST_WAIT_S * 0.75 <= wait <= 60 for wait in waits[1:])
    assert returns.wait_s(1000.0, 2.0, 1.0) < 3, "what was promised is over"
