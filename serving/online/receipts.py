"""The id of a recommendation is its receipt: what feedback on it has to be joined with, sealed by the service's secret.

So nothing has to be kept of an answer, no process has to have given it itself, and an erased user leaves none behind.

    layout 1 | time u32 | source u8 | steps u8 | user 8 | random 6 | n u8, version n | u16 per item, best first | seal 8

An answer that continues a list has layout 2: the items of the pages before stand ahead of its own, and before the seal
a u16 says how many. An item is known by 16 bits of its checksum, its mark: enough to find its position among those of
one answer. Without a secret the seal finds damage only.
"""

from __future__ import annotations

import random
import struct
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from hmac import compare_digest
from typing import get_args
from zlib import crc32

from serving.errors import RequestError
from serving.online.users import digest
from serving.types import AnsweredBy

LAYOUT, CONTINUED = 1, 2
HEAD = struct.Struct("<BIBB8s6sB")
SEAL = 8  # bytes
SOURCES: tuple[AnsweredBy, ...] = get_args(AnsweredBy)
NO_USER = bytes(8)
INVALID = "This is not the id of a recommendation of this service; send the one in the answer."


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was answered. at: seconds since the epoch. user: `user_key` of the user; empty: nobody's answer. items,
    earlier: marks of the answer's items, and of those on the pages before it."""

    version: str
    source: AnsweredBy
    steps: int
    at: int
    user: str
    items: tuple[int, ...]
    earlier: tuple[int, ...] = ()

    def position(self, item_id: str) -> int | None:
        """Of an item in the list that the answer begins or continues, 1 for the best; None if the answer has it not."""
        [mark] = _marks([item_id])
        return len(self.earlier) + self.items.index(mark) + 1 if mark in self.items else None


def user_key(user_id: str, secret: bytes = b"") -> str:
    """What stands for a user in receipts and in what is kept of feedback: 16 hexadecimal digits."""
    return digest(user_id, secret)[:16]


def issue(
    version: str,
    source: AnsweredBy,
    steps: int,
    user_id: str | None,
    item_ids: Sequence[str],
    secret: bytes = b"",
    earlier: Sequence[int] = (),
) -> str:
    """The id of a recommendation: of letters, digits, - and _, another one every time. earlier: see `Receipt`."""
    name = version.encode()[:255]
    user = NO_USER if user_id is None else bytes.fromhex(user_key(user_id, secret))
    nonce = random.getrandbits(48).to_bytes(6)  # no secret: two answers alike need two ids
    head = HEAD.pack(
        CONTINUED if earlier else LAYOUT, int(time.time()), SOURCES.index(source), steps, user, nonce, len(name)
    )
    marks = struct.pack(f"<{len(item_ids)}H", *_marks(item_ids))
    body = head + name + marks
    if earlier:
        body = head + name + struct.pack(f"<{len(earlier)}H", *earlier) + marks + struct.pack("<H", len(earlier))
    return _written(body + _seal(body, secret))


def read(recommendation_id: str, secret: bytes = b"", field: str = "recommendation_id") -> Receipt:
    """Raises RequestError for what this service has not issued. field: of the request, that has it."""
    try:
        raw = urlsafe_b64decode(recommendation_id + "=" * (-len(recommendation_id) % 4))
        if _written(raw) != recommendation_id:  # other spellings would let feedback on one answer count many times
            raise RequestError(INVALID, field)
        body, seal = raw[:-SEAL], raw[-SEAL:]
        layout, at, source, steps, user, _, length = HEAD.unpack_from(body)
        version, marks = body[HEAD.size : HEAD.size + length].decode(), body[HEAD.size + length :]
        items = struct.unpack(f"<{len(marks) // 2}H", marks)
        items, count = (items[:-1], items[-1]) if layout == CONTINUED else (items, 0)
        named = SOURCES[source]
    except (ValueError, IndexError, struct.error) as error:
        raise RequestError(INVALID, field) from error
    if layout not in (LAYOUT, CONTINUED) or not compare_digest(seal, _seal(body, secret)):
        raise RequestError(INVALID, field)
    who = "" if user == NO_USER else user.hex()
    return Receipt(version, named, steps, at, who, items[count:], items[:count])


def unshown(item_ids: Sequence[str], shown: Sequence[int]) -> list[int]:
    """Indices of the items that were not shown. shown: marks. Each takes one item away, the first that has it: another
    one that happens to have the same mark stays."""
    left = Counter(shown)
    kept = []
    for index, mark in enumerate(_marks(item_ids)):
        if left[mark]:
            left[mark] -= 1
        else:
            kept.append(index)
    return kept


def _written(raw: bytes) -> str:
    """The one spelling of an id."""
    return urlsafe_b64encode(raw).rstrip(b"=").decode()


def _marks(item_ids: Iterable[str]) -> list[int]:
    return [crc32(item_id.encode("utf-8", "surrogatepass")) & 0xFFFF for item_id in item_ids]


def _seal(body: bytes, secret: bytes) -> bytes:
    return blake2b(body, digest_size=SEAL, key=secret, person=b"recommendation").digest()
