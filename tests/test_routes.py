"""Rooms ROUTES and DISPATCH: what holds on every route, in every dialect.

Each claim is made of the rows of ``ROUTES``, so that a route that is added is claimed too.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import hmac
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import embellama_server as es
from tests import kit
from tests.kit import RunningService

FORMS = [route for route in es.ROUTES if route.form]
READS = [route for route in es.ROUTES if route.method == "GET"]
WORK = [route for route in FORMS if route.takes_work]
CACHED = {"/v1/models", "/models", "/openapi.json", "/docs"}
NEVER_KEPT = {"/health", "/ping", "/ready", "/metrics", "/v1/metrics", "/status"}
NEVER_KEPT |= {"/props", "/slots"}
# Those whose answer does not come from the engine's contexts.
LOADS_NOTHING = {"/api/show", "/api/pull"}
COMPUTES_NOTHING = {"/tokenize", "/decode", "/api/show", "/api/pull"}
COMPUTES_NOTHING |= {"/detokenize", "/apply-template"}
COMPUTING = [route for route in WORK if route.path not in COMPUTES_NOTHING]
KEY = "key-of-somebody-0123456789"
URL = "/v1/embeddings"


@contextlib.asynccontextmanager
async def service(
    engine: kit.FakeEngine | None = None, *, has_bug: bool = False, **changes: Any
) -> AsyncIterator[RunningService]:
    """A running service where every route can answer 200."""
    async with kit.running_service(engine, **kit.all_routes() | changes) as running:
        yield running
    assert (" bug " in running.log.getvalue()) == has_bug


def each(routes: Iterable[es.Route]) -> pytest.MarkDecorator:
    """A parameter: these routes."""
    return pytest.mark.parametrize(
        "route", routes, ids=lambda route: f"{route.method} {route.path}"
    )


def key_file(folder: Path) -> str:
    """A file with one key, an administrator's."""
    path = folder / "keys"
    path.write_text(f"somebody {KEY} admin\n", encoding="ascii")
    path.chmod(0o600)
    return str(path)


def compressed(body: object) -> bytes:
    """JSON in gzip."""
    return gzip.compress(json.dumps(body).encode())


async def post(
    running: RunningService, path: str, raw: bytes, coding: str = "gzip", **fields: str
) -> kit.Reply:
    """A body that says how it is compressed."""
    fields = {"content_type": "application/json", "content_encoding": coding} | fields
    return await running.ask("POST", path, raw, **fields)


def without_time(reply: kit.Reply) -> Any:
    """An answer's text, or its JSON less what is never the same twice."""
    if reply.headers["content-type"].startswith("text/plain"):
        return reply.body
    found = reply.json
    if isinstance(found, dict):
        for name in ("timings", "total_duration", "load_duration", "idle_s", "id"):
            found.pop(name, None)
        for name in ("created", "performance", "created_at", "completed_at"):
            found.pop(name, None)
        for name in ("prompt_eval_duration", "eval_duration"):
            found.pop(name, None)
        for item in found.get("output", ()):
            del item["id"]
    return found


# --- compressed requests ---


@each(FORMS)
async def test_a_compressed_body_is_answered_like_a_plain_one(
    route: es.Route,
) -> None:
    async with service() as running:
        plain = await running.ask_route(route)
        assert plain.status == 200
        for coding in ("gzip", "x-gzip", "GZIP", "identity, gzip"):
            raw = compressed(kit.body_of(route))
            reply = await post(running, route.path, raw, coding)
            assert reply.status == 200, reply.body
            assert without_time(reply) == without_time(plain)


@each(FORMS)
async def test_a_body_in_another_coding_is_415_and_says_what_is_known(
    route: es.Route,
) -> None:
    async with service() as running:
        for coding in ("br", "deflate", "compress", "gzip, gzip", "gzip;q=1", "*"):
            raw = compressed(kit.body_of(route))
            reply = await post(running, route.path, raw, coding)
            assert reply.status == 415, coding
            assert "gzip" in reply.headers["accept-encoding"].split(", ")
            assert coding.split(",")[0] in reply.error_in(route.dialect)


@each(FORMS)
async def test_a_body_that_is_not_compressed_as_it_says_is_400(route: es.Route) -> None:
    raw = compressed(kit.body_of(route))
    bad = {
        "not at all": json.dumps(kit.body_of(route)).encode(),
        "cut short": raw[:-1],
        "with something behind": raw + b"{}",
        "empty": b"",
        "altered": raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:],
        "not JSON": gzip.compress(b"{"),
    }

    async with service() as running:
        for how, body in bad.items():
            reply = await post(running, route.path, body)
            assert reply.status == 400, how
            assert reply.error_in(route.dialect)
        assert (await running.ask_route(route)).status == 200


@each(FORMS)
async def test_a_body_that_decompresses_to_too_much_is_413_and_harms_nobody(
    route: es.Route,
) -> None:
    compressed = gzip.compress(b" " * 5000)

    async with service(max_body_bytes=4096) as running:
        replies = await asyncio.gather(
            *(post(running, route.path, compressed) for _ in range(5))
        )
        for reply in replies:
            assert reply.status == 413
            sentence = reply.error_in(route.dialect)
            assert "4096 bytes" in sentence
            assert "--max-body-bytes" in sentence
        assert (await running.ask_route(route)).status == 200


async def test_the_limit_of_a_compressed_body_is_exact() -> None:
    async with service(max_body_bytes=1024) as running:
        for size, status in ((1024, 200), (1025, 413)):
            body = b'{"input": "a"}'.ljust(size)
            reply = await post(running, URL, gzip.compress(body))
            assert reply.status == status


def authorization(signed: bytes, path: str = URL) -> str:
    """The signature of a POST whose body is ``signed``."""
    stamp = f"{time.time():.6f}"
    digest = hashlib.sha256(signed).hexdigest()
    secret = hashlib.sha256(KEY.encode()).digest()
    message = f"POST\n{path}\n{stamp}\n{digest}".encode()
    mac = hmac.new(secret, message, hashlib.sha256).hexdigest()
    return f"Signature somebody {stamp} {digest} {mac}"


async def test_a_signature_is_over_the_bytes_that_were_sent(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"max_body_bytes": 4096}
    keys = key_file(tmp_path)
    async with service(
        api_key_file=keys, signed_requests="require", **limits
    ) as running:
        body = json.dumps({"input": "a b"}).encode()
        raw = gzip.compress(body)
        for signed, status in ((raw, 200), (body, 401)):
            reply = await post(running, URL, raw, authorization=authorization(signed))
            assert reply.status == status
        plain = await running.ask(
            "POST",
            URL,
            body,
            authorization=authorization(body),
            content_type="application/json",
        )
        assert plain.status == 200
        # Nothing is decompressed for a client that has not signed it.
        large = gzip.compress(b" " * 5000)
        reply = await post(running, URL, large, authorization=authorization(body))
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")


# --- what a client accepts, and what it has already ---


@each(es.ROUTES)
async def test_an_accept_that_leaves_out_all_we_have_is_answered_all_the_same(
    route: es.Route,
) -> None:
    async with service() as running:
        usual = (await running.ask_route(route)).headers["content-type"]
        none = f"{route.offers[0]};q=0, image/*"
        for accept in ("image/png", "text/event-stream", "*/*;q=0", none):
            reply = await running.ask_route(route, accept=accept)
            assert (reply.status, reply.headers["content-type"]) == (200, usual)


@each(es.ROUTES)
async def test_an_accept_that_takes_what_we_have_is_answered_with_it(
    route: es.Route,
) -> None:
    family = route.offers[0].partition("/")[0]
    browser = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"

    async with service() as running:
        usual = (await running.ask_route(route)).headers["content-type"]
        assert usual.startswith(route.offers[0])
        for accept in ("*/*", f"{family}/*", route.offers[0].upper(), browser, "?"):
            reply = await running.ask_route(route, accept=accept)
            assert reply.status == 200
            shown = (
                "text/html"
                if accept == browser and "text/html" in route.offers
                else usual
            )
            assert reply.headers["content-type"].startswith(shown)


@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
async def test_who_prefers_text_reads_text(path: str) -> None:
    async with service() as running:
        for accept in ("text/plain", "text/*", "application/json;q=0.5, text/plain"):
            reply = await running.ask("GET", path, accept=accept)
            assert (reply.status, reply.headers["vary"]) == (200, "accept")
            assert reply.headers["content-type"] == "text/plain; charset=utf-8"
            with pytest.raises(ValueError):
                json.loads(reply.body)
        for accept in ("application/json", "*/*", "text/html, */*"):
            reply = await running.ask("GET", path, accept=accept)
            assert reply.headers["content-type"] == "application/json"
            assert reply.headers["vary"] == "accept"
            assert reply.json


KINDS = {  # whether browsers' word is taken, and that of others
    "application/json": (True, True),
    "Application/JSON; charset=UTF-8": (True, True),
    "application/json, application/json": (True, True),
    "application/vnd.api+json": (True, True),  # after a preflight, as all that are none
    "": (False, True),  # of the three that need none
    "text/plain": (False, True),
    "text/plain;charset=UTF-8": (False, True),
    "application/x-www-form-urlencoded": (False, True),
    "application/octet-stream": (False, True),
    "*/*": (False, True),
    "text/plain; charset=iso-8859-1": (False, False),
    "application/json; charset=latin1": (False, False),
    "multipart/form-data; boundary=x": (False, False),
    "application/xml": (False, False),
    "json": (False, False),
}
ASKING = {  # who asks, and whether that may be a browser
    "curl": ({}, False),
    "Node's fetch": ({"sec_fetch_mode": "cors"}, False),
    "a page": ({"origin": "http://localhost:3000"}, True),
    "our own page": ({"sec_fetch_site": "same-origin"}, True),
}


@each(FORMS)
async def test_who_is_no_browser_need_not_say_that_a_body_is_json(
    route: es.Route,
) -> None:
    raw = json.dumps(kit.body_of(route)).encode()

    async with service(cors_origin=("http://localhost:3000",)) as running:
        for fields, is_browser in ASKING.values():
            for kind, is_taken in KINDS.items():
                sent = fields | {"content_type": kind}
                reply = await running.ask("POST", route.path, raw, **sent)
                wanted = 200 if is_taken[0 if is_browser else 1] else 415
                assert reply.status == wanted, (sent, reply.body)
                if wanted == 415:
                    sentence = reply.error_in(route.dialect)
                    assert "Content-Type: application/json" in sentence
        bare = f"POST {route.path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n"
        bare += f"{running.admin_lines()}content-length: {len(raw)}\r\n\r\n"
        reply = kit.parse_reply(await running.exchange(bare.encode() + raw))
        assert reply.status == 200


@each(FORMS)
async def test_no_page_of_another_site_can_send_a_body_anywhere(
    route: es.Route,
) -> None:
    raw = json.dumps(kit.body_of(route)).encode()
    sites = [{"origin": "https://evil.example"}, {"sec_fetch_site": "cross-site"}]
    sites += [{"origin": "null"}, {"origin": "https://evil.example", "accept": "*/*"}]

    async with service() as running:
        for fields in sites:
            for kind in (*KINDS, "application/json"):
                sent = fields | {"content_type": kind}
                reply = await running.ask("POST", route.path, raw, **sent)
                assert reply.status == 403
                assert "--cors-origin" in reply.error_in(route.dialect)
        assert not running.engine.calls


def test_only_what_seldom_changes_is_kept_and_only_after_asking() -> None:
    told = {route.path: route.caching for route in es.ROUTES if route.caching}
    assert told == dict.fromkeys(CACHED, "no-cache") | dict.fromkeys(
        NEVER_KEPT, "no-store"
    )


@each(READS)
async def test_what_a_client_has_already_is_not_sent_again(route: es.Route) -> None:
    async with service() as running:
        first = await running.ask_route(route)
        assert first.headers.get("cache-control", "") == route.caching
        if route.path not in CACHED:
            assert "etag" not in first.headers
            again = await running.ask_route(route, if_none_match="*")
            assert again.status == 200
            return
        etag = first.headers["etag"]
        for said in (etag, etag.removeprefix("W/"), f'"x", {etag}', "*"):
            for method in ("GET", "HEAD"):
                path = kit.path_of(route)
                again = await running.ask(method, path, if_none_match=said)
                assert (again.status, again.body) == (304, b"")
                for name in ("etag", "cache-control"):
                    assert again.headers[name] == first.headers[name]
                assert not {"content-length", "content-type"} & set(again.headers)
        for said in ('"x"', 'W/"x"', etag[:-2] + '"', ""):
            again = await running.ask_route(route, if_none_match=said)
            assert (again.status, again.body) == (200, first.body)


async def test_a_304_does_not_end_the_connection_or_hold_up_the_next_answer() -> None:
    async with service() as running:
        etag = (await running.ask("GET", "/docs")).headers["etag"]
        head = b"GET /docs HTTP/1.1\r\nhost: h\r\n"
        first = head + b"if-none-match: " + etag.encode() + b"\r\n\r\n"
        last = b"GET /health HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
        raw = await running.exchange(first + first + last)
        replies = kit.parse_replies(raw, ["GET"] * 3)
        assert [reply.status for reply in replies] == [304, 304, 200]


async def test_a_page_has_one_etag_compressed_or_not() -> None:
    async with service(gzip="all") as running:
        plain = await running.ask("GET", "/openapi.json")
        zipped = await running.ask("GET", "/openapi.json", accept_encoding="gzip")
        assert zipped.headers["content-encoding"] == "gzip"
        assert gzip.decompress(zipped.body) == plain.body
        assert zipped.headers["etag"] == plain.headers["etag"]
        assert plain.headers["etag"].startswith("W/")
        asked = {"if_none_match": plain.headers["etag"], "accept_encoding": "gzip"}
        assert (await running.ask("GET", "/openapi.json", **asked)).status == 304


async def test_the_tag_of_the_models_is_another_once_one_is_unloaded() -> None:
    async with service() as running:
        before = (await running.ask("GET", "/v1/models")).headers["etag"]
        gone = await running.ask("POST", "/admin/models/unload", {"model": kit.RANKER})
        assert gone.json["state"] == "unloaded"
        reply = await running.ask("GET", "/v1/models", if_none_match=before)
        assert reply.status == 200
        assert reply.headers["etag"] != before


# --- paths as clients join them ---


@each(es.ROUTES)
async def test_more_slashes_and_the_prefix_are_answered_as_none(
    route: es.Route,
) -> None:
    async with service(root_path="/front/of/it/") as running:
        path, body = kit.path_of(route), kit.body_of(route)
        plain = await running.ask(route.method, path, body)
        assert plain.status == 200
        for spelled in kit.spellings(path, "/front/of/it"):
            reply = await running.ask(route.method, spelled, body)
            assert reply.status == 200, (spelled, reply.body)
            if path not in COUNTING:
                assert said_by(reply) == said_by(plain), spelled


# What was asked, or for how long something has been as it is.
COUNTING = {"/metrics", "/v1/metrics", "/status", "/admin/models", "/admin/workers"}


def said_by(reply: kit.Reply) -> Any:
    """What is the same whenever it is asked for."""
    is_json = reply.headers["content-type"] == "application/json"
    return without_time(reply) if is_json else reply.body


@given(
    st.sampled_from(es.ROUTES),
    st.lists(st.integers(1, 3), min_size=6, max_size=6),
    st.sampled_from(["", "/v1", "/embed", "/a/b"]),
)
def test_any_slashes_lead_to_the_same_route(
    route: es.Route, slashes: list[int], root_path: str
) -> None:
    plain = kit.path_of(route)
    for path in {plain, root_path + plain}:
        *begins, last = slashes
        pairs = zip(begins, path.split("/")[1:], strict=False)
        spelled = "".join("/" * n + one for n, one in pairs) + "/" * (last - 1)
        found = es.matching_routes(es.local_path(spelled, root_path))
        whole = path.rstrip("/").replace("/fake", "/{id}") or "/"
        # A route is before the prefix.
        assert {r.path for r in found} == {whole if whole in PATHS else route.path}


PATHS = {route.path for route in es.ROUTES}


def test_a_proxy_may_forbid_a_path_by_name_in_any_but_its_slashes() -> None:
    for spelled in ("/ADMIN/models", "/admin%2Fmodels", "/v1/../admin/models", "/."):
        with pytest.raises(es.UnknownPath):
            es.find_route(es.local_path(spelled, ""), "GET")


INSTEAD = {
    "/v1": "it is the beginning of /v1/",
    "/v1/": "/v1/embeddings, ",
    "/api": "/api/embed, ",
    "/admin": "/admin/models, ",
    "/v1/v1/embeddings": "it is /v1/embeddings: the client's base URL has /v1 twice",
    "/api/api/embed": "the client's base URL has /api twice",
    "/v1/v1/models/org/name": "it is /v1/models/org/name: the client's base URL has",
    "/api/v1/embeddings": "it is /v1/embeddings, without /api;",
    "/openai/v1/models": "it is /v1/models, without /openai;",
    "/x/y/embed": "it is /embed, without /x/y;",
    "/v1/similarity": "it is /similarity, without /v1;",
    "/V1/embeddings": "it is /v1/embeddings: capitals matter",
    "/V1/V1/Embeddings": "it is /v1/embeddings: the client's base URL has /v1 twice",
    "/v1/embedding": "it may be /v1/embeddings",
    "/v1/chat": "it is the beginning of /v1/chat/completions",
    "/v1/completion": "it may be /v1/completions",
    "/v1/moderations": "GET / lists what there is",
    "/favicon.ico": "GET / lists what there is",
    "/x" * 4000: "GET / lists what there is",
}


@pytest.mark.parametrize("path", INSTEAD, ids=lambda path: path[:24])
def test_an_unknown_path_is_404_and_names_what_may_be_meant(path: str) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        with pytest.raises(es.UnknownPath) as caught:
            es.find_route(es.local_path(path, ""), method)
        assert INSTEAD[path] in caught.value.message
        assert len(caught.value.message) < 600


async def test_what_is_unknown_under_api_is_told_as_ollama_tells_it() -> None:
    async with service() as running:
        for path in ("/api", "/api/", "//api/chats", "/api/v1/embeddings"):
            for method in ("GET", "POST", "OPTIONS"):
                reply = await running.ask(method, path, {})
                assert reply.status == 404
                assert "there is no /api" in reply.error_in(es.OLLAMA)
        reply = await running.ask("GET", "/apis")
        assert (reply.status, reply.error["code"]) == (404, "unknown_url")


async def test_the_description_says_where_the_paths_begin() -> None:
    async with service(root_path="/a/b/") as running:
        for path in ("/openapi.json", "/a/b/openapi.json"):
            found = (await running.ask("GET", path)).json
            assert found["servers"] == [{"url": "/a/b"}]
    assert json.loads(es.openapi_text())["servers"] == [{"url": "/"}]


# --- HEAD and OPTIONS ---


@each(READS)
async def test_head_is_get_without_the_body(route: es.Route) -> None:
    async with service() as running:
        path = kit.path_of(route)
        await running.ask("GET", path)
        full = await running.ask("GET", path)
        head = await running.ask("HEAD", path)
        assert (head.status, head.body) == (200, b"")
        changing = {"date", "x-request-id", "openai-processing-ms"}
        if path in COUNTING | {"/api/ps"}:  # they count, or tell a time
            changing |= {"content-length"}
        told = [
            {
                name: value
                for name, value in reply.headers.items()
                if name not in changing
            }
            for reply in (full, head)
        ]
        assert told[0] == told[1]
        assert set(head.headers) == set(full.headers)


async def test_head_is_405_where_there_is_no_get() -> None:
    async with service() as running:
        reads = {route.path for route in READS}
        for path in {route.path for route in es.ROUTES} - reads:
            reply = await running.ask("HEAD", path)
            assert (reply.status, reply.body) == (405, b"")
            assert "HEAD" not in reply.headers["allow"]


@each(es.ROUTES)
async def test_options_lists_just_the_methods_that_are_answered(
    route: es.Route,
) -> None:
    methods = {r.method for r in es.ROUTES if r.path == route.path} | {"OPTIONS"}
    methods |= {"HEAD"} if "GET" in methods else set()

    async with service() as running:
        path = kit.path_of(route)
        reply = await running.ask("OPTIONS", path)
        assert (reply.status, reply.body) == (204, b"")
        assert set(reply.headers["allow"].split(", ")) == methods
        for method in {"GET", "HEAD", "POST", "PUT", "DELETE"} - methods:
            reply = await running.ask(method, path)
            assert reply.status == 405
            assert set(reply.headers["allow"].split(", ")) == methods
            dialects = {r.dialect for r in es.ROUTES if r.path == route.path}
            if method != "HEAD" and len(dialects) == 1:
                assert reply.error_in(route.dialect)


# --- errors, each in the dialect of its route ---


@each(FORMS)
async def test_what_is_wrong_with_a_body_is_said_in_the_route_s_dialect(
    route: es.Route,
) -> None:
    invalid = route.dialect.status_of(es.InvalidValue)
    body = kit.body_of(route)
    assert body is not None
    cases: list[tuple[bytes | dict[str, Any], int, str]] = [
        (b"{", 400, "not JSON"),
        (b"", 400, "not JSON"),
        (b"[]", 400, "object"),
        (b'"\xff"', 400, "UTF-8"),
        (body | {"model": 5}, invalid, "model must be a string"),
    ]
    if route.path == "/admin/drain":  # which is of no model
        cases[-1] = ({"off": 5}, invalid, "off must be true or false")
    elif route.dialect not in (es.TEI, es.SEED):  # where any name will do
        cases.append((body | {"model": "gpt-9"}, 404, "model 'gpt-9' not found"))
    loads = [f"/api/{name}" for name in ("embed", "embeddings", "chat", "generate")]
    if route.path not in (*loads, "/admin/drain"):  # of which {} asks something
        cases.append(({}, invalid, "missing|give either"))

    async with service() as running:
        for sent, status, part in cases:
            reply = await running.ask("POST", route.path, sent)
            assert reply.status == status, (sent, reply.body)
            assert re.search(part, reply.error_in(route.dialect))
        assert (await running.ask_route(route)).status == 200


@each(FORMS)
async def test_a_body_above_the_limit_is_413_in_the_route_s_dialect(
    route: es.Route,
) -> None:
    async with service(max_body_bytes=1024) as running:
        path = kit.path_of(route)
        kind = "application/json"
        reply = await running.ask("POST", path, b" " * 1025, content_type=kind)
        assert reply.status == 413
        assert "1024" in reply.error_in(route.dialect)


@each(FORMS)
async def test_a_body_that_grows_above_the_limit_is_413_in_that_dialect(
    route: es.Route,
) -> None:
    async with service(max_body_bytes=1024) as running:
        lines = [f"POST {route.path} HTTP/1.1", "host: h"]
        lines += ["content-type: application/json"]
        lines += running.admin_lines().splitlines()
        lines += ["transfer-encoding: chunked", "", "401", " " * 1025, "0", "", ""]
        reply = kit.parse_reply(await running.exchange("\r\n".join(lines).encode()))
        assert reply.status == 413
        assert "1024" in reply.error_in(route.dialect)


async def test_who_has_no_key_is_told_so_in_the_route_s_dialect(tmp_path: Path) -> None:
    async with service(
        api_key_file=key_file(tmp_path), open_route=("none",)
    ) as running:
        for route in es.ROUTES:
            for fields in ({}, {"authorization": "Bearer wrong-key-0123456789"}):
                reply = await running.ask_route(route, **fields)
                assert reply.status == 401, route.path
                assert "www-authenticate" in reply.headers
                assert reply.error_in(route.dialect)
            reply = await running.ask_route(route, authorization=f"Bearer {KEY}")
            assert reply.status == 200, route.path


async def test_who_asks_too_often_is_told_so_in_the_route_s_dialect() -> None:
    async with service(rate_limit=0.001, rate_burst=1) as running:
        await running.ask("GET", "/v1/models")
        for route in es.ROUTES:
            reply = await running.ask_route(route)
            if route.access != "key":
                assert reply.status == 200
                continue
            assert reply.status == 429, route.path
            assert "retry-after" in reply.headers
            assert reply.headers["x-should-retry"] == "true"
            assert reply.error_in(route.dialect)


async def test_while_the_model_loads_work_is_refused_in_the_route_s_dialect() -> None:
    gate = threading.Event()

    async with service(before_load=lambda: kit.wait(gate), wait_ready=False) as running:
        for route in es.ROUTES:
            reply = await running.ask_route(route)
            waits = route.takes_work or route.path in (
                *("/v1/models", "/models", "/v1/models/{id}", "/models/{id}"),
                *("/info", "/ready"),
                *("/api/tags", "/api/ps", "/admin/cache", "/props", "/slots"),
                *("/admin/models/load", "/admin/models/unload"),
            )
            if route.path == "/admin/reload":
                assert reply.status == 409
            else:
                assert reply.status == (503 if waits else 200), route.path
            if reply.status == 503:
                assert reply.headers["retry-after"] == "1"
                assert "loading" in reply.error_in(route.dialect)
        gate.set()
        await running.log.settled.wait()


async def test_a_full_queue_is_told_in_the_route_s_dialect() -> None:
    engine, ranker = kit.FakeEngine(), kit.all_routes()["beside"][kit.RANKER]

    async def filled(running: RunningService, path: str) -> asyncio.Task[kit.Reply]:
        blocked = ranker if kit.ranks(path) else engine
        blocked.block()
        ask = running.ask("POST", path, kit.BODIES[path])
        task = asyncio.create_task(ask)
        await asyncio.to_thread(blocked.wait_until_computing)
        return task

    changes: dict[str, Any] = {"queue_size": 1, "cache_mb": 0}
    async with service(engine, beside={kit.RANKER: ranker}, **changes) as running:
        tasks = [await filled(running, URL)]
        # One model is full, and so the body must come before it is known.
        for route in COMPUTING:
            if kit.model_of(route.path) != "fake":
                continue
            refused = await running.ask_route(route)
            assert refused.status == route.dialect.status_of(es.Overloaded), route.path
            assert refused.error_in(route.dialect)
        assert (await running.ask("POST", "/tokenize", {"inputs": "a"})).status == 200
        tasks.append(await filled(running, "/v1/rerank"))
        # All are: the head says enough.
        for route in WORK:
            refused = await running.ask_route(route)
            assert refused.status == route.dialect.status_of(es.Overloaded), route.path
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert refused.headers["x-should-retry"] == "true"
            assert refused.error_in(route.dialect)
        for one in (engine, ranker):
            one.release()
        assert [(await task).status for task in tasks] == [200, 200]


def test_the_statuses_of_a_full_queue_are_the_peers() -> None:
    told = {d.name: d.status_of(es.Overloaded) for d in (r.dialect for r in es.ROUTES)}
    generating = {"Chat": 503, "Infer": 503, "LMServ": 503}
    assert told == {"OpenAI": 503, "TEI": 429, "Seed": 429, "Ollama": 503} | generating


@each(WORK)
async def test_a_bug_is_told_in_the_route_s_dialect(
    route: es.Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("secret detail")

    async with service(has_bug=True) as running:
        monkeypatch.setattr(es.ModelNames, "find", broken)
        reply = await running.ask_route(route)
        assert reply.status == 500
        assert "secret" not in reply.error_in(route.dialect)
        assert "secret detail" in running.log.getvalue()


FAILURES: dict[str, tuple[str, type[es.ApiError]]] = {
    "nan": ("finite", es.NonFiniteVector),
    "boom": ("failed again when tried alone", es.EngineFailed),
    " ".join(["word"] * 40): ("42", es.ContextLengthExceeded),
}


@pytest.mark.parametrize("text", FAILURES)
@each([r for r in COMPUTING if kit.model_of(r.path) == "fake"])
async def test_what_fails_in_the_engine_is_told_in_the_route_s_dialect(
    route: es.Route, text: str
) -> None:
    part, error = FAILURES[text]
    raw = json.dumps(kit.body_of(route)).replace("a b", text).encode()
    kind = {"content_type": "application/json"}

    async with service() as running:
        reply = await running.ask("POST", route.path, raw, **kind)
        cuts = route.dialect is es.OLLAMA or route.form is es.CohereEmbedForm
        if cuts and error is es.ContextLengthExceeded:  # unless told not to
            assert reply.status == 200
            return
        assert reply.status == route.dialect.status_of(error)
        assert part in reply.error_in(route.dialect)


async def test_a_model_of_the_other_kind_is_told_in_the_route_s_dialect() -> None:
    async with service() as running:
        for route in COMPUTING:
            for other in {"fake", kit.RANKER, kit.CHATTER} - {kit.model_of(route.path)}:
                body = (kit.body_of(route) or {}) | {"model": other}
                reply = await running.ask("POST", route.path, body)
                assert reply.status == route.dialect.status_of(es.WrongKindOfModel)
                assert other in reply.error_in(route.dialect)


async def test_a_request_of_no_route_is_told_in_openai_s_dialect() -> None:
    async with service() as running:
        assert (await running.ask("GET", "/nope")).error["code"] == "unknown_url"
        raw = await running.exchange(b"GET / HTTP/1.1\r\nhost h\r\n\r\n")
        assert kit.parse_reply(raw).error["code"] == "malformed_request"


# --- what is said back is short ---

# Fields that hold texts: they are given back only where a request says so.
TEXTS = {
    "system_prompt",
    "input",
    "inputs",
    "ids",
    "texts",
    "documents",
    "query",
    "prompt",
}
LONG = "x" * 50_000


@each(FORMS)
async def test_no_name_is_so_long_that_a_reply_an_error_or_a_log_line_is(
    route: es.Route,
) -> None:
    assert route.form is not None
    properties = es.schema_of(route.form)["properties"]
    plain = kit.body_of(route) or {}

    async with service(any_model=True) as running:
        for field in properties.keys() - TEXTS:
            for long in (LONG, "\U0001f600" * 512, "9" * 50_000):
                reply = await running.ask("POST", route.path, plain | {field: long})
                assert len(reply.body) < 10_000, field
                assert sum(map(len, reply.headers.values())) < 10_000, field
                # A grammar is long by nature, and bounded where it is read.
                is_bounded = (
                    "maxLength" in str(properties[field]) and field != "grammar"
                )
                if is_bounded and len(long) > 4096:
                    assert field in reply.error_in(route.dialect)
        assert max(map(len, running.log.getvalue().splitlines())) < 10_000


# --- what the tokenizer does between texts ---


class Slow(kit.FakeEngine):
    """Its tokenizer waits for ``may_go_on`` at the word "slow"."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.may_go_on = threading.Event(), threading.Event()

    def release(self) -> None:
        super().release()
        self.may_go_on.set()

    def encode(self, text: str) -> list[int]:
        if text == "slow":
            self.began.set()
            kit.wait(self.may_go_on)
        return super().encode(text)


async def test_tokenize_waits_no_longer_than_a_client_does_and_is_not_done_then() -> (
    None
):
    engine = Slow()

    async with service(engine) as running:
        first = asyncio.create_task(
            running.ask("POST", "/tokenize", {"inputs": "slow"})
        )
        await asyncio.to_thread(kit.wait, engine.began)
        for path, body in (("/tokenize", {"inputs": "b"}), ("/decode", {"ids": [10]})):
            late = await running.ask("POST", path, body, x_request_timeout="0.1")
            assert late.status == 504
            assert "0.1 s" in late.error_in(es.TEI)
        engine.may_go_on.set()
        assert (await first).status == 200
        assert (await running.ask("POST", "/tokenize", {"inputs": "b"})).status == 200


# --- one deadline, whatever takes the time ---

LIMIT_S = 0.4
SLACK_S = 2.0  # of a box where eight such tests run at once; added-up limits take more


class SlowThroughout(Slow):
    """Waits for ever in the stages that are named: tokenize, compute."""

    def __init__(self, *stages: str) -> None:
        super().__init__()
        self._stages = stages
        if "compute" in stages:
            self.block()

    def encode(self, text: str) -> list[int]:
        if "tokenize" in self._stages:
            kit.wait(self.may_go_on)
        return super().encode(text)

    def decode(self, ids: Sequence[int], *, with_special: bool) -> str:
        if "tokenize" in self._stages:
            kit.wait(self.may_go_on)
        return super().decode(ids, with_special=with_special)


class SlowChatter(kit.FakeChatEngine):
    """Waits for ever in this stage: tokenize, or compute."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.may_go_on = threading.Event()
        self.stage = stage
        self.speaker.is_paused = stage == "compute"

    def release(self) -> None:
        super().release()
        self.may_go_on.set()

    def encode(self, text: str) -> list[int]:
        if self.stage == "tokenize":
            kit.wait(self.may_go_on)
        return super().encode(text)


STAGES = {  # and the routes that go through it
    "tokenize": [r for r in WORK if r.path not in LOADS_NOTHING],
    "compute": [r for r in WORK if r.path not in COMPUTES_NOTHING],
    "load": [
        r
        for r in es.ROUTES
        if (r in WORK or r.path.endswith(("/info", "/load")))
        and r.path not in LOADS_NOTHING
    ],
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_route_answers_by_its_one_deadline_whatever_takes_long(
    stage: str,
) -> None:
    engine, ranker = SlowThroughout(stage), SlowThroughout(stage)
    ranker.card = kit.fake_card(n_scores=1, pair_separator=(5,), pair_suffix=(6,))
    may_load = threading.Event()

    def before_load() -> None:
        if stage == "load":
            kit.wait(may_load)

    async def check() -> None:
        loop = asyncio.get_running_loop()
        async with kit.running_service(
            engine,
            beside={kit.RANKER: ranker, kit.CHATTER: SlowChatter(stage)},
            before_load=before_load,
            preload=stage != "load",
            request_timeout_s=LIMIT_S,
        ) as running:
            begun = loop.time()
            replies = await asyncio.gather(*map(running.ask_route, STAGES[stage]))
            took_s = loop.time() - begun
            may_load.set()
        for route, reply in zip(STAGES[stage], replies, strict=True):
            assert reply.status == 504, route.path
            assert f"{LIMIT_S} s" in reply.error_in(route.dialect)
            if stage == "load":
                assert "was being loaded" in reply.error_in(route.dialect)
        assert LIMIT_S <= took_s + 0.01 and took_s < LIMIT_S + SLACK_S

    asyncio.run(check())


async def test_decode_takes_as_many_tokens_as_a_request_may_have() -> None:
    async with service(max_request_tokens=8) as running:
        for ids, status in (
            ([10] * 8, 200),
            ([[10] * 4] * 2, 200),
            ([[10] * 3] * 3, 422),
        ):
            reply = await running.ask("POST", "/decode", {"ids": ids})
            assert reply.status == status
        assert "9 tokens and a request may have 8" in reply.error_in(es.TEI)


async def test_tokenizing_many_texts_has_one_deadline_not_one_for_each() -> None:
    class TakesItsTime(kit.FakeEngine):
        def encode(self, text: str) -> list[int]:
            time.sleep(LIMIT_S * 0.7)
            return super().encode(text)

    async with service(TakesItsTime(), request_timeout_s=LIMIT_S) as running:
        late = await running.ask("POST", "/tokenize", {"inputs": ["a", "b"]})
        assert late.status == 504


async def test_tokenize_is_ended_by_the_end_of_the_drain() -> None:
    engine = Slow()

    async with service(engine, drain_timeout_s=0.2) as running:
        asks = []
        for text in ("slow", "b", "c"):
            ask = running.ask("POST", "/tokenize", {"inputs": text})
            asks.append(asyncio.create_task(ask))
            await asyncio.to_thread(kit.wait, engine.began)
        async with asyncio.timeout(kit.DEADLINE_S):
            while len(running.service.connections.open) < 3:
                await asyncio.sleep(0.001)
        running.server.stop()
        for waiting in asks[1:]:
            assert (await waiting).status == 503
        engine.may_go_on.set()
        await asyncio.wait(asks)


async def test_what_a_client_that_has_left_asked_for_is_not_done() -> None:
    engine = Slow()

    async with service(engine) as running:
        first = asyncio.create_task(
            running.ask("POST", "/tokenize", {"inputs": "slow"})
        )
        await asyncio.to_thread(kit.wait, engine.began)
        engine.began.clear()
        left = asyncio.create_task(running.ask("POST", "/tokenize", {"inputs": "slow"}))
        async with asyncio.timeout(kit.DEADLINE_S):
            while len(running.service.connections.open) < 2:
                await asyncio.sleep(0.001)
            left.cancel()
            while len(running.service.connections.open) > 1:
                await asyncio.sleep(0.001)
        engine.may_go_on.set()
        assert (await first).status == 200
        assert (await running.ask("POST", "/tokenize", {"inputs": "b"})).status == 200
        assert not engine.began.is_set()


# --- what every answer says of itself ---


@each(es.ROUTES)
async def test_openai_s_fields_are_on_openai_s_routes_and_no_others(
    route: es.Route, tmp_path: Path
) -> None:
    words = ("embeddings", "models", "chat/completions", "completions", "responses")
    groups = tuple(f"/{word}" for word in words)
    is_openai = route.path.removeprefix("/v1").startswith(groups)
    presented = {"authorization": f"Bearer {KEY}"}

    async with service(api_key_file=key_file(tmp_path)) as running:
        replies = [await running.ask_route(route, **presented)]
        replies.append(await running.ask_route(route, **presented, accept="image/png"))
        replies.append(await running.ask_route(route))  # no key
        if route.form:
            for body in ({}, {"model": "gpt-9"}, b"{"):
                reply = await running.ask("POST", route.path, body, **presented)
                replies.append(reply)
        elif "{id}" in route.path:
            path = route.path.replace("{id}", "gpt-9")
            replies.append(await running.ask("GET", path, **presented))
        assert replies[0].status == 200
        for reply in replies:
            assert "x-request-id" in reply.headers
            assert ("openai-version" in reply.headers) == is_openai
            assert ("openai-processing-ms" in reply.headers) == is_openai
            if is_openai:
                assert reply.headers["openai-version"] == "2020-10-01"
                assert 0 <= int(reply.headers["openai-processing-ms"]) < 60_000


async def test_a_request_that_took_long_says_how_long() -> None:
    engine = kit.FakeEngine()
    engine.block()

    async with service(engine) as running:
        begun = time.monotonic()
        task = asyncio.create_task(running.ask("POST", URL, {"input": "a"}))
        await asyncio.to_thread(engine.wait_until_computing)
        await asyncio.sleep(0.1)
        engine.release()
        took_ms = int((await task).headers["openai-processing-ms"])
        assert 100 <= took_ms <= (time.monotonic() - begun) * 1000 + 1


@each(COMPUTING)
async def test_an_answer_says_which_model_and_version_it_is_of(route: es.Route) -> None:
    async with service() as running:
        label = f"{kit.model_of(route.path)}@1"
        reply = await running.ask_route(route)
        assert reply.headers["x-embellama-model"] == label
        named = (kit.body_of(route) or {}) | {"model": label}
        reply = await running.ask("POST", route.path, named)
        assert reply.status == 200
        assert reply.headers["x-embellama-model"] == label


@each(es.ROUTES)
async def test_no_answer_has_a_field_twice_but_vary(
    route: es.Route, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        "rate_limit": 1000,
        "token_limit": 100_000,
        "gzip": "all",
    }
    async with service(api_key_file=key_file(tmp_path), **changes) as running:
        body = json.dumps(kit.body_of(route)).encode() if route.form else b""
        for key in (KEY, ""):
            lines = [f"{route.method} {kit.path_of(route)} HTTP/1.1", "host: h"]
            lines += ["connection: close", f"content-length: {len(body)}"]
            lines += ["content-type: application/json", "accept-encoding: gzip"]
            lines += [f"authorization: Bearer {key}"] if key else []
            sent = "\r\n".join([*lines, "", ""]).encode() + body
            head = (await running.exchange(sent)).partition(b"\r\n\r\n")[0]
            names = [line.partition(b":")[0] for line in head.split(b"\r\n")[1:]]
            once = [name for name in names if name != b"vary"]
            assert len(once) == len(set(once))


@pytest.mark.parametrize("path", ["/", "/invocations", "/rerank"])
async def test_texts_that_are_none_are_refused_where_they_are_not_ranked(
    path: str,
) -> None:
    async with service() as running:
        body = {"inputs": "a", "texts": [None, "b"]}
        dialect = es.TEI
        if path == "/rerank":
            dialect = es.OPENAI
            body |= {"model": kit.RANKER, "query": "a", "documents": ["b"]}
        reply = await running.ask("POST", path, body)
        assert reply.status == dialect.status_of(es.InvalidValue)
        assert "texts[0]" in reply.error_in(dialect)
