"""Room EMBEDDER: the engine without a server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import pickle
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import embellama_server as es
from tests import docs, kit, models

WINDOWS = [["the sea", "a new year"], [], ["no time", "the sea", "one two three four"]]


def expected(text: str) -> Any:
    """The fake engine's vector."""
    ids = [1, *map(kit.fake_id, text.split()), 2]
    return es.normalised(kit.fake_row(ids))


@contextlib.contextmanager
def made(engine: kit.FakeEngine | None = None, **wanted: Any) -> Iterator[es.Embedder]:
    """An embedder over a fake engine; ``wanted``: of its settings, or its own."""
    fake = engine or kit.FakeEngine()
    own = {n: wanted.pop(n) for n in ("prompt_name", "dimensions") if n in wanted}
    embedder = es.Embedder(
        kit.settings(**wanted), engine_factory=lambda *_: fake, **own
    )
    try:
        yield embedder
    finally:
        fake.release()
        embedder.close()


def queue_of(embedder: es.Embedder) -> es.BatchQueue:
    """What an embedder has under way."""
    assert embedder._loaded is not None
    return embedder._loaded.batches


# --- what comes out ---


def test_rows_of_each_window_come_in_its_order() -> None:
    with made() as embedder:
        found = [*embedder.embed(iter(WINDOWS))]
    assert [len(rows) for rows in found] == [2, 0, 3]
    for rows, texts in zip(found, WINDOWS, strict=True):
        for row, text in zip(rows, texts, strict=True):
            assert np.array_equal(row, expected(text)), text


def test_what_is_the_same_is_computed_once() -> None:
    with made(engine := kit.FakeEngine()) as embedder:
        assert len(next(embedder.embed([["a b"] * 50]))) == 50
    assert sum(map(len, engine.calls)) == 1


BAD = {
    "": (es.EmptyInput, "text[1] is an empty string"),
    None: (es.InvalidValue, "text[1] must be a string"),
    7: (es.InvalidValue, "text[1] must be a string"),
    kit.NAN_WORD: (es.NonFiniteVector, "text[1]"),
    kit.BOOM_WORD: (es.EngineFailed, "text[1]"),
    "a " * 40: (es.ContextLengthExceeded, "text[1] has 42 tokens"),
}


@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_a_text_without_a_vector_is_an_error_at_its_place(bad: Any) -> None:
    kind, said = BAD[bad]
    with made() as embedder:
        one, other = embedder.embed([["the sea", bad, "no time"], ["a b"]])
    assert type(one[1]) is kind
    assert str(one[1]).startswith(said)
    assert np.array_equal(one[0], expected("the sea"))
    assert np.array_equal(one[2], expected("no time"))
    assert np.array_equal(other[0], expected("a b"))


def test_an_unpaired_surrogate_is_read_as_in_json() -> None:
    with made() as embedder:
        one, other = next(embedder.embed([["a \ud800", "a \ufffd"]]))
    assert np.array_equal(one, other)


def of_the_server(settings: es.Settings, texts: Sequence[str], **asked: Any) -> Any:
    """What a request for the same gets: the server's own way, without HTTP."""

    async def ask() -> list[Any]:
        hooks = kit.hooks(deliver=asyncio.get_running_loop().call_soon_threadsafe)
        loader = es.Loader(settings.cache_dir, es.Engine, hooks)
        loaded, entry = loader.load(settings), es.ModelEntry(settings)
        request = es.EmbedRequest(inputs=texts, **asked)
        es.prepare(request, entry, loaded, settings)
        late, charge = (lambda: None), (lambda _: None)
        result = await es.compute(request, entry, loaded, "", charge=charge, late=late)
        loaded.free()
        return [*es.final_vectors(result, asked.get("dimensions"))]

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ({}, {}),
        ({"dimensions": 8}, {}),
        ({"prompt_name": "query"}, {"prompt": ("query=hello ",)}),
        ({}, {"auto_truncate": True, "max_input_tokens": 4}),
    ],
)
def test_vectors_are_the_server_s_bit_for_bit(
    asked: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    texts = ["a b", "hello world", "a b a b hello world", "b"]
    given |= {"model_path": str(models.tiny_bert(tmp_path)), "exact": True}
    settings = kit.settings(**given)
    theirs = of_the_server(settings, texts, **asked)
    with contextlib.closing(es.Embedder(settings, **asked)) as embedder:
        ours = next(embedder.embed([texts]))
    assert [v.tobytes() for v in ours] == [v.tobytes() for v in theirs]


# --- which texts share a call ---


SIZES = st.lists(st.integers(1, 40), max_size=60)


@hypothesis.given(SIZES, st.integers(8, 32), st.integers(1, 8))
def test_batches_are_full_and_have_each_item_once(
    sizes: list[int], max_tokens: int, max_inputs: int
) -> None:
    items = [es.Item(np.zeros(size, np.int32), b"") for size in sizes]
    batches = [*es.window_batches(items, max_tokens, max_inputs)]
    assert sorted(map(id, items)) == sorted(id(item) for b in batches for item in b)
    for number, batch in enumerate(batches):
        room = max_tokens - sum(item.tokens for item in batch)
        assert len(batch) == 1 or (room >= 0 and len(batch) <= max_inputs)
        later = [item.tokens for b in batches[number + 1 :] for item in b]
        assert len(batch) == max_inputs or not later or min(later) > room


def test_equal_windows_have_equal_bits_whatever_is_computed_beside_them() -> None:
    chance = random.Random(5)
    texts = ["a b c " * chance.randrange(1, 9) + str(n % 40) for n in range(60)]
    others = [[f"{n} {m}" for m in range(n)] for n in range(1, 9)]
    alone = dict[int, bytes]()
    for workers, before, after in ((1, 0, 0), (3, 0, 0), (2, 3, 8), (3, 8, 1)):
        windows = [*others[:before], texts, texts, *others[:after]]
        with made(kit.TouchyEngine(), workers=workers) as embedder:
            found = [*embedder.embed(windows)]
        for place in (before, before + 1):  # and what is known is computed again
            for n, row in enumerate(found[place]):
                assert alone.setdefault(n, row.tobytes()) == row.tobytes()


def test_long_texts_and_bad_ones_at_the_end_leave_nobody_waiting() -> None:
    windows: Any = [["a " * 20, "b", "c " * 20, ""], [""], ["", "b " * 20, None, ""]]
    for workers in (1, 2):
        with made(workers=workers, batch_tokens=8) as embedder:
            found = [*embedder.embed(windows)]
        assert [[isinstance(row, es.ApiError) for row in rows] for rows in found] == [
            [False, False, False, True],
            [True],
            [True, False, True, True],
        ]


def test_each_request_of_a_window_has_its_rows_and_its_tokens() -> None:
    window = [["the sea", ""], [], ["no time", "the sea", "one two three four"]]
    with made(engine := kit.FakeEngine()) as embedder:
        (replies,) = embedder.replies([window])
    assert [reply.tokens for reply in replies] == [4, 0, 4 + 4 + 6]
    for reply, texts in zip(replies, window, strict=True):
        for row, text in zip(reply.rows, texts, strict=True):
            assert np.array_equal(row, expected(text)) if text else row.code
    assert sum(map(len, engine.calls)) == 3, "what two of them ask is computed once"


def test_readme_s_example_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = (one for one in docs.commands("python") if "embedder.embed" in one)
    exec(example.replace("m.gguf", str(models.tiny_bert(tmp_path))), {})  # noqa: S102  ours
    assert capsys.readouterr().out.count("dtype=float32") == 3


# --- columns ---


def test_a_batch_gets_a_column_and_keeps_the_others() -> None:
    texts = np.array(["the sea", "no time"], object)
    with made() as embedder:
        found = embedder({"id": np.array([7, 8]), "text": texts})
        nothing = embedder({"text": np.array([], object)})["embedding"]
    assert found["id"].tolist() == [7, 8]
    assert found["text"] is texts
    assert found["embedding"].dtype == np.float32
    assert np.array_equal(
        found["embedding"], [expected("the sea"), expected("no time")]
    )
    assert nothing.shape == (0, 8)


def test_a_text_without_a_vector_fails_its_batch() -> None:
    with made() as embedder, pytest.raises(es.EmptyInput, match=r"^text\[1\]"):
        embedder({"text": ["the sea", ""]})


# --- how it is made ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"worker": 2}, "worker = '...' cannot be used: no such setting; did you mean"),
        ({"workers": "two"}, "workers = 'two' cannot be used: must be a whole number"),
        (
            {"model_path": Path("/none.gguf")},
            "model_path = '/none.gguf' cannot be used",
        ),
    ],
)
def test_an_option_that_cannot_be_used_is_one_sentence(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(es.BadSetting) as caught:
        es.Embedder(**options)
    assert str(caught.value).startswith(f"Embedder: {said}")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"dimensions": 9}, es.InvalidValue),
        ({"prompt_name": "query"}, es.InvalidValue),
    ],
)
def test_what_the_model_lacks_is_an_error_and_leaves_nothing(
    options: dict[str, Any], kind: type[Exception]
) -> None:
    before = set(threading.enumerate())
    with made(engine := kit.FakeEngine(), **options) as embedder:
        for _ in range(2):  # nothing is half loaded
            with pytest.raises(kind):
                next(embedder.embed([["a"]]))
        assert not kit.threads_since(before)
    assert engine.times_closed == 2


def test_a_reranker_does_not_embed() -> None:
    ranker = kit.FakeEngine(n_scores=1, pair_separator=(5,), pair_suffix=(6,))
    with made(ranker) as embedder, pytest.raises(es.WrongKindOfModel):
        next(embedder.embed([["a"]]))


def test_a_pickle_is_what_it_was_made_with_loaded_or_not(tmp_path: Path) -> None:
    path = models.tiny_bert(tmp_path)
    embedder = es.Embedder(model_path=path, dimensions=8, cache_mb=0)
    fresh = pickle.loads(pickle.dumps(embedder))
    (row,) = next(embedder.embed([["a b"]]))
    again = pickle.loads(pickle.dumps(embedder))
    for other in (fresh, again):
        assert other._loaded is None
        assert np.array_equal(next(other.embed([["a b"]]))[0], row)
        assert other.identity == embedder.identity
        assert other._settings == embedder._settings
        other.close()
    embedder.close()


def test_its_workers_are_the_cores_of_the_process_that_it_is_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(es, "usable_cores", lambda: 6)
    for given, cores in {"4": 4, "8": 6, "2,3": 6, "": 6, "0": 6}.items():
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        sent = pickle.dumps(es.Embedder())
        assert es.Embedder()._settings.workers == cores, given
        assert es.Embedder(workers=2)._settings.workers == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert pickle.loads(sent)._settings.workers == 3


def test_an_identity_differs_where_vectors_do(tmp_path: Path) -> None:
    path = models.tiny_bert(tmp_path)
    prompts = ["query=hello {text}", "other=world "]
    changes: list[dict[str, Any]] = [
        {},
        {"pooling": "cls"},
        {"dimensions": 8},
        {"prompt_name": "query"},
        {"prompt_name": "other"},
        {"auto_truncate": True},
        {"max_input_tokens": 8},
        {"weights": "f32"},
    ]
    found = []
    for change in changes:
        chosen: dict[str, Any] = {
            "model_path": path,
            "prompt": prompts,
            "cache_dir": str(tmp_path),
        }
        with contextlib.closing(es.Embedder(**(chosen | change))) as embedder:
            found.append(es.json_codec().dumps(embedder.identity))
    for (n, one), (m, other) in itertools.combinations(enumerate(found), 2):
        assert one != other, (changes[n], changes[m])


# --- while it works ---


def test_closing_ends_its_threads_and_frees_the_model() -> None:
    before = set(threading.enumerate())
    with made(engine := kit.FakeEngine()) as embedder:
        assert not kit.threads_since(before), "it has loaded before it was used"
        for times in (1, 2):  # it may be used again
            assert len(next(embedder.embed([["a"]]))) == 1
            assert kit.threads_since(before)
            embedder.close()
            assert not kit.threads_since(before)
            assert engine.times_closed == times
        embedder.close()
    assert engine.times_closed == 2


@pytest.mark.parametrize("size", [1, 100, 10_000])
def test_windows_are_taken_as_there_is_room(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(
        es, "_AHEAD_TOKENS", 1 << 12
    )  # 1 << 16 takes 10 s to fill by ones
    taken = 0

    def windows() -> Iterator[list[str]]:
        nonlocal taken
        while True:
            taken += 1
            yield [f"{n % 50} {taken % 50}" for n in range(size)]

    with made() as embedder:
        found = embedder.embed(windows())
        for yielded in range(1, 6):
            next(found)
            tokens = es.token_bounds(es.EmbedRequest(inputs=["44 44"]), kit.fake_card())
            most = max(es._MIN_WINDOWS, 1 + es._AHEAD_TOKENS // (size * tokens[0] // 2))
            assert es._MIN_WINDOWS <= taken - yielded + 1 <= most
        assert queue_of(embedder).backlog.inputs <= most * size
        found.close()


def test_what_nobody_waits_for_any_more_is_not_computed() -> None:
    with made(engine := kit.FakeEngine()) as embedder:
        found = embedder.embed([["a"], ["b"] * 20, ["c"] * 20])
        next(found)
        found.close()
        assert queue_of(embedder).requests == 0
        engine.block()
        windows: Any = [["d"], 5]  # which is none
        waiting = embedder.embed(windows)
        with pytest.raises(TypeError):
            next(waiting)
        assert queue_of(embedder).requests == 0


def test_an_engine_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(es, "ABORT_S", 0.0)
    monkeypatch.setattr(es.Throughput, "overdue_s", lambda *_: 0.0)
    engine = kit.FakeEngine()
    with made(engine, stuck_after_s=0.1) as embedder:
        next(embedder.embed([["a"]]))
        engine.block()
        engine.is_deaf = True
        with pytest.raises(es.EngineUnavailable):
            next(embedder.embed([["b"]]))


def test_threads_share_a_model() -> None:
    texts = [f"{n} and {n}" for n in range(40)]
    with made(engine := kit.FakeEngine()) as embedder:
        found: dict[int, list[Any]] = {}

        def work(n: int) -> None:
            found[n] = [rows[0] for rows in embedder.embed([t] for t in texts)]

        workers = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for each in workers:
            each.start()
        for each in workers:
            each.join(kit.DEADLINE_S)
    wanted = [expected(text) for text in texts]
    assert all(np.array_equal(rows, wanted) for rows in found.values())
    assert len(found) == 3
    assert engine.times_closed == 1
