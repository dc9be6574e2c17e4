"""Rooms ROWS and CORPUS: texts in files, row by row, with where each begins."""

from __future__ import annotations

import csv
import decimal
import gzip
import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import embellama_server as es

TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1
).filter(str.strip)
LINE = TEXT.filter(lambda text: "\n" not in text and text == text.rstrip("\r"))


def rows(
    *paths: Path | str, start: es.RowPlace | None = None, **options: str
) -> list[es.Row]:
    """All rows of files."""
    corpus = es.Corpus([*map(str, paths)], es.CorpusOptions(**options))
    found = corpus.windows(start or es.RowPlace())
    return [row for window, _ in found for row in window]


def texts(found: Sequence[es.Row]) -> list[str]:
    """Of rows that have one each."""
    assert [row.error for row in found] == [""] * len(found)
    return [row.texts[0] for row in found]


def as_csv(lines: Sequence[str], delimiter: str) -> bytes:
    """A file as the standard library writes it."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows([f"d{n}", text] for n, text in enumerate(lines))
    return out.getvalue().encode()


def as_jsonl(lines: Sequence[str]) -> bytes:
    """Objects, with an id."""
    return b"".join(
        json.dumps({"id": f"d{n}", "text": text}).encode() + b"\n"
        for n, text in enumerate(lines)
    )


WRITERS: dict[str, Callable[[Sequence[str]], bytes]] = {
    "a.txt": lambda lines: "".join(f"{text}\n" for text in lines).encode(),
    "a.jsonl": as_jsonl,
    "a.ndjson": lambda lines: "\n".join(map(json.dumps, lines)).encode(),
    "a.csv": lambda lines: as_csv(lines, ","),
    "a.tsv": lambda lines: as_csv(lines, "\t"),
}


@pytest.mark.parametrize("name", [*WRITERS, *(f"{name}.gz" for name in WRITERS)])
def test_texts_come_back_in_order_from_any_format(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    path = tmp_path_factory.mktemp("corpus") / name
    alphabet = LINE if ".txt" in name else TEXT

    @given(st.lists(alphabet, max_size=9))
    def check(lines: list[str]) -> None:
        data = WRITERS[name.removesuffix(".gz")](lines)
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        assert texts(rows(path)) == lines

    check()


@pytest.mark.parametrize("name", WRITERS)
def test_a_reader_goes_on_at_any_row(tmp_path: Path, name: str) -> None:
    lines = ['a "quoted"', "b, c", "d\té", "e"] * 3
    if name.endswith(("csv", "tsv")):
        lines[1] = "two\nlines"
    first, second = tmp_path / name, tmp_path / f"b-{name}"
    for path in (first, second):
        path.write_bytes(WRITERS[name](lines))
    whole = rows(first, second)
    assert [row.number for row in whole] == [*range(24)]
    corpus = es.Corpus([str(first), str(second)], es.CorpusOptions())
    places = [place for _, place in corpus._rows(es.RowPlace())]
    for count, place in enumerate(places, 1):
        assert rows(first, second, start=place) == whole[count:]
        with pytest.raises(es.BulkError, match="is not what was read before"):
            rows(first, second, start=replace(place, sha256="0"))


def test_where_a_window_ends_depends_on_where_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "WINDOW_ROWS", 5)
    monkeypatch.setattr(es, "WINDOW_CHARS", 30)
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{'x' * (n * 7 % 20 + 1)}\n" for n in range(50)))
    corpus = es.Corpus([str(path)], es.CorpusOptions())
    windows = [*corpus.windows(es.RowPlace())]
    assert all(len(window) <= 5 for window, _ in windows)
    assert all(
        sum(len(row.texts[0]) for row in window[:-1]) < 30 for window, _ in windows
    )
    for index, (_, place) in enumerate(windows):
        assert [*corpus.windows(place)] == windows[index + 1 :]


def test_ids_are_the_file_s_or_numbers_over_all_files(tmp_path: Path) -> None:
    one, other = tmp_path / "a.jsonl", tmp_path / "b.txt"
    one.write_text(
        '{"key": "k", "body": "a"}\n\n{"body": "b", "key": 7}\n{"body": "c"}'
    )
    other.write_text("d\ne\n")
    found = rows(one, other, field="body", id_field="key")
    assert [row.id for row in found] == ["k", 7, 2, 3, 4]
    assert [(row.path, row.line, row.byte) for row in found] == [
        (str(one), 1, 0),
        (str(one), 3, 27),
        (str(one), 4, 51),
        (str(other), 1, 0),
        (str(other), 2, 2),
    ]


BAD = {
    ("a.jsonl", b"{"): "not JSON",
    ("a.jsonl", b'{"text": "a"} x'): "not JSON",
    ("a.jsonl", b'{"text": "\xff"}'): "not JSON",
    ("a.jsonl", b'{"title": "a"}'): "no field text (--field); its fields: title",
    ("a.jsonl", b'{"text": 7}'): "its text is not a string",
    ("a.jsonl", b'{"text": null}'): "its text is not a string",
    ("a.jsonl", b'{"text": " "}'): "its text is empty",
    ("a.jsonl", b'{"text": {"a": "b"}}'): "its text is not a string",
    (
        "a.jsonl",
        b'{"text": {"custom_id": "a", "url": "b"}}',
    ): "its text is not a string",
    ("a.jsonl", b'{"text": "a", "id": []}'): "neither a string nor a number",
    ("a.jsonl", b'{"text": "a", "id": true}'): "neither a string nor a number",
    ("a.jsonl", b'{"text": "a", "id": 36893488147419103232}'): "more than 64 bits",
    ("a.jsonl", b"[" * 100_000): "not JSON",
    ("a.jsonl", '{"text": "a"}'.encode("utf-16")): "not JSON",
    ("a.jsonl", b"7"): "neither an object nor a string",
    ("a.txt", b"a\xff"): "byte 1 of the line is not UTF-8",
    ("a.txt", b""): "its text is empty",
    ("a.csv", b"1"): "1 columns, and the header 2",
    ("a.csv", b"1,2,3"): "3 columns, and the header 2",
    ("a.csv", b"1,\xff"): "not UTF-8",
    ("a.csv", b"\xff,1"): "not UTF-8",
    ("a.csv", b'1,"a" b'): "not CSV",
}
BEFORE = {
    "a.jsonl": b'{"text": "before"}\n',
    "a.txt": b"before\n",
    "a.csv": b"id,text\n0,before\n",
}
AFTER = {"a.jsonl": b'{"text": "after"}', "a.txt": b"after", "a.csv": b"2,after"}


def name_of_case(value: str | bytes) -> str:
    """A short one."""
    return str(value[:40])


@pytest.mark.parametrize(("name", "line"), BAD, ids=name_of_case)
def test_a_bad_row_is_told_and_the_next_one_read(
    tmp_path: Path, name: str, line: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(BEFORE[name] + line + b"\n" + AFTER[name])
    before, bad, after = rows(path)
    assert (before.texts, after.texts) == (("before",), ("after",))
    assert BAD[name, line] in bad.error
    assert (bad.line, bad.byte) == (BEFORE[name].count(b"\n") + 1, len(BEFORE[name]))


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv"])
def test_a_line_too_long_is_a_bad_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(es, "_MAX_LINE_BYTES", 50)
    path, head = tmp_path / name, "" if name == "a.txt" else "text\n"
    path.write_text(f"{head}a\n{'x' * 49}\n{'y' * 500}\nb\n{'z' * 50}")
    found = rows(path)
    assert [bool(row.error) for row in found] == [False, False, True, False, True]
    begins = [0, 2, 52, 553, 555]
    assert [row.byte for row in found] == [len(head) + begin for begin in begins]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "text\r\na\r\n"),
        ("a.csv", '"text","id"\r\n"a","1"\r\n'),  # as pandas quotes all
        ("a.tsv", "text\tid\na\t1"),
        ("a.txt", "a"),
        ("a.jsonl", '{"text": "a"}'),
        ("a.jsonl", '\n"a"'),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_file(
    tmp_path: Path, name: str, text: str
) -> None:
    path = tmp_path / name
    path.write_bytes(f"\ufeff{text}".encode())
    (row,) = found = rows(path)
    assert texts(found) == ["a"]
    # It counts, as a later run goes on at a byte of the file.
    places = es.Corpus([str(path)], es.CorpusOptions())._rows(es.RowPlace())
    assert [place.offset for _, place in places] == [path.stat().st_size]
    assert row.byte in (0, *range(3, 99))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.jsonl"])
@pytest.mark.parametrize("text", ["", "\ufeff"])
def test_a_file_without_anything_has_no_rows(
    tmp_path: Path, name: str, text: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert rows(path) == []


def test_empty_lines_are_no_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\n\ntext\n\na\n")
    assert [(row.texts, row.line) for row in rows(path)] == [(("a",), 4)]


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b'"text"x,id', "has no header: ',' expected"),
        (b"text,id\rA,1\r", "has no header: new-line"),
        (b"text," + b"x" * 99, "has no header: a line of more than"),
        (b"id,text,text", "has 2 columns called text"),
        (b"id,text,id", "has 2 columns called id"),
        (b"t\xff,id", "has no column text"),
        ("text,id".encode("utf-16"), "has no column text"),
    ],
)
def test_a_header_that_does_not_tell_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: bytes, told: str
) -> None:
    monkeypatch.setattr(es, "_MAX_LINE_BYTES", 50)
    path = tmp_path / "a.csv"
    path.write_bytes(header + b"\na,1\n")
    with pytest.raises(es.BulkError, match=told) as error:
        rows(path)
    assert error.value.code == 2


def test_a_long_number_stays_the_row_s_id(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "id": 18446744073709551615}')
    assert [row.id for row in rows(path)] == [2**64 - 1]


def test_patterns_are_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.jsonl", "[d].txt"):
        (tmp_path / name).write_text("x")
    found = es.corpus_files([f"{tmp_path}/[ab].txt", f"{tmp_path}/[d].txt"])
    assert [Path(name).name for name in found] == ["a.txt", "b.txt", "[d].txt"]


@pytest.mark.parametrize(
    ("names", "code", "told"),
    [
        (["*.none"], 3, "no file is called"),
        (["-", "a.txt"], 2, "can only be the one input"),
        (["a.doc"], 2, "say --input-format"),
        (["none.txt"], 3, "cannot read none.txt"),
        (["a.csv"], 2, "has no column text"),
    ],
)
def test_what_cannot_be_read_is_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str],
    code: int,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.doc").write_text("")
    (tmp_path / "a.csv").write_text("title\na\n")
    with pytest.raises(es.BulkError, match=told) as error:
        rows(*es.corpus_files(names))
    assert error.value.code == code


def test_a_format_may_be_said(tmp_path: Path) -> None:
    path = tmp_path / "a.doc"
    path.write_text("a\n")
    assert texts(rows(path, format="txt")) == ["a"]


def test_parquet_without_pyarrow_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    with pytest.raises(es.BulkError, match="needs pyarrow: pip install") as error:
        rows(path)
    assert error.value.code == 2


@pytest.fixture
def pa() -> Any:
    """pyarrow, and its parquet."""
    pytest.importorskip("pyarrow.parquet")
    return pytest.importorskip("pyarrow")


@pytest.mark.clients
def test_parquet_is_read_from_any_row(pa: Any, tmp_path: Path) -> None:
    path, lines = tmp_path / "a.parquet", [f"text {n}" for n in range(3000)]
    table = pa.table({"id": [*range(3000)], "text": [*lines[:-1], None], "x": lines})
    pa.parquet.write_table(table, path)
    whole = rows(path)
    assert texts(whole[:-1]) == lines[:-1]
    assert [row.id for row in whole] == [*range(3000)]
    assert whole[-1].error == "its text is not a string"
    corpus, places, shares = es.Corpus([str(path)] * 2, es.CorpusOptions()), [], []
    for _, place in corpus._rows(es.RowPlace()):
        places.append(place)
        shares.append(corpus.bytes_read / corpus.total_bytes)
    assert rows(path, start=places[1499]) == whole[1500:]
    # Columns lie one after another, but the rows are what is done.
    assert np.allclose(shares, np.arange(1, 6001) / 6000, atol=1e-3)
    assert corpus.bytes_read == corpus.total_bytes
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(es.BulkError, match="cannot read"):
        rows(path)


@pytest.mark.clients
@pytest.mark.parametrize(
    ("kind", "is_text"),
    [
        *((kind, True) for kind in ("string", "large_string", "string_view")),
        *((kind, False) for kind in ("binary", "int64")),
    ],
)
def test_a_column_of_parquet_holds_texts_or_is_refused(
    pa: Any, tmp_path: Path, kind: str, is_text: bool
) -> None:
    path, given = tmp_path / "a.parquet", [1, 2] if kind == "int64" else ["a", "b"]
    pa.parquet.write_table(
        pa.table({"text": pa.array(given, getattr(pa, kind)())}), path
    )
    if is_text:
        assert texts(rows(path)) == given
        return
    with pytest.raises(es.BulkError, match=f"text holds {kind}, not texts") as error:
        rows(path)
    assert error.value.code == 2


@pytest.mark.clients
@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("date32[day]", 1, "1970-01-02"),
        ("date64[ms]", 86_400_000, "1970-01-02"),
        ("timestamp[s]", 1, "1970-01-01 00:00:01.000"),
        ("timestamp[ns]", 1, "1970-01-01 00:00:00.000000001"),
        ("time32[s]", 61, "00:01:01.000"),
        ("decimal128(5, 2)", decimal.Decimal("1.50"), "1.50"),
        ("int64", 7, 7),
        ("string", "seven", "seven"),
    ],
    ids=str,
)
def test_ids_of_parquet_that_json_has_no_numbers_for_are_text(
    pa: Any, tmp_path: Path, kind: str, given: object, expected: object
) -> None:
    kinds = {"decimal128(5, 2)": pa.decimal128(5, 2), "timestamp[s]": pa.timestamp("s")}
    kinds |= {"timestamp[ns]": pa.timestamp("ns"), "time32[s]": pa.time32("s")}
    ids = pa.array([given, None], kinds.get(kind) or pa.type_for_alias(kind))
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": ["a", "b"], "id": ids}), path)
    one, other = rows(path)
    assert (one.id, one.error, other.id, other.error) == (expected, "", 1, "")


@pytest.mark.clients
def test_odd_columns_of_parquet_are_told_of_or_read(pa: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"

    def read(table: object) -> list[es.Row]:
        pa.parquet.write_table(table, path)
        return rows(path)

    assert texts(read(pa.table({"text": pa.array(["a", "a"]).dictionary_encode()})))
    for nested in ([{"a": 1}], [["a"]]):
        with pytest.raises(es.BulkError, match="not texts"):
            read(pa.table({"text": nested}))
    columns = [pa.array(["a"]), pa.array(["b"])]
    with pytest.raises(es.BulkError, match="has 2 columns called text"):
        read(pa.Table.from_arrays(columns, ["text", "text"]))
    (bad_id,) = read(pa.table({"text": ["a"], "id": [[1]]}))
    assert bad_id.error == "its id is neither a string nor a number"
    (row,) = read(pa.table({"text": ["a"], "id": [float("nan")]}))
    assert (row.id, row.error) == (0, "")
    ends, data = (
        pa.array([0, 1, 2, 3], pa.int32()).buffers()[1],
        pa.py_buffer(b"a\xffc"),
    )
    broken = pa.Array.from_buffers(pa.string(), 3, [None, ends, data])
    one, bad, other = read(pa.table({"text": broken}))
    assert (one.texts, other.texts) == (("a",), ("c",))
    assert "can't decode byte 0xff" in bad.error


@pytest.mark.clients
def test_a_row_group_of_parquet_is_not_held_at_once(pa: Any, tmp_path: Path) -> None:
    path, given = tmp_path / "a.parquet", [os.urandom(500).hex() for _ in range(60_000)]
    how = {"row_group_size": len(given), "use_dictionary": False, "compression": "zstd"}
    pa.parquet.write_table(pa.table({"text": given}), path, **how)
    assert path.stat().st_size > 28 << 20

    def reads(file: io.BufferedReader) -> list[int]:
        taken, real = list[int](), file.read

        class Counted(io.BufferedIOBase):
            """The sizes of what is read at once."""

            seek, tell = file.seek, file.tell

            def read(self, size: int | None = -1, /) -> bytes:
                taken.append(len(found := real(size)))
                return found

            def readable(self) -> bool:
                return True

            seekable = readable

        lines = es.Lines(Counted(), str(path), hashlib.sha256())
        reader = es.READERS["parquet"](lines, es.CorpusOptions())
        while reader.next() is not None:
            pass
        return taken

    with path.open("rb") as file:
        assert max(reads(file)) <= 4 << 20
