"""Scenarios: what people do with a server, as a whole.

tests/test_scenarios.py asserts them. ``python -m tests.scenarios`` runs the import beside
queries for a minute, with the default model, and prints a line for README.
"""

from __future__ import annotations

import base64
import itertools
import re
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np

import embellama_server as es
from tests import kit
from tests.words import WORDS

PROGRAM = (str(kit.ROOT / "embellama_server.py"),)
# The GNU GPL 3, whose first lines allow verbatim copies of it (it is not our licence): a
# real text of 35 KB, and a hard one, whose paragraphs are all about the same few things.
BOOK = Path(__file__).parent / "cases" / "gpl-3.0.txt"
NAME = "all-MiniLM-L6-v2"
_A_QUERY_EVERY_S = 0.2
_SAMPLE_BATCHES = 8  # of an import, of each of which a text is asked again alone


def chunks(text: str, most: int = 700) -> list[str]:
    """Paragraphs, put together up to so many characters; a numbered title begins one."""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    found: list[str] = []
    now = ""
    for paragraph in filter(None, paragraphs):
        is_title = re.match(r"[0-9]+\. [A-Z].{0,80}$", paragraph)
        if now and (is_title or len(now) + len(paragraph) >= most):
            found.append(now)
            now = ""
        now = f"{now} {paragraph}".strip()
    return [*found, now]


def client(url: str) -> httpx.Client:
    """One that keeps its connection."""
    return httpx.Client(base_url=url, timeout=kit.DEADLINE_S)


def vectors_in(reply: httpx.Response) -> Any:
    """Of an OpenAI reply in base64, in input order. Asserts that it is one."""
    assert reply.status_code == 200, reply.text
    body: Any = es.json_codec().loads(reply.content)
    data = body["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    raw = b"".join(base64.b64decode(item["embedding"]) for item in data)
    return np.frombuffer(raw, "<f4").reshape(len(data), -1)


def embedded(asker: httpx.Client, texts: Sequence[str], **more: Any) -> Any:
    """The texts' vectors, asked for as the openai client does."""
    body = {"model": NAME, "input": texts, "encoding_format": "base64", **more}
    return vectors_in(asker.post("/v1/embeddings", json=body))


def metric(asker: httpx.Client, name: str) -> float:
    """The present value of a metric without labels."""
    found = re.search(rf"^{name} (\S+)$", asker.get("/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


def lines(words: int, seed: int = 0) -> Iterator[str]:
    """Texts of so many words, no two alike."""
    chance = np.random.default_rng(seed)
    for number in itertools.count():
        picked = chance.choice(WORDS, words - 1)
        yield " ".join([*picked, f"s{seed}n{number}"])


def batches(sizes: Iterable[int], words: int, seed: int = 0) -> Iterator[list[str]]:
    """Batches of such texts."""
    texts = lines(words, seed)
    for size in sizes:
        yield list(itertools.islice(texts, size))


class Import:
    """Clients that embed batches as fast as they are answered, in threads of their own.

    They obey Retry-After as the SDKs do. What a reply lacks raises when it is over.
    """

    def __init__(
        self,
        url: str,
        work: Iterator[list[str]],
        *,
        clients: int,
        priority: str,
    ) -> None:
        self.texts = 0  # answered
        self.requests = 0
        self.refusals = 0
        self.samples: list[tuple[str, Any]] = []
        self.took_s = 0.0
        self._url, self._work, self._priority = url, work, priority
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._faults: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self) -> Self:
        self._begun = time.perf_counter()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.finish()

    def finish(self) -> None:
        """Wait until all work is done, or until each has done its last batch."""
        for thread in self._threads:
            thread.join(4 * kit.DEADLINE_S)
        self.took_s = self.took_s or time.perf_counter() - self._begun
        if self._faults:
            raise self._faults[0]

    @property
    def is_running(self) -> bool:
        """Whether a batch is still under way."""
        return any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        try:
            with httpx.Client(base_url=self._url, timeout=300) as asker:
                while not self._is_over.is_set():
                    with self._lock:
                        batch = next(self._work, None)
                    if batch is None:
                        return
                    self._embed(asker, batch)
        except BaseException as error:
            self._faults.append(error)

    def _embed(self, asker: httpx.Client, batch: list[str]) -> None:
        body = {"model": NAME, "input": batch, "encoding_format": "base64"}
        raw = es.json_codec().dumps(body | {"priority": self._priority})
        fields = {"content-type": "application/json"}
        while True:
            reply = asker.post("/v1/embeddings", content=raw, headers=fields)
            if reply.status_code != 503 or self._is_over.is_set():
                break
            assert reply.headers["x-should-retry"] == "true"
            with self._lock:
                self.refusals += 1
            self._is_over.wait(float(reply.headers["retry-after-ms"]) / 1000)
        if reply.status_code == 503:
            return
        found = vectors_in(reply)
        assert len(found) == len(batch), "a reply is not complete"
        assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-4)
        with self._lock:
            self.requests += 1
            self.texts += len(batch)
            if len(self.samples) < _SAMPLE_BATCHES:
                place = len(batch) * 2 // 3
                self.samples.append((batch[place], found[place].copy()))


@dataclass
class Query:
    """What became of a lone text, and what the server did meanwhile."""

    seconds: float
    batches: int  # that ended between the question and the answer, or a little later
    waiting: int  # inputs in the queue when it was asked


def query(asker: httpx.Client, text: str) -> Query:
    """Ask for one text. Asserts that it is answered."""
    waiting = metric(asker, "embellama_queue_inputs")
    batches = metric(asker, "embellama_batches_total")
    begun = time.perf_counter()
    assert embedded(asker, [text]).shape == (1, 384)
    seconds = time.perf_counter() - begun
    batches = metric(asker, "embellama_batches_total") - batches
    return Query(seconds, int(batches), int(waiting))


# --- the long form ---


@dataclass
class Pace:
    """Clients that each ask for one text five times a second."""

    url: str
    clients: int = 4
    seconds: list[float] = field(default_factory=list)

    def run(self, for_s: float) -> Self:
        """Returns when the time is over."""
        self._end = time.perf_counter() + for_s
        threads = [
            threading.Thread(target=self._ask, args=(number,))
            for number in range(self.clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self

    def _ask(self, number: int) -> None:
        pause = threading.Event()
        with client(self.url) as asker:
            # Not all at the same moment.
            pause.wait(_A_QUERY_EVERY_S * number / self.clients)
            for text in lines(12, seed=time.time_ns() % 2**32):
                begun = time.perf_counter()
                if begun > self._end:
                    return
                embedded(asker, [text])
                took = time.perf_counter() - begun
                self.seconds.append(took)
                pause.wait(max(0.0, _A_QUERY_EVERY_S - took))

    @property
    def shown(self) -> str:
        """Median and 99th percentile, in ms."""
        tail = statistics.quantiles(self.seconds, n=100)[98]
        return f"{statistics.median(self.seconds) * 1e3:.0f} / {tail * 1e3:.0f}"


def main(seconds: float = 60.0) -> int:
    """Run it, and print the line."""
    cells: list[str] = []
    with kit.started("--cache-mb", "0", module=PROGRAM) as server:
        Pace(server.url).run(seconds / 20)  # everything once, before it counts
        cells.append(Pace(server.url).run(seconds / 3).shown)
        for seed, priority in enumerate(("normal", "low"), 1):
            work = batches(itertools.cycle((256, 512, 1024)), 20, seed)
            with Import(server.url, work, clients=3, priority=priority) as load:
                cells.append(Pace(server.url).run(seconds / 3).shown)
            cells.append(f"{load.texts / load.took_s:.0f}")
            print(f"{priority}: {load.texts} texts, {load.refusals} refusals")
        assert server.stop() == 0
    alone, beside, rate, beside_low, rate_low = cells
    print(
        "| a query alone: p50 / p99 ms | beside an import | beside one at low priority | "
        "import, texts/s | at low priority |\n|---|---|---|---|---|\n"
        f"| {alone} | {beside} | {beside_low} | {rate} | {rate_low} |"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
