"""ITEMS: what may be asked on /v1/responses, as the messages and tools that it becomes."""

from __future__ import annotations

from typing import Any

import pytest

import embellama_server as es
from tests.test_chat import chatting
from tests.test_responses import HELLO, ask, refused

SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": HELLO}
F: dict[str, Any] = {"type": "function", "name": "f", "parameters": {"type": "object"}}
G: dict[str, Any] = {
    "type": "function",
    "name": "g",
    "description": "d",
    "strict": True,
}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
OTHER = CALL | {"call_id": "c2", "name": "g"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "42"}


def request(**body: Any) -> es.ReplyRequest:
    """What a body asks for."""
    form = es.parse_form(es.ResponsesForm, {"input": HELLO} | body)
    return es.responses_request(form)


SILENT = {"role": "assistant", "content": None}


def called(call_id: str, name: str) -> dict[str, Any]:
    """A call as messages have it."""
    function = {"name": name, "arguments": "{}"}
    return {"id": call_id, "type": "function", "function": function}


def thought(text: str, **more: Any) -> dict[str, Any]:
    """A reasoning item."""
    content = [{"type": "reasoning_text", "text": text}] if text else []
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": content} | more


def output(text: str) -> dict[str, Any]:
    """A message of the assistant, as a response has it."""
    part = {"type": "output_text", "text": text, "annotations": []}
    item = {"type": "message", "role": "assistant", "id": "msg_1", "content": [part]}
    return item | {"status": "completed"}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        (HELLO, [USER]),
        ([USER], [USER]),
        ([USER | {"type": "message", "status": "completed"}], [USER]),
        (
            [{"role": "developer", "content": "a"}, SYSTEM, USER],
            [{"role": "developer", "content": "a"}, SYSTEM, USER],
        ),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": HELLO}]}],
            [{"role": "user", "content": [{"type": "text", "text": HELLO}]}],
        ),
        (
            [USER, thought("hm"), output("so"), CALL, OTHER, OUTPUT],
            [
                USER,
                {
                    "role": "assistant",
                    "reasoning_content": "hm",
                    "content": [{"type": "text", "text": "so"}],
                    "tool_calls": [called("c1", "f"), called("c2", "g")],
                },
                {"role": "tool", "content": "42", "tool_call_id": "c1", "name": "f"},
            ],
        ),
        (
            [USER, CALL, OUTPUT, OTHER, OUTPUT | {"call_id": "c9"}, USER],
            [
                USER,
                SILENT | {"tool_calls": [called("c1", "f")]},
                {"role": "tool", "content": "42", "tool_call_id": "c1", "name": "f"},
                SILENT | {"tool_calls": [called("c2", "g")]},
                {"role": "tool", "content": "42", "tool_call_id": "c9"},
                USER,
            ],
        ),
        (
            [USER, CALL, output("so"), thought("hm"), thought("oh"), USER],
            [
                USER,
                SILENT | {"tool_calls": [called("c1", "f")]},
                {"role": "assistant", "content": [{"type": "text", "text": "so"}]},
                SILENT | {"reasoning_content": "hm"},
                SILENT | {"reasoning_content": "oh"},
                USER,
            ],
        ),
        ([thought("", encrypted_content="x"), USER], [USER]),
        (
            [OUTPUT | {"output": [{"type": "input_text", "text": "42"}]}, USER],
            [
                {
                    "role": "tool",
                    "content": [{"type": "text", "text": "42"}],
                    "tool_call_id": "c1",
                },
                USER,
            ],
        ),
    ],
)
def test_items_become_messages(items: Any, messages: list[Any]) -> None:
    found = request(input=items)
    assert found.messages == messages
    assert (found.adds_turn, found.continues_last) == (True, False)
    told = request(input=items, instructions="be brief").messages
    assert told == [SYSTEM, *messages]


def test_what_the_assistant_said_last_is_gone_on_with() -> None:
    for items, continues in (
        ([USER, output("so")], True),
        ([USER, {"role": "assistant", "content": "so"}], True),
        ([USER, CALL], False),
        ([USER, output("so"), CALL], False),
        ([USER, thought("hm")], False),
    ):
        found = request(input=items)
        assert (found.continues_last, found.adds_turn) == (continues, not continues)


@pytest.mark.parametrize(
    ("items", "param", "words"),
    [
        ([], "input", "empty"),
        ([thought("")], "input", "nothing to reply to"),
        (7, "input", "a string or a list of items"),
        (["a"], "input[0]", "an object"),
        ([{"type": "item_reference", "id": "msg_1"}], "input[0]", "nothing is kept"),
        ([{"id": "msg_1"}], "input[0].role", "missing"),
        ([USER, {"type": "web_search_call"}], "input[1]", "not web_search_call"),
        ([{"type": 7}], "input[0]", "must be of type"),
        ([{"role": "tool", "content": "a"}], "input[0].role", "one of"),
        ([{"role": "user"}], "input[0].content", "missing"),
        (
            [{"role": "user", "content": [{"type": "input_image", "image_url": "a"}]}],
            "input[0].content[0]",
            "not input_image",
        ),
        (
            [USER, {"role": "user", "content": [{"type": "input_text"}]}],
            "input[1].content[0].text",
            "string",
        ),
        (
            [OUTPUT | {"output": [{"type": "input_file", "file_id": "a"}]}],
            "input[0].output[0]",
            "not input_file",
        ),
        ([CALL | {"name": None}], "input[0].name", "missing"),
        ([CALL | {"arguments": {}}], "input[0].arguments", "string"),
    ],
)
def test_an_item_that_cannot_be_read_is_named(
    items: Any, param: str, words: str
) -> None:
    with pytest.raises(es.InvalidValue, match=words) as refusal:
        request(input=items)
    assert refusal.value.param == param


# --- tools ---


def functions(found: es.ReplyRequest) -> list[Any]:
    """The names of those that may be called."""
    return [tool["function"]["name"] for tool in found.tools]  # type: ignore[index]


def test_tools_become_those_of_a_chat_and_others_than_functions_are_left_out() -> None:
    found = request(
        tools=[F, {"type": "web_search"}, {"type": "custom", "name": "c"}, G]
    )
    assert found.tools == [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"type": "object"}},
        },
        {
            "type": "function",
            "function": {"name": "g", "description": "d", "strict": True},
        },
    ]
    assert (found.tool_choice, found.calls_in_parallel) == ("auto", True)
    assert not request(tools=[F], parallel_tool_calls=False).calls_in_parallel


@pytest.mark.parametrize(
    ("choice", "mode", "names"),
    [
        ("auto", "auto", ["f", "g"]),
        ("none", "none", []),
        ("required", "required", ["f", "g"]),
        ({"type": "function", "name": "g"}, "named", ["g"]),
        ({"type": "allowed_tools", "mode": "auto", "tools": [G]}, "auto", ["g"]),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "f"}],
            },
            "required",
            ["f"],
        ),
    ],
)
def test_a_tool_choice_says_which_may_or_must_be_called(
    choice: Any, mode: str, names: list[str]
) -> None:
    found = request(tools=[F, G], tool_choice=choice)
    assert (found.tool_choice, functions(found)) == (mode, names)


@pytest.mark.parametrize(
    "choice",
    [
        "some",
        {"type": "function", "name": "h"},
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]},
        {"type": "web_search_preview"},
        {"type": "custom", "name": "c"},
        {"type": "allowed_tools", "mode": "none", "tools": [G]},
        {"type": "allowed_tools", "mode": "auto", "tools": []},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "mcp"}]},
        {"type": "function"},
    ],
)
def test_a_tool_choice_that_cannot_be_kept_is_refused(choice: Any) -> None:
    with pytest.raises(es.InvalidValue) as refusal:
        request(tools=[F, G], tool_choice=choice)
    assert (refusal.value.param or "").startswith("tool_choice")


def test_a_demand_for_a_call_needs_a_function() -> None:
    for tools in ([], [{"type": "web_search"}]):
        with pytest.raises(es.InvalidValue, match="no tools"):
            request(tools=tools, tool_choice="required")


# --- the other fields ---


def test_the_format_of_the_text_is_a_schema() -> None:
    schema = {"type": "object"}
    named = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    for text, wanted in (
        (None, None),
        ({"verbosity": "low"}, None),
        ({"format": {"type": "text"}}, None),
        ({"format": {"type": "json_object"}}, {}),
        ({"format": named}, schema),
    ):
        assert request(text=text).json_schema == wanted
    for missing in ("name", "schema"):
        with pytest.raises(es.InvalidValue, match="missing") as refusal:
            request(text={"format": named | {missing: None}})
        assert refusal.value.param == f"text.format.{missing}"


def test_fields_that_chat_has_too_mean_the_same() -> None:
    found = request(
        temperature=0,
        top_k=5,
        seed=7,
        stop=["x"],
        user="u",
        max_output_tokens=9,
        cache_prompt=False,
        top_logprobs=3,
        reasoning={"effort": "none"},
        chat_template_kwargs={"a": 1},
    )
    assert found.sampling == {
        "temperature": 0,
        "top_k": 5,
        "seed": 7,
        "ignore_eos": False,
    }
    assert (found.stop, found.user, found.max_tokens) == (("x",), "u", 9)
    assert (found.reuses_cells, found.top_logprobs) == (False, 3)
    assert found.variables == {
        "a": 1,
        "reasoning_effort": "none",
        "enable_thinking": False,
    }
    assert request(reasoning={"effort": "low"}).variables["enable_thinking"] is True


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("conversation", {"id": "conv_1"}),
        ("prompt", {"id": "pmpt_1"}),
        ("background", True),
        ("moderation", {"model": "m"}),
        ("context_management", [{"type": "compaction"}]),
        ("n", 2),
        ("n", True),
        ("truncation", "middle"),
        ("metadata", {"a": 1}),
        ("metadata", {"a" * 65: ""}),
        ("metadata", {"a": "b" * 513}),
        ("metadata", {str(n): "" for n in range(17)}),
        ("metadata", ["a"]),
        ("text", {"format": {"type": "xml"}}),
        ("tools", [7]),
        ("tools", [{"name": "f"}]),
        ("tools", [F, {"type": "web_search"}, F]),
        ("tools", [F | {"name": "a b"}]),
    ],
)
async def test_what_would_change_a_response_and_cannot_be_had_is_refused(
    field: str, value: Any
) -> None:
    async with chatting() as (running, _):
        error = await refused(running, **{field: value})
        assert error["param"].startswith(field)


async def test_what_changes_no_response_is_accepted() -> None:
    async with chatting() as (running, _):
        await ask(
            running,
            store=True,
            service_tier="auto",
            safety_identifier="s",
            prompt_cache_key="k",
            max_tool_calls=3,
            n=1,
            odd=[1],
            background=False,
            truncation="auto",
            stream_options=None,
            include=["web_search_call.action.sources"],
            client_metadata={"a": "b"},
        )
