"""How fast the server is, against what it could be and against others.

    python -m tests.bench                          # default model, all cells
    python -m tests.bench --peer NAME=http://127.0.0.1:9000 --rounds 5

Subjects: this server; the same engine in a loop without any server ("loop", the upper
bound: texts already tokenised, packs always full); llama-cpp-python's own server when
its packages are installed (extra ``bench``); and every --peer that speaks
/v1/embeddings. Machines drift, so nothing is compared across time: in each round every
subject runs each cell once, in turn, and what is reported is the median over rounds of
the ratio within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np

import embellama_server as es
from tests import kit

OURS, LOOP = "this server", "loop"
_WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "his",
    "but",
    "at",
    "are",
    "this",
    "have",
    "from",
    "or",
    "had",
    "an",
    "they",
    "which",
    "one",
    "you",
    "were",
    "all",
    "her",
    "she",
    "there",
    "would",
    "their",
    "we",
    "him",
    "been",
    "has",
    "when",
    "who",
    "will",
    "more",
    "no",
    "if",
    "out",
    "so",
    "what",
    "up",
    "said",
    "about",
    "other",
    "into",
    "than",
    "its",
    "time",
    "only",
    "could",
    "new",
    "them",
    "man",
    "some",
    "these",
    "then",
    "two",
    "first",
    "may",
    "any",
    "like",
    "now",
    "my",
    "such",
    "make",
    "over",
    "our",
    "even",
    "most",
    "me",
    "state",
    "after",
    "also",
    "made",
    "many",
    "did",
    "must",
    "before",
    "back",
    "see",
    "through",
    "way",
    "where",
    "get",
    "much",
    "go",
    "well",
    "your",
    "know",
    "should",
    "down",
    "work",
    "year",
    "because",
    "come",
]


@dataclass(frozen=True)
class Cell:
    """One way to load a server."""

    connections: int
    batch: int  # inputs a request
    words: int  # of each input

    def __str__(self) -> str:
        what = f"batches of {self.batch}" if self.batch > 1 else "single inputs"
        plural = "s" if self.connections > 1 else ""
        return f"{self.connections} connection{plural}, {what}, {self.words} words"


CELLS = (
    Cell(1, 1, 20),
    Cell(8, 1, 20),
    Cell(64, 1, 20),
    Cell(1, 1, 350),
    Cell(1, 64, 20),
    Cell(4, 64, 20),
)


@dataclass(frozen=True)
class Figures:
    """What one subject did in one cell of one round."""

    inputs_per_s: float
    p50_ms: float
    p99_ms: float


Subject = Callable[[Cell, float], Figures]


def texts_of(cell: Cell, seed: int, count: int) -> list[str]:
    """``count`` texts, all different, the same for every subject."""
    chance = random.Random(f"{cell.words}/{seed}")
    return [" ".join(chance.choices(_WORDS, k=cell.words)) for _ in range(count)]


def figures(latencies_s: Sequence[float], inputs: int, seconds: float) -> Figures:
    """Figures from each request's latency."""
    ordered = sorted(latencies_s)
    return Figures(
        inputs / seconds,
        ordered[len(ordered) // 2] * 1000,
        ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1000,
    )


# --- HTTP subjects ---


def http_subject(url: str) -> Subject:
    """Load a server over keep-alive connections, closed loop."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    prefix = parts.path.rstrip("/")

    def run(cell: Cell, seconds: float) -> Figures:
        requests = []
        for seed in range(max(64, 512 // cell.batch)):
            texts = texts_of(cell, seed, cell.batch)
            ask = {"model": "bench", "input": texts if cell.batch > 1 else texts[0]}
            body = json.dumps(ask).encode()
            head = (
                f"POST {prefix}/v1/embeddings HTTP/1.1\r\nHost: {host}:{port}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            requests.append(head.encode() + body)
        return asyncio.run(_load(host, port, requests, cell, seconds))

    return run


async def _load(
    host: str, port: int, requests: Sequence[bytes], cell: Cell, seconds: float
) -> Figures:
    begun = time.perf_counter()
    end = begun + seconds
    latencies: list[float] = []

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection(host, port, limit=1 << 24)
        turn = number * 7919
        while time.perf_counter() < end:
            sent = time.perf_counter()
            writer.write(requests[turn % len(requests)])
            turn += 1
            await _read_reply(reader)
            latencies.append(time.perf_counter() - sent)
        writer.close()

    await asyncio.gather(*map(client, range(cell.connections)))
    took = time.perf_counter() - begun
    return figures(latencies, len(latencies) * cell.batch, took)


async def _read_reply(reader: asyncio.StreamReader) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if not head.startswith(b"http/1.1 200"):
        raise SystemExit(f"a subject refused: {head!r} {await reader.read(400)!r}")
    if b"transfer-encoding: chunked" in head:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            await reader.readexactly(size + 2)
        await reader.readexactly(2)
    else:
        length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length))


# --- the loop ---


def loop_subject(engine: es.Engine, workers: int, pack_tokens: int) -> Subject:
    """The engine without a server: a thread and a context for each worker."""

    def run(cell: Cell, seconds: float) -> Figures:
        texts = texts_of(cell, 0, 512)
        ids = [
            np.array(es.framed(engine.tokenise(text), engine.card), np.int32)
            for text in texts
        ]
        # As many inputs under way as the cell's clients have, spread evenly.
        waiting = cell.connections * cell.batch
        threads = min(workers, waiting)
        per_pack = max(1, min(waiting // threads, pack_tokens // len(ids[0])))
        done: list[list[float]] = [[] for _ in range(threads)]
        begun = time.perf_counter()

        def work(mine: list[float]) -> None:
            context = engine.new_context()
            at = 0
            while time.perf_counter() < begun + seconds:
                at = (at + per_pack) % (len(ids) - per_pack)
                sent = time.perf_counter()
                context.embed(ids[at : at + per_pack])
                mine.append(time.perf_counter() - sent)
            context.close()

        running = [threading.Thread(target=work, args=(mine,)) for mine in done]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        took = time.perf_counter() - begun
        latencies = [latency for mine in done for latency in mine]
        return figures(latencies, len(latencies) * per_pack, took)

    return run


# --- starting servers ---


@contextlib.contextmanager
def our_server(model: str, flags: Sequence[str]) -> Iterator[str]:
    """This server as its own process; its URL."""
    script = str(kit.ROOT / "embellama_server.py")
    settings = ("--model-path", model, "--any-model", "--log-level", "warning", *flags)
    with kit.started(*settings, module=(script,), wait_ready=False) as server:
        _wait_until_answers(server.url)
        yield server.url


@contextlib.contextmanager
def llama_cpp_server(model: str, threads: int) -> Iterator[str]:
    """llama-cpp-python's server as its own process; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", model]
    command += ["--embedding", "true", "--n_ctx", "512", "--n_batch", "512"]
    command += ["--n_threads", str(threads), "--n_threads_batch", str(threads)]
    command += ["--port", str(port), "--verbose", "false"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_answers(url)
        yield url
    finally:
        process.terminate()
        process.wait(kit.DEADLINE_S)


def _wait_until_answers(url: str) -> None:
    deadline = time.monotonic() + kit.DEADLINE_S
    while True:
        try:
            with urlopen(f"{url}/v1/models", timeout=5) as reply:
                reply.read()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)  # another program's start: nothing to wait on


# --- the report ---


def measure(
    subjects: dict[str, Subject], cells: Sequence[Cell], rounds: int, seconds: float
) -> dict[Cell, list[dict[str, Figures]]]:
    """For each cell, for each round, what each subject did; subjects take turns."""
    results: dict[Cell, list[dict[str, Figures]]] = {cell: [] for cell in cells}
    for number in range(rounds):
        for cell in cells:
            names = list(subjects)
            names = names[number % len(names) :] + names[: number % len(names)]
            results[cell].append({n: subjects[n](cell, seconds) for n in names})
            shown = results[cell][-1][OURS]
            print(
                f"round {number + 1}/{rounds}: {cell}: {shown.inputs_per_s:.0f}/s",
                file=sys.stderr,
            )
    return results


def report(results: dict[Cell, list[dict[str, Figures]]], others: list[str]) -> str:
    """A Markdown table: our medians, and for each other subject ours over theirs."""
    heads = ["load", "inputs/s", "p50 ms", "p99 ms"]
    for name in others:
        heads.append(f"inputs/s : {name}")
        if name != LOOP:
            heads.append(f"p50 : {name}")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for cell, rounds in results.items():
        row = [str(cell)]
        ours = [figures_of[OURS] for figures_of in rounds]
        row.append(f"{statistics.median(f.inputs_per_s for f in ours):.0f}")
        row.append(f"{statistics.median(f.p50_ms for f in ours):.1f}")
        row.append(f"{statistics.median(f.p99_ms for f in ours):.1f}")
        for name in others:
            rates = [r[OURS].inputs_per_s / r[name].inputs_per_s for r in rounds]
            row.append(f"{statistics.median(rates):.2f}")
            if name != LOOP:
                waits = [r[OURS].p50_ms / r[name].p50_ms for r in rounds]
                row.append(f"{statistics.median(waits):.2f}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def machine() -> str:
    """What this was measured on, in a line."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        name = next(line for line in cpuinfo if "model name" in line).split(":")[1]
    return (
        f"{es.usable_cores()} cores of {name.strip()}, Python "
        f"{platform.python_version()}, llama-cpp-python {version('llama-cpp-python')}, "
        f"embellama_server {es.__version__}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", default="", help="default: the default model")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="a cell and subject")
    parser.add_argument("--cells", default="", help="numbers, e.g. 0,2; default: all")
    parser.add_argument("--flag", action="append", default=[], help="for this server")
    given = parser.parse_args()

    log = es.Log("warning", "text", sys.stderr)
    fetch = es.ModelFetch(es.default_cache_dir(), log, es.DEFAULT_MODEL)
    model = given.model_path or str(fetch.path())
    workers = es.usable_cores()
    cells = [CELLS[int(n)] for n in given.cells.split(",")] if given.cells else CELLS
    options = es.EngineOptions()
    engine = es.LlamaEngine(model, options, log)

    with contextlib.ExitStack() as stack:
        subjects: dict[str, Subject] = {
            OURS: http_subject(stack.enter_context(our_server(model, given.flag))),
            LOOP: loop_subject(engine, workers, options.pack_tokens),
        }
        if importlib.util.find_spec("uvicorn"):
            url = stack.enter_context(llama_cpp_server(model, workers))
            subjects["llama_cpp.server"] = http_subject(url)
        for peer in given.peer:
            name, _, url = peer.partition("=")
            subjects[name] = http_subject(url)
        results = measure(subjects, cells, given.rounds, given.seconds)
    engine.close()
    print(f"{os.path.basename(model)}; {machine()}; {given.rounds} rounds.\n")
    print(report(results, [name for name in subjects if name != OURS]))


if __name__ == "__main__":
    main()
