"""An actor of Ray that dies once, in the middle of its work, as tests/test_ray.py wants."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import embellama_server as es


class Dying(es.Embedder):
    """The first of all processes that computes its second batch is killed."""

    batches = 0

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        found = super().__call__(batch)
        self.batches += 1
        if self.batches == 2:
            try:
                Path(os.environ["DIED"]).open("x").close()
            except FileExistsError:
                return found
            os.kill(os.getpid(), signal.SIGKILL)
        return found
