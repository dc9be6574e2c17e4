"""What people do with a server, as a whole: retrieval, imports, many dialects, a day.

Black box: the real program, real HTTP, and the default model, with tiny rerankers beside
it. Their weights are random, so what a rerank says is not judged, only whether it is said
of the right texts, and in order.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import json
import math
import random
import signal
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import pytest

from tests import kit, models, scenarios
from tests.scenarios import BOOK, NAME, chunks, client, embedded, query

pytestmark = pytest.mark.model

RANKER = "ranker"


def table(name: str, path: Path, **rows: object) -> str:
    """A [[models]] table."""
    rows = {"name": name, "path": str(path)} | rows
    said = (f"{key} = {json.dumps(value)}\n" for key, value in rows.items())
    return "[[models]]\n" + "".join(said)


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores pairs of up to 1,024 tokens; its weights are random."""
    return models.tiny_cross_encoder(tmp_path_factory.mktemp("ranker"), context=1024)


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, default_model: Path, ranker: Path
) -> Iterator[kit.Server]:
    """The default model and a ranker; nothing is answered from a cache."""
    config = tmp_path_factory.mktemp("config") / "two.toml"
    config.write_text(
        "cache_mb = 0\nqueue_size = 8192\nqueue_tokens = 4194304\n"
        + table(NAME, default_model)
        + table(RANKER, ranker, workers=1)
    )
    with kit.started("--config", str(config), module=scenarios.PROGRAM) as running:
        yield running


@pytest.fixture
def asker(server: kit.Server) -> Iterator[httpx.Client]:
    """A connection to it."""
    with client(server.url) as made:
        yield made


# --- 1. retrieval ---

# A question, and words of the chunks that answer it: read and judged by hand. Of the
# first ones the answer comes first, of the others among the first three.
FIRST = (
    (
        "What happens to me if I break the rules, and how can I be forgiven?",
        "reinstated",
    ),
    ("Am I paid damages when the software loses my data?", "IN NO EVENT"),
    (
        "May programs meet the terms of Affero when they are put together?",
        "under version 3 of the GNU Affero",
    ),
    (
        "I must obey a judge, and cannot obey these terms as well. What now?",
        "If conditions are imposed on you",
    ),
    (
        "What should a command line tool print when it starts?",
        "short notice like this when it starts",
    ),
    ("May the authors' names be used for advertising or publicity?", "trade names"),
    ("Offering the code by post for three years", "valid for at least three years"),
    (
        "Downloading the code from another host than the binaries",
        "may be on a different server",
    ),
    ("Receiving a copy by torrent", "peer-to-peer"),
    (
        "The standard library and the kernel that come with a compiler",
        "System Libraries",
    ),
    (
        "Extra permissions on top, which one may take away again",
        "additional permissions",
    ),
)
AMONG_THREE = (
    (
        "Is the software guaranteed to be free of defects?",
        "THERE IS NO WARRANTY FOR THE PROGRAM",
    ),
    (
        "A country's law does not accept the disclaimer",
        "Interpretation of Sections 15 and 16",
    ),
    ("Which inventions does a contributor's grant cover?", "essential patent claims"),
)
QUESTIONS = [*(text for text, _ in FIRST), *(text for text, _ in AMONG_THREE)]
MARGIN = 0.03  # of cosine, above the first chunk that would make it wrong


@pytest.fixture(scope="module")
def passages() -> list[str]:
    """The text in pieces."""
    return chunks(BOOK.read_text())


@pytest.fixture(scope="module")
def index(server: kit.Server, passages: list[str]) -> Any:
    """Their vectors, in order, asked for in batches."""
    with client(server.url) as asker:
        parts = [
            embedded(asker, batch)
            for batch in (passages[n : n + 16] for n in range(0, len(passages), 16))
        ]
    return np.concatenate(parts)


def ranking(cosines: Any) -> list[int]:
    """Places, the best first; of equal ones the earlier."""
    return [int(place) for place in np.argsort(-np.asarray(cosines), kind="stable")]


def test_the_text_is_the_whole_of_it_in_pieces_a_model_can_read(
    passages: list[str], index: Any
) -> None:
    words = BOOK.read_text().split()
    assert " ".join(passages).split() == words
    assert 50 < len(passages) < 100
    assert index.shape == (len(passages), 384)


@pytest.mark.parametrize(
    ("question", "answer", "places"),
    [(*one, 1) for one in FIRST] + [(*one, 3) for one in AMONG_THREE],
)
def test_a_question_in_other_words_finds_its_passage(
    asker: httpx.Client,
    passages: list[str],
    index: Any,
    question: str,
    answer: str,
    places: int,
) -> None:
    right = {n for n, text in enumerate(passages) if answer in text}
    assert 1 <= len(right) <= 5, "it tells nothing"
    cosines = index @ embedded(asker, [question])[0]
    wrong = [cosines[n] for n in ranking(cosines) if n not in right]
    best = max(cosines[n] for n in right)
    assert best > wrong[places - 1] + MARGIN


def test_the_same_pipeline_through_teis_routes_ranks_the_same(
    asker: httpx.Client, passages: list[str], index: Any
) -> None:
    found = np.array(asker.post("/embed", json={"inputs": passages}).json())
    assert (found * index).sum(axis=1).min() > 0.9999
    asked = np.array(asker.post("/embed", json={"inputs": QUESTIONS}).json())
    direct = embedded(asker, QUESTIONS) @ index.T
    for one, other in zip(asked @ found.T, direct, strict=True):
        assert is_same_order(one, other)
    for number in range(0, len(QUESTIONS), 7):
        inputs = {"source_sentence": QUESTIONS[number], "sentences": passages}
        cosines = asker.post("/similarity", json={"inputs": inputs}).json()
        assert np.abs(np.array(cosines) - direct[number]).max() < CALLS_DIFFER
        assert is_same_order(cosines, direct[number])


# What an input's company in a call changes of a cosine: flash attention rounds.
CALLS_DIFFER = 5e-3


def is_same_order(one: Any, other: Any) -> bool:
    """Whether both rank alike, but for what is as good as equal."""
    sorted_by_one = np.asarray(other)[ranking(one)]
    return bool((np.diff(sorted_by_one) < 2 * CALLS_DIFFER).all())


def recall(reference: Any, cosines: Any, among: int = 10) -> float:
    """The part of the first so many that are among the first so many."""
    best = set(ranking(reference)[:among])
    return len(best & set(ranking(cosines)[:among])) / among


def as_type(asker: httpx.Client, texts: Sequence[str], dtype: str) -> Any:
    """Vectors as numbers of a type, as bytes on the wire."""
    body = {"input": texts, "encoding_format": "bytes", "output_dtype": dtype}
    reply = asker.post("/v1/embeddings", json=body)
    assert reply.headers["x-embedding-count"] == str(len(texts))
    numbers = {"int8": np.int8, "ubinary": np.uint8}[dtype]
    return np.frombuffer(reply.content, numbers).reshape(len(texts), -1)


@pytest.mark.parametrize(("dtype", "least"), [("int8", 0.9), ("ubinary", 0.6)])
def test_smaller_numbers_find_most_of_the_same_passages(
    asker: httpx.Client, passages: list[str], index: Any, dtype: str, least: float
) -> None:
    small = as_type(asker, passages, dtype)
    assert small.nbytes == index.nbytes // {"int8": 4, "ubinary": 32}[dtype]
    questions = as_type(asker, QUESTIONS, dtype)
    exact = embedded(asker, QUESTIONS) @ index.T
    if dtype == "int8":
        found = questions.astype(int) @ small.T.astype(int)
    else:
        bits, asked = np.unpackbits(small, axis=1), np.unpackbits(questions, axis=1)
        found = np.array([-(bits != one).sum(axis=1) for one in asked])
    recalls = [recall(one, other) for one, other in zip(exact, found, strict=True)]
    assert statistics.mean(recalls) >= least
    # What is fetched with small numbers and ranked with exact ones is as good as exact.
    firsts = [ranking(one)[0] for one in exact]
    assert all(
        first in ranking(one)[:10] for first, one in zip(firsts, found, strict=True)
    )


def reranked(
    asker: httpx.Client, question: str, texts: Sequence[str], **more: Any
) -> Any:
    """What /v1/rerank says."""
    body = {"model": RANKER, "query": question, "documents": texts, **more}
    reply = asker.post("/v1/rerank", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()["results"]


@pytest.mark.parametrize("question", QUESTIONS[::4])
def test_what_was_found_is_reranked_by_its_own_scores(
    asker: httpx.Client, passages: list[str], index: Any, question: str
) -> None:
    cosines = index @ embedded(asker, [question])[0]
    texts = [passages[place] for place in ranking(cosines)[:10]]
    results = reranked(asker, question, texts, return_documents=True)
    assert sorted(one["index"] for one in results) == list(range(10))
    scores = [one["relevance_score"] for one in results]
    assert scores == sorted(scores, reverse=True)
    assert max(scores) - min(scores) > 4 * CALLS_DIFFER, "it tells nothing"
    for one in results:
        assert one["document"]["text"] == texts[one["index"]]
        (alone,) = reranked(asker, question, [texts[one["index"]]])
        assert math.isclose(
            alone["relevance_score"], one["relevance_score"], abs_tol=CALLS_DIFFER
        )
    best = reranked(asker, question, texts, top_n=3)
    assert len(best) == 3
    for cut, whole in zip(best, results, strict=False):
        assert math.isclose(
            cut["relevance_score"], whole["relevance_score"], abs_tol=CALLS_DIFFER
        )


# --- 2. an import beside queries ---


@pytest.mark.heavy
@pytest.mark.parametrize("priority", ["normal", "low"])
def test_a_query_beside_an_import_waits_for_a_few_batches_only(
    server: kit.Server,
    asker: httpx.Client,
    record_property: Callable[[str, object], None],
    priority: str,
) -> None:
    seed = ("normal", "low").index(priority)
    sizes = (2048, 1024, 512, 256)
    texts = scenarios.lines(8, seed=100 + seed)
    alone = [query(asker, next(texts)).seconds for _ in range(20)]
    batches = scenarios.metric(asker, "embellama_batches_total")
    work = scenarios.batches(sizes, 10, seed)
    asked = []
    load = scenarios.Import(server.url, work, clients=3, priority=priority)
    with load:
        while load.is_running:
            asked.append(query(asker, next(texts)))
        load.finish()
    assert (load.texts, load.requests, load.refusals) == (sum(sizes), len(sizes), 0)
    for text, vector in load.samples:
        assert embedded(asker, [text])[0] @ vector > 0.999
    batches = scenarios.metric(asker, "embellama_batches_total") - batches
    beside = [one for one in asked if one.waiting > 200]  # there was much to wait for
    assert len(beside) >= 10
    seconds = [one.seconds for one in beside]
    figures = {
        "alone_p50_ms": statistics.median(alone) * 1e3,
        "beside_p50_ms": statistics.median(seconds) * 1e3,
        "beside_p99_ms": statistics.quantiles(seconds, n=100)[98] * 1e3,
        "packs_p50": statistics.median(one.batches for one in beside),
        "packs_most": max(one.batches for one in beside),
        "packs_in_all": batches,
        "texts_per_s": load.texts / load.took_s,
    }
    for name, value in figures.items():
        record_property(name, round(value, 1))
    print(priority, len(beside), {k: round(v, 1) for k, v in figures.items()})
    assert figures["packs_p50"] <= 10
    assert figures["packs_most"] <= max(30, batches / 4)
    # In its turn it would have waited for most of the import.
    assert statistics.median(seconds) < load.took_s / 8
    assert statistics.median(seconds) < 1 + 100 * statistics.median(alone)


# --- 3. dialects at once ---

SENTENCES = [
    f"{subject} {verb} {place}."
    for subject in ("The cat", "My bank", "A storm", "Her violin")
    for verb in ("sleeps", "burns down", "was sold", "sings")
    for place in ("on the sofa", "in Lisbon", "after the war")
]
ASKED = ["who is there", "what is the time", "the state of the world", "my work"]
MODEL_OF = {"vectors": f"{NAME}@1", "scores": f"{RANKER}@1"}
Judged = tuple[httpx.Response, str]  # the answer, and a key of MODEL_OF


class Expected:
    """What each text and each pair comes to, asked for one after the other."""

    def __init__(self, asker: httpx.Client) -> None:
        self.vectors = {text: embedded(asker, [text])[0] for text in SENTENCES}
        self.scores = {
            (question, text): reranked(asker, question, [text])[0]["relevance_score"]
            for question in ASKED
            for text in SENTENCES
        }

    def check_vectors(
        self, texts: Sequence[str], found: Any, least: float = 0.999
    ) -> None:
        """Whatever their length and scale."""
        rows = np.asarray(found, np.float64)
        assert len(rows) == len(texts)
        wanted = np.array([self.vectors[text][: rows.shape[1]] for text in texts])
        cosines = (rows * wanted).sum(axis=1)
        cosines /= np.linalg.norm(rows, axis=1) * np.linalg.norm(wanted, axis=1)
        assert cosines.min() > least

    def check_scores(
        self, question: str, texts: Sequence[str], found: list[tuple[int, float]]
    ) -> None:
        """Pairs of index and score, best first."""
        assert sorted(place for place, _ in found) == list(range(len(texts)))
        assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)
        for place, score in found:
            wanted = self.scores[question, texts[place]]
            assert math.isclose(score, wanted, abs_tol=CALLS_DIFFER)


def _openai(
    expected: Expected, asker: httpx.Client, _: str, texts: list[str]
) -> Judged:
    reply = asker.post("/v1/embeddings", json={"model": NAME, "input": texts})
    found = reply.json()
    assert [one["index"] for one in found["data"]] == list(range(len(texts)))
    expected.check_vectors(texts, [one["embedding"] for one in found["data"]])
    return reply, "vectors"


def _base64(
    expected: Expected, asker: httpx.Client, _: str, texts: list[str]
) -> Judged:
    body = {"model": NAME, "input": texts, "encoding_format": "base64"}
    reply = asker.post("/v1/embeddings", json=body | {"dimensions": 256})
    found = scenarios.vectors_in(reply)
    assert found.shape == (len(texts), 256)
    expected.check_vectors(texts, found)
    return reply, "vectors"


def _int8(expected: Expected, asker: httpx.Client, _: str, texts: list[str]) -> Judged:
    body = {"model": NAME, "input": texts, "encoding_format": "bytes"}
    reply = asker.post("/v1/embeddings", json=body | {"output_dtype": "int8"})
    found = np.frombuffer(reply.content, np.int8).reshape(len(texts), -1)
    # Most of 384 numbers of a vector of length 1 are below 0.1: 13 steps of an int8.
    expected.check_vectors(texts, found, least=0.997)
    return reply, "vectors"


def _tei(expected: Expected, asker: httpx.Client, _: str, texts: list[str]) -> Judged:
    body = {"model": NAME, "inputs": texts, "normalize": False}
    reply = asker.post("/embed", json=body)
    expected.check_vectors(texts, reply.json())
    return reply, "vectors"


def _similarity(
    expected: Expected, asker: httpx.Client, _: str, texts: list[str]
) -> Judged:
    inputs = {"source_sentence": texts[0], "sentences": texts}
    reply = asker.post("/similarity", json={"model": NAME, "inputs": inputs})
    rows = np.array([expected.vectors[text] for text in texts])
    assert np.abs(np.array(reply.json()) - rows @ rows[0]).max() < CALLS_DIFFER
    return reply, "vectors"


def _seed(expected: Expected, asker: httpx.Client, _: str, texts: list[str]) -> Judged:
    reply = asker.post("/api/v1/embed", json={"model": NAME, "inputs": texts})
    found = [one["embedding"] for one in reply.json()["data"]]
    expected.check_vectors(texts, found)
    return reply, "vectors"


def _ollama(
    expected: Expected, asker: httpx.Client, _: str, texts: list[str]
) -> Judged:
    reply = asker.post("/api/embed", json={"model": f"{NAME}:latest", "input": texts})
    expected.check_vectors(texts, reply.json()["embeddings"])
    return reply, "vectors"


def _cohere(
    expected: Expected, asker: httpx.Client, q: str, texts: list[str]
) -> Judged:
    body = {"model": RANKER, "query": q, "documents": texts}
    reply = asker.post("/v2/rerank", json=body)
    results = reply.json()["results"]
    found = [(one["index"], one["relevance_score"]) for one in results]
    expected.check_scores(q, texts, found)
    return reply, "scores"


def _tei_rank(
    expected: Expected, asker: httpx.Client, q: str, texts: list[str]
) -> Judged:
    body = {"model": RANKER, "query": q, "texts": texts, "return_text": True}
    reply = asker.post("/rerank", json=body)
    results = reply.json()
    assert [one["text"] for one in results] == [texts[one["index"]] for one in results]
    found = [(one["index"], one["score"]) for one in results]
    expected.check_scores(q, texts, found)
    return reply, "scores"


DIALECTS = (
    _openai,
    _cohere,
    _base64,
    _tei,
    _tei_rank,
    _int8,
    _similarity,
    _seed,
    _ollama,
)
CLIENTS, ROUNDS = 8, 45


@pytest.mark.slow
def test_many_dialects_and_two_models_at_once_do_not_mix(server: kit.Server) -> None:
    with client(server.url) as asker:
        expected = Expected(asker)
    rows = np.array([*expected.vectors.values()])
    cosines = rows @ rows.T - 2 * np.eye(len(rows))
    assert cosines.max() < 0.99, "another text's vector would pass"
    scores = np.array([*expected.scores.values()])
    assert scores.std() > 4 * CALLS_DIFFER, "another pair's score would pass"

    def run(number: int) -> int:
        chance = random.Random(number)
        with client(server.url) as asker:
            for turn in range(ROUNDS):
                # Each has a dialect of its own at any moment, and all of them in the end.
                ask = DIALECTS[(number + turn) % len(DIALECTS)]
                texts = chance.sample(SENTENCES, chance.randint(1, 12))
                reply, kind = ask(expected, asker, chance.choice(ASKED), texts)
                assert reply.status_code == 200
                assert reply.headers["x-embellama-model"] == MODEL_OF[kind]
        return ROUNDS

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as threads:
        assert sum(threads.map(run, range(CLIENTS))) == CLIENTS * ROUNDS


# --- 4. a day ---


class Everyday:
    """Clients that ask all the time, and what each answer was wrong about.

    They leave when an answer says Connection: close, as it does before the server goes.
    """

    def __init__(self, url: str) -> None:
        self.faults: list[str] = []
        self.answered = 0
        self._url = url
        self._changed = threading.Condition()
        self._is_over = False
        asks = (self.bare, self.named, self.rank, self.unnamed)
        self._threads = [threading.Thread(target=self._run, args=(a,)) for a in asks]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self.leave()

    def leave(self) -> None:
        """Wait until each has been told to go elsewhere."""
        for thread in self._threads:
            thread.join(kit.DEADLINE_S)

    def wait_for(self, more: int = 40) -> None:
        """Until so many more were answered."""
        with self._changed:
            until = self.answered + more
            self._changed.wait_for(
                lambda: self.answered >= until or self.faults, kit.DEADLINE_S
            )
            assert self.answered >= until, self.faults

    def bare(self, asker: httpx.Client, text: str) -> httpx.Response:
        """By a name that has one version, or two; for another user each time."""
        reply = asker.post("/v1/embeddings", json=asks("m", text, user=text))
        check_version(reply)
        return reply

    def named(self, asker: httpx.Client, text: str) -> httpx.Response:
        """By name and version."""
        reply = asker.post("/v1/embeddings", json=asks("m@1", text))
        assert check_version(reply) == 1
        return reply

    def rank(self, asker: httpx.Client, text: str) -> httpx.Response:
        """The other model."""
        body = {"model": RANKER, "query": "who", "texts": [text, "time"]}
        reply = asker.post("/rerank", json=body)
        assert len(reply.json()) == 2
        return reply

    def unnamed(self, asker: httpx.Client, text: str) -> httpx.Response:
        """In another dialect, and by no name."""
        reply = asker.post("/embed", json={"inputs": [text]})
        numbers = {"m@1": 384, "m@2": 32}[reply.headers["x-embellama-model"]]
        assert len(reply.json()[0]) == numbers
        return reply

    def _run(self, ask: Callable[[httpx.Client, str], httpx.Response]) -> None:
        with client(self._url) as asker:
            for number in itertools.count():
                if self._is_over:
                    return
                fault, is_last = "", False
                try:
                    reply = ask(asker, f"{ask.__name__[:2]} {number}")
                    assert reply.status_code == 200
                    is_last = reply.headers.get("connection") == "close"
                except Exception as error:
                    fault = f"{ask.__name__} {number}: {error!r}"
                with self._changed:
                    if fault:
                        self.faults.append(fault)
                    self.answered += not fault
                    self._changed.notify_all()
                if fault or is_last:
                    return


def asks(model: str, text: str, **more: object) -> dict[str, object]:
    """The body of a request for a text's vector."""
    return {"model": model, "input": text, **more}


def check_version(reply: httpx.Response) -> int:
    """Which version of m answered; asserts that the vector is that one's."""
    assert reply.status_code == 200, reply.text
    version = {"m@1": 1, "m@2": 2}[reply.headers["x-embellama-model"]]
    vector = reply.json()["data"][0]["embedding"]
    assert len(vector) == {1: 384, 2: 32}[version]
    return version


def versions(asker: httpx.Client, model: str = "m", users: int = 40) -> list[int]:
    """The version that each of many users gets."""
    return [
        check_version(
            asker.post("/v1/embeddings", json=asks(model, "same", user=f"user {n}"))
        )
        for n in range(users)
    ]


def administer(asker: httpx.Client, verb: str, **body: object) -> Any:
    """Load, unload or default."""
    reply = asker.post(f"/admin/models/{verb}", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def states(asker: httpx.Client) -> dict[str, str]:
    """Of every model."""
    rows = asker.get("/admin/models").json()["models"]
    return {row["model"]: row["state"] for row in rows}


RELOADED = " info    reloaded "


@contextlib.contextmanager
def opened(
    tmp_path: Path, text: str
) -> Iterator[tuple[kit.Server, Callable[..., None], httpx.Client]]:
    """A server by a file, what writes another one and has it read, and a client."""
    config = tmp_path / "day.toml"
    config.write_text(text)
    reads = itertools.count(1)
    flags = ("--config", str(config), "--drain-grace-s", "600")
    with (
        kit.started(*flags, module=scenarios.PROGRAM) as server,
        client(server.url) as asker,
    ):
        asker.headers.update(server.admin_fields())

        def reread(other: str, said: str = RELOADED) -> None:
            config.write_text(other)
            server.process.send_signal(signal.SIGHUP)
            server.wait_for_log(said, next(reads) if said == RELOADED else 1)

        yield server, reread, asker


@pytest.mark.slow
def test_no_request_fails_on_a_day_of_loads_splits_reloads_and_a_stop(
    tmp_path: Path, default_model: Path, ranker: Path
) -> None:
    tiny = models.tiny_bert(tmp_path)

    def m(**rows: object) -> str:
        return table("m", default_model, workers=1, **rows)

    def second(**rows: object) -> str:
        return table("m", tiny, version=2, workers=1, **rows)

    other = table(RANKER, ranker, workers=1)
    with (
        opened(tmp_path, m() + other) as (server, reread, asker),
        Everyday(server.url) as day,
    ):
        day.wait_for()
        assert set(versions(asker)) == {1}

        # A third one: its name then means the highest version.
        loaded = administer(
            asker, "load", path=str(tiny), name="m", version=2, workers=1
        )
        assert (loaded["state"], loaded["is_default"]) == ("loaded", True)
        assert set(versions(asker)) == {2}
        day.wait_for()

        # Half of the users each; what is in memory stays there.
        reread(m(share=0.5) + second(share=0.5) + other)
        split = versions(asker)
        assert 10 <= split.count(1) <= 30
        assert versions(asker) == split, "a user changed versions"
        day.wait_for()

        # One of them for everybody, and the other out of memory until it is wanted.
        administer(asker, "default", model="m@1")
        assert set(versions(asker)) == {1}
        administer(asker, "unload", model="m@2")
        assert states(asker)["m@2"] == "unloaded"
        day.wait_for()
        assert set(versions(asker, "m@2", users=1)) == {2}
        assert states(asker)["m@2"] == "loaded"

        # A file that is no use changes nothing; a good one, all that it says.
        reread(m(share=-1) + other, "not reloaded")
        assert set(states(asker)) == {"m@1", "m@2", f"{RANKER}@1"}
        reread(m(aliases=["short"]) + table(RANKER, ranker, workers=2))
        assert set(versions(asker, "short")) == {1}
        assert set(states(asker)) == {"m@1", f"{RANKER}@1"}
        gone = asker.post("/v1/embeddings", json=asks("m@2", "a"))
        assert gone.status_code == 404
        day.wait_for()

        # It says that it will go, the clients go elsewhere, and then it goes.
        server.process.send_signal(signal.SIGTERM)
        day.leave()
        assert asker.get("/ready").status_code == 503
        assert server.stop(signal.SIGINT) == 0
    assert day.faults == []
    assert day.answered > 200
