"""What every feature of the API costs, compared with a plain `/recommend`, with one client that waits for its answers.

    OMP_NUM_THREADS=1 python -m benchmarks.service.features
    python -m benchmarks.service.features --smoke        # shows that the command works; its figures mean nothing

The service runs on a core of its own with one thread of arithmetic. Features take short turns, plain requests among
them, so that a noisy moment affects all. `ms` is the median answer of a turn, `cpu_ms` the service's CPU time per
request, each the median over rounds; `times` is the median over rounds of ms compared with plain in the same round.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import httpx

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from benchmarks.service.http_cost import histories, numbers
from benchmarks.service.processes import Server, running_service, split_cores
from benchmarks.service.sender import latency, send
from serving.bundle import Bundle
from serving.items.catalogue import Catalogue
from serving.items.filter_parser import KNOWN
from serving.items.prepared_sets import MAX_SETS
from serving.online import receipts

COLUMNS = ["feature", "steps", "ms", "times", "cpu_ms", "requests"]
PLAIN = "/recommend"
BEAM, DENIED, RANKED = 50, 100, (10, 100, 1000)

OPERATOR = "operator"  # the key
OPTIONS = ("--rotation-window-s", "86400", "--admin-keys", sha256(OPERATOR.encode()).hexdigest())
USERS, SHOWN = 64, 3
NEW = 1 + max(KNOWN, MAX_SETS)  # different filters, one after another, of which the service knows none by then

Row = dict[str, Any]
Turn = tuple[float, float, int]  # median seconds, CPU seconds per request, requests


def main() -> None:
    parser = argument_parser("benchmarks.service.features", __doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--runtime", default="onnx")
    parser.add_argument("--steps", type=numbers, default=[0, 4], help="reasoning steps (0,4)")
    parser.add_argument("--cores", default="0", help="of the service; the sender gets the others (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1, help="length of a turn (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="one short round, nothing is written")
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/features.json")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.seconds = 1, 0.02
    run, rows = Run(parser, options), list[Row]()
    cores, rest = split_cores(options.cores)
    bundle = Bundle.load(options.bundle)
    with running_service(options.bundle, ["--runtime", options.runtime, *OPTIONS], cores) as server:
        with httpx.Client(base_url=server.address) as client:
            prepare(client, bundle.catalogue)
        for steps in options.steps:
            rounds = list[dict[str, Turn]]()
            for seed in range(options.rounds):
                requests = features(bundle, steps, seed).items()
                rounds.append({name: turn(server, sent, rest, options.seconds) for name, sent in requests})
            rows += [{"steps": steps} | row for row in summarise(rounds)]
    print(table(rows, COLUMNS))
    if not options.smoke:
        run.record(options.out, [0], rows, beam=BEAM, items=len(bundle.catalogue), model=bundle.name)


def prepare(client: httpx.Client, catalogue: Catalogue) -> None:
    """A scenario, and a few impressions for each known user."""
    key, ids = {"X-API-Key": OPERATOR}, list(catalogue.item_ids)[:SHOWN]
    client.put("/scenarios/plain", json={"beam_width": BEAM}, headers=key).raise_for_status()
    for number in range(USERS):
        recommendation = receipts.issue("", "model", 0, f"u{number}", ids)
        for item_id in ids:
            event = {"recommendation_id": recommendation, "item_id": item_id, "event": "impression"}
            client.post("/feedback", json=event).raise_for_status()


def features(bundle: Bundle, steps: int, seed: int) -> dict[str, list[Row]]:
    """The requests of each feature, the plain ones first. seed: another one makes new filters new again."""
    catalogue, ids = bundle.catalogue, list(bundle.catalogue.item_ids)
    plain = [{"history": [ids[row] for row in rows], "beam_width": BEAM} for rows in histories(len(ids), USERS)]

    def recommend(**what: Any) -> list[Row]:
        return [{"path": f"/recommend?reasoning_steps={steps}", "body": body | what} for body in plain]

    def rank(count: int) -> list[Row]:
        path, bodies = f"/rank?reasoning_steps={steps}", [{"history": body["history"]} for body in plain]
        return [{"path": path, "body": body | {"items": ids[:count]}} for body in bodies]

    def similar(by: str) -> list[Row]:
        return [{"method": "GET", "path": f"/items/{quote(name, safe='')}/similar?by={by}"} for name in ids[:64]]

    def known(**what: Any) -> list[Row]:
        return [row | {"body": row["body"] | {"user_id": f"u{i}"}} for i, row in enumerate(recommend(**what))]

    def event(item_id: str) -> Row:
        return {"item_id": item_id, "type": "view", "value": 9.5, "timestamp": 1.7e9}

    one_category = f"categories has {json.dumps(min(catalogue.category_names))}"
    found = {
        PLAIN: recommend(),
        "history of events": [
            row | {"body": row["body"] | {"history": [event(item) for item in row["body"]["history"]]}}
            for row in recommend()
        ],
        "known user, encoded before": known(),
        "the same with rotation": known(rotation=0.5),
        "scenario": [row | {"body": {"history": row["body"]["history"], "scenario": "plain"}} for row in recommend()],
        f"deny, {DENIED} items": recommend(deny=ids[:DENIED]),
        "categories, one": recommend(categories=sorted(catalogue.category_names)[:1]),
        "filter, seen before": recommend(filter=one_category),
        "filter, a new one each time": [
            row | {"body": row["body"] | {"filter": f"{one_category} or price == {number}.{steps:02}{seed:03}"}}
            for number, row in zip(range(NEW), cycle(recommend()))
        ],
        "boost, seen before": recommend(boost=[{"filter": one_category, "factor": 2.0}]),
        "diversity": recommend(diversity=0.5),
        "max_per_category": recommend(max_per_category=2),
        "explore": recommend(explore=3),
        "explain": recommend(explain=True),
        "after, page 3": recommend(after=receipts.issue("", "model", steps, None, ids[:10], earlier=range(10))),
        "unknown user, popular items": recommend(history=[]),
    }
    found |= {f"/rank, {count} items": rank(count) for count in RANKED if count <= len(ids)}
    if bundle.neighbours is not None:
        found["/items/{id}/similar, together"] = similar("together")
    found["/items/{id}/similar, content"] = similar("content")
    found["/users/{id}/events"] = [
        {"path": f"/users/u{number}/events", "body": {"items": body["history"]}} for number, body in enumerate(plain)
    ]
    return found | {path: [{"method": "GET", "path": path}] for path in ("/popular", "/trending")}  # of those events


def turn(server: Server, requests: Sequence[Row], cores: set[int] | None, seconds: float) -> Turn:
    """Raises SystemExit if a request is refused: what it costs to refuse is no feature."""
    before = server.cpu_seconds()
    sent = send(server.address, requests, cores, clients=1, seconds=seconds)
    cpu = server.cpu_seconds() - before
    if any(row.status != 200 for row in sent):
        raise SystemExit(f"The service refused {requests[0]['path']}; see its log, and run without other load.")
    return latency(sent, 0.5), cpu / len(sent), len(sent)


def summarise(rounds: Sequence[dict[str, Turn]]) -> list[Row]:
    """A row per feature."""
    return [
        {
            "feature": name,
            "ms": round(1000 * median(each[name][0] for each in rounds), 3),
            "times": round(median(each[name][0] / each[PLAIN][0] for each in rounds), 2),
            "cpu_ms": round(1000 * median(each[name][1] for each in rounds), 3),
            "requests": sum(each[name][2] for each in rounds),
        }
        for name in rounds[0]
    ]


if __name__ == "__main__":
    main()
