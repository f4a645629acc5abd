"""Draws the plot of a recorded result: `python -m benchmarks.plots peers`.

Benchmarks write figures to `benchmarks/results/NAME.json` and draw nothing. The same JSON gives the same file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.common import ROOT

RESULTS = ROOT / "benchmarks/results"
MODULES = {  # by name of the result: these have a function `plot(result, path)`
    "constraint": "benchmarks.engine.constraint",
    "load": "benchmarks.service.load",
    "overload": "benchmarks.service.overload",
    "peers": "benchmarks.engine.peers",
    "soak": "benchmarks.service.soak",
}
STYLE: Any = {"svg.hashsalt": "streamrec", "svg.fonttype": "none", "font.size": 9}
TEAL, BROWN, BLUE, GREY = "#0f766e", "#9a3412", "#1f5f8b", "#9db4c8"


@contextmanager
def drawing(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure (inches) that is written to `path` as SVG at the end of the block."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("name", help="of the result: benchmarks/results/NAME.json")
    parser.add_argument("--out", type=Path, help="file to write (runs/plots/NAME.svg)")
    options = parser.parse_args(arguments)
    result = RESULTS / f"{options.name}.json"
    if not result.exists():
        parser.error(f"there is no {result.relative_to(ROOT)}; run its benchmark first")
    out = options.out or ROOT / "runs/plots" / f"{options.name}.svg"
    _plotter(parser, options.name)(json.loads(result.read_text(encoding="utf-8")), out)
    print(out)
    return 0


def _plotter(parser: argparse.ArgumentParser, name: str) -> Callable[[dict[str, Any], Path], None]:
    if name in MODULES:
        plot: Callable[[dict[str, Any], Path], None] = import_module(MODULES[name]).plot
        return plot
    from benchmarks.accuracy.questions import (  # imports training, which the other plots do without
        QUESTIONS,
        current_name,
    )

    question = QUESTIONS.get(current_name(name.partition("-")[0]))
    if question is None:
        parser.error(f"{name} has a table, but no plot")
    return lambda result, path: question.draw(result["rows"], path)


if __name__ == "__main__":
    sys.exit(main())
