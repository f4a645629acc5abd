"""The code of docs/INTEGRATING.md, run as it stands against the service, but for its address and time budgets: machines
may be slow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from streamrec.client import Client, ServiceError
from tests.app.test_security import digest
from tests.builders import tiny_bundle
from tests.e2e.conftest import ServiceProcess, StartService
from tests.waiting import DEADLINE

TEXT = (Path(__file__).parents[2] / "docs/INTEGRATING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def service(start_service: StartService, tmp_path_factory: pytest.TempPathFactory) -> ServiceProcess:
    made = tiny_bundle(tmp_path_factory.mktemp("bundles") / "graph", neighbours=True)
    variables = {"STREAMREC_ADMIN_KEYS": digest("an admin key"), "STREAMREC_ROTATION_WINDOW_S": "3600"}
    return start_service(of=made, variables=variables)


@pytest.fixture(scope="module")
def page(service: ServiceProcess) -> dict[str, Any]:
    """The names that the document defines."""
    names: dict[str, Any] = {}
    code = "\n\n".join(BLOCKS).replace("timeout_ms=150", "timeout_ms=600_000")
    code = code.replace("http://127.0.0.1:8000", service.address).replace("timeout=1.0", f"timeout={DEADLINE}")
    exec(compile(code, "docs/INTEGRATING.md", "exec"), names)
    return names


def ids(items: list[dict[str, Any]]) -> list[str]:
    return [item["item_id"] for item in items]


def test_every_page_takes_twenty_lines() -> None:
    assert len(BLOCKS) == 6
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


def test_what_was_seen_goes_down_in_the_tuned_list_and_the_front_has_what_is_taken(page: dict[str, Any]) -> None:
    page["tune"]()
    page["user_did"]("cleo", ["i1", "i2"])
    first = page["mine"]("cleo")
    assert len(first["items"]) == 12 and first["reasoning_steps"] == 2
    page["seen"](first, ids(first["items"])[:3])
    assert not {*ids(first["items"])[:3]} & {*ids(page["mine"]("cleo")["items"])[:3]}
    for number in range(9):
        page["user_did"](f"buyer {number}", ["i58", "i59"])
    popular, rising = page["front"]("even")
    assert popular[0]["item_id"] == "i58" and len(popular) == 10 and "i58" in ids(rising)


def test_the_product_page_has_both_kinds_of_similar_items(page: dict[str, Any]) -> None:
    found = [page["product_page"](f"i{row}") for row in range(20)]
    assert any(together for together, _ in found) and all(len(both[0]) + len(both[1]) == 12 for both in found)
    assert {each["categories"][0] for part in page["product_page"]("i7", ["odd"]) for each in part} == {"odd"}


def test_the_cart_gets_what_is_in_stock_and_candidates_come_back_in_order(page: dict[str, Any]) -> None:
    stock = [f"i{row}" for row in range(20, 40)]
    assert set(ids(page["cart"](["i3", "i21"], stock))) < set(stock) - {"i21"}
    page["user_did"]("bob", ["i5"])
    ordered = page["in_order"]("bob", stock)
    assert sorted(ordered) == sorted(stock) and ordered != stock


def test_mails_repeat_nothing_and_their_clicks_are_counted(page: dict[str, Any], service: ServiceProcess) -> None:
    users = {f"u{number}": [f"i{number % 60}"] for number in range(120)}
    sent = page["mails"](users)
    assert sent.keys() == users.keys()
    assert all(not set(users[user]) & set(ids(found["items"])) for user, found in sent.items())
    first = sent["u0"]
    page["clicked"](first["recommendation_id"], first["items"][0]["item_id"])
    summary = service.http.get("/feedback/summary").text
    assert '"click' in summary


def test_a_service_that_is_busy_or_gone_leaves_the_page_to_itself(
    page: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def client(answer: httpx.Response | httpx.TransportError) -> Client:
        def send(request: httpx.Request) -> httpx.Response:
            if isinstance(answer, httpx.TransportError):
                raise answer
            return answer

        return Client("http://shop.test", transport=httpx.MockTransport(send), retries=0)

    shown = page["home"]("ann")
    for broken in (httpx.Response(503), httpx.ConnectError("nobody there")):
        monkeypatch.setitem(page, "shop", client(broken))
        assert page["home"]("ann") is page["more"]("ann", shown) is None and page["cart"]([], []) == []
        assert page["product_page"]("i1") == ([], []) and page["in_order"]("ann", ["i3", "i1"]) == ["i3", "i1"]
    monkeypatch.setitem(page, "shop", client(httpx.Response(422)))
    with pytest.raises(ServiceError):
        page["home"]("ann")
