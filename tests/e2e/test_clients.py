"""The clients and the collection, against a running service."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from streamrec.client import Client, NotFound, ServiceError
from tests.e2e.conftest import ServiceProcess, StartService
from tests.streamrec.test_transport import Blocking
from tests.waiting import DEADLINE

CLIENTS = Path(__file__).parents[2] / "clients"
KEY = "sesame"
HISTORY = ["i1", "i2", "i3"]


@pytest.fixture(scope="module")
def service(start_service: StartService) -> ServiceProcess:
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    started = start_service(variables={"STREAMREC_API_KEYS": digest, "STREAMREC_ADMIN_KEYS": digest})
    started.http.headers["X-API-Key"] = KEY
    return started


@pytest.mark.parametrize("kind", [Client, Blocking])
def test_the_python_client(service: ServiceProcess, kind: type[Client] | type[Blocking]) -> None:
    with kind(service.address, key=KEY, timeout=DEADLINE) as client:
        answer = client.recommend(history=HISTORY, k=5, reasoning_steps=1)
        assert answer["items"] == service.recommend(1, history=HISTORY, k=5)["items"]
        ids = [item["item_id"] for item in answer["items"]]
        ranked = client.rank(history=HISTORY, items=ids, reasoning_steps=1)
        assert sorted(item["item_id"] for item in ranked["items"]) == sorted(ids)
        given = client.give_feedback(recommendation_id=answer["recommendation_id"], item_id=ids[0], event="click")
        assert given["position"] == 1
        assert any(each["events"].get("click") for each in client.summarise_feedback()["summaries"])

        good, bad = client.recommend_many([{"history": HISTORY}, {"k": 0}], reasoning_steps=1)
        assert good["items"][:5] == answer["items"] and bad["status"] == 422

        user = f"{kind.__name__}/../ü"
        assert client.append_events(user, items=HISTORY)["history_length"] == 3
        assert client.read_user(user)["items"] == HISTORY
        client.erase_user(user)
        with pytest.raises(NotFound) as missing:
            client.read_user(user)
        assert missing.value.status == 404 and missing.value.request_id

        new = f"new {kind.__name__}"
        assert client.name_catalogue(new, {"items": ["i4", "i5"]}) == {"name": new, "items": 2}
        assert new in [each["name"] for each in client.list_catalogues()["catalogues"]]
        chosen = client.recommend(history=HISTORY, catalogue=new, k=2)
        assert sorted(item["item_id"] for item in chosen["items"]) == ["i4", "i5"]
        assert [item["item_id"] for item in client.find_items(query="number 17")["items"]] == ["i17"]
        assert len(client.similar_items("i1", k=3, categories=["odd"])["items"]) == 3
        assert client.read_item("i1")["title"] == "Thing number 1"
        assert client.put_item("i9", title="Nine")["title"] == "Nine"
        (changed,) = client.list_changed_items(change=["changed"], limit=1)["items"]
        assert (changed["item_id"], changed["title"], changed["change"]) == ("i9", "Nine", "changed")

        (model,) = client.list_models()["models"]
        split = client.direct_traffic(arms=[{"version": model["version"], "percent": 50, "reasoning_steps": 1}])
        assert client.read_traffic() == split and client.direct_traffic()["arms"] == []
        assert client.readyz() == {"status": "ready"}


def test_a_mistake_is_an_exception_with_the_problem(service: ServiceProcess) -> None:
    with Client(service.address) as client, pytest.raises(ServiceError, match="X-API-Key") as error:
        client.recommend()
    assert error.value.status == 401
    with Client(service.address, key=KEY) as client, pytest.raises(ServiceError) as error:
        client.recommend(k=0)
    assert error.value.problem is not None and error.value.problem["field"] == "k"


SCRIPT = """
import { Client, NotFound, ServiceError, Unavailable } from "INDEX";

const settled = (call) => call.catch((error) => error);
const [address, key] = process.argv.slice(2);
const shop = new Client(address, { key, timeout: 240_000 });
const answer = await shop.recommend({ history: ["i1", "i2", "i3"], k: 5 }, { reasoning_steps: 1 });
await shop.appendEvents("a/b ü", { items: ["i7"] });
const user = await shop.readUser("a/b ü");
const erased = await shop.eraseUser("a/b ü");
const similar = await shop.similarItems("i1", { k: 4, deny: ["i2", "i3"] });
const missing = await settled(shop.readItem("nonesuch"));
const wrong = await settled(shop.recommend({ k: 0 }));
const nobody = await settled(new Client("http://127.0.0.1:9", { timeout: 150 }).listModels());

const sent = []; // what the client sends where it is told to wait
const refuse = (status, name) => async (url, request) => {
  sent.push([name, performance.now(), request.body]);
  const body = JSON.stringify({ type: `urn:streamrec:problem:${name}`, title: "No", status, detail: "Not now." });
  if (sent.filter(([other]) => other === name).length > 1) return new Response("{}");
  return new Response(body, { status, headers: { "Content-Type": "application/problem+json", "Retry-After": "1" } });
};
await new Client(address, { fetch: refuse(503, "overloaded") }).recommend({ k: 2 });
const broken = new Client(address, { fetch: refuse(503, "store-unavailable") });
const doubtful = await settled(broken.appendEvents("u", { items: ["i1"] }));
const impatient = new Client(address, { fetch: refuse(503, "draining"), timeout: 500 });
const hasty = await settled(impatient.recommend({}));
const stop = AbortSignal.abort();
const stopped = await shop.recommend({}, {}, { signal: stop }).catch((error) => error.name);

console.log(JSON.stringify({
  items: answer.items, history: user.items, erased: erased === undefined, similar: similar.items.length,
  missing: [missing instanceof NotFound, missing.status, missing.problem.title],
  wrong: [wrong instanceof ServiceError, wrong.status, wrong.problem.field],
  nobody: [nobody instanceof Unavailable, nobody.status],
  waited: sent[1][1] - sent[0][1], same: sent[0][2] === sent[1][2], names: sent.map(([name]) => name),
  doubtful: [doubtful instanceof Unavailable, doubtful.problem.detail], hasty: hasty.retryAfter, stopped,
}));
"""


def test_the_javascript_client(service: ServiceProcess, tmp_path: Path) -> None:
    node = shutil.which("node") or pytest.skip("the JavaScript client is NOT tested: install Node.js 20.3 or later")
    script = tmp_path / "script.mjs"
    script.write_text(SCRIPT.replace("INDEX", (CLIENTS / "typescript/index.js").as_uri()), encoding="utf-8")
    done = subprocess.run([node, script, service.address, KEY], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found.pop("items") == service.recommend(1, history=HISTORY, k=5)["items"]
    assert 1000 <= found.pop("waited")
    assert found == {
        "history": ["i7"],
        "erased": True,
        "similar": 4,
        "missing": [True, 404, "Not found"],
        "wrong": [True, 422, "k"],
        "nobody": [True, None],
        "same": True,
        "names": ["overloaded", "overloaded", "store-unavailable", "draining"],
        "doubtful": [True, "Not now."],
        "hasty": 1,
        "stopped": "AbortError",
    }


def test_the_collection_can_be_sent(service: ServiceProcess) -> None:
    made = json.loads((CLIENTS / "streamrec.postman_collection.json").read_text())
    answer = service.recommend(1, history=HISTORY)
    shown = {"recommendation_id": answer["recommendation_id"], "item_id": answer["items"][0]["item_id"]}
    service.http.post("/users/u1/events", json={"items": ["i1"]}).raise_for_status()
    variables = {each["key"]: each["value"] for each in made["variable"]}
    variables |= {"address": service.address, "version": "nonesuch", "path": "nonesuch", "name": "tiny"} | shown

    def filled(text: str) -> str:
        return re.sub(r"{{(\w+)}}", lambda match: variables[match[1]], text)

    statuses = {}
    for folder in made["item"]:
        for each in folder["item"]:
            request = each["request"]
            body = filled(request["body"]["raw"]) if "body" in request else None
            headers = {one["key"]: one["value"] for one in request.get("header", [])}
            answer = service.http.request(
                request["method"], filled(request["url"]["raw"]), content=body, headers=headers
            )
            statuses[each["name"]] = answer.status_code, answer.text
    refused = {name: answer for name, answer in statuses.items() if answer[0] >= 300}
    assert {name: status for name, (status, _) in refused.items()} == {  # there is no such bundle here
        "add model": 422,
        "activate model": 404,
        "retire model": 404,
    }, refused
