"""What a search is about to find, in place of the siblings: the paper's ablation "current-step documents".

Owns the text, and which search is shown what. The paper says no more than those three words. Read here: at the tokens
of a query the teacher has seen the documents which that very query brought, none of the other searches'. So every
search gets a teacher prompt, and with it a teacher sequence, of its own: one block with the documents of all searches
would show an early query what only a later one found (``docs/adr/0007-current-step-documents.md``)::

    Documents that the next search finds:
    Doc 1(Title: Lisbon) Lisbon is the capital of Portugal.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from megatron_sdsearch.data.prompts import PromptProfile
from megatron_sdsearch.records import Action, ContextSpan, HindsightBlock, Question, SampledSpan, Trajectory

if TYPE_CHECKING:  # the renderer loads a tokenizer library; building blocks does not need it
    from megatron_sdsearch.tokenization.renderer import Renderer

HEADER = "Documents that the next search finds:"


def document_block(
    trajectory: Trajectory,
    question: Question,
    renderer: Renderer,
    profile: PromptProfile,
    max_tokens: int,
    leaks: tuple[int, ...],
) -> HindsightBlock:
    """A teacher prompt for each search of a trajectory, with the documents that it found.

    Documents are shown as the policy was shown them, cut where its observation was cut, "no passage matches" included.
    A text above ``max_tokens`` loses lines from its end, worst passages first. A search has no prompt, and is not
    distilled, when its documents never reached the policy (the budget had run out), or when none fits.

    Args:
        trajectory: the supervised one.
        question: what it answers.
        renderer: decodes observations, encodes prompts.
        profile: puts the text into the user's message; its tags around an observation are not shown.
        max_tokens: of one text.
        leaks: of the group, for its metrics.

    Returns:
        The block: ``search_prompt_ids`` in the order of the searches; ``text`` all texts, for people.
    """
    found = _found(trajectory)
    texts = ["" if observation is None else _text(observation, renderer, profile, max_tokens) for observation in found]
    prompts = [renderer.prompt_ids(profile.user_text(question.text, hindsight=text)) if text else () for text in texts]
    return HindsightBlock(
        text="\n\n".join(filter(None, texts)),
        teacher_prompt_ids=(),
        sources=(),
        dropped=(),
        leaks=leaks,
        search_prompt_ids=tuple(map(tuple, prompts)),
        is_emptied=any(observation is not None and not text for observation, text in zip(found, texts, strict=True)),
    )


def _found(trajectory: Trajectory) -> list[ContextSpan | None]:
    """The observation of each search; None where the trajectory ended before it."""
    return [
        following if isinstance(following, ContextSpan) else None
        for span, following in pairwise((*trajectory.spans, None))
        if isinstance(span, SampledSpan) and span.action is Action.SEARCH
    ]


def _text(observation: ContextSpan, renderer: Renderer, profile: PromptProfile, max_tokens: int) -> str:
    shown = renderer.decode(observation.token_ids)
    body = shown.removeprefix(profile.observation_prefix).removesuffix(profile.observation_suffix)
    lines = body.strip().split("\n")
    while lines:
        text = "\n".join([HEADER, *lines])
        if len(renderer.encode(text)) <= max_tokens:
            return text
        lines.pop()
    return ""
