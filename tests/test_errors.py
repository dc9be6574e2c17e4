"""ERRORS: every error a caller can be told is whole, and says when to come back."""

from __future__ import annotations

import http
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import docs

every_error = pytest.mark.parametrize("kind", es.API_ERRORS, ids=lambda k: k.__name__)


def below(kind: type[es.ApiError]) -> set[type[es.ApiError]]:
    """All that are made of it."""
    subs = set(kind.__subclasses__())
    return subs.union(*map(below, subs))


# Finer than the table: the same to OpenAI's clients, or but for the type.
FINER = sorted(below(es.ApiError).difference(es.API_ERRORS), key=lambda k: k.__name__)
DIALECTS = {one.name: one for one in (es.OPENAI, es.TEI, es.SEED, es.OLLAMA)}
every_class = pytest.mark.parametrize(
    "kind", [*es.API_ERRORS, *FINER], ids=lambda k: k.__name__
)
every_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)


def test_the_table_holds_every_error_there_is() -> None:
    # API_ERRORS is read once, so a class below it would be missing from README; and
    # from the metrics, whose labels come from the table.
    assert len(es.API_ERRORS) == len(set(es.API_ERRORS))
    for kind in FINER:
        (base,) = kind.__bases__
        assert base in es.API_ERRORS
        assert (kind.status, kind.code) == (base.status, base.code)
        assert kind.is_transient == base.is_transient


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
        es.RateLimited: "requests",  # OpenAI's word, as the next
        es.TooManyTokens: "max_tokens_per_request",
    }
    assert kind.type == special.get(kind, sort)


def test_no_two_errors_share_a_code() -> None:
    codes = [kind.code for kind in es.API_ERRORS]
    assert sorted(codes) == sorted(set(codes))


@every_error
def test_an_error_is_a_line_of_the_readme(kind: type[es.ApiError]) -> None:
    assert kind.__doc__ not in (None, es.ApiError.__doc__)
    rows = [
        line for line in docs.errors_table().splitlines() if f"`{kind.code}`" in line
    ]
    assert len(rows) == 1
    assert rows[0].startswith(f"| {kind.status} | `{kind.code}` | {kind.__doc__} | ")
    assert rows[0].count("|") == 5, "a bar in the text would be another column"


@every_class
@pytest.mark.parametrize("param", [None, "input[3]"])
def test_a_body_has_the_four_keys_of_openai_s_error_object(
    kind: type[es.ApiError], param: str | None
) -> None:
    message = 'say "no"\n\x00 \N{SNOWMAN} \N{GRINNING FACE}'
    error = kind(message, param=param)
    assert es.OPENAI.status_of(kind) == kind.status
    body = json.loads(es.OPENAI.body_of(error))
    assert body == {"error": es.error_object(error)}
    assert body == {
        "error": {
            "message": message,
            "type": kind.type,
            "param": param,
            "code": kind.code,
        }
    }


# --- dialects ---

STATUSES = {status.value for status in http.HTTPStatus}


def conforms(value: object, schema: Mapping[str, Any]) -> bool:
    """Whether a value is as a schema says, of the kinds that are used here."""
    kinds: dict[str, type] = {"object": dict, "string": str, "null": type(None)}
    assert set(schema) <= {"type", "required", "properties"}, "another kind"
    said = schema["type"]
    types = [kinds[name] for name in ([said] if isinstance(said, str) else said)]
    if not isinstance(value, tuple(types)):
        return False
    if not isinstance(value, dict):
        return True
    assert set(schema["required"]) == set(schema["properties"])
    return set(value) == set(schema["required"]) and all(
        conforms(value[name], one) for name, one in schema["properties"].items()
    )


def test_the_reader_of_schemas_refuses_what_is_none() -> None:
    schema = es.OPENAI.schema
    good: dict[str, Any] = json.loads(es.OPENAI.body_of(es.NotReady("no")))
    assert conforms(good, schema)
    for name in good["error"]:
        less = {k: v for k, v in good["error"].items() if k != name}
        assert not conforms({"error": less}, schema)
        assert not conforms({"error": good["error"] | {name: 3}}, schema)
    assert not conforms({"error": "no"}, schema)
    assert not conforms(good | {"more": "x"}, schema)


@every_dialect
@every_class
def test_every_error_can_be_said_in_every_dialect(
    dialect: es.Dialect, kind: type[es.ApiError]
) -> None:
    message = 'say "no"\n\x00 \N{SNOWMAN} \N{GRINNING FACE}'
    status = dialect.status_of(kind)
    assert status in STATUSES
    assert 400 <= status <= 599
    for param in (None, "input[3]"):
        body = json.loads(dialect.body_of(kind(message, param=param)))
        assert conforms(body, dialect.schema), body
        said = body["error"]
        assert (said["message"] if isinstance(said, dict) else said) == message


@every_dialect
@every_class
def test_no_dialect_blames_another_or_hides_that_it_may_pass(
    dialect: es.Dialect, kind: type[es.ApiError]
) -> None:
    status = dialect.status_of(kind)
    if kind.is_transient:
        assert status in (408, 429, 503, 504), "clients and proxies go by the number"
    else:
        assert status not in (408, 429, 503, 504)
    if status != kind.status and kind is not es.WrongKindOfModel:
        # 424 is TEI's word for what failed behind it.
        assert status in (424, 429) or status // 100 == kind.status // 100


# text-embeddings-inference 1.9: the status and word of each kind of its errors.
TEI_KINDS = {
    "Empty": {400},
    "Validation": set(range(400, 500)) | {501, 505},
    "Backend": {424, *range(500, 600)},
    "Overloaded": {429, 503},
    "Unhealthy": {503},
}


@pytest.mark.parametrize("dialect", [es.TEI, es.SEED], ids=lambda d: d.name)
@every_class
def test_a_word_of_tei_s_goes_with_a_status_it_has(
    dialect: es.Dialect, kind: type[es.ApiError]
) -> None:
    body = json.loads(dialect.body_of(kind("no")))
    assert dialect.status_of(kind) in TEI_KINDS[body["error_type"]]


@pytest.mark.parametrize(
    ("kind", "tei", "seed", "openai"),
    [
        (es.EmptyInput, (400, "Empty"), 400, 400),
        (es.InvalidValue, (422, "Validation"), 422, 400),
        (es.TokenIdsRefused, (422, "Validation"), 422, 400),
        (es.ContextLengthExceeded, (422, "Validation"), 422, 400),
        (es.WrongKindOfModel, (424, "Backend"), 424, 400),
        (es.NonFiniteVector, (424, "Backend"), 500, 500),
        (es.EngineFailed, (424, "Backend"), 500, 500),
        (es.Overloaded, (429, "Overloaded"), 429, 503),
        (es.RateLimited, (429, "Overloaded"), 429, 429),
        (es.NotReady, (503, "Unhealthy"), 503, 503),
        (es.ModelUnavailable, (503, "Unhealthy"), 503, 503),
        (es.InternalError, (500, "Backend"), 500, 500),
        (es.BodyTooLarge, (413, "Validation"), 413, 413),
        (es.ModelNotFound, (404, "Validation"), 404, 404),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_an_error_has_the_number_that_clients_of_each_dialect_know(
    kind: type[es.ApiError], tei: tuple[int, str], seed: int, openai: int
) -> None:
    body = json.loads(es.TEI.body_of(kind("no")))
    assert (es.TEI.status_of(kind), body["error_type"]) == tei
    assert es.SEED.status_of(kind) == seed
    assert es.OPENAI.status_of(kind) == es.OLLAMA.status_of(kind) == openai


def test_what_is_made_of_an_error_is_said_as_it_is() -> None:
    class Finer(es.Overloaded):
        pass

    class Finest(Finer):
        pass

    for kind in (Finer, Finest):
        assert es.TEI.status_of(kind) == 429
        assert json.loads(es.TEI.body_of(kind("no")))["error_type"] == "Overloaded"
        assert es.OPENAI.status_of(kind) == 503


# --- what goes along ---


def test_an_error_s_text_is_its_message() -> None:
    assert str(es.InvalidValue("not that")) == "not that"


@every_error
def test_each_429_and_503_says_when_to_come_back_and_others_only_if_they_know(
    kind: type[es.ApiError],
) -> None:
    said = dict(es.error_headers(kind("no")))
    assert said.get("retry-after") == ("1" if kind.status in (429, 503) else None)
    said = dict(es.error_headers(kind("no", retry_after_s=7)))
    assert said["retry-after"] == "7"


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
