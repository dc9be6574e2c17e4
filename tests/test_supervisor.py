"""Room SUPERVISOR: the parent, its child, and what systemd is told.

Black box: the program with a fake engine, its processes, signals and log lines.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import embellama_server as es
from tests import both, kit, slow
from tests.faults import Client, metrics, supervised, until

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="children are found in /proc"
)


def is_alive(pid: int) -> bool:
    """Whether the process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][1] != "Z"
    except OSError:
        return False


def elapse(seconds: float) -> None:
    """Let time pass: what is tested is that something does not happen in it."""
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() > end, "the end of time")


def replaced(server: kit.Server) -> None:
    """Let the child make way for another one: a thread of its has died."""
    assert Client(server.url).ask("quit").outcome == "503"
    ready_again(server)
    server.wait_for_log("replacing this process")


def ready_again(server: kit.Server, times: int = 2) -> None:
    """Wait for the child after so many."""
    server.wait_for_log(" ready ", times)


@pytest.fixture(scope="module")
def shared() -> Iterator[kit.Server]:
    """For tests that it outlives; each child that they kill comes back later."""
    with supervised() as server:
        yield server
        assert server.stop() == 0


# --- two processes ---


def test_the_pid_that_was_started_is_the_parent_and_small(shared: kit.Server) -> None:
    status = Path(f"/proc/{shared.process.pid}/status").read_text()
    (kilobytes,) = re.findall(r"VmRSS:\s+([0-9]+) kB", status)
    assert int(kilobytes) < 15_000
    assert shared.child
    assert Client(shared.url).ask("a").outcome == "right"


def test_unsupervised_it_is_one_process() -> None:
    with supervised("--no-supervise") as server:
        assert server.child == 0
        assert Client(server.url).ask("a").outcome == "right"
        assert server.stop() == 0


def test_the_parent_holds_no_more_files_after_restarts() -> None:
    with supervised() as server:
        folder = Path(f"/proc/{server.process.pid}/fd")
        before = len(list(folder.iterdir()))
        for times in (2, 3):
            os.kill(server.child, signal.SIGKILL)
            ready_again(server, times)
        assert len(list(folder.iterdir())) == before


@pytest.mark.slow
def test_each_child_holds_the_same_files() -> None:
    def files(pid: int) -> list[str]:
        found = []
        for each in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                found.append(re.sub(r"[0-9]+", "", os.readlink(each)))
        return sorted(found)

    with supervised() as server:
        before = files(server.child)
        os.kill(server.child, signal.SIGKILL)
        ready_again(server)  # and listens a moment later
        until(lambda: files(server.child) == before, "the same files")


# --- signals ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_parent_drains_the_child(number: int) -> None:
    with supervised() as server:
        client = Client(server.url)
        answers: list[str] = []
        asks = threading.Thread(
            target=lambda: answers.append(client.ask("slow slowly").outcome)
        )
        asks.start()
        asks.join(kit.DEADLINE_S)
        child = server.child
        assert server.stop(number) == 0
        server.wait_for_log(" draining ")
        server.wait_for_log(" stopped after=drained")
        assert answers == ["right"]
        assert not is_alive(child)


def holding(server: kit.Server, word: str) -> threading.Thread:
    """A client whose input keeps a worker busy; returns when it does."""
    asks = threading.Thread(target=Client(server.url).ask, args=(word,))
    asks.start()
    busy = 'embellama_workers{state="busy"} 1'
    until(lambda: busy in metrics(server.url), "a busy worker")
    return asks


@pytest.mark.parametrize("word", ["stall", "deaf"])
def test_a_second_signal_ends_it_at_once(word: str) -> None:
    with supervised("--drain-timeout-s", "3600") as server:
        asks = holding(server, word)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log(" draining ")
        assert server.stop() == 0
        server.wait_for_log("stopped with work unfinished")
        asks.join(kit.DEADLINE_S)


def test_ctrl_c_to_the_whole_group_is_one_signal_not_two() -> None:
    with supervised() as server:
        asks = holding(server, "slow " + "slow " * 3)
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.process.wait(kit.DEADLINE_S) == 0
        asks.join(kit.DEADLINE_S)
        server.wait_for_log(" stopped after=drained")  # after=stop: the second one


def test_a_hangup_reaches_the_child(shared: kit.Server) -> None:
    child = shared.child
    shared.process.send_signal(signal.SIGHUP)
    shared.wait_for_log(" reloaded ")
    assert shared.child == child


def test_a_child_that_was_told_to_stop_itself_ends_both() -> None:
    with supervised() as server:
        os.kill(server.child, signal.SIGTERM)
        assert server.process.wait(kit.DEADLINE_S) == 0
        assert not [line for line in server.log if "has died" in line]


def test_a_child_whose_parent_was_killed_ends() -> None:
    with supervised() as server:
        child = server.child
        assert Client(server.url).ask("a").outcome == "right"  # READY=1 is read by now
        server.process.kill()
        server.wait_for_log("the parent is gone")
        until(lambda: not is_alive(child), "the child's end")


@pytest.mark.slow
def test_a_child_whose_parent_was_killed_before_it_read_all_ends_too() -> None:
    with supervised() as server:
        child = server.child
        server.process.send_signal(signal.SIGSTOP)
        # Its socket holds heartbeats that nobody reads: then the child's is reset.
        elapse(2.5)
        server.process.kill()
        signs = ("the parent is gone", "Traceback")
        until(lambda: any(sign in line for line in server.log for sign in signs), "it")
        assert not [line for line in server.log if "Traceback" in line]
        until(lambda: not is_alive(child), "the child's end")


# --- a child that dies ---


REAL_TIME = 40  # has no name


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, REAL_TIME])
def test_a_child_that_is_killed_is_replaced(shared: kit.Server, number: int) -> None:
    times = sum(" ready " in line for line in shared.log)
    before = shared.child
    os.kill(before, number)
    ready_again(shared, times + 1)
    assert shared.child not in (0, before)
    said = shared.wait_for_log("the server has died", times)
    assert 'how="killed by ' in said
    assert Client(shared.url).ask("a").outcome == "right"


def test_who_connects_between_two_children_waits_and_is_served() -> None:
    with supervised() as server:
        host, port = server.url.removeprefix("http://").rsplit(":", 1)
        os.kill(server.child, signal.SIGKILL)
        server.wait_for_log("the server has died")
        with socket.create_connection((host, int(port)), kit.DEADLINE_S) as waits:
            waits.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert waits.recv(64).startswith(b"HTTP/1.1 200 ")


def successors_that_cannot_load(tmp_path: Path) -> tuple[str, list[str]]:
    """A client comes after a crash, while the model cannot be loaded for some time:
    what it got in the end, and what systemd was told."""
    config, good = tmp_path / "config.toml", kit.fake_gguf(tmp_path)
    bad = good.with_name("refuse.gguf")
    bad.write_bytes(good.read_bytes())
    config.write_text(f'model_path = "{good}"\n')
    systemd = FakeSystemd(str(tmp_path / "notify"))
    environment = {"NOTIFY_SOCKET": systemd.address}
    module = ("-m", "tests.kit", "supervised")
    with (
        contextlib.closing(systemd),
        kit.started(
            "--config", str(config), module=module, environment=environment
        ) as server,
    ):
        systemd.told("READY")
        config.write_text(f'model_path = "{bad}"\n')
        os.kill(server.child, signal.SIGKILL)
        server.wait_for_log("the server has died")
        answers: list[str] = []
        client = Client(server.url)
        asks = threading.Thread(target=lambda: answers.append(client.ask("a").outcome))
        asks.start()
        server.wait_for_log("the server has died", 3)
        assert not answers
        config.write_text(f'model_path = "{good}"\n')
        systemd.told("READY", 2)
        asks.join(kit.DEADLINE_S)
        said = systemd.names()
        assert server.stop() == 0
        return answers[0], said


@pytest.mark.slow
def test_successors_that_cannot_load_keep_clients_waiting(tmp_path: Path) -> None:
    assert successors_that_cannot_load(tmp_path)[0] == "right"


@pytest.mark.slow
def test_successors_that_cannot_load_are_no_stop(tmp_path: Path) -> None:
    assert set(successors_that_cannot_load(tmp_path)[1]) == {"READY"}


@pytest.mark.heavy
def test_the_pauses_between_children_grow() -> None:
    def second(line: str) -> float:
        return datetime.datetime.fromisoformat(line.split()[0]).timestamp()

    first = " listening url=http://127."  # and one more for each other address
    with supervised() as server:
        for times in range(2, 7):
            os.kill(server.child, signal.SIGKILL)
            server.wait_for_log(first, times)
        died = [second(line) for line in server.log if "has died" in line]
        back = [second(line) for line in server.log if first in line][1:]
    pauses = [up - down for down, up in zip(died, back, strict=True)]
    for pause, least in zip(pauses, (0.1, 0.2, 0.4, 0.8, 1.6), strict=True):
        assert least <= pause < least + 3


@pytest.mark.slow
def test_a_stop_between_two_children_ends_the_parent_with_0() -> None:
    with supervised() as server:
        for times in (2, 3, 4):  # until the pause is long enough to hit it
            os.kill(server.child, signal.SIGKILL)
            ready_again(server, times)
        os.kill(server.child, signal.SIGKILL)
        server.wait_for_log("the server has died", 4)
        assert server.stop() == 0


REFUSED = """
import os, socket, sys
import embellama_server as es
which = socket if sys.argv[1] == "socketpair" else os
real, left = getattr(which, sys.argv[1]), 3
def limited(*given, **named):
    global left
    left -= 1
    if left >= 0:
        raise OSError(11, "Resource temporarily unavailable")
    return real(*given, **named)
setattr(which, sys.argv[1], limited)
files = len(os.listdir("/proc/self/fd"))
command = ["/bin/sh", "-c", "exit 7"]
parent = es.Parent(command, listeners=0, uds="", settings="20 10 text")
code = parent.run()
assert len(os.listdir("/proc/self/fd")) <= files + 2, "the pipe of signals, no more"
sys.exit(code)
"""


@pytest.mark.parametrize("call", ["posix_spawn", "socketpair"])
def test_a_limit_of_processes_or_files_is_a_sentence_and_the_parent_tries_again(
    call: str,
) -> None:
    begun = time.monotonic()
    command = [sys.executable, "-c", REFUSED, call]
    ended = subprocess.run(
        command,
        check=False,
        cwd=kit.ROOT,
        capture_output=True,
        text=True,
        timeout=kit.DEADLINE_S,
    )
    assert ended.returncode == 7, ended.stderr
    assert time.monotonic() - begun > 0.7, "with pauses that grow"
    lines = ended.stderr.splitlines()
    assert len(lines) == 3, "and nothing but these sentences"
    for line in lines:
        assert "no process for the server now" in line
        assert "Resource temporarily unavailable: trying again" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_a_child_starts_is_not_its_death(number: int) -> None:
    with supervised() as server:
        before = server.child
        os.kill(before, signal.SIGKILL)
        until(lambda: server.child not in (0, before), "the next child")
        server.process.send_signal(number)
        if number == signal.SIGHUP:
            ready_again(server)
            server.wait_for_log(" reloaded ")  # it waited for the child's handler
            assert len([line for line in server.log if "has died" in line]) == 1
            number = signal.SIGTERM
        assert server.stop(number) == 0


@pytest.mark.slow
def test_a_second_signal_ends_a_child_that_hangs_as_well() -> None:
    with supervised() as server:
        os.kill(server.child, signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        elapse(0.5)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(es.Parent.AT_ONCE_S + 5)


def test_a_child_that_stops_at_once_is_given_longer_than_it_may_wait() -> None:
    # For last answers, for a load, for native calls to return, and for the last spans.
    assert es.Parent.AT_ONCE_S >= 2 * (4 * es._LEAVE_S)


# --- a child that never was ready ---


def test_a_model_that_is_no_use_is_exit_1_one_sentence_and_no_loop() -> None:
    with supervised(model="refuse.gguf", wait_ready=False) as server:
        assert server.process.wait(kit.DEADLINE_S) == 1
    said = [line for line in server.log if line.startswith("embellama_server: ")]
    assert len(said) == 1
    assert "refused" in said[0]
    heard = [line for line in server.log if " listening url=http://127.0.0.1" in line]
    assert len(heard) == 1


def test_the_exit_code_of_a_child_that_was_never_ready_is_passed_on() -> None:
    with supervised(model="exit.gguf", wait_ready=False) as server:
        assert server.process.wait(kit.DEADLINE_S) == 3
    assert not [line for line in server.log if "has died" in line]


def test_a_model_that_crashes_is_tried_three_times_and_then_one_sentence() -> None:
    with supervised(model="crash.gguf", wait_ready=False) as server:
        assert server.process.wait(kit.DEADLINE_S) == 1
    assert len([line for line in server.log if "has died; starting" in line]) == 2
    said = [line for line in server.log if line.startswith("embellama_server: ")]
    assert len(said) == 1
    assert "3 times" in said[0]
    assert "SIGSEGV" in said[0]


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (signal.SIGSYS, "a system call filter forbids what numpy or llama.cpp need"),
        (signal.SIGILL, "built for another CPU"),
        (signal.SIGKILL, "memory is too small"),
        (signal.SIGSEGV, "the model file may be damaged"),
        (REAL_TIME, "the model file may be damaged"),
    ],
)
def test_what_kills_a_child_that_starts_is_said_in_words(
    capfd: pytest.CaptureFixture[str], number: int, why: str
) -> None:
    parent = parent_of(kit.settings())
    with child_of(parent) as (child, _):
        tries = range(parent.MAX_FIRST_CRASHES)
        verdicts = [parent._exit_code(child, number) for _ in tries]
    assert verdicts == [None, None, 1]
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("embellama_server: ")
    assert why in said


# --- a child that hangs ---


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "gil"])
def test_a_silent_child_is_replaced_soon(how: str) -> None:
    watchdog_s = 2.0
    with supervised("--watchdog-s", str(watchdog_s)) as server:
        before = server.child
        asks = threading.Thread(target=Client(server.url).ask, args=("gil",))
        begun = time.monotonic()
        if how == "stopped":
            os.kill(before, signal.SIGSTOP)
        else:
            asks.start()
        server.wait_for_log("the server has died")
        assert time.monotonic() - begun < watchdog_s + 3
        server.wait_for_log("no heartbeat")
        ready_again(server)
        assert sum("no heartbeat" in line for line in server.log) == 1
        assert Client(server.url).ask("a").outcome == "right"
        if how == "gil":
            asks.join(kit.DEADLINE_S)
            server.wait_for_log("Fatal Python error: Aborted")  # and where


@pytest.mark.slow
def test_a_child_that_is_idle_and_well_is_left_alone() -> None:
    with supervised("--watchdog-s", "2") as server:  # the shortest there is
        child = server.child
        elapse(6)
        assert not [line for line in server.log if "no heartbeat" in line]
        assert server.child == child


# --- unix sockets ---


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("how", ["killed", "replaced"])
def test_a_unix_socket_survives_its_child_and_goes_with_the_parent(
    tmp_path: Path, how: str, loop: str
) -> None:
    path = tmp_path / "socket"

    def answer() -> bytes:
        with socket.socket(socket.AF_UNIX) as made:
            made.settimeout(kit.DEADLINE_S)
            made.connect(str(path))
            made.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return made.recv(64)

    environment = {}
    if loop == "asyncio":  # which removes the socket's file where it can
        (tmp_path / "uvloop.py").write_text("raise ImportError('hidden')\n")
        environment["PYTHONPATH"] = str(tmp_path)
    flags = ("--uds", str(path), "--drain-timeout-s", "0")
    with supervised(*flags, environment=environment) as server:
        assert answer().startswith(b"HTTP/1.1 200 ")
        if how == "killed":
            os.kill(server.child, signal.SIGKILL)
            ready_again(server)
        else:
            replaced(server)
        assert answer().startswith(b"HTTP/1.1 200 ")
        assert server.stop() == 0
    assert not path.exists()


# --- what is logged ---


def test_the_parent_logs_in_the_shape_of_the_child() -> None:
    with supervised("--log-format", "json", wait_ready=False) as server:
        server.wait_for_log('"event": "ready"')
        os.kill(server.child, signal.SIGKILL)
        server.wait_for_log('"event": "ready"', 2)
        died = json.loads(server.wait_for_log("has died"))
        assert (died["level"], died["how"]) == ("error", "killed by SIGKILL")
        assert server.stop() == 0
        assert all(set(json.loads(line)) > {"time", "event"} for line in server.log)


# --- what it goes by ---


def parent_of(chosen: es.Settings) -> es.Parent:
    """A parent as become_parent() starts it with these settings."""
    told = es.parent_settings(chosen)
    return es.Parent(["command"], listeners=1, uds="", settings=told)


@contextlib.contextmanager
def child_of(parent: es.Parent) -> Iterator[tuple[es.Child, socket.socket]]:
    """A child that is not there, and its end of the channel."""
    kept: list[int] = []

    def spawn(
        *_: object, file_actions: list[tuple[int, int, int]], **__: object
    ) -> int:
        kept.append(os.dup(file_actions[0][1]))
        return 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_spawn", spawn)
        patch.setattr(es.Child, "signal", lambda *_: None)
        child = parent._child = es.Child(["command"], {}, 3)
        with socket.socket(fileno=kept[0]) as theirs:
            yield child, theirs
    child.messages()
    assert child.fileno() == -1, "its end closes ours"


@pytest.mark.parametrize(
    "changes",
    [
        {"drain_timeout_s": 120.0},
        {"drain_grace_s": 60.0},
        {"drain_timeout_s": 0.0},
        {"watchdog_s": 300.0},  # that takes a restart: which may be that of the child
        {"log_format": "json"},
        {"json_output": True},
    ],
    ids=str,
)
def test_the_parent_goes_by_what_its_child_goes_by_now(
    capsys: pytest.CaptureFixture[str], changes: dict[str, object]
) -> None:
    before, now = kit.settings(drain_timeout_s=5.0), kit.settings(**changes)
    parent = parent_of(before)
    with child_of(parent) as (child, theirs):
        es.Notifier(theirs, {}).beat(now)
        # At the same moment: what the child has told counts.
        begun = time.monotonic()
        os.write(parent._wakeup, bytes([signal.SIGTERM]))
        parent._wait(0)
    stop_s = now.drain_grace_s + now.drain_timeout_s + 10
    assert stop_s <= child.kill_at - begun < stop_s + 5
    assert parent._watchdog_s == now.watchdog_s
    parent._log("error", "event")
    is_json = capsys.readouterr().err.startswith("{")
    assert is_json == (es.log_shape(now) == "json")


@pytest.mark.parametrize("more", ["", "\nPARENT=1", "\nPARENT=1 2 text 4"])
def test_a_child_of_another_version_of_the_file_has_handlers_too(more: str) -> None:
    parent = parent_of(kit.settings())
    with child_of(parent) as (child, theirs):
        theirs.send(f"WATCHDOG=1{more}\n\n".encode())
        parent._read_messages(child)
    assert child.has_handlers
    assert parent._watchdog_s == kit.settings().watchdog_s


def test_a_child_that_has_said_nothing_yet_may_be_silent_for_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[int] = []
    parent = parent_of(kit.settings(watchdog_s=2.0))
    with child_of(parent) as (child, theirs):
        monkeypatch.setattr(child, "signal", sent.append)
        child.heard_at -= 10
        parent._end_if_overdue(child)
        assert sent == [], "it may still import its libraries"
        theirs.send(b"WATCHDOG=1\n\n")
        parent._read_messages(child)
        child.heard_at -= 10
        parent._end_if_overdue(child)
        assert sent == [signal.SIGABRT]


# --- systemd ---


class FakeSystemd:
    """What would be systemd's end of $NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.messages: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(
            address.replace("@", "\0", 1) if address[0] == "@" else address
        )
        self._came = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def close(self) -> None:
        """No more is read."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.sendto(b"END=1", self._socket.getsockname())
        self._reader.join(kit.DEADLINE_S)
        self._socket.close()

    def _read(self) -> None:
        while (data := self._socket.recv(4096)) != b"END=1":
            lines = data.decode().splitlines()
            with self._came:
                self.messages.append(dict(line.split("=", 1) for line in lines))
                self._came.notify_all()

    def told(self, name: str, times: int = 1) -> dict[str, str]:
        """The first message with this name, or the so manieth, when it has come."""

        def found() -> list[dict[str, str]]:
            return [message for message in self.messages if name in message]

        with self._came:
            came = self._came.wait_for(lambda: len(found()) >= times, kit.DEADLINE_S)
        assert came, f"no {name} in {self.messages}"
        return found()[times - 1]

    def names(self) -> list[str]:
        """All that changes systemd's mind, in order."""
        order = [name for message in self.messages for name in message]
        return [n for n in order if n not in ("WATCHDOG", "MONOTONIC_USEC", "STATUS")]

    @property
    def statuses(self) -> list[str]:
        """What `systemctl status` shows, one after another."""
        return [one["STATUS"] for one in self.messages if "STATUS" in one]


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeSystemd]:
    abstract = f"@{tmp_path.name}-{os.getpid()}"
    is_path = request.param == "path"
    made = FakeSystemd(str(tmp_path / "notify") if is_path else abstract)
    yield made
    made.close()


def test_a_path_may_have_an_at_sign(tmp_path: Path) -> None:
    address = str(tmp_path / "user@1000")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(address)
        made.setblocking(False)
        es.Notifier(None, {"NOTIFY_SOCKET": address}).tell(READY=1)
        assert made.recv(64) == b"READY=1"


@pytest.mark.parametrize("dies", [False, True])
def test_a_child_that_was_told_to_stop_otherwise_is_not_started_again(
    systemd: FakeSystemd, *, dies: bool
) -> None:
    environment = {"NOTIFY_SOCKET": systemd.address}
    grace_s = "60" if dies else "0"
    with supervised("--drain-grace-s", grace_s, environment=environment) as server:
        client = both.Client(server.url, server.admin_fields())
        assert client.post("/admin/drain", {"stop": True}).status == 200
        client.close()
        systemd.told("STOPPING")
        if dies:
            assert server.child
            server.kill_child()
        assert server.process.wait(kit.DEADLINE_S) == (137 if dies else 0)
        assert "starting it again" not in "".join(server.log)


@pytest.mark.parametrize("flag", ["--supervise", "--no-supervise"])
def test_systemd_is_told_each_step(systemd: FakeSystemd, flag: str) -> None:
    environment = {"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "5000000"}
    with supervised(flag, environment=environment) as server:
        systemd.told("READY")
        systemd.told("WATCHDOG", 2)
        server.process.send_signal(signal.SIGHUP)
        systemd.told("READY", 2)
        assert server.stop() == 0
        systemd.told("STOPPING")
    assert systemd.names() == ["READY", "RELOADING", "READY", "STOPPING"]
    others = ("MONOTONIC_USEC", "STATUS")
    values = {v for m in systemd.messages for k, v in m.items() if k not in others}
    assert values == {"1"}


@pytest.mark.parametrize("flag", ["--supervise", "--no-supervise"])
def test_a_reload_and_its_time_are_one_message(tmp_path: Path, flag: str) -> None:
    # Type=notify-reload: systemd looks for both in the same datagram.
    systemd = FakeSystemd(str(tmp_path / "notify"))
    with contextlib.closing(systemd):
        environment = {"NOTIFY_SOCKET": systemd.address}
        with supervised(flag, environment=environment) as server:
            systemd.told("READY")
            before_us = time.monotonic_ns() // 1000
            server.process.send_signal(signal.SIGHUP)
            reloading = systemd.told("RELOADING")
            assert int(reloading["MONOTONIC_USEC"]) >= before_us


@pytest.mark.parametrize("how", ["killed", "replaced"])
def test_systemd_is_not_told_of_a_stop_when_a_child_is_replaced(
    tmp_path: Path, how: str
) -> None:
    systemd = FakeSystemd(str(tmp_path / "notify"))
    with contextlib.closing(systemd):
        environment = {"NOTIFY_SOCKET": systemd.address}
        with supervised("--drain-timeout-s", "0", environment=environment) as server:
            systemd.told("READY")
            if how == "killed":
                os.kill(server.child, signal.SIGKILL)
            else:
                replaced(server)
            systemd.told("READY", 2)
            assert systemd.names() == ["READY", "READY"]
            first, died, last = systemd.statuses
            assert died.startswith("the server died")
            assert (first, last) == ("ready", "ready"), "what is over is not shown"


def test_no_model_s_name_tells_systemd_anything(
    systemd: FakeSystemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es.Notifier, "LOADING_EVERY_S", 0.0)
    notifier = es.Notifier(None, {"NOTIFY_SOCKET": systemd.address})
    notifier.loading(["a\nMAINPID=1@1", "\u00e9@2"])
    assert systemd.told("STATUS").keys() == {"EXTEND_TIMEOUT_USEC", "STATUS"}
    assert systemd.statuses == ["loading a?MAINPID=1@1, ?@2, 0 s"]


@pytest.mark.slow
@pytest.mark.parametrize("parent", [(), ("supervised",)], ids=["alone", "supervised"])
def test_systemd_is_asked_for_more_time_while_a_model_loads(
    tmp_path: Path, parent: tuple[str, ...]
) -> None:
    systemd = FakeSystemd(str(tmp_path / "notify"))
    environment = {"NOTIFY_SOCKET": systemd.address, slow.LOAD_S: "3"}
    flags = slow.model(tmp_path, "embedder")
    module = (*slow.MODULE, *parent)
    with (
        contextlib.closing(systemd),
        kit.started(*flags, module=module, environment=environment) as server,
    ):
        systemd.told("READY")
        assert server.stop() == 0
    asked = [one for one in systemd.messages if "EXTEND_TIMEOUT_USEC" in one]
    assert {one["EXTEND_TIMEOUT_USEC"] for one in asked} == {"30000000"}
    assert re.fullmatch(r"loading embedder@1, [1-3] s", asked[0]["STATUS"])
    assert len(asked) >= 2, "before the time that was asked for is over"
    assert systemd.statuses[-1] == "ready"


@pytest.mark.slow
def test_a_systemd_that_does_not_read_keeps_nobody_waiting(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out,
    ):
        deaf.bind(address)
        out.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                out.sendto(b"full", address)
        with supervised(environment={"NOTIFY_SOCKET": address}) as server:
            assert Client(server.url).ask("a").outcome == "right"
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(5) == 0


def test_nobody_else_is_told_of_systemd(tmp_path: Path) -> None:
    environment = {
        "NOTIFY_SOCKET": str(tmp_path / "nobody"),
        "WATCHDOG_USEC": "5000000",
        "WATCHDOG_PID": "1",
    }
    with supervised(environment=environment) as server:
        seen = Path(f"/proc/{server.child}/environ").read_bytes().split(b"\0")
        names = {line.partition(b"=")[0].decode() for line in seen}
        assert not names & set(environment)
        assert server.stop() == 0


def test_a_parent_that_cannot_be_started_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "execv", refused)
    with pytest.raises(es.StartupError, match="Permission denied; --no-supervise does"):
        es.become_parent((), ("x",), None, kit.settings(), "")
