"""What a client may see of a reply, against the plainest way to say it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import embellama_server as es

# --- what the text must be, one character after the other ---


def until_stopped(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, and that stop string."""
    for end in range(len(text) + 1):
        ended_by = [s for s in stop if s and text[:end].endswith(s)]
        if ended_by:
            longest = max(ended_by, key=len)
            return text[: end - len(longest)], longest
    return text, None


def kept_back(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end may still become a stop string."""
    sizes = range(len(text), 0, -1)
    return next((n for n in sizes if any(s.startswith(text[-n:]) for s in stop)), 0)


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """The same bytes in pieces."""
    at = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(at)]


# Few characters, so that stop strings do occur, and contain each other.
CHARS = "ab \u00e4\u20ac\U0001f600"
TEXTS = st.text(CHARS, max_size=24)
STOPS = st.lists(st.text(CHARS, max_size=4), max_size=6)
BROKEN = st.lists(
    st.sampled_from([b"a", b"b", b"\xe2", b"\x82", b"\xac", b"\xff", b"\xf0\x9f"]),
    max_size=16,
).map(b"".join)
PLACES = st.lists(st.integers(0, 100), max_size=12)


@given(TEXTS, STOPS, PLACES)
def test_how_text_is_cut_into_tokens_makes_no_difference(
    text: str, stop: list[str], places: list[int]
) -> None:
    expected, stopped_by = until_stopped(text, stop)
    reply = es.ReplyText(stop)
    sent = ""
    for piece in cut(text.encode(), places):
        sent += reply.feed(piece)
        assert expected.startswith(sent)
    sent += reply.end()
    assert (sent, reply.stopped_by) == (expected, stopped_by)
    assert reply.is_stopped == (stopped_by is not None)


@given(TEXTS, STOPS, PLACES)
def test_all_bytes_are_sent_or_kept_back_or_cut_off(
    text: str, stop: list[str], places: list[int]
) -> None:
    reply, fed, sent = es.ReplyText(stop), 0, ""
    for piece in cut(text.encode(), places):
        fed += len(piece)
        sent += reply.feed(piece)
        assert len(sent.encode()) + reply.unshown_bytes == fed
        if reply.is_stopped:
            return
    reply.end()
    assert not reply.unshown_bytes


@given(BROKEN, STOPS, PLACES)
def test_bytes_that_are_no_text_are_replaced_as_python_does(
    data: bytes, stop: list[str], places: list[int]
) -> None:
    expected, _ = until_stopped(data.decode("utf-8", "replace"), stop)
    reply = es.ReplyText(stop)
    sent = [reply.feed(piece) for piece in cut(data, places)]
    assert "".join([*sent, reply.end()]) == expected


@given(TEXTS, STOPS)
def test_no_more_is_kept_back_than_may_still_be_a_stop_string(
    text: str, stop: list[str]
) -> None:
    reply = es.ReplyText(stop)
    sent = ""
    for end, char in enumerate(text, 1):
        sent += reply.feed(char.encode())
        if reply.is_stopped:
            break
        assert len(sent) == end - kept_back(text[:end], stop)


# --- by example ---


@pytest.mark.parametrize(
    ("pieces", "stop", "sent", "stopped_by"),
    [
        # Across the borders of tokens.
        (["Hi", "\n", "\nUs", "er: no"], ["\n\nUser:"], "Hi", "\n\nUser:"),
        # What only began like one is text.
        (["one #", "# two"], ["###"], "one ## two", None),
        (["aa", "ab"], ["aab"], "a", "aab"),
        # What is complete first ends the reply, although another one began before it.
        (["abcd"], ["abcd", "bc"], "a", "bc"),
        (["x", "abc"], ["bc", "abc", "c"], "x", "abc"),
        # One that ends with another one does not hide it.
        (["ca"], ["a", "ba"], "c", "a"),
        # An empty one would end every reply.
        (["a", "b"], ["", ""], "ab", None),
        # Text after it, in the same token.
        (["yes</s>no"], ["</s>"], "yes", "</s>"),
    ],
)
def test_a_reply_ends_before_the_stop_string_that_is_complete_first(
    pieces: list[str], stop: list[str], sent: str, stopped_by: str | None
) -> None:
    reply = es.ReplyText(stop)
    parts = [reply.feed(piece.encode()) for piece in pieces]
    assert "".join([*parts, reply.end()]) == sent
    assert reply.stopped_by == stopped_by


def test_a_character_is_sent_when_its_last_byte_is_there() -> None:
    reply = es.ReplyText()
    parts = [reply.feed(bytes([byte])) for byte in "\U0001f600".encode()]
    assert parts == ["", "", "", "\U0001f600"]


def test_half_a_character_at_the_end_is_a_replacement_character() -> None:
    reply = es.ReplyText()
    assert reply.feed(b"ab\xf0\x9f") == "ab"
    assert reply.end() == "\ufffd"


def test_what_is_kept_back_is_sent_at_the_end() -> None:
    reply = es.ReplyText(["\n\nUser:"])
    assert reply.feed(b"Bye.\n\nUse") == "Bye."
    assert reply.end() == "\n\nUse"
    assert reply.end() == ""


def test_nothing_comes_after_a_stop_string() -> None:
    reply = es.ReplyText(["."])
    assert reply.feed(b"One. Two") == "One"
    assert reply.feed(b" Three\xe2") == ""
    assert reply.end() == ""


@pytest.mark.parametrize(
    ("pieces", "sent"),
    [
        ([b" Hi", b" you"], "Hi you"),
        ([b"", b" ", b" Hi"], " Hi"),
        ([b"Hi", b" you"], "Hi you"),
        ([b"\xe2\x82", b"\xac "], "\u20ac "),
    ],
)
def test_one_space_at_the_start_is_dropped_where_the_tokenizer_puts_it(
    pieces: list[bytes], sent: str
) -> None:
    reply = es.ReplyText(drops_space=True)
    assert "".join(map(reply.feed, pieces)) == sent


def test_a_stop_string_is_not_found_in_the_dropped_space() -> None:
    reply = es.ReplyText([" Hi"], drops_space=True)
    assert reply.feed(b" Hi") == "Hi"


@pytest.mark.parametrize(
    "stop",
    [
        ["a" * 999 + chr(256 + n) for n in range(4096)],
        [chr(256 + n) + "a" * 999 for n in range(4096)],
        ["a" * n + "b" for n in range(1, 4097)],
    ],
    ids=["one beginning", "one end", "each in the next"],
)
def test_thousands_of_long_stop_strings_cost_a_search_by_halves(
    stop: list[str],
) -> None:
    class Counted(str):
        """A text that counts how often it is compared."""

        compared = 0

        def __lt__(self, other: str) -> bool:
            Counted.compared += 1
            return str.__lt__(self, other)

        def __gt__(self, other: str) -> bool:
            Counted.compared += 1
            return str.__gt__(self, other)

        def __getitem__(self, key: object) -> str:
            return Counted(str.__getitem__(self, key))  # type: ignore[index]

    reply = es.ReplyText([*map(Counted, stop)])
    Counted.compared, tokens = 0, 3000
    sent = "".join(reply.feed(b"a") for _ in range(tokens))
    assert len(sent) >= tokens - 4096
    # Twice a token at most: whether one ends there, and whether one begins; 13 halves.
    assert 0 < Counted.compared <= 3 * 13 * tokens
