"""What a run writes down and shows while it goes: seconds by phase, metrics, trajectories, progress.

Knows nothing of models or search engines: numbers and records come in, files and lines go out. Only the rank that
owns the run's folder uses the sinks; reducing numbers over ranks is the loop's.
"""

from megatron_sdsearch.logging.metrics import MetricsLog
from megatron_sdsearch.logging.phases import PhaseTimer
from megatron_sdsearch.logging.progress import ProgressDisplay
from megatron_sdsearch.logging.stalls import warnings_of
from megatron_sdsearch.logging.summary import final_table
from megatron_sdsearch.logging.trajectories import TrajectoryLog

__all__ = ["MetricsLog", "PhaseTimer", "ProgressDisplay", "TrajectoryLog", "final_table", "warnings_of"]
