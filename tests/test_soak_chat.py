"""A chat and an embedding model under a mixed load, for a short time."""

from __future__ import annotations

import pytest

from tests import soak_chat


@pytest.mark.heavy
def test_chats_and_embeddings_are_right_and_leave_nothing_behind() -> None:
    assert soak_chat.soaked(seconds=20, seed=1)


@pytest.mark.parametrize(
    ("likeliest", "other", "lead", "is_hidden"),
    [
        (" the", " these", 0.1, True),
        (" these", " the", 0.1, True),
        ("A", "A", 0.1, True),  # a piece, and a byte
        (" the", " that", 0.1, False),
        (" the", " these", 0.3, False),
    ],
)
def test_a_tie_that_texts_do_not_show_is_known(
    likeliest: str, other: str, lead: float, is_hidden: bool
) -> None:
    tokens = [
        {"token": likeliest, "logprob": -1.0},
        {"token": " else", "logprob": -1.1},
        {"token": other, "logprob": -1.0 - lead},
    ]
    assert soak_chat.hides_a_tie(*tokens) == is_hidden
