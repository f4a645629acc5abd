"""Logs: one JSON object per line on stderr. Code logs through the standard library, and structlog renders the lines.

User ids, item ids, bodies, keys and query strings are never logged. The message of an exception may quote what a client
sent, so within a request only its type and traceback are logged.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import select
import sys
import traceback
from collections.abc import Callable
from logging.handlers import QueueHandler, QueueListener
from typing import Protocol

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, WrappedLogger

LineQueue = queue.Queue[logging.LogRecord]

MAX_WAITING_LINES = 10_000
FLUSH_TIMEOUT_S = 2.0  # at the end of the process; a reader that has stopped must not keep it from ending


def set_up(level: str) -> None:
    """Logs everything at `level` and above to stderr, uvicorn's messages included."""
    lines: LineQueue = queue.Queue(MAX_WAITING_LINES)
    handler = NeverBlockingHandler(lines)
    handler.setFormatter(formatter())  # lines are rendered by the thread that logs: only it knows the request's id
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
    writer = QueueListener(lines, LineWriter(_stderr(), handler))
    writer.start()
    atexit.register(flush)  # the writer is a daemon thread: what nobody reads by then is lost, and holds up nothing


def flush() -> None:
    """Returns once every line logged before has been written, or after FLUSH_TIMEOUT_S."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, NeverBlockingHandler):
            lines = handler.queue
            with lines.all_tasks_done:
                lines.all_tasks_done.wait_for(lambda lines=lines: not lines.unfinished_tasks, FLUSH_TIMEOUT_S)  # type: ignore[misc]


def count_dropped(count: Callable[[], None]) -> None:
    """From now on `count` is called for every line that is lost."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, NeverBlockingHandler):
            handler.count = count


class NeverBlockingHandler(QueueHandler):
    """Hands lines to the thread that writes them. While nobody reads stderr and the queue is full, lines are dropped;
    the next line that fits is preceded by one that says how many were lost. `count` is called for each."""

    queue: LineQueue
    dropped = 0

    def __init__(self, lines: LineQueue, count: Callable[[], None] = lambda: None) -> None:
        super().__init__(lines)
        self.count = count

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self.dropped:
                lost = logging.makeLogRecord({"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"})
                lost.msg, lost.args = "%d log lines were dropped because stderr took no more", (self.dropped,)
                lost.lost = self.dropped
                self.queue.put_nowait(self.prepare(lost))
                self.dropped = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self.drop()

    def drop(self, counted: int = 0) -> None:
        """A line is lost: an ordinary one, or the one that was to report so many others."""
        self.acquire()
        try:
            self.dropped += counted or 1
        finally:
            self.release()
        if not counted:
            self.count()


class Writable(Protocol):
    def write(self, text: str, /) -> object: ...


class LineWriter(logging.StreamHandler[Writable]):
    """Writes lines to the stream. A line that cannot be written (disk full, reader gone) counts as dropped."""

    def __init__(self, stream: Writable, handler: NeverBlockingHandler) -> None:
        super().__init__(stream)
        self._handler = handler

    def handle(self, record: logging.LogRecord) -> bool:
        self.emit(record)  # without the handler's lock, for which the end of the process would wait
        return True

    def handleError(self, record: logging.LogRecord) -> None:
        self._handler.drop(getattr(record, "lost", 0))


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
    """Renders message, time, level, logger, request id, the fields of `extra={...}`, and the exception, as JSON."""
    return ProcessorFormatter(
        foreign_pre_chain=[
            structlog.processors.TimeStamper(fmt="iso", key="time"),
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.ExtraAdder(),
        ],
        processors=[
            ProcessorFormatter.remove_processors_meta,
            _render_exception,
            _message_first,
            structlog.processors.JSONRenderer(),
        ],
    )


def _render_exception(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    event.pop("color_message", None)  # uvicorn's, the message again with terminal codes
    if exc_info := event.pop("exc_info", None):
        # uvicorn logs what a request raised when the request's id is no longer known.
        in_request = "request_id" in event or event["logger"].startswith("uvicorn")
        render = traceback_without_messages if in_request else _whole_traceback
        event["exception"] = render(exc_info[1])
    return event


def _message_first(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {"message": event.pop("event"), **event}  # for people who read the lines as they are


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
