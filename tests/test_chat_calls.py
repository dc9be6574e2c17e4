"""CHAT: thoughts and calls of tools, whole and streamed, as OpenAI's clients read them.

What a reply gains is made by hand here; how a model's text becomes that: test_markup.py.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import openai.types.chat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState

import embellama_server as es
from tests import both, chat_models, kit
from tests.kit import RunningService
from tests.test_chat import CHAT, DONE, HELLO, Stream, ask, chatting, idle, streamed

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "Of a city.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
USAGE = {"stream_options": {"include_usage": True}}


def thought(text: str) -> es.Delta:
    """A token of thinking."""
    return es.Delta(0, reasoning=text, reasoning_tokens=1)


def call(index: int, arguments: str = "", name: str = "") -> es.Delta:
    """A part of a call; with its name, the first."""
    id = f"call_{index}" if name else ""
    return es.Delta(0, calls=[es.CallPart(index, arguments, id, name)])


def end(reason: str = "tool_calls") -> es.Delta:
    """A reply's end."""
    return es.Delta(0, finish_reason=reason)


THINKS = (thought("Rain"), thought("?"))
CALLS = (
    call(0, name="weather"),
    call(0, '{"city":'),
    call(0, '"Ulm"}'),
    call(1, '{"city":"Bonn"}', "weather"),
)
NOTHING = es.Delta(0)  # a token that does not show yet
CALLED = [
    {
        "id": f"call_{index}",
        "type": "function",
        "function": {"name": "weather", "arguments": f'{{"city":"{city}"}}'},
    }
    for index, city in enumerate(("Ulm", "Bonn"))
]

# What a reply gains, its message, and its end.
REPLIES: dict[str, tuple[Sequence[es.Delta], dict[str, Any], str]] = {
    "thoughts, text and calls": (
        (*THINKS, es.Delta(0, text="I see."), *CALLS, end()),
        {"content": "I see.", "reasoning_content": "Rain?", "tool_calls": CALLED},
        "tool_calls",
    ),
    "only calls": (
        (NOTHING, *CALLS, end()),
        {"content": None, "tool_calls": CALLED},
        "tool_calls",
    ),
    "only thoughts": (
        (*THINKS, end("length")),
        {"content": "", "reasoning_content": "Rain?"},
        "length",
    ),
    "thoughts and text": (
        (*THINKS, es.Delta(0, text="Yes"), es.Delta(0, text="."), end("stop")),
        {"content": "Yes.", "reasoning_content": "Rain?"},
        "stop",
    ),
    "thoughts and a call": (
        (*THINKS, *CALLS[:3], end()),
        {"content": None, "reasoning_content": "Rain?", "tool_calls": CALLED[:1]},
        "tool_calls",
    ),
    "a call cut short": (
        (*CALLS[:2], end("length")),
        {
            "content": None,
            "tool_calls": [
                CALLED[0] | {"function": {"name": "weather", "arguments": '{"city":'}}
            ],
        },
        "length",
    ),
    "nothing": ((end("stop"),), {"content": ""}, "stop"),
}
ALL = {"role": "assistant", "refusal": None}


def put_together(choices: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The message that the chunks of one choice make; asserts that each says one thing."""
    message: dict[str, Any] = {}
    for choice in choices:
        delta = dict(choice["delta"])
        if role := delta.pop("role", None):
            assert (role, message) == ("assistant", {}), "once, and first"
            assert delta.pop("content") == ""
            message["role"] = role
        assert len(delta) <= 1, "one kind of thing at a time"
        assert not delta or choice["finish_reason"] is None
        for name, value in delta.items():
            if name == "tool_calls":
                _add_calls(message.setdefault(name, []), value)
            else:
                assert value
                message[name] = message.get(name, "") + value
    return message


def _add_calls(calls: list[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
    (part,) = parts
    index, function = part.pop("index"), part["function"]
    if index == len(calls):  # so from 0, and one after the other
        assert [*part] == ["id", "type", "function"] and part["id"]
        assert function.pop("arguments") == ""
        calls.append({**part, "function": {**function, "arguments": ""}})
    else:
        assert index == len(calls) - 1
        assert [*part, *function] == ["function", "arguments"]
        assert function["arguments"]
        calls[index]["function"]["arguments"] += function["arguments"]


@pytest.mark.parametrize("name", REPLIES)
async def test_a_whole_reply_has_thoughts_text_and_calls_apart(name: str) -> None:
    gains, message, reason = REPLIES[name]
    async with chatting() as (running, speaker):
        speaker.gains = gains
        found = (await ask(running, CHAT, tools=TOOLS)).json
        openai.types.chat.ChatCompletion.model_validate(found, strict=True)
        jsonschema.validate(found, es.CHAT_REPLY)
        assert found["choices"] == [
            {"index": 0, "message": ALL | message, "logprobs": None}
            | {"finish_reason": reason}
        ]
        thoughts = sum(gain.reasoning_tokens for gain in gains)
        details = found["usage"]["completion_tokens_details"]
        assert details == {"reasoning_tokens": thoughts}
        assert found["usage"]["completion_tokens"] == len(gains)


@pytest.mark.parametrize("name", REPLIES)
async def test_a_stream_says_the_same_in_the_one_shape_that_all_clients_read(
    name: str,
) -> None:
    gains, message, reason = REPLIES[name]
    async with chatting() as (running, speaker):
        speaker.gains = gains
        *found, last = await streamed(running, CHAT, tools=TOOLS, **USAGE)
    state = ChatCompletionStreamState(input_tools=openai.omit)
    for chunk in found:
        state.handle_chunk(
            openai.types.chat.ChatCompletionChunk.model_validate(chunk, strict=True)
        )
    choices = [choice for chunk in found for choice in chunk["choices"]]
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == reason
    assert (
        put_together(choices).items() >= {k: v for k, v in message.items() if v}.items()
    )
    if reason != "length":
        (put,) = state.get_final_completion().choices
        assert [one.id for one in put.message.tool_calls or []] == [
            one["id"] for one in message.get("tool_calls", ())
        ]
        assert (put.message.content or "") == (message["content"] or "")
    assert last["usage"]["completion_tokens_details"] == {
        "reasoning_tokens": sum(gain.reasoning_tokens for gain in gains)
    }


async def test_the_chunks_of_a_call_are_as_openai_s() -> None:
    async with chatting() as (running, speaker):
        speaker.gains = (*CALLS[:3], end())
        found = await streamed(running, CHAT, tools=TOOLS)
    function = {"name": "weather", "arguments": ""}
    first = {"index": 0, "id": "call_0", "type": "function", "function": function}
    assert [chunk["choices"][0]["delta"] for chunk in found] == [
        {"role": "assistant", "content": ""},
        {"tool_calls": [first]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Ulm"}'}}]},
        {},
    ]


async def test_the_calls_of_several_replies_are_told_apart() -> None:
    async with chatting() as (running, speaker):
        speaker.gains = (*THINKS, *CALLS, end())
        whole = (await ask(running, CHAT, n=2, tools=TOOLS)).json
        found = await streamed(running, CHAT, n=2, tools=TOOLS, **USAGE)
    assert [one["message"]["tool_calls"] for one in whole["choices"]] == [CALLED] * 2
    choices = [choice for chunk in found for choice in chunk["choices"]]
    for index in range(2):
        own = [choice for choice in choices if choice["index"] == index]
        assert put_together(own)["tool_calls"] == CALLED
    for usage in (whole["usage"], found[-1]["usage"]):
        assert usage["completion_tokens_details"] == {"reasoning_tokens": 4}


async def test_logprobs_are_beside_thoughts_and_calls() -> None:
    gains = (NOTHING, thought("hm"), es.Delta(0, text="ok"), *CALLS, end())
    async with chatting() as (running, speaker):
        speaker.gains = gains
        asks: dict[str, Any] = {"logprobs": True, "top_logprobs": 1, "tools": TOOLS}
        whole = (await ask(running, CHAT, **asks)).json
        openai.types.chat.ChatCompletion.model_validate(whole, strict=True)
        found = await streamed(running, CHAT, **asks)
    wanted = whole["choices"][0]["logprobs"]["content"]
    assert len(wanted) == len(gains)
    told = [chunk["choices"][0] for chunk in found]
    parts = [one["logprobs"]["content"] for one in told if one["logprobs"]]
    assert [entry for part in parts for entry in part] == wanted


@pytest.mark.parametrize(
    "asks", [{"reasoning_format": "hidden"}, {"reasoning": {"exclude": True}}]
)
async def test_the_logprobs_of_hidden_thoughts_are_hidden_too(
    asks: dict[str, Any],
) -> None:
    # The first token was not known to be one of thoughts when it came.
    begun = es.Delta(0, reasoning="hm", reasoning_tokens=2)
    said = [es.Delta(0, text=text) for text in ("o", "k")]
    gains = (NOTHING, begun, thought("?"), NOTHING, *said, NOTHING, end("stop"))
    async with chatting() as (running, speaker):
        speaker.gains = gains
        asks = asks | {"logprobs": True, "n": 2}
        whole = (await ask(running, CHAT, **asks)).json
        found = await streamed(running, CHAT, **asks)
    choices = [chunk["choices"][0] for chunk in found]
    for index in range(2):
        shown = [f"t{index}"] * (len(gains) - 3)
        for told in (whole["choices"], choices):
            assert tokens_of(c for c in told if c["index"] == index) == shown


def test_the_logprobs_of_hidden_thoughts_are_hidden_however_a_stream_is_cut() -> None:
    begun = es.Delta(0, reasoning="hm", reasoning_tokens=2)
    gains = [NOTHING, begun, thought("?"), NOTHING, *CALLS[:2], end()]
    tokens = [es.TokenLogprob(n, str(n).encode(), -1.0) for n in range(len(gains))]
    for cuts in itertools.product([False, True], repeat=len(gains)):
        merged = [es.Delta(0)]
        for gain, token, is_cut in zip(gains, tokens, cuts, strict=True):
            merged += [es.Delta(0)] if is_cut else []
            merged[-1].add(copy.deepcopy(gain))
            merged[-1].logprobs.append(token)
        streaming = writer("hidden")
        found = choices_in(b"".join(map(streaming.part, merged)))
        assert tokens_of(found) == ["3", "4", "5", "6"]


def tokens_of(choices: Iterable[Any]) -> list[str]:
    """The tokens of their logprobs."""
    told = [one["logprobs"]["content"] for one in choices if one["logprobs"]]
    return [entry["token"] for part in told for entry in part]


# --- however it is cut ---

TEXTS = st.text(st.sampled_from('ab{}"\\<>\n é\u2028🙂'), max_size=6)
PARTS = st.lists(st.one_of(TEXTS.map(lambda text: ("text", text)), TEXTS.map(lambda text: ("reasoning", text)), TEXTS.map(lambda text: ("call", text)), TEXTS.map(lambda text: ("more", text))), max_size=12)  # fmt: skip


class FakeReplies:
    """What a writer asks of replies."""

    count, name = 1, "fake"
    requests = (es.GenerationRequest(ids=[], max_tokens=1),)


def writer(form: str = "auto") -> Any:
    """A writer of chat."""
    replies: Any = FakeReplies()
    return es._ChatWriter(replies, None, form)


def gained(parts: Iterable[tuple[str, str]]) -> list[es.Delta]:
    """What a reply gains, at its end too."""
    gains, calls = [], 0
    for kind, text in parts:
        if kind == "text":
            gains.append(es.Delta(0, text=text))
        elif kind == "reasoning":
            gains.append(es.Delta(0, reasoning=text))
        elif kind == "call":
            gains.append(call(calls, text, "weather"))
            calls += 1
        elif calls:
            gains.append(call(calls - 1, text))
    return [*gains, end("tool_calls" if calls else "stop")]


def choices_in(events: bytes) -> list[dict[str, Any]]:
    """The choices of a stream's events."""
    lines = events.decode().split("\n\n")
    return [json.loads(line[6:])["choices"][0] for line in lines if line]


@pytest.mark.parametrize("form", ["auto", "none", "hidden"])
@given(parts=PARTS, cuts=st.sets(st.integers(0, 13)))
def test_a_stream_says_what_the_whole_reply_says_however_it_is_cut(
    form: str, parts: list[tuple[str, str]], cuts: set[int]
) -> None:
    whole = es.Delta(0)
    for gain in gained(parts):
        whole.add(gain)
    wanted = writer(form).choice(whole)
    streaming, merged = writer(form), [es.Delta(0)]
    for number, gain in enumerate(gained(parts)):
        if number in cuts:
            merged.append(es.Delta(0))
        merged[-1].add(gain)
    choices = choices_in(streaming.opening() + b"".join(map(streaming.part, merged)))
    found = put_together(choices)
    assert choices[-1]["finish_reason"] == wanted["finish_reason"]
    assert found.get("tool_calls") == wanted["message"].get("tool_calls")
    if form != "none":  # thoughts may come again after the text, and are told apart
        for name in ("content", "reasoning_content"):
            said = wanted["message"].get(name)
            assert found.get(name, "") == (said or "")
    elif not any(kind == "reasoning" for kind, _ in parts):
        assert found.get("content", "") == (wanted["message"]["content"] or "")


# --- where thoughts are shown ---


@pytest.mark.parametrize(
    ("asks", "content", "thoughts"),
    [
        ({}, "Yes.", "Rain?"),
        ({"reasoning_format": "deepseek"}, "Yes.", "Rain?"),
        ({"reasoning_format": "none"}, "<think>Rain?</think>Yes.", None),
        ({"reasoning_format": "raw"}, "<think>Rain?</think>Yes.", None),
        ({"reasoning_format": "hidden"}, "Yes.", None),
        ({"reasoning": {"exclude": True}}, "Yes.", None),
    ],
)
async def test_thoughts_are_shown_where_the_request_wants_them(
    asks: dict[str, Any], content: str, thoughts: str | None
) -> None:
    async with chatting() as (running, speaker):
        speaker.gains, _, _ = REPLIES["thoughts and text"]
        whole = (await ask(running, CHAT, **asks)).json
        found = await streamed(running, CHAT, **asks)
    message = whole["choices"][0]["message"]
    assert message["content"] == content
    assert message.get("reasoning_content") == thoughts
    put = put_together(choice for chunk in found for choice in chunk["choices"])
    assert (put["content"], put.get("reasoning_content")) == (content, thoughts)
    # They are paid for all the same.
    details = whole["usage"]["completion_tokens_details"]
    assert details == {"reasoning_tokens": 2}


async def test_thoughts_in_the_text_are_closed_wherever_they_end() -> None:
    for gains, content in (
        ((*THINKS, end("length")), "<think>Rain?</think>"),
        ((*THINKS, *CALLS, end()), "<think>Rain?</think>"),
        ((es.Delta(0, text="a"), end("stop")), "a"),
    ):
        async with chatting() as (running, speaker):
            speaker.gains = gains
            whole = (await ask(running, CHAT, reasoning_format="none")).json
            found = await streamed(running, CHAT, reasoning_format="none")
        assert whole["choices"][0]["message"]["content"] == content
        put = put_together(choice for chunk in found for choice in chunk["choices"])
        assert put["content"] == content


# --- silence, and clients that leave ---


async def test_while_the_model_writes_what_does_not_show_the_client_hears_that_it_does() -> (
    None
):
    # LangChain gives up after 120 s without a chunk; hidden thoughts may take longer.
    async with chatting(heartbeat_s=0.02) as (running, speaker):
        speaker.pause()
        speaker.gains = (*THINKS * 500, end("stop"))
        asks = {"reasoning_format": "hidden"}
        async with Stream(running, CHAT, **asks) as stream:
            await speaker.heard()
            speaker.step()
            opening = await stream.event()
            assert opening["choices"][0]["delta"]["role"] == "assistant"
            beats = asyncio.create_task(read(stream, 3))
            while not beats.done():
                speaker.step()
                await asyncio.sleep(0.001)
            for beat in beats.result():
                assert beat["id"] == opening["id"]
                assert beat["choices"][0]["delta"] == {}
            while speaker.running:
                speaker.step()
            assert '"finish_reason":"stop"' in await stream.until(DONE)


async def read(stream: Stream, count: int) -> list[Any]:
    """So many events."""
    return [await stream.event() for _ in range(count)]


@pytest.mark.parametrize("gains", [CALLS, THINKS])
@pytest.mark.parametrize("asks", [{}, {"reasoning_format": "hidden"}])
async def test_a_client_that_leaves_a_stream_without_text_ends_the_work(
    gains: Sequence[es.Delta], asks: dict[str, Any]
) -> None:
    async with chatting() as (running, speaker):
        speaker.pause()
        speaker.gains = gains
        async with Stream(running, CHAT, tools=TOOLS, **asks) as left:
            generation = await speaker.heard()
            speaker.step()
            await left.head()
        await idle(speaker)
        assert speaker.cancelled == [generation]


async def test_what_is_logged_and_counted_of_calls_and_thoughts_is_as_of_text() -> None:
    gains = (*THINKS, *CALLS, end())
    async with chatting() as (running, speaker):
        speaker.gains = gains
        await ask(running, CHAT, tools=TOOLS)
        await streamed(running, CHAT, tools=TOOLS)
        counted = telemetry_tokens(running)
        lines = [one for one in running.log.getvalue().splitlines() if CHAT in one]
    assert counted == 2 * (3 + len(gains))
    assert len(lines) == 2
    assert all(f" reply_tokens={len(gains)} " in line for line in lines)
    assert all("weather" not in line and "Rain" not in line for line in lines)


def telemetry_tokens(running: RunningService) -> float:
    """Tokens of the model, as a metric counts them."""
    telemetry = running.service.telemetry
    return float(telemetry.value("embellama_model_tokens_total", "fake@1"))


# --- what a request becomes ---


def test_what_is_asked_of_tools_becomes_the_request_s() -> None:
    def request(**body: Any) -> es.ReplyRequest:
        return es.chat_request(es.parse_form(es.ChatForm, {"messages": HELLO} | body))

    plain = request()
    assert (plain.tools, plain.tool_choice, plain.calls_in_parallel) == (
        (),
        "auto",
        True,
    )
    named = {"type": "function", "function": {"name": "weather"}}
    asked = request(tools=TOOLS, tool_choice=named, parallel_tool_calls=False)
    assert (asked.tools, asked.tool_choice) == (TOOLS, "named")
    assert not asked.calls_in_parallel
    assert request(tools=TOOLS, tool_choice="none").tool_choice == "none"


# --- calls that are demanded, of a real model, if a tiny one ---

CITY = {"type": "string", "enum": ["Ulm", "Bonn"]}
CITIES = {"type": "object", "properties": {"city": CITY}, "required": ["city"]}
CLOSED = CITIES | {"additionalProperties": False}
FUNCTIONS = [
    {"type": "function", "function": {"name": name, "parameters": CLOSED}}
    for name in ("weather", "population")
]
# Of a model that always thinks: the prompt ends within its thoughts.
THINKING = chat_models.CHATML.replace(
    "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"
)


@pytest.mark.parametrize("template", [chat_models.CHATML, THINKING])
def test_a_call_that_is_demanded_is_valid_whatever_the_model_would_say(
    template: str, tmp_path: Path
) -> None:
    path = chat_models.tiny_qwen(tmp_path, template=template)
    flags = ("--model-path", f"tiny={path}")
    program = (str(kit.ROOT / "embellama_server.py"),)
    with kit.started(*flags, module=program) as server:
        client = both.Client(server.url)
        mark = {"content": "</think>", "parse_special": True}
        (closing,) = client.post("/tokenize", mark).json["tokens"]
        ends_soon = {"logit_bias": {str(closing): 10}}  # its thoughts, if it has some
        for seed, choice in enumerate(
            ("required", {"type": "function", "function": {"name": "population"}})
        ):
            asks = {"messages": HELLO, "tools": FUNCTIONS, "tool_choice": choice}
            asks |= {"parallel_tool_calls": False, "seed": seed, "temperature": 2}
            asks |= ends_soon
            whole = client.post(CHAT, asks).json["choices"][0]
            (made,) = whole["message"]["tool_calls"]
            jsonschema.validate(json.loads(made["function"]["arguments"]), CLOSED)
            assert made["function"]["name"] in ("weather", "population")[seed:]
            assert whole["finish_reason"] == "tool_calls"
            assert whole["message"]["content"] is None
            choices = choices_in(
                client.post(CHAT, asks | {"stream": True}).body.replace(
                    f"{DONE}\n\n".encode(), b""
                )
            )
            (streamed_call,) = put_together(choices)["tool_calls"]
            assert streamed_call["function"] == made["function"]
        # A function without arguments gets none, however that is said.
        empty = {"type": "object", "properties": {}}
        for said in ({}, {"parameters": None}, {"parameters": empty}):
            tools = [{"type": "function", "function": {"name": "now", **said}}]
            asks = {"messages": HELLO, "tools": tools, "tool_choice": "required"}
            asks |= ends_soon | {"parallel_tool_calls": False, "temperature": 2}
            (made,) = client.post(CHAT, asks).json["choices"][0]["message"][
                "tool_calls"
            ]
            assert made["function"] == {"name": "now", "arguments": "{}"}
        # Asked for JSON, it may call a tool instead.
        answer = {"type": "json_schema", "json_schema": {"schema": CITIES}}
        asks = {"messages": HELLO, "tools": FUNCTIONS, "response_format": answer}
        reasons = set()
        for seed in range(12):
            more = {"seed": seed, "temperature": 2, "parallel_tool_calls": False}
            whole = client.post(CHAT, asks | ends_soon | more).json["choices"][0]
            reasons.add(whole["finish_reason"])
            if whole["finish_reason"] == "stop":
                jsonschema.validate(json.loads(whole["message"]["content"]), CITIES)
            else:
                (made,) = whole["message"]["tool_calls"]
                jsonschema.validate(json.loads(made["function"]["arguments"]), CLOSED)
        assert reasons == {"stop", "tool_calls"}
        odd = {"type": "object", "properties": {"a": {"not": {}}}}
        function = {"name": "f", "parameters": odd}
        tools = [{"type": "function", "function": function}]
        asks = {"messages": HELLO, "tools": tools, "tool_choice": "required"}
        error = client.post(CHAT, asks).json["error"]
        assert "not" in error["message"] and error["code"] == "invalid_value"
        client.close()
