"""Room SEQUENCES: who gets which cells, and what is reused. Pure, but for the last."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

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
from tests.test_tiny_models import llama, opened

SYSTEM = list(range(100, 140))  # how prompts begin, longer than MIN_PREFIX_TOKENS


class Admitted(NamedTuple):
    """A request's sequence, and what is to be done before its first step."""

    sequence: es.CachedSequence
    operations: list[es.MemoryOperation]


def admitted(
    table: es.SequenceTable,
    ids: list[int],
    max_tokens: int = 4,
    n: int = 1,
    *,
    reuse: bool = True,
) -> Admitted:
    """A request that has room."""
    admission = table.try_admit(ids, max_tokens, n, reuse=reuse)
    assert admission is not None
    assert (admission.prompt.tolist(), admission.reuses) == (ids, reuse)
    table.count_lookup(admission.sequence.length)
    return Admitted(admission.sequence, admission.operations)


def fits(table: es.SequenceTable, prompt: int, max_tokens: int, n: int = 1) -> bool:
    """Whether a request can be admitted once nothing else runs."""
    sequences = len(table._free_ids) + len(table.sequences)
    return prompt + n * max_tokens <= table.cells and n <= sequences


def computed(sequence: es.CachedSequence, prompt: int, *reply: int) -> None:
    """A prompt that was read, and its reply so far."""
    sequence.length = prompt
    for token in reply:
        sequence.append(token)


def left(
    table: es.SequenceTable, ids: list[int], *reply: int, reuse: bool = True
) -> es.CachedSequence:
    """A request that is over: what it left in memory."""
    sequence = admitted(table, ids, len(reply), reuse=reuse).sequence
    computed(sequence, len(ids), *reply)
    table.finish(sequence)
    return sequence


def dropped(operations: Iterable[es.MemoryOperation]) -> list[int]:
    """The sequences that leave memory whole."""
    return [
        one.sequence
        for one in operations
        if isinstance(one, es.RemoveCells) and not one.begin
    ]


# --- what is reused ---


def test_a_chat_that_goes_on_takes_its_sequence_over() -> None:
    table = es.SequenceTable(1000, 4)
    before = left(table, SYSTEM, 1, 2)
    sequence, operations = admitted(table, [*SYSTEM, 1, 2, 3])
    assert (sequence, operations) == (before, [])
    assert sequence.length == 42
    assert (table.counts.hits, table.counts.misses, table.counts.hit_tokens) == (
        1,
        1,
        42,
    )


def test_a_prompt_that_turns_off_shares_cells_and_leaves_the_rest_for_others() -> None:
    table = es.SequenceTable(1000, 4)
    before = left(table, SYSTEM, 1, 2)
    sequence, operations = admitted(table, [*SYSTEM, 7, 8], 5)
    assert operations == [es.CopyCells(before.id, sequence.id, 40)]
    assert sequence.length == 40
    assert table.usage == es.CellUsage(running=47, idle=2, free=951)
    again, _ = admitted(table, [*SYSTEM, 1, 2, 3])
    assert again is before


def test_a_prefix_is_shared_with_a_running_sequence_as_far_as_it_got() -> None:
    table = es.SequenceTable(1000, 4)
    running = admitted(table, [*SYSTEM, 1]).sequence
    assert admitted(table, [*SYSTEM, 2]).sequence.length == 0, "nothing is read yet"
    computed(running, 30)
    sequence, operations = admitted(table, [*SYSTEM, 3])
    assert sequence.length == 30
    assert operations == [es.CopyCells(running.id, sequence.id, 30)]


def test_the_longest_prefix_is_used_not_the_newest() -> None:
    table = es.SequenceTable(1000, 8)
    longest = left(table, [*SYSTEM, 1, 2, 3], 4)
    left(table, [*SYSTEM, 1, 9], 4)
    sequence, operations = admitted(table, [*SYSTEM, 1, 2, 8])
    assert operations == [es.CopyCells(longest.id, sequence.id, 42)]


def test_the_last_token_is_always_computed() -> None:
    table = es.SequenceTable(1000, 4)
    left(table, SYSTEM, 1, 2)
    assert admitted(table, SYSTEM).sequence.length == 39


def test_a_few_tokens_that_every_prompt_has_are_no_prefix() -> None:
    table = es.SequenceTable(1000, 4)
    left(table, [*SYSTEM[: es.MIN_PREFIX_TOKENS - 1], 1, 2], 3)
    assert admitted(table, SYSTEM).sequence.length == 0
    left(table, [*SYSTEM[: es.MIN_PREFIX_TOKENS], 1, 2], 3)
    assert admitted(table, SYSTEM).sequence.length == es.MIN_PREFIX_TOKENS


def test_who_asks_for_no_reuse_gets_none_and_yet_leaves_a_prefix() -> None:
    table = es.SequenceTable(1000, 4)
    left(table, SYSTEM, 1)
    sequence, operations = admitted(table, [*SYSTEM, 1, 2], reuse=False)
    assert (sequence.length, operations) == (0, [])
    assert (table.counts.hits, table.counts.misses) == (0, 2)
    computed(sequence, 42)
    assert admitted(table, [*SYSTEM, 1, 2, 3]).sequence.length == 42


# --- sliding windows, recurrent states ---


@pytest.mark.parametrize(
    ("first", "shared"),
    [
        pytest.param(0, 40, id="nothing is lost"),
        pytest.param(31, 40, id="the window of the next token is there"),
        pytest.param(32, 0, id="one position too few"),
    ],
)
def test_a_prefix_needs_the_window_before_its_end(first: int, shared: int) -> None:
    # The token at position 40 looks at positions 31 to 40.
    table = es.SequenceTable(1000, 4, window=10, first_position=lambda _: first)
    left(table, SYSTEM, 1, 2)
    assert admitted(table, [*SYSTEM, 7]).sequence.length == shared


def test_a_shorter_prefix_that_has_its_window_is_used_instead() -> None:
    first: dict[int, int] = {}
    table = es.SequenceTable(1000, 4, window=10, first_position=first.__getitem__)
    longer = left(table, [*SYSTEM, 1, 2], *range(200, 220))
    shorter = left(table, [*SYSTEM, 3], *range(200, 220), reuse=False)
    first |= {longer.id: 50, shorter.id: 20}
    sequence, operations = admitted(table, [*SYSTEM, 1, 2, 3])
    assert operations == [es.CopyCells(shorter.id, sequence.id, 40)]


def test_a_recurrent_state_is_used_from_its_end_only() -> None:
    table = es.SequenceTable(1000, 8, can_trim=False)
    before = left(table, SYSTEM, 1, 2)
    assert admitted(table, [*SYSTEM, 1, 7]).sequence.length == 0
    assert admitted(table, [*SYSTEM, 1, 2]).sequence.length == 0, "all of it"
    goes_on, operations = admitted(table, [*SYSTEM, 1, 2, 3])
    assert (goes_on, goes_on.length, operations) == (before, 42, [])
    computed(goes_on, 43)
    other = admitted(table, [*SYSTEM, 1, 2, 3, 4])
    assert other.sequence.length == 0, "a running one is not disturbed"


# --- room ---


def test_a_request_waits_for_cells_and_not_for_those_of_idle_sequences() -> None:
    table = es.SequenceTable(100, 8)
    left(table, SYSTEM, 1, 2)
    assert table.try_admit(list(range(50)), 51) is None
    assert not fits(table, 50, 51)
    running, operations = admitted(table, list(range(50)), 20)
    assert dropped(operations) != []
    assert table.usage == es.CellUsage(running=70, idle=0, free=30)
    assert table.try_admit(list(range(900, 920)), 11) is None
    assert fits(table, 20, 11)
    computed(running, 50)
    table.finish(running)
    assert table.usage == es.CellUsage(running=0, idle=50, free=50)
    assert table.try_admit(list(range(900, 920)), 11) is not None


def test_a_shared_prefix_needs_no_room_of_its_own() -> None:
    table = es.SequenceTable(100, 8)
    computed(admitted(table, SYSTEM).sequence, 40)
    for _ in range(9):
        # 1 token to be computed, and 4 of the reply.
        if len(table.sequences) < 8:
            admitted(table, [*SYSTEM[:39], 7])
    assert table.usage.running == 44 + 7 * 5


def test_the_sequence_that_was_unused_for_longest_goes_first() -> None:
    table = es.SequenceTable(200, 8)
    prompts = [list(range(n, n + 40)) for n in (1000, 2000, 3000)]
    one, two, three = (left(table, prompt, 1) for prompt in prompts)
    again = admitted(table, [*prompts[0], 9], 1)
    assert again.operations == [es.CopyCells(one.id, again.sequence.id, 40)]
    _, operations = admitted(table, list(range(80)), 10)
    assert dropped(operations) == [two.id]
    assert set(table.idle) == {one, three}
    (evicted,) = operations
    assert isinstance(evicted, es.RemoveCells)
    assert evicted.lost is not None
    assert evicted.lost.tolist() == [*prompts[1], 1], "for who can keep it"


def test_what_a_request_goes_on_from_outlives_its_own_eviction() -> None:
    table = es.SequenceTable(100, 8)
    before = left(table, [*SYSTEM, 1], *range(30))
    sequence, operations = admitted(table, [*SYSTEM, 2], 50)
    assert operations == [
        es.CopyCells(before.id, sequence.id, 40),
        es.RemoveCells(before.id),
    ]
    assert table.usage == es.CellUsage(running=91, idle=0, free=9)


def test_without_an_id_left_the_source_is_cut_and_taken_over() -> None:
    table = es.SequenceTable(1000, 2)
    admitted(table, list(range(20)))
    before = left(table, [*SYSTEM, 1], 2)
    sequence, operations = admitted(table, [*SYSTEM, 3])
    assert sequence is before
    assert operations == [es.RemoveCells(before.id, 40)]
    assert table.try_admit([1], 1) is None, "both ids run"


def test_an_id_is_taken_from_another_idle_sequence_before_the_copy() -> None:
    table = es.SequenceTable(1000, 2)
    source = left(table, [*SYSTEM, 1], 2)
    other = left(table, list(range(20)), 2)
    sequence, operations = admitted(table, [*SYSTEM, 3])
    assert sequence.id == other.id
    assert operations == [
        es.RemoveCells(other.id),
        es.CopyCells(source.id, other.id, 40),
    ]


# --- several replies ---


def test_replies_to_one_prompt_share_its_cells_and_each_has_its_own() -> None:
    table = es.SequenceTable(70, 4)
    assert not fits(table, 40, 10, 4)
    assert table.try_admit(SYSTEM, 10, 4) is None
    leader, operations = admitted(table, SYSTEM, 10, 3)
    assert operations == []
    assert table.usage == es.CellUsage(running=70, idle=0, free=0)
    computed(leader, 40)
    forks, operations = table.fork(leader)
    assert operations == [es.CopyCells(leader.id, fork.id, 40) for fork in forks]
    for at, sequence in enumerate((leader, *forks)):
        computed(sequence, 40, *range(at, at + 10))
    with pytest.raises(IndexError):
        leader.append(1)
    held = [sequence.held.tolist() for sequence in (leader, *forks)]
    assert held == [[*SYSTEM, *range(at, at + 10)] for at in range(3)]
    for sequence in (leader, *forks):
        assert table.finish(sequence) == []
    assert table.usage == es.CellUsage(running=0, idle=70, free=0)


@pytest.mark.parametrize("ends", ["finish", "drop"])
def test_a_request_that_ends_before_its_replies_begin_gives_all_back(ends: str) -> None:
    table = es.SequenceTable(70, 4)
    leader = admitted(table, SYSTEM, 10, 3).sequence
    computed(leader, 20)
    operations = getattr(table, ends)(leader)
    kept = 20 if ends == "finish" else 0
    assert operations == ([] if kept else es.RemoveCells(leader.id))
    assert table.usage == es.CellUsage(running=0, idle=kept, free=70 - kept)
    assert admitted(table, [1], 0, 4).sequence.id >= 0, "no id is lost"


# --- what becomes of it ---


def test_an_idle_sequence_that_the_newest_one_begins_with_is_dropped() -> None:
    table = es.SequenceTable(1000, 8)
    half = left(table, SYSTEM[:30], 130)
    same = admitted(table, SYSTEM, reuse=False).sequence
    other = left(table, [*SYSTEM[:20], 7], 8)
    computed(same, 40, 1)
    assert table.finish(same) == [es.RemoveCells(half.id)]
    assert set(table.idle) == {other, same}


def test_with_a_window_only_an_equal_sequence_is_of_no_more_use() -> None:
    table = es.SequenceTable(1000, 8, window=10)
    shorter = left(table, SYSTEM[:30], 130)
    same = left(table, SYSTEM, 1, reuse=False)
    newest = admitted(table, SYSTEM, reuse=False).sequence
    computed(newest, 40, 1)
    assert table.finish(newest) == [es.RemoveCells(same.id)]
    assert set(table.idle) == {shorter, newest}


def test_what_is_too_short_to_be_a_prefix_is_not_kept() -> None:
    table = es.SequenceTable(1000, 8)
    sequence = admitted(table, SYSTEM).sequence
    computed(sequence, es.MIN_PREFIX_TOKENS - 1)
    assert table.finish(sequence) == [es.RemoveCells(sequence.id)]
    assert table.usage == es.CellUsage(running=0, idle=0, free=1000)


def test_evicting_ends_when_nothing_is_idle() -> None:
    table = es.SequenceTable(1000, 8)
    running = admitted(table, SYSTEM).sequence
    idle = [left(table, list(range(n, n + 20)), 1).id for n in (200, 300)]
    evicted = [table.evict_one() for _ in range(3)]
    assert evicted == [*map(es.RemoveCells, idle), None]
    assert table.sequences == [running]


@hypothesis.given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_a_common_prefix_is_what_both_begin_with(
    one: list[int], other: list[int]
) -> None:
    found = es.common_prefix(np.array(one, np.int32), np.array(other, np.int32))
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other))
    assert found == len(list(pairs))


# --- against a model of llama.cpp's memory ---


class Memory:
    """What llama.cpp would hold: a cell for each token computed, and who holds it.

    With a window, sequences may lose what lies before it: ``first`` is the first
    position that each still has.
    """

    def __init__(self) -> None:
        self.held: dict[int, list[tuple[int, int]]] = {}  # id -> (cell, token)s
        self.first: dict[int, int] = {}
        self._cells = itertools.count()

    def do(self, operations: Iterable[es.MemoryOperation]) -> None:
        """Carry out what the table says."""
        for one in operations:
            if isinstance(one, es.CopyCells):
                assert not self.held.get(one.target), "the target holds something"
                self.held[one.target] = self.held[one.source][: one.end]
                self.first[one.target] = self.first.get(one.source, 0)
                assert len(self.held[one.target]) == one.end
            else:
                del self.held.get(one.sequence, [])[one.begin :]
                if not one.begin:
                    self.first[one.sequence] = 0

    def compute(self, sequence: int, tokens: Iterable[int]) -> None:
        """Append tokens."""
        held = self.held.setdefault(sequence, [])
        held += [(next(self._cells), token) for token in tokens]

    def tokens(self, sequence: int) -> list[int]:
        """The token ids of a sequence."""
        return [token for _, token in self.held.get(sequence, [])]

    def cells(self, sequences: Iterable[int]) -> set[int]:
        """The cells that any of them holds."""
        return {cell for one in sequences for cell, _ in self.held.get(one, [])}


class Requests(RuleBasedStateMachine):
    """Requests that come, fork, fail, go on and end in any order."""

    CELLS = 60
    IDS = 6

    @initialize(window=st.sampled_from([0, 0, 4]), can_trim=st.sampled_from([1, 1, 0]))
    def begin(self, window: int, can_trim: int) -> None:
        self.memory = Memory()
        self.window = window
        self.can_trim = bool(can_trim)
        self.table = es.SequenceTable(
            self.CELLS,
            self.IDS,
            window=window,
            can_trim=self.can_trim,
            first_position=lambda sequence: self.memory.first.get(sequence, 0),
        )
        self.running: dict[es.CachedSequence, tuple[list[int], int]] = {}  # prompt, max
        # What prompts may go on from.
        self.said = [[], [1, 2] * 9, [1, 2] * 4 + [1] * 8]

    @rule(
        base=st.integers(0, 50),
        cut=st.sampled_from([0, 0, 1, 4]),
        more=st.lists(st.integers(1, 2), min_size=1, max_size=6),
        max_tokens=st.integers(0, 9),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        reuse=st.sampled_from([True, True, True, False]),
        tokens=st.sampled_from([60, 60, 9, 0]),
    )
    def admit(
        self,
        base: int,
        cut: int,
        more: list[int],
        max_tokens: int,
        n: int,
        reuse: bool,
        tokens: int,
    ) -> None:
        said = self.said[-1 - base % len(self.said)]
        prompt = said[: len(said) - cut] + more
        if not fits(self.table, len(prompt), max_tokens, n):
            assert len(prompt) + n * max_tokens > self.CELLS
            return
        idle = set(self.table.idle)
        admission = self.table.try_admit(prompt, max_tokens, n, reuse=reuse)
        if admission is None:
            assert self.running, "what fits an empty context is let in"
            return
        sequence, operations, *_ = admission
        shared = sequence.length
        self.memory.do(operations)
        assert self.memory.tokens(sequence.id) == prompt[:shared]
        assert shared < len(prompt)
        assert reuse or not shared
        assert self.memory.first.get(sequence.id, 0) <= max(0, shared - self.window + 1)
        assert self.can_trim or not shared or sequence in idle
        self.running[sequence] = (prompt, max_tokens)
        self.said.append(prompt)
        self.go_on(sequence, tokens, more)

    def draw(self, data: st.DataObject) -> es.CachedSequence:
        """A running sequence."""
        order = sorted(self.running, key=lambda sequence: sequence.id)
        return data.draw(st.sampled_from(order))

    def go_on(self, sequence: es.CachedSequence, tokens: int, reply: list[int]) -> None:
        """Compute more tokens of a sequence."""
        prompt, max_tokens = self.running[sequence]
        for at in range(sequence.length, len(prompt) + max_tokens)[:tokens]:
            if at < len(prompt):
                self.memory.compute(sequence.id, [prompt[at]])
                sequence.length += 1
            else:
                token = reply[at % len(reply)]
                self.memory.compute(sequence.id, [token])
                sequence.append(token)
            if at + 1 == len(prompt):
                forks, operations = self.table.fork(sequence)
                self.memory.do(operations)
                self.running |= dict.fromkeys(forks, self.running[sequence])

    @precondition(lambda self: self.running)
    @rule(
        data=st.data(),
        tokens=st.sampled_from([60, 3, 1]),
        reply=st.lists(st.integers(1, 2), min_size=1, max_size=4),
    )
    def compute(self, data: st.DataObject, tokens: int, reply: list[int]) -> None:
        self.go_on(self.draw(data), tokens, reply)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), is_kept=st.booleans())
    def end(self, data: st.DataObject, is_kept: bool) -> None:
        sequence = self.draw(data)
        del self.running[sequence]
        self.said.append(sequence.held.tolist())
        if is_kept:
            self.memory.do(self.table.finish(sequence))
        else:
            self.memory.do([self.table.drop(sequence)])

    @precondition(lambda self: self.table.idle)
    @rule()
    def evict(self) -> None:
        first = self.table.idle[0]
        evicted = self.table.evict_one()
        assert evicted == es.RemoveCells(first.id)
        self.memory.do([evicted])

    @precondition(lambda self: self.window and self.table.sequences)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """What lies before the window of a sequence's end is overwritten."""
        order = sorted(self.table.sequences, key=lambda sequence: sequence.id)
        sequence = data.draw(st.sampled_from(order))
        lost = data.draw(st.integers(0, max(0, sequence.length - self.window + 1)))
        before = self.memory.first.get(sequence.id, 0)
        self.memory.first[sequence.id] = max(lost, before)

    @invariant()
    def the_table_says_what_is_in_memory(self) -> None:
        sequences = {sequence.id: sequence for sequence in self.table.sequences}
        assert len(sequences) == len(self.table.sequences)
        for number in range(self.IDS):
            held = sequences[number].held.tolist() if number in sequences else []
            assert self.memory.tokens(number) == held

    @invariant()
    def every_cell_is_counted_and_what_is_reserved_is_there(self) -> None:
        running = self.memory.cells(sequence.id for sequence in self.running)
        all_held = self.memory.cells(self.memory.held)
        reserved = 0
        for sequence, (prompt, max_tokens) in self.running.items():
            reserved += len(prompt) + max_tokens - sequence.length
            reserved += len(sequence.forks) * max_tokens
        usage = self.table.usage
        assert usage.running == len(running) + reserved
        assert usage.idle == len(all_held - running)
        assert usage.free == self.CELLS - len(all_held) - reserved >= 0
        assert sum(usage) == self.CELLS


def test_the_table_agrees_with_the_memory_whatever_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(es, "MIN_PREFIX_TOKENS", 2)
    settings = hypothesis.settings(max_examples=40, stateful_step_count=40)
    run_state_machine_as_test(Requests, settings=settings)


@pytest.mark.heavy
def test_the_table_agrees_with_the_memory_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(es, "MIN_PREFIX_TOKENS", 2)
    settings = hypothesis.settings(max_examples=300, stateful_step_count=80)
    run_state_machine_as_test(Requests, settings=settings)


def test_a_prompt_is_found_among_many_sequences() -> None:
    dice = random.Random(1)
    table = es.SequenceTable(10_000, 64)
    prompts = [[*SYSTEM, *(dice.randrange(9) for _ in range(30))] for _ in range(60)]
    for prompt in prompts:
        left(table, prompt, 500)
    for prompt in dice.sample(prompts, 20):
        sequence = admitted(table, [*prompt, 500, 501]).sequence
        assert sequence.length == 71


# --- against llama.cpp's own ---


class Watching:
    """llama.cpp's functions, and how many tokens each of its steps had."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(llama(), name)

    def llama_decode(self, pointer: Any, batch: Any) -> int:
        self.steps.append(batch.n_tokens)
        return int(llama().llama_decode(pointer, batch))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba"])
def test_odd_steps_get_a_token_more_of_which_nothing_stays(
    kind: str, tmp_path: Path
) -> None:
    path, dice, watching = (
        chat_models.GENERATING[kind](tmp_path),
        random.Random(7),
        Watching(),
    )
    replies = [[dice.randrange(300, 400) for _ in range(40)] for _ in range(7)]
    paired = es.StepContext(
        watching,
        opened(path),
        es.StepOptions(cells=512, sequences=7, pairs_tokens=True),
    )
    alone = es.StepContext(
        llama(), opened(path), es.StepOptions(cells=512, sequences=7)
    )
    with contextlib.closing(paired), contextlib.closing(alone):
        lengths, expected = [0] * 7, []
        for at in range(40):
            among = dice.sample(range(7), dice.randrange(1, 8))
            rows = [
                es.StepRow(n, lengths[n], replies[n][lengths[n] :][:1], 1)
                for n in among
            ]
            is_deterministic = at % 4 == 3
            paired.decode(rows, 1, is_deterministic=is_deterministic)
            alone.decode(rows, 1)
            is_paired = len(rows) in (3, 5, 7) and not is_deterministic
            is_paired = is_paired and paired.can_trim
            expected.append(len(rows) + is_paired)
            for index, n in enumerate(among):
                off = abs(paired.logits(index) - alone.logits(index)).max()
                assert off < 0.2
                lengths[n] += 1
                assert paired.last_position(n) == lengths[n] - 1
        assert watching.steps == expected
        for outputs in (
            5,
            1,
            0,
        ):  # of what is tried ahead, the end of a prompt, not that
            row = es.StepRow(0, lengths[0], replies[0][:5], outputs)
            paired.decode([row], 1)
            alone.decode([row], 1)
            lengths[0] += 5
            assert watching.steps[-1] == (6 if paired.can_trim else 5)
            assert paired.last_position(0) == lengths[0] - 1
            for index in range(5 - outputs, 5):
                off = abs(paired.logits(index) - alone.logits(index)).max()
                assert off < 0.2


def test_of_a_step_in_parts_the_last_one_is_made_even(tmp_path: Path) -> None:
    path, watching = chat_models.GENERATING["llama"](tmp_path), Watching()
    room = es.StepOptions(cells=2048, sequences=1, pairs_tokens=True)
    with contextlib.closing(es.StepContext(watching, opened(path), room)) as context:
        lengths = (1, 2, 3, 15, 17, 63, 65, 256, 257, 258, 259, 511, 512)
        for length in lengths:
            context.trim(0, 0)
            context.decode([es.StepRow(0, 0, [300] * length, outputs=1)], 1)
        even = [1, 2, 4, 16, 17, 63, 66, 256, 257, 258, 260, 512, 512]
        assert watching.steps == even


def test_without_a_free_cell_an_odd_step_is_computed_as_it_is(tmp_path: Path) -> None:
    path, watching = chat_models.GENERATING["llama"](tmp_path), Watching()
    room = es.StepOptions(cells=256, sequences=3, pairs_tokens=True)
    with contextlib.closing(es.StepContext(watching, opened(path), room)) as context:
        full = context.cells - 3
        context.decode([es.StepRow(0, 0, [300] * full, outputs=1)], 1)
        rows = [es.StepRow(0, full, [301], 1), es.StepRow(1, 0, [302, 303], 2)]
        context.decode(rows, 1)
        assert watching.steps == [full + 1, 4, 3]
        assert [context.last_position(n) for n in (0, 1)] == [full, 1]
        with pytest.raises(es.NoCells):
            context.decode([es.StepRow(1, 2, [304, 305, 306], 3)], 1)


@pytest.mark.parametrize(
    ("weights", "experts", "pairs"),
    [("q8_0", 0, True), ("q4_k_m", 0, True), ("mxfp4_moe", 8, False)]
    + [(kind, 0, False) for kind in ("f32", "f16", "bf16", "unknown")],
)
def test_tokens_are_paired_where_quantised_weights_are_shared_by_all(
    weights: str, experts: int, pairs: bool
) -> None:
    values = {"llama.expert_count": experts}
    header = es.GgufHeader("llama", values)
    assert es.pairs_tokens(header, weights) is pairs


def test_what_is_unused_is_told_by_how_many_tokens_were_computed_since() -> None:
    now = [0]
    table = es.SequenceTable(512, 8, clock=lambda: now[0])
    found = []
    for now[0], first in ((0, 1), (20, 100)):
        found.append(left(table, [*range(first, first + 30)]))
    running = admitted(table, [*range(200, 230)]).sequence
    now[0] = 30
    assert table.unused(31) == []
    assert table.unused(30) == found[:1]
    assert table.unused(10) == table.unused(-100) == found, "unused for longest first"
    admitted(table, [*range(1, 31), 9])
    assert table.unused(0) == found[1:], "those that run are not idle"
    assert running.is_running


def test_a_sequence_that_is_cut_for_want_of_ids_says_what_is_lost() -> None:
    table = es.SequenceTable(1000, 1)
    before = left(table, [*SYSTEM, 1], 2)
    _, (cut,) = admitted(table, [*SYSTEM, 3])
    assert isinstance(cut, es.RemoveCells)
    assert (cut.sequence, cut.begin) == (before.id, 40)
    assert cut.lost is not None
    assert cut.lost.tolist() == [*SYSTEM, 1, 2]
