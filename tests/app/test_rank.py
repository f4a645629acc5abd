"""POST /rank: the scores of /recommend for given items, by the same rules of the house."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serving.engine import Engine
from serving.errors import Overloaded
from tests.answers import assert_same_answer
from tests.app.conftest import Gate, ShapedEngine, Start
from tests.app.test_checks import JSON, ask_without_a_body
from tests.app.test_recommend import HISTORY, ask, ids
from tests.waiting import DEADLINE, eventually

EVERY = [f"i{row}" for row in range(60)]


def rank(client: TestClient, items: Sequence[str], steps: object = None, **body: Any) -> Any:
    query = {} if steps is None else {"reasoning_steps": str(steps)}
    return client.post("/rank", params=query, json={"items": list(items), **body})


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("paths", [1, 4])
def test_items_have_the_scores_and_the_order_of_a_recommendation(
    start: Start, engine: ShapedEngine, mixed_engine: Engine, steps: int, paths: int
) -> None:
    """With memory mixture and dense weight, on one path and on several."""
    engine.inner, engine.bundle = mixed_engine, mixed_engine.bundle
    client, same = start(), {"history": HISTORY, "reasoning_paths": paths, "dense_weight": 0.4}
    whole = ask(client, steps, **same, k=60, beam_width=60, exclude_seen=False).json()
    ranked = rank(client, EVERY, steps, **same).json()
    assert_same_answer(ranked["items"], whole["items"])
    some = [item for item in whole["items"] if item["item_id"] in {"i1", "i7", "i30", "i59"}]
    assert_same_answer(rank(client, ["i59", "i7", "i1", "i30"], steps, **same).json()["items"], some)
    for name in ("source", "reasoning_steps", "reasoning_paths", "model_version", "unknown_items"):
        assert ranked[name] == whole[name]
    assert ranked["beam_width"] == 0 and ranked["timings_ms"]["decode"] > 0


def test_a_narrow_beam_hides_nothing_from_a_ranking(client: TestClient) -> None:
    narrow = ask(client, 1, history=HISTORY, k=3, beam_width=3).json()["items"]
    last = rank(client, EVERY, 1, history=HISTORY).json()["items"][-1]
    again = rank(client, [last["item_id"], *(item["item_id"] for item in narrow)], 1, history=HISTORY).json()["items"]
    assert_same_answer(again, [*narrow, last])


def test_every_item_is_ranked_once_or_reported(client: TestClient, engine: ShapedEngine) -> None:
    body = rank(client, ["i5", "x", "i6", "i5", "i1"], history=["i1", "y"]).json()
    assert sorted(item["item_id"] for item in body["items"]) == ["i1", "i5", "i6"]  # seen ones too
    assert body["unknown_items"] == ["y", "x"]
    nothing = rank(client, ["x"], history=HISTORY).json()
    assert (nothing["items"], nothing["unknown_items"], nothing["source"]) == ([], ["x"], "model")
    listed = engine.bundle.catalogue.listed
    listed[6] = False
    try:
        gone = rank(client, ["i6", "i5"], history=HISTORY).json()
    finally:
        listed[6] = True
    assert [item["item_id"] for item in gone["items"]] == ["i5"] and gone["unknown_items"] == ["i6"]


def test_a_user_of_whom_nothing_is_known_gets_them_by_popularity(client: TestClient, engine: ShapedEngine) -> None:
    found = rank(client, EVERY[:9], user_id="new")
    popularity = engine.bundle.catalogue.popularity
    assert found.json()["source"] == "popularity"
    assert ids(found) == [f"i{row}" for row in sorted(range(9), key=lambda row: -popularity[row])]


def test_a_known_history_and_its_cached_state_serve_both(client: TestClient, engine: ShapedEngine) -> None:
    client.post("/users/u/events", json={"items": HISTORY})
    recommended = ask(client, 2, user_id="u", k=60, beam_width=60).json()
    encoded = engine.encoded
    ranked = rank(client, [item["item_id"] for item in recommended["items"]], 2, user_id="u").json()
    assert ranked["cache"] == "memory" and engine.encoded == encoded
    assert_same_answer(ranked["items"], recommended["items"])


def test_lists_of_similar_length_share_a_batch_and_searches_do_not(client: TestClient, engine: ShapedEngine) -> None:
    engine.before = gate = Gate()
    calls = [(rank, EVERY[:20]), (rank, EVERY[20:57]), (ask, None), (rank, EVERY[40:41])]
    alone = []
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, client, 0, history=["i9"])
        assert gate.reached.wait(DEADLINE)
        asked = [
            pool.submit(call, client, *(() if items is None else (items,)), steps=2, history=HISTORY)
            for call, items in calls
        ]
        eventually(lambda: client.app.state.service.batcher.depth == 4)  # type: ignore[attr-defined]
        gate.opened.set()
        assert first.result().status_code == 200
        together = [each.result().json()["items"] for each in asked]
    assert sorted(len(batch) for batch in engine.searched[-2:]) == [1, 3]
    for call, items in calls:
        alone.append(call(client, *(() if items is None else (items,)), steps=2, history=HISTORY).json()["items"])
    for ours, theirs in zip(together, alone, strict=True):
        assert_same_answer(ours, theirs)


def test_an_explanation_has_the_parts_of_every_ranked_item(client: TestClient) -> None:
    body = rank(client, EVERY[10:14], 2, history=HISTORY, explain=True, dense_weight=0.5).json()
    for item, part in zip(body["items"], body["explanation"]["items"], strict=True):
        assert part["item_id"] == item["item_id"]
        total = sum(part["token_log_probabilities"]) + 0.5 * part["dense_score"]
        assert item["score"] == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "items"),
        ({"items": []}, "items"),
        ({"items": ["i1"] * 1001}, "items"),
        ({"items": [1]}, "items.0"),
        ({"items": ["i1"], "k": 3}, "k"),
        ({"items": ["i1"], "deny": []}, "deny"),
        ({"items": ["i1"], "timeout_ms": 0}, "timeout_ms"),
    ],
)
def test_a_body_that_does_not_fit_is_422_and_names_the_field(
    shared: TestClient, body: dict[str, Any], field: str
) -> None:
    refused = shared.post("/rank", json=body)
    assert refused.status_code == 422 and refused.json()["field"] == field


def test_steps_are_checked_and_chosen_as_for_a_recommendation(shared: TestClient) -> None:
    assert rank(shared, ["i5"], 5, history=HISTORY).json()["field"] == "reasoning_steps"
    assert rank(shared, ["i5"], "auto", history=HISTORY).json()["reasoning_steps"] == 4
    assert rank(shared, ["i5"], history=HISTORY).json()["reasoning_steps"] == 2
    assert rank(shared, EVERY * 16, history=HISTORY).status_code == 200


def test_ranking_takes_work_from_the_quota_by_its_items(start: Start) -> None:
    client = start(work_quota="400/hour")
    assert rank(client, EVERY, 1, history=HISTORY).status_code == 200  # 64 * 2
    assert rank(client, EVERY[:3], 3, history=HISTORY).status_code == 200  # 64 * 4
    assert rank(client, EVERY[:3], 0, history=HISTORY).status_code == 429


def test_a_full_queue_refuses_before_a_body_is_read(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def decide(demand: object = None, client: str = "") -> None:
        raise Overloaded("The queue is full; try again later.", 2.3)

    monkeypatch.setattr(client.app.state.service.admission, "decide", decide)  # type: ignore[attr-defined]
    assert ask_without_a_body(client, "POST", "/rank", JSON) == (503, False)
    text = client.get("/metrics").text
    assert 'streamrec_request_seconds_count{route="/rank",status="503"} 1.0' in text
