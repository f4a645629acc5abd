"""Logs: one JSON object per line on stderr. Code logs through the standard library, and structlog renders the lines.

User ids, item ids, bodies, keys and query strings are never logged. The message of an exception may quote what a client
sent, so within a request only its type and traceback are logged.

There is a line for every request, so what it costs the thread that logs counts: that thread only queues the record. The
thread that writes wakes at most once in PAUSE_S and renders and writes what has come, many lines at a time.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import QueueHandler
from typing import Protocol

from structlog.processors import EventRenamer, JSONRenderer
from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level, add_logger_name
from structlog.typing import EventDict, WrappedLogger

MAX_WAITING_LINES = 10_000
PAUSE_S = 0.1  # between the rounds of the thread that writes: each takes core and caches from the event loop
FLUSH_TIMEOUT_S = 2.0  # at the end of the process; a reader that has stopped must not keep it from ending

current_request: ContextVar[str | None] = ContextVar("current_request", default=None)  # its id


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
    # No QueueListener: it writes line by line, and the end of the process would wait for it.
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


class NeverBlockingHandler(QueueHandler):
    """Queues records for the thread that writes them. While nobody reads stderr and the queue is full, lines are
    dropped; the next one that fits is preceded by a line that says how many were lost. `count` is called for each."""

    queue: queue.SimpleQueue[logging.LogRecord]  # the one without locks in Python

    def __init__(self, size: int = MAX_WAITING_LINES, count: Callable[[], None] = lambda: None) -> None:
        super().__init__(queue.SimpleQueue())
        self.size, self.count = size, count
        self.queued = self.written = 0  # lines, since the start; those that were lost after all count as written
        self.dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Adds what only the thread that logs knows: the request's id. Renders what may change, or would be kept alive
        by the queue: what the message names, and the frames of an exception."""
        record.msg, record.args = record.getMessage(), None
        request = current_request.get()
        if request is not None:
            vars(record)["request_id"] = request
        if record.exc_info and record.exc_info[1] is not None:
            # uvicorn logs what a request raised when the request's id is no longer known.
            in_request = request is not None or record.name.startswith("uvicorn")
            render = traceback_without_messages if in_request else _whole_traceback
            vars(record)["exception"] = render(record.exc_info[1])
        record.exc_info = None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.queue.qsize() >= self.size:
            self.drop(record)
            return
        if self.dropped:
            self._put(self._report(self.dropped))
            self.dropped = 0
        self._put(record)

    def _put(self, record: logging.LogRecord) -> None:
        self.queue.put(record)
        self.queued += 1  # whoever logs holds the handler's lock

    def _report(self, dropped: int) -> logging.LogRecord:
        message = f"{dropped} log lines were dropped because stderr took no more"
        fields = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": message}
        return logging.makeLogRecord({**fields, "dropped": dropped})

    def drop(self, record: logging.LogRecord) -> None:
        """A line is lost, and with one that reports lost lines also what it tells."""
        reported = vars(record).get("dropped", 0)
        self.acquire()
        try:
            self.dropped += reported or 1
        finally:
            self.release()
        if not reported:
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
    lines = formatter()

    def render(record: logging.LogRecord) -> str:
        try:
            return lines.format(record) + "\n"
        except Exception:  # a field that has no representation, say
            handler.handleError(record)
            return ""

    while True:
        if handler.queue.empty():
            time.sleep(PAUSE_S)
        records = [handler.queue.get()]
        while not handler.queue.empty():
            records.append(handler.queue.get())
        try:
            stream.write("".join(map(render, records)))
        except (OSError, ValueError):  # ValueError: what stands for stderr was closed
            for record in records:
                handler.drop(record)
        finally:
            handler.written += len(records)


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


def formatter() -> logging.Formatter:
    """Renders message, time, level, logger, the fields of `extra={...}` and what `prepare` adds, as JSON."""
    return ProcessorFormatter(
        foreign_pre_chain=[
            EventRenamer("message"),  # first, for people who read the lines as they are
            _add_time,
            add_log_level,
            add_logger_name,
            ExtraAdder(),
            _drop_color_message,
        ],
        processors=[ProcessorFormatter.remove_processors_meta, JSONRenderer(ensure_ascii=False)],
    )


def _add_time(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """The time at which the line was logged; structlog's TimeStamper would tell when it is rendered."""
    event["time"] = datetime.fromtimestamp(event["_record"].created, UTC).isoformat().replace("+00:00", "Z")
    return event


def _drop_color_message(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    event.pop("color_message", None)  # uvicorn's: the message again, with terminal codes
    return event


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
