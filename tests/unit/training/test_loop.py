"""What ends a run before processes meet and a model is loaded: ``train`` and ``check`` say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sdsearch.config import load_config
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.training.loop import train
from tests.unit.check.tiny_run import TinyRun, only, question, save_model, write_rows

LONG = "where is " + "the far " * 100


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyRun:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # train sets it for good
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return TinyRun(tmp_path, save_model(tmp_path / "saved"))


def assert_refused_alike(tiny: TinyRun, words: str, *overrides: str) -> None:
    finding = only(tiny.found(*overrides))
    with pytest.raises(ConfigError) as caught:
        train(load_config(tiny.config, overrides))
    assert (caught.value.field, caught.value.problem) == (finding.field, finding.problem)
    assert (finding.severity, finding.field) == ("error", "rollout.max_prompt_tokens")
    assert words in finding.problem
    assert not (tiny.folder / "run").exists()


def test_prompts_none_of_which_can_be_asked(tiny: TinyRun) -> None:
    assert_refused_alike(tiny, "all 10 questions of data.train", "rollout.max_prompt_tokens=5", "evaluation.every=0")


def test_held_out_prompts_none_of_which_can_be_asked(tiny: TinyRun) -> None:
    """Evaluation asks the first ones alone."""
    write_rows(tiny.heldout, [question("h0", LONG, "x"), question("h1", LONG, "x"), question("h2", "where?", "x")])
    assert_refused_alike(tiny, "all 2 questions of data.heldout", "evaluation.num_questions=2")
