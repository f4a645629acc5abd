"""Downloading from a server on this machine: whole, interrupted, changed, missing, damaged."""

from __future__ import annotations

import argparse
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.tools import always_full
from training.data.cli import add_data_commands
from training.data.download import TRIES, amazon_2023, download
from training.data.errors import DataError
from training.data.prepare import leave_one_out
from training.data.read import read_data

RATINGS = "/benchmark/5core/rating_only/Small_Things.csv.gz"
METADATA = "/raw/meta_categories/meta_Small_Things.jsonl.gz"


class FileServer(ThreadingHTTPServer):
    """Files in memory, ranges with If-Range, and faults to order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.etag = '"v1"'
        self.cut_after: list[int] = []  # bytes after which the next answers break off
        self.failing = 0  # answers 503 so many times
        self.ranges = True
        self.requests: list[tuple[str, str | None, int]] = []  # path, Range, status

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, body = self.server, self.server.files.get(self.path)
        asked = self.headers.get("Range")
        status, start = 200, 0
        if server.failing:
            server.failing, status = server.failing - 1, 503
        elif body is None:
            status = 404
        elif asked and server.ranges and self.headers.get("If-Range", server.etag) == server.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(body) else 416
        server.requests.append((self.path, asked, status))
        self.send_response(status)
        if body is None or status == 503:
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if status == 416:
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        self.wfile.write(rest[: server.cut_after.pop(0)] if server.cut_after else rest)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def official_files() -> dict[str, bytes]:
    rows = ["user_id,parent_asin,rating,timestamp"]
    for user in ("AG2", "AE1"):
        rows += [
            f"{user},B0{item},{5.0 - item % 2},{1454676557123 + 1000 * time}" for time, item in enumerate((3, 1, 2, 7))
        ]
    metadata = [
        {"title": "Tin Whistle", "store": "Clarke", "categories": ["Music", "Wind"], "parent_asin": "B01",
         "main_category": "x", "description": ["A whistle.", "In D."], "price": None, "details": {"Color": "black"}},
        {"title": "Nobody's", "store": None, "categories": [], "description": [], "parent_asin": "B099"},
        {"title": "Capo", "store": None, "categories": [], "description": [], "parent_asin": "B02"},
        {"title": "Strap", "store": "Ernie", "categories": None, "description": None, "parent_asin": "B03"},
    ]  # fmt: skip
    lines = "".join(json.dumps(record) + "\n" for record in metadata)
    return {RATINGS: gzip.compress("\n".join(rows).encode()), METADATA: gzip.compress(lines.encode())}


def test_a_category_becomes_a_data_folder(server, tmp_path):
    server.files = official_files()
    counts = amazon_2023("Small_Things", tmp_path, server.url)
    assert counts == {"users": 2, "items": 4, "events": 8, "items_without_metadata": 1}
    data = read_data(tmp_path)
    assert data.user_ids == ["AG2", "AE1"]
    assert data.items.item_ids == ["B01", "B02", "B03", "B07"]  # only those with events
    assert data.items.titles == ["Tin Whistle", "Capo", "Strap", None]
    assert data.items.brands == ["Clarke", None, "Ernie", None]
    assert data.items.categories == [["Music", "Wind"], [], [], []]
    assert data.items.descriptions == ["A whistle. In D.", None, None, None]
    assert data.times[:4].tolist() == [1454676557123 + 1000 * step for step in range(4)]
    assert [data.items.item_ids[item] for item in leave_one_out(data).test_target] == ["B07", "B07"]
    asked = len(server.requests)
    assert amazon_2023("Small_Things", tmp_path, server.url) == counts
    assert len(server.requests) == asked  # nothing is downloaded twice
    assert not list(tmp_path.rglob("*.part")) and not list(tmp_path.rglob("*.tag"))


def test_an_interrupted_download_asks_for_the_rest(server, tmp_path):
    body = server.files["/file"] = bytes(range(256)) * 40
    server.cut_after = [1000, 2000]
    download(f"{server.url}/file", tmp_path / "file", pause=0)
    assert (tmp_path / "file").read_bytes() == body
    assert server.requests == [("/file", None, 200), ("/file", "bytes=1000-", 206), ("/file", "bytes=3000-", 206)]


def test_a_second_run_resumes_the_download(server, tmp_path):
    body = server.files["/file"] = bytes(range(256)) * 40
    server.cut_after = [1000] + [0] * TRIES
    with pytest.raises(DataError, match="run the same command later"):
        download(f"{server.url}/file", tmp_path / "file", pause=0)
    assert not (tmp_path / "file").exists() and (tmp_path / "file.part").stat().st_size == 1000
    server.requests.clear()
    download(f"{server.url}/file", tmp_path / "file", pause=0)
    assert (tmp_path / "file").read_bytes() == body
    assert server.requests == [("/file", "bytes=1000-", 206)]


def test_a_file_that_changed_meanwhile_is_downloaded_again(server, tmp_path):
    server.files["/file"], server.cut_after = b"old" * 1000, [1000] + [0] * TRIES
    with pytest.raises(DataError):
        download(f"{server.url}/file", tmp_path / "file", pause=0)
    server.files["/file"], server.etag = b"new" * 1000, '"v2"'
    download(f"{server.url}/file", tmp_path / "file", pause=0)
    assert (tmp_path / "file").read_bytes() == b"new" * 1000


@pytest.mark.parametrize("left", [b"0123456789", b"0123456789 and more", b"01234"])
@pytest.mark.parametrize("ranges", [True, False])
def test_the_file_is_right_whatever_was_left_of_an_earlier_download(server, tmp_path, left, ranges):
    server.files["/file"], server.ranges = b"0123456789", ranges
    (tmp_path / "file.part").write_bytes(left)
    download(f"{server.url}/file", tmp_path / "file", pause=0)
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_busy_server_is_retried(server, tmp_path):
    server.files["/file"], server.failing = b"x", 2
    download(f"{server.url}/file", tmp_path / "file", pause=0)
    assert [status for _, _, status in server.requests] == [503, 503, 200]
    server.failing = 100
    with pytest.raises(DataError, match=r"failed 6 times \(503"):
        download(f"{server.url}/file", tmp_path / "other", pause=0)


def test_permanent_errors_end_in_one_sentence(server, tmp_path):
    with pytest.raises(DataError, match=r"answered 404 .*check the name") as error:
        amazon_2023("Small_Things", tmp_path, server.url)
    assert "\n" not in str(error.value) and len(server.requests) == 1  # not tried again
    with pytest.raises(DataError, match="not a category"):
        amazon_2023("../etc", tmp_path, server.url)
    with pytest.raises(DataError, match="failed 6 times"):
        amazon_2023("Small_Things", tmp_path, "http://127.0.0.1:9", pause=0)


def test_a_full_disk_is_not_retried(server, tmp_path):
    server.files["/file"] = b"x" * 1_000_000
    (tmp_path / "file.part").symlink_to(always_full())
    with pytest.raises(DataError, match=r"file.part cannot be written .*make room"):
        download(f"{server.url}/file", tmp_path / "file")
    assert len(server.requests) == 1


def test_damaged_files_are_named(server, tmp_path):
    server.files = official_files()
    server.files[METADATA] = server.files[METADATA][:-20]
    with pytest.raises(DataError, match=r"meta_Small_Things.jsonl.gz is damaged .*delete it"):
        amazon_2023("Small_Things", tmp_path / "cut", server.url)
    assert not (tmp_path / "cut" / "items.jsonl.gz").exists()
    server.files = official_files() | {RATINGS: gzip.compress(b"user,item\n1,2\n")}
    with pytest.raises(DataError, match="has no column parent_asin, timestamp, user_id"):
        amazon_2023("Small_Things", tmp_path / "columns", server.url)
    server.files = official_files() | {METADATA: gzip.compress(b'{"title": "no id"}\n')}
    with pytest.raises(DataError, match=r"row 1: not item metadata"):
        amazon_2023("Small_Things", tmp_path / "records", server.url)


def test_the_commands(server, tmp_path, capsys):
    server.files = official_files()
    parser = argparse.ArgumentParser()
    add_data_commands(parser.add_subparsers(required=True))

    def run(*words: str) -> str:
        args = parser.parse_args(["data", *words])
        args.run(args)
        return capsys.readouterr().out

    printed = run("amazon-2023", "Small_Things", "--out", str(tmp_path / "amazon"), "--base-url", server.url + "/")
    assert "1 items have no metadata" in printed
    printed = run("shop", "--users", "50", "--items", "32", "--seed", "4", "--out", str(tmp_path / "shop"))
    truth = json.loads((tmp_path / "shop" / "truth.json").read_text())
    assert f"recall@10 {truth['best']['recall@10']:.4f}" in printed
    printed = run("stats", str(tmp_path / "shop"), "--split")
    assert "50" in printed and "test targets" in printed
    assert "test targets" in run("stats", str(tmp_path / "shop"), "--split", "chronological")
    assert "test targets" not in run("stats", str(tmp_path / "shop"))
    assert Path(tmp_path / "shop" / "items.jsonl").exists()


def test_other_data_in_the_folder_are_not_replaced(server, tmp_path):
    server.files = official_files()
    (tmp_path / "interactions.csv.gz").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"holds interactions\.csv\.gz, which is of other data"):
        amazon_2023("Small_Things", tmp_path, server.url)
    assert (tmp_path / "interactions.csv.gz").read_bytes() == b"mine" and not server.requests
