"""Programs that are forked for a test behave as if they had been started from nothing."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from tests.forkserver import PRELOADED, run_program

PROGRAM = """
import os, sys
print(os.getcwd(), os.environ.get("ONLY_HERE"), "HOME" in os.environ, sys.argv[1:], __name__)
print("wrong", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("name", PRELOADED)
def test_every_preloaded_module_exists(name: str) -> None:
    assert importlib.util.find_spec(name) is not None


def test_a_forked_program_has_its_own_arguments_environment_folder_and_streams(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    before = dict(os.environ), os.getcwd(), list(sys.argv)
    done = run_program(
        [str(tmp_path / "program.py"), "a", "b"], environment={"ONLY_HERE": "yes"}, cwd=tmp_path, timeout_s=60
    )
    assert (done.returncode, done.stderr) == (3, "wrong\n")
    assert done.stdout == f"{tmp_path} yes False ['a', 'b'] __main__\n"
    assert (dict(os.environ), os.getcwd(), list(sys.argv)) == before


def test_a_forked_program_that_does_not_end_is_killed(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import time\nprint('waiting', flush=True)\ntime.sleep(60)\n")
    with pytest.raises(TimeoutError, match="waiting"):
        run_program([str(tmp_path / "program.py")], environment={}, cwd=tmp_path, timeout_s=2)
