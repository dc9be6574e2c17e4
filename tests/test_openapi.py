"""DESCRIPTION: /openapi.json says what the server does, no more and no less.

The document is checked by others (openapi-spec-validator, jsonschema), and then used:
bodies are made from its schemas, some that fit and some that do not, and what comes back
must be what it says.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openapi_spec_validator
import pytest
import referencing
import referencing.jsonschema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import both, docs, kit

DOCUMENT: Any = es.json_codec().loads(es.openapi_text())
ROUTES = {(route.method, route.path): route for route in es.ROUTES}
FORMED = [route for route in es.ROUTES if route.form is not None]
WORKING = [route for route in FORMED if route.access == "key"]
ADMIN = [route for route in FORMED if route.access == "admin"]


def named(route: Any) -> str:
    """For pytest."""
    return f"{route.method} {route.path}"


# --- the document, to those who know what one is ---

REGISTRY: Any = referencing.Registry().with_resource(
    "urn:openapi", referencing.jsonschema.DRAFT202012.create_resource(DOCUMENT)
)


def judge_at(*path: str) -> Any:
    """A validator of the schema that stands at this place of the document."""
    pointer = "/".join(part.replace("~", "~0").replace("/", "~1") for part in path)
    return jsonschema.Draft202012Validator(
        {"$ref": f"urn:openapi#/{pointer}"}, registry=REGISTRY
    )


def resolved(node: Any) -> Any:
    """A part of the document, or the component that it refers to."""
    while "$ref" in node:
        found = DOCUMENT
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node


def operation(route: es.Route) -> Any:
    """What the document says of a route."""
    return DOCUMENT["paths"][route.path][route.method.lower()]


def form_schema(route: es.Route) -> Any:
    """Of the body that a route takes."""
    said = operation(route)["requestBody"]["content"]["application/json"]["schema"]
    return resolved(said)


def check(reply: kit.Reply, route: es.Route) -> None:
    """The document has this status, this content type, and this body for the route."""
    responses = operation(route)["responses"]
    said = str(reply.status)
    if route.also and said not in responses:  # an error in one of two shapes
        said = "default"
    assert said in responses, (reply.status, reply.body[:300])
    content = resolved(responses[said]).get("content", {})
    kind = reply.headers.get("content-type", "").partition(";")[0]
    assert kind in content, (reply.status, kind, reply.body[:300])
    if kind == "application/json":
        node = responses[said]
        where = ["paths", route.path, route.method.lower(), "responses", said]
        if "$ref" in node:
            where = node["$ref"].removeprefix("#/").split("/")
        judge = judge_at(*where, "content", kind, "schema")
        problem = jsonschema.exceptions.best_match(judge.iter_errors(reply.json))
        assert problem is None, (reply.status, reply.body[:300], str(problem)[:300])


def test_the_document_is_valid_openapi_3_1() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    openapi_spec_validator.validate(DOCUMENT)


def test_each_schema_in_it_is_valid_json_schema_2020_12() -> None:
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for route in es.ROUTES:
        jsonschema.Draft202012Validator.check_schema(route.reply)


def test_it_has_every_route_and_nothing_else() -> None:
    described = {
        (method.upper(), path)
        for path, methods in DOCUMENT["paths"].items()
        for method in methods
    }
    assert described == set(ROUTES)


def test_operation_ids_are_unique_and_names_in_programs() -> None:
    ids = [operation(route)["operationId"] for route in es.ROUTES]
    assert len(set(ids)) == len(ids)
    assert [name for name in ids if not re.fullmatch(r"[a-z][a-z0-9_.]*", name)] == []


def test_a_route_has_a_body_in_it_if_it_has_a_form() -> None:
    for route in es.ROUTES:
        assert ("requestBody" in operation(route)) == (route.form is not None)


def test_every_field_of_every_form_is_in_it_and_explained() -> None:
    import dataclasses

    for route in FORMED:
        assert route.form is not None
        said = form_schema(route)["properties"]
        assert set(said) == {row.name for row in dataclasses.fields(route.form)}
        assert all(one["description"] for one in said.values()), route.path


def test_every_component_is_used() -> None:
    text = es.openapi_text().decode()
    for kind, components in DOCUMENT["components"].items():
        for name in components if kind != "securitySchemes" else ():
            assert f'"#/components/{kind}/{name}"' in text, name


def test_nothing_in_it_depends_on_this_machine() -> None:
    text = es.openapi_text().decode()
    assert str(Path.home()) not in text
    assert str(kit.ROOT) not in text


def test_every_example_in_it_is_taken_by_the_schema_and_by_the_reader() -> None:
    examples = 0
    for route in FORMED:
        assert route.form is not None
        body = {}
        for name, said in form_schema(route)["properties"].items():
            for example in said.get("examples", ()):
                jsonschema.validate(example, said)
                body[name] = example
                examples += 1
        es.parse_form(route.form, body)
    assert examples >= len(WORKING)


def test_every_default_in_it_is_what_the_reader_puts_there() -> None:
    for route in FORMED:
        assert route.form is not None
        schema = form_schema(route)
        needed = {
            name: schema["properties"][name]["examples"][0]
            for name in schema.get("required", ())
            if "examples" in schema["properties"][name]
        }
        if set(needed) != set(schema.get("required", ())):
            continue
        form: Any = es.parse_form(route.form, needed)
        for name, said in schema["properties"].items():
            if "default" in said:
                jsonschema.validate(said["default"], said)
                assert getattr(form, name) == said["default"], (route.path, name)


def test_the_openapi_verb_prints_what_the_server_answers(client: both.Client) -> None:
    command = [sys.executable, str(kit.ROOT / "embellama_server.py"), "openapi"]
    done = subprocess.run(
        command, capture_output=True, timeout=kit.DEADLINE_S, check=True
    )
    assert done.stderr == b""
    assert done.stdout == client.get("/openapi.json").body + b"\n"


def test_readme_lists_the_same_endpoints() -> None:
    text = docs.README.read_text()
    table = text.partition("<!-- endpoints:begin -->")[2].partition("<!-- endpoints")[0]
    rows = re.findall(r"^\| `([A-Z]+) (\S+)` \|", table, re.MULTILINE)
    assert rows == [(route.method, route.path) for route in es.ROUTES]


# --- a server, and what it says to GET ---


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[both.Client]:
    """Of a server whose first model embeds, the second one ranks, the third generates."""
    folder = tmp_path_factory.mktemp("models")
    flags = ("--accept-token-ids", "--prompt", "query=find ")
    with both.asking(folder, *flags, has_chatter=True) as asked:
        yield asked


@pytest.fixture(scope="module")
def spare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[both.Client]:
    """Of one that may be administered."""
    with both.asking(tmp_path_factory.mktemp("models")) as asked:
        yield asked


ACCEPTS = (
    None,
    "*/*",
    "application/json",
    "text/plain",
    "text/html, application/xhtml+xml, */*;q=0.8",
    "image/png",
    "application/json;q=0",
    "*/*;q=0",
    "text/*",
    "application/*;q=0.1, text/plain;q=0.05",
    "nonsense",
    ",,,",
    "application/json; charset=utf-8",
    "application/octet-stream",
    "a/b;q=1.0000",
    "\xff/\xfe",
    "*/json",
    "application/json" * 500,
)


@pytest.mark.parametrize("accept", ACCEPTS)
def test_get_answers_as_described_whatever_is_accepted(
    client: both.Client, accept: str | None
) -> None:
    for route in es.ROUTES:
        if route.method != "GET":
            continue
        path = route.path.replace("{id}", "embedder")
        fields = {} if accept is None else {"accept": accept}
        check(client.get(path, **fields), route)


@pytest.mark.parametrize("name", ["nobody", "%00", "a/b", "%FF", "..", "%F0%9F%A6%99"])
def test_an_unknown_model_is_answered_as_described(
    client: both.Client, name: str
) -> None:
    check(client.get(f"/v1/models/{name}"), ROUTES["GET", "/v1/models/{id}"])


@pytest.mark.parametrize("accept", ACCEPTS)
def test_post_answers_as_described_whatever_is_accepted(
    client: both.Client, accept: str | None
) -> None:
    fields = {} if accept is None else {"accept": accept}
    for route in WORKING:
        body = example_of(route)
        reply = client.ask("POST", route.path, body, fields)
        assert reply.status == 200
        check(reply, route)


def example_of(route: es.Route) -> dict[str, Any]:
    """A body that a route answers with 200."""
    properties = form_schema(route)["properties"]
    body = {
        name: said["examples"][0]
        for name, said in properties.items()
        if "examples" in said
    }
    if "model" in properties:
        body["model"] = kit.model_of(route.path).replace("fake", "embedder")
    return body


@pytest.mark.parametrize("route", WORKING, ids=named)
def test_a_route_answers_the_document_s_own_example(
    client: both.Client, route: es.Route
) -> None:
    reply = client.post(route.path, example_of(route))
    assert reply.status == 200, reply.body
    check(reply, route)


@pytest.mark.parametrize("route", FORMED, ids=named)
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"text"',
        b"\xff",
        b"\xef\xbb\xbf",
        b'{"inputs":NaN}',
        b"[" * 1000,
        b'{"a":' * 1000,
        b'["\\ud800"]',
        b"1e999",
        b'{"\\u0000":0',
        b"{]",
        b"\0" * 100,
    ],
    ids=lambda raw: repr(raw[:16]),
)
def test_what_is_no_form_at_all_is_refused_as_described(
    client: both.Client, route: es.Route, raw: bytes
) -> None:
    reply = client.post(route.path, raw)
    assert 400 <= reply.status < 500, reply.body
    check(reply, route)


# --- bodies made from the document ---

WORDS = st.one_of(
    st.sampled_from(("embedder", "ranker", "query", "ranker@1", "embedder:latest")),
    st.sampled_from(("cat", "two words", "a b c d e f", "\0", "\u2028", "\U0001f600")),
    st.sampled_from(("word " * 40, "{text}", "'", '"', "\\", "\r\nx: y")),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
NUMBERS = (0, 1, 2, 3, 8, 9, 100, 2**30 - 1, 2**31, 2**32, 2**53, 2**63, 2**64 - 1)


def fitting(schema: Any) -> st.SearchStrategy[Any]:
    """Values that a schema of ours takes. Raises for a keyword that we never use."""
    schema = resolved(schema)
    if "anyOf" in schema:
        return st.one_of([fitting(one) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind == "null":
        return st.none()
    if kind == "boolean":
        return st.booleans()
    if kind == "number":
        return st.floats(schema.get("minimum", 0), schema.get("maximum", 1))
    if kind == "integer":
        low, high = schema.get("minimum", 0), schema.get("maximum", 2**64 - 1)
        some = st.sampled_from([n for n in NUMBERS if low <= n <= high])
        return st.one_of(some, st.integers(low, min(high, 2**40)))
    if "pattern" in schema:
        return st.from_regex(schema["pattern"])
    if kind == "string":
        return WORDS.filter(
            lambda text: (
                schema.get("minLength", 0) <= len(text) <= schema.get("maxLength", 1000)
            )
        )
    if kind == "array":
        least = schema.get("minItems", 0)
        return st.lists(fitting(schema["items"]), min_size=least, max_size=least + 3)
    assert kind == "object", schema
    properties = {
        name: fitting(one) for name, one in schema.get("properties", {}).items()
    }
    needed = {name: properties.pop(name) for name in schema.get("required", ())}
    return st.fixed_dictionaries(needed, optional=properties)


ODD_VALUES: list[Any] = [
    *(True, False, 0, 1, -1, 2**53 + 1, 2**63, 0.5, -0.0, 1e300, "", "x", "true"),
    *("yes", "2", "-2", "2.5", 2),
    *([], [[]], [None], [True], [0.5], [""], ["x", 1], [["x"]], [[-1]], [{}]),
    *({}, {"a": 1}, {"text": 1}, {"text": ""}, {"source_sentence": "x"}),
    {"source_sentence": "x", "sentences": []},
    {"truncate": 1},
]


@functools.cache
def wrong_values(form: str, name: str) -> list[Any]:
    """What a field of a form may not be."""
    judge = judge_at("components", "schemas", form, "properties", name)
    return [value for value in ODD_VALUES if not judge.is_valid(value)]


@st.composite
def misfits(draw: st.DrawFn, route: es.Route) -> Any:
    """A body that the schema of a route's form does not take: one field is wrong."""
    schema = form_schema(route)
    body = copy.deepcopy(draw(fitting(schema)))
    name = draw(st.sampled_from(sorted(schema["properties"])))
    wrong = [*wrong_values(schema_name(route), name)]
    if name in schema.get("required", ()):
        wrong.append(None)
        if draw(st.integers(0, 5)) == 0:
            body.pop(name, None)
            return body
    if name == "input":  # one that is none would only fail alone
        body.pop("allow_partial", None)
    elif name in ("documents", "texts", "text_1", "text_2"):  # and here unless told
        body["truncate"] = False
    return body | {name: draw(st.sampled_from(wrong))}


def schema_name(route: es.Route) -> str:
    """Of a route's form, in the document."""
    reference = operation(route)["requestBody"]["content"]["application/json"]["schema"]
    return str(reference["$ref"].rpartition("/")[2])


# What a reader says of a value whose type, or bounds, are not the schema's.
OF_THE_WRONG_TYPE = re.compile(
    r" must be (a |an |true|one of )(?!1 to)|\bmissing: (?!name one)|: give at least one|not a token id"
)
ONE_SERVER = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def sentence(reply: kit.Reply) -> str:
    """What an error says, in any dialect."""
    error = reply.json["error"]
    return str(error["message"] if isinstance(error, dict) else error)


def told_apart(route: es.Route) -> tuple[object, ...]:
    """All of a row but its path: routes alike in it answer any body alike."""
    return (route.handler, route.form, route.dialect, route.also, route.access)


APART = [*{told_apart(route): route for route in reversed(WORKING)}.values()][::-1]


def test_a_path_with_another_s_row_answers_as_that(client: both.Client) -> None:
    rows = {told_apart(route): route for route in APART}
    for route in WORKING:
        same = rows[told_apart(route)]
        body = example_of(route)
        for sent in (body, {"model": 1}):
            replies = [client.post(one.path, sent) for one in (route, same)]
            assert replies[0].status == replies[1].status
            assert form_schema(route) == form_schema(same)


ODD_PARTS: list[Any] = [None, {}, [], {"type": {}}, [[]], 1, "", "x", True, 0.5]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Where something else could be put: containers, each with a key or an index."""
    keys = [*value] if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    inner = [value[key] for key in keys if isinstance(value[key], (dict, list))]
    return found + [place for one in inner for place in places(one)]


@pytest.mark.parametrize(
    "form",
    dict.fromkeys(route.form for route in FORMED),
    ids=lambda form: str(form.__name__),
)
def test_what_is_odd_anywhere_in_a_body_is_read_or_refused(form: Any) -> None:
    schema = DOCUMENT["components"]["schemas"][form.__name__]

    @settings(max_examples=20, deadline=None)
    @given(fitting(schema))
    def holds(body: Any) -> None:
        body = copy.deepcopy(body)
        for container, key in places(body):
            right = container[key]
            for odd in ODD_PARTS:
                container[key] = odd
                with contextlib.suppress(es.ApiError):
                    es.parse_form(form, body)
            container[key] = right

    holds()


@pytest.mark.parametrize("route", APART, ids=named)
def test_what_fits_the_schema_is_never_called_malformed(
    client: both.Client, route: es.Route
) -> None:
    judge = judge_at("components", "schemas", schema_name(route))

    @ONE_SERVER
    @given(fitting(form_schema(route)))
    def holds(body: Any) -> None:
        assert judge.is_valid(body)
        reply = client.post(route.path, body)
        assert reply.status < 500, reply.body
        check(reply, route)
        if reply.status != 200:
            assert not OF_THE_WRONG_TYPE.search(sentence(reply)), reply.body

    holds()


@pytest.mark.parametrize("route", APART, ids=named)
def test_what_does_not_fit_the_schema_is_refused(
    client: both.Client, route: es.Route
) -> None:
    @ONE_SERVER
    @given(misfits(route))
    def holds(body: Any) -> None:
        reply = client.post(route.path, body)
        assert 400 <= reply.status < 500, (body, reply.body)
        check(reply, route)

    holds()


@pytest.mark.parametrize("route", ADMIN, ids=named)
def test_administration_answers_as_described_whatever_is_asked(
    spare: both.Client, route: es.Route
) -> None:
    @ONE_SERVER
    @given(st.one_of(fitting(form_schema(route)), misfits(route)))
    def holds(body: Any) -> None:
        if isinstance(body, dict) and "stop" in body:
            body |= {"stop": False}  # there is more to ask it
        reply = spare.post(route.path, body)
        assert reply.status < 500 or reply.status == 503, reply.body
        check(reply, route)
        check(spare.get("/admin/models"), ROUTES["GET", "/admin/models"])

    holds()
    assert spare.post("/admin/drain", {"off": True}).status == 200


def test_after_all_that_the_servers_are_well(
    client: both.Client, spare: both.Client
) -> None:
    assert client.post("/embed", {"inputs": "cat", "model": "embedder"}).status == 200
    for one in (client, spare):  # of the latter a model may have been removed
        assert one.get("/ready").status == 200
        text = one.get("/metrics").body.decode()
        assert 'code="internal_error"} 0' in text or "internal_error" not in text
