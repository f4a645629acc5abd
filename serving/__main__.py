"""`python -m serving`: the engine without the service, for offline scoring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from serving.errors import ScoreError, ServingError
from serving.offline.score import run_here, score
from serving.offline.scorer import Task
from serving.types import RuntimeName


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("score", help="write recommendations for every history of a file")
    command.add_argument("--bundle", type=Path, required=True, help="folder of the bundle")
    command.add_argument(
        "--histories",
        type=Path,
        required=True,
        help="Parquet or JSON lines: user_id, history (item ids or events, oldest first)",
    )
    command.add_argument("--out", type=Path, required=True, help="Parquet: user_id, items, scores, source")
    command.add_argument("--k", type=int, default=Task.k, help="items per user (%(default)s)")
    command.add_argument("--beam", type=int, default=Task.beam, help="beam width of the search (%(default)s)")
    command.add_argument("--steps", type=int, help="reasoning steps (default: the bundle's)")
    command.add_argument("--include-seen", action="store_true", help="also recommend items of the history")
    command.add_argument("--batch", type=int, default=Task.batch, help="users per search (%(default)s)")
    command.add_argument(
        "--part-users",
        type=int,
        default=Task.part_users,
        help="users per part, the most a kill costs (%(default)s)",
    )
    command.add_argument(
        "--runtime", choices=get_args(RuntimeName), default=Task.runtime, help="what runs the network (%(default)s)"
    )
    command.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="where parts are scored (%(default)s)"
    )
    command.add_argument("--threads", type=int, default=1, help="threads of the local engine (%(default)s)")
    command.add_argument("--workers", type=int, default=1, help="actors of the Ray engine, one core each (%(default)s)")
    options = parser.parse_args(arguments)
    bundle, histories, out = (path.absolute() for path in (options.bundle, options.histories, options.out))
    task = Task(bundle, histories, out, options.k, options.beam, options.steps, not options.include_seen,
                options.batch, options.part_users, options.runtime)  # fmt: skip
    try:
        return _score(task, options)
    except (ServingError, OSError) as error:
        print(f"streamrec: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("streamrec: stopped; run the same command again to resume.", file=sys.stderr)
        return 130


def _score(task: Task, options: argparse.Namespace) -> int:
    if min(options.threads, options.workers) < 1:
        raise ScoreError("--threads and --workers must be at least 1.")
    if options.engine == "ray":
        from serving.offline.ray import run_on_ray

        summary = score(task, lambda task, _, parts: run_on_ray(task, parts, options.workers))
    else:
        summary = score(task, lambda task, bundle, parts: run_here(task, bundle, parts, options.threads))
    print(f"Wrote {task.out}: {summary.users:,} users, {summary.popular:,} of them with popular items.")
    if summary.rejected:
        print(f"{summary.rejected:,} rows could not be answered; {task.rejects_file} says why.", file=sys.stderr)
    return 1 if summary.rejected and not summary.users else 0


if __name__ == "__main__":
    sys.exit(main())
