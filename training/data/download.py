"""Public data sets by name: download (resumable; length and gzip checksum checked), then convert to a data folder.

Amazon Reviews 2023 (McAuley Lab, UC San Diego; research use): the official 5-core ratings and the item
metadata of one category.
"""

from __future__ import annotations

import csv
import errno
import gzip
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from serving.files import atomic_write, check_writable
from training.data.errors import DataError

AMAZON_2023 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/"
CHUNK = 1 << 20
TRIES = 6  # in a row without a new byte
TIMEOUT = 60.0  # seconds without an answer


def amazon_2023(name: str, folder: Path, base_url: str = AMAZON_2023, pause: float = 2.0) -> dict[str, int]:
    """Download one category (e.g. `Musical_Instruments`) and write it as a data folder.

    The originals stay in `folder/raw`, so a second run downloads nothing and an interrupted one resumes.
    Items are those of the interactions; the store is taken as brand. `pause`: seconds before the first
    retry, doubled each time. Returns counts: users, items, events, items without metadata.
    Raises DataError.
    """
    if not re.fullmatch(r"\w+", name):
        raise DataError(f"{name!r} is not a category; use a name such as Musical_Instruments")
    raw, base = Path(folder) / "raw", base_url.rstrip("/")
    ratings, metadata = raw / f"{name}.csv.gz", raw / f"meta_{name}.jsonl.gz"
    _check_folder(Path(folder), ratings)
    download(f"{base}/benchmark/5core/rating_only/{ratings.name}", ratings, pause)
    download(f"{base}/raw/meta_categories/{metadata.name}", metadata, pause)
    users, items, events = _convert_ratings(ratings, Path(folder) / "interactions.csv.gz")
    missing = _convert_metadata(metadata, items, Path(folder) / "items.jsonl.gz")
    return {"users": len(users), "items": len(items), "events": events, "items_without_metadata": missing}


def _check_folder(folder: Path, ratings: Path) -> None:
    """Raises DataError where the folder holds other data, StorageError where it cannot be written to."""
    check_writable(folder)
    theirs = sorted(path.name for path in folder.glob("*") if path.name.startswith(("interactions.", "items.")))
    if theirs and not ratings.exists():
        raise DataError(f"{folder} holds {theirs[0]}, which is of other data; choose another --out, or move it away.")


def download(url: str, path: Path, pause: float = 2.0) -> None:
    """Fetch a file to `path`, which appears only when complete; nothing happens where it exists.

    Bytes go to `path.part`; a further try, in this run or the next, asks for the rest only, and starts
    anew if the file has changed on the server. Raises DataError.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part, tag = path.with_name(path.name + ".part"), path.with_name(path.name + ".tag")
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _fetch_rest(url, part, tag):
                break
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # our part is longer than the file, which must have changed
                part.unlink(missing_ok=True)
            elif error.code in (401, 403, 404, 410):
                raise DataError(
                    f"{url} answered {error.code} {error.reason}; "
                    "check the name (as in Musical_Instruments) or --base-url"
                ) from error
            reason = f"{error.code} {error.reason}"
        except (http.client.HTTPException, OSError) as error:  # URLError and timeouts are OSErrors
            # URLError is an OSError too, but speaks of the network, not of the disk
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise DataError(
                    f"{part} cannot be written ({error}); make room and run the same command again"
                ) from error
            reason = str(error) or type(error).__name__
        progress = part.exists() and part.stat().st_size > before
        failures = 0 if progress else failures + 1
        if failures >= TRIES:
            raise DataError(f"{url} failed {TRIES} times ({reason}); run the same command later, it goes on from there")
        time.sleep(min(60.0, pause * 2 ** max(0, failures - 1)))
    os.replace(part, path)  # not by serving.files.atomic_write: what was received must survive a failure
    tag.unlink(missing_ok=True)


def _fetch_rest(url: str, part: Path, tag: Path) -> bool:
    """One request for what is missing of `part`; whether the file is complete then."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "streamrec", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if tag.exists():
            headers["If-Range"] = tag.read_text(encoding="utf-8")  # else the server sends the whole, changed, file
    try:
        response: Any = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return True  # it was complete, only the renaming was missing
        raise
    with response:
        rest = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range") or "")
        if response.status == 206 and rest and int(rest[1]) == have:
            total: int | None = int(rest[2])
        else:
            have, length = 0, response.headers.get("Content-Length")
            total = int(length) if length else None
        validator = response.headers.get("ETag") or ""
        if not validator or validator.startswith("W/"):  # a weak tag may not be used with ranges
            validator = response.headers.get("Last-Modified") or ""
        if validator:
            tag.write_text(validator, encoding="utf-8")
        bar = tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True, unit_divisor=1024)
        with bar, part.open("ab" if have else "wb") as file:
            while block := response.read(CHUNK):
                file.write(block)
                bar.update(len(block))
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
    return size == total if total is not None else True


def _convert_ratings(source: Path, target: Path) -> tuple[set[str], dict[str, None], int]:
    """user_id,parent_asin,rating,timestamp -> interactions; the users, the items and the number of events."""
    users: set[str] = set()
    items: dict[str, None] = {}
    events = 0
    with _original(source) as file, _replacing(target) as out:
        reader = csv.DictReader(file)
        if missing := {"user_id", "parent_asin", "timestamp"} - set(reader.fieldnames or ()):
            raise DataError(f"{source} has no column {', '.join(sorted(missing))}; this is not a 5-core ratings file")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("user_id", "item_id", "timestamp"))
        for row in reader:
            user, item = row["user_id"], row["parent_asin"]
            writer.writerow((user, item, row["timestamp"]))
            users.add(user)
            items[item] = None
            events += 1
    return users, items, events


def _convert_metadata(source: Path, items: dict[str, None], target: Path) -> int:
    """Metadata of the given items -> items; how many had none (they are written with their id alone)."""
    missing = dict(items)
    with _original(source) as file, _replacing(target) as out:
        for row, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                item = record["parent_asin"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise DataError(
                    f"{source}, row {row}: not item metadata ({error}); delete the file and run again"
                ) from None
            if item not in missing:
                continue
            del missing[item]
            kept = {
                "item_id": item,
                "title": record.get("title"),
                "brand": record.get("store"),
                "categories": record.get("categories"),
                "description": " ".join(record.get("description") or []) or None,
            }
            out.write(json.dumps(kept, ensure_ascii=False) + "\n")
        for item in missing:
            out.write(json.dumps({"item_id": item}) + "\n")
    return len(missing)


@contextmanager
def _original(path: Path) -> Iterator[TextIO]:
    """A downloaded file as text; damage found while reading ends in a DataError."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it and run the same command again") from error


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A gzipped text file that appears under its name only when complete."""
    with atomic_write(path) as partial, gzip.open(partial, "wt", encoding="utf-8", newline="") as file:
        yield file
