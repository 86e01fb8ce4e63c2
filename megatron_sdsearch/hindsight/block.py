"""The hindsight block: the siblings' queries and outcomes, as text that only the teacher reads.

This module chooses the siblings, masks the future, renders the text within its token budget, and finds queries that
give the answer away. Labels come from ``labels.py``, the wording around the block from ``data/prompts.py``; the teacher
is aligned with the student in ``batching/samples.py``.

Warm-start demonstrations teach models to read exactly this format, one line per sibling in sibling order::

    Earlier attempts at this question:
    CORRECT: first query | second query
    INCORRECT: other query
    INCORRECT: (no search)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_sdsearch.config import HindsightConfig
from megatron_sdsearch.data.prompts import CORRECT, HINDSIGHT_HEADER, INCORRECT, PromptProfile
from megatron_sdsearch.data.scoring import contains_answer
from megatron_sdsearch.hindsight.documents import document_block
from megatron_sdsearch.hindsight.labels import shown_labels
from megatron_sdsearch.records import HindsightBlock, RolloutGroup, TrajectoryId

if TYPE_CHECKING:  # the renderer loads a tokenizer library, which building blocks does not need
    from megatron_sdsearch.tokenization.renderer import Renderer

NO_SEARCH = "(no search)"
QUERY_SEPARATOR = " | "


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sibling:
    """One line of the block, and the facts that decide whether it is shown."""

    index: int
    is_correct: bool
    line: str


def build_hindsight(
    groups: Sequence[RolloutGroup], renderer: Renderer, profile: PromptProfile, config: HindsightConfig, *, seed: int
) -> list[list[HindsightBlock]]:
    """Build the hindsight block of each trajectory of a step (paper: h(G), section "Hindsight block").

    Trajectories that are not trained on (a failed search, an engine error, a prompt that was too long) never appear in
    a block. ``content="documents"`` shows no siblings at all: see ``documents.py``.

    Args:
        groups: ALL groups of the step, because shuffled labels are drawn from all of them.
        renderer: encodes the block and the teacher's prompt; decodes responses for ``content="everything"``.
        profile: inserts the block into the user's message.
        config: siblings, labels, content and token budget.
        seed: of the run, for shuffled and permuted labels.

    Returns:
        Per group, one block per trajectory, in order; trajectories that see the same siblings share one object. A block
        without siblings has the text ``""`` and no teacher prompt: nothing is distilled there.
    """
    labels = shown_labels(groups, config.labels, seed=seed)
    return [_group_blocks(group, renderer, profile, config, labels) for group in groups]


def skip_hindsight(groups: Sequence[RolloutGroup]) -> list[list[HindsightBlock]]:
    """Return empty blocks, as ``build_hindsight`` does, for a step without distillation; leaks are still measured."""
    nothing = HindsightBlock(text="", teacher_prompt_ids=(), sources=(), dropped=(), leaks=())
    return [[replace(nothing, leaks=leaking_siblings(group))] * len(group.trajectories) for group in groups]


def leaking_siblings(group: RolloutGroup) -> tuple[int, ...]:
    """Find the trainable siblings with a gold answer in a query, and return their indices.

    Future masking hides reasoning, documents and answers from the teacher, but a policy that already knows or guesses
    the answer may put it into a query, which is shown. Each query is checked alone: an answer spread over two queries
    is not a leak. A question that names its own answer ("Which is older, A or B?") flags every query about that answer,
    although the teacher learns nothing new from it; compare the count with the share of such questions.
    """
    return tuple(
        trajectory.trajectory_id.sibling
        for trajectory in group.trajectories
        if trajectory.is_trainable
        and any(contains_answer(query, group.question.gold_answers) for query in trajectory.queries)
    )


def search_line(queries: Sequence[str]) -> str:
    """Render the queries of one attempt, in order, without the label.

    Whitespace is collapsed and separate bars are dropped, so that a query can imitate neither a line break nor a second
    query.
    """
    bar = QUERY_SEPARATOR.strip()
    lines = (" ".join(word for word in query.split() if word != bar) for query in queries)
    return QUERY_SEPARATOR.join(filter(None, lines)) or NO_SEARCH


def _group_blocks(
    group: RolloutGroup,
    renderer: Renderer,
    profile: PromptProfile,
    config: HindsightConfig,
    labels: Mapping[TrajectoryId, bool],
) -> list[HindsightBlock]:
    question, leaks = group.question.text, leaking_siblings(group)
    if config.content == "documents":
        budget = config.max_block_tokens
        return [document_block(t, question, renderer, profile, budget, leaks) for t in group.trajectories]
    siblings = _siblings(group, renderer, config, labels)
    blocks: dict[tuple[int, ...], HindsightBlock] = {}
    result = []
    for trajectory in group.trajectories:
        chosen = [s for s in siblings if _is_shown(s, trajectory.trajectory_id.sibling, leaks, config)]
        key = tuple(sibling.index for sibling in chosen)
        if key not in blocks:
            kept, text = _fit(chosen, renderer, config.max_block_tokens)
            prompt = renderer.prompt_ids(profile.user_text(question, hindsight=text)) if text else ()
            sources = tuple(sibling.index for sibling in kept)
            blocks[key] = HindsightBlock(
                text=text,
                teacher_prompt_ids=tuple(prompt),
                sources=sources,
                dropped=tuple(index for index in key if index not in sources),
                leaks=leaks,
                is_emptied=bool(chosen) and not kept,
            )
        result.append(blocks[key])
    return result


def _siblings(
    group: RolloutGroup, renderer: Renderer, config: HindsightConfig, labels: Mapping[TrajectoryId, bool]
) -> list[_Sibling]:
    siblings = []
    for trajectory, score in zip(group.trajectories, group.scores, strict=True):
        if not trajectory.is_trainable:
            continue
        label = "- " if config.labels == "none" else CORRECT if labels[trajectory.trajectory_id] else INCORRECT
        if config.content == "searches":
            content = search_line(trajectory.queries)
        else:
            content = " ".join(renderer.decode(trajectory.response_ids.tolist()).split())
        index = trajectory.trajectory_id.sibling
        siblings.append(_Sibling(index=index, is_correct=score.is_correct, line=label + content))
    return siblings


def _is_shown(sibling: _Sibling, own: int, leaks: Sequence[int], config: HindsightConfig) -> bool:
    """Decide whether the teacher of sibling ``own`` is shown this one."""
    if config.drop_leaks and sibling.index in leaks:
        return False
    if config.siblings == "correct":
        return sibling.is_correct
    if config.siblings == "all":
        return True
    return (sibling.index == own) == (config.siblings == "own")


def _fit(chosen: Sequence[_Sibling], renderer: Renderer, max_tokens: int) -> tuple[list[_Sibling], str]:
    """Drop siblings until the text fits, and return the remaining ones with the text.

    Order of dropping: incorrect ones from the last to the second, correct ones from the last to the second, the first
    incorrect one, the first correct one. A correct attempt is worth more than a wrong one, and one wrong attempt keeps
    the contrast. The true outcome decides under every ``labels`` setting, so these ablations differ in labels only.
    """
    wrong = [sibling for sibling in chosen if not sibling.is_correct]
    right = [sibling for sibling in chosen if sibling.is_correct]
    kept, text = list(chosen), _text(chosen)
    for sibling in (*reversed(wrong[1:]), *reversed(right[1:]), *wrong[:1], *right[:1]):
        if len(renderer.encode(text)) <= max_tokens:
            break
        kept.remove(sibling)
        text = _text(kept)
    return kept, text


def _text(siblings: Sequence[_Sibling]) -> str:
    return "\n".join([HINDSIGHT_HEADER, *(sibling.line for sibling in siblings)]) if siblings else ""
