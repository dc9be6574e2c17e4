"""Faults under streams: a real process and a tiny model whose steps fail as prompts say.

``python -m tests.chat_faults FLAGS`` is the program with FaultySteps.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

import embellama_server as es
from tests import chat_models, faults, kit

MODULE = ("-m", "tests.chat_faults")
TOKENS = 40  # of each reply
# Tokens of bytes that no reply says, see chat_models: a step with one of them fails.
NAN, BOOM, STALL, DEAF, CRASH, MEMORY = range(5, 11)


class FaultySteps(es.StepContext):
    """A StepContext in which tokens are faults; its steps take time, as a model's do."""

    STEP_S: Final = 0.004

    def __init__(self, *rest: Any) -> None:
        super().__init__(*rest)
        self._aborted = threading.Event()
        self._rows: Sequence[es.StepRow] = ()

    def decode(
        self,
        rows: Sequence[es.StepRow],
        threads: int,
        *,
        is_deterministic: bool = False,
    ) -> None:
        time.sleep(self.STEP_S)
        ids = {int(token) for row in rows for token in row.ids}
        if DEAF in ids:
            threading.Event().wait()
        elif STALL in ids:
            kit.wait(self._aborted)
        elif CRASH in ids:
            os.kill(os.getpid(), signal.SIGSEGV)
        elif BOOM in ids:
            raise es.EngineError("as asked")
        elif MEMORY in ids:
            bytearray(1 << 50)
        super().decode(rows, threads, is_deterministic=is_deterministic)
        self._rows = rows

    def logits(self, index: int) -> Any:
        at, found = 0, super().logits(index)
        for row in self._rows:
            at += len(row.ids)
            if index < at:
                return found * np.float32("nan") if NAN in row.ids else found
        raise AssertionError("no such row")

    def rearm(self) -> None:
        super().rearm()
        self._aborted.clear()

    def abort(self) -> None:
        super().abort()
        self._aborted.set()


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[kit.Server]:
    """The program with faulty steps of a tiny model, and room for eight streams."""
    path = chat_models.tiny_llama(folder)
    given = ["--model-path", str(path), "--parallel", "8", "--context-size", "8192"]
    given.append("--accept-token-ids")
    with kit.started(*given, *flags, module=MODULE) as server:
        yield server


class Client(faults.Client):
    """Asks for streams, and judges them by their end."""

    tls: ssl.SSLContext | None = None

    def ask(
        self, text: str, is_right: Callable[[Any], bool] | None = None
    ) -> faults.Answer:
        return self.stream(text)

    def stream(self, prompt: Any, **more: Any) -> faults.Answer:
        """What becomes of one: right only if it says all, and that it is all."""
        asks = {"max_tokens": TOKENS, "stream_options": {"include_usage": True}} | more
        said, answer = b"", faults.Answer("lost")
        made = self.connect()
        try:
            reply = self.begin(made, prompt, **asks)
            if reply.status != 200:
                told = json.loads(reply.read())["error"]
                return faults.Answer(str(reply.status), told["message"])
            while line := reply.readline():
                said += line
        except ConnectionRefusedError:
            answer = faults.Answer("refused")
        except TimeoutError:
            answer = faults.Answer("hung", said.decode())
        except (OSError, http.client.HTTPException) as error:
            answer = faults.Answer("lost", f"{error!r} after {said[-200:]!r}")
        finally:
            made.close()
        events = [json.loads(one[6:]) for one in said.splitlines() if one[6:7] == b"{"]
        if errors := [event["error"] for event in events if "error" in event]:
            return faults.Answer("500", errors[0]["message"])
        if not said.endswith(b"data: [DONE]\n\n"):
            return answer
        is_whole = events[-1]["usage"]["completion_tokens"] == asks["max_tokens"]
        return faults.Answer("right" if is_whole else "wrong", said.decode())

    def connect(self) -> http.client.HTTPConnection:
        """A new connection."""
        if self.tls is not None:
            return http.client.HTTPSConnection(
                *self._address, timeout=kit.DEADLINE_S, context=self.tls
            )
        return http.client.HTTPConnection(*self._address, timeout=kit.DEADLINE_S)

    def begin(
        self, connection: http.client.HTTPConnection, prompt: Any, **more: Any
    ) -> http.client.HTTPResponse:
        """The response to a request for a stream, once its head is here."""
        asks = {"prompt": prompt, "stream": True, "ignore_eos": True} | more
        connection.request("POST", "/v1/completions", json.dumps(asks), faults.JSON)
        return connection.getresponse()


if __name__ == "__main__":
    es.StepContext = FaultySteps  # type: ignore[assignment,misc]
    sys.exit(es.main())
