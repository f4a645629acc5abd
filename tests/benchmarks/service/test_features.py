"""Every feature that is measured is answered, and the whole command runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from benchmarks.service import features
from serving.engine import Engine
from serving.items.filter_parser import parse_filter
from tests.app.conftest import ready, settings
from tests.builders import tiny_bundle, tiny_model


@pytest.fixture
def client() -> Iterator[TestClient]:
    operator = settings(admin_keys=features.OPTIONS[3], rotation_window_s=60)
    with TestClient(create_app(operator, Engine(tiny_model(120, neighbours=True)))) as client:
        yield ready(client)


def test_every_feature_is_answered_by_its_route(client: TestClient) -> None:
    bundle = client.app.state.service.bundle  # type: ignore[attr-defined]
    features.prepare(client, bundle.catalogue)
    found = features.features(bundle, 1, 0)
    assert next(iter(found)) == features.PLAIN
    assert {"/rank, 10 items", "/rank, 100 items", "diversity", "/items/{id}/similar, together"} <= found.keys()
    assert "/rank, 1000 items" not in found  # there are not as many
    for name, requests in found.items():
        for request in (requests[0], requests[-1]):
            answer = client.request(request.get("method", "POST"), request["path"], json=request.get("body"))
            assert answer.status_code == 200, (name, answer.text)
    assert len(client.get("/users/u3").json()["shown"]) == features.SHOWN
    assert "/items/{id}/similar, together" not in features.features(tiny_model(120), 1, 0)


def test_a_new_filter_is_new_whatever_came_before() -> None:
    """In a turn, in the next one and with other steps."""
    bundle, name = tiny_model(120), "filter, a new one each time"
    turns = [features.features(bundle, steps, seed)[name] for steps in (0, 4) for seed in (0, 1, 10)]
    texts = {parse_filter(row["body"]["filter"]).text for turn in turns for row in turn}
    assert len(texts) == len(turns) * features.NEW


def test_a_feature_is_compared_with_the_plain_requests_of_its_round() -> None:
    rounds = [{"/recommend": (0.01, 0.008, 100), "dear": (0.04, 0.03, 25)}] * 2
    rounds += [{"/recommend": (0.02, 0.008, 50), "dear": (0.05, 0.03, 20)}]
    plain, dear = features.summarise(rounds)
    assert plain == {"feature": "/recommend", "ms": 10.0, "times": 1.0, "cpu_ms": 8.0, "requests": 250}
    assert dear == {"feature": "dear", "ms": 40.0, "times": 4.0, "cpu_ms": 30.0, "requests": 70}


def test_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, out = tiny_bundle(tmp_path / "bundle"), tmp_path / "features.json"
    options = ["--bundle", bundle, "--runtime", "eager", "--steps", "1", "--smoke", "--out", out]
    monkeypatch.setattr(sys, "argv", ["features", *map(str, options)])
    features.main()
    rows = capsys.readouterr().out
    assert "| /recommend " in rows and "| /rank, 10 items " in rows and not out.exists()
