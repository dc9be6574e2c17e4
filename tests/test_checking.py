"""Room CHECKING, and `check` on the command line: a model before it is served."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embellama_server as es
from tests import chat_models, kit, models
from tests.test_vectors import EXPECTED, ROWS

TEXTS = ["the sea", "a new year", "no time"]


@dataclass
class Desk:
    """`check` in this process."""

    root: Path
    capsys: pytest.CaptureFixture[str]
    out: str = ""
    err: str = ""

    def check(self, *flags: object, factory: Any = kit.FakeEngine) -> int:
        """The exit code; sets out and err."""
        return self.run("check", *flags, factory=factory)

    def run(self, verb: str, *flags: object, factory: Any = kit.FakeEngine) -> int:
        """The same of another verb."""
        given = [verb, "--cache-dir", str(self.root / "cache"), *map(str, flags)]
        try:
            code = es.main(given, engine_factory=factory)
        except SystemExit as end:
            code = int(str(end.code))
        self.out, self.err = self.capsys.readouterr()
        return code

    def model(self, name: str = "fake") -> Path:
        """A file that the fake engine serves."""
        path = self.root / f"{name}.gguf"
        path.write_bytes(es.GGUF_MAGIC)
        return path

    def reference(self, **changes: Any) -> Path:
        """What a program that gives the fake engine's vectors wrote, but for changes."""
        told = {"texts": TEXTS, "embeddings": [vector(text) for text in TEXTS]}
        path = self.root / "reference.json"
        path.write_text(json.dumps(told | changes))
        return path

    @property
    def facts(self) -> dict[str, str]:
        """What was printed of one model."""
        lines = (line.split(None, 1) for line in self.out.splitlines() if line)
        return {line[0]: line[1] for line in lines}


def vector(text: str) -> list[float]:
    """The fake engine's, not scaled to length 1."""
    ids = [1, *(kit.fake_id(word) for word in text.split()), 2]
    return [3.0 * float(x) for x in kit.fake_vector(ids)]


@pytest.fixture
def desk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, capsys)


def test_what_is_in_force_is_told_of_each_model(desk: Desk) -> None:
    assert desk.check(desk.model("a"), desk.model("b"), "--prompt", "query=q: ") == 0
    one, other = desk.out.split("\n\n")[:2]
    assert one.splitlines()[0].split() == ["model", "a@1"]
    assert other.splitlines()[0].split() == ["model", "b@1"]
    desk.out = one
    assert desk.facts["prompts"] == '{"query": "q: "}'
    assert desk.facts["suffix"] == '["<2>"]'
    assert desk.facts["pooling"] == "mean"
    assert desk.facts["normalize"] == "true"
    assert desk.facts["memory"].startswith("at most ")


def test_a_file_may_be_named_with_or_without_the_flag(desk: Desk) -> None:
    assert desk.check(desk.model()) == 0
    plain = desk.out
    assert desk.check("--model-path", desk.model()) == 0
    assert desk.out == plain


def test_vectors_are_compared_whatever_their_length(desk: Desk) -> None:
    assert desk.check(desk.model(), "--reference", desk.reference()) == 0
    lines = [line for line in desk.out.splitlines() if "cosine" in line]
    assert lines[0].startswith("lowest cosine        1.000000, of texts[")
    assert lines[1] == "median cosine        1.000000"


def test_the_median_of_two_is_between_them() -> None:
    reference = es.Reference(["a", "b"], np.array([[1.0, 0.0], [1.0, 0.0]]))
    shown, _ = es.compared(np.array([[0.0, 1.0], [1.0, 0.0]]), reference, 0.0)
    assert shown["median cosine"] == "0.500000"


def test_more_texts_than_a_request_may_have_are_compared(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "MAX_INPUTS", 2)
    assert desk.check(desk.model(), "--reference", desk.reference()) == 0


def test_what_is_far_from_the_reference_is_exit_1_and_named(desk: Desk) -> None:
    vectors = [vector(text) for text in TEXTS]
    file = desk.reference(embeddings=[vectors[0], vectors[2], vectors[2]])
    assert desk.check(desk.model(), "--reference", file) == 1
    assert desk.facts["pooling"] == "mean", "what to compare is told too"
    assert "\nlowest cosine " in desk.out
    assert len(desk.err.splitlines()) == 1
    assert "1 of 3 vectors have a cosine to the reference below 0.99" in desk.err
    assert "texts[1] 'a new year'" in desk.err
    near = np.array(vectors[1]) + 0.2 * np.linalg.norm(vectors[1]) * np.eye(8)[0]
    file = desk.reference(embeddings=[vectors[0], near.tolist(), vectors[2]])
    low = es.cosines(np.array([vectors[1]]), near[None])[0] - 1e-6
    assert desk.check(desk.model(), "--reference", file, "--min-cosine", f"{low}") == 0
    high = f"{low + 2e-6:.7f}"
    assert desk.check(desk.model(), "--reference", file, "--min-cosine", high) == 1


def test_the_reference_s_prompt_is_put_around_its_texts(desk: Desk) -> None:
    file = desk.reference(
        embeddings=[vector(f"find {text}") for text in TEXTS], prompt_name="query"
    )
    given = (desk.model(), "--reference", file)
    assert desk.check(*given, "--prompt", "query=find ") == 0
    assert desk.check(*given, "--prompt", "query=other ") == 1
    assert desk.check(*given) == 1
    assert "prompt_name 'query' is not known" in desk.err


@pytest.mark.parametrize(
    "changes",
    [
        {"texts": []},
        {"texts": "abc"},
        {"texts": [1, 2, 3]},
        {"texts": TEXTS[:2]},
        {"embeddings": []},
        {"embeddings": 3},
        {"embeddings": [[1.0], [1.0, 2.0], [1.0]]},
        {"embeddings": [[0.0] * 8] * 3},
        {"embeddings": [[None] * 8] * 3},
        {"embeddings": [["x"] * 8] * 3},
        {"embeddings": {"a": 1}},
        {"embeddings": [[1.0] * 7] * 3},
        {"texts": ["word " * 99, *TEXTS[1:]]},
        {"prompt_name": 7},
        {"prompt_name": ["query"]},
        {"embeddings": [[1e-200] * 8] * 3},
        {"embeddings": [[1e200] * 8] * 3},
    ],
    ids=str,
)
def test_a_reference_that_cannot_be_compared_is_a_sentence(
    desk: Desk, changes: dict[str, Any]
) -> None:
    assert desk.check(desk.model(), "--reference", desk.reference(**changes)) == 1
    assert desk.out == ""
    assert desk.err.startswith("embellama_server: ")
    assert len(desk.err.splitlines()) == 1
    assert "is a bug" not in desk.err


@pytest.mark.parametrize("text", ["", "[]", "3", '"texts"', "{", "{}", "\x00"])
def test_a_file_that_is_no_reference_is_a_sentence(desk: Desk, text: str) -> None:
    file = desk.root / "r.json"
    file.write_text(text)
    assert desk.check(desk.model(), "--reference", file) == 1
    assert desk.err.startswith(f"embellama_server: reference {file} cannot be used")
    assert desk.check(desk.model(), "--reference", desk.root / "none.json") == 1
    assert desk.check(desk.model(), "--reference", desk.root) == 1


@pytest.mark.parametrize("given", ["-1", "2", "x", "1e-3", "nan", ""])
def test_a_cosine_that_is_none_is_exit_2(desk: Desk, given: str) -> None:
    assert desk.check(desk.model(), f"--min-cosine={given}") == 2


def test_a_reference_of_two_models_is_refused(desk: Desk) -> None:
    given = (desk.model("a"), desk.model("b"), "--reference", desk.reference())
    assert desk.check(*given) == 1
    assert "say which with --model-path" in desk.err


def test_each_kind_of_model_is_checked(desk: Desk, tmp_path: Path) -> None:
    for make, kind in (
        (models.tiny_bert, "embed"),
        (models.tiny_cross_encoder, "rank"),
        (chat_models.tiny_llama, "generate"),
    ):
        folder = tmp_path / kind
        folder.mkdir()
        assert desk.check(make(folder), "--workers", 1, factory=es.Engine) == 0
        assert desk.facts["kind"] == kind
    file = desk.reference()
    for kind, is_it in (("rank", "a reranker"), ("generate", "a model that generates")):
        (path,) = (tmp_path / kind).glob("*.gguf")
        assert desk.check(path, "--reference", file, factory=es.Engine) == 1
        assert f"is {is_it}" in desk.err


BAD_TEMPLATES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "No such file or directory"),
    "not closed": (b"a\n{% for m in messages %}", "(line 2)"),
    "an unknown filter": (b"{{ a | from_json }}", "No filter named 'from_json'"),
    "not UTF-8": (b"\xff", "can't decode byte 0xff"),
    "too long": (b"x" * ((1 << 20) + 1), "may have 1048576"),
}


@pytest.mark.parametrize("kind", BAD_TEMPLATES)
@pytest.mark.parametrize("verb", ["check", "serve"])
def test_a_named_chat_template_that_cannot_be_used_is_exit_2(
    desk: Desk, verb: str, kind: str
) -> None:
    content, words = BAD_TEMPLATES[kind]
    path = desk.root / "own.jinja"
    if content is not None:
        path.write_bytes(content)
    given = ("--model-path", desk.model(), "--chat-template", path, "--no-preload")
    assert desk.run(verb, *given) == 2
    assert desk.out == "" and len(desk.err.splitlines()) == 1
    about = f"flag --chat-template: chat_template = '{path}' cannot be used: "
    assert desk.err.startswith(f"embellama_server: {about}")
    assert words in desk.err
    table = f"[[models]]\npath = '{desk.model()}'\nchat_template = '{path}'\n"
    config = desk.root / "c.toml"
    config.write_text(table)
    assert desk.run(verb, "--config", config) == 2
    assert f"models: chat_template = '{path}' cannot be used: " in desk.err
    assert words in desk.err


def test_each_warning_of_a_start_is_told(desk: Desk) -> None:
    """Of an end that texts lack, a pre-tokenizer, and the files beside the model."""
    path = models.tiny_causal(desk.root, end=False, pre="")
    files = {
        "modules.json": [{"type": "sentence_transformers.models.CNN"}],
        "config_sentence_transformers.json": {"default_prompt_name": "query"},
    }
    for name, content in files.items():
        (desk.root / name).write_text(json.dumps(content))
    assert desk.check(path, "--workers", 1, factory=es.Engine) == 0
    lines = kit.without_amx(desk.err.splitlines())
    told = [line for line in lines if " warning " in line]
    for words in (
        "--end-token",
        "pre-tokenizer",
        "modules.json",
        "default_prompt_name",
    ):
        assert sum(words in line for line in told) == 1, words
    assert len(told) == 4
    assert desk.facts["pooling"] == "last" and desk.facts["suffix"] == "[]"


@pytest.mark.model
def test_the_default_model_is_near_the_vectors_of_sentence_transformers(
    desk: Desk, default_model: Path
) -> None:
    file = desk.root / "reference.json"
    vectors = EXPECTED.astype(float).tolist()
    file.write_text(
        json.dumps({"texts": [row["text"] for row in ROWS], "embeddings": vectors})
    )
    given = (default_model, "--auto-truncate", "--reference", file, "--min-cosine")
    assert desk.check(*given, "0.9999", factory=es.Engine) == 0
    assert desk.facts["median"].startswith("cosine        0.9999")
    # Where it does not do as the reference, it says so.
    flags = ("--pooling", "cls")
    assert desk.check(*given, "0.9999", *flags, factory=es.Engine) == 1
    assert f"{len(ROWS)} of {len(ROWS)} vectors have a cosine" in desk.err


def test_what_cannot_be_served_is_a_sentence(desk: Desk) -> None:
    file = desk.model()
    assert desk.check(file, factory=es.Engine) == 1
    assert desk.err.startswith(f"embellama_server: {file}")
    assert desk.check(desk.root / "none.gguf") == 2
