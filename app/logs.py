"""Logs: one JSON object per line on stderr. Code logs through the standard library, and structlog renders the lines.

User ids, item ids, bodies, keys and query strings are never logged. The message of an exception may quote what a client
sent, so within a request only its type and traceback are logged.
"""

from __future__ import annotations

import atexit
import logging
import queue
import sys
import traceback
from logging.handlers import QueueHandler, QueueListener

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, WrappedLogger

MAX_WAITING_LINES = 10_000


def set_up(level: str) -> None:
    """Logs everything at `level` and above to stderr, uvicorn's messages included."""
    lines: queue.Queue[logging.LogRecord] = queue.Queue(MAX_WAITING_LINES)
    handler = NeverBlockingHandler(lines)
    handler.setFormatter(formatter())  # lines are rendered by the thread that logs: only it knows the request's id
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
    writer = QueueListener(lines, logging.StreamHandler(sys.stderr))
    writer.start()
    atexit.register(writer.stop)  # writes what is still waiting


def flush() -> None:
    """Returns once every line logged before has been written."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, NeverBlockingHandler):
            handler.queue.join()


class NeverBlockingHandler(QueueHandler):
    """Hands lines to the thread that writes them. While nobody reads stderr and the queue is full, lines are dropped;
    the next line that fits is preceded by one that says how many were lost."""

    queue: queue.Queue[logging.LogRecord]
    dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            if self.dropped:
                lost = logging.makeLogRecord({"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"})
                lost.msg, lost.args = "%d log lines were dropped because nobody read stderr", (self.dropped,)
                self.queue.put_nowait(self.prepare(lost))
                self.dropped = 0
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


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
