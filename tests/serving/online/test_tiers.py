"""What is kept of encoder states and how: values that cannot be mistaken, and a memory that stays within its bounds."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.online.tiers import COVERED, HEADER, MAGIC, MemoryTier, _checksum, history_digest, pack, unpack
from serving.types import EncoderState, StateDtype

HISTORY = (3, 1, 4)
DTYPES: tuple[StateDtype, ...] = ("float32", "float16")


def state(seed: int = 0, rows: int = 6, width: int = 8, dtype: StateDtype = "float32") -> EncoderState:
    return EncoderState(np.random.default_rng(seed).normal(size=(rows, width)).astype(dtype))


def memory(
    users: int = 10, nbytes: int = 1 << 20, ttl: float = 60, clock: Callable[[], float] = time.monotonic
) -> MemoryTier:
    return MemoryTier(users, nbytes, ttl, clock)


# Values


@given(rows=st.integers(1, 20), width=st.integers(1, 20), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_a_value_comes_back_bit_for_bit(rows: int, width: int, seed: int, dtype: StateDtype) -> None:
    made, digest = state(seed, rows, width, dtype), history_digest("v", HISTORY)
    found = unpack(pack(made, digest), digest, dtype)
    assert isinstance(found, EncoderState) and found.nbytes == made.nbytes
    np.testing.assert_array_equal(found.hidden, made.hidden)


def test_numbers_of_another_dtype_are_not_taken() -> None:
    digest = history_digest("v", HISTORY)
    assert unpack(pack(state(dtype="float16"), digest), digest, "float32") == "stale"
    assert unpack(pack(state(), digest), digest, "float16") == "stale"


@given(st.data())
def test_any_damaged_value_is_invalid(data: st.DataObject) -> None:
    digest = history_digest("v", HISTORY)
    value = bytearray(pack(state(rows=2, width=3), digest))
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(value) - 1))
        value[place] ^= data.draw(st.integers(1, 255))
    else:
        value = value[: data.draw(st.integers(0, len(value) - 1))]
    assert unpack(bytes(value), digest) == "invalid"


@given(st.one_of(st.binary(max_size=200), st.none(), st.text(max_size=9)))
def test_rubbish_is_invalid(value: object) -> None:
    assert unpack(value, history_digest("v", HISTORY)) == "invalid"


@pytest.mark.parametrize(
    ("rows", "width", "magic"), [(0, 8, None), (4, 0, None), (0, 0, None), (5, 8, None), (4, 8, b"SRE9")]
)
def test_a_header_that_does_not_fit_is_invalid_even_with_the_right_checksum(
    rows: int, width: int, magic: bytes | None
) -> None:
    """As another version of the service may write it."""
    digest = history_digest("v", HISTORY)
    body = b"" if rows * width == 0 else np.zeros((4, 8), "<f4").tobytes()
    header = HEADER.pack(magic or MAGIC["float32"], digest, rows, width, b"")[:COVERED]
    assert unpack(header + _checksum(header, body, b"") + body, digest) == "invalid"


def test_a_value_made_without_the_secret_is_invalid() -> None:
    digest = history_digest("v", HISTORY)
    for secret, other in ((b"secret", b""), (b"", b"secret"), (b"secret", b"another")):
        value = pack(state(), digest, secret)
        assert isinstance(unpack(value, digest, secret=secret), EncoderState)
        assert unpack(value, digest, secret=other) == "invalid"


def test_another_history_or_version_is_another_digest() -> None:
    digests = {
        history_digest(*args) for args in [("v", (1, 2)), ("v", (2, 1)), ("v", (1,)), ("w", (1, 2)), ("v", (12,))]
    }
    assert len(digests) == 5
    assert unpack(pack(state(), history_digest("v", (1, 2))), history_digest("v", (2, 1))) == "stale"


# Memory


def test_memory_is_bounded_by_users_the_oldest_go_first() -> None:
    tier = memory(users=2)
    tier.put("a", b"h", state())
    tier.put("b", b"h", state())
    tier.get("a", b"h")
    tier.put("c", b"h", state())
    assert "a" in tier and "b" not in tier and "c" in tier


def test_memory_is_bounded_by_bytes_the_oldest_go_first_and_it_counts_them_right() -> None:
    one = state().nbytes
    tier = memory(nbytes=3 * one)
    for i in range(10):
        tier.put(f"u{i}", b"h", state())
        tier.put(f"u{i}", b"other", state())
        assert tier.nbytes == one * len(tier) <= 3 * one
    assert [user for user in (f"u{i}" for i in range(10)) if user in tier] == ["u7", "u8", "u9"]
    tier.put("wide", b"h", state(rows=1000))
    assert len(tier) == 0 and tier.nbytes == 0


def test_memory_forgets_with_time() -> None:
    now = [0.0]
    tier = memory(ttl=10, clock=lambda: now[0])
    tier.put("u", b"h", state())
    now[0] = 9
    assert isinstance(tier.get("u", b"h"), EncoderState)
    now[0] = 11
    assert tier.get("u", b"h") == "stale"
