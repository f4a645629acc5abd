"""What `overload.py` reports: one row per turn, and the targets with what was measured for each."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.quantiles import rounded
from benchmarks.service.sender import Sent

TIMES = 5  # the best goodput: the load of an overload
REFUSED = (429, 503)
CALLERS = ("within", "beyond")  # their quota
SHARES = ("light alone", "light beside heavy", "heavy")

Row = dict[str, Any]


def summarise(sent: Sequence[Sent], settle: float, end: float, budget_ms: float) -> Row:
    """One turn. Goodput counts answers that arrive between `settle` and `end` (seconds); all else counts requests due
    between them.

    passed_per_s: not refused for a quota; the queue may have refused them. lost: neither answered in time nor refused.
    waited_s: time in the queue of requests answered in time.
    retry_error_low, retry_error_high: 5% and 95% quantiles, over refusals, of Retry-After minus the wait of the request
    that was admitted next, in seconds.
    """
    in_time = [row for row in sent if row.status == 200 and 1000 * row.seconds <= budget_ms]
    due = [row for row in sent if settle <= row.due < end]
    refused = [row for row in due if row.status in REFUSED]
    answered = [row for row in in_time if settle <= row.due < end]
    refusal_ms = [1000 * (row.seconds - row.lag) for row in refused]
    retry_errors = [row.retry_after - wait_at(in_time, row.due) for row in refused if in_time]
    return {
        "goodput_per_s": round(sum(settle <= row.due + row.seconds < end for row in in_time) / (end - settle), 1),
        "p50_ms": rounded([1000 * row.seconds for row in answered], 0.5),
        "p99_ms": rounded([1000 * row.seconds for row in answered], 0.99),
        "refused_per_s": round(len(refused) / (end - settle), 1),
        "refusal_p50_ms": rounded(refusal_ms, 0.5),
        "refusal_p99_ms": rounded(refusal_ms, 0.99),
        "passed_per_s": round(sum(row.status != 429 for row in due) / (end - settle), 1),
        "sent": len(due),
        "lost": len(due) - len(answered) - len(refused),
        "without_retry_after": sum(not row.retry_after for row in refused),
        "retry_after_s": rounded([row.retry_after for row in refused], 0.5),
        "waited_s": rounded([row.queue for row in answered], 0.5),
        "retry_error_low": rounded(retry_errors, 0.05),
        "retry_error_high": rounded(retry_errors, 0.95),
        "lag_p99_ms": rounded([1000 * row.lag for row in due], 0.99),
    }


def wait_at(answered: Sequence[Sent], due: float) -> float:
    """Seconds in the queue of the first request due from then on, or of the last request of all. Sorted by due."""
    return answered[min(bisect_left(answered, due, key=lambda row: row.due), len(answered) - 1)].queue


def bars(rows: Sequence[Row], budget_ms: float) -> list[Row]:
    """The targets of the service, and whether these rows meet them: by the median over turns of the first, elsewhere by
    the worst turn."""
    parts = {name: [row for row in rows if row["part"] == name] for name in dict.fromkeys(row["part"] for row in rows)}
    best, overload, (queue,) = parts["best"], parts["overload"], parts["queue"]
    (within,), (beyond,) = (parts[f"quota: {name}"] for name in CALLERS)
    kept = [o["goodput_per_s"] / b["goodput_per_s"] for b, o in zip(best, overload, strict=True)]
    alone, beside = (parts[name] for name in SHARES[:2])
    shared = [b["goodput_per_s"] / a["goodput_per_s"] for a, b in zip(alone, beside, strict=True)]
    refusing = [*overload, queue, beyond]
    refusals = [row["refusal_p99_ms"] for row in refusing]
    lost = [row["lost"] / row["sent"] for row in refusing]
    early = [row["retry_error_low"] for row in (*overload, queue)]
    late = [row["retry_error_high"] for row in (*overload, queue)]
    growth = max(row["peak_mb"] for row in overload) - max(row["peak_mb"] for row in best)
    silent = sum(row["without_retry_after"] for row in refusing)
    in_time = f"answered within {budget_ms:,.0f} ms"
    return [
        _bar(f"{in_time} a second, at {TIMES} times the load / at the best load", median(kept), ">= 0.8", kept),
        _bar("refusals, p99 in ms", max(refusals), "<= 100", refusals),
        _bar(f"share neither {in_time} nor refused", max(lost), "<= 0.001", lost),
        _bar("refusals without Retry-After", silent, "<= 0"),
        _bar("Retry-After minus the wait, 5% quantile, s", min(early), ">= -1", early),
        _bar("Retry-After minus the wait, 95% quantile, s", max(late), "<= 2", late),
        _bar("peak memory above the best load's, MB", growth, "<= 50"),
        _bar("requests that pass the quota / the quota", beyond["passed_per_s"] / beyond["quota_per_s"], "<= 1.02"),
        _bar("within its quota, yet refused, a second", within["refused_per_s"], "<= 0"),
        _bar(
            "answers to two light clients a second, beside 64 connections of another / alone",
            median(shared),
            ">= 0.5",
            shared,
        ),
    ]


def _bar(text: str, value: float, limit: str, turns: Sequence[float] = ()) -> Row:
    """limit: `<= NUMBER` or `>= NUMBER`. turns: the values of all turns, whose range is shown."""
    relation, bound = limit.split()
    row: Row = {"part": "bars", "bar": text, "value": f"{value:.3g}"}
    if turns:
        row |= {"lowest": f"{min(turns):.3g}", "highest": f"{max(turns):.3g}"}
    return row | {"limit": limit, "holds": value <= float(bound) if relation == "<=" else value >= float(bound)}
