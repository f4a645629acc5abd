"""How often items were taken lately, by anyone: exponentially decayed counts in this process, or shared in Redis.

    count(t) = sum over events e of exp(-(t - t_e) / tau)  =  exp((mark - t) / tau)
    mark     = tau * log(sum over events e of exp(t_e / tau))

Only the mark is kept, the moment at which the count has decayed to 1. It does not change until the next event, is as
large for a year as for an hour, and orders items as their counts do: so it is the score of a sorted set in Redis.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
from redis.exceptions import RedisError

from serving.online.redis_link import RedisDown, RedisLink

log = logging.getLogger("streamrec.counters")

Window = Literal["hour", "day", "week", "month"]

WINDOWS: tuple[Window, ...] = get_args(Window)
TAU = np.array([3600.0, 86_400.0, 7 * 86_400.0, 30 * 86_400.0])  # seconds, of each window
BASELINE = WINDOWS.index("month")
KEPT = 100_000  # items with the highest counts
READ = 5000  # of them are read, of one window
MAX_PENDING = 10_000  # items whose events wait for Redis; beyond them events are not counted
SENT = 500  # items in one call: Redis does nothing else meanwhile
FLUSH_AFTER = 2.0  # seconds
REFRESH_AFTER = 5.0  # seconds for which counts read from Redis are used
TOTAL = ""  # the member that stands for all items together; no item has this id


class Counted(NamedTuple):
    """The items with the highest counts of one window, highest first.

    counts: (n,) float64. before: (n,) float64, the baseline's counts without what the window has. total, total_before:
    the same of all items together."""

    ids: Sequence[str]
    counts: np.ndarray
    before: np.ndarray
    total: float
    total_before: float


class Counters(Protocol):
    """is_shared: whether all processes count together."""

    is_shared: bool

    def add(self, ids: Iterable[str]) -> None:
        """Counts one event on each of these items."""

    async def read(self, window: Window) -> Counted:
        """Never fails: without Redis the counts are those that were read last."""

    async def close(self) -> None: ...


def _counted(ids: Sequence[str], marks: np.ndarray, baseline: np.ndarray, window: int, now: float) -> Counted:
    """marks, baseline: (1 + n,) of the window and of the baseline, first of all items together."""
    counts = np.exp((marks - now) / TAU[window])
    before = np.maximum(np.exp((baseline - now) / TAU[BASELINE]) - counts, 0.0)
    return Counted(ids, counts[1:], before[1:], float(counts[0]), float(before[0]))


class LocalCounters:
    """In this process, lost when it ends: of at most 2 * KEPT items."""

    is_shared = False

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rows = {TOTAL: 0}
        self._marks = np.full((1024, len(WINDOWS)), -np.inf)  # by row

    def add(self, ids: Iterable[str]) -> None:
        rows = [self._row(item_id) for item_id in dict.fromkeys(ids)]
        if not rows:
            return
        events = np.ones((1 + len(rows), 1))
        events[0] = len(rows)  # of all items together
        rows = [0, *rows]
        self._marks[rows] = TAU * np.logaddexp(self._marks[rows] / TAU, self._clock() / TAU + np.log(events))
        if len(self._rows) > 2 * KEPT:
            self._forget()

    def _row(self, item_id: str) -> int:
        row = self._rows.setdefault(item_id, len(self._rows))
        if row == len(self._marks):
            self._marks = np.concatenate([self._marks, np.full_like(self._marks, -np.inf)])
        return row

    def _forget(self) -> None:
        """Keeps the items with the highest counts of the longest window."""
        best = np.argpartition(-self._marks[: len(self._rows), BASELINE], KEPT)[: KEPT + 1]
        rows = [0, *np.sort(best[best > 0]).tolist()]
        ids = list(self._rows)
        self._rows = {ids[row]: number for number, row in enumerate(rows)}
        kept = self._marks[rows]
        self._marks = np.full((2 * len(kept), len(WINDOWS)), -np.inf)
        self._marks[: len(kept)] = kept

    async def read(self, window: Window) -> Counted:
        column, ids = WINDOWS.index(window), list(self._rows)
        marks = self._marks[1 : len(ids), column]
        best = np.argpartition(-marks, READ)[:READ] if len(marks) > READ else np.arange(len(marks))
        rows = np.concatenate([[0], 1 + best[np.lexsort((best, -marks[best]))]])
        found = self._marks[rows]
        return _counted([ids[row] for row in rows[1:]], found[:, column], found[:, BASELINE], column, self._clock())

    async def close(self) -> None:
        pass


def _parsed(found: Sequence[Any], window: int) -> Counted:
    """The reply to READ_MARKS. Raises ValueError for what this service has not written."""
    now, (_, *ids), *both = found
    marks, baseline = (np.array([-np.inf if mark is None else float(mark) for mark in some]) for some in both)
    return _counted([item_id.decode() for item_id in ids], marks, baseline, window, float(now))


# Adds events. KEYS: a sorted set per window; ARGV: how many items are kept, the tau of each window, then items and how
# many events each has.
ADD = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
for w = 1, #KEYS do
  local tau = tonumber(ARGV[1 + w])
  for i = 2 + #KEYS, #ARGV, 2 do
    local mark = now + tau * math.log(tonumber(ARGV[i + 1]))
    local known = tonumber(redis.call('ZSCORE', KEYS[w], ARGV[i]) or '-inf')
    local late, early = math.max(mark, known), math.min(mark, known)
    mark = late + tau * math.log(1 + math.exp((early - late) / tau))
    redis.call('ZADD', KEYS[w], string.format('%.17g', mark), ARGV[i])
  end
  redis.call('ZREMRANGEBYSCORE', KEYS[w], '-inf', string.format('%.17g', now - 10 * tau))
  redis.call('ZREMRANGEBYRANK', KEYS[w], 0, -2 - ARGV[1])
  redis.call('EXPIRE', KEYS[w], math.ceil(10 * tau))
end
"""

# Reads the highest marks of one window, and those of the same items in the baseline; first those of all items together.
# KEYS: both; ARGV: of how many items.
READ_MARKS = """
local time = redis.call('TIME')
local best = redis.call('ZREVRANGE', KEYS[1], 0, ARGV[1], 'WITHSCORES')
local ids, marks, baseline = {''}, {redis.call('ZSCORE', KEYS[1], '')}, {redis.call('ZSCORE', KEYS[2], '')}
for i = 1, #best, 2 do
  if best[i] ~= '' then
    ids[#ids + 1], marks[#marks + 1] = best[i], best[i + 1]
    baseline[#baseline + 1] = redis.call('ZSCORE', KEYS[2], best[i])
  end
end
return {time[1] .. '.' .. string.format('%06d', time[2]), ids, marks, baseline}
"""


class RedisCounters:
    """In Redis, for all processes: of at most KEPT items. Events are sent together, some seconds after they happened;
    a process that is killed takes those with it."""

    is_shared = True

    def __init__(self, link: RedisLink, prefix: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._link, self._clock = link, clock
        self._keys = [f"{prefix}:counts:{window}" for window in WINDOWS]
        self._pending: Counter[str] = Counter()
        self._flushing: asyncio.Task[None] | None = None
        self._reading: dict[Window, asyncio.Task[None]] = {}
        nothing = _counted([], np.full(1, -np.inf), np.full(1, -np.inf), 0, 0.0)
        self._read: dict[Window, tuple[float, Counted]] = dict.fromkeys(WINDOWS, (-REFRESH_AFTER, nothing))

    def add(self, ids: Iterable[str]) -> None:
        distinct = set(ids)
        if len(self._pending) + len(distinct) > MAX_PENDING:
            return
        self._pending.update(distinct)
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush_until_empty())

    async def _flush_until_empty(self) -> None:
        while self._pending:
            await asyncio.sleep(FLUSH_AFTER)
            await self._flush()

    async def _flush(self) -> None:
        """Sends what is pending. What Redis does not take stays."""
        pending = list(self._pending.items())
        for begin in range(0, len(pending), SENT):
            some = dict(pending[begin : begin + SENT])
            words = [word for pair in (some | {TOTAL: sum(some.values())}).items() for word in pair]
            try:
                await self._link.execute_pipelined("EVAL", ADD, len(WINDOWS), *self._keys, KEPT, *TAU.tolist(), *words)
            except (RedisDown, RedisError) as error:
                log.debug("events wait to be counted: %s", error)
                return
            self._pending -= Counter(some)

    async def read(self, window: Window) -> Counted:
        read_at, counted = self._read[window]
        if self._clock() - read_at < REFRESH_AFTER:
            return counted
        if window not in self._reading:  # one for all who ask meanwhile
            self._reading[window] = asyncio.create_task(self._refresh(window))
        await asyncio.shield(self._reading[window])
        return self._read[window][1]

    async def _refresh(self, window: Window) -> None:
        try:
            key, baseline = self._keys[WINDOWS.index(window)], self._keys[BASELINE]
            found = await self._link.execute_pipelined("EVAL", READ_MARKS, 2, key, baseline, READ)
            counted = _parsed(found, WINDOWS.index(window))
        except (RedisDown, RedisError, ValueError) as error:
            log.debug("counts could not be read: %s", error)
            counted = self._read[window][1]
        finally:
            del self._reading[window]
        self._read[window] = self._clock(), counted

    async def close(self) -> None:
        """Sends what is left, if Redis takes it at once."""
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.gather(self._flushing, return_exceptions=True)
        await self._flush()
