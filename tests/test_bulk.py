"""Room BULK: a corpus to vectors, as a job that can be killed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embellama_server as es
from tests.bulk import Desk, FakeEmbedder, array, jsonl, vector

TEXTS = [f"text {n % 7 if n % 3 else n}" for n in range(40)]  # some are there twice


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setattr(es, "WINDOW_ROWS", 8)
    monkeypatch.setattr(es, "SYNC_S", 0.0)
    return Desk(tmp_path)


def test_rows_become_vectors_in_their_order_with_their_ids(desk: Desk) -> None:
    done = desk.run(desk.put("a.jsonl", jsonl(TEXTS)), output="v.npy")
    assert (done.rows, done.rejected) == (40, 0)
    assert np.array_equal(np.load(desk.root / "v.npy"), array(TEXTS))
    assert [line["id"] for line in desk.lines("v.npy.ids.jsonl")] == [
        f"d{n}" for n in range(40)
    ]
    assert desk.names == {"a.jsonl", "v.npy", "v.npy.ids.jsonl"}, "nothing is left"


def test_texts_that_are_there_twice_in_a_window_are_computed_once(desk: Desk) -> None:
    done = desk.run(desk.put("a.txt", "a\nb\na\na\n"), output="v.jsonl")
    assert desk.embedder.texts == ["a", "b"]
    assert done.duplicates == 2
    found = [line["embedding"] for line in desk.lines("v.jsonl")]
    assert np.array_equal(np.array(found, "f4"), array("abaa"))


# --- killed, and again ---


class Killed(BaseException):
    """Nothing catches it; what runs in its way is undone by power_cut()."""


class Dying(FakeEmbedder):
    """Dies after some windows."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.left = windows

    def replies(self, windows: Any) -> Any:
        for replies in super().replies(windows):
            if not self.left:
                raise Killed
            self.left -= 1
            yield replies
        raise Killed


OUTPUTS = ("v.npy", "v.jsonl", "v.sqlite")


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("windows", range(6))
def test_what_was_killed_goes_on_and_gives_the_same_bytes(
    desk: Desk, output: str, windows: int
) -> None:
    texts = [*TEXTS[:20], "a nan", *TEXTS[20:]]
    file = desk.put("a.jsonl", jsonl(texts))
    desk.run(file, output=f"whole-{output}", on_error="null")
    desk.embedder = Dying(windows)
    with pytest.raises(Killed):
        desk.run(file, output=output, on_error="null")
    desk.embedder = FakeEmbedder()
    done = desk.run(file, output=output, on_error="null")
    assert done.first_row == 8 * windows, "nothing is computed twice"
    assert (done.rows, done.rejected) == (41, 1)
    whole = {name for name in desk.names if name.startswith("whole-")}
    assert {f"whole-{name}" for name in desk.names if name.startswith("v.")} == whole
    for name in whole:
        assert desk.read(name) == desk.read(name.removeprefix("whole-")), name


def test_it_goes_on_from_what_was_noted_whatever_was_written_since(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after kill -9: the files are longer than the state says; as after a power cut:
    # what was not synced is lost, or is there as zeros.
    file = desk.put("a.jsonl", jsonl(TEXTS))
    desk.run(file, output="whole.jsonl")
    desk.embedder = Dying(3)
    with pytest.raises(Killed):
        desk.run(file, output="v.jsonl")
    noted = json.loads(desk.read("v.jsonl.state"))["sizes"][""]
    written = desk.read("v.jsonl.part")
    for after in (written + b'{"id": "half', written + bytes(500), written[:noted]):
        (desk.root / "v.jsonl.part").write_bytes(after)
        desk.embedder = Dying(0)
        with pytest.raises(Killed):
            desk.run(file, output="v.jsonl")
    desk.embedder = FakeEmbedder()
    desk.run(file, output="v.jsonl")
    assert desk.read("v.jsonl") == desk.read("whole.jsonl")


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_end_may_be_killed_anywhere(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    file = desk.put("a.jsonl", jsonl([*TEXTS, "a nan"]))
    desk.run(file, output=f"whole-{output}", on_error="skip")
    steps, real = [0], os.replace

    def die(step: int) -> None:
        def replace(source: Any, target: Any) -> None:
            steps[0] += 1
            if steps[0] == step:
                raise Killed
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)

    for step in range(1, 20):
        steps[0] = 0
        die(step)
        try:
            desk.run(file, output=output, on_error="skip", restarts=step == 1)
        except Killed:
            continue
        break
    assert step > 2
    for name in desk.names:
        if name.startswith("whole-"):
            assert desk.read(name) == desk.read(name.removeprefix("whole-")), name
    assert not [
        name for name in desk.names if name.endswith((".part", ".state", ".new"))
    ]


def interrupted(desk: Desk, file: str, output: str = "v.npy", **options: Any) -> None:
    """A job that ended after two windows."""
    alive, desk.embedder = desk.embedder, Dying(2)
    with pytest.raises(Killed):
        desk.run(file, output=output, **options)
    desk.embedder = alive


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dtype": "int8"}, "output_dtype"),
        ({"field": "id"}, "field"),
        ({"id_field": "text"}, "id_field"),
    ],
)
def test_other_options_are_refused_by_name(
    desk: Desk, change: dict[str, str], named: str
) -> None:
    file = desk.put("a.jsonl", jsonl(TEXTS))
    interrupted(desk, file)
    with pytest.raises(es.BulkError, match=f"another {named}: ") as refused:
        desk.run(file, output="v.npy", **change)
    assert refused.value.code == 2
    desk.run(file, output="v.npy", restarts=True, **change)


def test_another_model_is_refused_and_named(desk: Desk) -> None:
    file = desk.put("a.jsonl", jsonl(TEXTS))
    interrupted(desk, file)
    desk.embedder = FakeEmbedder(prompt="query: ")
    with pytest.raises(es.BulkError, match="another prompt: None, now 'query: '"):
        desk.run(file, output="v.npy")


@pytest.mark.parametrize("before", [{}, {"model": "m"}, {"model": "m@1"}], ids=str)
def test_a_run_that_noted_no_version_goes_on(
    desk: Desk, before: dict[str, str]
) -> None:  # as one of --url did once
    file = desk.put("a.jsonl", jsonl(TEXTS))
    interrupted(desk, file)
    place = desk.root / "v.npy.state"
    state = json.loads(place.read_text())
    state["bound"] |= before
    place.write_text(json.dumps(state))
    desk.embedder = FakeEmbedder(model="other@1")
    if before:
        with pytest.raises(es.BulkError, match="another model: "):
            desk.run(file, output="v.npy")
    desk.embedder = FakeEmbedder(model="m@1")
    desk.run(file, output="v.npy")
    assert np.array_equal(np.load(desk.root / "v.npy"), array(TEXTS))


def test_other_files_are_refused(desk: Desk) -> None:
    file = desk.put("a.jsonl", jsonl(TEXTS))
    interrupted(desk, file)
    with pytest.raises(es.BulkError, match="another inputs: "):
        desk.run(file, desk.put("b.jsonl", jsonl(TEXTS)), output="v.npy")


def test_changed_input_is_refused_unless_only_what_is_to_come_changed(
    desk: Desk,
) -> None:
    text = jsonl(TEXTS)
    file = desk.put("a.jsonl", text)
    interrupted(desk, file)
    for other in (text.replace("d3", "e3"), text[:100], ""):
        desk.put("a.jsonl", other)
        with pytest.raises(es.BulkError, match="--restart begins anew") as refused:
            desk.run(file, output="v.npy")
        assert refused.value.code == 2
    desk.put("a.jsonl", text.replace("d39", "e39"))
    desk.run(file, output="v.npy")
    assert desk.lines("v.npy.ids.jsonl")[39]["id"] == "e39"


def test_a_line_that_grew_after_it_was_read_is_refused(desk: Desk) -> None:
    text = "\n".join(TEXTS[:16])
    file = desk.put("a.txt", text)
    interrupted(desk, file)
    desk.put("a.txt", text + " and more")
    with pytest.raises(es.BulkError, match="goes on where its line 16 ended"):
        desk.run(file, output="v.npy")


def test_a_finished_output_is_replaced_only_if_asked(desk: Desk) -> None:
    file = desk.put("a.txt", "a\n")
    desk.run(file, output="v.npy")
    with pytest.raises(es.BulkError, match="is there already: --restart") as refused:
        desk.run(file, output="v.npy")
    assert refused.value.code == 2
    desk.put("a.txt", "b\n")
    desk.run(file, output="v.npy", restarts=True)
    assert np.array_equal(np.load(desk.root / "v.npy"), array("b"))


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("a.jsonl", "a.jsonl"),
        ("v.npy", "v.npy.ids.jsonl"),
        ("v.npy", "v.npy.rejects.jsonl"),
        ("v.jsonl", "v.jsonl.errors.jsonl"),
        ("v.npy", "v.npy.state"),
        ("v.npy", "v.npy.ids.jsonl.part"),
        ("v.npy", "link/v.npy.part"),
        ("v.sqlite", "v.sqlite.new"),
        ("v.npy", "v.npy.state.new"),
    ],
)
def test_an_input_is_not_replaced(desk: Desk, output: str, name: str) -> None:
    (desk.root / "link").symlink_to(desk.root)
    file = desk.put(name, jsonl(TEXTS))
    with pytest.raises(es.BulkError, match="is one of the inputs") as refused:
        desk.run(file, output=output, format="jsonl", restarts=True)
    assert refused.value.code == 2
    assert desk.read(name).decode() == jsonl(TEXTS)


def test_what_another_job_wrote_may_be_read(desk: Desk) -> None:
    file = desk.put("v.npy.ids.jsonl", jsonl(TEXTS))
    assert desk.run(file, output="w.npy").rows == len(TEXTS)


@pytest.mark.parametrize("suffix", ["", ".ids.jsonl", ".rejects.jsonl", ".state"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_told_of_before_anything_is_computed(
    desk: Desk, suffix: str, make: Any
) -> None:
    make(desk.root / f"v.npy{suffix}")
    with pytest.raises(es.BulkError, match=f"npy{suffix} is there, and is no") as told:
        desk.run(desk.put("a.txt", "a\n"), output="v.npy", restarts=True)
    assert told.value.code == 2
    assert desk.embedder.texts == []


@pytest.mark.parametrize("name", [b"\xff.txt", b"a\n'.txt"])
@pytest.mark.parametrize("output", [b"\xfe.npy", b"v\n.npy"])
def test_names_that_are_no_text_go_on_and_end_as_others_do(
    desk: Desk, name: bytes, output: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, to = desk.put(os.fsdecode(name), "\n".join(TEXTS)), os.fsdecode(output)
    interrupted(desk, file, to)
    real = os.replace

    def die(source: Any, target: Any) -> None:
        if os.fspath(target).endswith(to):
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(Killed):
        desk.run(file, output=to)
    monkeypatch.undo()
    assert desk.run(file, output=to).first_row == len(TEXTS)
    assert np.array_equal(np.load(desk.root / to), array(TEXTS))


def test_two_jobs_do_not_write_one_output(desk: Desk) -> None:
    file = desk.put("a.txt", "a\nb\n")
    outer = desk.bulk(file, output="v.npy")

    class Twice(FakeEmbedder):
        def row(self, text: str) -> Any:
            with pytest.raises(es.BulkError, match="another embed is writing"):
                Desk(desk.root).run(file, output="v.npy")
            return super().row(text)

    outer._embedder = Twice()
    outer.run()


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_a_lock_that_its_holder_removed_meanwhile_is_none(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, *, is_made_anew: bool
) -> None:
    lock, flock = desk.root / "v.npy.lock", fcntl.flock

    def late(file: int, how: int) -> None:
        lock.unlink()
        if is_made_anew:
            lock.touch()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(es.BulkError, match="another embed is writing"):
        desk.run(desk.put("a.txt", "a\n"), output="v.npy")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"version": 1}', '{"version": 2}', "[" * 10_000]
)
def test_a_state_that_is_none_is_refused(desk: Desk, text: str) -> None:
    desk.put("v.npy.state", text)
    with pytest.raises(es.BulkError, match="was not written by"):
        desk.run(desk.put("a.txt", "a\n"), output="v.npy")


OTHERS: list[Any] = [None, "x", -1, 1.5, True, [], {}, {"": None}]


def test_a_damaged_state_is_refused_whatever_is_wrong_with_it(desk: Desk) -> None:
    file = desk.put("a.jsonl", jsonl(TEXTS))
    interrupted(desk, file)
    sound = json.loads(desk.read("v.npy.state"))
    written = {name: desk.read(name) for name in desk.names}
    cases = [(n, other) for n in sound if n != "version" for other in OTHERS]
    cases += [
        ("place", {**sound["place"], n: o}) for n in sound["place"] for o in OTHERS
    ]
    cases += [("sizes", {**sound["sizes"], "": other}) for other in OTHERS]
    for name, other in cases:
        for name_of, data in written.items():
            desk.put(name_of, data)
        desk.put("v.npy.state", json.dumps({**sound, name: other}))
        with pytest.raises(es.BulkError, match="--restart begins anew"):
            desk.run(file, output="v.npy")
        assert desk.read("v.npy.part") == written["v.npy.part"], (name, other)


def test_a_disk_that_knows_no_locks_is_a_sentence(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(es.BulkError, match="cannot write .*No locks") as told:
        desk.run(desk.put("a.txt", "a\n"), output="v.npy")
    assert told.value.code == 3


# --- rows without a vector ---

BAD = [*TEXTS[:9], "a nan", *TEXTS[9:12]]


def test_stop_says_where_and_goes_on_when_it_is_mended(desk: Desk) -> None:
    file = desk.put("a.jsonl", jsonl(BAD))
    with pytest.raises(
        es.BulkError, match=r"line 10 \(byte 279\): .*finite"
    ) as stopped:
        desk.run(file, output="v.npy")
    assert stopped.value.code == 1
    mended = [text.replace("nan", "fan") for text in BAD]
    desk.put("a.jsonl", jsonl(mended))
    done = desk.run(file, output="v.npy")
    assert (done.first_row, done.rows, done.rejected) == (8, 13, 0)
    assert np.array_equal(np.load(desk.root / "v.npy"), array(mended))


def test_stop_may_become_skip(desk: Desk) -> None:
    file = desk.put("a.jsonl", jsonl(BAD))
    with pytest.raises(es.BulkError):
        desk.run(file, output="v.npy")
    assert desk.run(file, output="v.npy", on_error="skip").first_row == 8
    assert len(np.load(desk.root / "v.npy")) == 12


def test_skip_leaves_a_row_out_and_null_leaves_it_empty(desk: Desk) -> None:
    file = desk.put("a.jsonl", jsonl(BAD))
    assert desk.run(file, output="s.npy", on_error="skip").rejected == 1
    good = [text for text in BAD if "nan" not in text]
    assert np.array_equal(np.load(desk.root / "s.npy"), array(good))
    assert "d9" not in [line["id"] for line in desk.lines("s.npy.ids.jsonl")]
    desk.run(file, output="n.npy", on_error="null")
    found = np.load(desk.root / "n.npy")
    assert np.isnan(found[9]).all()
    assert np.array_equal(np.delete(found, 9, 0), array(good))
    assert desk.lines("n.npy.ids.jsonl")[9]["error"]["code"] == "nonfinite_embedding"
    for name in ("s.npy", "n.npy"):
        (told,) = desk.lines(f"{name}.rejects.jsonl")
        assert told == {
            "file": file,
            "line": 10,
            "byte": len(jsonl(BAD[:9])),
            "id": "d9",
            "reason": "its text got no finite vector",
        }


def test_a_truncated_last_line_is_a_bad_row(desk: Desk) -> None:
    file = desk.put("a.jsonl", jsonl(TEXTS)[:-9])
    done = desk.run(file, output="v.npy", on_error="skip")
    assert (done.rows, done.rejected) == (40, 1)
    (told,) = desk.lines("v.npy.rejects.jsonl")
    assert told["line"] == 40 and told["reason"].startswith("not JSON")


def test_a_last_line_without_its_end_is_a_row(desk: Desk) -> None:
    assert desk.run(desk.put("a.txt", "a\nb"), output="v.npy").rows == 2


def test_files_that_end_too_early_are_told_after_what_could_be_read(desk: Desk) -> None:
    import gzip

    whole = gzip.compress("".join(f"{hash(str(n))}\n" for n in range(600)).encode())
    file = desk.put("a.txt.gz", whole[: len(whole) // 2])
    with pytest.raises(es.BulkError, match="cannot read .*a.txt.gz") as told:
        desk.run(file, output="v.jsonl")
    assert told.value.code == 3
    done = json.loads(desk.read("v.jsonl.state"))["place"]["rows"]
    assert done > 50
    desk.put("a.txt.gz", whole)
    desk.run(file, output="v.jsonl")
    assert len(desk.lines("v.jsonl")) == 600


# --- what cannot be written ---


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_full_disk_is_a_sentence_and_with_room_it_goes_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    file = desk.put("a.jsonl", jsonl(TEXTS))
    desk.run(file, output=f"whole-{output}")
    real, room = os.pwrite, [0]

    def pwrite(descriptor: int, data: Any, at: int) -> int:
        taken = min(room[0], len(data))
        if len(data) and not taken:
            raise OSError(28, "No space left on device")
        room[0] -= taken
        count: int = real(descriptor, data[:taken], at)
        return count

    monkeypatch.setattr(os, "pwrite", pwrite)
    for _ in range(100):
        room[0] = 2000
        try:
            desk.run(file, output=output)
        except es.BulkError as error:
            assert error.code == 3
            assert "No space left on device; with room made" in str(error)
            continue
        break
    assert desk.read(output) == desk.read(f"whole-{output}")


def test_a_full_device_is_exit_3(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "v.jsonl.part").symlink_to("/dev/full")
    with pytest.raises(es.BulkError, match="cannot write") as told:
        desk.run(desk.put("a.txt", "a\n"), output="v.jsonl")
    assert told.value.code == 3


def test_a_folder_that_is_not_there_is_exit_3(desk: Desk) -> None:
    with pytest.raises(es.BulkError, match="cannot write .*none") as told:
        desk.run(desk.put("a.txt", "a\n"), output="none/v.jsonl")
    assert told.value.code == 3


# --- OpenAI's batch files ---


def request(n: int, texts: str | Sequence[Any], **body: Any) -> str:
    """A line of one."""
    return json.dumps(
        {
            "custom_id": f"r{n}",
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": "text-embedding-3-small", "input": texts, **body},
        }
    )


def test_a_batch_file_s_requests_are_answered_as_openai_does(desk: Desk) -> None:
    lines = [
        request(0, "a"),
        request(1, ["b", "c"], dimensions=4),
        request(2, "d", encoding_format="base64"),
        request(3, "a nan"),
        request(4, "e", dimensions=9),
        request(5, [[1, 2]]),
    ]
    file = desk.put("a.jsonl", "\n".join(lines))
    done = desk.run(file, output="out.jsonl", on_error="skip")
    assert (done.rows, done.rejected) == (6, 3)
    out = desk.lines("out.jsonl")
    assert [line["custom_id"] for line in out] == ["r0", "r1", "r2"]
    assert {line["response"]["status_code"] for line in out} == {200}
    one, two, three = [line["response"]["body"] for line in out]
    assert np.array_equal(np.array(one["data"][0]["embedding"], "f4"), array("a")[0])
    assert one["model"] == "text-embedding-3-small"
    assert two["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    short = [np.array(row["embedding"], "f4") for row in two["data"]]
    assert [row["index"] for row in two["data"]] == [0, 1]
    for row, text in zip(short, "bc", strict=True):
        assert np.array_equal(row, es.normalised(array(text)[0][:4]))
    assert three["data"][0]["embedding"] == es.base64_text(array("d")[0])
    failed = desk.lines("out.jsonl.errors.jsonl")
    assert [line["custom_id"] for line in failed] == ["r3", "r4", "r5"]
    assert [line["response"]["status_code"] for line in failed] == [500, 400, 400]


@pytest.mark.parametrize(
    "line",
    [
        request(1, "a", prompt_name="query"),
        request(1, ""),
        request(1, "a", dimensions="x"),
        request(1, "a", normalize=False),
        request(1, "a", allow_partial=True),
        request(1, "a", truncation_direction="left"),
        request(1, "a").replace('"POST"', '"GET"'),
        request(1, "a").replace('"r1"', "1"),
        request(1, "a").replace('"r1"', "null"),
        json.dumps({"custom_id": "1", "url": "/v1/chat/completions", "body": {}}),
        json.dumps({"custom_id": "1", "url": ["/v1/embeddings"], "body": {}}),
        json.dumps({"custom_id": "1", "url": "/v1/embeddings"}),
        json.dumps({"text": "a"}),
        "x",
    ],
)
def test_a_request_that_cannot_be_answered_is_an_error_of_its_own(
    desk: Desk, line: str
) -> None:
    good = [request(0, "a"), request(2, "b")]
    for place in range(3):
        lines = [*good[:place], line, *good[place:]]
        file = desk.put("a.jsonl", "\n".join(lines))
        done = desk.run(file, output="out.jsonl", on_error="skip", restarts=True)
        assert (done.rows, done.rejected) == (3, 1)
        assert [line["custom_id"] for line in desk.lines("out.jsonl")] == ["r0", "r2"]
        (failed,) = desk.lines("out.jsonl.errors.jsonl")
        # Where a line has none, its number is not one.
        assert failed["custom_id"] in (None, "r1", "1")
        assert failed["id"] == f"batch_req_{place:012d}"


def test_replies_to_a_batch_file_are_json_lines(desk: Desk) -> None:
    with pytest.raises(es.BulkError, match="must end in .jsonl"):
        desk.run(desk.put("a.jsonl", request(0, "a")), output="v.npy")


@pytest.mark.parametrize("windows", [0, 1, 2])
def test_a_batch_file_goes_on_where_it_was_killed(desk: Desk, windows: int) -> None:
    lines = [request(n, ["a", text]) for n, text in enumerate(BAD * 2)]
    file = desk.put("a.jsonl", "\n".join(lines))
    desk.run(file, output="whole.jsonl", on_error="skip")
    alive, desk.embedder = desk.embedder, Dying(windows)
    with pytest.raises(Killed):
        desk.run(file, output="v.jsonl", on_error="skip")
    desk.embedder = alive
    done = desk.run(file, output="v.jsonl", on_error="skip")
    assert done.first_row == windows * 8
    for name in (".jsonl", ".jsonl.errors.jsonl", ".jsonl.rejects.jsonl"):
        assert desk.read(f"v{name}") == desk.read(f"whole{name}")


def test_flat_is_the_memory_that_windows_take(desk: Desk) -> None:
    desk.run(desk.put("a.txt", "x\n" * 200), output="v.jsonl")
    assert desk.shown == [*range(8, 201, 8)], "it is shown and written as it goes"


@pytest.mark.heavy
def test_memory_is_the_same_at_ten_thousand_rows_and_at_a_million(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lean(FakeEmbedder):
        def replies(self, windows: Any) -> Any:
            one = vector("a")
            for (texts,) in windows:
                yield [es.EmbedReply([one] * len(texts), 0)]

    file = tmp_path / "a.jsonl"
    with file.open("w") as lines:
        for n in range(1_000_000):
            lines.write(f'{{"id": {n}, "text": "text number {n} of a corpus"}}\n')
    sizes: dict[int, int] = {}

    def note(progress: es.Progress) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes[progress.rows] = pages * os.sysconf("SC_PAGE_SIZE")

    to = es.BulkOptions([str(file)], str(tmp_path / "v.npy"), es.CorpusOptions())
    assert es.Bulk(to, Lean(), note).run().rows == 1_000_000
    begun = sizes[10 * es.WINDOW_ROWS]
    assert max(sizes.values()) - begun < 4 << 20
    assert np.load(tmp_path / "v.npy", mmap_mode="r").shape == (1_000_000, 8)
