"""How fast a corpus becomes vectors, against the engine alone and against others.

    python -m tests.bench_bulk                                  # the loop and Embedder
    python -m tests.bench_bulk --llama-server /opt/llama-server --torch st/bin/python
    python -m tests.bench_bulk --memory                         # 10,000 and 10^6 lines

Subjects: the engine in a loop ("loop": threads that tokenize the next texts, fill a call
and scale its vectors, nothing else); Embedder; with --verb the verb `embed`, less what
it takes for one line; llama-server with 64 requests in flight, of one text and of 16,
the better of both; sentence-transformers in another Python (--torch), which has the
default model's folder (--torch-model). The texts are sentences that are on this machine: of documentation, licences and
Python's docstrings. Machines drift: in each round every subject gets the same texts, in
turn, and what is reported is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import embellama_server as es
from tests import kit
from tests.bench import machine, markdown
from tests.load import Load, body
from tests.servers import free_port, started

WINDOW = 1024
SOURCES = (
    "/usr/share/doc/**/*",
    "/usr/share/common-licenses/*",
    f"{sys.prefix}/lib/python3*/**/*.md",
    f"{sys.prefix}/lib/python3*/**/*.py",
    f"{sys.base_prefix}/lib/python3*/**/*.py",
)
SENTENCE = re.compile(r"[A-Za-z][\w ,;:.!?'\"()/-]{19,600}")
Run = Callable[[Sequence[str]], float]  # texts to texts/s


def sentences(count: int) -> list[str]:
    """So many different sentences, in a mixed order that is always the same."""
    found: dict[str, None] = {}
    for path in itertools.chain.from_iterable(
        sorted(glob.iglob(source, recursive=True)) for source in SOURCES
    ):
        with contextlib.suppress(OSError, UnicodeError), open(path) as file:
            for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", file.read(1 << 18)):
                text = " ".join(part.split())
                if SENTENCE.fullmatch(text):
                    found[text] = None
        if len(found) >= count:
            break
    mixed = [*found][:count]
    random.Random(0).shuffle(mixed)
    if len(mixed) < count:
        raise SystemExit(f"this machine has {len(mixed)} sentences: ask for fewer")
    return mixed


def corpus(path: str, count: int) -> list[str]:
    """So many of a file's lines; it is made if there is none, which takes a minute."""
    if not path:
        return sentences(count)
    if not Path(path).exists():
        Path(path).write_text("\n".join(sentences(200_000)))
    return Path(path).read_text().splitlines()[:count]


def loop(model: str, weights: str) -> Run:
    """The engine in as many threads as there are cores."""
    settings = es.ModelSettings(model_path=model)
    folder, log = Path(es.default_cache_dir()) / "weights", kit.quiet_log()
    sha256 = es.sha256_of(Path(model))
    cache = es.WeightsCache(
        folder, model, sha256, lambda path: es.Engine(path, settings, log), log
    )
    engine = cache.engine(weights)
    contexts = [engine.new_context() for _ in range(es.usable_cores())]
    card = engine.card

    def run(texts: Sequence[str]) -> float:
        rows: list[Any] = [None] * len(texts)
        rest, lock = iter(enumerate(texts)), threading.Lock()

        def work(context: es.Context) -> None:
            held: list[tuple[int, Any]] = []
            while True:
                tokens = sum(len(ids) for _, ids in held)
                with lock:
                    number, text = next(rest, (-1, ""))
                ids = np.array(
                    es.with_special_tokens(engine.tokenizer.encode(text), card), "i4"
                )[: card.max_input_tokens]
                if held and (number < 0 or tokens + len(ids) > settings.batch_tokens):
                    vectors = context.embed([ids for _, ids in held])
                    for (place, _), vector in zip(held, vectors, strict=True):
                        rows[place] = es.normalised(vector)
                    held = []
                if number < 0:
                    return
                held.append((number, ids))

        threads = [threading.Thread(target=work, args=(each,)) for each in contexts]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(texts) / (time.perf_counter() - begun)

    return run


def windows(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """A text file's, as a reader gives them."""
    return (texts[n : n + WINDOW] for n in range(0, len(texts), WINDOW))


def with_embedder(model: str, weights: str) -> Run:
    """Embedder, whose cache has none of it."""
    embedder = es.Embedder(
        model_path=model, weights=weights, cache_mb=0, auto_truncate=True
    )
    next(embedder.embed([["warm"]]))

    def run(texts: Sequence[str]) -> float:
        begun = time.perf_counter()
        count = sum(len(rows) for rows in embedder.embed(windows(texts)))
        assert count == len(texts)
        return len(texts) / (time.perf_counter() - begun)

    return run


def with_verb(model: str, weights: str, folder: Path) -> Run:
    """The verb `embed`, less what it takes to start and end."""

    def seconds(texts: Sequence[str]) -> float:
        source, output = folder / "texts.txt", folder / "vectors.npy"
        source.write_text("\n".join(texts) + "\n")
        output.unlink(missing_ok=True)
        script = str(kit.ROOT / "embellama_server.py")
        command = [sys.executable, script, "embed", str(source), "--output"]
        command += [str(output), "--quiet", "--restart", "--model-path", model]
        begun = time.perf_counter()
        flags = ("--truncate", "--cache-mb", "0", "--weights", weights)
        subprocess.run([*command, *flags], check=True)
        return time.perf_counter() - begun

    return lambda texts: len(texts) / (seconds(texts) - seconds(texts[:1]))


def with_server(url: str, seconds: float) -> Run:
    """A client that has 64 requests in flight, of one text or of 16: the better one."""

    def run(texts: Sequence[str]) -> float:
        found = []
        for size in (1, 16):
            parts = [texts[n : n + size] for n in range(0, len(texts), size)]
            load = Load(url, [body(part) for part in parts], 64, seconds).run()
            found.append(size * len(load.latencies) / load.took)
        return max(found)

    return run


TORCH = """
import json, sys, time, torch
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
if sys.argv[2] == "bf16":
    model = model.to(torch.bfloat16)
for line in sys.stdin:
    texts = json.loads(line)
    begun = time.perf_counter()
    model.encode(texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False)
    print(len(texts) / (time.perf_counter() - begun), flush=True)
"""


def with_torch(
    python: str, model: str, weights: str, stack: contextlib.ExitStack
) -> Run:
    """sentence-transformers, which sorts the texts by length itself."""
    process = stack.enter_context(
        subprocess.Popen(
            [python, "-c", TORCH, model, weights],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    asks, answers = process.stdin, process.stdout
    assert asks is not None and answers is not None
    stack.callback(asks.close)

    def run(texts: Sequence[str]) -> float:
        asks.write(json.dumps(texts) + "\n")
        asks.flush()
        return float(answers.readline())

    run(["warm"])
    return run


# --- memory ---

PEAK = """
import itertools, resource, sys
import embellama_server as es
embedder = es.Embedder(model_path=sys.argv[1])
lines = (f"line {n % 5000} of what is read again and again" for n in range(int(sys.argv[2])))
windows = iter(lambda: [*itertools.islice(lines, 1024)], [])
print(sum(len(rows) for rows in embedder.embed(windows)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def memory(model: str) -> str:
    """A table of peaks: of lines that repeat, so that a million take a minute."""
    rows = []
    for lines in (10_000, 1_000_000):
        command = [sys.executable, "-c", PEAK, model, str(lines)]
        said = subprocess.run(
            command, cwd=kit.ROOT, check=True, capture_output=True, text=True
        ).stdout.split()
        assert int(said[0]) == lines
        rows.append([f"Embedder, {lines:,} lines", f"{float(said[1]):.0f}"])
    port = free_port()
    flags = ["--model-path", model, "--port", str(port), "--no-supervise"]
    flags += ["--any-model", "--log-level", "error"]
    command = [sys.executable, str(kit.ROOT / "embellama_server.py"), *flags]
    texts = [f"line {n} of what is read again and again" for n in range(5000)]
    bodies = [body(texts[n : n + 50]) for n in range(0, 5000, 50)]
    with started("server", command, port, None) as server:
        Load(server.url, bodies * 10, 2, 10.0).run()
        server.sample()
        rows.append(["the server, 5,000 texts", f"{server.serving_peak / 2**20:.0f}"])
    return markdown(["what", "peak MiB"], rows)


# --- the report ---


def table(rates: dict[str, list[float]]) -> str:
    """Of medians, and of medians of the ratios to each subject within a round."""
    rows = []
    for name, own in rates.items():
        ratios = [
            f"{statistics.median(a / b for a, b in zip(own, other, strict=True)):.2f}"
            for other in rates.values()
        ]
        rows.append([name, f"{statistics.median(own):.0f}", *ratios])
    return markdown(["subject", "texts/s", *(f"/ {name}" for name in rates)], rows)


def main() -> None:
    """Measure, and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="A GGUF. [the default model]")
    parser.add_argument("--weights", default="keep", choices=("keep", "auto"))
    parser.add_argument("--texts", type=int, default=2000, help="In each round.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--corpus", default="", metavar="FILE", help="Read, or made with 200,000 texts."
    )
    parser.add_argument("--verb", action="store_true")
    parser.add_argument("--llama-server", default="", metavar="PROGRAM")
    parser.add_argument("--torch", default="", metavar="PYTHON")
    parser.add_argument("--torch-model", default="", metavar="FOLDER")
    parser.add_argument("--torch-weights", default="f32", choices=("f32", "bf16"))
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    fetch = es.ModelFetch(es.default_cache_dir(), kit.quiet_log(), es.DEFAULT_MODEL)
    model = given.model or str(fetch.path())
    print(f"{machine()}; {' '.join(sys.argv[1:])}\n", flush=True)
    if given.memory:
        print(memory(model))
        return
    texts = corpus(given.corpus, given.texts * given.rounds)
    subjects = {
        "loop": loop(model, given.weights),
        "Embedder": with_embedder(model, given.weights),
    }
    rates: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        if given.verb:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            subjects["embed"] = with_verb(model, given.weights, Path(folder))
        if given.llama_server:
            port, cores = free_port(), es.usable_cores()
            flags = f"--embeddings -t {cores} -np 64 -c 32768 -ub 512 -b 512"
            command = [given.llama_server, "-m", model, "--port", str(port)]
            server = started(
                "llama-server", [*command, *flags.split()], port, subprocess.DEVNULL
            )
            url = stack.enter_context(server).url
            subjects["llama-server"] = with_server(url, given.texts / 500)
        if given.torch:
            options = given.torch_model, given.torch_weights
            subjects["torch"] = with_torch(given.torch, *options, stack)
        for turn in range(given.rounds):
            part = texts[turn * given.texts :][: given.texts]
            for name, run in subjects.items():
                rates.setdefault(name, []).append(run(part))
            last = {name: round(own[-1]) for name, own in rates.items()}
            print(f"round {turn + 1} of {given.rounds}: {last}", file=sys.stderr)
    print(table(rates))


if __name__ == "__main__":
    main()
