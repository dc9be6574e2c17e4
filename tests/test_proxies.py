"""Room PROXIES: which client a trusted proxy speaks for, and what that changes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import embellama_server as es
from tests import kit
from tests.kit import RunningService

TRUSTED = ("127.0.0.1", "10.0.0.0/8", "2001:db8:aa::/48", "unix")
LISTED = ("127.0.0.1", "10.1.2.3", "::ffff:10.9.9.9", "2001:db8:aa::1", es.UNIX_PEER)
UNLISTED = ("192.0.2.1", "::1", "2001:db8:ab::1", "::ffff:192.0.2.1", "")
CLIENT = "203.0.113.7"
URL = "/v1/embeddings"


def head(*fields: tuple[str, str]) -> es.Head:
    """A request's head, with these fields."""
    return es.Head("GET", "/", "", 1, fields, 0, "localhost")


def sender(peer: str, *fields: tuple[str, str]) -> es.Sender:
    """Who is found behind a peer."""
    return es.sender_of(head(*fields), peer, TRUSTED)


# X-Forwarded-For as it comes, in lines; the client, or "" for the peer.
FORWARDED_FOR: list[tuple[tuple[str, ...], str]] = [
    ((), ""),
    (("",), ""),
    ((" ",), ""),
    ((CLIENT,), CLIENT),
    ((f"  {CLIENT}\t",), CLIENT),
    ((f"{CLIENT}:54321",), CLIENT),
    ((f"6.6.6.6, {CLIENT}",), CLIENT),
    ((f"6.6.6.6,{CLIENT}",), CLIENT),
    ((f"{CLIENT}, 10.0.0.1",), CLIENT),
    ((f"6.6.6.6, {CLIENT}, 10.0.0.1, 127.0.0.1",), CLIENT),
    ((f"nonsense, {CLIENT}",), CLIENT),
    ((f'"{CLIENT}, {CLIENT}',), CLIENT),
    ((f", , {CLIENT}",), CLIENT),
    (("6.6.6.6", CLIENT), CLIENT),
    (("6.6.6.6", CLIENT, "10.0.0.1"), CLIENT),
    (("127.0.0.1",), ""),
    (("10.0.0.1, 10.0.0.2",), ""),
    ((f"{CLIENT}, nonsense",), ""),
    ((f"{CLIENT},",), ""),
    ((f"{CLIENT}, ",), ""),
    ((f"{CLIENT}, unknown",), ""),
    ((f"{CLIENT}, unix:",), ""),
    ((f"{CLIENT}, _hidden, 10.0.0.1",), ""),
    (("*",), ""),
    (("203.0.113.7/32",), ""),
    (("203.0.113.07",), ""),
    (("203.0.113.256",), ""),
    (("203.0.113",), ""),
    (("0xcb.0.113.7",), ""),
    (("3405803783",), ""),
    (("203.0.113.7:",), ""),
    (("203.0.113.7 6.6.6.6",), ""),
    (("[203.0.113.7]",), ""),
    (("localhost",), ""),
    (("2001:db8::7",), "2001:db8::7"),
    (("2001:DB8:0::7",), "2001:db8::7"),
    (("[2001:db8::7]",), "2001:db8::7"),
    (("[2001:db8::7]:443",), "2001:db8::7"),
    (("2001:db8::7, 2001:db8:aa::1",), "2001:db8::7"),
    (("2001:db8::7, [2001:db8:aa::1]:80",), "2001:db8::7"),
    (("::ffff:203.0.113.7",), CLIENT),
    (("[::FFFF:cb00:7107]:80, ::ffff:10.0.0.1",), CLIENT),
    (("2001:db8::7::",), ""),
    (("[2001:db8::7",), ""),
    (("fe80::1%eth0",), ""),
    (("fe80::1%<script>",), ""),
    (("\u0662\u0660\u0663.0.113.7".encode().decode("latin-1"),), ""),
    # What a client writes before cannot hide what a proxy added.
    ((", ".join(["6.6.6.6"] * 500 + [CLIENT]),), CLIENT),
    (("x" * 15000 + ", " + CLIENT,), CLIENT),
    (("x" * 15000 + f",{CLIENT}", "10.0.0.1"), CLIENT),
    ((", ".join([CLIENT] + ["10.0.0.1"] * 15),), CLIENT),
    ((", ".join([CLIENT] + ["10.0.0.1"] * 16),), ""),
    ((f"{CLIENT}," + " " * 1100,), ""),
    ((CLIENT + "," + " " * 1010 + "10.0.0.1",), ""),
]


@pytest.mark.parametrize(("lines", "client"), FORWARDED_FOR)
def test_the_first_address_from_the_right_that_no_proxy_has_is_the_client(
    lines: tuple[str, ...], client: str
) -> None:
    asked = head(*(("x-forwarded-for", line) for line in lines))
    for peer in LISTED:
        assert es.sender_of(asked, peer, TRUSTED) == es.Sender(peer, client or peer)
        assert es.sender_of(asked, peer, ()) == kit.direct(peer)
    for peer in UNLISTED:
        assert es.sender_of(asked, peer, TRUSTED) == kit.direct(peer)


FORWARDED: list[tuple[tuple[str, ...], str, str]] = [
    ((f"for={CLIENT}",), CLIENT, ""),
    ((f"For={CLIENT};Proto=HTTPS",), CLIENT, "https"),
    ((f'for="{CLIENT}:80";proto=http;by=203.0.113.43',), CLIENT, "http"),
    (('for="[2001:db8::7]:4711"',), "2001:db8::7", ""),
    (('for="[2001:db8::7]:_port"; proto="https"',), "2001:db8::7", "https"),
    ((f"for=6.6.6.6, for={CLIENT}",), CLIENT, ""),
    (("for=6.6.6.6", f"for={CLIENT}"), CLIENT, ""),
    ((f"for={CLIENT};proto=https, for=10.0.0.1;proto=http",), CLIENT, "https"),
    ((f"for={CLIENT};proto=gopher",), CLIENT, ""),
    ((f"for=unknown, for={CLIENT}",), CLIENT, ""),
    ((f"for={CLIENT};host=a.example;;",), CLIENT, ""),
    ((f'for={CLIENT};host="a.example:80"',), CLIENT, ""),
    # A quote that the client opened, before what the proxy wrote.
    (('for="', f"for={CLIENT}"), CLIENT, ""),
    (('for="6.6.6.6;host="', f'for={CLIENT};host="a"'), CLIENT, ""),
    # A host with commas, which the client chose and the proxy quoted.
    ((f'for={CLIENT};host="evil,for=6.6.6.6"',), "", ""),
    ((f'for={CLIENT};host="evil,for=\\"6.6.6.6"',), "", ""),
    ((f'for={CLIENT};host="evil,for=6.6.6.6;x=\\""',), "", ""),
    ((f"for={CLIENT}, for=unknown",), "", ""),
    ((f"for={CLIENT}, for=_SEVKISEK",), "", ""),
    ((f"for={CLIENT}, proto=https",), "", ""),
    ((f"for={CLIENT},",), "", ""),
    ((f"for=6.6.6.6;for={CLIENT}",), "", ""),
    ((f"for={CLIENT};proto",), "", ""),
    ((f"for= {CLIENT}",), "", ""),
    ((CLIENT,), "", ""),
    (("for=[2001:db8::7]",), "", ""),  # it must be quoted: RFC 7239, 4
    (("for=127.0.0.1",), "", ""),
    (("x" * 15000 + f",for={CLIENT}",), CLIENT, ""),
    (("; " * 500 + "for=1.2.3.4;" + " " * 100 + "=",), "", ""),
]


@pytest.mark.parametrize(("lines", "client", "scheme"), FORWARDED)
def test_forwarded_is_read_in_the_same_way(
    lines: tuple[str, ...], client: str, scheme: str
) -> None:
    asked = head(*(("forwarded", line) for line in lines))
    for peer in LISTED:
        expected = es.Sender(peer, client or peer, scheme)
        assert es.sender_of(asked, peer, TRUSTED) == expected
    for peer in UNLISTED:
        assert es.sender_of(asked, peer, TRUSTED) == kit.direct(peer)


@pytest.mark.parametrize(
    ("both", "client"),
    [
        ((CLIENT, f"for={CLIENT}"), CLIENT),
        ((f"{CLIENT}, 10.0.0.1", f"for={CLIENT}"), CLIENT),
        ((CLIENT, "for=6.6.6.6"), ""),
        (("6.6.6.6", f"for={CLIENT}"), ""),
        ((CLIENT, "nonsense"), ""),
        (("nonsense", f"for={CLIENT}"), ""),
        ((CLIENT, "for=10.0.0.1"), ""),
        ((CLIENT, ""), CLIENT),
        (("", f"for={CLIENT}"), CLIENT),
    ],
)
def test_two_headers_that_disagree_say_nothing(
    both: tuple[str, str], client: str
) -> None:
    found = sender("10.0.0.1", ("x-forwarded-for", both[0]), ("forwarded", both[1]))
    assert found == es.Sender("10.0.0.1", client or "10.0.0.1")


@pytest.mark.parametrize(
    ("said", "scheme"),
    [
        (("https",), "https"),
        (("HTTP",), "http"),
        (("http, https",), "https"),
        (("https", "http"), "http"),
        (("https,",), ""),
        (("wss",), ""),
        ((), ""),
    ],
)
def test_the_scheme_is_what_the_nearest_proxy_says(
    said: tuple[str, ...], scheme: str
) -> None:
    fields = [("x-forwarded-proto", line) for line in said]
    forwarded = ("x-forwarded-for", CLIENT)
    assert sender("10.0.0.1", forwarded, *fields).scheme == scheme
    assert sender("192.0.2.1", forwarded, *fields).scheme == ""
    assert sender("10.0.0.1", *fields).scheme == ""  # nobody is passed on


# --- whatever the header ---

PIECES = st.sampled_from(
    [
        *(CLIENT, "6.6.6.6", "10.0.0.1", "127.0.0.1", "2001:db8::7", "[2001:db8::7]:1"),
        *(
            "unknown",
            "",
            " ",
            ",",
            ", ",
            '"',
            "\\",
            ";",
            "for=",
            "proto=https",
            "=",
            ":",
        ),
        *("::ffff:1.2.3.4", "2001:db8:aa::1", "1.2.3.4:5", "\xff", "unix", "%eth0"),
    ]
)
FIELDS = st.one_of(
    st.lists(PIECES, max_size=30).map("".join),
    st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=60),
)
LINES = st.lists(
    st.tuples(st.sampled_from(["x-forwarded-for", "forwarded"]), FIELDS), max_size=4
)


def plain(text: str) -> Any:
    """The address in a text that names one, read without the room's own patterns."""
    text = text.strip(" \t").strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(text)
        return getattr(address, "ipv4_mapped", None) or address
    return None


def rightmost(entries: list[str]) -> Any:
    """The rightmost address that is of no listed proxy."""
    networks = [ipaddress.ip_network(one) for one in TRUSTED if one != "unix"]
    for address in map(plain, reversed(entries)):
        if address is None:
            return None
        if not any(address in network for network in networks):
            return address
    return None


@given(lines=LINES, peer=st.sampled_from([*LISTED, *UNLISTED]))
@example(lines=[("x-forwarded-for", f"6.6.6.6, {CLIENT}")], peer="10.1.2.3")
@example(lines=[("forwarded", f'for="[{CLIENT}]"')], peer="10.1.2.3")
def test_whatever_the_header_it_is_the_peer_or_the_rightmost_untrusted_entry(
    lines: list[tuple[str, str]], peer: str
) -> None:
    found = es.sender_of(head(*lines), peer, TRUSTED)
    assert found.peer == peer
    if found.address == peer:
        return
    assert peer in LISTED
    es.network_of(found.address)
    entries: dict[str, list[str]] = {"x-forwarded-for": [], "forwarded": []}
    for name, text in lines:
        entries[name] += text.split(",")
    # Of an element of Forwarded, the value of "for".
    entries["forwarded"] = [
        next(
            (p.strip()[4:] for p in e.split(";") if p.strip()[:4].lower() == "for="), ""
        )
        for e in entries["forwarded"]
    ]
    assert found.address in map(str, map(rightmost, entries.values()))


@given(lines=LINES)
def test_what_a_client_writes_does_not_change_what_its_proxy_adds(
    lines: list[tuple[str, str]],
) -> None:
    one = [line for line in lines if line[0] == "x-forwarded-for"]
    added = ("x-forwarded-for", CLIENT)
    assert es.sender_of(head(*one, added), "10.0.0.1", TRUSTED).address == CLIENT
    # With the other header, too, it gets no address of its choice.
    found = es.sender_of(head(*lines, added), "10.0.0.1", TRUSTED).address
    assert found in (CLIENT, "10.0.0.1")


# --- the setting ---


@pytest.mark.parametrize(
    "text",
    [
        *("*", "", "0.0.0.0/0", "::/0", "::ffff:0:0/96", "::ffff:1.2.3.4/90"),
        *(
            "10.0.0.1/8",
            "10.0.0.0/33",
            "10.0.0.256",
            "2001:db8::/129",
            "2001:db8::1/64",
        ),
        *("localhost", "10.0.0.0/255.0.0.0", "1.2.3.4:80", "[::1]", "unix:", "UNIX"),
        "fe80::1%eth0",
    ],
)
def test_what_is_no_network_or_is_all_of_them_is_refused(text: str) -> None:
    with pytest.raises(es.BadSetting, match="trusted_proxy"):
        es.load_settings({"trusted_proxy": [text]}, {})


def test_the_networks_may_come_in_one_variable() -> None:
    variables = {"EMBELLAMA_TRUSTED_PROXY": "10.0.0.0/8, ::ffff:192.0.2.0/120,::1,unix"}
    trusted = es.load_settings({}, variables).settings.trusted_proxy
    assert trusted == ("10.0.0.0/8", "::ffff:192.0.2.0/120", "::1", "unix")
    for peer in ("10.0.0.9", "192.0.2.8", "::ffff:192.0.2.8", "::1", es.UNIX_PEER):
        assert es.is_trusted(peer, trusted)
        assert not es.is_trusted(peer, ())
    for peer in ("11.0.0.9", "192.0.3.8", "::2", "fe80::1%eth0", ""):
        assert not es.is_trusted(peer, trusted)
    assert es.is_trusted("fe80::1%eth0", ("fe80::/10",))


# --- what it changes ---


@contextlib.asynccontextmanager
async def behind(*trusted: str, **changes: Any) -> AsyncIterator[RunningService]:
    """A service that trusts these."""
    async with kit.running_service(trusted_proxy=trusted, **changes) as running:
        yield running


async def embed(running: RunningService, client: str, **fields: str) -> kit.Reply:
    """A request for a vector that the loopback passes on for this client."""
    fields = {"x_forwarded_for": client, **fields}
    return await running.ask("POST", URL, {"input": "a"}, **fields)


async def test_two_clients_behind_one_proxy_have_rates_and_audit_lines_of_their_own(
    tmp_path: Path,
) -> None:
    audit = tmp_path / "audit"
    limits = {"rate_limit": 0.01, "rate_burst": 1, "audit_log": str(audit)}
    async with behind("127.0.0.1", **limits) as running:
        for client in ("203.0.113.1", "203.0.113.2"):
            assert (await embed(running, f"6.6.6.6, {client}")).status == 200
            assert (await embed(running, f"7.7.7.7, {client}")).status == 429
        # An IPv6 client is its /64.
        assert (await embed(running, "2001:db8::1")).status == 200
        assert (await embed(running, "[2001:db8::2]:80")).status == 429
        running.server._tick()
        assert "address=2001:db8::2" in running.log.getvalue()
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    found = [(line["address"], line["status"]) for line in lines]
    assert found == [
        *(("203.0.113.1", 200), ("203.0.113.1", 429)),
        *(("203.0.113.2", 200), ("203.0.113.2", 429)),
        *(("2001:db8::1", 200), ("2001:db8::2", 429)),
    ]


class Spans:
    """In place of a tracer."""

    def __init__(self) -> None:
        self.seen: list[es.RequestSpan] = []
        self.record = self.seen.append


async def test_a_span_says_which_client_it_was_and_what_that_spoke() -> None:
    async with behind("10.0.0.1") as running:
        spans: Any = Spans()
        app = es.Dispatcher(running.service, kit.quiet_log(), None, spans)
        for peer in ("10.0.0.1", "10.0.0.2"):
            fields = (("x-forwarded-for", CLIENT), ("x-forwarded-proto", "https"))
            asked = es.Head("GET", "/v1/models", "", 1, fields)
            sender = es.sender_of(asked, peer, running.service.settings.trusted_proxy)
            room = es.Reservation(running.service.connections)
            request = es.Request(asked, b"")
            reply = await app.respond(request, app.admit(asked, sender), room)
            assert reply.status == 200
        found = [(span.client, span.scheme) for span in spans.seen]
        assert found == [(CLIENT, "https"), ("10.0.0.2", "http")]


@pytest.mark.parametrize("trusted", [(), ("10.0.0.0/8",), ("unix",), ("::1",)])
async def test_a_header_from_an_unlisted_peer_changes_nothing(
    tmp_path: Path, trusted: tuple[str, ...]
) -> None:
    audit = tmp_path / "audit"
    limits = {"rate_limit": 0.01, "rate_burst": 1, "audit_log": str(audit)}
    async with behind(*trusted, **limits) as running:
        statuses = [(await embed(running, f"203.0.113.{n}")).status for n in (1, 2)]
        assert statuses == [200, 429]
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [line["address"] for line in lines] == ["127.0.0.1", "127.0.0.1"]


async def test_who_is_trusted_changes_with_a_reload() -> None:
    async with behind(rate_limit=0.01, rate_burst=1) as running:
        assert (await embed(running, "203.0.113.1")).status == 200
        assert (await embed(running, "203.0.113.2")).status == 429
        running.configuration.now = dataclasses.replace(
            running.service.settings, trusted_proxy=("127.0.0.0/8",)
        )
        await running.server._reload()
        assert (await embed(running, "203.0.113.2")).status == 200
        assert (await embed(running, "203.0.113.2")).status == 429


ADMIN = [route for route in es.ROUTES if route.access == "admin"]
PASSED_ON = [
    {"x_forwarded_for": "127.0.0.1"},
    {"x_forwarded_for": "::1"},
    {"x_forwarded_for": "unix"},
    {"x_forwarded_for": CLIENT},
    {"forwarded": "for=127.0.0.1;host=localhost"},
    {"x_real_ip": "127.0.0.1"},
    {},
]


@pytest.mark.parametrize("trusted", [(), ("127.0.0.1",), ("unix",)])
@pytest.mark.parametrize("fields", PASSED_ON)
async def test_through_a_proxy_of_this_machine_nobody_administers_without_the_key(
    fields: dict[str, str], trusted: tuple[str, ...]
) -> None:
    async with behind(*trusted) as running:
        for route in ADMIN:
            reply = await running.ask(
                route.method,
                kit.path_of(route),
                kit.body_of(route),
                authorization="",
                **fields,
            )
            assert (reply.status, reply.error["code"]) == (403, "admin_only")
        assert (await running.ask("GET", "/admin/models")).status == 200


def test_a_unix_socket_that_is_a_proxy_s_opens_nothing_without_a_key() -> None:
    for route in ADMIN:
        asked = es.Head(route.method, kit.path_of(route), "", 1)
        for trusted, is_open in ((), True), (("10.0.0.0/8",), True), (("unix",), False):
            gate = es.Gate(kit.settings(trusted_proxy=trusted), kit.quiet_log())
            refused = pytest.raises(es.AdminOnly, match="--trusted-proxy unix")
            with contextlib.nullcontext() if is_open else refused:
                gate.admit(asked, kit.direct(es.UNIX_PEER), "admin")


def test_a_browser_of_this_machine_behind_a_proxy_on_the_unix_socket_is_one_too() -> (
    None
):
    gate = es.Gate(kit.settings(trusted_proxy=("unix",)), kit.quiet_log())
    asked = es.Head("GET", "/", "", 1, (), 0, "evil.example")
    for client in (CLIENT, es.UNIX_PEER):
        assert gate.admit(asked, es.Sender(es.UNIX_PEER, client), "key")
    with pytest.raises(es.HostNotAllowed):
        gate.admit(asked, es.Sender(es.UNIX_PEER, "127.0.0.1"), "key")


@pytest.mark.parametrize(
    ("trusted", "client", "is_admitted"),
    [
        ((), CLIENT, False),  # as if nothing was said
        (("10.0.0.0/8",), CLIENT, False),
        (("127.0.0.1",), CLIENT, True),  # it is another machine's name for us
        (("127.0.0.1",), "127.0.0.1", False),  # a browser of this machine
        (("127.0.0.1",), "nonsense", False),
        (("127.0.0.1",), "::1", False),
        (("127.0.0.1",), "127.1.1.1", False),
    ],
)
async def test_a_stranger_s_host_is_refused_only_to_who_is_on_this_machine(
    trusted: tuple[str, ...], client: str, *, is_admitted: bool
) -> None:
    async with behind(*trusted) as running:
        reply = await embed(running, client, host="embed.example.com")
        assert reply.status == (200 if is_admitted else 403)


async def test_who_is_behind_a_proxy_of_this_machine_gets_compressed_replies() -> None:
    async with behind("127.0.0.1") as running:
        ask = {"input": ["a"] * 100}
        for client, coding in ((CLIENT, "gzip"), ("127.0.0.1", None)):
            fields = {"x_forwarded_for": client, "accept_encoding": "gzip"}
            reply = await running.ask("POST", URL, ask, **fields)
            assert reply.headers.get("content-encoding") == coding


async def test_a_key_s_rate_is_the_key_s_whoever_passes_it_on() -> None:
    async with behind(
        "127.0.0.1", api_key="k" * 20, rate_limit=0.01, rate_burst=1
    ) as r:
        key = {"authorization": "Bearer " + "k" * 20}
        assert (await embed(r, "203.0.113.1", **key)).status == 200
        assert (await embed(r, "203.0.113.2", **key)).status == 429


# --- connections ---


class Kept:
    """A connection that is kept, as proxies keep theirs."""

    def __init__(self, running: RunningService) -> None:
        self._running = running
        self._sent = 0

    async def __aenter__(self) -> Self:
        opened = asyncio.open_connection(self._running.host, self._running.port)
        self._reader, self._writer = await opened
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.transport.abort()  # closing would take its second

    def send(self, client: str, word: str = "a") -> None:
        """Ask for a vector."""
        body = json.dumps({"input": word}).encode()
        lines = (
            f"POST {URL} HTTP/1.1\r\nhost: localhost\r\nx-forwarded-for: {client}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self._writer.write(lines.encode() + body)

    async def reply(self) -> kit.Reply:
        """The next reply."""
        async with asyncio.timeout(kit.DEADLINE_S):
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0])
            return kit.parse_reply(head + await self._reader.readexactly(length))


async def test_a_proxy_s_connections_count_for_the_client_that_each_asks_for() -> None:
    engine = kit.FakeEngine()
    made = kit.running_service(
        engine, trusted_proxy=("127.0.0.1",), max_connections_per_address=2
    )
    async with made as running, contextlib.AsyncExitStack() as stack:
        counted = running.service.connections.per_address
        kept = [await stack.enter_async_context(Kept(running)) for _ in range(5)]
        for one in kept:  # more than 2 of the proxy's
            one.send("203.0.113.9")
            assert (await one.reply()).status == 200
        assert counted == {"127.0.0.1": 5}
        engine.block()
        for one, client in zip(kept, (1, 1, 1, 2, 3), strict=True):
            one.send(f"203.0.113.{client}", f"w{client}")
            if one is kept[2]:
                refused = await one.reply()
                assert refused.status == 503
                assert refused.error["code"] == "too_many_connections"
                assert "--max-connections-per-address" in refused.error["message"]
                assert "retry-after" in refused.headers
        await asyncio.to_thread(engine.wait_until_computing)
        async with asyncio.timeout(kit.DEADLINE_S):
            while len(counted) < 4:
                await asyncio.sleep(0.001)
        assert counted == {
            "127.0.0.1": 1,
            "203.0.113.1": 2,
            "203.0.113.2": 1,
            "203.0.113.3": 1,
        }
        engine.release()
        for one in (*kept[:2], *kept[3:]):
            assert (await one.reply()).status == 200
        assert counted == {"127.0.0.1": 5}
        # Its refused one goes on, for whom there is room.
        kept[2].send("203.0.113.1")
        assert (await kept[2].reply()).status == 200
    assert running.service.connections.places == 0
    assert not counted


async def test_a_client_in_the_network_of_its_proxy_is_not_counted_with_it() -> None:
    limits = kit.settings(max_connections_per_address=2, trusted_proxy=("fd00::1",))
    capacity = es.Capacity(limits=limits, loop=asyncio.get_running_loop())
    slots = [es.Slot(capacity, "fd00::1") for _ in range(3)]
    head = es.Head("GET", "/", "", 1, headers=(("x-forwarded-for", "fd00::2"),))
    for slot in slots:
        slot.take()
    for _ in range(2):
        for slot in slots[:2]:
            slot.find_sender(head)
        with pytest.raises(es.TooManyConnections):
            slots[2].find_sender(head)
        assert capacity.per_address == {"fd00::1": 1, "fd00::/64": 2}
        for slot in slots:
            slot.forget_sender()
        assert capacity.per_address == {"fd00::1": 3}
    for slot in slots:
        slot.free()
    assert not capacity.per_address


async def test_a_client_that_leaves_behind_its_proxy_takes_its_count_along() -> None:
    engine = kit.FakeEngine()
    async with kit.running_service(engine, trusted_proxy=("127.0.0.1",)) as running:
        counted = running.service.connections.per_address
        engine.block()
        async with Kept(running) as one:
            one.send(CLIENT)
            await asyncio.to_thread(engine.wait_until_computing)
            assert counted == {CLIENT: 1}
        async with asyncio.timeout(kit.DEADLINE_S):
            while counted:
                await asyncio.sleep(0.001)
        engine.release()
