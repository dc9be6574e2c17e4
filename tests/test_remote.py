"""Room REMOTE: a running server instead of the engine."""

from __future__ import annotations

import base64
import http.client
import http.server
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embellama_server as es
from tests import both, kit
from tests.bulk import LENGTH, Desk, array, jsonl, vector

Answer = tuple[int, dict[str, str], bytes]
TEXTS = [f"text {n}" for n in range(150)]


def good(body: dict[str, Any], *, as_text: bool = True) -> Answer:
    """What a server says; a text with kit.NAN_WORD has an error, if that is allowed."""
    data = list[dict[str, Any]]()
    for index, text in enumerate(body["input"]):
        if kit.NAN_WORD in text:
            data.append(
                {"index": index, "error": {"message": f"input[{index}] is bad"}}
            )
            continue
        row = vector(text)
        shown = base64.b64encode(row.tobytes()).decode() if as_text else row.tolist()
        data.append({"index": index, "embedding": shown})
    told = {"data": data[::-1], "usage": {"prompt_tokens": len(data)}}
    return 200, {}, json.dumps(told).encode()


class Peer:
    """A server that answers as it is told, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.answers: list[Callable[[dict[str, Any]], Answer | None]] = []
        self.lock, self.at_once, self.most_at_once = threading.Lock(), 0, 0
        peer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._reply(
                    200, {}, b'{"data": [{"id": "m", "meta": {"sha256": "f00"}}]}'
                )

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                with peer.lock:
                    peer.asked.append(json.loads(raw))
                    peer.heads.append({k.lower(): v for k, v in self.headers.items()})
                    peer.at_once += 1
                    peer.most_at_once = max(peer.most_at_once, peer.at_once)
                    answer = peer.answers.pop(0) if peer.answers else good
                found = answer(json.loads(raw))
                with peer.lock:
                    peer.at_once -= 1
                if found is None:
                    self.close_connection = True
                else:
                    self._reply(*found)

            def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


class NoWait(threading.Event):
    """Waits for nothing, and keeps for how long it would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.waits.append(timeout)
        return self.is_set()


@pytest.fixture
def embedder(peer: Peer) -> Iterator[es.RemoteEmbedder]:
    made = es.RemoteEmbedder(peer.url, "secret", 4, prompt_name="q", model=None)
    made._is_closed = NoWait()
    yield made
    made._pool.shutdown()
    made.close()


def waits(embedder: es.RemoteEmbedder) -> list[float]:
    """How long it would have waited."""
    event = embedder._is_closed
    assert isinstance(event, NoWait)
    return event.waits


def embedded(embedder: es.RemoteEmbedder, *windows: list[str]) -> list[Any]:
    """What each text of some windows got."""
    found = embedder.replies([window] for window in windows)
    return [row for (reply,) in found for row in reply.rows]


def test_windows_are_sent_in_requests_of_low_priority_and_come_back_in_order(
    peer: Peer, embedder: es.RemoteEmbedder
) -> None:
    found = embedded(embedder, TEXTS, [], TEXTS[:3])
    assert np.array_equal(found, array([*TEXTS, *TEXTS[:3]]))
    assert sorted(len(body["input"]) for body in peer.asked) == [3, 22, 64, 64]
    for body, head in zip(peer.asked, peer.heads, strict=True):
        assert (body["priority"], body["prompt_name"]) == ("low", "q")
        assert "model" not in body, "what is not asked for is not sent"
        assert head["authorization"] == "Bearer secret"


def test_each_request_of_a_window_has_its_rows_and_its_tokens(
    embedder: es.RemoteEmbedder,
) -> None:
    (replies,) = embedder.replies([[TEXTS, [], TEXTS[:3]]])
    for reply, texts in zip(replies, (TEXTS, [], TEXTS[:3]), strict=True):
        assert [row.tolist() for row in reply.rows] == array(texts).tolist()
        assert reply.tokens == len(texts), "the peer counts one for each"


def test_a_server_that_gives_numbers_will_do(
    peer: Peer, embedder: es.RemoteEmbedder
) -> None:
    peer.answers = [lambda body: good(body, as_text=False)]
    assert np.allclose(embedded(embedder, ["a", "b"]), array("ab"))


def test_no_more_requests_are_under_way_than_asked_for(
    peer: Peer, embedder: es.RemoteEmbedder
) -> None:
    together = threading.Barrier(4)

    def all_there(body: dict[str, Any]) -> Answer:
        together.wait(kit.DEADLINE_S)
        return good(body)

    peer.answers = [all_there] * 4
    embedded(embedder, *[[f"{n} {text}" for text in TEXTS] for n in range(4)])
    assert peer.most_at_once == 4


def busy(status: int, **headers: str) -> Callable[[Any], Answer]:
    """A refusal that passes."""
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: (status, told, b'{"error": {"message": "busy"}}')


@pytest.mark.parametrize(
    ("answers", "waited"),
    [
        ([busy(503, retry_after="7")], [7.0]),
        ([busy(429, retry_after="7", retry_after_ms="6500")], [6.5]),
        ([busy(503), busy(503), busy(429)], [1.0, 2.0, 4.0]),
        ([busy(503, retry_after="900")], [60.0]),
        ([busy(503, retry_after="-9")], [1.0]),
        ([busy(503, retry_after="Sun, 06 Nov 1994 08:49:37 GMT")], [1.0]),
        ([lambda _: None], [1.0]),
    ],
    ids=["s", "ms", "unsaid", "too long", "below zero", "date", "lost"],
)
def test_what_passes_is_sent_again_when_the_server_says(
    peer: Peer,
    embedder: es.RemoteEmbedder,
    answers: list[Callable[[Any], Answer | None]],
    waited: list[float],
) -> None:
    peer.answers = [*answers]
    assert np.array_equal(embedded(embedder, ["a", "b"]), array("ab")), "none is double"
    assert waits(embedder) == waited
    assert len(peer.asked) == len(answers) + 1


def test_nobody_waits_for_ever(
    peer: Peer, embedder: es.RemoteEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_PATIENCE_S", 0.0)
    peer.answers = [busy(503)] * 9
    with pytest.raises(es.BulkError, match="503 busy") as told:
        embedded(embedder, ["a"])
    assert told.value.code == 3


def test_a_text_that_fails_takes_none_along(
    peer: Peer, embedder: es.RemoteEmbedder
) -> None:
    def refuse(body: dict[str, Any]) -> Answer:
        if any(kit.NAN_WORD in text for text in body["input"]):
            return 400, {}, b'{"error": {"message": "too long"}}'
        return good(body)

    given = ["a", kit.NAN_WORD, "b"]
    for answers, why in (([], "input[1] is bad"), ([refuse] * 4, "too long")):
        peer.answers = [*answers]
        one, bad, other = embedded(embedder, given)
        assert np.array_equal([one, other], array("ab"))
        assert isinstance(bad, es.InvalidValue) and bad.message == why


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((401, {}, b'{"error": {"message": "no key"}}'), "401 no key"),
        ((404, {}, b"<html>"), "404 <html>"),
        ((200, {}, b"<html>"), "gave no vectors"),
        ((200, {}, b'{"data": [], "usage": {"prompt_tokens": 0}}'), "gave no vectors"),
        ((200, {}, b'{"data": [{"embedding": "x"}]}'), "gave no vectors"),
        ((200, {}, b"[]"), "gave no vectors"),
    ],
    ids=str,
)
def test_what_no_wait_mends_is_a_sentence(
    peer: Peer, embedder: es.RemoteEmbedder, answer: Answer, told: str
) -> None:
    peer.answers = [lambda _: answer]
    with pytest.raises(es.BulkError, match=told) as error:
        embedded(embedder, ["a"])
    assert error.value.code == 3
    assert waits(embedder) == []


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        embedder = es.RemoteEmbedder(url, "", 1)
        with pytest.raises(es.BulkError, match="refused"):
            _ = embedder.identity
        embedder.close()


@pytest.mark.parametrize(
    "url",
    [
        *("127.0.0.1:8080", "ftp://127.0.0.1", "http://", "http://[::1", "http://h:x"),
        *(
            "http://h:65536",
            "http://h:0",
            "http://h/\xe4",
            f"http://{'h' * 64}.example",
        ),
    ],
)
def test_an_address_that_cannot_be_one_is_a_wrong_command(url: str) -> None:
    with pytest.raises(es.BulkError, match="is not like") as told:
        es.RemoteEmbedder(url, "", 1)
    assert told.value.code == 2


@pytest.mark.parametrize(
    "url", ["http://me:canary@h/", "http://canary@[::1", "x://canary@"]
)
def test_a_user_in_an_address_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(es.BulkError, match="say --api-key") as told:
        es.RemoteEmbedder(url, "", 1)
    assert told.value.code == 2
    assert "canary" not in str(told.value)


def answered_by(label: str) -> Callable[[dict[str, Any]], Answer]:
    """Vectors of one model."""

    def answer(body: dict[str, Any]) -> Answer:
        status, _, data = good(body)
        return status, {"x-embellama-model": label}, data

    return answer


def test_another_model_that_answers_from_now_on_ends_the_run(
    peer: Peer, embedder: es.RemoteEmbedder
) -> None:
    peer.answers = [answered_by("m@1"), answered_by("m@1"), answered_by("m@2")]
    assert len(embedded(embedder, ["a"], ["b"])) == 2
    said = (
        "m@2 answers now, and before it was m@1: --model-name m --model-version 1 asks"
    )
    with pytest.raises(es.BulkError, match=said) as why:
        embedded(embedder, ["c"])
    assert why.value.code == 3
    assert waits(embedder) == [], "no wait mends it"


def test_closing_waits_for_no_answer(peer: Peer) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def silent(_: dict[str, Any]) -> None:
        asked.set()
        kit.wait(go_on)

    peer.answers = [silent]
    made = es.RemoteEmbedder(peer.url, "", 1)
    before = set(threading.enumerate())
    (reply,) = made._send(["a"])
    kit.wait(asked)
    made.close()
    assert isinstance(reply.exception(kit.DEADLINE_S), es.BulkError)
    made._pool.shutdown(wait=True)
    assert "remote_0" not in kit.threads_since(before)
    go_on.set()


def test_closing_ends_who_is_about_to_connect(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = es.RemoteEmbedder(peer.url, "", 1)
    begun, go_on = threading.Event(), threading.Event()
    really = http.client.HTTPConnection.connect

    def connect(connection: http.client.HTTPConnection) -> None:
        begun.set()
        kit.wait(go_on)
        really(connection)

    monkeypatch.setattr(http.client.HTTPConnection, "connect", connect)
    (reply,) = made._send(["a"])
    kit.wait(begun)
    made.close()
    go_on.set()
    assert isinstance(reply.exception(kit.DEADLINE_S), es.BulkError)
    assert peer.asked == []


def test_a_run_is_bound_to_the_version_that_it_asks_for(tmp_path: Path) -> None:
    flags, sums = list[str](), list[str]()
    for version in (1, 2):
        place = tmp_path / f"{version}.gguf"
        place.write_bytes(both.sound_gguf() + bytes(version))
        sums.append(es.sha256_of(place))
        flags += ["--model-path", f"m@{version}={place}"]
    with kit.started(*flags) as server:

        def bound(**body: object) -> object:
            made = es.RemoteEmbedder(server.url, "", 1, **body)
            try:
                return made.identity["sha256"]
            finally:
                made.close()

        assert [bound(model=f"m@{n}") for n in (1, 2)] == sums
        assert bound(model="m") == sums[1], "the newest"


@pytest.mark.parametrize("patience_s", [0.0, 600.0])
@pytest.mark.parametrize("status", [0, 503])
def test_what_a_server_serves_is_asked_again_until_it_says_so(
    peer: Peer,
    embedder: es.RemoteEmbedder,
    monkeypatch: pytest.MonkeyPatch,
    patience_s: float,
    status: int,
) -> None:
    kind: Any = peer.server.RequestHandlerClass
    well = kind.do_GET

    def badly(handler: Any) -> None:
        kind.do_GET = well
        handler.close_connection = True
        if status:
            handler._reply(status, {}, b'{"error": {"message": "busy"}}')

    monkeypatch.setattr(kind, "do_GET", badly)
    monkeypatch.setattr(es, "_PATIENCE_S", patience_s)
    if patience_s:
        assert embedder.identity["sha256"] == "f00"
        return
    with pytest.raises(es.BulkError, match="busy|closed connection") as told:
        _ = embedder.identity
    assert told.value.code == 3


def test_a_job_goes_on_only_with_the_same_model_on_the_server(
    peer: Peer, embedder: es.RemoteEmbedder, tmp_path: Path
) -> None:
    desk = Desk(tmp_path)
    file = desk.put("a.jsonl", jsonl([*TEXTS, kit.NAN_WORD]))
    job = es.Bulk(
        es.BulkOptions([file], str(tmp_path / "v.npy"), es.CorpusOptions()),
        embedder,
        lambda _: None,
    )
    with pytest.raises(es.BulkError, match="its text is bad"):
        job.run()
    assert embedder.identity["sha256"] == "f00"
    assert embedder.identity["dimensions"] == LENGTH


def test_a_server_of_ours_gives_what_its_route_gives(tmp_path: Path) -> None:
    texts = [*(f"words {n}" for n in range(200)), "word " * 99, kit.NAN_WORD]
    desk = Desk(tmp_path)
    file = desk.put("a.txt", "\n".join(texts))
    flags = (
        "--model-path",
        f"m={kit.fake_gguf(tmp_path)}",
        "--api-key",
        "key-of-the-test",
    )
    with kit.started(*flags, "--batch-tokens", "64") as server:
        given = [
            "embed",
            file,
            "--output",
            str(tmp_path / "v.npy"),
            "--url",
            server.url,
        ]
        assert (
            es.main([*given, "--api-key", "key-of-the-test", "--on-error", "null"]) == 1
        )
        assert es.main([*given, "--restart"]) == 3, "the key is wrong"
    found = np.load(tmp_path / "v.npy")
    ids = [[1, *map(kit.fake_id, text.split()), 2] for text in texts[:200]]
    assert np.allclose(found[:200], [kit.fake_vector(row) for row in ids], atol=1e-6)
    assert np.isnan(found[200:]).all()
