"""Faults and changes while streams run, in a real process: rooms GENERATOR and SERVER.

What each costs whom, and that nothing of it is left. tests/chat_faults.py has the faults.
"""

from __future__ import annotations

import http.client
import re
import signal
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import chat_faults, chat_models, faults, kit
from tests.chat_faults import Client
from tests.faults import Load, until
from tests.test_listeners import Files, files  # noqa: F401

pytestmark = pytest.mark.heavy  # 80 s of real processes that fail

STREAMS = 4
LONG = 1900  # tokens of a stream that is not read to its end
GAUGES = r'(?m)^embellama_(?:queue_(?:inputs|tokens)|http_streams|sequences\{state="[rw].*?) (.*)$'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Server]:
    """One that the faults are injected into, one after another."""
    folder = tmp_path_factory.mktemp("model")
    flags = ("--stuck-after-s", "1.5", "--audit-log", "/dev/full")
    with chat_faults.serving(folder, *flags) as running:
        yield running
        assert running.stop() == 0


def at_rest(client: Client) -> None:
    """Nothing runs, waits or is held."""

    def text(path: str) -> str:
        made = client.connect()
        made.request("GET", path)
        reply = made.getresponse()
        assert reply.status == 200
        said = reply.read().decode()
        made.close()
        return said

    assert text("/health")
    until(lambda: {*map(float, re.findall(GAUGES, text("/metrics")))} == {0}, "rest")


def load(server: kit.Server, client: type[Client] = Client) -> Load:
    """Streams all the time."""
    return Load(server.url, clients=STREAMS, client=client)


def poison(server: kit.Server, token: int, *, is_said: bool) -> faults.Answer:
    """A stream that fails at its prompt, or at the first token that it says."""
    client = Client(server.url)
    if is_said:
        return client.stream([1, 60], logit_bias={str(token): 100})
    return client.stream([1, 60, token])


FAILED = "this reply failed, and failed again when tried alone"
NO_MEMORY = "this reply needs more memory than is free now"
FAILING: dict[str, tuple[int, str]] = {  # and what the client is told
    "NaN": (chat_faults.NAN, "the model gave no numbers"),
    "an error": (chat_faults.BOOM, FAILED),
    "no memory": (chat_faults.MEMORY, NO_MEMORY),
    "a step that hangs until it is aborted": (chat_faults.STALL, FAILED),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_stream_whose_step_fails_is_told_so_and_no_other_is_harmed(
    name: str, server: kit.Server
) -> None:
    (token, words), child = FAILING[name], server.child
    with load(server) as streams:
        for is_said in (False, True):
            streams.wait_for(STREAMS)
            answer = poison(server, token, is_said=is_said)
            assert answer.outcome in ("500", "503")
            assert words in answer.message
        streams.wait_for(STREAMS)
    assert {*streams.outcomes} == {"right"}
    assert server.child == child
    at_rest(Client(server.url))


ENDING: dict[str, tuple[int, str]] = {  # and what becomes of the streams of then
    "a crash": (chat_faults.CRASH, "lost"),
    "a step that never ends": (chat_faults.DEAF, "told"),
}


@pytest.mark.parametrize("name", ENDING)
def test_a_fault_that_ends_the_process_costs_the_streams_of_then_and_no_other(
    name: str, server: kit.Server
) -> None:
    token, costs = ENDING[name]
    starts = sum(" ready " in line for line in server.log)
    with load(server) as streams:
        streams.wait_for(STREAMS)
        answer = poison(server, token, is_said=True)
        assert answer.outcome == ("lost" if costs == "lost" else "500")
        server.wait_for_log(" ready ", starts + 1)
        streams.wait_for(STREAMS)
    figures = faults.Figures.of(name, 1, streams, costs)
    assert figures.is_fine, figures
    at_rest(Client(server.url))


def test_a_full_disk_costs_no_stream(server: kit.Server) -> None:
    with load(server) as streams:
        streams.wait_for(STREAMS)
    assert {*streams.outcomes} == {"right"}
    assert "No space left on device" in server.wait_for_log(" lines lost ")


def test_a_reload_lets_running_streams_end_in_the_old_model(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("parallel = 8\n")
    path = chat_models.tiny_llama(tmp_path)
    flags = ("--config", str(config), "--context-size", "8192")
    with kit.started(
        "--model-path", str(path), *flags, module=chat_faults.MODULE
    ) as server:
        with load(server) as streams:
            for time_ in (1, 2):
                config.write_text(f"parallel = {8 + time_}\n")
                streams.wait_for(STREAMS)
                server.process.send_signal(signal.SIGHUP)
                server.wait_for_log(" reloaded ", time_)
            streams.wait_for(STREAMS)
        assert {*streams.outcomes} == {"right"}
        at_rest(Client(server.url))
        assert server.stop() == 0


def closed(connection: http.client.HTTPConnection) -> None:
    connection.sock.close()


def reset(connection: http.client.HTTPConnection) -> None:
    connection.sock.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )
    connection.sock.close()


def test_streams_over_tls_outlive_new_certificates_and_end_with_their_clients(
    files: Files,  # noqa: F811
    tmp_path: Path,
) -> None:
    class Secure(Client):
        tls = files.client()

    flags = [f"--{k.replace('_', '-')}={v}" for k, v in files.settings.items()]
    with chat_faults.serving(tmp_path, *flags) as server:
        client = Secure(server.url)
        with load(server, Secure) as streams:
            for time_, leave in enumerate(LEAVING, 1):
                held, later = client.connect(), client.connect()
                reply = client.begin(held, "a", max_tokens=LONG)
                assert reply.readline()
                files.renew()
                server.process.send_signal(signal.SIGHUP)
                server.wait_for_log(" reloaded ", time_)
                later.connect()
                assert serial(held) != serial(later)
                later.close()
                assert reply.readline() or reply.readline(), "it goes on"
                leave(held)
                reply.close()
                line = server.wait_for_log("status=499", time_)
                said = int(line.partition(" reply_tokens=")[2].split()[0])
                assert 0 < said < LONG
            streams.wait_for(STREAMS)
        assert {*streams.outcomes} == {"right"}
        at_rest(client)
        assert server.stop() == 0


def serial(connection: http.client.HTTPConnection) -> Any:
    """Of the certificate that the server showed."""
    assert isinstance(connection.sock, ssl.SSLSocket)
    return (connection.sock.getpeercert() or {})["serialNumber"]


LEAVING: tuple[Callable[[http.client.HTTPConnection], None], ...] = (closed, reset)
