"""A model that generates without llama.cpp: what it says follows from what was read."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

import embellama_server as es
from tests import kit

N_VOCAB = 300
END = 299  # the token that ends a reply
FIRST = 10  # of those that it says
QUOTE_TOKEN = 6  # a reply after it says again what was before, with slips
NAN_TOKEN, BOOM_TOKEN = 7, 8  # gives NaN as the last one; no step with it works
SHORT_TOKEN = 9  # a reply after it ends at a length that is a multiple of 8


def next_token(ids: Sequence[int]) -> int:
    """What comes after these, all of which decide it."""
    if SHORT_TOKEN in ids and len(ids) % 8 == 0:
        return END
    if QUOTE_TOKEN in ids and len(ids) % 7:
        quoted = [*ids].index(QUOTE_TOKEN)
        return int(ids[(len(ids) - quoted - 1) % quoted])
    digest = hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=4)
    return FIRST + int.from_bytes(digest.digest(), "big") % (END - FIRST)


def said_after(ids: Sequence[int], count: int) -> str:
    """The text of a greedy reply."""
    whole = [*ids]
    while len(whole) < len(ids) + count and (token := next_token(whole)) != END:
        whole.append(token)
    return "".join(f"<{token}>" for token in whole[len(ids) :])


class StepEngine(kit.FakeEngine):
    """An engine whose contexts are StepContexts of ours."""

    def __init__(self, *, cells: int = 512, parallel: int = 4, **options: Any) -> None:
        super().__init__(
            kind="generate", cells=cells, n_vocab=N_VOCAB, prefix=(), suffix=()
        )
        self.parallel = parallel
        self.options = options
        self.contexts: list[FakeStepContext] = []
        self.no_context = 0  # how many times there is no room for one
        self.steps: list[list[es.StepRow]] = []  # all that were computed
        self.are_deterministic: list[bool] = []  # of each, whether it is
        self.failures = {NAN_TOKEN: 10**9, BOOM_TOKEN: 10**9}
        self.vocab = None
        self.lies_about_room = 0  # how many steps find no cell
        self.copies: list[list[tuple[int, object]]] = []  # what was copied out
        self.fails_to_copy = 0  # how many times

    def llama_vocab_get_suppress_tokens(self, *_: object) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("llama_"):  # its samplers are the real ones
            return getattr(es._llama_cpp(), name)
        raise AttributeError(name)

    def llama_vocab_n_tokens(self, _: object) -> int:
        return N_VOCAB

    @property
    def llama(self) -> Any:
        return self

    def new_step_context(self) -> es.StepContext:
        if self.no_context:
            self.no_context -= 1
            raise es.NoRoom("no room for a context")
        self.contexts.append(FakeStepContext(self))
        return self.contexts[-1]


class FakeStepContext(es.StepContext):
    """KV cells as lists of tokens; asserts what llama.cpp would abort for."""

    def __init__(self, engine: StepEngine) -> None:
        options: dict[str, Any] = {"window": 0, "can_trim": True, "max_tokens": 64}
        options |= {"max_sequences": 4 * engine.parallel, "max_outputs": 16}
        for name, value in (options | engine.options).items():
            setattr(self, name, value)
        self.cells = engine.card.cells
        self.sequences: list[list[tuple[int, object]]] = [
            [] for _ in range(self.max_sequences)
        ]
        self.is_aborted = False
        self.is_closed = False
        self.thread: int | None = None
        self._engine = engine
        self._rows: dict[int, Any] = {}

    def decode(
        self,
        rows: Sequence[es.StepRow],
        threads: int,
        *,
        is_deterministic: bool = False,
    ) -> None:
        self._check_thread()
        engine = self._engine
        try:
            engine.enter(self)  # type: ignore[arg-type]
        except es.CallAborted:  # llama.cpp keeps the parts before the one it was in
            for row in rows:
                some = row.ids[: len(row.ids) // 2]
                self.sequences[row.sequence] += [(int(t), object()) for t in some]
            raise
        engine.threads.append(threads)
        assert 0 < sum(len(row.ids) for row in rows) <= self.max_tokens
        assert sum(row.outputs for row in rows) <= self.max_outputs
        assert len({row.sequence for row in rows}) == len(rows)
        if engine.lies_about_room:
            engine.lies_about_room -= 1
            raise es.NoCells("as asked")
        if self._fails(BOOM_TOKEN, rows):
            raise es.EngineError("as asked")
        at, self._rows = 0, {}
        for row in rows:
            held = self.sequences[row.sequence]
            assert row.begin == len(held), "a hole, or a token twice"
            for n, token in enumerate(row.ids):
                held.append((int(token), object()))
                if n >= len(row.ids) - row.outputs:
                    self._rows[at + n] = self._row([one for one, _ in held])
            at += len(row.ids)
        used = {id(cell) for held in self.sequences for _, cell in held}
        assert len(used) <= self.cells, "more than there are"
        engine.steps.append([*rows])
        engine.are_deterministic.append(is_deterministic)

    def logits(self, index: int) -> Any:
        self._check_thread()
        return self._rows[index]

    def copy(self, source: int, target: int, length: int) -> None:
        self._check_thread()
        assert not self.sequences[target], "not empty"
        assert len(self.sequences[source]) >= length
        self.sequences[target] = self.sequences[source][:length]

    def trim(self, sequence: int, length: int) -> bool:
        self._check_thread()
        assert self.can_trim or not length, "only whole sequences"
        del self.sequences[sequence][length:]
        return True

    def copy_out(self, sequence: int, begin: int, end: int) -> es.CellState:
        self._check_thread()
        engine = self._engine
        if engine.fails_to_copy:
            engine.fails_to_copy -= 1
            raise es.EngineError("as asked")
        part = [(token, object()) for token, _ in self.sequences[sequence][begin:end]]
        assert len(part) == end - begin
        engine.copies.append(part)
        number = np.array([len(engine.copies) - 1, begin])
        return np.concatenate([number.view(np.uint8), np.zeros(len(part), np.uint8)])

    def copy_in(self, sequence: int, state: es.CellState, begin: int, end: int) -> bool:
        self._check_thread()
        number, at = state[:16].view(np.int64)
        held, part = self.sequences[sequence], self._engine.copies[number]
        assert len(held) == begin >= at
        held += part[begin - at : end - at]
        assert len(held) == end
        return True

    def first_position(self, sequence: int) -> int:
        return 0 if self.sequences[sequence] else -1

    def last_position(self, sequence: int) -> int:
        return len(self.sequences[sequence]) - 1

    def clear(self, *, wipes: bool = True) -> None:
        for held in self.sequences:
            held.clear()

    def rearm(self) -> None:
        self.is_aborted = False

    def abort(self) -> None:
        self._engine.abort(self)  # type: ignore[arg-type]

    def close(self) -> None:
        assert not self.is_closed
        self.is_closed = True

    def _row(self, ids: Sequence[int]) -> Any:
        row = np.zeros(N_VOCAB, np.float32)
        row[next_token(ids)] = 10.0
        if self._fails(NAN_TOKEN, [es.StepRow(0, 0, ids[-1:])]):
            row[:] = np.nan
        return row

    def _fails(self, token: int, rows: Sequence[es.StepRow]) -> bool:
        if (
            not any(token in row.ids for row in rows)
            or not self._engine.failures[token]
        ):
            return False
        self._engine.failures[token] -= 1
        return True

    def _check_thread(self) -> None:
        assert not self.is_closed
        self.thread = self.thread or threading.get_ident()
        assert self.thread == threading.get_ident(), "another thread"


class Words:
    """Its vocabulary."""

    end_tokens = frozenset((END,))

    def adds_space_after(self, ids: Sequence[int]) -> bool:
        return False

    def piece(self, token: int) -> bytes:
        return f"<{token}>".encode()

    def constraint(self, grammar: es.Grammar | None, *, drops_space: bool) -> None:
        assert grammar is None


class Asked:
    """A request under way, as whoever waits for it sees it."""

    def __init__(
        self, request: es.GenerationRequest, client: str = "", **more: Any
    ) -> None:
        self.deltas: list[es.Delta] = []
        self._over = threading.Event()
        self._began = threading.Event()
        self.generation = es.Generation(request, self._changed, client, **more)

    def _changed(self) -> None:
        self.deltas += self.generation.take()
        self._began.set()
        if self.generation.is_over:
            self._over.set()

    def wait(self) -> es.Generation:
        """Return it once it is over."""
        assert self._over.wait(kit.DEADLINE_S), "it did not end"
        return self.generation

    def wait_for_token(self) -> None:
        """Return once it has gained something."""
        assert self._began.wait(kit.DEADLINE_S), "it did not begin"

    def text(self, index: int = 0) -> str:
        """What one of its replies says, once it is over."""
        generation = self.wait()
        if generation.error is not None:
            raise generation.error
        return "".join(delta.text for delta in self.deltas if delta.index == index)

    def reason(self, index: int = 0) -> str:
        """Why that ended."""
        self.wait()
        reasons = [d.finish_reason for d in self.deltas if d.index == index]
        assert not any(reasons[:-1]), "it went on after its end"
        return reasons[-1]


class Generating:
    """A running pool of a model that generates."""

    def __init__(self, engine: Any, **settings: Any) -> None:
        self.engine = engine
        self.reports: list[es.StepReport] = []
        usual = {"workers": 1, "parallel": 4, "draft_tokens": 0}
        chosen = es.ModelSettings(**(usual | settings))
        backlog = es.Backlog(es.Size(1 << 16, 1 << 24, 1 << 30))
        self.queue = es.GenerationQueue(engine.card, chosen, backlog)
        self.log = kit.WatchedLog()
        self.cores = es.Cores()  # that other models' calls compute on
        told = kit.hooks(
            es.Log("debug", "text", self.log),
            deliver=lambda call: call(),
            on_step=self.reports.append,
            cores=self.cores,
        )
        words: Any = Words()
        if not isinstance(engine, StepEngine):
            words = es.Vocabulary(engine.tokenizer, "")
        self._worker = es.GenerationWorker(engine, self.queue, words, told)
        self.pool = es.Pool(engine, self.queue, self._worker, told)

    @property
    def planner(self) -> es.StepPlanner:
        """What decides its steps; another one after a step that failed."""
        return self._worker._planner

    def ask(self, ids: Sequence[int], max_tokens: int = 8, **more: Any) -> Asked:
        """Ask for a reply; greedy unless told otherwise."""
        about = {
            name: more.pop(name)
            for name in ("client", "priority", "timeout_s")
            if name in more
        }
        more = {"sampling": GREEDY} | more
        asked = Asked(
            es.GenerationRequest(ids=ids, max_tokens=max_tokens, **more), **about
        )
        self.queue.submit(asked.generation)
        return asked


GREEDY = es.SamplingOptions(temperature=0)


@contextmanager
def generating(engine: Any = None, **settings: Any) -> Iterator[Generating]:
    """A pool that runs; nothing of it is left behind."""
    running = Generating(engine or StepEngine(), **settings)
    running.pool.start()
    try:
        yield running
    finally:
        if isinstance(running.engine, StepEngine):
            running.engine.release()
        assert running.pool.stop(kit.DEADLINE_S)
