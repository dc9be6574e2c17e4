"""Room FOLDER: what the files beside a model say, and what of it is not done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import embellama_server as es
from tests import kit, models

ST = "sentence_transformers.models"


def said(folder: Path, files: dict[str, Any], **card: Any) -> list[str]:
    """What is not obeyed of some files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)
    return es.not_obeyed(str(folder / "m.gguf"), kit.FakeEngine(**card))


def modules(*names: str) -> list[dict[str, Any]]:
    return [
        {"idx": n, "name": str(n), "path": f"{n}_{name}", "type": f"{ST}.{name}"}
        for n, name in enumerate(names)
    ]


PLAIN = modules("Transformer", "Pooling", "Normalize")
MEAN = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
OBEYED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "mean": ({"modules.json": PLAIN, "1_Pooling/config.json": MEAN}, {}),
    "cls": ({"1_Pooling/config.json": CLS}, {"pooling": "cls"}),
    "mean by the root": (
        {"1_Pooling/config.json": {"pooling_mode_mean_sqrt_len_tokens": True}},
        {},
    ),
    "newer pooling": ({"1_Pooling/config.json": {"pooling_mode": "mean"}}, {}),
    "dense": (
        {"modules.json": modules("Transformer", "Pooling", "Dense", "Normalize")},
        {"has_dense": True},
    ),
    "as long": ({"sentence_bert_config.json": {"max_seq_length": 32}}, {}),
    "no length": ({"sentence_bert_config.json": {"max_seq_length": None}}, {}),
    "cosine": (
        {"config_sentence_transformers.json": {"similarity_fn_name": "cosine"}},
        {},
    ),
    "dot of length 1": (
        {
            "modules.json": PLAIN,
            "config_sentence_transformers.json": {"similarity_fn_name": "dot"},
        },
        {},
    ),
    "other shapes": (
        {
            "modules.json": {},
            "1_Pooling/config.json": [],
            "sentence_bert_config.json": 1,
        },
        {},
    ),
}


@pytest.mark.parametrize("name", OBEYED)
def test_what_is_done_as_the_files_say_needs_no_line(tmp_path: Path, name: str) -> None:
    files, card = OBEYED[name]
    assert said(tmp_path, files, **card) == []


OTHER: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "pooling": (
        {"1_Pooling/config.json": CLS},
        {},
        "1_Pooling/config.json: pooling cls (here mean; see --pooling)",
    ),
    "last of what generates": (
        {"1_Pooling/config.json": {"pooling_mode_lasttoken": True}},
        {"kind": "generate", "pooling": "none"},
        "1_Pooling/config.json: pooling last (here none; see --pooling)",
    ),
    "two poolings": (
        {"1_Pooling/config.json": MEAN | {"pooling_mode_cls_token": True}},
        {},
        "1_Pooling/config.json: pooling cls+mean (here mean; see --pooling)",
    ),
    "prompts left out": (
        {"1_Pooling/config.json": MEAN | {"include_prompt": False}},
        {},
        "1_Pooling/config.json: prompts are left out of the mean",
    ),
    "dense": (
        {"modules.json": modules("Transformer", "Pooling", "Dense", "CNN")},
        {},
        "modules.json: Dense, CNN",
    ),
    "shorter": (
        {"sentence_bert_config.json": {"max_seq_length": 16}},
        {},
        (
            "sentence_bert_config.json: texts are cut at 16 tokens (here 32; see "
            "--max-input-tokens)"
        ),
    ),
    "lower case": (
        {"sentence_bert_config.json": {"do_lower_case": True}},
        {},
        "sentence_bert_config.json: texts in lower case",
    ),
    "dot": (
        {"config_sentence_transformers.json": {"similarity_fn_name": "dot"}},
        {},
        (
            "config_sentence_transformers.json: similarity dot of vectors that are not "
            "scaled to length 1 (send normalize: false)"
        ),
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_done_as_the_files_say_is_named(tmp_path: Path, name: str) -> None:
    files, card, line = OTHER[name]
    assert said(tmp_path, files, **card) == [line]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (found,) = said(tmp_path, {"modules.json": "[{"})
    assert found.startswith("modules.json cannot be read (")
    assert said(tmp_path, {"modules.json": PLAIN, "1_Pooling": "a file"}) == []


def test_all_of_it_is_one_line_at_the_start(tmp_path: Path) -> None:
    path = models.tiny_bert(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps(modules("Transformer", "CNN")))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(CLS))
    stream = kit.WatchedLog()
    hooks = kit.hooks(es.Log("info", "text", stream))
    loader = es.Loader(str(tmp_path / "cache"), es.Engine, hooks)
    told = kit.settings(model_path=str(path), cache_dir=str(tmp_path / "cache"))
    assert loader.load(told).free()
    lines = [line for line in stream.getvalue().splitlines() if "files beside" in line]
    assert len(lines) == 1
    assert " warning " in lines[0]
    assert "modules.json: CNN; 1_Pooling/config.json: pooling cls" in lines[0]
