"""Chat with a real model: what random weights cannot show.

That its greedy texts are llama-server's own is compared where that program is, by
``python -m tests.bench_chat --same-text``.
"""

from __future__ import annotations

import ctypes
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests import chat_models, kit
from tests import gemma as gemma_model
from tests.chat_load import Stream
from tests.test_tiny_chat_models import piece, vocabulary
from tests.test_tiny_models import llama, opened
from tests.words import WORDS

pytestmark = pytest.mark.chat


def test_the_model_is_the_base_model_and_has_no_template(gemma: Path) -> None:
    assert gemma == gemma_model.fetched()
    assert not llama().llama_model_chat_template(opened(gemma), None)
    assert llama().llama_model_n_swa(opened(gemma)) == 512


def test_llama_cpp_takes_a_tag_of_html_for_an_end(gemma: Path) -> None:
    """Why an end is not what llama.cpp says: half a page would end at </s>."""
    vocab = vocabulary(gemma)
    count = llama().llama_vocab_n_tokens(vocab)
    ends = [n for n in range(count) if llama().llama_vocab_is_eog(vocab, n)]
    assert {piece(gemma, n) for n in ends} >= {b"<eos>", b"<end_of_turn>", b"</s>"}


def test_some_words_are_longer_than_32_bytes(gemma: Path) -> None:
    vocab = vocabulary(gemma)
    room = ctypes.create_string_buffer(32)
    count = llama().llama_vocab_n_tokens(vocab)
    lengths = [
        llama().llama_token_to_piece(vocab, n, room, 32, 0, True) for n in range(count)
    ]
    assert sum(length < 0 for length in lengths) > 300


# --- the server ---

# Three times 450 words: more than the window holds, and the model goes on with the third.
PASSAGE = random.Random(0).choices(WORDS, k=450)
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 7, "top_p": 0.95}


@pytest.fixture(scope="module")
def server(gemma: Path, tmp_path_factory: Any) -> Iterator[str]:
    """The URL of one for up to four texts at a time."""
    template = tmp_path_factory.mktemp("template") / "gemma.jinja"
    template.write_text(chat_models.GEMMA)
    flags = [
        "--model-path",
        str(gemma),
        "--any-model",
        "--chat-template",
        str(template),
    ]
    flags += ["--parallel", "4", "--context-size", "8192"]
    with kit.started(*flags, module=("embellama_server.py",)) as running:
        yield running.url


async def told(url: str, prompt: str, tokens: int = 24, **options: object) -> Stream:
    """What follows a prompt: by default the likeliest, and not what was cached."""
    options = {"temperature": 0, "cache_prompt": False} | options
    return await Stream(url, prompt, tokens, **options).ended()


def posted(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The reply to a body, whole."""
    kind = {"Content-Type": "application/json"}
    with urlopen(Request(url, json.dumps(body).encode(), kind)) as reply:
        found: dict[str, Any] = json.load(reply)
        return found


async def test_it_knows_something(server: str) -> None:
    asked = await told(server, "Italy: Rome. Spain: Madrid. Germany: Berlin. France:")
    assert asked.text.startswith(" Paris")
    counted = await told(server, "one, two, three, four, five, six, seven,")
    assert counted.text.startswith(" eight, nine, ten")


async def test_a_text_is_the_same_whole_and_in_parts(server: str) -> None:
    for options in ({"temperature": 0}, SAMPLED):
        asks = {"prompt": "The sea is", "max_tokens": 40, "ignore_eos": True}
        whole = posted(f"{server}/v1/completions", asks | options)
        (choice,) = whole["choices"]
        stream = await told(server, "The sea is", 40, cache_prompt=True, **options)
        assert stream.text == choice["text"] and len(stream.arrivals) > 10
        assert stream.finish_reason == choice["finish_reason"] == "length"
        assert stream.tokens == whole["usage"]["completion_tokens"] == 40


async def test_no_character_is_cut(server: str) -> None:
    for prompt in (
        "नमस्ते दुनिया, मेरा नाम",
        "今日はとても",
        "🙂🎉🚀 means",
        "Ελλάδα είναι",
    ):
        asked = await told(server, prompt, 48)
        assert asked.text and "\N{REPLACEMENT CHARACTER}" not in asked.text


async def test_a_tag_of_html_is_no_end(server: str) -> None:
    prompt = "<p>Was <s>$30</s>, now $20.</p>\n<p>Was <s>$50</s>, now $40.</p>\n<p>Was <s>$70"
    asked = await told(server, prompt, ignore_eos=False)
    assert asked.text.startswith("</s>") and asked.tokens == 24, asked.text


async def test_what_is_in_memory_changes_no_text_beyond_the_window(server: str) -> None:
    """Of a past request, of its own beginning, and of a stream that runs."""
    prompts = [" ".join(PASSAGE * 2 + PASSAGE[:count]) for count in (300, 350)]
    cold = [(await told(server, prompt)).text for prompt in prompts]
    assert [text.split()[:20] for text in cold] == [PASSAGE[300:320], PASSAGE[350:370]]
    running = Stream(server, prompts[0], 400, temperature=0)
    await running.begun.wait()
    during = [await told(server, prompt, cache_prompt=True) for prompt in prompts]
    await running.leave()
    after = [await told(server, prompt, cache_prompt=True) for prompt in prompts]
    for warm in (during, after):
        assert [stream.text for stream in warm] == cold
        assert all(stream.cached_tokens > 1000 for stream in warm)


async def test_a_seed_gives_one_text_and_another_seed_another(server: str) -> None:
    first, again = [(await told(server, "The moon", **SAMPLED)).text for _ in range(2)]
    other = await told(server, "The moon", **SAMPLED | {"seed": 8})
    assert first == again != other.text


async def test_the_likeliest_token_is_what_greedy_takes(server: str) -> None:
    asks = {"prompt": "The moon is", "max_tokens": 12, "temperature": 0, "logprobs": 3}
    (choice,) = posted(f"{server}/v1/completions", asks)["choices"]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    for token, own, top in zip(
        found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
    ):
        assert token == max(top, key=top.__getitem__) and top[token] == own
        assert sum(map(math.exp, top.values())) <= 1


async def test_a_chat_is_rendered_and_answered(server: str) -> None:
    says = [("system", "Be brief."), ("user", "hi"), ("assistant", "Hello!")]
    says.append(("user", "Say it again."))
    messages = [{"role": role, "content": text} for role, text in says]
    body = {"messages": messages, "max_tokens": 24, "temperature": 0}
    reply = posted(f"{server}/v1/chat/completions", body)
    (choice,) = reply["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]
    assert "_turn>" not in choice["message"]["content"]
    assert 25 < reply["usage"]["prompt_tokens"] < 45
