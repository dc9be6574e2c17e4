"""What requests hold in memory is counted, bounded, and given back.

Wherever it is: as bytes that came, decompressed, as Python objects, and as a reply. The last
test is of the real program, and of each route.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
import subprocess
import sys
import tracemalloc
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import kit
from tests.kit import RunningService

URL = "/v1/embeddings"
MIB = 1 << 20


@contextlib.asynccontextmanager
async def service(
    engine: kit.FakeEngine | None = None, **changes: Any
) -> AsyncIterator[RunningService]:
    """A running service where every route can answer 200."""
    async with kit.running_service(engine, **kit.all_routes() | changes) as running:
        yield running
        assert running.service.connections.held_bytes < 1000  # of this client
    assert " bug " not in running.log.getvalue()


# --- what JSON becomes ---


def size_of(value: Any) -> int:
    """Bytes of a value and all within it."""
    size = sys.getsizeof(value)
    if isinstance(value, list):
        return size + sum(map(size_of, value))
    if isinstance(value, dict):
        return size + sum(size_of(k) + size_of(v) for k, v in value.items())
    return size


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(-9, 9),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
) | st.text(alphabet=st.sampled_from('a"\\,:[{é\u20ac\U0001f600'))
FIXED_BYTES = 400  # of a body: what the smallest object takes


@settings(max_examples=60)
@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4), st.booleans())
def test_no_body_becomes_more_than_it_is_counted_as(
    body: dict[str, Any], is_ascii: bool
) -> None:
    raw = json.dumps(body, ensure_ascii=is_ascii).encode()
    found = size_of(es.json_codec().loads(raw))
    for bound in (es.parsed_bytes(raw), es.parsed_bytes_of_large(raw, 10**6, 10**6)):
        assert found <= bound + FIXED_BYTES


UNITS = {  # what is repeated in a body, where counting by eye goes wrong
    "ids": b"30000,",
    "lists": b"[],",
    "lists of one": b"[1],",
    "objects": b'{"a":1},',
    "letters": b'"a",',
    "wide letters": '"\U0001f600",'.encode(),
    "deep": b"[" * 50 + b"]" * 50 + b",",
    "deep objects": b'{"a":' * 50 + b"1" + b"}" * 50 + b",",
    "floats": b"1.5,",
    "prose": b'"a, b: [c] and {d}, \\"e\\", \\\\",',
    "escapes": b'"\\ud83d\\ude00",',
}


@pytest.mark.parametrize("unit", UNITS)
def test_what_a_large_body_becomes_is_known_within_a_factor(unit: str) -> None:
    raw = b'{"input":[%b0]}' % (UNITS[unit] * (100_000 // len(UNITS[unit])))
    bound = es.parsed_bytes_of_large(raw, 10**9, 10**9)
    found = size_of(es.json_codec().loads(raw))
    assert found <= bound <= 12 * found


def test_one_wide_character_makes_all_of_its_text_wide() -> None:
    for last, width in (("a", 1), ("é", 2), ("\u20ac", 2), ("\U0001f600", 4)):
        for is_ascii in (True, False):
            text = "a" * 100_000 + last
            raw = json.dumps({"input": text}, ensure_ascii=is_ascii).encode()
            bound = es.parsed_bytes_of_large(raw, 10, 10)
            assert sys.getsizeof(text) <= bound + FIXED_BYTES
            assert bound <= width * len(text) + 1000


def parsed(read: Callable[[bytearray], object], raw: bytes) -> object:
    """What was read, or that it was refused."""
    try:
        return read(bytearray(raw))
    except es.InvalidJson:
        return es.InvalidJson


PIECES = [
    b'"',
    b"\\",
    b'\\"',
    b"\\\\",
    b"\\n",
    b"a",
    b" ",
    b",",
    b"1",
    b"[",
    b"]",
    b"\xc3\xa9",
]
PIECES += [
    b"\\ud83d",
    b"\\ude00",
    "\U0001f600".encode(),
    b"\xff",
    b'":"',
    b'"a":',
    b"\n",
]


@settings(max_examples=400)
@example(rb"\\ud83d\ud83d\ud83d", 7, b'{"a":"%b"}')  # the last piece ends with a half
@given(
    st.lists(st.sampled_from(PIECES)).map(b"".join),
    st.integers(0, 40),
    st.sampled_from([b'{"a":"%b"}', b'{"a":[%b]}', b"%b"]),
)
def test_a_large_body_is_read_as_a_brief_one_wherever_its_pieces_end(
    middle: bytes, before: int, around: bytes
) -> None:
    raw = around % (b"a" * before + middle)
    expected = parsed(es.json_object, raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(es, "_SCANNED_BYTES", 32)
        assert parsed(es.large_json_object, raw) == expected
    assert parsed(es.large_json_object, raw) == expected


@settings(max_examples=60)
@given(st.dictionaries(st.text(max_size=3), JSON, max_size=4), st.booleans())
def test_a_large_body_is_read_whole(body: dict[str, Any], is_ascii: bool) -> None:
    raw = bytearray(json.dumps(body, ensure_ascii=is_ascii).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(es, "_SCANNED_BYTES", 24)
        assert es.large_json_object(raw) == body
    assert not raw


@pytest.mark.parametrize("end", [b'\xff"}', b'\\q"}', b'", 1 2}', b'"} 3'])
def test_an_error_in_a_large_body_tells_no_position_as_only_a_part_was_parsed(
    end: bytes,
) -> None:
    raw = b'{"a": "' + b"x" * 30_000 + end
    for read, has_position in ((es.json_object, True), (es.large_json_object, False)):
        with pytest.raises(es.InvalidJson, match="body is not (JSON|UTF-8)") as told:
            read(bytearray(raw))
        assert bool(re.search("byte|char [0-9]", told.value.message)) == has_position


def test_a_piece_never_ends_between_a_backslash_and_what_it_escapes() -> None:
    text = '\\"' * 100_000 + "[" * 100
    for before in range(4):
        raw = b" " * before + json.dumps({"input": text}).encode()
        assert es.parsed_bytes_of_large(raw, 10, 1) <= 2 * len(raw)


@pytest.mark.parametrize(
    ("unit", "code"),
    [
        ("ids", "max_tokens_per_request"),
        ("letters", "max_tokens_per_request"),
        ("lists", "invalid_json"),
        ("objects", "invalid_json"),
        ("deep", "invalid_json"),
    ],
)
async def test_a_body_that_is_hardly_anything_but_structure_is_never_parsed(
    unit: str, code: str
) -> None:
    raw = b'{"input":[%b0]}' % (UNITS[unit] * (400_000 // len(UNITS[unit])))

    async with service(max_request_tokens=1000, max_client_batch_size=100) as running:
        tracemalloc.start()
        try:
            reply = await running.ask("POST", URL, raw)
            assert tracemalloc.get_traced_memory()[1] < 4 * MIB
        finally:
            tracemalloc.stop()
        assert (reply.status, reply.error["code"]) == (400, code)
        assert "--max-client-batch-size" in reply.error["message"]


# --- many at once ---

BODY_BYTES = 2 * MIB
AT_ONCE = 20


@pytest.mark.parametrize("is_compressed", [False, True])
async def test_large_bodies_take_turns_and_no_more_memory_than_there_is(
    is_compressed: bool,
) -> None:
    text = "a" * (BODY_BYTES - 100)
    raw = json.dumps({"input": [text], "truncate": True}).encode()
    fields = {"content_type": "application/json"}
    if is_compressed:
        raw = gzip.compress(raw)
        fields["content_encoding"] = "gzip"

    async with service(max_body_bytes=BODY_BYTES, max_buffered_mb=6) as running:
        connections = running.service.connections
        max_held = 0

        async def watch() -> None:
            nonlocal max_held
            while True:
                max_held = max(max_held, connections.held_bytes)
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        asks = [running.ask("POST", URL, raw, **fields) for _ in range(AT_ONCE)]
        replies = await asyncio.gather(*asks)
        watching.cancel()
        statuses = [reply.status for reply in replies]
        assert set(statuses) <= {200, 503} and 200 in statuses
        for reply in replies:
            assert reply.status == 200 or int(reply.headers["retry-after"]) >= 1
        assert 2 * len(text) < max_held  # the body, and the text
        assert max_held <= 6 * MIB + AT_ONCE * es.READ_AHEAD_BYTES * 4


async def test_a_body_that_could_never_be_held_is_413_not_try_again() -> None:
    text = "a" * (BODY_BYTES - 50)

    async with service(max_body_bytes=BODY_BYTES, max_buffered_mb=1) as running:
        for last, status in (("a", 200), ("\U0001f600", 413)):
            body = json.dumps({"input": text + last}, ensure_ascii=False).encode()
            reply = await running.ask("POST", URL, body)
            assert reply.status == status
        assert reply.error["code"] == "body_too_large"
        assert "--max-buffered-mb" in reply.error["message"]


async def test_where_there_is_no_room_those_who_bring_no_body_are_answered() -> None:
    async with service(max_buffered_mb=1) as running:
        room = es.Reservation(running.service.connections)
        room.take(9 * MIB)
        assert (await running.ask("GET", "/health")).status == 200
        assert (await running.ask("GET", "/v1/models")).status == 200
        assert (await running.ask("POST", URL, {"input": "a"})).status == 503
        room.release()
        assert (await running.ask("POST", URL, {"input": "a"})).status == 200


async def test_a_reply_waiting_for_room_goes_on_when_a_request_frees_some() -> None:
    async with service(max_buffered_mb=1) as running:
        capacity = running.service.connections
        other = es.Reservation(capacity)
        other.take(MIB)
        capacity.hold(1)  # of a client that reads nothing
        waiting = asyncio.create_task(capacity.room_for(MIB // 2))
        await asyncio.sleep(0)
        assert not waiting.done()
        other.release()
        async with asyncio.timeout(kit.DEADLINE_S):
            await waiting
        capacity.hold(-1)


@pytest.mark.parametrize("path", [URL, "/tokenize"])
async def test_nobody_holds_the_texts_of_a_request_that_is_answered(path: str) -> None:
    text = "b" * MIB

    async with service(cache_mb=0) as running:
        key = "inputs" if path == "/tokenize" else "input"
        tracemalloc.start()
        try:
            reply = await running.ask("POST", path, {key: text, "truncate": True})
            async with asyncio.timeout(kit.DEADLINE_S):
                while tracemalloc.get_traced_memory()[0] > len(text) // 2:
                    await asyncio.sleep(0)
        finally:
            tracemalloc.stop()
        assert reply.status in (200, 422)


# --- every route, in the real program ---

# By hand with 60 at once, in 7 minutes: as with 6, +100 MiB, /health 40 ms at most.
ROOM_MIB, BODY_MIB, CLIENTS = 64, 32, 6
HEALTH_S = 0.1  # for nineteen of twenty: the tests' own clients take both cores
WATCH = """
import http.client, json, re, select, sys, time
pid, host, port = sys.argv[1:]
client, waits, peak = http.client.HTTPConnection(host, int(port)), [], 0
print("begun", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    begun = time.monotonic()
    client.request("GET", "/health")
    client.getresponse().read()
    waits.append(time.monotonic() - begun)
    for _ in range(4):  # between two questions
        status = open(f"/proc/{pid}/status").read()
        peak = max(peak, int(re.search(r"RssAnon:\\s+([0-9]+)", status)[1]) << 10)
        time.sleep(0.001)
waits.sort()
print(json.dumps([peak, waits[len(waits) * 19 // 20], waits[-1]]))
"""


def large_bodies(route: es.Route) -> Iterator[bytes]:
    """As large as bodies may be: a text, and hardly anything but structure."""
    plain = json.dumps(kit.body_of(route)).encode()
    left = BODY_MIB * MIB - len(plain) - 100
    yield plain[:-1] + b',"beside":"%b"}' % (b"x" * left)
    yield plain[:-1] + b',"beside":[%b0]}' % (b"[]," * (left // 3))


def gaps_bytes(pid: str) -> int:
    """What the heap has room for without growing: free, and given back to the system.

    Compiling the program leaves it (37 MiB), and blocks up to 1.5 MiB are put into it:
    that is no memory of requests, whatever the length of the file.
    """
    maps = Path(f"/proc/{pid}/smaps").read_text()
    heap = maps.partition("[heap]\n")[2]
    sizes = {
        line.split()[0]: int(line.split()[1]) << 10 for line in heap.splitlines()[:8]
    }
    return sizes["Size:"] - sizes["Rss:"]


async def flood(address: tuple[str, int], path: str, body: bytes, coding: str) -> None:
    """Many clients ask the same at once; each is answered."""
    lines = [f"POST {path} HTTP/1.1", "host: localhost", "connection: close"]
    lines += ["content-type: application/json", f"content-length: {len(body)}"]
    lines += [f"content-encoding: {coding}"] * bool(coding)
    head = "\r\n".join([*lines, "", ""]).encode()

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(head)
        writer.write(body)
        try:
            return await reader.readline()
        except ConnectionError:  # refused while it sent
            return b"HTTP/1.1 503"
        finally:
            writer.transport.abort()

    async with asyncio.timeout(kit.DEADLINE_S):
        replies = await asyncio.gather(*(ask() for _ in range(CLIENTS)))
    known = {b"200", b"400", b"404", b"413", b"422", b"424", b"429", b"503"}
    assert {line[9:12] for line in replies} <= known, path


@pytest.mark.xdist_group("flood")
@pytest.mark.heavy
def test_no_route_takes_more_memory_than_there_is_room_for_or_holds_up_health() -> None:
    flags = ("--no-supervise", "--cache-mb=0", "--log-level=info")
    limits = (f"--max-buffered-mb={ROOM_MIB}", f"--max-body-bytes={BODY_MIB * MIB}")
    with kit.started(*flags, *limits, "--host=127.0.0.1") as server:
        url = urllib.parse.urlsplit(server.url)
        address = (str(url.hostname), int(url.port or 0))
        pid = str(server.process.pid)
        status = Path(f"/proc/{pid}/status").read_text()
        before = int(status.partition("RssAnon:")[2].split()[0]) << 10
        gaps = gaps_bytes(pid)
        command = [sys.executable, "-c", WATCH, pid, address[0], str(address[1])]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as watching:
            assert watching.stdout is not None
            watching.stdout.readline()
            for route in es.ROUTES:
                if route.form and route.access != "admin":
                    text, junk = large_bodies(route)
                    asyncio.run(flood(address, route.path, text, ""))
                    for body in (text, junk):
                        compressed = gzip.compress(body, 1)
                        asyncio.run(flood(address, route.path, compressed, "gzip"))
            said = watching.communicate("end\n", kit.DEADLINE_S)[0]
        peak, often_s, worst_s = json.loads(said)
        print(
            f"+{(peak - before) / MIB:.0f} MiB (gaps {gaps / MIB:.0f}), {often_s:.3f} s, {worst_s:.3f} s"
        )
        assert peak - before < 1.2 * ROOM_MIB * MIB + gaps
        assert often_s < HEALTH_S
