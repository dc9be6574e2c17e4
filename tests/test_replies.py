"""REPLIES: from messages to replies as they grow, without HTTP.

What generates is a fake that says again what it is told: see kit.Speaker.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Any

import pytest

import embellama_server as es
from tests import kit


def loaded(engine: kit.FakeChatEngine, **changes: Any) -> es.LoadedModel:
    """A model in memory, whose speaker is told when to speak."""
    engine.speaker.pause()
    pool = kit.speaking_pool(engine)
    return es.LoadedModel(kit.settings(**changes), es.ModelFacts(), 0, pool, {})


class Asked:
    """Replies to prompts, and what was charged for them."""

    def __init__(self, *prompts: str, **wanted: Any) -> None:
        self.engine = kit.FakeChatEngine()
        self.speaker = self.engine.speaker
        self.model = loaded(self.engine)
        self.entry = es.ModelEntry(self.model.settings)
        self.charged: list[tuple[int, bool]] = []
        request = es.ReplyRequest(prompts=prompts, **wanted)
        requests = [
            es.generation_request(request, self.engine.encode(one), self.model, 20)
            for one in prompts
        ]
        self.replies = es.Replies(
            requests=requests,
            entry=self.entry,
            loaded_model=self.model,
            name="fake",
            client="me",
            priority=2,
            timeout_s=7.0,
            charge=self.charge,
        )

    def charge(self, tokens: int, *, are_used: bool = False) -> None:
        """As a gate does it; 1,000 are too many."""
        if tokens >= 1000:
            raise es.TokensLimited("no")
        self.charged.append((tokens, are_used))

    async def said(self) -> list[tuple[int, str]]:
        """What has come since the last time."""
        return [(delta.index, delta.text) for delta in await self.replies.more(0)]

    async def waited(self, seconds: float) -> float:
        """How long it waits for more, in seconds, if nothing comes for so many."""
        begun = time.monotonic()
        assert await self.replies.more(begun + seconds) == []
        return time.monotonic() - begun


async def test_replies_grow_within_their_block_and_the_model_is_held() -> None:
    asked = Asked("a b")
    assert asked.speaker.generations == []
    with asked.replies as replies:
        assert asked.model.holds == 1
        assert asked.charged == [(2, False)]
        (generation,) = asked.speaker.generations
        assert (generation.client, generation.priority) == ("me", 2)
        assert generation.timeout_s == 7.0
        assert await asked.said() == []
        asked.speaker.step()
        assert await asked.said() == [(0, "a")]
        asked.speaker.step(2)
        assert await asked.said() == [(0, " b")]
        assert replies.are_over
        assert await replies.more() == []
    assert asked.model.holds == 0
    assert asked.charged == [(2, False), (3, True)]
    assert asked.speaker.cancelled == []
    assert time.monotonic() - asked.entry.used_at < kit.DEADLINE_S


async def test_more_waits_until_there_is_some() -> None:
    asked = Asked("a b")
    with asked.replies as replies:
        task = asyncio.create_task(replies.more())
        await asyncio.sleep(0)
        assert not task.done()
        asked.speaker.step()
        assert [delta.text for delta in await task] == ["a"]
        assert await asked.waited(0.02) >= 0.02


async def test_more_ends_in_time_whatever_it_waited_for_before() -> None:
    asked = Asked("a b c")
    with asked.replies as replies:
        for seconds in (60.0, 30.0):  # neither passes
            task = asyncio.create_task(replies.more(time.monotonic() + seconds))
            await asyncio.sleep(0)
            asked.speaker.step()
            assert await task
        for seconds in (0.02, 0.01, 0.03, 0.03):
            assert seconds <= await asked.waited(seconds) < kit.DEADLINE_S


@pytest.mark.parametrize("turns", range(6))
async def test_who_is_cancelled_as_more_comes_is_cancelled(turns: int) -> None:
    """asyncio.wait_for of Python 3.11 returned instead, and the reply went on unheard."""
    asked = Asked("a b")
    with asked.replies as replies:
        task = asyncio.create_task(replies.more(time.monotonic() + 60))
        await asyncio.sleep(0)
        asked.speaker.step()
        for _ in range(turns):
            await asyncio.sleep(0)
        was_done = task.done()
        assert task.cancel() is not was_done
        await asyncio.wait([task])
        assert task.cancelled() is not was_done


async def test_leaving_the_block_early_ends_the_work() -> None:
    asked = Asked("a b", "c d")
    with asked.replies:
        asked.speaker.step()
    assert asked.speaker.cancelled == asked.speaker.generations
    assert asked.model.holds == 0
    assert asked.charged == [(4, False), (2, True)]


async def test_what_was_never_read_is_given_back() -> None:
    asked = Asked("a b")
    with asked.replies:
        pass
    assert asked.charged == [(2, False), (-2, True)]


async def test_who_has_no_tokens_left_is_refused_before_anything_is_asked() -> None:
    asked = Asked("a b")
    asked.replies.requests[0].ids = [1] * 1000
    with pytest.raises(es.TokensLimited), asked.replies:
        pass
    assert (asked.charged, asked.speaker.generations) == ([], [])
    assert asked.model.holds == 0


async def test_a_request_that_is_refused_leaves_nothing_behind() -> None:
    asked = Asked("a", "b", "c")
    asked.speaker.refusal = es.Overloaded("full")
    with pytest.raises(es.Overloaded), asked.replies:
        pass
    assert not (asked.speaker.generations or asked.replies.generations)
    assert asked.model.holds == 0
    assert asked.charged == [(3, False), (-3, True)]


async def test_replies_are_numbered_over_all_prompts() -> None:
    asked = Asked("a", "b", n=2)
    with asked.replies as replies:
        assert (replies.count, replies.n, replies.prompt_tokens) == (4, 2, 2)
        asked.speaker.step()
        assert await asked.said() == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
        asked.speaker.step()
        assert replies.tokens == 8


async def test_an_error_comes_after_what_came_before_it() -> None:
    asked = Asked("a b", "c d")
    with asked.replies as replies:
        asked.speaker.step()
        asked.speaker.fail(es.EngineFailed("NaN"))
        assert await asked.said() == [(0, "a"), (1, "c")]
        with pytest.raises(es.EngineFailed):
            await replies.more()


async def test_a_reply_that_ends_while_it_is_looked_at_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Asked("a b")
    take = es.Generation.take

    def take_and_end(generation: es.Generation) -> list[es.Delta]:
        found = take(generation)
        if not generation.is_over:  # the generating thread goes on, and tells it later
            generation.put(es.Delta(0, "the end", tokens=1, finish_reason="length"))
            asked.speaker.end(generation)
            asyncio.get_running_loop().call_soon(generation.changed)
        return found

    with asked.replies as replies:
        asked.speaker.step()
        monkeypatch.setattr(es.Generation, "take", take_and_end)
        assert await asked.said() == [(0, "a")]
        assert not replies.are_over
        assert [delta.text for delta in await replies.more()] == ["the end"]
        assert await replies.more() == []


async def test_times_are_those_of_the_first_and_the_last() -> None:
    asked = Asked("a b", "c d")
    with asked.replies as replies:
        asked.speaker.step(3)
        first, last = asked.speaker.generations
        first.arrived_at, first.started_at, first.first_token_at = 1.0, 3.0, 4.0
        last.arrived_at, last.started_at, last.first_token_at = 2.0, 2.5, 6.0
        first.ended_at, last.ended_at = 5.0, 8.0
        times = replies.times
        assert (times.queue_s, times.prefill_s, times.decode_s) == (1.5, 1.5, 4.0)
        assert replies.tokens_per_s == (6 - 2) / 4.0
        first.step_rows, last.step_rows = 9, 3
        assert replies.step_rows == (9 + 3) / 6


async def test_a_reply_of_one_token_is_as_fast_as_its_prefill() -> None:
    asked = Asked("a b", max_tokens=1)
    with asked.replies as replies:
        asked.speaker.step()
        (one,) = asked.speaker.generations
        one.started_at, one.first_token_at, one.ended_at = 1.0, 3.0, 3.0
        assert replies.tokens_per_s == 0.5


async def test_replies_that_never_began_have_times_too() -> None:
    asked = Asked("a b")
    with asked.replies as replies:
        times = replies.times
        assert times.queue_s >= 0
        assert (times.prefill_s, times.decode_s, replies.step_rows) == (0, 0, 0)


# --- limits ---


def request_for(
    ids: Sequence[int], card: dict[str, Any], **wanted: Any
) -> es.GenerationRequest:
    """What is asked of a model for a prompt."""
    model = loaded(kit.FakeChatEngine("", **card))
    request = es.ReplyRequest(prompts=[[*ids]], **wanted)
    return es.generation_request(request, ids, model, 100)


@pytest.mark.parametrize(
    ("tokens", "wanted", "most"),
    [
        (10, {}, 100),  # the default
        (10, {"max_tokens": 7}, 7),
        (10, {"max_tokens": 0}, 0),
        (950, {}, 50),  # up to the end of the context
        (999, {"max_tokens": 5}, 1),
        (1000, {"max_tokens": 0}, 0),
        (10, {"n": 4, "max_tokens": 900}, 497),  # up to the last cell
    ],
)
def test_a_reply_ends_where_the_context_does(
    tokens: int, wanted: dict[str, Any], most: int
) -> None:
    card = {"max_input_tokens": 1000, "cells": 2000}
    found = request_for([1] * tokens, card, **wanted)
    assert found.max_tokens == most


@pytest.mark.parametrize(("tokens", "most"), [(1000, 1), (1001, 0), (5000, None)])
def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(
    tokens: int, most: int | None
) -> None:
    card = {"max_input_tokens": 1000, "cells": 2000}
    with pytest.raises(es.ContextLengthExceeded) as caught:
        request_for([1] * tokens, card, max_tokens=most)
    assert f"{tokens} tokens" in caught.value.message
    assert "1000" in caught.value.message


@pytest.mark.parametrize("where", ["messages", "tools", "variables"])
def test_texts_far_beyond_the_context_are_refused_before_they_are_looked_at(
    where: str,
) -> None:
    """30 MB of control tokens kept the thread that reads for 37 s."""
    model = loaded(kit.FakeChatEngine(max_input_tokens=10))
    model.template = template = kit.FakeTemplate()  # type: ignore[assignment]
    long = {"content": ["", {"<s>" * 214: 1}]}
    given: dict[str, Any] = {"messages": [{"content": "a"}], where: [long]}
    given["variables"] = long if where == "variables" else {}
    with pytest.raises(es.ContextLengthExceeded, match="640"):
        es._rendered_ids(es.ReplyRequest(**given), model)
    assert not template.asked


def test_more_control_tokens_than_the_context_holds_are_not_tokenized() -> None:
    model = loaded(kit.FakeChatEngine(max_input_tokens=10))
    model.template = kit.FakeTemplate()  # type: ignore[assignment]
    asked = es.ReplyRequest(messages=[{"content": "a"}] * 11)
    with pytest.raises(es.ContextLengthExceeded, match="11 tokens or more"):
        es._rendered_ids(asked, model)


def test_more_replies_than_there_are_cells_for_are_refused() -> None:
    card = {"max_input_tokens": 100, "cells": 93}
    assert request_for([1] * 90, card, n=3).max_tokens == 1
    with pytest.raises(es.ContextLengthExceeded, match=r"90 tokens, with n = 4$"):
        request_for([1] * 90, card, n=4)


@pytest.mark.parametrize("most", [0, 1, None])
def test_a_prompt_without_a_token_is_refused(most: int | None) -> None:
    """It was read as if token 0 had been said, and with 0 tokens to come ended all."""
    card = {"max_input_tokens": 100, "cells": 100}
    with pytest.raises(es.InvalidValue, match="prompt must become at least one token"):
        request_for([], card, max_tokens=most)


def test_no_bound_is_no_number() -> None:
    for name, (low, high, _) in es.SAMPLING_RANGES.items():
        assert math.isfinite(low) and math.isfinite(high), name
