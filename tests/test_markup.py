"""MARKUP and CALLS: thoughts, text and calls, however a reply is written and cut."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import embellama_server as es

TOOLS: Mapping[str, Mapping[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    },
    "weather_map": {"type": "object", "properties": {}},
    "write-file": {"type": "object", "properties": {"text": {"type": "string"}}},
}
CITY = {"city": "Zürich", "days": 3}
MARKUP = es.Markup(tools=TOOLS)
Call = tuple[str, Mapping[str, Any]]


class Read:
    """What a reader made of a reply that came in pieces."""

    def __init__(
        self,
        pieces: Iterable[str],
        markup: es.Markup = MARKUP,
        *,
        is_cut: bool = False,
    ) -> None:
        reader = es.MarkupReader(markup)
        self.text = self.reasoning = ""
        self.written: list[es.CallPart] = []
        self.parts = 0
        for found in (*map(reader.feed, pieces), reader.end(is_cut=is_cut)):
            self.text += found.text
            self.reasoning += found.reasoning
            for part in found.calls:
                self.parts += 1
                if part.id:
                    assert part.name and not part.arguments
                    assert len(part.id) == 9 and part.id.isalnum()
                    assert part.index == len(self.written)
                    self.written.append(part)
                else:
                    assert part.arguments and part.index == len(self.written) - 1
                    self.written[-1].add(part)
        ids = [part.id for part in self.written]
        assert len({*ids}) == len(ids)
        assert reader.calls == len(ids) or is_cut or markup.is_constrained

    @property
    def calls(self) -> list[Call]:
        """Names and arguments."""
        return [(part.name, json.loads(part.arguments)) for part in self.written]

    @property
    def all(self) -> tuple[Any, ...]:
        """What must be the same however it is cut."""
        raw = [(part.name, part.arguments) for part in self.written]
        return self.text, self.reasoning, raw


ONE: Sequence[Call] = [("weather", CITY)]
TWO: Sequence[Call] = [("weather", CITY), ("write-file", {"text": "a"})]
ARGS = '{"city": "Zürich", "days": 3}'
DEEPSEEK = "<\uff5ctool\u2581{}\uff5c>".format
# The name of a form -> what is written, what is said beside, and the calls.
FORMS: Mapping[str, tuple[str, str, Sequence[Call]]] = {
    "hermes": (
        '<tool_call>\n{"name": "weather", "arguments": ' + ARGS + "}\n</tool_call>",
        *("", ONE),
    ),
    "hermes, two, after words": (
        'Let me see.\n\n<tool_call>\n{"name": "weather", "arguments": '
        + ARGS
        + '}\n</tool_call>\n<tool_call>\n{"name": "write-file", "arguments": '
        '{"text": "a"}}\n</tool_call>',
        *("Let me see.", TWO),
    ),
    "hermes, the mark at the end is missing": (
        '<tool_call>{"name": "weather", "arguments": ' + ARGS + "}",
        *("", ONE),
    ),
    "hermes, a brace is missing": (
        '<tool_call>{"name": "weather", "arguments": ' + ARGS,
        *("", ONE),
    ),
    "hermes, arguments first": (
        '<tool_call>{"arguments": ' + ARGS + ', "name": "weather"}</tool_call>',
        *("", ONE),
    ),
    "hermes, arguments in a string": (
        (
            '<tool_call>{"name": "weather", "arguments": '
            '"{\\"city\\": \\"Zürich\\", \\"days\\": 3}"}</tool_call>'
        ),
        *("", ONE),
    ),
    "hermes, no arguments": (
        '<tool_call>{"name": "weather_map"}</tool_call>',
        *("", [("weather_map", {})]),
    ),
    "hermes, null for no arguments": (
        '<tool_call>{"name": "weather_map", "arguments": null}</tool_call>',
        *("", [("weather_map", {})]),
    ),
    "hermes, an empty text for no arguments": (
        '<tool_call>{"name": "weather_map", "arguments": ""}</tool_call>',
        *("", [("weather_map", {})]),
    ),
    "openai's own": (
        '<tool_call>{"type": "function", "function": {"name": "weather", "arguments": '
        + ARGS
        + "}}</tool_call>",
        *("", ONE),
    ),
    "a line break in a string": (
        '<tool_call>{"name": "write-file", "arguments": {"text": "a\nb"}}</tool_call>',
        *("", [("write-file", {"text": "a\nb"})]),
    ),
    "words after it": (
        '<tool_call>{"name": "weather", "arguments": ' + ARGS + "}</tool_call>\n\nSo.",
        *("So.", ONE),
    ),
    "llama": ('{"name": "weather", "parameters": ' + ARGS + "}", "", ONE),
    "llama, python tag": (
        '<|python_tag|>{"name": "weather", "parameters": ' + ARGS + "}",
        *("", ONE),
    ),
    "llama, a list": (
        '{"name": "weather", "parameters": '
        + ARGS
        + '}; {"name": "write-file", "parameters": {"text": "a"}}',
        *("", TWO),
    ),
    "llama, type first": (
        '{"type": "function", "name": "weather", "parameters": ' + ARGS + "}",
        *("", ONE),
    ),
    "a list of objects": ('[{"name": "weather", "arguments": ' + ARGS + "}]", "", ONE),
    "mistral": (
        '[TOOL_CALLS][{"name": "weather", "arguments": '
        + ARGS
        + ', "id": "abcdef123"}, {"name": "write-file", "arguments": {"text": "a"}}]',
        *("", TWO),
    ),
    "mistral, newer": (
        f'[TOOL_CALLS]weather[ARGS]{ARGS}[TOOL_CALLS]write-file[ARGS]{{"text": "a"}}',
        *("", TWO),
    ),
    "mistral, with an id": (
        f"[TOOL_CALLS]weather[CALL_ID]abcdef123[ARGS]{ARGS}",
        *("", ONE),
    ),
    "mistral, newest": (f"[TOOL_CALLS]weather{ARGS}", "", ONE),
    "mistral, a name that begins like another": (
        "[TOOL_CALLS]weather_map{}",
        *("", [("weather_map", {})]),
    ),
    "qwen coder": (
        (
            "<tool_call>\n<function=weather>\n<parameter=city>\nZürich\n</parameter>\n"
            "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
        ),
        *("", ONE),
    ),
    "qwen coder, a mark is missing": (
        (
            "<function=weather>\n<parameter=city>\nZürich\n</parameter>\n"
            "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
        ),
        *("", ONE),
    ),
    "qwen coder, text like its marks": (
        (
            "<tool_call>\n<function=write-file>\n<parameter=text>\n<a></function>\n\n"
            "</parameter>\n</function>\n</tool_call>"
        ),
        *("", [("write-file", {"text": "<a></function>\n"})]),
    ),
    "seed": (
        (
            "<seed:tool_call>\n<function=weather>\n<parameter=city>Zürich</parameter>\n"
            "<parameter=days>3</parameter>\n</function>\n</seed:tool_call>"
        ),
        *("", ONE),
    ),
    "minimax": (
        (
            '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Zürich'
            '</parameter>\n<parameter name="days">3</parameter>\n</invoke>\n'
            "</minimax:tool_call>"
        ),
        *("", ONE),
    ),
    "minicpm": (
        (
            '<function name="weather"><param name="city">Zürich</param>'
            '<param name="days">3</param></function>'
        ),
        *("", ONE),
    ),
    "functionary": (f"<function=weather>{ARGS}</function>", "", ONE),
    "glm": (
        (
            "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Zürich</arg_value>\n"
            "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
        ),
        *("", ONE),
    ),
    "glm, no arguments": (
        "<tool_call>weather_map\n</tool_call>",
        *("", [("weather_map", {})]),
    ),
    "gemma 3": (
        "```tool_code\nprint(weather(city='Zürich', days=3))\n```",
        *("", ONE),
    ),
    "gemma 3, json": (
        'Sure.\n```json\n{"name": "weather", "arguments": ' + ARGS + "}\n```",
        *("Sure.", ONE),
    ),
    "gemma, our words": (
        '```tool_call\n{"name": "weather", "arguments": ' + ARGS + "}\n```\n"
        '```tool_call\n{"name": "write-file", "arguments": {"text": "a"}}\n```',
        *("", TWO),
    ),
    "gemma 4": (
        '<|tool_call>call:weather{city:<|"|>Zürich<|"|>,days:3}<tool_call|>',
        *("", ONE),
    ),
    "gemma 4, braces and quotes": (
        '<|tool_call>call:write-file{text:<|"|>{a: "b<|"|>}<tool_call|>',
        *("", [("write-file", {"text": '{a: "b'})]),
    ),
    "python": (
        (
            "<|tool_call_start|>[weather(city='Zürich', days=3), "
            'write-file(text="a")]<|tool_call_end|>'
        ),
        *("", TWO),
    ),
    "python, all kinds": (
        "[weather(a=True, b=None, c=[1.5, -2], d={'k': \"(it's\"})]",
        *(
            "",
            [("weather", {"a": True, "b": None, "c": [1.5, -2], "d": {"k": "(it's"}})],
        ),
    ),
    "apertus": ('<|tools_prefix|>[{"weather": ' + ARGS + "}]<|tools_suffix|>", "", ONE),
    "apertus, no arguments": (
        '<|tools_prefix|>[{"weather_map": null}]<|tools_suffix|>',
        *("", [("weather_map", {})]),
    ),
    "command r": (
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "weather", '
        '"parameters": ' + ARGS + "}\n]<|END_ACTION|>",
        *("", ONE),
    ),
    "nemotron": (
        '<TOOLCALL>[{"name": "weather", "arguments": ' + ARGS + "}]</TOOLCALL>",
        *("", ONE),
    ),
    "granite 3": (
        '<|tool_call|>[{"name": "weather", "arguments": ' + ARGS + "}]",
        *("", ONE),
    ),
    "kimi": (
        (
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
            f"<|tool_call_argument_begin|>{ARGS}<|tool_call_end|><|tool_call_begin|>"
            'functions.write-file:1<|tool_call_argument_begin|>{"text": "a"}'
            "<|tool_call_end|><|tool_calls_section_end|>"
        ),
        *("", TWO),
    ),
    "deepseek 3.1": (
        DEEPSEEK("calls\u2581begin")
        + DEEPSEEK("call\u2581begin")
        + "weather"
        + DEEPSEEK("sep")
        + ARGS
        + DEEPSEEK("call\u2581end")
        + DEEPSEEK("calls\u2581end"),
        *("", ONE),
    ),
    "deepseek r1": (
        DEEPSEEK("calls\u2581begin")
        + DEEPSEEK("call\u2581begin")
        + "function"
        + DEEPSEEK("sep")
        + f"weather\n```json\n{ARGS}\n```"
        + DEEPSEEK("call\u2581end")
        + DEEPSEEK("calls\u2581end"),
        *("", ONE),
    ),
    "deepseek 3.2": (
        (
            "<\uff5cDSML\uff5cfunction_calls>\n"
            '<\uff5cDSML\uff5cinvoke name="weather">\n'
            '<\uff5cDSML\uff5cparameter name="city" string="true">Zürich'
            "</\uff5cDSML\uff5cparameter>\n"
            '<\uff5cDSML\uff5cparameter name="days" string="false">3'
            "</\uff5cDSML\uff5cparameter>\n"
            "</\uff5cDSML\uff5cinvoke>\n</\uff5cDSML\uff5cfunction_calls>"
        ),
        *("", ONE),
    ),
}
# What no grammar lets through.
UNGUARDED = {"a line break in a string"}
# What only looks like a call, in part or as a whole.
TEXTS = [
    "Hello.",
    "  Hello \n",
    " \n",
    "{",
    "[",
    "[1, 2, 3]",
    ' {"answer": 42} ',
    '{"name": "Zürich", "parameters": {}}',
    '{"name": "weather", "parameters": {"city": }}',
    '{"name": "weather", "parameters": {"city": NaN}}',
    '{"name": "weather", "parameters": [1]}',
    '{"name": "weather", "parameters": {"city": "Z',
    "<tool_call>",
    "<tool_call></tool_call>",
    "<tool_call>\n{}\n</tool_call>\n",
    "The mark <tool_call> begins a call, </tool_call> ends it.",
    '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": {"a": x}}</tool_call>',
    '<tool_call>{"name": "weather", "arguments": {"a": 1}, x}</tool_call>',
    "<tool_call>\n<function=other>\n</function>\n</tool_call>",
    "<tool_call>\n<function=weather>\n<parameter=city>\nZ",
    "<function=weather> is a function",
    "[TOOL_CALLS]weather is fine",
    "[TOOL_CALLS]weather[ARGS]{",
    "[weather] is fine",
    "[weather(1)]",
    "[weather(city=x)]",
    "weather(city='a')",
    "```json\n[1, 2]\n```\nand\n```python\nprint(1)\n```",
    '```json\n{"name": "Ada", "age": 3}\n```',
    "a < b [c] `d` ``` e",
    "<tool_",
    "<<tool_call><tool_call>x",
    "Let me think: <think>no</think>",
]  # fmt: skip


def splits(text: str) -> Iterable[Sequence[str]]:
    """Whole, character by character, and in two at each place."""
    yield [text]
    yield [*text]
    for at in range(1, len(text)):
        yield [text[:at], text[at:]]


@pytest.mark.parametrize("name", FORMS)
def test_a_call_is_read_in_every_form_however_it_is_cut(name: str) -> None:
    written, said, calls = FORMS[name]
    for begin in ("", "<think>\nHm.\n</think>\n\n"):
        for is_constrained in {False, name not in UNGUARDED}:
            markup = es.Markup(tools=TOOLS, is_constrained=is_constrained)
            whole = Read([begin + written], markup)
            assert (whole.text, whole.calls) == (said, calls)
            assert whole.reasoning == ("Hm." if begin else "")
            for pieces in splits(begin + written):
                assert Read(pieces, markup).all == whole.all, pieces


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_call_comes_out_as_it_is_written(text: str) -> None:
    for pieces in splits(text):
        assert Read(pieces).all == (text, "", [])


@pytest.mark.parametrize("name", FORMS)
def test_without_tools_nothing_is_a_call(name: str) -> None:
    written, _, _ = FORMS[name]
    for pieces in splits(written):
        assert Read(pieces, es.Markup()).all == (written, "", [])


PIECES = st.sampled_from(
    [
        *(written for written, _, _ in FORMS.values()),
        *(*TEXTS, *es.CALL_MARKS, *es.CALL_INNER_MARKS, *TOOLS, "é€😀", "\n", " "),
        *("<think>", "</think>", "{", "}", "[", "]", '"', "\\", "(", ")", "'", ","),
        *('{"name": "weather", "arguments": {"a": "', '"}}', "</parameter>", "=", ":"),
    ]
)


@settings(max_examples=300)
@given(
    st.lists(PIECES, max_size=6),
    st.lists(st.integers(0, 400), max_size=8),
    st.booleans(),
)
@example(["<think>", "</think>", "é€😀"], [3], False)
def test_how_a_reply_is_cut_makes_no_difference(
    parts: Sequence[str], cuts: Sequence[int], is_cut: bool
) -> None:
    text = "".join(parts)
    whole = Read([text], is_cut=is_cut)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    assert Read(pieces, is_cut=is_cut).all == whole.all
    assert Read(text, is_cut=is_cut).all == whole.all
    if not is_cut:
        assert all(isinstance(arguments, dict) for _, arguments in whole.calls)
    is_all_shown = not (is_cut or whole.written or whole.reasoning)
    if is_all_shown and "think>" not in text:
        assert whole.text == text


THOUGHTS: Mapping[str, tuple[es.Thoughts, str, str, str]] = {
    "think": (es.THINK, "<think>\nA b.\n</think>\n\nC.", "A b.", "C."),
    "no thoughts": (es.THINK, "<think>\n\n</think>\n\nC.", "", "C."),
    "no text": (es.THINK, "<think>A", "A", ""),
    "never begun": (es.THINK, "C <think>no</think>", "", "C <think>no</think>"),
    "blanks": (es.THINK, " \n <think>A\n\n B</think> C ", "A\n\n B", "C "),
    "nearly ended": (es.THINK, "<think>A</thin</think>C", "A</thin", "C"),
    "mistral": (es.Thoughts("[THINK]", "[/THINK]"), "[THINK]A[/THINK]C", "A", "C"),
    "command": (
        es.Thoughts("<|START_THINKING|>", "<|END_THINKING|>", ("<|START_TEXT|>",)),
        *("<|START_THINKING|>A<|END_THINKING|><|START_TEXT|>C", "A", "C"),
    ),
    "gpt-oss": (
        es.Thoughts(
            *("<|channel|>analysis<|message|>", "<|end|>"),
            ("<|start|>assistant", "<|channel|>final<|message|>"),
        ),
        ("<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>final"
        "<|message|>C"),
        *("A", "C"),
    ),
    "gpt-oss, no thoughts": (
        es.Thoughts(
            *("<|channel|>analysis<|message|>", "<|end|>"),
            ("<|start|>assistant", "<|channel|>final<|message|>"),
        ),
        *("<|channel|>final<|message|>C", "", "C"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", THOUGHTS)
def test_thoughts_are_told_from_text_however_they_are_cut(name: str) -> None:
    marks, written, thoughts, text = THOUGHTS[name]
    for tools in ({}, TOOLS):
        markup = es.Markup(thoughts=[marks], tools=tools)
        for pieces in splits(written):
            assert Read(pieces, markup).all == (text, thoughts, []), pieces
        if written.startswith(marks.opening):
            markup = es.Markup(thoughts=[marks], begins_inside=marks, tools=tools)
            for pieces in splits(written.removeprefix(marks.opening)):
                assert Read(pieces, markup).all == (text, thoughts, []), pieces


def test_a_call_among_thoughts_is_a_thought() -> None:
    written, _, _ = FORMS["hermes"]
    assert Read([f"<think>{written}</think>So"]).all == ("So", written, [])


def test_a_reply_that_is_cut_in_a_call_has_what_there_is_of_it() -> None:
    written = '<tool_call>{"name": "weather", "arguments": {"city": "Z'
    for pieces in splits(written):
        read = Read(pieces, is_cut=True)
        assert read.all == ("", "", [("weather", '{"city": "Z')])


HERMES = FORMS["hermes"][0]
SECOND = '\n<tool_call>\n{"name": "write-file", "arguments": {"text": "a'


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("<tool_call>", ""),
        ("<tool_call>{", ""),
        ('<tool_call>\n{"name', ""),
        ("So.\n<tool_call>\n<function=wea", "So."),
        ("<tool_call>weather\n<arg_key>city</arg_key>\n<arg_val", ""),
        ("[TOOL_CALLS]weath", ""),
        ("<|tool_call>call:weather{city:", ""),
        ("```tool_code\nprint(weather(", ""),
    ],
)
def test_of_a_call_that_is_cut_after_its_mark_nothing_is_text(
    written: str, text: str
) -> None:
    for pieces in splits(written):
        assert Read(pieces, is_cut=True).all == (text, "", [])


@pytest.mark.parametrize("text", ["<tool_", "So <tool_", "{", '{"name', "[", "```js"])
def test_what_only_might_have_become_a_call_is_text_where_it_is_cut(text: str) -> None:
    for pieces in splits(text):
        assert Read(pieces, is_cut=True).all == (text, "", [])
    fence = '```json\n{"name": "Ada", "ar'
    assert Read([fence], is_cut=True).all == (fence, "", [])


@pytest.mark.parametrize("is_constrained", [False, True])
def test_wherever_calls_are_cut_no_mark_of_them_is_text(is_constrained: bool) -> None:
    markup = es.Markup(tools=TOOLS, is_constrained=is_constrained)
    written, marked = HERMES + SECOND, len("<tool_call>")
    for end in range(len(written)):
        for pieces in ([written[:end]], written[:end]):
            read = Read(pieces, markup, is_cut=True)
            is_text = not is_constrained and end < marked
            assert read.text == (written[:end] if is_text else "")
            assert len(read.written) <= (2 if end > len(HERMES) + marked else 1)


@pytest.mark.parametrize("end", range(0, len(HERMES), 5))
def test_a_call_under_a_grammar_that_a_stop_text_ends_is_not_said_again_as_text(
    end: int,
) -> None:
    markup = es.Markup(tools=TOOLS, is_constrained=True)
    for pieces in ([HERMES[:end]], HERMES[:end]):
        assert Read(pieces, markup).text == ""


def test_only_so_many_calls_are_read_and_nothing_after_them() -> None:
    written, _, _ = FORMS["mistral"]
    for pieces in splits(written + "So"):
        reader = Read(pieces, es.Markup(tools=TOOLS, max_calls=1))
        assert (reader.text, reader.calls) == ("", ONE)


def test_arguments_that_a_grammar_guards_come_as_they_are_written() -> None:
    written, _, calls = FORMS["hermes, two, after words"]
    markup = es.Markup(tools=TOOLS, is_constrained=True)
    read = Read([*written], markup)
    assert read.calls == calls
    assert read.parts > 20
    assert Read([*written]).parts == 4


def test_the_name_comes_before_the_arguments_do() -> None:
    reader = es.MarkupReader(es.Markup(tools=TOOLS, is_constrained=True))
    assert reader.feed('<tool_call>{"name": "weather", "arguments": ').calls == []
    (part,) = reader.feed("{").calls[:1]
    assert (part.name, part.arguments) == ("weather", "")


def test_marks_are_told_apart_at_their_first_characters() -> None:
    marks = [*es.CALL_MARKS]
    for mark in marks:
        assert not [one for one in marks if mark in one and mark != one]


def test_strings_in_pythons_words_may_hold_any_backslash() -> None:
    # Python warns of escapes like \d, which is an error in tests.
    for quoted, said in (
        (r"'\d+\.\w'", r"\d+\.\w"),
        (r"'a\nb\x41\u00fc\101\\d'", "a\nb" + "A\u00fcA\\d"),
        (r'"it\'s \"so\""', 'it\'s "so"'),
    ):
        read = Read([f"<tool_call>weather(city={quoted})</tool_call>"])
        assert read.calls == [("weather", {"city": said})]


def test_no_depth_of_arguments_is_a_bug_of_ours() -> None:
    # Python's JSON gives up near the recursion limit, and one way a level before another.
    for depth in range(900, 1000):
        inner = "[" * depth + '"a\n"' + "]" * depth
        said = f'<tool_call>{{"name": "weather", "arguments": {{"a": {inner}}}}}</tool_call>'
        read = Read([said])
        assert read.calls or read.text == said


def test_long_arguments_are_read_in_time_that_grows_with_their_length() -> None:
    # 100,000 characters one by one: looked through once, not each time.
    text = '{"text": "' + "{[a]}\\n" * 15000 + '"}'
    written = '<tool_call>{"name": "write-file", "arguments": ' + text + "}</tool_call>"
    read = Read([written[at : at + 4] for at in range(0, len(written), 4)])
    assert read.calls == [("write-file", json.loads(text))]


# --- token by token ---


class Script:
    """A model whose replies are written down: a sampler and a vocabulary in one."""

    end_tokens = frozenset((0,))
    is_over = False  # no grammar ends it

    def __init__(self, *tokens: str) -> None:
        """Those that begin with a dollar sign are control tokens."""
        self.tokens = ["", *tokens]
        self._left = iter(range(1, len(self.tokens)))

    def sample(self, row: object) -> int:
        return next(self._left, 0)

    def piece(self, token: int) -> bytes:
        text = self.tokens[token]
        return b"" if text.startswith("$") else text.encode()

    def control_pieces(self, marks: frozenset[str]) -> Mapping[int, bytes]:
        texts = {token: text[1:] for token, text in enumerate(self.tokens)}
        return {token: text.encode() for token, text in texts.items() if text in marks}

    def deltas(self, *, max_tokens: int = 99, **asked: Any) -> list[es.Delta]:
        """What a reply gains in each step."""
        me: Any = self
        request = es.GenerationRequest(ids=[1], max_tokens=max_tokens, **asked)
        reply = es.Reply(
            prompt_tokens=1,
            read_tokens=1,
            generation=es.Generation(request, lambda: None),
            index=0,
            sequence=me,
            sampler=me,
            text=es.ReplyText(request.stop),
        )
        found: list[es.Delta] = []
        while not (found and found[-1].finish_reason):
            found.append(reply.grow(None, me))
        return found


def merged(deltas: Sequence[es.Delta]) -> es.Delta:
    """All in one."""
    whole = es.Delta(0)
    for delta in deltas:
        whole.add(delta)
    return whole


CALL = ("$[TOOL_CALLS]", "weather", "$[ARGS]", "{}")


def test_marks_that_are_control_tokens_are_read_where_they_are_looked_for() -> None:
    whole = merged(Script(*CALL).deltas(markup=MARKUP))
    assert [(part.name, part.arguments) for part in whole.calls] == [("weather", "{}")]
    assert (whole.text, whole.finish_reason, whole.tokens) == ("", "tool_calls", 5)
    for markup in (None, es.Markup()):
        whole = merged(Script(*CALL, "$<unk>").deltas(markup=markup))
        assert (whole.text, whole.finish_reason) == ("weather{}", "stop")


@pytest.mark.parametrize(
    ("tokens", "begins_inside", "count"),
    [
        (("<think>", "a", " b", "</think>", "\n\n", "c"), False, 4),
        (("$<think>", "a", "$</think>", "c"), False, 3),
        (("<", "th", "ink", ">a", "</", "think", ">", "c"), False, 7),
        (("<", "th", "c"), False, 0),
        (("a", " b", "</think>", "c"), True, 3),
        (("a", " b"), True, 3),
        (("c", " d"), False, 0),
        (("\n", "<think>", "</think>", "c"), False, 3),
    ],
)
def test_thoughts_are_counted_token_by_token(
    tokens: Sequence[str], begins_inside: bool, count: int
) -> None:
    inside = es.THINK if begins_inside else None
    for tools in ({}, TOOLS):
        markup = es.Markup(begins_inside=inside, tools=tools)
        whole = merged(Script(*tokens).deltas(markup=markup))
        assert whole.tokens == len(tokens) + 1
        assert whole.reasoning_tokens == count
        assert whole.finish_reason == "stop"
        assert whole.text.startswith("c") or "c" not in tokens or tokens[0] == "<"


def test_a_token_that_may_begin_a_stop_text_is_counted_as_what_it_turns_out_to_be() -> (
    None
):
    for tokens, count in (
        (("<th", "ink>", "a", "</think>", "c"), 4),
        (("<th", "c"), 0),
    ):
        whole = merged(Script(*tokens).deltas(markup=es.Markup(), stop=("<thx",)))
        assert (whole.reasoning_tokens, whole.tokens) == (count, len(tokens) + 1)


def test_a_call_that_the_limit_cuts_ends_by_length() -> None:
    script = Script(
        "<tool_call>", '{"name": "weather", "arguments": {"city": "', "Z", "é"
    )
    whole = merged(script.deltas(markup=MARKUP, max_tokens=3))
    assert [(part.name, part.arguments) for part in whole.calls] == [
        ("weather", '{"city": "Z')
    ]
    assert (whole.finish_reason, whole.text) == ("length", "")


def test_a_reply_ends_with_its_last_call() -> None:
    script = Script(*CALL, *CALL, "so")
    deltas = script.deltas(markup=es.Markup(tools=TOOLS, max_calls=1))
    assert (len(deltas), merged(deltas).finish_reason) == (4, "tool_calls")
    assert len(merged(deltas).calls) == 1


def test_a_stop_string_ends_before_marks_are_read() -> None:
    script = Script("<think>", "a", "</think>", "c STOP", "d")
    whole = merged(script.deltas(markup=es.Markup(), stop=("STOP",)))
    assert (whole.reasoning, whole.text, whole.finish_reason) == ("a", "c ", "stop")
