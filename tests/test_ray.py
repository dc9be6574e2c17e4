"""README's example for Ray Data: the file's Embedder in Ray's actors.

Ray has an environment of its own (README: Tests), without what other tests need.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embellama_server as es
from tests import kit, models

pytestmark = pytest.mark.clients

TEXTS = 2_000
LIMIT_S = 300  # a deadlock, not a slow box


def example() -> str:
    """The script in README."""
    readme = (kit.ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", readme)
    (found,) = (block for block in blocks if "import ray" in block)
    return str(found)


def run(script: str, folder: Path, model: Path, texts: list[str]) -> dict[int, Any]:
    """Run a script as README says; return the vectors by the ids of their texts."""
    import pyarrow.parquet

    program, source, output = (folder / n for n in ("r.py", "docs.jsonl", "vectors"))
    program.write_text(script)
    lines = (json.dumps({"id": n, "text": text}) for n, text in enumerate(texts))
    source.write_text("\n".join(lines))
    environment = {
        **os.environ,
        "PYTHONPATH": str(kit.ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "DIED": str(folder / "died"),
    }
    ended = subprocess.run(
        [sys.executable, str(program), str(model), str(source), str(output)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    rows = pyarrow.parquet.read_table(output).to_pylist()
    assert len(rows) == len(texts), "each once"
    return {row["id"]: row["embedding"] for row in rows}


@pytest.mark.parametrize("dies", [False, True])
def test_readme_s_example_gives_the_embedder_s_vectors(
    dies: bool, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    script = example()
    changes = {
        "num_cpus=cores,": "num_cpus=1,",
        "actors = os.cpu_count(), 1": "actors = 2, 2",
        "1024": "100",
    }
    if dies:
        changes["from embellama_server import Embedder"] = (
            "from tests.dying import Dying as Embedder"
        )
    for old, new in changes.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    model = models.tiny_bert(tmp_path)
    texts = ["a b " * (1 + n % 7) + "hello world " * (n % 5) for n in range(TEXTS)]
    found = run(script, tmp_path, model, texts)
    assert (tmp_path / "died").exists() is dies
    embedder = es.Embedder(model_path=model, auto_truncate=True)
    (rows,) = embedder.embed([texts])
    embedder.close()
    ours = np.array(rows)
    theirs = np.array([found[n] for n in range(TEXTS)], np.float32)
    assert es.cosines(ours, theirs).min() >= 0.99999
