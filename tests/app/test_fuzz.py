"""The whole OpenAPI document, fuzzed in process: nothing is a fault, and every answer is one that is declared.

FUZZ_EXAMPLES=1000 python -m pytest tests/app/test_fuzz.py     # the long profile: that many examples a route
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as profile
from schemathesis import GenerationMode as Mode
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi import checks

from app.main import create_app
from serving.engine import Engine
from tests.app.conftest import ready, settings
from tests.app.test_security import digest
from tests.builders import tiny_model

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "10"))
KEY = "sesame"
ROUTES = (
    "POST /recommend", "POST /recommend/batch", "POST /rank",
    "POST /users/{user_id}/events", "GET /users/{user_id}",
    "DELETE /users/{user_id}", "GET /items", "GET /items/{item_id}",
    "GET /items/{item_id}/similar", "GET /popular", "GET /trending", "PUT /items/{item_id}", "DELETE /items/{item_id}",
    "POST /items", "PUT /catalogues/{name}", "GET /catalogues/changes",
    "POST /models", "POST /models/{version}/activate", "GET /v2/models/{name}", "GET /v2/models/{name}/ready",
    "DELETE /models/{version}", "PUT /traffic", "PUT /scenarios/{name}", "DELETE /scenarios/{name}",
    "POST /feedback", "GET /feedback/summary", "GET /traffic", "GET /scenarios",
    "GET /models", "GET /catalogues", "GET /livez", "GET /readyz", "GET /metrics",
    "GET /v2", "GET /v2/health/live", "GET /v2/health/ready",
)  # fmt: skip
TAKES_NOTHING = ROUTES[-11:]  # and so cannot be asked wrongly
load_all_checks()
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[TestClient]:
    """One service for all examples, so that what one leaves behind can hurt the next; nobody else has its catalogue."""
    engine = Engine(tiny_model(neighbours=True))
    app = create_app(settings(api_keys=digest(KEY), admin_keys=digest(KEY), max_body_bytes=100_000), engine)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield ready(client)


@pytest.fixture(scope="module")
def schema(fuzzed: TestClient) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_dict(fuzzed.get("/openapi.json").json())


def test_every_route_is_fuzzed(schema: schemathesis.BaseSchema) -> None:
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {f"{each.method.upper()} {each.path}" for each in operations} == set(ROUTES)


@pytest.mark.parametrize(
    ("route", "mode"),
    [(route, Mode.POSITIVE) for route in ROUTES]
    + [(route, Mode.NEGATIVE) for route in ROUTES if route not in TAKES_NOTHING],
)
def test_answers_are_declared(fuzzed: TestClient, schema: Any, route: str, mode: Mode) -> None:
    method, path = route.split()
    operation = schema[path][method]
    bounded = profile(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @bounded
    @given(case=operation.as_strategy(generation_mode=mode))
    def answers(case: schemathesis.Case) -> None:
        response = send(fuzzed, case)
        assert response.status_code != 500 and response.headers["x-request-id"]
        if response.status_code >= 400 and path not in ("/livez", "/readyz"):
            assert response.headers["content-type"] == "application/problem+json"
            assert response.json()["status"] == response.status_code
        # A bad request spoils none of its neighbours in a batch, and a body that fits the document may still ask for a
        # catalogue, a beam or a bundle that does not exist, for more than 100%, for a time that ends as it begins, or
        # with a filter that cannot be read.
        refused = response.status_code == 413 or path == "/recommend/batch"
        more = [checks.negative_data_rejection] if mode.is_negative and not refused else []
        asks_for_more = path.startswith(("/recommend", "/rank", "/models", "/traffic", "/feedback"))
        asks_for_more |= path.endswith(("/similar", "/popular", "/trending"))
        asks_for_more |= route in ("PUT /items/{item_id}", "POST /items")
        asks_for_more |= route in ("PUT /catalogues/{name}", "PUT /scenarios/{name}")
        if mode.is_positive and not asks_for_more:
            more = [checks.positive_data_acceptance]
        case.validate_response(response, checks=CHECKS + more)

    answers()
    assert fuzzed.get("/readyz").status_code == 200
    assert "streamrec_invalid_items_total 0.0" in fuzzed.get("/metrics").text


def send(client: TestClient, case: schemathesis.Case) -> httpx.Response:
    request = case.as_transport_kwargs(base_url=str(client.base_url))
    body = request.pop("data", None)
    request["headers"] = {"X-API-Key": KEY} | dict(request["headers"])
    del request["cookies"]  # the document has none
    return client.request(**request, content=body)
