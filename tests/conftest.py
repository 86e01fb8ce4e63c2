"""What runs beside what under pytest-xdist (``make test``): unit and loopback files, and two queues of ranks."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import pytest

_NEED_THE_DEMO = ("test_demo.py", "test_resume.py", "test_retrieval_faults.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the demo's tests first, for they take longest, and then the others with ranks."""
    for item in items:
        if "demo" in getattr(item, "fixturenames", ()) and _queue(item.nodeid) != "demo":
            raise pytest.UsageError(f"{item.nodeid} needs the demo: name its file in {__file__}")
    items.sort(key=lambda item: {"demo": 0, "ranks": 1}.get(_queue(item.nodeid), 2))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process runs a queue, test after test.

    Tests that need the demo share it. The others that start ranks wait for each other: ranks share two cores. Marks
    would say the same, but with pytest 9.2 pytest-xdist 3.8 does not see them (``--dist loadgroup``).
    """
    from xdist.scheduler import LoadScopeScheduling

    class Queues(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return _queue(nodeid)

    return Queues(config, log)


def _queue(nodeid: str) -> str:
    path = PurePath(nodeid.partition("::")[0])
    if path.name in _NEED_THE_DEMO:
        return "demo"
    return "ranks" if path.parent.name in ("distributed", "e2e") else str(path)
