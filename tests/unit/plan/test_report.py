"""Plans of whole runs: better layouts, refusals, and what the command prints."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PretrainedConfig
from typer.testing import CliRunner

from megatron_sdsearch.allocation import Allocation, Servers
from megatron_sdsearch.cli import app
from megatron_sdsearch.config import RunConfig, parse_config
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.plan.report import RunPlan, other_layouts, plan_run
from megatron_sdsearch.plan.workload import Layout
from tests.unit.plan.models import QWEN_3B, QWEN_7B, layout_of, run, shape_of

BESIDE = {"engine": "sglang", "sglang": {"num_servers": 2, "tp_size": 1}}
NODE = Allocation(gpus_per_node=8)


def _plan(hf_config: PretrainedConfig = QWEN_3B, **sections: dict[str, Any]) -> RunPlan:
    return _plan_config(run(**sections), hf_config)


def _plan_config(
    config: RunConfig, hf_config: PretrainedConfig, hardware: str = "h100", allocation: Allocation = NODE
) -> RunPlan:
    return plan_run(config, shape_of(hf_config), allocation, hardware=hardware)


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
    assert plan.given.why_not is not None
    assert plan.better
    seconds = [candidate.step_s for candidate in plan.better]
    assert seconds == sorted(seconds)
    for candidate in plan.better:
        layout = candidate.layout
        assert candidate.why_not is None
        assert layout.num_ranks == 8
        assert (28 % layout.tp, 28 % layout.pp) == (0, 0)
        assert layout.max_tokens >= 6656 + 2048


def test_what_is_suggested_is_planned_the_same_when_it_is_configured() -> None:
    plan = _plan(QWEN_7B)
    for candidate in plan.better:
        again = _plan_config(_with_overrides(run(), candidate.layout), QWEN_7B)
        assert again.given.layout == candidate.layout
        assert again.given.step_s == pytest.approx(candidate.step_s)


def test_only_faster_layouts_are_suggested_when_the_given_one_fits() -> None:
    plan = _plan(model={"recompute": "full"}, train={"max_tokens_per_microbatch": 8704})
    assert plan.given.why_not is None
    assert all(candidate.step_s < plan.given.step_s for candidate in plan.better)


def test_without_distillation_rows_need_no_room_for_a_block() -> None:
    config = run(objective={"alpha": 0.0}, train={"max_tokens_per_microbatch": 6656})
    layouts = other_layouts(config, shape_of(QWEN_3B), layout_of(config), 8)
    assert {layout.max_tokens for layout in layouts} == {6656, 2 * 6656}


def test_the_reason_names_the_moment_the_limit_and_the_largest_parts() -> None:
    why = _plan(QWEN_7B).given.why_not
    assert why is not None
    assert "at 'loss'" in why
    assert "72.7 GiB of the GPU's 79.0 GiB are usable" in why
    assert "activations" in why


def test_a_server_that_holds_no_trajectory_is_the_reason() -> None:
    plan = _plan(QWEN_7B, rollout={**BESIDE, "max_total_tokens": 2_000_000}, train={"max_tokens_per_microbatch": 2**21})
    assert plan.given.why_not is not None
    assert re.match(r"a server needs .* GiB for one trajectory, but 72\.7 GiB", plan.given.why_not)


def test_when_nothing_fits_that_is_said() -> None:
    plan = _plan(
        QWEN_7B, rollout={"engine": "embedded", "max_total_tokens": 30000}, train={"max_tokens_per_microbatch": 32768}
    )
    assert plan.better == []
    assert "no layout of these ranks fits" in plan.to_text()


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"rollout": {"engine": "sglang", "sglang": {"num_servers": 4, "tp_size": 2}}}, "rollout.sglang.num_servers"),
        ({"rollout": BESIDE, "parallel": {"tensor_model_parallel_size": 4}}, "parallel.tensor_model_parallel_size"),
        ({"parallel": {"tensor_model_parallel_size": 3}}, "parallel.tensor_model_parallel_size"),
        ({"model": {"dtype": "float32"}}, "model.dtype"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(sections: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        _plan(**sections)
    assert raised.value.field == field


def test_an_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match="h100, h800"):
        _plan_config(run(), QWEN_3B, "h900")


def test_a_warm_start_is_planned_without_rollouts() -> None:
    plan = _plan(train={"mode": "warm_start", "demonstrations": "d.jsonl"})
    assert set(plan.given.phases_s) == {"update"}
    assert "rollout" not in plan.given.memory.moments


def test_without_gpus_memory_alone_is_planned() -> None:
    config = run(model={"dtype": "float32"}, rollout={"engine": "embedded"})
    plan = _plan_config(config, QWEN_3B, "cpu", Allocation(gpus_per_node=2))
    assert "framework" not in plan.given.memory.standing
    assert plan.given.layout.dp == 2
    assert plan.to_dict().keys() == {"memory"}
    assert "Memory of one process" in plan.to_text()
    assert "s a step" not in plan.to_text()
    with pytest.raises(ConfigError, match="without a GPU"):
        _plan_config(run(), QWEN_3B, "cpu")


def test_tensor_parallel_ranks_are_never_on_two_nodes() -> None:
    config = run(rollout={"engine": "embedded"})
    layouts = other_layouts(config, shape_of(QWEN_3B), layout_of(config, 12), 6)
    assert {layout.tp for layout in layouts} == {1, 2}  # four divide twelve, not six


def test_on_several_nodes_ranks_and_servers_are_those_of_the_job() -> None:
    config = run(rollout={"engine": "sglang", "sglang": {"colocated": False, "num_servers": 4}})
    allocation = Allocation(num_nodes=4, gpus_per_node=8, num_sglang_nodes=1)
    plan = _plan_config(config, QWEN_7B, allocation=allocation)
    for layout in (plan.given.layout, *(candidate.layout for candidate in plan.better)):
        assert layout.num_ranks == 24
        assert layout.servers == Servers(num=8, tp_size=1, placement="beside", num_nodes=1)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    QWEN_3B.save_pretrained(tmp_path / "model")
    tree = run().model_dump(mode="json", exclude_defaults=True)
    tree["model"]["hf_dir"] = str(tmp_path / "model")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_the_command_prints_one_json_object(config_file: Path) -> None:
    settings = ["model.recompute=full", "--hardware", "h800", "--assume", "fill=0.3", "--json"]
    done = CliRunner().invoke(app, ["plan", str(config_file), *settings])
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["num_params"] == 3_085_938_688
    assert (content["hardware"]["name"], content["hardware"]["num_gpus"]) == ("h800", 8)
    assert (content["assumptions"]["prompt_tokens"], content["assumptions"]["calibrated"]) == (0.3 * 2048, False)
    given = content["given"]
    assert given["layout"]["recompute"] is True
    assert given["fits"] == (given["why_not"] is None)
    assert given["step_s"] == pytest.approx(sum(given["phases_s"].values()))
    memory = given["memory"]
    parts = memory["standing"] | memory["moments"][memory["peak_moment"]]
    assert memory["total_bytes"] == sum(parts.values())


def test_a_run_for_cpus_is_planned_as_one_unless_a_gpu_is_named(config_file: Path) -> None:
    on_cpu = ["plan", str(config_file), "model.dtype=float32", "rollout.engine=embedded"]
    done = CliRunner().invoke(app, [*on_cpu, "--json"])
    assert done.exit_code == 0, done.output
    assert "hardware" not in json.loads(done.stdout)


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
        assert ("a sequence for each search" in _plan(hindsight={"content": content}).to_text()) == (
            content == "documents"
        )


def test_the_output_has_every_part_phase_and_layout() -> None:
    plan = _plan()
    text = plan.to_text()
    for part in [*plan.given.memory.parts, *plan.given.phases_s, "does not fit", "assumed", "uncalibrated"]:
        assert part in text
    for number, candidate in enumerate(plan.better, 1):
        (line,) = [line for line in text.splitlines() if line.startswith(f"{number}: ")]
        assert f"{candidate.step_s:.1f} s a step" in line
        for override in candidate.layout.overrides():
            assert (override in line) == (override not in plan.given.layout.overrides())
