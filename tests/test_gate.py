"""Rooms GATE and ROUTES: who is let in where, how often, from which pages; the audit."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import re
import socket
import stat
import struct
import threading
import time
import types
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import uvloop
from hypothesis import example, given
from hypothesis import strategies as st

import embellama_server as es
from tests import kit
from tests.kit import RunningService

ADMIN, PLAIN, OTHER, WRONG = (f"key-of-{who}-0123456789" for who in "apow")
NAMES = {ADMIN: "operator", PLAIN: "search", OTHER: "import"}
URL = "/v1/embeddings"
EXAMPLE = "https://app.example"
ASK = {"input": "a b"}  # 4 tokens; before they are counted it may be 6
BOUND, TOKENS = 6, 4

OPEN_ROUTES = ("health", "ready", "metrics", "docs", "none")
ROUTES = [pytest.param(route, id=f"{route.method} {route.path}") for route in es.ROUTES]


def key_file(folder: Path, **options: str) -> str:
    """A key file of everybody; options by name."""
    path, new = folder / "keys", folder / "keys.new"
    default = {"operator": "admin"}
    lines = [
        f"{name} {key} {options.get(name, default.get(name, ''))}\n"
        for key, name in NAMES.items()
    ]
    new.write_text("".join(lines), encoding="utf-8")
    new.chmod(0o600)
    new.replace(path)
    return str(path)


@contextlib.asynccontextmanager
async def service(
    engine: kit.FakeEngine | None = None, **changes: Any
) -> AsyncIterator[RunningService]:
    """A running service; asserts that no key is in its log afterwards."""
    async with kit.running_service(engine, **kit.all_routes(), **changes) as running:
        yield running
    for key in (*NAMES, WRONG):
        assert key not in running.log.getvalue()


async def fields_of(running: RunningService, sent: bytes) -> list[str]:
    """The names of the answer's fields, as they come."""
    raw = await running.exchange(sent)
    lines = raw.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
    return [line.partition(":")[0].lower() for line in lines]


def bearer(key: str) -> dict[str, str]:
    """The fields that present it."""
    return {"authorization": f"Bearer {key}"} if key else {}


async def embed(running: RunningService, key: str = "", **ask: Any) -> kit.Reply:
    """A request for a vector."""
    return await running.ask("POST", URL, ASK | ask, **bearer(key))


def head(path: str = "/", method: str = "GET", **fields: str) -> es.Head:
    """A request's head, with these fields."""
    named = tuple((k.replace("_", "-"), v) for k, v in fields.items())
    return es.Head(method, path, "", 1, named, 0, fields.get("host", ""))


def gate(**changes: Any) -> es.Gate:
    """A gate without a service."""
    return es.Gate(kit.settings(**changes), kit.quiet_log())


# --- every route, with and without keys ---


@pytest.mark.parametrize("route", ROUTES)
async def test_without_keys_everybody_may_ask_and_who_reads_the_file_administers(
    route: es.Route,
) -> None:
    async with service() as running:
        assert (await running.ask_route(route)).status == 200
        # Whoever brings a key anyway, as the openai client must, is not refused for it.
        wanted = 403 if route.access == "admin" else 200
        assert (await running.ask_route(route, **bearer(WRONG))).status == wanted


PEERS = ("192.0.2.1", "2001:db8::1", "127.0.0.1", "::1", "::ffff:127.0.0.1", "")


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("route", ROUTES)
def test_without_keys_no_address_is_an_administrators(
    route: es.Route, peer: str
) -> None:
    asked = head(kit.path_of(route), route.method, host="localhost:8080")
    if route.access != "admin":
        assert gate().admit(asked, kit.direct(peer), route.access).key_name == ""
        return
    with pytest.raises(es.AdminOnly) as caught:
        gate().admit(asked, kit.direct(peer), route.access)
    assert (caught.value.status, caught.value.code) == (403, "admin_only")


# What proxies add, and what somebody may write who wants to be taken for another.
FORGED: tuple[dict[str, str], ...] = (
    *({}, {"host": "127.0.0.1"}, {"host": "[::1]:8080"}, {"host": "a.localhost"}),
    *({"forwarded": "for=127.0.0.1;host=localhost"}, {"via": "1.1 proxy"}),
    *({"x_forwarded_for": "127.0.0.1"}, {"x_forwarded_host": "localhost"}),
    *({"x_forwarded_proto": "https"}, {"x_real_ip": "127.0.0.1"}),
    *({"x_forwarded_prefix": "/"}, bearer(WRONG), bearer("admin-key-file")),
)
ADMIN_ROUTES = [route for route in es.ROUTES if route.access == "admin"]


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_nobody_administers_a_server_without_keys_by_what_they_write(
    loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    """Nor by leaving at once: who resets a connection has no address for uvloop."""

    async def check() -> None:
        async with kit.running_service(**kit.all_routes()) as running:
            before = [(m.label, m.state) for m in running.service.models.entries]
            for route, fields in itertools.product(ADMIN_ROUTES, FORGED):
                fields = {"authorization": ""} | fields
                asked = (route.method, kit.path_of(route), kit.body_of(route))
                reply = await running.ask(*asked, **fields)
                assert (reply.status, reply.error["code"]) == (403, "admin_only")
                assert running.service.settings.cache_dir in reply.error["message"]
                reset_after(running, *asked, fields)
            # One that comes later is answered: those before it have been looked at.
            assert (await embed(running)).status == 200
            after = [(m.label, m.state) for m in running.service.models.entries]
            assert after == before
            for word in ("unloaded", "default version", "reloaded", "cleared"):
                assert f" {word} " not in running.log.getvalue()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(check())


def reset_after(
    running: RunningService, method: str, path: str, body: Any, fields: dict[str, str]
) -> None:
    """Send a request and reset the connection."""
    raw = es.json_codec().dumps(body) if body else b""
    names = {"host": "localhost", "content-type": "application/json"}
    names |= {k.replace("_", "-"): v for k, v in fields.items()}
    lines = [f"{method} {path} HTTP/1.1", f"content-length: {len(raw)}"]
    lines += [f"{name}: {value}" for name, value in names.items()]
    with socket.create_connection((running.host, running.port)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.sendall("\r\n".join([*lines, "", ""]).encode() + raw)


def test_over_the_unix_socket_no_key_is_needed_but_where_a_proxy_passes_on() -> None:
    for route in ADMIN_ROUTES:
        asked = head(kit.path_of(route), route.method)
        assert gate().admit(asked, kit.direct(es.UNIX_PEER), "admin").key_name == ""
        for fields in FORGED[4:11]:
            asked = head(kit.path_of(route), route.method, **fields)
            with pytest.raises(es.AdminOnly):
                gate().admit(asked, kit.direct(es.UNIX_PEER), "admin")


def test_the_servers_own_key_is_this_users_alone_new_each_time_and_goes_with_it(
    tmp_path: Path,
) -> None:
    async def run() -> str:
        async with kit.running_service(cache_dir=str(tmp_path / "a" / "b")) as running:
            (path,) = (tmp_path / "a" / "b").iterdir()
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert f"admin key written path={path}" in running.log.getvalue()
            key = path.read_text().strip()
            assert key not in running.log.getvalue()
            asked = ("DELETE", "/admin/cache")
            assert (await running.ask(*asked, x_api_key=key)).status == 200
            wrong = {**bearer(key[:-1] + "x"), "x_api_key": key}
            assert (await running.ask(*asked, **wrong)).status == 403
        assert not list(path.parent.iterdir())
        return key

    assert asyncio.run(run()) != asyncio.run(run())


def test_keys_of_servers_that_were_killed_go_at_the_next_start_and_no_others(
    tmp_path: Path,
) -> None:
    prefix = f"admin-{socket.gethostname()}-"
    names = [f"{prefix}127.0.0.1-{port}.key" for port in (1, 2, 3)]
    dead, living, young = (tmp_path / name for name in names)
    unfinished, other = (
        tmp_path / f".{dead.name}.new",
        tmp_path / "admin-elsewhere-1.key",
    )
    for path in (dead, young, unfinished, other):
        path.write_text("key")
    _, file = es.new_admin_key(living)
    for path in (dead, living, unfinished, other):
        os.utime(path, (time.time() - 61, time.time() - 61))

    async def run() -> None:
        async with kit.running_service(cache_dir=str(tmp_path)):
            own = set(tmp_path.iterdir()) - {living, young, other}
            assert len(own) == 1 and own.isdisjoint({dead, unfinished})

    asyncio.run(run())
    os.close(file)  # as the end of its process does
    es.remove_dead_keys(tmp_path, prefix)
    assert set(tmp_path.iterdir()) == {young, other}


def test_where_no_key_can_be_written_admin_routes_say_what_is_left(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")

    async def run() -> None:
        async with kit.running_service(cache_dir=str(tmp_path / "file")) as running:
            assert "warning no admin key written" in running.log.getvalue()
            reply = await running.ask("GET", "/admin/models", authorization="")
            assert reply.status == 403 and "--api-key" in reply.error["message"]

    asyncio.run(run())


async def test_keys_that_come_or_go_with_a_reload_change_who_administers() -> None:
    async with service() as running:
        own = running.admin_fields()
        for key in (ADMIN, ""):
            running.configuration.now = dataclasses.replace(
                running.service.settings, api_key=key
            )
            fields = own if key else bearer(ADMIN)
            assert (await running.ask("POST", "/admin/reload", **fields)).status == 200
            fields = bearer(key) if key else own
            assert (await running.ask("GET", "/admin/models", **fields)).status == 200
            refused = await running.ask("GET", "/admin/models", **bearer(WRONG))
            assert refused.status == (401 if key else 403)


def expected_status(route: es.Route, opened: tuple[str, ...], key: str) -> int:
    """What a request with this key is answered, where there are keys."""
    if route.access in opened:
        return 200
    if key not in NAMES:
        return 401
    return 403 if route.access == "admin" and key != ADMIN else 200


@pytest.mark.parametrize(
    "opened", [("health", "ready"), ("metrics", "docs"), ("none",)]
)
async def test_with_keys_a_route_asks_for_what_its_row_says(
    tmp_path: Path, opened: tuple[str, ...]
) -> None:
    async with service(api_key_file=key_file(tmp_path), open_route=opened) as running:
        for route, key in itertools.product(es.ROUTES, ("", WRONG, *NAMES)):
            reply = await running.ask_route(route, **bearer(key))
            wanted = expected_status(route, opened, key)
            assert reply.status == wanted, (route.method, route.path, key)
            code = {200: None, 401: "invalid_api_key", 403: "admin_only"}[wanted]
            assert code is None or reply.error_in(route.dialect)
            if code and route.dialect is es.OPENAI:
                assert reply.error["code"] == code
            assert ("www-authenticate" in reply.headers) is (wanted == 401)


def test_only_words_of_the_option_stand_in_the_table() -> None:
    assert {r.access for r in es.ROUTES} <= {"key", "admin", *OPEN_ROUTES} - {"none"}
    assert {r.access for r in es.ROUTES if r.path.startswith("/admin/")} == {"admin"}


async def test_a_head_request_asks_for_the_same_key(tmp_path: Path) -> None:
    async with service(api_key_file=key_file(tmp_path)) as running:
        for path, key in itertools.product(("/v1/models", "/metrics"), ("", PLAIN)):
            reply = await running.ask("HEAD", path, **bearer(key))
            assert reply.status == (200 if key else 401)


@pytest.mark.parametrize("route", ROUTES)
async def test_options_needs_no_key_and_lists_methods_only(
    tmp_path: Path, route: es.Route
) -> None:
    async with service(api_key_file=key_file(tmp_path)) as running:
        reply = await running.ask("OPTIONS", kit.path_of(route))
        assert reply.status == 204
        assert route.method in reply.headers["allow"].split(", ")
        assert not any(name.startswith("access-control") for name in reply.headers)
        assert (await running.ask("OPTIONS", "*")).status == 204


@pytest.mark.parametrize(
    "path", ["/ADMIN/cache", "/admin%2Fcache", "/x/../admin/cache", "/./admin/cache"]
)
async def test_no_other_spelling_of_a_path_is_a_way_around(
    tmp_path: Path, path: str
) -> None:
    async with service(api_key_file=key_file(tmp_path)) as running:
        for method in ("GET", "POST", "DELETE"):
            assert (await running.ask(method, path)).status == 404


ADMIN_ROUTES = [route for route in es.ROUTES if route.access == "admin"]


async def test_more_slashes_are_refused_just_as_none(tmp_path: Path) -> None:
    async with service(api_key_file=key_file(tmp_path), root_path="/front") as running:
        app = running.service.connections.app
        for route, key in itertools.product(ADMIN_ROUTES, ("", WRONG, PLAIN)):
            asked = bearer(key) | {"x_request_id": "same"}
            plain = await running.ask(route.method, route.path, **asked)
            assert plain.status in (401, 403)
            for spelled in kit.spellings(route.path, "/front"):
                reply = await running.ask(route.method, spelled, **asked)
                assert (reply.status, reply.body) == (plain.status, plain.body)
                sent = head(spelled, route.method, host="localhost", **bearer(key))
                for peer in ("127.0.0.1", "192.0.2.1", ""):
                    with pytest.raises((es.Unauthorized, es.AdminOnly)):
                        app.admit(sent, kit.direct(peer))


def raw_post(length: int, *fields: str) -> bytes:
    """The head of a request whose body does not come."""
    kind = "content-type: application/json"
    lines = (f"POST {URL} HTTP/1.1", "host: h", f"content-length: {length}", kind)
    return "\r\n".join([*lines, *fields, "", ""]).encode()


@pytest.mark.parametrize("fields", [(), ("expect: 100-continue",)], ids=["", "100"])
@pytest.mark.parametrize("length", [10, 10_000_000], ids=["small", "large"])
async def test_a_wrong_key_is_refused_before_the_body_comes(
    tmp_path: Path, length: int, fields: tuple[str, ...]
) -> None:
    async with service(api_key_file=key_file(tmp_path)) as running:
        reader, writer = await asyncio.open_connection(running.host, running.port)
        writer.write(raw_post(length, f"authorization: Bearer {WRONG}", *fields))
        async with asyncio.timeout(kit.DEADLINE_S):
            assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
        writer.close()


async def test_the_right_key_is_told_to_continue(tmp_path: Path) -> None:
    async with service(api_key_file=key_file(tmp_path)) as running:
        reader, writer = await asyncio.open_connection(running.host, running.port)
        fields = (f"authorization: Bearer {PLAIN}", "expect: 100-continue")
        writer.write(raw_post(10, *fields))
        async with asyncio.timeout(kit.DEADLINE_S):
            assert (await reader.readline()).startswith(b"HTTP/1.1 100 ")
        writer.close()


async def test_a_refused_request_does_not_leave_its_body_to_be_read_as_the_next(
    tmp_path: Path,
) -> None:
    async with service(api_key_file=key_file(tmp_path)) as running:
        smuggled = b"DELETE /admin/cache HTTP/1.1\r\nhost: h\r\n\r\n"
        last = b"GET /health HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
        sent = raw_post(len(smuggled)) + smuggled + last
        replies = kit.parse_replies(await running.exchange(sent), ["POST", "GET"])
        assert [reply.status for reply in replies] == [401, 200]


async def test_who_was_let_in_once_shows_the_key_again(tmp_path: Path) -> None:
    async with service(api_key_file=key_file(tmp_path)) as running:
        asked = "GET /v1/models HTTP/1.1\r\nhost: h\r\n"
        first = f"{asked}authorization: Bearer {PLAIN}\r\n\r\n"
        sent = f"{first}{asked}connection: close\r\n\r\n".encode()
        replies = kit.parse_replies(await running.exchange(sent), ["GET", "GET"])
        assert [reply.status for reply in replies] == [200, 401]


# --- limits ---


def refused_lines(running: RunningService) -> list[str]:
    """What the log has once a second: how many were refused, and the last of them."""
    lines = running.log.getvalue().splitlines()
    return [line for line in lines if " refused " in line]


LIMIT_FIELDS = [
    f"x-ratelimit-{kind}-requests" for kind in ("limit", "remaining", "reset")
]


async def test_more_than_the_rate_is_429_and_says_when_to_come_back() -> None:
    async with service(rate_limit=0.01, rate_burst=2) as running:
        first, second, refused = [await embed(running) for _ in range(3)]
        assert (first.status, second.status, refused.status) == (200, 200, 429)
        left = [r.headers["x-ratelimit-remaining-requests"] for r in (first, second)]
        assert left == ["1", "0"]
        for reply in (second, refused):
            assert set(LIMIT_FIELDS) <= set(reply.headers)
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert refused.error["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert 1000 <= int(refused.headers["retry-after-ms"]) <= 60000
        assert refused.headers["x-should-retry"] == "true"
        assert (await running.ask("GET", "/health")).status == 200
        running.server._tick()
        (line,) = refused_lines(running)
        assert "rate_limit_exceeded=1 " in line


@pytest.mark.parametrize("route", ROUTES)
def test_the_limit_holds_where_work_is_asked_for_and_nowhere_else(
    tmp_path: Path, route: es.Route
) -> None:
    """Who watches or administers must get through."""
    limits: dict[str, Any] = {"rate_limit": 0.01, "rate_burst": 1, "token_limit": 1}
    path = key_file(tmp_path)
    for gatekeeper in (gate(**limits), gate(api_key_file=path, **limits)):
        asked = head(
            kit.path_of(route), route.method, host="localhost", **bearer(ADMIN)
        )
        caller = gatekeeper.admit(asked, kit.direct(es.UNIX_PEER), "key")
        gatekeeper.charge(caller, 100)  # much more than there is
        passes = contextlib.nullcontext()
        is_limited = route.access == "key"
        with pytest.raises(es.RateLimited) if is_limited else passes:
            gatekeeper.admit(asked, kit.direct(es.UNIX_PEER), route.access)


def test_a_probe_is_told_nothing_of_limits() -> None:
    gatekeeper = gate(rate_limit=0.01, token_limit=10)
    for access in ("health", "ready"):
        caller = gatekeeper.admit(
            head(host="localhost"), kit.direct("127.0.0.1"), access
        )
        assert gatekeeper.rates.headers(caller, 0.0) == ()


async def test_without_limits_nothing_is_said_of_them() -> None:
    async with service() as running:
        reply = await embed(running)
        assert not any(name.startswith("x-ratelimit") for name in reply.headers)


async def test_a_key_s_own_limits_go_before_the_settings(tmp_path: Path) -> None:
    path = key_file(
        tmp_path, search="rate=0.01 burst=3 tokens=600", operator="rate=1000 burst=100"
    )
    changes: dict[str, Any] = {"rate_limit": 0.01, "rate_burst": 1, "token_limit": 60}

    async with service(api_key_file=path, **changes) as running:
        replies = [await embed(running, PLAIN) for _ in range(4)]
        assert [reply.status for reply in replies] == [200] * 3 + [429]
        assert replies[0].headers["x-ratelimit-limit-requests"] == "3"
        assert replies[0].headers["x-ratelimit-limit-tokens"] == "600"
        # Two keys do not share a bucket; this one has the settings' limits.
        replies = [await embed(running, OTHER) for _ in range(2)]
        assert [reply.status for reply in replies] == [200, 429]
        assert replies[0].headers["x-ratelimit-limit-tokens"] == "60"
        replies = [await embed(running, ADMIN) for _ in range(5)]
        assert {reply.status for reply in replies} == {200}


@pytest.mark.parametrize(
    ("peers", "is_shared"),
    [
        (("192.0.2.1", "192.0.2.2"), False),
        (("192.0.2.1", "192.0.2.1"), True),
        (("192.0.2.1", "::ffff:192.0.2.1"), True),
        (("2001:db8::1", "2001:db8::2"), True),
        (("2001:db8::1", "2001:db8:0:1::1"), False),
        (("fe80::1%eth0", "fe80::1%eth1"), True),
        (("", "127.0.0.1"), False),
    ],
    ids=str,
)
def test_an_address_or_ipv6_network_has_a_bucket(
    peers: tuple[str, str], *, is_shared: bool
) -> None:
    gatekeeper = gate(rate_limit=0.01, rate_burst=1)
    first, second = peers
    gatekeeper.admit(head(host="localhost"), kit.direct(first), "key")
    with pytest.raises(es.RateLimited) if is_shared else contextlib.nullcontext():
        gatekeeper.admit(head(host="localhost"), kit.direct(second), "key")


def test_a_key_has_one_bucket_wherever_it_asks_from(tmp_path: Path) -> None:
    path = key_file(tmp_path, search="rate=0.01 burst=1")
    gatekeeper, asked = gate(api_key_file=path), head(**bearer(PLAIN))
    gatekeeper.admit(asked, kit.direct("192.0.2.1"), "key")
    with pytest.raises(es.RateLimited):
        gatekeeper.admit(asked, kit.direct("192.0.2.2"), "key")


async def test_a_wrong_key_uses_up_nobody_s_requests(tmp_path: Path) -> None:
    path = key_file(tmp_path)
    async with service(api_key_file=path, rate_limit=0.01, rate_burst=1) as running:
        for _ in range(3):
            assert (await embed(running, WRONG)).status == 401
        assert (await embed(running, PLAIN)).status == 200


def remaining_tokens(reply: kit.Reply) -> int:
    """What the answer says is left."""
    return int(reply.headers["x-ratelimit-remaining-tokens"])


@pytest.fixture
def charged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the gate is told to count, as it comes: the clock has no part in it."""
    amounts: list[int] = []
    charge = es.Gate.charge

    def noted(gatekeeper: es.Gate, caller: es.Caller, tokens: int) -> None:
        charge(gatekeeper, caller, tokens)
        amounts.append(tokens)

    monkeypatch.setattr(es.Gate, "charge", noted)
    return amounts


async def test_tokens_are_charged_as_they_were_counted_in_the_end(
    charged: list[int],
) -> None:
    async with service(token_limit=1000, cache_mb=1) as running:
        for _ in range(2):
            reply = await embed(running)
            assert reply.json["usage"]["total_tokens"] == TOKENS
        # What was not computed again was asked for again.
        assert len(running.engine.calls) == 1
        assert charged == [BOUND, TOKENS - BOUND] * 2


@pytest.mark.parametrize(
    ("ask", "status", "cost"),
    [
        ({"input": " ".join(["word"] * 40)}, 400, 0),
        ({"input": [""]}, 400, 0),
        ({"model": "gpt-9"}, 404, 0),
        ({"input": "boom"}, 500, 3),
    ],
    ids=["too long", "empty", "another model", "a failing engine"],
)
async def test_a_request_that_fails_costs_what_was_computed(
    charged: list[int], ask: dict[str, Any], status: int, cost: int
) -> None:
    async with service(token_limit=1000) as running:
        assert (await embed(running, **ask)).status == status
        assert sum(charged) == cost


@pytest.mark.parametrize(
    ("path", "ask", "tokens"),
    [
        ("/tokenize", {"inputs": ["a b c", "d"]}, 8),
        ("/tokenize", {"inputs": "long words", "add_special_tokens": False}, 2),
        ("/tokenize", {"inputs": "many " * 100}, 102),  # more than the model reads
        ("/decode", {"ids": [[10, 11, 12], [13]]}, 4),
    ],
)
async def test_what_the_tokenizer_has_done_is_charged_and_no_more(
    charged: list[int], path: str, ask: dict[str, Any], tokens: int
) -> None:
    async with service(token_limit=1000) as running:
        assert (await running.ask("POST", path, ask)).status == 200
        assert sum(charged) == tokens


@pytest.mark.parametrize(
    ("path", "ask"),
    [("/tokenize", {"inputs": "a b c d"}), ("/decode", {"ids": [10] * 4})],
)
async def test_a_minute_s_tokens_are_for_the_tokenizer_too(
    path: str, ask: dict[str, Any]
) -> None:
    async with service(token_limit=10) as running:
        replies = [await running.ask("POST", path, ask) for _ in range(9)]
        assert [reply.status for reply in replies][::8] == [200, 429]


async def test_what_the_tokenizer_has_not_begun_when_its_time_is_up_costs_nothing(
    charged: list[int],
) -> None:
    may_go_on = threading.Event()

    class Slow(kit.FakeEngine):
        def encode(self, text: str) -> list[int]:
            if text == "slow":
                kit.wait(may_go_on)
            return super().encode(text)

    async with service(Slow(), token_limit=1000) as running:
        ask = {"inputs": ["a b", "slow", "c d e"], "add_special_tokens": False}
        late = await running.ask("POST", "/tokenize", ask, x_request_timeout="0.3")
        may_go_on.set()
        assert late.status == 504
        assert sum(charged) == 2


async def test_an_upper_bound_beyond_the_limit_is_429_and_takes_nothing() -> None:
    async with service(token_limit=10, cache_mb=0) as running:
        for left in (6, 2):
            assert remaining_tokens(await embed(running)) == left
        refused = await embed(running)
        assert refused.status == 429
        assert "10 tokens per minute" in refused.error["message"]
        assert refused.headers["x-should-retry"] == "true"
        assert {"retry-after", "retry-after-ms"} <= set(refused.headers)
        assert remaining_tokens(refused) == 2
        assert len(running.engine.calls) == 2


async def test_a_refusal_for_its_tokens_has_no_field_twice() -> None:
    async with service(token_limit=6, cache_mb=0) as running:
        body = json.dumps(ASK).encode()
        sent = raw_post(len(body), "connection: close") + body
        assert (await embed(running)).status == 200
        names = await fields_of(running, sent)
        assert "retry-after-ms" in names
        assert len(names) == len(set(names))


async def test_a_request_refused_by_a_full_queue_costs_nothing(
    charged: list[int],
) -> None:
    engine = kit.FakeEngine()
    engine.block()

    async with service(engine, token_limit=1000, queue_size=4) as running:
        first = asyncio.create_task(embed(running, input=["a", "b"]))
        await asyncio.to_thread(engine.wait_until_computing)
        for _ in range(2):
            refused = await embed(running, input=["c", "d", "e"])
            assert (refused.status, refused.error["code"]) == (503, "overloaded")
        engine.release()
        assert (await first).status == 200
        assert charged == [8, 12, -12, 12, -12, -2]


async def test_a_request_larger_than_a_minute_s_tokens_is_answered_when_nothing_was_used() -> (
    None
):
    async with service(token_limit=10) as running:
        reply = await embed(running, input=["a"] * 10)  # 30 tokens, at most 40
        assert reply.status == 200
        assert remaining_tokens(reply) == 0


@pytest.mark.parametrize(
    ("cap", "asked", "gets"),
    [
        ("", "high", "high"),
        ("", "low", "low"),
        ("priority=high", "high", "high"),
        ("priority=normal", "high", "normal"),
        ("priority=low", "high", "low"),
        ("priority=low", None, "low"),
        ("priority=normal", "low", "low"),
    ],
)
async def test_a_key_may_not_be_more_urgent_than_its_line_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cap: str,
    asked: str | None,
    gets: str,
) -> None:
    jobs: list[es.Job] = []
    submit = es.JobQueue.submit

    def noted(queue: es.JobQueue, job: es.Job) -> None:
        jobs.append(job)
        submit(queue, job)

    monkeypatch.setattr(es.JobQueue, "submit", noted)

    async with service(api_key_file=key_file(tmp_path, search=cap)) as running:
        assert (await embed(running, PLAIN, priority=asked)).status == 200
        by_header = bearer(PLAIN) | ({"x_priority": asked} if asked else {})
        assert (await running.ask("POST", URL, ASK, **by_header)).status == 200
        assert [es.PRIORITIES[job.priority] for job in jobs] == [gets, gets]
        assert {job.client for job in jobs} == {"key search"}


# --- pages of other origins ---

CORS = "access-control-"


@pytest.mark.parametrize("fields", [{}, {"sec_fetch_site": "same-origin"}], ids=str)
async def test_without_an_origin_nothing_is_said_to_browsers(
    fields: dict[str, str],
) -> None:
    async with service() as running:
        assert gate().cors_headers(head(host="localhost:1", **fields)) == ()
        for method in ("GET", "OPTIONS"):
            reply = await running.ask(method, "/v1/models", **fields)
            assert reply.status in (200, 204)
            assert "vary" not in reply.headers
            assert not any(name.startswith(CORS) for name in reply.headers)


@pytest.mark.parametrize("is_keyed", [False, True], ids=["open", "keys"])
async def test_a_listed_origin_s_pages_may_read_every_answer(
    tmp_path: Path, *, is_keyed: bool
) -> None:
    keys: dict[str, Any] = {"api_key_file": key_file(tmp_path)} if is_keyed else {}

    async with service(cors_origin=(EXAMPLE, "http://b.example:81"), **keys) as running:
        presented = bearer(PLAIN) if is_keyed else {}
        paths = {"/v1/models": 200, "/v1/models/gpt-9": 404, "/nothing": 404}
        if is_keyed:
            paths["/admin/reload"] = 405
        for path, status in paths.items():
            reply = await running.ask("GET", path, origin=EXAMPLE, **presented)
            assert reply.status == status
            assert reply.headers["access-control-allow-origin"] == EXAMPLE
            assert "origin" in reply.headers["vary"]
            assert "access-control-allow-credentials" not in reply.headers
        if is_keyed:
            unknown = await running.ask("GET", "/v1/models", origin=EXAMPLE)
            assert unknown.status == 401
            assert unknown.headers["access-control-allow-origin"] == EXAMPLE


OTHER_ORIGINS = [
    "https://app.example/",
    "https://app.example:443",
    "app://app.example",
    "http://app.example",
    "https://app.example:444",
    "https://app.example.evil",
    "https://sub.app.example",
    "null",
    "*",
    "",
]


@pytest.mark.parametrize("origin", OTHER_ORIGINS)
def test_another_origin_is_told_nothing_but_that_it_varies(origin: str) -> None:
    gatekeeper, asked = gate(cors_origin=(EXAMPLE,)), head(origin=origin)
    assert gatekeeper.cors_headers(asked) == (("vary", "origin"),)
    assert gatekeeper.preflight_headers(asked, "GET") == ()


@pytest.mark.parametrize("option", [EXAMPLE, "https://APP.Example"])
@pytest.mark.parametrize("origin", [EXAMPLE, "https://APP.example"])
def test_an_origin_s_capitals_do_not_matter(option: str, origin: str) -> None:
    gatekeeper, asked = gate(cors_origin=(option,)), head(origin=origin)
    fields = dict(gatekeeper.cors_headers(asked))
    assert fields["access-control-allow-origin"] == origin
    exposed = fields["access-control-expose-headers"].split(", ")
    assert {"*", "x-request-id", "retry-after-ms"} <= set(exposed)
    assert gatekeeper.preflight_headers(asked, "GET")
    assert gatekeeper.admit(
        head(origin=origin, host="localhost"), kit.direct("127.0.0.1"), "key"
    )


async def test_a_preflight_needs_no_key_and_says_what_may_be_sent(
    tmp_path: Path,
) -> None:
    async with service(
        api_key_file=key_file(tmp_path), cors_origin=(EXAMPLE,)
    ) as running:
        wanted = {"access_control_request_method": "POST"}
        wanted["access_control_request_headers"] = "authorization,content-type"
        reply = await running.ask("OPTIONS", URL, origin=EXAMPLE, **wanted)
        assert reply.status == 204
        assert reply.headers["access-control-allow-origin"] == EXAMPLE
        assert "POST" in reply.headers["access-control-allow-methods"]
        allowed = reply.headers["access-control-allow-headers"]
        assert allowed == "authorization,content-type"
        assert int(reply.headers["access-control-max-age"]) > 0
        other = await running.ask("OPTIONS", URL, origin="https://b.example", **wanted)
        assert other.status == 204
        assert not any(name.startswith(CORS) for name in other.headers)


# --- names that resolve to this machine ---

HOSTS = [
    ("localhost", True),
    ("LOCALHOST:8080", True),
    ("localhost.", True),
    ("localhost.:8080", True),
    ("127.0.0.1:8080", True),
    ("127.8.8.8", True),
    ("[::1]:8080", True),
    ("[::1]", True),
    ("app.localhost", True),
    ("app.localhost:80", True),
    ("box.example:8080", True),  # --allowed-host
    ("box.example.", True),
    ("", True),  # HTTP/1.0
    # Addresses: nobody can have one of ours resolve to something else.
    ("0.0.0.0:8080", True),
    ("192.168.1.20", True),
    ("10.0.0.5:80", True),
    ("127.1", True),
    ("[fd00::1]:8080", True),
    ("[2001:db8::1]", True),
    ("[::ffff:127.0.0.1]", True),
    # No public name is one label alone (ICANN, SAC053).
    ("embeddings:8080", True),
    ("gpu-box", True),
    ("gpu_box", True),
    # What registries do not sell.
    ("host.docker.internal:8080", True),
    ("kubernetes.docker.internal", True),
    ("host.containers.internal", True),
    ("gpu-box.local", True),
    ("embeddings.default.svc.cluster.local", True),
    ("gpu.lan", True),
    ("gpu.home.arpa", True),
    ("gpu.test.", True),
    (socket.gethostname(), True),
    ("evil.example", False),
    ("evil.example:8080", False),
    ("evil.example.", False),
    ("embed.example.com", False),
    ("localhost.evil.example", False),
    ("evil-localhost.com", False),
    ("box.example.evil", False),
    ("127.0.0.1.evil.example", False),
    ("127.0.0.1.nip.io", False),
    ("localtest.me", False),
    ("fritz.box", False),
    ("evil.arpa", False),
    ("internal.example.com", False),
    ("docker.internal.evil.com", False),
    ("127.evil.example:8080", False),
    ("sub.box.example", False),
    ("evil.example.1a", False),
]


@pytest.mark.parametrize(("host", "is_ours"), HOSTS)
def test_without_keys_a_request_from_this_machine_names_this_machine(
    tmp_path: Path, host: str, *, is_ours: bool
) -> None:
    gatekeeper = gate(allowed_host=("box.example",), cache_dir=str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gatekeeper.offer_admin_key([listener])
    (path,) = tmp_path.iterdir()
    fields = bearer(path.read_text().strip())
    accesses = ("key", "admin", "metrics")
    for peer, access in itertools.product(("127.0.0.1", "::1"), accesses):
        if is_ours:
            assert gatekeeper.admit(head(host=host, **fields), kit.direct(peer), access)
            continue
        with pytest.raises(es.HostNotAllowed) as caught:
            gatekeeper.admit(head(host=host, **fields), kit.direct(peer), access)
        assert (caught.value.status, caught.value.code) == (403, "host_not_allowed")
        advised = re.findall(r"--allowed-host (\S+),", caught.value.message)
        assert gate(allowed_host=advised).admit(
            head(host=host), kit.direct(peer), "key"
        )


def test_a_key_of_the_administrator_s_that_finds_no_place_leaves_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "key").mkdir()
    with pytest.raises(OSError, match="directory"):
        es.new_admin_key(tmp_path / "key")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_name_of_its_own_is_this_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "GPU.example.com")
    assert gate().admit(head(host="gpu.example.com:80"), kit.direct("127.0.0.1"), "key")


async def test_a_stranger_s_host_is_a_warning_a_second_with_the_remedy() -> None:
    async with service() as running:
        sent = b"GET / HTTP/1.1\r\nhost: embed.example.com\r\nconnection: close\r\n\r\n"
        for _ in range(3):
            assert b" 403 " in (await running.exchange(sent))[:20]
        running.server._tick()
        (line,) = refused_lines(running)
        assert " warning " in line
        assert "host_not_allowed=3" in line
        assert "--allowed-host embed.example.com" in line
        assert "code=host_not_allowed" not in running.log.getvalue()


def test_the_option_s_capitals_do_not_matter() -> None:
    asked = head(host="Box.Example")
    assert gate(allowed_host=("Box.Example",)).admit(
        asked, kit.direct("127.0.0.1"), "key"
    )


@pytest.mark.parametrize("peer", [es.UNIX_PEER, "192.0.2.1"])
def test_on_other_ways_in_any_host_will_do(peer: str) -> None:
    assert gate().admit(head(host="evil.example"), kit.direct(peer), "key")


def test_the_name_it_listens_on_is_its_own() -> None:
    gatekeeper = gate(host="Box.internal")
    assert gatekeeper.admit(
        head(host="box.internal:80"), kit.direct("127.0.0.1"), "key"
    )


def test_with_keys_no_host_or_origin_is_refused(tmp_path: Path) -> None:
    gatekeeper = gate(api_key_file=key_file(tmp_path))
    fields = {"host": "evil.example", "origin": "https://evil.example"}
    asked = head(**fields, sec_fetch_site="cross-site", **bearer(PLAIN))
    assert gatekeeper.admit(asked, kit.direct("127.0.0.1"), "key").key_name == "search"


PAGES: list[tuple[dict[str, str], bool]] = [
    ({"origin": "http://localhost:8080"}, True),
    ({"origin": "HTTP://LOCALHOST:8080"}, True),
    ({"origin": "http://localhost:3000"}, True),  # this machine's other pages
    ({"origin": "http://127.0.0.1:8080", "sec_fetch_site": "cross-site"}, True),
    ({"origin": "http://localhost", "sec_fetch_site": "cross-site"}, True),
    ({"origin": "https://[::1]:5173"}, True),
    ({"origin": "http://tauri.localhost"}, True),
    ({"origin": "tauri://localhost"}, False),
    ({"origin": "http://192.168.1.20"}, False),  # another machine's
    ({"origin": "http://gpu-box.local"}, False),
    ({"origin": "http://127.0.0.1.evil.example"}, False),
    ({"origin": "http://localhost:3000.evil.example"}, False),
    ({"origin": "http://localhost@evil.example"}, False),
    ({"origin": "http://evillocalhost"}, False),
    ({"origin": "http://localhost, http://localhost"}, False),
    ({"origin": "localhost:8080"}, False),
    ({"sec_fetch_site": "same-origin"}, True),
    ({"sec_fetch_site": "none"}, True),  # typed into the address bar
    ({"origin": EXAMPLE, "sec_fetch_site": "cross-site"}, True),  # --cors-origin
    ({"origin": "https://evil.example"}, False),
    ({"origin": "https://evil.example", "sec_fetch_site": "same-origin"}, False),
    ({"origin": "http://localhost.evil.example"}, False),
    ({"origin": "null"}, False),
    ({"origin": "file://"}, False),
    ({"sec_fetch_site": "cross-site"}, False),
]


@pytest.mark.parametrize(("fields", "may_ask"), PAGES, ids=str)
@pytest.mark.parametrize("peer", ["127.0.0.1", "192.0.2.1", es.UNIX_PEER])
def test_without_keys_a_page_of_another_site_may_not_ask(
    fields: dict[str, str], peer: str, *, may_ask: bool
) -> None:
    asked = head(host="localhost:8080", **fields)
    if may_ask:
        assert gate(cors_origin=(EXAMPLE,)).admit(asked, kit.direct(peer), "key")
        return
    with pytest.raises(es.HostNotAllowed, match="--cors-origin"):
        gate(cors_origin=(EXAMPLE,)).admit(asked, kit.direct(peer), "key")


ORIGINS: list[tuple[str, list[str], list[str]]] = [  # the option, who may, who may not
    ("app://obsidian.md", ["app://obsidian.md"], ["app://other", "http://obsidian.md"]),
    (
        "chrome-extension://*",
        ["chrome-extension://abc", "CHROME-extension://x"],
        ["moz-extension://abc", "https://abc", "chrome-extension://a/b", "null"],
    ),
    (
        "http://localhost:*",
        ["http://localhost:3000"],
        ["http://localhost.evil.example:80", "http://evil.example:80"],
    ),
    (
        "https://*.example.com",
        ["https://a.example.com", "https://a.b.example.com"],
        ["https://example.com", "http://a.example.com", "https://a.example.com.evil"],
    ),
    ("tauri://localhost", ["tauri://localhost"], ["tauri://other", "app://localhost"]),
    ("file://", ["file://"], ["file://x", "null"]),
    ("null", ["null", "NULL"], ["file://", "nulls", EXAMPLE]),
    ("vscode-webview://*", ["vscode-webview://1x2"], ["vscode-file://vscode-app"]),
    ("*", [EXAMPLE, "null", "file://", "app://x", "http://evil.example"], []),
]


@pytest.mark.parametrize(
    ("option", "may", "may_not"), ORIGINS, ids=lambda x: str(x)[:30]
)
def test_extensions_and_desktop_apps_may_ask_if_that_is_said(
    option: str, may: list[str], may_not: list[str]
) -> None:
    assert re.fullmatch(es.ORIGIN, option)
    gatekeeper = gate(cors_origin=(option,))
    for origin in (*may, *may_not):
        asked = head(host="localhost", origin=origin, sec_fetch_site="cross-site")
        fields = dict(gatekeeper.cors_headers(asked))
        is_told = fields.get("access-control-allow-origin") == origin
        assert (
            is_told
            == (origin in may)
            == bool(gatekeeper.preflight_headers(asked, "GET"))
        )
        with contextlib.nullcontext() if is_told else pytest.raises(es.HostNotAllowed):
            gatekeeper.admit(asked, kit.direct("127.0.0.1"), "key")
    if option == "*":  # who does not say an origin cannot be told that it may
        assert gatekeeper.cors_headers(head()) == (("vary", "origin"),)


@given(
    st.from_regex(es.ORIGIN, fullmatch=True)
    | st.text(st.characters(min_codepoint=32, max_codepoint=255), min_size=1)
)
@example("null")
@example("file://")
@example("http://*")
@example("app://" + "x" * 300)
def test_what_a_refusal_advises_is_accepted(origin: str) -> None:
    asked = head(host="h", origin=origin, sec_fetch_site="cross-site")
    try:
        gate().admit(asked, kit.direct("127.0.0.1"), "key")
    except es.HostNotAllowed as error:
        advised = re.findall(r"--cors-origin (\S+) allows", error.message)
        for option in advised:
            assert re.fullmatch(es.ORIGIN, option)
            assert gate(cors_origin=(option,)).admit(
                asked, kit.direct("127.0.0.1"), "key"
            )
            for other in ("http://evil.example", "app://evil", "null"):  # nobody else
                if other.lower() != origin.lower():
                    with pytest.raises(es.HostNotAllowed):
                        sent = head(host="h", origin=other)
                        gate(cors_origin=(option,)).admit(
                            sent, kit.direct("127.0.0.1"), "key"
                        )
        is_origin = re.fullmatch(es.ORIGIN, origin) and "*" not in origin
        assert len(advised) == bool(is_origin and len(origin) < 256)


LINK = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
LINKS: list[tuple[str, dict[str, str], bool]] = [
    ("GET", {"sec_fetch_dest": "document"}, True),
    ("HEAD", {"sec_fetch_dest": "document"}, True),
    ("POST", {"sec_fetch_dest": "document"}, False),  # a form
    ("DELETE", {"sec_fetch_dest": "document"}, False),
    ("GET", {"sec_fetch_dest": "iframe"}, False),
    ("GET", {}, False),
    ("GET", {"sec_fetch_dest": "image", "sec_fetch_mode": "no-cors"}, False),
    ("GET", {"sec_fetch_dest": "document", "origin": "https://evil.example"}, False),
]


@pytest.mark.parametrize(("method", "fields", "may_ask"), LINKS, ids=str)
def test_without_keys_a_link_of_another_site_may_be_followed(
    method: str, fields: dict[str, str], *, may_ask: bool
) -> None:
    asked = head("/docs", method, host="localhost:8080", **(LINK | fields))
    if may_ask:
        assert gate().admit(asked, kit.direct("127.0.0.1"), "docs")
        return
    with pytest.raises(es.HostNotAllowed, match="Origin|refused"):
        gate().admit(asked, kit.direct("127.0.0.1"), "docs")


@pytest.mark.parametrize("route", ROUTES)
async def test_the_host_is_checked_on_every_route_but_open_probes(
    route: es.Route,
) -> None:
    is_probe = route.access in ("health", "ready")

    async with service() as running:
        for fields in (
            b"host: evil.example",
            b"host: h\r\norigin: http://evil.example",
        ):
            line = f"{route.method} {kit.path_of(route)} HTTP/1.1\r\n".encode()
            kind = b"content-type: application/json\r\n" if route.form else b""
            sent = line + kind + fields + b"\r\nconnection: close\r\n\r\n"
            reply = kit.parse_reply(await running.exchange(sent), route.method)
            assert reply.status == (200 if is_probe else 403)
            if not is_probe:
                part = (
                    "--allowed-host" if b"evil.example" in fields[:20] else "pages of"
                )
                assert part in reply.error_in(route.dialect)


@pytest.mark.parametrize(
    "opened",
    [("none",), ("metrics",), ("none", "health"), ("health", "none")],
    ids=str,
)
def test_a_probe_that_is_not_open_is_checked_as_others(opened: tuple[str, ...]) -> None:
    with pytest.raises(es.HostNotAllowed):
        gate(open_route=opened).admit(
            head(host="evil.example"), kit.direct("::1"), "health"
        )


def test_none_closes_what_other_words_open(tmp_path: Path) -> None:
    words = OPEN_ROUTES
    gatekeeper = gate(api_key_file=key_file(tmp_path), open_route=words)
    for access in OPEN_ROUTES[:-1]:
        with pytest.raises(es.Unauthorized):
            gatekeeper.admit(head(), kit.direct("127.0.0.1"), access)
        assert (
            gatekeeper.admit(head(**bearer(PLAIN)), kit.direct(""), access).key_name
            == "search"
        )


# --- bodies that are of no use ---

IDLE = [route for route in es.ROUTES if route.form is None]


@pytest.mark.parametrize("route", IDLE, ids=lambda r: f"{r.method} {r.path}")
async def test_a_route_that_takes_no_json_holds_no_body(route: es.Route) -> None:
    async with service() as running:
        for method in (route.method, "OPTIONS"):
            small = await running.ask(method, kit.path_of(route), b" " * 4096)
            assert small.status == (204 if method == "OPTIONS" else 200)
            start = f"{method} {kit.path_of(route)} HTTP/1.1\r\nhost: h\r\n"
            start += running.admin_lines()
            for field in ("content-length: 4097", "transfer-encoding: chunked"):
                sent = f"{start}connection: close\r\n{field}\r\n\r\n".encode()
                sent += b"0\r\n\r\n" if "chunked" in field else b" " * 4097
                reply = kit.parse_reply(await running.exchange(sent), method)
                assert reply.status == 413
                assert "takes no body" in reply.body.decode()


async def test_who_has_no_key_is_told_so_before_the_body_is_looked_at(
    tmp_path: Path,
) -> None:
    async with service(api_key_file=key_file(tmp_path)) as running:
        reply = await running.ask("GET", "/v1/models", b" " * 5000)
        assert reply.status == 401


# --- the audit log ---


def lines_of(path: Path) -> list[dict[str, Any]]:
    """What was audited."""
    return [json.loads(line) for line in path.read_text("ascii").splitlines()]


# What is audited of the bodies that the kit sends: model, inputs, tokens.
COUNTS: dict[str, tuple[str | None, int | None, int | None]] = {
    "/v1/rerank": (kit.RANKER, 2, 11),  # two pairs, with three special tokens each
    **dict.fromkeys(
        ("/v2/rerank", "/reranking", "/v1/reranking", "/score", "/v1/score"),
        (kit.RANKER, 2, 11),
    ),
    "/rerank": (kit.RANKER, 2, 11),
    **{path: (kit.CHATTER, 1, 5) for path in kit.BODIES if kit.generates(path)},
    "/similarity": ("fake", 3, 10),
    "/tokenize": ("fake", 1, None),  # nothing is computed
    "/decode": ("fake", 1, None),
    "/detokenize": ("fake", 1, None),
    "/apply-template": (kit.CHATTER, 1, None),
    "/api/show": ("fake", None, None),
    "/api/pull": ("fake", None, None),
}


async def test_the_audit_says_who_asked_what_and_how_much_and_not_the_text(
    tmp_path: Path,
) -> None:
    audit = tmp_path / "audit"

    async with service(
        api_key_file=key_file(tmp_path), audit_log=str(audit)
    ) as running:
        for route in es.ROUTES:
            fields = bearer(ADMIN) | {"x_request_id": "id-1"}
            reply = await running.ask_route(route, **fields)
            assert reply.status == 200, (route.path, reply.body)
        for line, route in zip(lines_of(audit), es.ROUTES, strict=True):
            is_open = route.access in kit.settings().open_route
            count = COUNTS.get(route.path, ("fake", 1, TOKENS))
            if not route.form or route.access == "admin":
                count = (None, None, None)
            assert time.time() - line.pop("time") < kit.DEADLINE_S * 2
            assert bool(line.pop("stream_bytes", 0)) == (route.path == "/chat")
            assert line == {
                "id": "id-1",
                "key": None if is_open else "operator",
                "address": "127.0.0.1",
                "method": route.method,
                "path": kit.path_of(route),
                "status": 200,
                "model": count[0],
                "inputs": count[1],
                "tokens": count[2],
            }
    assert audit.stat().st_mode & 0o777 == 0o600
    assert ADMIN not in audit.read_text("ascii")


async def test_pairs_are_audited_with_both_their_texts(tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    async with service(audit_log=str(audit), audit_text=True) as running:
        ask = {"model": kit.RANKER, "query": "who?", "texts": ["\u00e4", "b"]}
        assert (await running.ask("POST", "/rerank", ask)).status == 200
        assert (await running.ask("POST", "/v1/embeddings", ASK)).status == 200
        pairs = [{"query": "who?", "text": text} for text in ("\u00e4", "b")]
        assert [line["text"] for line in lines_of(audit)] == [pairs, ["a b"]]
        assert "who?" not in running.log.getvalue()


async def test_the_texts_are_audited_only_if_asked_for(tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    async with service(
        audit_log=str(audit), audit_text=True, accept_token_ids=True
    ) as running:
        await embed(running, input=["secret words", "\u00e4\n"])
        await embed(running, input=[[10, 11]])
        await embed(running, input="boom")
        texts = [line["text"] for line in lines_of(audit)]
        assert texts == [["secret words", "\u00e4\n"], [[10, 11]], ["boom"]]
        assert "secret" not in running.log.getvalue()


IMAGE = {"content_type": "image/png"}
REFUSED: list[tuple[int, str, str, str, dict[str, str]]] = [
    (401, "invalid_api_key", "POST", URL, bearer(WRONG)),
    (401, "invalid_api_key", "DELETE", "/admin/cache", {}),
    (403, "admin_only", "DELETE", "/admin/cache", bearer(PLAIN)),
    (404, "unknown_url", "GET", "/" + "n" * 999, {}),
    (404, "unknown_url", "OPTIONS", "/nope", {}),
    (405, "method_not_allowed", "B" * 999, "/health", {}),
    (413, "body_too_large", "POST", URL, bearer(PLAIN) | {"content_length": "9" * 9}),
    (413, "body_too_large", "OPTIONS", URL, {"content_length": "9" * 9}),
    (415, "unsupported_media_type", "POST", URL, IMAGE | bearer(PLAIN)),
    (417, "expectation_failed", "GET", "/health", {"expect": "tea"}),
    (431, "header_too_large", "GET", "/health", {"x": "y" * 20_000}),
]


async def test_what_its_head_condemns_is_audited_each_time_with_its_id(
    tmp_path: Path,
) -> None:
    audit = tmp_path / "audit"

    async with service(
        api_key_file=key_file(tmp_path), audit_log=str(audit)
    ) as running:
        for status, code, method, path, fields in REFUSED:
            for number in range(3):
                named = {"x_request_id": f"id-{number}"} | fields
                reply = await running.ask(method, path, **named)
                assert (reply.status, reply.error["code"]) == (status, code)
                line = lines_of(audit)[-1]
                assert line.pop("time") > 0
                assert line == {
                    "id": f"id-{number}",
                    "key": "search"
                    if bearer(PLAIN).items() <= fields.items()
                    else None,
                    "address": "127.0.0.1",
                    "method": method[:32],
                    "path": path[:256],
                    "status": status,
                    "model": None,
                    "inputs": None,
                    "tokens": None,
                    "code": code,
                }
        assert len(lines_of(audit)) == 3 * len(REFUSED)
        assert (await running.ask("OPTIONS", URL)).status == 204
        garbage = kit.parse_reply(await running.exchange(b"x\r\n\r\n"))
        assert garbage.status == 400
        line = lines_of(audit)[3 * len(REFUSED)]
        assert line["id"] == garbage.headers["x-request-id"]
        assert (line["method"], line["status"]) == (None, 400)
        running.server._tick()
        for _, code, *_ in REFUSED:
            assert code in running.log.getvalue()


async def test_what_is_refused_for_its_rate_or_for_want_of_room_is_audited(
    tmp_path: Path,
) -> None:
    audit, engine = tmp_path / "audit", kit.FakeEngine()

    async with service(
        engine, rate_limit=0.001, rate_burst=1, audit_log=str(audit)
    ) as running:
        for number in range(2):
            await running.ask("POST", URL, ASK, x_request_id=f"id-{number}")
        first, second = lines_of(audit)
        assert (first["status"], second["status"]) == (200, 429)
        assert (second["id"], second["code"]) == ("id-1", "rate_limit_exceeded")
        limits = running.service.connections.limits
        running.service.connections.limits = dataclasses.replace(
            limits, max_connections=0
        )
        reply = kit.parse_reply(await running.exchange(b""))
        line = lines_of(audit)[-1]
        assert (line["status"], line["code"]) == (503, "too_many_connections")
        assert line["id"] == reply.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/health", "/ping", "/ready", "/metrics"])
async def test_a_probe_is_counted_apart_has_no_span_and_no_line_while_all_is_well(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "embellama_http_request_seconds_count"
    spans: list[es.RequestSpan] = []
    tracer = types.SimpleNamespace(record=spans.append)

    async with service() as running:
        monkeypatch.setattr(running.service.connections.app, "_tracer", tracer)

        def counts() -> tuple[str, ...]:
            page = running.service.telemetry.exposition()
            return tuple(line.split()[1] for line in page.split("\n") if name in line)

        running.server.log.set_level("info")
        running.log.truncate(0)
        for method in ("GET", "HEAD"):
            assert (await running.ask(method, path)).status == 200
        assert counts() == ("0", "2")
        assert "path=" not in running.log.getvalue()
        assert (await running.ask("POST", path)).status == 405  # somebody's mistake
        assert f"path={path} status=405" in running.log.getvalue()
        assert (await running.ask("GET", "/")).status == 200
        assert "path=/ status=200" in running.log.getvalue()
        assert [span.path for span in spans] == ["/"]
        running.server.log.set_level("debug")
        assert (await running.ask("GET", path)).status == 200
        assert f"path={path} status=200" in running.log.getvalue()


async def test_what_its_body_condemns_is_audited(tmp_path: Path) -> None:
    audit = tmp_path / "audit"

    async with service(
        api_key_file=key_file(tmp_path), audit_log=str(audit)
    ) as running:
        await running.ask("POST", URL, b"{", **bearer(PLAIN))
        await embed(running, PLAIN, model="gpt-9")
        found = [(line["key"], line["status"]) for line in lines_of(audit)]
        assert found == [("search", 400), ("search", 404)]


async def test_a_log_that_was_moved_is_begun_again_whatever_comes_of_the_reload(
    tmp_path: Path,
) -> None:
    audit = tmp_path / "audit"

    async with service(audit_log=str(audit), drain_grace_s=600.0) as running:
        server = running.server
        running.configuration.now = es.BadSetting("file", "port", 0, "no")
        for phase in ("ready", "leaving"):
            assert server.service.phase.value == phase
            audit.rename(tmp_path / phase)
            server._on_hangup()
            await running.ask("GET", "/v1/models")
            assert len(lines_of(audit)) == 1
            server.leave()
        assert "not reloaded" in running.log.getvalue()


async def test_a_client_that_leaves_is_audited_with_499(tmp_path: Path) -> None:
    audit, engine = tmp_path / "audit", kit.FakeEngine()
    engine.block()

    path = key_file(tmp_path)
    async with service(engine, api_key_file=path, audit_log=str(audit)) as running:
        body = json.dumps(ASK).encode()
        presented = f"authorization: Bearer {PLAIN}\r\nx-request-id: mine"
        _, writer = await asyncio.open_connection(running.host, running.port)
        writer.write(raw_post(len(body), presented) + body)
        await asyncio.to_thread(engine.wait_until_computing)
        sock = writer.get_extra_info("socket")  # who only closes may still read
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        async with asyncio.timeout(kit.DEADLINE_S):
            while not lines_of(audit):
                await asyncio.sleep(0.01)
        engine.release()
        assert (await embed(running, PLAIN)).status == 200
        found = [(line["key"], line["status"]) for line in lines_of(audit)]
        assert found == [("search", 499), ("search", 200)]
        assert lines_of(audit)[0]["id"] == "mine"
        lines = running.log.getvalue().splitlines()
        left = next(line for line in lines if "status=499" in line)
        assert " id=mine " in left


async def test_wrong_keys_are_a_line_a_second_with_the_last_address(
    tmp_path: Path,
) -> None:
    async with service(api_key_file=key_file(tmp_path)) as running:
        app = running.service.connections.app
        error = es.Unauthorized("this key is not known here")
        told: list[str] = []
        for count in (1, 8, 0, 50):  # of each second
            for number in range(count):
                assert (
                    app.refuse(error, head(), kit.direct(f"192.0.2.{number}")).status
                    == 401
                )
            assert refused_lines(running) == told
            running.server._tick()
            lines = refused_lines(running)
            assert lines[: len(told)] == told
            new, told = lines[len(told) :], lines
            assert len(new) == bool(count)
            for line in new:
                assert " warning " in line
                assert f"invalid_api_key={count} " in line
                assert "this key is not known here" in line
                assert line.endswith(f"address=192.0.2.{count - 1}")
        assert "code=invalid_api_key" not in running.log.getvalue()


async def test_the_line_of_refusals_comes_by_itself(tmp_path: Path) -> None:
    async with service(api_key_file=key_file(tmp_path)) as running:
        asked = running.ask("DELETE", "/admin/cache", **bearer(WRONG))
        assert (await asked).status == 401
        async with asyncio.timeout(kit.DEADLINE_S):
            while not refused_lines(running):
                await asyncio.sleep(0.01)


async def test_what_else_is_refused_has_a_line_with_its_address() -> None:
    async with service() as running:
        assert (await running.ask("GET", "/nothing")).status == 404
        lines = running.log.getvalue().splitlines()
        found = next(line for line in lines if "code=unknown_url" in line)
        assert "address=127.0.0.1" in found


@pytest.mark.parametrize("how", ["disk", "death"])
def test_a_line_that_was_cut_takes_no_other_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path, write, room = tmp_path / "audit", os.write, 60

    def short(file: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(file, data[:room])
        room -= written
        return written

    file = es.LineFile(str(path), kit.quiet_log())
    monkeypatch.setattr(os, "write", short)
    for number in range(5):  # of each line some 40 bytes
        file.write(id=number, text="a" * 10)
    assert file.lost == 4
    room = 1 << 20
    if how == "death":
        file = es.LineFile(str(path), kit.quiet_log())
    file.write(id=5)
    file.write(id=6)
    first, cut, *others = path.read_bytes().splitlines()
    assert json.loads(first)["id"] == 0
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut)
    assert [json.loads(line)["id"] for line in others] == [5, 6]
    before = file.lost
    file.reopen()
    file.write(id=7)
    assert (len(path.read_bytes().splitlines()), file.lost) == (5, before)
    assert not os.get_inheritable(file._file)


def test_an_audit_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(es.StartupError, match="cannot be written"):
        es.LineFile(str(tmp_path), kit.quiet_log())


async def test_the_log_names_the_key_and_never_shows_it(tmp_path: Path) -> None:
    async with service(api_key_file=key_file(tmp_path), log_level="debug") as running:
        await embed(running, PLAIN)
        assert "key=search" in running.log.getvalue()
        for key in (PLAIN, WRONG):  # service() looks for them
            await running.ask("GET", "/v1/models", x_api_key=key)
            await running.ask("GET", "/v1/models", authorization=f"Basic {key}")
            await running.ask("GET", "/nothing", authorization=f"Bearer {key}")
            await running.ask("GET", f"/v1/models?key={key}", x_api_key=key)


# --- a key file that is replaced ---


async def test_a_replaced_key_file_counts_from_the_next_tick(tmp_path: Path) -> None:
    path = Path(key_file(tmp_path))

    async with service(api_key_file=str(path)) as running:
        assert (await embed(running, WRONG)).status == 401
        new = tmp_path / "new"
        new.write_text(f"newcomer {WRONG}\n", encoding="ascii")
        new.chmod(0o600)
        new.replace(path)
        running.server._tick()
        assert (await embed(running, WRONG)).status == 200
        assert (await embed(running, PLAIN)).status == 401
        assert "keys and certificates read again" in running.log.getvalue()


BROKEN: dict[str, bytes | None] = {
    "empty": b"",
    "a bad line": f"search {PLAIN} nonsense\n".encode(),
    "binary": b"\xff" + PLAIN.encode(),
    "gone": None,
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_key_file_is_not_used_and_is_logged_once(
    tmp_path: Path, name: str
) -> None:
    path, content = Path(key_file(tmp_path)), BROKEN[name]

    async with service(api_key_file=str(path)) as running:
        path.unlink() if content is None else path.write_bytes(content)
        for _ in range(3):
            running.server._tick()
        for key, status in ((PLAIN, 200), (WRONG, 401), ("", 401)):
            assert (await embed(running, key)).status == status
        assert running.log.getvalue().count("changed file not used") == 1
        key_file(tmp_path)
        running.server._tick()
        assert "keys and certificates read again" in running.log.getvalue()


async def test_a_key_file_that_is_opened_to_others_is_noticed(tmp_path: Path) -> None:
    path = Path(key_file(tmp_path))

    async with service(api_key_file=str(path)) as running:
        path.chmod(0o666)
        running.server._tick()
        assert "changed file not used" in running.log.getvalue()


def test_a_new_file_does_not_fill_the_buckets_again(tmp_path: Path) -> None:
    path = key_file(tmp_path, search="rate=0.01 burst=1")
    gatekeeper, asked = gate(api_key_file=path), head(**bearer(PLAIN))
    gatekeeper.admit(asked, kit.direct(""), "key")
    key_file(tmp_path, search="rate=0.01 burst=1 # changed")
    gatekeeper.renew(kit.settings(api_key_file=path))
    with pytest.raises(es.RateLimited):
        gatekeeper.admit(asked, kit.direct(""), "key")


@pytest.mark.parametrize(
    "changes",
    [{"api_key": "short"}, {"api_key_file": os.devnull}, {"api_key_file": "/missing"}],
    ids=str,
)
def test_keys_that_are_no_use_are_a_sentence_at_the_start(
    changes: dict[str, Any],
) -> None:
    with pytest.raises(es.StartupError):
        gate(**changes)


# --- the real client ---


@pytest.fixture(scope="module")
def server() -> Iterator[kit.Server]:
    """The program with a key in its environment, for three requests at once."""
    limits = ("--rate-limit", "0.001", "--rate-burst", "3")
    with kit.started(*limits, environment={"EMBELLAMA_API_KEY": PLAIN}) as running:
        yield running
        assert not any(PLAIN in line or WRONG in line for line in running.log)


def client(server: kit.Server, key: str) -> openai.OpenAI:
    """A client that does not retry."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def test_the_openai_client_is_let_in_refused_and_told_to_wait(
    server: kit.Server,
) -> None:
    with client(server, WRONG) as made, pytest.raises(openai.AuthenticationError) as no:
        made.embeddings.create(model="fake", input="a")
    assert no.value.code == "invalid_api_key"
    with client(server, PLAIN) as made:
        for _ in range(3):
            assert len(made.embeddings.create(model="fake", input="a").data) == 1
        with pytest.raises(openai.RateLimitError) as later:
            made.embeddings.create(model="fake", input="a")
    assert later.value.code == "rate_limit_exceeded"
    assert later.value.response.headers["x-should-retry"] == "true"


def test_the_key_is_not_in_the_command_line(server: kit.Server) -> None:
    assert isinstance(server.process.args, list)
    digest = hashlib.sha256(PLAIN.encode()).hexdigest()
    assert not any(PLAIN in arg or digest in arg for arg in server.process.args)
