"""The other servers give the engine's answers, and the compared rates follow from the requests that were sent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from benchmarks.service.generate_servers import Batched, Generator, fastapi_app
from benchmarks.service.processes import Server
from benchmarks.service.sender import Sent
from benchmarks.service.servers import (
    BARS,
    OURS,
    as_sent,
    commands,
    compared,
    first_difference,
    others_stopped,
    requests,
    trial,
)
from serving.bundle import Bundle
from serving.engine import Engine
from serving.types import Request
from tests.builders import tiny_bundle
from tests.waiting import eventually

FASTAPI, LITSERVE = BARS


@pytest.fixture(scope="module", params=["vocabulary", "block"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", normalise=request.param)


@pytest.fixture(scope="module")
def expected(bundle: Path) -> list[list[tuple[str, float]]]:
    """What the engine answers to HISTORIES, k of K."""
    engine, found = Engine(Bundle.load(bundle)), []
    ids = engine.bundle.catalogue.item_ids
    for history, k in zip(HISTORIES, K, strict=True):
        rows = tuple(ids.index(item) for item in history)
        (answer,) = engine.search([Request(rows, k, 50, 0)], engine.encode([rows]))
        found.append([(ids[row], score) for row, score in zip(answer.items, answer.scores, strict=True)])
    return found


HISTORIES = [["i1"], ["i5", "i2", "i9", "i30", "i31", "i32", "i33", "i34"], ["i7", "i8"]]
K = [10, 4, 7]


def pairs(items: list[dict[str, Any]]) -> list[tuple[str, float]]:
    return [(item["item_id"], item["score"]) for item in items]


def test_both_answer_what_the_engine_does(bundle: Path, expected: list[list[tuple[str, float]]]) -> None:
    bodies = [{"history": history, "k": k} for history, k in zip(HISTORIES, K, strict=True)]
    with TestClient(fastapi_app(Generator(bundle))) as client:
        assert client.get("/readyz").status_code == 200
        one_by_one = [pairs(client.post("/recommend", json=body).json()["items"]) for body in bodies]
    api = Batched(bundle, max_batch_size=3, batch_timeout=0.005, api_path="/recommend")
    api.setup("cpu")
    outputs = api.unbatch(api.predict(api.batch(bodies)))
    together = [pairs(api.encode_response(output)["items"]) for output in outputs]
    assert first_difference(expected, one_by_one) is None
    assert first_difference(expected, together) is None


def test_a_difference_is_found() -> None:
    ours = [[("a", -1.0), ("b", -2.0)]]
    assert first_difference(ours, [[("a", -1.0005), ("b", -2.0)]]) is None
    assert "scores" in (first_difference(ours, [[("a", -1.002), ("b", -2.0)]]) or "")
    assert "items" in (first_difference(ours, [[("b", -2.0), ("a", -1.0)]]) or "")
    assert "items" in (first_difference(ours, [[("a", -1.0)]]) or "")


def test_all_get_the_same_requests(bundle: Path) -> None:
    bodies = requests(bundle, 200)
    assert {len(body["history"]) for body in bodies} == set(range(1, 21))
    for body in bodies[:3]:
        theirs, ours = as_sent(FASTAPI, body), as_sent(OURS, body)
        assert theirs["body"] == body == {name: ours["body"][name] for name in body}
        assert ours["body"]["exclude_seen"] is False and ours["path"].endswith("reasoning_steps=0")
    assert [name for name, _ in commands(bundle)] == [OURS, *BARS]
    assert all(str(bundle) in command for _, command in commands(bundle))


def test_the_other_servers_do_not_run_during_a_turn() -> None:
    spinning = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(spinning, start_new_session=True) for _ in range(2)]
    try:
        ours, theirs = (Server("", process.pid, Path(os.devnull)) for process in processes)
        with others_stopped({OURS: ours, FASTAPI: theirs}, OURS):
            eventually(lambda: Path(f"/proc/{processes[1].pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
            before = ours.cpu_seconds(), theirs.cpu_seconds()
            eventually(lambda: ours.cpu_seconds() - before[0] > 0.05)
            assert theirs.cpu_seconds() == before[1]
        eventually(lambda: theirs.cpu_seconds() > before[1])
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_rate_holds_while_99_of_100_are_in_time() -> None:
    def held(late: list[Sent]) -> bool:
        return bool(trial(OURS, [Sent(0, 0, 0.5, 200)] * 198 + late, 10, limit=1.0, cpu=1.0)["held"])

    slow, refused = Sent(0, 0, 1.5, 200), Sent(0, 0, 0.001, 503)
    assert held([slow, refused])
    assert not held([slow, refused, slow])
    row = trial(OURS, [refused], 10, limit=1.0, cpu=0.02)
    assert row["p99_ms"] is None and row["refused"] == 1 and row["cpu_ms"] == 20 and not row["held"]


def test_bars_compare_the_best_rates_within_each_repeat() -> None:
    def row(repeat: int, server: str, rate: float, held: bool = True) -> dict[str, Any]:
        times = {"p50_ms": 1.0, "p99_ms": 2.0, "cpu_ms": 1.0}
        return {"repeat": repeat, "server": server, "requests_per_s": rate, **times, "held": held}

    trials = [row(0, OURS, 80.0), row(0, OURS, 60.0), row(0, OURS, 90.0, held=False), row(1, OURS, 90.0)]
    trials += [row(0, FASTAPI, 10.0), row(1, FASTAPI, 10.0)]
    trials += [row(0, LITSERVE, 17.0), row(0, LITSERVE, 20.0, held=False), row(1, LITSERVE, 20.0)]
    ours, fastapi, litserve = compared(trials)
    assert (ours["requests_per_s"], ours["lowest"], ours["highest"]) == (85, 80, 90) and "holds" not in ours
    assert (fastapi["ours_times_lowest"], fastapi["ours_times"], fastapi["ours_times_highest"]) == (8.0, 8.5, 9.0)
    assert fastapi["holds"] is True
    assert (litserve["ours_times_lowest"], litserve["ours_times"], litserve["holds"]) == (4.5, 4.6, False)
    with pytest.raises(SystemExit, match="FastAPI, generate kept up no rate"):
        compared([one for one in trials if (one["server"], one["repeat"]) != (FASTAPI, 1)])
