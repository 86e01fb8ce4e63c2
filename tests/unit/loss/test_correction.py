"""The correction of what the engine sampled, and its statistics, against a float64 oracle in plain formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_sdsearch.batching.packing import Microbatch
from megatron_sdsearch.config import ObjectiveConfig
from megatron_sdsearch.loss.grpo import LARGE_GAP, agreement, importance_weights
from megatron_sdsearch.loss.objective import sd_search_loss
from megatron_sdsearch.loss.rows import RowLogits
from megatron_sdsearch.parallel.vocab import VocabShard
from megatron_sdsearch.training.policy import merge_metrics, read_metrics

N, VOCAB, CAP = 40, 11, 1.5


class Batch:
    """N tokens whose policy, old policy, engine and reference all disagree somewhat."""

    def __init__(self, seed: int = 0, spread: float = 0.5) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        self.logits = normal(N, VOCAB).requires_grad_()
        self.labels = torch.randint(VOCAB, (N,), generator=random)
        now = self.logits.detach().log_softmax(-1).gather(1, self.labels[:, None])[:, 0]
        self.old, self.ref = now + 0.1 * normal(N), now + 0.3 * normal(N)
        self.rollout = self.old + spread * normal(N)
        self.advantages, self.weights = normal(N), torch.full((N,), 1 / N, dtype=torch.float64)

    @property
    def on_demand(self) -> RowLogits:
        shard = VocabShard.whole(VOCAB)
        return RowLogits(hidden=self.logits, project=lambda h: h, shard=shard, chunk_rows=7, temperature=1.0)

    def microbatch(self, part: slice = slice(None), rollout: Tensor | None = None) -> Microbatch:
        """All N tokens, of which those in ``part`` are the policy's."""
        mask, none = torch.zeros(N, dtype=torch.bool), torch.zeros(N, dtype=torch.bool)
        mask[part] = True
        return Microbatch(
            token_ids=self.labels,
            labels=self.labels,
            position_ids=torch.arange(N),
            cu_seqlens=torch.tensor([0, N]),
            max_seqlen=N,
            loss_mask=mask,
            distill_mask=none,
            rollout_logprobs=self.rollout if rollout is None else rollout,
            advantages=self.advantages,
            policy_weights=self.weights,
            distill_weights=torch.zeros_like(self.weights),
            group_classes=torch.zeros_like(self.labels),
        )

    def run(
        self, correction: str, *, part: slice = slice(None), **changes: Any
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Loss, gradient and metrics of the tokens in ``part``."""
        config = ObjectiveConfig(
            importance_correction=correction,  # type: ignore[arg-type]
            importance_cap=CAP,
            kl_coef=0.3,
            entropy_coef=0.2,
        )
        columns = {"rollout": self.rollout, "old": self.old} | changes
        loss, metrics = sd_search_loss(
            self.on_demand,
            self.microbatch(part, columns["rollout"]),
            config,
            old_logprobs=None if columns["old"] is None else columns["old"][part],
            ref_logprobs=self.ref[part],
        )
        (gradient,) = torch.autograd.grad(loss, self.logits)
        return loss.detach(), gradient, read_metrics([metrics])[0]


def oracle(batch: Batch, correction: str) -> tuple[Tensor, Tensor, float]:
    """Loss, gradient and the share of cut tokens, from the formulas."""
    logp = batch.logits.log_softmax(-1)
    chosen = logp[torch.arange(N), batch.labels]
    r = torch.exp(batch.old - batch.rollout)
    cut = (r > CAP) | ((r < 1 / CAP) if correction == "mask" else torch.zeros(N, dtype=torch.bool))
    w = torch.where(cut, torch.full_like(r, CAP if correction == "truncate" else 0.0), r)
    ratio, a = torch.exp(chosen - batch.old), batch.advantages
    surrogate = w * torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
    k3 = torch.exp(batch.ref - chosen) - (batch.ref - chosen) - 1
    loss = (-surrogate + 0.3 * k3 + 0.2 * (logp.exp() * logp).sum(-1)).sum() / N
    return loss.detach(), torch.autograd.grad(loss, batch.logits)[0], float(cut.double().mean())


@pytest.mark.parametrize("correction", ["truncate", "mask"])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_gradient_and_share_are_the_oracle_s(correction: str, seed: int) -> None:
    batch = Batch(seed)
    loss, gradient, metrics = batch.run(correction)
    expected_loss, expected_gradient, share = oracle(batch, correction)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)
    assert 0.1 < share < 0.9, "the case must cut some tokens and keep some"
    assert metrics["importance_cut_share"] == pytest.approx(share)


def test_without_a_second_update_the_ratio_is_that_of_this_very_pass_and_a_constant() -> None:
    batch = Batch()
    now = batch.logits.detach().log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]
    torch.testing.assert_close(batch.run("truncate", old=None)[1], batch.run("truncate", old=now)[1])


@pytest.mark.parametrize("old", ["given", "this pass"])
@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_an_engine_that_agrees_exactly_changes_no_bit(correction: str, old: str) -> None:
    batch = Batch()
    exact = batch.logits.detach().log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]
    if old == "this pass":  # as the loss itself computes it, to the bit
        exact = batch.on_demand.logprobs(batch.microbatch()).detach()
    changes: dict[str, Any] = {"rollout": exact, "old": exact if old == "given" else None}
    plain, corrected = batch.run("none", **changes), batch.run(correction, **changes)
    assert torch.equal(plain[0], corrected[0])
    assert torch.equal(plain[1], corrected[1])
    assert corrected[2] == plain[2] | {"importance_cut_share": 0.0}
    assert plain[2]["rollout_gap_max"] == 0.0


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 99), st.integers(0, N), st.sampled_from(["none", "truncate", "mask"]))
def test_microbatches_add_up_and_maxima_are_maxima(seed: int, border: int, correction: str) -> None:
    """A masked token changes no denominator: the halves know nothing of each other."""
    batch = Batch(seed)
    whole, parts = batch.run(correction), [batch.run(correction, part=p) for p in (slice(border), slice(border, N))]
    merged = merge_metrics([metrics for _, _, metrics in parts])
    assert merged == pytest.approx(whole[2], abs=1e-12)
    torch.testing.assert_close(parts[0][1] + parts[1][1], whole[1])


def test_agreement_by_hand() -> None:
    old = torch.tensor([-1.0, -2.0, -3.0, -1.0], dtype=torch.float64)
    gaps = torch.tensor([0.0, 0.5, -0.2, 0.05], dtype=torch.float64)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    assert LARGE_GAP == 0.1
    assert read_metrics([agreement(old, old - gaps, weights)])[0] == pytest.approx(
        {
            "rollout_gap": 0.3 * 0.5 + 0.2 * 0.2 + 0.1 * 0.05,
            "rollout_gap_max": 0.5,
            "rollout_gap_share": 0.5,
            "rollout_k3": sum(w * (math.exp(g) - g - 1) for w, g in zip(weights.tolist(), gaps.tolist(), strict=True)),
        }
    )


def test_the_bounds_of_the_mask_are_inside_and_both_corrections_forget_the_gradient() -> None:
    old = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0], requires_grad=True)
    rollout = torch.tensor([0.0, 0.6, -0.6, 5.0, -500.0])  # ratios 1, 0.55, 1.82, 0.0067 and one that would overflow
    for correction, expected, cut in (
        ("truncate", [1.0, math.exp(-0.6), math.exp(0.6), math.exp(-5.0), 2.0], [False] * 4 + [True]),
        ("mask", [1.0, math.exp(-0.6), math.exp(0.6), 0.0, 0.0], [False] * 3 + [True] * 2),
    ):
        weights, is_cut = importance_weights(old, rollout, correction, 2.0)  # type: ignore[arg-type]
        assert weights is not None
        assert not weights.requires_grad
        assert weights.tolist() == pytest.approx(expected)
        assert is_cut.tolist() == cut


def test_no_tokens_have_no_gap() -> None:
    none = torch.empty(0)
    assert set(read_metrics([agreement(none, none, none)])[0].values()) == {0.0}
