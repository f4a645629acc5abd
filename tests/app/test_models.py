"""Models change while the service runs: loaded, activated, rolled back, retired; and who is answered by which."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from serving import sample
from serving.engine import Engine
from serving.items.catalogue import Catalogue
from serving.types import Request, Rules
from tests.answers import assert_same_answer
from tests.app.conftest import ShapedEngine, Start, ready, settings
from tests.app.test_metrics import read
from tests.app.test_recommend import HISTORY, ask, with_ids
from tests.app.test_security import digest, sending
from tests.builders import on_disk, tiny_model
from tests.conftest import RedisServer
from tests.waiting import eventually

ADMIN = sending("admin")
BASE = "tiny-0"  # the version of the tests' engine


@pytest.fixture(scope="module")
def engines(real_engine: Engine) -> dict[int, Engine]:
    """By the seed of the model: what each of them has to answer."""
    made = {0: real_engine}
    for seed in (1, 2):
        bundle = tiny_model(neighbours=True, seed=seed)
        made[seed] = Engine(bundle)
        bundle.sample = sample.record_sample(made[seed], [[1, 2, 3], [4], [5, 6]])
    return made


@pytest.fixture(scope="module")
def shelf(engines: dict[int, Engine], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundles `1` and `2`."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (1, 2):
        on_disk(folder / str(seed), engines[seed].bundle)
    return folder


@pytest.fixture
def begin(start: Start, shelf: Path) -> Start:
    return lambda **values: start(
        **{"models_dir": shelf, "runtime": "eager", "api_keys": "", "admin_keys": digest("admin")} | values
    )


def send(client: TestClient, method: str, path: str, **more: Any) -> Any:
    return client.request(method, path, headers=ADMIN, **more)


def add(client: TestClient, path: str) -> str:
    """Loads a bundle; returns its version."""
    answer = send(client, "POST", "/models", json={"path": path})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["version"])


def activate(client: TestClient, version: str) -> None:
    answer = send(client, "POST", f"/models/{version}/activate")
    assert answer.status_code == 200 and answer.json()["active"], answer.text


def active(client: TestClient) -> list[str]:
    return [model["version"] for model in client.get("/models").json()["models"] if model["active"]]


def expected(engine: Engine, rows: Sequence[int] = (1, 2, 3), steps: int = 2) -> list[tuple[str, float]]:
    """What the model answers to the history, with the defaults of the service."""
    request = Request(tuple(rows), 10, 50, steps, Rules(exclude=tuple(rows)))
    return with_ids(engine.search([request], engine.encode([rows]))[0])


# One after the other


def test_an_item_is_shown_as_the_model_has_it_that_it_was_put_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though another one becomes active, with other rows, before the answer is written."""
    on_disk(tmp_path / "small", tiny_model(20, seed=3))
    values = settings(models_dir=tmp_path, runtime="eager", admin_keys=digest("admin"))
    app = create_app(values, Engine(tiny_model()))
    with TestClient(app, raise_server_exceptions=False) as client:
        service, portal = ready(client).app.state.service, client.portal  # type: ignore[attr-defined]
        assert portal is not None
        small, make, find = add(client, "small"), service.changes.make, Catalogue.find_titles

        async def and_activate(kind: str, entries: Sequence[Any]) -> list[Any]:
            results: list[Any] = await make(kind, entries)
            await make("model", [service.models.activation(small)])
            return results

        def find_and_activate(*arguments: Any) -> list[int]:
            found = find(*arguments)
            portal.call(make, "model", [service.models.activation(small)])
            return found

        with monkeypatch.context() as patch:
            patch.setattr(service.changes, "make", and_activate)
            one = send(client, "PUT", "/items/i40", json={"title": "Forty"})
            assert active(client) == [small]
            assert one.status_code == 200 and (one.json()["item_id"], one.json()["title"]) == ("i40", "Forty")
            portal.call(make, "model", [service.models.activation(BASE)])
            items = [{"item_id": "i50", "title": "Fifty"}, {"item_id": "i3", "title": "Three"}]
            many = send(client, "POST", "/items", json={"items": items}).json()["results"]
            assert [(item["item_id"], item["title"]) for item in many] == [("i50", "Fifty"), ("i3", "Three")]
            tokens = tiny_model().catalogue.tokens[[40, 50, 3]].tolist()
            assert [one.json()["tokens"], *(item["tokens"] for item in many)] == tokens
        portal.call(make, "model", [service.models.activation(BASE)])
        monkeypatch.setattr(Catalogue, "find_titles", find_and_activate)
        found = client.get("/items?query=fifty")
        assert active(client) == [small] and [item["item_id"] for item in found.json()["items"]] == ["i50"]


def test_a_model_is_loaded_beside_activated_and_rolled_back(begin: Start, engines: dict[int, Engine]) -> None:
    client = begin()
    assert ask(client, history=HISTORY).json()["model_version"] == BASE
    version = add(client, "1")
    assert version.startswith("tiny-") and active(client) == [BASE]
    both = client.get("/models").json()["models"]
    assert [model["version"] for model in both] == [BASE, version] and all(model["cost"] for model in both)
    assert add(client, "1") == version  # it is there already
    for chosen, engine in ((version, engines[1]), (BASE, engines[0]), (version, engines[1])):
        activate(client, chosen)
        answer = ask(client, history=HISTORY, user_id="u").json()
        assert (answer["model_version"], active(client)) == (chosen, [chosen])
        assert_same_answer(answer["items"], expected(engine))
        assert read(client, "streamrec_model_info", version=chosen) == 1
    assert read(client, "streamrec_model_info", version=BASE) == 0
    assert read(client, "streamrec_recommendations_total", version=version, source="model", steps="2") == 2
    assert read(client, "streamrec_recommendation_seconds_count", version=BASE) == 2


def test_under_load_no_request_fails_or_mixes_versions(begin: Start, engines: dict[int, Engine]) -> None:
    client = begin()
    answers = {BASE: expected(engines[0]), add(client, "1"): expected(engines[1])}
    stop, seen = threading.Event(), Counter[str]()

    def keep_asking(number: int) -> None:
        while not stop.is_set():
            answer = ask(client, history=HISTORY, user_id=f"u{number}")
            assert answer.status_code == 200, answer.text
            version = answer.json()["model_version"]
            assert_same_answer(answer.json()["items"], answers[version])
            seen[version] += 1

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(4)]
        try:
            for _ in range(5):
                for version in reversed(answers):
                    activate(client, version)
                    before = seen[version]
                    eventually(lambda: seen[version] > before + 4 or any(each.done() for each in asking))  # noqa: B023
        finally:
            stop.set()
        for each in asking:
            each.result()
    assert all(seen[version] >= 20 for version in answers)


def test_a_retired_model_leaves_nothing_behind(begin: Start) -> None:
    client = begin()
    service = client.app.state.service  # type: ignore[attr-defined]
    gone = []
    gc.disable()  # what only the cyclic collector can find could stay for long, and what is frozen for ever
    try:
        for _ in range(20):
            version = add(client, "1")
            activate(client, version)
            assert ask(client, history=HISTORY, user_id="u").json()["model_version"] == version
            engine = service.recommender.engine
            gone += [weakref.ref(engine), weakref.ref(engine.trie.token), weakref.ref(engine.bundle.network)]
            del engine
            activate(client, BASE)
            assert send(client, "DELETE", f"/models/{version}").status_code == 204
            assert service.costs.table(version) == []
        assert [each() for each in gone] == [None] * 60
    finally:
        gc.enable()
    assert [model["version"] for model in client.get("/models").json()["models"]] == [BASE]


def test_no_garbage_is_kept_for_good_with_a_model(begin: Start) -> None:
    class Cycle:
        pass

    client, cycle = begin(), Cycle()
    cycle.itself = cycle  # type: ignore[attr-defined]
    garbage = weakref.ref(cycle)
    gc.disable()
    try:
        del cycle
        add(client, "1")
        assert garbage() is None
    finally:
        gc.enable()


def test_what_waits_for_a_retired_model_is_still_answered_by_it(
    begin: Start, engine: ShapedEngine, engines: dict[int, Engine]
) -> None:
    client = begin()
    version = add(client, "1")
    activate(client, version)
    reached, opened = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        opened.wait()

    send(client, "PUT", "/traffic", json={"arms": [{"version": BASE, "percent": 100}]})
    engine.before = hold
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, client, history=["i7"])  # by the base, which holds the engine's thread
        reached.wait()
        send(client, "PUT", "/traffic", json={"arms": []})
        waiting = pool.submit(ask, client, history=HISTORY)
        eventually(lambda: client.app.state.service.admission.depth)  # type: ignore[attr-defined]
        activate(client, BASE)
        assert send(client, "DELETE", f"/models/{version}").status_code == 204
        opened.set()
        assert running.result().json()["model_version"] == BASE
        answer = waiting.result().json()
    assert answer["model_version"] == version
    assert_same_answer(answer["items"], expected(engines[1]))


# What is refused


def refusal(answer: Any) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, answer.json()["detail"]


def test_changes_need_an_admin_key(begin: Start) -> None:
    client = begin(api_keys=digest("user"))
    for method, path in (("POST", "/models"), ("POST", f"/models/{BASE}/activate"), ("DELETE", f"/models/{BASE}"),
                         ("PUT", "/traffic")):  # fmt: skip
        assert client.request(method, path, json={}).status_code == 401
        assert client.request(method, path, json={}, headers=sending("user")).status_code == 403
    assert client.get("/traffic", headers=sending("user")).json()["active"] == BASE


@pytest.mark.parametrize("path", ["..", ".", "../models", "/etc", "a/../..", "out", "no\0thing"])
def test_no_folder_outside_is_opened(begin: Start, shelf: Path, tmp_path: Path, path: str) -> None:
    (shelf / "out").unlink(missing_ok=True)
    (shelf / "out").symlink_to(on_disk(tmp_path / "b", tiny_model()), target_is_directory=True)
    client = begin()
    status, detail = refusal(send(client, "POST", "/models", json={"path": path}))
    assert status == 422 and "inside STREAMREC_MODELS_DIR" in detail


def test_without_a_folder_for_models_none_is_loaded(begin: Start) -> None:
    status, detail = refusal(send(begin(models_dir=None), "POST", "/models", json={"path": "1"}))
    assert status == 422 and "STREAMREC_MODELS_DIR" in detail


def test_a_bundle_that_does_not_fit_is_refused_with_the_reason(begin: Start, tmp_path: Path) -> None:
    client = begin(models_dir=tmp_path)
    damaged = on_disk(tmp_path / "damaged", tiny_model(seed=3))
    (damaged / "heads.safetensors").write_bytes(b"rubbish")
    worse = tiny_model(seed=3)
    worse.sample = sample.record_sample(Engine(tiny_model(seed=4)), [[1, 2, 3], [4]])
    on_disk(tmp_path / "worse", worse)
    broken = tiny_model(seed=3)
    broken.network.t5.shared.weight.data.fill_(float("nan"))
    on_disk(tmp_path / "broken", broken)
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "bundle.json").mkdir(parents=True)
    for path, reason in (("missing", "There is no bundle"), ("damaged", "heads.safetensors is damaged"),
                         ("worse", "does worse than when it was exported"), ("broken", "not finite"),
                         ("é" * 200, "name too long"), ("a" * 240, "There is no bundle"),
                         ("file", "bundle.json is missing"), ("folder", "bundle.json is missing")):  # fmt: skip
        refused = send(client, "POST", "/models", json={"path": path})
        status, detail = refusal(refused)
        assert status == 422 and reason in detail
        assert refused.json()["type"].endswith("unfit-bundle") and refused.json()["field"] == "path"
    assert active(client) == [BASE] and len(client.get("/models").json()["models"]) == 1
    assert ask(client, history=HISTORY).status_code == 200


def test_changes_that_do_not_fit_are_refused(begin: Start) -> None:
    client = begin(max_models=2)
    version = add(client, "1")
    assert refusal(send(client, "POST", "/models", json={"path": "2"}))[0] == 409
    assert refusal(send(client, "POST", "/models/none/activate"))[0] == 404
    assert refusal(send(client, "DELETE", "/models/none"))[0] == 404
    assert refusal(send(client, "DELETE", f"/models/{BASE}"))[0] == 409  # active
    activate(client, version)
    assert refusal(send(client, "DELETE", f"/models/{BASE}")) == (
        409, "This is the model that the settings name, which every start loads; it cannot be retired."
    )  # fmt: skip
    activate(client, BASE)
    send(client, "PUT", "/traffic", json={"shadow": {"version": version}})
    assert refusal(send(client, "DELETE", f"/models/{version}"))[0] == 409
    for arms, status in (
        ([{"version": "none", "percent": 1}], 404),
        ([{"version": BASE, "percent": 60}, {"version": version, "percent": 41}], 422),
        ([{"version": BASE, "percent": 10, "reasoning_steps": 5}], 422),
        ([{"version": BASE, "percent": 0}], 422),
    ):
        assert refusal(send(client, "PUT", "/traffic", json={"arms": arms}))[0] == status
    assert client.get("/traffic").json()["shadow"] == {"version": version, "percent": 100}


def test_two_operators_at_once_leave_a_model_that_answers(begin: Start) -> None:
    client = begin()
    version = add(client, "1")
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            activated = pool.submit(send, client, "POST", f"/models/{version}/activate")
            retired = pool.submit(send, client, "DELETE", f"/models/{version}")
            outcome = activated.result().status_code, retired.result().status_code
            assert outcome in {(200, 409), (404, 204)}
            assert active(client) == [version if outcome[0] == 200 else BASE]
            assert ask(client, history=HISTORY).json()["model_version"] in active(client)
            activate(client, BASE)
            add(client, "1")


# Who is answered by which


def test_users_stay_in_their_arm_and_the_arms_have_their_shares(begin: Start) -> None:
    client, other = begin(), begin()
    arms = [
        {"version": BASE, "percent": 30, "reasoning_steps": 0},
        {"version": BASE, "percent": 50, "reasoning_steps": 4},
    ]
    for each in (client, other):
        answer = send(each, "PUT", "/traffic", json={"name": "thinking", "arms": arms})
        assert answer.json() == {"name": "thinking", "active": BASE, "arms": arms, "shadow": None}
        assert each.get("/traffic").json() == answer.json()

    def steps(client: TestClient, number: int) -> int:
        return int(ask(client, user_id=f"u{number}", history=HISTORY, k=1, beam_width=1).json()["reasoning_steps"])

    found = [steps(client, number) for number in range(100)]
    assert [steps(client, number) for number in range(20)] == found[:20] == [steps(other, n) for n in range(20)]
    counts = Counter(found)
    assert abs(counts[0] - 30) < 18 and abs(counts[4] - 50) < 20 and counts[2] == 100 - counts[0] - counts[4]
    thinker, bare = found.index(4), found.index(0)
    for number in (thinker, bare):  # a request that names its steps keeps them
        assert ask(client, 1, user_id=f"u{number}", history=HISTORY).json()["reasoning_steps"] == 1
    assert {ask(client, history=HISTORY, k=1, beam_width=1).json()["reasoning_steps"] for _ in range(40)} == {0, 2, 4}


def test_an_arm_may_be_another_version(begin: Start, engines: dict[int, Engine]) -> None:
    client = begin()
    version = add(client, "1")
    send(client, "PUT", "/traffic", json={"arms": [{"version": version, "percent": 100}]})
    answer = ask(client, user_id="u", history=HISTORY).json()
    assert (answer["model_version"], active(client)) == (version, [BASE])
    assert_same_answer(answer["items"], expected(engines[1]))


def test_the_shadow_is_asked_and_never_answers(begin: Start, engines: dict[int, Engine]) -> None:
    client = begin()
    version = add(client, "1")
    send(client, "PUT", "/traffic", json={"shadow": {"version": version}})
    answer = ask(client, user_id="u", history=HISTORY).json()
    assert answer["model_version"] == BASE
    count, total = (f"streamrec_shadow_overlap_{name}" for name in ("count", "sum"))
    eventually(lambda: read(client, count, version=version) == 1)
    ours, theirs = ({item for item, _ in expected(engines[seed])} for seed in (0, 1))
    assert read(client, total, version=version) == pytest.approx(len(ours & theirs) / 10)
    assert read(client, "streamrec_recommendations_total", version=version, source="model", steps="2") == 0
    assert ask(client, user_id="u", history=HISTORY).json()["cache"] == "memory"  # the shadow has not spoilt it
    send(client, "PUT", "/traffic", json={"shadow": {"version": BASE}})
    ask(client, 4, history=HISTORY)
    eventually(lambda: read(client, count, version=BASE) == 1)
    assert read(client, total, version=BASE) == 1  # a model agrees with itself


# Several processes


@pytest.fixture
def replicas(begin: Start, redis_server: RedisServer) -> Iterator[Start]:
    options = {"redis_url": redis_server.url, "redis_timeout_ms": 2000, "redis_store_timeout_ms": 2000}
    return lambda **values: begin(**options | values)  # type: ignore[return-value]


def test_all_replicas_swap_and_a_late_one_catches_up(replicas: Start, engines: dict[int, Engine]) -> None:
    one, other = replicas(), replicas()
    version = add(one, "1")
    activate(one, version)
    gone = add(one, "2")
    send(one, "PUT", "/traffic", json={"name": "x", "arms": [{"version": BASE, "percent": 50, "reasoning_steps": 1}]})
    assert send(one, "DELETE", f"/models/{gone}").status_code == 204
    late = replicas()
    for replica in (other, late):
        eventually(lambda: replica.get("/traffic").json() == one.get("/traffic").json())  # noqa: B023
        assert active(replica) == [version] and len(replica.get("/models").json()["models"]) == 2
    for user in ("a", "b", "c", "d"):
        versions = {ask(each, user_id=user, history=HISTORY).json()["model_version"] for each in (one, other, late)}
        assert len(versions) == 1


def test_a_replica_without_the_bundle_serves_on_until_it_has_it(replicas: Start, shelf: Path, tmp_path: Path) -> None:
    one, other = replicas(), replicas(models_dir=tmp_path)
    version = add(one, "1")
    activate(one, version)
    eventually(lambda: other.get("/traffic").json()["active"] == version)
    assert ask(other, history=HISTORY).json()["model_version"] == BASE and active(other) == [BASE]
    assert refusal(send(other, "POST", f"/models/{version}/activate"))[0] == 409
    assert refusal(send(other, "POST", "/models", json={"path": "1"}))[0] == 422
    shutil.copytree(shelf / "1", tmp_path / "1")
    assert add(other, "1") == version
    assert ask(other, history=HISTORY).json()["model_version"] == version and active(other) == [version]
