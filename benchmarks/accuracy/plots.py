"""The picture of each question, drawn from its rows. The file is the same for the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
STYLE: Any = {"svg.hashsalt": "accuracy", "font.size": 9, "svg.fonttype": "path"}
BLUE, GREY, RED = "#1f5f8b", "#9db4c8", "#b5523b"


def bars(rows: Rows, path: Path, title: str) -> None:
    """NDCG@10 gained over the row that each names, with the bootstrap's interval."""
    shown = [row for row in rows if "gain" in row]
    names = [row["model"] + (f" | {row['against']}" if row.get("part") == "pair" else "") for row in shown]
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 0.8 + 0.27 * len(shown)), layout="constrained")
        panel = figure.subplots()
        for y, row in enumerate(shown):
            sure = row["low"] > 0 or row["high"] < 0
            colour = GREY if not sure else BLUE if row["gain"] > 0 else RED
            panel.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=2)
            panel.plot(row["gain"], y, "o", color=colour, markersize=5)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(range(len(shown)), names)
        panel.invert_yaxis()
        panel.set_title(title, fontsize=9, loc="right")
        panel.locator_params(axis="x", nbins=6)
        panel.set_xlabel("gain in test NDCG@10, 95% interval over users")
        _save(figure, panel, path)


def steps(rows: Rows, path: Path) -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        panel = figure.subplots()
        for kind, colour in (("one checkpoint", BLUE), ("one checkpoint, dense score joined", RED)):
            line = [row for row in rows if row.get("kind") == kind]
            if not line:
                continue  # validation gave the dense score no weight
            x, y = [row["steps"] for row in line], [row["ndcg@10"] for row in line]
            base = next(row["ndcg@10"] for row in line if row["steps"] == 0)
            panel.plot(x, y, "o-", color=colour, label=kind)
            low, high = ([base + row.get(end, 0) for row in line] for end in ("low", "high"))  # none over itself
            panel.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        each = [row for row in rows if row.get("kind") == "a checkpoint each"]
        for used, marker, label in ((True, "s", "trained for this l alone"), (False, "x", "the same, without steps")):
            part = [row for row in each if (row["steps"] > 0) == used]
            panel.plot([row["trained_for"] for row in part], [row["ndcg@10"] for row in part], marker, color="black",
                       label=label)  # fmt: skip
        plain = next(row["ndcg@10"] for row in rows if row.get("kind") == "plain")
        panel.axhline(plain, color=GREY, linestyle=":", label="plain, stage 1 only")
        panel.set_xlabel("reasoning steps l")
        panel.set_ylabel("test NDCG@10")
        figure.legend(loc="outside right upper", frameon=False)
        _save(figure, panel, path)


def drift(rows: Rows, path: Path) -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        variants = list(dict.fromkeys(row["arm"] for row in rows))
        for variant, colour in zip(variants, (BLUE, RED, "black"), strict=False):
            deepest = max(row["steps"] for row in rows if row["arm"] == variant)
            line = [row for row in rows if row["arm"] == variant and row["steps"] == deepest]
            left.plot([row["step"] for row in line], [row["cosine"] for row in line], "o-", color=colour, label=variant)
            share = {row["steps"]: row["unparsable"] for row in rows if row["arm"] == variant}
            right.plot(list(share), list(share.values()), "o-", color=colour, label=variant)
        left.set_xlabel("step i of the largest number of steps")
        left.set_ylabel("cos(s_i, target)")
        right.set_xlabel("reasoning steps l")
        right.set_ylabel("greedy outputs that are no item")
        right.set_ylim(bottom=0)
        left.legend(frameon=False)
        right.spines[["top", "right"]].set_visible(False)
        _save(figure, left, path)


def adaptive(rows: Rows, path: Path) -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3.4), layout="constrained")
        panel = figure.subplots()
        for start, colour in (("always", BLUE), ("settled", RED)):
            line = sorted((row["mean_steps"], row["ndcg@10"]) for row in rows if row["model"].startswith(start))
            panel.plot(*zip(*line, strict=True), "o-", color=colour, label=start)
        panel.set_xlabel("mean steps")
        panel.set_ylabel("test NDCG@10")
        panel.legend(frameon=False)
        _save(figure, panel, path)


def pareto(rows: Rows, path: Path) -> None:
    """Accuracy against the time of one answer."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3.4), layout="constrained")
        panel = figure.subplots()
        for row in rows:
            if "answer_ms" in row:
                panel.plot(row["answer_ms"], row["ndcg@10"], "o", color=RED if row["weights"] == "int8" else BLUE)
                panel.annotate(row["model"], (row["answer_ms"], row["ndcg@10"]), fontsize=8,
                               xytext=(5, 4), textcoords="offset points")  # fmt: skip
        panel.margins(x=0.3, y=0.2)
        panel.set_xlabel("ms of processor time, one user's answer, ONNX Runtime")
        panel.set_ylabel("test NDCG@10")
        _save(figure, panel, path)


def _save(figure: Figure, panel: Any, path: Path) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
