"""Charts as coordinates."""

import pytest

from megatron_sdsearch.report.figures import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    Series,
    line_chart,
    nice_ticks,
    stacked_chart,
)


def drawn(chart: Chart | None, index: int = 0) -> list[tuple[float, float]]:
    assert chart is not None
    pairs = chart.coordinates(chart.series[index].points).split()
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.5, 1]),
        (0, 200, [0, 50, 100, 150, 200]),
        (0, 0.013, [0, 0.005, 0.01]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low: float, high: float, expected: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(expected)


def test_a_line_fills_the_frame_from_zero_to_its_highest_value() -> None:
    chart = line_chart("t", [Series(label="a", points=[(0, 0.5), (10, 1.0)])])
    assert chart is not None
    assert drawn(chart) == [(LEFT, (TOP + HEIGHT - BOTTOM) / 2), (WIDTH - RIGHT, TOP)]
    assert chart.y_ticks == [0, 0.5, 1]
    assert chart.x_ticks == [0, 2, 4, 6, 8, 10]


def test_stacked_areas_lie_on_each_other_and_a_missing_step_counts_zero() -> None:
    chart = stacked_chart("t", [Series(label="a", points=[(0, 1), (1, 3)]), Series(label="b", points=[(1, 1)])])
    lower, upper = drawn(chart, 0), drawn(chart, 1)
    bottom = HEIGHT - BOTTOM
    assert [y for _, y in lower[2:]] == [bottom, bottom]
    assert upper[1] == pytest.approx((WIDTH - RIGHT, TOP)), "3 + 1 is the highest"
    assert upper[0] == lower[0], "b adds nothing at step 0"
    assert upper[2:] == [lower[1], lower[0]], "its floor is a's ceiling"


def test_a_single_point_and_flat_zero_curves_are_drawn() -> None:
    for points in ([(3, 0.0)], [(1, 0.0), (2, 0.0)], [(1, -2.0)]):
        chart = line_chart("t", [Series(label="a", points=points)])
        assert all(LEFT <= x <= WIDTH and TOP <= y <= HEIGHT for x, y in drawn(chart))


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart("t", [Series(label="a", points=[])]) is None
    assert stacked_chart("t", []) is None
