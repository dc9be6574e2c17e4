"""Metrics (METRICS) and log lines (ERRORS): what a scraper and a log reader get.

The exposition is read by a parser of its own, stricter than Prometheus': a page that
Prometheus merely tolerates is a bug here.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
import threading
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import kit

# --- a strict reader of Prometheus text 0.0.4 ---

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)")
ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


@dataclass
class Family:
    """One metric: HELP, TYPE and its samples, in order."""

    help: str
    kind: str
    samples: list[tuple[str, dict[str, str], float]] = field(default_factory=list)


def parse(text: str) -> dict[str, Family]:
    """A page's families by name; asserts all that the format demands."""
    assert text.endswith("\n")
    families: dict[str, Family] = {}
    name = ""
    lines = iter(text[:-1].split("\n"))
    for line in lines:
        if line.startswith("# HELP "):
            _, _, name, help_text = line.split(" ", 3)
            assert name not in families, "a family is one block, described once"
            _, typed, named, kind = next(lines).split(" ")
            assert (typed, named) == ("TYPE", name)
            assert kind in ("counter", "gauge", "histogram")
            families[name] = Family(help_text, kind)
            continue
        match = SAMPLE.fullmatch(line)
        assert match, f"not a sample: {line!r}"
        ends = ("_bucket", "_sum", "_count")
        allowed = [name + e for e in ends]
        assert match[1] in (allowed if families[name].kind == "histogram" else [name])
        labels = {
            key: re.sub(r"\\.", lambda escape: ESCAPES[escape[0]], value)
            for key, value in re.findall(LABEL, match[2] or "")
        }
        number = float(match[match.re.groups])
        assert (match[1], labels) not in [s[:2] for s in families[name].samples]
        families[name].samples.append((match[1], labels, number))
    for title, family in families.items():
        if family.kind == "histogram":
            for alone in one_by_one(family):
                check_histogram(title, alone)
    return families


def one_by_one(family: Family) -> list[Family]:
    """A histogram's, one for each value of its label, which is left out."""
    found: dict[str, Family] = {}
    for name, labels, number in family.samples:
        others = {key: text for key, text in labels.items() if key != "le"}
        made = found.setdefault(str(others), Family(family.help, family.kind))
        rest = {key: text for key, text in labels.items() if key == "le"}
        made.samples.append((name, rest, number))
    return list(found.values())


def check_histogram(name: str, family: Family) -> None:
    """Assert ascending bounds, cumulative counts, +Inf last and equal to the count."""
    *buckets, total, count = family.samples
    bounds = [float(labels["le"]) for _, labels, _ in buckets]
    counts = [number for _, _, number in buckets]
    assert bounds == sorted(set(bounds))
    assert bounds[-1] == math.inf
    assert counts == sorted(counts)
    assert {sample[0] for sample in buckets} == {f"{name}_bucket"}
    assert (total[0], total[1]) == (f"{name}_sum", {})
    assert count == (f"{name}_count", {}, counts[-1])


def test_the_reader_above_refuses_what_is_not_the_format() -> None:
    good = '# HELP a b c\n# TYPE a gauge\na{l="x\\"\\n\\\\"} 1.5\n'
    assert parse(good)["a"].samples == [("a", {"l": 'x"\n\\'}, 1.5)]
    for bad in (
        good[:-1],
        good + "\n",
        good + good,
        good.replace("gauge", "guage"),
        good.replace("1.5", "1,5"),
        good.replace("\\n", "\n"),
        good + 'a{l="x\\"\\n\\\\"} 2\n',
        good + "b 1\n",
        good.replace("gauge", "histogram"),
    ):
        with pytest.raises((AssertionError, ValueError)):
            parse(bad)


# --- metrics ---

# What cannot be 0: facts of the process, and the version, whose 1 carries the label.
# embellama_phase is 0 here and becomes 1 for one phase when the Service is built.
NOT_ZERO = {"embellama_build_info", "process_start_time_seconds"}


def test_every_series_is_there_from_the_start_and_zero() -> None:
    families = parse(es.Telemetry().exposition())
    old = es.OLD_METRIC_NAMES.values()
    assert families.keys() >= set(old)
    shown = [name for name in families if name not in old]
    assert shown == [row.name for row in es.METRICS]
    for row in es.METRICS:
        family = families[row.name]
        assert (family.help, family.kind) == (row.help, row.kind)
        numbers = [number for _, _, number in family.samples]
        if row.name in NOT_ZERO:
            assert min(numbers) > 0, row.name
        elif row.values:  # others are added, as models and routes are
            assert set(numbers) == {0}, row.name
        if row.kind == "histogram":
            each = one_by_one(family)
            assert len(each) == len(row.values)
            for alone in each:
                bounds = [float(labels["le"]) for _, labels, _ in alone.samples[:-2]]
                assert bounds == [*row.buckets, math.inf]
        elif row.label:
            labels = [labels for _, labels, _ in family.samples]
            assert labels == [{row.label: value} for value in row.values]
        else:
            assert [labels for _, labels, _ in family.samples] == [{}]


OF_MODELS = [row.name for row in es.METRICS if row.label == "model"]
ODD = 'a\\n"b\n\\" \N{SNOWMAN}\r{}=,@1'


def of_models(telemetry: es.Telemetry, name: str) -> dict[str, float]:
    """The numbers of a family, by model."""
    samples = parse(telemetry.exposition())[name].samples
    assert all(set(labels) == {"model"} for _, labels, _ in samples)
    return {labels["model"]: number for _, labels, number in samples}


@pytest.mark.parametrize("name", OF_MODELS)
def test_a_model_has_its_series_from_when_it_is_named(name: str) -> None:
    telemetry = es.Telemetry()
    assert of_models(telemetry, name) == {}
    with pytest.raises(KeyError):
        telemetry.set(name, 1, "a@1")
    for label in ("a@1", "a@2", ODD):
        telemetry.add("model", label)
    assert of_models(telemetry, name) == {"a@1": 0, "a@2": 0, ODD: 0}
    telemetry.count(name, 3, "a@2")
    telemetry.count(name, 4, ODD)
    telemetry.add("model", "a@2")  # again: nothing is forgotten
    assert of_models(telemetry, name) == {"a@1": 0, "a@2": 3, ODD: 4}
    assert telemetry.value(name, ODD) == 4


def test_a_model_that_is_served_no_more_has_no_series_but_its_part_of_the_total() -> (
    None
):
    telemetry, name = es.Telemetry(), "embellama_model_requests_total"
    for label in ("a@1", "b@1"):
        telemetry.add("model", label)
        telemetry.count(name, 2, label)
    telemetry.keep("model", ["a@1"])
    for each in OF_MODELS:
        assert of_models(telemetry, each).keys() == {"a@1"}
    telemetry.count(name, label="b@1")  # its last request ends
    assert of_models(telemetry, name) == {"a@1": 2}
    assert telemetry.total(name) == 5
    telemetry.add("model", "b@1")
    telemetry.count(name, label="b@1")
    assert of_models(telemetry, name) == {"a@1": 2, "b@1": 1}
    assert telemetry.total(name) == 6
    with pytest.raises(KeyError):
        telemetry.count("embellama_model_typos_total", label="b@1")


def test_recent_means_are_of_the_last_minute() -> None:
    telemetry, name = es.Telemetry(), "embellama_queue_seconds"
    assert telemetry.recent_mean(name) == 0
    telemetry.observe(name, 8)
    for half in range(240):  # two minutes, twice a second
        telemetry.remember(half / 2)
        assert telemetry.recent_mean(name) == (8 if half / 2 < es.RECENT_S else 0)
    for seconds in (1, 2):
        telemetry.observe(name, seconds)
    assert telemetry.recent_mean(name) == 1.5
    assert len(telemetry._past) <= 2 * es.RECENT_S + 1


def test_routes_and_models_have_series_of_their_own() -> None:
    telemetry = es.Telemetry()
    telemetry.add("route", "/v1/models/{model}")
    telemetry.add("model", "a@1")
    telemetry.count("embellama_route_requests_total", label="/v1/models/{model}")
    with pytest.raises(KeyError):
        telemetry.count("embellama_route_requests_total", label="a@1")
    text = telemetry.exposition()
    assert 'embellama_route_requests_total{route="/v1/models/{model}"} 1\n' in text
    assert 'embellama_backlog_seconds{model="a@1"} 0\n' in text


def test_models_are_told_apart_in_every_family_that_names_them() -> None:
    assert len(OF_MODELS) >= 6
    telemetry = es.Telemetry()
    telemetry.add("model", "a@1")
    for number, name in enumerate(OF_MODELS, 1):
        telemetry.set(name, number, "a@1")
    found = [of_models(telemetry, name) for name in OF_MODELS]
    assert found == [{"a@1": n} for n in range(1, len(OF_MODELS) + 1)]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_name_is_a_label_that_reads_back(label: str) -> None:
    telemetry = es.Telemetry()
    telemetry.add("model", label)
    telemetry.count("embellama_model_inputs_total", 2, label)
    assert of_models(telemetry, "embellama_model_inputs_total") == {label: 2}


def test_telemetries_do_not_share_their_models() -> None:
    one, other = es.Telemetry(), es.Telemetry()
    one.add("model", "a@1")
    assert of_models(other, OF_MODELS[0]) == {}


def test_rows_follow_prometheus_s_naming() -> None:
    for row in es.METRICS:
        assert row.name.startswith(("embellama_", "process_"))
        assert row.name.endswith("_total") == (row.kind == "counter"), row.name
        assert bool(row.buckets) == (row.kind == "histogram")
        assert row.help.endswith(".")


def test_every_error_code_has_a_series() -> None:
    telemetry = es.Telemetry()
    for kind in es.API_ERRORS:
        telemetry.count("embellama_errors_total", label=kind.code)
    samples = parse(telemetry.exposition())["embellama_errors_total"].samples
    assert {number for _, _, number in samples} == {1}


def test_counting_adds_and_setting_replaces() -> None:
    telemetry = es.Telemetry()
    telemetry.count("embellama_inputs_total")
    telemetry.count("embellama_inputs_total", 41)
    telemetry.count("embellama_http_requests_total", label="4xx")
    telemetry.set("embellama_workers", 3, "busy")
    telemetry.set("embellama_workers", 2, "busy")
    families = parse(telemetry.exposition())
    assert families["embellama_inputs_total"].samples[0][2] == 42
    assert telemetry.value("embellama_inputs_total") == 42
    by_state = {
        labels["state"]: n for _, labels, n in families["embellama_workers"].samples
    }
    assert by_state == {"busy": 2, "idle": 0, "stuck": 0}
    statuses = families["embellama_http_requests_total"].samples
    assert [number for _, _, number in statuses] == [0, 0, 1, 0]


def test_a_count_of_millions_keeps_its_last_digit() -> None:
    telemetry = es.Telemetry()
    telemetry.count("embellama_tokens_total", 123_456_789_012)
    assert "embellama_tokens_total 123456789012\n" in telemetry.exposition()


@settings(deadline=None)  # a busy machine is not a failure
@given(st.lists(st.floats(0, 1e6), max_size=30))
def test_an_observation_is_in_every_bucket_at_or_above_it(amounts: list[float]) -> None:
    telemetry = es.Telemetry()
    for amount in amounts:
        telemetry.observe("embellama_batch_seconds", amount)
    *buckets, total, count = parse(telemetry.exposition())[
        "embellama_batch_seconds"
    ].samples
    for _, labels, number in buckets:
        bound = float(labels["le"])  # inclusive: "le" is less or equal
        assert number == sum(amount <= bound for amount in amounts)
    assert total[2] == pytest.approx(sum(amounts))
    assert count[2] == len(amounts)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("embellama_packs_total", "embellama_batches_total"),
        ("embellama_packs_aborted_total", "embellama_batches_aborted_total"),
        ("embellama_packs_stretched_total", "embellama_batches_stretched_total"),
        ("embellama_pack_tokens", "embellama_batch_tokens"),
        ("embellama_pack_seconds", "embellama_batch_seconds"),
    ],
)
def test_a_metric_that_was_renamed_is_shown_by_its_old_name_too(
    old: str, new: str
) -> None:
    telemetry = es.Telemetry()
    for amount in (0.5, 100.0):
        if new.endswith("_total"):
            telemetry.count(new, amount)
        else:
            telemetry.observe(new, amount)
    families = parse(telemetry.exposition())
    assert (families[old].help, families[old].kind) == (
        families[new].help,
        families[new].kind,
    )
    renamed = [(name.replace(new, old), *rest) for name, *rest in families[new].samples]
    assert families[old].samples == renamed
    assert any(number for _, _, number in renamed)


def test_values_of_a_histogram_s_label_do_not_mix() -> None:
    telemetry = es.Telemetry()
    telemetry.observe("embellama_http_request_seconds", 0.5, "probe")
    telemetry.observe("embellama_http_request_seconds", 0.25, "request")
    page = telemetry.exposition()
    assert 'embellama_http_request_seconds_sum{kind="request"} 0.25\n' in page
    assert 'embellama_http_request_seconds_sum{kind="probe"} 0.5\n' in page
    bucket = 'embellama_http_request_seconds_bucket{kind="probe",le="0.2"} 0\n'
    assert bucket in page


def test_a_name_or_label_that_is_no_row_is_a_key_error() -> None:
    telemetry = es.Telemetry()
    before = parse(telemetry.exposition()).keys()
    for wrong in (
        lambda: telemetry.count("embellama_no_such_total"),
        lambda: telemetry.count("embellama_errors_total", label="no_such_code"),
        lambda: telemetry.count("embellama_inputs_total", label="no label here"),
        lambda: telemetry.set("embellama_no_such", 1),
        lambda: telemetry.set("embellama_workers", 1, "asleep"),
        lambda: telemetry.set("embellama_workers", 1),
        lambda: telemetry.observe("embellama_no_such_seconds", 1),
        lambda: telemetry.observe("embellama_queue_inputs", 1),
        lambda: telemetry.value("embellama_no_such"),
    ):
        with pytest.raises(KeyError):
            wrong()
    assert parse(telemetry.exposition()).keys() == before


# --- log lines ---

STAMP = r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z"


def logged(shape: str, event: str = "event", **fields: object) -> str:
    """What one call writes."""
    stream = io.StringIO()
    es.Log("debug", shape, stream)("info", event, **fields)
    return stream.getvalue()


@pytest.mark.parametrize("least", es.LOG_LEVELS)
def test_a_level_hides_those_below_it(least: str) -> None:
    stream = io.StringIO()
    log = es.Log(least, "text", stream)
    for level in es.LOG_LEVELS:
        log(level, "said")
    found = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert found == list(es.LOG_LEVELS)[es.LOG_LEVELS.index(least) :]


def test_a_level_that_does_not_exist_is_loud() -> None:
    with pytest.raises(ValueError):
        es.Log("verbose", "text", io.StringIO())
    with pytest.raises(ValueError):
        es.Log("debug", "text", io.StringIO())("notice", "event")


def test_a_text_line_is_stamp_level_event_and_fields() -> None:
    line = logged("text", "two words", path="/v1", ms=1.26, n=3, gone=None, yes=True)
    expected = rf"{STAMP} info    two words path=/v1 ms=1\.3 n=3 yes=True\n"
    assert re.fullmatch(expected, line), line


def test_a_json_line_is_one_object() -> None:
    line = logged("json", "two words", path="/v1", ms=1.26, n=3, gone=None, yes=True)
    shown = json.loads(line)
    assert re.fullmatch(STAMP, shown.pop("time"))
    head = {"level": "info", "event": "two words"}
    assert shown == head | {"path": "/v1", "ms": 1.26, "n": 3, "yes": True}


HOSTILE = [
    "",
    "two words",
    'a"b',
    "a=b",
    "x\n2026-01-01T00:00:00.000Z error   forged",
    "x\r\nforged",
    "x\x85forged\u2028forged\u2029forged\x0bforged\x0cforged\x1c",
    "\x00\x1b[2J\x7f",
    "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve \N{GRINNING FACE}",
    "right-to-left \u202e override",
    "\ud800 lone surrogate",
    "back\\slash",
]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("shape", ["text", "json"])
def test_no_value_can_forge_a_line_or_a_field(shape: str, value: str) -> None:
    line = logged(shape, value=value, last=1)
    assert line.isascii()
    assert line.splitlines() == [line[:-1]], "one line, whatever counts as a break"
    assert line[:-1].isprintable()
    if shape == "json":
        assert json.loads(line)["value"] == value
        return
    quoted = line.partition(" value=")[2].removesuffix(" last=1\n")
    # A reader gets it back: plain text is the value, quoted text is a JSON string.
    assert (json.loads(quoted) if quoted[:1] == '"' else quoted) == value
    assert quoted[:1] == '"' or not re.search(r'[\s"=]', quoted)


@settings(deadline=None)  # a busy machine is not a failure
@given(st.text(), st.sampled_from(["text", "json"]))
def test_no_text_at_all_breaks_a_line(value: str, shape: str) -> None:
    line = logged(shape, value=value)
    assert line[:-1].isprintable()
    assert line.isascii()
    assert line.endswith("\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, Path("/x"), b"\n", (1, "\n")])
def test_a_json_line_stays_json_whatever_the_value_is(value: object) -> None:
    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is not JSON")

    line = logged("json", value=value)
    assert "value" in json.loads(line, parse_constant=refuse)
    assert line.count("\n") == 1


class Broken(io.StringIO):
    """A stream that fails the way a full disk or a closed pipe does."""

    def __init__(self, error: Exception, *, only_flush: bool) -> None:
        super().__init__()
        self.error = error
        self.only_flush = only_flush

    def write(self, text: str) -> int:
        if self.only_flush:
            return len(text)
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("only_flush", [False, True])
@pytest.mark.parametrize(
    "error",
    [OSError(28, "disk full"), BrokenPipeError(), ValueError("closed file")],
    ids=lambda error: type(error).__name__,
)
def test_a_log_that_cannot_be_written_does_not_raise(
    error: Exception, only_flush: bool
) -> None:
    es.Log("info", "text", Broken(error, only_flush=only_flush))("error", "event")


class Writes(io.StringIO):
    """A stream that remembers each write."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def write(self, text: str) -> int:
        self.texts.append(text)
        return len(text)


@pytest.mark.parametrize("shape", ["text", "json"])
def test_lines_of_several_threads_are_never_mixed(tmp_path: Path, shape: str) -> None:
    # One write per line: what the stream cannot split, threads cannot mix.
    stream = Writes()
    es.Log("info", shape, stream)("info", "event", text="x\n" * 100)
    assert len(stream.texts) == 1

    fillers = [chr(ord("a") + n) * (n * 3000 + 1) for n in range(6)]
    path = tmp_path / "log"
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with path.open("w", buffering=1) as file:
            log = es.Log("info", shape, file)

            def write(filler: str) -> None:
                for _ in range(50):
                    log("info", "event", filler=filler)

            threads = [threading.Thread(target=write, args=(f,)) for f in fillers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    lines = path.read_text().splitlines()
    mark = '"filler": "' if shape == "json" else "filler="
    found = [line.partition(mark)[2].removesuffix('"}') for line in lines]
    assert sorted(found) == sorted(fillers * 50)


# --- standard streams ---


@pytest.mark.parametrize("descriptor", [0, 2], ids=["stdin", "stderr"])
def test_the_server_runs_without_a_standard_stream(descriptor: int) -> None:
    # Started by an init script as "server <&-" or "2>&-": Python has no such stream
    # then, and the next socket takes its number.
    code = (
        f"import os, sys; os.close({descriptor}); "
        "os.execv(sys.executable, [sys.executable, '-m', 'tests.kit', *sys.argv[1:]])"
    )
    with kit.started(module=("-c", code), wait_ready=False) as server:
        with urllib.request.urlopen(f"{server.url}/health") as answer:
            assert json.load(answer)["status"] == "ok"
        assert server.stop() == 0


# --- files of lines ---


def test_a_file_of_lines_that_is_opened_again_is_still_closed_for_others(
    tmp_path: Path,
) -> None:
    # What a reload gives away, pip inherits (it fetches the default model).
    lines = es.LineFile(str(tmp_path / "audit"), kit.quiet_log())
    (tmp_path / "audit").rename(tmp_path / "old")
    lines.reopen()
    lines.write(a=1)
    assert json.loads((tmp_path / "audit").read_bytes())["a"] == 1
    assert not os.get_inheritable(lines._file)


def test_a_fifo_that_nobody_reads_is_refused_for_lines_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(es.StartupError, match="fifo cannot be written"):
        es.LineFile(str(tmp_path / "fifo"), kit.quiet_log())
