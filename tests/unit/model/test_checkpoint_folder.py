from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdsearch.config import CheckpointConfig, RunConfig, parse_config
from megatron_sdsearch.errors import CheckpointError
from megatron_sdsearch.model.checkpoint_folder import (
    CheckpointFolder,
    changed_settings,
    continuation_problems,
    damages,
    fingerprint,
    hash_file,
    read_manifest,
    run_date_of,
    select_steps,
)


def save(folder: CheckpointFolder, step: int, content: bytes = b"shard") -> Path:
    partial = folder.begin(step)
    (partial / "shard").write_bytes(content)
    files = {"shard": hash_file(partial / "shard", should_sync=True)}
    return folder.commit(partial, {"step": step, "config": {}, "layout": {}, "files": files})


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.root.iterdir())


@given(
    steps=st.sets(st.integers(1, 60), min_size=1),
    keep_last=st.integers(1, 5),
    keep_every=st.integers(0, 7),
    scored=st.dictionaries(st.integers(1, 60), st.floats(0, 1)),
)
def test_retention_keeps_what_it_says_and_nothing_else(
    steps: set[int], keep_last: int, keep_every: int, scored: dict[int, float]
) -> None:
    current = max(steps)
    kept, best = select_steps(steps, current, scored, CheckpointConfig(keep_last=keep_last, keep_every=keep_every))
    last = sorted(steps)[-keep_last:]
    for step in steps:
        is_wanted = step in last or step == best or (keep_every > 0 and step % keep_every == 0)
        assert (step in kept) == is_wanted
    assert kept <= steps
    assert all(scored[best] >= scored[step] for step in steps & scored.keys()) if best else not steps & scored.keys()


def test_steps_of_a_future_that_was_left_go_and_never_count_as_best() -> None:
    config = CheckpointConfig(keep_last=2, keep_every=10)
    assert select_steps([2, 4, 6, 20], 6, {4: 0.1, 6: 0.2, 20: 0.9}, config) == ({4, 6}, 6)
    assert select_steps([2, 4, 6, 20], 6, {}, config) == ({4, 6}, None)
    assert select_steps([2, 4, 6, 20], 6, {2: 0.9}, config) == ({2, 4, 6}, 2)


def test_of_equal_scores_the_earliest_is_best() -> None:
    _, best = select_steps([3, 1, 2], 3, {1: 0.5, 2: 0.5, 3: 0.4}, CheckpointConfig())
    assert best == 1


def test_a_step_that_is_saved_again_leaves_nothing_of_the_first_time(tmp_path: Path) -> None:
    """As after a kill between its name and the pointer to it: no later start need come that would clean up."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    save(folder, 2)
    again = save(folder, 2)
    assert sorted(path.name for path in folder.root.iterdir()) == ["latest", again.name]


def test_a_commit_moves_latest_and_pruning_names_the_best(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        save(folder, step)
        assert (folder.root / "latest").read_text() == f"step_{step:06d}"
    folder.prune(3, {1: 0.9, 2: 0.1}, CheckpointConfig(keep_last=1))
    assert names(folder) == ["best", "latest", "step_000001", "step_000003"]
    assert (folder.root / "best").read_text() == "step_000001"
    folder.prune(3, {1: 0.9}, CheckpointConfig(keep_last=1, keep_best=False))
    assert "step_000001" not in names(folder)


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 1, b"old")
    assert (save(folder, 1, b"new") / "shard").read_bytes() == b"new"
    folder.clean()
    assert names(folder) == ["latest", "step_000001"]


def test_what_a_killed_save_leaves_is_no_candidate_and_is_cleaned(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, 1)
    (folder.begin(2) / "shard").write_bytes(b"half")
    (tmp_path / ".old_step_000000").mkdir()
    assert [path.name for path in folder.candidates()] == ["step_000001"]
    folder.clean()
    assert names(folder) == ["latest", "step_000001"]


def test_candidates_begin_with_latest_and_never_lie_in_its_future(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    assert folder.candidates() == []
    for step in (1, 2, 3):
        save(folder, step)
    assert [path.name for path in folder.candidates()] == ["step_000003", "step_000002", "step_000001"]
    (tmp_path / "latest").write_text("step_000002\n")  # as to go back by hand
    assert [path.name for path in folder.candidates()] == ["step_000002", "step_000001"]
    (tmp_path / "latest").unlink()  # killed between a first save's last two moves
    assert folder.candidates()[0].name == "step_000003"
    (tmp_path / "latest").write_text("nonsense")
    with pytest.raises(CheckpointError, match=r"names 'nonsense', which is not a step_\* folder"):
        folder.candidates()


def test_going_back_keeps_the_damaged_one_for_inspection(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    first = save(folder, 1)
    save(folder, 2)
    folder.go_back(first)
    assert (tmp_path / "latest").read_text() == "step_000001"
    assert list(folder.steps()) == [1]
    assert len(list(tmp_path.glob("damaged_step_000002*"))) == 1


def test_each_damage_is_named(tmp_path: Path) -> None:
    for name in ("short", "changed", "missing", "good"):
        (tmp_path / name).write_bytes(b"content of a shard")
    files = {path.name: hash_file(path) for path in tmp_path.iterdir()}
    (tmp_path / "short").write_bytes(b"content")
    (tmp_path / "changed").write_bytes(b"content of a shar_")
    (tmp_path / "missing").unlink()
    found = damages(tmp_path, files, sorted(files), verify=True)
    assert found == [
        "changed has changed since it was written (sha256)",
        "missing is missing",
        "short has 7 bytes instead of 18",
    ]
    assert len(damages(tmp_path, files, sorted(files), verify=False)) == 2


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"step": 1})])
def test_a_manifest_that_is_none_is_an_error_with_its_path(text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_a_fingerprint_is_of_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    before = fingerprint(tmp_path)
    assert before == fingerprint(tmp_path)
    (tmp_path / "a").write_bytes(b"2")
    changed = fingerprint(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({before, changed, fingerprint(tmp_path), fingerprint(tmp_path / "b"), fingerprint(tmp_path / "no")}) == 5


def write_manifest(run_dir: Path, step: int, **more: object) -> Path:
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    path = folder / "manifest.json"
    path.write_text(json.dumps({"step": step, "config": {}, "layout": {}, "files": {}, **more}))
    return path


def test_a_run_keeps_the_date_on_which_it_began(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run_date_of(tmp_path) == date.today()
    write_manifest(tmp_path, 2, run_date="2025-02-05")
    newest = write_manifest(tmp_path, 4, run_date="2025-02-05")
    assert run_date_of(tmp_path) == date(2025, 2, 5)
    newest.write_text("{")  # what loading it would say, or pass over
    assert run_date_of(tmp_path) == date(2025, 2, 5)
    assert not caplog.records
    (tmp_path / "checkpoints/latest").write_text("nonsense")
    assert run_date_of(tmp_path) == date.today()


@pytest.mark.parametrize("manifest", [{}, {"run_date": None}, {"run_date": "yesterday"}])
def test_a_checkpoint_without_a_date_goes_on_with_todays_and_says_so(
    manifest: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_manifest(tmp_path, 2, **manifest)
    assert run_date_of(tmp_path) == date.today()
    assert "step_000002 does not record when its run began" in caplog.text


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"enable_thinking": False}),
        ({"enable_thinking": True}, {"enable_thinking": False}),
        ({"enable_thinking": False}, {}),
        (None, {"enable_thinking": False}),
    ],
)
def test_changed_arguments_of_the_chat_template_are_another_run(
    before: dict[str, object] | None, now: dict[str, object], tmp_path: Path
) -> None:
    def settings(arguments: dict[str, object]) -> dict[str, object]:
        return {
            "run_dir": "run",
            "model": {"hf_dir": "hf"},
            "data": {"chat_template_arguments": arguments},
            "train": {"mode": "warm_start", "demonstrations": "rows.jsonl"},
        }

    config = parse_config(settings(now))
    recorded = parse_config(settings(before or {})).model_dump(mode="json")
    if before is None:  # written before there was such a setting
        del recorded["data"]["chat_template_arguments"]
    manifest = {"step": 1, "config": recorded}
    (problem,) = continuation_problems(tmp_path, manifest, config)
    assert "data.chat_template_arguments.enable_thinking" in str(problem)
    assert not list(continuation_problems(tmp_path, {"step": 1, "config": config.model_dump(mode="json")}, config))


def config(**sections: Any) -> RunConfig:
    tree: dict[str, Any] = {"run_dir": "r", "model": {"hf_dir": "a/m"}, "data": {"train": "t"}}
    return parse_config(tree | {"retrieval": {"corpus": "c"}} | sections)


def manifest(before: RunConfig, *, without: tuple[str, str] | None = None) -> dict[str, Any]:
    tree = before.model_dump(mode="json")
    if without is not None:
        del tree[without[0]][without[1]]
    return {"step": 3, "config": tree}


def test_what_a_continued_run_does_otherwise_is_named_with_both_values() -> None:
    now = config(
        optimizer={"lr": 1e-4},
        model={"hf_dir": "b/m"},
        rollout={"sglang": {"environment": {"HF_TOKEN": "hush", "HOME": "/h"}}},
        evaluation={"every": 5},
        data={"train": "t", "heldout": "h"},
    )
    assert changed_settings(manifest(config()), now) == [
        "data.heldout null -> h",
        "evaluation.every 0 -> 5",
        "optimizer.lr 1e-06 -> 0.0001",
        "rollout.sglang.environment.HF_TOKEN (a secret)",
        "rollout.sglang.environment.HOME (a secret)",
    ], "a folder that has moved is none"


def test_a_setting_that_is_newer_than_the_checkpoint_was_what_its_default_is() -> None:
    before = manifest(config(), without=("checkpoint", "every_minutes"))
    assert changed_settings(before, config()) == []
    assert changed_settings(before, config(checkpoint={"every_minutes": 5})) == ["checkpoint.every_minutes 30.0 -> 5.0"]


def test_what_may_not_change_is_refused_and_what_may_is_not() -> None:
    now = config(optimizer={"lr": 1e-4}, seed=9, parallel={"distributed_optimizer": True})
    problems = [str(problem) for problem in continuation_problems(Path("c"), manifest(config()), now)]
    assert problems == [
        "c was written with parallel.distributed_optimizer = False: set it back",
        "c was trained with seed = 1, this run has 9: set it back, or take another run_dir, where "
        "model.megatron_dir=c starts from these weights",
    ]


def test_a_run_of_before_goes_on_as_it_was_and_a_changed_rule_is_refused() -> None:
    before = manifest(config(rollout={"eos_without_action": "notice"}), without=("rollout", "eos_without_action"))
    assert (
        list(continuation_problems(Path("c"), before | {"format": 2}, config(rollout={"eos_without_action": "notice"})))
        == []
    )
    (problem,) = continuation_problems(Path("c"), before | {"format": 2}, config())
    assert "rollout.eos_without_action = notice, this run has stop" in str(problem)


def test_a_warm_start_of_before_goes_on_under_the_profile_of_its_demonstrations() -> None:
    train = {"mode": "warm_start", "demonstrations": "d.jsonl"}
    before = {**manifest(config(train=train)), "format": 2}
    assert (
        list(
            continuation_problems(
                Path("c"), before, config(train=train, data={"train": "t", "prompt_profile": "plain"})
            )
        )
        == []
    )
