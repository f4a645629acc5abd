"""Logs: one JSON object per line on stderr, from the loggers of the standard library.

User ids, item ids, bodies, keys and query strings are never logged. The message of an exception may quote what a client
sent, so within a request only its type and traceback are logged.

There is a line for every request, so what it costs counts: `JsonFormatter` copies no record, as structlog's does twice,
and the thread that writes wakes at most once in PAUSE_S and renders the lines of requests, many at a time.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from pydantic_core import PydanticSerializationError, to_json

MAX_WAITING_LINES = 10_000
PAUSE_S = 0.1  # between the rounds of the thread that writes: each takes core and caches from the event loop
FLUSH_TIMEOUT_S = 2.0  # at the end of the process; a reader that has stopped must not keep it from ending

current_request: ContextVar[str | None] = ContextVar("current_request", default=None)  # its id


class Line(NamedTuple):
    """what: its text, or what is rendered when it is written. reports: how many dropped lines it tells of, 0 for an
    ordinary line."""

    what: str | Entry
    reports: int = 0


def set_up(level: str) -> None:
    """Logs everything at `level` and above to stderr, uvicorn's messages included."""
    # What no line shows need not be found out for each; the module documents these switches for that.
    logging.logThreads = logging.logMultiprocessing = logging.logProcesses = False
    logging._srcfile = None
    handler = NeverBlockingHandler()
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
    threading.Thread(target=write_lines, args=(handler, _stderr()), name="log", daemon=True).start()
    atexit.register(flush)  # the writer is a daemon thread: what nobody reads by then is lost, and holds up nothing


def flush() -> None:
    """Returns once every line logged before has been written, or after FLUSH_TIMEOUT_S."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, NeverBlockingHandler):
            handler.wait_until_written()


def count_dropped(count: Callable[[], None]) -> None:
    """From now on `count` is called for every line that is lost."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, NeverBlockingHandler):
            handler.count = count


# What a record has that knows nothing of where it comes from; formatters of others read it.
NOWHERE = vars(logging.makeLogRecord(dict.fromkeys(("process", "processName", "thread", "threadName"))))


class Entry(logging.LogRecord):
    """A line of a message and fields that do not change, without who logged it and where: to find that out costs more
    than the rest of the line, and there is one for every request."""

    def __init__(self, logger: str, level: int, message: str, fields: Mapping[str, object]) -> None:
        self.__dict__ = {**NOWHERE, **fields}
        self.fields, self.request = fields, current_request.get()
        self.name, self.levelno, self.levelname = logger, level, logging.getLevelName(level)
        self.msg, self.created = message, time.time()
        self.msecs = self.created % 1 * 1000


class NeverBlockingHandler(logging.Handler):
    """Queues lines for the thread that writes them. While nobody reads stderr and the queue is full, lines are dropped;
    the next line that fits is preceded by one that says how many were lost. `count` is called for each."""

    def __init__(self, size: int = MAX_WAITING_LINES, count: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.lines: queue.SimpleQueue[Line] = queue.SimpleQueue()  # the one without locks in Python
        self.size, self.count = size, count
        self.queued = self.written = 0  # lines, since the start; those that were lost after all count as written
        self.dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # By the thread that logs: only it knows the request's id, and what the message names may change.
            what = record if isinstance(record, Entry) else self.format(record)
        except Exception:
            self.handleError(record)
            return
        if self.lines.qsize() >= self.size:
            self.drop(Line(what))
            return
        if self.dropped:
            self._put(self._report(self.dropped))
            self.dropped = 0
        self._put(Line(what))

    def _put(self, line: Line) -> None:
        self.lines.put(line)
        self.queued += 1  # whoever logs holds the handler's lock

    def _report(self, dropped: int) -> Line:
        record = logging.makeLogRecord({"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"})
        record.msg, record.args = "%d log lines were dropped because stderr took no more", (dropped,)
        return Line(self.format(record), dropped)

    def text(self, line: Line) -> str:
        return line.what if isinstance(line.what, str) else self.format(line.what)

    def drop(self, line: Line) -> None:
        """A line is lost."""
        self.acquire()
        try:
            self.dropped += line.reports or 1
        finally:
            self.release()
        if not line.reports:
            self.count()

    def wait_until_written(self) -> None:
        """Returns once every line queued before has been written, or after FLUSH_TIMEOUT_S."""
        queued, deadline = self.queued, time.monotonic() + FLUSH_TIMEOUT_S
        while self.written < queued and time.monotonic() < deadline:
            time.sleep(PAUSE_S / 4)


class Writable(Protocol):
    def write(self, text: str, /) -> object: ...


def write_lines(handler: NeverBlockingHandler, stream: Writable) -> None:
    """Writes the handler's lines, for ever, as many at once as wait. Those that cannot be written (disk full, reader
    gone) count as dropped."""
    while True:
        if handler.lines.empty():
            time.sleep(PAUSE_S)
        lines = [handler.lines.get()]
        while not handler.lines.empty():
            lines.append(handler.lines.get())
        try:
            stream.write("".join(handler.text(line) + "\n" for line in lines))
        except (OSError, ValueError):  # ValueError: what stands for stderr was closed
            for line in lines:
                handler.drop(line)
        finally:
            handler.written += len(lines)


class Descriptor:
    """A file descriptor as a stream of text. Python's own would hold a lock while it waits for a reader, and the
    interpreter, which flushes it at its end, would wait for that lock."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, text: str) -> None:
        left = memoryview(text.encode("utf-8", "backslashreplace"))
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # whoever started the process made it non-blocking
                select.select([], [self._descriptor], [])


def _stderr() -> Writable:
    try:
        return Descriptor(sys.stderr.fileno())
    except OSError:  # stands for something that is no file
        return sys.stderr


# Of every record; anything else came in `extra={...}`. `color_message` is uvicorn's, the message with terminal codes.
OWN_FIELDS = frozenset(NOWHERE) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """Renders message, time, level, logger, request id, the fields of `extra={...}`, and the exception, as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "message": record.getMessage(),
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        entry = record if isinstance(record, Entry) else None
        request = entry.request if entry else current_request.get()
        if request is not None:
            fields["request_id"] = request
        if entry:
            fields |= entry.fields
        else:
            fields |= {name: value for name, value in vars(record).items() if name not in OWN_FIELDS}
        if record.exc_info and record.exc_info[1] is not None:
            # uvicorn logs what a request raised when the request's id is no longer known.
            in_request = request is not None or record.name.startswith("uvicorn")
            render = traceback_without_messages if in_request else _whole_traceback
            fields["exception"] = render(record.exc_info[1])
        try:
            return to_json(fields, fallback=repr).decode()
        except PydanticSerializationError:  # half a surrogate pair, as in names of files that are not UTF-8
            return json.dumps(fields, default=str)


def _whole_traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def traceback_without_messages(error: BaseException) -> str:
    """The tracebacks and types of an exception and its causes, causes first."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    parts = ["".join(traceback.format_tb(each.__traceback__)) + type(each).__qualname__ for each in reversed(chain)]
    return "\n\n".join(parts)
