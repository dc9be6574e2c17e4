"""Room DESCRIPTION: one page that needs nothing else, and a policy that lets it do no more."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from typing import Any

import pytest

import embellama_server as es
from tests import kit

PAGE = es.docs_page(es.ROUTES)
POLICY = dict(es.DOCS_POLICY)["content-security-policy"]
DETAILS = re.compile(
    r'<details data-method="(\w+)" data-path="([^"]+)">(.*?)</details>', re.DOTALL
)
SHOWN = {(method, path): text for method, path, text in DETAILS.findall(PAGE)}


def test_the_page_has_every_route_and_nothing_else() -> None:
    assert list(SHOWN) == [(route.method, route.path) for route in es.ROUTES]


@pytest.mark.parametrize("route", es.ROUTES, ids=lambda r: f"{r.method} {r.path}")
def test_a_route_is_shown_with_its_fields_and_an_example_to_try(
    route: es.Route,
) -> None:
    text = html.unescape(SHOWN[route.method, route.path])
    assert route.summary in text
    assert '<button type="button">Send</button>' in text
    assert ("<input>" in text) == ("{" in route.path)
    fields = re.findall(r"<tr><td>(\w+)<td>", text)
    if route.form is None:
        assert not fields and "<textarea" not in text
        return
    schema = es.schema_of(route.form)
    assert fields == list(schema["properties"])
    example = re.search(r"<textarea[^>]*>\n(.*?)</textarea>", text, re.DOTALL)
    assert example and json.loads(example[1]) == schema.get("examples", [{}])[0]


def test_the_page_has_no_outside_parts() -> None:
    assert not re.search(r"https?://|src=|href=|@import|url\(", PAGE)


def test_the_page_makes_no_markup_of_strings_and_stores_nothing() -> None:
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\("
    )
    kept = r"Storage|cookie|indexedDB"
    assert not re.search(f"{forbidden}|{kept}", PAGE)
    assert not re.search(r"(?i)<[^>]+ (on[a-z]+|style)=", PAGE)


def test_the_policy_allows_just_the_script_and_style_of_the_page() -> None:
    for tag in ("script", "style"):
        before, _, rest = PAGE.partition(f"<{tag}>")
        text, _, after = rest.partition(f"</{tag}>")
        assert text and f"<{tag}" not in before + after
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in POLICY
    assert "unsafe" not in POLICY and "*" not in POLICY and "http" not in POLICY
    assert POLICY.startswith("default-src 'none'; ")


def test_the_script_is_readable_and_the_page_is_plain_text() -> None:
    script = PAGE.partition("<script>")[2]
    assert max(map(len, script.splitlines())) <= 100
    assert PAGE.isascii()
    assert "\r" not in PAGE  # browsers hash what they read: \n alone


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_what_generates_is_tried_as_a_stream_unless_one_changes_that(path: str) -> None:
    route = next(one for one in es.ROUTES if one.path == path)
    assert route.form is not None
    assert es.schema_of(route.form)["examples"][0]["stream"] is True


# --- what the script shows ---

# Just what it uses of a browser. Each reply comes in the parts of argv, and what the page
# shows is noted before the next part comes.
BROWSER = """
const [type, ...parts] = JSON.parse(process.argv[1]);
const told = [];
const element = (own = {}) => ({ addEventListener(name, call) { this[name] = call; }, ...own });
const [button, status, answer, curl] = [0, 0, 0, 0].map(() => element({ textContent: "" }));
const route = element({
  dataset: { method: "POST", path: "/x" },
  querySelector: (name) => ({ button, output: status, ".answer": answer, ".curl": curl })[name],
});
globalThis.location = new URL("http://127.0.0.1/docs");
globalThis.document = {
  getElementById: () => element({ value: "" }),
  querySelectorAll: () => [route],
};
globalThis.fetch = async () => new Response(new ReadableStream({
  async pull(controller) {
    await new Promise((resolve) => setTimeout(resolve, 20));
    told.push(answer.textContent.split("\\n\\n").slice(1).join("\\n\\n"));
    const part = parts.shift();
    if (part === undefined) controller.close();
    else if (part === null) controller.error(new Error("cut off"));
    else controller.enqueue(new TextEncoder().encode(part));
  },
}, { highWaterMark: 0 }), { status: 200, statusText: "OK", headers: { "content-type": type } });
"""
AFTER = """
await button.click();
const shown = answer.textContent.split("\\n\\n").slice(1).join("\\n\\n");
console.log(JSON.stringify({ told, shown, status: status.textContent, disabled: button.disabled }));
"""
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")


def sent(content_type: str, *parts: str | None) -> dict[str, Any]:
    """What the page shows of a reply in these parts; None: it breaks off."""
    script = PAGE.partition("<script>")[2].partition("</script>")[0]
    whole = BROWSER + script.replace('"use strict";', "") + AFTER
    command = [NODE or "", "--input-type=module", "-e", whole]
    done = subprocess.run(
        [*command, json.dumps([content_type, *parts])],
        capture_output=True,
        text=True,
        timeout=kit.DEADLINE_S,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["disabled"] is False
    return found


@needs_node
@pytest.mark.parametrize(
    "kind", ["text/event-stream", "text/plain; charset=utf-8", "application/x-ndjson"]
)
def test_a_stream_is_shown_as_it_grows(kind: str) -> None:
    found = sent(kind, "one\n", "two\n", "three")
    assert found["told"] == ["", "one\n", "one\ntwo\n", "one\ntwo\nthree"]
    assert found["shown"] == "one\ntwo\nthree"
    assert found["status"] == "200 OK"


@needs_node
def test_json_is_shown_once_it_is_whole() -> None:
    found = sent("application/json", '{"a": [', "1]}")
    assert found["told"] == ["", "", ""]
    assert json.loads(found["shown"]) == {"a": [1]}


@needs_node
def test_a_stream_that_breaks_off_is_said_to() -> None:
    found = sent("text/plain", "one", None)
    assert found["shown"] == "one"
    assert "not all of it" in found["status"]
