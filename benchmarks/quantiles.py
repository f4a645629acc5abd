"""Quantiles of measured times. Imports nothing, for locust's process loads it as well."""

from __future__ import annotations

import math
from collections.abc import Sequence


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share of all values do not exceed (nearest rank); None of no values."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


def rounded(values: Sequence[float], share: float, digits: int = 2) -> float | None:
    """The quantile for a table."""
    value = quantile(values, share)
    return None if value is None else round(value, digits)
