"""openai's own client on /v1/responses, with the real program and a tiny model.

As test_outside_chat.py. Codex was tried by hand: see README.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from tests import chat_models, kit
from tests.test_outside_clients import SCRIPT
from tests.test_responses import read_events

pytestmark = [pytest.mark.clients, pytest.mark.slow]

HELLO = "hello my friend"


class Answer(pydantic.BaseModel):
    """What a reply has to be."""

    is_good: bool
    count: int = pydantic.Field(ge=0, le=9)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """The SDK, and a server with a tiny model."""
    model = f"tiny={chat_models.tiny_qwen(tmp_path_factory.mktemp('models'))}"
    with (
        kit.started("--model-path", model, module=(SCRIPT,)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any") as client,
    ):
        yield client


ASKS: Any = {"model": "tiny", "input": HELLO, "temperature": 0}


def test_openai_creates_streams_and_is_refused(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASKS, max_output_tokens=12)
    assert (whole.status, whole.object) == ("incomplete", "response")
    assert whole.usage is not None and whole.usage.output_tokens == 12
    stream = client.responses.create(**ASKS, max_output_tokens=12, stream=True)
    events = [event.model_dump(exclude_unset=True) for event in stream]
    text = read_events(events)["output"][0]["content"][0]["text"]
    assert text == whole.output_text
    with pytest.raises(openai.BadRequestError, match="nothing is kept"):
        client.responses.create(**ASKS, previous_response_id="resp_1")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")


def test_openai_parses_what_a_schema_asks_for(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(**ASKS, text_format=Answer)
    assert isinstance(parsed.output_parsed, Answer)
    with client.responses.stream(**ASKS, text_format=Answer) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    assert final.output_parsed == parsed.output_parsed
