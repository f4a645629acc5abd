"""Writes the figures of the documents from benchmarks/results/*.json, so that nobody types one.

Four kinds of comment in a document enclose what this writes.

`<!-- table:NAME COLUMN … KEY=VALUE … -->` to `<!-- /table -->`: rows of results/NAME.json (of several files, joined by
`+`) with those columns, then a line per file that says how it was made. `COLUMN:LABEL` gives a column another heading
(underscores stand for spaces), `KEY=VALUE` keeps the rows that have that value or lack the key, `KEY=A|B` allows
either, and `of=PART` takes the rows of another part of the file.

`<!-- value:NAME COLUMN KEY=VALUE … -->` to `<!-- /value -->`: one figure of the one row that fits, in running text.
`digits=N` rounds it.

`<!-- settings -->` to `<!-- /settings -->`: the service's settings, from app/settings.py.

`<!-- questions -->` to `<!-- /questions -->`: the questions of `python -m benchmarks.accuracy`, from
benchmarks/accuracy/commands.py.

Columns that are not in the JSON: `data`, the data set; where a row has a gain with an interval,
`low_percent`, `high_percent`, `interval` (both in words), `detectable` and `detectable_gain`: see `_derived`.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.settings import Settings, variable
from benchmarks.accuracy.commands import COMMANDS
from benchmarks.common import ROOT, table
from training.metrics import detectable

PAGES = ROOT / "docs" / "results"
DOCUMENTS = (
    "README.md",
    "benchmarks/README.md",
    "docs/RESULTS.md",
    "docs/SETTINGS.md",
    "docs/TUNING.md",
    *sorted(str(path.relative_to(ROOT)) for path in PAGES.glob("*.md")),
)
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(
    r"(?P<open><!-- table:(?P<name>\S+) (?P<columns>[^>]+?) -->\n).*?(?P<close><!-- /table -->)", re.DOTALL
)
VALUE = re.compile(r"(?P<open><!-- value:(?P<name>\S+) (?P<columns>[^>]+?) -->)[^<]*(?P<close><!-- /value -->)")
SETTINGS = re.compile(r"(?P<open><!-- settings -->\n).*?(?P<close><!-- /settings -->)", re.DOTALL)
QUESTIONS = re.compile(r"(?P<open><!-- questions -->\n).*?(?P<close><!-- /questions -->)", re.DOTALL)


def fill(text: str, results: Path = RESULTS) -> str:
    """The text with every marked table and value written again. Raises SystemExit where one does not exist."""
    text = TABLE.sub(lambda found: found["open"] + _table(found, results) + found["close"], text)
    text = VALUE.sub(lambda found: found["open"] + _value(found, results) + found["close"], text)
    text = SETTINGS.sub(lambda found: found["open"] + _settings() + found["close"], text)
    return QUESTIONS.sub(lambda found: found["open"] + _questions() + found["close"], text)


def _table(found: re.Match[str], results: Path) -> str:
    runs = [_result(results / f"{name}.json") for name in found["name"].split("+")]
    columns, wanted = _parse(found["columns"])
    part = wanted.pop("of", "rows")
    rows = [_without_itself(row) for run in runs for row in _rows(run, part) if _fits(row, wanted)]
    labels = {}
    for column in columns:
        name, _, label = column.partition(":")
        if not any(name in row for row in rows):
            raise SystemExit(f"No row of {found['name']} has a column {name!r}; correct the marker.")
        labels[label.replace("_", " ") or name] = name
    shown = [{label: row.get(name) for label, name in labels.items()} for row in rows]
    percentages = {label for label in labels if label.endswith("%")}
    return f"{table(shown, list(labels), percentages)}\n\n{'<br>'.join(_made_by(run) for run in runs)}\n"


def _value(found: re.Match[str], results: Path) -> str:
    run = _result(results / f"{found['name']}.json")
    (column,), wanted = _parse(found["columns"])
    digits, part = wanted.pop("digits", None), wanted.pop("of", "rows")
    rows = [row for row in _rows(run, part) if column in row and _fits(row, wanted)]
    if len(rows) != 1:
        raise SystemExit(
            f"{len(rows)} rows of {found['name']} fit {found['columns']!r}; correct the marker to fit one."
        )
    value = rows[0][column]
    return f"{value:,.{int(digits)}f}" if digits else str(value)


def _settings() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, ()) or not str(field.default) else f"`{field.default}`"
        rows.append({"variable": f"`{variable(name)}`", "default": default, "what it sets": field.description})
    return f"{table(rows, ['variable', 'default', 'what it sets'])}\n"


def _questions() -> str:
    rows = [{"question": f"`{name}`", "what it compares": command.about} for name, command in COMMANDS.items()]
    return f"{table(rows, ['question', 'what it compares'])}\n"


def _parse(columns: str) -> tuple[list[str], dict[str, str]]:
    words = shlex.split(columns)
    wanted = dict(word.split("=", 1) for word in words if "=" in word)
    return [word for word in words if "=" not in word], wanted


def _result(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise SystemExit(f"A document wants a table of {path.name}, which does not exist; run its benchmark first.")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def _rows(run: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    return [{"data": run.get("data")} | row | _derived(row) for row in run[part]]


def _without_itself(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without a gain where it was compared with the same checkpoint by another name: every bootstrap of that is
    0, and an interval from 0 to 0 looks like a precise result.
    """
    if not (row.get("gain") == row.get("low") == row.get("high") == 0):
        return dict(row)
    gain = ("gain", "low", "high", "percent", *_derived(row))
    kept = {name: value for name, value in row.items() if name not in gain}
    return kept | {"against": f"{row['against']} (the same)" if "against" in row else "itself"}


def _derived(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a gain with a 95% interval, in per cent of the row it is compared with: the interval, and `detectable`.

    detectable: see `training.metrics.detectable`; detectable_gain: the same as a difference of NDCG@10. The noise of
    training is not in them, for every row is one seed.
    """
    if row.get("gain") is None:
        return {}
    smallest = detectable(row["low"], row["high"])
    gain: dict[str, Any] = {"detectable_gain": round(smallest, 4)}
    if not row["ndcg@10"] - row["gain"]:
        return gain
    percent = 100 / (row["ndcg@10"] - row["gain"])
    low, high = round(row["low"] * percent, 1), round(row["high"] * percent, 1)
    return gain | {
        "low_percent": low,
        "high_percent": high,
        "interval": f"{low:.1f} to {high:.1f}",
        "detectable": round(smallest * percent, 1),
    }


def _fits(row: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    return all(str(row.get(key, value)).lower() in value.lower().split("|") for key, value in wanted.items())


def _made_by(run: Mapping[str, Any]) -> str:
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
        print(f"{name}: figures {'changed' if after != before else 'were up to date'}", file=sys.stderr)


if __name__ == "__main__":
    main()
