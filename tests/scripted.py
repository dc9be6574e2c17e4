"""The real program, whose models say what they are told to: ``python -m tests.scripted``.

The last text between two ``~~`` in a prompt is the reply to it, as far as what constrains
the reply allows. So an agent can be tried whose model is tiny: the user's message says
which tool the model calls, and the tool's result says what the model makes of it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import embellama_server as es

MODULE = ("-m", "tests.scripted")
_SCRIPT = re.compile("~~((?:(?!~~).)*)~~(?!.*~~)", re.DOTALL)
_WANTED = 1000.0  # logits of these models are below 10


def saying(text: str) -> str:
    """What makes a model reply with this text."""
    return f"~~{text}~~"


class ScriptedSampler(es.Sampler):
    """Chooses the next token of the script, unless that is excluded."""

    def __init__(self, llama: Any, vocab: Any, *rest: Any, **more: Any) -> None:
        super().__init__(llama, vocab, *rest, **more)
        prompt: Sequence[int] = rest[1]
        text = b"".join(_piece(llama, vocab, token) for token in prompt)
        found = _SCRIPT.search(text.decode("utf-8", "replace"))
        self._script = _tokens(llama, vocab, found[1].encode()) if found else []
        if found:
            self._script.append(llama.llama_vocab_eos(vocab))

    def sample(self, row: Any) -> int:
        if self._script:
            row = row.copy()
            row[self._script[0]] = _WANTED
        token = super().sample(row)
        if self._script and self._script.pop(0) != token:
            self._script.clear()
        return token


def _piece(llama: Any, vocab: Any, token: int) -> bytes:
    import ctypes

    buffer = ctypes.create_string_buffer(256)
    size = llama.llama_token_to_piece(vocab, token, buffer, 256, 0, True)
    return buffer.raw[:size]


def _tokens(llama: Any, vocab: Any, text: bytes) -> list[int]:
    import ctypes

    room = len(text) + 8
    tokens = (ctypes.c_int32 * room)()
    count = llama.llama_tokenize(vocab, text, len(text), tokens, room, False, True)
    return [*tokens[:count]]


if __name__ == "__main__":
    es.Sampler = ScriptedSampler  # type: ignore[misc]
    sys.exit(es.main(sys.argv[1:]))
