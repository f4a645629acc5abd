"""What HTTP costs beyond the engine: the same searches in batches, by the engine alone and through the service.

    OMP_NUM_THREADS=1 python -m benchmarks.service.http_cost --bundle bundles/demo

Both are kept to the same core, with one thread of arithmetic; the sender of the requests sits on the others. They take
short turns, so that a noisy moment hits both. `share` is what the service keeps of the engine's throughput, the middle
one of all rounds. `cpu_share` is the same by seconds of CPU per request instead of by the clock, so that what others do
on the machine counts less. The cost of a request hardly knows the model, so its share does: asked are the small one of
the bundle and one of 5M parameters with random weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.common import ROOT, commit, record, table
from benchmarks.engine.cache import random_bundle, size
from benchmarks.service.processes import Server, pinned, running_service, split_cores
from benchmarks.service.sender import send
from serving.bundle import Bundle, write_bundle
from serving.engine import Engine
from serving.types import Request, Rules

RESULT = ROOT / "benchmarks/results/http_cost.json"
BAR = 0.85
COLUMNS = [
    "model", "runtime", "steps", "beam", "engine_per_s", "http_per_s", "share", "engine_cpu_ms", "http_cpu_ms",
    "cpu_share", "holds",
]  # fmt: skip
BATCH, CLIENTS = 16, 48  # clients enough for the next two batches to wait while one runs
BEAM, HISTORY = 50, 10

Turn = tuple[float, float, float, float]  # requests a second and CPU seconds a request: of the engine, of the service


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service.http_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--runtimes", default="onnx")
    parser.add_argument("--steps", default="0,4")
    parser.add_argument("--cores", default="0", help="of engine and service; the sender takes the rest")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1, help="of a turn")
    parser.add_argument("--engine-only", help=argparse.SUPPRESS)  # the process of one contender
    given = parser.parse_args()
    if given.engine_only:
        return engine_only(given.bundle, given.engine_only, given.seconds)
    code, began = commit(), time.perf_counter()
    cores, rest = split_cores(given.cores)
    rows = []
    with TemporaryDirectory() as folder:
        bundles = (given.bundle, written(random_bundle(), Path(folder) / "random"))
        for bundle, runtime in product(bundles, given.runtimes.split(",")):
            options = ["--runtime", runtime, "--max-queue-ms", "10000"]  # room for all clients, whatever the model
            service = running_service(bundle, options, cores)
            with engine(bundle, runtime, given.seconds, cores) as alone, service as server:
                for steps in map(int, given.steps.split(",")):
                    turns = in_turns(bundle, steps, alone, server, rest, given.rounds, given.seconds)
                    rows.append({"model": name(bundle), "runtime": runtime, "steps": steps, "beam": BEAM} | told(turns))
                    print(table(rows[-1:], COLUMNS), flush=True)
    print("\n" + table(rows, COLUMNS))
    record(
        RESULT,
        f"python -m benchmarks.service.http_cost --bundle {given.bundle} --runtimes {given.runtimes} "
        f"--steps {given.steps} --cores {given.cores} --rounds {given.rounds} --seconds {given.seconds:g}",
        [0],
        rows,
        minutes=round((time.perf_counter() - began) / 60, 1),
        bar=BAR,
        batch=BATCH,
        clients=CLIENTS,
        **code,
    )
    return 0 if all(row["holds"] for row in rows) else 1


def written(bundle: Bundle, folder: Path) -> Path:
    """The bundle in a folder, without a tokenizer."""
    write_bundle(folder, bundle, model_card="", write_tokenizer=lambda _: None)
    return folder


def name(folder: Path) -> str:
    bundle = Bundle.load(folder)
    return f"{bundle.name}, {size(bundle)}"


def in_turns(
    bundle: Path,
    steps: int,
    alone: subprocess.Popen[str],
    server: Server,
    cores: set[int] | None,
    rounds: int,
    seconds: float,
) -> list[Turn]:
    """Engine and service, one after the other, `rounds` times."""
    assert alone.stdin and alone.stdout
    path = f"/recommend?reasoning_steps={steps}"
    asked = [{"path": path, "body": {"history": ids, "beam_width": BEAM}} for ids in histories_of_ids(bundle)]
    send(server.address, asked, cores, clients=CLIENTS, seconds=1)  # warms up
    turns = []
    for _ in range(rounds):
        alone.stdin.write(f"{steps}\n")
        alone.stdin.flush()
        engine_rate, engine_cpu = map(float, alone.stdout.readline().split())
        before = server.cpu_seconds()
        sent = send(server.address, asked, cores, clients=CLIENTS, seconds=seconds)
        cpu = (server.cpu_seconds() - before) / len(sent)
        if any(row.status != 200 for row in sent):
            raise SystemExit("The service refused requests; let it wait longer, or ask with fewer clients.")
        turns.append((engine_rate, engine_cpu, len(sent) / max(row.due + row.seconds for row in sent), cpu))
    return turns


def told(turns: Sequence[Turn]) -> dict[str, Any]:
    """The middle of all turns, and whether the bar holds by the clock."""
    engine_rate, engine_cpu, http_rate, http_cpu = (median(values) for values in zip(*turns, strict=True))
    share = median(http / engine for engine, _, http, _ in turns)
    cpu_share = median(engine / http for _, engine, _, http in turns)
    return {
        "engine_per_s": round(engine_rate, 1),
        "http_per_s": round(http_rate, 1),
        "share": round(share, 3),
        "engine_cpu_ms": round(1000 * engine_cpu, 3),
        "http_cpu_ms": round(1000 * http_cpu, 3),
        "cpu_share": round(cpu_share, 3),
        "holds": share >= BAR,
    }


def histories(items: int, count: int = 512) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(rng.choice(items, HISTORY, replace=False).tolist()) for _ in range(count)]


def histories_of_ids(bundle: Path) -> list[list[str]]:
    ids = Bundle.load(bundle).catalogue.item_ids
    return [[ids[row] for row in rows] for rows in histories(len(ids))]


# The engine alone


@contextmanager
def engine(bundle: Path, runtime: str, seconds: float, cores: set[int]) -> Iterator[subprocess.Popen[str]]:
    """A process with the engine alone: a number of steps on a line in, requests and CPU seconds on a line out."""
    command = [sys.executable, "-m", "benchmarks.service.http_cost", "--bundle", str(bundle), "--engine-only", runtime]
    command += ["--seconds", str(seconds)]
    process = subprocess.Popen(
        pinned(command, cores), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def engine_only(bundle: Path, runtime: str, seconds: float) -> int:
    """Encodes and searches full batches for so long, whenever a line asks for it."""
    loaded = Engine(Bundle.load(bundle), runtime=runtime)  # type: ignore[arg-type]
    rows = histories(len(loaded.bundle.catalogue))
    for line in sys.stdin:
        requests = [Request(history, 10, BEAM, int(line), Rules(exclude=history)) for history in rows]
        batches = cycle(requests[first : first + BATCH] for first in range(0, len(requests), BATCH))
        run(loaded, next(batches))  # warms up
        done, began, cpu = 0, time.perf_counter(), time.process_time()
        while (passed := time.perf_counter() - began) < seconds or not done:
            done += run(loaded, next(batches))
        print(done / passed, (time.process_time() - cpu) / done, flush=True)
    return 0


def run(loaded: Engine, batch: Sequence[Request]) -> int:
    return len(loaded.search(batch, loaded.encode([request.history for request in batch])))


if __name__ == "__main__":
    sys.exit(main())
