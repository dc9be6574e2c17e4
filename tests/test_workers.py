"""Room WORKERS: every job ends exactly once, and the queue's room always comes back.

Real threads, a fake engine whose calls can be held. ``deliver`` puts callables into a
queue that the test runs itself, as the event loop would. Nothing sleeps: the tokenizer
takes jobs in order, so when it has come to a later text, earlier ones are queued.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import io
import json
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embellama_server as es
from tests import kit


@dataclass
class Held:
    """A call that waits in the engine."""

    began: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)


class Engine(kit.FakeEngine):
    """Also shows what is tokenized when, and can be held there or be broken."""

    def __init__(self, **card: Any) -> None:
        super().__init__(**card)
        self.tokenized: list[str] = []
        self.fresh: list[bool] = []  # of each call
        self.breaks_at: str = ""  # a word that is a bug, in both rooms
        self._seen = threading.Condition()
        self._held: dict[str, threading.Event] = {}
        self.held_calls: dict[int, Held] = {}  # by a token of theirs
        self.long_context_error: Exception | None = None  # what making one raises
        # Called when a long-input context is made, when the context is ready for abort(), at the call
        self.at_moment: dict[str, Callable[[], None]] = {}
        self.stalls = threading.Semaphore(0)  # calls with "stall", which end by abort()
        self.fails_always = False
        self.contexts_made = 0
        self.hole_at: int | None = None  # of a call's rows, the one without numbers
        self.hole = np.nan

    def hold_call(self, word: str) -> Held:
        """The next call with this word will wait, but no other call."""
        return self.held_calls.setdefault(kit.fake_id(word), Held())

    def hold(self, text: str) -> threading.Event:
        """The tokenizer will wait at this text until the event is set."""
        return self._held.setdefault(text, threading.Event())

    def wait_until_tokenizing(self, text: str) -> None:
        with self._seen:
            assert self._seen.wait_for(lambda: text in self.tokenized, kit.DEADLINE_S)

    def encode(self, text: str) -> list[int]:
        with self._seen:
            self.tokenized.append(text)
            self._seen.notify_all()
        if text in self._held:
            kit.wait(self._held[text])
        if text == "untokenizable":
            raise ZeroDivisionError
        return super().encode(text)

    def new_context(
        self, *, needs_long_context: bool = False, per_token: bool = False
    ) -> kit.FakeContext:
        if needs_long_context and self.long_context_error is not None:
            raise self.long_context_error
        if needs_long_context:
            self.reach("long context")
        self.contexts_made += 1
        super().new_context(needs_long_context=needs_long_context)  # which counts it
        return Context(self, needs_long_context=needs_long_context, per_token=per_token)

    def reach(self, moment: str) -> None:
        """What is to happen at this moment, once."""
        self.at_moment.pop(moment, lambda: None)()

    def computed(self) -> collections.Counter[tuple[int, ...]]:
        """How often each input was in a call."""
        return collections.Counter(tuple(ids) for call in self.calls for ids in call)


class Context(kit.FakeContext):
    def __init__(
        self, engine: Engine, *, needs_long_context: bool, per_token: bool
    ) -> None:
        super().__init__(
            engine, needs_long_context=needs_long_context, per_token=per_token
        )
        self._mine = engine

    def _vectors(self, inputs: Sequence[Any], threads: int) -> Any:
        # In here the context is in use: a second thread would be noticed.
        if self._mine.fails_always:
            raise es.EngineError("always")
        for token in {int(token) for ids in inputs for token in ids}:
            held = self._mine.held_calls.pop(token, None)
            if held is not None:
                held.began.set()
                kit.wait(held.go)
        if any(kit.fake_id("stall") in ids for ids in inputs):
            self._mine.block()
            self._mine.stalls.release()
        rows = super()._vectors(inputs, threads)
        if self._mine.hole_at is not None:
            rows[self._mine.hole_at] = self._mine.hole
        return rows

    def rearm(self) -> None:
        super().rearm()
        self._mine.reach("rearm")

    def embed(
        self,
        inputs: Sequence[Any],
        *,
        threads: int = 1,
        fresh: bool = False,
    ) -> Any:
        self._mine.reach("call")
        vectors = super().embed(inputs, threads=threads, fresh=fresh)
        self._mine.fresh.append(fresh)
        word = self._mine.breaks_at
        if word and any(kit.fake_id(word) in ids for ids in inputs):
            raise ZeroDivisionError
        return vectors


class Desk:
    """A running pool, and the thread that it delivers to: the test's own."""

    first: es.Job  # see hold_up()

    def __init__(self, engine: kit.FakeEngine, **wanted: Any) -> None:
        self.delivered: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.finished: collections.Counter[es.Job] = collections.Counter()
        self.calls: list[es.Call] = []
        hooks = {"deliver": self.delivered.put, "on_call": self._on_call}
        self.pool = kit.pool(engine, **(hooks | wanted))

    def _on_call(self, call: es.Call) -> None:
        # Its items know the jobs' texts.
        self.calls.append(dataclasses.replace(call, items=[], computing=[]))

    def job(self, *inputs: es.Input, **wanted: Any) -> es.Job:
        """A job that counts how often it is finished."""
        job = kit.job(inputs, lambda: self.finished.update([job]), **wanted)
        return job

    def submit(self, *inputs: es.Input, **wanted: Any) -> es.Job:
        job = self.job(*inputs, **wanted)
        self.pool.queue.submit(job)
        return job

    def wait_for(self, *jobs: es.Job) -> None:
        """Run what was delivered until these jobs are finished."""
        while not all(self.finished[job] for job in jobs):
            self.delivered.get(timeout=kit.DEADLINE_S)()

    def run_until(self, is_true: Callable[[], bool]) -> None:
        """Run what was delivered until something is so."""
        while not is_true():
            self.delivered.get(timeout=kit.DEADLINE_S)()

    def result(self, *inputs: es.Input, **wanted: Any) -> es.Job:
        """Submit and wait."""
        job = self.submit(*inputs, **wanted)
        self.wait_for(job)
        return job

    def room_taken(self) -> tuple[int, int]:
        backlog = self.pool.queue.backlog
        return backlog.inputs, backlog.tokens

    def close(self) -> None:
        """Stop, run what is left, and see that nothing was lost or left behind."""
        assert self.pool.stop(kit.DEADLINE_S)
        while not self.delivered.empty():
            self.delivered.get()()
        assert max(self.finished.values(), default=1) == 1, "finished twice"


@contextlib.contextmanager
def desk(engine: kit.FakeEngine, **wanted: Any) -> Iterator[Desk]:
    """A pool at work, see kit.pool(); at the end all its threads and contexts are gone."""
    made = Desk(engine, **wanted)
    made.pool.start()
    try:
        yield made
    finally:
        engine.release()
        made.close()
        assert engine.contexts_open == 0


@contextlib.contextmanager
def busy_desk(engine: Engine, **wanted: Any) -> Iterator[Desk]:
    """A pool whose only worker computes "first", until the engine is released."""
    with desk(engine, **wanted) as at:
        hold_up(at, engine)
        yield at


def hold_up(at: Desk, engine: Engine) -> None:
    """From now on a call waits in the engine; what is submitted waits behind it."""
    engine.block()
    at.first = at.submit("first")
    engine.wait_until_computing()


def let_go(at: Desk, engine: Engine, *jobs: es.Job) -> None:
    """Release the engine once all that was submitted is tokenized; wait for jobs."""
    last = at.submit("last")
    engine.wait_until_tokenizing("last")
    engine.release()
    at.wait_for(*jobs, last)


def assert_vectors(job: es.Job) -> None:
    """It succeeded, and each input has its own vector."""
    assert job.error is None
    for text, vector in zip(job.request.inputs, job.vectors, strict=True):
        ids = [1, *map(kit.fake_id, str(text).split()), 2]
        expected = kit.fake_row(ids)
        if job.request.per_token:
            expected = [kit.fake_row([token]) for token in ids]
        np.testing.assert_array_equal(vector, expected)


# --- what a job gets ---


def test_vectors_come_in_the_order_of_the_inputs() -> None:
    with desk(Engine(), workers=3) as at:
        job = at.result(*(f"text {n}" for n in range(200)))
        assert_vectors(job)
        assert job.tokens == 200 * 4
        assert job.ended_at >= job.started_at >= job.arrived_at > 0


@pytest.mark.parametrize("words", ["a b", "nan", "boom", "w " * 99])
def test_when_a_job_is_over_nothing_keeps_its_texts(words: str) -> None:
    class Text(str):
        """One that can be referred to weakly."""

    over, gone = threading.Event(), threading.Event()
    gc.disable()  # which would come some time
    try:
        with desk(kit.FakeEngine(), workers=2, tokenization_workers=2) as at:
            text = Text(words)
            weakref.finalize(text, gone.set)
            at.pool.queue.submit(kit.job([text], over.set, allows_partial=True))
            at.run_until(over.is_set)
            del text
            assert gone.wait(kit.DEADLINE_S)
    finally:
        gc.enable()


def test_ids_are_taken_as_they_are_and_get_special_tokens_once() -> None:
    engine = Engine()
    with desk(engine) as at:
        at.result([7, 8], [1, 7, 9, 2])
    assert engine.calls == [[[1, 7, 8, 2], [1, 7, 9, 2]]]


def test_inputs_of_different_jobs_share_a_batch() -> None:
    engine = Engine()
    with busy_desk(engine) as at:
        jobs = [at.submit(f"{name} one", f"{name} two") for name in "abc"]
        let_go(at, engine, *jobs)
        for job in jobs:
            assert_vectors(job)
        words = [ids[1] for ids in engine.calls[1] if len(ids) == 4]
        assert words == [kit.fake_id(name) for name in "abcabc"]


def test_idle_workers_share_what_waits() -> None:
    engine = Engine()
    with desk(engine, workers=2) as at:
        for _ in range(2):  # again: what has run or was cancelled does not count
            engine.block()
            job = at.submit("a", "b", "c", "d")
            for _ in range(2):
                engine.wait_until_computing()
            unwanted = at.submit(*(f"unwanted {n}" for n in range(30)))
            later = at.submit("later")
            engine.wait_until_tokenizing("later")
            engine.tokenized.clear()
            at.pool.queue.cancel(unwanted)
            engine.release()
            at.wait_for(job, later)
            engine.wait_until_computing()  # that was "later"
    assert sorted(len(call) for call in engine.calls) == [1, 1, 2, 2, 2, 2]


def test_a_large_job_lets_others_pass_the_tokenizer() -> None:
    engine = Engine()
    gate = engine.hold("large 0")
    with desk(engine) as at:
        large = at.submit(*(f"large {n}" for n in range(100)))
        engine.wait_until_tokenizing("large 0")
        small = at.submit("small")
        gate.set()
        at.wait_for(large, small)
    assert engine.tokenized.index("small") < engine.tokenized.index("large 99")


def test_a_job_tokenized_in_parts_takes_one_turn_at_a_time() -> None:
    engine = Engine(context_tokens=1000, batch_inputs=1000)
    with busy_desk(engine, batch_tokens=1000) as at:
        texts = [f"large {n}" for n in range(64)]
        large, small = at.submit(*texts), at.submit("one", "two")
        for later in ("later", "last"):  # when it comes to "last", all parts are there
            at.submit(later)
            engine.wait_until_tokenizing(later)
        engine.release()
        at.wait_for(large, small)
    words = [ids[1] for ids in engine.calls[1]]
    before = words[: words.index(kit.fake_id("two"))]
    assert before.count(kit.fake_id("large")) == 2


def test_all_workers_compute_at_once() -> None:
    engine = Engine(batch_inputs=1)
    engine.block()
    with desk(engine, workers=3) as at:
        job = at.submit("a", "b", "c")
        for _ in range(3):
            engine.wait_until_computing()
        assert at.pool.queue.busy == 3
        engine.release()
        at.wait_for(job)
        assert at.pool.queue.busy == 0


def test_work_that_comes_one_by_one_stays_with_the_first_worker() -> None:
    # Its caches are warm, and it alone has a team of OpenMP threads.
    engine = kit.FakeEngine()
    with desk(engine, workers=4) as pool:
        for number in range(20):
            pool.result(f"text {number}")
    assert set(engine.callers) == {"worker-0"}
    assert max(engine.threads) == 4


def test_a_job_may_use_the_pool_when_it_is_finished() -> None:
    # Nothing is delivered under the lock: this would hang. Delivered at once here,
    # on the thread that ended the job: worker, tokenizer, caller of abandon_all().
    engine = Engine()
    seen: queue.SimpleQueue[int] = queue.SimpleQueue()
    with desk(engine, deliver=lambda call: call()) as at:

        def submit(text: str) -> None:
            job = kit.job([text], lambda: seen.put(at.pool.queue.backlog.inputs))
            at.pool.queue.submit(job)

        for text in ("a", "word " * 50):
            submit(text)
            assert seen.get(timeout=kit.DEADLINE_S) == 0
        engine.wait_until_computing()  # that was "a"; the other never came so far
        engine.block()
        submit("a")
        engine.wait_until_computing()
        at.pool.queue.abandon_all(es.NotReady("bye"))
        assert seen.get(timeout=kit.DEADLINE_S) == 0


# --- the queue's room ---


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    engine = Engine()
    engine.block()
    with desk(engine, limit=es.Size(2, 10**6, 1 << 40)) as at:
        job = at.submit("a", "b")
        refused = at.job("c")
        with pytest.raises(es.Overloaded, match="2 of 2 inputs") as caught:
            at.pool.queue.submit(refused)
        assert caught.value.retry_after_s == pytest.approx(1, rel=0.2501)
        engine.release()
        at.wait_for(job)
        assert_vectors(at.result("c"))
    assert at.finished[refused] == 0


def test_room_is_reserved_at_most_and_corrected_by_the_tokenizer() -> None:
    engine = Engine()
    engine.block()
    with desk(engine) as at:
        gate = engine.hold("long words")
        at.submit("long words", "more")
        # Two special tokens each, and the space SentencePiece would add.
        assert at.room_taken() == (2, len("long words") + len("more") + 2 * 3)
        gate.set()
        engine.wait_until_computing()
        assert at.room_taken() == (2, 4 + 3)


@pytest.mark.parametrize(
    "text",
    ["fine", kit.NAN_WORD, kit.BOOM_WORD, "word " * 50, "untokenizable"],
    ids=["success", "nan", "engine error", "too long", "bug"],
)
def test_all_room_is_free_after(text: str) -> None:
    with desk(Engine()) as at:
        at.result("before", text, "after")
        assert at.room_taken() == (0, 0)


# --- cancel ---


def test_a_job_cancelled_before_tokenizing_is_never_tokenized() -> None:
    engine = Engine()
    gate = engine.hold("first")
    with desk(engine) as at:
        at.submit("first")
        engine.wait_until_tokenizing("first")
        before = at.room_taken()
        job = at.submit("unwanted")
        at.pool.queue.cancel(job)
        assert at.room_taken() == before
        gate.set()
        at.result("last")
    assert "unwanted" not in engine.tokenized
    assert at.finished[job] == 0


def test_a_job_cancelled_while_being_tokenized_is_never_computed() -> None:
    engine = Engine()
    gate = engine.hold("unwanted")
    with desk(engine) as at:
        job = at.submit("unwanted", "either")
        engine.wait_until_tokenizing("unwanted")
        at.pool.queue.cancel(job)
        assert at.room_taken() == (0, 0)
        gate.set()
        at.result("last")
        assert at.room_taken() == (0, 0)
    assert engine.calls == [[[1, kit.fake_id("last"), 2]]]
    assert at.finished[job] == 0


def test_a_job_cancelled_while_waiting_is_never_computed() -> None:
    engine = Engine()
    with busy_desk(engine) as at:
        job = at.submit("unwanted", "either")
        last = at.submit("last")
        engine.wait_until_tokenizing("last")
        at.pool.queue.cancel(job)
        engine.release()
        at.wait_for(last)
        assert at.room_taken() == (0, 0)
        # What waited and left is forgotten: else batches would be smaller from now on.
        at.result("a", "b", "c")
    words = [[ids[1] for ids in call] for call in engine.calls]
    expected = [["first"], ["last"], ["a", "b", "c"]]
    assert words == [[kit.fake_id(word) for word in call] for call in expected]
    assert at.finished[job] == 0


def test_a_job_cancelled_while_computing_leaves_only_the_tokens_that_run() -> None:
    engine = Engine()
    engine.block()
    with desk(engine) as at:
        job = at.submit("unwanted")
        engine.wait_until_computing()
        at.pool.queue.cancel(job)
        at.pool.queue.cancel(job)  # again: nothing is given back twice
        assert at.room_taken() == (0, 3)
        engine.release()
        at.result("last")
        assert at.room_taken() == (0, 0)
    assert at.finished[job] == 0


# --- what fails ---


@pytest.mark.parametrize("word", [kit.NAN_WORD, kit.BOOM_WORD])
def test_an_input_that_fails_once_is_recovered_on_wiped_memory(word: str) -> None:
    engine = Engine()
    engine.failures[kit.fake_id(word)] = 1
    with desk(engine) as at:
        assert_vectors(at.result("good", word, "fine"))
        assert at.calls[0].refused == 0
        assert at.calls[0].recovered == (1 if word == kit.NAN_WORD else 3)
    assert engine.fresh[-1], "retried alone, with fresh=True"
    assert engine.fresh.count(False) == (1 if word == kit.NAN_WORD else 0)


@pytest.mark.parametrize(
    ("word", "error"),
    [(kit.NAN_WORD, es.NonFiniteVector), (kit.BOOM_WORD, es.EngineFailed)],
)
def test_an_input_that_fails_twice_fails_its_job_and_no_other(
    word: str, error: type[es.ApiError]
) -> None:
    engine = Engine()
    with busy_desk(engine) as at:
        bad, neighbour = at.submit("good", word), at.submit("fine", "too")
        let_go(at, engine, bad, neighbour)
        assert_vectors(neighbour)
        assert isinstance(bad.error, error)
        assert (bad.error.param, "input[1]" in bad.error.message) == ("input[1]", True)
    words = {ids[1] for ids in engine.calls[1]}
    assert words >= {kit.fake_id(text) for text in ("good", word, "fine", "too")}
    retried = 1 if word == kit.NAN_WORD else len(engine.calls[1])
    assert sum(call.refused for call in at.calls) == 1
    assert sum(call.recovered for call in at.calls) == retried - 1


def test_a_bug_in_the_engine_fails_the_job_not_the_worker() -> None:
    engine = Engine()
    engine.breaks_at = "bug"
    log = io.StringIO()
    with desk(engine, log=es.Log("error", "text", log)) as at:
        job = at.result("fine", "bug")
        assert isinstance(job.error, es.EngineFailed)
        assert_vectors(at.result("and on"))
    assert "ZeroDivisionError" in log.getvalue(), "nobody could find it"


def test_a_bug_in_the_tokenizer_fails_the_job_not_the_thread() -> None:
    with desk(Engine()) as at:
        assert isinstance(at.result("untokenizable").error, ZeroDivisionError)
        assert_vectors(at.result("and on"))


def test_an_input_that_is_too_long_is_refused_by_name_and_numbers() -> None:
    with desk(Engine()) as at:
        error = at.result("good", "word " * 31).error
        assert isinstance(error, es.ContextLengthExceeded)
        assert error.param == "input[1]"
        assert "input[1] has 33 tokens" in error.message
        assert "at most 32" in error.message
        assert_vectors(at.result("word " * 30))


def test_a_text_the_tokenizer_must_not_see_is_refused_unseen() -> None:
    engine = Engine(max_chars=20)
    with desk(engine) as at:
        error = at.result("x" * 21).error
        assert isinstance(error, es.ContextLengthExceeded)
        assert "21 characters" in error.message
        assert_vectors(at.result("x" * 20))
    assert engine.tokenized == ["x" * 20]


def test_a_truncated_input_keeps_the_final_special_token() -> None:
    engine = Engine(max_chars=1000)
    with desk(engine) as at:
        job = at.result("word " * 31, "short", "x " * 5000, truncates=True)
        assert (job.error, job.truncated, job.tokens) == (None, 2, 32 + 3 + 32)
    words = {len(ids): ids for call in engine.calls for ids in call}
    assert max(map(len, engine.tokenized)) == 1000, "it must see no more"
    assert words[32][0] == 1
    assert words[32][-1] == 2


# --- equal inputs ---


def key(text: str) -> tuple[int, ...]:
    """The ids of a text, as they are in a call."""
    return (1, *map(kit.fake_id, text.split()), 2)


def test_equal_inputs_of_a_job_are_one_computation() -> None:
    engine = Engine()
    with desk(engine) as at:
        job = at.result("same", "other", "same", [kit.fake_id("same")], "same")
        assert job.tokens == 5 * 3, "all are counted: it is what the client sent"
        counts = at.pool.queue.cache.counts
        assert (counts.misses, counts.shared, counts.hits) == (2, 3, 0)
        assert at.room_taken() == (0, 0)
    assert set(engine.computed().values()) == {1}
    assert len(job.vectors) == 5
    for index, text in enumerate(["same", "other", "same", "same", "same"]):
        np.testing.assert_array_equal(job.vectors[index], kit.fake_row(key(text)))


def test_equal_inputs_in_different_slices_of_a_job_are_one_computation() -> None:
    # It is tokenized 32 inputs at a time: "last" is alone in its slice.
    engine = Engine()
    engine.block()
    with desk(engine) as at:
        job = at.submit(*["same", "other"] * 32, "last")
        engine.wait_until_tokenizing("last")
        engine.release()
        at.wait_for(job)
        assert_vectors(job)
    assert dict(engine.computed()) == {key(t): 1 for t in ("same", "other", "last")}


def test_equal_inputs_take_an_inputs_room_each_and_the_tokens_of_one() -> None:
    engine = Engine()
    with busy_desk(engine) as at:
        at.submit("same", "same", "same")
        gate = engine.hold("later")
        at.submit("later")
        engine.wait_until_tokenizing("later")
        assert at.room_taken() == (1 + 3 + 1, 3 + 3 + len("later") + 3)
        gate.set()
        engine.release()


@pytest.mark.parametrize("is_running", [True, False], ids=["running", "waiting"])
def test_jobs_share_the_computation_of_an_equal_input(is_running: bool) -> None:
    engine = Engine()
    engine.block()
    with desk(engine) as at:
        if not is_running:
            at.submit("before")
        jobs = [at.submit("same", "mine")]
        engine.wait_until_computing()
        jobs += [at.submit("same", "yours"), at.submit("same", "same")]
        let_go(at, engine, *jobs)
        for job in jobs:
            assert_vectors(job)
            assert job.ended_at >= job.started_at >= job.arrived_at
        assert at.room_taken() == (0, 0)
    assert set(engine.computed().values()) == {1}


def test_without_a_cache_what_has_been_computed_is_computed_again() -> None:
    engine = Engine()
    with desk(engine, cache_bytes=0) as at:
        for _ in range(2):
            assert_vectors(at.result("same"))
    assert engine.computed()[key("same")] == 2


def test_what_is_in_the_cache_is_answered_without_a_call() -> None:
    engine = Engine()
    with desk(engine, cache_bytes=10_000) as at:
        first = at.result("known")
        engine.block()  # nothing can be computed
        job = at.result("known", "known")
        assert_vectors(job)
        assert (job.tokens, job.truncated) == (6, 0)
        assert job.ended_at >= job.started_at >= job.arrived_at > first.arrived_at
        assert at.room_taken() == (0, 0)
        counts = at.pool.queue.cache.counts
        assert (counts.entries, counts.hits, counts.misses) == (1, 2, 1)
    assert len(engine.calls) == 1


def test_a_job_half_of_which_is_in_the_cache_computes_the_rest() -> None:
    engine = Engine()
    with desk(engine, cache_bytes=10_000) as at:
        at.result("a", "b")
        assert_vectors(at.result("c", "a", "d", "b"))
        assert at.room_taken() == (0, 0)
    assert dict(engine.computed()) == {key(text): 1 for text in "abcd"}


def test_a_vector_that_replies_share_cannot_be_written() -> None:
    with desk(Engine(), cache_bytes=10_000) as at:
        for _ in range(2):
            (vector,) = at.result("same").vectors
            with pytest.raises(ValueError, match="read-only"):
                vector[0] = 0


def test_a_cleared_cache_computes_again_and_says_what_there_was() -> None:
    engine = Engine()
    with desk(engine, cache_bytes=10_000) as at:
        at.result("a", "b")
        at.result("a")
        before = at.pool.queue.clear_cache()
        assert (before.entries, before.hits) == (2, 1)
        assert before.bytes > 0
        after = at.pool.queue.cache.counts
        assert (after.entries, after.bytes, after.hits) == (0, 0, 1)
        assert_vectors(at.result("a"))
    assert engine.computed()[key("a")] == 2


@pytest.mark.parametrize("word", [kit.NAN_WORD, kit.BOOM_WORD])
def test_what_fails_is_not_in_the_cache(word: str) -> None:
    engine = Engine()
    engine.failures[kit.fake_id(word)] = 2  # in its batch, and alone
    with desk(engine, cache_bytes=10_000) as at:
        assert at.result(word).error is not None
        assert_vectors(at.result(word))


@pytest.mark.parametrize(
    ("word", "error"),
    [(kit.NAN_WORD, es.NonFiniteVector), (kit.BOOM_WORD, es.EngineFailed)],
)
def test_each_owner_of_what_fails_is_told_the_number_of_its_own_input(
    word: str, error: type[es.ApiError]
) -> None:
    engine = Engine()
    with busy_desk(engine) as at:
        jobs = {
            "input[1]": at.submit("good", word),
            "input[0]": at.submit(word, "fine", word),
            "input[2]": at.submit("good", "fine", word),
        }
        neighbour = at.submit("good", "fine")
        let_go(at, engine, neighbour, *jobs.values())
        assert_vectors(neighbour)
        for where, job in jobs.items():
            assert isinstance(job.error, error)
            assert (job.error.param, where in job.error.message) == (where, True)
        assert_vectors(at.result("and on"))
        assert at.room_taken() == (0, 0)
    assert engine.computed()[key(word)] == 2, "in its batch, and once alone"


@pytest.mark.parametrize("leaving", [0, 1, 2], ids=["leader", "second", "third"])
def test_an_input_whose_owner_leaves_is_computed_once_for_the_others(
    leaving: int,
) -> None:
    engine = Engine()
    with busy_desk(engine) as at:
        names = ["x", "y", "z"]
        jobs = [at.submit("shared", f"only {name}", "shared") for name in names]
        last = at.submit("last")
        engine.wait_until_tokenizing("last")
        at.pool.queue.cancel(jobs[leaving])
        engine.release()
        left = [job for job in jobs if job is not jobs[leaving]]
        at.wait_for(last, *left)
        for job in left:
            assert_vectors(job)
        assert at.room_taken() == (0, 0)
    assert at.finished[jobs[leaving]] == 0
    computed = engine.computed()
    assert computed[key("shared")] == 1
    assert [computed[key(f"only {name}")] for name in names] == [
        int(n != leaving) for n in range(3)
    ]


def test_the_second_owner_computes_even_when_it_had_nothing_of_its_own() -> None:
    # It was not in the line at all.
    engine = Engine()
    with desk(engine, workers=2) as at:
        held = engine.hold_call("busy"), engine.hold_call("busier")
        at.submit("busy")
        kit.wait(held[0].began)
        at.submit("busier")
        kit.wait(held[1].began)
        leader, second = at.submit("shared"), at.submit("shared")
        gate = engine.hold("later")
        at.submit("later")
        engine.wait_until_tokenizing("later")
        at.pool.queue.cancel(leader)
        held[0].go.set()
        at.wait_for(second)
        assert_vectors(second)
        gate.set()
        held[1].go.set()
    assert engine.computed()[key("shared")] == 1


def test_an_input_that_all_its_owners_left_is_never_computed() -> None:
    engine = Engine()
    with busy_desk(engine) as at:
        jobs = [at.submit("shared", "more"), at.submit("shared")]
        last = at.submit("last")
        engine.wait_until_tokenizing("last")
        for job in jobs:
            at.pool.queue.cancel(job)
        engine.release()
        at.wait_for(last)
        assert at.room_taken() == (0, 0)
        assert not engine.computed()[key("shared")]
        assert_vectors(at.result("shared"))
    assert not any(at.finished[job] for job in jobs)


def test_what_nobody_waits_for_any_more_is_aborted_and_costs_no_more() -> None:
    engine = Engine()
    engine.block()
    with desk(engine, cache_bytes=10_000) as at:
        jobs = [at.submit("same"), at.submit("same")]
        engine.wait_until_computing()
        last = at.submit("last")
        engine.wait_until_tokenizing("last")
        for job in jobs:
            assert engine.aborts == 0, "somebody still waits"
            at.pool.queue.cancel(job)
        assert engine.aborts == 1
        engine.wait_until_computing()  # the next call: the first one has ended
        engine.release()
        at.wait_for(last)
        assert [r.is_aborted for r in at.calls] == [True, False]
        assert at.calls[0].refused == at.calls[0].computed == 0
    assert engine.computed()[key("same")] == 0


@pytest.mark.parametrize("moment", ["long context", "rearm", "call"])
def test_a_job_cancelled_just_before_its_call_is_not_computed(moment: str) -> None:
    engine = long_engine()
    with desk(engine) as at:
        job = at.job(LONG[0])
        engine.at_moment[moment] = lambda: at.pool.queue.cancel(job)
        at.pool.queue.submit(job)
        at.run_until(lambda: bool(at.calls))
        assert at.calls[0].is_aborted
        assert not engine.computed()[key(LONG[0])]
        assert at.room_taken() == (0, 0)
        assert_vectors(at.result(LONG[0]))
    assert not at.finished[job]


def test_what_nobody_waits_for_is_never_cached_without_its_numbers() -> None:
    # An abort that comes too late, as on a device that does not know it.
    engine = Engine()
    engine.is_deaf = True
    engine.failures[kit.fake_id(kit.NAN_WORD)] = 1
    engine.block()
    with desk(engine, cache_bytes=10_000) as at:
        unwanted = at.submit(kit.NAN_WORD, "good")
        engine.wait_until_computing()
        at.pool.queue.cancel(unwanted)
        engine.release()
        for text in (kit.NAN_WORD, "good"):
            assert_vectors(at.result(text))
        assert at.pool.queue.cache.counts.hits == 1, "what was computed is of use"
        assert sum(call.refused for call in at.calls) == 0


def test_a_call_with_one_owner_left_is_not_aborted() -> None:
    engine = Engine()
    with busy_desk(engine) as at:
        jobs = [at.submit("a"), at.submit("b")]
        at.submit("last")
        engine.wait_until_tokenizing("last")
        engine.release()
        at.wait_for(at.first)
        at.pool.queue.cancel(jobs[0])
        at.wait_for(jobs[1])
        assert_vectors(jobs[1])
    assert engine.aborts == 0


def test_a_new_job_does_not_join_a_call_that_is_being_aborted() -> None:
    engine = Engine()
    engine.is_deaf = True  # it does not end at once
    engine.block()
    with desk(engine) as at:
        unwanted = at.submit("same")
        engine.wait_until_computing()
        at.pool.queue.cancel(unwanted)
        job, last = at.submit("same"), at.submit("last")
        engine.wait_until_tokenizing("last")
        engine.release()
        at.wait_for(job, last)
        assert_vectors(job)
    assert engine.computed()[key("same")] == 2


def test_a_new_job_does_not_join_an_input_that_failed_and_is_not_tried_again() -> None:
    engine = Engine()
    engine.failures[kit.fake_id(kit.BOOM_WORD)] = 1
    late: list[es.Job] = []

    def leave() -> None:  # during the call that fails
        at.pool.queue.cancel(left)
        engine.at_moment["rearm"] = come

    def come() -> None:  # when the neighbour is tried alone
        late.append(at.submit("same"))
        at.submit("later")
        engine.wait_until_tokenizing("later")

    with busy_desk(engine) as at:
        left, stays = at.submit("same"), at.submit(kit.BOOM_WORD)
        engine.at_moment["call"] = leave
        let_go(at, engine, stays)
        at.wait_for(*late)
        assert_vectors(stays)
        assert_vectors(late[0])
        assert at.room_taken() == (0, 0)


# --- calls that fail, and calls that do not end ---


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_worker_whose_call_raised_goes_on_with_a_new_context() -> None:
    engine = Engine()
    with desk(engine) as at:
        engine.breaks_at = "bug"
        bad = at.result("bug")
        assert isinstance(bad.error, es.EngineFailed)
        assert_vectors(at.result("good"))
        assert engine.contexts_made == 1 + 2, "after the call, and after the retry"
        assert engine.contexts_open == 1


def test_one_bad_input_leaves_the_others_of_a_partial_job() -> None:
    engine = Engine()
    with desk(engine) as at:
        job = at.job("good", kit.NAN_WORD, "w " * 100, "fine", kit.BOOM_WORD)
        job.request.allows_partial = True
        at.pool.queue.submit(job)
        at.wait_for(job)
        assert job.error is None
        found = {index: type(error) for index, error in job.errors.items()}
        assert found == {
            1: es.NonFiniteVector,
            2: es.ContextLengthExceeded,
            4: es.EngineFailed,
        }
        assert [v is not None for v in job.vectors] == [True, False, False, True, False]
        assert at.room_taken() == (0, 0)


def test_the_breaker_opens_when_a_canary_fails_too_and_closes_when_one_works() -> None:
    engine = Engine()
    with desk(engine) as at:
        engine.fails_always = True
        for n in range(es.Breaker.SUSPICIOUS_FAILURES):
            at.pool.watch()
            assert not at.pool.queue.breaker.is_open, "no verdict yet"
            at.result(f"w{n}")
        at.pool.watch()
        at.run_until(lambda: at.pool.queue.breaker.is_open)
        with pytest.raises(es.EngineUnavailable):
            at.submit("refused at once")
        engine.fails_always = False
        clock = at.pool.queue.clock = Clock()
        clock.now = 10**9  # the retry is due
        at.pool.watch()
        at.run_until(lambda: not at.pool.queue.breaker.is_open)
        assert_vectors(at.result("works again"))


def test_one_client_s_poison_does_not_open_the_breaker() -> None:
    with desk(Engine()) as at:
        for _ in range(3 * es.Breaker.SUSPICIOUS_FAILURES):
            assert isinstance(at.result(kit.BOOM_WORD).error, es.EngineFailed)
            at.pool.watch()
        assert_vectors(at.result("good"))
        assert not at.pool.queue.breaker.is_open


def test_a_call_that_takes_far_too_long_is_ended_and_its_input_refused() -> None:
    engine = Engine()
    with desk(engine) as at:
        at.result("first")
        engine.wait_until_computing()  # that one
        engine.block()
        job = at.submit("hangs")
        engine.wait_until_computing()
        clock = at.pool.queue.clock = Clock()
        clock.now = time.monotonic() + at.pool.settings.stuck_after_s + 1.0
        assert at.pool.watch() == [], "aborted, not stuck yet"
        at.wait_for(job)
        assert isinstance(job.error, es.EngineFailed)
        engine.release()
        at.pool.queue.clock = time.monotonic
        assert_vectors(at.result("good"))


def test_the_neighbours_of_an_input_that_takes_far_too_long_are_computed() -> None:
    engine = Engine()
    log = es.Log("error", "text", io.StringIO())
    with desk(engine, log=log) as at:
        engine.block()
        at.submit("first")
        engine.wait_until_computing()
        jobs = [at.submit(text) for text in ("a", "stall", "b", "unwanted")]
        later = at.submit("later")
        engine.wait_until_tokenizing("later")
        clock = at.pool.queue.clock = Clock()
        clock.now = time.monotonic()
        engine.release()
        for n in range(2):  # in the call of all, and alone
            assert engine.stalls.acquire(timeout=kit.DEADLINE_S)
            if n == 0:
                at.pool.queue.cancel(jobs.pop())
            clock.now += at.pool.settings.stuck_after_s + 1.0
            assert at.pool.watch() == [], "aborted, not stuck yet"
            engine.release()
        at.wait_for(later, *jobs)
        assert isinstance(jobs[1].error, es.EngineFailed)
        for job in (jobs[0], jobs[2], later):
            assert_vectors(job)
        assert at.room_taken() == (0, 0)
        assert [(r.recovered, r.refused) for r in at.calls] == [(0, 0), (3, 1)]
    assert not engine.computed()[key("unwanted")]


def test_before_the_first_was_measured_a_call_may_take_a_second_a_token() -> None:
    engine = Engine()
    with desk(engine, stuck_after_s=10.0) as at:
        engine.block()
        long = at.pool.queue.card.max_input_tokens  # seconds, if each token takes one
        job = at.submit(" ".join(["word"] * (long - 2)))
        engine.wait_until_computing()
        begun = time.monotonic()
        clock = at.pool.queue.clock = Clock()
        clock.now = begun + long - 1.0
        assert at.pool.watch() == []
        assert engine.aborts == 0
        clock.now = begun + long + 1.0
        assert at.pool.watch() == [], "aborted, not stuck yet"
        assert engine.aborts == 1
        at.wait_for(job)
        assert isinstance(job.error, es.EngineFailed)
        engine.release()


def test_a_call_that_does_not_end_is_stuck_and_its_jobs_are_answered() -> None:
    engine = Engine()
    engine.is_deaf = True
    with desk(engine, workers=2) as at:
        engine.block()
        job = at.submit("hangs")
        engine.wait_until_computing()
        clock = at.pool.queue.clock = Clock()
        clock.now = 10**9
        stuck = at.pool.watch()
        assert len(stuck) == 1
        assert isinstance(job.error, es.EngineUnavailable)
        assert at.finished[job] == 1
        assert at.pool.queue.stuck == 1
        assert at.pool.watch() == [], "said once"
        assert at.room_taken() == (0, 3), "the call's tokens are still being computed"
        engine.release()


def test_what_could_not_be_done_in_time_is_refused_at_once() -> None:
    engine = Engine()
    with desk(engine) as at:
        at.result("measured")  # a speed is known
        engine.block()
        at.submit("running")
        engine.wait_until_computing()
        large = [at.submit(*(f"{n} {m}" for m in range(50))) for n in range(4)]
        hurried = at.job("one", *(f"x{n}" for n in range(49)))
        hurried.timeout_s = 1e-9
        with pytest.raises(es.Overloaded):
            at.pool.queue.submit(hurried)
        patient = at.job("two")
        patient.timeout_s = 3600.0
        at.pool.queue.submit(patient)
        engine.release()
        at.wait_for(patient, *large)


def test_what_is_only_bounds_is_no_reason_to_refuse() -> None:
    # A text of 10,000 letters may be as many tokens, and is a quarter of them or fewer.
    engine = Engine(max_input_tokens=20_000)
    with desk(engine, limit=es.Size(10**4, 10**9, 1 << 40)) as at:
        at.result("measured")
        queue = at.pool.queue
        queue.backlog.throughput.tokens_per_s = 1000.0
        engine.block()
        at.submit("running")
        engine.wait_until_computing()
        engine.hold("held")
        at.submit("held", *["x" * 10_000] * 20)
        for timeout_s, fits in ((120.0, True), (80.0, False)):
            job = at.job("x" * 10_000, *"abcdefghijklmnopqrst", timeout_s=timeout_s)
            with contextlib.nullcontext() if fits else pytest.raises(es.Overloaded):
                queue.submit(job)
        engine.hold("held").set()
        engine.release()


def test_an_urgent_line_is_not_behind_the_import_that_has_it_too() -> None:
    engine = Engine(batch_inputs=1)
    with busy_desk(engine) as at:
        texts = [f"import {n}" for n in range(40)]
        import_ = at.submit(*texts, client="import", priority=2)
        others = [
            at.submit(texts[30], client="urgent", priority=0),
            at.submit(texts[29], texts[28], client="fair", priority=2),
            at.submit(texts[27], client="leaves", priority=0),
        ]
        later = at.submit("later", priority=0)
        engine.wait_until_tokenizing("later")
        at.pool.queue.cancel(others.pop())
        engine.release()
        at.wait_for(import_, later, *others)
        for job in (import_, later, *others):
            assert_vectors(job)
    order = [ids[0][2] for ids in engine.calls if len(ids[0]) == 4]
    place = {n: order.index(kit.fake_id(str(n))) for n in (30, 29, 28, 27)}
    assert place[30] <= 1, "before what is less urgent"
    assert max(place[29], place[28]) <= 5, "clients in turn"
    assert place[27] >= 20, "where it was, now that the urgent one has left"
    assert set(engine.computed().values()) == {1}
    assert at.room_taken() == (0, 0)


def test_dead_letters_hold_what_was_refused_after_its_retry(tmp_path: Path) -> None:
    letters = es.LineFile(str(tmp_path / "dead"), kit.quiet_log(), max_bytes=300)
    with desk(Engine(), dead_letters=letters) as at:
        at.result("good", "fine")
        for _ in range(5):
            at.result(f"poison {kit.BOOM_WORD}")
    lines = [json.loads(x) for x in (tmp_path / "dead").read_text().splitlines()]
    assert 1 <= len(lines) < 5, "bounded"
    assert lines[0]["code"] == "engine_failed"
    assert lines[0]["input"] == f"poison {kit.BOOM_WORD}"
    assert letters.lost == 5 - len(lines)
    assert (tmp_path / "dead").stat().st_mode & 0o777 == 0o600


# --- long inputs: the long-input context ---

LONG = [f"long {n} " + "word " * 100 for n in range(4)]  # above a context of 64


def long_engine() -> Engine:
    """Reads far more than a worker's own context holds."""
    return Engine(max_input_tokens=200, context_tokens=64)


def test_long_inputs_go_through_one_long_context_made_when_the_first_one_comes() -> (
    None
):
    engine = long_engine()
    with desk(engine, workers=3) as at:
        assert_vectors(at.result("short", "word " * 62))
        assert (engine.long_contexts_made, engine.contexts_open) == (0, 3)
        # That the long-input context is never used twice at once is seen to by FakeContext.
        assert_vectors(at.result(*LONG, "short", "and another"))
        assert_vectors(at.result(LONG[0]))
        assert (engine.long_contexts_made, engine.contexts_open) == (1, 4)
        assert at.room_taken() == (0, 0)
    assert engine.contexts_open == 0
    assert [len(call) for call in engine.calls if len(call[0]) > 64] == [1] * 5


def test_short_inputs_go_on_while_the_long_context_computes() -> None:
    engine = long_engine()
    with desk(engine, workers=2) as at:
        held = engine.hold_call("0")
        first = at.submit(LONG[0])
        kit.wait(held.began)
        second = at.submit(LONG[1], "mine")
        for text in ("a", "b", "word " * 62):
            assert_vectors(at.result(text))
        assert not at.finished[first] + at.finished[second]
        held.go.set()
        at.wait_for(first, second)
        assert_vectors(first)
        assert_vectors(second)
    assert engine.long_contexts_made == 1


def test_a_long_input_that_waited_for_the_long_context_is_not_forgotten() -> None:
    # Both workers sleep or compute when it comes, and nothing comes after it.
    engine = long_engine()
    with desk(engine, workers=2) as at:
        held = engine.hold_call("0")
        first = at.submit(LONG[0])
        kit.wait(held.began)
        second = at.submit(LONG[1])
        other = engine.hold_call("other")
        busy = at.submit("other")
        kit.wait(other.began)
        held.go.set()
        at.wait_for(first, second)
        other.go.set()
        at.wait_for(busy)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (es.StartupError("no room"), es.OutOfMemory),
        (es.NoMemory("no"), es.OutOfMemory),
        (MemoryError(), es.OutOfMemory),
        (es.EngineError("no"), es.EngineFailed),
    ],
    ids=repr,
)
def test_a_long_context_that_cannot_be_made_fails_long_inputs_and_nothing_else(
    error: Exception, said: type[es.ApiError]
) -> None:
    engine = long_engine()
    engine.long_context_error = error
    with desk(engine, workers=2) as at:
        bad = [at.submit("good", LONG[0]), at.submit(LONG[0]), at.submit(LONG[1])]
        good = at.submit("short", "too")
        at.wait_for(good, *bad)
        assert_vectors(good)
        wheres = ["input[1]", "input[0]", "input[0]"]
        for job, where in zip(bad, wheres, strict=True):
            assert type(job.error) is said
            assert job.error.param == where
            assert bool(job.error.retry_after_s) == said.is_transient
        assert at.room_taken() == (0, 0)
        engine.long_context_error = None  # somebody else freed memory
        assert_vectors(at.result(LONG[0]))
    assert engine.long_contexts_made == 1


def test_a_long_input_that_fails_once_is_recovered_in_the_long_context() -> None:
    engine = long_engine()
    engine.failures[kit.fake_id(kit.NAN_WORD)] = 1
    with desk(engine, workers=2) as at:
        assert_vectors(at.result(f"{kit.NAN_WORD} " + LONG[0]))
        assert_vectors(at.result(LONG[1]))
    assert engine.fresh == [False, True, False]
    assert engine.long_contexts_made == 1


def test_the_long_context_is_freed_once_no_input_has_needed_it_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, now = long_engine(), [0.0]
    freed, go_on = threading.Event(), threading.Event()

    def trim() -> None:
        freed.set()
        kit.wait(go_on)

    monkeypatch.setattr(es, "trim_memory", trim)
    with desk(engine, workers=2) as at:
        at.pool.queue.clock = lambda: now[0]
        assert_vectors(at.result(LONG[0]))
        now[0] = es.LONG_IDLE_S - 1
        at.pool.watch()
        assert_vectors(at.result("short"))
        assert engine.contexts_open == 3
        now[0] += 1
        at.pool.watch()
        kit.wait(freed)
        assert engine.contexts_open == 2
        waiting = at.submit(LONG[1])
        assert_vectors(at.result("another"))
        assert not at.finished[waiting]
        go_on.set()
        at.wait_for(waiting)
        assert_vectors(waiting)
        assert (engine.long_contexts_made, engine.contexts_open) == (2, 3)
    assert engine.contexts_open == 0


def test_the_long_context_stays_while_an_input_needs_it() -> None:
    engine, now = long_engine(), [0.0]
    with desk(engine, workers=2) as at:
        at.pool.queue.clock = lambda: now[0]
        assert_vectors(at.result(LONG[0]))
        held = engine.hold_call("1")
        job = at.submit(LONG[1])
        kit.wait(held.began)
        now[0] += es.LONG_IDLE_S
        at.pool.watch()
        assert_vectors(at.result("short"))
        held.go.set()
        at.wait_for(job)
        assert_vectors(job)
        assert (engine.long_contexts_made, engine.contexts_open) == (1, 3)


def test_the_long_context_is_closed_at_the_end_even_if_the_first_stop_came_too_early() -> (
    None
):
    engine = long_engine()
    with desk(engine) as at:
        held = engine.hold_call("0")
        job = at.submit(LONG[0])
        kit.wait(held.began)
        assert not at.pool.stop(timeout_s=0)
        assert engine.contexts_open == 2, "it is in use"
        held.go.set()
        assert at.pool.stop(kit.DEADLINE_S)
        assert engine.contexts_open == 0
        at.wait_for(job)
        assert_vectors(job)


# --- threads of a call ---


def test_a_lone_call_uses_the_cores_of_workers_that_sleep() -> None:
    engine = Engine()
    with desk(engine, workers=3) as at:
        for n in range(12):
            at.result(f"text {n}")
        stretched = [threads > 1 for threads in engine.threads]
        assert [call.is_stretched for call in at.calls] == stretched
    assert engine.threads[:2] == [1, 3], "the first may be the first of many"
    assert set(engine.threads) == {1, 3}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"workers": 3, "elastic": False}, id="not elastic"),
        pytest.param({"workers": 1}, id="no other worker"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_lone_call_uses_its_own_threads(
    options: dict[str, Any], threads: int
) -> None:
    engine = Engine()
    with desk(engine, threads=threads, **options) as at:
        for n in range(12):
            at.result(f"text {n}")
        assert not any(call.is_stretched for call in at.calls)
    assert engine.threads == [threads] * 12


def test_a_call_while_others_wait_uses_its_own_threads() -> None:
    engine = Engine(batch_inputs=1)
    with desk(engine, workers=2) as at:
        for n in range(4):
            at.result(f"text {n}")
        began = len(engine.threads)
        engine.block()
        job = at.submit(*(f"many {n}" for n in range(20)))
        engine.wait_until_computing()
        let_go(at, engine, job)
    assert set(engine.threads[began:]) == {1}


# --- the end ---


def test_abandoned_jobs_end_once_wherever_they_are() -> None:
    engine = Engine()
    engine.block()
    gate = engine.hold("untokenizable")
    with desk(engine) as at:
        jobs = [at.submit("computing")]
        engine.wait_until_computing()
        jobs += [
            at.submit("waiting"),
            at.submit("untokenizable"),
            at.submit("untouched"),
        ]
        engine.wait_until_tokenizing("untokenizable")
        error = es.NotReady("bye")
        assert at.pool.queue.abandon_all(error) == 4
        assert [at.finished[job] for job in jobs] == [1] * 4
        assert all(job.error is error for job in jobs)
        assert at.pool.queue.abandon_all(error) == 0
        gate.set()
        engine.release()
        at.result("x")
        assert at.room_taken() == (0, 0)


def test_stopping_waits_for_batches_that_run_and_says_when_it_could_not() -> None:
    engine = Engine()
    engine.block()
    with desk(engine, workers=2) as at:
        job = at.submit("computing")
        engine.wait_until_computing()
        assert not at.pool.stop(timeout_s=0)
        engine.release()
        assert at.pool.stop(kit.DEADLINE_S)
        at.wait_for(job)
        assert_vectors(job)


def test_a_context_that_cannot_be_made_fails_the_start_and_ends_the_rest() -> None:
    class Scarce(Engine):
        def new_context(
            self, *, needs_long_context: bool = False, per_token: bool = False
        ) -> kit.FakeContext:
            if self.contexts_open:
                raise es.StartupError("no room")
            return super().new_context(
                needs_long_context=needs_long_context, per_token=per_token
            )

    engine, threads = Scarce(), set(threading.enumerate())
    with pytest.raises(es.StartupError, match="no room"), desk(engine, workers=3):
        pytest.fail("started")
    assert engine.contexts_open == 0
    assert not kit.threads_since(threads)


# Some are too long, some for the long-input context, some for a batch; many are equal.
WORDS = ["a", "b c", "long " * 6, "longer " * 20, "longest " * 40]
WORDS += [f"text {n}" for n in range(40)] + [kit.NAN_WORD, kit.BOOM_WORD]
WEIGHTS = [20, 20, 10, 5, 1] + [1] * 40 + [1, 1]


@pytest.mark.parametrize("tokenizers", [1, 3])
@pytest.mark.parametrize("cache_bytes", [0, 4000], ids=["no cache", "small cache"])
@pytest.mark.parametrize("seed", range(3))
def test_many_submitters_who_often_leave_lose_and_leak_nothing(
    seed: int, cache_bytes: int, tokenizers: int
) -> None:
    jobs: list[list[es.Job]] = [[] for _ in range(5)]
    cancelled: set[es.Job] = set()
    engine = Engine(context_tokens=16)
    with desk(
        engine,
        workers=4,
        batch_tokens=7,
        cache_bytes=cache_bytes,
        tokenization_workers=tokenizers,
    ) as at:

        def submitter(number: int) -> None:
            chance = random.Random(seed * 10 + number)
            for _ in range(40):
                texts = chance.choices(WORDS, WEIGHTS, k=chance.randint(1, 50))
                # What raises costs a long-input context.
                per_token = kit.BOOM_WORD not in texts and chance.random() < 0.2
                jobs[number].append(at.submit(*texts, per_token=per_token))
                if chance.random() < 0.3:
                    job = chance.choice(jobs[number])
                    cancelled.add(job)
                    at.pool.queue.cancel(job)

        threads = [threading.Thread(target=submitter, args=(n,)) for n in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        submitted = [job for mine in jobs for job in mine]
        at.wait_for(*(job for job in submitted if job not in cancelled))
        # Were anything still thought to be under way, these would wait for it.
        for text in WORDS:
            at.result(text)
        counts = at.pool.queue.cache.counts
    assert len(submitted) == 200
    assert at.room_taken() == (0, 0)
    assert at.pool.queue.busy == 0
    kinds = collections.Counter(type(job.error) for job in submitted)
    for job in submitted:
        if at.finished[job] and job.error is None:
            assert_vectors(job)
    assert kinds[type(None)] > 20, "hardly one succeeded: the test says little"
    assert len(kinds) > 2, "nothing failed: the test says little"
    assert engine.long_contexts_made == 2, "for long inputs, and for those by tokens"
    assert counts.shared > 20, "hardly anything was shared: the test says little"
    assert bool(cache_bytes) == bool(counts.hits) == bool(counts.evictions)
    assert counts.bytes <= cache_bytes


# --- no room for all threads ---


@pytest.mark.parametrize("room", range(5))
def test_a_pool_without_room_for_its_threads_ends_those_it_has_before_any_computes(
    monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    engine, started = kit.FakeEngine(), list[threading.Thread]()
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if len(started) == room:
            raise RuntimeError("can't start new thread")
        start(thread)
        started.append(thread)

    pool = kit.pool(engine, workers=4)
    made: list[object] = []
    monkeypatch.setattr(engine, "new_context", made.append)
    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(es.StartupError, match="may not start that many threads"):
        pool.start()
    assert not any(thread.is_alive() for thread in started)
    assert not made, "a context that the engine could be closed under"


def test_a_pool_that_cannot_start_waits_for_contexts_that_are_being_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, begun, may_go_on = kit.FakeEngine(), threading.Barrier(2), threading.Event()
    whole = engine.new_context

    def new_context() -> es.Context:
        number = begun.wait(kit.DEADLINE_S)
        if number == 0:
            raise es.StartupError("no room for another context")
        assert may_go_on.wait(kit.DEADLINE_S)
        return whole()

    monkeypatch.setattr(engine, "new_context", new_context)
    with ThreadPoolExecutor(1) as starter:
        pool = kit.pool(engine, workers=2)
        ends = starter.submit(pool.start)
        assert not ends.done(), "the engine would be closed under the second"
        may_go_on.set()
        with pytest.raises(es.StartupError, match="no room"):
            ends.result(kit.DEADLINE_S)
    assert engine.contexts_open == 0
