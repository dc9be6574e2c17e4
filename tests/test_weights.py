"""Room WEIGHTS: re-encoded once, measured once, and only used where nothing changes.

A file of a few bytes stands for a model: after GGUF it says what its weights are, as
FakeEngine.reencode() writes it. What it would take to compute is said by a table.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import io
import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import embellama_server as es
from tests import kit, test_vectors

SHA = "5" * 64
FASTER, SLOWER = es.Finding(1.5, 1.0), es.Finding(0.7, 1.0)
FASTEST_BUT_OTHER = es.Finding(9.0, es.MIN_COSINE - 1e-6)


class Usage(NamedTuple):
    """What shutil.disk_usage() says, as far as anybody looks."""

    free: int


class Loaded(kit.FakeEngine):
    """What became of a file; says of itself what was made of it."""

    def __init__(self, path: str, n_params: int) -> None:
        weights = Path(path).read_bytes().removeprefix(es.GGUF_MAGIC).decode()
        super().__init__(weights=weights, n_params=n_params)
        self.path = path
        self.made: list[str] = []
        self.failure: Exception | None = None  # of the next re-encoding

    def reencode(self, target: str, weights: str) -> None:
        self.made.append(weights)
        super().reencode(target, weights)
        if self.failure is not None:
            raise self.failure


class Shelf:
    """A model file, a folder for what is made of it, and a table of measurements."""

    def __init__(self, root: Path, weights: str = "f16", stem: str = "model") -> None:
        self.file = root / f"{stem}.gguf"
        self.file.write_bytes(es.GGUF_MAGIC + weights.encode())
        self.folder = root / "deep/weights"
        self.log = io.StringIO()
        self.n_params = 1
        self.engines: list[Loaded] = []
        self.failures: dict[str, Exception] = {}  # of loading, by weights
        self.reencoding: Exception | None = None
        self.findings: dict[str, es.Finding] = {}
        self.measured: list[str] = []

    def load(self, path: str) -> Loaded:
        engine = Loaded(path, self.n_params)
        if engine.card.weights in self.failures:
            raise self.failures[engine.card.weights]
        engine.failure = self.reencoding
        self.engines.append(engine)
        return engine

    def compare(self, own: Loaded, other: Loaded) -> es.Finding:
        """Stands for es.compare()."""
        assert own.card.weights != other.card.weights
        assert not own.is_closed
        assert not other.is_closed
        self.measured.append(other.card.weights)
        return self.findings.get(other.card.weights, SLOWER)

    def cache(self, sha256: str = SHA) -> es.WeightsCache:
        log = es.Log("info", "text", self.log)
        return es.WeightsCache(self.folder, str(self.file), sha256, self.load, log)

    def engine(self, wanted: str, sha256: str = SHA) -> Loaded:
        """What a start gets; asserts that nothing else stays loaded."""
        self.engines.clear()
        engine = self.cache(sha256).engine(wanted)
        assert isinstance(engine, Loaded)
        assert [e for e in self.engines if not e.is_closed] == [engine]
        return engine

    def refusal(self, wanted: str) -> str:
        """What a start says that fails."""
        with pytest.raises(es.StartupError) as caught:
            self.cache().engine(wanted)
        return str(caught.value)

    def target(self, weights: str, sha256: str = SHA) -> Path:
        return self.folder / f"model-{sha256[:16]}-{weights}.gguf"

    def kept(self) -> list[str]:
        """What is in the folder, beside its lock."""
        names = (path.name for path in self.folder.glob("*"))
        return sorted(name for name in names if name != ".lock")

    def made(self) -> list[str]:
        """What the engines of the last start re-encoded."""
        return [weights for engine in self.engines for weights in engine.made]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    made = Shelf(tmp_path)
    monkeypatch.setattr(es, "compare", made.compare)
    return made


def of_type(shelf: Shelf, weights: str) -> list[str]:
    """The names of a re-encoded model's files."""
    target = shelf.target(weights)
    return [target.name, target.with_suffix(".sha256").name]


DECISION = f"model-{SHA[:16]}.json"

# --- asked for by name ---


def test_keep_loads_the_file_and_writes_nothing(shelf: Shelf) -> None:
    assert shelf.engine("keep").path == str(shelf.file)
    assert not shelf.folder.exists()


@pytest.mark.parametrize("weights", ["f32", "bf16", "q8_0"])
def test_a_type_is_made_once_and_sealed(shelf: Shelf, weights: str) -> None:
    engine = shelf.engine(weights)
    target = shelf.target(weights)
    assert (engine.path, engine.card.weights) == (str(target), weights)
    assert shelf.made() == [weights]
    sealed = target.with_suffix(".sha256").read_text()
    assert sealed == hashlib.sha256(target.read_bytes()).hexdigest()
    assert shelf.kept() == of_type(shelf, weights), "and nothing else"
    assert shelf.engine(weights).path == str(target)
    assert [e.path for e in shelf.engines] == [str(target)], "the file is not needed"
    assert not shelf.measured


def test_the_files_own_type_is_the_file(shelf: Shelf) -> None:
    assert shelf.engine("f16").path == str(shelf.file)
    assert shelf.kept() == []


def test_a_quantised_file_is_re_encoded_when_asked_by_name(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, "q4_k_m")
    assert shelf.engine("bf16").path == str(shelf.target("bf16"))


def test_files_of_one_name_and_other_content_are_kept_apart(shelf: Shelf) -> None:
    other = "6" * 64
    for sha256 in (SHA, other, SHA):
        assert shelf.engine("bf16", sha256).path == str(shelf.target("bf16", sha256))
    assert not shelf.made()


DAMAGE = ["cut", "changed", "gone", "unsealed", "sealed empty", "sealed otherwise"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_made_again(shelf: Shelf, damage: str) -> None:
    shelf.engine("bf16")
    target = shelf.target("bf16")
    whole, seal = target.read_bytes(), target.with_suffix(".sha256")
    match damage:
        case "cut":
            target.write_bytes(b"")
        case "changed":
            target.write_bytes(whole[:-1] + b"x")
        case "gone":
            target.unlink()
        case "unsealed":
            seal.unlink()
        case "sealed empty":
            seal.write_bytes(b"")
        case "sealed otherwise":
            seal.write_bytes(b"\xff" * 64)
    assert shelf.engine("bf16").path == str(target)
    assert shelf.made() == ["bf16"]
    assert target.read_bytes() == whole
    assert shelf.kept() == of_type(shelf, "bf16")


def test_a_missing_model_without_a_file_is_not_a_seal_that_matches(
    shelf: Shelf,
) -> None:
    # The checksum of no file is the empty string: so may be what a full disk left.
    shelf.folder.mkdir(parents=True)
    shelf.target("bf16").with_suffix(".sha256").write_bytes(b"")
    assert shelf.engine("bf16").card.weights == "bf16"


@pytest.mark.parametrize("wanted", ["auto", "bf16"])
def test_what_a_killed_process_left_is_removed(shelf: Shelf, wanted: str) -> None:
    shelf.folder.mkdir(parents=True)
    for name in (".new-model.gguf", f".new-{shelf.target('bf16').name}", ".new-x.json"):
        (shelf.folder / name).write_bytes(b"half")
    shelf.engine(wanted)
    assert not [name for name in shelf.kept() if name.startswith(".new-")]


def test_what_could_not_be_finished_is_neither_used_nor_left(shelf: Shelf) -> None:
    shelf.reencoding = es.EngineError("llama_model_quantize: no")
    assert "no" in shelf.refusal("bf16")
    assert shelf.kept() == [], "half a model may fill the disk"
    shelf.reencoding = None
    assert shelf.engine("bf16").card.weights == "bf16"
    assert shelf.kept() == of_type(shelf, "bf16")


def test_servers_that_start_together_make_it_once(shelf: Shelf) -> None:
    together = threading.Barrier(4)
    found: list[es.Engine] = []

    def start() -> None:
        together.wait(kit.DEADLINE_S)
        found.append(shelf.cache().engine("bf16"))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(kit.DEADLINE_S)
    assert [engine.card.weights for engine in found] == ["bf16"] * 4
    assert shelf.made() == ["bf16"]


STEMS = {
    "long": "a" * 240,
    "wide": "\N{GRINNING FACE}" * 60,
    "two lines": "a\nb",
    "no text": "\udcff",
}


@pytest.mark.parametrize("stem", STEMS.values(), ids=STEMS)
def test_a_file_may_be_called_anything(tmp_path: Path, stem: str) -> None:
    shelf = Shelf(tmp_path, stem=stem)
    for _ in range(2):
        assert shelf.engine("bf16").card.weights == "bf16"
    assert not shelf.made()


# --- chosen ---


@pytest.mark.parametrize(
    ("findings", "chosen"),
    [
        ({}, "f16"),
        ({"bf16": FASTER}, "bf16"),
        ({"q8_0": FASTER}, "q8_0"),
        ({"bf16": FASTEST_BUT_OTHER}, "f16"),
        ({"bf16": FASTEST_BUT_OTHER, "q8_0": FASTER}, "q8_0"),
        ({"bf16": es.Finding(es.MIN_SPEEDUP - 0.01, 1.0)}, "f16"),
        ({"bf16": es.Finding(es.MIN_SPEEDUP, es.MIN_COSINE)}, "bf16"),
        ({"bf16": FASTER, "q8_0": es.Finding(1.6, 1.0)}, "q8_0"),
        ({"bf16": FASTER, "q8_0": es.Finding(1.4, 1.0)}, "bf16"),
        ({"bf16": FASTER, "q8_0": FASTER}, "bf16"),  # the first of equals
        ({"bf16": es.Finding(math.nan, 1.0)}, "f16"),
        ({"bf16": es.Finding(math.inf, math.nan)}, "f16"),
    ],
)
def test_auto_takes_the_fastest_that_gives_the_same_vectors(
    shelf: Shelf, findings: dict[str, es.Finding], chosen: str
) -> None:
    shelf.findings = findings
    engine = shelf.engine("auto")
    assert engine.card.weights == chosen
    assert shelf.measured == ["bf16", "f32", "q8_0"]
    assert shelf.made() == ["bf16", "f32", "q8_0"], "each once"
    files = of_type(shelf, chosen) if chosen != "f16" else []
    assert shelf.kept() == sorted([*files, DECISION]), "losers are deleted"
    for weights in ("bf16", "f32", "q8_0"):
        assert f"weights tried type={weights} " in shelf.log.getvalue()


@pytest.mark.parametrize(
    ("own", "tried"),
    [
        ("f32", ["bf16", "f16", "q8_0"]),
        ("f16", ["bf16", "f32", "q8_0"]),
        ("bf16", ["f16", "f32", "q8_0"]),
        # Quantised files are somebody's choice: for size, even where bf16 is faster.
        *((own, []) for own in ("q8_0", "q4_k_m", "unknown", "")),
    ],
)
def test_auto_tries_other_types_of_exact_weights_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, tried: list[str]
) -> None:
    shelf = Shelf(tmp_path, own)
    monkeypatch.setattr(es, "compare", shelf.compare)
    assert shelf.engine("auto").path == str(shelf.file)
    assert shelf.measured == shelf.made() == tried
    assert shelf.kept() == [DECISION]


@pytest.mark.parametrize("better", [{}, {"bf16": FASTER}], ids=["keep", "bf16"])
def test_what_was_chosen_is_remembered(
    shelf: Shelf, better: dict[str, es.Finding]
) -> None:
    shelf.findings = better
    path = shelf.engine("auto").path
    shelf.measured.clear()
    for _ in range(2):
        assert shelf.engine("auto").path == path
        assert [e.path for e in shelf.engines] == [path], "nothing else is loaded"
    assert not shelf.measured


def test_a_remembered_model_that_is_damaged_is_made_again_without_measuring(
    shelf: Shelf,
) -> None:
    shelf.findings = {"bf16": FASTER}
    shelf.engine("auto")
    shelf.target("bf16").write_bytes(b"")
    shelf.measured.clear()
    assert shelf.engine("auto").card.weights == "bf16"
    assert not shelf.measured
    assert shelf.made() == ["bf16"]


def test_another_cpu_or_llama_cpp_is_measured_anew(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.findings = {"bf16": FASTER}
    shelf.engine("auto")
    monkeypatch.setattr(es, "_here", lambda: "elsewhere")
    shelf.findings = {"q8_0": FASTER}
    assert shelf.engine("auto").card.weights == "q8_0"
    assert shelf.measured == ["bf16", "f32", "q8_0"] * 2
    assert shelf.kept() == sorted([*of_type(shelf, "q8_0"), DECISION])
    shelf.engine("auto")
    assert len(shelf.measured) == 6, "and this is remembered"


class Another:
    """The package, built otherwise."""

    record: str | None = "llama_cpp/lib/libllama.so,sha256=x,1\n"

    def __init__(self, name: str) -> None:
        assert name == "llama-cpp-python"

    def read_text(self, name: str) -> str | None:
        return self.record


def test_here_is_this_cpu_and_this_build_of_llama_cpp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {es._here()}
    monkeypatch.setattr(es, "cpu_name", lambda: "another")
    found.add(es._here())
    monkeypatch.setattr(es, "installed_version", lambda _: (9, 9))
    found.add(es._here())
    monkeypatch.setattr(es, "installed_version", lambda _: None)
    found.add(es._here())
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", "/opt/another/build")
    found.add(es._here())
    monkeypatch.setattr(importlib.metadata, "distribution", Another)
    found.add(es._here())
    monkeypatch.setattr(Another, "record", None)  # pip was interrupted
    found.add(es._here())
    assert len(found) == 7


def test_another_content_of_the_file_is_measured_anew(shelf: Shelf) -> None:
    shelf.findings = {"bf16": FASTER}
    shelf.engine("auto")
    assert shelf.engine("auto", "6" * 64).path == str(shelf.target("bf16", "6" * 64))
    assert shelf.measured == ["bf16", "f32", "q8_0"] * 2


HERE = es._here()
FILES = st.binary(max_size=60) | st.recursive(
    st.none() | st.text() | st.integers() | st.booleans(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
).map(lambda value: json.dumps(value).encode())


@given(FILES)
@example(b"")
@example(b'{"here": 1, "weights": []}')
@example(json.dumps({"here": HERE, "weights": ["bf16"]}).encode())
@example(json.dumps({"here": HERE, "weights": "q2_k"}).encode())
@example(json.dumps({"here": HERE, "weights": "../../x"}).encode())
@example(json.dumps({"here": HERE, "weights": "auto"}).encode())
@example(json.dumps({"here": HERE, "weights": ""}).encode())
@example(json.dumps({"here": [HERE], "weights": "keep"}).encode())
@example(b"[" * 1000)
def test_a_decision_that_makes_no_sense_is_made_again(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as temp, pytest.MonkeyPatch.context() as patch:
        shelf = Shelf(Path(temp))
        patch.setattr(es, "compare", shelf.compare)
        shelf.folder.mkdir(parents=True)
        (shelf.folder / DECISION).write_bytes(content)
        assert shelf.engine("auto").path == str(shelf.file)
        assert shelf.measured == ["bf16", "f32", "q8_0"]
        shelf.engine("auto")
        assert len(shelf.measured) == 3, "and this time it is remembered"


# --- where there is no room ---


def no_room(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0))


def no_folder(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root can write anywhere, but not into a file.
    shelf.folder.parent.write_bytes(b"a file where a folder must be made")


def only_readable(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    (shelf.folder / ".lock").mkdir(parents=True)


def full_while_writing(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.reencoding = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def refused_by_llama_cpp(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.reencoding = es.EngineError("llama_model_quantize: failed to quantize")


TROUBLE = [no_room, no_folder, only_readable, full_while_writing, refused_by_llama_cpp]
trouble_of_any_kind = pytest.mark.parametrize("trouble", TROUBLE)


@trouble_of_any_kind
def test_what_cannot_be_made_by_name_is_one_sentence_that_says_what_to_do(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, trouble: Any
) -> None:
    trouble(shelf, monkeypatch)
    said = shelf.refusal("bf16")
    assert str(shelf.folder) in said
    assert "--weights keep" in said
    assert "\n" not in said
    assert not shelf.target("bf16").exists()


@trouble_of_any_kind
def test_auto_serves_the_files_own_weights_then_and_warns(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, trouble: Any
) -> None:
    trouble(shelf, monkeypatch)
    engine = shelf.engine("auto")
    assert engine.path == str(shelf.file)
    lines = [x for x in shelf.log.getvalue().splitlines() if " warning " in x]
    assert lines
    assert all(str(shelf.folder) in line for line in lines)
    assert not shelf.measured


@pytest.mark.parametrize("weights", ["bf16", "f32", "q8_0"])
def test_auto_serves_the_file_when_what_was_made_of_it_cannot_be_loaded(
    shelf: Shelf, weights: str
) -> None:
    shelf.failures = {weights: es.StartupError("no memory for a second one")}
    assert shelf.engine("auto").path == str(shelf.file)


def test_room_is_asked_for_before_anything_is_written(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Twice what will be needed: it stands beside what is there already.
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free))
    shelf.n_params = 1_000_000
    for weights, size in {
        "f32": 4_000_000,
        "bf16": 2_000_000,
        "q8_0": 1_200_000,
    }.items():
        free = size - 1
        assert f"{size >> 20} MiB are needed" in shelf.refusal(weights)
        assert not shelf.made()
        free = size
        assert shelf.engine(weights).card.weights == weights
        shelf.engines.clear()


# --- measured ---


class Rows(es.Context):
    """A context that gives these vectors, one a call, and then the last one."""

    def __init__(self, engine: Giving, *rows: Sequence[float]) -> None:
        self._engine = engine
        self._rows_left = [*rows]

    def embed(self, inputs: Sequence[Any], **_: Any) -> Any:
        row = self._rows_left.pop(0) if self._rows_left[1:] else self._rows_left[0]
        return np.array([row], np.float32)

    def close(self) -> None:
        self._engine.contexts_open -= 1


class Giving(kit.FakeEngine):
    """An engine whose contexts give these vectors."""

    def __init__(self, *rows: Sequence[float]) -> None:
        super().__init__()
        self._rows = rows

    def new_context(self, **_: Any) -> Any:
        self.contexts_open += 1
        return Rows(self, *self._rows)


@pytest.mark.parametrize(
    ("other", "least"),
    [
        ([(1, 0), (0, 1)], 1.0),
        ([(1, 0), (0.6, 0.8)], 0.8),
        ([(0, 1), (0, 1)], 0.0),
        ([(1, 0), (0, -1)], -1.0),
        ([(1, 0), (math.nan, math.nan)], 0.0),
        ([(math.nan, math.nan), (0, 1)], 0.0),
    ],
)
def test_the_least_cosine_counts_nan_is_far_and_other_vectors_are_not_timed(
    other: list[tuple[float, float]], least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "PROBES", ("one", "two"))
    monkeypatch.setattr(es, "_MEASURE_S", 0.0)
    own = [(1, 0), (0, 1)]
    # And so it is when our own vectors are the ones that are none.
    for pair in ((own, other), (other, own)):
        engines = [Giving(*rows) for rows in pair]
        finding = es.compare(*engines)
        assert finding.cosine == pytest.approx(least)
        assert (finding.speedup == 0) == (least < es.MIN_COSINE)
        assert [engine.contexts_open for engine in engines] == [0, 0]


def test_equal_vectors_are_timed_and_every_context_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(es, "_MEASURE_S", 0.0)
    own, other = kit.FakeEngine(), kit.FakeEngine(weights="bf16")
    finding = es.compare(own, other)
    assert finding.cosine == pytest.approx(1)
    assert finding.speedup > 0
    assert len(own.calls) == len(other.calls) == len(es.PROBES) + 1
    longest = max(own.calls, key=lambda batch: sum(map(len, batch)))
    assert own.calls[-1] == other.calls[-1] == longest
    assert own.contexts_open == other.contexts_open == 0


def test_contexts_are_closed_when_a_measurement_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(es, "PROBES", ("fine", kit.BOOM_WORD))
    own, other = kit.FakeEngine(), kit.FakeEngine()
    with pytest.raises(es.EngineError):
        es.compare(own, other)
    assert own.contexts_open == other.contexts_open == 0


@pytest.mark.parametrize(
    "card",
    [
        {},
        {"max_input_tokens": 4},
        {"max_input_tokens": 8192, "context_tokens": 512},
        # --batch-tokens 16 --common-tokens 16: less than an input may have.
        {"max_input_tokens": 512, "context_tokens": 16},
    ],
    ids=str,
)
def test_probes_fit_into_an_ordinary_context(card: dict[str, Any]) -> None:
    engine = kit.FakeEngine(**card)
    inputs = es.probe_inputs(engine)
    assert len(inputs) == len(es.PROBES)
    most = min(engine.card.max_input_tokens, engine.card.context_tokens)
    for ids in inputs:
        assert 3 <= len(ids) <= most
        assert (ids[0], ids[-1]) == (1, 2), "special tokens stay"


# --- with the real model ---

Engines = dict[str, es.Engine]


@pytest.fixture(scope="module")
def engines(
    default_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engines]:
    """The default model, and what reencode() made of it."""
    options = es.ModelSettings(batch_tokens=test_vectors.BATCH_TOKENS)
    folder, log = tmp_path_factory.mktemp("weights"), kit.quiet_log()
    loaded = {"f16": es.Engine(str(default_model), options, log)}
    for weights in ("f32", "bf16", "q8_0"):
        path = str(folder / f"{weights}.gguf")
        loaded["f16"].reencode(path, weights)
        loaded[weights] = es.Engine(path, options, log)
    yield loaded
    for engine in loaded.values():
        engine.close()


@pytest.mark.model
def test_a_re_encoded_model_says_what_it_is_and_is_otherwise_the_same(
    engines: Engines,
) -> None:
    own = engines["f16"].card
    for weights, engine in engines.items():
        card = engine.card
        assert card.weights == weights
        for name in ("n_embd", "n_params", "n_vocab", "pooling", "prefix", "suffix"):
            assert getattr(card, name) == getattr(own, name)
        assert engine.tokenizer.encode("Hello, wörld") == engines[
            "f16"
        ].tokenizer.encode("Hello, wörld")
    sizes = {weights: engine.card.size_bytes for weights, engine in engines.items()}
    assert sizes["q8_0"] < sizes["bf16"] <= sizes["f16"] < sizes["f32"]


@pytest.mark.model
@pytest.mark.parametrize(
    ("weights", "least"), [("f32", 0.9999), ("bf16", 0.9999), ("q8_0", 0.99)]
)
def test_a_re_encoded_model_gives_nearly_the_same_vectors(
    engines: Engines, weights: str, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_MEASURE_S", 0.0)
    finding = es.compare(engines["f16"], engines[weights])
    assert least <= finding.cosine <= 1 + 1e-6


@pytest.mark.model
def test_a_model_is_as_good_and_as_fast_as_itself(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_MEASURE_S", 0.5)
    finding = es.compare(engines["f16"], engines["f16"])
    assert finding.cosine > 0.99999
    assert 0.5 < finding.speedup < 2


@pytest.mark.model
def test_the_bf16_models_vectors_are_those_of_the_reference(engines: Engines) -> None:
    texts = list(test_vectors.TEXTS)
    vectors = test_vectors.computed(engines["bf16"], [[text] for text in texts])
    test_vectors.assert_close(vectors, texts, 0.999)


@pytest.mark.model
def test_a_folder_that_is_not_there_is_an_engine_error(
    engines: Engines, tmp_path: Path
) -> None:
    with pytest.raises(es.EngineError, match="llama_model_quantize"):
        engines["f16"].reencode(str(tmp_path / "none/model.gguf"), "bf16")
