"""Rooms FORMS to OLLAMA: every field of every form, every reply to the byte.

References: OpenAI's, Cohere's, text-embeddings-inference's (1.9), Ollama's, and the
README of the AI Embedding Inference Server. What the numbers should be is worked out
here, from the fake engine's own vectors, with numpy and the standard library only.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import math
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some

import embellama_server as es
from tests import both, kit

N = both.N_EMBD
HEAD, TAIL = 1, 2  # the fake model's special tokens
MAX_WORDS = 30  # of the 32 tokens it reads
CONFIG = {
    "prompts": {"query": "search query: ", "quoted": 'say "{text}" now', "empty": ""},
    "default_prompt_name": None,
}
PROMPTS = ("--prompt", "query=ask, ", "--prompt", "mine=[{text}]")
MODELS = ("embedder", "ranker")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[both.Client]:
    """Of a server whose first model embeds, with prompts of two origins."""
    folder = tmp_path_factory.mktemp("models")
    flags = ("--accept-token-ids", *PROMPTS)
    with both.asking(folder, *flags, config=CONFIG) as asked:
        yield asked


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[both.Client]:
    """Of one whose first model ranks."""
    with both.asking(tmp_path_factory.mktemp("models"), ranker_first=True) as asked:
        yield asked


def ids_of(text: str) -> list[int]:
    """The tokens of a text, without special ones."""
    return [kit.fake_id(word) for word in text.split()]


def vector_of(tokens: Sequence[int]) -> Any:
    """What the fake model makes of a text's tokens, of length 1."""
    return kit.fake_vector([HEAD, *tokens, TAIL], N)


def vector(text: str) -> Any:
    """Of a text."""
    return vector_of(ids_of(text))


def score(query: str, text: str) -> float:
    """Of a pair."""
    return float(kit.fake_vector([HEAD, *ids_of(query), *ids_of(text)], N)[0])


def sigmoid(x: float) -> float:
    """The textbook's."""
    return 1 / (1 + math.exp(-x))


def close(found: Any, wanted: Any) -> bool:
    """As float32 has it."""
    return np.shape(found) == np.shape(wanted) and bool(
        np.allclose(found, wanted, rtol=0, atol=1e-6)
    )


# One way to ask each route for the vectors of texts.
def openai_vectors(reply: kit.Reply) -> Any:
    assert [item["index"] for item in reply.json["data"]] == [
        *range(len(reply.json["data"]))
    ]
    return [item["embedding"] for item in reply.json["data"]]


EMBEDDING = {
    "/v1/embeddings": ("input", openai_vectors),
    "/embeddings": ("input", openai_vectors),
    "/embed": ("inputs", lambda reply: reply.json),
    "/": ("inputs", lambda reply: reply.json),
    "/invocations": ("inputs", lambda reply: reply.json),
    "/api/v1/embed": ("inputs", openai_vectors),
    "/api/embed": ("input", lambda reply: reply.json["embeddings"]),
}
TEI_EMBEDDING = ("/embed", "/", "/invocations", "/api/v1/embed")


def asked(client: both.Client, path: str, inputs: Any, **more: Any) -> kit.Reply:
    """A request for vectors."""
    name, _ = EMBEDDING[path]
    return client.post(path, {name: inputs, **more})


def vectors(client: both.Client, path: str, inputs: Any, **more: Any) -> Any:
    """And the vectors themselves."""
    reply = asked(client, path, inputs, **more)
    assert reply.status == 200, reply.body
    return EMBEDDING[path][1](reply)


# --- every route that embeds ---


@pytest.mark.parametrize("path", EMBEDDING)
def test_one_text_or_several_give_a_vector_each_in_their_order(
    client: both.Client, path: str
) -> None:
    texts = ["a b", "c", "a b"]
    assert close(vectors(client, path, texts), [vector(text) for text in texts])
    assert close(vectors(client, path, "a b"), [vector("a b")])


@pytest.mark.parametrize("path", [path for path in EMBEDDING if path != "/api/embed"])
def test_token_ids_are_one_input_or_several(client: both.Client, path: str) -> None:
    assert close(vectors(client, path, [7, 8]), [vector_of([7, 8])])
    mixed = vectors(client, path, [[7, 8], "a", [9]])
    assert close(mixed, [vector_of([7, 8]), vector("a"), vector_of([9])])


@pytest.mark.parametrize("path", EMBEDDING)
def test_dimensions_keep_the_first_numbers_scaled_to_length_1(
    client: both.Client, path: str
) -> None:
    for count in (1, 5, N - 1):
        short = vector("a b")[:count].astype(np.float64)
        found = vectors(client, path, "a b", dimensions=count)
        assert close(found, [short / math.sqrt(short @ short)])
    for same in (N, None):
        assert close(vectors(client, path, "a b", dimensions=same), [vector("a b")])


@pytest.mark.parametrize("path", EMBEDDING)
@pytest.mark.parametrize("count", [-1, N + 1, 2**31, 2**53, 2**63, 1.5, True, "x", [3]])
def test_other_dimensions_are_refused(
    client: both.Client, path: str, count: object
) -> None:
    reply = asked(client, path, "a", dimensions=count)
    assert reply.status == (422 if path in TEI_EMBEDDING else 400)
    assert b"dimensions" in reply.body


@pytest.mark.parametrize("path", EMBEDDING)
def test_no_dimensions_are_refused_but_for_ollama_to_which_0_means_all(
    client: both.Client, path: str
) -> None:
    reply = asked(client, path, "a", dimensions=0)
    if path == "/api/embed":
        assert close(reply.json["embeddings"], [vector("a")])
    else:
        assert reply.status == (422 if path in TEI_EMBEDDING else 400)


@pytest.mark.parametrize("path", [path for path in EMBEDDING if path != "/api/embed"])
def test_without_normalize_vectors_are_as_the_model_gives_them(
    client: both.Client, path: str
) -> None:
    raw = vector("a b") * kit.RAW_LENGTH
    assert close(vectors(client, path, "a b", normalize=False), [raw])
    assert close(vectors(client, path, "a b", normalize=True), [vector("a b")])
    assert close(vectors(client, path, "a b", normalize=None), [vector("a b")])
    short = vectors(client, path, "a b", normalize=False, dimensions=3)
    assert close(short, [raw[:3]]), "shortened, and still not scaled"


@pytest.mark.parametrize("path", EMBEDDING)
def test_what_is_too_long_is_cut_only_if_that_is_asked_for(
    client: both.Client, path: str
) -> None:
    words = [f"w{n}" for n in range(MAX_WORDS + 5)]
    text = " ".join(words)
    right, left = vector(" ".join(words[:MAX_WORDS])), vector(" ".join(words[5:]))
    assert close(vectors(client, path, text, truncate=True), [right])
    refused = asked(client, path, text, truncate=False)
    assert refused.status == (422 if path in TEI_EMBEDDING else 400)
    if path == "/api/embed":
        assert close(vectors(client, path, text), [right]), "Ollama's default"
        return
    assert asked(client, path, text, truncate=None).status == refused.status
    assert asked(client, path, text).status == refused.status
    said: str | None
    for said in ("left", "Left", "LEFT"):
        cut = vectors(client, path, text, truncate=True, truncation_direction=said)
        assert close(cut, [left])
    for other in ("right", "Right", None):
        cut = vectors(client, path, text, truncate=True, truncation_direction=other)
        assert close(cut, [right])


@pytest.mark.parametrize("path", EMBEDDING)
def test_truncate_may_say_where_as_nvidia_s_and_cohere_s_does(
    client: both.Client, path: str
) -> None:
    words = [f"w{n}" for n in range(MAX_WORDS + 5)]
    text = " ".join(words)
    right, left = vector(" ".join(words[:MAX_WORDS])), vector(" ".join(words[5:]))
    for said in ("END", "end", "true", 1):
        assert close(vectors(client, path, text, truncate=said), [right])
    for said in ("START", "Start"):
        assert close(vectors(client, path, text, truncate=said), [left])
    for said in ("NONE", "false", 0):
        assert asked(client, path, text, truncate=said).status in (400, 422)
        assert close(vectors(client, path, "a b", truncate=said), [vector("a b")])
    if path != "/api/embed":
        cut = vectors(client, path, text, truncate="END", truncation_direction="left")
        assert close(cut, [right]), "the more exact one"


@pytest.mark.parametrize("path", EMBEDDING)
def test_the_longest_text_that_fits_is_not_cut(client: both.Client, path: str) -> None:
    text = " ".join(f"w{n}" for n in range(MAX_WORDS))
    assert close(vectors(client, path, text, truncate=False), [vector(text)])


@pytest.mark.parametrize("path", [path for path in EMBEDDING if path != "/api/embed"])
def test_prompts_go_before_a_text_or_around_it(client: both.Client, path: str) -> None:
    wholes: dict[str | None, str] = {
        "query": "ask, a b",  # the operator's before the file's
        "quoted": 'say "a b" now',
        "mine": "[a b]",
        "empty": "a b",
        None: "a b",
    }
    for name, whole in wholes.items():
        found = vectors(client, path, ["a b", "a b"], prompt_name=name)
        assert close(found, [vector(whole)] * 2), name


@pytest.mark.parametrize("path", [path for path in EMBEDDING if path != "/api/embed"])
def test_an_unknown_prompt_is_answered_with_those_there_are(
    client: both.Client, path: str
) -> None:
    reply = asked(client, path, "a", prompt_name="nope")
    assert reply.status == (422 if path in TEI_EMBEDDING else 400)
    assert b"empty, mine, query, quoted" in reply.body
    without = asked(client, path, "a", prompt_name="query", model="ranker")
    assert without.status in (400, 422, 424)


@pytest.mark.parametrize("path", [path for path in EMBEDDING if path != "/api/embed"])
def test_token_ids_have_no_prompt(client: both.Client, path: str) -> None:
    reply = asked(client, path, [7], prompt_name="query")
    assert reply.status == (422 if path in TEI_EMBEDDING else 400)


@pytest.mark.parametrize("path", EMBEDDING)
@pytest.mark.parametrize("inputs", ["", [], ["a", ""], [""], [[]], ["a", []]], ids=str)
def test_empty_inputs_are_refused_by_name(
    client: both.Client, path: str, inputs: Any
) -> None:
    reply = asked(client, path, inputs)
    if path == "/api/embed" and inputs in ("", []):
        assert reply.json["embeddings"] == []
        return
    assert reply.status == 400 or (path == "/api/embed" and reply.status == 422)
    if path in TEI_EMBEDDING:
        assert reply.json["error_type"] == "Empty"
    assert EMBEDDING[path][0].encode() in reply.body


@pytest.mark.parametrize("path", EMBEDDING)
@pytest.mark.parametrize(
    "inputs", [None, 1, 1.5, True, {}, [None], [True], [{}], ["a", 1.0], [["a"]], [-1]]
)
def test_inputs_of_a_wrong_type_are_refused(
    client: both.Client, path: str, inputs: Any
) -> None:
    if path == "/api/embed" and inputs is None:
        return  # only load the model
    reply = asked(client, path, inputs)
    assert reply.status == (422 if path in TEI_EMBEDDING else 400)


WRONG_FIELDS = {
    "model": (1, True, [], {}),
    "truncate": ("yes", 2, 0.5, []),
    "truncation_direction": ("middle", "", 1, True),
    "normalize": ("no", 2, []),
    "prompt_name": (1, [], True),
    "dimensions": ("1.5", [], {}),
    "encoding_format": ("hex", "", 1, True),
    "output_dtype": ("float64", "", 1, []),
    "user": (1, [], {}),
    "input_type": (True, 1, []),
    "priority": ("urgent", [], {}),
    "allow_partial": ("yes", 2.5),
}


@pytest.mark.parametrize("path", EMBEDDING)
@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_a_field_of_a_wrong_type_is_refused_by_name_and_null_is_as_absent(
    client: both.Client, path: str, name: str
) -> None:
    route = next(r for r in es.ROUTES if (r.method, r.path) == ("POST", path))
    properties = es.schema_of(route.form)["properties"]  # type: ignore[arg-type]
    for value in WRONG_FIELDS[name]:
        reply = asked(client, path, "a", **{name: value})
        if name not in properties:  # unknown fields are ignored
            assert close(EMBEDDING[path][1](reply), [vector("a")])
            continue
        assert reply.status == (422 if path in TEI_EMBEDDING else 400), value
        assert name.encode() in reply.body
    assert close(vectors(client, path, "a", **{name: None}), [vector("a")])


@pytest.mark.parametrize("path", EMBEDDING)
def test_a_model_is_named_in_every_dialect(client: both.Client, path: str) -> None:
    for name in ("embedder", "embedder@1", "embedder:latest"):
        reply = asked(client, path, "a", model=name)
        assert reply.status == 200
        assert reply.headers["x-embellama-model"] == "embedder@1"
    for name in ("nobody", "embedder@2", "tei", "dummy"):
        unknown = asked(client, path, "a", model=name)
        if path in TEI_EMBEDDING:  # which has one model, and no name for it
            assert unknown.headers["x-embellama-model"] == "embedder@1"
            continue
        assert unknown.status == 404
        assert f"model '{name}' not found".encode() in unknown.body
    wrong = asked(client, path, "a", model="ranker")
    assert wrong.status == (424 if path in TEI_EMBEDDING else 400)


# --- OpenAI: types of numbers ---


def decoded(item: Any, dtype: str) -> Any:
    """The numbers of a base64 reply."""
    return np.frombuffer(base64.b64decode(item, validate=True), dtype)


WIRE = {
    "float32": "<f4",
    "float16": "<f2",
    "int8": "i1",
    "uint8": "u1",
    "binary": "i1",
    "ubinary": "u1",
}


def quantised(exact: Any, dtype: str) -> list[float]:
    """What README says of the types, number by number, without numpy."""
    numbers = [float(x) for x in exact]
    if dtype == "int8":
        return [max(-127, min(127, round(127 * x))) for x in numbers]
    if dtype == "uint8":
        return [round(127.5 * x + 127.5) for x in numbers]
    if dtype in ("binary", "ubinary"):
        bits = "".join("1" if x > 0 else "0" for x in numbers)
        bits += "0" * (-len(bits) % 8)
        values = [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]
        return [v - 128 if dtype == "binary" else v for v in values]
    return numbers


@pytest.mark.parametrize("dtype", WIRE)
@pytest.mark.parametrize("count", [None, 1, 5, 8, 17, N])
def test_numbers_base64_and_bytes_say_the_same_and_what_they_should(
    client: both.Client, dtype: str, count: int | None
) -> None:
    texts = ["a b", "c", "d e f"]
    body = {"input": texts, "output_dtype": dtype, "dimensions": count}
    floats = client.post("/v1/embeddings", body | {"encoding_format": "float"})
    base = client.post("/v1/embeddings", body | {"encoding_format": "base64"})
    flat = client.post("/v1/embeddings", body | {"encoding_format": "bytes"})
    assert (floats.status, base.status, flat.status) == (200, 200, 200)
    numbers = openai_vectors(floats)
    coded = [decoded(item, WIRE[dtype]) for item in openai_vectors(base)]
    assert [row.tolist() for row in coded] == [
        np.array(row, WIRE[dtype]).tolist() for row in numbers
    ]
    assert flat.body == b"".join(row.tobytes() for row in coded)
    off = {"float32": 1e-6, "float16": 2.0**-11}.get(dtype, 1e-9)
    for row, text in zip(numbers, texts, strict=True):
        exact = vector(text)[:count].astype(np.float64)
        exact /= math.sqrt(exact @ exact)
        wanted = quantised(exact, dtype)
        assert len(row) == len(wanted)
        assert max(abs(a - b) for a, b in zip(row, wanted, strict=True)) <= off
        if dtype not in ("float32", "float16"):
            assert all(type(number) is int for number in row)


def test_a_bytes_reply_says_in_header_fields_what_json_would(
    client: both.Client,
) -> None:
    body = {"input": ["a b", "c"], "encoding_format": "bytes", "dimensions": 5}
    reply = client.post("/v1/embeddings", body | {"output_dtype": "ubinary"})
    assert reply.headers["content-type"] == "application/octet-stream"
    assert reply.headers["content-length"] == "2" == str(len(reply.body))
    assert reply.headers["x-embedding-count"] == "2"
    assert reply.headers["x-embedding-dimensions"] == "5"
    assert reply.headers["x-embedding-dtype"] == "ubinary"
    assert reply.headers["x-usage-tokens"] == "7"
    assert reply.headers["x-embellama-model"] == "embedder@1"
    assert reply.headers["openai-version"] == "2020-10-01"


def test_bytes_have_no_place_for_errors(client: both.Client) -> None:
    body = {"input": "a", "encoding_format": "bytes", "allow_partial": True}
    assert client.post("/v1/embeddings", body).error["param"] == "allow_partial"
    refused = {"input": "", "encoding_format": "bytes"}
    reply = client.post("/v1/embeddings", refused)
    assert reply.headers["content-type"] == "application/json"
    assert reply.error["code"] == "invalid_value"


@pytest.mark.parametrize("dtype", WIRE)
def test_the_small_types_need_vectors_of_length_1(
    client: both.Client, dtype: str
) -> None:
    body = {"input": "a b", "normalize": False, "output_dtype": dtype}
    reply = client.post("/v1/embeddings", body)
    if dtype in ("float32", "float16"):
        wanted = (vector("a b") * kit.RAW_LENGTH).astype(WIRE[dtype])
        assert close(openai_vectors(reply), [wanted.astype(np.float32)])
    else:
        assert reply.error["param"] == "output_dtype"


@pytest.mark.parametrize("word", ["FLOAT", "Base64", "Bytes"])
def test_words_are_taken_in_any_case(client: both.Client, word: str) -> None:
    body = {"input": "a", "encoding_format": word, "output_dtype": "UBinary"}
    assert client.post("/v1/embeddings", body).status == 200


def test_float_is_what_voyage_calls_float32(client: both.Client) -> None:
    body = {"input": "a", "encoding_format": "bytes", "output_dtype": "float"}
    reply = client.post("/v1/embeddings", body)
    assert reply.headers["x-embedding-dtype"] == "float32"
    assert close(np.frombuffer(reply.body, "<f4"), vector("a"))


UNIT_FLOATS = some.arrays(
    np.float32, st.integers(1, 70), elements=st.floats(-1, 1, width=32)
)


@given(UNIT_FLOATS)
@settings(max_examples=300, deadline=None)
def test_what_the_small_types_lose_is_bounded(row: Any) -> None:
    made = {name: make(row) for name, make in es.DTYPES.items()}
    assert made["float32"].tobytes() == row.astype("<f4").tobytes()
    lost = np.abs(made["float16"].astype(np.float64) - row)
    assert (lost <= np.maximum(np.abs(row) * 2.0**-11, 2.0**-25)).all()
    assert (np.abs(made["int8"] / 127 - row) <= 0.5 / 127 + 1e-6).all()
    back = (made["uint8"].astype(np.float64) - 127.5) / 127.5
    assert (np.abs(back - row) <= 0.5 / 127.5 + 1e-6).all()
    bits = np.unpackbits(made["ubinary"])[: len(row)]
    assert (bits == (row > 0)).all()
    assert (made["binary"].astype(int) == made["ubinary"].astype(int) - 128).all()
    for name, array in made.items():
        assert array.dtype == np.dtype(WIRE[name])
        if not name.startswith("float"):
            text = es.json_codec().dumps(array)
            assert es.json_codec().loads(text) == array.tolist()


@given(UNIT_FLOATS)
def test_float16_is_written_as_numbers_that_read_back_the_same(row: Any) -> None:
    half = es.DTYPES["float16"](row)
    read = es.json_codec().loads(es.json_codec().dumps(half))
    assert np.array(read, np.float32).astype("<f2").tobytes() == half.tobytes()


def test_openai_s_reply_is_as_theirs_to_the_byte(client: both.Client) -> None:
    reply = client.post("/v1/embeddings", {"input": [[7]], "dimensions": 1})
    number = 1.0 if vector_of([7])[0] > 0 else -1.0
    assert reply.body == (
        b'{"object":"list","data":[{"object":"embedding","index":0,"embedding":[%.1f]}],'
        b'"model":"embedder","usage":{"prompt_tokens":3,"total_tokens":3}}' % number
    )
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["openai-version"] == "2020-10-01"
    assert re.fullmatch(r"[0-9]+", reply.headers["openai-processing-ms"])
    assert re.fullmatch(r"req_[0-9a-f]{32}", reply.headers["x-request-id"])


def test_the_reply_names_the_model_as_the_request_did(client: both.Client) -> None:
    for name in ("embedder", "embedder@1", "embedder:latest"):
        assert client.post("/v1/embeddings", {"input": "a", "model": name}).json[
            "model"
        ] == (name)


INPUT_TYPES = [word for words in es.INPUT_TYPES for word in words]


@pytest.mark.parametrize("kind", INPUT_TYPES)
def test_an_input_type_is_a_prompt_if_the_model_has_it(
    client: both.Client, kind: str
) -> None:
    whole = "ask, a b" if "query" in kind else "a b"
    for said in (kind, kind.upper()):
        for name in ("input_type", "task"):  # Jina's
            found = vectors(client, "/v1/embeddings", "a b", **{name: said})
            assert close(found, [vector(whole)])
    both_said = vectors(
        client, "/v1/embeddings", "a b", input_type=kind, prompt_name="mine"
    )
    assert close(both_said, [vector("[a b]")]), "the name is more exact"


@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        *(("retrieval.query", "ask, a b"), ("RETRIEVAL_QUERY", "ask, a b")),
        *(("quoted", 'say "a b" now'), ("mine", "[a b]")),  # prompts of the model
        *((kind, "a b") for kind in ("classification", "clustering", "image", "", "x")),
    ],
)
def test_any_other_type_is_a_prompt_if_there_is_one_and_no_mistake(
    client: both.Client, kind: str, whole: str
) -> None:
    found = vectors(client, "/v1/embeddings", "a b", input_type=kind)
    assert close(found, [vector(whole)])


def test_an_input_type_finds_the_prompt_whatever_the_model_calls_it(
    tmp_path: Path,
) -> None:
    prompts = {"passage": "p: ", "search_query": "q: ", "classification": "c: "}
    with both.asking(tmp_path, config={"prompts": prompts}) as asked_of:
        for kind in INPUT_TYPES:
            found = vectors(asked_of, "/v1/embeddings", "a", input_type=kind)
            assert close(found, [vector("q: a" if "query" in kind else "p: a")]), kind
        found = vectors(asked_of, "/v1/embeddings", "a", input_type="Classification")
        assert close(found, [vector("c: a")])


def test_texts_in_objects_are_texts(client: both.Client) -> None:
    """As Jina has them."""
    found = vectors(client, "/v1/embeddings", [{"text": "a b"}, "c", {"text": "d"}])
    assert close(found, [vector(text) for text in ("a b", "c", "d")])
    for bad in ({}, {"text": ""}, {"text": 1}, {"image": "x"}, {"text": ["a"]}):
        reply = client.post("/v1/embeddings", {"input": ["a", bad]})
        assert reply.error["param"] in ("input[1].text", "input[1]"), bad


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_an_input_that_fails_has_its_error_in_its_place(
    client: both.Client, encoding: str
) -> None:
    long = "w " * (MAX_WORDS + 1)
    body = {
        "input": ["a", long, "nan", "b"],
        "allow_partial": True,
        "encoding_format": encoding,
    }
    reply = client.post("/v1/embeddings", body)
    assert reply.status == 200
    kinds = [item["object"] for item in reply.json["data"]]
    assert kinds == ["embedding", "error", "error", "embedding"]
    assert [item["index"] for item in reply.json["data"]] == [0, 1, 2, 3]
    first, second = (reply.json["data"][n]["error"] for n in (1, 2))
    assert first["code"] == "context_length_exceeded"
    assert first["param"] == "input[1]"
    assert second["code"] == "nonfinite_embedding"
    assert set(first) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        *(("", "input[1]"), ([], "input[1]"), (None, "input[1]"), (7, "input[1]")),
        *((["a"], "input[1]"), ({}, "input[1].text"), ({"text": ""}, "input[1].text")),
        *(([-1], "input[1]"), ([2**30], "input[1]")),
    ],
    ids=str,
)
def test_an_input_that_is_none_fails_alone_if_that_is_asked_for(
    client: both.Client, bad: object, param: str
) -> None:
    body = {"input": ["a", bad, "b"], "allow_partial": True}
    first, second, third = client.post("/v1/embeddings", body).json["data"]
    assert close([first["embedding"], third["embedding"]], [vector("a"), vector("b")])
    assert (second["object"], second["index"]) == ("error", 1)
    assert second["error"]["code"] == "invalid_value"
    assert second["error"]["param"] == param
    del body["allow_partial"]
    refused = client.post("/v1/embeddings", body)
    assert (refused.status, refused.error) == (400, second["error"])
    body = {"input": [bad, "b"], "allow_partial": True}  # a number begins a list of ids
    first, second = client.post("/v1/embeddings", body).json["data"]
    assert (first["object"], close(second["embedding"], vector("b"))) == ("error", True)


def test_half_an_emoji_is_no_reason_to_refuse_a_text(client: both.Client) -> None:
    raw = b'{"input": ["fine", "cut \\ud83d"], "inputs": ["fine", "cut \\ud83d"]}'
    wanted = [vector("fine"), vector("cut \ufffd")]
    for path in EMBEDDING:
        sent = raw.replace(b"}", b', "model": "embedder"}')
        assert close(EMBEDDING[path][1](client.post(path, sent)), wanted), path
    with_mark = b"\xef\xbb\xbf" + raw
    assert close(openai_vectors(client.post("/v1/embeddings", with_mark)), wanted)


# --- prompts that a model brings, and default ones ---


def test_a_default_prompt_is_for_requests_that_name_none(tmp_path: Path) -> None:
    flags = ("--default-prompt-name", "quoted")
    with both.asking(tmp_path, *flags, config=CONFIG) as asked_of:
        for path in EMBEDDING:
            assert close(vectors(asked_of, path, "a"), [vector('say "a" now')]), path
        found = vectors(asked_of, "/embed", "a", prompt_name="query")
        assert close(found, [vector("search query: a")])
        assert close(
            vectors(asked_of, "/embed", "a", prompt_name="empty"), [vector("a")]
        )
        body = {"input": "a", "input_type": "document"}
        reply = asked_of.post("/v1/embeddings", body)
        assert close(openai_vectors(reply), [vector("a")])


BESIDE = {"prompts": {"query": "query: ", "document": "passage: "}}


def test_the_default_prompt_that_stands_beside_a_model_goes_before_every_text(
    tmp_path: Path,
) -> None:
    config = BESIDE | {"default_prompt_name": "document"}
    with both.asking(tmp_path, config=config) as asked_of:
        for path in EMBEDDING:
            assert close(vectors(asked_of, path, "a"), [vector("passage: a")]), path
        found = vectors(asked_of, "/embed", "a", prompt_name="query")
        assert close(found, [vector("query: a")])


def test_the_operator_s_default_prompt_is_before_the_one_beside_a_model(
    tmp_path: Path,
) -> None:
    config = BESIDE | {"default_prompt_name": "document"}
    flags = ("--default-prompt-name", "query")
    with both.asking(tmp_path, *flags, config=config) as asked_of:
        assert close(vectors(asked_of, "/embed", "a"), [vector("query: a")])


@pytest.mark.parametrize(
    ("name", "known", "default", "lines"),
    [
        *(("document", ["document"], "document", 0), ("", ["document"], "", 0)),
        *(("own", ["document"], "own", 0), ("nope", ["document"], "", 1)),
        ("nope", [], "", 1),
    ],
)
def test_a_default_prompt_beside_a_model_that_is_none_is_warned_of(
    name: str, known: list[str], default: str, lines: int
) -> None:
    text = io.StringIO()
    told = kit.settings(prompt=("own=x",))
    assert es.check_prompts(told, known, name, es.Log("info", "text", text)) == default
    assert text.getvalue().count("warning") == lines


@pytest.mark.parametrize(
    ("raw", "prompts", "lines"),
    [
        *((b"[]", {}, 1), (b"{", {}, 1), (b"null", {}, 1), (b"{}", {}, 0)),
        *((b'{"prompts":[]}', {}, 1), (b'{"prompts":["a"]}', {}, 1)),
        *((b'{"prompts":{"q":1}}', {}, 1), (b'{"prompts":null}', {}, 1)),
        (b'{"prompts":{"q":"x"},"default_prompt_name":1}', {}, 1),
        (b'{"prompts":{"q":"x","p":[]}}', {"q": "x"}, 1),
        (b'{"prompts":{"q":"x"},"default_prompt_name":null}', {"q": "x"}, 0),
    ],
)
def test_prompts_beside_a_model_that_cannot_be_read_are_warned_of(
    tmp_path: Path, raw: bytes, prompts: dict[str, str], lines: int
) -> None:
    (tmp_path / "config_sentence_transformers.json").write_bytes(raw)
    text = io.StringIO()
    log = es.Log("info", "text", text)
    assert es.prompts_beside(str(tmp_path / "m.gguf"), log) == (prompts, "")
    assert text.getvalue().count("warning") == lines


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rerank", {"model": "ranker", "query": "a", "documents": ["b"]}),
        ("/embed", {"inputs": [7, 8]}),
    ],
)
def test_a_default_prompt_is_for_texts_only(
    tmp_path: Path, path: str, body: object
) -> None:
    flags = ("--default-prompt-name", "quoted", "--accept-token-ids")
    with both.asking(tmp_path, *flags, config=CONFIG) as asked_of:
        assert asked_of.post(path, body).status == 200


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b"null", b'{"prompts":[]}', b'{"prompts":{"q":1}}']
)
def test_a_file_of_prompts_that_is_none_is_no_reason_not_to_serve(
    tmp_path: Path, raw: bytes
) -> None:
    (tmp_path / "config_sentence_transformers.json").write_bytes(raw)
    with both.asking(tmp_path) as asked_of:
        reply = asked(asked_of, "/embed", "a", prompt_name="q")
        assert reply.status == 422
        assert "prompts of this model: none" in reply.json["error"]


def test_info_lists_the_prompts(client: both.Client) -> None:
    assert client.get("/info").json["prompts"] == ["empty", "mine", "query", "quoted"]


# --- Cohere and Jina ---

RERANKING = ("/v1/rerank", "/v2/rerank", "/rerank", "/reranking", "/v1/reranking")
DOCUMENTS = ["b", "c d", "e", "f g h", "b"]


@pytest.mark.parametrize("path", RERANKING)
def test_documents_come_back_best_first(ranker: both.Client, path: str) -> None:
    reply = ranker.post(path, {"query": "q", "documents": DOCUMENTS})
    raw = [score("q", text) for text in DOCUMENTS]
    order = sorted(range(5), key=lambda n: -raw[n])  # stable: equal ones as they came
    assert set(reply.json) == {"id", "model", "results", "usage", "meta"}
    assert [row["index"] for row in reply.json["results"]] == order
    found = [row["relevance_score"] for row in reply.json["results"]]
    assert close(found, [sigmoid(raw[n]) for n in order])
    assert all(
        set(row) == {"index", "relevance_score"} for row in reply.json["results"]
    )
    tokens = sum(2 + len(text.split()) for text in DOCUMENTS)
    assert reply.json["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert reply.json["meta"] == {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": 1},
        "tokens": {"input_tokens": tokens, "output_tokens": 0},
    }
    assert reply.json["model"] == "ranker"
    assert reply.headers["x-embellama-model"] == "ranker@1"


@pytest.mark.parametrize("path", RERANKING)
@pytest.mark.parametrize(
    "said", [{"raw_scores": True}, {"use_activation": False}, {"activation": False}]
)
def test_raw_scores_are_as_the_model_gives_them(
    ranker: both.Client, path: str, said: dict[str, bool]
) -> None:
    body = {"query": "q", "documents": DOCUMENTS} | said
    rows = ranker.post(path, body).json["results"]
    assert close(
        [row["relevance_score"] for row in rows],
        sorted((score("q", text) for text in DOCUMENTS), reverse=True),
    )


@pytest.mark.parametrize("path", RERANKING)
def test_documents_may_be_objects_and_come_back_if_asked_for(
    ranker: both.Client, path: str
) -> None:
    mixed = [{"text": "b", "title": "x"}, "c d", {"text": "e"}]
    body = {"query": "q", "documents": mixed, "return_documents": True}
    for row in ranker.post(path, body).json["results"]:
        assert row["document"] == {"text": ["b", "c d", "e"][row["index"]]}
    as_text = body | {"query": {"text": "q"}, "return_documents": "true", "top_n": "3"}
    assert (
        ranker.post(path, as_text | {"return_len": "true"}).json["results"]
        == (ranker.post(path, body).json["results"])
    )


@pytest.mark.parametrize("path", RERANKING)
@pytest.mark.parametrize(
    ("top_n", "rows"), [(1, 1), (4, 4), (5, 5), (6, 5), (2**53, 5), (0, 5), (None, 5)]
)
def test_top_n_keeps_the_best(
    ranker: both.Client, path: str, top_n: int | None, rows: int
) -> None:
    body = {"query": "q", "documents": DOCUMENTS}
    whole = ranker.post(path, body).json["results"]
    found = ranker.post(path, body | {"top_n": top_n}).json["results"]
    assert found == whole[:rows]


@pytest.mark.parametrize("path", RERANKING)
@pytest.mark.parametrize(
    "change",
    [
        *({"query": ""}, {"query": None}, {"query": 1}, {"query": ["q"]}),
        *({"documents": []}, {"documents": "b"}, {"query": {"text": ""}}),
        *({"documents": [{}]}, {"documents": [{"text": 1}]}, {"documents": [1]}),
        *({"documents": [None]}, {"documents": [[7]]}, {"documents": {"text": "b"}}),
        *({"top_n": -1}, {"top_n": 2**53 + 1}, {"top_n": 1.5}, {"top_n": "x"}),
        *({"return_documents": 2}, {"raw_scores": "no"}, {"truncate": ""}),
        *({"model": 1}, {"user": 1}),
    ],
    ids=str,
)
def test_a_wrong_field_of_a_reranking_is_refused_by_name(
    ranker: both.Client, path: str, change: dict[str, Any]
) -> None:
    reply = ranker.post(path, {"query": "q", "documents": ["b"]} | change)
    assert reply.status in ((400, 422) if path == "/rerank" else (400,))
    assert next(iter(change)).encode() in reply.body


@pytest.mark.parametrize("path", RERANKING)
def test_an_embedding_model_ranks_nothing(client: both.Client, path: str) -> None:
    body = {"query": "q", "documents": ["b"]}
    reply = client.post(path, body | {"model": "embedder"})
    assert reply.status == 400
    assert reply.error["code"] == "wrong_kind_of_model"
    for name in ({}, {"model": None}, {"model": ""}):  # the first that can do it
        reply = client.post(path, body | name)
        assert reply.headers["x-embellama-model"] == "ranker@1"


@pytest.mark.parametrize("path", RERANKING)
def test_cohere_s_own_fields_are_no_mistake(ranker: both.Client, path: str) -> None:
    body = {"query": "q", "documents": ["b"], "priority": 3, "max_tokens_per_doc": 9}
    assert ranker.post(path, body).status == 200


WORDS = [f"w{n}" for n in range(40)]
LONG = " ".join(WORDS)


def scores(reply: kit.Reply) -> dict[int, float]:
    """Of each document, in either shape."""
    assert reply.status == 200, reply.body
    rows = reply.json if isinstance(reply.json, list) else reply.json["results"]
    return {row["index"]: row.get("relevance_score", row.get("score")) for row in rows}


def cut(*words: int | None) -> str:
    """A slice of the long text's words."""
    return " ".join(WORDS[slice(*words)])


@pytest.mark.parametrize("path", [*RERANKING, "texts"])
@pytest.mark.parametrize(
    ("more", "kept"),  # of 32 tokens the query has 2 and special ones 1
    [
        ({}, cut(29)),
        ({"truncate": None}, cut(29)),
        ({"truncate": True}, cut(29)),
        ({"truncate": "END"}, cut(29)),
        ({"truncate": "START"}, cut(-29, None)),
        ({"max_tokens_per_doc": 9}, cut(9)),
        ({"max_tokens_per_doc": "9", "truncate": False}, cut(9)),
        ({"max_tokens_per_doc": 9, "truncate": "START"}, cut(-9, None)),
        ({"max_tokens_per_doc": 4096, "max_chunks_per_doc": 1}, cut(29)),
        ({"truncate_prompt_tokens": 10}, cut(7)),
        ({"truncate_prompt_tokens": -1}, cut(29)),
        ({"truncate_prompt_tokens": 999}, cut(29)),
    ],
    ids=str,
)
def test_a_long_document_is_cut_and_the_query_and_the_others_stay(
    ranker: both.Client, path: str, more: dict[str, Any], kept: str
) -> None:
    name = "texts" if path == "texts" else "documents"
    body = {"query": "q r", name: ["b", LONG, ""], "raw_scores": True}
    found = scores(ranker.post("/rerank" if path == "texts" else path, body | more))
    wanted = [score("q r", text) for text in ("b", kept, "")]
    assert close([found[n] for n in range(3)], wanted)


@pytest.mark.parametrize("path", RERANKING)
@pytest.mark.parametrize("truncate", [False, "NONE", "false", 0])
def test_who_wants_nothing_cut_is_told_what_is_too_long(
    ranker: both.Client, path: str, truncate: object
) -> None:
    body = {"query": "q r", "documents": ["b", LONG], "truncate": truncate}
    error = ranker.post(path, body).error
    assert (error["code"], error["param"]) == (
        *("context_length_exceeded", "documents[1]"),
    )
    body = {"query": LONG, "documents": ["b"], "truncate": truncate}
    assert ranker.post(path, body).error["param"] == "query"


@pytest.mark.parametrize("path", RERANKING)
def test_of_a_long_query_as_much_is_read_as_the_document_leaves(
    ranker: both.Client, path: str
) -> None:
    body = {"query": LONG, "documents": ["b", "a " * 20], "raw_scores": True}
    found = scores(ranker.post(path, body))
    wanted = [score(cut(30), "b"), score(cut(16), "a " * 15)]
    assert close([found[0], found[1]], wanted)


@pytest.mark.parametrize("path", [*RERANKING, "texts"])
@pytest.mark.parametrize("raw", [False, True])
def test_a_document_without_a_score_comes_last_and_leaves_the_others(
    client: both.Client, path: str, raw: bool
) -> None:
    name = "texts" if path == "texts" else "documents"
    body = {"model": "ranker", "query": "q", name: ["nan", "b", "boom", "c"]}
    reply = client.post(
        "/rerank" if path == "texts" else path, body | {"raw_scores": raw}
    )
    found = scores(reply)
    assert list(found)[2:] == [0, 2]
    good = {n: score("q", text) for n, text in ((1, "b"), (3, "c"))}
    for index, number in good.items():
        assert found[index] == pytest.approx(number if raw else sigmoid(number))
    assert found[0] == found[2] == (pytest.approx(min(good.values())) if raw else 0)
    rows = reply.json if path == "texts" else reply.json["results"]
    assert [row["error"]["code"] for row in rows[2:]] == [
        *("nonfinite_embedding", "engine_failed"),
    ]
    assert not any("error" in row for row in rows[:2])
    alone = client.post(
        "/rerank" if path == "texts" else path, body | {name: ["nan", "nan"]}
    )
    assert alone.status == (424 if path == "texts" else 500)


@pytest.mark.parametrize("path", [*RERANKING, "texts"])
def test_what_is_no_document_comes_last_and_leaves_the_others(
    client: both.Client, path: str
) -> None:
    name = "texts" if path == "texts" else "documents"
    texts = [None, "b", 5, {}, {"text": None}, {"title": "t"}, ["x"], True, "c"]
    body = {"query": "q", name: texts, "return_documents": True, "return_text": True}
    asking = functools.partial(client.post, "/rerank" if path == "texts" else path)
    reply = asking(body)
    found = scores(reply)
    assert list(found)[2:] == [0, 2, 3, 4, 5, 6, 7]
    assert found[1] == pytest.approx(sigmoid(score("q", "b")))
    rows = reply.json if path == "texts" else reply.json["results"]
    assert [
        row["error"]["param"].startswith(f"{name}[{row['index']}]") for row in rows[2:]
    ] == [True] * 7
    refused = asking(body | {"truncate": False})
    assert refused.status == (422 if path == "texts" else 400)
    assert f"{name}[0] must be a string".encode() in refused.body


@pytest.mark.parametrize("path", [*RERANKING, "texts"])
def test_documents_may_have_more_tokens_together_than_openai_allows(
    ranker: both.Client, path: str
) -> None:
    name = "texts" if path == "texts" else "documents"
    body = {"query": "q", name: [LONG] * 10_000, "top_n": 1}
    reply = ranker.post("/rerank" if path == "texts" else path, body)
    assert reply.status == 200, reply.body[:300]
    if path != "texts":
        assert reply.json["usage"]["total_tokens"] == 320_000


def test_vectors_are_cut_to_as_many_tokens_as_vllm_s_clients_ask_for(
    client: both.Client,
) -> None:
    for most, words in ((10, 8), (1, 1), (0, 30), (-1, 30), ("32", 30), (999, 30)):
        found = vectors(client, "/v1/embeddings", LONG, truncate_prompt_tokens=most)
        assert close(found, [vector(cut(words))]), most
    refused = asked(client, "/v1/embeddings", "a", truncate_prompt_tokens=-2)
    assert refused.error["param"] == "truncate_prompt_tokens"


@pytest.mark.parametrize("path", [path for path in EMBEDDING if path != "/api/embed"])
def test_cutting_leaves_both_halves_of_a_prompt(client: both.Client, path: str) -> None:
    text, whole = "w " * 49 + "w", 'say "w' + " w" * 26 + ' w" now'
    for truncate in ("END", "START"):
        how = {"prompt_name": "quoted", "truncate": truncate}
        assert close(vectors(client, path, text, **how), [vector(whole)])


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_the_sigmoid_is_0_to_1_of_any_score(value: float) -> None:
    assert 0 <= es.sigmoid(value) <= 1
    assert es.sigmoid(value) + es.sigmoid(-value) == pytest.approx(1)


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_the_sigmoid_keeps_the_order(one: float, other: float) -> None:
    if one <= other:
        assert es.sigmoid(one) <= es.sigmoid(other)
    assert es.sigmoid(one) == pytest.approx(sigmoid(one), rel=1e-12)


# --- text-embeddings-inference ---

COMPUTING = {
    "/embed": ({"inputs": ["a b", "ü"]}, 4, 7),
    "/embed_all": ({"inputs": ["a b", "ü"]}, 4, 7),
    "/": ({"inputs": ["a b", "ü"]}, 4, 7),
    "/invocations": ({"inputs": ["a b", "ü"]}, 4, 7),
    "/api/v1/embed": ({"inputs": ["a b", "ü"]}, 4, 7),
    "/similarity": ({"inputs": {"source_sentence": "a b", "sentences": ["ü"]}}, 4, 7),
}
TIMES = (
    *("x-compute-time", "x-total-time", "x-compute-characters", "x-compute-tokens"),
    *("x-tokenization-time", "x-queue-time", "x-inference-time"),
)


@pytest.mark.parametrize("path", COMPUTING)
def test_the_times_stand_in_header_fields(client: both.Client, path: str) -> None:
    body, characters, tokens = COMPUTING[path]
    fields = client.post(path, body).headers
    assert fields["x-compute-type"] == "cpu"
    numbers = {name: int(fields[name]) for name in TIMES}
    assert min(numbers.values()) >= 0
    assert numbers["x-compute-characters"] == characters
    assert numbers["x-compute-tokens"] == tokens
    assert numbers["x-compute-time"] == numbers["x-total-time"]


def test_reranking_has_them_too_and_what_computes_nothing_has_not(
    client: both.Client,
) -> None:
    body = {"model": "ranker", "query": "q", "texts": ["b"]}
    assert set(TIMES) < set(client.post("/rerank", body).headers)
    for path, asked_for in (
        ("/tokenize", {"inputs": "a"}),
        ("/decode", {"ids": [7]}),
        ("/v1/embeddings", {"input": "a"}),
    ):
        assert not set(TIMES) & set(client.post(path, asked_for).headers), path


@pytest.mark.parametrize("path", ["/rerank", "/", "/invocations"])
def test_texts_are_ranked_as_an_array(ranker: both.Client, path: str) -> None:
    body = {"query": "q", "texts": DOCUMENTS}
    raw = [score("q", text) for text in DOCUMENTS]
    order = sorted(range(5), key=lambda n: -raw[n])
    found = ranker.post(path, body).json
    assert [row["index"] for row in found] == order
    assert close([row["score"] for row in found], [sigmoid(raw[n]) for n in order])
    assert all(set(row) == {"index", "score"} for row in found)
    told = ranker.post(path, body | {"return_text": True, "raw_scores": True}).json
    assert [list(row) for row in told] == [["index", "text", "score"]] * 5
    assert [row["text"] for row in told] == [DOCUMENTS[n] for n in order]
    assert close([row["score"] for row in told], [raw[n] for n in order])


def test_texts_may_be_objects(ranker: both.Client) -> None:
    body = {"query": "q", "texts": [{"text": "b"}, "c"], "return_text": True}
    rows = ranker.post("/rerank", body).json
    assert {row["text"] for row in rows} == {"b", "c"}


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"texts": []}, 400, "Empty"),
        ({"query": ""}, 400, "Empty"),
        ({"texts": None}, 422, "Validation"),
        ({"texts": "b"}, 422, "Validation"),
        ({"texts": [[7]]}, 422, "Validation"),
        ({"query": None}, 422, "Validation"),
        ({"raw_scores": 2}, 422, "Validation"),
        ({"return_text": "x"}, 422, "Validation"),
        ({"truncation_direction": "up"}, 422, "Validation"),
    ],
    ids=str,
)
def test_a_wrong_field_of_texts_is_refused_as_tei_does(
    ranker: both.Client, change: dict[str, Any], status: int, word: str
) -> None:
    reply = ranker.post("/rerank", {"query": "q", "texts": ["b"]} | change)
    assert (reply.status, reply.json["error_type"]) == (status, word)


def test_embed_all_gives_a_vector_for_every_token_not_scaled(
    client: both.Client,
) -> None:
    found = client.post("/embed_all", {"inputs": ["a b", [7]]}).json
    for rows, tokens in zip(found, ([HEAD, *ids_of("a b"), TAIL], [HEAD, 7, TAIL])):
        wanted = [kit.fake_row([token], N) for token in tokens]
        assert close(rows, wanted)


def test_embed_all_cuts_and_prompts_as_the_others_do(client: both.Client) -> None:
    words = [f"w{n}" for n in range(40)]
    body = {"inputs": " ".join(words)}
    assert client.post("/embed_all", body).status == 422
    for said, kept in (("Right", words[:30]), ("left", words[-30:])):
        how = {"truncate": True, "truncation_direction": said}
        (rows,) = client.post("/embed_all", body | how).json
        tokens = [HEAD, *map(kit.fake_id, kept), TAIL]
        wanted = [kit.fake_row([token], N) for token in tokens]
        assert close(rows, wanted)
    (rows,) = client.post("/embed_all", {"inputs": "a", "prompt_name": "query"}).json
    assert len(rows) == 4
    asked_of_ranker = client.post("/embed_all", {"inputs": "a", "model": "ranker"})
    assert asked_of_ranker.status == 424


def test_embed_all_gives_what_embed_gives_and_the_other_way_round(
    client: both.Client,
) -> None:
    """Vectors of tokens are never mistaken for those of texts: neither is cached so."""
    for _ in range(2):
        assert close(vectors(client, "/embed", "x y"), [vector("x y")])
        assert np.shape(client.post("/embed_all", {"inputs": "x y"}).json) == (1, 4, N)
        raw = vectors(client, "/embed", "x y", normalize=False)
        assert close(raw, [vector("x y") * kit.RAW_LENGTH])


@pytest.mark.parametrize("path", ["/similarity", "/", "/invocations"])
def test_similarity_is_the_cosine(client: both.Client, path: str) -> None:
    others = ["b", "c d", "a"]
    body: dict[str, Any] = {"inputs": {"source_sentence": "a", "sentences": others}}
    wanted = [float(vector("a") @ vector(text)) for text in others]
    found = client.post(path, body).json
    assert close(found, wanted)
    assert found[2] == pytest.approx(1, abs=1e-6)
    assert client.post(path, body | {"parameters": {}}).json == found
    assert client.post(path, body | {"parameters": None}).json == found
    prompted = client.post(path, body | {"parameters": {"prompt_name": "mine"}}).json
    assert close(prompted, [float(vector("[a]") @ vector(f"[{t}]")) for t in others])


@pytest.mark.parametrize("path", ["/similarity", "/", "/invocations"])
def test_similarity_cuts_what_is_too_long(client: both.Client, path: str) -> None:
    words = [f"w{n}" for n in range(40)]
    inputs = {"source_sentence": "a", "sentences": [" ".join(words)]}
    assert client.post(path, {"inputs": inputs}).status == 422
    for said, kept in (("Right", words[:30]), ("Left", words[-30:])):
        how = {"truncate": True, "truncation_direction": said}
        (found,) = client.post(path, {"inputs": inputs, "parameters": how}).json
        assert found == pytest.approx(vector("a") @ vector(" ".join(kept)), abs=1e-6)


@pytest.mark.parametrize("path", ["/similarity", "/", "/invocations"])
@pytest.mark.parametrize(
    ("inputs", "status"),
    [
        ({"source_sentence": "", "sentences": ["a"]}, 400),
        ({"source_sentence": "a", "sentences": []}, 400),
        ({"source_sentence": "a", "sentences": [""]}, 400),
        ({"source_sentence": "a"}, 422),
        ({"sentences": ["a"]}, 422),
        ({}, 422),
        ({"source_sentence": ["a"], "sentences": ["a"]}, 422),
        ({"source_sentence": "a", "sentences": "a"}, 422),
        ({"source_sentence": "a", "sentences": [[7]]}, 422),
        ({"source_sentence": "a", "sentences": ["b"] * 8192}, 422),
    ],
    ids=lambda value: str(value)[:60],
)
def test_wrong_sentences_are_refused(
    client: both.Client, path: str, inputs: object, status: int
) -> None:
    reply = client.post(path, {"inputs": inputs})
    assert reply.status == status, reply.body
    assert reply.json["error_type"] == {400: "Empty", 422: "Validation"}[status]


def test_one_request_has_as_many_sentences_as_inputs_less_the_source(
    client: both.Client,
) -> None:
    body = {"inputs": {"source_sentence": "a", "sentences": ["b"] * 8191}}
    assert len(client.post("/similarity", body).json) == 8191


@pytest.mark.parametrize("path", ["/", "/invocations"])
def test_the_root_does_what_the_body_looks_like(client: both.Client, path: str) -> None:
    assert close(client.post(path, {"inputs": "a"}).json, [vector("a")])
    short = client.post(path, {"inputs": "a", "dimensions": 2, "normalize": False}).json
    assert close(short, [vector("a")[:2] * kit.RAW_LENGTH])
    rank = {"query": "q", "texts": ["b"], "model": "ranker", "inputs": "ignored"}
    assert close(client.post(path, rank).json[0]["score"], sigmoid(score("q", "b")))
    # A query alone is no reranking, and texts alone no reranking either.
    assert close(client.post(path, {"inputs": "a", "query": "q"}).json, [vector("a")])
    assert client.post(path, {"query": "q"}).status == 422
    assert client.post(path, {"texts": ["b"]}).status == 422
    assert client.post(path, {}).status == 422
    assert client.post(path, {"inputs": None}).status == 422


# --- tokens ---


def test_tokenize_gives_the_special_tokens_unless_told_not_to(
    client: both.Client,
) -> None:
    def token(number: int, *, special: bool) -> dict[str, Any]:
        return {
            "id": number,
            "text": f"<{number}>",
            "special": special,
            "start": None,
            "stop": None,
        }

    own = [token(number, special=False) for number in ids_of("a b")]
    around = [token(HEAD, special=True), *own, token(TAIL, special=True)]
    assert client.post("/tokenize", {"inputs": ["a b"]}).json == [around]
    assert client.post("/tokenize", {"inputs": "a b"}).json == [around]
    bare = client.post("/tokenize", {"inputs": "a b", "add_special_tokens": False})
    assert bare.json == [own]
    prompted = {"inputs": "b", "prompt_name": "mine", "add_special_tokens": False}
    assert [t["id"] for t in client.post("/tokenize", prompted).json[0]] == ids_of(
        "[b]"
    )
    assert "x-request-id" in bare.headers


@pytest.mark.parametrize(
    ("body", "status"),
    [
        *(({"inputs": ""}, 400), ({"inputs": []}, 400), ({"inputs": ["a", ""]}, 400)),
        *(({"inputs": [7]}, 422), ({"inputs": [[7]]}, 422), ({"inputs": 1}, 422)),
        *(({}, 422), ({"inputs": None}, 422), ({"inputs": {"a": 1}}, 422)),
        ({"inputs": "a", "add_special_tokens": 2}, 422),
        ({"inputs": "a", "prompt_name": "nope"}, 422),
        ({"inputs": "a", "model": "nope"}, 200),
        ({"inputs": ["a"] * 8193}, 422),
        ({"inputs": ["a"] * 8192}, 200),
        ({"inputs": "a " * 1000}, 200),  # longer than the model reads: only counted
        ({"inputs": "a", "model": "ranker"}, 200),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_tokenize_takes(client: both.Client, body: object, status: int) -> None:
    assert client.post("/tokenize", body).status == status


@pytest.mark.parametrize(
    ("body", "status"),
    [
        *(({"ids": []}, 400), ({"ids": [[]]}, 400), ({"ids": [[7], []]}, 400)),
        *(({"ids": "7"}, 422), ({"ids": ["7"]}, 422), ({"ids": 7}, 422), ({}, 422)),
        *(({"ids": [-1]}, 422), ({"ids": [7.0]}, 422), ({"ids": [True]}, 422)),
        *(({"ids": [[7], 7]}, 422), ({"ids": [7, [7]]}, 422), ({"ids": [None]}, 422)),
        *(({"ids": [[[7]]]}, 422), ({"ids": [{}]}, 422)),
        *(({"ids": [2**30]}, 422), ({"ids": [2**31]}, 422), ({"ids": [2**63]}, 422)),
        ({"ids": [7], "skip_special_tokens": "no"}, 422),
        ({"ids": [[7]] * 8193}, 422),
        ({"ids": [[7]] * 8192}, 200),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_decode_takes(client: both.Client, body: object, status: int) -> None:
    assert client.post("/decode", body).status == status


def test_decode_says_what_it_wants(client: both.Client) -> None:
    assert "token ids" in client.post("/decode", {"ids": [[7], 7]}).json["error"]


def test_decode_leaves_out_special_tokens_unless_told_not_to(
    client: both.Client,
) -> None:
    ids = [HEAD, 7, TAIL]
    assert client.post("/decode", {"ids": ids}).json == ["<7>"]
    assert client.post("/decode", {"ids": [ids, [8]]}).json == ["<7>", "<8>"]
    whole = client.post("/decode", {"ids": [ids], "skip_special_tokens": False})
    assert whole.json == ["<1> <7> <2>"]


TEXTS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("aAéÉß İıǅﬁ½한국日本\u0301\u200b\u00ad☃😀\t\n\u3000"),
    ),
    max_size=30,
)


def test_an_unknown_word_s_name_in_a_text_is_found_as_it_stands() -> None:
    unknown = "[UNK]"
    found = es.aligned("x [UNK] y", ["x", unknown, "y"])
    assert [*found] == [("x", 0, 1), ("[UNK]", 2, 7), ("y", 8, 9)]
    found = es.aligned("☃ [UNK]", [unknown, unknown])
    assert [*found] == [("☃", 0, 1), ("[UNK]", 2, 7)]


@given(TEXTS, st.randoms(use_true_random=False))
def test_a_token_s_place_is_where_its_text_stands(text: str, chance: Any) -> None:
    pieces, at = [], 0
    while at < len(text):
        size = chance.randint(1, 4)
        pieces.append(chance.choice((str.lower, str.upper, str))(text[at : at + size]))
        at += size
    if pieces and chance.random() < 0.3:
        pieces[chance.randrange(len(pieces))] = "[UNK]"
    found = list(es.aligned(text, pieces))
    assert len(found) == len(pieces)
    last = 0
    for said, start, stop in found:
        assert (start is None) == (stop is None)
        if start is not None and stop is not None:
            assert 0 <= start < stop <= len(text)
            assert text[start:stop] == said
            assert start >= last or stop >= last
            last = start


# --- what is said of the server ---


def test_info_says_what_tei_says(client: both.Client) -> None:
    info = client.get("/info").json
    assert info == info | {
        "model_id": "embedder",
        "model_dtype": "float16",
        "served_model_name": "embedder",
        "model_type": {"embedding": {"pooling": "mean"}},
        "max_concurrent_requests": 1 << 16,
        "max_input_length": 32,
        "max_batch_tokens": 256,
        "max_batch_requests": None,
        "max_client_batch_size": 8192,
        "auto_truncate": False,
        "tokenization_workers": 1,
        "version": es.__version__,
        "sha": None,
        "docker_label": None,
    }
    assert re.fullmatch(r"[0-9a-f]{64}", info["model_sha"])


def test_info_of_a_reranker_has_labels(ranker: both.Client) -> None:
    assert ranker.get("/info").json["model_type"] == {
        "reranker": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    }


@pytest.mark.parametrize("kind", ["embedding", "reranker"])
async def test_info_is_of_the_model_that_tei_s_routes_go_to(kind: str) -> None:
    ranker = kit.FakeEngine(n_scores=1, pair_separator=(5,), pair_suffix=(6,))
    other = kit.FakeEngine() if kind == "embedding" else ranker
    async with kit.running_service(
        kit.FakeChatEngine(), beside={"other": other}
    ) as running:
        info = (await running.ask("GET", "/info")).json
        assert info["model_id"] == "other"
        assert list(info["model_type"]) == [kind]


def test_limits_are_shown_as_they_are_set(tmp_path: Path) -> None:
    flags = (
        *("--max-client-batch-size", "3", "--max-batch-tokens", "512"),
        *("--max-batch-requests", "5", "--max-concurrent-requests", "9"),
        *("--auto-truncate", "--tokenization-workers", "2"),
    )
    with both.asking(tmp_path, *flags) as asked_of:
        info = asked_of.get("/info").json
        assert info["max_client_batch_size"] == 3
        assert info["max_batch_tokens"] == 512
        assert info["max_batch_requests"] == 5
        assert info["max_concurrent_requests"] == 9
        assert info["auto_truncate"] is True
        assert info["tokenization_workers"] == 2
        assert asked(asked_of, "/embed", ["a"] * 3).status == 200
        refused = asked(asked_of, "/embed", ["a"] * 4)
        assert refused.status == 422
        assert "4" in refused.json["error"] and "3" in refused.json["error"]
        long = "w " * 99
        assert len(vectors(asked_of, "/embed", long)) == 1, "null: as --auto-truncate"
        assert asked(asked_of, "/embed", long, truncate=False).status == 422


# --- the AI Embedding Inference Server ---


def test_the_seed_s_reply_is_as_its_readme_shows(client: both.Client) -> None:
    body = {
        "inputs": "Hello world",
        "truncate": True,
        "truncation_direction": "Right",
        "prompt_name": None,
        "normalize": True,
        "dimensions": None,
    }
    reply = client.post("/api/v1/embed", body)
    assert list(reply.json) == ["data", "usage", "timings"]
    assert [list(item) for item in reply.json["data"]] == [["embedding", "index"]]
    assert close(reply.json["data"][0]["embedding"], vector("Hello world"))
    assert reply.json["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert list(reply.json["timings"]) == ["tokenization", "queue", "inference"]
    for text in reply.json["timings"].values():
        assert re.fullmatch(r"[0-9]{1,4}(\.[0-9]+)?(µs|ms|s)", text), text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((120e-6, "120µs"), (0.002, "2ms"), (0.035, "35ms"), (1.2, "1.2s")),
        *((0.0, "0µs"), (1e-3, "1ms"), (1.0, "1s"), (600.0, "600s"), (2.5e-3, "2.5ms")),
        *((12.346e-6, "12.35µs"), (0.9994, "999.4ms")),
    ],
)
def test_a_duration_is_written_as_rust_does(seconds: float, text: str) -> None:
    assert es.duration_text(seconds) == text


@given(st.floats(0, 86400))
def test_any_duration_reads_back(seconds: float) -> None:
    found = re.fullmatch(r"([0-9.e+-]+)(µs|ms|s)", es.duration_text(seconds))
    assert found
    size = {"µs": 1e-6, "ms": 1e-3, "s": 1.0}[found[2]]
    assert float(found[1]) * size == pytest.approx(seconds, rel=1e-3, abs=1e-12)


# --- Ollama ---


def test_ollama_s_embed_has_a_list_of_lists_and_whole_numbers(
    client: both.Client,
) -> None:
    reply = client.post("/api/embed", {"model": "embedder", "input": "a"})
    assert list(reply.json) == [
        *(
            "model",
            "embeddings",
            "total_duration",
            "load_duration",
            "prompt_eval_count",
        ),
    ]
    assert close(reply.json["embeddings"], [vector("a")])
    assert reply.json["prompt_eval_count"] == 3
    assert 0 <= reply.json["load_duration"] <= reply.json["total_duration"] < 60e9
    assert type(reply.json["total_duration"]) is int


def test_what_ollama_s_clients_send_beside_is_ignored(client: both.Client) -> None:
    for keep_alive in ("5m", 0, -1, None):
        body = {"model": "embedder", "input": ["a"], "keep_alive": keep_alive}
        reply = client.post("/api/embed", body | {"options": {"num_ctx": 9}})
        assert close(reply.json["embeddings"], [vector("a")])


@pytest.mark.parametrize("said", ["", [], None])
def test_no_input_only_loads_the_model(client: both.Client, said: object) -> None:
    reply = client.post("/api/embed", {"model": "embedder", "input": said})
    assert (reply.status, reply.json["embeddings"]) == (200, [])
    old = client.post("/api/embeddings", {"model": "embedder", "prompt": ""})
    assert (old.status, old.json) == (200, {"embedding": []})


def test_ollama_s_old_route_gives_one_vector_as_the_model_does(
    client: both.Client,
) -> None:
    def raw(text: str) -> Any:
        return client.post("/embed", {"inputs": text, "normalize": False}).json[0]

    body = {"model": "embedder:latest", "prompt": "a b", "options": {}}
    reply = client.post("/api/embeddings", body)
    assert list(reply.json) == ["embedding"]
    assert close(reply.json["embedding"], raw("a b"))
    assert close(reply.json["embedding"], kit.RAW_LENGTH * vector("a b"))
    long = client.post("/api/embeddings", body | {"prompt": "w " * 99})
    assert close(long.json["embedding"], raw("w " * 30)), "always cut"


def test_ollama_s_errors_are_a_sentence(client: both.Client) -> None:
    unknown = client.post("/api/embed", {"model": "nobody", "input": "a"})
    assert (unknown.status, list(unknown.json)) == (404, ["error"])
    assert unknown.json["error"].startswith("model 'nobody' not found")
    for path in ("/api/embed", "/api/embeddings", "/api/show", "/api/pull"):
        is_for_any = path.startswith("/api/embed")  # who names none gets the first
        assert client.post(path, {}).status == (200 if is_for_any else 400)
        assert client.post(path, {"model": 1}).status == 400
        assert client.post(path, {"model": "nobody"}).status == 404
        assert client.post(path, b"{").json.keys() == {"error"}
        assert client.get(path).status == 405
        assert client.get(path).json.keys() == {"error"}


def test_show_and_tags_say_what_the_clients_read(client: both.Client) -> None:
    tags = client.get("/api/tags").json["models"]
    assert [one["name"] for one in tags] == [f"{name}:latest" for name in MODELS]
    for one in tags:
        assert one["model"] == one["name"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", one["modified_at"])
        assert type(one["size"]) is int
        assert re.fullmatch(r"[0-9a-f]{64}", one["digest"])
        texts = dict(one["details"])
        assert texts.pop("families") == [texts["family"]]
        assert all(isinstance(text, str) for text in texts.values())
    for field, name in (("model", "embedder"), ("name", "ranker:latest")):
        shown = client.post("/api/show", {field: name}).json
        assert shown["model_info"]["general.architecture"] == "fake"
        assert shown["model_info"]["fake.embedding_length"] == N
        kind = "rerank" if "ranker" in name else "embedding"
        assert shown["capabilities"] == [kind]
    assert client.get("/api/version").json == {"version": es.__version__}
    for one in client.get("/api/ps").json["models"]:
        assert one["expires_at"] > "2100"


def test_a_pull_of_what_is_served_succeeds_and_of_another_does_not(
    client: both.Client,
) -> None:
    body: dict[str, Any]
    for name in ("embedder", "Embedder:latest", "ranker"):
        for body in ({"model": name}, {"name": name, "stream": True}):
            reply = client.post("/api/pull", body)
            assert reply.headers["content-type"] == "application/x-ndjson"
            read = es.json_codec().loads
            lines: list[Any] = [read(line) for line in reply.body.splitlines()]
            assert lines[-1] == {"status": "success"}
            assert all(list(line) == ["status"] for line in lines)
        reply = client.post("/api/pull", {"model": name, "stream": False})
        assert reply.headers["content-type"] == "application/json"
        assert reply.json == {"status": "success"}
    for body in ({"model": "llama3"}, {"model": "llama3", "stream": False}):
        reply = client.post("/api/pull", body)
        assert (reply.status, list(reply.json)) == (404, ["error"])
        assert "model 'llama3' not found" in reply.json["error"]


# --- Cohere's embeddings ---


def by_type(client: both.Client, path: str, **said: Any) -> Any:
    """The reply of a request for them."""
    reply = client.post(path, {"model": "embedder"} | said)
    assert reply.status == 200, reply.body
    return reply.json


TYPES: dict[str, Any] = {
    "float": lambda row: row.tolist(),
    "int8": lambda row: np.clip(np.rint(row * 127), -127, 127).tolist(),
    "uint8": lambda row: np.clip(np.rint(row * 127.5 + 127.5), 0, 255).tolist(),
    "ubinary": lambda row: np.packbits(row > 0).tolist(),
    "binary": lambda row: (np.packbits(row > 0).astype(int) - 128).tolist(),
    "base64": lambda row: base64.b64encode(row.astype("<f4")).decode(),
}


@pytest.mark.parametrize("path", ["/v1/embed", "/v2/embed"])
def test_cohere_s_embeddings_come_by_the_types_that_are_named(
    client: both.Client, path: str
) -> None:
    found = by_type(client, path, texts=["a", "b c"], embedding_types=[*TYPES])
    assert set(found["embeddings"]) == {*TYPES}
    for kind, of in TYPES.items():
        wanted = [of(vector(text)) for text in ("a", "b c")]
        if kind in ("float", "base64"):
            continue
        assert found["embeddings"][kind] == wanted, kind
    assert close(found["embeddings"]["float"], [vector("a"), vector("b c")])
    raw = [base64.b64decode(text) for text in found["embeddings"]["base64"]]
    assert close(
        [np.frombuffer(one, "<f4") for one in raw], [vector("a"), vector("b c")]
    )
    assert found["response_type"] == "embeddings_by_type"
    often = by_type(client, path, texts=["a"], embedding_types=["int8"] * 100_000)
    assert often["embeddings"] == {"int8": [TYPES["int8"](vector("a"))]}
    assert found["texts"] == ["a", "b c"]
    assert found["id"]
    assert found["meta"] == {
        "api_version": {"version": path[2]},
        "billed_units": {"input_tokens": 7},
        "tokens": {"input_tokens": 7},
    }


def test_without_a_type_v1_is_a_list_and_v2_is_float(client: both.Client) -> None:
    old = by_type(client, "/v1/embed", texts=["a"])
    assert old["response_type"] == "embeddings_floats"
    assert close(old["embeddings"], [vector("a")])
    new = by_type(client, "/v2/embed", texts=["a"])
    assert set(new["embeddings"]) == {"float"}
    assert close(new["embeddings"]["float"], [vector("a")])


def test_cohere_s_fields_do_what_they_say(client: both.Client) -> None:
    def floats(**said: Any) -> Any:
        return by_type(client, "/v2/embed", **said)["embeddings"]["float"]

    asked_for = floats(texts=["a"], input_type="search_query")
    assert close(asked_for, [vector("ask, a")])
    assert close(floats(texts=["a"], input_type="clustering"), [vector("a")])
    short = vector("a")[:5] / np.linalg.norm(vector("a")[:5])
    assert close(floats(texts=["a"], output_dimension=5), [short])
    long = " ".join(f"w{n}" for n in range(99))
    words = long.split()
    for truncate in ({}, {"truncate": "END"}):
        assert close(floats(texts=[long], **truncate), [vector(" ".join(words[:30]))])
    start = floats(texts=[long], truncate="START")
    assert close(start, [vector(" ".join(words[-30:]))])
    assert close(floats(texts=["a b c d"], max_tokens=4), [vector("a b")])
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert close(floats(inputs=[{"content": parts}]), [vector("a b")])
    assert close(floats(texts=["a"], priority=5, images=None), [vector("a")])
    for said, part in (
        ({"texts": [long], "truncate": "NONE"}, "texts[0]"),
        ({"texts": []}, "texts"),
        ({"texts": ["a"], "embedding_types": ["float", "x"]}, "embedding_types[1]"),
        (
            {
                "inputs": [{"content": [{"type": "text", "text": long}]}],
                "truncate": "NONE",
            },
            "inputs[0]",
        ),
        ({"texts": ["a"], "output_dimension": 10**6}, "dimension"),
        (
            {"inputs": [{"content": [{"type": "image_url"}]}]},
            "inputs[0].content[0].text",
        ),
        ({"inputs": ["a"]}, "inputs[0]"),
        ({"inputs": [{"content": []}]}, "inputs[0].content"),
        ({"images": ["data:"]}, "texts"),
        ({}, "texts"),
    ):
        reply = client.post("/v2/embed", said)
        assert reply.status == 400, said
        assert part in reply.error["message"]
    told = client.post("/embed", {"texts": ["a"]})
    assert (told.status, "/v2/embed" in told.json["error"]) == (422, True)


# --- vLLM's scores ---


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_pairs_are_scored_in_their_order(ranker: both.Client, path: str) -> None:
    cases: list[tuple[Any, Any, list[tuple[str, str]]]] = [
        ("q", "a", [("q", "a")]),
        ("q", ["a", "b c", "d"], [("q", "a"), ("q", "b c"), ("q", "d")]),
        (["q"], ["a", ""], [("q", "a"), ("q", "")]),
        (["q", "r"], ["a", "b"], [("q", "a"), ("r", "b")]),
        ("q", [{"text": "a"}], [("q", "a")]),
    ]
    for text_1, text_2, pairs in cases:
        reply = ranker.post(path, {"text_1": text_1, "text_2": text_2})
        assert reply.status == 200, reply.body
        rows = reply.json["data"]
        assert [row["index"] for row in rows] == [*range(len(pairs))]
        assert {row["object"] for row in rows} == {"score"}
        wanted = [sigmoid(score(*pair)) for pair in pairs]
        assert close([row["score"] for row in rows], wanted)
        assert reply.json["object"] == "list"
        assert reply.json["usage"]["prompt_tokens"] > 0
    raw = {"text_1": "q", "text_2": "a", "raw_scores": True}
    assert close(ranker.post(path, raw).json["data"][0]["score"], score("q", "a"))
    body = {"text_1": ["q", None, "r"], "text_2": [5, "a", "b"]}
    *bad, good = ranker.post(path, body).json["data"]
    assert [row["error"]["param"] for row in bad] == ["text_2[0]", "text_1[1]"]
    assert close(good["score"], sigmoid(score("r", "b")))
    for text_1, text_2 in ((["q", "r"], "a"), (["q", "r"], ["a", "b", "c"]), ("q", [])):
        reply = ranker.post(path, {"text_1": text_1, "text_2": text_2})
        assert reply.status == 400
        assert "text_" in reply.error["message"]


# --- errors, in four dialects ---

SHAPES = {
    "/v1/embeddings": {"error"},
    "/embed": {"error", "error_type"},
    "/api/v1/embed": {"error", "error_type"},
    "/api/embed": {"error"},
}
STATUSES = {  # of the four routes above, and TEI's word
    "unknown model": (404, 200, 200, 404, ""),
    "too long": (400, 422, 422, 400, "Validation"),
    "wrong type": (400, 422, 422, 400, "Validation"),
    "wrong model": (400, 424, 424, 400, "Backend"),
    "not json": (400, 400, 400, 400, "Validation"),
    "not said to be json": (415, 415, 415, 415, "Validation"),
    "no vector": (500, 424, 500, 500, "Backend"),
    "engine fails": (500, 424, 500, 500, "Backend"),
    "too large": (413, 413, 413, 413, "Validation"),
}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[both.Client]:
    """Of a server that takes 4 KiB at a time."""
    flags = ("--max-body-bytes", "4096")
    with both.asking(tmp_path_factory.mktemp("models"), *flags) as asked_of:
        yield asked_of


def failing(client: both.Client, path: str, why: str) -> kit.Reply:
    """A request that fails for the reason."""
    long = {"input": "w " * 99, "inputs": "w " * 99, "truncate": False}
    model = {"model": "embedder"}
    said: dict[str, Any] = {
        "unknown model": {"input": "a", "inputs": "a", "model": "nobody"},
        "too long": model | long,
        "wrong type": model | {"input": 1, "inputs": 1},
        "wrong model": {"input": "a", "inputs": "a", "model": "ranker"},
        "not json": b"{",
        "not said to be json": b"{}",
        "no vector": model | {"input": "nan", "inputs": "nan"},
        "engine fails": model | {"input": "boom", "inputs": "boom"},
        "too large": model | {"input": "w" * 5000, "inputs": "w"},
    }
    if why == "not said to be json":
        return client.post(path, b"{}", content_type="text/csv")
    reply = client.post(path, said[why])
    assert asked(client, path, "fine").status == 200, "the engine is well"
    return reply


@pytest.mark.parametrize("why", STATUSES)
def test_an_error_has_the_status_and_shape_of_its_dialect(
    narrow: both.Client, why: str
) -> None:
    *statuses, word = STATUSES[why]
    for (path, names), status in zip(SHAPES.items(), statuses, strict=True):
        reply = failing(narrow, path, why)
        assert reply.status == status, (path, reply.body)
        if status == 200:
            continue
        assert set(reply.json) == names, (path, reply.body)
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-should-retry"] == "false"
        if path == "/v1/embeddings":
            assert set(reply.error) == {"message", "type", "param", "code"}
            continue
        assert isinstance(reply.json["error"], str)
        if "error_type" in names:
            assert reply.json["error_type"] == word


PASSING = {  # statuses of the four routes for what passes, and TEI's word
    "loading": (503, 503, 503, 503, "Unhealthy"),
    "full": (503, 429, 429, 503, "Overloaded"),
}


@pytest.mark.parametrize("why", PASSING)
def test_what_passes_is_said_to_pass(why: str) -> None:
    go_on = threading.Event()
    *statuses, word = PASSING[why]

    async def check() -> None:
        engine = kit.FakeEngine()
        async with contextlib.AsyncExitStack() as made:
            is_loading = why == "loading"
            running = await made.enter_async_context(
                kit.running_service(
                    engine,
                    wait_ready=not is_loading,
                    before_load=lambda: kit.wait(go_on) if is_loading else None,
                    queue_size=1,
                )
            )
            made.callback(go_on.set)
            if not is_loading:
                engine.block()
                first = asyncio.create_task(
                    running.ask("POST", "/embed", {"inputs": "z"})
                )
                await asyncio.to_thread(engine.wait_until_computing)
                made.push_async_callback(lambda: first)
                made.callback(engine.release)
            await refused(running, statuses, word)

    async def refused(
        running: kit.RunningService, statuses: Sequence[int], word: str
    ) -> None:
        for (path, names), status in zip(SHAPES.items(), statuses, strict=True):
            body = {"model": "fake", "input": "a", "inputs": "a"}
            reply = await running.ask("POST", path, body)
            assert reply.status == status, (path, reply.body)
            assert set(reply.json) == names
            assert reply.json.get("error_type", word) == word
            assert 1 <= int(reply.headers["retry-after"]) <= 60
            assert reply.headers["x-should-retry"] == "true"

    asyncio.run(check())


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/embed", {"error", "error_type"}),
        ("/info", {"error", "error_type"}),
        ("/api/tags", {"error"}),
        ("/v1/embeddings", {"error"}),
        ("/nowhere", {"error"}),
    ],
)
def test_who_is_not_let_in_is_told_so_in_the_dialect_of_the_path(
    tmp_path: Path, path: str, names: set[str]
) -> None:
    with both.asking(tmp_path, environment_key="secret-key") as asked_of:
        reply = asked_of.ask("GET", path)
        assert reply.status in (401, 404, 405)
        assert set(reply.json) == names
        fields = {"authorization": "Bearer secret-key"}
        right = asked_of.ask("POST", "/embed", {"inputs": "a"}, fields)
        assert right.status == 200
        wrong = asked_of.ask("POST", "/embed", {"inputs": "a"}, {"x-api-key": "no"})
        assert (wrong.status, set(wrong.json)) == (401, {"error", "error_type"})
