"""Rooms STATUS and PAGE: figures of five minutes, and one page that draws them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import embellama_server as es
from tests import both, kit, slow
from tests.servers import free_port
from tests.siege import memory_mb, quantile
from tests.test_outside_clients import node_printed

PAGE = es.PAGE_HTML
POLICY = dict(es.PAGE_POLICY)["content-security-policy"]
SCRIPT = PAGE.partition("<script>")[2].partition("</script>")[0]
# What Chromium 156 and Firefox 140 send when one opens a page.
ACCEPTS = (
    "text/html,application/xml;q=0.9,image/webp,*/*;q=0.8,a/b;v=b3;q=0.7",
    "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
)


# --- the page ---


def test_the_page_has_no_outside_parts_and_makes_no_markup_of_strings() -> None:
    without_svg = PAGE.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|src=|@import|url\(", without_svg)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(", PAGE
    )
    assert not re.search("Storage|cookie|indexedDB", PAGE)
    assert not re.search(r"(?i)<[^>]+ (on[a-z]+|style)=", PAGE)
    assert PAGE.isascii() and "\r" not in PAGE
    assert max(map(len, SCRIPT.splitlines())) <= 100


def test_the_policy_allows_just_the_script_and_style_of_the_page() -> None:
    for tag in ("script", "style"):
        text = PAGE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in POLICY
    assert "unsafe" not in POLICY and "*" not in POLICY


@pytest.mark.parametrize("accept", ACCEPTS)
async def test_a_browser_gets_the_page_and_others_what_they_got(accept: str) -> None:
    async with kit.running_service() as running:
        page = await running.ask("GET", "/", accept=accept)
        assert page.body.decode() == PAGE
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["content-security-policy"] == POLICY
        for other in ("*/*", "application/json"):
            shown = await running.ask("GET", "/", accept=other)
            assert json.loads(shown.body)["name"] == "embellama_server"
        assert (await running.ask("GET", "/", accept="text/plain")).body.startswith(
            b"embellama_server"
        )


async def test_with_keys_the_page_opens_and_its_figures_need_one() -> None:
    async with kit.running_service(api_key="secretkey") as running:
        assert (await running.ask("GET", "/", accept=ACCEPTS[0])).status == 200
        assert (await running.ask("GET", "/status")).status == 401
        told = await running.ask("GET", "/status", authorization="Bearer secretkey")
        assert told.status == 200


# --- its figures ---


async def figures(running: kit.RunningService) -> dict[str, Any]:
    """What /status says; its moments as objects."""
    reply = await running.ask("GET", "/status")
    assert reply.status == 200
    shown: dict[str, Any] = json.loads(reply.body)
    jsonschema.validate(shown, es.STATUS_REPLY)
    rows = shown["moments"]
    shown["moments"] = [dict(zip(shown["fields"], row, strict=True)) for row in rows]
    return shown


async def test_the_figures_are_those_of_the_metrics() -> None:
    async with kit.running_service(cache_mb=1, workers=2) as running:
        before = (await figures(running))["moments"][-1]
        for text in ("a b", "c", "a b"):
            await running.ask("POST", "/v1/embeddings", {"input": text})
        await running.ask("GET", "/nope")
        await running.ask("POST", "/v1/embeddings", {"input": kit.BOOM_WORD})
        shown = await figures(running)
        now = shown["moments"][-1]
        gained = {name: now[name] - before[name] for name in now}
        assert gained["requests"] == 6  # and the one for the figures before
        assert (gained["inputs"], gained["failed"], gained["refused"]) == (2, 1, 0)
        assert (gained["cache_hits"], gained["cache_lookups"]) == (1, 4)
        assert now["resident_bytes"] > 1 << 20 or not Path("/proc").exists()
        assert shown["errors"] == {"unknown_url": 1, "engine_failed": 1}
        (model,) = shown["models"]
        assert (model["model"], model["kind"], model["requests"]) == (
            "fake@1",
            "embed",
            3,
        )
        assert shown["limits"]["busy"] == 2
        limit = running.served.pool.queue.backlog.limit
        assert shown["limits"]["queue_inputs"] == limit.inputs
        assert sum(shown["histograms"]["wait_s"]["hits"]) == 3
        assert (shown["phase"], shown["problem"]) == ("ready", "")


async def test_each_worker_is_shown_as_it_is_without_texts_or_errors() -> None:
    engine = kit.FakeEngine()
    async with kit.running_service(engine, workers=2) as running:
        await running.ask("POST", "/v1/embeddings", {"input": kit.BOOM_WORD})
        engine.block()
        asked = asyncio.create_task(
            running.ask("POST", "/v1/embeddings", {"input": "a"})
        )
        await asyncio.to_thread(engine.wait_until_computing)
        workers = (await figures(running))["workers"]
        engine.release()
        assert (await asked).status == 200
    assert [(one["model"], one["worker"]) for one in workers] == [
        ("fake@1", 0),
        ("fake@1", 1),
    ]
    assert sorted(one["state"] for one in workers) == ["busy", "idle"]
    assert {key for one in workers for key in one} == {
        *("model", "worker", "state", "state_s", "busy_share")
    }


async def test_moments_are_kept_for_five_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with kit.running_service() as running:
        service = running.service
        service.moments.clear()
        begin = time.monotonic()
        for half in range(800):  # twice a second, as the server calls it
            monkeypatch.setattr(time, "monotonic", lambda at=half: begin + at / 2)
            es.note_moment(service)
        times = [moment[0] for moment in service.moments]
        monkeypatch.undo()
    assert len(times) == es.MAX_MOMENTS
    assert {round(b - a, 1) for a, b in itertools.pairwise(times)} == {2.0}


async def test_who_has_the_moments_until_one_is_told_of_those_after_it() -> None:
    async with kit.running_service() as running:
        kept = running.service.moments
        kept[:] = [(float(n), *kept[0][1:]) for n in range(10)]
        whole = (await figures(running))["moments"]
        assert [one["time_s"] for one in whole[:-1]] == list(range(10))
        for since, later in (
            (-1, range(10)),
            (6, (7, 8, 9)),
            (6.5, (7, 8, 9)),
            (9, ()),
        ):
            reply = await running.ask("GET", f"/status?since={since}")
            *told, present = json.loads(reply.body)["moments"]
            assert [row[0] for row in told] == [*later]
            assert present[0] >= whole[-1]["time_s"]
        bad = await running.ask("GET", "/status?since=now")
        assert bad.status == 400 and b"since is 'now', which is no time_s" in bad.body


async def test_events_are_told_without_what_may_hold_paths() -> None:
    async with kit.running_service() as running:
        running.server.log("warning", "file is gone", path="/home/somebody/secret")
        (event,) = [
            one
            for one in (await figures(running))["events"]
            if one["event"] == "file is gone"
        ]
        assert sorted(event) == ["event", "level", "time"]
        assert "somebody" not in json.dumps(await figures(running))


def test_of_events_the_last_twenty_are_kept_and_no_requests() -> None:
    log = kit.quiet_log()
    for number in range(30):
        log("info", f"event {number}")
        log("info", "request", path="/x")
        log("debug", "detail")
    assert [event for _, _, event in log.recent] == [
        f"event {n}" for n in range(10, 30)
    ]


# --- what its script computes ---

# Just what the script uses of a browser when it begins.
BROWSER = """
const part = () => ({ addEventListener() {}, classList: { add() {}, remove() {} } });
globalThis.location = new URL("http://127.0.0.1/");
globalThis.document = { hidden: true, getElementById: part, addEventListener() {} };
"""
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")


def computed(expression: str, *arguments: object) -> Any:
    """What an expression gives in the page's script; ``given`` are the arguments."""
    given = f"const given = {json.dumps(arguments)};"
    told = f"console.log(JSON.stringify({expression}));"
    source = BROWSER + SCRIPT.replace('"use strict";', "") + given + told
    command = [NODE or "", "--input-type=module", "-e", source]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=kit.DEADLINE_S, check=True
    )
    return json.loads(done.stdout)


@needs_node
def test_the_map_shows_the_principal_components() -> None:
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(9, 24)) * np.linspace(3, 0.1, 24)
    across_up = np.array(computed("places(given[0])", rows.tolist()))
    centred = rows - rows.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    expected = (u[:, :2] * s[:2]).T
    assert np.allclose(np.abs(across_up), np.abs(expected), atol=1e-2 * s[0])


@needs_node
@pytest.mark.parametrize("rows", [[[1, 0]], [[1, 0]] * 3, [[0, 0], [0, 1]]])
def test_a_map_of_texts_that_hardly_differ_has_places_too(rows: list[Any]) -> None:
    across, up = computed("places(given[0])", rows)
    assert np.isfinite([across, up]).all()


def interpolated(part: float, bounds: list[float], hits: list[int]) -> float:
    """As Prometheus' histogram_quantile; infinity above the last bound."""
    rank, seen, low = part * sum(hits), 0, 0.0
    for bound, count in zip(bounds, hits, strict=False):
        if count and seen + count >= rank:
            return low + (bound - low) * (rank - seen) / count
        seen, low = seen + count, bound
    return float("inf")


@needs_node
def test_quantiles_are_prometheus_s() -> None:
    rng, cases = random.Random(3), []
    bounds = [0.001, 0.01, 0.1, 1.0, 10.0]
    for _ in range(200):
        hits = [rng.choice((0, 0, 1, 7, 40)) for _ in range(6)]
        hits[rng.randrange(6)] += 20
        cases.append((rng.choice((0.5, 0.95, 0.99)), bounds, hits))
    shown = computed("given[0].map((one) => quantile(...one))", cases)
    for case, text in zip(cases, shown, strict=True):
        expected = interpolated(*case)
        if expected == float("inf"):
            assert text == "over 10 s"
            continue
        value, unit = text.split()
        seconds = float(value) * (1e-3 if unit == "ms" else 1)
        assert seconds == pytest.approx(expected, rel=0.01), case


@needs_node
def test_rates_of_a_server_that_was_started_again_are_not_negative() -> None:
    now, old = {"requests": 3, "time_s": 12}, {"requests": 90, "time_s": 10}
    assert computed('rate("requests")(...given)', now, old) == 0
    assert computed('rate("requests")(...given)', now | {"requests": 94}, old) == 2
    assert computed("given.map(bytes)", 0, 1790, 5 << 20, 3 << 30) == [
        "0 B",
        "1.75 KiB",
        "5 MiB",
        "3 GiB",
    ]


# Two messages, of which the first is answered by half a reply and an error.
TALKS = """
await (async () => {
  const places = {}, sent = [];
  const place = () => ({ textContent: "", value: "", append() {}, after() {} });
  document.getElementById = (id) => (places[id] ??= place());
  document.createElement = place;
  const told = ['data: {"choices":[{"delta":{"content":"Half"}}]}\\n\\n',
    'data: {"error":{"message":"the engine failed"}}\\n\\n'];
  globalThis.fetch = async (_, { body }) => {
    sent.push(JSON.parse(body).messages);
    return new Response(told.splice(0).join(""));
  };
  for (const text of ["One", "Two"]) {
    $("say").value = text;
    await talk();
  }
  return sent[1];
})()
"""


@needs_node
def test_the_chat_does_not_send_an_error_back_as_the_model_s_words() -> None:
    assert computed(TALKS.strip()) == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Half"},
        {"role": "user", "content": "Two"},
    ]


# --- in a browser ---


def cpu_s(pid: int) -> float:
    """What a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox"]
        )
        yield started
        started.close()


LINES = ["The cat sleeps.", "A kitten naps.", "<b>Bread</b> & butter"]


@pytest.mark.clients
def test_the_playground_s_numbers_are_the_api_s(browser: Any, tmp_path: Path) -> None:
    with both.asking(tmp_path, has_chatter=True) as asker:
        page = browser.new_page(viewport={"width": 320, "height": 800})
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        hosts = set[str]()
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(f"http://{asker.host}:{asker.port}/")
        page.wait_for_selector("#models tr")
        page.fill("#texts", "\n".join(LINES))
        page.fill("#query", "a pet")
        page.click("#compare")
        page.wait_for_selector("#map circle")
        vectors = np.array(
            [
                row["embedding"]
                for row in asker.post(
                    "/v1/embeddings", {"model": "embedder", "input": LINES}
                ).json["data"]
            ]
        )
        shown = [float(text) for text in page.locator("#heat td").all_inner_texts()[1:]]
        assert np.allclose(shown, (vectors @ vectors.T).ravel(), atol=0.006)
        page.click("#search")
        page.wait_for_selector("#ranks li")
        asked = {"model": "embedder", "input": ["a pet"]}
        query = asker.post("/v1/embeddings", asked).json["data"][0]["embedding"]
        found = page.locator("#ranks li").all_inner_texts()
        scores = dict(zip(LINES, vectors @ np.array(query), strict=True))
        order = sorted(LINES, key=lambda line: -scores[line])
        assert [text.split(maxsplit=1)[1] for text in found] == order
        shown = [float(text.split()[0]) for text in found]
        assert np.allclose(shown, [scores[line] for line in order], atol=0.0006)
        page.evaluate("document.getElementById('ranks').replaceChildren()")
        page.click("#rerank")
        page.wait_for_selector("#ranks li")
        ranked = asker.post(
            "/v1/rerank", {"model": "ranker", "query": "a pet", "documents": LINES}
        ).json["results"]
        expected = [f"{r['relevance_score']:.3f} {LINES[r['index']]}" for r in ranked]
        assert page.locator("#ranks li").all_inner_texts() == [
            f" {text}" for text in expected
        ]
        page.fill("#say", "Hello")
        page.press("#say", "Enter")
        page.wait_for_selector("#talk span:not(:empty)")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 320, "nothing is cut off on a narrow screen"
        assert len(hosts) == 1
        assert not [text for text in said if "Password field" not in text]


@pytest.mark.clients
def test_a_reply_of_the_chat_is_shown_as_it_grows_until_it_is_stopped(
    browser: Any, tmp_path: Path
) -> None:
    flags = slow.model(tmp_path, "chatter")
    words = [f"word{n}" for n in range(14)]
    with kit.started(*flags, module=slow.MODULE) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector(".generate:not([hidden])")
        page.fill("#say", " ".join(words))
        page.click("#send")
        seen: list[int] = []
        until = time.monotonic() + kit.DEADLINE_S
        while len(set(seen)) < 4 and time.monotonic() < until:
            page.wait_for_timeout(50)
            said = page.locator("#talk span").inner_text().split()
            assert said == words[: len(said)]
            seen.append(len(said))
        assert len(set(seen)) == 4, page.inner_text("#talk")
        assert seen == sorted(seen)
        page.click("#stop")
        page.wait_for_selector("#talk :text('(stopped)')")
        assert len(page.locator("#talk span").inner_text().split()) < len(words)
        page.close()


@pytest.mark.clients
def test_the_page_s_figures_are_those_of_known_requests(
    browser: Any, tmp_path: Path
) -> None:
    with both.asking(tmp_path, "--workers", "2") as asker:
        page = browser.new_page()
        page.goto(f"http://{asker.host}:{asker.port}/")
        page.wait_for_selector("#models tr")
        workers = page.locator("#workers tr").all_inner_texts()
        assert [text.split("\t")[:3] for text in workers] == [
            [f"{model}@1", number, "idle"]
            for model in ("embedder", "ranker")
            for number in ("0", "1")
        ]
        for n in range(200):
            body = {"model": "embedder", "input": [f"{n} a", f"{n} b"]}
            assert asker.post("/v1/embeddings", body).status == 200
        assert asker.get("/nope").status == 404
        page.wait_for_selector("#errors:text-is('unknown_url 1')")
        requests, tokens = (
            page.locator("#models tr").first.locator("td").all_inner_texts()[4:6]
        )
        assert (requests, tokens) == ("200", "1.6K")  # two words, and one at each end
        page.close()


STALE_S = (
    5 + 1
)  # a poll every 2 s, which waits for at most 3; and the browser's own time


def is_stale(page: Any) -> bool:
    """Whether the page says that what it shows is old."""
    said = page.inner_text("#state").startswith("No answer since ")
    assert said == page.title().startswith("(no answer)")
    assert said == page.evaluate("document.body.classList.contains('stale')")
    return bool(said)


def wait_for_stale(page: Any) -> None:
    """Soon, and loudly."""
    since = time.monotonic()
    page.wait_for_selector("body.stale", timeout=kit.DEADLINE_S * 1000)
    assert time.monotonic() - since < STALE_S
    assert is_stale(page)


@pytest.mark.clients
def test_a_server_that_hangs_or_is_killed_makes_its_page_stale_until_it_is_back(
    browser: Any,
) -> None:
    port = str(free_port())
    flags = ("--port", port, "--host", "127.0.0.1")
    page = browser.new_page()
    with kit.started(*flags) as server:
        page.goto(server.url)
        page.wait_for_selector("#models tr")
        assert not is_stale(page)
        os.kill(server.process.pid, signal.SIGSTOP)
        wait_for_stale(page)
        os.kill(server.process.pid, signal.SIGCONT)
        page.wait_for_selector("body:not(.stale)", timeout=40_000)  # it asks every 30 s
        assert not is_stale(page)
        server.process.kill()
        wait_for_stale(page)
    with kit.started(*flags):
        page.wait_for_selector("body:not(.stale)", timeout=40_000)
        assert not is_stale(page)
    page.close()


@pytest.mark.clients
def test_labels_of_texts_that_are_alike_do_not_cover_each_other(browser: Any) -> None:
    with kit.started() as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#models tr")
        page.fill("#texts", "one\n" * 5 + "two\nthree")
        page.click("#compare")
        page.wait_for_selector("#map text")
        rows = page.locator("#map text").evaluate_all(
            "all => all.map((one) => Number(one.getAttribute('y')))"
        )
        assert len(rows) == 7
        gaps = [below - above for above, below in itertools.pairwise(rows)]
        assert min(gaps) >= 9.99, rows
        page.close()


HIDE = """
let isHidden = false;
Object.defineProperty(document, "hidden", { get: () => isHidden });
globalThis.hide = (now) => {
  isHidden = now;
  document.dispatchEvent(new Event("visibilitychange"));
};
"""


@pytest.mark.clients
def test_a_tab_that_is_hidden_asks_nothing_until_it_is_shown(browser: Any) -> None:
    with kit.started() as server:
        page = browser.new_page()
        page.clock.install()
        page.add_init_script(HIDE)
        asked: list[str] = []
        answered: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("requestfinished", lambda request: answered.append(request.url))

        def polls(seconds: int) -> int:
            """How often it asks while its clock goes on, a second at a time."""
            before = len(asked)
            for _ in range(seconds):
                page.clock.run_for(1000)
                while len(answered) < len(asked):
                    page.wait_for_timeout(1)  # lets the page go on, too
            return len(asked) - before

        page.goto(server.url)
        page.wait_for_selector("#models tr")
        assert 4 <= polls(10) <= 6
        page.evaluate("hide(true)")
        assert polls(10) == 0
        with page.expect_request("**/status?*"):
            page.evaluate("hide(false)")
        assert 4 <= polls(10) <= 6
        page.close()


@pytest.mark.clients
def test_names_that_are_markup_are_shown_as_text(browser: Any, tmp_path: Path) -> None:
    name = "<script>alert(1)</script><img/src/onerror>"
    place = tmp_path / "m.gguf"
    place.write_bytes(both.sound_gguf())
    flags = ("--model-path", str(place), "--model-name", name)
    with kit.started(*flags, module=both.MODULE) as server:
        page = browser.new_page()
        said: list[str] = []
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("console", lambda message: said.append(message.text))
        page.goto(server.url)
        page.wait_for_selector("#models tr")
        assert page.locator("#models td").first.inner_text() == f"{name}@1"
        assert page.locator("#embedder option").first.inner_text() == f"{name}@1"
        assert page.locator("#models script, #models img, select script").count() == 0
        assert not [text for text in said if "Password field" not in text]
        page.close()


PREFIX = "/embed/a"


@pytest.mark.clients
@pytest.mark.parametrize("path", [PREFIX, f"{PREFIX}/"])
def test_behind_a_prefix_pages_find_their_links_and_routes(
    browser: Any, path: str
) -> None:
    with kit.started("--root-path", PREFIX) as server:
        page = browser.new_page()
        seen: list[tuple[bool, str]] = []
        page.on("response", lambda reply: seen.append((reply.ok, reply.url)))
        page.goto(f"{server.url}{path}")
        page.wait_for_selector("#models tr")
        page.click("#compare")
        page.wait_for_selector("#map circle")
        page.click("#docs")
        page.wait_for_url(f"**{PREFIX}/docs")
        page.click("summary:has-text('/v1/embeddings')")
        page.click("details[open] button")
        page.wait_for_selector("details[open] .answer:not([hidden])")
        assert page.inner_text("details[open] output").startswith("200")
        assert f"{server.url}{PREFIX}/v1/embeddings" in page.inner_text(
            "details[open] .curl"
        )
        ours = [one for one in seen if not one[1].endswith("/favicon.ico")]
        assert len(ours) >= 5
        for is_ok, asked in ours:
            assert is_ok and asked.startswith(f"{server.url}{PREFIX}"), asked
        page.close()


PLACE = """
import { createRequire } from "node:module";
console.log(JSON.stringify(createRequire(import.meta.url).resolve(process.argv[2])));
"""


@pytest.mark.clients
def test_the_pages_have_no_barriers_that_axe_knows(
    browser: Any, tmp_path: Path
) -> None:
    place = node_printed(tmp_path, ["axe-core@4"], PLACE, "axe-core/axe.min.js")
    with both.asking(tmp_path, has_chatter=True) as server:
        for scheme, path in itertools.product(("light", "dark"), ("/", "/docs")):
            # axe is a script of its own, which the pages' policy would refuse.
            context = browser.new_context(bypass_csp=True, color_scheme=scheme)
            page = context.new_page()
            page.goto(f"http://{server.host}:{server.port}{path}")
            if path == "/":
                page.click("#compare")
                page.wait_for_selector("#map circle")
            else:
                page.click("summary:has-text('/v1/embeddings')")
            page.add_script_tag(path=place)
            found = page.evaluate("axe.run()")["violations"]
            told = [(one["id"], one["nodes"][0]["html"][:99]) for one in found]
            assert told == [], (scheme, path)
            context.close()


@pytest.mark.clients
def test_the_pages_are_valid_html(tmp_path: Path) -> None:
    java = shutil.which("java")
    if java is None:
        pytest.skip("not installed: java")
    place = node_printed(tmp_path, ["vnu-jar"], PLACE, "vnu-jar/build/dist/vnu.jar")
    pages = {"page.html": PAGE, "docs.html": es.docs_page(es.ROUTES)}
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [java, "-jar", place, *(str(tmp_path / name) for name in pages)],
        capture_output=True,
        text=True,
        check=False,
        timeout=kit.DEADLINE_S,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.clients
def test_fifty_open_pages_cost_the_server_little(
    browser: Any, record_property: Any
) -> None:
    with kit.started() as server:
        pages = [browser.new_page() for _ in range(50)]
        pid = server.process.pid
        before = memory_mb(pid)
        for page in pages:
            page.goto(server.url)
        for page in pages:
            page.wait_for_selector("#models tr")
        begin, used = time.monotonic(), cpu_s(pid)
        times = []
        asker = both.Client(server.url)
        while time.monotonic() - begin < 10:
            asked_at = time.monotonic()
            assert asker.get("/health").status == 200
            times.append(time.monotonic() - asked_at)
            pages[0].wait_for_timeout(20)
        share = (cpu_s(pid) - used) / (time.monotonic() - begin)
        grown = memory_mb(pid) - before
        asker.close()
        for page in pages:
            assert not is_stale(page)
            page.close()
    figures = {"of a core": share, "MiB": grown, "p99 s": quantile(times, 0.99)}
    record_property("fifty pages", figures)
    assert share < 0.1 and grown < 20
    assert quantile(times, 0.5) < 0.05
