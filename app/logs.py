"""Logs: one JSON object a line on stderr, with the request's id. Code logs by the standard library; structlog renders.

User ids, item ids, bodies, keys and query strings are never logged. An exception may quote what a client sent, so
within a request it is told by its type and its place, and not by its message.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

import structlog
from pydantic import TypeAdapter

LINE = TypeAdapter(dict[str, Any])  # some times as fast as the standard library, and every request writes a line
RENDER = structlog.processors.JSONRenderer(
    serializer=lambda event, default: LINE.dump_json(event, fallback=default).decode()
)
# What every record has; and uvicorn's, which says everything twice.
STANDARD = {*vars(logging.makeLogRecord({})), "color_message"}


def set_up(level: str) -> None:
    """Sends everything at `level` and above to stderr, uvicorn's messages included."""
    handler = Together(sys.stderr)
    handler.setFormatter(formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # no line tells of them
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"


def flush() -> None:
    """Writes what is still to be written: whoever prints to stderr comes after what was logged before."""
    for handler in logging.getLogger().handlers:
        handler.flush()


class Together(logging.Handler):
    """Writes the lines of a tenth of a second at once: each write gives the interpreter to the engine's thread, and
    waiting for it to come back costs more than the line. A warning does not wait, nor does the end of the process."""

    SECONDS = 0.1

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream
        self._lines: list[str] = []
        self._some = threading.Event()
        threading.Thread(target=self._write_now_and_then, name="logs", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record) + "\n")
            if record.levelno >= logging.WARNING:
                self.flush()
            else:
                self._some.set()
        except Exception:  # a stream that fails must not fail who logs
            self.handleError(record)

    def flush(self) -> None:
        self.acquire()
        try:
            lines, self._lines = self._lines, []
            if lines:
                self.stream.write("".join(lines))
                self.stream.flush()
        finally:
            self.release()

    def _write_now_and_then(self) -> None:
        while self._some.wait():
            self._some.clear()
            time.sleep(self.SECONDS)
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more; the service goes on
                self.flush()


def formatter() -> logging.Formatter:
    """Time, level, logger, message, the request's id where there is one, and the fields of `extra={...}`."""
    return _Lines()


class _Lines(logging.Formatter):
    # By hand what structlog's own formatter does for records of the standard library: every request writes a line.

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "message": record.getMessage(),
            "time": datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **structlog.contextvars.get_contextvars(),
        }
        event |= {name: value for name, value in vars(record).items() if name not in STANDARD}
        if record.exc_info and record.exc_info[1] is not None:
            # uvicorn reports what a request raised after the request's id is gone.
            quotes_a_client = "request_id" in event or record.name.startswith("uvicorn")
            error = record.exc_info[1]
            event["exception"] = _places(error) if quotes_a_client else "".join(traceback.format_exception(error))
        return str(RENDER(None, "", event))


def _places(error: BaseException) -> str:
    """The traceback without messages, causes first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    told = ["".join(traceback.format_tb(each.__traceback__)) + type(each).__qualname__ for each in reversed(chain)]
    return "\n\n".join(told)
