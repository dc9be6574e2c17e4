"""Room 13 and 15: phases, loading, draining, probes."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

import embellama_server as es
from tests import kit


def run(check: object) -> None:
    """Run a coroutine."""
    asyncio.run(check)  # type: ignore[arg-type]


def test_every_move_not_in_the_table_is_loud() -> None:
    for phase, event in itertools.product(es.Phase, es.Event):
        if (phase, event) not in es.TRANSITIONS:
            with pytest.raises(KeyError):
                es.TRANSITIONS[phase, event]
    # Every phase but the last has a way to the end, and nothing leads out of it.
    reached = {phase for (phase, _), to in es.TRANSITIONS.items() if to}
    assert reached == set(es.Phase) - {es.Phase.STOPPED}


def test_health_answers_while_the_model_loads_and_ready_says_why_not() -> None:
    async def check() -> None:
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
            assert (await running.ask("GET", "/ready")).json == {"status": "ready"}
            metrics = (await running.ask("GET", "/metrics")).body.decode()
            assert 'embellama_phase{phase="loading"} 0\n' in metrics
            assert 'embellama_phase{phase="ready"} 1\n' in metrics

    run(check())


def test_a_load_that_fails_ends_the_service_with_its_reason() -> None:
    def fail() -> None:
        raise es.StartupError("no such model")

    async def check() -> None:
        with pytest.raises(es.StartupError, match="no such model"):
            async with kit.running_service(before_load=fail):
                pass

    run(check())


def test_stop_while_loading_stops_at_once() -> None:
    async def check() -> None:
        gate = threading.Event()
        async with kit.running_service(
            before_load=lambda: kit.wait(gate), wait_ready=False
        ) as running:
            running.service.stop()
            async with asyncio.timeout(kit.DEADLINE_S):
                assert await running.task == 0
            gate.set()

    run(check())


def test_stop_finishes_accepted_work_and_refuses_new() -> None:
    engine = kit.FakeEngine()
    engine.block()

    async def check() -> None:
        async with kit.running_service(engine) as running:
            ask = {"input": ["a", "b"]}
            accepted = asyncio.create_task(running.ask("POST", "/v1/embeddings", ask))
            await asyncio.to_thread(engine.wait_until_computing)
            running.service.stop()
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

    run(check())


def test_work_that_outlives_the_drain_gets_503_and_the_exit_code_is_0() -> None:
    engine = kit.FakeEngine()
    engine.block()

    async def check() -> None:
        async with kit.running_service(engine, drain_timeout_s=0.1) as running:
            ask = {"input": ["a", "b"]}
            accepted = asyncio.create_task(running.ask("POST", "/v1/embeddings", ask))
            await asyncio.to_thread(engine.wait_until_computing)
            running.service.stop()
            reply = await accepted
            assert (reply.status, reply.error["code"]) == (503, "not_ready")
            engine.release()
            assert await running.task == 0

    run(check())


def test_a_second_stop_does_not_wait_for_the_drain() -> None:
    engine = kit.FakeEngine()
    engine.block()

    async def check() -> None:
        async with kit.running_service(engine, drain_timeout_s=3600) as running:
            ask = {"input": "a"}
            accepted = asyncio.create_task(running.ask("POST", "/v1/embeddings", ask))
            await asyncio.to_thread(engine.wait_until_computing)
            running.service.stop()
            running.service.stop()
            assert (await accepted).status == 503
            engine.release()
            assert await running.task == 0

    run(check())


def test_a_taken_port_is_one_sentence() -> None:
    async def check() -> None:
        async with kit.running_service() as running:
            with pytest.raises(es.StartupError, match=f":{running.port}.*--port"):
                async with kit.running_service(port=running.port):
                    pass

    run(check())


def test_every_metric_is_there_from_the_start_and_counts_afterwards() -> None:
    async def check() -> None:
        async with kit.running_service(workers=2) as running:
            before = (await running.ask("GET", "/metrics")).body.decode()
            for row in es.METRICS:
                assert f"# TYPE {row.name} {row.kind}\n" in before
            assert "embellama_tokens_total 0\n" in before
            assert 'embellama_workers{state="idle"} 2\n' in before
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
            ):
                assert f"\n{line}\n" in text

    run(check())


def test_the_front_page_lists_the_routes() -> None:
    async def check() -> None:
        async with kit.running_service() as running:
            listed = (await running.ask("GET", "/")).json
            assert listed["version"] == es.__version__
            assert "POST /v1/embeddings" in listed["routes"]

    run(check())


def test_workers_that_cannot_get_a_context_end_the_start() -> None:
    class Full(kit.FakeEngine):
        def new_context(self, *, is_lane: bool = False) -> kit.FakeContext:
            raise es.StartupError("no memory for a context")

    async def check() -> None:
        with pytest.raises(es.StartupError, match="no memory"):
            async with kit.running_service(Full()):
                pass

    run(check())
