"""Two hundred requests of every kind to the demo bundle, and what it answered: `python -m tests.app.demo_answers`
records the answers anew, which is due when the demo bundle is trained anew, and never for another reason."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from serving.bundle import Bundle

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "bundles/demo"
RECORD = Path(__file__).with_name("demo_answers.json.gz")
CHANGING = ("recommendation_id", "timings_ms", "cost", "by_steps")  # in any answer, new each time: times are in them


def requests(item_ids: list[str], categories: list[str]) -> list[dict[str, Any]]:
    """Each as method, path and, for POST, a body. They depend on the arguments alone."""
    rng = random.Random(0)

    def items(count: int) -> list[str]:
        return rng.sample(item_ids, count)

    def body(number: int) -> dict[str, Any]:
        """A plain request, with one to three of the options that a request may set."""
        options: list[dict[str, Any]] = [
            {"k": rng.choice([1, 3, 25])},
            {"beam_width": rng.choice([10, 20, 120])},
            {"exclude_seen": False},
            {"allow": items(40)},
            {"deny": items(200)},
            {"categories": rng.sample(categories, rng.choice([1, 2]))},
            {"dense_weight": rng.choice([0.0, 0.5, 4.0])},
            {"neighbours_weight": rng.choice([0.0, 1.0, 10.0])},
            {"reasoning_paths": rng.choice([1, 2, 5])},
            {"explain": True},
            {"user_id": f"user {number}"},
            {"history": [*items(2), "no such item"], "deny": ["nor this"]},
        ]
        chosen = {"history": items(rng.choice([1, 2, 5, 20, 30]))}
        for option in rng.sample(options, rng.choice([1, 1, 2, 3])):
            chosen |= option
        return chosen

    asked = [
        {"method": "POST", "path": f"/recommend?reasoning_steps={number % 5}", "body": body(number)}
        for number in range(150)
    ]
    asked += [
        {"method": "POST", "path": "/recommend", "body": {"history": items(rng.choice([1, 4, 12]))}} for _ in range(15)
    ]
    asked += [
        {"method": "POST", "path": "/recommend/batch", "body": {"requests": [body(number) for _ in range(3)] + [{}, 7]}}
        for number in range(5)
    ]
    asked += [{"method": "GET", "path": f"/items/{item}"} for item in [*items(5), "none"]]
    asked += [{"method": "GET", "path": f"/items?query={query}"} for query in ("", "steel", "no such words")]
    for user in ("a", "b"):
        asked += [
            {"method": "POST", "path": f"/users/{user}/events", "body": {"items": [*items(3), "none"]}},
            {"method": "POST", "path": "/recommend?reasoning_steps=2", "body": {"user_id": user}},
            {"method": "GET", "path": f"/users/{user}"},
            {"method": "DELETE", "path": f"/users/{user}"},
            {"method": "GET", "path": f"/users/{user}"},
        ]
    asked.append({"method": "GET", "path": "/models"})
    refused: list[dict[str, Any]] = [
        {"k": 0}, {"k": 30, "beam_width": 20}, {"beam_width": 10_000}, {"colour": "red"}, {"catalogue": "none"},
        {"categories": ["none"]}, {"history": [1]}, {"timeout_ms": 0}, {"allow": []}, {},
    ]  # fmt: skip
    asked += [{"method": "POST", "path": "/recommend", "body": body} for body in refused]
    return asked


def answers() -> list[dict[str, Any]]:
    """What the service says to each request, with the status, without what changes from call to call."""
    catalogue = Bundle.load(DEMO).catalogue
    settings = Settings.model_validate(
        Settings.model_construct().model_dump() | {"bundle": DEMO, "max_batch": 4, "default_timeout_ms": 600_000}
    )
    found = []
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        while client.get("/readyz").status_code != 200:
            pass
        for asked in requests(list(catalogue.item_ids), sorted(catalogue.category_names)):
            answer = client.request(asked["method"], asked["path"], json=asked.get("body"))
            found.append({"status": answer.status_code, "body": _lasting(answer.json() if answer.content else None)})
    return found


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        if str(value.get("type")).startswith("urn:streamrec:problem:"):  # its sentences may be put better
            return {name: value.get(name) for name in ("type", "status", "field")}
        return {name: _lasting(inner) for name, inner in value.items() if name not in CHANGING}
    return [_lasting(inner) for inner in value] if isinstance(value, list) else value


def load() -> list[dict[str, Any]]:
    recorded: list[dict[str, Any]] = _lasting(json.loads(gzip.decompress(RECORD.read_bytes())))
    return recorded


if __name__ == "__main__":
    recorded = answers()
    RECORD.write_bytes(gzip.compress(json.dumps(recorded, ensure_ascii=False).encode(), mtime=0))
    print(f"{len(recorded)} answers recorded in {RECORD.relative_to(ROOT)}")
