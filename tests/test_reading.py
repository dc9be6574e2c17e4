"""Room READING: what is read in parts has the ids of what is read whole, and no slice
takes long.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import chat_models, kit
from tests import models as tiny
from tests.test_engine import ModelPaths, engines, loaded, models  # noqa: F401
from tests.test_workers import Engine, desk

NAMES = ("bert", "bpe", "spm")
WHOLE = 1 << 40  # characters of a part: nothing is read in parts


@contextmanager
def parts_of(chars: int) -> Iterator[None]:
    """Texts longer than so many characters are read in such parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(es, "PART_CHARS", chars)
        patch.setattr(es, "_SLICE_CHARS", 2 * chars)
        patch.setattr(es, "_MARGIN_TOKENS", 8)
        yield


@dataclasses.dataclass
class Reading:
    """An engine's tokenizer, for a model with another card."""

    tokenizer: Any
    card: es.ModelCard

    def read(self, *inputs: es.Input, **wanted: Any) -> tuple[list[Any], int]:
        """The ids of each input or the class of its error, and in how many slices."""
        request = es.EmbedRequest(inputs=inputs, allows_partial=True, **wanted)
        engine: Any = self
        reading = es.Reader(engine, request).read()
        found: list[Any] = []
        slices = cut = 0
        while len(found) < len(inputs):
            slices += 1
            for read in es.next_slice(reading):
                if isinstance(read, es.ApiError):
                    found.append(type(read))
                else:
                    found.append(list(read[0]))
                    cut += read[1]
        return [*found, cut], slices


# Words, what stands between them, marks, and what has no place to cut it.
WORDS = st.sampled_from(
    ["a", "ab", "hello", "x1", "é", "中文字", "</s>", "[SEP]", "<end>", "don't", "…"]
)
GAPS = st.sampled_from([" ", " ", " ", "  ", "\n", ", ", "", "_", "\u3000", "\u00ad"])
RUNS = st.sampled_from(
    [" " * 40, "a" * 70, "中" * 50, "ab " * 20, "\n" * 30, "- " * 20]
)
TEXTS = st.lists(st.one_of(st.tuples(WORDS, GAPS).map("".join), RUNS), max_size=25).map(
    "".join
)
CUTS = st.fixed_dictionaries(
    {"truncates": st.booleans(), "cuts_left": st.booleans()},
    optional={"max_input_tokens": st.integers(4, 60)},
)
QUIET = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.differing_executors],
)


def in_parts_as_whole(reading: Reading, *inputs: es.Input, **wanted: Any) -> list[Any]:
    """What is read is the same however small the parts are."""
    with parts_of(WHOLE):
        expected, _ = reading.read(*inputs, **wanted)
    for chars in (3, 16):
        with parts_of(chars):
            found, _ = reading.read(*inputs, **wanted)
        assert found == expected
    return expected


@pytest.mark.parametrize("name", NAMES)
@QUIET
@given(text=TEXTS, most=st.integers(4, 40), wanted=CUTS)
@example("a " * 50 + "中" * 40, 8, {"truncates": True, "cuts_left": True})
@example("a" * 101 + "\u00ad" * 40 + "b c", 8, {"truncates": True, "cuts_left": False})
def test_a_text_that_is_cut_has_the_ids_of_the_whole_one_cut(
    engines: dict[str, es.Engine],  # noqa: F811
    name: str,
    text: str,
    most: int,
    wanted: dict[str, Any],
) -> None:
    engine = engines[name]
    card = dataclasses.replace(engine.card, max_input_tokens=most)
    found, cut = in_parts_as_whole(Reading(engine.tokenizer, card), text, **wanted)
    limit = min(most, wanted.get("max_input_tokens", most))
    front, end = len(card.prefix), len(card.suffix)
    ids = es.with_special_tokens(engine.tokenizer.encode(text), card)
    if len(ids) <= max(limit, front + end + 1):
        assert (found, cut) == (ids, 0)
    elif not wanted["truncates"]:
        assert found is es.ContextLengthExceeded
    else:
        limit = max(limit, front + end + 1)
        left = wanted["cuts_left"]
        assert found == es.truncated(ids, limit, front, end, left=left)
        assert cut == 1


TEMPLATES = ("", "Q: {query} D: {document} end", "{document}{query}")


@pytest.mark.parametrize("name", NAMES)
@QUIET
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=2),
    query=TEXTS.filter(bool),
    template=st.sampled_from(TEMPLATES),
    most=st.integers(8, 40),
    wanted=CUTS,
    more=st.sampled_from([{}, {"max_text_tokens": 7}]),
)
def test_pairs_and_prompts_that_are_cut_have_the_ids_of_whole_ones(
    engines: dict[str, es.Engine],  # noqa: F811
    name: str,
    texts: list[str],
    query: str,
    template: str,
    most: int,
    wanted: dict[str, Any],
    more: dict[str, Any],
) -> None:
    engine = engines[name]
    card = dataclasses.replace(
        engine.card,
        max_input_tokens=most,
        pair_separator=(5,),
        pair_suffix=(6,),
        pair_template=template,
        n_scores=1,
    )
    reading = Reading(engine.tokenizer, card)
    pairs = [es.Pair(query, text) for text in texts]
    in_parts_as_whole(reading, *pairs, **(wanted | more))
    around = (f"{query[:9]} ", " end")
    in_parts_as_whole(reading, *texts, around=around, **wanted)


# SentencePiece with a space in front and without, byte pairs, WordPiece.
KINDS: dict[str, Callable[[Path], Path]] = {
    "llama": chat_models.tiny_llama,
    "gemma3": chat_models.tiny_gemma,
    "qwen3": chat_models.tiny_qwen,
    "bert": tiny.tiny_bert,
}
AROUND = [
    *[("the sea ", ""), ("the sea ", " said he")],
    *[("", "\nof time"), ("he said", " and no"), ("the sea\n", "\n\nno")],
]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_cut_leaves_its_prompt_and_nothing_at_its_other_end(
    tmp_path: Path, kind: str, left: bool
) -> None:
    # A prompt's last space is often one token with the text's first word, and of what is
    # tokenized by itself SentencePiece's first is a space.
    text = "many people were there before us all day, yet none of them knew why or how"
    pooling = {} if kind == "bert" else {"pooling": "mean"}
    with loaded(KINDS[kind](tmp_path), **pooling) as engine:
        tokenizer, card = engine.tokenizer, engine.card
        special = len(card.prefix), len(card.suffix)
        card = dataclasses.replace(card, max_input_tokens=sum(special) + 22)
        for before, after in AROUND:
            wanted = {"truncates": True, "cuts_left": left, "around": (before, after)}
            ids, is_cut = in_parts_as_whole(Reading(tokenizer, card), text, **wanted)
            assert is_cut and len(ids) == card.max_input_tokens
            own = ids[special[0] : len(ids) - special[1]]
            said = "".join(tokenizer.pieces(own)).lstrip(" ")
            before, after = before.rstrip(), after if kind != "bert" else after.strip()
            assert said.startswith(before) and said.endswith(after)
            kept = said[len(before) : len(said) - len(after)].strip()
            assert kept and (text.endswith if left else text.startswith)(kept), said


@given(
    size=st.integers(1, 200),
    framing=st.tuples(st.booleans(), st.booleans()),
    left=st.booleans(),
)
def test_a_list_of_ids_is_cut_as_if_all_of_it_had_been_looked_at(
    size: int, framing: tuple[bool, bool], left: bool
) -> None:
    card = kit.fake_card(max_input_tokens=20, prefix=(1, 8), suffix=(2,))
    ids = [*card.prefix * framing[0], *range(10, 10 + size), *card.suffix * framing[1]]
    whole = es.with_special_tokens_once(ids, card)
    expected = es.truncated(whole, 20, 2, 1, left=left) if len(whole) > 20 else whole
    reading = Reading(kit.FakeEngine(), card)
    assert reading.read(ids, truncates=True, cuts_left=left)[0][0] == expected


# --- how much is read, and how much at a time ---

WORD_PIECE = es.WordPiece(
    ["[UNK]", "[SEP]", "\u2581a", "\u2581b", "a"],
    {"[UNK]": 0, "[SEP]": 1},
    0,
    lowercase=True,
    strip_accents=True,
)


def word_pieces(most: int = 16) -> Reading:
    """BERT's tokenizer, which is ours, without a model."""
    tokenizer = object.__new__(es.Tokenizer)
    tokenizer._word_piece = WORD_PIECE
    return Reading(tokenizer, kit.fake_card(max_input_tokens=most))


MANY = 20 * es.PART_CHARS
HUGE = {
    "words": "a b " * (MANY // 4),
    "blanks": " " * MANY,
    "one word": "a" * MANY,
    "Han": "中" * MANY,
    "kana": "か" * MANY,
    "marks": "[SEP]" * (MANY // 5),
    "nothing": "\u00ad" * MANY,
    "mixed": "a, か" * (MANY // 4),
}


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("kind", HUGE)
def test_a_huge_text_is_read_a_little_at_a_time_and_only_as_far_as_needed(
    kind: str, left: bool
) -> None:
    text = HUGE[kind]
    reading = word_pieces()
    ids = es.with_special_tokens(WORD_PIECE.encode(text), reading.card)
    found, slices = reading.read(text, truncates=True, cuts_left=left)
    if len(ids) > 16:
        assert found == [es.truncated(ids, 16, 1, 1, left=left), 1]
        assert slices <= 2, "a few thousand characters are enough"
    else:
        assert found == [ids, 0]
        assert slices >= MANY // (2 * es._SLICE_CHARS), "others have had their turns"
    if not left and len(ids) > 16:
        refused, slices = reading.read(text)
        assert refused == [es.ContextLengthExceeded, 0]
        assert slices <= 2, "what is too long is so after a few thousand, too"


class Counting(Engine):
    """Counts the characters that are tokenized."""

    def __init__(self) -> None:
        super().__init__(max_input_tokens=100)
        self.chars = 0

    def encode(self, text: str) -> list[int]:
        ids = super().encode(text)
        self.chars += len(text)
        return ids


@pytest.mark.parametrize(
    ("inputs", "truncates"),
    [
        (["word " * 900_000] * 20, True),
        (["w" * 15_000 + " x"] * 300, True),
        (["short text"] * 1000, False),
        ([" " * 4_000_000], False),
        (["w" * 15_000 + " x"] * 300, False),
    ],
    ids=["huge, to be cut", "large", "many", "a huge one", "large, refused one by one"],
)
def test_a_line_waits_for_no_more_than_a_slice_of_each_other_client(
    inputs: Sequence[str], truncates: bool
) -> None:
    engine = Counting()
    engine.hold("held")
    with desk(engine, limit=es.Size(10**4, 10**9, 1 << 40)) as at:
        at.submit("held", client="first")
        engine.wait_until_tokenizing("held")
        jobs = [
            at.submit(
                *inputs, client="import", truncates=truncates, allows_partial=True
            )
            for _ in range(5)
        ]
        urgent = at.submit("urgent line", client="urgent", priority=0)
        line = at.submit("a line", client="line")
        seen: list[int] = []
        task = es.TokenizerTask(lambda: seen.append(engine.chars), "task")
        at.pool.queue.submit_task(task)
        engine.chars = 0
        engine.hold("held").set()
        engine.wait_until_tokenizing("a line")
        assert engine.tokenized.index("urgent line") == 1, "before what is less urgent"
        before = sum(map(len, engine.tokenized[1 : engine.tokenized.index("a line")]))
        assert before <= es._SLICE_CHARS + 2 * es.PART_CHARS
        at.wait_for(urgent, line)
        for job in jobs:
            at.pool.queue.cancel(job)
        at.result("last", client="first")
        assert seen
        assert seen[0] <= 2 * (es._SLICE_CHARS + 2 * es.PART_CHARS)
        assert at.room_taken() == (0, 0)


@pytest.mark.model
@QUIET
@given(text=TEXTS, left=st.booleans())
def test_the_default_models_texts_are_cut_as_if_they_had_been_read_whole(
    engine: es.Engine, text: str, left: bool
) -> None:
    card = dataclasses.replace(engine.card, max_input_tokens=12)
    whole = es.with_special_tokens(engine.tokenizer.encode(text), card)
    expected = es.truncated(whole, 12, 1, 1, left=left) if len(whole) > 12 else whole
    found = in_parts_as_whole(
        Reading(engine.tokenizer, card), text, truncates=True, cuts_left=left
    )
    assert found[0] == expected
