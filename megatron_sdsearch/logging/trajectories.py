"""Write a step's trajectories as JSON lines: sampled and shown spans, scores, and the hindsight block."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_sdsearch.files import write_file, writing
from megatron_sdsearch.records import ContextSpan, HindsightBlock, RolloutGroup, SampledSpan, Span

TRAJECTORIES_DIR = "trajectories"
Decode = Callable[[Sequence[int]], str]


class TrajectoryLog:
    """Writes ``run_dir/trajectories/step_000012.jsonl``, one row per trajectory, group after group.

    A file appears whole or not at all; writing a step again (after a resume) replaces it.

    Args:
        run_dir: of the run.
        decode: turns ids into text, for context spans and for the position of the query in sampled text.
        resume_step: files of later steps are removed, since the resumed run writes its own.
    """

    def __init__(self, run_dir: Path, decode: Decode, *, resume_step: int = 0) -> None:
        self._folder = run_dir / TRAJECTORIES_DIR
        self._decode = decode
        later = [path for path in step_files(run_dir) if _step(path) > resume_step]
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in (*later, *self._folder.glob("*.tmp")):  # tmp: left by a process that was killed while writing
                path.unlink()

    def write(
        self,
        step: int,
        groups: Sequence[RolloutGroup],
        advantages: Sequence[Sequence[float]],
        blocks: Sequence[Sequence[HindsightBlock]],
    ) -> Path:
        """Write one step's file.

        Args:
            step: number in the file's name, from 1.
            groups: of the step.
            advantages: per group, per trajectory.
            blocks: per group, per trajectory.

        Returns:
            The file's path.

        Raises:
            StorageError: the disk is full.
        """
        lines = []
        for group, *parts in zip(groups, advantages, blocks, strict=True):
            question = group.question
            for trajectory, score, advantage, block in zip(group.trajectories, group.scores, *parts, strict=True):
                sibling = trajectory.trajectory_id.sibling
                row = {
                    "step": step,
                    "question_id": question.question_id,
                    "question": question.text,
                    "gold_answers": list(question.gold_answers),
                    "gold_passage_ids": list(question.gold_passage_ids),
                    "dataset": question.dataset,
                    "sibling": sibling,
                    "status": trajectory.status.value,
                    "answer": trajectory.answer,
                    "is_correct": score.is_correct,
                    "scores": {"f1": score.f1, "em": score.em, "reward": score.reward},
                    "advantage": advantage,
                    "is_leaking": sibling in block.leaks,
                    "hindsight": {"text": block.text, "sources": list(block.sources), "dropped": list(block.dropped)},
                    "spans": [self._span(span) for span in trajectory.spans],
                }
                lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        path = self._folder / f"step_{step:06d}.jsonl"
        write_file(path, "".join(lines))
        return path

    def _span(self, span: Span) -> dict[str, Any]:
        if isinstance(span, ContextSpan):
            return {
                "kind": span.kind,
                "text": self._decode(span.token_ids),
                "token_ids": list(span.token_ids),
                "passage_ids": list(span.passage_ids),
            }
        return {
            "kind": "sampled",
            "text": span.text,
            "token_ids": list(span.token_ids),
            "logprobs": [round(logprob, 4) for logprob in span.logprobs],
            "action": span.action.value,
            "argument": span.argument,
            "query_positions": list(span.query_positions),
            "query_chars": self._query_chars(span),
            "policy_version": span.policy_version,
            "finish_reason": span.finish_reason,
        }

    def _query_chars(self, span: SampledSpan) -> tuple[int, int] | None:
        """Return the character range of the query tokens in the text, so that readers need no tokenizer to mark them.

        ``None`` without a query, and where the decoded tokens are not a prefix of the text (such as a character split
        over two tokens): no mark is better than a wrong one.
        """
        if not span.query_positions:
            return None
        first, last = min(span.query_positions), max(span.query_positions)
        before, through = self._decode(span.token_ids[:first]), self._decode(span.token_ids[: last + 1])
        is_exact = span.text.startswith(through) and through.startswith(before)
        return (len(before), len(through)) if is_exact else None


def step_files(run_dir: Path) -> list[Path]:
    """List a run's trajectory files by step."""
    return sorted((run_dir / TRAJECTORIES_DIR).glob("step_*.jsonl"), key=_step)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))
