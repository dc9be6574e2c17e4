"""BATCHING and WORKERS: what is wanted of an input, pairs, and where what is long is cut.

As in test_workers.py: real threads, a fake engine whose calls can be held.
"""

from __future__ import annotations

import dataclasses
import io
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import embellama_server as es
from tests import kit
from tests.test_workers import (
    Clock,
    Engine,
    assert_vectors,
    busy_desk,
    desk,
    hold_up,
    let_go,
)

BETWEEN, AFTER = 7, 8  # special tokens of a pair


def ids_of(text: str) -> list[int]:
    """Of its words, without special ones."""
    return [kit.fake_id(word) for word in text.split()]


def with_special_tokens(text: str) -> list[int]:
    """A text's ids as a call has them."""
    return [1, *ids_of(text), 2]


def computed(engine: kit.FakeEngine) -> list[list[int]]:
    """All inputs of all calls."""
    return [ids for call in engine.calls for ids in call]


# --- vectors of inputs, and of their tokens ---


def test_vectors_of_inputs_and_of_their_tokens_have_places_of_their_own() -> None:
    engine = Engine()
    with desk(engine, cache_bytes=10**6) as at:
        for _ in range(2):
            assert_vectors(at.result("a"))
            assert_vectors(at.result("a", per_token=True))
        assert at.pool.queue.cache.counts.entries == 1, "of the input alone"
    assert computed(engine) == [with_special_tokens("a")] * 3


@pytest.mark.parametrize("n_scores", [0, 1])
def test_a_row_of_zeros_is_no_vector_but_may_be_a_score(n_scores: int) -> None:
    engine = Engine(n_scores=n_scores)
    with desk(engine) as at:
        engine.hole_at, engine.hole = 0, 0.0
        error = at.result("a").error
        assert isinstance(error, es.NonFiniteVector) == (n_scores == 0)
        engine.hole_at = None
        assert at.result("b").error is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n_scores", [0, 3])
def test_one_number_that_is_not_finite_spoils_its_row_and_no_other(
    bad: float, n_scores: int
) -> None:
    rows = np.array([[3, 4, 0], [1, bad, 2], [0, 0, 5]], np.float32)
    card = kit.fake_card(n_embd=3, n_scores=n_scores)
    first, second, third = es._outcomes(rows, card)
    assert second is es.NonFiniteVector
    np.testing.assert_array_equal([first, third], rows[[0, 2]])
    assert es._outcomes(np.stack([rows, rows]), card) == [es.NonFiniteVector] * 2


@pytest.mark.parametrize("word", [kit.NAN_WORD, kit.BOOM_WORD])
@pytest.mark.parametrize("per_token", [False, True])
def test_what_has_no_numbers_fails_in_every_form_and_alone(
    per_token: bool, word: str
) -> None:
    engine = Engine()
    with desk(engine) as at:
        job = at.result("good", word, per_token=per_token, allows_partial=True)
        assert list(job.errors) == [1]
        wanted = {kit.NAN_WORD: es.NonFiniteVector, kit.BOOM_WORD: es.EngineFailed}
        assert isinstance(job.errors[1], wanted[word])
        assert job.vectors[0] is not None
        assert_vectors(at.result("good"))
        assert at.room_taken() == (0, 0)


def test_tokens_are_a_row_each_of_the_tokens_alone_in_their_call() -> None:
    engine = Engine()
    with busy_desk(engine) as at:
        beside = at.submit("a b", "c")
        job = at.submit("a b", "c d e", per_token=True)
        let_go(at, engine, beside, job)
        assert_vectors(beside)
        assert_vectors(job)
        assert [len(rows) for rows in job.vectors] == [4, 5]
        assert job.tokens == 9
        assert at.room_taken() == (0, 0)
    assert sorted(engine.calls[2:], key=len) == [
        [with_special_tokens("a b")],
        [with_special_tokens("c d e")],
    ]
    assert engine.long_contexts_made == 1, "one context for all of them"


def test_tokens_are_never_cached_and_never_found_in_the_cache() -> None:
    engine = Engine()
    with desk(engine, cache_bytes=10**6) as at:
        at.result("a")
        entries = at.pool.queue.cache.counts.entries
        for _ in range(2):
            assert_vectors(at.result("a", per_token=True))
        counts = at.pool.queue.cache.counts
        assert (counts.entries, counts.hits) == (entries, 0)
        assert_vectors(at.result("a"))
    assert computed(engine) == [with_special_tokens("a")] * 3


def test_equal_inputs_wanted_by_tokens_are_one_computation_while_it_lasts() -> None:
    engine = Engine()
    with busy_desk(engine) as at:
        jobs = [at.submit("a b", "a b", per_token=True) for _ in range(2)]
        unit = at.submit("a b")
        let_go(at, engine, unit, *jobs)
        for job in (unit, *jobs):
            assert_vectors(job)
    assert computed(engine).count(with_special_tokens("a b")) == 2, "once in each form"


def test_tokens_of_a_text_of_any_length_are_told() -> None:
    engine = Engine(max_input_tokens=200, context_tokens=64)
    with desk(engine, workers=2) as at:
        long = "word " * 150
        by_tokens, whole = at.submit(long, "a", per_token=True), at.submit(long, "a")
        at.wait_for(by_tokens, whole)
        assert_vectors(by_tokens)
        assert_vectors(whole)
        assert engine.contexts_open == 2 + 2
    assert engine.long_contexts_made == 2
    assert engine.contexts_open == 0, "both are closed at the end"


def test_short_inputs_go_on_while_tokens_are_computed() -> None:
    engine = Engine()
    with desk(engine, workers=2) as at:
        held = engine.hold_call("slow")
        slow = at.submit("slow", per_token=True)
        kit.wait(held.began)
        waiting = at.submit("waits", per_token=True)
        assert_vectors(at.result("short"))
        assert at.finished[waiting] == 0, "there is one such context"
        held.go.set()
        at.wait_for(slow, waiting)
        assert_vectors(waiting)


def test_a_context_for_tokens_that_failed_is_renewed() -> None:
    engine = Engine()
    engine.failures[kit.fake_id(kit.BOOM_WORD)] = 1
    log = io.StringIO()
    with desk(engine, log=es.Log("error", "text", log)) as at:
        long = at.result("before", per_token=True)
        assert_vectors(long)
        job = at.result(f"a {kit.BOOM_WORD}", per_token=True)
        assert_vectors(job)
        assert (at.calls[-1].recovered, at.calls[-1].refused) == (1, 0)
        assert engine.long_contexts_made == 2
        assert engine.contexts_open == 1 + 1, "the old one is closed"
        assert_vectors(at.result("after", per_token=True))
    assert engine.long_contexts_made == 2
    assert "boom" in log.getvalue()


def test_a_failed_context_for_tokens_leaves_the_long_context_for_long_inputs() -> None:
    engine = Engine(max_input_tokens=200, context_tokens=64)
    with desk(engine) as at:
        assert_vectors(at.result("word " * 150))
        failed = at.result(kit.BOOM_WORD, per_token=True)
        assert isinstance(failed.error, es.EngineFailed)
        assert_vectors(at.result("word " * 151))
        assert engine.long_contexts_made == 1 + 2, (
            "of tokens: for the call and its second try"
        )


def test_no_long_context_for_tokens_fails_these_and_nothing_else() -> None:
    engine = Engine()
    engine.long_context_error = es.StartupError("no room")
    with desk(engine) as at:
        bad, good = at.submit("a", per_token=True), at.submit("a")
        at.wait_for(bad, good)
        assert isinstance(bad.error, es.OutOfMemory)
        assert_vectors(good)
        engine.long_context_error = None
        assert_vectors(at.result("a", per_token=True))


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_token_without_a_finite_vector_fails_its_input(row: int) -> None:
    engine = Engine()
    with desk(engine) as at:
        engine.hole_at = row
        job = at.result("a", per_token=True)
        assert isinstance(job.error, es.NonFiniteVector), job.vectors
        engine.hole_at = None
        assert_vectors(at.result("a", per_token=True))


@pytest.mark.parametrize("per_token", [False, True])
def test_what_nobody_waits_for_is_never_computed_in_any_form(
    per_token: bool,
) -> None:
    engine = Engine()
    with busy_desk(engine) as at:
        job = at.submit("unwanted", per_token=per_token)
        last = at.submit("last")
        engine.wait_until_tokenizing("last")
        at.pool.queue.cancel(job)
        engine.release()
        at.wait_for(at.first, last)
        assert at.room_taken() == (0, 0)
    assert with_special_tokens("unwanted") not in computed(engine)


# --- what is cut ---

NUMBERS = " ".join(str(n) for n in range(100))


def test_a_job_says_whether_and_where_it_is_cut() -> None:
    engine = Engine()
    with desk(engine) as at:
        jobs = [
            at.submit(NUMBERS),
            at.submit(NUMBERS, truncates=True),
            at.submit(NUMBERS, truncates=True, cuts_left=True),
            at.submit(NUMBERS, cuts_left=True),
        ]
        at.wait_for(*jobs)
    for refused in (jobs[0], jobs[3]):
        assert isinstance(refused.error, es.ContextLengthExceeded)
        assert refused.truncated == 0
    own = ids_of(NUMBERS)
    for job, kept in ((jobs[1], own[:30]), (jobs[2], own[-30:])):
        assert (job.error, job.truncated, job.tokens) == (None, 1, 32)
        expected = kit.fake_row([1, *kept, 2])
        np.testing.assert_array_equal(job.vectors[0], expected)


@pytest.mark.parametrize("cuts_left", [False, True])
def test_ids_are_cut_as_texts_are(cuts_left: bool) -> None:
    engine = Engine()
    own = ids_of(NUMBERS)
    with desk(engine) as at:
        how = {"truncates": True, "cuts_left": cuts_left}
        job = at.result(own, [1, *own, 2], "fits", **how)
        assert (job.error, job.truncated) == (None, 2)
    kept = own[-30:] if cuts_left else own[:30]
    assert computed(engine)[0] == [1, *kept, 2]
    assert len(computed(engine)) == 2, "special tokens are put once: both are equal"
    # The same without special tokens, of which the tail would be cut off with the rest.
    with desk(Engine(prefix=(), suffix=())) as at:
        assert at.result(own, own[:32], **how).truncated == 1


def test_the_tokenizer_sees_the_part_that_is_kept_and_no_more() -> None:
    engine = Engine(max_chars=100)
    text = "begin " + "x " * 500 + "the end"
    with desk(engine) as at:
        right = at.result(text, truncates=True)
        left = at.result(text, truncates=True, cuts_left=True)
        assert (right.error, left.error) == (None, None)
    assert engine.tokenized == [text[:100], text[-100:]]
    assert computed(engine)[0][:2] == [1, kit.fake_id("begin")]
    assert computed(engine)[1][-3:] == [*ids_of("the end"), 2]


@pytest.mark.parametrize("param", ["input", "texts", "documents"])
def test_an_input_is_called_what_the_request_calls_it(param: str) -> None:
    engine = Engine(max_chars=100)
    refused = {"long": "w " * 40, "longer": "w" * 101}
    with desk(engine) as at:
        words = {name: name for name in (kit.NAN_WORD, kit.BOOM_WORD)}
        for text in (refused | words).values():
            error = at.result("good", text, param=param).error
            assert isinstance(error, es.ApiError)
            assert error.param == f"{param}[1]"
            assert f"{param}[1] " in error.message
        # And each owner of an equal one by its own name.
        hold_up(at, engine)
        mine = at.submit(kit.NAN_WORD, param=param)
        other = at.submit("fine", kit.NAN_WORD, param="other")
        let_go(at, engine, mine, other)
        for job, name in ((mine, f"{param}[0]"), (other, "other[1]")):
            assert isinstance(job.error, es.NonFiniteVector)
            assert job.error.param == name


# --- pairs ---


def ranker(**card: Any) -> Engine:
    """Gives two scores of a pair, and asserts that nobody takes them for a vector."""
    frame = {"pair_separator": (2, BETWEEN), "pair_suffix": (AFTER,)}
    return Engine(**({"n_scores": 2, **frame} | card))


def pairs(query: str, *texts: str) -> list[es.Pair]:
    return [es.Pair(query, text) for text in texts]


def pair_ids(query: str, text: str) -> list[int]:
    """As a call has them."""
    return [1, *ids_of(query), 2, BETWEEN, *ids_of(text), AFTER]


def score_of(ids: Sequence[int]) -> Any:
    return kit.fake_vector(ids)[:2]


def test_a_pair_is_a_query_and_a_text_between_special_tokens() -> None:
    engine = ranker()
    with desk(engine) as at:
        job = at.result(*pairs("the cat", "one", "two three", ""))
        assert job.error is None
        for text, row in zip(("one", "two three", ""), job.vectors, strict=True):
            np.testing.assert_array_equal(row, score_of(pair_ids("the cat", text)))
        assert job.tokens == sum(map(len, computed(engine)))
    expected = [pair_ids("the cat", text) for text in ("one", "two three", "")]
    assert sorted(computed(engine)) == sorted(expected)


def test_a_query_is_tokenized_once() -> None:
    engine = ranker()
    texts = [f"text {n}" for n in range(100)]  # of several slices
    with desk(engine, workers=2, tokenization_workers=3) as at:
        jobs = [at.submit(*pairs(f"query {n}", *texts)) for n in range(3)]
        at.wait_for(*jobs)
    for number, job in enumerate(jobs):
        assert job.error is None
        assert engine.tokenized.count(f"query {number}") == 1
        for text, row in zip(texts, job.vectors, strict=True):
            wanted = score_of(pair_ids(f"query {number}", text))
            np.testing.assert_array_equal(row, wanted)


def test_equal_pairs_are_one_computation_and_their_scores_are_cached() -> None:
    engine = ranker()
    with desk(engine, cache_bytes=10**6) as at:
        for _ in range(2):
            at.result(*pairs("q", "a", "b", "a"))
        at.result(*pairs("q a", "b"))
    assert sorted(computed(engine)) == sorted(
        [pair_ids("q", "a"), pair_ids("q", "b"), pair_ids("q a", "b")]
    )


def test_a_query_without_room_for_a_text_is_refused_by_name() -> None:
    engine = ranker()  # 32 tokens, 4 of them special
    with desk(engine) as at:
        error = at.result(*pairs("w " * 28, "a"), param="documents").error
        assert isinstance(error, es.ContextLengthExceeded)
        assert error.param == "query"
        assert "query has 32 tokens" in error.message
        assert "at most 32" in error.message
        assert at.result(*pairs("w " * 27, "a")).error is None
        assert at.room_taken() == (0, 0)


@pytest.mark.parametrize("cuts_left", [False, True])
@pytest.mark.parametrize(
    ("query", "text", "kept"),  # tokens; of the 28 that are not special
    [
        *((27, 1, (27, 1)), (27, 99, (27, 1)), (28, 0, (28, 0)), (28, 1, (27, 1))),
        *((99, 0, (28, 0)), (99, 3, (25, 3)), (99, 14, (14, 14)), (99, 99, (14, 14))),
    ],
)
def test_of_a_query_that_is_too_long_as_much_is_read_as_the_text_leaves(
    query: int, text: int, kept: tuple[int, int], cuts_left: bool
) -> None:
    engine = ranker()
    how = {"truncates": True, "cuts_left": cuts_left}
    words = [
        [f"{what}{n}" for n in range(size)] for what, size in zip("qt", (query, text))
    ]
    with desk(engine) as at:
        job = at.result(*pairs(*map(" ".join, words)), **how)
        assert (job.error, job.truncated) == (None, int(kept != (query, text)))
    own = [
        ids_of(" ".join(all_[len(all_) - n :] if cuts_left else all_[:n]))
        for all_, n in zip(words, kept)
    ]
    assert computed(engine) == [[1, *own[0], 2, BETWEEN, *own[1], AFTER]]


@pytest.mark.parametrize("cuts_left", [False, True])
def test_a_text_is_cut_to_as_many_tokens_as_are_asked_for(cuts_left: bool) -> None:
    engine = ranker()
    how = {"cuts_left": cuts_left, "max_text_tokens": 3}
    with desk(engine) as at:
        assert at.result(*pairs("q", "a b c d", "a b c", ""), **how).error is None
    cut = "b c d" if cuts_left else "a b c"
    expected = [pair_ids("q", text) for text in (cut, "a b c", "")]
    assert sorted(computed(engine)) == sorted(
        map(list, {tuple(ids) for ids in expected})
    )


@pytest.mark.parametrize("most", [1, 5, 7, 31, 32, 99])
def test_a_pair_is_cut_to_as_many_tokens_as_are_asked_for(most: int) -> None:
    engine = ranker()
    how = {"truncates": True, "max_input_tokens": most}
    with desk(engine) as at:
        assert at.result(*pairs("q r", NUMBERS), **how).error is None
    (ids,) = computed(engine)
    assert len(ids) == max(4 + 2, min(most, 32)), "special ones, one of each"
    assert ids[0] == 1 and ids[-1] == AFTER


@pytest.mark.parametrize("cuts_left", [False, True])
def test_cutting_a_text_leaves_both_halves_of_its_prompt(cuts_left: bool) -> None:
    engine = Engine(max_chars=150)
    how = {"truncates": True, "cuts_left": cuts_left, "around": ("p r ", " o m t")}
    words = [f"w{n}" for n in range(100)]
    with desk(engine) as at:
        text = " ".join(words)
        assert at.result(text, "x", **how).error is None
    kept = words[-25:] if cuts_left else words[:25]
    front, end = ids_of("p r"), ids_of("o m t")
    long, short = computed(engine)
    assert long == [1, *front, *ids_of(" ".join(kept)), *end, 2]
    assert short == with_special_tokens("p r x o m t")


def test_a_prompt_without_room_for_a_text_is_cut_like_a_text() -> None:
    engine = Engine()
    with desk(engine) as at:
        prompt = "p " * 40
        job = at.result("x", truncates=True, around=(prompt, ""))
        assert (job.error, job.truncated) == (None, 1)
    assert computed(engine) == [[1, *ids_of("p " * 30), 2]]


def test_each_pair_of_a_partial_job_is_told_that_the_query_is_too_long() -> None:
    with desk(ranker()) as at:
        long = pairs("w " * 40, "a", "b")
        job = at.result(*long, allows_partial=True)
        assert job.error is None
        assert [job.errors[n].param for n in range(2)] == ["query", "query"]


@pytest.mark.parametrize("cuts_left", [False, True])
def test_a_text_that_is_cut_leaves_the_query_and_the_end(cuts_left: bool) -> None:
    engine = ranker()
    how = {"truncates": True, "cuts_left": cuts_left}
    with desk(engine) as at:
        job = at.result(*pairs("the query", NUMBERS, "short"), **how)
        assert (job.error, job.truncated) == (None, 1)
    room = 32 - len(pair_ids("the query", ""))
    own = ids_of(NUMBERS)
    kept = own[-room:] if cuts_left else own[:room]
    expected = [1, *ids_of("the query"), 2, BETWEEN, *kept, AFTER]
    assert computed(engine)[0] == expected
    assert len(expected) == 32


def test_a_text_that_is_too_long_for_its_query_is_refused_by_name() -> None:
    with desk(ranker()) as at:
        job = at.result(*pairs("q", "a", "w " * 28), param="documents")
        assert isinstance(job.error, es.ContextLengthExceeded)
        assert job.error.param == "documents[1]"


@pytest.mark.parametrize("truncates", [False, True])
def test_the_tokenizer_sees_no_more_of_a_pair_than_it_may(truncates: bool) -> None:
    engine = ranker(max_chars=50)
    with desk(engine) as at:
        asked = pairs("q " * 100, "a"), pairs("q", "a " * 100)
        for each, name in zip(asked, ("query", "documents[0]"), strict=True):
            how = {"truncates": truncates, "param": "documents"}
            job = at.result(*each, **how)
            if not truncates:
                assert isinstance(job.error, es.ContextLengthExceeded)
                assert job.error.param == name
    assert max(map(len, engine.tokenized), default=0) <= 50


# Words are tokens here too.
TEMPLATE = "begin {query} then {document} end of {query} ."


def template_ids(query: str, text: str) -> list[int]:
    """The template filled in; nothing around it."""
    return ids_of(f"begin {query} then {text} end of {query} .")


def test_a_template_is_the_whole_of_a_pair() -> None:
    engine = ranker(pair_template=TEMPLATE)
    with desk(engine) as at:
        job = at.result(*pairs("the cat", "one", "two three"))
        assert job.error is None
    expected = [template_ids("the cat", text) for text in ("one", "two three")]
    assert computed(engine) == expected


@pytest.mark.parametrize("cuts_left", [False, True])
def test_a_text_cut_within_a_template_leaves_all_the_rest(cuts_left: bool) -> None:
    engine = ranker(pair_template=TEMPLATE)
    how = {"truncates": True, "cuts_left": cuts_left}
    with desk(engine) as at:
        job = at.result(*pairs("q", NUMBERS), **how)
        assert (job.error, job.truncated) == (None, 1)
        job = at.result(*pairs("q " * 14, "a"), **(how | {"truncates": False}))
        assert isinstance(job.error, es.ContextLengthExceeded)
        assert job.error.param == "query"
        job = at.result(*pairs("r " * 14, "a", "a"), **how)
        assert (job.error, job.truncated) == (None, 2), "the query was, for both"
    own, room = ids_of(NUMBERS), 32 - len(template_ids("q", ""))
    kept = own[-room:] if cuts_left else own[:room]
    front, end = ids_of("begin q then"), ids_of("end of q .")
    halved = template_ids("r " * 7, "a")
    assert computed(engine) == [[*front, *kept, *end], halved]


@pytest.mark.parametrize("word", ["{query}", "{document}", "{text}", "{}", "{0}", "%s"])
def test_a_text_that_looks_like_a_template_is_only_a_text(word: str) -> None:
    engine = ranker(pair_template=TEMPLATE)
    with desk(engine) as at:
        for query, text in (("q", f"a {word} b"), (f"a {word} b", "t"), (word, word)):
            assert at.result(es.Pair(query, text)).error is None
            assert computed(engine)[-1] == template_ids(query, text)


@pytest.mark.parametrize("cuts_left", [False, True])
def test_a_templates_end_outlives_a_text_cut_by_characters(cuts_left: bool) -> None:
    engine = ranker(pair_template=TEMPLATE, max_chars=120)
    how = {"truncates": True, "cuts_left": cuts_left}
    with desk(engine) as at:
        job = at.result(*pairs("q", "x " * 500), **how)
        assert (job.error, job.truncated) == (None, 1)
    front, end = ids_of("begin q then"), ids_of("end of q .")
    middle = ids_of("x") * (32 - len(front) - len(end))
    assert computed(engine) == [[*front, *middle, *end]]


@pytest.mark.parametrize("truncates", [False, True])
def test_of_a_query_in_a_template_the_tokenizer_sees_no_more_than_it_may(
    truncates: bool,
) -> None:
    engine = ranker(pair_template=TEMPLATE, max_chars=120)
    with desk(engine) as at:
        job = at.result(*pairs("q " * 500, "a"), truncates=truncates)
        if truncates:
            assert job.error is None
        else:
            assert isinstance(job.error, es.ContextLengthExceeded)
            assert job.error.param == "query"
    assert max(map(len, engine.tokenized), default=0) <= 120


def test_a_rankers_canary_is_no_vector_either() -> None:
    engine = ranker()
    with desk(engine) as at:
        engine.fails_always = True
        for n in range(es.Breaker.SUSPICIOUS_FAILURES):
            at.result(*pairs("q", f"a{n}"))
        at.pool.watch()
        at.run_until(lambda: at.pool.queue.breaker.is_open)
        engine.fails_always = False
        at.pool.queue.clock = clock = Clock()
        clock.now = 10**9
        at.pool.watch()
        at.run_until(lambda: not at.pool.queue.breaker.is_open)
        assert at.result(*pairs("q", "works again")).error is None


def test_dead_letters_hold_both_texts_of_a_pair(tmp_path: Path) -> None:
    letters = es.LineFile(str(tmp_path / "dead"), kit.quiet_log())
    with desk(ranker(), dead_letters=letters) as at:
        at.result(*pairs("the query", f"poison {kit.BOOM_WORD}"))
    (line,) = (tmp_path / "dead").read_text().splitlines()
    found = json.loads(line)
    expected = ("the query", f"poison {kit.BOOM_WORD}", "engine_failed")
    assert (found["query"], found["input"], found["code"]) == expected


PAIR_CARD = kit.fake_card(
    max_input_tokens=10**6,
    n_scores=1,
    pair_separator=(2, BETWEEN),
    pair_suffix=(AFTER,),
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def worst(part: str) -> list[int]:
    """At worst a token for each character of the decomposition, or each byte."""
    return [9] * (len(part) if part.isascii() else 4 * len(part))


@given(TEXTS, TEXTS)
@example("각값", "\u1f82" * 9)
def test_no_pair_has_more_tokens_than_are_reserved_for_it(
    query: str, text: str
) -> None:
    ids = es.pair_with_special_tokens(worst(query), worst(text), PAIR_CARD)
    found = kit.token_bound(es.Pair(query, text), PAIR_CARD)
    assert len(ids) <= found <= len(ids) + 2 + 1


@pytest.mark.parametrize(
    "template", [TEMPLATE, "Отвечает ли текст на этот вопрос? {query} {document}"]
)
def test_no_pair_in_a_template_has_more_tokens_than_are_reserved_for_it(
    template: str,
) -> None:
    card = dataclasses.replace(PAIR_CARD, pair_template=template)
    whole = template.replace("{query}", "q" * 99).replace("{document}", "d" * 99)
    found = kit.token_bound(es.Pair("q" * 99, "d" * 99), card)
    assert len(whole.encode()) <= found


def test_no_pair_takes_more_room_than_the_model_can_read() -> None:
    card = kit.fake_card(n_scores=1)
    assert kit.token_bound(es.Pair("q" * 9999, "t"), card) == card.max_input_tokens


def test_a_rankers_rows_are_as_long_as_it_has_scores() -> None:
    assert PAIR_CARD.row_length == 1
    embeds = kit.fake_card()
    assert embeds.row_length == embeds.n_embd


def task(work: Callable[[], object]) -> es.TokenizerTask:
    """One of nobody in particular."""
    return es.TokenizerTask(work, client="")


# --- tokenizer threads ---


def test_there_are_as_many_tokenizers_as_one_says() -> None:
    before = set(threading.enumerate())
    with desk(Engine(), tokenization_workers=3, workers=2):
        started = kit.threads_since(before)
    names = [f"tokenizer-{n}" for n in range(3)] + ["worker-0", "worker-1"]
    assert started == set(names)
    assert not kit.threads_since(before)


def test_a_text_that_takes_long_to_tokenize_holds_up_one_tokenizer() -> None:
    engine = Engine()
    gate = engine.hold("slow")
    with desk(engine, tokenization_workers=2) as at:
        slow = at.submit("slow", "behind it")
        engine.wait_until_tokenizing("slow")
        for n in range(3):
            assert_vectors(at.result(f"quick {n}"))
        assert "behind it" not in engine.tokenized, "a job has one tokenizer at a time"
        gate.set()
        at.wait_for(slow)
        assert_vectors(slow)


def test_all_tokenizers_work_at_once() -> None:
    engine = Engine()
    texts = [f"text {n}" for n in range(3)]
    gates = [engine.hold(text) for text in texts]
    with desk(engine, tokenization_workers=3) as at:
        jobs = [at.submit(text) for text in texts]
        for text in texts:
            engine.wait_until_tokenizing(text)
        for gate in gates:
            gate.set()
        at.wait_for(*jobs)
        for job in jobs:
            assert_vectors(job)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_tokenizer_that_ended_is_missed() -> None:
    ended: list[threading.Thread] = []
    over = threading.Event()

    def bug() -> object:
        ended.append(threading.current_thread())
        over.set()
        raise SystemExit

    with desk(Engine(), tokenization_workers=2) as at:
        before = at.pool.has_lost_a_thread
        at.pool.queue.submit_task(task(bug))
        kit.wait(over)
        ended[0].join(kit.DEADLINE_S)
        assert (before, at.pool.has_lost_a_thread) == (False, True)
        assert_vectors(at.result("the other one goes on"))


# --- tasks ---


def test_tasks_are_done_by_the_tokenizer_in_the_order_they_came() -> None:
    engine = Engine()
    gate = engine.hold("first")
    done: list[tuple[int, str]] = []
    over = threading.Event()
    with desk(engine) as at:
        first = at.submit("first", "later")
        engine.wait_until_tokenizing("first")
        for number in range(3):

            def work(number: int = number) -> None:
                done.append((number, threading.current_thread().name))
                if number == 2:
                    over.set()

            at.pool.queue.submit_task(task(work))
        assert done == []
        gate.set()
        kit.wait(over)
        at.wait_for(first)
        assert_vectors(first)
        assert at.room_taken() == (0, 0), "a task takes none"
    assert done == [(n, "tokenizer-0") for n in range(3)]


def test_a_task_goes_between_the_slices_of_a_large_job() -> None:
    engine = Engine()
    gate = engine.hold("large 0")
    seen: list[int] = []
    with desk(engine) as at:
        large = at.submit(*(f"large {n}" for n in range(100)))
        engine.wait_until_tokenizing("large 0")
        at.pool.queue.submit_task(task(lambda: seen.append(len(engine.tokenized))))
        gate.set()
        at.wait_for(large)
    assert seen == [32], "after a slice"


def test_tasks_wake_a_tokenizer_that_has_nothing_to_do() -> None:
    with desk(Engine(), tokenization_workers=2) as at:
        for _ in range(10):
            done = threading.Event()
            at.pool.queue.submit_task(task(done.set))
            kit.wait(done)
        assert_vectors(at.result("a"))


def test_a_task_waits_for_the_jobs_before_it_to_have_had_their_turn() -> None:
    engine = Engine()
    gate = engine.hold("first")
    seen: list[list[str]] = []
    with desk(engine) as at:
        jobs = [at.submit("first")]
        engine.wait_until_tokenizing("first")
        jobs += [at.submit(f"before {n}") for n in range(3)]
        at.pool.queue.submit_task(task(lambda: seen.append(list(engine.tokenized))))
        jobs.append(at.submit("after"))
        gate.set()
        at.wait_for(*jobs)
    assert seen == [["first", "before 0", "before 1", "before 2"]]


def test_a_task_that_is_not_run_any_more_is_given_up() -> None:
    engine = Engine()
    gate = engine.hold("first")
    ran: list[None] = []
    with desk(engine) as at:
        first = at.submit("first")
        engine.wait_until_tokenizing("first")
        tasks = [task(lambda: ran.append(None)) for _ in range(3)]
        for each in tasks:
            at.pool.queue.submit_task(each)
        tasks[0].future.cancel()  # nobody waits for it
        error = es.NotReady("bye")
        assert at.pool.queue.abandon_all(error) == 1, "tasks are no jobs"
        assert [each.future.exception() for each in tasks[1:]] == [error] * 2
        gate.set()
        at.wait_for(first)
        assert_vectors(at.result("and on"))
    assert ran == []
