"""HTTP against hypothesis: any bytes, bent requests, generated requests.

Whatever comes and however it is cut, the parser gives requests or one ApiError, never
another exception; what it accepts is sane, and h11 reads the same request from the same
bytes. A request that two readers read differently is how requests get smuggled.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass

import h11
from hypothesis import example, given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests.test_http import (
    CASES,
    LIMITS,
    REFUSALS,
    accepted,
    agrees,
    events_of,
    h11_knowingly_refuses,
    h11_reads,
    outcome,
)
from tests.test_http_cases import CORPUS, SHIPPED

EXAMPLES = settings(max_examples=1000, deadline=None)

# --- bytes ---

# What the grammar is made of, so that soup gets past the first line now and then.
MORSELS = (
    *(b"GET / HTTP/1.1\r\n", b"POST /a?b HTTP/1.1\r\n", b"GET http://h HTTP/1.0\r\n"),
    *(b"Host: h\r\n", b"Host:", b"Content-Length: 3\r\n", b"Content-Length:"),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding:",
        b"chunked",
        b"x: y\r\n",
    ),
    *(b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"\r\n", b"\r\n\r\n"),
    *(b"abc", b"3\r\nabc\r\n", b"3;e\r\nabc\r\n", b"0\r\n", b"0\r\n\r\n", b"A: b\r\n"),
    *(b"\r", b"\n", b" ", b"\t", b":", b";", b",", b"\0", b"\x0b", b"\x7f", b"\xff"),
    *(b"+", b"-", b"_", b"0", b"1", b"9", b"f", b"0x", b"HTTP/1.1", b"PRI * HTTP/2.0"),
)
HEADS = tuple(
    b"POST / HTTP/1.1\r\nHost: h\r\n%b\r\n\r\n" % framing
    for framing in (
        b"Content-Length: 3",
        b"Transfer-Encoding: chunked",
        b"Expect: 100-continue",
    )
)
soup = st.tuples(
    st.sampled_from((b"", b"GET / HTTP/1.1\r\nHost: h\r\n", *HEADS)),
    st.lists(st.sampled_from(MORSELS) | st.binary(max_size=3), max_size=10),
).map(lambda parts: parts[0] + b"".join(parts[1]))
anything = st.binary(max_size=300) | soup

# The tables, and the corpus without what is there for its size.
KNOWN = st.sampled_from(
    [
        *(case.data for case in CASES),
        *(row.data for row in REFUSALS),
        *(case.data for case in CORPUS if len(case.data) < 500),
    ]
)


@st.composite
def bent(draw: st.DrawFn) -> bytes:
    """One or two known requests, with a few bytes replaced, added, removed, doubled."""
    data = bytearray(b"".join(draw(st.lists(KNOWN, min_size=1, max_size=2))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        if draw(st.booleans()):
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
            continue
        removed = draw(st.integers(0, 3))
        data[at : at + removed] = draw(st.sampled_from(MORSELS) | st.binary(max_size=2))
    return bytes(data)


# Where to cut; taken modulo the length.
cuts = st.lists(st.integers(0, 1000), max_size=8)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The data in pieces, some perhaps empty."""
    ends = sorted(place % (len(data) + 1) for place in places)
    return [data[a:b] for a, b in zip([0, *ends], [*ends, len(data)], strict=True)]


# --- what must hold of them ---


def check_sane(request: es.Request, limits: es.HttpLimits) -> None:
    """What the rooms below the parser rely on."""
    head = request.head
    assert re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", head.method)
    assert re.fullmatch(r"/[!-~]*|\*", head.path)
    assert re.fullmatch(r"[!-~]*", head.query)
    assert head.minor_version in (0, 1)
    assert len(head.headers) <= limits.max_headers
    for name, value in head.headers:
        assert re.fullmatch(r"[!#$%&'*+.^_`|~0-9a-z-]+", name)
        assert re.fullmatch(r"[\t -~\x80-\xff]*", value)
    names = [name for name, _ in head.headers]
    assert names.count("host") == 1 or head.minor_version == 0
    lengths, codings = names.count("content-length"), names.count("transfer-encoding")
    assert lengths + codings <= 1
    assert (head.body_bytes is None) == (codings == 1)
    assert head.body_bytes in (None, len(request.body))
    assert lengths == 1 or not request.body or codings == 1
    assert len(request.body) <= limits.body_bytes


def check_one_verdict(data: bytes, places: list[int]) -> None:
    for limits in (LIMITS, SHIPPED):
        whole = outcome([data], limits)  # raises whatever is not an ApiError
        assert outcome(cut(data, places), limits) == whole
        for event in whole.events:
            if isinstance(event, es.Request):
                check_sane(event, limits)


@EXAMPLES
@given(anything, cuts)
@example(b"", [])
@example(b"\r\n", [1])
def test_any_bytes_get_one_verdict_however_they_are_cut(
    data: bytes, places: list[int]
) -> None:
    check_one_verdict(data, places)


@settings(EXAMPLES, max_examples=2000)
@given(bent(), cuts)
def test_bent_requests_get_one_verdict_however_they_are_cut(
    data: bytes, places: list[int]
) -> None:
    check_one_verdict(data, places)


@EXAMPLES
@given(anything | bent(), st.integers(1, 50))
def test_no_more_is_kept_than_the_limits_allow(data: bytes, size: int) -> None:
    parser = es.RequestParser(LIMITS)
    most = max(LIMITS.head_bytes, LIMITS.body_bytes + LIMITS.chunk_line_bytes)
    for begin in range(0, len(data), size):
        parser.feed(data[begin : begin + size])
        try:
            while parser.next_event():
                pass
        except es.ApiError:
            return
        assert parser.buffered_bytes <= most + len("\r\n")


# --- a second opinion ---


@settings(EXAMPLES, max_examples=2000)
@given(anything | bent())
def test_h11_reads_the_same_from_all_that_is_accepted(data: bytes) -> None:
    for request, raw in accepted(data, SHIPPED):
        try:
            seconds = h11_reads(raw)
        except h11.RemoteProtocolError:
            assert h11_knowingly_refuses(raw), raw
            continue
        assert len(seconds) == 1, (raw, seconds)
        assert agrees(request, seconds[0]), (raw, request, seconds)


# --- generated requests ---

TOKEN = "!#$%&'*+-.^_`|~" + string.digits + string.ascii_letters
VISIBLE = "".join(map(chr, range(0x21, 0x7F)))
# Headers that mean something to the parser; the others are free.
MEANING = {"host", "content-length", "transfer-encoding", "expect"}
MEANING |= {"content-type", "authorization"}

paths = st.text(VISIBLE.replace("?", "").replace("#", ""), max_size=30)
queries = st.text(VISIBLE.replace("#", ""), max_size=30)
values = st.text(
    "\t" + "".join(map(chr, (*range(0x20, 0x7F), *range(0x80, 0x100)))), max_size=30
).map(lambda text: text.strip(" \t"))
names = st.text(TOKEN, min_size=1, max_size=20).filter(
    lambda name: name.lower() not in MEANING
)
spaces = st.text(" \t", max_size=3)
extensions = st.just("") | values.map(lambda text: ";" + text)


@dataclass(frozen=True)
class Written:
    """A request, and one way to write it."""

    raw: bytes
    request: es.Request


@st.composite
def written(draw: st.DrawFn) -> Written:
    """A valid request with a body of any framing."""
    method, minor = draw(st.text(TOKEN, min_size=1, max_size=10)), draw(st.booleans())
    path, query = "/" + draw(paths), draw(queries)
    headers = draw(st.lists(st.tuples(names, values), max_size=8))
    headers.insert(draw(st.integers(0, len(headers))), ("Host", "h"))
    chunks: list[bytes] = []
    body = b""
    framing = draw(st.sampled_from(["none", "sized", "chunked"] if minor else ["none"]))
    if framing == "sized":
        body = draw(st.binary(max_size=100))
        headers.append(("Content-Length", str(len(body))))
        chunks = [body]
    elif framing == "chunked":
        parts = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=5))
        body = b"".join(parts)
        headers.append(
            ("Transfer-Encoding", draw(st.sampled_from(["chunked", "CHUNKED"])))
        )
        for part in (*parts, b""):
            size = draw(st.sampled_from(["%x", "%X", "%08x"])) % len(part)
            chunks.append((size + draw(extensions) + "\r\n").encode("latin-1"))
            chunks.append(part + b"\r\n" if part else b"")
        trailers = draw(st.lists(st.tuples(names, values), max_size=3))
        chunks += [f"{k}: {v}\r\n".encode("latin-1") for k, v in trailers]
        chunks.append(b"\r\n")
    target = f"{path}?{query}" if query else path
    lines = [f"{method} {target} HTTP/1.{int(minor)}"]
    lines += [f"{k}:{draw(spaces)}{v}{draw(spaces)}" for k, v in headers]
    raw = "".join(line + "\r\n" for line in (*lines, "")).encode("latin-1")
    head = es.Head(
        method=method,
        path=path,
        query=query,
        minor_version=int(minor),
        headers=tuple((k.lower(), v) for k, v in headers),
        body_bytes=None if framing == "chunked" else len(body),
    )
    return Written(raw + b"".join(chunks), es.Request(head, body))


@settings(EXAMPLES, max_examples=300)
@given(st.lists(written(), min_size=1, max_size=3), cuts)
def test_a_valid_request_is_read_as_written(
    requests: list[Written], places: list[int]
) -> None:
    data = b"".join(one.raw for one in requests)
    meant = events_of(one.request for one in requests)
    found = outcome(cut(data, places), SHIPPED)
    assert (found.error, found.events) == (None, meant)


@settings(EXAMPLES, max_examples=300)
@given(written())
def test_h11_reads_a_valid_request_the_same(one: Written) -> None:
    (second,) = h11_reads(one.raw)
    assert agrees(one.request, second)
