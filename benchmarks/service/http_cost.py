"""What HTTP costs on top of the engine: the same searches, in batches, by the engine alone and through the service.

    OMP_NUM_THREADS=1 python -m benchmarks.service.http_cost

Engine and service run on the same core with one thread of arithmetic, the sender on the others. They take short turns,
so that a noisy moment affects both, and are started several times, because two processes of the same program differ by
some percent for as long as they live. `share` is the service's throughput relative to the engine's, the median over the
turns of all processes; `cpu_share` compares CPU time per request instead, which other work on the machine affects less.
HTTP costs about the same for every model, so its share depends on the model: there are two, the bundle's and a random
one of 5M parameters.

The service runs at its default log level and writes a line per request (`log_lines`); a second one, at level `warning`,
shows what these lines cost. `holds` is judged at the default level.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from benchmarks.engine.sizes import random_bundle, size
from benchmarks.service.processes import Server, pinned, running_service, split_cores
from benchmarks.service.sender import rate_of, send
from serving.bundle import Bundle
from serving.bundle_writer import write_bundle
from serving.engine import Engine
from serving.types import Request, Rules

COLUMNS = [
    "model", "steps", "log_level", "engine_per_s", "http_per_s", "share", "share_lowest", "share_highest",
    "engine_cpu_ms", "http_cpu_ms", "cpu_share", "log_lines", "at_least", "holds",
]  # fmt: skip
AT_LEAST = {"bundle": 0.80, "random": 0.90}  # of the engine's throughput
LOG_LEVELS: dict[str, list[str]] = {"default": [], "warning": ["--log-level", "warning"]}
BATCH, CLIENTS = 16, 48  # enough clients for the next two batches to wait while one runs
BEAM, HISTORY = 50, 10
ENGINE_ONLY = "--engine-only"  # how this module is started for the process that runs the engine

Row = dict[str, Any]
Turn = tuple[float, float, float, float]  # requests a second and CPU seconds per request: of the engine, of the service


class Turns(NamedTuple):
    """Of one process of the service, and how many lines it logged per request."""

    turns: list[Turn]
    log_lines: float


def main() -> int:
    parser = argument_parser("benchmarks.service.http_cost", __doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--runtime", default="onnx")
    parser.add_argument("--steps", type=numbers, default=[0, 4], help="reasoning steps (0,4)")
    parser.add_argument("--cores", default="0", help="of engine and service; the sender gets the others (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="how often all are started (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each, every time (%(default)s)")
    parser.add_argument("--seconds", type=float, default=1, help="length of a turn (%(default)s)")
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/http_cost.json")
    options = parser.parse_args()
    run, rows = Run(parser, options), list[Row]()
    cores, rest = split_cores(options.cores)
    with TemporaryDirectory() as folder:
        bundles = {"bundle": options.bundle, "random": write_random(random_bundle(), Path(folder) / "random")}
        for kind, bundle in bundles.items():
            found: dict[tuple[int, str], list[Turns]] = {}
            for _ in range(options.repeats):
                for key, turns in measure(bundle, options, cores, rest).items():
                    found.setdefault(key, []).append(turns)
            for (steps, level), repeats in sorted(found.items()):
                row = {"model": name(bundle), "steps": steps, "log_level": level}
                rows.append(row | summarise(repeats, AT_LEAST[kind] if level == "default" else None))
                print(table(rows[-1:], COLUMNS), flush=True)
    print("\n" + table(rows, COLUMNS))
    run.record(options.out, [0], rows, beam=BEAM, batch=BATCH, clients=CLIENTS)
    return 0 if all(row.get("holds", True) for row in rows) else 1


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def write_random(bundle: Bundle, folder: Path) -> Path:
    """Writes a bundle that has no tokenizer."""
    write_bundle(folder, bundle, model_card="", write_tokenizer=lambda _: None)
    return folder


def name(folder: Path) -> str:
    bundle = Bundle.load(folder)
    return f"{bundle.name}, {size(bundle)}"


@contextmanager
def service(bundle: Path, runtime: str, options: Sequence[str], cores: set[int]) -> Iterator[Server]:
    """A queue with room for all clients, whatever the model."""
    with running_service(bundle, ["--runtime", runtime, "--max-queue-ms", "10000", *options], cores) as server:
        yield server


def measure(
    bundle: Path, options: argparse.Namespace, cores: set[int], rest: set[int] | None
) -> dict[tuple[int, str], Turns]:
    """Starts engine and services once. By number of steps and log level."""
    with ExitStack() as stack:
        alone = stack.enter_context(engine(bundle, options.runtime, options.seconds, cores))
        services = {
            level: stack.enter_context(service(bundle, options.runtime, arguments, cores))
            for level, arguments in LOG_LEVELS.items()
        }
        return {
            (steps, level): turns
            for steps in options.steps
            for level, turns in in_turns(bundle, steps, alone, services, rest, options.rounds, options.seconds).items()
        }


def in_turns(
    bundle: Path,
    steps: int,
    alone: subprocess.Popen[str],
    services: dict[str, Server],
    cores: set[int] | None,
    rounds: int,
    seconds: float,
) -> dict[str, Turns]:
    """Engine and services, one after the other, `rounds` times. By service."""
    assert alone.stdin and alone.stdout
    path = f"/recommend?reasoning_steps={steps}"
    bodies = [{"path": path, "body": {"history": ids, "beam_width": BEAM}} for ids in histories_of_ids(bundle)]
    turns: dict[str, list[Turn]] = {level: [] for level in services}
    for server in services.values():
        send(server.address, bodies, cores, clients=CLIENTS, seconds=1)  # warms up
    requests, lines = dict.fromkeys(services, 0), {level: -server.log_lines() for level, server in services.items()}
    for _ in range(rounds):
        alone.stdin.write(f"{steps}\n")
        alone.stdin.flush()
        engine_rate, engine_cpu = map(float, alone.stdout.readline().split())
        for level, server in services.items():
            before = server.cpu_seconds()
            sent = send(server.address, bodies, cores, clients=CLIENTS, seconds=seconds)
            cpu = (server.cpu_seconds() - before) / len(sent)
            if any(row.status != 200 for row in sent):
                raise SystemExit("The service refused requests; run with a longer queue or fewer clients.")
            turns[level].append((engine_rate, engine_cpu, rate_of(sent), cpu))
            requests[level] += len(sent)
    for level, server in services.items():
        lines[level] += server.log_lines()
    return {level: Turns(turns[level], lines[level] / requests[level]) for level in services}


def summarise(repeats: Sequence[Turns], at_least: float | None) -> Row:
    """Medians over the turns of all processes, and whether the share of the throughput is high enough."""
    turns = [turn for repeat in repeats for turn in repeat.turns]
    engine_rate, engine_cpu, http_rate, http_cpu = (median(values) for values in zip(*turns, strict=True))
    shares = [http / engine for engine, _, http, _ in turns]
    row: Row = {
        "log_lines": round(median(repeat.log_lines for repeat in repeats), 2),
        "engine_per_s": round(engine_rate, 1),
        "http_per_s": round(http_rate, 1),
        "share": round(median(shares), 3),
        "share_lowest": round(min(shares), 3),
        "share_highest": round(max(shares), 3),
        "engine_cpu_ms": round(1000 * engine_cpu, 3),
        "http_cpu_ms": round(1000 * http_cpu, 3),
        "cpu_share": round(median(engine / http for _, engine, _, http in turns), 3),
    }
    return row if at_least is None else row | {"at_least": at_least, "holds": median(shares) >= at_least}


def histories(items: int, count: int = 512) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(rng.choice(items, HISTORY, replace=False).tolist()) for _ in range(count)]


def histories_of_ids(bundle: Path) -> list[list[str]]:
    ids = Bundle.load(bundle).catalogue.item_ids
    return [[ids[row] for row in rows] for rows in histories(len(ids))]


# The engine alone


@contextmanager
def engine(bundle: Path, runtime: str, seconds: float, cores: set[int]) -> Iterator[subprocess.Popen[str]]:
    """A process with the engine alone: reads a number of steps, answers with requests a second and CPU seconds per
    request, a line each."""
    command = [sys.executable, "-m", "benchmarks.service.http_cost", ENGINE_ONLY, str(bundle), runtime, str(seconds)]
    process = subprocess.Popen(
        pinned(command, cores), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def engine_only(bundle: Path, runtime: str, seconds: float) -> None:
    """For every line of standard input: encodes and searches full batches for so many seconds."""
    loaded = Engine(Bundle.load(bundle), runtime=runtime)  # type: ignore[arg-type]
    rows = histories(len(loaded.bundle.catalogue))
    for line in sys.stdin:
        requests = [Request(history, 10, BEAM, int(line), Rules(exclude=history)) for history in rows]
        batches = cycle(requests[first : first + BATCH] for first in range(0, len(requests), BATCH))
        answer(loaded, next(batches))  # warms up
        done, began, cpu = 0, time.perf_counter(), time.process_time()
        while (passed := time.perf_counter() - began) < seconds or not done:
            done += answer(loaded, next(batches))
        print(done / passed, (time.process_time() - cpu) / done, flush=True)


def answer(loaded: Engine, batch: Sequence[Request]) -> int:
    return len(loaded.search(batch, loaded.encode([request.history for request in batch])))


if __name__ == "__main__":
    if sys.argv[1:2] == [ENGINE_ONLY]:
        engine_only(Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
    else:
        sys.exit(main())
