"""What a person is told when all ranks fail alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_wrong_setting_is_said_once_under_torchrun(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("run_dir: run\nseed: x\nmodel: {hf_dir: a}\ndata: {train: b}\nretrieval: {corpus: c}\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "megatron_sdsearch", "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    said, _, report = done.stderr.partition("megatron_sdsearch FAILED")
    assert said.count("ConfigError: seed: 'x' is not valid") == 1
    last = report.strip().splitlines()[-2]  # below it is a border
    assert last.startswith("  traceback : ConfigError: seed: 'x' is not valid"), "the last words are ours"
