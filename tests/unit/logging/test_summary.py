"""What stands in ``summary.json`` of lost trajectories, beside the figures that leave them out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_sdsearch.config import parse_config
from megatron_sdsearch.logging import MetricsLog, names
from megatron_sdsearch.logging.summary import SUMMARY_FILE, write_summary


def test_counts_stand_beside_the_figures(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.log(0, {names.EVAL_EM: 0.5, names.EVAL_NUM_TRAJECTORIES: 100, names.EVAL_NUM_LOST: 0})
    log.log(1, {names.NUM_LOST: 3, names.NUM_PROMPT_TOO_LONG: 2, names.NUM_EOS_WITHOUT_ACTION: 7})
    log.log(2, {names.NUM_LOST: 1, names.NUM_PROMPT_TOO_LONG: 2, names.NUM_EOS_WITHOUT_ACTION: 0})
    log.log(2, {names.EVAL_EM: 0.75, names.EVAL_NUM_TRAJECTORIES: 100, names.EVAL_NUM_LOST: 19})
    log.close()
    config = parse_config(
        {"run_dir": str(tmp_path), "model": {"hf_dir": "m"}, "data": {"train": "t"}, "retrieval": {"corpus": "c"}}
    )
    parallel: Any = SimpleNamespace(tp_size=1, pp_size=1, dp_size=1, is_main=True)
    summary = write_summary(config, parallel, 1.0)
    assert (summary["em_start"], summary["num_evaluated_start"], summary["num_lost_start"]) == (0.5, 100, 0)
    assert (summary["em_end"], summary["num_evaluated_end"], summary["num_lost_end"]) == (0.75, 100, 19)
    assert (summary["num_lost"], summary["num_prompt_too_long"], summary["num_eos_without_action"]) == (4, 4, 7)
    assert json.loads((tmp_path / SUMMARY_FILE).read_text()) == summary
