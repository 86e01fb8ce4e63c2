"""The records that flow through one training step, from question to training sample.

Plain frozen dataclasses over tuples and numpy arrays: no torch, no validation of files (that is ``data/``).
Whatever can be derived is derived (``Trajectory.token_ids``, ``loss_mask``), so that two fields can never disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question with its gold answers.

    Attributes:
        question_id: unique over all data sets, ``dataset:split:index``.
        text: the question as asked, stripped.
        gold_answers: at least one; any of them is right.
        dataset: where it comes from, for per-data-set metrics.
        gold_passage_ids: ids of the passages on the way to the answer, in hop order, the last one holding the
            answer; empty when the data set does not know them.
    """

    question_id: str
    text: str
    gold_answers: tuple[str, ...]
    dataset: str = ""
    gold_passage_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One retrieved passage. ``contents`` is the field's ``"Title"\\ntext`` layout; ``score`` the engine's own."""

    passage_id: str
    contents: str
    score: float = 0.0


def bare_title(line: str) -> str:
    """A passage's first line without the pair of quotes around it; quotes that are no such pair stay.

    Published corpora write ``"`` + title + ``"``, whatever the title holds: ``""Weird Al" Yankovic"`` is
    ``"Weird Al" Yankovic``. In ``"A" and "B"`` the first quote's partner is not the last one.
    """
    if len(line) < 2 or not line[0] == line[-1] == '"':
        return line
    depth, opens = 0, True
    for character in line[:-1]:
        if character == '"':
            depth += 1 if opens else -1
            if depth == 0 and line.count('"') % 2 == 0:  # odd: one stands for inches, as in "7" Single"
                return line
        opens = (character == '"' and opens) or character.isspace() or character in "([{"
    return line[1:-1]


class Action(StrEnum):
    """What a sampled span asks for."""

    SEARCH = "search"
    ANSWER = "answer"
    INVALID = "invalid"


class TrajectoryStatus(StrEnum):
    """How a trajectory ended."""

    ANSWERED = "answered"
    NO_ANSWER = "no_answer"  # the policy ended without one: at its last turn, or with EOS
    TRUNCATED = "truncated"  # the token budget ran out
    PROMPT_TOO_LONG = "prompt_too_long"  # nothing was sampled
    RETRIEVAL_FAILED = "retrieval_failed"  # a search failed: out of training, counted
    ABORTED = "aborted"  # the engine gave up on it: out of training, counted

    @property
    def is_lost(self) -> bool:
        """A search engine or a rollout engine ended it: its outcome says nothing of the policy."""
        return self in (TrajectoryStatus.RETRIEVAL_FAILED, TrajectoryStatus.ABORTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSpan:
    """Tokens that the policy reads and never learns to write.

    Attributes:
        kind: ``prompt`` (first span of every trajectory) or ``observation`` (search results, or a notice).
        token_ids: encoded once, never decoded and encoded again.
        passage_ids: the passages shown, best first; empty for prompts, notices and searches without hits.
    """

    kind: Literal["prompt", "observation"]
    token_ids: tuple[int, ...]
    passage_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledSpan:
    """Tokens that the policy sampled in one engine call.

    Attributes:
        token_ids: exactly as sampled.
        logprobs: of the sampling policy at its sampling temperature, nats, one per token.
        text: the decoded characters (display, scoring and action parsing only).
        action: what the span asks for.
        argument: the stripped text between the action's tags, ``""`` for INVALID.
        query_positions: indices into ``token_ids`` of the tokens strictly between ``<search>`` and ``</search>``;
            empty unless the action is SEARCH.
        policy_version: the training step whose weights sampled it.
        finish_reason: ``stop`` (a stop string), ``eos``, ``length`` or ``abort``.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    action: Action
    argument: str
    query_positions: tuple[int, ...]
    policy_version: int
    finish_reason: Literal["stop", "eos", "length", "abort"]

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} token_ids but {len(self.logprobs)} logprobs")

    @property
    def is_eos_without_action(self) -> bool:
        """The policy ended its message before it searched or answered."""
        return self.finish_reason == "eos" and self.action is Action.INVALID


Span = ContextSpan | SampledSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryId:
    """Which trajectory this is; also the key of its random stream.

    ``step`` is 0-based; the text of an id counts steps from 1, as files and logs do.
    """

    step: int
    question_id: str
    sibling: int

    def __str__(self) -> str:
        return f"{self.step + 1}/{self.question_id}/{self.sibling}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One rollout: a prompt span, then sampled spans and observations in turn."""

    trajectory_id: TrajectoryId
    spans: tuple[Span, ...]
    status: TrajectoryStatus

    def __post_init__(self) -> None:
        if not self.spans or not isinstance(self.spans[0], ContextSpan) or self.spans[0].kind != "prompt":
            raise ValueError("a trajectory starts with its prompt span")

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Ids of the prompt span."""
        return self.spans[0].token_ids

    @property
    def token_ids(self) -> IntArray:
        """[L] ids of all spans in order."""
        return np.concatenate([np.asarray(span.token_ids, dtype=np.int64) for span in self.spans])

    @property
    def response_ids(self) -> IntArray:
        """[L - len(prompt)] ids of everything after the prompt."""
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def loss_mask(self) -> BoolArray:
        """[L] True at sampled tokens."""
        return np.concatenate([np.full(len(span.token_ids), isinstance(span, SampledSpan)) for span in self.spans])

    @property
    def query_mask(self) -> BoolArray:
        """[L] True at tokens strictly between ``<search>`` and ``</search>`` of a sampled search."""
        mask = np.zeros(len(self.token_ids), dtype=np.bool_)
        start = 0
        for span in self.spans:
            if isinstance(span, SampledSpan):
                mask[[start + position for position in span.query_positions]] = True
            start += len(span.token_ids)
        return mask

    @property
    def rollout_logprobs(self) -> FloatArray:
        """[L] log-probabilities of the sampling policy, nats; 0 at context tokens."""
        return np.concatenate(
            [span.logprobs if isinstance(span, SampledSpan) else np.zeros(len(span.token_ids)) for span in self.spans]
        )

    @property
    def sampled_spans(self) -> tuple[SampledSpan, ...]:
        """The sampled spans in order."""
        return tuple(span for span in self.spans if isinstance(span, SampledSpan))

    @property
    def queries(self) -> tuple[str, ...]:
        """Query texts in order."""
        return tuple(span.argument for span in self.sampled_spans if span.action is Action.SEARCH)

    @property
    def search_ranges(self) -> tuple[tuple[int, int], ...]:
        """First and one past the last index of each sampled span that searches, in order; parallel to ``queries``."""
        ends = np.cumsum([len(span.token_ids) for span in self.spans]).tolist()
        return tuple(
            (end - len(span.token_ids), end)
            for span, end in zip(self.spans, ends, strict=True)
            if isinstance(span, SampledSpan) and span.action is Action.SEARCH
        )

    @property
    def answer(self) -> str | None:
        """The final answer's text, ``None`` without one."""
        spans = self.sampled_spans
        return spans[-1].argument if spans and spans[-1].action is Action.ANSWER else None

    @property
    def retrieved_passage_ids(self) -> tuple[str, ...]:
        """Ids of all passages shown, in order, with repeats."""
        return tuple(p for span in self.spans if isinstance(span, ContextSpan) for p in span.passage_ids)

    @property
    def is_trainable(self) -> bool:
        """False when the rollout was cut short by an engine, or nothing was sampled."""
        return not self.status.is_lost and bool(self.loss_mask.any())

    @property
    def num_eos_without_action(self) -> int:
        """Generations that ended with an end-of-sequence token and asked for nothing."""
        return sum(span.is_eos_without_action for span in self.sampled_spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How one trajectory's answer compares with the gold answers; numbers in [0, 1].

    Attributes:
        f1: token F1.
        em: exact match.
        reward: what advantages are made of, in ``objective.reward``'s terms; it may be shaped.
        is_correct: F1 is above ``hindsight.rho``. Set by ``data/scoring.py`` alone; everything else reads it.
    """

    f1: float
    em: float
    reward: float
    is_correct: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All trajectories of one question in one step, with their scores in the same order."""

    question: Question
    trajectories: tuple[Trajectory, ...]
    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        if len(self.trajectories) != len(self.scores):
            raise ValueError(f"{len(self.trajectories)} trajectories but {len(self.scores)} scores")


@dataclass(frozen=True, slots=True, kw_only=True)
class HindsightBlock:
    """What the teacher is shown on top of the student's prompt.

    Attributes:
        text: the rendered block.
        teacher_prompt_ids: ids of the whole teacher prompt, block included; empty when nothing is distilled, or when
            every search has a prompt of its own.
        sources: sibling indices shown, in the order shown.
        dropped: sibling indices left out to fit the token budget.
        leaks: sibling indices whose queries hold a normalised gold answer.
        search_prompt_ids: ids of the teacher prompt of each search in turn, where each has its own; ``()`` at a search
            that has none.
        is_emptied: the token budget left nothing of a teacher prompt that there was something to show in.
    """

    text: str
    teacher_prompt_ids: tuple[int, ...]
    sources: tuple[int, ...]
    dropped: tuple[int, ...]
    leaks: tuple[int, ...]
    search_prompt_ids: tuple[tuple[int, ...], ...] = ()
    is_emptied: bool = False

    def prompt_of_search(self, index: int) -> tuple[int, ...]:
        """Ids of the teacher prompt for the trajectory's search number ``index``; ``()`` without one."""
        return self.search_prompt_ids[index] if self.search_prompt_ids else self.teacher_prompt_ids


GroupClass = Literal["all_wrong", "mixed", "all_correct"]
GROUP_CLASSES: tuple[GroupClass, ...] = ("all_wrong", "mixed", "all_correct")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherPrompt:
    """What the teacher reads in front of the response, and the positions that it is the teacher of.

    Attributes:
        token_ids: of the whole prompt; at least one.
        start: first of its positions in the sample's label-aligned arrays.
        end: one past the last.
    """

    token_ids: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingSample:
    """One sequence to train on. Arrays are label-aligned: entry i is about predicting token i + 1.

    Attributes:
        sample_id: for messages.
        token_ids: [L] input ids.
        labels: [L] next token; the last entry is 0 and never in a mask.
        loss_mask: [L] True where the label was sampled by the policy.
        distill_mask: [L] True where the label is a token to distil: of a query, or with
            ``objective.distill_positions=all`` any sampled one; within the ranges of ``teacher_prompts``.
        rollout_logprobs: [L] of the label under the sampling policy, nats; 0 outside ``loss_mask``.
        advantage: of the whole trajectory.
        prompt_length: number of prompt tokens in ``token_ids``.
        teacher_prompts: in the order of their ranges, which do not overlap; empty when nothing is distilled.
        group_class: of the group it comes from; metrics are reported by class.
        policy_weight: of each policy token in the loss; set by ``batching/packing.py``.
        distill_weight: of each distilled token; set there, too.
    """

    sample_id: str
    token_ids: IntArray
    labels: IntArray
    loss_mask: BoolArray
    distill_mask: BoolArray
    rollout_logprobs: FloatArray
    advantage: float = 0.0
    prompt_length: int
    teacher_prompts: tuple[TeacherPrompt, ...] = ()
    group_class: GroupClass = "mixed"
    policy_weight: float = 0.0
    distill_weight: float = 0.0

    def __len__(self) -> int:
        return len(self.token_ids)
