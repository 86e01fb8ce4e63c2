"""Files of a run: broken ones are found, each with what is wrong in it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_sdsearch.check.findings import Severity
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.training.run_lock import lock_run_dir
from tests.unit.check.tiny_run import TinyRun, only, question, write_rows
from tests.unit.conftest import CHAT_TEMPLATE, train_tokenizer


def shards(tiny: TinyRun) -> list[Path]:
    files = sorted(tiny.model.glob("*.safetensors"))
    assert len(files) > 1, "the tiny model is cut into several files"
    return files


# Data


def test_a_bad_question_is_named_by_its_line(tiny: TinyRun) -> None:
    with tiny.train.open("a") as file:
        file.write('{"question_id": "x", "text": "?"}\n')
    finding = only(tiny.found())
    assert (finding.severity, finding.field) == ("error", "data.train")
    assert "train.jsonl:11: gold_answers" in finding.problem


def test_heldout_questions_that_are_trained_on_are_counted(tiny: TinyRun) -> None:
    rows = [question("h0", "Where is the Lisbon", "Lisbon"), question("t3", "else?", "x"), question("h2", "new?", "y")]
    write_rows(tiny.heldout, rows)
    finding = only(tiny.found())
    assert (finding.severity, finding.field) == ("warning", "data.heldout")
    assert finding.problem.startswith("2 of 3 held-out questions")


def test_answers_that_normalise_to_nothing_are_found(tiny: TinyRun) -> None:
    write_rows(tiny.heldout, [question("h0", "which article?", "The", "a"), question("h1", "who?", "The Who")])
    finding = only(tiny.found())
    assert "answered right only character for character, such as h0 ('The')" in finding.problem
    assert finding.problem.startswith("1 questions")


def test_questions_are_counted(tiny: TinyRun) -> None:
    assert "data.train: 10 rows; the run reads each 1.6 times" in tiny.notes()


def test_a_bad_passage_and_passages_without_titles_are_found(tiny: TinyRun) -> None:
    write_rows(tiny.corpus, [{"id": "1", "contents": "no title"}, {"id": "2", "contents": "none either"}])
    finding = only(tiny.found())
    assert (finding.severity, finding.field) == ("warning", "retrieval.corpus")
    assert "2 of 2" in finding.problem
    write_rows(tiny.corpus, [{"id": "1", "contents": '"T"\nx'}, {"id": "1", "contents": '"T"\ny'}])
    assert "is a duplicate" in only(tiny.found()).problem


def test_demonstrations_are_read_and_measured(tiny: TinyRun) -> None:
    assert "train.demonstrations: 8 rows; the run reads each 32 times" in tiny.notes(*tiny.warm_start)
    finding = only(tiny.found(*tiny.warm_start, "train.max_tokens_per_microbatch=8"))
    assert finding.field == "train.max_tokens_per_microbatch"
    assert "more than train.max_tokens_per_microbatch = 8" in finding.problem
    spans = [{"kind": "sampled", "text": "<search>y</search>"}, {"kind": "observation", "text": "found"}]
    tiny.demonstrations.write_text(json.dumps({"demonstration_id": "d", "prompt": "x", "spans": spans}))
    assert only(tiny.found(*tiny.warm_start)).field == "data.prompt_profile"
    nothing_sampled = {"demonstration_id": "d", "prompt": "x", "spans": [{"kind": "observation", "text": "y"}]}
    tiny.demonstrations.write_text(json.dumps(nothing_sampled))
    assert "demonstrations.jsonl:1: spans: No span is sampled text" in only(tiny.found(*tiny.warm_start)).problem
    tiny.demonstrations.write_text('{"prompt": "x"}\n')
    assert "demonstrations.jsonl:1" in only(tiny.found(*tiny.warm_start)).problem


def test_fewer_demonstrations_than_ranks_leave_some_idle(tiny: TinyRun) -> None:
    found = tiny.found(*tiny.warm_start, "train.demonstrations_per_step=2", ranks_per_node=4)
    assert only(found).field == "train.demonstrations_per_step"


# The model's folder


def test_a_file_of_weights_that_is_missing_or_cut_is_found(tiny: TinyRun) -> None:
    last = shards(tiny)[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-10])
    assert f"{last} is no safetensors file" in only(tiny.found()).problem
    last.unlink()
    finding = only(tiny.found())
    assert (finding.severity, finding.field) == ("error", "model.hf_dir")
    assert f"{last} does not exist" in finding.problem
    last.write_bytes(whole)
    assert tiny.found() == []


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json", "*.safetensors"]
)
def test_a_git_lfs_pointer_in_the_models_folder_is_called_one(tiny: TinyRun, name: str) -> None:
    path = sorted(tiny.model.glob(name))[0]
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    found = [finding for finding in tiny.found() if finding.severity is Severity.ERROR]
    assert f"{path}: is a git LFS pointer, not the file itself" in found[0].problem


def test_a_tensor_that_the_index_promises_and_no_file_holds_is_found(tiny: TinyRun) -> None:
    last = shards(tiny)[-1]
    tensors = load_file(last)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, last, metadata={"format": "pt"})
    assert f"has no tensor {name}" in only(tiny.found()).problem


@pytest.mark.parametrize("index", ["{", "[]", "{}"])
def test_an_index_that_is_none_is_found(tiny: TinyRun, index: str) -> None:
    (tiny.model / "model.safetensors.index.json").write_text(index)
    finding = only(tiny.found())
    assert (finding.severity, finding.field) == ("error", "model.hf_dir")
    assert "is no index of weights" in finding.problem


def test_config_and_weights_of_different_models_are_found(tiny: TinyRun) -> None:
    tiny.change_model(num_hidden_layers=3, layer_types=None)
    assert "lists no tensor model.layers.2" in only(tiny.found()).problem
    tiny.change_model(num_hidden_layers=2, vocab_size=1000)
    assert "config.json says vocab_size = 1000" in only(tiny.found()).problem


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"model_type": "gpt2"}, ["model_type 'gpt2'"]),
        ({"hidden_act": "gelu", "use_sliding_window": True}, ["hidden_act 'gelu'", "sliding windows"]),
    ],
)
def test_all_that_is_refused_of_an_architecture_is_listed(
    tiny: TinyRun, changes: dict[str, object], texts: list[str]
) -> None:
    tiny.change_model(**changes)
    found = tiny.found()
    assert len(found) == len(texts)
    for text in texts:
        assert any(text in finding.problem for finding in found)


def test_a_tokenizer_that_cannot_be_used_is_found(tiny: TinyRun) -> None:
    (tiny.model / "tokenizer.json").write_text("{")
    assert "the tokenizer cannot be read" in only(tiny.found()).problem
    (tiny.model / "tokenizer.json").unlink()
    assert "contains no tokenizer.json" in only(tiny.found()).problem


def test_a_tokenizer_larger_than_the_embedding_is_found(tiny: TinyRun) -> None:
    tokenizer = train_tokenizer()
    tokenizer.add_tokens([f"extra{i}" for i in range(20)])
    tokenizer.save_pretrained(tiny.model)
    finding = only(tiny.found())
    assert finding.severity is Severity.ERROR
    assert f"the tokenizer has {len(tokenizer)} ids" in finding.problem


def test_a_template_that_loses_the_question_is_found(tiny: TinyRun) -> None:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = "{{ 'hello' }}"
    tokenizer.save_pretrained(tiny.model)
    assert "shows the user's text 0 times" in only(tiny.found()).problem


def test_a_template_that_fails_and_arguments_that_it_does_not_read_are_found(tiny: TinyRun) -> None:
    (tiny.model / "chat_template.jinja").write_text("{{ raise_exception('not today') }}")
    finding = only(tiny.found())
    assert (finding.severity, finding.field) == ("error", "model.hf_dir")
    assert "not today" in finding.problem
    (tiny.model / "chat_template.jinja").write_text(CHAT_TEMPLATE + "{{ enable_thinking }}")
    assert tiny.found("data.chat_template_arguments.enable_thinking=false") == []
    finding = only(tiny.found("data.chat_template_arguments.enable_thinkin=false"))
    assert finding.field == "data.chat_template_arguments.enable_thinkin"
    assert finding.fix == "did you mean enable_thinking?"


def test_a_tag_of_the_profile_that_would_vanish_is_found(tiny: TinyRun) -> None:
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<documents>"]})
    tokenizer.save_pretrained(tiny.model)
    assert tiny.found() == []
    assert "<documents>: special tokens" in tiny.found("data.prompt_profile=autorefine")[0].problem


def test_an_end_of_sequence_that_only_the_model_knows_is_found(tiny: TinyRun) -> None:
    tiny.change_model(eos_token_id=0)
    finding = only(tiny.found())
    assert finding.severity is Severity.WARNING
    assert "config.json ends sequences with [0]" in finding.problem


def test_prompts_with_and_without_a_template_differ(tiny: TinyRun) -> None:
    assert "one user message of its chat template" in tiny.notes()
    (tiny.model / "chat_template.jinja").unlink()
    train_tokenizer(has_template=False).save_pretrained(tiny.model)
    assert "raw text: it has no chat template" in tiny.notes()


def test_longer_prompts_than_the_budget_are_counted(tiny: TinyRun) -> None:
    rows = [question(f"t{i}", f"where is {i}?", "x") for i in range(9)]
    write_rows(tiny.train, [*rows, question("long", "where is " + "far " * 100, "x")])
    finding = only(tiny.found())
    assert (finding.severity, finding.field) == ("warning", "rollout.max_prompt_tokens")
    assert "1 of 10" in finding.problem
    assert "long with" in finding.problem


def test_longer_prompts_of_the_held_out_set_are_counted_where_it_is_asked(tiny: TinyRun) -> None:
    write_rows(tiny.heldout, [question("h0", "where is it?", "x"), question("h1", "where is " + "far " * 100, "x")])
    finding = only(tiny.found())
    assert (finding.severity, finding.field) == ("warning", "rollout.max_prompt_tokens")
    assert "1 of 2 questions of data.heldout" in finding.problem
    assert "counted as wrong answers" in finding.problem
    assert tiny.found("evaluation.every=0") == []


def test_a_few_prompts_that_can_be_asked_are_enough_to_train(tiny: TinyRun) -> None:
    write_rows(tiny.train, [question("t0", "where?", "x"), *(question(f"t{i}", "far " * 100, "x") for i in (1, 2))])
    finding = only(tiny.found("data.questions_per_step=1", "train.trajectories_per_minibatch=2"))
    assert (finding.severity, finding.field) == ("warning", "rollout.max_prompt_tokens")
    assert "2 of 3 questions of data.train" in finding.problem


# The run's folder


def test_a_run_folder_that_cannot_be_written_is_found(tiny: TinyRun) -> None:
    assert "is not a folder" in only(tiny.found(f"run_dir={tiny.config}/run")).problem
    locked = tiny.folder / "locked"
    locked.mkdir(mode=0o500)
    found = tiny.found(f"run_dir={locked}/run")
    # Nothing is locked for root.
    assert [finding.field for finding in found] == ([] if os.access(locked, os.W_OK) else ["run_dir"])


def write_checkpoint(tiny: TinyRun, step: int, *overrides: str) -> Path:
    """As far as a check looks at one."""
    from megatron_sdsearch.config import load_config

    folder = tiny.folder / "run/checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    (folder / "shard").write_text("weights")
    manifest = {
        "step": step,
        "config": load_config(tiny.config, overrides).model_dump(mode="json"),
        "layout": {"tp": 1, "pp": 1, "dp": 1},
        "files": {"shard": {"num_bytes": 7, "sha256": "-"}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder.parent / "latest").write_text(folder.name)
    return folder


def test_a_checkpoint_to_go_on_from_is_named(tiny: TinyRun) -> None:
    write_checkpoint(tiny, 2)
    assert "the run goes on from step 2 of 4" in tiny.notes()
    assert tiny.found() == []


def test_the_end_of_a_run_is_not_run_again_unnoticed(tiny: TinyRun) -> None:
    write_checkpoint(tiny, 4)
    finding = only(tiny.found())
    assert (finding.severity, finding.field) == ("warning", "run_dir")
    assert "nothing is left to train" in finding.problem


def test_another_runs_folder_is_found_setting_by_setting(tiny: TinyRun) -> None:
    write_checkpoint(tiny, 2, "objective.kl_coef=0.5", "seed=7")
    found = tiny.found()
    assert [finding.severity for finding in found] == ["error", "error"]
    assert found[0].problem.endswith("objective.kl_coef = 0.5, this run has 0.001")
    assert found[0].fix.startswith("set it back, or take another run_dir")
    assert "seed = 7, this run has 1" in found[1].problem


def test_where_the_index_is_and_how_the_cluster_knows_us_may_change(tiny: TinyRun) -> None:
    """Credentials move from a file into the environment, and an index to another disk."""
    section = "retrieval.elasticsearch"
    write_checkpoint(
        tiny, 2, f"{section}.username=me", f"{section}.password=hunter2", f"retrieval.index={tiny.folder}/a"
    )
    findings = tiny.check(f"retrieval.index={tiny.folder}/b").findings
    assert [finding for finding in findings if "trained with" in finding.problem] == []
    assert "hunter2" not in (tiny.folder / "run/checkpoints/step_000002/manifest.json").read_text()


def test_damaged_checkpoints_are_found(tiny: TinyRun) -> None:
    folder = write_checkpoint(tiny, 2)
    (folder / "shard").write_text("half")
    assert "shard has 4 bytes instead of 7" in only(tiny.found()).problem
    (folder / "manifest.json").unlink()
    assert "manifest.json is missing" in only(tiny.found()).problem
    (folder.parent / "latest").write_text("elsewhere")
    assert "names 'elsewhere'" in only(tiny.found()).problem


def test_a_damaged_checkpoint_is_passed_over_where_training_would_do_so(tiny: TinyRun) -> None:
    write_checkpoint(tiny, 1)
    (write_checkpoint(tiny, 2) / "shard").write_text("half")
    assert "or set checkpoint.fallback=true" in only(tiny.found()).fix
    passed_over = only(tiny.found("checkpoint.fallback=true"))
    assert (passed_over.severity, "step_000002 is damaged" in passed_over.problem) == ("warning", True)
    assert "the run goes on from step 1 of 4" in tiny.notes("checkpoint.fallback=true")
    (tiny.folder / "run/checkpoints/step_000001/shard").unlink()
    found = tiny.found("checkpoint.fallback=true")
    assert [finding.severity for finding in found] == ["error", "warning", "warning"]


def test_a_checkpoint_from_before_a_setting_existed_is_gone_on_from(tiny: TinyRun) -> None:
    path = write_checkpoint(tiny, 2) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["config"]["model"]["layer_spec"], manifest["config"]["objective"]["topk_of"]
    path.write_text(json.dumps(manifest))
    assert tiny.found() == []
    assert "objective.topk_of = teacher, this run has union" in only(tiny.found("objective.topk_of=union")).problem


def test_what_older_checkpoints_called_shuffled_labels_are_permuted_ones(tiny: TinyRun) -> None:
    path = write_checkpoint(tiny, 2, "hindsight.labels=shuffled") / "manifest.json"
    assert tiny.found("hindsight.labels=permuted") == []
    assert "labels = permuted, this run has shuffled" in only(tiny.found("hindsight.labels=shuffled")).problem
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 3}))
    assert tiny.found("hindsight.labels=shuffled") == []
    assert "labels = shuffled, this run has permuted" in only(tiny.found("hindsight.labels=permuted")).problem


def test_a_folder_that_a_run_is_using_is_found(tiny: TinyRun) -> None:
    with lock_run_dir(tiny.folder / "run"):
        finding = only(tiny.found())
    assert (finding.severity, finding.field) == ("error", "run_dir")
    assert f"in use by process {os.getpid()}" in finding.problem
    assert tiny.found() == []


def test_metrics_that_a_new_run_would_delete_are_found(tiny: TinyRun) -> None:
    (tiny.folder / "run").mkdir()
    (tiny.folder / "run/metrics.jsonl").write_text("{}\n")
    finding = only(tiny.found())
    assert finding.severity is Severity.WARNING
    assert "would be deleted" in finding.problem


@pytest.mark.parametrize(("free", "severity"), [(10**3, "error"), (3 * 10**6, "warning"), (10**9, "note")])
def test_room_on_the_disk_is_compared_with_what_is_written(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, free: int, severity: str
) -> None:
    usage = shutil.disk_usage(tiny.folder)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    # Twelve bytes a parameter and checkpoint, three at one time, and an export; trajectories up to their budgets.
    found = [f for f in tiny.check("train.num_steps=100").findings if "checkpoints of" in f.problem]
    assert only(found).severity == severity


def test_what_a_run_has_written_already_needs_no_more_room(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tiny.folder)._replace(free=10**3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    folder = write_checkpoint(tiny, 2)
    assert only([f for f in tiny.found() if "checkpoints of" in f.problem]).severity == "error"
    with (folder / "shard").open("r+b") as file:
        file.truncate(10**9)  # a hole: takes no room here
    found = [f for f in tiny.check("telemetry.trajectories=false").findings if "checkpoints of" in f.problem]
    assert only(found).severity == "note"


# The index


def test_an_index_is_announced_or_found(tiny: TinyRun) -> None:
    from megatron_sdsearch.retrieval.tantivy_index import TantivyRetriever, default_root

    assert "no standard index in" in tiny.notes()
    TantivyRetriever.open_or_build(tiny.corpus, "standard", default_root(tiny.corpus))
    assert "holds its 10 passages" in tiny.notes()
    assert "no english index in" in tiny.notes("retrieval.analyzer=english")
    online = tiny.check(is_online=True)
    assert online.exit_code == 0
    assert any("10 of 10 questions, asked as they are, have hits; in 10 a gold" in f.problem for f in online.findings)


def test_a_place_that_takes_no_index_is_found_as_training_finds_it(tiny: TinyRun) -> None:
    from megatron_sdsearch.retrieval.tantivy_index import TantivyRetriever

    finding = only(tiny.found(f"retrieval.index={tiny.corpus}"))
    with pytest.raises(ConfigError) as caught:
        TantivyRetriever.open_or_build(tiny.corpus, "standard", tiny.corpus)
    assert (finding.field, finding.problem, finding.fix) == (
        "retrieval.index",
        caught.value.problem,
        caught.value.fix,
    )
    elsewhere = tiny.folder / "elsewhere"
    assert f"no standard index in {elsewhere} yet" in tiny.notes(f"retrieval.index={elsewhere}")
    TantivyRetriever.open_or_build(tiny.corpus, "standard", elsewhere)
    assert "holds its 10 passages" in tiny.notes(f"retrieval.index={elsewhere}")
    assert "no standard index in" in tiny.notes()


def test_questions_that_match_nothing_in_the_index_are_found(tiny: TinyRun) -> None:
    from megatron_sdsearch.retrieval.tantivy_index import TantivyRetriever, default_root

    write_rows(tiny.corpus, [{"id": "1", "contents": '"Σ"\nΠΣΠΣ'}])
    TantivyRetriever.open_or_build(tiny.corpus, "standard", default_root(tiny.corpus))
    finding = only(tiny.found(is_online=True))
    assert "10 of 10 questions, asked as they are, match nothing" in finding.problem
