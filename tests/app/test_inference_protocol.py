"""Health and metadata as the Open Inference Protocol has them."""

from __future__ import annotations

from fastapi.testclient import TestClient

from serving import __version__
from tests.app.conftest import Start
from tests.app.test_security import digest, sending


def test_health_says_what_the_probes_say(start: Start) -> None:
    client = start()
    live, ready = client.get("/v2/health/live"), client.get("/v2/health/ready")
    assert (live.status_code, live.json()) == (200, {"live": True})
    assert (ready.status_code, ready.json()) == (200, {"ready": True})
    client.app.state.service.begin_drain()
    ready = client.get("/v2/health/ready")
    assert (ready.status_code, ready.json()) == (503, {"ready": False}) and client.get("/readyz").status_code == 503
    assert client.get("/v2/health/live").status_code == client.get("/livez").status_code == 200


def test_the_loaded_models_are_there_by_name(shared: TestClient) -> None:
    assert shared.get("/v2").json() == {"name": "streamrec", "version": __version__, "extensions": []}
    (model,) = shared.get("/models").json()["models"]
    described = shared.get(f"/v2/models/{model['name']}").json()
    assert described["name"] == model["name"] and described["versions"] == [model["version"]]
    assert [tensor["name"] for tensor in described["outputs"]] == ["item_id", "score"]
    assert shared.get(f"/v2/models/{model['name']}/ready").json() == {"name": model["name"], "ready": True}
    for path in ("/v2/models/nonesuch", "/v2/models/nonesuch/ready"):
        assert shared.get(path).status_code == 404


def test_health_is_open_and_models_take_a_key(start: Start) -> None:
    client = start(api_keys=digest("good"))
    assert [client.get(path).status_code for path in ("/v2", "/v2/health/live", "/v2/health/ready")] == [200] * 3
    assert client.get("/v2/models/tiny").status_code == 401
    assert client.get("/v2/models/tiny", headers=sending("good")).status_code == 200
