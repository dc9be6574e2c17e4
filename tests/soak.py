"""The server under a mixed load for long: are all answers right, is memory flat?

    python -m tests.soak --requests 100000 --seconds 600 [--flag=--queue-size=64 ...]
    python -m tests.soak --quick
    python -m tests.soak --url http://127.0.0.1:8080 --pid 4711

Starts the real server, or takes a running one on this machine. Texts of tests/reference
must have their vectors, other texts that come again the vector they got first, never
seen ones a vector of length 1. Bad requests must get their 4xx; clients that leave must
cost nothing. A 503 with Retry-After is a deliberate refusal: counted, and asked again.

What the server keeps on purpose must be full by half time, or it looks like a leak: for
a short run make its caches small. Not with --auto-truncate, which allows what is bad
here. Exit code 0: everything as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import json
import os
import random
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

import embellama_server as es
from tests import kit

IN_FLIGHT = 32  # connections
MIN_COSINE = 0.999  # f16 weights against the float32 reference, see test_vectors.py
MAX_REFUSALS = 100  # of one request in a row: about a minute
FLAT_KB = 1.0  # a thousand requests
KINDS = {"short": 70, "batch": 15, "reference": 8, "bad": 4, "gone": 3}  # percent
SHARES = {"new": 55, "again": 25, "reference": 20}  # percent of inputs in short, batch
POOL = 500  # other texts that come again
SHORT_IDS = 40  # tokens of a reference text that may be one of these inputs

REFERENCE = kit.ROOT / "tests/reference/all-MiniLM-L6-v2.jsonl"
ROWS = [
    row
    for line in REFERENCE.read_bytes().splitlines()
    if "truncated" not in (row := json.loads(line))["kind"]
]
VECTORS = [np.frombuffer(base64.b64decode(row["vector"]), "<f4") for row in ROWS]
SIZE = len(VECTORS[0])
WORDS = sorted({w for row in ROWS for w in re.findall("[a-z]{3,9}", row["text"])})
BRIEF = [i for i, row in enumerate(ROWS) if len(row["ids"]) <= SHORT_IDS]
BAD = {  # body: what must come
    b'{"input": "a"': "400 invalid_json",
    b'["a"]': "400 invalid_json",
    b'{"input": "\xff"}': "400 invalid_json",
    b"{}": "400 invalid_value",
    b'{"input": ""}': "400 invalid_value",
    b'{"input": []}': "400 invalid_value",
    b'{"input": ["a", ""]}': "400 invalid_value",
    b'{"input": ["a", {"texts": "b"}]}': "400 invalid_value",
    b'{"input": "a", "dimensions": "64.5"}': "400 invalid_value",
    b'{"input": "a", "dimensions": 385}': "400 invalid_value",
    b'{"input": "a", "encoding_format": ["float"]}': "400 invalid_value",
    b'{"input": "a", "encoding_format": "int8"}': "400 invalid_value",
    b'{"input": "%b"}' % (b"long " * 600): "400 context_length_exceeded",
}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, and what must come back."""

    kind: str
    raw: bytes
    wanted: str = "200"
    rows: tuple[int, ...] = ()  # for each input, of ROWS and then the pool; -1: new
    dimensions: int = SIZE


def raw_request(body: bytes) -> bytes:
    """HTTP/1.1 bytes."""
    return (
        b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
    ) % (len(body), body)


class Mix:
    """Makes requests."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self._mark = seed % 1000  # so that another run's texts are new to a server
        self._new = 0
        self._pool = [self._sentence() for _ in range(POOL)]

    def next(self) -> Ask:
        """One request of the mix."""
        kind = self._drawn(KINDS)
        if kind == "bad":
            body = self.chance.choice(list(BAD))
            return Ask(kind, raw_request(body), BAD[body])
        if kind == "reference":
            return self.ask(kind, [self.chance.randrange(len(ROWS))])
        count = 1 if kind == "short" else self.chance.randint(2, 8)
        return self.ask(kind, [self._row() for _ in range(count)])

    def ask(self, kind: str, rows: list[int]) -> Ask:
        """A request for the texts of these rows, in one of the formats."""
        texts = [self._text(row) for row in rows]
        body: dict[str, Any] = {"input": texts if len(texts) > 1 else texts[0]}
        if encoding := self.chance.choice(("", "float", "base64")):
            body["encoding_format"] = encoding
        if self.chance.random() < 0.2:
            body["dimensions"] = self.chance.choice((64, 128, 256, SIZE))
        raw = raw_request(es.json_codec().dumps(body))
        return Ask(kind, raw, "200", tuple(rows), body.get("dimensions", SIZE))

    def _drawn(self, weights: dict[str, int]) -> str:
        return self.chance.choices(list(weights), list(weights.values()))[0]

    def _row(self) -> int:
        share = self._drawn(SHARES)
        if share == "new":
            return -1
        if share == "reference":
            return self.chance.choice(BRIEF)
        return len(ROWS) + int(
            POOL * self.chance.random() ** 2
        )  # some more than others

    def _text(self, row: int) -> str:
        if row >= 0:
            return ROWS[row]["text"] if row < len(ROWS) else self._pool[row - len(ROWS)]
        # New by numbers which are few as words: soon the tokenizer has met all of them.
        self._new += 1
        thousands, rest = divmod(self._new, 1000)
        return f"{self._sentence()} {self._mark} {thousands} {rest}"

    def _sentence(self) -> str:
        return " ".join(self.chance.choices(WORDS, k=self.chance.randint(3, 12)))


# --- what came back ---


class Tally:
    """Everything that is counted."""

    def __init__(self) -> None:
        self.done = self.refusals = 0
        self.kinds: collections.Counter[str] = collections.Counter()
        self.vectors: collections.Counter[str] = collections.Counter()
        self.wrong: collections.Counter[str] = collections.Counter()
        self.unexpected: collections.Counter[str] = collections.Counter()
        self.worst: dict[str, float] = {}  # cosine
        self.latencies_s: list[float] = []
        self._known: dict[int, Any] = dict(enumerate(VECTORS))

    def check(self, ask: Ask, status: int, body: bytes) -> None:
        """Judge an answer."""
        try:
            answer: Any = es.json_codec().loads(body)
            if status == 200 == int(ask.wanted[:3]):
                assert answer["usage"]["total_tokens"] >= 2 * len(ask.rows)
                for at, (row, item) in enumerate(
                    zip(ask.rows, answer["data"], strict=True)
                ):
                    assert item["index"] == at
                    self._check_vector(ask, row, as_vector(item["embedding"]))
                return
            found = f"{status} {answer.get('error', {}).get('code')}"
            if status >= 400:
                assert set(answer["error"]) == {"message", "type", "param", "code"}
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            found = f"{status} with {error!r:.60}"
        if found != ask.wanted:
            self.unexpected[f"{found} instead of {ask.wanted}"] += 1

    def _check_vector(self, ask: Ask, row: int, vector: Any) -> None:
        known = self._known.get(row)
        name = "new" if known is None else "again" if row >= len(ROWS) else "reference"
        self.vectors[name] += 1
        is_whole = vector.shape == (ask.dimensions,)
        if not (is_whole and abs(float(vector @ vector) - 1) < 1e-5):  # also for NaN
            self.wrong[f"{name}: not of length 1 or of the wrong size"] += 1
        elif known is not None:
            cut = known[: ask.dimensions]
            cosine = float(cut @ vector / np.linalg.norm(cut))
            self.worst[name] = min(cosine, self.worst.get(name, 1.0))
            self.wrong[name] += not cosine >= MIN_COSINE
        elif row >= 0 and ask.dimensions == SIZE:
            self._known[row] = vector


def as_vector(embedding: Any) -> Any:
    """From a list of numbers or base64."""
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), "<f4")
    return np.array(embedding, np.float32)


# --- the load ---


class Client:
    """One connection at a time, opened when needed."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname, parts.port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, raw: bytes) -> asyncio.StreamReader:
        """Write a request; where its answer is to be read."""
        if self._streams is None:
            host, port = self._address
            self._streams = await asyncio.open_connection(host, port, limit=1 << 20)
        self._streams[1].write(raw)
        return self._streams[0]

    async def exchange(self, raw: bytes) -> tuple[int, bytes, bytes]:
        """A request's status, head in lower case, and body."""
        async with asyncio.timeout(kit.DEADLINE_S):
            reader = await self.send(raw)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
            body = await reader.readexactly(int(length))
        if b"connection: close" in head:
            self.close()
        return int(head[9:12]), head, body

    def close(self, *, abort: bool = False) -> None:
        """Leave, with a reset or without."""
        if self._streams is not None:
            transport = self._streams[1].transport
            (transport.abort if abort else transport.close)()
            self._streams = None


class Soak:
    """The load on one server, and what is seen of its process meanwhile."""

    def __init__(self, url: str, pid: int, mix: Mix) -> None:
        self.mix, self.tally, self.seconds = mix, Tally(), 0.0
        self.samples: list[tuple[int, int]] = []  # requests done, KB
        self.start = self.end = (0, 0)  # descriptors, threads
        self._process = Path(f"/proc/{pid}")
        self._clients = [Client(url) for _ in range(IN_FLIGHT)]

    async def run(self, requests: int, seconds: float) -> None:
        """Every reference text once, then the mix, spread over the time."""
        try:
            for row in range(len(ROWS)):
                await self._do(
                    self.mix.ask("warm-up", [row]), self._clients[row % IN_FLIGHT]
                )
            self.tally.latencies_s, self.tally.refusals = [], 0
            self.start = await self._settled()
            await self._mixed(requests, seconds)
            self.end = await self._settled()
        except* OSError as gone:  # not of one connection but of connecting, or of /proc
            self.tally.unexpected[f"no server: {gone.exceptions[0]!r:.80}"] += 1

    async def _mixed(self, requests: int, seconds: float) -> None:
        begun, left = time.monotonic(), iter(range(requests))

        async def work(client: Client) -> None:
            for number in left:  # whose turn comes when; later if the server is slow
                due = begun + number * seconds / requests
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                await self._do(self.mix.next(), client)
                self.tally.done += 1
                self.seconds = time.monotonic() - begun

        async with asyncio.TaskGroup() as group:
            for client in self._clients:
                group.create_task(work(client))
            while self.tally.done < requests:
                self._sample()
                await asyncio.sleep(min(5.0, seconds / 60))
            self._sample()

    def _sample(self) -> None:
        kb = self._status("RssAnon") + self._status("VmSwap")
        self.samples.append((self.tally.done, kb))

    async def _do(self, ask: Ask, client: Client) -> None:
        self.tally.kinds[ask.kind] += 1
        if ask.kind == "gone":  # at once or while it is computed, with all sent or not
            chance = self.mix.chance
            await client.send(ask.raw[: chance.choice((None, None, -5))])
            await asyncio.sleep(chance.choice((0, 0, 0.003, 0.01)))
            client.close(abort=chance.random() < 0.5)
            return
        for _ in range(MAX_REFUSALS):
            sent = time.perf_counter()
            try:
                status, head, body = await client.exchange(ask.raw)
            except (EOFError, ConnectionResetError, TimeoutError) as error:
                self.tally.unexpected[f"no answer: {type(error).__name__}"] += 1
                client.close()
                return
            if status != 503 or b"\r\nretry-after:" not in head:
                break
            self.tally.refusals += 1
            await asyncio.sleep(self.mix.chance.uniform(0.2, 1))
        if status == 200:
            self.tally.latencies_s.append(time.perf_counter() - sent)
        self.tally.check(ask, status, body)

    async def _settled(self) -> tuple[int, int]:
        """Descriptors and threads when nobody is connected: the least of some time."""
        for client in self._clients:
            client.close()
        seen = []
        for _ in range(20):
            await asyncio.sleep(0.1)  # another process: nothing to wait on
            open_now = len(os.listdir(self._process / "fd"))
            seen.append((open_now, self._status("Threads")))
        return min(seen)

    def _status(self, name: str) -> int:
        text = (self._process / "status").read_text()
        if not (value := text.partition(f"{name}:")[2]):  # dead, but not yet waited for
            raise ProcessLookupError(f"{self._process} has ended")
        return int(value.split(maxsplit=1)[0])


# --- the report ---


def slope(samples: list[tuple[int, int]]) -> tuple[float, float]:
    """KB per 1,000 requests by least squares, and its standard error."""
    if len({done for done, _ in samples}) < 3:
        return float("nan"), float("nan")
    done, memory = np.array(samples, float).T
    x, y = (done - done.mean()) / 1000, memory - memory.mean()
    steepness = float(x @ y / (x @ x))
    rest = y - steepness * x
    return steepness, float(rest @ rest / (len(x) - 2) / (x @ x)) ** 0.5


def report(soak: Soak, growth_kb: float, server: kit.Server | None) -> bool:
    """Print the summary; whether all is well."""
    tally, start, end = soak.tally, soak.start, soak.end
    ordered = sorted(tally.latencies_s) or [float("nan")]
    p50, p99 = (ordered[int(len(ordered) * part)] * 1000 for part in (0.5, 0.99))
    half = [sample for sample in soak.samples if sample[0] >= tally.done / 2]
    steepness, error = slope(half)
    # Neighbouring samples resemble each other, so the error is rather too small: noise
    # may fail this test, but then it passes the one of the growth.
    is_flat = abs(steepness) <= max(2 * error, FLAT_KB)
    quarter = [kb for _, kb in half[: len(half) // 4 + 1]]
    last = [kb for _, kb in half[-len(quarter) :]]
    # From middle to middle of two quarters; medians, as long inputs make brief peaks.
    growth = (
        (statistics.median(last) - statistics.median(quarter)) / 0.75 if half else 0
    )
    memory = ", ".join(
        f"{part:.0%} {min(soak.samples, key=lambda s: abs(s[0] - part * tally.done))[1]}"
        for part in (0.1, 0.2, 0.5, 1)
        if soak.samples
    )
    code = server.stop() if server else 0
    errors = [line for line in server.log if "error" in line[:60]] if server else []
    print(f"requests     {tally.done} in {soak.seconds:.1f} s: {counts(tally.kinds)}")
    print(f"vectors      {counts(tally.vectors)}; worst cosines {tally.worst}")
    print(f"wrong        {tally.wrong.total()} {counts(tally.wrong)}")
    print(f"unexpected   {tally.unexpected.total()} {counts(tally.unexpected)}")
    print(f"refusals     {tally.refusals}")
    print(f"latency      p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    print(f"memory       RssAnon + VmSwap in KB at {memory}")
    print(
        f"second half  {steepness:.1f} +- {error:.1f} KB per 1,000 requests, "
        f"{growth:.0f} KB in all: {'flat' if is_flat else 'not flat'}"
    )
    print(f"descriptors  {start[0]} at the start, {end[0]} after; threads: ", end="")
    print(f"{start[1]} at the start, {end[1]} after")
    print(f"server       exit code {code}, errors logged: {len(errors)}", *errors[:5])
    verdicts = {
        "vectors": not tally.wrong.total() and tally.vectors["reference"] > 0,
        "answers": not tally.unexpected,
        "memory": is_flat or growth < growth_kb,
        "descriptors": 0 < end[0] <= start[0],
        "threads": 0 < end[1] <= start[1],
        "server": code == 0 and not errors,
    }
    failed = ", ".join(name for name, is_well in verdicts.items() if not is_well)
    print(f"verdict      {'failed: ' + failed if failed else 'good'}", flush=True)
    return not failed


def counts(counter: collections.Counter[str]) -> str:
    """``4 this, 3 that``, the most frequent first."""
    return ", ".join(f"{n} {name}" for name, n in counter.most_common() if n)


def main() -> int:
    """Run and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=600.0, help="at least")
    parser.add_argument("--quick", action="store_true", help="2,000 requests in 20 s")
    parser.add_argument("--model-path", default="", help="MiniLM in another precision")
    parser.add_argument("--flag", action="append", default=[], help="for the server")
    parser.add_argument("--url", default="", help="of a running server; with --pid")
    parser.add_argument("--pid", type=int, default=0)
    parser.add_argument("--growth-kb", type=float, default=2048, help="of half the run")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    if bool(given.url) != bool(given.pid):
        parser.error("--url and --pid belong together")
    if given.quick:
        given.requests, given.seconds = 2000, 20.0
    # A log line for each request would be our work too.
    flags = ["--log-level", "warning", *given.flag]
    flags += ["--model-path", given.model_path] if given.model_path else []

    with contextlib.ExitStack() as stack:
        server, url, pid = None, given.url, given.pid
        if not url:  # until it is ready the warm-up is refused, and asks again
            module = (str(kit.ROOT / "embellama_server.py"),)
            started = kit.started(*flags, module=module, wait_ready=False)
            server = stack.enter_context(started)
            url, pid = server.url, server.child or server.process.pid
        print(f"server       {url}, flags {flags}, seed {given.seed}", flush=True)
        with asyncio.Runner(loop_factory=es.new_event_loop) as runner:
            soak = Soak(url, pid, Mix(given.seed))
            runner.run(soak.run(given.requests, given.seconds))
        return 0 if report(soak, given.growth_kb, server) else 1


if __name__ == "__main__":
    sys.exit(main())
