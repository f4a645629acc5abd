"""The verdict of the soak: growth is reported, swings are not."""

from __future__ import annotations

from benchmarks.service.soak import WATCHED, growth


def samples(**grows: float) -> list[dict[str, float]]:
    """A run of forty samples, in which the given quantities grow by so much per sample and the others swing."""
    return [
        {"seconds": 2.0 * n, "requests": 10.0 * n}
        | {name: 50 + 5 * (n % 3) + grows.get(name, 0) * n for name in WATCHED}
        for n in range(40)
    ]


def test_a_swing_is_no_growth() -> None:
    assert [row["grew"] for row in growth(samples())] == [False] * len(WATCHED)


def test_fewer_for_a_moment_is_no_growth_afterwards() -> None:
    """As when Redis has just dropped all connections."""
    run = samples()
    run[15] |= {"open_files": 35, "tasks": 10}
    assert [row["grew"] for row in growth(run)] == [False] * len(WATCHED)


def test_growth_is_reported_by_name() -> None:
    for name in WATCHED:
        assert [row["what"] for row in growth(samples(**{name: 0.5})) if row["grew"]] == [name]
