"""What a run writes of itself at its start, and that it can be read again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sdsearch.config import RunConfig, flatten, load_config, parse_config
from megatron_sdsearch.errors import StorageError
from megatron_sdsearch.training.run_record import command_line, commit_of, config_path, config_text, write_run_record

SECRET = "hush-hush"
TEXTS = ["1e5", "${HOME}/x", "yes", "0x10", "12:30", "\\${x} ü\n'\"", "null"]


def config(run_dir: Path, **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {"run_dir": str(run_dir), "model": {"hf_dir": "m"}, "data": {"train": "t.jsonl"}}
    return parse_config(tree | {"retrieval": {"corpus": "c"}} | sections)


def test_it_loads_as_the_very_same_configuration(tmp_path: Path) -> None:
    sglang = {"arguments": ["--x", "${HOME}", *TEXTS], "urls": ["http://h:1"]}
    before = config(tmp_path, rollout={"sglang": sglang}, optimizer={"lr": 1e-6}, objective={"topk": None})
    write_run_record(before)
    assert load_config(tmp_path / "config.yaml") == before
    assert "every_minutes: 30.0" in (tmp_path / "config.yaml").read_text(), "defaults, too"


def test_secrets_are_left_out_and_named_and_nothing_else_changes(tmp_path: Path) -> None:
    elastic = {"username": "u", "password": SECRET, "api_key": SECRET}
    sglang = {"environment": {"HF_TOKEN": SECRET, "HOME": "/h"}, "arguments": ["--api-key", SECRET]}
    before = config(
        tmp_path,
        retrieval={
            "engine": "elasticsearch",
            "elasticsearch": elastic,
        },
        rollout={"sglang": sglang},
    )
    text = config_text(before)
    assert SECRET not in text
    assert "****" not in text, "no run would get on with asterisks for a password"
    path = tmp_path / "c.yaml"
    path.write_text(text)
    then, now = (flatten(c.model_dump(mode="json")) for c in (before, load_config(path)))
    changed = {name for name in then.keys() | now.keys() if then.get(name) != now.get(name)}
    assert changed == {
        "retrieval.elasticsearch.password",
        "retrieval.elasticsearch.api_key",
        "rollout.sglang.environment.HF_TOKEN",
        "rollout.sglang.environment.HOME",
        "rollout.sglang.arguments",
    }
    assert all(f"# Left out because it may be a secret: {name}\n" in text for name in changed)


def test_what_is_left_out_never_keeps_the_file_from_loading(tmp_path: Path) -> None:
    http = {"engine": "http", "http": {"username": "u", "password": SECRET}}
    path = tmp_path / "c.yaml"
    path.write_text(config_text(config(tmp_path, retrieval=http)))
    assert load_config(path).retrieval == config(tmp_path, retrieval={"engine": "http"}).retrieval


def test_a_folder_named_like_a_home_directory_stays_that_folder(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(config_text(config(tmp_path, data={"train": "./~t"})))
    assert load_config(path).data.train == Path("~t")


def test_the_command_is_shown_without_the_values_of_secrets() -> None:
    arguments = [
        "train",
        "c.yaml",
        "objective.loss_aggregation=token",
        "rollout.max_total_tokens=9",
        f"retrieval.elasticsearch.password={SECRET}",
        f"rollout.sglang.environment={{HF_TOKEN: {SECRET}}}",
        f"rollout.sglang.environment.NGC={SECRET}",
        f"rollout.sglang.arguments=[--api-key, {SECRET}]",
    ]
    assert command_line(arguments) == [
        "sdsearch",
        *arguments[:4],
        "retrieval.elasticsearch.password=...",
        "rollout.sglang.environment=...",
        "rollout.sglang.environment.NGC=...",
        "rollout.sglang.arguments=...",
    ]


def test_each_start_adds_an_entry_and_the_configuration_is_the_last_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rate in (1e-6, 1e-4):
        monkeypatch.setattr(sys, "argv", ["sdsearch", "train", "c.yaml", f"optimizer.lr={rate}"])
        write_run_record(config(tmp_path, optimizer={"lr": rate}))
    first, second = json.loads((tmp_path / "environment.json").read_text())
    assert first["command"] == ["sdsearch", "train", "c.yaml", "optimizer.lr=1e-06"]
    assert second["command"][-1] == "optimizer.lr=0.0001"
    assert second["world_size"] == 4
    assert second["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert load_config(tmp_path / "config.yaml").optimizer.lr == 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "environment.json"]


def test_a_persons_own_config_in_the_folder_is_not_overwritten(tmp_path: Path) -> None:
    own = "# mine\nrun_dir: ${oc.env:HOME}\n"
    (tmp_path / "config.yaml").write_text(own)
    write_run_record(config(tmp_path))
    assert (tmp_path / "config.yaml").read_text() == own
    assert config_path(tmp_path) == tmp_path / "config.resolved.yaml"
    assert load_config(config_path(tmp_path)).run_dir == tmp_path


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "environment.json").mkdir()
    with pytest.raises(StorageError, match=r"environment\.json cannot be written: it is a folder"):
        write_run_record(config(tmp_path))


def test_the_commit_is_that_of_a_checkout_alone(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
        return subprocess.run(["git", *settings, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    sha = git("rev-parse", "HEAD")
    assert commit_of(tmp_path) == {"sha": sha, "is_changed": False}
    (tmp_path / "file").write_text("2")
    assert commit_of(tmp_path) == {"sha": sha, "is_changed": True}
    (tmp_path / "site-packages").mkdir()
    assert commit_of(tmp_path / "site-packages") is None, "a package inside another's checkout"
