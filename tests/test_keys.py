"""Room KEYS: the key file, keys that are presented, and requests that are signed."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import gc
import hashlib
import hmac
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import embellama_server as es
from tests import kit

KEY, OTHER = "key-of-alice-0123456789", "key-of-bob-9876543210"
NOW = 1_800_000_000.0  # Unix time of the pure tests
URL = "/v1/embeddings"


def hex_of(data: str | bytes) -> str:
    """The hex SHA-256."""
    raw = data.encode() if isinstance(data, str) else data
    return hashlib.sha256(raw).hexdigest()


def head(
    method: str = "GET", path: str = "/", query: str = "", **headers: str
) -> es.Head:
    """A request's head, with these headers."""
    named = tuple((k.replace("_", "-"), v) for k, v in headers.items())
    return es.Head(method, path, query, 1, named, 0)


def key_file(folder: Path, *lines: str | bytes, mode: int = 0o600) -> str:
    """A key file of these lines."""
    path = folder / "keys"
    raw = [line.encode() if isinstance(line, str) else line for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    path.chmod(mode)
    return str(path)


def keys_of(
    api_key: str, path: str, *, window_s: float = 300.0, since: float = 0.0
) -> es.KeyRing:
    """The keys of these settings."""
    settings = kit.settings(
        api_key=api_key, api_key_file=path, signature_window_s=window_s
    )
    return es.keys_of(settings, es.PRIORITIES, since=since)


def ring(folder: Path, *lines: str, window_s: float = 300.0) -> es.KeyRing:
    """The keys of a file of these lines."""
    path = key_file(folder, *lines)
    return keys_of("", path, window_s=window_s)


def only_key(folder: Path, line: str, key: str = KEY) -> es.Key:
    """What a line says of its key."""
    return ring(folder, line).holder(head(x_api_key=key), NOW)


def refusal(call: Callable[..., object], *arguments: object) -> es.Unauthorized:
    """The 401 that a call ends in; asserts that it is a whole one."""
    with pytest.raises(es.Unauthorized) as caught:
        call(*arguments)
    assert dict(caught.value.headers)["www-authenticate"]
    return caught.value


# --- the key file ---


def test_a_file_has_a_key_a_line_and_comments_and_empty_lines(tmp_path: Path) -> None:
    lines = ("# all of them", "", f"  alice\t{KEY}  # hers", "   ", f"bob {OTHER}")
    keys = ring(tmp_path, *lines)
    assert len(keys) == 2
    assert keys.holder(head(x_api_key=KEY), NOW).name == "alice"
    assert keys.holder(head(x_api_key=OTHER), NOW).name == "bob"


def test_a_key_may_be_given_as_its_checksum(tmp_path: Path) -> None:
    for digest in (hex_of(KEY), hex_of(KEY).upper()):
        assert only_key(tmp_path, f"alice sha256:{digest}").name == "alice"


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("", {}),
        ("admin", {"is_admin": True}),
        ("rate=2.5", {"allowed": es.Allowance(2.5)}),
        ("rate=0.001", {"allowed": es.Allowance(0.001)}),
        ("burst=7", {"allowed": es.Allowance(burst=7)}),
        ("tokens=60000", {"allowed": es.Allowance(tokens_per_min=60000)}),
        ("priority=low", {"max_priority": 2}),
        ("rate=1 burst=2 admin", {"allowed": es.Allowance(1.0, 2), "is_admin": True}),
    ],
)
def test_options_say_what_a_key_may(
    tmp_path: Path, option: str, changes: dict[str, Any]
) -> None:
    found = only_key(tmp_path, f"alice {KEY} {option}")
    plain = es.Key("alice", hashlib.sha256(KEY.encode()).digest())
    assert found == dataclasses.replace(plain, **changes)


def test_a_key_is_good_to_the_end_of_its_last_day(tmp_path: Path) -> None:
    day = datetime.datetime(2026, 3, 5)
    keys = ring(tmp_path, f"alice {KEY} not_after=2026-03-05")
    last, late = day.replace(hour=23, minute=59), day + datetime.timedelta(days=1.1)
    assert keys.holder(head(x_api_key=KEY), last.timestamp()).name == "alice"
    error = refusal(keys.holder, head(x_api_key=KEY), late.timestamp())
    assert "expired" in error.message


BAD_LINES: dict[str, tuple[str, str]] = {
    # what is wrong: the line, a part of the message
    "no key": ("alice", "NAME KEY"),
    "a name with a slash": (f"al/ice {KEY}", "NAME KEY"),
    "a name of 65 letters": (f"{'a' * 65} {KEY}", "NAME KEY"),
    "a name that is not ASCII": (f"\u00e4lice {KEY}", "NAME KEY"),
    "a short key": ("alice 1234567", "8 to 512"),
    "a long key": (f"alice {'k' * 513}", "8 to 512"),
    "a key that no header carries": ("alice k\u00e9yk\u00e9yk\u00e9y", "8 to 512"),
    "a short checksum": (f"alice sha256:{'0' * 63}", "64 hexadecimal"),
    "a checksum of other letters": (f"alice sha256:{'g' * 64}", "64 hexadecimal"),
    "an unknown option": (f"alice {KEY} quota=3", "word 3 "),
    "an unknown option after known ones": (f"alice {KEY} admin rate=1 x", "word 5 "),
    "an unknown priority": (f"alice {KEY} priority=urgent", "word 3 "),
    "no priority": (f"alice {KEY} priority=", "word 3 "),
    "a negative rate": (f"alice {KEY} rate=-1", "word 3 "),
    "a rate of nothing": (f"alice {KEY} rate=0.000", "word 3 "),
    "no rate": (f"alice {KEY} rate=", "word 3 "),
    "an endless rate": (f"alice {KEY} rate=inf", "word 3 "),
    "a burst in words": (f"alice {KEY} burst=two", "word 3 "),
    "a burst of nothing": (f"alice {KEY} burst=0", "word 3 "),
    "half a burst": (f"alice {KEY} burst=0.5", "word 3 "),
    "half a token": (f"alice {KEY} tokens=0.5", "word 3 "),
    "an underscore in tokens": (f"alice {KEY} tokens=1_0", "word 3 "),
    "no such day": (f"alice {KEY} not_after=2026-02-30", "word 3 "),
    "a day in another form": (f"alice {KEY} not_after=05.03.2026", "word 3 "),
    "a day before all days": (f"alice {KEY} not_after=0001-01-01", "word 3 "),
    "an admin with a value": (f"alice {KEY} admin=no", "word 3 "),
    "an admin with an empty value": (f"alice {KEY} admin=", "word 3 "),
    "an option twice": (f"alice {KEY} rate=1 admin rate=2", "word 5 "),
    "another key where an option may stand": (f"alice {KEY} admin {OTHER}", "word 4 "),
    "two lines that a CR parts": (f"alice {KEY}\rcarol {OTHER}", "word 3 "),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_refused_with_file_line_and_reason(
    tmp_path: Path, name: str
) -> None:
    line, reason = BAD_LINES[name]
    with pytest.raises(es.StartupError) as caught:
        ring(tmp_path, "# keys", f"bob {OTHER}", line)
    assert str(caught.value).startswith(f"{tmp_path / 'keys'}, line 3: ")
    assert reason in str(caught.value)
    said = str(caught.value).removeprefix(str(tmp_path))
    for word in (KEY, OTHER, KEY[:8], "quota", "urgent", "\u00e9"):
        assert word not in said


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("alice abcdefgh#ijklmnop", "abcdefgh#ijklmnop"),
        ("alice #bcdefgh", ""),
        ("alice abcdefgh #ijklmnop", "abcdefgh"),
        ("alice abcdefgh\t# admin", "abcdefgh"),
        ("alice abcdefgh\r", "abcdefgh"),
        ("#alice abcdefgh", ""),
    ],
)
def test_a_comment_begins_after_white_space_only(
    tmp_path: Path, line: str, key: str
) -> None:
    if not key:
        with pytest.raises(es.StartupError):
            ring(tmp_path, line)
        return
    assert not only_key(tmp_path, line, key).is_admin
    for other in {"abcdefgh", "abcdefgh#ijklmnop"} - {key}:
        refusal(ring(tmp_path, line).holder, head(x_api_key=other), NOW)


@pytest.mark.parametrize(
    "second",
    [f"alice {OTHER}", f"bob {KEY}", f"bob sha256:{hex_of(KEY)}", f"alice {KEY}"],
    ids=["name", "value", "checksum of a value", "line"],
)
def test_what_is_given_twice_is_refused_by_name(tmp_path: Path, second: str) -> None:
    with pytest.raises(es.StartupError, match="twice") as caught:
        ring(tmp_path, f"alice {KEY}", second)
    assert repr(second.split()[0]) in str(caught.value)
    assert KEY not in str(caught.value)


def test_the_key_of_the_settings_is_an_administrator_s(tmp_path: Path) -> None:
    path = key_file(tmp_path, f"alice {OTHER}")
    keys = keys_of(KEY, path)
    default = keys.holder(head(x_api_key=KEY), NOW)
    assert (default.name, default.is_admin) == ("default", True)
    assert not keys.holder(head(x_api_key=OTHER), NOW).is_admin
    for line in (f"default {OTHER}", f"alice {KEY}"):
        with pytest.raises(es.StartupError, match="twice"):
            keys_of(KEY, key_file(tmp_path, line))


@pytest.mark.parametrize(
    "key", ["short", "with a space", "t\u00e4glich-neu", "k" * 513]
)
def test_a_key_of_the_settings_that_no_client_can_send_is_refused(key: str) -> None:
    with pytest.raises(es.StartupError, match="api_key must be") as caught:
        keys_of(key, "")
    assert key not in str(caught.value)


@pytest.mark.parametrize("lines", [(), ("# none yet", "  ")], ids=["empty", "comments"])
def test_a_file_without_a_key_does_not_open_the_door(
    tmp_path: Path, lines: tuple[str, ...]
) -> None:
    with pytest.raises(es.StartupError, match="no key in it"):
        ring(tmp_path, *lines)


@pytest.mark.parametrize("mode", [0o602, 0o606, 0o620, 0o660, 0o664, 0o777])
def test_a_file_that_others_can_change_is_refused(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, f"alice {KEY}", mode=mode)
    with pytest.raises(es.StartupError) as caught:
        keys_of("", path)
    assert str(caught.value) == (
        f"{path} is open to others (mode {mode:04o}): chmod 600 it, or 640"
    )


# 0444 is a secret of Docker, 0644 one of Kubernetes.
@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440, 0o444, 0o644, 0o604])
def test_a_file_that_only_its_owner_can_change_is_used(
    tmp_path: Path, mode: int
) -> None:
    assert len(keys_of("", key_file(tmp_path, f"alice {KEY}", mode=mode))) == 1


def test_on_a_mount_that_can_only_be_read_no_mode_lets_anybody_change_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = key_file(tmp_path, f"alice {KEY}", mode=0o777)
    found = os.statvfs(path)
    flags = found.f_flag | os.ST_RDONLY
    read_only = os.statvfs_result((*found[:8], flags, *found[9:]))
    monkeypatch.setattr(os, "fstatvfs", lambda _: read_only)
    assert len(keys_of("", path)) == 1


def test_a_file_that_cannot_be_read_is_refused_with_its_name(tmp_path: Path) -> None:
    binary = key_file(tmp_path, b"alice \xff\xfe\x00" + KEY.encode())
    missing = str(tmp_path / "missing")
    reasons = {binary: "not UTF-8", missing: "No such file"}
    for path, reason in reasons.items():
        with pytest.raises(es.StartupError, match="cannot be read") as caught:
            keys_of("", path)
        assert path in str(caught.value)
        assert reason in str(caught.value)


def test_a_file_that_is_no_plain_one_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for path in (str(tmp_path / "fifo"), os.devnull, str(tmp_path)):
        why = "(it is not a plain file|Is a directory)"
        with pytest.raises(es.StartupError, match=f"^{path} cannot be read: {why}$"):
            keys_of("", path)


def test_a_pipe_that_somebody_may_write_to_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path, 0o600)
    writer = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(es.StartupError):
            keys_of("", str(path))
    finally:
        os.close(writer)


def test_a_file_that_cannot_be_read_is_not_held_open(tmp_path: Path) -> None:
    missing, binary = tmp_path / "missing", key_file(tmp_path, b"\xff")
    before = os.listdir("/proc/self/fd")
    for path in (str(missing), binary, str(tmp_path)):
        with pytest.raises(es.StartupError):
            keys_of("", path)
    assert os.listdir("/proc/self/fd") == before


# --- keys that are presented ---


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer {KEY}"},
        {"authorization": f"BEARER   {KEY}"},
        {"x_api_key": KEY},
        {"authorization": "Basic YTpi", "x_api_key": KEY},
        {"authorization": "Bearer ", "x_api_key": KEY},
        {"authorization": f"Bearer {KEY}", "x_api_key": OTHER},
    ],
    ids=str,
)
def test_a_key_is_presented_as_bearer_or_x_api_key(
    tmp_path: Path, headers: dict[str, str]
) -> None:
    assert ring(tmp_path, f"alice {KEY}").holder(head(**headers), NOW).name == "alice"


NO_KEYS: dict[str, dict[str, str]] = {
    "nothing": {},
    "an empty header": {"authorization": ""},
    "a scheme alone": {"authorization": "Bearer"},
    "the key alone": {"authorization": KEY},
    "another scheme": {"authorization": f"Basic {KEY}"},
    "a tab after the scheme": {"authorization": f"Bearer\t{KEY}"},
    "another key": {"authorization": f"Bearer {OTHER}"},
    "part of the key": {"x_api_key": KEY[:-1]},
    "more than the key": {"x_api_key": KEY + "0"},
    "other case": {"x_api_key": KEY.upper()},
    "quotes": {"x_api_key": f'"{KEY}"'},
    "its checksum": {"x_api_key": hex_of(KEY)},
    "its checksum as in the file": {"x_api_key": f"sha256:{hex_of(KEY)}"},
    "its name": {"x_api_key": "alice"},
    "letters of Latin-1": {"x_api_key": "\xe9" * 20},
    "a wrong bearer over a right key": {
        "authorization": f"Bearer {OTHER}",
        "x_api_key": KEY,
    },
}


@pytest.mark.parametrize("name", NO_KEYS)
def test_what_is_no_known_key_is_401(tmp_path: Path, name: str) -> None:
    keys, asked = ring(tmp_path, f"alice {KEY}"), head(**NO_KEYS[name])
    error = refusal(keys.holder, asked, NOW)
    assert error.status == 401
    for presented in (KEY, OTHER):
        assert presented not in error.message


def test_two_key_fields_are_never_a_key(tmp_path: Path) -> None:
    keys = ring(tmp_path, f"alice {KEY}")
    asked = es.Head("GET", "/", "", 1, (("x-api-key", KEY), ("x-api-key", KEY)), 0)
    refusal(keys.holder, asked, NOW)


def _reachable(root: object) -> list[object]:
    """Everything that can be reached from an object, but for modules and classes."""
    seen: dict[int, object] = {}
    waiting = [root]
    while waiting:
        thing = waiting.pop()
        is_world = isinstance(thing, (type, type(gc), type(_reachable)))
        if id(thing) not in seen and not is_world:
            seen[id(thing)] = thing
            waiting += gc.get_referents(thing)
    return list(seen.values())


def test_a_key_is_nowhere_kept_in_plain(tmp_path: Path) -> None:
    path = key_file(tmp_path, f"alice {OTHER} admin")
    keys = keys_of(KEY, path)
    found = [keys.holder(head(x_api_key=key), NOW) for key in (KEY, OTHER)]
    reachable = _reachable([keys, found])
    assert found[0].digest in reachable  # the search does find what is kept
    for thing in reachable:
        text = thing.decode("latin-1") if isinstance(thing, bytes) else str(thing)
        assert KEY not in text
        assert OTHER not in text
    for key in found:
        assert repr(key.digest) not in repr(key)
        assert key.digest.hex() not in repr(key)


def test_two_rings_blind_their_keys_differently(tmp_path: Path) -> None:
    one, other = (ring(tmp_path, f"alice {KEY}") for _ in range(2))
    assert set(one._by_digest).isdisjoint(other._by_digest)


# --- requests that are signed ---


def signature(
    name: str = "alice",
    key: str = KEY,
    method: str = "POST",
    target: str = URL,
    at: float | str = NOW,
    body: bytes = b"",
) -> str:
    """The Authorization header of a request, as README tells clients to make it."""
    stamp = at if isinstance(at, str) else f"{at:.9f}".rstrip("0").rstrip(".")
    digest = hashlib.sha256(body).hexdigest()
    secret = hashlib.sha256(key.encode()).digest()
    message = f"{method}\n{target}\n{stamp}\n{digest}".encode()
    mac = hmac.new(secret, message, hashlib.sha256).hexdigest()
    return f"Signature {name} {stamp} {digest} {mac}"


def signed_head(value: str, path: str = URL, query: str = "") -> es.Head:
    """The head of a POST with this Authorization."""
    return head("POST", path, query, authorization=value)


def use(keys: es.KeyRing, value: str, now: float = NOW) -> es.Signed:
    """Let in what this Authorization signs, as the gate does."""
    signed = keys.signer(signed_head(value), now)
    keys.use_once(signed, now)
    return signed


def test_a_signature_names_its_key_and_its_body(tmp_path: Path) -> None:
    keys = ring(tmp_path, f"alice {KEY}", f"bob sha256:{hex_of(OTHER)} rate=1")
    signed = use(keys, signature(body=b"{}"))
    assert (signed.key.name, signed.body_sha256) == ("alice", hex_of(b"{}"))
    assert (signed.stamp, len(signed.mac)) == (NOW, 32)
    signed = use(keys, signature("bob", OTHER))
    assert (signed.key.name, signed.key.allowed) == ("bob", es.Allowance(1.0))


def test_decimals_of_the_time_tell_equal_requests_apart(tmp_path: Path) -> None:
    keys = ring(tmp_path, f"alice {KEY}", window_s=10)
    stamps = ("1800000000", "1800000000.0", "1800000000.00", "1800000000.999999999")
    for stamp in stamps:
        assert use(keys, signature(at=stamp)).stamp == float(stamp)
    for stamp in stamps:
        assert "used before" in refusal(use, keys, signature(at=stamp)).message
    for stamp in ("1800000010.001", "1799999989.999"):
        assert "more than" in refusal(use, keys, signature(at=stamp)).message


def test_the_query_is_part_of_what_is_signed(tmp_path: Path) -> None:
    keys = ring(tmp_path, f"alice {KEY}")
    value = signature(target=f"{URL}?a=1&b=%20")
    for query in ("", "a=1", "a=1&b= ", "b=%20&a=1"):
        refusal(keys.signer, signed_head(value, URL, query), NOW)
    assert keys.signer(signed_head(value, URL, "a=1&b=%20"), NOW)


_NAME, _STAMP, _BODY, _MAC = signature().split(" ")[1:]
BAD_SIGNATURES: dict[str, str] = {
    "another name": signature("bob"),
    "another key": signature(key=OTHER),
    "the method altered": signature(method="GET"),
    "the target altered": signature(target="/v1/models"),
    "the time altered": f"Signature {_NAME} {int(NOW) + 1} {_BODY} {_MAC}",
    "zeros before the time": f"Signature {_NAME} 00{_STAMP} {_BODY} {_MAC}",
    "the body altered": f"Signature {_NAME} {_STAMP} {hex_of('x')} {_MAC}",
    "the MAC altered": f"Signature {_NAME} {_STAMP} {_BODY} {hex_of('x')}",
    "half a MAC": f"Signature {_NAME} {_STAMP} {_BODY} {_MAC[:32]}",
    "a MAC in capitals": f"Signature {_NAME} {_STAMP} {_BODY} {_MAC.upper()}",
    "a field less": f"Signature {_NAME} {_STAMP} {_BODY}",
    "a field more": f"Signature {_NAME} {_STAMP} {_BODY} {_MAC} x",
    "two spaces": f"Signature  {_NAME} {_STAMP} {_BODY} {_MAC}",
    "a time before 1970": f"Signature {_NAME} -1 {_BODY} {_MAC}",
    "a time that is too long": f"Signature {_NAME} {'9' * 13} {_BODY} {_MAC}",
    "a point without decimals": signature(at=f"{_STAMP}."),
    "ten decimals": signature(at=f"{_STAMP}.{'0' * 10}"),
    "decimals alone": signature(at=".5"),
    "an exponent": signature(at="18e8"),
    "no number": signature(at="nan"),
    "decimals altered": f"Signature {_NAME} {_STAMP}.0 {_BODY} {_MAC}",
    "nothing": "Signature ",
}


@pytest.mark.parametrize("name", BAD_SIGNATURES)
def test_a_signature_that_does_not_hold_is_401(tmp_path: Path, name: str) -> None:
    keys = ring(tmp_path, f"alice {KEY}", "carol another-key-entirely")
    refusal(use, keys, BAD_SIGNATURES[name])
    # It has used up nothing: the right one is still good.
    assert use(keys, signature())


def test_an_unknown_name_and_a_bad_mac_are_told_the_same(tmp_path: Path) -> None:
    keys = ring(tmp_path, f"alice {KEY}")
    asked = [signature("nobody"), signature(key=OTHER), signature("nobody", key="")]
    answers = [refusal(keys.signer, signed_head(value), NOW) for value in asked]
    assert len({answer.message for answer in answers}) == 1


def test_a_name_that_is_not_there_has_no_key_of_zeros(tmp_path: Path) -> None:
    message = f"POST\n{URL}\n{_STAMP}\n{_BODY}".encode()
    mac = hmac.new(bytes(32), message, hashlib.sha256).hexdigest()
    value = f"Signature nobody {_STAMP} {_BODY} {mac}"
    refusal(ring(tmp_path, f"alice {KEY}").signer, signed_head(value), NOW)


@pytest.mark.parametrize("off_s", [-11, -10.001, -10, 0, 10, 10.001, 11])
def test_a_signature_is_good_within_the_window_on_both_sides(
    tmp_path: Path, off_s: float
) -> None:
    keys = ring(tmp_path, f"alice {KEY}", window_s=10)
    asked = signed_head(signature(at=NOW + off_s))
    if abs(off_s) <= 10:
        assert keys.signer(asked, NOW)
    else:
        assert "more than 10 s" in refusal(keys.signer, asked, NOW).message


def test_an_expired_key_signs_nothing(tmp_path: Path) -> None:
    keys = ring(tmp_path, f"alice {KEY} not_after=2020-01-01")
    refusal(keys.signer, signed_head(signature()), NOW)


@pytest.mark.parametrize(
    ("stamp_s", "is_old"), [(-1, True), (0, True), (0.001, False), (1, False)]
)
def test_what_may_have_been_signed_for_the_process_before_is_refused(
    tmp_path: Path, stamp_s: float, *, is_old: bool
) -> None:
    path = key_file(tmp_path, f"alice {KEY}")
    keys = keys_of("", path, window_s=10, since=NOW)
    value = signature(at=NOW + stamp_s)
    if is_old:
        assert "older than this server" in refusal(use, keys, value, NOW + 1).message
    else:
        assert use(keys, value, NOW + 1)


@given(st.lists(st.floats(0, 25), max_size=30), st.integers(-10, 10))
def test_a_signature_is_never_good_twice_whatever_the_clock(
    later_s: list[float], off_s: int
) -> None:
    key = es.Key("alice", hashlib.sha256(KEY.encode()).digest())
    keys = es.KeyRing([key], window_s=10)
    value = signature(at=NOW + off_s)
    assert use(keys, value)
    for number, seconds in enumerate(sorted(later_s)):
        # Others come in between: what was seen is forgotten when its time is over.
        assert use(
            keys, signature(at=NOW + seconds, body=b"%d" % number), NOW + seconds
        )
        refusal(use, keys, value, NOW + seconds)


def test_a_signature_that_was_only_looked_at_is_still_good(tmp_path: Path) -> None:
    keys = ring(tmp_path, f"alice {KEY}")
    for _ in range(2):
        assert keys.signer(signed_head(signature()), NOW)
    assert use(keys, signature())


def test_what_was_seen_is_forgotten_when_its_time_is_over(tmp_path: Path) -> None:
    keys = ring(tmp_path, f"alice {KEY}", window_s=10)
    for second in range(1000):
        use(keys, signature(at=NOW + second), NOW + second)
        assert len(keys._used["alice"]) <= 12


def test_what_is_kept_of_signatures_is_bounded_for_each_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_SIGNATURES_KEPT", 3)
    keys = ring(tmp_path, f"alice {KEY}", f"bob {OTHER}", window_s=10)
    for number in range(3):
        use(keys, signature(body=bytes([number])))
    with pytest.raises(es.RateLimited):
        use(keys, signature(body=b"more"))
    assert len(keys._used["alice"]) == 3
    assert "used before" in refusal(use, keys, signature(body=b"\0")).message
    assert use(keys, signature("bob", OTHER))  # who is not the one that floods
    assert use(keys, signature(at=NOW + 11), NOW + 11)


def test_new_keys_remember_what_the_old_ones_have_seen(tmp_path: Path) -> None:
    old, new = (ring(tmp_path, f"alice {KEY}") for _ in range(2))
    use(old, signature())
    new.inherit_replay_state(old)
    assert "used before" in refusal(use, new, signature()).message


@pytest.mark.parametrize(("window_s", "is_wider"), [(1, False), (300, True)])
def test_a_wider_window_does_not_revive_what_a_narrower_one_forgot(
    tmp_path: Path, window_s: float, *, is_wider: bool
) -> None:
    path = key_file(tmp_path, f"alice {KEY}")
    old = keys_of("", path, window_s=1, since=NOW - 9)
    use(old, signature())
    use(old, signature(at=NOW + 4), NOW + 4)  # the first one is forgotten
    new = keys_of("", path, window_s=window_s, since=NOW + 5)
    new.inherit_replay_state(old)
    refusal(use, new, signature(), NOW + 5)
    # Only then is what was signed shortly before refused, too.
    value = signature(at=NOW + 4.5)
    if is_wider:
        assert "older than" in refusal(use, new, value, NOW + 5).message
    else:
        assert use(new, value, NOW + 5)


LATIN_1 = st.text(st.characters(max_codepoint=255), max_size=300)
SIGNED_LIKE = st.tuples(
    st.sampled_from(["alice", "bob", "", "a b"]),
    st.sampled_from([_STAMP, f"{_STAMP}.5", "0", "1" * 12, "x"]) | LATIN_1,
    st.sampled_from([_BODY, _BODY.upper(), ""]) | LATIN_1,
    st.sampled_from([_MAC, _MAC[1:]]) | LATIN_1,
).map(lambda parts: "Signature " + " ".join(parts))
FIELDS = st.sampled_from(["", "Bearer ", "Signature ", "bearer", KEY]).flatmap(
    lambda start: LATIN_1.map(lambda rest: start + rest)
)


@examples(max_examples=500, deadline=None)
@given(FIELDS | SIGNED_LIKE, FIELDS, st.sampled_from(["", "q=1"]))
def test_any_field_ends_in_a_key_or_in_401(
    authorization: str, x_api_key: str, query: str
) -> None:
    keys = es.KeyRing([es.Key("alice", hashlib.sha256(KEY.encode()).digest())])
    headers = {"authorization": authorization, "x_api_key": x_api_key}
    asked = head("POST", URL, query, **headers)
    calls: tuple[Callable[[es.Head, float], object], ...] = (keys.holder, keys.signer)
    for call in calls:
        try:
            assert call(asked, NOW)
        except es.Unauthorized as error:
            assert dict(error.headers)["www-authenticate"]
            assert KEY not in error.message


# --- signatures through the service ---


async def ask_signed(
    running: kit.RunningService, body: bytes, signed: bytes | None = None, **how: Any
) -> kit.Reply:
    """POST a body with the signature of it, or of another one."""
    value = signature(body=body if signed is None else signed, **how)
    return await running.ask("POST", URL, body, authorization=value)


def wall() -> float:
    """Now, as the service's clock has it."""
    return datetime.datetime.now().timestamp()


def with_signatures(
    folder: Path, mode: str, check: Callable[[kit.RunningService], Any]
) -> None:
    """Run ``check`` against a service that knows Alice's key."""
    path = key_file(folder, f"alice {KEY} admin")

    async def run() -> None:
        async with kit.running_service(
            api_key_file=path, signed_requests=mode
        ) as running:
            await check(running)
            assert KEY not in running.log.getvalue()

    asyncio.run(run())


def test_a_signed_request_is_answered_once(tmp_path: Path) -> None:
    async def check(running: kit.RunningService) -> None:
        value = signature(at=wall(), body=b'{"input":"a"}')
        headers = {"authorization": value}
        first = await running.ask("POST", URL, b'{"input":"a"}', **headers)
        assert first.status == 200
        again = await running.ask("POST", URL, b'{"input":"a"}', **headers)
        assert (again.status, again.error["code"]) == (401, "invalid_api_key")
        assert "used before" in again.error["message"]

    with_signatures(tmp_path, "accept", check)


@pytest.mark.parametrize("size", [10, 100_000], ids=["here", "in a thread"])
def test_another_body_than_the_signed_one_is_refused(tmp_path: Path, size: int) -> None:
    async def check(running: kit.RunningService) -> None:
        body, other = (b'{"input":"' + c * size + b'"}' for c in (b"a", b"b"))
        reply = await ask_signed(running, body, other, at=wall())
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert "another body" in reply.error["message"]
        assert reply.headers["www-authenticate"]
        assert running.engine.calls == []

    with_signatures(tmp_path, "require", check)


def test_a_request_without_a_body_is_signed_too(tmp_path: Path) -> None:
    async def check(running: kit.RunningService) -> None:
        value = signature(method="GET", target="/v1/models?x=1", at=wall())
        reply = await running.ask("GET", "/v1/models?x=1", authorization=value)
        assert reply.status == 200

    with_signatures(tmp_path, "require", check)


@pytest.mark.parametrize(
    ("mode", "by_key", "by_signature"),
    [("off", 200, 401), ("accept", 200, 200), ("require", 401, 200)],
)
def test_signatures_are_off_accepted_or_required(
    tmp_path: Path, mode: str, by_key: int, by_signature: int
) -> None:
    async def check(running: kit.RunningService) -> None:
        body = b'{"input":"a"}'
        plain = await running.ask("POST", URL, body, authorization=f"Bearer {KEY}")
        signed = await ask_signed(running, body, at=wall())
        assert (plain.status, signed.status) == (by_key, by_signature)
        for reply in (plain, signed):
            assert ("www-authenticate" in reply.headers) is (reply.status == 401)
        # A signature that does not hold is not saved by a key beside it.
        both = {"authorization": signature(key=OTHER, at=wall()), "x_api_key": KEY}
        saved = await running.ask("POST", URL, body, **both)
        assert saved.status == (200 if mode == "off" else 401)

    with_signatures(tmp_path, mode, check)


def signing_gate(folder: Path, *options: str, **changes: Any) -> es.Gate:
    """A gate where Alice may sign; with these options on her line."""
    path = key_file(folder, " ".join(("alice", KEY, *options)))
    changes = {"api_key_file": path, "signed_requests": "accept"} | changes
    return es.Gate(kit.settings(**changes), kit.quiet_log())


def test_a_request_that_came_too_early_may_be_sent_again_as_it_was_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    gate = signing_gate(tmp_path, "rate=1 burst=1")
    first, second = (signed_head(signature(at=wall(), body=c)) for c in (b"1", b"2"))
    assert gate.admit(first, kit.direct(""), "key").body_sha256 == hex_of("1")
    with pytest.raises(es.RateLimited):
        gate.admit(second, kit.direct(""), "key")
    now += 1.5
    assert gate.admit(second, kit.direct(""), "key").body_sha256 == hex_of("2")
    now += 1.5
    assert "used before" in refusal(gate.admit, second, "", "key").message


def test_what_was_signed_before_the_gate_stood_is_refused(tmp_path: Path) -> None:
    asked = signed_head(signature(at=wall()))
    gate = signing_gate(tmp_path)
    assert "older than this server" in refusal(gate.admit, asked, "", "key").message
    assert gate.admit(signed_head(signature(at=wall())), kit.direct(""), "key")


def renewed(gate: es.Gate, folder: Path, **changes: Any) -> None:
    """A reload."""
    path = {"api_key_file": str(folder / "keys")}
    gate.renew(kit.settings(**path | {"signed_requests": "accept"} | changes))


def test_a_reload_forgets_no_signature_and_refuses_none_but_with_a_wider_window(
    tmp_path: Path,
) -> None:
    gate = signing_gate(tmp_path)
    used, kept = (signed_head(signature(at=wall(), body=c)) for c in (b"1", b"2"))
    gate.admit(used, kit.direct(""), "key")
    for window_s in (300.0, 100.0):
        renewed(gate, tmp_path, signature_window_s=window_s)
        assert "used before" in refusal(gate.admit, used, "", "key").message
    assert gate.admit(kept, kit.direct(""), "key")
    late = signed_head(signature(at=wall(), body=b"3"))
    renewed(gate, tmp_path, signature_window_s=200.0)
    for asked in (used, late):
        assert "older than" in refusal(gate.admit, asked, "", "key").message


def test_a_signature_is_not_good_again_after_a_time_without_keys(
    tmp_path: Path,
) -> None:
    gate = signing_gate(tmp_path)
    asked = signed_head(signature(at=wall()))
    gate.admit(asked, kit.direct(""), "key")
    renewed(gate, tmp_path, api_key_file="")
    renewed(gate, tmp_path)
    refusal(gate.admit, asked, "", "key")


def test_signatures_cannot_be_required_without_keys() -> None:
    with pytest.raises(es.StartupError, match="needs --api-key-file"):
        es.Gate(kit.settings(signed_requests="require"), kit.quiet_log())
