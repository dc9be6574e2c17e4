"""COMPUTE: from a request to its result, with a model and an event loop but no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import embellama_server as es
from tests import kit


class Place:
    """A loaded model, and what compute() charges and asks of who calls it."""

    def __init__(self, engine: kit.FakeEngine, **changes: Any) -> None:
        loop = asyncio.get_running_loop()
        self.settings = kit.settings(**changes)
        self.engine = engine
        self.charges: list[int] = []
        self.late: es.ApiError | None = None
        self.pool = kit.pool(engine, deliver=loop.call_soon_threadsafe)
        self.entry = es.ModelEntry(self.settings)
        self.model = es.LoadedModel(self.settings, es.ModelFacts(), 0, self.pool, {})

    async def compute(self, *inputs: es.Input, **wanted: Any) -> es.EmbedResult:
        """Prepare and compute a request."""
        request = es.EmbedRequest(inputs=inputs, **wanted)
        es.prepare(request, self.entry, self.model, self.settings)
        return await es.compute(
            request,
            self.entry,
            self.model,
            "client",
            charge=self.charges.append,
            late=lambda: self.late,
        )


@contextlib.contextmanager
def place(engine: kit.FakeEngine | None = None, **changes: Any) -> Iterator[Place]:
    """A place whose pool runs; at the end nobody holds its model."""
    made = Place(engine or kit.FakeEngine(), **changes)
    made.pool.start()
    try:
        yield made
    finally:
        made.engine.release()
        assert made.pool.stop(kit.DEADLINE_S)
        assert made.model.holds == 0


async def test_a_request_is_computed_and_charged_for_what_it_took() -> None:
    with place() as at:
        result = await at.compute("one two", "three", model="mine")
        for text, row in zip(("one two", "three"), result.job.vectors, strict=True):
            ids = [1, *map(kit.fake_id, text.split()), 2]
            np.testing.assert_array_equal(row, kit.fake_row(ids))
        assert (result.name, result.job.tokens) == ("mine", 4 + 3)
        bound, rest = at.charges
        assert bound >= 7, "an upper bound before it is known"
        assert bound + rest == 7


async def test_a_prompt_of_the_settings_stands_around_each_text() -> None:
    with place(prompt=("ask=find {text} now",)) as at:
        result = await at.compute("it", prompt_name="ask")
        ids = [1, *map(kit.fake_id, ("find", "it", "now")), 2]
        np.testing.assert_array_equal(result.job.vectors[0], kit.fake_row(ids))
        with pytest.raises(es.InvalidValue, match="prompts of this model: ask"):
            await at.compute("it", prompt_name="other")


@pytest.mark.parametrize(
    ("one", "wanted", "error", "cost"),
    [
        (es.Pair("q", "text"), {}, es.WrongKindOfModel, 0),
        ("a", {"dimensions": 10**6}, es.InvalidValue, 0),
        ([5, 6], {}, es.TokenIdsRefused, 0),
        ("word " * 1000, {}, es.ContextLengthExceeded, 0),
        ("a b c", {"max_tokens": 2}, es.TooManyTokens, 5),
    ],
)
async def test_what_cannot_be_computed_is_an_error_and_costs_what_was_tokenized(
    one: es.Input, wanted: dict[str, Any], error: type[es.ApiError], cost: int
) -> None:
    with place() as at:
        with pytest.raises(error):
            await at.compute(one, **wanted)
        assert sum(at.charges) == cost


async def test_who_may_not_be_charged_is_not_computed() -> None:
    class Broke(Exception):
        pass

    with place() as at:

        def charge(tokens: int) -> None:
            raise Broke

        request = es.EmbedRequest(inputs=["a"])
        es.prepare(request, at.entry, at.model, at.settings)
        with pytest.raises(Broke):
            await es.compute(
                request, at.entry, at.model, "c", charge=charge, late=lambda: None
            )
        assert at.engine.calls == []


async def cancelled_in_the_middle(at: Place, **wanted: Any) -> es.EmbedResult:
    """What becomes of a request whose wait is cancelled while the engine computes it."""
    at.engine.block()
    task = asyncio.ensure_future(at.compute("a", "b", **wanted))
    await asyncio.to_thread(at.engine.wait_until_computing)
    assert at.model.holds == 1
    task.cancel()
    return await task


async def test_nobody_waits_any_more_and_the_work_is_given_up() -> None:
    with place() as at:
        with pytest.raises(asyncio.CancelledError):
            await cancelled_in_the_middle(at, allows_partial=True)
        assert at.pool.queue.backlog.inputs == 0
        assert sum(at.charges) == 3 + 3, "what was tokenized"


async def test_what_is_late_in_a_partial_request_is_an_error_in_its_place() -> None:
    with place() as at:
        at.late = es.RequestTimeout("too late")
        result = await cancelled_in_the_middle(at, allows_partial=True)
        assert result.job.errors == {0: at.late, 1: at.late}
        with pytest.raises(asyncio.CancelledError):
            await cancelled_in_the_middle(at, allows_partial=False)


async def test_a_tokenizer_thread_does_other_work_too() -> None:
    with place() as at:
        assert await es.run_on_tokenizer(lambda: 6 * 7, at.model, "client", 1) == 42
        with pytest.raises(ZeroDivisionError):
            await es.run_on_tokenizer(lambda: 1 // 0, at.model, "client", 1)
