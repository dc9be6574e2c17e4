"""Room STATUS: the weight that HAProxy's agent-check is told."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

import embellama_server as es
from tests import kit


async def told(port: int) -> bytes:
    """All that the agent's port says, once it is open: a model may be ready before."""
    async with asyncio.timeout(kit.DEADLINE_S):
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            await asyncio.sleep(0.01)
        found = await reader.read()
        writer.close()
    return found


def free_port() -> int:
    """One that was free just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("backlog_s", "line"),
    [(0.0, b"100%\n"), (0.05, b"50%\n"), (0.45, b"10%\n"), (600.0, b"1%\n")],
)
async def test_a_weight_falls_with_the_seconds_of_backlog(
    backlog_s: float, line: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    async with kit.running_service(agent_port=port) as running:
        monkeypatch.setattr(es.Backlog, "wait_s", backlog_s)
        assert es.weight_line(running.service) == line
        assert await told(port) == line


async def test_the_program_tells_it_too() -> None:
    port = free_port()
    with kit.started("--agent-port", str(port)) as server:  # on uvloop
        server.wait_for_log(" ready ")
        assert await told(port) == b"100%\n"
        assert server.stop() == 0
    assert not [line for line in server.log if "bug" in line]


async def test_no_port_is_opened_unless_it_is_asked_for() -> None:
    async with kit.running_service() as running:
        assert running.server._agent is None


async def test_the_agent_s_port_is_free_again_once_the_server_has_stopped() -> None:
    port = free_port()
    async with kit.running_service(agent_port=port):
        assert await told(port) == b"100%\n"
    async with kit.running_service(agent_port=port):
        assert await told(port) == b"100%\n"


async def test_a_taken_port_is_a_sentence_for_the_first_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            es.StartupError, match=rf"--agent-port {port} of 127.0.0.1: "
        ):
            async with kit.running_service(agent_port=port):
                pass


async def test_a_successor_waits_for_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with kit.running_service(agent_port=port, is_successor=True) as running:
            taken.close()
            async with asyncio.timeout(kit.DEADLINE_S):
                while running.server._agent is None:
                    await asyncio.sleep(0.01)
            assert await told(port) == b"100%\n"
