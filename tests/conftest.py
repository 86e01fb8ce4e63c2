"""What runs beside what under pytest-xdist (``make test``): unit and loopback files, two queues of ranks."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name each test's group: one process runs a group, test after test, and groups are given out in this order.

    Tests that need the demo share it, and it takes longest, so that it starts first. The others that start ranks wait
    for each other: their ranks share two cores.
    """
    items.sort(key=lambda item: _ORDER.index(_kind(item)))
    for item in items:
        kind = _kind(item)
        group = item.nodeid.partition("::")[0] if kind == "file" else kind
        item.add_marker(pytest.mark.xdist_group(group))


_ORDER = ("demo", "ranks", "file")


def _kind(item: pytest.Item) -> str:
    if "demo" in getattr(item, "fixturenames", ()):
        return "demo"
    return "ranks" if item.path.parent.name in ("distributed", "e2e") else "file"
