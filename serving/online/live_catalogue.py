"""Makes entries of the log of changes true for the catalogue of one engine.

Every process applies the same entries in the same order, and what an entry leaves open, such as which semantic ID is
free, follows from those before it: so all processes end up with the same catalogue. An item's text is encoded by the
process that takes it in, with the codes in the entry; a process that serves another model encodes the text again.

All of it happens on the event loop, but for texts, which have a thread of their own, and the search's index, which
belongs to the engine's thread and changes between two batches, a few rows at a time.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from serving.errors import BundleError, NoSemanticId, RequestError, ServingError
from serving.items.changed import ChangedItems
from serving.items.code_space import CodeSpace
from serving.items.fields import MAX_FIELDS, Value
from serving.items.newcomers import LIKE, QuantizedItems
from serving.items.tokenizer import Tokenizer, item_text, load_tokenizer, rank_text
from serving.online.changelog import Entry, check_size
from serving.online.searching import EngineLike

log = logging.getLogger("streamrec.catalogue")

ROWS_AT_A_TIME = 16  # that change between two batches: a millisecond or two of the engine's time
LOW_ROOM = 0.25  # left of an index's room, when one with more is begun
NEAREST_CODES = 8  # of the tokenizer's last level, kept in an entry; others are tried by number
WINDOW_CHECK_S = 60.0  # the longest sleep between two looks at the clock, which may be set
PUT = {"item_id", "title", "brand", "categories", "description", "fields"}  # what an entry has that puts an item
FEW_EDGES = 1000  # which need no tidying

Window = tuple[float | None, float | None]  # when an item is available: from and until, in seconds since 1970
ALWAYS: Window = None, None


class LiveCatalogue:
    """between_batches: runs something on the engine's thread. changed: what the entries have changed so far."""

    def __init__(
        self,
        engine: EngineLike,
        between_batches: Callable[[Callable[[], Any]], Awaitable[Any]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine, self._between_batches, self._clock = engine, between_batches, clock
        self.bundle, self.catalogue = engine.bundle, engine.bundle.catalogue
        self._encoder = ThreadPoolExecutor(1, "texts")
        self._windows: dict[int, Window] = {}
        self.changed = ChangedItems(len(self.catalogue))
        self._edges: list[tuple[float, int]] = []  # when a row's window begins or ends: a heap
        self._edges_changed = asyncio.Event()
        self._refreshing = asyncio.Lock()
        self._growing: asyncio.Task[None] | None = None
        self._keeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to index the items' fields, and to keep the windows in which items are available."""
        self.catalogue.fields.index_early(len(self.catalogue))
        self._keeping = asyncio.create_task(self._keep_windows())

    async def close(self) -> None:
        tasks = [task for task in (self._growing, self._keeping) if task is not None]
        self._growing = self._keeping = None  # what they end in would hold on to the engine
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._encoder.shutdown(wait=False, cancel_futures=True)

    # An operator's process: what an entry says

    async def put_entries(self, items: Sequence[Entry]) -> list[Entry | ServingError]:
        """The entries that put items (`item_id`, `title`, `brand`, `categories`, `description`, `fields`,
        `available_from`, `available_until`), or why one cannot be put. Texts of new items are encoded here."""
        new = [item for item in items if self.catalogue.row(item["item_id"]) is None]
        encoded = dict(zip((item["item_id"] for item in new), await self._encoded(new), strict=True))

        def entry(item: Entry) -> Entry | ServingError:
            codes = encoded.get(item["item_id"], {})
            if isinstance(codes, ServingError):
                return codes
            made = {"do": "put", **item, **codes}
            try:
                self._check_fields(item)
                check_size(made)
            except RequestError as error:
                return error
            return made

        return [entry(item) for item in items]

    def _check_fields(self, item: Entry) -> None:
        known = self.catalogue.fields.names
        if new := fields_of(item).keys() - known:
            if len(known) + len(new) > MAX_FIELDS:
                raise RequestError(
                    f"All items together have at most {MAX_FIELDS} fields; use those there are.", "fields"
                )

    async def _encoded(self, items: Sequence[Entry]) -> list[Entry | ServingError]:
        """What an entry says of a new item's codes, or why there are none."""
        texts = [text_of(item) for item in items]
        with_text = [text for text in texts if text]
        try:
            loop = asyncio.get_running_loop()
            ranked = await loop.run_in_executor(self._encoder, self._rank, with_text) if with_text else []
        except ServingError as error:
            return [error] * len(items)
        codes = iter(ranked)
        no_text = NoSemanticId("A new item needs a text: a title, a brand, categories or a description.")
        return [{**next(codes), "codes_of": self.bundle.version} if text else no_text for text in texts]

    def _rank(self, texts: Sequence[str]) -> list[dict[str, list[int]]]:
        codes, last, latents = rank_text(self._tokenizer, texts)
        return [
            {"codes": first, "last_codes": nearest, "like": self._like(latent)}
            for first, nearest, latent in zip(codes.tolist(), last[:, :NEAREST_CODES].tolist(), latents, strict=True)
        ]

    def _like(self, latent: torch.Tensor) -> list[int]:
        return [] if self.bundle.neighbours is None else self._quantized.nearest(latent, LIKE)

    @cached_property
    def _quantized(self) -> QuantizedItems:
        assert self._tokenizer.codec is not None and self.bundle.neighbours is not None
        tokens = self.catalogue.tokens[: len(self.bundle.neighbours)]
        return QuantizedItems(self._tokenizer.codec, tokens - self.bundle.vocabulary.level_offsets)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if self.bundle.folder is None:
            raise NoSemanticId("This bundle has no folder, and so no tokenizer; a new item cannot get a semantic ID.")
        try:
            return load_tokenizer(self.bundle.folder / "tokenizer")
        except BundleError as error:
            raise NoSemanticId(f"A new item cannot get a semantic ID: {error}") from error

    # Every process: what an entry does

    async def apply(self, entries: Sequence[Entry]) -> list[int | Exception]:
        """Applies entries: the row of each item, or why it could not be put; how many rows a named subset gained or
        lost. Once it returns, searches know of it.

        An entry that cannot be applied takes no other with it: processes read the log in pieces of different sizes."""
        if any(self._is_new(entry) for entry in entries):
            await asyncio.to_thread(lambda: self._space)  # sorts the IDs of all items, once
        encoded = await self._encoded_ahead(entries)
        results: list[int | Exception] = []
        changed: list[int] = []
        for number, entry in enumerate(entries):
            try:
                if number not in encoded and self._lacks_codes(entry):  # one before it was refused
                    [encoded[number]] = await self._encoded([entry])
                rows = self._apply(entry, encoded.get(number, entry))
            except ServingError as error:
                results.append(error)
            except Exception as error:
                log.exception("a change of the catalogue could not be applied")
                results.append(error)
            else:
                changed += rows
                results.append(len(rows) if entry["do"] == "name" else rows[0])
        await self._refresh(changed)
        return results

    def _is_new(self, entry: Entry) -> bool:
        return entry.get("do") == "put" and entry.keys() >= PUT and self.catalogue.row(entry["item_id"]) is None

    def _lacks_codes(self, entry: Entry) -> bool:
        return self._is_new(entry) and entry.get("codes_of") != self.bundle.version

    def _apply(self, entry: Entry, codes: Entry | ServingError) -> list[int]:
        """Returns the rows that have changed. codes: of an item that is new. Raises ServingError."""
        match entry.get("do"):
            case "name":
                return self._name(entry)
            case "put":
                return [self._put(entry, codes)]
            case "delete":
                return [self._delete(entry)]
            case other:
                raise ServingError(
                    f"A change of items of kind {str(other)[:64]!r} was made by a newer version; update this service."
                )

    def _name(self, entry: Entry) -> list[int]:
        """Names a subset. Returns the rows that are new in it, or no longer in it."""
        if "filter" in entry:
            return self.catalogue.name_subset(entry["name"], entry["filter"])
        rows = self.catalogue.rows(entry["items"])
        return self.catalogue.name_subset(entry["name"], [row for row in rows if row is not None])

    async def _encoded_ahead(self, entries: Sequence[Entry]) -> dict[int, Entry | ServingError]:
        """The codes of new items whose entries have those of another model, by the entry's number: all at once, which
        is faster. Of several entries of one item the first adds it, and what the others say does not move it."""
        first: dict[str, int] = {}
        for number, entry in enumerate(entries):
            if self._is_new(entry):
                first.setdefault(entry["item_id"], number)
        wanted = [number for number in first.values() if self._lacks_codes(entries[number])]
        return dict(zip(wanted, await self._encoded([entries[number] for number in wanted]), strict=True))

    def _put(self, entry: Entry, codes: Entry | ServingError) -> int:
        row = self.catalogue.row(entry["item_id"])
        if row is not None:
            self.catalogue.describe(row, entry["title"], entry["categories"], fields_of(entry))
        elif isinstance(codes, ServingError):
            raise codes
        else:
            row = self._add(entry, codes)
        self._set_window(row, entry["available_from"], entry["available_until"])
        return self._changed(row, entry)

    def _delete(self, entry: Entry) -> int:
        row = self.catalogue.row(entry["item_id"])
        if row is None:
            raise RequestError("There is no item with this id; name one that the catalogue has.", "item_id")
        return self._changed(row, entry)

    def _changed(self, row: int, entry: Entry) -> int:
        self.changed.note(row, entry.get("at"), is_removed=entry["do"] == "delete")
        self.catalogue.mark_removed(row, self.changed.is_removed(row))
        self.catalogue.list_item(row, self._is_available(row))
        return row

    def _add(self, entry: Entry, codes: Entry) -> int:
        taken = self._space.take(codes["codes"], codes["last_codes"])
        tokens = self.bundle.vocabulary.tokens_of(np.array([taken]))[0].tolist()
        row = self.catalogue.add(entry["item_id"], tokens, entry["title"], entry["categories"], fields_of(entry))
        if self.bundle.neighbours is not None and codes.get("like"):  # entries of earlier versions have none
            self.bundle.neighbours.newcomers.add(row, codes["like"])
        return row

    @cached_property
    def _space(self) -> CodeSpace:
        vocabulary = self.bundle.vocabulary
        return CodeSpace(self.catalogue.tokens - vocabulary.level_offsets, vocabulary.codebook_sizes)

    async def _refresh(self, rows: Sequence[int]) -> None:
        """Brings searches in line with these rows, and sees to room for more."""
        async with self._refreshing:
            left_out: list[int] = []
            for begin in range(0, len(rows), ROWS_AT_A_TIME):
                chunk = rows[begin : begin + ROWS_AT_A_TIME]
                left_out += await self._between_batches(partial(self._engine.refresh, chunk))
            while left_out:
                await self._grow()
                left_out = await self._between_batches(partial(self._engine.refresh, left_out))
            self.catalogue.settle(rows)
            if rows and self._engine.room < LOW_ROOM:
                self._grow()

    def _grow(self) -> asyncio.Task[None]:
        """Begins an index with more room, unless one is being built; searches go on with the present one meanwhile."""
        if self._growing is None or self._growing.done():
            self._growing = asyncio.create_task(self._adopt_with_room())
        return self._growing

    async def _adopt_with_room(self) -> None:
        started = time.monotonic()
        index = await asyncio.to_thread(self._engine.with_room)
        await self._between_batches(partial(self._engine.adopt, index))
        log.info("the catalogue has room again", extra={"seconds": round(time.monotonic() - started, 3)})

    # When an item is available

    def window(self, row: int) -> Window:
        """From and until when an item may be recommended, in seconds since 1970."""
        return self._windows.get(row, ALWAYS)

    def _set_window(self, row: int, begin: float | None, end: float | None) -> None:
        if (begin, end) == self.window(row):
            return
        self._windows.pop(row, None)
        if (begin, end) != ALWAYS:
            self._windows[row] = begin, end
        for edge in (begin, end):
            if edge is not None:
                heapq.heappush(self._edges, (edge, row))
        if len(self._edges) > FEW_EDGES + 4 * len(self._windows):  # mostly of windows that have changed since
            self._edges = [(edge, at) for at, window in self._windows.items() for edge in window if edge is not None]
            heapq.heapify(self._edges)
        self._edges_changed.set()

    def _is_available(self, row: int) -> bool:
        (begin, end), now = self.window(row), self._clock()
        return not self.changed.is_removed(row) and (begin is None or begin <= now) and (end is None or now < end)

    async def _keep_windows(self) -> None:
        """Lists and unlists items when their time has come, until it is cancelled."""
        unfinished: list[int] = []
        while True:
            due: list[int] = []
            while self._edges and self._edges[0][0] <= self._clock():
                due.append(heapq.heappop(self._edges)[1])
            changed = [row for row in dict.fromkeys(due) if self.catalogue.listed[row] != self._is_available(row)]
            for row in changed:
                self.catalogue.list_item(row, self._is_available(row))
            try:
                await self._refresh(unfinished := [*unfinished, *changed])
                unfinished = []
            except Exception:  # such as of memory; the windows of other items are kept all the same
                log.exception("items whose time has come could not be brought into the search, and are tried again")
            wait = min(self._edges[0][0] - self._clock(), WINDOW_CHECK_S) if self._edges else WINDOW_CHECK_S
            self._edges_changed.clear()
            try:
                async with asyncio.timeout(max(0.0, wait)):
                    await self._edges_changed.wait()
            except TimeoutError:
                pass


def fields_of(item: Entry) -> dict[str, Value]:
    """What filters may ask of an item: its fields, and its brand as one of them."""
    return item["fields"] if item["brand"] is None else {"brand": item["brand"], **item["fields"]}


def text_of(item: Entry) -> str:
    """An item's text, as training embeds it."""
    return item_text(item["title"], item["brand"], item["categories"], item["description"])
