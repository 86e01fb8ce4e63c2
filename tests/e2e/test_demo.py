"""The demo keeps its promises: it learns, hindsight helps, and everything a person looks at is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.tiny.run import NUM_PROCESSES
from megatron_sdsearch.config import load_config
from megatron_sdsearch.logging import names
from tests.e2e.conftest import DEMO_LIMIT_S, DEMO_SEED, Demo, read_rows
from tests.e2e.ranks import ROOT

# The first test that asks for the demo pays for it.
pytestmark = pytest.mark.timeout(DEMO_LIMIT_S + 60)

NUMBERS = (
    "em_start em_end f1_end hit_start hit_end steps tp pp dp seed wall_s rl_wall_s s_per_step teacher_hit student_hit "
    "teacher_hit_mixed student_hit_mixed hf_em_end num_trajectories num_retrieval_failed num_leaks"
).split()
CONFIG = load_config(ROOT / "examples/tiny/config.yaml")
NUM_STEPS = CONFIG.train.num_steps


def test_the_summary_has_every_figure_and_they_are_plausible(demo: Demo) -> None:
    summary = demo.summary
    assert {name for name in NUMBERS if not isinstance(summary.get(name), int | float)} == set()
    assert summary["hf_dir"] == str(demo.out / "hf")
    layout = {name: summary[name] for name in ("steps", "tp", "pp", "dp", "seed")}
    assert layout == {"steps": NUM_STEPS, "tp": NUM_PROCESSES, "pp": 1, "dp": 1, "seed": DEMO_SEED}
    for name in NUMBERS:
        if name.startswith(("em_", "f1_", "hit_", "teacher_", "student_", "hf_em")):
            assert 0 <= summary[name] <= 1, name
    assert 0 < summary["s_per_step"] * NUM_STEPS <= summary["rl_wall_s"] < summary["wall_s"] <= DEMO_LIMIT_S
    assert summary["num_trajectories"] == NUM_STEPS * CONFIG.data.questions_per_step * CONFIG.rollout.group_size
    assert summary["num_retrieval_failed"] == 0
    assert 0 <= summary["num_leaks"] <= summary["num_trajectories"]


def test_the_policy_learns(demo: Demo) -> None:
    summary = demo.summary
    assert summary["em_end"] - summary["em_start"] >= 0.30
    assert summary["hit_end"] > summary["hit_start"], "better answers come from better searches"


def test_hindsight_makes_better_queries(demo: Demo) -> None:
    assert demo.summary["teacher_hit_mixed"] > demo.summary["student_hit_mixed"]


def test_stock_transformers_agrees_about_the_exported_model(demo: Demo) -> None:
    assert abs(demo.summary["hf_em_end"] - demo.summary["em_end"]) <= 0.01


def test_metrics_hold_every_step_and_every_evaluation(demo: Demo) -> None:
    rows = demo.metrics
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1)), "step 0 is the starting policy"
    for row in rows[1:]:
        assert {names.REWARD, names.EM, names.POLICY_LOSS, names.KL, names.GRAD_NORM, names.STEP_SECONDS} <= set(row)
    every = CONFIG.evaluation.every
    assert [row["step"] for row in rows if names.EVAL_EM in row] == list(range(0, NUM_STEPS + 1, every))
    assert rows[0][names.EVAL_EM] == demo.summary["em_start"]
    assert rows[-1][names.EVAL_EM] == demo.summary["em_end"]


def test_distillation_starts_after_its_warm_up(demo: Demo) -> None:
    warmup = CONFIG.objective.alpha_warmup_steps
    with_jsd = [row["step"] for row in demo.metrics if names.JSD in row]
    assert with_jsd == list(range(warmup + 1, NUM_STEPS + 1))
    assert all(row[names.JSD] > 0 for row in demo.metrics if names.JSD in row)


def test_tensorboard_has_the_same_numbers(demo: Demo) -> None:
    events = EventAccumulator(str(demo.out / "tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars(names.REWARD)}
    written = {row["step"]: row[names.REWARD] for row in demo.metrics if names.REWARD in row}
    assert shown == pytest.approx(written)
    assert len(written) == NUM_STEPS


def test_every_step_keeps_its_trajectories(demo: Demo) -> None:
    files = sorted((demo.out / "trajectories").iterdir())
    assert [file.name for file in files] == [f"step_{step:06d}.jsonl" for step in range(1, NUM_STEPS + 1)]
    group_size = CONFIG.rollout.group_size
    for step, file in enumerate(files, start=1):
        rows = read_rows(file)
        assert [row["sibling"] for row in rows] == list(range(group_size)) * CONFIG.data.questions_per_step
        assert {row["step"] for row in rows} == {step}
        versions = {span["policy_version"] for row in rows for span in row["spans"] if span["kind"] == "sampled"}
        assert versions == {step - 1}, "sampled by exactly the policy that the step started from"


def test_there_is_a_page_and_the_terminal_says_where(demo: Demo) -> None:
    pages = list(demo.out.glob("*.html"))
    assert len(pages) == 1
    page = pages[0].read_text()
    assert len(page) > 10_000
    assert "</html>" in page
    assert pages[0].name in demo.output
    assert "summary.json" in demo.output


def test_the_exported_folder_is_a_complete_hugging_face_model(demo: Demo) -> None:
    folder, source = demo.out / "hf", demo.out / "world" / "model"
    exported = {file.name for file in folder.iterdir()}
    assert exported >= {file.name for file in source.iterdir()}
    assert exported >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert [info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched")] == [set()] * 3
    start = AutoModelForCausalLM.from_pretrained(demo.out / "warm_start" / "hf").state_dict()
    unmoved = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, start[name])]
    assert unmoved == [], "every tensor was trained"


def test_the_exported_tokenizer_speaks_the_tags(demo: Demo) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(demo.out / "hf")
    text = "<search> a </search>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.chat_template
    assert tokenizer.eos_token_id is not None
