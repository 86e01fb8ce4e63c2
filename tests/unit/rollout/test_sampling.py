"""Random streams and draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_sdsearch.records import TrajectoryId
from megatron_sdsearch.rollout.sampling import sample_tokens, uniforms


def _id(sibling: int = 0, question_id: str = "q", step: int = 0) -> TrajectoryId:
    return TrajectoryId(step=step, question_id=question_id, sibling=sibling)


def _draw(logits: torch.Tensor, u: list[float], temperature: float = 1.0, top_p: float = 1.0) -> list[int]:
    n = len(u)
    ids, _ = sample_tokens(logits.expand(n, -1), np.full(n, temperature), np.full(n, top_p), np.array(u))
    return ids.tolist()  # type: ignore[no-any-return]


def test_the_number_at_a_position_does_not_depend_on_where_the_call_starts() -> None:
    whole = uniforms(1, _id(), 0, 50)
    np.testing.assert_array_equal(uniforms(1, _id(), 20, 50), whole[20:])
    assert whole.min() >= 0.0
    assert whole.max() < 1.0


def test_every_part_of_the_key_gives_another_stream() -> None:
    keys = [(1, _id()), (2, _id()), (1, _id(sibling=1)), (1, _id(question_id="r")), (1, _id(step=1))]
    first = {float(uniforms(seed, trajectory_id, 0, 1)[0]) for seed, trajectory_id in keys}
    assert len(first) == len(keys)


def test_the_stream_is_the_same_on_every_machine() -> None:
    assert uniforms(1, _id(), 0, 2).tolist() == [0.560619438954301, 0.42164285259699974]


def test_inverse_cdf_takes_the_id_whose_interval_holds_the_number() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).log()
    assert _draw(logits, [0.0, 0.49, 0.51, 0.74, 0.76, 1.0 - 2.0**-53]) == [0, 0, 1, 1, 3, 3]


def test_draws_follow_the_distribution() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 6)
    u = (np.arange(4000) + 0.5) / 4000
    share = np.bincount(_draw(logits, u.tolist(), temperature=0.7), minlength=6) / 4000
    np.testing.assert_allclose(share, (logits[0] / 0.7).softmax(-1).numpy(), atol=1e-3)


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass_and_logprobs_are_before_it() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.4]]).log()
    assert _draw(logits, [0.0, 0.54, 0.56, 0.99], top_p=0.9) == [1, 1, 2, 2]
    assert _draw(logits, [0.0, 0.99], top_p=1e-6) == [1, 1]
    _, logprobs = sample_tokens(logits, np.ones(1), np.array([0.5]), np.array([0.3]))
    assert logprobs[0] == pytest.approx(np.log(0.5))


def test_rows_of_different_temperature_do_not_mix() -> None:
    logits = torch.tensor([[0.1, 0.6, 0.3]]).log().expand(3, -1)
    ids, logprobs = sample_tokens(logits, np.array([0.0, 1.0, 0.5]), np.ones(3), np.array([0.99, 0.99, 0.0]))
    assert ids.tolist() == [1, 2, 0]
    np.testing.assert_allclose(np.exp(logprobs), [0.6, 0.3, 0.01 / 0.46], rtol=1e-6)
