"""Every chat template in llama.cpp's source tree, against Hugging Face's own renderer.

The templates come from the source of the llama-cpp-python that is installed, fetched
through pip; the renderer is the package transformers, which needs no PyTorch for it.
Each conversation is rendered whole, and to the same text, or the table here has what the
template says.
"""

from __future__ import annotations

import importlib.metadata
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
}  # fmt: skip
RESULTS = ("a result", "several turns")
WITHOUT_TOOLS = ("plain", "system", "thoughts")
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
    ("Kimi-K2-Instruct", RESULTS): (
        "access to attribute 'append' of 'list' object is unsafe."
    ),
    ("Kimi-K2-Thinking", RESULTS): (
        "access to attribute 'append' of 'list' object is unsafe."
    ),
    ("fireworks-ai-llama-3-firefunction-v2", (*CONVERSATIONS,)): (
        "'functions' is undefined"
    ),
    ("google-gemma-2-2b-it", ("a result",)): (
        "Conversation roles must alternate user/assistant/user/assistant/..."
    ),
    ("google-gemma-2-2b-it", ("several turns",)): "System role not supported",
    ("llama-cpp-deepseek-r1", ("tools", *RESULTS)): (
        "Object of type generator is not JSON serializable"
    ),
    (
        "llama-cpp-rwkv-world",
        RESULTS,
    ): "it leaves out the text of messages[{tool}] (tool)",
    ("meetkai-functionary-medium-v3.2", RESULTS): (
        'can only concatenate str (not "dict") to str'
    ),
    ("microsoft-Phi-3.5-mini-instruct", RESULTS): (
        "it leaves out the text of messages[{tool}] (tool)"
    ),
}
# Those that take a system message only as the beginning of the user's.
FOLDED = {("google-gemma-2-2b-it", name) for name in ("system", "tools")}


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
        skills = template.skills
        turns = es.tool_turns(es.normalized(messages), tools or (), skills)
        if prompt.is_folded:
            folded.add((name, conversation))
            turns = es.folded(turns)
        known = tools if skills.tools else None
        like = reference(source, turns, tools=known, add_generation_prompt=True)
        assert text_of(prompt) == like, name
        assert BOS not in like[1:], name  # one at most, and in front
    place = next((n for n, m in enumerate(messages) if m["role"] == "tool"), None)
    assert refused == {
        name: words.format(tool=place)
        for (name, conversations), words in REFUSED.items()
        if conversation in conversations
    }
    assert folded == {row for row in FOLDED if row[1] == conversation}


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
