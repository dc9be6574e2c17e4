"""Clients of Ollama, written by others, chat with the real program.

As test_outside_chat.py: ``python -m tests clients`` runs it. The model is tiny, and says
what it is told to: see scripted.py.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

from tests import chat_models, kit, scripted
from tests.scripted import saying
from tests.test_outside_clients import node_printed, printed

ollama = pytest.importorskip("ollama", reason="in the extra clients")
pytestmark = [pytest.mark.clients, pytest.mark.slow]

HELLO = "Well, hello there."
CALLED = json.dumps({"name": "weather", "arguments": {"city": "Ulm"}})
ASKS_HELLO = saying(HELLO)
ASKS_THOUGHT = saying(f"<think>\nGreet.\n</think>\n\n{HELLO}")
ASKS_WEATHER = saying(f"<think>\nAsk.\n</think>\n\n<tool_call>\n{CALLED}\n</tool_call>")
ANSWER = "It rains in Ulm."
PERSON = {"name": "Ann", "age": 33}
ASKS_PERSON = saying(json.dumps(PERSON))
TOO_LONG = "word " * 9000


class Person(pydantic.BaseModel):
    """Whom a reply describes."""

    name: str
    age: int


def weather(city: str) -> str:
    """Tell the weather.

    Args:
        city: Whose weather.
    """
    return saying(f"It rains in {city}.")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kit.Server]:
    """The program, with such a model."""
    path = chat_models.tiny_qwen(tmp_path_factory.mktemp("models"), context=8192)
    flags = ("--model-path", f"tiny={path}", "--context-size", "8192")
    with kit.started(*flags, module=scripted.MODULE) as running:
        yield running


def user(content: str) -> Any:
    """Messages of one user."""
    return [{"role": "user", "content": content}]


# ollama-python


@pytest.fixture
def client(server: kit.Server) -> Iterator[Any]:
    """A client."""
    with ollama.Client(host=server.url) as made:
        yield made


def test_ollama_chats_and_streams(client: Any) -> None:
    asks = {"model": "tiny", "messages": user(ASKS_THOUGHT)}
    whole = client.chat(**asks, think=True)
    assert whole.message.role == "assistant"
    assert (whole.message.content, whole.message.thinking) == (HELLO, "Greet.")
    assert (whole.done, whole.done_reason, whole.model) == (True, "stop", "tiny")
    assert whole.eval_count and whole.prompt_eval_count
    for ns in (whole.total_duration, whole.eval_duration, whole.prompt_eval_duration):
        assert 0 < ns < 60e9
    parts = [*client.chat(**asks, stream=True)]
    assert "".join(part.message.content or "" for part in parts) == HELLO
    assert "".join(part.message.thinking or "" for part in parts) == "Greet."
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count == whole.eval_count
    stopped = client.chat(**asks, options={"stop": [","], "seed": 1})
    assert stopped.message.content == "Well"
    cut = client.chat(
        model="tiny:latest", messages=user(ASKS_HELLO), options={"num_predict": 2}
    )
    assert (cut.done_reason, cut.eval_count) == ("length", 2)
    likely = client.chat(
        model="tiny", messages=user(ASKS_HELLO), logprobs=True, top_logprobs=2
    )
    assert "".join(one.token for one in likely.logprobs) == HELLO
    assert all(len(one.top_logprobs) == 2 for one in likely.logprobs)


def test_ollama_chats_asynchronously_and_several_at_once(server: kit.Server) -> None:
    async def one(client: Any) -> str:
        asks = {"model": "tiny", "messages": user(ASKS_HELLO), "stream": True}
        parts = [part async for part in await client.chat(**asks)]
        return "".join(part.message.content for part in parts)

    async def all_() -> list[str]:
        async with ollama.AsyncClient(host=server.url) as client:
            return await asyncio.gather(*(one(client) for _ in range(8)))

    assert asyncio.run(all_()) == [HELLO] * 8


def test_ollama_generates(client: Any) -> None:
    for stream in (False, True):
        asks = {"model": "tiny", "prompt": ASKS_THOUGHT, "system": "Be kind."}
        reply = client.generate(**asks, stream=stream)
        parts = [*reply] if stream else [reply]
        assert "".join(part.response for part in parts) == HELLO
        assert "".join(part.thinking or "" for part in parts) == "Greet."
        assert parts[-1].done_reason == "stop"
    raw = client.generate(model="tiny", prompt=ASKS_HELLO, raw=True)
    assert raw.response == HELLO
    assert raw.prompt_eval_count < reply_tokens(client)
    for nothing in (client.generate(model="tiny"), client.chat(model="tiny")):
        assert nothing.done_reason == "load"
    assert client.generate(model="tiny", keep_alive=0).done_reason == "unload"


def reply_tokens(client: Any) -> int:
    """How many tokens the prompt has with its template."""
    return int(client.generate(model="tiny", prompt=ASKS_HELLO).prompt_eval_count)


def test_ollama_s_loop_of_calls_results_and_an_answer(client: Any) -> None:
    for stream in (False, True):
        messages = user(ASKS_WEATHER)
        reply = client.chat(
            model="tiny", messages=messages, tools=[weather], stream=stream
        )
        parts = [*reply] if stream else [reply]
        calls = [call for part in parts for call in part.message.tool_calls or ()]
        (call,) = calls
        assert (call.function.name, call.function.arguments) == (
            "weather",
            {"city": "Ulm"},
        )
        assert "".join(part.message.thinking or "" for part in parts) == "Ask."
        assert not "".join(part.message.content or "" for part in parts)
        assert parts[-1].done_reason == "stop"
        messages.append(
            ollama.Message(role="assistant", thinking="Ask.", tool_calls=calls)
        )
        result = weather(**call.function.arguments)
        messages.append({"role": "tool", "content": result, "tool_name": "weather"})
        final = client.chat(model="tiny", messages=messages, tools=[weather])
        assert final.message.content == ANSWER


def test_ollama_s_format_is_kept_to(client: Any) -> None:
    schema = Person.model_json_schema()
    for said in (ASKS_PERSON, user("Anything.")[0]["content"]):
        reply = client.chat(
            model="tiny",
            messages=user(said),
            format=schema,
            options={"num_predict": 200, "temperature": 0},
        )
        if reply.done_reason == "stop":
            Person.model_validate_json(reply.message.content)
        else:
            assert reply.message.content.startswith("{")
    assert (
        json.loads(
            client.chat(
                model="tiny", messages=user(ASKS_PERSON), format=schema
            ).message.content
        )
        == PERSON
    )
    text = client.generate(model="tiny", prompt=ASKS_PERSON, format="json").response
    assert json.loads(text) == PERSON


def test_ollama_lists_shows_and_is_told_who_makes_models(client: Any) -> None:
    (listed,) = client.list().models
    assert listed.model == "tiny:latest"
    assert listed.details.family == "qwen3"
    shown = client.show("tiny")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.modelinfo["qwen3.context_length"] == 8192
    assert "im_start" in shown.template
    assert "temperature" in shown.parameters
    (running,) = client.ps().models
    assert running.model == "tiny:latest"
    assert client.pull("tiny").status == "success"
    for change, asks in (
        (client.create, {"model": "mine", "from_": "tiny"}),
        (client.copy, {"source": "tiny", "destination": "mine"}),
        (client.push, {"model": "tiny"}),
        (client.delete, {"model": "tiny"}),
    ):
        with pytest.raises(ollama.ResponseError) as refused:
            change(**asks)
        assert "models come from this server's operator" in refused.value.error
        assert refused.value.status_code == 404


def test_ollama_raises_with_our_message(client: Any) -> None:
    chat = client.chat
    for status, part, asks in (
        (404, "model 'llama3' not found", {"model": "llama3"}),
        (400, "the prompt is too long", {"messages": user(TOO_LONG)}),
        (400, "options.num_ctx is 99999", {"options": {"num_ctx": 99999}}),
        (400, "format", {"format": {"type": "object", "patternProperties": {"a": {}}}}),
        (400, "images", {"messages": [*user("a"), {"role": "user", "images": [b"a"]}]}),
    ):
        for stream in (False, True):
            with pytest.raises(ollama.ResponseError) as refused:
                asks = {"model": "tiny", "messages": user("a"), "stream": stream} | asks
                list(chat(**asks))
            assert refused.value.status_code == status
            assert part in refused.value.error


# npm's ollama

NODE_SCRIPT = """
import { Ollama } from "ollama";
const [url, hello, thought, calls, person, schema] = process.argv.slice(2);
const client = new Ollama({ host: url });
const messages = (content) => [{ role: "user", content }];
const seen = {};
const tools = [{ type: "function", function: { name: "weather", description: "Tell it.",
  parameters: { type: "object", properties: { city: { type: "string" } } } } }];

const whole = await client.chat({ model: "tiny", messages: messages(thought), think: true });
seen.whole = [whole.message.content, whole.message.thinking, whole.done_reason];
seen.text = ""; seen.thinking = "";
for await (const part of await client.chat(
  { model: "tiny", messages: messages(thought), stream: true })) {
  seen.text += part.message.content;
  seen.thinking += part.message.thinking ?? "";
  seen.done = part.done;
  seen.eval_count = part.eval_count;
}
seen.calls = [];
for await (const part of await client.chat(
  { model: "tiny", messages: messages(calls), tools, stream: true }))
  seen.calls.push(...(part.message.tool_calls ?? []).map((call) => call.function));
const called = await client.chat({ model: "tiny", messages: messages(calls), tools });
seen.called = called.message.tool_calls.map((call) => call.function.arguments);
seen.person = JSON.parse((await client.chat({ model: "tiny", messages: messages(person),
  format: JSON.parse(schema) })).message.content);
const generated = await client.generate({ model: "tiny", prompt: hello });
seen.generated = [generated.response, generated.done_reason];
seen.listed = (await client.list()).models.map((model) => model.name);
seen.shown = (await client.show({ model: "tiny" })).capabilities;
seen.errors = [];
for (const ask of [
  () => client.chat({ model: "llama3", messages: messages("a") }),
  () => client.chat({ model: "tiny", messages: messages("a"), format: "yaml" }),
  () => client.create({ model: "mine", from: "tiny" }),
]) await ask().catch((error) => seen.errors.push([error.status_code, error.message]));
const stream = await client.generate({ model: "tiny", prompt: "on and on",
  options: { num_predict: 4000 }, stream: true });
for await (const _ of stream) { stream.abort(); break; }
console.log(JSON.stringify(seen));
"""


def test_npm_s_ollama_chats_streams_calls_and_raises_its_errors(
    server: kit.Server, tmp_path: Path
) -> None:
    schema = json.dumps(Person.model_json_schema())
    asks = (ASKS_HELLO, ASKS_THOUGHT, ASKS_WEATHER, ASKS_PERSON, schema)
    seen = node_printed(tmp_path, ["ollama@>=0.6"], NODE_SCRIPT, server.url, *asks)
    assert seen["whole"] == [HELLO, "Greet.", "stop"]
    assert (seen["text"], seen["thinking"], seen["done"]) == (HELLO, "Greet.", True)
    assert seen["eval_count"] > 3
    arguments = {"city": "Ulm"}
    assert seen["calls"] == [{"index": 0, "name": "weather", "arguments": arguments}]
    assert seen["called"] == [arguments]
    assert seen["person"] == PERSON
    assert seen["generated"] == [HELLO, "stop"]
    assert seen["listed"] == ["tiny:latest"]
    assert seen["shown"] == ["completion", "tools", "thinking"]
    unknown, unread, refused = seen["errors"]
    assert unknown[0] == 404 and "model 'llama3' not found" in unknown[1]
    assert unread[0] == 400 and "format must be" in unread[1]
    assert refused[0] == 404 and "this server's operator" in refused[1]


LANGCHAIN_JS_SCRIPT = """
import { ChatOllama } from "@langchain/ollama";
import { HumanMessage, ToolMessage } from "@langchain/core/messages";
const [url, thought, calls, person, schema, result] = process.argv.slice(2);
const model = new ChatOllama({ baseUrl: url, model: "tiny", maxRetries: 0 });
const seen = {};
seen.whole = (await model.invoke(thought)).content;
seen.streamed = "";
for await (const part of await model.stream(thought)) seen.streamed += part.content;
const tools = [{ type: "function", function: { name: "weather", description: "Tell it.",
  parameters: { type: "object", properties: { city: { type: "string" } } } } }];
const agent = model.bindTools(tools);
const messages = [new HumanMessage(calls)];
const called = await agent.invoke(messages);
seen.calls = called.tool_calls.map(({ name, args }) => [name, args]);
messages.push(called, new ToolMessage(
  { content: result, tool_call_id: called.tool_calls[0].id, name: "weather" }));
seen.answer = (await agent.invoke(messages)).content;
const typed = model.withStructuredOutput(JSON.parse(schema), { method: "jsonSchema" });
seen.person = await typed.invoke(person);
console.log(JSON.stringify(seen));
"""


def test_langchain_js_chats_streams_calls_and_reads_objects(
    server: kit.Server, tmp_path: Path
) -> None:
    schema = json.dumps(Person.model_json_schema())
    asks = (ASKS_THOUGHT, ASKS_WEATHER, ASKS_PERSON, schema, weather("Ulm"))
    packages = ["@langchain/ollama@>=1.3", "@langchain/core@>=1.1"]
    seen = node_printed(tmp_path, packages, LANGCHAIN_JS_SCRIPT, server.url, *asks)
    assert seen["whole"] == seen["streamed"] == HELLO
    assert seen["calls"] == [["weather", {"city": "Ulm"}]]
    assert seen["answer"] == ANSWER
    assert seen["person"] == PERSON


# LangChain

LANGCHAIN_SCRIPT = """
import json, sys
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM

url, hello, thought, calls, person, schema, result = sys.argv[1:]
seen = {}
model = ChatOllama(base_url=url, model="tiny", validate_model_on_init=True)
whole = model.invoke(hello)
seen["whole"] = whole.content
seen["reason"] = whole.response_metadata["done_reason"]
seen["usage"] = whole.usage_metadata["total_tokens"] > 3
seen["streamed"] = "".join(part.content for part in model.stream(hello))
thinking = ChatOllama(base_url=url, model="tiny", reasoning=True)
thinker = thinking.invoke(thought)
seen["thinking"] = [thinker.content, thinker.additional_kwargs["reasoning_content"]]

@tool
def weather(city: str) -> str:
    "Tell it."
    return result

agent = model.bind_tools([weather])
messages = [HumanMessage(calls)]
called = agent.invoke(messages)
seen["calls"] = [[one["name"], one["args"]] for one in called.tool_calls]
messages += [called, weather.invoke(called.tool_calls[0])]
seen["answer"] = agent.invoke(messages).content
seen["person"] = model.with_structured_output(json.loads(schema)).invoke(person)
seen["completed"] = OllamaLLM(base_url=url, model="tiny").invoke(hello)
print(json.dumps(seen))
"""


def test_langchain_chats_streams_calls_thinks_and_reads_objects(
    server: kit.Server,
) -> None:
    schema = json.dumps(Person.model_json_schema())
    asks = (ASKS_HELLO, ASKS_THOUGHT, ASKS_WEATHER, ASKS_PERSON, schema, weather("Ulm"))
    with tempfile.TemporaryDirectory() as folder:
        install = (sys.executable, "-m", "pip", "install", "--quiet", "--target")
        packages = ("langchain-ollama>=1.1", "langchain-core>=1.7")
        subprocess.run([*install, folder, *packages], check=True, timeout=300)
        command = (sys.executable, "-c", LANGCHAIN_SCRIPT, server.url, *asks)
        seen = printed(*command, PYTHONPATH=folder)
    assert seen["whole"] == seen["streamed"] == seen["completed"] == HELLO
    assert seen["reason"] == "stop"
    assert seen["usage"]
    assert seen["thinking"] == [HELLO, "Greet."]
    assert seen["calls"] == [["weather", {"city": "Ulm"}]]
    assert seen["answer"] == ANSWER
    assert seen["person"] == PERSON


# LiteLLM

LITELLM_SCRIPT = """
import json, sys
import litellm

url, hello, thought, calls, person, schema, result = sys.argv[1:]
told = lambda text: [{"role": "user", "content": text}]
asks = {"model": "ollama_chat/tiny", "api_base": url, "max_retries": 0}
tools = [{"type": "function", "function": {"name": "weather", "description": "Tell it.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]
seen = {}
whole = litellm.completion(**asks, messages=told(thought))
seen["whole"] = [whole.choices[0].message.content, whole.choices[0].finish_reason]
seen["thinking"] = whole.choices[0].message.reasoning_content
seen["usage"] = whole.usage.completion_tokens > 3
parts = [*litellm.completion(**asks, messages=told(hello), stream=True)]
built = litellm.stream_chunk_builder(parts, messages=told(hello))
seen["streamed"] = [built.choices[0].message.content, built.choices[0].finish_reason]
messages = told(calls)
for stream in (False, True):
    reply = litellm.completion(**asks, messages=messages, tools=tools, stream=stream)
    if stream:
        reply = litellm.stream_chunk_builder([*reply], messages=messages)
    message = reply.choices[0].message
    seen[f"calls {stream}"] = [
        [one.function.name, json.loads(one.function.arguments)]
        for one in message.tool_calls or ()]
messages += [message.model_dump(), {"role": "tool", "content": result, "name": "weather",
    "tool_call_id": message.tool_calls[0].id}]
final = litellm.completion(**asks, messages=messages, tools=tools)
seen["answer"] = final.choices[0].message.content
shape = {"type": "json_schema", "json_schema": {"schema": json.loads(schema)}}
typed = litellm.completion(**asks, messages=told(person), response_format=shape)
seen["person"] = json.loads(typed.choices[0].message.content)
try:
    litellm.completion(**asks | {"model": "ollama_chat/llama3"}, messages=told("a"))
except Exception as error:
    seen["error"] = [type(error).__name__, "not found" in str(error)]
print(json.dumps(seen))
"""


def test_litellm_chats_streams_calls_and_reads_objects(
    server: kit.Server, litellm: dict[str, str]
) -> None:
    schema = json.dumps(Person.model_json_schema())
    asks = (ASKS_HELLO, ASKS_THOUGHT, ASKS_WEATHER, ASKS_PERSON, schema, weather("Ulm"))
    command = (sys.executable, "-c", LITELLM_SCRIPT, server.url, *asks)
    seen = printed(*command, **litellm, OLLAMA_API_BASE=server.url)
    assert seen["whole"] == seen["streamed"] == [HELLO, "stop"]
    assert seen["thinking"] == "Greet."
    assert seen["usage"]
    assert seen["calls False"] == seen["calls True"] == [["weather", {"city": "Ulm"}]]
    assert seen["answer"] == ANSWER
    assert seen["person"] == PERSON
    assert seen["error"] == ["NotFoundError", True]
