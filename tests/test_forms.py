"""Room FORMS: what is taken for a truth value or a number, in every field of every form.

The reference is pydantic, which the servers that our clients know read their bodies with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pydantic
import pytest

import embellama_server as es

VALUES: tuple[Any, ...] = (
    *(True, False, 0, 1, 2, -1, 0.0, -0.0, 1.0, 2.0, 0.5, 2.5, 1e300, -3, 7, 300),
    *("true", "True", "TRUE", "tRuE", "false", "False", "1", "0", "truex", " true"),
    *("yes", "no", "on", "off", "y", "n", "t", "f", "null", "", " ", "x"),
    *("2", " 2 ", "+2", "-2", "2.0", "1.00", "02", "-0", "2\n", "1_0", "7", "300"),
    *("2.5", "2.", ".5", "1e3", "0x2", "1__0", "_1", "1,0", "- 1", "\uff12", "nan"),
    *("inf", "9" * 30, "9" * 5000, [], {}, [1], ["true"], {"true": 1}),
)
# Pydantic's words for yes and no are nobody's JSON; true for a number is a mistake.
NOT_AS_PYDANTIC: dict[type, tuple[Any, ...]] = {
    bool: ("yes", "no", "on", "off", "y", "n", "t", "f"),
    int: (True, False),
    # Where a fraction is meant, a number in a string is a mistake too.
    float: (True, False, *(value for value in VALUES if isinstance(value, str))),
}


def parts(schema: Any) -> Iterator[Any]:
    """A schema and those it is one of."""
    yield schema
    for one in schema.get("anyOf", ()):
        yield from parts(one)


def fields() -> Iterator[Any]:
    """Every truth value and bounded number of every form, and of the forms within."""
    forms: set[type] = {es.CutForm, es.SentencesForm}
    forms |= {route.form for route in es.ROUTES if route.form is not None}
    for form in sorted(forms, key=lambda one: one.__name__):
        for row in dataclasses.fields(form):
            kind: es.Kind = row.metadata["row"].kind
            for schema in parts(kind.schema):
                if schema.get("type") == "boolean" or "minimum" in schema:
                    yield pytest.param(kind, schema, id=f"{form.__name__}.{row.name}")


def outcome(read: Callable[[Any], Any], value: Any) -> Any:
    """What a reader makes of a value; None if it refuses."""
    try:
        return read(value)
    except (es.InvalidValue, pydantic.ValidationError):
        return None


FIELDS = list(fields())


def test_there_are_such_fields() -> None:
    assert len(FIELDS) >= 30


@pytest.mark.parametrize(("kind", "schema"), FIELDS)
def test_truth_values_and_numbers_are_read_as_pydantic_does(
    kind: es.Kind, schema: Any
) -> None:
    type_ = {"boolean": bool, "integer": int, "number": float}[schema["type"]]
    adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(type_)
    reference = adapter.validate_python
    judge = jsonschema.Draft202012Validator(kind.schema)
    for value in VALUES:
        wanted = None
        if repr(value) not in map(repr, NOT_AS_PYDANTIC[type_]):
            wanted = outcome(reference, value)
        if type_ is not bool and wanted is not None:
            is_within = schema["minimum"] <= wanted <= schema["maximum"]
            wanted = wanted if is_within else None
        found = outcome(lambda given: kind.read(given, "field"), value)
        assert (found, type(found)) == (wanted, type(wanted)), value
        if judge.is_valid(value):
            assert found is not None, "what is described is taken"


def test_digits_without_end_are_refused_at_once() -> None:
    for digits in ("9" * 10**6, " " * 10**6 + "1", "1" + "_1" * 10**6):
        with pytest.raises(es.InvalidValue):
            es.integer(1).read(digits, "field")
