"""SSE and NDJSON: the same events whatever the reads, each at the byte that completes it, at a cost like its length.

The oracle is `by_the_letter`: what WHATWG HTML says of interpreting an event stream, one byte at a time. The table of
vectors holds it in its turn.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Callable, Iterator, List, NamedTuple, Tuple

import pytest

from llmbench import STRAY, LooseSSEParser, NDJSONParser, ParseError, SSEParser

Events = List[Tuple[str, bytes]]
BOM = b"\xef\xbb\xbf"
EMOJI = "🤖".encode()
SEPARATORS = "a\u0085b\u2028c\u2029d\x0be\x0cf".encode()  # str.splitlines() would split at each of them


class Vector(NamedTuple):
    """A body, the events that it dispatches, and what its unterminated tail is worth after a clean end."""

    name: str
    wire: bytes
    events: Events
    tail: Events = []


def message(*data: bytes) -> Events:
    return [("message", each) for each in data]


VECTORS = [
    Vector("two data lines", b"data: a\ndata: b\n\n", message(b"a\nb")),
    Vector("no space", b"data:x\n\n", message(b"x")),
    Vector("CRLF", b"data:x\r\n\r\n", message(b"x")),
    Vector("CR", b"data:x\r\r", message(b"x")),
    Vector("CRLF and LF", b"data: a\r\ndata: b\n\r\n", message(b"a\nb")),
    Vector("CR, LF and CRLF", b"data: a\rdata: b\ndata: c\r\n\r\r\n", message(b"a\nb\nc")),
    Vector("CR then CRLF are two line ends", b"data: a\r\r\ndata: b\n\n", message(b"a", b"b")),
    Vector("byte order mark", BOM + b"data: a\n\n", message(b"a")),
    Vector("only one byte order mark", BOM + BOM + b"data: a\n\ndata: b\n\n", message(b"b")),
    Vector("byte order mark later", b"data: a\n\n" + BOM + b"data: b\n\ndata: c\n\n", message(b"a", b"c")),
    Vector("byte order mark in data", b"data: " + BOM + b"a\n\n", message(BOM + b"a")),
    Vector("not quite a byte order mark", b"\xef\xbbdata: a\n\ndata: b\n\n", message(b"b")),
    Vector("data without colon", b"data\n\n", message(b"")),
    Vector("data without colon twice", b"data\ndata\n\n", message(b"\n")),
    Vector("empty data", b"data:\n\n", message(b"")),
    Vector("one of two spaces", b"data:  two\n\n", message(b" two")),
    Vector("a tab is not the space", b"data:\ta\n\n", message(b"\ta")),
    Vector("comment", b": ping\n\n", []),
    Vector("comments before", b": a\n: b\n\n:\n\ndata: c\n\n", message(b"c")),
    Vector("comment inside", b"data: a\n: ping\ndata: b\n\n", message(b"a\nb")),
    Vector("field names are case-sensitive", b"Data: a\n\n", []),
    Vector("a space before the name", b" data: a\n\n", []),
    Vector("unknown field", b"error: {}\n\n", []),
    Vector("a longer name", b"data2: a\n\ndatax\n\n", []),
    Vector("the type does not leak", b"event: ping\n\ndata: a\n\n", message(b"a")),
    Vector("the type is reset", b"event: e\ndata: a\n\ndata: b\n\n", [("e", b"a"), ("message", b"b")]),
    Vector("type after data", b"data: a\nevent: e\n\n", [("e", b"a")]),
    Vector("last type wins", b"event: d\nevent: e\ndata: a\n\n", [("e", b"a")]),
    Vector("empty type", b"event: e\nevent:\ndata: a\n\n", message(b"a")),
    Vector("id", b"id: 7\ndata: a\n\ndata: b\n\n", message(b"a", b"b")),
    Vector("retry", b"retry: 10\n\nretry: x\ndata: a\n\n", message(b"a")),
    Vector("separators that are none", b"data: " + SEPARATORS + b"\n\n", message(SEPARATORS)),
    Vector("status comment", b':HTTP_STATUS/200\ndata:{"a":1}\n\n', message(b'{"a":1}')),
    Vector("colon in the value", b"data:a:b\n\n", message(b"a:b")),
    Vector("blank lines before", b"\n\r\n\r\ndata: a\n\n", message(b"a")),
    Vector("blank lines between", b"data: a\n\n\n\n\ndata: b\n\n", message(b"a", b"b")),
    Vector("emoji", b"data: " + EMOJI * 2 + b"\n\n", message(EMOJI * 2)),
    Vector("invalid UTF-8 stays bytes", b"data: \xff\xfe\n\n", message(b"\xff\xfe")),
    Vector("NUL", b"data: a\0b\n\n", message(b"a\0b")),
    Vector("pretty-printed JSON", b'data: {\ndata:   "a": 1\ndata: }\n\n', message(b'{\n  "a": 1\n}')),
    Vector("nothing", b"", []),
    # The unterminated tail counts when it is JSON or [DONE], and only then.
    Vector("tail: text", b"data: last", []),
    Vector("tail: text and LF", b"data: last\n", []),
    Vector("tail: JSON", b'data: {"a":1}', [], message(b'{"a":1}')),
    Vector("tail: JSON and LF", b'data: {"a":1}\n', [], message(b'{"a":1}')),
    Vector("tail: JSON and CR", b'data: {"a":1}\r', [], message(b'{"a":1}')),
    Vector("tail: typed", b"event: e\ndata: {}\n", [], [("e", b"{}")]),
    Vector("tail: two lines of JSON", b"data: {\ndata: }\n", [], message(b"{\n}")),
    Vector("tail: half of the JSON", b'data: {"a":', []),
    Vector("tail: [DONE]", b"data: a\n\ndata: [DONE]", message(b"a"), message(b"[DONE]")),
    Vector("tail: no space", b"data:[DONE]\r\n", [], message(b"[DONE]")),
    Vector("tail: half of [DONE]", b"data: [DON", []),
    Vector("tail: no data", b"event: e\n", []),
    Vector("tail: comment", b": ping", []),
    Vector("tail: comment that looks like it", b": data: {}", []),
    Vector("tail: half of a byte order mark", BOM[:2], []),
    Vector("tail: no text is not JSON", b"data:", []),
]

vectors = pytest.mark.parametrize("vector", VECTORS, ids=[vector.name for vector in VECTORS])


def by_the_letter(wire: bytes) -> Events:
    """WHATWG HTML section 9.2.6, one byte at a time: a CR ends its line without waiting for what follows."""
    events: Events = []
    line, kind, data = bytearray(), b"", []  # type: Tuple[bytearray, bytes, List[bytes]]
    previous = 0
    for byte in wire[3:] if wire.startswith(BOM) else wire:
        previous, before = byte, previous
        if byte == 0x0A and before == 0x0D:
            continue
        if byte not in (0x0A, 0x0D):
            line.append(byte)
            continue
        name, _, value = bytes(line).partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if not line:
            if data:
                events.append((kind.decode("utf-8", "replace") or "message", b"\n".join(data)))
            kind, data = b"", []
        elif name == b"data":
            data.append(value)
        elif name == b"event":
            kind = value
        line.clear()
    return events


def read_all(parser: SSEParser | NDJSONParser, pieces: Iterator[bytes] | List[bytes]) -> Events:
    return [event for piece in pieces for event in parser.feed(piece)]


def every_cut(wire: bytes) -> Iterator[List[bytes]]:
    """All the ways in which two reads may bring it."""
    for cut in range(len(wire) + 1):
        yield [wire[:cut], wire[cut:]]


def pieces_of(wire: bytes, size: int) -> List[bytes]:
    return [wire[begin : begin + size] for begin in range(0, len(wire), size)]


def random_pieces(wire: bytes, chance: random.Random) -> List[bytes]:
    cuts = sorted(chance.randrange(len(wire) + 1) for _ in range(chance.randrange(6)))
    return [wire[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(wire)])]


# Every vector, whatever the reads.


@vectors
def test_oracle_agrees_with_the_table(vector: Vector) -> None:
    assert by_the_letter(vector.wire) == vector.events


@vectors
def test_whole(vector: Vector) -> None:
    parser = SSEParser()
    assert parser.feed(vector.wire) == vector.events
    assert parser.tail() == vector.tail


@vectors
def test_every_cut(vector: Vector) -> None:
    for pieces in every_cut(vector.wire):
        parser = SSEParser()
        assert read_all(parser, pieces) == vector.events, pieces
        assert parser.tail() == vector.tail, pieces


@vectors
def test_byte_by_byte_no_event_is_early_or_late(vector: Vector) -> None:
    parser, events = SSEParser(), []  # type: Tuple[SSEParser, Events]
    for end in range(1, len(vector.wire) + 1):
        events += parser.feed(vector.wire[end - 1 : end])
        assert events == by_the_letter(vector.wire[:end]), vector.wire[:end]
    assert parser.tail() == vector.tail


@vectors
def test_what_follows_is_read_like_a_new_stream(vector: Vector) -> None:
    following = b"\n\ndata: next\n\n"
    for pieces in every_cut(vector.wire):
        parser = SSEParser()
        events = read_all(parser, [*pieces, following])
        assert events == by_the_letter(vector.wire + following)
        assert events[-1] == ("message", b"next")


@vectors
def test_empty_reads_change_nothing(vector: Vector) -> None:
    for first, second in every_cut(vector.wire):
        parser = SSEParser()
        assert read_all(parser, [b"", first, b"", b"", second, b""]) == vector.events


@vectors
def test_any_mix_of_line_ends(vector: Vector) -> None:
    chance = random.Random(vector.name)
    for _ in range(20):
        wire = b"".join(
            chance.choice([b"\n", b"\r", b"\r\n"]) if byte == b"\n" else byte for byte in pieces_of(vector.wire, 1)
        )
        expected = by_the_letter(wire)
        assert SSEParser().feed(wire) == expected, wire
        assert read_all(SSEParser(), pieces_of(wire, 1)) == expected, wire
        for pieces in every_cut(wire):
            assert read_all(SSEParser(), pieces) == expected, pieces


def test_random_streams_agree_with_the_oracle() -> None:
    chance = random.Random(2)
    line_ends = [b"\n", b"\n\n", b"\r", b"\r\n"]
    words = [*line_ends, b"data", b"event", b"id", b":", b": ", b" ", b"a", BOM, BOM[:1], BOM[1:2], EMOJI]
    for _ in range(4000):
        wire = b"".join(chance.choice(words) for _ in range(chance.randrange(24)))
        expected = by_the_letter(wire)
        for pieces in ([wire], pieces_of(wire, 1), random_pieces(wire, chance)):
            assert read_all(SSEParser(), pieces) == expected, pieces


# What servers put beside the fields.

PRETTY = b'{\n  "error": {\n    "code": 503\n  }\n}'
BESIDE = [
    Vector("field error", b'error: {"code":400}\n\n', [("error", b'{"code":400}')]),
    Vector(
        "field error without space", b'data: a\n\nerror:{"code":400}\n\n', [*message(b"a"), ("error", b'{"code":400}')]
    ),
    Vector(
        "field error beside data", b'data: a\nerror: {"code":400}\n\n', [*message(b"a"), ("error", b'{"code":400}')]
    ),
    Vector("field error, empty", b"error: {}\n\n", []),
    Vector("field error, no JSON", b"error: boom\n\n", []),
    Vector("a longer name", b'errors: {"code":400}\n\n', []),
    Vector("JSON of a line", b'data: a\n\n{"error_code":1}\n\n', [*message(b"a"), (STRAY, b'{"error_code":1}')]),
    Vector("JSON beside data", b'data: a\n{"error_code":1}\n\n', [*message(b"a"), (STRAY, b'{"error_code":1}')]),
    Vector(
        "JSON of lines", b"data: a\n\n" + PRETTY + b"\n\ndata: b\n\n", [*message(b"a"), (STRAY, PRETTY), *message(b"b")]
    ),
    Vector("list", b"[" + PRETTY + b"\n]\n\n", [(STRAY, b"[" + PRETTY + b"\n]")]),
    Vector("no JSON", b"{a\n\n[b\n\n", []),
    Vector("tail", b"data: a\n\n" + PRETTY + b"\n", message(b"a"), [(STRAY, PRETTY)]),
    Vector("tail: half of it", b"data: a\n\n" + PRETTY[:-1], message(b"a")),
]


@pytest.mark.parametrize("vector", BESIDE, ids=[vector.name for vector in BESIDE])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_what_stands_beside_the_fields(vector: Vector, end: bytes) -> None:
    wire = vector.wire.replace(b"\n", end)
    for pieces in [[wire], pieces_of(wire, 1), *every_cut(wire)]:
        parser = LooseSSEParser()
        assert read_all(parser, pieces) == vector.events, pieces
        assert parser.tail() == vector.tail, pieces


@vectors
def test_the_loose_reading_is_the_strict_one_where_nothing_stands_beside(vector: Vector) -> None:
    for pieces in ([vector.wire], pieces_of(vector.wire, 1)):
        loose = LooseSSEParser()
        assert (read_all(loose, pieces), loose.tail()) == (vector.events, vector.tail)


@pytest.mark.parametrize("mark", [b"", BOM], ids=["no mark", "byte order mark"])
def test_a_cr_never_waits_for_the_byte_after_it(mark: bytes) -> None:
    parser = SSEParser()
    assert parser.feed(mark + b"data: a\r") == []
    assert parser.feed(b"\r") == message(b"a")
    assert parser.feed(b"\n") == []  # belongs to the CR: not a second blank line
    assert parser.feed(b"data: b\r\n\r") == message(b"b")


def test_reads_after_the_tail_begin_anew() -> None:
    parser = SSEParser()
    parser.feed(b"data: {}")
    assert parser.tail() == message(b"{}")
    assert parser.tail() == []


# Size, and the work that it costs.


@pytest.mark.parametrize("size", [1, 7, 4096, 65536, 1 << 21])
def test_an_event_of_a_mebibyte(size: int) -> None:
    data = EMOJI * (1 << 18)
    wire = b"data: " + data + b"\r\n\r\ndata: [DONE]\n\n"
    assert read_all(SSEParser(), pieces_of(wire, size)) == message(data, b"[DONE]")


@pytest.mark.parametrize("parser", [SSEParser, NDJSONParser])
@pytest.mark.parametrize("size", [4096, 65536])
def test_past_16_mebibytes_the_peer_is_not_believed(parser: Callable, size: int) -> None:
    reader, piece = parser(), b"x" * size
    assert read_all(reader, [b"data: ", *[piece] * ((16 << 20) // size - 1)]) == []
    with pytest.raises(ParseError, match="longer than 16777216 bytes"):
        read_all(reader, [piece, piece])


@pytest.mark.parametrize(("parser", "end"), [(SSEParser, b"\n\n"), (NDJSONParser, b"\n")])
def test_the_limit_is_of_one_event_not_of_the_stream(parser: Callable, end: bytes) -> None:
    reader = parser(limit=40)
    wire = (b"data: " + b"x" * 30 + end) * 50
    assert len(read_all(reader, pieces_of(wire, 3))) == 50
    with pytest.raises(ParseError):
        read_all(reader, pieces_of(b"data: " + b"x" * 36, 3))


class Work:
    """Counts what a parser does to bytes: how many bytes its methods were called on, and how often it joined."""

    def __init__(self) -> None:
        self.scanned = self.joins = 0

    def __enter__(self) -> Work:
        self._before = sys.getprofile()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def _note(self, _frame: object, what: str, called: object) -> None:
        owner = getattr(called, "__self__", None)
        if what != "c_call" or not isinstance(owner, (bytes, bytearray)):
            return
        self.joins += getattr(called, "__name__", "") == "join"
        self.scanned += len(owner)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("parser", [SSEParser, NDJSONParser])
def test_an_event_of_many_reads_costs_work_like_its_length(parser: Callable, line_end: bytes) -> None:
    wire = b"data: " + b"x" * 60000 + line_end * 2
    reader, reads = parser(), pieces_of(wire, 10)
    with Work() as work:
        events = read_all(reader, reads)
    assert [len(data) for _, data in events] in ([60000], [60006])
    assert work.scanned < 6 * len(wire)  # each byte is looked at a few times, not once for each read
    assert work.joins < 10


def test_a_data_field_of_many_lines_costs_work_like_its_length() -> None:
    wire = b"data: x\n" * 8000 + b"\n"
    with Work() as work:
        events = read_all(SSEParser(), pieces_of(wire, 8))
    assert events == message(b"\n".join([b"x"] * 8000))
    assert work.scanned < 8 * len(wire)
    assert work.joins < 10


def test_the_work_counter_sees_a_quadratic_reader() -> None:
    buffer = b""
    with Work() as work:
        for piece in pieces_of(b"x" * 60000, 10):
            buffer += piece
            buffer.find(b"\n\n")
    assert work.scanned > 1000 * len(buffer)


@pytest.mark.parametrize("parser", [SSEParser, NDJSONParser])
def test_a_tail_nested_too_deeply_is_no_json(parser: Callable) -> None:
    reader = parser()
    reader.feed(b"data: " + b"[" * 200000 if parser is SSEParser else b"[" * 200000)
    assert reader.tail() == []


# Newline-delimited JSON.

NDJSON_VECTORS = [
    Vector("one line", b'{"a":1}\n', message(b'{"a":1}')),
    Vector("two lines", b'{"a":1}\n{"b":2}\n', message(b'{"a":1}', b'{"b":2}')),
    Vector("CRLF", b'{"a":1}\r\n{"b":2}\r\n', message(b'{"a":1}', b'{"b":2}')),
    Vector("blank lines", b'\n\r\n{"a":1}\n\n \t\n{"b":2}\n\n', message(b'{"a":1}', b'{"b":2}')),
    Vector("separators that are none", b'{"a":"' + SEPARATORS + b'"}\n', message(b'{"a":"' + SEPARATORS + b'"}')),
    Vector("emoji", b'"' + EMOJI + b'"\n', message(b'"' + EMOJI + b'"')),
    Vector("last line without LF", b'{"a":1}\n{"b":2}', message(b'{"a":1}'), message(b'{"b":2}')),
    Vector("last line with CR only", b'{"a":1}\r', [], message(b'{"a":1}')),
    Vector("half a line", b'{"a":1}\n{"b":', message(b'{"a":1}')),
    Vector("nothing", b"", []),
    Vector("blanks", b" \r\n \r\n ", []),
]

ndjson_vectors = pytest.mark.parametrize("vector", NDJSON_VECTORS, ids=[vector.name for vector in NDJSON_VECTORS])


@ndjson_vectors
def test_ndjson_at_every_cut(vector: Vector) -> None:
    for pieces in [[vector.wire], *every_cut(vector.wire)]:
        parser = NDJSONParser()
        assert read_all(parser, pieces) == vector.events, pieces
        assert parser.tail() == vector.tail, pieces
        assert parser.tail() == []


@ndjson_vectors
def test_ndjson_byte_by_byte_a_line_comes_with_its_lf(vector: Vector) -> None:
    parser, events = NDJSONParser(), []  # type: Tuple[NDJSONParser, Events]
    for end in range(1, len(vector.wire) + 1):
        events += parser.feed(vector.wire[end - 1 : end])
        lines = vector.wire[:end].split(b"\n")[:-1]
        assert events == message(*[line.strip() for line in lines if line.strip()])
    assert parser.tail() == vector.tail


def test_ndjson_random_objects_come_back() -> None:
    chance = random.Random(3)
    for _ in range(300):
        objects = [{"text": chance.choice(["a\nb", "\u2028", "🤖", ""]) * chance.randrange(9)} for _ in range(5)]
        lines = [json.dumps(each, ensure_ascii=False).encode() for each in objects]
        wire = b"".join(line + chance.choice([b"\n", b"\r\n"]) for line in lines)
        assert [json.loads(data) for _, data in read_all(NDJSONParser(), random_pieces(wire, chance))] == objects
