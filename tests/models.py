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
_WIDE_SPREAD = 0.3  # so that other words give clearly other numbers
_NORMS = ("attn_output_norm", "layer_output_norm")
_MEAN, _LAST = gguf.PoolingType.MEAN, gguf.PoolingType.LAST
_RANK = gguf.PoolingType.RANK
# How models of the qwen3 kind are asked for a score, in short. The last words matter: the
# score is that of the last token.
RERANK_TEMPLATE = (
    "<|im_start|>system\nyes or no<|im_end|>\n<|im_start|>user\n<Query>: {query}\n"
    "<Document>: {document}<|im_end|>\n<|im_start|>assistant\n"
)


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
    maker = Maker(path, "bert", layers, width, heads, feed_forward, context)
    maker.bert(maker.copy_vocabulary(vocabulary_from))
    return maker.write()


def tiny_bert(folder: Path) -> Path:
    """The smallest there is: a layer, 32 numbers, a token a letter; 20 KB."""
    path = folder / "random-tiny-bert.gguf"
    maker = Maker(path, "bert", 1, 32, 2, 32, 32)
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
    maker = Maker(path, "nomic-bert", layers, width, heads, feed_forward, context)
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


def tiny_encoder(folder: Path, architecture: str, *, context: int = 256) -> Path:
    """An encoder as served today, of two layers (gemma-embedding: six); 50 KB or so.

    ``architecture``: bert, modern-bert, neo-bert, jina-bert-v2, jina-bert-v3 or
    gemma-embedding. Those with a sliding window see 16 tokens in some of their layers.
    """
    is_gemma = architecture == "gemma-embedding"
    path = folder / f"random-tiny-{architecture}.gguf"
    layers = 6 if is_gemma else 2
    maker = Maker(path, architecture, layers, 32, 2, 64, context, spread=_WIDE_SPREAD)
    if architecture == "bert":
        maker.bert(maker.small_vocabulary(WORDS))
    elif architecture.startswith("jina"):
        maker.jina(maker.small_vocabulary(WORDS), with_gate=architecture.endswith("v2"))
    elif is_gemma:
        maker.writer.add_causal_attention(False)
        maker.writer.add_sliding_window(16)
        tokens = maker.sentence_pieces(WORDS)
        maker.writer.add_add_bos_token(True)
        maker.writer.add_add_eos_token(True)
        maker.gemma(len(tokens))
    else:
        is_modern = architecture == "modern-bert"
        maker.norm_first(maker.small_vocabulary(WORDS), embedding_norm=is_modern)
        if is_modern:
            maker.writer.add_sliding_window(16)
        else:
            maker.writer.add_layer_norm_rms_eps(1e-6)
    return maker.write()


def tiny_cross_encoder(
    folder: Path,
    *,
    head: Sequence[str] = ("cls", "cls.output"),
    closing: bool = True,
    labels: Sequence[str] = (),
    types: int = 2,
    context: int = 64,
) -> Path:
    """A BERT that scores a query and a document; 40 KB.

    ``head``: the layers after it. RoBERTa's rerankers have these two, BERT's the second;
    with none or the first alone it says that it ranks, and llama.cpp's scores mean nothing.
    ``closing``: a pair ends with [SEP], as files say that are converted today; older ones
    say nothing and end with the document. ``labels``: a score for each. ``types`` of
    tokens: BERT's pairs have two, RoBERTa's and XLM-R's one.
    """
    path = folder / "random-tiny-cross-encoder.gguf"
    maker = Maker(
        path, "bert", 1, 32, 2, 32, context, spread=_WIDE_SPREAD, pooling=_RANK
    )
    maker.bert(maker.small_vocabulary(WORDS, types), types)
    if closing:
        maker.writer.add_eos_token_id(3)
        maker.writer.add_add_bos_token(True)
        maker.writer.add_add_eos_token(True)
        maker.writer.add_add_sep_token(False)
    if labels:
        maker.writer.add_classifier_output_labels(labels)
    rows = {"cls": 32, "cls.output": len(labels) or 1}
    for layer in head:
        maker.linear(layer, rows[layer], 32, with_bias=True)
    return maker.write()


def tiny_causal(
    folder: Path,
    *,
    begin: bool = False,
    end: bool = True,
    byte_pairs: bool = True,
    pre: str = "qwen2",
    context: int = 64,
) -> Path:
    """A decoder (qwen3) whose vector is that of the last token; 70 KB.

    ``begin`` and ``end``: whether a text's tokens stand between special ones. Its
    tokenizer is one of byte pairs (``pre``: its pre-tokenizer; empty: the file does not
    say), or SentencePiece.
    """
    path = folder / "random-tiny-causal.gguf"
    maker = Maker(
        path, "qwen3", 1, 32, 2, 64, context, spread=_WIDE_SPREAD, pooling=_LAST
    )
    if byte_pairs:
        tokens = maker.byte_pairs(WORDS, pre=pre)
    else:
        tokens = maker.sentence_pieces(WORDS)
    maker.writer.add_add_bos_token(begin)
    maker.writer.add_add_eos_token(end)
    maker.qwen3(len(tokens))
    return maker.write()


def tiny_causal_reranker(
    folder: Path,
    *,
    labels: Sequence[str] = ("yes", "no"),
    template: str = RERANK_TEMPLATE,
    context: int = 128,
) -> Path:
    """A decoder (qwen3) that is asked whether a document fits a query; 70 KB.

    ``template`` is how it is asked; empty: the file has none.
    """
    path = folder / "random-tiny-causal-reranker.gguf"
    maker = Maker(
        path, "qwen3", 1, 32, 2, 64, context, spread=_WIDE_SPREAD, pooling=_RANK
    )
    tokens = maker.byte_pairs(WORDS)
    maker.writer.add_add_bos_token(False)
    maker.writer.add_add_eos_token(True)
    if template:
        maker.writer.add_chat_template([{"name": "rerank", "template": template}])
    if labels:
        maker.writer.add_classifier_output_labels(labels)
    maker.qwen3(len(tokens))
    maker.linear("cls.output", len(labels) or 1, 32, with_bias=False)
    return maker.write()


class Maker:
    """A GGUF in the making; the same bytes every time."""

    def __init__(
        self,
        path: Path,
        architecture: str,
        layers: int,
        width: int,
        heads: int,
        feed_forward: int,
        context: int,
        *,
        spread: float = _SPREAD,
        pooling: gguf.PoolingType | None = _MEAN,
        dtype: npt.DTypeLike = np.float16,
        kv_heads: int | Sequence[int] | None = None,
    ) -> None:
        self._path = path
        self._spread = spread
        self._dtype = dtype
        self._width = width
        self._layers = layers
        self._heads = heads
        self._feed_forward = feed_forward
        self._context = context
        self._chance = np.random.default_rng(1)
        self._unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        self.writer = gguf.GGUFWriter(self._unfinished, architecture)
        self.writer.add_name(path.stem)
        kinds = gguf.LlamaFileType
        is_half = np.dtype(dtype) == np.float16
        self.writer.add_file_type(kinds.MOSTLY_F16 if is_half else kinds.ALL_F32)
        self.writer.add_block_count(layers)
        self.writer.add_context_length(context)
        self.writer.add_embedding_length(width)
        self.writer.add_feed_forward_length(feed_forward)
        self.writer.add_head_count(heads)
        if "bert" not in architecture:
            self.writer.add_head_count_kv(heads if kv_heads is None else kv_heads)
            self.writer.add_layer_norm_rms_eps(1e-6)
            self.writer.add_rope_freq_base(10_000)
        else:
            self.writer.add_layer_norm_eps(1e-12)
            self.writer.add_causal_attention(False)
        if pooling is not None:
            self.writer.add_pooling_type(pooling)

    def copy_vocabulary(self, source: Path) -> int:
        """The tokenizer of another GGUF, whatever it says; how many tokens it has."""
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

    def small_vocabulary(self, words: Sequence[str], types: int = 2) -> int:
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
        self.writer.add_token_type_count(types)
        self.writer.add_pad_token_id(0)
        self.writer.add_unk_token_id(1)
        self.writer.add_bos_token_id(2)
        self.writer.add_sep_token_id(3)
        return len(tokens)

    def byte_pairs(
        self,
        words: Sequence[str],
        *,
        controls: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        marks: Sequence[str] = (),
        pre: str = "qwen2",
    ) -> list[str]:
        """Bytes, and each of these words with a space before it; the tokens.

        A word is merged byte by byte from its space on, so no two words compete.
        ``marks`` are tokens that a text may hold: the first control ends one.
        """
        tokens = byte_characters()
        of_byte = list(tokens)
        merges: list[str] = []
        for word in words:
            characters = "".join(of_byte[byte] for byte in word.encode())
            for end in range(1, len(characters) + 1):
                piece = _SPACE + characters[:end]
                if piece not in tokens:
                    tokens.append(piece)
                    merges.append(f"{piece[:-1]} {piece[-1]}")
        plain = len(tokens)
        tokens += [*controls, *marks]
        self.writer.add_tokenizer_model("gpt2")
        if pre:
            self.writer.add_tokenizer_pre(pre)
        self.writer.add_token_list(tokens)
        self.writer.add_token_types(
            [1] * plain + [3] * len(controls) + [4] * len(marks)
        )
        self.writer.add_token_merges(merges)
        self.writer.add_bos_token_id(plain + 1)
        self.writer.add_eos_token_id(plain)
        self.writer.add_pad_token_id(plain)
        return tokens

    def sentence_pieces(
        self,
        words: Sequence[str],
        *,
        controls: Sequence[str] = ("<s>", "</s>"),
        marks: Sequence[str] = (),
        letters: Sequence[str] = string.ascii_lowercase,
    ) -> list[str]:
        """Bytes, letters and these words; the tokens.

        The first two ``controls`` begin and end a text, which may hold ``marks``.
        """
        single = ["\u2581", *letters]
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        pieces = (
            "\u2581" + word[: end + 1] for word in words for end in range(len(word))
        )
        longer = list(dict.fromkeys(pieces))
        specials = ["<unk>", *controls, *marks]
        tokens = [*specials, *byte_tokens, *single, *longer]
        self.writer.add_tokenizer_model("llama")
        self.writer.add_token_list(tokens)
        # Higher goes first; a word is put together from its space on.
        scores = [0.0] * (len(specials) + 256) + [-1000.0] * len(single)
        self.writer.add_token_scores(scores + [-float(n) for n in range(len(longer))])
        # llama_token_type: unknown, control, what a text may hold, bytes
        kinds = [2] + [3] * len(controls) + [4] * len(marks) + [6] * 256
        self.writer.add_token_types(kinds + [1] * (len(tokens) - len(kinds)))
        self.writer.add_unk_token_id(0)
        self.writer.add_bos_token_id(1)
        self.writer.add_eos_token_id(2)
        return tokens

    def qwen3(self, tokens: int) -> None:
        """All tensors of a qwen3, but for a head of its own."""
        self.matrix("token_embd.weight", tokens, self._width)
        self.vector("output_norm.weight", self._width, around=1)
        for layer in range(self._layers):
            self.causal_attention(layer, with_head_norms=True)
            for name in ("attn_norm", "ffn_norm"):
                self.vector(f"blk.{layer}.{name}.weight", self._width, around=1)
            self.gated(layer)

    def causal_attention(
        self,
        layer: int,
        *,
        with_head_norms: bool = False,
        with_biases: bool = False,
        sharpness: float = 1,
    ) -> None:
        """A block's attention as decoders have it, and the norms of its heads.

        ``sharpness``: above 1 they look at few tokens, and not at all alike.
        """
        width = self._width
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            biased = with_biases and name != "attn_output"
            self.linear(f"blk.{layer}.{name}", width, width, with_bias=biased)
        if with_head_norms:
            for name in ("attn_q_norm", "attn_k_norm"):
                length = width // self._heads
                self.vector(f"blk.{layer}.{name}.weight", length, sharpness)

    def gated(self, layer: int) -> None:
        """A block's feed-forward network with a gate."""
        inner, width = self._feed_forward, self._width
        for name in ("ffn_up", "ffn_gate"):
            self.linear(f"blk.{layer}.{name}", inner, width, with_bias=False)
        self.linear(f"blk.{layer}.ffn_down", width, inner, with_bias=False)

    def bert(self, tokens: int, types: int = 2) -> None:
        """All tensors of a BERT."""
        inner, width = self._feed_forward, self._width
        # llama.cpp adds these two to floats: they are f32 in every file.
        self.matrix("position_embd.weight", self._context, width, dtype=np.float32)
        kinds = self._numbers(2, width)[:types]  # or other tensors would be others
        self.writer.add_tensor("token_types.weight", kinds)
        self.embeddings(tokens)
        for layer in range(self._layers):
            self.attention(layer, with_biases=True)
            self.linear(f"blk.{layer}.ffn_up", inner, width, with_bias=True)
            self.linear(f"blk.{layer}.ffn_down", width, inner, with_bias=True)

    def jina(self, tokens: int, *, with_gate: bool) -> None:
        """All tensors of a BERT without positions, with a gate or without."""
        inner, width = self._feed_forward, self._width
        self.matrix("token_types.weight", 2, width, dtype=np.float32)
        self.embeddings(tokens)
        for layer in range(self._layers):
            self.attention(layer, with_biases=True)
            self.linear(f"blk.{layer}.ffn_up", inner, width, with_bias=not with_gate)
            if with_gate:
                self.linear(f"blk.{layer}.ffn_gate", inner, width, with_bias=False)
            self.linear(f"blk.{layer}.ffn_down", width, inner, with_bias=True)

    def norm_first(self, tokens: int, *, embedding_norm: bool) -> None:
        """All tensors of a BERT of the newer sort: norms first, gate and up in one.

        ``embedding_norm``: also before the first layer, as ModernBERT has it.
        """
        inner, width = self._feed_forward, self._width
        self.matrix("token_embd.weight", tokens, width)
        last = "output_norm" if embedding_norm else "enc.output_norm"
        for name in (last, "token_embd_norm") if embedding_norm else (last,):
            self.vector(f"{name}.weight", width, around=1)
        for layer in range(self._layers):
            self.matrix(f"blk.{layer}.attn_qkv.weight", 3 * width, width)
            self.matrix(f"blk.{layer}.attn_output.weight", width, width)
            self.matrix(f"blk.{layer}.ffn_up.weight", 2 * inner, width)
            self.matrix(f"blk.{layer}.ffn_down.weight", width, inner)
            for name in ("attn_norm", "ffn_norm"):
                self.vector(f"blk.{layer}.{name}.weight", width, around=1)

    def gemma(self, tokens: int) -> None:
        """All tensors of a gemma3 or gemma-embedding, but for a head of its own."""
        self.matrix("token_embd.weight", tokens, self._width)
        self.vector("output_norm.weight", self._width, around=1)
        for layer in range(self._layers):
            self.causal_attention(layer, with_head_norms=True)
            self.gated(layer)
            names = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
            for name in names:
                self.vector(f"blk.{layer}.{name}.weight", self._width, around=1)

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
            self.vector(f"{name}.bias", rows, around=0)

    def matrix(
        self, name: str, rows: int, columns: int, dtype: npt.DTypeLike | None = None
    ) -> None:
        """Small random numbers."""
        values = self._numbers(rows, columns)
        self.writer.add_tensor(name, values.astype(dtype or self._dtype))

    def _numbers(self, rows: int, columns: int) -> npt.NDArray[np.float32]:
        return self._chance.standard_normal((rows, columns), np.float32) * self._spread

    def vector(self, name: str, length: int, around: float) -> None:
        """Small random numbers, and ``around`` added."""
        noise = self._chance.standard_normal(length, np.float32) * self._spread
        values = noise + around
        self.writer.add_tensor(name, values.astype(np.float32))

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
        self.vector(f"{name}.weight", self._width, around=1)
        self.vector(f"{name}.bias", self._width, around=0)


_SPACE = "\u0120"  # what stands for a space among bytes


def byte_characters() -> list[str]:
    """The characters that stand for bytes in a vocabulary like GPT-2's."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]
