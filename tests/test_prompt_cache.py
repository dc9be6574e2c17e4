"""Room PROMPT CACHE: cells, what is copied out of them and back. Against a model of
llama.cpp's memory, and against llama.cpp's own."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import embellama_server as es
from tests import chat_models
from tests.test_sequences import Memory
from tests.test_tiny_models import llama, opened

CELL_BYTES = 100
LARGE = 1 << 30


class MemoryContext:
    """A StepContext without llama.cpp: whose tokens are where."""

    def __init__(
        self, cells: int, sequences: int, *, window: int = 0, can_trim: bool = True
    ) -> None:
        self.cells, self.max_sequences = cells, sequences
        self.window, self.can_trim = window, can_trim
        self.memory = Memory()
        self.copied_out = 0
        self.has_room = True
        self.blocks_until_full = LARGE
        self.is_short_of_memory = False
        self.clears = 0

    def copy(self, source: int, target: int, length: int) -> None:
        self.memory.do([es.CopyCells(source, target, length)])

    def trim(self, sequence: int, length: int) -> bool:
        self.memory.do([es.RemoveCells(sequence, length)])
        return True

    def first_position(self, sequence: int) -> int:
        return self.memory.first.get(sequence, 0)

    def last_position(self, sequence: int) -> int:
        return len(self.memory.tokens(sequence)) - 1

    def clear(self, *, wipes: bool = True) -> None:
        del wipes
        self.clears += 1
        assert not any(self.memory.held.values()), "it was somebody's"

    def copy_out(self, sequence: int, begin: int, end: int) -> es.CellState:
        if self.is_short_of_memory:
            raise MemoryError
        self.copied_out += 1
        tokens = self.memory.tokens(sequence)[begin:end]
        assert len(tokens) == end - begin
        assert begin >= self.first_position(sequence), "it has a hole"
        state = np.zeros((end - begin) * CELL_BYTES, np.uint8)
        state[: len(tokens) + 1] = [begin, *tokens]
        return state

    def copy_in(self, sequence: int, state: es.CellState, begin: int, end: int) -> bool:
        if not self.has_room:
            return False
        if not self.blocks_until_full:
            # What is out of sight from where the sequence ends now was overwritten.
            last = max(0, begin - self.window + 1) if self.window else 0
            self.memory.first[sequence] = max(last, self.first_position(sequence))
            return False
        self.blocks_until_full -= 1
        at = int(state[0])
        assert len(self.memory.tokens(sequence)) == begin
        tokens = state[1 + begin - at : 1 + end - at].tolist()
        self.memory.compute(sequence, tokens)
        return True


def new_cache(
    context: MemoryContext, max_bytes: int = LARGE, counted: Any = None
) -> es.PromptCache:
    store = es.PrefixStore(max_bytes, token_bytes=CELL_BYTES, window=context.window)
    memory = cast(es.StepContext, context)
    return es.PromptCache(memory, store, counted or es.PromptCacheCounts())


def ids_of(*parts: tuple[int, int]) -> list[int]:
    return [token for first, count in parts for token in range(first, first + count)]


def begun(
    cache: es.PromptCache, ids: list[int], max_tokens: int = 4, *, reuse: bool = True
) -> es.CachedSequence:
    """A request that has room."""
    admission = cache.try_admit(ids, max_tokens, reuse=reuse)
    assert admission is not None
    return cache.begin(admission)


def left(context: MemoryContext, cache: es.PromptCache, ids: list[int]) -> int:
    """A prompt that was read and is over. How many of its tokens had to be."""
    sequence = begun(cache, ids)
    unread = len(ids) - sequence.length
    context.memory.compute(sequence.id, ids[sequence.length :])
    sequence.length = len(ids)
    cache.computed(unread)
    cache.finish(sequence)
    return unread


ONE, TWO = ids_of((0, 150)), ids_of((0, 70), (150, 50))


def test_what_nobody_has_used_is_moved_out_and_comes_back_for_who_begins_so() -> None:
    context = MemoryContext(1000, 4)
    cache = new_cache(context)
    left(context, cache, ONE)
    assert not cache.move_out(upcoming=0)
    assert cache.counts.idle_cells == 150, "used a moment ago"
    cache.computed(es.MAX_UNUSED_TOKENS)
    assert cache.move_out(upcoming=0)
    assert (cache.counts.idle_cells, context.memory.tokens(0)) == (0, [])
    assert cache.counts.stored_bytes == 150 * CELL_BYTES
    sequence = begun(cache, [*ONE, 7])
    assert sequence.length == 150
    assert context.memory.tokens(sequence.id) == ONE
    counts = cache.counts
    assert (counts.hits, counts.misses, counts.hit_tokens) == (1, 1, 150)
    assert (counts.restored_tokens, counts.evictions) == (150, 0)


def test_before_a_prompt_is_read_all_is_moved_that_nobody_uses() -> None:
    context = MemoryContext(1000, 4)
    cache = new_cache(context)
    left(context, cache, ONE)
    running = begun(cache, ids_of((200, 100)))
    cache.move_out(upcoming=es.MAX_UNUSED_TOKENS - 1)
    assert cache.counts.idle_cells == 150
    cache.move_out(upcoming=es.MAX_UNUSED_TOKENS)
    assert cache.counts.idle_cells == 0
    assert context.clears == 1, "so the prompt gets the first cells"
    assert running.is_running


def test_out_of_time_it_goes_on_the_next_time_and_the_cells_stay_till_then() -> None:
    context = MemoryContext(1000, 4)
    cache = new_cache(context)
    left(context, cache, ONE)
    for turn in (1, 2):
        cache.move_out(upcoming=LARGE, limit_s=-math.inf)
        assert (context.copied_out, cache.counts.idle_cells) == (turn, 150)
    begun(cache, [*ONE, 7])
    cache.move_out(upcoming=LARGE, limit_s=-math.inf)
    assert context.copied_out == 2, "somebody goes on from it"


def test_out_of_time_one_sequence_is_moved_and_not_the_next() -> None:
    context = MemoryContext(1000, 8)
    cache = new_cache(context)
    for n in range(6):
        left(context, cache, ids_of((n * 20, 20)))
    for turn in range(1, 7):
        assert cache.has_idle
        cache.move_out(limit_s=-math.inf)
        assert (context.copied_out, cache.counts.idle_cells) == (turn, 120 - 20 * turn)
    assert not cache.has_idle


def test_with_no_time_at_all_it_comes_to_an_end() -> None:
    context = MemoryContext(1000, 4)
    cache = new_cache(context, max_bytes=150 * CELL_BYTES)
    for ids in (ONE, TWO, ids_of((100, 150))):
        left(context, cache, ids)
    turns = 0
    while cache.has_idle:
        cache.move_out(limit_s=-math.inf)
        turns += 1
    assert turns <= 9, "a block each time, or one that finds no room"
    assert cache.counts.idle_cells == 0


def test_while_nobody_waits_copies_are_made_and_the_cells_stay() -> None:
    context = MemoryContext(1000, 4)
    cache = new_cache(context)
    left(context, cache, ONE)
    left(context, cache, TWO)
    turns = 0
    while cache.is_behind:
        cache.copy_ahead()
        turns += 1
    assert (context.copied_out, turns) == (4, 5), "64 tokens are both's"
    assert cache.counts.idle_cells == 200
    cache.move_out(upcoming=LARGE)
    assert (context.copied_out, cache.counts.idle_cells) == (4, 0)


def test_what_fits_alone_and_not_together_is_copied_once_and_not_in_turn() -> None:
    context = MemoryContext(1000, 4)
    cache = new_cache(context, max_bytes=150 * CELL_BYTES)
    left(context, cache, ONE)
    left(context, cache, ids_of((100, 150)))
    turns = 0
    while cache.is_behind:
        cache.copy_ahead()
        turns += 1
    assert turns < 9, "else an idle server never rests"
    assert cache.counts.stored_bytes <= 150 * CELL_BYTES


def test_what_a_window_has_left_stays_in_its_cells() -> None:
    context = MemoryContext(1000, 4, window=64)
    cache = new_cache(context)
    left(context, cache, ONE)
    context.memory.first[cache._table.idle[0].id] = 50
    cache.copy_ahead()
    cache.copy_ahead()
    assert not cache.is_behind
    cache.move_out()
    assert (context.copied_out, cache.counts.idle_cells) == (0, 150)
    cache.computed(es.MAX_KEPT_TOKENS)
    cache.move_out()
    assert (cache.counts.evictions, cache.counts.idle_cells) == (1, 0)


def test_what_others_need_the_cells_of_is_copied_first() -> None:
    context = MemoryContext(200, 4)
    cache = new_cache(context)
    left(context, cache, ONE)
    begun(cache, ids_of((100, 90)))
    assert (cache.counts.idle_cells, cache.counts.evictions) == (0, 0)
    found = begun(cache, ONE[:65])
    assert context.memory.tokens(found.id) == ONE[:64]


def test_what_does_not_fit_stays_in_its_cells_until_it_has_cost_as_much() -> None:
    context = MemoryContext(1000, 4)
    cache = new_cache(context, max_bytes=149 * CELL_BYTES)
    left(context, cache, ONE)
    cache.move_out(upcoming=LARGE)
    cache.copy_ahead()
    cache.copy_ahead()
    assert not cache.is_behind
    assert (cache.counts.idle_cells, cache.counts.stored_bytes) == (150, 0)
    cache.computed(es.MAX_KEPT_TOKENS)
    cache.move_out()
    assert (cache.counts.idle_cells, cache.counts.evictions) == (0, 1)
    assert context.copied_out == 0


def test_a_recurrent_state_is_not_copied() -> None:
    context = MemoryContext(200, 4, can_trim=False)
    cache = new_cache(context)
    left(context, cache, ONE)
    cache.move_out(upcoming=LARGE)
    assert cache.counts.idle_cells == 150
    begun(cache, ids_of((100, 150)))
    assert (context.copied_out, cache.counts.evictions) == (0, 1)


@pytest.mark.parametrize("lacks", ["cells", "memory"])
def test_without_room_for_a_copy_the_prompt_is_read(lacks: str) -> None:
    context = MemoryContext(1000, 4)
    cache = new_cache(context)
    context.is_short_of_memory = lacks == "memory"
    left(context, cache, ONE)
    cache.computed(LARGE)
    cache.move_out()
    context.has_room = lacks != "cells"
    sequence = begun(cache, [*ONE, 7])
    assert (sequence.length, context.memory.tokens(sequence.id)) == (0, [])
    assert (cache.counts.hits, cache.counts.restored_tokens) == (0, 0)


@pytest.mark.parametrize(("window", "kept"), [(0, 70), (300, 70), (64, 0)])
def test_when_room_ends_halfway_a_sequence_has_what_its_next_token_sees(
    window: int, kept: int
) -> None:
    context = MemoryContext(1000, 4, window=window)
    cache = new_cache(context)
    left(context, cache, ids_of((0, 200)))
    cache.move_out()
    running = begun(cache, [*range(70), 250])
    context.blocks_until_full = 1
    sequence = begun(cache, ids_of((0, 201)))
    assert sequence.length == len(context.memory.tokens(sequence.id)) == kept
    assert running.length == 70
    assert cache.counts.restored_tokens == 70, "of the first"


@pytest.mark.parametrize(("others", "length"), [(75, 96), (76, 64)])
def test_a_block_of_which_little_is_needed_takes_no_room_of_others(
    others: int, length: int
) -> None:
    context = MemoryContext(200, 4)
    cache = new_cache(context)
    left(context, cache, ids_of((0, 124)))
    cache.move_out()
    begun(cache, [201], others)
    assert begun(cache, [*range(96), 200], 2).length == length


def test_who_asks_for_no_reuse_gets_nothing_back() -> None:
    context = MemoryContext(1000, 4)
    cache = new_cache(context)
    left(context, cache, ONE)
    cache.empty_cells()
    assert begun(cache, [*ONE, 7], reuse=False).length == 0
    assert begun(cache, [*ONE, 7]).length == 150


def test_clearing_forgets_what_is_idle_and_what_was_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = MemoryContext(1000, 4)
    cache, trimmed = new_cache(context), list[int]()

    def trim() -> None:
        trimmed.append(cache.counts.stored_bytes)

    monkeypatch.setattr(es, "trim_memory", trim)
    left(context, cache, ONE)
    running = begun(cache, ids_of((200, 50)))
    cache.copy_ahead()
    cache.clear_idle()
    counts = cache.counts
    assert (counts.idle_cells, counts.stored_bytes, counts.sequences) == (0, 0, 1)
    assert trimmed == [0], "and then their memory goes back to the system"
    assert running.is_running
    again = new_cache(context, counted=counts)
    assert again.counts.misses == 2, "counters go on"


class Requests(RuleBasedStateMachine):
    """Requests that come, go on and end in any order, and what becomes of the rest."""

    CELLS, IDS = 60, 6

    @initialize(
        window=st.sampled_from([0, 0, 4]),
        can_trim=st.sampled_from([1, 1, 1, 0]),
        tokens=st.sampled_from([0, 9, 40, 1000]),
    )
    def begin(self, window: int, can_trim: int, tokens: int) -> None:
        self.context = MemoryContext(
            self.CELLS, self.IDS, window=window, can_trim=bool(can_trim)
        )
        self.cache = new_cache(self.context, tokens * CELL_BYTES)
        self.max_bytes = tokens * CELL_BYTES
        self.running: dict[es.CachedSequence, list[int]] = {}
        self.said = [[], [1, 2] * 9, [1, 2] * 4 + [1] * 8]

    @rule(
        base=st.integers(0, 50),
        cut=st.sampled_from([0, 0, 1, 4]),
        more=st.lists(st.integers(1, 2), min_size=1, max_size=6),
        max_tokens=st.integers(0, 9),
        has_room=st.sampled_from([True, True, True, False]),
    )
    def admit(
        self, base: int, cut: int, more: list[int], max_tokens: int, has_room: bool
    ) -> None:
        said = self.said[-1 - base % len(self.said)]
        prompt = said[: len(said) - cut] + more
        admission = self.cache.try_admit(prompt, max_tokens)
        if admission is None:
            return
        self.context.has_room = has_room
        sequence = self.cache.begin(admission)
        shared, window = sequence.length, self.context.window
        assert self.context.memory.tokens(sequence.id) == prompt[:shared]
        assert shared < len(prompt)
        first = self.context.first_position(sequence.id)
        assert first <= max(0, shared - window + 1)
        self.running[sequence] = prompt
        self.said.append(prompt)

    def draw(self, data: st.DataObject) -> es.CachedSequence:
        order = sorted(self.running, key=lambda sequence: sequence.id)
        return data.draw(st.sampled_from(order))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), tokens=st.sampled_from([60, 9, 1]))
    def compute(self, data: st.DataObject, tokens: int) -> None:
        sequence = self.draw(data)
        prompt = self.running[sequence]
        for at in range(sequence.length, len(sequence.ids))[:tokens]:
            token = prompt[at] if at < len(prompt) else 1 + at % 2
            self.context.memory.compute(sequence.id, [token])
            sequence.append(token)
            self.cache.computed(1)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), is_kept=st.booleans())
    def end(self, data: st.DataObject, is_kept: bool) -> None:
        sequence = self.draw(data)
        del self.running[sequence]
        self.said.append(sequence.held.tolist())
        (self.cache.finish if is_kept else self.cache.drop)(sequence)

    @rule(upcoming=st.sampled_from([0, 9, 1000]), limit_s=st.sampled_from([-1, 60]))
    def move_out(self, upcoming: int, limit_s: float) -> None:
        self.cache.move_out(upcoming, limit_s)

    @rule(is_short=st.booleans())
    def copy_ahead(self, is_short: bool) -> None:
        self.context.is_short_of_memory = is_short
        self.cache.copy_ahead()
        self.context.is_short_of_memory = False

    @rule(how=st.sampled_from(["evict_one", "clear_idle"]))
    def forget(self, how: str) -> None:
        getattr(self.cache, how)()

    @precondition(lambda self: self.context.window and self.cache._table.sequences)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """What lies before the window of a sequence's end is overwritten."""
        order = sorted(self.cache._table.sequences, key=lambda sequence: sequence.id)
        sequence, window = data.draw(st.sampled_from(order)), self.context.window
        lost = data.draw(st.integers(0, max(0, sequence.length - window + 1)))
        first = self.context.memory.first
        first[sequence.id] = max(lost, first.get(sequence.id, 0))

    @invariant()
    def the_memory_is_as_counted(self) -> None:
        held = self.context.memory.held
        counts = self.cache.counts
        for sequence in self.running:
            assert self.context.memory.tokens(sequence.id) == sequence.held.tolist()
        assert counts.sequences == sum(map(bool, held.values())) + sum(
            not sequence.length for sequence in self.running
        )
        all_held = self.context.memory.cells(held)
        running = self.context.memory.cells(one.id for one in self.running)
        assert counts.idle_cells == len(all_held - running)
        assert counts.stored_bytes <= self.max_bytes


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that a few tokens are several blocks, and soon unused."""
    monkeypatch.setattr(es, "MIN_PREFIX_TOKENS", 2)
    monkeypatch.setattr(es, "BLOCK_TOKENS", 4)
    monkeypatch.setattr(es, "MAX_UNUSED_TOKENS", 6)
    monkeypatch.setattr(es, "MAX_KEPT_TOKENS", 30)
    yield


@pytest.mark.usefixtures("small_blocks")
def test_whatever_happens_a_request_finds_its_own_tokens() -> None:
    settings = hypothesis.settings(max_examples=60, stateful_step_count=40)
    run_state_machine_as_test(Requests, settings=settings)


@pytest.mark.heavy
@pytest.mark.usefixtures("small_blocks")
def test_whatever_happens_for_long_a_request_finds_its_own_tokens() -> None:
    settings = hypothesis.settings(max_examples=500, stateful_step_count=80)
    run_state_machine_as_test(Requests, settings=settings)


# --- against llama.cpp's own ---


def step_context(path: Path, cells: int = 512, sequences: int = 6) -> es.StepContext:
    room = es.StepOptions(cells=cells, sequences=sequences)
    return es.StepContext(llama(), opened(path), room)


COPIED = sorted({*chat_models.GENERATING} - {"mamba", "jamba"})


@pytest.mark.parametrize("kind", COPIED)
def test_what_was_copied_back_holds_the_same_bits(kind: str, tmp_path: Path) -> None:
    path, dice = chat_models.GENERATING[kind](tmp_path), random.Random(7)
    ids = np.array([dice.randrange(300, 400) for _ in range(200)], np.int32)
    last = es.StepRow(1, 150, ids[150:], outputs=1)
    with contextlib.closing(step_context(path)) as context:
        context.decode([es.StepRow(1, 0, ids[:150])], 1)
        assert context.first_position(1) == 0
        size = min(es.BLOCK_TOKENS, context.window or es.BLOCK_TOKENS)
        parts = [(at, min(150, at + size)) for at in range(0, 150, size)]
        states = [context.copy_out(1, *part) for part in parts]
        context.decode([last], 1)
        logits = context.logits(49).copy()
        context.clear()
        for state, (begin, end) in zip(states, parts, strict=True):
            assert context.copy_in(1, state, begin, end)
        assert context.last_position(1) == 149
        assert context.first_position(1) <= max(0, 150 - (context.window or 150))
        context.decode([last], 1)
        assert np.array_equal(context.logits(49), logits), "in the same cells"
        # A part of a block, after what a sequence has.
        context.trim(1, size + 6)
        assert context.copy_in(1, states[1], size + 6, 2 * size - 2)
        for each in range(6):
            end = 2 * size - 2 if each == 1 else 0
            assert context.last_position(each) == end - 1


def test_cells_are_not_copied_back_where_there_is_no_room(tmp_path: Path) -> None:
    path = chat_models.GENERATING["llama"](tmp_path)
    ids = np.arange(300, 400, dtype=np.int32)
    with contextlib.closing(step_context(path, cells=256)) as context:
        context.decode([es.StepRow(0, 0, ids)], 1)
        state = context.copy_out(0, 0, 100)
        context.decode([es.StepRow(1, 0, ids)], 1)
        assert not context.copy_in(2, state, 0, 100)
        assert [context.last_position(n) for n in range(4)] == [99, 99, -1, -1]
        context.trim(1, 50)
        assert context.copy_in(2, state, 0, 100)
        with pytest.raises(es.EngineError, match="no such sequence"):
            context.copy_out(6, 0, 1)


class Reused:
    """A tiny model's sequences, filled and reused as the cache says."""

    def __init__(self, path: Path, dice: random.Random, stored_bytes: int) -> None:
        self.shared, self.alone = step_context(path), step_context(path)
        self.store = es.PrefixStore(
            stored_bytes, token_bytes=0, window=self.shared.window
        )
        self.cache = es.PromptCache(self.shared, self.store, es.PromptCacheCounts())
        self.dice = dice
        self.running: list[es.CachedSequence] = []
        self.said = [self.words(120), self.words(120)]  # what prompts go on from

    def close(self) -> None:
        self.shared.close()
        self.alone.close()

    def words(self, count: int) -> list[int]:
        """Random tokens."""
        return [self.dice.randrange(300, 400) for _ in range(count)]

    def compute(self, sequence: es.CachedSequence, tokens: int) -> None:
        """Compute the next tokens of a sequence."""
        ids = sequence.ids[sequence.length :][:tokens]
        row = es.StepRow(sequence.id, sequence.length, ids, outputs=1)
        self.shared.decode([row], 1)
        sequence.length += tokens
        self.cache.computed(tokens)

    def begin(self) -> float:
        """Read a prompt. Return how far its logits are from those of one read alone."""
        base = self.dice.choice(self.said)
        cut = self.dice.choice([0, 0, 0, 3, self.dice.randrange(len(base))])
        prompt = base[: len(base) - cut] + self.words(self.dice.randrange(1, 9))
        max_tokens = self.dice.choice([2, 20, 60])
        admission = self.cache.try_admit(prompt, max_tokens)
        if admission is None:
            return 0.0
        sequence = self.cache.begin(admission)
        while left := len(prompt) - sequence.length:
            if self.shared.can_trim and self.dice.random() < 0.05:
                return self.leave(sequence)
            tokens = min(left, self.dice.choice([5, 64, 200]))
            self.compute(sequence, tokens)
        self.running.append(sequence)
        found = self.shared.logits(tokens - 1)
        self.alone.clear()
        self.alone.decode([es.StepRow(0, 0, prompt, outputs=1)], 1)
        return float(abs(found - self.alone.logits(len(prompt) - 1)).max())

    def leave(self, sequence: es.CachedSequence) -> float:
        """End in the middle of a step: some of its tokens are in memory. Return 0."""
        ids = sequence.ids[sequence.length :][:30]
        self.shared.decode([es.StepRow(sequence.id, sequence.length, ids)], 1)
        self.cache.trim(sequence)
        self.said.append(sequence.held.tolist() or self.words(20))
        self.cache.finish(sequence)
        return 0.0

    def end(self) -> None:
        """Let a sequence reply, and stay as a prefix."""
        sequence = self.running.pop(self.dice.randrange(len(self.running)))
        while sequence.length < len(sequence.ids) and self.dice.random() < 0.97:
            sequence.ids[sequence.length] = self.words(1)[0]
            self.compute(sequence, 1)
        self.said.append(sequence.held.tolist())
        self.cache.finish(sequence)


@pytest.mark.parametrize("stored_bytes", [0, 60_000, LARGE])
@pytest.mark.parametrize("kind", chat_models.GENERATING)
def test_what_is_reused_gives_the_logits_of_a_prompt_read_alone(
    kind: str, stored_bytes: int, tmp_path: Path
) -> None:
    path = chat_models.GENERATING[kind](tmp_path)
    counts = reused(path, 4, stored_bytes)
    is_recurrent = kind in ("mamba", "jamba")
    assert counts.hits > (1 if is_recurrent else 30)
    assert bool(counts.restored_tokens) == bool(stored_bytes and not is_recurrent)
    if kind != "gemma3":  # some of whose windows are gone before they are copied
        assert bool(counts.evictions) == (is_recurrent or stored_bytes < LARGE)


@pytest.mark.heavy
@pytest.mark.parametrize("stored_bytes", [60_000, 200_000, LARGE])
def test_what_is_reused_of_a_sliding_window_has_no_holes(
    stored_bytes: int, tmp_path: Path
) -> None:
    # A sequence made of whole blocks and one that had lost its window's beginning had
    # one, which llama_memory_seq_pos_min does not tell: in two of three such runs.
    path = chat_models.GENERATING["gemma3"](tmp_path)
    for seed in range(12):
        reused(path, seed, stored_bytes)


def reused(path: Path, seed: int, stored_bytes: int) -> es.PromptCacheCounts:
    """Many requests, side by side, each compared with itself alone."""
    context = Reused(path, random.Random(seed), stored_bytes)
    off, dice = 0.0, random.Random(seed + 1)
    with contextlib.closing(context):
        for _ in range(150):
            if context.running and dice.random() < 0.5:
                context.end()
            else:
                off = max(off, context.begin())
            context.cache.move_out(dice.choice([0, 0, 100]), dice.choice([-1, 60]))
            if dice.random() < 0.3:
                context.cache.copy_ahead()
            for sequence in context.running:
                last = context.shared.last_position(sequence.id)
                assert last == sequence.length - 1
    # Logits deviate by 3; other orders of cells move them by 0.15 at most, in half
    # precision. Without a look at its window gemma's are off by 0.5 to 0.9.
    assert off < 0.3
    return context.cache.counts
