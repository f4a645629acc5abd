"""Answers a question about the network of the question `converged` by both rules: with the items of a user's history
permitted, and with them excluded."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.accuracy.walk_inputs import Inputs
from benchmarks.accuracy.whole_runs import converged_network
from benchmarks.common import commit, record, table

Rows = list[dict[str, Any]]
# From inputs by one rule and a seed: rows, and checks of what was trained.
Compare = Callable[[Inputs, int], tuple[Rows, Rows]]


def answer(options: argparse.Namespace, command: str, compare: Compare, columns: Sequence[str], protocol: str) -> int:
    """Trains what is missing, writes the result after every rule, prints the table."""
    code, began = commit(), time.perf_counter()
    work, data, folder = converged_network(options)
    rows: Rows = []
    checks: Rows = []
    for excluded in (False, True):
        inputs = Inputs(work, data, folder / "cache", options.work / options.question, excluded)
        more, acts = compare(inputs, work.config.seed)
        rows, checks = rows + more, checks + acts
        minutes = round((time.perf_counter() - began) / 60, 1)
        record(options.out, command, [work.config.seed], rows, minutes=minutes, data=options.data.resolve().name,
               protocol=protocol, checks=checks, **code)  # fmt: skip
        print(table(rows, columns), flush=True)
    return 0
