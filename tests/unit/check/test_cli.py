"""``check`` as a shell and a script see it: exit codes, the table, the JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.check.tiny_run import TinyRun

ROOT = Path(__file__).parents[3]
WARNING = "objective.alpha_warmup_steps=9"
ERROR = "objective.alpa=1"


def sdsearch(tiny: TinyRun, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "megatron_sdsearch", "check", str(tiny.config), *arguments]
    return subprocess.run(
        command, cwd=tiny.folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "code", "last"),
    [
        ((), 0, "no errors, no warnings: ready to run"),
        ((WARNING,), 1, "no errors, 1 warning: the run would start"),
        ((WARNING, ERROR, "--nodes", "1"), 2, "1 error, 1 warning: the run would fail"),
    ],
)
def test_the_table_ends_with_one_line_and_an_exit_code(
    tiny: TinyRun, arguments: tuple[str, ...], code: int, last: str
) -> None:
    before = sorted(tiny.folder.rglob("*"))
    done = sdsearch(tiny, *arguments)
    assert (done.returncode, done.stdout.splitlines()[-1].strip()) == (code, last)
    assert "Traceback" not in done.stderr
    assert sorted(tiny.folder.rglob("*")) == before, "a check leaves nothing behind"


def test_json_is_one_object_with_everything(tiny: TinyRun) -> None:
    done = sdsearch(tiny, "--json", "--nproc-per-node", "2", WARNING, ERROR)
    told = json.loads(done.stdout)
    assert told.keys() == {
        "config", "exit_code", "num_errors", "num_warnings", "num_notes", "world", "findings"
    }  # fmt: skip
    assert (done.returncode, told["exit_code"]) == (2, 2)
    assert (told["num_errors"], told["num_warnings"]) == (1, 1)
    assert len(told["findings"]) == 2 + told["num_notes"]
    assert told["findings"][0] == {
        "severity": "error",
        "section": "configuration",
        "field": "objective.alpa",
        "problem": "unknown key",
        "mend": "did you mean alpha?",
    }
    assert "2 trainer processes per node (--nproc-per-node)" in told["world"]


def test_megatron_is_not_waited_for(tiny: TinyRun) -> None:
    code = (
        "import sys; from pathlib import Path; from megatron_sdsearch.check.run import run_checks; "
        f"run_checks(Path({str(tiny.config)!r})); print('megatron.core' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_wrong_command_line_exits_2_with_its_usage(tiny: TinyRun) -> None:
    done = sdsearch(tiny, "--device", "tpu")
    assert done.returncode == 2
    assert done.stderr.startswith("Usage: ")
