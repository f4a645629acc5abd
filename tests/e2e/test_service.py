"""The started service without Redis: what a newcomer and a client see."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.answers import assert_same_answers
from tests.e2e.conftest import LONG_QUEUE, ServiceProcess, StartService
from tests.tools import require_program
from tests.waiting import DEADLINE, eventually

HISTORY = ["i1", "i2", "i3"]


@pytest.fixture(scope="module")
def service(start_service: StartService) -> ServiceProcess:
    return start_service()


def test_the_printed_request_works_as_it_stands(service: ServiceProcess) -> None:
    require_program("the printed request is", "install curl", "curl")
    answer = json.loads(subprocess.run(service.announced[1], shell=True, capture_output=True, check=True).stdout)
    assert answer["source"] == "model" and answer["reasoning_steps"] == 4
    assert len(answer["items"]) == 5 and answer["unknown_items"] == []


def test_concurrent_answers_equal_those_asked_alone(service: ServiceProcess) -> None:
    bodies: list[dict[str, Any]] = [
        {"history": [f"i{i}", f"i{11 * i % 60}"], "k": 4 + i % 5, "steps": i % 5, "deny": [f"i{i + 1}"][: i % 2]}
        for i in range(40)
    ]
    alone = [service.recommend(**body)["items"] for body in bodies]
    batches, searches = service.metric("streamrec_batch_size_count"), service.metric("streamrec_batch_size_sum")
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda body: service.recommend(**body)["items"], bodies))
    assert service.metric("streamrec_batch_size_sum") - searches == 40
    assert service.metric("streamrec_batch_size_count") - batches < 40, "nothing shared a batch: this proves nothing"
    assert_same_answers(together, alone)
    assert service.metric("streamrec_invalid_items_total") == 0


def test_a_user_from_first_sight_to_erasure(service: ServiceProcess) -> None:
    assert service.recommend(user_id="walk")["source"] == "popularity"
    service.http.post("/users/walk/events", json={"items": HISTORY}).raise_for_status()
    assert [service.recommend(user_id="walk")["cache"] for _ in range(2)] == ["miss", "memory"]
    service.http.post("/users/walk/events", json={"items": ["i9"]}).raise_for_status()
    after = service.recommend(user_id="walk", k=20)
    assert after["cache"] == "miss" and "i9" not in {item["item_id"] for item in after["items"]}
    assert service.http.delete("/users/walk").status_code == 204
    assert service.recommend(user_id="walk")["source"] == "popularity"
    assert "walk" not in service.errors.read_text()


def test_errors_are_problem_details_with_the_callers_id(service: ServiceProcess) -> None:
    for body, status, field in (
        ({"k": 0}, 422, "k"), ({"what": 1}, 422, "what"), ({"catalogue": "no"}, 404, "catalogue"),
    ):  # fmt: skip
        response = service.http.post("/recommend", json=body, headers={"X-Request-ID": "mine-7"})
        assert response.status_code == status and response.headers["content-type"] == "application/problem+json"
        assert response.headers["x-request-id"] == "mine-7"
        assert response.json()["field"] == field and response.json()["status"] == status
    short = service.http.post("/recommend?reasoning_steps=4", json={"history": HISTORY, "timeout_ms": 0.01})
    assert short.status_code == 504
    large = service.http.post("/recommend", content=b" " * (2 << 20), headers={"content-type": "application/json"})
    assert large.status_code == 413


def test_pages_and_description_are_there(service: ServiceProcess) -> None:
    assert "streamrec" in service.http.get("/").text
    assert service.http.get("/docs").status_code == 200
    assert "/recommend" in service.http.get("/openapi.json").json()["paths"]
    assert service.http.get("/livez").status_code == service.http.get("/readyz").status_code == 200


def test_a_client_that_hangs_up_does_not_hurt(service: ServiceProcess) -> None:
    body = json.dumps({"history": HISTORY, "beam_width": 200}).encode()
    head = f"POST /recommend HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    for _ in range(5):
        with socket.create_connection((service.http.base_url.host, service.http.base_url.port)) as client:
            client.sendall(head.encode() + b"\r\n\r\n" + body)
    assert service.recommend(history=HISTORY)["source"] == "model"
    eventually(lambda: service.metric("streamrec_queue_depth") == 0)


def test_the_service_is_behind_its_guard(service: ServiceProcess) -> None:
    """What the guard does in detail is in tests/app/test_guard.py."""

    def answer(*parts: bytes) -> str:
        with socket.create_connection((service.http.base_url.host, service.http.base_url.port), DEADLINE) as client:
            for part in parts:
                client.sendall(part)
            return client.recv(1 << 16).decode()

    body = json.dumps({"history": HISTORY}).encode()
    head = (
        b"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
        % len(body)
    )
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAM\r\n\r\n"
    assert answer(head + upgrade, body).startswith("HTTP/1.1 200 OK")
    assert answer(head + b"Transfer-Encoding: chunked\r\n\r\n" + body).startswith("HTTP/1.1 400 Bad Request")
    assert answer(head + b"a:\r\n" * 1000 + b"\r\n").startswith("HTTP/1.1 431 Request Header Fields Too Large")
    assert service.metric('streamrec_rejected_total{reason="malformed_request"}') == 1
    assert service.metric('streamrec_rejected_total{reason="head_too_large"}') == 1


def test_sigterm_is_unready_finishes_what_runs_and_exits_with_0(start_service: StartService, slow_bundle: Path) -> None:
    service = start_service(of=slow_bundle, variables=LONG_QUEUE)
    requests = [{"history": [f"i{i}"], "beam_width": 200, "k": 10} for i in range(64)]
    answers: list[Any] = []

    def ask() -> None:
        with httpx.Client(base_url=service.address, timeout=DEADLINE) as client:
            answers.append(client.post("/recommend/batch?reasoning_steps=4", json={"requests": requests}))

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    eventually(lambda: service.metric("streamrec_queue_depth") > 64)
    for _ in range(2):  # twice, as timeout(1) does
        service.process.terminate()

    def draining() -> bool:
        with httpx.Client(base_url=service.address, timeout=DEADLINE) as client:
            probe = client.get("/readyz")
        return (
            probe.status_code == 503 and probe.json()["reason"] == "draining" and probe.headers["connection"] == "close"
        )

    eventually(draining)
    assert service.http.post("/recommend", json={"history": HISTORY}).status_code == 503
    for thread in asking:
        thread.join(DEADLINE)
    assert [answer.status_code for answer in answers] == [200, 200]
    for answer in answers:
        assert [len(result["items"]) for result in answer.json()["results"]] == [10] * 64
    assert service.process.wait(DEADLINE) == 0


def test_a_broken_bundle_is_one_sentence_and_exit_1(start_service: StartService, bundle: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    with (broken / "heads.safetensors").open("ab") as file:
        file.write(b"!")
    service = start_service(of=broken, wait=False)
    assert service.process.wait(DEADLINE) == 1
    last = service.errors.read_text().splitlines()[-1]
    assert "heads.safetensors" in last and "Traceback" not in service.errors.read_text()


def test_a_setting_that_does_not_fit_is_one_sentence_and_exit_2(start_service: StartService) -> None:
    service = start_service(wait=False, variables={"STREAMREC_MAX_BEAM_WIDTH": "wide"})
    assert service.process.wait(DEADLINE) == 2
    assert "STREAMREC_MAX_BEAM_WIDTH" in service.errors.read_text()
