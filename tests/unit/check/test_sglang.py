"""SGLang servers that the run would start: what is known of them before."""

from __future__ import annotations

from tests.unit.check.tiny_run import TinyRun, only

OWN = ("rollout.engine=sglang", "rollout.sglang.command=[sh]")


def test_a_context_that_is_too_short_for_the_longest_request_is_found(tiny: TinyRun) -> None:
    arguments = "rollout.sglang.arguments=[--context-length,'{}']"
    assert tiny.found(*OWN, arguments.format(306)) == []
    finding = only(tiny.found(*OWN, arguments.format(305)))
    assert (finding.severity, finding.field) == ("error", "rollout.max_total_tokens")
    assert "accepts 299" in finding.problem


def test_servers_need_weights_to_start_from(tiny: TinyRun) -> None:
    """A megatron checkpoint may hold the policy's own; servers start from the folder."""
    for file in tiny.model.glob("*.safetensors"):
        file.unlink()
    checkpoint = tiny.folder / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / ".metadata").write_text("")
    problems = [finding.problem for finding in tiny.found(*OWN, f"model.megatron_dir={checkpoint}")]
    assert any("holds no weights, and SGLang servers start from it" in problem for problem in problems)
