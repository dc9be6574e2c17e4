"""Rerankers and causal models, against llama.cpp asked directly.

What is compared with is the reference below: a text's tokens as llama.cpp frames them,
a pair's as llama-server does (format_prompt_rerank), one call of one sequence each. It
shares no line with the server. The models are random and tiny.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest

import embellama_server as es
from tests import both, kit, models
from tests.chat_models import tiny_gemma
from tests.test_engine import loaded, refusal, run_python
from tests.words import WORDS

SCRIPT = str(kit.ROOT / "embellama_server.py")
LAST, RANK = 3, 4  # LLAMA_POOLING_TYPE_*

# --- the reference: llama.cpp, asked directly ---


@functools.cache
def llama() -> Any:
    """Its functions, hushed until an engine takes the log over."""
    library = es._llama_cpp()  # its package would leave files open
    hushed = library.llama_log_callback(lambda *_: None)
    library.llama_log_set(hushed, ctypes.c_void_p(0))
    library.llama_backend_init()
    never_freed.append(hushed)
    return library


never_freed: list[object] = []


@functools.cache
def opened(path: Path) -> Any:
    """A model, kept until the end of the process."""
    params = llama().llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = not es.why_no_tiles(llama()._lib._name)  # as an engine has
    model = llama().llama_model_load_from_file(os.fsencode(path), params)
    assert model, f"llama.cpp cannot load {path}"
    return model


def tokenized(path: Path, text: str, *, special: bool, parse: bool) -> list[int]:
    """What llama_tokenize() gives."""
    raw = text.encode()
    room = len(raw) + 16
    ids = (ctypes.c_int32 * room)()
    vocab = llama().llama_model_get_vocab(opened(path))
    found = llama().llama_tokenize(vocab, raw, len(raw), ids, room, special, parse)
    assert found >= 0
    return ids[:found]


def computed(
    path: Path, ids: Sequence[int], pooling: int, numbers: int, *, flash: bool
) -> Any:
    """What a context of its own gives for one sequence, that many numbers."""
    params = llama().llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(ids)
    params.n_threads = params.n_threads_batch = 1
    params.embeddings = True
    params.pooling_type = pooling
    params.flash_attn_type = int(flash)
    context = llama().llama_init_from_model(opened(path), params)
    assert context
    batch = llama().llama_batch_init(len(ids), 0, 1)
    # What has no memory is an encoder; on a decoder llama_encode() is a segmentation
    # fault. It reads its last token by itself: flash attention sums one query's values
    # in another order than those of 64 (test_passes.py has all tokens in one call).
    is_encoder = llama().llama_get_memory(context) is None
    call = llama().llama_encode if is_encoder else llama().llama_decode
    last = len(ids) - 1
    for places in (
        (range(last + 1),) if is_encoder else (range(last), range(last, last + 1))
    ):
        for row, place in enumerate(places):
            batch.token[row], batch.pos[row] = ids[place], place
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, 0
            batch.logits[row] = 1
        batch.n_tokens = len(places)
        if places:
            assert call(context, batch) == 0
    found = llama().llama_get_embeddings_seq(context, 0)
    values = np.ctypeslib.as_array(found, (numbers,)).copy()
    llama().llama_batch_free(batch)
    llama().llama_free(context)
    return values


def direct_tokens(path: Path, text: str) -> list[int]:
    """A text's, the special ones included."""
    return tokenized(path, text, special=True, parse=True)


def direct_vector_of(path: Path, ids: Sequence[int]) -> Any:
    """Of token ids; Euclidean length 1."""
    width = llama().llama_model_n_embd(opened(path))
    values = computed(path, ids, LAST, width, flash=True).astype(np.float64)
    return (values / np.sqrt(values @ values)).astype(np.float32)


def direct_vector(path: Path, text: str) -> Any:
    """Of a text."""
    return direct_vector_of(path, direct_tokens(path, text))


def template_of(path: Path) -> str:
    """How the model wants to be asked; empty if it does not say."""
    found = llama().llama_model_chat_template(opened(path), b"rerank")
    return (found or b"").decode()


def pair_tokens(path: Path, query: str, document: str, most: int = 10**9) -> list[int]:
    """A pair's; of more than ``most`` the document's last ones are left out."""
    if template := template_of(path):
        before, after = template.split("{document}")
        whole = before.replace("{query}", query) + document + after
        ids = tokenized(path, whole, special=False, parse=True)
        end = tokenized(path, after, special=False, parse=True)
        assert ids[-len(end) :] == end
    else:
        front, end = pair_frame(path, query)
        ids = [*front, *tokenized(path, document, special=False, parse=False), *end]
    if len(ids) <= most:
        return ids
    return [*ids[: most - len(end)], *end]


def pair_frame(path: Path, query: str) -> tuple[list[int], list[int]]:
    """What stands before a document and after it."""
    vocab = llama().llama_model_get_vocab(opened(path))
    none = llama().LLAMA_TOKEN_NULL
    sep, eos = llama().llama_vocab_sep(vocab), llama().llama_vocab_eos(vocab)
    begin = [llama().llama_vocab_bos(vocab)] * llama().llama_vocab_get_add_bos(vocab)
    end = [sep if eos == none else eos] * llama().llama_vocab_get_add_eos(vocab)
    middle = [*end, *[sep] * llama().llama_vocab_get_add_sep(vocab)]
    return [*begin, *tokenized(path, query, special=False, parse=False), *middle], end


def direct_score_of(path: Path, ids: Sequence[int], *, flash: bool = False) -> float:
    """Of a pair's ids, as the model gives it: the first of its labels'."""
    labels = llama().llama_model_n_cls_out(opened(path))
    return float(computed(path, ids, RANK, labels, flash=flash)[0])


def direct_score(
    path: Path, query: str, document: str, *, flash: bool = False
) -> float:
    """Of a query and a document, as the model gives it."""
    return direct_score_of(path, pair_tokens(path, query, document), flash=flash)


# --- the models ---

QUERY = "what the man said about his work"
DOCUMENTS = (
    "he said that it was not like any other work",
    "one would go down to the state",
    "no time",
    "all of them have been there before with her and they know the way back",
    "a new year",
)

CAUSAL: dict[str, Callable[[Path], Path]] = {
    "end": models.tiny_causal,
    "begin and end": functools.partial(models.tiny_causal, begin=True),
    "begin": functools.partial(models.tiny_causal, begin=True, end=False),
    "bare": functools.partial(models.tiny_causal, end=False),
    "pieces, end": functools.partial(models.tiny_causal, byte_pairs=False),
    "pieces, both": functools.partial(models.tiny_causal, byte_pairs=False, begin=True),
}
# With two types of tokens llama.cpp's own scores are not the model's: test_segments.py.
_CROSS = functools.partial(models.tiny_cross_encoder, types=1)
RANKERS: dict[str, Callable[[Path], Path]] = {
    "two layers": _CROSS,
    "one layer": functools.partial(_CROSS, head=("cls.output",)),
    "three labels": functools.partial(_CROSS, labels=("a", "b", "c")),
    "causal": models.tiny_causal_reranker,
    "causal, no template": functools.partial(models.tiny_causal_reranker, template=""),
}
EMBEDDERS = {"end": CAUSAL["end"], "bert": models.tiny_bert}


class Farm:
    """Models, and a server for each that is asked for; see the fixture."""

    def __init__(self, folder: Path, servers: contextlib.ExitStack) -> None:
        self._folder = folder
        self._servers = servers
        self._paths: dict[str, Path] = {}
        self._urls: dict[str, str] = {}

    def path(self, name: str) -> Path:
        """Where a model is."""
        if name not in self._paths:
            folder = self._folder / str(len(self._paths))
            folder.mkdir()
            self._paths[name] = (CAUSAL | RANKERS | EMBEDDERS)[name](folder)
        return self._paths[name]

    def ask(self, name: str, route: str, **body: object) -> tuple[int, Any]:
        """The status and the JSON that a model's server answers."""
        request = Request(
            self._url(name) + route,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urlopen(request, timeout=kit.DEADLINE_S) as reply:
                return reply.status, json.load(reply)
        except HTTPError as error:
            with error:
                return error.code, json.load(error)

    def results(self, name: str, **body: object) -> list[dict[str, Any]]:
        """Of a reranking that succeeds."""
        given: dict[str, object] = {"query": QUERY, "documents": DOCUMENTS}
        status, reply = self.ask(name, "/v1/rerank", **(given | body))
        assert status == 200, reply
        found: list[dict[str, Any]] = reply["results"]
        return found

    def _url(self, name: str) -> str:
        if name not in self._urls:
            # Without a cache, as it may hold a score of a call that others shared.
            flags = ["--workers", "1", "--model-path", str(self.path(name))]
            flags += ["--cache-mb", "0"]
            if name in CAUSAL:
                flags.append("--auto-truncate")
            running = kit.started(*flags, module=(SCRIPT,))
            self._urls[name] = self._servers.enter_context(running).url
        return self._urls[name]


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    with contextlib.ExitStack() as servers:
        yield Farm(tmp_path_factory.mktemp("farm"), servers)


# --- the models themselves ---

ALONE = """
from pathlib import Path
from tests import test_tiny_models as tiny
name, folder = sys.argv[1], Path(sys.argv[2])
path = (tiny.CAUSAL | tiny.RANKERS)[name](folder)
assert path.stat().st_size < 200_000
first = path.read_bytes()
assert (tiny.CAUSAL | tiny.RANKERS)[name](folder).read_bytes() == first
if name in tiny.RANKERS:
    scores = [tiny.direct_score(path, tiny.QUERY, text) for text in tiny.DOCUMENTS]
    assert all(map(tiny.math.isfinite, scores))
    apart = tiny.np.diff(sorted(scores)).min()
    assert apart > 0.004, scores
else:
    vectors = tiny.np.array([tiny.direct_vector(path, text) for text in tiny.DOCUMENTS])
    assert tiny.np.isfinite(vectors).all()
    assert (vectors @ vectors.T - tiny.np.eye(len(vectors))).max() < 0.99
"""


@pytest.mark.parametrize("name", [*CAUSAL, *RANKERS])
def test_a_random_model_loads_and_tells_texts_apart(tmp_path: Path, name: str) -> None:
    run_python(ALONE, name, tmp_path)  # elsewhere: native code may end the process


# --- the engine, with causal models ---


@pytest.mark.parametrize("name", CAUSAL)
def test_a_texts_special_tokens_are_those_that_llama_cpp_puts_there(
    farm: Farm, name: str
) -> None:
    path = farm.path(name)
    with loaded(path) as engine:
        for text in (*DOCUMENTS, "a", "Zyx, 42: \u00e9\u4e16!", " the  man "):
            ids = es.with_special_tokens(engine.tokenizer.encode(text), engine.card)
            assert ids == direct_tokens(path, text)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_models_vectors_are_llama_cpps_own(farm: Farm, name: str) -> None:
    path = farm.path(name)
    expected = np.array([direct_vector(path, text) for text in DOCUMENTS])
    inputs = [np.array(direct_tokens(path, text), np.int32) for text in DOCUMENTS]
    with loaded(path) as engine:
        assert (engine.card.architecture, engine.card.pooling) == ("qwen3", "last")
        context = engine.new_context()
        alone = kit.units(context.embed([ids])[0] for ids in inputs)
        np.testing.assert_allclose(alone, expected, atol=1e-5)
        compared = 0
        for one, other in itertools.permutations(range(len(inputs)), 2):
            batch = [inputs[one], inputs[other]]
            if sum(map(len, batch)) < es.FLASH_TILE_TOKENS:
                vectors = kit.units(context.embed(batch))
                # Two last tokens are a matrix, one is a vector: another order again.
                np.testing.assert_allclose(vectors, expected[[one, other]], atol=1e-4)
                compared += 1
        assert compared > 5
        # From 64 tokens on flash attention computes in another order.
        together = kit.units(context.embed(inputs))
        assert np.einsum("ij,ij->i", together, expected).min() > 0.9999
        context.close()


@pytest.mark.parametrize("name", ["end", "begin and end", "pieces, both"])
def test_a_text_that_is_cut_keeps_the_token_at_its_end(farm: Farm, name: str) -> None:
    path = farm.path(name)
    long = " ".join(DOCUMENTS * 9)
    ids = direct_tokens(path, long)
    most = llama().llama_model_n_ctx_train(opened(path))
    assert len(ids) > most
    cut = [*ids[: most - 1], ids[-1]]
    status, reply = farm.ask(name, "/v1/embeddings", input=long)
    assert status == 200, reply
    assert reply["usage"]["prompt_tokens"] == most
    vector = np.array(reply["data"][0]["embedding"], np.float32)
    np.testing.assert_allclose(vector, direct_vector_of(path, cut), atol=1e-5)
    # Without this, a model whose end makes no difference would do.
    assert vector @ direct_vector_of(path, ids[:most]) < 0.999


@pytest.mark.parametrize("name", ["end", "bare"])
def test_an_end_token_that_is_asked_for_ends_each_text_once(
    farm: Farm, name: str
) -> None:
    long = " ".join(DOCUMENTS * 9)
    request = es.EmbedRequest(inputs=["no time", long], truncates=True)
    with loaded(farm.path(name), end_token="<|endoftext|>") as engine:
        read = es.Reader(engine, request).read()
        short, cut = (found[0] for found in read if isinstance(found, tuple))
        assert not engine.card.lacks_end
    assert list(short) == direct_tokens(farm.path("end"), "no time")
    assert len(cut) == 64
    assert list(cut) == [*direct_tokens(farm.path("end"), long)[:63], short[-1]]


def test_an_end_token_is_one_token(farm: Farm) -> None:
    said = refusal(farm.path("bare"), end_token="</s>")
    assert "end_token = '</s>' is 4 tokens of this model and must be one" in said


# --- scores ---

# Many pairs share a call, and flash attention computes 64 tokens or more in another
# order than fewer: that far apart are the scores of random weights then.
SHARED = 4e-3


def assert_direct(score: float, path: Path, ids: Sequence[int]) -> None:
    """A pair alone in its call: llama.cpp's number, with flash attention or without."""
    both = [direct_score_of(path, ids, flash=flash) for flash in (False, True)]
    assert min(abs(score - direct) for direct in both) < 1e-4, (score, both)


@pytest.mark.parametrize("name", RANKERS)
def test_a_raw_score_is_llama_cpps_own(farm: Farm, name: str) -> None:
    path = farm.path(name)
    for document in DOCUMENTS:
        (found,) = farm.results(name, documents=[document], raw_scores=True)
        ids = pair_tokens(path, QUERY, document)
        assert_direct(found["relevance_score"], path, ids)


@pytest.mark.parametrize("name", RANKERS)
def test_documents_come_in_the_order_of_their_scores(farm: Farm, name: str) -> None:
    path = farm.path(name)
    direct = [direct_score(path, QUERY, document) for document in DOCUMENTS]
    found = farm.results(name, raw_scores=True)
    scores = [result["relevance_score"] for result in found]
    assert scores == sorted(scores, reverse=True)
    order = [result["index"] for result in found]
    assert sorted(order) == list(range(len(DOCUMENTS)))
    assert np.abs(np.array(direct)[order] - scores).max() < SHARED
    for result in found:
        assert set(result) == {"index", "relevance_score"}


@pytest.mark.parametrize("name", RANKERS)
def test_relevance_is_between_0_and_1(farm: Farm, name: str) -> None:
    # What qwen3 gives is a probability already: llama.cpp puts a softmax on it.
    is_probability = name.startswith("causal")
    raw = {
        r["index"]: r["relevance_score"] for r in farm.results(name, raw_scores=True)
    }
    for result in farm.results(name):
        number = raw[result["index"]]
        wanted = number if is_probability else 1 / (1 + math.exp(-number))
        assert result["relevance_score"] == pytest.approx(wanted, abs=1e-6)


def test_the_best_few_are_what_is_asked_for(farm: Farm) -> None:
    every = farm.results("two layers")
    for most in (1, 2, len(DOCUMENTS), 99):
        assert farm.results("two layers", top_n=most) == every[:most]


def test_a_document_is_returned_when_that_is_asked_for(farm: Farm) -> None:
    given = [DOCUMENTS[0], {"text": DOCUMENTS[1]}, *DOCUMENTS[2:]]
    found = farm.results("two layers", documents=given, return_documents=True)
    for result in found:
        assert result["document"] == {"text": DOCUMENTS[result["index"]]}
    for result in found:
        del result["document"]
    assert found == farm.results("two layers")


@pytest.mark.parametrize("name", RANKERS)
def test_tokens_of_all_pairs_are_counted(farm: Farm, name: str) -> None:
    path = farm.path(name)
    body = {"query": QUERY, "documents": DOCUMENTS}
    _, reply = farm.ask(name, "/v1/rerank", **body)
    counts = [len(pair_tokens(path, QUERY, document)) for document in DOCUMENTS]
    usage = {"prompt_tokens": sum(counts), "total_tokens": sum(counts)}
    assert reply["usage"] == usage
    assert reply["meta"]["billed_units"] == {"search_units": 1}


@pytest.mark.parametrize("route", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_reranking_is_the_same_wherever_it_is_asked_for(farm: Farm, route: str) -> None:
    body = {"query": QUERY, "documents": DOCUMENTS}
    status, reply = farm.ask("two layers", route, **body)
    assert status == 200
    assert reply["results"] == farm.results("two layers")


@pytest.mark.parametrize("raw", [True, False])
def test_texts_are_answered_in_an_array(farm: Farm, raw: bool) -> None:
    body = {"query": QUERY, "texts": DOCUMENTS, "raw_scores": raw}
    status, reply = farm.ask("two layers", "/rerank", **body, return_text=True)
    assert status == 200
    wanted = [
        {
            "index": result["index"],
            "text": DOCUMENTS[result["index"]],
            "score": result["relevance_score"],
        }
        for result in farm.results("two layers", raw_scores=raw)
    ]
    assert reply == wanted
    _, bare = farm.ask("two layers", "/rerank", **body)
    assert bare == [{"index": w["index"], "score": w["score"]} for w in wanted]


# --- how a pair is put ---


def test_a_template_in_the_file_is_how_the_model_is_asked(farm: Farm) -> None:
    path, other = farm.path("causal"), farm.path("causal, no template")
    (found,) = farm.results("causal", documents=DOCUMENTS[:1], raw_scores=True)
    assert_direct(
        found["relevance_score"], path, pair_tokens(path, QUERY, DOCUMENTS[0])
    )
    without = direct_score(other, QUERY, DOCUMENTS[0], flash=True)
    assert abs(found["relevance_score"] - without) > 0.01


@pytest.mark.parametrize(
    ("query", "document"),
    [
        ("the man", "a {query} of {document}"),
        ("is {document} or {query}", "the man"),
        ("{query}", "{document}"),
    ],
)
def test_a_text_that_looks_like_the_template_is_only_a_text(
    farm: Farm, query: str, document: str
) -> None:
    path = farm.path("causal")
    found = farm.results("causal", query=query, documents=[document], raw_scores=True)
    ids = pair_tokens(path, query, document)
    assert_direct(found[0]["relevance_score"], path, ids)


@pytest.mark.parametrize("name", RANKERS)
def test_a_document_that_is_cut_keeps_what_stands_after_it(
    farm: Farm, name: str
) -> None:
    path = farm.path(name)
    most = llama().llama_model_n_ctx_train(opened(path))
    long = " ".join(DOCUMENTS * 9)
    whole = pair_tokens(path, QUERY, long)
    cut = pair_tokens(path, QUERY, long, most)
    assert len(whole) > most == len(cut)
    body = {"query": QUERY, "documents": [long], "raw_scores": True}
    status, reply = farm.ask(name, "/v1/rerank", **body, truncate=True)
    assert status == 200, reply
    assert reply["usage"]["total_tokens"] == most
    score = reply["results"][0]["relevance_score"]
    assert_direct(score, path, cut)
    # Without this, a model whose end makes no difference would do.
    assert abs(score - direct_score_of(path, whole[:most])) > 1e-3


@pytest.mark.parametrize("name", ["two layers", "causal"])
def test_a_document_that_is_too_long_is_refused_unless_it_may_be_cut(
    farm: Farm, name: str
) -> None:
    documents = [DOCUMENTS[0], " ".join(DOCUMENTS * 9)]
    body = {"query": QUERY, "documents": documents}
    status, reply = farm.ask(name, "/v1/rerank", **body, truncate=False)
    assert status == 400
    assert "documents[1]" in reply["error"]["message"]


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("name", ["two layers", "causal"])
def test_a_query_that_leaves_no_room_for_a_document_is_refused_or_cut(
    farm: Farm, name: str, truncate: bool
) -> None:
    body = {"query": " ".join(DOCUMENTS * 9), "documents": DOCUMENTS}
    status, reply = farm.ask(name, "/v1/rerank", **body, truncate=truncate)
    if truncate:
        most = llama().llama_model_n_ctx_train(opened(farm.path(name)))
        assert (status, len(reply["results"])) == (200, len(DOCUMENTS))
        assert reply["usage"]["total_tokens"] <= most * len(DOCUMENTS)
    else:
        assert status == 400
        assert "query" in reply["error"]["message"]
    assert farm.results(name), "and work goes on"


# --- the wrong model ---


@pytest.mark.parametrize("route", ["/rerank", "/v1/rerank", "/v2/rerank"])
@pytest.mark.parametrize("name", EMBEDDERS)
def test_an_embedding_model_that_is_to_rerank_says_what_kind_is_needed(
    farm: Farm, name: str, route: str
) -> None:
    status, reply = farm.ask(name, route, query=QUERY, documents=DOCUMENTS)
    assert status == 400
    error = reply["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "rerank" in error["message"]


def test_an_embedding_model_that_is_to_rerank_texts_is_a_backends_error(
    farm: Farm,
) -> None:
    status, reply = farm.ask("bert", "/rerank", query=QUERY, texts=DOCUMENTS)
    assert (status, reply["error_type"]) == (424, "Backend")
    assert "rerank" in reply["error"].replace("re-rank", "rerank")


@pytest.mark.parametrize("name", ["two layers", "causal"])
def test_a_reranker_that_is_to_embed_says_what_it_can_do(farm: Farm, name: str) -> None:
    status, reply = farm.ask(name, "/v1/embeddings", input=QUERY)
    assert status == 400
    error = reply["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "rerank" in error["message"]
    assert farm.results(name), "and work goes on"


# Each makes a file whose scores would mean nothing.
NO_HEADS: dict[str, Callable[[Path], Path]] = {
    "none": functools.partial(_CROSS, head=()),
    "only the first layer": functools.partial(_CROSS, head=("cls",)),
    # A softmax of one number is 1.
    "a probability of one label": functools.partial(
        models.tiny_causal_reranker, labels=("yes",)
    ),
    "a probability of no label": functools.partial(
        models.tiny_causal_reranker, labels=()
    ),
}


@pytest.mark.parametrize("name", NO_HEADS)
def test_a_file_that_ranks_without_a_head_is_refused(tmp_path: Path, name: str) -> None:
    # llama.cpp gives some number of the first pair's first token then.
    path = NO_HEADS[name](tmp_path)
    assert str(path) in refusal(path)


def test_no_setting_makes_a_reranker_of_an_embedding_model(tmp_path: Path) -> None:
    path = models.tiny_bert(tmp_path)
    assert str(path) in refusal(path, pooling="rank")


# --- exact vectors ---


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_an_exact_vector_has_the_same_bits_whatever_else_is_asked(
    tmp_path: Path, kind: str, is_exact: bool
) -> None:
    texts = [
        " ".join(itertools.islice(itertools.cycle(WORDS[n:]), n)) for n in range(3, 33)
    ]
    path = models.tiny_bert(tmp_path) if kind == "encoder" else tiny_gemma(tmp_path)
    flags = ["--cache-mb", "0", "--workers", "2", "--weights", "q8_0"]
    flags += ["--pooling", "mean", "--cache-dir", str(tmp_path), "--auto-truncate"]
    flags += ["--exact"] * is_exact
    with kit.started("--model-path", str(path), *flags, module=(SCRIPT,)) as server:

        def asked(given: list[str]) -> list[str]:
            client = both.Client(server.url)
            body = {"input": given, "encoding_format": "base64"}
            reply = client.post("/v1/embeddings", body)
            client.close()
            return [row["embedding"] for row in reply.json["data"]]

        alone = [asked([text])[0] for text in texts]
        with ThreadPoolExecutor(3) as others:
            at_once = others.map(lambda _: asked(texts), range(3))
            assert all((found == alone) == is_exact for found in at_once)
