"""JSON schemas at random, values that are valid by them, and texts by a grammar."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import embellama_server as es

NAMES = ["a", "b", "name", "na", "é", 'quo"te', "back\\slash", "emoji🙂", "line\n", ""]
PATTERNS = ["^[a-z]+$", "^\\d{3}-\\d{4}$", "b", "^(yes|no)$", '^[^\\s"]{2,5}', "x.?$"]
FORMATS = ["date", "time", "date-time", "uuid", "email", "ipv4", "duration", "hostname"]
UNSUPPORTED: list[dict[str, Any]] = [
    {"not": {"type": "string"}},
    {"type": "array", "uniqueItems": True},
    {"type": "object", "patternProperties": {"^a": {}}},
    {"if": {}, "then": {}},
    {"type": "string", "format": "regex"},
    {"$ref": "https://example.com/schema"},
]


def schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema, mostly one that we support; ``$defs`` only if it uses them."""
    made = _schema(draw, depth)
    if "#/$defs/" in json.dumps(made):
        made["$defs"] = {"node": _schema(draw, depth - 1), "leaf": _schema(draw, 0)}
    return made


def _schema(draw: random.Random, depth: int) -> dict[str, Any]:
    kinds: list[Callable[[random.Random, int], dict[str, Any]]]
    kinds = [_string, _number, _enum, _plain]
    if depth > 0:
        kinds += [_object, _object, _array, _any_of, _all_of, _reference]
    made = draw.choice(kinds)(draw, depth - 1)
    if draw.random() < 0.1:
        made["description"] = "Something."
    if draw.random() < 0.01:
        made |= draw.choice(UNSUPPORTED)
    return made


def _string(draw: random.Random, _: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "string"}
    way = draw.randrange(5)
    if way == 0:
        made["pattern"] = draw.choice(PATTERNS)
    elif way == 1:
        made["format"] = draw.choice(FORMATS)
    elif way == 2:
        made["minLength"] = draw.randrange(4)
        made["maxLength"] = made["minLength"] + draw.choice([0, 1, 5, 300, 3000])
    return made


def _bound(draw: random.Random) -> float:
    return draw.choice(
        [
            0,
            1,
            -1,
            draw.randrange(-1000, 1000),
            draw.randrange(-(10**20), 10**20),
            round(draw.uniform(-10, 10), draw.randrange(6)),
            draw.uniform(-1, 1),
        ]
    )


def _number(draw: random.Random, _: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": draw.choice(["number", "integer"])}
    low, high = sorted([_bound(draw), _bound(draw)])
    if draw.random() < 0.6:
        made[draw.choice(["minimum", "exclusiveMinimum"])] = low
    if draw.random() < 0.6:
        made[draw.choice(["maximum", "exclusiveMaximum"])] = high
    return made


def value(draw: random.Random, depth: int = 2) -> Any:
    """Any JSON value."""
    kinds: list[Any] = [None, True, False, 0, -3, 2.5, 10**18, "", "é🙂", 'a"\\\n', "x"]
    if depth and draw.random() < 0.3:
        if draw.random() < 0.5:
            return [value(draw, depth - 1) for _ in range(draw.randrange(3))]
        names = draw.sample(NAMES, draw.randrange(3))
        return {name: value(draw, depth - 1) for name in names}
    return draw.choice(kinds)


def _enum(draw: random.Random, _: int) -> dict[str, Any]:
    if draw.random() < 0.3:
        return {"const": value(draw)}
    return {"enum": [value(draw) for _ in range(draw.randrange(1, 5))]}


def _plain(draw: random.Random, _: int) -> dict[str, Any]:
    return draw.choice(
        [{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"]}, {}]
    )


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(NAMES, draw.randrange(5))
    made: dict[str, Any] = {
        "type": "object",
        "properties": {name: _schema(draw, depth) for name in names},
        "required": [name for name in names if draw.random() < 0.6],
    }
    made["additionalProperties"] = draw.choice(
        [False, False, True, {"type": "integer"}]
    )
    if draw.random() < 0.2:
        del made["additionalProperties"]
    return made


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "array", "items": _schema(draw, depth)}
    if draw.random() < 0.3:
        made["prefixItems"] = [_schema(draw, depth) for _ in range(draw.randrange(3))]
        made["items"] = draw.choice([False, made["items"]])
    if draw.random() < 0.5:
        made["minItems"] = draw.randrange(3)
        made["maxItems"] = made["minItems"] + draw.randrange(3)
    return made


def _any_of(draw: random.Random, depth: int) -> dict[str, Any]:
    key = draw.choice(["anyOf", "anyOf", "oneOf"])
    return {key: [_schema(draw, depth) for _ in range(draw.randrange(1, 4))]}


def _all_of(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"allOf": [_schema(draw, depth) for _ in range(draw.randrange(1, 3))]}


def _reference(draw: random.Random, _: int) -> dict[str, Any]:
    return {"$ref": draw.choice(["#/$defs/node", "#/$defs/leaf", "#"])}


# --- texts that a grammar allows ---


def walk(draw: random.Random, grammar: es.Grammar, most: int = 3000) -> str | None:
    """A text that the grammar allows; None: it found no end."""
    state, said = grammar.start, bytearray()
    for _ in range(most):
        if state.is_over or (state.is_complete and draw.random() < 0.5):
            return said.decode()
        choices = state.next_bytes()
        closing = [byte for byte in choices if byte in b'"]},']
        ascii_ = [byte for byte in choices if byte < 128]
        some = closing if closing and draw.random() < 0.5 else choices
        some = ascii_ if ascii_ and draw.random() < 0.7 and some is choices else some
        byte = draw.choice(some)
        said.append(byte)
        grammar.begin()
        following = state.after(bytes([byte]))
        assert following is not None
        state = following
    return None


def grammar_of(schema_: object, param: str = "schema") -> tuple[es.Grammar, str]:
    """The grammar of a schema, and its text."""
    rules = es.GrammarRules()
    text = rules.text(es.schema_rule(rules, schema_, param))
    return es.Grammar(text, param), text


def accepts(grammar: es.Grammar, text: str) -> bool:
    """Whether it allows the whole text."""
    state: es.GrammarState | None = grammar.start
    for byte in text.encode():
        grammar.begin()
        state = state.after(bytes([byte])) if state else None
    return state is not None and state.is_complete
