"""Sampling under a grammar, against the choice among just the tokens that it allows."""

from __future__ import annotations

import collections
import json
import math
from typing import Any

import numpy as np
import pytest

import embellama_server as es
from tests.llama_grammars import Words
from tests.random_schemas import grammar_of

Options = es.SamplingOptions
GREEDY = Options(temperature=0)


class Speaker:
    """A reply to nothing, from random logits."""

    def __init__(
        self,
        words: Words,
        texts: es.TokenTexts,
        gbnf: str,
        options: Options,
        **more: Any,
    ) -> None:
        self.grammar = es.Grammar(gbnf, "grammar")
        self.words = words
        self.constraint = es.Constraint(self.grammar, texts, words.ends, **more)
        self.sampler = es.Sampler(
            words.llama, words.vocab, options, [], words.ends, self.constraint
        )

    def say(self, seed: int = 0, most: int = 200, likely: str = "") -> str:
        """What it says; tokens of ``likely`` have larger logits."""
        draw = np.random.default_rng(seed)
        said = b""
        for _ in range(most):
            row = draw.normal(0, 3, len(self.words.pieces)).astype(np.float32)
            for byte in likely.encode():
                row[self.words.bytes[byte]] += 10
            token = self.sampler.sample(row)
            if token in self.words.ends:
                break
            said += self.words.pieces[token]
            if self.sampler.is_over:
                break
        self.sampler.close()
        return said.decode("utf-8", "replace")


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "kind": {"enum": ["cat", "dog", "🙂"]},
        "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "kind", "ages"],
}


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        Options(seed=1),
        Options(seed=2, top_k=0, top_p=0.95),
        Options(seed=3, top_k=0, top_p=1, min_p=0.05),
        Options(seed=4, repeat_penalty=1.3, presence_penalty=0.5),
        Options(seed=5, ignore_eos=True),
        Options(seed=6, logit_bias=((40, 5.0), (41, -100.0))),
    ],
    ids=str,
)
def test_whatever_is_likely_the_reply_is_a_text_of_the_grammar(
    words: Words, texts: es.TokenTexts, options: Options
) -> None:
    _, gbnf = grammar_of(SCHEMA)
    for seed in range(5):
        speaker = Speaker(words, texts, gbnf, options)
        value = json.loads(speaker.say(seed, 500, '"},]'))
        assert [*value] == ["name", "kind", "ages"]


def test_greedy_is_the_likeliest_of_those_that_may_come(
    words: Words, texts: es.TokenTexts
) -> None:
    for gbnf in ('root ::= ("ab" | "cd" | "é")+', "root ::= [^a-y]+", "root ::= .*"):
        grammar = es.Grammar(gbnf, "grammar")
        constraint = es.Constraint(grammar, texts, words.ends)
        sampler = es.Sampler(words.llama, words.vocab, GREEDY, [], (), constraint)
        draw = np.random.default_rng(1)
        for _ in range(30):
            row = draw.normal(0, 3, len(words.pieces)).astype(np.float32)
            state = constraint.state
            allowed = [
                token
                for token, piece in enumerate(words.pieces)
                if (token in words.ends and state.is_complete)
                or state.after(piece, token) is not None
            ]
            best = max(allowed, key=lambda token: float(row[token]))
            assert sampler.sample(row) == best
        sampler.close()


def test_draws_are_as_likely_as_they_were_among_those_that_may_come(
    words: Words, texts: es.TokenTexts
) -> None:
    row = np.full(len(words.pieces), -20, np.float32)
    for char, weight in (("a", 2), ("b", 1), ("c", 1), ("x", 6), ("y", 6)):
        row[words.bytes[ord(char)]] = math.log(weight)
    counts: collections.Counter[int] = collections.Counter()
    grammar = es.Grammar('root ::= "a" | "b" | "c"', "grammar")
    for seed in range(2000):
        constraint = es.Constraint(grammar, texts, words.ends)
        options = Options(seed=seed, temperature=1, top_p=1, top_k=50)
        sampler = es.Sampler(words.llama, words.vocab, options, [], (), constraint)
        counts[sampler.sample(row)] += 1
        sampler.close()
    for char, share in (("a", 0.5), ("b", 0.25), ("c", 0.25)):
        assert abs(counts[words.bytes[ord(char)]] / 2000 - share) < 0.05


def test_the_same_seed_says_the_same_whatever_was_found_out_before(
    words: Words, texts: es.TokenTexts
) -> None:
    _, gbnf = grammar_of(SCHEMA)
    options = Options(seed=7)
    first = Speaker(words, texts, gbnf, options)
    said = first.say(3, 500)
    again = Speaker(words, texts, gbnf, options)
    again.constraint = es.Constraint(first.grammar, texts, words.ends)
    again.sampler = es.Sampler(
        words.llama, words.vocab, options, [], (), again.constraint
    )
    assert again.say(3, 500) == said


def test_a_reply_ends_as_soon_as_nothing_more_may_come(
    words: Words, texts: es.TokenTexts
) -> None:
    speaker = Speaker(words, texts, 'root ::= "yes"', GREEDY)
    assert speaker.say() == "yes"
    assert speaker.sampler.is_over


@pytest.mark.parametrize(
    ("gbnf", "said"), [('root ::= "a"*', ""), ('root ::= "a"+', "a")]
)
def test_an_end_comes_only_where_the_text_may_end(
    words: Words, texts: es.TokenTexts, gbnf: str, said: str
) -> None:
    speaker = Speaker(words, texts, gbnf, GREEDY)
    row = np.zeros(len(words.pieces), np.float32)
    row[words.ends] = 9
    text = b""
    while (token := speaker.sampler.sample(row)) not in words.ends:
        text += words.pieces[token]
    assert len(text) >= len(said)
    assert bool(text) == bool(said)


def test_a_space_that_is_the_tokenizers_may_come_first(
    words: Words, texts: es.TokenTexts
) -> None:
    speaker = Speaker(words, texts, 'root ::= "{" "}"', GREEDY, drops_space=True)
    row = np.zeros(len(words.pieces), np.float32)
    row[words.bytes[ord(" ")]] = 9
    assert words.pieces[speaker.sampler.sample(row)] == b" "
    assert words.pieces[speaker.sampler.sample(row)].startswith(b"{")


def test_what_the_grammar_and_the_biases_leave_no_token_for_is_an_error(
    words: Words, texts: es.TokenTexts
) -> None:
    never = [(t, -100.0) for t, piece in enumerate(words.pieces) if piece[:1] == b"a"]
    options = Options(seed=1, logit_bias=tuple(never))
    speaker = Speaker(words, texts, 'root ::= "a"', options)
    with pytest.raises(es.NothingToSample, match="by the grammar") as caught:
        speaker.say()
    assert caught.value.param == "grammar"


def test_a_grammar_with_too_many_readings_is_an_error_of_its_field(
    words: Words, texts: es.TokenTexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_MAX_WORK", 20)
    gbnf = 'root ::= x\nx ::= "a" x "b"? | "a" x "c"? | "a"'
    speaker = Speaker(words, texts, gbnf, Options(seed=1))
    with pytest.raises(es.NothingToSample, match="too many ways") as caught:
        speaker.say(1, 1000, "a")
    assert caught.value.param == "grammar"


def test_a_reply_may_have_to_begin_with_a_space_after_the_tokenizer_s_own() -> None:
    texts = es.TokenTexts([b"", b" ", b" yes", b"  yes", b"yes"])
    grammar = es.Grammar('root ::= " yes"', "grammar")
    constraint = es.Constraint(grammar, texts, drops_space=True)
    assert constraint.likely(np.zeros(5, np.float32)).tolist() == [1, 3]
    assert constraint.take(1)
    assert constraint.likely(np.zeros(5, np.float32)).tolist() == [1, 2]
