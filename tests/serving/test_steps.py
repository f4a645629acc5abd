"""Which numbers of reasoning steps are worth their time, by gains that the test makes up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serving.bundle import Bundle
from serving.errors import BundleError
from serving.steps import worthwhile_steps
from tests.builders import measured_gains, on_disk, tiny_bundle, tiny_model


@pytest.mark.parametrize(
    ("gains", "worthwhile"),
    [
        # of 1 to 4 steps: the gain and the ends of its interval
        ([(0.003, -0.001, 0.007), (0.0, -0.004, 0.004), (-0.005, -0.009, -0.001), (0.004, 0.0, 0.008)], (0,)),
        ([(0.003, -0.001, 0.007), (0.02, 0.015, 0.025), (0.021, 0.016, 0.026), (0.022, 0.017, 0.027)], (0, 2)),
        ([(0.01, 0.005, 0.015), (0.02, 0.015, 0.025), (0.012, 0.007, 0.017), (0.03, 0.025, 0.035)], (0, 1, 2, 4)),
        ([(0.01, 0.005, 0.015), (0.014, 0.009, 0.019), (0.016, 0.011, 0.021), (0.0, -0.005, 0.005)], (0, 1, 3)),
    ],
)
def test_steps_are_worth_it_where_even_their_least_gain_is_above_that_of_fewer(
    gains: list[tuple[float, float, float]], worthwhile: tuple[int, ...]
) -> None:
    rows = measured_gains(gains)
    assert worthwhile_steps(rows, 4) == worthwhile_steps(rows[::-1], 4) == worthwhile
    assert tiny_model(accuracy=rows).worthwhile_steps == worthwhile
    assert worthwhile_steps(rows, 1) == tuple(steps for steps in worthwhile if steps <= 1)  # no more than there are


def test_where_no_gain_was_measured_nothing_speaks_against_any_number(tmp_path: Path) -> None:
    old: list[dict[str, Any]] = [{"steps": steps, "ndcg@10": 0.1} for steps in range(5)]
    for rows in ([], old):
        assert tiny_model(accuracy=rows).worthwhile_steps == (0, 1, 2, 3, 4)
    assert Bundle.load(tiny_bundle(tmp_path / "old", accuracy=old)).worthwhile_steps == (0, 1, 2, 3, 4)
    assert worthwhile_steps([], 0) == (0,)


def test_what_a_request_may_leave_open() -> None:
    bundle = tiny_model(accuracy=measured_gains([(0.003, -0.001, 0.007), (0.02, 0.015, 0.025)]), default_steps=1)
    assert [bundle.most_steps(requested) for requested in (0, 3, None, "auto")] == [0, 3, 1, 2]


def test_a_gain_that_is_no_number_is_refused_when_the_bundle_is_opened(tmp_path: Path) -> None:
    bundle = tiny_model()
    bundle.accuracy = [{"steps": 1, "gain": 0.1, "gain_low": "0.05"}]
    with pytest.raises(BundleError, match="does not fit together"):
        Bundle.load(on_disk(tmp_path / "bad", bundle))
