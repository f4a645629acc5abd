"""What surrounds every request: ids, bounds, headers, keys, metrics, logs, settings, the page."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError

from app import __main__ as command
from app.headers import REFUSED
from app.settings import Settings, unknown_variables
from tests.app.conftest import Start, log_line, settings
from tests.app.test_recommend import HISTORY, ask


def test_every_answer_carries_a_request_id(client: TestClient) -> None:
    visible = "".join(map(chr, range(0x21, 0x7F))).replace('"', "").replace("\\", "")
    for good in ("abc-1", "x" * 128, visible, "Root=1-67891233;Sampled=1,{(#7)}"):
        assert client.get("/livez", headers={"X-Request-ID": good}).headers["x-request-id"] == good
    for bad in ("x" * 129, "a b", "a\x07b", "a\x7fb", 'a"b', "a\\b", b"a\xe9b", ""):
        made = client.get("/nowhere", headers={"X-Request-ID": bad}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", made)
    assert client.post("/recommend", content=b"{").headers["x-request-id"]


def test_a_body_beyond_the_bound_is_413_said_or_unsaid(start: Start) -> None:
    client = start(max_body_bytes=2000)
    headers = {"content-type": "application/json"}
    said = client.post("/recommend", content=b" " * 3000, headers=headers)
    unsaid = client.post("/recommend", content=(b" " * 500 for _ in range(6)), headers=headers)
    for response in (said, unsaid):
        assert response.status_code == 413 and response.headers["content-type"] == "application/problem+json"
    assert client.post("/recommend", content=b"{}" + b" " * 1900, headers=headers).status_code == 200
    assert 'streamrec_rejected_total{reason="too_large"} 2.0' in client.get("/metrics").text


def test_unknown_paths_and_methods_are_problems(client: TestClient) -> None:
    for response, status in ((client.get("/nowhere"), 404), (client.get("/recommend"), 405)):
        assert response.status_code == response.json()["status"] == status
        assert response.headers["content-type"] == "application/problem+json"


def test_keys_where_they_are_set(start: Start) -> None:
    client = start(api_keys=hashlib.sha256(b"sesame").hexdigest())
    assert client.get("/models").status_code == 401
    assert ask(client, history=HISTORY).headers["www-authenticate"] == "Bearer"
    assert client.get("/models", headers={"X-API-Key": "guess"}).status_code == 403
    assert client.get("/models", headers={"X-API-Key": "sesame"}).status_code == 200
    assert client.get("/models", headers={"Authorization": "Bearer sesame"}).status_code == 200
    for path in ("/users/u", "/items", "/items/i1"):
        assert client.get(path).status_code == 401
    for path in ("/livez", "/readyz", "/metrics", "/", "/docs"):
        assert client.get(path).status_code == 200


def test_the_metrics_have_the_promised_names_and_no_ids(client: TestClient) -> None:
    ask(client, 2, user_id="secret-user", history=["i1"])
    ask(client, 2)
    client.get("/users/secret-user")
    client.get("/items/i7")
    client.get("/secret-path")
    client.get("/recommend")
    text = client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name in (
        "request_seconds", "stage_seconds", "batch_size", "beam_rows", "reasoning_steps", "cache", "rejected",
        "fallback", "queue_depth", "model_info", "invalid_items",
    ):  # fmt: skip
        assert f"streamrec_{name}" in families
    assert "streamrec_invalid_items_total 0.0" in text and "secret" not in text and "i7" not in text
    labels = {(s.labels["route"], s.labels["status"]) for s in families["streamrec_request_seconds"].samples}
    assert {
        ("/recommend", "200"),
        ("/recommend", "405"),
        ("/users/{user_id}", "200"),
        ("/items/{item_id}", "200"),
        ("unmatched", "404"),
    } <= labels
    stages = {
        s.labels["stage"] for s in families["streamrec_stage_seconds"].samples if s.name.endswith("_count") and s.value
    }
    assert stages == {"queue", "cache", "encode", "reason", "decode", "serialise"}
    bounds = [float(s.labels["le"]) for s in families["streamrec_stage_seconds"].samples if "le" in s.labels]
    assert min(bounds) == 0.001
    assert {s.name for s in families["streamrec_model_info"].samples} == {"streamrec_model_info"}
    assert 'streamrec_fallback_total{reason="cold_user"} 1.0' in text


def test_logs_are_json_and_hold_no_user_or_item(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "streamrec")
    ask(client, 2, user_id="secret-user", history=["i1"])
    client.get("/users/secret-user", headers={"X-Request-ID": "r1"})
    records = [record for record in caplog.records if record.name.startswith("streamrec")]
    lines = [json.loads(log_line(record)) for record in records]
    (line,) = (line for line in lines if line.get("route") == "/users/{user_id}")
    assert line["message"] == "request" and line["status"] == 200 and line["level"] == "info" and line["ms"] > 0
    assert line["time"].endswith("Z") and line["logger"] == "streamrec.http"
    assert not any("secret" in json.dumps(line) for line in lines)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", {"page/script.js", "page/style.css"}),
        ("/docs", {"page/docs.js", "page/docs.css", "page/swagger-ui-bundle.js", "page/swagger-ui.css"}),
    ],
)
def test_pages_are_whole_and_keep_their_own_policy(client: TestClient, path: str, expected: set[str]) -> None:
    page = client.get(path)
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"""(?:src|href)=.?/|["'`]/(?:page|items|models|recommend|metrics|docs)\b""", page.text)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=|<style", page.text), "inline code would be blocked"
    used = re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)
    assert set(used) == expected
    code = "".join(client.get(name).text for name in used if name.endswith(".js") and "swagger" not in name)
    used += [f"page/{name}" for name in re.findall(r'from "\./([\w.]+)"', code)]
    answers = {name: client.get(name) for name in used}
    assert {answer.status_code for answer in answers.values()} == {200}
    assert set(re.findall(r'\$\("([\w-]+)"\)', code)) <= set(re.findall(r'id="([\w-]+)"', page.text))
    # Swagger UI is full of addresses; the test with a browser shows that it calls none of them.
    everything = page.text + "".join(answer.text for name, answer in answers.items() if "swagger" not in name)
    assert not re.search(r"https?://(?!www\.w3\.org)", everything)
    assert client.get("/page/%2e%2e%2fsettings.py").status_code == client.get("/page/other.js").status_code == 404


def test_the_api_is_described(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {
        "/recommend",
        "/recommend/batch",
        "/users/{user_id}/events",
        "/users/{user_id}",
        "/items",
        "/models",
    } <= set(paths)
    parameters = {parameter["name"] for parameter in paths["/recommend"]["post"]["parameters"]}
    assert "reasoning_steps" in parameters


# Settings


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMREC_MAX_BEAM_WIDTH", "123")
    monkeypatch.setenv("STREAMREC_REDIS_URL", "")
    monkeypatch.setenv("STREAMREC_PORT", "tcp://10.0.0.1:8000")  # what Kubernetes sets beside a service of this name
    monkeypatch.setenv("STREAMREC_MEMORY_CACHE_USER", "0")
    read = Settings()
    assert (read.max_beam_width, read.redis_url, read.port) == (123, None, 8000)
    assert unknown_variables() == ["STREAMREC_MEMORY_CACHE_USER"]


@pytest.mark.parametrize(
    "values",
    [{"max_beam_width": 10}, {"port": 70000}, {"api_keys": "plain"}, {"nothing": 1}, {"user_hash_key": "x" * 65}],
)
def test_settings_that_do_not_fit_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        settings(**values)
    assert settings().max_beam_width >= 100


def test_no_setting_is_larger_than_what_it_is_used_as() -> None:
    """A time span that Python or Redis cannot hold is noticed at the start, and not at the first event."""
    numbers = {name for name, value in settings() if isinstance(value, int | float)} - {"port"}
    assert {"known_ttl_s", "feedback_retention_days", "redis_timeout_ms", "max_known_items"} <= numbers
    for name in numbers:
        with pytest.raises(ValidationError) as caught:
            settings(**{name: 10**23})
        assert caught.value.errors()[0]["loc"] == (name,) and caught.value.error_count() == 1
    longest = settings(known_ttl_s=100 * 365 * 86_400, feedback_retention_days=36_500)
    assert timedelta(days=longest.feedback_retention_days) == timedelta(seconds=longest.known_ttl_s)


def test_a_state_folder_that_cannot_be_used_ends_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert command.serve(settings(state_dir=folder, port=0)) == 1
        said = capsys.readouterr().err
        assert str(folder) in said and "--state-dir" in said and said.count("\n") == 1
    assert command.unusable(tmp_path / "new" / "one") is None and list((tmp_path / "new" / "one").iterdir()) == []


def test_what_the_guard_has_answered_is_logged_with_its_status_and_id(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    """As when half a body takes too long: the application sees a client that has left."""

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def nothing(message: Any) -> None:
        """As the server: nobody is left to answer."""

    headers = [(b"content-type", b"application/json"), (b"x-request-id", b"mine")]
    scope = {"type": "http", "method": "POST", "path": "/feedback", "raw_path": b"/feedback", "query_string": b"",
             "headers": headers, "scheme": "http", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1),
             "http_version": "1.1", "root_path": "", "state": {REFUSED: 408}}  # fmt: skip
    with caplog.at_level(logging.INFO, "streamrec.http"):
        asyncio.run(client.app(scope, gone, nothing))  # type: ignore[arg-type]
    [line] = [record for record in caplog.records if record.message == "request"]
    assert line.status == 408 and scope["state"]["request_id"] == "mine"  # type: ignore[attr-defined]
