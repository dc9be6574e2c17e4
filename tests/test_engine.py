"""Room ENGINE: llama.cpp, asked with models small enough to be made here.

The models have random weights and a few kilobytes: a BERT, which is an encoder, and a
llama, which decodes and keeps a memory between calls. What llama.cpp has
no answer to must be an exception here, so some are run in a process of their own.
"""

from __future__ import annotations

import functools
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import kit
from tests import models as models_of

# --- the small models ---

WIDTH, INNER, HEADS, TRAINED = 32, 64, 4, 64
LETTERS = "abcdefghij"
SQUARE, UP, DOWN = (WIDTH, WIDTH), (INNER, WIDTH), (WIDTH, INNER)
BERT_MATRICES = {
    **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), SQUARE),
    "ffn_up": UP,
    "ffn_down": DOWN,
}
BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def written(
    path: Path, trained: int, architecture: str, fill: Callable[[gguf.GGUFWriter], None]
) -> Path:
    """A GGUF of one layer."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(trained)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_matrices(writer: gguf.GGUFWriter, shapes: dict[str, tuple[int, int]]) -> None:
    chance = np.random.default_rng(1)
    for name, shape in shapes.items():
        values = chance.standard_normal(shape).astype(np.float32) * 0.3
        writer.add_tensor(f"{name}.weight", values)


def add_vectors(writer: gguf.GGUFWriter, value: float, *names: str) -> None:
    for name in names:
        length = INNER if "ffn_up" in name else WIDTH
        writer.add_tensor(name, np.full(length, value, np.float32))


def bert(
    path: Path,
    letters: str = LETTERS,
    *,
    trained: int = TRAINED,
    lowercase: bool | None = None,
) -> Path:
    """An encoder that knows ten letters."""

    def fill(writer: gguf.GGUFWriter) -> None:
        tokens = [*BERT_SPECIALS, *("\u2581" + c for c in letters), *letters]
        writer.add_layer_norm_eps(1e-12)
        writer.add_causal_attention(False)
        writer.add_pooling_type(gguf.PoolingType.MEAN)
        writer.add_tokenizer_model("bert")
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 5 + [1] * (len(tokens) - 5))
        writer.add_token_type_count(2)
        writer.add_pad_token_id(0)
        writer.add_unk_token_id(1)
        writer.add_bos_token_id(2)
        writer.add_sep_token_id(3)
        if lowercase is not None:
            writer.add_bool("tokenizer.ggml.normalizer.lowercase", lowercase)
        block = {"blk.0." + name: shape for name, shape in BERT_MATRICES.items()}
        embeddings = {"token_embd": len(tokens), "position_embd": trained}
        embeddings["token_types"] = 2
        shapes = {name: (rows, WIDTH) for name, rows in embeddings.items()}
        add_matrices(writer, shapes | block)
        norms = ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm")
        add_vectors(writer, 1, *(norm + ".weight" for norm in norms))
        add_vectors(writer, 0, *(name + ".bias" for name in (*norms, *block)))

    return written(path, trained, "bert", fill)


def byte_chars() -> list[str]:
    """The 256 characters that stand for bytes in a GPT-2 vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def add_bpe(writer: gguf.GGUFWriter) -> int:
    """A token is a byte, but for "xx"; the end is marked, the beginning is not."""
    tokens = [*byte_chars(), "xx", "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")  # split by llama.cpp's general way
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["x x"])
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(True)
    return len(tokens)


def add_spm(writer: gguf.GGUFWriter) -> int:
    """Ten letters and bytes; both ends are marked."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["\u2581", *LETTERS]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-1.0] * 11)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 11)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    return len(tokens)


def llama(
    path: Path,
    add_vocabulary: Callable[[gguf.GGUFWriter], int],
    pooling: gguf.PoolingType | None = gguf.PoolingType.LAST,
    *,
    trained: int = TRAINED,
    norm: float = 1,
) -> Path:
    """A causal decoder. ``norm`` multiplies what goes into each layer."""

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_head_count_kv(HEADS)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_dimension_count(WIDTH // HEADS)
        if pooling is not None:
            writer.add_pooling_type(pooling)
        shapes = {"token_embd": (add_vocabulary(writer), WIDTH)}
        matrices = BERT_MATRICES | {"ffn_gate": UP}
        shapes |= {"blk.0." + name: shape for name, shape in matrices.items()}
        add_matrices(writer, shapes)
        norms = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
        add_vectors(writer, norm, *(name + ".weight" for name in norms))

    return written(path, trained, "llama", fill)


@dataclass
class ModelPaths:
    """Paths."""

    bert: Path
    bpe: Path
    spm: Path
    unpooled: Path


NAMES = ("bert", "bpe", "spm")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelPaths:
    folder = tmp_path_factory.mktemp("models")
    return ModelPaths(
        bert=bert(folder / "bert.gguf"),
        bpe=llama(folder / "bpe.gguf", add_bpe),
        spm=llama(folder / "spm.gguf", add_spm),
        unpooled=llama(folder / "unpooled.gguf", add_spm, pooling=None),
    )


@contextmanager
def loaded(path: Path, **options: Any) -> Iterator[es.Engine]:
    engine = es.Engine(str(path), es.ModelSettings(**options), kit.quiet_log())
    yield engine
    engine.close()


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[tuple[es.ModelCard, Any]]:
    """A model's card and what embeds lists of ids in one call."""
    with loaded(path, **options) as engine:
        context = engine.new_context()

        def embed(*inputs: list[int]) -> Any:
            rows = context.embed([np.array(ids, np.int32) for ids in inputs])
            return kit.units(rows)

        yield engine.card, embed
        context.close()


def refusal(path: Path, **options: Any) -> str:
    """What is said of a model that cannot be served."""
    with pytest.raises(es.StartupError) as caught, loaded(path, **options):
        pytest.fail("loaded")
    return str(caught.value)


def run_python(code: str, *arguments: object) -> None:
    """In a process of its own, for what would take the tests with it."""
    head = (
        "import sys, threading\nimport embellama_server as es\nfrom tests import kit\n"
    )
    subprocess.run(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        cwd=kit.ROOT,
        check=True,
        timeout=kit.DEADLINE_S,
    )


# --- small models, really computed ---


def test_the_card_says_what_the_file_says(models: ModelPaths) -> None:
    cards = {}
    for name in NAMES:
        with loaded(getattr(models, name)) as engine:
            cards[name] = engine.card
    for card in cards.values():
        assert (card.n_embd, card.trained_tokens, card.max_input_tokens) == (
            *(WIDTH, TRAINED, TRAINED),
        )
        assert card.context_tokens == 256
    assert cards["bert"].architecture == "bert"
    pooled = [cards[name].pooling for name in NAMES]
    assert pooled == ["mean", "last", "last"]
    special = [(cards[name].prefix, cards[name].suffix) for name in NAMES]
    assert special == [((2,), (3,)), ((), (257,)), ((1,), (2,))]
    kinds = [cards[name].tokenizer for name in NAMES]
    assert kinds == ["WordPiece", "BPE", "SentencePiece"]


def test_an_exact_call_has_one_input(models: ModelPaths) -> None:
    for options, most in (
        ({}, 64),
        ({"max_batch_requests": 5}, 5),
        ({"exact": True}, 1),
    ):
        with loaded(models.bert, batch_tokens=64, **options) as engine:
            assert engine.card.batch_inputs == most


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_gives_each_input_the_vector_it_has_alone(
    models: ModelPaths, name: str
) -> None:
    chance = np.random.default_rng(2)
    with opened(getattr(models, name)) as (card, embed):
        lengths = [1, 2, 1, TRAINED, 17, 3, 40, 5, TRAINED, 1]
        lengths.append(card.context_tokens - sum(lengths))
        assert sum(lengths) == card.context_tokens, "exactly at capacity"
        inputs = [chance.integers(5, card.n_vocab, n).tolist() for n in lengths]
        together = embed(*inputs)
        singly = np.concatenate([embed(ids) for ids in inputs])
        assert np.isfinite(together).all()
        assert np.einsum("ij,ij->i", together, singly).min() >= 0.9999
        # Without this, a model that gives one vector for everything would do.
        apart = together @ together.T - np.eye(len(inputs))
        assert apart[np.ix_(range(3, 9), range(3, 9))].max() < 0.9999


@pytest.mark.parametrize("name", NAMES)
def test_as_many_inputs_as_the_card_says_fit_into_one_call(
    models: ModelPaths, name: str
) -> None:
    with opened(getattr(models, name)) as (card, embed):
        inputs = [[5 + n % 16] for n in range(card.batch_inputs)]
        vectors = embed(*inputs)
        assert np.einsum("ij,ij->i", vectors[:16], vectors[16:32]).min() >= 0.9999


@pytest.mark.parametrize("name", NAMES)
def test_calls_leave_nothing_behind_that_changes_the_next(
    models: ModelPaths, name: str
) -> None:
    with opened(getattr(models, name)) as (_, embed):
        before = embed([5, 6, 7])
        embed(*[[9] * 20] * 10)
        np.testing.assert_array_equal(embed([5, 6, 7]), before)


@pytest.mark.parametrize("name", NAMES)
def test_what_no_context_can_take_is_an_engine_error_and_work_goes_on(
    models: ModelPaths, name: str
) -> None:
    with opened(getattr(models, name)) as (card, embed):
        expected = embed([5, 6])
        too_many = [[5] * TRAINED] * 4 + [[5]]
        assert sum(map(len, too_many)) == card.context_tokens + 1
        for inputs in (too_many, [[5], []], [[card.n_vocab]], [[-1]]):
            with pytest.raises(es.EngineError):
                embed(*inputs)
        np.testing.assert_array_equal(embed([5, 6]), expected)


def test_a_decoder_reads_the_final_token(models: ModelPaths) -> None:
    # Its vector is the last token's: Llama.embed() of llama-cpp-python drops it.
    with opened(models.spm) as (card, embed):
        long = es.truncated(
            es.with_special_tokens([260] * 99, card), card.max_input_tokens, 1, 1
        )
        assert len(long) == card.max_input_tokens
        assert long[-1] == 2
        one, other = embed(long, [*long[:-1], 260])
        assert one @ other < 0.9999


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, suppress_health_check=[HealthCheck.differing_executors])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
@example(text="~")
@example(text="\U0001f600")
def test_no_tokenizer_needs_more_room_than_is_reserved(
    engines: dict[str, es.Engine], name: str, text: str
) -> None:
    engine = engines[name]
    ids = es.with_special_tokens(engine.tokenizer.encode(text), engine.card)
    # What is longer than the model can read is refused or cut.
    assert min(len(ids), TRAINED) <= kit.token_bound(text, engine.card)


@pytest.fixture(scope="module")
def engines(models: ModelPaths) -> Iterator[dict[str, es.Engine]]:
    with loaded(models.bert) as a, loaded(models.bpe) as b, loaded(models.spm) as c:
        yield dict(zip(NAMES, (a, b, c), strict=True))


@pytest.mark.parametrize(
    ("letters", "lowercase", "is_cased"),
    [
        ("ab", None, False),
        ("abAB", None, True),
        ("abAB", True, False),
        ("ab", False, True),
    ],
)
def test_a_vocabulary_is_cased_when_the_file_says_so_or_has_capitals(
    tmp_path: Path, letters: str, lowercase: bool | None, is_cased: bool
) -> None:
    path = bert(tmp_path / "cased.gguf", letters, lowercase=lowercase)
    with loaded(path) as engine:
        assert (
            engine.tokenizer.encode("AB") != engine.tokenizer.encode("ab")
        ) is is_cased


# --- tokens, and back ---


@pytest.mark.parametrize("name", ["bpe", "spm"])
@settings(max_examples=100, suppress_health_check=[HealthCheck.differing_executors])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@example(text=" leading, and  two ")
@example(text="\U0001f600 \u4e16\u0301")
def test_a_texts_tokens_say_the_text_again(
    engines: dict[str, es.Engine], name: str, text: str
) -> None:
    engine = engines[name]
    if "\0" in text or any(mark in text for mark in ("<end>", "<s>", "</s>", "<unk>")):
        return
    said = engine.tokenizer.decode(engine.tokenizer.encode(text), with_special=False)
    assert said.removeprefix(" ") == text.removeprefix(" ")


def test_a_wordpiece_says_words_again(engines: dict[str, es.Engine]) -> None:
    engine = engines["bert"]
    for text in ("abc", "a b", "ab ba"):
        said = engine.tokenizer.decode(
            engine.tokenizer.encode(text), with_special=False
        )
        assert said.strip() == text


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_have_names_that_are_left_out_unless_asked_for(
    engines: dict[str, es.Engine], name: str
) -> None:
    engine = engines[name]
    card = engine.card
    own = engine.tokenizer.encode("abc")
    ids = es.with_special_tokens(own, card)
    special = [*card.prefix, *card.suffix]
    assert special, "the claim would say nothing"
    bare = engine.tokenizer.decode(own, with_special=False).strip()
    assert engine.tokenizer.decode(ids, with_special=False).strip() == bare
    whole = engine.tokenizer.decode(ids, with_special=True)
    for piece in engine.tokenizer.pieces(special):
        assert piece
        assert piece in whole
        assert piece not in bare


@pytest.mark.parametrize("name", NAMES)
def test_every_token_has_a_piece(engines: dict[str, es.Engine], name: str) -> None:
    engine = engines[name]
    every = range(engine.card.n_vocab)
    pieces = engine.tokenizer.pieces(every)
    assert len(pieces) == len(every)
    assert engine.tokenizer.pieces([]) == []
    assert engine.tokenizer.decode([], with_special=True) == ""
    assert len(engine.tokenizer.decode(list(every) * 50, with_special=True)) > len(
        every
    )


def test_pieces_together_are_the_text(engines: dict[str, es.Engine]) -> None:
    engine = engines["bpe"]
    text = "xxx is (not) 42"
    assert "".join(engine.tokenizer.pieces(engine.tokenizer.encode(text))) == text


def test_tokens_with_long_texts_get_the_room_they_need(tmp_path: Path) -> None:
    # 16 bytes a token are what is tried first.
    path = models_of.long_context_bert(tmp_path, words=["w" * 100])
    with loaded(path) as engine:
        (token,) = engine.tokenizer.encode("w" * 100)
        said = engine.tokenizer.decode([token] * 30, with_special=False)
        assert said.split() == ["w" * 100] * 30
        assert engine.tokenizer.pieces([token])[0].strip() == "w" * 100


LONG_INPUTS = """
import numpy as np
common, is_long = int(sys.argv[2]), bool(int(sys.argv[3]))
options = es.ModelSettings(common_tokens=common)
engine = es.Engine(sys.argv[1], options, kit.quiet_log())
assert engine.card.max_input_tokens == 1024
assert engine.card.context_tokens == common
context = engine.new_context(needs_long_context=is_long)
chance = np.random.default_rng(4)
long = chance.integers(5, engine.card.n_vocab, 1024).astype(np.int32)
one, again = (es.normalised(context.embed([long])[0]) for _ in range(2))
parts = [long[:700]] if is_long else [long[:700], long[:300]]
assert es.normalised(context.embed(parts)[0]) @ one < 0.9999
assert again @ one >= 0.9999
"""


@pytest.mark.parametrize(("common", "needs_long_context"), [(1024, 0), (512, 1)])
@pytest.mark.parametrize(
    "make", [bert, functools.partial(llama, add_vocabulary=add_spm)]
)
def test_an_input_may_fill_a_whole_call_of_any_size(
    tmp_path: Path, make: Callable[..., Path], common: int, needs_long_context: int
) -> None:
    # More than llama.cpp's own n_ubatch (512), and than a decoder's share of memory were
    # it split among 256 inputs.
    path = make(tmp_path / "long.gguf", trained=1024)
    run_python(LONG_INPUTS, path, common, needs_long_context)


ODD_SIZES = """
import numpy as np
chance = np.random.default_rng(5)

def try_out(**sizes):
    options = es.ModelSettings(**sizes)
    print(options, file=sys.stderr, flush=True)  # if this is the end of the process
    engine = es.Engine(sys.argv[1], options, kit.quiet_log())
    card = engine.card
    assert card.max_input_tokens == (options.max_input_tokens or 511)
    long_context, context = engine.new_context(needs_long_context=True), engine.new_context()
    whole = [min(card.max_input_tokens, card.context_tokens)]
    full = [1] * min(card.batch_inputs, options.batch_tokens)
    full[0] += options.batch_tokens - len(full)
    for used, sizes in ((long_context, [card.max_input_tokens]), (context, whole), (context, full)):
        inputs = [chance.integers(5, card.n_vocab, n, np.int32) for n in sizes]
        assert np.isfinite(used.embed(inputs)).all()
    for used in (long_context, context):
        used.close()
    engine.close()

for longest in (0, 300, 63, 7):
    for batch_tokens in (256, 64, 63, 7):
        try_out(max_input_tokens=longest, batch_tokens=batch_tokens)
for _ in range(30):
    longest, batch, common = map(int, chance.integers(3, 511, 3))
    try_out(max_input_tokens=longest, batch_tokens=batch, common_tokens=common)
"""


@pytest.mark.parametrize(
    "make", [bert, functools.partial(llama, add_vocabulary=add_spm)]
)
def test_sizes_need_be_multiples_of_nothing(
    tmp_path: Path, make: Callable[..., Path]
) -> None:
    # llama.cpp wants the tokens of a context to be a multiple of its sequences.
    run_python(ODD_SIZES, make(tmp_path / "odd.gguf", trained=511))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, 256, id="a batch, when all inputs are shorter"),
        pytest.param({"batch_tokens": 16}, TRAINED, id="the longest input"),
        pytest.param(
            {"batch_tokens": 16, "common_tokens": 40}, 40, id="or a common one"
        ),
        pytest.param(
            {"batch_tokens": 48, "common_tokens": 40}, 48, id="never below a batch"
        ),
        pytest.param({"batch_tokens": 16, "max_input_tokens": 20}, 20, id="limited"),
    ],
)
def test_a_workers_context_holds(
    models: ModelPaths, options: dict[str, int], expected: int
) -> None:
    with loaded(models.bert, **options) as engine:
        assert engine.card.context_tokens == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_long_context_holds_what_is_too_long_for_a_workers_context(
    models: ModelPaths, name: str
) -> None:
    longest = np.arange(5, 5 + TRAINED, dtype=np.int32) % 20 + 5
    with loaded(getattr(models, name)) as engine:
        context = engine.new_context()
        expected = context.embed([longest])
        short = kit.units(context.embed([longest[:9]]))
        context.close()
    with loaded(getattr(models, name), batch_tokens=16, common_tokens=40) as engine:
        context, long_context = (
            engine.new_context(),
            engine.new_context(needs_long_context=True),
        )
        with pytest.raises(es.EngineError):
            context.embed([longest])
        np.testing.assert_allclose(long_context.embed([longest]), expected, atol=1e-4)
        # Neither harms the other, nor the model.
        for used in (context, long_context):
            found = kit.units(used.embed([longest[:9]]))
            assert (found * short).sum() > 0.9999
            used.close()


# --- what cannot be served ---


def test_a_decoder_without_pooling_generates_unless_told_how_to_embed(
    models: ModelPaths,
) -> None:
    with loaded(models.unpooled) as engine:
        card = engine.card
        assert (card.kind, card.pooling, card.max_input_tokens) == (
            *("generate", "none", TRAINED),
        )
    with opened(models.unpooled, pooling="last") as (card, embed):
        assert card.pooling == "last"
        vector = embed([1, 260, 261])
    with opened(models.spm) as (_, embed):
        np.testing.assert_array_equal(embed([1, 260, 261]), vector)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"context_size": TRAINED + 1}, ["context_size", "65", "64"]),
        ({"max_input_tokens": TRAINED + 1}, ["max_input_tokens", "65", "64"]),
        (
            {"context_size": 32, "max_input_tokens": 33},
            ["max_input_tokens", "33", "32"],
        ),
        ({"max_input_tokens": 2}, ["max_input_tokens", "2"]),
        ({"context_size": 2}, ["max_input_tokens", "2"]),
    ],
)
def test_sizes_the_model_cannot_have_are_refused(
    models: ModelPaths, options: dict[str, int], names: list[str]
) -> None:
    said = refusal(models.bert, **options)
    assert all(name in said for name in names)


def test_sizes_may_be_as_small_as_one_token_of_text(models: ModelPaths) -> None:
    for options in ({"max_input_tokens": 3}, {"context_size": 3}):
        with opened(models.bert, batch_tokens=16, **options) as (card, embed):
            assert (card.max_input_tokens, card.context_tokens) == (3, 16)
            assert np.isfinite(embed([2, 5, 3])).all()


def test_a_model_that_computes_no_numbers_is_refused(tmp_path: Path) -> None:
    path = llama(tmp_path / "nan.gguf", add_spm, norm=float("nan"))
    assert "not numbers" in refusal(path)


def test_a_path_may_hold_any_byte(models: ModelPaths, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff\xe4 m.gguf")
    try:
        path.symlink_to(models.bert)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    with loaded(path) as engine:
        assert engine.card.architecture == "bert"


def test_a_gpu_that_is_not_there_is_refused(models: ModelPaths) -> None:
    if es._llama_cpp().llama_supports_gpu_offload():
        pytest.skip("there is one")
    assert "--gpu" in refusal(models.bert, gpu_layers=-1)


def test_without_a_gpu_asked_for_no_device_is_touched(
    models: ModelPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = es._llama_cpp()
    given: list[Any] = []

    def noting(name: str, at: int) -> None:
        real = getattr(library, name)

        def call(*arguments: Any) -> Any:
            given.append(arguments[at])
            return real(*arguments)

        monkeypatch.setattr(library, name, call)

    noting("llama_model_load_from_splits", 2)
    noting("llama_init_from_model", 1)
    monkeypatch.setattr(es, "_llama_cpp", lambda: library)
    with loaded(models.bert) as engine:
        engine.new_context().close()
    model, *contexts = given
    assert model.split_mode == library.LLAMA_SPLIT_MODE_NONE
    assert (model.main_gpu, model.n_gpu_layers, len(contexts)) == (-1, 0, 4)
    for context in contexts:
        assert not context.op_offload
        assert not context.offload_kqv


@pytest.mark.parametrize("cut", [4, 100, 5000, -1], ids="{} bytes".format)
def test_a_file_that_ends_early_is_refused_in_a_sentence(
    models: ModelPaths, tmp_path: Path, cut: int
) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(models.bert.read_bytes()[:cut])
    said = refusal(path)
    assert said.startswith(f"{path} is not a valid GGUF file: ")
    assert "\n" not in said


@pytest.mark.parametrize("seed", range(3))
def test_a_file_of_garbage_is_refused_in_a_sentence(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "garbage.gguf"
    path.write_bytes(es.GGUF_MAGIC + np.random.default_rng(seed).bytes(5000))
    said = refusal(path)
    assert said.startswith(f"{path} is not a valid GGUF file: ")
    assert "\n" not in said


def test_a_sound_file_that_llama_cpp_refuses_is_refused_with_its_reason(
    tmp_path: Path,
) -> None:
    path = tmp_path / "unknown.gguf"
    architecture = es._gguf_field("general.architecture", "nonsense")
    path.write_bytes(struct.pack("<4sIQQ", es.GGUF_MAGIC, 3, 0, 1) + architecture)
    said = refusal(path)
    assert said.startswith(f"{path}: llama.cpp cannot load it: ")
    assert "nonsense" in said
    assert "\n" not in said


# --- what could end the process ---


SMALL_STACK = """
engine = es.Engine(sys.argv[1], es.ModelSettings(), kit.quiet_log())
size = 2_000
counts = []
def tokenize():
    for piece in ("x", "X", " ", "1", "\\n", "'", "\\u4e2d", "x1", " \\n"):
        counts.append(len(engine.tokenizer.encode((piece * size)[:size])))
share = es.TOKENIZER_STACK_BYTES // es.MAX_TOKENIZER_CHARS
threading.stack_size(size * share // 4096 * 4096)
thread = threading.Thread(target=tokenize)
thread.start()
thread.join()
assert len(counts) == 9 and all(counts)
"""


def test_a_tokenizer_has_stack_enough_for_each_character(models: ModelPaths) -> None:
    # Texts that any stack has room for, on one as small as our limit makes their share.
    run_python(SMALL_STACK, models.bpe)


def test_only_our_own_tokenizer_reads_texts_of_any_length(
    engines: dict[str, es.Engine],
) -> None:
    most = {name: engine.card.max_chars for name, engine in engines.items()}
    limit = es.MAX_TOKENIZER_CHARS
    assert most == {"bert": sys.maxsize, "bpe": limit, "spm": limit}


AFTER_A_FAILED_LOAD = """
engine = es.Engine(sys.argv[1], es.ModelSettings(), kit.quiet_log())
try:
    es.Engine(sys.argv[2], es.ModelSettings(), kit.quiet_log())
except es.StartupError:
    pass
else:
    sys.exit("loaded garbage")
for _ in range(20):
    engine.new_context().close()
"""


def test_a_load_that_failed_does_not_take_the_log_sink_with_it(
    models: ModelPaths, tmp_path: Path
) -> None:
    # llama.cpp has one sink a process and goes on calling it: it must never be freed.
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(es.GGUF_MAGIC + bytes(100))
    run_python(AFTER_A_FAILED_LOAD, models.bert, garbage)


# --- what is let go of ---

MAPPINGS = """
def mappings(path):
    with open("/proc/self/maps") as maps:
        return sum(line.rstrip().endswith(str(path)) for line in maps)
"""
LET_GO = (
    MAPPINGS
    + """
import gc, weakref
from pathlib import Path
from tests import models

path = models.tiny_bert(Path(sys.argv[1]))
loaded = weakref.WeakSet()
real = es.Engine.__init__
def noted(self, *arguments):
    loaded.add(self)
    real(self, *arguments)
es.Engine.__init__ = noted

def refused(**options):
    try:
        es.Engine(str(path), es.ModelSettings(**options), kit.quiet_log())
    except es.StartupError as error:
        return str(error)
    sys.exit("loaded")

def failing(name, owner=es.Context):
    whole = getattr(owner, name)
    def fails(*_, **__):
        raise es.EngineError("no room")
    setattr(owner, name, fails)
    return lambda: setattr(owner, name, whole)

for _ in range(3):
    engine = es.Engine(str(path), es.ModelSettings(), kit.quiet_log())
    engine.new_context().close()
    assert mappings(path)
    places = ("make_room", es.Context), ("_give_back_logits", es.Context)
    for name, owner in (*places, ("__init__", es.TokenBatch)):
        undo = failing(name, owner)
        try:
            engine.new_context()
        except (es.StartupError, es.EngineError):
            pass
        else:
            sys.exit("made")
        undo()
    engine.close()
    assert "no classification head" in refused(pooling="rank")
    assert "was trained for" in refused(context_size=4096)
    undo = failing("embed")
    assert "cannot compute" in refused()
    undo()
    del engine
    gc.collect()
    assert not list(loaded), "an engine that is closed, or never was one, lives on"
    assert mappings(path) == 0, "the file is still mapped"
"""
)


def test_an_engine_that_is_closed_or_refused_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    run_python(LET_GO, tmp_path)


def test_what_llama_cpp_says_is_told_of_the_call_that_failed(
    models: ModelPaths, tmp_path: Path
) -> None:
    def unknown(name: str) -> str:
        path = tmp_path / f"{name}.gguf"
        architecture = es._gguf_field("general.architecture", name)
        head = struct.pack("<4sIQQ", es.GGUF_MAGIC, 3, 0, 1)
        path.write_bytes(head + architecture)
        return refusal(path)

    with loaded(models.bert) as one, loaded(models.bpe), ThreadPoolExecutor() as thread:
        assert "'first'" in unknown("first")
        elsewhere = thread.submit(unknown, "second").result()
        assert ("'first'" in elsewhere, "'second'" in elsewhere) == (False, True)
        with pytest.raises(es.EngineError) as caught:
            one.reencode("/nowhere/at/all.gguf", "bf16")
        assert "failed to quantize" in str(caught.value)
        assert "unknown model architecture" not in str(caught.value)


def test_a_comparison_without_room_for_both_contexts_keeps_neither(
    models: ModelPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[es.Context] = []
    whole = es.Context.close

    def noted(context: es.Context) -> None:
        closed.append(context)
        whole(context)

    with loaded(models.bert) as own, loaded(models.bert) as other:
        monkeypatch.setattr(es.Context, "close", noted)

        def fails() -> es.Context:
            raise es.StartupError("no room for another context")

        monkeypatch.setattr(other, "new_context", fails)
        with pytest.raises(es.StartupError, match="no room"):
            es.compare(own, other)
        assert len(closed) == 1
