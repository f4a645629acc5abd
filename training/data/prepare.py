"""What training and evaluation do with a data folder that `read` has read: splits by user, and statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Literal, TypedDict, TypeVar

import numpy as np

from serving.types import EventData
from training.data.errors import DataError
from training.data.read import Dataset

SplitKind = Literal["leave-one-out", "chronological"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Split:
    """Training sequences, and one target per evaluated user with the history before it.

    `train[i]` belongs to user row `train_users[i]`, `valid_*[i]` to `valid_users[i]`, `test_*[i]` to
    `test_users[i]`. Sequences: (length,) int32 item rows, oldest first, at least one item. Targets:
    (users,) int32. User rows: (users,) int64. Events: of each sequence; None where nothing is read of them but items.
    """

    train: list[np.ndarray]
    valid_history: list[np.ndarray]
    valid_target: np.ndarray
    test_history: list[np.ndarray]
    test_target: np.ndarray
    train_users: np.ndarray
    valid_users: np.ndarray
    test_users: np.ndarray
    train_events: list[EventData] | None = None
    valid_events: list[EventData] | None = None
    test_events: list[EventData] | None = None


def weigh(data: Dataset, type_weights: Mapping[str, float]) -> Dataset:
    """The events as a model reads them: weighted by their type, 1 where a type is not named, and as if those of weight
    0 had not happened. Raises DataError for a type that no event has, and where no event is left.
    """
    if not type_weights:
        return data
    if unknown := sorted(type_weights.keys() - set(data.type_names)):
        known = ", ".join(data.type_names) or "none, for interactions have no column type"
        raise DataError(f"{data.name} has no events of type {unknown[0]!r}; history.type_weights may name {known}")
    assert data.types is not None
    of_type = [type_weights.get(name, 1.0) for name in data.type_names]
    weights = np.array([*of_type, 1.0], np.float32)[data.types]  # the last one is of events without a type
    kept = weights > 0
    if not kept.any():
        raise DataError(f"{data.name} has no event of a type with a weight above 0; raise one in history.type_weights")
    counts = np.bincount(np.repeat(np.arange(len(data.user_ids)), np.diff(data.offsets))[kept],
                         minlength=len(data.user_ids))  # fmt: skip
    users = np.flatnonzero(counts)
    dropped = int(len(kept) - kept.sum())
    return replace(
        data,
        user_ids=[data.user_ids[user] for user in users],
        offsets=np.concatenate([[0], np.cumsum(counts[users])]).astype(np.int64),
        sequence=data.sequence[kept],
        times=data.times[kept],
        types=data.types[kept],
        values=None if data.values is None else data.values[kept],
        weights=weights[kept],
        skipped=data.skipped | ({"events of types with weight 0 (left out)": dropped} if dropped else {}),
    )


def leave_one_out(data: Dataset) -> Split:
    """Per user: the last event is the test target, the one before it the validation target, the rest is training.

    The test history includes the validation item. Users with fewer than 3 events are trained on whole
    and not evaluated. Raises DataError where no user has 3 events.
    """
    sequences = [data.events(user) for user in range(len(data.user_ids))]
    evaluated = np.flatnonzero(np.diff(data.offsets) >= 3)
    if not len(evaluated):
        raise DataError(f"{data.name}: no user has 3 events, so nothing can be held out; add longer histories")
    long = [sequences[user] for user in evaluated]
    return Split(
        train=[sequence[:-2] if len(sequence) >= 3 else sequence for sequence in sequences],
        valid_history=[sequence[:-2] for sequence in long],
        valid_target=np.array([sequence[-2] for sequence in long], dtype=np.int32),
        test_history=[sequence[:-1] for sequence in long],
        test_target=np.array([sequence[-1] for sequence in long], dtype=np.int32),
        train_users=np.arange(len(sequences)),
        valid_users=evaluated,
        test_users=evaluated,
    )


def chronological(data: Dataset, valid_from: float, test_from: float) -> Split:
    """Split at two moments: training sees only events before `valid_from`, as a model trained that day would.

    A user's validation target is the first event in [valid_from, test_from), the test target the first
    at or after `test_from`; the history is everything before the window, and users without one are not
    evaluated. Times are in the data's own unit, see `time_quantiles`.
    Raises DataError where times are mere positions (0, 1, 2, … per user) or a part would be empty.
    """
    if not valid_from < test_from:
        raise DataError(f"{data.name}: valid_from ({valid_from}) must be earlier than test_from ({test_from})")
    positions = np.arange(len(data.sequence)) - np.repeat(data.offsets[:-1], np.diff(data.offsets))
    if np.array_equal(data.times, positions):
        raise DataError(f"{data.name}: times are positions, not moments; use leave-one-out or give real timestamps")
    users = range(len(data.user_ids))
    sequences = [data.events(user) for user in users]
    times = [data.times[data.offsets[user] : data.offsets[user + 1]] for user in users]
    valid_at = np.array([np.searchsorted(time, valid_from) for time in times])
    test_at = np.array([np.searchsorted(time, test_from) for time in times])
    train_users = np.flatnonzero(valid_at)
    valid_users = np.flatnonzero((valid_at > 0) & (valid_at < test_at))
    test_users = np.flatnonzero((test_at > 0) & (test_at < np.diff(data.offsets)))
    if not (len(train_users) and len(valid_users) and len(test_users)):
        raise DataError(
            f"{data.name}: {len(train_users)} training, {len(valid_users)} validation and {len(test_users)} test users "
            f"for a split at {valid_from} and {test_from}; "
            f"choose moments between {data.times.min()} and {data.times.max()}"
        )
    return Split(
        train=[sequences[user][: valid_at[user]] for user in train_users],
        valid_history=[sequences[user][: valid_at[user]] for user in valid_users],
        valid_target=np.array([sequences[user][valid_at[user]] for user in valid_users], dtype=np.int32),
        test_history=[sequences[user][: test_at[user]] for user in test_users],
        test_target=np.array([sequences[user][test_at[user]] for user in test_users], dtype=np.int32),
        train_users=train_users,
        valid_users=valid_users,
        test_users=test_users,
    )


def split_by(data: Dataset, kind: SplitKind, *, times: bool = False) -> Split:
    """The split of a name; chronological puts the last fifth of all events' times aside, half for each evaluation.

    With what a model reads of events, where they are weighted or it reads their times.
    """
    split = leave_one_out(data) if kind == "leave-one-out" else chronological(data, *time_quantiles(data, 0.8, 0.9))
    if data.weights is None and not times:
        return split
    return replace(
        split,
        train_events=_events(data, split.train_users, split.train, times),
        valid_events=_events(data, split.valid_users, split.valid_history, times),
        test_events=_events(data, split.test_users, split.test_history, times),
    )


def with_newest(data: Dataset, split: Split, users: np.ndarray) -> Split:
    """The split with the validation targets of some users in its training part. users: positions in `valid_users`."""
    more = np.isin(split.train_users, split.valid_users[users])
    train = [
        data.events(user)[: len(sequence) + longer]
        for user, sequence, longer in zip(split.train_users.tolist(), split.train, more.tolist(), strict=True)
    ]
    if split.train_events is None:
        return replace(split, train=train)
    times = split.train_events[0].times is not None
    return replace(split, train=train, train_events=_events(data, split.train_users, train, times))


class LearntUntil(TypedDict):
    """Up to which time a model may have learnt the events that a split by every user's newest holds out for validation
    and for test, in the data's unit; None: none of them. Nothing is known of single users, for a bundle names none."""

    valid: float | None
    test: float | None


def learnt_until(data: Dataset, split: Split, kind: SplitKind, refits: bool, before: LearntUntil | None) -> LearntUntil:
    """What a model has learnt that was trained on a split. refits: whether it has learnt from validation in the end.
    before: of the one that it is an update of."""
    valid, test = (before["valid"], before["test"]) if before else (None, None)
    learnt = [(split.train_users, split.train, -1)] if kind == "chronological" else []  # has all events of some users
    if refits:
        learnt.append((split.valid_users, split.valid_history, 0))
    for users, sequences, offset in learnt:
        newest = float(_times_after(data, users, sequences, offset).max())
        valid = newest if valid is None else max(valid, newest)
        if kind == "chronological":
            test = newest if test is None else max(test, newest)
    return {"valid": valid, "test": test}


def without_learnt(data: Dataset, split: Split, until: LearntUntil | None) -> Split:
    """The split without the targets that a model may have learnt already, which would flatter it. Those of validation
    are in the training part instead."""
    if until is None:
        return split
    if until["valid"] is not None:
        is_new = _times_after(data, split.valid_users, split.valid_history, 0) > until["valid"]
        split = with_newest(data, split, np.flatnonzero(~is_new))
        split = replace(
            split,
            valid_users=split.valid_users[is_new],
            valid_history=list(compress(split.valid_history, is_new)),
            valid_target=split.valid_target[is_new],
            valid_events=split.valid_events and list(compress(split.valid_events, is_new)),
        )
    if until["test"] is not None:
        is_new = _times_after(data, split.test_users, split.test_history, 0) > until["test"]
        split = replace(
            split,
            test_users=split.test_users[is_new],
            test_history=list(compress(split.test_history, is_new)),
            test_target=split.test_target[is_new],
            test_events=split.test_events and list(compress(split.test_events, is_new)),
        )
    return split


def _times_after(data: Dataset, users: np.ndarray, histories: Sequence[np.ndarray], offset: int) -> np.ndarray:
    """When the event after each history was, or, with an offset of -1, its last one. Shape: (users,)."""
    lengths = np.fromiter(map(len, histories), np.int64, len(histories))
    times: np.ndarray = data.times[data.offsets[users] + lengths + offset]
    return times


def _events(data: Dataset, users: np.ndarray, histories: Sequence[np.ndarray], times: bool) -> list[EventData]:
    """What is read of the events of histories; a history is the begin of its user's events."""
    weights = np.ones(len(data.sequence), np.float32) if data.weights is None else data.weights
    every = EventData(weights, data.times.astype(np.float64) if times else None)
    first = data.offsets[users]
    return [every.of(slice(at, at + len(part))) for at, part in zip(first, histories, strict=True)]


def sample_events(events: Sequence[EventData] | None, count: int) -> list[EventData] | None:
    """Those of the histories that `sample_users` draws."""
    return None if events is None else sample_users(events, np.arange(len(events)), count)[0]


def sample_users(histories: Sequence[T], target: np.ndarray, count: int) -> tuple[list[T], np.ndarray]:
    """The same `count` users every time, drawn without regard to order."""
    chosen = np.random.default_rng(0).permutation(len(target))[:count]
    return [histories[row] for row in chosen], target[chosen]


def time_quantiles(data: Dataset, *shares: float) -> list[float]:
    """Moments before which the given shares (0..1) of all events lie, e.g. `time_quantiles(data, 0.8, 0.9)`."""
    return [float(moment) for moment in np.quantile(data.times, shares)]


def statistics(data: Dataset) -> dict[str, float]:
    """Size and shape of a data set.

    repeat_share: events whose item the user had before; tie_share: steps (two consecutive events of a
    user) at one time; density: events / (users x items).
    """
    lengths = np.diff(data.offsets)
    users, items, events = len(lengths), len(data.items), len(data.sequence)
    owner = np.repeat(np.arange(users, dtype=np.int64), lengths)
    pair = np.sort(owner * items + data.sequence)  # np.unique hashes, which takes 20 times as long for millions
    pairs = 1 + np.count_nonzero(pair[1:] != pair[:-1])
    same_user = owner[1:] == owner[:-1]
    ties = (data.times[1:] == data.times[:-1]) & same_user
    return {
        "users": users,
        "items": items,
        "events": events,
        "mean_length": events / users,
        "median_length": float(np.median(lengths)),
        "max_length": int(lengths.max()),
        "density": events / (users * items),
        "repeat_share": 1 - pairs / events,
        "tie_share": float(ties.sum() / max(1, same_user.sum())),
        "items_without_events": items - int(np.count_nonzero(np.bincount(data.sequence))),
        "users_below_3_events": int((lengths < 3).sum()),
        "items_with_title": sum(title is not None for title in data.items.titles),
    }


def describe(data: Dataset, split: Split | None = None) -> str:
    """The statistics as lines to print, with what was counted as odd and the sizes of a split."""
    rows: dict[str, float] = statistics(data)
    if split is not None:
        rows |= {
            "training_users": len(split.train),
            "training_events": sum(map(len, split.train)),
            "validation_targets": len(split.valid_target),
            "test_targets": len(split.test_target),
        }
    lines = [data.name]
    for name, value in rows.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        lines.append(f"  {name.replace('_', ' '):<22}{shown:>14}")
    lines += [f"  note: {count:,} {reason}" for reason, count in data.skipped.items()]
    for number, name in enumerate(data.type_names):
        assert data.types is not None
        lines.append(f"  type {name:<17}{int((data.types == number).sum()):>14,}")
    return "\n".join(lines)
