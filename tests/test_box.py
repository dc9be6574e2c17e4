"""Room THIS BOX: free memory, and which CPUs there are, whatever the kernel's files say.

Trees of files in a temporary folder stand for /proc and /sys.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import embellama_server as es
from tests import kit

KIB = 1024
GROUP = "sys/fs/cgroup"
MEMINFO = "MemTotal:       9000 kB\nMemFree:  100 kB\nMemAvailable:    8000 kB\n"
pinnable = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="threads cannot be pinned here"
)


def tree(root: Path, files: dict[str, str]) -> Path:
    """Files with these texts under ``root``."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, errors="surrogateescape")
    return root


# --- memory ---


def limits(**groups: tuple[str, str]) -> dict[str, str]:
    """Files of groups, by name with ``__`` for ``/``: memory.max and memory.current."""
    files: dict[str, str] = {}
    for name, (most, used) in groups.items():
        folder = f"{GROUP}/{name.replace('__', '/')}"
        files |= {f"{folder}/memory.max": most, f"{folder}/memory.current": used}
    return files


@pytest.mark.parametrize(
    ("group", "files", "free"),
    [
        (None, {}, 8000 * KIB),  # no cgroups
        ("0::/\n", {}, 8000 * KIB),  # a box of its own: the root has no limit
        ("0::/a/b\n", limits(a__b=("max\n", "5\n")), 8000 * KIB),
        ("0::/a/b\n", limits(a__b=("5000000\n", "4000000\n")), 1_000_000),
        ("0::/a/b\n", limits(a__b=("9" * 18, "0")), 8000 * KIB),  # more than there is
        # The parents' limits hold too, whichever is the least.
        ("0::/a/b\n", limits(a=("5000", "2000"), a__b=("max", "1")), 3000),
        ("0::/a/b\n", limits(a=("9000", "2000"), a__b=("100", "1")), 99),
        ("0::/a/b\n", limits(a=("9000", "8990"), a__b=("100", "1")), 10),
        ("0::/x\n", limits(a=("1", "0")), 8000 * KIB),  # somebody else's
        ("0::/a\n", limits(a=("1000", "1500")), 0),  # lowered below what is used
        ("0::/gone\n", {f"{GROUP}/memory.max": "7\n"}, 8000 * KIB),  # no usage: unknown
        # Malformed, each alone: what cannot be read limits nothing.
        *(
            ("0::/a\n", limits(a=bad), 8000 * KIB)
            for bad in (("", "1"), ("1", ""), ("x", "1"), ("1", "max"), ("\udcff", "1"))
        ),
        ("\udcff\n\nno colon\n", limits(a=("1", "0")), 8000 * KIB),
    ],
)
def test_free_memory_is_the_least_of_the_box_and_its_groups(
    tmp_path: Path, group: str | None, files: dict[str, str], free: float
) -> None:
    files = files | {"proc/meminfo": MEMINFO}
    if group is not None:
        files["proc/self/cgroup"] = group
    assert es.free_memory_bytes(tree(tmp_path, files)) == free


@pytest.mark.parametrize(
    ("said", "free"),
    [
        ("anon 700\ninactive_file 300\nactive_file 100\n", 500),
        ("inactive_file 5000\n", 1000),  # more than is used: a moment later
        ("inactive_filed 300\n", 200),
        ("inactive_file many\n", 200),
        ("\udcff", 200),
    ],
)
def test_page_cache_that_was_not_used_lately_is_free(
    tmp_path: Path, said: str, free: int
) -> None:
    # Reading a model's checksum fills it: that must not refuse the model.
    files = limits(a=("1000", "800")) | {f"{GROUP}/a/memory.stat": said}
    files |= {"proc/self/cgroup": "0::/a\n"}
    assert es.free_memory_bytes(tree(tmp_path, files)) == free


def limits_v1(**groups: tuple[int, int, int]) -> dict[str, str]:
    """As limits(), of version 1: the limit, what is used, and what of that is cache."""
    files: dict[str, str] = {}
    for name, (most, used, cache) in groups.items():
        folder = f"{GROUP}/memory/{name.replace('__', '/')}".rstrip("/")
        stat = f"cache 5\ninactive_file 7\ntotal_inactive_file {cache}\n"
        files |= {
            f"{folder}/memory.limit_in_bytes": f"{most}\n",
            f"{folder}/memory.usage_in_bytes": f"{used}\n",
            f"{folder}/memory.stat": stat,
        }
    return files


V1 = "5:cpu,cpuacct:/else\n4:memory:/a/b\n0::/system\n"


@pytest.mark.parametrize(
    ("group", "files", "free"),
    [
        (V1, limits_v1(a__b=(1000, 900, 300)), 400),
        (V1, limits_v1(a=(1000, 900, 0), a__b=(1 << 40, 10, 0)), 100),  # nested
        (V1, limits_v1(a__b=(0x7FFFFFFFFFFFF000, 10, 0)), math.inf),  # unlimited
        (V1, limits_v1(a__b=(100, 900, 0)), 0),
        # In a container the group's own folder is what is mounted.
        ("4:memory:/docker/0123\n", limits_v1(**{"": (500, 100, 0)}), 400),
        ("4:cpu:/a/b\n", limits_v1(a__b=(1000, 900, 0)), math.inf),
        # Both at once (systemd's hybrid): the lesser counts.
        (V1, limits_v1(a__b=(1000, 900, 0)) | limits(system=("90", "60")), 30),
    ],
)
def test_limits_of_cgroups_version_1_are_seen(
    tmp_path: Path, group: str, files: dict[str, str], free: float
) -> None:
    tree(tmp_path, files | {"proc/self/cgroup": group})
    assert es.free_memory_bytes(tmp_path) == free


def test_the_memory_of_a_box_and_its_groups_is_told_with_its_limit(
    tmp_path: Path,
) -> None:
    files = limits(a=("9000", "2000")) | {"proc/self/cgroup": "0::/a\n"}
    tree(tmp_path, files | {"proc/meminfo": MEMINFO})
    found = list(es.memory_bytes(tmp_path))
    assert found == [(9000 * KIB, 8000 * KIB), (9000, 7000)]


@pytest.mark.parametrize("meminfo", [None, "", "MemTotal: 1 kB\n", "\udcff\n"])
def test_free_memory_without_an_estimate_is_the_groups_or_unlimited(
    tmp_path: Path, meminfo: str | None
) -> None:
    # MemAvailable is younger than cgroups; macOS has no /proc.
    if meminfo is not None:
        tree(tmp_path, {"proc/meminfo": meminfo})
    assert es.free_memory_bytes(tmp_path) == math.inf
    tree(tmp_path, {"proc/self/cgroup": "0::/a\n"} | limits(a=("10", "1")))
    assert es.free_memory_bytes(tmp_path) == 9


TEXTS = st.binary(max_size=40) | st.sampled_from(
    [
        b"max\n",
        b"-5",
        b"0::/\n",
        b"0:/\n",
        b"0::/../..\n",
        b"0::/a\0b\n",
        b"1" * 5000,
        b"1e9",
    ]
)


@given(meminfo=TEXTS, group=TEXTS, most=TEXTS, used=TEXTS)
def test_free_memory_is_a_number_whatever_the_files_hold(
    meminfo: bytes, group: bytes, most: bytes, used: bytes
) -> None:
    with tempfile.TemporaryDirectory() as temp:
        root = tree(Path(temp), {"proc/self/x": "", f"{GROUP}/x": ""})
        (root / "proc/meminfo").write_bytes(b"MemAvailable: " + meminfo + b" kB\n")
        (root / "proc/self/cgroup").write_bytes(group)
        (root / GROUP / "memory.max").write_bytes(most)
        (root / GROUP / "memory.current").write_bytes(used)
        assert es.free_memory_bytes(root) >= 0


def test_this_box_has_some_memory_left() -> None:
    assert es.free_memory_bytes() > 0


# --- CPUs ---


@pytest.mark.parametrize(
    ("text", "cpus"),
    [
        ("", []),
        ("\n", []),
        ("0\n", [0]),
        ("0-3,8", [0, 1, 2, 3, 8]),
        ("7,2-3\n", [7, 2, 3]),
        ("5-5", [5]),
        ("3-1", []),
        ("0,,2,", [0, 2]),
    ],
)
def test_a_list_of_cpus_is_read_as_the_kernel_writes_it(
    text: str, cpus: list[int]
) -> None:
    assert es.parse_cpu_list(text) == cpus


@given(st.sets(st.integers(0, 300)))
def test_a_list_of_cpus_in_runs_names_each_once(cpus: set[int]) -> None:
    starts = [cpu for cpu in sorted(cpus) if cpu - 1 not in cpus]
    ends = [cpu for cpu in sorted(cpus) if cpu + 1 not in cpus]
    runs = zip(starts, ends, strict=True)
    assert es.parse_cpu_list(",".join(f"{a}-{b}" for a, b in runs)) == sorted(cpus)


def may_use(monkeypatch: pytest.MonkeyPatch, cpus: set[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cpus, raising=False)


def topology(nodes: dict[int, str], cores: list[str]) -> dict[str, str]:
    """sysfs of nodes with these CPUs, and of cores with these threads."""
    system = "sys/devices/system"
    files = {f"{system}/node/node{n}/cpulist": cpus for n, cpus in nodes.items()}
    for threads in cores:
        for cpu in es.parse_cpu_list(threads):
            path = f"{system}/cpu/cpu{cpu}/topology/thread_siblings_list"
            files[path] = f"{threads}\n"
    return files


# Two nodes of two cores of two threads, as most kernels number them...
USUAL = topology({0: "0-1,4-5\n", 1: "2-3,6-7\n"}, ["0,4", "1,5", "2,6", "3,7"])
# ... and as some do, where a core's threads stand together.
PAIRED = topology({0: "0-3\n", 1: "4-7\n"}, ["0-1", "2-3", "4-5", "6-7"])
ONE_NODE = topology({0: "0-3\n"}, ["0,2", "1,3"])


@pytest.mark.parametrize(
    ("files", "usable", "order"),
    [
        (USUAL, set(range(8)), [0, 2, 1, 3, 4, 6, 5, 7]),
        (PAIRED, set(range(8)), [0, 4, 2, 6, 1, 5, 3, 7]),
        (USUAL, {1, 2, 3, 6}, [1, 2, 3, 6]),  # the rest is not ours
        (USUAL, {4, 5}, [4, 5]),  # only second threads
        # Core 0's second thread comes last: only CPUs that are ours count as siblings.
        (USUAL, {0, 4, 5}, [0, 5, 4]),
        (USUAL, {3}, [3]),
        (ONE_NODE, set(range(4)), [0, 1, 2, 3]),
        ({}, {5, 1, 3}, [1, 3, 5]),  # no sysfs, as in some containers
        (topology({}, ["0-1", "2-3"]), set(range(4)), [0, 2, 1, 3]),  # no nodes
        (topology({0: "x", 1: "2-3"}, []), set(range(4)), [0, 2, 1, 3]),  # garbage
    ],
)
def test_cores_come_before_hyper_threads_and_nodes_take_turns(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    usable: set[int],
    order: list[int],
) -> None:
    may_use(monkeypatch, usable)
    assert es.cpus_in_order(tree(tmp_path, files)) == order


@pytest.mark.parametrize("siblings", ["", "x", "\udcff", "8-9\n"])
def test_siblings_that_cannot_be_believed_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, siblings: str
) -> None:
    may_use(monkeypatch, {0, 1})
    path = "sys/devices/system/cpu/cpu0/topology/thread_siblings_list"
    assert es.cpus_in_order(tree(tmp_path, {path: siblings})) == [0, 1]


def test_no_cpus_are_named_where_threads_cannot_be_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert es.cpus_in_order(tree(tmp_path, USUAL)) == []


@pinnable
def test_the_cpus_of_this_box_are_those_we_may_use() -> None:
    assert sorted(es.cpus_in_order()) == sorted(os.sched_getaffinity(0))


@pinnable
def test_only_the_thread_that_asks_is_pinned() -> None:
    mine = os.sched_getaffinity(0)
    (one, *_) = mine
    found: list[set[int]] = []

    def pinned() -> None:
        es.pin_this_thread([one])
        found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join(kit.DEADLINE_S)
    assert found == [{one}]
    assert os.sched_getaffinity(0) == mine


@pinnable
def test_a_cpu_that_is_not_there_cannot_be_pinned_to() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        es.pin_this_thread([4095])


# --- cores ---

CORES_V1 = "4:cpu,cpuacct:/x\n1:name=systemd:/x\n"
CPU_V1 = "cpu/x/cpu.cfs_quota_us"
PERIOD_V1 = {"cpu/x/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        (None, {}, 8),  # no /proc: macOS
        ("0::/\n", {}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000\n"}, 4),
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000\n"}, 1),  # never below
        ("0::/a/b\n", {"a/b/cpu.max": "1600000 100000\n"}, 8),  # never above affinity
        ("0::/a/b\n", {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/a/b\n", {"a/cpu.max": "600000 100000", "a/b/cpu.max": "3 1"}, 3),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),  # a container's own root
        ("0::/docker/1:2\n", {"cpu.max": "300000 100000\n"}, 3),  # not namespaced
        (CORES_V1, PERIOD_V1 | {CPU_V1: "200000\n"}, 2),
        (CORES_V1, PERIOD_V1 | {CPU_V1: "-1\n"}, 8),
        (CORES_V1, {CPU_V1: "200000\n"}, 8),  # no period
        (CORES_V1 + "0::/x\n", PERIOD_V1 | {CPU_V1: "200000\n"}, 2),  # hybrid
        ("3:cpuset:/x\n", PERIOD_V1 | {CPU_V1: "200000\n"}, 8),  # not the controller
        # Malformed, each alone: what cannot be read limits nothing.
        *(
            ("0::/\n", {"cpu.max": bad}, 8)
            for bad in ("", "max", "a b", "1 2 3", "-1 1")
        ),
        ("0::/\n", {"cpu.max": "200000 0\n"}, 8),
        ("0::/\n", {"cpu.max": "\udcff 1\n"}, 8),
        ("no colon\n\n0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("\udcff\n", {}, 8),
    ],
)
def test_cores_are_affinity_and_quota_rounded_down(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: str | None,
    files: dict[str, str],
    cores: int,
) -> None:
    may_use(monkeypatch, set(range(8)))
    named = {f"{GROUP}/{name}": text for name, text in files.items()}
    own = {} if groups is None else {"proc/self/cgroup": groups}
    assert es.usable_cores(tree(tmp_path, named | own)) == cores


@pytest.mark.parametrize(("counted", "cores"), [(6, 6), (None, 1)])
def test_cores_are_counted_where_there_is_no_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: int | None, cores: int
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert es.usable_cores(tmp_path) == cores


# --- its name ---

INTEL = "processor\t: {}\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu {}\n\n"
ARM = "processor\t: {}\nBogoMIPS\t: 50.00\nFeatures\t: fp {}\nCPU part\t: 0xd0c\n\n"


@pytest.mark.parametrize("core", [INTEL, ARM])
def test_a_cpu_has_another_name_when_it_can_do_other_things(
    tmp_path: Path, core: str
) -> None:
    texts = [
        core.format(0, "avx2 avx512_bf16"),
        core.format(0, "avx512_bf16 avx2"),  # in another order
        core.format(0, "avx2"),
        core.format(0, "avx2 avx512_bf16") + core.format(1, "avx2 avx512_bf16"),
    ]
    names = [
        es.cpu_name(tree(tmp_path / str(n), {"proc/cpuinfo": text}))
        for n, text in enumerate(texts)
    ]
    assert names[0] == names[1] == names[3] != names[2]
    assert {name.partition(" (")[0] for name in names} == {
        "Some CPU @ 2 GHz" if core is INTEL else "0xd0c"
    }


def test_a_cpu_has_a_name_wherever_it_is(tmp_path: Path) -> None:
    assert es.cpu_name(tmp_path)  # no /proc
    assert es.cpu_name(tree(tmp_path, {"proc/cpuinfo": "\udcff"}))
    assert es.cpu_name() == es.cpu_name(), "or what was measured is not remembered"


# --- how much of the CPU time is used ---

STAT = """cpu  999 999 999 999 999 999 999 999 0 0
cpu0 10 1 5 70 4 0 0 10 3 0
cpu1 20 0 0 80 0 0 0 0 0 0
cpu7 5000 0 0 0 0 0 0 0 0 0
intr 1 2 3
"""


def cpu_times(root: Path, **files: str) -> list[tuple[float, float]]:
    """What is told of a tree with these files, in hundredths of a second."""
    names = {name.replace("__", "/"): text for name, text in files.items()}
    found = es.cpu_times_s(tree(root, names))
    tick = os.sysconf("SC_CLK_TCK")
    return [(round(used * tick), round(total * tick)) for used, total in found]


def test_cpu_time_is_counted_of_the_cpus_we_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert cpu_times(tmp_path, proc__stat=STAT) == [(46, 200)]


@pytest.mark.parametrize("text", ["", "cpu 1 2\n", "cpu0 1 2 3\n", "\udcff"])
def test_cpu_time_that_the_kernel_does_not_tell_is_none_or_nothing(
    tmp_path: Path, text: str
) -> None:
    assert not any(map(sum, cpu_times(tmp_path, proc__stat=text)))


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/a", {"a/cpu.max": "150000 100000\n", "a/cpu.stat": "usage_usec 2500000\nuser_usec 1\n"}),
        ("2:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "150000\n", "cpu/a/cpu.cfs_period_us": "100000\n", "cpu/a/cpuacct.usage": "2500000000\n"}),
    ],
    ids=["v2", "v1"],
)  # fmt: skip
def test_cpu_time_of_a_group_with_a_quota_is_counted_against_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    group: str,
    files: dict[str, str],
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    placed = {f"{GROUP}/{name}": text for name, text in files.items()}
    tree(tmp_path, placed | {"proc/self/cgroup": f"{group}\n"})
    assert list(es.cpu_times_s(tmp_path)) == [(2.5, 150.0)]


def test_a_quota_without_a_count_of_time_still_bounds_the_cores(
    tmp_path: Path,
) -> None:
    files = {"proc/self/cgroup": "0::/a\n", f"{GROUP}/a/cpu.max": "100000 100000\n"}
    root = tree(tmp_path, files)
    assert (list(es.cpu_times_s(root)), es.usable_cores(root)) == ([], 1)


def test_the_times_of_this_box_go_on(tmp_path: Path) -> None:
    before, after = list(es.cpu_times_s()), list(es.cpu_times_s())
    for (used, total), (used_after, total_after) in zip(before, after, strict=True):
        assert 0 <= used <= total and used <= used_after and total <= total_after
