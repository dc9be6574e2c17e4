"""Fault injection: what clients see of each fault, in figures.

``python -m tests.faults`` injects every fault of FAULTS into a supervised server with a
fake engine, under load, and prints a row for each; tests/test_faults.py asserts them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import http.client
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np

from tests import kit

EMBED = "/v1/embeddings"
JSON = {"Content-Type": "application/json"}


@contextlib.contextmanager
def supervised(
    *flags: str, model: str = "fake.gguf", **options: Any
) -> Iterator[kit.Server]:
    """A server with a parent and a FaultyEngine, whose model file has this name."""
    with tempfile.TemporaryDirectory() as folder:
        path = kit.fake_gguf(Path(folder)).rename(Path(folder) / model)
        module = ("-m", "tests.kit", "supervised", "--model-path", str(path))
        with kit.started(*flags, module=module, **options) as server:
            yield server


def expected(text: str) -> Any:
    """The fake engine's vector of a text."""
    return kit.fake_vector([1, *map(kit.fake_id, text.split()), 2])


def metrics(url: str) -> str:
    """The present text of /metrics."""
    made = http.client.HTTPConnection(
        url.removeprefix("http://"), timeout=kit.DEADLINE_S
    )
    with contextlib.closing(made):
        made.request("GET", "/metrics")
        return made.getresponse().read().decode()


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until it holds; for what no log line or event tells."""
    deadline = time.monotonic() + kit.DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)


@dataclass
class Answer:
    """What one request got."""

    outcome: str  # right, wrong, a status code, lost, refused or hung
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class Client:
    """Asks for vectors and judges what comes; a connection per request, unless kept."""

    def __init__(self, url: str, *, is_kept: bool = False) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port)
        self._is_kept = is_kept
        self._made: http.client.HTTPConnection | None = None
        self._fields: dict[str, str] = {}

    def get(self, path: str) -> Answer:
        """A GET whose answer is not looked at."""
        return self._asked("GET", path, None, lambda _: True)

    def post(self, path: str) -> Answer:
        """A POST without a body."""
        return self._asked("POST", path, "", lambda _: True)

    def show(self, fields: Mapping[str, str]) -> None:
        """Send these fields with every request from now on."""
        self._fields = dict(fields)

    def ask(self, text: str, is_right: Callable[[Any], bool] | None = None) -> Answer:
        """Ask for a text's vector. ``is_right`` judges it; else the fake engine's."""

        def judge(raw: bytes) -> bool:
            vector = json.loads(raw)["data"][0]["embedding"]
            if is_right is not None:
                return is_right(vector)
            return bool(np.allclose(vector, expected(text), atol=1e-6))

        return self._asked("POST", EMBED, json.dumps({"input": text}), judge)

    def _asked(
        self, method: str, path: str, body: str | None, judge: Callable[[bytes], bool]
    ) -> Answer:
        address, timeout = self._address, kit.DEADLINE_S
        self._made = self._made or http.client.HTTPConnection(*address, timeout=timeout)
        try:
            fields = self._fields | (JSON if body else {})
            if not self._is_kept:
                fields = {**fields, "Connection": "close"}
            self._made.request(method, path, body, fields)
            reply = self._made.getresponse()
            raw = reply.read()
        except ConnectionRefusedError:
            self.close()
            return Answer("refused")
        except TimeoutError:
            self.close()
            return Answer("hung")
        except (OSError, http.client.HTTPException) as error:
            self.close()
            return Answer("lost", repr(error))
        if not self._is_kept:
            self.close()
        headers = {name.lower(): value for name, value in reply.getheaders()}
        if reply.status == 200:
            return Answer("right" if judge(raw) else "wrong", "", headers)
        message = json.loads(raw)["error"]["message"]
        return Answer(str(reply.status), message, headers)

    def close(self) -> None:
        """Drop the connection; another one is made when it is needed."""
        if self._made is not None:
            self._made.close()
        self._made = None


class Load:
    """Client threads that ask all the time, each text only once."""

    def __init__(
        self,
        url: str,
        *,
        clients: int = 8,
        is_kept: bool = False,
        text: str = "slow",
        is_right: Callable[[Any], bool] | None = None,
        client: type[Client] = Client,
    ) -> None:
        """``text`` stands before what makes each text another."""
        self.clients = clients
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.worst_s = 0.0
        self._url, self._is_kept = url, is_kept
        self._text, self._is_right = text, is_right
        self._client = client
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._is_over = False
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        for thread in self._threads:
            thread.join(2 * kit.DEADLINE_S)

    def wait_for(self, right: int) -> None:
        """Until so many more requests were answered right."""
        with self._changed:
            until = self.outcomes["right"] + right
            found = self._changed.wait_for(
                lambda: self.outcomes["right"] >= until, kit.DEADLINE_S
            )
        assert found, f"no more right answers: {self.outcomes}"

    def _run(self) -> None:
        client = self._client(self._url, is_kept=self._is_kept)
        while not self._is_over:
            begun = time.monotonic()
            text = f"{self._text} text{next(self._numbers)}"
            answer = client.ask(text, self._is_right)
            with self._changed:
                self.outcomes[answer.outcome] += 1
                self.worst_s = max(self.worst_s, time.monotonic() - begun)
                self._changed.notify_all()
        client.close()


@dataclass
class Figures:
    """One fault's row. ``told``: answered with an error; ``lost``: no whole answer."""

    fault: str
    injected: int
    right: int
    told: int
    lost: int
    refused: int
    wrong: int
    hung: int
    worst_s: float
    max_told: int
    max_lost: int

    @property
    def is_fine(self) -> bool:
        """Whether it cost no more than it may."""
        is_within = self.told <= self.max_told and self.lost <= self.max_lost
        return is_within and not (self.refused or self.wrong or self.hung)

    @classmethod
    def of(cls, fault: str, injected: int, load: Load, costs: str = "") -> Figures:
        """What the clients of a load saw.

        ``costs``: what becomes of the requests in flight, one per client and fault:
        "told" or "lost"; else nothing. All others are answered.
        """
        seen = load.outcomes
        told = sum(count for name, count in seen.items() if name.isdigit())
        names = ("lost", "refused", "wrong", "hung")
        lost, refused, wrong, hung = (seen[name] for name in names)
        in_flight = injected * load.clients
        return cls(
            fault,
            injected,
            seen["right"],
            told,
            lost,
            refused,
            wrong,
            hung,
            load.worst_s,
            in_flight if costs == "told" else 0,
            in_flight if costs == "lost" else 0,
        )


def ended_by(number: int, times: int, *, is_kept: bool) -> Figures:
    """The child is ended by a signal, again and again."""
    with supervised("--workers", "2") as server:
        with Load(server.url, is_kept=is_kept) as load:
            for time_ in range(1, times + 1):
                load.wait_for(2 * load.clients)
                os.kill(server.child, number)
                server.wait_for_log(" ready ", time_ + 1)
            load.wait_for(2 * load.clients)
        assert server.stop() == 0
    kept = "kept" if is_kept else "new"
    name = f"{signal.Signals(number).name}, {kept} connections"
    return Figures.of(name, times, load, "lost")


def poisoned(word: str, times: int, *flags: str, costs: str = "lost") -> Figures:
    """An input ends the child, or makes it end: each time another one is started."""
    with supervised("--workers", "2", *flags) as server:
        with Load(server.url) as load:
            for time_ in range(1, times + 1):
                load.wait_for(2 * load.clients)
                poison = threading.Thread(target=Client(server.url).ask, args=(word,))
                poison.start()
                server.wait_for_log(" ready ", time_ + 1)
                poison.join(kit.DEADLINE_S)
            load.wait_for(2 * load.clients)
        server.stop()
    return Figures.of(f'input "{word}"', times, load, costs)


def failing(word: str, times: int, *flags: str, costs: str = "") -> Figures:
    """An input fails, and nothing else does: no process ends."""
    with supervised("--workers", "2", *flags) as server:
        child = server.child
        with Load(server.url) as load:
            for _ in range(times):
                load.wait_for(1)
                answer = Client(server.url).ask(word)
                assert answer.outcome.isdigit(), answer
            load.wait_for(2 * load.clients)
        assert server.child == child
        assert server.stop() == 0
    return Figures.of(f'input "{word}"', times, load, costs)


def stopped_child(times: int) -> Figures:
    """The child no longer runs, but has not ended: SIGSTOP."""
    with supervised("--workers", "2", "--watchdog-s", "2") as server:
        with Load(server.url) as load:
            for time_ in range(1, times + 1):
                load.wait_for(2 * load.clients)
                os.kill(server.child, signal.SIGSTOP)
                server.wait_for_log(" ready ", time_ + 1)
            load.wait_for(2 * load.clients)
        assert server.stop() == 0
    return Figures.of("SIGSTOP, watchdog 2 s", times, load, "lost")


def reloaded(times: int) -> Figures:
    """Another model and other settings, under load."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.toml"
        config.write_text("")
        flags = ("--workers", "2", "--config", str(config))
        with supervised(*flags) as server, Load(server.url) as load:
            for time_ in range(1, times + 1):
                config.write_text(f"cache_mb = {time_}\nqueue_size = {1000 + time_}\n")
                load.wait_for(2 * load.clients)
                server.process.send_signal(signal.SIGHUP)
                server.wait_for_log(" reloaded ", time_)
            load.wait_for(2 * load.clients)
    return Figures.of("SIGHUP, another model", times, load)


FAULTS: dict[str, Callable[[], Figures]] = {
    "kill new": lambda: ended_by(signal.SIGKILL, 3, is_kept=False),
    "kill kept": lambda: ended_by(signal.SIGKILL, 2, is_kept=True),
    "segv new": lambda: ended_by(signal.SIGSEGV, 2, is_kept=False),
    "crash": lambda: poisoned("crash", 2),
    "exit": lambda: poisoned("exit", 2),
    "stop": lambda: stopped_child(1),
    "gil": lambda: poisoned("gil", 1, "--watchdog-s", "2"),
    "deaf": lambda: poisoned("deaf", 1, "--stuck-after-s", "0.5", costs="told"),
    "quit": lambda: poisoned("quit", 2, "--drain-timeout-s", "1", costs="told"),
    "stall": lambda: failing("stall", 2, "--stuck-after-s", "0.5", costs="told"),
    "boom": lambda: failing("boom", 10),
    "nan": lambda: failing("nan", 10),
    "memory": lambda: failing("memory", 3),
    "reload": lambda: reloaded(10),
}


def main() -> int:
    """Inject all, print the figures; 1 if something was worse than it may be."""
    names = [each.name for each in dataclasses.fields(Figures)]
    print("".join(f"{name:>10}" for name in names[1:]), names[0], sep="   ")
    bad = 0
    for inject in FAULTS.values():
        row = inject()
        shown = [getattr(row, name) for name in names[1:]]
        cells = (f"{v:.2f}" if isinstance(v, float) else str(v) for v in shown)
        print(
            "".join(f"{cell:>10}" for cell in cells), row.fault, sep="   ", flush=True
        )
        bad += not row.is_fine
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
