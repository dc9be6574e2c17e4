"""Rooms SERVICE, SERVER and ADMIN: phases, loading, draining, probes, the cache, pinning."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import embellama_server as es
from tests import kit


async def test_every_move_not_in_the_table_is_loud() -> None:
    async with kit.running_service() as running:
        service = running.service
        for before, after in itertools.product(es.Phase, es.Phase):
            if after not in es.TRANSITIONS[before]:
                service.phase = before
                with pytest.raises(ValueError, match="does not follow"):
                    service.enter(after)
                assert service.phase is before
        service.phase = es.Phase.READY
    # Every phase but the last has a way on, and nothing leads out of that.
    ends = {phase for phase in es.Phase if not es.TRANSITIONS[phase]}
    assert ends == {es.Phase.STOPPED}


def test_connections_are_as_many_as_files_allow_also_where_files_have_no_limit() -> (
    None
):
    def most(files: float) -> int:
        return es.connection_limits(kit.settings(), files).max_connections

    assert [most(files) for files in (1024, 10**6, math.inf)] == [768, 4096, 4096]


async def test_health_answers_while_the_model_loads_and_ready_says_why_not() -> None:
    gate = threading.Event()
    async with kit.running_service(
        before_load=lambda: kit.wait(gate), wait_ready=False
    ) as running:
        assert (await running.ask("GET", "/health")).status == 200
        ready = await running.ask("GET", "/ready")
        assert (ready.status, ready.error["code"]) == (503, "not_ready")
        assert "loading" in ready.error["message"]
        assert ready.headers["retry-after"] == "1"
        ask = await running.ask("POST", "/v1/embeddings", {"input": "a"})
        assert (ask.status, ask.error["code"]) == (503, "not_ready")
        metrics = (await running.ask("GET", "/metrics")).body.decode()
        assert 'embellama_phase{phase="loading"} 1\n' in metrics
        gate.set()
        await running.log.settled.wait()
        assert (await running.ask("GET", "/ready")).json["status"] == "ready"
        metrics = (await running.ask("GET", "/metrics")).body.decode()
        assert 'embellama_phase{phase="loading"} 0\n' in metrics
        assert 'embellama_phase{phase="ready"} 1\n' in metrics


async def test_a_load_that_fails_ends_the_service_with_its_reason() -> None:
    def fail() -> None:
        raise es.StartupError("no such model")

    with pytest.raises(es.StartupError, match="no such model"):
        async with kit.running_service(before_load=fail):
            pass


async def test_stop_while_loading_stops_at_once() -> None:
    gate = threading.Event()
    async with kit.running_service(
        before_load=lambda: kit.wait(gate), wait_ready=False
    ) as running:
        running.server.stop()
        async with asyncio.timeout(kit.DEADLINE_S):
            assert await running.task == 0
        gate.set()


async def test_a_successor_accepts_nobody_until_its_model_is_loaded() -> None:
    gate = threading.Event()
    async with kit.running_service(
        before_load=lambda: kit.wait(gate), wait_ready=False, is_successor=True
    ) as running:
        paths = ("/health", "/ready", "/v1/models")
        waiting = [asyncio.create_task(running.ask("GET", path)) for path in paths]
        ask = running.ask("POST", "/v1/embeddings", {"input": "a"})
        waiting.append(asyncio.create_task(ask))
        done, _ = await asyncio.wait(waiting, timeout=0.3)
        assert not done
        assert not running.service.connections.open
        gate.set()
        assert [(await each).status for each in waiting] == [200] * 4


async def test_a_successor_that_loads_for_too_long_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert es._WAIT_IN_BACKLOG_S == 30
    monkeypatch.setattr(es, "_WAIT_IN_BACKLOG_S", 0.1)

    gate = threading.Event()
    async with kit.running_service(
        before_load=lambda: kit.wait(gate), wait_ready=False, is_successor=True
    ) as running:
        ask = await running.ask("POST", "/v1/embeddings", {"input": "a"})
        assert (ask.status, ask.error["code"]) == (503, "not_ready")
        assert "loading" in ask.error["message"]
        gate.set()
        await running.log.settled.wait()
        assert (await running.ask("GET", "/ready")).status == 200


async def test_a_successor_that_is_told_to_stop_while_it_loads_does() -> None:
    gate = threading.Event()
    async with kit.running_service(
        before_load=lambda: kit.wait(gate), wait_ready=False, is_successor=True
    ) as running:
        await asyncio.sleep(0)
        running.server.stop()
        async with asyncio.timeout(kit.DEADLINE_S):
            assert await running.task == 0
        gate.set()


async def test_stop_finishes_accepted_work_and_refuses_new() -> None:
    engine = kit.FakeEngine()
    engine.block()

    async with kit.running_service(engine) as running:
        ask = {"input": ["a", "b"]}
        accepted = asyncio.create_task(running.ask("POST", "/v1/embeddings", ask))
        await asyncio.to_thread(engine.wait_until_computing)
        running.server.stop()
        ready = await running.ask("GET", "/ready")
        assert ready.status == 503
        assert "shutting down" in ready.error["message"]
        assert (await running.ask("GET", "/health")).status == 200
        refused = await running.ask("POST", "/v1/embeddings", ask)
        assert (refused.status, refused.error["code"]) == (503, "not_ready")
        assert not running.task.done()
        metrics = (await running.ask("GET", "/metrics")).body.decode()
        assert "embellama_queue_inputs 2\n" in metrics  # still true
        engine.release()
        reply = await accepted
        assert reply.status == 200
        assert reply.headers["connection"] == "close"
        assert await running.task == 0
    assert engine.contexts_open == 0
    assert engine.is_closed


async def test_work_that_outlives_the_drain_gets_503_and_the_exit_code_is_0() -> None:
    engine = kit.FakeEngine()
    engine.block()

    async with kit.running_service(engine, drain_timeout_s=0.1) as running:
        ask = {"input": ["a", "b"]}
        accepted = asyncio.create_task(running.ask("POST", "/v1/embeddings", ask))
        await asyncio.to_thread(engine.wait_until_computing)
        running.server.stop()
        reply = await accepted
        assert (reply.status, reply.error["code"]) == (503, "not_ready")
        engine.release()
        assert await running.task == 0


async def test_a_second_stop_does_not_wait_for_the_drain() -> None:
    engine = kit.FakeEngine()
    engine.block()

    async with kit.running_service(engine, drain_timeout_s=3600) as running:
        ask = {"input": "a"}
        accepted = asyncio.create_task(running.ask("POST", "/v1/embeddings", ask))
        await asyncio.to_thread(engine.wait_until_computing)
        running.server.stop()
        running.server.stop()
        assert (await accepted).status == 503
        engine.release()
        assert await running.task == 0


async def test_a_taken_port_is_one_sentence() -> None:
    async with kit.running_service() as running:
        with pytest.raises(es.StartupError, match=f":{running.port}.*--port"):
            async with kit.running_service(port=running.port):
                pass


@contextlib.contextmanager
def generating(running: kit.RunningService, **counts: int) -> Iterator[None]:
    """Let the model's queue be one of a model that generates, with these counts."""
    pool, settings = running.served.pool, es.ModelSettings(workers=1, parallel=4)
    queue = es.GenerationQueue(
        kit.fake_card(kind="generate", cells=100), settings, es.Backlog(kit.LIMIT)
    )
    queue.prompt_cache = es.PromptCacheCounts(**counts, cells=100)
    before, pool.queue = pool.queue, queue
    try:
        yield
    finally:
        pool.queue = before


def generation(tokens: int = 2, max_tokens: int = 3) -> es.Generation:
    """A request that nobody takes."""
    request = es.GenerationRequest(ids=[5] * tokens, max_tokens=max_tokens)
    return es.Generation(request, lambda: None)


async def test_sequences_and_the_prompt_cache_have_metrics() -> None:
    async with kit.running_service() as running:
        counts = {"hits": 3, "misses": 4, "hit_tokens": 70, "evictions": 1}
        counts |= {"sequences": 5, "running_cells": 30, "idle_cells": 60}
        with generating(running, **counts):
            queue: Any = running.served.pool.queue
            queue.replies = 2
            queue.submit(generation())
            text = (await running.ask("GET", "/metrics")).body.decode()
            idle = await running.ask("GET", "/health", accept="text/plain")
        assert idle.body.decode() == "ok \N{EN DASH} workers idle: 2\n"
        for line in (
            'sequences{state="running"} 2',
            'sequences{state="waiting"} 1',
            'sequences{state="idle"} 3',
            'prompt_tokens_total{source="cached"} 70',
            'prompt_cache_lookups_total{result="hit"} 3',
            'prompt_cache_lookups_total{result="miss"} 4',
            "prompt_cache_evictions_total 1",
            'prompt_cache_cells{state="running"} 30',
            'prompt_cache_cells{state="idle"} 60',
            'prompt_cache_cells{state="free"} 10',
        ):
            assert f"embellama_{line}\n" in text


def test_a_step_is_counted() -> None:
    telemetry = es.Telemetry()
    es.count_step(telemetry, es.StepReport(3, 60, 4, 0.25))
    report = es.StepReport(3, 0, 3, 0.03, draft_tokens=5, accepted_tokens=2)
    es.count_step(telemetry, report)
    text = telemetry.exposition()
    for line in (
        "generation_tokens_total 7",
        'prompt_tokens_total{source="computed"} 60',
        'draft_tokens_total{result="accepted"} 2',
        'draft_tokens_total{result="rejected"} 3',
        "step_tokens_count 2",
        "step_tokens_sum 66",
        "step_seconds_sum 0.28",
    ):
        assert f"embellama_{line}\n" in text


async def test_clearing_the_cache_tells_what_was_kept_of_prompts() -> None:
    async with kit.running_service() as running:
        with generating(running, sequences=5, idle_cells=60):
            queue: Any = running.served.pool.queue
            queue.replies = 2
            queue.card = dataclasses.replace(queue.card, cell_bytes=10)
            cleared = await running.ask("DELETE", "/admin/cache")
        assert cleared.json == {"cleared": {"entries": 3, "bytes": 600}}


async def test_every_metric_is_there_from_the_start_and_counts_afterwards() -> None:
    async with kit.running_service(workers=2) as running:
        before = (await running.ask("GET", "/metrics")).body.decode()
        for row in es.METRICS:
            assert f"# TYPE {row.name} {row.kind}\n" in before
        assert "embellama_tokens_total 0\n" in before
        assert 'embellama_workers{state="idle"} 2\n' in before
        assert "process_cpu_seconds_total 0\n" not in before
        if Path("/proc/self/statm").exists():  # known on Linux only
            assert "process_resident_memory_bytes 0\n" not in before
        await running.ask("POST", "/v1/embeddings", {"input": ["a b", "c"]})
        await running.ask("GET", "/nope")
        after = await running.ask("GET", "/metrics")
        assert after.headers["content-type"] == es.PROMETHEUS_TEXT
        text = after.body.decode()
        for line in (
            "embellama_inputs_total 2",
            "embellama_tokens_total 7",
            "embellama_queue_inputs 0",
            "embellama_queue_tokens 0",
            'embellama_errors_total{code="unknown_url"} 1',
            'embellama_http_requests_total{status="2xx"} 2',
            'embellama_http_requests_total{status="4xx"} 1',
            'embellama_route_requests_total{route="/v1/embeddings"} 1',
            'embellama_route_requests_total{route="none"} 1',
            'embellama_route_requests_total{route="/v1/rerank"} 0',
            'embellama_backlog_seconds{model="fake@1"} 0',
        ):
            assert f"\n{line}\n" in text
        limit = running.served.pool.queue.backlog.limit
        assert f"\nembellama_queue_limit_inputs {limit.inputs}\n" in text
        assert f"\nembellama_queue_limit_tokens {limit.tokens}\n" in text
        if Path("/proc/meminfo").exists():
            (size,) = re.findall(r"\nembellama_memory_limit_bytes ([0-9]+)\n", text)
            assert int(size) > 1 << 28


async def test_the_backlog_is_told_in_seconds() -> None:
    engine = kit.FakeEngine()
    async with kit.running_service(engine, cache_mb=0) as running:
        for text in ("a", "b"):
            await running.ask("POST", "/v1/embeddings", {"input": text})
        queue = running.served.pool.queue
        backlog = queue.backlog
        engine.block()
        asked = asyncio.create_task(
            running.ask("POST", "/v1/embeddings", {"input": ["c d"] * 3})
        )
        while not queue.busy:  # until then its tokens are a guess
            await asyncio.sleep(0)
        text = (await running.ask("GET", "/metrics")).body.decode()
        wait_s = backlog.wait_s
        shown = json.loads((await running.ask("GET", "/v1/metrics")).body)["embellama"]
        engine.release()
        assert (await asked).status == 200
    assert wait_s > 0
    (told,) = re.findall(r'\nembellama_backlog_seconds\{model="fake@1"\} (.*)\n', text)
    assert float(told) == pytest.approx(wait_s)
    assert shown["backlog_s"] == {"fake@1": pytest.approx(wait_s, abs=1e-3)}


async def test_the_front_page_lists_the_routes() -> None:
    async with kit.running_service() as running:
        listed = (await running.ask("GET", "/")).json
        assert listed["version"] == es.__version__
        assert "POST /v1/embeddings" in listed["routes"]


async def test_workers_that_cannot_get_a_context_end_the_start() -> None:
    class Full(kit.FakeEngine):
        def new_context(
            self, *, needs_long_context: bool = False, per_token: bool = False
        ) -> kit.FakeContext:
            raise es.StartupError("no memory for a context")

    with pytest.raises(es.StartupError, match="no memory"):
        async with kit.running_service(Full()):
            pass


# --- the cache ---

EMBED = "/v1/embeddings"


async def metric(running: kit.RunningService, name: str) -> int:
    """The present value of a series that counts."""
    text = (await running.ask("GET", "/metrics")).body.decode()
    (value,) = re.findall(rf"(?m)^embellama_{re.escape(name)} ([0-9]+)$", text)
    return int(value)


async def lookups(running: kit.RunningService) -> dict[str, int]:
    """Inputs looked up so far, by result."""
    name = 'cache_lookups_total{{result="{}"}}'
    results = ("hit", "shared", "miss")
    return {r: await metric(running, name.format(r)) for r in results}


async def test_a_cleared_cache_says_what_it_held_and_computes_again() -> None:
    engine = kit.FakeEngine()

    async with kit.running_service(engine, cache_mb=1) as running:
        ask = {"input": ["a", "b", "a"]}
        replies = [await running.ask("POST", EMBED, ask) for _ in range(2)]
        assert len(engine.calls) == 1
        used = await metric(running, "cache_bytes")
        cleared = await running.ask("DELETE", "/admin/cache")
        assert cleared.status == 200
        assert cleared.headers["content-type"] == "application/json"
        assert cleared.json == {"cleared": {"entries": 2, "bytes": used}}
        assert used > 2 * 8 * 4
        again = await running.ask("DELETE", "/admin/cache")
        assert again.json == {"cleared": {"entries": 0, "bytes": 0}}
        replies.append(await running.ask("POST", EMBED, ask))
        assert len(engine.calls) == 2
        assert replies[0].json == replies[1].json == replies[2].json


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_a_cache_is_only_cleared_by_who_says_so(method: str) -> None:
    async with kit.running_service(cache_mb=1) as running:
        await running.ask("POST", EMBED, {"input": "a"})
        reply = await running.ask(method, "/admin/cache")
        assert (reply.status, reply.headers["allow"]) == (405, "DELETE, OPTIONS")
        assert await metric(running, "cache_entries") == 1


async def test_a_cache_cannot_be_cleared_before_there_is_one() -> None:
    gate = threading.Event()
    async with kit.running_service(
        before_load=lambda: kit.wait(gate), wait_ready=False
    ) as running:
        reply = await running.ask("DELETE", "/admin/cache")
        assert (reply.status, reply.error["code"]) == (503, "not_ready")
        gate.set()
        await running.log.settled.wait()


async def test_cache_metrics_say_what_was_found_and_what_is_kept() -> None:
    async with kit.running_service(cache_mb=1) as running:
        assert await lookups(running) == {"hit": 0, "shared": 0, "miss": 0}
        steps = (
            # inputs; hit, shared, miss and entries from then on
            (["a", "b"], (0, 0, 2), 2),
            (["a"], (1, 0, 2), 2),
            (["c", "c", "c", "a"], (2, 2, 3), 3),
            ([" c", "b  "], (4, 2, 3), 3),  # spelt otherwise, the same ids
        )
        for inputs, (hit, shared, miss), entries in steps:
            await running.ask("POST", EMBED, {"input": inputs})
            found = {"hit": hit, "shared": shared, "miss": miss}
            assert await lookups(running) == found
            assert await metric(running, "cache_entries") == entries
        full = await metric(running, "cache_bytes")
        await running.ask("DELETE", "/admin/cache")
        for name in ("cache_entries", "cache_bytes"):
            assert await metric(running, name) == 0
        # What is counted stays counted, or rates would jump.
        assert await lookups(running) == {"hit": 4, "shared": 2, "miss": 3}
        await running.ask("POST", EMBED, {"input": ["a", "b", "c"]})
        assert await metric(running, "cache_bytes") == full
        assert await metric(running, "cache_evictions_total") == 0


async def test_a_full_cache_drops_what_was_not_used_for_longest() -> None:
    # Two vectors of 400 kB fit into a mebibyte, three do not.
    engine = kit.FakeEngine(n_embd=100_000)

    async with kit.running_service(engine, cache_mb=1) as running:
        for evicted, text in enumerate(("a", "b", "a", "c", "b")):
            ask = {"input": text, "dimensions": 1}
            assert (await running.ask("POST", EMBED, ask)).status == 200
            found = await metric(running, "cache_evictions_total")
            assert found == max(0, evicted - 2)
            assert await metric(running, "cache_bytes") <= 1 << 20
        assert await metric(running, "cache_entries") == 2
        assert await lookups(running) == {"hit": 1, "shared": 0, "miss": 4}


async def test_without_a_cache_each_text_is_computed_each_time() -> None:
    engine = kit.FakeEngine()

    async with kit.running_service(engine, cache_mb=0) as running:
        for times in (1, 2, 3):
            await running.ask("POST", EMBED, {"input": "a"})
            assert len(engine.calls) == times
        assert await lookups(running) == {"hit": 0, "shared": 0, "miss": 3}
        cleared = (await running.ask("DELETE", "/admin/cache")).json["cleared"]
        assert cleared == {"entries": 0, "bytes": 0}


# --- pinned workers ---

pinnable = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="threads cannot be pinned here"
)


class Watched(kit.FakeEngine):
    """Notes on which CPUs its threads may run."""

    def __init__(self) -> None:
        super().__init__()
        self.cpus: dict[str, set[int]] = {}  # by the thread's name

    def note(self) -> None:
        self.cpus[threading.current_thread().name] = os.sched_getaffinity(0)

    def encode(self, text: str) -> list[int]:
        self.note()
        return super().encode(text)

    def new_context(
        self, *, needs_long_context: bool = False, per_token: bool = False
    ) -> kit.FakeContext:
        self.note()
        return super().new_context(
            needs_long_context=needs_long_context, per_token=per_token
        )


@pytest.mark.parametrize("wanted", ["4095", "0-4095", "3-1", "99999"])
async def test_cpus_that_are_not_there_are_one_sentence(wanted: str) -> None:
    with pytest.raises(es.StartupError) as caught:
        async with kit.running_service(cpu_affinity=wanted):
            pass
    said = str(caught.value)
    assert f"cpu_affinity = {wanted}" in said
    assert str(es.cpus_in_order()) in said
    assert "\n" not in said


@pytest.mark.parametrize("wanted", ["auto", "0"])
async def test_pinning_where_it_cannot_be_done_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    monkeypatch.setattr(es, "cpus_in_order", list)
    with pytest.raises(es.StartupError, match="not Linux"):
        async with kit.running_service(cpu_affinity=wanted):
            pass


def refusing_to_pin(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(es, "cpus_in_order", lambda: [0])
    monkeypatch.setattr(es, "pin_this_thread", refuse)


# systemd's ~@resources: EPERM; a container's filter may say that there is no such call.
@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.ENOSYS])
async def test_pinning_that_is_forbidden_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refusing_to_pin(monkeypatch, number)
    async with kit.running_service(cpu_affinity="auto") as running:
        said = running.log.getvalue()
        assert "warning --cpu-affinity is not done" in said
        # A worker that tried it nevertheless would not have started.
        assert running.served.pool.settings.elastic


async def test_a_cpu_that_is_gone_when_a_worker_starts_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusing_to_pin(monkeypatch, errno.EINVAL)
    with pytest.raises(es.StartupError, match="pinned: .*Invalid argument"):
        async with kit.running_service(cpu_affinity="auto"):
            pass


@pinnable
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_auto_pins_each_worker_to_cpus_of_its_own_and_nothing_else(
    workers: int, threads: int
) -> None:
    engine, mine, order = Watched(), os.sched_getaffinity(0), es.cpus_in_order()
    groups = [set(order[n : n + threads]) for n in range(0, len(order), threads)]

    async with kit.running_service(
        engine, cpu_affinity="auto", workers=workers, threads=threads
    ) as running:
        assert (await running.ask("POST", EMBED, {"input": "a"})).status == 200
    assert engine.cpus.pop("tokenizer-0") == mine == os.sched_getaffinity(0)
    # With more workers than CPUs the first ones are shared.
    expected = {f"worker-{n}": groups[n % len(groups)] for n in range(workers)}
    assert engine.cpus == expected


@pinnable
async def test_a_list_of_cpus_is_given_out_in_its_order() -> None:
    engine, order = Watched(), es.cpus_in_order()[::-1]

    wanted = ",".join(map(str, order))
    async with kit.running_service(engine, cpu_affinity=wanted, workers=len(order)):
        pass
    assert engine.cpus == {f"worker-{n}": {cpu} for n, cpu in enumerate(order)}


@pinnable
@pytest.mark.parametrize("affinity", ["off", "auto"])
@pytest.mark.parametrize("elastic", [True, False])
async def test_pinned_workers_lend_no_threads(affinity: str, elastic: bool) -> None:
    engine = kit.FakeEngine()

    async with kit.running_service(
        engine, cpu_affinity=affinity, workers=2, elastic=elastic, cache_mb=0
    ) as running:
        for n in range(12):
            await running.ask("POST", EMBED, {"input": f"text {n}"})
        stretched = await metric(running, "batches_stretched_total")
        assert stretched == sum(threads > 1 for threads in engine.threads)
    may_stretch = affinity == "off" and elastic
    assert set(engine.threads) == ({1, 2} if may_stretch else {1})


async def test_exact_calls_have_one_input_and_the_threads_that_are_set() -> None:
    engine = kit.FakeEngine(batch_inputs=1)  # as ENGINE has it then
    async with kit.running_service(
        engine, workers=2, exact=True, cache_mb=0
    ) as running:
        texts = [f"text {n}" for n in range(12)]
        assert (await running.ask("POST", EMBED, {"input": texts})).status == 200
        for text in texts:
            await running.ask("POST", EMBED, {"input": text})
    assert {len(call) for call in engine.calls} == {1}
    assert set(engine.threads) == {1}


# --- files that others may read ---


async def test_keys_that_others_may_read_are_warned_of_at_each_start_and_change(
    tmp_path: Path,
) -> None:
    path = tmp_path / "keys"
    path.write_text("alice key-of-alice-0123456789\n")

    def said(running: kit.RunningService) -> list[str]:
        lines = running.log.getvalue().splitlines()
        return [line for line in lines if "others may read" in line]

    path.chmod(0o644)
    async with kit.running_service(api_key_file=str(path)) as running:
        assert len(said(running)) == 1
        assert " warning " in said(running)[0]
        assert f"path={path} mode=0644" in said(running)[0]
        path.chmod(0o640)
        running.server._renew_files()
        assert len(said(running)) == 1
