"""The documents that a search is about to find, shown instead of the siblings: the paper's "current-step documents".

The paper says no more than these words. Here, at the tokens of a query, the teacher sees the documents that this query
found and none of the other searches'. Every search therefore has a teacher prompt, and a teacher sequence, of its own:
a single block would show an early query what only a later one found (``docs/adr/0007-current-step-documents.md``)::

    Documents that the next search finds:
    Doc 1(Title: Lisbon) Lisbon is the capital of Portugal.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from megatron_sdsearch.data.prompts import PromptProfile
from megatron_sdsearch.records import Action, ContextSpan, HindsightBlock, SampledSpan, Trajectory

if TYPE_CHECKING:  # the renderer loads a tokenizer library, which building blocks does not need
    from megatron_sdsearch.tokenization.renderer import Renderer

HEADER = "Documents that the next search finds:"


def document_block(
    trajectory: Trajectory,
    question: str,
    renderer: Renderer,
    profile: PromptProfile,
    max_tokens: int,
    leaks: tuple[int, ...],
) -> HindsightBlock:
    """Build a teacher prompt for each search of a trajectory, with the documents that it found.

    Documents are shown exactly as the policy saw them: truncated at the same token, "no passage matches" included. A
    text above ``max_tokens`` loses lines from its end, worst passages first. A search has no prompt, and is not
    distilled, if its documents never reached the policy (the token budget had run out), or if none fits.

    Args:
        trajectory: the student's.
        question: its text.
        renderer: decodes observations, encodes prompts.
        profile: inserts the text into the user's message; its tags around an observation are not shown.
        max_tokens: maximum length of one search's text.
        leaks: of the group; copied into the block.

    Returns:
        A block with ``search_prompt_ids`` in the order of the searches, and all texts joined in ``text``.
    """
    texts, prompts, is_emptied = [], [], False
    for span, following in pairwise((*trajectory.spans, None)):
        if not isinstance(span, SampledSpan) or span.action is not Action.SEARCH:
            continue
        text = ""
        if isinstance(following, ContextSpan):  # else the trajectory ended before the observation
            text = _text(following, renderer, profile, max_tokens)
            is_emptied |= not text
        texts.append(text)
        prompts.append(tuple(renderer.prompt_ids(profile.user_text(question, hindsight=text)) if text else ()))
    return HindsightBlock(
        text="\n\n".join(filter(None, texts)),
        teacher_prompt_ids=(),
        sources=(),
        dropped=(),
        leaks=leaks,
        search_prompt_ids=tuple(prompts),
        is_emptied=is_emptied,
    )


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
