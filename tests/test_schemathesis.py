"""schemathesis, which knows nothing of us but /openapi.json, finds nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import both, kit

pytest.importorskip("schemathesis", reason="in the extra clients")
pytestmark = pytest.mark.clients

# Not "positive_data_acceptance": a name, a prompt or a length that fits the schema may
# still be none of ours.
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_schema_conformance", "response_headers_conformance"),
    *("negative_data_rejection", "unsupported_method"),
)


def run(url: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Its command line."""
    script = "from schemathesis.cli import schemathesis; schemathesis()"
    command = [sys.executable, "-c", script, "run", f"{url}/openapi.json", *flags]
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=10 * kit.DEADLINE_S,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranker_first", [False, True])
def test_schemathesis_finds_nothing(tmp_path: Path, ranker_first: bool) -> None:
    flags = ("--accept-token-ids", "--prompt", "query=find ")
    with both.asking(
        tmp_path, *flags, ranker_first=ranker_first, has_chatter=True
    ) as client:
        done = run(
            f"http://{client.host}:{client.port}",
            tmp_path,
            *("--checks", ",".join(CHECKS), "--max-examples", "100"),
            *("--phases", "examples,coverage,fuzzing"),
            *("--exclude-path-regex", "^/admin/"),
            *("--seed", "1"),
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert client.get("/ready").status == 200
