"""200 schemas such as applications send: written for the tests, in our own words."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}

LEAVES: list[Schema] = [
    TEXT,
    {"type": "string", "maxLength": 12},
    {"type": "string", "minLength": 3, "maxLength": 10},
    {"type": "string", "enum": ["red", "green", "blue"]},
    {"type": "string", "const": "fixed"},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    {"type": "string", "pattern": "^[a-z]+$", "maxLength": 8},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "email"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "duration"},
    WHOLE,
    {"type": "integer", "minimum": 0, "maximum": 120},
    {"type": "integer", "exclusiveMinimum": 0},
    {"type": "integer", "minimum": -5, "maximum": 5},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    {"type": "number"},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": 2.25},
    {"type": "number", "minimum": 0},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["string", "null"], "maxLength": 9},
    {"type": ["integer", "boolean"]},
    {"enum": ["🙂", "漢字", 'say "hi"', "back\\slash", 1, 2.5, None, True]},
    {"const": {"version": 1, "tags": ["a", "b"]}},
    {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "number", "minimum": 10}]},
    {"oneOf": [{"type": "boolean"}, {"type": "string", "maxLength": 4}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {"type": "array", "items": WHOLE, "minItems": 1, "maxItems": 4},
    {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
    {"type": "array", "prefixItems": [WHOLE, {"type": "boolean"}], "items": False, "minItems": 2},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]},
]  # fmt: skip


def closed(**properties: Schema) -> Schema:
    """An object as strict mode wants it: all required, no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


def listed(item: Schema, most: int = 3) -> Schema:
    """A short array."""
    return {"type": "array", "items": item, "maxItems": most}


_STEP = closed(explanation=TEXT, output=TEXT)
_UI = closed(
    type={"type": "string", "enum": ["div", "button", "header", "section"]},
    label=TEXT,
    children=listed({"$ref": "#"}, 2),
)
_LIST = {
    "$ref": "#/$defs/Node",
    "$defs": {
        "Node": closed(
            value=WHOLE, next={"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}
        )
    },
}
_ANIMALS = {
    "oneOf": [
        closed(kind={"const": "cat"}, lives={"type": "integer", "minimum": 1}),
        closed(kind={"const": "dog"}, tricks=listed(TEXT)),
    ],
    "discriminator": {"propertyName": "kind"},
}
_PYDANTIC = {
    "title": "Order",
    "type": "object",
    "properties": {
        "id": {"title": "Id", "type": "string", "format": "uuid"},
        "at": {"title": "At", "type": "string", "format": "date-time"},
        "state": {"allOf": [{"$ref": "#/$defs/State"}], "default": "new"},
        "lines": {"title": "Lines", "type": "array", "items": {"$ref": "#/$defs/Line"}},
        "note": {"anyOf": [TEXT, {"type": "null"}], "default": None, "title": "Note"},
    },
    "required": ["id", "at", "lines"],
    "$defs": {
        "State": {"enum": ["new", "paid", "sent"], "title": "State", "type": "string"},
        "Line": {
            "type": "object",
            "properties": {"sku": TEXT, "count": {"type": "integer", "minimum": 1}},
            "required": ["sku", "count"],
            "title": "Line",
        },
    },
}

WHOLES: list[Schema] = [
    closed(steps=listed(_STEP), final_answer=TEXT),  # a sum, step by step
    closed(name=TEXT, date={"type": "string", "format": "date"}, participants=listed(TEXT)),
    closed(title=TEXT, authors=listed(TEXT), abstract=TEXT, keywords=listed(TEXT)),
    _UI,
    closed(violates={"type": "boolean"}, category={"type": ["string", "null"], "enum": ["violence", "other", None]}, why={"type": ["string", "null"]}),
    closed(location=TEXT, unit={"type": ["string", "null"], "enum": ["c", "f", None]}),
    closed(linked_list=_LIST["$defs"]["Node"] | {"properties": {"value": WHOLE}, "required": ["value"]}),  # type: ignore[index]
    _LIST,
    closed(item={"anyOf": [closed(name=TEXT, age=WHOLE), closed(number=TEXT, street=TEXT, city=TEXT)]}),
    _ANIMALS,
    _PYDANTIC,
    closed(sentiment={"enum": ["positive", "neutral", "negative"]}, score={"type": "number", "minimum": 0, "maximum": 1}),
    closed(table={"type": "string"}, columns=listed(TEXT), conditions=listed(closed(column=TEXT, operator={"enum": ["=", ">", "<", "!="]}, value={"anyOf": [TEXT, {"type": "number"}]})), order_by={"enum": ["asc", "desc"]}),
    {"type": "object"},
    {"type": "object", "properties": {"a": TEXT, "b": WHOLE, "c": {"type": "boolean"}}},
    {"type": "object", "properties": {"a": WHOLE}, "additionalProperties": TEXT},
    {"type": "array", "items": closed(q=TEXT, a=TEXT), "minItems": 1, "maxItems": 2},
    {"type": "object", "properties": {"tree": {"$ref": "#/definitions/t"}}, "required": ["tree"], "definitions": {"t": closed(v=WHOLE, kids=listed({"$ref": "#/definitions/t"}, 2))}},
]  # fmt: skip


def schemas() -> list[Schema]:
    """All of them."""
    made = [*LEAVES, *WHOLES]
    made += [closed(value=leaf) for leaf in LEAVES]
    made += [listed(leaf, 2) for leaf in LEAVES]
    made += [
        {
            "type": "object",
            "properties": {"id": WHOLE, "maybe": leaf},
            "required": ["id"],
        }
        for leaf in LEAVES
    ]
    made += [
        closed(first=one, second=other)
        for one, other in zip(LEAVES, LEAVES[7:], strict=False)
    ]
    return made[:200]
