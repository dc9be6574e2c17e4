"""README's tables come from the program: written by ``python -m tests docs``."""

from __future__ import annotations

import re
from collections.abc import Callable

import embellama_server as es
from tests.kit import ROOT

README = ROOT / "README.md"
TABLES: dict[str, Callable[[], str]] = {
    "endpoints": es.routes_table,
    "settings": es.settings_table,
    "errors": es.errors_table,
    "metrics": es.metrics_table,
    "limits": es.limits_table,
    "request": lambda: es.form_table(es.EmbeddingsForm),
}


def generated(text: str) -> str:
    """``text`` with what stands between each pair of marks made anew."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        made = f"{begin}\n{table()}\n{end}"
        text, found = pattern.subn(lambda _, made=made: made, text)  # type: ignore[misc]
        assert found == 1, f"README must have {begin} ... {end} once"
    return text


def rewrite() -> None:
    """Bring README's tables up to date."""
    README.write_text(generated(README.read_text()))


def commands(language: str) -> list[str]:
    """The fenced blocks of README in a language, in order."""
    blocks: list[str] = re.findall(
        rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL
    )
    return blocks
