"""A light HTTP client to load a server with, in closed loop or at a rate.

It shares the machine with what it measures, so it does as little as can be: about 10
microseconds a request on uvloop.
"""

from __future__ import annotations

import asyncio
import collections
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import embellama_server as es

ANSWER_S = 3600.0  # longest a cell may take to be answered after its time is over


def body(inputs: Sequence[str]) -> bytes:
    """Of a request."""
    ask = inputs if len(inputs) > 1 else inputs[0]
    return json.dumps({"model": "bench", "input": ask}).encode()


@dataclass
class Load:
    """Requests sent over keep-alive connections, each when the last is answered.

    At ``rate`` a second in all, if that is given, and as long as connections are free.
    """

    url: str
    bodies: Sequence[bytes]
    connections: int
    seconds: float
    refusal_ends: bool = True  # the run, when a status is not 200; else it is counted
    rate: float = 0.0
    latencies: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)  # latencies of what is not 200
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    end: float = 0.0  # when nothing more is sent
    took: float = 0.0

    def run(self) -> Load:
        """Returns when every request that was sent has been answered."""
        with asyncio.Runner(loop_factory=es.new_event_loop) as runner:
            runner.run(self._run())
        return self

    async def _run(self) -> None:
        parts = urlsplit(self.url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        head = (
            f"POST {parts.path.rstrip('/')}/v1/embeddings HTTP/1.1\r\n"
            f"Host: {self.host}\r\nContent-Type: application/json\r\nContent-Length: "
        ).encode()
        self.requests = [
            b"%s%d\r\n\r\n%s" % (head, len(body), body) for body in self.bodies
        ]
        loop = asyncio.get_running_loop()
        self.failed: asyncio.Future[None] = loop.create_future()
        loop.set_exception_handler(lambda _, context: self.fail(str(context)))
        clients = [_Client(self, number) for number in range(self.connections)]
        for client in clients:
            await client.connect()
        begun = time.perf_counter()
        self.end = begun + self.seconds
        for number, client in enumerate(clients):
            client.due_at = begun + (number / self.rate if self.rate else 0.0)
            client.ask()
        everyone = asyncio.gather(*(client.finished for client in clients))
        async with asyncio.timeout(self.seconds + ANSWER_S):
            await asyncio.wait(
                (everyone, self.failed), return_when=asyncio.FIRST_COMPLETED
            )
        self.took = time.perf_counter() - begun
        for client in clients:
            client.leave()
        if self.failed.done():
            await self.failed
        most = len(self.requests) + self.connections
        if len(self.requests) > 1 and max(client.at for client in clients) >= most:
            print("some texts were sent again", file=sys.stderr)

    def fail(self, why: str) -> None:
        """End the run."""
        if not self.failed.done():
            self.failed.set_exception(SystemExit(f"{self.url}: {why}"))


class _Client(asyncio.Protocol):
    """One connection of a load; opened again when the server closes it."""

    def __init__(self, load: Load, number: int) -> None:
        self._load = load
        self.at = number  # in the load's requests: every connections-th is ours
        self.finished = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._whole = -1  # bytes of the answer; -1: its head is not here, 0: chunked
        self._walked = 0  # up to which chunk
        self._sent_at = 0.0
        self.due_at = 0.0  # when the next request is to leave, if there is a rate
        self._lost = 0  # times in a row that a connection ended without an answer
        self._joining: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        loop, load = asyncio.get_running_loop(), self._load
        try:
            await loop.create_connection(lambda: self, load.host, load.port)
        except OSError as error:
            load.fail(str(error))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(
            asyncio.Transport, transport
        )  # also uvloop's, which isn't
        if self._sent_at:  # we were in the middle of asking
            self._send()

    def ask(self) -> None:
        """Send the next request when it is due, or end."""
        load, now = self._load, time.perf_counter()
        wait_s = self.due_at - now
        if now >= load.end:
            self.leave()
        elif wait_s > 0.001:
            asyncio.get_running_loop().call_later(min(wait_s, load.end - now), self.ask)
        else:
            self._sent_at = now
            if load.rate:
                self.due_at = max(self.due_at, now - 1.0) + load.connections / load.rate
            if self._transport is not None:
                self._send()

    def leave(self) -> None:
        if not self.finished.done():
            self.finished.set_result(None)
        if self._transport is not None:
            self._transport.abort()

    def _send(self) -> None:
        assert self._transport is not None
        requests = self._load.requests
        self._transport.write(requests[self.at % len(requests)])

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        if self._whole < 0:
            end = received.find(b"\r\n\r\n")
            if end < 0:
                return
            self._read_head(received[:end].lower(), end + 4)
        if self._whole > 0:
            if len(received) >= self._whole:
                self._answered()
        elif self._has_last_chunk():
            self._answered()

    def _read_head(self, head: bytearray, size: int) -> None:
        self._status = int(head[9:12])
        self._closes = b"\r\nconnection: close" in head
        length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
        self._whole = size + int(length) if length else 0
        self._walked = size

    def _has_last_chunk(self) -> bool:
        received = self._received
        while (line := received.find(b"\r\n", self._walked)) >= 0:
            size = int(received[self._walked : line].partition(b";")[0], 16)
            if size == 0:
                return received.find(b"\r\n\r\n", line) >= 0
            if len(received) < line + size + 4:
                break
            self._walked = line + size + 4
        return False

    def _answered(self) -> None:
        load = self._load
        took = time.perf_counter() - self._sent_at
        (load.latencies if self._status == 200 else load.refusals).append(took)
        load.statuses[self._status] += 1
        if self._status != 200 and load.refusal_ends:
            load.fail(f"a subject refused: {bytes(self._received[:1000])!r}")
        self._received.clear()
        self._whole = -1
        self._lost = 0
        self.at += load.connections
        if self._closes and self._transport is not None:
            self._transport.abort()
            self._transport = None  # connection_lost comes later
        self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost += 1
        if self.finished.done():
            return
        if self._lost > 3 or self._received:
            self._load.fail(f"a subject closed the connection ({exc})")
            return
        # Servers close idle connections, or after so many requests: that is no error.
        self._joining = asyncio.get_running_loop().create_task(self.connect())
