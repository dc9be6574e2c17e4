"""Room VECTOR FILES: where vectors of a corpus are put."""

from __future__ import annotations

import errno
import io
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embellama_server as es
from tests.bulk import LENGTH, array, vector

DTYPES = {
    "float32": "<f4",
    "float16": "<f2",
    "int8": "|i1",
    "uint8": "|u1",
    "binary": "|i1",
    "ubinary": "|u1",
}
IDENTITY = {"sha256": "0" * 64, "dimensions": LENGTH}


def row(number: int, row_id: object = None) -> es.Row:
    """A row of no file."""
    return es.Row(number, "a", number, 0, number if row_id is None else row_id)


def rows(count: int) -> list[tuple[es.Row, Any]]:
    """Rows and vectors; the third one has none."""
    return [
        (row(n, f"d{n}"), es.InvalidValue("no") if n == 2 else vector(str(n)))
        for n in range(count)
    ]


def written(path: Path, count: int = 5, dtype: str = "float32") -> None:
    """An output of rows(), in two pieces."""
    kind = es.VectorKind(dtype, LENGTH, IDENTITY)
    file = es.VECTOR_FILES[es.output_kind(str(path))](str(path), kind, {})
    file.write(rows(count)[:3])
    file.sync()
    file.write(rows(count)[3:])
    moves, drops = file.finish()
    file.close()
    for part, target in moves.items():
        Path(part).rename(target)
    for name in drops:
        Path(name).unlink()


@pytest.mark.parametrize(("dtype", "descr"), DTYPES.items())
def test_npy_is_what_numpy_writes(tmp_path: Path, dtype: str, descr: str) -> None:
    path = tmp_path / "v.npy"
    written(path, dtype=dtype)
    numbers = [es.DTYPES[dtype](vector(str(n))) for n in range(5)]
    numbers[2] = np.full_like(numbers[0], np.nan if dtype.startswith("float") else 0)
    theirs = io.BytesIO()
    np.save(theirs, np.array(numbers))
    assert path.read_bytes() == theirs.getvalue()
    found = np.load(path, mmap_mode="r")
    assert found.dtype.str == descr
    lines = Path(f"{path}.ids.jsonl").read_bytes().splitlines()
    ids = [json.loads(line) for line in lines]
    assert [line["id"] for line in ids] == [f"d{n}" for n in range(5)]
    assert [n for n, line in enumerate(ids) if "error" in line] == [2]


def test_npy_can_be_read_while_it_grows(tmp_path: Path) -> None:
    kind = es.VectorKind("float32", LENGTH, IDENTITY)
    file = es.VECTOR_FILES["npy"](str(tmp_path / "v.npy"), kind, {})
    for count in range(1, 12):
        file.write([(row(count), vector(str(count)))])
        file.sync()
        with open(tmp_path / "v.npy.part", "rb") as part:
            found = np.load(part)
        assert np.array_equal(found, array(map(str, range(1, count + 1))))
    file.close()


def test_no_rows_are_an_empty_array(tmp_path: Path) -> None:
    written(tmp_path / "v.npy", 0)
    assert np.load(tmp_path / "v.npy").shape == (0, LENGTH)


@pytest.mark.parametrize("dtype", DTYPES)
def test_json_lines_have_the_numbers_or_why_there_are_none(
    tmp_path: Path, dtype: str
) -> None:
    path = tmp_path / "v.jsonl"
    written(path, dtype=dtype)
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    for n, line in enumerate(lines):
        assert line["id"] == f"d{n}"
        if n == 2:
            assert line["embedding"] is None and line["error"]["message"] == "no"
            continue
        ours = es.DTYPES[dtype](vector(str(n)))
        assert np.array_equal(np.array(line["embedding"], ours.dtype), ours)


@pytest.mark.parametrize("name", ["v.sqlite", "v.db"])
def test_sqlite_has_ids_and_blobs_of_little_endian_numbers(
    tmp_path: Path, name: str
) -> None:
    written(tmp_path / name)
    with sqlite3.connect(tmp_path / name) as database:
        found = database.execute("SELECT * FROM embeddings").fetchall()
        told = dict(database.execute("SELECT * FROM embedder"))
    database.close()
    assert told == {"sha256": "0" * 64, "dimensions": str(LENGTH)}
    assert found == [
        (n, f"d{n}", None if n == 2 else vector(str(n)).astype("<f4").tobytes())
        for n in range(5)
    ]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_disk_that_sqlite_fills_is_told_as_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sqlite3.connect

    def small(path: str) -> sqlite3.Connection:
        database = real(path)
        database.execute("PRAGMA max_page_count = 3")
        return database

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(OSError, match="database or disk is full") as told:
        written(tmp_path / "v.db", 500)
    assert told.value.errno == errno.ENOSPC
    monkeypatch.undo()
    written(tmp_path / "v.db", 500)


@pytest.mark.clients
def test_sqlite_vec_finds_the_nearest_of_the_blobs(tmp_path: Path) -> None:
    extension = pytest.importorskip("sqlite_vec")
    written(tmp_path / "v.db", 200)
    database = sqlite3.connect(tmp_path / "v.db")
    if not hasattr(database, "enable_load_extension"):
        pytest.skip("this Python was built without SQLite's extensions")
    database.enable_load_extension(True)
    extension.load(database)
    nearest = database.execute(
        "SELECT id FROM embeddings WHERE embedding IS NOT NULL "
        "ORDER BY vec_distance_cosine(embedding, ?) LIMIT 1",
        [vector("77").tobytes()],
    ).fetchone()
    database.close()
    assert nearest == ("d77",)


@pytest.mark.clients
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "ubinary"])
def test_parquet_has_ids_vectors_and_what_made_them(tmp_path: Path, dtype: str) -> None:
    arrow = pytest.importorskip("pyarrow.parquet")
    written(tmp_path / "v.parquet", 9000, dtype)
    table = arrow.read_table(tmp_path / "v.parquet")
    assert json.loads(table.schema.metadata[b"embellama"]) == IDENTITY
    assert table["id"].to_pylist() == [f"d{n}" for n in range(9000)]
    found = table["embedding"].to_pylist()
    assert [n for n, numbers in enumerate(found) if numbers is None] == [2]
    ours = es.DTYPES[dtype](vector("8999"))
    assert np.array_equal(np.array(found[8999], ours.dtype), ours)


LONG = [2**63 - 1, 2**63, 2**64 - 1, -(2**63), "a"]


@pytest.mark.parametrize("ids", [LONG, LONG[:4], [LONG[0], LONG[3]]])
@pytest.mark.parametrize(
    "name", ["v.db", pytest.param("v.parquet", marks=pytest.mark.clients)]
)
def test_an_id_of_64_bits_is_there_to_the_last_digit(
    tmp_path: Path, name: str, ids: list[Any]
) -> None:
    if name == "v.parquet":
        arrow = pytest.importorskip("pyarrow.parquet")
    kind = es.VectorKind("float32", LENGTH, IDENTITY)
    path = tmp_path / name
    file = es.VECTOR_FILES[es.output_kind(str(path))](str(path), kind, {})
    file.write([(row(n, row_id), vector(str(n))) for n, row_id in enumerate(ids)])
    (part,), _ = file.finish()
    file.close()
    if name == "v.parquet":
        found = arrow.read_table(part)["id"].to_pylist()
    else:
        with sqlite3.connect(part) as database:
            found = [one for (one,) in database.execute("SELECT id FROM embeddings")]
        database.close()
    assert [*map(str, found)] == [*map(str, ids)]
    assert (ids == found) == (len(ids) == 2), "as numbers, where they fit"


@pytest.mark.parametrize("name", ["v", "v.txt", "v.npz"])
def test_a_name_that_says_no_format_is_refused(name: str) -> None:
    with pytest.raises(es.BulkError, match="must end in one of .npy") as error:
        es.output_kind(name)
    assert error.value.code == 2


def test_parquet_without_pyarrow_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(es.BulkError, match="needs pyarrow"):
        es.output_kind("v.parquet")
