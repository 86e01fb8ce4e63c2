"""Every setting that would fail or waste a run is one finding with its field, and a run in order has none."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sdsearch.check.run import run_checks
from megatron_sdsearch.config import load_config
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.training.preflight import refuse_start
from tests.unit.check.tiny_run import TinyRun, only

GPU: dict[str, Any] = {"gpus_per_node": 8, "ranks_per_node": 4}
BF16 = "model.dtype=bfloat16"
SGLANG = ("rollout.engine=sglang", "rollout.sglang.command=[sh]")


def test_a_run_in_order_has_nothing_but_notes(tiny: TinyRun) -> None:
    assert tiny.found() == []
    assert tiny.check().exit_code == 0
    assert tiny.found(*tiny.warm_start) == []
    assert tiny.found(BF16, **GPU) == []


CASES: list[tuple[tuple[str, ...], dict[str, Any], str, str, str, str]] = [
    # overrides, world, severity, field, what, fix
    (("objective.alpa=1",), {}, "error", "objective.alpa", "unknown key", "did you mean alpha?"),
    (("rollout.group_size=1",), {}, "error", "rollout.group_size", "1 gives no advantage", "at least 2"),
    (("train.max_tokens_per_microbatch=300",), {}, "error", "train.max_tokens_per_microbatch", "300", "at least 428"),
    (("optimizer.warmup_steps=4",), {}, "error", "optimizer.warmup_steps", "4 of the run's 4", "lower it"),
    (("data.train=nowhere.jsonl",), {}, "error", "data.train", "nowhere.jsonl does not exist", "that exists"),
    (
        ("parallel.tensor_model_parallel_size=3",),
        {},
        "error",
        "parallel.tensor_model_parallel_size",
        "num_attention_heads = 4",
        "choose one of 1, 2, 4",
    ),
    (
        ("parallel.pipeline_model_parallel_size=3",),
        {},
        "error",
        "parallel.pipeline_model_parallel_size",
        "num_hidden_layers = 2",
        "choose one of 1, 2",
    ),
    (
        ("parallel.tensor_model_parallel_size=2",),
        {"ranks_per_node": 3},
        "error",
        "parallel.tensor_model_parallel_size",
        "does not divide the 3",
        "multiple of 2",
    ),
    ((), GPU, "error", "model.dtype", "float32 with transformer-engine", "model.dtype=bfloat16"),
    ((BF16,), {"device": "cpu"}, "error", "model.dtype", "bfloat16 without a GPU", "model.dtype=float32"),
    (
        (BF16,),
        {"gpus_per_node": 2, "ranks_per_node": 4},
        "error",
        "--nproc-per-node",
        "4 trainer processes",
        "start 2 per node",
    ),
    (
        ("parallel.tensor_model_parallel_size=2",),
        {"num_nodes": 2, "ranks_per_node": 1},
        "warning",
        "parallel.tensor_model_parallel_size",
        "over the network",
        "within a node",
    ),
    (("data.questions_per_step=11",), {}, "error", "data.questions_per_step", "11 questions", "between 1 and 10"),
    (
        ("data.questions_per_step=4", "rollout.max_refills=3"),
        {},
        "warning",
        "rollout.max_refills",
        "16",
        "lower it to 1",
    ),
    (
        ("train.trajectories_per_minibatch=2",),
        {"ranks_per_node": 4},
        "warning",
        "train.trajectories_per_minibatch",
        "2 samples for 4",
        "at least 4",
    ),
    (
        ("data.questions_per_step=2",),
        {"ranks_per_node": 4},
        "warning",
        "data.questions_per_step",
        "2 of them wait",
        "4",
    ),
    (
        ("rollout.max_prompt_tokens=5", "evaluation.every=0"),
        {},
        "error",
        "rollout.max_prompt_tokens",
        "no trajectory would be sampled",
        "at least",
    ),
    (
        ("rollout.max_total_tokens=400",),
        {},
        "error",
        "rollout.max_total_tokens",
        "528 tokens, the model has 512",
        "lower",
    ),
    (
        ("objective.alpha=0", "rollout.max_total_tokens=513"),
        {},
        "error",
        "rollout.max_total_tokens",
        "rollout.max_total_tokens makes 513 tokens, the model has 512",
        "lower rollout.max_total_tokens",
    ),
    (
        ("hindsight.content=everything",),
        {},
        "error",
        "hindsight.max_block_tokens",
        "2 responses of up to 192 tokens = 384",
        "at least 384, and train.max_tokens_per_microbatch to 684",
    ),
    (("rollout.max_total_tokens=150",), {}, "warning", "rollout.max_total_tokens", "holds 0 searches", "set it to"),
    (
        ("rollout.max_observation_tokens=4",),
        {},
        "error",
        "rollout.max_observation_tokens",
        "tags of profile",
        "more than",
    ),
    (("rollout.max_observation_tokens=40",), {}, "warning", "rollout.max_observation_tokens", "are cut", "about"),
    (
        ("objective.alpha_warmup_steps=4",),
        {},
        "warning",
        "objective.alpha_warmup_steps",
        "before it distils",
        "below 4",
    ),
    (
        ("objective.alpha=0", "telemetry.query_probe=true"),
        {},
        "warning",
        "telemetry.query_probe",
        "this run has none",
        "false",
    ),
    (
        ("rollout.top_p=0.9", "objective.importance_correction=mask"),
        {},
        "warning",
        "objective.importance_correction",
        "mask with rollout.top_p=0.9",
        "top_p=1",
    ),
    *(
        (
            (f"checkpoint.every={every}", "checkpoint.every_minutes=0"),
            {},
            "warning",
            "checkpoint.every_minutes",
            f"checkpoint.every is {every}: nothing is saved before the end of 4 steps",
            "every_minutes=30",
        )
        for every in (0, 4)
    ),
    (
        ("checkpoint.every=0", "checkpoint.keep_every=2"),
        {},
        "warning",
        "checkpoint.keep_every",
        "only saved by chance",
        "checkpoint.every=2",
    ),
    (("checkpoint.keep_every=3",), {}, "warning", "checkpoint.keep_every", "not a multiple", "multiple of 2"),
    (("retrieval.engine=http", "retrieval.http.url=http://h:1"), {}, "error", "retrieval.http.url", "full URL", "all"),
    (
        ("retrieval.http.url=http://me:pw@h:1/r",),
        {},
        "error",
        "retrieval.http.url",
        "http://***@h:1/r holds",
        "username",
    ),
    (
        ("retrieval.engine=http", "retrieval.index=elsewhere"),
        {},
        "warning",
        "retrieval.index",
        "only tantivy",
        "remove it",
    ),
    (
        ("retrieval.engine=elasticsearch", "retrieval.elasticsearch.urls=[h:9200]"),
        {},
        "error",
        "retrieval.elasticsearch.urls",
        "not a full URL",
        "scheme",
    ),
    (
        ("retrieval.engine=elasticsearch", "retrieval.elasticsearch.mode=dense", "retrieval.elasticsearch.encoder=e5"),
        {},
        "error",
        "retrieval.elasticsearch.encoder",
        "e5 holds no config.json",
        "Hugging Face model folder",
    ),
    (("rollout.engine=sglang", "rollout.sglang.urls=[h:1]"), {}, "error", "rollout.sglang.urls", "'h:1'", "http://"),
    (
        ("rollout.engine=sglang", "rollout.sglang.command=[nosuchprogram]"),
        {},
        "error",
        "rollout.sglang.command[0]",
        "nosuchprogram is not a program",
        "existing path",
    ),
    (
        (BF16, *SGLANG, "rollout.sglang.tp_size=4"),
        {"num_nodes": 2, "gpus_per_node": 2, "ranks_per_node": 1, "num_sglang_nodes": 1},
        "error",
        "rollout.sglang.tp_size",
        "nodes have 2",
        "lower it",
    ),
    ((*SGLANG,), {"num_nodes": 2}, "error", "SDSEARCH_SGLANG_NODES", "127.0.0.1", "rollout.sglang.urls"),
    (
        (*SGLANG, BF16),
        {"gpus_per_node": 4, "ranks_per_node": 4},
        "error",
        "rollout.sglang.num_servers",
        "more than the 0 of 4",
        "fewer",
    ),
    (
        (*SGLANG, BF16, "rollout.sglang.tp_size=4"),
        {"gpus_per_node": 6, "ranks_per_node": 4},
        "error",
        "rollout.sglang.num_servers",
        "1 servers x 4 GPUs are more than the 2",
        "lower it",
    ),
    (
        (*SGLANG, "rollout.sglang.arguments=[--port=1]"),
        {},
        "error",
        "rollout.sglang.arguments",
        "--port is set",
        "it",
    ),
    (
        ("retrieval.engine=http", "retrieval.analyzer=english"),
        {},
        "warning",
        "retrieval.analyzer",
        "only tantivy reads",
        "index the corpus",
    ),
    ((*SGLANG, "rollout.sglang.colocated=true"), {}, "error", "rollout.sglang.colocated", "without a GPU", "false"),
]


@pytest.mark.parametrize(
    ("overrides", "given", "severity", "field", "what", "fix"), CASES, ids=[f"{c[3]}-{i}" for i, c in enumerate(CASES)]
)
def test_a_mistake_is_one_finding_with_its_fix(
    tiny: TinyRun, overrides: tuple[str, ...], given: dict[str, Any], severity: str, field: str, what: str, fix: str
) -> None:
    finding = only(tiny.found(*overrides, **given))
    assert (finding.severity, finding.field) == (severity, field)
    assert what in finding.problem
    assert fix in finding.fix


def test_a_run_without_distillation_may_fill_the_model_s_positions(tiny: TinyRun) -> None:
    assert tiny.found("objective.alpha=0", "rollout.max_total_tokens=512") == []
    only_a_warning = tiny.found("objective.alpha_warmup_steps=4", "rollout.max_total_tokens=512")
    assert [finding.field for finding in only_a_warning] == ["objective.alpha_warmup_steps"]


def test_all_mistakes_are_listed_whatever_their_kind(tiny: TinyRun) -> None:
    wrong = ("objective.alpa=1", "seed=-1", "rollout.group_size=1", "data.heldout=nowhere", "checkpoint.keep_every=3")
    fields = [finding.field for finding in tiny.found(*wrong)]
    assert fields == ["seed", "objective.alpa", "rollout.group_size", "data.heldout", "checkpoint.keep_every"]


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (("hindsight.content=documents", "hindsight.siblings=own"), "hindsight.siblings"),
        (("objective.topk=null", "objective.topk_of=union"), "objective.topk_of"),
    ],
)
def test_sections_that_contradict_themselves_are_listed_like_all_others(
    tiny: TinyRun, overrides: tuple[str, ...], field: str
) -> None:
    fields = [finding.field for finding in tiny.found(*overrides, "checkpoint.keep_every=3")]
    assert fields == [field, "checkpoint.keep_every"]


def test_a_refused_value_is_not_judged_by_the_default_in_its_place(tiny: TinyRun) -> None:
    # The default, 256 questions, is more than there are; the default of max_total_tokens more than the model has.
    found = tiny.found(
        "data.questions_per_step=many", "rollout.max_total_tokens=long", "train.max_tokens_per_microbatch=x"
    )
    assert sorted(finding.field for finding in found) == [
        "data.questions_per_step",
        "rollout.max_total_tokens",
        "train.max_tokens_per_microbatch",
    ]


def test_train_refuses_what_the_check_finds(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it at once, from the layout to the contents of files."""
    overrides = (
        f"retrieval.corpus={tiny.folder}",
        "data.heldout=nowhere",
        "parallel.tensor_model_parallel_size=3",
        "rollout.max_observation_tokens=4",
    )
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError) as caught:
        refuse_start(load_config(tiny.config, overrides))
    found = [finding for finding in tiny.found(*overrides, ranks_per_node=3) if finding.severity == "error"]
    refused = [line.split(": ")[0] for line in str(caught.value).split("\n")]
    assert sorted(refused) == sorted(finding.field for finding in found)
    assert f"retrieval.corpus: {tiny.folder} is a folder" in str(caught.value)
    assert len(refused) == 4


def test_what_is_no_configuration_is_one_error(tiny: TinyRun) -> None:
    assert "does not exist" in only(list(run_checks(tiny.folder / "nowhere.yaml").findings)).problem
    tiny.config.write_text("- a list")
    assert only(tiny.found()).fix
    tiny.config.write_text("model: [")
    assert only(tiny.found()).field.endswith("config.yaml")


def test_a_missing_setting_without_default_ends_with_the_configuration(tiny: TinyRun) -> None:
    tiny.config.write_text("train: {num_steps: 0}")
    assert [finding.field for finding in tiny.found()] == ["run_dir", "model", "train.num_steps"]


def test_missing_sections_of_a_mode_are_listed(tiny: TinyRun) -> None:
    tiny.config.write_text(f"run_dir: r\nmodel: {{hf_dir: {tiny.model}}}\nevaluation: {{every: 1}}\n")
    assert {finding.field for finding in tiny.found()} >= {"data.train", "retrieval", "data.heldout"}


def test_errors_come_first_in_their_section(tiny: TinyRun) -> None:
    report = tiny.check("data.questions_per_step=2", "train.trajectories_per_minibatch=3", ranks_per_node=3)
    for section in {finding.section for finding in report.findings}:
        severities = [str(f.severity) for f in report.findings if f.section == section]
        assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert report.exit_code == 1
