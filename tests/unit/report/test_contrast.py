"""Stretches of steps that taught nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from megatron_sdsearch.report.contrast import contrast_warnings

NO_CONTRAST = "No group had contrast in {}: "
NO_GRADIENT = "The gradient norm was 0 in {}: "


def rows_of(shares: Sequence[float | None], norms: Sequence[float | None] = ()) -> list[dict[str, Any]]:
    values = {"train/share_mixed": shares, "loss/grad_norm": norms or (None,) * len(shares)}
    return [
        {"step": step, **{name: column[step - 1] for name, column in values.items() if column[step - 1] is not None}}
        for step in range(1, len(shares) + 1)
    ]


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ([0.5, 0.0, 0.0, 0.0, 0.25], "steps 2-4"),
        ([0.0, 0.0, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0], "steps 1-3, 5-8"),
        ([0.0, 0.0], "steps 1-2"),
        ([0.0], "step 1"),
        ([0.0, None, 0.0, 0.0, 0.5], "steps 1-4"),
    ],
)
def test_stretches_without_contrast_are_named(shares: list[float | None], told: str) -> None:
    (warning,) = contrast_warnings(rows_of(shares))
    assert warning.startswith(NO_CONTRAST.format(told))


@pytest.mark.parametrize("shares", [[], [None], [0.25, 1.0], [0.5, 0.0, 0.0, 0.5], [1e-9] * 4])
def test_contrast_or_a_step_or_two_of_chance_are_no_warning(shares: list[float | None]) -> None:
    assert contrast_warnings(rows_of(shares)) == []


def test_a_gradient_of_zero_has_a_warning_of_its_own() -> None:
    without, with_contrast = [0.0] * 4, [0.5] * 4
    first, second = contrast_warnings(rows_of(without, [0.0] * 4))
    assert first.startswith(NO_CONTRAST.format("steps 1-4"))
    assert second.startswith(NO_GRADIENT.format("steps 1-4"))
    (only,) = contrast_warnings(rows_of(with_contrast, [1.0, 0.0, 0.0, 0.0]))
    assert only.startswith(NO_GRADIENT.format("steps 2-4"))
