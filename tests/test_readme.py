"""README says what is: its tables are generated, its commands run."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from tests import docs, kit


def test_readme_s_tables_are_up_to_date() -> None:
    text = docs.README.read_text()
    assert docs.generated(text) == text, "run: python -m tests docs"


def test_readme_names_every_settings_flag_only_as_it_is() -> None:
    import re

    import embellama_server as es

    rows = es.SETTING_ROWS
    known = {flag for row in rows for flag in row.flags} | {
        *("--no-elastic", "--no-supervise"),  # ours
        *(flag for verb in es.VERBS.values() for flag in verb.flags),
        *("--bert-base", "--peer-cmd", "--list-cells", "--cached", "--health"),  # bench
        "--requests",  # of the soak test
        *("--servers", "--token-us", "--real", "--memory"),  # of benches
        *("--texts", "--verb", "--llama-server", "--torch"),
        "--additional-suffix",  # split's
        "--count",  # of the mutants
        *("--same-text", "--cells"),  # of the chats'
        "--parallel",  # llama-server's
        *(
            "--peer",
            "--rounds",
            "--wheel-dir",
            "--no-deps",
            "--dest",
            "--no-cache-dir",
            "--no-index",
            "--find-links",
        ),
    }
    assert set(re.findall(r"--[a-z][a-z0-9-]+", docs.README.read_text())) <= known


def test_a_row_of_readme_s_tables_is_one_line() -> None:
    rows = [
        line for line in docs.README.read_text().splitlines() if line.startswith("|")
    ]
    assert len(rows) > 400
    assert [row for row in rows if not row.rstrip().endswith("|")] == []


def readme_curls() -> list[str]:
    """Each curl line of README."""
    lines = "\n".join(docs.commands("sh")).splitlines()
    found = [line for line in lines if line.startswith("curl ")]
    assert len(found) >= 4
    return found


@pytest.mark.model
def test_readme_s_curl_lines_and_python_example_work_on_the_real_model() -> None:
    script = str(kit.ROOT / "embellama_server.py")
    with kit.started(module=(script,)) as server:
        for line in readme_curls():
            command = line.replace("http://127.0.0.1:8080", server.url)
            done = subprocess.run(
                [*shlex.split(command), "-sS", "--fail-with-body"],
                capture_output=True,
                text=True,
                timeout=kit.DEADLINE_S,
                check=False,
            )
            assert done.returncode == 0, (line, done.stdout, done.stderr)
        (example,) = (one for one in docs.commands("python") if "openai" in one)
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                example.replace("http://127.0.0.1:8080", server.url),
            ],
            capture_output=True,
            text=True,
            timeout=kit.DEADLINE_S,
            check=False,
        )
        assert done.stderr == ""
        assert done.stdout == "2 384 6\n"
        assert server.stop() == 0
