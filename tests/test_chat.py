"""CHAT: OpenAI's chat and completions, whole and streamed, over a model that is a fake.

It says again what it is told, a word in each step: see kit.Speaker. What the shapes are
compared with: openai's own types and client, and the tables of what clients can read.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Self

import openai
import openai.types.chat
import pytest

import embellama_server as es
from tests import both, chat_models, kit
from tests.kit import RunningService

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello my friend"}]
ASK: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO},
    COMPLETIONS: {"prompt": "hello my friend"},
}
EACH = pytest.mark.parametrize("path", ASK)
DATA, DONE = "data: ", "data: [DONE]"


@contextlib.asynccontextmanager
async def chatting(**changes: Any) -> AsyncIterator[tuple[RunningService, kit.Speaker]]:
    """A service whose only model generates, and what generates."""
    engine = changes.pop("engine", None) or kit.FakeChatEngine()
    async with kit.running_service(engine, **changes) as running:
        yield running, engine.speaker
        await idle(engine.speaker)
        assert running.served.holds == 0
    assert " bug " not in running.log.getvalue()


async def idle(speaker: kit.Speaker) -> None:
    """Return once nothing is generated any more, as clients have left."""
    async with asyncio.timeout(kit.DEADLINE_S):
        while speaker.running:
            await asyncio.sleep(0)


async def ask(running: RunningService, path: str, **body: Any) -> kit.Reply:
    """A reply that must be 200; ``body``: beside what is said."""
    reply = await running.ask("POST", path, ASK[path] | body)
    assert reply.status == 200, reply.body
    return reply


async def refused(running: RunningService, path: str, **body: Any) -> dict[str, Any]:
    """The error object of a request that must be a 400."""
    reply = await running.ask("POST", path, ASK[path] | body)
    assert reply.status == 400, reply.body
    return reply.error


def chunks(body: bytes) -> list[Any]:
    """The events of a whole stream as JSON; asserts that it is one, and ends well."""
    assert body.endswith(b"\n\n")
    events = body.decode().removesuffix("\n\n").split("\n\n")
    assert events.pop() == DONE
    assert all(event.startswith(DATA) and "\n" not in event for event in events)
    return [json.loads(event.removeprefix(DATA)) for event in events]


async def streamed(running: RunningService, path: str, **body: Any) -> list[Any]:
    """The chunks of a stream."""
    reply = await ask(running, path, stream=True, **body)
    return chunks(reply.body)


class Stream:
    """A stream that is read event by event, on a connection of its own."""

    def __init__(self, running: RunningService, path: str, **body: Any) -> None:
        self._running = running
        self._raw = es.json_codec().dumps(ASK.get(path, {}) | {"stream": True} | body)
        self._path = path

    async def __aenter__(self) -> Self:
        running = self._running
        self.reader, self.writer = await asyncio.open_connection(
            running.host, running.port
        )
        lines = [f"POST {self._path} HTTP/1.1", "host: localhost"]
        lines += [f"content-length: {len(self._raw)}", "content-type: application/json"]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + self._raw)
        return self

    async def __aexit__(self, *_: object) -> None:
        sock = self.writer.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        self.writer.transport.abort()

    async def until(self, end: str) -> str:
        """What comes until then."""
        async with asyncio.timeout(kit.DEADLINE_S):
            return (await self.reader.readuntil(end.encode())).decode()

    async def head(self) -> str:
        """The status line and header."""
        return await self.until("\r\n\r\n")

    async def event(self) -> Any:
        """The next event; chunk lines aside, of which it may have a part."""
        text = await self.until("\n\n")
        return json.loads(text.partition(DATA)[2])

    async def rest(self) -> bytes:
        """What still comes; asserts that the connection ends without the last chunk."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(kit.DEADLINE_S):
                rest = await self.reader.read()
                assert not rest.endswith(b"0\r\n\r\n")
                return rest
        return b""


# --- whole replies ---


async def test_a_chat_reply_has_all_of_openai_s_fields_and_infer_server_s() -> None:
    async with chatting(model_alias=("friend",)) as (running, _):
        reply = await ask(running, CHAT, model="friend")
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-embellama-model"] == "fake@1"
        found = reply.json
        openai.types.chat.ChatCompletion.model_validate(found, strict=True)
        performance = found.pop("performance")
        assert len(found.pop("id")) == len("chatcmpl-") + 32
        assert found.pop("created") > 1_700_000_000
        assert found == {
            "object": "chat.completion",
            "model": "friend",
            "system_fingerprint": f"embellama_{es.__version__}",
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": "hello my friend",
                        "refusal": None,
                    },
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {
                "prompt_tokens": 3,
                "completion_tokens": 4,  # and the one that ends it
                "total_tokens": 7,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 0},
            },
        }
        names = ("prefill_time_ms", "decode_time_ms", "queue_time_ms")
        assert list(performance) == [*names, "tokens_per_second", "batch_size"]
        assert all(performance[name] >= 0 for name in names)
        assert performance["tokens_per_second"] > 0
        assert performance["batch_size"] == 1


async def test_a_completion_has_all_of_openai_s_fields() -> None:
    async with chatting() as (running, _):
        found = (await ask(running, COMPLETIONS)).json
        openai.types.Completion.model_validate(found, strict=True)
        assert found["object"] == "text_completion"
        assert found["id"].startswith("cmpl-")
        assert found["choices"] == [
            {
                "text": "hello my friend",
                "index": 0,
                "logprobs": None,
                "finish_reason": "stop",
            }
        ]


async def test_a_reply_that_reaches_max_tokens_ends_with_length() -> None:
    async with chatting() as (running, _):
        found = (await ask(running, CHAT, max_tokens=2)).json
        assert found["choices"][0]["message"]["content"] == "hello my"
        assert found["choices"][0]["finish_reason"] == "length"
        assert found["usage"]["completion_tokens"] == 2


async def test_max_tokens_0_only_reads_the_prompt() -> None:
    async with chatting() as (running, speaker):
        for path in ASK:
            found = (await ask(running, path, max_tokens=0)).json
            assert speaker.generations[-1].request.max_tokens == 0
            assert found["choices"][0]["finish_reason"] == "length"
            assert found["usage"]["completion_tokens"] == 0
            assert found["usage"]["prompt_tokens"] == 3


@EACH
async def test_n_replies_have_an_index_each_and_one_prompt(path: str) -> None:
    async with chatting() as (running, speaker):
        found = (await ask(running, path, n=3)).json
        assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
        assert len(speaker.generations) == 1
        assert found["usage"]["prompt_tokens"] == 3
        assert found["usage"]["completion_tokens"] == 3 * 4
        assert found["performance"]["batch_size"] == 3


async def test_several_prompts_have_their_replies_one_after_the_other() -> None:
    async with chatting(accept_token_ids=True) as (running, speaker):
        texts = ["a b", "c", "d e f"]
        found = (await ask(running, COMPLETIONS, prompt=texts, n=2)).json
        assert [choice["index"] for choice in found["choices"]] == [*range(6)]
        said = [choice["text"] for choice in found["choices"]]
        assert said == ["a b", "a b", "c", "c", "d e f", "d e f"]
        assert found["usage"]["prompt_tokens"] == 6
        ids = [[*one.request.ids] for one in speaker.generations]
        for prompt, wanted in ((ids, ids), (ids[0], ids[:1])):
            speaker.generations.clear()
            found = (await ask(running, COMPLETIONS, prompt=prompt)).json
            assert [[*one.request.ids] for one in speaker.generations] == wanted
            assert found["choices"][0]["text"] == "a b"


# --- streams ---


async def test_a_stream_of_chat_is_of_the_one_shape_that_all_clients_read() -> None:
    async with chatting() as (running, speaker):
        speaker.pause()
        async with Stream(running, CHAT, model="fake") as stream:
            await speaker.heard()
            speaker.step()
            head = await stream.head()
            assert head.startswith("HTTP/1.1 200 ")
            for line in (
                "content-type: text/event-stream; charset=utf-8",
                "cache-control: no-cache",
                "x-accel-buffering: no",
                "transfer-encoding: chunked",
                "x-embellama-model: fake@1",
            ):
                assert f"\r\n{line}\r\n" in head
            assert "content-encoding" not in head
            found = [await stream.event(), await stream.event()]
            for _ in range(2):
                speaker.step()
                found.append(await stream.event())
            speaker.step()
            found.append(await stream.event())
            assert (await stream.until(DONE)).count(DATA) == 1
            assert await stream.until("0\r\n\r\n")
    for chunk in found:
        openai.types.chat.ChatCompletionChunk.model_validate(chunk, strict=True)
    shared = [{k: v for k, v in chunk.items() if k != "choices"} for chunk in found]
    assert shared == [shared[0]] * len(shared)
    assert shared[0]["object"] == "chat.completion.chunk"
    assert shared[0]["model"] == "fake"
    deltas: list[dict[str, str]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": text} for text in ("hello", " my", " friend")]
    assert [chunk["choices"] for chunk in found] == [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
        for delta, reason in (*((delta, None) for delta in deltas), ({}, "stop"))
    ]


async def test_a_stream_of_completions_says_texts_and_ends_with_a_reason() -> None:
    async with chatting() as (running, _):
        found = await streamed(running, COMPLETIONS, max_tokens=2)
        for chunk in found:
            assert chunk["object"] == "text_completion"
            assert chunk["id"] == found[0]["id"]
        choices = [choice for chunk in found for choice in chunk["choices"]]
        assert len(choices) == len(found)
        *grown, last = [choice.pop("finish_reason") for choice in choices]
        assert ({*grown}, last) == ({None}, "length")
        assert "".join(choice.pop("text") for choice in choices) == "hello my"
        assert choices == [{"index": 0, "logprobs": None}] * len(found)


@EACH
async def test_usage_is_in_the_last_chunk_only_and_only_if_asked_for(path: str) -> None:
    async with chatting() as (running, _):
        cases: tuple[tuple[dict[str, Any], bool], ...] = (
            ({}, False),
            ({"stream_options": None}, False),
            ({"stream_options": {"include_usage": False}}, False),
            ({"stream_options": {"include_usage": True}}, True),
            ({"stream_options": {"include_usage": True, "odd": 1}, "n": 2}, True),
        )
        for options, is_asked in cases:
            found = await streamed(running, path, **options)
            told = [chunk for chunk in found if "usage" in chunk]
            assert told == (found[-1:] if is_asked else [])
            assert [n for n, one in enumerate(found) if not one["choices"]] == (
                [len(found) - 1] if is_asked else []
            )
            if told:
                count = options.get("n", 1)
                assert told[0]["usage"]["completion_tokens"] == 4 * count
                assert told[0]["usage"]["total_tokens"] == 3 + 4 * count
                assert told[0]["performance"]["batch_size"] == count


@EACH
async def test_the_replies_of_a_stream_are_told_apart_by_index(path: str) -> None:
    async with chatting() as (running, _):
        found = await streamed(running, path, n=3)
        texts = ["", "", ""]
        reasons: list[str | None] = [None] * 3
        for chunk in found:
            (choice,) = chunk["choices"]
            index = choice["index"]
            assert reasons[index] is None, "nothing after its end"
            delta = choice["delta"] if path == CHAT else {"content": choice["text"]}
            texts[index] += delta.get("content", "")
            reasons[index] = choice["finish_reason"]
        assert texts == ["hello my friend"] * 3
        assert reasons == ["stop"] * 3
        if path == CHAT:
            roles = [chunk["choices"][0]["delta"].get("role") for chunk in found]
            assert roles == ["assistant"] * 3 + [None] * (len(found) - 3)


@EACH
async def test_a_slow_reader_gets_what_piled_up_in_one_chunk(path: str) -> None:
    async with chatting() as (running, speaker):
        speaker.pause()
        async with Stream(running, path) as stream:
            await speaker.heard()
            speaker.step(3)
            await stream.head()
            assert "hello my friend" in await stream.until("friend")
            speaker.step()
            await stream.until(DONE)


@EACH
async def test_no_line_of_a_stream_holds_what_ends_one_to_some_clients(
    path: str,
) -> None:
    odd = '\u2028 \u2029 \x85 \n \r \\ " \x00 \U0001f600'
    async with chatting(any_model=True) as (running, speaker):
        speaker.words = [odd]
        reply = await ask(running, path, stream=True, model=f"m{odd}")
        assert len(reply.body.decode().splitlines()) == reply.body.count(b"\n")
        found = chunks(reply.body)
        choices = [chunk["choices"][0] for chunk in found]
        said = [
            one.get("text") or one.get("delta", {}).get("content") for one in choices
        ]
        assert odd in said
        assert {chunk["model"] for chunk in found} == {f"m{odd}"}


# --- heartbeats ---


@EACH
async def test_until_the_first_token_a_stream_has_heartbeats_that_clients_can_read(
    path: str,
) -> None:
    async with chatting(heartbeat_s=0.02) as (running, speaker):
        speaker.pause()
        async with Stream(running, path) as stream:
            await speaker.heard()
            assert (await stream.head()).startswith("HTTP/1.1 200 ")
            found = [await stream.event() for _ in range(4)]
            speaker.step(4)
            rest = await stream.until(DONE)
    if path == CHAT:  # the role comes first
        assert found.pop(0)["choices"][0]["delta"]["role"] == "assistant"
        assert all(one["choices"][0]["delta"] == {} for one in found)
    else:
        assert all(one["choices"][0]["text"] == "" for one in found)
    assert all(one["choices"][0]["finish_reason"] is None for one in found)
    assert len({one["id"] for one in found}) == 1
    assert found[0]["id"] in rest
    assert '"role"' not in rest


@EACH
async def test_silence_after_the_first_token_is_filled_too(path: str) -> None:
    # A step may take long, or wait for others: proxies and LangChain count any silence.
    async with chatting(heartbeat_s=0.02) as (running, speaker):
        speaker.pause()
        async with Stream(running, path) as stream:
            generation = await speaker.heard()
            speaker.step()
            await stream.until("hello")
            await stream.until("\n\n")
            beats = [(await stream.event())["choices"][0] for _ in range(3)]
            while not generation.is_over:
                speaker.step()
            await stream.until(DONE)
    for beat in beats:
        assert beat.get("delta", beat.get("text")) in ({}, "")
        assert beat["finish_reason"] is None


async def test_while_replies_wait_a_stream_has_heartbeats_of_one_that_is_not_over() -> (
    None
):
    async with chatting(heartbeat_s=0.02) as (running, speaker):
        speaker.pause()
        asks = {"prompt": ["one", "two", "three"]}
        async with Stream(running, COMPLETIONS, **asks) as stream:
            await speaker.heard(3)
            for index, generation in enumerate(speaker.running):
                assert [*await beats_of(stream, 3)] == [index]
                speaker.step(2, only=generation)
                ended = await until_finish(stream)
                assert ended["index"] == index
            await stream.until(DONE)


async def beats_of(stream: Stream, count: int) -> set[int]:
    """The indexes of so many heartbeats."""
    found = set()
    for _ in range(count):
        (choice,) = (await stream.event())["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("", None)
        found.add(choice["index"])
    return found


async def until_finish(stream: Stream) -> Any:
    """The next choice with a finish_reason."""
    while not (choice := (await stream.event())["choices"][0])["finish_reason"]:
        pass
    return choice


async def test_there_are_no_heartbeats_if_they_are_off() -> None:
    async with chatting(heartbeat_s=0, request_timeout_s=0.2) as (running, speaker):
        speaker.pause()
        async with Stream(running, CHAT) as stream:
            await speaker.heard()
            speaker.step()
            await stream.until("hello")
            reply = await running.ask("POST", CHAT, ASK[CHAT] | {"stream": True})
            assert reply.status == 504  # that took 0.2 s
            speaker.step(3)  # two words, merged, and the end
            assert (await stream.until(DONE)).count(DATA) == 3


# --- what a field does ---

# Fields of the body, and those of the GenerationRequest that they become.
BECOMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {"n": 1, "stop": (), "top_logprobs": None, "reuses_cells": True}),
    "nulls": (dict.fromkeys(("max_tokens", "stop", "n", "seed", "user", "top_k")), {}),
    "unknown": ({"store": True, "metadata": {"a": 1}, "service_tier": "auto"}, {}),
    "sdk": ({"prompt_cache_key": "x", "verbosity": "low", "prediction": {}}, {}),
    "max_tokens": ({"max_tokens": 5}, {"max_tokens": 5}),
    "max_tokens 5.0": ({"max_tokens": 5.0}, {"max_tokens": 5}),
    "stop text": ({"stop": "x"}, {"stop": ("x",)}),
    "stop list": ({"stop": ["x", "", "yz"]}, {"stop": ("x", "yz")}),
    "stop none": ({"stop": []}, {"stop": ()}),
    "many stops": ({"stop": ["x" * 1024] * 64}, {"stop": ("x" * 1024,) * 64}),
    "n": ({"n": 4}, {"n": 4}),
    "cache_prompt": ({"cache_prompt": False}, {"reuses_cells": False}),
    "deterministic": ({"deterministic": True}, {"is_deterministic": True}),
}
SAMPLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "seed": None}),
    "temperature": ({"temperature": 0}, {"temperature": 0.0}),
    "top_p": ({"top_p": 1}, {"top_p": 1.0}),
    "top_k": ({"top_k": 0}, {"top_k": 0}),
    "top_k off": ({"top_k": -1}, {"top_k": -1}),
    "min_p": ({"min_p": 0.1}, {"min_p": 0.1}),
    "repeat_penalty": ({"repeat_penalty": 1.2}, {"repeat_penalty": 1.2}),
    "vLLM's": ({"repetition_penalty": 1.3}, {"repeat_penalty": 1.3}),
    "repeat_last_n": ({"repeat_last_n": 10}, {"repeat_last_n": 10}),
    "presence": ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
    "frequency": ({"frequency_penalty": 2}, {"frequency_penalty": 2.0}),
    "seed": ({"seed": 2**53}, {"seed": 2**53}),
    "seed of 64 bits": ({"seed": 2**64 - 1}, {"seed": 2**64 - 1}),
    "seed of 64 bits below 0": ({"seed": 1 - 2**63}, {"seed": 1 - 2**63}),
    "seed below 0": ({"seed": -7}, {"seed": -7}),
    "seed none": ({"seed": -1}, {"seed": None}),
    "ignore_eos": ({"ignore_eos": True}, {"ignore_eos": True}),
    "bias": ({"logit_bias": {"5": -100}}, {"logit_bias": ((5, -100.0),)}),
    "no bias": ({"logit_bias": {}}, {"logit_bias": ()}),
}


def row(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of either table, by its name in pytest."""
    return BECOMES.get(name) or SAMPLES[name]


@EACH
@pytest.mark.parametrize("name", [*BECOMES, *SAMPLES])
async def test_a_field_reaches_the_model(path: str, name: str) -> None:
    body, wanted = row(name)
    async with chatting() as (running, speaker):
        await ask(running, path, **body)
        request = speaker.generations[0].request
        found: Any = request.sampling if name in SAMPLES else request
        assert {field: getattr(found, field) for field in wanted} == wanted


async def test_max_tokens_has_a_default_of_the_model_s_own() -> None:
    engine = kit.FakeChatEngine(max_input_tokens=4096, cells=8192)
    async with chatting(engine=engine, max_tokens=77) as (running, speaker):
        (entry,) = running.service.models.entries
        entry.renew(dataclasses.replace(entry.settings, max_tokens=5))
        await ask(running, CHAT)
        assert speaker.generations[-1].request.max_tokens == 5
        said = (await running.ask("GET", "/props")).json
        assert said["default_generation_settings"]["params"]["max_tokens"] == 5


async def test_max_tokens_has_a_default_which_is_openai_s_for_completions() -> None:
    engine = kit.FakeChatEngine(max_input_tokens=4096, cells=8192)
    async with chatting(engine=engine, max_tokens=77) as (running, speaker):
        for path, body, most in (
            (CHAT, {}, 77),
            (CHAT, {"max_tokens": -1}, 77),
            (CHAT, {"max_tokens": 5}, 5),
            (CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, 6),
            (CHAT, {"max_tokens": 6, "max_completion_tokens": None}, 6),
            (CHAT, {"max_tokens": 10**6}, 4096 - 3),
            (CHAT, {"max_tokens": 10**6, "n": 4}, (8192 - 3) // 4),
            (COMPLETIONS, {}, 16),
            (COMPLETIONS, {"max_tokens": -1}, 77),
        ):
            await ask(running, path, **body)
            assert speaker.generations[-1].request.max_tokens == most, (path, body)


async def test_the_file_s_own_sampling_is_under_the_request_s() -> None:
    async with chatting() as (running, speaker):
        running.served.sampling = es.SamplingOptions(temperature=0.2, top_k=7)
        await ask(running, CHAT, top_k=3)
        found = speaker.generations[0].request.sampling
        assert found == es.SamplingOptions(temperature=0.2, top_k=3)


# --- what the template is given ---


async def test_messages_reach_the_template_without_nulls_and_unknown_fields() -> None:
    bare = {"function": {"name": "f"}}
    call: dict[str, Any] = {"id": "c1", "type": "function"}
    call |= {"function": {"name": "f", "arguments": '{"a": 1}'}}
    said = [
        {"role": "developer", "content": "be brief", "name": None},
        {"role": "User", "content": [{"type": "text", "text": "x"}], "images": []},
        {"role": "assistant", "content": None, "tool_calls": [call], "audio": None},
        {"role": "assistant", "tool_calls": [bare]},
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        {"role": "assistant", "content": "ok", "refusal": None, "reasoning": "hm"},
        {"role": "assistant", "refusal": "no", "tool_calls": None},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": "x"},
    ]
    engine = kit.FakeChatEngine()
    async with chatting(engine=engine) as (running, _):
        await ask(running, CHAT, messages=said)
        assert [*engine.template.asked[0][0]] == [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "x"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "assistant", "content": None, "tool_calls": [bare]},
            {"role": "tool", "content": "3", "tool_call_id": "c1"},
            {"role": "assistant", "content": "ok", "reasoning": "hm"},
            {"role": "assistant", "content": "no"},
            {"role": "user", "content": ""},
            {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
            {"role": "user", "content": "x"},
        ]


EMPTY = {"type": "object", "properties": {}}
TOOL = {"type": "function", "function": {"name": "f", "odd": 1, "parameters": EMPTY}}
BARE = {"type": "function", "function": {"name": "f", "odd": 1}}
GOES_ON = [*HELLO, {"role": "assistant", "content": "well"}]
# Fields of the body, and what the template is told.
RENDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": (
        {},
        {
            "tools": [],
            "variables": {},
            "add_generation_prompt": True,
            "continues_last": False,
        },
    ),
    "tools, as they came": ({"tools": [TOOL]}, {"tools": [TOOL]}),
    "a tool without arguments": ({"tools": [BARE]}, {"tools": [TOOL]}),
    "no tools": ({"tools": []}, {"tools": []}),
    "auto": ({"tools": [TOOL], "tool_choice": "auto"}, {"tools": [TOOL]}),
    "none": ({"tools": [TOOL], "tool_choice": "none"}, {"tools": []}),
    "required": ({"tools": [TOOL], "tool_choice": "required"}, {"tools": [TOOL]}),
    "parallel": ({"tools": [TOOL], "parallel_tool_calls": True}, {"tools": [TOOL]}),
    "format": ({"response_format": {"type": "text"}}, {}),
    "JSON": ({"response_format": {"type": "json_object"}}, {}),
    "grammar": ({"grammar": 'root ::= "x"'}, {}),
    "modalities": ({"modalities": ["text"]}, {}),
    "variables": (
        {"chat_template_kwargs": {"a": [1]}, "reasoning_effort": "high"},
        {
            "variables": {
                "a": [1],
                "reasoning_effort": "high",
                "enable_thinking": True,
            }
        },
    ),
    "no thinking": (
        {"reasoning_effort": "none"},
        {"variables": {"reasoning_effort": "none", "enable_thinking": False}},
    ),
    "OpenRouter's": (
        {"reasoning": {"effort": "low", "max_tokens": 5}},
        {"variables": {"reasoning_effort": "low", "enable_thinking": True}},
    ),
    "OpenRouter's no thinking": (
        {"reasoning": {"effort": "low", "enabled": False}},
        {"variables": {"reasoning_effort": "none", "enable_thinking": False}},
    ),
    "OpenRouter's thinking": (
        {"reasoning": {"enabled": True}},
        {"variables": {"enable_thinking": True}},
    ),
    "OpenRouter's nothing": ({"reasoning": {}}, {"variables": {}}),
    "both": (
        {"reasoning": {"effort": "low"}, "reasoning_effort": "high"},
        {"variables": {"reasoning_effort": "high", "enable_thinking": True}},
    ),
    "the variable wins": (
        {
            "reasoning_effort": "none",
            "chat_template_kwargs": {"enable_thinking": True},
        },
        {"variables": {"reasoning_effort": "none", "enable_thinking": True}},
    ),
    "no turn": (
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continues_last": False},
    ),
    "the assistant was last": (
        {"messages": GOES_ON},
        {"add_generation_prompt": False, "continues_last": True},
    ),
    "and begins anew": (
        {"messages": GOES_ON, "add_generation_prompt": True},
        {"add_generation_prompt": True, "continues_last": False},
    ),
    "and goes on": (
        {"messages": GOES_ON, "continue_final_message": True},
        {"add_generation_prompt": False, "continues_last": True},
    ),
    "and does not": (
        {"messages": GOES_ON, "continue_final_message": False},
        {"add_generation_prompt": True, "continues_last": False},
    ),
}


@pytest.mark.parametrize("name", RENDERS)
async def test_a_field_reaches_the_template(name: str) -> None:
    body, wanted = RENDERS[name]
    engine = kit.FakeChatEngine()
    async with chatting(engine=engine) as (running, _):
        await ask(running, CHAT, **body)
        told = engine.template.asked[0][1]
        assert {field: told[field] for field in wanted} == wanted


async def test_what_the_template_refuses_is_told_in_its_words() -> None:
    engine = kit.FakeChatEngine()
    async with chatting(engine=engine) as (running, _):
        engine.template.refusal = es.TemplateRefused("roles must alternate")
        for stream in (False, True):
            error = await refused(running, CHAT, stream=stream)
            assert error["code"] == "template_error"
            assert error["message"] == "roles must alternate"


# --- what is refused ---

# Path, fields of the body; the code and the param of the error, words of its sentence.
BAD: tuple[tuple[str, dict[str, Any], str, str, str], ...] = (
    (CHAT, {"messages": None}, "invalid_value", "messages", "missing"),
    (CHAT, {"messages": []}, "invalid_value", "messages", "at least one"),
    (CHAT, {"messages": "hi"}, "invalid_value", "messages", "a list"),
    (CHAT, {"messages": ["hi"]}, "invalid_value", "messages[0]", "an object"),
    (CHAT, {"messages": [{}]}, "invalid_value", "messages[0].role", "missing"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "invalid_value", "messages[0].role", "one of system"),
    (CHAT, {"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content", "missing"),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, "invalid_value", "messages[0].content", "a string"),
    (CHAT, {"messages": [{"role": "user", "content": ["x"]}]}, "invalid_value", "messages[0].content[0]", "type text"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "invalid_value", "messages[0].content[0]", "image_url"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "invalid_value", "messages[0].content[0].text", "a string"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "invalid_value", "messages[0].tool_calls[0].function", "missing"),
    (CHAT, {"temperature": -0.1}, "invalid_value", "temperature", "0 to 2"),
    (CHAT, {"temperature": "0.5"}, "invalid_value", "temperature", "a number"),
    (CHAT, {"temperature": True}, "invalid_value", "temperature", "a number"),
    (CHAT, {"top_p": 1.1}, "invalid_value", "top_p", "0 to 1"),
    (CHAT, {"presence_penalty": 3}, "invalid_value", "presence_penalty", "-2 to 2"),
    (CHAT, {"repeat_penalty": 0}, "invalid_value", "repeat_penalty", "0.01"),
    (CHAT, {"max_tokens": -2}, "invalid_value", "max_tokens", "at least -1"),
    (CHAT, {"max_tokens": 1.5}, "invalid_value", "max_tokens", "whole"),
    (CHAT, {"n": 0}, "invalid_value", "n", "at least 1"),
    (CHAT, {"n": 5}, "invalid_value", "n", "at most 4 (--parallel)"),
    (CHAT, {"seed": 0.5}, "invalid_value", "seed", "whole"),
    (CHAT, {"seed": "9" * 20}, "invalid_value", "seed", "-9223372036854775807 to"),
    (CHAT, {"stop": 1}, "invalid_value", "stop", "at most 64"),
    (CHAT, {"stop": ["x"] * 65}, "invalid_value", "stop", "at most 64"),
    (CHAT, {"stop": "x" * 1025}, "invalid_value", "stop", "1024"),
    (CHAT, {"stop": [1]}, "invalid_value", "stop", "strings"),
    (CHAT, {"logit_bias": [[1, 2]]}, "invalid_value", "logit_bias", "an object"),
    (CHAT, {"logit_bias": {"x": 1}}, "invalid_value", "logit_bias", "'x', no token id"),
    (CHAT, {"logit_bias": {"1": 101}}, "invalid_value", "logit_bias.1", "-100 to 100"),
    (CHAT, {"logit_bias": {str(2**30): 1}}, "invalid_value", "logit_bias", f"0 to {2**30 - 1}"),
    (CHAT, {"logit_bias": {str(n): 1 for n in range(1025)}}, "invalid_value", "logit_bias", "1024"),
    (CHAT, {"top_logprobs": 2}, "invalid_value", "top_logprobs", "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs", "0 to 20"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "invalid_value", "response_format", "json_schema is missing"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "invalid_value", "response_format", "has no schema"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "invalid_value", "response_format", "response_format.not is not supported"),
    (CHAT, {"response_format": {"type": "xml"}}, "invalid_value", "response_format", "json_object or json_schema"),
    (CHAT, {"grammar": "x"}, "invalid_value", "grammar", "outside of a rule"),
    (COMPLETIONS, {"json_schema": 1}, "invalid_value", "json_schema", "an object"),
    (CHAT, {"tools": [{"type": "search"}]}, "invalid_value", "tools[0].type", "not search"),
    (CHAT, {"tools": [TOOL, TOOL]}, "invalid_value", "tools[1].function.name", "as is that of tools[0]"),
    (CHAT, {"tool_choice": "required"}, "invalid_value", "tool_choice", "no tools"),
    (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "invalid_value", "tool_choice", "names g"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]}, "invalid_value", "messages[0].tool_calls[0].type", "not custom"),
    (CHAT, {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "invalid_value", "messages[0].function_call", "use tool_calls"),
    (CHAT, {"reasoning_format": "xml"}, "invalid_value", "reasoning_format", "one of auto"),
    (CHAT, {"reasoning": "low"}, "invalid_value", "reasoning", "an object"),
    (CHAT, {"functions": []}, "invalid_value", "functions", "use tools"),
    (CHAT, {"function_call": "auto"}, "invalid_value", "function_call", "tool_choice"),
    (CHAT, {"audio": {"voice": "x"}}, "invalid_value", "audio", "only text"),
    (CHAT, {"modalities": ["text", "audio"]}, "invalid_value", "modalities[1]", "text"),
    (CHAT, {"web_search_options": {}}, "invalid_value", "web_search_options", "no search"),
    (CHAT, {"continue_final_message": True}, "invalid_value", "continue_final_message", "assistant"),
    (CHAT, {"messages": GOES_ON, "continue_final_message": True, "add_generation_prompt": True}, "invalid_value", "continue_final_message", "excludes"),
    (CHAT, {"stream_options": 1}, "invalid_value", "stream_options", "an object"),
    (CHAT, {"priority": "highest"}, "invalid_value", "priority", "one of high"),
    (COMPLETIONS, {"prompt": None}, "invalid_value", "prompt", "missing"),
    (COMPLETIONS, {"prompt": ""}, "invalid_value", "prompt[0]", "empty"),
    (COMPLETIONS, {"prompt": ["a", ""]}, "invalid_value", "prompt[1]", "empty"),
    (COMPLETIONS, {"prompt": [1, 2]}, "token_ids_not_accepted", "prompt", "--accept-token-ids"),
    (COMPLETIONS, {"prompt": [[1], [2]]}, "token_ids_not_accepted", "prompt", "--accept-token-ids"),
    (COMPLETIONS, {"suffix": "x"}, "invalid_value", "suffix", "not supported"),
    (COMPLETIONS, {"best_of": 2}, "invalid_value", "best_of", "equal to n"),
    (COMPLETIONS, {"logprobs": 21}, "invalid_value", "logprobs", "0 to 20"),
    (COMPLETIONS, {"logprobs": True}, "invalid_value", "logprobs", "whole"),
)  # fmt: skip


async def test_what_cannot_be_done_is_refused_in_a_sentence_that_names_the_field() -> (
    None
):
    async with chatting() as (running, speaker):
        for path, body, code, param, words in BAD:
            for stream in (False, True):
                error = await refused(running, path, stream=stream, **body)
                assert error["code"] == code, body
                assert error["param"] == param, error
                assert words in error["message"], error
                assert error["type"] == "invalid_request_error"
        assert speaker.generations == []


async def test_numbers_that_are_none_are_refused() -> None:
    async with chatting() as (running, _):
        for odd in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
            raw = (
                es.json_codec().dumps(ASK[CHAT])[:-1] + b',"temperature":' + odd + b"}"
            )
            kind = {"content_type": "application/json"}
            reply = await running.ask("POST", CHAT, raw, **kind)
            assert reply.status == 400, odd
        with pytest.raises(es.InvalidValue):
            es.number(0, 2).read(math.nan, "temperature")


async def test_token_ids_that_the_model_does_not_have_are_refused() -> None:
    async with chatting(accept_token_ids=True) as (running, _):
        error = await refused(running, COMPLETIONS, prompt=[[1], [5, 2**30]])
        assert error["param"] == "prompt[1]"
        assert str(2**30) in error["message"]


@EACH
async def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(
    path: str,
) -> None:
    async with chatting() as (running, speaker):
        for words, max_tokens, fits in ((31, 1, True), (32, 1, False), (32, 0, True)):
            said: dict[str, Any] = {"prompt": "a " * words}
            if path == CHAT:
                said = {"messages": [{"role": "user", "content": "a " * words}]}
            if fits:
                await ask(running, path, **said, max_tokens=max_tokens)
                assert speaker.generations[-1].request.max_tokens == max_tokens
                continue
            error = await refused(running, path, **said, max_tokens=max_tokens)
            assert error["code"] == "context_length_exceeded"
            assert "has 32 tokens" in error["message"]
            assert "context length is 32 tokens" in error["message"]
            assert "--context-size" in error["message"]


async def test_a_text_of_megabytes_is_refused_before_it_is_tokenized() -> None:
    engine = kit.FakeChatEngine()
    async with chatting(engine=engine) as (running, _):
        text = "word " * 100_000
        error = await refused(running, COMPLETIONS, prompt=text)
        assert error["code"] == "context_length_exceeded"
        assert str(len(text)) in error["message"]
        assert engine.word(kit.fake_id("word")) != "word", "it was not read"


# --- which model ---


async def test_dummy_and_tgi_are_the_chat_model_unless_one_is_called_that() -> None:
    chatter = kit.FakeChatEngine()
    async with kit.running_service(beside={"chatter": chatter}) as running:
        for name in ("dummy", "tgi", "chatter", "chatter@1", None):
            reply = await running.ask("POST", CHAT, ASK[CHAT] | {"model": name})
            assert reply.status == 200
            assert reply.headers["x-embellama-model"] == "chatter@1"
            assert reply.json["model"] == name or "chatter"
        reply = await running.ask("POST", CHAT, ASK[CHAT] | {"model": "gpt-9"})
        assert (reply.status, reply.error["code"]) == (404, "model_not_found")
        reply = await running.ask(
            "POST", "/v1/embeddings", {"input": "a", "model": "tgi"}
        )
        assert reply.status == 404


async def test_a_model_of_another_kind_says_what_it_is_and_what_is_needed() -> None:
    chatter = kit.FakeChatEngine()
    async with kit.running_service(beside={"chatter": chatter}) as running:
        reply = await running.ask("POST", CHAT, ASK[CHAT] | {"model": "fake"})
        assert (reply.status, reply.error["code"]) == (400, "wrong_kind_of_model")
        assert "an embedding model" in reply.error["message"]
        assert "generates text" in reply.error["message"]
        body = {"input": "a", "model": "chatter"}
        reply = await running.ask("POST", "/v1/embeddings", body)
        assert (reply.status, reply.error["code"]) == (400, "wrong_kind_of_model")
        assert "generates text" in reply.error["message"]


async def test_without_a_template_a_model_completes_and_refuses_to_chat() -> None:
    async with chatting() as (running, _):
        running.served.template = None
        await ask(running, COMPLETIONS)
        for fault, words in (
            ("", "has no chat template"),
            ("no end (line 3)", "has a chat template in its file that cannot be used"),
        ):
            running.served.template_fault = fault
            error = await refused(running, CHAT)
            assert error["code"] == "wrong_kind_of_model"
            assert words in error["message"] and fault in error["message"]
            assert "--chat-template FILE" in error["message"]


async def test_the_list_of_models_says_which_of_them_generate() -> None:
    chatter = kit.FakeChatEngine()
    async with kit.running_service(beside={"chatter": chatter}) as running:
        listed = (await running.ask("GET", "/v1/models")).json["data"]
        assert [one["meta"]["kind"] for one in listed] == ["embed", "generate"]


# --- logprobs ---


async def test_logprobs_of_chat_are_in_openai_s_shape_and_ride_on_their_text() -> None:
    async with chatting() as (running, speaker):
        speaker.words = ["é", "\U0001f600"]
        whole = (await ask(running, CHAT, logprobs=True, top_logprobs=2)).json
        parsed = openai.types.chat.ChatCompletion.model_validate(whole, strict=True)
        logprobs = parsed.choices[0].logprobs
        assert logprobs is not None and logprobs.content is not None
        assert [token.token for token in logprobs.content] == ["é", " \U0001f600"]
        assert [token.bytes for token in logprobs.content] == [
            [195, 169],
            [32, 240, 159, 152, 128],
        ]
        assert [token.logprob for token in logprobs.content] == [-0.5, -0.5]
        tops = logprobs.content[0].top_logprobs
        assert [(one.token, one.logprob) for one in tops] == [
            ("é", -0.5),
            ("other0", -1.0),
        ]
        assert logprobs.refusal is None
        found = await streamed(running, CHAT, logprobs=True)
        shown = [
            (one["token"], one["top_logprobs"])
            for chunk in found
            for one in (chunk["choices"][0]["logprobs"] or {}).get("content", ())
        ]
        assert shown == [("é", []), (" \U0001f600", [])]


async def test_logprobs_that_were_asked_for_are_there_though_a_reply_is_empty() -> None:
    async with chatting() as (running, speaker):
        speaker.words = []
        for path, more in ((CHAT, {"logprobs": True}), (COMPLETIONS, {"logprobs": 1})):
            without = (await ask(running, path)).json["choices"][0]
            assert without["logprobs"] is None
            logprobs = (await ask(running, path, **more)).json["choices"][0]["logprobs"]
            assert logprobs == (
                {"content": [], "refusal": None}
                if path == CHAT
                else {key: [] for key in logprobs}
            )


async def test_a_token_that_is_half_a_character_shows_its_bytes() -> None:
    half = es.TokenLogprob(5, b"\xf0\x9f", -1.0, ((b"\xf0\x9f", -1.0),))
    other = es.TokenLogprob(6, b"\x98\x80!", -2.0)
    async with chatting() as (running, speaker):
        for path in ASK:
            speaker.generations.clear()
            speaker.pause()
            body = (
                {"logprobs": True, "top_logprobs": 1}
                if path == CHAT
                else {"logprobs": 1}
            )
            task = asyncio.create_task(ask(running, path, **body))
            generation = await speaker.heard()
            for text, logprob in (("", half), ("\U0001f600!", other)):
                generation.put(es.Delta(0, text, tokens=1, logprobs=[logprob]))
            generation.put(es.Delta(0, finish_reason="stop"))
            speaker.end(generation)
            generation.changed()
            found = (await task).json["choices"][0]["logprobs"]
            if path == CHAT:
                assert [one["bytes"] for one in found["content"]] == [
                    [0xF0, 0x9F],
                    [0x98, 0x80, 0x21],
                ]
                assert found["content"][0]["token"] == "\ufffd"
            else:
                assert found["tokens"] == ["bytes:\\xf0\\x9f", "bytes:\\x98\\x80\\x21"]
                assert found["top_logprobs"][0] == {"bytes:\\xf0\\x9f": -1.0}
                assert found["text_offset"] == [0, 0]


async def test_logprobs_of_completions_are_in_the_older_shape() -> None:
    async with chatting() as (running, _):
        whole = (await ask(running, COMPLETIONS, logprobs=1)).json
        openai.types.Completion.model_validate(whole, strict=True)
        assert whole["choices"][0]["logprobs"] == {
            "tokens": ["hello", " my", " friend"],
            "token_logprobs": [-0.5, -0.5, -0.5],
            "top_logprobs": [{"hello": -0.5}, {" my": -0.5}, {" friend": -0.5}],
            "text_offset": [0, 5, 8],
        }
        for count in (0, 20):
            found = (await ask(running, COMPLETIONS, logprobs=count)).json
            tops = found["choices"][0]["logprobs"]["top_logprobs"]
            assert [len(top) for top in tops] == [count] * 3


async def test_echo_puts_the_prompt_before_the_reply_and_before_its_logprobs() -> None:
    async with chatting(accept_token_ids=True) as (running, speaker):
        found = (await ask(running, COMPLETIONS, echo=True, max_tokens=1)).json
        assert found["choices"][0]["text"] == "hello my friendhello"
        assert speaker.generations[-1].request.echoes_logprobs is False
        body: dict[str, Any] = {"echo": True, "logprobs": 1, "prompt": ["a bc", "d"]}
        found = (await ask(running, COMPLETIONS, **body, max_tokens=0)).json
        assert [one["text"] for one in found["choices"]] == ["a bc", "d"]
        assert found["choices"][0]["logprobs"] == {
            "tokens": ["a", "bc"],
            "token_logprobs": [None, -0.25],  # nothing comes before the first
            "top_logprobs": [None, {"bc": -0.25}],
            "text_offset": [0, 2],
        }
        ids = [[*one.request.ids] for one in speaker.generations[-2:]]
        found = (await ask(running, COMPLETIONS, **(body | {"prompt": ids}))).json
        assert [one["text"] for one in found["choices"]] == ["a bca bc", "dd"]


async def test_a_stream_echoes_once() -> None:
    async with chatting() as (running, speaker):
        body: dict[str, Any] = {"echo": True, "logprobs": 0, "n": 2}
        found = await streamed(running, COMPLETIONS, **body)
        for index in range(2):
            mine = [
                chunk["choices"][0]
                for chunk in found
                if chunk["choices"][0]["index"] == index
            ]
            assert "".join(one["text"] for one in mine) == "hello my friend" * 2
            offsets = [
                offset
                for one in mine
                for offset in (one["logprobs"] or {}).get("text_offset", ())
            ]
            assert len(offsets) == 6
            assert offsets == sorted(offsets)
        speaker.pause()
        async with Stream(running, COMPLETIONS, echo=True) as stream:
            await speaker.heard(2)
            speaker.step()
            assert (await stream.until("hello my friendhello")).count(DATA) == 1
            speaker.step()
            assert "hello" not in await stream.until(" my")


# --- errors, and clients that leave ---


@EACH
async def test_what_fails_before_the_first_token_has_its_status(path: str) -> None:
    async with chatting() as (running, speaker):
        speaker.refusal = es.Overloaded("the queue is full", retry_after_s=2.0)
        for stream in (False, True):
            reply = await running.ask("POST", path, ASK[path] | {"stream": stream})
            assert (reply.status, reply.error["code"]) == (503, "overloaded")
            assert reply.headers["retry-after"] == "2"
        speaker.refusal = es.EngineUnavailable("it hangs", retry_after_s=3.0)
        for stream in (False, True):
            reply = await running.ask("POST", path, ASK[path] | {"stream": stream})
            assert (reply.status, reply.error["code"]) == (502, "engine_unavailable")
        speaker.refusal = None
        speaker.pause()
        for n, stream in enumerate((False, True), 1):
            body = ASK[path] | {"stream": stream}
            task = asyncio.create_task(running.ask("POST", path, body))
            await speaker.heard(n)
            speaker.fail(es.EngineFailed("NaN"))
            reply = await task
            assert (reply.status, reply.error["code"]) == (500, "engine_failed")


@EACH
async def test_a_reply_that_is_refused_counts_as_no_tokens_and_no_wait(
    path: str,
) -> None:
    async with chatting() as (running, speaker):
        speaker.refusal = es.Overloaded("the queue is full")
        for stream in (False, True):
            reply = await running.ask("POST", path, ASK[path] | {"stream": stream})
            assert reply.status == 503
        telemetry = running.service.telemetry
        assert telemetry.value("embellama_model_tokens_total", "fake@1") == 0
        assert "embellama_queue_seconds_count 0\n" in telemetry.exposition()
        assert " tokens=" not in running.log.getvalue()


@EACH
async def test_a_prompt_that_was_not_begun_by_its_deadline_counts_as_no_tokens(
    path: str,
) -> None:
    async with chatting() as (running, speaker):
        speaker.pause()
        reply = await running.ask("POST", path, ASK[path], x_request_timeout="0.1")
        assert reply.status == 504
        telemetry = running.service.telemetry
        assert telemetry.value("embellama_model_tokens_total", "fake@1") == 0
        assert " tokens=0 " in running.log.getvalue()


@EACH
async def test_what_fails_later_is_told_in_the_stream_which_then_breaks(
    path: str,
) -> None:
    async with chatting() as (running, speaker):
        speaker.pause()
        async with Stream(running, path) as stream:
            await speaker.heard()
            speaker.step()
            await stream.until("hello")
            speaker.step()  # what came before the error is sent before it
            speaker.fail(es.EngineFailed("NaN\u2028"))
            assert " my" in await stream.until(" my")
            told = await stream.until('"code":"engine_failed"}}\n\n')
            error = json.loads(told.partition(DATA)[2])["error"]
            assert error["message"] == "NaN\u2028"
            assert "\u2028" not in told
            rest = await stream.rest()
            assert b"DONE" not in rest and b"finish_reason" not in rest


@EACH
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_the_work(path: str, stream: bool) -> None:
    async with chatting() as (running, speaker):
        speaker.pause()
        for n, steps in enumerate((0, 1), 1):
            async with Stream(running, path, stream=stream, n=2) as left:
                generation = await speaker.heard(n)
                speaker.step(steps)
                if stream and steps:
                    await left.until("hello")
            await idle(speaker)
            assert speaker.cancelled[-1] is generation
        async with asyncio.timeout(kit.DEADLINE_S):
            while running.log.getvalue().count(" status=499 ") < 2:
                await asyncio.sleep(0)


@EACH
async def test_a_server_that_stops_tells_running_streams_and_breaks_them(
    path: str,
) -> None:
    async with chatting(drain_timeout_s=0.1) as (running, speaker):
        speaker.pause()
        async with Stream(running, path) as stream:
            await speaker.heard()
            speaker.step()
            await stream.until("hello")
            running.server.stop()
            told = await stream.until('"code":"not_ready"}}')
            assert "finish_reason" not in told.rpartition('"error"')[2]
            assert b"DONE" not in await stream.rest()


async def test_a_whole_reply_ends_by_its_deadline_in_infer_server_s_words() -> None:
    async with chatting(request_timeout_s=0.1) as (running, speaker):
        speaker.pause()
        for path, body in ASK.items():
            reply = await running.ask("POST", path, body)
            assert reply.status == 504
            assert reply.error["code"] == "engine_timeout"
            assert reply.error["type"] == "timeout_error"
            assert "0.1 s" in reply.error["message"]


@pytest.mark.parametrize("heartbeat_s", [0.0, 0.02])
async def test_a_stream_s_deadline_is_that_of_its_first_token(
    heartbeat_s: float,
) -> None:
    changes = {"request_timeout_s": 0.2, "heartbeat_s": heartbeat_s}
    async with chatting(**changes) as (running, speaker):
        speaker.pause()
        async with Stream(running, CHAT) as stream:
            generation = await speaker.heard()
            assert generation.timeout_s == math.inf
            speaker.step()
            await stream.until("hello")
            async with Stream(running, CHAT) as late:
                head = await late.head()  # at once or once the time is up
                assert head.startswith(f"HTTP/1.1 {200 if heartbeat_s else 504} ")
                said = await late.until('"code":"engine_timeout"}}')
                assert "timeout_error" in said
            # That one's time was up after this one's.
            speaker.step(3)
            await stream.until(DONE)


async def test_the_client_s_own_time_bounds_the_wait_for_the_first_token_only() -> None:
    async with chatting() as (running, speaker):
        speaker.pause()
        body = ASK[CHAT] | {"stream": True}
        reply = await running.ask("POST", CHAT, body, x_request_timeout="0.1")
        assert reply.status == 504
        assert "0.1 s" in reply.error["message"]


# --- keys, turns, lines of log ---


async def test_tokens_are_charged_for_the_prompt_at_once_and_the_reply_at_its_end() -> (
    None
):
    async with chatting(token_limit=100) as (running, speaker):
        reply = await ask(running, CHAT)  # 3 and 4
        assert reply.headers["x-ratelimit-remaining-tokens"] == "93"
        speaker.pause()
        async with Stream(running, CHAT) as stream:
            await speaker.heard(2)
            speaker.step()
            assert "\r\nx-ratelimit-remaining-tokens: 90\r\n" in await stream.head()
            speaker.step(3)
            await stream.until(DONE)
        async with Stream(running, CHAT) as stream:
            await speaker.heard(3)
            speaker.step()
            assert "\r\nx-ratelimit-remaining-tokens: 83\r\n" in await stream.head()
        # One that is refused or leaves unheard costs nothing.
        speaker.refusal = es.Overloaded("full")
        reply = await running.ask("POST", CHAT, ASK[CHAT])
        assert int(reply.headers["x-ratelimit-remaining-tokens"]) >= 79


async def test_a_reply_may_go_beyond_the_limit_and_the_next_request_waits() -> None:
    async with chatting(token_limit=5) as (running, _):
        await ask(running, CHAT)
        reply = await running.ask("POST", CHAT, ASK[CHAT])
        assert (reply.status, reply.error["type"]) == (429, "tokens")


async def test_priority_and_client_are_the_embeddings_ones(tmp_path: Any) -> None:
    async with chatting() as (running, speaker):
        await ask(running, CHAT)
        await ask(running, CHAT, priority="high")
        body = ASK[CHAT] | {"priority": "high"}
        await running.ask("POST", CHAT, body, x_priority="low")
        assert [one.priority for one in speaker.generations] == [1, 0, 2]
        assert {one.client for one in speaker.generations} == {"127.0.0.1"}


async def test_the_log_line_has_tokens_and_times_of_whole_and_streamed_replies() -> (
    None
):
    async with chatting() as (running, _):
        await ask(running, CHAT)
        await streamed(running, COMPLETIONS, prompt=["a", "b c"])
        lines = [
            line for line in running.log.getvalue().splitlines() if " request " in line
        ]
    for line, tokens, count, inputs in zip(lines, (7, 8), (4, 5), (1, 2), strict=True):
        assert f" tokens={tokens} reply_tokens={count} " in line
        assert f" model=fake inputs={inputs} " in line
        for name in ("queue_ms", "prefill_ms", "decode_ms"):
            assert f" {name}=" in line


async def test_metrics_count_requests_and_tokens_by_model() -> None:
    async with chatting() as (running, _):
        await ask(running, CHAT)
        await streamed(running, CHAT, n=2)
        telemetry = running.service.telemetry
        for name, value in (("requests", 2), ("inputs", 2), ("tokens", 7 + 11)):
            found = telemetry.value(f"embellama_model_{name}_total", "fake@1")
            assert found == value, name


# --- openai's own client ---


@contextlib.asynccontextmanager
async def client(running: RunningService) -> AsyncIterator[openai.AsyncOpenAI]:
    """openai-python, which asks this server."""
    url = f"http://{running.host}:{running.port}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0) as made:
        yield made


MESSAGES: Any = HELLO


async def test_openai_chats() -> None:
    async with chatting() as (running, _), client(running) as asking:
        reply = await asking.chat.completions.create(
            model="fake", messages=MESSAGES, logprobs=True, top_logprobs=3, n=2
        )
        assert [one.message.content for one in reply.choices] == ["hello my friend"] * 2
        assert reply.usage is not None
        assert reply.usage.total_tokens == 3 + 8
        assert reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens_details.cached_tokens == 0
        text = await asking.completions.create(model="fake", prompt="a b", stop=["x"])
        assert text.choices[0].text == "a b"


async def test_openai_streams_and_its_helper_puts_the_parts_together() -> None:
    async with chatting() as (running, _), client(running) as asking:
        stream = await asking.chat.completions.create(
            model="fake",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        )
        parts = [chunk async for chunk in stream]
        said = [one.choices[0].delta.content or "" for one in parts if one.choices]
        assert "".join(said) == "hello my friend"
        assert [part.usage is None for part in parts] == [True] * (len(parts) - 1) + [
            False
        ]
        async with asking.chat.completions.stream(
            model="fake", messages=MESSAGES
        ) as helped:
            events = [event.type async for event in helped]
            final = await helped.get_final_completion()
        assert final.choices[0].message.content == "hello my friend"
        assert final.choices[0].finish_reason == "stop"
        assert "content.done" in events
        texts = await asking.completions.create(model="fake", prompt="a b", stream=True)
        assert "".join([one.choices[0].text async for one in texts]) == "a b"


async def test_openai_raises_its_errors_before_and_within_a_stream() -> None:
    async with chatting() as (running, speaker), client(running) as asking:
        ask_for = asking.chat.completions.create
        with pytest.raises(openai.BadRequestError) as bad:
            await ask_for(model="fake", messages=MESSAGES, n=9)
        assert (bad.value.code, bad.value.param) == ("invalid_value", "n")
        with pytest.raises(openai.NotFoundError):
            await ask_for(model="gpt-9", messages=MESSAGES)
        speaker.refusal = es.Overloaded("full")
        with pytest.raises(openai.InternalServerError):
            await ask_for(model="fake", messages=MESSAGES, stream=True)
        speaker.refusal = None
        speaker.pause()
        task = asyncio.create_task(
            ask_for(model="fake", messages=MESSAGES, stream=True)
        )
        await speaker.heard()
        speaker.step()
        stream = await task
        said: list[str | None] = []
        with pytest.raises(openai.APIError) as broken:
            async for chunk in stream:
                said.append(chunk.choices[0].delta.content)
                speaker.fail(es.EngineFailed("NaN"))
        assert said == ["", "hello"]
        assert broken.value.code == "engine_failed"
        assert broken.value.message == "NaN"


async def test_openai_closes_a_stream_and_the_work_ends() -> None:
    async with chatting() as (running, speaker), client(running) as asking:
        speaker.pause()
        asked = asking.chat.completions.create(
            model="fake", messages=MESSAGES, stream=True
        )
        task = asyncio.create_task(asked)
        await speaker.heard()
        speaker.step()
        await (await task).close()
        await idle(speaker)
        assert len(speaker.cancelled) == 1


async def test_openai_tries_again_after_a_503() -> None:
    async with chatting() as (running, speaker), client(running) as asking:
        speaker.refusal = es.Overloaded("full", retry_after_s=1.0)
        patient = asking.with_options(max_retries=2)
        task = asyncio.create_task(
            patient.chat.completions.create(model="fake", messages=MESSAGES)
        )
        telemetry = running.service.telemetry
        async with asyncio.timeout(kit.DEADLINE_S):
            while not telemetry.value("embellama_errors_total", "overloaded"):
                await asyncio.sleep(0)
        speaker.refusal = None
        assert (await task).choices[0].message.content == "hello my friend"


# --- a real model, if a tiny one ---


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[both.Client]:
    """Of the program with a tiny llama."""
    path = chat_models.tiny_llama(tmp_path_factory.mktemp("models"))
    program = (str(kit.ROOT / "embellama_server.py"),)
    flags = ("--model-path", f"tiny={path}", "--max-tokens", "12")
    with kit.started(*flags, module=program) as server:
        client = both.Client(server.url)
        yield client
        client.close()


def asked_of(client: both.Client, path: str, **body: Any) -> Any:
    """The JSON of a whole reply."""
    reply = client.post(path, ASK[path] | body)
    assert reply.status == 200, reply.body
    return reply.json


GREEDY = {"temperature": 0}


def test_a_real_model_says_the_same_whole_and_streamed(real: both.Client) -> None:
    for path, body in ASK.items():
        whole = asked_of(real, path, **GREEDY, max_tokens=20)["choices"][0]
        said = whole["text"] if path == COMPLETIONS else whole["message"]["content"]
        reply = real.post(path, body | GREEDY | {"stream": True, "max_tokens": 20})
        texts = [
            one["choices"][0].get("text", "")
            or one["choices"][0].get("delta", {}).get("content", "")
            for one in chunks(reply.body)
        ]
        assert "".join(texts) == said != ""


def test_a_real_model_s_prompt_is_rendered_by_its_own_template(
    real: both.Client,
) -> None:
    prompt = "<s><|user|>\nhello my friend</s>\n<|assistant|>\n"
    wanted = asked_of(real, COMPLETIONS, prompt=prompt, max_tokens=8, **GREEDY)
    found = asked_of(real, CHAT, max_tokens=8, **GREEDY)
    for field in ("prompt_tokens", "completion_tokens"):
        assert found["usage"][field] == wanted["usage"][field]
    said = found["choices"][0]["message"]["content"]
    assert said == wanted["choices"][0]["text"]


def test_a_real_model_keeps_to_the_limits_and_biases_of_a_request(
    real: both.Client,
) -> None:
    found = asked_of(real, CHAT, n=3, seed=5)
    assert found["usage"]["completion_tokens"] == 3 * 12
    assert {one["finish_reason"] for one in found["choices"]} == {"length"}
    texts = [one["message"]["content"] for one in found["choices"]]
    assert len({*texts}) == 3
    greedy = asked_of(real, CHAT, logprobs=True, top_logprobs=1, **GREEDY)
    tokens = greedy["choices"][0]["logprobs"]["content"]
    assert [one["top_logprobs"][0]["token"] for one in tokens] == [
        one["token"] for one in tokens
    ]
    whole = greedy["choices"][0]["message"]["content"]
    stop = whole[5:8]
    cut = asked_of(real, CHAT, stop=[stop, "never"], **GREEDY)["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"
    ended = asked_of(real, CHAT, logit_bias={"2": 100})  # </s>
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert ended["choices"][0]["message"]["content"] == ""
    assert ended["usage"]["completion_tokens"] == 1


def test_a_real_model_s_prompt_is_found_in_memory_unless_told_otherwise(
    real: both.Client,
) -> None:
    said = [{"role": "user", "content": "who was there before " * 20}]
    tokens = asked_of(real, CHAT, messages=said, max_tokens=1)["usage"]["prompt_tokens"]

    def cached(**body: Any) -> int:
        usage = asked_of(real, CHAT, messages=said, max_tokens=1, **body)["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached() == tokens - 1
    assert cached(cache_prompt=False) == cached(deterministic=True) == 0


def test_a_real_model_scores_a_prompt(real: both.Client) -> None:
    body = {"prompt": "the time was", "echo": True, "logprobs": 2, "max_tokens": 0}
    (choice,) = asked_of(real, COMPLETIONS, **body)["choices"]
    assert choice["text"] == "the time was"
    found = choice["logprobs"]
    assert found["tokens"] == ["", " the", " time", " was"]
    assert found["text_offset"] == [0, 0, 3, 8]
    assert found["token_logprobs"][0] is None
    assert all(-100 < value < 0 for value in found["token_logprobs"][1:])
    assert [len(top or ()) for top in found["top_logprobs"]] == [0, 2, 2, 2]


@pytest.mark.parametrize(
    "prompt", ["the <|eot_id|>time </s> was", "<s>the time", "\nthe time", "<s>\nthe"]
)
def test_a_prompt_s_control_tokens_are_where_they_are_written(
    real: both.Client, prompt: str
) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 3}
    (choice,) = asked_of(real, COMPLETIONS, **body)["choices"]
    found = choice["logprobs"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        place = choice["text"][offset:]
        # SentencePiece puts a space after them.
        assert place.startswith((token, token.removeprefix(" ")))
    assert len(prompt) in found["text_offset"]


@pytest.mark.parametrize(
    ("tokens", "prompt", "places"),
    [
        (["", " the", " time"], "the time", [0, 0, 3]),
        (["<u>", "\n", "hi", "<e>"], "<u>\nhi<e>", [0, 3, 4, 6]),
        (["<u>", " hi", "<e>", " ho"], "<u>hi<e>ho", [0, 3, 5, 8]),
        (["<u>", "hi", "<e>", "<a>"], "<u>\nhi<e>\n<a>", [0, 4, 6, 10]),
        (["<u>", " hi", "<a>"], "<u> \n hi <a>", [0, 5, 9]),
        ([b"\xf0\x9f", b"\x99\x82", "é", "!"], "🙂é!", [0, 0, 1, 2]),
        ([b"\x99", b"\x82", "é", " a"], "\ufffd\ufffdé a", [0, 1, 2, 3]),
        ([" é", b"\x82", " a"], "é\ufffd a", [0, 1, 2]),
        (["", " ", "\n", "t", " a"], "\nt a", [0, 0, 0, 1, 2]),
        (["", "   ", "\n", "t"], "  \nt", [0, 0, 2, 3]),
        (["a", "other", "b"], "a b", [0, 1, 3]),  # of another text: none of ours
    ],
)
def test_tokens_are_found_where_they_were_read(
    tokens: list[str | bytes], prompt: str, places: list[int]
) -> None:
    texts = [one if isinstance(one, bytes) else one.encode() for one in tokens]
    assert es.text_offsets(texts, prompt) == places


def test_how_long_it_takes_to_find_tokens_grows_with_their_number() -> None:
    def find(size: int) -> None:  # of a text that is none of theirs
        es.text_offsets([b"x"] * size, " " * 100 * size)

    kit.assert_linear(find, 4000)


def test_of_two_tokens_with_one_text_the_likelier_is_told() -> None:
    top = ((b"4", -0.1), (b"5", -2.0), (b"4", -6.0))
    assert es._by_text(top) == {"4": -0.1, "5": -2.0}


def test_a_template_that_takes_no_system_gets_it_folded_in(tmp_path: Path) -> None:
    path = chat_models.tiny_gemma(tmp_path)
    said = [{"role": "system", "content": "be brief"}, *HELLO]
    program = (str(kit.ROOT / "embellama_server.py"),)
    with kit.started("--model-path", str(path), module=program) as server:
        client = both.Client(server.url)
        body = {"messages": said, "max_tokens": 1}
        assert client.post(CHAT, body).status == 200
        assert " folded=True " in server.wait_for_log(" request ")
        client.close()


def test_a_template_of_one_s_own_replaces_the_file_s(tmp_path: Path) -> None:
    path = chat_models.tiny_llama(tmp_path, template="")
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    program = (str(kit.ROOT / "embellama_server.py"),)
    flags = ("--model-path", str(path), "--chat-template", str(template))
    with kit.started(*flags, module=program) as server:
        client = both.Client(server.url)
        chat = asked_of(client, CHAT, max_tokens=1)
        text = asked_of(client, COMPLETIONS, max_tokens=1)
        assert chat["usage"]["prompt_tokens"] == text["usage"]["prompt_tokens"]
        client.close()
