"""Rooms GENERATIONS and GENERATOR: many replies from one context, and nobody harmed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import embellama_server as es
from tests import chat_models, kit
from tests.fake_steps import (
    BOOM_TOKEN,
    GREEDY,
    NAN_TOKEN,
    SHORT_TOKEN,
    Asked,
    Generating,
    StepEngine,
    generating,
    said_after,
)
from tests.faults import until

SYSTEM = list(range(100, 164))  # how prompts begin


def prompt(seed: int, length: int = 20) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(10, 299) for _ in range(length)]


def settled(running: Generating) -> None:
    """Nothing runs, waits or is reserved any more."""
    until(lambda: not running.queue.running, "no place is taken")
    cache, backlog = running.queue.prompt_cache, running.queue.backlog
    assert (cache.running_cells, running.queue.waiting) == (0, 0)
    assert (backlog.inputs, backlog.tokens, backlog.bytes) == (0, 0, 0)


# --- what a reply says ---


@pytest.mark.parametrize("parallel", [1, 4])
def test_a_reply_says_what_the_model_says_whatever_shares_its_steps(
    parallel: int,
) -> None:
    with generating(StepEngine(parallel=parallel), parallel=parallel) as running:
        prompts = [prompt(n, 1 + 37 * n % 90) for n in range(24)]
        asked = [running.ask(ids, 1 + n % 13) for n, ids in enumerate(prompts)]
        for n, (one, ids) in enumerate(zip(asked, prompts, strict=True)):
            assert one.text() == said_after(ids, 1 + n % 13)
            assert (one.reason(), one.generation.tokens) == ("length", 1 + n % 13)
        settled(running)
        assert max(len(step) for step in running.engine.steps) <= parallel


def test_a_reply_ends_with_the_model_s_end_token_which_counts() -> None:
    ids = [SHORT_TOKEN, *prompt(1, 10)]
    with generating() as running:
        one = running.ask(ids, 50)
        assert (one.text(), one.reason()) == (said_after(ids, 50), "stop")
        assert one.generation.tokens == 6, "five and the end's"
        on = running.ask(
            ids, 8, sampling=es.SamplingOptions(temperature=0, ignore_eos=True)
        )
        assert (on.reason(), on.generation.tokens) == ("length", 8)


def test_a_reply_ends_before_a_stop_string_across_tokens() -> None:
    ids, whole = prompt(2), said_after(prompt(2), 8)
    at = whole.index("><", 12)
    stop = whole[at - 1 : at + 4]
    with generating() as running:
        one = running.ask(ids, 8, stop=(stop,))
        assert (one.text(), one.reason()) == (whole[: whole.index(stop)], "stop")
        kept = running.ask(ids, 8, stop=(whole[-3:] + "and on",))
        assert (kept.text(), kept.reason()) == (whole, "length"), "what was held back"


def test_logprobs_are_of_tokens_whose_text_shows_and_come_with_it() -> None:
    with generating(StepEngine()) as running:
        ids = prompt(2)
        pieces = [f"{piece}>" for piece in said_after(ids, 8).split(">")[:-1]]
        ending = pieces[3][1:] + pieces[4] + pieces[5][:2]
        for stop, shown in (
            ((ending,), 4),  # of the fourth token one character
            ((pieces[3] + pieces[4],), 3),
            ((pieces[3] + pieces[4] + "and on",), 8),
            ((), 8),
        ):
            one = running.ask(ids, 8, stop=stop, top_logprobs=0)
            one.text()
            told = text = ""
            for delta in one.deltas:
                text += delta.text
                told += b"".join(each.text for each in delta.logprobs).decode()
                assert told.startswith(text)
                assert bool(delta.logprobs) == bool(delta.text)
            assert told == "".join(pieces[:shown])


def test_replies_to_one_prompt_share_its_reading_and_differ_by_their_seeds() -> None:
    with generating(StepEngine(cells=256)) as running:
        ids = prompt(3, 60)
        hot = es.SamplingOptions(temperature=2.0, top_k=0, top_p=1.0, seed=7)
        one = running.ask(ids, 6, n=3, sampling=hot)
        texts = [one.text(index) for index in range(3)]
        assert len({*texts}) == 3
        assert one.generation.tokens == 18
        read = [
            row for step in running.engine.steps for row in step if len(row.ids) > 1
        ]
        assert sum(len(row.ids) for row in read) == 60
        again = running.ask(ids, 6, n=3, sampling=hot)
        assert [again.text(index) for index in range(3)] == texts
        settled(running)


def test_replies_to_a_prompt_that_is_still_read_have_their_places() -> None:
    with generating(parallel=3) as running:
        running.engine.block()
        first = running.ask(prompt(1), 1)
        running.engine.wait_until_computing()
        asked = [running.ask(prompt(n), 6, n=2) for n in (2, 3)]
        until(lambda: running.queue.waiting == 2, "both wait")
        running.engine.release()
        for one in (first, *asked):
            one.text()
        assert max(len(step) for step in running.engine.steps) == 2
        settled(running)


def test_no_tokens_asked_for_reads_the_prompt_only() -> None:
    with generating() as running:
        one = running.ask(prompt(4), 0)
        assert (one.text(), one.reason(), one.generation.tokens) == ("", "length", 0)
        assert running.ask(prompt(4), 3).text() == said_after(prompt(4), 3)


@pytest.mark.parametrize("ends", ["over", "running"])
def test_what_two_prompts_begin_with_is_read_once(ends: str) -> None:
    with generating(StepEngine(cells=1024)) as running:
        first = running.ask([*SYSTEM, *prompt(5)], 400 if ends == "running" else 4)
        if ends == "over":
            first.wait()
        else:
            first.wait_for_token()
        second = running.ask([*SYSTEM, *prompt(6)], 4)
        assert second.text() == said_after([*SYSTEM, *prompt(6)], 4)
        assert second.generation.cached_tokens == len(SYSTEM)
        running.queue.cancel(first.generation)
        settled(running)


def test_how_likely_a_prompt_was_is_told_for_each_of_its_tokens() -> None:
    with generating() as running:
        ids = prompt(7, 40)
        running.ask(ids, 1).wait()  # its cells are no use here
        one = running.ask(ids, 2, top_logprobs=2, echoes_logprobs=True)
        one.wait()
        told = one.generation.prompt_logprobs
        assert [entry.token for entry in told] == ids[1:]
        assert all(len(entry.top) == 2 for entry in told)
        entries = [entry for delta in one.deltas for entry in delta.logprobs]
        assert "".join(entry.text.decode() for entry in entries) == one.text()
        assert all(-0.1 < entry.logprob <= 0 for entry in entries)


@pytest.mark.parametrize(("weights", "most"), [("q8_0", 3), ("f16", 1)])
def test_a_deterministic_reply_shares_its_steps_with_few_of_its_kind(
    weights: str, most: int
) -> None:
    engine = StepEngine(parallel=8)
    engine.card = dataclasses.replace(engine.card, weights=weights)
    with generating(engine, parallel=8, threads=3) as running:
        engine.block()
        others = [running.ask(prompt(n), 30) for n in range(4)]
        fixed = [
            running.ask(prompt(n), 30, is_deterministic=True) for n in range(10, 14)
        ]
        with running.cores.used(1):  # by embeddings of another model
            engine.release()
            for n, one in enumerate([*others, *fixed]):
                assert one.text() == said_after(prompt(n if n < 4 else n + 6), 30)
        steps = [
            (is_fixed, len(rows), threads)
            for is_fixed, rows, threads in zip(
                engine.are_deterministic, engine.steps, engine.threads, strict=True
            )
            if all(len(row.ids) == 1 for row in rows)
        ]
        assert max(rows for is_fixed, rows, _ in steps if is_fixed) == most
        assert max(rows for is_fixed, rows, _ in steps if not is_fixed) == 4
        assert {(is_fixed, n) for is_fixed, _, n in steps} == {(True, 3), (False, 2)}
        settled(running)


def test_a_step_leaves_the_cores_that_calls_of_other_models_use() -> None:
    with generating(threads=3) as running:
        for busy, left in ((0, 3), (1, 2), (2, 1), (9, 1)):
            running.engine.threads.clear()
            with running.cores.used(busy):
                assert running.ask(prompt(1), 9).text() == said_after(prompt(1), 9)
            assert {*running.engine.threads} == {left}


# --- who leaves, and who waits ---


def test_a_client_that_leaves_as_its_reply_grows_is_in_no_further_step() -> None:
    with generating() as running:
        engine, steps = running.engine, list[int]()
        engine.block()
        stays, leaves = running.ask(prompt(2), 60), running.ask(prompt(1), 60)

        def leave() -> None:  # as it has gained something, in the generating thread
            running.queue.cancel(leaves.generation)
            steps.append(len(engine.steps))

        leaves.generation.changed = leave
        engine.release()
        assert stays.text() == said_after(prompt(2), 60)
        assert {len(step) for step in engine.steps[steps[0] :]} == {1}
        assert leaves.generation.tokens == 1
        settled(running)


def test_a_client_that_leaves_as_its_prompt_is_read_or_waits_is_in_no_further_step() -> (
    None
):
    said = "".join(said_after(prompt(n), 20) for n in range(2, 6))
    known = {token for n in range(2, 6) for token in prompt(n)}
    token = min(t for t in {*range(10, 299)} - known if f"<{t}>" not in said)
    with generating() as running:
        engine = running.engine
        engine.block()
        reads = running.ask([token] * 200, 5)
        engine.wait_until_computing()
        stays = [running.ask(prompt(n), 20) for n in range(2, 6)]
        waits = [running.ask([token] * 30, 5, n=2) for _ in range(3)]
        for one in (reads, *waits):
            running.queue.cancel(one.generation)
        engine.release()
        for n, one in enumerate(stays, 2):
            assert one.text() == said_after(prompt(n), 20)
        settled(running)
        computed = {int(t) for step in engine.steps for row in step for t in row.ids}
        assert token not in computed, "not even in the one of then: it was ended"
        assert engine.aborts


def test_who_waits_is_let_in_by_priority_and_clients_take_turns() -> None:
    with generating(parallel=1) as running:
        running.engine.block()
        running.ask(prompt(0), 2)
        running.engine.wait_until_computing()
        asked = {
            name: running.ask(prompt(n), 2, client=name[0], priority=priority)
            for n, (name, priority) in enumerate(
                [
                    *(("low", 2), ("a1", 1), ("a2", 1), ("a3", 1), ("b1", 1)),
                    *(("c1", 1), ("b2", 1), ("urgent", 0)),
                ]
            )
        }
        running.engine.release()
        began = {name: one.wait().started_at for name, one in asked.items()}
        order = sorted(began, key=began.__getitem__)
        assert order == ["urgent", "a1", "b1", "c1", "a2", "b2", "a3", "low"]
        settled(running)


def test_who_would_wait_for_more_than_half_of_its_time_is_refused_at_once() -> None:
    with generating(parallel=1) as running:
        running.engine.block()
        backlog = running.queue.backlog
        backlog.throughput.record(100, 10.0)  # ten tokens a second
        waits = running.ask(prompt(1), 80)
        wait_s = backlog.wait_s
        assert wait_s > 1
        with pytest.raises(es.Overloaded, match="too much waits") as caught:
            running.ask(prompt(2), 5, timeout_s=2 * wait_s - 0.1)
        assert caught.value.retry_after_s is not None
        fits = running.ask(prompt(2), 5, timeout_s=2 * wait_s + 0.1)
        running.engine.release()
        assert waits.text() == said_after(prompt(1), 80)
        assert fits.text() == said_after(prompt(2), 5)
        settled(running)


def test_a_step_is_ended_when_the_last_of_those_in_it_has_left() -> None:
    running = Generating(StepEngine())
    context = running.engine.new_step_context()
    first, last = (running.ask(prompt(n)).generation for n in (1, 2))
    step = running.queue.begin_step(context, {first, last}, 1.0)
    running.queue.cancel(first)
    assert not context.is_aborted
    running.queue.cancel(last)
    assert context.is_aborted and step.is_unwanted


@pytest.mark.parametrize("can_trim", [True, False])
def test_a_step_that_computes_for_nobody_is_ended_and_harms_nobody(
    can_trim: bool,
) -> None:
    with generating(StepEngine(can_trim=can_trim, max_tokens=16)) as running:
        engine, ids = running.engine, prompt(1, 60)
        engine.block()
        one = running.ask(ids, 5)
        engine.wait_until_computing()
        running.queue.cancel(one.generation)
        assert engine.aborts == int(can_trim)
        engine.release()
        assert running.ask(ids, 5).text() == said_after(ids, 5)
        assert len(engine.contexts) == 1
        assert "error" not in running.log.getvalue()
        settled(running)


def test_a_prompt_can_be_read_again_after_a_step_of_it_was_ended() -> None:
    with generating(StepEngine(max_tokens=16)) as running:
        engine, ids = running.engine, prompt(1, 60)
        assert running.ask(ids[:40], 1).text() == said_after(ids[:40], 1)
        engine.block()
        one = running.ask(ids, 5)
        engine.wait_until_computing()
        running.queue.cancel(one.generation)
        engine.release()
        assert running.ask(ids, 5).text() == said_after(ids, 5)
        assert len(engine.contexts) == 1
        settled(running)


def test_a_large_request_is_not_passed_for_ever() -> None:
    with generating(StepEngine(cells=256)) as running:
        running.engine.block()
        small = [running.ask(prompt(n, 10), 10, client=f"c{n}") for n in range(6)]
        large = running.ask(prompt(99, 150), 100, client="large")
        more = [running.ask(prompt(n, 10), 10, client=f"c{n}") for n in range(6, 60)]
        running.engine.release()
        assert large.text() == said_after(prompt(99, 150), 100)
        others = [one.wait() for one in (*small, *more)]
        after = sum(one.started_at > large.generation.started_at for one in others)
        assert after >= 30, "it was let in before most of them"
        settled(running)


def test_no_reply_ever_ends_for_want_of_cells() -> None:
    with generating(StepEngine(cells=256)) as running:
        asked = [running.ask(prompt(n, 60), 60) for n in range(8)]
        for n, one in enumerate(asked):
            assert (one.text(), one.reason()) == (
                said_after(prompt(n, 60), 60),
                "length",
            )
        settled(running)


def test_what_is_reserved_decides_who_is_refused() -> None:
    with generating() as running:
        running.queue.backlog.limit = es.Size(2, 1 << 20, 1 << 30)
        running.engine.block()
        asked = [running.ask(prompt(n), 4) for n in range(2)]
        with pytest.raises(es.Overloaded) as caught:
            running.ask(prompt(3), 4)
        assert caught.value.retry_after_s is not None
        running.engine.release()
        for one in asked:
            one.wait()
        assert running.ask(prompt(3), 4).text() == said_after(prompt(3), 4)


def test_the_prompts_of_one_request_come_in_together_or_not_at_all() -> None:
    def of_one_request() -> list[Asked]:
        wanted = [es.GenerationRequest(ids=prompt(n), max_tokens=9) for n in range(3)]
        return [Asked(dataclasses.replace(one, sampling=GREEDY)) for one in wanted]

    with generating() as running:
        running.queue.backlog.limit = es.Size(2, 1 << 20, 1 << 30)
        running.engine.block()
        asked, more = of_one_request(), of_one_request()
        running.queue.submit(*(one.generation for one in asked))  # nothing piles up
        with pytest.raises(es.Overloaded, match="3 of 2 inputs"):
            running.queue.submit(*(one.generation for one in more))
        running.engine.release()
        for n, one in enumerate(asked):
            assert one.text() == said_after(prompt(n), 9)
        assert not any(one.generation.is_over for one in more)
        settled(running)


def test_all_are_told_when_the_queue_is_abandoned() -> None:
    with generating() as running:
        running.engine.block()
        asked = [running.ask(prompt(n), 4) for n in range(9)]
        running.engine.wait_until_computing()
        assert running.queue.abandon_all(es.NotReady("over")) == 9
        running.engine.release()
        for one in asked:
            assert isinstance(one.wait().error, es.NotReady)
        settled(running)


# --- what fails ---


@pytest.mark.parametrize("token", [BOOM_TOKEN, NAN_TOKEN])
@pytest.mark.parametrize("is_echoed", [False, True])
def test_a_prompt_that_no_step_works_with_harms_no_neighbour(
    token: int, is_echoed: bool
) -> None:
    with generating() as running:
        good = [running.ask(prompt(n), 12) for n in range(3)]
        rest = prompt(51) if is_echoed else []  # each of its tokens has logits
        bad = running.ask([*prompt(50), token, *rest], 12, echoes_logprobs=is_echoed)
        more = [running.ask(prompt(n), 12, n=2) for n in range(3, 6)]
        assert isinstance(bad.wait().error, es.EngineFailed)
        for n, one in enumerate(good):
            assert (one.text(), one.reason()) == (said_after(prompt(n), 12), "length")
        for n, one in enumerate(more, 3):
            assert [one.text(0), one.text(1)] == 2 * [said_after(prompt(n), 12)]
        settled(running)
        assert running.ask(prompt(9), 3).text() == said_after(prompt(9), 3)
        assert running.queue.prompt_cache.misses >= 8, "counted from the start"


@pytest.mark.parametrize("token", [BOOM_TOKEN, NAN_TOKEN])
def test_what_is_forgotten_with_a_failed_step_is_no_longer_counted(token: int) -> None:
    with generating() as running:
        running.ask(prompt(1, 60), 3).wait()
        until(lambda: running.queue.prompt_cache.stored_bytes, "a copy")
        assert running.ask([*prompt(50), token], 3).wait().error is not None
        until(lambda: not running.queue.prompt_cache.stored_bytes, "what is true")


def test_one_failure_is_no_reply_s_end() -> None:
    engine = StepEngine()
    engine.failures[BOOM_TOKEN] = 1
    with generating(engine) as running:
        asked = [running.ask([*prompt(n), BOOM_TOKEN], 9) for n in range(4)]
        texts = [
            one.text() for one in asked if not isinstance(one.wait().error, es.ApiError)
        ]
        assert len(texts) >= 3, "at most the one that was alone in the step"
        settled(running)


def test_a_step_that_finds_no_cell_makes_room_and_goes_on() -> None:
    with generating(prompt_cache_mb=0) as running:
        for n in range(4):
            running.ask(prompt(n, 40), 2).wait()
        running.engine.lies_about_room = 2
        assert running.ask(prompt(8), 5).text() == said_after(prompt(8), 5)
        assert running.queue.prompt_cache.evictions == 2
        assert len(running.engine.contexts) == 1


def test_prefixes_are_copied_while_nobody_waits_and_moved_before_a_prompt() -> None:
    with generating() as running:
        for one in [running.ask(prompt(n, 20), 5 + n) for n in range(3)]:
            one.wait()
        copies = running.engine.copies
        until(lambda: len(copies) == 3, "three prefixes")
        assert running.queue.prompt_cache.idle_cells == 75, "for a chat that goes on"
        assert running.ask(prompt(8, 70), 5).text() == said_after(prompt(8, 70), 5)
        settled(running)
        assert running.queue.prompt_cache.idle_cells == 74
        again = running.ask(prompt(1, 20), 6)
        assert again.text() == said_after(prompt(1, 20), 6)
        assert again.generation.cached_tokens == 19
        assert running.queue.prompt_cache.restored_tokens == 19


def test_a_copy_that_fails_costs_nobody_a_reply() -> None:
    with generating() as running:
        running.engine.fails_to_copy = 1
        for n in (1, 1, 2):
            text = running.ask(prompt(n, 80), 5).text()
            assert text == said_after(prompt(n, 80), 5)
        settled(running)
        assert not running.engine.fails_to_copy
        assert len(running.engine.contexts) == 1


def test_while_replies_grow_prefixes_are_moved_a_block_at_a_time() -> None:
    with generating(step_ms=1) as running:
        for n in range(3):
            running.ask(prompt(n, 80), 1).wait()
            until(lambda: not running.queue.prompt_cache.running_cells, "its end")
        one = running.ask(prompt(9), 200)
        assert one.text() == said_after(prompt(9), 200)
        assert running.queue.prompt_cache.idle_cells == len(prompt(9)) + 199


def test_how_long_a_step_may_take_can_change_while_it_runs() -> None:
    with generating(step_ms=1) as running:
        running.queue.step_s = 5.0
        running.ask(prompt(1), 1).wait()
        assert running.planner.step_s == 5.0


def test_a_step_that_takes_far_too_long_ends_who_was_alone_in_it() -> None:
    with generating(stuck_after_s=0.1) as running:
        running.engine.block()
        one = running.ask(prompt(1), 5)
        running.engine.wait_until_computing()
        until(lambda: running.queue.end_overdue() or running.engine.aborts, "an abort")
        assert isinstance(one.wait().error, es.EngineFailed)
        running.engine.release()
        assert running.ask(prompt(2), 5).text() == said_after(prompt(2), 5)


def test_a_step_that_does_not_end_is_reported_and_its_requests_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(es, "ABORT_S", 0.05)
    with generating(stuck_after_s=0.1) as running:
        running.engine.is_deaf = True
        running.engine.block()
        asked = [running.ask(prompt(1), 5)]
        running.engine.wait_until_computing()
        asked += [running.ask(prompt(n), 5) for n in range(2, 8)]
        until(running.queue.end_overdue, "a stuck step")
        for one in asked:  # those that wait as well: nobody else computes them
            assert isinstance(one.wait().error, es.EngineUnavailable)
        assert running.queue.stuck == 1
        with pytest.raises(es.EngineUnavailable):
            running.ask(prompt(1), 5)
        running.engine.release()
        until(lambda: not running.queue.stuck, "its end")
        assert running.ask(prompt(2), 5).text() == said_after(prompt(2), 5)
        assert running.queue.stuck == 0


def test_without_room_for_a_context_requests_are_refused_until_there_is() -> None:
    with generating() as running:
        running.engine.no_context = 1
        bad = running.ask([*prompt(50), BOOM_TOKEN], 4)
        assert isinstance(bad.wait().error, es.EngineFailed)
        waits = running.ask(prompt(1), 4)
        error = waits.wait().error
        assert error is None or isinstance(error, es.OutOfMemory)
        assert running.ask(prompt(2), 4).text() == said_after(prompt(2), 4)
        assert all(context.is_closed for context in running.engine.contexts[:-1])


def test_a_canary_is_a_reply_of_one_token() -> None:
    engine = StepEngine()
    engine.failures = dict.fromkeys(engine.failures, 0)  # its token is any
    with generating(engine) as running:
        judged: list[object] = []
        running.queue.send_canary(judged.append)
        until(lambda: judged, "a verdict")
        assert judged == [None]
        settled(running)


def test_a_bug_ends_those_it_was_about_and_is_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    with generating() as running:
        with monkeypatch.context() as patch:
            patch.setattr(es, "ReplyText", fails)
            one = running.ask(prompt(1), 4)
            assert isinstance(one.wait().error, es.InternalError)
        assert "ZeroDivisionError" in running.log.getvalue()
        assert running.ask(prompt(2), 4).text() == said_after(prompt(2), 4)


def test_a_bug_within_a_step_leaves_nothing_in_the_gauges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    with generating() as running:
        assert running.ask(prompt(1), 4).text()
        read = running.queue.prompt_cache.misses
        with monkeypatch.context() as patch:
            patch.setattr(es.GenerationWorker, "_read_results", fails)
            one = running.ask(prompt(2), 4)
            assert isinstance(one.wait().error, es.InternalError)
        until(lambda: not running.queue.running, "no place is taken")
        settled(running)
        assert running.queue.prompt_cache.misses >= read
        assert running.ask(prompt(2), 4).text() == said_after(prompt(2), 4)
        assert running.queue.prompt_cache.misses >= read


def test_a_random_day_leaves_nothing_reserved_and_no_wrong_text() -> None:
    chance = random.Random(5)
    with generating(StepEngine(cells=400)) as running:
        asked: list[tuple[Asked, list[int], int]] = []
        for n in range(300):
            ids = [
                *SYSTEM[: chance.choice((0, 0, 30, 64))],
                *prompt(n, chance.randrange(1, 60)),
            ]
            count = chance.randrange(1, 40)
            asked.append((running.ask(ids, count, client=f"c{n % 7}"), ids, count))
            if chance.random() < 0.2:
                running.queue.cancel(chance.choice(asked)[0].generation)
            if chance.random() < 0.05:
                running.queue.clear_cache()
        for one, ids, count in asked:
            if one.generation.error is None and not one.generation.is_over:
                one.wait()
            if one.deltas and one.deltas[-1].finish_reason:
                assert one.text() == said_after(ids, count)
        settled(running)


# --- real models with random weights ---

MAKERS = (chat_models.tiny_llama, chat_models.tiny_qwen, chat_models.tiny_gemma)
RECURRENT = (chat_models.tiny_mamba, chat_models.tiny_jamba)


def engine_of(make: Any, folder: Path, **settings: Any) -> es.Engine:
    chosen = es.ModelSettings(**({"context_size": 2048, "parallel": 8} | settings))
    return es.Engine(str(make(folder)), chosen, kit.quiet_log())


@pytest.mark.parametrize("make", [*MAKERS, *RECURRENT])
def test_replies_in_one_context_say_what_each_says_alone(
    make: Any, tmp_path: Path
) -> None:
    engine = engine_of(make, tmp_path)
    with generating(engine, parallel=8) as running:
        prompts = [prompt(n, 10 + 20 * n) for n in range(8)]
        alone = []
        for ids in prompts:  # where cells lie moves logits by 0.01: enough for a tie
            running.queue.clear_cache()
            alone.append(running.ask(ids, 24).text())
        running.queue.clear_cache()
        together = [running.ask(ids, 24) for ids in prompts]
        assert [one.text() for one in together] == alone
        settled(running)
    engine.close()


@pytest.mark.parametrize("make", [*MAKERS, *RECURRENT])
def test_a_chat_that_goes_on_says_what_it_would_say_anew(
    make: Any, tmp_path: Path
) -> None:
    engine = engine_of(make, tmp_path)
    with generating(engine, parallel=8) as running:
        # Beyond the window of the gemma-like one.
        ids, found = prompt(1, 70), []
        for turn in range(4):
            one = running.ask(ids, 20, top_logprobs=0)
            one.wait()
            assert one.generation.cached_tokens == (len(ids) - 13 if turn else 0)
            said = [entry for delta in one.deltas for entry in delta.logprobs]
            found.append((ids, said[0]))
            ids = [*ids, *[entry.token for entry in said], *prompt(turn + 5, 12)]
        # Not to the bit: tokens one by one take other kernels than a prompt.
        for ids, entry in found:
            running.queue.clear_cache()
            anew = running.ask(ids, 1, top_logprobs=0)
            anew.wait()
            assert anew.generation.cached_tokens == 0
            assert anew.deltas[0].logprobs[0].token == entry.token
            logprob = anew.deltas[0].logprobs[0].logprob
            assert logprob == pytest.approx(entry.logprob, abs=0.02)
        settled(running)
    engine.close()


@pytest.fixture(
    params=[(make, weights) for make in MAKERS for weights in ("f32", "q8_0")]
)
def drawing(request: Any, tmp_path: Path) -> Iterator[Generating]:
    """A pool of eight places, for a model whose weights are floats, or quantised."""
    make, weights = request.param
    room = {"context_size": 1024, "threads": 2}
    engine = engine_of(make, tmp_path, **room)
    if weights != engine.card.weights:
        engine.reencode(str(tmp_path / "again.gguf"), weights)
        engine.close()
        engine = engine_of(lambda _: tmp_path / "again.gguf", tmp_path, **room)
    assert engine.card.weights == weights
    with generating(engine, parallel=8, threads=2) as running:
        yield running
        settled(running)
    engine.close()


def drawn(running: Generating, seed: int, length: int, tokens: int = 12) -> Asked:
    """A deterministic reply, by a seed."""
    sampling = es.SamplingOptions(temperature=1.0, seed=seed)
    how = {"is_deterministic": True, "top_logprobs": 3, "sampling": sampling}
    return running.ask(prompt(seed, length), tokens, **how)


def likely(one: Asked) -> list[es.TokenLogprob]:
    """Its tokens, and how likely each was, to the last bit."""
    one.wait()
    return [entry for delta in one.deltas for entry in delta.logprobs]


def test_a_deterministic_reply_is_the_same_whatever_was_in_memory_before(
    drawing: Generating,
) -> None:
    # What had been left free by others made every second text of q8_0 another one.
    dice = random.Random(5)
    first = [likely(drawn(drawing, 1, length)) for length in (20, 200)]
    assert [*map(len, first)] == [12, 12]
    for _ in range(4):
        before = [
            drawing.ask(prompt(dice.randrange(99), dice.randrange(5, 40)), count)
            for count in dice.choices(range(3, 25), k=6)
        ]
        for one in before:
            one.wait()
        assert [likely(drawn(drawing, 1, length)) for length in (20, 200)] == first
    assert drawing.queue.prompt_cache.stored_bytes, "what was before is kept"


def test_deterministic_replies_are_the_same_beside_others_that_begin_with_them(
    drawing: Generating,
) -> None:
    alone = [likely(drawn(drawing, seed, 7 + seed)) for seed in range(3)]
    drawing.queue.clear_cache()
    others = [drawing.ask(prompt(seed, 9), 18) for seed in range(10, 14)]
    beside = [drawn(drawing, seed, 7 + seed) for seed in range(3)]
    with drawing.cores.used(1):
        assert [*map(likely, beside)] == alone
    for one in others:
        one.wait()
