"""The plot of `constraint.py`: the constraint's share of a step against the size of the catalogue, by contender.

The legend says what each holds in memory at the largest catalogue it was run with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

OURS = "ours"
COLOURS = {
    OURS: "#1f5f8b",
    "dense mask": "#9db4c8",
    "binary search": "#c98a4b",
    "hash set": "#7a9a6d",
    "dict trie": "#9a7aa8",
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes an SVG of the rows `step`. The file is the same for the same rows."""
    shown = [row for row in rows if row["part"] == "step" and row["contender"] in COLOURS and "expand_us" in row]
    largest = {row["contender"]: row for row in sorted(shown, key=lambda row: row["items"])}
    counts = sorted({row["rows"] for row in shown})
    with rc_context({"svg.hashsalt": "constraint", "font.size": 9, "svg.fonttype": "path"}):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
        for panel, count in zip(panels, counts, strict=True):
            for name in largest:
                here = [row for row in shown if (row["contender"], row["rows"]) == (name, count)]
                panel.plot(
                    [row["items"] for row in here],
                    [row["expand_us"] for row in here],
                    color=COLOURS[name],
                    marker="o",
                    markersize=4,
                    linewidth=2.5 if name == OURS else 1.5,
                    label=f"{name}, {largest[name]['mib'] / 1024:.2g} GiB",
                )
            panel.set(xscale="log", yscale="log", xlabel="items in the catalogue")
            panel.set_title(f"{count} rows", fontsize=10, loc="left")
            panel.grid(alpha=0.3, which="major")
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("CPU \N{MICRO SIGN}s of the constraint, each step")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=5, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
