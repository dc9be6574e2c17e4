"""LLAMA SERVER: what llama-server's own routes tell, over a model that is a fake."""

from __future__ import annotations

import re
from typing import Any

import pytest

import embellama_server as es
from tests import both, chat_models, kit
from tests.test_chat import CHAT, COMPLETIONS, HELLO, Stream, ask, chatting, streamed

TIMINGS = [
    "cache_n",
    *(f"prompt_{name}" for name in ("n", "ms", "per_token_ms", "per_second")),
    *(f"predicted_{name}" for name in ("n", "ms", "per_token_ms", "per_second")),
]


async def got(running: kit.RunningService, path: str) -> Any:
    """What a route answers; it must be a 200."""
    reply = await running.ask("GET", path)
    assert reply.status == 200, reply.body
    assert reply.headers["cache-control"] == "no-store"
    return reply.json


# --- what is loaded ---


async def test_props_tell_how_the_model_is_served_and_not_where_it_lies() -> None:
    async with chatting(parallel=3, max_tokens=77) as (running, _):
        found = await got(running, "/props")
        assert found["default_generation_settings"]["n_ctx"] == 32
        params = found["default_generation_settings"]["params"]
        assert params["temperature"] == es.SamplingOptions().temperature
        assert params["n_predict"] == params["max_tokens"] == 77
        assert found["total_slots"] == 3
        assert found["model_alias"] == found["model_path"] == "fake"
        assert found["chat_template"] == "fake"
        assert (found["bos_token"], found["eos_token"]) == ("<s>", "</s>")
        assert found["build_info"] == f"embellama_{es.__version__}"
        assert found["modalities"] == {"vision": False, "audio": False, "video": False}
        assert not found["is_sleeping"]
        assert (await running.ask("GET", "/props?model=nobody")).status == 404


async def test_props_are_of_the_model_that_generates_unless_another_is_named() -> None:
    async with kit.running_service(**kit.all_routes()) as running:
        assert (await got(running, "/props"))["model_alias"] == kit.CHATTER
        other = await got(running, "/props?model=fake")
        assert (other["model_alias"], other["chat_template"]) == ("fake", "")
        assert all(not one["is_processing"] for one in await got(running, "/slots"))


# --- places ---


async def test_slots_tell_of_replies_that_grow_without_their_texts() -> None:
    async with chatting(parallel=4) as (running, speaker):
        idle = {"n_ctx": 32, "speculative": True, "is_processing": False}
        assert await got(running, "/slots") == [{"id": n, **idle} for n in range(4)]
        speaker.pause()
        async with Stream(running, CHAT, n=2, max_tokens=9, seed=5) as stream:
            await speaker.heard()
            speaker.step(2)
            await stream.until("my")
            first, second, *rest = await got(running, "/slots")
            assert [one["is_processing"] for one in rest] == [False, False]
            assert second == first | {"id": 1}
            assert first["is_processing"]
            assert first["n_prompt_tokens"] == first["n_prompt_tokens_processed"] == 3
            assert first["n_prompt_tokens_cache"] == 0
            assert first["params"]["seed"] == 5
            (left,) = first["next_token"]
            assert (left["n_remain"], left["n_decoded"]) == (7, 2)
            assert "hello" not in str(first)


async def test_slots_may_be_asked_to_fail_if_none_is_free() -> None:
    async with chatting(parallel=1) as (running, speaker):
        await got(running, "/slots?fail_on_no_slot=1")
        speaker.pause()
        async with Stream(running, CHAT) as stream:
            await speaker.heard()
            speaker.step()
            await stream.until("hello")
            await got(running, "/slots")
            reply = await running.ask("GET", "/slots?fail_on_no_slot=1")
            assert (reply.status, reply.error["message"]) == (503, "no slot available")


# --- texts ---


async def test_the_template_is_applied_and_nothing_is_computed() -> None:
    async with chatting() as (running, speaker):
        reply = await running.ask("POST", "/apply-template", {"messages": HELLO})
        assert (reply.status, reply.json) == (200, {"prompt": "hello my friend"})
        assert speaker.generations == []
        messages, options = speaker.engine.template.asked[-1]
        assert messages == HELLO
        assert options["add_generation_prompt"]
        await running.ask(
            "POST",
            "/apply-template",
            {"messages": HELLO, "add_generation_prompt": False},
        )
        assert not speaker.engine.template.asked[-1][1]["add_generation_prompt"]
        speaker.engine.template.refusal = es.TemplateRefused("no", param="messages")
        reply = await running.ask("POST", "/apply-template", {"messages": HELLO})
        assert (reply.status, reply.error["code"]) == (400, "template_error")


@pytest.mark.parametrize("make", [chat_models.tiny_qwen, chat_models.tiny_llama])
def test_content_becomes_tokens_and_they_become_content(
    tmp_path: Any, make: Any
) -> None:
    script = str(kit.ROOT / "embellama_server.py")
    flags = ("--model-path", f"tiny={make(tmp_path)}")
    with kit.started(*flags, module=(script,)) as server:
        client = both.Client(server.url)

        def tokens(text: str, **more: Any) -> list[Any]:
            reply = client.post("/tokenize", {"content": text} | more)
            assert reply.status == 200, reply.body
            found: list[Any] = reply.json["tokens"]
            return found

        text = "hello \U0001f600 my <|im_end|>\n friend"
        ids = tokens(text)
        reply = client.post("/detokenize", {"tokens": ids})
        assert reply.json["content"].lstrip(" ") == text
        pieces = tokens(text, with_pieces=True)
        assert [one["id"] for one in pieces] == ids
        raw = [
            bytes(one["piece"])
            if isinstance(one["piece"], list)
            else one["piece"].encode()
            for one in pieces
        ]
        assert b"".join(raw).decode().lstrip(" ") == text
        plain = tokens(text, parse_special=False)
        assert len(plain) >= len(ids)
        whole = tokens(text, add_special=True)
        begins_with_bos = make is chat_models.tiny_llama
        assert whole[begins_with_bos:] == ids
        assert tokens("") == []
        client.close()


# --- times ---


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_timings_are_told_if_asked_for(path: str) -> None:
    async with chatting() as (running, _):
        found = (await ask(running, path, timings_per_token=True)).json["timings"]
        assert list(found) == TIMINGS
        assert (found["prompt_n"], found["predicted_n"], found["cache_n"]) == (3, 4, 0)
        assert "timings" not in (await ask(running, path)).json
        chunks = await streamed(running, path, timings_per_token=True)
        assert all(list(chunk["timings"]) == TIMINGS for chunk in chunks)
        assert chunks[-1]["timings"]["predicted_n"] == 4
        options = {"include_usage": True}
        *_, last = await streamed(
            running, path, timings_per_token=True, stream_options=options
        )
        assert last["timings"]["predicted_n"] == last["usage"]["completion_tokens"] == 4
        plain = await streamed(running, path)
        assert all("timings" not in chunk for chunk in plain)


async def test_no_rate_is_negative_while_replies_have_not_begun() -> None:
    async with chatting() as (running, _):
        for body in ({"max_tokens": 0}, {"prompt": ["a"] * 4, "stream": True}):
            reply = await running.ask(
                "POST", COMPLETIONS, {"prompt": "a", "timings_per_token": True} | body
            )
            assert reply.status == 200
            rates = re.findall(rb'"predicted_per_second": ?(-?[0-9.]+)', reply.body)
            assert rates and min(map(float, rates)) >= 0
