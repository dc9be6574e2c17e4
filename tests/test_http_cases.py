r"""The corpus: odd and hostile requests in files, each with its verdict and the reason.

The tables of test_http.py walk along the grammar, under tiny limits. Here is what real
clients send and what the RFCs forbid, under the limits we ship. Each file in cases/http is
a topic, and its cases look like this, with an empty line between two:

    == a body that is not whole
    RFC 9112, 8: an incomplete body is no request.
    | POST /a?b HTTP/1.1\r\n
    | Host: {a*60}\r\n
    | Content-Length: 5\r\n
    | \r\n
    | hell
    -> more

First its name, then one sentence that says why, with the section of the RFC. Then the bytes, after "| " and all in sight: a line of the file
ends nothing, what is sent is written \r \n \t \xHH \\, and {a*60} is sixty times "a"
(the text may hold other such braces). Last the verdict, which is in order

    -> POST /a?b hello            a request: method, target, body if it has one
    -> 400 malformed_request      a refusal: status and code; nothing comes after it
    -> more                       a request has begun and is not complete
    -> nothing                    none has begun

A new case needs no Python, and a new topic only a new file.
"""

from __future__ import annotations

import asyncio
import re
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h11
import pytest

import embellama_server as es
from tests import kit
from tests.test_http import (
    CASES,
    H11_REFUSES,
    REFUSALS,
    accepted,
    agrees,
    h11_knowingly_refuses,
    h11_reads,
    h11_replies,
    outcome,
)

FOLDER = kit.ROOT / "tests" / "cases" / "http"
SHIPPED = es.HttpLimits()
GOOD = b"GET /health HTTP/1.1\r\nHost: good\r\nConnection: close\r\n\r\n"

# --- reading the files ---

_CASE = re.compile(
    r"== (?P<name>.+)\n(?P<why>([^|\n-].*\n)+)"
    r"(?P<data>(\| .+\n)+)(?P<verdict>(-> .+\n)+)"
)
_REPEATED = re.compile(r"\{([^{}]*)\*([0-9]+)\}")  # the innermost
_ESCAPED = re.compile(r"([ -\[\]-~]|\\[rnt\\]|\\x[0-9a-f]{2})*")
_REFUSED = re.compile(r"([45][0-9]{2}) ([a-z0-9_]+)")


@dataclass(frozen=True)
class Verdict:
    """What becomes of some bytes."""

    requests: tuple[tuple[str, str, bytes], ...]  # method, target, body
    refusal: tuple[int, str] | None  # status, code
    wants_more: bool = False


@dataclass(frozen=True)
class Written:
    """A case as its file has it."""

    name: str  # topic/name
    why: str
    data: bytes
    verdict: Verdict


def unescaped(text: str) -> bytes:
    """The bytes that are written so."""
    while (expanded := _REPEATED.sub(lambda m: m[1] * int(m[2]), text)) != text:
        text = expanded
    if not _ESCAPED.fullmatch(text):
        raise ValueError(f"not printable ASCII with known escapes: {text!r}")
    return text.encode("ascii").decode("unicode_escape").encode("latin-1")


def read_verdict(lines: list[str]) -> Verdict:
    """The verdict in the lines after the arrows."""
    *lines, last = lines
    refused = _REFUSED.fullmatch(last)
    if not refused and last not in ("more", "nothing"):
        lines.append(last)
    requests = []
    for line in lines:
        if _REFUSED.fullmatch(line) or line in ("more", "nothing"):
            raise ValueError(f"nothing comes after {line!r}")
        method, target, *body = line.split(" ", 2)
        requests.append(
            (method, unescaped(target).decode("ascii"), unescaped("".join(body)))
        )
    refusal = (int(refused[1]), refused[2]) if refused else None
    return Verdict(tuple(requests), refusal, last == "more")


def read_cases(topic: str, text: str) -> Iterator[Written]:
    """The cases in the text of a file."""
    _, *blocks = text.removesuffix("\n").split("\n\n")  # after a line for the reader
    for block in blocks:
        if not (found := _CASE.fullmatch(block + "\n")):
            raise ValueError(f"{topic}: name, why, bytes, verdict:\n{block}")
        data = [unescaped(line[2:]) for line in found["data"].splitlines()]
        yield Written(
            name=f"{topic}/{found['name']}",
            why=" ".join(found["why"].splitlines()),
            data=b"".join(data),
            verdict=read_verdict([v[3:] for v in found["verdict"].splitlines()]),
        )


CORPUS = tuple(
    case
    for path in sorted(FOLDER.glob("*.http"))
    for case in read_cases(path.stem, path.read_text(encoding="ascii"))
)
each_case = pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
REFUSED = tuple(case for case in CORPUS if case.verdict.refusal)


# --- the corpus itself ---


def test_every_case_has_a_name_of_its_own_and_bytes_of_its_own() -> None:
    assert len(CORPUS) > 250, "a corpus that is not found passes every test"
    assert len({case.name for case in CORPUS}) == len(CORPUS)
    known = [row.data for row in CASES] + [row.data for row in REFUSALS]
    known += [case.data for case in CORPUS]
    assert not [case.name for case in CORPUS if known.count(case.data) > 1]


@each_case
def test_every_case_has_one_sentence_that_names_its_source(case: Written) -> None:
    assert case.why.endswith(".")
    assert ". " not in case.why, "more than one sentence"
    assert re.search(r"RFC \d{4}, \d", case.why)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.http")), ids=lambda p: p.stem)
def test_every_byte_of_a_case_can_be_seen(path: Path) -> None:
    for line in path.read_text(encoding="ascii").splitlines():
        assert re.fullmatch(r"([ -~]{0,99}[!-~])?", line), line


@pytest.mark.parametrize(
    "text",
    [
        "== no reason\n| a\n-> nothing",
        "== no bytes\nWhy.\n-> nothing",
        "== no verdict\nWhy.\n| a",
        "== verdict first\nWhy.\n-> nothing\n| a",
        "== no escape\nWhy.\n| \\u0041\n-> nothing",
        "== half an escape\nWhy.\n| \\x4\n-> nothing",
        "== no target\nWhy.\n| a\n-> GET",
        "== refused twice\nWhy.\n| a\n-> 400 a\n-> 400 b",
    ],
)
def test_a_case_that_is_not_whole_is_loud(text: str) -> None:
    with pytest.raises(ValueError):
        list(read_cases("topic", f"# head\n\n{text}\n"))


def test_a_case_is_read_as_its_docstring_says() -> None:
    assert __doc__ is not None
    example = "\n".join(line[4:] for line in __doc__.split("\n\n")[2].splitlines())
    (case,) = read_cases("topic", f"# head\n\n{example}\n")
    assert case.data == (
        b"POST /a?b HTTP/1.1\r\nHost: %b\r\nContent-Length: 5\r\n\r\nhell" % (b"a" * 60)
    )
    assert case.verdict == Verdict((), None, wants_more=True)
    assert unescaped(r"{a{\x00*2}*2}{") == b"a\0\0a\0\0{"


# --- the verdicts ---


def cuts(data: bytes) -> Iterator[list[bytes]]:
    """Byte by byte and in two: everywhere, or where it matters if there is much."""
    yield kit.feed_bytes(data)
    places = set(range(1, len(data)))
    if len(data) > 1000:
        ends = {*range(100), *range(len(data) - 100, len(data))}
        places &= ends | set(range(0, len(data), len(data) // 100))
    for at in sorted(places):
        yield [data[:at], data[at:]]


def seen(data: bytes) -> Verdict:
    """What the parser makes of the bytes in one piece."""
    parser = es.RequestParser(SHIPPED)
    parser.feed(data)
    requests: list[tuple[str, str, bytes]] = []
    try:
        while event := parser.next_event():
            if isinstance(event, es.Request):
                head = event.head
                target = f"{head.path}?{head.query}" if head.query else head.path
                requests.append((head.method, target, bytes(event.body)))
    except es.ApiError as error:
        return Verdict(tuple(requests), (error.status, error.code))
    return Verdict(tuple(requests), None, not parser.is_between_requests)


@each_case
def test_a_case_gets_its_verdict_however_it_is_cut(case: Written) -> None:
    assert seen(case.data) == case.verdict, case.why
    whole = outcome([case.data], SHIPPED)
    for pieces in cuts(case.data):
        assert outcome(pieces, SHIPPED) == whole, pieces


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_after_a_refusal_not_one_more_byte_is_looked_at(case: Written) -> None:
    assert outcome([case.data + GOOD], SHIPPED) == outcome([case.data], SHIPPED)
    parser = es.RequestParser(SHIPPED)
    parser.feed(case.data)
    with pytest.raises(es.ApiError):
        while parser.next_event():
            pass
    parser.feed(typing.cast(bytes, object()))  # raises if it is so much as copied
    assert parser.next_event() is None
    assert parser.buffered_bytes == 0


def test_h11_reads_the_same_requests_but_for_the_known_differences() -> None:
    refused = []
    for case in CORPUS:
        for request, raw in accepted(case.data, SHIPPED):
            try:
                (second,) = h11_reads(raw)
            except h11.RemoteProtocolError:
                refused.append(raw)
                continue
            assert agrees(request, second), (case, second)
    assert all(map(h11_knowingly_refuses, refused))
    for name, known in H11_REFUSES.items():
        assert any(map(known.match, refused)), f"not a difference any more: {name}"


# --- over a socket ---


def addressed(data: bytes) -> bytes:
    """The case as a client of ours would send it: the corpus leaves out the type."""
    if b"Content-Type:" in data:
        return data
    line = b" /v1/embeddings HTTP/1.1\r\n"
    return data.replace(line, line + b"Content-Type: application/json\r\n")


def ends_connection(head: es.Head, status: int) -> bool:
    """Whether nothing is read after this request: it said so, or was refused unread."""
    is_unread = head.body_bytes is None or head.expects_continue
    return not head.keep_alive or (status >= 400 and is_unread)


def hosts_of(cases: Iterable[Written]) -> tuple[str, ...]:
    """The names that they are addressed to."""
    events = (event for case in cases for event in outcome([case.data], SHIPPED).events)
    heads = (event for event in events if isinstance(event, es.Head))
    return tuple({es._bare_host(head.get("host")) for head in heads} | {"good"})


def check_replies(case: Written, raw: bytes) -> None:
    """Judge all that came back for a case, and for the good request sent after it."""
    methods = [method for method, _, _ in case.verdict.requests] + ["GET"]
    replies = h11_replies(raw, methods)
    assert replies == kit.parse_replies(raw, methods[: len(replies)])
    *before, last = replies
    assert last.headers["connection"] == "close"
    assert not any("connection" in reply.headers for reply in before)
    if len(replies) < len(methods):
        request, _ = accepted(case.data, SHIPPED)[len(replies) - 1]
        assert ends_connection(request.head, last.status)
    elif case.verdict.refusal:
        assert (last.status, last.error["code"]) == case.verdict.refusal


def test_two_parsers_read_all_that_a_running_service_answers() -> None:
    whole = [case for case in CORPUS if not case.verdict.wants_more]

    async def body() -> None:
        async with kit.running_service(allowed_host=hosts_of(whole)) as running:
            for case in whole:
                check_replies(case, await running.exchange(addressed(case.data) + GOOD))
            assert " bug " not in running.log.getvalue()

    asyncio.run(body())


@pytest.mark.parametrize(
    "headers", [b"", b"Host: h\r\nContent-Length: +1\r\n", b"Host: h\r\nX : y\r\n"]
)
def test_a_head_request_refused_in_its_fields_gets_no_body(headers: bytes) -> None:
    async def body() -> None:
        async with kit.running_service() as running:
            raw = await running.exchange(b"HEAD / HTTP/1.1\r\n" + headers + b"\r\n")
        (reply,) = h11_replies(raw, ["HEAD"])  # RFC 9110, 9.3.2: a MUST NOT
        assert reply.status == es.MalformedRequest.status

    asyncio.run(body())
