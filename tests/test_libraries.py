"""THIS BOX: what may be missing or old, and that nobody notices which codec answered."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import embellama_server as es
from tests import kit

OLD = {"orjson": "3.8.3", "uvloop": "0.17.0"}  # both unsafe, see es.LIBRARIES


def install(folder: Path, package: str, version: str, code: str | None = None) -> None:
    """A package as pip leaves it: its dist-info, and a module unless code is None."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {package}", f"Version: {version}", ""]
    (info / "METADATA").write_text("\n".join(lines))
    if code is not None:
        (folder / f"{package.replace('-', '_')}.py").write_text(code)


def library(minimum: str = "1.2.3", fallback: str = "") -> es.Library:
    """A row for a package nobody has."""
    return es.Library("some_lib", "some-lib", minimum, "it was bad", fallback)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python looks into before all others."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("some_lib", None)  # a library with a stand-in is tried out


# --- versions ---


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert es.installed_version("some-lib") is None
    assert es.why_unusable(library()) == "some-lib is not installed"


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("3.11.6", (3, 11, 6)),
        ("0.23", (0, 23)),
        ("3.12.0rc1", (3, 12, 0)),
        ("3.11.6.post1+cu121", (3, 11, 6)),
        ("unknown", (0,)),
    ],
)
def test_a_version_is_its_release_numbers(
    site: Path, text: str, release: tuple[int, ...]
) -> None:
    install(site, "some-lib", text)
    assert es.installed_version("some-lib") == release


@pytest.mark.parametrize("metadata", [None, "", "Name: some-lib\n"])
def test_a_package_without_a_version_is_as_good_as_none(
    site: Path, metadata: str | None
) -> None:
    # What an interrupted pip leaves. Whatever it is called, it must not be a traceback.
    info = site / "some_lib-1.2.3.dist-info"
    info.mkdir()
    if metadata is not None:
        (info / "METADATA").write_text(metadata)
    (site / "some_lib.py").write_text("")
    assert "some-lib" in es.why_unusable(library())


@pytest.mark.parametrize(
    ("found", "minimum", "is_usable"),
    [
        ("1.2.3", "1.2.3", True),
        ("1.2.4", "1.2.3", True),
        ("1.2.10", "1.2.3", True),  # numbers, not text
        ("1.10", "1.2.3", True),
        ("2", "1.2.3", True),
        ("1.2.3.post1", "1.2.3", True),
        ("1.2.2", "1.2.3", False),
        ("1.2", "1.2.3", False),
        ("0.99.99", "1.2.3", False),
        ("0.23", "0.23.0", True),  # the same version: PEP 440 pads with zeros
        ("0.23.0.0", "0.23", True),
    ],
)
def test_an_old_version_is_not_used(
    site: Path, found: str, minimum: str, *, is_usable: bool
) -> None:
    install(site, "some-lib", found, code="")
    said = es.why_unusable(library(minimum))
    if is_usable:
        assert said == ""
    else:
        assert said == f"some-lib {found} is older than {minimum} (it was bad)"


def test_a_dist_info_without_its_module_is_not_installed(site: Path) -> None:
    install(site, "some-lib", "1.2.3")
    assert es.why_unusable(library()) == "some-lib is not installed"


def test_a_module_that_was_copied_here_says_its_version_itself(site: Path) -> None:
    (site / "some_lib.py").write_text("__version__ = '1.2.4'\n")
    assert es.installed_version("some-lib") == (1, 2, 4)
    assert es.why_unusable(library()) == ""
    assert "older than 9" in es.why_unusable(library("9"))


def test_a_copied_module_that_does_not_load_is_one_clause(site: Path) -> None:
    (site / "some_lib.py").write_text("raise OSError('wrong ELF class')\n")
    assert es.why_unusable(library()) == "some-lib does not load (wrong ELF class)"


# --- sentences ---


def test_only_a_library_with_a_stand_in_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(es, "LIBRARIES", (library(), library(fallback="json")))
    assert es.substitutions() == ["some-lib is not installed; using json instead"]


def test_nothing_is_said_of_libraries_that_are_fine(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(site, "some-lib", "1.2.3", code="")
    monkeypatch.setattr(es, "LIBRARIES", (library(), library(fallback="json")))
    assert es.substitutions() == []
    assert es.missing_needed() == ""


def test_a_needed_library_is_asked_for_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(es, "LIBRARIES", (library(fallback="json"), library()))
    said = es.missing_needed()
    assert said.startswith("some-lib is not installed")
    assert f"{sys.executable} -m pip install" in said
    assert "'some-lib>=1.2.3'" in said, "quoted: > is a redirection in every shell"
    monkeypatch.setattr(es, "LIBRARIES", (library(fallback="json"),))
    assert es.missing_needed() == ""


# --- black box: old libraries ---


def post(url: str, **body: object) -> tuple[int, dict[str, str], bytes]:
    """The answer to one embeddings request."""
    request = urllib.request.Request(
        f"{url}/v1/embeddings",
        json.dumps({"input": ["a b", "c", "x " * 9], "model": "fake"} | body).encode(),
        {"content-type": "application/json", "x-request-id": "same"},
    )
    with urllib.request.urlopen(request, timeout=kit.DEADLINE_S) as answer:
        headers = {name.lower(): value for name, value in answer.headers.items()}
        headers.pop("date")
        assert float(headers.pop("openai-processing-ms")) >= 0
        return answer.status, headers, answer.read()


def numbers(body: bytes) -> Any:
    """A body with its vectors as the 4-byte floats they are."""
    value = json.loads(body)
    for item in value["data"]:
        item["embedding"] = np.array(item["embedding"], np.float32).tobytes()
    return value


def test_old_libraries_are_replaced_and_nobody_can_tell(tmp_path: Path) -> None:
    for package, version in OLD.items():
        install(tmp_path, package, version, "raise SystemExit('imported although old')")
    with (
        kit.started() as usual,
        kit.started(environment={"PYTHONPATH": str(tmp_path)}) as replaced,
    ):
        for package, version in OLD.items():
            line = replaced.wait_for_log(f"{package} {version}")
            assert "library replaced" in line
            assert "instead" in line
        assert not [line for line in usual.log if "library replaced" in line]

        assert post(replaced.url, encoding_format="base64") == post(
            usual.url, encoding_format="base64"
        )
        ours, theirs = post(replaced.url), post(usual.url)
        assert numbers(ours[2]) == numbers(theirs[2])
        # And as a client reads them, which is 8-byte floats: 0.1, not 0.10000000149.
        assert json.loads(ours[2]) == json.loads(theirs[2])
        assert replaced.stop() == usual.stop() == 0


def test_a_library_that_does_not_load_is_replaced(tmp_path: Path) -> None:
    # A wheel for another libc or CPU: pip says it is there, import says it is not.
    for package in OLD:
        install(tmp_path, package, "99.0", "raise ImportError('wrong ELF class')")
    with kit.started(environment={"PYTHONPATH": str(tmp_path)}) as server:
        for package in OLD:
            assert "library replaced" in server.wait_for_log(package)
        assert post(server.url)[0] == 200


# --- black box: no library at all ---


def bare(*flags: str) -> subprocess.CompletedProcess[str]:
    """The program where only the standard library can be imported.

    -S leaves site-packages out of the path, -I what PYTHONPATH and the like add to it.
    """
    return subprocess.run(
        [sys.executable, "-I", "-S", es.__file__, *flags],
        env={k: v for k, v in os.environ.items() if not k.startswith("EMBELLAMA_")},
        capture_output=True,
        text=True,
        timeout=kit.DEADLINE_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--help", "usage: embellama_server.py"),
        ("--version", f"embellama_server {es.__version__} sha256:"),
        ("--print-config", "port = 8080"),
    ],
)
def test_what_needs_no_library_works_without(flag: str, expected: str) -> None:
    done = bare(flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert expected in done.stdout


def test_a_start_without_llama_cpp_is_one_sentence() -> None:
    done = bare()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("embellama_server: llama-cpp-python is not installed")
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_llama_cpp_that_does_not_load_is_one_sentence(tmp_path: Path) -> None:
    # What llama-cpp-python raises on a slim image that lacks libgomp.
    reason = "Failed to load shared library 'libllama.so': libgomp.so.1: not found"
    install(tmp_path, "llama-cpp-python", "99.0")
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").touch()
    broken = tmp_path / "llama_cpp" / "llama_cpp.py"
    broken.write_text(f"raise RuntimeError({reason!r})")
    flags = ("--port=0", "--log-level=error", f"--model-path={kit.fake_gguf(tmp_path)}")
    done = subprocess.run(
        [sys.executable, es.__file__, *flags],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=kit.DEADLINE_S,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("embellama_server: llama-cpp-python")
    assert reason in line


# --- JSON ---

LOADERS: dict[str, Callable[[bytes], object]] = {
    "orjson": es.json_codec().loads,
    "json": es._stdlib_loads,
}
DUMPERS: dict[str, Callable[[object], bytes]] = {
    "orjson": es.json_codec().dumps,
    "json": es._stdlib_dumps,
}


def verdict(loads: Callable[[bytes], object], raw: bytes) -> object:
    """What a loader makes of a document, or the one exception it may raise."""
    try:
        return loads(raw)
    except ValueError:
        return ValueError


def test_both_codecs_are_compared() -> None:
    # Were orjson missing here, everything below would compare json with itself.
    assert es.json_codec().name == "orjson"


GOOD: dict[bytes, object] = {
    b' \t\r\n{"a":[1,-2.5e3,true,false,null]}\n': {
        "a": [1, -2500.0, True, False, None]
    },
    b'"\\ud83d\\ude00\\u0000\\/\\n"': "\N{GRINNING FACE}\x00/\n",
    b'"\\\\ud800"': "\\ud800",  # a backslash and letters, no surrogate
    '"\N{SNOWMAN}\u2028\uffff\x7f"'.encode(): "\N{SNOWMAN}\u2028\uffff\x7f",
    b'{"a":1,"a":2}': {"a": 2},  # the last of two equal keys
    b"18446744073709551615": 2**64 - 1,
    b"-9223372036854775808": -(2**63),
    b"1e-999": 0.0,
    b"9007199254740993.0": 9007199254740992.0,
    b"0." + b"1" * 2000: 0.1111111111111111,
    b"\xef\xbb\xbf1": 1,  # a byte order mark
    # half a character
    b'"\\ud800"': "\ufffd",
    b'"\\uDC00x\\uD83D"': "\ufffdx\ufffd",
    b'"\\ude00\\ud83d"': "\ufffd\ufffd",
    b'"\\ud83d\\ud83d\\ude00\\ude00"': "\ufffd\N{GRINNING FACE}\ufffd",
    b'"\\\\\\ud83d\\\\ud83d"': "\\\ufffd\\ud83d",
    b'"\\ud83d\\\\ude00"': "\ufffd\\ude00",
    b'"\\\\ud83d\\ude00"': "\\ud83d\ufffd",
    b'"\\ud83d\\n"': "\ufffd\n",
    b'\xef\xbb\xbf{"\\ud800":["\\udfff"]}': {"\ufffd": ["\ufffd"]},
    b'{"a":"\\ud800","a":1}': {"a": 1},
}
PIECES = (
    "\\ud83d",
    "\\uDE00",
    "\\udbff",
    "\\udc00",
    "\\\\",
    "u",
    "d83d",
    "\\n",
    "\u00e9",
)
BAD = [
    *(b"", b" ", b"NaN", b"Infinity", b"[-Infinity]", b"1e999", b"[-1e999]"),
    *(b'"\xff"', b'"\xc0\xaf"', b'"\xed\xa0\x80"', b"\xef\xbb\xbf", b"1\xef\xbb\xbf"),
    *(b'"\\ud800', b'"\\ud83"', b'"\\ud800" "\xff"', b"\xef\xbb\xbf" * 2 + b"1"),
    *(t.encode(c) for t in ('"a"', "1") for c in ("utf-16", "utf-16-le", "utf-32")),
    *(b"1 2", b"{} x", b"1\x00", b"[1,]", b'{"a":1,}', b"[1", b'{"a"}', b"{a:1}"),
    *(b'"\n"', b'"\t"', b'"\x00"', b'"\\x41"', b'"\\u12"', b'"\\u+123"', b'"\\u1_23"'),
    *(b"'a'", b"01", b"1.", b".5", b"+1", b"1e", b"0x10", b"1_0", b"--1", b"-"),
    *(b"True", b"nul", b"1//x", b"\x0c1", "\xa01".encode(), "\u0661".encode()),
    *(b"[" * 500, b'{"a":' * 500, b"1" * 5000),
    b'"' + b"\\ud800" * (1 << 17) + b'"',  # so many are no accident
    b'"\\ud800' + b"\\" * 1_000_001 + b'"',
]


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("raw", GOOD, ids=lambda raw: repr(raw[:24]))
def test_both_codecs_read_good_json(name: str, raw: bytes) -> None:
    assert verdict(LOADERS[name], raw) == GOOD[raw]


@pytest.mark.parametrize("name", DUMPERS)
def test_a_path_that_is_not_utf_8_is_written_all_the_same(name: str) -> None:
    path = os.fsdecode(b"/models/caf\xe9.gguf")
    rows = np.array([0.5, 0.1], np.float32)
    raw = DUMPERS[name]({"path": path, path: [1, rows]})
    assert raw == b'{"path":"/models/caf?.gguf","/models/caf?.gguf":[1,[0.5,0.1]]}'


@pytest.mark.parametrize("name", DUMPERS)
def test_what_is_no_json_is_an_error_of_ours(name: str) -> None:
    with pytest.raises((TypeError, AttributeError)):
        DUMPERS[name]({"a": object()})


@given(st.lists(st.sampled_from(PIECES), max_size=8))
def test_half_a_character_is_one_replacement_wherever_it_stands(
    pieces: list[str],
) -> None:
    raw = '"' + "".join(pieces) + '"'
    halves = json.loads(raw)
    wanted = "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in halves)
    for loads in LOADERS.values():
        assert loads(raw.encode()) == wanted


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("raw", BAD, ids=lambda raw: f"{raw[:24]!r}-{len(raw)}")
def test_both_codecs_refuse_bad_json(name: str, raw: bytes) -> None:
    assert verdict(LOADERS[name], raw) is ValueError


# What stays different, because making it equal would cost a Python call per number or
# object. None of it changes an answer: an integer out of 64 bits is neither a token id
# nor a number of dimensions, a value that a later one replaces is not looked at.
DIFFERENT: dict[bytes, tuple[object, object]] = {
    b"18446744073709551616": (2.0**64, 2**64),
    b"1" * 400: (ValueError, int("1" * 400)),
}


@pytest.mark.parametrize("raw", DIFFERENT, ids=lambda raw: repr(raw[:24]))
def test_where_the_codecs_differ_is_known(raw: bytes) -> None:
    found = tuple(verdict(LOADERS[name], raw) for name in ("orjson", "json"))
    assert found == DIFFERENT[raw]
    assert list(map(type, found)) == list(map(type, DIFFERENT[raw]))


@pytest.mark.parametrize("name", LOADERS)
def test_nesting_that_a_request_could_need_is_read(name: str) -> None:
    # orjson's own limit is 1024, the standard library's what Python's stack has left.
    assert verdict(LOADERS[name], b"[" * 500 + b"]" * 500) is not ValueError


def test_nesting_that_python_has_no_stack_for_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def has_no_stack(*_: object, **__: object) -> None:
        raise RecursionError

    monkeypatch.setattr(json, "loads", has_no_stack)
    with pytest.raises(ValueError, match="nested too deeply"):
        LOADERS["json"](b"[[]]")


@pytest.mark.parametrize(
    "value",
    [
        {
            "a": [1, -2.5, True, None, '\N{SNOWMAN}\x7f\x00\u2028"\\/'],
            "b": (1, 2),
            "": {},
        },
        *(1e16, 1e-7, 1.5e300, -0.0, 2**63),
    ],
)
def test_both_codecs_write_what_reads_back(value: object) -> None:
    raws = {name: dumps(value) for name, dumps in DUMPERS.items()}
    assert json.loads(raws["json"]) == json.loads(raws["orjson"])
    assert b" " not in raws["json"] + raws["orjson"], "no spaces on the wire"


def test_both_codecs_write_a_vector_as_the_shortest_floats() -> None:
    vector = np.array([0.1, 1e-8, 1 / 3, 123456789.0, -0.0, 3e38], np.float32)
    read = {name: json.loads(dumps(vector)) for name, dumps in DUMPERS.items()}
    assert np.array_equal(np.array(read["json"], np.float32), vector)
    assert math.copysign(1, read["json"][4]) == -1
    assert read["json"] == read["orjson"]


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_both_codecs_write_whole_numbers_as_such(kind: str) -> None:
    vector = np.array([0, 1, 127], kind)
    assert {dumps(vector) for dumps in DUMPERS.values()} == {b"[0,1,127]"}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_both_codecs_write_what_is_no_number_as_null(bad: float) -> None:
    value = {"a": [0.1, bad, "NaN"], "b": np.array([0.1, bad], np.float32), "c": bad}
    expected = {"a": [0.1, None, "NaN"], "b": [0.1, None], "c": None}
    for dumps in DUMPERS.values():
        assert json.loads(dumps(value)) == expected
