"""How a bundle's defaults are chosen, with measurements that the test makes up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.items import tokenizer
from tests.training.shops import command, write_shop
from tests.training.small import ITEMS, small_config, small_workspace
from training import export
from training.__main__ import main
from training.export import choose
from training.memory import fit_memory
from training.metrics import ndcg, target_ranks

USERS = 40


def measured(shares: dict[tuple[int, float], float]) -> Any:
    """A stand-in for `measure`: that share of users, the first ones, has the target on top; the others nowhere."""

    def measure(
        ranker: Any,
        histories: list[np.ndarray],
        target: np.ndarray,
        steps: int,
        beam: int,
        *,
        exclude_seen: bool,
        events: Any = None,
    ) -> tuple[dict[str, Any], np.ndarray]:
        weight = ranker.settings.dense_weight
        ranked = np.full((len(target), 10), -1)
        ranked[: round(shares[steps, weight] * len(target)), 0] = target[: round(shares[steps, weight] * len(target))]
        value = float(ndcg(target_ranks(ranked, target)).mean())
        return {"steps": steps, "ndcg@10": value, "dense_weight": weight}, ranked

    return measure


@pytest.mark.parametrize(
    ("shares", "steps", "weight"),
    [
        # (steps, dense weight): share of users with a hit
        ({(0, 0): 0.5, (0, 1): 0.4, (1, 0): 0.5, (1, 1): 0.5, (2, 0): 0.5, (2, 1): 0.5}, 0, 0),
        ({(0, 0): 0.4, (0, 1): 0.5, (1, 0): 0.5, (1, 1): 0.5, (2, 0): 0.5, (2, 1): 0.5}, 0, 1),
        # one user more of forty is chance, ten are not
        ({(0, 0): 0.5, (0, 1): 0.4, (1, 0): 0.525, (1, 1): 0.1, (2, 0): 0.1, (2, 1): 0.525}, 0, 0),
        ({(0, 0): 0.5, (0, 1): 0.4, (1, 0): 0.1, (1, 1): 0.75, (2, 0): 0.525, (2, 1): 0.1}, 1, 1),
        # fewer steps, unless more gain again, and by more than chance
        ({(0, 0): 0.5, (0, 1): 0.4, (1, 0): 0.75, (1, 1): 0.1, (2, 0): 0.75, (2, 1): 0.1}, 1, 0),
        ({(0, 0): 0.5, (0, 1): 0.4, (1, 0): 0.75, (1, 1): 0.1, (2, 0): 0.8, (2, 1): 0.1}, 1, 0),
        ({(0, 0): 0.5, (0, 1): 0.4, (1, 0): 0.75, (1, 1): 0.1, (2, 0): 1.0, (2, 1): 0.1}, 2, 0),
        # a loss beyond chance is no reason
        ({(0, 0): 0.9, (0, 1): 0.4, (1, 0): 0.1, (1, 1): 0.1, (2, 0): 0.1, (2, 1): 0.1}, 0, 0),
    ],
)
def test_steps_become_the_default_only_where_their_gain_is_more_than_chance(
    monkeypatch: pytest.MonkeyPatch, shares: dict[tuple[int, float], float], steps: int, weight: float
) -> None:
    monkeypatch.setattr(export, "measure", measured(shares))
    work = small_workspace(small_config("evaluation.dense_candidates=[0]", f"evaluation.choice_users={USERS}"))
    choice = choose(work)
    assert (choice.settings.default_steps, choice.settings.dense_weight) == (steps, weight)
    assert {(row["steps"], row["dense_weight"]) for row in choice.table} == shares.keys()
    assert [row["steps"] for row in choice.accuracy] == [0, 1, 2]
    for row in choice.accuracy:  # of what is served: every number of steps under the weight that was chosen
        assert row["ndcg@10"] == shares[row["steps"], weight] and row["dense_weight"] == weight
        if row["steps"]:
            assert row["gain"] == pytest.approx(row["ndcg@10"] - shares[0, weight], abs=1e-4)
            assert row["gain_low"] <= row["gain"] <= row["gain_high"]
            assert row["detectable"] == pytest.approx(2.8 * (row["gain_high"] - row["gain_low"]) / 3.92, abs=1e-4)
    assert "gain" not in choice.accuracy[0]


@pytest.mark.parametrize(("source", "is_behaviour"), [("text", False), ("both", True), ("collaborative", True)])
def test_a_memory_without_titles_goes_by_what_items_occur_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, is_behaviour: bool
) -> None:
    """Semantic IDs may be made from brands alone, by which items without one are all the same."""
    data, behaviours = write_shop(tmp_path / "shop"), []
    items = [{"item_id": f"i{row}", **({"brand": "B"} if row % 2 else {})} for row in range(ITEMS)]
    (data / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    monkeypatch.setattr(tokenizer, "embed_text", lambda texts, *_: np.array([[not t, 1.0] for t in texts], np.float32))
    monkeypatch.setattr(export, "fit_memory", lambda *given: behaviours.append(given[-1]) or fit_memory(*given))
    settings = ("neighbours.enabled=true", "neighbours.parts=counted", "pretrain.steps=1", "sft.steps=0", "rl.steps=0")
    assert main(command("run", data, tmp_path / "b", f"tokenizer.source={source}", *settings)) == 0
    assert [behaviour is not None for behaviour in behaviours] == [is_behaviour]
