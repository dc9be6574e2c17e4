"""Room REACH: how long a sequence may be, and the scaling of rotary positions."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embellama_server as es
from tests import kit, models
from tests.test_engine import loaded, refusal
from tests.words import WORDS

YARN: dict[str, Any] = {"rope_scaling": "yarn", "rope_freq_scale": 0.25}
# Each changes what is computed, beside others that it needs for that.
SCALED: dict[str, dict[str, Any]] = {
    "rope_freq_base": {"rope_freq_base": 500.0},
    "rope_freq_scale": {"rope_freq_scale": 0.5},
    "rope_scaling": YARN,
    "yarn_orig_ctx": YARN | {"yarn_orig_ctx": 1 << 20},
    "yarn_ext_factor": YARN | {"yarn_ext_factor": 0.5},
    "yarn_attn_factor": {"rope_freq_scale": 0.5, "yarn_attn_factor": 1.5},
    "yarn_beta_slow": YARN | {"yarn_orig_ctx": 4096, "yarn_beta_slow": 8.0},
    "yarn_beta_fast": YARN | {"yarn_orig_ctx": 4096, "yarn_beta_fast": 2000.0},
}
IDS = list(range(40, 100))


def row(path: Path, **options: Any) -> Any:
    """A vector, or the logits after some tokens if the model generates."""
    with loaded(path, **options) as engine, contextlib.ExitStack() as undo:
        if engine.card.kind != "generate":
            context = undo.enter_context(contextlib.closing(engine.new_context()))
            return context.embed([np.array(IDS, np.int32)])[0]
        steps = undo.enter_context(contextlib.closing(engine.new_step_context()))
        steps.decode([es.StepRow(0, 0, IDS, outputs=1)], 1)
        return steps.logits(len(IDS) - 1).copy()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_causal(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, of no pooling."""
    path = tmp_path_factory.mktemp("generator") / "generator.gguf"
    maker = models.Maker(path, "qwen3", 1, 32, 2, 64, 64, spread=0.3, pooling=None)
    maker.qwen3(len(maker.byte_pairs(WORDS)))
    return maker.write()


@pytest.mark.parametrize("kind", ["decoder", "generator"])
@pytest.mark.parametrize("name", SCALED)
def test_each_setting_of_rotary_positions_reaches_llama_cpp(
    request: pytest.FixtureRequest, kind: str, name: str
) -> None:
    path = request.getfixturevalue(kind)
    options = SCALED[name]
    without = {key: value for key, value in options.items() if key != name}
    difference = np.abs(row(path, **options) - row(path, **without)).max()
    assert difference > 1e-3


def test_scaling_by_one_and_scaling_that_is_off_change_nothing(decoder: Path) -> None:
    plain = row(decoder)
    for options in (
        {"rope_freq_scale": 1.0, "rope_freq_base": 10_000.0},
        {"rope_scaling": "none", "rope_freq_scale": 0.25},
        {"rope_scaling": "linear"},
    ):
        np.testing.assert_array_equal(row(decoder, **options), plain)


def test_scaled_positions_reach_beyond_training(tmp_path: Path) -> None:
    path = models.long_context_bert(tmp_path, context=2048)
    said = refusal(path, context_size=8192)
    assert "context_size = 8192 is more than" in said
    assert "--rope-scaling" in said
    options = {"rope_scaling": "yarn", "rope_freq_scale": 0.75}  # as nomic says
    with loaded(path, context_size=8192, **options) as engine:
        assert engine.card.max_input_tokens == 8192
        assert engine.card.trained_tokens == 2048
        context = engine.new_context(needs_long_context=True)
        vector = context.embed([np.arange(5000, dtype=np.int32) % 100 + 5])
        assert np.isfinite(vector).all()
        context.close()


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, 2048),
        ({"rope_freq_scale": 0.5}, 4096),
        (YARN, 8192),
        ({"rope_freq_scale": 5e-324}, 8192),
        ({"rope_scaling": "none", "rope_freq_scale": 0.5}, 2048),
        ({"rope_freq_scale": 100.0}, 20),
    ],
)
def test_the_context_is_as_long_as_scaled_positions_reach(
    options: dict[str, Any], tokens: int
) -> None:
    settings = es.ModelSettings(**options)
    assert es.default_context_tokens(settings, 2048) == tokens
    found = es.context_and_input_tokens(
        settings, "m.gguf", trained=2048, special=2, kind="embed"
    )
    assert found == (tokens, tokens)


@pytest.mark.parametrize("make", [models.tiny_bert, models.tiny_cross_encoder])
def test_a_table_of_positions_cannot_be_scaled(tmp_path: Path, make: Any) -> None:
    said = refusal(make(tmp_path), rope_freq_scale=0.5, context_size=128)
    assert "has no rotary positions" in said
    assert "leave out rope_freq_scale" in said


def test_memory_is_foreseen_for_the_scaled_context() -> None:
    facts = es.ModelFacts(trained_tokens=1024, n_embd=64, n_vocab=1000)
    plain = es.needed_bytes(kit.settings(), facts)
    assert es.needed_bytes(kit.settings(rope_freq_scale=0.25), facts) > plain
