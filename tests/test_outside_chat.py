"""Clients written by others chat with the real program and a tiny model that generates.

As test_outside_clients.py: ``python -m tests clients`` runs it. What each client makes of
a reply is compared with the reply as it is without anybody's client.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import openai
import pytest

from tests import chat_models, kit
from tests.test_outside_clients import SCRIPT, asked, node_printed, printed

pytestmark = [pytest.mark.clients, pytest.mark.slow]

HELLO = "hello my friend"
MESSAGES: Any = [{"role": "user", "content": HELLO}]
TOKENS = 12  # of a reply, unless it is to go on for long
LONG = 1900  # tokens of a reply that nobody waits for
TOO_LONG = "word " * 3000
LEFT = "status=499"  # in the log: the client has left
ALL_RUNNING = 'embellama_sequences{state="running"} 4'
QUEUE_OF_ONE = ("--parallel", "1", "--queue-size", "1", "--max-client-batch-size", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model that generates, as a value of --model-path."""
    return f"tiny={chat_models.tiny_qwen(tmp_path_factory.mktemp('models'))}"


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[kit.Server]:
    """The program, with that model, and room for four long replies."""
    flags = ("--model-path", model, "--context-size", "8192")
    with kit.started(*flags, module=(SCRIPT,)) as running:
        yield running


@pytest.fixture(scope="module")
def said(server: kit.Server) -> str:
    """The likeliest reply to HELLO, without anybody's client."""
    asks = {"messages": MESSAGES, "temperature": 0, "max_tokens": TOKENS}
    reply = asked(f"{server.url}/v1/chat/completions", **asks)
    text: str = reply["choices"][0]["message"]["content"]
    assert text.count(" ") > 1
    return text


@pytest.fixture(scope="module")
def stop(said: str) -> str:
    """A part of that reply, by which it may be ended."""
    return said[4:6]


def before(said: str, stop: str) -> str:
    """What is left of a reply that ends before ``stop``."""
    return said.partition(stop)[0]


class Leavers:
    """Counts those that have left, as the server sees it."""

    def __init__(self, server: kit.Server) -> None:
        self._server = server
        self._before = self._count()

    def wait(self, count: int = 1, *, tokens: int = LONG) -> None:
        """Return once so many more have left, before they had ``tokens``."""
        self._server.wait_for_log(LEFT, self._before + count)
        lines = [line for line in self._server.log if LEFT in line]
        for line in lines[self._before :]:
            assert int(line.partition(" reply_tokens=")[2].split()[0]) < tokens

    def _count(self) -> int:
        return sum(LEFT in line for line in self._server.log)


# openai-python


def test_openai_chats_streams_stops_and_shows_logprobs(
    server: kit.Server, said: str, stop: str
) -> None:
    asks: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0}
    asks |= {"max_tokens": TOKENS}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
        chat = client.chat.completions
        whole = chat.create(**asks, logprobs=True, top_logprobs=2)
        openai.types.chat.ChatCompletion.model_validate(whole.model_dump(), strict=True)
        (choice,) = whole.choices
        assert (choice.message.content, choice.finish_reason) == (said, "length")
        assert choice.logprobs is not None and choice.logprobs.content is not None
        raw = [bytes(one.bytes or ()) for one in choice.logprobs.content]
        assert b"".join(raw).decode("utf-8", "replace") == said
        assert whole.usage is not None
        assert whole.usage.completion_tokens == len(raw) == TOKENS
        stopped = chat.create(**asks, stop=[stop]).choices[0]
        assert stopped.message.content == before(said, stop)
        assert stopped.finish_reason == "stop"
        # A reply that ends at max_tokens makes its helper raise: by design, of its own.
        counted = asks | {"stop": [stop], "stream_options": {"include_usage": True}}
        with chat.stream(**counted) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
        assert kinds.count("content.done") == 1
        assert final.choices[0].message.content == before(said, stop)
        assert final.usage is not None
        assert final.usage.prompt_tokens == whole.usage.prompt_tokens
        with pytest.raises(openai.LengthFinishReasonError), chat.stream(**asks) as cut:
            cut.until_done()
            cut.get_final_completion()
        with chat.with_streaming_response.create(**asks, stream=True) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            *_, last = filter(None, response.iter_lines())
        assert last == "data: [DONE]"


def test_openai_leaves_a_stream_and_a_reply_and_the_server_notices(
    server: kit.Server,
) -> None:
    asks: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": LONG}
    leavers = Leavers(server)
    base = {"base_url": f"{server.url}/v1", "api_key": "any"}
    with openai.OpenAI(**base, max_retries=0) as client:  # type: ignore[arg-type]
        with client.chat.completions.create(**asks, stream=True) as stream:
            next(stream)
        leavers.wait()

    # It closes, as who sends no more does as well: that is noticed after HALF_CLOSED_S, by
    # when one reply without log probabilities is done.
    asks |= {"n": 4, "logprobs": True, "top_logprobs": 20}

    async def leave() -> None:
        async with openai.AsyncOpenAI(**base, max_retries=0) as client:  # type: ignore[arg-type]
            task = asyncio.create_task(client.chat.completions.create(**asks))
            async with asyncio.timeout(kit.DEADLINE_S):
                while ALL_RUNNING not in await asyncio.to_thread(metrics, server):
                    assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(leave())
    leavers.wait(2, tokens=4 * LONG)


def metrics(server: kit.Server) -> str:
    """What the server tells Prometheus."""
    with urlopen(f"{server.url}/metrics", timeout=kit.DEADLINE_S) as reply:
        return str(reply.read(), "utf-8")


def test_openai_tries_again_after_a_503_and_is_answered(model: str) -> None:
    flags = ("--model-path", model, *QUEUE_OF_ONE)
    asks: Any = {"model": "tiny", "messages": MESSAGES}
    waits: list[str | None] = []

    async def ask(url: str) -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
            chat = client.chat.completions
            running = await chat.create(**asks, max_tokens=LONG, stream=True)

            async def note(response: Any) -> None:
                waits.append(response.headers.get("retry-after"))
                await running.close()  # and so there is room

            client._client.event_hooks["response"].append(note)
            reply = await chat.create(**asks, max_tokens=TOKENS)
            assert reply.usage is not None
            assert 0 < reply.usage.completion_tokens <= TOKENS

    with kit.started(*flags, module=(SCRIPT,)) as server:
        asyncio.run(ask(server.url))
    refused, answered = waits
    assert 1 <= int(refused or 0) <= 60
    assert answered is None


# npm

NODE_SCRIPT = """
import OpenAI from "openai";
import { ChatOpenAI } from "@langchain/openai";
import { generateText, streamText } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
const [baseURL, content, stop, tooLong, tokens, long] = process.argv.slice(2);
const maxTokens = Number(tokens), longest = Number(long);
const messages = [{ role: "user", content }];
const seen = { openai: {}, langchain: {}, vercel: {} };
const raised = (error) => ({ kind: error.constructor.name, name: error.name,
  status: error.status ?? error.statusCode, code: error.code, param: error.param });

{
  const own = seen.openai;
  const chat = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 }).chat.completions;
  const asks = { model: "tiny", messages, temperature: 0, max_tokens: maxTokens };
  own.whole = await chat.create({ ...asks, logprobs: true, top_logprobs: 2 });
  own.stopped = (await chat.create({ ...asks, stop })).choices[0];
  const helped = chat.stream({ ...asks, stream_options: { include_usage: true } });
  own.final = (await helped.finalChatCompletion()).choices[0];
  own.usage = await helped.totalUsage();
  own.errors = {};
  for (const [name, more] of Object.entries({
    unknown: { model: "gpt-9" }, many: { n: 99, stream: true },
    long: { messages: [{ role: "user", content: tooLong }] },
  })) {
    await chat.create({ ...asks, ...more })
      .catch((error) => { own.errors[name] = raised(error); });
  }
  const left = await chat.create({ ...asks, max_tokens: longest, stream: true });
  for await (const _ of left) left.controller.abort();
}
{
  const own = seen.langchain;
  const asks = { model: "tiny", temperature: 0, apiKey: "any", maxTokens,
    maxRetries: 0, configuration: { baseURL } };
  const chat = new ChatOpenAI(asks);
  const whole = await chat.invoke(content);
  own.whole = [whole.content, whole.usage_metadata.total_tokens];
  let all;
  for await (const part of await chat.stream(content)) all = all?.concat(part) ?? part;
  own.streamed = [all.content, all.usage_metadata.total_tokens];
  own.stopped = (await chat.invoke(content, { stop: [stop] })).content;
  await chat.invoke(tooLong).catch((error) => { own.long = raised(error); });
  const leaves = new AbortController();
  const patient = new ChatOpenAI({ ...asks, maxTokens: longest });
  try {
    for await (const _ of await patient.stream(content, { signal: leaves.signal }))
      leaves.abort();
  } catch (error) { own.left = raised(error); }
}
{
  const own = seen.vercel;
  const provider = createOpenAICompatible(
    { name: "ours", baseURL, apiKey: "any", includeUsage: true });
  const asks = { model: provider.chatModel("tiny"), prompt: content, temperature: 0,
    maxOutputTokens: maxTokens, maxRetries: 0 };
  const whole = await generateText(asks);
  own.whole = [whole.text, whole.usage.totalTokens, whole.finishReason];
  const stream = streamText(asks);
  let text = "";
  for await (const part of stream.textStream) text += part;
  own.streamed = [text, (await stream.usage).totalTokens, await stream.finishReason];
  own.stopped = (await generateText({ ...asks, stopSequences: [stop] })).text;
  await generateText({ ...asks, model: provider.chatModel("gpt-9") })
    .catch((error) => { own.unknown = raised(error); });
  const leaves = new AbortController();
  const left = streamText(
    { ...asks, maxOutputTokens: longest, abortSignal: leaves.signal });
  for await (const _ of left.textStream) leaves.abort();
}
console.log(JSON.stringify(seen));
"""
PACKAGES = ["openai@>=6", "@langchain/openai", "@langchain/core", "ai@>=5"]
PACKAGES += ["@ai-sdk/openai-compatible"]


@pytest.fixture(scope="module")
def npm_saw(
    server: kit.Server, stop: str, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """What the packages of npm were answered; each has left once, too."""
    leavers = Leavers(server)
    asks = (f"{server.url}/v1", HELLO, stop, TOO_LONG, str(TOKENS), str(LONG))
    folder: Path = tmp_path_factory.mktemp("npm")
    seen = node_printed(folder, PACKAGES, NODE_SCRIPT, *asks)
    leavers.wait(3)
    return seen


def test_npm_s_openai_chats_streams_stops_and_raises_its_own_errors(
    npm_saw: Any, said: str, stop: str
) -> None:
    seen = npm_saw["openai"]
    whole, stopped = seen["whole"]["choices"][0], seen["stopped"]
    assert whole["message"]["content"] == seen["final"]["message"]["content"] == said
    assert whole["finish_reason"] == seen["final"]["finish_reason"] == "length"
    assert len(whole["logprobs"]["content"]) == TOKENS
    assert stopped["message"]["content"] == before(said, stop)
    assert stopped["finish_reason"] == "stop"
    assert seen["usage"]["completion_tokens"] == TOKENS
    errors = seen["errors"]
    assert errors["unknown"]["kind"] == "NotFoundError"
    assert errors["unknown"]["code"] == "model_not_found"
    assert (errors["many"]["kind"], errors["many"]["param"]) == ("BadRequestError", "n")
    assert errors["long"]["code"] == "context_length_exceeded"


def test_langchain_js_chats_streams_stops_and_knows_a_prompt_that_is_too_long(
    npm_saw: Any, said: str, stop: str
) -> None:
    seen = npm_saw["langchain"]
    assert seen["whole"] == seen["streamed"] == [said, seen["whole"][1]]
    assert seen["stopped"] == before(said, stop)
    assert seen["long"]["name"] == "ContextOverflowError"
    assert seen["left"]


def test_vercel_s_sdk_generates_and_streams_text(
    npm_saw: Any, said: str, stop: str
) -> None:
    seen = npm_saw["vercel"]
    assert seen["whole"] == seen["streamed"] == [said, seen["whole"][1], "length"]
    assert seen["stopped"] == before(said, stop)
    assert seen["unknown"]["status"] == 404


# Frameworks


def test_langchain_chats_streams_stops_and_knows_a_prompt_that_is_too_long(
    server: kit.Server, said: str, stop: str
) -> None:
    from langchain_core.exceptions import ContextOverflowError, ModelNotFoundError
    from langchain_openai import ChatOpenAI

    def made(**more: Any) -> Any:
        asks = {"model": "tiny", "temperature": 0, "max_tokens": TOKENS} | more
        return ChatOpenAI(
            base_url=f"{server.url}/v1", api_key="any", max_retries=0, **asks
        )

    chat = made(logprobs=True, top_logprobs=2)
    whole = chat.invoke(HELLO)
    assert whole.content == said
    assert len(whole.response_metadata["logprobs"]["content"]) == TOKENS
    first, *others = made(stream_usage=True).stream(HELLO)
    for part in others:
        first += part
    assert first.content == said
    assert first.usage_metadata["total_tokens"] == whole.usage_metadata["total_tokens"]
    assert first.response_metadata["finish_reason"] == "length"
    assert chat.invoke(HELLO, stop=[stop]).content == before(said, stop)
    with pytest.raises(ContextOverflowError):
        chat.invoke(TOO_LONG)
    with pytest.raises(ModelNotFoundError):
        made(model="gpt-9").invoke(HELLO)
    leavers = Leavers(server)
    stream = made(max_tokens=LONG).stream(HELLO)
    next(stream)
    stream.close()
    leavers.wait()


def test_haystack_chats_and_streams(
    server: kit.Server, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.utils import Secret

    def reply(**more: Any) -> Any:
        generator = OpenAIChatGenerator(
            api_key=Secret.from_token("any"),
            model="tiny",
            api_base_url=f"{server.url}/v1",
            generation_kwargs={"temperature": 0, "max_completion_tokens": TOKENS},
            **more,
        )
        return generator.run([ChatMessage.from_user(HELLO)])["replies"][0]

    parts: list[Any] = []
    whole, streamed = reply(), reply(streaming_callback=parts.append)
    assert whole.text == streamed.text == "".join(one.content for one in parts) == said
    assert whole.meta["usage"]["completion_tokens"] == TOKENS
    assert streamed.meta["finish_reason"] == "length"


def test_llama_index_chats_completes_streams_and_stops(
    server: kit.Server, said: str, stop: str
) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    def made(**more: Any) -> Any:
        asks = {"model": "tiny", "temperature": 0, "max_tokens": TOKENS} | more
        base = {"api_base": f"{server.url}/v1", "api_key": "any", "max_retries": 0}
        return OpenAILike(**base, **({"is_chat_model": True} | asks))

    chat, messages = made(), [ChatMessage(role="user", content=HELLO)]
    whole = chat.chat(messages)
    assert whole.message.content == said
    assert whole.raw.usage.completion_tokens == TOKENS
    usage = {"stream_options": {"include_usage": True}}
    *_, last = chat.stream_chat(messages, **usage)
    assert last.message.content == said
    assert last.raw.usage.total_tokens == whole.raw.usage.total_tokens
    stopped = chat.chat(messages, stop=[stop])
    assert stopped.message.content == before(said, stop)
    asks = {"prompt": HELLO, "temperature": 0, "max_tokens": TOKENS}
    text = asked(f"{server.url}/v1/completions", **asks)["choices"][0]["text"]
    complete = made(is_chat_model=False)
    assert complete.complete(HELLO).text == text
    *_, last = complete.stream_complete(HELLO)
    assert last.text == text
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        chat.chat([ChatMessage(role="user", content=TOO_LONG)])
    with pytest.raises(openai.NotFoundError):
        made(model="gpt-9").chat(messages)


def test_huggingface_hub_chats_and_streams_without_a_model_s_name(
    server: kit.Server, said: str, stop: str
) -> None:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import BadRequestError

    asks: Any = {"messages": MESSAGES, "temperature": 0, "max_tokens": TOKENS}
    with InferenceClient(base_url=server.url) as client:
        whole = client.chat_completion(**asks, logprobs=True)
        assert whole.choices[0].message.content == said
        assert whole.usage.completion_tokens == TOKENS
        stopped = client.chat_completion(**asks, stop=[stop])
        assert stopped.choices[0].message.content == before(said, stop)
        parts = client.chat_completion(**asks, stream=True)
        assert "".join(one.choices[0].delta.content or "" for one in parts) == said
        with pytest.raises(BadRequestError):
            client.chat_completion(**asks, n=99)


# LiteLLM

LITELLM_SCRIPT = """
import asyncio, json, sys
import litellm

url, hello, stop, too_long, tokens, long = sys.argv[1:]
told = lambda text: [{"role": "user", "content": text}]
asks = {"messages": told(hello), "api_base": url, "api_key": "any", "temperature": 0}
asks |= {"max_tokens": int(tokens), "max_retries": 0}
seen = {}

async def leave(model):
    stream = await litellm.acompletion(
        **asks | {"model": model, "max_tokens": int(long), "stream": True})
    await anext(stream)
    await stream.aclose()

for name in ("hosted_vllm", "openai"):
    own = seen[name] = {}
    asks["model"] = f"{name}/tiny"
    whole = litellm.completion(**asks, logprobs=True, top_logprobs=2)
    own["whole"] = [whole.choices[0].message.content, whole.choices[0].finish_reason]
    own["logprobs"] = len(whole.choices[0].logprobs.content)
    parts = [*litellm.completion(
        **asks, stream=True, stream_options={"include_usage": True})]
    built = litellm.stream_chunk_builder(parts, messages=asks["messages"])
    own["streamed"] = [built.choices[0].message.content, built.choices[0].finish_reason]
    own["tokens"] = [whole.usage.total_tokens, built.usage.total_tokens]
    own["stopped"] = litellm.completion(**asks, stop=[stop]).choices[0].message.content
    own["errors"] = {}
    for wrong in ({"model": f"{name}/gpt-9"}, {"messages": told(too_long)}, {"n": 99}):
        try:
            litellm.completion(**asks | wrong)
        except Exception as error:
            own["errors"][[*wrong][0]] = type(error).__name__
    asyncio.run(leave(f"{name}/tiny"))
print(json.dumps(seen))
"""


def test_litellm_chats_streams_stops_and_raises_its_own_errors(
    server: kit.Server, said: str, stop: str, litellm: dict[str, str]
) -> None:
    leavers = Leavers(server)
    asks = (f"{server.url}/v1", HELLO, stop, TOO_LONG, str(TOKENS), str(LONG))
    seen = printed(*(sys.executable, "-c", LITELLM_SCRIPT, *asks), **litellm)
    leavers.wait(2)
    assert seen.keys() == {"hosted_vllm", "openai"}
    for own in seen.values():
        assert own["whole"] == own["streamed"] == [said, "length"]
        assert own["logprobs"] == TOKENS
        assert own["tokens"][0] == own["tokens"][1] > TOKENS
        assert own["stopped"] == before(said, stop)
        assert own["errors"] == {
            "model": "NotFoundError",
            "messages": "ContextWindowExceededError",
            "n": "BadRequestError",
        }
