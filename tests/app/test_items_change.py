"""Items that operators put and take away while the service answers."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from app import lifecycle
from app.main import create_app
from serving.bundle import Bundle
from serving.engine import Engine
from serving.items import tokenizer
from serving.items.catalogue import Catalogue
from serving.items.newcomers import LIKE
from serving.items.tokenizer import Codec, load_tokenizer, save_tokenizer
from serving.types import Rules
from tests.app.conftest import Gate, ready, settings
from tests.app.test_security import digest, sending
from tests.builders import GATE, tiny_bundle
from tests.conftest import RedisServer
from tests.waiting import DEADLINE, eventually

WIDTH = 8  # of a text's embedding
SIZES = (6, 5, 12)
ADMIN = sending("admin")
Serve = Callable[..., TestClient]


def embed(texts: list[str], name: str, progress: bool = False) -> np.ndarray:
    """An embedding in place of a language model's: equal texts have equal ones."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") for text in texts]
    return np.stack([np.random.default_rng(seed).standard_normal(WIDTH) for seed in seeds]).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose semantic IDs are made from text, and that has an item memory."""
    memory = {"neighbours": True, "neighbours_weight": 1.0, "gate": GATE}
    made = tiny_bundle(tmp_path_factory.mktemp("bundle") / "b", 80, sizes=SIZES, **memory)
    draw = torch.Generator().manual_seed(0)
    codebooks = tuple(torch.randn(size, WIDTH, generator=draw) for size in SIZES)
    codec = Codec("text", torch.zeros(WIDTH), torch.eye(WIDTH), (torch.eye(WIDTH),), (torch.zeros(WIDTH),), codebooks)
    save_tokenizer(made / "tokenizer", codec, "in a test", {})
    return made


@pytest.fixture
def serve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts services with the bundle; each has a catalogue of its own."""
    monkeypatch.setattr(tokenizer, "embed_text", embed)
    monkeypatch.setattr("serving.bundle.check_files", lambda *_: None)  # the tokenizer was written after the manifest
    with ExitStack() as stack:

        def begin(**values: Any) -> TestClient:
            engine = Engine(Bundle.load(folder))
            app = create_app(settings(admin_keys=digest("admin"), **values), engine)
            return ready(stack.enter_context(TestClient(app, raise_server_exceptions=False)))

        yield begin


def put(client: TestClient, item: str, **fields: Any) -> Any:
    return client.put(f"/items/{item}", json={"title": f"The {item}", **fields}, headers=ADMIN)


def delete(client: TestClient, item: str) -> int:
    return client.delete(f"/items/{item}", headers=ADMIN).status_code


def everything(client: TestClient, **rules: Any) -> list[str]:
    """All items that a request is recommended, which asks for all there are."""
    body = {"history": ["i1", "i2"], "k": 150, "beam_width": 150, "exclude_seen": False, **rules}
    answer = client.post("/recommend", json=body)
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


def test_an_item_that_is_put_can_be_recommended_and_read_at_once(serve: Serve) -> None:
    client = serve()
    before = everything(client)
    assert "lamp" not in before and client.get("/items/lamp").status_code == 404
    made = put(client, "lamp", brand="Lux", categories=["light"], description="warm", fields={"stock": 3, "eu": True})
    assert made.status_code == 200, made.text
    assert made.json()["title"] == "The lamp" and made.json()["fields"] == {"stock": 3, "eu": True}
    assert client.get("/items/lamp").json() == made.json()
    assert set(everything(client)) == {*before, "lamp"}
    assert everything(client, categories=["light"]) == ["lamp"]
    assert everything(client, allow=["lamp", "i3"], deny=["i3"]) == ["lamp"]
    assert "lamp" not in everything(client, history=["lamp", "i1"], exclude_seen=True)
    answer = client.post("/recommend", json={"history": ["lamp"], "k": 3, "explain": True}).json()
    assert answer["unknown_items"] == [] and answer["source"] == "model"  # its tokens are a history like any other
    assert [item["item_id"] for item in client.get("/items?query=the lamp").json()["items"]] == ["lamp"]
    tokens = [client.get(f"/items/i{row}").json()["tokens"] for row in range(80)]
    assert made.json()["tokens"] not in tokens


def test_an_item_is_changed_in_place_and_keeps_its_semantic_id(serve: Serve) -> None:
    client = serve()
    tokens = client.get("/items/i4").json()["tokens"]
    changed = put(client, "i4", title="Another name", categories=["rare"]).json()
    assert changed["tokens"] == tokens and changed["title"] == "Another name"
    assert everything(client, categories=["rare"]) == ["i4"]
    assert "i4" not in everything(client, categories=["even"])
    assert client.get("/items?query=number 4&limit=100").json()["items"] != []
    found = [item["item_id"] for item in client.get("/items?query=number 4&limit=100").json()["items"]]
    assert "i4" not in found and "i44" in found
    assert client.get("/items?query=another").json()["items"][0]["item_id"] == "i4"


def test_an_item_that_is_deleted_is_in_no_answer_and_can_be_put_again(serve: Serve) -> None:
    client = serve()
    tokens = client.get("/items/i4").json()["tokens"]
    assert "i4" in everything(client) and delete(client, "i4") == 204
    assert "i4" not in everything(client) and client.get("/items/i4").status_code == 404
    assert "i4" not in everything(client, allow=["i4", "i5"])
    assert client.post("/recommend", json={"history": ["i4", "i5"], "k": 5}).json()["unknown_items"] == []
    popular = client.post("/recommend", json={"user_id": "nobody", "k": 100}).json()
    assert popular["source"] == "popularity" and "i4" not in [item["item_id"] for item in popular["items"]]
    assert "i4" not in [item["item_id"] for item in client.get("/items?limit=100").json()["items"]]
    assert delete(client, "i4") == delete(client, "never") == 404
    assert put(client, "i4").json()["tokens"] == tokens and "i4" in everything(client)
    assert "streamrec_invalid_items_total 0.0" in client.get("/metrics").text


def test_a_removed_item_is_unknown_but_in_a_history(serve: Serve) -> None:
    client = serve()
    body = {"history": ["i1", "i3"], "allow": ["i3", "i4", "no"], "deny": ["i3", "none"]}
    assert client.post("/recommend", json=body).json()["unknown_items"] == ["none", "no"]
    delete(client, "i3")
    assert client.post("/recommend", json=body).json()["unknown_items"] == ["i3", "none", "no"]
    assert client.post("/recommend", json={"history": ["i3"]}).json()["unknown_items"] == []
    ranked = client.post("/rank", json={"history": ["i1"], "items": ["i3", "i4", "no"]}).json()
    assert sorted(ranked["unknown_items"]) == ["i3", "no"]
    for path in ("/popular", "/trending", "/items/i1/similar"):
        assert client.get(path, params={"allow": ["i3", "i4"]}).json()["unknown_items"] == ["i3"]
    assert client.post("/users/u/events", json={"items": ["i3", "i4"]}).json()["unknown_items"] == ["i3"]
    put(client, "i3")
    assert client.post("/recommend", json=body).json()["unknown_items"] == ["none", "no"]


def test_the_models_items_and_categories_are_those_of_the_live_catalogue(serve: Serve) -> None:
    client = serve()

    def model() -> tuple[int, list[str]]:
        [found] = client.get("/models").json()["models"]
        assert found["items"] == client.get("/catalogues").json()["items"]
        return found["items"], found["categories"]

    def status(category: str) -> int:
        return client.post("/recommend", json={"history": ["i1"], "categories": [category]}).status_code

    assert model() == (80, ["even", "odd"]) and status("light") == 422
    put(client, "lamp", categories=["light", "light", "even"])
    put(client, "torch", categories=["light"], available_from="2100-01-01T00:00:00Z")
    assert model() == (81, ["even", "light", "odd"]) and status("light") == 200
    delete(client, "lamp")
    assert model() == (80, ["even", "light", "odd"])  # the other is only not available yet
    put(client, "torch", categories=["dark"])
    assert model() == (81, ["dark", "even", "odd"]) and status("light") == 422
    delete(client, "torch"), delete(client, "torch")
    assert model() == (80, ["even", "odd"]) and status("dark") == 422
    put(client, "lamp", categories=["light"])
    assert model() == (81, ["even", "light", "odd"]) and status("light") == 200


def test_what_changes_during_a_search_is_left_out_of_its_answer_and_counts_as_no_fault(serve: Serve) -> None:
    client = serve()
    engine, gate = client.app.state.service.recommender.engine, Gate()  # type: ignore[attr-defined]
    search = engine.search

    def held(*arguments: Any) -> Any:
        found = search(*arguments)
        gate()
        return found

    engine.search = held
    with ThreadPoolExecutor(3) as pool:
        answer = pool.submit(everything, client, categories=["even"])
        assert gate.reached.wait(DEADLINE)
        over = {"item_id": "i4", "title": "Four", "available_until": "2020-01-01T00:00:00Z"}
        moved = {"item_id": "i6", "title": "Six", "categories": ["odd"]}
        changed = pool.submit(client.post, "/items", json={"items": [over, moved]}, headers=ADMIN)
        catalogue = client.app.state.service.bundle.catalogue  # type: ignore[attr-defined]
        eventually(lambda: not catalogue.listed[4] and catalogue.categories[6] == ["odd"])
        gate.opened.set()
        found = answer.result()
        assert changed.result().status_code == 200
    assert "i2" in found and not {"i4", "i6"} & set(found)
    assert "i6" in everything(client, categories=["odd"])
    assert "streamrec_invalid_items_total 0.0" in client.get("/metrics").text


def test_nobody_waits_while_named_catalogues_are_counted(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client, gate, members = serve(), Gate(), Catalogue.members

    def held(catalogue: Catalogue, rules: Rules) -> np.ndarray:
        gate()
        return members(catalogue, rules)

    monkeypatch.setattr(Catalogue, "members", held)
    with ThreadPoolExecutor(1) as pool:
        listed = pool.submit(client.get, "/catalogues")
        assert gate.reached.wait(DEADLINE)
        assert client.get("/livez").status_code == 200  # on the loop that would be counting
        gate.opened.set()
    assert [each["name"] for each in listed.result().json()["catalogues"]] == ["small"]


def test_an_item_is_available_in_its_window_alone(serve: Serve) -> None:
    client = serve()

    def at(seconds: float) -> str:
        return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()

    put(client, "over", available_until=at(-1))
    put(client, "later", available_from=at(3600))
    put(client, "soon", available_from=at(0.3))
    put(client, "i7", available_from=at(-5), available_until=at(0.3))
    assert not {"over", "later"} & set(everything(client))
    eventually(lambda: "soon" in everything(client) and "i7" not in everything(client))
    put(client, "later")  # whatever is left out is emptied
    assert "later" in everything(client) and "available_from" not in client.get("/items/later").json()
    wrong = put(client, "x", available_from=at(5), available_until=at(4))
    assert wrong.status_code == 422 and "later than" in wrong.json()["detail"]
    # A number would be guessed to be seconds or milliseconds by its size.
    for unclear in ("2030-01-01T00:00:00", "2030-01-01", 253402300799, 1.9e9, "253402300799", "-5", "1e9", True, ""):
        for name in ("available_from", "available_until"):
            refused = put(client, "x", **{name: unclear})
            assert refused.status_code == 422 and refused.json()["field"] == name, unclear


def test_there_is_a_limit_to_named_catalogues(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "MAX_SUBSETS", 2)
    client, subset = serve(), {"items": ["i1"]}
    statuses = [
        client.put(f"/catalogues/{name}", json=subset, headers=ADMIN).status_code for name in ("one", "two", "one")
    ]
    assert statuses == [200, 422, 200]  # `small` is in the bundle; one that is there can be replaced


def test_an_item_that_nobody_could_read_is_refused(serve: Serve) -> None:
    client = serve()
    one = put(client, "a%2Fsimilar", title="Four")
    many = client.post("/items", json={"items": [{"item_id": "a/similar", "title": "Four"}]}, headers=ADMIN)
    for refused in (one, many):
        assert refused.status_code == 422 and refused.json()["field"].endswith("item_id"), refused.text


def test_what_would_be_dropped_of_an_item_is_refused(serve: Serve) -> None:
    client = serve()
    for hidden in ({"brand": "ours", "fields": {"brand": 5}}, {"fields": {"categories": ["x"]}}):
        refused = put(client, "x", title="Four", **hidden)
        assert refused.status_code == 422 and "a place of their own" in refused.json()["detail"]
    put(client, "i4", title="Four", fields={"brand": "theirs"})
    assert client.get("/items/i4").json()["brand"] == "theirs"


@pytest.mark.parametrize("time", [
    "9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59-01:00", "0001-01-01T00:00:00+05:00",
])  # fmt: skip
def test_a_time_beyond_the_calendar_is_refused_and_the_last_one_in_it_is_not(serve: Serve, time: str) -> None:
    client = serve()
    for field in ("available_from", "available_until"):
        refused = put(client, "i7", **{field: time})
        assert refused.status_code == 422 and refused.json()["field"] == field
        assert "must lie in the years 1 to 9999 in UTC" in refused.json()["detail"]
    known = {"available_from": "0001-01-01T00:00:00Z", "available_until": "9999-12-31T23:59:59Z"}
    assert put(client, "i7", **known, fields={"released": time}).json().items() >= known.items()
    assert client.get("/items/i7").json()["fields"] == {"released": time}  # a string
    assert client.get("/items?limit=100").status_code == 200 and "i7" in everything(client)
    entry = {"do": "put", "item_id": "i8", "title": "Eight", "brand": None, "categories": [], "fields": {}}
    stored = {"available_from": None, "available_until": 253402300800.0}  # by an earlier version
    service = client.app.state.service  # type: ignore[attr-defined]
    client.portal.call(service.changes.make, "catalogue", [entry | stored])  # type: ignore[union-attr]
    assert client.get("/items/i8").json()["available_until"].startswith("9999-12-31T23:59:59")
    assert changed_items(client)["items"][0]["item_id"] == "i8"


def test_many_are_put_with_a_result_for_each(serve: Serve) -> None:
    client = serve()
    items = [{"item_id": f"n{n}", "title": f"new {n}", "categories": ["new"]} for n in range(5)]
    items += [{"item_id": "n2", "title": "twice"}, {"item_id": "bare"}, {"item_id": "i1", "title": "One"}]
    items += [{"item_id": "long", "title": "x", "categories": ["\u4e00" * 250 + str(n) for n in range(100)]}]
    body = {"items": items}
    answer = client.post("/items", json=body, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert [result.get("item_id") for result in results] == [*(f"n{n}" for n in range(5)), None, None, "i1", None]
    assert [results[index]["status"] for index in (5, 6, 8)] == [422, 409, 422]
    assert "named twice" in results[5]["detail"] and "needs a text" in results[6]["detail"]
    assert "65536 bytes" in results[8]["detail"]
    assert sorted(everything(client, categories=["new"])) == [f"n{n}" for n in range(5)]
    assert client.get("/items/n2").json()["title"] == "new 2"


def test_where_no_semantic_id_is_left_the_answer_says_so_and_nothing_else_changes(serve: Serve) -> None:
    client = serve()
    texts = [{"item_id": f"twin{n}", "title": "one and the same text"} for n in range(14)]
    results = client.post("/items", json={"items": texts}, headers=ADMIN).json()["results"]
    made = [result for result in results if "tokens" in result]
    assert 6 <= len(made) <= 12  # codes of the last level; some are taken
    assert len({tuple(result["tokens"]) for result in made}) == len(made)
    assert len({tuple(result["tokens"][:2]) for result in made}) == 1
    assert {(result["status"], result["type"]) for result in results if "tokens" not in result} == {
        (409, "urn:streamrec:problem:no-semantic-id")
    }
    assert {"twin0"} <= set(everything(client)) and put(
        client, "twin13", title="one and the same text"
    ).status_code == 409


def test_a_bundle_whose_ids_are_not_made_from_text_takes_no_new_item(tmp_path: Path) -> None:
    engine = Engine(Bundle.load(tiny_bundle(tmp_path / "b", 20)))
    with TestClient(create_app(settings(admin_keys=digest("admin")), engine)) as client:
        refused = put(ready(client), "lamp")
        assert refused.status_code == 409 and "tokenizer" in refused.json()["detail"]
        assert put(client, "i3").status_code == 200 and delete(client, "i5") == 204


def test_a_named_catalogue_is_a_list_or_a_filter_that_follows_its_items(serve: Serve) -> None:
    client = serve()

    def name(catalogue: str, **subset: Any) -> Any:
        return client.put(f"/catalogues/{catalogue}", json=subset, headers=ADMIN)

    assert name("few", items=["i3", "i5", "never"]).json() == {"name": "few", "items": 2}
    assert sorted(everything(client, catalogue="few")) == ["i3", "i5"]
    name("few", items=["i5", "i8"])
    assert sorted(everything(client, catalogue="few")) == ["i5", "i8"]
    put(client, "lamp", fields={"country": "DE", "stock": 3}, categories=["light"])
    made = name("in DE", filter='country in ["DE","AT"]').json()
    assert made == {"name": "in DE", "items": 1, "filter": 'country in ["AT", "DE"]'}
    name("lit", filter='categories has ["light", "even"] and country == "DE"')
    assert everything(client, catalogue="in DE") == everything(client, catalogue="lit") == ["lamp"]
    put(client, "i3", fields={"country": "AT"})
    put(client, "vase", fields={"country": "DE"})
    assert sorted(everything(client, catalogue="in DE")) == ["i3", "lamp", "vase"]
    put(client, "lamp", fields={"country": "FR"})
    delete(client, "vase")
    assert everything(client, catalogue="in DE") == ["i3"] and everything(client, catalogue="lit") == []
    assert everything(client, catalogue="small", categories=["odd"]) == everything(client, allow=["i1"])
    listed = {each["name"]: each["items"] for each in client.get("/catalogues").json()["catalogues"]}
    assert listed == {"few": 2, "in DE": 1, "lit": 0, "small": 5}
    assert name("x", items=["i1"], filter="a < 1").status_code == name("x").status_code == 422
    wrong = name("x", filter="a <").json()
    assert (wrong["status"], wrong["field"], wrong["position"]) == (422, "filter", 4)
    assert client.put("/catalogues/x", json={"items": []}).status_code == 401
    assert "streamrec_invalid_items_total 0.0" in client.get("/metrics").text


def test_requests_filter_by_what_items_are_at_the_time(serve: Serve) -> None:
    client = serve()
    today = datetime.now(UTC)
    for row in range(8):
        added = (today - timedelta(days=row)).isoformat(timespec="seconds")
        fields = {"price": 10 * row, "added": added, "sale": row % 2 == 0, "sizes": ["S", "M"][: row % 3]}
        assert put(client, f"i{row}", brand="AB"[row % 2], fields=fields).status_code == 200
    kept = client.get("/items/i4").json()
    assert kept["brand"] == "A" and kept["fields"]["price"] == 40 and kept["fields"]["sale"] is True
    assert kept["fields"]["sizes"] == ["S"] and "categories" not in kept["fields"]
    for text, rows in {
        "price < 30": [0, 1, 2],
        'price >= 30 and brand == "A" or not price < 70 and price < 1000': [4, 6, 7],
        'sizes has "M" and not sale == true': [5],
        "added > now - 84h": [0, 1, 2, 3],
        'brand in ["B", "C"] and price != 10': [3, 5, 7],
        "nobody == 1": [],
    }.items():
        assert sorted(everything(client, filter=text)) == [f"i{row}" for row in rows], text
        shown = client.get("/items/i1/similar", params={"filter": text, "k": 50}).json()["items"]
        assert sorted(item["item_id"] for item in shown) == [f"i{row}" for row in rows if row != 1], text
    assert everything(client, filter="price < 30", catalogue="small", deny=["i0"], allow=["i2", "i9"]) == ["i2"]
    ranked = client.post("/rank", json={"history": ["i9"], "items": ["i1", "i6", "i2"], "filter": "price < 30"}).json()
    assert {item["item_id"] for item in ranked["items"]} == {"i1", "i2"} and ranked["unknown_items"] == ["i6"]
    popular = client.post("/recommend", json={"k": 5, "filter": "price < 20"}).json()
    assert popular["source"] == "popularity" and {item["item_id"] for item in popular["items"]} == {"i0", "i1"}
    both = {"requests": [{"history": ["i9"], "filter": text} for text in ("price < 5", "price <")]}
    first, second = client.post("/recommend/batch", json=both).json()["results"]
    assert [item["item_id"] for item in first["items"]] == ["i0"]
    assert (second["status"], second["field"], second["position"]) == (422, "filter", 8)
    assert second["detail"].startswith("At character 8 of the filter: expected `now`, a number")
    wrong = client.get("/items/i1/similar?filter=price")
    assert wrong.status_code == 422 and wrong.json()["position"] == 6
    assert client.post("/recommend", json={"filter": "a" * 2001}).status_code == 422
    assert put(client, "i0", fields={"price": 10**400}).status_code == 422
    assert put(client, "i0", fields={f"field {n}": 1 for n in range(50)}).status_code == 200
    assert "streamrec_invalid_items_total 0.0" in client.get("/metrics").text


def test_boosts_multiply_what_items_are_worth(serve: Serve) -> None:
    client = serve()
    for row in range(4):
        put(client, f"i{row}", fields={"price": row})

    def scores(**more: Any) -> dict[str, float]:
        body = {"history": ["i9"], "k": 80, "beam_width": 80, "exclude_seen": False, **more}
        answer = client.post("/recommend", json=body)
        assert answer.status_code == 200, answer.text
        return {item["item_id"]: item["score"] for item in answer.json()["items"]}

    plain, more = scores(), {"boost": [{"filter": "price < 2", "factor": 8}, {"filter": "price >= 1", "factor": 0.5}]}
    added = {"i0": math.log(8), "i1": math.log(4), "i2": math.log(0.5), "i3": math.log(0.5)}
    expected = {item: score + added.get(item, 0.0) for item, score in plain.items()}
    assert scores(**more) == pytest.approx(expected, abs=1e-4) and list(scores(**more)) != list(plain)
    ranked = client.post("/rank", json={"history": ["i9"], "items": ["i1", "i2", "i7"], "explain": True, **more}).json()
    boosted = {each["item_id"]: each["boost"] for each in ranked["explanation"]["items"]}
    assert boosted == pytest.approx({"i1": math.log(4), "i2": math.log(0.5), "i7": 0.0})
    assert {item["item_id"]: item["score"] for item in ranked["items"]} == pytest.approx(
        {item: expected[item] for item in boosted}, abs=1e-4
    )
    popular = client.post("/recommend", json={"k": 1, "boost": [{"filter": "price == 3", "factor": 1000}]}).json()
    assert popular["source"] == "popularity" and popular["items"][0]["item_id"] == "i3"
    for wrong, field in (
        ([{"filter": "price < 2", "factor": 2}, {"filter": "price", "factor": 2}], "boost.1.filter"),
        ([{"filter": "price < 2", "factor": 0}], "boost.0.factor"),
        ([{"filter": "price < 2", "factor": 2}] * 5, "boost"),
    ):
        refused = client.post("/recommend", json={"boost": wrong})
        assert refused.status_code == 422 and refused.json()["field"] == field


def test_items_have_no_more_fields_than_there_is_room_for(serve: Serve) -> None:
    client = serve()
    for n in range(5):
        assert put(client, "i0", fields={f"field {n} {m}": 1 for m in range(50)}).status_code == 200
    refused = put(client, "i0", fields={f"another {m}": 1 for m in range(50)})
    assert refused.status_code == 422 and refused.json()["field"] == "fields"
    assert put(client, "i1", fields={"field 0 1": "x"}).status_code == 200


def changed_items(client: TestClient, **query: Any) -> Any:
    answer = client.get("/catalogues/changes", params=query, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_what_changes_have_done_is_listed_newest_first_and_page_by_page(serve: Serve) -> None:
    client, began = serve(), datetime.now(UTC)
    assert changed_items(client) == {"position": "", "items": [], "next": None}
    until = {"available_until": "2031-05-01T00:00:00Z"}
    put(client, "i4", title="Four")
    put(client, "lamp", **until)
    put(client, "vase")
    delete(client, "i3")
    delete(client, "vase")
    put(client, "i4", title="Fourth")
    assert put(client, "bare", title=None).status_code == 409 and delete(client, "never") == 404  # no change at all
    found = changed_items(client)
    assert found["position"] == client.get("/catalogues").json()["position"] and found["next"] is None
    assert [(each["item_id"], each["title"], each["change"]) for each in found["items"]] == [
        ("i4", "Fourth", "changed"),
        ("vase", "The vase", "removed"),
        ("i3", "Thing number 3", "removed"),
        ("lamp", "The lamp", "added"),
    ]
    times = [datetime.fromisoformat(each["changed_at"]) for each in found["items"]]
    assert times == sorted(times, reverse=True) and began <= times[-1] and times[0] <= datetime.now(UTC)
    assert found["items"][3].items() >= {"available_from": None, **until}.items()
    pages, after = list[str](), {}
    while after != {"after": None}:
        page = changed_items(client, limit=2, change=["added", "removed"], **after)
        pages += [each["item_id"] for each in page["items"]]
        after = {"after": page["next"]}
    assert pages == ["vase", "i3", "lamp"]
    put(client, "vase")
    assert [each["item_id"] for each in changed_items(client, change="added")["items"]] == ["vase", "lamp"]
    for query in ("limit=101", "limit=0", "after=0", "change=hidden", "kind=added"):
        assert client.get(f"/catalogues/changes?{query}", headers=ADMIN).status_code == 422


def test_changes_need_an_admin_key(serve: Serve) -> None:
    client = serve(api_keys=digest("user"))
    for key, status in (("user", 403), ("wrong", 403)):
        assert client.put("/items/i1", content=b"no JSON", headers=sending(key)).status_code == status
        assert client.delete("/items/i1", headers=sending(key)).status_code == status
        assert client.post("/items", content=b"no JSON", headers=sending(key)).status_code == status
    assert client.put("/items/i1", json={}).status_code == 401
    assert client.get("/catalogues").status_code == 401
    assert client.get("/catalogues/changes").status_code == 401
    assert client.get("/catalogues/changes", headers=sending("user")).status_code == 403  # it names what was hidden
    assert client.get("/catalogues", headers=sending("user")).status_code == 200


def test_half_a_character_is_refused(serve: Serve) -> None:
    client = serve()
    half = {"item_id": '"\\ud800"', "title": '"\\ud800"', "categories": '["\\ud800"]', "fields": '{"a": "\\ud800"}'}
    for field, value in half.items():
        item = {"item_id": '"a"', "title": '"b"'} | {field: value}
        body = '{"items": [{' + ", ".join(f'"{name}": {value}' for name, value in item.items()) + "}]}"
        answer = client.post("/items", content=body, headers={**ADMIN, "Content-Type": "application/json"})
        assert answer.status_code == 422 and field in answer.json()["field"]


def test_the_memory_knows_a_new_item_by_its_text_and_after_a_restart_too(
    serve: Serve, folder: Path, tmp_path: Path
) -> None:
    first = serve(state_dir=tmp_path)
    put(first, "lamp")
    codec = load_tokenizer(folder / "tokenizer").codec
    assert codec is not None
    bundle = Bundle.load(folder)
    assert bundle.neighbours is not None
    codes = torch.from_numpy(bundle.catalogue.tokens - bundle.vocabulary.level_offsets)
    places = torch.stack([book[codes[:, level]] for level, book in enumerate(codec.codebooks)]).sum(0)
    like = (places - torch.from_numpy(embed(["The lamp"], ""))).norm(dim=1).argsort()[:LIKE]
    history = [int(row) for row in like]  # something in it leads to one of them, or to what they are like
    shares = bundle.neighbours.shares([history[::-1]], 6)[0].dense(80)[0]
    expected = float(np.log(shares[like.numpy()].mean()))
    for client in (first, serve(state_dir=tmp_path)):
        body = {"history": [f"i{row}" for row in history[::-1]], "allow": ["lamp"], "k": 1, "explain": True}
        [explained] = client.post("/recommend", json=body).json()["explanation"]["items"]
        assert explained["item_id"] == "lamp" and explained["neighbour_score"] == pytest.approx(expected, abs=1e-5)
        together = client.get("/items/lamp/similar?by=together").json()["items"]
        assert together == client.get(f"/items/i{history[0]}/similar?by=together").json()["items"]


def test_a_list_that_explores_keeps_slots_for_new_items(serve: Serve) -> None:
    client = serve()
    body = {"history": ["i1", "i2"], "k": 8}

    def listed(**more: Any) -> list[dict[str, Any]]:
        answer = client.post("/recommend", json=body | more)
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["items"]
        return found

    [bundled] = everything(client, allow=[f"i{row}" for row in np.flatnonzero(old_popularity(client) == 0)])
    for n in range(5):
        put(client, f"n{n}", categories=["new"])
    new = {bundled, *(f"n{n}" for n in range(5))}
    plain, ranked = listed(), [item["item_id"] for item in listed(allow=sorted(new), k=6)]
    own = [item["item_id"] for item in plain if item["item_id"] in new]
    found = listed(explore=3)
    assert [item["item_id"] for item in found if item["item_id"] in new] == ranked[:3] or len(own) >= 3
    assert len({item["item_id"] for item in found}) == 8
    ordinary = [item["item_id"] for item in plain if item["item_id"] not in new]
    kept = [item["item_id"] for item in found if item["item_id"] not in new]
    assert kept == ordinary[: len(kept)]
    assert listed(explore=0) == plain
    for item in ranked:  # fewer than it is to explore, and no slot is lost
        if item != bundled:
            delete(client, item)
    assert len(listed(explore=8)) == 8 and len(listed(explore=8, categories=["even"], k=20, beam_width=60)) == 20
    refused = client.post("/recommend", json=body | {"explore": 9})
    assert refused.status_code == 422 and refused.json()["field"] == "explore"
    assert client.post("/recommend", json={"user_id": "nobody", "k": 5, "explore": 5}).json()["source"] == "popularity"
    assert "streamrec_invalid_items_total 0.0" in client.get("/metrics").text


def old_popularity(client: TestClient) -> np.ndarray:
    return client.app.state.service.bundle.catalogue.popularity  # type: ignore[attr-defined, no-any-return]


# Durable and shared


def test_a_restart_keeps_changes_where_there_is_a_state_dir(serve: Serve, tmp_path: Path) -> None:
    first = serve(state_dir=tmp_path)
    lamp = put(first, "lamp", categories=["light"], fields={"a": 1.5}).json()
    put(first, "vase")
    delete(first, "vase")
    delete(first, "i3")
    second = serve(state_dir=tmp_path)
    assert second.get("/items/lamp").json() == lamp
    assert everything(second) == everything(first) and "i3" not in everything(second)
    assert changed_items(second) == changed_items(first) and len(changed_items(second)["items"]) == 3
    theirs, ours = (client.get("/catalogues").json() for client in (second, first))
    assert theirs["position"] == ours["position"] != "" and theirs["items"] == ours["items"] == 80
    assert theirs["durable"] is True and theirs["lag_seconds"] < 60
    assert theirs["catalogues"] == [{"name": "small", "items": 4}]
    assert serve().get("/catalogues").json()["durable"] is False


@pytest.mark.parametrize("kind", ["redis", "file"])
def test_replicas_agree_within_a_moment(serve: Serve, redis_server: RedisServer, tmp_path: Path, kind: str) -> None:
    shared = {"redis_url": redis_server.url, "replicas": 2} if kind == "redis" else {"state_dir": tmp_path}
    replicas = [serve(**shared) for _ in range(2)]
    started = time.monotonic()
    for n in range(6):
        assert put(replicas[n % 2], f"n{n}", title=f"text {n % 3}").status_code == 200
        assert delete(replicas[n % 2], f"i{n}") == 204
    eventually(lambda: len({client.get("/catalogues").json()["position"] for client in replicas}) == 1)
    one, other = ([client.get(f"/items/n{n}").json() for n in range(6)] for client in replicas)
    assert one == other and everything(replicas[0]) == everything(replicas[1])
    assert changed_items(replicas[0]) == changed_items(replicas[1]) and len(changed_items(replicas[0])["items"]) == 12
    assert time.monotonic() - started < 60


def test_without_its_redis_a_change_is_refused_and_nothing_is_half_done(
    serve: Serve, redis_server: RedisServer
) -> None:
    client = serve(redis_url=redis_server.url)
    assert put(client, "lamp").status_code == 200
    redis_server.kill()
    refused = put(client, "vase")
    assert refused.status_code == 503 and refused.json()["type"].endswith("store-unavailable")
    assert client.delete("/items/lamp", headers=ADMIN).status_code == 503
    found = everything(client)
    assert "vase" not in found and "lamp" in found
