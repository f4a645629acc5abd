"""A service that learns: people click, the log is read back, the bundle goes on from it and is swapped in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving.bundle import Bundle
from tests.app.test_security import digest, sending
from tests.e2e.conftest import ServiceProcess, StartService
from tests.training.shops import command, write_shop
from tests.training.small import ITEMS
from training.__main__ import main

USERS, CLICKS, STRIDE = 12, 5, 11  # the shop's users went 7 items further every time
LEARN = ("sft.steps=80", "sft.lr=2e-2", "sft.eval_every=40", "sft.warmup=4")


def change(service: ServiceProcess, method: str, route: str, **body: Any) -> Any:
    answer = service.http.request(method, route, headers=sending("admin"), json=body)
    assert answer.is_success, answer.text
    return answer.json()


def ask(service: ServiceProcess, user: str, history: list[str]) -> tuple[str, list[str]]:
    """The id of a recommendation and its items: all that there are, so that any can be clicked."""
    answer = service.recommend(user_id=user, history=history, k=ITEMS, beam_width=ITEMS, exclude_seen=False)
    return answer["recommendation_id"], [item["item_id"] for item in answer["items"]]


def tokens(service: ServiceProcess) -> dict[str, list[int]]:
    found = service.http.get("/items", params={"limit": 100}).json()["items"]
    return {item["item_id"]: item["tokens"] for item in found}


def test_what_people_click_changes_what_they_are_recommended(start_service: StartService, tmp_path: Path) -> None:
    base, state = tmp_path / "base", tmp_path / "state"
    assert main(command("run", write_shop(tmp_path / "shop"), base, "evaluation.dense_weights=[0]", "rl.steps=0")) == 0
    variables = {
        "STREAMREC_MODELS_DIR": str(tmp_path), "STREAMREC_STATE_DIR": str(state), "STREAMREC_RUNTIME": "eager",
        "STREAMREC_ADMIN_KEYS": digest("admin"), "STREAMREC_USER_HASH_KEY": "a secret of sixteen characters or more",
    }  # fmt: skip
    service = start_service(of=base, variables=variables)
    for user in range(USERS):
        path = [f"i{(user + STRIDE * at) % ITEMS}" for at in range(CLICKS + 1)]
        for at in range(CLICKS):
            recommendation, items = ask(service, f"user-{user}", path[: at + 1])
            assert len(items) == ITEMS
            body = {"recommendation_id": recommendation, "item_id": path[at + 1], "event": "click"}
            assert service.http.post("/feedback", json=body).json()["kept"] is True
    change(service, "PUT", "/items/i5", title="Another name")
    history, wanted = [f"i{STRIDE}"], f"i{2 * STRIDE}"
    (_, before), ids = ask(service, "user-0", history), tokens(service)

    update = ["update", "--bundle", str(base), "--data", str(state / "feedback"), "--changes", str(state)]
    assert main([*update, "--out", str(tmp_path / "next"), "--set", *LEARN]) == 0
    assert Bundle.load(tmp_path / "next").catalogue.titles[Bundle.load(base).catalogue.row("i5") or 0] == "Another name"
    version = change(service, "POST", "/models", path="next")["version"]
    change(service, "POST", f"/models/{version}/activate")

    _, after = ask(service, "user-0", history)
    assert after != before and after.index(wanted) < before.index(wanted)
    assert tokens(service) == ids and len(ids) == ITEMS
    assert service.recommend(history=history)["model_version"] == version
