"""Other layouts of the same GPUs: every legal one is planned, what does not fit is dropped, the fastest come first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.plan.allocation import Allocation
from megatron_sdsearch.plan.layout import Layout, Servers
from megatron_sdsearch.plan.memory import HEADROOM, MemoryPlan, plan_memory
from megatron_sdsearch.plan.shape import ModelShape
from megatron_sdsearch.plan.timing import Machine, TimePlan, plan_time
from megatron_sdsearch.plan.workload import StepLoad, Workload

_WIDTHS = (1, 2, 4, 8)
IsLegal = Callable[[int, int], bool]
"""(tensor, pipeline); the rule is ``model.hf_config.check_layout``'s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout with what it would need.

    Attributes:
        layout: it.
        memory: of its busiest rank.
        time: of one step.
    """

    layout: Layout
    memory: MemoryPlan
    time: TimePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Plans layouts of one run on one machine.

    Attributes:
        config: of the run.
        shape: of its model.
        workload: assumed lengths.
        machine: where it is to run.
        allocation: nodes and GPUs, all of which a layout uses.
        is_legal: whether the model can be cut to so many tensor-parallel ranks and pipeline stages.
    """

    config: RunConfig
    shape: ModelShape
    workload: Workload
    machine: Machine
    allocation: Allocation
    is_legal: IsLegal

    def plan(self, layout: Layout) -> Candidate:
        """Memory and time of one layout."""
        memory = plan_memory(
            self.config, self.shape, layout, workload=self.workload, gpu_bytes=self.machine.gpu.memory_bytes
        )
        step = StepLoad.of(self.config, self.workload)
        time = plan_time(self.config, self.shape, layout, step, memory, self.machine)
        return Candidate(layout=layout, memory=memory, time=time)

    def better_than(self, given: Candidate, num: int = 3) -> list[Candidate]:
        """The ``num`` fastest layouts that fit, faster than ``given`` unless that one does not fit.

        Of layouts that differ in token budget, recomputation or optimizer alone, the fastest stands for all.
        """
        fits = self.fits(given)
        best: dict[tuple[object, ...], Candidate] = {}
        for layout in self.layouts(given.layout):
            candidate = self.plan(layout)
            if not self.fits(candidate) or (fits and candidate.time.step_s >= given.time.step_s):
                continue
            key = (layout.tp, layout.pp, layout.servers)
            if key not in best or candidate.time.step_s < best[key].time.step_s:
                best[key] = candidate
        return sorted(best.values(), key=lambda candidate: candidate.time.step_s)[:num]

    def fits(self, candidate: Candidate) -> bool:
        """On the GPUs of the machine."""
        return candidate.memory.fits(self.machine.gpu.memory_bytes)

    def why_not(self, candidate: Candidate) -> str | None:
        """The largest parts of what does not fit, in one sentence; None when it fits."""
        if self.fits(candidate):
            return None
        memory, gpu = candidate.memory, self.machine.gpu
        usable = readable_size(gpu.memory_bytes * (1 - HEADROOM))
        if memory.server_parts_needed > gpu.memory_bytes * (1 - HEADROOM):
            return f"a server needs {readable_size(memory.server_parts_needed)} of {usable} for one trajectory"
        largest = sorted(memory.parts.items(), key=lambda part: -part[1])[:3]
        told = ", ".join(f"{name} {readable_size(size)}" for name, size in largest)
        return (
            f"{readable_size(memory.total_bytes)} at {memory.peak_moment!r}, and {usable} of {gpu.name}'s "
            f"{readable_size(gpu.memory_bytes)} are usable; largest: {told}"
        )

    def layouts(self, given: Layout) -> Iterator[Layout]:
        """Every legal layout of the same GPUs, with the engine that is configured."""
        for servers in self._servers(given.servers):
            trainers = self.allocation.num_trainers(servers)
            per_node = min(trainers, self.allocation.gpus_per_node)
            widths = [size for size in _WIDTHS if per_node % size == 0]  # across nodes layers would wait
            for tp, pp in product(widths, range(1, min(trainers, self.shape.num_layers) + 1)):
                if trainers % (tp * pp) or not self.is_legal(tp, pp):
                    continue
                base = replace(given, tp=tp, pp=pp, dp=trainers // (tp * pp), sequence=tp > 1, servers=servers)
                yield from self._variants(base)

    def _variants(self, base: Layout) -> Iterator[Layout]:
        least = self.config.longest_sequence.num_tokens  # as ``RunConfig`` asks, it must fit a row
        budgets = sorted({least, base.max_tokens // 2, base.max_tokens, 2 * base.max_tokens})
        for recompute, budget, is_sharded in product((False, True), budgets, (False, True)):
            if budget >= least and (base.dp > 1 or not is_sharded):
                yield replace(base, recompute=recompute, max_tokens=budget, distributed_optimizer=is_sharded)

    def _servers(self, given: Servers | None) -> list[Servers | None]:
        if given is None or given.place == "attached":
            return [given]  # not ours to change
        tensors = [size for size in _WIDTHS if self.shape.num_heads % size == 0]
        choices = self.allocation.server_choices(tensors)
        return [given, *(each for each in choices if each != given)]


def readable_size(num_bytes: float) -> str:
    """For people; 2^30 bytes, as CUDA counts, or 2^20 of small things."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:.1f} MiB"
