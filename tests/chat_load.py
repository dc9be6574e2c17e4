"""What loads a server that generates: a client of streams, and what is asked with it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlsplit
from urllib.request import urlopen

from tests import kit
from tests.bench import quantile_ms
from tests.load import Load, body
from tests.words import WORDS

TIGHT_PARALLEL, TIGHT_CONTEXT = 4, 2048
DEFAULT_CHAIN = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
GREEDY = {"temperature": 0}
LOOKUP_TOKENS = 64
RUNNING_TOKENS = 1000  # more than a stream says while it is watched
STREAMS_BESIDE = 4
EMBEDDED_S, EMBEDDED_TEXTS = 3.0, 8000  # more than are answered


class Stream:
    """A completion that is asked for, and read as it comes."""

    def __init__(
        self, url: str, prompt: str, max_tokens: int, **options: object
    ) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "", address.port or 80
        asks = {"model": "bench", "prompt": prompt, "max_tokens": max_tokens}
        asks |= {"stream": True, "stream_options": {"include_usage": True}}
        self._body = json.dumps(asks | {"ignore_eos": True} | options).encode()
        self.wanted = max_tokens
        self.tokens = self.prompt_tokens = self.cached_tokens = 0
        self.text = self.error = self.finish_reason = ""
        self.arrivals: list[float] = []  # of texts
        self.begun = asyncio.Event()  # it has said something, or ended
        self.sent_at = time.perf_counter()
        self.reading = asyncio.get_running_loop().create_task(self._read())

    @property
    def first_s(self) -> float:
        """From asking to the first text."""
        return self.arrivals[0] - self.sent_at

    async def ended(self) -> Stream:
        """Wait until all of it is here."""
        await self.reading
        if self.error:
            raise SystemExit(f"port {self._port}: {self.error}")
        return self

    async def leave(self) -> None:
        """Close the connection in the middle."""
        self.reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.reading

    async def _read(self) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                % (len(self._body), self._body)
            )
            head = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in head.partition(b"\r\n")[0]:
                self.error = f"{head!r} {await reader.read()!r}"
                return
            async for event in _events(reader):
                self._take(event)
        except (OSError, EOFError) as error:
            self.error = f"the stream broke: {error!r}"
        finally:
            self.begun.set()
            writer.transport.abort()

    def _take(self, event: bytes) -> None:
        if event == b"[DONE]":
            return
        said = json.loads(event)
        if "error" in said:
            self.error = str(said["error"])
        for choice in said.get("choices", ()):
            if choice["text"]:
                self.arrivals.append(time.perf_counter())
                self.text += choice["text"]
                self.begun.set()
            self.finish_reason = choice["finish_reason"] or self.finish_reason
        if usage := said.get("usage"):
            self.tokens = usage["completion_tokens"]
            self.prompt_tokens = usage["prompt_tokens"]
            details = usage.get("prompt_tokens_details") or {}
            self.cached_tokens = details.get("cached_tokens", 0)


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of each event of a chunked reply."""
    rest = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        rest += (await reader.readexactly(size + 2))[:-2]
        *events, rest = rest.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                yield event[6:]


# --- loads: each is asked of a server, and tells what it saw ---

Figures = dict[str, float]


class Texts:
    """Prompts, the same for every server, and different every time."""

    def __init__(self, cell: str, turn: int) -> None:
        self._chance = random.Random(f"{cell}/{turn}")

    def words(self, count: int) -> str:
        """About as many tokens."""
        return " ".join(self._chance.choices(WORDS, k=count))

    def to_quote(self) -> str:
        """A passage to be written again, which has begun."""
        whole = (kit.ROOT / "README.md").read_text()
        begin = whole.index("\n", self._chance.randrange(len(whole) // 2))
        part = whole[begin : begin + 1200]
        return f"Text:\n{part}\n\nThe same text, copied word by word:\n{part[:150]}"

    def to_edit(self) -> str:
        """Code to be written again with another name, which has begun."""
        whole = (kit.ROOT / "tests" / "bench.py").read_text()
        begin = whole.index("\ndef ", self._chance.randrange(len(whole) // 2))
        code = whole[begin : begin + 1200]
        edited = code[:150].replace("server", "peer")
        return (
            f"```python\n{code}\n```\n\nThe same code, where `server` is called `peer`:"
            f"\n\n```python\n{edited}"
        )

    def to_tell(self) -> str:
        """How a story begins."""
        return f"Once upon a time, a {self.words(1)} and a {self.words(1)}"


async def _rate(
    url: str, texts: Texts, name: str, streams: int, **options: object
) -> Figures:
    """Of all streams together, their short prompts included."""
    tokens = {1: 128, 4: 96, 16: 64}[streams]
    steps_s, begun = _steps_s(url), time.perf_counter()
    asked = [
        Stream(url, texts.words(16), tokens, cache_prompt=False, **options)
        for _ in range(streams)
    ]
    for stream in asked:
        assert (await stream.ended()).tokens == tokens
    took = time.perf_counter() - begun
    found = {f"tokens/s: {name}": streams * tokens / took}
    if steps_s:
        part = (_steps_s(url) - steps_s) / took
        found[f"outside llama.cpp, %: {name}"] = 100 - 100 * part
    return found


def _steps_s(url: str) -> float:
    """What it has computed steps for since its start; 0: it does not say."""
    with contextlib.suppress(OSError), urlopen(f"{url}/metrics") as reply:
        for line in reply.read().decode().splitlines():
            if line.startswith("embellama_step_seconds_sum"):
                return float(line.split()[-1])
    return 0.0


async def rates(url: str, texts: Texts) -> Figures:
    """Tokens a second."""
    return {
        **await _rate(url, texts, "1 stream, greedy", 1, **GREEDY),
        **await _rate(url, texts, "1 stream", 1, **DEFAULT_CHAIN),
        **await _rate(url, texts, "4 streams", 4, **DEFAULT_CHAIN),
        **await _rate(url, texts, "16 streams", 16, **DEFAULT_CHAIN),
    }


async def lookup(url: str, texts: Texts) -> Figures:
    """Tokens a second of what says again what was said, and of what does not."""
    found = {}
    for task, text in (
        ("quoting", texts.to_quote),
        ("editing", texts.to_edit),
        ("a story", texts.to_tell),
    ):
        for how, streams, options in (
            ("greedy", 1, GREEDY),
            ("sampled", 1, DEFAULT_CHAIN),
            ("sampled, 4 streams", 4, DEFAULT_CHAIN),
        ):
            asked = [
                Stream(url, text(), LOOKUP_TOKENS, **options) for _ in range(streams)
            ]
            for stream in asked:
                await stream.ended()
            took_s = max(stream.arrivals[-1] for stream in asked)
            took_s -= min(stream.arrivals[0] for stream in asked)
            found[f"{task}, {how}"] = streams * LOOKUP_TOKENS / took_s
    return found


async def first(url: str, texts: Texts) -> Figures:
    """Time to the first text of a prompt that nothing is known of."""
    stream = Stream(url, texts.words(511), 2, cache_prompt=False, **GREEDY)
    return {"first token, ms: 512 tokens": (await stream.ended()).first_s * 1000}


async def prefix(url: str, texts: Texts) -> Figures:
    """A prefix that was seen before, and one of a stream that still runs."""
    found = {}
    for name, tokens in (("past", 16), ("running", RUNNING_TOKENS)):
        shared = texts.words(1000)
        earlier = Stream(url, f"{shared} {texts.words(16)}", tokens, **GREEDY)
        await (earlier.ended() if name == "past" else earlier.begun.wait())
        later = Stream(url, f"{shared} {texts.words(16)}", 2, **GREEDY)
        again = (await later.ended()).first_s
        found[f"1,000 shared tokens, of cold: {name}"] = again / earlier.first_s
        await earlier.leave()
    return found


async def stall(url: str, texts: Texts) -> Figures:
    """A stream's pauses while a long prompt is read."""
    running = Stream(url, texts.words(16), RUNNING_TOKENS, **GREEDY)
    await running.begun.wait()
    await asyncio.sleep(0.5)
    asked = time.perf_counter()
    reading = await Stream(url, texts.words(1999), 2, **GREEDY).ended()
    until = reading.arrivals[0]
    await running.leave()
    times = [asked, *(at for at in running.arrivals if asked < at < until), until]
    pauses = [later - sooner for sooner, later in itertools.pairwise(times)]
    return {
        "2,000 tokens are read: others' pause p99, ms": quantile_ms(pauses, 0.99),
        "2,000 tokens are read: first token, ms": reading.first_s * 1000,
    }


async def queue(url: str, texts: Texts) -> Figures:
    """Short prompts that come just after a very long one."""
    long = Stream(url, texts.words(3999), 2, **GREEDY)
    await asyncio.sleep(0.05)
    short = [Stream(url, texts.words(31), 8, **GREEDY) for _ in range(8)]
    firsts = [(await stream.ended()).first_s for stream in short]
    await long.ended()
    return {"8 behind 4,000 tokens: first token p95, ms": quantile_ms(firsts, 0.95)}


async def abort(url: str, texts: Texts) -> Figures:
    """What a client who leaves in the middle of a long prompt costs the next."""
    usual = (await Stream(url, texts.words(31), 2, **GREEDY).ended()).first_s
    leaver = Stream(url, texts.words(3999), 2, **GREEDY)
    await asyncio.sleep(0.3)
    await leaver.leave()
    after = (await Stream(url, texts.words(31), 2, **GREEDY).ended()).first_s
    return {"after one has left: first token later, ms": (after - usual) * 1000}


async def overcommit(url: str, texts: Texts) -> Figures:
    """Streams that want twice the cells there are, of a server that has few."""
    tokens = 2 * TIGHT_CONTEXT // TIGHT_PARALLEL
    asked = [
        Stream(url, texts.words(tokens // 4), tokens - tokens // 4, **GREEDY)
        for _ in range(TIGHT_PARALLEL)
    ]
    for stream in asked:
        await stream.reading
    return {"twice the cells: lost": sum(s.tokens < s.wanted for s in asked)}


async def beside(url: str, texts: Texts) -> Figures:
    """Embeddings of single texts by another model, alone and while streams run."""
    found: Figures = {}
    for connections in (1, 8):
        alone = await _embedding_ms(url, texts, connections)
        running = [
            Stream(url, texts.words(16), RUNNING_TOKENS, **DEFAULT_CHAIN)
            for _ in range(STREAMS_BESIDE)
        ]
        for stream in running:
            await stream.begun.wait()
        begun = time.perf_counter()
        among = await _embedding_ms(url, texts, connections)
        said = sum(at > begun for stream in running for at in stream.arrivals)
        rate = said / (time.perf_counter() - begun)
        for stream in running:
            assert not stream.reading.done(), "it ended too early"
            await stream.leave()
        name = f"embeddings, {connections} at a time"
        found |= {
            f"{name}: p50 alone, ms": alone,
            f"{name}: p50, of alone": among / alone,
            f"{name}: of {STREAMS_BESIDE} streams, texts/s": rate,
        }
    return found


async def _embedding_ms(url: str, texts: Texts, connections: int) -> float:
    """The p50 of a few seconds; no text comes twice, or a cache would answer."""
    bodies = [body([texts.words(20)]) for _ in range(EMBEDDED_TEXTS)]
    load = Load(url, bodies, connections, EMBEDDED_S)
    await asyncio.to_thread(load.run)
    return quantile_ms(load.latencies, 0.5)


Cell = Callable[[str, Texts], Awaitable[Figures]]
CELLS: dict[str, Cell] = {
    cell.__name__: cell for cell in (rates, first, prefix, stall, queue, abort)
}
