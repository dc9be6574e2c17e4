"""Bodies that come in parts, over real sockets: MESSAGES, SOCKETS, CONNECTIONS, DISPATCH.

The parts are those of a fake source, which says what it was asked for and how it ended.
Every test runs on both loops, as those of CONNECTIONS do.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest

import embellama_server as es
from tests import kit
from tests.test_connections import (
    DRIP_S,
    HEALTH,
    Client,
    Room,
    closed,
    embed,
    half_closed,
    post,
    reset,
    served,
    until,
)
from tests.test_listeners import Files, connected, files, on_each_loop  # noqa: F401

BODY = b'{"input":"a"}'


def asked(*headers: str, version: str = "1.1") -> bytes:
    """A request for a stream."""
    head = post("/stream", *headers, length=len(BODY))
    return head.replace(b"HTTP/1.1", f"HTTP/{version}".encode()) + BODY


class Source:
    """What one request is answered with: the parts of say(), which waits for none."""

    def __init__(self, context: es.RequestContext) -> None:
        self.context = context
        self.wanted = 0  # parts that were asked for
        self.ended = asyncio.Event()
        self.how = ""  # it ended
        self._parts: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()

    def say(self, *parts: bytes | BaseException | None) -> None:
        """The next parts; None is the end, an exception a bad one."""
        for part in parts:
            self._parts.put_nowait(part)

    async def parts(self) -> AsyncGenerator[bytes, None]:
        self.how = "at its end"
        try:
            while (part := await self._next()) is not None:
                if isinstance(part, BaseException):
                    raise part
                yield part
        except asyncio.CancelledError:
            self.how = "cancelled"
            raise
        except GeneratorExit:
            self.how = "closed"
            raise
        finally:
            self.ended.set()

    async def _next(self) -> bytes | BaseException | None:
        self.wanted += 1
        return await self._parts.get()


class Streams:
    """Serves /stream, by a source for each request."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, content_type: str = es.EVENT_STREAM
    ) -> None:
        self._begun: asyncio.Queue[Source] = asyncio.Queue()
        self._content_type = content_type
        self.first: tuple[bytes | None, ...] = ()  # said by each source at once
        routes = [
            es.Route("GET", "/stream", self._handle),
            es.Route("POST", "/stream", self._handle, es.EmbeddingsForm),
        ]
        monkeypatch.setitem(es._BY_PATH, "/stream", routes)

    async def _handle(self, context: es.RequestContext, *_: object) -> es.Response:
        source = Source(context)
        source.say(*self.first)
        self._begun.put_nowait(source)
        return es.stream_response(source.parts(), self._content_type)

    async def next(self) -> Source:
        """The source of one more request."""
        return await self._begun.get()


async def begun(
    room: Room, streams: Streams, request: bytes = asked()
) -> tuple[Client, Source]:
    """A client that has read a first part."""
    client = await room.client(request)
    source = await streams.next()
    source.say(b"first")
    await client.reader.readuntil(b"first")
    if b"HTTP/1.1" in request:
        await client.reader.readexactly(2)
    return client, source


def reads_on_demand(client: Client) -> None:
    """From now on asyncio reads little more than the test does."""
    client.reader._limit = 512  # type: ignore[attr-defined]


async def head(client: Client) -> kit.Reply:
    """The head that comes next."""
    return kit.parse_reply(await client.reader.readuntil(b"\r\n\r\n"), "HEAD")


async def chunks(client: Client, *expected: bytes) -> None:
    """These chunks come next."""
    for part in expected:
        assert await client.reader.readline() == b"%x\r\n" % len(part)
        assert await client.reader.readexactly(len(part) + 2) == part + b"\r\n"


def lines(running: kit.RunningService, path: str = "/stream") -> list[str]:
    """The log lines of requests for a path."""
    logged = running.log.getvalue().splitlines()
    return [x for x in logged if " request " in x and f" path={path} " in x]


async def logged(running: kit.RunningService) -> str:
    """The only log line of a stream, once it is there."""
    await until(lambda: bool(lines(running)))
    (line,) = lines(running)
    return line


async def only_connection(running: kit.RunningService) -> es.Connection:
    await until(lambda: len(running.service.connections.open) == 1)
    (connection,) = running.service.connections.open
    return connection


async def stalled(room: Room, source: Source) -> es.Connection:
    """Return the only connection once its source has waited for room for a while."""
    connection = await only_connection(room.running)
    wanted = -1
    while wanted < source.wanted:  # the kernels move a little more
        await until(lambda: not connection._is_writable)
        wanted = source.wanted
        for _ in range(10):
            assert (await room.running.ask("GET", "/health")).status == 200
    return connection


PART = b"x" * 1000


# --- bytes ---


def test_json_is_framed_as_the_stream_s_type_says() -> None:
    assert es.framed(b"{}", es.EVENT_STREAM) == b"data: {}\n\n"
    assert es.framed(b"{}", es.NDJSON) == b"{}\n"
    assert es.framed(b"{}", "text/plain; charset=utf-8") == b""


@pytest.mark.parametrize("kind", [es.EVENT_STREAM, es.NDJSON])
def test_what_some_clients_take_for_a_line_s_end_is_escaped(kind: str) -> None:
    text = "a\u2028b\u2029c\x85d\u00e9\u2027\u202a"
    frame = bytes(es.framed(es.json_codec().dumps({"error": text}), kind))
    (line,) = filter(None, frame.decode().splitlines())
    assert json.loads(line.removeprefix("data: ")) == {"error": text}


def test_an_empty_part_is_not_the_last_chunk() -> None:
    assert es.chunk_of(b"", 1) == b""
    assert es.chunk_of(b"abc", 1) == b"3\r\nabc\r\n"
    assert es.chunk_of(b"abc", 0) == b"abc"


# --- the head ---


@served(gzip="all")
async def test_a_stream_says_that_nobody_should_keep_it_back(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked("Accept-Encoding: gzip", "X-Request-Id: mine"))
    large = b"x" * 70_000
    (await streams.next()).say(large, None)
    reply = await head(client)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["x-request-id"] == "mine"
    assert reply.headers["transfer-encoding"] == "chunked"
    assert not {"content-length", "content-encoding", "connection"} & set(reply.headers)
    await chunks(client, large, b"")


@served()
async def test_the_head_comes_with_the_first_part_and_not_before(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked())
    source = await streams.next()
    reply = asyncio.ensure_future(client.reader.read(1 << 16))
    await room.running.ask("GET", "/health")
    assert not reply.done()
    source.say(b"", b"one")
    await until(reply.done)
    assert reply.result().endswith(b"\r\n\r\n3\r\none\r\n")  # at once


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (es.EngineFailed("it broke"), 500, "engine_failed"),
        (es.NotReady("not now", retry_after_s=2), 503, "not_ready"),
    ],
)
@served()
async def test_an_error_before_the_first_part_has_its_own_status(
    room: Room, error: es.ApiError, status: int, code: str, monkeypatch: Any
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked())
    (await streams.next()).say(error)
    reply = await client.reply("POST")
    assert (reply.status, reply.error["code"]) == (status, code)
    assert reply.headers["content-type"] == "application/json"
    assert ("retry-after" in reply.headers) == (status == 503)
    client.send(embed("a"))  # the connection goes on
    assert (await client.reply("POST")).status == 200
    line = await logged(room.running)
    assert f" status={status} " in line and f" code={code} " in line
    assert "stream_bytes" not in line
    errors = "embellama_errors_total"
    assert room.service.telemetry.value(errors, code) == 1


@served(has_bug=True)
async def test_a_bug_before_the_first_part_is_a_500(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked())
    (await streams.next()).say(KeyError("anything"))
    reply = await client.reply("POST")
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert room.running.log.getvalue().count("Traceback") == 1


@served(request_timeout_s=0.2)
async def test_a_deadline_is_for_the_first_part_only(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked())
    source = await streams.next()
    reply = await client.reply("POST")
    assert (reply.status, reply.error["code"]) == (504, "request_timeout")
    assert source.how == "cancelled"
    client.send(asked())
    source = await streams.next()
    source.say(b"one")
    await head(client)
    await chunks(client, b"one")
    await asyncio.sleep(0.3)  # longer than that
    source.say(b"two", None)
    await chunks(client, b"two", b"")


@served()
async def test_a_stream_without_a_part_is_an_empty_reply(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked(), embed("a"))
    (await streams.next()).say(None)
    reply = await client.reply("POST")
    assert (reply.status, reply.headers["content-length"]) == (200, "0")
    assert (await client.reply("POST")).status == 200


# --- the parts ---


@served()
async def test_parts_are_sent_as_soon_as_they_are_made_and_requests_behind_them_wait(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked(), embed("a"), asked())
    source = await streams.next()
    source.say(b"one")
    await head(client)
    await chunks(client, b"one")
    for part in (b"two", b"\r\n0\r\n\r\n", b"x" * 70_000):
        source.say(b"", part)
        await chunks(client, part)
    assert room.answered() == 0 and not room.engine.calls
    assert room.service.telemetry.value("embellama_http_streams") == 1
    source.say(None)
    await chunks(client, b"")
    assert (await client.reply("POST")).status == 200
    another = await streams.next()
    another.say(b"more", None)
    assert (await head(client)).status == 200
    await chunks(client, b"more", b"")
    assert room.service.telemetry.value("embellama_http_streams") == 0


@served()
async def test_a_request_behind_a_stream_is_refused_as_any_other(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked("Connection: keep-alive"), b"bad\r\n\r\n")
    (await streams.next()).say(b"one", None)
    whole, refused = await client.replies("POST", "GET")
    assert (whole.body, refused.status) == (b"one", 400)


@served()
async def test_a_stream_ends_with_the_connection_for_http_1_0(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked(version="1.0"))
    (await streams.next()).say(b"one", b"", b"two", None)
    raw = await client.rest()
    start, _, body = raw.partition(b"\r\n\r\n")
    assert body == b"onetwo"
    reply = kit.parse_reply(start + b"\r\n\r\n", "HEAD")
    assert "transfer-encoding" not in reply.headers
    assert reply.headers["connection"] == "close"
    assert reply.headers["x-accel-buffering"] == "no"


@served()
async def test_the_head_of_a_stream_is_answered_without_its_parts(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(b"HEAD /stream HTTP/1.1\r\nHost: h\r\n\r\n", embed("a"))
    source = await streams.next()
    source.say(b"one", b"two")
    assert (await client.reply("HEAD")).headers["transfer-encoding"] == "chunked"
    assert (await client.reply("POST")).status == 200
    assert source.how == "closed"
    assert " status=200 " in await logged(room.running)


@served(write_timeout_s=0.1, keep_alive_s=0.1, header_timeout_s=0.1)
async def test_between_two_parts_there_may_be_any_time(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, source = await begun(room, Streams(monkeypatch))
    for part in (b"one", b"two"):
        await asyncio.sleep(0.3)  # longer than any of those
        source.say(part)
        await chunks(client, part)
    source.say(None)
    await chunks(client, b"")


@on_each_loop
async def test_streams_are_sent_over_tls(
    files: Files,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = Streams(monkeypatch)
    async with (
        kit.running_service(**files.settings) as running,
        connected(running, files.client(), asked(), HEALTH) as client,
    ):
        source = await streams.next()
        for part in (b"one", b"two"):
            source.say(part)
            if part == b"one":
                await head(client)
            await chunks(client, part)
        source.say(None)
        await chunks(client, b"")
        assert (await client.reply()).status == 200
        # Over TLS a client that closes has left.
        client.send(asked())
        source = await streams.next()
        client.writer.close()
        await source.ended.wait()
        assert source.how == "cancelled"


@on_each_loop
async def test_streams_are_sent_over_a_unix_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, path = Streams(monkeypatch), str(tmp_path / "sock")
    streams.first = (b"one", PART * 1000, None)
    async with kit.running_service(uds=path):
        client = Client(*await asyncio.open_unix_connection(path))
        client.send(asked("Connection: close"))
        (reply,) = await client.replies("POST")
        assert reply.body == b"one" + PART * 1000
        client.writer.close()


# --- leaving ---

LEAVERS = [closed, half_closed, reset]


@pytest.mark.parametrize("leave", LEAVERS)
@pytest.mark.parametrize("has_begun", [False, True])
@served()
async def test_a_source_that_makes_a_part_is_cancelled_when_its_client_leaves(
    room: Room,
    leave: Callable[[Client], None],
    has_begun: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(es, "HALF_CLOSED_S", 3600)  # no grace for streams
    streams = Streams(monkeypatch)
    if has_begun:
        client, source = await begun(room, streams)
    else:
        client = await room.client(asked())
        source = await streams.next()
    leave(client)
    await source.ended.wait()
    assert source.how == "cancelled"
    assert " status=499 " in await logged(room.running)


@pytest.mark.parametrize("leave", LEAVERS)
@served()
async def test_a_source_that_waits_for_room_is_closed_when_its_client_leaves(
    room: Room, leave: Callable[[Client], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked(), reads_little=True)
    reads_on_demand(client)
    source = await streams.next()
    source.say(*[PART] * 1000)
    await stalled(room, source)
    leave(client)
    await source.ended.wait()
    assert source.how == "closed"
    assert " status=499 " in await logged(room.running)


@pytest.mark.parametrize("when", ["before the first", "before the next", "no room"])
@served()
async def test_a_source_ends_in_the_loop_s_next_turn(
    room: Room, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    reads_on_demand(await room.client(asked(), reads_little=True))
    source = await streams.next()
    connection = await only_connection(room.running)
    if when == "before the next":
        source.say(b"one")
        await until(lambda: source.wanted == 2)
    elif when == "no room":
        source.say(*[PART] * 1000)
        await stalled(room, source)
    connection.eof_received()
    await asyncio.sleep(0)
    assert source.ended.is_set()


@served()
async def test_a_stream_is_finished_in_the_second_that_a_half_closed_client_has(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    # printf ... | nc -N: its end comes with the request.
    streams = Streams(monkeypatch)
    streams.first = (b"one", b"two", None)
    client = await room.client(asked())
    half_closed(client)
    assert (await client.replies("POST"))[0].body == b"onetwo"


@pytest.mark.parametrize("leave", LEAVERS)
@served()
async def test_many_who_leave_after_a_part_harm_no_other(
    room: Room, leave: Callable[[Client], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    stays, source = await begun(room, streams)
    for number in range(50):
        client, left = await begun(room, streams)
        leave(client)
        await left.ended.wait()
        source.say(b"%d" % number)
        await chunks(stays, b"%d" % number)
    telemetry = room.service.telemetry
    assert telemetry.value("embellama_http_streams") == 1
    await until(lambda: len(room.service.connections.open) == 1)
    source.say(None)
    await chunks(stays, b"")
    assert sum(" status=499 " in line for line in lines(room.running)) == 50


# --- slow readers ---


@served(write_timeout_s=3600)
async def test_a_source_is_not_asked_for_more_than_its_reader_takes(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked("Connection: close"))
    reads_on_demand(client)
    source = await streams.next()
    source.say(*[PART] * 3000, None)
    await stalled(room, source)
    # The client's kernel takes 128 KiB; without a bound on ours, it would be 4 MB.
    assert source.wanted < 300
    assert es._STREAM_AHEAD_BYTES < room.held() < es._STREAM_AHEAD_BYTES + 2000
    (reply,) = await client.replies("POST")
    assert reply.body == PART * 3000
    assert " status=200 " in await logged(room.running)


@served(write_timeout_s=3600)
async def test_a_first_part_is_read_before_the_next_is_made(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked("Connection: close"))
    reads_on_demand(client)
    source = await streams.next()
    source.say(PART * 10_000, b"last", None)
    await stalled(room, source)
    assert source.wanted == 1
    assert (await client.replies("POST"))[0].body.endswith(b"last")


@served(write_timeout_s=0.4, min_rate_bytes_s=1)
async def test_who_reads_slowly_but_steadily_gets_all(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked("Connection: close"), reads_little=True)
    source = await streams.next()
    source.say(*[PART] * 200, None)
    raw = b""
    while data := await client.reader.read(4096):  # for longer than those
        raw += data
        await asyncio.sleep(DRIP_S)
    assert raw.endswith(b"\r\n0\r\n\r\n")
    assert " status=200 " in await logged(room.running)


@pytest.mark.parametrize("size", [0, 1])
@served(write_timeout_s=0.3)
async def test_who_reads_nothing_or_a_byte_now_and_then_is_dropped(
    room: Room, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked(), reads_little=True)
    reads_on_demand(client)
    source = await streams.next()
    source.say(*[PART] * 1000)
    while not source.ended.is_set():
        if size:
            await client.reader.read(size)
        await asyncio.sleep(DRIP_S)
    assert source.how == "closed"
    await until(lambda: not room.service.connections.open)
    assert " status=499 " in await logged(room.running)


@served()
async def test_a_connection_is_as_before_when_its_stream_has_ended(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(HEALTH)
    await client.reply()
    transport = (await only_connection(room.running))._transport
    sock = transport.get_extra_info("socket")

    def state() -> list[object]:
        return [
            transport.get_write_buffer_limits()[1],
            sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT),
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8),
        ]

    before = state()
    client.send(asked())
    source = await streams.next()
    source.say(b"one")
    await until(lambda: source.wanted == 2)
    assert state()[:2] != before[:2]
    source.say(None)
    await head(client)
    await chunks(client, b"one", b"")
    await until(lambda: state() == before)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.heavy)])
@served(write_timeout_s=3600, max_connections_per_address=2000)
async def test_many_clients_that_never_read_hold_little(
    room: Room, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    endless = [PART] * 1000
    sources, socks = [], []
    address = (room.running.host, room.running.port)
    for _ in range(count):
        sock = socket.create_connection(address)
        socks.append(sock)
        sock.sendall(asked())
        sources.append(await streams.next())
        sources[-1].say(*endless)
    connections = room.service.connections
    await until(lambda: all(not c._is_writable for c in connections.open))
    assert len(connections.open) == count
    assert room.held() < count * (es._STREAM_AHEAD_BYTES + 2000)
    assert sum(source.wanted for source in sources) < 300 * count
    assert (
        await room.running.ask("POST", "/v1/embeddings", {"input": "a"})
    ).status == 200
    for sock in socks:
        sock.close()
    await until(lambda: all(source.ended.is_set() for source in sources))
    await until(lambda: not connections.open)


# --- failures ---

DROPPED = es.EngineFailed("it \u2028 broke")
KINDS = {
    es.EVENT_STREAM: b'data: {"error":{"message":"it \\u2028 broke","type":"server_error",'
    b'"param":null,"code":"engine_failed"}}\n\n',
    es.NDJSON: b'{"error":{"message":"it \\u2028 broke","type":"server_error",'
    b'"param":null,"code":"engine_failed"}}\n',
    "text/plain; charset=utf-8": b"",
}


@pytest.mark.parametrize("kind", KINDS)
@served()
async def test_a_stream_that_fails_says_so_and_never_looks_whole(
    room: Room, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, source = await begun(room, Streams(monkeypatch, kind), asked() + HEALTH)
    source.say(b"one", DROPPED)
    await chunks(client, b"one", *filter(None, [KINDS[kind]]))
    assert (
        await client.rest() == b""
    )  # no last chunk, nor an answer to the next request
    line = await logged(room.running)
    assert " status=500 " in line and " code=engine_failed " in line
    assert f" stream_bytes={len(b'firstone' + KINDS[kind])} " in line
    telemetry = room.service.telemetry
    assert telemetry.value("embellama_errors_total", "engine_failed") == 1
    assert telemetry.value("embellama_http_requests_total", "5xx") == 1
    assert room.answered() == 1


@served(has_bug=True)
async def test_a_bug_in_a_source_is_logged_once_and_its_client_told(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, source = await begun(room, Streams(monkeypatch))
    source.say(KeyError("anything"))
    rest = await client.rest()
    assert b"a bug in this server" in rest and not rest.endswith(b"0\r\n\r\n")
    log = room.running.log.getvalue()
    assert log.count("Traceback") == 1 and "KeyError" in log
    assert " code=internal_error " in await logged(room.running)
    assert room.answered() == 1


@served()
async def test_a_source_that_is_cancelled_by_others_has_no_second_head(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, source = await begun(room, Streams(monkeypatch))
    source.say(asyncio.CancelledError())
    assert await client.rest() == b""


@served()
async def test_a_stream_whose_error_waits_for_room_is_read_to_its_end(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked(), reads_little=True)
    source = await streams.next()
    source.say(*[PART] * 200, DROPPED)
    connection = await only_connection(room.running)
    await until(lambda: not connection._is_writable)
    raw = await client.rest()
    assert raw.count(PART) == 200
    assert raw.endswith(KINDS[es.EVENT_STREAM] + b"\r\n")


@served()
async def test_without_chunks_a_stream_that_fails_ends_in_a_reset(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its end would look like that of a whole one.
    client, source = await begun(room, Streams(monkeypatch), asked(version="1.0"))
    source.say(b"one", DROPPED)
    event = KINDS[es.EVENT_STREAM]
    assert await client.reader.readexactly(3 + len(event)) == b"one" + event
    with pytest.raises(ConnectionResetError):
        await client.rest()


@served(write_timeout_s=0.2)
async def test_without_chunks_a_stream_that_is_not_read_ends_in_a_reset(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = Streams(monkeypatch)
    client = await room.client(asked(version="1.0"), reads_little=True)
    reads_on_demand(client)
    source = await streams.next()
    source.say(*[PART] * 1000)
    await source.ended.wait()
    await until(lambda: not room.service.connections.open)
    with pytest.raises(ConnectionResetError):
        await client.rest()


@on_each_loop
async def test_a_stream_that_fails_over_tls_says_so(
    files: Files,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(es, "_LINGER_S", 0.1)
    streams = Streams(monkeypatch)
    async with (
        kit.running_service(**files.settings) as running,
        connected(running, files.client(), asked()) as client,
    ):
        (await streams.next()).say(b"one", DROPPED)
        await head(client)
        await chunks(client, b"one", KINDS[es.EVENT_STREAM])
        assert await client.rest() == b""


# --- what is told of a stream ---


@pytest.mark.parametrize("leaves", [False, True])
@served()
async def test_a_stream_has_one_line_in_log_and_audit_and_one_span_at_its_end(
    room: Room,
    leaves: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    audit, spans = tmp_path / "audit", list[es.RequestSpan]()
    dispatcher = room.server._dispatcher
    dispatcher._audit = es.LineFile(str(audit), kit.quiet_log())
    tracer = type("Tracer", (), {"record": staticmethod(spans.append)})
    monkeypatch.setattr(dispatcher, "_tracer", tracer)
    client, source = await begun(room, Streams(monkeypatch))
    source.context.log_fields["tokens"] = 7
    assert not lines(room.running) and not audit.read_text() and not spans
    source.say(b"second")
    await chunks(client, b"second")
    if leaves:
        closed(client)
    else:
        source.say(None)
    line = await logged(room.running)
    status = 499 if leaves else 200
    for field in (f"status={status}", "tokens=7", "stream_bytes=11", "first_ms="):
        assert f" {field}" in line
    (audited,) = map(json.loads, audit.read_text().splitlines())
    assert (audited["status"], audited["tokens"]) == (status, 7)
    assert audited["stream_bytes"] == 11
    (span,) = spans
    assert (span.status, span.tokens, span.stream_bytes) == (status, 7, 11)
    telemetry = room.service.telemetry
    assert telemetry.value("embellama_http_stream_bytes_total") == 11
    assert telemetry.value("embellama_http_streams") == 0
    assert room.answered() == 1
    text = telemetry.exposition()
    assert 'embellama_http_request_seconds_count{kind="request"} 1\n' in text


# --- the end ---


@served(drain_timeout_s=3600)
async def test_a_drain_lasts_until_a_stream_has_ended(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, source = await begun(room, Streams(monkeypatch))
    room.server.stop()
    late = await room.client(embed("late"))
    assert (await late.replies("POST"))[0].status == 503
    late.writer.close()
    source.say(b"two", None)
    await chunks(client, b"two", b"")
    assert await client.rest() == b""
    assert await room.running.task == 0


@pytest.mark.parametrize("ends", ["its timeout", "a second signal"])
@served(drain_timeout_s=0.2)
async def test_after_a_drain_a_stream_ends_with_an_error(
    room: Room, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, source = await begun(room, Streams(monkeypatch))
    real = es.BatchQueue.abandon_all

    def abandon(queue: es.BatchQueue, error: es.ApiError) -> int:
        source.say(error)  # as whatever a source waits for does
        return real(queue, error)

    monkeypatch.setattr(es.BatchQueue, "abandon_all", abandon)
    room.server.stop()
    if ends == "a second signal":
        room.server.stop()
    rest = await client.rest()
    assert b"data: " in rest and b'"code":"not_ready"' in rest
    assert not rest.endswith(b"0\r\n\r\n")
    assert await room.running.task == 0
    assert " status=503 " in await logged(room.running)


@served(drain_timeout_s=0.1)
async def test_after_a_drain_nobody_waits_for_a_stream_that_goes_on(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_LEAVE_S", 0.1)
    client, source = await begun(room, Streams(monkeypatch))
    room.server.stop()
    assert await room.running.task == 0
    await source.ended.wait()
    assert source.how == "cancelled"
    assert await client.rest() == b""
