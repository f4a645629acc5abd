"""Fills the README's tables from benchmarks/results/*.json, so that no figure in it is typed by hand.

In the README, `<!-- table:NAME COLUMN COLUMN … -->` and `<!-- /table -->` enclose what this writes: the rows of
results/NAME.json with those columns, and one line that says how they were made.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, table

RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(
    r"(?P<open><!-- table:(?P<name>\S+) (?P<columns>[^>]+?) -->\n).*?(?P<close><!-- /table -->)", re.DOTALL
)


def fill(text: str, results: Path = RESULTS) -> str:
    """The text with every marked table written anew. Raises SystemExit where a result or a column does not exist."""
    return MARKED.sub(lambda found: found["open"] + _body(found, results) + found["close"], text)


def _body(found: re.Match[str], results: Path) -> str:
    path = results / f"{found['name']}.json"
    if not path.exists():
        raise SystemExit(f"The README wants a table of {path.name}, which does not exist; run its benchmark first.")
    run: dict[str, Any] = json.loads(path.read_text())
    columns = found["columns"].split()
    unknown = [column for column in columns if not any(column in row for row in run["rows"])]
    if unknown:
        raise SystemExit(f"No row of {path.name} has a column {unknown[0]!r}; correct the README's marker.")
    return f"{table(run['rows'], columns)}\n\n{_made_by(run)}\n"


def _made_by(run: dict[str, Any]) -> str:
    facts = [f"`{run['command']}`"]
    if run.get("commit"):
        facts.append(f"commit `{run['commit'][:9]}`" + (" with uncommitted changes" if run.get("dirty") else ""))
    facts.append(f"seed{'s' if len(run['seeds']) > 1 else ''} {', '.join(map(str, run['seeds']))}")
    if "minutes" in run:
        facts.append(f"{run['minutes']:.0f} minutes")
    machine = run["machine"]
    facts.append(f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} thread(s), torch {machine['torch']}")
    return f"<sub>{' · '.join(facts)}</sub>"


def main() -> None:
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = fill(before)
    readme.write_text(after, encoding="utf-8")
    print("README.md: tables changed" if after != before else "README.md: tables were up to date", file=sys.stderr)


if __name__ == "__main__":
    main()
