"""Plan a configuration on an allocation: memory, time, and faster layouts of the same ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from megatron_sdsearch.allocation import Allocation, allocation_problems, assign_roles
from megatron_sdsearch.config import ParallelConfig, RunConfig
from megatron_sdsearch.errors import ConfigError, raise_problems
from megatron_sdsearch.model.shape import ModelShape, layout_problems
from megatron_sdsearch.plan.memory import HEADROOM, MemoryPlan, busiest_rank, plan_memory, readable_size
from megatron_sdsearch.plan.roofline import HARDWARE, Estimator
from megatron_sdsearch.plan.workload import Layout, assume, step_load

_NUM_BETTER = 3
_WIDTHS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout with its memory and time.

    Attributes:
        layout: of the ranks.
        memory: of the busiest rank.
        phases_s: estimated seconds of a step by phase, uncalibrated; empty on CPU.
        why_not: why it does not fit, in one sentence; None if it does.
    """

    layout: Layout
    memory: MemoryPlan
    phases_s: dict[str, float]
    why_not: str | None

    @property
    def step_s(self) -> float:
        """Seconds of all phases in sequence."""
        return sum(self.phases_s.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Result of `plan`.

    Attributes:
        estimator: the run, its GPUs and the assumptions.
        num_gpus: of the allocation.
        given: the configured layout.
        better: at most three layouts of the same ranks that fit, and are faster than ``given`` if it fits; none on CPU,
            where only memory is planned.
    """

    estimator: Estimator
    num_gpus: int
    given: Candidate
    better: list[Candidate]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: bytes, seconds, and the assumptions behind them."""
        if self.estimator.gpu.is_cpu:
            return {"memory": _memory_dict(self.given.memory)}
        return {
            "hardware": {**asdict(self.estimator.gpu), "num_gpus": self.num_gpus, "headroom": HEADROOM},
            "assumptions": {**asdict(self.estimator.assumed), "calibrated": False},
            "num_params": self.estimator.shape.num_params,
            "given": self._candidate_dict(self.given),
            "better": [self._candidate_dict(candidate) for candidate in self.better],
        }

    def _candidate_dict(self, candidate: Candidate) -> dict[str, Any]:
        return {
            **asdict(candidate),
            "overrides": candidate.layout.overrides(),
            "fits": candidate.why_not is None,
            "memory": _memory_dict(candidate.memory),
            "step_s": candidate.step_s,
            "run_hours": self._run_hours(candidate),
        }

    def _run_hours(self, candidate: Candidate) -> float:
        return candidate.step_s * self.estimator.config.train.num_steps / 3600

    def to_text(self) -> str:
        """Format the memory by parts, the time by phases, and the settings of better layouts."""
        given, memory, gpu, config = self.given, self.given.memory, self.estimator.gpu, self.estimator.config
        standing, peak = sum(memory.standing.values()), memory.peak_moment
        rows = {
            **memory.standing,
            **{f"{peak}: {name}": size for name, size in memory.moments[peak].items()},
            "peak": memory.total_bytes,
            **{
                f"at {name!r}": standing + sum(memory.moments[name].values()) for name in memory.moments if name != peak
            },
            **{f"server's GPU: {name}": size for name, size in memory.server.items()},
        }
        owner = "one process"
        if not gpu.is_cpu:
            owner = f"the busiest rank (stage {memory.stage}), {gpu.name} of {readable_size(gpu.memory_bytes)}"
        lines = [f"Memory of {owner}", *(f"  {name:32}{readable_size(size):>12}" for name, size in rows.items())]
        if gpu.is_cpu:
            return "\n".join(lines)
        if given.why_not is not None:
            lines.append(f"does not fit: {given.why_not}")
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in given.phases_s.items())
        lines.append(f"uncalibrated: {given.step_s:.1f} s a step, {self._run_hours(given):.1f} h for the run; {phases}")
        for number, candidate in enumerate(self.better, 1):
            changes = [each for each in candidate.layout.overrides() if each not in given.layout.overrides()]
            size = readable_size(candidate.memory.total_bytes)
            lines.append(f"{number}: {' '.join(changes)} ({size}, {candidate.step_s:.1f} s a step)")
        if not self.better:
            lines.append(f"no {'faster ' if given.why_not is None else ''}layout of these ranks fits")
        assumed = ", ".join(f"{name} {value:g}" for name, value in asdict(self.estimator.assumed).items())
        by_search = "; the teacher reads a block and a sequence for each search"
        lines.append(f"assumed: {assumed}{by_search if config.hindsight.content == 'documents' else ''}")
        return "\n".join([*lines, "Nothing of this was measured on a GPU."])


def plan_run(
    config: RunConfig,
    shape: ModelShape,
    allocation: Allocation,
    *,
    hardware: str | None = None,
    assumptions: Sequence[str] = (),
) -> RunPlan:
    """Plan the configured layout, and look for better ones.

    Args:
        config: of the run.
        shape: of its model.
        allocation: nodes and GPUs; with ``hardware="cpu"``, processes instead of GPUs.
        hardware: a name of ``HARDWARE``; by default h100, or cpu where ``model.dtype`` is float32.
        assumptions: ``name=value``, see ``assume``.

    Raises:
        ConfigError: the layout does not fit the model or the allocation, or a name or a value is unknown.
    """
    hardware = hardware or ("cpu" if config.model.dtype == "float32" else "h100")
    if hardware not in HARDWARE:
        raise ConfigError("--hardware", f"{hardware!r} is not known", f"use one of {', '.join(HARDWARE)}")
    gpu, assumed = HARDWARE[hardware], assume(config, assumptions)
    estimator = Estimator(
        config=config,
        shape=shape,
        assumed=assumed,
        step=step_load(config, assumed),
        gpu=gpu,
        gpus_per_node=allocation.gpus_per_node,
    )
    if gpu.is_cpu:
        allocation = replace(allocation, gpus_per_node=0, ranks_per_node=allocation.gpus_per_node)
    raise_problems([*layout_problems(shape, config.parallel), *allocation_problems(config, allocation)])
    roles = assign_roles(config, allocation)
    given, best = plan_layout(estimator, Layout.from_config(config, roles)), dict[tuple[int, int], Candidate]()
    limit = given.step_s if given.why_not is None else float("inf")
    for layout in () if gpu.is_cpu else other_layouts(config, shape, given.layout, roles.ranks_per_node):
        candidate = plan_layout(estimator, layout)
        # Only keep the fastest of layouts that differ in token budget, recomputation or optimizer.
        fastest = best.get((layout.tp, layout.pp))
        if candidate.why_not is None and candidate.step_s < (fastest.step_s if fastest is not None else limit):
            best[layout.tp, layout.pp] = candidate
    better = sorted(best.values(), key=lambda candidate: candidate.step_s)[:_NUM_BETTER]
    num_gpus = allocation.num_nodes * allocation.gpus_per_node
    return RunPlan(estimator=estimator, num_gpus=num_gpus, given=given, better=better)


def plan_layout(estimator: Estimator, layout: Layout) -> Candidate:
    """Plan memory and, on GPUs, time of one layout."""
    step, gpu_bytes = estimator.step, None if estimator.gpu.is_cpu else estimator.gpu.memory_bytes
    memory = busiest_rank(plan_memory(estimator.config, estimator.shape, layout, step=step, gpu_bytes=gpu_bytes))
    phases_s = {} if gpu_bytes is None else estimator.phases(layout, memory.kv_tokens)
    why_not = None if gpu_bytes is None else memory.why_not(gpu_bytes)
    return Candidate(layout=layout, memory=memory, phases_s=phases_s, why_not=why_not)


def other_layouts(config: RunConfig, shape: ModelShape, given: Layout, ranks_per_node: int) -> Iterator[Layout]:
    """Yield every layout of the same ranks that divides the model; tensor-parallel ranks stay on one node."""
    least = config.longest_sequence.num_tokens  # must fit in a row
    budgets = {least, given.max_tokens // 2, given.max_tokens, 2 * given.max_tokens}
    for tp, pp in product(_WIDTHS, range(1, shape.num_layers + 1)):
        sizes = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        if ranks_per_node % tp or given.num_ranks % (tp * pp) or layout_problems(shape, sizes):
            continue
        base = replace(given, tp=tp, pp=pp, dp=given.num_ranks // (tp * pp), sequence=tp > 1)
        for recompute, budget, is_sharded in product((False, True), sorted(budgets), (False, True)):
            if budget >= least and (base.dp > 1 or not is_sharded):
                yield replace(base, recompute=recompute, max_tokens=budget, distributed_optimizer=is_sharded)


def _memory_dict(memory: MemoryPlan) -> dict[str, Any]:
    return {**asdict(memory), "total_bytes": memory.total_bytes, "peak_moment": memory.peak_moment}
