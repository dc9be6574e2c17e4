"""Room LOADING: what could end the process is tried in another, and nothing is left over.

On the real llama.cpp, with the smallest models; how llama.cpp dies is played, not made.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import embellama_server as es
from tests import chat_models, kit, models
from tests.test_contexts import WIDE_LETTERS
from tests.test_engine import bert, llama, run_python
from tests.test_passes import add_wide

SCRIPT = str(kit.ROOT / "embellama_server.py")


class Bench:
    """A loader, and what it says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = models.tiny_bert(folder)
        self.stream = kit.WatchedLog()
        hooks = kit.hooks(es.Log("info", "text", self.stream))
        self.loader = es.Loader(str(folder / "cache"), es.Engine, hooks)
        self.loader.tries_first = True

    def settings(self, **changes: Any) -> es.Settings:
        cache_dir = str(self.folder / "cache")
        base = {"model_path": str(self.path), "cache_dir": cache_dir}
        return kit.settings(**(base | changes))

    def loads_and_frees(self, **changes: Any) -> None:
        assert self.loader.load(self.settings(**changes)).free()

    def refusal(self, **changes: Any) -> str:
        with pytest.raises(es.StartupError) as caught:
            self.loader.load(self.settings(**changes))
        return str(caught.value)

    def tries(self) -> int:
        return self.stream.getvalue().count(" tried model=")

    def mappings(self) -> int:
        maps = Path("/proc/self/maps").read_text().splitlines()
        return sum(line.endswith(str(self.path)) for line in maps)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# --- tried first ---


def test_what_has_loaded_well_is_tried_once(bench: Bench) -> None:
    bench.loads_and_frees()
    bench.loads_and_frees()
    assert bench.tries() == 1
    bench.loads_and_frees(workers=2)
    assert bench.tries() == 2, "it takes other threads and memory now"
    os.utime(bench.path)
    bench.loads_and_frees()
    assert bench.tries() == 3, "it may be another file"


def test_a_first_load_needs_no_trial_and_proves_as_much(bench: Bench) -> None:
    bench.loader.tries_first = False
    bench.loads_and_frees()
    bench.loader.tries_first = True
    bench.loads_and_frees()
    assert bench.tries() == 0


def test_a_trial_that_refuses_says_what_a_load_would(bench: Bench) -> None:
    said = bench.refusal(pooling="rank")
    assert said == f"{bench.path} has no classification head: it cannot rank"
    raw = bench.path.read_bytes()
    bench.path.write_bytes(raw[:-1])
    assert "ends beyond the end of the file" in bench.refusal()


ENDS = {
    "os.abort()": "killed by SIGABRT",
    "os.kill(os.getpid(), 11)": "killed by SIGSEGV",
    "os._exit(1)": "exit code 1",
    "os.kill(os.getpid(), signal.SIGALRM)": "it took longer than 600 s",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_trial_that_dies_is_a_sentence_and_nothing_is_loaded_here(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with monkeypatch.context() as patch:
        says = "x.c:1: GGML_ASSERT(n > 0) failed\\nand much more"
        code = f"import os, signal; os.write(2, b'{says}'); {how}"
        patch.setattr(es, "_TRIAL", code)
        assert bench.refusal() == (
            f"{bench.path} cannot be loaded: a process that tried it has died ({ENDS[how]}: "
            "x.c:1: GGML_ASSERT(n > 0) failed); the file may be damaged, too large, or not for this llama.cpp"
        )
    assert bench.mappings() == 0
    assert not bench.loader._proven


def test_no_process_to_try_it_in_is_a_sentence(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refused)
    says = "no process to try it in: Resource temporarily unavailable"
    assert bench.refusal() == f"{bench.path}: {says}"


def test_a_trial_ends_with_the_server(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_TRIAL", "import signal; signal.pause()")
    told: list[str] = []
    thread = threading.Thread(target=lambda: told.append(bench.refusal()))
    thread.start()
    end = time.monotonic() + kit.DEADLINE_S
    while bench.loader._trial._process is None:
        assert time.monotonic() < end
    bench.loader.cancel()
    thread.join(kit.DEADLINE_S)
    assert "killed by SIGKILL" in told[0]
    assert "killed by SIGKILL" in bench.refusal(), "and so does one that comes after"


def post(server: kit.Server, route: str, **body: object) -> tuple[int, str]:
    """As the administrator: status and body."""
    fields = {"content-type": "application/json", **server.admin_fields()}
    raw = json.dumps(body).encode()
    request = urllib.request.Request(server.url + route, raw, fields)
    try:
        with urllib.request.urlopen(request, timeout=kit.DEADLINE_S) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_server_outlives_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    path, other = models.tiny_bert(tmp_path), tmp_path / "other.gguf"
    shutil.copy(path, other)
    with kit.started("--model-path", str(path), module=(SCRIPT,)) as server:
        child = server.child
        other.write_bytes(path.read_bytes()[:-1])
        status, said = post(server, "/admin/models/load", path=str(other))
        assert status == 409
        assert "is not a valid GGUF file" in said
        shutil.copy(path, other)
        assert post(server, "/admin/models/load", path=str(other))[0] == 200
        server.wait_for_log(" tried model=other")
        assert post(server, "/v1/embeddings", model="other", input="a")[0] == 200
        assert server.child == child
        assert server.stop() == 0


def test_every_setting_survives_the_way_to_the_trial(bench: Bench) -> None:
    odd: dict[str, Any] = {
        "model_alias": ("a", "\udcff"),
        "prompt": ("query=a, {text}",),
        "stuck_after_s": 0.25,
        "model_path": str(bench.folder / "no\udcff.gguf"),
    }
    with pytest.raises(es.StartupError, match="cannot be read: No such file"):
        bench.loader._trial.run(kit.settings(**odd))


# --- nothing is left over ---


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many engines there are."""
    alive: weakref.WeakSet[es.Engine] = weakref.WeakSet()
    whole = es.Engine.__init__

    def noted(engine: es.Engine, *rest: Any) -> None:
        alive.add(engine)
        whole(engine, *rest)

    monkeypatch.setattr(es.Engine, "__init__", noted)

    def count() -> int:
        gc.collect()
        return len(alive)

    yield count


def test_loads_that_fail_and_rounds_of_loading_leave_nothing_behind(
    bench: Bench, engines: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, threads = bench.loader.load, set(threading.enumerate())
    files = len(os.listdir("/proc/self/fd"))

    def fails(*_: object, **__: object) -> None:
        raise es.StartupError("no room")

    problems: tuple[tuple[dict[str, Any], tuple[object, str] | None], ...] = (
        ({"pooling": "rank"}, None),
        ({"context_size": 4096}, None),
        ({"default_prompt_name": "none"}, None),
        ({}, (es.Engine, "new_context")),
        ({}, (es.Context, "make_room")),
        ({}, (es, "start_thread")),
    )
    for _ in range(2):
        for changes, place in problems:
            with monkeypatch.context() as patch, pytest.raises(es.StartupError):
                if place:
                    patch.setattr(*place, fails)
                load(bench.settings(**changes))
        served = load(bench.settings(workers=2))
        assert bench.mappings()
        assert served.free()
        del served
    assert bench.mappings() == 0
    assert engines() == 0
    assert not kit.threads_since(threads)
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_load_that_fails_at_its_end_leaves_no_thread_behind(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    bench.loader.tries_first = False
    monkeypatch.setattr(es, "chat_template", fail)
    before = set(threading.enumerate())
    assert "there is not enough memory" in bench.refusal()
    assert not kit.threads_since(before)


BROKEN = "a\n{% for m in messages %}"


def test_a_file_s_template_that_cannot_be_parsed_leaves_a_model_that_completes(
    bench: Bench, tmp_path: Path
) -> None:
    path = chat_models.tiny_llama(tmp_path, template=BROKEN)
    served = bench.loader.load(bench.settings(model_path=str(path)))
    assert served.template is None
    assert "(the chat template is not valid: Unexpected end" in served.chat_lack
    assert "(line 2)" in served.chat_lack
    assert bench.stream.getvalue().count("this model cannot chat") == 1
    assert served.free()
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[0].content }}")
    changes = {"model_path": str(path), "chat_template": str(own)}
    served = bench.loader.load(bench.settings(**changes))
    assert served.template is not None and served.chat_lack == ""
    assert served.free()


def test_an_operator_s_template_that_cannot_be_parsed_is_refused_by_trial_and_load(
    bench: Bench, tmp_path: Path
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(BROKEN)
    path = chat_models.tiny_llama(tmp_path)
    for tries_first in (True, False):
        bench.loader.tries_first = tries_first
        said = bench.refusal(model_path=str(path), chat_template=str(own))
        assert said.startswith(
            f"chat_template = '{own}': the chat template is not valid"
        )
        assert said.endswith("(line 2)")


@pytest.mark.parametrize(
    ("workers", "threads", "in_steps"), [(2, 1, 2), (1, 3, 3), (2, 2, 4), (8, 8, 4)]
)
def test_a_chat_model_s_steps_have_all_threads_but_no_more_than_cores(
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    threads: int,
    in_steps: int,
) -> None:
    monkeypatch.setattr(es, "usable_cores", lambda: 4)
    path = chat_models.tiny_llama(tmp_path)
    changes: dict[str, Any] = {"workers": workers, "threads": threads}
    bench.loader.tries_first = False
    served = bench.loader.load(bench.settings(model_path=str(path), **changes))
    assert served.pool.settings.threads == in_steps
    assert served.pool.settings.workers == 1
    assert served.free()


def test_what_is_freed_does_not_wait_for_the_collector_of_cycles(bench: Bench) -> None:
    # It comes when it likes: the vocabulary and the cache are many megabytes.
    gc.collect()
    gc.disable()
    try:
        served = bench.loader.load(bench.settings(cache_mb=1))
        pool = served.pool
        assert isinstance(pool.engine, es.Engine)
        parts = (pool, pool.queue, pool.engine, pool.engine.tokenizer._word_piece)
        kept = [weakref.ref(part) for part in parts]
        assert served.free()
        del served, pool, parts
        assert [part() for part in kept] == [None] * len(kept)
    finally:
        gc.enable()


def resident_mib(pid: int) -> float:
    """Memory that a process has."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def settled_mib(pid: int) -> float:
    """The least within three ticks: what was just unloaded has gone by then."""
    end, least = time.monotonic() + 1.5, math.inf
    while time.monotonic() < end:
        least = min(least, resident_mib(pid))
        time.sleep(0.05)  # between two looks
    return least


@pytest.mark.heavy
@pytest.mark.model
def test_a_server_is_no_larger_after_many_loads(
    tmp_path: Path, default_model: Path, record_property: Callable[[str, object], None]
) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(default_model, path)
    config = tmp_path / "c.toml"
    rows = (("a", "auto", "true"), ("b", "auto", "false"), ("bad", "rank", "false"))
    tables = [
        f'[[models]]\nname = "{n}"\npath = "{path}"\npooling = "{p}"\npreload = {l}\n'
        for n, p, l in rows
    ]
    config.write_text("".join(tables))
    flags = ("--no-supervise", "--weights", "keep", "--config", str(config))
    with kit.started(*flags, module=(SCRIPT,)) as server:

        def asked(route: str, **body: object) -> int:
            return post(server, route, **body)[0]

        def round_of(count: int) -> float:
            for _ in range(count):
                assert asked("/v1/embeddings", model="b", input="a") == 200
                assert asked("/admin/models/unload", model="b") == 200
            return settled_mib(server.process.pid)

        def failures(count: int) -> float:
            for _ in range(count):
                assert asked("/admin/models/load", model="bad") == 503
            return settled_mib(server.process.pid)

        before, after = round_of(5), round_of(40)
        failed_before, failed_after = failures(2), failures(20)
        record_property("MiB", [before, after, failed_before, failed_after])
        print(before, after, failed_before, failed_after)
        assert after - before < 10
        assert failed_after - failed_before < 10
        maps = Path(f"/proc/{server.process.pid}/maps").read_text().splitlines()
        assert sum(line.endswith(str(path)) for line in maps) <= 1, "that of a"
        assert "SIG" not in "".join(kit.without_amx(server.log))


# --- no room for all threads ---

THREADS = """
import os, resource, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import embellama_server as es
from tests import kit, models

def settled(count):
    # The system counts a thread for a moment after it has been joined.
    end = time.monotonic() + kit.DEADLINE_S
    while len(os.listdir("/proc/self/task")) != count:
        assert time.monotonic() < end, os.listdir("/proc/self/task")

def computed_by_two(served):
    context = served.pool.engine.new_context()
    context.embed([es.with_special_tokens([5] * 20, served.card)], threads=2)
    context.close()

with tempfile.TemporaryDirectory() as folder:
    path = models.tiny_bert(Path(folder))
    said = []
    hooks = kit.hooks(es.Log("debug", "text", open(os.devnull, "w")))
    loader = es.Loader(folder, es.Engine, hooks)
    settings = kit.settings(model_path=str(path), cache_dir=folder, workers=3, threads=2)
    _, most = resource.getrlimit(resource.RLIMIT_NPROC)
    has = len(os.listdir("/proc/self/task"))
    for room in range(9):
        resource.setrlimit(resource.RLIMIT_NPROC, (has + room, most))
        try:
            served = loader.load(settings)
        except es.StartupError as error:
            said.append(str(error))
            settled(has)
            continue
        with ThreadPoolExecutor(1) as thread:
            thread.submit(computed_by_two, served).result()
        assert served.free()
        settled(has)
    assert said == [es.NO_THREADS] * 7, said
"""


# Limits do not count for root. To read what root's tests need is all that is kept.
AS_NOBODY = (
    *("setpriv", "--reuid=61234"),
    *("--inh-caps=+dac_override", "--ambient-caps=+dac_override"),
)


@pytest.mark.skipif(
    os.getuid() == 0 and not shutil.which("setpriv"), reason="needs another user"
)
def test_a_load_without_room_for_its_threads_is_a_sentence() -> None:
    command = [sys.executable, "-c", THREADS]
    if os.getuid() == 0:
        command = [*AS_NOBODY, *command]
    ended = subprocess.run(
        command,
        check=False,
        cwd=kit.ROOT,
        capture_output=True,
        text=True,
        timeout=kit.DEADLINE_S,
    )
    assert ended.returncode == 0, (ended.returncode, ended.stderr)


def test_the_loops_pool_goes_on_with_the_threads_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with es.LoopThreads() as pool:
        monkeypatch.setattr(threading.Thread, "start", refused)
        asked = [pool.submit(abs, -n) for n in range(20)]
        assert [one.result(kit.DEADLINE_S) for one in asked] == list(range(20))
    with pytest.raises(es.StartupError, match="that many threads"):
        es.LoopThreads()


# --- what is said ---


@pytest.mark.parametrize(
    ("has_end", "changes", "lines"),
    [
        (False, {}, 1),
        (True, {}, 0),
        (False, {"end_token": "<|endoftext|>"}, 0),
        (False, {"pooling": "mean"}, 0),
    ],
)
def test_last_token_pooling_of_texts_that_end_as_they_may_is_warned_of_once(
    bench: Bench, has_end: bool, changes: dict[str, Any], lines: int
) -> None:
    bench.path = models.tiny_causal(bench.folder, end=has_end)
    bench.loads_and_frees(**changes)
    said = [
        line for line in bench.stream.getvalue().splitlines() if "pooling is" in line
    ]
    assert len(said) == lines
    assert all(" warning " in line and "<|endoftext|>" in line for line in said)


@pytest.mark.parametrize("pre", ["", "default", "qwen2"])
def test_a_file_that_names_no_pre_tokenizer_is_warned_of_once(
    bench: Bench, tmp_path: Path, pre: str
) -> None:
    path = models.tiny_causal(tmp_path, pre=pre, context=256)
    loaded = bench.loader.load(bench.settings(model_path=str(path)))
    assert loaded.card.pre_tokenizer == (pre or "default")
    assert loaded.free()
    lines = kit.without_amx(bench.stream.getvalue().splitlines())
    warnings = [line for line in lines if " warning " in line and "--end" not in line]
    assert len(warnings) == (pre != "qwen2")
    assert all("tokenizer.ggml.pre" in line for line in warnings)


def test_a_pre_tokenizer_that_llama_cpp_does_not_know_is_a_sentence(
    bench: Bench, tmp_path: Path
) -> None:
    path = str(models.tiny_causal(tmp_path, pre="of-tomorrow"))
    said = bench.refusal(model_path=path)
    assert said.startswith(f"{path}: this llama-cpp-python does not know its pre-tok")
    assert "'of-tomorrow'" in said and "\n" not in said


FORESEEN = """
import numpy as np

es._llama_cpp()
path, pooling = sys.argv[1:]
settings = es.Settings(model_path=path, pooling=pooling, cache_mb=0, workers=2)
needed = es.needed_bytes(settings, es.facts_of(settings, path)) >> 20

def mb(name):
    status = open("/proc/self/status").read()
    return int(status.split(name)[1].split()[0]) / 1024

es.trim_memory()
before = mb("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
engine = es.Engine(path, settings, kit.quiet_log())
card, contexts = engine.card, []

def some(size):
    return np.arange(5, 5 + size, dtype=np.int32)

for is_long in (False, False, *([True] * (card.max_input_tokens > 512))):
    contexts.append(engine.new_context(needs_long_context=is_long))
    if is_long:
        contexts[-1].embed([some(card.max_input_tokens)])
    else:
        contexts[-1].embed([some(256 // card.batch_inputs)] * card.batch_inputs)
        contexts[-1].embed([some(card.context_tokens)])
taken = mb("VmHWM:") - before
assert 0.85 < needed / taken < 1.25, (needed, taken)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is /proc's")
@pytest.mark.parametrize("pooling", ["auto", "last", "mean"])
def test_the_memory_that_is_foreseen_is_what_is_taken(
    tmp_path: Path, pooling: str
) -> None:
    if pooling == "auto":  # an encoder
        path = bert(tmp_path / "m.gguf", WIDE_LETTERS, trained=512)
    else:
        path = llama(tmp_path / "m.gguf", add_wide, trained=2048)
    run_python(FORESEEN, path, pooling)
