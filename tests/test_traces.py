"""Spans (TRACES): what a collector is sent, and what it cannot do to us.

The collectors are small HTTP servers of the standard library, on ports the kernel
chooses. What they are sent is read by OpenTelemetry's own messages as well, where the
package is installed.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import importlib
import io
import itertools
import json
import queue
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

import embellama_server as es
from tests import kit

DEADLINE_S = 60.0  # kit.DEADLINE_S
FOREVER_S = 3600.0
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


# --- a collector ---


@dataclass
class Sent:
    """One request a collector got."""

    path: str
    headers: dict[str, str]
    payload: Any

    @property
    def spans(self) -> list[dict[str, Any]]:
        [resource] = self.payload["resourceSpans"]
        [scope] = resource["scopeSpans"]
        found: list[dict[str, Any]] = scope["spans"]
        return found


Answer = tuple[int, dict[str, str], bytes]
OK: Answer = (200, {"Content-Type": "application/json"}, b"{}")


@dataclass
class FakeCollector:
    """Answers by ``plan``, then with 200; waits for ``gate`` before each answer."""

    plan: list[Answer] = field(default_factory=list)
    got: queue.Queue[Sent] = field(default_factory=queue.Queue)
    gate: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def next(self) -> Sent:
        return self.got.get(timeout=DEADLINE_S)

    def spans(self) -> list[dict[str, Any]]:
        """Those of all requests that have come so far."""
        return [span for sent in list(self.got.queue) for span in sent.spans]


@contextlib.contextmanager
def collecting(
    tls: ssl.SSLContext | None = None, listener: socket.socket | None = None
) -> Iterator[FakeCollector]:
    fake = FakeCollector()
    fake.gate.set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Content-Encoding"] == "gzip":
                body = zlib.decompress(body, wbits=31)
            headers = {key.lower(): value for key, value in self.headers.items()}
            fake.got.put(Sent(self.path, headers, json.loads(body)))
            fake.gate.wait(DEADLINE_S)
            status, extra, reply = fake.plan.pop(0) if fake.plan else OK
            with contextlib.suppress(OSError):
                self.send_response(status)
                for key, value in extra.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

        def do_GET(self) -> None:
            raise AssertionError("a redirect was followed")

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if listener:
        server.socket.close()
        server.socket = listener
        server.server_port = listener.getsockname()[1]
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    scheme, host = ("https", "localhost") if tls else ("http", "127.0.0.1")
    fake.url = f"{scheme}://{host}:{server.server_port}"
    try:
        yield fake
    finally:
        fake.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def collector() -> Iterator[FakeCollector]:
    with collecting() as fake:
        yield fake


@dataclass
class Traced:
    """A tracer and what it logged."""

    tracer: es.Tracer
    text: io.StringIO

    def lines(self, event: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in self.text.getvalue().splitlines()]
        return [row for row in rows if row["event"] == event]


Start = Callable[[str], Traced]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Tracers that send when a batch is full or at the end, not by the clock."""
    monkeypatch.setattr(es, "_SEND_INTERVAL_S", FOREVER_S)
    begun: list[es.Tracer] = []

    def starting(url: str) -> Traced:
        text = io.StringIO()
        log = es.Log("debug", "json", text)
        begun.append(es.Tracer(url, "embeddings", "1.2.3", log))
        return Traced(begun[-1], text)

    yield starting
    for tracer in begun:
        tracer.close(0.0)


def request_span(**changes: Any) -> es.RequestSpan:
    now = time.monotonic()
    parts = ("tokenization", now - 3, now - 2), ("queue", now - 2, now - 1)
    facts: dict[str, Any] = {
        "method": "POST",
        "route": "/v1/embeddings",
        "path": "/v1/embeddings",
        "scheme": "http",
        "status": 200,
        "begun_at": now - 4,
        "ended_at": now,
        "parts": (*parts, ("inference", now - 1, now)),
        "model": "all-MiniLM-L6-v2",
        "inputs": 2,
        "tokens": 2**40,
    }
    return es.RequestSpan(**(facts | changes))


Spans = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def spans_of(start: Start, collector: FakeCollector) -> Spans:
    """What a collector is sent of these requests, in one batch."""

    def sent(*requests: es.RequestSpan) -> list[dict[str, Any]]:
        traced = start(collector.url)
        for request in requests:
            traced.tracer.record(request)
        traced.tracer.close(DEADLINE_S)
        return collector.next().spans

    return sent


def attributes(row: dict[str, Any]) -> dict[str, Any]:
    """A span's or resource's, with their types: text, or whole numbers."""
    found: dict[str, Any] = {}
    for pair in row["attributes"]:
        [(kind, value)] = pair["value"].items()
        assert isinstance(value, str), "64-bit integers are text in OTLP's JSON"
        found[pair["key"]] = {"stringValue": str, "intValue": int}[kind](value)
    return found


def fill(tracer: es.Tracer, count: int, **changes: Any) -> None:
    for _ in range(count):
        tracer.record(request_span(parts=(), **changes))


# --- the caller's trace ---

HEX = "0123456789abcdef"


def hexes(length: int) -> st.SearchStrategy[str]:
    return st.text(HEX, min_size=length, max_size=length)


IDS = st.tuples(
    hexes(32).filter(lambda text: text.strip("0")),
    hexes(16).filter(lambda text: text.strip("0")),
)
LATER = hexes(2).filter(lambda text: text not in ("00", "ff"))
FLAGS = st.integers(0, 255)


@given(IDS, FLAGS)
def test_a_traceparent_of_version_00_is_read_whole(
    ids: tuple[str, str], flags: int
) -> None:
    text = f"00-{ids[0]}-{ids[1]}-{flags:02x}"
    assert es.parse_traceparent(text) == (*ids, flags)


@given(LATER, IDS, FLAGS, st.text().filter(lambda text: "\n" not in text))
def test_of_a_later_version_what_is_known_is_read(
    version: str, ids: tuple[str, str], flags: int, rest: str
) -> None:
    text = f"{version}-{ids[0]}-{ids[1]}-{flags:02x}"
    known = (*ids, flags & 1)
    assert es.parse_traceparent(text) == known
    assert es.parse_traceparent(f"{text}-{rest}") == known
    if not rest.startswith("-"):
        assert es.parse_traceparent(text + rest) == (None if rest else known)


@given(IDS, FLAGS, st.integers(0, 54), st.characters())
def test_one_wrong_character_makes_a_traceparent_ignored(
    ids: tuple[str, str], flags: int, at: int, wrong: str
) -> None:
    text = f"00-{ids[0]}-{ids[1]}-{flags:02x}"
    allowed = "-" if text[at] == "-" else HEX
    changed = text[:at] + wrong + text[at + 1 :]
    if wrong not in allowed:
        assert es.parse_traceparent(changed) is None


@given(st.one_of(st.text(), st.text(HEX + "-", min_size=50, max_size=60)))
def test_what_is_read_of_any_text_has_the_form_of_the_specification(text: str) -> None:
    if (found := es.parse_traceparent(text)) is not None:
        trace_id, parent_id, flags = found
        assert re.fullmatch("[0-9a-f]{32}", trace_id) and int(trace_id, 16)
        assert re.fullmatch("[0-9a-f]{16}", parent_id) and int(parent_id, 16)
        assert 0 <= flags <= 255
        assert text[3:52] == f"{trace_id}-{parent_id}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-1",
        f"00-{TRACE}-{PARENT}-01-",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01,00-{TRACE}-{PARENT}-01",
        f"01-{TRACE}-{PARENT}-01.more",
        f"01-{TRACE}-{PARENT}-0",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"cc-{'0' * 32}-{PARENT}-01",
        f" 00-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01\n",
        f"00-{TRACE}-{PARENT}-٠١",
    ],
)
def test_a_traceparent_that_breaks_a_rule_is_ignored(text: str) -> None:
    assert es.parse_traceparent(text) is None


# --- what is sent ---


def test_a_request_is_one_span_and_each_part_a_child_of_it(spans_of: Spans) -> None:
    before = time.time_ns()
    server, *parts = spans_of(request_span(client="203.0.113.7"))
    assert server["name"] == "POST /v1/embeddings"
    assert (server["kind"], server["parentSpanId"]) == (2, "")
    assert attributes(server) == {
        "http.request.method": "POST",
        "http.route": "/v1/embeddings",
        "http.response.status_code": 200,
        "url.path": "/v1/embeddings",
        "url.scheme": "http",
        "client.address": "203.0.113.7",
        "embellama.model": "all-MiniLM-L6-v2",
        "embellama.inputs": 2,
        "embellama.tokens": 2**40,
    }
    assert [part["name"] for part in parts] == ["tokenization", "queue", "inference"]
    assert {part["parentSpanId"] for part in parts} == {server["spanId"]}
    assert {part["traceId"] for part in parts} == {server["traceId"]}
    assert {part["kind"] for part in parts} == {1}
    ids = [span["spanId"] for span in (server, *parts)]
    assert len(set(ids)) == 4 and all(re.fullmatch("[0-9a-f]{16}", i) for i in ids)
    times = [int(server["startTimeUnixNano"])]
    times += [int(part["startTimeUnixNano"]) for part in parts]
    times.append(int(server["endTimeUnixNano"]))
    steps = [after - before for before, after in itertools.pairwise(times)]
    assert steps == [pytest.approx(1e9, abs=2000)] * 4
    assert abs(times[-1] - before) < DEADLINE_S * 1e9


def test_the_resource_names_the_service_and_the_scope_the_program(
    start: Start, collector: FakeCollector
) -> None:
    for _ in range(2):
        traced = start(collector.url)
        traced.tracer.record(request_span())
        traced.tracer.close(DEADLINE_S)
    first, second = (collector.next().payload["resourceSpans"][0] for _ in "12")
    named = [attributes(sent["resource"]) for sent in (first, second)]
    instances = {row.pop("service.instance.id") for row in named}
    assert len(instances) == 2
    assert named == [{"service.name": "embeddings", "service.version": "1.2.3"}] * 2
    scope = {"name": "embellama_server", "version": "1.2.3"}
    assert first["scopeSpans"][0]["scope"] == scope


def test_a_span_joins_its_caller_s_trace(spans_of: Spans) -> None:
    joins = request_span(parent=(TRACE, PARENT, 1))
    spans = spans_of(joins, request_span(parent=None))
    assert {span["traceId"] for span in spans[:4]} == {TRACE}
    assert spans[0]["parentSpanId"] == PARENT
    assert len({span["traceId"] for span in spans}) == 2
    assert (spans[0]["flags"], spans[4]["flags"]) == (0x301, 0x101)


def test_what_the_caller_does_not_sample_is_not_sent(
    start: Start, collector: FakeCollector
) -> None:
    traced = start(collector.url)
    for flags in (0, 2, 0xFE):
        traced.tracer.record(request_span(parent=(TRACE, PARENT, flags)))
    traced.tracer.close(DEADLINE_S)
    assert collector.got.empty()
    assert (traced.tracer.taken, traced.tracer.refused) == (0, 0)
    assert traced.text.getvalue() == ""


@pytest.mark.parametrize(("status", "code"), [(200, 0), (404, 0), (499, 0), (503, 2)])
def test_only_what_is_our_fault_is_an_error(
    spans_of: Spans, status: int, code: int
) -> None:
    span = spans_of(request_span(status=status))[0]
    assert span["status"] == {"code": code}
    assert attributes(span).get("error.type") == (str(status) if code else None)


@pytest.mark.parametrize(
    ("method", "route", "name"),
    [
        ("GET", "/v1/models/{model}", "GET /v1/models/{model}"),
        ("GET", "", "GET"),
        ("BREW", "", "HTTP"),
        ("get", "/ready", "HTTP /ready"),
    ],
)
def test_names_of_spans_are_few_whatever_is_asked(
    spans_of: Spans, method: str, route: str, name: str
) -> None:
    span = request_span(method=method, route=route, path="/x", model=None, tokens=None)
    sent = spans_of(span)[0]
    named = attributes(sent)
    assert sent["name"] == name
    is_known = method == "GET"
    assert named["http.request.method"] == ("GET" if is_known else "_OTHER")
    assert named.get("http.request.method_original") == (None if is_known else method)
    assert named.get("http.route") == (route or None)
    assert not {"embellama.model", "embellama.tokens"} & named.keys()


@pytest.mark.parametrize("path", ["/\udc80", "/\ud800x", "/" + "é" * 9999, "/\0\x7f"])
def test_no_path_makes_a_batch_unreadable(spans_of: Spans, path: str) -> None:
    sent = attributes(spans_of(request_span(path=path))[0])["url.path"]
    assert len(sent.encode("utf-8")) <= 2048
    assert len(sent) == min(1024, len(path))


def test_a_span_does_not_end_before_it_begins(spans_of: Spans) -> None:
    now = time.monotonic()
    for span in spans_of(request_span(parts=(("queue", now, now - 1),))):
        assert int(span["endTimeUnixNano"]) >= int(span["startTimeUnixNano"])


ID_KEYS = ("traceId", "spanId", "parentSpanId")


def test_opentelemetry_s_own_messages_read_every_field(
    start: Start, collector: FakeCollector
) -> None:
    package = "opentelemetry.proto.collector.trace.v1.trace_service_pb2"
    pytest.importorskip("opentelemetry.proto")
    message = importlib.import_module(package).ExportTraceServiceRequest()
    json_format = importlib.import_module("google.protobuf.json_format")
    traced = start(collector.url)
    traced.tracer.record(request_span(parent=(TRACE, PARENT, 1), path="/\udc80é"))
    traced.tracer.record(request_span(status=500, method="BREW"))
    traced.tracer.close(DEADLINE_S)
    sent = collector.next()
    for span in sent.spans:  # hex in OTLP's JSON, base64 in protobuf's
        for key in ID_KEYS:
            if key in span:
                raw = bytes.fromhex(span[key])
                assert len(raw) in ({"traceId": 16}.get(key, 8), 0)
                span[key] = base64.b64encode(raw).decode()
    json_format.Parse(json.dumps(sent.payload), message)  # unknown fields are refused
    spans = message.resource_spans[0].scope_spans[0].spans
    assert len(spans) == 8
    assert spans[0].trace_id.hex() == TRACE
    assert spans[0].parent_span_id.hex() == PARENT
    assert (spans[0].kind, spans[1].kind) == (2, 1)
    assert (spans[0].status.code, spans[4].status.code) == (0, 2)
    assert spans[4].name == "HTTP /v1/embeddings"
    assert spans[1].parent_span_id == spans[0].span_id
    found = {pair.key: pair.value for pair in spans[0].attributes}
    assert found["embellama.tokens"].int_value == 2**40
    assert found["url.path"].string_value == "/?é"
    assert spans[0].end_time_unix_nano > spans[0].start_time_unix_nano > 10**18


# --- where to ---


@pytest.mark.parametrize(
    ("tail", "path"),
    [
        ("", "/v1/traces"),
        ("/", "/v1/traces"),
        ("/v1/traces", "/v1/traces"),
        ("/v1/traces/", "/v1/traces"),
        ("/otlp", "/otlp/v1/traces"),
        ("/otlp/v1/traces", "/otlp/v1/traces"),
        ("?token=x", "/v1/traces?token=x"),
    ],
)
def test_the_path_is_added_unless_it_is_there(
    start: Start, collector: FakeCollector, tail: str, path: str
) -> None:
    traced = start(collector.url + tail)
    traced.tracer.record(request_span())
    traced.tracer.close(DEADLINE_S)
    sent = collector.next()
    assert sent.path == path
    assert sent.headers["content-type"] == "application/json"
    assert sent.headers["host"] == collector.url.removeprefix("http://")
    assert "authorization" not in sent.headers


@pytest.mark.parametrize(
    ("user", "pair"),
    [
        ("me:s3cret", "me:s3cret"),
        ("s3cret", "s3cret:"),
        ("m%40e:s%3A3cret%C3%A9", "m@e:s:3creté"),
        (":s3cret", ":s3cret"),
    ],
)
def test_credentials_in_the_url_are_sent_and_never_logged(
    start: Start, collector: FakeCollector, user: str, pair: str
) -> None:
    collector.plan = [(401, {}, b"")]
    traced = start(collector.url.replace("://", f"://{user}@"))
    traced.tracer.record(request_span())
    traced.tracer.close(DEADLINE_S)
    kind, _, coded = collector.next().headers["authorization"].partition(" ")
    assert (kind, base64.b64decode(coded).decode()) == ("Basic", pair)
    [line] = traced.lines("spans lost")
    assert (line["why"], line["lost"]) == ("status 401", 4)
    assert not any(word in traced.text.getvalue() for word in ("s3cret", coded, "@"))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "collector:4318",
        "ftp://collector",
        "http://",
        "http://:4318",
        "http://me:s3cret@",
        "http://me:s3cret@collector:port",
        "http://me:s3cret@collector:99999",
        "http://me:s3cret@[::1",
        "http://me:s3cret@a..b",
        "http://me:s3cret@collector/\r\nX: y",
        "http://me:s3cret@collector/a b",
        "http://me:s3cret@collector/#part",
        "http://me:s3cret@cöllector",
    ],
)
def test_what_is_no_such_url_is_refused_without_being_repeated(url: str) -> None:
    before = set(threading.enumerate())
    with pytest.raises(es.StartupError, match="otlp_endpoint") as caught:
        es.Tracer(url, "embeddings", "1", es.Log("debug", "json", io.StringIO()))
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    assert not kit.threads_since(before)


def test_proxies_of_the_environment_are_not_used(
    start: Start, collector: FakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    traced = start(collector.url)
    traced.tracer.record(request_span())
    traced.tracer.close(DEADLINE_S)
    assert traced.tracer.sent == 4


def test_https_is_verified(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with collecting(context) as collector:
        stranger = start(collector.url)
        stranger.tracer.record(request_span())
        stranger.tracer.close(DEADLINE_S)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        friend = start(collector.url)
        friend.tracer.record(request_span())
        friend.tracer.close(DEADLINE_S)
    assert (stranger.tracer.sent, friend.tracer.sent) == (0, 4)
    [line] = stranger.lines("spans lost")
    assert "CERTIFICATE_VERIFY_FAILED" in line["why"]


# --- when ---


def test_a_full_batch_is_sent_at_once(start: Start, collector: FakeCollector) -> None:
    traced = start(collector.url)
    fill(traced.tracer, 128)
    assert len(collector.next().spans) == 128


def test_what_is_less_is_sent_after_a_while(
    start: Start, collector: FakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_SEND_INTERVAL_S", 0.001)
    traced = start(collector.url)
    for _ in range(2):
        traced.tracer.record(request_span())
        assert len(collector.next().spans) == 4


def test_close_flushes_and_ends_the_thread(
    start: Start, collector: FakeCollector
) -> None:
    threads = set(threading.enumerate())
    traced = start(collector.url)
    [thread] = {t for t in threading.enumerate() if t.name == "tracer"} - threads
    assert thread.daemon
    fill(traced.tracer, 300)
    traced.tracer.close(DEADLINE_S)
    assert not thread.is_alive()
    assert len(collector.spans()) == traced.tracer.sent == traced.tracer.taken == 300
    assert max(len(sent.spans) for sent in list(collector.got.queue)) <= 128
    traced.tracer.record(request_span())
    traced.tracer.close(DEADLINE_S)
    assert (traced.tracer.refused, traced.tracer.taken) == (4, 300)
    assert traced.text.getvalue() == ""


# --- a collector in trouble ---


@pytest.mark.parametrize(
    "status", [301, 307, 400, 401, 404, 413, 429, 500, 501, 502, 503, 504]
)
def test_what_is_refused_is_neither_repeated_nor_redirected(
    start: Start, collector: FakeCollector, status: int
) -> None:
    headers = {"Location": "/elsewhere", "Retry-After": "0"}
    collector.plan = [(status, headers, b"no")]
    traced = start(collector.url)
    fill(traced.tracer, 128)
    collector.next()
    traced.tracer.close(DEADLINE_S)
    assert collector.got.empty()
    assert (traced.tracer.sent, traced.tracer.failed) == (0, 128)
    [line] = traced.lines("spans lost")
    assert (line["lost"], line["why"]) == (128, f"status {status}")


def test_a_slow_collector_delays_no_record_and_costs_what_is_over_the_bound(
    start: Start, collector: FakeCollector
) -> None:
    collector.gate.clear()
    traced = start(collector.url)
    fill(traced.tracer, 128)
    collector.next()  # it has the first batch and does not answer
    assert not traced.tracer._wake.is_set()  # or the thread would never rest
    fill(traced.tracer, 2048 + 100)  # returns: nobody but us could have let it go on
    assert traced.tracer.refused == 100
    collector.gate.set()
    traced.tracer.close(DEADLINE_S)
    assert traced.tracer.sent == 128 + 2048
    [line] = traced.lines("spans lost")
    assert (line["lost"], line["why"]) == (100, "they came too fast")


def test_a_collector_that_is_down_costs_what_was_sent_meanwhile_and_no_more(
    start: Start,
) -> None:
    with socket.socket() as listener:  # that does not listen yet: nobody gets through
        listener.bind(("127.0.0.1", 0))
        traced = start(f"http://127.0.0.1:{listener.getsockname()[1]}")
        fill(traced.tracer, 128)
        while not traced.tracer.failed:
            traced.tracer._thread.join(0.001)
        listener.listen()
        with collecting(listener=listener) as collector:
            fill(traced.tracer, 128)
            collector.next()
            traced.tracer.close(DEADLINE_S)
    assert (traced.tracer.sent, traced.tracer.failed) == (128, 128)
    [line] = traced.lines("spans lost")
    assert "ConnectionRefusedError" in line["why"]


@contextlib.contextmanager
def babbling(reply: bytes) -> Iterator[str]:
    """A server that answers every connection with ``reply`` and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as peer, contextlib.suppress(OSError):
                        peer.recv(1 << 20)
                        peer.sendall(reply)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"\x00\xff\x80 what?\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"HTTP/1.1 abc def\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 99999 X\r\n\r\n",
    ],
)
def test_a_server_that_speaks_no_http_costs_spans_and_nothing_else(
    start: Start, reply: bytes
) -> None:
    with babbling(reply) as url:
        traced = start(url)
        fill(traced.tracer, 128)
        traced.tracer.close(DEADLINE_S)
    assert (traced.tracer.sent, traced.tracer.failed) == (0, 128)
    [line] = traced.lines("spans lost")
    assert line["lost"] == 128


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b"null",
        b'{"partialSuccess": null}',
        b'{"partialSuccess": {}}',
        b'{"partialSuccess": {"rejectedSpans": "many"}}',
        b'{"partialSuccess": {"rejectedSpans": 1e999}}',
        b'{"partialSuccess": {"rejectedSpans": -3}}',
        b'{"partialSuccess": {"rejectedSpans": "0", "errorMessage": "old client"}}',
        b"[" * 60000,
        b"\xff" * 100,
        b"x" * (1 << 20),
    ],
)
def test_whatever_a_success_says_it_is_one(
    start: Start, collector: FakeCollector, body: bytes
) -> None:
    collector.plan = [(200, {}, body)]
    traced = start(collector.url)
    traced.tracer.record(request_span())
    traced.tracer.close(DEADLINE_S)
    assert (traced.tracer.sent, traced.tracer.failed) == (4, 0)
    assert len(collector.spans()) == 4


@pytest.mark.parametrize(("rejected", "failed"), [('"3"', 3), ("3", 3), ('"99"', 4)])
def test_spans_rejected_of_a_batch_are_counted_and_not_sent_again(
    start: Start, collector: FakeCollector, rejected: str, failed: int
) -> None:
    said = f'{{"rejectedSpans": {rejected}, "errorMessage": "too old"}}'
    collector.plan = [(200, {}, f'{{"partialSuccess": {said}}}'.encode())]
    traced = start(collector.url)
    traced.tracer.record(request_span())
    traced.tracer.close(DEADLINE_S)
    assert len(collector.spans()) == 4
    assert (traced.tracer.sent, traced.tracer.failed) == (4 - failed, failed)
    [line] = traced.lines("spans lost")
    assert (line["lost"], line["why"]) == (failed, "too old")


def test_close_waits_no_longer_than_it_may(
    start: Start, collector: FakeCollector
) -> None:
    collector.gate.clear()
    traced = start(collector.url)
    fill(traced.tracer, 200)
    collector.next()
    begun = time.monotonic()
    traced.tracer.close(0.01)
    assert time.monotonic() - begun < es._COLLECTOR_TIMEOUT_S / 2
    [line] = traced.lines("spans lost")
    assert (line["lost"], line["why"]) == (200, "no time was left")
    collector.gate.set()
    traced.tracer._thread.join(DEADLINE_S)
    assert collector.got.empty()  # the rest was not sent late


def test_losses_are_said_less_and_less_often(
    start: Start, collector: FakeCollector
) -> None:
    collector.plan = [(400, {}, b"")] * 20
    traced = start(collector.url)
    for _ in range(20):
        fill(traced.tracer, 128)
        collector.next()
    traced.tracer.close(DEADLINE_S)
    lost = [line["lost"] for line in traced.lines("spans lost")]
    assert lost == [128, 256, 512, 1024, 2048]
    assert traced.tracer.failed == 20 * 128


def test_a_bug_of_ours_costs_a_batch_and_not_the_thread(
    start: Start, collector: FakeCollector
) -> None:
    traced = start(collector.url)
    fill(traced.tracer, 128, model=object(), begun_at="never")
    while not traced.tracer.failed and traced.tracer._thread.is_alive():
        traced.tracer._thread.join(0.001)
    fill(traced.tracer, 128)
    assert len(collector.next().spans) == 128
    traced.tracer.close(DEADLINE_S)
    assert (traced.tracer.sent, traced.tracer.failed) == (128, 128)
