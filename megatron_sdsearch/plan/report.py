"""A plan as tables on a terminal, and as one JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from megatron_sdsearch.plan.layout import Layout
from megatron_sdsearch.plan.memory import HEADROOM, MemoryPlan
from megatron_sdsearch.plan.search import Candidate, Planner, readable_size


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Everything that ``plan`` says.

    Attributes:
        planner: what was asked.
        given: the configured layout.
        better: faster ones that fit.
        num_steps: of the run.
    """

    planner: Planner
    given: Candidate
    better: list[Candidate]
    num_steps: int

    @classmethod
    def of(cls, planner: Planner, layout: Layout) -> RunPlan:
        """Plan ``layout`` and look for better ones."""
        given = planner.plan(layout)
        return cls(
            planner=planner,
            given=given,
            better=planner.better_than(given),
            num_steps=planner.config.train.num_steps,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values: bytes, seconds, and the assumptions that they rest on."""
        gpu = self.planner.machine.gpu
        return {
            "hardware": {**asdict(gpu), "num_gpus": self.planner.allocation.num_gpus, "headroom": HEADROOM},
            "assumptions": {
                "workload": asdict(self.planner.workload),
                "efficiency": asdict(self.planner.machine.efficiency),
            },
            "num_params": self.planner.shape.num_params,
            "given": self._candidate(self.given),
            "better": [self._candidate(candidate) for candidate in self.better],
        }

    def _candidate(self, candidate: Candidate) -> dict[str, Any]:
        return {
            "layout": asdict(candidate.layout),
            "overrides": candidate.layout.overrides(),
            "environment": candidate.layout.environment(),
            "fits": self.planner.fits(candidate),
            "why_not": self.planner.why_not(candidate),
            "memory": memory_dict(candidate.memory),
            "step_s": candidate.time.step_s,
            "run_hours": candidate.time.step_s * self.num_steps / 3600,
            "phases_s": {name: dict(parts) for name, parts in candidate.time.phases.items()},
        }

    def show(self, console: Console) -> None:
        """Draw all tables."""
        console.print(Group(self._memory_table(), self._time_table(), self._layout_table()))
        why = self.planner.why_not(self.given)
        if why is not None:
            console.print(f"[bold red]does not fit[/]: {why}", soft_wrap=True)
        nothing = "no faster layout of these GPUs fits" if why is None else "no layout of these GPUs fits"
        console.print(self._commands() or nothing, soft_wrap=True, highlight=False)
        console.print(_told(self.planner), style="dim")

    def _memory_table(self) -> Table:
        memory, gpu = self.given.memory, self.planner.machine.gpu
        return memory_table(
            memory, f"busiest rank (stage {memory.stage}), {gpu.name} of {readable_size(gpu.memory_bytes)}"
        )

    def _time_table(self) -> Table:
        table = Table(title="Seconds of one step", title_justify="left")
        table.add_column("phase")
        table.add_column("s", justify="right")
        table.add_column("of which")
        for name, parts in self.given.time.phases.items():
            told = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items() if seconds >= 0.05)
            table.add_row(name, f"{sum(parts.values()):.1f}", told)
        table.add_section()
        hours = self.given.time.step_s * self.num_steps / 3600
        table.add_row("step", f"{self.given.time.step_s:.1f}", f"{hours:.1f} h for {self.num_steps} steps")
        return table

    def _layout_table(self) -> Table:
        title = f"Layouts of {self.planner.allocation.num_gpus} GPUs: the configured one, and faster ones that fit"
        table = Table(title=title, title_justify="left")
        for column in ("", "TP x PP x DP", "recompute", "tokens", "servers", "memory", "fits", "s a step"):
            table.add_column(column)
        for name, candidate in self._named():
            layout = candidate.layout
            table.add_row(
                name,
                f"{layout.tp} x {layout.pp} x {layout.dp}" + (" sequence" if layout.sequence else ""),
                "full" if layout.recompute else "none",
                str(layout.max_tokens),
                _servers(layout),
                readable_size(candidate.memory.total_bytes),
                "yes" if self.planner.fits(candidate) else "no",
                f"{candidate.time.step_s:.1f}",
            )
        return table

    def _named(self) -> list[tuple[str, Candidate]]:
        return [("given", self.given), *((str(i + 1), each) for i, each in enumerate(self.better))]

    def _commands(self) -> str:
        """What to add to the command line, without what is configured already."""
        changes = [_changes(self.given.layout, candidate.layout) for candidate in self.better]
        return "\n".join(f"{i + 1}: {' '.join(change)}" for i, change in enumerate(changes))


def _changes(given: Layout, layout: Layout) -> list[str]:
    """Nodes for servers are said wherever there are any: whoever submits the job has to say them again."""
    has_nodes = layout.servers is not None and layout.servers.own_nodes > 0
    environment = layout.environment() if has_nodes or layout.environment() != given.environment() else []
    return [*environment, *(each for each in layout.overrides() if each not in given.overrides())]


def _servers(layout: Layout) -> str:
    servers = layout.servers
    if servers is None:
        return "embedded"
    place = f"on {servers.own_nodes} of the nodes" if servers.own_nodes else servers.place
    return f"{servers.num} x {servers.tensor} {place}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessPlan:
    """Everything that ``plan`` says where there are no GPUs.

    Attributes:
        memory: of the busiest process.
    """

    memory: MemoryPlan

    def to_dict(self) -> dict[str, Any]:
        """Plain values: bytes."""
        return {"memory": memory_dict(self.memory)}

    def show(self, console: Console) -> None:
        """Draw the table."""
        console.print(memory_table(self.memory, "one process"))


def memory_dict(memory: MemoryPlan) -> dict[str, Any]:
    """A memory plan as plain values."""
    return {
        "stage": memory.stage,
        "total_bytes": memory.total_bytes,
        "peak_moment": memory.peak_moment,
        "standing": dict(memory.standing),
        "moments": {name: dict(parts) for name, parts in memory.moments.items()},
        "server": dict(memory.server),
        "kv_tokens": memory.kv_tokens,
    }


def memory_table(memory: MemoryPlan, title: str) -> Table:
    """What stands there, the peak, and how far the other moments stay below it."""
    title = f"Memory: {title}"
    table = Table(title=title, title_justify="left", min_width=len(title))
    table.add_column("part")
    table.add_column("bytes", justify="right")
    _add_rows(table, memory.standing)
    table.add_section()
    _add_rows(table, memory.moments[memory.peak_moment], prefix=f"{memory.peak_moment}: ")
    table.add_section()
    table.add_row("peak", readable_size(memory.total_bytes))
    standing = sum(memory.standing.values())
    for name, parts in memory.moments.items():
        if name != memory.peak_moment:
            table.add_row(f"at {name!r}", readable_size(standing + sum(parts.values())))
    if memory.server:
        table.add_section()
        _add_rows(table, memory.server, prefix="server's GPU: ")
    return table


def _add_rows(table: Table, parts: Mapping[str, int], prefix: str = "") -> None:
    for name, size in parts.items():
        table.add_row(prefix + name, readable_size(size))


def _told(planner: Planner) -> str:
    lengths = ", ".join(f"{name} {value:g}" for name, value in asdict(planner.workload).items())
    shares = ", ".join(f"{name} {value:g}" for name, value in asdict(planner.machine.efficiency).items())
    if planner.config.hindsight.content == "documents":
        lengths += "; a block and a teacher sequence for each search"
    return f"assumed lengths: {lengths}\nassumed efficiency: {shares}\nNothing of this was measured on a GPU."
