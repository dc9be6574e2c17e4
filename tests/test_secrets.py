"""A canary in all that can hold a secret is seen nowhere: one test over all ways out."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

import embellama_server as es
from tests import both, kit
from tests.test_page import ACCEPTS

CANARY = "canary-7c2e"
# What each secret setting is given; the others hold none, or name a file that does.
SECRETS = {
    "api_key": f"{CANARY}-api-key",
    "otlp_endpoint": f"http://me:{CANARY}@127.0.0.1:9/{CANARY}?k={CANARY}",
}
FILES = {"api_key_file", "tls_cert", "tls_key", "tls_client_ca"}  # of secrets


def test_every_setting_that_is_secret_has_its_canary() -> None:
    assert set(SECRETS) == {row.name for row in es.SETTING_ROWS if row.secret}
    assert set(es.SECRET_FILES) == FILES
    assert FILES < {row.name for row in es.SETTING_ROWS if row.is_path}


def printed(*arguments: str) -> str:
    """All that the program says."""
    out = io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
        contextlib.suppress(SystemExit),
    ):
        es.main([*arguments])
    return out.getvalue()


@pytest.mark.parametrize("way", ["flag", "variable", "toml", "yaml", "LMServ"])
def test_no_verb_prints_a_secret_however_it_was_given(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = SECRETS | {"api_key": ""} if way == "LMServ" else SECRETS
    flags: list[str] = []
    if way == "flag":
        flags = [f"{es.flag_of(name)}={value}" for name, value in given.items()]
    elif way in ("toml", "yaml"):
        place = tmp_path / f"c.{way}"
        sign = " = " if way == "toml" else ": "
        place.write_text(
            "".join(f"{k}{sign}{json.dumps(v)}\n" for k, v in given.items())
        )
        flags = ["--config", str(place)]
    else:
        for name, value in given.items():
            if value:
                monkeypatch.setenv(es.variable_of(name), value)
    if way == "LMServ":
        monkeypatch.setenv("LLM_WORKERS", "2")
        monkeypatch.setenv("API_KEY", SECRETS["api_key"])
    shown = printed("--print-config", *flags)
    assert 'api_key = "(hidden)"' in shown
    assert CANARY not in shown
    files = printed("emit", "all", *flags)
    assert files.count("# ===== ") >= len(es.EMITTERS)
    assert CANARY not in files


@pytest.mark.parametrize(
    "flags",
    [
        ("--api-key", f"{CANARY} with spaces"),
        ("--otlp-endpoint", f"ftp://me:{CANARY}@x"),
        ("--otlp-endpoint", f"http://me:{CANARY}@[::1"),
        ("--api-key-file", "{folder}/keys"),
        ("--tls-cert", "{folder}/keys", "--tls-key", "{folder}/keys"),
    ],
)
def test_a_secret_that_cannot_be_used_is_not_shown(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(f"{CANARY}\nname {CANARY} {CANARY}=1\n")
    (tmp_path / "keys").chmod(0o600)
    told = [flag.format(folder=tmp_path) for flag in flags]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kit", "--port", "0", *told],
        cwd=kit.ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=kit.DEADLINE_S,
    )
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("embellama_server: ") or "error" in done.stderr
    assert CANARY not in done.stdout + done.stderr


@contextlib.contextmanager
def everything_set(folder: Path) -> Iterator[tuple[kit.Server, ssl.SSLContext]]:
    """The program with every canary, which logs all it can."""
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    contents = {
        "api_key_file": f"operator {CANARY}-of-file admin\n",
        "tls_cert": f"{CANARY}\n{leaf.cert_chain_pems[0].bytes().decode()}",
        "tls_key": f"{CANARY}\n{leaf.private_key_pem.bytes().decode()}",
    }
    flags: list[str] = []
    for name, text in contents.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
        flags += [es.flag_of(name), str(folder / name)]
    for name in ("embedder", "ranker", "chatter"):
        (folder / f"{name}.gguf").write_bytes(both.sound_gguf())
        flags += ["--model-path", f"{name}={folder / name}.gguf"]
    flags += [
        "--log-level",
        "debug",
        "--audit-log",
        str(folder / "audit"),
        "--audit-text",
    ]
    flags += ["--host", "127.0.0.1", "--signed-requests", "accept"]
    variables = {es.variable_of(name): value for name, value in SECRETS.items()}
    context = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    with kit.started(*flags, module=both.MODULE, environment=variables) as server:
        yield server, context


KEYS: tuple[dict[str, str], ...] = (
    {"authorization": f"Bearer {SECRETS['api_key']}"},
    {"x-api-key": f"{CANARY}-of-file"},
    {"authorization": f"Bearer {CANARY}-of-nobody"},
    {"authorization": f"Signature {CANARY} 1 {CANARY} {CANARY}"},
    {"authorization": f"Basic {CANARY}"},
    {},
)


def test_no_reply_page_metric_or_log_line_shows_one(tmp_path: Path) -> None:
    with everything_set(tmp_path) as (server, context):
        address = server.url.removeprefix("https://")
        client = http.client.HTTPSConnection(
            address, timeout=kit.DEADLINE_S, context=context
        )

        def ask(method: str, path: str, fields: dict[str, str], body: str = "") -> int:
            client.request(method, path, body or None, fields)
            reply = client.getresponse()
            shown = f"{reply.msg}\n{reply.read().decode()}"
            assert CANARY not in shown, (path, fields)
            return reply.status

        statuses = set[int]()
        kind = {"content-type": "application/json"}
        for route in es.ROUTES:
            path = route.path.replace("{id}", "embedder")
            for fields in KEYS:
                for accept in ("*/*", ACCEPTS[0]):
                    if route.method == "GET":
                        statuses.add(ask("GET", path, fields | {"accept": accept}))
                        ask("GET", f"{path}?api_key={CANARY}", fields)
                if route.form and route.access != "admin":
                    ask(route.method, path, fields | kind, '{"input": "a b"}')
        assert statuses >= {200, 401}
        assert ask("POST", "/admin/reload", KEYS[0]) == 200
        client.close()
        server.wait_for_log("spans lost")
        assert server.stop() == 0
        said = "".join(server.log) + (tmp_path / "audit").read_text()
    assert "reloaded" in said and "request" in said
    assert CANARY not in said
