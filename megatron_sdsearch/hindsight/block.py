"""The hindsight block: what the siblings searched for and how they ended, as the teacher reads it.

Owns the choice of siblings, future masking, the text and its budget. Leaves the labels that are shown to ``labels.py``,
the wording around the block to ``data/prompts.py``, the chat template to ``tokenization/renderer.py`` and the alignment
of teacher and student to ``batching/samples.py``.

The text is a contract with everything that teaches a model to read it (warm-start demonstrations): one line per
sibling, in sibling order::

    Earlier attempts at this question:
    CORRECT: first query | second query
    INCORRECT: other query
    INCORRECT: (no search)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_sdsearch.config import HindsightConfig
from megatron_sdsearch.data.prompts import CORRECT, HINDSIGHT_HEADER, INCORRECT, PromptProfile
from megatron_sdsearch.hindsight.documents import document_block
from megatron_sdsearch.hindsight.leakage import leaking_siblings
from megatron_sdsearch.records import HindsightBlock, RolloutGroup, Trajectory, TrajectoryId

if TYPE_CHECKING:  # the renderer loads a tokenizer library; building blocks does not need it
    from megatron_sdsearch.tokenization.renderer import Renderer

NO_SEARCH = "(no search)"
QUERY_SEPARATOR = " | "


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sibling:
    """One line of the block and what its place in the block depends on."""

    index: int
    is_correct: bool
    line: str


def build_hindsight(
    group: RolloutGroup,
    renderer: Renderer,
    profile: PromptProfile,
    config: HindsightConfig,
    labels: Mapping[TrajectoryId, bool],
) -> list[HindsightBlock]:
    """Build what the teacher is shown for each trajectory of a group (paper: h(G), section "Hindsight block").

    Trajectories that are out of training (a failed search, an engine that gave up, a prompt that was too long) are no
    attempts to learn from and never appear in a block. ``content="documents"`` shows no siblings at all: see
    ``documents.py``.

    Args:
        group: one question's trajectories with their scores; outcomes come from F1, never from the shaped reward.
        renderer: encodes the block and the teacher's prompt; decodes responses for ``content="everything"``.
        profile: puts the block into the user's message.
        config: siblings, whether labels are shown, content, budget.
        labels: whether each trainable trajectory is shown as CORRECT: ``labels.shown_labels``.

    Returns:
        One block per trajectory in their order; trajectories that see the same siblings share one object. A block
        without siblings has text ``""`` and no teacher prompt: nothing is distilled there.
    """
    usable = [trajectory for trajectory in group.trajectories if trajectory.is_trainable]
    leaks = leaking_siblings(usable, group.question.gold_answers)
    if config.content == "documents":
        return [
            document_block(t, group.question, renderer, profile, config.max_block_tokens, leaks)
            for t in group.trajectories
        ]
    siblings = _siblings(group, renderer, config, labels)
    blocks: dict[tuple[int, ...], HindsightBlock] = {}
    result = []
    for trajectory in group.trajectories:
        chosen = _choose(siblings, trajectory.trajectory_id.sibling, leaks, config)
        key = tuple(sibling.index for sibling in chosen)
        if key not in blocks:
            blocks[key] = _block(chosen, leaks, group.question.text, renderer, profile, config.max_block_tokens)
        result.append(blocks[key])
    return result


def one_line(text: str) -> str:
    """Collapse whitespace and drop bars that stand alone, so that a query can forge neither a line nor a neighbour."""
    return " ".join(word for word in text.split() if word != QUERY_SEPARATOR.strip())


def search_line(queries: Sequence[str]) -> str:
    """The queries of one attempt in order, as a block shows them, without the label."""
    shown = [line for line in map(one_line, queries) if line]
    return QUERY_SEPARATOR.join(shown) or NO_SEARCH


def _siblings(
    group: RolloutGroup, renderer: Renderer, config: HindsightConfig, labels: Mapping[TrajectoryId, bool]
) -> list[_Sibling]:
    return [
        _Sibling(
            index=trajectory.trajectory_id.sibling,
            is_correct=score.f1 > config.rho,
            line=_label(labels[trajectory.trajectory_id], config) + _content(trajectory, renderer, config),
        )
        for trajectory, score in zip(group.trajectories, group.scores, strict=True)
        if trajectory.is_trainable
    ]


def _label(is_correct: bool, config: HindsightConfig) -> str:
    if config.labels == "none":
        return "- "
    return CORRECT if is_correct else INCORRECT


def _content(trajectory: Trajectory, renderer: Renderer, config: HindsightConfig) -> str:
    if config.content == "searches":
        return search_line(trajectory.queries)
    return " ".join(renderer.decode(trajectory.response_ids.tolist()).split())


def _choose(
    siblings: Sequence[_Sibling], own: int, leaks: Sequence[int], config: HindsightConfig
) -> tuple[_Sibling, ...]:
    return tuple(
        sibling
        for sibling in siblings
        if _is_wanted(sibling, own, config) and not (config.drop_leaks and sibling.index in leaks)
    )


def _is_wanted(sibling: _Sibling, own: int, config: HindsightConfig) -> bool:
    if config.siblings == "correct":
        return sibling.is_correct
    if config.siblings == "all":
        return True
    return (sibling.index == own) == (config.siblings == "own")


def _block(
    chosen: Sequence[_Sibling],
    leaks: tuple[int, ...],
    question: str,
    renderer: Renderer,
    profile: PromptProfile,
    max_tokens: int,
) -> HindsightBlock:
    kept, text = _fit(chosen, renderer, max_tokens)
    sources = tuple(sibling.index for sibling in kept)
    return HindsightBlock(
        text=text,
        teacher_prompt_ids=tuple(renderer.prompt_ids(profile.user_text(question, hindsight=text))) if text else (),
        sources=sources,
        dropped=tuple(sibling.index for sibling in chosen if sibling.index not in sources),
        leaks=leaks,
        is_emptied=bool(chosen) and not kept,
    )


def _fit(chosen: Sequence[_Sibling], renderer: Renderer, max_tokens: int) -> tuple[list[_Sibling], str]:
    """Drop siblings until the text fits, from the last: incorrect ones but the first, correct ones but the first.

    Then the incorrect one that is left, and the correct one last of all: a correct attempt says more than a wrong one,
    and one wrong attempt keeps the contrast. The order goes by the true
    outcome under every ``labels`` setting, so that the ablations differ in labels alone.
    """
    wrong = [sibling for sibling in chosen if not sibling.is_correct]
    right = [sibling for sibling in chosen if sibling.is_correct]
    first_out = [*reversed(wrong[1:]), *reversed(right[1:]), *wrong[:1], *right[:1]]
    kept, text = list(chosen), _text(chosen)
    for sibling in first_out:
        if len(renderer.encode(text)) <= max_tokens:
            break
        kept.remove(sibling)
        text = _text(kept)
    return kept, text


def _text(siblings: Sequence[_Sibling]) -> str:
    return "\n".join([HINDSIGHT_HEADER, *(sibling.line for sibling in siblings)]) if siblings else ""
