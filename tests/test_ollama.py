"""OLLAMA: its lists of models, and what it shows of one, in memory or not.

The embedding routes are in test_dialects.py. Files are real, with random weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

import embellama_server as es
from tests import chat_models, kit, models
from tests.test_models import row, serving


def test_a_file_s_type_has_the_name_that_llama_cpp_gives_it() -> None:
    llama = pytest.importorskip("llama_cpp")
    names = {
        getattr(llama, f"LLAMA_FTYPE_{how}_{name}", None)
        for name in es.FILE_TYPES.values()
        for how in ("ALL", "MOSTLY")
    }
    assert names - {None} == {*es.FILE_TYPES}


@pytest.mark.parametrize(
    ("make", "can"),
    [
        (chat_models.tiny_qwen, ["completion", "tools", "thinking"]),
        (chat_models.tiny_llama, ["completion", "tools"]),
        (models.tiny_bert, ["embedding"]),
    ],
)
async def test_what_is_shown_is_the_same_whether_a_model_is_in_memory_or_not(
    tmp_path: Path, make: object, can: list[str]
) -> None:
    assert callable(make)
    path = str(make(tmp_path))
    # What it says when it is not.
    async with serving(
        row(str(kit.fake_gguf(tmp_path))), row(path, name="m", preload=False)
    ) as running:
        reply = await running.ask("POST", "/api/show", {"model": "m:latest"})
        shown = reply.json
        jsonschema.validate(shown, es.OLLAMA_SHOW_REPLY)
        assert running.engines.loads == ["fake"]
        tags = (await running.ask("GET", "/api/tags")).json["models"]
        assert tags[1]["details"]["quantization_level"] in es.FILE_TYPES.values()
    assert shown["capabilities"] == can
    family = shown["details"]["family"]
    assert shown["model_info"]["general.architecture"] == family
    assert shown["model_info"][f"{family}.block_count"] >= 1
    assert all(isinstance(v, str | int | float) for v in shown["model_info"].values())
    # What it is loaded with.
    settings = kit.settings(model_path=path)
    hooks = kit.hooks(es.Log("error", "text", kit.WatchedLog()))
    loaded = es.Loader(str(tmp_path / "cache"), es.Engine, hooks).load(settings)
    try:
        facts = es.facts_of(settings, path)
        for name in ("metadata", "chat_template", "kind", "architecture", "n_params"):
            assert getattr(loaded.facts, name) == getattr(facts, name), name
        if loaded.card.kind == "generate":
            assert shown["template"] == loaded.card.chat_template != ""
    finally:
        assert loaded.free()


async def test_a_model_s_defaults_are_shown_as_parameters(tmp_path: Path) -> None:
    sampling = {"temp": 0.25, "top_k": 7}
    path = str(chat_models.tiny_llama(tmp_path, sampling=sampling))
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }} {% if tools %}{% endif %}")
    async with serving(
        row(str(kit.fake_gguf(tmp_path))),
        row(path, name="m", preload=False, chat_template=str(template)),
    ) as running:
        shown = (await running.ask("POST", "/api/show", {"name": "m"})).json
        pairs = dict(line.split() for line in shown["parameters"].splitlines())
        assert pairs["temperature"] == "0.25"
        assert pairs["top_k"] == "7"
        assert float(pairs["top_p"]) == es.SamplingOptions().top_p
        assert shown["template"] == template.read_text()
        assert shown["capabilities"] == ["completion", "tools"]
        assert "FROM m" in shown["modelfile"]
        json.dumps(shown, allow_nan=False)


@pytest.mark.parametrize(
    ("n_params", "said"),
    [(22_713_216, "23M"), (999_400_000, "999M"), (1_500_000_000, "1.5B")],
)
def test_a_model_s_size_is_told_in_millions_or_billions(
    n_params: int, said: str
) -> None:
    entry = es.ModelEntry(kit.settings())
    entry.known = es.ModelFacts(n_params=n_params)
    assert es._details(entry)["parameter_size"] == said
