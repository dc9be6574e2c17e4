"""Floods, slow clients and a rolling restart, with the field's own tools.

python -m tests.siege                   # all of it
python -m tests.siege slow overload     # some

Needs slowhttptest, wrk, ab (apache2-utils) and haproxy. Prints what was done to the
server and what came of it; each function asserts what must hold however slow the machine
is, and returns the figures.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import embellama_server as es
from tests import kit
from tests.load import Load, body
from tests.servers import free_port
from tests.words import WORDS

SCRIPT = ("embellama_server.py", "--any-model")
TOOLS = {"slow": ("slowhttptest",), "flood": ("wrk", "ab"), "restart": ("haproxy",)}


def quantile(values: Sequence[float], at: float) -> float:
    """Of what was measured; 0 of nothing."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(at * len(ranked)))] if ranked else 0.0


def memory_mb(pid: int) -> float:
    """Resident, of a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+([0-9]+) kB", own)
    total = int(found[1]) / 1024 if found else 0.0
    for child in children:
        with contextlib.suppress(OSError):  # it has ended since it was listed
            total += memory_mb(int(child))
    return total


@dataclass
class Patient:
    """Asks /health again and again, beside whatever else happens."""

    url: str
    latencies: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def ask(self) -> None:
        """Thread: until it is over, ten times a second, each on a new connection."""
        host = urlsplit(self.url).netloc
        while not self._over.wait(0.1):
            begun = time.perf_counter()
            connection = http.client.HTTPConnection(host, timeout=kit.DEADLINE_S)
            try:
                connection.request("GET", "/health")
                status = connection.getresponse().status
                if status != 200:
                    self.failures.append(str(status))
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
            finally:
                connection.close()
            self.latencies.append(time.perf_counter() - begun)

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """While the body of the with statement runs."""
        thread = threading.Thread(target=self.ask)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()


def slow(seconds: int = 20) -> dict[str, object]:
    """slowhttptest: 1,000 connections of slow heads, of slow bodies, of slow readers."""
    figures: dict[str, object] = {}
    with kit.started("--header-timeout-s", "5") as server:
        before = memory_mb(server.process.pid)
        for name, flags in (
            ("slow heads", ["-H", "-i", "5"]),
            ("slow bodies", ["-B", "-i", "5", "-s", "65536"]),
            ("slow readers", ["-X", "-w", "10", "-y", "20", "-n", "5", "-z", "5"]),
        ):
            url = server.url + ("/metrics" if "-X" in flags else "/v1/embeddings")
            patient = Patient(server.url)
            tool = ["slowhttptest", "-c", "1000", "-r", "200", "-l", str(seconds)]
            kind = ["-f", "application/json"] if "-B" in flags else []
            with patient.asking():
                subprocess.run(
                    [*tool, "-p", "3", *flags, *kind, "-u", url],
                    stdout=subprocess.DEVNULL,
                    check=False,  # its exit code is about its own view
                    timeout=seconds + kit.DEADLINE_S,
                )
            assert not patient.failures, patient.failures[:3]
            figures[name] = {
                "health asked": len(patient.latencies),
                "p99 ms": round(quantile(patient.latencies, 0.99) * 1000, 1),
                "max ms": round(max(patient.latencies) * 1000, 1),
            }
            assert max(patient.latencies) < 3.0, figures
        grown = memory_mb(server.process.pid) - before
        figures["memory grown MB"] = round(grown, 1)
        assert grown < 64, figures
        assert server.stop() == 0
    return figures


def flood(seconds: int = 10) -> dict[str, object]:
    """wrk and ab in closed loop against a queue of 64 inputs, on the real model."""
    figures: dict[str, object] = {}
    flags = ("--queue-size", "64", "--cache-mb", "0")
    with (
        kit.started(*flags, module=SCRIPT) as server,
        tempfile.TemporaryDirectory() as temp,
    ):
        alone = Load(server.url, bodies(seconds), 48, seconds / 2).run()
        folder = Path(temp)
        ask = folder / "ask.json"
        ask.write_bytes(bodies(1)[0])
        script = folder / "ask.lua"
        script.write_text(
            'wrk.method = "POST"\nwrk.headers["Content-Type"] = "application/json"\n'
            "local n = 0\n"
            "request = function() n = n + 1; return wrk.format(nil, nil, nil, "
            "'{\"input\": \"flood ' .. n .. ' ' .. math.random() .. '\"}') end\n"
        )
        patient = Patient(server.url)
        with patient.asking():
            wrk = [
                "wrk",
                "-t",
                "1",
                "-c",
                "640",
                "-d",
                f"{seconds}s",
                "-s",
                str(script),
            ]
            done = subprocess.run(
                [*wrk, f"{server.url}/v1/embeddings"],
                capture_output=True,
                text=True,
                check=True,
                timeout=seconds + kit.DEADLINE_S,
            )
        sent = int(re.findall(r"([0-9]+) requests in", done.stdout)[0])
        refused = int(
            (re.findall(r"Non-2xx or 3xx responses: ([0-9]+)", done.stdout) or [0])[0]
        )
        errors = re.findall(r"Socket errors: (.*)", done.stdout)
        answered_per_s = (sent - refused) / seconds
        figures["wrk, 640 connections"] = {
            "offered per s": sent // seconds,
            "answered per s": round(answered_per_s),
            "alone per s": round(len(alone.latencies) / alone.took),
            "socket errors": errors,
            "health p99 ms": round(quantile(patient.latencies, 0.99) * 1000, 1),
        }
        assert not patient.failures, patient.failures[:3]
        assert sent - refused > 0
        ab = ["ab", "-q", "-n", "5000", "-c", "100", "-p", str(ask)]
        done = subprocess.run(
            [*ab, "-T", "application/json", f"{server.url}/v1/embeddings"],
            capture_output=True,
            text=True,
            check=True,
            timeout=seconds + kit.DEADLINE_S,
        )
        assert "Complete requests:      5000" in done.stdout
        figures["ab, a connection a request"] = {
            "per s": float(
                re.findall(r"Requests per second: +([0-9.]+)", done.stdout)[0]
            ),
            "refused": int(
                (re.findall(r"Non-2xx responses: +([0-9]+)", done.stdout) or ["0"])[0]
            ),
        }
        assert server.stop() == 0
    return figures


def bodies(seconds: float, words: int = 20) -> list[bytes]:
    """Of requests of so many words, enough of them never to be sent twice; seeded."""
    chance = random.Random(seconds)
    count = int(seconds * 30_000 / words)
    return [body([" ".join(chance.choices(WORDS, k=words))]) for _ in range(count)]


def overload(seconds: int = 60, words: int = 100) -> dict[str, object]:
    """Ten times what the real model can do, at a steady rate; then normal again."""
    flags = ("--queue-size", "256", "--cache-mb", "0", "--request-timeout-s", "10")
    with kit.started(*flags, module=SCRIPT) as server:
        Load(server.url, bodies(2, words), 32, 2).run()
        before = Load(server.url, bodies(10, words), 32, 10).run()
        most = len(before.latencies) / before.took
        memory = memory_mb(server.process.pid)
        pressed = Load(
            server.url,
            bodies(seconds / 4, words),
            1000,
            seconds,
            refusal_ends=False,
            rate=10 * most,
        ).run()
        grown = memory_mb(server.process.pid) - memory
        begun = time.perf_counter()
        recovered = Load(server.url, bodies(2, words), 1, 2).run()
        assert recovered.statuses.keys() == {200}
        first = recovered.latencies[0] + (time.perf_counter() - begun - recovered.took)
        after = Load(server.url, bodies(10, words), 32, 10).run()
        assert server.stop() == 0
    goodput = len(pressed.latencies) / pressed.took
    later = len(after.latencies) / after.took
    figures: dict[str, object] = {
        "words": words,
        "unloaded per s": round(most, 1),
        "unloaded afterwards per s": round(later, 1),
        "offered per s": round(sum(pressed.statuses.values()) / pressed.took, 1),
        "statuses": dict(pressed.statuses),
        "goodput": round(goodput / max(most, later), 3),
        "accepted p99 s": round(quantile(pressed.latencies, 0.99), 2),
        "refusals p50 ms": round(quantile(pressed.refusals, 0.5) * 1000, 2),
        "refusals p99 ms": round(quantile(pressed.refusals, 0.99) * 1000, 2),
        "memory grown MB": round(grown, 1),
        "first answer afterwards s": round(first, 2),
    }
    assert set(pressed.statuses) <= {200, 503}, figures
    assert quantile(pressed.latencies, 0.99) <= 10.0, figures
    return figures


@dataclass
class Clients:
    """Threads that ask for vectors, each request on a new connection."""

    url: str
    count: int = 12
    statuses: list[object] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def ask(self, number: int) -> None:
        """Thread: until it is over."""
        host = urlsplit(self.url).netloc
        kind = {"Content-Type": "application/json"}
        turn = 0
        while not self._over.is_set():
            turn += 1
            connection = http.client.HTTPConnection(host, timeout=kit.DEADLINE_S)
            try:
                text = json.dumps({"input": f"{number} {turn}"})
                connection.request("POST", "/v1/embeddings", text, kind)
                reply = connection.getresponse()
                reply.read()
                self.statuses.append(reply.status)
            except (OSError, http.client.HTTPException) as error:
                self.statuses.append(repr(error))
            finally:
                connection.close()

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """While the body of the with statement runs."""
        threads = [
            threading.Thread(target=self.ask, args=(n,)) for n in range(self.count)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join()


def haproxy_config(front: int, ports: Sequence[int]) -> str:
    """What `emit haproxy` prints, with these ports instead of its front and servers."""
    plain = es.Deployment(es.load_settings({}, {}), "python", "embellama_server.py")
    (printed,) = es.haproxy_files(plain).values()
    printed = printed.replace("bind :8000", f"bind 127.0.0.1:{front}")
    kept = [line for line in printed.splitlines() if "  server a1 " not in line]
    return "\n".join(
        [*kept, *(f"  server s{port} 127.0.0.1:{port}" for port in ports), ""]
    )


def restart(rounds: int = 2) -> dict[str, object]:
    """Two servers behind HAProxy, each restarted in turn under load: none must fail."""
    ports, front = [free_port(), free_port()], free_port()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = folder / "haproxy.cfg"
        config.write_text(haproxy_config(front, ports))

        def start(port: int) -> kit.Server:
            flags = ("--drain-grace-s", "2", "--port", str(port))
            return stack.enter_context(kit.started(*flags))

        servers = [start(port) for port in ports]
        proxy = subprocess.Popen(["haproxy", "-db", "-f", str(config)])
        stack.callback(proxy.wait)
        stack.callback(proxy.terminate)
        clients = Clients(f"http://127.0.0.1:{front}")
        wait_until(lambda: answers(clients.url))
        restarted = 0
        with clients.asking():
            for _ in range(rounds):
                for index, port in enumerate(ports):
                    assert servers[index].stop() == 0
                    servers[index] = start(port)
                    restarted += 1
                    # HAProxy sends nothing there before it has found it up twice.
                    seen = len(clients.statuses)
                    wait_until(lambda seen=seen: len(clients.statuses) > seen + 500)  # type: ignore[misc]
                    time.sleep(1.5)
    failed = [status for status in clients.statuses if status != 200]
    figures: dict[str, object] = {
        "restarts": restarted,
        "requests": len(clients.statuses),
        "failed": len(failed),
    }
    assert not failed, (figures, failed[:5])
    return figures


def answers(url: str, path: str = "/ready") -> bool:
    """Whether it says 200 there."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def wait_until(is_true: Callable[[], bool]) -> None:
    """Ask again until it is so, but not for ever."""
    end = time.monotonic() + kit.DEADLINE_S
    while not is_true():
        assert time.monotonic() < end, "it never was"
        time.sleep(0.05)


SIEGES: dict[str, Callable[[], dict[str, object]]] = {
    "slow": slow,
    "flood": flood,
    "overload": overload,
    "overload, short texts": functools.partial(overload, words=20),
    "restart": restart,
}


if __name__ == "__main__":
    for name in sys.argv[1:] or SIEGES:
        print(name, json.dumps(SIEGES[name](), indent=2), flush=True)
