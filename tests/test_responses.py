"""RESPONSES: OpenAI's newer route, whole and streamed, over a model that is a fake.

The events are held against openai's own types, and against a machine that knows in which
order they may come: read_events().
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import openai.types.responses as theirs
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

import embellama_server as es
from tests import kit, test_markup
from tests.test_chat import Stream as ChatStream
from tests.test_chat import chatting

PATH = "/v1/responses"
HELLO = "hello my friend"
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(theirs.ResponseStreamEvent)
PART_EVENTS = {"message": "output_text", "reasoning": "reasoning_text"}
LAST = ("response.completed", "response.incomplete", "response.failed")


class Stream(ChatStream):
    """A stream of responses, event by event."""

    def __init__(self, running: kit.RunningService, **body: Any) -> None:
        super().__init__(running, PATH, **{"input": HELLO} | body)


async def ask(running: kit.RunningService, **body: Any) -> Any:
    """A response that must be 200, checked against openai's type."""
    reply = await running.ask("POST", PATH, {"input": HELLO} | body)
    assert reply.status == 200, reply.body
    theirs.Response.model_validate(reply.json, strict=True)
    return reply.json


async def refused(running: kit.RunningService, **body: Any) -> dict[str, Any]:
    """The error object of a request that must be a 400."""
    reply = await running.ask("POST", PATH, {"input": HELLO} | body)
    assert reply.status == 400, reply.body
    return reply.error


def events_of(body: bytes) -> list[Any]:
    """The events of a whole stream; asserts that each says its type twice."""
    assert body.endswith(b"\n\n") and b"[DONE]" not in body
    found = []
    for event in body.decode().removesuffix("\n\n").split("\n\n"):
        kind, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {found[-1]['type']}"
    return found


async def streamed(running: kit.RunningService, **body: Any) -> list[Any]:
    """The events of a stream."""
    body = {"input": HELLO, "stream": True} | body
    reply = await running.ask("POST", PATH, body)
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events_of(reply.body)


def read_events(events: Sequence[Any]) -> Any:
    """The response that a stream gave; asserts that no event stood in a wrong place."""
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    for event in events:
        EVENT.validate_python(event, strict=True)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    begun = events[0]["response"]
    assert (begun["status"], begun["output"], begun["usage"]) == (
        "in_progress",
        [],
        None,
    )
    beat = "response.in_progress"
    for event in [event for event in events if event["type"] == beat]:
        assert event["response"] | {"output": []} == begun
    rest = [event for event in events[2:] if event["type"] != beat]
    last = rest.pop()
    assert last["type"] in LAST
    assert last["response"]["status"] == last["type"].removeprefix("response.")
    items = [*read_items(rest)]
    assert last["response"]["output"] == items
    assert last["response"].keys() == begun.keys()
    for name in (
        "id",
        "object",
        "created_at",
        "model",
        "instructions",
        "tools",
        "text",
    ):
        assert last["response"][name] == begun[name]
    return last["response"]


def read_items(events: list[Any]) -> Iterable[Any]:
    """The items of a stream, each of which is done before the next begins."""
    for index in range(len(events)):
        if not events:
            return
        added, at = events.pop(0), {"output_index": index}
        assert added == added | at | {"type": "response.output_item.added"}
        item = added["item"]
        assert item["status"] == "in_progress"
        at["item_id"] = item["id"]
        if item["type"] == "function_call":
            assert item["arguments"] == ""
            name = "function_call_arguments"
            grown = read_growth(events, name, at)
            item = item | {"arguments": grown}
            done = events.pop(0)
            assert done["arguments"] == grown
        else:
            name = PART_EVENTS[item["type"]]
            at["content_index"] = 0
            assert item["content"] == []
            part = events.pop(0)
            assert part == part | at | {"type": "response.content_part.added"}
            assert part["part"]["text"] == ""
            logprobs: list[Any] = []
            grown = read_growth(events, name, at, logprobs)
            done = events.pop(0)
            assert done["text"] == grown
            whole = part["part"] | {"text": grown}
            if name == "output_text":
                whole |= {"logprobs": logprobs}
            part = events.pop(0)
            assert part == part | at | {"type": "response.content_part.done"}
            assert part["part"] == whole
            item = item | {"content": [whole]}
        assert done == done | at | {"type": f"response.{name}.done"}
        last = events.pop(0)
        assert last["type"] == "response.output_item.done"
        assert last["output_index"] == index
        assert last["item"] == item | {"status": last["item"]["status"]}
        wanted = ("completed",) if events else ("completed", "incomplete")
        assert last["item"]["status"] in wanted
        yield last["item"]


def read_growth(
    events: list[Any], name: str, at: dict[str, Any], logprobs: list[Any] | None = None
) -> str:
    """What an item has gained by deltas, none of which is empty."""
    grown = ""
    while events[0]["type"] == f"response.{name}.delta":
        delta = events.pop(0)
        assert delta == delta | at
        assert delta["delta"] or delta.get("logprobs")
        grown += delta["delta"]
        if logprobs is not None:
            logprobs += delta.get("logprobs", ())
    return grown


# --- what is repeated ---


def nested(depth: int) -> Any:
    """JSON of that depth; an object on the outside."""
    value: Any = 1
    for _ in range(depth - 1):
        value = [value]
    return {"x": value}


@pytest.mark.parametrize("is_tool", [True, False], ids=["parameters", "schema"])
@pytest.mark.parametrize("depth", [100, 220, 235, 250, 300, 500])
async def test_what_is_too_deep_to_be_repeated_is_refused(
    depth: int, is_tool: bool
) -> None:
    deep = {"type": "object", "default": nested(depth)}
    wanted = {"type": "json_schema", "name": "n", "schema": deep}
    body: dict[str, Any] = {"text": {"format": wanted}}
    if is_tool:
        tool = {"type": "function", "name": "f", "parameters": deep}
        body = {"tools": [tool], "tool_choice": "none"}
    async with chatting() as (running, _):
        raw = json.dumps({"input": HELLO} | body).encode()
        reply = await running.ask("POST", PATH, raw)
        assert reply.status == (200 if depth < 238 else 400), reply.body
        if reply.status == 400:
            assert "nested more than" in reply.error["message"]


# --- whole responses ---


async def test_a_response_has_all_of_openai_s_fields() -> None:
    async with chatting(model_alias=("friend",)) as (running, _):
        found = await ask(running, model="friend", instructions="", temperature=0.5)
        assert found.pop("id").startswith("resp_")
        (item,) = found["output"]
        assert item.pop("id").startswith("msg_")
        assert found.pop("created_at") <= found.pop("completed_at")
        assert found == {
            "object": "response",
            "status": "completed",
            "model": "friend",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": "",
            "max_output_tokens": None,
            "max_tool_calls": None,
            "metadata": {},
            "output": [
                {
                    "type": "message",
                    "status": "completed",
                    "role": "assistant",
                    "content": [
                        {
                            "type": "output_text",
                            "text": HELLO,
                            "annotations": [],
                            "logprobs": [],
                        }
                    ],
                }
            ],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": 0.5,
            "text": {"format": {"type": "text"}, "verbosity": "medium"},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": 0,
            "top_p": found["top_p"],
            "truncation": "disabled",
            "usage": {
                "input_tokens": 3,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": 4,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": 7,
            },
            "user": None,
        }


async def test_a_response_that_reaches_its_most_tokens_is_incomplete() -> None:
    async with chatting() as (running, _):
        for asked in ({"max_output_tokens": 2}, {"max_tokens": 2}):
            found = await ask(running, **asked)
            assert found["status"] == found["output"][0]["status"] == "incomplete"
            assert found["incomplete_details"] == {"reason": "max_output_tokens"}
            assert found["completed_at"] is None
            assert found["output"][0]["content"][0]["text"] == "hello my"
            assert found["max_output_tokens"] == 2
            events = await streamed(running, **asked)
            assert read_events(events)["status"] == "incomplete"
        nothing = await ask(running, max_output_tokens=0)
        assert nothing["output"][0]["content"][0]["text"] == ""


async def test_a_response_repeats_what_was_asked() -> None:
    tools: list[dict[str, Any]] = [
        {"type": "function", "name": "f", "parameters": {"type": "object"}},
        {"type": "web_search"},
        {"type": "function", "name": "g", "description": "d", "strict": True},
    ]
    wanted = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    asked: dict[str, Any] = {
        "instructions": "be brief",
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": wanted, "verbosity": "low"},
        "tools": tools,
        "tool_choice": {"type": "function", "name": "g"},
        "top_p": 0.5,
        "truncation": "auto",
        "store": True,
        "user": "u",
    }
    async with chatting() as (running, _):
        found = await ask(running, **asked)
        for name in ("instructions", "metadata", "reasoning", "text", "tool_choice"):
            assert found[name] == asked[name]
        assert (found["store"], found["truncation"]) == (False, "disabled")
        assert (found["top_p"], found["user"]) == (0.5, "u")
        none: dict[str, Any] = {
            "description": None,
            "parameters": None,
            "strict": False,
        }
        assert found["tools"] == [none | tools[0], none | tools[2]]
        some = [{"type": "function", "name": "f"}]
        choice = {"type": "allowed_tools", "mode": "auto", "tools": some}
        assert (await ask(running, tools=tools, tool_choice=choice))[
            "tool_choice"
        ] == choice


# --- streams ---


async def test_a_stream_has_every_event_in_its_place() -> None:
    async with chatting() as (running, _):
        events = await streamed(running)
        found = read_events(events)
        assert found["output"][0]["content"][0]["text"] == HELLO
        assert [event["type"].removeprefix("response.") for event in events] == [
            *("created", "in_progress", "output_item.added", "content_part.added"),
            *("output_text.delta",) * 3,
            *("output_text.done", "content_part.done", "output_item.done", "completed"),
        ]
        whole = await ask(running)
        for one in (found, whole):
            for name in ("id", "created_at", "completed_at"):
                del one[name]
            del one["output"][0]["id"]
        assert found == whole


async def test_until_the_first_token_a_stream_says_that_it_is_in_progress() -> None:
    async with chatting(heartbeat_s=0.02) as (running, speaker):
        speaker.pause()
        async with Stream(running) as stream:
            await speaker.heard()
            assert (await stream.head()).startswith("HTTP/1.1 200 ")
            found = [await stream.event() for _ in range(4)]
            speaker.step(4)
            while found[-1]["type"] not in LAST:
                found.append(await stream.event())
    assert read_events(found)["output"][0]["content"][0]["text"] == HELLO
    kinds = [event["type"] for event in found[:4]]
    assert kinds == ["response.created"] + ["response.in_progress"] * 3


async def test_in_a_silence_after_its_first_token_a_stream_says_it_again() -> None:
    async with chatting(heartbeat_s=0.02) as (running, speaker):
        speaker.pause()
        async with Stream(running) as stream:
            await speaker.heard()
            speaker.step()
            found = [await stream.event()]
            while found[-1]["type"] != "response.output_text.delta":
                found.append(await stream.event())
            beats = [await stream.event() for _ in range(3)]
            speaker.step(3)
            found += beats
            while found[-1]["type"] not in LAST:
                found.append(await stream.event())
    assert {event["type"] for event in beats} == {"response.in_progress"}
    assert read_events(found)["output"][0]["content"][0]["text"] == HELLO


async def test_an_error_within_a_stream_is_said_in_two_ways_and_breaks_it_off() -> None:
    async with chatting() as (running, speaker):
        speaker.pause()
        async with Stream(running) as stream:
            await speaker.heard()
            speaker.step()
            await stream.head()
            await stream.until("hello")
            speaker.fail(es.EngineFailed("NaN\u2028"))
            rest = (await stream.rest()).decode()
    events = [
        json.loads(line.removeprefix("data: "))
        for line in rest.splitlines()
        if line.startswith("data: ")
    ]
    error, failed = (EVENT.validate_python(event, strict=True) for event in events[-2:])
    assert (error.type, error.message) == ("error", "NaN\u2028")
    assert (error.code, error.param) == ("engine_failed", None)
    assert events[-2]["error"]["message"] == "NaN\u2028"  # at which SDKs raise
    assert failed.sequence_number == error.sequence_number + 1
    assert (failed.type, failed.response.status) == ("response.failed", "failed")
    assert failed.response.error.message == "NaN\u2028"
    assert failed.response.output[0].content[0].text == "hello"
    assert failed.response.output[0].status == "incomplete"


async def test_how_likely_tokens_were_comes_with_their_text() -> None:
    include = ["message.output_text.logprobs", "reasoning.encrypted_content"]
    async with chatting() as (running, _):
        for asked in ({"top_logprobs": 2}, {"include": include}, {}):
            most = asked.get("top_logprobs", 0)
            found = await ask(running, **asked)
            told = found["output"][0]["content"][0]["logprobs"]
            assert [one["token"] for one in told] == (
                ["hello", " my", " friend"] if asked else []
            )
            assert {len(one["top_logprobs"]) for one in told} <= {most}
            events = read_events(await streamed(running, **asked))
            assert events["output"][0]["content"][0]["logprobs"] == told


# --- items, from what a reply gains ---


def call(index: int, arguments: str = "", name: str = "") -> es.CallPart:
    """A part of a call; the first one has a name."""
    return es.CallPart(index, arguments, f"call{index}" if name else "", name)


WHOLE = (
    es.Delta(0, reasoning="I think. Still."),
    es.Delta(0, text="Hello my friend"),
    es.Delta(0, calls=[call(0, '{"a": 1}', "f"), call(1, "{}", "g")]),
)


def test_the_events_of_thoughts_and_calls_are_of_openai_s_types() -> None:
    output = es.ResponseOutput()
    events = [event for delta in WHOLE for event in output.add(copy.deepcopy(delta))]
    events += output.end("completed")
    for number, event in enumerate(events):
        EVENT.validate_python(event | {"sequence_number": number}, strict=True)
    assert {str(event["type"]).split(".")[1] for event in events} == {
        *("output_item", "content_part", "output_text", "reasoning_text"),
        "function_call_arguments",
    }


def grown(deltas: Iterable[es.Delta], status: str = "completed") -> list[Any]:
    """The items of a reply, read from its events; ids are numbers."""
    output, events = es.ResponseOutput(), list[Any]()
    for delta in deltas:
        events += output.add(copy.deepcopy(delta))
    events += output.end(status)
    items = [*read_items([*events])]
    assert items == output.shown()
    return [item | {"id": n} for n, item in enumerate(items)]


def test_a_reply_has_an_item_for_its_thoughts_its_text_and_each_call() -> None:
    thoughts, text, first, second = grown(WHOLE)
    assert thoughts == {
        "type": "reasoning",
        "id": 0,
        "status": "completed",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "I think. Still."}],
    }
    assert text["content"][0]["text"] == "Hello my friend"
    assert first == {
        "type": "function_call",
        "id": 2,
        "status": "completed",
        "call_id": "call0",
        "name": "f",
        "arguments": '{"a": 1}',
    }
    assert (second["call_id"], second["name"]) == ("call1", "g")
    (nothing,) = grown([])
    assert nothing["content"][0]["text"] == ""


@pytest.mark.parametrize(
    ("last", "status"),
    [
        (es.Delta(0, text="So"), "incomplete"),
        (es.Delta(0, reasoning="Hm"), "incomplete"),
        (es.Delta(0, calls=[call(2, "", "h")]), "incomplete"),
        (es.Delta(0, calls=[call(2, '{"a": {}', "h")]), "incomplete"),
        (es.Delta(0, calls=[call(2, '{"a": {}}', "h")]), "completed"),
    ],
)
def test_of_a_reply_that_is_cut_the_last_item_is_incomplete_unless_it_is_a_whole_call(
    last: es.Delta, status: str
) -> None:
    *before, item = grown([*WHOLE, last], "incomplete")
    assert {one["status"] for one in before} == {"completed"}
    assert item["status"] == status


def in_letters() -> list[es.Delta]:
    """The same reply, a letter at a time."""
    letters: list[es.Delta] = []
    for delta in WHOLE:
        letters += (es.Delta(0, reasoning=letter) for letter in delta.reasoning)
        letters += (es.Delta(0, text=letter) for letter in delta.text)
        for part in delta.calls:
            begun = dataclasses.replace(part, arguments="")
            letters.append(es.Delta(0, calls=[begun]))
            for letter in part.arguments:
                letters.append(es.Delta(0, calls=[call(part.index, letter)]))
    return letters


@given(st.sets(st.integers(1, len(in_letters()) - 1)))
def test_a_reply_has_the_same_items_however_its_deltas_are_merged(
    cuts: set[int],
) -> None:
    letters, merged = in_letters(), list[es.Delta]()
    for number, delta in enumerate(letters):
        if number in cuts or not merged:
            merged.append(es.Delta(0))
        merged[-1].add(delta)
    assert grown(merged) == grown(WHOLE)


def test_likelihoods_take_neither_thoughts_nor_calls_apart() -> None:
    # Each token has one, also where it is of a thought or a call.
    merged = list[es.Delta]()
    for number, delta in enumerate([es.Delta(0), *in_letters(), es.Delta(0)]):
        likely = es.TokenLogprob(number, b"x", -float(number))
        merged.append(dataclasses.replace(delta, logprobs=[likely]))
    found, wanted = grown(merged), grown(WHOLE)
    told = found[1]["content"][0].pop("logprobs")
    assert wanted[1]["content"][0].pop("logprobs") == []
    assert found == wanted
    thoughts, text = (len(delta.reasoning + delta.text) for delta in WHOLE[:2])
    assert [-one["logprob"] for one in told] == [*range(thoughts + text + 1)]


def test_a_token_that_shows_nothing_at_the_end_keeps_its_likelihood() -> None:
    likely = [es.TokenLogprob(n, b"x", -float(n)) for n in range(2)]
    for deltas in (
        [es.Delta(0, text="a", logprobs=likely[:1]), es.Delta(0, logprobs=likely[1:])],
        [es.Delta(0, logprobs=likely)],
    ):
        (message,) = grown(deltas)
        assert len(message["content"][0]["logprobs"]) == 2


KINDS = st.one_of(
    st.builds(lambda text: es.Delta(0, reasoning=text), st.text(max_size=3)),
    st.builds(lambda text: es.Delta(0, text=text), st.text(max_size=3)),
    st.just(es.Delta(0, calls=[call(0)])),  # the next one, see below
)


@given(st.lists(st.lists(KINDS, max_size=4), max_size=6))
def test_nothing_a_reply_gains_is_lost_in_whatever_order_it_comes(
    steps: list[list[es.Delta]],
) -> None:
    merged, calls = list[es.Delta](), 0
    for step in steps:
        merged.append(es.Delta(0))
        for delta in map(copy.deepcopy, step):
            for part in delta.calls:
                part.index, part.id, part.name = calls, f"call{calls}", "f"
                calls += 1
            merged[-1].add(delta)
    items = grown(merged)
    said = {"reasoning": "", "message": ""}
    for item in items:
        if item["type"] in said:
            said[item["type"]] += item["content"][0]["text"]
    assert said["reasoning"] == "".join(delta.reasoning for delta in merged)
    assert said["message"] == "".join(delta.text for delta in merged)
    ids = [one["call_id"] for one in items if one["type"] == "function_call"]
    assert ids == [f"call{n}" for n in range(calls)]


# --- whole and streamed, the same ---

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>'
TALKS = {
    "two calls": f"{CALL}\n{CALL}",
    "text between calls": f"Let me see.\n{CALL}\nAnd again.\n{CALL}\nSo.",
    "thoughts, a call and text": f"<think>Hm.</think>{CALL}\nSo <tool_",
}


def talk(text: str, length: int, *, is_constrained: bool = False) -> list[es.Delta]:
    """What a model gains by so many characters of a text, a token each."""
    tools: Any = {"f": {"properties": {"a": {"type": "string"}}}}
    markup = es.Markup(tools=tools, is_constrained=is_constrained)
    script = test_markup.Script(*text)
    return script.deltas(markup=markup, max_tokens=length)


def numbered(found: Any) -> Any:
    """A response's items, status and counts; ids are numbers."""
    items = [item | {"id": n} for n, item in enumerate(found["output"])]
    return items, found["status"], found["incomplete_details"], found["usage"]


@pytest.mark.parametrize(
    ("name", "is_constrained"),
    [*((name, False) for name in TALKS), ("two calls", True)],
)
async def test_wherever_it_is_cut_a_whole_response_is_what_its_stream_ends_with(
    name: str, is_constrained: bool
) -> None:
    text = TALKS[name]
    async with chatting() as (running, speaker):
        for length in range(1, len(text) + 2):
            gains = talk(text, length, is_constrained=is_constrained)
            speaker.gains = [dataclasses.replace(one, tokens=0) for one in gains]
            likely = {"top_logprobs": 1} if length % 2 else {}
            whole = await ask(running, **likely)
            found = read_events(await streamed(running, **likely))
            assert numbered(whole) == numbered(found)


async def test_a_second_call_that_is_cut_is_the_last_item_and_alone_incomplete() -> (
    None
):
    text = TALKS["two calls"]
    async with chatting() as (running, speaker):
        for cut, statuses in (
            ("<tool_", ["completed"]),
            ('"arguments": {"a"', ["completed", "incomplete"]),
        ):
            length = text.rindex(cut) + len(cut)
            gains = talk(text, length, is_constrained=True)
            speaker.gains = [dataclasses.replace(one, tokens=0) for one in gains]
            found = await ask(running)
            assert found["status"] == "incomplete"
            assert [item["status"] for item in found["output"]] == statuses
            assert {item["type"] for item in found["output"]} == {"function_call"}


@given(st.sets(st.integers(1, 200)), st.booleans())
def test_what_piles_up_keeps_its_order_and_likelihoods(
    cuts: set[int], is_likely: bool
) -> None:
    request = es.GenerationRequest(ids=[1], max_tokens=1)
    at_once, piled = list[es.Delta](), list[es.Delta]()
    generation = es.Generation(request, lambda: None)
    for number, delta in enumerate(talk(TALKS["text between calls"], 500)):
        if is_likely:
            delta.logprobs = [es.TokenLogprob(number, b"x", -float(number))]
        at_once.append(copy.deepcopy(delta))
        generation.put(delta)
        if number in cuts:
            piled += generation.take()
    piled += generation.take()
    ids = {"call_id": ""}
    wanted, found = ([one | ids for one in grown(d)] for d in (at_once, piled))
    assert found == wanted
    assert [one["type"] for one in found] == [
        *("message", "function_call") * 2,
        "message",
    ]


# --- what is not kept ---


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_no_response_is_kept(method: str) -> None:
    async with chatting() as (running, _):
        for path in (f"{PATH}/resp_1", f"{PATH}/resp_1/input_items"):
            assert (await running.ask(method, path)).error["code"] == "unknown_url"


# --- what goes wrong before a stream begins ---


async def test_an_error_before_the_first_event_has_its_own_status() -> None:
    async with chatting() as (running, speaker):
        for stream in (False, True):
            too_long = await refused(running, input="word " * 100, stream=stream)
            assert too_long["code"] == "context_length_exceeded"
            assert too_long["param"] == "input"
        speaker.refusal = es.Overloaded("full", retry_after_s=1)
        reply = await running.ask("POST", PATH, {"input": HELLO, "stream": True})
        assert (reply.status, reply.error["type"]) == (503, "overloaded")
