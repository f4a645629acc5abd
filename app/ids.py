"""Ids of requests and of recommendations."""

from __future__ import annotations

import random


def fresh_id() -> str:
    """32 hexadecimal digits. No secret, so not asked of the system: that would let go of Python's lock, and a busy
    engine takes it."""
    return f"{random.getrandbits(128):032x}"
