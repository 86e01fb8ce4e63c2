"""``check`` as a shell and a script see it: exit codes, the table, the JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_sdsearch.cli import app
from tests.unit.check.tiny_run import TinyRun

ROOT = Path(__file__).parents[3]
WARNING = "objective.alpha_warmup_steps=9"
ERROR = "objective.alpa=1"


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
    done = CliRunner().invoke(app, ["check", str(tiny.config), "--device", "cpu", *arguments])
    assert (done.exit_code, done.stdout.splitlines()[-1].strip()) == (code, last)
    assert sorted(tiny.folder.rglob("*")) == before, "a check leaves nothing behind"


def test_json_is_one_object_with_everything(tiny: TinyRun) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "megatron_sdsearch", "check", str(tiny.config), "--json", "--device", "cpu"]
    command += ["--nproc-per-node", "2", WARNING, ERROR]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr
    printed = json.loads(done.stdout)
    assert set(printed) == set("config exit_code num_errors num_warnings num_notes world findings".split())
    assert (done.returncode, printed["exit_code"]) == (2, 2)
    assert (printed["num_errors"], printed["num_warnings"]) == (1, 1)
    assert len(printed["findings"]) == 2 + printed["num_notes"]
    assert printed["findings"][0] == {
        "severity": "error",
        "section": "configuration",
        "field": "objective.alpa",
        "problem": "unknown key",
        "fix": "did you mean alpha?",
    }
    assert "2 trainer processes per node (--nproc-per-node)" in printed["world"]


def test_megatron_is_not_waited_for() -> None:
    code = "import sys, megatron_sdsearch.check.run; print('megatron.core' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_wrong_option_exits_2_with_its_usage(tiny: TinyRun) -> None:
    done = CliRunner().invoke(app, ["check", str(tiny.config), "--device", "tpu"])
    assert done.exit_code == 2
    assert "'tpu' is not one of 'gpu', 'cpu'" in done.stderr
