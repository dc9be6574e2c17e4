"""The sieges, shorter: what they assert must hold on any machine.

Each needs tools that a developer may lack: `.ci/run` installs them.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import pytest

from tests import siege

SHORT: dict[str, Callable[[], dict[str, object]]] = {
    "slow": functools.partial(siege.slow, seconds=8),
    "flood": functools.partial(siege.flood, seconds=4),
    "overload": functools.partial(siege.overload, seconds=8),
    "restart": functools.partial(siege.restart, rounds=1),
}


@pytest.mark.xdist_group("flood")
@pytest.mark.heavy
@pytest.mark.model
@pytest.mark.parametrize("name", SHORT)
def test_the_server_stands(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    missing = [tool for tool in siege.TOOLS.get(name, ()) if not shutil.which(tool)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    record_property(name, SHORT[name]())
