"""Rooms HISTORY and OPERATION: what workers do, the settings in force, draining."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import embellama_server as es
from tests import kit
from tests.fake_steps import StepEngine, generating
from tests.kit import RunningService

URL = "/v1/embeddings"
CANARY = "c4n4ry-0123456789"


async def workers(running: RunningService) -> list[dict[str, Any]]:
    """What is shown of all workers, once it was found to be as described."""
    reply = await running.ask("GET", "/admin/workers")
    assert reply.status == 200
    jsonschema.validate(reply.json, es.WORKERS_REPLY)
    return list(reply.json["workers"])


# --- workers ---


async def test_a_worker_s_call_its_totals_and_its_last_error_are_shown() -> None:
    engine = kit.FakeEngine()
    async with kit.running_service(engine, workers=2) as running:
        idle = await workers(running)
        assert [(row["worker"], row["state"]) for row in idle] == [
            (0, "idle"),
            (1, "idle"),
        ]
        assert all(row["call"] is None and row["last_error"] is None for row in idle)
        engine.block()
        texts = [f"{CANARY} b", "c d e"]
        asked = asyncio.create_task(running.ask("POST", URL, {"input": texts}))
        await asyncio.to_thread(engine.wait_until_computing)
        busy = [row for row in await workers(running) if row["state"] == "busy"]
        call = busy[0]["call"]
        assert call["inputs"] >= 1 and call["tokens"] >= 4 and call["threads"] >= 1
        assert 0 <= call["age_s"] < kit.DEADLINE_S
        assert 0 < call["deadline_s"] <= running.service.settings.stuck_after_s
        engine.release()
        assert (await asked).status == 200
        rows = await workers(running)
        totals = [row["totals"] for row in rows]
        assert sum(one["inputs"] for one in totals) == 2
        assert sum(one["tokens"] for one in totals) == 9  # two special ones each
        assert sum(one["calls"] for one in totals) in (1, 2)
        assert sum(one["busy_s"] for one in totals) > 0
        assert all(row["contexts_renewed"] == 0 for row in rows)
        body = {"input": f"{kit.BOOM_WORD} {CANARY}"}
        assert (await running.ask("POST", URL, body)).status == 500
        (failed,) = [row for row in await workers(running) if row["last_error"]]
        assert failed["contexts_renewed"] >= 1
        shown = await running.ask("GET", "/admin/workers")
        assert CANARY not in shown.body.decode()


def test_an_error_that_may_hold_a_text_is_shown_by_its_kind() -> None:
    notes = es.WorkerNotes(0.0)
    for error, shown in (
        (es.EngineError("llama_decode returned -3"), "llama_decode returned -3"),
        (es.NoMemory(""), "NoMemory"),
        (ValueError(CANARY), "ValueError"),
    ):
        notes.fail(2.0, error)
        assert (notes.error, notes.failed_at) == (shown, 2.0)


def test_the_busy_share_is_of_the_last_minute_with_what_runs_now() -> None:
    notes = es.WorkerNotes(0.0)
    assert notes.busy_share(0.0) == 0.0
    now = 0.0
    for _ in range(4 * 120):  # two minutes of half a second: all, then a quarter
        share = 0.25 if now >= 60 else 1.0
        if now < 120:
            notes.begin(now)
            notes.end(now + 0.5 * share, 1, 4)
        notes.remember(now + 0.5)
        now += 0.5
        if now in (30, 60):
            assert notes.busy_share(now) == pytest.approx(1.0, abs=0.02)
        if now == 90:
            assert notes.busy_share(now) == pytest.approx(0.62, abs=0.02)
        if now == 120:
            assert notes.busy_share(now) == pytest.approx(0.25, abs=0.02)
    assert notes.busy_share(now) == 0.0
    assert (notes.calls, notes.inputs, notes.tokens) == (240, 240, 960)
    notes.begin(now)
    assert notes.busy_share(now + 20) == pytest.approx(0.25, abs=0.02)


async def test_where_a_worker_is_pinned_is_shown() -> None:
    cpu = min(os.sched_getaffinity(0))
    async with kit.running_service(cpu_affinity=str(cpu), workers=1) as running:
        (row,) = await workers(running)
        assert row["cpus"] == [cpu]


def test_of_a_model_that_generates_the_replies_are_shown() -> None:
    with generating(StepEngine(parallel=1), parallel=1) as running:
        running.engine.block()
        first = running.ask(list(range(10, 30)), 7, client="key a")
        running.engine.wait_until_computing()
        second = running.ask(list(range(30, 35)), 5, n=1, client="b")
        (row,) = es.worker_rows("chat@1", running.queue)
        jsonschema.validate({"workers": [row]}, es.WORKERS_REPLY)
        replies: Any = row["replies"]
        found = [(one["state"], one["client"], one["prompt_tokens"]) for one in replies]
        assert found == [("reading", "key a", 20), ("waiting", "b", 5)]
        assert [one["max_tokens"] for one in replies] == [7, 5]
        call: Any = row["call"]
        assert (row["state"], call["inputs"], call["tokens"]) == ("busy", 1, 20)
        assert call["deadline_s"] > 0
        running.engine.release()
        first.text()
        second.text()
        (row,) = es.worker_rows("chat@1", running.queue)
        assert (row["replies"], row["call"], row["state"]) == ([], None, "idle")
        totals: Any = row["totals"]
        # 20 and 5 of prompts; of each reply all but the last, which need not be read.
        assert totals["tokens"] == 20 + 6 + 5 + 4
        assert totals["calls"] == totals["inputs"] == 7 + 5


# --- settings ---


async def test_every_setting_is_shown_as_it_holds_and_whence(tmp_path: Path) -> None:
    chosen = es.load_settings(
        {"queue_tokens": "1000"}, {"EMBELLAMA_LOG_LEVEL": "debug"}
    )
    async with kit.running_service() as running:
        running.service.given = chosen
        reply = await running.ask("GET", "/admin/config")
        jsonschema.validate(reply.json, es.CONFIG_REPLY)
        rows = {row["name"]: row for row in reply.json["settings"]}
        assert list(rows) == [row.name for row in es.SETTING_ROWS]
        assert rows["queue_tokens"] == {
            "name": "queue_tokens",
            "value": 1000,
            "default": "16777216",
            "source": "flag --queue-tokens",
            "allowed": "1 to 1073741824",
            "reload": "at once",
        }
        assert rows["log_level"]["source"] == "environment EMBELLAMA_LOG_LEVEL"
        assert (rows["port"]["source"], rows["port"]["reload"]) == ("default", "never")


async def test_after_a_reload_the_settings_are_the_new_ones() -> None:
    async with kit.running_service() as running:
        now = running.service.settings
        running.configuration.now = dataclasses.replace(now, queue_tokens=77)
        await running.server.reload()
        reply = await running.ask("GET", "/admin/config")
        rows = {row["name"]: row for row in reply.json["settings"]}
        assert rows["queue_tokens"]["value"] == 77


ROWS = {row.name: row for row in es.SETTING_ROWS}


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("api_key", "", ""),
        ("api_key", CANARY, "(hidden)"),
        ("api_key", f"https://a.example/{CANARY}", "(hidden)"),
        ("otlp_endpoint", "", ""),
        ("otlp_endpoint", "http://127.0.0.1:4318", "http://127.0.0.1:4318/(hidden)"),
        (
            "otlp_endpoint",
            f"https://me:{CANARY}@o.example/{CANARY}?key={CANARY}#{CANARY}",
            "https://o.example/(hidden)",
        ),
        ("otlp_endpoint", f"http://{CANARY}@[::1]:4318", "http://[::1]:4318/(hidden)"),
        ("otlp_endpoint", f"https://{CANARY}@[::1", "(hidden)"),
        ("otlp_endpoint", f"https://o.example:{CANARY}/", "(hidden)"),
        ("otlp_endpoint", CANARY, "(hidden)"),
        ("cors_origin", (f"https://me:{CANARY}@a.example", "*"), ["https://a.example", "*"]),
        ("cors_origin", (f"x://{CANARY}@@a", "null"), ["x://a", "null"]),
        ("model_path", "/a@b/m.gguf", "/a@b/m.gguf"),
        ("queue_tokens", 5, 5),
        ("gpu", True, True),
        ("rate_limit", 0.5, 0.5),
    ],
)  # fmt: skip
def test_what_is_declared_secret_is_hidden_and_who_stands_in_a_url(
    name: str, value: Any, shown: Any
) -> None:
    assert es.shown_value(ROWS[name], value) == shown


async def test_no_secret_of_any_setting_is_in_any_reply_to_an_administrator(
    tmp_path: Path,
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"operator {CANARY}-of-file admin\n")
    keys.chmod(0o600)
    flags = {
        "api_key": f"{CANARY}-flag",
        "api_key_file": str(keys),
        "otlp_endpoint": f"http://me:{CANARY}@127.0.0.1:9/{CANARY}?k={CANARY}",
        "cors_origin": [f"https://me:{CANARY}@a.example"],
    }
    secret = [row.name for row in es.SETTING_ROWS if row.secret]
    assert set(secret) <= set(flags), "a new setting needs its canary here"
    given = es.load_settings(flags, {})
    key = {"authorization": f"Bearer {CANARY}-of-file"}
    changes = {name: getattr(given.settings, name) for name in flags}
    async with kit.running_service(**kit.all_routes(), **changes) as running:
        running.service.given = given
        for route in es.ROUTES:
            if route.access in ("admin", "metrics", "docs"):
                reply = await running.ask_route(route, **key)
                assert reply.status == 200, route.path
                assert CANARY not in reply.body.decode(), route.path
                assert CANARY not in str(reply.headers)
    assert CANARY not in running.log.getvalue()


# --- draining ---


async def drained(
    running: RunningService, body: Any = None, status: int = 200
) -> dict[str, Any]:
    """The state of draining, after what is asked."""
    method = "GET" if body is None else "POST"
    reply = await running.ask(method, "/admin/drain", body)
    assert reply.status == status, reply.body
    if status == 200:
        jsonschema.validate(reply.json, es.DRAIN_REPLY)
    return dict(reply.json)


async def metric(running: RunningService) -> int:
    """What Prometheus is told of that."""
    text = (await running.ask("GET", "/metrics")).body.decode()
    return int(text.partition("\nembellama_draining ")[2].partition("\n")[0])


async def raw_headers(running: RunningService) -> str:
    """The head of the reply to a client that would go on."""
    reader, writer = await asyncio.open_connection(running.host, running.port)
    writer.write(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    async with asyncio.timeout(kit.DEADLINE_S):
        head = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    return head.decode().lower()


class Told(es.Notifier):
    """Keeps what it was told."""

    def __init__(self) -> None:
        super().__init__(None, {})
        self.names: list[str] = []

    def tell(self, **lines: object) -> None:
        self.names += [name for name in lines if name not in ("WATCHDOG", "STATUS")]


async def test_a_drained_server_does_all_it_is_asked_and_may_go_back() -> None:
    told = Told()
    async with kit.running_service(notifier=told) as running:
        before = await drained(running)
        assert before == {
            "phase": "ready",
            "is_withdrawn": False,
            "in_flight": 0,
            "connections": 1,
            "seconds_left": None,
        }
        assert await metric(running) == 0
        for _ in range(2):  # twice is no mistake
            assert (await drained(running, {}))["is_withdrawn"]
        assert await metric(running) == 1
        ready = await running.ask("GET", "/ready")
        assert ready.status == 503 and "drain" in ready.body.decode()
        assert (await running.ask("GET", "/health")).status == 200
        assert (await running.ask("POST", URL, {"input": "a"})).status == 200
        assert "connection: close" in await raw_headers(running)
        assert (await drained(running))["phase"] == "ready"
        for _ in range(2):
            assert not (await drained(running, {"off": True}))["is_withdrawn"]
        assert (await running.ask("GET", "/ready")).status == 200
        assert await metric(running) == 0
        assert "keep-alive: timeout" in await raw_headers(running)
        assert "STOPPING" not in told.names
    assert told.names.count("STOPPING") == 1


async def test_what_is_in_flight_is_counted_without_who_asks() -> None:
    engine = kit.FakeEngine()
    async with kit.running_service(engine) as running:
        engine.block()
        asked = asyncio.create_task(running.ask("POST", URL, {"input": "a"}))
        await asyncio.to_thread(engine.wait_until_computing)
        assert (await drained(running, {}))["in_flight"] == 1
        engine.release()
        assert (await asked).status == 200
        assert (await drained(running))["in_flight"] == 0


async def test_stop_is_what_sigterm_does_and_cannot_be_undone() -> None:
    told = Told()
    limits: dict[str, Any] = {"drain_grace_s": 3600, "drain_timeout_s": 10}
    async with kit.running_service(notifier=told, **limits) as running:
        await drained(running, {})
        state = await drained(running, {"stop": True})
        assert state["phase"] == "leaving"
        assert 3600 < state["seconds_left"] <= 3610
        assert await metric(running) == 1
        await drained(running, {"off": True}, 503)
        assert (await running.ask("POST", URL, {"input": "a"})).status == 200
        await drained(running, {"stop": True})  # as a second signal: now
        async with asyncio.timeout(kit.DEADLINE_S):
            assert await asyncio.shield(running.task) == 0
    assert told.names[-1] == "STOPPING"


@pytest.mark.parametrize("body", [{"off": True, "stop": True}, {"off": 3}, [], "x"])
async def test_what_is_no_order_changes_nothing(body: Any) -> None:
    async with kit.running_service() as running:
        reply = await running.ask("POST", "/admin/drain", body)
        assert reply.status == 400
        assert not (await drained(running))["is_withdrawn"]


ORDERS = [
    route
    for route in es.ROUTES
    if route.path.startswith("/admin/") and route.form is not None
]


@pytest.mark.parametrize("route", ORDERS, ids=lambda route: route.path)
async def test_a_misspelled_order_is_refused_with_the_words_there_are(
    route: es.Route,
) -> None:
    async with kit.running_service() as running:
        body = {"of": True, "y" * 10_000: None}
        reply = await running.ask("POST", route.path, body)
        assert reply.status == 400
        assert re.search(r"\bof is not known here: \w+.* are", reply.body.decode())
        del body["of"]
        reply = await running.ask("POST", route.path, body)
        assert reply.status == 400 and len(reply.body) < 1000
        assert not (await drained(running))["is_withdrawn"]
    assert route.form and es.schema_of(route.form)["additionalProperties"] is False


async def test_a_server_that_loads_can_be_withdrawn_before_it_is_ready() -> None:
    may_load = threading.Event()

    async with kit.running_service(
        before_load=lambda: kit.wait(may_load), wait_ready=False
    ) as running:
        async with asyncio.timeout(kit.DEADLINE_S):
            while (await running.ask("GET", "/health")).status != 200:
                await asyncio.sleep(0.01)
        assert (await drained(running, {}))["phase"] == "loading"
        may_load.set()
        async with asyncio.timeout(kit.DEADLINE_S):
            await running.log.settled.wait()
        assert (await running.ask("GET", "/ready")).status == 503
        await drained(running, {"off": True})
        assert (await running.ask("GET", "/ready")).status == 200
