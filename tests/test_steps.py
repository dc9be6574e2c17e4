"""Room STEPS: which tokens share the next call of llama_decode. All pure."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

import embellama_server as es

BATCH_TOKENS = 512
MAX_OUTPUTS = 8
ROW_S, MORE_ROWS_S, TOKEN_S = 0.010, 0.004, 0.001  # of a step, as on a small box


@dataclass(slots=True, eq=False, kw_only=True)
class Reply(es.StepWork):
    """A request under way."""

    reply_tokens: int = 8
    arrived_at: float = 0.0
    first_token_at: float = 0.0
    gaps: list[float] = field(default_factory=list)  # between its tokens
    pieces: list[int] = field(default_factory=list)
    together: list[int] = field(default_factory=list)  # rows of each of its steps


def prompt(
    tokens: int,
    client: str = "",
    *,
    reply_tokens: int = 8,
    read_tokens: int = 0,
    priority: int = 1,
    is_deterministic: bool = False,
    needs_all_logits: bool = False,
) -> Reply:
    """A prompt that is to be read."""
    return Reply(
        prompt_tokens=tokens,
        client=client,
        reply_tokens=reply_tokens,
        read_tokens=read_tokens,
        priority=priority,
        is_deterministic=is_deterministic,
        needs_all_logits=needs_all_logits,
    )


def growing(count: int = 1, *, is_deterministic: bool = False) -> list[Reply]:
    """Replies without end."""
    return [
        prompt(0, reply_tokens=10**9, is_deterministic=is_deterministic)
        for _ in range(count)
    ]


@dataclass
class Box:
    """Runs requests as planned, with a clock of its own."""

    step_s: float = 0.1
    slowness: float = 1.0
    is_measured: bool = True  # the speed is known
    now: float = 0.0
    work: list[Reply] = field(default_factory=list)
    steps: int = 0
    longest_s: float = 0.0  # step
    max_alike: int = 3
    _token_at: dict[Reply, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        speed = es.StepSpeed()
        self.planner = es.StepPlanner(
            speed,
            step_s=self.step_s,
            batch_tokens=BATCH_TOKENS,
            max_outputs=MAX_OUTPUTS,
            max_alike=self.max_alike,
        )
        if self.is_measured:
            for rows in [*range(1, MAX_OUTPUTS + 1)] * 30:
                speed.record(rows, 0, self.cost_s(rows, 0))
            speed.record(0, BATCH_TOKENS, self.cost_s(0, BATCH_TOKENS))

    def cost_s(self, rows: int, tokens: int) -> float:
        """What a step takes here."""
        rows_s = ROW_S + MORE_ROWS_S * max(0, rows - 1)
        return (rows_s + TOKEN_S * tokens) * self.slowness

    def add(self, *work: Reply) -> None:
        """Requests that arrive now."""
        for one in work:
            one.arrived_at = self.now
        self.work += work

    def step(self) -> es.Step[Reply]:
        """Compute a step."""
        step = self.planner.plan(self.work)
        assert step is not None
        check(step, self.work)
        took_s = self.cost_s(len(step.rows), step.prompt_tokens)
        self.now += took_s
        self.steps += 1
        self.longest_s = max(self.longest_s, took_s)
        self.planner.done(step, took_s)
        ended = [one for one, _ in step.pieces if not one.left_tokens]
        for one, tokens in step.pieces:
            one.pieces.append(tokens)
        for one in ended:
            one.first_token_at = self.now
        for one in step.rows:
            one.reply_tokens -= 1
            one.gaps.append(self.now - self._token_at.get(one, one.arrived_at))
            one.together.append(len(step.rows) + step.prompt_tokens)
        self._token_at |= dict.fromkeys([*ended, *step.rows], self.now)
        self.work = [one for one in self.work if one.left_tokens or one.reply_tokens]
        return step

    def run(self, *until: Reply) -> None:
        """Compute until these have their first tokens; without any, until all is done."""
        while self.work and not (until and all(one.first_token_at for one in until)):
            self.step()


def check(step: es.Step[Reply], work: list[Reply]) -> None:
    """What holds of every step."""
    assert step.rows or step.pieces
    assert len(step.rows) + step.prompt_tokens <= BATCH_TOKENS
    outputs = len(step.rows)
    for one, tokens in step.pieces:
        assert 0 < tokens <= one.left_tokens
        is_last = tokens == one.left_tokens
        outputs += tokens if one.needs_all_logits else is_last
        assert is_last or one is step.pieces[0][0], "only the first is read in part"
    assert outputs <= MAX_OUTPUTS
    together = [*step.rows, *(one for one, _ in step.pieces)]
    assert len({id(one) for one in together}) == len(together)
    assert {one.is_deterministic for one in together} == {step.is_deterministic}
    if step.is_deterministic:
        assert len(step.rows) <= 3
        assert len(step.pieces) + bool(step.rows) == 1
    else:
        rows = [one for one in work if one.kind == 0 and not one.left_tokens]
        assert set(step.rows) == set(rows[:MAX_OUTPUTS])


# --- StepSpeed ---


def test_the_speed_is_unknown_until_a_step_was_timed() -> None:
    assert es.StepSpeed().step_s(4, 100) == 0


def test_a_step_takes_what_its_replies_and_its_prompt_tokens_take() -> None:
    speed = es.StepSpeed()
    speed.record(1, 0, 0.010)
    speed.record(1, 100, 0.110)
    assert speed.step_s(1, 64) == pytest.approx(0.074)
    assert speed.step_s(0, 64) == pytest.approx(0.074), "all weights are read"


def test_a_number_of_rows_that_was_not_timed_is_guessed_from_its_neighbours() -> None:
    speed = es.StepSpeed()
    speed.record(1, 0, 0.013)
    assert speed.decode_s(4) == pytest.approx(0.031, rel=0.2), "as was measured once"
    assert speed.decode_s(16) == pytest.approx(0.071, rel=0.2)
    for _ in range(12):
        speed.record(16, 0, 0.036)
    assert speed.decode_s(15) == pytest.approx(0.0345, rel=0.02)
    assert speed.decode_s(2) == pytest.approx(0.0145, rel=0.01)
    assert speed.decode_s(34) == pytest.approx(0.072, rel=0.02)


def test_what_was_slow_once_is_known_to_be_faster_though_it_does_not_come_again() -> (
    None
):
    speed = es.StepSpeed()
    for slowness in (10, 1):
        for _ in range(20):
            speed.record(1, 0, 0.013 * slowness)
        if slowness > 1:
            speed.record(16, 0, 0.071 * slowness)
    assert speed.decode_s(16) > 0.3
    for _ in range(300):
        speed.record(1, 0, 0.013)
    assert speed.decode_s(16) == pytest.approx(0.078, rel=0.01)


def test_one_slow_step_changes_little() -> None:
    speed = es.StepSpeed()
    speed.record(4, 0, 0.030)
    speed.record(0, 64, 0.094)
    before = speed.step_s(4, 64)
    speed.record(4, 0, 3.0)
    speed.record(0, 64, 30.0)
    assert speed.step_s(4, 64) < 1.31 * before


@pytest.mark.parametrize("slowness", [2.0, 0.5])
def test_another_speed_is_known_within_a_few_steps(slowness: float) -> None:
    box = Box()
    box.slowness = slowness
    for _ in range(8):
        box.planner.speed.record(2, 64, box.cost_s(2, 64))
    assert box.planner.speed.step_s(2, 64) == pytest.approx(box.cost_s(2, 64), rel=0.2)


def test_a_first_step_that_was_slow_is_soon_forgotten() -> None:
    speed = es.StepSpeed()  # as when the weights come from a disk
    speed.record(0, 64, 10.0)
    for _ in range(12):
        speed.record(0, 64, 0.074)
    assert speed.step_s(0, 64) < 0.3


def test_the_few_tokens_after_a_prefix_tell_little_of_a_prompt() -> None:
    speed = es.StepSpeed()
    speed.record(1, 0, 0.010)
    speed.record(0, 512, 0.522)
    for _ in range(10):
        speed.record(0, 2, 0.050)
    assert speed.step_s(0, 512) < 1.1 * 0.522


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 512), st.floats(1e-4, 10)),
        min_size=1,
    )
)
def test_a_speed_is_never_negative(steps: list[tuple[int, int, float]]) -> None:
    speed = es.StepSpeed()
    for rows, tokens, seconds in steps:
        if rows or tokens:
            speed.record(rows, tokens, seconds)
    assert all(speed.step_s(rows, 10) >= 0 for rows in range(20))


# --- pieces ---


def test_nothing_to_do_is_no_step() -> None:
    assert Box().planner.plan([]) is None


def test_while_no_reply_grows_a_step_is_as_large_as_may_be() -> None:
    box = Box()
    box.add(one := prompt(1300))
    box.run(one)
    assert one.pieces == [512, 512, 276]


def test_a_prompt_is_read_in_what_time_the_replies_leave() -> None:
    box = Box()
    box.add(*growing(), one := prompt(300))
    box.run(one)
    assert one.pieces == [64, 64, 64, 64, 44]
    assert box.longest_s <= 0.1


def test_pieces_after_a_prefix_end_at_multiples_of_the_tile() -> None:
    box = Box()
    box.add(*growing(), one := prompt(300, read_tokens=41))
    box.run(one)
    assert one.pieces == [87, 64, 64, 44]


@pytest.mark.parametrize(
    ("slowness", "pieces"), [(2.0, [40, 40, 20]), (8.0, [8] * 12 + [4])]
)
def test_on_a_slow_box_pieces_are_smaller(slowness: float, pieces: list[int]) -> None:
    box = Box(slowness=slowness)
    box.add(*growing(), one := prompt(100))
    box.run(one)
    assert one.pieces == pieces


def test_where_replies_alone_take_too_long_prompts_get_a_third_of_the_time() -> None:
    box = Box(slowness=5)
    box.add(*growing(7), one := prompt(1000))
    box.run(one)
    assert box.cost_s(7, 0) > 0.1
    assert set(one.pieces) == {16, 8}
    assert box.longest_s <= box.cost_s(7, 0) * 1.5


def test_before_the_speed_is_known_a_piece_is_one_tile() -> None:
    box = Box(is_measured=False)
    box.add(one := prompt(2000))
    box.run(one)
    assert one.pieces[:2] == [64, 512]


def test_a_slow_box_without_replies_looks_up_every_second_and_a_half() -> None:
    box = Box(slowness=6)
    box.add(one := prompt(2000))
    box.run(one)
    assert max(one.pieces) == 192
    box = Box(slowness=60)
    box.add(one := prompt(2000))
    box.run(one)
    assert set(one.pieces[:-1]) == {64}, "fewer would be slower still"


def test_short_prompts_share_a_step_and_a_long_one_waits_for_them() -> None:
    box = Box()
    shorts = [prompt(30, f"client {n}") for n in range(6)]
    box.add(prompt(4000), *shorts)
    step = box.step()
    assert [one for one, _ in step.pieces] == shorts


def test_prompts_whose_logits_are_all_asked_for_are_read_by_outputs() -> None:
    box = Box()
    box.add(*growing(2), one := prompt(20, needs_all_logits=True))
    box.run(one)
    assert one.pieces == [6, 6, 6, 2]
    box = Box()
    box.add(one := prompt(20, needs_all_logits=True))
    box.run(one)
    assert one.pieces == [8, 8, 4]


def test_no_more_prompts_end_in_a_step_than_it_has_rows_of_logits() -> None:
    box = Box()
    box.add(*growing(MAX_OUTPUTS - 2), *(prompt(5, str(n)) for n in range(4)))
    assert len(box.step().pieces) == 2


# --- whose turn it is ---


def first_tokens_s(prompts: Iterable[Reply]) -> list[float]:
    """How long each waited for its first token."""
    return [one.first_token_at - one.arrived_at for one in prompts]


@pytest.mark.parametrize("clients", [1, 8])
def test_short_prompts_behind_a_long_one_are_quick(clients: int) -> None:
    # llama-server: 8 to 9 s.
    box = Box()
    box.add(prompt(4000, "long"))
    box.step()
    shorts = [prompt(32, str(n % clients), reply_tokens=64) for n in range(7)]
    box.add(*shorts)
    box.run(*shorts)
    assert max(first_tokens_s(shorts)) < 0.6


@pytest.mark.parametrize("tokens", [60, 700, 3000])
@pytest.mark.parametrize("priority", [0, 1])
def test_a_quarter_is_read_of_the_oldest_even_if_shorter_ones_never_end(
    tokens: int, priority: int
) -> None:
    box = Box()
    box.add(one := prompt(4000, "long"))
    others: list[Reply] = []
    while not one.first_token_at:
        waiting = sum(bool(other.left_tokens) for other in box.work)
        for _ in range(4 - waiting):
            client = f"client {len(others)}"
            others.append(prompt(tokens, client, priority=priority, reply_tokens=1))
            box.add(others[-1])
        box.step()
    assert sum(other.read_tokens for other in others) <= 3.5 * 4000


def test_many_prompts_of_one_client_do_not_delay_another_s_first() -> None:
    box = Box()
    many = [prompt(300, "import", reply_tokens=1) for _ in range(40)]
    box.add(*many[:20])
    box.step()
    box.add(other := prompt(1000, "query", reply_tokens=1), *many[20:])
    box.run(other)
    done = sum(bool(one.first_token_at) for one in many)
    assert done <= 7, "each gets about half"
    assert other.first_token_at < 3.0


def test_clients_with_long_prompts_take_turns() -> None:
    box = Box()
    pair = [prompt(4000, "a"), prompt(4000, "b")]
    box.add(*pair)
    for _ in range(6):
        box.step()
        assert abs(pair[0].read_tokens - pair[1].read_tokens) <= 1024


def test_a_new_client_has_no_turns_to_catch_up() -> None:
    box = Box()
    box.add(old := prompt(8000, "old"))
    while old.read_tokens < 4000:
        box.step()
    before = old.read_tokens
    box.add(new := prompt(4000, "new"))
    while new.read_tokens < 3000:
        box.step()
    assert old.read_tokens - before > 2000


def test_urgent_prompts_go_first_and_yet_the_oldest_gets_on() -> None:
    box = Box()
    box.add(low := prompt(4000, "low", priority=2))
    urgent = [prompt(2000, str(n), priority=0) for n in range(3)]
    box.add(*urgent)
    box.run(*urgent)
    assert not low.first_token_at
    assert low.read_tokens == pytest.approx(2000, abs=320)


# --- deterministic requests ---


@pytest.mark.parametrize("weights", ["q4_k_m", "q8_0", "unknown", "f32", "f16", "bf16"])
def test_a_deterministic_reply_shares_steps_only_where_bits_stay(weights: str) -> None:
    most = es.max_alike_rows(weights)
    assert most == (3 if weights.startswith("q") else 1)
    box = Box(max_alike=most)
    mine = [prompt(10, is_deterministic=True, reply_tokens=20) for _ in range(5)]
    box.add(*growing(4), *mine)
    while any(one in box.work for one in mine):
        box.step()
    assert max(max(one.together) for one in mine) == most
    assert max(len(one.gaps) for one in mine) == 20


def test_more_deterministic_replies_than_rows_grow_alike() -> None:
    box = Box()
    box.add(*(fixed := growing(5, is_deterministic=True)))
    for _ in range(10):
        box.step()
    assert [len(one.gaps) for one in fixed] == [6] * 5


@given(
    st.integers(1, 1500),
    st.lists(st.integers(1, 900), max_size=4),
    st.integers(0, 3),
    st.sampled_from([0.3, 1.0, 3.0]),
)
def test_a_deterministic_prompt_is_read_alike_whatever_else_runs(
    tokens: int, others: list[int], rows: int, slowness: float
) -> None:
    box = Box(slowness=slowness)
    one = prompt(tokens, is_deterministic=True)
    box.add(*growing(rows), *(prompt(n) for n in others), one)
    box.run(one)
    rest = [piece for piece in one.pieces if piece % 64]
    assert rest == ([tokens % 64] if tokens % 64 else [])
    assert not rest or one.pieces[-1] == rest[0]


def test_deterministic_replies_and_others_alternate() -> None:
    box = Box()
    plain, fixed = growing(2), growing(2, is_deterministic=True)
    box.add(*plain, *fixed)
    kinds = [box.step().is_deterministic for _ in range(6)]
    assert kinds == [True, False] * 3
    box.add(one := prompt(640, is_deterministic=True))
    box.run(one)
    assert one.pieces == [64] * 10
    for reply in (*plain, *fixed):
        assert max(reply.gaps) < 0.2


# --- everything at once ---


def arrivals(dice: random.Random, count: int) -> Iterator[Reply]:
    """Requests of all kinds."""
    for _ in range(count):
        yield prompt(
            dice.choice([1, 5, 40, 64, 100, 300, 700, 2000]),
            dice.choice("abcd"),
            priority=dice.choice([0, 1, 1, 2]),
            reply_tokens=dice.choice([1, 5, 40]),
            is_deterministic=dice.random() < 0.2,
            needs_all_logits=dice.random() < 0.1,
        )


@given(
    st.integers(0, 10**6),
    st.sampled_from([0.5, 1.0, 4.0]),
    st.booleans(),
)
def test_every_request_ends_and_no_step_is_too_long(
    seed: int, slowness: float, is_measured: bool
) -> None:
    dice = random.Random(seed)
    box = Box(slowness=slowness, is_measured=is_measured)
    coming = list(arrivals(dice, 20))
    tokens = sum(one.prompt_tokens for one in coming)
    replies = sum(one.reply_tokens for one in coming)
    while coming or box.work:
        while coming and len(box.work) < MAX_OUTPUTS and dice.random() < 0.3:
            box.add(coming.pop())
        if not box.work:
            continue
        is_growing = any(not one.left_tokens for one in box.work)
        before = box.now
        step = box.step()
        took_s = box.now - before
        rows_s = box.cost_s(len(step.rows), 0)
        if is_growing and is_measured:
            least_s = box.cost_s(len(step.rows), 64 if step.is_deterministic else 8)
            assert took_s <= max(0.1, rows_s * 1.5, least_s) + 1e-9
    # Pieces of at least 1 token of those with all logits, 8 of the rest.
    assert box.steps <= tokens + replies + 40
