"""How fast the server is, against what it could be and against others.

    python -m tests.bench                          # default model, all cells
    python -m tests.bench --cells short --peer NAME=http://127.0.0.1:9000
    python -m tests.bench --peer-cmd 'NAME=program --model {model} --port {port}'

Subjects: this server, with one or more sets of flags (--ours); the same engine in a
loop without any server ("loop", the upper bound: texts already tokenized, batches always
full); llama-cpp-python's own server when its packages are installed (extra ``bench``);
and every --peer or --peer-cmd that speaks /v1/embeddings. Machines drift, so nothing is
compared across time: in each round every subject runs each cell once, in turn, and what
is reported is the median over rounds of the ratio within a round. No text is sent twice,
and our cache is off, so that computing is what is measured (but for --cached).
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import http.client
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

import embellama_server as es
from tests import kit, models
from tests.load import Load, body
from tests.servers import Server, free_port, neighbour, started, watched
from tests.words import WORDS

OURS, LOOP, BEST = "this server", "loop", "best peer"
LENGTHS = {20: "short", 100: "medium", 350: "long"}  # words of a text
WARM_UP_S = 0.3
MAX_WORDS_PER_S = 20_000  # that a core could be asked for: this many are prepared
HEALTH_CONNECTIONS, HEALTH_EVERY_S = 1000, 0.02
MB = 1e6


@dataclass(frozen=True)
class Cell:
    """One way to load a server."""

    connections: int
    batch: int  # inputs a request
    words: int  # of each input

    @property
    def names(self) -> tuple[str, str]:
        """What --cells calls it and its like."""
        return LENGTHS[self.words], "batch" if self.batch > 1 else "single"

    def __str__(self) -> str:
        what = f"batches of {self.batch}" if self.batch > 1 else "single inputs"
        plural = "s" if self.connections > 1 else ""
        return f"{self.connections} connection{plural}, {what}, {self.words} words"


_LOADS = ((1, 1), (8, 1), (64, 1), (256, 1), (1, 64), (4, 64))  # connections, batch
CELLS = tuple(Cell(*load, words) for words in LENGTHS for load in _LOADS)


def chosen(text: str) -> list[Cell]:
    """The cells of ``0,2,long``: numbers and names; ``single+long`` is both at once."""
    found: set[int] = set()
    for term in text.split(","):
        wanted = set(term.split("+"))
        hits = {n for n, c in enumerate(CELLS) if wanted <= {str(n), *c.names}}
        if not hits:
            raise SystemExit(f"no such cell: {term!r}; see --list-cells")
        found |= hits
    return [CELLS[n] for n in sorted(found)]


@dataclass(frozen=True)
class Figures:
    """What one subject did in one cell of one round."""

    inputs_per_s: float
    p50_ms: float
    p99_ms: float


def quantile_ms(latencies_s: Sequence[float], at: float) -> float:
    """A quantile of latencies, in ms."""
    ordered = sorted(latencies_s)
    return ordered[min(len(ordered) - 1, int(len(ordered) * at))] * 1000


def figures(latencies_s: Sequence[float], inputs: int, seconds: float) -> Figures:
    """Figures from each request's latency."""
    p50, p99 = (quantile_ms(latencies_s, at) for at in (0.5, 0.99))
    return Figures(inputs / seconds, p50, p99)


@functools.lru_cache(maxsize=1)
def inputs_of(cell: Cell, turn: int, seconds: float) -> list[list[str]]:
    """The inputs of each request of a cell: all different, for every subject the same.

    A multiple of the connections: each walks its own part, also when it wraps around.
    """
    words = MAX_WORDS_PER_S * es.usable_cores() * seconds
    laps = math.ceil(words / (cell.words * cell.batch * cell.connections))
    count = max(2, laps) * cell.connections * cell.batch
    chance = random.Random(f"{cell}/{turn}")
    texts = [" ".join(chance.choices(WORDS, k=cell.words)) for _ in range(count)]
    assert len(set(texts)) == count
    return [texts[n : n + cell.batch] for n in range(0, count, cell.batch)]


@functools.lru_cache(maxsize=1)
def bodies_of(cell: Cell, turn: int, seconds: float) -> list[bytes]:
    """Of each request of a cell."""
    return [body(inputs) for inputs in inputs_of(cell, turn, seconds)]


# --- the loop ---

Run = Callable[[Cell, int, float], Figures]


def loop_subject(engine: es.Engine, cores: int, options: es.ModelSettings) -> Run:
    """The engine without a server: a thread and a context for each worker.

    ``cores`` are those that nobody else keeps busy.
    """
    workers = es.usable_cores()

    def run(cell: Cell, turn: int, seconds: float) -> Figures:
        ids = [
            np.array(
                es.with_special_tokens(engine.tokenizer.encode(text), engine.card),
                np.int32,
            )
            for text in itertools.chain(*inputs_of(cell, turn, seconds))
        ]
        # As many inputs under way as the cell's clients have, spread evenly.
        waiting = cell.connections * cell.batch
        threads = min(workers, waiting)
        per_batch = max(1, min(waiting // threads, options.batch_tokens // len(ids[0])))
        batches = [ids[n : n + per_batch] for n in range(0, len(ids), per_batch)]
        done: list[list[float]] = [[] for _ in range(threads)]
        start = threading.Barrier(threads + 1)

        def work(number: int) -> None:
            context = engine.new_context()
            start.wait()
            end = time.perf_counter() + seconds
            while (sent := time.perf_counter()) < end:
                batch = batches[(number + len(done[number]) * threads) % len(batches)]
                context.embed(batch, threads=max(1, cores // threads))
                done[number].append(time.perf_counter() - sent)
            start.wait()
            context.close()

        running = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
        for thread in running:
            thread.start()
        start.wait()
        begun = time.perf_counter()
        start.wait()
        took = time.perf_counter() - begun
        for thread in running:
            thread.join()
        latencies = list(itertools.chain(*done))
        return figures(latencies, len(latencies) * per_batch, took)

    return run


# --- subjects ---


def our_command(model: str, flags: Sequence[str], *, is_cached: bool) -> list[str]:
    """This server, with a cache only when that is what is measured."""
    rows = {row.name for row in es.SETTING_ROWS}
    command = [sys.executable, str(kit.ROOT / "embellama_server.py")]
    command += ["--model-path", model, "--any-model", "--log-level", "warning"]
    usual = {"weights": "keep"} if is_cached else {"weights": "keep", "cache_mb": "0"}
    for name, value in usual.items():
        flag = "--" + name.replace("_", "-")
        is_given = any(given.partition("=")[0] == flag for given in flags)
        if name in rows and not is_given:
            command += [flag, value]
    return [*command, *flags]


def llama_cpp_command(model: str, threads: int) -> list[str]:
    """llama-cpp-python's server."""
    command = [sys.executable, "-m", "llama_cpp.server", "--model", model]
    command += ["--embedding", "true", "--n_ctx", "512", "--n_batch", "512"]
    command += ["--n_threads", str(threads), "--n_threads_batch", str(threads)]
    return [*command, "--verbose", "false"]


@dataclass(frozen=True)
class Subject:
    """What takes its turn in a round. Kind: ours, loop, peer or other."""

    name: str
    kind: str
    run: Run
    url: str = ""


def http_subject(name: str, kind: str, url: str) -> Subject:
    """A server that is there, wherever it came from."""

    def run(cell: Cell, turn: int, seconds: float) -> Figures:
        bodies = bodies_of(cell, turn, seconds)
        load = Load(url, bodies, cell.connections, seconds).run()
        return figures(load.latencies, len(load.latencies) * cell.batch, load.took)

    return Subject(name, kind, run, url)


@dataclass
class Bench:
    """All that is measured on one model; the servers end with the stack."""

    given: argparse.Namespace
    model: str
    stack: contextlib.ExitStack
    subjects: list[Subject] = field(default_factory=list)
    servers: list[Server] = field(default_factory=list)

    def begin(self) -> None:
        """Start every subject."""
        given, model, workers = self.given, self.model, es.usable_cores()
        for name, flags in named(given.ours or [f"{OURS}="]):
            self._serve(
                name, "ours", our_command(model, shlex.split(flags), is_cached=False)
            )
        options = es.ModelSettings()
        engine = es.Engine(model, options, es.Log("warning", "text", sys.stderr))
        self.stack.callback(engine.close)
        run = loop_subject(engine, workers - given.neighbour, options)
        self.subjects.append(Subject(LOOP, "loop", run))
        if given.llama_cpp_server and importlib.util.find_spec("uvicorn"):
            self._serve("llama_cpp.server", "other", llama_cpp_command(model, workers))
        for name, command in named(given.peer_cmd):
            self._serve(name, "peer", shlex.split(command))
        for name, url in named(given.peer):
            self.subjects.append(http_subject(name, "peer", url))
        names = [subject.name for subject in self.subjects]
        if len(set(names)) < len(names):
            raise SystemExit(f"subjects need different names: {', '.join(names)}")

    def cached(self) -> Subject:
        """The first of ours again, with its cache."""
        name, flags = named(self.given.ours or [f"{OURS}="])[0]
        command = our_command(self.model, shlex.split(flags), is_cached=True)
        self._serve(f"{name}, cached", "ours", command)
        return self.subjects.pop()

    def _serve(self, name: str, kind: str, command: Sequence[str]) -> None:
        port = free_port()
        if kind != "peer":
            command = [*command, "--port", "{port}"]
        fills = {"{model}": self.model, "{port}": str(port)}
        words = []
        for word in command:
            for place, value in fills.items():
                word = word.replace(place, value)
            words.append(word)
        log = sys.stderr if kind == "ours" else subprocess.DEVNULL
        server = self.stack.enter_context(started(name, words, port, log))
        self.servers.append(server)
        self.subjects.append(http_subject(name, kind, server.url))


def named(pairs: Sequence[str]) -> list[tuple[str, str]]:
    """NAME=VALUE, taken apart."""
    found = [pair.partition("=") for pair in pairs]
    if wrong := [name for name, equals, _ in found if not (name and equals)]:
        raise SystemExit(f"not NAME=...: {wrong[0]!r}")
    return [(name, value) for name, _, value in found]


# --- measuring ---

Round = dict[str, Figures]  # by subject
Results = dict[Cell, list[Round]]


def warm_up(subjects: Sequence[Subject], cells: Sequence[Cell]) -> None:
    """Every subject a little; what it refuses for its size is found out here."""
    trials = [Cell(8, 1, words) for words in sorted({cell.words for cell in cells})]
    trials += [Cell(1, 64, 20)] * any(cell.batch > 1 for cell in cells)
    for subject in subjects:
        for trial in trials:
            subject.run(trial, -1, WARM_UP_S / len(trials))


def measure(
    subjects: Sequence[Subject], cells: Sequence[Cell], rounds: int, seconds: float
) -> Results:
    """For each cell, for each round, what each subject did; subjects take turns."""
    warm_up(subjects, cells)
    results: Results = {cell: [] for cell in cells}
    for turn in range(rounds):
        for cell in cells:
            first = turn % len(subjects)
            order = [*subjects[first:], *subjects[:first]]
            results[cell].append({s.name: s.run(cell, turn, seconds) for s in order})
            shown = results[cell][-1]
            rates = [f"{s.name} {shown[s.name].inputs_per_s:.0f}" for s in subjects]
            print(
                f"round {turn + 1}/{rounds}: {cell}: {', '.join(rates)}",
                file=sys.stderr,
            )
    return results


def measure_cached(
    subjects: Sequence[Subject], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Requests a second of each subject for one text, again and again."""
    bodies = [body([" ".join(WORDS[:20])])]
    rates: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for subject in subjects:
        Load(subject.url, bodies, 64, WARM_UP_S).run()
    for turn in range(rounds):
        first = turn % len(subjects)
        for subject in [*subjects[first:], *subjects[:first]]:
            load = Load(subject.url, bodies, 64, seconds).run()
            rates[subject.name].append(len(load.latencies) / load.took)
    return rates


def ask_health(url: str, seconds: float) -> tuple[list[float], dict[int, int]]:
    """GET /health again and again: latencies and statuses. 0: no answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(
        parts.hostname or "127.0.0.1", parts.port, timeout=kit.DEADLINE_S
    )
    latencies: list[float] = []
    statuses: collections.Counter[int] = collections.Counter()
    begun = time.perf_counter()
    while (sent := time.perf_counter()) < begun + seconds:
        status = 0
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            reply = connection.getresponse()
            reply.read()
            status = reply.status
            latencies.append(time.perf_counter() - sent)
        statuses[status] += 1
        time.sleep(max(0.0, sent + HEALTH_EVERY_S - time.perf_counter()))
    connection.close()
    return latencies, dict(statuses)


def measure_health(url: str, seconds: float) -> dict[str, Any]:
    """What a crowd is answered, and how long /health takes meanwhile."""
    cell = Cell(HEALTH_CONNECTIONS, 1, 20)
    bodies = bodies_of(cell, 0, seconds)
    # A process of its own: our client's own pauses are not to be measured.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        pool.submit(os.getpid).result()
        asking = pool.submit(ask_health, url, seconds)
        load = Load(url, bodies, cell.connections, seconds, refusal_ends=False).run()
        latencies, statuses = asking.result()
    latencies = latencies or [math.inf]
    wrong = sum(n for s, n in load.statuses.items() if s not in (200, 503))
    wrong += sum(n for s, n in statuses.items() if s != 200)
    return {
        "answers": dict(load.statuses),
        "answers_per_s": len(load.latencies) / load.took,
        "health_answers": statuses,
        "errors": wrong,
        "p50_ms": quantile_ms(latencies, 0.5),
        "p99_ms": quantile_ms(latencies, 0.99),
        "max_ms": max(latencies) * 1000,
    }


# --- the report ---


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed_table(results: Results, subjects: Sequence[Subject], ours: str) -> str:
    """Medians of one variant of ours, and its ratios to every other subject."""
    others = {s.name: [s.name] for s in subjects if s.name != ours}
    peers = [s.name for s in subjects if s.kind == "peer"]
    if len(peers) > 1:
        others[BEST] = peers
    heads = ["load", "inputs/s", "p50 ms", "p99 ms", "p99/p50"]
    for name in others:
        heads += [f"inputs/s : {name}"] + [f"p50 : {name}"] * (name != LOOP)
    rows = []
    for cell, rounds in results.items():
        mine = [found[ours] for found in rounds]
        row = [str(cell), _median(f.inputs_per_s for f in mine)]
        row.append(_median(f.p50_ms for f in mine))
        row.append(_median(f.p99_ms for f in mine))
        row.append(_median((f.p99_ms / f.p50_ms for f in mine), ".2f"))
        for name, theirs in others.items():
            most = [max(found[n].inputs_per_s for n in theirs) for found in rounds]
            least = [min(found[n].p50_ms for n in theirs) for found in rounds]
            row.append(_ratio([f.inputs_per_s for f in mine], most))
            row += [_ratio([f.p50_ms for f in mine], least)] * (name != LOOP)
        rows.append(row)
    return markdown(heads, rows)


def _median(values: Iterable[float], form: str = ".1f") -> str:
    return format(statistics.median(values), form)


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    return _median((a / b for a, b in zip(ours, theirs, strict=True)), ".2f")


def memory_table(servers: Sequence[Server], model: str) -> str:
    """What the servers we started needed at most; empty where nobody can tell."""
    heads = ["subject", "model file MB", "start-up peak", "serving peak", "anonymous"]
    size = Path(model).stat().st_size
    rows = []
    for server in servers:
        peaks = (server.start_peak, server.serving_peak, server.anonymous_peak)
        rows.append([server.name, *(f"{n / MB:.0f}" for n in (size, *peaks))])
    if not any(server.pids for server in servers):
        return ""
    what = "Resident memory in MB (10^6 bytes): VmHWM until ready, VmHWM since, "
    return f"{what}highest RssAnon since.\n\n{markdown(heads, rows)}\n"


def cached_table(rates: Mapping[str, Sequence[float]]) -> str:
    """Ours, which is the first, against each of the others."""
    ours, *_ = rates.values()
    rows = [[n, _median(r, ".0f"), _ratio(ours, r)] for n, r in rates.items()]
    what = "One text of 20 words, 64 connections, our cache on.\n\n"
    return what + markdown(["subject", "requests/s", "ours : it"], rows) + "\n"


def health_text(found: Mapping[str, Any]) -> str:
    """A paragraph."""
    answers = ", ".join(f"{n} x {status}" for status, n in found["answers"].items())
    times = ", ".join(f"{at} {found[f'{at}_ms']:.1f}" for at in ("p50", "p99", "max"))
    return (
        f"{HEALTH_CONNECTIONS} connections, single inputs, 20 words: {answers} "
        f"({found['answers_per_s']:.0f}/s). GET /health every "
        f"{HEALTH_EVERY_S * 1000:.0f} ms meanwhile: {times} ms, "
        f"{sum(found['health_answers'].values())} asked. Errors: {found['errors']}.\n"
    )


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


def shown_arguments(arguments: Sequence[str]) -> str:
    """The arguments, but of peers' commands the name: they are others' business."""
    shown, option = [], ""
    for word in arguments:
        option, equals, value = (
            word.partition("=") if word[:2] == "--" else (option, "", word)
        )
        if option == "--peer-cmd" and word != option:
            name = value.partition("=")[0]
            word = f"{option}={name}" if equals else name
        shown.append(word)
    return shlex.join(shown)


# --- the command line ---


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    for flag, metavar, what in (
        ("--model-path", "FILE", "default: the default model"),
        ("--ours", "NAME=FLAGS", "a variant of this server"),
        ("--peer", "NAME=URL", "a server that runs already"),
        ("--peer-cmd", "NAME=COMMAND", "a server to start, with {model} and {port}"),
    ):
        made.add_argument(
            flag,
            metavar=metavar,
            action="append",
            default=[],
            help=f"{what}; repeatable",
        )
    add = made.add_argument
    add("--bert-base", action="store_true", help="also a random model of that size")
    add("--no-llama-cpp-server", dest="llama_cpp_server", action="store_false")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=3.0, help="a cell and subject")
    add("--cells", default="", help="0,2,long,single+short; default: all")
    add("--list-cells", action="store_true")
    add("--cached", action="store_true", help="also one text again and again")
    add("--neighbour", action="store_true", help="a busy process takes one core")
    add("--health", action="store_true", help="also /health among 1,000 connections")
    add("--json", metavar="FILE", help="where to put the raw figures")
    return made


def model_paths(given: argparse.Namespace, stack: contextlib.ExitStack) -> list[str]:
    """The models to measure, made when they are not there."""
    log = es.Log("warning", "text", sys.stderr)
    cache = Path(es.default_cache_dir())
    paths = list(given.model_path)
    if not paths or given.bert_base:
        default = es.ModelFetch(str(cache), log, es.DEFAULT_MODEL).path()
        paths = paths or [str(default)]
    if given.bert_base:
        folder = cache / "bench"
        if cache.is_dir():
            folder.mkdir(exist_ok=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kept = folder / "random-bert-base-f16.gguf"
        made = kept if kept.exists() else models.bert_base(folder, default)
        paths.append(str(made))
    return paths


def run_model(given: argparse.Namespace, model: str) -> dict[str, Any]:
    """Measure on one model and print; the raw figures."""
    raw: dict[str, Any] = {"model": os.path.basename(model)}
    print(f"### {raw['model']}, {given.rounds} rounds of {given.seconds:g} s\n")
    with contextlib.ExitStack() as stack:
        if given.neighbour:
            stack.enter_context(neighbour())
        bench = Bench(given, model, stack)
        bench.begin()
        subjects = bench.subjects
        with watched(list(bench.servers)):
            cells = chosen(given.cells) if given.cells else CELLS
            results = measure(subjects, cells, given.rounds, given.seconds)
        for ours in (s.name for s in subjects if s.kind == "ours"):
            print(f"{ours}:\n\n{speed_table(results, subjects, ours)}\n", flush=True)
        print(memory_table(bench.servers, model), flush=True)
        raw["cells"] = [
            dataclasses.asdict(cell)
            | {"rounds": [{n: dataclasses.asdict(f) for n, f in r.items()} for r in rs]}
            for cell, rs in results.items()
        ]
        raw["memory_bytes"] = {
            s.name: [s.start_peak, s.serving_peak, s.anonymous_peak]
            for s in bench.servers
        }
        if given.health:
            raw["health"] = measure_health(subjects[0].url, given.seconds)
            print(health_text(raw["health"]), flush=True)
        if given.cached:
            others = [s for s in subjects if s.kind in ("peer", "other")]
            among = [bench.cached(), *others]
            raw["cached"] = measure_cached(among, given.rounds, given.seconds)
            print(cached_table(raw["cached"]), flush=True)
    return raw


def main() -> None:
    """Measure and print."""
    given = parser().parse_args()
    if given.list_cells:
        for number, cell in enumerate(CELLS):
            print(f"{number:2}  {cell} ({', '.join(cell.names)})")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    arguments = shown_arguments(sys.argv[1:])
    raw: dict[str, Any] = {"machine": machine(), "arguments": arguments, "models": []}
    print(f"{raw['machine']}; arguments: {arguments}\n", flush=True)
    with contextlib.ExitStack() as stack:
        for model in model_paths(given, stack):
            raw["models"].append(run_model(given, model))
            if given.json:
                Path(given.json).write_text(json.dumps(raw, indent=1))
    if any(found.get("health", {}).get("errors") for found in raw["models"]):
        raise SystemExit("there were errors among the answers")


if __name__ == "__main__":
    main()
