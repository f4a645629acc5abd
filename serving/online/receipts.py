"""The id of a recommendation is its receipt: what feedback on it has to be joined with, sealed by the service's secret.

So nothing has to be kept of an answer, no process has to have given it itself, and an erased user leaves none behind.

    layout 1 | time u32 | source u8 | steps u8 | user 8 | random 6 | n u8, version n | u16 per item, best first | seal 8

An item is known by 16 bits of its checksum: enough to find its position among those of one answer. Without a secret the
seal finds damage only.
"""

from __future__ import annotations

import random
import struct
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from hmac import compare_digest
from typing import Literal, get_args
from zlib import crc32

from serving.errors import RequestError
from serving.online.users import digest

Source = Literal["model", "popularity"]

LAYOUT = 1
HEAD = struct.Struct("<BIBB8s6sB")
SEAL = 8  # bytes
SOURCES: tuple[Source, ...] = get_args(Source)
NOBODY = bytes(8)
INVALID = "This is no id of a recommendation of this service; send the one that the answer has."


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was answered. at: seconds since the epoch. user: `user_key` of the user; empty: nobody's answer."""

    version: str
    source: Source
    steps: int
    at: int
    user: str
    items: tuple[int, ...]

    def position(self, item_id: str) -> int | None:
        """Of an item in the answer, 1 for the best; None if it was not in it."""
        mark = _mark(item_id)
        return self.items.index(mark) + 1 if mark in self.items else None


def user_key(user_id: str, secret: bytes = b"") -> str:
    """What stands for a user in receipts and in what is kept of feedback: 16 hexadecimal digits."""
    return digest(user_id, secret)[:16]


def issue(
    version: str, source: Source, steps: int, user_id: str | None, item_ids: Sequence[str], secret: bytes = b""
) -> str:
    """The id of a recommendation: of letters, digits, - and _, another one every time."""
    name = version.encode()[:255]
    user = NOBODY if user_id is None else bytes.fromhex(user_key(user_id, secret))
    nonce = random.getrandbits(48).to_bytes(6)  # no secret: two answers alike need two ids
    head = HEAD.pack(LAYOUT, int(time.time()), SOURCES.index(source), steps, user, nonce, len(name))
    marks = struct.pack(f"<{len(item_ids)}H", *map(_mark, item_ids))
    body = head + name + marks
    return urlsafe_b64encode(body + _seal(body, secret)).rstrip(b"=").decode()


def read(recommendation_id: str, secret: bytes = b"") -> Receipt:
    """Raises RequestError for what this service has not issued."""
    try:
        raw = urlsafe_b64decode(recommendation_id + "=" * (-len(recommendation_id) % 4))
        body, seal = raw[:-SEAL], raw[-SEAL:]
        layout, at, source, steps, user, _, length = HEAD.unpack_from(body)
        version, marks = body[HEAD.size : HEAD.size + length].decode(), body[HEAD.size + length :]
        items = struct.unpack(f"<{len(marks) // 2}H", marks)
        named = SOURCES[source]
    except (ValueError, IndexError, struct.error) as error:
        raise RequestError(INVALID, "recommendation_id") from error
    if layout != LAYOUT or not compare_digest(seal, _seal(body, secret)):
        raise RequestError(INVALID, "recommendation_id")
    return Receipt(version, named, steps, at, "" if user == NOBODY else user.hex(), items)


def _mark(item_id: str) -> int:
    return crc32(item_id.encode("utf-8", "surrogatepass")) & 0xFFFF


def _seal(body: bytes, secret: bytes) -> bytes:
    return blake2b(body, digest_size=SEAL, key=secret, person=b"recommendation").digest()
