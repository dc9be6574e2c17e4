"""How fast chat is, against llama-server on the same file, cores and cells.

    python -m tests.bench_chat                          # all cells, llama-server on PATH
    python -m tests.bench_chat --peer-cmd '/a/llama-server {usual}' rates stall
    python -m tests.bench_chat --same-text              # greedy texts of 50 prompts

Both servers are up all the time and one at a time is asked: in each round each runs each
cell once, in turn, and what is judged is the median over rounds of the ratio within a
round. Prompts are raw text (``/v1/completions``), so no template differs; samplers are
sent, so no default does. Build llama-server from the commit that llama-cpp-python has.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import embellama_server as es
from tests import gemma, kit
from tests.bench import machine, markdown
from tests.chat_load import (
    CELLS,
    DEFAULT_CHAIN,
    GREEDY,
    STREAMS_BESIDE,
    TIGHT_CONTEXT,
    TIGHT_PARALLEL,
    Cell,
    Figures,
    Stream,
    Texts,
    beside,
    lookup,
    overcommit,
)
from tests.servers import Server, free_port, started, watched

OURS, PEER = "this server", "llama-server"
OUR_COMMAND = (
    f"{sys.executable} {kit.ROOT / 'embellama_server.py'} --model-path {{model}} "
    "--any-model --parallel {parallel} --context-size {context} --port {port} "
    "--log-level warning"
)
# Without --kv-unified a stream has only its share of the cells, and a long prompt no room.
USUAL = (
    "--model {model} --parallel {parallel} --ctx-size {context} --kv-unified "
    "--threads {cores} --threads-batch {cores} --port {port}"
)
PARALLEL, CONTEXT = 16, 16_384
OPENINGS = (
    "The history of",
    "How to learn about",
    "A story about",
    "Facts on",
    "I saw",
)
TOPICS = ("bread", "sea", "Rome", "tea", "snow", "chess", "wolves", "ants", "ice", "π")
PROMPTS = [" ".join(pair) for pair in itertools.product(OPENINGS, TOPICS)]
MB = 1e6
SETTLE_S = 0.5
IDLE_SHARE = 0.02  # of a core: more of it while the other is asked, and it disturbs
OTHERS = ("overcommit", "memory", "lookup", "beside")  # with servers of their own
DRAFTING = "--draft-tokens 15 --draft-greedy"
PLAIN = "--draft-tokens 0"  # what drafts are compared with: this server without


@dataclass(frozen=True)
class Bar:
    """What a figure must be: of the peer's, or by itself."""

    limit: float
    of_peer: bool = True
    at_least: bool = False
    allowance: float = 0  # taken off ours first: what a clock cannot tell

    def reached(self, ours: Sequence[float], peers: Sequence[float]) -> bool:
        """By the median over rounds."""
        middle = statistics.median(self.compared(ours, peers))
        return middle >= self.limit if self.at_least else middle <= self.limit

    def compared(self, ours: Sequence[float], peers: Sequence[float]) -> list[float]:
        """Of each round, what the limit is for."""
        if not self.of_peer:
            return list(ours)
        pairs = zip(ours, peers, strict=True)
        return [(own - self.allowance) / max(peer, 1e-9) for own, peer in pairs]

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        more = f" + {self.allowance:g}" if self.allowance else ""
        return f"{sign} {self.limit:g}{' x' * self.of_peer}{more}"


BARS = {
    "tokens/s: 1 stream, greedy": Bar(0.99, at_least=True),
    "tokens/s: 1 stream": Bar(0.97, at_least=True),
    "tokens/s: 4 streams": Bar(1.0, at_least=True),
    "tokens/s: 16 streams": Bar(1.1, at_least=True),
    "outside llama.cpp, %: 1 stream": Bar(3, of_peer=False),
    "outside llama.cpp, %: 16 streams": Bar(8, of_peer=False),
    "first token, ms: 512 tokens": Bar(1.03, allowance=2),
    "1,000 shared tokens, of cold: past": Bar(0.10, of_peer=False),
    "1,000 shared tokens, of cold: running": Bar(0.10, of_peer=False),
    "2,000 tokens are read: others' pause p99, ms": Bar(150, of_peer=False),
    "2,000 tokens are read: first token, ms": Bar(1.25),
    "8 behind 4,000 tokens: first token p95, ms": Bar(0.25),
    "after one has left: first token later, ms": Bar(120, of_peer=False),  # a step + 20
    "twice the cells: lost": Bar(0, of_peer=False),
    **{
        f"embeddings, {many} at a time: p50, of alone": Bar(2, of_peer=False)
        for many in (1, 8)
    },
    **{f"quoting, {how}": Bar(1.5, at_least=True) for how in ("greedy", "sampled")},
    "editing, greedy": Bar(1.5, at_least=True),
    **{
        f"a story, {how}": Bar(0.98, at_least=True)
        for how in ("greedy", "sampled", "sampled, 4 streams")
    },
}


# --- measuring ---


@dataclass(frozen=True)
class Subject:
    """A server's name, and how it is started."""

    name: str
    command: str

    @contextlib.contextmanager
    def serving(self, model: Path, parallel: int, context: int) -> Iterator[Server]:
        """The server, when it completes texts."""
        port = free_port()
        fills = {"model": model, "parallel": parallel, "context": context}
        fills |= {"cores": es.usable_cores(), "port": port}
        words = self.command.replace("{usual}", USUAL).format(**fills)
        trial = json.dumps({"model": "bench", "prompt": "the", "max_tokens": 1})
        log = sys.stderr if self.name == OURS else subprocess.DEVNULL
        with started(
            self.name,
            shlex.split(words),
            port,
            log,
            trial=("/v1/completions", trial.encode()),
        ) as server:
            yield server


Rounds = dict[str, dict[str, list[float]]]  # figure, server: each round's


def run_cell(cell: Cell, server: Server, turn: int) -> Figures:
    """Once."""
    with asyncio.Runner(loop_factory=es.new_event_loop) as runner:
        return runner.run(_run_cell(cell, server.url, Texts(cell.__name__, turn)))


async def _run_cell(cell: Cell, url: str, texts: Texts) -> Figures:
    return await cell(url, texts)


def measure(
    servers: Sequence[Server], cells: Sequence[Cell], rounds: int, found: Rounds
) -> None:
    """Every cell in every round, the servers in turn."""
    for server in servers:
        run_cell(_crowd(TIGHT_PARALLEL), server, 0)
    for turn, cell in itertools.product(range(rounds), cells):
        for number in range(len(servers)):
            server = servers[(turn + number) % len(servers)]
            idle = [other for other in servers if other is not server]
            before, begun = _cpu_s(idle), time.perf_counter()
            figures = run_cell(cell, server, turn)
            share = (_cpu_s(idle) - before) / (time.perf_counter() - begun)
            if share > IDLE_SHARE:
                print(f"idle, {idle[0].name} took {share:.0%} of a core")
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            print(f"round {turn + 1}: {server.name}: {shown}", file=sys.stderr)
            for name, value in figures.items():
                found.setdefault(name, {}).setdefault(server.name, []).append(value)
            _settle(server)


def _settle(server: Server) -> None:
    """Wait until it computes nothing: those who have left may cost it seconds."""
    share = 1.0
    while share > IDLE_SHARE:
        before = _cpu_s([server])
        time.sleep(SETTLE_S)
        share = (_cpu_s([server]) - before) / SETTLE_S


def _cpu_s(servers: Sequence[Server]) -> float:
    """CPU time that they have taken so far."""
    ticks = 0
    for pid in itertools.chain(*(server.pids for server in servers)):
        with contextlib.suppress(OSError):
            after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
            ticks += sum(map(int, after_name.split()[11:13]))  # utime, stime
    return ticks / os.sysconf("SC_CLK_TCK")


def measure_memory(subject: Subject, model: Path) -> list[str]:
    """A row: what it needs with one stream, with many, and for each more."""
    peaks = []
    for parallel in (1, PARALLEL):
        with subject.serving(model, parallel, CONTEXT) as server, watched([server]):
            run_cell(_crowd(parallel), server, 0)
        peaks.append((server.anonymous_peak, server.serving_peak))
    (anonymous, _), (most, resident) = peaks
    each = (most - anonymous) / (PARALLEL - 1)
    return [subject.name, *(f"{n / MB:.1f}" for n in (anonymous, most, resident, each))]


def measure_lookup(subject: Subject, model: Path, rounds: int) -> Rounds:
    """What drafts gain, and cost, and print that."""
    found: Rounds = {}
    with contextlib.ExitStack() as stack:
        plain = Subject(PLAIN, f"{subject.command} {PLAIN}")
        subject = Subject(OURS, f"{subject.command} {DRAFTING}")
        servers = [
            stack.enter_context(one.serving(model, TIGHT_PARALLEL, CONTEXT // 2))
            for one in (subject, plain)
        ]
        measure(servers, [lookup], rounds, found)
    print(f"\ntokens/s, {rounds} rounds, medians:\n\n{table(found, PLAIN)}\n")
    return found


def measure_beside(subject: Subject, model: Path, rounds: int) -> Rounds:
    """What streams cost the embeddings of another model, and print that."""
    found: Rounds = {}
    log = es.Log("warning", "text", sys.stderr)
    embeds = es.ModelFetch(es.default_cache_dir(), log, es.DEFAULT_MODEL).path()
    # Given so, --context-size would be for both, and one was trained for 512 tokens.
    command = subject.command.replace("--context-size {context}", "--model-path {also}")
    both = Subject(OURS, command.replace("{also}", str(embeds)))
    with both.serving(model, STREAMS_BESIDE, CONTEXT) as server:
        measure([server], [beside], rounds, found)
    print(f"\n{embeds.name}, {rounds} rounds, medians:\n\n{table(found)}\n")
    return found


def _crowd(streams: int) -> Cell:
    async def crowd(url: str, texts: Texts) -> Figures:
        asked = [
            Stream(url, texts.words(32), 32, **DEFAULT_CHAIN) for _ in range(streams)
        ]
        for stream in asked:
            await stream.ended()
        return {}

    return crowd


def same_texts(subjects: Sequence[Subject], model: Path, cells: int) -> int:
    """Compare what servers say, one prompt at a time; in how many they differ."""
    said = []
    # For checkpoints llama-server reads a prompt's last 4 tokens by themselves, and other
    # shapes of batches give other bits.
    plain = Subject(PEER, f"{subjects[1].command} --ctx-checkpoints 0")
    for subject in (Subject(OURS, f"{subjects[0].command} {PLAIN}"), plain):
        with subject.serving(model, 1, cells) as server:
            texts: list[str] = []
            run_cell(_telling(texts), server, 0)
        said.append(texts)
    differing = [
        n for n, pair in enumerate(zip(*said, strict=True)) if len({*pair}) > 1
    ]
    for number in differing:
        print(f"after {PROMPTS[number]!r}:")
        for subject, texts in zip(subjects, said, strict=True):
            print(f"  {subject.name}: {texts[number]!r}")
    print(f"greedy texts: {len(PROMPTS) - len(differing)} of {len(PROMPTS)} are equal")
    return len(differing)


def _telling(texts: list[str]) -> Cell:
    async def telling(url: str, _: Texts) -> Figures:
        for prompt in PROMPTS:
            options = GREEDY | {"cache_prompt": False, "ignore_eos": False}
            texts.append((await Stream(url, prompt, 48, **options).ended()).text)
        return {}

    return telling


# --- the report and the command line ---


def missed(name: str, by_server: dict[str, list[float]]) -> bool:
    """Whether a figure is not as it must be."""
    bar = BARS.get(name)
    return bar is not None and not bar.reached(by_server[OURS], others(by_server))


def others(by_server: dict[str, list[float]]) -> list[float]:
    """What the other server gave, if it was asked."""
    return next((them for name, them in by_server.items() if name != OURS), [])


def table(found: Rounds, peer: str = PEER) -> str:
    """Every figure: medians, the median ratio, and whether it is as it must be."""
    rows = []
    for name, by_server in found.items():
        ours, peers = by_server[OURS], others(by_server)
        middles = [
            f"{statistics.median(them):.4g}" if them else "" for them in (ours, peers)
        ]
        ratios = [own / peer for own, peer in zip(ours, peers) if peer]
        ratio = f"{statistics.median(ratios):.3f}" if ratios else ""
        verdict = "NO" if missed(name, by_server) else "yes"
        rows.append([name, *middles, ratio, str(BARS.get(name, "")), verdict])
    return markdown(["figure", OURS, peer, "ratio", "must be", "is"], rows)


def memory_table(subjects: Sequence[Subject], model: Path) -> str:
    """Resident memory at its highest, while as many streams run as there can be."""
    heads = ["subject", "RssAnon, 1 stream", f"{PARALLEL} streams", "VmHWM", "a stream"]
    rows = [measure_memory(subject, model) for subject in subjects]
    return f"MB (10^6 bytes) with {CONTEXT} cells:\n\n{markdown(heads, rows)}"


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add = made.add_argument
    names = [*CELLS, *OTHERS]
    add("cells", nargs="*", metavar="CELL", help=f"default: all of {', '.join(names)}")
    fills = "with {model} {parallel} {context} {cores} {port}"
    add("--ours-cmd", default=OUR_COMMAND, metavar="COMMAND", help=fills)
    add(
        "--peer-cmd",
        default="llama-server {usual}",
        metavar="COMMAND",
        help=f"{fills}, or {{usual}} for all",
    )
    add("--model-path", type=Path, help="default: Gemma 3 270M, fetched once")
    add("--rounds", type=int, default=5)
    add("--same-text", action="store_true", help="only compare greedy texts")
    # Not "cells": that is the list of what to measure, which took its place.
    about = "of --same-text; from 257 on bits move"
    add("--cells", type=int, default=256, dest="kv_cells", help=about)
    add("--json", type=Path, metavar="FILE", help="where to put the raw figures")
    return made


def main() -> None:
    """Measure and print; fails where a bar is missed."""
    given = parser().parse_args()
    names = given.cells or [*CELLS, *OTHERS]
    if unknown := {*names} - {*CELLS, *OTHERS}:
        raise SystemExit(f"no such cell: {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended
    model = given.model_path or gemma.fetched()
    subjects = [Subject(OURS, given.ours_cmd), Subject(PEER, given.peer_cmd)]
    print(f"{machine()}; {model.name}; load {os.getloadavg()[0]:.1f}")
    for subject in subjects:
        program, _, flags = subject.command.replace("{usual}", USUAL).partition(" ")
        print(f"{subject.name}: {os.path.basename(program)} {flags}")
    if given.same_text:
        raise SystemExit(same_texts(subjects, model, given.kv_cells) > 0)
    found: Rounds = {}
    usual = [cell for name, cell in CELLS.items() if name in names]
    tight = [overcommit] * ("overcommit" in names)
    for cells, parallel, context in (
        (usual, PARALLEL, CONTEXT),
        (tight, TIGHT_PARALLEL, TIGHT_CONTEXT),
    ):
        with contextlib.ExitStack() as stack:
            servers = [
                stack.enter_context(subject.serving(model, parallel, context))
                for subject in subjects * bool(cells)
            ]
            measure(servers, cells, given.rounds, found)
    if found:
        print(f"\n{given.rounds} rounds, medians:\n\n{table(found)}\n")
    if "lookup" in names:
        found |= measure_lookup(subjects[0], model, given.rounds)
    if "beside" in names:
        found |= measure_beside(subjects[0], model, given.rounds)
    if "memory" in names:
        print(memory_table(subjects, model))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    raise SystemExit(any(missed(name, both) for name, both in found.items()))


if __name__ == "__main__":
    main()
