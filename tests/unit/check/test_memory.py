"""A run that the formulas of ``plan`` find too large is a warning; one that fits, a note; on CPUs nothing is said."""

from __future__ import annotations

from typing import Any

from megatron_sdsearch.check.findings import Finding, Severity
from tests.unit.check.tiny_run import TinyRun, only

GPU: dict[str, Any] = {"gpus_per_node": 8, "ranks_per_node": 8}


def of_memory(tiny: TinyRun, *overrides: str, **given: Any) -> list[Finding]:
    return [finding for finding in tiny.check(*overrides, **given).findings if "GiB planned" in finding.problem]


def test_a_model_that_is_too_large_is_found(tiny: TinyRun) -> None:
    assert only(of_memory(tiny, "model.dtype=bfloat16", **GPU)).severity is Severity.NOTE
    tiny.change_model(hidden_size=16384, intermediate_size=65536, num_hidden_layers=128, layer_types=None)
    finding = only(of_memory(tiny, "model.dtype=bfloat16", **GPU))
    assert finding.severity is Severity.WARNING
    assert "GiB planned on the busiest GPU" in finding.problem
    assert "an assumed H100 has 79.0" in finding.problem
    assert "megatron_sdsearch plan CONFIG" in finding.fix


def test_sharding_makes_room(tiny: TinyRun) -> None:
    tiny.change_model(hidden_size=4096, intermediate_size=16384, num_hidden_layers=32, layer_types=None)
    assert only(of_memory(tiny, "model.dtype=bfloat16", **GPU)).severity is Severity.WARNING
    sharded = of_memory(
        tiny,
        "model.dtype=bfloat16",
        "parallel.tensor_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=4",
        **GPU,
    )
    assert only(sharded).severity is Severity.NOTE


def test_nothing_is_planned_on_cpus_or_for_a_wrong_layout(tiny: TinyRun) -> None:
    assert of_memory(tiny) == []
    assert of_memory(tiny, "model.dtype=bfloat16", "parallel.tensor_model_parallel_size=3", **GPU) == []
