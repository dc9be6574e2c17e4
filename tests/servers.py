"""Server processes that measuring starts and ends, and the memory they need."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from tests import kit
from tests.load import body

START_S = 180.0  # longest a server may take to load its model


@dataclass
class Server:
    """A server process of ours to end, and the most memory it was seen to have."""

    name: str
    process: subprocess.Popen[bytes]
    url: str
    trial: tuple[str, bytes] = ("/v1/embeddings", body(["the"]))
    pids: list[int] = field(default_factory=list)
    start_peak: float = 0.0  # all in bytes
    serving_peak: float = 0.0
    anonymous_peak: float = 0.0

    def is_ready(self) -> bool:
        """Whether it serves; raises SystemExit when it has ended.

        /health may be fine, or the models be listed, while the model still loads: so its
        work is asked for too.
        """
        if (code := self.process.poll()) is not None:
            raise SystemExit(f"{self.name} ended with {code} instead of serving")
        if not any(_answers(f"{self.url}/{path}") for path in ("health", "v1/models")):
            return False
        kind = {"Content-Type": "application/json"}
        path, asks = self.trial
        return _answers(Request(self.url + path, asks, kind))

    def forget_start(self) -> None:
        """From now on the peak is that of serving. Linux only."""
        self.pids = _session(self.process.pid)
        self.start_peak = self._sum("VmHWM")
        with contextlib.suppress(OSError):
            for pid in self.pids:
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def sample(self) -> None:
        """Look at its memory; with several processes the peak of their sum."""
        self.serving_peak = max(self.serving_peak, self._sum("VmHWM"))
        self.anonymous_peak = max(self.anonymous_peak, self._sum("RssAnon"))

    def end(self) -> None:
        """It and the processes it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            os.killpg(self.process.pid, signal.SIGKILL)
        for left in _session(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        self.process.wait(kit.DEADLINE_S)

    def _sum(self, name: str) -> float:
        return sum(_status_bytes(pid, name) for pid in self.pids)


def _answers(ask: str | Request) -> bool:
    with contextlib.suppress(OSError), urlopen(ask, timeout=START_S) as reply:
        reply.read()
        return bool(reply.status == 200)
    return False


def _session(leader: int) -> list[int]:
    """The processes of a session, in any group; none where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(path.name)) == leader:
                found.append(int(path.name))
    return found


def _status_bytes(pid: int, name: str) -> float:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024.0
    return 0.0


@contextlib.contextmanager
def started(
    name: str,
    command: Sequence[str],
    port: int,
    log: Any,
    trial: tuple[str, bytes] = Server.trial,
) -> Iterator[Server]:
    """A server as the leader of a session of its own, when it answers."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
    )
    server = Server(name, process, f"http://127.0.0.1:{port}", trial)
    try:
        deadline = time.monotonic() + START_S
        while not server.is_ready():
            if time.monotonic() > deadline:
                raise SystemExit(f"{name} is not ready after {START_S:.0f} s")
            time.sleep(0.1)  # another program's start: nothing to wait on
        server.forget_start()
        yield server
    finally:
        server.end()


@contextlib.contextmanager
def watched(servers: Sequence[Server]) -> Iterator[None]:
    """Look at their memory now and then."""
    ended = threading.Event()

    def watch() -> None:
        while True:
            for server in servers:
                server.sample()
            if ended.wait(0.2):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for server in servers:
            server.sample()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def neighbour() -> Iterator[None]:
    """A process that keeps a core busy; gone when we are, even if we are killed."""
    code = f"import os\nwhile os.getppid() == {os.getpid()}:\n for _ in range(10**6): 0"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()
