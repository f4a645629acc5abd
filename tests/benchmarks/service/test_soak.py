"""The soak's judgement: what grows is told from what comes and goes."""

from __future__ import annotations

from pathlib import Path

from benchmarks.service.soak import WATCHED, growth, plot


def samples(**grows: float) -> list[dict[str, float]]:
    """A run of forty samples; named quantities grow by so much per sample, the others swing."""
    return [
        {"seconds": 2.0 * n, "requests": 10.0 * n}
        | {name: 50 + 5 * (n % 3) + grows.get(name, 0) * n for name in WATCHED}
        for n in range(40)
    ]


def test_what_comes_and_goes_is_no_growth() -> None:
    assert [row["grew"] for row in growth(samples())] == [False] * len(WATCHED)


def test_what_grows_is_named() -> None:
    for name in WATCHED:
        assert [row["what"] for row in growth(samples(**{name: 0.5})) if row["grew"]] == [name]


def test_the_same_samples_give_the_same_picture(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        plot(samples(), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
