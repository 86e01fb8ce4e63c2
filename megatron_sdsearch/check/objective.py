"""Settings of the objective and the schedule that contradict each other without being wrong one by one."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_sdsearch.check.findings import Finding
from megatron_sdsearch.check.subject import Subject
from megatron_sdsearch.config import RunConfig

_SHOWN_PASSAGES = 3
"""That the autorefine profile promises in words."""


def check(subject: Subject) -> Iterator[Finding]:
    """Nothing of a warm start, which has no objective to set."""
    if not subject.is_rl:
        return
    yield from _distillation(subject.config)
    yield from _sampling(subject.config)
    yield from _prompts(subject.config)


def _distillation(config: RunConfig) -> Iterator[Finding]:
    objective, num_steps = config.objective, config.train.num_steps
    first = objective.first_distilling_step
    if first is None:
        yield Finding.note("objective.alpha", "0: GRPO alone, without self-distillation")
    elif first >= num_steps:
        yield Finding.warning(
            "objective.alpha_warmup_steps",
            f"{objective.alpha_warmup_steps} of train.num_steps = {num_steps}: the run ends before it distils",
            f"lower it below {num_steps}, or train longer; objective.alpha=0 says that GRPO alone is meant",
        )
    if config.telemetry.query_probe and (first is None or first >= num_steps):
        yield Finding.warning(
            "telemetry.query_probe",
            "true, and it looks at the first step that distils, which this run has not",
            "set it to false",
        )


def _sampling(config: RunConfig) -> Iterator[Finding]:
    rollout, objective = config.rollout, config.objective
    corrects = objective.importance_correction != "none"
    if rollout.top_p < 1.0 and corrects:
        yield Finding.warning(
            "objective.importance_correction",
            f"{objective.importance_correction} with rollout.top_p={rollout.top_p}: its ratios know nothing of the cut "
            "tail, so that they correct towards another distribution",
            "set rollout.top_p=1 or importance_correction=none",
        )
    elif rollout.top_p < 1.0:
        yield Finding.note("rollout.top_p", f"{rollout.top_p}: rollouts are narrower than the policy that is trained")
    if corrects and rollout.engine == "embedded":
        yield Finding.note(
            "objective.importance_correction",
            "the embedded engine computes what the trainer computes: ratios are 1 but for rounding",
        )


def _prompts(config: RunConfig) -> Iterator[Finding]:
    profile, retrieval = config.data.prompt_profile, config.retrieval
    if config.objective.reward == "autorefine" and profile != "autorefine":
        yield Finding.note(
            "objective.reward", f"autorefine pays for <refine>, which the {profile} profile never asks for: it is f1"
        )
    if profile == "autorefine" and retrieval is not None and retrieval.top_k != _SHOWN_PASSAGES:
        yield Finding.warning(
            "retrieval.top_k",
            f"{retrieval.top_k}, and the autorefine prompt promises three documents",
            f"set it to {_SHOWN_PASSAGES}, or take another data.prompt_profile",
        )
