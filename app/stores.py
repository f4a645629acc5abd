"""What the service keeps from one request to the next, and where: in Redis, or else in this process and in files."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from redis.asyncio import Redis

from app.settings import Settings
from serving.online.cache import Count, StateCache
from serving.online.changelog import CHANGES_FILE, ChangeLog, FileLog, MemoryLog, NoLog, RedisLog, stream_key
from serving.online.counters import Counters, LocalCounters, RedisCounters
from serving.online.feedback import Feedback, FeedbackFiles, LocalFeedback, RedisFeedback
from serving.online.impressions import Impressions, LocalImpressions, RedisImpressions
from serving.online.redis_link import RedisLink, connect
from serving.online.tiers import MemoryTier, RedisTier
from serving.online.users import Bounds, MemoryUsers, NoUsers, RedisUsers, UserStore

log = logging.getLogger("streamrec.stores")

CHANGE_LIMIT_S = 1.0  # for Redis to store a change


@dataclass(frozen=True)
class Stores:
    """redis: the connection that the others share, None without Redis. impressions: None if they are not kept."""

    redis: Redis | None
    users: UserStore
    cache: StateCache
    change_log: ChangeLog
    feedback: Feedback
    impressions: Impressions | None
    counters: Counters


def open_stores(settings: Settings, count: Count) -> Stores:
    """count: called for every access to the cache, see `StateCache`."""
    if settings.redis_url is None:
        return _open_local(settings, count)
    return _open_redis(settings, connect(settings.redis_url.get_secret_value()), count)


def _open_redis(settings: Settings, redis: Redis, count: Count) -> Stores:
    prefix, secret = settings.redis_prefix, settings.user_secret
    lookup_limit, store_limit = settings.redis_timeout_ms / 1000, settings.redis_store_timeout_ms / 1000
    store = RedisLink(redis, store_limit)
    tier = RedisTier(
        RedisLink(redis, lookup_limit), store, settings.cache_ttl_s, settings.redis_max_value_bytes,
        settings.state_dtype, prefix=prefix, secret=secret,
    )  # fmt: skip
    impressions = None
    if settings.rotation_window_s:
        impressions = RedisImpressions(RedisLink(redis, store_limit), prefix, settings.rotation_window_s)
    return Stores(
        redis=redis,
        users=RedisUsers(store, _bounds(settings), secret, prefix),
        cache=StateCache(_memory_tier(settings), tier, count),
        change_log=RedisLog(RedisLink(redis, CHANGE_LIMIT_S), stream_key(prefix)),
        feedback=RedisFeedback(
            RedisLink(redis, CHANGE_LIMIT_S), prefix, settings.feedback_window_s,
            settings.feedback_retention_days, settings.max_feedback_records,
        ),
        impressions=impressions,
        counters=RedisCounters(RedisLink(redis, CHANGE_LIMIT_S), prefix),
    )  # fmt: skip


def _open_local(settings: Settings, count: Count) -> Stores:
    users: UserStore = NoUsers()
    change_log: ChangeLog = NoLog()
    memory, files, impressions = None, None, None
    if settings.workers * settings.replicas == 1:
        users = MemoryUsers(settings.max_known_users, settings.max_known_bytes, _bounds(settings))
        change_log, memory = MemoryLog(), _memory_tier(settings)
        impressions = LocalImpressions(settings.rotation_window_s) if settings.rotation_window_s else None
    else:
        # What one process knew of a user, the others would neither use nor erase.
        log.warning("several processes without Redis keep nothing about users; set STREAMREC_REDIS_URL")
    if settings.state_dir is not None and settings.replicas == 1:  # its files are shared by workers, not by replicas
        change_log = FileLog(settings.state_dir / CHANGES_FILE)
        files = FeedbackFiles(settings.state_dir / "feedback", settings.feedback_retention_days)
    cache = StateCache(memory, None, count)
    return Stores(None, users, cache, change_log, LocalFeedback(files), impressions, LocalCounters())


def _bounds(settings: Settings) -> Bounds:
    return Bounds(settings.max_known_items, settings.max_known_user_bytes, settings.known_ttl_s)


def _memory_tier(settings: Settings) -> MemoryTier | None:
    if not settings.memory_cache_users:
        return None
    return MemoryTier(settings.memory_cache_users, settings.memory_cache_bytes, settings.cache_ttl_s)
