"""Several servers behind HAProxy: does speed add up, and which choice keeps p99 low?

    python -m tests.bench_front --servers 1,2,4    # needs haproxy
    python -m tests.bench_front --real             # needs a core for each server: Linux

A server's worker sleeps --token-us a token instead of computing, so that one box stands for
several: what is measured is how HAProxy shares the work out, and what it and our HTTP cost.
With --real each has the default model and a core of its own. In turn, round after round: 64
connections with short texts, straight to one server, then through HAProxy to each number
of servers; and a skewed load on the most servers, single texts at a steady rate beside
clients that send batches of 64 long texts, with `leastconn` as `emit haproxy` prints it, and
with the weights that --agent-port tells.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import embellama_server as es
from tests import kit
from tests.bench import Cell, bodies_of, machine, markdown, quantile_ms
from tests.load import Load
from tests.servers import Server, free_port, started
from tests.siege import answers, haproxy_config, wait_until

Started = tuple[Server, int]  # and the port of its agent


@contextlib.contextmanager
def fronted(servers: Sequence[Started], *, asks_agents: bool = False) -> Iterator[str]:
    """HAProxy before these servers; its URL."""
    ports = [int(server.url.rpartition(":")[2]) for server, _ in servers]
    front = free_port()
    text = haproxy_config(front, ports)
    with contextlib.ExitStack() as stack:
        for (_, agent), port in zip(servers, ports, strict=True):
            line = f"server s{port} 127.0.0.1:{port}"
            how = f"weight 100 agent-check agent-inter 200ms agent-port {agent}"
            text = text.replace(line, f"{line} {how}" if asks_agents else line)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        place = Path(folder) / "haproxy.cfg"
        place.write_text(text)
        proxy = subprocess.Popen(["haproxy", "-db", "-f", str(place)])
        stack.callback(proxy.wait)
        stack.callback(proxy.terminate)
        url = f"http://127.0.0.1:{front}"
        wait_until(lambda: answers(url))
        yield url


class SleepingContext(kit.FakeContext):
    """A core's worth of work that needs no core."""

    def _vectors(self, inputs: Sequence[Any], threads: int) -> Any:
        time.sleep(sum(map(len, inputs)) * int(os.environ["TOKEN_US"]) / 1e6)
        return super()._vectors(inputs, threads)


class SleepingEngine(kit.FakeEngine):
    """Of such contexts."""

    def __init__(self, *_: object) -> None:
        super().__init__(
            context_tokens=512,
            max_input_tokens=512,
            trained_tokens=512,
            batch_inputs=64,
        )

    def new_context(self, **_: bool) -> kit.FakeContext:
        return SleepingContext(self)


def closed_loop(url: str, turn: int, seconds: float) -> float:
    """Texts a second, of 64 connections with one short text each."""
    bodies = bodies_of(Cell(64, 1, 20), turn, seconds)
    load = Load(url, bodies, 64, seconds).run()
    return len(load.latencies) / load.took


def skewed(
    url: str, turn: int, seconds: float, rate: float, batches: int
) -> tuple[float, float, float]:
    """Of single texts beside batches: p50 and p99 in ms; and texts a second of all."""
    singles = bodies_of(Cell(64, 1, 20), turn, seconds)
    small = Load(url, singles, 64, seconds, rate=rate)
    others = bodies_of(Cell(batches, 64, 100), turn, seconds)
    large = Load(url, others, batches, seconds)
    other = threading.Thread(target=large.run)
    other.start()
    small.run()
    other.join()
    rates = len(small.latencies) / small.took, 64 * len(large.latencies) / large.took
    return (
        quantile_ms(small.latencies, 0.5),
        quantile_ms(small.latencies, 0.99),
        sum(rates),
    )


def command_of(number: int, port: int, agent: int, *, is_real: bool) -> list[str]:
    """What starts a server with one worker."""
    flags = "--workers 1 --cache-mb 0 --any-model --no-supervise --log-level error"
    own = [*flags.split(), "--port", str(port), "--agent-port", str(agent)]
    if not is_real:
        return [sys.executable, "-m", "tests.bench_front", "serve", *own]
    cpus = sorted(os.sched_getaffinity(0))
    pinned = ["taskset", "-c", str(cpus[number % len(cpus)])]
    return [*pinned, sys.executable, str(kit.ROOT / "embellama_server.py"), *own]


def speed_rows(speeds: Mapping[str, Sequence[float]]) -> list[list[str]]:
    """Of the first table."""
    medians = {name: statistics.median(own) for name, own in speeds.items()}
    first = next(iter(medians.values()))
    return [[name, f"{own:.0f}", f"{own / first:.2f}"] for name, own in medians.items()]


def main() -> None:
    """Measure, and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--servers", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--token-us", type=int, default=500)
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--load", type=float, default=0.2, help="Of single texts.")
    parser.add_argument(
        "--batches", type=int, default=2, help="Clients that send them."
    )
    given = parser.parse_args()
    if shutil.which("haproxy") is None:
        raise SystemExit("haproxy is not installed")
    print(f"{machine()}; {' '.join(sys.argv[1:])}\n", flush=True)
    os.environ["TOKEN_US"] = str(given.token_us)
    counts = [int(count) for count in given.servers.split(",")]
    with contextlib.ExitStack() as stack:
        servers = []
        for number in range(max(counts)):
            port, agent = free_port(), free_port()
            command = command_of(number, port, agent, is_real=given.real)
            server = started(f"server {number}", command, port, None)
            servers.append((stack.enter_context(server), agent))
        urls = {"1, no front": servers[0][0].url} | {
            str(count): stack.enter_context(fronted(servers[:count]))
            for count in counts
        }
        choices = {
            name: stack.enter_context(fronted(servers, asks_agents=name != "leastconn"))
            for name in ("leastconn", "leastconn, weights by backlog")
        }
        speeds: dict[str, list[float]] = {name: [] for name in urls}
        found: dict[str, list[tuple[float, float, float]]] = {n: [] for n in choices}
        for turn in range(given.rounds):
            for name, url in urls.items():
                speeds[name].append(closed_loop(url, turn, given.seconds))
            rate = given.load * max(own[-1] for own in speeds.values())
            for name, url in choices.items():
                more = given.seconds * 2, rate, given.batches
                found[name].append(skewed(url, turn, *more))
            print(f"round {turn + 1}: {speeds} {found}", file=sys.stderr)
    print(markdown(["servers", "texts/s", "/ one"], speed_rows(speeds)), end="\n\n")
    heads = ["choice", "p50 ms of single texts", "p99 ms", "texts/s in all"]
    skews = [
        [name, *(f"{statistics.median(each):.0f}" for each in zip(*own, strict=True))]
        for name, own in found.items()
    ]
    print(markdown(heads, skews))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        with tempfile.TemporaryDirectory() as temp:
            model = ["--model-path", str(kit.fake_gguf(Path(temp)))]
            sys.exit(es.main([*model, *sys.argv[2:]], engine_factory=SleepingEngine))
    main()
