"""CHAT under attack: odd values in every field, and a box with too little memory."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

import embellama_server as es
from tests import chat_models, kit
from tests.test_chat import ASK, CHAT, COMPLETIONS, chatting

FORMS: dict[str, type] = {CHAT: es.ChatForm, COMPLETIONS: es.CompletionForm}
ODD = [
    *(
        "null",
        "true",
        "0",
        "-1",
        "1",
        "1.5",
        "-0.0",
        "1e308",
        "1e999",
        "NaN",
        "-Infinity",
    ),
    *(str(2**31), str(2**53), str(2**64), "-" + "9" * 40),
    *('""', '"a"', r'"\ud800"', r'"\u0000"', "[]", "{}", "[[]]", "[null]", "[1]"),
    *(
        '["a"]',
        '{"a": 1}',
        '{"1": 100}',
        '{"type": ["text"]}',
        '[{"type": "image_url"}]',
    ),
    *('[{"role": "alien", "content": "a"}]', '[{"role": "user", "content": [{}]}]'),
    json.dumps(["stop"] * 3000),
    json.dumps({str(token): 1 for token in range(5000)}),
]


@pytest.mark.parametrize("path", ASK)
async def test_any_value_in_any_field_is_answered_or_refused_in_a_sentence(
    path: str,
) -> None:
    names = [row.name for row in dataclasses.fields(FORMS[path])]
    async with chatting() as (running, _):
        for name, value in itertools.product(names, ODD):
            given: dict[str, Any] = {"max_tokens": 2, **ASK[path]}
            given.pop(name, None)
            raw = f'{json.dumps(given)[:-1]}, "{name}": {value}}}'.encode()
            reply = await running.ask("POST", path, raw)
            assert reply.status == 200 or 400 <= reply.status < 500, (raw, reply.body)
            if reply.status != 200:
                assert reply.error["message"] and len(reply.body) < 700, raw


@pytest.mark.heavy
def test_too_little_memory_for_a_context_ends_the_start_with_a_sentence(
    tmp_path: Path,
) -> None:
    path = chat_models.tiny_llama(tmp_path)
    flags = ("--model-path", str(path), "--context-size", "1048576")
    # The process has 0.8 GB of addresses by then, and such a context wants 0.5 more.
    limit = ("prlimit", "--as=1000000000")
    module = ("embellama_server.py",)
    with kit.started(*flags, module=module, before=limit, wait_ready=False) as server:
        said = server.wait_for_log("embellama_server: ")
        assert server.process.wait(kit.DEADLINE_S) == 1
    assert "1048576 tokens (--context-size" in said
