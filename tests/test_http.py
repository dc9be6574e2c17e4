"""HTTP: which bytes are a request, which are refused and as what, what we send.

Two tables. CASES are requests we accept, with what they mean; h11 must read the same.
REFUSALS are bytes we refuse, with the error and the reason. Every row is fed whole,
byte by byte and cut in two at every place, and the outcome must be the same: a verdict
that depends on how TCP cut the bytes is one that an attacker can choose.
The limits are tiny here, so that rows at and above them stay short.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import h11
import pytest

import embellama_server as es
from tests import kit

Headers = tuple[tuple[str, str], ...]

LIMITS = es.HttpLimits(
    request_line_bytes=64,
    head_bytes=160,
    max_headers=6,
    chunk_line_bytes=20,
    body_bytes=40,
)
HOST: Headers = (("host", "h"),)
CHUNKED: Headers = (*HOST, ("transfer-encoding", "chunked"))


@dataclass(frozen=True)
class Outcome:
    """What a parser made of some bytes."""

    events: tuple[es.Head | es.Request, ...]
    error: type[es.ApiError] | None = None
    message: str = ""


def outcome(pieces: Iterable[bytes], limits: es.HttpLimits = LIMITS) -> Outcome:
    """Feed the pieces, ask for events after each; after an error nothing must come."""
    parser = es.RequestParser(limits)
    events: list[es.Head | es.Request] = []
    error: es.ApiError | None = None
    for piece in pieces:
        parser.feed(piece)
        try:
            while (event := parser.next_event()) is not None:
                events.append(event)
        except es.ApiError as raised:
            error = raised
            break
    if error is None:
        heads = sum(isinstance(event, es.Head) for event in events)
        assert parser.is_in_body == (2 * heads > len(events))
        return Outcome(tuple(events))
    for more in (b"", *pieces, b"GET / HTTP/1.1\r\nHost: later\r\n\r\n"):
        parser.feed(more)
        assert parser.next_event() is None, "an event after an error"
        assert parser.buffered_bytes == 0, "bytes kept after an error"
        assert not parser.is_between_requests
    return Outcome(tuple(events), type(error), error.message)


def feedings(data: bytes) -> Iterator[list[bytes]]:
    """Whole, byte by byte, and every cut in two."""
    for feed in kit.FEEDS.values():
        yield feed(data)
    yield from kit.feed_splits(data)


# --- what is accepted ---


@dataclass(frozen=True)
class Case:
    """Bytes, and the requests they are."""

    name: str
    data: bytes
    requests: tuple[es.Request, ...]

    def __init__(self, name: str, data: bytes, *requests: es.Request) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "data", data)
        object.__setattr__(self, "requests", requests)


def means(
    method: str = "GET",
    path: str = "/",
    *,
    query: str = "",
    headers: Headers = HOST,
    minor: int = 1,
    body: bytes = b"",
) -> es.Request:
    """A request; chunked if the headers say so."""
    size = None if ("transfer-encoding", "chunked") in headers else len(body)
    return es.Request(es.Head(method, path, query, minor, headers, size), body)


def get(*headers: bytes, line: bytes = b"GET / HTTP/1.1") -> bytes:
    """A GET with these headers after its Host."""
    return b"\r\n".join((line, b"Host: h", *headers, b"", b""))


def post(*headers: bytes, body: bytes = b"") -> bytes:
    """A POST with these headers after its Host."""
    return get(*headers, line=b"POST / HTTP/1.1") + body


def chunked(body: bytes) -> bytes:
    """A POST with this chunked body."""
    return post(b"Transfer-Encoding: chunked", body=body)


def lined(line: bytes) -> bytes:
    """A request with this first line."""
    return get(line=line)


def with_headers(*pairs: tuple[str, str]) -> Headers:
    """Headers after the Host."""
    return (*HOST, *pairs)


def meant(body: bytes, *, path: str = "/") -> es.Request:
    """What a chunked POST means."""
    return means("POST", path, headers=CHUNKED, body=body)


LONG_PATH = b"/" + b"a" * (64 - len("GET / HTTP/1.1"))  # its line has 64 bytes
WIDE = b"X: " + b"v" * (160 - len("Host: h\r\n") - len("X: \r\n"))  # 160 with the Host
FIVE = tuple(b"F%d: v" % n for n in range(5))  # 6 headers with the Host
FIVE_MEANT = tuple((f"f{n}", "v") for n in range(5))

# fmt: off
CASES = (
    Case("get", get(), means()),
    Case("path and query", lined(b"GET /a/b?c=d&e HTTP/1.1"), means(path="/a/b", query="c=d&e")),
    Case("query with question mark and slash", lined(b"GET /?a?b/c HTTP/1.1"), means(query="a?b/c")),
    Case("path stays percent-encoded", lined(b"GET /a%2Fb%00 HTTP/1.1"), means(path="/a%2Fb%00")),
    Case("path with two slashes", lined(b"GET //a//b HTTP/1.1"), means(path="//a//b")),
    Case("absolute-form (RFC 9112, 3.2.2)", lined(b"GET HTTP://u.example:80/a?b HTTP/1.1"), means(path="/a", query="b")),
    Case("absolute-form without a path (RFC 9110, 4.2.3)", lined(b"GET http://h HTTP/1.1"), means()),
    Case("absolute-form, only a query", lined(b"GET http://h?q HTTP/1.1"), means(query="q")),
    Case("OPTIONS *", lined(b"OPTIONS * HTTP/1.1"), means("OPTIONS", "*")),
    Case("any token is a method", lined(b"M-!#$%&'*+.^_`|~9 / HTTP/1.1"), means("M-!#$%&'*+.^_`|~9")),
    Case("methods are case-sensitive", lined(b"get / HTTP/1.1"), means("get")),
    Case("HTTP/1.0", b"GET / HTTP/1.0\r\nHost: h\r\n\r\n", means(minor=0)),
    Case("HTTP/1.0 needs no Host", b"GET / HTTP/1.0\r\n\r\n", means(minor=0, headers=())),
    Case("HTTP/1.0 with a body", b"PUT / HTTP/1.0\r\nContent-Length: 2\r\n\r\nab", means("PUT", minor=0, headers=(("content-length", "2"),), body=b"ab")),
    Case("an empty line first (RFC 9112, 2.2)", b"\r\n" + get(), means()),
    Case("an empty line before each", b"\r\n" + get() + b"\r\n" + get(), means(), means()),
    Case("no space after the colon", get(b"X:v"), means(headers=with_headers(("x", "v")))),
    Case("spaces and tabs around a value", get(b"X: \t v \t w\t "), means(headers=with_headers(("x", "v \t w")))),
    Case("an empty value", get(b"X:", b"Y: \t"), means(headers=with_headers(("x", ""), ("y", "")))),
    Case("colons in a value", get(b"X: a:b: c"), means(headers=with_headers(("x", "a:b: c")))),
    Case("obs-text in a value", get(b"X: \xff\x80\xc3\xa9"), means(headers=with_headers(("x", "\xff\x80\xc3\xa9")))),
    Case("a header twice", get(b"X: 1", b"x: 2"), means(headers=with_headers(("x", "1"), ("x", "2")))),
    Case("any token is a name", get(b"!#$%&'*+-.^_`|~: v"), means(headers=with_headers(("!#$%&'*+-.^_`|~", "v")))),
    Case("Host with a port", b"GET / HTTP/1.1\r\nHost: a-b_c.example:8080\r\n\r\n", means(headers=(("host", "a-b_c.example:8080"),))),
    Case("Host IPv6", b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", means(headers=(("host", "[::1]:80"),))),
    Case("sized body", post(b"Content-Length: 5", body=b"a\r\n\0b"), means("POST", headers=with_headers(("content-length", "5")), body=b"a\r\n\0b")),
    Case("length with spaces around", post(b"Content-Length: \t5 ", body=b"abcde"), means("POST", headers=with_headers(("content-length", "5")), body=b"abcde")),
    Case("18 digits", post(b"Content-Length: 000000000000000002", body=b"ab"), means("POST", headers=with_headers(("content-length", "0" * 17 + "2")), body=b"ab")),
    Case("body of no bytes", post(b"Content-Length: 0"), means("POST", headers=with_headers(("content-length", "0")))),
    Case("POST without a length", post(), means("POST")),
    Case("GET with a body", get(b"Content-Length: 2") + b"ab", means(headers=with_headers(("content-length", "2")), body=b"ab")),
    Case("one chunk", chunked(b"3\r\nabc\r\n0\r\n\r\n"), meant(b"abc")),
    Case("several chunks", chunked(b"1\r\na\r\n00000000000000A\r\n0123456789\r\n0\r\n\r\n"), meant(b"a0123456789")),
    Case("a chunk that looks like framing", chunked(b"7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n"), meant(b"\r\n0\r\n\r\n")),
    Case("no chunks", chunked(b"0\r\n\r\n"), meant(b"")),
    Case("many zeros end it", chunked(b"0000000000000000\r\n\r\n"), meant(b"")),
    Case("hexadecimal in both cases", chunked(b"a\r\n0123456789\r\nB\r\n0123456789a\r\n0\r\n\r\n"), meant(b"01234567890123456789a")),
    Case("chunk extensions", chunked(b'1;a;b=c\r\nx\r\n1;d="\xff"\r\ny\r\n0;e\r\n\r\n'), meant(b"xy")),
    Case("space before an extension (RFC 9112, 7.1.1)", chunked(b"1 \t; a\r\nx\r\n0\r\n\r\n"), meant(b"x")),
    # Merged, they would overwrite headers that were judged.
    Case("trailers are dropped", chunked(b"1\r\nx\r\n0\r\nHost: evil\r\nContent-Length: 9\r\n\r\n"), meant(b"x")),
    Case("upper-case CHUNKED", post(b"TRANSFER-ENCODING: CHUNKED", body=b"1\r\nx\r\n0\r\n\r\n"),
         es.Request(es.Head("POST", "/", "", 1, with_headers(("transfer-encoding", "CHUNKED")), None), b"x")),
    Case("pipelined", post(b"Content-Length: 1", body=b"a") + chunked(b"1\r\nb\r\n0\r\n\r\n") + lined(b"GET /c HTTP/1.1"),
         means("POST", headers=with_headers(("content-length", "1")), body=b"a"), meant(b"b"), means(path="/c")),
    Case("Expect", post(b"Expect: 100-Continue", b"Content-Length: 1", body=b"x"), means("POST", headers=with_headers(("expect", "100-Continue"), ("content-length", "1")), body=b"x")),
    # At the limits: what is not longer than them is taken.
    Case("longest first line", lined(b"GET " + LONG_PATH + b" HTTP/1.1"), means(path=LONG_PATH.decode())),
    Case("longest head in one line", get(WIDE), means(headers=with_headers(("x", "v" * (len(WIDE) - 3))))),
    Case("most headers", get(*FIVE), means(headers=with_headers(*FIVE_MEANT))),
    Case("head and trailers share the limits", chunked(b"0\r\nA: b\r\nC: d\r\nE: f\r\nG: h\r\n\r\n"), meant(b"")),
    Case("limits begin anew", get(*FIVE) + get(*FIVE), *[means(headers=with_headers(*FIVE_MEANT))] * 2),
    Case("longest chunk line", chunked(b"1;" + b"e" * 18 + b"\r\nx\r\n0\r\n\r\n"), meant(b"x")),
    Case("largest sized body", post(b"Content-Length: 40", body=b"b" * 40), means("POST", headers=with_headers(("content-length", "40")), body=b"b" * 40)),
    Case("largest chunked body", chunked(b"1e\r\n%b\r\nA\r\n%b\r\n0\r\n\r\n" % (b"b" * 30, b"b" * 10)), meant(b"b" * 40)),
)
# fmt: on


def events_of(requests: Iterable[es.Request]) -> tuple[es.Head | es.Request, ...]:
    """Each request's head, then the request."""
    return tuple(event for request in requests for event in (request.head, request))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_request_means_the_same_however_it_is_cut(case: Case) -> None:
    for pieces in feedings(case.data):
        assert outcome(pieces) == Outcome(events_of(case.requests)), pieces


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_request_is_given_at_its_last_byte_and_not_before(case: Case) -> None:
    events = events_of(case.requests)
    early = outcome([case.data[:-1]])
    # Without a body the head comes at the last byte too.
    assert early in (Outcome(events[:-2]), Outcome(events[:-1]))
    parser = es.RequestParser(LIMITS)
    parser.feed(case.data)
    assert [parser.next_event() for _ in events] == list(events)
    assert (parser.is_between_requests, parser.buffered_bytes) == (True, 0)


@dataclass(frozen=True)
class SecondOpinion:
    """A request as h11 reads it."""

    method: bytes
    target: bytes
    version: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


def h11_reads(data: bytes) -> list[SecondOpinion]:
    """The requests in ``data`` as h11's server reads them. May raise h11's error."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(data)
    found: list[SecondOpinion] = []
    request: h11.Request | None = None
    body = b""
    while (event := connection.next_event()) is not h11.NEED_DATA:
        if isinstance(event, h11.Request):
            request, body = event, b""
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert request is not None
            headers = tuple((bytes(k), bytes(v)) for k, v in request.headers)
            found.append(
                SecondOpinion(
                    request.method, request.target, request.http_version, headers, body
                )
            )
            connection.send(h11.Response(status_code=400, headers=[]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is h11.MUST_CLOSE:
                break
            connection.start_next_cycle()
    assert connection.trailing_data[0] == b"", "h11 ends the last request earlier"
    return found


def agrees(request: es.Request, second: SecondOpinion) -> bool:
    """Whether both readings are the same request."""
    head = request.head
    target = second.target.decode("ascii")
    headers = [(k.decode(), v.decode("latin-1")) for k, v in second.headers]
    host = dict(headers).get("host", "")
    # RFC 9112, 3.2.2: absolute-form; what follows the authority is the target, and
    # the authority counts instead of the Host.
    if found := re.match(r"https?://([^/?]*)", target, re.IGNORECASE):
        target, host = target[found.end() :], found[1]
    path, _, query = target.partition("?")
    return (
        (head.method, head.path, head.query, f"1.{head.minor_version}", request.body)
        == (
            second.method.decode(),
            path or "/",
            query,
            second.version.decode(),
            second.body,
        )
        and head.host in (host, "")  # which rows written by hand leave out
    ) and headers == [
        (k, v.lower() if k == "transfer-encoding" else v)  # as h11 does
        for k, v in head.headers
    ]


# What we accept and h11 refuses; RFC 9112 allows each.
H11_REFUSES = {
    "2.2: an empty line before the request is skipped": re.compile(rb"\r\n"),
    "7.1.1: white space before an extension": re.compile(
        rb"(?s).*\r\n[0-9A-Fa-f]+[\t ]+;"
    ),
    "7.1.2: trailers are dropped; h11 judges their framing as the head's": re.compile(
        rb"(?is).*\r\n0+[\t ]*(;[^\r\n]*)?\r\n([^\r\n]+\r\n)*"
        rb"(content-length|transfer-encoding):"
    ),
}


def h11_knowingly_refuses(raw: bytes) -> bool:
    """Whether this request is one of those."""
    return any(known.match(raw) for known in H11_REFUSES.values())


def accepted(
    data: bytes, limits: es.HttpLimits = LIMITS
) -> list[tuple[es.Request, bytes]]:
    """Each request we read, and its own bytes: up to where it was complete."""
    parser = es.RequestParser(limits)
    found: list[tuple[es.Request, bytes]] = []
    begin = 0
    for end in range(1, len(data) + 1):
        parser.feed(data[end - 1 : end])
        try:
            while event := parser.next_event():
                if isinstance(event, es.Request):
                    found.append((event, data[begin:end]))
                    begin = end
        except es.ApiError:
            break
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_h11_reads_the_same_request(case: Case) -> None:
    try:
        seconds = h11_reads(case.data)
    except h11.RemoteProtocolError:
        assert h11_knowingly_refuses(case.data)
        return
    for request, second in zip(case.requests, seconds, strict=True):
        assert agrees(request, second), (request, second)


def test_what_a_head_says_of_its_connection() -> None:
    def head(minor: int, *headers: tuple[str, str]) -> es.Head:
        return dataclasses.replace(means(minor=minor).head, headers=headers)

    assert head(1).keep_alive
    assert head(1, ("connection", "Keep-Alive, Upgrade")).keep_alive
    assert head(1, ("connection", "closed")).keep_alive
    assert not head(1, ("connection", "upgrade ,\tClose")).keep_alive
    assert not head(1, ("connection", "x"), ("connection", "close")).keep_alive
    assert not head(0, ("connection", "keep-alive")).keep_alive
    assert head(1, ("expect", "100-continue")).expects_continue
    assert not head(1).expects_continue
    # RFC 9110, 10.1.1: in an HTTP/1.0 request it must be ignored.
    assert not head(0, ("expect", "100-continue")).expects_continue


# --- what is refused ---

BAD, LARGE, LONG = es.MalformedRequest, es.HeaderTooLarge, es.TargetTooLong
CODING, VERSION, TOO_MUCH = (
    es.CodingNotImplemented,
    es.VersionNotSupported,
    es.BodyTooLarge,
)


@dataclass(frozen=True)
class Refusal:
    """Bytes, the error they get, why, and how many requests before are served."""

    name: str
    data: bytes
    error: type[es.ApiError]
    why: str
    served: int = 0


def sized(length: bytes) -> bytes:
    """A POST of five bytes that says its length so."""
    return post(b"Content-Length: " + length, body=b"hello")


def coded(coding: bytes) -> bytes:
    """A POST of one chunk that says its coding so."""
    return post(b"Transfer-Encoding: " + coding, body=b"5\r\nhello\r\n0\r\n\r\n")


def hosted(host: bytes) -> bytes:
    """A GET with this Host."""
    return b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n"


def aimed(target: bytes) -> bytes:
    """A GET of this target."""
    return lined(b"GET " + target + b" HTTP/1.1")


def one_chunk(size: bytes) -> bytes:
    """A POST of one chunk of five bytes that says its size so."""
    return chunked(size + b"\r\nhello\r\n0\r\n\r\n")


def rows(
    name: str, made: Callable[[bytes], bytes], why: str, *odd: bytes
) -> Iterator[Refusal]:
    """A MalformedRequest for each odd text."""
    for text in odd:
        yield Refusal(f"{name} {text!r}", made(text), BAD, why)


PLAIN = "RFC 9110, 8.6: Content-Length is digits and nothing else; int() takes more"
TWO_ENDS = "RFC 9112, 6.3: the length is unknown, and guesses differ: smuggling"
NOT_FINAL = "RFC 9112, 6.3 item 4: chunked is not the last coding: 400 is a MUST"
SIZES = "RFC 9112, 7.1: a chunk size is hexadecimal digits and nothing else"
CRLF_ONLY = (
    "RFC 9112, 2.2: CR alone is no line end; LF alone is one to some readers only"
)
TOKEN = "RFC 9110, 5.1: a field name is a token, followed by its colon at once"
VALUE = "RFC 9110, 5.5: NUL, CR, LF are dangerous in a value, other controls invalid"
LINE = "RFC 9112, 3: a first line is token SP target SP HTTP/digit.digit"
TARGET = (
    "RFC 9112, 3.2: the forms of a target; with white space it must not be repaired"
)
HOSTS = "RFC 9112, 3.2: 400 to no Host, to two, and to what is no host and port"
ONE_ENDING = "RFC 9112, 7.1: chunk data ends with CRLF"
LIMITED = "a stranger must not choose how much we keep"

# fmt: off
REFUSALS = (
    # Where a body ends
    Refusal("length and coding", post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), BAD, TWO_ENDS),
    Refusal("coding and length", post(b"Transfer-Encoding: chunked", b"Content-Length: 5", body=b"0\r\n\r\n"), BAD, TWO_ENDS),
    Refusal("two lengths", post(b"Content-Length: 5", b"Content-Length: 6", body=b"hello"), BAD, TWO_ENDS),
    Refusal("one length twice", post(b"Content-Length: 5", b"content-length: 5", body=b"hello"), BAD, TWO_ENDS),
    Refusal("list of lengths", sized(b"5, 5"), BAD, TWO_ENDS),
    *rows("length", sized, PLAIN, b"+5", b"-5", b"0x5", b"0_5", b"0 5", b"5.0", b"5e0", b'"5"', b"", b"\xd9\xa5", b"\xb2", b"5;", b"five"),
    Refusal("length of 19 digits", sized(b"0" * 18 + b"5"), BAD, "64-bit readers wrap around"),
    *rows("coding", coded, NOT_FINAL, b"gzip", b"identity", b"chunked, identity", b"chunked, gzip", b"", b"xchunked", b'"chunked"', b"chunked;q=1"),
    *rows("coding", coded, VALUE, b"\x0bchunked", b"chunked\x0c", b"chunked\0"),
    Refusal("coding gzip, chunked", coded(b"gzip, chunked"), CODING, "RFC 9112, 6.1: 501 to a coding not understood"),
    Refusal("coding chunked, chunked", coded(b"chunked,chunked"), CODING, "RFC 9112, 6.1: never twice"),
    Refusal("two codings", post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", body=b"0\r\n\r\n"), BAD, TWO_ENDS),
    Refusal("coding in HTTP/1.0", b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", BAD, "RFC 9112, 6.1: its framing is faulty"),
    # Line ends
    *rows("bytes", bytes, CRLF_ONLY, b"GET / HTTP/1.1\nHost: h\r\n\r\n", b"GET / HTTP/1.1\r\nHost: h\n\r\n", b"GET / HTTP/1.1\r\nHost: h\r\n\n"),
    *rows("bytes", bytes, CRLF_ONLY, b"GET / HTTP/1.1\rHost: h\r\n\r\n", b"\n" + get(), b"\r" + get(), b"GET / HTTP/1.1\r\r\nHost: h\r\n\r\n"),
    *rows("header", get, CRLF_ONLY, b"X: a\nY: b", b"X: a\rY: b", b"X: a\r", b"X\r: a", b"X: a\n\nGET /evil HTTP/1.1"),
    *rows("chunk line", one_chunk, CRLF_ONLY, b"5\nhello", b"5\r", b"5;a\rb", b"5;a\nhello"),  # TERM.EXT: lines in extensions
    *rows("chunks", chunked, ONE_ENDING, b"5\r\nhello\n0\r\n\r\n", b"5\r\nhello\rX0\r\n\r\n", b"5\r\nhelloXX0\r\n\r\n"),
    *rows("chunks", chunked, ONE_ENDING, b"4\r\nhello\r\n0\r\n\r\n", b"6\r\nhello\r\n0\r\n\r\n"),
    *rows("trailers", chunked, CRLF_ONLY, b"0\r\nA: b\n\r\n", b"0\r\n\n", b"0\r\n\r\r\n", b"0\r\nA: b\rc\r\n\r\n"),
    *rows("trailers", chunked, TOKEN, b"0\r\n: b\r\n\r\n", b"0\r\nA : b\r\n\r\n", b"0\r\nA\r\n\r\n"),
    Refusal("two empty lines first", b"\r\n\r\n" + get(), BAD, "RFC 9112, 2.2: at least one is skipped; without an end nothing is ever read"),
    # Headers
    *rows("header", get, "RFC 9112, 5.2: folded lines are refused", b"X: a\r\n b", b"X: a\r\n\tb", b"X: a\r\n ", b" ", b"\t", b" X: a"),
    *rows("bytes", bytes, "RFC 9112, 2.2: white space before the first field", b"GET / HTTP/1.1\r\n Host: h\r\n\r\n", b"GET / HTTP/1.1\r\n\tHost: h\r\n\r\n"),
    *rows("trailers", chunked, "RFC 9112, 5.2: folded lines are refused", b"0\r\nA: b\r\n c\r\n\r\n"),
    *rows("header", get, TOKEN, b"X : a", b"X\t: a", b"X", b": a", b":", b"X Y: a", b"X[: a", b"X\0: a", b"\xe9: a", b"X\x7f: a"),
    *rows("header", get, VALUE, b"X: a\0b", b"X: a\x01b", b"X: \x1b[2J", b"X: \x7f", b"X: \x0ca", b"X: a\x0b"),
    *rows("headers", get, "RFC 9110, 5.3: not a list, so which?", b"Content-Type: a/b\r\nContent-Type: a/b", b"Authorization: a\r\nauthorization: b", b"Expect: 100-continue\r\nExpect: 100-continue"),
    Refusal("other expectation", get(b"Expect: 200-ok"), es.ExpectationFailed, "RFC 9110, 10.1.1"),
    Refusal("two in one expectation", get(b"Expect: 100-continue, x"), es.ExpectationFailed, "RFC 9110, 10.1.1"),
    # The first line
    *rows("line", lined, LINE, b" / HTTP/1.1", b"G@T / HTTP/1.1", b"GET: / HTTP/1.1", b"G\xcbT / HTTP/1.1", b"GET HTTP/1.1", b"GET"),
    *rows("line", lined, LINE, b"GET  / HTTP/1.1", b"GET /  HTTP/1.1", b"GET\t/ HTTP/1.1", b"GET / HTTP/1.1 ", b" GET / HTTP/1.1"),
    *rows("line", lined, LINE, b"GET / http/1.1", b"GET / HTTP/1.10", b"GET / HTTP/11", b"GET / HTTP/+1.1", b"GET / HTTP/1.\xd9\xa1", b"GET / FTP/1.1"),
    *rows("line", lined, LINE, b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03"),  # TLS
    Refusal("no version", lined(b"GET /"), BAD, "HTTP/0.9 has no head: its answer could be taken for anything"),
    Refusal("version 2.0", lined(b"GET / HTTP/2.0"), VERSION, "RFC 9110, 15.6.6"),
    Refusal("HTTP/2 with prior knowledge", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", VERSION, "RFC 9113, 3.4: the preface is made to fail here"),
    Refusal("version 1.2", lined(b"GET / HTTP/1.2"), VERSION, "there is none; we are stricter than RFC 9110, 2.5 (SHOULD)"),
    Refusal("version 0.9", lined(b"GET / HTTP/0.9"), VERSION, "RFC 9110, 15.6.6"),
    Refusal("TLS", b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n", BAD, LINE),
    *rows("target", aimed, TARGET, b"a", b"*", b"h:1", b"ftp://h/", b"http:///", b"http:/a", b"https://", b"?a", b"#", b"/#a", b"/?a#b"),
    *rows("target", aimed, TARGET, b"/a b", b"/\xc3\xa9", b"/\0", b"/\x7f", b"/\t"),
    # Hosts
    Refusal("no Host", b"GET / HTTP/1.1\r\n\r\n", BAD, HOSTS),
    Refusal("two Hosts", get(b"Host: h"), BAD, HOSTS),
    Refusal("empty Host", hosted(b""), BAD, "RFC 9110, 4.2.1: an http URI without a host is invalid"),
    *rows("Host", hosted, HOSTS, b"a b", b"a/b", b"u@a", b"a:1, b:2", b"a:b", b"a:1:2", b"a:-1", b"a:123456", b"[::1", b"[::1]a", b"[g]", b"\xe9", b"a?"),
    Refusal("bad Host in HTTP/1.0", b"GET / HTTP/1.0\r\nHost: a/b\r\n\r\n", BAD, HOSTS),
    # Chunks
    *rows("chunk size", one_chunk, SIZES, b"+5", b"-5", b"0x5", b"0_5", b" 5", b"0 5", b"", b";a", b"g", b"5h", b"\xd9\xa5", b"5,", b"5.0"),
    *rows("chunk line", one_chunk, VALUE, b"5;\0", b"5;\x7f", b"5;a=\x0b"),
    Refusal("chunk size of 17 digits", one_chunk(b"0" * 16 + b"5"), BAD, "64-bit readers wrap around"),
    Refusal("second chunk size bad", chunked(b"1\r\na\r\n-1\r\n0\r\n\r\n"), BAD, SIZES),
    # Limits
    Refusal("first line one too long", lined(b"GET " + LONG_PATH + b"a HTTP/1.1"), LONG, "RFC 9112, 3: 414"),
    Refusal("first line without an end", b"G" * 999, LONG, LIMITED),
    Refusal("head one too large", get(WIDE + b"v"), LARGE, LIMITED),
    Refusal("header without an end", b"GET / HTTP/1.1\r\nX: " + b"v" * 999, LARGE, LIMITED),
    Refusal("large head of many lines", get(*[b"X: " + b"v" * 35] * 4), LARGE, LIMITED),
    Refusal("one header too many", get(*FIVE, b"G: v"), LARGE, LIMITED),
    Refusal("one trailer too many", chunked(b"0\r\n" + b"a: b\r\n" * 5 + b"\r\n"), LARGE, LIMITED),
    Refusal("trailers too large", chunked(b"0\r\nA: %b\r\n\r\n" % (b"b" * 130)), LARGE, LIMITED),
    Refusal("chunk line one too long", chunked(b"1;" + b"e" * 19 + b"\r\nx\r\n0\r\n\r\n"), BAD, "RFC 9112, 7.1.1: extensions nobody reads"),
    Refusal("chunk line without an end", chunked(b"1;" + b"e" * 99), BAD, LIMITED),
    Refusal("length one too much", sized(b"41"), TOO_MUCH, LIMITED),
    Refusal("length of 18 nines", sized(b"9" * 18), TOO_MUCH, LIMITED),
    Refusal("length too much, to be continued", post(b"Expect: 100-continue", b"Content-Length: 41"), TOO_MUCH, "RFC 9110, 10.1.1: before the body is sent"),
    Refusal("one chunk too large", chunked(b"29\r\n" + b"b" * 41), TOO_MUCH, LIMITED),
    Refusal("chunk of 16 Fs", chunked(b"F" * 16 + b"\r\n"), TOO_MUCH, LIMITED),
    Refusal("chunks too large together", chunked((b"A\r\n0123456789\r\n" * 4) + b"1\r\nx\r\n"), TOO_MUCH, LIMITED),
    # What was complete before an error is not undone by it
    Refusal("garbage after a request", get() + b"garbage\r\n\r\n", BAD, LINE, 1),
    Refusal("body longer than its length", post(b"Content-Length: 4", body=b"hell\0") + get(), BAD, LINE, 1),
    Refusal("empty lines between requests", get() + b"\r\n\r\n" + get(), BAD, "RFC 9112, 2.2", 1),
    Refusal("smuggling after two requests", get() * 2 + sized(b"+5"), BAD, PLAIN, 2),
)
# fmt: on


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row.name)
def test_a_refusal_is_the_same_however_it_is_cut(row: Refusal) -> None:
    first = outcome([row.data])
    assert first.error is row.error, row.why
    assert sum(isinstance(event, es.Request) for event in first.events) == row.served
    for pieces in feedings(row.data):
        assert outcome(pieces) == first, pieces


def test_the_rows_differ_from_accepted_requests_only_by_what_they_name() -> None:
    for data in (sized(b"5"), coded(b"chunked"), one_chunk(b"5"), hosted(b"a:1")):
        assert outcome([data]).error is None
    for data in (
        aimed(b"/"),
        lined(b"GET / HTTP/1.1"),
        get(b"X: a"),
        chunked(b"0\r\n\r\n"),
    ):
        assert outcome([data]).error is None


# --- what is sent ---

DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
NOW = 784111777.5


def rendered(response: es.Response, *, close: bool = False) -> bytes:
    return es.render_head(response, kept_s=None if close else 95, now=NOW)


def h11_replies(raw: bytes, methods: Sequence[str]) -> list[kit.Reply]:
    """The responses in ``raw`` as h11's client reads them.

    One for each method asked, fewer if one says that it is the last.
    """
    client = h11.Connection(h11.CLIENT)
    client.receive_data(raw)
    replies: list[kit.Reply] = []
    for method in methods:
        client.send(h11.Request(method=method, target="/", headers=[("host", "h")]))
        client.send(h11.EndOfMessage())
        reply = kit.Reply(0, {}, b"")
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                reply.status = event.status_code
                headers = [(k.decode(), v.decode("latin-1")) for k, v in event.headers]
                reply.headers = dict(headers)
                assert len(reply.headers) == len(headers), "a header twice"
            elif isinstance(event, h11.Data):
                reply.body += event.data
            else:
                assert isinstance(event, h11.InformationalResponse), event
        replies.append(reply)
        if client.their_state is h11.MUST_CLOSE:
            break
        client.start_next_cycle()
    assert client.trailing_data[0] == b"", "bytes after the last response"
    return replies


def test_every_error_has_a_reason_phrase() -> None:
    assert {error.status for error in es.API_ERRORS} <= set(es._REASONS)


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("status", sorted(es._REASONS))
def test_two_parsers_read_the_response_we_meant(
    status: int, method: str, close: bool
) -> None:
    body = b"" if status in (204, 304) else b"body"
    response = es.Response(status, body, "a/b", (("x-one", "1"), ("x-two", "\xe9")))
    wanted = {"date": DATE, "x-one": "1", "x-two": "\xe9"}
    # RFC 9110, 8.6: a 204 MUST NOT have a length, and a 304 none but what a 200 would
    # have; the answer to HEAD has that of GET.
    wanted |= {"content-length": "4", "content-type": "a/b"} if body else {}
    wanted |= {"connection": "close"} if close else {"keep-alive": "timeout=95"}
    sent = b"" if method == "HEAD" else body
    times = 1 if close else 2  # the second is read only if the first ends where we mean

    raw = (rendered(response, close=close) + sent) * times
    methods, replies = [method] * times, [kit.Reply(status, wanted, sent)] * times
    assert raw.startswith(f"HTTP/1.1 {status} {es._REASONS[status]}\r\n".encode())
    assert kit.parse_replies(raw, methods) == replies
    assert h11_replies(raw, methods) == replies


def test_a_response_without_a_body_says_so() -> None:
    reply = kit.parse_reply(rendered(es.Response(200)))
    kept = {"keep-alive": "timeout=95"}
    assert reply.headers == {"date": DATE, "content-length": "0"} | kept


@pytest.mark.parametrize("bad", ["a\rb", "a\nb", "a\r\nset-cookie: b", "\n", "\u2028"])
def test_a_field_that_could_split_the_response_is_never_sent(bad: str) -> None:
    for header in ((bad, "v"), ("n", bad)):
        with pytest.raises(ValueError):
            rendered(es.Response(200, headers=(header,)))
