"""HTTP/1.1 as bytes: every answer read whole, byte by byte, at every cut, cut short, and with bytes behind it.

A case is written as the parts of an answer, each either framing or `Body`. That says when body bytes have to come out:
fed byte by byte, a byte of a `Body` gives itself at once and any other byte gives nothing.
"""

from __future__ import annotations

import gzip
import random
import time
import zlib
from typing import Dict, Iterator, List, NamedTuple, Tuple

import pytest

from llmbench import Decompressor, ParseError, ResponseReader, Truncated, UserError, encode_request, parse_head

NEXT = b"HTTP/1.1 200 OK\r\n"  # what a peer might send behind an answer
EMOJI = "🤖".encode()
EVENTS = b'data: {"a":"' + EMOJI + b'"}\r\n\r\ndata: [DONE]\n\n'


class Body(bytes):
    """The bytes of an answer that are its body."""


def head(*lines: str, status: str = "200 OK", version: str = "1.1", line_end: str = "\r\n") -> bytes:
    return line_end.join(["HTTP/%s %s" % (version, status), *lines, "", ""]).encode("latin-1")


CHUNKED = head("Transfer-Encoding: chunked")
BOTH = head("Content-Length: 3", "Transfer-Encoding: chunked")
EARLY = head("Link: </a>", status="103 Early Hints")


class Case(NamedTuple):
    """An answer in parts; `closes`: its body lasts until the connection closes; `reusable`: when read to its end."""

    name: str
    parts: List[bytes]
    closes: bool = False
    reusable: bool = True
    status: int = 200
    interim: int = 0

    @property
    def wire(self) -> bytes:
        return b"".join(self.parts)

    @property
    def body(self) -> bytes:
        return b"".join(part for part in self.parts if isinstance(part, Body))


def chunked(*parts: bytes) -> List[bytes]:
    return [CHUNKED, *parts]


CASES = [
    # Chunked.
    Case("one chunk", chunked(b"5\r\n", Body(b"hello"), b"\r\n0\r\n\r\n")),
    Case("two chunks", chunked(b"2\r\n", Body(b"he"), b"\r\n3\r\n", Body(b"llo"), b"\r\n0\r\n\r\n")),
    Case("no chunk", chunked(b"0\r\n\r\n")),
    Case("line ends in the data", chunked(b"6\r\n", Body(b"\r\n0\r\n\r"), b"\r\n0\r\n\r\n")),
    Case("hex in lower case", chunked(b"1a\r\n", Body(b"x" * 26), b"\r\n0\r\n\r\n")),
    Case("hex in upper case", chunked(b"1A\r\n", Body(b"x" * 26), b"\r\n0\r\n\r\n")),
    Case("leading zeros", chunked(b"0000000000005\r\n", Body(b"hello"), b"\r\n000\r\n\r\n")),
    Case("blanks behind the size", chunked(b"5 \t\r\n", Body(b"hello"), b"\r\n0  \r\n\r\n")),
    Case("extension", chunked(b"5;a=b\r\n", Body(b"hello"), b"\r\n0;last\r\n\r\n")),
    Case("extension with a quoted semicolon", chunked(b'5; a="b;c\\";d" ;e\r\n', Body(b"hello"), b"\r\n0\r\n\r\n")),
    Case("extensions that change", chunked(b"1;a\r\n", Body(b"x"), b"\r\n1;b\r\n", Body(b"y"), b"\r\n0\r\n\r\n")),
    Case("trailers", chunked(b"2\r\n", Body(b"hi"), b"\r\n0\r\nServer-Timing: a\r\nContent-Length: 9\r\n\r\n")),
    Case("LF only", [head("Transfer-Encoding: chunked", line_end="\n"), b"2\n", Body(b"hi"), b"\n0\nA: b\n\n"]),
    Case("LF and CRLF mixed", [CHUNKED, b"2\n", Body(b"hi"), b"\r\n1\r\n", Body(b"!"), b"\n0\r\n\n"]),
    Case("Chunked in another case", [head("TRANSFER-ENCODING: Chunked"), b"1\r\n", Body(b"x"), b"\r\n0\r\n\r\n"]),
    Case("events", chunked(b"%x\r\n" % len(EVENTS), Body(EVENTS), b"\r\n0\r\n\r\n")),
    Case("chunked beats Content-Length", [BOTH, b"5\r\n", Body(b"hello"), b"\r\n0\r\n\r\n"], reusable=False),
    # Content-Length.
    Case("Content-Length", [head("Content-Length: 5"), Body(b"hello")]),
    Case("Content-Length 0", [head("Content-Length: 0")]),
    Case("Content-Length with zeros", [head("Content-Length: 0005"), Body(b"hello")]),
    Case("Content-Length twice, alike", [head("Content-Length: 5", "content-length: 5"), Body(b"hello")]),
    Case("Content-Length list, alike", [head("Content-Length: 5, 5 ,5"), Body(b"hello")]),
    Case("Content-Length, LF only", [head("Content-Length: 5", line_end="\n"), Body(b"hello")]),
    Case("folded header", [head("X-Long: a", "  b", "\tc", "Content-Length: 2"), Body(b"hi")]),
    Case("no reason phrase", [head("Content-Length: 2", status="200"), Body(b"hi")]),
    Case("empty reason phrase", [head("Content-Length: 2", status="200 "), Body(b"hi")]),
    Case("latin-1 in the head", [head("X-Name: \xe9\xff", "Content-Length: 2", status="200 \xe9"), Body(b"hi")]),
    Case("an error", [head("Content-Length: 2", status="429 Too Many Requests"), Body(b"{}")], status=429),
    Case("close", [head("Content-Length: 2", "Connection: close"), Body(b"hi")], reusable=False),
    # No body, whatever the head says.
    Case("204", [head("Content-Length: 5", status="204 No Content")], status=204),
    Case("304", [head("Transfer-Encoding: chunked", status="304 Not Modified")], status=304),
    # Until the connection closes.
    Case("neither", [head(), Body(b"hello")], True, False),
    Case("neither, empty", [head()], True, False),
    Case("chunked not last", [head("Transfer-Encoding: chunked, other"), Body(b"2\r\nhi\r\n")], True, False),
    Case("HTTP/1.0", [head(version="1.0"), Body(b"hello")], True, False),
    Case("HTTP/1.0 with Content-Length", [head("Content-Length: 5", version="1.0"), Body(b"hello")], reusable=False),
    Case("HTTP/1.0, kept alive", [head("Content-Length: 5", "Connection: Keep-Alive", version="1.0"), Body(b"hello")]),
    # Interim answers.
    Case("100", [head(status="100 Continue"), head("Content-Length: 2"), Body(b"hi")], interim=1),
    Case("103 twice", [EARLY * 2, CHUNKED, b"2\r\n", Body(b"hi"), b"\r\n0\r\n\r\n"], interim=2),
    Case("103, LF only", [EARLY.replace(b"\r", b""), head("Content-Length: 2"), Body(b"hi")], interim=1),
]
FRAMED = [case for case in CASES if not case.closes]
CLOSED = [case for case in CASES if case.closes]


def parametrized(cases: List[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def pieces_of(wire: bytes, size: int) -> List[bytes]:
    return [wire[begin : begin + size] for begin in range(0, len(wire), size)]


def every_cut(wire: bytes) -> Iterator[Tuple[bytes, bytes]]:
    for cut in range(len(wire) + 1):
        yield wire[:cut], wire[cut:]


def read_all(reader: ResponseReader, pieces: List[bytes]) -> bytes:
    return b"".join([reader.feed(piece) for piece in pieces])


def finish(case: Case, reader: ResponseReader) -> None:
    """The peer's part is over: holds what a reader has to say then."""
    assert reader.complete is not case.closes
    reader.end()
    assert reader.complete
    assert (reader.head.status, reader.interim) == (case.status, case.interim)
    assert reader.body_bytes == len(case.body)
    assert reader.reusable() is case.reusable
    assert reader.leftover == b""


# Each answer, however it comes.


@parametrized(CASES)
def test_whole(case: Case) -> None:
    reader = ResponseReader()
    assert reader.feed(case.wire) == case.body
    finish(case, reader)


@parametrized(CASES)
def test_every_cut(case: Case) -> None:
    for pieces in every_cut(case.wire):
        reader = ResponseReader()
        assert read_all(reader, list(pieces)) == case.body, pieces
        finish(case, reader)


@parametrized(CASES)
def test_byte_by_byte_body_bytes_come_at_once_and_nothing_else_does(case: Case) -> None:
    reader, seen = ResponseReader(), 0
    for part in case.parts:
        for byte in pieces_of(part, 1):
            assert not reader.complete
            seen += 1
            assert reader.feed(byte) == (byte if isinstance(part, Body) else b""), case.wire[:seen]
    finish(case, reader)


@parametrized(CASES)
def test_empty_reads_change_nothing(case: Case) -> None:
    for first, second in every_cut(case.wire):
        reader = ResponseReader()
        assert read_all(reader, [b"", first, b"", second, b""]) == case.body
        finish(case, reader)


@parametrized(FRAMED)
def test_bytes_behind_the_answer_are_left(case: Case) -> None:
    wire = case.wire + NEXT
    for pieces in [[wire], pieces_of(wire, 1), [case.wire, NEXT], *map(list, every_cut(wire))]:
        reader = ResponseReader()
        assert read_all(reader, pieces) == case.body, pieces
        assert reader.complete
        assert reader.leftover == NEXT
        assert not reader.reusable()


@parametrized(CASES)
def test_until_it_is_complete_no_connection_is_reusable(case: Case) -> None:
    reader = ResponseReader()
    for byte in pieces_of(case.wire, 1):
        assert not reader.reusable()
        reader.feed(byte)


@parametrized([case for case in FRAMED if not case.interim])
def test_cut_short_anywhere_it_is_truncated_and_says_where(case: Case) -> None:
    for end in range(len(case.wire)):
        reader = ResponseReader()
        reader.feed(case.wire[:end])
        with pytest.raises(Truncated) as caught:
            reader.end()
        where = "before the head" if not end else "in the head" if end < len(case.parts[0]) else "in the body"
        assert str(caught.value) == where
        assert not reader.complete
        assert not reader.reusable()


def test_where_a_head_is_cut() -> None:
    before, inside = "before the head", "in the head"
    for wire, where in [(b"", before), (EARLY, before), (b"H", inside), (head()[:-1], inside), (EARLY + b"H", inside)]:
        reader = ResponseReader()
        reader.feed(wire)
        with pytest.raises(Truncated, match=where):
            reader.end()


@parametrized(CLOSED)
def test_a_close_ends_what_has_no_length(case: Case) -> None:
    for end in range(len(case.parts[0]), len(case.wire) + 1):
        reader = ResponseReader()
        reader.feed(case.wire[:end])
        assert not reader.complete
        reader.end()
        assert reader.complete
        reader.end()  # and once more does no harm


def test_chunk_borders_mean_nothing_wherever_they_are() -> None:
    for cut in range(1, len(EVENTS)):
        first, second = EVENTS[:cut], EVENTS[cut:]
        parts = [b"%x\r\n" % cut, first, b"\r\n%X;x\r\n" % len(second), second, b"\r\n0\r\n\r\n"]
        for size in (1, 2, 3, 1000):
            reader = ResponseReader()
            assert read_all(reader, pieces_of(CHUNKED + b"".join(parts), size)) == EVENTS
            assert reader.reusable()


def test_random_chunks_in_random_reads() -> None:
    chance = random.Random(1)
    for _ in range(500):
        body = bytes(chance.randrange(256) for _ in range(chance.randrange(300)))
        parts, rest = [CHUNKED], body
        while rest:
            size = chance.randint(1, len(rest))
            line = chance.choice(["%x", "%X", "00%x", '%x;a="b"', "%x "]) % size
            parts += [line.encode() + chance.choice([b"\r\n", b"\n"]), rest[:size], chance.choice([b"\r\n", b"\n"])]
            rest = rest[size:]
        wire = b"".join([*parts, b"0\r\n\r\n"])
        reader, position = ResponseReader(), 0
        while position < len(wire):
            size = chance.randint(1, 40)
            body = body[len(reader.feed(wire[position : position + size])) :]
            position += size
        assert body == b""
        assert reader.reusable()


EVENT_TEXTS = [b"a", b"b" * 40, "你好".encode(), b"\r\n", b"\r\n5\r\nhello", b"0\r\n\r\n", b"\r", b"\n"]


def framed(data: bytes, chance: random.Random, odd: float) -> bytes:
    """A chunk, most often as servers write it."""
    line, ends = "%x", (b"\r\n", b"\r\n")
    if chance.random() < odd:
        line = chance.choice(["%x", "%X", "00%x", '%x;a="b"', "%x ", "%x;\r"])
        ends = chance.choice([(b"\r\n", b"\n"), (b"\n", b"\r\n"), (b"\n", b"\n"), ends])
    return (line % len(data)).encode() + ends[0] + data + ends[1]


def long_body(chance: random.Random) -> Tuple[List[bytes], bytes]:
    """Some hundred chunks that look like those of a stream, on the wire and without their framing."""
    usual = EVENT_TEXTS[: chance.choice([3, 3, 8])]
    chunks = [b"data: %s\n\n" % chance.choice(usual) for _ in range(chance.randrange(100, 400))]
    odd = chance.choice([0, 0, 0.01, 1])
    return [framed(chunk, chance, odd) for chunk in chunks], b"".join(chunks)


@pytest.mark.parametrize("size", [1, 700, 1024, 1500, 4096, 65536])
def test_many_chunks_in_a_read_are_read_like_one_in_each(size: int) -> None:
    chance = random.Random(size)
    for _ in range(40):
        wire, body = long_body(chance)
        reader = ResponseReader()
        reads = [CHUNKED, *pieces_of(b"".join([*wire, b"0\r\n\r\n"]), size)]
        given = [reader.feed(read) for read in reads]
        assert b"".join(given) == body
        assert reader.reusable()
        assert reader.body_bytes == len(body)


def test_many_chunks_in_a_read_give_at_once_what_is_there() -> None:
    chance = random.Random(3)
    for _ in range(20):
        wire, body = long_body(chance)
        for end in (sum(map(len, wire[:50])), chance.randrange(2000)):
            whole, bytewise = ResponseReader(), ResponseReader()
            start = CHUNKED + b"".join(wire[:20])
            data = b"".join(wire)[len(start) - len(CHUNKED) : len(start) + end]
            whole.feed(start)
            expected = read_all(bytewise, pieces_of(start + data, 1))[whole.body_bytes :]
            assert whole.feed(data) == expected
            assert body[: whole.body_bytes].endswith(expected)


@pytest.mark.parametrize("odd", [b"6\r\nhell\r\n", b"5\r\nhello!\r\n", b"x\r\nhello\r\n", b"5\n\r\nhello\r\n"])
def test_a_false_chunk_among_many_is_refused(odd: bytes) -> None:
    good = b"5\r\nhello\r\n" * 300
    for before in (b"", good):
        reader = ResponseReader()
        reader.feed(CHUNKED + good)
        with pytest.raises(ParseError):
            reader.feed(before + odd + good)


def test_a_false_end_of_a_chunk_that_is_alone_in_its_read_is_refused() -> None:
    reader = ResponseReader()
    assert read_all(reader, [CHUNKED, b"5\r\nhello\r\n", b"5\r\nhello\r\n", b"5\r\nhelloXY"]) == b"hello" * 3
    with pytest.raises(ParseError):
        reader.feed(b"5\r\nhello\r\n")


def test_data_that_look_like_a_chunk_are_data() -> None:
    reader, chunk = ResponseReader(), b"5\r\nhello\r\n"
    assert read_all(reader, [CHUNKED, chunk, b"14\r\n", chunk, chunk, b"\r\n0\r\n\r\n"]) == b"hello" + chunk * 2
    assert reader.complete


def test_one_split_cuts_a_read_into_its_chunks() -> None:
    """However many there are, and the first of a new size costs only itself; data with CRLF are not split twice."""
    reader, chunks = ResponseReader(), [b"data: %d\n\n" % number for number in range(990, 1300)]
    reader.feed(CHUNKED)
    calls = []
    split = reader._split_chunks
    reader._split_chunks = lambda *words: calls.append(split(*words)) or calls[-1]  # type: ignore[method-assign]
    data = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    reader.feed(data)
    reader.feed(data)
    assert calls == [0, len(data)]
    crlf = b"8\r\ndata\r\n\r\n\r\n" * 200
    for _ in range(4):
        assert reader.feed(crlf) == b"data\r\n\r\n" * 200
    assert calls == [0, len(data), 0, 0]


# What is refused.

REFUSED = [
    ("HTML", b"<html>", "begins with '<"),
    ("SSH", b"SSH-2.0-OpenSSH_8.9\r\n", "begins with 'S"),
    ("HTTP/2", b"HTTP/2 200\r\n\r\n", "not an HTTP/1.1 answer"),
    ("HTTP/2 preface", b"\0\0\x12\x04\0\0\0\0\0", "not an HTTP/1.1 answer"),
    ("HTTP/0.9", b"hello", "not an HTTP/1.1 answer"),
    ("HTTP/1.2", b"HTTP/1.2 200 OK\r\n\r\n", "not an HTTP/1.1 answer"),
    ("lower case", b"http/1.1 200 OK\r\n\r\n", "not an HTTP/1.1 answer"),
    ("a blank line first", b"\r\nHTTP/1.1 200 OK\r\n\r\n", "not an HTTP/1.1 answer"),
    ("status of two digits", b"HTTP/1.1 20 OK\r\n\r\n", "not an HTTP/1.1 answer"),
    ("status of four digits", b"HTTP/1.1 2000 OK\r\n\r\n", "not an HTTP/1.1 answer"),
    ("status 999", b"HTTP/1.1 999 OK\r\n\r\n", "not an HTTP/1.1 answer"),
    ("no status", b"HTTP/1.1 OK\r\n\r\n", "not an HTTP/1.1 answer"),
    ("TLS alert", b"\x15\x03\x01\x00\x02\x02\x16", "not an HTTP/1.1 answer"),
    ("101", head("Upgrade: websocket", status="101 Switching Protocols"), "switched protocols"),
    ("header without colon", head("nonsense"), "without a name"),
    ("header without name", head(": x"), "without a name"),
    ("Content-Lengths that differ", head("Content-Length: 5", "Content-Length: 6"), "not one number"),
    ("Content-Length list that differs", head("Content-Length: 5, 6"), "not one number"),
    ("Content-Length negative", head("Content-Length: -5"), "not one number"),
    ("Content-Length signed", head("Content-Length: +5"), "not one number"),
    ("Content-Length hex", head("Content-Length: 0x5"), "not one number"),
    ("Content-Length empty", head("Content-Length:"), "not one number"),
    ("Content-Length with a gap", head("Content-Length: 5 5"), "not one number"),
    ("Content-Length past belief", head("Content-Length: " + "9" * 19), "not one number"),
    ("Content-Length in other digits", head("Content-Length: \xb2"), "not one number"),
    ("brotli", head("Content-Encoding: br", "Content-Length: 2"), "content coding 'br'"),
    ("zstd", head("Content-Encoding: zstd", "Content-Length: 2"), "content coding 'zstd'"),
    ("two codings", head("Content-Encoding: gzip, br", "Content-Length: 2"), "content coding"),
    ("no chunk size", CHUNKED + b"\r\n", "not a chunk size"),
    ("chunk size in words", CHUNKED + b"five\r\n", "not a chunk size"),
    ("chunk size negative", CHUNKED + b"-1\r\n", "not a chunk size"),
    ("chunk size signed", CHUNKED + b"+1\r\n", "not a chunk size"),
    ("chunk size 0x5", CHUNKED + b"0x5\r\n", "not a chunk size"),
    ("chunk size with underscore", CHUNKED + b"1_0\r\n", "not a chunk size"),
    ("chunk size of 17 digits", CHUNKED + b"10000000000000000\r\n", "not a chunk size"),
    ("chunk size, then a word", CHUNKED + b"5 x\r\n", "not a chunk size"),
    ("extension without size", CHUNKED + b";a=b\r\n", "not a chunk size"),
    ("events without chunks", CHUNKED + b"data: {}\n\n", "not a chunk size"),
    ("chunk longer than its size", CHUNKED + b"2\r\nhello\r\n0\r\n\r\n", "longer than its size"),
    ("chunk without its line end", CHUNKED + b"2\r\nhi0\r\n\r\n", "longer than its size"),
    ("chunk followed by CR alone", CHUNKED + b"2\r\nhi\rx\n", "longer than its size"),
    ("broken gzip", head("Content-Encoding: gzip", "Content-Length: 9") + b"x" * 9, "broken compressed body"),
    ("broken deflate", head("Content-Encoding: deflate", "Content-Length: 9") + b"\xff" * 9, "broken compressed body"),
]


@pytest.mark.parametrize(("wire", "words"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(wire: bytes, words: str) -> None:
    for pieces in [[wire], pieces_of(wire, 1), *map(list, every_cut(wire))]:
        with pytest.raises(ParseError, match=words if pieces == [wire] else None):
            read_all(ResponseReader(), pieces)


@pytest.mark.parametrize("garbage", [b"<html>", b"\r\n\r\n", b"SSH-2.0-x", b"HTTQ/1.1", b"HTTP 200", b"HTTP/2", b"\0"])
def test_garbage_is_found_at_its_first_wrong_byte(garbage: bytes) -> None:
    reader = ResponseReader()
    for index, byte in enumerate(pieces_of(garbage, 1)):
        if not b"HTTP/1.".startswith(garbage[: index + 1]):
            with pytest.raises(ParseError):
                reader.feed(byte)
            return
        assert reader.feed(byte) == b""
    pytest.fail("the garbage went unnoticed")


def test_an_error_shows_little_of_what_came() -> None:
    with pytest.raises(ParseError) as caught:
        ResponseReader().feed(b"<" + b"x" * 100000)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize("line", [b"X: " + b"y" * 70000, b"X: y\r\n" * 12000], ids=["one line", "many lines"])
def test_a_head_past_64_kib_is_refused(line: bytes) -> None:
    wire = head()[:-2] + line + b"\r\n\r\n"
    for size in (1500, 65536, len(wire)):
        with pytest.raises(ParseError, match="longer than 65536 bytes"):
            read_all(ResponseReader(), pieces_of(wire, size))


@pytest.mark.parametrize("size", [1000, 100000])
def test_a_head_just_below_64_kib_is_read(size: int) -> None:
    wire = head("X: " + "y" * 65000, "Content-Length: 2") + b"hi"
    assert read_all(ResponseReader(), pieces_of(wire, size)) == b"hi"


def test_the_limit_is_of_one_head() -> None:
    long = "X: " + "y" * 40000
    wire = head(long, status="103 Early Hints") * 3 + head(long, "Content-Length: 2") + b"hi"
    for size in (1500, len(wire)):
        assert read_all(ResponseReader(), pieces_of(wire, size)) == b"hi"


@pytest.mark.parametrize("begin", [b"", b"1;", b"1\r\nx\r\n1;a=", b"1\r\nx"])
def test_a_chunk_size_line_without_end_is_refused(begin: bytes) -> None:
    with pytest.raises(ParseError):
        read_all(ResponseReader(), [CHUNKED + begin, *[b"1" * 1024] * 9])


@pytest.mark.parametrize("line", [b"x" * 1024, b"a: b\r\n" * 170, b"a\n" * 512])
def test_trailers_without_end_are_refused(line: bytes) -> None:
    with pytest.raises(ParseError, match="trailers"):
        read_all(ResponseReader(), [CHUNKED + b"0\r\n", *[line] * 65])


def test_interim_answers_without_end_are_refused() -> None:
    interim = head(status="100 Continue")
    assert read_all(ResponseReader(), [interim * 100, head("Content-Length: 2") + b"hi"]) == b"hi"
    with pytest.raises(ParseError, match="interim"):
        read_all(ResponseReader(), [interim] * 101)


def test_what_a_read_unpacks_to_is_bounded() -> None:
    bomb = gzip.compress(bytes(64 << 20))
    assert len(bomb) < 65536
    with pytest.raises(ParseError, match="unpacks to more than"):
        Decompressor("gzip").feed(bomb)
    within = Decompressor("gzip").feed(gzip.compress(bytes(20 << 20)))
    assert len(within) == 20 << 20
    with pytest.raises(ParseError, match="unpacks to more than"):
        Decompressor("gzip").feed(gzip.compress(bytes(20 << 20)) * 2)


def test_sizes_with_extensions_are_not_all_kept() -> None:
    reader = ResponseReader()
    wire = b"".join(b"1;n=%060d\r\nx\r\n" % number for number in range(2000))
    assert read_all(reader, [CHUNKED, wire]) == b"x" * 2000
    assert not reader._sizes


def test_a_head_that_drips_is_read_once() -> None:
    """60,000 bytes one by one: 60,000 searches from its beginning are 20 s of CPU, this is less than one."""
    begin = time.process_time()
    long = head("X: " + "y\n z" * 12000, "Content-Length: 2") + b"hi"
    assert read_all(ResponseReader(), [long[at : at + 1] for at in range(len(long))]) == b"hi"
    assert time.process_time() - begin < 6.0


# The head.


def test_head_fields() -> None:
    found = parse_head(b"HTTP/1.0 404 Not  Found\r\nA:1\r\nb :  2 \r\nA: 3\r\nEmpty:\r\nC: x:y\r\n\tz")
    assert found == (0, 404, "Not  Found", {"a": "1, 3", "b": "2", "empty": "", "c": "x:y z"})


def test_waiting_tells_an_unfinished_head() -> None:
    reader, wire = ResponseReader(), EARLY + head("Content-Length: 1")
    states: List[Tuple[bool, int]] = []
    for byte in pieces_of(wire + b"x", 1):
        reader.feed(byte)
        if not states or states[-1] != (reader.waiting, reader.interim):
            states.append((reader.waiting, reader.interim))
    assert states == [(True, 0), (False, 1), (True, 1), (False, 1)]


# Whether the connection may carry another request.

REUSE = [
    ("1.1", ["Content-Length: 0"], True),
    ("1.1", ["Content-Length: 0", "Connection: keep-alive"], True),
    ("1.1", ["Content-Length: 0", "Connection: close"], False),
    ("1.1", ["Content-Length: 0", "Connection: Close"], False),
    ("1.1", ["Content-Length: 0", "Connection: x, close"], False),
    ("1.1", ["Content-Length: 0", "Connection: keep-alive", "Connection: close"], False),
    ("1.1", ["Content-Length: 0", "Connection: closed"], True),
    ("1.0", ["Content-Length: 0"], False),
    ("1.0", ["Content-Length: 0", "Connection: Keep-Alive"], True),
    ("1.0", ["Content-Length: 0", "Connection: keep-alive, close"], False),
    ("1.1", [], False),
    ("1.1", ["Connection: keep-alive"], False),
]


@pytest.mark.parametrize(("version", "lines", "reusable"), REUSE)
def test_reusable(version: str, lines: List[str], reusable: bool) -> None:
    reader = ResponseReader()
    reader.feed(head(*lines, version=version))
    reader.end()
    assert reader.reusable() is reusable


def test_chunked_in_http_1_0_is_not_reused() -> None:
    reader = ResponseReader()
    reader.feed(head("Transfer-Encoding: chunked", "Connection: keep-alive", version="1.0") + b"1\r\nx\r\n0\r\n\r\n")
    assert reader.complete
    assert not reader.reusable()


# Compressed bodies that nobody asked for.

PIECES = [b"data: one\n\n", b"data: two " + EMOJI + b"\n\n", b"data: " + b"x" * 5000 + b"\n\n", b"data: [DONE]\n\n"]
WINDOW_BITS = {"gzip": 31, "zlib": 15, "raw": -15}


def compress(form: str) -> List[bytes]:
    """PIECES, each flushed so that it can be decoded at once."""
    engine = zlib.compressobj(6, zlib.DEFLATED, WINDOW_BITS[form])
    flushed = [engine.compress(piece) + engine.flush(zlib.Z_SYNC_FLUSH) for piece in PIECES]
    return [*flushed[:-1], flushed[-1] + engine.flush()]


def members() -> List[bytes]:
    return [gzip.compress(piece) for piece in PIECES]


COMPRESSED = [
    pytest.param("gzip", compress("gzip"), id="gzip"),
    pytest.param("X-GZip", compress("gzip"), id="x-gzip"),
    pytest.param("gzip", members(), id="gzip members"),
    pytest.param("deflate", compress("zlib"), id="deflate with its wrapper"),
    pytest.param("deflate", compress("raw"), id="raw deflate"),
]


@pytest.mark.parametrize(("coding", "flushed"), COMPRESSED)
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_compressed_pieces_are_decoded_as_they_come(coding: str, flushed: List[bytes], framing: str) -> None:
    size = len(b"".join(flushed))
    lines = {"length": ["Content-Length: %d" % size], "chunked": ["Transfer-Encoding: chunked"], "close": []}
    reader = ResponseReader()
    reader.feed(head("Content-Encoding: " + coding, *lines[framing]))
    for piece, plain in zip(flushed, PIECES):
        wire = b"%x\r\n%s\r\n" % (len(piece), piece) if framing == "chunked" else piece
        assert reader.feed(wire) == plain
    reader.feed(b"0\r\n\r\n" if framing == "chunked" else b"")
    reader.end()
    assert reader.coding == coding.lower()
    assert reader.body_bytes == size  # before decompression
    assert reader.reusable() is (framing != "close")


def decode_piecewise(coding: str, flushed: List[bytes], size: int) -> List[bytes]:
    """What each flushed piece gives, fed in reads of `size` bytes."""
    engine = Decompressor(coding.lower())
    return [b"".join([engine.feed(part) for part in pieces_of(piece, size)]) for piece in flushed]


@pytest.mark.parametrize(("coding", "flushed"), COMPRESSED)
@pytest.mark.parametrize("size", [2, 3, 100])
def test_compressed_in_small_reads_nothing_is_held_past_its_flush(coding: str, flushed: List[bytes], size: int) -> None:
    assert decode_piecewise(coding, flushed, size) == PIECES


@pytest.mark.parametrize(("coding", "flushed"), COMPRESSED[:-1])
def test_compressed_byte_by_byte_nothing_is_held_past_its_flush(coding: str, flushed: List[bytes]) -> None:
    assert decode_piecewise(coding, flushed, 1) == PIECES


def test_raw_deflate_byte_by_byte_nothing_is_held_past_its_flush() -> None:
    assert decode_piecewise("deflate", compress("raw"), 1) == PIECES


@pytest.mark.parametrize(("coding", "flushed"), COMPRESSED)
def test_compressed_at_every_cut(coding: str, flushed: List[bytes]) -> None:
    wire = b"".join(flushed)
    for cut in range(2, len(wire)):  # one byte first is held apart, byte by byte
        engine = Decompressor(coding.lower())
        assert engine.feed(wire[:cut]) + engine.feed(wire[cut:]) == b"".join(PIECES)


def test_identity_is_no_coding() -> None:
    reader = ResponseReader()
    assert reader.feed(head("Content-Encoding: identity", "Content-Length: 2") + b"hi") == b"hi"
    assert reader.coding == ""


def test_gzip_as_transfer_coding_is_decoded_or_refused() -> None:
    data = gzip.compress(b"data: {}\n\n")
    reader = ResponseReader()
    try:
        body = reader.feed(head("Transfer-Encoding: gzip, chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
    except ParseError:
        return
    assert body == b"data: {}\n\n"


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_without_a_body_a_content_coding_does_not_matter(status: str) -> None:
    reader = ResponseReader()
    assert reader.feed(head("Content-Encoding: br", status=status)) == b""
    assert reader.complete


# The request.


def test_request_bytes() -> None:
    headers = [("Host", "h"), ("X-Name", "\xe9"), ("Content-Length", "2")]
    assert encode_request("POST", "/v1?a=b", headers, b"{}") == (
        b"POST /v1?a=b HTTP/1.1\r\nHost: h\r\nX-Name: \xe9\r\nContent-Length: 2\r\n\r\n{}"
    )
    assert encode_request("GET", "/", []) == b"GET / HTTP/1.1\r\n\r\n"


INJECTIONS: Dict[str, Tuple[str, str]] = {
    "CRLF in a value": ("X-A", "a\r\nX-Evil: 1"),
    "LF in a value": ("X-A", "a\nX-Evil: 1"),
    "CR in a value": ("X-A", "a\rX-Evil: 1"),
    "CRLF in a name": ("X-A: a\r\nX-Evil", "1"),
    "line end behind": ("Authorization", "Bearer sk-secret\n"),
    "two line ends": ("X-A", "\r\n\r\nGET / HTTP/1.1"),
    "NUL": ("X-A", "a\0b"),
    "DEL": ("X-A", "a\x7f"),
}


@pytest.mark.parametrize("header", INJECTIONS.values(), ids=INJECTIONS.keys())
def test_no_header_can_split_the_head(header: Tuple[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        encode_request("POST", "/", [("Host", "h"), header])
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize("header", [("X-A", "模型"), ("X-A", "a\u010ab"), ("X-A", "\u2028")])
def test_what_latin_1_cannot_hold_is_refused(header: Tuple[str, str]) -> None:
    with pytest.raises(UserError, match="latin-1"):
        encode_request("POST", "/", [header])


@pytest.mark.parametrize("target", ["/a\r\nX-Evil: 1", "/a b", "/\xe9", "/\x7f"])
def test_a_request_target_is_visible_ascii(target: str) -> None:
    with pytest.raises(UserError):
        encode_request("POST", target, [("Host", "h")])
