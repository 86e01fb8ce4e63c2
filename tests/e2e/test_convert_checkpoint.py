"""tools/convert_checkpoint.py as a shell sees it: exit codes, what is said where, what lies there afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.oracle import make_model
from tests.forkserver import run_program

ROOT = Path(__file__).parents[2]


TOOL = str(ROOT / "tools" / "convert_checkpoint.py")
# The environment of a rank of some job, which must not matter.
ENVIRONMENT = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", COLUMNS="200", NO_COLOR="1")
ENVIRONMENT |= {"RANK": "3", "WORLD_SIZE": "8"}


def convert_from_nothing(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Start an interpreter: what the tool sets before its imports counts."""
    command = [sys.executable, TOOL, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_program([TOOL, *map(str, arguments)], environment=ENVIRONMENT, cwd=ROOT, timeout_s=120)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "m", "llama", is_tied=True)


def test_there_and_back_with_verification(hf_dir: Path, tmp_path: Path) -> None:
    there = convert_from_nothing("to-megatron", hf_dir, tmp_path / "mg", "--tensor", 2, "--pipeline", 2, "--verify")
    assert (there.returncode, there.stderr) == (0, "")
    assert "verified: logits differ by " in there.stdout
    assert f"model.hf_dir={tmp_path / 'mg' / 'hf'} model.megatron_dir={tmp_path / 'mg'}" in there.stdout
    back = convert_from_nothing("to-hf", tmp_path / "mg", tmp_path / "hf", "--verify")
    assert (back.returncode, back.stderr) == (0, "")
    assert "verified: logits differ by " in back.stdout
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (hf_dir / "model.safetensors").read_bytes()
    again = convert("to-hf", tmp_path / "mg", tmp_path / "hf")
    assert again.returncode == 2
    assert "already exists" in again.stderr
    replaced = convert("to-hf", tmp_path / "mg", tmp_path / "hf", "--overwrite", "--dtype", "bfloat16")
    assert replaced.returncode == 0, replaced.stderr
    size = (hf_dir / "model.safetensors").stat().st_size
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size < 0.6 * size


def test_wrong_input_is_one_message_exit_code_2_and_nothing_on_the_disk(hf_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for arguments, message in (
        (("to-megatron", tmp_path / "nowhere", out), "holds no config.json"),
        (("to-megatron", hf_dir, out, "--tensor", 3), "3 does not divide the model's num_attention_heads = 4"),
        (("to-hf", hf_dir, out), "is not a checkpoint"),
        (("to-megatron", hf_dir, hf_dir, "--overwrite"), "holds the model to convert"),
    ):
        done = convert(*arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []
    assert (hf_dir / "model.safetensors").is_file()


def test_a_folder_that_cannot_be_written_is_a_failure(hf_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = convert("to-megatron", hf_dir, tmp_path / "file" / "out")
    assert done.returncode == 1
    assert "NotADirectoryError" in done.stderr
    assert "Traceback" not in done.stderr


def test_overwriting_loses_nothing_but_a_model(hf_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "hf").mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("{}")
    done = convert("to-megatron", hf_dir, run_dir, "--overwrite")
    assert done.returncode == 2
    assert "holds other things than a model, such as hf" in done.stderr
    assert sorted(path.name for path in run_dir.iterdir()) == ["hf", "metrics.jsonl"]
    model = tmp_path / "model"
    for command in ("to-megatron", "to-megatron"):
        done = convert(command, hf_dir, model, "--overwrite")
        assert done.returncode == 0, done.stderr
