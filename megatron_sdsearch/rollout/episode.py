"""One rollout: generate, search, show the results, go on until an answer or the end of the budget.

Owns turns, budgets, observations and the status a trajectory ends with. Token ids go in and come out: a prompt or an
observation is encoded once, and what was sampled is carried along as it is. Many episodes at once are
``collector.py``'s.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """Turns search results into observations of at most ``max_tokens`` tokens whose tag is always closed.

    Attributes:
        notice: the observation that follows a generation without a valid action.

    Raises:
        ConfigError: the tags alone leave no room for a result.
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
                f"{max_tokens}, of which the {profile.name} profile's tags take {tags}",
                f"set it to more than {tags}",
            )
        self.notice = ContextSpan(kind="observation", token_ids=renderer.encode_own(profile.invalid_action_notice))

    def write(self, passages: Sequence[Passage]) -> ContextSpan:
        """The observation for ``passages``; it lists those of which at least one byte survived the cut."""
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


class EpisodeRunner:
    """Rolls out trajectories, one per call of ``run``.

    Args:
        engine: samples.
        retriever: searches.
        renderer: of the engine's tokenizer.
        profile: tags and instructions.
        rollout: turns and token budgets.
        top_k: passages per search.
        seed: of the run.

    Raises:
        ConfigError: ``rollout.max_observation_tokens`` does not hold the profile's tags.
    """

    def __init__(
        self,
        engine: Engine,
        retriever: Retriever,
        renderer: Renderer,
        profile: PromptProfile,
        rollout: RolloutConfig,
        *,
        top_k: int,
        seed: int,
    ) -> None:
        self._engine = engine
        self._retriever = retriever
        self._renderer = renderer
        self._profile = profile
        self._rollout = rollout
        self._top_k = top_k
        self._seed = seed
        self._writer = ObservationWriter(renderer, profile, rollout.max_observation_tokens)

    async def run(
        self,
        question: Question,
        trajectory_id: TrajectoryId,
        *,
        temperature: float,
        top_p: float = 1.0,
        lost: LostTrajectories,
    ) -> Trajectory:
        """Roll one trajectory out to its end; the engine's cache for it is released whatever happens.

        A turn is one generation. The first ``rollout.max_turns`` may search; each brings an observation, or a notice
        when it held no valid action. One last generation follows, which stops at the same strings and whose search is
        not carried out: it is no query. The trajectory is NO_ANSWER when the last generation holds none, or when an
        earlier one ends with EOS and no action (``rollout.eos_without_action``). It is TRUNCATED when the budget cannot
        hold the next observation and one token after it, and RETRIEVAL_FAILED, with the spans it has, when a search
        fails.

        Args:
            question: what to ask.
            trajectory_id: names the trajectory, and with the seed its random stream.
            temperature: 0 is greedy.
            top_p: nucleus mass.
            lost: counts the trajectory, and why a search failed.

        Raises:
            EngineError: the engine failed or refused a request.
            RetrievalDownError: the search engine is down, so that no trajectory can go on.
        """
        prompt_ids = self._renderer.prompt_ids(self._profile.user_text(question.text))
        is_too_long = len(prompt_ids) > self._rollout.max_prompt_tokens
        spans: list[Span] = [ContextSpan(kind="prompt", token_ids=prompt_ids[: self._rollout.max_prompt_tokens])]
        status, error = TrajectoryStatus.PROMPT_TOO_LONG, None
        if not is_too_long:
            try:
                status = await self._take_turns(trajectory_id, spans, temperature, top_p)
            except RetrievalDownError:
                raise
            except RetrievalError as failure:
                status, error = TrajectoryStatus.RETRIEVAL_FAILED, failure
            finally:
                await self._engine.release(trajectory_id)
        lost.count(status, error)
        return Trajectory(trajectory_id=trajectory_id, spans=tuple(spans), status=status)

    async def _take_turns(
        self, trajectory_id: TrajectoryId, spans: list[Span], temperature: float, top_p: float
    ) -> TrajectoryStatus:
        """Append spans behind the prompt until the trajectory ends; returns how it ends.

        Raises:
            RetrievalError: a search failed.
        """
        token_ids = list(spans[0].token_ids)
        for turn in range(self._rollout.max_turns + 1):
            is_last = turn == self._rollout.max_turns
            num_left = self._rollout.max_total_tokens - len(token_ids)
            params = SamplingParams(
                temperature=temperature,
                top_p=top_p,
                max_new_tokens=min(self._rollout.max_response_tokens, num_left),
                stop=(SEARCH_END, ANSWER_END),
            )
            request = GenerationRequest(
                trajectory_id=trajectory_id, seed=self._seed, prompt_ids=tuple(token_ids), params=params
            )
            generation = await self._engine.generate(request)
            span = span_of(
                self._renderer.token_bytes,
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
                observation = self._writer.write(await self._retriever.search(span.argument, top_k=self._top_k))
            if len(observation.token_ids) >= num_left:
                return TrajectoryStatus.TRUNCATED
            spans.append(observation)
            token_ids += observation.token_ids
        raise AssertionError("the last turn always ends the trajectory")

    def _status_after(self, span: SampledSpan, num_left: int, *, is_last: bool) -> TrajectoryStatus | None:
        """How the trajectory ends with this span, behind which ``num_left`` tokens fit; None when it goes on."""
        if span.finish_reason == "abort":
            return TrajectoryStatus.ABORTED
        if span.action is Action.ANSWER:
            return TrajectoryStatus.ANSWERED
        if span.is_eos_without_action and self._rollout.eos_without_action == "stop":
            return TrajectoryStatus.NO_ANSWER
        if num_left < 1 and (span.finish_reason == "length" or not is_last):
            return TrajectoryStatus.TRUNCATED
        return TrajectoryStatus.NO_ANSWER if is_last else None
