"""The helpers themselves: a fake that lies would make every other test lie."""

from __future__ import annotations

import signal
import threading

import numpy as np
import pytest

import embellama_server as es
from tests import bench_chat, kit


def ids_of(engine: kit.FakeEngine, text: str) -> list[int]:
    """What the pool would hand to a context."""
    return es.with_special_tokens(engine.tokenizer.encode(text), engine.card)


def test_fake_vectors_are_normalised_and_differ_when_ids_differ() -> None:
    vectors = [kit.fake_vector([1, n, 2]) for n in range(10, 60)]
    for vector in vectors:
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    assert len({vector.tobytes() for vector in vectors}) == len(vectors)
    assert np.array_equal(kit.fake_vector([1, 10, 2]), vectors[0])


def test_a_fake_context_fails_as_often_as_told() -> None:
    engine = kit.FakeEngine()
    engine.failures[kit.fake_id(kit.NAN_WORD)] = 1
    engine.failures[kit.fake_id(kit.BOOM_WORD)] = 1
    context = engine.new_context()
    bad = [np.array(ids_of(engine, text), np.int32) for text in ("a", "nan")]
    first = context.embed(bad)
    assert np.isfinite(first[0]).all()
    assert np.isnan(first[1]).all()
    assert np.isfinite(context.embed(bad)).all()
    boom = [np.array(ids_of(engine, "boom"), np.int32)]
    with pytest.raises(es.EngineError):
        context.embed(boom)
    assert np.isfinite(context.embed(boom)).all()


def test_a_fake_context_notices_a_second_thread() -> None:
    context = kit.FakeEngine().new_context()
    seen: list[BaseException] = []

    def other() -> None:
        try:
            context.embed([np.array([1, 10, 2], np.int32)])
        except AssertionError as error:
            seen.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(seen) == 1


def test_replies_are_split_where_they_end() -> None:
    raw = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nab" * 2
    assert [r.body for r in kit.parse_replies(raw, ["GET", "GET"])] == [b"ab", b"ab"]
    with pytest.raises(AssertionError, match="after the last"):
        kit.parse_replies(raw, ["GET"])


def test_feeds_lose_nothing() -> None:
    data = b"abcd"
    for feed in kit.FEEDS.values():
        assert b"".join(feed(data)) == data
    splits = list(kit.feed_splits(data))
    assert len(splits) == 3
    assert all(b"".join(parts) == data for parts in splits)


def test_a_server_that_ends_badly_shows_its_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with kit.started("--no-supervise") as server:
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    said = capsys.readouterr().out
    assert "exit code -9:" in said
    assert " ready " in said


def test_the_bench_tells_what_it_measures_from_how_many_cells_there_are() -> None:
    given = bench_chat.parser().parse_args(["--same-text", "--cells", "512", "rates"])
    assert (given.cells, given.kv_cells) == (["rates"], 512)
    assert bench_chat.parser().parse_args([]).kv_cells == 256
