"""The plot of `peers.py`: time of one search by contender, both sizes of model, with and without reasoning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

FLOOR = "the matrix products of a search alone"
NAMES = {"CTranslate2": "CTranslate2\n(no constraint, encoder in)"}  # where the table's name says too little
COLOURS = ("#9db4c8", "#1f5f8b")  # without and with reasoning


def draw(rows: list[dict[str, Any]], path: Path, batch: int = 1, beams: int = 50) -> None:
    """Writes an SVG of the rows `latency` at one shape. The file is the same for the same rows."""
    shown = [row for row in rows if row["table"] == "latency" and (row["batch"], row["beams"]) == (batch, beams)]
    sizes = list(dict.fromkeys(row["size"] for row in shown))
    slowest_first = list(dict.fromkeys(row["contender"] for row in sorted(shown, key=lambda row: -row["ms"])))
    names = [name for name in slowest_first if not name.startswith("floor")]
    with rc_context({"svg.hashsalt": "peers", "font.size": 9, "svg.fonttype": "path"}):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)
        for panel, size in zip(panels[0], sizes, strict=True):
            _panel(panel, [row for row in shown if row["size"] == size], names)
            panel.set_title(f"{size} parameters", fontsize=10, loc="left")
        panels[0][0].invert_yaxis()
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
        figure.supxlabel(f"CPU ms of one search, {batch} user x {beams} beams, one core, log scale", fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _panel(panel: Any, rows: list[dict[str, Any]], names: list[str]) -> None:
    ms = {(row["contender"], row["steps"]): row["ms"] for row in rows}
    steps = sorted({row["steps"] for row in rows})
    for place, count in enumerate(steps):
        offset = (place - (len(steps) - 1) / 2) * 0.38
        here = [(y, ms[name, count]) for y, name in enumerate(names) if (name, count) in ms]
        middles, widths = [y + offset for y, _ in here], [x for _, x in here]
        bars = panel.barh(middles, widths, 0.36, color=COLOURS[place], label=f"{count} reasoning steps")
        panel.bar_label(bars, fmt=lambda x: f"{x:.0f}" if x >= 10 else f"{x:.1f}", padding=2, fontsize=8)
        floor = min(value for (name, at), value in ms.items() if name.startswith("floor") and at == count)
        panel.axvline(floor, color=COLOURS[place], linestyle=":", linewidth=1.5, label=FLOOR if place else None)
    panel.set_xscale("log")
    panel.set_xlim(left=1, right=2.2 * max(ms.values()))
    panel.set_yticks(range(len(names)), [NAMES.get(name, name) for name in names])
    panel.spines[["top", "right"]].set_visible(False)
