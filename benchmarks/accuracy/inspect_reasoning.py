"""Reasoning one can read: for a few users the history, the items nearest to the state after each step, the answers.

    python -m benchmarks.accuracy.inspect_reasoning --bundle bundles/demo --data runs/demo/shop --out docs/READING.md

Users are drawn by a seed and not picked. The answers are those without steps and those of the best l > 0 on the
validation figures in the bundle; the states are those of the largest number of steps.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import commit
from serving.bundle import Bundle
from serving.engine import Engine
from serving.types import Answer, Request, Rules
from training.data.prepare import leave_one_out
from training.data.read import read_data

SHOWN_ITEMS = 6  # of a history
NEAREST = 3
ANSWERS = 5
BEAM = 50


def best_steps(bundle: Bundle) -> int:
    """The number of steps above 0 that validation liked best."""
    measured = {row["steps"]: row["ndcg@10"] for row in bundle.accuracy if row["steps"]}
    return max(measured, key=lambda steps: measured[steps]) if measured else bundle.max_steps


def reading(engine: Engine, history: Sequence[int], target: int, steps: int) -> str:
    """One user as markdown. The item bought next is bold wherever it shows."""
    titles = engine.bundle.catalogue.titles
    state = engine.encode([history])

    def answer(length: int) -> Answer:
        rules = Rules(exclude=tuple(history))
        return engine.search([Request(tuple(history), ANSWERS, BEAM, length, rules, explain=True)], state)[0]

    def named(items: Sequence[int]) -> str:
        return "; ".join(f"**{titles[item]}**" if item == target else str(titles[item]) for item in items)

    trace = answer(engine.bundle.max_steps).trace
    assert trace is not None
    earlier = f"({len(history) - SHOWN_ITEMS} earlier) " if len(history) > SHOWN_ITEMS else ""
    lines = [f"History: {earlier}{named(history[-SHOWN_ITEMS:])}", "", f"Bought next: {named([target])}", ""]
    lines += ["| state after step | token | nearest items |", "|---|---|---|"]
    for step, nearest in enumerate(trace.nearest_items):
        token = trace.reasoning_tokens[step - 1] if step and trace.reasoning_tokens else ""
        lines.append(f"| {step} | {token} | {named(nearest[:NEAREST])} |")
    lines += ["", "| steps | answer |", "|---|---|"]
    lines += [f"| {length} | {named(answer(length).items)} |" for length in (0, steps)]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.inspect_reasoning", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--data", type=Path, required=True, help="the data folder that the bundle was trained on")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a markdown file; without it the text goes to the screen")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    engine, data = Engine(Bundle.load(options.bundle)), read_data(options.data)
    if not data.items.has_text:
        parser.error(f"{options.data} has no titles, so there is nothing to read.")
    split = leave_one_out(data)
    row = [engine.bundle.catalogue.row(item_id) for item_id in data.items.item_ids]
    if None in row:
        parser.error(f"{options.bundle} does not know all items of {options.data}; give the data it was trained on.")
    rows, steps = np.array(row, dtype=np.int64), best_steps(engine.bundle)
    users = np.random.default_rng(options.seed).permutation(len(split.test_target))[: options.users]
    parts = [
        "# Reasoning one can read",
        f"Bundle `{engine.bundle.name}`, {len(users)} test users drawn by seed {options.seed}. Each state is shown by "
        f"the items whose vectors it likes best; the states are those of {engine.bundle.max_steps} steps, the answers "
        f"those without steps and with {steps}, the best number above 0 on validation. Seen items are excluded from "
        "the answers and not from the nearest items. **Bold**: what was bought next.",
    ]
    for number, user in enumerate(users, 1):
        history = rows[split.test_history[user]].tolist()
        parts += [f"## User {number}", reading(engine, history, int(rows[split.test_target[user]]), steps)]
    made = shlex.join(["python", "-m", "benchmarks.accuracy.inspect_reasoning", *arguments])
    parts.append(
        f"<sub>`{made}` · commit `{(commit()['commit'] or 'none')[:9]}` · bundle {engine.bundle.version}</sub>"
    )
    text = "\n\n".join(parts) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
