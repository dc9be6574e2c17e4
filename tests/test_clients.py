"""The real openai client against the program with the real model."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator

import numpy as np
import openai
import pytest

from tests import kit

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def server() -> Iterator[kit.Server]:
    """The program, with the default model."""
    script = str(kit.ROOT / "embellama_server.py")
    with kit.started("--model-alias", "short", module=(script,)) as running:
        yield running


@pytest.fixture
def client(server: kit.Server) -> Iterator[openai.OpenAI]:
    """A client that does not retry, so that every answer is seen."""
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="any", max_retries=0
    ) as made:
        yield made


TEXTS = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Stocks fell."]


def test_the_default_form_is_base64_and_arrives_as_floats(
    client: openai.OpenAI,
) -> None:
    reply = client.embeddings.create(model="all-MiniLM-L6-v2", input=TEXTS)
    vectors = np.array([item.embedding for item in reply.data])
    assert vectors.shape == (3, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alike, unlike = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert alike > 0.5 > unlike
    assert reply.model == "all-MiniLM-L6-v2"
    assert reply.usage.prompt_tokens == reply.usage.total_tokens == 24


def test_floats_and_base64_are_the_same_numbers(client: openai.OpenAI) -> None:
    plain = client.embeddings.create(
        model="short", input=TEXTS[0], encoding_format="float"
    )
    compressed = client.embeddings.create(
        model="short", input=TEXTS[0], encoding_format="base64"
    )
    raw = base64.b64decode(str(compressed.data[0].embedding))
    floats = np.array(plain.data[0].embedding, np.float32)
    assert np.array_equal(np.frombuffer(raw, "<f4"), floats)


def test_dimensions_are_cut_and_normalised(client: openai.OpenAI) -> None:
    reply = client.embeddings.create(model="short", input=TEXTS[0], dimensions=100)
    vector = reply.data[0].embedding
    assert len(vector) == 100
    assert math.isclose(math.hypot(*vector), 1, abs_tol=1e-5)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["all-MiniLM-L6-v2", "short"]
    assert client.models.retrieve("short").object == "model"


def test_errors_arrive_as_the_client_s_own_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.embeddings.create(model="gpt-9", input="a")
    assert unknown.value.code == "model_not_found"
    assert unknown.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        client.embeddings.create(model="short", input=[""])
    assert bad.value.param == "input[0]"
    with pytest.raises(openai.BadRequestError) as long:
        client.embeddings.create(model="short", input="word " * 600)
    assert long.value.code == "context_length_exceeded"
    assert "602" in str(long.value)
    assert "512" in str(long.value)


def test_a_large_batch_of_mixed_lengths_equals_single_requests(
    client: openai.OpenAI,
) -> None:
    texts = [f"number {n} " + "and more " * (n % 90) for n in range(200)]
    batch = client.embeddings.create(model="short", input=texts)
    for index in (0, 1, 57, 89, 90, 199):
        alone = client.embeddings.create(model="short", input=texts[index])
        one, many = alone.data[0].embedding, batch.data[index].embedding
        assert float(np.dot(one, many)) > 0.9999
