"""Agents and structured output of clients written by others, over the real program.

As test_outside_chat.py: ``python -m tests clients`` runs it. The model is tiny, and says
what it is told to: see scripted.py.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests import chat_models, kit, scripted
from tests.scripted import saying
from tests.test_outside_clients import node_printed, printed

pytestmark = [pytest.mark.clients, pytest.mark.slow]

CITIES = ("Ulm", "Bonn")
WEATHER: Any = {"city": "Ulm"}
CITY = {"type": "string", "enum": [*CITIES]}
PARAMETERS = {
    "type": "object",
    "properties": {"city": CITY},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
]
PERSON: Any = {"name": "Ann", "age": 33}


def called(name: str, /, **arguments: object) -> str:
    """A call as Qwen writes it."""
    said = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{said}\n</tool_call>"


# What a user says: the model is to think, and then call two tools at once.
ASKS_BOTH = saying(
    "<think>Two of them.</think>"
    + called("weather", city="Ulm")
    + "\n"
    # By then it has no result yet.
    + called("population", city="Bonn")
)
ASKS_WEATHER = saying(called("weather", **WEATHER))
RESULT = saying("It rains in Ulm.")  # of a tool, and what the model makes of it
ANSWER = "It rains in Ulm."
ASKS_PERSON = saying(json.dumps(PERSON))


class Person(pydantic.BaseModel):
    """Whom a reply describes."""

    name: str = pydantic.Field(max_length=20)
    age: int = pydantic.Field(ge=0, le=150)


class Weather(pydantic.BaseModel):
    """Weather of a city."""

    city: Literal["Ulm", "Bonn"]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the program, with such a model."""
    path = chat_models.tiny_qwen(tmp_path_factory.mktemp("models"), context=8192)
    flags = ("--model-path", f"tiny={path}", "--context-size", "8192")
    with kit.started(*flags, module=scripted.MODULE) as running:
        yield f"{running.url}/v1"


@pytest.fixture(scope="module")
def apart() -> Iterator[dict[str, str]]:
    """The environment of scripts that need a newer openai than LlamaIndex takes."""
    with tempfile.TemporaryDirectory() as folder:
        install = (sys.executable, "-m", "pip", "install", "--quiet", "--target")
        packages = ("openai>=3.31", "pydantic-ai-slim[openai]>=2.60", "openai-agents")
        subprocess.run([*install, folder, *packages], check=True, timeout=300)
        yield {"PYTHONPATH": folder}


def user(content: str) -> Any:
    """Messages of one user."""
    return [{"role": "user", "content": content}]


# openai-python


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    """A client that does not retry."""
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as made:
        yield made


def test_openai_s_loop_of_calls_results_and_an_answer(client: openai.OpenAI) -> None:
    messages = user(ASKS_BOTH)
    tools = [*TOOLS, openai.pydantic_function_tool(Weather, name="population")]
    create = client.chat.completions.create
    reply = create(model="tiny", messages=messages, tools=tools)
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    extra = choice.message.model_extra or {}
    assert extra["reasoning_content"] == "Two of them."
    usage = reply.usage
    assert usage is not None and usage.completion_tokens_details is not None
    assert 0 < (usage.completion_tokens_details.reasoning_tokens or 0)
    calls: Any = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["weather", "population"]
    assert [json.loads(call.function.arguments)["city"] for call in calls] == [*CITIES]
    assert len({call.id for call in calls}) == 2
    messages.append(choice.message)
    for call in calls:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": RESULT})
    final = create(model="tiny", messages=messages, tools=tools)
    assert final.choices[0].message.content == ANSWER
    assert final.choices[0].finish_reason == "stop"


def test_openai_s_stream_helper_reads_calls_and_thoughts(client: openai.OpenAI) -> None:
    tools = [
        openai.pydantic_function_tool(Weather, name="weather"),
        openai.pydantic_function_tool(Weather, name="population"),
    ]
    thoughts = ""
    with client.chat.completions.stream(
        model="tiny",
        messages=user(ASKS_BOTH),
        tools=tools,
        stream_options={"include_usage": True},
    ) as stream:
        done = []
        for event in stream:
            if event.type == "tool_calls.function.arguments.done":
                done.append((event.index, event.name, event.parsed_arguments))
            elif event.type == "chunk" and event.chunk.choices:
                extra = event.chunk.choices[0].delta.model_extra or {}
                thoughts += extra.get("reasoning_content", "")
        final = stream.get_final_completion()
    assert done == [
        (0, "weather", Weather(city="Ulm")),
        (1, "population", Weather(city="Bonn")),
    ]
    assert thoughts == "Two of them."
    calls = final.choices[0].message.tool_calls or []
    assert [call.function.parsed_arguments for call in calls] == [
        Weather(city="Ulm"),
        Weather(city="Bonn"),
    ]
    assert final.usage is not None and final.usage.completion_tokens_details


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_openai_gets_a_valid_call_where_one_is_demanded(
    client: openai.OpenAI, choice: Any
) -> None:
    asks = {"model": "tiny", "messages": user("hello"), "tools": TOOLS}
    asks |= {"tool_choice": choice, "parallel_tool_calls": False, "temperature": 2}
    for seed in range(5):
        reply = client.chat.completions.create(**asks, seed=seed)
        calls: Any = reply.choices[0].message.tool_calls
        (call,) = calls
        assert Weather.model_validate_json(call.function.arguments)
        assert reply.choices[0].finish_reason == "tool_calls"
        with client.chat.completions.stream(**asks, seed=seed) as stream:
            stream.until_done()
            (streamed,) = stream.get_final_completion().choices
        calls = streamed.message.tool_calls
        (again,) = calls
        assert again.function.arguments == call.function.arguments


def test_openai_parses_replies_that_keep_to_a_schema(client: openai.OpenAI) -> None:
    asks: Any = {"model": "tiny", "messages": user(ASKS_PERSON)}
    parsed = client.chat.completions.parse(**asks, response_format=Person)
    assert parsed.choices[0].message.parsed == Person(**PERSON)
    with client.chat.completions.stream(**asks, response_format=Person) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == Person(**PERSON)
    # And what the model would rather not say is kept to the schema, too.
    asks["messages"] = user(saying("I had rather not."))
    for seed in range(5):
        kept = client.chat.completions.parse(**asks, seed=seed, response_format=Weather)
        assert kept.choices[0].message.parsed is not None


NEWER_OPENAI = """
import json, sys
import openai, pydantic

url, asks_person, asks_weather = sys.argv[1:]

class Person(pydantic.BaseModel):
    name: str
    age: int

class weather(pydantic.BaseModel):
    city: str

chat = openai.OpenAI(base_url=url, api_key="any", max_retries=0).chat.completions
told = lambda text: [{"role": "user", "content": text}]
person = chat.parse(model="tiny", messages=told(asks_person), response_format=Person)
asks = {"model": "tiny", "messages": told(asks_weather)}
asks |= {"tools": [openai.pydantic_function_tool(weather)]}
whole = chat.parse(**asks).choices[0].message.tool_calls[0].function
with chat.stream(**asks) as stream:
    stream.until_done()
    streamed = stream.get_final_completion().choices[0].message.tool_calls[0].function
print(json.dumps([
    person.choices[0].message.parsed.model_dump(),
    whole.parsed_arguments.model_dump(),
    streamed.parsed_arguments.model_dump(),
]))
"""


def test_openai_s_loop_of_calls_results_and_an_answer_on_responses(
    client: openai.OpenAI,
) -> None:
    tools: Any = [{"type": "function", "strict": True, **TOOLS[0]["function"]}]
    asked = user(ASKS_WEATHER)
    whole = client.responses.create(model="tiny", input=asked, tools=tools)
    with client.responses.stream(model="tiny", input=asked, tools=tools) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_response()
    for said in (whole, streamed):
        (call,) = said.output
        assert call.type == "function_call"
        assert (call.name, json.loads(call.arguments)) == ("weather", WEATHER)
        result = {"type": "function_call_output", "call_id": call.call_id}
        history: Any = [*asked, call.model_dump(exclude_none=True)]
        history.append({**result, "output": RESULT})
        answer = client.responses.create(model="tiny", input=history, tools=tools)
        assert answer.output_text == ANSWER


def test_a_newer_openai_parses_replies_and_calls(
    url: str, apart: dict[str, str]
) -> None:
    asks = (url, ASKS_PERSON, ASKS_WEATHER)
    seen = printed(sys.executable, "-c", NEWER_OPENAI, *asks, **apart)
    assert seen == [PERSON, WEATHER, WEATHER]


# Agents of OpenAI's and Pydantic's

AGENTS = """
import asyncio, json, sys
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, Runner
from agents import function_tool, set_tracing_disabled
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent as PydanticAgent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

url, asks_weather, result, asks_person, asks_output = sys.argv[1:]
set_tracing_disabled(True)
seen = {}

class Person(BaseModel):
    name: str
    age: int

@function_tool
def weather(city: str) -> str:
    return result

async def run():
    client = AsyncOpenAI(base_url=url, api_key="any", max_retries=0)
    model = OpenAIChatCompletionsModel(model="tiny", openai_client=client)
    agent = Agent(name="a", model=model, tools=[weather])
    seen["agents"] = (await Runner.run(agent, asks_weather)).final_output
    streamed = Runner.run_streamed(agent, asks_weather)
    async for _ in streamed.stream_events():
        pass
    seen["agents streamed"] = streamed.final_output
    typed = Agent(name="b", model=model, output_type=Person)
    seen["agents typed"] = (
        await Runner.run(typed, asks_person)).final_output.model_dump()

    provider = OpenAIProvider(base_url=url, api_key="any")
    model = OpenAIChatModel("tiny", provider=provider)
    own = PydanticAgent(model)

    @own.tool_plain(name="weather")
    def of_a_city(city: str) -> str:
        return result

    seen["pydantic"] = (await own.run(asks_weather)).output
    async with own.run_stream(asks_weather) as stream:
        seen["pydantic streamed"] = await stream.get_output()
    for name, kind, asks in (
        ("tool", Person, asks_output), ("native", NativeOutput(Person), asks_person),
    ):
        typed = PydanticAgent(model, output_type=kind)
        seen[f"pydantic {name}"] = (await typed.run(asks)).output.model_dump()

asyncio.run(run())
print(json.dumps(seen))
"""


def test_openai_s_agents_and_pydantic_ai_call_tools_and_give_objects(
    url: str, apart: dict[str, str]
) -> None:
    asks_output = saying(called("final_result", **PERSON))
    asks = (url, ASKS_WEATHER, RESULT, ASKS_PERSON, asks_output)
    seen = printed(sys.executable, "-c", AGENTS, *asks, **apart)
    names = ("agents", "agents streamed", "pydantic", "pydantic streamed")
    assert [seen.pop(name) for name in names] == [ANSWER] * 4
    typed = ("agents typed", "pydantic tool", "pydantic native")
    assert [seen.pop(name) for name in typed] == [PERSON] * 3
    assert not seen


# LangChain


def made(url: str, **more: Any) -> Any:
    """LangChain's model."""
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(base_url=url, api_key="any", model="tiny", max_retries=0, **more)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # as it logs itself
@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("function_calling", saying(called("Person", **PERSON))),
        ("json_schema", ASKS_PERSON),
        ("json_mode", ASKS_PERSON),
    ],
)
def test_langchain_gives_objects(url: str, method: str, said: str) -> None:
    chat = made(url).with_structured_output(Person, method=method)
    assert chat.invoke(said) == Person(**PERSON)
    *_, last = chat.stream(said)
    assert last == Person(**PERSON)


def test_langchain_s_agent_calls_two_tools(url: str) -> None:
    from langchain.agents import create_agent

    asked_for: list[tuple[str, str]] = []

    def weather(city: str) -> str:
        """Weather of a city."""
        asked_for.append(("weather", city))
        return RESULT

    def population(city: str) -> str:
        """How many live there."""
        asked_for.append(("population", city))
        return RESULT

    for more in ({}, {"streaming": True, "stream_usage": True}):
        asked_for.clear()
        agent = create_agent(made(url, **more), [weather, population])
        ended = agent.invoke({"messages": user(ASKS_BOTH)})
        assert sorted(asked_for) == [("population", "Bonn"), ("weather", "Ulm")]
        assert ended["messages"][-1].content == ANSWER
        assert ended["messages"][-1].usage_metadata["total_tokens"] > 0


# LlamaIndex and Haystack


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own use of pydantic
def test_llama_index_s_agent_calls_a_tool_and_gives_objects(url: str) -> None:
    from llama_index.core.agent.workflow import FunctionAgent
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    chat = OpenAILike(
        model="tiny",
        api_base=url,
        api_key="any",
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
    )

    def weather(city: str) -> str:
        """Weather of a city."""
        return RESULT

    tool = FunctionTool.from_defaults(weather)
    response = chat.predict_and_call([tool], user_msg=ASKS_WEATHER)
    assert str(response) == RESULT

    async def run(streaming: bool) -> str:
        agent = FunctionAgent(tools=[tool], llm=chat, streaming=streaming)
        return str(await agent.run(ASKS_WEATHER))

    assert asyncio.run(run(True)) == asyncio.run(run(False)) == ANSWER
    with warnings.catch_warnings():  # it leaves its connections open
        warnings.simplefilter("ignore", ResourceWarning)
        chat._aclient = None
        gc.collect()
    from llama_index.core.prompts import PromptTemplate

    said = PromptTemplate("{said}")
    asks = saying(called("Person", **PERSON))
    assert chat.structured_predict(Person, said, said=asks) == Person(**PERSON)


def test_haystack_s_agent_calls_a_tool(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    from haystack.components.agents import Agent
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.tools import Tool
    from haystack.utils import Secret

    generator = OpenAIChatGenerator(
        api_key=Secret.from_token("any"), model="tiny", api_base_url=url
    )
    tool = Tool("weather", "Of a city.", PARAMETERS, lambda city: RESULT)
    for callback in (None, lambda part: None):
        agent = Agent(
            chat_generator=generator, tools=[tool], streaming_callback=callback
        )
        ended = agent.run(messages=[ChatMessage.from_user(ASKS_WEATHER)])
        assert ended["messages"][-1].text == ANSWER
    typed = OpenAIChatGenerator(
        api_key=Secret.from_token("any"),
        model="tiny",
        api_base_url=url,
        generation_kwargs={"response_format": Person},
    )
    (reply,) = typed.run([ChatMessage.from_user(ASKS_PERSON)])["replies"]
    assert json.loads(reply.text) == PERSON


# LiteLLM

LITELLM_SCRIPT = """
import json, sys
import litellm
from pydantic import BaseModel

url, asks_both, result, asks_person, tools = sys.argv[1:]
tools = json.loads(tools)
told = lambda text: [{"role": "user", "content": text}]
seen = {}

class Person(BaseModel):
    name: str
    age: int

for name in ("hosted_vllm", "openai"):
    own = seen[name] = {}
    asks = {"model": f"{name}/tiny", "api_base": url, "api_key": "any", "max_retries": 0}
    whole = litellm.completion(**asks, messages=told(asks_both), tools=tools)
    parts = [*litellm.completion(
        **asks, messages=told(asks_both), tools=tools, stream=True,
        stream_options={"include_usage": True})]
    built = litellm.stream_chunk_builder(parts, messages=told(asks_both))
    for kind, reply in (("whole", whole), ("streamed", built)):
        message = reply.choices[0].message
        own[kind] = [
            [[call.function.name, json.loads(call.function.arguments)]
             for call in message.tool_calls],
            message.reasoning_content, reply.choices[0].finish_reason,
            reply.usage.completion_tokens_details.reasoning_tokens,
        ]
    messages = [*told(asks_both), whole.choices[0].message]
    for call in whole.choices[0].message.tool_calls:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    final = litellm.completion(**asks, messages=messages, tools=tools)
    own["final"] = final.choices[0].message.content
    typed = litellm.completion(
        **asks, messages=told(asks_person), response_format=Person)
    own["typed"] = json.loads(typed.choices[0].message.content)
    demanded = litellm.completion(
        **asks, messages=told("hello"), tools=tools[:1], tool_choice="required",
        parallel_tool_calls=False)
    (call,) = demanded.choices[0].message.tool_calls
    own["demanded"] = json.loads(call.function.arguments)["city"]
print(json.dumps(seen))
"""


def test_litellm_calls_tools_and_gives_objects(
    url: str, litellm: dict[str, str]
) -> None:
    population = {"name": "population", "parameters": PARAMETERS}
    tools = [*TOOLS, {"type": "function", "function": population}]
    asks = (url, ASKS_BOTH, RESULT, ASKS_PERSON, json.dumps(tools))
    seen = printed(sys.executable, "-c", LITELLM_SCRIPT, *asks, **litellm)
    calls = [["weather", {"city": "Ulm"}], ["population", {"city": "Bonn"}]]
    assert seen.keys() == {"hosted_vllm", "openai"}
    for own in seen.values():
        assert own["whole"] == own["streamed"]
        assert own["whole"][:3] == [calls, "Two of them.", "tool_calls"]
        assert own["whole"][3] > 0
        assert (own["final"], own["typed"]) == (ANSWER, PERSON)
        assert own["demanded"] in CITIES


# npm

NODE_SCRIPT = """
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat }
  from "openai/helpers/zod";
import { ChatOpenAI } from "@langchain/openai";
import { tool as langchainTool } from "@langchain/core/tools";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { z } from "zod";
const [baseURL, asksBoth, asksWeather, result, asksPerson, asksOutput] =
  process.argv.slice(2);
const seen = { openai: {}, responses: {}, langchain: {}, vercel: {} };
const Person = z.object({ name: z.string(), age: z.number().int() });
const City = z.object({ city: z.enum(["Ulm", "Bonn"]) });
const told = (content) => [{ role: "user", content }];
{
  const own = seen.openai;
  const chat = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 }).chat.completions;
  const typed = { model: "tiny", messages: told(asksPerson),
    response_format: zodResponseFormat(Person, "person") };
  own.parsed = (await chat.parse(typed)).choices[0].message.parsed;
  own.streamed = (await chat.stream(typed).finalChatCompletion())
    .choices[0].message.parsed;
  const asked = own.asked = [];
  const tools = ["weather", "population"].map((name) => zodFunction({
    name, parameters: City, function: ({ city }) => {
      asked.push([name, city]); return result; } }));
  own.ran = await chat.runTools(
    { model: "tiny", messages: told(asksBoth), tools }).finalContent();
  own.ranStreamed = await chat.runTools(
    { model: "tiny", messages: told(asksBoth), tools, stream: true }).finalContent();
  const demanded = await chat.create({ model: "tiny", messages: told("hello"),
    tools: tools.slice(0, 1), tool_choice: "required", parallel_tool_calls: false });
  own.demanded = demanded.choices[0].message.tool_calls
    .map((call) => JSON.parse(call.function.arguments).city);
}
{
  const own = seen.responses;
  const { responses } = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 });
  const typed = { model: "tiny", input: asksPerson,
    text: { format: zodTextFormat(Person, "person") } };
  own.parsed = (await responses.parse(typed)).output_parsed;
  own.streamed = (await responses.stream(typed).finalResponse()).output_parsed;
  const asks = { model: "tiny", input: told(asksBoth),
    tools: ["weather", "population"].map((name) => zodResponsesFunction(
      { name, parameters: City })) };
  const said = (await responses.stream(asks).finalResponse()).output;
  const calls = said.filter((item) => item.type === "function_call");
  own.kinds = said.map((item) => item.type);
  own.asked = calls.map((call) => [call.name, call.parsed_arguments.city]);
  own.same = (await responses.parse(asks)).output
    .filter((item) => item.type === "function_call")
    .map((call) => [call.name, call.parsed_arguments.city]);
  const results = calls.map(({ call_id }) => (
    { type: "function_call_output", call_id, output: result }));
  own.answer = (await responses.create(
    { ...asks, input: [...asks.input, ...said, ...results] })).output_text;
}
{
  const own = seen.langchain;
  const chat = new ChatOpenAI({ model: "tiny", apiKey: "any", maxRetries: 0,
    configuration: { baseURL } });
  own.json = await chat.withStructuredOutput(Person, { method: "jsonSchema" })
    .invoke(asksPerson);
  own.calling = await chat.withStructuredOutput(
    Person, { method: "functionCalling", name: "final_result" }).invoke(asksOutput);
  const weather = langchainTool(() => result,
    { name: "weather", description: "Of a city.", schema: City });
  let all;
  for await (const part of await chat.bindTools([weather]).stream(asksWeather))
    all = all?.concat(part) ?? part;
  own.calls = all.tool_calls.map((call) => [call.name, call.args]);
}
{
  const own = seen.vercel;
  const provider = createOpenAICompatible({ name: "ours", baseURL, apiKey: "any",
    includeUsage: true, supportsStructuredOutputs: true });
  const asked = own.asked = [];
  const made = (name) => tool({ description: name, inputSchema: City,
    execute: async ({ city }) => { asked.push([name, city]); return result; } });
  const asks = { model: provider.chatModel("tiny"), prompt: asksBoth, maxRetries: 0,
    tools: { weather: made("weather"), population: made("population") },
    stopWhen: stepCountIs(3) };
  own.whole = (await generateText(asks)).text;
  const stream = streamText(asks);
  let text = "", thoughts = "";
  for await (const part of stream.fullStream) {
    if (part.type === "text-delta") text += part.text;
    if (part.type === "reasoning-delta") thoughts += part.text;
    if (part.type === "error") throw part.error;
  }
  own.streamed = [text, thoughts, await stream.finishReason];
  own.reasoning = (await stream.totalUsage).outputTokenDetails.reasoningTokens;
  own.object = (await generateObject(
    { model: asks.model, prompt: asksPerson, schema: Person, maxRetries: 0 })).object;
}
console.log(JSON.stringify(seen));
"""
PACKAGES = ["openai@>=6", "zod@>=4", "@langchain/openai", "@langchain/core", "ai@>=5"]
PACKAGES += ["@ai-sdk/openai-compatible"]
BOTH = [["weather", "Ulm"], ["population", "Bonn"]]


@pytest.fixture(scope="module")
def npm_saw(url: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the packages of npm were answered."""
    asks_output = saying(called("final_result", **PERSON))
    asks = (url, ASKS_BOTH, ASKS_WEATHER, RESULT, ASKS_PERSON, asks_output)
    folder: Path = tmp_path_factory.mktemp("npm")
    return node_printed(folder, PACKAGES, NODE_SCRIPT, *asks)


def test_npm_s_openai_runs_tools_and_parses(npm_saw: Any) -> None:
    seen = npm_saw["openai"]
    assert seen["parsed"] == seen["streamed"] == PERSON
    assert seen["ran"] == seen["ranStreamed"] == ANSWER
    assert seen["asked"] == BOTH * 2
    assert len(seen["demanded"]) == 1 and seen["demanded"][0] in CITIES


def test_npm_s_openai_runs_tools_and_parses_on_responses(npm_saw: Any) -> None:
    seen = npm_saw["responses"]
    assert seen["parsed"] == seen["streamed"] == PERSON
    assert seen["kinds"] == ["reasoning", "function_call", "function_call"]
    assert seen["asked"] == seen["same"] == BOTH
    assert seen["answer"] == ANSWER


def test_langchain_js_calls_tools_and_gives_objects(npm_saw: Any) -> None:
    seen = npm_saw["langchain"]
    assert seen["json"] == seen["calling"] == PERSON
    assert seen["calls"] == [["weather", WEATHER]]


def test_vercel_s_sdk_runs_tools_and_gives_objects(npm_saw: Any) -> None:
    seen = npm_saw["vercel"]
    assert ANSWER in seen["whole"]
    text, thoughts, reason = seen["streamed"]
    assert (ANSWER in text, thoughts, reason) == (True, "Two of them.", "stop")
    assert sorted(seen["asked"]) == sorted(BOTH * 2)
    assert seen["reasoning"] > 0
    assert seen["object"] == PERSON
