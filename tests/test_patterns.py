"""Regular expressions and bounds of numbers as grammars of JSON."""

from __future__ import annotations

import json
import random
import re
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import random_schemas

PATTERNS = [
    "^[a-z]+$",
    "abc",
    "^a|b$",
    "^(?:x|y{2,3}|)z?$",
    "^(?P<year>\\d{4})-(?<month>\\d\\d)$",
    "^[^a-z\\s]{1,3}$",
    "^\\w+@\\w+\\.(com|org)$",
    '^[\\]\\\\"/\\-^]{1,4}$',
    "^\\t\\n\\x41\\u00e9\\u{1F642}\\/$",
    "^.{2,4}$",
    "^\\S\\D\\W$",
    "^[+-]?[0-9]{1,3}(,[0-9]{3})*?(\\.[0-9]+)?$",
    "",
    "^$",
    "^[é-ü漢🙂]*$",
]


def grammar(gbnf: str) -> es.Grammar:
    """A grammar of just that."""
    return es.Grammar(f"root ::= {gbnf}", "pattern")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_a_pattern_allows_matches_it(pattern: str) -> None:
    found = es.pattern_grammar(pattern)
    allowed = grammar(found.gbnf)
    draw = random.Random(pattern)
    for _ in range(100):
        said = random_schemas.walk(draw, allowed, 300)
        if said is None:
            continue
        text = json.loads(f'"{said}"')
        ecma = pattern.replace("(?<", "(?P<").replace("\\u{1F642}", "🙂")
        assert re.search(ecma, text), text
        assert found.least <= len(text) <= found.most


MATCHES = [
    ("^[a-z]+$", ["a", "xyz"], ["", "A", "ab1", "a\n"]),
    ("b", ["b", "abc", 'é"b\\'], ["", "ac"]),
    ("^a|b$", ["a", "ac", "cb"], ["ca", "bc"]),
    ("^(ab){2}$", ["abab"], ["ab", "ababab"]),
    ("^[^\\d]$", ["x", '"', "\n"], ["1", "٣"]),
    ("^[\\w-]+$", ["a-b_c"], ["é", ""]),
    ("^\\.$", ["."], ["x"]),
    ("^[a\\]-]$", ["]", "-", "a"], ["b"]),
]


@pytest.mark.parametrize(("pattern", "good", "bad"), MATCHES)
def test_what_matches_a_pattern_is_allowed_and_nothing_else(
    pattern: str, good: list[str], bad: list[str]
) -> None:
    allowed = grammar(es.pattern_grammar(pattern).gbnf)
    for texts, is_good in ((good, True), (bad, False)):
        for text in texts:
            said = json.dumps(text, ensure_ascii=False)[1:-1]
            assert random_schemas.accepts(allowed, said) is is_good, text


REFUSED = [
    ("(?=a)", "looks around"),
    ("(?<!a)b", "looks around"),
    ("(a)\\1", "has \\1, which is not supported"),
    ("\\bword\\b", "has \\b, which is not supported"),
    ("\\p{L}", "has \\p, which is not supported"),
    ("a**", "repeats what is repeated"),
    ("*a", "has * where it cannot stand"),
    ("a(^b)", "has ^ where it cannot stand"),
    ("^a$b", "goes on after $"),
    ("[a", "ends inside ["),
    ("[a-", "ends inside ["),
    ("[z-a]", "has a range without a last character"),
    ("(a", "ends inside a group"),
    ("a)", "closes a parenthesis"),
    ("a{3,1}", "which is backwards"),
    ("\\", "ends with a backslash"),
    ("\\ud83d", "which is no character"),
    ("[^\\s\\S]", "has a class without characters"),
    ("(" * 40 + ")" * 40, "more than 32 groups in groups"),
    ("a" * 3000, "more than 2048 characters"),
]


@pytest.mark.parametrize(("pattern", "problem"), REFUSED)
def test_what_a_grammar_cannot_say_of_a_pattern_is_refused(
    pattern: str, problem: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        es.pattern_grammar(pattern)


NUMBERS = st.integers(-1200, 1200) | st.decimals(-30, 30, places=2).map(float)


@settings(max_examples=150, deadline=None)
@given(
    low=NUMBERS | st.none(),
    high=NUMBERS | st.none(),
    opens=st.tuples(st.booleans(), st.booleans()),
    is_whole=st.booleans(),
    tried=st.lists(NUMBERS | st.decimals(-30, 30, places=4).map(float), min_size=8),
)
@example(0, 1, (True, True), False, [0, 0.0001, 0.9999, 1, 0.5, -0.5])
@example(-1.5, -1.25, (False, True), False, [-1.5, -1.25, -1.26, -1.2501, -1.4, -1])
def test_just_the_numbers_between_bounds_are_allowed(
    low: float | None,
    high: float | None,
    opens: tuple[bool, bool],
    is_whole: bool,
    tried: list[float],
) -> None:
    bounds = [
        None if bound is None else es.NumberBound(Fraction(str(bound)), is_open)
        for bound, is_open in zip((low, high), opens, strict=True)
    ]
    gbnf = es.number_gbnf(*bounds, is_whole=is_whole)
    allowed = grammar(gbnf) if gbnf else None
    near = [n for n in (low, high) if n is not None]
    near += [round(n + d, 2) for n in near for d in (0.01, -0.01, 1, -1)]
    for number in (*tried, *near):
        is_inside = (
            low is None or low < number or (low == number and not opens[0])
        ) and (high is None or number < high or (number == high and not opens[1]))
        is_good = is_inside and not (is_whole and number != int(number))
        text = f"{number:g}" if number == int(number) else repr(number)
        if text == "-0" or "e" in text:
            continue
        found = allowed is not None and random_schemas.accepts(allowed, text)
        assert found is is_good, text


@settings(max_examples=60, deadline=None)
@given(
    low=st.integers(-(10**22), 10**22),
    width=st.integers(0, 10**20) | st.integers(0, 20),
    seed=st.integers(0, 99),
)
def test_large_integers_keep_their_bounds(low: int, width: int, seed: int) -> None:
    bounds = [es.NumberBound(Fraction(n), False) for n in (low, low + width)]
    allowed = grammar(es.number_gbnf(*bounds, is_whole=True))
    for number in (low, low + width, low - 1, low + width + 1):
        is_good = low <= number <= low + width
        assert random_schemas.accepts(allowed, str(number)) is is_good
    said = random_schemas.walk(random.Random(seed), allowed)
    assert said is not None
    assert low <= int(said) <= low + width
