"""How log lines reach their stream: in order, with the request's id, none lost at exit, and never blocking."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from app import logs
from tests.waiting import DEADLINE


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Stands in for stderr. The loggers' own set-up comes back after the test."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.set_up("info")
    yield stream
    root.handlers[:], root.level = handlers, level


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    logs.flush()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_lines_keep_their_order_and_fields(stream: io.StringIO) -> None:
    for number in range(50):
        logging.getLogger("streamrec.test").info("line %d", number, extra={"ms": number / 2})
    logging.getLogger("streamrec.test").debug("below the level")
    found = lines(stream)
    assert [line["message"] for line in found] == [f"line {number}" for number in range(50)]
    assert found[3]["ms"] == 1.5 and found[3]["level"] == "info" and found[3]["logger"] == "streamrec.test"
    assert found[3]["time"].endswith("Z") and found[0]["time"] <= found[-1]["time"]


def test_a_line_shows_what_was_logged_and_not_what_became_of_it(stream: io.StringIO) -> None:
    waiting = ["one"]
    logging.getLogger("streamrec.test").info("waiting: %s", waiting)
    waiting.clear()
    assert [line["message"] for line in lines(stream)] == ["waiting: ['one']"]


def test_a_line_has_the_id_of_the_request_that_logged_it(stream: io.StringIO) -> None:
    for name in ("one", "two"):
        context = logs.current_request.set(name)
        logging.getLogger("streamrec.test").info("inside")
        logs.current_request.reset(context)
    logging.getLogger("streamrec.test").info("outside")
    assert [line.get("request_id") for line in lines(stream)] == ["one", "two", None]


@pytest.mark.parametrize("logger", ["streamrec.test", "uvicorn.error"])
def test_an_exception_of_a_request_is_logged_without_its_message(stream: io.StringIO, logger: str) -> None:
    secret = "".join(["what ", "a client sent"])  # tracebacks quote the source

    def fail() -> None:
        try:
            raise KeyError(secret)
        except KeyError as error:
            raise ValueError(secret) from error

    context = logs.current_request.set(None if logger.startswith("uvicorn") else "one")
    try:
        fail()
    except ValueError:
        logging.getLogger(logger).exception("unexpected error")
    logs.current_request.reset(context)
    (line,) = lines(stream)
    assert secret not in json.dumps(line)
    assert line["exception"].index("KeyError") < line["exception"].rindex("ValueError")
    assert "in fail" in line["exception"]


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError("not to be shown")


def test_a_field_that_json_does_not_know_is_shown_and_a_line_that_cannot_be_made_stops_nobody(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # it would show the second one to whoever runs the tests
    logger = logging.getLogger("streamrec.test")
    logger.info("known", extra={"value": slice(2)})
    logger.info("half a pair", extra={"value": "\ud800"})
    logger.info("no representation", extra={"value": Unprintable()})
    logger.info("%d is no number", "x")
    logger.info("after")
    assert [(line["message"], line.get("value")) for line in lines(stream)] == [
        ("known", "slice(None, 2, None)"),
        ("half a pair", "\ud800"),
        ("after", None),
    ]


def test_an_exception_outside_requests_is_logged_whole(stream: io.StringIO) -> None:
    try:
        raise ValueError("what went wrong")
    except ValueError:
        logging.getLogger("streamrec.test").exception("unexpected error")
    assert "ValueError: what went wrong" in lines(stream)[0]["exception"]


def test_uvicorns_messages_are_lines_like_all_others(stream: io.StringIO) -> None:
    logging.getLogger("uvicorn.error").info("Started", extra={"color_message": "\x1b[36mStarted"})
    logging.getLogger("uvicorn.access").info("GET /users/secret")
    assert [(line["message"], "color_message" in line) for line in lines(stream)] == [("Started", False)]


def test_the_end_of_the_process_writes_what_is_left() -> None:
    code = "import logging; from app import logs; logs.set_up('info'); [logging.info('%d', n) for n in range(2000)]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE, check=True)
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == [str(n) for n in range(2000)]


def test_a_reader_that_stops_blocks_nobody_and_the_loss_is_logged() -> None:
    handler = logs.NeverBlockingHandler(3)
    logger = logging.Logger("streamrec.test", logging.INFO)
    logger.addHandler(handler)
    for number in range(10):
        logger.info("line %d", number)  # would never return if it blocked
    assert handler.dropped == 7
    assert [handler.queue.get().getMessage() for _ in range(3)] == ["line 0", "line 1", "line 2"]
    logger.info("after")
    report, after = (json.loads(logs.formatter().format(handler.queue.get())) for _ in range(2))
    assert report["level"] == "warning" and report["message"].startswith("7 log lines were dropped")
    assert report["dropped"] == 7 and after["message"] == "after" and handler.dropped == 0


class FullDisk(io.StringIO):
    full = True

    def write(self, text: str) -> int:
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_lines_that_cannot_be_written_are_counted_and_reported_once_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk()
    monkeypatch.setattr(sys, "stderr", disk)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    counted: list[int] = []
    try:
        logs.set_up("info")
        logs.count_dropped(lambda: counted.append(1))
        for number in range(5):
            logging.getLogger("streamrec.test").info("line %d", number)
            logs.flush()
        disk.full = False
        logging.getLogger("streamrec.test").info("after")
        first, second = lines(disk)
    finally:
        root.handlers[:], root.level = handlers, level
    assert first["message"].startswith("5 log lines were dropped") and second["message"] == "after"
    assert len(counted) == 5  # each once, the line that could not report them not at all


def test_a_reader_that_has_stopped_does_not_keep_the_process_from_ending() -> None:
    """More than a pipe holds is logged and nobody reads: the end comes all the same, and so does the exit status."""
    code = "import logging, sys; from app import logs; logs.set_up('info'); logs.FLUSH_TIMEOUT_S = 0.2; "
    code += "[logging.info('x' * 100) for _ in range(15000)]; print('logged', flush=True); sys.exit(3)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        assert process.wait(DEADLINE) == 3
        assert process.stdout.read() == b"logged\n"


def test_a_non_blocking_stderr_loses_nothing() -> None:
    code = "import logging, os; from app import logs; os.set_blocking(2, False); logs.set_up('info'); "
    code += "[logging.info('%d', n) for n in range(3000)]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE, check=True)
    assert [json.loads(line)["message"] for line in done.stderr.splitlines()] == [str(n) for n in range(3000)]
