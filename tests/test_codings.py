"""Room CODINGS: what a body is compressed in, what its JSON becomes, what a client takes."""

from __future__ import annotations

import gzip
import re
import sys
import tracemalloc
import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import embellama_server as codings
from embellama_server import (
    ApiError,
    BodyTooLarge,
    Head,
    MalformedRequest,
    UnsupportedMediaType,
)

try:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd  # type: ignore[import-not-found]  # for older ones
except ImportError:
    zstd = None

WITH_ZSTD = pytest.param(
    "zstd", marks=pytest.mark.skipif(zstd is None, reason="no zstd for this Python")
)
CODINGS = pytest.mark.parametrize("coding", ["gzip", WITH_ZSTD])
MOST = 1 << 20


def head(**headers: str) -> Head:
    """A request's head; accept_encoding="gzip" is the header Accept-Encoding."""
    pairs = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return Head("POST", "/", "", 1, pairs, 0)


@pytest.fixture(autouse=True)
def _zstd_of_any_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codings, "_ZSTD", zstd)
    known = ("zstd", "gzip") if zstd else ("gzip",)
    monkeypatch.setattr(codings, "KNOWN_CODINGS", known)


@pytest.fixture
def no_zstd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python before 3.14, or built without zstd."""
    monkeypatch.setattr(codings, "_ZSTD", None)
    monkeypatch.setattr(codings, "KNOWN_CODINGS", ("gzip",))


# --- Accept-Encoding ---

GZIP_OR_NOT = {
    "": "",
    "identity": "",
    "gzip": "gzip",
    "GZIP": "gzip",
    "x-gzip": "gzip",
    "gzip, deflate": "gzip",
    "gzip, deflate, br, zstd": "gzip",
    "deflate, br": "",
    "gzip;q=0": "",
    "gzip;q=0.000": "",
    "gzip;q=0.001": "gzip",
    "gzip ; q=1.0": "gzip",
    "gzip;q=0, x-gzip": "gzip",
    "*": "",  # by name only
    "*;q=0": "",
    "gzip, *;q=0": "gzip",
    "gzip;q=0.5, *": "",  # what is not named, so the plain body, is liked better
    "gzip;q=0.5, identity": "",
    "gzip, identity;q=0.5": "gzip",
    "gzip, identity": "gzip",
    "gzip;q=0.5, identity;q=0": "gzip",
    "br, ,gzip,": "gzip",
    "gzip;q=2": "",
    "gzip;q=.5": "",
    "gzip;q=1.001": "",
    "gzip;q=nan": "",
    "gz ip": "",
    "gzip;q=\u0661": "",  # a digit, but not of HTTP
    ";q=1, gzip": "",
}


@pytest.mark.usefixtures("no_zstd")
@pytest.mark.parametrize("said", GZIP_OR_NOT)
def test_gzip_is_for_those_who_call_it_by_name(said: str) -> None:
    assert codings.accepted_coding(head(accept_encoding=said)) == GZIP_OR_NOT[said]


@pytest.mark.skipif(zstd is None, reason="no zstd for this Python")
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("gzip, deflate, br, zstd", "zstd"),
        ("zstd;q=0.5, gzip;q=0.5", "zstd"),
        ("zstd;q=0.5, gzip;q=0.6", "gzip"),
        ("zstd;q=0, gzip;q=0.1", "gzip"),
        ("zstd;q=0.5, identity", ""),
        ("*", ""),
    ],
)
def test_zstd_before_gzip_unless_the_client_likes_gzip_better(
    said: str, expected: str
) -> None:
    assert codings.accepted_coding(head(accept_encoding=said)) == expected


def test_several_fields_are_one_list() -> None:
    headers = (("accept-encoding", "br"), ("accept-encoding", "gzip"))
    assert codings.accepted_coding(Head("GET", "/", "", 1, headers, 0)) == "gzip"


# --- Accept ---

JSON, TEXT, BYTES = "application/json", "text/plain", "application/octet-stream"
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
JAVA = "text/html, image/gif, image/jpeg, *; q=.2, */*; q=.2"
CHOICES = [
    ("", JSON),
    ("*/*", JSON),
    (JSON, JSON),
    (TEXT, TEXT),
    ("Text/Plain", TEXT),
    ("application/*", JSON),
    ("text/*", TEXT),
    ("application/json, text/plain, */*", JSON),  # axios
    ("text/plain, application/json", JSON),  # ties go to the first on offer
    ("application/json;q=0.5, text/plain", TEXT),
    ("application/json;q=0.5, */*;q=0.4", JSON),
    ("*/*, application/json;q=0.1", TEXT),  # the closest range decides
    ("*/*;q=0.5, text/*;q=0.1, text/plain;q=0.9", TEXT),
    ("text/*;q=0.9, text/plain;q=0.1, */*;q=0.5", JSON),
    ("application/json; charset=utf-8", JSON),
    ("application/json;q=0.2;level=1, text/plain;q=0.1", JSON),
    ("text/plain;version=1.0.0;q=0.4, text/plain;version=0.0.4;q=0.3", TEXT),
    (BROWSER, JSON),
    (JAVA, JSON),  # malformed, so as if it were absent
    ("json", JSON),
    ("text/plain;q=2", JSON),
    ('application/x;profile="a,b"', JSON),
    (" , ,", JSON),
    (",text/plain", TEXT),
    # None of ours: what we have all the same.
    ("image/png", JSON),
    ("text/event-stream", JSON),
    ("application/json;q=0", JSON),
    ("*/*;q=0", JSON),
    ("application/json;q=0, text/*;q=0.0, image/png", JSON),
    ("application/jso", JSON),
    ("application/json-seq", JSON),
]


@pytest.mark.parametrize(("accept", "expected"), CHOICES)
def test_the_type_is_the_one_the_client_likes_best(accept: str, expected: str) -> None:
    assert codings.chosen_type(head(accept=accept), (JSON, TEXT)) == expected


def test_a_type_with_parameters_is_answered_with_them() -> None:
    offered = (JSON, PROMETHEUS)
    assert codings.chosen_type(head(accept=TEXT), offered) == PROMETHEUS
    assert codings.chosen_type(head(accept=PROMETHEUS), offered) == PROMETHEUS
    scraper = (
        "application/openmetrics-text;version=1.0.0;q=0.6,"
        "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
    )
    assert codings.chosen_type(head(accept=scraper), (PROMETHEUS,)) == PROMETHEUS


KINDS = st.sampled_from([JSON, TEXT, BYTES, "*/*", "text/*", "image/png"])
QUALITY = st.sampled_from(["", ";q=0", ";q=0.3", "; q=1.000", ";q=5", ";a=b;q=0.7"])
ACCEPTS = st.lists(st.tuples(KINDS, QUALITY).map("".join), max_size=5).map(",".join)


@given(accept=ACCEPTS | st.text(st.characters(max_codepoint=255)))
def test_whatever_is_accepted_the_answer_is_on_offer(accept: str) -> None:
    offered = (JSON, TEXT)
    chosen = codings.chosen_type(head(accept=accept), offered)
    assert chosen in offered
    codings.accepted_coding(head(accept_encoding=accept))


@given(accept=ACCEPTS, order=st.permutations([JSON, TEXT, BYTES]))
def test_nothing_on_offer_is_liked_better_than_the_chosen(
    accept: str, order: list[str]
) -> None:
    """Against the RFC's words, written the slow way."""
    if "q=5" in accept or not accept:
        assert codings.chosen_type(head(accept=accept), order) == order[0]
        return

    def weight(kind: str) -> float:
        found = []
        for member in accept.split(","):
            said, *parameters = (part.strip() for part in member.split(";"))
            quality = [float(text[2:]) for text in parameters if text[:2] == "q="]
            if re.fullmatch(re.escape(said).replace(r"\*", ".*"), kind):
                found.append((2 - said.count("*"), *(quality or [1.0])))
        return max(found)[1] if found else 0.0

    chosen = codings.chosen_type(head(accept=accept), order)
    best = max(order, key=weight)  # the first of equals
    assert chosen == best


# --- Content-Encoding ---


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", ""),
        ("identity", ""),
        ("gzip", "gzip"),
        ("GZip", "gzip"),
        ("x-gzip", "gzip"),
        ("identity, gzip", "gzip"),
        (" , gzip,", "gzip"),
    ],
)
def test_a_known_coding_is_named(said: str, expected: str) -> None:
    assert codings.check_coding(head(content_encoding=said)) == expected


@pytest.mark.usefixtures("no_zstd")
@pytest.mark.parametrize(
    "said",
    ["br", "deflate", "zstd", "gzip, gzip", "gzip, br", "gzip;q=1", "*", "x" * 999],
)
def test_other_codings_and_stacks_are_415_with_what_is_known(said: str) -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        codings.check_coding(head(content_encoding=said))
    assert caught.value.headers == (("accept-encoding", "gzip"),)
    assert len(caught.value.message) < 200


@pytest.mark.skipif(zstd is None, reason="no zstd for this Python")
def test_zstd_is_known_where_python_has_it() -> None:
    assert codings.check_coding(head(content_encoding="zstd")) == "zstd"
    with pytest.raises(UnsupportedMediaType) as caught:
        codings.check_coding(head(content_encoding="zstd, gzip"))
    assert caught.value.headers == (("accept-encoding", "zstd, gzip"),)


# --- compressing and decompressing ---


def decompressed(compressed: bytes, coding: str, max_bytes: int) -> bytes:
    """All pieces."""
    return b"".join(codings.decompressed(compressed, coding, max_bytes))


# Also much longer than a piece, and of a piece exactly.
PIECE = codings.PIECE_BYTES
SIZES = st.sampled_from([0, 1, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE])
BODIES = st.binary(max_size=3000) | st.builds(
    lambda seed, size: (seed * (size // max(1, len(seed)) + 1))[:size],
    st.binary(min_size=1, max_size=300),
    SIZES,
)


@CODINGS
@given(body=BODIES)
def test_what_is_compressed_decompresses_to_itself_at_any_limit(
    coding: str, body: bytes
) -> None:
    compressed = codings.compressed(body, coding)
    assert decompressed(compressed, coding, MOST) == body
    assert decompressed(compressed, coding, len(body)) == body
    if body:
        with pytest.raises(BodyTooLarge, match=f"more than the {len(body) - 1} bytes"):
            decompressed(compressed, coding, len(body) - 1)


@CODINGS
@given(bodies=st.lists(BODIES, min_size=1, max_size=5))
def test_members_one_after_another_are_one_body(
    coding: str, bodies: list[bytes]
) -> None:
    compressed = b"".join(codings.compressed(body, coding) for body in bodies)
    assert decompressed(compressed, coding, MOST) == b"".join(bodies)


@CODINGS
@given(body=BODIES, data=st.data())
def test_a_truncated_body_is_refused(
    coding: str, body: bytes, data: st.DataObject
) -> None:
    compressed = codings.compressed(body, coding)
    cut = data.draw(st.integers(0, len(compressed) - 1))
    with pytest.raises(MalformedRequest):
        decompressed(compressed[:cut], coding, MOST)


@CODINGS
@pytest.mark.parametrize("garbage", [b"\0", b"x", b"{}", b"\x1f\x8b", b"\0" * 512])
def test_what_follows_the_compressed_body_is_refused(
    coding: str, garbage: bytes
) -> None:
    for size in (10, PIECE - 30, 3 * PIECE):
        compressed = codings.compressed(bytes(range(256)) * (size // 256 + 1), coding)
        with pytest.raises(MalformedRequest):
            decompressed(compressed + garbage, coding, MOST)


@pytest.mark.parametrize("at", [-1, -5, 15])  # the length, the checksum, the content
def test_a_changed_byte_is_noticed(at: int) -> None:
    compressed = bytearray(codings.compressed(b"some text, some more text", "gzip"))
    compressed[at] ^= 1
    with pytest.raises(MalformedRequest):
        decompressed(bytes(compressed), "gzip", MOST)


@CODINGS
@settings(max_examples=500)
@given(body=st.binary(max_size=400), start=st.integers(0, 20))
@example(body=b"", start=0)
def test_random_bytes_raise_nothing_but_what_a_caller_is_told(
    coding: str, body: bytes, start: int
) -> None:
    real = codings.compressed(b"[0.1,0.2,0.3]" * 9, coding)
    for attempt in (body, real[:start] + body, real + body):
        try:
            assert len(decompressed(attempt, coding, 100)) <= 100
        except ApiError as error:
            assert isinstance(error, BodyTooLarge | MalformedRequest)


def peak_of(compressed: bytes, coding: str, max_bytes: int) -> int:
    """Bytes held at most while a body is decompressed, which must be too large."""
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            decompressed(compressed, coding, max_bytes)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@CODINGS
@pytest.mark.parametrize("max_bytes", [1, 1000, 1 << 20])
def test_too_large_a_body_takes_no_more_memory_than_the_limit_and_an_eighth(
    coding: str, max_bytes: int
) -> None:
    compressed = codings.compressed(bytes(4 << 20), coding)
    assert peak_of(compressed, coding, max_bytes) < max_bytes * 9 / 8 + 100_000


@CODINGS
def test_many_empty_members_are_refused(
    coding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, most = codings.compressed(b"", coding), 5
    monkeypatch.setattr(codings, "_MAX_MEMBERS", most)
    assert decompressed(empty * most, coding, MOST) == b""
    with pytest.raises(MalformedRequest, match="parts"):
        decompressed(empty * (most + 1), coding, MOST)


@pytest.mark.skipif(zstd is None, reason="no zstd for this Python")
def test_a_zstd_window_above_8_mib_is_refused() -> None:
    """RFC 9659: or else each request could make us hold 128 MiB."""
    assert zstd is not None
    for window_log, is_accepted in ((23, True), (24, False)):
        packer = zstd.ZstdCompressor(
            options={zstd.CompressionParameter.window_log: window_log}
        )
        compressed = (
            packer.compress(b"abc") + packer.flush()
        )  # of a length not foretold
        if is_accepted:
            assert decompressed(compressed, "zstd", MOST) == b"abc"
        else:
            with pytest.raises(MalformedRequest):
                decompressed(compressed, "zstd", MOST)


def test_what_others_compress_is_decompressed() -> None:
    body = b'{"input":"x"}' * 1000
    assert decompressed(gzip.compress(body, 9), "gzip", MOST) == body
    deflated = zlib.compress(body)  # not gzip, whatever it is called
    with pytest.raises(MalformedRequest):
        decompressed(deflated, "gzip", MOST)
    assert gzip.decompress(codings.compressed(body, "gzip")) == body


# --- ETag ---


def test_an_etag_is_weak_and_follows_the_body() -> None:
    one, other = codings.etag_of(b"one"), codings.etag_of(b"other")
    assert one == codings.etag_of(b"one") != other
    assert re.fullmatch(r'W/"[0-9a-f]{32}"', one)


def test_if_none_match_finds_the_tag_in_a_list_weak_or_strong() -> None:
    etag = codings.etag_of(b"body")
    strong = etag.removeprefix("W/")
    assert codings.is_unchanged(head(if_none_match="*"), etag)
    for said in (etag, strong, f'"x", {etag}', f'W/"a,b",{strong} , "y"'):
        assert codings.is_unchanged(head(if_none_match=said), etag)
    for said in ("", '""', '"x"', codings.etag_of(b"b"), strong[1:-1], '"*"', "**"):
        assert not codings.is_unchanged(head(if_none_match=said), etag)
    assert not codings.is_unchanged(head(), etag)
