"""The code of docs/INTEGRATING.md, run as it stands against the service, but for time budgets: machines may be slow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from serving.engine import Engine
from tests.app.conftest import ready, settings
from tests.builders import tiny_model

TEXT = (Path(__file__).parents[2] / "docs/INTEGRATING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """The names that the document defines, with the service behind its client."""
    app = create_app(settings(), Engine(tiny_model(neighbours=True)))
    with TestClient(app) as client:
        ready(client)
        names: dict[str, Any] = {}
        code = "\n\n".join(BLOCKS).replace('"timeout_ms": 150', '"timeout_ms": 600_000')
        exec(compile(code, "docs/INTEGRATING.md", "exec"), names)
        names["shop"].close()
        names["shop"] = client
        yield names


def ids(items: list[dict[str, Any]]) -> list[str]:
    return [item["item_id"] for item in items]


def test_every_page_takes_twenty_lines() -> None:
    assert len(BLOCKS) == 5
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 20


def test_the_home_page_knows_what_the_user_did_and_goes_on_without_repeating(page: dict[str, Any]) -> None:
    assert len(page["home"]("new")["items"]) == 8  # by popularity: four of each of the two categories
    page["user_did"]("ann", ["i1", "i2"])
    first = page["home"]("ann")
    assert sorted(item["categories"][0] for item in first["items"]) == ["even"] * 4 + ["odd"] * 4
    shown = {"i1", "i2", *ids(first["items"])}
    second = page["more"]("ann", first)
    third = page["more"]("ann", second)
    assert len({*ids(second["items"]), *ids(third["items"])} - shown) == 24


def test_the_product_page_has_both_kinds_of_similar_items(page: dict[str, Any]) -> None:
    found = [page["product_page"](f"i{row}") for row in range(20)]
    assert any(together for together, _ in found) and all(len(both[0]) + len(both[1]) == 12 for both in found)
    assert {each["categories"][0] for part in page["product_page"]("i7", "odd") for each in part} == {"odd"}


def test_the_cart_gets_what_is_in_stock_and_candidates_come_back_in_order(page: dict[str, Any]) -> None:
    stock = [f"i{row}" for row in range(20, 40)]
    assert set(ids(page["cart"](["i3", "i21"], stock))) < set(stock) - {"i21"}
    page["user_did"]("bob", ["i5"])
    ordered = page["in_order"]("bob", stock)
    assert sorted(ordered) == sorted(stock) and ordered != stock


def test_mails_repeat_nothing_and_their_clicks_are_counted(page: dict[str, Any]) -> None:
    users = {f"u{number}": [f"i{number % 60}"] for number in range(120)}
    sent = page["mails"](users)
    assert sent.keys() == users.keys()
    assert all(not set(users[user]) & set(ids(found["items"])) for user, found in sent.items())
    first = sent["u0"]
    page["clicked"](first["recommendation_id"], first["items"][0]["item_id"])
    summary = page["shop"].get("/feedback/summary").text
    assert '"click' in summary


def test_a_service_that_is_busy_or_gone_leaves_the_page_to_itself(
    page: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503)

    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("nobody there")

    for broken in (busy, gone):
        monkeypatch.setitem(page, "shop", httpx.Client(transport=httpx.MockTransport(broken), base_url="http://test"))
        assert page["home"]("ann") == {"items": []} and page["product_page"]("i1") == ([], [])
        assert page["in_order"]("ann", ["i3", "i1"]) == ["i3", "i1"] and page["mails"]({"u": []}) == {}
    wrong = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(422)), base_url="http://test")
    monkeypatch.setitem(page, "shop", wrong)
    with pytest.raises(httpx.HTTPStatusError):
        page["home"]("ann")
