"""Chat templates: what a model reads of a conversation, and what no conversation can do.

The templates here are written for the tests; those that come with llama.cpp are compared
with Hugging Face's own renderer by test_vendored_templates.py.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import chat_models, kit
from tests.test_tiny_models import llama, opened

Message = dict[str, Any]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
CONTROLS = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", '<|"|>')


def user(text: Any, **others: Any) -> Message:
    return {"role": "user", "content": text, **others}


def assistant(text: Any, **others: Any) -> Message:
    return {"role": "assistant", "content": text, **others}


def system(text: Any) -> Message:
    return {"role": "system", "content": text}


def tool(text: Any, **others: Any) -> Message:
    return {"role": "tool", "content": text, **others}


def calling(arguments: object) -> Message:
    """An assistant's call of a tool."""
    function = {"name": "weather", "arguments": arguments}
    return assistant(
        None, tool_calls=[{"id": "c1", "type": "function", "function": function}]
    )


def rendered(
    source: str,
    messages: Sequence[Message],
    *,
    controls: Sequence[str] = (),
    **how: Any,
) -> str:
    """The prompt as one text."""
    prompt = es.ChatTemplate(source, control_texts=controls).render(messages, **how)
    return "".join(part.text for part in prompt.parts)


def refusal(source: str, messages: Sequence[Message], **how: Any) -> str:
    """What a client is told; it is status 400."""
    with pytest.raises(es.TemplateRefused) as caught:
        rendered(source, messages, **how)
    assert caught.value.status == 400
    assert caught.value.param == "messages"
    assert "\n" not in caught.value.message and "Traceback" not in caught.value.message
    return caught.value.message.partition("does not take these messages: ")[2]


# --- messages in one form ---


@pytest.mark.parametrize(
    ("messages", "form"),
    [
        ([user("a")], [user("a")]),
        ([user(None)], [user("")]),
        ([{"role": "user"}], [user("")]),
        ([user([{"type": "text", "text": "a"}])], [user("a")]),
        (
            [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
            [user("a\nb")],
        ),
        ([user([])], [user("")]),
        ([{"role": "developer", "content": "a"}], [system("a")]),
        ([{"role": "function", "content": "1", "name": "f"}], [tool("1", name="f")]),
        ([user("a", name=None)], [user("a")]),
        ([user("a", name="Ann")], [user("a", name="Ann")]),
        ([user("a"), system("b"), user("c")], [system("b"), user("a"), user("c")]),
        (
            [system("a"), user("b"), {"role": "developer", "content": "c"}],
            [system("a\n\nc"), user("b")],
        ),
        ([system(""), system("b")], [system("b")]),
        ([tool("1", tool_call_id="c1")], [tool("1", tool_call_id="c1")]),
        ([assistant("a", tool_calls=[])], [assistant("a")]),
        ([assistant("a", tool_calls=None)], [assistant("a")]),
        *(
            ([assistant("a", **{name: "t"})], [assistant("a", **said, **{name: "t"})])
            for name in ("reasoning_content", "reasoning", "thinking")
            for said in [
                {
                    other: "t"
                    for other in ("reasoning_content", "thinking")
                    if other != name
                }
            ]
        ),
    ],
)
def test_messages_are_put_into_one_form(
    messages: list[Message], form: list[Message]
) -> None:
    found = [
        {"role": turn.role, "content": turn.text, **turn.others}
        for turn in es.normalized(messages)
    ]
    assert found == form


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ('{"city": "Rome"}', {"city": "Rome"}),
        ('{"n": 12345678901234567890123}', {"n": 12345678901234567890123}),
        ({"city": "Rome"}, {"city": "Rome"}),
        ("", {}),
        (None, {}),
        ("{}", {}),
        ("not JSON", "not JSON"),
        ("[1]", "[1]"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_a_tool_s_arguments_become_an_object(arguments: object, read: object) -> None:
    (turn,) = es.normalized([calling(arguments)])
    (call,) = turn.others["tool_calls"]
    assert call["function"]["arguments"] == read
    assert (call["id"], call["function"]["name"]) == ("c1", "weather")


@functools.cache
def talk(count: int) -> list[Message]:
    """Many of each kind, in a row."""
    calls = [
        {"id": f"c{n}", "function": {"name": "f", "arguments": "{}"}}
        for n in range(count)
    ]
    asks, results = assistant("", tool_calls=calls), [tool("1")] * count
    named = [tool("1", tool_call_id=f"c{n}") for n in reversed(range(count))]
    some = [system("a"), user("a"), assistant("a", reasoning="r", tool_calls=calls[:1])]
    said = [message for message in some for _ in range(count)]
    return [*said, asks, *results, asks, *named]


@pytest.mark.parametrize(
    "skills", [[True] * 5, [True, True, True, False, False], [False] * 5]
)
def test_turns_take_as_long_as_there_are_messages(skills: list[bool]) -> None:
    def make(count: int) -> list[es.Turn]:
        turns = es.normalized(talk(count))
        return es.folded(es.tool_turns(turns, [WEATHER], es.TemplateSkills(*skills)))

    turns = make(3)
    assert [turn.text for turn in turns if turn.role == "tool"] == ["1"] * (
        6 if skills[2] else 0
    )
    kit.assert_linear(make, 2_000)


def test_results_stand_after_their_calls_and_those_of_no_call_after_all() -> None:
    one, two = (
        calling("{}")["tool_calls"][0] | {"id": "c2"},
        calling("{}")["tool_calls"][0],
    )
    results = [
        tool(text, tool_call_id=id_)
        for text, id_ in (
            ("x", "d"),
            ("1", "c1"),
            ("y", "e"),
            ("2", "c2"),
            ("z", "d"),
            ("+", "c1"),
        )
    ]
    turns = es.normalized([assistant("", tool_calls=[one, two]), *results])
    skills = es.TemplateSkills(several_calls=False)
    found = es.tool_turns(turns, (), skills)
    assert [turn.text for turn in found] == ["", "2", "", "1", "+", "x", "y", "z"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "function", "arguments", "name"]), inner
        )
    ),
    max_leaves=8,
)
SAID = st.text(max_size=5)
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": SAID}))
CALLED = st.fixed_dictionaries({"name": SAID}, optional={"arguments": VALUES | SAID})
CALLS = st.fixed_dictionaries({"function": CALLED}, optional={"id": SAID})
ROLES = st.sampled_from([*es._ROLES])
PROPER = st.fixed_dictionaries(
    {"role": ROLES, "content": SAID | PARTS},
    optional={
        "tool_calls": st.lists(CALLS, max_size=2),
        **{name: SAID | st.none() for name in ("name", "reasoning", "tool_call_id")},
    },
)
WILD = st.fixed_dictionaries(
    {"role": ROLES | VALUES, "content": VALUES}, optional={"tool_calls": VALUES}
)
MESSAGES = st.lists(PROPER, min_size=1, max_size=4) | st.lists(PROPER | WILD)


TEMPLATES = [
    es.ChatTemplate(source, control_texts=CONTROLS)
    for source in (chat_models.ZEPHYR, chat_models.CHATML, chat_models.GEMMA, PLAIN)
]


@given(MESSAGES, st.booleans(), st.sampled_from(TEMPLATES))
@settings(deadline=None)
def test_whatever_is_sent_there_is_a_prompt_or_a_400(
    messages: list[Message], continues: bool, template: es.ChatTemplate
) -> None:
    body = {"messages": messages, "continue_final_message": continues}
    try:
        request = es.chat_request(es.parse_form(es.ChatForm, body))
        prompt = template.render(request.messages, continues_last=continues)
    except es.ApiError as error:
        assert error.status == 400
    else:
        assert all(part.text for part in prompt.parts)


# --- what a template has to work with ---


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|</s>"),
        ("{{ tools }} {{ documents }} {{ add_generation_prompt }}", "None None True"),
        ("{{ x }}{{ x.y is defined }}", "1False"),
        ("{{ {'b': '<é>', 'a': [1]} | tojson }}", '{"b": "<é>", "a": [1]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}", '{"a": 2, "b": 1}'),
        ("{{ '<é🙂>' | tojson(ensure_ascii=true) }}", '"<\\u00e9\\ud83d\\ude42>"'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for i in [1, 2] %}{% continue %}{{ i }}{% endfor %}.", "."),
        ("{% for i in 'ab' %}{{ loop.index0 }}{{ loop.last }} {% endfor %}", "0False 1True "),
        ("{% for i in [] %}{% else %}none{% endfor %}", "none"),
        ("{% set n = namespace(a=1) %}{% for i in [2, 3] %}{% set n.a = n.a + i %}{% endfor %}{{ n.a }}", "6"),
        ("a{% generation %}b{{ x }}{% endgeneration %}c", "ab1c"),
        ("{{ dict(a=1).a }}", "1"),
        ("  {% if true %}\na\n  {% endif %}\nb", "a\nb"),
        ("{% macro m(t) %}<{{ t }}>{% endmacro %}{{ m('a') }}", "<a>"),
    ],
)  # fmt: skip
def test_templates_have_what_hugging_face_gives_them(source: str, text: str) -> None:
    template = es.ChatTemplate(source, bos="<s>", eos="</s>")
    (part,) = template.render([], variables={"x": 1}).parts
    assert part == es.PromptPart(text, is_plain=False)


def test_a_template_may_ask_for_the_date() -> None:
    before, found, after = (
        time.strftime("%Y-%m-%d"),
        rendered("{{ strftime_now('%Y-%m-%d') }}", []),
        time.strftime("%Y-%m-%d"),
    )
    assert found in (before, after)


def test_a_caller_s_variables_replace_none_of_the_server_s() -> None:
    ours = {"messages": 1, "bos_token": 2, "tools": 3, "add_generation_prompt": 4}
    source = "{{ messages }}{{ bos_token }}{{ tools }}{{ add_generation_prompt }}"
    template = es.ChatTemplate(source, bos="<s>")
    (part,) = template.render([], variables=ours, add_generation_prompt=False).parts
    assert part.text == "[]<s>NoneFalse"


def test_what_a_template_does_to_messages_stays_in_the_template() -> None:
    messages = [user("a"), calling({"x": [1]})]
    before = json.dumps(messages)
    source = "{% for m in messages %}{{ m.content }}{% set m = 1 %}{% endfor %}"
    rendered(source, messages)
    assert json.dumps(messages) == before


# --- what a template cannot do ---


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list'"),
        ("{{ messages[0].update(a=1) }}", "'update' of 'dict' object is unsafe"),
        ("{{ raise_exception.__globals__.x }}", "'__globals__'"),
        ("{{ messages[0].__class__.x }}", "'__class__'"),
        ("{% set n = namespace(_a=1) %}", "a namespace may not hold '_a'"),
        ("{% set n = namespace() %}{% set n.__a = 1 %}", "may not hold '__a'"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{{ range(1000000) }}", "Range too big"),
        ("{{ a.b.c }}", "'a' is undefined"),
        ("{{ none + 1 }}", "unsupported operand"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ raise_exception('No such\nthing') }}", "No such thing"),
        ("{{ raise_exception('x' * 9999) }}", "x" * 512),
        ("{{ raise_exception('') }}", "TemplateError"),
        ("{% include 'a' %}", "no loader for this environment specified"),
    ],
)
def test_a_template_that_fails_is_a_400_with_its_words(source: str, words: str) -> None:
    assert words in refusal(source, [user("a")])


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4,
        "{% set r = range(99999) %}" + "{% for i in r %}" * 4 + "{% endfor %}" * 4,
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    ],
)
def test_a_template_that_never_ends_is_stopped(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(es, "_MAX_RENDER_S", 0.05)
    assert refusal(source, [user("a")]) == "it needs more than 0.05 s for them"


def test_a_prompt_beyond_the_limit_is_refused_before_it_is_whole() -> None:
    source = "{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(es.ContextLengthExceeded, match="more than 5000 characters"):
        rendered(source, [user("a" * 1000)], max_chars=5000)
    assert len(rendered(PLAIN, [user("a" * 4993)], max_chars=5000)) == 5000


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ a | from_json }}", "No filter named 'from_json'"),
        ("{% generation %}", "(line 1)"),
        ("a\n{% nonsense %}", "unknown tag 'nonsense'. (line 2)"),
        ("{% for i in [] %}" * 300 + "{% endfor %}" * 300, "is not valid"),
        ("x" * (1 << 20) + "x", "has 1048577 characters and may have 1048576"),
    ],
)
def test_a_template_that_cannot_be_compiled_is_one_sentence(
    source: str, words: str
) -> None:
    with pytest.raises(es.UnusableTemplate) as caught:
        es.ChatTemplate(source)
    assert words in str(caught.value)


def test_a_jinja_whose_sandbox_has_holes_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(package: str) -> tuple[int, ...]:
        return (3, 1, 5)

    monkeypatch.setattr(es, "installed_version", version)
    with pytest.raises(es.UnusableTemplate) as caught:
        es.ChatTemplate("")
    assert str(caught.value).startswith(
        "a chat template needs jinja2>=3.1.6, and jinja2 3.1.5 is older than 3.1.6 (CVE-"
    )


# --- nothing is left out ---


LEAVES_OUT = PLAIN.replace("m.content", "m.content if m.role != leave_out else ''")


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("text", ["a", "user", "a long text of many words"])
def test_a_message_that_the_template_leaves_out_is_named(role: str, text: str) -> None:
    # Though it stands in the prompt: others said the same, or the template does.
    others = [r for r in ("user", "assistant", "tool") if r != role]
    messages = [{"role": r, "content": text} for r in (role, *others)]
    found = refusal(LEAVES_OUT, messages, variables={"leave_out": role})
    assert found.endswith(f"messages[0] ({role})")


def test_a_result_that_the_template_leaves_out_is_said_by_the_user() -> None:
    messages = [tool("sun"), assistant("a"), tool("rain"), tool("snow"), user("b")]
    template = es.ChatTemplate(LEAVES_OUT)
    prompt = template.render(messages, variables={"leave_out": "tool"})
    assert prompt.is_folded
    assert "".join(part.text for part in prompt.parts) == (
        "<user><tool_response>\nsun\n</tool_response>\n<assistant>a\n"
        "<user><tool_response>\nrain\n</tool_response>\n<tool_response>\nsnow\n"
        "</tool_response>\n\nb\n"
    )


@pytest.mark.parametrize(
    "how",
    [
        "m.content | trim",
        "m.content | tojson",
        "m.content | tojson(ensure_ascii=true)",
        "m.content.split('</think>')[-1].lstrip('\\n')",
        "' '.join(m.content.split())",
    ],
)
def test_a_text_may_be_trimmed_and_encoded(how: str) -> None:
    text = "<think>so</think>\n\nIt's  'é', then.\n"
    messages = [user("a"), assistant(text), user("  "), user("")]
    assert "then." in rendered(PLAIN.replace("m.content", how), messages)


def test_messages_may_be_in_another_order() -> None:
    source = PLAIN.replace("in messages", "in messages | reverse")
    assert rendered(source, [user("a"), user("b")]) == "<user>b\n<user>a\n"


# --- templates that take less ---

STRICT = chat_models.GEMMA  # no system, and turns alternate


@pytest.mark.parametrize(
    ("messages", "like"),
    [
        ([system("s"), user("a")], [user("s\n\na")]),
        ([user("a"), user("b")], [user("a\n\nb")]),
        (
            [user("a"), assistant("b"), assistant("c"), user("d")],
            [user("a"), assistant("b\n\nc"), user("d")],
        ),
        ([system("s")], [user("s")]),
        ([user("a"), system("s"), user("b")], [user("s\n\na\n\nb")]),
        (
            [system("s"), assistant("a"), user("b")],
            [user("s"), assistant("a"), user("b")],
        ),
    ],
)
def test_a_refused_conversation_is_folded_and_that_is_said(
    messages: list[Message], like: list[Message]
) -> None:
    template = es.ChatTemplate(STRICT)
    assert template.render(messages) == template.render(like)._replace(is_folded=True)


def test_a_system_message_that_would_be_left_out_is_said_by_the_user() -> None:
    source = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    prompt = es.ChatTemplate(source).render([system("Be brief."), user("Hi")])
    assert prompt == ([es.PromptPart("Be brief.\n\nHi")], True)


def test_calls_and_thoughts_of_neighbours_are_kept() -> None:
    source = (
        "{% for m in messages %}{% if loop.previtem and loop.previtem.role == m.role %}"
        "{{ raise_exception('twice') }}{% endif %}{{ m.content }}|{{ m.reasoning_content }}|"
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments.n }}"
        "{{ c.function.arguments.word }}{% endfor %}{% endfor %}"
    )
    calls = [calling({"n": n}) | {"reasoning_content": f"t{n}"} for n in (1, 2)]
    assert rendered(source, calls) == "|t1\n\nt2|weather1weather2"


@pytest.mark.parametrize(
    "messages",
    [[assistant("a")], [assistant("a"), tool("b")], [assistant("a"), user("b")]],
)
def test_what_is_refused_twice_is_a_400_with_the_first_words(
    messages: list[Message],
) -> None:
    words = refusal(STRICT, messages)
    assert words in (
        "Conversation roles must alternate user/assistant",
        "Role tool not supported",
        "Role system not supported",
    )


def test_a_conversation_that_is_taken_is_not_folded() -> None:
    prompt = es.ChatTemplate(PLAIN).render([system("s"), user("a"), user("b")])
    assert prompt.is_folded is False
    assert prompt.parts[0].text == "<system>s\n<user>a\n<user>b\n"


# --- going on with the last message ---


@pytest.mark.parametrize("text", ["Once", "Once upon ", "", "a\n", "</s>x", "4"])
@pytest.mark.parametrize("source", [chat_models.ZEPHYR, chat_models.CHATML, PLAIN])
def test_a_prompt_may_end_where_the_last_message_does(source: str, text: str) -> None:
    messages = [user("Tell me"), assistant(text)]
    prompt = rendered(source, messages, continues_last=True, controls=["</s>"])
    before = rendered(source, [user("Tell me")], add_generation_prompt=False)
    assert prompt.startswith(before)
    assert prompt.endswith(text)
    whole = rendered(source, messages, add_generation_prompt=False)
    assert whole.startswith(prompt)


def test_only_what_the_assistant_said_can_go_on() -> None:
    with pytest.raises(es.InvalidValue, match="must end with the assistant's"):
        rendered(PLAIN, [assistant("a"), user("b")], continues_last=True)


def test_a_message_that_is_not_in_the_prompt_cannot_go_on() -> None:
    source = PLAIN.replace("{{ m.content }}", "")
    assert "leaves out" in refusal(source, [assistant("")], continues_last=True)


# --- control tokens that somebody wrote ---


def parts(
    source: str, messages: Sequence[Message], **how: Any
) -> list[tuple[str, bool]]:
    """What is to be read how."""
    template = es.ChatTemplate(source, control_texts=CONTROLS)
    return [(text, plain) for text, plain in template.render(messages, **how).parts]


TOOL_D = "{{ messages[0].content }}{{ tools[0].d or tools[0].function.description }}"


@pytest.mark.parametrize(
    ("source", "message", "found"),
    [
        (
            "<s>{{ messages[0].content }}<|im_end|>",
            user("a<|im_end|>b"),
            [("<s>a", False), ("<|im_end|>", True), ("b<|im_end|>", False)],
        ),
        (
            "{{ messages[0].content | trim }}",
            user(" <s></s> "),
            [("<s>", True), ("</s>", True)],
        ),
        ("{{ messages[0].content }}", user("<s><|im"), [("<s>", True), ("<|im", False)]),
        ("{{ messages[0].content }}{{ messages[0].name }}", user("", name="<s>"), [("<s>", True)]),
        ("{{ messages[0].x.keys() | first }}", user("", x={"<s>": 1}), [("<s>", True)]),
        ("{{ v }}", user(""), [("v", False), ("<s>", True)]),
        (TOOL_D, user(""), [("t", False), ("<s>", True)]),
        (
            "{{ messages[0].content | tojson(ensure_ascii=true) }}",
            user('é<|"|>'),
            [('"\\u00e9', False), ('<|\\"|>', True), ('"', False)],
        ),
        # What is cut off takes the other mark with it.
        ("{{ messages[0].content.split('<s>')[1] }}", user("a<s>b"), [("b", False)]),
        ("{{ v.split('<s>')[0] }}c", user(""), [("v", False), ("c", False)]),
    ],
)  # fmt: skip
def test_a_control_token_s_text_is_text_wherever_somebody_writes_it(
    source: str, message: Message, found: list[tuple[str, bool]]
) -> None:
    how: Any = {"variables": {"v": "v<s>"}}
    if "tools" in source:
        how["tools"] = [{"d": "t<s>"}]
    assert parts(source, [message], **how) == found


RESERVED = "\ufdd0\ufdd1\ufdd2"
FRAGMENTS = st.lists(
    st.sampled_from(
        [*CONTROLS, *RESERVED, "<", "|", ">", "<|", "im_end", "|>", "s", "/", " ", "é0"]
    ),
    max_size=12,
).map("".join)


@given(st.lists(FRAGMENTS, min_size=1, max_size=3))
def test_no_text_makes_a_control_token_or_loses_a_character(texts: list[str]) -> None:
    template = "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
    found = parts(template, [user(text) for text in texts])
    whole = "".join(text for text, _ in found)
    cleaned = [
        functools.reduce(lambda t, c: t.replace(c, "\ufffd"), RESERVED, t)
        for t in texts
    ]
    assert whole == "".join(f"[INST]{text}[/INST]" for text in cleaned)
    for text, is_plain in found:
        assert (text in CONTROLS) == is_plain
        assert is_plain or not any(control in text for control in CONTROLS)


@given(st.lists(st.text("ab<|", min_size=1, max_size=4), max_size=12), st.text("ab<|>"))
def test_the_longest_text_is_found_first_as_by_plain_alternatives(
    texts: list[str], text: str
) -> None:
    plain = re.compile(
        "|".join(map(re.escape, sorted({*texts}, key=len)[::-1])) or "(?!)"
    )
    tree = re.compile(es.pattern_of_any({*texts}) or "(?!)")
    assert tree.findall(text) == plain.findall(text)


def test_texts_that_begin_with_each_other_without_end_are_found_too() -> None:
    pattern = es.pattern_of_any({"a" * length for length in range(1, 301)})
    assert re.compile(pattern).findall("a" * 350) == ["a" * 300, "a" * 50]


@pytest.mark.parametrize(
    "fragment", ["a", "<", "<unused", "<unused624", "<|reserved_special_token_25", "<é"]
)
def test_large_texts_are_read_in_linear_time(fragment: str) -> None:
    controls = [f"<unused{n}>" for n in range(6242)]
    controls += [f"<|reserved_special_token_{n}|>" for n in range(256)]
    template = es.ChatTemplate("{{ messages[0].content }}", control_texts=controls)
    text = fragment * (4_000_000 // len(fragment))
    begin = time.thread_time()
    assert len(template.render([user(text)]).parts) == 1
    # A tenth of a second; alternatives, one by one, take minutes.
    assert time.thread_time() - begin < 5


def test_many_messages_are_read_in_linear_time() -> None:
    begin = time.thread_time()
    assert len(rendered(PLAIN, [user("a"), assistant("b")] * 10_000)) > 200_000
    assert time.thread_time() - begin < 5  # 0.4


def test_messages_nested_too_deeply_are_refused() -> None:
    deep: Any = "a"
    for _ in range(2000):  # JSON of 10 KB
        deep = [deep]
    assert "nested too deeply" in refusal(PLAIN, [user("a", x=deep)])
    # Also where the template knows no tools, so that they are written out for it.
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": deep}}}]
    assert "nested too deeply" in refusal(PLAIN, [user("a")], tools=tools)


# --- a prompt's token ids ---


def tokenizer_of(path: Path) -> es.Tokenizer:
    with es.checked_model(str(path), "") as (_, header):
        return es.Tokenizer(llama(), opened(path), header)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: Any) -> es.Tokenizer:
    """SentencePiece with a space in front, byte pairs, SentencePiece without."""
    folder = tmp_path_factory.mktemp(request.param)
    return tokenizer_of(chat_models.GENERATING[request.param](folder))


def vocabulary_of(tokenizer: es.Tokenizer, template: str = "") -> es.Vocabulary:
    return es.Vocabulary(tokenizer, template)


def ids_of(tokenizer: es.Tokenizer, texts: Sequence[str]) -> set[int]:
    """Of tokens, by name."""
    names = tokenizer.pieces(range(tokenizer.n_vocab))
    return {token for token, name in enumerate(names) if name in texts}


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("written", ["<s>", ""])
def test_a_prompt_has_one_bos_if_the_file_wants_it_and_never_two(
    tmp_path: Path, begin: bool, written: str
) -> None:
    tokenizer = tokenizer_of(chat_models.tiny_llama(tmp_path, begin=begin))
    ids = tokenizer.encode_prompt([es.PromptPart(f"{written}cat")])
    (bos,) = ids_of(tokenizer, ["<s>"])
    assert ids.count(bos) == (1 if begin or written else 0)
    assert ids[0] == bos or not ids.count(bos)
    assert ids_of(tokenizer, ["</s>"]).isdisjoint(ids)


def test_an_empty_prompt_is_a_bos_or_nothing(tokenizer: es.Tokenizer) -> None:
    bos = ids_of(tokenizer, ["<s>", "<bos>"]) if tokenizer.kind != "BPE" else set()
    assert {*tokenizer.encode_prompt([])} <= bos


@given(
    texts=st.lists(FRAGMENTS.filter(bool) | st.text(min_size=1, max_size=9), max_size=4)
)
@settings(max_examples=40, deadline=None)
def test_what_somebody_wrote_becomes_no_control_token(
    tokenizer: es.Tokenizer, texts: list[str]
) -> None:
    vocabulary = vocabulary_of(tokenizer)
    controls = ids_of(tokenizer, [*vocabulary.control_texts])
    source = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    template = es.ChatTemplate(source, control_texts=vocabulary.control_texts)
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    prompt = template.render([user(text) for text in texts])
    ids = tokenizer.encode_prompt(prompt.parts)
    if tokenizer.kind != "BPE":
        assert ids[:1] == [*ids_of(tokenizer, [vocabulary.bos])]
        ids = ids[1:]
    assert controls.isdisjoint(ids)
    # And the model reads all of it.
    whole = "".join(part.text for part in prompt.parts)
    assert tokenizer.decode(ids, with_special=True).removeprefix(
        " "
    ) == whole.removeprefix(" ")


def test_the_template_s_own_control_tokens_are_tokens(tokenizer: es.Tokenizer) -> None:
    vocabulary = vocabulary_of(tokenizer)
    control = max(vocabulary.control_texts)
    (token,) = ids_of(tokenizer, [control])
    prompt = [es.PromptPart("a"), es.PromptPart(control, is_plain=True)]
    assert token not in tokenizer.encode_prompt(prompt)
    assert token in tokenizer.encode_prompt([es.PromptPart(f"a{control}b")])


def test_even_a_token_that_is_text_is_not_found_in_a_plain_part(tmp_path: Path) -> None:
    # llama.cpp makes gpt-oss's <|start|> such a one.
    tokenizer = tokenizer_of(chat_models.tiny_qwen(tmp_path))
    (token,) = ids_of(tokenizer, ["<think>"])
    for is_plain in (True, False):
        ids = tokenizer.encode_prompt([es.PromptPart("<think>", is_plain)])
        assert (token in ids) != is_plain


# --- what tokens say ---


def test_pieces_are_the_bytes_that_tokens_add(tokenizer: es.Tokenizer) -> None:
    vocabulary = vocabulary_of(tokenizer)
    for text in ("Hello café 漢字 🙂", "the cat\n sat"):
        ids = tokenizer.encode(text)
        said = b"".join(map(vocabulary.piece, ids)).decode()
        assert said.removeprefix(" ") == text
        assert [*map(vocabulary.piece, ids)] == [*map(vocabulary.piece, ids)]  # cached
    for token in ids_of(tokenizer, [*vocabulary.control_texts]):
        assert vocabulary.piece(token) == b""


def test_tokens_that_are_text_are_said(tmp_path: Path) -> None:
    vocabulary = vocabulary_of(tokenizer_of(chat_models.tiny_qwen(tmp_path)))
    (token,) = ids_of(tokenizer_of(chat_models.tiny_qwen(tmp_path)), ["<think>"])
    assert vocabulary.piece(token) == b"<think>"
    assert "<think>" not in vocabulary.control_texts


def test_replies_end_at_the_file_s_own_end_tokens(tokenizer: es.Tokenizer) -> None:
    vocabulary = vocabulary_of(tokenizer)
    (ends,) = (
        names
        for names in (
            {"</s>"},
            {"<|im_end|>", "<|endoftext|>"},
            {"<eos>", "<end_of_turn>"},
        )
        if names <= vocabulary.control_texts
    )
    assert vocabulary.end_tokens == ids_of(tokenizer, [*ends])


def test_html_s_end_of_a_strike_through_ends_no_reply(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(chat_models.tiny_gemma(tmp_path))
    (token,) = ids_of(tokenizer, ["</s>"])
    assert llama().llama_vocab_is_eog(tokenizer.vocab, token)  # so llama.cpp thinks
    vocabulary = vocabulary_of(tokenizer, chat_models.GEMMA)
    assert token not in vocabulary.end_tokens
    assert vocabulary.piece(token) == b"</s>"
    assert "</s>" not in vocabulary.control_texts
    # But to a model whose template ends turns with it, it does.
    vocabulary = vocabulary_of(tokenizer, "{{ messages[0].content }}</s>")
    assert token in vocabulary.end_tokens
    assert vocabulary.piece(token) == b""
    assert "</s>" in vocabulary.control_texts


# --- tools ---

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Now",
        "parameters": {"type": "object"},
    },
}
KNOWS_NONE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
AGENT = [
    user("Zurich? Rome?"),
    {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            {"id": f"call_{n}", "function": {"name": "weather", "arguments": {"n": n}}}
            for n in (1, 2)
        ],
    },
    {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
    {"role": "tool", "content": "sun", "tool_call_id": "call_2"},
]


def test_a_template_that_knows_no_tools_says_all_of_them_in_our_words() -> None:
    template = es.ChatTemplate(KNOWS_NONE)
    assert not (template.skills.tools or template.skills.calls)
    (part,) = template.render(AGENT, tools=[WEATHER]).parts
    words, _, rest = part.text.partition("<user>")
    assert words.startswith("<system>") and '"name": "weather"' in words
    assert rest == (
        "Zurich? Rome?<assistant>Let me see.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"n": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"n": 2}}\n</tool_call>'
        "<user><tool_response>\nrain\n</tool_response>\n"
        "<tool_response>\nsun\n</tool_response><assistant>"
    )


class CallStyle(NamedTuple):
    """A way to write calls whose arguments are JSON."""

    opening: str
    before_name: str
    before_arguments: str
    after_arguments: str
    between_calls: str
    closing: str = ""


_ARGUMENTS_KEY = '", "arguments": '
CALL_STYLES = (
    CallStyle("", '<tool_call>\n{"name": "', _ARGUMENTS_KEY, "}\n</tool_call>", "\n"),
    CallStyle("[TOOL_CALLS][", '{"name": "', _ARGUMENTS_KEY, "}", ", ", "]"),
    CallStyle("", "[TOOL_CALLS]", "[ARGS]", "", ""),
    CallStyle("", "[TOOL_CALLS]", "[CALL_ID]a1b2c3d4e[ARGS]", "", ""),
    CallStyle("<TOOLCALL>[", '{"name": "', _ARGUMENTS_KEY, "}", ", ", "]</TOOLCALL>"),
    CallStyle(
        "<tool_calls>[", '{"name": "', _ARGUMENTS_KEY, "}", ", ", "]</tool_calls>"
    ),
    CallStyle(
        "<tool_calls>\n", '{"name": "', _ARGUMENTS_KEY, "}\n", "", "</tool_calls>"
    ),
    CallStyle("", "<function=", ">", "</function>", ""),
    CallStyle("", '<|function_call|>{"name": "', _ARGUMENTS_KEY, "}", ""),
    CallStyle(
        "<\uff5ctool\u2581calls\u2581begin\uff5c>",
        "<\uff5ctool\u2581call\u2581begin\uff5c>",
        "<\uff5ctool\u2581sep\uff5c>",
        *("<\uff5ctool\u2581call\u2581end\uff5c>", ""),
        "<\uff5ctool\u2581calls\u2581end\uff5c>",
    ),
    CallStyle("", '{"name": "', '", "parameters": ', "}", "; "),  # Llama 3
)


def test_what_is_told_of_the_form_of_calls_is_a_form_that_is_read() -> None:
    (part,) = es.ChatTemplate(KNOWS_NONE).render(AGENT, tools=[WEATHER]).parts
    reader = es.MarkupReader(es.Markup(tools={"weather": {}}))
    found = reader.feed(part.text.partition("Let me see.")[2]).calls
    assert [call.arguments for call in found if not call.id] == ['{"n": 1}', '{"n": 2}']
    for style in CALL_STYLES:
        reader = es.MarkupReader(es.Markup(tools={"weather": {}}))
        one = f'{style.before_name}weather{style.before_arguments}{{"n": 1}}'
        one += style.after_arguments
        written = style.opening + one + style.between_calls + one + style.closing
        assert not reader.feed(written).text + reader.end().text, style
        assert reader.calls == 2, style


def test_a_template_that_takes_no_description_of_tools_says_so() -> None:
    messages = [user("a"), assistant("b"), user("c")]
    said = refusal("{{ messages[-1].content }}", messages, tools=[WEATHER])
    assert said == "it leaves out the description of the tools"


def test_a_system_message_is_kept_beside_the_tools() -> None:
    (part,) = (
        es.ChatTemplate(KNOWS_NONE)
        .render([system("Be brief."), user("Hi")], tools=[WEATHER])
        .parts
    )
    assert part.text.startswith("<system>Be brief.\n\n# Tools")


ONE_CALL = (
    "{% for m in messages %}{% if m.tool_calls and m.tool_calls | length > 1 %}"
    "{{ raise_exception('only one') }}{% endif %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}{% for t in tools %}{{ t.function.description }}{% endfor %}"
)


def test_several_calls_come_one_by_one_where_a_template_takes_no_more() -> None:
    template = es.ChatTemplate(ONE_CALL)
    assert template.skills == es.TemplateSkills(several_calls=False)
    (part,) = template.render(AGENT, tools=[WEATHER]).parts
    assert part.text == (
        '<user>Zurich? Rome?<assistant>Let me see.weather{"n": 1}<tool>rain'
        '<assistant>weather{"n": 2}<tool>sunNow'
    )


SHORT_IDS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}{{ c.id }}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% if m.role == 'tool' %}{{ m.tool_call_id }}{{ m.name }}{% endif %}{% endfor %}"
    "{% for t in tools %}{{ t.function.description }}{% endfor %}"
)


def test_ids_of_other_servers_become_what_a_template_takes() -> None:
    template = es.ChatTemplate(SHORT_IDS)
    assert not template.skills.any_ids
    (part,) = template.render(AGENT, tools=[WEATHER]).parts
    found = re.findall(r"[0-9a-z]{9}(?=weather)", part.text)
    assert len(found) == 4 and found[:2] == found[2:] and found[0] != found[1]


@pytest.mark.parametrize("absent", [{}, {"id": None, "type": None}])
def test_results_get_the_names_and_ids_of_their_calls(absent: Message) -> None:
    source = (
        "{% for m in messages %}{% for c in m.tool_calls %}{{ c.id }}{{ c.type }}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
        "{{ m.content }}{% if m.role == 'tool' %}={{ m.tool_call_id }}={{ m.name }}"
        "{% endif %}{% endfor %}{% for t in tools or [] %}{{ t.function.description }}"
        "{% endfor %}"
    )
    function = {"name": "weather", "arguments": {}}
    messages: list[Message] = [
        {"role": "assistant", "tool_calls": [{"function": function, **absent}] * 2},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "sun"},
    ]
    assert rendered(source, messages) == (
        "call00000functionweather{}call00001functionweather{}"
        "rain=call00000=weathersun=call00001=weather"
    )


def test_a_template_that_drops_a_call_is_not_believed() -> None:
    source = (
        "{% for m in messages %}{% if 'tool_call>' not in m.content %}{{ m.content }}"
        "{% endif %}"
        "{% if loop.index0 < 2 %}"
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
        "{% endfor %}{% endif %}{% endfor %}"
        "{% for t in tools %}{{ t.function.description }}{% endfor %}"
    )
    template = es.ChatTemplate(source)
    messages = [user("a"), assistant("b"), user("c"), calling({"n": 1})]
    with pytest.raises(es.TemplateRefused, match=r"the calls of messages\[3\]"):
        template.render(messages, tools=[WEATHER])


# As Llama 3's: what is said beside calls is left out.
NO_TEXT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for t in tools %}{{ t.function.description }}{% endfor %}"
)
# As Mistral's: roles alternate, where calls and results do not count.
ALTERNATES = (
    "{% set n = namespace(user=true) %}{% for m in messages %}"
    "{% if m.role in ('user', 'assistant') and not m.tool_calls %}"
    "{% if (m.role == 'user') != n.user %}{{ raise_exception('must alternate') }}"
    "{% endif %}{% set n.user = not n.user %}{% endif %}{% endfor %}"
) + NO_TEXT
SPOKEN = {**calling({"n": 1}), "content": "Let me see."}
RAIN = tool("rain", tool_call_id="c1")


def test_what_is_said_beside_a_call_is_a_turn_before_it_where_a_template_drops_it() -> (
    None
):
    template = es.ChatTemplate(NO_TEXT)
    assert template.skills == es.TemplateSkills(text_with_calls=False)
    thoughts = {"reasoning_content": "t"}
    prompt = template.render([user("a"), SPOKEN | thoughts, RAIN], tools=[WEATHER])
    (part,) = prompt.parts
    assert (
        part.text
        == '<user>a<assistant>Let me see.<assistant>weather{"n": 1}<tool>rainNow'
    )
    assert not prompt.is_folded
    first, calls = es._texts_apart(es.normalized([SPOKEN | thoughts]))
    assert first.others["reasoning_content"] == "t" and "tool_calls" not in first.others
    assert [*calls.others] == ["tool_calls"]


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (
            [user("a"), SPOKEN, RAIN, assistant("b"), user("c")],
            (
                "<user>a<assistant>Let me see.\n<tool_call>\n"
                '{"name": "weather", "arguments": {"n": 1}}\n</tool_call>'
                "<user><tool_response>\nrain\n</tool_response><assistant>b<user>cNow"
            ),
        ),
        (  # who asks on before there was an answer
            [user("a"), calling({"n": 1}), RAIN, user("c")],
            (
                '<user>a<assistant><tool_call>\n{"name": "weather", "arguments": '
                '{"n": 1}}\n</tool_call><user><tool_response>\nrain\n</tool_response>'
                "\n\ncNow"
            ),
        ),
    ],
)  # fmt: skip
def test_calls_and_results_are_text_in_a_conversation_that_is_refused_with_them(
    messages: list[Message], text: str
) -> None:
    template = es.ChatTemplate(ALTERNATES)
    prompt = template.render(messages, tools=[WEATHER])
    assert prompt == ([es.PromptPart(text)], True)
    usual = [user("a"), calling({"n": 1}), RAIN, assistant("b"), user("c")]
    assert not template.render(usual, tools=[WEATHER]).is_folded


@pytest.mark.parametrize("arguments", ["{oops", "[1]", '"a"', "{'a': 1}"])
def test_arguments_that_are_no_object_are_text_where_a_template_looks_into_them(
    arguments: str,
) -> None:
    source = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}"
        "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}"
        "{% endfor %}{% endfor %}{% endfor %}"
        "{% for t in tools %}{{ t.function.description }}{% endfor %}"
    )
    messages = [user("a"), calling(arguments), RAIN]
    prompt = es.ChatTemplate(source).render(messages, tools=[WEATHER])
    assert prompt.is_folded
    assert json.dumps(arguments) in prompt.parts[0].text


def test_what_is_refused_in_every_form_is_told_in_the_first_words() -> None:
    source = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ raise_exception(v) }}"
    )
    words = refusal(source, [user("a"), SPOKEN, RAIN], variables={"v": "never"})
    assert words == "never"


# --- texts in parts ---

# What reads a content as SmolVLM's template does, LLaVA's, and Idefics'; of a string each
# shows nothing, or fails.
READS_PARTS = {
    "a loop": (
        "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}"
        "{% elif p['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    ),
    "the first": "{{ m['content'][0]['text'] }}",
    "a filter": (
        "{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text')"
        " | join }}"
    ),
    "no string": "{% if m.content is string %}{{ raise_exception('parts!') }}{% endif %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}",
}
EITHER = (
    "{% if m.content is string %}={{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
)
EVERY_ROLE = [system("Be brief."), user("a b"), assistant("c"), tool("4"), user("d")]


def of_parts(how: str, *roles: str, before: str = "", after: str = "") -> str:
    """A template that reads what these roles say so, and of others a string."""
    plain = "{{ '' + m.content }}"
    content = READS_PARTS[how]
    if roles:
        content = (
            f"{{% if m.role in {roles} %}}{content}{{% else %}}{plain}{{% endif %}}"
        )
    return f"{{% for m in messages %}}{before}<{{{{ m.role }}}}>{content}{after}{{% endfor %}}"


@pytest.mark.parametrize("how", READS_PARTS)
@pytest.mark.parametrize(
    "roles", [(), *(("system", "user", "assistant", "tool")[n:] for n in range(4))]
)
def test_who_is_read_only_in_parts_speaks_in_parts(
    how: str, roles: tuple[str, ...]
) -> None:
    template = es.ChatTemplate(of_parts(how, *roles))
    assert template.in_parts == {*(roles or ("system", "user", "assistant", "tool"))}
    prompt = template.render(EVERY_ROLE)
    text = "<system>Be brief.<user>a b<assistant>c<tool>4<user>d"
    assert prompt == ([es.PromptPart(text)], False)
    one = [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]
    assert template.render(one).parts == [es.PromptPart("<user>a\nb")]


def test_who_is_read_either_way_goes_on_to_speak_in_strings() -> None:
    template = es.ChatTemplate(f"{{% for m in messages %}}{EITHER}{{% endfor %}}")
    assert template.in_parts == frozenset()
    assert template.render(EVERY_ROLE).parts[0].text == "=Be brief.=a b=c=4=d"


def test_a_template_that_shows_no_form_of_a_text_is_given_strings() -> None:
    template = es.ChatTemplate("{% for m in messages %}{{ m.content + 1 }}{% endfor %}")
    assert template.in_parts == frozenset()


@pytest.mark.parametrize("how", READS_PARTS)
def test_what_is_refused_in_parts_is_folded_and_merged_in_parts(how: str) -> None:
    refuses = (
        "{% if m.role == 'system' or loop.previtem and loop.previtem.role == m.role %}"
    )
    refuses += "{{ raise_exception('no') }}{% endif %}"
    template = es.ChatTemplate(of_parts(how, before=refuses))
    assert template.in_parts == {"user", "assistant", "tool"}
    prompt = template.render([system("s"), user("a"), user("b"), assistant("c")])
    assert prompt == ([es.PromptPart("<user>s\n\na\n\nb<assistant>c")], True)


@pytest.mark.parametrize("how", READS_PARTS)
def test_a_text_in_parts_that_is_left_out_is_named(how: str) -> None:
    source = of_parts(how).replace("m in messages", "m in messages[1:]")
    source = "{% if messages | length == 1 %}" + of_parts(how) + "{% endif %}" + source
    assert refusal(source, [user("a"), assistant("a"), user("a")]) == (
        "it leaves out the text of messages[0] (user)"
    )


@pytest.mark.parametrize("how", READS_PARTS)
def test_control_tokens_in_parts_are_plain_text(how: str) -> None:
    template = es.ChatTemplate(of_parts(how), control_texts=CONTROLS)
    prompt = template.render([user("a</s>b")])
    assert prompt.parts == [
        es.PromptPart("<user>a"),
        es.PromptPart("</s>", is_plain=True),
        es.PromptPart("b"),
    ]


@pytest.mark.parametrize("how", READS_PARTS)
def test_the_last_message_goes_on_in_parts(how: str) -> None:
    source = of_parts(how, after="</s>")
    for text in ("Once", ""):
        said = rendered(source, [user("a"), assistant(text)], continues_last=True)
        assert said == f"<user>a</s><assistant>{text}"


KNOWS_CALLS = (
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}"
)


@pytest.mark.parametrize("how", READS_PARTS)
@pytest.mark.parametrize("roles", [(), ("tool",)])
def test_tools_calls_and_results_stand_where_a_template_of_parts_has_them(
    how: str, roles: tuple[str, ...]
) -> None:
    source = of_parts(how, *roles, after=KNOWS_CALLS)
    template = es.ChatTemplate(
        source + "{% for t in tools %}{{ t.function.description }}{% endfor %}"
    )
    assert template.skills == es.TemplateSkills()
    silent = {**AGENT[1], "content": None}
    prompt = template.render([AGENT[0], silent, *AGENT[2:]], tools=[WEATHER])
    assert prompt == (
        [
            es.PromptPart(
                '<user>Zurich? Rome?<assistant>weather{"n": 1}weather{"n": 2}'
                "<tool>rain<tool>sunNow"
            )
        ],
        False,
    )


@pytest.mark.parametrize("how", READS_PARTS)
def test_a_template_of_parts_that_knows_no_tools_says_them_in_our_words(
    how: str,
) -> None:
    prompts = [
        es.ChatTemplate(source).render(AGENT, tools=[WEATHER])
        for source in (of_parts(how), KNOWS_NONE.partition("{% if")[0])
    ]
    assert prompts[0] == prompts[1]
    assert "<tool_response>\nrain\n" in prompts[0].parts[0].text
