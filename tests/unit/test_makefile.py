"""A wrong Python is refused before make downloads anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A Python that says of itself that it is 3.13, and writes down whatever else it is asked to do.
NEWER = f"""#!/bin/sh
[ "$1" = -c ] && exec {sys.executable} -c "import sys; sys.version_info = (3, 13, 1, 'final', 0); $2"
echo "$@" >> asked
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tools" / "sglang_cpu", tmp_path / "tools" / "sglang_cpu")
    (tmp_path / "newer").write_text(NEWER)
    (tmp_path / "newer").chmod(0o755)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("demo", "PYTHON=./newer"), "Python 3.11 or 3.12 is needed, and './newer' is 3.13"),
        (("demo", "PYTHON=./nowhere"), "Python 3.11 or 3.12 is needed, and './nowhere' is no Python"),
        (("demo", "PYTHON="), "Python 3.11 or 3.12 is needed, and '' is no Python: make PYTHON=/path/to/python"),
        ((".sglang/.installed", "PYTHON=./newer"), "Python 3.11 or 3.12 is needed, and './newer' is 3.13"),
        (("test-latest", "LATEST_PYTHON=./newer"), "Python 3.12 is needed, and './newer' is 3.13: make LATEST_PYTHON="),
    ],
)
def test_a_wrong_python_is_refused_first(arguments: tuple[str, ...], told: str, checkout: Path) -> None:
    done = make(checkout, *arguments)
    assert done.returncode == 2
    first, *rest = done.stderr.splitlines()
    assert first.startswith(told)
    assert [line for line in rest if not line.startswith("make: ***")] == []
    assert done.stdout == ""
    assert not (checkout / "asked").exists()


def test_an_environment_of_a_wrong_python_is_not_filled_up(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / "newer").rename(checkout / ".venv" / "bin" / "python")
    done = make(checkout, "demo", f"PYTHON={sys.executable}")
    assert "'.venv/bin/python' is 3.13: make clean and make PYTHON=" in done.stderr
    assert not (checkout / "asked").exists()
