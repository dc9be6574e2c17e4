"""Models with random weights, for measuring and for tests: what they say means nothing.

What a call costs depends on a model's shape and not on its weights, so a random model
of a common shape measures as well as a real one, and needs no download.
"""

from __future__ import annotations

import os
import string
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from tests.words import WORDS

_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SPREAD = 0.02  # what BERTs begin their training with
_NORMS = ("attn_output_norm", "layer_output_norm")


def bert_base(
    folder: Path,
    vocabulary_from: Path,
    *,
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    feed_forward: int = 3072,
    context: int = 512,
) -> Path:
    """A BERT, base size unless told otherwise, with another GGUF's vocabulary."""
    path = folder / "random-bert-base-f16.gguf"
    maker = _Maker(path, "bert", layers, width, heads, feed_forward, context)
    maker.bert(maker.copy_vocabulary(vocabulary_from))
    return maker.write()


def tiny_bert(folder: Path) -> Path:
    """The smallest there is: a layer, 32 numbers, a token a letter; 20 KB."""
    path = folder / "random-tiny-bert.gguf"
    maker = _Maker(path, "bert", 1, 32, 2, 32, 32)
    maker.bert(maker.small_vocabulary(()))
    return maker.write()


def long_context_bert(
    folder: Path,
    *,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    feed_forward: int = 128,
    context: int = 8192,
    words: Sequence[str] = WORDS,
) -> Path:
    """A small encoder with rotary positions (nomic-bert): long texts cost little.

    Every one of ``words`` is a token; other words of a-z are a token a letter.
    """
    path = folder / "random-long-context-f16.gguf"
    maker = _Maker(path, "nomic-bert", layers, width, heads, feed_forward, context)
    maker.writer.add_rope_freq_base(10_000)
    tokens = maker.small_vocabulary(words)
    maker.matrix("token_types.weight", 2, width, dtype=np.float32)
    maker.embeddings(tokens)
    for layer in range(layers):
        maker.attention(layer, with_biases=False)
        for name in ("ffn_up", "ffn_gate"):
            maker.linear(f"blk.{layer}.{name}", feed_forward, width, with_bias=False)
        maker.linear(f"blk.{layer}.ffn_down", width, feed_forward, with_bias=False)
    return maker.write()


class _Maker:
    """A GGUF of an encoder in the making; the same bytes every time."""

    def __init__(
        self,
        path: Path,
        architecture: str,
        layers: int,
        width: int,
        heads: int,
        feed_forward: int,
        context: int,
    ) -> None:
        self._path = path
        self._width = width
        self._layers = layers
        self._feed_forward = feed_forward
        self._context = context
        self._chance = np.random.default_rng(1)
        self._unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        self.writer = gguf.GGUFWriter(self._unfinished, architecture)
        self.writer.add_name(path.stem)
        self.writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        self.writer.add_block_count(layers)
        self.writer.add_context_length(context)
        self.writer.add_embedding_length(width)
        self.writer.add_feed_forward_length(feed_forward)
        self.writer.add_head_count(heads)
        self.writer.add_layer_norm_eps(1e-12)
        self.writer.add_causal_attention(False)
        self.writer.add_pooling_type(gguf.PoolingType.MEAN)

    def copy_vocabulary(self, source: Path) -> int:
        """The tokeniser of another GGUF, whatever it says; how many tokens it has."""
        fields = gguf.GGUFReader(source).fields
        for name, entry in fields.items():
            if not name.startswith("tokenizer."):
                continue
            kind, item = entry.types[0], entry.types[-1]
            is_array = kind == gguf.GGUFValueType.ARRAY
            self.writer.add_key_value(
                name, entry.contents(), kind, sub_type=item if is_array else None
            )
        return len(fields["tokenizer.ggml.tokens"].data)

    def small_vocabulary(self, words: Sequence[str]) -> int:
        """WordPiece of these words and of the letters; how many tokens it has.

        llama.cpp marks the start of a word where BERT marks its continuation.
        """
        starts = dict.fromkeys([*words, *string.ascii_lowercase])
        tokens = [*_SPECIALS, *("\u2581" + word for word in starts)]
        tokens += string.ascii_lowercase
        kinds = [3] * len(_SPECIALS)  # llama_token_type: control; 1 is normal
        self.writer.add_tokenizer_model("bert")
        self.writer.add_token_list(tokens)
        self.writer.add_token_types(kinds + [1] * (len(tokens) - len(kinds)))
        self.writer.add_token_type_count(2)
        self.writer.add_pad_token_id(0)
        self.writer.add_unk_token_id(1)
        self.writer.add_bos_token_id(2)
        self.writer.add_sep_token_id(3)
        return len(tokens)

    def bert(self, tokens: int) -> None:
        """All tensors of a BERT."""
        inner, width = self._feed_forward, self._width
        # llama.cpp adds these two to floats: they are f32 in every file.
        self.matrix("position_embd.weight", self._context, width, dtype=np.float32)
        self.matrix("token_types.weight", 2, width, dtype=np.float32)
        self.embeddings(tokens)
        for layer in range(self._layers):
            self.attention(layer, with_biases=True)
            self.linear(f"blk.{layer}.ffn_up", inner, width, with_bias=True)
            self.linear(f"blk.{layer}.ffn_down", width, inner, with_bias=True)

    def embeddings(self, tokens: int) -> None:
        """Of the tokens, and the norm after them."""
        self.matrix("token_embd.weight", tokens, self._width)
        self._norm("token_embd_norm")

    def attention(self, layer: int, *, with_biases: bool) -> None:
        """A block's attention, and both its norms."""
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            self.linear(
                f"blk.{layer}.{name}", self._width, self._width, with_bias=with_biases
            )
        for name in _NORMS:
            self._norm(f"blk.{layer}.{name}")

    def linear(self, name: str, rows: int, columns: int, *, with_bias: bool) -> None:
        """A matrix to multiply with, and what is added afterwards."""
        self.matrix(f"{name}.weight", rows, columns)
        if with_bias:
            self._vector(f"{name}.bias", rows, around=0)

    def matrix(
        self, name: str, rows: int, columns: int, dtype: npt.DTypeLike = np.float16
    ) -> None:
        """Small random numbers."""
        values = self._chance.standard_normal((rows, columns), np.float32) * _SPREAD
        self.writer.add_tensor(name, values.astype(dtype))

    def write(self) -> Path:
        """Put it in its place at once: half a model is never found there."""
        try:
            self.writer.write_header_to_file()
            self.writer.write_kv_data_to_file()
            self.writer.write_tensors_to_file()
            self.writer.close()
            os.replace(self._unfinished, self._path)
        finally:
            self._unfinished.unlink(missing_ok=True)
        return self._path

    def _norm(self, name: str) -> None:
        self._vector(f"{name}.weight", self._width, around=1)
        self._vector(f"{name}.bias", self._width, around=0)

    def _vector(self, name: str, length: int, around: float) -> None:
        values = self._chance.standard_normal(length, np.float32) * _SPREAD + around
        self.writer.add_tensor(name, values.astype(np.float32))
