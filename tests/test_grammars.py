"""What a grammar allows, token by token, against llama.cpp's own."""

from __future__ import annotations

import codecs
import random
import time

import pytest

import embellama_server as es
from tests.llama_grammars import LlamaGrammar, Words

GRAMMARS = [
    'root ::= "yes" | "no"',
    'root ::= "a"* "b"+ "c"?',
    'root ::= [a-c]{2,4} "-" [^a-c"\\\\\\n]{1,3}',
    'root ::= ("ab" | "a" "c"){1,3} | ("x" ("y" "z")? )+',
    'root ::= list\nlist ::= "[" (list ("," list)*)? "]"',
    'root ::= "é" [à-ü]* "漢"? [一-龥]+ "🙂"',
    'root ::= . . "\\x41\\u00e9\\U0001F642\\t\\r\\n\\\\\\"\\[\\]\\-"',
    'root ::= a # a comment\n\n  # another\na ::= b |\n  c\nb ::= "1"\nc ::= (\n "2"\n | "3"\n)',
    "root ::= [-a] [a-] [\\-\\]x] [^\\]]",
    'root ::= "a"{3} "b"{2,} "c"{0,2}',
    'root ::= x | y\nx ::= "if" y\ny ::= "i" z | ""\nz ::= "f"* "x"',
    'root ::= ("a" | "a" "a"){0,3} "b"',
    'root ::= "" | "x"',
    "root ::= [\\x00-\\x7F]{3} [^\\x00-\\x7F]",
]


def allowed(words: Words, state: es.GrammarState) -> set[int]:
    """The tokens that we allow, each tried."""
    found = {t for t, piece in enumerate(words.pieces) if state.after(piece, t)}
    return found | ({*words.ends} if state.is_complete else set())


def is_utf8(text: bytes) -> bool:
    """Whether a text begins like this."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text)
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("text", GRAMMARS)
def test_the_same_tokens_may_come_as_in_llama_cpp(
    words: Words, texts: es.TokenTexts, text: str
) -> None:
    grammar = es.Grammar(text, "grammar")
    nulls = {token for token, piece in enumerate(words.pieces) if b"\0" in piece}
    for seed in range(6):
        theirs = LlamaGrammar(words, text)
        assert theirs.parses
        state, draw, said = grammar.start, random.Random(seed), b""
        for _ in range(12):
            # Theirs may be no UTF-8, and never has U+0000.
            may_come = {
                t for t in theirs.allowed() if is_utf8(said + words.pieces[t])
            } - nulls
            assert allowed(words, state) - nulls == may_come
            listed = texts.allowed(state)
            if listed is not None:
                assert {*listed.tolist()} - nulls == may_come - {*words.ends}
            assert {*texts.possible(state).tolist()} >= may_come - {*words.ends}
            choices = sorted(may_come - {*words.ends})
            if not choices:
                break
            token = draw.choice(choices)
            said += words.pieces[token]
            assert theirs.take(token)
            following = state.after(words.pieces[token], token)
            assert following is not None
            state = following
        theirs.close()


def test_a_text_that_can_be_read_in_too_many_ways_is_an_error() -> None:
    ways = "".join(f'x{n} ::= "a" x{(n + 1) % 9} "{n}"? | "a"\n' for n in range(9))
    many = " | ".join(f"x{n}" for n in range(9))
    grammar = es.Grammar(f"root ::= ({many})+\n{ways}", "grammar")
    state: es.GrammarState | None = grammar.start
    begun = time.monotonic()
    with pytest.raises(es.TooMuchWork, match="grammar can be read in too many ways"):
        for _ in range(10_000):
            assert state is not None
            grammar.begin()
            state = state.after(b"a" * 100)
    assert time.monotonic() - begun < 10


def test_a_ladder_of_choices_is_an_error() -> None:
    steps = "".join(f"r{n} ::= r{n + 1} | r{n + 1} r{n + 1}?\n" for n in range(300))
    with pytest.raises(es.InvalidValue, match="can be read in too many ways"):
        es.Grammar(f'root ::= r0\n{steps}r300 ::= "a"', "grammar")


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(es, "_MAX_STACKS", 100)
    grammar = es.Grammar('root ::= "(" root? ")" | "[" root? "]"', "grammar")
    draw, state, opened = random.Random(1), grammar.start, ""
    for _ in range(1000):
        grammar.begin()
        char = draw.choice("([")
        opened += ")" if char == "(" else "]"
        following = state.after(char.encode())
        assert following is not None
        state = following
    end = state.after(opened[::-1].encode())
    assert end is not None
    assert end.is_over


def test_states_of_the_same_few_stacks_are_bounded_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(es, "_MAX_STACKS", 100)
    grammar = es.Grammar('root ::= [ab]* "a" [ab]{20}', "grammar")
    draw, state = random.Random(1), grammar.start
    for _ in range(500):
        grammar.begin()
        following = state.after(draw.choice("ab").encode())
        assert following is not None
        state = following
    assert len(grammar._states) <= 101


def test_repeats_are_counted_exactly() -> None:
    start = es.Grammar('root ::= "a"{3000,5000}', "grammar").start
    for count, is_complete in ((2999, False), (3000, True), (5000, True)):
        state = start.after(b"a" * count)
        assert state is not None
        assert state.is_complete is is_complete
        assert state.is_over is (count == 5000)
    assert start.after(b"a" * 5001) is None


def test_a_token_of_the_model_is_not_its_text(words: Words) -> None:
    end, letter = words.ends[0], words.bytes[ord("a")]
    text = f'root ::= <[{letter}]> "b" !<[{letter}]> <end>'
    state: es.GrammarState | None
    state = es.Grammar(text, "grammar", {"<end>": end}.get).start
    assert state is not None
    assert state.after(b"a") is None
    for piece, token in ((b"a", letter), (b"b", 0), (b"xyz", letter + 1), (b"", end)):
        assert state is not None
        state = state.after(piece, token)
    assert state is not None
    assert state.is_over
