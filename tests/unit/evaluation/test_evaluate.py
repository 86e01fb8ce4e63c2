"""What is wrong with the folder or the questions is said before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sdsearch.config import load_config
from megatron_sdsearch.errors import ConfigError, DataError
from megatron_sdsearch.evaluation.evaluate import evaluate_folder
from tests.unit.check.tiny_run import TinyRun, save_model


@pytest.fixture
def tiny(tmp_path: Path) -> TinyRun:
    return TinyRun(tmp_path, save_model(tmp_path / "saved"))


def test_a_file_of_weights_that_was_cut_short_is_named(tiny: TinyRun) -> None:
    first = sorted(tiny.model.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-100])
    with pytest.raises(DataError, match=first.name):
        evaluate_folder(load_config(tiny.config), tiny.model)


def test_prompts_none_of_which_can_be_asked_are_a_wrong_setting(tiny: TinyRun) -> None:
    with pytest.raises(ConfigError, match=r"max_prompt_tokens: 5, but the prompts of all 4 questions of data\.heldout"):
        evaluate_folder(load_config(tiny.config, ["rollout.max_prompt_tokens=5"]), tiny.model)


def test_a_folder_without_weights_is_named(tiny: TinyRun) -> None:
    for path in tiny.model.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(DataError, match=r"model\.safetensors"):
        evaluate_folder(load_config(tiny.config), tiny.model)


def test_a_bad_question_is_named_by_its_line(tiny: TinyRun) -> None:
    tiny.heldout.write_text(tiny.heldout.read_text() + "{}\n")
    with pytest.raises(DataError, match=r"heldout\.jsonl:5"):
        evaluate_folder(load_config(tiny.config), tiny.model)


def test_a_chat_template_that_fails_and_wrong_arguments_are_named(tiny: TinyRun) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.chat_template_arguments\.thinking: the chat template of .* never reads"
    ):
        evaluate_folder(load_config(tiny.config, ["data.chat_template_arguments.thinking=true"]), tiny.model)
    (tiny.model / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    with pytest.raises(ConfigError, match=r"^--model: the chat template of .*not today"):
        evaluate_folder(load_config(tiny.config), tiny.model)
