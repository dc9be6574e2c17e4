"""What a hostile body, name or number does: nothing, in every dialect.

Every request here is answered with a status below 500 and a short sentence, and the
server answers the next one.
"""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import embellama_server as es
from tests import both, kit

WORKING = [
    route
    for route in es.ROUTES
    if route.method == "POST" and route.form is not None and route.access == "key"
]
PATHS = [route.path for route in WORKING]
# Of routes that are one under several names, the first: for what is sent very often.
ONE_EACH = [
    *{(r.form, r.handler, r.dialect.name): r.path for r in WORKING[::-1]}.values()
]
LONGEST_ERROR = 600  # bytes: whatever was sent, it is not sent back


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[both.Client]:
    """Of a server that takes token ids and has a prompt."""
    folder = tmp_path_factory.mktemp("models")
    flags = ("--accept-token-ids", "--prompt", "query=find ")
    with both.asking(folder, *flags, has_chatter=True) as asked:
        yield asked
        assert asked.get("/ready").status == 200
        assert bugs(asked) == 0


def bugs(client: both.Client) -> float:
    """How many requests met one, of ours."""
    text = client.get("/metrics").body.decode()
    found = re.search(r'internal_error"} ([0-9.]+)', text)
    return float(found[1]) if found else 0


def body(path: str, inputs: Any, **more: Any) -> dict[str, Any]:
    """A request of a route, with inputs where it has some."""
    texts = inputs if isinstance(inputs, list) else [inputs]
    if path in ("/chat", "/api/generate"):
        return {"prompt": texts[0], "model": "chatter", **more}
    said = [{"role": "user", "content": text} for text in texts]
    if "responses" in path:
        return {"input": said, "model": "chatter", **more}
    if "chat" in path or path == "/apply-template":
        return {"messages": said, "model": "chatter", **more}
    if kit.generates(path):
        return {"prompt": inputs, "model": "chatter", **more}
    if "score" in path:
        return {"text_1": "q", "text_2": texts, "model": "ranker", **more}
    if path in ("/v1/embed", "/v2/embed"):
        return {"texts": texts, "model": "embedder", **more}
    if kit.ranks(path):
        return {"query": "q", "documents": texts, "model": "ranker", **more}
    if path == "/similarity":
        sentences = {"source_sentence": "a", "sentences": texts}
        return {"inputs": sentences, "model": "embedder", **more}
    if path == "/detokenize":
        return {"tokens": [[7] for _ in texts], "model": "embedder", **more}
    if path == "/decode":
        return {"ids": [[7] for _ in texts], "model": "embedder", **more}
    if path == "/api/embeddings":
        return {"model": "embedder", "prompt": texts[0], **more}
    name = "input" if path in ("/v1/embeddings", "/embeddings", "/api/embed") else ""
    return {name or "inputs": inputs, "model": "embedder", **more}


def is_refused(reply: kit.Reply) -> bool:
    """With a short sentence, and nothing in the headers that was sent."""
    assert reply.status < 500, reply.body[:300]
    if reply.status == 200:
        return False
    assert len(reply.body) <= LONGEST_ERROR, (len(reply.body), reply.body[:200])
    assert reply.headers["content-type"] == "application/json"
    assert "error" in reply.json
    return True


NAMING = ("/api/show", "/api/pull")  # a model, and nothing else
ANY_NAME = [r.path for r in WORKING if r.dialect in (es.TEI, es.SEED)]
TALKS = [path for path in PATHS if "chat" in path or "responses" in path]
TALKS += ["/api/generate", "/apply-template", "/detokenize"]
TAKES_ONE = (*NAMING, "/api/embeddings", *TALKS)
TAKES_MANY = [path for path in PATHS if path not in TAKES_ONE]


def max_of(path: str) -> int:
    """How many inputs a request may have."""
    return {"/similarity": 8191}.get(path, 10_000 if kit.ranks(path) else 8192)


@pytest.mark.parametrize("path", TAKES_MANY)
def test_as_many_equal_inputs_as_may_be_are_an_answer_each(
    client: both.Client, path: str
) -> None:
    many = ["same"] * max_of(path)
    assert client.post(path, body(path, many)).status == 200
    assert is_refused(client.post(path, body(path, [*many, "x"])))


@pytest.mark.parametrize("path", TAKES_MANY)
def test_5461_inputs_in_one_request_are_taken(client: both.Client, path: str) -> None:
    """Chroma's limit, which it sends at once."""
    many = [f"w{n}" for n in range(5461)]
    assert client.post(path, body(path, many)).status == 200


LONG_TEXTS = {
    "words": "w " * 200_000,
    "one word": "w" * 20_000,
    "NUL": "\0" * 1000,
    "line ends": "\r\n" * 10_000,
    "accents": "e" + "\u0301" * 100,
    "right to left": "\u202e" * 100,
    "format": "{text}{0}%s$PATH" * 100,
}


@pytest.mark.parametrize(
    "path", [path for path in PATHS if path not in ("/tokenize", "/api/show")]
)
@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
def test_a_text_may_be_as_odd_and_long_as_a_body(
    client: both.Client, path: str, text: str
) -> None:
    is_refused(client.post(path, body(path, text)))
    if path == "/v1/rerank":
        query = {"query": text, "documents": ["b"] * 100, "model": "ranker"}
        is_refused(client.post(path, query))
        is_refused(client.post(path, query | {"truncate": True}))


ODD_NAMES = {
    "1 MB": "m" * 1_000_000,
    "1 MB of Unicode": "\U0001f999" * 250_000,
    "quotes": "'\"" * 500,
    "header injection": "embedder\r\nx-injected: yes\r\n\r\n",
    "NUL": "embedder\0",
    "line separators": "\u2028\u2029\x85" * 100,
    "empty": "",
    "space": " ",
    "version": "embedder@" + "9" * 1000,
    "minus": "embedder@-1",
    "plus": "embedder@+1",
    "digits of others": "embedder@\u0661",
    "twice latest": "embedder:latest:latest",
    "only latest": ":latest",
    "path": "../../etc/passwd",
    "case": "EMBEDDER",
    "format": "{asked!r}%s%n",
}


@pytest.mark.parametrize("path", ONE_EACH)
@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_an_odd_name_of_a_model_is_a_model_that_is_not_there(
    client: both.Client, path: str, name: str
) -> None:
    reply = client.post(path, body(path, "a") | {"model": name})
    means_one = name.upper() == "EMBEDDER" or (path in ANY_NAME and len(name) <= 512)
    if (means_one or not name) and path not in NAMING:
        is_other = kit.model_of(path) != "fake" and path not in ANY_NAME
        wrong = name and means_one and is_other
        assert reply.status < 500
        assert is_refused(reply) or not wrong
    elif not means_one:
        assert is_refused(reply)
        assert reply.status == (404 if name else 400)
    assert "x-injected" not in reply.headers


@pytest.mark.parametrize("path", ONE_EACH)
@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_an_odd_name_of_a_prompt_or_user_does_no_harm(
    client: both.Client, path: str, name: str
) -> None:
    reply = client.post(path, body(path, "a", prompt_name=name, user=name))
    route = next(route for route in WORKING if route.path == path)
    fields = es.schema_of(route.form)["properties"]  # type: ignore[arg-type]
    is_long = len(name) > 512 and "user" in fields
    assert is_refused(reply) == ("prompt_name" in fields or is_long)
    assert is_refused(client.post(path, body(path, "a", user=name))) is is_long


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_a_server_that_answers_any_model_echoes_its_name_in_the_body_only(
    any_model: both.Client, name: str
) -> None:
    for path, key in (("/v1/embeddings", "input"), ("/api/embed", "input")):
        reply = any_model.post(path, {"model": name, key: "a"})
        assert reply.status == (200 if len(name) <= 512 else 404)
        if reply.status == 404:
            continue
        assert reply.json["model"] in (name, name or "embedder")
        assert reply.headers["x-embellama-model"] == "embedder@1"
        assert "x-injected" not in reply.headers


@pytest.fixture(scope="module")
def any_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[both.Client]:
    """Of a server with --any-model."""
    with both.asking(tmp_path_factory.mktemp("models"), "--any-model") as asked:
        yield asked


@pytest.mark.parametrize("name", ["m\xf6del", "a\r\nx-injected: yes", "\U0001f999"])
def test_a_model_s_own_name_cannot_break_the_head(tmp_path: Path, name: str) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(both.sound_gguf())
    flags = ("--model-path", str(file), "--model-name", name)
    with kit.started(*flags, module=both.MODULE) as server:
        client = both.Client(server.url)
        for path in ("/v1/embeddings", "/embed", "/api/embed"):
            reply = client.post(path, {"input": "a", "inputs": "a", "model": name})
            assert reply.status == 200
            assert "x-injected" not in reply.headers
            assert reply.headers["x-embellama-model"].isascii()
        assert client.get("/metrics").status == 200
        client.close()


@pytest.mark.parametrize("path", ONE_EACH)
@pytest.mark.parametrize(
    "number",
    [
        *("-1", "0", "-0", "1e3", "1E400", "-1e400", "0.1e-400", "NaN", "Infinity"),
        *("2147483647", "2147483648", "4294967296", "9007199254740993"),
        *("9223372036854775807", "9223372036854775808", "18446744073709551615"),
        *("18446744073709551616", "9" * 400, "9" * 5000, "0x10", "1_000", "+1", "01"),
        "0." + "1" * 5000,
    ],
    ids=lambda text: text[:20],
)
def test_a_number_may_be_any_size_anywhere(
    client: both.Client, path: str, number: str
) -> None:
    named: tuple[str, ...]
    named = ("dimensions", "top_n", "ids", "inputs", "input", "priority", "model")
    if kit.generates(path):
        named = ("temperature", "seed", "n", "stop", "logit_bias", "logprobs", "model")
    for name in (*named, "truncate", "parameters", "unknown"):
        sent = body(path, "a") | {name: "HERE"}
        for as_list in (number, f"[{number}]", f"[[{number}]]"):
            raw = json.dumps(sent).replace('"HERE"', as_list).encode()
            is_refused(client.post(path, raw))


def test_nesting_is_as_deep_as_json_allows(tmp_path: Path) -> None:
    with both.asking(tmp_path) as asked:
        for depth in range(980, 1024):
            deep = b"[" * depth + b"1" + b"]" * depth
            is_refused(asked.post("/embed", b'{"inputs":%b}' % deep))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("depth", [100, 900, 1024, 1025])
def test_nesting_is_as_deep_as_it_likes(
    client: both.Client, path: str, depth: int
) -> None:
    for opened, closed in (("[", "]"), ('{"a":', "}")):
        deep = opened * depth + "1" + closed * depth
        names: tuple[str, ...]
        names = ("inputs", "input", "unknown", "documents", "ids", "model")
        if kit.generates(path):
            names = ("messages", "prompt", "tools", "chat_template_kwargs", "stop")
        if "responses" in path:
            names = ("input", "instructions", "text", "tool_choice", *names)
        for name in names:
            raw = json.dumps(body(path, "a") | {name: "HERE"})
            is_refused(client.post(path, raw.replace('"HERE"', deep).encode()))
        if path.endswith("chat/completions"):
            part = {"type": "HERE", "text": "HERE"}
            said = [{"role": "user", "content": [part]}]
            for field in ("role", "content", "name"):
                said.append({"role": "user", "content": "x", field: "HERE"})
            for one in said:
                raw = json.dumps(body(path, "a") | {"messages": [one]})
                raw = raw.replace('"HERE"', deep)
                assert is_refused(client.post(path, raw.encode()))


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_unicode_is_refused(client: both.Client, path: str) -> None:
    for bad in (b'"\xed\xa0\x80"', b'"\xff"'):
        for name in ("model", "inputs", "input", "documents", "unknown"):
            sent = json.dumps(body(path, "a") | {name: "HERE"}).encode()
            reply = client.post(path, sent.replace(b'"HERE"', bad))
            assert is_refused(reply)


@pytest.mark.parametrize("path", PATHS)
def test_of_a_field_that_is_there_twice_the_last_counts(
    client: both.Client, path: str
) -> None:
    sent = json.dumps(body(path, "a"))
    twice = '{"model":"nobody",' + sent[1:]
    assert client.post(path, twice.encode()).status == 200
    other_way = sent[:-1] + ',"model":"nobody"}'
    expected = 200 if path in ANY_NAME else 404
    assert client.post(path, other_way.encode()).status == expected


@pytest.mark.parametrize("path", PATHS)
def test_100_000_unknown_fields_are_ignored(client: both.Client, path: str) -> None:
    many = {f"f{n}": n for n in range(100_000)}
    assert client.post(path, many | body(path, "a")).status == 200


IDS = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([0, 1, 2, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32, 2**63]),
)
ON_ONE_SERVER = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@ON_ONE_SERVER
@given(st.lists(st.lists(IDS, min_size=1, max_size=4), min_size=1, max_size=3))
def test_token_ids_of_any_size_are_answered(
    client: both.Client, ids: list[list[int]]
) -> None:
    is_fine = all(0 <= token < 2**30 for row in ids for token in row)
    for path in ("/v1/embeddings", "/embed", "/embed_all", "/api/v1/embed", "/"):
        name = "input" if path == "/v1/embeddings" else "inputs"
        reply = client.post(path, {name: ids})
        assert is_refused(reply) is not is_fine
    assert is_refused(client.post("/decode", {"ids": ids})) is not is_fine
    assert is_refused(client.post("/tokenize", {"inputs": ids}))
    assert is_refused(client.post("/api/embed", {"model": "embedder", "input": ids}))


def test_token_ids_are_refused_unless_they_are_allowed(tmp_path: Path) -> None:
    with both.asking(tmp_path) as asked:
        for path in ("/v1/embeddings", "/embed", "/embed_all", "/api/v1/embed", "/"):
            for ids in ([7], [[7]], ["a", [7]]):
                reply = asked.post(path, {"input": ids, "inputs": ids})
                assert reply.status == (400 if path == "/v1/embeddings" else 422)
                assert b"check_embedding_ctx_length=False" in reply.body
        assert asked.post("/decode", {"ids": [7]}).status == 200


JSON = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1)),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.sampled_from(["a", "ranker", "embedder", "query", "left", "base64"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["text", "a", "sentences"]), inner, max_size=3),
    ),
    max_leaves=8,
)
NAMES = sorted(
    {name for route in WORKING for name in es.schema_of(route.form)["properties"]}  # type: ignore[arg-type]
)


@ON_ONE_SERVER
@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(NAMES), JSON))
def test_any_json_is_answered(
    client: both.Client, path: str, sent: dict[str, Any]
) -> None:
    is_refused(client.post(path, sent))


@ON_ONE_SERVER
@given(st.sampled_from(PATHS), st.binary(max_size=60))
def test_any_bytes_are_answered(client: both.Client, path: str, raw: bytes) -> None:
    assert is_refused(client.post(path, raw))


@pytest.mark.parametrize("path", PATHS)
def test_many_at_once_get_each_their_own_answer(client: both.Client, path: str) -> None:
    """Of all sizes and for all models, mixed."""
    url = f"http://{client.host}:{client.port}"

    def ask(number: int) -> tuple[int, bytes]:
        asked = both.Client(url)
        try:
            reply = asked.post(path, body(path, [f"t{number % 7}"] * (number % 3 + 1)))
            return reply.status, reply.body
        finally:
            asked.close()

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, range(42)))
    assert {status for status, _ in replies} == {200}
    if path in ("/embed", "/", "/embed_all", "/similarity"):
        assert replies[:21] == replies[21:]


def test_a_token_without_a_vector_is_an_error_not_null(client: both.Client) -> None:
    reply = client.post("/embed_all", {"inputs": "fine nan fine"})
    assert reply.status == 424


def test_a_vector_that_begins_with_zeros_cannot_be_shortened_to_them() -> None:
    row = np.array([0, 0, 1], np.float32)
    try:
        short = es.unit_vector(row, 2)
    except es.ApiError:
        return
    assert np.isfinite(short).all()


def test_tokenize_is_bounded(client: both.Client) -> None:
    """100 times what the model reads is no use to anybody, and 30 MB a gigabyte."""
    assert is_refused(client.post("/tokenize", {"inputs": "w " * 200_000}))


def test_the_server_s_own_memory_and_threads_are_as_before(
    client: both.Client,
) -> None:
    """After all of the above."""
    before = client.post("/v1/embeddings", {"input": "a", "encoding_format": "base64"})
    raw = base64.b64decode(before.json["data"][0]["embedding"])
    wanted = kit.fake_vector([1, kit.fake_id("a"), 2], both.N_EMBD)
    assert np.allclose(np.frombuffer(raw, "<f4"), wanted, atol=1e-6)
    assert client.get("/health").status == 200


def test_without_orjson_the_answers_are_the_same() -> None:
    """The standard library's reader has other limits: what it lets in is refused too."""
    script = (
        "import sys, embellama_server as es\n"
        "es.why_unusable = lambda row: 'not here' if row.module == 'orjson' else ''\n"
        "from tests import both\n"
        "sys.exit(both.program(sys.argv[1:]))\n"
    )
    odd = [
        *(b"[" * 1000, b'{"a":' * 1000, b'{"inputs":NaN}', b'{"inputs":1e999}'),
        b'{"inputs":"a","dimensions":' + b"9" * 5000 + b"}",
        *(b"\xff", b""),
        b'{"inputs":"a","x":' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"inputs":["a",' + b"9" * 30 + b"]}",
        b'{"inputs":[' + b"9" * 30 + b"]}",
        b'{"inputs":[[' + b"9" * 300 + b"]]}",
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        both.asking(Path(folder), "--accept-token-ids", module=("-c", script)) as asked,
    ):
        for raw in odd:
            for path in ("/embed", "/v1/embeddings", "/tokenize", "/decode"):
                assert is_refused(asked.post(path, raw)), raw[:60]
        assert asked.post("/embed", {"inputs": "a"}).status == 200
