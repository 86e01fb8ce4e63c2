"""From a configuration and an allocation to a plan: whether it fits, and which layouts of its ranks are faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_sdsearch.allocation import Allocation, allocation_problems, assign_roles
from megatron_sdsearch.config import ParallelConfig, RunConfig
from megatron_sdsearch.errors import ConfigError, raise_first
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.model.shape import ModelShape, layout_problems
from megatron_sdsearch.plan.memory import GIB, HEADROOM, MemoryPlan, busiest_rank, plan_memory
from megatron_sdsearch.plan.roofline import HARDWARE, Estimator, Gpu
from megatron_sdsearch.plan.workload import Assumptions, Layout, assume, step_load

_NUM_BETTER = 3
_WIDTHS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout with what it would need.

    Attributes:
        layout: of the ranks.
        memory: of the busiest one.
        phases_s: estimated seconds of a step, uncalibrated; empty on CPU.
        why_not: what does not fit, in one sentence; None when all does.
    """

    layout: Layout
    memory: MemoryPlan
    phases_s: dict[str, float]
    why_not: str | None

    @property
    def step_s(self) -> float:
        """Seconds of all phases, one after the other."""
        return sum(self.phases_s.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Result of `plan`.

    Attributes:
        config: of the run.
        shape: of its model.
        assumed: lengths and efficiencies.
        gpu: None on CPU, where memory alone is planned.
        given: the configured layout.
        better: at most three layouts of the same ranks that fit, and are faster than ``given`` if that fits, too.
    """

    config: RunConfig
    shape: ModelShape
    assumed: Assumptions
    gpu: Gpu | None
    given: Candidate
    better: list[Candidate]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: bytes, seconds, and the assumptions behind them."""
        if self.gpu is None:
            return {"memory": _memory_dict(self.given.memory)}
        return {
            "hardware": {**asdict(self.gpu), "headroom": HEADROOM},
            "assumptions": {**asdict(self.assumed), "calibrated": False},
            "num_params": self.shape.num_params,
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
            "run_hours": candidate.step_s * self.config.train.num_steps / 3600,
        }

    def show(self, console: Console) -> None:
        """Print the memory by parts, the time by phases, and the settings of better layouts."""
        given, title = self.given, "Memory of one process"
        if self.gpu is not None:
            title = f"Memory of the busiest rank (stage {given.memory.stage}), {self.gpu.name} of "
            title += readable_size(self.gpu.memory_bytes)
        table = Table("part", "bytes", title=title, title_justify="left", min_width=len(title))
        memory, peak = given.memory, given.memory.peak_moment
        others = {name: sum(parts.values()) for name, parts in memory.moments.items() if name != peak}
        standing = sum(memory.standing.values())
        for section in (
            memory.standing,
            {f"{peak}: {name}": size for name, size in memory.moments[peak].items()},
            {"peak": memory.total_bytes} | {f"at {name!r}": standing + size for name, size in others.items()},
            {f"server's GPU: {name}": size for name, size in memory.server.items()},
        ):
            for name, size in section.items():
                table.add_row(name, readable_size(size))
            table.add_section()
        console.print(table)
        if self.gpu is None:
            return
        lines = [f"does not fit: {given.why_not}"] if given.why_not is not None else []
        hours = given.step_s * self.config.train.num_steps / 3600
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in given.phases_s.items())
        lines.append(f"uncalibrated: {given.step_s:.1f} s a step, {hours:.1f} h for the run; {phases}")
        for number, candidate in enumerate(self.better, 1):
            changes = [each for each in candidate.layout.overrides() if each not in given.layout.overrides()]
            size = readable_size(candidate.memory.total_bytes)
            lines.append(f"{number}: {' '.join(changes)} ({size}, {candidate.step_s:.1f} s a step)")
        if not self.better:
            lines.append(f"no {'faster ' if given.why_not is None else ''}layout of these ranks fits")
        lines.append(f"assumed: {', '.join(f'{name} {value:g}' for name, value in asdict(self.assumed).items())}")
        if self.config.hindsight.content == "documents":
            lines.append("the teacher reads a block and a sequence for each search")
        for line in [*lines, "Nothing of this was measured on a GPU."]:
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def plan_config(
    config: RunConfig, allocation: Allocation, hardware: str | None = None, assumptions: Sequence[str] = ()
) -> RunPlan:
    """Plan a run of the model in ``model.hf_dir``, of which config.json is read.

    Args:
        config: of the run.
        allocation: nodes and GPUs; with ``hardware="cpu"``, processes instead of GPUs.
        hardware: a name of ``HARDWARE``, or ``cpu``; by default h100, or cpu where ``model.dtype`` is float32.
        assumptions: ``name=value``, see ``assume``.

    Raises:
        ConfigError: the model is not supported, or see ``plan_run``.
    """
    shape = ModelShape.from_hf_config(load_hf_config(config.model.hf_dir))
    default = "cpu" if config.model.dtype == "float32" else "h100"
    return plan_run(config, shape, allocation, hardware=hardware or default, assumptions=assumptions)


def plan_run(
    config: RunConfig, shape: ModelShape, allocation: Allocation, *, hardware: str, assumptions: Sequence[str] = ()
) -> RunPlan:
    """Plan the configured layout, and look for better ones.

    Raises:
        ConfigError: the layout does not fit the model or the allocation, or a name or a value is unknown.
    """
    if hardware not in (*HARDWARE, "cpu"):
        raise ConfigError("--hardware", f"{hardware!r} is not known", f"use one of {', '.join(HARDWARE)}, or cpu")
    gpu, gpus_per_node = HARDWARE.get(hardware), allocation.gpus_per_node
    if gpu is None:
        allocation = replace(allocation, gpus_per_node=0, ranks_per_node=gpus_per_node)
    assumed = assume(config, assumptions)
    raise_first([*layout_problems(shape, config.parallel), *allocation_problems(config, allocation)])
    roles, step = assign_roles(config, allocation), step_load(config, assumed)

    def plan(layout: Layout) -> Candidate:
        gpu_bytes = gpu.memory_bytes if gpu is not None else None
        memory = busiest_rank(plan_memory(config, shape, layout, step=step, gpu_bytes=gpu_bytes))
        if gpu is None:
            return Candidate(layout=layout, memory=memory, phases_s={}, why_not=None)
        estimator = Estimator(
            config=config, shape=shape, assumed=assumed, step=step, gpu=gpu, gpus_per_node=gpus_per_node
        )
        phases_s = estimator.phases(layout, memory.kv_tokens)
        return Candidate(layout=layout, memory=memory, phases_s=phases_s, why_not=_why_not(memory, gpu))

    given, best = plan(Layout.from_config(config, roles)), dict[tuple[int, int], Candidate]()
    limit = given.step_s if given.why_not is None else float("inf")
    for layout in other_layouts(config, shape, given.layout, roles.ranks_per_node) if gpu is not None else ():
        candidate = plan(layout)
        # Of layouts that differ in token budget, recomputation or optimizer alone, the fastest stands for all.
        fastest = best.get((layout.tp, layout.pp))
        if candidate.why_not is None and candidate.step_s < (fastest.step_s if fastest is not None else limit):
            best[layout.tp, layout.pp] = candidate
    better = sorted(best.values(), key=lambda candidate: candidate.step_s)[:_NUM_BETTER]
    return RunPlan(config=config, shape=shape, assumed=assumed, gpu=gpu, given=given, better=better)


def other_layouts(config: RunConfig, shape: ModelShape, given: Layout, ranks_per_node: int) -> Iterator[Layout]:
    """Every layout of the same ranks that the model can be divided by; tensor-parallel ranks stay on one node."""
    least = config.longest_sequence.num_tokens  # must fit a row
    budgets = {least, given.max_tokens // 2, given.max_tokens, 2 * given.max_tokens}
    for tp, pp in product(_WIDTHS, range(1, shape.num_layers + 1)):
        sizes = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        if ranks_per_node % tp or given.num_ranks % (tp * pp) or layout_problems(shape, sizes):
            continue
        base = replace(given, tp=tp, pp=pp, dp=given.num_ranks // (tp * pp), sequence=tp > 1)
        for recompute, budget, is_sharded in product((False, True), sorted(budgets), (False, True)):
            if budget >= least and (base.dp > 1 or not is_sharded):
                yield replace(base, recompute=recompute, max_tokens=budget, distributed_optimizer=is_sharded)


def readable_size(num_bytes: float) -> str:
    """Format bytes for people, in GiB as CUDA counts, or in MiB if few."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB / 10 else f"{num_bytes / 2**20:.1f} MiB"


def _why_not(memory: MemoryPlan, gpu: Gpu) -> str | None:
    """The largest parts of what does not fit; None when it fits."""
    if memory.fits(gpu.memory_bytes):
        return None
    usable = readable_size(gpu.memory_bytes * (1 - HEADROOM))
    if memory.server_parts_needed > gpu.memory_bytes * (1 - HEADROOM):
        return f"a server needs {readable_size(memory.server_parts_needed)} of {usable} for one trajectory"
    largest = sorted(memory.parts.items(), key=lambda part: -part[1])[:3]
    return (
        f"{readable_size(memory.total_bytes)} at {memory.peak_moment!r}, and {usable} of {gpu.name}'s "
        f"{readable_size(gpu.memory_bytes)} are usable; largest: "
        f"{', '.join(f'{name} {readable_size(size)}' for name, size in largest)}"
    )


def _memory_dict(memory: MemoryPlan) -> dict[str, Any]:
    return {**asdict(memory), "total_bytes": memory.total_bytes, "peak_moment": memory.peak_moment}
