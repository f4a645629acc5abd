"""Several workers behind one port: one address, one readiness, one sum of metrics, and none of them missed.

A start takes seconds, so most tests share one service, in the order written here; the last of them ends it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.answers import assert_same_answers
from tests.conftest import RedisServer
from tests.e2e.conftest import LONG_QUEUE, ServiceProcess, StartService
from tests.waiting import DEADLINE, eventually

HISTORY = ["i1", "i2", "i3"]


def workers(service: ServiceProcess) -> list[int]:
    """Process ids of the workers that live."""
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children").read_text().split()
    serving = "multiprocessing.spawn"
    return [int(pid) for pid in children if serving in Path(f"/proc/{pid}/cmdline").read_text()]


def cpu_ticks(pid: int) -> int:
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


def each_on_its_own_connection(service: ServiceProcess, path: str, count: int) -> list[httpx.Response]:
    """The kernel spreads connections, not requests, over the workers."""
    answers = []
    for _ in range(count):
        with httpx.Client(base_url=service.address, timeout=DEADLINE) as client:
            answers.append(client.get(path))
    return answers


@pytest.fixture(scope="module")
def service(start_service: StartService, slow_bundle: Path) -> ServiceProcess:
    return start_service("--workers", "2", of=slow_bundle, variables=LONG_QUEUE)


def test_requests_are_shared_out_and_metrics_show_the_sum(service: ServiceProcess) -> None:
    bodies: list[dict[str, Any]] = [{"history": [f"i{i}"], "k": 5} for i in range(60)]
    worked = [cpu_ticks(pid) for pid in workers(service)]

    def ask(body: dict[str, Any]) -> list[dict[str, Any]]:
        with httpx.Client(base_url=service.address, timeout=DEADLINE) as client:
            response = client.post("/recommend", params={"reasoning_steps": "2"}, json=body)
            assert response.status_code == 200, response.text
            return response.json()["items"]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, bodies))
    assert_same_answers(together, map(ask, bodies))  # whichever worker answers
    assert all(after > before for before, after in zip(worked, map(cpu_ticks, workers(service)), strict=True))
    for answer in each_on_its_own_connection(service, "/metrics", 6):
        assert "streamrec_batch_size_sum 120.0" in answer.text
        assert len(re.findall("^streamrec_model_info{.*} 1.0$", answer.text, re.MULTILINE)) == 1


@pytest.mark.parametrize("name", ["model/model.safetensors", "trie.safetensors"])
def test_weights_and_trie_are_one_copy_in_memory(service: ServiceProcess, name: str) -> None:
    """Every worker maps the bundle's files; a page that all of them read is there once."""
    for pid in workers(service):
        maps = Path(f"/proc/{pid}/smaps").read_text()
        (mapped,) = [part for part in re.split(r"\n(?=[0-9a-f]+-)", maps) if name in part]
        sizes = {name: int(kb) for name, kb in re.findall(r"(\w+): +(\d+) kB", mapped)}
        # "Dirty" are pages of a file written so lately that it is not on the disk yet; private ones would be copies.
        assert sizes["Shared_Clean"] + sizes["Shared_Dirty"] > 0 and sizes["Private_Dirty"] == 0


def test_without_redis_nothing_is_kept_of_users(service: ServiceProcess) -> None:
    refused = service.http.post("/users/u/events", json={"items": HISTORY})
    assert refused.status_code == 503 and "Redis" in refused.json()["detail"]
    assert service.recommend(user_id="u", history=HISTORY)["cache"] == "off"
    assert service.http.get("/users/u").status_code == 404
    assert service.http.delete("/users/u").status_code == 204


def test_what_may_be_counted_is_shown_before_it_is(service: ServiceProcess) -> None:
    text = service.http.get("/metrics").text
    for series in (
        'cache_total{result="hit",tier="redis"}', 'rejected_total{reason="overloaded"}',
        'fallback_total{reason="store_unavailable"}',
    ):  # fmt: skip
        assert f"\nstreamrec_{series} " in text


def test_a_worker_that_dies_is_replaced_and_its_counts_stay(service: ServiceProcess) -> None:
    for i in range(10):
        with httpx.Client(base_url=service.address, timeout=DEADLINE) as client:
            client.post("/recommend", json={"history": [f"i{i}"]}).raise_for_status()
    counted = service.metric("streamrec_batch_size_sum")
    first = workers(service)
    service.http.close()
    os.kill(first[0], signal.SIGKILL)
    eventually(lambda: len(workers(service)) == 2 and workers(service) != first)
    # The one that is left answers all the while; the new one takes requests only when it can.
    for _ in range(20):
        (ready,) = each_on_its_own_connection(service, "/readyz", 1)
        assert ready.status_code == 200
        with httpx.Client(base_url=service.address, timeout=DEADLINE) as client:
            client.post("/recommend", json={"history": HISTORY}).raise_for_status()
        time.sleep(0.05)
    service.http = httpx.Client(base_url=service.address, timeout=DEADLINE)
    assert service.metric("streamrec_batch_size_sum") == counted + 20


def test_sigterm_to_the_group_lets_every_worker_finish_and_exits_with_0(service: ServiceProcess) -> None:
    requests = [{"history": [f"i{i}"], "beam_width": 200, "k": 10} for i in range(64)]
    answers: list[httpx.Response] = []

    def ask() -> None:
        with httpx.Client(base_url=service.address, timeout=DEADLINE) as client:
            answers.append(client.post("/recommend/batch?reasoning_steps=4", json={"requests": requests}))

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    eventually(lambda: service.metric("streamrec_queue_depth") > 128)
    os.killpg(service.process.pid, signal.SIGTERM)  # as systemd, timeout(1) and shells do
    for thread in asking:
        thread.join(DEADLINE)
    assert [answer.status_code for answer in answers] == [200] * 4
    for answer in answers:
        assert {result.get("status", 200) for result in answer.json()["results"]} <= {200, 503}
    assert service.process.wait(DEADLINE) == 0


def test_with_redis_whichever_worker_answers_knows_the_user(start_service: StartService) -> None:
    redis = RedisServer()
    try:
        variables = {"STREAMREC_REDIS_URL": redis.url, "STREAMREC_REDIS_STORE_TIMEOUT_MS": "2000"}  # on a busy machine
        service = start_service("--workers", "2", variables=variables)
        service.http.post("/users/known/events", json={"items": HISTORY}).raise_for_status()
        found = each_on_its_own_connection(service, "/users/known", 10)
        assert [response.json()["items"] for response in found] == [HISTORY] * 10
        orphans = workers(service)
        service.process.kill()  # a supervisor that is killed leaves no worker behind
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans))
    finally:
        redis.close()


def test_sigterm_while_loading_ends_all_at_once(start_service: StartService) -> None:
    service = start_service("--workers", "2", wait=False)
    eventually(lambda: "Started server process" in service.errors.read_text())
    os.killpg(service.process.pid, signal.SIGTERM)
    assert service.process.wait(DEADLINE) == 0
    assert '"ready"' not in service.errors.read_text() and "Traceback" not in service.errors.read_text()


def test_a_broken_bundle_stops_all_workers(start_service: StartService, bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    (broken / "heads.safetensors").unlink()
    service = start_service("--workers", "2", of=broken, wait=False)
    assert service.process.wait(DEADLINE) == 1
    assert "heads.safetensors" in service.errors.read_text() and "Traceback" not in service.errors.read_text()
