"""Room BACKENDS: what computes is built into llama.cpp, or loaded from beside it.

A build of the second kind takes long. Its C functions are played here; the real ones are
asked if VARIANTS_WHEEL names a wheel of it, made as README says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import embellama_server as es
from tests import kit, models

FOLDER = "/opt/\udcff llama/lib"  # a path is bytes


@dataclass
class Library:
    """llama.cpp's registry: what is built in, and what a folder adds to it."""

    built_in: int
    found: int
    _name: str = f"{FOLDER}/libllama.so"
    loaded: list[bytes] = field(default_factory=list)

    def ggml_backend_reg_count(self) -> int:
        return self.built_in + self.found * len(self.loaded)

    def ggml_backend_load_all_from_path(self, folder: bytes) -> None:
        self.loaded.append(folder)


@pytest.mark.parametrize(
    ("built_in", "found", "calls"),
    [(1, 0, 0), (2, 1, 0), (0, 1, 1), (0, 2, 1), (0, 0, 2)],
    ids=["native", "CUDA built in", "variants", "variants, CUDA", "nothing fits"],
)
def test_backends_are_loaded_once_from_beside_libllama_if_none_is_built_in(
    built_in: int, found: int, calls: int
) -> None:
    library = Library(built_in, found)
    llama = SimpleNamespace(_lib=library)
    for _ in range(2):  # each model that is loaded asks for it
        if library.built_in or library.found:
            es.load_backends(llama)
            continue
        with pytest.raises(es.StartupError) as caught:
            es.load_backends(llama)
        said = str(caught.value)
        assert FOLDER in said and es.cpu_name() in said and "\n" not in said
    assert library.loaded == [os.fsencode(FOLDER)] * calls


@pytest.mark.parametrize(
    ("told", "features"),
    [
        (b"CPU : SSE3 = 1 | AVX512_BF16 = 0 | FMA = 1 | ", "SSE3,FMA"),
        (b"CPU : NEON = 1 | SVE_CNT = 16 | ", "NEON,SVE_CNT"),
        (b"", ""),
    ],
)
def test_features_are_those_that_llama_cpp_computes_with(
    told: bytes, features: str
) -> None:
    llama = SimpleNamespace(llama_print_system_info=lambda: told)
    assert es.cpu_features(llama) == features


def test_a_model_s_card_says_them(tmp_path: Path) -> None:
    path = str(models.tiny_bert(tmp_path))
    engine = es.Engine(path, es.ModelSettings(), kit.quiet_log())
    assert engine.card.cpu_features == es.cpu_features(engine._llama) != ""


def test_what_multiplies_wrong_or_dies_of_it_is_told_apart_from_what_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(models.tiny_bert(tmp_path))
    engine = es.Engine(path, es.ModelSettings(), kit.quiet_log())
    library = engine._llama._lib._name
    assert es.why_no_tiles(library, "CPU") == "", "memory that every CPU has"
    assert es.why_no_tiles(library, "of another CPU") == ""
    assert "cannot open shared object file" in es.why_no_tiles("/none/libllama.so")
    sound = es._TILES
    for change, told in {
        ("x - 256", "x - 200"): "a product is wrong",
        ("graph = ", "import os; os.abort(); graph = "): "killed by SIGABRT",
    }.items():
        monkeypatch.setattr(es, "_TILES", sound.replace(*change))
        es.why_no_tiles.cache_clear()
        assert es.why_no_tiles(library, "CPU") == told
    es.why_no_tiles.cache_clear()


@pytest.mark.parametrize("why", ["", "killed by SIGILL"])
def test_where_amx_is_built_wrong_weights_are_computed_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    path = str(models.tiny_bert(tmp_path))
    real, seen, said = es.LlamaLog.call, list[bool](), list[str]()

    def call(log: es.LlamaLog, function: Any, *given: Any) -> Any:
        if isinstance(given[-1], engine_module.llama_model_params):
            seen.append(given[-1].use_extra_bufts)
        return real(log, function, *given)

    def note(*words: object, **more: object) -> None:
        said.append(f"{words[0]} {words[-1]} {more}" * ("AMX" in str(words[-1])))

    engine_module = es._llama_cpp()
    monkeypatch.setattr(es.LlamaLog, "call", call)
    monkeypatch.setattr(es, "cpu_features", lambda _: "AVX512,AMX_INT8")
    monkeypatch.setattr(es, "why_no_tiles", lambda _: why)
    log: Any = note
    es.Engine(path, es.ModelSettings(), log).close()
    assert seen == [not why]
    told = "warning llama.cpp's AMX is built wrong and left out {'why': "
    assert [line for line in said if line] == ([f"{told}{why!r}}}"] if why else [])


COMPUTE = """
import sys
import numpy as np
import embellama_server as es
from tests import kit
engine = es.Engine(sys.argv[1], es.ModelSettings(), kit.quiet_log())
with open(sys.argv[2], "wb") as file:
    context = engine.new_context()
    np.save(file, [context.embed([ids])[0] for ids in es.probe_inputs(engine)])
print(engine.card.cpu_features)
"""


@pytest.mark.heavy
def test_each_variant_that_runs_here_gives_the_vectors_of_the_native_build(
    tmp_path: Path,
) -> None:
    wheel = os.environ.get("VARIANTS_WHEEL")
    if not wheel:
        pytest.skip("VARIANTS_WHEEL names no wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    (base,) = tmp_path.rglob("libllama.so")
    variants = {path.name: path for path in base.parent.glob("libggml-cpu-*.so")}
    assert len(variants) > 9
    path = str(models.tiny_bert(tmp_path))

    def computed(folder: Path | None) -> tuple[str, np.ndarray | None]:
        """The features that are used and the vectors, or what went wrong and None."""
        where = {} if folder is None else {"LLAMA_CPP_LIB_PATH": str(folder)}
        done = subprocess.run(
            [sys.executable, "-c", COMPUTE, path, str(tmp_path / "vectors.npy")],
            env=os.environ | where,
            cwd=kit.ROOT,
            capture_output=True,
            text=True,
            timeout=kit.DEADLINE_S,
            check=False,
        )
        if done.returncode:
            return done.stderr.strip().splitlines()[-1], None
        return done.stdout.strip(), np.load(tmp_path / "vectors.npy")

    def only(name: str) -> Path:
        """A folder with one variant: how to say which is used."""
        folder = tmp_path / name
        folder.mkdir()
        for library in base.parent.glob("lib*.so*"):
            if library.name == name or library.name not in variants:
                (folder / library.name).symlink_to(library)
        return folder

    native, expected = computed(None)
    assert expected is not None
    best, vectors = computed(base.parent)
    used = {}
    for name in variants:
        used[name], given = computed(only(name))
        if given is None:
            assert "runs on this CPU" in used[name]
            continue
        assert es.cosines(given, expected).min() > es.MIN_COSINE, name
    assert vectors is not None and best in used.values()
    assert "AVX" not in used["libggml-cpu-x64.so"]
    assert {*best.split(",")} >= {"AVX2", "FMA"} & {*native.split(",")}
