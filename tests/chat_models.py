"""Models that generate, with random weights: tiny, varied, and the same every time.

What they say means nothing, but it is no loop: a token depends on all before it. Their
end tokens and other special ones are all but never drawn, so a reply runs to its limit;
a test that wants an end asks for one (``logit_bias``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

from tests.models import Maker, byte_characters
from tests.words import WORDS

# Bytes of these are tokens of their own among byte pairs: " caf\xc3", then "\xa9".
FOREIGN = ("café", "naïve", "привет", "漢字", "🙂", "👩‍🚀")
_SPREAD = 0.3  # of all weights: attention then outweighs a token's own embedding
_HEAD_SPREAD = 0.5  # logits deviate by about 3: draws are varied, and not uniform
_PRINTABLE = [chr(code) for code in range(33, 127)]

# Written for the tests, in the manner of Zephyr, ChatML and Gemma.
ZEPHYR = """\
{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
CHATML = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for call in m.tool_calls or [] %}<tool_call>
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
# Refuses a system message, and two messages of one role in a row, as Gemma 2's does.
GEMMA = """\
{{ bos_token }}{% for m in messages %}\
{% if m.role not in ('user', 'assistant') %}\
{{ raise_exception('Role ' + m.role + ' not supported') }}{% endif %}\
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}\
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""


def tiny_llama(
    folder: Path,
    *,
    template: str = ZEPHYR,
    context: int = 2048,
    begin: bool = True,
    sampling: Mapping[str, float] | None = None,
) -> Path:
    """A llama with SentencePiece and <s>, </s>; 250 KB.

    ``template``: empty, and the file has none. ``begin``: whether <s> goes first.
    ``sampling``: its defaults, by the names of the keys ``general.sampling.*``.
    """
    maker = _maker(folder, "llama", template, context, layers=2, sampling=sampling)
    maker.writer.add_rope_dimension_count(16)
    tokens = _pieces(maker, begin=begin)
    for layer in range(2):
        maker.causal_attention(layer)
        maker.gated(layer)
        _norms(maker, layer, "attn_norm", "ffn_norm")
    return _finished(maker, tokens)


def tiny_qwen(
    folder: Path,
    *,
    architecture: str = "qwen3",
    template: str = CHATML,
    context: int = 2048,
    sampling: Mapping[str, float] | None = None,
) -> Path:
    """A qwen3 or qwen2 with byte pairs, ChatML's tokens, and no BOS; 300 KB.

    <|im_end|> ends a reply; <think> and <tool_call> are tokens, and text.
    """
    maker = _maker(folder, architecture, template, context, layers=2, sampling=sampling)
    tokens = maker.byte_pairs(
        [*WORDS, *FOREIGN],
        controls=("<|im_end|>", "<|endoftext|>", "<|im_start|>"),
        marks=("<think>", "</think>", "<tool_call>", "</tool_call>"),
    )
    maker.writer.add_add_bos_token(False)
    is_third = architecture == "qwen3"
    for layer in range(2):
        maker.causal_attention(
            layer, with_head_norms=is_third, with_biases=not is_third
        )
        maker.gated(layer)
        _norms(maker, layer, "attn_norm", "ffn_norm")
    return _finished(maker, tokens)


def tiny_gemma(
    folder: Path,
    *,
    template: str = GEMMA,
    context: int = 2048,
    window: int = 32,
    sampling: Mapping[str, float] | None = None,
) -> Path:
    """A gemma3: six layers, five of them see ``window`` positions; 400 KB.

    <end_of_turn> ends a reply. </s> is text in it, as in Gemma: HTML's strike-through.
    """
    maker = _maker(folder, "gemma3", template, context, layers=6, sampling=sampling)
    maker.writer.add_sliding_window(window)
    tokens = _pieces(
        maker,
        controls=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        marks=("<s>", "</s>"),
    )
    maker.writer.add_eot_token_id(tokens.index("<end_of_turn>"))
    maker.writer.add_add_space_prefix(False)
    for layer in range(6):
        maker.causal_attention(layer, with_head_norms=True, sharpness=2)
        maker.gated(layer)
        _norms(maker, layer, "attn_norm", "post_attention_norm")
        _norms(maker, layer, "ffn_norm", "post_ffw_norm")
    return _finished(maker, tokens)


def tiny_mamba(folder: Path, *, template: str = ZEPHYR, context: int = 2048) -> Path:
    """A mamba: recurrent, its memory can only go on; 350 KB."""
    maker = _maker(folder, "mamba", template, context, layers=2, heads=0)
    _state_space(maker)
    tokens = _pieces(maker)
    for layer in range(2):
        _recurrent(maker, layer)
        _norms(maker, layer, "attn_norm")
    return _finished(maker, tokens)


def tiny_jamba(folder: Path, *, template: str = ZEPHYR, context: int = 2048) -> Path:
    """A jamba: hybrid, a recurrent layer and one with attention; 350 KB."""
    maker = _maker(folder, "jamba", template, context, layers=2, kv_heads=(0, 2))
    _state_space(maker)
    tokens = _pieces(maker)
    _recurrent(maker, 0)
    for name, length in (("dt", _STEP_RANK), ("b", _STATE), ("c", _STATE)):
        maker.vector(f"blk.0.ssm_{name}_norm.weight", length, around=1)
    maker.causal_attention(1)
    for layer in range(2):
        maker.gated(layer)
        _norms(maker, layer, "attn_norm", "ffn_norm")
    return _finished(maker, tokens)


GENERATING: dict[str, Callable[[Path], Path]] = {
    "llama": tiny_llama,
    "qwen3": tiny_qwen,
    "gemma3": tiny_gemma,
    "mamba": tiny_mamba,
    "jamba": tiny_jamba,
}

_WIDTH, _INNER, _STATE, _STEP_RANK, _KERNEL = 32, 64, 16, 4, 4


def _maker(
    folder: Path,
    architecture: str,
    template: str,
    context: int,
    *,
    layers: int,
    heads: int = 2,
    kv_heads: Sequence[int] | None = None,
    sampling: Mapping[str, float] | None = None,
) -> Maker:
    maker = Maker(
        folder / f"random-tiny-{architecture}-chat.gguf",
        architecture,
        layers,
        _WIDTH,
        heads,
        _INNER,
        context,
        spread=_SPREAD,
        pooling=None,
        dtype=np.float32,
        kv_heads=kv_heads,
    )
    for name, value in (sampling or {}).items():
        kind = gguf.GGUFValueType.FLOAT32
        if isinstance(value, int):
            kind = gguf.GGUFValueType.INT32
        maker.writer.add_key_value(f"general.sampling.{name}", value, kind)
    if template:
        maker.writer.add_chat_template(template)
    return maker


def _pieces(
    maker: Maker,
    *,
    controls: Sequence[str] = ("<s>", "</s>"),
    marks: Sequence[str] = (),
    begin: bool = True,
) -> list[str]:
    """SentencePiece's tokens: words, printable ASCII, bytes."""
    tokens = maker.sentence_pieces(
        [*WORDS, *FOREIGN], controls=controls, marks=marks, letters=_PRINTABLE
    )
    maker.writer.add_add_bos_token(begin)
    maker.writer.add_add_eos_token(False)
    return tokens


def _finished(maker: Maker, tokens: Sequence[str]) -> Path:
    """The embeddings and a head that draws texts: words, letters, few others."""
    maker.matrix("token_embd.weight", len(tokens), _WIDTH)
    maker.vector("output_norm.weight", _WIDTH, around=1)
    high = set(byte_characters()[:33] + byte_characters()[127:])
    quiet = [n for n, t in enumerate(tokens) if t in high or (t[0] == "<" and t[1:])]
    head = np.random.default_rng(2).standard_normal((len(tokens), _WIDTH), np.float32)
    head[quiet] = 0
    maker.writer.add_tensor("output.weight", head * np.float32(_HEAD_SPREAD))
    return maker.write()


def _norms(maker: Maker, layer: int, *names: str) -> None:
    for name in names:
        maker.vector(f"blk.{layer}.{name}.weight", _WIDTH, around=1)


def _state_space(maker: Maker) -> None:
    """What files with recurrent layers say of them."""
    maker.writer.add_ssm_conv_kernel(_KERNEL)
    maker.writer.add_ssm_inner_size(2 * _WIDTH)
    maker.writer.add_ssm_state_size(_STATE)
    maker.writer.add_ssm_time_step_rank(_STEP_RANK)


def _recurrent(maker: Maker, layer: int) -> None:
    """A block's selective state space; its state fades by 1/e in 2 to 16 steps."""
    inner, name = 2 * _WIDTH, f"blk.{layer}.ssm_"
    maker.linear(f"{name}in", 2 * inner, _WIDTH, with_bias=False)
    maker.linear(f"{name}conv1d", inner, _KERNEL, with_bias=True)
    maker.linear(f"{name}x", _STEP_RANK + 2 * _STATE, inner, with_bias=False)
    maker.linear(f"{name}dt", inner, _STEP_RANK, with_bias=True)
    fading = -np.linspace(0.1, 0.7, _STATE, dtype=np.float32)
    maker.writer.add_tensor(f"{name}a", np.tile(fading, (inner, 1)))
    maker.vector(f"{name}d", inner, around=1)
    maker.linear(f"{name}out", _WIDTH, inner, with_bias=False)
