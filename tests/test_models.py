"""Rooms MODELS, REGISTRY and CONFIGURATION: several models and versions, in memory or not.

Engines are fakes, one for each load, known by the stem of the file; the files are real
GGUFs, of a model with random weights, because they are looked at before they are loaded.
"""

from __future__ import annotations

import asyncio
import calendar
import collections
import contextlib
import dataclasses
import functools
import hashlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
import types
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

import embellama_server as es
from tests import chat_models, kit, models
from tests.faults import until as until_so

SCRIPT = str(kit.ROOT / "embellama_server.py")
MIB = 1 << 20


def run(check: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine."""
    asyncio.run(check)


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait until it holds; for what no event tells."""
    async with asyncio.timeout(kit.DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.002)
    assert condition(), what


# --- engines ---


class Engines:
    """A factory of fake engines that counts loads, holds them up, or lets them fail."""

    def __init__(self) -> None:
        self.loads: list[str] = []  # stems, as loading began
        self.made: dict[str, list[kit.FakeEngine]] = collections.defaultdict(list)
        self.problem: dict[str, Exception] = {}  # by stem: what loading raises
        self._gates: dict[str, threading.Event] = {}
        self._entered = threading.Semaphore(0)
        self._lock = threading.Lock()

    def __call__(self, path: str, *_: object) -> kit.FakeEngine:
        stem = Path(path).stem
        with self._lock:
            self.loads.append(stem)
        self._entered.release()
        if gate := self._gates.get(stem):
            kit.wait(gate)
        if stem in self.problem:
            raise self.problem[stem]
        ranks: dict[str, Any] = {
            "n_scores": 1,
            "pair_separator": (5,),
            "pair_suffix": (6,),
        }
        engine = kit.FakeEngine(**(ranks if stem == "ranker" else {}))
        with self._lock:
            self.made[stem].append(engine)
        return engine

    def hold(self, stem: str) -> None:
        """From now on loads of it wait."""
        self._gates[stem] = threading.Event()

    def let_go(self, stem: str = "") -> None:
        """Let them go on; without a name all."""
        for name in (stem,) if stem else tuple(self._gates):
            self._gates.pop(name, threading.Event()).set()

    async def loading(self) -> None:
        """Return when one more load has begun."""
        entered = asyncio.to_thread(self._entered.acquire, timeout=kit.DEADLINE_S)
        assert await entered, "nothing is loaded"

    def last(self, stem: str) -> kit.FakeEngine:
        """The engine that was made last."""
        return self.made[stem][-1]

    def alive(self, stem: str) -> int:
        """How many are in memory."""
        return sum(not engine.is_closed for engine in self.made[stem])

    def release(self) -> None:
        """Let everything go on."""
        self.let_go()
        for engines in tuple(self.made.values()):
            for engine in engines:
                engine.release()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model."""
    return models.tiny_bert(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def files(tmp_path: Path, tiny: Path) -> Callable[[str], str]:
    """A model file of any name."""

    def file(stem: str) -> str:
        path = tmp_path / f"{stem}.gguf"
        if not path.exists():
            shutil.copy(tiny, path)
        return str(path)

    return file


# --- a service with several models ---


class Written(kit.Configuration):
    """What a service finds when it reads its configuration again."""

    def __init__(self, common: es.Settings, rows: Sequence[es.Settings]) -> None:
        super().__init__(common)
        self.common, self.rows = common, tuple(rows)

    def read(self) -> es.LoadedSettings:
        if isinstance(self.now, Exception):
            raise self.now
        limit = self.common.queue_size
        given = {
            "workers": es.Given("test", 1, 1),
            "queue_size": es.Given("test", limit, limit),
        }
        return es.LoadedSettings(self.common, {}, self.rows, common=given)


class Several(kit.RunningService):
    """A running service, and shorthands."""

    engines: Engines
    written: Written

    @property
    def models(self) -> es.ModelRegistry:
        return self.service.models

    def model(self, label: str) -> es.ModelEntry:
        """The row of name@version."""
        return next(row for row in self.models.entries if row.label == label)

    def loaded_of(self, label: str) -> es.LoadedModel:
        """What is in memory of it."""
        served = self.model(label).loaded
        assert served is not None
        return served

    async def embed(self, model: str | None = None, **more: Any) -> kit.Reply:
        """One input to one model."""
        body = {"input": "a"} | ({"model": model} if model else {}) | more
        return await self.ask("POST", "/v1/embeddings", body)

    async def answering(self, model: str | None = None, **more: Any) -> str:
        """Which one answers."""
        reply = await self.embed(model, **more)
        assert reply.status == 200, reply.body
        return reply.headers["x-embellama-model"]

    async def admin(self, verb: str, **body: Any) -> kit.Reply:
        """POST /admin/models/verb."""
        return await self.ask("POST", f"/admin/models/{verb}", body)

    async def states(self) -> dict[str, dict[str, Any]]:
        """GET /admin/models, by label."""
        rows = (await self.ask("GET", "/admin/models")).json["models"]
        return {row["model"]: row for row in rows}

    async def metric(self, series: str) -> float:
        """The value of a series as a scrape shows it."""
        text = (await self.ask("GET", "/metrics")).body.decode()
        lines = [line for line in text.splitlines() if line.startswith(f"{series} ")]
        assert len(lines) == 1, f"{series} in:\n{text}"
        return float(lines[0].rpartition(" ")[2])

    async def series(self) -> set[str]:
        """The names and labels of all series."""
        text = (await self.ask("GET", "/metrics")).body.decode()
        return {line.rpartition(" ")[0] for line in text.splitlines() if line[0] != "#"}

    async def named_in_metrics(self) -> set[str]:
        """The models that have series."""
        found = (re.search('model="([^"]*)"', one) for one in await self.series())
        return {match[1] for match in found if match}

    async def completed(self) -> int:
        """The requests that all models have answered, as infer-server tells it."""
        figures = (await self.ask("GET", "/v1/metrics")).json
        return int(figures["engine"]["completed_requests"])

    def sweep(self) -> None:
        """Free whoever is done, now."""
        self.models.sweep(0)

    async def freed(self, engine: kit.FakeEngine) -> None:
        """Wait until an engine is out of memory; the server's own tick takes longer.

        And until the registry knows: a thread frees it, and trims memory after that.
        """

        def is_freed() -> bool:
            self.sweep()
            return engine.is_closed and not self.models._freeing

        await until(is_freed, "freed")

    def pass_time(self, seconds: float) -> None:
        """Let every model's last use lie further back."""
        for row in self.models.entries:
            row.used_at -= seconds


def row(path: str, **changes: Any) -> es.Settings:
    """The settings of a model; ``name``, ``version``, ``aliases``, ``share`` in short."""
    short = {f"model_{key}": changes.pop(key) for key in _SHORT & set(changes)}
    return kit.settings(**{"cache_mb": 1} | short | changes, model_path=path)


_SHORT = {"name", "version", "alias", "share", "sha256"}


@contextlib.asynccontextmanager
async def serving(
    *rows: es.Settings,
    engines: Engines | None = None,
    wait_ready: bool = True,
    **changes: Any,
) -> AsyncIterator[Several]:
    """A service of these models, stopped at the end unless it already is."""
    with tempfile.TemporaryDirectory() as folder:
        common = kit.settings(**{"model_path": "", "cache_dir": folder} | changes)
        async with _serving(common, rows, engines or Engines(), wait_ready) as running:
            yield running


@contextlib.asynccontextmanager
async def _serving(
    common: es.Settings, rows: Sequence[es.Settings], engines: Engines, wait_ready: bool
) -> AsyncIterator[Several]:
    stream = kit.WatchedLog()
    listeners = kit.bound(common)
    written = Written(common, rows)
    server = es.Server(
        written.read(),
        es.Log("debug", "text", stream),
        engines,
        listeners=listeners,
        notifier=es.Notifier(None, {}),
        read_settings=written.read,
    )
    host, port = listeners[0].getsockname()[:2]
    task = asyncio.create_task(server.run(lambda _: None))
    running = Several(server, stream, kit.FakeEngine(), task, host, port, written)
    running.engines, running.written = engines, written
    try:
        if wait_ready:
            await until(lambda: task.done() or stream.settled.is_set(), "ready")
            if task.done():
                task.result()
        yield running
    finally:
        engines.release()
        if not task.done():
            server.stop()
        async with asyncio.timeout(kit.DEADLINE_S):
            await task
        made = itertools.chain.from_iterable(engines.made.values())
        assert all(engine.times_closed <= 1 for engine in made), "freed twice"


def key_file(folder: Path, lines: str) -> str:
    """A file of keys."""
    path = folder / "keys"
    path.touch(0o600)
    path.write_text(lines)
    return str(path)


async def cut_off(running: Several, path: str, body: Any) -> Callable[[], None]:
    """Send a request; what hangs up when called, with a reset that is noticed at once."""
    raw = es.json_codec().dumps(body)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(raw)}\r\n{running.admin_lines()}\r\n"
    )
    client = socket.create_connection((running.host, running.port))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.sendall(head.encode() + raw)
    return client.close


# --- which model ---


def registry(*rows: es.Settings) -> es.ModelRegistry:
    """Models that nobody loads."""

    def never(_: object) -> Any:
        raise AssertionError("loaded")

    async def made() -> es.ModelRegistry:
        return es.ModelRegistry(
            rows,
            load=never,
            look=never,
            telemetry=es.Telemetry(),
            log=kit.quiet_log(),
        )

    return asyncio.run(made())


def found(
    known: es.ModelRegistry, asked: str | None, *, any_model: bool = False
) -> str:
    """The label of what answers."""
    return known.names.find(asked, "somebody", any_model=any_model).label


def answers_by_default(known: es.ModelRegistry, name: str) -> str:
    """The label of what answers for a name; it alone is said to be the default."""
    label = found(known, name)
    versions = [one for one in known.entries if one.name == name]
    assert [o.label for o in versions if known.names.is_default(o)] == [label]
    return label


@pytest.mark.parametrize(
    ("asked", "label"),
    [
        (None, "a@2"),
        ("a", "a@2"),
        ("a@1", "a@1"),
        ("a@2", "a@2"),
        ("one", "a@2"),
        ("b", "b@7"),
        ("b@7", "b@7"),
        ("a:latest", "a@2"),
        ("one:latest", "a@2"),
        ("b@7:latest", "b@7"),
        ("c:latest", "c:latest@1"),
    ],
)
def test_a_model_is_found_by_name_alias_and_version(
    asked: str | None, label: str
) -> None:
    known = registry(
        row("f", name="a", alias=("one",)),
        row("f", name="a", version=2),
        row("f", name="b", version=7),
        row("f", name="c:latest"),
    )
    assert found(known, asked) == label


@pytest.mark.parametrize(
    "asked",
    [
        "x",
        "a@3",
        "@1",
        "a@",
        "a@01",
        "one@1",
        "a:newest",
        "\udcff",
        "c",
        ":latest",
        "/",
    ],
)
def test_another_name_is_refused_and_told_which_there_are(asked: str) -> None:
    known = registry(row("f", name="a", alias=("one",)), row("f", name="a", version=2))
    with pytest.raises(
        es.ModelNotFound, match=r"served: a, a@1, a@2, one \("
    ) as caught:
        found(known, asked)
    assert caught.value.param == "model"
    assert f"model {asked!r} not found" in caught.value.message
    assert found(known, asked, any_model=True) == "a@2"


SPELLED = {  # of the models below: what each is found by
    "all-MiniLM-L6-v2@1": (
        *("all-minilm-l6-v2", "ALL-MINILM-L6-V2", "all-MiniLM-L6-v2.gguf"),
        *("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2:latest"),
        *("x/y/All-MiniLM-L6-v2.GGUF:LATEST", "Org/all-minilm-l6-v2@1"),
        *("all-minilm", "All-MiniLM:latest", "library/all-minilm"),
    ),
    "BAAI/bge-m3@1": ("baai/bge-m3", "bge-m3", "bge-m3.gguf", "Org/BGE-M3:latest"),
    "reranker.gguf@1": ("reranker", "Reranker.GGUF", "BAAI/reranker"),
    "Case@1": ("Case", "Case:latest", "Case.gguf"),
    "case@1": ("case", "case:latest", "case.gguf"),
    "a/same@1": ("a/same", "A/same", "a/SAME.gguf"),
    "b/same@1": ("b/same", "B/Same:latest"),
}
AMBIGUOUS = {
    "CASE": ("Case", "case"),
    "org/Case": ("Case", "case"),
    "same": ("a/same", "b/same"),
    "c/Same.gguf": ("a/same", "b/same"),
}


def spelled_models() -> es.ModelRegistry:
    """Of the table above."""
    names = [label.removesuffix("@1") for label in SPELLED]
    alias = {"all-MiniLM-L6-v2": ("all-minilm",)}
    return registry(*(row("f", name=n, alias=alias.get(n, ())) for n in names))


@pytest.mark.parametrize("label", SPELLED)
def test_what_clients_add_to_a_name_never_decides(label: str) -> None:
    known = spelled_models()
    for asked in (label, label.removesuffix("@1"), *SPELLED[label]):
        assert found(known, asked) == label, asked


@pytest.mark.parametrize("asked", AMBIGUOUS)
def test_a_name_that_may_mean_two_is_refused_and_told_both(asked: str) -> None:
    known = spelled_models()
    with pytest.raises(es.ModelNotFound) as caught:
        found(known, asked)
    assert " or ".join(AMBIGUOUS[asked]) in caught.value.message
    assert found(known, asked, any_model=True) == "all-MiniLM-L6-v2@1"


@pytest.mark.parametrize("asked", [None, "", "nobody"])
def test_a_request_without_a_model_gets_the_first_that_can_do_it(
    asked: str | None,
) -> None:
    known = registry(*(row("f", name=name) for name in "abcd"))
    for one, kind in zip(known.entries, ("rank", "embed") * 2, strict=True):
        one.known = es.ModelFacts(kind=kind)
    for kind, label in (("", "a@1"), ("rank", "a@1"), ("embed", "b@1")):
        one = known.names.find(asked, "me", any_model=True, kind=kind)
        assert one.label == label
    for one in known.entries:
        one.known = es.ModelFacts(kind="rank")
    one = known.names.find(asked, "me", any_model=True, kind="embed")
    assert one.label == "a@1"  # whose kind is then told


def test_any_model_does_not_hide_those_that_are_there() -> None:
    known = registry(row("f", name="a"), row("f", name="b"))
    assert found(known, "b", any_model=True) == "b@1"
    assert found(known, "c", any_model=True) == "a@1"


def test_a_model_without_a_name_is_called_as_its_file_and_the_default_as_itself() -> (
    None
):
    assert found(registry(row("/x/some.model.gguf")), None) == "some.model@1"
    assert (
        found(registry(row("")), es.DEFAULT_MODEL.name) == f"{es.DEFAULT_MODEL.name}@1"
    )


def test_very_long_names_do_not_make_very_long_errors() -> None:
    rows = [row("f", name=f"{n}" * 60) for n in range(30)]
    with pytest.raises(es.ModelNotFound) as caught:
        found(registry(*rows), "x" * 10**5)
    assert len(caught.value.message) < 700


@pytest.mark.parametrize(
    "rows",
    [
        (row("f", name="a"), row("f", name="b", alias=("a",))),
        (row("f", name="b", alias=("a",)), row("f", name="a")),
        (row("f", name="a", alias=("x",)), row("f", name="b", alias=("x",))),
        pytest.param((row("f", name="a", version=2), row("/x/a@2.gguf"))),
        pytest.param((row("/x/a@2.gguf"), row("f", name="a", version=2))),
    ],
)
def test_a_name_that_means_two_models_is_refused(rows: Sequence[es.Settings]) -> None:
    with pytest.raises(es.StartupError, match="would be the name of two models"):
        registry(*rows)


def test_versions_may_share_an_alias_and_a_name_may_be_its_own() -> None:
    known = registry(
        row("f", name="a", alias=("x", "a", "x")),
        row("f", name="a", version=2, alias=("x",)),
    )
    assert found(known, "x") == "a@2"


def test_the_highest_version_is_the_default_until_somebody_says_otherwise() -> None:
    known = registry(
        row("f", name="a", version=9),
        row("f", name="a", version=10),
        row("f", name="a", version=2),
        row("f", name="b"),
    )
    assert answers_by_default(known, "a") == "a@10"
    known.set_default(known.names.find("a@2", "", any_model=False))
    assert answers_by_default(known, "a") == "a@2"
    assert found(known, None) == "a@2"
    assert found(known, "a@10") == "a@10"
    assert answers_by_default(known, "b") == "b@1"


# --- shares ---

CLIENTS = [f"client {n}" for n in range(2000)]


def split(known: es.ModelRegistry, asked: str | None = "a") -> dict[str, str]:
    """Which one each client gets."""
    return {
        client: known.names.find(asked, client, any_model=False).label
        for client in CLIENTS
    }


@pytest.mark.parametrize("asked", ["a", None, "x", "a:latest"])
def test_shares_split_the_clients_of_a_name(asked: str | None) -> None:
    known = registry(
        row("f", name="a", share=0.5, alias=("x",)),
        row("f", name="a", version=2, share=0.375),
        row("f", name="a", version=3, share=0.125),
    )
    counts = collections.Counter(split(known, asked).values())
    # Five standard deviations of a binomial of 2000.
    assert abs(counts["a@1"] - 1000) < 112
    assert abs(counts["a@2"] - 750) < 109
    assert abs(counts["a@3"] - 250) < 74
    assert found(known, "a@3") == "a@3"


def test_shares_are_relative_to_each_other() -> None:
    def of(*shares: float) -> dict[str, str]:
        rows = (
            row("f", name="a", version=n + 1, share=s) for n, s in enumerate(shares)
        )
        return split(registry(*rows))

    assert of(3, 1) == of(0.75, 0.25) == of(750_000, 250_000)


def test_a_client_keeps_its_version_and_other_names_split_otherwise() -> None:
    rows = [
        row("f", name=name, version=version, share=1)
        for name in "ab"
        for version in (1, 2)
    ]
    first = split(registry(*rows))
    assert (
        first
        == split(registry(*rows))
        == split(registry(*reversed(rows[2:]), *rows[:2]))
    )
    other = split(registry(*rows), "b")
    same = sum(first[c][-1] == other[c][-1] for c in CLIENTS)
    assert abs(same - 1000) < 112  # who tries the new a is not who tries the new b


def test_a_greater_share_takes_clients_over_and_moves_no_other() -> None:
    def of(share: float) -> dict[str, str]:
        rows = (
            row("f", name="a", share=1 - share),
            row("f", name="a", version=2, share=share),
        )
        return split(registry(*rows))

    few, many = of(0.1), of(0.3)
    assert all(many[c] == "a@2" for c in CLIENTS if few[c] == "a@2")
    assert collections.Counter(of(0).values()) == {"a@1": 2000}


def test_a_version_without_a_share_gets_nobody_beside_those_that_have_one() -> None:
    known = registry(
        row("f", name="a", share=1), row("f", name="a", version=2), row("f", name="b")
    )
    assert set(split(known).values()) == {"a@1"}


def test_a_default_that_was_set_ends_the_split_of_its_name_alone() -> None:
    rows = [
        row("f", name=name, version=version, share=1)
        for name in "ab"
        for version in (1, 2)
    ]
    known = registry(*rows)
    known.set_default(known.names.find("a@1", "", any_model=False))
    assert set(split(known).values()) == {"a@1"}
    assert set(split(known, "b").values()) == {"b@1", "b@2"}


async def test_requests_say_who_answered_and_metrics_count_it(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("a2"), name="a", version=2), row(files("b")))
    async with serving(*rows) as running:
        assert await running.answering() == "a@2"
        assert await running.answering("b", input=["x", "y z"]) == "b@1"
        assert await running.answering("a@1") == "a@1"
        assert await running.answering("b", input="x") == "b@1"
        missing = await running.embed("c")
        assert (missing.status, missing.error["code"]) == (404, "model_not_found")
        for label, requests, inputs, tokens in (
            ("a@1", 1, 1, 3),
            ("a@2", 1, 1, 3),
            ("b@1", 2, 3, 10),
        ):
            shown = f'{{model="{label}"}}'
            name = "embellama_model"
            assert await running.metric(f"{name}_requests_total{shown}") == requests
            assert await running.metric(f"{name}_inputs_total{shown}") == inputs
            assert await running.metric(f"{name}_tokens_total{shown}") == tokens
            assert await running.metric(f"{name}_loaded{shown}") == 1
            assert await running.metric(f"{name}_loads_total{shown}") == 1
            assert await running.metric(f"{name}_queue_inputs{shown}") == 0
        calls = {stem: len(running.engines.last(stem).calls) for stem in ("a", "b")}
        assert calls["a"] == 1
        assert calls["b"] >= 1
        assert (await running.embed("b", input="q")).json["model"] == "b"


async def test_every_dialect_chooses_by_model_and_says_which(
    files: Callable[[str], str],
) -> None:
    asks: list[tuple[str, dict[str, Any]]] = [
        ("/embeddings", {"input": "a"}),
        ("/embed", {"inputs": "a"}),
        ("/api/v1/embed", {"inputs": "a"}),
        ("/api/embed", {"input": "a"}),
        ("/api/embeddings", {"prompt": "a"}),
    ]

    async with serving(row(files("a")), row(files("b"), version=3)) as running:
        for path, body in asks:
            for asked, label in (("b", "b@3"), ("a@1", "a@1"), ("b:latest", "b@3")):
                reply = await running.ask("POST", path, body | {"model": asked})
                assert reply.status == 200, (path, reply.body)
                assert reply.headers["x-embellama-model"] == label, path
            reply = await running.ask("POST", path, body | {"model": "no"})
            if path in ("/embed", "/api/v1/embed"):  # TEI has one model
                assert reply.headers["x-embellama-model"] == "a@1"
                continue
            assert reply.status == 404, (path, reply.body)


async def test_the_kind_of_a_model_is_known_before_it_is_loaded(
    files: Callable[[str], str], tmp_path: Path
) -> None:
    path = models.tiny_cross_encoder(tmp_path).rename(tmp_path / "ranker.gguf")
    rows = [row(str(path), preload=False), row(files("a"), preload=False)]
    rows.append(row(files("forced"), preload=False, pooling="rank"))
    texts = {"query": "a", "texts": ["b"], "documents": ["b"]}

    async with serving(*rows) as running:
        kinds = [model.facts.kind for model in running.models.entries]
        assert kinds == ["rank", "embed", "rank"]
        assert running.engines.loads == []
        for url in ("/v1/embeddings", "/embed", "/api/v1/embed"):
            reply = await running.ask("POST", url, {"input": "a", "inputs": "a"})
            assert reply.headers["x-embellama-model"] == "a@1"
        assert running.engines.loads == ["a"]
        for url in ("/v1/rerank", "/v2/rerank", "/rerank"):
            for name in ({}, {"model": ""}, {"model": None}):
                reply = await running.ask("POST", url, texts | name)
                assert reply.headers["x-embellama-model"] == "ranker@1"
        running.models.unload(running.model("a@1"))
        assert await running.answering() == "a@1"
        assert running.engines.loads == ["a", "ranker", "a"]
        await running.models.replace([*rows, row(str(path), name="new", preload=False)])
        assert running.models.entries[-1].facts.kind == "rank"
        assert running.engines.loads == ["a", "ranker", "a"]


async def test_ollama_s_listing_is_the_same_whether_a_model_is_in_memory_or_not(
    files: Callable[[str], str],
) -> None:
    path = Path(files("b"))
    os.utime(path, (1e9, 1e9))
    rows = [row(files("a"), alias=("mini", "x/y:1b")), row(str(path), preload=False)]

    async def listing(
        running: Several, path: str = "/api/tags"
    ) -> list[dict[str, Any]]:
        found = (await running.ask("GET", path)).json["models"]
        for one in found:
            one["details"].pop("quantization_level")  # of what is computed with
        return cast(list[dict[str, Any]], found)

    async with serving(*rows) as running:
        before = await listing(running)
        names = ["a:latest", "mini:latest", "x/y:1b", "b:latest"]
        assert [one["name"] for one in before] == names
        told = before[-1]
        assert told["digest"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert told["size"] == path.stat().st_size
        assert told["modified_at"] == "2001-09-09T01:46:40Z"
        assert told["details"]["family"] == "bert"
        shown = (await running.ask("POST", "/api/show", {"model": "b"})).json
        assert shown["model_info"]["bert.embedding_length"] == 32
        assert shown["capabilities"] == ["embedding"]
        pulled = await running.ask("POST", "/api/pull", {"model": "b"})
        assert pulled.status == 200
        assert running.engines.loads == ["a"]
        assert await running.answering("b") == "b@1"
        while_loaded = (await listing(running))[-1]
        running.models.unload(running.model("b@1"))
        after = (await listing(running))[-1]
        for name in ("name", "digest", "size", "modified_at"):
            assert told[name] == while_loaded[name] == after[name]
        assert [one["name"] for one in await listing(running, "/api/ps")] == names[:1]
        for name in names:
            assert (await running.embed(name)).status == 200


async def test_ollama_s_ps_says_when_an_idle_model_goes(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a")), idle_unload_s=3600) as running:
        (one,) = (await running.ask("GET", "/api/ps")).json["models"]
        ends_at = calendar.timegm(
            time.strptime(one["expires_at"], "%Y-%m-%dT%H:%M:%SZ")
        )
        assert 0 < ends_at - time.time() <= 3601


async def test_a_user_is_sticky_before_the_key_and_the_key_before_the_address(
    files: Callable[[str], str], tmp_path: Path
) -> None:
    lines = "".join(f"key{n} secret-number-{n:04}\n" for n in range(8))
    keys = key_file(tmp_path, lines)

    rows = (
        row(files("a"), share=1),
        row(files("a2"), name="a", version=2, share=1),
    )
    async with serving(*rows, api_key_file=keys) as running:

        async def who(key: int, user: str = "") -> str:
            body = {"input": "a"} | ({"user": user} if user else {})
            reply = await running.ask(
                "POST",
                "/v1/embeddings",
                body,
                authorization=f"Bearer secret-number-{key:04}",
            )
            assert reply.status == 200, reply.body
            return reply.headers["x-embellama-model"]

        users = [f"user {n}" for n in range(8)]
        by_user = {user: {await who(key, user) for key in range(8)} for user in users}
        assert all(len(labels) == 1 for labels in by_user.values())
        assert len(set.union(*by_user.values())) == 2
        by_key = [{await who(key) for _ in range(3)} for key in range(8)]
        assert all(len(labels) == 1 for labels in by_key)
        assert len(set.union(*by_key)) == 2


# --- loading on demand ---


async def test_without_preload_the_server_is_ready_and_loads_when_asked(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        assert running.engines.loads == ["a"]
        assert (await running.ask("GET", "/ready")).status == 200
        states = await running.states()
        assert [states[m]["state"] for m in ("a@1", "b@1")] == [
            "loaded",
            "unloaded",
        ]
        listed = (await running.ask("GET", "/v1/models")).json["data"]
        assert [(e["id"], e["meta"]["state"]) for e in listed] == [
            ("a", "loaded"),
            ("b", "unloaded"),
        ]
        assert await running.answering("a") == "a@1"
        assert running.engines.loads == ["a"]
        assert await running.metric('embellama_model_loaded{model="b@1"}') == 0
        assert await running.answering("b") == "b@1"
        assert await running.answering("b") == "b@1"
        assert running.engines.loads == ["a", "b"]
        assert (await running.states())["b@1"]["state"] == "loaded"


async def test_a_server_may_preload_nothing(files: Callable[[str], str]) -> None:
    async with serving(row(files("a"), preload=False)) as running:
        assert (await running.ask("GET", "/ready")).status == 200
        assert running.engines.loads == []
        assert await running.answering() == "a@1"


async def test_one_load_however_many_requests_wait_for_it(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        await running.engines.loading()  # a's
        running.engines.hold("b")
        asks = [
            asyncio.create_task(running.embed("b", input=f"text {n}"))
            for n in range(50)
        ]
        await running.engines.loading()
        open_now = running.service.connections.open
        await until(lambda: len(open_now) == 50, "all wait")
        assert (await running.states())["b@1"]["state"] == "loading"
        assert await running.answering("a") == "a@1"  # others go on
        running.engines.let_go()
        replies = await asyncio.gather(*asks)
        assert [reply.status for reply in replies] == [200] * 50
        assert running.engines.loads == ["a", "b"]
        assert await running.metric('embellama_model_requests_total{model="b@1"}') == 50


async def test_models_are_loaded_one_at_a_time(files: Callable[[str], str]) -> None:
    rows = [row(files(stem), preload=False) for stem in "abc"]
    async with serving(*rows) as running:
        for stem in "abc":
            running.engines.hold(stem)
        asks = [asyncio.create_task(running.embed(stem)) for stem in "abc"]
        open_now = running.service.connections.open
        await until(lambda: len(open_now) == 3, "all wait")
        for count in (1, 2, 3):
            await running.engines.loading()
            assert len(running.engines.loads) == count
            states = [s["state"] for s in (await running.states()).values()]
            assert states.count("loaded") == count - 1
            running.engines.let_go(running.engines.loads[-1])
        assert [(await ask).status for ask in asks] == [200] * 3


@pytest.mark.parametrize(
    "problem",
    [es.StartupError("it is cracked"), es.EngineError("it is cracked")],
    ids=["startup", "engine"],
)
async def test_a_load_that_fails_is_told_to_all_and_not_tried_again_before_a_pause(
    files: Callable[[str], str], problem: Exception
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        await running.engines.loading()
        running.engines.hold("b")
        running.engines.problem["b"] = problem
        asks = [asyncio.create_task(running.embed("b")) for _ in range(10)]
        await running.engines.loading()
        await until(lambda: len(running.service.connections.open) == 10, "all")
        running.engines.let_go()
        for reply in await asyncio.gather(*asks):
            assert (reply.status, reply.error["code"]) == (503, "model_unavailable")
            assert "b@1 cannot be loaded: it is cracked" in reply.error["message"]
            assert int(reply.headers["retry-after"]) >= 1
        assert running.engines.loads == ["a", "b"]
        assert (await running.states())["b@1"]["state"] == "unloaded"
        assert await running.answering("a") == "a@1"
        del running.engines.problem["b"]
        for _ in range(20):
            again = await running.embed("b")
            assert (again.status, again.body) == (503, reply.body)
            assert 1 <= int(again.headers["retry-after"]) <= 10
        assert running.engines.loads == ["a", "b"]
        assert running.log.getvalue().count("not loaded model=b@1") == 1
        pause_is_over(running, "b@1")
        assert await running.answering("b") == "b@1"
        assert running.engines.loads == ["a", "b", "b"]
        assert running.engines.alive("b") == 1


def pause_is_over(running: Several, label: str) -> None:
    """After a load that failed."""
    model = running.model(label)
    assert model.failed
    model.failed = dataclasses.replace(model.failed, until=0.0)


async def test_the_pauses_between_loads_that_fail_grow_up_to_a_minute(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        running.engines.problem["b"] = es.StartupError("it is cracked")
        for pause_s in (10, 20, 40, 60, 60):
            reply = await running.embed("b")
            assert reply.headers["retry-after"] == str(pause_s)
            pause_is_over(running, "b@1")
        assert running.engines.loads == ["a", *"bbbbb"]
        del running.engines.problem["b"]
        assert await running.answering("b") == "b@1"
        await running.admin("unload", model="b")
        running.engines.problem["b"] = es.StartupError("it is cracked")
        assert (await running.embed("b")).headers["retry-after"] == "10"


@pytest.mark.parametrize("what", ["an administrator", "a reload", "another file"])
async def test_a_load_that_failed_is_tried_at_once_when_something_has_been_done(
    files: Callable[[str], str], what: str
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        running.engines.problem["b"] = es.StartupError("it is cracked")
        assert (await running.embed("b")).status == 503
        del running.engines.problem["b"]
        assert (await running.embed("b")).status == 503
        match what:
            case "an administrator":
                assert (await running.admin("load", model="b")).status == 200
            case "a reload":
                assert (await running.ask("POST", "/admin/reload")).status == 200
            case _:
                os.utime(files("b"))
        assert await running.answering("b") == "b@1"
        assert running.engines.loads == ["a", "b", "b"]


@pytest.mark.parametrize(
    "problem",
    [OSError(24, "Too many open files"), MemoryError()],
    ids=["files", "memory"],
)
async def test_what_the_system_refuses_a_load_is_no_bug(
    files: Callable[[str], str], problem: Exception
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        running.engines.problem["b"] = problem
        reply = await running.embed("b")
        assert (reply.status, reply.error["code"]) == (503, "model_unavailable")
        says = str(problem) or "there is not enough memory"
        assert says in reply.error["message"]
        assert "bug" not in running.log.getvalue()


async def test_a_client_that_leaves_while_it_waits_cancels_nobodys_load(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        await running.engines.loading()
        running.engines.hold("b")
        leave = await cut_off(running, "/v1/embeddings", {"input": "a", "model": "b"})
        await running.engines.loading()  # for the one that leaves
        others = [asyncio.create_task(running.embed("b")) for _ in range(3)]
        open_now = running.service.connections.open
        await until(lambda: len(open_now) == 4, "all wait")
        leave()
        await until(lambda: len(open_now) == 3, "one has left")
        running.engines.let_go()
        assert [(await other).status for other in others] == [200] * 3
        assert running.engines.loads == ["a", "b"]
        assert running.log.getvalue().count("status=499") == 1


async def test_a_load_that_everybody_has_left_ends_well(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        await running.engines.loading()
        running.engines.hold("b")
        body = {"input": "a", "model": "b"}
        leave = await cut_off(running, "/v1/embeddings", body)
        await running.engines.loading()
        leave()
        await until(lambda: not running.service.connections.open, "left")
        running.engines.let_go()
        await until(lambda: running.model("b@1").loaded, "loaded")
        assert await running.answering("b") == "b@1"
        assert running.engines.loads == ["a", "b"]
        assert "bug" not in running.log.getvalue()


async def test_a_load_that_fails_after_everybody_has_left_harms_nobody(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        await running.engines.loading()
        running.engines.hold("b")
        running.engines.problem["b"] = es.EngineError("cracked")
        body = {"input": "a", "model": "b"}
        leave = await cut_off(running, "/v1/embeddings", body)
        await running.engines.loading()
        leave()
        await until(lambda: not running.service.connections.open, "left")
        running.engines.let_go()
        await until(lambda: running.model("b@1").loading is None, "over")
        del running.engines.problem["b"]
        pause_is_over(running, "b@1")
        assert await running.answering("b") == "b@1"


# --- unloading ---


async def test_an_idle_model_is_unloaded_and_comes_back_on_demand(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b")))
    async with serving(*rows, idle_unload_s=600) as running:
        await running.answering("b")
        before = running.engines.last("b")
        idle = running.model("b@1")
        idle.used_at -= 599
        running.models.sweep(600)
        assert idle.loaded is not None
        idle.used_at -= 1
        await until(lambda: before.is_closed, "freed by the service itself")
        assert before.contexts_open == 0
        assert running.model("b@1").loaded is None
        assert running.model("a@1").loaded is not None
        assert await running.metric('embellama_model_loaded{model="b@1"}') == 0
        assert (await running.ask("GET", "/ready")).status == 200
        assert await running.answering("b") == "b@1"
        assert running.engines.loads == ["a", "b", "b"]
        assert await running.metric('embellama_model_loads_total{model="b@1"}') == 2
        assert running.models.is_clean


async def test_all_models_may_be_idle_and_the_server_is_ready_still(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b")))
    async with serving(*rows, idle_unload_s=600) as running:
        running.pass_time(600)
        for stem in "ab":
            await running.freed(running.engines.last(stem))
        assert (await running.ask("GET", "/ready")).status == 200
        assert await running.metric("embellama_queue_inputs") == 0
        assert await running.metric('embellama_workers{state="idle"}') == 0
        assert await running.answering() == "a@1"


async def test_without_idle_unload_nobody_is_unloaded(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a"))) as running:
        running.pass_time(1e9)
        running.models.sweep(0)
        assert running.model("a@1").loaded is not None


async def test_a_model_with_work_is_not_idle(files: Callable[[str], str]) -> None:
    async with serving(row(files("a"))) as running:
        engine = running.engines.last("a")
        engine.block()
        ask = asyncio.create_task(running.embed(input=["x", "y", "z"]))
        await asyncio.to_thread(engine.wait_until_computing)
        running.pass_time(1e9)
        running.models.sweep(1)
        assert running.model("a@1").loaded is not None
        engine.release()
        assert (await ask).status == 200
        running.models.sweep(1)  # it has been used just now
        assert running.model("a@1").loaded is not None
        running.pass_time(2)
        running.models.sweep(1)
        assert running.model("a@1").loaded is None


async def test_a_model_that_is_unloaded_finishes_its_work_first(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a")), row(files("b"))) as running:
        engine = running.engines.last("b")
        engine.block()
        ask = asyncio.create_task(running.embed("b", input=["x", "y"]))
        await asyncio.to_thread(engine.wait_until_computing)
        reply = await running.admin("unload", model="b")
        assert (reply.status, reply.json["state"]) == (200, "unloaded")
        running.sweep()
        assert not engine.is_closed
        # Who comes now gets a new one; the old one's work goes on.
        assert await running.answering("b") == "b@1"
        assert running.engines.alive("b") == 2
        engine.release()
        answer = await ask
        assert (answer.status, len(answer.json["data"])) == (200, 2)
        await running.freed(engine)
        assert await running.answering("b") == "b@1"
        assert running.engines.alive("b") == 1
        assert len(running.engines.loads) == 3


async def test_counters_never_fall_over_unloading_and_loading(
    files: Callable[[str], str],
) -> None:
    series = [
        *(f'embellama_cache_lookups_total{{result="{r}"}}' for r in ("hit", "miss")),
        "embellama_inputs_total",
        "embellama_tokens_total",
        *(
            f'embellama_model_{name}_total{{model="b@1"}}'
            for name in ("requests", "inputs", "tokens", "loads")
        ),
    ]

    async with serving(row(files("a")), row(files("b"))) as running:

        async def values() -> list[float]:
            return [await running.metric(name) for name in series]

        seen = await values()
        for _ in range(3):
            for text in ("x", "x", "y"):
                await running.embed("b", input=text)
            used = await values()
            assert all(a <= b for a, b in zip(seen, used, strict=True))
            assert used[0] > seen[0]  # a hit of the cache
            engine = running.engines.last("b")
            await running.admin("unload", model="b")
            unloaded = await values()
            assert unloaded == used
            await running.freed(engine)
            freed = await values()
            assert freed == used
            seen = freed
        assert await running.metric("embellama_cache_entries") == 0


async def test_counters_do_not_fall_for_a_moment_either(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a")), row(files("b"))) as running:
        await running.answering("b")
        before = running.models.cache_counts()
        assert before.misses
        running.models.unload(running.model("b@1"))
        assert running.models.cache_counts().misses == before.misses
        running.sweep()
        assert running.models.cache_counts().misses == before.misses


# --- administration ---


async def test_an_administrator_loads_and_unloads_by_any_name(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a"), alias=("x",), preload=False), row(files("b")))
    async with serving(*rows) as running:
        for name in ("a", "x", "a@1", "a:latest"):
            reply = await running.admin("load", model=name)
            assert reply.status == 200
            state = reply.json
            assert (state["model"], state["state"]) == ("a@1", "loaded")
            assert state["aliases"] == ["x"]
            digest = hashlib.sha256(Path(files("a")).read_bytes()).hexdigest()
            assert state["sha256"] == digest
            assert state["size_bytes"] >= 1
            assert state["idle_s"] >= 0
            again = await running.admin("load", model=name)  # no harm
            assert again.json["sha256"] == digest
            engine = running.engines.last("a")
            reply = await running.admin("unload", model=name)
            assert (reply.status, reply.json["state"]) == (200, "unloaded")
            assert "sha256" not in reply.json
            again = await running.admin("unload", model=name)
            assert (again.status, again.json["state"]) == (200, "unloaded")
            await running.freed(engine)
        assert running.engines.loads == ["b", "a", "a", "a", "a"]


async def test_an_administrator_adds_a_file_as_another_version_and_makes_it_the_default(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a"))) as running:
        digest = hashlib.sha256(Path(files("new")).read_bytes()).hexdigest()
        reply = await running.admin(
            "load",
            path=files("new"),
            name="a",
            version=2,
            sha256=digest.upper(),
            workers=2,
            pooling="cls",
        )
        assert reply.status == 200, reply.body
        state = reply.json
        assert (state["model"], state["state"]) == ("a@2", "loaded")
        assert (state["path"], state["sha256"]) == (files("new"), digest)
        assert running.loaded_of("a@2").pool.settings.workers == 2
        assert running.model("a@2").settings.pooling == "cls"
        assert await running.answering("a@2") == "a@2"
        assert await running.answering("a@1") == "a@1"
        reply = await running.admin("default", model="a@1")
        assert reply.json["is_default"] is True
        assert await running.answering("a") == "a@1"
        states = await running.states()
        assert [states[m]["is_default"] for m in ("a@1", "a@2")] == [True, False]
        await running.admin("default", model="a@2")
        assert await running.answering() == "a@2"


async def test_a_file_is_added_whatever_the_configuration_file_says_meanwhile(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a"))) as running:
        running.written.now = es.BadSetting(
            "m.toml", "model_path", "gone", "is not there"
        )
        assert (await running.admin("load", path=files("b"))).status == 200
        assert await running.answering("b") == "b@1"


async def test_a_known_model_is_not_loaded_with_other_settings(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a"))) as running:
        for field, value in (("version", 9), ("workers", 3), ("name", "b")):
            reply = await running.admin("load", model="a", **{field: value})
            assert (reply.status, reply.error["param"]) == (400, field)
            assert "goes with path" in reply.error["message"]


async def test_an_administrator_s_bare_name_means_the_default_version(
    files: Callable[[str], str],
) -> None:
    names = [f"n{n}" for n in range(8)]  # shares would choose the first of some
    rows = [
        row(files("a"), name=name, version=version, share=1, preload=version == 2)
        for name in names
        for version in (1, 2)
    ]
    async with serving(*rows) as running:
        for name in names:
            said = (await running.admin("unload", model=name)).json
            assert (said["model"], said["is_default"]) == (f"{name}@2", True)


async def test_a_file_without_a_name_is_added_under_its_own(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a"))) as running:
        reply = await running.admin("load", path=files("other"))
        assert reply.json["model"] == "other@1"
        assert await running.answering("other") == "other@1"
        assert await running.answering() == "a@1"


async def test_what_cannot_be_loaded_leaves_nothing_behind(
    files: Callable[[str], str], tmp_path: Path
) -> None:
    no_model = tmp_path / "no.gguf"
    no_model.write_bytes(b"GIF89a")
    asks: list[tuple[dict[str, Any], int, str, str]] = [
        ({}, 400, "model", "either model or path"),
        ({"model": "a", "path": "a.gguf"}, 400, "model", "either model or path"),
        ({"name": "b"}, 400, "model", "either model or path"),
        ({"model": "no"}, 404, "model", "not found"),
        ({"model": "a@2"}, 404, "model", "not found"),
        ({"model": 5}, 400, "model", "a string"),
        ({"path": str(tmp_path / "absent.gguf")}, 400, "", "No such file"),
        ({"path": str(tmp_path)}, 400, "", "Is a directory"),
        ({"path": str(no_model)}, 400, "", "GIF8"),
        ({"path": "a\0b"}, 400, "", "NUL"),
        ({"path": "A", "name": "a"}, 409, "name", "a@1 is served already"),
        ({"path": "A", "version": 1}, 409, "name", "a@1 is served already"),
        ({"path": "A", "name": "x"}, 409, "name", "two models"),
        ({"path": "A", "name": "n", "version": 0}, 400, "version", "1"),
        ({"path": "A", "name": "n", "version": True}, 400, "version", "whole number"),
        ({"path": "A", "name": "n", "version": 10**9 + 1}, 400, "version", "1"),
        ({"path": "A", "name": "n", "workers": 0}, 400, "workers", "1"),
        ({"path": "A", "name": "n", "workers": 1025}, 400, "workers", "1"),
        ({"path": "A", "name": "n", "pooling": "max"}, 400, "pooling", "mean"),
        ({"path": "A", "name": "n", "sha256": "0" * 63}, 400, "", "64 hexadecimal"),
        ({"path": "A", "name": "n", "sha256": "0" * 64}, 409, "path", "has sha256"),
    ]

    async with serving(row(files("a"), alias=("x",))) as running:
        loads = list(running.engines.loads)
        for body, status, param, said in asks:
            if body.get("path") == "A":
                body["path"] = files("a")
            reply = await running.admin("load", **body)
            assert reply.status == status, (body, reply.body)
            assert said in reply.error["message"], (body, reply.body)
            if param:
                assert reply.error["param"] == param, (body, reply.body)
            assert set(await running.states()) == {"a@1"}, body
        assert running.engines.loads == loads
        assert await running.answering("x") == "a@1"


@pytest.mark.parametrize("verb", ["unload", "default"])
async def test_models_that_are_not_there_cannot_be_unloaded_or_made_the_default(
    files: Callable[[str], str], verb: str
) -> None:
    async with serving(row(files("a")), any_model=True) as running:
        for body, status in (
            ({"model": "no"}, 404),
            ({"model": "a@2"}, 404),
            ({"model": ""}, 400),
            ({}, 400),
            ({"model": None}, 400),
            ({"model": ["a"]}, 400),
        ):
            reply = await running.admin(verb, **cast(Any, body))
            assert reply.status == status, (body, reply.body)
            assert reply.error["param"] == "model"
        assert (await running.states())["a@1"]["state"] == "loaded"


async def test_only_administrators_may(
    files: Callable[[str], str], tmp_path: Path
) -> None:
    lines = "plain secret-number-one\nboss secret-number-two admin\n"
    keys = key_file(tmp_path, lines)

    async with serving(row(files("a")), api_key_file=keys) as running:
        for number, status in (("one", 403), ("two", 200)):
            bearer = f"Bearer secret-number-{number}"
            got = await running.ask("GET", "/admin/models", authorization=bearer)
            assert got.status == status
            for verb in ("load", "default", "unload"):
                reply = await running.ask(
                    "POST",
                    f"/admin/models/{verb}",
                    {"model": "a"},
                    authorization=bearer,
                )
                assert reply.status == status
        assert (await running.ask("GET", "/admin/models")).status == 401


async def test_an_added_file_that_fails_to_load_is_gone_again(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a"))) as running:
        running.engines.problem["new"] = es.EngineError("cracked")
        body = {"path": files("new"), "name": "n"}
        for _ in range(2):
            reply = await running.admin("load", **body)
            assert (reply.status, reply.error["code"]) == (503, "model_unavailable")
            assert "cracked" in reply.error["message"]
            assert set(await running.states()) == {"a@1"}
            assert (await running.embed("n")).status == 404
        del running.engines.problem["new"]
        assert (await running.admin("load", **body)).status == 200


async def test_the_same_file_twice_at_once_is_loaded_once(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a"))) as running:
        running.engines.hold("new")
        await running.engines.loading()
        body = {"path": files("new"), "name": "n"}
        first = asyncio.create_task(running.admin("load", **body))
        await running.engines.loading()
        second = await running.admin("load", **body)
        assert (second.status, second.error["code"]) == (409, "model_conflict")
        running.engines.let_go()
        assert (await first).status == 200
        assert running.engines.loads == ["a", "new"]
        assert running.engines.alive("new") == 1
        assert await running.answering("n") == "n@1"


async def test_the_same_file_under_two_names_is_two_models(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a"))) as running:
        replies = await asyncio.gather(
            *(running.admin("load", path=files("a"), name=n) for n in "xyz")
        )
        assert [r.status for r in replies] == [200] * 3
        assert running.engines.alive("a") == 4
        assert [await running.answering(n) for n in "xyz"] == ["x@1", "y@1", "z@1"]


async def test_loading_what_is_loading_waits_for_the_same_load(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a")), row(files("b"), preload=False)) as running:
        await running.engines.loading()
        running.engines.hold("b")
        ask = asyncio.create_task(running.embed("b"))
        await running.engines.loading()
        loads = [
            asyncio.create_task(running.admin("load", model="b")) for _ in range(3)
        ]
        open_now = running.service.connections.open
        await until(lambda: len(open_now) == 4, "all wait")
        running.engines.let_go()
        assert (await ask).status == 200
        assert [(await load).json["state"] for load in loads] == ["loaded"] * 3
        assert running.engines.loads == ["a", "b"]


def test_the_only_model_cannot_be_removed() -> None:
    known = registry(row("f", name="a"))
    with pytest.raises(es.ModelConflict, match="a@1 is the only model"):
        known.remove(known.entries[0])


async def test_one_of_two_versions_can_be_removed(files: Callable[[str], str]) -> None:
    rows = (row(files("a")), row(files("a2"), name="a", version=2))
    async with serving(*rows) as running:
        running.models.set_default(running.model("a@2"))
        engine = running.engines.last("a2")
        engine.block()
        ask = asyncio.create_task(running.embed("a"))
        await asyncio.to_thread(engine.wait_until_computing)
        running.models.remove(running.model("a@2"))
        assert await running.answering("a") == "a@1"
        assert (await running.embed("a@2")).status == 404
        running.sweep()
        assert not engine.is_closed
        engine.release()
        await ask
        await running.freed(engine)
        assert running.models.names.is_default(running.model("a@1"))


async def test_an_administrator_may_have_a_model_forgotten(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("a2"), name="a", version=2))
    async with serving(*rows) as running:
        await running.admin("load", path=files("n"))
        engine = running.engines.last("a2")
        engine.block()
        ask = asyncio.create_task(running.embed("a"))
        await asyncio.to_thread(engine.wait_until_computing)
        for name in ("a@2", "n"):
            reply = await running.admin("unload", model=name, forget=True)
            assert (reply.status, reply.json["state"]) == (200, "unloaded")
            assert (await running.embed(name)).status == 404
        assert set(await running.states()) == {"a@1"}
        assert await running.answering("a") == "a@1"
        engine.release()
        assert (await ask).status == 200  # it was accepted before
        await running.freed(engine)
        last = await running.admin("unload", model="a", forget=True)
        assert (last.status, last.error["code"]) == (409, "model_conflict")
        assert await running.answering("a") == "a@1"
        wrong = await running.admin("unload", model="a", forget="yes")
        assert (wrong.status, wrong.error["param"]) == (400, "forget")
        # And what was forgotten may come again.
        assert (await running.admin("load", path=files("n"))).status == 200
        assert await running.answering("n") == "n@1"


async def test_a_model_that_is_forgotten_while_it_loads_serves_who_waits_and_goes(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        await running.engines.loading()
        running.engines.hold("b")
        ask = asyncio.create_task(running.embed("b"))
        await running.engines.loading()
        await running.admin("unload", model="b", forget=True)
        running.engines.let_go()
        assert (await ask).status == 200
        await running.freed(running.engines.last("b"))
        assert await running.named_in_metrics() == {"a@1"}


async def test_who_asks_for_a_model_that_was_just_freed_is_told_to_try_again(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a"))) as running:
        pool = running.loaded_of("a@1").pool
        pool.queue.stop()
        for path, key in (("/v1/embeddings", "input"), ("/tokenize", "inputs")):
            reply = await running.ask("POST", path, {key: "a"})
            assert reply.status == 503, reply.body
            assert "retry-after" in reply.headers


# --- memory ---


async def test_a_load_beyond_the_ceiling_is_refused_with_the_numbers_and_others_go_on(
    files: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = [100 * MIB]
    monkeypatch.setattr(es, "resident_bytes", lambda: used[0])

    ceiling: dict[str, Any] = {"max_memory_mb": 200}
    rows = (row(files("a"), **ceiling), row(files("b"), preload=False, **ceiling))
    async with serving(*rows, **ceiling) as running:
        used[0] = 199 * MIB
        threads = threading.active_count()
        reply = await running.embed("b")
        assert (reply.status, reply.error["code"]) == (503, "model_unavailable")
        needed = kit.needed_bytes(rows[1], files("b")) >> 20
        said = f"take {needed} MiB of memory, 199 MiB are used and --max-memory-mb is"
        assert f"{said} 200" in reply.error["message"]
        assert running.engines.loads == ["a"]
        assert threading.active_count() <= threads + 1  # of the executor
        state = (await running.states())["b@1"]
        assert state["state"] == "unloaded"
        assert await running.metric('embellama_model_loaded{model="b@1"}') == 0
        assert await running.answering("a") == "a@1"
        used[0] = 100 * MIB
        pause_is_over(running, "b@1")
        assert await running.answering("b") == "b@1"


async def test_a_load_that_this_box_has_no_memory_for_is_refused_with_both_numbers(
    files: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(row(files("a")), row(files("b"), preload=False)) as running:
        monkeypatch.setattr(es, "free_memory_bytes", lambda: 7.5 * MIB)
        reply = await running.embed("b")
        assert reply.status == 503
        needed = kit.needed_bytes(running.model("b@1").settings, files("b")) >> 20
        said = f"take {needed} MiB of memory and 7 MiB are free"
        assert said in reply.error["message"]
        added = await running.admin("load", path=files("c"))
        assert (added.status, added.headers["retry-after"]) == (503, "10")
        assert "7 MiB are free" in added.error["message"]
        assert set(await running.states()) == {"a@1", "b@1"}
        assert running.engines.loads == ["a"]
        assert await running.answering("a") == "a@1"
        monkeypatch.setattr(es, "free_memory_bytes", lambda: 1e12)
        await running.admin("unload", model="a")
        assert await running.answering("b") == "b@1", "at once"


async def test_a_model_that_had_no_room_is_tried_again_once_another_has_done_its_work(
    files: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(row(files("a")), row(files("b"), preload=False)) as running:
        monkeypatch.setattr(es, "free_memory_bytes", lambda: 0.0)
        a = running.engines.last("a")
        with running.loaded_of("a@1").hold():
            await running.admin("unload", model="a")
            assert (await running.embed("b")).status == 503
            assert (await running.embed("b")).headers["retry-after"] == "10"
        await running.freed(a)
        assert (await running.embed("b")).status == 200


async def test_the_first_model_is_what_the_box_is_for_unless_a_ceiling_is_set(
    files: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "free_memory_bytes", lambda: 0.0)

    async with serving(row(files("a"))) as running:
        assert await running.answering() == "a@1"
    with pytest.raises(es.StartupError, match="0 MiB are free"):
        async with serving(row(files("a"), max_memory_mb=1)):
            pass
    with pytest.raises(es.StartupError, match="0 MiB are free"):
        async with serving(row(files("a")), row(files("b"))):
            pass


async def test_a_model_comes_back_to_a_box_that_it_has_alone(
    files: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "free_memory_bytes", lambda: 0.0)

    async with serving(row(files("a"))) as running:
        await running.admin("unload", model="a")
        await running.freed(running.engines.last("a"))
        assert await running.answering() == "a@1"


def test_what_a_model_may_take_grows_with_its_workers_and_its_cache(
    files: Callable[[str], str],
) -> None:
    def needed(**changes: Any) -> int:
        return kit.needed_bytes(kit.settings(**{"cache_mb": 0} | changes), files("a"))

    size = os.path.getsize(files("a"))
    one = needed()
    assert one > size
    assert needed(workers=3) - needed(workers=2) == needed(workers=2) - one > 0
    assert needed(cache_mb=5) - one == 5 * MIB


@pytest.mark.parametrize(
    ("pooling", "logits"),
    [*((name, "pooled") for name in ("auto", "last", "cls", "rank")), ("mean", "step")],
)
def test_a_decoder_may_take_room_for_logits_of_what_is_pooled_or_of_a_step(
    tmp_path: Path, pooling: str, logits: str
) -> None:
    path = str(models.tiny_causal(tmp_path))
    facts = es.facts_of(kit.settings(pooling=pooling), path)
    assert facts.logits == logits
    rows = 128 if logits == "step" else 2 * 5
    bare = dataclasses.replace(facts, n_vocab=0)
    for tokens in (512, 4096):
        own = es.context_bytes(facts, tokens, 5) - es.context_bytes(bare, tokens, 5)
        assert own == 4 * rows * facts.n_vocab


def test_an_encoder_takes_room_for_logits_for_a_moment(tmp_path: Path) -> None:
    path = str(models.tiny_bert(tmp_path))
    facts = es.facts_of(kit.settings(), path)
    assert facts.logits == "none"
    bare = dataclasses.replace(facts, n_vocab=0)
    one, two = (
        es.needed_bytes(chosen, facts) - es.needed_bytes(chosen, bare)
        for chosen in (kit.settings(workers=1), kit.settings(workers=2))
    )
    assert one == two > 4 * 256 * facts.n_vocab


# --- checksums ---


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("preload", [False, True])
async def test_a_file_with_another_checksum_is_refused_before_it_is_mapped(
    files: Callable[[str], str], tmp_path: Path, beside: bool, preload: bool
) -> None:
    wrong = "0" * 63 + "a"
    right = hashlib.sha256(Path(files("b")).read_bytes()).hexdigest()
    sums = tmp_path / "SHA256SUMS"
    said = {}
    if beside:
        sums.write_text(f"{'1' * 64}  other.gguf\n{wrong}  b.gguf\n")
    else:
        said = {"sha256": wrong.upper()}

    engines = Engines()
    rows = (row(files("a")), row(files("b"), preload=preload, **said))
    if preload:
        with pytest.raises(es.StartupError, match=f"{right} but must have {wrong}"):
            async with serving(*rows, engines=engines):
                pass
        assert engines.loads == ["a"]
        assert engines.alive("a") == 0
        return
    async with serving(*rows, engines=engines) as running:
        reply = await running.embed("b")
        assert reply.status == 503
        assert f"{right} but must have {wrong}" in reply.error["message"]
        assert engines.loads == ["a"]
        assert await running.answering("a") == "a@1"
        if beside:
            sums.write_text(f"{right} *./b.gguf\n")
            assert await running.answering("b") == "b@1"


async def test_a_checksum_that_is_told_counts_and_not_the_one_beside(
    files: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  a.gguf\n")
    right = hashlib.sha256(Path(files("a")).read_bytes()).hexdigest()

    async with serving(row(files("a"), sha256=right)) as running:
        assert await running.answering() == "a@1"


async def test_a_file_that_is_gone_when_it_is_wanted_is_refused(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a")), row(files("b"), preload=False)) as running:
        os.unlink(files("b"))
        reply = await running.embed("b")
        assert (reply.status, reply.error["code"]) == (503, "model_unavailable")
        assert "cannot be read" in reply.error["message"]
        Path(files("b")).write_bytes(es.GGUF_MAGIC + bytes(4))
        reply = await running.embed("b")
        assert reply.status == 503


# --- other models than before ---


async def reloaded(
    running: Several, *rows: es.Settings, **common: Any
) -> dict[str, Any]:
    """What a reload with these says that it did."""
    running.written.rows = rows
    running.written.common = dataclasses.replace(running.written.common, **common)
    reply = await running.ask("POST", "/admin/reload")
    assert reply.status == 200, reply.body
    return cast(dict[str, Any], reply.json)


async def test_a_reload_keeps_in_memory_what_it_can(
    files: Callable[[str], str],
) -> None:
    async with serving(
        row(files("a")), row(files("b")), row(files("c"), preload=False)
    ) as running:
        kept = running.loaded_of("b@1")
        gone = running.engines.last("a")
        said = await reloaded(
            running,
            row(files("b"), alias=("x",), prompt=("q=ask: ",), preload=False),
            row(files("c"), preload=False),
            row(files("d")),
            row(files("e"), preload=False),
        )
        assert said["loaded"] == ["d@1"]
        assert running.loaded_of("b@1") is kept
        assert await running.answering("x", prompt_name="q") == "b@1"
        assert await running.answering() == "b@1"
        assert (await running.embed("a")).status == 404
        states = {m: s["state"] for m, s in (await running.states()).items()}
        assert states == {
            "b@1": "loaded",
            "c@1": "unloaded",
            "d@1": "loaded",
            "e@1": "unloaded",
        }
        await running.freed(gone)
        assert running.engines.loads == ["a", "b", "d"]


@pytest.mark.parametrize(
    "changes",
    [{"workers": 2}, {"pooling": "cls"}, {"cache_mb": 2}, {"max_input_tokens": 16}],
    ids=str,
)
async def test_a_reload_loads_again_what_its_settings_change(
    files: Callable[[str], str], changes: dict[str, Any]
) -> None:
    async with serving(row(files("a")), row(files("b"))) as running:
        old = running.engines.last("a")
        old.block()
        ask = asyncio.create_task(running.embed("a"))
        await asyncio.to_thread(old.wait_until_computing)
        said = await reloaded(running, row(files("a"), **changes), row(files("b")))
        assert said["loaded"] == ["a@1"]
        running.sweep()
        assert not old.is_closed
        assert await running.answering("a") == "a@1"
        old.release()
        assert (await ask).status == 200
        await running.freed(old)
        assert running.engines.loads == ["a", "b", "a"]


async def test_a_reload_loads_a_file_that_has_changed(
    files: Callable[[str], str], tmp_path: Path
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        assert (await reloaded(running, *rows))["loaded"] == []
        new = tmp_path / "new"
        shutil.copy(files("a"), new)
        new.replace(files("a"))
        assert (await reloaded(running, *rows))["loaded"] == ["a@1"]
        assert running.engines.loads == ["a", "a"]


@pytest.mark.parametrize("kind", ["generate", "embed", "rank"])
def test_a_reload_loads_a_model_that_chats_when_its_template_has_changed(
    files: Callable[[str], str], tmp_path: Path, kind: str
) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}")
    settings = row(files("a"), chat_template=str(template))
    loaded: Any = types.SimpleNamespace(
        settings=settings,
        facts=es.ModelFacts(stamp=es.stamp_of(settings)),
        card=types.SimpleNamespace(kind=kind),
    )
    assert es._can_stay(loaded, settings)
    template.write_text("{{ messages[-1].content }}!")
    assert es._can_stay(loaded, settings) == (kind != "generate")
    Path(files("a")).write_bytes(b"another")
    assert not es._can_stay(loaded, settings)


@pytest.mark.parametrize("how", ["by hand", "as it was idle"])
async def test_a_reload_leaves_out_of_memory_what_was_unloaded(
    files: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    rows = (row(files("a")), row(files("b")))
    async with serving(*rows) as running:
        if how == "by hand":
            await running.admin("unload", model="b")
        else:
            running.model("b@1").used_at -= 1000
            running.models.sweep(500)
        await running.freed(running.engines.last("b"))
        monkeypatch.setattr(es, "free_memory_bytes", lambda: 0.0)
        said = await reloaded(running, *rows, log_level="warning")
        assert (said["changed"], said["loaded"]) == (["log_level"], [])
        monkeypatch.undo()
        assert running.engines.loads == ["a", "b"]
        assert await running.answering("b") == "b@1"


@pytest.mark.parametrize("was_asked", [False, True])
async def test_a_reload_loads_what_is_now_to_be_there_from_the_start(
    files: Callable[[str], str], was_asked: bool
) -> None:
    async with serving(row(files("a")), row(files("b"), preload=False)) as running:
        if was_asked:
            await running.answering("b")
            await running.admin("unload", model="b")
        assert (await reloaded(running, row(files("a")), row(files("b"))))[
            "loaded"
        ] == ["b@1"]


async def test_a_model_that_is_loading_is_judged_by_a_reload_as_if_it_were_there(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        await running.engines.loading()
        running.engines.hold("b")
        ask = asyncio.create_task(running.embed("b"))
        await running.engines.loading()
        running.written.rows = (
            rows[0],
            row(files("b"), preload=False, sha256="0" * 64),
        )
        reload = asyncio.create_task(running.ask("POST", "/admin/reload"))
        await until(lambda: running.server._reloading, "it has begun")
        running.engines.let_go()
        assert (await ask).status == 200
        assert (await reload).status == 409
        assert await running.answering("b") == "b@1"
        said = await reloaded(running, rows[0], row(files("b"), workers=2))
        assert said["loaded"] == ["b@1"]
        assert running.loaded_of("b@1").pool.settings.workers == 2


async def test_a_model_that_is_not_in_memory_has_the_kind_of_its_new_settings(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        assert (await running.states())["b@1"]["kind"] == "embed"
        await reloaded(running, rows[0], row(files("b"), preload=False, pooling="rank"))
        assert (await running.states())["b@1"]["kind"] == "rank"
        await reloaded(running, *rows)
        assert (await running.states())["b@1"]["kind"] == "embed"


async def test_a_look_at_a_file_does_not_undo_what_a_reload_has_learned(
    files: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        begun, go_on = threading.Event(), threading.Event()
        really = running.models._look_at_file

        def look(settings: es.Settings, **how: Any) -> es.ModelFacts:
            found = really(settings, **how)
            if settings.pooling == "auto":
                begun.set()
                kit.wait(go_on)
            return found

        monkeypatch.setattr(running.models, "_look_at_file", look)
        learning = asyncio.create_task(running.models.learn())
        await asyncio.to_thread(kit.wait, begun)
        await reloaded(running, rows[0], row(files("b"), preload=False, pooling="rank"))
        go_on.set()
        await learning
        assert (await running.states())["b@1"]["kind"] == "rank"


async def test_limits_that_change_at_once_are_those_of_every_model(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a")), row(files("b"), preload=False)) as running:
        await running.engines.loading()
        running.engines.hold("b")
        ask = asyncio.create_task(running.embed("b"))
        await running.engines.loading()
        rows = [row(files(stem), queue_size=10) for stem in "ab"]
        await reloaded(running, *rows, queue_size=10)
        running.engines.let_go()
        assert (await ask).status == 200
        assert (await running.admin("load", path=files("c"))).status == 200
        assert await running.metric("embellama_queue_limit_inputs") == 30
        rows = [row(files(stem), queue_size=7) for stem in "ab"]
        await reloaded(running, *rows, queue_size=7)
        assert await running.metric("embellama_queue_limit_inputs") == 21
        await running.admin("unload", model="c")
        assert (
            await running.answering("c") == "c@1"
        )  # it is loaded with what is in force
        assert await running.metric("embellama_queue_limit_inputs") == 21


async def test_after_a_reload_metrics_say_what_is_in_memory(
    files: Callable[[str], str],
) -> None:
    both = (row(files("a")), row(files("b")))
    async with serving(*both) as running:
        for name in ("a", "a", "b"):
            await running.answering(name)
        await reloaded(running, row(files("a"), workers=2))
        assert await running.named_in_metrics() == {"a@1"}
        assert await running.metric('embellama_model_loaded{model="a@1"}') == 1
        requests = 'embellama_model_requests_total{model="%s@1"}'
        assert await running.metric(requests % "a") == 2
        assert await running.completed() == 3  # there is no telling it from those of b
        await reloaded(running, *both)
        assert await running.metric(requests % "b") == 0
        await running.answering("b")
        assert await running.metric(requests % "b") == 1
        assert await running.completed() == 4


async def test_metrics_of_models_that_come_and_go_are_those_of_the_served_ones(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a"))) as running:
        before = await running.series()
        for number in range(5):
            reply = await running.admin("load", path=files("n"), version=number + 1)
            assert reply.status == 200
            assert await running.answering("n") == f"n@{number + 1}"
            assert await running.named_in_metrics() == {"a@1", f"n@{number + 1}"}
            engine = running.engines.last("n")
            engine.block()
            ask = asyncio.create_task(running.embed("n", input="last"))
            await asyncio.to_thread(engine.wait_until_computing)
            await running.admin("unload", model="n", forget=True)
            assert await running.series() == before
            engine.release()
            assert (await ask).status == 200
            assert await running.completed() == 2 * (number + 1)
        assert await running.series() == before


@pytest.mark.parametrize("which", ["load", "names", "file", "prompt"])
async def test_a_reload_that_fails_has_changed_nothing(
    files: Callable[[str], str], which: str
) -> None:
    rows = (row(files("a"), alias=("x",)), row(files("b")))
    async with serving(*rows) as running:
        before = list(running.models.entries)
        served = [one.loaded for one in before]
        new = [row(files("a"), workers=2), row(files("c")), row(files("d"))]
        if which == "load":
            running.engines.problem["d"] = es.EngineError("cracked")
        elif which == "names":
            new[2] = row(files("d"), alias=("c",))
        elif which == "prompt":
            new[0] = row(files("a"), default_prompt_name="nope")
        else:
            new[2] = row(files("d"), sha256="0" * 64)
        running.written.rows = tuple(new)
        reply = await running.ask("POST", "/admin/reload")
        assert (reply.status, reply.error["code"]) == (409, "reload_refused")
        assert "nothing has changed" in reply.error["message"]
        assert running.models.entries == before
        assert [one.loaded for one in before] == served
        assert await running.answering("x") == "a@1"
        assert await running.answering("b") == "b@1"
        assert (await running.embed("c")).status == 404
        # What had been loaded for it is let go.
        await until(
            lambda: (
                running.engines.alive("a") == 1
                and not running.engines.alive("c")
                and not running.engines.alive("d")
            ),
            "freed",
        )
        assert await running.metric('embellama_model_loaded{model="a@1"}') == 1
        for outcome, times in (("applied", 0), ("refused", 1)):
            name = f'embellama_config_reloads_total{{outcome="{outcome}"}}'
            assert await running.metric(name) == times


async def test_a_reload_leaves_alone_what_an_administrator_added(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a"))) as running:
        await running.admin("load", path=files("n"))
        kept = running.loaded_of("n@1")
        said = await reloaded(running, row(files("b")))
        assert said["loaded"] == ["b@1"]
        assert running.loaded_of("n@1") is kept
        assert await running.answering() == "b@1"


async def test_what_was_added_and_then_configured_is_the_configurations(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a"))) as running:
        await running.admin("load", path=files("n"))
        said = await reloaded(running, row(files("a")), row(files("n"), workers=2))
        assert said["loaded"] == ["n@1"]
        await reloaded(running, row(files("a")))
        assert set(await running.states()) == {"a@1"}


async def test_a_model_that_is_asked_for_during_a_reload_is_what_the_reload_says(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        await running.engines.loading()
        running.engines.hold("c")
        running.engines.hold("d")
        reload = asyncio.create_task(
            reloaded(
                running,
                row(files("a")),
                row(files("b"), preload=False, workers=2),
                row(files("c")),
                row(files("d")),
            )
        )
        await running.engines.loading()
        ask = asyncio.create_task(running.embed("b"))
        await until(lambda: running.model("b@1").loading, "b waits for its turn")
        running.engines.let_go("c")
        assert (await ask).status == 200  # as it was before
        running.engines.let_go("d")
        await reload
        await running.answering("b")
        assert running.loaded_of("b@1").pool.settings.workers == 2


async def test_a_model_that_an_administrator_adds_during_a_reload_is_there_once(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a"))) as running:
        await running.engines.loading()
        running.engines.hold("x")
        running.engines.hold("c")
        wanted = [row(files(stem)) for stem in "abxc"]
        reload = asyncio.create_task(reloaded(running, *wanted))
        await running.engines.loading()  # b
        await running.engines.loading()  # x, for the reload
        load = asyncio.create_task(running.admin("load", path=files("x")))
        await until(lambda: running.models._adding, "both are under way")
        running.engines.let_go("x")
        assert (await load).status == 200
        running.engines.let_go()
        await reload
        for stem in "abxc":
            assert await running.answering(stem) == f"{stem}@1"
        alive = running.engines.alive
        await until(
            lambda: [alive(stem) for stem in "abxc"] == [1] * 4,
            "the other is freed",
        )
        assert running.engines.loads.count("x") == 2, "the claim would say nothing"


async def test_an_administrator_whose_model_a_reload_removes_is_told_so(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        await running.engines.loading()
        running.engines.hold("b")
        load = asyncio.create_task(running.admin("load", model="b"))
        await running.engines.loading()
        await reloaded(running, rows[0])
        running.engines.let_go()
        assert (await load).status in (200, 404, 409)


async def test_a_default_version_that_was_set_is_forgotten_by_a_reload(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("a2"), name="a", version=2))
    async with serving(*rows) as running:
        await running.admin("default", model="a@1")
        assert await running.answering("a") == "a@1"
        await reloaded(running, *rows)
        assert await running.answering("a") == "a@2"


async def test_what_was_not_in_memory_is_not_loaded_by_a_reload_without_preload(
    files: Callable[[str], str],
) -> None:
    rows = [row(files(s), preload=s == "a") for s in "abc"]
    async with serving(*rows) as running:
        await running.answering("b")
        changed = [dataclasses.replace(one, workers=2) for one in rows]
        assert (await reloaded(running, *changed))["loaded"] == ["a@1", "b@1"]


async def test_two_reloads_at_once_are_one(files: Callable[[str], str]) -> None:
    async with serving(row(files("a"))) as running:
        await running.engines.loading()
        running.engines.hold("b")
        first = asyncio.create_task(reloaded(running, row(files("a")), row(files("b"))))
        await running.engines.loading()
        second = await running.ask("POST", "/admin/reload")
        assert second.status == 409
        assert await running.answering("a") == "a@1"
        running.engines.let_go()
        assert (await first)["loaded"] == ["b@1"]
        assert running.engines.alive("b") == 1


async def test_a_hangup_changes_the_models(files: Callable[[str], str]) -> None:
    async with serving(row(files("a"))) as running:
        running.written.rows = (row(files("b")),)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: " reloaded " in running.log.getvalue(), "reloaded")
        assert await running.answering() == "b@1"


# --- one model's trouble is not another's ---


async def test_a_broken_engine_is_one_models_trouble(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a")), row(files("b"))) as running:
        broken = running.loaded_of("b@1").pool.queue.breaker
        broken.judge(0.0, worked=False)
        broken._canary_at = float("inf")
        assert broken.is_open
        for _ in range(3):
            reply = await running.embed("b")
            assert (reply.status, reply.error["code"]) == (
                503,
                "engine_unavailable",
            )
            assert await running.answering("a") == "a@1"
        assert (await running.ask("GET", "/ready")).status == 200
        assert await running.metric("embellama_engine_broken") == 1
        running.loaded_of("a@1").pool.queue.breaker.judge(0.0, worked=False)
        assert (await running.ask("GET", "/ready")).status == 503


async def test_inputs_that_fail_in_one_model_fail_in_no_other(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a")), row(files("b"))) as running:
        running.engines.last("a").failures[kit.fake_id(kit.BOOM_WORD)] = 0
        for _ in range(10):
            assert (await running.embed("b", input=kit.BOOM_WORD)).status == 500
            assert (await running.embed("a", input=kit.BOOM_WORD)).status == 200


@pytest.mark.parametrize("limit", [{"queue_size": 4}, {"queue_tokens": 64}], ids=str)
async def test_a_full_queue_is_one_models_trouble(
    files: Callable[[str], str], limit: dict[str, Any]
) -> None:
    rows = [row(files(stem), **limit) for stem in "ab"]
    async with serving(*rows, **limit) as running:
        full = running.engines.last("b")
        full.block()
        texts = [f"x{n}" for n in range(40)]
        asks = [asyncio.create_task(running.embed("b", input=texts))]
        await asyncio.to_thread(full.wait_until_computing)
        for _ in range(3):
            reply = await running.embed("b", input=["y"] * 8)
            assert (reply.status, reply.error["code"]) == (503, "overloaded")
            assert await running.answering("a") == "a@1"
        other = running.engines.last("a")
        other.block()
        asks.append(asyncio.create_task(running.embed("a", input=texts)))
        await asyncio.to_thread(other.wait_until_computing)
        assert (await running.embed("a", input=["y"] * 8)).status == 503
        other.release()
        full.release()
        assert [(await ask).status for ask in asks] == [200, 200]


async def test_a_model_that_computes_for_long_holds_up_no_other(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a")), row(files("b"))) as running:
        slow = running.engines.last("b")
        slow.block()
        ask = asyncio.create_task(running.embed("b"))
        await asyncio.to_thread(slow.wait_until_computing)
        assert await running.metric('embellama_model_queue_inputs{model="b@1"}') == 1
        assert await running.metric('embellama_model_queue_inputs{model="a@1"}') == 0
        for _ in range(5):
            assert await running.answering("a") == "a@1"
        slow.release()
        assert (await ask).status == 200


async def test_one_models_call_that_never_ends_replaces_the_process_and_others_finish(
    files: Callable[[str], str],
) -> None:
    stuck_after = {"stuck_after_s": 0.1}
    rows = [row(files(stem), **stuck_after) for stem in "ab"]
    async with serving(*rows) as running:
        deaf = running.engines.last("b")
        deaf.is_deaf = True
        deaf.block()
        ask = asyncio.create_task(running.embed("b"))
        await asyncio.to_thread(deaf.wait_until_computing)
        queue = running.loaded_of("b@1").pool.queue
        begun = queue.clock()
        queue.clock = lambda: begun + 3600
        reply = await ask
        assert (reply.status, reply.error["code"]) == (503, "engine_unavailable")
        assert await running.task == 1  # for its parent to start another
        assert "replacing this process" in running.log.getvalue()


# --- who comes and goes at the same time ---


async def settle(turns: int = 20) -> None:
    """Let the event loop turn a few times."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def test_a_model_that_is_unloaded_just_as_it_was_loaded_answers_who_waited(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        await running.engines.loading()
        running.engines.hold("b")
        ask = asyncio.create_task(running.embed("b"))
        await running.engines.loading()
        waiting = running.model("b@1")
        task = waiting.loading
        assert task is not None

        def unload(_: object) -> None:
            running.models.unload(waiting)
            running.sweep()

        task.add_done_callback(unload)  # before whoever waits is told
        running.engines.let_go()
        async with asyncio.timeout(min(2.0, kit.DEADLINE_S)):
            reply = await ask
        assert reply.status in (200, 503), reply.body


async def test_the_model_that_is_named_is_the_one_that_computed(
    files: Callable[[str], str],
) -> None:
    rows = (
        row(files("a"), preload=False),
        row(files("a2"), name="a", version=2, preload=False),
        row(files("c")),
    )
    async with serving(*rows) as running:
        await running.engines.loading()
        running.engines.hold("a2")
        ask = asyncio.create_task(running.embed("a"))
        await running.engines.loading()
        await running.admin("default", model="a@1")
        running.engines.let_go()
        reply = await ask
        assert reply.headers["x-embellama-model"] == "a@2"
        assert running.engines.loads == ["c", "a2"]


async def test_who_waits_for_a_model_that_is_removed_meanwhile_gets_its_vectors(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        await running.engines.loading()
        running.engines.hold("b")
        ask = asyncio.create_task(running.embed("b"))
        await running.engines.loading()
        running.models.remove(running.model("b@1"))
        running.engines.let_go()
        assert (await ask).status == 200


async def test_a_model_that_is_removed_while_it_loads_is_let_go(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        await running.engines.loading()
        running.engines.hold("b")
        ask = asyncio.create_task(running.embed("b"))
        await running.engines.loading()
        running.models.remove(running.model("b@1"))
        running.engines.let_go()
        await ask
        async with asyncio.timeout(2):
            await running.freed(running.engines.last("b"))


@pytest.mark.parametrize("stays", [True, False], ids=["stays", "goes"])
def test_a_reload_while_a_model_loads_makes_no_second_one(
    files: Callable[[str], str], stays: bool
) -> None:
    async def check() -> None:
        rows = (row(files("a")), row(files("b"), preload=False))
        async with serving(*rows) as running:
            await running.engines.loading()
            running.engines.hold("b")
            ask = asyncio.create_task(running.embed("b"))
            await running.engines.loading()
            await reloaded(running, *(rows if stays else rows[:1]))
            running.engines.let_go()
            assert (await ask).status in (200, 200 if stays else 404)
            if stays:
                assert await running.answering("b") == "b@1"
            else:
                await until(lambda: not running.engines.alive("b"), "let go")
            assert running.engines.loads == ["a", "b"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit, "DEADLINE_S", min(5.0, kit.DEADLINE_S))
        run(check())


def test_an_administrator_who_leaves_while_a_file_is_added_leaves_nothing_behind(
    files: Callable[[str], str],
) -> None:
    async def check() -> None:
        async with serving(row(files("a"))) as running:
            await running.engines.loading()
            running.engines.hold("n")
            leave = await cut_off(running, "/admin/models/load", {"path": files("n")})
            await running.engines.loading()
            leave()
            await until(lambda: not running.service.connections.open, "left")
            running.engines.let_go()
            await until(lambda: running.engines.made["n"], "loaded")
            await until(
                lambda: (
                    bool(running.engines.alive("n"))
                    == (len(running.models.entries) == 2)
                ),
                "served or gone",
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit, "DEADLINE_S", min(5.0, kit.DEADLINE_S))
        run(check())


def test_an_administrator_who_leaves_in_the_middle_of_a_reload_leaves_nothing_behind(
    files: Callable[[str], str],
) -> None:
    async def check() -> None:
        async with serving(row(files("a"))) as running:
            await running.engines.loading()
            running.engines.hold("b")
            running.written.rows = (row(files("a")), row(files("b")))
            client = socket.create_connection((running.host, running.port))
            head = "POST /admin/reload HTTP/1.1\r\nhost: localhost\r\n"
            client.sendall(f"{head}{running.admin_lines()}\r\n".encode())
            await running.engines.loading()
            client.close()
            await until(lambda: not running.service.connections.open, "left")
            assert running.models.is_loading
            running.engines.let_go()
            await until(lambda: running.engines.made["b"], "loaded")
            await until(
                lambda: (
                    bool(running.engines.alive("b"))
                    == (len(running.models.entries) == 2)
                ),
                "served or gone",
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit, "DEADLINE_S", min(5.0, kit.DEADLINE_S))
        run(check())


async def test_a_model_whose_call_has_not_ended_is_not_idle(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a")), row(files("b"))) as running:
        deaf = running.engines.last("b")
        deaf.is_deaf = True
        deaf.block()
        leave = await cut_off(running, "/v1/embeddings", {"input": "a", "model": "b"})
        await asyncio.to_thread(deaf.wait_until_computing)
        leave()
        queue = running.loaded_of("b@1").pool.queue
        await until(lambda: not queue.backlog.inputs, "nobody waits")
        assert queue.busy == 1
        await running.admin("unload", model="b")
        running.sweep()
        assert running.models.retiring
        deaf.release()
        await running.freed(deaf)
        assert running.models.is_clean


async def test_memory_that_was_just_freed_is_there_for_the_next_model(
    files: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ceiling: dict[str, Any] = {"max_memory_mb": 1000}
    rows = (row(files("a"), **ceiling), row(files("b"), preload=False, **ceiling))
    engines = Engines()
    monkeypatch.setattr(es, "resident_bytes", lambda: 990 * MIB * engines.alive("a"))
    async with serving(*rows, engines=engines, **ceiling) as running:
        assert (await running.admin("unload", model="a")).status == 200
        assert (await running.admin("load", model="b")).status == 200


async def test_a_version_that_is_being_added_does_not_answer_before_it_is_there(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a"))) as running:
        await running.engines.loading()
        running.engines.hold("new")
        body = {"path": files("new"), "name": "a", "version": 2}
        load = asyncio.create_task(running.admin("load", **body))
        await running.engines.loading()
        running.engines.problem["new"] = es.EngineError("cracked")
        async with asyncio.timeout(2):
            assert await running.answering("a") == "a@1"
        running.engines.let_go()
        assert (await load).status == 503


async def test_unloading_while_it_loads_says_so_and_serves_who_waits(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows) as running:
        await running.engines.loading()
        running.engines.hold("b")
        ask = asyncio.create_task(running.embed("b"))
        await running.engines.loading()
        reply = await running.admin("unload", model="b")
        assert (reply.status, reply.json["state"]) == (200, "loading")
        running.engines.let_go()
        assert (await ask).status == 200
        assert running.engines.alive("b") == 1


async def test_many_who_load_unload_and_ask_at_once_all_get_answers(
    files: Callable[[str], str],
) -> None:
    rows = [row(files(stem), preload=False) for stem in "abc"]
    async with serving(*rows, idle_unload_s=0.001) as running:

        async def asks(stem: str) -> None:
            for n in range(15):
                assert (await running.embed(stem, input=f"{n}")).status == 200

        async def unloads(stem: str) -> None:
            for _ in range(15):
                assert (await running.admin("unload", model=stem)).status == 200
                running.sweep()
                await asyncio.sleep(0)

        who = (each(stem) for each in (asks, asks, unloads) for stem in "abc")
        await asyncio.gather(*who)
        for stem in "abc":
            await running.admin("unload", model=stem)
        await until(
            lambda: not any(running.engines.alive(stem) for stem in "abc"), "freed"
        )
        assert running.models.is_clean
        assert all(
            not engine.contexts_open
            for engines in running.engines.made.values()
            for engine in engines
        )


async def test_reloads_among_requests_refuse_nobody(
    files: Callable[[str], str],
) -> None:
    rows = [row(files(stem)) for stem in "ab"]
    async with serving(*rows) as running:
        is_over = False

        async def asks(stem: str) -> int:
            count = 0
            while not is_over:
                assert (await running.embed(stem, input=f"{count}")).status == 200
                count += 1
            return count

        clients = [asyncio.create_task(asks(stem)) for stem in "abab"]
        for workers in (2, 1, 2, 1):
            changed = [dataclasses.replace(one, workers=workers) for one in rows]
            assert (await reloaded(running, *changed))["loaded"] == ["a@1", "b@1"]
        is_over = True
        assert all(await asyncio.gather(*clients))
        await until(
            lambda: running.engines.alive("a") == running.engines.alive("b") == 1,
            "freed",
        )


# --- stopping ---


async def test_a_stop_waits_for_a_load_that_somebody_waits_for(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a")), row(files("b"), preload=False)) as running:
        await running.engines.loading()
        running.engines.hold("b")
        ask = asyncio.create_task(running.embed("b"))
        await running.engines.loading()
        running.server.stop()
        assert (await running.embed("b")).status == 503
        running.engines.let_go()
        assert (await ask).status == 200
        assert await running.task == 0
        assert running.server.is_clean
        for stem in "ab":
            assert running.engines.alive(stem) == 0


@pytest.mark.parametrize("what", ["request", "added", "reload"])
async def test_who_waits_for_a_load_that_outlives_the_drain_is_told(
    files: Callable[[str], str], what: str
) -> None:
    rows = (row(files("a")), row(files("b"), preload=False))
    async with serving(*rows, drain_timeout_s=0.1) as running:
        await running.engines.loading()
        running.engines.hold("b")
        running.engines.hold("c")
        asked: dict[str, Callable[[], Coroutine[Any, Any, kit.Reply]]] = {
            "request": lambda: running.embed("b"),
            "added": lambda: running.admin("load", path=files("c")),
            "reload": lambda: running.ask("POST", "/admin/reload"),
        }
        running.written.rows = (*rows, row(files("c")))
        ask = asyncio.create_task(asked[what]())
        await running.engines.loading()
        running.server.stop()
        try:
            assert await running.task == 0
            assert not running.server.is_clean  # so the program leaves at once
            reply = await ask
            assert (reply.status, reply.error["code"]) == (503, "not_ready")
        finally:
            ask.cancel()


async def test_a_stop_frees_what_was_unloaded_a_moment_ago(
    files: Callable[[str], str],
) -> None:
    async with serving(row(files("a")), row(files("b"))) as running:
        await running.admin("unload", model="b")
        running.sweep()
        running.server.stop()
        assert await running.task == 0
        assert running.engines.alive("a") == running.engines.alive("b") == 0
        assert running.server.is_clean


@pytest.mark.parametrize("is_idle", [False, True], ids=["unloaded", "idle"])
async def test_a_stop_frees_each_model_once_though_the_server_ticks_meanwhile(
    files: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, is_idle: bool
) -> None:
    async with serving(row(files("a")), row(files("b"))) as running:
        engines = [running.engines.last(stem) for stem in "ab"]
        begun, go_on = threading.Semaphore(0), threading.Event()

        def close(really: Callable[[], None]) -> None:
            begun.release()
            kit.wait(go_on)
            really()

        for engine in engines:
            slow = functools.partial(close, engine.close)
            monkeypatch.setattr(engine, "close", slow)
        if is_idle:
            running.pass_time(2)
        else:
            running.models.unload(running.model("b@1"))
        running.server.stop()
        await asyncio.to_thread(begun.acquire, timeout=kit.DEADLINE_S)
        running.models.sweep(1)  # the tick
        go_on.set()
        assert await running.task == 0
        assert running.server.is_clean
        await asyncio.get_running_loop().shutdown_default_executor()
        assert [engine.times_closed for engine in engines] == [1, 1]


async def test_a_stop_begins_no_load_that_waited_for_its_turn(
    files: Callable[[str], str],
) -> None:
    rows = (row(files("a")), *(row(files(stem), preload=False) for stem in "bc"))
    async with serving(*rows, drain_timeout_s=0.1) as running:
        await running.engines.loading()
        running.engines.hold("b")
        asks = [asyncio.create_task(running.embed(stem)) for stem in "bc"]
        await running.engines.loading()
        await until(lambda: running.model("c@1").loading is not None, "c's turn")
        running.server.stop()
        assert [(await ask).status for ask in asks] == [503, 503]
        running.engines.let_go()
        assert await running.task == 0
        await until(lambda: running.model("c@1").loading is None, "told")
        assert running.engines.loads == ["a", "b"]
        # Freed, or it came too late and the program leaves at once.
        assert running.server.is_clean == (running.engines.alive("b") == 0)
        assert " error " not in running.log.getvalue()


# --- the program itself ---


def ask(server: kit.Server, path: str, body: Any = None) -> tuple[int, Any, Any]:
    """Status, header fields and JSON of one request."""
    data = None if body is None else json.dumps(body).encode()
    kind = {"content-type": "application/json"}
    if path.startswith("/admin/"):
        kind |= server.admin_fields()
    request = urllib.request.Request(server.url + path, data, kind)
    try:
        with urllib.request.urlopen(request, timeout=kit.DEADLINE_S) as reply:
            return reply.status, reply.headers, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, json.load(error)


def vector(server: kit.Server, model: str, text: str = "abc") -> list[float]:
    """Of a text, by a model of that name."""
    status, _, reply = ask(server, "/v1/embeddings", {"input": text, "model": model})
    assert status == 200, reply
    return list(reply["data"][0]["embedding"])


def config(folder: Path, text: str) -> str:
    """A configuration file."""
    path = folder / "models.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> tuple[Path, Path]:
    """An encoder and a decoder."""
    return tiny, models.tiny_causal(tmp_path_factory.mktemp("causal"))


def test_the_program_serves_files_that_were_named_by_flags(
    two: tuple[Path, Path],
) -> None:
    flags = ("--model-path", f"a={two[0]}", "--model-path", f"b@3={two[1]}")
    with kit.started(*flags, "--workers", "1", module=(SCRIPT,)) as server:
        _, _, listed = ask(server, "/v1/models")
        assert [entry["id"] for entry in listed["data"]] == ["a", "b"]
        both = [vector(server, name) for name in ("a", "b@3")]
        assert vector(server, "b") == both[1] != both[0]
        status, fields, _ = ask(server, "/v1/embeddings", {"input": "x", "model": "b"})
        assert (status, fields["x-embellama-model"]) == (200, "b@3")
        assert ask(server, "/v1/embeddings", {"input": "x", "model": "b@1"})[0] == 404
        # Unloaded, loaded anew, under another name: the same vectors.
        assert ask(server, "/admin/models/unload", {"model": "b"})[0] == 200
        body = {"path": str(two[1]), "name": "c", "version": 7, "workers": 2}
        status, _, state = ask(server, "/admin/models/load", body)
        assert (status, state["model"], state["state"]) == (200, "c@7", "loaded")
        assert [vector(server, name) for name in ("b", "c@7")] == [both[1]] * 2
        assert server.stop() == 0


@pytest.mark.parametrize(
    "flags", [(), ("--max-input-tokens", "512"), ("--context-size", "4096")], ids=str
)
def test_props_of_a_chat_model_that_is_not_in_memory_are_what_its_file_says(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    flags = ("--model-path", f"c={chat_models.tiny_llama(tmp_path)}", *flags)
    with kit.started(*flags, module=(SCRIPT,)) as server:
        there = ask(server, "/props")[2]
        assert ask(server, "/admin/models/unload", {"model": "c"})[0] == 200
        gone = ask(server, "/props")[2]
        assert gone["is_sleeping"]
        assert gone["chat_template"] == there["chat_template"] != ""
        length = there["default_generation_settings"]["n_ctx"]
        assert gone["default_generation_settings"]["n_ctx"] == length
        assert server.stop() == 0


def test_the_program_serves_the_tables_of_its_file_and_reads_them_again(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    digest = hashlib.sha256(two[1].read_bytes()).hexdigest()
    a = f'[[models]]\nname = "a"\npath = "{two[0]}"\naliases = ["x", "y"]\n'
    b = (
        f'[[models]]\nname = "b"\nversion = 2\npath = "{two[1]}"\npreload = false\n'
        f'sha256 = "{digest}"\nprompts = {{ query = "ask: " }}\nworkers = 2\n'
    )
    flags = ("--config", config(tmp_path, f"workers = 1\n{a}{b}"))
    with kit.started(*flags, module=(SCRIPT,)) as server:
        states = {
            row["model"]: row for row in ask(server, "/admin/models")[2]["models"]
        }
        assert {m: s["state"] for m, s in states.items()} == {
            "a@1": "loaded",
            "b@2": "unloaded",
        }
        assert vector(server, "x") == vector(server, "y") == vector(server, "a")
        plain = vector(server, "b", "ask: abc")
        body = {"input": "abc", "model": "b", "prompt_name": "query"}
        assert ask(server, "/v1/embeddings", body)[2]["data"][0]["embedding"] == plain
        # Another checksum, and nothing changes; the right one, and it does.
        config(tmp_path, a + b.replace(digest, "0" * 64).replace("false", "true"))
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log("not reloaded, nothing has changed")
        assert vector(server, "b", "ask: abc") == plain
        config(tmp_path, f"workers = 1\n{b}")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log(" reloaded ")
        assert ask(server, "/v1/embeddings", {"input": "x", "model": "a"})[0] == 404
        assert vector(server, "b", "ask: abc") == plain
        assert server.stop() == 0


def test_the_program_refuses_a_wrong_checksum_at_its_start(
    two: tuple[Path, Path], tmp_path: Path
) -> None:
    table = f'[[models]]\npath = "{two[0]}"\nsha256 = "{"0" * 64}"\n'
    flags = ("--no-supervise", "--config", config(tmp_path, table))
    with kit.started(*flags, module=(SCRIPT,), wait_ready=False) as server:
        assert server.process.wait(kit.DEADLINE_S) == 1
        server.wait_for_log("but must have 0000")


def test_the_program_refuses_a_load_beyond_its_ceiling(
    two: tuple[Path, Path],
) -> None:
    flags = ("--model-path", str(two[0]), "--workers", "1", "--cache-mb", "0")
    ceiling = ("--max-memory-mb", "400", "--no-supervise")
    with kit.started(*flags, *ceiling, module=(SCRIPT,)) as server:
        before = vector(server, two[0].stem)
        body = {"path": str(two[1]), "workers": 200}
        status, _, reply = ask(server, "/admin/models/load", body)
        assert status == 503
        said = reply["error"]["message"]
        found = re.search(
            r"take ([0-9]+) MiB of memory, ([0-9]+) MiB are used and --max-memory-mb is "
            r"400",
            said,
        )
        assert found, said
        assert int(found[1]) >= 800
        assert 20 < int(found[2]) < 400
        assert vector(server, two[0].stem) == before
        assert len(ask(server, "/admin/models")[2]["models"]) == 1
        body["workers"] = 1
        assert ask(server, "/admin/models/load", body)[0] == 200
        assert server.stop() == 0


def lazily(tiny: Path, folder: Path, stem: str) -> tuple[str, ...]:
    """Flags of a supervised kit with a good model and one whose load goes wrong."""
    bad = folder / f"{stem}.gguf"
    shutil.copy(tiny, bad)
    tables = (
        f'[[models]]\npath = "{tiny}"\nname = "good"\n'
        f'[[models]]\npath = "{bad}"\nname = "bad"\npreload = false\n'
    )
    return ("--config", config(folder, f"workers = 1\n{tables}"))


def outcome(server: kit.Server, model: str) -> int:
    """The status of one request; 0: the connection was lost."""
    try:
        return ask(server, "/v1/embeddings", {"input": "a", "model": model})[0]
    except (OSError, http.client.HTTPException):
        return 0


@pytest.mark.parametrize("word", ["crash", "exit"])
def test_a_load_that_kills_the_process_is_started_over_and_others_are_served(
    tiny: Path, tmp_path: Path, word: str
) -> None:
    with kit.started(
        *lazily(tiny, tmp_path, word), module=("-m", "tests.kit", "supervised")
    ) as server:
        assert outcome(server, "good") == 200
        assert outcome(server, "bad") == 0
        server.wait_for_log(" ready ", 2)
        assert outcome(server, "good") == 200
        assert server.stop() == 0


@pytest.mark.parametrize("supervised", [True, False], ids=["supervised", "alone"])
def test_a_stop_while_a_load_does_not_end_is_obeyed_with_code_0(
    tiny: Path, tmp_path: Path, supervised: bool
) -> None:
    flags = [*lazily(tiny, tmp_path, "deaf"), "--drain-timeout-s", "0.2"]
    flags += [] if supervised else ["--no-supervise"]
    with kit.started(*flags, module=("-m", "tests.kit", "supervised")) as server:
        answers: list[int] = []
        waits = threading.Thread(
            target=lambda: answers.append(outcome(server, "bad")), daemon=True
        )
        waits.start()
        until_so(
            lambda: ask(server, "/admin/models")[2]["models"][1]["state"] == "loading",
            "it loads",
        )
        assert outcome(server, "good") == 200
        assert server.stop() == 0
        waits.join(kit.DEADLINE_S)
        assert answers and answers[0] in (0, 503)


def test_a_second_signal_does_not_wait_for_a_load(tiny: Path, tmp_path: Path) -> None:
    flags = [*lazily(tiny, tmp_path, "deaf"), "--drain-timeout-s", "3600"]
    with kit.started(*flags, module=("-m", "tests.kit", "supervised")) as server:
        waits = threading.Thread(target=outcome, args=(server, "bad"), daemon=True)
        waits.start()
        until_so(
            lambda: ask(server, "/admin/models")[2]["models"][1]["state"] == "loading",
            "it loads",
        )
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log(" draining ")
        assert server.stop() == 0
        waits.join(kit.DEADLINE_S)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model-path", "a=F", "--model-path", "a=F"), "this name and version"),
        (("--model-path", "a=F", "--model-path", "b=absent.gguf"), "No such file"),
        (("--model-path", "a=F", "--model-path", "b@0=F"), "version"),
        (
            ("--model-path", "a=F", "--model-path", "b=F", "--model-name", "c"),
            "several models",
        ),
        (
            ("--model-path", "a=F", "--model-path", "b=F", "--model-alias", "c"),
            "several models",
        ),
    ],
)
def test_models_that_cannot_be_are_refused_at_the_start(
    tiny: Path, flags: Sequence[str], said: str
) -> None:
    given = collections.defaultdict(list)
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        name = flag.removeprefix("--").replace("-", "_")
        given[name].append(value.replace("=F", f"={tiny}"))
    read: dict[str, Any] = dict(given)
    if "model_name" in read:
        read["model_name"] = read["model_name"][0]
    with pytest.raises(es.BadSetting, match=said):
        es.load_settings(read, {})


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("", "path"),
        ('path = ""', "path"),
        ('path = "F"\ncolour = 1', "colour.*no such setting"),
        ('path = "F"\nport = 1', "port.*no such setting"),
        ('path = "F"\nversion = 0', "version"),
        ('path = "F"\nversion = "1"', "version"),
        ('path = "F"\nshare = -1', "share"),
        ('path = "F"\naliases = "x"', "aliases"),
        ('path = "F"\naliases = [""]', "aliases"),
        ('path = "F"\nsha256 = "abc"', "sha256"),
        ('path = "F"\npooling = "max"', "pooling"),
        ('path = "F"\nprompts = { a = 1 }', "prompts"),
        ('path = "F"\nname = "x@2"', "name"),
        ('path = "F"\n[[models]]\npath = "F"', "this name and version"),
    ],
)
def test_a_table_that_cannot_be_is_refused_with_its_place(
    tiny: Path, tmp_path: Path, table: str, said: str
) -> None:
    path = config(tmp_path, "[[models]]\n" + table.replace("F", str(tiny)))
    with pytest.raises(es.BadSetting, match=said) as caught:
        es.load_settings({"config": path}, {})
    assert "models" in str(caught.value)


def test_what_a_table_leaves_out_is_as_it_is_for_all(
    tiny: Path, tmp_path: Path
) -> None:
    text = (
        'workers = 3\nbatch_tokens = 64\n[[models]]\npath = "F"\nname = "a"\n'
        'share = 1\n[[models]]\npath = "F"\nname = "a"\nversion = 2\nworkers = 1\n'
        'prompts = { query = "q: ", passage = "p: {text}." }\n'
    ).replace("F", str(tiny))
    path = config(tmp_path, text)
    read = es.load_settings({"config": path, "batch_tokens": "128"}, {})
    a1, a2 = read.models
    assert (a1.workers, a1.batch_tokens, a1.model_share) == (3, 128, 1.0)
    assert (a2.workers, a2.batch_tokens, a2.model_share) == (1, 128, 0.0)
    assert (a1.prompt, a2.prompt) == ((), ("query=q: ", "passage=p: {text}."))
    assert (a1.weights, a1.model_version, a2.model_version) == ("keep", 1, 2)
    # What --print-config shows is the same configuration.
    again = config(tmp_path, read.describe())
    assert es.load_settings({"config": again}, {}).models == read.models


def test_models_that_flags_or_variables_name_take_the_place_of_the_files_tables(
    tiny: Path, tmp_path: Path
) -> None:
    path = config(tmp_path, f'[[models]]\npath = "{tiny}"\nname = "a"\n')
    flag = es.load_settings({"config": path, "model_path": [f"b={tiny}"]}, {})
    assert [one.model_name for one in flag.models] == ["b"]
    named = {"EMBELLAMA_MODEL_PATH": str(tiny)}
    variable = es.load_settings({"config": path}, named)
    assert [es.name_of(one) for one in variable.models] == [tiny.stem]
