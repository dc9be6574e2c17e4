"""Faults and changes in a running server: what clients see, and what is left afterwards.

Rooms SERVER, SUPERVISOR and CONTEXTS. tests/faults.py has the faults that are injected
under load, and prints their figures; here they are judged.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embellama_server as es
from tests import faults, kit
from tests.faults import EMBED, Client, supervised, until

SCRIPT = str(kit.ROOT / "embellama_server.py")


async def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait until it holds; for what no event tells."""
    async with asyncio.timeout(kit.DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)
    assert condition(), what


async def logged(running: kit.RunningService, text: str, times: int = 1) -> None:
    """Wait until this was logged so often."""
    await eventually(lambda: running.log.getvalue().count(text) >= times, text)


async def asking(
    running: kit.RunningService, engine: kit.FakeEngine, text: str = "a"
) -> asyncio.Task[kit.Reply]:
    """A request that a worker of this engine is computing."""
    task = asyncio.create_task(running.ask("POST", EMBED, {"input": text}))
    await asyncio.to_thread(engine.wait_until_computing)
    return task


async def warm(running: kit.RunningService, engine: kit.FakeEngine) -> None:
    """One call, so that it is known how long one takes; the next ones wait."""
    assert (await running.ask("POST", EMBED, {"input": "warm"})).status == 200
    await asyncio.to_thread(engine.wait_until_computing)
    engine.block()


# --- under load, in figures ---


@pytest.mark.slow
@pytest.mark.parametrize("name", faults.FAULTS)
def test_a_fault_costs_no_more_than_what_was_in_flight(name: str) -> None:
    figures = faults.FAULTS[name]()
    assert figures.is_fine, figures
    assert figures.right > 20


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_real_program_is_served_by_its_next_child(
    default_model: Path, number: int
) -> None:
    lengths: set[float] = set()

    def is_vector(vector: Any) -> bool:
        lengths.add(round(float(np.linalg.norm(vector)), 3))
        return len(vector) == 384

    flags = ("--model-path", str(default_model), "--workers", "2")
    with kit.started(*flags, module=(SCRIPT,)) as server:
        load = faults.Load(server.url, is_right=is_vector)
        with load:
            for times in (1, 2):
                load.wait_for(2 * load.clients)
                os.kill(server.child, number)
                server.wait_for_log(" ready ", times + 1)
            load.wait_for(2 * load.clients)
        assert server.stop() == 0
    seen = load.outcomes
    assert (seen["refused"], seen["wrong"], seen["hung"]) == (0, 0, 0)
    assert seen["lost"] <= 2 * load.clients
    assert lengths == {1.0}


# --- reload ---


@pytest.fixture(autouse=True)
def a_model_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reload looks at before it loads a model beside another."""
    folder = tmp_path / "where it runs"
    folder.mkdir()
    kit.fake_gguf(folder)
    monkeypatch.chdir(folder)


def changed(running: kit.RunningService, **changes: Any) -> None:
    """What the configuration says from now on."""
    base = running.service.settings
    names = {row.name: getattr(base, row.name) for row in es.SETTING_ROWS}
    running.configuration.now = es.Settings(**(names | changes))


NOTHING: dict[str, object] = {"changed": [], "model": "kept", "loaded": []}


async def test_a_reload_that_changes_nothing_says_so() -> None:
    async with kit.running_service() as running:
        reply = await running.ask("POST", "/admin/reload")
        assert (reply.status, reply.json) == (200, NOTHING)


async def test_another_name_for_a_model_takes_no_load() -> None:
    async with kit.running_service() as running:
        served = running.served
        changed(running, model_alias=("other",), prompt=("query=q: ",))
        reply = await running.ask("POST", "/admin/reload")
        names = ["model_alias", "prompt"]
        said = {"changed": names, "model": "kept", "loaded": []}
        assert (reply.status, reply.json) == (200, said)
        assert running.served is served
        asked = {"input": "a", "model": "other", "prompt_name": "query"}
        found = await running.ask("POST", EMBED, asked)
        assert found.status == 200
        vector = found.json["data"][0]["embedding"]
        assert np.allclose(vector, faults.expected("q: a"), atol=1e-6)


async def test_limits_log_level_and_keys_count_at_once() -> None:
    async with kit.running_service() as running:
        big = {"input": "word " * 300}
        assert (await running.ask("POST", EMBED, big)).status == 400  # too long
        key = "a-key-of-some-length"
        changed(running, max_body_bytes=1024, log_level="error", api_key=key)
        reply = await running.ask("POST", "/admin/reload")
        names = ["max_body_bytes", "api_key", "log_level"]
        assert (reply.json["changed"], reply.json["model"]) == (names, "kept")
        said = len(running.log.getvalue())
        small = {"input": "a"}
        assert (await running.ask("POST", EMBED, small)).status == 401
        bearer = f"Bearer {key}"
        reply = await running.ask("POST", EMBED, small, authorization=bearer)
        assert reply.status == 200
        reply = await running.ask("POST", EMBED, big, authorization=bearer)
        assert reply.status == 413
        assert len(running.log.getvalue()) == said  # all that was info


async def test_a_smaller_queue_counts_at_once_and_what_is_in_it_stays() -> None:
    engine = kit.FakeEngine()
    engine.block()
    async with kit.running_service(engine) as running:
        first = await asking(running, engine)
        changed(running, queue_size=1)
        assert (await running.ask("POST", "/admin/reload")).status == 200
        refused = await running.ask("POST", EMBED, {"input": "b"})
        assert refused.status == 503
        engine.release()
        assert (await first).status == 200


async def test_another_model_takes_what_is_new_and_the_old_one_ends_what_it_has() -> (
    None
):
    old, new = kit.FakeEngine(), kit.FakeEngine(n_embd=6)
    old.block()
    async with kit.running_service(old, later=[new]) as running:
        first = await asking(running, old)
        changed(running, cache_mb=1)
        reply = await running.ask("POST", "/admin/reload")
        said = {"changed": ["cache_mb"], "model": "replaced", "loaded": ["fake@1"]}
        assert reply.json == said
        second = await running.ask("POST", EMBED, {"input": "a"})
        assert len(second.json["data"][0]["embedding"]) == 6
        assert not old.is_closed
        old.release()
        reply = await first
        found = reply.json["data"][0]["embedding"]
        assert np.allclose(found, faults.expected("a"), atol=1e-6)
        await eventually(lambda: old.is_closed, "the old engine's end")
        assert (old.contexts_open, new.contexts_open) == (0, 1)
    assert new.is_closed


async def test_a_stop_ends_the_old_model_as_well() -> None:
    old, new = kit.FakeEngine(), kit.FakeEngine(n_embd=6)
    old.block()
    async with kit.running_service(old, later=[new]) as running:
        first = await asking(running, old)
        changed(running, cache_mb=1)
        assert (await running.ask("POST", "/admin/reload")).status == 200
        running.server.stop()
        assert not running.task.done()
        old.release()
        assert (await first).status == 200
        assert await running.task == 0
    assert old.is_closed
    assert new.is_closed


@pytest.mark.slow
async def test_a_call_that_hangs_in_the_old_model_is_ended_as_any_other() -> None:
    old = kit.FakeEngine()
    async with kit.running_service(
        old, later=[kit.FakeEngine()], stuck_after_s=0.1
    ) as running:
        await warm(running, old)
        first = await asking(running, old)
        changed(running, cache_mb=1)
        assert (await running.ask("POST", "/admin/reload")).status == 200
        await asyncio.wait((first,), timeout=5)
        assert first.done()
        assert (await first).status == 500


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"port": 1}, "a change of port takes a restart"),
        (
            {"watchdog_s": 9.0, "uds": "x"},
            "a change of uds, watchdog_s takes a restart",
        ),
        ({"api_key": "short"}, "api_key must be 8"),
        ({"api_key_file": "/nonexistent"}, "/nonexistent cannot be read"),
        ({"signed_requests": "require"}, "needs --api-key-file"),
        ({"cpu_affinity": "4095"}, "cpu_affinity = 4095"),
    ],
)
async def test_a_configuration_that_is_no_use_changes_nothing(
    changes: dict[str, Any], said: str
) -> None:
    async with kit.running_service() as running:
        before = running.service.settings
        served = running.served
        changed(running, queue_size=7, **changes)
        reply = await running.ask("POST", "/admin/reload")
        assert (reply.status, reply.error["code"]) == (409, "reload_refused")
        assert said in reply.error["message"]
        assert running.service.settings is before
        assert running.served is served
        await logged(running, "not reloaded, nothing has changed")
        assert said in running.log.getvalue()
        assert (await running.ask("POST", EMBED, {"input": "a"})).status == 200


@pytest.mark.parametrize(
    "error",
    [
        es.StartupError("no such model"),
        es.EngineError("out of memory"),
        es.BadSetting("the file", "port", "twelve", "a number"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("asked_by", ["route", "signal"])
async def test_a_model_that_does_not_load_changes_nothing(
    error: Exception, asked_by: str
) -> None:
    failures: list[Exception] = []

    def load() -> None:
        if failures:
            raise failures.pop()

    engine = kit.FakeEngine()
    async with kit.running_service(engine, before_load=load) as running:
        changed(running, cache_mb=1)
        if isinstance(error, es.BadSetting):
            running.configuration.now = error
        else:
            failures.append(error)
        if asked_by == "route":
            reply = await running.ask("POST", "/admin/reload")
            assert (reply.status, reply.error["code"]) == (409, "reload_refused")
            assert str(error) in reply.error["message"]
        else:
            os.kill(os.getpid(), signal.SIGHUP)
            await logged(running, "not reloaded, nothing has changed")
        assert str(error) in running.log.getvalue()
        assert (await running.ask("POST", EMBED, {"input": "a"})).status == 200
        assert not engine.is_closed
        # And it is no obstacle to the next one.
        running.configuration.now = running.service.settings
        assert (await running.ask("POST", "/admin/reload")).status == 200


async def test_a_load_that_fails_in_another_way_is_logged_too() -> None:
    failures: list[Exception] = []

    def load() -> None:
        if failures:
            raise failures.pop()

    async with kit.running_service(before_load=load) as running:
        changed(running, cache_mb=1)
        failures.append(KeyError("a bug"))
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: not failures, "the load")
        async with asyncio.timeout(3):
            await logged(running, "not reloaded: a bug")
        assert "KeyError" in running.log.getvalue()
        assert (await running.ask("POST", EMBED, {"input": "a"})).status == 200
        # And it is no obstacle to the next one.
        assert (await running.ask("POST", "/admin/reload")).status == 200


class Told(es.Notifier):
    """Notes what is told."""

    def __init__(self) -> None:
        super().__init__(None, {})
        self.names: list[str] = []

    def tell(self, **lines: object) -> None:
        self.names += [name for name in lines if name not in ("WATCHDOG", "STATUS")]


async def test_a_reload_that_is_overtaken_by_a_stop_does_not_say_ready() -> None:
    gate, told = threading.Event(), Told()
    gate.set()
    old, new = kit.FakeEngine(), kit.FakeEngine()
    old.block()
    async with kit.running_service(
        old, later=[new], before_load=lambda: kit.wait(gate), notifier=told
    ) as running:
        first = await asking(running, old)
        gate.clear()
        changed(running, cache_mb=1)
        reload = asyncio.create_task(running.ask("POST", "/admin/reload"))
        await eventually(lambda: "RELOADING" in told.names, "a reload")
        running.server.stop()
        gate.set()
        assert (await reload).status == 409
        old.release()
        assert (await first).status == 200
        assert await running.task == 0
    assert told.names == ["READY", "RELOADING", "MONOTONIC_USEC", "STOPPING"]


async def test_of_two_reloads_at_once_the_second_is_refused() -> None:
    gate = threading.Event()
    gate.set()
    async with kit.running_service(before_load=lambda: kit.wait(gate)) as running:
        gate.clear()
        changed(running, cache_mb=1)
        first = asyncio.create_task(running.ask("POST", "/admin/reload"))
        second = asyncio.create_task(running.ask("POST", "/admin/reload"))
        done, _ = await asyncio.wait(
            (first, second), return_when=asyncio.FIRST_COMPLETED
        )
        (refused,) = (task.result() for task in done)
        assert (refused.status, refused.error["code"]) == (409, "reload_refused")
        # Work goes on meanwhile.
        assert (await running.ask("POST", EMBED, {"input": "a"})).status == 200
        gate.set()
        replies = await asyncio.gather(first, second)
        assert sorted(reply.status for reply in replies) == [200, 409]
        assert running.service.settings.cache_mb == 1


async def test_a_reload_while_it_stops_is_refused() -> None:
    engine = kit.FakeEngine()
    engine.block()
    async with kit.running_service(engine) as running:
        first = await asking(running, engine)
        running.server.stop()
        reply = await running.ask("POST", "/admin/reload")
        assert (reply.status, reply.error["code"]) == (409, "reload_refused")
        engine.release()
        assert (await first).status == 200


@pytest.mark.slow
async def test_a_stop_during_a_reload_goes_first() -> None:
    gate, new = threading.Event(), kit.FakeEngine(n_embd=6)
    gate.set()
    async with kit.running_service(
        before_load=lambda: kit.wait(gate), later=[new], drain_timeout_s=0.1
    ) as running:
        gate.clear()
        changed(running, cache_mb=1)
        reload = asyncio.create_task(running.ask("POST", "/admin/reload"))
        await eventually(lambda: running.server._reloading, "a reload")
        running.server.stop()
        async with asyncio.timeout(kit.DEADLINE_S):
            assert await running.task == 0
        assert running.engine.times_closed == 1
        assert not running.server.is_clean  # so the program leaves at once
        gate.set()
        with contextlib.suppress(Exception):
            await reload


def is_longer(calls: list[Any], than: int) -> bool:
    """Whether there were more calls since."""
    return len(calls) > than


@pytest.mark.slow
def test_a_stop_of_the_program_does_not_wait_for_a_load(tmp_path: Path) -> None:
    config, good = tmp_path / "config.toml", kit.fake_gguf(tmp_path)
    good.with_name("deaf.gguf").write_bytes(good.read_bytes())
    config.write_text(f'model_path = "{good}"\n')
    flags = ("--config", str(config), "--drain-timeout-s", "0")
    module = ("-m", "tests.kit", "supervised")
    with kit.started(*flags, module=module) as server:
        config.write_text(f'model_path = "{tmp_path}/deaf.gguf"\n')
        server.process.send_signal(signal.SIGHUP)
        answers: list[str] = []
        shown = server.admin_fields()

        def reload() -> None:
            client = Client(server.url)
            client.show(shown)
            answers.append(client.post("/admin/reload").outcome)

        threads = [threading.Thread(target=reload) for _ in range(2)]
        for thread in threads:  # one of these may be what is under way
            thread.start()
        until(lambda: "409" in answers, "a reload under way")
        assert server.stop() == 0
        for thread in threads:
            thread.join(kit.DEADLINE_S)


async def test_a_certificate_that_is_no_use_refuses_the_reload(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1"
    command += f" -nodes -days 2 -subj /CN=localhost -keyout {key} -out {cert}"
    await asyncio.to_thread(
        subprocess.run, command.split(), check=True, capture_output=True
    )
    async with kit.running_service(tls_cert=str(cert), tls_key=str(key)) as running:
        before = running.service.settings
        good = cert.read_text()
        cert.write_text("rubbish")
        changed(running, queue_size=7)
        with pytest.raises(es.ReloadRefused, match=re.escape(str(cert))):
            await running.service.reload()
        assert running.service.settings is before
        cert.write_text(good)
        assert (await running.service.reload())["changed"] == ["queue_size"]


async def test_a_chat_template_that_is_no_use_refuses_the_reload(
    tmp_path: Path,
) -> None:
    async with kit.running_service() as running:
        before = running.service.settings
        template = tmp_path / "own.jinja"
        changed(running, chat_template=str(template))
        for text, words in ((None, "No such file"), ("{% if %}", r"\(line 1\)")):
            if text is not None:
                template.write_text(text)
            with pytest.raises(es.ReloadRefused, match=words):
                await running.service.reload()
            assert running.service.settings is before


async def test_many_reloads_under_load_lose_nothing() -> None:
    engines = [kit.FakeEngine() for _ in range(9)]
    async with kit.running_service(engines[0], later=engines[1:], workers=2) as running:
        is_over = False

        async def client(name: str) -> None:
            number = 0
            while not is_over:
                text = f"{name} {(number := number + 1)}"
                reply = await running.ask("POST", EMBED, {"input": text})
                assert reply.status == 200, reply
                found = reply.json["data"][0]["embedding"]
                assert np.allclose(found, faults.expected(text), atol=1e-6)

        clients = [asyncio.create_task(client(f"c{n}")) for n in range(8)]
        for number in range(1, 9):
            changed(running, cache_mb=number)
            reply = await running.ask("POST", "/admin/reload")
            assert reply.json["model"] == "replaced"
            calls = engines[number].calls
            computed = len(calls)
            use = functools.partial(is_longer, calls, computed)
            await eventually(use, "its use")
        is_over = True
        await asyncio.gather(*clients)
        await eventually(
            lambda: all(engine.is_closed for engine in engines[:-1]), "old ends"
        )


@pytest.mark.parametrize("when", ["loading", "reloading"])
async def test_hangups_that_come_too_early_are_one_reload_later(when: str) -> None:
    gate = threading.Event()
    if when == "reloading":
        gate.set()
    async with kit.running_service(
        before_load=lambda: kit.wait(gate),
        wait_ready=when == "reloading",
        later=[kit.FakeEngine(), kit.FakeEngine()],
    ) as running:
        if when == "reloading":
            gate.clear()
            changed(running, cache_mb=1)
            os.kill(os.getpid(), signal.SIGHUP)
            await eventually(lambda: running.server._reloading, "a reload")
        for size in (11, 12, 13):
            changed(running, queue_size=size)
            os.kill(os.getpid(), signal.SIGHUP)
            await logged(running, "SIGHUP: will reload when this is done")
        gate.set()
        newest = lambda: running.service.settings.queue_size == 13
        await eventually(newest, "the newest settings")
        await eventually(lambda: not running.server._reloading, "its end")
        done = running.log.getvalue().count(" reloaded ")
        assert done == (1 if when == "loading" else 2)


async def test_a_hangup_while_the_server_stops_is_said_to_change_nothing() -> None:
    engine = kit.FakeEngine()
    engine.block()
    async with kit.running_service(engine) as running:
        first = await asking(running, engine)
        running.server.stop()
        changed(running, queue_size=11)
        os.kill(os.getpid(), signal.SIGHUP)
        await logged(running, "SIGHUP: not reloaded, the server is stopping")
        engine.release()
        assert (await first).status == 200
    assert " reloaded " not in running.log.getvalue()


@pytest.mark.parametrize("flag", ["--supervise", "--no-supervise"])
def test_a_hangup_right_after_the_start_is_not_lost(tmp_path: Path, flag: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text("queue_size = 10\n")
    flags = (flag, "--config", str(config))
    with supervised(*flags, wait_ready=False) as server:  # but it listens
        config.write_text("queue_size = 11\n")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log(" reloaded ")
        assert server.stop() == 0


def test_a_file_that_was_rewritten_counts_after_a_hangup(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("queue_size = 10\n")
    with supervised("--config", str(config)) as server:
        config.write_text('queue_size = 11\nmodel_alias = ["other"]\ncache_mb = 9\n')
        server.process.send_signal(signal.SIGHUP)
        said = server.wait_for_log(" reloaded ")
        assert "changed=model_alias,cache_mb,queue_size model=replaced" in said
        config.write_text("queue_size = nonsense\n")
        server.process.send_signal(signal.SIGHUP)
        said = server.wait_for_log("not reloaded, nothing has changed")
        assert str(config) in said
        config.write_text("queue_size = 11\nport = 1\n")  # the flag goes before it
        server.process.send_signal(signal.SIGHUP)
        said = server.wait_for_log(" reloaded ", 2)
        assert "changed=model_alias,cache_mb model=replaced" in said
        assert Client(server.url).ask("a").outcome == "right"
        assert server.stop() == 0


def test_a_model_file_that_was_replaced_is_another_model_after_a_hangup(
    tmp_path: Path,
) -> None:
    path = kit.fake_gguf(tmp_path)
    module = ("-m", "tests.kit", "supervised")
    with kit.started("--model-path", str(path), module=module) as server:
        other = kit.fake_gguf(tmp_path, "new")
        other.write_bytes(other.read_bytes() + b"other")
        other.rename(path)
        server.process.send_signal(signal.SIGHUP)
        assert "model=replaced" in server.wait_for_log(" reloaded ")
        loads = [line for line in server.log if " loaded model=" in line]
        assert len({line.partition("sha256=")[2][:16] for line in loads}) == 2


# --- leaving and draining ---


async def test_during_the_grace_all_goes_on_but_ready_and_kept_connections() -> None:
    async with kit.running_service(drain_grace_s=0.5) as running:
        begun = time.monotonic()
        running.server.leave()
        ready = await running.ask("GET", "/ready")
        assert (ready.status, ready.error["code"]) == (503, "not_ready")
        assert "shutting down" in ready.error["message"]
        raw = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        health = kit.parse_reply(await running.exchange(raw))
        assert (health.status, health.headers["connection"]) == (200, "close")
        assert (await running.ask("POST", EMBED, {"input": "a"})).status == 200
        assert await running.task == 0
        assert time.monotonic() - begun >= 0.5


async def test_work_of_the_grace_is_finished_after_it() -> None:
    engine = kit.FakeEngine()
    engine.block()
    async with kit.running_service(engine, drain_grace_s=0.2) as running:
        running.server.leave()
        task = await asking(running, engine)
        await logged(running, " draining ")
        refused = await running.ask("POST", EMBED, {"input": "b"})
        assert (refused.status, refused.error["code"]) == (503, "not_ready")
        engine.release()
        assert (await task).status == 200
        assert await running.task == 0


@pytest.mark.parametrize("grace_s", [0, 3600])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_the_second_signal_ends_it_at_once(grace_s: int, second: int) -> None:
    engine = kit.FakeEngine()
    engine.block()
    async with kit.running_service(
        engine, drain_grace_s=grace_s, drain_timeout_s=3600
    ) as running:
        task = await asking(running, engine)
        first = " leaving " if grace_s else " draining "
        for number, phase in ((signal.SIGTERM, first), (second, " stopped ")):
            os.kill(os.getpid(), number)
            await logged(running, phase)
        assert (await task).status == 503
        assert (" draining " in running.log.getvalue()) is (grace_s == 0)
        engine.release()
        assert await running.task == 0


async def test_sigint_leaves_the_grace_out() -> None:
    async with kit.running_service(drain_grace_s=3600) as running:
        os.kill(os.getpid(), signal.SIGINT)
        assert await running.task == 0
        assert " leaving " not in running.log.getvalue()


def test_grace_and_drain_of_the_program() -> None:
    with supervised("--drain-grace-s", "0.5") as server:
        kept = http.client.HTTPConnection(server.url.removeprefix("http://"))
        with contextlib.closing(kept):

            def get(path: str) -> http.client.HTTPResponse:
                kept.request("GET", path)
                reply = kept.getresponse()
                reply.read()
                return reply

            assert get("/ready").status == 200
            server.process.send_signal(signal.SIGTERM)
            server.wait_for_log(" leaving ")
            ready = get("/ready")
            assert (ready.status, ready.getheader("connection")) == (503, "close")
        assert Client(server.url).ask("a").outcome == "right"
        assert server.process.wait(kit.DEADLINE_S) == 0
        server.wait_for_log("stopped after=drained")


# --- the engine ---


async def test_an_abortable_call_that_hangs_is_told_and_its_worker_goes_on() -> None:
    engine = kit.FakeEngine()
    async with kit.running_service(engine, stuck_after_s=0.1) as running:
        await warm(running, engine)
        reply = await (await asking(running, engine))
        assert (reply.status, reply.error["code"]) == (500, "engine_failed")
        assert engine.aborts == 1
        engine.release()
        assert (await running.ask("POST", EMBED, {"input": "b"})).status == 200
        assert (await running.ask("GET", "/ready")).status == 200


async def test_a_call_that_is_deaf_is_told_and_ends_the_process_with_1(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(es, "ABORT_S", 0.5)
    engine = kit.FakeEngine()
    engine.is_deaf = True
    async with kit.running_service(
        engine, stuck_after_s=0.1, drain_timeout_s=0.1
    ) as running:
        await warm(running, engine)
        first = await asking(running, engine)
        waits = asyncio.create_task(running.ask("POST", EMBED, {"input": "b"}))
        reply = await first
        assert (reply.status, reply.error["code"]) == (503, "engine_unavailable")
        assert reply.headers["retry-after"] == "1"
        assert (await waits).status == 503
        assert await running.task == 1
        assert not running.server.is_clean
        assert "replacing this process" in running.log.getvalue()


class Quitting(kit.FakeEngine):
    """Ends the thread that calls it, as if of a bug of ours, at the word "quit"."""

    def __init__(self, *, in_tokenizer: bool) -> None:
        super().__init__()
        self._in_tokenizer = in_tokenizer
        self._is_asked = False

    def encode(self, text: str) -> list[int]:
        self._is_asked |= text == "quit"
        if self._is_asked and self._in_tokenizer:
            raise SystemExit
        return super().encode(text)

    def enter(self, context: kit.FakeContext) -> None:
        super().enter(context)
        if self._is_asked:
            raise SystemExit


# Threads end with SystemExit in silence, but pytest would say it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("in_tokenizer", [True, False])
async def test_a_thread_that_ends_of_a_bug_ends_the_process_with_1(
    in_tokenizer: bool,
) -> None:
    engine = Quitting(in_tokenizer=in_tokenizer)
    async with kit.running_service(engine, drain_timeout_s=0.1) as running:
        assert (await running.ask("POST", EMBED, {"input": "a"})).status == 200
        reply = await running.ask("POST", EMBED, {"input": "quit"})
        assert (reply.status, reply.error["code"]) == (503, "not_ready")
        assert await running.task == 1
        assert "replacing this process" in running.log.getvalue()


class Broken(kit.FakeEngine):
    """Fails on every input while ``is_broken``."""

    is_broken = True

    def enter(self, context: kit.FakeContext) -> None:
        super().enter(context)
        if self.is_broken:
            raise es.EngineError("broken")


async def broken(running: kit.RunningService, times: int = 5) -> None:
    """Ask until the breaker should suspect something."""
    for number in range(times):
        reply = await running.ask("POST", EMBED, {"input": f"text {number}"})
        assert (reply.status, reply.error["code"]) == (500, "engine_failed")


@pytest.mark.slow
async def test_a_broken_engine_is_said_and_comes_back_by_itself() -> None:
    engine = Broken()
    async with kit.running_service(engine) as running:
        await broken(running)
        await logged(running, "canary worked=False")
        refused = await running.ask("POST", EMBED, {"input": "a"})
        code = "engine_unavailable"
        assert (refused.status, refused.error["code"]) == (503, code)
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        ready = await running.ask("GET", "/ready")
        assert (ready.status, ready.error["message"]) == (503, es.ENGINE_BROKEN)
        assert (await running.ask("GET", "/health")).status == 200
        text = (await running.ask("GET", "/metrics")).body.decode()
        assert "\nembellama_engine_broken 1\n" in text
        engine.is_broken = False
        await logged(running, "canary worked=True")
        assert (await running.ask("GET", "/ready")).status == 200
        assert (await running.ask("POST", EMBED, {"input": "a"})).status == 200


def test_a_refused_job_gives_back_no_room_of_others() -> None:
    pool = kit.pool(kit.FakeEngine(), limit=es.Size(4, 1000, 1 << 30))  # never started
    pool.queue.submit(kit.job(["a"]))
    refused = kit.job(list("bcdef"))
    with pytest.raises(es.Overloaded):
        pool.queue.submit(refused)
    with contextlib.suppress(AssertionError):
        pool.queue.cancel(refused)  # as room API does
    assert pool.queue.backlog.inputs == 1


async def test_one_client_s_poison_shuts_nobody_else_out() -> None:
    async with kit.running_service() as running:
        for number in range(20):
            poison = {"input": f"{kit.BOOM_WORD} {number}"}
            assert (await running.ask("POST", EMBED, poison)).status == 500
        await logged(running, "canary worked=True")
        assert "worked=False" not in running.log.getvalue()
        assert (await running.ask("POST", EMBED, {"input": "a"})).status == 200


@pytest.mark.slow
async def test_a_full_queue_keeps_no_canary_away_for_good() -> None:
    engine = Broken()
    async with kit.running_service(engine, queue_size=1) as running:
        await broken(running, 4)
        engine.block()
        fifth = await asking(running, engine)
        engine.release()
        assert (await fifth).status == 500  # suspicious from now on
        engine.block()
        task = await asking(running, engine)  # and full until the next tick
        tick = time.monotonic() + 2.5
        await eventually(lambda: time.monotonic() > tick, "two ticks")
        engine.release()
        assert (await task).status == 500
        async with asyncio.timeout(5):
            await logged(running, "canary ")


# --- what the machine runs out of ---


@pytest.mark.slow
@pytest.mark.parametrize("files", [300, 64])
@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
def test_too_many_connections_for_its_files_harm_nobody_later(files: int) -> None:
    before = ("prlimit", f"--nofile={files}:{files}")
    with supervised(before=before) as server, contextlib.ExitStack() as opened:
        child = server.child
        made = []
        for _ in range(400):
            with contextlib.suppress(OSError):
                made.append(opened.enter_context(kit.connected(server.url)))
        told = 0
        for each in made:
            with contextlib.suppress(OSError):
                each.settimeout(0.05 if told else kit.DEADLINE_S)
                each.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                told += each.recv(4096).startswith(b"HTTP/1.1 ")
        assert told >= 16
        line = server.wait_for_log("no descriptors left") if files == 64 else ""
        assert f"limit={files}" in line or files != 64
        garbage = [kit.connected(server.url) for _ in range(30)]
        for each in garbage:
            opened.enter_context(each)
            with contextlib.suppress(OSError):
                each.sendall(b"bad\r\n\r\n")
        for _ in range(5):
            assert Client(server.url).get("/health").outcome == "right"
        opened.close()
        until(lambda: Client(server.url).get("/health").outcome == "right", "health")
        assert Client(server.url).ask("a").outcome == "right"
        assert server.child == child
        assert server.stop() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("setting", ["audit_log", "dead_letter"])
async def test_a_full_disk_fails_no_request_and_the_loss_is_counted(
    setting: str,
) -> None:
    changes: dict[str, Any] = {setting: "/dev/full"}
    async with kit.running_service(**changes) as running:
        word = kit.BOOM_WORD if setting == "dead_letter" else "a"
        for number in range(5):
            body = {"input": f"{word} {number}"}
            reply = await running.ask("POST", EMBED, body)
            assert reply.status == (500 if setting == "dead_letter" else 200)
        text = running.log.getvalue()
        for lost in (1, 2, 4):
            assert f"lost={lost} " in text
        assert "No space left on device" in text
        assert (await running.ask("POST", EMBED, {"input": "b"})).status == 200


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
def test_memory_that_is_not_there_fails_one_request() -> None:
    before = ("prlimit", f"--as={4 << 30}")
    with supervised(before=before) as server:
        child = server.child
        assert Client(server.url).ask("memory").outcome == "503"
        assert Client(server.url).ask("a").outcome == "right"
        assert server.child == child
        assert server.stop() == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
def test_a_child_that_has_no_memory_to_start_does_not_take_the_parent_along() -> None:
    with supervised() as server:
        limit = ["prlimit", f"--pid={server.process.pid}", f"--as={64 << 20}:"]
        assert os.spawnvp(os.P_WAIT, "prlimit", limit) == 0  # children inherit it
        os.kill(server.child, signal.SIGKILL)
        server.wait_for_log("the server has died", 3)
        assert server.process.poll() is None
        limit[2] = f"--as={4 << 30}:"
        assert os.spawnvp(os.P_WAIT, "prlimit", limit) == 0
        server.wait_for_log(" ready ", 2)
        assert Client(server.url).ask("a").outcome == "right"
        assert server.stop() == 0


# --- the clock ---


@pytest.mark.parametrize("jump_s", [-86400.0 * 365, -1.0, 86400.0 * 365])
async def test_a_clock_that_jumps_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jump_s: float
) -> None:
    real = time.time
    key = "a-key-of-some-length"
    tomorrow = time.strftime("%Y-%m-%d", time.gmtime(real() + 86400))
    keys = tmp_path / "keys"
    keys.write_text(f"one {key} not_after={tomorrow}\ntwo {key}-of-another\n")
    keys.chmod(0o600)

    async with kit.running_service(api_key_file=str(keys)) as running:

        async def ask(text: str, key: str) -> kit.Reply:
            bearer = f"Bearer {key}"
            body = {"input": text}
            return await running.ask("POST", EMBED, body, authorization=bearer)

        assert (await ask("a", key)).status == 200
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        reply = await ask("b", f"{key}-of-another")
        assert reply.status == 200
        year = time.gmtime(real() + jump_s).tm_year
        assert str(year) in reply.headers["date"]
        expired = await ask("c", key)
        assert expired.status == (401 if jump_s > 86400 else 200)
        monkeypatch.setattr(time, "time", real)
        assert (await ask("d", key)).status == 200
        assert str(time.gmtime().tm_year) in (await ask("e", key)).headers["date"]


# --- real calls ---


@pytest.mark.model
@pytest.mark.slow
def test_a_real_call_ends_soon_after_it_is_told_and_the_next_one_is_whole(
    engine: es.Engine,
) -> None:
    rng = np.random.default_rng(0)
    short = rng.integers(1000, 20000, 20).astype(np.int32)
    long = [rng.integers(1000, 20000, 256).astype(np.int32) for _ in range(2)]
    context = engine.new_context()
    try:
        before = [context.embed([short]), context.embed([long[0]])]
        begun = time.monotonic()
        for _ in range(5):
            context.embed(long)
        usual_s = (time.monotonic() - begun) / 5
        for part in (0.1, 0.3, 0.5):
            told_at: list[float] = []

            def tell(told_at: list[float] = told_at) -> None:
                told_at.append(time.monotonic())
                context.abort()

            timer = threading.Timer(part * usual_s, tell)
            timer.start()
            with pytest.raises(es.CallAborted):
                context.embed(long)
            took_s = time.monotonic() - told_at[0]
            timer.join(kit.DEADLINE_S)
            assert took_s < max(0.1, usual_s / 2)
            context.rearm()
            for vectors, inputs in zip(before, ([short], [long[0]]), strict=True):
                assert np.array_equal(context.embed(inputs), vectors)
    finally:
        context.close()


@pytest.mark.model
@pytest.mark.slow
def test_a_client_that_leaves_frees_its_worker_in_the_middle_of_a_call(
    default_model: Path,
) -> None:
    flags = ("--model-path", str(default_model), "--workers", "1", "--cache-mb", "0")
    with kit.started(*flags, module=(SCRIPT,)) as server:

        def aborted() -> int:
            text = faults.metrics(server.url)
            found = re.findall(r"(?m)^embellama_batches_aborted_total ([0-9]+)$", text)
            return int(found[0])

        def is_idle() -> bool:
            return 'workers{state="busy"} 0' in faults.metrics(server.url)

        for number in range(20):
            body = json.dumps({"input": f"w{number} " + "word " * 240}).encode()
            head = f"POST {EMBED} HTTP/1.1\r\nHost: localhost\r\n"
            head += "Content-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            with kit.connected(server.url) as client:
                client.sendall(head.encode() + body)
                # A mere close looks like a client that still reads, for a second.
                reset = struct.pack("ii", 1, 0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                begun = aborted()  # which also gives the call time to begin
            until(is_idle, "its end")
            if aborted() > begun:
                break
        assert aborted(), "no call was ended, in twenty"
        judge = faults.Client(server.url).ask("a", lambda vector: len(vector) == 384)
        assert judge.outcome == "right"
        assert server.stop() == 0
