"""Replies by a grammar or a schema, over HTTP, from models that llama.cpp runs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import jsonschema
import pytest

from tests import chat_models, kit
from tests.random_schemas import grammar_of
from tests.schemas import Schema, closed, schemas

PERSON = closed(
    name={"type": "string", "maxLength": 8},
    age={"type": "integer", "minimum": 0, "maximum": 130},
    mood={"enum": ["🙂", "🙁"]},
)


def posted(url: str, body: dict[str, Any], route: str = "chat/completions") -> Any:
    """The reply to a body, or the error."""
    kind = {"Content-Type": "application/json"}
    request = Request(f"{url}/v1/{route}", json.dumps(body).encode(), kind)
    try:
        with urlopen(request) as reply:
            return json.load(reply)
    except HTTPError as error:
        if error.code == HTTPStatus.SERVICE_UNAVAILABLE:  # a busy box: as clients do
            time.sleep(float(error.headers["retry-after"]))
            return posted(url, body, route)
        return json.load(error)


def chat(schema: Schema, **more: Any) -> dict[str, Any]:
    """A body that asks for JSON by a schema."""
    body = {
        "messages": [{"role": "user", "content": "An example, as JSON."}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "example", "strict": True, "schema": schema},
        },
    }
    return body | {"max_tokens": 60, "temperature": 1, "seed": 1} | more


def check(reply: Any, schema: Schema) -> str:
    """The finish reason of a reply that is valid, or was cut."""
    (choice,) = reply["choices"]
    said: str = choice["message"]["content"]
    if choice["finish_reason"] == "stop":
        jsonschema.Draft202012Validator(schema).validate(json.loads(said))
    else:
        grammar, _ = grammar_of(schema)
        # Half a character at the end is shown as one that nobody sent.
        said = said.rstrip("\ufffd")
        assert not said or grammar.start.after(said.encode()) is not None
    return str(choice["finish_reason"])


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a tiny model."""
    path = chat_models.tiny_llama(tmp_path_factory.mktemp("model"))
    flags = ["--model-path", str(path), "--any-model", "--parallel", "4"]
    with kit.started(*flags, module=("embellama_server.py",)) as running:
        yield running.url


def test_replies_by_a_schema_are_valid(url: str) -> None:
    for seed in range(5):
        assert check(posted(url, chat(PERSON, seed=seed)), PERSON) == "stop"


def test_any_json_object_is_one(url: str) -> None:
    ended = 0
    for seed in range(6):
        body = chat({}, seed=seed, response_format={"type": "json_object"})
        ended += check(posted(url, body), {"type": "object"}) == "stop"
    assert ended


def test_json_schema_and_grammar_may_be_given_as_llama_server_takes_them(
    url: str,
) -> None:
    body = {"prompt": "x", "max_tokens": 99, "json_schema": PERSON}
    (choice,) = posted(url, body, "completions")["choices"]
    jsonschema.validate(json.loads(choice["text"]), PERSON)
    body = {"prompt": "x", "max_tokens": 99, "grammar": 'root ::= "a" [bc]{3} "d"'}
    (choice,) = posted(url, body, "completions")["choices"]
    assert choice["finish_reason"] == "stop"
    assert {*choice["text"][1:4]} <= {*"bc"}
    assert choice["text"][0] + choice["text"][4:] == "ad"


@pytest.mark.parametrize(
    "more",
    [{"n": 3}, {"temperature": 0}, {"ignore_eos": True}, {"stop": ["🙁"]}],
    ids=str,
)
def test_so_it_is_with_other_options(url: str, more: dict[str, Any]) -> None:
    for choice in posted(url, chat(PERSON, **more))["choices"]:
        said = choice["message"]["content"]
        assert choice["finish_reason"] == "stop"
        if "🙂" in said or "stop" not in more:
            jsonschema.validate(json.loads(said), PERSON)


def test_a_reply_is_as_long_as_it_must_be(url: str) -> None:
    body = chat({"const": "yes"}, logprobs=True)
    reply = posted(url, body)
    (choice,) = reply["choices"]
    assert choice["message"]["content"] == '"yes"'
    said = "".join(one["token"] for one in choice["logprobs"]["content"])
    assert said.strip() == '"yes"'
    assert reply["usage"]["completion_tokens"] == len(choice["logprobs"]["content"])


@pytest.mark.parametrize(
    ("more", "param", "problem"),
    [
        (chat({"not": {}}), "response_format", "response_format.not is not supported"),
        ({"grammar": 'root ::= "a'}, "grammar", "grammar cannot be read"),
        ({"grammar": "  "}, "grammar", "empty"),
        ({"grammar": "root ::= root"}, "grammar", "left recursion"),
        ({"json_schema": {"if": 1}}, "json_schema", "json_schema.if is not"),
        ({"json_schema": {}, "grammar": "x"}, "grammar", "exclude each other"),
    ],
    ids=["schema", "gbnf", "empty", "recursion", "llama-server's", "two"],
)
def test_what_cannot_be_followed_is_refused(
    url: str, more: dict[str, Any], param: str, problem: str
) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]} | more
    error = posted(url, body)["error"]
    assert error["param"] == param
    assert problem in error["message"]


@pytest.mark.chat
def test_200_schemas_of_applications_are_followed(
    gemma: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    template = tmp_path_factory.mktemp("template") / "gemma.jinja"
    template.write_text(chat_models.GEMMA)
    flags = ["--model-path", str(gemma), "--any-model", "--parallel", "16"]
    flags += ["--chat-template", str(template), "--context-size", "8192"]
    wanted = schemas()
    assert len(wanted) == 200
    with (
        kit.started(*flags, module=("embellama_server.py",)) as running,
        ThreadPoolExecutor(16) as threads,
    ):

        def one(number: int) -> str:
            body = chat(wanted[number], seed=number, max_tokens=48)
            return check(posted(running.url, body), wanted[number])

        reasons = [*threads.map(one, range(200))]
    assert reasons.count("stop") > 120


def test_a_schema_holds_for_what_comes_after_thoughts(tmp_path: Path) -> None:
    template = chat_models.CHATML.replace(
        "<|im_start|>assistant\n{% if", "<|im_start|>assistant\n<think>\n{% if"
    )
    path = chat_models.tiny_qwen(tmp_path, template=template)
    flags = ["--model-path", str(path), "--any-model"]
    with kit.started(*flags, module=("embellama_server.py",)) as running:
        body = chat({"const": "yes"}, max_tokens=200)
        for _ in range(2):
            (choice,) = posted(running.url, body)["choices"]
            message = choice["message"]
            thought = message.get("reasoning_content")
            if choice["finish_reason"] == "stop":
                assert message["content"].strip() == '"yes"'
            assert thought
