"""Keys, admin keys, security headers, and pages of other origins."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from app import security
from app.checks import admin_router
from tests.app.conftest import Start, settings
from tests.app.test_recommend import HISTORY, ask


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def sending(key: str) -> dict[str, str]:
    return {"X-API-Key": key}


# Keys


def test_an_admin_key_may_do_what_a_key_may(start: Start) -> None:
    client = start(api_keys=digest("user"), admin_keys=digest("admin"))
    statuses = [client.get("/models", headers=sending(key)).status_code for key in ("user", "admin", "none")]
    assert statuses == [200, 200, 403]


@pytest.mark.parametrize(
    ("keys", "sent", "status"),
    [
        ({"admin_keys": digest("admin")}, "admin", 200),
        ({"admin_keys": digest("admin")}, "other", 403),
        ({"admin_keys": digest("admin")}, "", 401),
        ({"admin_keys": digest("admin"), "api_keys": digest("user")}, "user", 403),
        ({"admin_keys": digest("admin"), "api_keys": digest("user")}, "", 401),
        ({"api_keys": digest("user")}, "user", 403),  # nobody is an admin where no admin key is configured
        ({}, "any", 403),
        ({}, "", 403),
    ],
)
def test_admin_routes_need_an_admin_key(start: Start, keys: dict[str, str], sent: str, status: int) -> None:
    client = with_admin_route(start(**keys))
    response = client.put("/admin", content=b"no JSON", headers=sending(sent) if sent else {})
    assert response.status_code == status
    if status != 200:
        assert response.headers["content-type"] == "application/problem+json"
        assert ("STREAMREC_ADMIN_KEYS" in response.json()["detail"]) == ("admin_keys" not in keys)


def test_wrong_admin_keys_are_guesses_and_a_plain_key_is_none(start: Start) -> None:
    client = with_admin_route(start(admin_keys=digest("admin"), api_keys=digest("user"), quota="4/hour"))
    assert [client.put("/admin", headers=sending("user")).status_code for _ in range(3)] == [403] * 3
    assert [client.put("/admin", headers=sending("wrong")).status_code for _ in range(5)] == [403] * 4 + [429]
    assert client.get("/models", headers=sending("user")).status_code == 200
    assert client.put("/admin", headers=sending("admin")).status_code == 200
    open_client = with_admin_route(start(admin_keys=digest("admin")))  # everybody may call, few may change
    assert [open_client.put("/admin", headers=sending(str(i))).status_code for i in range(101)] == [403] * 100 + [429]


def with_admin_route(client: TestClient) -> TestClient:
    router = admin_router()
    router.add_api_route("/admin", lambda: {}, methods=["PUT"])
    client.app.include_router(router)  # type: ignore[attr-defined]
    return client


def test_every_key_is_compared_in_constant_time(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start(api_keys=",".join(digest(key) for key in ("first", "second", "third")))
    compared: list[str] = []
    real = security.hmac.compare_digest

    def spy(sent: str, known: str) -> bool:
        compared.append(known)
        return real(sent, known)

    monkeypatch.setattr(security.hmac, "compare_digest", spy)
    assert client.get("/models", headers=sending("first")).status_code == 200
    assert compared == [digest(key) for key in ("first", "second", "third")]  # no early end at the first


def test_a_key_that_is_no_ascii_is_refused_and_not_a_fault(start: Start) -> None:
    client = start(api_keys=digest("user"))
    assert client.get("/models", headers={"X-API-Key": "schlüssel".encode()}).status_code == 403  # type: ignore[dict-item]


# Settings


@pytest.mark.parametrize(
    "values",
    [{"quota": "many"}, {"work_quota": "many"}, {"quota": "0/minute"}, {"admin_keys": "plain"},
     {"cors_origins": "shop.example"},
     {"cors_origins": "https://shop.example/page"}, {"trusted_proxies": "proxy"}, {"trusted_proxies": "*"},
     {"allowed_hosts": "http://shop.example"}, {"allowed_hosts": "shop.example:80"},
     {"otlp_endpoint": "collector:4317"}],
)  # fmt: skip
def test_settings_of_the_edge_that_do_not_fit_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings(**values)


# Hosts


@pytest.mark.parametrize(
    ("values", "permitted", "refused"),
    [
        ({}, ["localhost", "LocalHost:8000", "localhost.", "127.0.0.1:8000", "[::1]:8000", "[::1]", "10.1.2.3", "",
          "mine.localhost:8000", "laptop"],
         ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "1.2.3"]),
        ({"host": "::1"}, ["localhost"], ["evil.example"]),
        ({"host": "0.0.0.0"}, ["shop.example"], []),
        ({"api_keys": "a" * 64}, ["shop.example"], []),
        ({"allowed_hosts": "*"}, ["shop.example"], []),
        ({"allowed_hosts": "Shop.example, api.example", "host": "0.0.0.0", "api_keys": "a" * 64},
         ["shop.example:443", "api.example", "10.0.0.1:8000"], ["localhost", "x.shop.example", "laptop"]),
    ],
)  # fmt: skip
def test_a_service_answers_to_its_names(values: dict[str, str], permitted: list[str], refused: list[str]) -> None:
    hosts = security.Hosts(settings(**values))
    assert [host for host in permitted if not hosts.permit(host.encode())] == []
    assert [host for host in refused if hosts.permit(host.encode())] == []


def test_a_name_that_is_not_the_services_is_refused_on_every_route(client: TestClient) -> None:
    for path in ("/", "/models", "/livez", "/metrics", "/nowhere"):
        refused = client.get(path, headers={"Host": "evil.example"})
        assert refused.status_code == 403 and "STREAMREC_ALLOWED_HOSTS" in refused.json()["detail"]
    assert client.get("/models", headers={"Host": "localhost:8000"}).status_code == 200


# Browsers


def test_security_headers_are_on_every_answer(client: TestClient) -> None:
    for response in (client.get("/"), ask(client, history=HISTORY), client.get("/nowhere"), client.get("/livez")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        assert "strict-transport-security" not in response.headers  # only where it came over TLS
    page = client.get("/").headers
    assert page["x-frame-options"] == "DENY" and page["referrer-policy"] == "no-referrer"
    secure = client.get("https://testserver/livez")
    assert secure.headers["strict-transport-security"].startswith("max-age=")


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type, x-api-key"}


def test_other_origins_are_shut_out_by_default(client: TestClient) -> None:
    origin = {"Origin": "https://shop.example"}
    assert "access-control-allow-origin" not in client.get("/models", headers=origin).headers
    preflight = client.options("/recommend", headers=origin | PREFLIGHT)
    assert preflight.status_code == 405 and "access-control-allow-origin" not in preflight.headers


def test_an_origin_that_is_configured_may_call(start: Start) -> None:
    client = start(cors_origins="https://shop.example, https://app.example")
    origin = {"Origin": "https://shop.example"}
    preflight = client.options("/recommend", headers=origin | PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://shop.example"
    answer = client.post("/recommend", json={"history": HISTORY}, headers=origin)
    assert answer.headers["access-control-allow-origin"] == "https://shop.example"
    assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
    refused = client.options("/recommend", headers={"Origin": "https://elsewhere.example"} | PREFLIGHT)
    assert refused.status_code == 403 and refused.headers["content-type"] == "application/problem+json"
    assert "access-control-allow-origin" not in refused.headers and refused.headers["x-request-id"]
