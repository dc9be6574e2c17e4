"""Whatever an operator is told has a line in README that says what to do."""

from __future__ import annotations

import re

import pytest

import embellama_server as es
from tests import docs, runbook

README = docs.README.read_text()


def test_every_error_code_has_a_line_that_says_what_to_do() -> None:
    assert list(runbook.ERRORS) == [row.code for row in es.API_ERRORS]


def test_every_warning_and_error_of_the_log_has_its_line() -> None:
    assert runbook.our_log_events() == set(runbook.LOG_LINES)


@pytest.mark.parametrize(
    ("source", "events"),
    [
        ('self._log("warning", "a", why=1)', {"a"}),
        ('self.x.log("error" if bad else "info", "a")', {"a"}),
        ('self.x.log("debug" if bad else "info", "a")', set()),
        ('log("info", "a")', set()),
        ('log("error", "a" if b else "c")', {"a", "c"}),
        ('log("error", f"a {b} c")', {"a ... c"}),
        ('x, y = b, "a"\n    log("error", y)', {"a"}),
        ('x = f"{b}"\n    log("error", x)', {"..."}),
        ('log("error", b())', {"b(), whatever that is"}),
    ],
)
def test_events_are_found_in_a_program(source: str, events: set[str]) -> None:
    assert runbook.log_events(f"def f():\n    {source}") == events


def test_every_alert_and_line_is_in_readme_and_every_place_it_points_to() -> None:
    for alert in es.ALERTS:
        assert f"| {alert.name}, {alert.severity} |" in README
    texts = [*runbook.ERRORS.values(), *map(str, runbook.LOG_LINES.values())]
    named = {name for text in texts for name in re.findall(r"\[(Embellama\w+)\]", text)}
    assert named <= {alert.name for alert in es.ALERTS}
    titles = re.findall(r"(?m)^#+ (.+)$", README)
    places = {
        re.sub(r"[^a-z0-9 -]", "", one.lower()).replace(" ", "-") for one in titles
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= places


def test_the_procedures_name_routes_and_settings_that_are_there() -> None:
    text = README.partition("### Procedures\n")[2].partition("\n## ")[0]
    paths = {route.path for route in es.ROUTES}
    assert set(re.findall(r"(?<=8080)/[a-z/0-9]+", text)) <= paths
    variables = {es.variable_of(row.name) for row in es.SETTING_ROWS}
    assert set(re.findall(r"EMBELLAMA_[A-Z0-9_]+", text)) <= variables
    assert set(re.findall(r"embellama_[a-z_]+(?:total|seconds|bytes)", text)) <= {
        row.name for row in es.METRICS
    }
