"""ERRORS: every error a caller can be told is whole, and says when to come back."""

from __future__ import annotations

import http
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embellama_server as es

every_error = pytest.mark.parametrize("kind", es.API_ERRORS, ids=lambda k: k.__name__)


def test_the_table_holds_every_error_there_is() -> None:
    # API_ERRORS is read once, so a class below it or a subclass of one would be
    # missing from README and from the metrics, whose labels come from the table.
    def below(kind: type[es.ApiError]) -> set[type[es.ApiError]]:
        return {kind}.union(*(below(sub) for sub in kind.__subclasses__()))

    assert set(es.API_ERRORS) == below(es.ApiError) - {es.ApiError}


@every_error
def test_an_error_states_its_status_type_and_code_itself(
    kind: type[es.ApiError],
) -> None:
    assert {"status", "code"} <= set(vars(kind)), "inherited from ApiError"
    assert kind.status in set(http.HTTPStatus)
    assert 400 <= kind.status <= 599
    assert kind.code == kind.code.lower().replace(" ", "_") != ""
    # Two words clients sort errors by. 501 and 505 are the request's fault although
    # their number begins with a 5; a full queue is nobody's.
    asked_wrongly = kind.status < 500 or kind.status in (501, 505)
    sort = "invalid_request_error" if asked_wrongly else "server_error"
    special = {
        es.Overloaded: "overloaded",
        es.TooManyConnections: "overloaded",
        es.RateLimited: "requests",  # OpenAI's word
    }
    assert kind.type == special.get(kind, sort)


def test_no_two_errors_share_a_code() -> None:
    codes = [kind.code for kind in es.API_ERRORS]
    assert sorted(codes) == sorted(set(codes))


@every_error
def test_an_error_is_a_line_of_the_readme(kind: type[es.ApiError]) -> None:
    assert kind.__doc__ not in (None, es.ApiError.__doc__)
    rows = [line for line in es.errors_table().splitlines() if f"`{kind.code}`" in line]
    assert rows == [f"| {kind.status} | `{kind.code}` | {kind.__doc__} |"]
    assert rows[0].count("|") == 4, "a bar in the text would be another column"


@every_error
@pytest.mark.parametrize("param", [None, "input[3]"])
def test_a_body_has_the_four_keys_of_openai_s_error_object(
    kind: type[es.ApiError], param: str | None
) -> None:
    message = 'say "no"\n\x00 \N{SNOWMAN} \N{GRINNING FACE}'
    body = json.loads(es.error_body(kind(message, param=param)))
    assert body == {
        "error": {
            "message": message,
            "type": kind.type,
            "param": param,
            "code": kind.code,
        }
    }


def test_an_error_s_text_is_its_message() -> None:
    assert str(es.InvalidValue("not that")) == "not that"


def test_an_error_that_says_no_time_sends_no_header() -> None:
    assert es.error_headers(es.Overloaded("full")) == [("x-should-retry", "true")]


@every_error
def test_clients_are_told_whether_another_try_makes_sense(
    kind: type[es.ApiError],
) -> None:
    # Without it the SDKs try every 408, 409, 429 and 5xx again, however hopeless.
    said = dict(es.error_headers(kind("no")))["x-should-retry"]
    hopeful = kind.status in (408, 429, 503, 504)
    assert said == ("true" if hopeful else "false")


def test_headers_of_the_raise_site_come_along() -> None:
    error = es.MethodNotAllowed("no", headers=(("allow", "GET"),), retry_after_s=2)
    assert ("allow", "GET") in es.error_headers(error)
    assert ("retry-after", "2") in es.error_headers(error)


@pytest.mark.parametrize(
    ("asked_s", "seconds", "milliseconds"),
    [
        (0.0, "1", "1000"),
        (-5.0, "1", "1000"),
        (1.0, "1", "1000"),
        (1.2, "2", "1200"),
        (59.9, "60", "59900"),
        (60.0, "60", "60000"),
        (3600.0, "60", "60000"),
        (math.inf, "60", "60000"),
    ],
)
def test_the_wait_is_one_to_sixty_seconds(
    asked_s: float, seconds: str, milliseconds: str
) -> None:
    headers = dict(es.error_headers(es.Overloaded("full", retry_after_s=asked_s)))
    assert headers["retry-after"] == seconds
    assert headers["retry-after-ms"] == milliseconds


@settings(deadline=None)  # a busy machine is not a failure
@given(st.floats(allow_nan=False))
def test_both_forms_of_the_wait_say_the_same(asked_s: float) -> None:
    headers = dict(es.error_headers(es.Overloaded("full", retry_after_s=asked_s)))
    # Whole numbers (int() refuses "1.0"), and who reads seconds never comes earlier.
    seconds, milliseconds = (int(headers[f"retry-after{x}"]) for x in ("", "-ms"))
    assert 1 <= seconds <= 60
    assert (seconds - 1) * 1000 <= milliseconds <= seconds * 1000
    assert milliseconds >= 1000
