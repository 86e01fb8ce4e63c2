"""Plans of whole runs: better layouts, refusals, and what the command prints."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import PretrainedConfig
from typer.testing import CliRunner

from megatron_sdsearch.cli import app
from megatron_sdsearch.config import RunConfig, parse_config
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.model.hf_config import is_layout
from megatron_sdsearch.plan.allocation import Allocation
from megatron_sdsearch.plan.layout import Layout, Servers
from megatron_sdsearch.plan.planning import assume, plan_on_cpu, plan_run
from megatron_sdsearch.plan.report import RunPlan
from tests.unit.plan.models import QWEN_3B, QWEN_7B, run, shape_of

BESIDE = {"engine": "sglang", "sglang": {"num_servers": 2, "tp_size": 1}}
NODE = Allocation(gpus_per_node=8)


def _plan(hf_config: PretrainedConfig = QWEN_3B, **sections: dict[str, Any]) -> RunPlan:
    return _plan_config(run(**sections), hf_config)


def _plan_config(
    config: RunConfig, hf_config: PretrainedConfig, hardware: str = "h100", allocation: Allocation = NODE
) -> RunPlan:
    is_legal = partial(is_layout, hf_config)
    return plan_run(config, shape_of(hf_config), allocation, hardware=hardware, is_legal=is_legal)


def _with_overrides(config: RunConfig, layout: Layout) -> RunConfig:
    tree = config.model_dump(mode="json")
    for override in layout.overrides():
        key, _, value = override.partition("=")
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[name] = yaml.safe_load(value)
    return parse_config(tree)


def test_better_layouts_fit_and_are_legal_and_sorted() -> None:
    plan = _plan(QWEN_7B)
    assert not plan.planner.fits(plan.given)
    assert plan.better
    seconds = [candidate.time.step_s for candidate in plan.better]
    assert seconds == sorted(seconds)
    for candidate in plan.better:
        layout = candidate.layout
        assert plan.planner.fits(candidate)
        assert layout.num_gpus == 8
        assert 28 % layout.tp == 0
        assert 28 % layout.pp == 0
        assert layout.max_tokens >= 6656 + 2048


def test_what_is_suggested_is_planned_the_same_when_it_is_configured() -> None:
    plan = _plan(QWEN_7B)
    for candidate in plan.better:
        again = _plan_config(_with_overrides(run(), candidate.layout), QWEN_7B)
        assert again.given.layout == candidate.layout
        assert again.given.time.step_s == pytest.approx(candidate.time.step_s)


def test_only_faster_layouts_are_suggested_when_the_given_one_fits() -> None:
    plan = _plan(model={"recompute": "full"}, train={"max_tokens_per_microbatch": 8704})
    assert plan.planner.fits(plan.given)
    assert all(candidate.time.step_s < plan.given.time.step_s for candidate in plan.better)


def test_the_reason_names_the_moment_the_limit_and_the_largest_parts() -> None:
    plan = _plan(QWEN_7B)
    why = plan.planner.why_not(plan.given)
    assert why is not None
    assert "at 'loss'" in why
    assert "72.7 GiB of h100's 79.0 GiB are usable" in why
    assert "activations" in why


def test_when_nothing_fits_that_is_said() -> None:
    plan = _plan(
        QWEN_7B, rollout={"engine": "embedded", "max_total_tokens": 30000}, train={"max_tokens_per_microbatch": 32768}
    )
    console = Console(width=160)
    with console.capture() as captured:
        plan.show(console)
    assert plan.better == []
    assert "no layout of these GPUs fits" in captured.get()


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"rollout": {"engine": "sglang", "sglang": {"num_servers": 4, "tp_size": 2}}}, "rollout.sglang.num_servers"),
        ({"rollout": {"engine": "sglang", "sglang": {"colocated": True, "num_servers": 9}}}, "rollout.sglang.num_ser"),
        ({"rollout": BESIDE, "parallel": {"tensor_model_parallel_size": 4}}, "parallel.tensor_model_parallel_size"),
        ({"model": {"dtype": "float32"}}, "model.dtype"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(sections: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        _plan(**sections)
    assert raised.value.field.startswith(field)


def test_an_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match="h100, h800"):
        _plan_config(run(), QWEN_3B, "h900")


def test_assumptions_take_the_place_of_defaults() -> None:
    workload, efficiency = assume(run(), ["fill=0.25", "searches=1", "training=0.3"])
    assert workload.prompt_tokens == 512
    assert workload.searches == 1
    assert efficiency.training == 0.3
    assert efficiency.memory == 0.6


@pytest.mark.parametrize(
    "text", ["searches", "searches=many", "searchs=2", "training=0", "fill=-1", "fill=1.5", "fill=nan"]
)
def test_an_assumption_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        assume(run(), [text])
    assert raised.value.field == "--assume"


def test_a_warm_start_is_planned_without_rollouts() -> None:
    plan = _plan(train={"mode": "warm_start", "demonstrations": "d.jsonl"})
    assert set(plan.given.time.phases) == {"update"}
    assert "rollout" not in plan.given.memory.moments


def test_without_gpus_memory_alone_is_planned() -> None:
    config = run(model={"dtype": "float32"}, rollout={"engine": "embedded"})
    memory = plan_on_cpu(config, shape_of(QWEN_3B), Allocation(gpus_per_node=2))
    assert "framework" not in memory.standing
    with pytest.raises(ConfigError, match="without a GPU"):
        plan_on_cpu(run(), shape_of(QWEN_3B), Allocation(gpus_per_node=2))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    QWEN_3B.save_pretrained(tmp_path / "model")
    tree = run().model_dump(mode="json", exclude_defaults=True)
    tree["model"]["hf_dir"] = str(tmp_path / "model")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_the_command_prints_one_json_object(config_file: Path) -> None:
    arguments = [
        "plan",
        str(config_file),
        "model.recompute=full",
        "--hardware",
        "h800",
        "--assume",
        "fill=0.3",
        "--json",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["num_params"] == 3_085_938_688
    assert content["hardware"]["name"] == "h800"
    assert content["given"]["layout"]["recompute"] is True
    assert content["given"]["fits"] == (content["given"]["why_not"] is None)
    assert content["given"]["step_s"] == pytest.approx(
        sum(sum(parts.values()) for parts in content["given"]["phases_s"].values())
    )


def test_a_run_for_cpus_is_planned_as_one_unless_a_gpu_is_named(config_file: Path) -> None:
    on_cpu = ["plan", str(config_file), "model.dtype=float32", "rollout.engine=embedded"]
    done = CliRunner().invoke(app, [*on_cpu, "--json"])
    assert done.exit_code == 0, done.output
    assert "hardware" not in json.loads(done.stdout)


def _nodes(config: RunConfig, num_nodes: int, num_sglang_nodes: int = 0) -> RunPlan:
    allocation = Allocation(num_nodes=num_nodes, gpus_per_node=8, num_sglang_nodes=num_sglang_nodes)
    return _plan_config(config, QWEN_7B, allocation=allocation)


def test_on_several_nodes_every_suggestion_can_be_submitted_and_is_planned_the_same() -> None:
    config = run(rollout={"engine": "sglang", "sglang": {"colocated": False, "num_servers": 4}})
    plan = _nodes(config, 4, 1)
    assert (plan.given.layout.num_trainers, plan.given.layout.servers) == (
        24,
        Servers(num=8, tensor=1, place="beside", num_nodes=1),
    )
    layouts = list(plan.planner.layouts(plan.given.layout))
    assert {layout.servers.place for layout in layouts if layout.servers} == {"beside", "colocated"}
    assert all(8 % layout.tp == 0 and layout.num_trainers % 8 == 0 for layout in layouts)
    for candidate in plan.better:
        (setting,) = candidate.layout.environment()
        num_sglang_nodes = int(setting.removeprefix("SDSEARCH_SGLANG_NODES="))
        again = _nodes(_with_overrides(config, candidate.layout), 4, num_sglang_nodes)
        assert again.given.layout == candidate.layout
        assert again.given.time.step_s == pytest.approx(candidate.time.step_s)


def test_tensor_parallel_ranks_are_never_on_two_nodes() -> None:
    allocation = Allocation(num_nodes=2, gpus_per_node=6)
    plan = _plan_config(run(rollout={"engine": "embedded"}), QWEN_3B, allocation=allocation)
    assert {layout.tp for layout in plan.planner.layouts(plan.given.layout)} == {1, 2}  # four divide twelve, not six


@pytest.mark.parametrize("given", [0, 1])
def test_suggestions_say_how_many_nodes_serve_where_it_matters(given: int) -> None:
    config = run(rollout={"engine": "sglang", "sglang": {"colocated": not given, "num_servers": 4}})
    plan = _nodes(config, 4, given)
    console = Console(width=200)
    with console.capture() as captured:
        plan.show(console)
    lines = [line for line in captured.get().splitlines() if re.match(r"[123]: ", line)]
    assert len(lines) == len(plan.better) > 0
    for line, candidate in zip(lines, plan.better, strict=True):
        assert candidate.layout.servers is not None
        own_nodes = candidate.layout.servers.own_nodes
        assert (f"SDSEARCH_SGLANG_NODES={own_nodes} " in line) == (own_nodes > 0 or given > 0)
        assert "num_servers" not in line


def test_the_command_takes_the_nodes_that_serve_from_the_job_settings(config_file: Path) -> None:
    arguments = ["plan", str(config_file), "rollout.sglang.colocated=false", "--nodes", "2", "--json"]
    by_option = CliRunner().invoke(app, [*arguments, "--sglang-nodes", "1"])
    by_environment = CliRunner().invoke(app, arguments, env={"SDSEARCH_SGLANG_NODES": "1"})
    assert by_option.exit_code == 0, by_option.output
    assert by_option.stdout == by_environment.stdout
    layout = json.loads(by_option.stdout)["given"]["layout"]
    assert (layout["dp"], layout["servers"]["num"]) == (8, 8)


def test_the_assumptions_say_that_the_teacher_reads_search_by_search() -> None:
    for content in ("searches", "documents"):
        console = Console(width=300)
        with console.capture() as captured:
            _plan(hindsight={"content": content}).show(console)
        assert ("a teacher sequence for each search" in captured.get()) == (content == "documents")


def test_the_tables_show_every_part_phase_and_layout() -> None:
    plan = _plan()
    console = Console(width=160)
    with console.capture() as captured:
        plan.show(console)
    text = captured.get()
    for word in [*plan.given.memory.parts, *plan.given.time.phases, "does not fit", "assumed lengths"]:
        assert word in text
    for number, candidate in enumerate(plan.better, 1):
        assert f"{number}: " in text
        assert f"{candidate.time.step_s:.1f}" in text
