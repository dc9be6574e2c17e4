"""llama.cpp's own grammars, which ours must agree with where theirs are sound.

Each token is tested before it is accepted: otherwise llama.cpp ends the process.
"""

from __future__ import annotations

import ctypes
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests import chat_models, test_tiny_models


class Words:
    """A vocabulary in which every byte is a token."""

    def __init__(self, folder: Path) -> None:
        self.llama: Any = test_tiny_models.llama()
        params = self.llama.llama_model_default_params()
        params.vocab_only = True
        path = chat_models.tiny_qwen(folder)
        self._model = self.llama.llama_model_load_from_file(os.fsencode(path), params)
        self.vocab = self.llama.llama_model_get_vocab(self._model)
        self.pieces = [
            self.piece(token)
            for token in range(self.llama.llama_vocab_n_tokens(self.vocab))
        ]
        self.ends = [
            token
            for token in range(len(self.pieces))
            if self.llama.llama_vocab_is_eog(self.vocab, token)
        ]
        self.bytes = {
            piece[0]: t for t, piece in enumerate(self.pieces) if len(piece) == 1
        }

    @cache  # noqa: B019 - one vocabulary, for all tests
    def piece(self, token: int) -> bytes:
        """A token's text; nothing if it is a control token."""
        buffer = ctypes.create_string_buffer(256)
        size = self.llama.llama_token_to_piece(self.vocab, token, buffer, 256, 0, False)
        return buffer.raw[: max(size, 0)]


class LlamaGrammar:
    """A grammar of llama.cpp, and the text read so far."""

    def __init__(self, words: Words, text: str) -> None:
        self._words, self._llama = words, words.llama
        self._sampler = self._llama.llama_sampler_init_grammar(
            words.vocab, text.encode(), b"root"
        )
        self._record = np.dtype(self._llama.llama_token_data)

    @property
    def parses(self) -> bool:
        """Whether it is one."""
        return bool(self._sampler)

    def allowed(self) -> set[int]:
        """The tokens that may come."""
        records = np.zeros(len(self._words.pieces), self._record)
        records["id"] = np.arange(len(records))
        self._apply(records)
        return {*np.flatnonzero(records["logit"] != -math.inf).tolist()}

    def allows(self, token: int) -> bool:
        """Whether this token may come."""
        records = np.zeros(1, self._record)
        records["id"] = token
        self._apply(records)
        return bool(records["logit"][0] != -math.inf)

    def take(self, token: int) -> bool:
        """Go on with a token, if it may come."""
        if not self.allows(token):
            return False
        self._llama.llama_sampler_accept(self._sampler, token)
        return True

    def accepts(self, text: bytes) -> bool:
        """Whether this, from here on, is a whole text of the grammar."""
        return all(self.take(self._words.bytes[byte]) for byte in text) and self.allows(
            self._words.ends[0]
        )

    def _apply(self, records: Any) -> None:
        array = self._llama.llama_token_data_array(
            ctypes.cast(records.ctypes.data, self._llama.llama_token_data_p),
            len(records),
            -1,
            False,
        )
        self._llama.llama_sampler_apply(self._sampler, ctypes.byref(array))

    def close(self) -> None:
        """Free it."""
        if self._sampler:
            self._llama.llama_sampler_free(self._sampler)
