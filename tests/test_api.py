"""Rooms API and ROUTES: what OpenAI's clients send, and what they are told."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import embellama_server as es
from tests import kit
from tests.kit import RunningService

URL = "/v1/embeddings"


def expected(text: str) -> Any:
    """The fake engine's vector of a text."""
    return kit.fake_vector([1, *map(kit.fake_id, text.split()), 2])


# --- what is answered ---


async def test_the_reply_is_exactly_openai_s_shape() -> None:
    async with kit.running_service() as running:
        reply = await running.ask("POST", URL, {"input": ["a b", "c"], "model": "fake"})
        assert reply.status == 200
        assert reply.headers["content-type"] == "application/json"
        assert set(reply.json) == {"object", "data", "model", "usage"}
        assert reply.json["object"] == "list"
        assert reply.json["model"] == "fake"
        assert reply.json["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
        for index, item in enumerate(reply.json["data"]):
            assert set(item) == {"object", "index", "embedding"}
            assert (item["object"], item["index"]) == ("embedding", index)
        vectors = [item["embedding"] for item in reply.json["data"]]
        assert vectors[0] == pytest.approx(expected("a b").tolist(), abs=1e-7)
        assert vectors[1] == pytest.approx(expected("c").tolist(), abs=1e-7)


async def test_both_paths_serve_embeddings() -> None:
    async with kit.running_service() as running:
        one = await running.ask("POST", "/v1/embeddings", {"input": "a"})
        other = await running.ask("POST", "/embeddings", {"input": "a"})
        assert one.json == other.json


async def test_base64_is_little_endian_float32() -> None:
    async with kit.running_service() as running:
        ask = {"input": "a b", "encoding_format": "base64"}
        reply = await running.ask("POST", URL, ask)
        raw = base64.b64decode(reply.json["data"][0]["embedding"], validate=True)
        assert struct.unpack("<8f", raw) == pytest.approx(expected("a b").tolist())


async def test_null_counts_as_absent_in_every_field() -> None:
    async with kit.running_service() as running:
        names = [row.name for row in dataclasses.fields(es.EmbeddingsForm)]
        names.remove("input")
        assert {"model", "dimensions", "allow_partial", "truncate"} <= set(names)
        plain = await running.ask("POST", URL, {"input": "a"})
        nulls = await running.ask("POST", URL, {"input": "a", **dict.fromkeys(names)})
        assert nulls.json == plain.json
        missing = await running.ask("POST", URL, {"input": None})
        assert missing.error["param"] == "input"


async def test_user_and_unknown_fields_are_accepted() -> None:
    async with kit.running_service() as running:
        ask = {"input": "a", "user": "someone", "from_the_future": {"x": [1]}}
        assert (await running.ask("POST", URL, ask)).status == 200


@pytest.mark.parametrize("dimensions", [1, 3, 7])
async def test_fewer_dimensions_are_cut_then_normalised(dimensions: int) -> None:
    async with kit.running_service() as running:
        ask = {"input": "a", "dimensions": dimensions}
        vector = (await running.ask("POST", URL, ask)).json["data"][0]["embedding"]
        cut = expected("a")[:dimensions]
        assert vector == pytest.approx((cut / np.linalg.norm(cut)).tolist(), abs=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dimensions", [3, 8])
async def test_a_model_whose_authors_say_so_gets_a_layer_norm_before_the_cut(
    dimensions: int, normalize: bool
) -> None:
    async with kit.running_service(kit.FakeEngine(norms_before_cut=True)) as running:
        ask = {"input": "a", "dimensions": dimensions, "normalize": normalize}
        vector = (await running.ask("POST", URL, ask)).json["data"][0]["embedding"]
    # As nomic's code: F.layer_norm(x, (n,)), x[:, :dimensions], F.normalize(x).
    rows = expected("a") * kit.RAW_LENGTH
    if dimensions < len(rows):
        rows = ((rows - rows.mean()) / np.sqrt(rows.var() + 1e-5))[:dimensions]
    if normalize:
        rows = rows / np.linalg.norm(rows)
    assert vector == pytest.approx(rows.tolist(), abs=1e-4)


async def test_all_dimensions_are_a_no_op() -> None:
    async with kit.running_service() as running:
        plain = await running.ask("POST", URL, {"input": "a"})
        whole = await running.ask("POST", URL, {"input": "a", "dimensions": 8})
        assert whole.json == plain.json


async def test_a_vector_is_whole_again_after_it_was_sent_shortened_or_not_scaled() -> (
    None
):
    engine = kit.FakeEngine()
    raw = (expected("a") * kit.RAW_LENGTH).tolist()
    async with kit.running_service(engine, cache_mb=1) as running:

        async def vector(**how: Any) -> list[float]:
            reply = await running.ask("POST", URL, {"input": "a", **how})
            found: list[float] = reply.json["data"][0]["embedding"]
            return found

        whole = await vector()
        short = await vector(dimensions=2)
        assert np.linalg.norm(short) == pytest.approx(1, rel=1e-6)
        assert short != whole[:2]
        for _ in range(2):
            assert await vector(normalize=False) == pytest.approx(raw, rel=1e-6)
            short = await vector(normalize=False, dimensions=2)
            assert short == pytest.approx(raw[:2], rel=1e-6)
            assert await vector() == whole
    assert len(engine.calls) == 1, "all of one computation"


@pytest.mark.parametrize("cache_mb", [0, 1])
async def test_usage_counts_the_tokens_that_were_sent_also_those_not_computed(
    cache_mb: int,
) -> None:
    async with kit.running_service(cache_mb=cache_mb) as running:
        for inputs, tokens in ((["a b", "c"], 7), (["c", "a b", "c", "d"], 13)):
            for _ in range(2):
                usage = (await running.ask("POST", URL, {"input": inputs})).json[
                    "usage"
                ]
                assert usage == {"prompt_tokens": tokens, "total_tokens": tokens}


async def test_2048_inputs_are_answered_in_order() -> None:
    async with kit.running_service(workers=3) as running:
        texts = [f"w{n}" for n in range(2048)]
        ask = {"input": texts, "encoding_format": "base64"}
        data = (await running.ask("POST", URL, ask)).json["data"]
        for text, item in zip(texts, data, strict=True):
            raw = base64.b64decode(item["embedding"])
            assert np.allclose(np.frombuffer(raw, "<f4"), expected(text), atol=1e-6)


async def test_model_is_echoed_as_asked_and_may_be_absent() -> None:
    async with kit.running_service(model_alias=("short",)) as running:
        for asked, echoed in (("short", "short"), ("fake", "fake"), (None, "fake")):
            reply = await running.ask("POST", URL, {"input": "a", "model": asked})
            assert reply.json["model"] == echoed


async def test_an_unknown_model_is_404_and_says_what_is_served() -> None:
    async with kit.running_service(model_alias=("short",)) as running:
        reply = await running.ask("POST", URL, {"input": "a", "model": "gpt-9"})
        assert reply.status == 404
        assert reply.error["code"] == "model_not_found"
        assert reply.error["param"] == "model"
        for part in ("gpt-9", "fake", "short"):
            assert part in reply.error["message"]


async def test_any_model_answers_whatever_is_asked() -> None:
    async with kit.running_service(any_model=True) as running:
        reply = await running.ask("POST", URL, {"input": "a", "model": "gpt-9"})
        assert reply.json["model"] == "gpt-9"


async def test_a_vector_without_a_direction_leaves_its_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost, really = expected("z"), es.shortened

    def shortened(vector: Any, dimensions: int | None, card: es.ModelCard) -> Any:
        cosine = vector @ lost / np.linalg.norm(vector) / np.linalg.norm(lost)
        scale = 0 if cosine > 0.999 else 1
        return really(vector, dimensions, card) * scale

    monkeypatch.setattr(es, "shortened", shortened)
    async with kit.running_service() as running:
        body: dict[str, Any] = {"input": ["a", "z", "b"], "dimensions": 2}
        reply = await running.ask("POST", URL, body | {"allow_partial": True})
        assert reply.status == 200, reply.body
        kinds = [row["object"] for row in reply.json["data"]]
        assert kinds == ["embedding", "error", "embedding"]
        assert reply.json["data"][1]["error"]["code"] == "nonfinite_embedding"
        reply = await running.ask("POST", URL, body)
        assert reply.status == 500
        assert "input[1]" in reply.error["message"]


# --- what is refused ---

_LONG = " ".join(["word"] * 40)
BAD_BODIES: dict[str, tuple[Any, str, str | None, str]] = {
    # name: body, code, param, a part of the message
    "no input": ({}, "invalid_value", "input", "missing"),
    "empty string": ({"input": ""}, "invalid_value", "input[0]", "empty"),
    "empty list": ({"input": []}, "invalid_value", "input", "empty"),
    "empty string in a list": (
        {"input": ["a", ""]},
        "invalid_value",
        "input[1]",
        "empty",
    ),
    "a number": ({"input": 5}, "invalid_value", "input", "string"),
    "an object": ({"input": {"text": "a"}}, "invalid_value", "input", "string"),
    "the 18th is a number": (
        {"input": ["a"] * 17 + [5]},
        "invalid_value",
        "input[17]",
        "string",
    ),
    "a float first": ({"input": [0.5]}, "invalid_value", "input[0]", "string"),
    "null in a list": ({"input": ["a", None]}, "invalid_value", "input[1]", "string"),
    "true in a list": ({"input": [True]}, "invalid_value", "input[0]", "string"),
    "too many": ({"input": ["a"] * 8193}, "invalid_value", "input", "8193"),
    "ids": ({"input": [1, 2]}, "token_ids_not_accepted", "input", "LangChain"),
    "lists of ids": (
        {"input": [[1], [2]]},
        "token_ids_not_accepted",
        "input",
        "check_embedding_ctx_length=False",
    ),
    "too long": ({"input": ["a", _LONG]}, "context_length_exceeded", "input[1]", "42"),
    "unknown encoding": (
        {"input": "a", "encoding_format": "hex"},
        "invalid_value",
        "encoding_format",
        "base64",
    ),
    "encoding is a number": (
        {"input": "a", "encoding_format": 1},
        "invalid_value",
        "encoding_format",
        "one of float, base64, bytes",
    ),
    "dimensions 0": (
        {"input": "a", "dimensions": 0},
        "invalid_value",
        "dimensions",
        "at least 1",
    ),
    "dimensions 9": (
        {"input": "a", "dimensions": 9},
        "invalid_value",
        "dimensions",
        "1 to 8",
    ),
    "dimensions true": (
        {"input": "a", "dimensions": True},
        "invalid_value",
        "dimensions",
        "whole number",
    ),
    "dimensions text": (
        {"input": "a", "dimensions": "8.5"},
        "invalid_value",
        "dimensions",
        "whole number",
    ),
    "model is a number": (
        {"input": "a", "model": 3},
        "invalid_value",
        "model",
        "string",
    ),
    "unknown priority": (
        {"input": "a", "priority": "urgent"},
        "invalid_value",
        "priority",
        "high, normal, low",
    ),
    "priority is a number": (
        {"input": "a", "priority": 1},
        "invalid_value",
        "priority",
        "one of high, normal, low",
    ),
    "allow_partial is a number": (
        {"input": "a", "allow_partial": 2},
        "invalid_value",
        "allow_partial",
        "true or false",
    ),
    "allow_partial text": (
        {"input": "a", "allow_partial": "yes"},
        "invalid_value",
        "allow_partial",
        "true or false",
    ),
    "a list": ([1], "invalid_json", None, "object"),
    "not JSON": (b"{input: 1}", "invalid_json", None, "not JSON"),
    "empty body": (b"", "invalid_json", None, "not JSON"),
    "cut short": (b'{"input": "a', "invalid_json", None, "not JSON"),
    "not UTF-8": (b'{"input": "\xff"}', "invalid_json", None, "UTF-8"),
    "NaN": (b'{"input": NaN}', "invalid_json", None, "not JSON"),
    "deeply nested": (b"[" * 200_000, "invalid_json", None, "not JSON"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_a_bad_body_is_400_and_names_the_field(name: str) -> None:
    body, code, param, part = BAD_BODIES[name]

    async with kit.running_service() as running:
        reply = await running.ask("POST", URL, body)
        assert reply.status == 400
        error = reply.error
        assert (error["code"], error["param"]) == (code, param)
        assert error["type"] == "invalid_request_error"
        assert part in error["message"]
        # The server is unharmed.
        assert (await running.ask("POST", URL, {"input": "a"})).status == 200


async def test_too_long_says_both_numbers() -> None:
    async with kit.running_service() as running:
        message = (await running.ask("POST", URL, {"input": _LONG})).error["message"]
        assert "42" in message
        assert "32" in message


async def test_auto_truncate_keeps_the_final_special_token() -> None:
    async with kit.running_service(auto_truncate=True) as running:
        reply = await running.ask("POST", URL, {"input": _LONG})
        assert reply.json["usage"]["prompt_tokens"] == 32
        (batch,) = running.engine.calls
        assert batch == [[1, *[kit.fake_id("word")] * 30, 2]]
        metrics = (await running.ask("GET", "/metrics")).body.decode()
        assert "embellama_inputs_truncated_total 1\n" in metrics


async def test_a_request_has_at_most_so_many_tokens_in_all_its_inputs() -> None:
    # Slices of 32 inputs are tokenized at a time: the 100 are too many in the second.
    few, many = ["one two"] * 25, [f"one {n}" for n in range(100)]

    async with kit.running_service(max_request_tokens=100) as running:
        assert (await running.ask("POST", URL, {"input": few})).status == 200
        reply = await running.ask("POST", URL, {"input": many})
        error = reply.json["error"]
        assert (reply.status, error["param"]) == (400, "input")
        assert error["code"] == error["type"] == "max_tokens_per_request"
        assert "100" in error["message"]
        assert "--max-request-tokens" in error["message"]
        partly = {"input": many, "allow_partial": True}
        assert (await running.ask("POST", URL, partly)).status == 400
        other = await running.ask("POST", "/embed", {"inputs": many})
        assert (other.status, other.json["error_type"]) == (422, "Validation")
        assert (await running.ask("POST", URL, {"input": few})).status == 200
        assert running.backlog.inputs == running.backlog.tokens == 0
    assert es.Settings().max_request_tokens == 300_000, "OpenAI's"


@pytest.mark.parametrize(
    ("is_openai", "ranks", "said", "inputs", "tokens"),
    [
        *((True, False, {}, 8192, 300_000), (True, True, {}, 10_000, None)),
        *((False, False, {}, 8192, None), (False, True, {}, 10_000, None)),
        (True, False, {"max_request_tokens": 0}, 8192, None),
        *(
            (is_openai, ranks, said, 3, 7)
            for is_openai in (True, False)
            for ranks in (True, False)
            for said in ({"max_client_batch_size": 3, "max_request_tokens": 7},)
        ),
        (False, True, {"max_client_batch_size": 20_000}, 20_000, None),
    ],
)
def test_limits_are_the_dialect_s_own_unless_they_are_set(
    is_openai: bool,
    ranks: bool,
    said: dict[str, int],
    inputs: int,
    tokens: int | None,
) -> None:
    settings = kit.settings(**said)
    own = es.MAX_REQUEST_TOKENS if is_openai and not ranks else sys.maxsize
    request = es.EmbedRequest(
        inputs=[es.Pair("q", "d") if ranks else "d"], max_tokens=own
    )
    assert es.max_inputs(settings, request.kind) == inputs
    found = es.max_tokens(request, kit.FakeEngine().card, settings)
    assert found == (tokens or sys.maxsize)


async def test_accepted_token_ids_are_checked_against_the_vocabulary() -> None:
    async with kit.running_service(accept_token_ids=True) as running:
        good = await running.ask("POST", URL, {"input": [[10, 11], [1, 12, 2]]})
        assert good.status == 200
        # Special tokens are added unless they are there.
        computed = sorted(ids for batch in running.engine.calls for ids in batch)
        assert computed == [[1, 10, 11, 2], [1, 12, 2]]
        one = await running.ask("POST", URL, {"input": [10, 11]})
        assert len(one.json["data"]) == 1
        for bad, where in (
            ([[10], [11, 2**30]], "input[1]"),
            ([[-1]], "input[0]"),
            ([10, "a"], "input[0]"),
            ([[]], "input[0]"),
            ([10, True], "input[0]"),
        ):
            reply = await running.ask("POST", URL, {"input": bad})
            assert (reply.status, reply.error["param"]) == (400, where)


async def test_json_may_say_its_charset() -> None:
    async with kit.running_service() as running:
        kind = "Application/JSON; charset=UTF-8"
        reply = await running.ask("POST", URL, {"input": "a"}, content_type=kind)
        assert reply.status == 200


async def test_a_body_over_the_limit_is_413_with_both_numbers() -> None:
    async with kit.running_service(max_body_bytes=1024) as running:
        reply = await running.ask("POST", URL, {"input": "a" * 2000})
        assert reply.status == 413
        assert "1024" in reply.error["message"]


async def test_unknown_paths_are_404_and_wrong_methods_405_with_allow() -> None:
    async with kit.running_service() as running:
        for method, path in (("GET", "/nope"), ("POST", "/v1"), ("GET", "/v2/models")):
            reply = await running.ask(method, path)
            assert (reply.status, reply.error["code"]) == (404, "unknown_url")
        for method, path, allow in (
            ("GET", URL, "OPTIONS, POST"),
            ("DELETE", "/health", "GET, HEAD, OPTIONS"),
        ):
            reply = await running.ask(method, path)
            assert (reply.status, reply.headers["allow"]) == (405, allow)
            assert reply.error["code"] == "method_not_allowed"


async def test_every_route_answers_its_method_and_refuses_all_others() -> None:
    async with kit.running_service(**kit.all_routes()) as running:
        for path in {route.path for route in es.ROUTES}:
            real = path.replace("{id}", "fake")
            methods = {r.method for r in es.ROUTES if r.path == path}
            for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "TRACE"):
                body = kit.BODIES.get(path) if method == "POST" else None
                reply = await running.ask(method, real, body)
                assert reply.status == (200 if method in methods else 405), (
                    method,
                    path,
                )
            options = await running.ask("OPTIONS", real)
            assert options.status == 204
            assert methods <= set(options.headers["allow"].split(", "))


# --- priority ---

BODY, HEADER = "body", "header"


async def ask_with(
    running: RunningService, text: str, body: str | None, header: str | None
) -> kit.Reply:
    """A request that states its priority, in either place."""
    fields = {} if header is None else {"x_priority": header}
    ask = {"input": text, "priority": body}
    return await running.ask("POST", URL, ask, **fields)


@pytest.mark.parametrize(
    ("said", "order"),
    [
        ([(None, None), (None, None), (None, None)], "abc"),
        ([("low", None), (None, None), ("high", None)], "cba"),
        ([(None, "low"), ("normal", None), (None, "high")], "cba"),
        ([(None, "LOW"), (None, "Normal"), (None, "High")], "cba"),
        ([("high", "low"), ("low", "normal"), ("low", "high")], "cba"),
        ([("high", ""), ("normal", ""), ("low", "")], "abc"),
    ],
)
async def test_what_is_more_urgent_is_computed_first_and_the_header_has_the_last_word(
    said: list[tuple[str | None, str | None]], order: str
) -> None:
    engine = kit.FakeEngine(batch_inputs=1)
    engine.block()

    async with kit.running_service(engine) as running:
        first = asyncio.create_task(ask_with(running, "first", None, None))
        await asyncio.to_thread(engine.wait_until_computing)
        tasks = [first]
        for text, (body, header) in zip("abc", said, strict=True):
            tasks.append(asyncio.create_task(ask_with(running, text, body, header)))
            await waiting_tokenized(running, len(tasks))
        engine.release()
        replies = await asyncio.gather(*tasks)
        assert [reply.status for reply in replies] == [200] * 4
        computed = [batch[0][1] for batch in engine.calls]
        assert computed == [kit.fake_id(text) for text in ("first", *order)]


async def waiting_tokenized(running: RunningService, inputs: int) -> None:
    """Return when so many inputs are admitted, and known to be one word each."""
    async with asyncio.timeout(kit.DEADLINE_S):
        while True:
            backlog = running.backlog
            if (backlog.inputs, backlog.tokens) == (inputs, 3 * inputs):
                return
            await asyncio.sleep(0)


@pytest.mark.parametrize("word", ["urgent", "1", "high, low", "hig"])
async def test_a_priority_in_a_header_that_is_none_is_400_and_names_it(
    word: str,
) -> None:
    async with kit.running_service() as running:
        reply = await ask_with(running, "a", "high", word)
        assert (reply.status, reply.error["param"]) == (400, "x-priority")
        assert "high, normal, low" in reply.error["message"]
        assert running.backlog.inputs == 0


# --- partial results ---


async def test_an_input_that_fails_is_an_error_in_its_place_if_that_is_asked_for() -> (
    None
):
    async with kit.running_service() as running:
        ask = {"input": ["a", "nan", _LONG, "b c", "boom"], "allow_partial": True}
        reply = await running.ask("POST", URL, ask)
        assert reply.status == 200
        assert set(reply.json) == {"object", "data", "model", "usage"}
        data = reply.json["data"]
        assert [item["index"] for item in data] == [0, 1, 2, 3, 4]
        for index, text in ((0, "a"), (3, "b c")):
            assert data[index]["object"] == "embedding"
            vector = data[index]["embedding"]
            assert vector == pytest.approx(expected(text).tolist(), abs=1e-7)
        codes = {1: "nonfinite_embedding", 2: "context_length_exceeded"}
        for index, code in (codes | {4: "engine_failed"}).items():
            assert set(data[index]) == {"object", "index", "error"}
            assert data[index]["object"] == "error"
            error = data[index]["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (error["code"], error["param"]) == (code, f"input[{index}]")
        assert running.backlog.inputs == 0


@pytest.mark.parametrize("partial", [None, False])
async def test_one_input_that_fails_is_the_request_s_failure_if_nothing_is_said(
    partial: bool | None,
) -> None:
    async with kit.running_service() as running:
        ask = {"input": ["a", _LONG], "allow_partial": partial}
        reply = await running.ask("POST", URL, ask)
        assert (reply.status, reply.error["param"]) == (400, "input[1]")


async def test_what_holds_no_inputs_is_400_also_where_partial_results_are_allowed() -> (
    None
):
    async with kit.running_service() as running:
        inputs: Any
        for inputs in ("", [], 5, {}, [5, -1]):
            ask = {"input": inputs, "allow_partial": True}
            assert (await running.ask("POST", URL, ask)).status == 400


async def test_partial_results_in_base64_and_fewer_dimensions_are_as_ever() -> None:
    async with kit.running_service() as running:
        ask = {"input": ["nan", "a"], "allow_partial": True, "dimensions": 4}
        reply = await running.ask("POST", URL, ask | {"encoding_format": "base64"})
        failed, good = reply.json["data"]
        assert failed["error"]["code"] == "nonfinite_embedding"
        assert len(base64.b64decode(good["embedding"], validate=True)) == 4 * 4


async def test_what_is_not_finished_in_time_is_an_error_beside_what_is() -> None:
    engine = kit.FakeEngine()

    async with kit.running_service(engine) as running:
        assert (await running.ask("POST", URL, {"input": "a"})).status == 200
        engine.block()
        ask = {"input": ["a", "b"], "allow_partial": True}
        reply = await running.ask("POST", URL, ask, x_request_timeout="0.3")
        assert reply.status == 200
        done, late = reply.json["data"]
        assert done["embedding"] == pytest.approx(expected("a").tolist(), abs=1e-7)
        assert (late["object"], late["index"]) == ("error", 1)
        assert late["error"]["code"] == "request_timeout"
        plain = await running.ask(
            "POST", URL, {"input": ["a", "b"]}, x_request_timeout="0.3"
        )
        assert (plain.status, plain.error["code"]) == (504, "request_timeout")
        assert running.backlog.inputs == 0


# --- how long a client waits ---

PATIENCE = {  # what a head says: the seconds left of 600
    (): 600,
    (("x-request-timeout", "5"),): 5,
    (("x-request-timeout", "0.25"),): 0.25,
    (("x-request-timeout", "0"),): 0,
    # a deadline minus the time, as Python writes it
    (("x-request-timeout", "29.834728479385376"),): 29.834728479385376,
    (("x-request-timeout", "601"),): 600,
    (("x-request-timeout", "999999999"),): 600,
    (("x-stainless-read-timeout", "7.0"),): 7,
    (("x-stainless-read-timeout", "0.00012345678901234567"),): 0.00012345678901234567,
    (("x-stainless-read-timeout", "7"),): 8,  # Java's, cut from up to 7.999
    (("x-stainless-timeout", "8"),): 9,  # Node's and Go's likewise
    (("x-stainless-timeout", "0"),): 1,
    (("x-stainless-read-timeout", "0"),): 1,
    (("x-stainless-timeout", "600"),): 600,
    (("x-stainless-timeout", "600.0"),): 600,
    (("x-stainless-read-timeout", "None"),): 600,
    (("x-stainless-timeout", "soon"),): 600,
    (("x-stainless-timeout", "-1"), ("x-request-timeout", "9")): 9,
    (("x-stainless-read-timeout", "3"), ("x-request-timeout", "9")): 4,
    (("x-stainless-timeout", "9"), ("x-request-timeout", "3")): 3,
}


@pytest.mark.parametrize("pairs", PATIENCE)
def test_a_client_waits_as_long_as_it_says_and_we_allow(
    pairs: tuple[tuple[str, str], ...],
) -> None:
    head = es.Head("POST", URL, "", 1, pairs, 0)
    assert es.client_timeout_s(head, 600.0) == PATIENCE[pairs]


BAD_TIMES = ["soon", "-1", "+1", "1e3", "1.", ".5", "1_0", "inf", "nan", "5s", "1, 2"]


@pytest.mark.parametrize("value", BAD_TIMES)
async def test_a_timeout_that_is_no_number_is_400_and_names_the_header(
    value: str,
) -> None:
    async with kit.running_service() as running:
        reply = await running.ask("POST", URL, {"input": "a"}, x_request_timeout=value)
        assert (reply.status, reply.error["param"]) == (400, "x-request-timeout")
        backlog = running.served.pool.queue.backlog
        assert backlog.inputs == backlog.tokens == 0


@pytest.mark.parametrize(
    "name", ["x_request_timeout", "x_stainless_timeout", "x_stainless_read_timeout"]
)
async def test_a_request_that_may_take_less_than_the_setting_is_504_by_then(
    name: str,
) -> None:
    engine = kit.FakeEngine()

    async with kit.running_service(engine) as running:
        assert (await running.ask("POST", URL, {"input": "a"})).status == 200
        await asyncio.to_thread(engine.wait_until_computing)
        engine.block()
        reply = await running.ask("POST", URL, {"input": "b"}, **{name: "0.25"})
        assert (reply.status, reply.error["code"]) == (504, "request_timeout")
        for part in ("0.25 s", "--request-timeout-s is 600"):
            assert part in reply.error["message"]
        # Nobody waits for it: the call that ran has been ended.
        await asyncio.to_thread(engine.wait_until_computing)
        assert engine.aborts == 1
        engine.release()
        assert (await running.ask("POST", URL, {"input": "c"})).status == 200


@pytest.mark.parametrize("name", ["x_stainless_timeout", "x_stainless_read_timeout"])
async def test_a_timeout_that_an_sdk_has_cut_to_0_seconds_leaves_time_for_work(
    name: str,
) -> None:
    async with kit.running_service() as running:
        reply = await running.ask("POST", URL, {"input": "a"}, **{name: "0"})
        assert reply.status == 200


async def test_no_request_may_take_longer_than_the_setting() -> None:
    engine = kit.FakeEngine()

    async with kit.running_service(engine, request_timeout_s=1.1) as running:
        assert (await running.ask("POST", URL, {"input": "a"})).status == 200
        engine.block()
        long = {"x_request_timeout": "600"}
        reply = await running.ask("POST", URL, {"input": "b"}, **long)
        assert (reply.status, reply.error["code"]) == (504, "request_timeout")


# --- models, ids ---


async def test_models_are_listed_with_their_aliases() -> None:
    async with kit.running_service(model_alias=("org/short",)) as running:
        for path in ("/v1/models", "/models"):
            listed = (await running.ask("GET", path)).json
            assert listed["object"] == "list"
            assert [m["id"] for m in listed["data"]] == ["fake", "org/short"]
        one = await running.ask("GET", "/v1/models/org/short")
        encoded = await running.ask("GET", "/v1/models/org%2Fshort")
        assert one.json == encoded.json
        assert one.json["object"] == "model"
        assert isinstance(one.json["created"], int)
        missing = await running.ask("GET", "/v1/models/nope")
        assert missing.error["code"] == "model_not_found"


async def test_a_model_says_which_weights_it_has_and_of_which_file(
    tmp_path: Path,
) -> None:
    file = kit.fake_gguf(tmp_path)

    async with kit.running_service(
        kit.FakeEngine(weights="bf16"), model_path=str(file)
    ) as running:
        (listed,) = (await running.ask("GET", "/v1/models")).json["data"]
        assert (await running.ask("GET", "/v1/models/fake")).json == listed
        meta = listed["meta"]
        assert meta["weights"] == "bf16"
        assert meta["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert (meta["n_embd"], meta["pooling"]) == (8, "mean")


async def test_a_well_formed_request_id_is_kept_and_another_is_replaced() -> None:
    async with kit.running_service() as running:
        kept = await running.ask("GET", "/health", x_request_id="abc-1.2_Z")
        assert kept.headers["x-request-id"] == "abc-1.2_Z"
        for bad in ("a b", "x" * 65, 'a"b', "é"):
            reply = await running.ask("GET", "/health", x_request_id=bad)
            assert reply.headers["x-request-id"].startswith("req_")


async def test_each_request_is_one_log_line_with_its_figures() -> None:
    async with kit.running_service() as running:
        await running.ask("POST", URL, {"input": ["a", "b c"]}, x_request_id="my-id")
        (line,) = [x for x in running.log.getvalue().splitlines() if "my-id" in x]
        for part in (
            " request ",
            "method=POST path=/v1/embeddings status=200 model=fake inputs=2 tokens=7",
            "queue_ms=",
            "compute_ms=",
            "total_ms=",
        ):
            assert part in line


# --- gzip ---

MAY_ZIP = {"accept_encoding": "gzip, deflate, br"}


def headers(**named: str) -> es.Head:
    """A head that says no more than this."""
    pairs = tuple((name.replace("_", "-"), value) for name, value in named.items())
    return es.Head("GET", "/", "", 1, pairs, 0)


@pytest.mark.parametrize(
    ("value", "accepted"),
    [
        ("gzip", True),
        ("GZip", True),
        ("x-gzip", True),
        ("deflate, gzip", True),
        ("gzip;q=0.5, br;q=1", True),
        ("br,\tgzip ; q=1.000", True),
        ("gzip;q=0.001", True),
        (",, gzip ,,", True),
        ("gzip;", True),
        ("gzip;q=0", False),
        ("gzip; q=0.0", False),
        ("gzip ;q=0.000", False),
        ("GZIP;Q=0", False),
        ("gzip;q=0, *", False),
        ("br, gzip;q=0", False),
        # Who takes anything may not know what to do with it: curl sends no such thing.
        ("*", False),
        ("*;q=1, identity;q=0", False),
        ("", False),
        ("identity", False),
        ("deflate, br, zstd", False),
        ("gzipped, not-gzip, gzip2", False),
        ("br;gzip", False),
        (";q=1", False),
    ],
)
def test_gzip_is_accepted_by_name(value: str, accepted: bool) -> None:
    assert (es.accepted_coding(headers(accept_encoding=value)) == "gzip") is accepted


def test_gzip_may_be_accepted_on_a_line_of_its_own() -> None:
    pairs = (("accept-encoding", "br"), ("accept-encoding", "gzip"))
    assert es.accepted_coding(es.Head("GET", "/", "", 1, pairs, 0)) == "gzip"
    assert not es.accepted_coding(headers())
    assert not es.accepted_coding(headers(content_encoding="gzip"))


@given(st.text("gzip;q=0.1 *,-x\t\N{SNOWMAN}"))
def test_any_accept_encoding_is_a_known_coding_or_none(value: str) -> None:
    found = es.accepted_coding(headers(accept_encoding=value))
    assert found in ("", *es.KNOWN_CODINGS)


@pytest.mark.parametrize(
    ("peer", "is_here"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        (es.UNIX_PEER, True),
        ("", False),  # of nobody knows whom
        ("10.0.0.1", False),
        ("128.0.0.1", False),
        ("12.7.0.1", False),
        ("192.168.127.1", False),
        ("fe80::1", False),
        ("2001:db8::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:10.127.0.1", False),
        ("::", False),
        ("::1:2", False),
    ],
)
def test_this_machine_is_the_loopback(peer: str, is_here: bool) -> None:
    assert es.is_this_machine(peer) is is_here


@pytest.mark.parametrize("n_embd", [200, 40_000], ids=["small", "large"])
async def test_floats_are_gzipped_for_who_accepts_it(n_embd: int) -> None:
    async with kit.running_service(
        kit.FakeEngine(n_embd=n_embd), gzip="all"
    ) as running:
        ask = {"input": ["a", "b"]}
        plain = await running.ask("POST", URL, ask)
        assert (len(plain.body) > 1 << 16) == (n_embd > 1000), "and so off the loop"
        for accept in ("gzip", "br, gzip;q=0.1"):
            zipped = await running.ask("POST", URL, ask, accept_encoding=accept)
            assert zipped.headers["content-encoding"] == "gzip"
            assert int(zipped.headers["content-length"]) == len(zipped.body)
            assert len(zipped.body) < 0.6 * len(plain.body)
            assert zlib.decompress(zipped.body, 16 + zlib.MAX_WBITS) == plain.body
            assert zipped.headers["content-type"] == "application/json"
        for reply in (plain, zipped):
            assert reply.headers["vary"] == "accept-encoding"
        for accept in ("br", "gzip;q=0", "*"):
            other = await running.ask("POST", URL, ask, accept_encoding=accept)
            assert "content-encoding" not in other.headers
            assert other.headers["vary"] == "accept-encoding"
            assert other.body == plain.body


async def test_what_fits_into_a_packet_is_not_gzipped() -> None:
    async with kit.running_service(gzip="all") as running:
        seen = set()
        for inputs in range(1, 30):
            ask = {"input": [f"w{n}" for n in range(inputs)]}
            size = len((await running.ask("POST", URL, ask)).body)
            reply = await running.ask("POST", URL, ask, **MAY_ZIP)
            assert ("content-encoding" in reply.headers) == (size > 1400)
            assert ("vary" in reply.headers) == (size > 1400)
            seen.add(size > 1400)
        assert seen == {False, True}


async def test_base64_is_never_gzipped() -> None:
    async with kit.running_service(
        kit.FakeEngine(n_embd=40_000), gzip="all"
    ) as running:
        ask = {"input": ["a", "b"], "encoding_format": "base64"}
        reply = await running.ask("POST", URL, ask, **MAY_ZIP)
        assert len(reply.body) > 1 << 16
        assert not {"content-encoding", "vary"} & set(reply.headers)
        assert len(reply.json["data"]) == 2


async def test_errors_are_never_gzipped() -> None:
    async with kit.running_service(gzip="all") as running:
        long = "x" * 5000
        asks = [
            ("POST", URL, {"input": [long] * 2 + [""]}, 400),
            ("POST", URL, {"input": "a", "model": long}, 404),
            ("GET", f"/{long}", None, 404),
            ("GET", URL, None, 405),
        ]
        for method, path, body, status in asks:
            reply = await running.ask(method, path, body, **MAY_ZIP)
            assert reply.status == status
            assert "content-encoding" not in reply.headers
            assert reply.error["message"]


async def test_what_is_short_is_not_gzipped_nor_its_head() -> None:
    async with kit.running_service(gzip="all") as running:
        for path in ("/health", "/ready", "/v1/models", "/v1/models/fake"):
            for method in ("GET", "HEAD"):
                reply = await running.ask(method, path, **MAY_ZIP)
                assert reply.status == 200
                assert "content-encoding" not in reply.headers
                assert reply.headers.get("vary") in (None, "accept")
        head = await running.ask("HEAD", URL, **MAY_ZIP)
        assert (head.status, head.body) == (405, b"")
        assert "content-encoding" not in head.headers


async def test_what_lists_much_is_gzipped_for_who_accepts_it() -> None:
    async with kit.running_service(
        gzip="all", model_alias=tuple(f"m{n}" for n in range(50))
    ) as running:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/docs"):
            plain = await running.ask("GET", path)
            assert len(plain.body) > 1400
            zipped = await running.ask("GET", path, **MAY_ZIP)
            head = await running.ask("HEAD", path, **MAY_ZIP)
            assert zipped.headers["content-encoding"] == "gzip"
            assert head.headers["content-encoding"] == "gzip"
            unzipped = zlib.decompress(zipped.body, 16 + zlib.MAX_WBITS)
            assert path == "/metrics" or unzipped == plain.body
            assert plain.headers["vary"] == "accept-encoding"


async def answered(running: RunningService, peer: str) -> es.Response:
    """What a client with this address would be sent."""
    body = es.json_codec().dumps({"input": ["a", "b"]})
    named = (("content-type", "application/json"), ("accept-encoding", "gzip"))
    head = es.Head("POST", URL, "", 1, named, len(body))
    dispatcher = es.Dispatcher(running.service, kit.quiet_log(), None, None)
    ticket = dispatcher.admit(head, kit.direct(peer))
    room = es.Reservation(running.service.connections)
    return await dispatcher.respond(es.Request(head, body), ticket, room)


@pytest.mark.parametrize(
    ("gzip", "here", "there"),
    [("remote", False, True), ("all", True, True), ("off", False, False)],
)
async def test_who_is_on_this_machine_is_spared_the_time_for_gzip(
    gzip: str, here: bool, there: bool
) -> None:
    assert es.load_settings({}, {}).settings.gzip == "remote"
    async with kit.running_service(kit.FakeEngine(n_embd=200), gzip=gzip) as running:
        over_loopback = await running.ask("POST", URL, {"input": ["a", "b"]}, **MAY_ZIP)
        assert ("content-encoding" in over_loopback.headers) == here
        # A cache in between must know that it depends on the client.
        assert over_loopback.headers.get("vary") == (
            None if gzip == "off" else "accept-encoding"
        )
        for peer, is_zipped in (("::1", here), ("10.0.0.1", there), ("fe80::2", there)):
            response = await answered(running, peer)
            sent = dict(response.headers)
            assert (sent.get("content-encoding") == "gzip") == is_zipped
            assert (sent.get("vary") is None) == (gzip == "off")
            assert (response.body[:2] == b"\x1f\x8b") == is_zipped


# --- trouble ---


async def test_a_vector_that_is_not_finite_is_never_sent_and_harms_no_neighbour() -> (
    None
):
    engine = kit.FakeEngine()
    engine.block()

    async with kit.running_service(engine) as running:
        # The first occupies the only worker, so that the others share a batch.
        first = asyncio.create_task(running.ask("POST", URL, {"input": "x"}))
        await asyncio.to_thread(engine.wait_until_computing)
        asks = ({"input": ["a", "nan"]}, {"input": "b"})
        tasks = [asyncio.create_task(running.ask("POST", URL, ask)) for ask in asks]
        async with asyncio.timeout(kit.DEADLINE_S):
            while running.backlog.inputs < 4:
                await asyncio.sleep(0)
        engine.release()
        bad, good = await asyncio.gather(*tasks)
        assert (await first).status == 200
        assert bad.status == 500
        assert bad.error["code"] == "nonfinite_embedding"
        assert bad.error["param"] == "input[1]"
        assert good.status == 200
        assert b"null" not in good.body.replace(b'"param":null', b"")


async def test_a_vector_that_was_not_finite_once_is_computed_again() -> None:
    engine = kit.FakeEngine()
    engine.failures[kit.fake_id("nan")] = 1

    async with kit.running_service(engine) as running:
        reply = await running.ask("POST", URL, {"input": ["a", "nan"]})
        vector = reply.json["data"][1]["embedding"]
        assert vector == pytest.approx(expected("nan").tolist(), abs=1e-7)
        metrics = (await running.ask("GET", "/metrics")).body.decode()
        assert 'embellama_inputs_retried_total{outcome="recovered"} 1\n' in metrics


async def test_a_full_queue_is_503_at_once_and_says_when_to_come_back() -> None:
    engine = kit.FakeEngine()
    engine.block()

    async with kit.running_service(engine, queue_size=2) as running:
        first = asyncio.create_task(running.ask("POST", URL, {"input": ["a", "b"]}))
        await asyncio.to_thread(engine.wait_until_computing)
        refused = await running.ask("POST", URL, {"input": "c"})
        assert refused.status == 503
        assert refused.error["code"] == refused.error["type"] == "overloaded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert 1000 <= int(refused.headers["retry-after-ms"]) <= 60000
        # A list is refused like a string (TEI let lists through).
        assert (await running.ask("POST", URL, {"input": ["c"]})).status == 503
        engine.release()
        assert (await first).status == 200
        assert (await running.ask("POST", URL, {"input": "c"})).status == 200


async def test_a_flood_of_refusals_is_counted_but_not_logged_one_by_one() -> None:
    engine = kit.FakeEngine()
    engine.block()

    async with kit.running_service(engine, queue_size=1) as running:
        first = asyncio.create_task(running.ask("POST", URL, {"input": "a"}))
        await asyncio.to_thread(engine.wait_until_computing)
        begun = asyncio.get_running_loop().time()
        for _ in range(50):
            refused = await running.ask("POST", URL, {"input": "b"})
            assert refused.headers["x-should-retry"] == "true"
        seconds = asyncio.get_running_loop().time() - begun
        running.server._tick()  # what is not said yet
        lines = running.log.getvalue().splitlines()
        said = [line for line in lines if " refused " in line]
        assert 1 <= len(said) <= 2 + seconds
        assert (
            sum(int(line.partition("overloaded=")[2].split()[0]) for line in said) == 50
        )
        assert not [line for line in lines if "status=503" in line]
        telemetry = running.service.telemetry
        assert telemetry.value("embellama_errors_total", "overloaded") == 50
        assert telemetry.value("embellama_http_requests_total", "5xx") == 50
        engine.release()
        assert (await first).status == 200


async def test_a_request_that_takes_too_long_is_504_and_its_work_is_dropped() -> None:
    engine = kit.FakeEngine()
    engine.block()

    async with kit.running_service(engine, request_timeout_s=0.2) as running:
        reply = await running.ask("POST", URL, {"input": ["a", "b"]})
        assert (reply.status, reply.error["code"]) == (504, "request_timeout")
        engine.release()
        assert (await running.ask("POST", URL, {"input": "c"})).status == 200
        assert running.backlog.inputs == 0


async def test_a_bug_is_500_without_details_and_the_log_has_the_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> bytes:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(es, "embeddings_object", broken)

    async with kit.running_service() as running:
        reply = await running.ask("POST", URL, {"input": "a"})
        assert (reply.status, reply.error["code"]) == (500, "internal_error")
        assert "secret detail" not in reply.body.decode()
        assert "secret detail" in running.log.getvalue()
