"""Events in histories: checked where they come from JSON or Arrow, and made into what the model reads.

A history is a list of item ids and events, in any mixture, oldest first. The order given is the order: times do not
change it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from serving.ids import id_fault, is_unicode
from serving.types import MAX_TIMESTAMP, MAX_TYPE_LENGTH, Event, EventData

PLAIN = frozenset({str})
NAMES = frozenset(Event.__slots__)
TIME_BUCKETS = 32  # the last one begins after 34 years


def are_ids(history: Sequence[object]) -> TypeGuard[Sequence[str]]:
    """Whether a history is item ids alone."""
    return PLAIN.issuperset(map(type, history))


def read_events(
    history: Sequence[str | Event], type_weights: Iterable[tuple[str, float]]
) -> tuple[Sequence[str], EventData | None]:
    """Item ids, without events of types with weight 0, and what the model reads of those that stay.

    A history of ids alone is returned as it is, and there is nothing else to read.
    """
    if are_ids(history):
        return history, None
    of_type = dict(type_weights)
    events = [event if isinstance(event, Event) else Event(event) for event in history]
    weights = np.array([1.0 if event.type is None else of_type.get(event.type, 1.0) for event in events], np.float32)
    times = np.array([np.nan if event.timestamp is None else event.timestamp for event in events])
    kept = np.flatnonzero(weights > 0)
    return [events[index].item_id for index in kept], EventData(weights[kept], times[kept])


def time_buckets(times: Sequence[np.ndarray | None], max_items: int, width: int) -> np.ndarray:
    """How long before the newest event whose time is known each of the last `max_items` events was, in buckets.

    times: of each history's events, as in `EventData`. Shape: (B, width) int64; 0 where nothing is known or no event.
    """
    buckets = np.zeros((len(times), width), np.int64)
    for row, own in zip(buckets, times, strict=True):
        recent = np.empty(0) if own is None else own[-max_items:]
        known = recent[~np.isnan(recent)]
        if len(known):
            row[: len(recent)] = gap_buckets(known[-1] - recent)
    return buckets


def gap_buckets(seconds: np.ndarray) -> np.ndarray:
    """1 + floor(log2(1 + seconds)), at most TIME_BUCKETS - 1; 0 for NaN. Times out of order count as none between."""
    bucket = np.minimum(np.frexp(1 + np.maximum(seconds, 0))[1], TIME_BUCKETS - 1)  # exact, unlike a logarithm
    return np.where(np.isnan(seconds), 0, bucket).astype(np.int64)


def to_event(data: Mapping[str, Any]) -> Event:
    """An event from plain values. Raises ValueError with what is wrong, to be put after its name: "has no item_id".

    The same is checked of events over HTTP (`app/schemas/common.py`).
    """
    if unknown := data.keys() - NAMES:
        raise ValueError(f"has the unknown field {min(unknown)[:MAX_TYPE_LENGTH]!r}")
    item_id, kind, value, timestamp = (data.get(name) for name in Event.__slots__)
    if fault := id_fault(item_id):
        raise ValueError(f"has an item_id that {fault}")
    if kind is not None and not (isinstance(kind, str) and 0 < len(kind) <= MAX_TYPE_LENGTH and is_unicode(kind)):
        raise ValueError(f"has a type that is not a text of 1 to {MAX_TYPE_LENGTH} characters")
    if not _is_number(value):
        raise ValueError("has a value that is not a number")
    if not _is_number(timestamp) or not 0 <= (timestamp or 0) <= MAX_TIMESTAMP:
        raise ValueError(f"has a timestamp that is not in seconds since 1970, 0 to {MAX_TIMESTAMP:.0e}")
    return Event(
        str(item_id), kind, None if value is None else float(value), None if timestamp is None else float(timestamp)
    )


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, or missing."""
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        return False
    try:
        return value is None or math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float64 can hold
        return False
