"""One rollout: generate, search, append the results, repeat until an answer or the end of the budget.

Handles turns, budgets, observations and the final status. Works on token ids: prompts and observations are encoded
once, sampled ids are never decoded and encoded again. ``collector.py`` runs many episodes concurrently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from megatron_sdsearch.config import RolloutConfig
from megatron_sdsearch.data.prompts import ANSWER_END, SEARCH_END, PromptProfile
from megatron_sdsearch.errors import ConfigError, RetrievalDownError, RetrievalError
from megatron_sdsearch.records import (
    Action,
    ContextSpan,
    Passage,
    Question,
    SampledSpan,
    Span,
    Trajectory,
    TrajectoryId,
    TrajectoryStatus,
)
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.rollout.engine import Engine, GenerationRequest, SamplingParams
from megatron_sdsearch.rollout.lost import LostTrajectories
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.tokenization.spans import span_of


class ObservationWriter:
    """Turns search results into observations of at most ``max_tokens`` tokens, always with a closing tag.

    Attributes:
        notice: the observation after a generation without a valid action.

    Raises:
        ConfigError: the tags leave no room for a result.
    """

    def __init__(self, renderer: Renderer, profile: PromptProfile, max_tokens: int) -> None:
        self._renderer = renderer
        self._profile = profile
        self._prefix = renderer.encode_own(profile.observation_prefix)
        self._suffix = renderer.encode_own(profile.observation_suffix)
        self._room = max_tokens - len(self._prefix) - len(self._suffix)
        if self._room < 1:
            tags = max_tokens - self._room
            raise ConfigError(
                "rollout.max_observation_tokens",
                f"{max_tokens}, but the tags of profile {profile.name} take {tags}",
                f"set it to more than {tags}",
            )
        self.notice = ContextSpan(kind="observation", token_ids=renderer.encode_own(profile.invalid_action_notice))

    def write(self, passages: Sequence[Passage]) -> ContextSpan:
        """Return the observation for ``passages``, with the ids of those that are not cut off entirely."""
        body = self._renderer.encode(self._profile.format_passages(passages))
        shown = passages
        if len(body) > self._room:
            body = body[: self._room]
            num_bytes = sum(map(len, self._renderer.token_bytes.lookup(body)))
            starts = [
                len(self._profile.format_passages(passages[:i]).encode()) if i else 0 for i in range(len(passages))
            ]
            shown = [passage for passage, start in zip(passages, starts, strict=True) if start < num_bytes]
        return ContextSpan(
            kind="observation",
            token_ids=(*self._prefix, *body, *self._suffix),
            passage_ids=tuple(passage.passage_id for passage in shown),
        )


@dataclass(eq=False, repr=False)
class EpisodeRunner:
    """Rolls out trajectories, one per call of ``run``.

    Attributes:
        engine: samples.
        retriever: searches.
        renderer: of the engine's tokenizer.
        profile: tags and instructions.
        rollout: limits on turns and tokens.
        top_k: passages per search.
        seed: of the run.

    Raises:
        ConfigError: ``rollout.max_observation_tokens`` does not hold the profile's tags.
    """

    engine: Engine
    retriever: Retriever
    renderer: Renderer
    profile: PromptProfile
    rollout: RolloutConfig
    _: KW_ONLY
    top_k: int
    seed: int

    def __post_init__(self) -> None:
        self._writer = ObservationWriter(self.renderer, self.profile, self.rollout.max_observation_tokens)

    async def run(
        self,
        question: Question,
        trajectory_id: TrajectoryId,
        *,
        temperature: float,
        top_p: float = 1.0,
        lost: LostTrajectories,
    ) -> Trajectory:
        """Roll out one trajectory and release the engine's cache of it in any case.

        A turn is one generation. The first ``rollout.max_turns`` may search; an observation follows each, or a notice
        if it has no valid action. One last generation follows, which stops at the same strings; a search in it is not
        executed and does not count as a query. The status is NO_ANSWER if the last generation has no answer, or if an
        earlier one ends with EOS and no action (``rollout.eos_without_action``). It is TRUNCATED if the budget cannot
        hold the next observation and one more token, and RETRIEVAL_FAILED, with the spans so far, if a search fails.

        Args:
            question: of the trajectory.
            trajectory_id: id, and with the seed the key of the random stream.
            temperature: 0 is greedy.
            top_p: nucleus mass.
            lost: counts the trajectory and failed searches.

        Raises:
            EngineError: the engine failed or refused a request.
            RetrievalDownError: the search engine is down, so that no trajectory can continue.
        """
        prompt_ids = self.renderer.prompt_ids(self.profile.user_text(question.text))
        is_too_long = len(prompt_ids) > self.rollout.max_prompt_tokens
        spans: list[Span] = [ContextSpan(kind="prompt", token_ids=prompt_ids[: self.rollout.max_prompt_tokens])]
        status, error = TrajectoryStatus.PROMPT_TOO_LONG, None
        if not is_too_long:
            try:
                status = await self._take_turns(trajectory_id, spans, temperature, top_p)
            except RetrievalDownError:
                raise
            except RetrievalError as failure:
                status, error = TrajectoryStatus.RETRIEVAL_FAILED, failure
            finally:
                await self.engine.release(trajectory_id)
        lost.count(status, error)
        return Trajectory(trajectory_id=trajectory_id, spans=tuple(spans), status=status)

    async def _take_turns(
        self, trajectory_id: TrajectoryId, spans: list[Span], temperature: float, top_p: float
    ) -> TrajectoryStatus:
        """Append spans until the trajectory ends; return its status.

        Raises:
            RetrievalError: a search failed.
        """
        token_ids = list(spans[0].token_ids)
        for turn in range(self.rollout.max_turns + 1):
            is_last = turn == self.rollout.max_turns
            num_left = self.rollout.max_total_tokens - len(token_ids)
            params = SamplingParams(
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=min(self.rollout.max_response_tokens, num_left),
                stop=(SEARCH_END, ANSWER_END),
            )
            request = GenerationRequest(
                trajectory_id=trajectory_id, seed=self.seed, prompt_ids=tuple(token_ids), params=params
            )
            generation = await self.engine.generate(request)
            span = span_of(
                self.renderer.token_bytes,
                token_ids=generation.token_ids,
                logprobs=generation.logprobs,
                finish_reason=generation.finish_reason,
                policy_version=generation.policy_version,
                allow_search=not is_last,
            )
            spans.append(span)
            token_ids += span.token_ids
            num_left -= len(span.token_ids)
            status = self._status_after(span, num_left, is_last=is_last)
            if status is not None:
                return status
            observation = self._writer.notice
            if span.action is Action.SEARCH:
                observation = self._writer.write(await self.retriever.search(span.argument, top_k=self.top_k))
            if len(observation.token_ids) >= num_left:
                return TrajectoryStatus.TRUNCATED
            spans.append(observation)
            token_ids += observation.token_ids
        raise AssertionError("the last turn always ends the trajectory")

    def _status_after(self, span: SampledSpan, num_left: int, *, is_last: bool) -> TrajectoryStatus | None:
        """Return the status after this span, with ``num_left`` tokens of budget; None if the trajectory continues."""
        if span.finish_reason == "abort":
            return TrajectoryStatus.ABORTED
        if span.action is Action.ANSWER:
            return TrajectoryStatus.ANSWERED
        if span.is_eos_without_action and self.rollout.eos_without_action == "stop":
            return TrajectoryStatus.NO_ANSWER
        if num_left < 1 and (span.finish_reason == "length" or not is_last):
            return TrajectoryStatus.TRUNCATED
        return TrajectoryStatus.NO_ANSWER if is_last else None
