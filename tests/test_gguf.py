"""Room GGUF: what is sound passes with its values, all else is one sentence.

Damaged files are made part by part (tests/mutants.py). A refusal is also never slow and
never costs memory, whatever a few bytes claim to hold.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import io
import itertools
import math
import os
import struct
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import embellama_server as es
from tests import kit, models, mutants
from tests.mutants import ARRAY, TEXT, Entry, Gguf, Tensor, text

MAX_S, MAX_BYTES = 1.0, 1 << 20  # a refusal may take; of memory


def number(name: bytes, value: int, form: str = "I") -> Entry:
    """An entry; ``form`` as struct names it."""
    kinds = {letter: kind for kind, letter in mutants.NUMBERS.items()}
    return Entry(name, kinds[form], struct.pack(f"<{form}", value))


def array(item: int, count: int, items: bytes = b"", name: bytes = b"list") -> Entry:
    """An entry; ``count`` is what it says."""
    return Entry(name, ARRAY, struct.pack("<IQ", item, count) + items)


def nested() -> Entry:
    """An array of arrays, which llama.cpp refuses too."""
    return array(ARRAY, 1, EMPTY)


EMPTY = struct.pack("<IQ", 4, 0)  # an array
ARCHITECTURE = Entry(b"general.architecture", TEXT, text(b"bert"))
LISTS = (array(TEXT, 2, text(b"a") + text(b"")), array(4, 2, bytes(8), b"numbers"))
FIRST, SECOND = Tensor(b"first", (8, 4)), Tensor(b"second", (32,), offset=128)
SOUND = Gguf(
    (ARCHITECTURE, number(b"answer", 42), number(b"less", -1, "q"), *LISTS),
    (FIRST, SECOND),
    bytes(256),
)
VALUES = {"general.architecture": "bert", "answer": 42, "less": -1, "list": ()}


def checked(raw: bytes) -> es.GgufHeader:
    """What the room reads of these bytes."""
    with tempfile.TemporaryFile() as file:
        file.write(raw)
        file.flush()
        return es.check_gguf({"m.gguf": file})


def refusal(raw: bytes) -> str:
    """Its sentence about these bytes; asserts that it was quick and took no memory."""
    tracemalloc.start()
    begun = time.process_time()
    try:
        with pytest.raises(es.StartupError) as caught:
            checked(raw)
        assert time.process_time() - begun < MAX_S
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()
    said = str(caught.value)
    assert said.startswith("m.gguf is not a valid GGUF file: ")
    assert " (at byte " in said
    return said


def block_of(kind: int) -> tuple[int, int]:
    """Values in a block of this type, and bytes of it, as the installed ggml says."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    (folder,) = spec.submodule_search_locations or [""]
    ggml = ctypes.CDLL(str(next(Path(folder, "lib").glob("libggml-base.*"))))
    ggml.ggml_blck_size.restype = ctypes.c_int64
    ggml.ggml_type_size.restype = ctypes.c_size_t
    return ggml.ggml_blck_size(kind), ggml.ggml_type_size(kind)


def agrees_with_the_gguf_package(path: Path) -> Mapping[str, Any]:
    """Check a file; every value must be what gguf's own reader says."""
    with es.checked_model(str(path), "") as (_, header):
        values = header.values
    reader = gguf.GGUFReader(path)
    own = {name for name in reader.fields if not name.startswith("GGUF.")}
    assert set(values) == own
    names = {tensor.name for tensor in reader.tensors}
    assert header.has_head == ("cls.output.weight" in names)
    if "split.count" not in own:  # the reader reads one part
        numbers = sum(int(tensor.n_elements) for tensor in reader.tensors)
        assert header.n_params == numbers
        for tensor in reader.tensors:
            place = header.tensors[tensor.name.encode()]
            assert place.begin == tensor.data_offset
            assert place.rows * place.row_bytes == tensor.n_bytes
    assert header.architecture == values["general.architecture"]
    for name, value in values.items():
        expected = reader.fields[name].contents()
        if name == "tokenizer.ggml.tokens":
            assert header.n_tokens == len(expected)
        is_long = isinstance(expected, list) or len(str(expected).encode()) > 256
        if is_long and name != "tokenizer.chat_template":  # kept: /api/show tells it
            expected = ()
        assert value == expected, name
    assert values.get("general.alignment", 32) == reader.alignment
    return values


# --- what is sound ---


def test_a_sound_file_gives_its_short_values() -> None:
    found = checked(SOUND.pack())
    tensors = {
        b"first": es.Tensor(0, 288, 0, row_values=8, rows=4, row_bytes=32),
        b"second": es.Tensor(0, 416, 0, row_values=32, rows=1, row_bytes=128),
    }
    values = VALUES | {"numbers": ()}
    assert found == es.GgufHeader("bert", values, 8 * 4 + 32, tensors=tensors)


@pytest.mark.parametrize(
    ("form", "value"),
    [
        *(("B", 255), ("b", -128), ("H", 65535), ("h", -1), ("I", (1 << 32) - 1)),
        *(("i", -1), ("f", 0.5), ("?", True), ("Q", (1 << 64) - 1), ("q", -1)),
        ("d", 1e300),
    ],
)
def test_a_number_of_any_type_is_read(form: str, value: float) -> None:
    kinds = {letter: kind for kind, letter in mutants.NUMBERS.items()}
    entry = Entry(b"x", kinds[form], struct.pack(f"<{form}", value))
    assert checked(with_entry(entry).pack()).values["x"] == value


@pytest.mark.parametrize("size", [0, 256, 257])
def test_a_text_is_kept_if_it_is_short(size: int) -> None:
    entry = Entry(b"x", TEXT, text(b"a" * size))
    kept = "a" * size if size <= 256 else ()
    assert checked(with_entry(entry).pack()).values["x"] == kept


def test_names_are_compared_whole() -> None:
    pair = number(b"n" * 200 + b"1", 1), number(b"n" * 200 + b"2", 2)
    assert checked(with_entry(*pair).pack()).values["n" * 200 + "2"] == 2


@pytest.mark.parametrize(
    "make",
    [
        models.tiny_bert,
        models.long_context_bert,
        models.tiny_cross_encoder,
        models.tiny_causal,
        models.tiny_causal_reranker,
    ],
    ids=lambda make: make.__name__,
)
def test_the_models_of_the_tests_are_sound(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    values = agrees_with_the_gguf_package(make(tmp_path))
    assert values["general.architecture"] in ("bert", "nomic-bert", "qwen3")


# Every kind of file that the tests can make: what each is for stands in tests/models.py.
KINDS: dict[str, Callable[[Path], Path]] = {
    "bert": models.tiny_bert,
    "long context": models.long_context_bert,
    "two layers": models.tiny_cross_encoder,
    "one layer": functools.partial(models.tiny_cross_encoder, head=("cls.output",)),
    "three labels": functools.partial(
        models.tiny_cross_encoder, labels=("a", "b", "c")
    ),
    "byte pairs": models.tiny_causal,
    "pieces": functools.partial(models.tiny_causal, byte_pairs=False),
    "causal reranker": models.tiny_causal_reranker,
}
TEXTS = ("no time", "a new year", "the man")


def numbers_of(path: Path) -> Any:
    """What the engine makes of some texts: vectors, or raw scores."""
    engine = es.Engine(str(path), es.ModelSettings(), kit.quiet_log())
    context = engine.new_context()
    card, rows = engine.card, []
    for line in TEXTS:
        own = engine.tokenizer.encode(line)
        ids = (
            es.pair_with_special_tokens(own, own, card)
            if card.kind == "rank"
            else es.with_special_tokens(own, card)
        )
        rows.append(context.embed([np.array(ids, np.int32)])[0])
    context.close()
    engine.close()
    return np.array(rows)


@pytest.mark.parametrize("weights", es.WEIGHT_TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_llama_cpp_writes_is_sound_and_means_the_same(
    tmp_path: Path, kind: str, weights: str
) -> None:
    path, target = KINDS[kind](tmp_path), tmp_path / "reencoded.gguf"
    before = numbers_of(path)
    engine = es.Engine(str(path), es.ModelSettings(), kit.quiet_log())
    engine.reencode(str(target), weights)
    engine.close()
    assert agrees_with_the_gguf_package(target)["general.architecture"]
    after = numbers_of(target)
    apart = np.abs(after - before).max()
    assert apart < (0.01 if weights in ("f32", "f16") else 0.1)


@pytest.mark.model
def test_the_default_model_is_sound(default_model: Path) -> None:
    assert agrees_with_the_gguf_package(default_model)["bert.block_count"] == 6


# Of intermediate results: ggml has no way to multiply with them.
NO_WEIGHTS = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
each_type = pytest.mark.parametrize(
    "kind", gguf.GGMLQuantizationType, ids=lambda kind: kind.name
)


@each_type
def test_every_type_has_the_size_it_has_in_llama_cpp(
    kind: gguf.GGMLQuantizationType,
) -> None:
    per_block, size = block_of(kind.value)
    tensor = Tensor(b"t", (per_block, 3), kind.value)
    whole = replace(SOUND, tensors=(tensor,), data=bytes(3 * size))
    if kind.name in NO_WEIGHTS:
        assert f"tensor t has type {kind.value} " in refusal(whole.pack())
        return
    assert checked(whole.pack()).values.items() >= VALUES.items()
    short = replace(whole, data=whole.data[1:])
    assert "tensor t ends beyond the end of the file" in refusal(short.pack())
    if per_block > 1:
        halved = replace(tensor, shape=(per_block // 2, 6))
        said = refusal(replace(whole, tensors=(halved,)).pack())
        assert f"tensor t has the shape [{per_block // 2}, 6]" in said


ADDED = ("blk.0.attn_q.bias", "output_norm.weight", "token_types.weight", "blk.0.ssm_a")
MULTIPLIED = ("cls.output.weight", "token_embd.weight", "blk.0.ffn_up.weight")


@each_type
@pytest.mark.parametrize("rows", [1, 2])
def test_only_what_is_multiplied_may_be_of_any_type_whatever_its_shape(
    kind: gguf.GGMLQuantizationType, rows: int
) -> None:
    # ggml drops a last dimension of 1 when it writes: a head of one label has one left.
    per_block, size = block_of(kind.value)
    shape = (per_block * 2, 2)[:rows]
    for name in (*ADDED, *MULTIPLIED):
        tensor = Tensor(name.encode(), shape, kind.value)
        made = replace(SOUND, tensors=(tensor,), data=bytes(size * 4)).pack()
        is_free = name in MULTIPLIED or (name.endswith("ssm_a") and rows > 1)
        if kind.name == "F32" or (is_free and kind.name not in NO_WEIGHTS):
            assert checked(made).values.items() >= VALUES.items()
        else:
            assert f"tensor {name} has type {kind.value} " in refusal(made)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_another_alignment_counts_for_offsets_and_for_the_data(
    tmp_path: Path, alignment: int
) -> None:
    entries = (*SOUND.entries, number(b"general.alignment", alignment))
    tensors = (FIRST, replace(SECOND, offset=max(128, alignment)))
    data = bytes(max(128, alignment) + 128)
    path = tmp_path / "aligned.gguf"
    aligned = Gguf(entries, tensors, data, alignment=alignment)
    path.write_bytes(aligned.pack())
    assert agrees_with_the_gguf_package(path)["general.alignment"] == alignment
    assert "beyond the end" in refusal(aligned.pack()[:-1])


@pytest.mark.parametrize("alignment", [8, 16, 32])
@pytest.mark.parametrize("size", range(0, 40, 4))
def test_data_begins_where_llama_cpp_can_read_it(alignment: int, size: int) -> None:
    # ggml reads at multiples of 32 bytes, whatever the file says.
    entries = (
        *SOUND.entries,
        Entry(b"x", TEXT, text(b"a" * size)),
        number(b"general.alignment", alignment),
    )
    raw = replace(SOUND, entries=entries, alignment=alignment).pack()
    if (len(raw) - len(SOUND.data)) % 32:
        assert alignment < 32
        assert "its data begins at " in refusal(raw)
    else:
        assert checked(raw).values.items() >= VALUES.items()


BYTES = tuple(b"<0x%02X>" % byte for byte in range(256))


def test_a_sentence_piece_without_a_token_for_each_byte_is_refused() -> None:
    # llama.cpp spells with them whatever is none of its tokens.
    def made(model: bytes, *found: bytes) -> Gguf:
        kind = Entry(b"tokenizer.ggml.model", TEXT, text(model))
        return with_entry(kind, tokens(b"<s>", *found))

    # Either form will do.
    for found in (BYTES, (*BYTES[:97], b"a", *BYTES[98:])):
        checked(made(b"llama", *found).pack())
        checked(made(b"llama", *reversed(found)).pack())
    for some in ((), BYTES[1:], BYTES[:-1], (*BYTES[:97], b"A", *BYTES[98:])):
        assert "lack some of the bytes" in refusal(made(b"llama", *some).pack())
        checked(made(b"gpt2", *some).pack())
    kind = Entry(b"tokenizer.ggml.model", TEXT, text(b"llama"))
    assert "lack some of the bytes" in refusal(with_entry(kind).pack())


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_are_read(version: int) -> None:
    assert (
        checked(replace(SOUND, version=version).pack()).values.items() >= VALUES.items()
    )


def test_a_type_nobody_here_knows_is_left_to_llama_cpp() -> None:
    # A newer llama.cpp may; an older one has a sentence of its own.
    tensors = (replace(FIRST, kind=1000), SECOND)
    assert (
        checked(replace(SOUND, tensors=tensors).pack()).values.items() >= VALUES.items()
    )


# --- what is not ---

LARGE = (100_000_000, 1 << 31)


def with_entry(entry: Entry, *more: Entry) -> Gguf:
    return replace(SOUND, entries=(ARCHITECTURE, entry, *more))


def with_tensor(**changes: Any) -> Gguf:
    return replace(SOUND, tensors=(FIRST, replace(SECOND, **changes)))


def long_text(size: int) -> Entry:
    return Entry(b"x", TEXT, struct.pack("<Q", size) + b"abc")


CRAFTED: dict[str, tuple[Gguf, str]] = {
    "magic": (replace(SOUND, magic=b"GGML"), "does not begin with GGUF (at byte 4)"),
    "version 0": (
        replace(SOUND, version=0),
        "version 0 is not one of (2, 3) (at byte 8)",
    ),
    "version 1": (replace(SOUND, version=1), "version 1 is not one of"),
    "version 4": (replace(SOUND, version=4), "version 4 is not one of"),
    "big-endian": (replace(SOUND, version=3 << 24), "version 50331648 is not one of"),
    "no architecture": (replace(SOUND, entries=()), "general.architecture is missing"),
    "empty architecture": (
        replace(SOUND, entries=(replace(ARCHITECTURE, value=text(b"")),)),
        "general.architecture is missing",
    ),
    "more entries": (replace(SOUND, says_entries=6), "a valid GGUF file: "),
    "more tensors": (replace(SOUND, says_tensors=3), "tensor '' is repeated, or"),
    "entry type 13": (with_entry(Entry(b"x", 13, b"")), "x has the unknown type 13"),
    "huge entry type": (
        with_entry(Entry(b"x", (1 << 32) - 1, b"")),
        "x has the unknown type 4294967295",
    ),
    "array type 13": (
        with_entry(array(13, 1, bytes(8))),
        "list has the unknown type",
    ),
    "array of arrays": (with_entry(nested()), "list has the unknown type 9"),
    "array beyond the end": (with_entry(array(10, 1000)), "it ends within list"),
    "texts beyond the end": (
        with_entry(array(TEXT, 1000)),
        "list claims to have 1000 items",
    ),
    "entry without a name": (with_entry(Entry(b"", 0, b"\0")), "'' is repeated, or"),
    "entry twice": (
        with_entry(number(b"x", 1), number(b"x", 2)),
        "metadata entry 'x' is repeated",
    ),
    "text beyond the end": (with_entry(long_text(1 << 20)), "it ends within x"),
    "tensor without a name": (with_tensor(name=b""), "tensor '' is repeated, or"),
    "tensor twice": (with_tensor(name=b"first"), "tensor 'first' is repeated"),
    "tensor with a long name": (with_tensor(name=b"n" * 64), "has no usable name"),
    "no dimensions": (with_tensor(shape=()), "tensor second has 0 dimensions"),
    "5 dimensions": (with_tensor(shape=(1,) * 5), "tensor second has 5 dimensions"),
    "a length of zero": (with_tensor(shape=(32, 0)), "second has the shape [32, 0]"),
    "not a whole block": (with_tensor(kind=8, shape=(33, 1)), "has the shape [33, 1]"),
    "an odd offset": (with_tensor(offset=129), "second is not aligned to 32 bytes"),
    "an offset in another": (with_tensor(offset=96), "second overlaps another one"),
    "the same offset": (with_tensor(offset=0), "overlaps another one"),
    "an offset beyond": (with_tensor(offset=160), "second ends beyond the end"),
}
for _size in LARGE:
    CRAFTED |= {
        f"{_size} entries": (replace(SOUND, says_entries=_size), "are too many"),
        f"{_size} tensors": (replace(SOUND, says_tensors=_size), "are too many"),
        f"text of {_size}": (
            with_entry(long_text(_size)),
            f"claims to have {_size} bytes",
        ),
        f"{_size} numbers": (with_entry(array(0, _size)), "it ends within list"),
        f"{_size} texts": (with_entry(array(TEXT, _size)), f"to have {_size} items"),
        f"{_size} arrays": (with_entry(array(ARRAY, _size)), "has the unknown type 9"),
        f"a length of {_size}": (with_tensor(shape=(_size,)), "tensor second "),
    }
for _alignment in (0, 1, 3, 4, 48, 8192):
    CRAFTED[f"alignment {_alignment}"] = (
        with_entry(number(b"general.alignment", _alignment)),
        f"general.alignment is {_alignment} ",
    )
CRAFTED["alignment below zero"] = (
    with_entry(number(b"general.alignment", -32, "i")),
    "general.alignment is -32 ",
)
CRAFTED["alignment as text"] = (
    with_entry(Entry(b"general.alignment", TEXT, text(b"32"))),
    "general.alignment is '32'",
)


def bert_with(name: str, *values: Entry) -> Gguf:
    """A BERT of 3 tokens, [CLS] the second and [SEP] the last; with another value."""
    bos, sep = b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.seperator_token_id"
    entries = (
        ARCHITECTURE,
        *(number(b"bert.attention.head_count", 2), number(b"bert.embedding_length", 8)),
        *(
            Entry(b"tokenizer.ggml.model", TEXT, text(b"bert")),
            tokens(b"a", b"b", b"c"),
        ),
        *(number(bos, 1), number(sep, 2)),
    )
    kept = [entry for entry in entries if entry.name != name.encode()]
    changed = [replace(value, name=name.encode()) for value in values]
    return replace(SOUND, entries=(*kept, *changed))


def tokens(*found: bytes) -> Entry:
    items = b"".join(map(text, found))
    return array(TEXT, len(found), items, b"tokenizer.ggml.tokens")


def shape(value: int | str) -> Entry:
    """A value as models have it, for bert_with()."""
    if isinstance(value, str):
        return Entry(b"", TEXT, text(value.encode()))
    return number(b"", value) if value >= 0 else number(b"", value, "i")


def real(value: float) -> Entry:
    return Entry(b"", 6, struct.pack("<f", value))


NAN, WORD, LIST = real(float("nan")), shape("x"), array(4, 1, bytes(4))
EPSILON, ROPE = "bert.attention.layer_norm_epsilon", "bert.rope.scaling.type"
USED, BOS = "bert.expert_used_count", "tokenizer.ggml.bos_token_id"
SEP, TOKENS = "tokenizer.ggml.seperator_token_id", "tokenizer.ggml.tokens"
# A name, values that are sound, and others: harmless here, where the rest of a model is
# missing.
NARROW: dict[str, tuple[list[Entry], list[Entry]]] = {
    "bert.block_count": (
        [shape(1), shape(512)],
        [shape(0), shape(513), shape(-1), real(1), WORD, LIST],
    ),
    "bert.pooling_type": (
        [*map(shape, range(-1, 4)), shape((1 << 32) - 1)],
        [shape(5), shape(-2), shape(1 << 31), real(1), WORD, LIST],
    ),
    "bert.expert_count": ([shape(0)], [shape(513), shape(-1), NAN, WORD, LIST]),
    USED: ([shape(0)], [shape(1), shape(-1), WORD, LIST]),
    EPSILON: (
        [real(0.0), real(1e-12)],
        [real(-1e-12), real(1), real(float("inf")), NAN, shape(0), WORD, LIST],
    ),
    "bert.attention.layer_norm_rms_epsilon": ([real(1e-5)], [real(-1), NAN]),
    "bert.attention.group_norm_epsilon": ([real(1e-5)], [real(-1), NAN]),
    ROPE: (
        [*map(shape, ("none", "linear", "yarn", "longrope"))],
        [shape(""), shape(0), WORD, LIST],
    ),
    "bert.attention.key_length": (
        [shape(4)],
        [shape(3), shape(0), real(4), WORD, LIST],
    ),
    "bert.attention.value_length": ([shape(4)], [shape(8), shape(-4)]),
    BOS: ([shape(0), shape(2)], [shape(3), shape(-1), real(1), WORD, LIST]),
    SEP: ([shape(0), shape(2)], [shape(3), shape(-1), real(1), WORD, LIST]),
    TOKENS: (
        [tokens(b"", b"a", b"[EMPTY_1]"), tokens(b"a", b"b", b"c", b"a\xff")],
        [
            *(tokens(b"a", b"b", b"a"), tokens(b"a", b"b", b"a\0x"), LIST),
            *(tokens(b"[EMPTY_1]", b"", b"c"), tokens(b"a", b"b"), tokens()),
            array(ARRAY, 3, EMPTY * 3),
        ],
    ),
}


@pytest.mark.parametrize("name", NARROW)
def test_a_value_that_no_model_has_is_refused(name: str) -> None:
    sound, wrong = NARROW[name]
    checked(bert_with("none").pack())
    for value in sound:
        checked(bert_with(name, value).pack())
    for value in wrong:
        said = refusal(bert_with(name, value).pack())
        shown = name.rpartition("ggml.")[2]
        assert shown in said or (name == TOKENS and "token" in said), said


@pytest.mark.parametrize(
    ("architecture", "head", "others"),
    [
        ("bert", b"cls.output.weight", [b"cls.weight", b"cls.output.bias"]),
        ("qwen3", b"cls.output.weight", [b"cls.weight", b"output.weight"]),
        ("jina-bert-v2", b"cls.weight", [b"cls.output.weight", b"cls.bias"]),
    ],
)
def test_what_is_to_rank_has_the_head_of_its_architecture(
    architecture: str, head: bytes, others: list[bytes]
) -> None:
    def made(pooling: int, name: bytes) -> Gguf:
        entries = (
            Entry(b"general.architecture", TEXT, text(architecture.encode())),
            number(f"{architecture}.pooling_type".encode(), pooling),
        )
        kind = 0 if name.endswith(b"bias") else SECOND.kind
        tensor = replace(SECOND, name=name, kind=kind)
        return replace(SOUND, entries=entries, tensors=(FIRST, tensor))

    for pooling in (1, 4):
        assert checked(made(pooling, head).pack()).has_head
    for other in others:
        assert not checked(made(1, other).pack()).has_head
        assert "no classification head" in refusal(made(4, other).pack())


@pytest.mark.parametrize("name", [BOS, SEP, TOKENS])
def test_without_its_special_tokens_a_bert_is_refused(name: str) -> None:
    # By default they are 101 and 102, of three.
    assert "_token_id is " in refusal(bert_with(name).pack())


@pytest.mark.parametrize(("experts", "used"), [(1, 1), (8, 1), (8, 8), (512, 512)])
def test_experts_are_used(experts: int, used: int) -> None:
    def made(used: int) -> Gguf:
        whole = bert_with("bert.expert_count", shape(experts))
        told = replace(shape(used), name=USED.encode())
        return replace(whole, entries=(*whole.entries, told))

    checked(made(used).pack())
    for wrong in (0, experts + 1):
        assert f"{USED} is {wrong} " in refusal(made(wrong).pack())


def test_experts_of_which_none_is_used_are_refused() -> None:
    assert USED in refusal(bert_with("bert.expert_count", shape(8)).pack())


@pytest.mark.parametrize("value", [shape("x"), shape(3)], ids=["text", "number"])
def test_tokens_that_are_no_list_are_refused(value: Entry) -> None:
    assert "tokens is not an array of strings" in refusal(
        bert_with(TOKENS, value).pack()
    )


@pytest.mark.parametrize("name", CRAFTED)
def test_a_wrong_number_is_a_sentence(name: str) -> None:
    wrong, says = CRAFTED[name]
    assert says in refusal(wrong.pack())


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("MAX_GGUF_ENTRIES", "2 tensors and 5 entries are too many"),
        ("_MAX_TEXT_BYTES", "claims to have 20 bytes"),
        ("_MAX_DIMENSIONS", "tensor first has 2 dimensions"),
        ("_MAX_VALUES", "tensor first has the shape [8, 4]"),
    ],
)
def test_every_limit_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, limit: str, says: str
) -> None:
    monkeypatch.setattr(es, limit, 1)
    assert says in refusal(SOUND.pack())


def test_a_file_cut_off_anywhere_is_refused() -> None:
    raw = SOUND.pack()
    for end in range(len(raw)):
        refusal(raw[:end])


@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("name", [b"general.architecture", b"first"])
def test_a_name_is_not_longer_than_the_file(name: bytes, size: int) -> None:
    raw = bytearray(SOUND.pack())
    at = raw.index(name) - 8
    struct.pack_into("<Q", raw, at, size)
    what = "tensor 0" if name == b"first" else "metadata entry 0"
    assert f"the name of {what} claims to have {size} bytes" in refusal(bytes(raw))


@pytest.mark.parametrize("item", [0, TEXT, ARRAY])
def test_fifty_bytes_that_claim_millions_of_items_end_at_once(item: int) -> None:
    name = b"some.list"
    raw = Gguf((array(item, 10_000_000, name=name),), (), b"").header()
    assert len(raw) <= 60
    assert "some.list" in refusal(raw)


def test_a_broken_name_is_shown_as_text() -> None:
    assert "\ufffd" in refusal(with_entry(Entry(b"\xff\n" * 9, 13, b"")).pack())


LONG = b"n" * 9999
LONG_NAMES = {
    "twice": with_entry(number(LONG, 1), number(LONG, 1)),
    "too long": with_entry(number(LONG * 7, 1)),
    "cut off": with_entry(Entry(LONG, 10, b"")),
    "of an unknown type": with_entry(Entry(LONG, 13, b"")),
    "text": with_entry(Entry(LONG, TEXT, long_text(1 << 20).value)),
    "array": with_entry(array(TEXT, 1000, name=LONG)),
}


@pytest.mark.parametrize("how", LONG_NAMES)
def test_a_long_name_makes_no_long_sentence(how: str) -> None:
    wrong = replace(LONG_NAMES[how], tensors=(), data=b"")
    said = refusal(wrong.pack() if how != "cut off" else wrong.header())
    assert "nnnn" in said or how == "too long"
    assert len(said) < 400


CHANGES: dict[str, Callable[[bytearray, int, int], None]] = {
    "flip": lambda raw, at, n: raw.__setitem__(at, raw[at] ^ 1 << n % 8),
    "delete": lambda raw, at, n: raw.__delitem__(slice(at, at + n % 16)),
    "insert": lambda raw, at, n: raw.__setitem__(slice(at, at), bytes([n % 256] * 8)),
    "cut": lambda raw, at, n: raw.__delitem__(slice(at, None)),
    "overwrite": lambda raw, at, n: raw.__setitem__(
        slice(at, at + 8), struct.pack("<Q", n)
    ),
}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(CHANGES)),
            st.integers(0, len(SOUND.header()) - 1),
            st.sampled_from(mutants.EXTREMES) | st.integers(0, (1 << 64) - 1),
        ),
        max_size=4,
    )
)
def test_damage_gives_values_or_a_sentence(changes: list[tuple[str, int, int]]) -> None:
    raw = bytearray(SOUND.pack())
    for name, at, n in changes:
        if at < len(raw):
            CHANGES[name](raw, at, n)
    try:
        assert checked(bytes(raw)).architecture
    except es.StartupError as error:
        assert "m.gguf is not a valid GGUF file: " in str(error)


# --- the right file ---


def write_sound(path: Path) -> str:
    """A sound file; its checksum."""
    path.write_bytes(SOUND.pack())
    return es.sha256_of(path)


def found_for(path: Path, **changes: Any) -> es.ModelFile:
    """What the server serves when it is pointed at this file."""
    fetch = es.ModelFetch(str(path.parent), kit.quiet_log(), es.DEFAULT_MODEL)
    return es.model_file(kit.settings(model_path=str(path), **changes), fetch)


@pytest.mark.parametrize("change", [str, str.upper])
def test_the_right_checksum_is_accepted(
    tmp_path: Path, change: Callable[[str], str]
) -> None:
    path = tmp_path / "m.gguf"
    digest = write_sound(path)
    found = found_for(path, model_sha256=change(digest))
    assert (found.sha256, found.required_sha256.lower()) == (digest, digest)
    with es.checked_model(str(path), found.required_sha256) as ((usable,), _):
        assert Path(usable).read_bytes() == SOUND.pack()


def test_another_checksum_is_refused_when_found_and_when_loaded(tmp_path: Path) -> None:
    path, other = tmp_path / "m.gguf", "0" * 64
    digest = write_sound(path)
    says = f"has sha256 {digest} but must have {other}: it is damaged, or another"
    with pytest.raises(es.StartupError, match=says):
        found_for(path, model_sha256=other)
    with pytest.raises(es.StartupError, match=says), es.checked_model(str(path), other):
        pytest.fail("usable")


@pytest.mark.parametrize(
    ("line", "is_meant"),
    [
        ("{digest}  ./m.gguf", True),  # of sha256sum ./*
        ("{digest} *./m.gguf", True),
        ("{zeros}  ../m.gguf", False),
        ("{zeros}  x/m.gguf", False),
        ("{digest}  m.gguf", True),
        ("{digest} *m.gguf", True),  # binary mode
        ("{upper}  m.gguf", True),
        ("{zeros}  other.gguf\n{digest}  m.gguf", True),
        ("{digest}  m.gguf\r\n{zeros}  m.gguf.bak", True),
        ("{zeros}  other.gguf", False),
        ("{zeros}  xm.gguf", False),
        ("{zeros}  m.gguf.bak", False),
        ("abc  m.gguf", False),
        ("m.gguf", False),
        ("", False),
    ],
)
def test_sha256sums_counts_for_the_file_it_names(
    tmp_path: Path, line: str, is_meant: bool
) -> None:
    path = tmp_path / "m.gguf"
    digest = write_sound(path)
    said = line.format(digest=digest, upper=digest.upper(), zeros="0" * 64)
    (tmp_path / "SHA256SUMS").write_text(said + "\n")
    assert bool(found_for(path).required_sha256) == is_meant
    path.write_bytes(SOUND.pack() + b"damage")
    if is_meant:
        with pytest.raises(es.StartupError, match=f"must have {digest}"):
            found_for(path)
    else:
        assert not found_for(path).required_sha256


def test_a_setting_counts_before_sha256sums(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    digest = write_sound(path)
    (tmp_path / "SHA256SUMS").write_text("0" * 64 + "  m.gguf\n")
    assert found_for(path, model_sha256=digest).required_sha256 == digest


@pytest.mark.parametrize(
    ("make", "reason"),
    [(os.mkdir, "Is a directory"), (os.mkfifo, "it is not a plain file")],
)
def test_sha256sums_that_cannot_be_read_is_a_sentence(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    path, sums = tmp_path / "m.gguf", tmp_path / "SHA256SUMS"
    write_sound(path)
    make(sums)
    with pytest.raises(es.StartupError, match=f"^{sums} cannot be read: {reason}$"):
        found_for(path)


def test_prompts_that_are_a_fifo_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config_sentence_transformers.json")
    stream = io.StringIO()
    log = es.Log("info", "text", stream)
    assert es.prompts_beside(str(tmp_path / "m.gguf"), log) == ({}, "")
    assert "warning prompts not read" in stream.getvalue()


def test_a_file_that_must_have_a_checksum_must_be_there(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    says = f"^{path} cannot be read: it does not exist$"
    with pytest.raises(es.StartupError, match=says):
        found_for(path, model_sha256="0" * 64)
    (tmp_path / "SHA256SUMS").write_text("0" * 64 + "  m.gguf\n")
    with pytest.raises(es.StartupError, match=says):
        found_for(path)


def test_a_file_put_there_after_the_check_is_not_the_one_loaded(tmp_path: Path) -> None:
    path, other = tmp_path / "m.gguf", tmp_path / "other"
    digest = write_sound(path)
    other.write_bytes(b"other")
    with es.checked_model(str(path), digest) as ((usable,), header):
        assert header.values.items() >= VALUES.items()
        os.replace(other, path)
        assert path.read_bytes() == b"other"
        loaded = Path(usable).read_bytes()
    assert hashlib.sha256(loaded).hexdigest() == digest


def test_what_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    missing, folder = str(tmp_path / "none.gguf"), str(tmp_path)
    for path, says in ((missing, "No such file"), (folder, "Is a directory")):
        with (
            pytest.raises(es.StartupError, match=f"{path} cannot be read: {says}"),
            es.checked_model(path, ""),
        ):
            pytest.fail("usable")


def split(
    folder: Path, make: Callable[[Path], Path] = models.tiny_bert, count: int = 2
) -> list[Path]:
    """A tiny model as several files, as llama.cpp's gguf-split names them."""
    sound = mutants.parts_of(make(folder).read_bytes())
    paths, every = [], sound.tensors
    borders = [len(every) * n // count for n in range(count + 1)]
    for n, (begin, end) in enumerate(itertools.pairwise(borders)):
        first = every[begin].offset
        last = every[end].offset if end < len(every) else len(sound.data)
        moved = [replace(t, offset=t.offset - first) for t in every[begin:end]]
        entries = (
            *(sound.entries if n == 0 else (ARCHITECTURE,)),
            number(b"split.no", n, "H"),
            number(b"split.count", count, "H"),
            number(b"split.tensors.count", len(every), "i"),
        )
        path = folder / f"m-{n + 1:05}-of-{count:05}.gguf"
        path.write_bytes(Gguf(entries, tuple(moved), sound.data[first:last]).pack())
        paths.append(path)
    return paths


@pytest.mark.parametrize("count", [2, 3])
def test_a_split_model_is_the_whole_one(tmp_path: Path, count: int) -> None:
    paths = split(tmp_path, count=count)
    assert agrees_with_the_gguf_package(paths[0])["split.count"] == count
    with es.checked_model(str(paths[0]), "") as (usable, _):
        assert [Path(u).read_bytes() for u in usable] == [p.read_bytes() for p in paths]
    whole = numbers_of(models.tiny_bert(tmp_path))
    np.testing.assert_array_equal(numbers_of(paths[0]), whole)


def test_every_part_counts_for_memory_and_for_whether_a_model_has_changed(
    tmp_path: Path,
) -> None:
    first, second = split(tmp_path)
    whole = kit.needed_bytes(kit.settings(), str(models.tiny_bert(tmp_path)))
    assert abs(kit.needed_bytes(kit.settings(), str(first)) - whole) < 1024
    before = es.file_stamp(*es.part_paths(str(first)))
    os.utime(second)
    assert es.file_stamp(*es.part_paths(str(first))) != before


def test_a_split_reranker_may_have_its_head_in_another_part(tmp_path: Path) -> None:
    path = split(tmp_path, models.tiny_cross_encoder)[0]
    names = [tensor.name for tensor in gguf.GGUFReader(path).tensors]
    assert "cls.output.weight" not in names, "the claim would say nothing"
    engine = es.Engine(str(path), es.ModelSettings(), kit.quiet_log())
    assert engine.card.n_scores == 1
    engine.close()


def test_a_split_model_is_named_by_its_first_part(tmp_path: Path) -> None:
    first, second, third = split(tmp_path, count=3)
    for path, said in ((second, "part 2 of 3"), (third, "part 3 of 3")):
        says = f"^{path} is {said} of a split model: name the first part, {first}$"
        with (
            pytest.raises(es.StartupError, match=says),
            es.checked_model(str(path), ""),
        ):
            pytest.fail("usable")


def test_a_part_that_is_missing_is_a_sentence(tmp_path: Path) -> None:
    first, second, _ = split(tmp_path, count=3)
    second.unlink()
    says = (
        f"^{first} is one of 3 parts, of which 2 exist here: all must be in one folder"
    )
    with pytest.raises(es.StartupError, match=says), es.checked_model(str(first), ""):
        pytest.fail("usable")


def test_every_part_is_checked_before_llama_cpp_sees_it(tmp_path: Path) -> None:
    first, second = split(tmp_path)
    whole = second.read_bytes()
    sound = mutants.parts_of(whole)
    no, count, tensors = sound.entries[1:]
    damaged = {
        "does not begin with GGUF": b"GGML" + whole[4:],
        "ends beyond the end of the file": whole[:-1],
        "split.no is None instead of 1": replace(
            sound, entries=(ARCHITECTURE, count, tensors)
        ).pack(),
        "split.no has type 4": replace(
            sound, entries=(ARCHITECTURE, replace(no, kind=4, value=bytes(4)))
        ).pack(),
        "split.no is 0 instead of 1": first.read_bytes(),
        "has the shape": replace(
            sound, tensors=(replace(sound.tensors[0], shape=(0,)),)
        ).pack(),
    }
    for says, raw in damaged.items():
        second.write_bytes(raw)
        with pytest.raises(
            es.StartupError, match=f"^{second} is not a valid"
        ) as caught:
            es.Engine(str(first), es.ModelSettings(), kit.quiet_log())
        assert says in str(caught.value)


def test_the_checksum_of_a_split_model_is_that_of_all_parts_in_a_row(
    tmp_path: Path,
) -> None:
    first, second = split(tmp_path)
    digest = hashlib.sha256(first.read_bytes() + second.read_bytes()).hexdigest()
    found = found_for(first, model_sha256=digest)
    assert (found.sha256, found.required_sha256) == (digest, digest)
    options = es.ModelSettings()
    es.Engine(str(first), options, kit.quiet_log(), digest).close()
    raw = bytearray(second.read_bytes())
    raw[-1] ^= 1  # of the weights
    second.write_bytes(raw)
    with pytest.raises(es.StartupError, match=f"^{first} has sha256 .* must have"):
        found_for(first, model_sha256=digest)
    with pytest.raises(es.StartupError, match=f"^{first} has sha256 .* must have"):
        es.Engine(str(first), options, kit.quiet_log(), digest)


def test_sha256sums_counts_for_each_part_that_it_names(tmp_path: Path) -> None:
    first, second = split(tmp_path)
    sums = (
        f"{es.sha256_of(first)}  {first.name}\n{es.sha256_of(second)}  {second.name}\n"
    )
    (tmp_path / "SHA256SUMS").write_text(sums)
    whole = es.sha256_of(first, second)
    assert found_for(first).required_sha256 == whole, "what was seen is what is loaded"
    second.write_bytes(second.read_bytes() + b"more")
    with pytest.raises(es.StartupError, match=f"^{second} has sha256 "):
        found_for(first)


@pytest.mark.parametrize("count", [0, 1, 2, 100])
@pytest.mark.parametrize("form", "BbHhIiQq")
def test_a_split_count_of_any_type_is_one(
    tmp_path: Path, form: str, count: int
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(with_entry(number(b"split.count", count, form)).pack())
    if count > 1:
        says = f"^{path} is one of {count} parts, of which 1 exist here: all must be in one folder"
        with pytest.raises(es.StartupError, match=says):
            es.Engine(str(path), es.ModelSettings(), kit.quiet_log())
    else:
        with es.checked_model(str(path), "") as (usable, _):
            assert [Path(each).read_bytes() for each in usable] == [path.read_bytes()]


def test_a_split_count_that_is_no_number_is_a_sentence(tmp_path: Path) -> None:
    sound = mutants.parts_of(models.tiny_bert(tmp_path).read_bytes())
    path = tmp_path / "m.gguf"
    for told in (Entry(b"split.count", TEXT, text(b"two")), array(4, 0)):
        entries = (*sound.entries, replace(told, name=b"split.count"))
        path.write_bytes(replace(sound, entries=entries).pack())
        with pytest.raises(es.StartupError, match=str(path)):
            es.Engine(str(path), es.ModelSettings(), kit.quiet_log())


# --- on the real llama.cpp ---

# Each day the first ones, in the long sweep all of them.
SEEDS = 1000
each_sweep = pytest.mark.parametrize(
    "seeds",
    [
        pytest.param(range(SEEDS // 8), id="some"),
        pytest.param(range(SEEDS // 8, SEEDS), id="all", marks=pytest.mark.heavy),
    ],
)


def test_a_mutant_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    raw = models.tiny_bert(tmp_path).read_bytes()
    sound = mutants.parts_of(raw)
    assert sound.pack() == raw
    for seed in range(200):
        made, what = mutants.mutant(sound, seed)
        assert (made, what) == mutants.mutant(sound, seed)
        assert what


def with_weights_of(sound: Gguf, name: bytes, kind: int) -> Gguf:
    """The same with one tensor, now f32 or f16, of 16 bits of this type."""
    tensors, data = [], b""
    for tensor in sound.tensors:
        assert tensor.kind in (0, 1)
        count = math.prod(tensor.shape)
        raw = sound.data[tensor.offset :][: count * (4 >> tensor.kind)]
        if tensor.name == name:
            raw, tensor = bytes(count * 2), replace(tensor, kind=kind)
        tensors.append(replace(tensor, offset=len(data)))
        data += raw + bytes(-len(raw) % mutants.ALIGNMENT)
    return replace(sound, tensors=tuple(tensors), data=data)


@pytest.fixture(scope="module")
def child() -> Iterator[mutants.Child]:
    """A process that loads what may end it."""
    made = mutants.Child()
    yield made
    made.end()


@pytest.mark.parametrize("kind", [1, 30], ids=["f16", "bf16"])
@pytest.mark.parametrize("model", KINDS)
def test_no_tensor_of_16_bits_ends_llama_cpp_and_each_matrix_is_served(
    tmp_path: Path, child: mutants.Child, model: str, kind: int
) -> None:
    sound = mutants.parts_of(KINDS[model](tmp_path).read_bytes())
    path = tmp_path / "m.gguf"
    for tensor in sound.tensors:
        path.write_bytes(with_weights_of(sound, tensor.name, kind).pack())
        how, says = child.load(path)
        assert how in mutants.SOUND_ENDINGS, (tensor, says)
        # Of zeros: a decoder has no vector then, which the engine says.
        if tensor.kind == 1 and says != f"{path} gives vectors that are not numbers":
            assert how == "served", (tensor, says)


@each_sweep
@pytest.mark.parametrize("kind", mutants.KINDS)
def test_a_damaged_model_is_refused_or_served(
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    kind: str,
    seeds: range,
) -> None:
    found = list(mutants.endings(seeds, tmp_path, kind=kind))
    counts = mutants.counted(found)
    record_property("mutants", counts)
    print(counts)
    assert counts["refused by the check"] > len(seeds) // 4
    assert counts["served"]
    for ending in found:
        assert ending.how in mutants.SOUND_ENDINGS, ending


@each_sweep
def test_a_damaged_second_part_is_refused_or_served(
    tmp_path: Path, child: mutants.Child, seeds: range
) -> None:
    first, second = split(tmp_path)
    sound = mutants.parts_of(second.read_bytes())
    for seed in seeds:
        raw, what = mutants.mutant(sound, seed)
        second.write_bytes(raw)
        how, says = child.load(first)
        assert how in mutants.SOUND_ENDINGS, (seed, what, says)


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("nomic-embed-text-v1.5", True),
        ("Nomic Embed Text v1.5", True),
        ("nomic-embed-text-v1", False),
        ("nomic-embed-text-v2-moe", False),
        ("snowflake-arctic-embed-m-long", False),
        ((), False),
    ],
)
def test_one_models_vectors_get_a_layer_norm_before_they_are_cut(
    name: object, norms: bool
) -> None:
    header = es.GgufHeader("nomic-bert", {"general.name": name})
    assert header.norms_before_cut == norms
