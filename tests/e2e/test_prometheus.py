"""A real Prometheus scrapes the demo service: every query of dashboard, rules and autoscaler finds what it asks for."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import RedisServer, free_port
from tests.e2e.conftest import ServiceProcess, StartService
from tests.tools import require_program
from tests.waiting import DEADLINE, eventually

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "streamrec"
LABELS = {"namespace": "shop", "service": "shop-streamrec", "pod": "shop-streamrec-0"}
# Grafana's interval follows from the time that is shown: here it holds all of the traffic, however long that takes.
VARIABLES = {"$namespace": "shop", "$service": "shop-streamrec", "$__rate_interval": "10m"}


class Prometheus:
    def __init__(self, folder: Path, target: str) -> None:
        program = require_program(
            "the dashboard is", "install Prometheus; Debian's package prometheus has it", "prometheus"
        )
        scrape = {"job_name": "streamrec", "static_configs": [{"targets": [target], "labels": LABELS}]}
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(CHART / "rules" / "alerts.yaml")],
            "scrape_configs": [scrape],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = free_port()
        self.log = folder / "log.txt"
        options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [program, *options, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
            )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=DEADLINE)
        self.moment = 0.0

    def ask(self, route: str, **parameters: str) -> Any:
        try:
            answer = self.http.get(route, params=parameters).json()
        except httpx.TransportError:
            assert self.process.poll() is None, self.log.read_text()
            return None
        assert answer["status"] == "success", f"{parameters}: {answer}"
        return answer["data"]

    def query(self, expression: str) -> list[float]:
        """The values of an instant query, as of the end of the traffic; what is not a number is left out."""
        return self.query_now(expression, time=str(self.moment))

    def query_now(self, expression: str, **parameters: str) -> list[float]:
        found = self.ask("/query", query=expression, **parameters)
        values = [float(one["value"][1]) for one in (found or {}).get("result", [])]
        return [value for value in values if not math.isnan(value)]

    def scrapes(self) -> float:
        return sum(self.query_now("count_over_time(up[1h])"))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def make_everything_happen(service: ServiceProcess) -> None:
    """Requests of all kinds: cold and known users, several steps, cache hits, a full queue, an impossible deadline; and
    a hit."""
    items = [item["item_id"] for item in service.http.get("/items", params={"query": ""}).json()["items"]][:5]
    assert len(items) == 5

    def send(number: int, **more: float) -> int:
        body: dict[str, Any] = {"user_id": f"u{number % 5}", "history": items[: 1 + number % 5]} | more
        if number % 7 == 0:
            body = {"user_id": "nobody"}
        return service.http.post("/recommend", params={"reasoning_steps": str(number % 5)}, json=body).status_code

    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(send, range(240))) == {200, 503}
    assert [send(number) for number in range(1, 6)] == [200] * 5
    assert send(1, timeout_ms=0.001) == 504
    service.http.post("/recommend/batch", json={"requests": [{"history": items}] * 3})
    answer = service.http.post("/recommend", json={"history": items}).json()
    event = {
        "recommendation_id": answer["recommendation_id"],
        "item_id": answer["items"][0]["item_id"],
        "event": "click",
    }
    assert service.http.post("/feedback", json=event).status_code == 200


@pytest.fixture(scope="module")
def scraped(start_service: StartService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with ExitStack() as stack:
        redis = RedisServer()
        stack.callback(redis.close)
        # No room for a second waiting search, so that the queue overflows; two users in memory, so that Redis is asked.
        variables = {
            "STREAMREC_MAX_QUEUE_MS": "0.01", "STREAMREC_MEMORY_CACHE_USERS": "2", "STREAMREC_REDIS_URL": redis.url,
            "STREAMREC_REDIS_TIMEOUT_MS": "1000",
        }  # fmt: skip
        service = start_service(of=ROOT / "bundles" / "demo", variables=variables)
        prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), service.address.removeprefix("http://"))
        stack.callback(prometheus.close)
        # Its first scrape comes some five seconds after its start, and a counter has no rate before its second.
        make_everything_happen(service)
        eventually(lambda: prometheus.query_now("up == 1"))
        for _ in range(2):
            make_everything_happen(service)
            before = prometheus.scrapes()
            eventually(lambda before=before: prometheus.scrapes() > before + 1)  # one of them began after the traffic
        (prometheus.moment,) = prometheus.query_now("timestamp(up)")
        yield prometheus


def filled(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, f"a variable is not known here: {expression}"
    return expression


DASHBOARD = json.loads((CHART / "dashboards" / "streamrec.json").read_text())
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
]


def test_the_dashboard_shows_all_that_is_measured() -> None:
    shown = " ".join(str(query.values[0]) for query in QUERIES)
    measured = set(re.findall(r'"(streamrec_\w+)"', (ROOT / "app" / "metrics.py").read_text()))
    assert measured, "app/metrics.py names no metric"
    assert [name for name in sorted(measured) if name not in shown] == []


@pytest.mark.parametrize("query", QUERIES)
def test_dashboard_query_returns_data(query: str, scraped: Prometheus) -> None:
    eventually(lambda: bool(scraped.query(filled(query))))


def test_rules_ask_for_series_that_exist(scraped: Prometheus) -> None:
    eventually(lambda: bool((scraped.ask("/rules") or {}).get("groups")))
    rules = [rule for group in scraped.ask("/rules")["groups"] for rule in group["rules"]]
    eventually(lambda: all(r["health"] == "ok" for g in scraped.ask("/rules")["groups"] for r in g["rules"]))
    names = {name for rule in rules for name in re.findall(r"streamrec_\w+", rule["query"])}
    assert [name for name in sorted(names) if not scraped.query(name)] == []


def test_the_autoscalers_metric_has_a_value(scraped: Prometheus) -> None:
    """The query that prometheus-adapter makes, and KEDA's own: both give one number, the p95 of the wait."""
    (rule,) = yaml.safe_load((CHART / "examples" / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    adapter = rule["metricsQuery"].replace("<<.Series>>", rule["name"]["matches"].strip("^$"))
    adapter = adapter.replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'namespace="shop"')
    helper = (CHART / "templates" / "_helpers.tpl").read_text()
    template = re.search(r'define "streamrec.queueWait".*?\n(\(histogram_quantile.*?)\n', helper, re.DOTALL)
    assert template
    selector = ",".join(f'{name}="{value}"' for name, value in ({"stage": "queue"} | LABELS).items() if name != "pod")
    keda = template[1].replace("{{- $of -}}", selector).replace("{ ", "{").replace(" }", "}")
    for query in (adapter, keda):
        eventually(lambda query=query: len(scraped.query(query)) == 1)  # type: ignore[misc]
        assert scraped.query(query)[0] > 0
    silent = [query.replace("streamrec_stage_seconds", "streamrec_stage_seconds_none") for query in (keda,)]
    assert scraped.query(silent[0]) == [0.0], "without traffic KEDA is told of no wait"
