"""POST /feedback: joined with the answer it is about, counted once, summed up, erased with its user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.feedback_summary import rate
from serving.online import receipts
from tests.app.conftest import Start
from tests.app.test_metrics import read
from tests.app.test_recommend import HISTORY, ask
from tests.app.test_security import digest, sending
from tests.conftest import RedisServer

SECRET = "a secret"


def send(client: TestClient, answer: Any, index: int = 0, event: str = "click", **more: Any) -> Any:
    """Feedback on the item at this index of an answer."""
    body = {"recommendation_id": answer["recommendation_id"], "item_id": answer["items"][index]["item_id"]}
    return client.post("/feedback", json=body | {"event": event} | more)


def kept(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("feedback/feedback-*")) for line in path.open()]


def test_feedback_is_joined_with_its_answer(start: Start, tmp_path: Path) -> None:
    client = start(state_dir=tmp_path, user_hash_key=SECRET)
    answer = ask(client, 4, user_id="u1", history=HISTORY).json()
    assert send(client, answer, 2, value=9.5, time=1e9).json() == {"counted": True, "position": 3, "kept": True}
    assert send(client, answer, 2).json() == {"counted": False, "position": 3, "kept": True}
    unknown = ask(client, user_id="u2", history=[]).json()
    send(client, unknown, 0, "impression")
    first, second = kept(tmp_path)
    assert first == {
        "recommendation_id": answer["recommendation_id"], "user": receipts.user_key("u1", SECRET.encode()),
        "item_id": answer["items"][2]["item_id"], "event": "click", "value": 9.5, "time": 1e9, "position": 3,
        "version": "tiny-0", "source": "model", "steps": 4,
    }  # fmt: skip
    assert (second["source"], second["steps"], second["position"]) == ("popularity", 0, 1)
    assert second["time"] > 1e9 and second["value"] is None


def test_it_is_counted_by_version_source_and_steps_and_summed_up(start: Start) -> None:
    client = start()
    answers = [ask(client, 4, user_id=f"u{number}", history=HISTORY).json() for number in range(4)]
    ask(client, 0, history=HISTORY)
    for answer in answers:
        for index in range(5):
            send(client, answer, index, "impression")
    for index in (0, 1, 1):
        assert send(client, answers[0], index).json()["kept"] is False
    send(client, answers[1], 0, "purchase")
    labels = {"version": "tiny-0", "source": "model", "steps": "4"}
    assert read(client, "streamrec_feedback_total", event="impression", **labels) == 20
    assert read(client, "streamrec_feedback_total", event="click", **labels) == 2
    assert read(client, "streamrec_hits_total", **labels) == 2
    bare, thinking = client.get("/feedback/summary").json()["summaries"]
    assert (bare["reasoning_steps"], bare["recommendations"], bare["click_through_rate"]) == (0, 1, None)
    assert thinking["events"] == {"click": 2, "impression": 20, "purchase": 1}
    assert thinking["recommendations"] == 4 and thinking["hit_rate"]["share"] == 0.5
    clicks = thinking["click_through_rate"]
    assert clicks["share"] == 0.1 and (clicks["low"], clicks["high"]) == pytest.approx((0.0279, 0.3010), abs=1e-4)


def test_a_rate_has_wilsons_interval() -> None:
    def interval(cases: int, of: int) -> Any:
        found = rate(cases, of)
        assert found is not None
        return pytest.approx((found.low, found.high), abs=1e-4)

    # From R: binom::binom.wilson
    assert (0.0, 0.2775) == interval(0, 10) and (0.7225, 1.0) == interval(10, 10)
    assert (0.4038, 0.5962) == interval(50, 100)
    assert rate(0, 0) is None and rate(3, 2) == rate(2, 2)


def test_feedback_on_what_was_not_recommended_is_refused(start: Start) -> None:
    client = start(user_hash_key=SECRET)
    answer = ask(client, history=HISTORY).json()
    other = next(f"i{n}" for n in range(60) if f"i{n}" not in {item["item_id"] for item in answer["items"]})
    forged = receipts.issue("tiny-0", "model", 2, None, ["i1"], b"another secret")
    for wrong, field in (
        ({"item_id": other}, "item_id"), ({"recommendation_id": "x"}, "recommendation_id"),
        ({"recommendation_id": forged, "item_id": "i1"}, "recommendation_id"), ({"event": "wink"}, "event"),
        ({"time": -1}, "time"), ({"value": "9"}, "value"), ({"colour": 1}, "colour"),
    ):  # fmt: skip
        refused = send(client, answer, **wrong)
        assert refused.status_code == 422 and refused.json()["field"] == field
    assert read(client, "streamrec_feedback_total") == 0


def test_feedback_comes_in_time_or_not_at_all(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start(feedback_window_s=100)
    answer = ask(client, history=HISTORY).json()
    now = receipts.read(answer["recommendation_id"]).at
    monkeypatch.setattr("app.routes.feedback.time.time", lambda: now + 101.0)
    assert "too old" in send(client, answer).json()["detail"]
    monkeypatch.setattr("app.routes.feedback.time.time", lambda: now + 99.0)
    assert send(client, answer).status_code == 200


def test_a_version_that_nobody_had_makes_no_metric_of_its_own(start: Start) -> None:
    """Without a secret anybody can make up the id of a recommendation."""
    client = start()
    made_up = {"recommendation_id": receipts.issue("made up", "model", 2, None, ["i1"]), "items": [{"item_id": "i1"}]}
    assert send(client, made_up).status_code == 200
    assert read(client, "streamrec_feedback_total", version="other") == 1
    assert "made up" not in client.get("/metrics").text


def test_replicas_take_feedback_on_each_others_answers_and_count_it_once(
    start: Start, redis_server: RedisServer
) -> None:
    options = {"redis_url": redis_server.url, "redis_store_timeout_ms": 2000, "user_hash_key": SECRET}
    one, other = start(**options), start(**options)
    answer = ask(one, user_id="u1", history=HISTORY).json()
    assert send(other, answer).json() == {"counted": True, "position": 1, "kept": True}
    assert send(one, answer).json()["counted"] is False
    nobody = ask(one, history=HISTORY).json()
    send(one, nobody)
    with redis_server.client() as redis:
        assert redis.xlen("streamrec:feedback") == 2
        assert one.delete("/users/u1").status_code == 204
        [(_, fields)] = redis.xrange("streamrec:feedback")
        assert json.loads(fields[b"record"])["recommendation_id"] == nobody["recommendation_id"]
    redis_server.kill()
    assert send(one, nobody, 1).status_code == 503 and one.delete("/users/u1").status_code == 503


def test_an_erased_user_is_in_no_file(start: Start, tmp_path: Path) -> None:
    client = start(state_dir=tmp_path)
    for user in ("u1", "u2"):
        send(client, ask(client, user_id=user, history=HISTORY).json())
    assert client.delete("/users/u1").status_code == 204
    assert [each["user"] for each in kept(tmp_path)] == [receipts.user_key("u2")]


@pytest.mark.parametrize("kind", ["files", "redis", "nowhere"])
def test_feedback_that_is_kept_is_shown_of_its_user_and_forgotten_with_them(
    start: Start, tmp_path: Path, redis_server: RedisServer, kind: str
) -> None:
    places = {"files": {"state_dir": tmp_path}, "redis": {"redis_url": redis_server.url}, "nowhere": {}}
    client = start(**places[kind], redis_store_timeout_ms=2000, memory_cache_users=0)
    theirs, others = (ask(client, user_id=user, history=[]).json() for user in ("u1", "u2"))
    answers = [send(client, theirs, 0), send(client, theirs, 1), send(client, others)]
    is_kept = kind != "nowhere"
    assert [(each.json()["counted"], each.json()["kept"]) for each in answers] == [(True, is_kept)] * 3

    def shown(user: str) -> int | None:
        answer = client.get(f"/users/{user}")
        return answer.json()["feedback"] if answer.status_code == 200 else None

    assert (shown("u1"), shown("u2"), shown("u3")) == ((2, 1, None) if is_kept else (None, None, None))
    assert client.delete("/users/u1").status_code == 204
    assert (shown("u1"), shown("u2")) == (None, 1 if is_kept else None)
    assert send(client, others).json()["counted"] is False
    again = send(client, theirs, 0).json()
    assert (again["counted"], again["kept"]) == (True, is_kept) and shown("u1") == (1 if is_kept else None)


def test_feedback_needs_a_key_where_keys_are_set(start: Start) -> None:
    client = start(api_keys=digest("key"))
    assert client.post("/feedback", json={}).status_code == client.get("/feedback/summary").status_code == 401
    assert client.get("/feedback/summary", headers=sending("key")).json() == {"summaries": []}
