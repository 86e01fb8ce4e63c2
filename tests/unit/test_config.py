"""Settings: each mistake is one ConfigError that names the field, what is wrong with it, and the fix."""

from __future__ import annotations

import copy
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from megatron_sdsearch.config import (
    ObjectiveConfig,
    RunConfig,
    file_problems,
    flatten,
    load_config,
    parse_config,
)
from megatron_sdsearch.errors import ConfigError, raise_problems

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/*/*.yaml"))
RL: dict[str, Any] = {
    "run_dir": "runs/x",
    "model": {"hf_dir": "model"},
    "data": {"train": "train.jsonl"},
    "retrieval": {"corpus": "corpus.jsonl"},
}
WARM_START: dict[str, Any] = {
    "run_dir": "runs/x",
    "model": {"hf_dir": "model"},
    "train": {"mode": "warm_start", "demonstrations": "demonstrations.jsonl"},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with dotted keys set; a value of None removes the key."""
    tree = copy.deepcopy(base)
    for key, value in changes.items():
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        if value is None:
            section.pop(name, None)
        else:
            section[name] = value
    return tree


def error_of(tree: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    return caught.value


def error_of_file(path: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value


def check_files(config: RunConfig) -> None:
    raise_problems(file_problems(config))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(RL))
    return path


@pytest.mark.parametrize("base", [RL, WARM_START], ids=["rl", "warm_start"])
def test_a_right_config_parses(base: dict[str, Any]) -> None:
    assert parse_config(base).run_dir == Path("runs/x")


@pytest.mark.parametrize(
    ("changes", "field", "value", "fix"),
    [
        ({"objectve": {}}, "objectve", "unknown key", "did you mean objective?"),
        ({"objective.alpa": 1}, "objective.alpa", "unknown key", "did you mean alpha?"),
        ({"retrieval.corpuss": "c"}, "retrieval.corpuss", "unknown key", "did you mean corpus?"),
        ({"parallel.zzz": 1}, "parallel.zzz", "unknown key", "known keys: tensor_model_parallel_size, "),
        ({"objective.alpha": "lots"}, "objective.alpha", "'lots'", "valid number"),
        ({"objective.alpha": float("nan")}, "objective.alpha", "nan", "finite"),
        ({"objective.alpha": -0.5}, "objective.alpha", "-0.5", "greater than or equal to 0"),
        ({"objective.beta": 1.0}, "objective.beta", "1.0", "less than 1"),
        ({"objective.divergence": "kl"}, "objective.divergence", "'kl'", "'jsd'"),
        ({"objective.topk_of": "both"}, "objective.topk_of", "'both'", "'union'"),
        (
            {"objective": {"topk": None, "topk_of": "union"}},
            "objective.topk_of",
            "union, and objective.topk is null",
            "set objective.topk",
        ),
        (
            {"hindsight.content": "documents", "hindsight.siblings": "own"},
            "hindsight.siblings",
            "own, and content=documents shows no siblings",
            "leave it at all",
        ),
        ({"objective": 3}, "objective", "3", "valid dictionary"),
        ({"rollout.group_size": 2.5}, "rollout.group_size", "2.5", "valid integer"),
        ({"rollout.group_size": 1}, "rollout.group_size", "1", "at least 2"),
        ({"rollout.temperature": 0}, "rollout.temperature", "0", "greater than 0"),
        ({"rollout.top_p": 1.5}, "rollout.top_p", "1.5", "less than or equal to 1"),
        ({"rollout.engine": "vllm"}, "rollout.engine", "'vllm'", "'embedded' or 'sglang'"),
        ({"rollout.oversample": 1.5}, "rollout.oversample", "is no setting any more", "no fair sample"),
        ({"objective.alpha": True}, "objective.alpha", "True", "give a number"),
        ({"objective.topk": False}, "objective.topk", "False", "give a number"),
        ({"rollout.max_refills": -1}, "rollout.max_refills", "-1", "greater than or equal to 0"),
        ({"rollout.sglang.weight_sync": "nccl"}, "rollout.sglang.weight_sync", "'nccl'", "'disk', 'tensor' or"),
        ({"rollout.sglang.num_server": 2}, "rollout.sglang.num_server", "unknown key", "did you mean num_servers?"),
        ({"rollout.sglang.num_servers": 0}, "rollout.sglang.num_servers", "0", "greater than or equal to 1"),
        ({"rollout.sglang.start_timeout_s": 0}, "rollout.sglang.start_timeout_s", "0", "greater than 0"),
        ({"rollout.sglang.verify_every": -1}, "rollout.sglang.verify_every", "-1", "greater than or equal to 0"),
        ({"objective.importance_cap": 1.0}, "objective.importance_cap", "1.0", "greater than 1"),
        ({"objective.importance_correction": "clip"}, "objective.importance_correction", "'clip'", "'truncate' or"),
        ({"optimizer.lr": float("inf")}, "optimizer.lr", "inf", "finite"),
        ({"rollout.sglang.urls": "http://a:1"}, "rollout.sglang.urls", "no list", "write [http://a:1]"),
        (
            {"parallel.sequence_parallel": True},
            "parallel.sequence_parallel",
            "parallel.tensor_model_parallel_size=1",
            "parallel.tensor_model_parallel_size >= 2",
        ),
        (
            {"parallel.tensor_model_parallel_size": 0},
            "parallel.tensor_model_parallel_size",
            "0",
            "greater than or equal to 1",
        ),
        ({"model.dtype": "float16"}, "model.dtype", "'float16'", "'float32' or 'bfloat16'"),
        ({"run_dir": None}, "run_dir", "missing", "set run_dir"),
        ({"model": None}, "model", "missing", "set model"),
        ({"model.hf_dir": None}, "model.hf_dir", "missing", "set model.hf_dir"),
        ({"data.train": None}, "data.train", "missing", "set data.train"),
        ({"retrieval": None}, "retrieval", "missing", "set retrieval"),
        ({"retrieval.corpus": None}, "retrieval.corpus", "missing", "set retrieval.corpus"),
        ({"evaluation.every": 5}, "data.heldout", "evaluation.every is set", "set data.heldout"),
        (
            {"data.chat_template_arguments": "no"},
            "data.chat_template_arguments",
            "'no' is not valid",
            "valid dictionary",
        ),
        (
            {"data.chat_template_arguments": {"thinking": [1]}},
            "data.chat_template_arguments.thinking",
            "[1] is not valid",
            "a number or a text",
        ),
        (
            {"data.chat_template_arguments": {"thinking": None}},
            "data.chat_template_arguments.thinking",
            "None is not valid",
            "leave it out",
        ),
        ({"rollout.max_total_tokens": 2559}, "rollout.max_total_tokens", "2559", "at least 2560"),
        ({"train.max_tokens_per_microbatch": 8703}, "train.max_tokens_per_microbatch", "8703", "at least 8704"),
        (
            {"hindsight.content": "everything"},
            "hindsight.max_block_tokens",
            "2048 cannot hold what hindsight.content=everything shows: 5 responses of up to 4608 tokens = 23040",
            "at least 23040, and train.max_tokens_per_microbatch to 29696",
        ),
        (
            {"objective.distill_aggregation": "searching"},
            "objective.distill_aggregation",
            "'searching'",
            "'all_trajectories', 'trajectory' or 'token'",
        ),
    ],
)
def test_a_mistake_names_field_value_and_fix(changes: dict[str, Any], field: str, value: str, fix: str) -> None:
    error = error_of(merged(RL, changes))
    assert error.field == field
    assert str(error).startswith(f"{field}: ")
    assert value in str(error)
    assert fix in error.fix
    assert str(error).endswith(error.fix)
    assert "\n" not in str(error)


SGLANG: dict[str, Any] = merged(RL, {"rollout.engine": "sglang"})


@pytest.mark.parametrize(
    ("urls", "problem", "fix"),
    [
        (["10.0.0.7:30000"], "'10.0.0.7:30000' is not the url", "http://host:port"),
        (["http://a:1", "http:///x"], "'http:///x' is not the url", "http://host:port"),
        (["http://a:port"], "'http://a:port' is not the url", "http://host:port"),
        (["http://a:1", "http://b:1", "http://a:1/"], "http://a:1 stands there 2 times", "once"),
    ],
)
def test_urls_that_are_none_are_refused_where_servers_are_used(urls: list[str], problem: str, fix: str) -> None:
    changes = {"rollout.sglang.urls": urls}
    error = error_of(merged(SGLANG, changes))
    assert error.field == "rollout.sglang.urls"
    assert problem in str(error)
    assert fix in error.fix
    parse_config(merged(RL, changes))  # the embedded engine reads none of it
    parse_config(merged(WARM_START, {"rollout.engine": "sglang", **changes}))


def test_a_server_has_one_name_with_or_without_a_slash() -> None:
    config = parse_config(merged(SGLANG, {"rollout.sglang.urls": ["http://a:1/", "http://b"]}))
    assert config.rollout.sglang.urls == ("http://a:1", "http://b")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"train.demonstrations": None}, "train.demonstrations"),
    ],
)
def test_warm_start_asks_for_its_own_sections(changes: dict[str, Any], field: str) -> None:
    error = error_of(merged(WARM_START, changes))
    assert (error.field, error.fix) == (field, f"set {field}")


@pytest.mark.parametrize(
    ("changes", "limit"),
    [({"rollout.max_total_tokens": 2560}, 2560), ({"train.max_tokens_per_microbatch": 8704}, 8704)],
)
def test_budgets_that_just_fit_are_accepted(changes: dict[str, Any], limit: int) -> None:
    config = parse_config(merged(RL, changes))
    assert limit in (config.rollout.max_total_tokens, config.train.max_tokens_per_microbatch)


EVERYTHING: dict[str, Any] = {"hindsight.content": "everything", "train.max_tokens_per_microbatch": 50_000}


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, 5 * 4608),
        ({"hindsight.siblings": "correct"}, 5 * 4608),
        ({"hindsight.siblings": "others"}, 4 * 4608),
        ({"hindsight.siblings": "own"}, 4608),
        ({"rollout.group_size": 8}, 8 * 4608),
        # Two searches and an answer end before the budget of the whole trajectory does.
        ({"rollout.max_turns": 2}, 5 * (2 * (512 + 512) + 512)),
    ],
)
def test_a_block_of_whole_responses_has_to_hold_them(changes: dict[str, Any], needed: int) -> None:
    tree = merged(RL, EVERYTHING | changes)
    error = error_of(merged(tree, {"hindsight.max_block_tokens": needed - 1}))
    assert (error.field, f"at least {needed}" in error.fix) == ("hindsight.max_block_tokens", True)
    assert parse_config(merged(tree, {"hindsight.max_block_tokens": needed})).hindsight.max_block_tokens == needed


NEVER_DISTILS: list[dict[str, Any]] = [
    {"objective.alpha": 0},
    {"objective.alpha_warmup_steps": 200},
    {"train.num_steps": 1, "objective.alpha_schedule": "ramp"},
]


@pytest.mark.parametrize("changes", NEVER_DISTILS)
@pytest.mark.parametrize("probe", [False, True])
def test_a_run_without_distillation_needs_no_room_for_a_block(changes: dict[str, Any], probe: bool) -> None:
    more = {"train.max_tokens_per_microbatch": 6656, "hindsight.content": "everything", "telemetry.query_probe": probe}
    config = parse_config(merged(RL, more | changes))
    assert not config.is_distilling
    assert config.longest_sequence == config.longest_rollout == (6656, "rollout.max_total_tokens")


def test_the_longest_sequences_of_trainer_and_engine() -> None:
    config = parse_config(RL)
    assert config.is_distilling
    with_block = (6656 + 2048, "rollout.max_total_tokens + hindsight.max_block_tokens")
    assert config.longest_sequence == with_block
    assert config.longest_rollout == (6656, "rollout.max_total_tokens"), "blocks are the trainer's alone"
    assert parse_config(merged(RL, {"telemetry.query_probe": True})).longest_rollout == with_block
    assert not parse_config(WARM_START).is_distilling


def test_a_warm_start_does_not_evaluate() -> None:
    assert error_of(merged(WARM_START, {"evaluation.every": 5})).field == "evaluation.every"


def test_the_rollout_budgets_do_not_bind_a_warm_start() -> None:
    config = parse_config(merged(WARM_START, {"train.max_tokens_per_microbatch": 64, "rollout.group_size": 1}))
    assert config.train.max_tokens_per_microbatch == 64


def test_several_mistakes_are_one_error_with_a_line_each() -> None:
    error = error_of(merged(RL, {"rollout.group_size": 0, "objective.alpa": 1, "optimizer.lr": "fast"}))
    lines = str(error).split("\n")
    assert [line.split(":")[0] for line in lines] == ["rollout.group_size", "objective.alpa", "optimizer.lr"]
    assert error.field == "rollout.group_size"


@pytest.mark.parametrize("tree", [None, [], ["a"], "text", 3])
def test_what_is_no_mapping_is_refused(tree: Any) -> None:
    error = error_of(tree)
    assert "mapping of sections" in str(error)
    assert "examples/tiny/config.yaml" in error.fix


def test_settings_are_frozen() -> None:
    config = parse_config(RL)
    with pytest.raises(ValueError, match="frozen"):
        config.objective.alpha = 1.0


# Files and overrides


def test_overrides_apply_in_order_and_over_the_file(file: Path) -> None:
    overrides = ["seed=1", "seed=3", "objective={alpha: 0.2}", "objective.alpha=0.5", "rollout.group_size=7"]
    config = load_config(file, overrides)
    assert (config.seed, config.objective.alpha, config.rollout.group_size) == (3, 0.5, 7)
    assert config.data.train == Path("train.jsonl"), "what is not overridden stays"


def test_override_values_are_yaml(file: Path) -> None:
    config = load_config(file, ["train.trajectories_per_minibatch=null", "objective.topk=null", "optimizer.lr=1e-4"])
    assert (config.train.trajectories_per_minibatch, config.objective.topk) == (None, None)
    assert config.optimizer.lr == 1e-4


def test_arguments_of_the_chat_template_keep_their_types(file: Path) -> None:
    values = ["enable_thinking=false", "level=2", "share=0.5", "date_string=05 Feb 2025", "flag='true'"]
    config = load_config(file, [f"data.chat_template_arguments.{value}" for value in values])
    arguments = config.data.chat_template_arguments
    assert arguments == {
        "enable_thinking": False,
        "level": 2,
        "share": 0.5,
        "date_string": "05 Feb 2025",
        "flag": "true",
    }
    assert [type(value) for value in arguments.values()] == [bool, int, float, str, str]
    assert parse_config(config.model_dump(mode="json")) == config


def test_an_override_of_null_takes_a_section_away(file: Path) -> None:
    assert error_of_file(file, "retrieval=null").field == "retrieval"


def test_interpolation_follows_overrides(file: Path) -> None:
    file.write_text(yaml.safe_dump(merged(RL, {"model.hf_dir": "${run_dir}/hf"})))
    assert load_config(file, ["run_dir=elsewhere"]).model.hf_dir == Path("elsewhere/hf")


@pytest.mark.parametrize("override", ["rollout.sglang.command=[a", "seed=[1", "seed={a: 1"])
def test_an_override_that_is_no_yaml_is_named_itself(file: Path, override: str) -> None:
    error = error_of_file(file, "seed=3", override)
    assert error.field == override.partition("=")[0]
    assert f"'{override}' is no YAML" in str(error)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    assert f"{tmp_path} is a folder" in str(error_of_file(tmp_path))


@pytest.mark.parametrize(
    ("override", "named"),
    [("seed", "'seed'"), ("objective.alpha", "'objective.alpha'"), ("=3", "number 2"), ("", "number 2")],
)
def test_an_override_without_key_or_value_is_named(file: Path, override: str, named: str) -> None:
    error = error_of_file(file, "seed=1", override)
    assert error.field == "override"
    assert f"{named} is not key=value" in str(error)
    assert "objective.alpha=0" in error.fix


def test_an_override_of_an_unknown_key_is_named_like_one_in_the_file(file: Path) -> None:
    error = error_of_file(file, "rollout.group_sise=4")
    assert (error.field, error.fix) == ("rollout.group_sise", "did you mean group_size?")


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_path_that_is_no_file_is_named(tmp_path: Path, name: str) -> None:
    error = error_of_file(tmp_path / name)
    assert str(tmp_path / name) in str(error)
    assert error.fix == "give the path of a YAML file"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"run_dir: [1\n", "line 1"),
        (b"\trun_dir: x\n", "line 1"),
        (b"run_dir: a\nrun_dir: b\n", "run_dir"),
        (b"run_dir: ${nowhere}\n", "nowhere"),
        (b"run_dir: ${run_dir\n", "run_dir"),
        (b"- run_dir\n- model\n", ""),
        (b"12\n", ""),
        (b"\xff\xfe\x00\x01", ""),
    ],
    ids=["brackets", "tab", "key twice", "unknown interpolation", "open interpolation", "a list", "a number", "bytes"],
)
def test_a_broken_file_is_one_line_that_names_it(file: Path, content: bytes, problem: str) -> None:
    file.write_bytes(content)
    error = error_of_file(file)
    assert error.field == str(file)
    assert problem in str(error)
    assert "fix the YAML" in error.fix
    assert "\n" not in str(error)


@pytest.mark.parametrize("content", ["", "# nothing but a comment\n", "null\n"])
def test_an_empty_file_lacks_the_required_settings(file: Path, content: str) -> None:
    file.write_text(content)
    error = error_of_file(file)
    assert error.field == "run_dir"
    assert "set run_dir" in str(error)
    assert "set model" in str(error)


# What only the machine can tell


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


def rl_config(folder: Path) -> RunConfig:
    paths = {"model.hf_dir": "model", "data.train": "t.jsonl", "data.heldout": "h.jsonl", "retrieval.corpus": "c.jsonl"}
    return parse_config(
        merged(RL, {field: str(folder / name) for field, name in paths.items()} | {"evaluation.every": 1})
    )


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("model.hf_dir", "model/config.json"),
        ("data.train", "t.jsonl"),
        ("data.heldout", "h.jsonl"),
        ("retrieval.corpus", "c.jsonl"),
    ],
)
def test_a_missing_file_is_named_with_its_field(tmp_path: Path, field: str, name: str) -> None:
    names = ["model/config.json", "t.jsonl", "h.jsonl", "c.jsonl"]
    for other in names:
        write(tmp_path / other)
    config = rl_config(tmp_path)
    check_files(config)
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError) as caught:
        check_files(config)
    assert caught.value.field == field
    assert str(tmp_path / name).removesuffix("/config.json") in str(caught.value)


def sglang_config(folder: Path, **sglang: Any) -> RunConfig:
    for name in ("model/config.json", "t.jsonl", "h.jsonl", "c.jsonl"):
        write(folder / name)
    tree = rl_config(folder).model_dump(mode="json")
    return parse_config(merged(tree, {"rollout.engine": "sglang", "rollout.sglang": sglang}))


def test_a_program_that_is_not_there_is_named_with_its_field(tmp_path: Path) -> None:
    program = write(tmp_path / "bin/serve")
    program.chmod(0o755)
    check_files(sglang_config(tmp_path, command=[str(program), "--flag"]))
    check_files(sglang_config(tmp_path, command=["serve"], environment={"PATH": str(program.parent)}))
    for wrong in ({"command": [str(tmp_path / "nowhere")]}, {"command": ["serve"]}, {"command": [str(tmp_path)]}):
        with pytest.raises(ConfigError, match="is no program") as caught:
            check_files(sglang_config(tmp_path, **wrong))
        assert caught.value.field == "rollout.sglang.command[0]"
        assert str(wrong["command"][0]) in str(caught.value)
        check_files(sglang_config(tmp_path, urls=["http://a:1"], **wrong))  # nothing is started
        check_files(parse_config(merged(sglang_config(tmp_path, **wrong).model_dump(), {"rollout.engine": "embedded"})))
    with pytest.raises(ConfigError, match="is empty"):
        check_files(sglang_config(tmp_path, command=[]))


def test_missing_demonstrations_are_named(tmp_path: Path) -> None:
    write(tmp_path / "model/config.json")
    paths = {"model.hf_dir": str(tmp_path / "model"), "train.demonstrations": str(tmp_path / "d.jsonl")}
    config = parse_config(merged(WARM_START, paths))
    with pytest.raises(ConfigError, match=r"d\.jsonl does not exist") as caught:
        check_files(config)
    assert caught.value.field == "train.demonstrations"
    write(tmp_path / "d.jsonl")
    check_files(config)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"optimizer.min_lr": 1.0}, "optimizer.min_lr"),
        ({"train.num_steps": 2, "optimizer.warmup_steps": 10}, "optimizer.warmup_steps"),
    ],
)
def test_rates_that_cannot_be_followed_are_refused(changes: dict[str, Any], field: str) -> None:
    assert error_of(merged(RL, changes)).field == field


def test_updates_are_counted_by_minibatch() -> None:
    changes = {"train.num_steps": 3, "data.questions_per_step": 256, "rollout.group_size": 5}
    assert parse_config(merged(RL, changes)).num_updates == 3 * 5
    whole_steps = {"train": {"num_steps": 3, "trajectories_per_minibatch": None}}
    assert parse_config(merged(RL, changes | whole_steps)).num_updates == 3
    assert parse_config(merged(WARM_START, changes)).num_updates == 3


# Defaults, examples, schedule


def test_defaults_are_the_papers_and_autorefines() -> None:
    config = parse_config(RL)
    objective, rollout, train = config.objective, config.rollout, config.train
    # arXiv 2605.18299: section 3 and the published recipe
    assert (objective.alpha, objective.alpha_warmup_steps, objective.alpha_schedule) == (1e-3, 50, "gate")
    assert (objective.divergence, objective.beta, objective.topk) == ("jsd", 0.5, 50)
    assert (objective.distill_positions, objective.distill_aggregation) == ("query", "all_trajectories")
    assert (config.hindsight.siblings, config.hindsight.labels, config.hindsight.content) == (
        "all",
        "outcome",
        "searches",
    )
    assert config.hindsight.rho == 0
    assert (rollout.group_size, train.num_steps) == (5, 200)
    # AutoRefine's training script
    assert (config.data.questions_per_step, train.trajectories_per_minibatch) == (256, 256)
    assert (config.optimizer.lr, config.optimizer.warmup_steps, config.optimizer.clip_grad) == (1e-6, 0, 1.0)
    assert (objective.clip_low, objective.clip_high, objective.kl_coef) == (0.2, 0.2, 1e-3)
    assert objective.normalize_advantage_std
    assert (objective.reward, config.data.prompt_profile) == ("autorefine", "autorefine")
    assert rollout.temperature == 1.0
    assert (rollout.max_turns, parse_config(RL).retrieval) == (5, config.retrieval)
    assert config.retrieval is not None
    assert config.retrieval.top_k == 3
    lengths = (rollout.max_prompt_tokens, rollout.max_response_tokens, rollout.max_observation_tokens)
    assert lengths == (2048, 512, 512)
    assert rollout.max_total_tokens == 6656
    # The two departures, as their docstrings say: AutoRefine has 0.95 and 0.001
    assert (rollout.top_p, objective.entropy_coef) == (1.0, 0.0)


def test_there_are_examples_to_parse() -> None:
    names = {str(path.relative_to(ROOT)) for path in EXAMPLES}
    assert {"examples/tiny/config.yaml", "examples/tiny/warm_start.yaml"} <= names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_parses_and_keeps_what_it_says(path: Path) -> None:
    config = load_config(path)
    written: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    parsed = flatten(config.model_dump(mode="json"))
    for name, value in flatten(written).items():
        assert parsed[name] == value, name


@given(alpha=st.floats(0, 10), warmup=st.integers(0, 20), step=st.integers(0, 60))
def test_the_gate_opens_after_the_warm_up(alpha: float, warmup: int, step: int) -> None:
    objective = ObjectiveConfig(alpha=alpha, alpha_warmup_steps=warmup, alpha_schedule="gate")
    assert objective.alpha_at(step) == (alpha if step >= warmup else 0.0)


def test_the_ramp_rises_linearly_from_0_to_alpha() -> None:
    objective = ObjectiveConfig(alpha=0.4, alpha_warmup_steps=4, alpha_schedule="ramp")
    assert [objective.alpha_at(step) for step in range(6)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])


@given(alpha=st.sampled_from([0.0, 1e-3, 2.0]), warmup=st.integers(0, 8), schedule=st.sampled_from(["gate", "ramp"]))
def test_the_first_distilling_step_is_the_first_with_a_weight(alpha: float, warmup: int, schedule: str) -> None:
    objective = ObjectiveConfig.model_validate(
        {"alpha": alpha, "alpha_warmup_steps": warmup, "alpha_schedule": schedule}
    )
    with_weight = [step for step in range(20) if objective.alpha_at(step) > 0]
    assert objective.first_distilling_step == (with_weight[0] if with_weight else None)


# Secrets

SECRET = "hunter2"
CREDENTIALS = f"elastic:{SECRET}@"


@pytest.mark.parametrize(
    ("changes", "field", "problem"),
    [
        ({"retrieval.elasticsearch.password": {"is": SECRET}}, "retrieval.elasticsearch.password", "a mapping is not"),
        ({"retrieval.elasticsearch.api_key": [SECRET]}, "retrieval.elasticsearch.api_key", "a list is not valid"),
        ({"retrieval.elasticsearch.passwrod": SECRET}, "retrieval.elasticsearch.passwrod", "did you mean password?"),
        ({"retrieval.elasticsearch": {f"password:{SECRET}": None}}, "retrieval.elasticsearch.password", "a space"),
        ({"retrieval.elasticsearch": f"password={SECRET}"}, "retrieval.elasticsearch", "a text is not valid"),
        ({"retrieval": ["password", SECRET]}, "retrieval", "a list is not valid"),
        ({"retrieval.http.password": [SECRET]}, "retrieval.http.password", "a list is not valid"),
        ({"rollout.sglang.environment": {"HF_TOKEN": [SECRET]}}, "rollout.sglang.environment.HF_TOKEN", "a list is"),
        (
            {"retrieval.elasticsearch.urls": f"http://{CREDENTIALS}h:1"},
            "retrieval.elasticsearch.urls",
            "write [http://***@h:1]",
        ),
        ({"retrieval.elasticsearch.urls": [f"http://{CREDENTIALS}h:1"]}, "retrieval.elasticsearch.urls.0", "api_key"),
        ({"retrieval.elasticsearch.urls": [f"{CREDENTIALS}h:1"]}, "retrieval.elasticsearch.urls.0", "***@h:1 holds"),
        ({"retrieval.http.url": f"http://{CREDENTIALS}h/retrieve"}, "retrieval.http.url", "username and password"),
        ({"retrieval.http.url": [f"http://{CREDENTIALS}h/retrieve"]}, "retrieval.http.url", "is not valid"),
        ({"rollout.sglang.urls": [f"http://{CREDENTIALS}h:1"]}, "rollout.sglang.urls.0", "http://***@h:1 holds"),
        ({"rollout.sglang.urls": f"http://{CREDENTIALS}h:1"}, "rollout.sglang.urls", "write [http://***@h:1]"),
    ],
)
def test_no_error_shows_a_secret(changes: dict[str, Any], field: str, problem: str) -> None:
    """Nor does its traceback, which a notebook prints."""
    error = error_of(merged(RL, changes))
    assert error.field == field
    assert problem in str(error)
    assert SECRET not in "".join(traceback.format_exception(error))


def test_a_number_as_a_password_is_to_be_quoted() -> None:
    error = error_of(merged(RL, {"retrieval.elasticsearch.password": 271828}))
    assert (error.field, error.fix) == ("retrieval.elasticsearch.password", "write it in quotes")
    assert "271828" not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "lines",
    [
        ["password: *hunter2"],
        ["password: !hunter2"],
        ["password: &hunter2 [1"],
        ["password: '@hunter2"],
        ["password: ${hunter2}"],
        ["password: a${hunter2"],
        ["passwrod: ${hunter2}"],
    ],
)
def test_no_error_of_a_broken_file_shows_a_secret(file: Path, lines: list[str]) -> None:
    section = ["retrieval:", "  corpus: corpus.jsonl", "  elasticsearch:", *(f"    {line}" for line in lines)]
    file.write_text(yaml.safe_dump({name: RL[name] for name in RL if name != "retrieval"}) + "\n".join(section))
    error = error_of_file(file)
    assert error.field == str(file)
    assert SECRET not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["retrieval.elasticsearch.password=[hunter2"], "'retrieval.elasticsearch.password...' is no YAML"),
        (["retrieval.elasticsearch.password=*hunter2"], "'retrieval.elasticsearch.password...' is no YAML"),
        (["retrieval.elasticsearch.passwrod=[hunter2"], "'retrieval.elasticsearch.passwrod...' is no YAML"),
        (["retreival.elasticsearch.password=[hunter2"], "number 1 is no YAML"),
        (["retrieval.elasticsearch={password: hunter2"], "'retrieval.elasticsearch...' is no YAML"),
        (["retrieval.elasticsearch.password:hunter2"], "'retrieval.elasticsearch.password...' is not key=value"),
        (["retrieval.elasticsearch.password=", "hunter2"], "number 2 is not key=value"),
        (["retrieval.elasticsearch.password=${hunter2}"], "cannot be resolved"),
        (["retrieval.elasticsearch.password.of=hunter2"], "a mapping is not valid"),
    ],
)
def test_no_error_of_an_override_shows_a_secret(file: Path, overrides: list[str], named: str) -> None:
    error = error_of_file(file, *overrides)
    assert named in str(error)
    assert SECRET not in "".join(traceback.format_exception(error))


def test_an_environment_variable_that_is_not_set_is_named(file: Path) -> None:
    assert "'NOT_SET_HERE' not found" in str(
        error_of_file(file, "retrieval.elasticsearch.password=${oc.env:NOT_SET_HERE}")
    )


def test_secrets_reach_neither_repr_nor_checkpoint() -> None:
    secrets = {
        "retrieval.elasticsearch.password": SECRET,
        "retrieval.elasticsearch.api_key": SECRET,
        "retrieval.http.username": "me",
        "retrieval.http.password": SECRET,
        "rollout.sglang.environment": {"HF_TOKEN": SECRET},
    }
    config = parse_config(merged(RL, secrets))
    assert SECRET not in repr(config) + str(config) + str(config.model_dump(mode="json"))
    assert config.rollout.sglang.plain_environment == {"HF_TOKEN": SECRET}


@pytest.mark.parametrize(("given", "lacking"), [("username", "password"), ("password", "username")])
def test_basic_authentication_takes_two(given: str, lacking: str) -> None:
    error = error_of(merged(RL, {f"retrieval.http.{given}": "x"}))
    assert (error.field, error.fix) == (f"retrieval.http.{lacking}", "set both, or neither")


def test_a_path_may_hold_an_at_sign() -> None:
    config = parse_config(merged(RL, {"retrieval.http.url": "http://h:1/@me/retrieve"}))
    assert config.retrieval is not None
    assert config.retrieval.http.url == "http://h:1/@me/retrieve"
