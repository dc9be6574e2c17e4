"""What a grammar of a schema allows is valid by the schema, and what it cannot say is refused."""

from __future__ import annotations

import contextlib
import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

import embellama_server as es
from tests import kit
from tests.llama_grammars import LlamaGrammar, Words
from tests.random_schemas import accepts, grammar_of, schema, walk

OBJECT = {"type": "object"}
TEXT = {"type": "string"}


def person() -> dict[str, Any]:
    """As pydantic writes a model with an optional field."""
    return {
        "type": "object",
        "title": "Person",
        "properties": {
            "name": {"type": "string", "title": "Name"},
            "age": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
            "children": {"type": "array", "items": {"$ref": "#/$defs/Child"}},
        },
        "required": ["name"],
        "$defs": {"Child": {"type": "object", "properties": {"name": TEXT}}},
    }


NODE = {
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
        }
    },
    "$ref": "#/$defs/Node",
}
TREE = {
    "type": "object",
    "properties": {"children": {"type": "array", "items": {"$ref": "#"}}},
}
CAT = {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {}}}
CAT["required"] = [*CAT["properties"]]
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}, "barks": {}}}
DOG["required"] = [*DOG["properties"]]
NAMED = {"type": "object", "properties": {"name": TEXT}, "required": ["name"]}
AGED = {"type": "object", "properties": {"age": {"type": "integer"}}}

# A schema, texts that its grammar allows, and texts that it does not.
CASES: list[tuple[Any, list[str], list[str]]] = [
    (OBJECT, ["{}", '{"a": {"b": [1, null]}}', '{\n  "a": 1\n}'], ["[]", "1", "{,}"]),
    (True, ["1", '"x"', "[[]]", "{}", "-1.5e10"], ["01", "nul", "", "[1,]", "'x'"]),
    (TEXT, ['"é🙂\\n\\u00e9\\ud83d\\ude42"'], ['"\n"', '"\\q"', '"\\ud83d"', '"', "x"]),
    ({"enum": ["🙂", 'a"b\\c\n', 1, None, [1], {"a": "b"}]},
     ['"🙂"', '"a\\"b\\\\c\\n"', "1", "null", "[1]", '{"a": "b"}'], ['"a"', "2", "[]"]),
    ({"const": 1, "type": "string", "enum": [1]}, [], []),
    ({"type": ["integer", "null"]}, ["12345678901234567890", "-0", "null"], ["1.5", '"a"']),
    ({"type": "string", "nullable": True}, ['"a"', "null"], ["1"]),
    ({"enum": ["a"], "nullable": True}, ['"a"', "null"], ['"b"']),
    ({"type": "string", "minLength": 2, "maxLength": 3},
     ['"ab"', '"🙂\\n\\u00e9"', '"\\ud83d\\ude42x"'], ['"a"', '"abcd"']),
    ({"type": "string", "maxLength": 5000}, ['"' + "x" * 5000 + '"'], ['"' + "x" * 5001 + '"']),
    ({"type": "string", "maxLength": 2**31 - 1}, ['""', '"abc"'], ["1"]),
    ({"type": "string", "pattern": "^[a-c]+$", "maxLength": 3}, ['"abc"'], ['"abcd"', '""']),
    ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2023-02-29"', '"2024-13-01"']),
    ({"type": "string", "format": "time"}, ['"23:59:59Z"', '"00:00:00.5+01:00"'], ['"24:00:00Z"']),
    ({"type": "string", "format": "uri", "minLength": 1, "maxLength": 2083},  # Pydantic's
     ['"https://a.bc/d?e=f"', '"http://a.bc"', f'"https://a.bc/x?y={"A" * 300}"',
      f'"https://a.bc{"/x" * 30}"'], ['"a.bc"', '""']),
    ({"type": "string", "format": "uuid"},
     ['"01234567-89ab-cdef-0123-456789abcdef"'], ['"01234567"']),
    ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, ["0", "0.5"], ["1", "-0.5", "1.0"]),
    ({"type": "number", "minimum": 0, "exclusiveMinimum": True}, ["0.1"], ["0", "-1"]),
    ({"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 10}, ["5"], ["6", "15"]),
    ({"type": "integer", "multipleOf": 5.0, "minimum": 0, "maximum": 10}, ["5"], ["5.0", "6"]),
    ({"type": "integer", "format": "int32"}, ["2147483647"], ["2147483648"]),
    (person(), ['{"name": "A"}', '{"name": "A", "age": null, "children": [{"name": "B"}]}',
                '{"name":"A","children":[]}'], ['{"age": 1}', '{"age": 1, "name": "A"}', '{"name": "A", "x": 1}']),
    (NODE, ['{"value": 1, "next": {"value": 2, "next": null}}'], ['{"value": 1}', "null"]),
    (TREE, ['{"children": [{"children": []}, {}]}'], ['{"children": [1]}']),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
     ["[1, 2]", "[1,2,3]"], ["[1]", "[1,2,3,4]", "[]"]),
    ({"type": "array", "prefixItems": [TEXT, {"type": "null"}], "items": False, "minItems": 1},
     ['["a"]', '["a", null]'], ["[]", '["a", null, 1]', "[null]"]),
    ({"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "null"}},
     ['{"a": 1, "b": null}', '{"ab": null}', '{"": null}', "{}"], ['{"b": 1}', '{"b": null, "a": 1}']),
    ({"type": "object", "propertyNames": {"enum": ["x"]}, "maxProperties": 1}, ['{"x": 1}'], ['{"y": 1}']),
    ({"type": "object", "minProperties": 1}, ['{"x": 1}'], ["{}"]),
    ({"oneOf": [CAT, DOG], "discriminator": {"propertyName": "kind"}},
     ['{"kind": "dog", "barks": 1}'], ['{"kind": "dog", "lives": 1}']),
    ({"allOf": [NAMED, AGED]}, ['{"name": "A", "age": 1}', '{"name": "A"}'], ["{}"]),
    ({"allOf": [{"type": "number", "minimum": 2}, {"type": "integer", "maximum": 3}]}, ["2", "3"], ["1", "2.5"]),
    ({**NAMED, "anyOf": [{"required": ["x"]}, {"properties": {"y": {"type": "null"}}}]},
     ['{"name": "A", "x": 1}', '{"name": "A", "y": null}'], ['{"x": 1}']),
    ({"$ref": "#/definitions/a~1b", "definitions": {"a/b": {"type": "null"}}}, ["null"], ["1"]),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "good", "bad"), [c for c in CASES if c[1]])
def test_a_schema_allows_what_it_should(
    words: Words, wanted: Any, good: list[str], bad: list[str]
) -> None:
    grammar, text = grammar_of(wanted)
    for said, is_good in (*((g, True) for g in good), *((b, False) for b in bad)):
        assert accepts(grammar, said) is is_good, said
        if is_good and not re.search("nullable|inimum.: true", json.dumps(wanted)):
            jsonschema.Draft202012Validator(wanted).validate(json.loads(said))
        theirs = LlamaGrammar(words, text)
        if theirs.parses and "5000" not in text:  # it drops or refuses some repeats
            assert theirs.accepts(said.encode()) is is_good, said
        theirs.close()


REFUSED = [
    ({"not": {}}, "schema.not is not supported"),
    ({"properties": {"a": {"if": {}}}}, "schema.properties.a.if is not supported"),
    ({"type": "array", "uniqueItems": True}, "schema.uniqueItems is not supported"),
    ({"patternProperties": {}}, "schema.patternProperties is not supported"),
    ({"unknown": 1}, "schema.unknown is not supported"),
    ({"type": "text"}, "schema.type must be a JSON type"),
    ({"type": [{}]}, "schema.type must be a JSON type"),
    ({"type": "string", "format": "regex"}, "schema.format is not supported if it is 'regex'"),
    ({"type": "string", "pattern": "(?=a)"}, "schema.pattern has the group (?=a"),
    ({"type": "string", "pattern": "^(ab)+$", "maxLength": 3}, "schema.maxLength is not supported together with a pattern"),
    ({"type": "string", "format": "email", "maxLength": 9}, "schema.maxLength is not supported together with a format"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength 3 above maxLength 2"),
    ({"type": "string", "minLength": -1}, "schema.minLength must be a whole number"),
    ({"type": "number", "multipleOf": 0.1}, "schema.multipleOf is not supported"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "allows no number"),
    ({"type": "number", "minimum": 1e40}, "allows no number"),
    ({"type": "integer", "maximum": -(10**400)}, "allows no number"),
    ({"required": ["a", "a"], "minProperties": 2}, "schema.minProperties is not supported"),
    ({"type": "integer", "minimum": "3"}, "schema.minimum must be a number"),
    ({"enum": []}, "schema.enum allows no value"),
    ({"enum": ["a"], "type": "integer"}, "schema.enum allows no value"),
    ({"enum": 1}, "schema.enum must be a list"),
    ({"enum": 1, "const": 1}, "schema.enum must be a list"),
    ({"anyOf": []}, "schema.anyOf must be a list"),
    ({"oneOf": [TEXT, {"minLength": 2}]}, "schema.oneOf is not supported where two may hold"),
    ({"allOf": [TEXT, {"type": "null"}]}, "its parts are of different types"),
    ({"allOf": [{"pattern": "a"}, {"pattern": "b"}]}, "schema.pattern is not supported, in two forms"),
    ({"$ref": "#"}, "has a $ref that leads back to itself"),
    ({"$ref": "#/a"}, "schema.$ref leads nowhere: '#/a'"),
    ({"$ref": "http://x/y"}, "schema.$ref must begin with #/"),
    ({"type": "array", "items": [{}]}, "schema.items is not supported as a list: use prefixItems"),
    ({"required": ["a"], "additionalProperties": False}, "has 'a', which may not be there"),
    ({"properties": {"a": 1}}, "schema.properties.a is no schema"),
    ({"properties": {"a": False}, "required": ["a"]}, "which may not be there"),
    (False, "schema allows no value"),
    ({"anyOf": [{"$ref": "#"}, TEXT]}, "left recursion"),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "problem"), REFUSED)
def test_what_cannot_be_said_is_refused_by_name(wanted: Any, problem: str) -> None:
    with pytest.raises(es.InvalidValue, match=re.escape(problem)) as caught:
        grammar_of(wanted)
    assert caught.value.param == "schema"


def nested(depth: int) -> Any:
    """Arrays of arrays."""
    made: Any = {"type": "array"}
    for _ in range(depth):
        made = {"type": "array", "items": made}
    return made


DOUBLED: Any = {"type": "object", "properties": {"x": {"$ref": "#"}}}
HUGE = {
    "deep": nested(100),
    "deeper than Python can go": nested(900),
    "large": {"enum": ["x" * 200_000]},
    "many references": {
        "$defs": {
            f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)
        }
        | {"d40": {}},
        "$ref": "#/$defs/d0",
    },
    "a chain of references": {
        "$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(2000)}
        | {"d2000": {}},
        "$ref": "#/$defs/d0",
    },
    "many parts": {
        "allOf": [{"properties": {"x": {"minLength": n}}} for n in range(2000)]
    },
    "many branches": {"anyOf": [{"const": n} for n in range(1000)]},
}


@pytest.mark.parametrize("name", HUGE)
def test_a_schema_that_is_too_large_is_refused_soon(name: str) -> None:
    begun = time.monotonic()
    with pytest.raises(es.InvalidValue):
        grammar_of(HUGE[name])
    assert time.monotonic() - begun < 5


def names(count: int) -> list[str]:
    """Of properties."""
    return [f"a{n:x}" for n in range(count)]


def apart(count: int) -> Any:
    """Two lists of values that have none in common, or just the last."""
    return [[*range(count)], [*range(count, 2 * count), count - 1]]


NULL: Any = {"type": "null"}
NONE: Any = False  # no value
# Each of about so many parts.
MAKES: dict[str, Callable[[int], Any]] = {
    "properties": lambda n: {"properties": dict.fromkeys(names(n), NULL)},
    "required": lambda n: {
        "properties": dict.fromkeys(names(n), NULL),
        "required": names(n)[::-1],
    },
    "only required": lambda n: {"required": names(n), "additionalProperties": NULL},
    "items": lambda n: {"prefixItems": [NULL] * n},
    "values": lambda n: {"enum": names(n)},
    "values of both": lambda n: {"allOf": [{"enum": each} for each in apart(n)]},
    "a value of them": lambda n: {"enum": names(n), "const": "a0"},
    "values apart": lambda n: {"oneOf": [{"enum": apart(n)[0]}, {"enum": names(n)}]},
    "values by type": lambda n: {
        "$defs": {"v": {"enum": [None, *range(n)]}},
        "prefixItems": [
            {"$ref": "#/$defs/v", "type": "null", "title": f"{m}"}
            for m in range(n // 8)
        ],
    },
    "parts": lambda n: {
        "allOf": [{"properties": {name: NONE}} for name in names(n)],
    },
    "branches": lambda n: {
        "properties": dict.fromkeys(names(n), NONE),
        "anyOf": [
            {"anyOf": [{"maxProperties": 100 * m + k} for k in range(50)]}
            for m in range(n // 64)
        ],
    },
    "branches apart": lambda n: {
        "oneOf": [
            {"enum": [*range(m * (n // 50), (m + 1) * (n // 50))]} for m in range(250)
        ]
    },
    "types": lambda n: {
        "allOf": [{"type": [kind] * n + ["null"]} for kind in ("string", "boolean")]
    },
    "other names": lambda n: {
        "properties": {f"{name}{'s' * 80}": NONE for name in names(n // 16)},
        "additionalProperties": NULL,
    },
    "a long name": lambda n: {
        "properties": {"n" * 8 * n: {"properties": dict.fromkeys(names(n), NULL)}}
    },
    "references": lambda n: {
        "$defs": {"d" * 8 * n: NULL, "a": {"$ref": "#/$defs/" + "d" * 8 * n}},
        "prefixItems": [{"$ref": "#/$defs/a", "title": f"{m}"} for m in range(n // 2)],
    },
    "patterns": lambda n: {
        "$defs": {"p": {"pattern": f"^{'.' * 500}$"}},
        "prefixItems": [{"$ref": "#/$defs/p", "title": f"{m}"} for m in range(n // 2)],
    },
}


@pytest.mark.parametrize("name", MAKES)
def test_a_grammar_takes_as_long_as_its_schema_is_large(name: str) -> None:
    def convert(parts: int) -> None:
        with contextlib.suppress(es.InvalidValue):
            es.schema_rule(es.GrammarRules(), MAKES[name](parts), "schema")

    kit.assert_linear(convert, 1_200)


ANY_TEXTS = {"type": "object", "additionalProperties": TEXT}


@pytest.mark.parametrize(
    ("wanted", "taken", "refused"),
    [
        ({}, ["{}"], ["{ }", '{"a":1}', "null", "[]"]),
        (OBJECT, ["{}"], ['{"a":1}']),
        ({"properties": {}, "required": [], "title": "Now"}, ["{}"], ['{"a":1}']),
        ({"additionalProperties": False}, ["{}"], ['{"a":1}']),
        ({"$ref": "#/$defs/E", "$defs": {"E": OBJECT}}, ["{}"], ['{"a":1}']),
        ({"allOf": [OBJECT, {"properties": {}}]}, ["{}"], ['{"a":1}']),
        ({"additionalProperties": True}, ["{}", '{"a":1}'], []),
        ({"additionalProperties": {}}, ["{}", '{"a":1}'], []),
        (ANY_TEXTS, ["{}", '{"a":"b"}'], ['{"a":1}']),
        ({"minProperties": 1}, ['{"a":1}'], ["{}"]),
        ({"required": ["a"]}, ['{"a":1}'], ["{}"]),
        ({"properties": {"a": OBJECT}}, ["{}", '{"a":{"b":1}}'], ['{"b":1}']),
        ({"anyOf": [{"properties": {"a": TEXT}}]}, ['{"a":"b"}'], ['{"a":1}']),
    ],
)
def test_a_function_whose_schema_says_nothing_of_arguments_has_none(
    wanted: dict[str, Any], taken: list[str], refused: list[str]
) -> None:
    rules = es.GrammarRules()
    text = rules.text(es.arguments_rule(rules, wanted, "tools.f.parameters"))
    grammar = es.Grammar(text, "tools")
    assert [accepts(grammar, one) for one in taken] == [True] * len(taken)
    assert [accepts(grammar, one) for one in refused] == [False] * len(refused)


NULL = {"type": "null"}
SOME = {"type": "object", "properties": {"a": TEXT}, "required": ["a"]}


@pytest.mark.parametrize(
    "wanted",
    [
        SOME | {"type": ["object", "null"]},
        SOME | {"nullable": True},
        {"enum": [None, {"a": "b"}, 1]},
        {"allOf": [SOME, {"type": ["object", "array"]}]},
    ],
    ids=str,
)
def test_arguments_are_an_object_whatever_else_their_schema_allows(
    wanted: dict[str, Any],
) -> None:
    rules = es.GrammarRules()
    text = rules.text(es.arguments_rule(rules, wanted, "tools.f.parameters"))
    grammar = es.Grammar(text, "tools")
    assert accepts(grammar, '{"a":"b"}')
    for other in ("null", "1", "[]", '"a"'):
        assert not accepts(grammar, other)


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "array", "items": TEXT},
        {"type": "string"},
        {"type": ["array", "null"]},
        {"const": 1},
        {"enum": [1, None]},
        {"anyOf": [NULL, SOME]},  # a branch that allows nothing is told, not left out
        {"anyOf": [NULL, {"type": "array"}]},
        {"$ref": "#/$defs/A", "$defs": {"A": {"type": "array"}}},
    ],
    ids=str,
)
def test_a_schema_that_allows_no_object_is_no_function_s(
    wanted: dict[str, Any],
) -> None:
    with pytest.raises(es.InvalidValue, match="parameters"):
        es.arguments_rule(es.GrammarRules(), wanted, "tools.f.parameters")


@pytest.mark.parametrize("wanted", [OBJECT, {**OBJECT, "properties": {}}])
def test_an_object_that_is_no_function_s_arguments_may_have_any_properties(
    wanted: dict[str, Any],
) -> None:
    grammar, _ = grammar_of(wanted)
    assert accepts(grammar, '{"a":1}')


def test_what_many_schemas_take_is_counted_together() -> None:
    # As the schemas of tools: each for itself would be let through.
    rules = es.GrammarRules()
    wanted = MAKES["parts"](500)
    with pytest.raises(es.InvalidValue, match="combines too many"):
        for _ in range(100):
            es.schema_rule(rules, wanted, "schema")


def test_a_schema_of_openai_s_largest_size_is_soon_a_grammar() -> None:
    wanted = {
        "type": "object",
        "properties": {f"field_{n}": {"type": ["string", "null"]} for n in range(1000)},
        "additionalProperties": False,
    }
    begun = time.monotonic()
    grammar, _ = grammar_of(wanted)
    assert accepts(grammar, '{"field_7": "x", "field_999": null}')
    assert not accepts(grammar, '{"field_999": null, "field_7": "x"}')
    assert time.monotonic() - begun < 5


def check_random(seed: int) -> bool:
    """Whether a schema is supported: what its grammar allows is valid, and the reverse."""
    draw = random.Random(seed)
    wanted = schema(draw)
    try:
        grammar, _ = grammar_of(wanted)
    except es.InvalidValue:
        return False
    validator = jsonschema.Draft202012Validator(wanted)
    for _ in range(3):
        said = walk(draw, grammar)
        if said is None:
            continue
        value = json.loads(said)
        validator.validate(value)
        for spaces in ({"indent": 2}, {"separators": (",", ":")}, {}):
            again = json.dumps(value, ensure_ascii=False, **spaces)
            # Numbers with bounds have no exponents, and space is short.
            if not re.search(r"\de[-+]?\d|\n {20}", again):
                assert accepts(grammar, again), again
    return True


def test_what_random_schemas_allow_is_valid_by_them() -> None:
    supported = [check_random(seed) for seed in range(200)]
    assert sum(supported) > 120


@pytest.mark.heavy
def test_what_10_000_random_schemas_allow_is_valid_by_them() -> None:
    supported = [check_random(seed) for seed in range(10_000)]
    assert sum(supported) > 6_000


@pytest.mark.heavy
def test_llama_cpp_parses_the_grammars_of_random_schemas(words: Words) -> None:
    parsed = 0
    for seed in range(3000):
        draw = random.Random(seed)
        try:
            grammar, text = grammar_of(schema(draw))
        except es.InvalidValue:
            continue
        if max(map(int, re.findall(r"\{(?:\d+,)?(\d+)\}", text)), default=0) > 250:
            continue  # it multiplies repeats, and drops or refuses those above 2,000
        theirs = LlamaGrammar(words, text)
        assert theirs.parses, text
        parsed += 1
        said = walk(draw, grammar)
        if said is not None and "\0" not in said:
            assert theirs.accepts(said.encode()), said
        theirs.close()
    assert parsed > 1000
