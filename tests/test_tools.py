"""TOOLS: which functions a model may call, and which it must."""

from __future__ import annotations

import string
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import embellama_server as es
from tests import kit


def tool(name: str = "f", **more: Any) -> dict[str, Any]:
    """A tool as OpenAI's clients send it."""
    return {"type": "function", "function": {"name": name, **more}}


def named(name: str) -> dict[str, Any]:
    """A choice of that function."""
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    """A choice among some of the tools."""
    tools = [named(name) for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


F, G = tool("f"), tool("g")
FLAT = {"type": "function", "name": "g"}
FLATLY_ALLOWED = {"type": "allowed_tools", "mode": "required", "tools": [FLAT]}

# Tools and a choice, and what is left of them.
CHOICES: tuple[tuple[Any, Any, tuple[Any, str]], ...] = (
    (None, None, ([], "auto")),
    ([], None, ([], "auto")),
    ([], "auto", ([], "auto")),
    (None, "none", ([], "none")),
    ([F, G], None, ([F, G], "auto")),
    ([F, G], "Auto", ([F, G], "auto")),
    ([F, G], "none", ([], "none")),
    ([F, G], "required", ([F, G], "required")),
    ([F, G], "any", ([F, G], "required")),
    ([F, G], {"type": "none"}, ([], "none")),
    ([F, G], {"type": "any"}, ([F, G], "required")),
    ([F, G], named("g"), ([G], "named")),
    ([F, G], FLAT, ([G], "named")),
    ([F, G], FLAT | {"function": None}, ([G], "named")),
    ([F, G], allowed("auto", "g"), ([G], "auto")),
    ([F, G], allowed("required", "g", "f"), ([F, G], "required")),
    ([F, G], FLATLY_ALLOWED, ([G], "required")),
)


def read(tools: Any, choice: Any) -> tuple[Any, str]:
    """What a form reads, and makes of it."""
    asked = [None, None]
    if tools is not None:
        asked[0] = es.TOOLS.read(tools, "tools")
    if choice is not None:
        asked[1] = es.TOOL_CHOICE.read(choice, "tool_choice")
    left, mode = es.offered(*asked)
    return [*left], mode


@pytest.mark.parametrize(("tools", "choice", "wanted"), CHOICES)
def test_a_choice_leaves_the_tools_that_it_names_and_says_what_must_be(
    tools: Any, choice: Any, wanted: tuple[Any, str]
) -> None:
    assert read(tools, choice) == wanted


def test_a_choice_takes_as_long_as_there_are_tools_and_names() -> None:
    def choose(count: int) -> None:
        names = [f"f{n}" for n in range(count)]
        tools = es.TOOLS.read([*map(tool, names)], "tools")
        choice = es.TOOL_CHOICE.read(allowed("auto", *reversed(names)), "tool_choice")
        assert len(es.offered(tools, choice)[0]) == count

    kit.assert_linear(choose, 2_500)


def test_tools_are_shown_as_they_came_but_without_nulls() -> None:
    schema = {"type": "object", "properties": {"a": {"default": None}}}
    came = tool(description=None, parameters=schema, strict=True, odd=[1])
    came |= {"defer_loading": None}
    (read_one,), _ = read([came], None)
    assert read_one == tool(parameters=schema, strict=True, odd=[1])


# Tools and a choice, the param of the error, and words of its sentence.
BAD: tuple[tuple[Any, Any, str, str], ...] = (
    ({}, None, "tools", "a list"),
    ([1], None, "tools[0]", "an object"),
    ([{"type": "web_search"}], None, "tools[0].type", "not web_search"),
    ([{"type": "custom", "custom": {"name": "f"}}], None, "tools[0].type", "not custom"),
    ([{"type": {}}], None, "tools[0].type", "must be function"),
    ([{"function": {"name": "f"}}], None, "tools[0].type", "missing"),
    ([{"type": "function"}], None, "tools[0].function", "missing"),
    ([{"type": "function", "name": "f"}], None, "tools[0].function", "missing"),
    ([F, tool("")], None, "tools[1].function.name", "1 to 128"),
    ([tool("a b")], None, "tools[0].function.name", "letters"),
    ([tool("a.b")], None, "tools[0].function.name", "letters"),
    ([tool("é")], None, "tools[0].function.name", "letters"),
    ([tool("a\n")], None, "tools[0].function.name", "letters"),
    ([tool("a" * 129)], None, "tools[0].function.name", "128"),
    ([tool(1)], None, "tools[0].function.name", "a string"),  # type: ignore[arg-type]
    ([F, G, F], None, "tools[2].function.name", "as is that of tools[0]"),
    ([tool(parameters=[])], None, "tools[0].function.parameters", "an object"),
    ([tool(strict="maybe")], None, "tools[0].function.strict", "true or false"),
    ([tool(description=1)], None, "tools[0].function.description", "a string"),
    ([F], "always", "tool_choice", "one of auto, none, required"),
    ([F], 1, "tool_choice", "one of auto"),
    ([F], [named("f")], "tool_choice", "one of auto"),
    ([F], {}, "tool_choice", '"function"'),
    ([F], {"type": "custom", "custom": {"name": "f"}}, "tool_choice", '"function"'),
    ([F], {"type": "function"}, "tool_choice.name", "a string"),
    ([F], {"type": "function", "function": 1}, "tool_choice.function", "an object"),
    ([F], named("h"), "tool_choice", "names h, which none"),
    ([F], named(""), "tool_choice.function.name", "letters"),
    ([F], allowed("auto", "f", "h"), "tool_choice", "names h, which none"),
    ([F], allowed("none", "f"), "tool_choice.allowed_tools.mode", "one of auto"),
    ([F], allowed("auto"), "tool_choice.allowed_tools.tools", "empty"),
    ([F], {"type": "allowed_tools"}, "tool_choice.tools", "a list"),
    (None, "required", "tool_choice", "no tools"),
    ([], "required", "tool_choice", "no tools"),
    ([], named("f"), "tool_choice", "names f"),
)  # fmt: skip


@pytest.mark.parametrize(("tools", "choice", "param", "words"), BAD)
def test_what_is_no_tool_or_no_choice_of_one_is_refused(
    tools: Any, choice: Any, param: str, words: str
) -> None:
    with pytest.raises(es.InvalidValue) as refused:
        read(tools, choice)
    assert refused.value.param == param
    assert words in str(refused.value)


SAID = string.ascii_letters + string.digits + "_-"


@given(name=st.text(st.sampled_from(f"{SAID} .é\n\0"), max_size=130))
def test_a_name_is_taken_exactly_if_the_document_says_so(name: str) -> None:
    is_right = 0 < len(name) <= 128 and {*name} <= {*SAID}
    schema = es.TOOLS.schema
    # Python's $ also matches before a last line break; that of JSON Schema does not.
    is_said = jsonschema.Draft202012Validator(schema).is_valid([tool(name)])
    assert is_said == is_right or name.endswith("\n")
    try:
        es.TOOLS.read([tool(name)], "tools")
    except es.InvalidValue:
        assert not is_right
    else:
        assert is_right


@pytest.mark.parametrize(("tools", "choice", "_"), CHOICES)
def test_what_is_read_is_in_the_document(tools: Any, choice: Any, _: Any) -> None:
    judge = jsonschema.Draft202012Validator
    if tools is not None:
        assert judge(es.TOOLS.schema).is_valid(tools)
    is_usual = choice not in ("Auto", FLATLY_ALLOWED) and "name" not in (choice or ())
    if choice is not None and is_usual:
        assert judge(es.TOOL_CHOICE.schema).is_valid(choice)
