"""The numbers of a step, computed by hand from a few trajectories and updates."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdsearch.batching.advantages import group_advantages
from megatron_sdsearch.evaluation.query_probe import QueryHitComparison
from megatron_sdsearch.logging import names
from megatron_sdsearch.records import (
    Action,
    ContextSpan,
    HindsightBlock,
    Question,
    RolloutGroup,
    SampledSpan,
    Score,
    Trajectory,
    TrajectoryId,
    TrajectoryStatus,
)
from megatron_sdsearch.training.policy import UpdateResult, merge_metrics
from megatron_sdsearch.training.rollouts import StepRollouts
from megatron_sdsearch.training.step_metrics import (
    Values,
    measure_probe,
    measure_rollouts,
    measure_step,
    measure_updates,
)

HindsightGroup = tuple[RolloutGroup, list[HindsightBlock]]
ANSWERED, FAILED = TrajectoryStatus.ANSWERED, TrajectoryStatus.RETRIEVAL_FAILED


def sampled(num_tokens: int, action: Action) -> SampledSpan:
    return SampledSpan(
        token_ids=(7,) * num_tokens,
        logprobs=(-0.1,) * num_tokens,
        text="",
        action=action,
        argument="x",
        query_positions=(),
        policy_version=0,
        finish_reason="stop",
    )


def attempt(sibling: int, *, shown: str = "wrong", status: TrajectoryStatus = ANSWERED) -> Trajectory:
    """Searches once with 3 tokens and is shown one passage, then answers with 2."""
    return Trajectory(
        trajectory_id=TrajectoryId(step=0, question_id="q", sibling=sibling),
        spans=(
            ContextSpan(kind="prompt", token_ids=(1, 2)),
            sampled(3, Action.SEARCH),
            ContextSpan(kind="observation", token_ids=(3, 4, 5, 6), passage_ids=(shown,)),
            sampled(2, Action.ANSWER),
        ),
        status=status,
    )


def group(
    f1: list[float],
    *,
    shown: str = "wrong",
    statuses: list[TrajectoryStatus] | None = None,
    rho: float = 0.0,
) -> RolloutGroup:
    statuses = statuses or [ANSWERED] * len(f1)
    return RolloutGroup(
        question=Question(question_id="q", text="?", gold_answers=("a",), gold_passage_ids=("hop", "gold")),
        trajectories=tuple(attempt(i, shown=shown, status=status) for i, status in enumerate(statuses)),
        scores=tuple(Score(f1=f, em=float(f == 1), reward=f / 2, is_correct=f > rho) for f in f1),
    )


def with_blocks(rollout: RolloutGroup, leaks: tuple[int, ...] = (), dropped: tuple[int, ...] = ()) -> HindsightGroup:
    block = HindsightBlock(text="", teacher_prompt_ids=(1,), sources=(), dropped=dropped, leaks=leaks)
    return rollout, [block] * len(rollout.trajectories)


def update(grad_norm: float = 1.0, learning_rate: float = 0.1, **metrics: float) -> UpdateResult:
    return UpdateResult(metrics=metrics, grad_norm=grad_norm, learning_rate=learning_rate)


STEP = [
    with_blocks(group([1.0, 0.0], shown="gold"), leaks=(1,), dropped=(0,)),
    with_blocks(group([0.0, 0.0], statuses=[ANSWERED, FAILED])),
    with_blocks(group([1.0, 0.5])),
    with_blocks(group([0.25, 0.0])),
]


def measure(groups: list[HindsightGroup], *results: UpdateResult, num_refilled: int = 0) -> Values:
    """The numbers of a step of these groups."""
    rollouts = StepRollouts(groups=[g for g, _ in groups], num_refilled=num_refilled, engine_counts={})
    advantages = [group_advantages(g, normalize_std=True) for g, _ in groups]
    return measure_step(rollouts, [blocks for _, blocks in groups], advantages, results)


def test_measure_step_averages_over_what_was_not_lost_and_counts_what_went_wrong() -> None:
    assert measure(STEP, num_refilled=3) == {
        names.REWARD: pytest.approx((0.5 + 0.5 + 0.25 + 0.125) / 7),
        names.EM: pytest.approx(2 / 7),
        names.F1: pytest.approx((1 + 1 + 0.5 + 0.25) / 7),
        names.HIT_RATE: pytest.approx(2 / 7),
        names.NUM_SEARCHES: 1,
        names.NUM_LOST: 1,
        names.NUM_PROMPT_TOO_LONG: 0,
        names.NUM_EOS_WITHOUT_ACTION: 0,
        "train/response_tokens": 5,
        "train/num_trajectories": 8,
        "train/num_retrieval_failed": 1,
        names.NUM_WITHOUT_CONTRAST: 2,
        names.SHARE_WITHOUT_ADVANTAGE: 1 / 4,
        names.NUM_REFILLED: 3,
        "train/status/answered": 7 / 8,
        "train/status/retrieval_failed": 1 / 8,
        "train/share_all_correct": 0.25,
        "train/share_all_wrong": 0.25,
        "train/share_mixed": 0.5,
        "hindsight/num_leaks": 1,
        names.LEAK_SHARE: pytest.approx(1 / 7),
        "hindsight/dropped_per_block": pytest.approx(2 / 8),
        names.NUM_EMPTIED: 0,
    }


def test_query_length_and_entropy_are_means_over_queries_and_over_their_tokens() -> None:
    spans = [
        replace(sampled(3, Action.SEARCH), query_positions=(1,), logprobs=(-9.0, -1.0, -9.0)),
        replace(sampled(4, Action.SEARCH), query_positions=(0, 1, 2), logprobs=(-2.0, -3.0, -2.0, -9.0)),
    ]
    rollout = group([1.0, 0.0])
    searched = [replace(t, spans=(t.spans[0], *spans)) for t in rollout.trajectories[:1]]
    mixed = replace(rollout, trajectories=(*searched, rollout.trajectories[1]))
    values = measure([with_blocks(mixed)])
    assert values[names.QUERY_TOKENS] == 2
    assert values[names.QUERY_ENTROPY] == 2
    assert names.QUERY_TOKENS not in measure(STEP)


def test_the_class_of_a_group_goes_by_what_is_correct() -> None:
    values = measure([with_blocks(group(f1, rho=0.5)) for f1 in ([1.0, 0.0], [0.0, 0.0], [1.0, 0.5], [0.25, 0.0])])
    shares = [values[f"train/share_{name}"] for name in ("all_correct", "mixed", "all_wrong")]
    assert shares == [0.0, 0.5, 0.5]


def test_a_group_has_an_advantage_where_rewards_of_those_that_count_differ() -> None:
    def share(*groups: RolloutGroup) -> float:
        return measure([with_blocks(g) for g in groups])[names.SHARE_WITHOUT_ADVANTAGE]

    right_and_half_right, alike = group([1.0, 0.5]), group([0.5, 0.5])
    lost = group([1.0, 0.0], statuses=[ANSWERED, FAILED])
    assert share(right_and_half_right, alike) == 0.5
    assert share(alike, lost) == 1.0, "one that counts has nothing to be better than"


def test_measure_step_adds_the_updates() -> None:
    values = measure(STEP, update(policy_loss=2.0, grad_norm=3.0))
    assert (values[names.POLICY_LOSS], values[names.GRAD_NORM]) == (2.0, 3.0)
    assert values["train/num_trajectories"] == 8


def test_blocks_that_the_budget_emptied_are_counted_where_something_would_have_been_learned() -> None:
    rollout = group([1.0, 0.0], statuses=[ANSWERED, FAILED])
    block = HindsightBlock(text="", teacher_prompt_ids=(), sources=(), dropped=(0,), leaks=(), is_emptied=True)
    values = measure([(rollout, [block] * 2), *STEP])
    assert values[names.NUM_EMPTIED] == 1


def test_the_hit_rate_is_absent_where_no_question_knows_its_passage() -> None:
    rollout = group([1.0])
    question = Question(question_id="q", text="?", gold_answers=("a",))
    unknown = RolloutGroup(question=question, trajectories=rollout.trajectories, scores=rollout.scores)
    assert names.HIT_RATE not in measure([with_blocks(unknown)])


def test_rollouts_of_an_evaluation_have_names_of_its_own() -> None:
    assert measure_rollouts([group([1.0], shown="gold"), group([0.0])], names.EVAL_PREFIX) == {
        names.EVAL_NUM_TRAJECTORIES: 2,
        names.EVAL_NUM_LOST: 0,
        names.EVAL_NUM_PROMPT_TOO_LONG: 0,
        "eval/num_eos_without_action": 0,
        "eval/status/answered": 1.0,
        names.EVAL_EM: 0.5,
        names.EVAL_F1: 0.5,
        names.EVAL_HIT_RATE: 0.5,
        names.EVAL_NUM_SEARCHES: 1,
        "eval/response_tokens": 5,
    }


def test_an_outage_is_no_wrong_answer_of_the_policy() -> None:
    """19 of 100 searches failed, everything else is right."""
    right, lost = [group([1.0], shown="gold")] * 81, [group([0.0], statuses=[FAILED])] * 19
    values = measure_rollouts([*right, *lost], names.EVAL_PREFIX)
    assert (values[names.EVAL_EM], values[names.EVAL_F1], values[names.EVAL_HIT_RATE]) == (1.0, 1.0, 1.0)
    assert (values[names.EVAL_NUM_TRAJECTORIES], values[names.EVAL_NUM_LOST]) == (100, 19)
    assert values["eval/status/retrieval_failed"] == 0.19
    assert names.EVAL_EM not in measure_rollouts(lost, names.EVAL_PREFIX), (
        "nothing to average: no number, and no best checkpoint"
    )


def test_measure_updates_means_losses_and_takes_maxima_of_maxima() -> None:
    updates = [
        update(loss=1.0, policy_loss=2.0, kl=0.5, ratio_max=1.5, grad_norm=1.0, learning_rate=0.1),
        update(loss=3.0, policy_loss=4.0, kl=0.0, ratio_max=9.0, grad_norm=2.0, learning_rate=0.2),
        update(loss=5.0, policy_loss=6.0, kl=1.0, ratio_max=2.0, grad_norm=6.0, learning_rate=0.3),
    ]
    assert measure_updates(updates) == {
        "loss/total": 3.0,
        names.POLICY_LOSS: 4.0,
        names.KL: 0.5,
        "loss/ratio_max": 9.0,
        names.GRAD_NORM: 3.0,
        "optimizer/learning_rate": 0.3,
    }


def test_measure_updates_leaves_out_updates_that_learned_nothing() -> None:
    idle = update(grad_norm=0.0, learning_rate=0.9)
    assert measure_updates([idle, idle]) == {}
    values = measure_updates([update(loss=2.0, grad_norm=4.0, learning_rate=0.1), idle])
    assert values == {"loss/total": 2.0, names.GRAD_NORM: 4.0, "optimizer/learning_rate": 0.1}


def test_measure_updates_averages_a_metric_over_the_updates_that_have_it() -> None:
    values = measure_updates([update(loss=1.0), update(loss=1.0, old_kl=0.2), update(loss=1.0, old_kl=0.4)])
    assert values["loss/old_kl"] == pytest.approx(0.3)


def test_an_update_without_a_teacher_counts_in_the_distillation_loss_as_0() -> None:
    values = measure_updates([update(loss=1.5, distill_loss=0.5), update(loss=1.0)])
    assert (values[names.DISTILL], values["loss/total"]) == (0.25, 1.25)
    assert names.JSD not in values
    assert names.DISTILL not in measure_updates([update(loss=1.0)])


def by_class(divergence: str = "jsd", **classes: tuple[float, float, float]) -> UpdateResult:
    """Sums of divergence, entropy gap and weight of each class."""
    fields = (divergence, "entropy_gap", "distill_weight")
    parts = {f"{f}_{name}": v for name, values in classes.items() for f, v in zip(fields, values, strict=True)}
    return update(loss=0.5, **parts)


def test_the_divergence_of_a_class_is_its_sum_over_its_weight() -> None:
    values = measure_updates(
        [
            by_class(mixed=(0.1, -0.5, 0.25), all_wrong=(0.0, 0.0, 0.0)),
            by_class(mixed=(0.3, 0.5, 0.5), all_wrong=(0.2, 0.1, 0.5)),
        ]
    )
    assert values[f"{names.JSD_BY_CLASS_PREFIX}mixed"] == pytest.approx((0.4 + 0.6) / 2)
    assert values[f"{names.JSD_BY_CLASS_PREFIX}all_wrong"] == pytest.approx(0.4), "only one update had such a token"
    assert values[f"{names.ENTROPY_GAP_BY_CLASS_PREFIX}mixed"] == pytest.approx((-2.0 + 1.0) / 2)
    assert values[f"{names.ENTROPY_GAP_BY_CLASS_PREFIX}all_wrong"] == pytest.approx(0.2)
    assert not [name for name in values if name.endswith("all_correct")]
    assert not [name for name in values if "weight" in name]
    # Over all classes: of those that distil, a quarter of the first update's trajectories.
    assert values[names.JSD] == pytest.approx((0.1 / 0.25 + 0.5 / 1.0) / 2)
    assert values[names.ENTROPY_GAP] == pytest.approx((-0.5 / 0.25 + 0.6 / 1.0) / 2)


def test_another_divergence_is_reported_under_its_own_name() -> None:
    values = measure_updates([by_class("forward_kl", mixed=(0.1, -0.5, 0.25))])
    assert (values["loss/forward_kl"], values["loss/forward_kl_mixed"]) == (0.4, 0.4)
    assert names.JSD not in values


def test_measure_probe_reports_shares_and_counts() -> None:
    result = QueryHitComparison(
        num_turns=10,
        student_hit=0.4,
        teacher_hit=0.6,
        num_turns_mixed=5,
        student_hit_mixed=0.2,
        teacher_hit_mixed=0.6,
        num_failed=2,
    )
    assert measure_probe(result) == {
        "probe/student_hit": 0.4,
        "probe/teacher_hit": 0.6,
        "probe/student_hit_mixed": 0.2,
        "probe/teacher_hit_mixed": 0.6,
        "probe/num_turns": 10,
        "probe/num_turns_mixed": 5,
        "probe/num_failed": 2,
    }


def test_measure_probe_without_a_turn_has_no_share() -> None:
    assert measure_probe(QueryHitComparison()) == {
        "probe/num_turns": 0,
        "probe/num_turns_mixed": 0,
        "probe/num_failed": 0,
    }


metrics = st.dictionaries(st.sampled_from(["loss", "kl", "ratio_max"]), st.integers(-9, 9).map(float))


@given(st.lists(metrics, max_size=5))
def test_merge_metrics_sums_by_name_and_takes_maxima(parts: list[dict[str, float]]) -> None:
    merged = merge_metrics(parts)
    assert set(merged) == {name for part in parts for name in part}
    for name, value in merged.items():
        column = [part[name] for part in parts if name in part]
        assert value == (max(column) if name == "ratio_max" else sum(column))


@given(st.lists(metrics, max_size=3), st.lists(metrics, max_size=3))
def test_merging_merged_parts_is_merging_all_of_them(
    left: list[dict[str, float]], right: list[dict[str, float]]
) -> None:
    assert merge_metrics([merge_metrics(left), merge_metrics(right)]) == merge_metrics([*left, *right])


def test_merging_leaves_the_parts_as_they_are() -> None:
    parts = [{"loss": 1.0}, {"loss": 2.0}]
    merge_metrics(parts)
    assert parts == [{"loss": 1.0}, {"loss": 2.0}]
