"""The recipes parse, hold the published figures, and fit the models and machines of docs/recipes.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

from megatron_sdsearch.allocation import Allocation, allocation_problems
from megatron_sdsearch.config import RunConfig, flatten, load_config
from megatron_sdsearch.model.shape import ModelShape

ROOT = Path(__file__).parents[3]
RECIPES = ("sd_search", "autorefine", "grpo_search_r1")
DOCS = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
GPUS_PER_NODE = 8
GPU_BYTES = 80e9

# From the models' own config.json on the hub.
SHAPE_3B: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
SHAPE_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,  # of Instruct; the base model has more
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
SHAPES = {
    "Qwen2.5-3B": SHAPE_3B,
    "Qwen2.5-3B-Instruct": SHAPE_3B,
    "Qwen2.5-7B": SHAPE_7B,
    "Qwen2.5-7B-Instruct": SHAPE_7B,
}


@dataclass(frozen=True)
class Machine:
    """A row of the table of machines."""

    num_nodes: int
    num_sglang_nodes: int
    ranks_per_node: int
    told: tuple[int, int]  # GPUs that train and that sample, in the table's own words

    @property
    def num_ranks(self) -> int:
        return (self.num_nodes - self.num_sglang_nodes) * self.ranks_per_node


def _rows(heading: str) -> list[list[str]]:
    section = DOCS.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    end = next((i for i, line in enumerate(lines[2:], 2) if line.startswith("| |")), len(lines))  # the next table
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:end]]


def _overrides(cell: str) -> list[str]:
    return [] if cell == "none" else cell.strip("`").split()


def _machine(row: list[str]) -> Machine:
    nodes, command, train, sample = row

    def number(pattern: str, default: int) -> int:
        found = re.search(pattern, command)
        return int(found[1]) if found else default

    assert number(r"--gpus-per-node (\d+)", 0) == GPUS_PER_NODE
    assert number(r"--nodes (\d+)", 0) == int(nodes)
    return Machine(
        num_nodes=int(nodes),
        num_sglang_nodes=number(r"SDSEARCH_SGLANG_NODES=(\d+)", 0),
        ranks_per_node=number(r"SDSEARCH_RANKS_PER_NODE=(\d+)", GPUS_PER_NODE),
        told=(int(train), int(sample)),
    )


MODELS = {name: _overrides(cell) for name, cell in _rows("Models")}
MACHINES = [_machine(row) for row in _rows("Machines")]


@cache
def load(recipe: str, *overrides: str) -> RunConfig:
    return load_config(ROOT / "examples" / recipe / "config.yaml", overrides)


def test_the_tables_have_four_models_on_one_node_and_on_several() -> None:
    assert set(MODELS) == set(SHAPES)
    assert {machine.num_nodes for machine in MACHINES} >= {1, 2}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_model_fits_its_layout(recipe: str, model: str) -> None:
    config, shape = load(recipe, *MODELS[model]), SHAPES[model]
    assert config.model.hf_dir == Path("models") / model
    assert config.model.dtype == "bfloat16"
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert shape[name] % config.parallel.tensor_model_parallel_size == 0, name
        assert shape[name] % config.rollout.sglang.tp_size == 0, name
    assert shape["num_hidden_layers"] % config.parallel.pipeline_model_parallel_size == 0
    assert config.longest_sequence.num_tokens <= shape["max_position_embeddings"]


def _ablations() -> dict[str, list[str]]:
    """Overrides by the paper's name of the row."""
    text = (ROOT / "examples" / "sd_search" / "README.md").read_text(encoding="utf-8")
    table = text.split("| the paper's row |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {name: _overrides(cell) for name, cell, _ in rows}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ablation", _ablations())
def test_every_ablation_differs_from_the_method_and_fits_the_models(ablation: str, model: str) -> None:
    method, config = load("sd_search", *MODELS[model]), load("sd_search", *MODELS[model], *_ablations()[ablation])
    changed = {
        name for name, value in flatten(config.model_dump()).items() if flatten(method.model_dump())[name] != value
    }
    assert changed == {override.split("=")[0] for override in _ablations()[ablation]}
    assert config.longest_sequence.num_tokens <= SHAPES[model]["max_position_embeddings"]


def test_the_table_of_ablations_is_the_papers() -> None:
    assert len(_ablations()) == 11
    assert _ablations()["shuffled labels"] == ["hindsight.labels=shuffled"]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: f"{machine.num_nodes}_nodes")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_machine_has_gpus_for_ranks_and_servers(recipe: str, model: str, machine: Machine) -> None:
    config = load(recipe, *MODELS[model])
    allocation = Allocation(
        num_nodes=machine.num_nodes,
        gpus_per_node=GPUS_PER_NODE,
        num_sglang_nodes=machine.num_sglang_nodes,
        ranks_per_node=machine.ranks_per_node,
    )
    assert allocation_problems(config, allocation) == []
    sglang = config.rollout.sglang
    if machine.num_sglang_nodes:
        num_sampling = machine.num_sglang_nodes * GPUS_PER_NODE  # as many servers as their GPUs hold
        assert GPUS_PER_NODE % sglang.tp_size == 0
    else:
        num_sampling = sglang.num_servers * sglang.tp_size
        assert machine.ranks_per_node + num_sampling == GPUS_PER_NODE
    assert (machine.num_ranks, num_sampling) == machine.told
    num_replicas = machine.num_ranks // (
        config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    )
    assert config.data.questions_per_step % num_replicas == 0
    assert (config.train.trajectories_per_minibatch or 0) % num_replicas == 0


def num_parameters(shape: dict[str, Any]) -> int:
    return ModelShape.from_hf_config(Qwen2Config(**shape)).num_params


@pytest.mark.parametrize(("shape", "billions"), [(SHAPE_3B, 3.09), (SHAPE_7B, 7.62)])
def test_parameters_are_those_of_the_model_cards(shape: dict[str, Any], billions: float) -> None:
    assert num_parameters(shape) / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_training_gpu_holds_the_state_and_leaves_a_third_for_activations(recipe: str, model: str) -> None:
    config, shape = load(recipe, *MODELS[model]), SHAPES[model]
    per_gpu = num_parameters(shape) / (
        config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    )
    reference = 2 if config.objective.kl_coef > 0 else 0
    state = per_gpu * (2 + reference + 4 + 12)
    logits = config.model.logits_chunk_tokens * shape["vocab_size"] / config.parallel.tensor_model_parallel_size * 4
    assert config.model.recompute == "full"
    tokens = config.train.max_tokens_per_microbatch
    inputs = tokens * shape["hidden_size"] * 2 * shape["num_hidden_layers"] / config.parallel.tensor_model_parallel_size
    assert state + 5 * logits + inputs < GPU_BYTES * 2 / 3
    row = next(
        line for line in DOCS.splitlines() if line.startswith(f"| {model[8:10]} | {num_parameters(shape) / 1e9:.2f}")
    )
    assert [cell.strip() for cell in row.strip("|").split("|")][2:5] == [
        str(config.parallel.tensor_model_parallel_size),
        f"{state / 1e9:.0f} GB",
        f"{inputs / 1e9:.1f} GB",
    ]


AUTOREFINE = {
    "data.prompt_profile": "autorefine",
    "data.questions_per_step": 256,
    "rollout.group_size": 5,
    "rollout.temperature": 1.0,
    "rollout.top_p": 0.95,
    "rollout.max_turns": 5,
    "rollout.max_prompt_tokens": 2048,
    "rollout.max_response_tokens": 512,
    "rollout.max_observation_tokens": 512,
    "rollout.max_total_tokens": 6656,
    "retrieval.top_k": 3,
    "objective.reward": "autorefine",
    "objective.clip_low": 0.2,
    "objective.clip_high": 0.2,
    "objective.kl_coef": 1e-3,
    "objective.entropy_coef": 1e-3,
    "objective.normalize_advantage_std": True,
    "optimizer.lr": 1e-6,
    "optimizer.warmup_steps": 0,
    "optimizer.schedule": "constant",
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_grad": 1.0,
    "train.trajectories_per_minibatch": 256,
    "train.num_steps": 200,
}
PUBLISHED = {
    "autorefine": AUTOREFINE | {"objective.alpha": 0.0},
    "sd_search": AUTOREFINE
    | {
        "objective.alpha": 1e-3,
        "objective.alpha_warmup_steps": 50,
        "objective.divergence": "jsd",
        "objective.beta": 0.5,
        "objective.topk": 50,
        "objective.distill_positions": "query",
        "objective.distill_aggregation": "all_trajectories",
        "hindsight.siblings": "all",
        "hindsight.labels": "outcome",
        "hindsight.content": "searches",
        "hindsight.rho": 0.0,
    },
    "grpo_search_r1": AUTOREFINE
    | {
        "data.prompt_profile": "search_r1",
        "data.questions_per_step": 512,
        "rollout.max_turns": 4,
        "rollout.max_response_tokens": 500,
        "rollout.max_observation_tokens": 500,
        "rollout.max_total_tokens": 5120,  # ours: room for what Search-R1 would drop
        "objective.alpha": 0.0,
        "objective.reward": "em",
        "optimizer.warmup_steps": 2860,
        "train.num_steps": 1005,
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_published_figures(recipe: str) -> None:
    """Those of Search-R1 v0.2, AutoRefine and the paper, wherever else a recipe makes a choice of its own."""
    found = flatten(load(recipe).model_dump(mode="json"))
    assert {name: found[name] for name in PUBLISHED[recipe]} == PUBLISHED[recipe]


def test_updates_of_a_step_and_of_the_warm_up() -> None:
    assert load("sd_search").num_updates == 200 * 5
    search_r1 = load("grpo_search_r1")
    assert search_r1.num_updates == 1005 * 10
    assert search_r1.optimizer.warmup_steps == int(0.285 * 1005) * 10


def test_autorefine_is_sd_search_without_the_teacher() -> None:
    ours, baseline = (flatten(load(name).model_dump(mode="json")) for name in ("sd_search", "autorefine"))
    assert {name for name in ours if ours[name] != baseline[name]} == {"run_dir", "objective.alpha"}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("section", ["data", "rollout", "hindsight", "objective", "optimizer", "train"])
def test_every_figure_has_its_source_beside_it(recipe: str, section: str) -> None:
    text = (ROOT / "examples" / recipe / "config.yaml").read_text(encoding="utf-8")
    if f"\n{section}:" not in text:
        assert (recipe, section) in {("autorefine", "hindsight"), ("grpo_search_r1", "hindsight")}
        return
    body = re.split(r"\n(?=\w)", text.split(f"\n{section}:")[1])[0]
    values = re.findall(r"((?:^  # .*\n)?)^  (\w+): [^#\n]+(#.*)?$", body, re.MULTILINE)
    assert values
    without_source = {
        name
        for above, name, beside in values
        if not re.search(r"\[(paper|AutoRefine|Search-R1|verl|ours)\]|no teacher", above + beside)
    }
    assert without_source <= {"engine", "clip_high"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_commands_of_a_readme_name_its_config_and_right_overrides(recipe: str) -> None:
    text = (ROOT / "examples" / recipe / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line for line in text.splitlines() if "examples/" in line and line.startswith(("OMP_NUM", "SDSEARCH"))]
    assert len(commands) == 3
    for command in commands:
        path, *overrides = command[command.index("examples/") :].split()
        config = load_config(ROOT / path, overrides)
        assert path == f"examples/{recipe}/config.yaml"
        ranks = re.search(r"--nproc-per-node (\d+)|RANKS_PER_NODE=(\d+)", command)
        assert (int(ranks[1] or ranks[2]) if ranks else GPUS_PER_NODE) % config.parallel.tensor_model_parallel_size == 0
    assert config.model.hf_dir == Path("models/Qwen2.5-7B")
    assert config.parallel.tensor_model_parallel_size == 4


def test_the_quick_start_of_a_real_model_fits_its_node() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^OMP_NUM_THREADS=1 torchrun .*examples/.*$", text, re.MULTILINE)
    path, *overrides = command[command.index("examples/") :].split()
    ranks = int(command.split("--nproc-per-node ")[1].split()[0])
    allocation = Allocation(gpus_per_node=GPUS_PER_NODE, ranks_per_node=ranks)
    assert allocation_problems(load_config(ROOT / path, overrides), allocation) == []


@pytest.mark.parametrize(
    "overrides", re.findall(r"`((?:retrieval\.\S+=\S+ ?)+)`", DOCS), ids=lambda text: text.split()[-1]
)
def test_retrieval_choices_of_the_docs_parse(overrides: str) -> None:
    assert load("sd_search", *overrides.split()).retrieval is not None
