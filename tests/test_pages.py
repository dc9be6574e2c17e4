"""Room PAGES: one page that needs nothing else, and a policy that lets it do no more."""

from __future__ import annotations

import base64
import hashlib
import re

import embellama_server as pages

POLICY = dict(pages.DOCS_POLICY)["content-security-policy"]


def test_the_page_has_no_outside_parts() -> None:
    assert not re.search(r"https?://|src=|href=|@import|url\(", pages.DOCS_PAGE)


def test_the_page_makes_no_markup_of_strings_and_stores_nothing() -> None:
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\("
    )
    kept = r"Storage|cookie|indexedDB"
    assert not re.search(f"{forbidden}|{kept}", pages.DOCS_PAGE)
    assert not re.search(r"(?i)<[^>]+ (on[a-z]+|style)=", pages.DOCS_PAGE)


def test_the_policy_allows_just_the_script_and_style_of_the_page() -> None:
    for tag in ("script", "style"):
        before, _, rest = pages.DOCS_PAGE.partition(f"<{tag}>")
        text, _, after = rest.partition(f"</{tag}>")
        assert text and f"<{tag}" not in before + after
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in POLICY
    assert "unsafe" not in POLICY and "*" not in POLICY and "http" not in POLICY
    assert POLICY.startswith("default-src 'none'; ")


def test_the_page_is_readable() -> None:
    assert max(map(len, pages.DOCS_PAGE.splitlines())) <= 100
    assert pages.DOCS_PAGE.isascii()
    assert "\r" not in pages.DOCS_PAGE  # browsers hash what they read: \n alone
