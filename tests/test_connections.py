"""Room CONNECTIONS over real sockets: order, timers, back-pressure, leaving, drain.

Every test runs on asyncio's loop and on the one we ship (uvloop when it is there): they
differ in what a closing transport still does. A test also fails if the loop was told of
an exception nobody caught, if a connection outlives the service, or if room in the
queue is not given back. Nothing waits by sleeping: tests wait for what the server does.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import inspect
import os
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import embellama_server as es
from tests import kit

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "shipped": es.new_event_loop,
}
HEALTH = b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n"
BYE = b"GET /health HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
JSON = "application/json"


@dataclass
class Client:
    """A connection to the server, as bytes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, *parts: bytes) -> None:
        self.writer.write(b"".join(parts))

    async def reply(self, method: str = "GET") -> kit.Reply:
        """The next response, and not a byte more."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        size = int(kit.parse_reply(head, "HEAD").headers.get("content-length", 0))
        body = b"" if method == "HEAD" else await self.reader.readexactly(size)
        return kit.parse_reply(head + body, method)

    async def rest(self) -> bytes:
        """All that still comes, until the server closes."""
        return await self.reader.read()

    async def replies(self, *methods: str) -> list[kit.Reply]:
        """The responses that still come, one for each method."""
        return kit.parse_replies(await self.rest(), methods)


class Room:
    """A running service, and clients to it that are closed with it."""

    def __init__(self, running: kit.RunningService) -> None:
        self.running = running
        self.server = running.server
        self.service = running.service
        self.engine = running.engine
        self.clients: list[Client] = []

    async def client(
        self, *sent: bytes, reads_little: bool = False, source: str = ""
    ) -> Client:
        """A new connection; with ``reads_little`` its kernel buffer is small."""
        sock = socket.socket()
        if source:
            sock.bind((source, 0))
        if reads_little:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        address = (self.running.host, self.running.port)
        await asyncio.get_running_loop().sock_connect(sock, address)
        client = Client(*await asyncio.open_connection(sock=sock))
        self.clients.append(client)
        client.send(*sent)
        return client

    async def computing(self) -> None:
        """Return when one more call of the engine has begun."""
        await asyncio.to_thread(self.engine.wait_until_computing)

    def waiting(self) -> int:
        """Inputs admitted and not done."""
        return self.running.backlog.inputs

    def answered(self) -> int:
        """Responses so far."""
        name = "embellama_http_requests_total"
        return int(
            sum(self.service.telemetry.value(name, v) for v in es.STATUS_CLASSES)
        )

    def held(self) -> int:
        """Bytes of requests and replies that the server says it holds."""
        return self.service.connections.held_bytes


async def until(condition: Callable[[], bool]) -> None:
    """Return when it holds. For what the server tells nobody about."""
    while not condition():
        await asyncio.sleep(0.001)


def served(**changes: Any) -> Callable[[Callable[..., Awaitable[None]]], Any]:
    """Make a test of ``async def test(room, ...)``: it runs on each of LOOPS.

    ``changes`` are settings; ``n_embd`` is the model's; ``has_bug``: there is one.
    """
    card = {"n_embd": changes.pop("n_embd", 8)}
    has_bug = changes.pop("has_bug", False)

    def made(test: Callable[..., Awaitable[None]]) -> Any:
        def run(loop: str, **arguments: Any) -> None:
            unhandled: list[dict[str, Any]] = []

            async def body() -> None:
                asyncio.get_running_loop().set_exception_handler(
                    lambda _, context: unhandled.append(context)
                )
                engine = kit.FakeEngine(**card)
                async with kit.running_service(engine, **changes) as running:
                    room, pool = Room(running), running.served.pool
                    try:
                        async with asyncio.timeout(kit.DEADLINE_S):
                            await test(room, **arguments)
                    finally:
                        for client in room.clients:
                            client.writer.transport.abort()
                assert (" bug " in running.log.getvalue()) == has_bug
                connections = running.service.connections
                assert not connections.open
                assert not connections.per_address
                assert connections.held_bytes == 0
                assert pool.queue.backlog.inputs == pool.queue.backlog.tokens == 0

            with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
                runner.run(body())
            assert not unhandled

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        parameters = list(inspect.signature(test).parameters.values())
        first = parameters[0].replace(name="loop")
        run.__signature__ = inspect.Signature([first, *parameters[1:]])  # type: ignore[attr-defined]
        return pytest.mark.parametrize("loop", LOOPS)(run)

    return made


def post(path: str, *headers: str, length: int = 0, kind: str = JSON) -> bytes:
    """The head of a POST."""
    lines = [f"POST {path} HTTP/1.1", "Host: h", f"Content-Type: {kind}", *headers]
    lines += [f"Content-Length: {length}"] if length else []
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def embed(*texts: str, close: bool = False) -> bytes:
    """A whole request for vectors."""
    body = es.json_codec().dumps({"input": texts})
    headers = ["Connection: close"] if close else []
    return post("/v1/embeddings", *headers, length=len(body)) + body


def ids(text: str) -> list[int]:
    """What the engine is given for a text."""
    return [1, *map(kit.fake_id, text.split()), 2]


# --- one request after another ---


@served()
async def test_a_connection_serves_request_after_request(room: Room) -> None:
    client = await room.client()
    for text in ("a", "b c", "d"):
        client.send(HEALTH)
        reply = await client.reply()
        assert (reply.status, reply.json["status"]) == (200, "ok")
        assert "connection" not in reply.headers
        client.send(embed(text))
        (item,) = (await client.reply("POST")).json["data"]
        assert item["embedding"] == pytest.approx(
            kit.fake_vector(ids(text)).tolist(), abs=1e-6
        )


@served()
async def test_pipelined_requests_are_answered_in_order(room: Room) -> None:
    client = await room.client(
        HEALTH,
        embed("a"),
        b"\r\n" + HEALTH.replace(b"GET", b"HEAD"),
        b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /nope HTTP/1.1\r\nHost: h\r\n\r\n",
        embed("b", "c"),
        BYE,
    )
    methods = ["GET", "POST", "HEAD", "OPTIONS", "GET", "POST", "GET"]
    replies = await client.replies(*methods)
    assert [reply.status for reply in replies] == [200, 200, 200, 204, 404, 200, 200]
    assert [len(replies[n].json["data"]) for n in (1, 5)] == [1, 2]
    assert [r.headers.get("connection") for r in replies] == [None] * 6 + ["close"]


@pytest.mark.parametrize("path", [b"/health", b"/nope"])
@served()
async def test_a_long_pipeline_is_read_only_as_fast_as_it_is_answered(
    room: Room, path: bytes
) -> None:
    padding = b"\r\nX-Padding: " + bytes(4000).replace(b"\0", b"x")
    asked = b"GET " + path + b" HTTP/1.1\r\nHost: h" + padding + b"\r\n\r\n"
    count = (4 << 20) // len(asked)
    client = await room.client(asked * count)
    max_bytes = 0
    for _ in range(count):
        await client.reply()
        max_bytes = max(max_bytes, room.service.connections.held_bytes)
    assert max_bytes < 1 << 20  # what is read ahead, and what one read may bring


@pytest.mark.parametrize(("at_once", "later"), [(HEALTH + BYE, b""), (HEALTH, BYE)])
@served()
async def test_a_quick_request_waits_for_the_slow_one_before_it(
    room: Room, at_once: bytes, later: bytes
) -> None:
    room.engine.block()
    client = await room.client(embed("a"), at_once)
    await room.computing()
    client.send(later)
    for _ in range(3):  # the loop turns, others are served
        assert (await room.running.ask("GET", "/health")).status == 200
    assert room.answered() == 3
    room.engine.release()
    first, *others = await client.replies("POST", "GET", "GET")
    assert first.json["object"] == "list"
    assert [reply.json["status"] for reply in others] == ["ok"] * 2


@served()
async def test_garbage_is_refused_after_the_answer_before_it(room: Room) -> None:
    room.engine.block()
    client = await room.client(embed("a"), b"garbage\r\n\r\n")
    await room.computing()
    room.engine.release()
    replies = await client.replies("POST", "GET")
    assert [reply.status for reply in replies] == [200, 400]


@served()
async def test_reading_pauses_while_an_answer_is_owed(room: Room) -> None:
    room.engine.block()
    padded = post("/v1/embeddings", length=1 << 20) + b'{"input":"a"}'.ljust(1 << 20)
    client = await room.client(*[padded] * 40, BYE)  # more than kernels buffer
    await room.computing()
    for _ in range(100):
        await asyncio.sleep(0)
        assert (await room.running.ask("GET", "/health")).status == 200
    (connection,) = room.service.connections.open
    assert connection._parser.buffered_bytes < 1 << 20
    room.engine.release()
    replies = await client.replies(*["POST"] * 40, "GET")
    assert {reply.status for reply in replies} == {200}


# --- the last request ---


@pytest.mark.parametrize("inputs", [1, 500])  # an answer of 40 kB, one of 20 MB
@served(n_embd=4096)
async def test_nothing_is_read_after_connection_close(room: Room, inputs: int) -> None:
    # RFC 9112, 9.6: the server MUST NOT process requests after one that said close.
    client = await room.client(embed(*["a"] * inputs, close=True), HEALTH * 3)
    (reply,) = await client.replies("POST")
    assert reply.headers["connection"] == "close"
    assert len(reply.json["data"]) == inputs
    assert room.answered() == 1


@served()
async def test_http_1_0_gets_an_answer_and_the_end(room: Room) -> None:
    old = b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    client = await room.client(old)
    (reply,) = await client.replies("GET")
    assert (reply.status, reply.headers["connection"]) == (200, "close")


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/v1/models", "/nope"])
@served()
async def test_head_is_get_without_the_body(room: Room, path: str) -> None:
    # RFC 9110, 8.6: another Content-Length than GET's is a MUST NOT.
    got = await room.running.ask("GET", path)
    head = await room.running.ask("HEAD", path)
    assert got.body
    assert not head.body
    for reply in (got, head):
        for name in ("date", "x-request-id", "openai-processing-ms"):
            reply.headers.pop(name, None)
    assert (head.status, head.headers) == (got.status, got.headers)


# --- before the body ---


BODIES = {
    "Content-Length: 13": b'{"input":"a"}',
    "Transfer-Encoding: chunked": b'd\r\n{"input":"a"}\r\n0\r\n\r\n',
}


@pytest.mark.parametrize("framing", BODIES)
@served()
async def test_100_continue_comes_before_the_body(room: Room, framing: str) -> None:
    head = post("/v1/embeddings", "Expect: 100-continue", framing)
    client = await room.client(head)
    assert await client.reader.readexactly(len(es.CONTINUE)) == es.CONTINUE
    client.send(BODIES[framing])
    assert (await client.reply("POST")).status == 200


REFUSED_EARLY = {
    400: post("/v1/embeddings", "Content-Length: +9"),
    404: post("/nope", length=9),
    405: post("/health", length=9),
    413: post("/v1/embeddings", length=10**9),
    415: post("/v1/embeddings", length=9, kind="text/csv"),
    431: post("/v1/embeddings", "X: " + "x" * 20000, length=9),
}


@pytest.mark.parametrize("status", REFUSED_EARLY)
@served()
async def test_a_bad_head_gets_no_100_continue(room: Room, status: int) -> None:
    head = REFUSED_EARLY[status].removesuffix(b"\r\n")
    raw = await (await room.client(head, b"Expect: 100-continue\r\n\r\n")).rest()
    assert raw.startswith(b"HTTP/1.1 %d " % status)
    reply = kit.parse_reply(raw, "POST")
    assert reply.headers["connection"] == "close"
    assert reply.error["message"]


@pytest.mark.parametrize("status", [400, 413, 431])
@served()
async def test_what_cannot_be_read_ends_the_connection(room: Room, status: int) -> None:
    (reply,) = await (await room.client(REFUSED_EARLY[status], HEALTH)).replies("POST")
    assert (reply.status, reply.headers["connection"]) == (status, "close")


@pytest.mark.parametrize("loop", LOOPS)
def test_work_is_refused_while_loading_without_100_continue(loop: str) -> None:
    async def check() -> None:
        may_load = threading.Event()

        def load() -> None:
            assert may_load.wait(kit.DEADLINE_S)

        async with kit.running_service(wait_ready=False, before_load=load) as running:
            try:
                room = Room(running)
                head = post("/v1/embeddings", "Expect: 100-continue", length=9)
                raw = await (await room.client(head)).rest()
                assert raw.startswith(b"HTTP/1.1 503 ")
                assert kit.parse_reply(raw, "POST").error["code"] == "not_ready"
                room.clients[0].writer.close()
            finally:
                may_load.set()
            await running.log.settled.wait()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(check())


@served()
async def test_100_continue_is_not_sent_where_it_is_not_waited_for(room: Room) -> None:
    # RFC 9110, 10.1.1: ignored in HTTP/1.0, and pointless without a body.
    old = b"GET /health HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx"
    for sent in (BYE.replace(b"Host", b"Expect: 100-continue\r\nHost"), old):
        raw = await (await room.client(sent)).rest()
        assert raw.startswith(b"HTTP/1.1 200 ")


def all_sent_then_read(address: tuple[str, int], *parts: bytes) -> bytes:
    """What a simple blocking client reads that first sends everything."""
    with socket.create_connection(address, timeout=kit.DEADLINE_S) as sock:
        for part in parts:
            sock.sendall(part)
        read = []
        while part := sock.recv(1 << 16):
            read.append(part)
    return b"".join(read)


@pytest.mark.parametrize("megabytes", [1, 20, 40])
@served()
async def test_who_sends_all_first_still_reads_the_refusal(
    room: Room, megabytes: int
) -> None:
    # Closing with bytes unread makes the kernel send RST: RFC 9112, 9.6.
    address = (room.running.host, room.running.port)
    body = bytes(megabytes * 1_000_000)
    for path, status in (("/nope", 404), ("/v1/embeddings", 415)):
        head = post(path, length=len(body), kind="text/csv")
        raw = await asyncio.to_thread(all_sent_then_read, address, head, body)
        wanted = 413 if megabytes > 33 else status
        assert kit.parse_reply(raw, "POST").status == wanted


# --- refused, and the connection goes on ---

NOPE = b"GET /nope HTTP/1.1\r\nHost: h\r\n\r\n"
MUST_NOT = {
    403: post("/v1/embeddings", "Origin: https://evil.example", length=9),
    **{status: REFUSED_EARLY[status] for status in (404, 405, 415)},
}


@pytest.mark.parametrize("status", MUST_NOT)
@served()
async def test_a_small_request_is_refused_before_its_body_and_another_may_follow(
    room: Room, status: int
) -> None:
    client = await room.client()
    for _ in range(2):
        client.send(MUST_NOT[status])
        reply = await client.reply("POST")
        assert reply.status == status
        assert reply.error["message"]
        assert "connection" not in reply.headers
        client.send(b"G", b"ET / HTT")  # of the body: not a request
        client.send(HEALTH)
        assert (await client.reply()).json["status"] == "ok"


@served(api_key="sk-right")
async def test_a_connection_survives_a_wrong_key(room: Room) -> None:
    client = await room.client(embed("a"))
    reply = await client.reply("POST")
    assert (reply.status, "connection" in reply.headers) == (401, False)
    body = b'{"input":"a"}'
    right = post("/v1/embeddings", "Authorization: Bearer sk-right", length=len(body))
    client.send(right, body)
    assert (await client.reply("POST")).status == 200


@served(rate_limit=0.001, rate_burst=1)
async def test_a_connection_survives_a_rate_limit(room: Room) -> None:
    client = await room.client(embed("a"), embed("b"), HEALTH)
    replies = [await client.reply(method) for method in ("POST", "POST", "GET")]
    assert [reply.status for reply in replies] == [200, 429, 200]
    assert not any("connection" in reply.headers for reply in replies)


@served(queue_size=1)
async def test_a_connection_survives_a_full_queue(room: Room) -> None:
    room.engine.block()
    first = await room.client(embed("a"))
    await room.computing()
    client = await room.client(embed("b"))
    reply = await client.reply("POST")
    assert (reply.status, reply.error["code"]) == (503, "overloaded")
    room.engine.release()
    assert (await first.reply("POST")).status == 200
    client.send(embed("b"))
    assert (await client.reply("POST")).status == 200


PIPELINE = [  # method, status, bytes
    ("POST", 404, post("/nope", length=9) + b"x" * 9),
    ("GET", 200, HEALTH),
    ("HEAD", 404, NOPE.replace(b"GET", b"HEAD")),
    (
        "HEAD",
        405,
        post("/v1/embeddings", length=9).replace(b"POST", b"HEAD") + b"x" * 9,
    ),
    ("POST", 200, embed("a")),
    ("POST", 415, post("/v1/embeddings", length=1, kind="text/csv") + b"x"),
    ("GET", 404, NOPE),
    ("GET", 404, NOPE),
    ("GET", 200, BYE),
]


@pytest.mark.parametrize("feed", kit.FEEDS)
@served()
async def test_refusals_in_a_pipeline_have_their_places(room: Room, feed: str) -> None:
    client = await room.client()
    for piece in kit.FEEDS[feed](b"".join(sent for _, _, sent in PIPELINE)):
        client.send(piece)
        await asyncio.sleep(0)
    # HEAD's have no body: RFC 9110, 9.3.2; or the next reply could not be read.
    replies = await client.replies(*[method for method, _, _ in PIPELINE])
    assert [reply.status for reply in replies] == [status for _, status, _ in PIPELINE]
    assert [r.headers.get("connection") for r in replies[:-1]] == [None] * 8


@served()
async def test_a_thousand_refusals_are_answered_to_who_reads_them_later(
    room: Room,
) -> None:
    client = await room.client(*[NOPE] * 1000, BYE)
    replies = await client.replies(*["GET"] * 1001)
    assert [reply.status for reply in replies] == [404] * 1000 + [200]


UNREAD = {
    "large": post("/nope", length=es._SKIPPED_BYTES + 1),
    "chunked": post("/nope", "Transfer-Encoding: chunked"),
    "expected": post("/nope", "Expect: 100-continue", length=9),
    "the last": post("/nope", "Connection: close", length=9),
    "of HTTP/1.0": post("/nope", length=9).replace(b"/1.1", b"/1.0"),
}


@pytest.mark.parametrize("unread", UNREAD)
@served()
async def test_a_refused_body_that_is_not_read_ends_the_connection(
    room: Room, unread: str
) -> None:
    (reply,) = await (await room.client(UNREAD[unread], HEALTH * 3)).replies("POST")
    assert (reply.status, reply.headers["connection"]) == (404, "close")
    assert room.answered() == 1


@served()
async def test_the_largest_refused_body_that_is_read_is_64_kib(room: Room) -> None:
    assert es._SKIPPED_BYTES == 64 << 10
    head = post("/nope", length=es._SKIPPED_BYTES)
    client = await room.client(head, bytes(es._SKIPPED_BYTES), BYE)
    replies = await client.replies("POST", "GET")
    assert [reply.status for reply in replies] == [404, 200]


@pytest.mark.parametrize("sent", [b"", b"x" * 8])
@served(body_timeout_s=0.2)
async def test_a_refused_body_that_never_comes_ends_the_connection_without_a_word(
    room: Room, sent: bytes
) -> None:
    client = await room.client(post("/nope", length=9))
    assert (await client.reply("POST")).status == 404
    client.send(sent)
    assert await client.rest() == b""
    assert room.answered() == 1


@served()
async def test_a_refused_body_ends_with_its_client(room: Room) -> None:
    client = await room.client(post("/nope", length=9), b"xxx")
    assert (await client.reply("POST")).status == 404
    client.writer.close()
    await until(lambda: not room.service.connections.open)


# --- too many, too much ---


async def told_too_many(client: Client, setting: str) -> None:
    """The client is told so, and that is all, unless it only asks whether all is well."""
    client.send(embed("a"))
    (reply,) = await client.replies("POST")
    assert (reply.status, reply.error["code"]) == (503, "too_many_connections")
    assert setting in reply.error["message"]
    assert reply.headers["connection"] == "close"
    assert int(reply.headers["retry-after"]) >= 1
    client.writer.close()


async def told_health(client: Client) -> None:
    """There is no place for the client, and yet it learns that the server is well."""
    client.send(HEALTH, embed("a"))
    (reply,) = await client.replies("GET")
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    client.writer.close()


async def goes_on(*clients: Client) -> None:
    """All are answered."""
    for client in clients:
        client.send(HEALTH)
        assert (await client.reply()).status == 200


@served(max_connections=2)
async def test_one_connection_too_many_is_told_so_and_the_others_go_on(
    room: Room,
) -> None:
    first, second = await room.client(), await room.client()
    await goes_on(first, second)
    await told_too_many(await room.client(), "--max-connections)")
    await told_health(await room.client())
    await goes_on(first, second)
    first.writer.close()
    await until(lambda: len(room.service.connections.open) == 1)
    await goes_on(await room.client(), second)


@served(max_connections=1)
async def test_of_very_many_connections_too_many_the_oldest_make_way(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "TURNED_AWAY", 2)
    connections, most = room.service.connections, 3
    first = await room.client()
    await goes_on(first)
    silent = [await room.client() for _ in range(20)]
    for sent in (HEALTH, b"bad\r\n\r\n", b"GET"):  # answered, lingering, on its way
        for _ in range(5):
            silent.append(await room.client(sent))
            await until(lambda: len(connections.open) <= most)
    await told_health(await room.client())
    await goes_on(first)
    for client in silent[:20]:
        with contextlib.suppress(ConnectionError):
            assert await client.rest() == b""
    room.server._tick()
    assert "too_many_connections=" in room.running.log.getvalue()


@served(max_connections=1)
async def test_who_has_no_place_and_says_nothing_is_told_so_soon(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_TURN_AWAY_S", 0.1)
    await goes_on(await room.client())
    unfinished = HEALTH.removesuffix(b"\r\n") + b"Content-Length: 9\r\n\r\n"
    for sent in (b"", b"GET", b"\r\n", unfinished):
        (reply,) = await (await room.client(sent)).replies("GET")
        assert (reply.status, reply.error["code"]) == (503, "too_many_connections")


@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_address"])
@pytest.mark.parametrize("sent", [b"bad\r\n\r\n", BYE, b""], ids=["bad", "bye", "none"])
@served()
async def test_a_place_is_taken_until_the_connection_is_closed(
    room: Room, sent: bytes, limit: str
) -> None:
    # Also by who was refused and is still sending.
    connections = room.service.connections
    changes: dict[str, Any] = {limit: 3}
    connections.limits = dataclasses.replace(connections.limits, **changes)
    clients = [await room.client(sent) for _ in range(3)]
    if sent == BYE:  # closed at once: its place is free
        await until(lambda: connections.places == 0)
        await goes_on(await room.client())
        return
    await until(lambda: connections.places == 3)
    if sent:
        for client in clients:
            await client.reader.readuntil(b"}}")
    await told_too_many(await room.client(), f"--{limit.replace('_', '-')}")
    reset(clients.pop())
    await until(lambda: connections.places == 2)
    await goes_on(await room.client())


@served(max_connections_per_address=2)
async def test_one_address_with_too_many_connections_leaves_room_for_others(
    room: Room,
) -> None:
    first, second = await room.client(), await room.client()
    await goes_on(first, second)
    await told_too_many(await room.client(), "--max-connections-per-address")
    await told_health(await room.client())
    others = [await room.client(source="127.0.0.2") for _ in range(2)]
    await goes_on(first, second, *others)
    first.writer.close()
    await until(lambda: len(room.service.connections.open) == 3)
    await goes_on(await room.client(), second)


def test_who_comes_over_a_unix_socket_has_no_address(tmp_path: Path) -> None:
    async def check() -> None:
        path = str(tmp_path / "socket")
        async with kit.running_service(
            host="none", uds=path, max_connections_per_address=1
        ):
            clients = [
                Client(*await asyncio.open_unix_connection(path)) for _ in range(3)
            ]
            await goes_on(*clients)
            for client in clients:
                client.writer.close()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("", ""),
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.2", "192.0.2.2"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::FFFF:c000:201", "192.0.2.1"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff:ffff:ffff:ffff", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2:0:0:0:3", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("::192.0.2.1", "::/64"),
    ],
)
def test_a_client_is_an_ipv4_address_or_an_ipv6_network(
    peer: str, network: str
) -> None:
    assert es.network_of(peer) == network


HALF = 600_000  # of a MiB: two of them are too much
TWICE_THE_LIMIT = b'{"input":"a"}'.ljust(2 << 20)


def chunked(*parts: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """A request for vectors that does not say how long it is."""
    lines = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts]
    return post("/v1/embeddings", "Transfer-Encoding: chunked") + b"".join(lines) + end


async def holder(room: Room) -> tuple[Client, bytes]:
    """A client of whose body half a MiB has come, and what is left to send."""
    whole = b'{"input":"a"}'.ljust(HALF + 1)
    client = await room.client(post("/v1/embeddings", length=len(whole)), whole[:-1])
    await until(lambda: room.held() == HALF)
    return client, whole[-1:]


async def told_full(client: Client) -> None:
    """The only answer says that there is no room."""
    (reply,) = await client.replies("POST")
    assert (reply.status, reply.error["code"]) == (503, "overloaded")
    assert "--max-buffered-mb" in reply.error["message"]
    assert reply.headers["connection"] == "close"
    assert int(reply.headers["retry-after"]) >= 1


@served(max_buffered_mb=1)
async def test_a_body_that_there_is_no_room_for_is_refused_before_it_comes(
    room: Room,
) -> None:
    first, rest = await holder(room)
    head = post("/v1/embeddings", "Expect: 100-continue", length=HALF)
    await told_full(await room.client(head))
    await told_full(await room.client(post("/v1/embeddings", length=HALF)))
    small = await room.client(embed("small"))
    assert (await small.reply("POST")).status == 200
    first.send(rest)
    assert (await first.reply("POST")).status == 200
    assert room.held() == 0
    small.send(post("/v1/embeddings", length=HALF), b'{"input":"b"}'.ljust(HALF))
    assert (await small.reply("POST")).status == 200


@served(max_buffered_mb=1)
async def test_a_body_of_unknown_length_is_refused_when_there_is_no_more_room(
    room: Room,
) -> None:
    first, rest = await holder(room)
    await told_full(await room.client(chunked(bytes(HALF), end=b"")))
    assert room.held() == HALF
    first.send(rest)
    assert (await first.reply("POST")).status == 200


@pytest.mark.parametrize(
    "sent",
    [
        post("/v1/embeddings", length=len(TWICE_THE_LIMIT)) + TWICE_THE_LIMIT,
        chunked(TWICE_THE_LIMIT),
    ],
    ids=["sized", "chunked"],
)
@served(max_buffered_mb=1)
async def test_alone_a_request_passes_that_is_larger_than_the_room_for_all(
    room: Room, sent: bytes
) -> None:
    client = await room.client(sent)
    assert (await client.reply("POST")).status == 200
    assert room.held() == 0


@served(n_embd=4096, max_buffered_mb=1)
async def test_replies_that_nobody_takes_are_counted_until_their_client_leaves(
    room: Room,
) -> None:
    stuck = await room.client(MANY, reads_little=True)
    await until(lambda: room.held() > 1 << 20)
    await told_full(await room.client(post("/v1/embeddings", length=HALF)))
    stuck.writer.transport.abort()
    await until(lambda: room.held() == 0)


@pytest.mark.parametrize(
    ("sent", "methods"),
    [
        (embed("a", "b") * 3, ["POST"] * 3),
        (embed(*["a"] * 500), ["POST"]),
        (post("/nope", length=1 << 15) + bytes(1 << 15), ["POST"]),
        (chunked(b'{"input"', b':"a"}') + HEALTH, ["POST", "GET"]),
        (b"\r\n", []),
    ],
    ids=["small", "large answer", "refused", "chunked", "empty line"],
)
@served(n_embd=4096)
async def test_nothing_is_held_for_who_is_quiet(
    room: Room, sent: bytes, methods: list[str]
) -> None:
    client = await room.client(sent)
    for method in methods:
        await client.reply(method)
    await until(lambda: room.held() == 0)
    await goes_on(client)
    assert room.held() == 0


# --- time ---


@pytest.mark.parametrize("seconds", [0.5, 7.9, 300.0])
@served()
async def test_a_reply_says_how_long_the_connection_is_kept(
    room: Room, seconds: float
) -> None:
    # Clients that know stop using it in time, and lose no request to the race.
    connections = room.service.connections
    connections.limits = dataclasses.replace(connections.limits, keep_alive_s=seconds)
    client = await room.client(HEALTH, b"GET /nope HTTP/1.1\r\nHost: h\r\n\r\n", BYE)
    replies = await client.replies(*["GET"] * 3)
    told = [reply.headers.get("keep-alive") for reply in replies]
    assert told == [f"timeout={int(seconds)}"] * 2 + [None]


def test_an_idle_connection_outlives_what_keeps_it_for_90_s() -> None:
    # Traefik, and everybody's Go: idle connections are theirs to close.
    assert kit.settings().keep_alive_s > 90


@served(keep_alive_s=0.2)
async def test_an_idle_connection_is_closed_after_keep_alive(room: Room) -> None:
    client = await room.client(HEALTH)
    assert (await client.reply()).status == 200
    begun = asyncio.get_running_loop().time()
    assert await client.rest() == b""
    assert asyncio.get_running_loop().time() - begun > 0.15


@served(keep_alive_s=0.6)
async def test_a_refused_request_ends_being_idle_as_any_does(room: Room) -> None:
    client = await room.client()
    for _ in range(9):
        client.send(NOPE)
        assert (await client.reply()).status == 404
        await asyncio.sleep(0.1)  # not to wait for anything: this client has pauses


@served(header_timeout_s=0.2, body_timeout_s=0.2)
async def test_a_silent_connection_is_closed_silently(room: Room) -> None:
    assert await (await room.client()).rest() == b""


@served(keep_alive_s=0.1, header_timeout_s=0.1)
async def test_computing_is_not_idling(room: Room) -> None:
    room.engine.block()
    busy = await room.client(embed("a"))
    await room.computing()
    idle = await room.client(HEALTH)
    assert (await idle.replies("GET"))[0].status == 200  # and then it was closed
    room.engine.release()
    assert (await busy.reply("POST")).status == 200


SLOW = {
    "first line": b"GET / HT",
    "headers": b"GET / HTTP/1.1\r\nHost: h\r\nX: ",
    "sized body": post("/v1/embeddings", length=10**6),
    "chunk": post("/v1/embeddings", "Transfer-Encoding: chunked") + b"FFFFF\r\n",
}


@pytest.mark.parametrize("served_before", [False, True])
@pytest.mark.parametrize("slow", SLOW)
@served(header_timeout_s=0.3, body_timeout_s=0.3)
async def test_who_sends_too_slowly_is_told_408(
    room: Room, slow: str, served_before: bool
) -> None:
    client = await room.client()
    if served_before:
        client.send(HEALTH)
        await client.reply()
    client.send(SLOW[slow])
    rest = asyncio.ensure_future(client.rest())
    while not rest.done():  # a byte now and then must not buy more time (slowloris)
        client.send(b"x")
        await asyncio.wait({rest}, timeout=0.02)
    reply = kit.parse_reply(rest.result(), "GET")
    assert (reply.status, reply.error["code"]) == (408, "receive_timeout")
    assert reply.headers["connection"] == "close"


DRIP_S = 0.02  # not to wait for anything: these are slow clients


@pytest.mark.parametrize("framing", ["Content-Length: 999999", *list(BODIES)[1:]])
@served(min_rate_bytes_s=1000)
async def test_a_body_that_comes_too_slowly_is_told_408(
    room: Room, framing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_BODY_CHECK_S", 0.2)
    client = await room.client(post("/v1/embeddings", framing))
    client.send(b"9999\r\n")
    rest = asyncio.ensure_future(client.rest())
    while not rest.done():
        client.send(b"x")
        await asyncio.wait({rest}, timeout=DRIP_S)
    reply = kit.parse_reply(rest.result(), "POST")
    assert (reply.status, reply.error["code"]) == (408, "receive_timeout")
    assert "less than 1000 bytes per second" in reply.error["message"]
    assert reply.headers["connection"] == "close"


@served(min_rate_bytes_s=100)
async def test_a_body_that_comes_slowly_but_steadily_is_waited_for(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_BODY_CHECK_S", 0.1)
    body = b'{"input":"a"}'.ljust(2000)
    client = await room.client(post("/v1/embeddings", length=len(body)))
    for begin in range(0, len(body), 50):  # for a second
        client.send(body[begin : begin + 50])
        await asyncio.sleep(DRIP_S)
    assert (await client.reply("POST")).status == 200


@served(min_rate_bytes_s=0)
async def test_without_a_least_rate_a_body_may_take_its_whole_time(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_BODY_CHECK_S", 0.05)
    client = await room.client(post("/v1/embeddings", length=13), b'{"input"')
    await asyncio.sleep(10 * DRIP_S)
    client.send(b':"a"}')
    assert (await client.reply("POST")).status == 200


# --- leaving ---


def half_closed(client: Client) -> None:
    client.writer.write_eof()


def closed(client: Client) -> None:
    client.writer.close()


def reset(client: Client) -> None:
    sock = client.writer.get_extra_info("socket")
    if sock.fileno() >= 0:  # else the server has closed it, and we have noticed
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.writer.transport.abort()


# Who has closed looks like one that only sends no more, and is given so long.
SOON: dict[Callable[[Client], None], float] = {
    closed: 0.05,
    half_closed: 0.05,
    reset: 3600,
}


@pytest.mark.parametrize("leave", SOON)
@served()
async def test_what_waits_is_not_computed_for_who_has_left(
    room: Room, leave: Callable[[Client], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "HALF_CLOSED_S", SOON[leave])
    room.engine.block()
    stays = await room.client(embed("stays"))
    await room.computing()
    leaves = await room.client(embed("leaves", "leaves too"), HEALTH)
    await until(lambda: room.waiting() == 3)
    leave(leaves)
    await until(lambda: room.waiting() == 1)
    room.engine.release()
    assert (await stays.reply("POST")).status == 200
    stays.send(embed("after"))
    assert (await stays.reply("POST")).status == 200
    assert room.engine.calls == [[ids("stays")], [ids("after")]]
    assert room.waiting() == 0
    assert "status=499" in room.running.log.getvalue()


@served()
async def test_a_large_request_is_not_finished_for_who_has_left(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "HALF_CLOSED_S", 0.05)
    room.engine.block()
    leaves = await room.client(embed(*(f"a{n}" for n in range(100))))
    await room.computing()
    closed(leaves)
    await until(lambda: room.waiting() == 0)
    room.engine.release()
    stays = await room.client(embed("stays"))
    assert (await stays.reply("POST")).status == 200
    assert room.engine.aborts == 1, "the call that ran already"
    assert len(room.engine.calls) == 1


@pytest.mark.parametrize("leave", [closed, half_closed, reset])
@pytest.mark.parametrize(
    "sent", [b"", b"GET", SLOW["sized body"], HEALTH, b"bad\r\n\r\n"]
)
@served()
async def test_a_connection_ends_with_its_client(
    room: Room, sent: bytes, leave: Callable[[Client], None]
) -> None:
    client = await room.client(sent)
    await until(lambda: len(room.service.connections.open) == 1)
    leave(client)
    await until(lambda: not room.service.connections.open)


CHUNKED = b"0d\r\n" + BODIES["Content-Length: 13"] + b"\r\n0\r\n\r\n"
WHOLE: dict[str, tuple[list[bytes], list[tuple[str, int]]]] = {
    "one": ([embed("a")], [("POST", 200)]),
    "chunked": (
        [post("/v1/embeddings", "Transfer-Encoding: chunked"), CHUNKED],
        [("POST", 200)],
    ),
    "several": ([embed("a"), HEALTH, embed("b")], [("POST", 200), ("GET", 200)] * 2),
    "refused": ([b"GET /nope HTTP/1.1\r\nHost: h\r\n\r\n"], [("GET", 404)]),
    "refused, then more": (
        [post("/nope", length=3) + b"xxx", embed("a")],
        [("POST", 404), ("POST", 200)],
    ),
    "cut in its head": ([embed("a"), b"GET / HT"], [("POST", 200), ("GET", 400)]),
    "cut in its body": ([embed("a")[:-1]], [("POST", 400)]),
    "cut in a chunk": (
        [post("/v1/embeddings", "Transfer-Encoding: chunked"), CHUNKED[:9]],
        [("POST", 400)],
    ),
    "cut, and refused already": ([post("/nope", length=3) + b"x"], [("POST", 404)]),
    "nothing": ([], []),
}
WHOLE["several"][1].pop()


@pytest.mark.parametrize("what", WHOLE)
@served()
async def test_who_sends_no_more_gets_what_was_asked_for(room: Room, what: str) -> None:
    sent, expected = WHOLE[what]
    client = await room.client(*sent)
    half_closed(client)
    replies = await client.replies(*(method for method, _ in expected))
    assert [reply.status for reply in replies] == [status for _, status in expected]
    is_cut = what.startswith("cut")
    if replies and not is_cut and what != "refused":
        assert replies[-1].headers["connection"] == "close"
    await until(lambda: not room.service.connections.open)


@served()
async def test_who_sends_no_more_waits_a_second_and_not_much_longer(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert es.HALF_CLOSED_S == 1.0
    room.engine.block()
    client = await room.client(embed("a"))
    await room.computing()
    half_closed(client)
    for _ in range(3):  # the loop turns, others are served
        assert (await room.running.ask("GET", "/health")).status == 200
    room.engine.release()
    assert [reply.status for reply in await client.replies("POST")] == [200]

    monkeypatch.setattr(es, "HALF_CLOSED_S", 0.1)
    room.engine.block()
    late = await room.client(embed("b"), HEALTH)
    await room.computing()
    half_closed(late)
    assert await late.rest() == b""
    assert "status=499" in room.running.log.getvalue()
    room.engine.release()


@served(n_embd=4096)
async def test_who_sends_no_more_and_reads_slowly_gets_what_is_done(room: Room) -> None:
    client, _, asked = await stuffed(room, embed("a"), HEALTH, least=1)
    half_closed(client)
    assert len(await client.replies(*["POST"] * asked)) == asked
    await until(lambda: not room.service.connections.open)


# --- bugs ---


async def no_answer(*_: object) -> es.Response:
    raise KeyError("anything")


async def not_by_us(*_: object) -> es.Response:
    raise asyncio.CancelledError


async def two_lines(*_: object) -> es.Response:
    return es.Response(200, headers=(("x", "a\r\nb"),))


async def no_bytes(*_: object) -> es.Response:
    return es.Response(200, "text" * (1 << 16))  # type: ignore[arg-type]


@pytest.mark.parametrize("bug", [no_answer, not_by_us, two_lines, no_bytes])
@served(has_bug=True)
async def test_a_bug_after_the_handler_is_told_and_ends_the_connection(
    room: Room, bug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es.Dispatcher, "respond", bug)
    client = await room.client(HEALTH, HEALTH)
    (reply,) = await client.replies("GET")
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert reply.headers["connection"] == "close"
    (line,) = (x for x in room.running.log.getvalue().splitlines() if " bug " in x)
    assert f"id={reply.headers['x-request-id']}" in line
    assert "Traceback" in line


@served(has_bug=True)
async def test_a_bug_before_the_body_is_told_and_ends_the_connection(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    def admit(*_: object) -> None:
        raise KeyError("anything")

    monkeypatch.setattr(es.Dispatcher, "admit", admit)
    (reply,) = await (await room.client(embed("a"))).replies("POST")
    assert (reply.status, reply.error["code"]) == (500, "internal_error")


# --- reading slowly ---

MANY = embed(*["a"] * 500)  # with n_embd=4096 some 20 MB of answer: kernels buffer less


@served(n_embd=4096)
async def test_who_stops_reading_does_not_hold_up_others(room: Room) -> None:
    stuck = await room.client(MANY, MANY, reads_little=True)
    await until(lambda: room.answered() == 1)
    other = await room.client(embed("b", close=True))
    assert (await other.replies("POST"))[0].status == 200
    assert room.answered() == 2  # the second of the stuck client waits
    for _ in range(2):
        assert len((await stuck.reply("POST")).json["data"]) == 500


@served(n_embd=4096, write_timeout_s=0.8)
async def test_who_reads_slowly_but_steadily_gets_all(room: Room) -> None:
    client = await room.client(MANY, reads_little=True)
    raw = await client.reader.readuntil(b"\r\n\r\n")
    size = int(kit.parse_reply(raw, "HEAD").headers["content-length"])
    step = size // 20 + 1
    for begin in range(0, size, step):
        raw += await client.reader.readexactly(min(step, size - begin))
        await asyncio.sleep(0.08)  # not to wait for anything: this is a slow client
    assert len(kit.parse_reply(raw, "POST").json["data"]) == 500


@served(n_embd=4096, write_timeout_s=0.3, min_rate_bytes_s=1 << 30)
async def test_who_reads_too_slowly_is_dropped(room: Room) -> None:
    client = await room.client(MANY, reads_little=True)
    await until(lambda: room.answered() == 1)
    while room.service.connections.open:
        assert await client.reader.read(4096)
        await asyncio.sleep(DRIP_S)


async def stuffed(
    room: Room, *requests: bytes, least: int
) -> tuple[Client, es.Connection, int]:
    """A client that does not read, the server's end, and how many answers are due.

    ``least`` bytes of them, at most what may be written, have not left the server. It
    is asked the first of ``requests`` until some stay there, then the last.
    """
    client = await room.client(reads_little=True)
    await until(lambda: len(room.service.connections.open) == 1)
    (connection,) = room.service.connections.open
    asked = unsent = 0
    while unsent < least:
        client.send(requests[-1 if unsent else 0])
        asked += 1
        await until(lambda: room.answered() >= asked)  # noqa: B023
        unsent = connection._transport.get_write_buffer_size()
    assert connection._is_writable
    return client, connection, asked


THEN = {
    "asks more": MANY,
    "says close": BYE,
    "says nonsense": b"bad\r\n\r\n",
    "falls silent": b"",
    "stops in a head": b"GET",
}


@pytest.mark.parametrize("then", THEN)
@served(n_embd=4096, write_timeout_s=0.5, keep_alive_s=0.5, header_timeout_s=0.5)
async def test_who_does_not_read_is_dropped(
    room: Room, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # close() waits until all is written: without a timer, for ever.
    monkeypatch.setattr(es, "_LINGER_S", 0.3)
    client, _, _ = await stuffed(room, embed("a"), least=1)
    client.send(THEN[then])
    await until(lambda: not room.service.connections.open)


@served(n_embd=4096)
async def test_leaving_is_noticed_while_answers_are_unsent(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A closing transport reports its end only when all is written.
    monkeypatch.setattr(es, "HALF_CLOSED_S", 0.1)
    client, _, asked = await stuffed(room, embed("a"), least=1)
    room.engine.block()
    client.send(embed("b"), embed("c"))
    await room.computing()
    half_closed(client)
    await until(lambda: "status=499" in room.running.log.getvalue())
    room.engine.release()
    assert len(await client.replies(*["POST"] * asked)) == asked
    assert ids("c") not in [batch[0] for batch in room.engine.calls]


@served(n_embd=4096)
async def test_lingering_ends_for_who_reads_late(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The refusal's 352 bytes make the buffer full: writing pauses after lingering began,
    # and resumes before it ends. (Of 276 bytes a reply to HEALTH, one more had not.)
    monkeypatch.setattr(es, "_LINGER_S", 0.3)
    client, _, asked = await stuffed(room, embed("a"), HEALTH, least=(1 << 16) - 300)
    client.send(b"bad\r\n\r\n")
    await until(lambda: room.answered() == asked + 1)
    replies = await client.replies(*["GET"] * (asked + 1))
    assert [reply.status for reply in replies] == [200] * asked + [400]
    await until(lambda: not room.service.connections.open)  # we did not close


@served(write_timeout_s=0.1)
async def test_who_reads_again_is_not_dropped_while_the_next_answer_is_computed(
    room: Room,
) -> None:
    room.engine.block()
    client = await room.client(embed("a"))
    await room.computing()
    (connection,) = room.service.connections.open
    is_timed = [False]
    for step in (connection.pause_writing, connection.resume_writing):
        step()
        is_timed.append(connection._alarm is not None)
    assert is_timed == [False, True, False]
    room.engine.release()
    assert (await client.reply("POST")).status == 200


# --- large requests and replies ---


class Pause:
    """Stands before a function: it says when it is called, and waits until it may go on.

    On the event loop's thread nobody would ever let it go on.
    """

    def __init__(self, real: Callable[..., Any]) -> None:
        self._real = real
        self.began, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.began.set()
        kit.wait(self.may_go_on)
        return self._real(*given, **named)


@pytest.mark.parametrize(
    "step", ["json_object", "parse_form", "json_in_pieces", "compressed"]
)
@served(n_embd=4096, gzip="all")
async def test_others_are_served_while_much_json_is_read_written_or_compressed(
    room: Room, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = Pause(getattr(es, step))
    monkeypatch.setattr(es, step, pause)
    body = es.json_codec().dumps({"input": ["a"] * 100}).ljust(1 << 17)
    head = post("/v1/embeddings", "Accept-Encoding: gzip", length=len(body))
    large = await room.client(head, body)
    await asyncio.to_thread(kit.wait, pause.began)
    other = await room.client()
    for _ in range(10):
        other.send(HEALTH)
        assert (await other.reply()).status == 200
    assert room.answered() == 10
    pause.may_go_on.set()
    reply = await large.reply("POST")
    assert (reply.status, reply.headers["content-encoding"]) == (200, "gzip")


@served(n_embd=4096)
async def test_health_is_answered_in_the_middle_of_a_large_reply(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Off the loop is not enough: whoever holds the interpreter for all of 20 MB holds
    # the loop up too.
    events: list[str] = []
    real = es.json_in_pieces

    def noted(*given: Any) -> bytes:
        events.append("begin")
        try:
            return real(*given)
        finally:
            events.append("end")

    monkeypatch.setattr(es, "json_in_pieces", noted)
    large = await room.client(MANY)
    reply = asyncio.ensure_future(large.reply("POST"))
    other = await room.client()
    while not reply.done():
        other.send(HEALTH)
        assert (await other.reply()).status == 200
        events.append("health")
    assert len(reply.result().json["data"]) == 500
    last = len(events) - events[::-1].index("end")  # it calls itself for what is within
    between = events[events.index("begin") + 1 : last]
    assert between.count("health") >= 3


# --- the end ---


@served()
async def test_a_drain_lets_accepted_work_finish(room: Room) -> None:
    room.engine.block()
    idle = await room.client(HEALTH)
    await idle.reply()
    busy = await room.client(embed("a"), HEALTH)
    await room.computing()
    room.server.stop()
    assert await idle.rest() == b""
    for path, status in (("/ready", 503), ("/health", 200)):
        reply = await room.running.ask("GET", path)
        assert (reply.status, reply.headers["connection"]) == (status, "close")
    late = await room.client(embed("late"))
    (reply,) = await late.replies("POST")
    assert (reply.status, reply.error["code"]) == (503, "not_ready")
    late.writer.close()
    room.engine.release()
    (reply,) = await busy.replies("POST")
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    assert await room.running.task == 0
    assert room.engine.calls == [[ids("a")]]


@served(drain_grace_s=3600, drain_timeout_s=3600)
async def test_who_leaves_goes_on_working_and_says_so(room: Room) -> None:
    idle = await room.client(HEALTH)
    await idle.reply()
    room.server.leave()
    assert " leaving after=leave" in room.running.log.getvalue()
    ready = await room.running.ask("GET", "/ready")
    assert (ready.status, ready.error["code"]) == (503, "not_ready")
    idle.send(embed("a"), HEALTH)  # an idle connection is not closed under its client
    (reply,) = await idle.replies("POST")
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    await room.computing()  # that was
    refused = await room.client(NOPE, HEALTH)
    (reply,) = await refused.replies("GET")
    assert (reply.status, reply.headers["connection"]) == (404, "close")
    room.engine.block()
    busy = await room.client(embed("b"))
    await room.computing()
    room.server._move(es.Phase.DRAINING, "noticed")  # the grace is over
    assert " draining after=noticed" in room.running.log.getvalue()
    late = await room.client(embed("late"))
    (reply,) = await late.replies("POST")
    assert (reply.status, reply.error["code"]) == (503, "not_ready")
    late.writer.close()
    room.engine.release()
    assert (await busy.reply("POST")).status == 200
    assert await room.running.task == 0


@served(drain_grace_s=0.1)
async def test_a_grace_ends_by_itself(room: Room) -> None:
    room.server.leave()
    assert await room.running.task == 0


@served(drain_timeout_s=3600)
async def test_a_second_stop_ends_at_once(room: Room) -> None:
    room.engine.block()
    idle = await room.client(HEALTH)
    await idle.reply()
    busy = await room.client(embed("a"))
    await room.computing()
    room.server.stop()
    assert await idle.rest() == b""  # the drain has begun
    assert (await room.running.ask("GET", "/health")).status == 200
    room.server.stop()
    (reply,) = await busy.replies("POST")
    assert (reply.status, reply.error["code"]) == (503, "not_ready")
    room.engine.release()  # a call of llama.cpp cannot be interrupted
    assert await room.running.task == 0


@served(drain_timeout_s=0.1)
async def test_a_drain_ends_after_its_timeout(room: Room) -> None:
    room.engine.block()
    busy = await room.client(embed("a"))
    await room.computing()
    room.server.stop()
    (reply,) = await busy.replies("POST")
    assert (reply.status, reply.error["code"]) == (503, "not_ready")
    room.engine.release()
    assert await room.running.task == 0


@pytest.mark.parametrize("begun", [b"", b"GET"])  # and perhaps a next request
@served(n_embd=4096, drain_timeout_s=3600, write_timeout_s=3600)
async def test_a_drain_lasts_until_answers_have_left(room: Room, begun: bytes) -> None:
    client, connection, asked = await stuffed(room, embed("a"), least=1)
    client.send(begun)
    await until(lambda: connection._parser.is_between_requests == (not begun))
    room.server.stop()
    replies = await client.replies(*["POST"] * asked)
    assert {reply.status for reply in replies} == {200}
    assert await room.running.task == 0


# --- out of descriptors ---


@pytest.mark.parametrize("spare", [1, 3])
@served()
async def test_without_descriptors_health_is_answered_and_the_log_says_why(
    room: Room, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_SPARE_DESCRIPTORS", spare)
    monkeypatch.setattr(es, "_LINGER_S", 0.1)
    monkeypatch.setattr(es, "_TURN_AWAY_S", 0.1)
    connections, accept, opened = (
        room.service.connections,
        socket.socket.accept,
        os.open,
    )
    acceptor = room.server._acceptor
    assert acceptor is not None
    most = spare + 2

    def check_free(*, extra: int) -> None:
        if len(connections.open) + len(acceptor._spare) + extra > most:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def tight_accept(listener: socket.socket) -> tuple[socket.socket, Any]:
        check_free(extra=1)
        return accept(listener)

    def tight_open(path: str, *args: Any, **named: Any) -> int:
        check_free(extra=path == os.devnull)
        return opened(path, *args, **named)

    stays = [await room.client() for _ in range(2)]
    await goes_on(*stays)
    acceptor._spare[spare:] = []
    monkeypatch.setattr(socket.socket, "accept", tight_accept)
    monkeypatch.setattr(os, "open", tight_open)
    crowd = [await room.client(b"bad\r\n\r\n") for _ in range(20)]
    for _ in range(3):
        await told_health(await room.client())
    await goes_on(*stays)
    lines = [x for x in room.running.log.getvalue().splitlines() if "descriptors" in x]
    assert 1 <= sum("no descriptors left" in line for line in lines) <= 3
    assert "ulimit -n" in lines[0] and "--max-connections" in lines[0]
    for client in crowd:
        reset(client)
    await until(lambda: len(connections.open) == 2)
    monkeypatch.undo()
    client = await room.client()
    await goes_on(client, *stays)  # no more than before has been taken


# --- who has no name ---


@served()
async def test_who_resets_at_once_is_known_by_the_address_that_was_accepted(
    room: Room,
) -> None:
    # uvloop asks the kernel late: then such a client has no name any more.
    for number in range(20):
        client = await room.client(
            f"GET /n{number} HTTP/1.1\r\nHost: h\r\n\r\n".encode(), source="127.0.0.3"
        )
        reset(client)
    await goes_on(await room.client())
    for line in room.running.log.getvalue().splitlines():
        assert "path=/n" not in line or " address=127.0.0.3 " in line


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_a_reply_to_a_connection_that_was_just_closed_is_dropped(size: int) -> None:
    """A stop closes them; uvloop's write() then raises, which was logged as a bug."""
    transport = mock.Mock()
    transport.is_closing.return_value = True
    transport.write.side_effect = RuntimeError("the handler is closed")
    connection: Any = mock.Mock(_transport=transport, _is_tls=False)
    es.ClientSocket._send(connection, b"head", bytes(size))
