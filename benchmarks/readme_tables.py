"""Fills the tables of the documents from benchmarks/results/*.json, so that no figure in them is typed by hand.

There, `<!-- table:NAME COLUMN COLUMN … KEY=VALUE … -->` and `<!-- /table -->` enclose what this writes: the
rows of results/NAME.json (of several, joined by `+`) with those columns, where every row that has a KEY has that
VALUE, and a line per file that says how its rows were made. `of=PART` takes the rows of another part of the file.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, table

DOCUMENTS = ("README.md", "benchmarks/README.md", "docs/RESULTS.md")
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(
    r"(?P<open><!-- table:(?P<name>\S+) (?P<columns>[^>]+?) -->\n).*?(?P<close><!-- /table -->)", re.DOTALL
)


def fill(text: str, results: Path = RESULTS) -> str:
    """The text with every marked table written anew. Raises SystemExit where a result or a column does not exist."""
    return MARKED.sub(lambda found: found["open"] + _body(found, results) + found["close"], text)


def _body(found: re.Match[str], results: Path) -> str:
    runs = [_result(results / f"{name}.json") for name in found["name"].split("+")]
    words = found["columns"].split()
    columns = [word for word in words if "=" not in word]
    wanted = dict(word.split("=", 1) for word in words if "=" in word)
    part = wanted.pop("of", "rows")
    rows = [row for run in runs for row in run[part] if _fits(row, wanted)]
    unknown = [column for column in columns if not any(column in row for row in rows)]
    if unknown:
        raise SystemExit(f"No row of {found['name']} has a column {unknown[0]!r}; correct the marker.")
    return f"{table(rows, columns)}\n\n{'<br>'.join(_made_by(run) for run in runs)}\n"


def _result(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise SystemExit(f"A document wants a table of {path.name}, which does not exist; run its benchmark first.")
    return json.loads(path.read_text())


def _fits(row: dict[str, Any], wanted: dict[str, str]) -> bool:
    return all(str(row.get(key, value)).lower() == value for key, value in wanted.items())


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
    for name in DOCUMENTS:
        before = (ROOT / name).read_text(encoding="utf-8")
        after = fill(before)
        (ROOT / name).write_text(after, encoding="utf-8")
        print(f"{name}: tables {'changed' if after != before else 'were up to date'}", file=sys.stderr)


if __name__ == "__main__":
    main()
