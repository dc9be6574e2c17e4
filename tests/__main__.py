"""The one command: ``python -m tests`` checks style, types, README and behaviour.

python -m tests                                 # all but heavy, chat, clients
python -m tests heavy                           # sweeps, sieges, soaks: minutes each
python -m tests -m "not model and not slow"     # extra arguments go to pytest
python -m tests -n 0 -s                         # one after another, all they print
python -m tests chat                            # the real model that generates
python -m tests docs                            # rewrite README's generated tables
python -m tests clients                         # clients by others: '.[test,clients]'
"""

from __future__ import annotations

import subprocess
import sys

from tests import docs
from tests.kit import ROOT

# Two processes, each with its half of the files until one has nothing left: what is set
# up for a whole file is set up once. Most tests wait rather than compute.
TOGETHER = ("-n", "2", "--dist", "worksteal")
# Of what is heavy, those of one group one after another: what floods a server with all
# cores made another one late that was told how fast these cores are.
GROUPED = ("-n", "2", "--dist", "loadgroup")
# Marks that have a command of their own. What uses all cores has them to itself.
OWN: dict[str, tuple[str, ...]] = {"chat": (), "clients": (), "heavy": GROUPED}
CHECKS = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("mypy", "embellama_server.py", "tests"),
)


def run(*command: str) -> int:
    """Run a module with this Python, from the project's folder; its exit code."""
    print("$ python -m", *command, flush=True)
    return subprocess.run(
        (sys.executable, "-m", *command), cwd=ROOT, check=False
    ).returncode


def main(arguments: list[str]) -> int:
    """Run the checks, stopping at the first that fails."""
    if arguments == ["docs"]:
        docs.rewrite()
        return 0
    if arguments and arguments[0] in OWN:
        mark, *others = arguments
        return run("pytest", *OWN[mark], "-m", mark, *others)
    for check in CHECKS:
        if code := run(*check):
            return code
    marks = " and ".join(f"not {mark}" for mark in OWN)
    if "-m" in arguments:  # pytest would take the last one only
        at = arguments.index("-m")
        marks = f"({arguments[at + 1]}) and {marks}"
        arguments = arguments[:at] + arguments[at + 2 :]
    return run("pytest", *TOGETHER, "-m", marks, *arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
