"""Where a request's head and body end, read strictly: what two parsers could read differently is refused.

A proxy in front of the service and the service itself must agree on where one request ends and the next begins, or a
client could hide a request in another's body. Nothing here reads a socket or a clock.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from app.errors import MalformedRequest

MAX_CHUNKS = 16_384  # each costs some microseconds, however small it is
MAX_CHUNK_LINE = 256  # bytes of a chunk's size with its extensions
MAX_TRAILER = 8192  # bytes of the fields after a chunked body

_FIELD = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++:[\t\x20-\x7e\x80-\xff]*+\r\n"
_METHOD = rb"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS|TRACE)"  # what the application can answer, if only with 405
_HEAD = re.compile(_METHOD + rb" ([\x21\x22\x24-\x7e]++) HTTP/1\.([01])\r\n(?:" + _FIELD + rb")*+\r\n")
_TRAILER = re.compile(rb"(?:" + _FIELD + rb")*+\r\n")
_TELLING = re.compile(rb"\r\n(host|content-length|transfer-encoding|upgrade):([^\r]*)", re.IGNORECASE)
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r]*", re.IGNORECASE)
_HOST = re.compile(rb"[A-Za-z0-9\-._~%!$&'()*+;=:\[\]]*")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,12})(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")


class Head(NamedTuple):
    """A request's head as the HTTP parser may see it. length: bytes of the body that follows; None: it is chunked."""

    data: bytes
    length: int | None


def read_head(data: bytes) -> Head:
    """Checks a whole head, up to and including its empty line. Raises MalformedRequest.

    An offer to upgrade the protocol is left out: the parser would take the body for something else.
    """
    matched = _HEAD.fullmatch(data)
    if matched is None:
        raise MalformedRequest("The request is not well-formed, or its method is unknown; send one of HTTP/1.1.")
    method, target, minor = matched.groups()
    host = length = coding = None
    offers_upgrade = False
    for name, value in _TELLING.findall(data):
        name, value = name.lower(), value.strip(b"\t ")
        if name == b"host":
            if host is not None or not _HOST.fullmatch(value):
                raise MalformedRequest("Send one Host field, with a host and optionally a port.")
            host = value
        elif name == b"content-length":
            if length is not None or not value.isdigit() or len(value) > 15:
                raise MalformedRequest("Send one Content-Length, a number of bytes.")
            length = int(value)
        elif name == b"transfer-encoding":
            if coding is not None or value.lower() != b"chunked" or minor == b"0":
                raise MalformedRequest("The only Transfer-Encoding that is understood is chunked, once, in HTTP/1.1.")
            coding = value
        else:
            offers_upgrade = True
    if coding is not None and length is not None:
        raise MalformedRequest("Send either Content-Length or Transfer-Encoding.")
    if host is None and minor == b"1":
        raise MalformedRequest("Send a Host field.")
    if target[:1] != b"/":
        _check_target(method, target, host)
    if offers_upgrade:
        data = _UPGRADE.sub(b"", data)
    return Head(data, None if coding is not None else length or 0)


def _check_target(method: bytes, target: bytes, host: bytes | None) -> None:
    """Accepts `*` with OPTIONS, and an absolute URL that names the same host as the Host field."""
    if method == b"OPTIONS" and target == b"*":
        return
    scheme, separator, rest = target.partition(b"://")
    named = re.split(rb"[/?]", rest, maxsplit=1)[0]
    if not separator or scheme.lower() not in (b"http", b"https") or named.lower() != (host or named).lower():
        raise MalformedRequest("The request's target must be a path.")


def is_hopeless(data: bytes, searched: int = 0) -> bool:
    """Whether an incomplete head cannot become a request. searched: how many of its bytes were judged before."""
    begins_well = data in (b"", b"\r") or b"A" <= data[:1] <= b"Z"
    return not begins_well or _BARE_LINE_FEED.search(data, searched) is not None


class Chunks:
    """Follows a chunked body from piece to piece."""

    def __init__(self) -> None:
        self._partial = b""  # of a chunk's line or of the trailer
        self._left = 0  # bytes of the current chunk
        self._at_end = False  # of a chunk, before its line break
        self._count = 0

    def take(self, data: bytes) -> tuple[bytes, bytes | None]:
        """What of the body the parser may see now, and what follows the body: None while the body is not complete.

        Trailer fields are left out: they could pass for fields of the head. Raises MalformedRequest.
        """
        data, at = self._partial + data, 0
        while True:
            if self._left:
                step = min(self._left, len(data) - at)
                at += step
                self._left -= step
                if self._left:
                    break
                self._at_end = True
            if self._at_end:
                line_break = data[at : at + 2]
                if not b"\r\n".startswith(line_break):
                    raise MalformedRequest("A chunk is longer than its size; send as many bytes as the size says.")
                if len(line_break) < 2:
                    break
                at += 2
                self._at_end = False
            line = _CHUNK.match(data, at)
            if line is None or line.end() - at > MAX_CHUNK_LINE:
                if len(data) - at > MAX_CHUNK_LINE or data.find(b"\n", at) >= 0:
                    raise MalformedRequest(
                        "The line of a chunk is not a size, or too long; send hexadecimal digits alone."
                    )
                break
            self._left = int(line[1], 16)
            if self._left == 0:
                trailer = _TRAILER.match(data, line.end())
                if trailer is not None and trailer.end() - at <= MAX_TRAILER:
                    return data[: line.end()] + b"\r\n", data[trailer.end() :]
                if len(data) - at > MAX_TRAILER or b"\r\n\r\n" in data[at:] or _BARE_LINE_FEED.search(data, at):
                    raise MalformedRequest("The trailer is not well-formed, or too long; send none.")
                break
            self._count += 1
            if self._count > MAX_CHUNKS:
                raise MalformedRequest(f"Send the body in at most {MAX_CHUNKS} chunks, or with a Content-Length.")
            at = line.end()
        self._partial = data[at:]
        return data[:at], None
