"""The guard below ASGI: what is read from a connection, how much of it and for how long, before a caller is known.

It stands between the socket and uvicorn's protocol, and hands over whole, unambiguous request heads only
(app/framing.py). Requests sent ahead on one connection wait here for their turn.

    HEAD -> BODY -> ANSWERING -> HEAD ...     and from each of them to CLOSING

Who exceeds a bound of its own (bytes, fields, time) is answered 400, 408 or 431. Where a bound on all connections
together is exceeded, the one that has kept the service waiting longest is given up: hardly ever an honest one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from http import HTTPStatus
from typing import Any

from fastapi.responses import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app import errors
from app.errors import HeadTooLarge, MalformedRequest, TooSlow
from app.framing import Chunks, is_hopeless, read_head
from app.headers import REFUSED, id_in, id_of, with_standard_headers
from serving.errors import Draining, Overloaded, ServingError

# Seconds that an idle connection stays open: longer than clients and proxies keep theirs (5 to 60 by default), or they
# would send on one that is just being closed, and see a reset instead of an answer.
KEEP_ALIVE_S = 75.0
SEND_TIMEOUT_S = 30.0  # for a client that does not read its answer
# Closing a connection while its client still sends would reset it, and lose the answer: so much more is read first.
LINGER_S = 5.0
LINGER_BYTES = 64 << 20
DRAINING_S = 1.0  # instead of the other limits, once the service is draining
SWEEP_S = 0.25  # how exactly the limits are kept
SMALL_BODY = 16 << 10  # bytes; an unfinished body up to here is never given up for others
BUSY = Overloaded("The service has no room for another connection; try again later.", 1)
NO_ROOM = Overloaded("The service holds too many unfinished bodies; try again later.", 1)
NOT_HTTP = "This is not a request of HTTP/1.1; send one, and without TLS."
ENDING = Draining("The service is shutting down; send the request to another replica or try again later.")


@dataclass(frozen=True)
class Bounds:
    """Of a request: bytes and fields of its head, seconds for reading head and body. Of a process: connections, and
    bytes of bodies that are not complete."""

    head_bytes: int
    head_fields: int
    head_timeout: float
    body_timeout: float
    connections: int
    unfinished_bytes: int


@dataclass(eq=False)
class Connections:
    """All connections of a process. on_refusal: called with the reason for each request that the guard refuses."""

    bounds: Bounds
    on_refusal: Callable[[str], None] = lambda reason: None
    draining: bool = False
    unfinished_bytes: int = 0
    all: set[Guard] = field(default_factory=set)
    # Those that hold no whole request head, and those whose body is not complete; longest waiting first.
    idle: OrderedDict[Guard, None] = field(default_factory=OrderedDict)
    unfinished: OrderedDict[Guard, None] = field(default_factory=OrderedDict)
    given_up: set[Guard] = field(default_factory=set)  # and not closed yet

    def has_room(self) -> bool:
        """Whether one more may stay, if need be instead of the one that has waited longest."""
        while len(self.all) - len(self.given_up) >= self.bounds.connections:
            longest = next(iter(self.idle or self.unfinished), None)
            if longest is None:
                return False
            longest.give_up(BUSY)
        return True

    def count(self, received: int) -> None:
        """Counts bytes of unfinished bodies, and gives up the oldest large ones while there are too many."""
        self.unfinished_bytes += received
        while self.unfinished_bytes > self.bounds.unfinished_bytes:
            oldest = next((guard for guard in self.unfinished if guard.body_bytes > SMALL_BODY), None)
            if oldest is None:
                return
            oldest.give_up(NO_ROOM)

    def begin_drain(self) -> None:
        """Refuses requests that are not complete. From now on every answer closes its connection."""
        self.draining = True
        for guard in list(self.all):
            guard.drain()

    def end_drain(self) -> None:
        """Closes idle connections, and refuses what is not answered yet."""
        for guard in list(self.all):
            guard.give_up(ENDING)

    def sweep(self, now: float) -> None:
        """Ends what is past its time limit."""
        for guard in [each for each in self.all if each.deadline <= now]:
            guard.expire()

    async def keep_limits(self) -> None:
        """Sweeps until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep(loop.time())


class State(Enum):
    HEAD = auto()  # idle, or part of a head is there
    BODY = auto()  # the head is handed over, the body is not complete; it may be answered already
    ANSWERING = auto()  # the request is complete, its answer is not
    CLOSING = auto()  # what still comes is thrown away


class Guard(HttpToolsProtocol):
    """One connection. deadline: for what its state waits for, on the loop's clock. waiting: part of a head, or requests
    sent ahead. body_bytes: of an unfinished body that is not answered yet."""

    def __init__(self, connections: Connections, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self.guarded, self.bounds, self.state = connections, connections.bounds, State.HEAD
        self.deadline, self.body_bytes = float("inf"), 0
        self.waiting = b""
        self._left = 0  # bytes of the body to come
        self._chunks: Chunks | None = None  # of a chunked body
        self._thrown_away = 0

    # What happens on the socket

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._socket, self._written = transport, _Transport(transport, self)
        super().connection_made(self._written)  # type: ignore[arg-type]
        has_room = self.guarded.has_room()
        self.guarded.all.add(self)
        self._await_head(self.bounds.head_timeout)
        if not has_room:
            self.refuse(BUSY)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self.state = State.CLOSING
        self.guarded.all.discard(self)
        self.guarded.given_up.discard(self)
        self.waiting = b""
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        try:
            while data:
                if self.state is State.HEAD:
                    data = self._read_head(data)
                elif self.state is State.BODY:
                    data = self._read_body(data)
                elif self.state is State.ANSWERING:
                    self.waiting += data
                    if len(self.waiting) > self.bounds.head_bytes:
                        self.flow.pause_reading()  # until the answer is sent
                    return
                else:
                    return self._throw_away(len(data))
        except ServingError as error:
            self.refuse(error)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.state is State.ANSWERING:
            self.deadline = self._in(SEND_TIMEOUT_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.state is State.ANSWERING:
            self.deadline = float("inf")
        elif self.state is State.HEAD and not self.waiting:
            self.deadline = self._in(KEEP_ALIVE_S)

    # Reading: each method takes what belongs to its state, and returns the rest

    def _read_head(self, data: bytes) -> bytes:
        waiting, bounds, judged = self.waiting, self.bounds, 0
        if waiting:
            data, judged = waiting + data, max(0, len(waiting) - 3)
        self.waiting = data  # a refusal looks for the request's id in it
        start = 2 if data.startswith(b"\r\n") else 0  # old clients send that after a body
        end = data.find(b"\r\n\r\n", max(start, judged)) + 4
        if end < 4:
            if len(data) > bounds.head_bytes:
                raise self._head_too_large()
            if is_hopeless(data[start:], max(0, judged - start)):
                raise MalformedRequest(NOT_HTTP)
            if not waiting:
                self.deadline = self._in(bounds.head_timeout)
            return b""
        if end > bounds.head_bytes or data.count(b"\r\n", 0, end) - 2 > bounds.head_fields:
            raise self._head_too_large()
        head, rest = read_head(data[start:end]), data[end:]
        self.waiting = b""
        if head.length is not None and len(rest) >= head.length:  # all of it is here
            self._hand_over(head.data + rest[: head.length], State.ANSWERING)
            return rest[head.length :]
        self._chunks, self._left = (Chunks(), 0) if head.length is None else (None, head.length)
        self._hand_over(head.data, State.BODY)
        return rest

    def _head_too_large(self) -> HeadTooLarge:
        return HeadTooLarge(
            f"The head of a request may hold {self.bounds.head_bytes} bytes and {self.bounds.head_fields} fields; "
            "send fewer or shorter ones."
        )

    def _hand_over(self, request: bytes, state: State) -> None:
        """Gives the parser a head with nothing, or with its whole body, behind it. Its answer begins later."""
        super().data_received(request)
        if self.state is State.CLOSING:  # the parser knows something against it
            return
        self._leave()
        self.state = state
        if state is State.BODY:
            self.guarded.unfinished[self] = None
            self.deadline = self._in(DRAINING_S if self.guarded.draining else self.bounds.body_timeout)
        if self.guarded.draining:
            self.cycle.keep_alive = False

    def _read_body(self, data: bytes) -> bytes:
        rest: bytes | None
        if self._chunks is None:
            part, rest = data[: self._left], data[self._left :]
            self._left -= len(part)
            is_complete = self._left == 0
        else:
            part, rest = self._chunks.take(data)
            is_complete = rest is not None
        if part:
            super().data_received(part)
        if self.state is State.CLOSING:
            return b""
        if is_complete:
            self._leave()
            if self.cycle.response_complete:
                self._await_head(KEEP_ALIVE_S)
            else:
                self.state = State.ANSWERING
        elif self.cycle.response_complete:
            self._throw_away(len(data))
        else:
            self.body_bytes += len(data)
            self.guarded.count(len(data))
        return rest or b""

    def _throw_away(self, count: int) -> None:
        self._thrown_away += count
        if self._thrown_away > LINGER_BYTES:
            self._socket.abort()

    def _await_head(self, seconds: float) -> None:
        self.state, self._thrown_away = State.HEAD, 0
        self.guarded.idle[self] = None
        self.deadline = self._in(SEND_TIMEOUT_S if self.flow.write_paused else seconds)

    def _leave(self) -> None:
        """What the state that ends was counted for, is counted no longer."""
        self.guarded.idle.pop(self, None)
        self.guarded.unfinished.pop(self, None)
        self.guarded.unfinished_bytes -= self.body_bytes
        self.body_bytes, self.deadline = 0, float("inf")

    def _in(self, seconds: float) -> float:
        return self.loop.time() + seconds

    # What uvicorn calls

    def on_response_complete(self) -> None:
        """In place of uvicorn's, which starts a timer for every idle connection and looks for requests sent ahead: the
        deadline is the limit here, and those requests wait in the guard."""
        self._written.flush()
        if not self.transport.is_closing():
            self.flow.resume_reading()
        if self.state is State.ANSWERING:
            self._await_head(KEEP_ALIVE_S)
            if self.waiting:
                waiting, self.waiting = self.waiting, b""
                self.data_received(waiting)
        elif self.state is State.BODY:  # answered early: the rest is read for the answer's sake only
            self._leave()
            self.deadline = self._in(DRAINING_S if self.guarded.draining else LINGER_S)

    def send_400_response(self, msg: str) -> None:
        self.refuse(MalformedRequest(NOT_HTTP))

    # Ending

    def refuse(self, error: ServingError, linger: bool = True) -> None:
        """Answers the request that is being read or answered with this error, unless its answer has begun, and closes
        the connection. The application sees a client that has left."""
        if self.state is State.CLOSING:
            return
        cycle = None if self.state is State.HEAD else self.cycle
        if cycle is None or not cycle.response_started:
            details = errors.problem(error)
            own_id = id_in(self.waiting)
            if cycle is not None:
                own_id, cycle.scope["state"][REFUSED] = id_of(cycle.scope), details.status  # type: ignore[arg-type]
            self._socket.write(_rendered(errors.response(error, details), own_id, self.server_state.default_headers))
            self.guarded.on_refusal(errors.reason(details))
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self.close(linger)

    def close(self, linger: bool) -> None:
        """linger: the client may still be sending. Then what it sends is thrown away for a while."""
        if self.state is State.CLOSING:
            return
        self._leave()
        self.state = State.CLOSING
        self.waiting = b""
        if self._socket.is_closing():
            return
        self._written.flush()
        self.deadline = self._in(DRAINING_S if self.guarded.draining else LINGER_S)
        if linger:
            self.guarded.idle[self] = None
            self.flow.resume_reading()
            self._socket.write_eof()
        else:
            self._socket.close()

    @property
    def may_be_sending(self) -> bool:
        return self.state is State.BODY or self.flow.read_paused

    def drain(self) -> None:
        if self.state is State.ANSWERING:
            self.cycle.keep_alive = False
        elif self.state is State.BODY and not self.cycle.response_complete or self.waiting:
            self.refuse(ENDING)

    def give_up(self, error: ServingError) -> None:
        """Ends the connection at once; with this error if a request was begun."""
        if self.state is State.CLOSING:
            self._socket.abort()
        elif self.state is State.HEAD and not self.waiting:
            self.close(linger=False)
        else:
            self.refuse(error, linger=False)
        self.guarded.idle.pop(self, None)
        self.guarded.given_up.add(self)

    def expire(self) -> None:
        if self.flow.write_paused:  # it does not read: nothing more can be said
            self._socket.abort()
        elif self.state is State.HEAD and not self.waiting:
            self.close(linger=False)
        elif self.state is State.HEAD:
            self.refuse(TooSlow(f"The head of a request must arrive within {self.bounds.head_timeout:g} s."))
        elif self.state is State.BODY and not self.cycle.response_started:
            self.refuse(TooSlow(f"The body of a request must arrive within {self.bounds.body_timeout:g} s."))
        else:
            self._socket.abort()


class _Transport:
    """The socket as uvicorn sees it: closing it closes the connection in an orderly way. The head of an answer is held
    until the first bytes of its body are there, since every system call costs as much as routing a request."""

    def __init__(self, socket: asyncio.Transport, guard: Guard) -> None:
        self._socket, self._guard = socket, guard
        self._held: bytes | None = b""  # None: the answer's head is sent
        self.get_extra_info = socket.get_extra_info
        self.pause_reading, self.resume_reading = socket.pause_reading, socket.resume_reading

    def write(self, data: bytes) -> None:
        if self._held is None or not self._guard.cycle.response_started:  # a later part of a body, or 100 Continue
            self._socket.write(data)
        elif self._held:
            self._socket.write(self._held + data)
            self._held = None
        else:
            self._held = data

    def flush(self) -> None:
        """Sends what is held. The next answer begins with its head again."""
        if self._held:
            self._socket.write(self._held)
        self._held = b""

    def is_closing(self) -> bool:
        return self._guard.state is State.CLOSING or self._socket.is_closing()

    def close(self) -> None:
        self._guard.close(linger=self._guard.may_be_sending)


def _rendered(response: Response, own_id: str, default_headers: list[tuple[bytes, bytes]]) -> bytes:
    """An answer in the bytes of HTTP/1.1, the last on its connection."""
    phrase = HTTPStatus(response.status_code).phrase
    headers = with_standard_headers(response.raw_headers, own_id, "http")
    lines = [b"%s: %s\r\n" % pair for pair in (*default_headers, *headers, (b"connection", b"close"))]
    return b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (response.status_code, phrase.encode(), b"".join(lines), response.body)
