"""Where requests end: whatever two parsers could read differently is refused, and pieces make no difference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import framing
from app.errors import MalformedRequest
from app.framing import Chunks, is_hopeless, read_head

POST = b"POST /recommend HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
LENGTHS = (b"+5", b"-1", b"5, 5", b"0x5", b"", b"1" * 16)
CODINGS = (b"xchunked", b"chunked, identity", b"identity", b"gzip, chunked", b"", b"chunked;a", b'"chunked"')


@pytest.mark.parametrize(
    ("data", "length"),
    [
        (GET + b"\r\n", 0),
        (POST + b"Content-Length: 12\r\n\r\n", 12),
        (POST + b"content-length:\t007 \r\n\r\n", 7),
        (POST + b"Transfer-Encoding: Chunked\r\n\r\n", None),
        (POST + b"X-Empty:\r\nX-Latin: \xe9\r\n\r\n", 0),
        (b"GET /livez HTTP/1.0\r\n\r\n", 0),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 0),
        (b"GET http://X/livez HTTP/1.1\r\nHost: x\r\n\r\n", 0),
        (b"GET /livez HTTP/1.1\r\nHost: [::1]:8000\r\n\r\n", 0),
    ],
)
def test_a_head_that_is_clear_is_read(data: bytes, length: int | None) -> None:
    assert read_head(data) == (data, length)


@pytest.mark.parametrize(
    "data",
    [
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
        POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\n",
        POST + b"Content-Length: 0\r\ncontent-length: 3\r\n\r\n",
        *(
            POST + b"Content-Length: " + value + b"\r\n\r\n"
            for value in (b"+5", b"-1", b"5, 5", b"0x5", b"", b"1" * 16)
        ),
        *(
            POST + b"Transfer-Encoding: " + value + b"\r\n\r\n"
            for value in (
                b"xchunked",
                b"chunked, identity",
                b"identity",
                b"gzip, chunked",
                b"",
                b"chunked;a",
                b'"chunked"',
            )
        ),
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
        POST + b"Transfer-Encoding : chunked\r\n\r\n",
        POST + b" Transfer-Encoding: chunked\r\n\r\n",
        POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n",
        GET + b"X-A: a\r\n b\r\n\r\n",
        GET + b"X-A: a\rX-B: b\r\n\r\n",
        GET + b"X-A: a\nX-B: b\r\n\r\n",
        GET + b"X-A: a\x00b\r\n\r\n",
        GET + b"X-A: a\x7f\r\n\r\n",
        GET + b"X A: a\r\n\r\n",
        GET + b": a\r\n\r\n",
        GET + b"no colon\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: u@x\r\n\r\n",
        b"GET http://evil/livez HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET ftp://x/livez HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET livez HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"NOSUCHMETHOD / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT /x HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /items/\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /a#b HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET  /livez HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez  HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1 \r\nHost: x\r\n\r\n",
        b"get /livez HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\n",
        b"GET /livez HTTP/2.0\r\nHost: x\r\n\r\n",
        b"\r\n\r\n",
    ],
)
def test_a_head_that_could_be_read_differently_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedRequest):
        read_head(data)


@pytest.mark.parametrize(
    "offer", [b"Upgrade: h2c", b"UPGRADE:websocket", b"upgrade: h2c, websocket, TLS/1.0", b"Upgrade:"]
)
def test_an_offer_to_upgrade_is_left_out_and_its_body_kept(offer: bytes) -> None:
    before, after = POST + b"Connection: Upgrade, HTTP2-Settings\r\n", b"Content-Length: 5\r\n\r\n"
    assert read_head(before + offer + b"\r\n" + after) == (before + after, 5)
    assert read_head(before + offer + b"\r\n" + offer + b"\r\nX-Upgrade: 1\r\n" + after) == (
        before + b"X-Upgrade: 1\r\n" + after,
        5,
    )


def test_what_cannot_become_a_request_is_known_early() -> None:
    for data in (b"\x16\x03\x01", b"GET / HTTP/1.1\nHost: x\n\n", b" GET /", b"get"):
        assert is_hopeless(data, 0), data
    for data in (b"G", GET, b"\r", GET + b"X: "):
        assert not is_hopeless(data, 0), data
    assert is_hopeless(GET + b"X: 1\nY", len(GET))


def chunked(pieces: list[bytes], trailer: bytes = b"", extension: bytes = b"") -> bytes:
    return b"".join(b"%x%s\r\n%s\r\n" % (len(p), extension, p) for p in pieces) + b"0\r\n" + trailer + b"\r\n"


@given(
    st.lists(st.binary(min_size=1, max_size=40), max_size=5),
    st.sampled_from([b"", b"X-Trailer: 1\r\n", b"A: 1\r\nX-API-Key: stolen\r\n"]),
    st.sampled_from([b"", b";name", b";name=value"]),
    st.lists(st.integers(1, 30), min_size=1, max_size=30),
)
def test_a_chunked_body_ends_where_it_ends_in_whatever_pieces(
    pieces: list[bytes], trailer: bytes, extension: bytes, sizes: list[int]
) -> None:
    sent, follows = chunked(pieces, trailer, extension), b"GET /next HTTP/1.1\r\n"
    chunks, passed, rest, at = Chunks(), b"", None, 0
    stream = sent + follows
    for size in sizes * len(stream):
        part, rest = chunks.take(stream[at : at + size])
        passed, at = passed + part, at + size
        if rest is not None:
            break
    assert rest is not None and rest + stream[at:] == follows
    assert passed == chunked(pieces, b"", extension)


@pytest.mark.parametrize(
    "body",
    [
        b"g\r\n", b"-1\r\n", b"0x1\r\n", b" 1\r\n", b"1 \r\n", b"\r\n", b"1\n", b"1" * 13 + b"\r\n",
        b"1;" + b"a" * 300, b"1;" + b"a" * 300 + b"\r\n", b"1;a\rb\r\n", b"5\r\nabcdeX", b"5\r\nabcde\n",
        b"5\r\nabcde\rX",
        b"0\r\nno colon\r\n\r\n", b"0\r\nX: 1\r\n folded\r\n\r\n", b"0\r\nX: 1\n\n", b"0\r\nX: " + b"a" * 9000,
        b"0\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
    ],
)  # fmt: skip
def test_a_chunked_body_that_could_be_read_differently_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedRequest):
        Chunks().take(body)
    chunks = Chunks()
    with pytest.raises(MalformedRequest):
        for position in range(0, len(body), size := 1 + len(body) // 300):
            chunks.take(body[position : position + size])


def test_the_number_of_chunks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "MAX_CHUNKS", 3)
    assert Chunks().take(chunked([b"a"] * 3))[1] == b""
    with pytest.raises(MalformedRequest):
        Chunks().take(chunked([b"a"] * 4))
