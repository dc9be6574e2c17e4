"""Room JOBS and `embed` on the command line: what it is told, and how far it is."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embellama_server as es
from tests import both, kit

TEXTS = [f"words {n % 50} and {n}" for n in range(300)]


@dataclass
class Desk:
    """`embed` in this process, with the fake engine."""

    root: Path
    capsys: pytest.CaptureFixture[str]
    engine: type[kit.FakeEngine] = kit.FakeEngine
    out: str = ""
    err: str = ""

    def embed(self, *flags: object) -> int:
        """The exit code; sets out and err."""
        given = ["embed", *map(str, flags), "--cache-dir", str(self.root / "cache")]
        given += ["--batch-tokens", "64"]  # a fake context has no more
        if "--url" not in flags:
            given += ["--model-path", str(self.model)]
        try:
            code = es.main(given, engine_factory=self.engine)
        except SystemExit as end:
            code = int(str(end.code))
        self.out, self.err = self.capsys.readouterr()
        return code

    @property
    def model(self) -> Path:
        """A file that the fake engine serves."""
        path = self.root / "fake.gguf"
        path.write_bytes(es.GGUF_MAGIC)
        return path

    def put(self, name: str, text: str) -> Path:
        """A file."""
        path = self.root / name
        path.write_text(text)
        return path

    def array(self, name: str = "v.npy") -> Any:
        """The vectors that were written."""
        return np.load(self.root / name)


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, capsys)


def vectors(texts: list[str], around: str = "{text}") -> Any:
    """The fake engine's, as a server gives them."""
    words = [around.replace("{text}", text).split() for text in texts]
    ids = [[1, *map(kit.fake_id, row), 2] for row in words]
    return np.array([kit.fake_vector(row) for row in ids], "f4")


def test_files_become_vectors(desk: Desk) -> None:
    file = desk.put("a.txt", "\n".join(TEXTS))
    assert desk.embed(file, "--output", desk.root / "v.npy", "--json") == 0
    assert np.allclose(desk.array(), vectors(TEXTS), atol=1e-6)
    told = json.loads(desk.out)
    assert (told["rows"], told["rejected"]) == (300, 0)
    assert desk.embed("--output", desk.root / "v.npy", file) == 2, "it is there already"
    assert "--restart replaces it" in desk.err
    assert (
        desk.embed("--quiet", "--output", desk.root / "v.npy", "--restart", file) == 0
    )
    assert (desk.out, desk.err) == ("", "")


def test_the_model_s_options_are_the_server_s(desk: Desk) -> None:
    file = desk.put("a.txt", "a\n" + "word " * 99)
    to = ("--output", desk.root / "v.npy")
    assert desk.embed(file, *to, "--prompt", "q=find ", "--prompt-name", "q") == 1
    assert "line 2 (byte 2)" in desk.err
    assert "tokens" in desk.err and "--on-error skip" in desk.err
    given = ("--prompt", "q=find ", "--prompt-name", "q", "--truncate", "--restart")
    assert (
        desk.embed(file, *to, *given, "--dimensions", 4, "--output-dtype", "int8") == 0
    )
    whole = vectors(["a"], "find {text}")[0]
    expected = np.round(es.normalised(whole[:4]) * 127)
    assert np.array_equal(desk.array()[0], expected)


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (["--prompt-name", "none"], 2, "prompt_name 'none' is not known"),
        (["--dimensions", "9"], 2, "dimensions must be 1 to 8"),
        (["--dimensions", "x"], 2, "invalid int value"),
        (["--output-dtype", "f8"], 2, "invalid choice"),
        (["--on-error", "go"], 2, "invalid choice"),
        (["--port", "x"], 2, "port"),
        (["--model-path", "none.gguf"], 2, "none.gguf"),
        (["--output", "v.txt"], 2, "must end in one of"),
        (["none.txt"], 3, "cannot read none.txt"),
        (["--url", "x:/"], 2, "is not like http://"),
    ],
    ids=str,
)
def test_what_is_wrong_is_a_sentence_and_an_exit_code(
    desk: Desk, flags: list[str], code: int, told: str
) -> None:
    file = [] if "none.txt" in flags else [desk.put("a.txt", "a\n")]
    assert desk.embed(*file, "--output", desk.root / "v.npy", *flags) == code
    assert told in desk.err
    assert "Traceback" not in desk.err


def test_rejected_rows_are_exit_1(desk: Desk) -> None:
    file = desk.put("a.txt", f"a\n{kit.NAN_WORD}\nb\n")
    for on_error, rows in (("skip", 2), ("null", 3)):
        to = desk.root / f"{on_error}.npy"
        assert desk.embed(file, "--output", to, "--on-error", on_error) == 1
        assert len(np.load(to)) == rows


def test_nothing_but_bad_rows_in_a_window_is_no_trouble(desk: Desk) -> None:
    file = desk.put("a.txt", "\n" * 2500 + "a\n")
    to = ("--output", desk.root / "v.npy", "--on-error", "skip")
    assert desk.embed(file, *to) == 1
    assert np.allclose(desk.array(), vectors(["a"]), atol=1e-6)


def test_a_batch_file_s_tokens_are_those_of_each_request(desk: Desk) -> None:
    given: list[str | list[str]] = ["a", ["a b", "c"], "a", "a b"]
    file = desk.put(
        "a.jsonl",
        "\n".join(
            json.dumps(
                {"custom_id": str(n), "url": "/v1/embeddings", "body": {"input": i}}
            )
            for n, i in enumerate(given)
        ),
    )
    assert desk.embed(file, "--output", desk.root / "v.jsonl") == 0
    lines = (desk.root / "v.jsonl").read_bytes().splitlines()
    bodies = [json.loads(line)["response"]["body"] for line in lines]
    # With a token before each text and one after it.
    assert [body["usage"]["total_tokens"] for body in bodies] == [3, 7, 3, 4]
    again = np.array([row["embedding"] for row in bodies[1]["data"]])
    assert np.allclose(again, vectors(["a b", "c"]), atol=1e-6)


BAD_INPUTS: list[Any] = ["", " ", [], [""], ["a", ""], 7, None, {}, [7], [[1, 2]]]
BODIES: list[Any] = [
    {"input": "a"},
    {"input": ["b c", "d", "b c"]},
    {"input": "a", "dimensions": 4},
    {"input": ["a", "b"], "encoding_format": "base64"},
    {"input": "a", "output_dtype": "int8"},
    {"input": "a", "output_dtype": "ubinary", "encoding_format": "base64"},
    {"input": "a", "user": "somebody", "unknown": 1, "priority": "low"},
    {"input": "a", "dimensions": None, "encoding_format": None},
    {"input": "a\0b"},
    *({"input": bad} for bad in BAD_INPUTS),
    *({"input": "a", "dimensions": bad} for bad in (0, -1, 9, "x")),
    *({"input": "a", "encoding_format": bad} for bad in ("hex", 7)),
    *({"input": "a", "output_dtype": bad} for bad in ("float8", 7)),
    {"input": kit.NAN_WORD},
    {"input": ["a", kit.NAN_WORD]},
    {"input": "word " * 99},
    {"inputs": "a"},
    {},
    [],
    "x",
    None,
]


async def test_a_batch_file_is_answered_as_the_route_answers_each_request(
    desk: Desk,
) -> None:
    lines = [
        {"custom_id": f"r{n}", "method": "POST", "url": "/v1/embeddings", "body": body}
        for n, body in enumerate(BODIES)
    ]
    file = desk.put("a.jsonl", "\n".join(map(json.dumps, lines)))
    given = (file, "--output", desk.root / "v.jsonl", "--on-error", "skip")
    assert await asyncio.to_thread(desk.embed, *given) == 1
    replies: dict[str, Any] = {}
    for name in ("v.jsonl", "v.jsonl.errors.jsonl"):
        found = map(json.loads, (desk.root / name).read_bytes().splitlines())
        replies |= {line["custom_id"]: line["response"] for line in found}
    assert len(replies) == len(BODIES)
    async with kit.running_service(batch_tokens=64) as running:
        for line in lines:
            ours, body = replies[str(line["custom_id"])], line["body"]
            theirs = await running.ask("POST", "/v1/embeddings", body)
            assert ours["status_code"] == theirs.status, body
            if theirs.status != 200:
                error = ours["body"]["error"]
                assert error.keys() == theirs.error.keys() and error["message"]
                assert error["type"] == theirs.error["type"], body
                continue
            # The model is called as the request calls it, for who looks for that.
            assert ours["body"] == theirs.json | {"model": body.get("model")}, body


def test_a_pipe_is_read_and_written(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = io.TextIOWrapper(io.BytesIO(b'{"text": "a", "id": "x"}\n"b"'))
    monkeypatch.setattr(sys, "stdin", given)
    assert desk.embed("-", "--output", "-") == 0
    lines = [json.loads(line) for line in desk.out.splitlines()]
    assert [line["id"] for line in lines] == ["x", 1]
    found = np.array([line["embedding"] for line in lines])
    assert np.allclose(found, vectors(["a", "b"]), atol=1e-6)
    assert "it begins anew" in desk.err


def test_of_a_pipe_s_rows_the_bad_ones_and_the_summary_are_told_beside_it(
    desk: Desk,
) -> None:
    file = desk.put("a.txt", f"a\n\n{kit.NAN_WORD}\nb\n")
    given = ("--output", "-", "--on-error", "skip", "--json", "--quiet")
    assert desk.embed(file, *given) == 1
    assert [json.loads(line)["id"] for line in desk.out.splitlines()] == [0, 3]
    *bad, summary = map(json.loads, desk.err.splitlines())
    assert [(row["line"], row["reason"][:24]) for row in bad] == [
        (2, "its text is empty"),
        (3, "its text got no finite v"),
    ]
    assert (summary["rows"], summary["rejected"]) == (4, 2)


class Narrow(io.RawIOBase):
    """Takes a few bytes at a time, as a pipe may; later nothing."""

    def __init__(self, room: int = sys.maxsize) -> None:
        super().__init__()
        self.taken, self.room = b"", room

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        part = bytes(data[: min(7, self.room)])
        self.taken += part
        self.room -= len(part)
        return len(part)


def test_without_a_buffer_all_is_written_too(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Python's own standard output is with PYTHONUNBUFFERED.
    file, narrow = desk.put("a.txt", "a\nb\n"), Narrow()
    out: Any = io.TextIOWrapper(narrow, write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    assert desk.embed(file, "--output", "-") == 0
    lines = [json.loads(line) for line in narrow.taken.splitlines()]
    found = np.array([line["embedding"] for line in lines])
    assert np.allclose(found, vectors(["a", "b"]), atol=1e-6)
    narrow.room = 50
    assert desk.embed(file, "--output", "-") == 3
    assert "cannot write -: No space left on device" in desk.err


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "end", [interrupted, lambda: signal.raise_signal(signal.SIGTERM)]
)
def test_an_interrupt_is_130_and_tells_what_goes_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, end: Callable[[], None]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(es, "WINDOW_ROWS", 10)
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "e.py", "embed", "--restart", "a b"]
    )
    file, to = desk.put("a.txt", "\n".join(TEXTS)), desk.root / "v.npy"
    real, calls = es.Bulk._write, [0]

    def write(*given: Any) -> None:
        calls[0] += 1
        if calls[0] == 7:
            end()
        real(*given)

    monkeypatch.setattr(es.Bulk, "_write", write)
    assert desk.embed(file, "--output", to) == 130
    assert desk.err.endswith("interrupted; this goes on: python e.py embed 'a b'\n")
    assert desk.embed(file, "--output", to, "--json") == 0
    assert json.loads(desk.out)["resumed_at_row"] == 60
    assert np.allclose(desk.array(), vectors(TEXTS), atol=1e-6)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("is_joined", [False, True])
def test_the_command_that_goes_on_is_shown_without_its_key(
    monkeypatch: pytest.MonkeyPatch, is_joined: bool
) -> None:
    key = ["--api-key=canary"] if is_joined else ["--api-key", "canary"]
    monkeypatch.setattr(sys, "orig_argv", ["e.py", "embed", *key, "a.txt", "--restart"])
    expected = "--api-key=..." if is_joined else "--api-key ..."
    assert es.command_again(has_begun=True) == f"e.py embed {expected} a.txt"
    again = f"e.py embed {expected} a.txt --restart"
    assert es.command_again(has_begun=False) == again


def test_a_run_that_is_interrupted_before_it_begins_anew_says_what_does(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (desk.put("a.txt", "a\n"), "--output", desk.root / "v.npy")
    assert desk.embed(*given) == 0
    monkeypatch.setattr(sys, "orig_argv", ["e.py", "embed", "--restart"])

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(es.Bulk, "_write", interrupted)
        assert desk.embed(*given, "--restart") == 130
    assert desk.err.endswith("this goes on: e.py embed --restart\n")
    assert desk.embed(*given, "--restart") == 0


def test_a_run_that_began_anew_goes_on_without_that_flag(desk: Desk) -> None:
    file = desk.put("a.txt", f"a\n{kit.NAN_WORD}\n")
    given = (file, "--output", desk.root / "v.npy")
    for flags in ((), ("--restart",)):
        assert desk.embed(*given, *flags) == 1
        assert (
            ". Mended, the same command goes on (without --restart once OUTPUT.state is there);"
            in desk.err
        )


def test_a_server_is_asked_for_the_version_that_the_flags_say(desk: Desk) -> None:
    file, place = desk.put("a.txt", "a b\n"), desk.root / "m.gguf"
    place.write_bytes(both.sound_gguf())
    models = [f"--model-path=m@{version}={place}" for version in (1, 2)]
    with kit.started(*models) as server:
        usual = (file, "--url", server.url, "--model-version")
        for version in ("1", "2"):
            to = desk.root / f"{version}.npy"
            flags = (version, "--model-name", "m", "--output", to)
            assert desk.embed(*usual, *flags) == 0
            with urllib.request.urlopen(f"{server.url}/metrics") as reply:
                told = reply.read().decode()
            counted = rf'_model_requests_total\{{model="m@{version}"\}} [1-9]'
            assert re.search(counted, told)
        assert desk.embed(*usual, "1", "--output", desk.root / "v.npy") == 2
        assert "--model-version is of a model: say --model-name" in desk.err


# --- progress ---


class Terminal(io.StringIO):
    """A stream that says what it is."""

    def __init__(self, *, is_tty: bool) -> None:
        super().__init__()
        self.is_tty = is_tty

    def isatty(self) -> bool:
        return self.is_tty


@pytest.mark.parametrize(("is_tty", "most", "least"), [(True, 51, 45), (False, 1, 1)])
def test_a_terminal_is_written_to_five_times_a_second_a_file_each_ten(
    monkeypatch: pytest.MonkeyPatch, is_tty: bool, most: int, least: int
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = Terminal(is_tty=is_tty)
    line = es.ProgressLine(stream)
    progress = es.Progress(total_bytes=1000, begun_at=100.0)
    for step in range(1001):
        now[0] = 100 + step / 100
        progress.bytes_read, progress.rows = step // 2, step * 3
        line.show(progress)
    shown = stream.getvalue().replace("\r\x1b[K", "\n").strip("\n").split("\n")
    assert least <= len(shown) <= most
    assert shown[-1].startswith("50.0%, 3,000 rows, 300/s, 0:00:10 left") or is_tty
    line.end()
    assert stream.getvalue().endswith("\n")


def test_the_line_tells_what_there_is_to_tell() -> None:
    progress = es.Progress(
        rows=5, tokens=7, begun_at=time.monotonic() - 1, duplicates=1200, rejected=3
    )
    assert progress.line().endswith("1,200 duplicates, 3 rejected")
    assert " 7 tokens/s, " in progress.line()
    assert "left" not in progress.line(), "nobody knows how long a pipe is"


def test_what_other_runs_did_does_not_make_this_one_faster() -> None:
    begun = time.monotonic() - 10
    progress = es.Progress(100, 60, rows=600, first_row=500, begun_at=begun)
    # A sixth of 60 % in 10 s: 40 % take 40 s.
    assert "10/s, 0:00:40 left" in progress.line()


def test_loading_the_model_does_not_make_the_rows_slower(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(kit.FakeEngine):
        """An engine that takes an hour to load."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            now[0] += 3600

    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    desk.engine = Slow
    file = desk.put("a.txt", "a\nb\n")
    assert desk.embed(file, "--output", desk.root / "v.npy", "--json") == 0
    assert json.loads(desk.out)["seconds"] < 1


def test_a_link_stays_and_what_it_leads_to_is_written(desk: Desk) -> None:
    (disk := desk.root / "disk").mkdir()
    to = desk.root / "v.npy"
    to.symlink_to(disk / "real.npy")
    file = desk.put("a.txt", "a\n")
    assert desk.embed(file, "--output", to) == 0
    assert desk.embed(file, "--output", to) == 2
    assert "real.npy is there already: --restart replaces it" in desk.err
    file.write_text("b\nc\n")
    assert desk.embed(file, "--output", to, "--restart") == 0
    assert to.is_symlink() and {path.name for path in disk.iterdir()} == {
        "real.npy",
        "real.npy.ids.jsonl",
    }
    assert np.allclose(desk.array(), vectors(["b", "c"]), atol=1e-6)


def test_a_text_too_long_is_told_of_the_flag_that_cuts_it(desk: Desk) -> None:
    file, to = desk.put("a.txt", "a " * 1000), desk.root / "v.npy"
    assert desk.embed(file, "--output", to) == 1
    assert "shorten or split it, or give --truncate" in desk.err
    assert "--auto-truncate" not in desk.err
    assert desk.embed(file, "--output", to, "--truncate") == 0


# --- kill -9 ---

# Each run is a fork, so that Python starts once; ``moments`` say when it is killed, and
# the last run is left alone. Prints how many ended before that.
VICTIMS = textwrap.dedent(
    """
    import json, os, signal, sys, time
    import numpy.random
    import embellama_server as es
    from tests import kit
    es.SYNC_S, es.WINDOW_ROWS = 0.0, 10
    real = es.Bulk._write
    def slow(*given):
        real(*given)
        time.sleep(0.002)
    es.Bulk._write = slow
    moments, command = json.loads(sys.argv[1])
    ends = []
    for moment in [*moments, None]:
        victim = os.fork()
        if not victim:
            os._exit(es.main(command, engine_factory=kit.TouchyEngine))
        if moment is not None:
            time.sleep(moment)
            os.kill(victim, signal.SIGKILL)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1]))
    print(json.dumps(ends))
    """
)


@pytest.mark.parametrize(
    ("suffix", "kills"),
    [
        *(("npy", 10), ("jsonl", 5), ("sqlite", 5)),
        *(
            pytest.param(suffix, 60, marks=pytest.mark.heavy)
            for suffix in ("npy", "db")
        ),
    ],
)
def test_killed_at_any_moment_the_same_command_gives_the_same_bytes(
    desk: Desk, suffix: str, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "WINDOW_ROWS", 10)
    file = desk.put("a.txt", "\n".join([*TEXTS[:150], kit.NAN_WORD, *TEXTS[150:]]))
    flags = ("--on-error", "null", "--quiet", "--batch-tokens", "64", "--workers", "2")
    whole, to = desk.root / f"whole.{suffix}", desk.root / f"v.{suffix}"
    desk.engine = kit.TouchyEngine
    assert desk.embed(file, "--output", whole, *flags) == 1
    command = ["embed", file, "--output", to, *flags, "--model-path", desk.model]
    chance = random.Random(suffix)
    moments = [0.02 + 0.08 * chance.random() for _ in range(kills)]
    given = json.dumps([moments, [*map(str, command)]])
    ran = subprocess.run(
        [sys.executable, "-c", VICTIMS, given],
        cwd=kit.ROOT,
        capture_output=True,
        text=True,
        timeout=kit.DEADLINE_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    *killed, last = json.loads(ran.stdout.splitlines()[-1])
    assert last in (1, 2), ran.stderr  # 2: it had been finished before
    assert killed.count(-9) > 1  # the others had ended
    for path in desk.root.glob("whole*"):
        again = path.with_name(path.name.replace("whole", "v"))
        assert again.read_bytes() == path.read_bytes(), path.name
    left = {".part", ".state", ".new"}
    assert not [name for name in os.listdir(desk.root) if Path(name).suffix in left]
