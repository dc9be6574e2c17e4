"""The tiny models that generate, asked through llama.cpp directly.

Other tests take for granted what is claimed here: that they take any text, that what
they say is varied and hangs on all that was said, and what kind of memory each has.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2.sandbox
import numpy as np
import pytest

from tests import chat_models
from tests.test_gguf import agrees_with_the_gguf_package
from tests.test_tiny_models import llama, opened, tokenized

Make = Callable[[Path], Path]
MAKERS: dict[str, Make] = {
    **chat_models.GENERATING,
    "qwen2": functools.partial(chat_models.tiny_qwen, architecture="qwen2"),
}
TEXT = "Hello, the café says 漢字 🙂 to you\x07\n"
STEPS = 100


@pytest.fixture(scope="module", params=MAKERS)
def path(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Path:
    """A model of each kind."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    return MAKERS[request.param](folder)


@contextlib.contextmanager
def context(path: Path, cells: int = 512, **others: int) -> Iterator[Any]:
    """A context for one sequence, on one thread."""
    params = llama().llama_context_default_params()
    params.n_ctx = params.n_batch = cells
    params.n_threads = params.n_threads_batch = 1
    for name, value in others.items():
        setattr(params, name, value)
    made = llama().llama_init_from_model(opened(path), params)
    assert made
    try:
        yield made
    finally:
        llama().llama_free(made)


def logits_after(path: Path, decoding: Any, ids: Sequence[int]) -> Any:
    """Of the next token, when these were decoded too."""
    tokens = (ctypes.c_int32 * len(ids))(*ids)
    batch = llama().llama_batch_get_one(tokens, len(ids))
    assert llama().llama_decode(decoding, batch) == 0
    count = llama().llama_vocab_n_tokens(vocabulary(path))
    row = llama().llama_get_logits_ith(decoding, -1)
    return np.ctypeslib.as_array(row, (count,)).astype(np.float64)


def vocabulary(path: Path) -> Any:
    """Its words."""
    return llama().llama_model_get_vocab(opened(path))


def piece(path: Path, token: int) -> bytes:
    """A token's bytes."""
    room = ctypes.create_string_buffer(64)
    found = llama().llama_token_to_piece(vocabulary(path), token, room, 64, 0, True)
    return room.raw[:found]


def greedy(path: Path, ids: Sequence[int], steps: int) -> tuple[list[int], list[float]]:
    """What follows, and how open each choice was (entropy in nats)."""
    said: list[int] = []
    entropies = []
    with context(path) as decoding:
        for _ in range(steps):
            logits = logits_after(path, decoding, said[-1:] or ids)
            chances = np.exp(logits - logits.max())
            chances /= chances.sum()
            entropies.append(-float(chances @ np.log(chances)))
            said.append(int(logits.argmax()))
    return said, entropies


def test_a_tiny_chat_model_is_sound(path: Path) -> None:
    values = agrees_with_the_gguf_package(path)
    assert "tokenizer.chat_template" in values
    assert path.stat().st_size < 500_000


def test_a_tiny_chat_model_takes_any_text(path: Path) -> None:
    ids = tokenized(path, TEXT, special=False, parse=False)
    assert b"".join(piece(path, token) for token in ids).decode().strip(" ") == TEXT


def test_what_a_tiny_chat_model_says_is_varied_and_goes_on(path: Path) -> None:
    ids = tokenized(path, TEXT, special=True, parse=False)
    said, entropies = greedy(path, ids, STEPS)
    assert len(set(said)) > STEPS / 3
    assert len(set(said[STEPS // 2 :])) > STEPS / 5, "no loop"
    assert 1 < np.mean(entropies) < 4, "neither certain nor a dice"
    assert not any(llama().llama_vocab_is_eog(vocabulary(path), n) for n in said)
    text = b"".join(piece(path, token) for token in said)
    assert sum(map(text.count, (b" the", b" s", b" t"))) >= 2, text


def test_what_a_tiny_chat_model_says_hangs_on_the_first_word(path: Path) -> None:
    first, second = (
        greedy(path, tokenized(path, f"{word} {TEXT}", special=True, parse=False), 20)
        for word in ("now", "who")
    )
    assert first[0] != second[0]


def test_a_tiny_chat_model_is_the_same_every_time(path: Path, tmp_path: Path) -> None:
    name = path.parent.name[:-1]  # a number follows
    assert MAKERS[name](tmp_path).read_bytes() == path.read_bytes()


def test_each_kind_of_memory_is_there(tmp_path: Path) -> None:
    def kind(name: str) -> tuple[bool, bool, int]:
        model = opened(MAKERS[name](tmp_path))
        is_recurrent = llama().llama_model_is_recurrent(model)
        is_hybrid = llama().llama_model_is_hybrid(model)
        return is_recurrent, is_hybrid, llama().llama_model_n_swa(model)

    assert kind("llama") == kind("qwen2") == kind("qwen3") == (False, False, 0)
    assert kind("gemma3") == (False, False, 32)
    assert kind("mamba") == (True, False, 0)
    assert kind("jamba") == (False, True, 0)


def test_a_sliding_window_that_is_passed_forgets(tmp_path: Path) -> None:
    path = chat_models.tiny_gemma(tmp_path)
    with context(path, 1024, swa_full=False, n_ubatch=64) as decoding:
        memory = llama().llama_get_memory(decoding)
        logits_after(path, decoding, [300] * 200)
        assert llama().llama_memory_seq_pos_min(memory, 0) == 0
        logits_after(path, decoding, [300] * 200)
        assert llama().llama_memory_seq_pos_min(memory, 0) > 100


def test_the_words_of_a_template_are_tokens(path: Path) -> None:
    ids = tokenized(path, rendered(path), special=False, parse=True)
    shown = [piece(path, token) for token in ids]
    vocab = vocabulary(path)
    bos = llama().llama_vocab_bos(vocab)
    if llama().llama_vocab_get_add_bos(vocab):
        assert ids.count(bos) == 1 and ids[0] == bos
    assert any(llama().llama_vocab_is_eog(vocab, token) for token in ids)
    assert b" you" in shown and b"".join(shown).count(b"who are you") == 2


def rendered(path: Path) -> str:
    """Two messages and one to come, by the model's own template."""
    template = llama().llama_model_chat_template(opened(path), None).decode()
    says = [{"role": role, "content": " who are you"} for role in ("user", "assistant")]
    vocab = vocabulary(path)
    return (
        jinja2.sandbox.ImmutableSandboxedEnvironment()
        .from_string(template)
        .render(
            messages=says,
            add_generation_prompt=True,
            bos_token=piece(path, llama().llama_vocab_bos(vocab)).decode(),
            eos_token=piece(path, llama().llama_vocab_eos(vocab)).decode(),
        )
    )
