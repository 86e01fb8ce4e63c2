"""What a run writes and shows while it goes: metrics, trajectories, seconds by phase, progress, its summary.

Knows nothing of models or search engines: values and records come in, files and lines go out. Only the main rank
writes; reducing metrics over ranks is the loop's work.
"""

from megatron_sdsearch.logging.idle_steps import idle_step_warnings
from megatron_sdsearch.logging.metrics import MetricsLog
from megatron_sdsearch.logging.progress import PhaseTimer, ProgressDisplay
from megatron_sdsearch.logging.summary import final_table
from megatron_sdsearch.logging.trajectories import TrajectoryLog

__all__ = ["MetricsLog", "PhaseTimer", "ProgressDisplay", "TrajectoryLog", "final_table", "idle_step_warnings"]
