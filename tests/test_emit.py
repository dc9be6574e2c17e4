"""`emit` prints files that those who read them accept: parsers, checkers, programs.

Checkers that are no Python packages are skipped where they are not installed.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import both, kit

CANARY = "canary-4f1d"  # in every setting that may hold a secret


def needs(program: str) -> str:
    """Where it is; skips the test if nowhere."""
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"not installed: {program}")
    return found


def emit(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``emit``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = es.main(["emit", *arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def files(folder: Path, *arguments: str) -> dict[str, str]:
    """What ``emit`` writes into a folder."""
    code, _, err = emit("--output", str(folder), "--force", *arguments)
    assert (code, err) == (0, "")
    return {path.name: path.read_text("utf-8") for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what settings name: models, a certificate, keys."""
    folder = tmp_path_factory.mktemp("shop")
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(both.sound_gguf())
    return folder


# Sets of settings that change what is printed, as flags; {shop} is the folder above.
# fmt: off
SETS: dict[str, str] = {
    "plain": "",
    "model": "--model-path {shop}/a.gguf",
    "models": "--model-path a={shop}/a.gguf --model-path b@2={shop}/b.gguf",
    "everywhere": "--host 0.0.0.0 --api-key-file {shop}/keys --drain-grace-s 5",
    "TLS": "--host 0.0.0.0 --api-key-file {shop}/keys --tls-cert {shop}/c.pem --tls-key {shop}/k.pem",
    "clients with certificates": "--tls-cert {shop}/c.pem --tls-key {shop}/k.pem --tls-client-ca {shop}/ca.pem",
    "unix socket": "--uds /run/embellama.sock",
    "prefix": "--root-path /models/a/ --port 9000",
    "other address": "--host none --listen [::1]:8081 --listen 127.0.0.1:8082",
    "audit": "--audit-log /var/log/audit.jsonl --dead-letter /srv/dead.jsonl",
    "affinity": "--cpu-affinity auto --workers 4",
    "gpu": "--gpu --model-path {shop}/a.gguf",
    "secrets": f"--api-key {CANARY}-1 --otlp-endpoint http://u:{CANARY}-2@127.0.0.1:4318",
    "prompts": "--prompt query={{text}}%s$HOME --model-name a#b",
}
# fmt: on
EVERY_SET = pytest.mark.parametrize("name", SETS)


def flags_of(name: str, shop: Path) -> list[str]:
    """The flags of a set."""
    return SETS[name].format(shop=shop).split()


# --- the verb ---


@pytest.mark.parametrize("names", [[], ["unit"], ["systemd", "Docker"]])
def test_an_unknown_name_gets_the_list_and_exit_code_2(names: list[str]) -> None:
    code, out, err = emit(*names)
    assert (code, out) == (2, "")
    assert all(name in err for name in (*es.EMITTERS, "all"))


def test_one_file_is_printed_as_it_is_and_several_under_their_names(
    tmp_path: Path,
) -> None:
    for name in es.EMITTERS:
        written = files(tmp_path / name, name)
        code, out, _ = emit(name)
        assert code == 0
        if len(written) == 1:
            assert out == next(iter(written.values()))
        for file, text in written.items():
            assert text in out + "\n"
            assert (f"# ===== {file} =====" in out) == (len(written) > 1)


def test_files_are_replaced_only_when_told_to(tmp_path: Path) -> None:
    assert emit("alerts", "--output", str(tmp_path))[0] == 0
    (written,) = tmp_path.iterdir()
    written.write_text("mine")
    code, _, err = emit("alerts", "prometheus", "--output", str(tmp_path))
    assert code == 1
    assert written.name in err and "--force" in err
    assert [path.name for path in tmp_path.iterdir()] == [written.name]
    assert written.read_text() == "mine"
    assert emit("alerts", "--output", str(tmp_path), "--force")[0] == 0
    assert written.read_text() != "mine"


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("")
    code, _, err = emit("alerts", "--output", str(place))
    assert code == 1
    assert f"--output {place}" in err


def test_a_port_that_nobody_knows_yet_is_refused() -> None:
    code, out, err = emit("prometheus", "--port", "0")
    assert (code, out) == (2, "")
    assert "port" in err


def test_what_only_the_unix_socket_answers_is_not_passed_on() -> None:
    flags = ("--host", "none", "--uds", "/run/embellama.sock")
    assert emit("systemd", *flags)[0] == 0
    code, _, err = emit("prometheus", *flags)
    assert code == 1
    assert "--listen" in err


# --- all files ---


@EVERY_SET
def test_equal_settings_give_equal_files_without_secrets(
    name: str, shop: Path, tmp_path: Path
) -> None:
    flags = flags_of(name, shop)
    first = files(tmp_path / "first", *flags, "all")
    assert files(tmp_path / "second", *flags, "all") == first
    for file, text in first.items():
        assert CANARY not in text, file
        assert text.endswith("\n") and "\r" not in text
        assert [line for line in text.split("\n") if line != line.rstrip()] == []
        assert f"embellama_server {es.__version__}" in text, file
        assert not re.search(r"<[a-z_]+>", text), file


def test_the_settings_come_from_flags_variables_and_a_file_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_flag = files(tmp_path / "flag", "--port", "9001", "--workers", "3", "all")
    config = tmp_path / "config.toml"
    config.write_text("port = 9001\nworkers = 3\n")
    assert files(tmp_path / "file", "--config", str(config), "all") == by_flag
    monkeypatch.setenv("EMBELLAMA_PORT", "9001")
    monkeypatch.setenv("EMBELLAMA_WORKERS", "3")
    assert files(tmp_path / "variable", "all") == by_flag


@EVERY_SET
def test_every_flag_and_variable_in_a_file_is_one_of_ours(
    name: str, shop: Path, tmp_path: Path
) -> None:
    flags = {flag for row in es.SETTING_ROWS for flag in row.flags}
    flags |= {"--now", "--help", "--force", "--output"}  # systemctl's; emit's
    variables = {es.variable_of(row.name) for row in es.SETTING_ROWS}
    for file, text in files(tmp_path, *flags_of(name, shop), "all").items():
        if file == "Dockerfile" or text.startswith("{"):
            continue  # flags of other programs; calls
        said = "\n".join(line for line in text.split("\n") if "exec-form" not in line)
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", said)) <= flags, file
        assert set(re.findall(r"\bEMBELLAMA_[A-Z0-9_]+", said)) <= variables, file


@EVERY_SET
def test_the_settings_file_is_one_and_says_what_was_said(
    name: str, shop: Path, tmp_path: Path
) -> None:
    flags = flags_of(name, shop)
    config = files(tmp_path / "out", *flags, "systemd")["embellama.toml"]
    here = str(shop)
    config = config.replace("/opt/embellama/models", here)  # the unit sees no /tmp
    place = tmp_path / "embellama.toml"
    place.write_text(config)
    given: dict[str, Any] = {}
    for flag, value in itertools.pairwise([*flags, ""]):
        key = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--"):
            given.setdefault(key, []).append(value)
    read = es.load_settings({"config": str(place)}, {})
    asked = es.load_settings(
        {
            key: True
            if key == "gpu"
            else values
            if key in ("listen", "model_path", "prompt")
            and len(values) > 0
            and (key != "model_path" or len(values) > 1)
            else values[0]
            for key, values in given.items()
        },
        {},
    )
    elsewhere = {
        row.name
        for row in es.SETTING_ROWS
        if row.secret or (row.is_path and row not in es.MODEL_ROWS)
    }
    for one, other in zip(read.models, asked.models, strict=True):
        for row in es.SETTING_ROWS:
            if row.name not in elsewhere:
                assert getattr(one, row.name) == getattr(other, row.name), row.name


# --- YAML ---

SCALARS = st.none() | st.booleans() | st.integers() | st.text()
VALUES = st.recursive(
    SCALARS, lambda below: st.lists(below) | st.dictionaries(st.text(), below)
)
WORDS = [
    "no",
    "010",
    "1:30",
    "~",
    "a: b",
    "- a",
    "#",
    "x\ny\n",
    "x\n\ny\n",
    " x\n",
    "\n",
]
WORDS += [
    "x\n\n",
    "\u2028",
    "\x85\n",
    "\ufeff",
    "\x7f",
    "\U0001f600",
    "\U000e0001",
    "{",
]


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_pyyaml_reads_what_was_written(value: object) -> None:
    assert yaml.safe_load(es.yaml_text(value)) == value


@pytest.mark.parametrize("word", WORDS)
def test_a_word_with_a_meaning_in_yaml_is_still_that_word(word: str) -> None:
    value = {word: word, "list": [word, [word], {"key": word}]}
    assert yaml.safe_load(es.yaml_text(value)) == value


def test_lines_that_are_plain_stay_lines() -> None:
    assert es.yaml_text({"file": "one\n\n  two: 2\n"}) == (
        "file: |\n  one\n\n    two: 2\n"
    )


# --- templates ---


def test_a_place_of_its_own_takes_lines_and_its_indent() -> None:
    template = "a <word>\n  <lines>\nz\n"
    assert es.filled(template, word="b", lines="c\nd\n") == "a b\n  c\n  d\nz\n"
    assert es.filled(template, word="<word>", lines="") == "a <word>\nz\n"
    with pytest.raises(KeyError):
        es.filled(template, word="b")


# --- metrics ---

METRIC = re.compile(r"\b(?:embellama|process)_[a-z_]+\b")


def unknown_metrics(text: str) -> set[str]:
    """Names in an expression that no row of METRICS has."""
    rows = {row.name: row for row in es.METRICS}
    kinds = {"_bucket", "_sum", "_count"}
    known = {
        f"{name}{kind}" for name, r in rows.items() if r.buckets for kind in kinds
    } | {name for name, row in rows.items() if not row.buckets}
    return set(METRIC.findall(text)) - known


def selectors(text: str) -> Iterable[tuple[str, Mapping[str, str]]]:
    """Each metric of an expression with the labels that it is asked for."""
    for name, labels in re.findall(r"\b([a-z_]+)\{([^{}]*)\}", text):
        yield name, dict(re.findall(r"(\w+)=~?\"([^\"]*)\"", labels))


def assert_series_exist(expression: str) -> None:
    """Every metric, label, value and bucket that an expression names is there."""
    assert unknown_metrics(expression) == set(), expression
    rows = {row.name: row for row in es.METRICS}
    for name, labels in selectors(expression):
        row = rows.get(name) or rows.get(re.sub("_(bucket|sum|count)$", "", name))
        for label, value in labels.items():
            if label in ("job", "instance"):
                continue
            assert row is not None, name
            if label == "le":
                assert value in [f"{bound:g}" for bound in row.buckets], expression
            else:
                assert label == row.label, expression
                assert set(value.split("|")) <= set(row.values), expression


@pytest.mark.parametrize("alert", es.ALERTS, ids=lambda alert: alert.name)
def test_an_alert_is_about_series_that_are_there(alert: es.Alert) -> None:
    assert_series_exist(alert.expression)
    assert alert.severity in ("page", "ticket", "info")
    for sentence in (alert.meaning, alert.action):
        assert sentence.endswith((".", "?"))


# --- what others say of the files ---


def said_by(*command: str, cwd: Path | None = None) -> str:
    """What a checker prints; it must find nothing wrong."""
    done = subprocess.run(
        command,
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        timeout=kit.DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@EVERY_SET
def test_systemd_finds_the_unit_sound_and_closed(
    name: str, shop: Path, tmp_path: Path
) -> None:
    program = needs("systemd-analyze")
    written = files(tmp_path, *flags_of(name, shop), "systemd")
    unit = tmp_path / "embellama.service"
    # The interpreter of the tests may be where the unit does not look.
    unit.write_text(
        re.sub("(?m)^ExecStart=\\S+", "ExecStart=/usr/bin/env", unit.read_text())
    )
    units = [str(tmp_path / name) for name in written if not name.endswith(".toml")]
    assert said_by(program, "verify", *units) == ""
    # The threshold is ten times the exposure.
    threshold = f"--threshold={25 if name == 'gpu' else 14}"
    said_by(program, "security", "--offline=true", threshold, str(unit))


Series = list[dict[str, str]]


def alert_cases() -> dict[str, tuple[Series, Series]]:
    """For each alert: series with which it fires, and series with which it does not.

    promtool's notation: 0+6x60 is 60 steps of 6 a minute from 0; _ is a gap.
    """
    job = 'job="embellama",instance="a:1"'

    def series(name: str, values: str, labels: str = "") -> dict[str, str]:
        return {
            "series": f"{name}{{{labels + ',' if labels else ''}{job}}}",
            "values": values,
        }

    def requests(values: str) -> dict[str, str]:
        return series("embellama_http_request_seconds_count", values, 'kind="request"')

    def fast(values: str) -> dict[str, str]:
        labels = 'kind="request",le="1"'
        return series("embellama_http_request_seconds_bucket", values, labels)

    def errors(code: str, values: str) -> dict[str, str]:
        return series("embellama_errors_total", values, f'code="{code}"')

    def lookups(result: str, values: str) -> dict[str, str]:
        return series("embellama_cache_lookups_total", values, f'result="{result}"')

    def gauge(name: str, label: str = "") -> tuple[Series, Series]:
        return [series(name, "1x180", label)], [series(name, "0x180", label)]

    first = "embellama_first_token_seconds"
    busy = requests("0+600x180")
    down, up = [series("up", "0x180")], [series("up", "1x180")]
    return {
        "EmbellamaDown": (down, up),
        "EmbellamaAbsent": ([], down),
        "EmbellamaNotReady": gauge("embellama_phase", 'phase="loading"'),
        "EmbellamaEngineBroken": gauge("embellama_engine_broken"),
        "EmbellamaWorkerStuck": gauge("embellama_workers", 'state="stuck"'),
        "EmbellamaRestarting": (
            [series("process_start_time_seconds", "0+1x180")],
            [series("process_start_time_seconds", "7x180")],
        ),
        "EmbellamaFailingFast": (
            [busy, errors("internal_error", "0+60x180")],
            [busy, errors("internal_error", "0+40x180")],
        ),
        "EmbellamaFailing": (
            [busy, errors("engine_failed", "0+30x180")],
            # Few requests: one failure is a great share of them, and no news.
            [requests("0x179 3"), errors("engine_failed", "0x179 3")],
        ),
        "EmbellamaShedding": (
            [busy, errors("overloaded", "0+12x180")],
            [busy, errors("overloaded", "0+3x180"), errors("not_ready", "0+99x180")],
        ),
        "EmbellamaSlow": (
            [busy, fast("0+500x180")],
            [busy, fast("0+590x180")],
        ),
        "EmbellamaSlowFirstToken": (
            [series(f"{first}_count", "0+60x180"), series(f"{first}_bucket", "0+50x180", 'le="5"')],
            [series(f"{first}_count", "0+60x180"), series(f"{first}_bucket", "0+60x180", 'le="5"')],
        ),
        "EmbellamaCacheUseless": (
            [lookups("hit", "0+1x180"), lookups("miss", "0+6000x180")],
            [lookups("hit", "0+100x180"), lookups("miss", "0+6000x180")],
        ),
        "EmbellamaModelFlapping": (
            [series("embellama_model_loads_total", "0+1x180", 'model="m@1"')],
            [series("embellama_model_loads_total", "1x180", 'model="m@1"')],
        ),
    }  # fmt: skip


# Labels, beside job and instance, that an alert has from its series.
KEPT: dict[str, dict[str, str]] = {
    "EmbellamaNotReady": {"phase": "loading"},
    "EmbellamaWorkerStuck": {"state": "stuck"},
    "EmbellamaModelFlapping": {"model": "m@1"},
}


def test_every_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    program = needs("promtool")
    files(tmp_path, "alerts", "prometheus")
    cases, rows = alert_cases(), {alert.name: alert for alert in es.ALERTS}
    assert cases.keys() == rows.keys()
    (group,) = yaml.safe_load((tmp_path / "embellama-alerts.yml").read_text())["groups"]
    suites = []
    for rule in group["rules"]:
        name = rule["alert"]
        # Alone: promtool computes every rule of a file at every step.
        alone = {"groups": [group | {"rules": [rule]}]}
        (tmp_path / f"{name}.rules").write_text(yaml.safe_dump(alone))
        notes = {"summary": rows[name].meaning, "runbook": rows[name].action}
        labels = {"severity": rows[name].severity, **KEPT.get(name, {})}
        labels |= {"job": "embellama", "instance": "a:1"}
        if name == "EmbellamaAbsent":
            del labels["instance"]
        said = {"exp_labels": labels, "exp_annotations": notes}
        tests = []
        for inputs, alerts in zip(cases[name], ([said], []), strict=True):
            expected = {"eval_time": "3h", "alertname": name, "exp_alerts": alerts}
            tests.append(
                {
                    "interval": "1m",
                    "input_series": inputs,
                    "alert_rule_test": [expected],
                }
            )
        suite = {"rule_files": [f"{name}.rules"], "evaluation_interval": "5m"}
        (tmp_path / f"{name}.test").write_text(yaml.safe_dump(suite | {"tests": tests}))
        suites.append(f"{name}.test")
    said_by(program, "check", "rules", "embellama-alerts.yml", cwd=tmp_path)
    said_by(program, "test", "rules", *suites, cwd=tmp_path)


@EVERY_SET
def test_prometheus_takes_its_configuration(
    name: str, shop: Path, tmp_path: Path
) -> None:
    program = needs("promtool")
    written = files(tmp_path, *flags_of(name, shop), "prometheus", "alerts")
    text = written["prometheus.yml"]
    for place in re.findall(r'"(/etc/prometheus/[^"]+)"', text):
        here = tmp_path / Path(place).name
        here.write_text("")
        text = text.replace(place, str(here))
    (tmp_path / "prometheus.yml").write_text(text)
    said_by(program, "check", "config", "--syntax-only", "prometheus.yml", cwd=tmp_path)
