"""What tests of `embed` share: an embedder without a model, and a folder to work in."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import embellama_server as es
from tests import kit

LENGTH = 8


def vector(text: str) -> Any:
    """The vector of a text: float32, of length 1."""
    return kit.fake_vector([kit.fake_id(text)], LENGTH).astype("f4")


class FakeEmbedder:
    """Vectors of texts; a text with kit.NAN_WORD has none."""

    def __init__(self, **identity: Any) -> None:
        self.identity: Mapping[str, Any] = {
            "sha256": "0" * 64,
            "dimensions": LENGTH,
        } | identity
        self.texts: list[str] = []
        self.ahead = 2

    def replies(
        self, windows: Iterable[Sequence[Sequence[str]]]
    ) -> Generator[list[es.EmbedReply], None, None]:
        waiting: list[Sequence[Sequence[str]]] = []
        rest = iter(windows)
        while True:
            while (
                len(waiting) < self.ahead and (window := next(rest, None)) is not None
            ):
                waiting.append(window)
            if not waiting:
                return
            window = waiting.pop(0)
            self.texts += [text for texts in window for text in texts]
            yield [
                es.EmbedReply(
                    [self.row(text) for text in texts],
                    sum(len(text.split()) for text in texts),
                )
                for texts in window
            ]

    def shortened(self, found: Any, dimensions: int) -> Any:
        """As any model that is not told to normalise first."""
        return es.unit_vector(found, dimensions)

    def row(self, text: str) -> Any:
        """One of them."""
        if kit.NAN_WORD in text.split():
            return es.NonFiniteVector("text[0] got no finite vector")
        return vector(text)


@dataclass
class Desk:
    """`embed` without a command line, in a folder."""

    root: Path
    embedder: FakeEmbedder = field(default_factory=FakeEmbedder)
    shown: list[int] = field(default_factory=list)

    def put(self, name: str, data: bytes | str) -> str:
        """A file."""
        path = self.root / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return str(path)

    def bulk(self, *inputs: str, output: str, **options: Any) -> es.Bulk:
        """A job."""
        corpus = {
            k: options.pop(k) for k in ("format", "field", "id_field") if k in options
        }
        told = es.BulkOptions(
            inputs, str(self.root / output), es.CorpusOptions(**corpus), **options
        )
        return es.Bulk(told, self.embedder, lambda p: self.shown.append(p.rows))

    def run(self, *inputs: str, output: str, **options: Any) -> es.Progress:
        """A job done; raises what it raises."""
        return self.bulk(*inputs, output=output, **options).run()

    @property
    def names(self) -> set[str]:
        """The files."""
        return set(os.listdir(self.root))

    def read(self, name: str) -> bytes:
        """A file's bytes."""
        return (self.root / name).read_bytes()

    def lines(self, name: str) -> list[Any]:
        """Lines of JSON."""
        return [json.loads(line) for line in self.read(name).splitlines()]


def jsonl(texts: Iterable[str]) -> str:
    """Texts as JSON lines, with ids."""
    return "".join(
        json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts)
    )


def array(texts: Iterable[str]) -> Any:
    """Their vectors."""
    return np.array([vector(text) for text in texts])
