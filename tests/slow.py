"""``python -m tests.slow FLAGS``: the real program with fake models that take their time.

A file called chatter generates, a word each WORD_S. Each model loads for as many seconds
as the variable LOAD_S says.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any

import embellama_server as es
from tests import both, kit

MODULE = ("-m", "tests.slow")
LOAD_S = "TESTS_LOAD_S"
WORD_S = 0.25


class SlowSpeaker(kit.Speaker):
    """Says the first word at once, and the next ones later."""

    def _go_on(self, generation: es.Generation) -> None:
        if not generation.is_over:
            self._step(generation)
            loop = asyncio.get_running_loop()
            loop.call_later(WORD_S, self._go_on, generation)


def engine(path: str = "", *rest: Any, **card: Any) -> kit.FakeEngine:
    """The engine that the file's name asks for."""
    time.sleep(float(os.environ.get(LOAD_S, "0")))
    made = both.engine(path, *rest, **card)
    if isinstance(made, kit.FakeChatEngine):
        made.speaker = SlowSpeaker(made)
    return made


def model(folder: Path, name: str) -> tuple[str, str]:
    """Flags for a model of this name."""
    place = folder / f"{name}.gguf"
    place.write_bytes(both.sound_gguf())
    return "--model-path", str(place)


def program(arguments: list[str]) -> int:
    """What is run; with a parent if the first word is supervised."""
    command: tuple[str, ...] = ()
    if arguments[:1] == ["supervised"]:
        command = (sys.executable, *MODULE, *arguments)
    flags = arguments[len(command[:1]) :]
    es.Notifier.LOADING_EVERY_S = 1.0
    return es.main(flags, engine_factory=engine, command=command)


if __name__ == "__main__":
    sys.exit(program(sys.argv[1:]))
