"""An installed SGLang is looked at without being imported: its version and its flags."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_sdsearch.check.sglang_program import known_flags
from tests.unit.check.tiny_run import TinyRun, only

FIELDS = """
    port: A[int, "to listen at"] = 30000
    mem_fraction_static: A[float, "share, see --no-flag of a text"] = 0.9
    tp_size: A[int, Arg(help="h", aliases=["--tensor-parallel-size"])] = 1
"""
SERVER_ARGS = f"""
import torch_that_nobody_has
class ServerArgs:
    model_path: A[str, "the model"]
{FIELDS}
    def add_cli_args(parser):
        parser.add_argument("--config", type=str)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with an SGLang whose import would fail."""
    package = tmp_path / "site/sglang"
    (package / "srt").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "srt/server_args.py").write_text(SERVER_ARGS)
    set_version(package.parent, "0.5.23")
    return package.parent


def set_version(site: Path, version: str) -> None:
    for old in site.glob("*.dist-info"):
        (old / "METADATA").unlink()
        old.rmdir()
    info = site / f"sglang-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")


def overrides(site: Path, *arguments: str) -> tuple[str, ...]:
    return (
        "rollout.engine=sglang",
        f"rollout.sglang.command=[{sys.executable},-m,sglang.launch_server]",
        f"rollout.sglang.environment.PYTHONPATH={site}",
        f"rollout.sglang.arguments={list(arguments)}",
    )


def test_a_tested_version_and_known_flags_are_in_order(tiny: TinyRun, site: Path) -> None:
    right = overrides(site, "--mem-fraction-static=0.8", "--tensor-parallel=1", "--config", "x")
    assert tiny.found(*right) == []
    assert "rollout.sglang.command: SGLang 0.5.23" in tiny.notes(*right)


def test_a_context_that_is_too_short_for_the_longest_request_is_found(tiny: TinyRun, site: Path) -> None:
    for length, is_found in ((306, False), (305, True)):
        found = tiny.found(*overrides(site, "--context-length", str(length)))
        assert any(f.field == "rollout.max_total_tokens" and "takes 299" in f.problem for f in found) is is_found


@pytest.mark.parametrize(
    ("version", "severity", "words"),
    [("0.5.18", "error", "older than 0.5.19"), ("0.6.0", "warning", "newer than"), ("main", "warning", "no version")],
)
def test_a_version_out_of_range_is_found(tiny: TinyRun, site: Path, version: str, severity: str, words: str) -> None:
    set_version(site, version)
    finding = only(tiny.found(*overrides(site)))
    assert (finding.severity, finding.field) == (severity, "rollout.sglang.command")
    assert words in finding.problem


def test_an_unknown_flag_is_found_with_the_one_that_is_meant(tiny: TinyRun, site: Path) -> None:
    finding = only(tiny.found(*overrides(site, "--mem-fracton-static", "0.8")))
    assert (finding.severity, finding.field) == ("warning", "rollout.sglang.arguments")
    assert "--mem-fracton-static is not among the 6 flags" in finding.problem
    assert finding.fix == "did you mean --mem-fraction-static?"


@pytest.mark.parametrize("is_grouped", [False, True], ids=["fields of ServerArgs", "fields of groups"])
def test_flags_are_read_wherever_they_are_declared(site: Path, is_grouped: bool) -> None:
    srt = site / "sglang/srt"
    if is_grouped:
        (srt / "server_args.py").write_text(SERVER_ARGS.replace(FIELDS, ""))
        (srt / "arg_groups/fields").mkdir(parents=True)
        (srt / "arg_groups/fields/schedule.py").write_text(f"class Schedule(msgspec.Struct):{FIELDS}")
    wanted = "--model-path --port --mem-fraction-static --tp-size --tensor-parallel-size --config"
    assert known_flags(srt) == set(wanted.split())


@pytest.mark.parametrize("source", [None, "def (", "class ServerArgs: pass"])
def test_no_flag_is_judged_where_none_can_be_read(tiny: TinyRun, site: Path, source: str | None) -> None:
    path = site / "sglang/srt/server_args.py"
    path.unlink() if source is None else path.write_text(source)
    assert tiny.found(*overrides(site, "--anything")) == []
    assert "keeps its flags elsewhere" in tiny.notes(*overrides(site, "--anything"))


def test_servers_need_weights_to_start_from(tiny: TinyRun, site: Path) -> None:
    for file in tiny.model.glob("*.safetensors"):
        file.unlink()
    problems = [finding.problem for finding in tiny.found(*overrides(site))]
    assert any("holds no weights, and servers start from it" in problem for problem in problems)


def test_an_interpreter_that_does_not_run_is_found(tiny: TinyRun, site: Path, tmp_path: Path) -> None:
    broken = tmp_path / "python-broken"
    broken.write_text("#!/bin/sh\necho no such library >&2; exit 127\n")
    broken.chmod(0o755)
    finding = only(tiny.found(*overrides(site), f"rollout.sglang.command=[{broken}]"))
    assert "no such library" in finding.problem
