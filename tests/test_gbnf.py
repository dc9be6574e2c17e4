"""Grammars as text: what is refused, and in which words."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import kit
from tests.llama_grammars import LlamaGrammar, Words

REFUSED = [
    ("", "must have 1 to 262144 characters"),
    (" \n", "must have 1 to 262144 characters"),
    ('a ::= "x"', "has no rule root"),
    ("root ::= a", "uses 'a' and has no such rule (line 1)"),
    ('root ::= "x"\na ::= b "y"', "uses 'b' and has no such rule (line 2)"),
    ('root ::= "x', "cannot be read at '\"x'"),
    ("root ::= [a", "cannot be read at '[a'"),
    ("root ::= []", "cannot be read at '[]'"),
    ("root ::= [z-a]", "has the range 'z' to 'a', which is backwards"),
    ('root ::= "\\q"', "has '\\\\q', which is no escape that it knows"),
    ('root ::= "\\U00110000"', "which is no escape that it knows"),
    ('root ::= "\\ud800"', "with half a character"),
    ("root ::= *", "has nothing before '*'"),
    ('root ::= ("a"', "ends inside parentheses"),
    ('root ::= "a")', "closes a parenthesis that is not open"),
    ('root ::= "a"{3,2}', "has '{3,2}', of which nothing can be so often"),
    ('root ::= "a"{9999999999}', "of which nothing can be so often"),
    ('root ::= "a"{' + "9" * 5000 + "}", "cannot be read at '{999"),
    ('root ::= "a"{1,' + "9" * 5000 + "}", "cannot be read at '{1,999"),
    ('root ::= "a" root2 ::= "b"', "begins a rule in the line of another one"),
    ('root ::= "a"\n| "b"', "has '|' outside of a rule (line 2)"),
    ('root ::= root "a" | "b"', "left recursion"),
    ('root ::= a "x"\na ::= b?  root\nb ::= "b"', "left recursion"),
    ('root ::= e root "x"\ne ::= f\nf ::= "" | "y"', "left recursion"),
    ('root ::= (root | "a"){2} "b"', "left recursion"),
    ("root ::= <|nothing|>", "has '<|nothing|>', which is no token of this model"),
]


@pytest.mark.parametrize(("text", "problem"), REFUSED)
def test_what_is_no_grammar_is_refused(text: str, problem: str) -> None:
    with pytest.raises(es.InvalidValue, match=re.escape(problem)) as caught:
        es.Grammar(text, "grammar")
    assert caught.value.message.startswith("grammar ")
    assert caught.value.param == "grammar"


@settings(max_examples=50, deadline=None)
@given(text=st.text() | st.text(st.characters(min_codepoint=0x10000)))
def test_a_literal_is_its_text_and_nothing_else(words: Words, text: str) -> None:
    written = f"root ::= {es.literal(text)}"
    state: es.GrammarState | None = es.Grammar(written, "grammar").start
    if encoded := text.encode():
        assert state is not None
        state = state.after(encoded)
    assert state is not None
    assert state.is_over
    if "\0" not in text:
        theirs = LlamaGrammar(words, written)
        assert theirs.parses
        assert theirs.accepts(encoded)
        theirs.close()


def test_equal_rules_are_one() -> None:
    rules = es.GrammarRules()
    assert rules.add('"a"') == rules.add('"a"') != rules.add('"b"')


def test_a_rule_may_use_itself() -> None:
    rules = es.GrammarRules()
    name = rules.reserve()
    rules.define(name, f'"(" {name}? ")"')
    grammar = es.Grammar(rules.text(name), "grammar")
    assert grammar.start.after(b"((()))") is not None
    assert grammar.start.after(b"((())))") is None


@given(
    text=st.text("<>/thinka", max_size=30), mark=st.sampled_from(["</think>", "aab"])
)
@settings(max_examples=60, deadline=None)
def test_until_a_mark_is_until_its_first(text: str, mark: str) -> None:
    rules = es.GrammarRules()
    grammar = es.Grammar(rules.text(f'{rules.until(mark)} "{{}}"'), "grammar")
    text = text.replace(mark, "")
    before = text + mark
    before = before[: before.find(mark) + len(mark)]
    state = grammar.start.after(before.encode())
    assert state is not None
    assert state.after(b"{}") is not None
    assert state.after(b"x") is None


def test_a_grammar_that_grows_too_large_is_refused() -> None:
    rules = es.GrammarRules()
    with pytest.raises(es.InvalidValue, match="more than 262144 characters"):
        for number in range(100):
            rules.add(es.literal(f"{number}" * 4000))


@pytest.mark.parametrize(
    "text",
    [
        "root ::= " + "(" * 5_000 + '"a"' + ")" * 5_000,
        "root ::= r0\n"
        + "".join(f"r{n} ::= r{n + 1}\n" for n in range(2_000))
        + 'r2000 ::= "a"',
        "root ::= " + '"a" | ' * 5_000 + '"a"',
        'root ::= "a"{500000000}',
        "root ::= " + "[a-z]" * 10_000,
        "root ::= a " + "#" * 10_000 + '\na ::= "a"',
    ],
    ids=["groups", "a chain", "alternatives", "repeats", "long", "a comment"],
)
def test_no_grammar_takes_long_to_read(text: str) -> None:
    begun = time.monotonic()
    grammar = es.Grammar(text, "grammar")
    assert grammar.start.next_bytes()[0] == ord("a")
    assert time.monotonic() - begun < 5


def apart(count: int) -> str:
    """Characters between which there are others."""
    return "".join(chr(0x10000 + 2 * n) for n in range(count))


def empty_rules(count: int) -> str:
    """Rules that are found to be empty one after the other, and one that uses all."""
    names = [f"e{n}" for n in range(count)]
    first = f'root ::= a | b\na ::= "x" {" ".join(reversed(names))}'
    rules = "".join(f'{name} ::= ""\n' for name in names)
    each = " | ".join(f'{name} "x"' for name in names)
    return f"{first}\nb ::= {each}\n{rules}"


# Each of about so many parts.
MAKES: dict[str, Callable[[int], str]] = {
    "a set": lambda n: f"root ::= [{apart(n)}]",
    "a set of others": lambda n: f"root ::= [^{apart(n)}]",
    "one character": lambda n: f"root ::= [{'a' * n}]",
    "sets": lambda n: "root ::= " + " ".join(f"[a-{chr(0x100 + m)}]" for m in range(n)),
    "a literal": lambda n: f'root ::= "{"a" * n}"',
    "literals": lambda n: "root ::= " + '"a" ' * n,
    "alternatives": lambda n: "root ::= " + '"a" | ' * n + '"b"',
    "groups": lambda n: "root ::= " + '("a")' * n,
    "groups in groups": lambda n: f'root ::= {"(" * n}"a"{")" * n}',
    "repeats": lambda n: 'root ::= "x" ' + '"a"* ' * n,
    "an empty rule": lambda n: f'root ::= {"e " * n}"x"\ne ::= ""',
    "empty rules": lambda n: empty_rules(n // 4),
    "a chain": lambda n: (
        "root ::= r0\n"
        + "".join(f"r{m} ::= r{m + 1}\n" for m in range(n))
        + f'r{n} ::= "a"'
    ),
    "a rule again": lambda n: 'root ::= "a"\n' + 'a ::= "b"\n' * n,
    "a name": lambda n: f'root ::= {"a" * n}\n{"a" * n} ::= "x"',
    "blanks": lambda n: f'root ::= a{" " * n}"y"\na ::= "x"',
    "lines": lambda n: 'root ::= "a"' + "\n" * n,
    "tokens": lambda n: "root ::= " + "<a>" * n,
    "an open text": lambda n: f'root ::= "{"a" * n}',
    "an open set": lambda n: f"root ::= [{'a' * n}",
    "an open token": lambda n: f"root ::= <{'a' * n}",
}


@pytest.mark.parametrize("name", MAKES)
def test_reading_takes_as_long_as_a_grammar_is_large(name: str) -> None:
    def read(parts: int) -> None:
        with contextlib.suppress(es.InvalidValue):
            es.Grammar(MAKES[name](parts), "grammar", lambda _: 7)

    kit.assert_linear(read, 4_000)


@pytest.mark.parametrize(
    "text",
    [
        f"root ::= [{apart(80_000)}]",
        f"root ::= [^{apart(80_000)}]",
        f"root ::= {' '.join(f'[a{apart(400 + n)}]' for n in range(300))}",
        f"root ::= {'()' * 130_000}",
        f"root ::= {'(' * 130_000}{')' * 130_000}",
        "root ::= " + '"a"*' * 65_000,
    ],
    ids=["a set", "others", "sets", "groups", "groups in groups", "repeats"],
)
def test_a_grammar_of_too_many_parts_is_refused_as_they_are_counted(text: str) -> None:
    begun = time.thread_time()
    with pytest.raises(es.InvalidValue, match="more than 40000 groups"):
        es.Grammar(text, "grammar")
    assert time.thread_time() - begun < 1.5  # 0.1 to 0.4


def test_a_set_may_have_a_character_as_often_as_it_likes() -> None:
    many = "".join(map(chr, range(0x4E00, 0x9000))) * 10
    grammar = es.Grammar(f'root ::= [b{many}a-zk]+ "."', "grammar")
    for char, may_come in (("a", True), ("k", True), ("\u4e00", True), ("A", False)):
        assert (grammar.start.after(char.encode()) is not None) is may_come


@pytest.mark.parametrize("bound", ["{1" + " " * 10_000, "{" + "1" * 10_000])
def test_a_bound_without_an_end_is_refused_soon(bound: str) -> None:
    begun = time.monotonic()
    with pytest.raises(es.InvalidValue, match="cannot be read at"):
        es.Grammar(f'root ::= "a"{bound}', "grammar")
    assert time.monotonic() - begun < 5


def test_what_looks_like_a_rule_in_a_comment_is_none() -> None:
    grammar = es.Grammar('root ::= a # as in b ::= c\na ::= "x"', "grammar")
    assert grammar.start.next_bytes() == [ord("x")]
