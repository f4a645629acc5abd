"""A model goes live in several workers while clients ask; then everything is killed."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.app.test_security import digest, sending
from tests.builders import tiny_bundle
from tests.e2e.conftest import ServiceProcess, StartService
from tests.faults.conftest import HISTORY, load
from tests.waiting import DEADLINE, eventually

WORKERS, MAX_BATCH = 2, 2
CLIENTS = 5 * WORKERS * MAX_BATCH  # that ask without pause: five times what can be computed at the same time


def change(service: ServiceProcess, method: str, path: str, **more: Any) -> Any:
    answer = service.http.request(method, path, headers=sending("admin"), **more)
    assert answer.is_success, answer.text
    return answer.json()


def active(service: ServiceProcess) -> set[str]:
    """What several connections, and so all workers, are answered by."""
    found = set()
    for _ in range(8):
        with httpx.Client(base_url=service.address, timeout=DEADLINE) as client:
            found.add(client.get("/traffic").json()["active"])
    return found


def activate_often(service: ServiceProcess, version: str) -> None:
    for _ in range(5):
        change(service, "POST", f"/models/{version}/activate")


def test_all_workers_swap_under_load_and_a_kill_loses_no_acknowledged_change(
    start_service: StartService, tmp_path: Path
) -> None:
    tiny_bundle(tmp_path / "models/next", seed=1)
    variables = {
        "STREAMREC_MODELS_DIR": str(tmp_path / "models"), "STREAMREC_STATE_DIR": str(tmp_path / "state"),
        "STREAMREC_ADMIN_KEYS": digest("admin"), "STREAMREC_RUNTIME": "eager",
        "STREAMREC_MAX_BATCH": str(MAX_BATCH),
    }  # fmt: skip
    service = start_service("--workers", str(WORKERS), variables=variables)
    (base,) = active(service)
    with load(service, CLIENTS) as seen:
        version = change(service, "POST", "/models", json={"path": "next"})["version"]
        change(service, "POST", f"/models/{version}/activate")
        eventually(lambda: active(service) == {version})
        seen.more(5 * CLIENTS)
        change(service, "POST", f"/models/{base}/activate")
        eventually(lambda: active(service) == {base})
        with ThreadPoolExecutor(2) as operators:
            list(operators.map(lambda each: activate_often(service, each), (base, version)))
        eventually(lambda: len(active(service)) == 1)  # whoever came last
        change(service, "POST", f"/models/{version}/activate")
    assert set(seen.failed) <= {"503"} and seen.unanswered == 0  # under so much load some may be refused
    assert {version for version, *_ in seen.by_plan} == {base, version}
    assert all(len(answers) == 1 for answers in seen.by_plan.values()), seen.by_plan  # no answer is of both
    service.http.close()
    os.killpg(service.process.pid, signal.SIGKILL)
    service.process.wait()
    again = start_service("--workers", str(WORKERS), variables=variables)
    assert active(again) == {version}
    assert again.recommend(history=HISTORY)["model_version"] == version
