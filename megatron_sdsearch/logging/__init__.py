"""Output of a run: metrics, trajectories, seconds by phase, progress, summary.

Independent of models and search engines. Only the main rank writes; the loop reduces metrics over ranks.
"""

from megatron_sdsearch.logging.idle_steps import idle_step_warnings
from megatron_sdsearch.logging.metrics import MetricsLog
from megatron_sdsearch.logging.progress import PhaseTimer, ProgressDisplay
from megatron_sdsearch.logging.summary import final_table
from megatron_sdsearch.logging.trajectories import TrajectoryLog

__all__ = ["MetricsLog", "PhaseTimer", "ProgressDisplay", "TrajectoryLog", "final_table", "idle_step_warnings"]
