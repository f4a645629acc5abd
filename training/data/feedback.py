"""What people did with recommendations, as the service keeps it, made into a data folder to train on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from redis import Redis
from redis.exceptions import RedisError

from serving.files import atomic_write
from serving.online.feedback import EVENTS, NAME, PAGE, POSITIVE, stream_key
from serving.types import REDIS_PREFIX
from training.data.errors import DataError

SNAPSHOT = "feedback"  # in a run's work folder: the data folder of what a service had recorded when the run began
TABLE = "interactions.parquet"


def data_folder_of(source: str | Path, work_folder: Path) -> Path:
    """A data folder as it is; of a service's feedback, one that is made once and kept in the work folder, so that a
    run that is resumed finds the same events. Raises what `convert_feedback` raises."""
    if "://" not in str(source) and not (Path(source).is_dir() and any(_file_paths(Path(source)))):
        return Path(source)
    snapshot = work_folder / SNAPSHOT
    if not (snapshot / TABLE).exists():  # a kill, or a full disk, leaves the folder without it
        convert_feedback(str(source), snapshot)
    return snapshot


def convert_feedback(
    source: str, out: Path, events: Sequence[str] = POSITIVE, prefix: str = REDIS_PREFIX
) -> Counter[str]:
    """Writes interactions.parquet to the data folder `out`: the chosen events with their types and values, under the
    key that stands for the user.

    source: the folder of the service's files, or the address of its Redis; prefix: of its keys there. Counted are
    `interactions`, and what was left out: `other events`, events of `nobody`, records that are `unreadable`, as is the
    line that a kill cut off. Raises DataError and StorageError.
    """
    if unknown := [event for event in events if event not in EVENTS]:
        raise DataError(f"There is no event {unknown[0]!r}; choose from {', '.join(EVENTS)}.")
    rows: list[tuple[float, str, str, str, float | None]] = []
    counts: Counter[str] = Counter()
    for line in _redis(source, prefix) if "://" in source else _files(Path(source)):
        try:
            record = json.loads(line)
            time, user, item, event = (record[name] for name in ("time", "user", "item_id", "event"))
            value = record.get("value")
            row = (float(time), str(user), str(item), str(event), None if value is None else float(value))
        except (ValueError, TypeError, KeyError):
            counts["unreadable"] += 1
            continue
        kept = "other events" if event not in events else "interactions" if user else "nobody"
        counts[kept] += 1
        if kept == "interactions":
            rows.append(row)
    if not rows:
        raise DataError("There is no event to train on; name the folder or the Redis that the service writes to.")
    times, users, items, types, values = zip(*rows, strict=True)
    numbers = pa.array(values, pa.float64())
    table = pa.table({"user_id": users, "item_id": items, "timestamp": times, "type": types, "value": numbers})
    with atomic_write(out / TABLE) as partial:
        pq.write_table(table, partial)
    return counts


def _files(folder: Path) -> Iterator[bytes]:
    try:
        for path in _file_paths(folder):
            with path.open("rb") as file:
                yield from file
    except OSError as error:
        reason = f"{folder} cannot be read ({error.strerror})"
        raise DataError(f"{reason}; name the folder `feedback` under STREAMREC_STATE_DIR.") from error


def _file_paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def _redis(address: str, prefix: str) -> Iterator[bytes]:
    position = "-"
    try:
        with Redis.from_url(address) as redis:
            while page := redis.xrange(stream_key(prefix), position, count=PAGE):
                yield from (fields.get(b"record", b"") for _, fields in page)
                position = f"({page[-1][0].decode()}"
    except (RedisError, ValueError) as error:  # the address may hold a password
        raise DataError(f"The feedback in Redis cannot be read ({type(error).__name__}); check the address.") from error
