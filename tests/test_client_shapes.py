"""Requests as well-known applications send them, and what those read of the answers.

A row is one request: its path, the header fields and the JSON as the application's HTTP
library writes them, and how the application reads the reply. All go to one server that
serves an embedder and a reranker, the embedder first.
"""

from __future__ import annotations

import base64
import gzip
import http.client
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests import both, kit

QUERY = "who was there before"
TEXTS = ["no time", "they know the way back", "a new year"]
LONG = "word " * 3000

# --- how they write ---

Fields = tuple[str, ...]
JSON = "Content-Type: application/json"
KEY = "Authorization: Bearer any"
STAINLESS = ("X-Stainless-Package-Version: 3.57.0", "X-Stainless-OS: Linux")
FETCH = ("accept-language: *", "sec-fetch-mode: cors", "accept-encoding: gzip, deflate")
H2C = "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAABgAGAAA"


@dataclass(frozen=True)
class Library:
    """An HTTP library: its fields, and how it writes JSON."""

    fields: Fields
    is_compact: bool = True


REQUESTS = Library(
    (
        *("User-Agent: python-requests/2.32.3", "Accept-Encoding: gzip, deflate"),
        *("Accept: */*", "Connection: keep-alive", JSON),
    ),
    is_compact=False,
)
HTTPX = Library(
    (
        *("Accept: */*", "Accept-Encoding: gzip, deflate", "Connection: keep-alive"),
        *("User-Agent: python-httpx/0.28.1", JSON),
    )
)
AIOHTTP = Library(
    (
        *("Accept: */*", "Accept-Encoding: gzip, deflate, br", JSON),
        "User-Agent: Python/3.11 aiohttp/3.11.11",
    ),
    is_compact=False,
)
OPENAI = Library(
    (
        *("Accept-Encoding: gzip, deflate", "Connection: keep-alive", JSON, KEY),
        *("Accept: application/json", "User-Agent: OpenAI/Python 3.57.0"),
        *("X-Stainless-Lang: python", "X-Stainless-Async: false", *STAINLESS),
        *("x-stainless-retry-count: 0", "x-stainless-read-timeout: 600"),
    )
)
OPENAI_NODE = Library(
    (
        *("connection: keep-alive", "accept: application/json", JSON, KEY, *FETCH),
        *("user-agent: OpenAI/JS 7.59.0", "x-stainless-lang: js", *STAINLESS),
        *("x-stainless-retry-count: 0", "x-stainless-runtime: node"),
    )
)
NODE = Library(
    ("connection: keep-alive", JSON, "accept: */*", *FETCH, "user-agent: node")
)
AI_SDK = Library(
    (
        "connection: keep-alive",
        JSON,
        KEY,
        "accept: */*",
        *FETCH,
        "user-agent: ai-sdk/3.0",
    )
)
AXIOS = Library(
    (
        *("Accept: application/json, text/plain, */*", JSON, "User-Agent: axios/1.7.9"),
        *("Accept-Encoding: gzip, compress, deflate, br", "Connection: keep-alive"),
    )
)
OLLAMA = Library(
    (
        *("Accept-Encoding: gzip, deflate", "Connection: keep-alive", JSON),
        *("Accept: application/json", "User-Agent: ollama-python/0.6.3 (x86_64 linux)"),
    )
)
OLLAMA_JS = Library(
    (
        *("connection: keep-alive", JSON, "accept: application/json", *FETCH),
        "user-agent: ollama-js/0.6.4 (x64 linux) Node.js/v24.19.0",
    )
)
OLLAMA_GO = Library(
    (
        *("User-Agent: ollama/0.12.6 (amd64 linux) Go/go1.24.1", JSON),
        *("Accept: application/x-ndjson", "Accept-Encoding: gzip"),
    )
)
GO = Library(("User-Agent: Go-http-client/1.1", JSON, "Accept-Encoding: gzip"))
COHERE = Library(
    (
        *("Accept: */*", "Accept-Encoding: gzip, deflate", "Connection: keep-alive"),
        *("User-Agent: cohere/7.3.1", "X-Fern-Language: Python", KEY, JSON),
        "X-Fern-SDK-Name: cohere",
    )
)
JAVA = Library(
    (
        *("Connection: Upgrade, HTTP2-Settings", H2C, "Upgrade: h2c", JSON),
        "User-Agent: Java-http-client/17.0.15",
    )
)
USER = (
    *("X-OpenWebUI-User-Name: Ren%C3%A9e", "X-OpenWebUI-User-Id: 6f1c", KEY),
    *("X-OpenWebUI-User-Email: r@example.com", "X-OpenWebUI-User-Role: admin"),
)


def written(body: object, library: Library) -> bytes:
    """JSON as the library writes it."""
    if library.is_compact:
        return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    return json.dumps(body).encode()


# --- how they read ---


def by_index(items: list[dict[str, Any]], name: str) -> list[Any]:
    """One value of each item, in the order of what was asked."""
    return [item[name] for item in sorted(items, key=lambda item: item["index"])]


def openai_vectors(reply: Any) -> object:
    assert reply["usage"]["total_tokens"] > 0
    return by_index(reply["data"], "embedding")


def openai_base64(reply: Any) -> object:
    compressed = by_index(reply["data"], "embedding")
    return [np.frombuffer(base64.b64decode(text), "<f4") for text in compressed]


def tei_vectors(reply: Any) -> object:
    return reply


def ollama_vectors(reply: Any) -> object:
    assert isinstance(reply["prompt_eval_count"], int)
    return reply["embeddings"]


def cohere_vectors(reply: Any) -> object:
    assert reply["meta"]["billed_units"]["input_tokens"] > 0
    return reply["embeddings"]["float"]


def cohere_scores(reply: Any) -> object:
    return by_index(reply["results"], "relevance_score")


def xinference_scores(reply: Any) -> object:
    tokens = reply["meta"]["tokens"]
    assert tokens["input_tokens"] + tokens["output_tokens"] > 0
    return cohere_scores(reply)


def jina_scores(reply: Any) -> object:
    assert reply["usage"]["total_tokens"] > 0
    return cohere_scores(reply)


def dify_scores(reply: Any) -> object:
    for result in reply["results"]:
        assert result["document"]["text"] == TEXTS[result["index"]]
    return cohere_scores(reply)


def tei_scores(reply: Any) -> object:
    return by_index(reply, "score")


def names(reply: Any) -> object:
    return sorted(model["name"] for model in reply["models"])


def message(reply: Any) -> object:
    return (
        reply["error"] if isinstance(reply["error"], str) else reply["error"]["message"]
    )


VECTORS, SCORES = "the vectors of TEXTS", "the scores of TEXTS"


# --- what they send ---


@dataclass(frozen=True)
class Shape:
    """One request and what is made of the reply."""

    who: str
    ask: str  # method and path
    library: Library
    body: object = None
    reads: Callable[[Any], object] = tei_vectors
    expected: object = None  # VECTORS, SCORES, a value; None: that it can be read
    status: int = 200
    fields: Fields = ()


def ranking(model: str | None = "ranker", **more: object) -> dict[str, object]:
    named = {} if model is None else {"model": model}
    return named | {"query": QUERY, "documents": TEXTS} | more


def embedding(model: str | None = "embedder", **more: object) -> dict[str, object]:
    named = {} if model is None else {"model": model}
    return {"input": TEXTS} | named | more


TEI_TEXTS = {"query": QUERY, "texts": TEXTS}
COHERE_TEXTS = {"texts": TEXTS, "model": "embedder", "input_type": "search_document"}
FLOAT = {"encoding_format": "float"}

# fmt: off
SHAPES = [
    Shape("RAGFlow, Xinference", "POST /v1/rerank", REQUESTS, {"model": "ranker", "query": QUERY, "return_documents": "true", "return_len": "true", "documents": TEXTS}, xinference_scores, SCORES),
    Shape("RAGFlow, OpenAI-API-Compatible", "POST /rerank", REQUESTS, ranking(top_n=3), cohere_scores, SCORES, fields=(KEY,)),
    Shape("RAGFlow, Jina", "POST /v1/rerank", REQUESTS, ranking(top_n=3), jina_scores, SCORES, fields=(KEY,)),
    Shape("RAGFlow, TEI", "POST /rerank", REQUESTS, TEI_TEXTS | {"raw_scores": False, "truncate": True}, tei_scores, SCORES),
    Shape("RAGFlow, OpenAI", "POST /v1/embeddings", OPENAI, embedding(**FLOAT, drop_params=True), openai_vectors, VECTORS),
    Shape("RAGFlow, Ollama", "POST /api/embeddings", OLLAMA, {"model": "embedder", "prompt": TEXTS[0], "options": {"use_mmap": True}, "keep_alive": -1}, lambda reply: np.linalg.norm(reply["embedding"]) > 1.1, True),
    Shape("RAGFlow, one chunk too long", "POST /v1/rerank", REQUESTS, {"model": "ranker", "query": QUERY, "documents": [TEXTS[0], LONG]}, lambda reply: len(reply["results"]), 2),
    Shape("Dify, validating", "POST /v1/embeddings", REQUESTS, {"input": "ping", "model": "embedder"}, lambda reply: len(reply["data"]), 1, fields=(KEY,)),
    Shape("Dify, OpenAI-API-compatible", "POST /v1/embeddings", REQUESTS, embedding(**FLOAT, user="4c1f"), openai_vectors, VECTORS, fields=(KEY,)),
    Shape("Dify, rerank", "POST /v1/rerank", REQUESTS, ranking(top_n=3, return_documents=True), dify_scores, SCORES, fields=(KEY,)),
    Shape("Dify, TEI, what it is", "GET /info", REQUESTS, None, lambda reply: (list(reply["model_type"]), reply["max_client_batch_size"] >= 1), (["embedding"], True)),
    Shape("Dify, TEI, tokens", "POST /tokenize", REQUESTS, {"inputs": TEXTS}, len, 3),
    Shape("Dify, TEI, vectors", "POST /v1/embeddings", REQUESTS, {"input": TEXTS}, openai_vectors, VECTORS),
    Shape("Dify, TEI, scores", "POST /rerank", REQUESTS, TEI_TEXTS, tei_scores, SCORES),
    Shape("Milvus, vLLM", "POST /v2/rerank", HTTPX, ranking(None), cohere_scores, SCORES),
    Shape("Milvus, TEI", "POST /rerank", HTTPX, TEI_TEXTS | {"truncate": True, "truncation_direction": "Right"}, tei_scores, SCORES),
    Shape("Open WebUI", "POST /v1/embeddings", AIOHTTP, embedding(), openai_vectors, VECTORS, fields=USER),
    Shape("Open WebUI, slash at the end of its URL", "POST //embeddings", AIOHTTP, embedding(), openai_vectors, VECTORS, fields=USER),
    Shape("Open WebUI, Ollama", "POST /api/embed", AIOHTTP, embedding(), ollama_vectors, VECTORS, fields=USER),
    Shape("Open WebUI, external reranker", "POST /v1/rerank", REQUESTS, ranking(top_n=3), cohere_scores, SCORES, fields=USER),
    Shape("AnythingLLM, generic OpenAI", "POST /v1/embeddings", OPENAI_NODE, {"model": "embedder", "input": TEXTS, "encoding_format": "base64"}, openai_base64, VECTORS),
    Shape("openai for Node, 900 ms", "POST /v1/embeddings", OPENAI_NODE, embedding(**FLOAT), openai_vectors, VECTORS, fields=("x-stainless-timeout: 0",)),
    Shape("AnythingLLM, is Ollama there", "GET /", NODE, None, lambda reply: None),
    Shape("AnythingLLM, Ollama", "POST /api/embed", OLLAMA_JS, {"model": "embedder", "input": TEXTS, "options": {"num_ctx": 8192}}, ollama_vectors, VECTORS),
    Shape("AnythingLLM, LM Studio's list", "GET /v1/models", OPENAI_NODE, None, lambda reply: "embedder" in [model["id"] for model in reply["data"]], True),
    Shape("mem0, OpenAI", "POST /v1/embeddings", OPENAI, {"input": TEXTS, "model": "embedder", "dimensions": both.N_EMBD, **FLOAT}, openai_vectors, VECTORS),
    Shape("mem0, Ollama, is it there", "GET /api/tags", OLLAMA, None, names, ["embedder:latest", "ranker:latest"]),
    Shape("mem0, Ollama, fetch it", "POST /api/pull", OLLAMA, {"model": "embedder", "stream": False}, lambda reply: reply["status"], "success"),
    Shape("mem0, TEI through OpenAI", "POST /v1/embeddings", OPENAI, {"input": TEXTS[0], "model": "tei", "encoding_format": "base64"}, message, "--any-model", status=404),
    Shape("LangChain, OpenAI", "POST /v1/embeddings", OPENAI, {"input": TEXTS, "model": "embedder", "encoding_format": "base64"}, openai_base64, VECTORS),
    Shape("LangChain, OpenAI by default", "POST /v1/embeddings", OPENAI, {"input": [[101, 7592, 102]], "model": "embedder", "encoding_format": "base64"}, message, "check_embedding_ctx_length=False", status=400),
    Shape("LangChain, the organisation's name", "POST /v1/embeddings", OPENAI, embedding("sentence-transformers/Embedder", **FLOAT), openai_vectors, VECTORS),
    Shape("LangChain, HuggingFaceEndpoint", "POST /", HTTPX, {"inputs": TEXTS}, tei_vectors, VECTORS),
    Shape("LangChain, Cohere", "POST /v1/embed", COHERE, COHERE_TEXTS | {"embedding_types": ["float"]}, cohere_vectors, VECTORS),
    Shape("LangChain, CohereRerank", "POST /v1/rerank", COHERE, {"query": QUERY, "documents": [{"text": text} for text in TEXTS], "model": "ranker", "top_n": 3, "rank_fields": ["text"]}, cohere_scores, SCORES),
    Shape("LangChain, NVIDIA", "POST /v1/embeddings", REQUESTS, {"input": TEXTS, "model": "embedder", "encoding_format": "float", "input_type": "passage", "truncate": "NONE", "user": "NAME"}, openai_vectors, VECTORS, fields=(KEY,)),
    Shape("LangChain.js, Ollama", "POST /api/embed", OLLAMA_JS, {"model": "embedder", "input": TEXTS, "truncate": False, "options": {}}, ollama_vectors, VECTORS),
    Shape("LlamaIndex, TEI", "POST /embed", HTTPX, {"inputs": TEXTS, "truncate": True}, tei_vectors, VECTORS),
    Shape("Chroma, OpenAI", "POST /v1/embeddings", OPENAI, {"input": TEXTS, "model": "embedder", "encoding_format": "base64"}, openai_base64, VECTORS),
    Shape("Chroma, HuggingFace server", "POST /embed", HTTPX, {"inputs": TEXTS}, tei_vectors, VECTORS),
    Shape("Chroma, Ollama", "POST /api/embed", OLLAMA, {"model": "embedder", "input": TEXTS}, ollama_vectors, VECTORS),
    Shape("Chroma, Ollama, with a tag", "POST /api/embed", OLLAMA, {"model": "embedder:latest", "input": TEXTS}, ollama_vectors, VECTORS),
    Shape("Flowise, OpenAI", "POST /v1/embeddings", OPENAI_NODE, {"model": "embedder", "input": TEXTS, "encoding_format": "base64"}, openai_base64, VECTORS),
    Shape("Flowise, Ollama with numbers as texts", "POST /api/embed", OLLAMA_JS, {"model": "embedder", "input": TEXTS, "keep_alive": "5m", "truncate": "true", "options": {"num_ctx": "2048", "num_gpu": "1", "use_mmap": True}}, ollama_vectors, VECTORS),
    Shape("Flowise, LocalAI", "POST /v1/embeddings", AXIOS, embedding(**FLOAT), openai_vectors, VECTORS, fields=("Authorization: Bearer sk-",)),
    Shape("Haystack, TEI ranker", "POST /rerank", HTTPX, TEI_TEXTS | {"raw_scores": False, "truncate": True, "truncation_direction": "Right"}, tei_scores, SCORES),
    Shape("Haystack, OpenAI", "POST /v1/embeddings", OPENAI, embedding(encoding_format="float"), openai_vectors, VECTORS, fields=("x-stainless-timeout: 30.0",)),
    Shape("Haystack, Hugging Face", "POST /", HTTPX, {"inputs": TEXTS, "truncate": True, "normalize": True}, tei_vectors, VECTORS),
    Shape("Continue, TEI, what it is", "GET /info", NODE, None, lambda reply: (reply["model_id"], reply["max_client_batch_size"] >= 1), ("embedder", True)),
    Shape("Continue, TEI", "POST /embed", NODE, {"inputs": TEXTS}, tei_vectors, VECTORS),
    Shape("Continue, TEI, scores", "POST /rerank", NODE, {"query": QUERY, "return_text": False, "raw_scores": False, "texts": TEXTS, "truncation_direction": "Right", "truncate": True}, tei_scores, SCORES),
    Shape("Continue, OpenAI", "POST /v1/embeddings", NODE, embedding(), openai_vectors, VECTORS, fields=(KEY, "api-key: any")),
    Shape("Continue, Ollama", "POST /api/embed", NODE, embedding(), ollama_vectors, VECTORS, fields=(KEY,)),
    Shape("Continue, Cohere", "POST /v1/embed", NODE, COHERE_TEXTS | {"embedding_types": ["float"], "truncate": "END"}, cohere_vectors, VECTORS, fields=(KEY,)),
    Shape("Cohere's own client", "POST /v2/embed", COHERE, COHERE_TEXTS | {"input_type": "classification", "embedding_types": ["float"]}, cohere_vectors, VECTORS),
    Shape("Vercel's AI SDK", "POST /v1/embeddings", AI_SDK, embedding(**FLOAT), openai_vectors, VECTORS),
    Shape("Spring AI", "POST /v1/embeddings", JAVA, embedding(), openai_vectors, VECTORS, fields=(KEY,)),
    Shape("llama-server's clients", "POST /v1/reranking", REQUESTS, ranking(), cohere_scores, SCORES),
    Shape("vLLM's clients", "POST /v1/score", REQUESTS, {"model": "ranker", "text_1": QUERY, "text_2": TEXTS}, lambda reply: by_index(reply["data"], "score"), SCORES),
    Shape("n8n, the list of models", "GET /v1/models", AXIOS, None, lambda reply: reply["object"], "list", fields=(KEY,)),
    Shape("Ollama's program, is it there", "HEAD /", OLLAMA_GO),
    Shape("Ollama's program, its version", "GET /api/version", OLLAMA_GO, None, lambda reply: isinstance(reply["version"], str), True),
    Shape("Ollama's program, a chat", "POST /api/chat", OLLAMA_GO, {"model": "llama3", "messages": [], "tools": []}, lambda reply: isinstance(reply["error"], str), True, status=404),
    Shape("pgai, a model that is not there", "POST /api/embed", OLLAMA, {"model": "llama3", "input": TEXTS}, message, "model 'llama3' not found", status=404),
    Shape("a Go program", "POST /v1/embeddings", GO, embedding(), openai_vectors, VECTORS),
]
# fmt: on


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[both.Client]:
    """Of a server as it comes, with two models."""
    with both.asking(tmp_path_factory.mktemp("models")) as asked:
        yield asked


@pytest.fixture(scope="module")
def expected(client: both.Client) -> Mapping[str, list[Any]]:
    """What TEXTS are, computed here or asked for plainly."""
    ids = [[1, *map(kit.fake_id, text.split()), 2] for text in TEXTS]
    results = client.post("/v1/rerank", ranking()).json["results"]
    return {
        VECTORS: [kit.fake_vector(row, both.N_EMBD) for row in ids],
        SCORES: by_index(results, "relevance_score"),
    }


def answered(client: both.Client, shape: Shape) -> tuple[int, Any]:
    """The status of the reply, and its JSON."""
    body = b"" if shape.body is None else written(shape.body, shape.library)
    lines = [f"{shape.ask} HTTP/1.1", f"Host: {client.host}:{client.port}"]
    lines += [*shape.library.fields, *shape.fields, f"Content-Length: {len(body)}"]
    with kit.connected(f"http://{client.host}:{client.port}") as socket:
        socket.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        reply = http.client.HTTPResponse(socket, method=shape.ask.split()[0])
        reply.begin()
        with reply:
            raw = reply.read()
        if reply.headers["content-encoding"] == "gzip":
            raw = gzip.decompress(raw)
        return reply.status, json.loads(raw) if raw else None


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.who)
def test_an_application_reads_what_it_asked_for(
    client: both.Client, expected: Mapping[str, list[Any]], shape: Shape
) -> None:
    status, reply = answered(client, shape)
    assert status == shape.status, reply
    found = shape.reads(reply)
    if shape.expected in (VECTORS, SCORES):
        wanted = expected[str(shape.expected)]
        assert np.allclose(np.array(found), np.array(wanted), atol=1e-5)
    elif status >= 400 and isinstance(shape.expected, str):
        assert shape.expected in str(found)
    elif shape.expected is not None:
        assert found == shape.expected


IMPORT = [f"line {n}" for n in range(5461)]


@pytest.mark.parametrize(
    ("path", "body", "reads"),
    [
        ("/v1/embeddings", {"input": IMPORT, "model": "embedder"}, openai_vectors),
        ("/api/embed", {"input": IMPORT, "model": "embedder"}, ollama_vectors),
        ("/embed", {"inputs": IMPORT}, tei_vectors),
    ],
)
def test_as_many_documents_as_chroma_takes_are_one_request(
    client: both.Client, path: str, body: object, reads: Callable[[Any], Any]
) -> None:
    reply = client.post(path, body)
    assert reply.status == 200, reply.body[:300]
    assert len(reads(reply.json)) == len(IMPORT)
