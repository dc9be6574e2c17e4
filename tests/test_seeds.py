"""Room SEEDS, and what other rooms say in the words of infer-server and LMServ."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import urllib.request
from collections.abc import AsyncIterator, Iterator
from typing import Any, Self

import pytest

import embellama_server as es
from tests import chat_models, kit
from tests.kit import RunningService


@pytest.mark.parametrize("path", ["/health", "/ping"])
async def test_health_has_the_fields_of_infer_server_beside_ours(path: str) -> None:
    async with kit.running_service() as running:
        shown = (await running.ask("GET", path)).json
        assert shown == {
            "status": "ok",
            "mode": "api_server",
            "version": es.__version__,
        }


async def test_ready_has_the_two_words_of_infer_server_either_way() -> None:
    gate = threading.Event()
    async with kit.running_service(
        before_load=lambda: kit.wait(gate), wait_ready=False
    ) as running:
        loading = await running.ask("GET", "/ready")
        assert loading.status == 503
        assert loading.error["code"] == "not_ready"
        said = {key: loading.json[key] for key in ("ready", "engine_connected")}
        assert said == {"ready": False, "engine_connected": False}
        gate.set()
        await running.log.settled.wait()
        ready = await running.ask("GET", "/ready")
        assert ready.status == 200
        both = {"ready": True, "engine_connected": True}
        assert ready.json == {"status": "ready"} | both


async def test_health_as_text_counts_idle_workers_as_lmserv_does() -> None:
    engine = kit.FakeEngine()
    engine.block()
    async with kit.running_service(engine, workers=2) as running:
        idle = await running.ask("GET", "/health", accept="text/plain")
        assert idle.body.decode() == "ok \N{EN DASH} workers idle: 2\n"
        assert idle.headers["content-type"] == "text/plain; charset=utf-8"
        work = asyncio.create_task(running.ask("POST", "/embed", {"inputs": "a"}))
        await asyncio.to_thread(engine.wait_until_computing)
        busy = await running.ask("GET", "/health", accept="text/plain")
        assert busy.body.decode() == "ok \N{EN DASH} workers idle: 1\n"
        engine.release()
        assert (await work).status == 200


async def test_health_as_text_is_there_before_any_model_is() -> None:
    gate = threading.Event()
    async with kit.running_service(
        before_load=lambda: kit.wait(gate), wait_ready=False
    ) as running:
        reply = await running.ask("GET", "/health", accept="text/plain")
        assert reply.body.decode() == "ok \N{EN DASH} workers idle: 0\n"
        gate.set()


async def test_the_root_says_lmserv_s_words() -> None:
    async with kit.running_service() as running:
        assert (await running.ask("GET", "/")).json["message"] == "LMServ is running."
        text = (await running.ask("GET", "/", accept="text/plain")).body.decode()
        assert "LMServ is running." in text.splitlines()


async def test_what_is_administered_says_what_kind_of_model_it_is() -> None:
    async with kit.running_service(**kit.all_routes()) as running:
        shown = (await running.ask("GET", "/admin/models")).json["models"]
        kinds = {state["name"]: state["kind"] for state in shown}
        assert kinds == {"fake": "embed", kit.RANKER: "rank", kit.CHATTER: "generate"}


def test_a_stray_key_is_warned_of_and_locks_nobody_out() -> None:
    with kit.started(environment={"API_KEY": "sk-stray"}) as server:
        line = server.wait_for_log("setting ignored")
        assert "EMBELLAMA_API_KEY" in line
        assert asked(server, "/embed", {"inputs": "a"}, **{"X-API-Key": ""})
        assert server.stop() == 0
    assert "sk-stray" not in "".join(server.log)


# --- LMServ's /chat ---


@contextlib.asynccontextmanager
async def chatting(**changes: Any) -> AsyncIterator[tuple[RunningService, kit.Speaker]]:
    """A service whose only model says again what it is told."""
    engine = kit.FakeChatEngine(cells=1024, max_input_tokens=1024)
    async with kit.running_service(engine, **changes) as running:
        yield running, engine.speaker


class Chat:
    """A reply to /chat that is read chunk by chunk, on a connection of its own."""

    def __init__(self, running: RunningService, prompt: str) -> None:
        self._running = running
        self._body = es.json_codec().dumps({"prompt": prompt})

    async def __aenter__(self) -> Self:
        running = self._running
        self.reader, self.writer = await asyncio.open_connection(
            running.host, running.port
        )
        head = (
            f"POST /chat HTTP/1.1\r\nhost: h\r\ncontent-length: {len(self._body)}\r\n"
        )
        self.writer.write(head.encode() + b"\r\n" + self._body)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def until(self, end: str) -> str:
        """What comes before that."""
        async with asyncio.timeout(kit.DEADLINE_S):
            raw = await self.reader.readuntil(end.encode())
        return raw.decode().removesuffix(end)

    async def chunk(self) -> str:
        """The next chunk; empty at the end."""
        await self.until("\r\n")  # its length
        return await self.until("\r\n")


async def test_lmserv_s_own_request_is_answered_with_plain_text() -> None:
    asked = {
        "prompt": "Hello, world!",
        "system_prompt": "You are a helpful assistant.",
        "max_tokens": 64,
        "temperature": 0.5,
        "top_p": 0.25,
        "repeat_penalty": 1.5,
    }
    async with chatting(api_key="secret123") as (running, speaker):
        reply = await running.ask("POST", "/chat", asked, x_api_key="secret123")
        assert reply.status == 200
        assert reply.headers["content-type"] == "text/plain; charset=utf-8"
        assert reply.headers["x-accel-buffering"] == "no"
        assert reply.body == b"You are a helpful assistant. Hello, world!"
        (generation,) = speaker.generations
        assert generation.request.max_tokens == 64
        sampling = generation.request.sampling
        assert (sampling.temperature, sampling.top_p) == (0.5, 0.25)
        assert sampling.repeat_penalty == 1.5


async def test_what_lmserv_s_request_leaves_out_is_as_it_says() -> None:
    async with chatting() as (running, speaker):
        assert (await running.ask("POST", "/chat", {"prompt": "a"})).body == b"a"
        (generation,) = speaker.generations
        sampling = generation.request.sampling
        assert generation.request.max_tokens == 256
        assert (sampling.temperature, sampling.top_p) == (0.8, 0.9)
        assert sampling.repeat_penalty == 1.1
        assert [role for role, _ in said(speaker)] == ["user"]


def said(speaker: kit.Speaker) -> list[tuple[object, object]]:
    """Who said what, as the template was told last."""
    messages, _ = speaker.engine.template.asked[-1]
    return [(message["role"], message["content"]) for message in messages]


async def test_a_system_prompt_comes_before_the_user_s() -> None:
    async with chatting() as (running, speaker):
        await running.ask("POST", "/chat", {"prompt": "a", "system_prompt": "b"})
        assert said(speaker) == [("system", "b"), ("user", "a")]


async def test_text_is_sent_as_it_comes() -> None:
    async with chatting() as (running, speaker):
        speaker.pause()
        async with Chat(running, "one two three") as chat:
            await speaker.heard()
            speaker.step()
            head = await chat.until("\r\n\r\n")
            assert "transfer-encoding: chunked" in head
            assert await chat.chunk() == "one"
            for word in (" two", " three"):
                speaker.step()
                assert await chat.chunk() == word
            speaker.step()
            assert await chat.chunk() == ""


async def test_a_failure_in_the_middle_breaks_the_connection() -> None:
    async with chatting() as (running, speaker):
        speaker.pause()
        async with Chat(running, "one two") as chat:
            await speaker.heard()
            speaker.step()
            await chat.until("\r\n\r\n")
            assert await chat.chunk() == "one"
            speaker.fail(es.EngineFailed("broken"))
            rest = b""
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(kit.DEADLINE_S):
                    rest = await chat.reader.read()
            assert not rest.endswith(es.LAST_CHUNK)
            assert b"broken" not in rest  # plain text has no place for it


async def test_a_failure_before_the_first_text_has_a_status() -> None:
    async with chatting() as (running, speaker):
        speaker.pause()
        asked = asyncio.create_task(running.ask("POST", "/chat", {"prompt": "a"}))
        await speaker.heard()
        speaker.fail(es.EngineFailed("broken"))
        reply = await asked
        assert (reply.status, reply.json["detail"]) == (500, "broken")
        assert reply.error["code"] == "engine_failed"


async def test_a_client_that_leaves_ends_its_reply() -> None:
    async with chatting() as (running, speaker):
        speaker.pause()
        async with Chat(running, "one two"):
            generation = await speaker.heard()
        async with asyncio.timeout(kit.DEADLINE_S):
            while not generation.is_over:
                await asyncio.sleep(0)
        assert speaker.cancelled == [generation]


@pytest.mark.parametrize("fields", [{}, {"x_api_key": "another"}])
async def test_a_bad_key_is_called_so_as_lmserv_does(fields: dict[str, str]) -> None:
    async with chatting(api_key="secret123") as (running, _):
        reply = await running.ask("POST", "/chat", {"prompt": "a"}, **fields)
        assert (reply.status, reply.json["detail"]) == (401, "Bad API key")
        assert reply.error["code"] == "invalid_api_key"


async def test_a_server_that_loads_says_so_as_lmserv_does() -> None:
    gate = threading.Event()
    loading = {"before_load": lambda: kit.wait(gate), "wait_ready": False}
    async with chatting(**loading) as (running, _):
        reply = await running.ask("POST", "/chat", {"prompt": "a"})
        assert (reply.status, reply.json["detail"]) == (503, "Server is starting up")
        assert reply.headers["retry-after"] == "1"
        gate.set()


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": ""},
        {"prompt": ["a"]},
        {"prompt": "a", "max_tokens": 0},
        {"prompt": "a", "temperature": -1},
        {"prompt": "a", "top_p": 2},
        {"prompt": "a", "repeat_penalty": 0},
    ],
)
async def test_what_lmserv_s_form_cannot_hold_is_a_400_with_a_detail(
    body: dict[str, Any],
) -> None:
    async with chatting() as (running, speaker):
        reply = await running.ask("POST", "/chat", body)
        assert reply.status == 400
        assert reply.json["detail"] == reply.error["message"]
        assert not speaker.generations


async def test_a_model_that_embeds_does_not_chat() -> None:
    async with kit.running_service() as running:
        reply = await running.ask("POST", "/chat", {"prompt": "a"})
        assert (reply.status, reply.error["code"]) == (400, "wrong_kind_of_model")


# --- infer-server's /v1/metrics ---

# As its document shows them.
SHAPE = {
    "cpu": {"utilization_percent": 45.2, "core_count": 8},
    "memory": {"used_gb": 8.5, "total_gb": 16.0, "utilization_percent": 53.1},
    "gpu": {
        "utilization_percent": 67.3,
        "memory_used_gb": 12.2,
        "memory_total_gb": 24.0,
        "temperature_c": 72,
    },
    "engine": {
        "total_requests": 1234,
        "completed_requests": 1200,
        "failed_requests": 34,
        "total_tokens_generated": 1234567,
        "avg_queue_time_ms": 12.5,
        "avg_prefill_time_ms": 45.2,
        "avg_decode_time_ms": 123.8,
        "queue_size": 3,
        "queue_capacity": 100,
        "concurrent_requests": 2,
    },
    "cache": {
        "hit_rate": 0.85,
        "hits": 850,
        "misses": 150,
        "evictable_size": 5000,
        "protected_size": 3000,
        "total_cached": 8000,
        "total_capacity": 10000,
        "evictions": 25,
        "node_count": 42,
    },
}


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two readings of the processors' times."""
    monkeypatch.setattr(es, "_CPU_SAMPLE_S", 0.0)


async def figures(running: RunningService) -> Any:
    """What /v1/metrics says."""
    reply = await running.ask("GET", "/v1/metrics")
    assert reply.status == 200
    return reply.json


async def test_infer_server_s_metrics_have_its_shape() -> None:
    async with kit.running_service() as running:
        shown = await figures(running)
        assert shown.pop("gpu") is None
        own = shown.pop("embellama")  # under one further key, which its clients ignore
        assert own == {"averages_over_s": 60, "backlog_s": {"fake@1": 0}}
        names = {part: list(fields) for part, fields in shown.items()}
        assert names == {p: list(f) for p, f in SHAPE.items() if p != "gpu"}
        for part, fields in shown.items():
            for name, value in fields.items():
                is_whole = isinstance(SHAPE[part][name], int)
                assert type(value) in ((int,) if is_whole else (int, float)), name


async def test_the_machine_s_figures_are_those_of_the_tightest_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readings = iter([[(10.0, 100.0), (5.0, 50.0)], [(11.0, 104.0), (8.0, 54.0)]])
    monkeypatch.setattr(es, "cpu_times_s", lambda: next(readings))
    monkeypatch.setattr(es, "usable_cores", lambda: 8)
    gib = 1 << 30
    limits = [(0, 0), (64 * gib, 30 * gib), (16 * gib, 7 * gib + gib // 2)]
    monkeypatch.setattr(es, "memory_bytes", lambda: limits)
    async with kit.running_service(workers=1) as running:
        shown = await figures(running)
        assert shown["cpu"] == {"utilization_percent": 75.0, "core_count": 8}
        assert shown["memory"] == SHAPE["memory"]


async def test_a_machine_that_tells_nothing_has_figures_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(es, "cpu_times_s", list)
    monkeypatch.setattr(es, "usable_cores", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (1.0, 9.0, 9.0))
    monkeypatch.setattr(es, "memory_bytes", list)
    async with kit.running_service(workers=1) as running:
        shown = await figures(running)
        assert shown["cpu"]["utilization_percent"] == 25.0
        assert set(shown["memory"].values()) == {0.0}


class Nvml:
    """NVIDIA's library, as far as it is used; ``fails`` names a call that does."""

    def __init__(self, fails: str = "") -> None:
        self._fails = fails

    def __getattr__(self, name: str) -> Any:
        return lambda *given: self._call(name, *given)

    def _call(self, name: str, device: Any, *into: Any) -> int:
        if name == self._fails:
            return 15  # NVML_ERROR_GPU_IS_LOST
        if name == "nvmlDeviceGetUtilizationRates":
            into[0][:] = 67, 50
        elif name == "nvmlDeviceGetMemoryInfo":
            gib = 1 << 30
            into[0][:] = 24 * gib, 12 * gib, 12 * gib
        elif name == "nvmlDeviceGetTemperature":
            into[1]._obj.value = 72
        else:
            assert name == "nvmlDeviceGetHandleByIndex_v2"
            into[0]._obj.value = 1
        return 0


NVML_CALLS = (
    "nvmlDeviceGetHandleByIndex_v2",
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetTemperature",
)


async def test_a_gpu_has_figures_where_a_model_is_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(es, "_nvml", Nvml)
    async with kit.running_service(gpu=True) as running:
        assert (await figures(running))["gpu"] == {
            "utilization_percent": 67.0,
            "memory_used_gb": 12.0,
            "memory_total_gb": 24.0,
            "temperature_c": 72,
        }
    async with kit.running_service() as running:
        assert (await figures(running))["gpu"] is None


@pytest.mark.parametrize("call", ["", *NVML_CALLS])
async def test_a_gpu_that_cannot_be_asked_is_null(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(es, "_nvml", lambda: Nvml(fails=call) if call else None)
    async with kit.running_service(gpu_layers=-1) as running:
        assert (await figures(running))["gpu"] is None


async def test_requests_to_embed_are_counted_in_the_engine_s_figures() -> None:
    engine = kit.FakeEngine()
    async with kit.running_service(engine, workers=1, queue_size=100) as running:
        for text, status in (("a", 200), ("b", 200), (kit.BOOM_WORD, 500)):
            ask = await running.ask("POST", "/v1/embeddings", {"input": text})
            assert ask.status == status
        engine.block()
        asks = [
            asyncio.create_task(running.ask("POST", "/v1/embeddings", {"input": text}))
            for text in ("c", "d", "e")
        ]
        queue = running.served.pool.queue
        while (queue.requests, queue.running) != (len(asks), 1):
            await asyncio.sleep(0)
        shown = (await figures(running))["engine"]
        engine.release()
        await asyncio.gather(*asks)
    counted = ("total_requests", "completed_requests", "failed_requests")
    assert [shown[name] for name in counted] == [6, 2, 1]
    assert (shown["concurrent_requests"], shown["queue_size"]) == (1, 2)
    assert shown["queue_capacity"] == 100
    assert shown["avg_queue_time_ms"] > 0
    assert shown["total_tokens_generated"] == 0


async def test_replies_are_counted_once_they_are_whole() -> None:
    async with chatting() as (running, speaker):
        assert (await running.ask("POST", "/chat", {"prompt": "a b"})).body == b"a b"
        speaker.pause()
        async with Chat(running, "one two") as chat:
            await speaker.heard(2)
            speaker.step()
            await chat.until("\r\n\r\n")
            speaker.fail(es.EngineFailed("broken"))
            with contextlib.suppress(ConnectionError):
                await chat.reader.read()
        async with Chat(running, "three"):
            await speaker.heard(3)
        async with asyncio.timeout(kit.DEADLINE_S):
            while running.served.holds:
                await asyncio.sleep(0)
        shown = (await figures(running))["engine"]
        counted = ("total_requests", "completed_requests", "failed_requests")
        assert [shown[name] for name in counted] == [2, 1, 1]
        text = (await running.ask("GET", "/metrics")).body.decode()
        for name in ("first_token", "prefill", "decode", "inter_token"):
            assert f"embellama_{name}_seconds_count " in text


# --- with a model that is real, if tiny ---

LONG_PROMPT = " ".join(f"word{n}" for n in range(40))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Server]:
    """The program with a tiny model that generates, and an environment of LMServ's."""
    path = chat_models.tiny_llama(tmp_path_factory.mktemp("tiny"))
    environment = {"LLM_MODEL_PATH": str(path), "LLM_WORKERS": "2"}
    environment |= {"API_KEY": "secret123", "LOG_LEVEL": "INFO"}
    with kit.started(
        module=("embellama_server.py",), environment=environment
    ) as server:
        yield server


def asked(server: kit.Server, path: str, body: Any = None, **fields: str) -> bytes:
    """The body of a reply."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}{path}", data)
    for name, value in ({"X-API-Key": "secret123"} | fields).items():
        request.add_header(name, value)
    with urllib.request.urlopen(request, timeout=kit.DEADLINE_S) as reply:
        return bytes(reply.read())


def test_a_tiny_model_chats_and_its_figures_say_so(tiny: kit.Server) -> None:
    before = json.loads(asked(tiny, "/v1/metrics"))
    body = {"prompt": LONG_PROMPT, "max_tokens": 8, "temperature": 0}
    texts = {asked(tiny, "/chat", body).decode() for _ in range(2)}
    assert len(texts) == 1 and texts != {""}
    after = json.loads(asked(tiny, "/v1/metrics"))
    gained = {
        name: after["engine"][name] - before["engine"][name] for name in after["engine"]
    }
    assert (gained["total_requests"], gained["completed_requests"]) == (2, 2)
    assert gained["total_tokens_generated"] == 16
    assert after["engine"]["avg_prefill_time_ms"] > 0
    assert after["engine"]["avg_decode_time_ms"] > 0
    cache = after["cache"]
    assert cache["hits"] >= 1 and cache["node_count"] >= 1
    assert cache["protected_size"] == 0
    assert cache["evictable_size"] == cache["total_cached"] > 100
    assert cache["total_capacity"] >= cache["total_cached"]


def test_a_tiny_model_s_places_are_lmserv_s_workers(tiny: kit.Server) -> None:
    text = asked(tiny, "/health", accept="text/plain").decode()
    assert text == "ok \N{EN DASH} workers idle: 2\n"


def test_counters_of_prompts_do_not_fall_when_a_model_is_unloaded(
    tiny: kit.Server,
) -> None:
    asked(tiny, "/chat", {"prompt": LONG_PROMPT, "max_tokens": 2})
    before = json.loads(asked(tiny, "/v1/metrics"))["cache"]
    models = json.loads(asked(tiny, "/admin/models"))["models"]
    assert [model["kind"] for model in models] == ["generate"]
    name = {"model": models[0]["model"]}
    asked(tiny, "/admin/models/unload", name, **{"content-type": "application/json"})
    after = json.loads(asked(tiny, "/v1/metrics"))["cache"]
    assert (after["hits"], after["misses"]) == (before["hits"], before["misses"])
    asked(tiny, "/admin/models/load", name, **{"content-type": "application/json"})
