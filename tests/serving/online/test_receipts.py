"""The id of a recommendation: what was sealed is read back, and nothing else is."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import RequestError
from serving.online import receipts

SECRET = b"a secret"
ITEMS = [f"item {number}" for number in range(10)]


def issued(secret: bytes = SECRET, user: str | None = "u1", items: list[str] = ITEMS) -> str:
    return receipts.issue("demo-0123456789", "model", 4, user, items, secret)


def test_what_was_answered_is_read_back() -> None:
    before = int(time.time())
    written = issued()
    assert re.fullmatch(r"[A-Za-z0-9_-]{60,100}", written)
    read = receipts.read(written, SECRET)
    assert (read.version, read.source, read.steps) == ("demo-0123456789", "model", 4)
    assert before <= read.at <= time.time()
    assert read.user == receipts.user_key("u1", SECRET) != receipts.user_key("u1")
    assert [read.position(item) for item in ITEMS] == list(range(1, 11))
    assert read.position("another") is None
    assert receipts.read(issued(user=None), SECRET).user == ""
    assert receipts.read(issued(items=[]), SECRET).items == ()


def test_a_page_knows_what_the_pages_before_had() -> None:
    pages = [ITEMS[:4], ITEMS[4:6], ITEMS[6:]]
    shown: tuple[int, ...] = ()
    for page in pages:
        read = receipts.read(receipts.issue("demo", "model", 0, "u1", page, SECRET, shown), SECRET)
        assert read.earlier == shown and len(read.items) == len(page)
        shown = (*read.earlier, *read.items)
        assert receipts.unshown(ITEMS, shown) == list(range(len(shown), 10))
    assert [read.position(item) for item in pages[-1]] == [7, 8, 9, 10] and read.position(ITEMS[0]) is None
    assert receipts.unshown(ITEMS, ()) == list(range(10))


def test_an_item_that_happens_to_have_the_mark_of_another_is_not_lost() -> None:
    names = [str(number) for number in range(10_000)]
    marks = receipts.read(receipts.issue("demo", "model", 0, None, names, SECRET), SECRET).items
    second = next(index for index, mark in enumerate(marks) if mark in marks[:index])
    first, twin = names[marks.index(marks[second])], names[second]
    shown = receipts.read(receipts.issue("demo", "model", 0, None, [first], SECRET), SECRET).items
    assert receipts.unshown([first, "x", twin], shown) == [1, 2]
    assert receipts.unshown([first, "x", twin], (*shown, *shown)) == [1]


def test_answers_alike_have_different_ids() -> None:
    assert len({issued() for _ in range(100)}) == 100


def test_no_letter_can_be_changed_and_no_other_secret_reads_it() -> None:
    written = issued()
    for secret in (b"", b"another"):
        with pytest.raises(RequestError):
            receipts.read(written, secret)
    for at, letter in enumerate(written[:-1]):  # of the last one some bits may mean nothing
        for other in "A_":
            if letter != other:
                with pytest.raises(RequestError) as caught:
                    receipts.read(written[:at] + other + written[at + 1 :], SECRET)
                assert caught.value.field == "recommendation_id"


def test_an_id_has_one_spelling() -> None:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for items in (ITEMS[:1], ITEMS[:2], ITEMS[:3]):  # of its last letter 0, 2 or 4 bits mean nothing
        written = issued(items=items)
        last_letters = [written[:-1] + letter for letter in letters if letter != written[-1]]
        added = [written + more for more in ("=", "==", "===", " ", "\n", "!")]
        between = [written[:9] + more + written[9:] for more in ("=", " ", ".", "\0")]
        for spelling in (*last_letters, *added, *between, " " + written):
            with pytest.raises(RequestError, match=re.escape(receipts.INVALID)):
                receipts.read(spelling, SECRET)
        standard = written.replace("-", "+").replace("_", "/")
        if standard != written:
            with pytest.raises(RequestError):
                receipts.read(standard, SECRET)


@given(st.text(max_size=200))
def test_whatever_is_sent_is_refused_in_the_same_words(sent: str) -> None:
    with pytest.raises(RequestError, match=re.escape(receipts.INVALID)):
        receipts.read(sent, SECRET)


@given(st.text(max_size=300), st.text(min_size=1), st.lists(st.text(min_size=1), max_size=30, unique=True))
def test_any_version_user_and_items(version: str, user: str, items: list[str]) -> None:
    version = version.encode("utf-8", "replace").decode()
    written = receipts.issue(version, "popularity", 0, user, items, SECRET)
    read = receipts.read(written, SECRET)
    assert read.source == "popularity" and version.startswith(read.version)
    assert read.user == receipts.user_key(user, SECRET)
    assert all(read.position(item) for item in items)
