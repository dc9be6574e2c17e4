"""The program with fake models, an embedder and a reranker, and how to ask it.

No test logic here. ``python -m tests.both FLAGS`` is the real program; a model whose
file is called ranker is one, one called chatter generates, any other embeds. Ids of the fake tokenizer are hashes of
words, so a client may send any.
"""

from __future__ import annotations

import contextlib
import http.client
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import embellama_server as es
from tests import kit

MODULE = ("-m", "tests.both")
N_EMBD = 24  # three bytes of bits

# Of the words that fail: none that a test which makes up token ids would come upon.
RARE_IDS = {kit.NAN_WORD: 999_999_937, kit.BOOM_WORD: 999_999_929}


class AnyEngine(kit.FakeEngine):
    """A reranker if the file's name says so."""

    def __init__(self, path: str = "", *rest: Any, **card: Any) -> None:
        is_ranker = Path(path).stem.startswith("ranker")
        facts: dict[str, Any] = {"n_embd": N_EMBD}
        if is_ranker:
            facts |= {"n_scores": 1, "pooling": "rank"}
        super().__init__(path, *rest, **(facts | card))

    def encode(self, text: str) -> list[int]:
        return [RARE_IDS.get(word) or kit.fake_id(word) for word in text.split()]

    def fails(self, word: str, ids: Sequence[int]) -> bool:
        return RARE_IDS[word] in ids and super().fails(word, [kit.fake_id(word)])

    def new_context(
        self, *, needs_long_context: bool = False, per_token: bool = False
    ) -> kit.FakeContext:
        super().new_context(
            needs_long_context=needs_long_context, per_token=per_token
        )  # which counts it
        return AnyContext(
            self, needs_long_context=needs_long_context, per_token=per_token
        )


def engine(path: str = "", *rest: Any, **card: Any) -> kit.FakeEngine:
    """The engine that the file's name asks for."""
    is_chatter = Path(path).stem.startswith("chatter")
    made = kit.FakeChatEngine if is_chatter else AnyEngine
    return made(path, *rest, **card)


class AnyContext(kit.FakeContext):
    """By tokens, only the one that fails has no vector."""

    def _vectors(self, inputs: Sequence[Any], threads: int) -> Any:
        rows = super()._vectors(inputs, threads)
        ids = [int(token) for token in inputs[0]]
        if self._per_token and np.isnan(rows[0]).all():
            rows[0] = kit.fake_vector(ids[:1], rows.shape[1])
            rows[ids.index(RARE_IDS[kit.NAN_WORD])] = np.nan
        return rows


def sound_gguf() -> bytes:
    """A GGUF without weights: what is served beside others is looked into."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = es.GGUF_MAGIC + struct.pack("<IQQ", 3, 0, 2)
    for name, value in (("general.architecture", "bert"), ("general.name", "fake")):
        head += text(name) + struct.pack("<I", 8) + text(value)
    return head


class Client:
    """Requests to a running server, on a connection that is kept."""

    def __init__(self, url: str, admin_fields: Mapping[str, str] | None = None) -> None:
        """``admin_fields`` are sent to the administrator's routes."""
        self.admin_fields = dict(admin_fields or {})
        self.host, _, port = url.removeprefix("http://").rpartition(":")
        self.port = int(port)
        self._connection = http.client.HTTPConnection(
            self.host, self.port, timeout=kit.DEADLINE_S
        )

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> kit.Reply:
        """One request; bytes go as they are, anything else but None as JSON."""
        raw = body if isinstance(body, bytes) else es.json_codec().dumps(body)
        fields = self.admin_fields if path.startswith("/admin/") else {}
        fields = fields | dict(headers or {})
        if body is not None:
            fields = {"content-type": "application/json"} | fields
        try:
            self._connection.request(
                method, path, body=None if body is None else raw, headers=fields
            )
            response = self._connection.getresponse()
            content = response.read()
        except (http.client.HTTPException, OSError):
            self._connection.close()
            raise
        found = {name.lower(): value for name, value in response.getheaders()}
        return kit.Reply(response.status, found, content)

    def post(self, path: str, body: Any, **fields: str) -> kit.Reply:
        """POST; ``fields`` are headers, with _ for -."""
        named = {name.replace("_", "-"): value for name, value in fields.items()}
        return self.ask("POST", path, body, named)

    def get(self, path: str, **fields: str) -> kit.Reply:
        """GET, likewise."""
        named = {name.replace("_", "-"): value for name, value in fields.items()}
        return self.ask("GET", path, None, named)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


@contextlib.contextmanager
def asking(
    folder: Path,
    *flags: str,
    ranker_first: bool = False,
    has_chatter: bool = False,
    config: Mapping[str, object] | None = None,
    environment_key: str = "",
    module: Sequence[str] = MODULE,
) -> Iterator[Client]:
    """A client of a server with the models ``embedder`` and ``ranker``.

    The first one is who answers requests that name none. ``has_chatter``: there is a model
    ``chatter`` too, which generates. ``config``: what is written
    beside them as config_sentence_transformers.json. ``environment_key``: the API key.
    ``module``: what Python runs.
    """
    names = ["ranker", "embedder"] if ranker_first else ["embedder", "ranker"]
    names += ["chatter"] if has_chatter else []
    if config is not None:
        place = folder / "config_sentence_transformers.json"
        place.write_bytes(es.json_codec().dumps(config))
    models: list[str] = []
    for name in names:
        (folder / f"{name}.gguf").write_bytes(sound_gguf())
        models += ["--model-path", f"{name}={folder / name}.gguf"]
    said = {"EMBELLAMA_API_KEY": environment_key} if environment_key else None
    with kit.started(*models, *flags, module=module, environment=said) as server:
        client = Client(server.url, {} if environment_key else server.admin_fields())
        try:
            yield client
        finally:
            client.close()


def program(arguments: Sequence[str]) -> int:
    """What ``python -m tests.both`` runs."""
    return es.main(list(arguments), engine_factory=engine)


if __name__ == "__main__":
    sys.exit(program(sys.argv[1:]))
