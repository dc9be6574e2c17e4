"""SETTINGS and CONFIGURATION: one row is a flag, a variable and a key, and a wrong one is one sentence."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import embellama_server as es
from tests import kit

ROWS = {row.name: row for row in es.SETTING_ROWS}
SOURCES = ("flag", "environment", "file")  # strongest first
Refused = Callable[["Saying"], str]


@dataclass
class Saying:
    """What an operator says, in one or more places."""

    folder: Path
    flags: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    table: list[str] = field(default_factory=list)

    def say(self, source: str, name: str, value: Any) -> None:
        """Say ``value`` there, as that place writes it."""
        row = ROWS[name]
        if source == "file":  # what json writes of these values is TOML
            self.table.append(f"{name} = {json.dumps(value)}\n")
        elif source == "environment":
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            self.environment[row.variable] = text
        elif isinstance(value, bool):
            self.flags.append(row.flag if value else f"--no-{row.flag[2:]}")
        else:
            items = value if isinstance(value, tuple) else (value,)
            self.flags += [f"{row.flag}={item}" for item in items]

    def argv(self) -> list[str]:
        """The command line; writes the file if something is said in it."""
        if not self.table:
            return self.flags
        path = self.folder / "settings.toml"
        path.write_text("".join(self.table))
        return [*self.flags, f"--config={path}"]

    def load(self) -> es.LoadedSettings:
        """As main() loads it, but for the process's own environment."""
        parser = argparse.ArgumentParser(allow_abbrev=False)
        es.add_flags(parser)
        return es.load_settings(vars(parser.parse_args(self.argv())), self.environment)


@pytest.fixture
def saying(tmp_path: Path) -> Saying:
    """Nothing said yet."""
    return Saying(tmp_path)


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """What main() answers to something wrong: one line, exit code 2."""

    def answer(saying: Saying) -> str:
        for variable in [v for v in os.environ if v.startswith("EMBELLAMA_")]:
            monkeypatch.delenv(variable)
        for variable, value in saying.environment.items():
            monkeypatch.setenv(variable, value)
        # Were it not refused, --print-config would keep it from serving for ever.
        assert es.main([*saying.argv(), "--print-config"]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("embellama_server: ")
        assert shown.err.endswith("\n")
        assert shown.err[:-1].isprintable(), "one line, and no escape sequences"
        with pytest.raises(es.BadSetting):
            saying.load()
        return shown.err

    return answer


# For rows with a pattern.
MATCHING: dict[str, tuple[Any, Any]] = {
    "cpu_affinity": ("0-3,8", "auto"),
    "model_sha256": ("0123456789abcdefABCDEF" + "0" * 42, "f" * 64),
    "listen": (("[::1]:0", "localhost:65535"), ("192.0.2.1:80",)),
    "uds_mode": ("0600", "777"),
    "cors_origin": (("https://a.example", "http://[::1]:80"), ("http://b",)),
}


def pair(row: es.Row, folder: Path) -> tuple[Any, Any]:
    """Two allowed values; the first is not the default."""
    limits = row.option
    if limits.magic or row.name == "config":
        files = [folder / f"{row.name}-{letter}" for letter in "ab"]
        for file in files:
            file.write_bytes(limits.magic)
        return str(files[0]), str(files[1])
    if limits.choices:
        if row.kind is tuple:
            return limits.choices[::-1], limits.choices[:1]
        others = [choice for choice in limits.choices if choice != row.default]
        return others[-1], limits.choices[0]
    if limits.pattern:
        return MATCHING[row.name]
    if row.kind is bool:
        return not row.default, row.default
    if row.kind is tuple:
        return ("a b", "\N{SNOWMAN}"), ("c",)
    if row.kind is str:
        return "one \N{SNOWMAN} \"quoted\" 'twice' \\", "another"
    assert limits.at_least is not None, "a number without bounds"
    assert limits.at_most is not None, "a number without bounds"
    return row.kind(limits.at_most), row.kind(limits.at_least)


def places(row: es.Row) -> list[str]:
    """Where a row may be said."""
    return [s for s in SOURCES if s != "file" or row.option.in_file]


# --- one row, three spellings ---


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_the_same_by_flag_variable_and_file(
    name: str, tmp_path: Path
) -> None:
    row = ROWS[name]
    where = {"flag": row.flag, "environment": row.variable, "file": ".toml"}
    for source, value in itertools.product(places(row), pair(row, tmp_path)):
        said = Saying(tmp_path)
        said.say(source, name, value)
        loaded = said.load()
        found = getattr(loaded.settings, name)
        assert (found, type(found)) == (value, row.kind), source
        assert loaded.sources[name].startswith(f"{source} ")
        assert loaded.sources[name].endswith(where[source])


@pytest.mark.parametrize("name", ROWS)
def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(
    name: str, tmp_path: Path
) -> None:
    row = ROWS[name]
    strong, weak = pair(row, tmp_path)
    for above, below in itertools.pairwise(places(row)):
        both = Saying(tmp_path)
        both.say(below, name, weak)
        both.say(above, name, strong)
        loaded = both.load()
        assert getattr(loaded.settings, name) == strong, f"{above} and {below}"
        assert loaded.sources[name].startswith(above)
    silent = Saying(tmp_path).load()
    usual = getattr(es.load_settings({}, {}).settings, name)
    assert getattr(silent.settings, name) == usual != strong
    assert silent.sources[name] == "default"


def test_the_file_can_be_named_by_the_environment(saying: Saying) -> None:
    saying.say("file", "port", 1)
    (flag,) = saying.argv()
    named = Saying(saying.folder)
    named.say("environment", "config", flag.removeprefix("--config="))
    assert named.load().settings.port == 1


def test_a_home_directory_may_be_written_as_a_tilde(
    saying: Saying, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kit.fake_gguf(saying.folder)
    monkeypatch.setenv("HOME", str(saying.folder))
    # No shell expands it in a file, in a unit's Environment= or behind "--flag=".
    for name in ("model_path", "cache_dir"):
        saying.say("file", name, f"~/{path.name}")
        assert getattr(saying.load().settings, name) == str(path)


def test_an_alias_may_be_given_many_times(saying: Saying) -> None:
    saying.flags = ["--model-alias", "a", "--model-alias=b,c", "--model-alias", "a"]
    assert saying.load().settings.model_alias == ("a", "b,c", "a")


def test_weights_are_only_changed_unasked_where_the_file_is_ours(
    saying: Saying,
) -> None:
    model = str(kit.fake_gguf(saying.folder))
    assert es.load_settings({}, {}).settings.weights == "auto"
    for source in SOURCES:  # whoever names a file gets that file
        own = Saying(saying.folder)
        own.say(source, "model_path", model)
        loaded = own.load()
        assert (loaded.settings.weights, loaded.sources["weights"]) == (
            *("keep", "default"),
        )
        for wanted in ROWS["weights"].option.choices:
            for name, value in (("model_path", model), ("model_path", "")):
                said = Saying(saying.folder)
                said.say("flag", name, value)
                said.say(source, "weights", wanted)
                assert said.load().settings.weights == wanted


# --- what is refused, and how ---

BEYOND = [
    (row.name, row.kind(bound + step * (1 if row.kind is int else 0.001)))
    for row in es.SETTING_ROWS
    for bound, step in ((row.option.at_least, -1), (row.option.at_most, 1))
    if bound is not None
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("name", "value"), BEYOND)
def test_a_number_out_of_bounds_is_refused(
    saying: Saying, refused: Refused, source: str, name: str, value: float
) -> None:
    saying.say(source, name, value)
    said = refused(saying)
    assert ROWS[name].option.bound
    for part in (source, name, str(value), ROWS[name].option.bound):
        assert part in said


WHOLE, NUMBER = "must be a whole number, 0 to 65535", "must be a number, 0 to 86400"
BAD_TEXT = {
    ("port", WHOLE): ["http", "80.5", "", " 80", "8_0", "\u0661", "1" * 5000],
    ("keep_alive_s", NUMBER): ["10s", "", "nan", "inf", " 1", "1_0", "\u0661"],
    ("gpu_layers", "a whole number, -1 to 1000"): ["all"],
    ("pooling", "must be one of auto, mean, cls, last"): ["max", "", "MEAN"],
    ("gzip", "must be one of remote, all, off"): ["on", "", "true"],
    ("weights", "must be one of keep, auto, f32, f16, bf16, q8_0"): ["q4_k_m", ""],
    ("cpu_affinity", "must be off, auto or a list like 0-3,8"): [
        *("", "on", "-1", "1-", "1,,2", "1,", "0 1", "0x1", "\u0661", "9" * 6, "0-3\n"),
    ],
    ("uds_mode", "must be octal, e.g. 0660"): ["", "60", "0o660", "0680", "00660"],
    ("model_sha256", "must be 64 hexadecimal digits"): ["0" * 63, "0" * 65, "g" * 64],
    # asyncio takes the empty host for every interface there is.
    ("host", ""): [""],
    ("model_name", "must be a string"): ["\udcff"],  # could be sent in no answer
    ("model_path", "begins with GGUF"): ["/dev/null", "/no/such\nfile"],
    ("config", "No such file"): ["/no/such\nfile"],
}


@pytest.mark.parametrize("source", ["flag", "environment"])
@pytest.mark.parametrize(
    ("name", "bound", "text"),
    [(*where, text) for where, texts in BAD_TEXT.items() for text in texts],
)
def test_text_that_is_not_the_type_is_refused(
    saying: Saying, refused: Refused, source: str, name: str, bound: str, text: str
) -> None:
    saying.say(source, name, text)
    said = refused(saying)
    assert f"{name} = {text!r}" in said
    assert bound in said


BAD_LINES = {
    WHOLE: ["port = true", "port = 80.0", 'port = "80"', "port = 2020-01-01"],
    NUMBER: [
        *("keep_alive_s = true", "keep_alive_s = false", 'keep_alive_s = "10"'),
        *("keep_alive_s = nan", f"keep_alive_s = 1{'0' * 400}"),
    ],
    "must be true or false": ["gpu = 1", 'gpu = "yes"'],
    "a string": ["host = 1", "model_path = 1"],
    "a list of": [
        *('model_alias = "a,b"', 'model_alias = ["a", 1]', 'model_alias = [""]'),
    ],
    "a file that begins with GGUF": [r'model_path = "a\u0000b"'],
    "no such setting": [
        *(
            "config = 'x.toml'",
            "prot = 80",
            r'"a\nb\u001b" = 80',
            "[server]\nport = 80",
        ),
    ],
    "line 2": ["port = 1\nport = 2"],
    "line 1": ["port", "\ufeffport = 1"],
}


@pytest.mark.parametrize(
    ("bound", "line"),
    [(bound, line) for bound, lines in BAD_LINES.items() for line in lines],
)
def test_a_file_is_typed(
    saying: Saying, refused: Refused, bound: str, line: str
) -> None:
    saying.table = [line + "\n"]
    said = refused(saying)
    assert "settings.toml" in said
    assert bound in said


def test_a_whole_number_is_a_float_in_a_file(saying: Saying) -> None:
    saying.table = ["keep_alive_s = 5"]
    found = saying.load().settings.keep_alive_s
    assert (found, type(found)) == (5.0, float)


def test_a_file_that_is_not_there_is_not_called_bad_toml(
    saying: Saying, refused: Refused
) -> None:
    binary = saying.folder / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    for path in (binary, saying.folder, saying.folder / "none"):
        saying.flags = [f"--config={path}"]
        said = refused(saying)
        assert str(path) in said
        assert ("not a TOML file" in said) == (path is binary)


@pytest.mark.parametrize("source", ["environment", "file"])
def test_an_unknown_name_is_refused_without_its_value(
    saying: Saying, refused: Refused, source: str
) -> None:
    # The value may be a key, meant for a setting whose name was mistyped.
    name = {"environment": "EMBELLAMA_API_KEYS", "file": "api_keys"}[source]
    saying.environment = {name: "sk-secret"} if source == "environment" else {}
    saying.table = [f"{name} = 'sk-secret'\n"] if source == "file" else []
    said = refused(saying)
    for part in (source, name, "no such setting"):
        assert part in said
    assert "sk-secret" not in said


def test_an_unknown_flag_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        es.main(["--prot", "80"])
    assert end.value.code == 2
    assert "--prot" in capsys.readouterr().err.splitlines()[-1]


# --- --print-config ---


def test_the_shown_settings_are_a_file_that_says_the_same(
    saying: Saying, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = '\x7f\x1b\n\t"\\ \N{SNOWMAN} \N{GRINNING FACE}'
    saying.flags = [f"--model-name={odd}"]
    for row in es.SETTING_ROWS:
        if row.option.in_file and not row.option.secret:
            saying.say("file", row.name, pair(row, saying.folder)[0])
    assert es.main([*saying.argv(), "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert tomllib.loads(shown)["model_name"] == odd
    said, again = saying.load().settings, Saying(saying.folder, table=[shown]).load()
    assert dataclasses.replace(said, config="") == dataclasses.replace(
        again.settings, config=""
    )


def test_the_shown_settings_name_every_row_and_its_source(saying: Saying) -> None:
    for source, name in zip(SOURCES, ("port", "threads", "workers"), strict=True):
        saying.say(source, name, 3)
    shown = saying.load().describe()
    assert re.findall(r"(?m)^(?:# )?(\w+) = ", shown) == list(ROWS)
    for line in (
        "port = 3  # flag --port\n",
        "threads = 3  # environment EMBELLAMA_THREADS\n",
        f"workers = 3  # file {saying.folder}/settings.toml\n",
        'host = "127.0.0.1"  # default\n',
    ):
        assert line in shown


def test_the_shown_settings_stay_a_file_whatever_the_file_is_called(
    saying: Saying,
) -> None:
    path = saying.folder / "a\nport = 1 #\x1b"
    path.write_text("threads = 2")
    saying.flags = [f"--config={path}"]
    table = tomllib.loads(saying.load().describe())
    assert (table["port"], table["threads"]) == (8080, 2)


def test_a_secret_is_never_shown(saying: Saying, refused: Refused) -> None:
    assert [row.name for row in es.SETTING_ROWS if row.option.secret] == ["api_key"]
    saying.say("flag", "api_key", "sk-1")
    loaded = saying.load()
    assert loaded.settings.api_key == "sk-1"
    assert "sk-1" not in loaded.describe()
    assert 'api_key = "(hidden)"  # flag --api-key' in loaded.describe()
    assert loaded.given() == {}, "what tune writes into a file"
    wrong = Saying(saying.folder)
    wrong.say("environment", "api_key", "sk-2\udcff")  # not Unicode
    assert "sk-2" not in refused(wrong)


# --- README ---


def test_the_readme_table_has_each_row_once() -> None:
    head, rule, *lines = es.settings_table().splitlines()
    assert {line.count("|") for line in (head, rule, *lines)} == {6}
    for line, row in zip(lines, ROWS.values(), strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[0] == f"`{row.flag}`"
        assert cells[1] == (row.default_text or "-")
        assert row.option.bound in cells[2]
        assert cells[3] == row.option.help


# --- cores ---

V1 = "4:cpu,cpuacct:/x\n1:name=systemd:/x\n"
V1_CPU = "cpu/x/cpu.cfs_quota_us"
V1_PERIOD = {"cpu/x/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        (None, {}, 8),  # no /proc: macOS
        ("0::/\n", {}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n"}, 4),
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n"}, 1),  # never below
        ("0::/a/b\n", {"a/b/cpu.max": "1600000 100000\n"}, 8),  # never above affinity
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "600000 100000", "a/b/cpu.max": "3 1"}, 3),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),  # a container's own root
        ("0::/docker/1:2\n", {"cpu.max": "300000 100000\n"}, 3),  # not namespaced
        (V1, V1_PERIOD | {V1_CPU: "200000\n"}, 2),
        (V1, V1_PERIOD | {V1_CPU: "-1\n"}, 8),
        (V1, {V1_CPU: "200000\n"}, 8),  # no period
        (V1 + "0::/x\n", V1_PERIOD | {V1_CPU: "200000\n"}, 2),  # hybrid
        ("3:cpuset:/x\n", V1_PERIOD | {V1_CPU: "200000\n"}, 8),  # not the controller
        # Malformed, each alone: what cannot be read limits nothing.
        *(
            ("0::/\n", {"cpu.max": bad}, 8)
            for bad in ("", "max", "a b", "1 2 3", "-1 1")
        ),
        ("0::/\n", {"cpu.max": "200000 0\n"}, 8),
        ("0::/\n", {"cpu.max": "\udcff 1\n"}, 8),
        ("no colon\n\n0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("\udcff\n", {}, 8),
    ],
)
def test_cores_are_affinity_and_quota_rounded_down(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: str | None,
    files: dict[str, str],
    cores: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    named = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in (named | {"proc/self/cgroup": groups}).items():
        if text is not None:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, errors="surrogateescape")
    assert es.usable_cores(tmp_path) == cores


@pytest.mark.parametrize(("counted", "cores"), [(6, 6), (None, 1)])
def test_cores_are_counted_where_there_is_no_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: int | None, cores: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert es.usable_cores(tmp_path) == cores


def test_every_row_says_what_a_reload_does_with_it() -> None:
    said = {row.option.reload for row in es.SETTING_ROWS}
    assert said == set(es.RELOADS)
