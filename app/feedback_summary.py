"""What people do with recommendations, summed up by model, source and steps: rates, each with its interval."""

from __future__ import annotations

import math
from collections import defaultdict

from app.metrics import Metrics
from app.schemas.feedback import FeedbackSummary, Rate
from serving.online.feedback import IMPRESSION

Z = 1.96  # of a 95% interval


def summaries(metrics: Metrics) -> list[FeedbackSummary]:
    counts: defaultdict[tuple[str, str, int], defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for sample in metrics.samples(
        "streamrec_recommendations_total", "streamrec_hits_total", "streamrec_feedback_total"
    ):
        labels = sample.labels
        of = counts[labels["version"], labels["source"], int(labels["steps"])]
        of[labels.get("event", sample.name)] += int(sample.value)
    return [_summary(*key, found) for key, found in sorted(counts.items())]


def _summary(version: str, source: str, steps: int, counts: defaultdict[str, int]) -> FeedbackSummary:
    recommendations, hits = counts.pop("streamrec_recommendations_total", 0), counts.pop("streamrec_hits_total", 0)
    return FeedbackSummary(
        version=version,
        source=source,
        reasoning_steps=steps,
        recommendations=recommendations,
        events=counts,
        hit_rate=rate(hits, recommendations),
        click_through_rate=rate(counts["click"], counts[IMPRESSION]),
    )


def rate(cases: int, of: int) -> Rate | None:
    """The share with its 95% Wilson score interval; None without anything to share. More cases than there can be, as
    after a restart that forgot what it recommended, count as all."""
    if of == 0:
        return None
    share = min(1.0, cases / of)
    centre, spread = share + Z**2 / (2 * of), Z * math.sqrt(share * (1 - share) / of + Z**2 / (4 * of**2))
    scale = 1 + Z**2 / of
    return Rate(share=share, low=max(0.0, (centre - spread) / scale), high=min(1.0, (centre + spread) / scale))
