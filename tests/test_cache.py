"""Room READING, the cache: the vectors used last, never more of them than there is room for."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embellama_server as es


def vector(numbers: int = 8, value: float = 1.0) -> Any:
    """A vector of its own, of so many numbers."""
    return np.full(numbers, value, np.float32)


def cost_of(numbers: int) -> int:
    """Bytes that a vector of so many numbers takes in a cache."""
    cache = es.VectorCache(10**9, "")
    cache.put(b"", vector(numbers))
    return cache.counts.bytes


def ids(*numbers: int) -> es.TokenIds:
    return np.array(numbers, np.int32)


def filled(*keys: bytes, room_for: int = 3) -> es.VectorCache:
    """A cache with these keys, the last one used last."""
    cache = es.VectorCache(room_for * cost_of(8), "space")
    for key in keys:
        cache.put(key, vector())
    return cache


def keys_in(cache: es.VectorCache, keys: bytes) -> list[bytes]:
    """Which of the keys, a byte each, it still has."""
    return [bytes([k]) for k in keys if cache.get(bytes([k])) is not None]


def test_what_was_put_is_what_one_gets() -> None:
    cache = es.VectorCache(10_000, "")
    put = vector(value=0.5)
    cache.put(b"a", put)
    assert cache.get(b"a") is put
    assert cache.get(b"b") is None


def test_the_one_not_used_for_longest_goes_first() -> None:
    cache = filled(b"a", b"b", b"c")
    cache.get(b"a")
    cache.put(b"d", vector())
    assert keys_in(cache, b"abcd") == [b"a", b"c", b"d"]
    assert cache.counts.evictions == 1


def test_a_large_vector_may_push_out_several() -> None:
    cache = filled(b"a", b"b", b"c")
    size = (2 * cost_of(8) - cost_of(0)) // 4  # numbers in the bytes of two of them
    cache.put(b"d", vector(size))
    assert keys_in(cache, b"abcd") == [b"c", b"d"]
    assert (cache.counts.entries, cache.counts.evictions) == (2, 2)


@pytest.mark.parametrize("max_bytes", [0, cost_of(8) - 1], ids=["none", "too few"])
def test_a_vector_without_room_is_not_kept(max_bytes: int) -> None:
    cache = es.VectorCache(max_bytes, "")
    cache.put(b"a", vector())
    assert cache.get(b"a") is None
    assert cache.counts == es.CacheCounts()


def test_one_that_is_larger_than_the_whole_cache_pushes_nobody_out() -> None:
    cache = filled(b"a", b"b")
    cache.put(b"c", vector(10**6))
    assert keys_in(cache, b"abc") == [b"a", b"b"]


def test_clearing_drops_everything_and_says_what_there_was() -> None:
    cache = filled(b"a", b"b", b"c", b"d")
    cache.get(b"d")
    before = cache.clear()
    assert (before.entries, before.hits, before.evictions) == (3, 1, 1)
    assert before.bytes == 3 * cost_of(8)
    now = cache.counts
    assert (now.entries, now.bytes, now.hits, now.evictions) == (0, 0, 1, 1)
    assert keys_in(cache, b"abcd") == []
    cache.put(b"a", vector())
    assert (cache.counts.entries, before.entries) == (1, 3)


def test_a_key_is_that_of_its_ids_and_of_nothing_else() -> None:
    lists = [(), (1,), (2,), (1, 2), (2, 1), (1, 2, 0), (256,), (1 << 16,), (0, 1)]
    spaces = ["", "model", "other model", "x" * 200, "y" * 200, "\udc80"]
    caches = [es.VectorCache(0, space) for space in spaces]
    keys = [cache.key(ids(*numbers)) for cache in caches for numbers in lists]
    assert len(set(keys)) == len(lists) * len(spaces)
    assert keys[: len(lists)] == [es.VectorCache(9, "").key(ids(*n)) for n in lists]


@given(st.lists(st.integers(0, 2**31 - 1), max_size=9), st.data())
def test_equal_ids_have_equal_keys_wherever_they_come_from(
    numbers: list[int], data: st.DataObject
) -> None:
    cache = es.VectorCache(0, "space")
    around = data.draw(st.integers(0, 3))
    larger = ids(*[7] * around, *numbers, *[7] * around)
    part = larger[around : around + len(numbers)]
    assert cache.key(part) == cache.key(ids(*numbers))


def test_its_bytes_are_about_those_it_really_takes() -> None:
    # Else the limit that somebody set would be another one.
    cache = es.VectorCache(10**9, "")
    tracemalloc.start()
    try:
        for n in range(2000):
            key = cache.key(ids(n))
            cache.put(key, np.arange(384, dtype=np.float32))
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / 2 < cache.counts.bytes < taken * 2


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 9), st.integers(0, 200)),
        st.tuples(st.just("get"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("clear"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=500, deadline=None)
@given(STEPS, st.integers(0, 5 * cost_of(100)))
def test_it_is_a_list_of_the_ones_used_last_within_its_bytes(
    steps: list[tuple[str, int, int]], max_bytes: int
) -> None:
    cache = es.VectorCache(max_bytes, "")
    model: list[tuple[bytes, Any]] = []  # the one used last at the end
    hits = evictions = 0
    for what, number, numbers in steps:
        key = bytes([number])
        found = [entry for entry in model if entry[0] == key]
        if what == "clear":
            cache.clear()
            model.clear()
        elif what == "get":
            vector_got = cache.get(key)
            assert vector_got is (found[0][1] if found else None)
            model = [entry for entry in model if entry[0] != key] + found
            hits += len(found)
        else:
            put = vector(numbers)
            cache.put(key, put)
            if not found and cost_of(numbers) <= max_bytes:
                model.append((key, put))
            while sum(cost_of(len(v)) for _, v in model) > max_bytes:
                model.pop(0)
                evictions += 1
        size = sum(cost_of(len(v)) for _, v in model)
        assert size <= max_bytes
        assert cache.counts == es.CacheCounts(
            entries=len(model), bytes=size, hits=hits, evictions=evictions
        )
    for key, kept in model:
        assert cache.get(key) is kept
