"""What tests share: a fake engine, a server to talk to, raw bytes on a socket.

No test logic here. ``python -m tests.kit FLAGS`` is the real program with the fake
engine, for black-box tests that need no model. With ``supervised`` before the flags,
which must name a --model-path then, it has a parent, and its engine fails as the inputs
say: see FaultyEngine.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import ctypes
import dataclasses
import gc
import http.client
import io
import itertools
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import (
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import embellama_server as es

ROOT = Path(__file__).resolve().parent.parent
DEADLINE_S = (
    60.0  # of every wait in the tests: long enough that it only ever means "never"
)
SPACE = re.compile(r"\s")
NAN_WORD, BOOM_WORD = "nan", "boom"  # texts holding these words fail, see FakeEngine


def fake_card(**changes: Any) -> es.ModelCard:
    """A card for a fake model: 8 numbers a vector, 32 tokens an input."""
    facts: dict[str, Any] = {
        "architecture": "fake",
        "n_embd": 8,
        "n_vocab": 2**30,
        "n_params": 1,
        "size_bytes": 1,
        "trained_tokens": 32,
        "max_input_tokens": 32,
        "context_tokens": 64,
        "batch_inputs": 16,
        "pooling": "mean",
        "weights": "f16",
        "tokenizer": "fake",
        "pre_tokenizer": "",
        "prefix": (1,),
        "suffix": (2,),
    }
    if changes.get("n_scores"):
        facts["kind"] = "rank"
    return es.ModelCard(**(facts | changes))


RAW_LENGTH = 4.0  # of a fake model's rows: a power of 2, so exact


def fake_id(word: str) -> int:
    """The token id of a word: below 10 for the failing ones, 10 to 2**30 otherwise."""
    if word in (NAN_WORD, BOOM_WORD):
        return 3 + (NAN_WORD, BOOM_WORD).index(word)
    return zlib.crc32(word.encode("utf-8", "surrogatepass")) % (2**30 - 10) + 10


def fake_vector(ids: Sequence[int], n_embd: int = 8) -> Any:
    """The vector of token ids: another one for other ids, length 1."""
    seed = zlib.crc32(np.array(ids, np.int32).tobytes())
    raw = np.random.default_rng(seed).standard_normal(n_embd)
    once = es.normalised(raw)
    return es.normalised(once)  # which a third time would not change


def fake_row(ids: Sequence[int], n_embd: int = 8) -> Any:
    """What a fake model gives for token ids: their vector, not scaled to length 1."""
    return fake_vector(ids, n_embd) * RAW_LENGTH


def units(rows: Any) -> Any:
    """Each row scaled to length 1."""
    return np.array([es.normalised(row) for row in rows])


class FakeEngine(es.Engine):
    """An Engine without a model, and its own tokenizer.

    A word is a token, a vector a hash of the tokens; if it ``is_touchy``, what shares the
    call moves it a little, as llama.cpp's.

    block() makes every call wait until release() or Context.abort(), which ``aborts``
    counts; wait_until_computing() returns when a worker is inside one. ``failures`` counts down for each word: a call with the word
    NAN_WORD gives NaN that many times, one with BOOM_WORD raises.
    """

    is_touchy = False

    def __init__(
        self,
        path: str = "",
        settings: es.ModelSettings | None = None,
        log: es.Log | None = None,
        sha256: str = "",
        **card: Any,
    ) -> None:
        self.card = fake_card(**card)
        self.tokenizer: Any = self
        self.adds_space = False
        self.spelling = es.Spelling((), composes=False)
        self.calls: list[list[list[int]]] = []  # the batches, in order of completion
        self.threads: list[int] = []  # of each call
        self.callers: list[str] = []  # the worker of each call
        self.contexts_open = 0
        self.long_contexts_made = 0
        self.aborts = 0
        self.is_deaf = False  # to aborts, as a GPU may be
        self.times_closed = 0  # twice would be a crash
        self.failures = {fake_id(NAN_WORD): 10**9, fake_id(BOOM_WORD): 10**9}
        self._gate = threading.Condition()
        self._is_open = True
        self._entered = threading.Semaphore(0)
        self.lock = threading.Lock()

    def block(self) -> None:
        """From now on calls wait inside the engine; those before count as begun no more."""
        while self._entered.acquire(blocking=False):
            pass
        self._is_open = False

    def release(self) -> None:
        """Let waiting calls go on."""
        with self._gate:
            self._is_open = True
            self._gate.notify_all()

    def wait_until_computing(self) -> None:
        """Return when one more call has begun since block()."""
        assert self._entered.acquire(timeout=DEADLINE_S), "no worker began a call"

    def encode(self, text: str) -> list[int]:
        return [fake_id(word) for word in text.split()]

    def encode_parts(
        self, text: str, most: int, *, from_end: bool = False
    ) -> Iterator[list[int]]:
        places = [0]
        while found := SPACE.search(text, places[-1] + es.PART_CHARS):
            places.append(found.start())
        parts = itertools.pairwise([*places, len(text)])
        for begin, end in reversed([*parts]) if from_end else parts:
            yield self.encode(text[begin:end])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [f"<{token}>" for token in ids]

    def believe(self, template: str) -> None:
        pass

    def piece(self, token: int) -> bytes:
        return f"<{token}>".encode()

    def decode(self, ids: Sequence[int], *, with_special: bool) -> str:
        special = {*self.card.prefix, *self.card.suffix} if not with_special else set()
        return " ".join(f"<{token}>" for token in ids if token not in special)

    def new_context(
        self, *, needs_long_context: bool = False, per_token: bool = False
    ) -> FakeContext:
        with self.lock:
            self.contexts_open += 1
            self.long_contexts_made += needs_long_context
        return FakeContext(
            self, needs_long_context=needs_long_context, per_token=per_token
        )

    def reencode(self, target: str, weights: str) -> None:
        Path(target).write_bytes(es.GGUF_MAGIC + weights.encode())

    @property
    def is_closed(self) -> bool:
        return self.times_closed > 0

    def close(self) -> None:
        self.times_closed += 1

    def enter(self, context: FakeContext) -> None:
        """Called by a context at the start of a call."""
        self._entered.release()
        with self._gate:
            gone_on = self._gate.wait_for(
                lambda: self._is_open or context.is_aborted, DEADLINE_S
            )
        assert gone_on, "blocked for ever"
        if context.is_aborted:
            raise es.CallAborted("as asked")

    def abort(self, context: FakeContext) -> None:
        """Called by a context whose call is to end."""
        with self._gate:
            self.aborts += 1
            context.is_aborted = not self.is_deaf
            self._gate.notify_all()

    def fails(self, word: str, ids: Sequence[int]) -> bool:
        """Whether these ids hold the word and it still has failures left."""
        token = fake_id(word)
        with self.lock:
            if token not in ids or self.failures[token] <= 0:
                return False
            self.failures[token] -= 1
            return True


class TouchyEngine(FakeEngine):
    """One whose vectors depend on which inputs share a call, and on their order."""

    is_touchy = True


class FakeContext(es.Context):
    """A Context of a FakeEngine; asserts that one thread uses it, the long-input context's at a time."""

    def __init__(
        self,
        engine: FakeEngine,
        *,
        needs_long_context: bool = False,
        per_token: bool = False,
    ) -> None:
        self._engine = engine
        self._per_token = per_token
        self._thread = 0 if needs_long_context else threading.get_ident()
        self._in_use = threading.Lock()
        self.is_aborted = False
        card = engine.card
        self._max_tokens = (
            card.max_input_tokens if needs_long_context else card.context_tokens
        )
        self._max_inputs = 1 if needs_long_context else card.batch_inputs

    def embed(
        self,
        inputs: Sequence[Any],
        *,
        threads: int = 1,
        fresh: bool = False,
    ) -> Any:
        mine = self._thread in (0, threading.get_ident())
        assert mine, "a context changed threads"
        assert self._in_use.acquire(blocking=False), "two threads in one context"
        try:
            rows = self._vectors(inputs, threads)
            if self._engine.card.kind == "rank":
                return rows[:, : self._engine.card.n_scores]
            return rows * RAW_LENGTH
        finally:
            self._in_use.release()

    def _vectors(self, inputs: Sequence[Any], threads: int) -> Any:
        engine, card = self._engine, self._engine.card
        engine.enter(self)
        batches = [[int(i) for i in ids] for ids in inputs]
        assert sum(map(len, batches)) <= self._max_tokens
        assert len(batches) <= self._max_inputs
        computed = [[i] for i in batches[0]] if self._per_token else batches
        vectors = np.array([fake_vector(ids, card.n_embd) for ids in computed])
        if engine.is_touchy:
            vectors[:, 0] += 1e-4 * (sum(map(len, computed)) + np.arange(len(computed)))
        with engine.lock:
            engine.calls.append(batches)
            engine.threads.append(threads)
            engine.callers.append(threading.current_thread().name)
        for row, ids in enumerate(batches):
            if engine.fails(BOOM_WORD, ids):
                raise es.EngineError("boom")
            if engine.fails(NAN_WORD, ids):
                vectors[row] = np.nan
        return vectors

    def rearm(self) -> None:
        self.is_aborted = False

    def abort(self) -> None:
        self._engine.abort(self)

    def close(self) -> None:
        with self._engine.lock:
            self._engine.contexts_open -= 1


class FakeTemplate:
    """What was said, and nothing else. Words in angle brackets are not plain text."""

    def __init__(self) -> None:
        self.refusal: es.ApiError | None = None
        self.asked: list[tuple[Sequence[es.Message], dict[str, Any]]] = []
        self.thoughts = (es.THINK,)
        self.source, self.names = "fake", {"bos_token": "<s>", "eos_token": "</s>"}

    def render(
        self, messages: Sequence[es.Message], **options: Any
    ) -> es.RenderedPrompt:
        self.asked.append((messages, options))
        if self.refusal is not None:
            raise self.refusal
        said = [str(message["content"]) for message in messages]
        parts = [es.PromptPart(text, is_plain=True) for text in said]
        return es.RenderedPrompt(parts)


class Speaker:
    """Says again what it is told, a word in each step.

    A reply ends with "stop" after the last word of the prompt, which takes a token of its
    own. By itself it takes a step whenever the event loop comes round; after pause() only
    when step() is called. Event loop only, as the queue of an engine that generates.
    """

    def __init__(self, engine: FakeChatEngine) -> None:
        self.engine = engine
        self.generations: list[es.Generation] = []  # all there were
        self._running: dict[es.Generation, None] = {}
        self._rows = 0  # of a step
        self.cancelled: list[es.Generation] = []
        self.refusal: es.ApiError | None = None  # of all that are submitted
        self.words: Sequence[str] | None = None  # instead of the prompt's
        # Or what each reply gains in turn; the last one has a finish_reason.
        self.gains: Sequence[es.Delta] | None = None
        self.is_paused = False
        self.submitted = asyncio.Event()

    def pause(self) -> None:
        """From now on it speaks only when told to."""
        self.is_paused = True

    @property
    def running(self) -> list[es.Generation]:
        """Those that are not over."""
        return [*self._running]

    async def heard(self, count: int = 1) -> es.Generation:
        """The last of so many generations, once they have been submitted."""
        async with asyncio.timeout(DEADLINE_S):
            while len(self.generations) < count:
                self.submitted.clear()
                await self.submitted.wait()
        return self.generations[count - 1]

    def submit(self, generation: es.Generation) -> None:
        if self.refusal is not None:
            raise self.refusal
        generation.arrived_at = time.monotonic()
        self.generations.append(generation)
        self._running[generation] = None
        self._rows += generation.request.n
        self.submitted.set()
        if not self.is_paused:
            asyncio.get_running_loop().call_soon(self._go_on, generation)

    def cancel(self, generation: es.Generation) -> None:
        if not generation.is_over:
            self.end(generation)
            self.cancelled.append(generation)

    def _go_on(self, generation: es.Generation) -> None:
        if not generation.is_over:
            self._step(generation)
            asyncio.get_running_loop().call_soon(self._go_on, generation)

    def step(self, times: int = 1, only: es.Generation | None = None) -> None:
        """Let every generation say its next word, or one alone."""
        for _ in range(times):
            for generation in self.running if only is None else [only]:
                self._step(generation)

    def fail(self, error: es.ApiError) -> None:
        """End every generation with an error."""
        for generation in self.running:
            generation.error = error
            self.end(generation)
            generation.changed()

    def _step(self, generation: es.Generation) -> None:
        request, now = generation.request, time.monotonic()
        words = [self.engine.word(token) for token in request.ids]
        if not generation.started_at:
            generation.started_at = now
            if request.echoes_logprobs:
                generation.prompt_logprobs = [
                    self._logprob(request, word, -0.25) for word in words[1:]
                ]
        said, others = generation.tokens // request.n, self.words
        words = words if others is None else [*others]
        for index in range(request.n):
            if self.gains is None:
                delta = self._word(request, words, said, index)
            else:
                delta = self._gained(request, self.gains[said], index)
            generation.tokens += delta.tokens
            generation.step_rows += self._rows * delta.tokens
            generation.put(delta)
        generation.first_token_at = generation.first_token_at or now
        if delta.finish_reason:
            self.end(generation)
        generation.changed()

    def _word(
        self, request: es.GenerationRequest, words: Sequence[str], said: int, index: int
    ) -> es.Delta:
        most = request.max_tokens
        delta = es.Delta(index, tokens=int(said < most))
        if said < min(len(words), most):
            delta.text = f" {words[said]}" if said else words[said]
            delta.finish_reason = "length" if said + 1 >= most else ""
            if request.top_logprobs is not None:
                delta.logprobs = [self._logprob(request, delta.text, -0.5)]
        else:
            delta.finish_reason = "stop" if said < most else "length"
        return delta

    def _gained(
        self, request: es.GenerationRequest, gain: es.Delta, index: int
    ) -> es.Delta:
        delta = es.Delta(index, tokens=1)  # a reply's own: it will be merged into
        delta.add(copy.deepcopy(gain))
        if request.top_logprobs is not None:
            delta.logprobs = [self._logprob(request, f"t{index}", -0.5)]
        return delta

    @staticmethod
    def _logprob(
        request: es.GenerationRequest, text: str, logprob: float
    ) -> es.TokenLogprob:
        others = [(f"other{n}".encode(), -1.0 - n) for n in range(20)]
        top = ((text.encode(), logprob), *others)[: request.top_logprobs or 0]
        return es.TokenLogprob(fake_id(text.strip()), text.encode(), logprob, top)

    def end(self, generation: es.Generation) -> None:
        """End it as it is; the caller says so to whom it may concern."""
        generation.is_over, generation.ended_at = True, time.monotonic()
        del self._running[generation]
        self._rows -= generation.request.n


class FakeChatEngine(FakeEngine):
    """An Engine that generates, its own tokenizer and chat template, see Speaker."""

    def __init__(self, path: str = "", *rest: Any, **card: Any) -> None:
        facts: dict[str, Any] = {"kind": "generate", "cells": 64}
        facts |= {"prefix": (), "suffix": ()}
        super().__init__(path, *rest, **(facts | card))
        self.speaker = Speaker(self)
        self.template = FakeTemplate()
        self._words: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        words = {fake_id(word): word for word in text.split()}
        self._words |= words
        return super().encode(text)

    def encode_prompt(
        self, parts: Sequence[es.PromptPart], *, is_begun: bool = False
    ) -> list[int]:
        return [token for part in parts for token in self.encode(part.text)]

    def word(self, token: int) -> str:
        """What the token stands for."""
        return self._words.get(token, f"<{token}>")

    def decode(self, ids: Sequence[int], *, with_special: bool) -> str:
        return " ".join(map(self.word, ids))


class NoWords(es.Vocabulary):
    """A vocabulary of a model that follows no grammar, but reads it."""

    texts = None  # type: ignore[assignment]

    def __init__(self, engine: FakeChatEngine) -> None:
        self._engine = engine

    def piece(self, token: int) -> bytes:
        """A word."""
        return self._engine.word(token).encode()

    written = piece

    def grammar(self, text: str, param: str) -> es.Grammar:
        """The grammar."""
        return es.Grammar(text, param)


class SpeakingQueue(es.GenerationQueue):
    """Whose generations are a speaker's."""

    speaker: Speaker

    def submit(self, *generations: es.Generation, is_canary: bool = False) -> None:
        for generation in generations:
            self.speaker.submit(generation)

    def cancel(self, generation: es.Generation) -> None:
        self.speaker.cancel(generation)

    @property
    def growing(self) -> list[es.Generation]:
        return [one for one in self.speaker.running if one.started_at]

    def abandon_all(self, error: es.ApiError) -> int:
        count = len(self.speaker.running)
        self.speaker.fail(error)
        return count


class NoWorkers(es.Workers):
    """Threads that wait for their end."""

    def __init__(self, queue: es.GenerationQueue) -> None:
        self._queue = queue

    def run(self, number: int, started: Future[None]) -> None:
        started.set_result(None)
        while self._queue.wait(is_busy=False):
            pass

    def close(self) -> None:
        pass


def speaking_pool(
    engine: FakeChatEngine, settings: es.ModelSettings | None = None
) -> es.Pool[es.GenerationQueue]:
    """A pool in which the engine's speaker replies, not yet started."""
    chosen = dataclasses.replace(settings or es.ModelSettings(), workers=1)
    queue = SpeakingQueue(engine.card, chosen, es.Backlog(LIMIT), NoWords(engine))
    queue.speaker = engine.speaker
    return es.Pool(engine, queue, NoWorkers(queue), hooks())


class _Loader(es.Loader):
    """Brings FakeChatEngines into memory as well."""

    _real_load, _real_pool = es.Loader.load, es.Loader._pool

    def load(self, settings: es.Settings) -> es.LoadedModel:
        """Return it, with the template of such an engine."""
        loaded = _Loader._real_load(self, settings)
        engine: Any = loaded.pool.engine
        if isinstance(engine, FakeChatEngine):
            loaded.template = engine.template  # type: ignore[assignment]
        return loaded

    def _pool(
        self, settings: es.Settings, engine: es.Engine, *more: Any
    ) -> es.Pool[es.WorkQueue]:
        if isinstance(engine, FakeChatEngine):
            return speaking_pool(engine, settings)
        return _Loader._real_pool(self, settings, engine, *more)


es.Loader.load = _Loader.load  # type: ignore[method-assign,assignment]
es.Loader._pool = _Loader._pool  # type: ignore[method-assign,assignment]


class FaultyEngine(FakeEngine):
    """What goes wrong is asked for through the public API, by words in the inputs.

    slow    takes SLOW_S
    crash   the process dies of SIGSEGV
    exit    the process ends by itself, with code 3
    gil     keeps the interpreter lock for ever
    deaf    never ends, whatever it is told
    stall   never ends until it is aborted
    memory  asks for a tebibyte
    quit    the worker's thread ends, as if of a bug of ours
    Loading fails likewise by the name of the model file: crash, exit, deaf, or
    refuse.gguf, the last of which is a sentence.
    """

    SLOW_S = 0.05

    def __init__(self, path: str = "", *rest: Any, **card: Any) -> None:
        super().__init__(path, *rest, **card)
        stem = Path(path).stem
        if stem == "refuse":
            raise es.StartupError(f"{path}: refused")
        if stem in ("crash", "exit", "deaf"):
            self.misbehave(stem)

    def new_context(
        self, *, needs_long_context: bool = False, per_token: bool = False
    ) -> FaultyContext:
        super().new_context(needs_long_context=needs_long_context)  # which counts it
        return FaultyContext(
            self, needs_long_context=needs_long_context, per_token=per_token
        )

    def misbehave(self, word: str) -> None:
        """Do what the word says."""
        if word == "slow":
            time.sleep(self.SLOW_S)
        elif word == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif word == "exit":
            os._exit(3)
        elif word == "gil":
            ctypes.PyDLL(None).sleep(10**6)
        elif word == "deaf":
            threading.Event().wait()
        elif word == "memory":
            bytearray(1 << 40)
        elif word == "quit":
            raise SystemExit


class FaultyContext(FakeContext):
    """Of a FaultyEngine."""

    def __init__(
        self, engine: FaultyEngine, *, needs_long_context: bool, per_token: bool = False
    ) -> None:
        super().__init__(
            engine, needs_long_context=needs_long_context, per_token=per_token
        )
        self._faulty = engine
        self._aborted = threading.Event()

    def _vectors(self, inputs: Sequence[Any], threads: int) -> Any:
        ids = {int(token) for row in inputs for token in row}
        for word in ("slow", "crash", "exit", "gil", "deaf", "memory", "quit"):
            if fake_id(word) in ids:
                self._faulty.misbehave(word)
        if fake_id("stall") in ids:
            wait(self._aborted)
            raise es.CallAborted("as asked")
        return super()._vectors(inputs, threads)

    def rearm(self) -> None:
        super().rearm()
        self._aborted.clear()

    def abort(self) -> None:
        super().abort()
        self._aborted.set()


def threads_since(before: set[threading.Thread]) -> set[str]:
    """The names of threads that came after. Not their number: older ones may end."""
    return {thread.name for thread in set(threading.enumerate()) - before}


def wait(event: threading.Event) -> None:
    """Wait for an event, but not for ever."""
    assert event.wait(DEADLINE_S), "nobody set the event"


_OF_REQUESTS = {row.name for row in dataclasses.fields(es.EmbedRequest)} - {"priority"}


def job(
    inputs: Sequence[es.Input],
    finished: Callable[[], None] = lambda: None,
    **wanted: Any,
) -> es.Job:
    """A job; ``wanted``: fields of it or of its request."""
    asked = {name: wanted.pop(name) for name in [*wanted] if name in _OF_REQUESTS}
    return es.Job(es.EmbedRequest(inputs=inputs, **asked), finished, **wanted)


def token_bound(item: es.Input, card: es.ModelCard) -> int:
    """What is reserved for an input until it is tokenized."""
    return es.token_bounds(es.EmbedRequest(inputs=[item]), card)[0]


def hooks(log: es.Log | None = None, **more: Any) -> es.PoolHooks:
    """Of a pool that nobody hears of; ``more``: but this."""
    nothing = {"deliver": lambda call: None, "on_call": lambda call: None}
    return es.PoolHooks(log=log or quiet_log(), **(nothing | more))


LIMIT = es.Size(10_000, 10**6, 1 << 40)


def pool(
    engine: FakeEngine,
    *,
    limit: es.Size = LIMIT,
    cache_bytes: int = 0,
    log: es.Log | None = None,
    **wanted: Any,
) -> es.Pool[es.BatchQueue]:
    """A pool for an engine, not yet started; ``wanted``: of its settings or hooks."""
    names = {row.name for row in dataclasses.fields(es.PoolHooks)}
    heard = {name: wanted.pop(name) for name in [*wanted] if name in names}
    told = hooks(log, **({"deliver": lambda call: call()} | heard))
    settings = es.ModelSettings(**({"workers": 1, "batch_tokens": 64} | wanted))
    cache = es.VectorCache(cache_bytes, "space")
    backlog = es.Backlog(limit, settings.workers)
    queue = es.BatchQueue(engine.card, settings, backlog, cache)
    return es.Pool(engine, queue, es.BatchWorkers(engine, queue, told), told)


def without_amx(lines: Iterable[str]) -> list[str]:
    """Lines of a log but the one that depends on the compiler of llama.cpp."""
    return [line for line in lines if "AMX is built wrong and left out" not in line]


def quiet_log() -> es.Log:
    """A log nobody reads."""
    return es.Log("error", "text", io.StringIO())


def direct(peer: str) -> es.Sender:
    """Who asks from there, without a proxy."""
    return es.Sender(peer, peer)


def settings(**changes: Any) -> es.Settings:
    """Settings for tests: any free port, one worker, a model file nobody opens."""
    base: dict[str, Any] = {"port": 0, "workers": 1, "model_path": "fake.gguf"}
    base["host"] = "127.0.0.1"  # one listener is enough
    base["cache_dir"] = "/dev/null/none"  # nothing is kept
    base["allowed_host"] = ("h", "test")  # what raw requests in tests say
    return es.Settings(**(base | changes))


class WatchedLog(io.StringIO):
    """A log stream that says when the server is ready (or has stopped)."""

    def __init__(self) -> None:
        super().__init__()
        self.settled = asyncio.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        if " ready " in text or " stopped " in text:
            self.settled.set()
        return written


class Configuration:
    """What a service finds when it reads its configuration again."""

    def __init__(self, chosen: es.Settings, models: Sequence[es.Settings] = ()) -> None:
        self.now: es.Settings | Exception = chosen
        self.models = tuple(models)  # none: there is one, as the settings say

    def read(self) -> es.LoadedSettings:
        if isinstance(self.now, Exception):
            raise self.now
        sources = {row.name: "default" for row in es.SETTING_ROWS}
        return es.LoadedSettings(self.now, sources, self.models or (self.now,))


def bound(chosen: es.Settings) -> list[socket.socket]:
    """The listeners of these settings, as the command line binds them."""
    return es.bind_all(chosen)


# The names of models beside the first one, see all_routes().
RANKER, CHATTER = "ranker", "chatter"
# What each route that takes a body answers with 200.
SAID = [{"role": "user", "content": "a b"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": CHATTER, "messages": SAID},
    "/chat/completions": {"model": CHATTER, "messages": SAID},
    "/v1/completions": {"model": CHATTER, "prompt": "a b"},
    "/completions": {"model": CHATTER, "prompt": "a b"},
    "/v1/responses": {"model": CHATTER, "input": "a b"},
    "/responses": {"model": CHATTER, "input": "a b"},
    "/chat": {"model": CHATTER, "prompt": "a b"},
    "/v1/embeddings": {"input": "a b"},
    "/embeddings": {"input": "a b"},
    "/v1/rerank": {"model": RANKER, "query": "a", "documents": ["b", {"text": "c d"}]},
    "/v2/rerank": {"model": RANKER, "query": "a", "documents": ["b", "c d"]},
    "/rerank": {"model": RANKER, "query": "a", "texts": ["b", "c d"]},
    "/v1/reranking": {"model": RANKER, "query": "a", "documents": ["b", "c d"]},
    "/reranking": {"model": RANKER, "query": "a", "documents": ["b", "c d"]},
    "/v1/embed": {"texts": ["a b"]},
    "/v2/embed": {"texts": ["a b"], "input_type": "search_query"},
    "/v1/score": {"model": RANKER, "text_1": "a", "text_2": ["b", "c d"]},
    "/score": {"model": RANKER, "text_1": "a", "text_2": ["b", "c d"]},
    "/embed": {"inputs": "a b"},
    "/embed_all": {"inputs": "a b"},
    "/similarity": {"inputs": {"source_sentence": "a b", "sentences": ["c", "d"]}},
    "/tokenize": {"inputs": "a b"},
    "/decode": {"ids": [10, 11]},
    "/detokenize": {"tokens": [10, 11]},
    "/apply-template": {"model": CHATTER, "messages": SAID},
    "/": {"inputs": "a b"},
    "/invocations": {"inputs": "a b"},
    "/api/v1/embed": {"inputs": "a b"},
    "/api/embed": {"model": "fake", "input": "a b"},
    "/api/embeddings": {"model": "fake", "prompt": "a b"},
    "/api/chat": {"model": CHATTER, "messages": SAID, "stream": False},
    "/api/generate": {"model": CHATTER, "prompt": "a b", "stream": False},
    "/api/show": {"model": "fake"},
    "/api/pull": {"model": "fake", "stream": False},
    "/admin/models/load": {"model": "fake"},
    "/admin/models/unload": {"model": "fake"},
    "/admin/models/default": {"model": "fake"},
    "/admin/drain": {"off": True},
}


def ranks(path: str) -> bool:
    """Whether the route needs a reranker."""
    return "rerank" in path or "score" in path


def generates(path: str) -> bool:
    """Whether the route needs a model that generates."""
    if path in ("/chat", "/api/chat", "/api/generate", "/apply-template"):
        return True
    return "completions" in path or "responses" in path


def model_of(path: str) -> str:
    """The model of all_routes() that the route needs."""
    if generates(path):
        return CHATTER
    return RANKER if ranks(path) else "fake"


def path_of(route: es.Route) -> str:
    """A path that the route takes."""
    return route.path.replace("{id}", "fake")


def body_of(route: es.Route) -> dict[str, Any] | None:
    """A body that the route takes, if it takes any."""
    return BODIES[route.path] if route.form else None


def spellings(path: str, root_path: str = "") -> list[str]:
    """The path with more slashes, and behind the prefix: each means the same."""
    doubled = path.replace("/", "//")
    found = [f"{path}/", f"/{path}", doubled, f"{doubled}//", f"///{path}///"]
    prefixed = [root_path + one for one in (path, f"{path}/", doubled)]
    return found + (prefixed if root_path else [])


def needed_bytes(chosen: es.Settings, path: str) -> int:
    """What a model takes of memory, at most."""
    return es.needed_bytes(chosen, es.facts_of(chosen, path))


def all_routes() -> dict[str, Any]:
    """What running_service() needs for every route to answer 200."""
    ranker = FakeEngine(n_scores=1, pair_separator=(5,), pair_suffix=(6,))
    return {"beside": {RANKER: ranker, CHATTER: FakeChatEngine()}}


@dataclass
class RunningService:
    """A Server in this process, serving on the current event loop."""

    server: es.Server
    log: WatchedLog
    engine: FakeEngine
    task: asyncio.Task[int]
    host: str
    port: int
    configuration: Configuration

    @property
    def service(self) -> es.Service:
        """What its handlers have at hand."""
        return self.server.service

    @property
    def served(self) -> es.LoadedModel:
        """The first model, in memory."""
        served = self.service.models.entries[0].loaded
        assert served is not None, "not in memory"
        return served

    @property
    def backlog(self) -> es.Backlog:
        """What that model has admitted and not done."""
        return self.served.pool.queue.backlog

    async def ask(
        self, method: str, path: str, body: Any = None, **fields: str
    ) -> Reply:
        """One request on a connection of its own. A dict or list is sent as JSON.

        With the administrator's key on its routes, unless fields bring one.
        """
        settings = self.service.settings
        has_keys = (
            settings.api_key or settings.api_key_file or "authorization" in fields
        )
        if "/admin/" in path.replace("//", "/") and not has_keys:
            fields |= self.admin_fields()
        raw = body if isinstance(body, bytes) else es.json_codec().dumps(body)
        if body is None:
            raw = b""
        elif "content_type" not in fields:
            fields["content_type"] = "application/json"
        names = {"host": "localhost"}
        names |= {k.replace("_", "-"): v for k, v in fields.items()}
        lines = [f"{method} {path} HTTP/1.1", "connection: close"]
        lines += [f"{k}: {v}" for k, v in names.items()]
        if body is not None:
            lines.append(f"content-length: {len(raw)}")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        return parse_reply(await self.exchange(head + raw), method)

    def admin_fields(self) -> dict[str, str]:
        """What shows the key that the server has written."""
        (path,) = Path(self.service.settings.cache_dir).glob("admin-*.key")
        return {"authorization": f"Bearer {path.read_text().strip()}"}

    def admin_lines(self) -> str:
        """The same as the lines of a head."""
        return "".join(f"{k}: {v}\r\n" for k, v in self.admin_fields().items())

    async def ask_route(self, route: es.Route, **fields: str) -> Reply:
        """A request that the route answers with 200, given all_routes()."""
        return await self.ask(route.method, path_of(route), body_of(route), **fields)

    async def exchange(self, data: bytes) -> bytes:
        """Send bytes, return all that comes back until the server closes."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(data)
            async with asyncio.timeout(DEADLINE_S):
                return await reader.read()
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def running_service(
    engine: FakeEngine | None = None,
    *,
    beside: Mapping[str, FakeEngine] | None = None,
    **changes: Any,
) -> AsyncIterator[RunningService]:
    """A Server with a FakeEngine; stopped at the end unless it already is.

    ``beside``: the engines of other models, by name. ``changes``: of the settings, and
    what _running() takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        changes = {"cache_dir": f"{folder}/cache"} | changes
        async with _running(engine, beside or {}, folder, **changes) as running:
            yield running


@contextlib.asynccontextmanager
async def _running(
    engine: FakeEngine | None,
    others: Mapping[str, FakeEngine],
    folder: str,
    *,
    wait_ready: bool = True,
    before_load: Callable[[], None] = lambda: None,
    notifier: es.Notifier | None = None,
    later: Sequence[FakeEngine] = (),
    is_successor: bool = False,
    **changes: Any,
) -> AsyncIterator[RunningService]:
    """``before_load`` runs on the thread that loads, in place of a slow or failing load.

    ``later``: the engines of later loads, the first one's where there is none.
    ``folder`` is for the files of models, where there are others.
    """
    made = engine or FakeEngine()
    engines = iter((made, *later))

    def factory(path: str, *_: object) -> FakeEngine:
        before_load()
        return others.get(Path(path).stem) or next(engines, made)

    stream = WatchedLog()
    log = es.Log("debug", "text", stream)
    chosen = settings(**changes)
    names = ("fake", *others)
    paths = [str(fake_gguf(Path(folder), name)) for name in names] if others else []
    models = [dataclasses.replace(chosen, model_path=path) for path in paths]
    listeners = bound(chosen)
    config = Configuration(chosen, models)
    server = es.Server(
        config.read(),
        log,
        factory,
        listeners=listeners,
        notifier=notifier or es.Notifier(None, {}),
        read_settings=config.read,
        is_successor=is_successor,
    )
    host, port = "", 0
    if es.is_tcp(listeners[0]):
        host, port = listeners[0].getsockname()[:2]
    announced: list[str] = []
    task = asyncio.create_task(server.run(announced.append))
    await asyncio.sleep(0)  # the administrator's key is written
    if wait_ready:
        async with asyncio.timeout(DEADLINE_S):
            settled = asyncio.create_task(stream.settled.wait())
            await asyncio.wait((task, settled), return_when=asyncio.FIRST_COMPLETED)
            settled.cancel()
            if task.done():
                task.result()
    try:
        yield RunningService(server, stream, made, task, host, port, config)
    finally:
        for each in (made, *others.values()):
            each.release()
        if not task.done():
            server.stop()
        async with asyncio.timeout(DEADLINE_S):
            await task


@dataclass
class Reply:
    """A response, parsed by the standard library."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return es.json_codec().loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object; asserts that it is a whole one."""
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "x-request-id" in self.headers
        return error

    def error_in(self, dialect: es.Dialect) -> str:
        """Its sentence; asserts that it is said just as the dialect says errors."""
        assert self.headers["content-type"] == "application/json"
        assert self.headers["x-should-retry"] in ("true", "false")
        assert "x-request-id" in self.headers
        assert list(self.json) == dialect.schema["required"]
        if isinstance(self.json["error"], dict):
            return str(self.error["message"])
        sentence = self.json["error"]
        assert isinstance(sentence, str) and sentence
        return sentence


def parse_replies(raw: bytes, methods: Sequence[str]) -> list[Reply]:
    """Responses as http.client reads them, one for each method asked."""
    stream = io.BytesIO(raw)
    replies = []
    for method in methods:
        response = http.client.HTTPResponse(_Stream(stream), method=method)  # type: ignore[arg-type]
        response.begin()
        headers = {k.lower(): v for k, v in response.getheaders()}
        replies.append(Reply(response.status, headers, response.read()))
    assert not stream.read(), "bytes after the last response"
    return replies


def parse_reply(raw: bytes, method: str = "GET") -> Reply:
    """The only response in ``raw``."""
    return parse_replies(raw, [method])[0]


@dataclass
class _Stream:
    """The one method http.client needs of a socket; stays open after a response."""

    stream: io.BytesIO

    def makefile(self, mode: str) -> io.BytesIO:
        return _Unclosing(self.stream)


class _Unclosing(io.BytesIO):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__()
        self._stream = stream

    def read(self, size: int | None = -1) -> bytes:
        return self._stream.read(size)

    def readline(self, size: int | None = -1) -> bytes:
        return self._stream.readline(size)

    def close(self) -> None:
        pass


@dataclass
class Server:
    """The program as its own process. Use with ``with``; see ``started``."""

    process: subprocess.Popen[str]
    url: str
    log: list[str] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_for_log(self, text: str, times: int = 1) -> str:
        """The first log line that holds ``text``, or the so manieth, when it is there."""

        def lines() -> list[str]:
            return [line for line in self.log if text in line]

        with self._changed:
            self._changed.wait_for(
                lambda: len(lines()) >= times or self._is_over(), DEADLINE_S
            )
        found = lines()
        assert len(found) >= times, f"no {text!r} in the log:\n" + "".join(self.log)
        return found[times - 1]

    def admin_fields(self) -> dict[str, str]:
        """What shows the key that the server has written."""
        path = self.wait_for_log("admin key written").rpartition("path=")[2].strip()
        return {"authorization": f"Bearer {Path(path).read_text().strip()}"}

    @property
    def child(self) -> int:
        """The process that serves, where this one is its parent; 0: none now."""
        pid = self.process.pid
        try:
            pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            return 0
        if pids:
            self._last_child = int(pids[0])
        return int(pids[0]) if pids else 0

    def kill_child(self) -> None:
        """The last one that was asked for, should it be an orphan that goes on."""
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{self._last_child}/cmdline").read_bytes()
            if b"\0--port\x000\0" in command:  # still it, and not another's
                os.kill(self._last_child, signal.SIGKILL)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code; print the log if it is not 0.

        It tells why, with the stack of every thread after a crash.
        """
        self.process.send_signal(number)
        if code := self.process.wait(DEADLINE_S):
            with self._changed:
                self._changed.wait_for(self._is_over, DEADLINE_S)
            print(f"exit code {code}:\n{''.join(self.log)}")
        return code

    def collect(self) -> None:
        """Thread: gather stderr."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.log.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    _ended: bool = False
    _last_child: int = 0

    def _is_over(self) -> bool:
        return self._ended


@contextlib.contextmanager
def started(
    *flags: str,
    module: Sequence[str] = ("-m", "tests.kit"),
    environment: dict[str, str] | None = None,
    wait_ready: bool = True,
    hand_over: Sequence[int] = (),
    before: Sequence[str] = (),
) -> Iterator[Server]:
    """The program on a free port, killed at the end if still running.

    ``module`` is what Python runs: the kit (fake engine) or embellama_server.py.
    ``hand_over`` are descriptors that the process keeps open.
    ``before`` stands before the command, e.g. prlimit and its flags.
    """
    process = subprocess.Popen(
        [*before, sys.executable, *module, "--port", "0", *flags],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=hand_over,
        text=True,
        process_group=0,  # Ctrl-C is sent to a group
    )
    server = Server(process, "")
    collector = threading.Thread(target=server.collect)
    collector.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if line or wait_ready:  # else it may have ended before it could listen
            said = "".join(server.log) or "no address"
            assert line.startswith("listening on "), said
            server.url = line.split()[-1]
        if wait_ready:
            server.wait_for_log(" ready ")
        yield server
    finally:
        if process.poll() is None:
            assert server.child >= 0  # noted: it may hang, or be stopped
            process.kill()
        server.kill_child()
        process.wait(DEADLINE_S)
        collector.join(DEADLINE_S)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()


def connected(url: str) -> socket.socket:
    """A raw socket to a server."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=DEADLINE_S)


def fake_gguf(folder: Path, name: str = "fake") -> Path:
    """A file that looks like a model to all but an engine; for the fake one."""
    path = folder / f"{name}.gguf"
    header = struct.pack("<4sIQQ", es.GGUF_MAGIC, 3, 0, 1)
    path.write_bytes(header + es._gguf_field("general.architecture", "fake"))
    return path


def feed_whole(data: bytes) -> list[bytes]:
    """One piece."""
    return [data]


def feed_bytes(data: bytes) -> list[bytes]:
    """Byte by byte."""
    return [data[i : i + 1] for i in range(len(data))]


def feed_splits(data: bytes) -> Iterator[list[bytes]]:
    """Every way to cut in two."""
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]


FEEDS: dict[str, Callable[[bytes], list[bytes]]] = {
    "whole": feed_whole,
    "bytes": feed_bytes,
}


def program(arguments: list[str]) -> int:
    """What ``python -m tests.kit`` runs."""
    if arguments[:1] == ["supervised"]:
        command = (sys.executable, "-m", "tests.kit", *arguments)
        return es.main(arguments[1:], engine_factory=FaultyEngine, command=command)
    with tempfile.TemporaryDirectory() as temp:
        model = ["--model-path", str(fake_gguf(Path(temp)))]
        return es.main([*model, *arguments], engine_factory=FakeEngine)


if __name__ == "__main__":
    sys.exit(program(sys.argv[1:]))


def assert_linear(work: Callable[[int], object], size: int) -> None:
    """It takes about as long as its input is large.

    Of four times the size it may take eight times as long, as caches are small, and
    processors busy; it would be sixteen if it took the square. Tried again: one of the two
    may have been disturbed.
    """
    for is_last in (False, False, True):
        small, large = cpu_s(work, size), cpu_s(work, 4 * size)
        if large < 8 * small + 0.01:
            break
        assert not is_last, f"{small:.3f} s, and {large:.3f} s of four times the size"


def cpu_s(work: Callable[[int], object], size: int) -> float:
    """The seconds of this thread that it takes, without those of garbage collection."""
    gc.collect()
    gc.disable()
    try:
        begin = time.thread_time()
        work(size)
        return time.thread_time() - begin
    finally:
        gc.enable()
