"""What keeps the changes of items breaks, or several change them at once: a clear answer, and nothing half done."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.online.changelog import CHANGES_FILE
from tests.app.test_security import digest, sending
from tests.conftest import RedisServer
from tests.e2e.conftest import ServiceProcess, StartService
from tests.faults.conftest import HISTORY
from tests.waiting import DEADLINE, eventually

ADMIN = {"STREAMREC_ADMIN_KEYS": digest("admin"), "STREAMREC_RUNTIME": "eager", "STREAMREC_MAX_BATCH": "2"}


def put(service: ServiceProcess, item: str, title: str) -> httpx.Response:
    return service.http.put(f"/items/{item}", json={"title": title}, headers=sending("admin"))


def put_many(service: ServiceProcess, **titles: str) -> httpx.Response:
    items = [{"item_id": item, "title": title} for item, title in titles.items()]
    return service.http.post("/items", json={"items": items}, headers=sending("admin"))


def title(service: ServiceProcess, item: str) -> str:
    return service.http.get(f"/items/{item}").json()["title"]


def is_refused(answer: httpx.Response) -> bool:
    return answer.status_code == 503 and answer.json()["type"].endswith("store-unavailable")


@contextmanager
def full_disk(service: ServiceProcess, file: Path) -> Iterator[None]:
    """Meanwhile a file of the service can grow by a few bytes and no more."""
    _, most = resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (file.stat().st_size + 20, most))
    yield
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (most, most))


def test_full_disk_kill_and_damage_cost_no_change_that_was_acknowledged(
    start_service: StartService, tmp_path: Path
) -> None:
    variables, log = ADMIN | {"STREAMREC_STATE_DIR": str(tmp_path)}, tmp_path / CHANGES_FILE
    service = start_service(variables=variables)
    assert put(service, "i1", "first").is_success
    whole = log.read_bytes()
    with full_disk(service, log):
        assert is_refused(put(service, "i2", "no room")) and is_refused(put_many(service, i3="no room", i4="no room"))
        assert log.read_bytes() == whole and title(service, "i2") == "Thing number 2"
        assert service.recommend(history=HISTORY)["items"]
    assert put(service, "i2", "second").is_success
    service.http.close()
    os.killpg(service.process.pid, signal.SIGKILL)
    service.process.wait()
    with log.open("a") as file:
        file.write('{"kind":"catalogue","do":"put","item_id":"i3","titl')  # a kill cut it off
    again = start_service(variables=variables)
    assert [title(again, f"i{row}") for row in (1, 2, 3)] == ["first", "second", "Thing number 3"]
    assert put(again, "i3", "third").is_success
    assert [line[-1:] for line in log.read_text().splitlines()] == ["}"] * 3
    _damage(start_service, again, log, variables)


def _damage(start_service: StartService, service: ServiceProcess, log: Path, variables: dict[str, str]) -> None:
    """The log is cut in its middle while it is followed; later a line of it is spoilt."""
    whole = log.read_bytes()
    log.write_bytes(whole[: len(whole) // 2])
    eventually(lambda: "no longer followed" in service.errors.read_text())
    refused = put(service, "i5", "never")
    assert is_refused(refused) and "mend the log" in refused.json()["detail"]
    assert title(service, "i3") == "third" and service.recommend(history=HISTORY)["items"]
    assert service.stop() == 0
    second = whole.index(b"\n") + 1
    log.write_bytes(whole[:second] + b"\x00" * 20 + whole[second + 20 :])
    damaged = start_service(variables=variables, wait=False)
    assert damaged.process.wait(DEADLINE) == 1
    (said,) = [line for line in damaged.errors.read_text().splitlines() if not line.startswith("{")]
    assert f"is damaged at {second}" in said


@pytest.fixture
def durable_redis() -> Iterator[RedisServer]:
    server = RedisServer("--appendonly", "yes")
    yield server
    server.close()


def test_without_redis_a_change_is_refused_and_two_replicas_agree_on_all_others(
    start_service: StartService, durable_redis: RedisServer
) -> None:
    variables = ADMIN | {"STREAMREC_REDIS_URL": durable_redis.url, "STREAMREC_REPLICAS": "2"}
    one, other = replicas = [start_service(variables=variables) for _ in range(2)]
    assert put(one, "i1", "first").is_success
    eventually(lambda: title(other, "i1") == "first")
    durable_redis.kill()
    for service in replicas:
        assert is_refused(put(service, "i2", "away")) and is_refused(put_many(service, i3="away", i4="away"))
        assert service.http.delete("/items/i1", headers=sending("admin")).status_code == 503
        assert service.recommend(history=HISTORY)["items"] and title(service, "i1") == "first"
    durable_redis.start()
    for service in replicas:  # each finds out for itself that Redis is back
        eventually(lambda service=service: put(service, "i2", "back").is_success)  # type: ignore[misc]
    eventually(lambda: title(one, "i2") == title(other, "i2") == "back")
    for service in replicas:
        assert [title(service, f"i{row}") for row in (1, 3, 4)] == ["first", "Thing number 3", "Thing number 4"]

    def operate(number: int) -> list[httpx.Response]:
        client = replicas[number]
        return [put(client, f"i{6 + at % 2}", f"operator {number}, change {at}") for at in range(20)]

    with ThreadPoolExecutor(2) as pool:  # two operators, the same items
        answers: list[Any] = [answer for made in pool.map(operate, range(2)) for answer in made]
    assert [answer.text for answer in answers if not answer.is_success] == []
    eventually(
        lambda: one.http.get("/catalogues").json()["position"] == other.http.get("/catalogues").json()["position"]
    )
    found = [[title(service, item) for item in ("i6", "i7")] for service in replicas]
    assert found[0] == found[1] and set(found[0]) <= {f"operator {n}, change {at}" for n in (0, 1) for at in (18, 19)}
