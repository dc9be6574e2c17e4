"""Room PREFIXES: which blocks of past prompts are kept, found and dropped. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import embellama_server as es

BLOCK = es.BLOCK_TOKENS
STATE_BYTES = 1000


def prompt(*parts: tuple[int, int]) -> es.TokenIds:
    """So many tokens from a number on, part after part."""
    ids = itertools.chain(*(range(first, first + count) for first, count in parts))
    return np.array([*ids], np.int32)


def new_store(blocks: int = 100, window: int = 0) -> es.PrefixStore:
    """Room for so many blocks."""
    size = STATE_BYTES // BLOCK
    return es.PrefixStore(blocks * STATE_BYTES, token_bytes=size, window=window)


def keep(store: es.PrefixStore, ids: es.TokenIds, first: int = 0) -> int:
    """Put what is missing of a prefix; how many blocks that were, -1: it cannot be."""
    blocks = store.missing(ids, first)
    if blocks is None:
        return -1
    for block in blocks:
        if not store.put(block, ids, np.zeros(STATE_BYTES, np.uint8)):
            break
    return len(blocks)


def found(store: es.PrefixStore, ids: es.TokenIds) -> int:
    """With how many tokens a prompt can begin."""
    parts = store.find(ids)
    tokens = np.concatenate([block.ids[:n] for block, n in parts] or [ids[:0]])
    assert tokens.tolist() == ids[: len(tokens)].tolist()
    return len(tokens)


def test_a_prompt_begins_with_what_was_kept_of_it_to_the_token() -> None:
    store, past = new_store(), prompt((0, 3 * BLOCK + 10))
    assert keep(store, past) == 4
    assert store.bytes == 4 * STATE_BYTES
    for shared in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 9, 3 * BLOCK + 10):
        other = prompt((0, shared), (7000, 200))
        assert found(store, other) == shared
    assert found(store, past[:-1]) == len(past) - 1


def test_prefixes_that_begin_alike_have_their_blocks_in_common() -> None:
    store = new_store()
    assert keep(store, prompt((0, 2 * BLOCK), (5000, 5))) == 3
    assert keep(store, prompt((0, 2 * BLOCK), (6000, BLOCK))) == 1
    assert keep(store, prompt((0, 2 * BLOCK), (6000, BLOCK))) == 0
    assert keep(store, prompt((0, 2 * BLOCK), (6000, 20))) == 0, "part of a block"
    assert store.bytes == 4 * STATE_BYTES
    assert found(store, prompt((0, 2 * BLOCK), (5000, 9))) == 2 * BLOCK + 5
    assert found(store, prompt((1, 2 * BLOCK))) == 0, "no block begins so"


def test_an_unfinished_block_gives_way_to_the_one_that_goes_on() -> None:
    store = new_store()
    keep(store, prompt((0, BLOCK + 10)))
    assert keep(store, prompt((0, BLOCK + 30))) == 1
    assert store.bytes == 2 * STATE_BYTES
    assert keep(store, prompt((0, 2 * BLOCK + 1))) == 2
    assert store.bytes == 3 * STATE_BYTES
    assert store.dropped == 0, "nothing was lost by it"


def test_what_was_unused_for_longest_is_dropped_and_its_end_first() -> None:
    store = new_store(blocks=6)
    one, two = prompt((0, 3 * BLOCK)), prompt((5000, 3 * BLOCK))
    keep(store, one)
    keep(store, two)
    found(store, one)
    keep(store, prompt((9000, 2 * BLOCK)))
    assert store.dropped == 2
    assert [found(store, ids) for ids in (one, two)] == [3 * BLOCK, BLOCK]
    assert store.bytes == 6 * STATE_BYTES


def test_a_prefix_larger_than_the_store_says_so_and_leaves_no_orphans() -> None:
    store = new_store(blocks=3)
    large = prompt((0, 9 * BLOCK))
    assert store.fits(3 * BLOCK)
    assert not store.fits(len(large))
    keep(store, large)
    assert store.bytes == 3 * STATE_BYTES
    assert found(store, large) == 3 * BLOCK
    assert not es.PrefixStore(0, token_bytes=1).fits(1)


def test_a_block_whose_beginning_was_dropped_meanwhile_is_not_kept() -> None:
    store = new_store()
    ids = prompt((0, 2 * BLOCK))
    blocks = store.missing(ids)
    assert blocks is not None
    first, second = blocks
    store.put(first, ids, np.zeros(1, np.uint8))
    store.clear()
    assert not store.put(second, ids, np.zeros(1, np.uint8))
    assert (store.bytes, store.find(ids)) == (0, [])


def test_a_prefix_of_which_a_window_has_left_some_is_kept_only_where_the_rest_is() -> (
    None
):
    store, past = new_store(window=BLOCK + 1), prompt((0, 3 * BLOCK))
    assert keep(store, past, first=1) == -1
    assert store.bytes == 0
    keep(store, past[: 2 * BLOCK])
    assert keep(store, past, first=2 * BLOCK + 1) == -1
    assert keep(store, past, first=2 * BLOCK) == 1
    assert keep(store, past, first=2 * BLOCK + 1) == 0
    assert found(store, past) == 3 * BLOCK


def test_blocks_are_no_longer_than_the_window() -> None:
    store, past = new_store(window=10), prompt((0, 25))
    assert keep(store, past) == 3
    assert found(store, past) == 25


# Of two tokens in blocks of three, prompts that have much in common.
Prompts = st.lists(
    st.lists(st.integers(1, 2), min_size=1, max_size=14), min_size=1, max_size=12
)


@hypothesis.given(prompts=Prompts, blocks=st.integers(1, 12), asked=Prompts)
def test_whatever_is_kept_a_prompt_gets_its_own_tokens_within_the_bounds(
    prompts: Sequence[list[int]], blocks: int, asked: Sequence[list[int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(es, "BLOCK_TOKENS", 3)
        store = new_store(blocks)
        for number, ids in enumerate(prompts):
            keep(store, np.array(ids, np.int32))
            assert store.bytes <= blocks * STATE_BYTES
            wanted = asked[number % len(asked)]
            shared = found(store, np.array(wanted, np.int32))
            past = [np.array(one, np.int32) for one in prompts[: number + 1]]
            want = np.array(wanted, np.int32)
            best = max(es.common_prefix(one, want) for one in past)
            assert shared <= best
            if not store.dropped:
                assert shared == best
