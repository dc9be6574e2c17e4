"""How exact vectors are: against f32, and whatever shares their call.

    python -m tests.exact                                   # all-MiniLM-L6-v2
    python -m tests.exact --model-path m.gguf --pooling last --weights keep q8_0 --texts 40
    python -m tests.exact --words 150 300                   # long ones

The same texts through one model with its weights in several types. What is compared with
is the same file re-encoded to f32, each text alone and on one thread: so what the file's
own type has lost already does not count. Prints README's table.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import embellama_server as es
from tests import kit
from tests.bench import machine, markdown
from tests.words import WORDS

BATCH_TOKENS = 256
HEADS = [
    *("weights", "cosine to f32", "neighbours move it by", "int8 changes"),
    *("ubinary changes", "2 threads move it by", "rate of --exact"),
]


@dataclass
class Vectors:
    """One engine's vectors of all texts: float64 rows of length 1."""

    alone: Any
    together: Any
    threaded: Any  # alone, on two threads
    price: float  # inputs a second alone, of those together


def batches(inputs: Sequence[Any], most: int) -> Iterator[list[Any]]:
    """Inputs in calls of up to so many, and BATCH_TOKENS tokens."""
    batch: list[Any] = []
    for ids in inputs:
        is_full = sum(map(len, batch)) + len(ids) > BATCH_TOKENS or len(batch) == most
        if batch and is_full:
            yield batch
            batch = []
        batch.append(ids)
    yield batch


def measured(engine: es.Engine, texts: Sequence[str]) -> Vectors:
    """Compute all of them in each way."""
    card = engine.card
    inputs = [
        np.array(es.with_special_tokens(engine.tokenizer.encode(text), card), np.int32)
        for text in texts
    ]
    with contextlib.closing(engine.new_context()) as context:

        def rows(most: int, threads: int = 1) -> Any:
            calls = batches(inputs, most)
            found = [context.embed(call, threads=threads).copy() for call in calls]
            return kit.units(np.concatenate(found).astype(np.float64))

        def seconds(most: int) -> float:
            begun = time.perf_counter()
            rows(most)
            return time.perf_counter() - begun

        both = [(seconds(card.batch_inputs), seconds(1)) for _ in range(3)]
        price = min(many for many, _ in both) / min(one for _, one in both)
        return Vectors(rows(1), rows(card.batch_inputs), rows(1, 2), price)


def row(name: str, found: Vectors, exact: Any) -> list[str]:
    """README's row for one type of weights."""
    moved = []
    for dtype in ("int8", "ubinary"):
        pairs = zip(found.alone, found.together, strict=True)
        as_dtype = es.DTYPES[dtype]
        changed = [bool((as_dtype(a) != as_dtype(b)).any()) for a, b in pairs]
        moved.append(f"{np.mean(changed):.0%}")
    return [
        name,
        f"{(found.alone * exact).sum(axis=1).min():.6f}",
        f"{abs(found.together - found.alone).max():.1e}",
        *moved,
        f"{abs(found.threaded - found.alone).max():.1e}",
        f"{found.price:.2f}",
    ]


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--model-path", default="", help="default: all-MiniLM-L6-v2")
    made.add_argument("--pooling", default="auto")
    made.add_argument(
        "--weights", nargs="+", default=["f32", "f16", "bf16", "q8_0"], metavar="TYPE"
    )
    made.add_argument("--texts", type=int, default=200)
    made.add_argument("--words", type=int, nargs=2, default=[5, 60], help="in a text")
    return made


def main() -> None:
    """Measure and print."""
    given = parser().parse_args()
    chance = random.Random(1)
    lengths = [chance.randint(*given.words) for _ in range(given.texts)]
    texts = [" ".join(chance.choices(WORDS, k=length)) for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        settings = es.Settings(
            model_path=given.model_path, pooling=given.pooling, cache_dir=folder
        )
        log = kit.quiet_log()
        fetch = es.ModelFetch(es.default_cache_dir(), log, es.DEFAULT_MODEL)
        file = es.model_file(settings, fetch)
        cache = es.weights_cache(settings, file, es.Engine, log)
        with contextlib.closing(cache.engine("f32")) as engine:
            exact = measured(engine, texts).alone
        rows = []
        for name in given.weights:
            with contextlib.closing(cache.engine(name)) as engine:
                rows.append(row(engine.card.weights, measured(engine, texts), exact))
    words = " to ".join(map(str, given.words))
    print(
        f"{machine()}; {Path(file.path).name}; {given.texts} texts of {words} words; "
    )
    print(f"calls of {BATCH_TOKENS} tokens\n")
    print(markdown(HEADS, rows))


if __name__ == "__main__":
    main()
