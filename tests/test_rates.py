"""Room KEYS: buckets under any clock, and what a client is told of them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import embellama_server as es

FIELDS = {
    f"x-ratelimit-{kind}-{what}"
    for kind in ("limit", "remaining", "reset")
    for what in ("requests", "tokens")
}
SLACK_S = 1e-6  # of floating point; see below for what a client makes of it

RATES = st.sampled_from([0.001, 0.1, 1.0, 3.0, 7.5, 1e6]) | st.floats(0.01, 1000)
BURSTS = st.integers(0, 50)
PAUSES = st.lists(st.floats(0, 20) | st.just(0.0), min_size=1, max_size=60)


def caller(who: str, allowed: es.Allowance) -> es.Caller:
    """A client that is allowed this much."""
    return es.Caller(who, allowed=allowed)


def is_let_in(
    rates: es.Rates, allowed: es.Allowance, at: float, who: str = "a"
) -> bool:
    """Whether a request passes now."""
    try:
        rates.take_request(caller(who, allowed), at)
    except es.RateLimited:
        return False
    return True


def took(rates: es.Rates, allowed: es.Allowance, tokens: int, at: float) -> bool:
    """Whether so many tokens pass now."""
    try:
        rates.take_tokens(caller("a", allowed), tokens, at)
    except es.RateLimited:
        return False
    return True


def wait_s(error: es.RateLimited) -> float:
    """What a refusal says of when to come back."""
    assert error.retry_after_s is not None
    return error.retry_after_s


def headers(rates: es.Rates, allowed: es.Allowance, at: float) -> dict[str, str]:
    """What an answer says of the limits."""
    return dict(rates.headers(caller("a", allowed), at))


# --- requests ---


@examples(max_examples=300, deadline=None)
@given(RATES, BURSTS, PAUSES)
def test_no_window_lets_through_more_than_the_burst_and_the_rate(
    rate: float, burst: int, pauses: list[float]
) -> None:
    rates, allowed = es.Rates(), es.Allowance(rate, burst)
    passed, now = [], 0.0
    for pause in pauses:
        now += pause
        if is_let_in(rates, allowed, now):
            passed.append(now)
    most = max(1.0, burst or rate * 10)
    for first, begun in enumerate(passed):
        for last, ended in enumerate(passed[first:], first):
            assert last - first + 1 <= most + rate * (ended - begun) + SLACK_S


@examples(max_examples=300, deadline=None)
@given(RATES, BURSTS, st.lists(st.floats(0, 3), max_size=30))
def test_after_waiting_as_long_as_it_says_a_request_passes_and_not_before(
    rate: float, burst: int, pauses: list[float]
) -> None:
    rates, allowed, now = es.Rates(), es.Allowance(rate, burst), 0.0
    for pause in pauses:
        now += pause
        try:
            rates.take_request(caller("a", allowed), now)
        except es.RateLimited as error:
            said = wait_s(error)
            assert said > 0
            assert not is_let_in(rates, allowed, now + said * 0.999 - SLACK_S)
            now += said + SLACK_S
            assert is_let_in(rates, allowed, now)


def test_a_bucket_is_full_at_first_and_again_after_a_pause() -> None:
    rates, allowed = es.Rates(), es.Allowance(2.0, 5)
    for begun in (0.0, 1000.0):
        passed = [is_let_in(rates, allowed, begun) for _ in range(7)]
        assert passed == [True] * 5 + [False] * 2


@pytest.mark.parametrize(
    ("rate", "burst", "most"), [(2, 0, 20), (2, 3, 3), (0.01, 0, 1), (100, 1, 1)]
)
def test_without_a_burst_ten_seconds_worth_come_at_once_and_at_least_one(
    rate: float, burst: int, most: int
) -> None:
    rates, allowed = es.Rates(), es.Allowance(rate, burst)
    assert sum(is_let_in(rates, allowed, 0.0) for _ in range(200)) == most


def test_nothing_is_counted_without_limits() -> None:
    rates = es.Rates()
    assert all(is_let_in(rates, es.Allowance(), 0.0) for _ in range(1000))
    assert took(rates, es.Allowance(), 10**12, 0.0)
    assert headers(rates, es.Allowance(), 0.0) == {}
    assert not rates._clients


def test_a_refused_request_takes_nothing() -> None:
    rates, allowed = es.Rates(), es.Allowance(1.0, 1)
    assert is_let_in(rates, allowed, 0.0)
    assert not any(is_let_in(rates, allowed, n / 100) for n in range(99))
    assert is_let_in(rates, allowed, 1.0)


def test_clients_do_not_share_a_bucket() -> None:
    rates, allowed = es.Rates(), es.Allowance(1.0, 1, 60)
    for who in ("key a", "key b", "127.0.0.1", ""):
        assert is_let_in(rates, allowed, 0.0, who)
        assert not is_let_in(rates, allowed, 0.0, who)
        rates.take_tokens(caller(who, allowed), 60, 0.0)


def test_changed_limits_count_at_once() -> None:
    rates = es.Rates()
    assert is_let_in(rates, es.Allowance(1.0, 100), 0.0)
    few = es.Allowance(1.0, 2)
    assert [is_let_in(rates, few, 0.0) for _ in range(3)] == [True, True, False]
    assert (
        headers(rates, es.Allowance(10.0, 5), 0.1)["x-ratelimit-limit-requests"] == "5"
    )


@pytest.mark.parametrize(
    "left", [es.Allowance(1.0, 1), es.Allowance(0.0, 0, 60), es.Allowance()]
)
def test_of_two_limits_the_one_that_a_reload_takes_away_no_longer_refuses(
    left: es.Allowance,
) -> None:
    rates, both = es.Rates(), es.Allowance(1.0, 1, 60)
    assert is_let_in(rates, both, 0.0)
    rates.take_tokens(caller("a", both), 6000, 0.0, are_used=True)
    rates.headers(caller("a", left), 0.0)
    assert is_let_in(rates, left, 1e5)
    assert headers(rates, both, 1e5).keys() == FIELDS


# --- tokens ---

PER_MIN = st.sampled_from([1, 59, 60, 61, 1000, 1 << 30]) | st.integers(1, 10_000)


@examples(max_examples=300, deadline=None)
@given(PER_MIN, st.lists(st.tuples(st.floats(0, 90), st.integers(0, 20_000))))
def test_no_window_spends_more_tokens_than_its_minutes_hold_and_one_request_more(
    per_min: int, asked: list[tuple[float, int]]
) -> None:
    rates, allowed, now = es.Rates(), es.Allowance(tokens_per_min=per_min), 0.0
    passed: list[tuple[float, int]] = []
    for pause, tokens in asked:
        now += pause
        if took(rates, allowed, tokens, now) and tokens:  # nothing always passes
            passed.append((now, tokens))
    for first, (begun, _) in enumerate(passed):
        spent = 0
        for ended, tokens in passed[first:]:
            spent += tokens
            # The last one may be larger than all: then the bucket was full before it.
            most = per_min * (1 + (ended - begun) / 60) + max(0, tokens - per_min)
            assert spent <= most * (1 + 1e-9) + SLACK_S


@examples(max_examples=300, deadline=None)
@given(PER_MIN, st.lists(st.tuples(st.floats(0, 90), st.integers(1, 20_000))))
def test_after_waiting_as_long_as_it_says_tokens_pass(
    per_min: int, asked: list[tuple[float, int]]
) -> None:
    rates, allowed, now = es.Rates(), es.Allowance(tokens_per_min=per_min), 0.0
    for pause, tokens in asked:
        now += pause
        try:
            rates.take_tokens(caller("a", allowed), tokens, now)
        except es.RateLimited as error:
            now += wait_s(error) * (1 + 1e-9) + SLACK_S
            rates.take_tokens(caller("a", allowed), tokens, now)


def test_what_is_given_back_may_be_spent_again_but_is_never_more_than_a_minute() -> (
    None
):
    rates, allowed = es.Rates(), es.Allowance(tokens_per_min=60)
    assert took(rates, allowed, 60, 0.0)
    assert not took(rates, allowed, 1, 0.0)
    assert took(rates, allowed, -50, 0.0)
    assert took(rates, allowed, 50, 0.0)
    for _ in range(3):
        assert took(rates, allowed, -1000, 0.0)
    assert took(rates, allowed, 60, 0.0)
    assert not took(rates, allowed, 1, 0.0)


def test_refused_tokens_are_not_taken() -> None:
    rates, allowed = es.Rates(), es.Allowance(tokens_per_min=60)
    assert took(rates, allowed, 20, 0.0)
    assert not any(took(rates, allowed, 41, 0.0) for _ in range(9))
    assert took(rates, allowed, 40, 0.0)


def test_more_than_a_minute_s_tokens_pass_only_when_nothing_was_used() -> None:
    rates, allowed = es.Rates(), es.Allowance(tokens_per_min=60)
    assert took(rates, allowed, 1, 0.0)
    assert not took(rates, allowed, 1000, 0.5)
    assert took(rates, allowed, 1000, 1.0)
    # Now it owes 940, which takes as many seconds to come in.
    with pytest.raises(es.RateLimited) as caught:
        rates.take_request(caller("a", allowed), 1.0)
    assert wait_s(caught.value) == pytest.approx(941)
    assert not is_let_in(rates, allowed, 941.0)
    assert is_let_in(rates, allowed, 942.0)


@given(PER_MIN, st.integers(1, 100_000), st.integers(0, 100_000))
def test_giving_back_is_never_refused(per_min: int, bound: int, used: int) -> None:
    rates, allowed = es.Rates(), es.Allowance(tokens_per_min=per_min)
    assert took(rates, allowed, bound, 0.0)
    assert took(rates, allowed, min(used, bound) - bound, 0.0)
    left = headers(rates, allowed, 0.0)["x-ratelimit-remaining-tokens"]
    assert int(left) == max(0, per_min - min(used, bound))


def test_a_request_waits_for_the_tokens_too() -> None:
    rates, allowed = es.Rates(), es.Allowance(100.0, 100, 60)
    assert took(rates, allowed, 60, 0.0)
    assert not is_let_in(rates, allowed, 0.0)
    left = headers(rates, allowed, 0.0)
    assert left["x-ratelimit-remaining-requests"] == "100"  # none was taken for it
    assert is_let_in(rates, allowed, 1.0)


# --- what is told ---


@examples(max_examples=300, deadline=None)
@given(
    st.just(0.0) | RATES,
    BURSTS,
    st.just(0) | PER_MIN,
    st.lists(st.tuples(st.floats(0, 30), st.integers(-1000, 50_000)), max_size=20),
)
def test_the_fields_are_never_negative_and_parse(
    rate: float, burst: int, per_min: int, asked: list[tuple[float, int]]
) -> None:
    rates, allowed, now = es.Rates(), es.Allowance(rate, burst, per_min), 0.0
    for pause, tokens in asked:
        now += pause
        is_let_in(rates, allowed, now)
        took(rates, allowed, tokens, now)
        told = headers(rates, allowed, now)
        limited = {"requests": rate, "tokens": per_min}
        assert set(told) == {f for f in FIELDS if limited[f.rpartition("-")[2]]}
        for name, value in told.items():
            shape = r"[0-9]+\.[0-9]{3}s" if "reset" in name else "[0-9]+"
            assert re.fullmatch(shape, value), (name, value)
        for what in ("requests", "tokens"):
            if limited[what]:
                left = int(told[f"x-ratelimit-remaining-{what}"])
                assert left <= int(told[f"x-ratelimit-limit-{what}"])


def test_what_is_left_is_what_passes() -> None:
    rates, allowed = es.Rates(), es.Allowance(1.0, 5, 600)
    assert is_let_in(rates, allowed, 0.0)
    assert took(rates, allowed, 100, 0.0)
    assert headers(rates, allowed, 0.0) == {
        "x-ratelimit-limit-requests": "5",
        "x-ratelimit-remaining-requests": "4",
        "x-ratelimit-reset-requests": "1.000s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "500",
        "x-ratelimit-reset-tokens": "10.000s",
    }
    assert [is_let_in(rates, allowed, 0.0) for _ in range(5)] == [True] * 4 + [False]


def test_a_refusal_is_transient_and_says_the_limit_what_is_left_and_how_long() -> None:
    rates, allowed = es.Rates(), es.Allowance(0.5, 1)
    assert is_let_in(rates, allowed, 0.0)
    with pytest.raises(es.RateLimited) as caught:
        rates.take_request(caller("a", allowed), 0.5)
    error = caught.value
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    for part in ("0.5 requests per second", "0 are left", "1.500s"):
        assert part in error.message
    headers = dict(es.error_headers(error))
    assert headers["retry-after"] == "2"
    assert headers["retry-after-ms"] == "1500"
    assert headers["x-should-retry"] == "true"


def test_where_more_was_used_than_allowed_a_refusal_says_that_none_are_left() -> None:
    rates, allowed = es.Rates(), es.Allowance(0.0, 0, 60)
    rates.take_tokens(caller("a", allowed), 6000, 0.0, are_used=True)
    with pytest.raises(es.TokensLimited, match="per minute, and 0 are left; try again"):
        rates.take_request(caller("a", allowed), 0.0)


def _comes_back_in_time(rate: float) -> bool:
    rates, allowed = es.Rates(), es.Allowance(rate, 1)
    assert is_let_in(rates, allowed, 0.0)
    with pytest.raises(es.RateLimited) as caught:
        rates.take_request(caller("a", allowed), 0.0)
    headers = dict(es.error_headers(caught.value))
    return is_let_in(rates, allowed, int(headers["retry-after-ms"]) / 1000)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0, 2.0])
def test_milliseconds_are_rounded_up(rate: float) -> None:
    assert _comes_back_in_time(rate)


@pytest.mark.parametrize("is_of_tokens", [False, True], ids=["requests", "tokens"])
def test_a_refusal_carries_the_fields_of_every_limit(*, is_of_tokens: bool) -> None:
    rates, allowed = es.Rates(), es.Allowance(0.5, 1, 60)
    rates.take_request(caller("a", allowed), 0.0)
    rates.take_tokens(caller("a", allowed), 50, 0.0)
    with pytest.raises(es.RateLimited) as caught:
        if is_of_tokens:
            rates.take_tokens(caller("a", allowed), 11, 0.0)
        else:
            rates.take_request(caller("a", allowed), 0.0)
    assert caught.value.headers == rates.headers(caller("a", allowed), 0.0)
    assert dict(caught.value.headers).keys() == FIELDS


# --- memory ---


def test_who_was_idle_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(es, "_CLIENTS_KEPT", 3)
    rates, allowed = es.Rates(), es.Allowance(0.001, 1, 60)
    for who in ("a", "b", "c"):
        assert is_let_in(rates, allowed, 0.0, who)
    assert not is_let_in(rates, allowed, 0.0, "a")  # it is not idle any more
    assert is_let_in(rates, allowed, 0.0, "d")
    assert set(rates._clients) == {"c", "a", "d"}
    assert is_let_in(rates, allowed, 0.0, "b")  # was forgotten, and so is full
    assert not is_let_in(rates, allowed, 0.0, "a")


@given(st.lists(st.integers(0, 40)))
def test_clients_that_are_kept_are_bounded(clients: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(es, "_CLIENTS_KEPT", 10)
        rates, allowed = es.Rates(), es.Allowance(1.0, 0, 60)
        for client in clients:
            is_let_in(rates, allowed, 0.0, str(client))
            rates.headers(caller(str(client), allowed), 0.0)
        assert len(rates._clients) == min(10, len(set(clients)))
