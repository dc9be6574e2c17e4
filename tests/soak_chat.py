"""A chat and an embedding model in one server under a mixed load: is all as it should be?

    python -m tests.soak_chat --seconds 600

Chats whole and streamed, some read slowly, some left in the middle, beside embeddings.
Greedy replies must be what the model says alone, until two tokens are as good as equally
likely: then the last bits decide, and these depend on what else shares a step. (Of two
such tokens neither may begin as the other does: a reply that went on from the other one
would be found wrong only later, where it has no excuse.) Vectors must be those that came
first. At the end no sequence runs or waits, no cell is in use, and memory has not grown.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests import chat_models, kit, models
from tests.soak import Client, counts
from tests.words import WORDS

CLIENTS = 12
KINDS = {"whole": 30, "stream": 30, "embeddings": 20, "gone": 12, "slow": 8}  # percent
PROMPTS = 40  # that come again, some of which begin alike
TOKENS = 24  # of a reply
# Between the logprobs of two tokens. Flash attention adds in 16 bits, one cell after the
# other: the same tokens in cells of another order moved logits of these weights by 0.01
# (median), 0.04 (one in 100) and, in 8,000 replies, 0.17; without it by 0.0004.
TIE = 0.25
SLOW_BYTES, SLOW_S = 512, 0.02  # at a time, and between two times
MAX_GROWTH_KB = 4096  # from the second quarter to the last
CONFIGURATION = """\
log_level = "warning"
cache_mb = 1
[[models]]
path = "{chat}"
aliases = ["chat"]
prompt_cache_mb = 1
context_size = 2048
[[models]]
path = "{bert}"
aliases = ["bert"]
"""


def raw_request(path: str, **fields: Any) -> bytes:
    """HTTP/1.1 bytes."""
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"content-type: application/json\r\n\r\n" + body


def lead_of(one: dict[str, Any], other: dict[str, Any]) -> float:
    """By how much a token is likelier than another."""
    lead: float = one["logprob"] - other["logprob"]
    return lead


def begins_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether one token's text begins with the other's."""
    shorter, longer = sorted((one["token"], other["token"]), key=len)
    return bool(longer.startswith(shorter))


def hides_a_tie(likeliest: dict[str, Any], *others: dict[str, Any]) -> bool:
    """Whether a reply's text may not show that it went on with another token."""
    return any(
        lead_of(likeliest, other) < TIE and begins_alike(likeliest, other)
        for other in others
    )


class ChatSoak:
    """The load on one server, and what is seen of its process meanwhile."""

    def __init__(self, url: str, pid: int, seed: int) -> None:
        self.kinds: collections.Counter[str] = collections.Counter()
        self.wrong: collections.Counter[str] = collections.Counter()
        self.right = self.ties = 0  # texts: the same to their end, or to a tie
        self.memory_kb: list[int] = []
        self._status = Path(f"/proc/{pid}/status")
        self._url, self._chance = url, random.Random(seed)
        self._vectors: dict[str, list[float]] = {}
        self._replies: dict[str, list[tuple[str, float]]] = {}  # tokens, their leads
        self._begins = [" ".join(self._chance.choices(WORDS, k=30)) for _ in range(4)]
        self._prompts: list[str] = []

    async def run(self, seconds: float) -> None:
        """Each prompt alone, whose reply is thought right; then all at once."""
        client = Client(self._url)
        for number in itertools.count():
            word = self._chance.choice(WORDS)
            await self._learn(
                client, f"{self._chance.choice(self._begins)} {word} {number}"
            )
            if len(self._replies) == PROMPTS:
                break
        self._prompts = [*self._replies]
        for prompt in self._prompts:
            await self._embeddings(client, prompt)
        client.close()
        ends_at = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._work(ends_at))
            while time.monotonic() < ends_at:
                self.memory_kb.append(self._rss_kb())
                await asyncio.sleep(seconds / 100)

    async def _work(self, ends_at: float) -> None:
        client = Client(self._url)
        while time.monotonic() < ends_at:
            kind = self._chance.choices([*KINDS], [*KINDS.values()])[0]
            self.kinds[kind] += 1
            try:
                await getattr(self, f"_{kind}")(
                    client, self._chance.choice(self._prompts)
                )
            except (OSError, EOFError, ValueError, KeyError) as error:
                self.wrong[f"{kind}: {error!r:.80}"] += 1
                client.close()
        client.close()

    async def _learn(self, client: Client, prompt: str) -> None:
        asked = self._chat(prompt, deterministic=True, logprobs=True, top_logprobs=5)
        _, _, body = await client.exchange(asked)
        choice = json.loads(body)["choices"][0]
        tokens = choice["logprobs"]["content"]
        is_text = (
            "".join(one["token"] for one in tokens) == choice["message"]["content"]
        )
        if is_text and not any(hides_a_tie(*one["top_logprobs"]) for one in tokens):
            self._replies[prompt] = [
                (one["token"], lead_of(*one["top_logprobs"][:2])) for one in tokens
            ]

    async def _whole(self, client: Client, prompt: str) -> None:
        status, _, body = await client.exchange(self._chat(prompt))
        if status != 200:
            raise ValueError(f"{status} {body!r:.60}")
        self._check(prompt, json.loads(body)["choices"][0]["message"]["content"])

    async def _embeddings(self, client: Client, prompt: str) -> None:
        raw = raw_request("/v1/embeddings", model="bert", input=prompt[-20:])
        status, _, body = await client.exchange(raw)
        if status != 200:
            raise ValueError(f"{status} {body!r:.60}")
        vector = [round(x, 4) for x in json.loads(body)["data"][0]["embedding"]]
        if self._vectors.setdefault(prompt, vector) != vector:
            self.wrong["another vector"] += 1

    async def _stream(self, client: Client, prompt: str, wait_s: float = 0) -> None:
        async with asyncio.timeout(kit.DEADLINE_S):
            reader = await client.send(self._chat(prompt, stream=True))
            said = bytearray()
            while not said.endswith(b"\r\n0\r\n\r\n"):
                if not (part := await reader.read(SLOW_BYTES if wait_s else 1 << 16)):
                    raise EOFError
                said += part
                await asyncio.sleep(wait_s)
        lines = re.findall(rb"^data: (\{.*\})$", bytes(said), re.MULTILINE)
        deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
        text = "".join(delta.get("content", "") for delta in deltas)
        self._check(prompt, text)

    async def _slow(self, client: Client, prompt: str) -> None:
        await self._stream(client, prompt, SLOW_S)

    async def _gone(self, client: Client, prompt: str) -> None:
        """Leaves before the reply, or within it."""
        options = {"max_tokens": 400, "ignore_eos": True}
        is_streamed = self._chance.random() < 0.7
        await client.send(self._chat(prompt, stream=is_streamed, **options))
        await asyncio.sleep(self._chance.choice((0, 0.002, 0.02, 0.1)))
        client.close(abort=self._chance.random() < 0.5)

    def _chat(self, prompt: str, **more: Any) -> bytes:
        fields = {"model": "chat", "temperature": 0, "max_tokens": TOKENS} | more
        messages = [{"role": "user", "content": prompt}]
        return raw_request("/v1/chat/completions", messages=messages, **fields)

    def _check(self, prompt: str, found: str) -> None:
        for token, lead in self._replies[prompt]:
            if not found.startswith(token):
                self.ties += lead < TIE
                self.wrong[f"another text after a lead of {lead:.2f}"] += lead >= TIE
                return
            found = found.removeprefix(token)
        self.right += 1
        self.wrong["a longer text"] += bool(found)

    def _rss_kb(self) -> int:
        return int(self._status.read_text().partition("RssAnon:")[2].split()[0])


async def left_over(url: str) -> dict[str, float]:
    """The gauges that should be 0 and are not, in the end."""
    client = Client(url)
    names = rb'state="(?:running|waiting)"|queue_inputs|queue_tokens|streams|buffered'
    async with asyncio.timeout(kit.DEADLINE_S):
        while True:
            raw = b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n"
            _, _, body = await client.exchange(raw)
            lines = [
                line.rsplit(b" ", 1) for line in body.split(b"\n") if line[:1] != b"#"
            ]
            left = {
                name[0].decode(): float(name[1])
                for name in lines
                if len(name) == 2 and re.search(names, name[0]) and float(name[1])
            }
            if not left:
                client.close()
                return left
            print(f"not yet at rest: {left}", flush=True)
            await asyncio.sleep(0.5)  # another process: nothing to wait on


def soaked(seconds: float, seed: int) -> bool:
    """Run and print; whether all is well."""
    with tempfile.TemporaryDirectory() as folder:
        chat = chat_models.tiny_llama(Path(folder))
        bert = models.tiny_bert(Path(folder))
        file = Path(folder) / "server.toml"
        file.write_text(CONFIGURATION.format(chat=chat, bert=bert))
        module = (str(kit.ROOT / "embellama_server.py"),)
        with kit.started(
            "--config", str(file), module=module, wait_ready=False
        ) as server:
            ready(server.url)
            soak = ChatSoak(server.url, server.child or server.process.pid, seed)
            asyncio.run(soak.run(seconds))
            asyncio.run(left_over(server.url))
            code = server.stop()
            errors = [line for line in server.log if " error " in line]
    quarter = len(soak.memory_kb) // 4
    first = statistics.median(soak.memory_kb[quarter : 2 * quarter])
    growth = statistics.median(soak.memory_kb[-quarter:]) - first
    print(f"requests {counts(soak.kinds)}; seed {seed}")
    print(f"texts    {soak.right} right, {soak.ties} until a tie")
    print(f"wrong    {counts(soak.wrong)}")
    print(f"memory   {first:.0f} KB, and {growth:+.0f} KB from then on")
    print(f"server   exit code {code}, errors logged: {len(errors)}", *errors[:5])
    is_well = not (soak.wrong.total() or errors or code) and soak.right > soak.ties
    return is_well and growth < MAX_GROWTH_KB


def ready(url: str) -> None:
    """Wait until both models are in memory."""
    ends_at = time.monotonic() + kit.DEADLINE_S

    async def status() -> int:
        client = Client(url)
        raw = b"GET /ready HTTP/1.1\r\nhost: localhost\r\n\r\n"
        found = (await client.exchange(raw))[0]
        client.close()
        return found

    while asyncio.run(status()) != 200:
        assert time.monotonic() < ends_at
        time.sleep(0.1)  # another process: nothing to wait on


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args()
    return 0 if soaked(given.seconds, given.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
