"""Paths as they are typed: a home directory everywhere, a model of the hub, and numbers that no library takes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from megatron_sdsearch.cli import app
from megatron_sdsearch.config import RunConfig, file_problems, load_config, no_model, parse_config, path_argument
from megatron_sdsearch.data.preparation import PrepareSettings, find_question_files
from megatron_sdsearch.errors import ConfigError, raise_problems

BASE: dict[str, Any] = {
    "run_dir": "run",
    "model": {"hf_dir": "model"},
    "data": {"train": "t.jsonl"},
    "retrieval": {"corpus": "c.jsonl"},
}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def with_value(field: str, value: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {name: dict(v) if isinstance(v, dict) else v for name, v in BASE.items()}
    *sections, last = field.split(".")
    section = tree
    for name in sections:
        section = section.setdefault(name, {})
    section[last] = value
    return tree


def value_of(config: RunConfig, field: str) -> Any:
    value: Any = config
    for name in field.split("."):
        value = getattr(value, name)
    return value


def fields_with(kind: type, section: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every setting of a type, found in the declarations: a new one is tested without being listed here."""
    found: list[str] = []
    for name, info in section.model_fields.items():
        kinds = {info.annotation, *(getattr(option, "__origin__", option) for option in get_args(info.annotation))}
        found += [f"{prefix}{name}"] if kind in kinds else []
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        found += [field for part in inner for field in fields_with(kind, part, f"{prefix}{name}.")]
    return found


PATHS = fields_with(Path)


def test_paths_are_found_in_all_sections() -> None:
    assert {"run_dir", "model.megatron_dir", "retrieval.replay.store", "retrieval.elasticsearch.ca_file"} <= {*PATHS}


@pytest.mark.parametrize("field", PATHS)
def test_a_path_of_the_settings_may_begin_at_home(home: Path, field: str) -> None:
    assert value_of(parse_config(with_value(field, "~/x/y")), field) == home / "x/y"
    assert value_of(parse_config(with_value(field, "~root/x")), field) == Path("/root/x")
    assert value_of(parse_config(with_value(field, "a/~/$HOME")), field) == Path("a/~/$HOME")
    with pytest.raises(ConfigError, match=rf"^{field}: '~nosuchuser/x' is not valid; ~nosuchuser is not a user"):
        parse_config(with_value(field, "~nosuchuser/x"))


def test_a_command_without_a_shell_has_its_home_expanded(home: Path) -> None:
    for field in ("rollout.sglang.command", "rollout.sglang.arguments"):
        assert value_of(parse_config(with_value(field, ["~/bin/x", "a~"])), field) == (f"{home}/bin/x", "a~")
        with pytest.raises(ConfigError, match=rf"^{field}\.0: ('~nosuchuser/x'|a text) is not valid"):
            parse_config(with_value(field, ["~nosuchuser/x"]))


def test_the_configuration_file_and_its_interpolations_begin_at_home(home: Path) -> None:
    (home / "c.yaml").write_text("run_dir: ~/r\nmodel: {hf_dir: m}\ndata: {train: t}\nretrieval: {corpus: c}\n")
    config = load_config(Path("~/c.yaml"), ["data.heldout=${run_dir}/h"])
    assert (config.run_dir, config.data.heldout) == (home / "r", home / "r/h")
    with pytest.raises(ConfigError, match=r"CONFIG: ~nosuchuser/c\.yaml does not exist"):
        load_config(Path("~nosuchuser/c.yaml"))


def test_options_of_the_program_begin_at_home(home: Path) -> None:
    (home / "c.yaml").write_text(
        "run_dir: r\nmodel: {hf_dir: m}\ndata: {train: t, heldout: h}\nretrieval: {corpus: c}\n"
    )
    result = CliRunner().invoke(app, ["evaluate", "~/c.yaml", "--model=~nosuchuser/hf"])
    assert (result.exit_code, "~nosuchuser is not a user here" in result.output) == (2, True)
    for option in ("--urls-file", "--log-dir"):
        result = CliRunner().invoke(app, ["serve", "c.yaml", "--host=h", "--urls-file=u", f"{option}=~nosuchuser/x"])
        assert (result.exit_code, "~nosuchuser is not a user here" in result.output) == (2, True)


def test_arguments_of_the_tools_begin_at_home(home: Path) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--out", type=path_argument)
    assert parser.parse_args(["--out=~/x"]).out == home / "x"
    with pytest.raises(argparse.ArgumentError, match="argument --out: ~nosuchuser is not a user here"):
        parser.parse_args(["--out=~nosuchuser/x"])
    (home / "nq").mkdir()
    (home / "nq/train.jsonl").write_text("")
    assert find_question_files("~/nq", PrepareSettings())[0].path == home / "nq/train.jsonl"
    with pytest.raises(ConfigError, match=r"SOURCE: ~nosuchuser/nq does not exist"):
        find_question_files("~nosuchuser/nq", PrepareSettings())


@pytest.mark.parametrize(
    "tool",
    ["tools/prepare_data.py", "tools/index_corpus.py", "tools/serve_retriever.py", "examples/tiny/build_world.py"],
)
def test_no_tool_reads_a_path_otherwise(tool: str) -> None:
    text = (ROOT / tool).read_text()
    assert "type=path_argument" in text
    assert "type=Path" not in text


# A model of the hub


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-3B", "https://huggingface.co/Qwen/Qwen2.5-3B"])
def test_a_hub_id_gets_the_line_that_fetches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    line = r"`hf download Qwen/Qwen2\.5-3B --local-dir models/Qwen2\.5-3B` and set {}=models/Qwen2\.5-3B"
    config = parse_config(with_value("model.hf_dir", name))
    with pytest.raises(ConfigError, match=r"^model\.hf_dir: .*" + line.format(r"model\.hf_dir")):
        raise_problems(file_problems(config))
    dense = with_value("retrieval.elasticsearch", {"mode": "dense", "encoder": name})
    dense["retrieval"]["engine"] = "elasticsearch"
    field = r"retrieval\.elasticsearch\.encoder"
    assert any(error.field == field.replace("\\", "") for error in file_problems(parse_config(dense)))


@pytest.mark.parametrize("name", ["models/x", "/a/b", "a/b/c", "model"])
def test_a_path_that_is_no_hub_id_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ConfigError, match=rf"^model\.hf_dir: {name} holds no config\.json; give a Hugging"):
        raise_problems(file_problems(parse_config(with_value("model.hf_dir", name))))


# Numbers


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_a_seed_that_a_generator_does_not_take_is_refused_with_the_range(seed: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"^seed: {seed} is not valid; Input should be (greater than .* 0|less than .* {2**63 - 1})$"
    ):
        parse_config(BASE | {"seed": seed})


def test_every_seed_is_taken_by_all_generators() -> None:
    """Whatever is seeded in a run: torch, megatron's offsets on top of it, numpy's two kinds, and SGLang's servers."""
    import numpy as np
    import torch

    seed = parse_config(BASE | {"seed": 2**63 - 1}).seed
    torch.Generator().manual_seed(seed + 2718 + 100_000)
    np.random.default_rng((seed, 0))
    np.random.RandomState(seed % 2**32)


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("train.num_steps", 2**31, "less than or equal to 2147483647"),
        ("rollout.max_turns", 10**30, "less than or equal to 2147483647"),
        ("objective.topk", 10**10, "less than or equal to 2147483647"),
        ("retrieval.top_k", 0, "greater than or equal to 1"),
        ("parallel.collective_timeout_minutes", 2**31 - 1, "less than or equal to 525600"),
        ("rollout.sglang.request_timeout_s", 1e30, "less than or equal to 1000000000"),
    ],
)
def test_a_number_that_would_overflow_deep_down_is_refused(field: str, value: float, limit: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: .*{limit}"):
        parse_config(with_value(field, value))


def test_a_number_that_python_will_not_read_is_refused_as_well(home: Path) -> None:
    (home / "c.yaml").write_text("run_dir: r\n")
    with pytest.raises(ConfigError, match=r"^seed: .* is not YAML"):
        load_config(home / "c.yaml", [f"seed={'9' * 5000}"])


def test_a_folder_of_models_is_not_taken_for_the_name_of_an_organisation() -> None:
    problem = no_model("model.hf_dir", Path("models/Qwen2.5-3B"))
    assert "`hf download ORGANISATION/Qwen2.5-3B --local-dir models/Qwen2.5-3B`" in problem.fix


def test_a_run_in_the_place_of_one_of_its_checkpoints_is_called_so(tmp_path: Path) -> None:
    def problem() -> ConfigError:
        config = parse_config(with_value("model.megatron_dir", str(tmp_path)))
        (found,) = [p for p in file_problems(config) if p.field == "model.megatron_dir"]
        return found

    assert "holds no checkpoint" in problem().problem
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text("step_000004")
    assert problem().fix == f"give one of them, such as {tmp_path}/checkpoints/step_000004"
