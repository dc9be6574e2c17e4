"""SETTINGS and CONFIGURATION: one row is a flag, a variable and a key, and a wrong one is one sentence."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import socket
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

import embellama_server as es
from tests import docs, kit

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

    def say(self, source: str, name: str, value: Any, called: str = "") -> None:
        """Say ``value`` there, as that place writes it; ``called``: another name."""
        row = dataclasses.replace(ROWS[name], name=called or name)
        if source == "file":  # what json writes of these values is TOML
            self.table.append(f"{row.name} = {json.dumps(value)}\n")
        elif source == "environment":
            between = "\n" if row.separator else ","
            text = between.join(value) if isinstance(value, tuple) else str(value)
            self.environment[es.variable_of(row.name)] = text
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
        flags = vars(parser().parse_args(self.argv()))
        return es.load_settings(flags, self.environment)


@functools.cache
def parser() -> argparse.ArgumentParser:
    """One with all flags; making it takes as long as loading settings."""
    made = argparse.ArgumentParser(allow_abbrev=False)
    es.add_flags(made)
    return made


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
    "model_name": ("one \N{SNOWMAN}=\"quoted\" 'twice' \\ @ @1x", "another"),
    "model_alias": (("a b", "\N{SNOWMAN}@"), ("c",)),
    "prompt": (('query= is "it"\n= ', "a-b_c.1="), ("x={text}",)),
    "cpu_affinity": ("0-3,8", "auto"),
    "model_sha256": ("0123456789abcdefABCDEF" + "0" * 42, "f" * 64),
    "listen": (("[::1]:0", "localhost:65535"), ("192.0.2.1:80",)),
    "uds_mode": ("0600", "777"),
    "root_path": ("/embeddings/model-a", "/a/"),
    "trusted_proxy": (("10.0.0.0/8", "unix"), ("2001:db8::1",)),
    "cors_origin": (("https://a.example", "http://[::1]:80"), ("http://b",)),
}


def pair(row: es.Option, folder: Path) -> tuple[Any, Any]:
    """Two allowed values; the first is not the default."""
    limits = row
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
    if limits.pattern[0]:
        return MATCHING[row.name]
    if row.kind is bool:
        return not row.default, row.default
    if row.kind is tuple:
        return ("a b", "\N{SNOWMAN}"), ("c",)
    if row.kind is str:
        return "one \N{SNOWMAN} \"quoted\" 'twice' \\", "another"
    assert limits.minimum is not None, "a number without bounds"
    assert limits.maximum is not None, "a number without bounds"
    both = row.kind(limits.maximum), row.kind(limits.minimum)
    return both if both[0] != row.default else both[::-1]


def places(row: es.Option) -> list[str]:
    """Where a row may be said."""
    return [s for s in SOURCES if s != "file" or row.in_file]


# --- one row, three spellings ---


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_the_same_by_flag_variable_and_file(
    name: str, tmp_path: Path
) -> None:
    row = ROWS[name]
    where = {"flag": row.flag, "environment": es.variable_of(row.name), "file": ".toml"}
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
        for wanted in ROWS["weights"].choices:
            for own_file in ({}, {"model_path": model}):
                said = Saying(saying.folder)
                for name, value in own_file.items():
                    said.say("flag", name, value)
                said.say(source, "weights", wanted)
                assert said.load().settings.weights == wanted


# --- lists in a variable ---

INSTRUCT = "query=Instruct: Given a query, where x = 1, retrieve passages\nQuery: "


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("prompt", INSTRUCT, (INSTRUCT,)),
        ("prompt", f"{INSTRUCT}\npassage=a, b\n", (INSTRUCT, "passage=a, b")),
        (
            "prompt",
            "query=query: ,passage=passage: ",
            ("query=query: ", "passage=passage: "),
        ),
        ("prompt", "a=x,\nb=y\n\nc=", ("a=x", "b=y", "c=")),
        ("prompt", json.dumps(["a=,b=1\n", INSTRUCT]), ("a=,b=1\n", INSTRUCT)),
        ("model_alias", "a b, c", ("a b", "c")),
        ("model_alias", '["a,b", "c"]', ("a,b", "c")),
        ("open_route", "health, ready", ("health", "ready")),
        ("listen", "[::1]:80,[::2]:90", ("[::1]:80", "[::2]:90")),
    ],
)
def test_a_list_in_a_variable_is_read_as_it_is_meant(
    saying: Saying, name: str, text: str, found: tuple[str, ...]
) -> None:
    saying.environment[es.variable_of(name)] = text
    assert getattr(saying.load().settings, name) == found


@pytest.mark.parametrize(
    "name", [row.name for row in es.SETTING_ROWS if row.kind is tuple]
)
@pytest.mark.parametrize(
    "text", ["", ",", "a=b,,", '["a=b", ""]', '["a=b", 1]', "[" * 10**4]
)
def test_a_list_with_an_empty_item_or_of_no_strings_is_refused(
    saying: Saying, name: str, text: str
) -> None:
    saying.environment[es.variable_of(name)] = text
    is_text = name == "prompt" and text == "a=b,,"
    is_name = ROWS[name].pattern == es.NO_VERSION or name == "allowed_host"
    if is_text or (is_name and text.startswith("[[")):
        saying.load()
        return
    with pytest.raises(es.BadSetting):
        saying.load()


# --- what is refused, and how ---


def test_a_file_too_deep_for_python_to_read_is_one_sentence(
    saying: Saying, refused: Refused
) -> None:
    saying.table = [f"model_alias = {'[' * 3000}{']' * 3000}\n"]
    assert "not a TOML file" in refused(saying)


@pytest.mark.parametrize("name", ["model_alias", "prompt", "allowed_host"])
def test_a_list_with_bytes_that_are_no_text_is_refused(
    saying: Saying, refused: Refused, name: str
) -> None:
    # With such an alias or prompt /v1/models was a 500: orjson writes no such string.
    saying.say("flag", name, ("q=é", "q=\udcff"))
    assert "must be a string of Unicode text" in refused(saying)


@pytest.mark.parametrize("source", ["flag", "environment"])
@pytest.mark.parametrize(
    "name", [row.name for row in es.SETTING_ROWS if row.kind is str]
)
def test_an_empty_text_is_a_variable_that_was_not_set_and_refused(
    saying: Saying, refused: Refused, source: str, name: str
) -> None:
    saying.say(source, name, "")
    said = refused(saying)
    assert source in said
    assert "must " in said  # be one of ..., or not be empty


def test_a_model_with_a_name_and_without_a_file_is_refused(
    saying: Saying, refused: Refused
) -> None:
    saying.environment = {"EMBELLAMA_MODEL_PATH": "mini="}
    assert "must not be empty" in refused(saying)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
@pytest.mark.parametrize("name", ["model_path", "config"])
def test_what_is_no_plain_file_is_refused_at_once(
    saying: Saying, refused: Refused, name: str, kind: str
) -> None:
    path = "/dev/zero" if kind == "device" else str(saying.folder / kind)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path)
    saying.say("environment", name, path)
    assert "not a plain file" in refused(saying)


# --- what Kubernetes adds ---

LABEL = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)


def links(
    service: str, ports: dict[str, int], protocol: str, ip: str
) -> dict[str, str]:
    """The variables of a Service, as kubelet writes them (pkg/kubelet/envvars)."""
    name = service.upper().replace("-", "_")
    first = next(iter(ports.values()))
    host = f"[{ip}]" if ":" in ip else ip
    made = {f"{name}_SERVICE_HOST": ip, f"{name}_SERVICE_PORT": str(first)}
    made[f"{name}_PORT"] = f"{protocol}://{host}:{first}"
    for label, port in ports.items():
        made[f"{name}_SERVICE_PORT_{label.upper().replace('-', '_')}"] = str(port)
        start = f"{name}_PORT_{port}_{protocol.upper()}"
        made |= {start: f"{protocol}://{host}:{port}", f"{start}_ADDR": ip}
        made |= {f"{start}_PROTO": protocol, f"{start}_PORT": str(port)}
    return made


@given(
    st.just("") | LABEL.map("-{}".format),
    st.dictionaries(LABEL, st.integers(1, 65535), min_size=1, max_size=3),
    st.sampled_from(["tcp", "udp", "sctp"]),
    st.sampled_from(["10.96.0.1", "fd00::1"]),
)
@example("-port", {"http": 80}, "tcp", "10.0.0.1")
@example("-api-key", {"port-1-tcp": 80}, "tcp", "10.0.0.1")
def test_no_service_keeps_the_server_from_starting(
    end: str, ports: dict[str, int], protocol: str, ip: str
) -> None:
    environment = links(f"embellama{end}", ports, protocol, ip)
    loaded = es.load_settings({}, environment)
    assert set(loaded.sources.values()) == {"default"}


def test_no_setting_is_taken_for_a_service_s() -> None:
    for row in es.SETTING_ROWS:
        for text in ("8080", "10.0.0.1", "text"):
            assert not es._FROM_KUBERNETES.fullmatch(
                f"{es.variable_of(row.name)}={text}"
            )


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("EMBELLAMA_PROT", "EMBELLAMA_PORT"),
        ("EMBELLAMA_HTTP_PORT", "EMBELLAMA_PORT"),
        ("EMBELLAMA_APIKEY", "EMBELLAMA_API_KEY"),
        ("EMBELLAMA_MODEL_PATHS", "EMBELLAMA_MODEL_PATH"),
    ],
)
def test_a_mistyped_variable_is_refused_with_the_one_that_is_meant(
    saying: Saying, refused: Refused, wrong: str, meant: str
) -> None:
    saying.environment = {wrong: "8081"}
    said = refused(saying)
    assert f"environment: {wrong}" in said
    assert re.search(rf"did you mean .*{meant}\b", said)


def test_a_name_like_no_other_has_no_hint(saying: Saying, refused: Refused) -> None:
    saying.environment = {"EMBELLAMA_XYZZY": "1"}
    assert "did you mean" not in refused(saying)


BEYOND = [
    (row.name, row.kind(bound + step * (1 if row.kind is int else 0.001)))
    for row in es.SETTING_ROWS
    for bound, step in ((row.minimum, -1), (row.maximum, 1))
    if bound is not None
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("name", "value"), BEYOND)
def test_a_number_out_of_bounds_is_refused(
    saying: Saying, refused: Refused, source: str, name: str, value: float
) -> None:
    saying.say(source, name, value)
    said = refused(saying)
    assert ROWS[name].bound
    for part in (source, name, str(value), ROWS[name].bound):
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
    "must be a path, without NUL": [
        f'{row.name} = "a\\u0000b"'
        for row in es.SETTING_ROWS
        if row.is_path and row.in_file
    ],
    "must not be empty": ['cache_dir = ""', 'host = ""'],
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
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--prot" in said
    assert "did you mean --prompt or --port?" in said


# --- --print-config ---


def test_the_shown_settings_are_a_file_that_says_the_same(
    saying: Saying, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = '\x7f\x1b\n\t"\\ \N{SNOWMAN} \N{GRINNING FACE}'
    saying.flags = [f"--model-name={odd}"]
    for row in es.SETTING_ROWS:
        if row.in_file and not row.secret:
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
        'host = "localhost"  # default\n',
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


def test_what_may_hold_a_key_or_password_is_secret() -> None:
    secret = [row.name for row in es.SETTING_ROWS if row.secret]
    assert secret == ["api_key", "otlp_endpoint"]


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if row.secret])
def test_a_secret_is_never_shown(saying: Saying, refused: Refused, name: str) -> None:
    saying.say("flag", name, "sk-1")
    loaded = saying.load()
    assert getattr(loaded.settings, name) == "sk-1"
    assert "sk-1" not in loaded.describe()
    assert f'{name} = "(hidden)"  # flag {ROWS[name].flag}' in loaded.describe()
    assert loaded.given() == {}, "what tune writes into a file"
    wrong = Saying(saying.folder)
    wrong.say("environment", name, "sk-2\udcff")  # not Unicode
    assert "sk-2" not in refused(wrong)


# --- several models ---


@dataclass
class Farm:
    """Model files that nobody opens further than their first bytes."""

    folder: Path

    def path(self, name: str) -> str:
        """One called so."""
        path = self.folder / f"{name}.gguf"
        path.write_bytes(es.GGUF_MAGIC)
        return str(path)


@pytest.fixture
def farm(tmp_path: Path) -> Farm:
    folder = tmp_path / "farm"
    folder.mkdir()
    return Farm(folder)


def names(loaded: es.LoadedSettings) -> list[tuple[str, int]]:
    """Of each model, its name and version."""
    return [(es.name_of(one), one.model_version) for one in loaded.models]


def said_of(loaded: es.LoadedSettings) -> list[es.Settings]:
    """The settings of each model, but for where they were read from."""
    return [dataclasses.replace(one, config="") for one in loaded.models]


def table(**said: Any) -> str:
    """A [[models]] table."""
    texts = {k: json.dumps(v, ensure_ascii=False) for k, v in said.items()}
    lines = (f"{key} = {text}\n" for key, text in texts.items())
    return "[[models]]\n" + "".join(lines)


MODEL_ROWS = {row.table_key: row for row in es.MODEL_ROWS}


def test_one_model_is_a_list_of_one(saying: Saying, farm: Farm) -> None:
    assert names(saying.load()) == [("", 1)]
    saying.say("flag", "model_path", farm.path("a"))
    loaded = saying.load()
    assert loaded.models == (loaded.settings,)
    assert names(loaded) == [("a", 1)]
    assert loaded.tables == ()


def test_rows_of_a_model_are_the_first_and_have_keys_of_their_own() -> None:
    assert es.SETTING_ROWS[: len(es.MODEL_ROWS)] == es.MODEL_ROWS
    assert len(MODEL_ROWS) == len(es.MODEL_ROWS)
    assert {"path", "name", "aliases", "version", "share", "prompts"} <= set(MODEL_ROWS)
    assert not any(key.startswith("model") for key in MODEL_ROWS)


@pytest.mark.parametrize("key", MODEL_ROWS)
def test_what_may_be_said_of_one_model_may_be_said_of_each(
    saying: Saying, farm: Farm, key: str
) -> None:
    row = MODEL_ROWS[key]
    one, other = pair(row, saying.folder)
    both: list[dict[str, Any]] = [{key: one}, {key: other}]
    for said, name in zip(both, "ab", strict=True):
        said.setdefault("path", farm.path(name))
    if key not in ("name", "version"):
        for said, name in zip(both, "xy", strict=True):
            said["name"] = name
    saying.table = [table(**said) for said in (*both, {"path": farm.path("c")})]
    first, second, third = saying.load().models
    assert getattr(first, row.name) == one
    assert getattr(second, row.name) == other
    if key not in ("path", "weights", "workers"):
        assert getattr(third, row.name) == row.default


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_said_of_all_counts_where_a_table_says_nothing(
    saying: Saying, farm: Farm, source: str
) -> None:
    saying.say(source, "threads", 3)
    saying.say(source, "port", 99)
    saying.table += [
        table(path=farm.path("a"), threads=2),
        table(path=farm.path("b")),
    ]
    loaded = saying.load()
    assert [one.threads for one in loaded.models] == [2, 3]
    assert {one.port for one in (loaded.settings, *loaded.models)} == {99}


def test_weights_of_a_table_follow_its_own_path(saying: Saying, farm: Farm) -> None:
    saying.table = [
        table(path=farm.path("a")),
        table(path=farm.path("b"), weights="auto"),
    ]
    loaded = saying.load()
    assert [one.weights for one in loaded.models] == ["keep", "auto"]


def test_prompts_may_be_a_table_of_a_table(saying: Saying, farm: Farm) -> None:
    path = farm.path("a")
    saying.table = [
        f'[[models]]\npath = "{path}"\n[models.prompts]\nquery = "q: "\n"d.1" = ""\n'
    ]
    (one,) = saying.load().models
    assert one.prompt == ("query=q: ", "d.1=")


def test_the_files_own_model_is_the_first(saying: Saying, farm: Farm) -> None:
    saying.say("file", "model_path", farm.path("a"))
    saying.say("file", "model_alias", ("x",))
    saying.table.append(table(path=farm.path("b")))
    loaded = saying.load()
    assert names(loaded) == [("a", 1), ("b", 1)]
    assert [one.model_alias for one in loaded.models] == [("x",), ()]


def test_flags_name_models(saying: Saying, farm: Farm) -> None:
    a, b = farm.path("a"), farm.path("b")
    saying.flags = [f"--model-path={one}" for one in (a, f"x={b}", f"x@3={b}")]
    loaded = saying.load()
    assert names(loaded) == [("a", 1), ("x", 1), ("x", 3)]
    assert [one.model_path for one in loaded.models] == [a, b, b]
    assert {one.weights for one in loaded.models} == {"keep"}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("text", "name", "version"),
    [
        ("x={}", "x", 1),
        ("x@2={}", "x", 2),
        ("a b/\N{SNOWMAN}@2={}", "a b/\N{SNOWMAN}", 2),
        ("x@y@1000={}", "x@y", 1000),
        ("x@={}", "x@", 1),
        ("@2x={}", "@2x", 1),
    ],
)
def test_one_path_may_name_its_model(
    saying: Saying, farm: Farm, source: str, text: str, name: str, version: int
) -> None:
    saying.say(source, "model_path", text.format(farm.path("a")))
    loaded = saying.load()
    assert names(loaded) == [(name, version)]
    assert loaded.models == (loaded.settings,)
    assert loaded.settings.model_path == farm.path("a")
    assert loaded.sources["model_name"].startswith(source)


def test_a_file_with_an_equals_sign_in_its_name_is_that_file(
    saying: Saying, farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = farm.path("a=b")
    monkeypatch.setenv("HOME", str(farm.folder))
    for shown in (path, "~/a=b.gguf"):
        said = Saying(saying.folder, [f"--model-path={shown}"])
        assert names(said.load()) == [("a=b", 1)]
        assert said.load().settings.model_path == path


@pytest.mark.parametrize("source", ["environment", "flag"])
def test_models_named_elsewhere_are_served_instead_of_the_files(
    saying: Saying, farm: Farm, source: str
) -> None:
    saying.table = [table(path=farm.path("a")), table(path=farm.path("b"))]
    saying.say(source, "model_path", farm.path("c"))
    assert names(saying.load()) == [("c", 1)]


@pytest.mark.parametrize("source", ["environment", "file"])
def test_models_named_by_flags_are_all_that_is_served(
    saying: Saying, farm: Farm, source: str
) -> None:
    saying.say(source, "model_path", farm.path("c"))
    saying.flags = [f"--model-path={n}={farm.path(n)}" for n in "ab"]
    loaded = saying.load()
    assert names(loaded) == [("a", 1), ("b", 1)]
    again = Saying(saying.folder, table=[loaded.describe()]).load()
    assert said_of(again) == said_of(loaded)


# What is wrong, and a part of the sentence that says it.
BAD_TABLES = {
    "must be [[models]] tables": [
        *("models = 3\n", "models = [3]\n", '[models]\npath = "{a}"\n'),
        'models = [{{ path = "{a}" }}, []]\n',
    ],
    "table 1: path = '' cannot be used": ["[[models]]\n", "[[models]]\nname = 'x'\n"],
    "table 2: path = '' cannot be used": [
        *("[[models]]\npath = '{a}'\n[[models]]\n",),
        *("[[models]]\npath = '{a}'\n[[models]]\npath = ''\n",),
    ],
    "table 1: path = 3": ["[[models]]\npath = 3\n"],
    "table 1: path = {{": ["[[models]]\npath = {{ a = '{a}' }}\n"],
    "begins with GGUF: No such file": ["[[models]]\npath = '{a}.not'\n"],
    "no such setting": [
        *("[[models]]\npath = '{a}'\nmodel_name = 'x'\n",),
        *("[[models]]\npath = '{a}'\nport = 80\n",),
        *('[[models]]\npath = "{a}"\n"a\\nb\\u001b" = 80\n',),
        *("[[models]]\npath = '{a}'\nalias = ['x']\n",),
    ],
    "version = 0 cannot be used: must be 1 to": [
        "[[models]]\npath = '{a}'\nversion = 0\n"
    ],
    "version = '2' cannot be used: must be a whole number": [
        "[[models]]\npath = '{a}'\nversion = '2'\n"
    ],
    "a list of strings": [
        *("[[models]]\npath = '{a}'\naliases = 'x'\n",),
        *("[[models]]\npath = '{a}'\naliases = {{ x = 'y' }}\n",),
        *("[[models]]\npath = '{a}'\nprompts = {{ x = 3 }}\n",),
        *("[[models]]\npath = '{a}'\nprompts = {{ x = ['a'] }}\n",),
    ],
    "NAME=TEXT": [
        *("[[models]]\npath = '{a}'\nprompts = {{ 'a b' = 'c' }}\n",),
        *("[[models]]\npath = '{a}'\nprompts = ['query']\n",),
    ],
    "end in @VERSION": [
        *("[[models]]\npath = '{a}'\nname = 'x@2'\n",),
        *("[[models]]\npath = '{a}'\naliases = ['y', 'x@2']\n",),
    ],
    "'a@1' cannot be used: two models have this name": [
        *("[[models]]\npath = '{a}'\n[[models]]\npath = '{a}'\n",),
        *("[[models]]\npath = '{a}'\n[[models]]\npath = '{b}'\nname = 'a'\n",),
        *("model_path = '{a}'\n[[models]]\npath = '{a}'\nversion = 1\n",),
    ],
    "set it in a [[models]] table": [
        *("model_name = 'x'\n[[models]]\npath = '{a}'\n",),
        *("model_alias = ['x']\n[[models]]\npath = '{a}'\n",),
        *("model_version = 2\n[[models]]\npath = '{a}'\n",),
        *("model_share = 2\n[[models]]\npath = '{a}'\n",),
        *(f"model_sha256 = '{'0' * 64}'\n[[models]]\npath = '{{a}}'\n",),
    ],
}


@pytest.mark.parametrize(
    ("part", "text"),
    [(part, text) for part, texts in BAD_TABLES.items() for text in texts],
)
def test_a_table_that_is_wrong_is_refused(
    saying: Saying, refused: Refused, farm: Farm, part: str, text: str
) -> None:
    saying.table = [text.format(a=farm.path("a"), b=farm.path("b"))]
    said = refused(saying)
    assert part.replace("{{", "{") in said
    assert "settings.toml" in said or "two models" in part


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["x={a}", "x={b}"], "'x@1' cannot be used: two models have this name"),
        (["{a}", "{a}"], "'a@1' cannot be used: two models have this name"),
        (["x@2={a}", "x@02={b}"], "'x@2' cannot be used: two models"),
        (["x@0={a}"], "must be 1 to 1000000000"),
        (["x@0={a}", "{b}"], "must be 1 to 1000000000"),
        (["x={a}.not"], "No such file"),
        (["{a}", "x={a}.not"], "No such file"),
        (["={a}"], "No such file"),
        (["x@1234567890={a}"], "end in @VERSION"),
        (["x=/dev/null"], "begins with GGUF"),
        (["\udcff={a}"], "Unicode"),
    ],
)
def test_a_flag_that_names_a_model_wrongly_is_refused(
    saying: Saying, refused: Refused, farm: Farm, flags: list[str], part: str
) -> None:
    named = [flag.format(a=farm.path("a"), b=farm.path("b")) for flag in flags]
    saying.flags = [f"--model-path={flag}" for flag in named]
    assert part in refused(saying)


@pytest.mark.parametrize("source", ["flag", "environment"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_name", "y"),
        ("model_alias", ("y",)),
        ("model_version", 2),
        ("model_share", 0.5),
        ("model_sha256", "0" * 64),
    ],
)
def test_what_says_which_model_it_is_cannot_be_said_of_several(
    saying: Saying,
    refused: Refused,
    farm: Farm,
    source: str,
    name: str,
    value: Any,
) -> None:
    saying.flags = [f"--model-path={farm.path(n)}" for n in "ab"]
    saying.say(source, name, value)
    said = refused(saying)
    assert source in said
    assert name in said
    assert "several models" in said


def test_a_path_that_names_its_model_may_not_be_contradicted_beside_it(
    saying: Saying, refused: Refused, farm: Farm
) -> None:
    saying.flags = [f"--model-path=x={farm.path('a')}", "--model-name=x"]
    assert names(saying.load()) == [("x", 1)]
    saying.flags[1] = "--model-name=y"
    assert "model_name = 'y'" in refused(saying)


# --- what is shown of several ---


def test_the_shown_settings_of_several_models_are_a_file_that_says_the_same(
    saying: Saying, farm: Farm, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = '\x1b\n\t"\\ \N{SNOWMAN} \N{GRINNING FACE}'
    whole = {key: pair(row, saying.folder)[0] for key, row in MODEL_ROWS.items()}
    saying.say("file", "threads", 3)
    saying.table += [
        table(**(whole | {"name": odd})),
        table(path=farm.path("b"), prompts=[f"q={odd}"]),
        table(path=farm.path("c"), workers=7, share=1e-7, stuck_after_s=0.5),
    ]
    loaded = saying.load()
    assert es.main([*saying.argv(), "--print-config"]) == 0
    shown = capsys.readouterr().out
    again = Saying(saying.folder, table=[shown]).load()
    assert said_of(again) == said_of(loaded)
    assert again.tables == loaded.tables


def test_models_of_flags_are_shown_as_tables(saying: Saying, farm: Farm) -> None:
    saying.flags = [f"--model-path={n}@2={farm.path(n)}" for n in "ab"]
    loaded = saying.load()
    shown = loaded.describe()
    assert tomllib.loads(shown)["models"] == [
        {"path": farm.path(name), "name": name, "version": 2} for name in "ab"
    ]
    assert said_of(Saying(saying.folder, table=[shown]).load()) == said_of(loaded)


def test_the_files_own_model_and_its_tables_are_shown(
    saying: Saying, farm: Farm
) -> None:
    saying.say("file", "model_path", farm.path("a"))
    saying.say("file", "model_name", "first")
    saying.table.append(table(path=farm.path("b")))
    loaded = saying.load()
    again = Saying(saying.folder, table=[loaded.describe()]).load()
    assert said_of(again) == said_of(loaded)
    assert names(again) == [("first", 1), ("b", 1)]


# --- one more model, as an administrator says it ---


def test_one_more_model_has_what_is_said_of_all(saying: Saying, farm: Farm) -> None:
    saying.say("flag", "threads", 3)
    saying.say("flag", "port", 99)
    saying.table = [table(path=farm.path("a"), workers=9)]
    saying.say("environment", "batch_tokens", 64)
    more = saying.load().with_model({"path": farm.path("b"), "version": 2})
    assert (es.name_of(more), more.model_version) == ("b", 2)
    assert (more.threads, more.port, more.batch_tokens) == (3, 99, 64)
    assert more.weights == "keep"
    assert more.workers == es.load_settings({}, {}).settings.workers


def test_one_more_model_is_nobody_elses_namesake(saying: Saying, farm: Farm) -> None:
    saying.flags = [f"--model-path=x@7={farm.path('a')}", "--model-alias=y"]
    more = saying.load().with_model({"path": farm.path("b")})
    assert (es.name_of(more), more.model_version, more.model_alias) == ("b", 1, ())


@pytest.mark.parametrize(
    "table",
    [
        *({}, {"name": "x"}, {"path": 3}, {"path": "/no/such"}),
        *({"path": "{a}", "port": 3}, {"path": "{a}", "version": True}),
        *({"path": "{a}", "prompts": {"q": 3}}, {"path": "{a}", "name": None}),
        {"path": "{a}", "name": "x@2"},
    ],
)
def test_one_more_model_that_is_wrong_is_refused(
    saying: Saying, farm: Farm, table: dict[str, Any]
) -> None:
    asked = {k: farm.path("a") if v == "{a}" else v for k, v in table.items()}
    with pytest.raises(es.BadSetting):
        saying.load().with_model(asked)


# --- other names ---


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("other", "name"), es.SETTING_ALIASES.items())
def test_a_setting_s_other_name_is_understood_wherever_its_own_is(
    saying: Saying, source: str, other: str, name: str
) -> None:
    value, own_value = pair(ROWS[name], saying.folder)
    saying.say(source, name, value, called=other)
    loaded = saying.load()
    assert getattr(loaded.settings, name) == value
    assert loaded.sources[name].startswith(f"{source} ")
    again = Saying(saying.folder, table=[loaded.describe()]).load()
    assert getattr(again.settings, name) == value
    saying.say(source, name, own_value)
    assert getattr(saying.load().settings, name) == own_value, "its own name counts"


@pytest.mark.parametrize(
    ("other", "name"),
    [pair for pair in es.SETTING_ALIASES.items() if ROWS[pair[1]] in es.MODEL_ROWS],
)
def test_a_model_s_table_takes_other_names_too(
    saying: Saying, farm: Farm, other: str, name: str
) -> None:
    said = {"path": farm.path("a"), other: 77}
    assert getattr(saying.load().with_model(said), name) == 77
    saying.table = [table(**said)]
    (one,) = saying.load().models
    assert getattr(one, name) == 77


def test_a_name_that_was_given_up_is_still_understood() -> None:
    assert es.SETTING_ALIASES["pack_tokens"] == "batch_tokens"
    assert es.SETTING_ALIASES.keys().isdisjoint(ROWS)


def test_no_flag_has_two_meanings() -> None:
    flags = [flag for row in es.SETTING_ROWS for flag in row.flags]
    flags += [f"--no-{row.flag[2:]}" for row in es.SETTING_ROWS if row.kind is bool]
    assert len(flags) == len(set(flags))


# --- README ---


def test_the_readme_table_has_each_row_once() -> None:
    head, rule, *lines = docs.settings_table().splitlines()
    assert {line.count("|") for line in (head, rule, *lines)} == {6}
    for line, row in zip(lines, ROWS.values(), strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        flags = [f"`{flag}`" for flag in row.flags]
        assert cells[0] == ", ".join(flags)
        assert cells[1] == (row.default_text or "-")
        assert row.bound in cells[2]
        assert cells[3] == row.help


def test_every_row_says_what_a_reload_does_with_it() -> None:
    said = {row.reload for row in es.SETTING_ROWS}
    assert said == set(es.RELOADS)


# --- LMServ's variables ---


def sourced(loaded: es.LoadedSettings) -> dict[str, tuple[Any, str]]:
    """What is not a default, with where it came from."""
    return {
        name: (getattr(loaded.settings, name), source)
        for name, source in loaded.sources.items()
        if source != "default"
    }


@pytest.fixture
def gguf(tmp_path: Path) -> str:
    """A file that may be a model."""
    path = tmp_path / "chat.gguf"
    path.write_bytes(es.GGUF_MAGIC)
    return str(path)


def test_an_environment_of_lmserv_s_is_understood(gguf: str) -> None:
    environment = {
        "LLM_MODEL_PATH": gguf,
        "LLM_BIN_PATH": "vendor/llama.cpp/build-cuda/bin/llama-cli",
        "LLM_WORKERS": "2",
        "API_KEY": "secret123",
        "LOG_LEVEL": "WARNING",
        "RATE_LIMIT_QPS": "0.5",
    }
    loaded = es.load_settings({}, environment)
    assert sourced(loaded) == {
        "model_path": (gguf, "environment LLM_MODEL_PATH"),
        "parallel": (2, "environment LLM_WORKERS"),
        "api_key": ("secret123", "environment API_KEY"),
        "log_level": ("warning", "environment LOG_LEVEL"),
        "rate_limit": (0.5, "environment RATE_LIMIT_QPS"),
    }
    assert loaded.ignored == ()
    assert "secret123" not in loaded.describe()
    assert {row.name for row in es.SETTING_ROWS} >= {*es.LMSERV_VARIABLES.values()}


def test_every_source_of_ours_beats_lmserv_s_variables(
    saying: Saying, gguf: str
) -> None:
    saying.environment = {"LLM_MODEL_PATH": "/none", "LLM_WORKERS": "2"}
    saying.environment |= {"LOG_LEVEL": "debug", "RATE_LIMIT_QPS": "3"}
    saying.say("file", "parallel", 5)
    saying.say("environment", "rate_limit", 7.0)
    saying.say("flag", "model_path", gguf)
    settings = saying.load().settings
    assert (settings.parallel, settings.rate_limit) == (5, 7.0)
    assert (settings.model_path, settings.log_level) == (gguf, "debug")


def test_lmserv_s_model_does_not_replace_those_of_the_file(
    saying: Saying, gguf: str
) -> None:
    saying.environment = {"LLM_MODEL_PATH": "/none"}
    saying.table = [f"[[models]]\npath = {json.dumps(gguf)}\nname = 'a'\n"]
    assert [model.model_path for model in saying.load().models] == [gguf]


@pytest.mark.parametrize("text", ["", "sk-another program's", "x"])
def test_a_key_that_may_be_another_program_s_locks_nobody_out(text: str) -> None:
    stray = {"API_KEY": text, "LOG_LEVEL": "error", "RATE_LIMIT_QPS": "1"}
    loaded = es.load_settings({}, stray)
    assert sourced(loaded) == {}
    assert "EMBELLAMA_API_KEY" in "".join(loaded.ignored)
    assert not text or text not in "".join(loaded.ignored)


def test_a_stray_key_is_not_spoken_of_where_there_are_keys(saying: Saying) -> None:
    saying.environment = {"API_KEY": "sk-another program's"}
    saying.say("environment", "api_key", "a key of ours")
    assert saying.load().ignored == ()


@pytest.mark.parametrize(
    ("level", "meant"),
    [("WARN", "warning"), ("CRITICAL", "error"), ("trace", "debug"), ("Info", "info")],
)
def test_a_level_of_python_s_is_understood(level: str, meant: str) -> None:
    loaded = es.load_settings({}, {"LLM_WORKERS": "1", "LOG_LEVEL": level})
    assert (loaded.settings.log_level, loaded.ignored) == (meant, ())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("LOG_LEVEL", "module=debug"),
        ("LOG_LEVEL", ""),
        ("LLM_WORKERS", "many"),
        ("LLM_WORKERS", "1000"),
        ("RATE_LIMIT_QPS", "-1"),
        ("RATE_LIMIT_QPS", "fast"),
    ],
)
def test_a_value_that_does_not_fit_is_ignored_with_a_sentence(
    name: str, text: str
) -> None:
    loaded = es.load_settings({}, {"LLM_WORKERS": "1", name: text})
    setting = es.LMSERV_VARIABLES[name]
    assert loaded.sources[setting] == "default"
    assert len(loaded.ignored) == 1
    assert loaded.ignored[0].startswith(f"environment {name}: {setting} = ")


@pytest.mark.parametrize(
    ("name", "text"),
    [("LLM_MODEL_PATH", "/no/such.gguf"), ("LLM_MODEL_PATH", ""), ("API_KEY", "")],
)
def test_lmserv_s_model_and_key_are_never_ignored(
    saying: Saying, refused: Refused, name: str, text: str
) -> None:
    saying.environment = {"LLM_WORKERS": "1", name: text}
    assert f"environment {name}: {es.LMSERV_VARIABLES[name]}" in refused(saying)


# --- folders ---


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({"XDG_CACHE_HOME": "/cache", "HOME": "/home/me"}, "/cache/embellama"),
        ({"HOME": "/home/me"}, "/home/me/.cache/embellama"),
        # The specification has relative ones ignored.
        ({"XDG_CACHE_HOME": "cache", "HOME": "/me"}, "/me/.cache/embellama"),
        ({"XDG_CACHE_HOME": "", "HOME": "/"}, "/.cache/embellama"),
        ({"HOME": "here"}, "/var/cache/embellama"),
        ({}, "/var/cache/embellama"),  # and a user that no file knows: "~" stays
    ],
)
def test_the_cache_has_a_place_whoever_we_are(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], folder: str
) -> None:
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getuid", lambda: 987654321)
    assert es.default_cache_dir() == folder


# --- files ---


def test_only_a_plain_file_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    for name in ("fifo", "link", "socket", "/dev/zero"):
        with pytest.raises(OSError, match="not a plain file"):
            es.open_plain(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        es.open_plain(tmp_path)
    (tmp_path / "plain").write_bytes(b"it")
    with es.open_plain(tmp_path / "plain") as file:
        assert file.read() == b"it"


def test_a_file_that_becomes_a_fifo_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "plain").write_bytes(b"")
    before = os.stat(tmp_path / "plain")
    monkeypatch.setattr(os, "stat", lambda *_, **__: before)
    with pytest.raises(OSError, match="not a plain file"):
        es.open_plain(tmp_path / "fifo")


# --- YAML ---


def in_yaml(folder: Path, text: str, name: str = "x.yaml") -> es.LoadedSettings:
    """What is loaded from a file with this text."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return es.load_settings({"config": str(path)}, {})


def shown(loaded: es.LoadedSettings) -> list[str]:
    """What --print-config shows, without where each value is from."""
    lines = loaded.describe().split("\n")
    return [line.rpartition("  # ")[0] for line in lines if "config = " not in line]


@pytest.mark.parametrize("name", [row.name for row in es.SETTING_ROWS if row.in_file])
def test_a_row_says_the_same_in_yaml(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    for value in pair(row, tmp_path):
        others = [Saying(tmp_path) for _ in range(2)]
        for said, source in zip(others, ("environment", "file"), strict=True):
            said.say(source, name, value)
        wanted = [shown(said.load()) for said in others]
        assert wanted[0] == wanted[1]
        plain = json.loads(json.dumps(value))
        texts = (
            [yaml.safe_dump({name: plain}, allow_unicode=True), json.dumps({name: plain})]
            + ([f"{name}: {'on' if value else 'off'}\n"] if row.kind is bool else [])
            + ([f"{name}: {value}"] if row.kind in (int, float) else [])
        )  # fmt: skip
        for text in texts:
            loaded = in_yaml(tmp_path, text)
            assert shown(loaded) == wanted[0], text
            assert loaded.sources[name] == f"file {tmp_path}/x.yaml"


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("gzip: off", "gzip", "off"),
        ("cpu_affinity: off", "cpu_affinity", "off"),
        ("signed_requests: off", "signed_requests", "off"),
        ("uds_mode: 0660", "uds_mode", "0660"),
        ("uds_mode: 0600", "uds_mode", "0600"),
        ("model_name: 1.10", "model_name", "1.10"),
        ("model_name: 12:30", "model_name", "12:30"),
        ("api_key: 0123456789", "api_key", "0123456789"),
        ("gpu: yes", "gpu", True),
        ("gpu: 'on'", "gpu", True),
        ("port: 0", "port", 0),
        ("open_route: health, ready", "open_route", ("health", "ready")),
        ("open_route: [health, ready]", "open_route", ("health", "ready")),
        ("open_route:\n- health\n- ready\n", "open_route", ("health", "ready")),
        ("cors_origin: [null]", "cors_origin", ("null",)),
        ("cors_origin: 'null'", "cors_origin", ("null",)),
        ("prompt: {query: 'q: '}", "prompt", ("query=q: ",)),
        ("prompt:\n  query: |-\n    a, b\n    c\n", "prompt", ("query=a, b\nc",)),
        ("prompt: ['a=x, y']", "prompt", ("a=x, y",)),
        ("max-batch-tokens: 32", "", "no such setting"),
        ("max_batch_tokens: 32", "batch_tokens", 32),
        ("", "port", 8080),
        ("# nothing\n", "port", 8080),
        ("{}", "port", 8080),
        ("%YAML 1.1\n---\nport: 1\n...\n", "port", 1),
        ("\ufeffport: 1\n", "port", 1),
        ("port: 1\r\ngpu: on\r\n", "gpu", True),
    ],
)
def test_what_yaml_would_read_as_something_else_is_read_as_a_variable(
    text: str, name: str, value: Any, tmp_path: Path
) -> None:
    if not name:
        with pytest.raises(es.BadSetting, match=value):
            in_yaml(tmp_path, text)
        return
    for file in ("x.yaml", "x.yml", "X.YAML"):
        assert getattr(in_yaml(tmp_path, text, file).settings, name) == value


HIDDEN = "s3cr3t-0123456789"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port: 1\nport: 2", "'port' is given twice (at line 2, column 1)"),
        ("models: [{path: a, path: b}]", "'path' is given twice"),
        ("port: &a 1", "anchors are not read (at line 1, column 7)"),
        ("port: &a 1\nworkers: *a", "anchors are not read"),
        ("workers: *a", "anchors are not read"),
        ("a: &a [x]\n<<: *a", "anchors are not read"),
        ("port: !!int 1", "tags are not read"),
        ("port: !!python/object/apply:os.system ['true']", "tags are not read"),
        ("port: ! 1", "tags are not read"),
        ("[" * 5000, "no setting is that deep"),
        ("a: " + "{b: " * 3000, "no setting is that deep"),
        ("- port: 1", "not a mapping"),
        ("port", "not a mapping"),
        ("port: 1\n---\nport: 2", "document"),
        ("? [a]\n: b", "a key must be a text"),
        ("port: 1\n\tb: 2", "at line 2"),
        (f"api_key: '{HIDDEN}", "at line 1"),
        (f"api_key: {HIDDEN}: {HIDDEN}", "at line 1"),
        (f"api_key: {HIDDEN}\nbad", "at line "),
        ("---\n", "not a mapping"),
        ("port: \x01", "not allowed"),
        ("port:", "port = '' cannot be used: must not be empty"),
        ("port: ''", "must not be empty"),
        ("api_key:", "must not be empty"),
        ("api_key: ''", "must not be empty"),
        ("audit_log: null", "must not be empty"),
        ("audit_log: ~", "must not be empty"),
        ("cors_origin: null", "must not be empty"),
        ("port: 80_80", "must be a whole number, 0 to 65535"),
        ("port: 0x50", "must be a whole number"),
        ("port: 1e3", "must be a whole number"),
        ("port: 8080.0", "must be a whole number"),
        ("port: [8080]", "must be a whole number"),
        ("port: {a: b}", "must be a whole number"),
        ("gpu: maybe", "must be true or false"),
        ("gpu: [on]", "must be true or false"),
        ("model_path: [a, b]", "must be a string"),
        ("listen: [[a]]", "must be a list of strings"),
        ("prompt: {a: {b: c}}", "must be a list of strings"),
        ("prompt: {a: }", "must be a list of strings"),
        ("prot: 1", "did you mean prompt or port?"),
        ("models: {path: a}", "must be a list of models"),
        ("models: a", "must be a list of models"),
        ("models:", "must be a list of models"),
        ("models: [a]", "must be a list of models"),
        ("models: [{workers: 1}]", "must be a GGUF file"),
        ("config: x.toml", "no such setting"),
    ],
)
def test_yaml_that_says_no_setting_is_refused_in_one_line_without_a_secret(
    text: str, said: str, saying: Saying, refused: Refused
) -> None:
    path = saying.folder / "x.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    saying.flags = [f"--config={path}"]
    sentence = refused(saying)
    assert said in sentence
    assert HIDDEN not in sentence


def test_models_of_yaml_are_those_of_toml(farm: Farm, saying: Saying) -> None:
    one, two = (str(kit.fake_gguf(saying.folder, name)) for name in ("one", "two"))
    in_toml = saying.folder / "x.toml"
    in_toml.write_text(
        f"""
        cache_mb = 7
        [[models]]
        path = "{one}"
        aliases = ["a", "b"]
        workers = 2
        prompts = {{ q = "Q: " }}
        [[models]]
        path = "{two}"
        version = 3
        preload = false
        rope_freq_scale = 0.5
        """
    )
    tables = [
        {"path": one, "aliases": ["a", "b"], "workers": 2, "prompts": {"q": "Q: "}},
        {"path": two, "version": 3, "preload": False, "rope_freq_scale": 0.5},
    ]
    wanted = es.load_settings({"config": str(in_toml)}, {})
    text = yaml.safe_dump({"cache_mb": 7, "models": tables})
    found = in_yaml(saying.folder, text)
    same = [dataclasses.replace(one, config="") for one in found.models]
    assert same == [dataclasses.replace(one, config="") for one in wanted.models]
    assert len(same) == 2
    assert shown(found) == shown(wanted)


def test_without_pyyaml_one_sentence_says_so(
    saying: Saying, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    path = saying.folder / "x.yaml"
    path.write_text("port: 1")
    saying.flags = [f"--config={path}"]
    assert "YAML needs PyYAML; TOML needs nothing" in refused(saying)
    toml = saying.folder / "x.toml"
    toml.write_text("port = 1")
    assert es.load_settings({"config": str(toml)}, {}).settings.port == 1


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from([*"-:?[]{},&*!|>'\"%@`# \n\tab0~"])).map("".join)
)
def test_whatever_a_yaml_file_holds_it_is_read_or_refused(text: str) -> None:
    try:
        table = es.yaml_table(text)
    except ValueError as error:
        assert len(str(error).split("\n")) == 1
        return
    assert isinstance(table, dict)
    with contextlib.suppress(yaml.YAMLError):
        assert table == {} or list(table) == list(yaml.load(text, yaml.BaseLoader))
