"""The clipped policy loss, against hand-computed numbers and closed-form gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sdsearch.loss.grpo import grpo_loss


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logs(*ratios: float) -> Tensor:
    return tensor(*ratios).log()


def gradient(policy: Tensor, **arguments: Tensor | float) -> tuple[dict[str, Tensor], list[float]]:
    policy = policy.clone().requires_grad_()
    zeros, ones = torch.zeros_like(policy), torch.ones_like(policy)
    defaults = {"old_logprobs": zeros.detach(), "advantages": ones.detach(), "weights": ones.detach()}
    loss, terms = grpo_loss(policy, **(defaults | arguments))  # type: ignore[arg-type]
    loss.backward()
    assert policy.grad is not None
    return terms | {"loss": loss}, policy.grad.tolist()


def test_on_policy_gradient_is_weight_times_advantage() -> None:
    terms, grad = gradient(tensor(0, 0, 0), advantages=tensor(1, -2, 0.5), weights=tensor(0.25, 0.25, 0.5))
    assert grad == pytest.approx([-0.25, 0.5, -0.25])
    assert terms["policy_loss"].item() == pytest.approx(-(0.25 - 0.5 + 0.25))
    assert (terms["clip_fraction"].item(), terms["old_kl"].item()) == (0.0, 0.0)


def test_clip_cuts_the_gradient_on_the_greedy_side_only() -> None:
    ratios, advantages = logs(1.5, 0.5, 1.5, 0.5, 1.25), tensor(1, -1, -1, 1, 1)
    terms, grad = gradient(ratios, advantages=advantages, weights=tensor(*[0.2] * 5), clip_low=0.2, clip_high=0.3)
    assert grad == pytest.approx([0, 0, 0.2 * 1.5, -0.2 * 0.5, -0.2 * 1.25])
    assert terms["policy_loss"].item() == pytest.approx(-0.2 * (1.3 - 0.8 - 1.5 + 0.5 + 1.25))
    assert terms["clip_fraction"].item() == pytest.approx(0.4)


def test_reference_term_is_k3_of_policy_to_reference() -> None:
    reference, policy = logs(0.5, 0.2), logs(0.25, 0.4)
    terms, grad = gradient(
        policy,
        old_logprobs=policy,
        advantages=tensor(0, 0),
        weights=tensor(0.5, 0.5),
        ref_logprobs=reference,
        kl_coef=2.0,
    )
    k3 = [2 - math.log(2) - 1, 0.5 - math.log(0.5) - 1]
    assert terms["kl"].item() == pytest.approx(0.5 * sum(k3))
    assert terms["loss"].item() == pytest.approx(2.0 * 0.5 * sum(k3))
    assert grad == pytest.approx([2.0 * 0.5 * (1 - 2), 2.0 * 0.5 * (1 - 0.5)])


def test_k3_is_exact_in_expectation() -> None:
    policy, reference = logs(0.7, 0.2, 0.1), logs(0.3, 0.3, 0.4)
    weights = policy.exp()
    terms, _ = gradient(policy, old_logprobs=policy, weights=weights, ref_logprobs=reference)
    assert terms["kl"].item() == pytest.approx((weights * (policy - reference)).sum().item())


def test_old_kl_is_the_divergence_of_the_policy_from_the_old_one() -> None:
    old, policy = logs(0.7, 0.2, 0.1), logs(0.3, 0.3, 0.4)
    terms, _ = gradient(policy, old_logprobs=old, weights=old.exp())
    assert terms["old_kl"].item() == pytest.approx((old.exp() * (old - policy)).sum().item())


def test_entropy_is_a_bonus_with_its_own_gradient() -> None:
    entropy = tensor(2.0, 1.0).requires_grad_()
    terms, _ = gradient(
        tensor(0, 0), advantages=tensor(0, 0), weights=tensor(0.5, 0.5), entropy=entropy, entropy_coef=0.1
    )
    assert terms["entropy"].item() == pytest.approx(1.5)
    assert terms["loss"].item() == pytest.approx(-0.15)
    assert entropy.grad is not None
    assert entropy.grad.tolist() == pytest.approx([-0.05, -0.05])


def test_only_the_policy_and_the_entropy_receive_gradients() -> None:
    constants = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    policy = torch.zeros(2, requires_grad=True)
    loss, terms = grpo_loss(policy, constants[0], torch.ones(2), torch.ones(2), ref_logprobs=constants[1], kl_coef=1.0)
    loss.backward()
    assert policy.grad is not None
    assert [constant.grad for constant in constants] == [None, None]
    assert not any(term.requires_grad for term in terms.values())


@pytest.mark.parametrize("log_ratio", [-1e4, -200.0, 200.0, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_runaway_ratios_stay_finite_in_fp32(log_ratio: float, advantage: float) -> None:
    policy = torch.tensor([log_ratio, 0.0], requires_grad=True)
    zeros, half = torch.zeros(2), torch.full((2,), 0.5)
    loss, terms = grpo_loss(policy, zeros, half * 2 * advantage, half, ref_logprobs=zeros, kl_coef=0.001)
    loss.backward()
    assert all(bool(term.isfinite()) for term in (loss, *terms.values()))
    assert policy.grad is not None
    assert bool(policy.grad.isfinite().all())


def test_a_policy_far_above_the_reference_is_still_pulled_back() -> None:
    _, grad = gradient(tensor(30), old_logprobs=tensor(30), advantages=tensor(0), ref_logprobs=tensor(0), kl_coef=1.0)
    assert grad == pytest.approx([1.0])


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.floats(-2, 2)), min_size=2, max_size=12))
def test_shares_of_microbatches_add_up(tokens: list[tuple[float, float, float]]) -> None:
    policy, old, advantages = torch.tensor(tokens, dtype=torch.float64).T
    weights = torch.full_like(policy, 1 / len(tokens))

    def run(part: slice) -> dict[str, Tensor]:
        columns = (policy[part], old[part], advantages[part], weights[part])
        loss, terms = grpo_loss(*columns, ref_logprobs=old[part], kl_coef=0.1)
        return terms | {"loss": loss}

    whole, parts = run(slice(None)), [run(slice(1)), run(slice(1, None))]
    for name, value in whole.items():
        total = sum(part[name].item() for part in parts)
        assert value.item() == pytest.approx(total, abs=1e-12)


def test_no_tokens_give_zero_with_a_gradient_path() -> None:
    policy = torch.empty(0, requires_grad=True)
    loss, _ = grpo_loss(policy, torch.empty(0), torch.empty(0), torch.empty(0))
    loss.backward()
    assert loss.item() == 0
    assert policy.grad is not None


def test_bf16_is_computed_in_fp32() -> None:
    low = torch.zeros(3, dtype=torch.bfloat16)
    assert grpo_loss(low, low, low, low)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantages": torch.zeros(2, 1)}, r"advantages must be \[2\], got \[2, 1\]"),
        ({"weights": torch.zeros(3)}, r"weights must be \[2\]"),
        ({"policy_logprobs": torch.zeros(1, 2)}, r"policy_logprobs must be \[N\]"),
        ({"importance_weights": torch.zeros(1)}, r"importance_weights must be \[2\], got \[1\]"),
        ({"clip_low": 1.0}, "clip_low must be in"),
        ({"clip_low": -0.1}, "clip_low must be in"),
        ({"clip_high": math.nan}, "clip_high must be at least 0"),
        ({"kl_coef": 0.1}, "kl_coef is 0.1, which needs ref_logprobs"),
        ({"entropy_coef": 0.1}, "entropy_coef is 0.1, which needs entropy"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, Tensor | float], message: str) -> None:
    names = ("policy_logprobs", "old_logprobs", "advantages", "weights")
    with pytest.raises(ValueError, match=message):
        grpo_loss(**({name: torch.zeros(2) for name in names} | changes))  # type: ignore[arg-type]
