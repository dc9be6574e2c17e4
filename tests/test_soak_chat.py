"""A chat and an embedding model under a mixed load, for a short time."""

from __future__ import annotations

import pytest

from tests import soak_chat


@pytest.mark.heavy
def test_chats_and_embeddings_are_right_and_leave_nothing_behind() -> None:
    assert soak_chat.soaked(seconds=20, seed=1)
