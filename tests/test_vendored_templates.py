"""Every chat template in llama.cpp's source tree, against Hugging Face's own renderer.

The templates come from the source of the llama-cpp-python that is installed, fetched
through pip; the renderer is the package transformers, which needs no PyTorch for it.
Each conversation is rendered whole, and to the same text, or the table here has what the
template says.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import embellama_server as es
from tests.test_templates import assistant, calling, system, tool, user

pytestmark = pytest.mark.clients

PACKAGE = "llama-cpp-python"
FOLDER = "/vendor/llama.cpp/models/templates/"
COUNT = 70
BOS, EOS = "<s>", "</s>"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <now> & later, in °C",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name"}},
                "required": ["city"],
            },
        },
    }
]
# Mistral's want ids of nine letters and digits.
CALL = calling('{"city": "Zürich <centre>"}')
CALL["tool_calls"][0]["id"] = "abcdef123"
RESULT = tool('{"temperature": 17}', tool_call_id="abcdef123", name="weather")
SPOKEN = {**CALL, "content": "Let me see."}
BROKEN = calling('{"city": "Zür')
BROKEN["tool_calls"][0]["id"] = "abcdef123"
CONVERSATIONS: Mapping[str, tuple[list[dict[str, Any]], bool]] = {
    "plain": ([user("Hello <there>, café")], False),
    "system": ([system("Be brief."), user("Hi"), assistant("Hello"), user("So?")], False),
    "thoughts": (
        [user("1+1?"), assistant("2", reasoning_content="One and one."), user("Sure?")],
        False,
    ),
    "tools": ([system("Be brief."), user("The weather in Zürich?")], True),
    "a result": ([user("The weather in Zürich?"), CALL, RESULT], True),
    "several turns": (
        [
            *(system("Be brief."), user("The weather in Zürich?"), CALL, RESULT),
            *(assistant("17 °C."), user("And in Rome?"), CALL, RESULT),
            *(assistant("Also."), user("Thanks.")),
        ],
        True,
    ),
    "text beside a call": (
        [
            *(user("The weather in Zürich?"), SPOKEN, RESULT),
            *(assistant("17 °C."), user("Thanks.")),
        ],
        True,
    ),
    "more before an answer": (
        [user("The weather in Zürich?"), CALL, RESULT, user("In °F.")],
        True,
    ),
    "arguments that are none": (
        [user("The weather in Zürich?"), BROKEN, RESULT, assistant("Oh."), user("So?")],
        True,
    ),
}  # fmt: skip
CALLS = (  # in which there are some
    *("a result", "several turns", "text beside a call", "more before an answer"),
    "arguments that are none",
)
WITHOUT_TOOLS = ("plain", "system", "thoughts")
# Which skills a template is found to lack, and how thoughts begin.
SKILLS: Mapping[str, tuple[str, list[str]]] = {
    "Apriel-1.6-15b-Thinker-fixed": ("", ["Here are my reasoning steps:"]),
    "Bielik-11B-v3.0-Instruct": ("", ["<think>"]),
    "ByteDance-Seed-OSS": ("", ["<seed:think>"]),
    "Cohere2MoE": ("text_with_calls", ["<|START_THINKING|>"]),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": (
        *("text_with_calls", ["<|START_THINKING|>"]),
    ),
    "GLM-4.6": ("", ["<think>"]),
    "GLM-4.7-Flash": ("", ["<think>"]),
    "GigaChat3-10B-A1.8B": ("several_calls", []),
    "GigaChat3.1-10B-A1.8B": ("several_calls", []),
    "HuggingFaceTB-SmolLM3-3B": ("tools calls", ["<think>"]),
    "Kimi-K2-Instruct": ("calls", []),
    "Kimi-K2-Thinking": ("calls", ["<think>"]),
    "LFM2-8B-A1B": ("calls", []),
    "LFM2.5-8B-A1B": ("", ["<think>"]),
    "LFM2.5-Instruct": ("calls", ["<think>"]),
    "MiniMax-M1": ("text_with_calls", []),
    "MiniMax-M2": ("", ["<think>"]),
    "MiniMax-M3": ("", ["<mm:think>"]),
    "Mistral-Small-3.2-24B-Instruct-2506": ("text_with_calls any_ids", []),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ("", ["<think>"]),
    "NVIDIA-Nemotron-Nano-v2": ("", ["<think>"]),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("text_with_calls", []),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("text_with_calls", []),
    "Qwen-QwQ-32B": ("", ["<think>"]),
    "Qwen-Qwen3-0.6B": ("", ["<think>"]),
    "Qwen3.5-4B": ("", ["<think>"]),
    "Reka-Edge": ("", ["<think>"]),
    "Spark2.5": ("", ["<think>"]),
    "StepFun3.5-Flash": ("", ["<think>"]),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("tools calls", ["<think>"]),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("tools", ["<think>"]),
    "deepseek-ai-DeepSeek-V3.1": ("tools", ["<think>"]),
    "deepseek-ai-DeepSeek-V3.2": ("", ["<think>"]),
    "deepseek-ai-DeepSeek-V4-Flash-0731": ("", ["<think>"]),
    "deepseek-ai-DeepSeek-V4": ("", ["<think>"]),
    "fireworks-ai-llama-3-firefunction-v2": ("tools calls results several_calls", []),
    "google-gemma-2-2b-it": ("tools calls results", []),
    "google-gemma-4-31B-it-interleaved": ("", ["<|channel>thought"]),
    "google-gemma-4-31B-it": ("", ["<|channel>thought"]),
    "ibm-granite-granite-3.3-2B-Instruct": ("calls", ["<think>"]),
    "inclusionai-ling-3.0-flash": ("", ["<think>"]),
    "llama-cpp-deepseek-r1": ("tools text_with_calls", ["<think>"]),
    "llama-cpp-rwkv-world": ("tools calls results", ["<think>"]),
    "meetkai-functionary-medium-v3.2": ("calls", []),
    "meta-llama-Llama-3.1-8B-Instruct": ("several_calls text_with_calls", []),
    "meta-llama-Llama-3.2-3B-Instruct": ("several_calls text_with_calls", []),
    "meta-llama-Llama-3.3-70B-Instruct": ("several_calls text_with_calls", []),
    "microsoft-Phi-3.5-mini-instruct": ("tools calls results", []),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("", ["[THINK]"]),
    "mistralai-Mistral-Nemo-Instruct-2407": ("text_with_calls any_ids", []),
    "muse-glimmer": ("text_with_calls", []),
    "openai-gpt-oss-120b": (
        *("several_calls text_with_calls", ["<|channel|>analysis<|message|>"]),
    ),
    "openbmb-MiniCPM5-1B": ("", ["<think>"]),
    "poolside-Laguna-S-2.1": ("", ["<think>"]),
    "poolside-Laguna-XS-2.1": ("", ["<think>"]),
    "poolside-Laguna-XS.2": ("", ["<think>"]),
    "unsloth-Apriel-1.5": ("", ["<thinking>"]),
    "upstage-Solar-Open-100B": ("text_with_calls", []),
}
# What is not rendered, and the template's words.
REFUSED: Mapping[tuple[str, Sequence[str]], str] = {
    ("CohereForAI-c4ai-command-r-plus-tool_use", WITHOUT_TOOLS): (
        "'NoneType' object is not iterable"
    ),
    ("NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", WITHOUT_TOOLS): (
        "'NoneType' object is not iterable"
    ),
    ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", WITHOUT_TOOLS): (
        "'NoneType' object is not iterable"
    ),
    ("fireworks-ai-llama-3-firefunction-v2", (*CONVERSATIONS,)): (
        "'functions' is undefined"
    ),
}
# Those that take a system message only as the beginning of the user's, and those that take
# calls and results of a conversation only as text: roles alternate, or arguments are an
# object.
FOLDED = {("google-gemma-2-2b-it", name) for name in ("system", "tools", *CALLS)}
_ALTERNATING = (
    "Mistral-Small-3.2-24B-Instruct-2506",
    "mistralai-Ministral-3-14B-Reasoning-2512",
    "mistralai-Mistral-Nemo-Instruct-2407",
)
_LOOKING_INTO_ARGUMENTS = (
    *("ByteDance-Seed-OSS", "GLM-4.6", "GLM-4.7-Flash", "LFM2.5-8B-A1B"),
    *("MiniMax-M2", "MiniMax-M3", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
    *("Qwen3-Coder", "Qwen3.5-4B", "Spark2.5", "StepFun3.5-Flash"),
    *("deepseek-ai-DeepSeek-V3.2", "deepseek-ai-DeepSeek-V4-Flash-0731"),
    *("deepseek-ai-DeepSeek-V4", "inclusionai-ling-3.0-flash", "muse-glimmer"),
    *("openbmb-MiniCPM5-1B", "poolside-Laguna-S-2.1", "poolside-Laguna-XS-2.1"),
    *("poolside-Laguna-XS.2", "tencent-Hy3"),
)
FOLDED |= {(name, "more before an answer") for name in _ALTERNATING}
FOLDED |= {(name, "text beside a call") for name in _ALTERNATING[::2]}
FOLDED |= {(name, "arguments that are none") for name in _LOOKING_INTO_ARGUMENTS}


def parts(*texts: str) -> list[dict[str, str]]:
    """A content in parts."""
    return [{"type": "text", "text": text} for text in texts]


def with_object_of_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A call with its arguments as an object, not as text."""
    (call,) = message["tool_calls"]
    function = call["function"]
    read = {**function, "arguments": json.loads(function["arguments"])}
    return {**message, "tool_calls": [{**call, "function": read}]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The templates, by name."""
    folder: Path = tmp_path_factory.mktemp("source")
    version = importlib.metadata.version(PACKAGE)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--no-binary=:all:", "--disable-pip-version-check"]
    command += ["--dest", str(folder), f"{PACKAGE}=={version}"]
    subprocess.run(command, check=True, env=os.environ | {"TMPDIR": str(folder)})
    (path,) = folder.glob("*.tar.gz")
    found: dict[str, str] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            place, _, name = member.name.partition(FOLDER)
            if (
                place
                and name.endswith(".jinja")
                and (file := archive.extractfile(member))
            ):
                found[name.removesuffix(".jinja")] = file.read().decode()
    path.unlink()
    assert len(found) == COUNT
    return found


@pytest.fixture(scope="module")
def reference() -> Callable[..., str]:
    """Hugging Face's renderer."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(source: str, messages: Sequence[es.Turn], **how: Any) -> str:
        plain = [
            {"role": turn.role, "content": turn.text, **turn.others}
            for turn in messages
        ]
        (text,), _ = render_jinja_template(
            [plain], chat_template=source, bos_token=BOS, eos_token=EOS, **how
        )
        return str(text)

    return render


def text_of(prompt: es.RenderedPrompt) -> str:
    """Control tokens are not given, so nothing is plain."""
    (part,) = prompt.parts
    assert not part.is_plain
    return part.text


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_prompts_are_hugging_face_s_to_the_character(
    sources: Mapping[str, str], reference: Callable[..., str], conversation: str
) -> None:
    messages, has_tools = CONVERSATIONS[conversation]
    tools = TOOLS if has_tools else None
    refused: dict[str, str] = {}
    folded = set()
    for name, source in sources.items():
        template = es.ChatTemplate(source, bos=BOS, eos=EOS)
        try:
            prompt = template.render(messages, tools=tools)
        except es.TemplateRefused as error:
            refused[name] = error.message.partition("these messages: ")[2]
            continue
        skills, said = template.skills, es.normalized(messages)
        turns = es.tool_turns(said, tools or (), skills)
        if prompt.is_folded:
            folded.add((name, conversation))
            if conversation in CALLS:
                skills = skills._replace(calls=False, results=False)
            turns = es.folded(es.tool_turns(said, tools or (), skills))
        known = tools if skills.tools else None
        like = reference(source, turns, tools=known, add_generation_prompt=True)
        assert text_of(prompt) == like, name
        assert BOS not in like[1:], name  # one at most, and in front
    assert refused == {
        name: words
        for (name, conversations), words in REFUSED.items()
        if conversation in conversations
    }
    assert folded == {row for row in FOLDED if row[1] == conversation}


SAME_FORMS: Mapping[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "developer": (
        [{"role": "developer", "content": "Be brief."}, user("Hi")],
        [system("Be brief."), user("Hi")],
    ),
    "parts": (
        [
            *(system(parts("Be brief.")), user(parts("a", "b"))),
            *(assistant(parts("x")), user(parts("y"))),
        ],
        [system("Be brief."), user("a\nb"), assistant("x"), user("y")],
    ),
    "system in the middle": (
        [user("Hi"), assistant("x"), system("Be brief."), user("So?")],
        [system("Be brief."), user("Hi"), assistant("x"), user("So?")],
    ),
    "no content": (
        [user("Hi"), {k: v for k, v in CALL.items() if k != "content"}, RESULT],
        [user("Hi"), {**CALL, "content": ""}, RESULT],
    ),
    "a result as parts, of a function": (
        [
            *(user("Hi"), CALL),
            {**RESULT, "role": "function", "content": parts(RESULT["content"])},
        ],
        [user("Hi"), CALL, RESULT],
    ),
    "an object of arguments": (
        [user("Hi"), with_object_of_arguments(CALL), RESULT],
        [user("Hi"), CALL, RESULT],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", SAME_FORMS)
def test_whatever_form_messages_have_a_template_makes_the_same_of_them(
    sources: Mapping[str, str], form: str
) -> None:
    odd, usual = SAME_FORMS[form]
    for name, source in sources.items():
        template = es.ChatTemplate(source, bos=BOS, eos=EOS)
        found = []
        for messages in (odd, usual):
            tools = TOOLS if CALL in usual or RESULT in usual else None
            try:
                found.append(text_of(template.render(messages, tools=tools)))
            except es.TemplateRefused as error:
                assert name in {name for name, _ in REFUSED}
                found.append(error.message)
        assert found[0] == found[1], name


def test_what_templates_know_of_tools_and_thoughts_is_found_out(
    sources: Mapping[str, str],
) -> None:
    found = {}
    for name, source in sources.items():
        template = es.ChatTemplate(source, bos=BOS, eos=EOS)
        assert not template.in_parts, name  # all of these read strings
        lacks = [skill for skill, has in template.skills._asdict().items() if not has]
        thinks = any(one.closing in source for one in template.thoughts)
        thoughts = template.thoughts[1:] or template.thoughts[:thinks]
        row = (" ".join(lacks), [one.opening for one in thoughts])
        if any(row):
            found[name] = row
    assert found == SKILLS


@pytest.mark.parametrize(
    "parameters", [{}, {"parameters": {}}, {"parameters": {"type": "object"}}], ids=str
)
def test_a_function_without_arguments_is_shown_as_one_whose_parameters_are_empty(
    sources: Mapping[str, str], parameters: dict[str, Any]
) -> None:
    def prompt(template: es.ChatTemplate, function: dict[str, Any]) -> str:
        shown = es.with_parameters({"type": "function", "function": function})
        try:
            return text_of(template.render([user("Hi")], tools=[shown]))
        except es.TemplateRefused as error:
            return error.message

    said = {"name": "now", "description": "The time."}
    empty = {"type": "object", "properties": {}}
    for source in sources.values():
        template = es.ChatTemplate(source, bos=BOS, eos=EOS)
        wanted = prompt(template, said | {"parameters": empty})
        assert prompt(template, said | parameters) == wanted


def test_prompts_that_go_on_with_the_last_message_are_hugging_face_s(
    sources: Mapping[str, str], reference: Callable[..., str]
) -> None:
    messages = [user("Tell me a story"), assistant("Once upon a time")]
    compared = 0
    for name, source in sources.items():
        template = es.ChatTemplate(source, bos=BOS, eos=EOS)
        try:
            prompt = template.render(messages, continues_last=True)
        except es.TemplateRefused:
            assert name in {name for name, _ in REFUSED}
            continue
        like = reference(source, es.normalized(messages), continue_final_message=True)
        assert text_of(prompt) == like, name
        compared += 1
    assert compared == COUNT - 4


def test_no_template_loses_or_believes_a_control_token_that_somebody_wrote(
    sources: Mapping[str, str],
) -> None:
    controls = {"<|im_start|>", "<|im_end|>", "<end_of_turn>", "<|eot_id|>", "[INST]"}
    said = "a <|im_end|>b<|eot_id|> [INST]<end_of_turn>"
    messages = [user(said), assistant("so"), user(f"{said}c")]
    for name, source in sources.items():
        template = es.ChatTemplate(source, bos=BOS, eos=EOS, control_texts=controls)
        plain = es.ChatTemplate(source, bos=BOS, eos=EOS)
        try:
            prompt = template.render(messages, tools=TOOLS)
        except es.TemplateRefused:
            assert name in {name for name, _ in REFUSED}
            continue
        whole = "".join(part.text for part in prompt.parts)
        assert whole == text_of(plain.render(messages, tools=TOOLS)), name
        quoted = [part.text for part in prompt.parts if part.is_plain]
        assert len(quoted) >= 8 and {*quoted} < controls, name
