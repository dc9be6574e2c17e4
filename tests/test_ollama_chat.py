"""OLLAMA CHAT: its chat and generate, whole and streamed, over a model that is a fake.

It says again what it is told, a word in each step: see kit.Speaker. What the shapes are
compared with: Ollama's api/types.go, and what its clients in Python and Go take.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest

import embellama_server as es
from tests import kit
from tests.kit import RunningService
from tests.test_chat import Stream, chatting

CHAT, GENERATE = "/api/chat", "/api/generate"
HELLO = [{"role": "user", "content": "hello my friend"}]
ASK: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    GENERATE: {"prompt": "hello my friend"},
}
EACH = pytest.mark.parametrize("path", ASK)
DURATIONS = ("total", "load", "prompt_eval", "eval")
RFC_3339 = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z"  # to the nanosecond, as Go has it
SCHEMAS = {CHAT: es.OLLAMA_CHAT_REPLY, GENERATE: es.OLLAMA_GENERATE_REPLY}


async def ask(running: RunningService, path: str, **body: Any) -> kit.Reply:
    """A reply that must be 200; ``body``: beside what is said."""
    reply = await running.ask("POST", path, ASK[path] | body)
    assert reply.status == 200, reply.body
    return reply


async def whole(running: RunningService, path: str, **body: Any) -> Any:
    """A reply in one piece."""
    reply = await ask(running, path, stream=False, **body)
    assert reply.headers["content-type"] == "application/json"
    jsonschema.validate(reply.json, SCHEMAS[path])
    return reply.json


async def lines(running: RunningService, path: str, **body: Any) -> list[Any]:
    """The lines of a stream; asserts that it is one, and ends well."""
    reply = await ask(running, path, **body)
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert reply.body.endswith(b"\n")
    *parts, last = [json.loads(line) for line in reply.body.decode().splitlines()]
    assert not any(part["done"] for part in parts)
    assert last["done"]
    jsonschema.validate(last, SCHEMAS[path])
    return [*parts, last]


async def refused(running: RunningService, path: str, **body: Any) -> str:
    """The error of a request that must be a 400."""
    reply = await running.ask("POST", path, ASK[path] | body)
    assert reply.status == 400, reply.body
    assert reply.json.keys() == {"error"}
    return str(reply.json["error"])


def said(reply: Any) -> dict[str, Any]:
    """What a reply, or a line of one, says, under chat's names."""
    if "message" in reply:
        assert reply["message"].pop("role") == "assistant"
        return dict(reply["message"])
    return {"content": reply["response"]} | (
        {"thinking": reply["thinking"]} if "thinking" in reply else {}
    )


async def gains(
    running: RunningService,
    speaker: kit.Speaker,
    path: str,
    deltas: Sequence[es.Delta],
    **body: Any,
) -> list[Any]:
    """The lines of a reply that gains these, one after the other."""
    speaker.generations.clear()
    speaker.pause()
    task = asyncio.create_task(ask(running, path, **body))
    generation = await speaker.heard()
    for delta in deltas:
        generation.put(delta)
        if delta is deltas[-1]:
            speaker.end(generation)
        generation.changed()
        while generation._deltas:
            await asyncio.sleep(0)
    reply = await task
    return [json.loads(line) for line in reply.body.decode().splitlines()]


# --- replies ---


@EACH
async def test_a_whole_reply_has_all_of_ollama_s_fields(path: str) -> None:
    async with chatting(model_alias=("friend:1b",)) as (running, _):
        reply = await whole(running, path, model="friend:1b")
        assert said(reply) == {"content": "hello my friend"}
        assert reply["model"] == "friend:1b"
        assert re.fullmatch(RFC_3339, reply["created_at"])
        assert (reply["done"], reply["done_reason"]) == (True, "stop")
        assert (reply["prompt_eval_count"], reply["eval_count"]) == (3, 4)
        took = [reply[f"{name}_duration"] for name in DURATIONS]
        assert all(type(ns) is int and ns > 0 for ns in took), "clients divide by them"
        assert took[0] < 60e9
        assert took[0] >= took[1]


@EACH
async def test_a_stream_has_a_line_for_each_part_and_one_for_its_end(path: str) -> None:
    async with chatting() as (running, _):
        *parts, last = await lines(running, path, model="fake")
        texts = [said(part)["content"] for part in parts]
        assert "".join(texts) == "hello my friend"
        assert all(texts)
        assert said(last) == {"content": ""}
        assert last["done_reason"] == "stop"
        for part in parts:
            field = "message" if path == CHAT else "response"
            assert list(part) == ["model", "created_at", field, "done"]
            assert part["model"] == "fake"
            assert re.fullmatch(RFC_3339, part["created_at"])
        reply = await whole(running, path)
        assert {name for name in last} == {name for name in reply}


@EACH
async def test_a_reply_may_end_at_its_limit_or_before_a_stop(path: str) -> None:
    async with chatting() as (running, speaker):
        short = await whole(running, path, options={"num_predict": 2})
        assert said(short)["content"] == "hello my"
        assert short["done_reason"] == "length"
        for most in (-1, -2, None):
            reply = await whole(running, path, options={"num_predict": most})
            assert reply["done_reason"] == "stop"
        await whole(running, path, options={"stop": ["x", ""]})
        assert speaker.generations[-1].request.stop == ("x",)


@EACH
async def test_options_say_how_tokens_are_chosen(path: str) -> None:
    options = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.5,
        "min_p": 0.25,
        "seed": 3,
        "repeat_penalty": 1.5,
        "repeat_last_n": -1,
        "presence_penalty": -1,
        "frequency_penalty": 2,
    }
    loading = {
        "num_batch": 9,
        "num_gpu": 1,
        "num_thread": 2,
        "use_mmap": True,
        "num_ctx": 32,
        "num_keep": 4,
        "made_up": {"a": []},
    }
    async with chatting() as (running, speaker):
        await whole(running, path, options=options | loading)
        chosen = speaker.generations[-1].request.sampling
        assert {name: getattr(chosen, name) for name in options} == options
        for nothing in ({}, None, {"seed": -1}):
            await whole(running, path, options=nothing)
            sampling = speaker.generations[-1].request.sampling
            assert sampling == es.SamplingOptions()


@EACH
@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"temperature": 3}, "options.temperature"),
        ({"top_k": "a"}, "options.top_k"),
        ({"num_predict": -3}, "options.num_predict"),
        ({"stop": [1]}, "options.stop"),
        ({"num_ctx": 1 << 20}, "options.num_ctx is 1048576"),
        (7, "options must be an object"),
    ],
)
async def test_what_an_option_cannot_be_is_said(
    path: str, options: Any, part: str
) -> None:
    async with chatting() as (running, _):
        assert part in await refused(running, path, options=options)


async def test_a_context_that_is_larger_than_there_is_is_not_promised() -> None:
    async with chatting() as (running, _):
        most = running.served.card.max_input_tokens
        await whole(running, CHAT, options={"num_ctx": most})
        words = await refused(running, CHAT, options={"num_ctx": most + 1})
        assert f"this model's context is {most} tokens (--context-size)" in words


@EACH
async def test_a_prompt_is_never_cut(path: str) -> None:
    async with chatting() as (running, _):
        long = " ".join(["word"] * 99)
        body: dict[str, Any] = {"prompt": long}
        if path == CHAT:
            body = {"messages": [{"role": "user", "content": long}]}
        for how in ({}, {"truncate": True}, {"shift": True}):
            words = await refused(running, path, **body, **how)
            assert "the prompt is too long" in words
            assert "99 tokens" in words


@EACH
async def test_how_likely_tokens_were_rides_with_them(path: str) -> None:
    async with chatting() as (running, _):
        parts = await lines(running, path, logprobs=True, top_logprobs=2)
        shown = [one for part in parts for one in part.get("logprobs", [])]
        assert "".join(one["token"] for one in shown) == "hello my friend"
        for one in shown:
            assert bytes(one["bytes"]).decode() == one["token"]
            assert len(one["top_logprobs"]) == 2
        reply = await whole(running, path, logprobs=True, top_logprobs=2)
        assert reply["logprobs"] == shown
        assert "logprobs" not in await whole(running, path)
        assert "needs logprobs" in await refused(running, path, top_logprobs=2)


# --- thoughts and calls ---


def thought() -> list[es.Delta]:
    """What a reply gains that thinks first."""
    return [
        es.Delta(0, reasoning="let me"),
        es.Delta(0, reasoning=" see"),
        es.Delta(0, "well", finish_reason="stop"),
    ]


def as_one(deltas: Sequence[es.Delta]) -> list[es.Delta]:
    """The same, all at once."""
    one = es.Delta(0)
    for delta in deltas:
        one.add(delta)
    return [one]


@EACH
async def test_thoughts_are_apart_from_the_text(path: str) -> None:
    async with chatting() as (running, speaker):
        parts = await gains(running, speaker, path, thought())
        assert [said(part) for part in parts] == [
            {"content": "", "thinking": "let me"},
            {"content": "", "thinking": " see"},
            {"content": "well"},
            {"content": ""},
        ]
        (reply,) = await gains(running, speaker, path, as_one(thought()), stream=False)
        assert said(reply) == {"content": "well", "thinking": "let me see"}


AS_OBJECTS = [
    {
        "id": "call_1",
        "function": {"index": 0, "name": "add", "arguments": {"a": 1, "b": [2]}},
    },
    {"id": "call_2", "function": {"index": 1, "name": "now", "arguments": {}}},
]


def called() -> list[es.Delta]:
    """What a reply gains that has two calls."""
    parts = (
        [es.CallPart(0, "", "call_1", "add")],
        [es.CallPart(0, '{"a": 1')],
        [es.CallPart(0, ', "b": [2]}'), es.CallPart(1, "", "call_2", "now")],
    )
    deltas = [es.Delta(0, calls=some) for some in parts]
    return [*deltas, es.Delta(0, finish_reason="tool_calls")]


@EACH
async def test_a_model_that_cannot_think_is_not_asked_to(path: str) -> None:
    async with chatting() as (running, speaker):
        for think in (True, "high"):
            assert "does not think" in await refused(running, path, think=think)
        await whole(running, path, think=False)
        (entry,) = running.service.models.entries
        assert entry.loaded
        knows = dataclasses.replace(entry.facts, chat_template="<think></think>")
        entry.loaded.facts = knows
        await whole(running, path, think="high")
        _, options = speaker.engine.template.asked[-1]
        assert options["variables"] == {
            "enable_thinking": True,
            "reasoning_effort": "high",
        }


async def test_a_call_comes_whole_and_its_arguments_are_an_object() -> None:
    async with chatting() as (running, speaker):
        parts = await gains(running, speaker, CHAT, called())
        assert [said(part) for part in parts] == [
            {"content": "", "tool_calls": AS_OBJECTS[:1]},
            {"content": "", "tool_calls": AS_OBJECTS[1:]},
            {"content": ""},
        ]
        assert parts[-1]["done_reason"] == "stop", "Ollama has no other word"
        (reply,) = await gains(running, speaker, CHAT, as_one(called()), stream=False)
        assert said(reply) == {"content": "", "tool_calls": AS_OBJECTS}
        jsonschema.validate(
            reply | {"message": {"role": "assistant", "content": ""}},
            es.OLLAMA_CHAT_REPLY,
        )


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call_that_was_cut_off_is_shown_as_text(stream: bool) -> None:
    cut = [es.CallPart(0, '{"a": [1', "call_1", "add")]
    async with chatting() as (running, speaker):
        deltas = [es.Delta(0, calls=cut, finish_reason="length")]
        first, *_, last = [
            *await gains(running, speaker, CHAT, deltas, stream=stream),
            None,
        ]
        text = '{"name": "add", "arguments": {"a": [1'
        assert said(first) == {"content": text}
        assert (last or first)["done_reason"] == "length" if not stream else True


async def test_what_is_asked_reaches_the_model() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = es.parse_form(
        es.OllamaChatForm,
        {
            "model": "m",
            "messages": [
                {"role": "SYSTEM", "content": "be kind"},
                {"role": "User", "content": "add", "images": []},
                {
                    "role": "assistant",
                    "thinking": "hm",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
                },
                {"role": "tool", "content": "2", "tool_name": "f", "tool_call_id": "c"},
            ],
            "tools": tools,
            "format": schema,
            "think": "low",
        },
    )
    request = es.ollama_chat_request(form)
    assert request.messages == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "add"},
        {
            "role": "assistant",
            "content": "",
            "thinking": "hm",
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "name": "f", "tool_call_id": "c"},
    ]
    assert es.normalized(request.messages)[2].others["reasoning_content"] == "hm"
    assert [*request.tools] == tools
    assert (request.json_schema, request.model) == (schema, "m")
    assert request.variables == {"enable_thinking": True, "reasoning_effort": "low"}
    assert not request.continues_last


@pytest.mark.parametrize(
    ("told", "schema"),
    [("json", {}), ({}, {"type": [*es.JSON_TYPES]}), ("", None), (None, None)],
)
def test_a_format_is_a_schema_or_any_json(told: object, schema: object) -> None:
    body = {"prompt": "a", "format": told, "think": False}
    form = es.parse_form(es.OllamaGenerateForm, body)
    for chat_lack in ("", "has no chat template"):
        request = es.ollama_generate_request(form, chat_lack)
        assert request.json_schema == schema
        assert request.schema_param == "format"
        assert request.variables == {"enable_thinking": False}


@EACH
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", "yaml"),
        ("format", []),
        ("think", "much"),
        ("think", []),
        ("keep_alive", "soon"),
        ("keep_alive", "5" + "m" * 200),
        ("keep_alive", True),
        ("keep_alive", ""),
        ("stream", "perhaps"),
        ("top_logprobs", 21),
    ],
)
async def test_a_field_that_cannot_be_read_is_named(
    path: str, name: str, value: object
) -> None:
    async with chatting() as (running, _):
        assert name in await refused(running, path, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", ["aGk="]),
        ("suffix", "end"),
        ("template", "{{ .Prompt }}"),
        ("context", [1, 2]),
    ],
)
async def test_what_cannot_be_done_is_refused_unless_it_is_empty(
    name: str, value: Any
) -> None:
    async with chatting() as (running, _):
        words = await refused(running, GENERATE, **{name: value})
        assert words.startswith(f"{name} is not supported: ")
        await whole(running, GENERATE, **{name: type(value)()})  # Ollama's own program


async def test_images_of_a_message_are_refused_unless_there_are_none() -> None:
    async with chatting() as (running, _):
        for images, status in (([], 200), (None, 200), (["aGk="], 400)):
            said = [{"role": "user", "content": "a b", "images": images}]
            body = {"messages": said, "stream": False}
            reply = await running.ask("POST", CHAT, body)
            assert reply.status == status
        assert "messages[0].images" in reply.json["error"]


# --- prompts ---


async def test_a_prompt_is_what_the_user_says_after_the_system() -> None:
    async with chatting() as (running, speaker):
        reply = await whole(running, GENERATE, system="be kind")
        assert said(reply)["content"] == "be kind hello my friend"
        messages, _ = speaker.engine.template.asked[-1]
        assert messages == [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "hello my friend"},
        ]
        speaker.engine.template.asked.clear()
        assert said(await whole(running, GENERATE, raw=True)) == {
            "content": "hello my friend"
        }
        assert speaker.engine.template.asked == []
        for name, value in (("system", "be kind"), ("think", True)):
            words = await refused(running, GENERATE, raw=True, **{name: value})
            assert words == f"raw leaves no place for {name}: leave it out"


async def test_without_a_template_a_prompt_is_gone_on_from() -> None:
    engine = kit.FakeChatEngine()
    engine.template = None  # type: ignore[assignment]
    async with chatting(engine=engine) as (running, _):
        assert said(await whole(running, GENERATE))["content"] == "hello my friend"
        words = await refused(running, GENERATE, system="a")
        why = "this model has no chat template, which leaves no place for system"
        assert words == f"{why}: leave it out"
        assert "has no chat template" in await refused(running, CHAT)
        running.served.template_fault = "no end (line 3)"
        for path, body in ((GENERATE, {"system": "a"}), (CHAT, {})):
            assert "cannot be used (no end (line 3))" in await refused(
                running, path, **body
            )


async def test_if_the_assistant_was_the_last_it_goes_on() -> None:
    async with chatting() as (running, speaker):
        said = [*HELLO, {"role": "assistant", "content": "well"}]
        await whole(running, CHAT, messages=said)
        assert speaker.engine.template.asked[-1][1]["continues_last"]
        await whole(running, CHAT)
        assert not speaker.engine.template.asked[-1][1]["continues_last"]


# --- loading, and no longer needing ---


@EACH
@pytest.mark.parametrize("stream", [True, False])
async def test_who_says_nothing_only_loads_the_model(path: str, stream: bool) -> None:
    nothing: Any = {"messages": []} if path == CHAT else {"prompt": ""}
    async with chatting() as (running, speaker):
        for keep_alive in (None, "5m", -1, "-1m", "1h30m", 300, 0.5, "500ms", ".5s"):
            reply = await ask(
                running, path, **nothing, stream=stream, keep_alive=keep_alive
            )
            assert reply.json["done_reason"] == "load"
            assert reply.json["done"]
            assert said(reply.json) == {"content": ""}
            jsonschema.validate(
                reply.json | {"message": {"role": "assistant", "content": ""}},
                SCHEMAS[path],
            )
        assert not speaker.generations


@pytest.mark.parametrize("keep_alive", [0, "0", "0s", 0.0, "-0", "0h0m0s", ".0s"])
def test_no_time_at_all_has_many_spellings(keep_alive: object) -> None:
    form = es.parse_form(es.OllamaChatForm, {"keep_alive": keep_alive})
    assert form.keep_alive is False


@EACH
@pytest.mark.parametrize("is_asked", [True, False])
async def test_a_model_that_its_only_client_no_longer_needs_may_go(
    path: str, is_asked: bool
) -> None:
    nothing: Any = {"messages": []} if path == CHAT else {"prompt": ""}
    engine = kit.FakeChatEngine()
    async with kit.running_service(engine, idle_unload_s=3600) as running:
        models = running.service.models
        (entry,) = models.entries
        await whole(running, path)
        models.sweep(3600)
        assert entry.loaded
        reply = await whole(
            running, path, **({} if is_asked else nothing), keep_alive=0
        )
        assert reply["done_reason"] == ("stop" if is_asked else "unload")
        models.sweep(3600)
        assert entry.state == "unloaded"
        assert (await running.ask("GET", "/api/ps")).json == {"models": []}


async def test_what_others_use_stays_and_so_does_what_the_operator_keeps() -> None:
    async with chatting(idle_unload_s=3600) as (running, _):
        models = running.service.models
        (entry,) = models.entries
        await whole(running, CHAT)
        entry.note_client("another")
        await whole(running, CHAT, messages=[], keep_alive=0)
        models.sweep(3600)
        assert entry.loaded
    async with chatting(idle_unload_s=0) as (running, _):
        models = running.service.models
        (entry,) = models.entries
        reply = await whole(running, CHAT, messages=[], keep_alive=0)
        assert reply["done_reason"] == "unload"
        models.sweep(0)
        assert entry.loaded
        (listed,) = (await running.ask("GET", "/api/ps")).json["models"]
        assert listed["name"] == "fake:latest"


async def test_an_unknown_model_is_told_before_anything_is_loaded_or_let_go() -> None:
    async with chatting() as (running, _):
        for path, asks in ASK.items():
            for more in ({}, {"messages": [], "prompt": ""}, {"keep_alive": 0}):
                body = asks | {"model": "llama3"} | more
                reply = await running.ask("POST", path, body)
                assert reply.status == 404
                assert reply.json["error"].startswith("model 'llama3' not found")


# --- streams that wait, fail, and lines that every client can cut ---


@EACH
async def test_silence_is_filled_with_empty_messages(path: str) -> None:
    async with chatting(heartbeat_s=0.01) as (running, speaker):
        speaker.pause()
        task = asyncio.create_task(ask(running, path))
        await speaker.heard()
        running.log.getvalue()
        while not (await running.ask("GET", "/metrics")).body.count(
            b"embellama_http_streams 1"
        ):
            await asyncio.sleep(0)
        while speaker.running:
            speaker.step()
            await asyncio.sleep(0)
        parts = [json.loads(line) for line in (await task).body.splitlines()]
        assert said(parts[0]) == {"content": ""}
        assert not parts[0]["done"]
        assert "".join(said(part)["content"] for part in parts[1:]) == "hello my friend"


@EACH
async def test_silence_after_the_first_token_is_filled_too(path: str) -> None:
    async with chatting(heartbeat_s=0.02) as (running, speaker):
        speaker.pause()
        async with Stream(running, path, **ASK[path]) as stream:
            generation = await speaker.heard()
            speaker.step()
            await stream.until("hello")
            await stream.until("\n\r\n")
            for _ in range(3):
                chunk = await stream.until("\n\r\n")
                beat = json.loads(chunk[chunk.index("{") :])
                assert said(beat) == {"content": ""}
                assert not beat["done"]
            while not generation.is_over:
                speaker.step()
            await stream.until('"done":true')


@EACH
async def test_a_stream_that_fails_ends_with_its_error_and_a_broken_connection(
    path: str,
) -> None:
    async with chatting() as (running, speaker):
        speaker.pause()
        raw = es.json_codec().dumps(ASK[path])
        lines = [f"POST {path} HTTP/1.1", "host: localhost", "connection: close"]
        lines += [f"content-length: {len(raw)}", "content-type: application/json"]
        reader, writer = await asyncio.open_connection(running.host, running.port)
        writer.write("\r\n".join([*lines, "", ""]).encode() + raw)
        await speaker.heard()
        speaker.step()
        async with asyncio.timeout(kit.DEADLINE_S):
            await reader.readuntil(b"hello")
            speaker.fail(es.EngineFailed("it broke"))
            rest = bytearray()
            try:
                while more := await reader.read(1 << 16):
                    rest += more
            except ConnectionError:
                pass
        writer.close()
        assert b'{"error":"it broke"}\n' in rest
        assert b'"done":true' not in rest
        assert not rest.endswith(b"0\r\n\r\n")


@EACH
async def test_an_error_before_the_first_token_has_a_status(path: str) -> None:
    async with chatting() as (running, speaker):
        speaker.refusal = es.Overloaded("full", retry_after_s=2)
        for stream in (True, False):
            reply = await running.ask("POST", path, ASK[path] | {"stream": stream})
            assert (reply.status, reply.json) == (503, {"error": "full"})


@EACH
async def test_no_line_has_what_python_takes_for_the_end_of_one(path: str) -> None:
    odd = "a\u2028b\u2029c\x85d\ne"
    async with chatting() as (running, speaker):
        deltas = [es.Delta(0, odd, finish_reason="stop")]
        first, _ = await gains(running, speaker, path, deltas)
        assert said(first) == {"content": odd}


# --- who makes models ---


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/create"),
        ("POST", "/api/push"),
        ("POST", "/api/copy"),
        ("DELETE", "/api/delete"),
        ("POST", "/api/blobs/sha256:00"),
        ("HEAD", "/api/blobs/sha256:00"),
    ],
)
async def test_models_are_the_operator_s(method: str, path: str) -> None:
    async with chatting() as (running, _):
        reply = await running.ask(method, path, {"model": "a"})
        assert reply.status == 404
        if method != "HEAD":
            assert "models come from this server's operator" in reply.json["error"]


async def test_ollama_s_own_program_finds_what_it_asks_for() -> None:
    # As Go writes its structs: fields without a value are there, and empty.
    nothing = {"prompt": "", "suffix": "", "system": "", "template": ""}
    load = {"model": "fake", **nothing, "options": None, "keep_alive": "5m0s"}
    show = {"model": "fake", "system": "", "template": "", "verbose": False}
    talk = {"model": "fake", "messages": HELLO, "options": {}, "think": False}
    agent = {"user_agent": "ollama/0.12.6 (amd64 linux) Go/go1.24.1"}
    agent |= {"accept": "application/x-ndjson", "content_type": "application/json"}

    async with chatting() as (running, _):

        async def asked(method: str, path: str, body: object = None) -> kit.Reply:
            raw = None if body is None else es.json_codec().dumps(body)
            reply = await running.ask(method, path, raw, **agent)
            assert reply.status == 200, reply.body
            return reply

        await asked("HEAD", "/")
        shown = (await asked("POST", "/api/show", show | {"options": None})).json
        assert "completion" in shown["capabilities"]
        assert (await asked("POST", GENERATE, load)).json["done_reason"] == "load"
        *parts, last = (await asked("POST", CHAT, talk)).body.splitlines()
        texts = [json.loads(part)["message"]["content"] for part in parts]
        assert "".join(texts) == "hello my friend"
        assert json.loads(last)["done"]
        stop = {"model": "fake", **nothing, "keep_alive": "0s"}
        assert (await asked("POST", GENERATE, stop)).json["done_reason"] == "unload"
        (listed,) = (await asked("GET", "/api/tags")).json["models"]
        (running_now,) = (await asked("GET", "/api/ps")).json["models"]
        assert listed["name"] == running_now["name"] == "fake:latest"
