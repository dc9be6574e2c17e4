"""Damaged model files on the real llama.cpp: how each one ends.

    python -m tests.mutants                    # 1,000 of them, by how they ended
    python -m tests.mutants --seeds 17 --keep .   # one of them, to look at

A mutant is a small sound BERT with one thing changed: half of them as a disk or a
network would do it, half as somebody would who knows the format. Each is loaded by the
real engine, room GGUF before it, and asked for a vector: in a child process, so that one
which gets past the room is counted.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import resource
import select
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import embellama_server as es
from tests import kit, models

LIMIT_S = 20.0  # for one file: a sound one takes 20 ms
MAX_BYTES = 4 << 30  # of address space: what asks for more gets none
REFUSED = ("refused by the check", "refused by the engine", "refused by llama.cpp")
ENDINGS = (*REFUSED, "served", "died", "hung", "bug")
SOUND_ENDINGS = ENDINGS[:4]

# --- a GGUF in parts ---

TEXT, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"}
NUMBERS |= {10: "Q", 11: "q", 12: "d"}
ALIGNMENT = 32


def text(content: bytes) -> bytes:
    """As the format has it."""
    return struct.pack("<Q", len(content)) + content


@dataclass(frozen=True)
class Entry:
    """Of the metadata."""

    name: bytes
    kind: int
    value: bytes

    def pack(self) -> bytes:
        return text(self.name) + struct.pack("<I", self.kind) + self.value


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is."""

    name: bytes
    shape: tuple[int, ...]
    kind: int = 0  # f32
    offset: int = 0
    dimensions: int | None = None  # what it says; None: the truth

    def pack(self) -> bytes:
        said = len(self.shape) if self.dimensions is None else self.dimensions
        form = f"<I{len(self.shape)}QIQ"
        return text(self.name) + struct.pack(
            form, said, *self.shape, self.kind, self.offset
        )


@dataclass(frozen=True)
class Gguf:
    """A whole file; counts are the truth unless told otherwise."""

    entries: tuple[Entry, ...]
    tensors: tuple[Tensor, ...]
    data: bytes
    magic: bytes = es.GGUF_MAGIC
    version: int = 3
    says_tensors: int | None = None
    says_entries: int | None = None
    alignment: int = ALIGNMENT

    def header(self) -> bytes:
        """All before the data, without the gap."""
        tensors, entries = len(self.tensors), len(self.entries)
        if self.says_tensors is not None:
            tensors = self.says_tensors
        if self.says_entries is not None:
            entries = self.says_entries
        counts = struct.pack("<IQQ", self.version, tensors, entries)
        compressed = [entry.pack() for entry in self.entries]
        compressed += [tensor.pack() for tensor in self.tensors]
        return b"".join((self.magic, counts, *compressed))

    def pack(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data


def parts_of(raw: bytes) -> Gguf:
    """A sound file, taken apart."""
    at = 0

    def take(form: str) -> int:
        nonlocal at
        (found,) = struct.unpack_from(f"<{form}", raw, at)
        at += struct.calcsize(f"<{form}")
        return int(found)

    def take_text() -> bytes:
        nonlocal at
        size = take("Q")
        at += size
        return raw[at - size : at]

    def pass_value(kind: int) -> None:
        nonlocal at
        if kind == TEXT:
            take_text()
        elif kind == ARRAY:
            item = take("I")
            for _ in range(take("Q")):
                pass_value(item)
        else:
            at += struct.calcsize(f"<{NUMBERS[kind]}")

    at = 4
    version, count, entries = take("I"), take("Q"), take("Q")
    found = []
    for _ in range(entries):
        name, kind = take_text(), take("I")
        begin = at
        pass_value(kind)
        found.append(Entry(name, kind, raw[begin:at]))
    tensors = []
    for _ in range(count):
        name = take_text()
        shape = tuple(take("Q") for _ in range(take("I")))
        tensors.append(Tensor(name, shape, take("I"), take("Q")))
    data = raw[at + -at % ALIGNMENT :]
    return Gguf(tuple(found), tuple(tensors), data, version=version)


# --- what is done to it ---

EXTREMES = (
    *(0, 1, 2, 3, 7, 8, 31, 33, 255, 256, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31),
    *((1 << 32) - 1, 1 << 32, 1 << 40, (1 << 62) + 1, (1 << 63) - 1, 1 << 63),
    *((1 << 64) - 32, (1 << 64) - 1),
)

Mutated = tuple[bytes, str]
_Change = Callable[[random.Random, Gguf], Mutated]


def _flipped_bit(chance: random.Random, sound: Gguf) -> Mutated:
    raw = bytearray(sound.pack())
    at, bit = chance.randrange(len(sound.header())), chance.randrange(8)
    raw[at] ^= 1 << bit
    return bytes(raw), f"byte {at}: bit {bit} flipped"


def _other_bytes(chance: random.Random, sound: Gguf) -> Mutated:
    raw = bytearray(sound.pack())
    at = chance.randrange(len(sound.header()))
    size = chance.choice((4, 8))
    value = chance.choice(EXTREMES) % (1 << 8 * size)
    raw[at : at + size] = value.to_bytes(size, "little")
    return bytes(raw), f"byte {at}: {size} bytes are {value}"


def _lost_or_found_bytes(chance: random.Random, sound: Gguf) -> Mutated:
    raw = bytearray(sound.pack())
    at, size = chance.randrange(len(sound.header())), chance.choice((1, 4, 8, 32))
    if chance.random() < 0.5:
        del raw[at : at + size]
        return bytes(raw), f"byte {at}: {size} bytes lost"
    raw[at:at] = chance.randbytes(size)
    return bytes(raw), f"byte {at}: {size} bytes inserted"


def _cut_off(chance: random.Random, sound: Gguf) -> Mutated:
    raw = sound.pack()
    size = chance.randrange(len(raw))
    return raw[:size], f"cut off at byte {size} of {len(raw)}"


def _other_data(chance: random.Random, sound: Gguf) -> Mutated:
    data = bytearray(sound.data)
    at, size = chance.randrange(len(data)), chance.choice((1, 64, 4096))
    filler = chance.choice((b"\0", b"\xff", b"\x7f"))
    data[at : at + size] = filler * len(data[at : at + size])
    return replace(
        sound, data=bytes(data)
    ).pack(), f"data {at}: {size} times {filler!r}"


def _at(chance: random.Random, count: int) -> tuple[slice, slice, int]:
    at = chance.randrange(count)
    return slice(at), slice(at + 1, None), at


def _other_entry(chance: random.Random, sound: Gguf) -> Mutated:
    before, after, at = _at(chance, len(sound.entries))
    entry = sound.entries[at]
    new, what = _entry_like(chance, entry)
    entries = (*sound.entries[before], *new, *sound.entries[after])
    name = entry.name.decode()
    return replace(sound, entries=entries).pack(), f"{name}: {what}"


def _entry_like(chance: random.Random, old: Entry) -> tuple[list[Entry], str]:
    """Another value, another type, another number of items, or none."""
    way = chance.randrange(8)
    if way == 0:
        return [], "left out"
    if way == 1:
        kind, value = chance.choice(_OTHER_VALUES)
        return [replace(old, kind=kind, value=value)], f"type {kind}, {value!r}"
    if old.kind == TEXT:
        word = chance.choice(
            (b"", b"x", b"\xff", b"llama", b"bert" * 99, b"%s%n", b"t5")
        )
        return [replace(old, value=text(word))], repr(word[:20])
    if old.kind == ARRAY:
        return _array_like(chance, old)
    size = len(old.value)
    raw = (chance.choice(EXTREMES) % (1 << 8 * size)).to_bytes(size, "little")
    shown = struct.unpack(f"<{NUMBERS[old.kind]}", raw)[0]
    return [replace(old, value=raw)], str(shown)


_OTHER_VALUES = (
    (TEXT, text(b"x")),
    (0, b"\1"),
    (5, struct.pack("<i", -1)),
    (6, struct.pack("<f", float("nan"))),
    (7, b"\1"),
    (7, b"\2"),
    (10, struct.pack("<Q", 1 << 63)),
    (12, struct.pack("<d", 1e300)),
    (ARRAY, struct.pack("<IQ", 4, 0)),
    (ARRAY, struct.pack("<IQI", 4, 1, 32)),
    (ARRAY, struct.pack("<IQ", TEXT, 1) + text(b"x")),
    (ARRAY, struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", 4, 0)),
)


def _array_like(chance: random.Random, old: Entry) -> tuple[list[Entry], str]:
    item, count = struct.unpack_from("<IQ", old.value)
    rest = old.value[12:]
    items = []
    while rest:
        size = 8 + struct.unpack_from("<Q", rest)[0] if item == TEXT else 4
        items.append(rest[:size])
        rest = rest[size:]
    at = chance.randrange(count)
    way = chance.choice(("shorter", "longer", "empty", "twice", "odd", "as texts"))
    if way == "shorter":
        items = items[:at]
    elif way == "longer":
        items += items[:at]
    elif way == "empty":
        items = []
    elif way == "twice":
        items[at] = items[at - 1]
    elif way == "odd":
        odd = chance.choice((b"", b"\xff\xfe", b"a" * 5000, b"\0", b"<0x-1>"))
        number = struct.pack("<I", chance.choice(EXTREMES) % (1 << 32))
        items[at] = text(odd) if item == TEXT else number
    else:
        item, items = (
            (4, [b"\1\0\0\0"] * count)
            if item == TEXT
            else (
                TEXT,
                [text(b"a")] * count,
            )
        )
    value = struct.pack("<IQ", item, len(items)) + b"".join(items)
    return [replace(old, value=value)], f"an array of {count}, {way} (item {at})"


def _other_tensor(chance: random.Random, sound: Gguf) -> Mutated:
    before, after, at = _at(chance, len(sound.tensors))
    old = sound.tensors[at]
    new, what = _tensor_like(chance, old)
    tensors = (*sound.tensors[before], *new, *sound.tensors[after])
    name = old.name.decode()
    return replace(sound, tensors=tensors).pack(), f"tensor {name}: {what}"


def _tensor_like(chance: random.Random, old: Tensor) -> tuple[list[Tensor], str]:
    way = chance.randrange(7)
    if way == 0:
        return [], "left out"
    if way == 1:
        name = chance.choice((b"x", b"", b"a" * 64, b"output.weight", b"cls.weight"))
        return [replace(old, name=name)], f"named {name!r}"
    if way == 2:
        kind = chance.choice((*range(43), 1 << 31, (1 << 32) - 1))
        return [replace(old, kind=kind)], f"type {kind} in place of {old.kind}"
    if way == 3:
        offset = chance.choice((*EXTREMES, old.offset + ALIGNMENT))
        return [replace(old, offset=offset)], f"offset {offset}"
    if way == 4:
        said = chance.choice((0, 1, 2, 4, 5, (1 << 32) - 1))
        return [replace(old, dimensions=said)], f"{said} dimensions"
    shape = list(old.shape)
    if way == 5:
        shape = chance.choice((shape[::-1], [*shape, 1], shape[:1], [1, *shape]))
    else:
        at = chance.randrange(len(shape))
        other = (*EXTREMES, shape[at] // 2, shape[at] - 1, shape[at] * 2)
        shape[at] = chance.choice(other)
    return [replace(old, shape=tuple(shape))], f"shape {shape}, not {list(old.shape)}"


# What llama.cpp reads if it is there.
_NAMES = (
    *("general.alignment", "split.count", "split.no", "tokenizer.ggml.merges"),
    *("tokenizer.ggml.scores", "tokenizer.ggml.precompiled_charsmap"),
    *("tokenizer.ggml.cls_token_id", "tokenizer.ggml.mask_token_id"),
    *("tokenizer.ggml.add_bos_token", "tokenizer.ggml.pre", "tokenizer.chat_template"),
    *("bert.vocab_size", "bert.attention.head_count_kv", "bert.attention.key_length"),
    *("bert.attention.value_length", "bert.rope.dimension_count", "bert.expert_count"),
    *("bert.attention.group_norm_groups", "bert.classifier.output_labels"),
    *("bert.rope.scaling.type", "bert.leading_dense_block_count", "bert.n_cls_out"),
    *("bert.expert_used_count", "bert.attention.sliding_window", "bert.rope.freq_base"),
)


def _added_entry(chance: random.Random, sound: Gguf) -> Mutated:
    name = chance.choice(_NAMES)
    kind, value = 4, struct.pack("<I", chance.choice(EXTREMES) % (1 << 32))
    if chance.random() < 0.5:
        kind, value = chance.choice(_OTHER_VALUES)
    entries = (*sound.entries, Entry(name.encode(), kind, value))
    what = f"{name} added: type {kind}, {value!r}"
    return replace(sound, entries=entries).pack(), what


_CHANGES: tuple[tuple[_Change, int], ...] = (
    (_flipped_bit, 16),
    (_other_bytes, 14),
    (_lost_or_found_bytes, 6),
    (_cut_off, 5),
    (_other_data, 7),
    (_other_entry, 24),
    (_added_entry, 8),
    (_other_tensor, 20),
)


def mutant(sound: Gguf, seed: int) -> Mutated:
    """The same bytes for the same seed, and what was done."""
    chance = random.Random(seed)
    changes, weights = zip(*_CHANGES, strict=True)
    change: _Change = chance.choices(changes, weights)[0]
    return change(chance, sound)


# --- how it ends ---


@dataclass(frozen=True)
class Ending:
    """Of one mutant."""

    seed: int
    what: str  # was changed
    how: str  # one of ENDINGS
    says: str


@dataclass
class Child:
    """A process that loads files until it dies."""

    _process: subprocess.Popen[str] | None = None
    _stderr: Path = field(default_factory=Path)

    def load(self, path: Path) -> tuple[str, str]:
        """How it ended, and what was said."""
        process = self._process or self._begin(path.parent)
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
        if not select.select([process.stdout], [], [], LIMIT_S)[0]:
            self.end()
            return "hung", f"no answer within {LIMIT_S:.0f} s"
        if line := process.stdout.readline():
            how, says = json.loads(line)
            return how, says
        code = process.wait(LIMIT_S)
        self.end()
        named = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        lines = self._stderr.read_text("utf-8", "replace").split("\n")
        lines = [line for line in lines if line.strip()] or [""]
        marks = ("ASSERT", "what():", "abort", "Fatal Python")
        telling = [line for line in lines if any(mark in line for mark in marks)]
        return "died", f"{named}: {(telling or lines[-1:])[0].strip()}"

    def _begin(self, folder: Path) -> subprocess.Popen[str]:
        self._stderr = folder / "stderr"
        with self._stderr.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.mutants", "--child"],
                cwd=kit.ROOT,
                env=os.environ | {"GGML_NO_BACKTRACE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        return self._process

    def end(self) -> None:
        if (process := self._process) is None:
            return
        self._process = None
        process.kill()
        process.wait(LIMIT_S)
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()


# What is damaged. A reranker has a head, and special tokens that pairs need.
KINDS: dict[str, Callable[[Path], Path]] = {
    "bert": models.tiny_bert,
    "cross-encoder": models.tiny_cross_encoder,
    "causal-reranker": models.tiny_causal_reranker,
}


def endings(
    seeds: Iterable[int],
    folder: Path,
    *,
    kind: str = "bert",
) -> Iterator[Ending]:
    """Load these mutants, one after the other."""
    sound = parts_of(KINDS[kind](folder).read_bytes())
    path = folder / "mutant.gguf"
    child = Child()
    try:
        for seed in seeds:
            raw, what = mutant(sound, seed)
            path.write_bytes(raw)
            yield Ending(seed, what, *child.load(path))
    finally:
        child.end()


def counted(found: Iterable[Ending]) -> dict[str, int]:
    """How many ended in each way."""
    counts = collections.Counter(ending.how for ending in found)
    return {how: counts[how] for how in ENDINGS}


# --- the child ---


def _serve_one(path: str) -> tuple[str, str]:
    try:
        engine = es.Engine(path, es.ModelSettings(), kit.quiet_log())
    except es.StartupError as error:
        says = str(error)
        by_check, by_llama = "is not a valid GGUF" in says, "llama.cpp" in says
        return REFUSED[0 if by_check else 2 if by_llama else 1], says
    card = engine.card
    own = engine.tokenizer.encode("a b")
    whole = (
        es.pair_with_special_tokens(own, own, card)
        if card.kind == "rank"
        else es.with_special_tokens(own, card)
    )
    context = engine.new_context()
    ids = np.array(whole[: card.context_tokens], np.int32)
    vectors = context.embed([ids])
    context.close()
    engine.close()
    return "served", f"{vectors.shape[1]} numbers"


def _work() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    for line in sys.stdin:
        try:
            ended = _serve_one(line.strip())
        except es.EngineError as error:
            ended = "refused by llama.cpp", str(error)
        except Exception as error:
            ended = "bug", f"{type(error).__name__}: {error}"
        print(json.dumps(ended), flush=True)


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="*", help="these, not --count")
    parser.add_argument("--kind", choices=KINDS, default="bert")
    parser.add_argument("--keep", type=Path, help="a folder for those that end badly")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        _work()
        return
    found: list[Ending] = []
    with tempfile.TemporaryDirectory() as temp:
        seeds = given.seeds if given.seeds is not None else range(given.count)
        for ending in endings(seeds, Path(temp), kind=given.kind):
            found.append(ending)
            if ending.how not in SOUND_ENDINGS or given.seeds is not None:
                print(
                    f"{ending.seed:5} {ending.what}\n      {ending.how}: {ending.says}"
                )
            if given.keep and ending.how not in SOUND_ENDINGS:
                kept = given.keep / f"mutant-{ending.seed}.gguf"
                kept.write_bytes((Path(temp) / "mutant.gguf").read_bytes())
    print(counted(found))


if __name__ == "__main__":
    main()
