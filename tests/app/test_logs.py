"""How lines reach their stream: those of a moment together, warnings at once, none lost at the end, order kept."""

from __future__ import annotations

import io
import json
import logging

import pytest

from app.logs import Together, formatter
from tests.waiting import eventually


class Stream(io.StringIO):
    """Counts its writes; `broken` lets them fail."""

    writes, broken = 0, False

    def write(self, text: str) -> int:
        self.writes += 1
        if self.broken:
            raise OSError("nobody reads")
        return super().write(text)


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def log(stream: Stream) -> logging.Logger:
    handler = Together(stream)
    handler.setFormatter(formatter())
    logger = logging.Logger("lines", logging.INFO)
    logger.addHandler(handler)
    return logger


def told(stream: Stream) -> list[str]:
    return [json.loads(line)["message"] for line in stream.getvalue().splitlines()]


def wait_for(stream: Stream, lines: int) -> None:
    eventually(lambda: len(told(stream)) >= lines)


def test_lines_of_a_moment_are_written_together_and_by_themselves(log: logging.Logger, stream: Stream) -> None:
    for number in range(50):
        log.info("line %d", number)
    wait_for(stream, 50)
    assert told(stream) == [f"line {number}" for number in range(50)]
    assert stream.writes < 50
    log.info("later")
    wait_for(stream, 51)
    assert told(stream)[-1] == "later"


def test_a_warning_does_not_wait_and_comes_after_what_was_said_before(log: logging.Logger, stream: Stream) -> None:
    log.info("before")
    log.warning("now")
    assert told(stream) == ["before", "now"]


def test_the_end_of_the_process_writes_what_is_left(log: logging.Logger, stream: Stream) -> None:
    log.info("last words")
    log.handlers[0].flush()  # as logging.shutdown does
    assert told(stream) == ["last words"]


def test_a_stream_that_fails_ends_nothing(log: logging.Logger, stream: Stream) -> None:
    stream.broken = True
    log.warning("lost at once")  # raises nothing
    assert stream.writes == 1
    stream.writes = 0
    log.info("lost")
    eventually(lambda: stream.writes)
    stream.broken = False
    log.info("heard")
    wait_for(stream, 1)
    assert told(stream) == ["heard"]
