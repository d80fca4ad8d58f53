"""One request's answer, fed like the wire would: reads with hand-made times go in, the figures of a record come out.

Every time is a multiple of 1/64 s, so that differences are exact. The request starts at 100 s.
"""

from __future__ import annotations

import gzip
import json
import random
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import pytest

from llmbench import (
    EVENT_LIMIT,
    LINGER,
    RAW_LIMIT,
    STATUSES,
    Config,
    Decoder,
    Exchange,
    Provider,
    bucket_ms,
    describe_body,
    event_text,
    log_bucket,
)

START = 100.0
TICK = 1 / 64


def at(ticks: float) -> float:
    """A moment, in 64ths of a second after the start."""
    return START + ticks * TICK


def sse(*messages: Any) -> bytes:
    """Events as a server writes them."""
    written = [message if isinstance(message, bytes) else json.dumps(message).encode() for message in messages]
    return b"".join(b"data: " + data + b"\n\n" for data in written)


def chunk(delta: Any = None, finish: Optional[str] = None, **more: Any) -> Dict[str, Any]:
    return {"id": "c1", "choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}], **more}


def text(value: str, **more: Any) -> bytes:
    return sse(chunk({"content": value}, **more))


def thought(value: str) -> bytes:
    return sse(chunk({"reasoning_content": value}))


def call(arguments: str) -> bytes:
    return sse(chunk({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": arguments}}]}))


def head(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join(["HTTP/1.1 " + status, *lines, "", ""]).encode()


def framed(data: bytes) -> bytes:
    """One chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


ROLE = sse(chunk({"role": "assistant", "content": ""}))
STOP = sse(chunk({}, "stop"))
COUNTS = {"prompt_tokens": 9, "completion_tokens": 2}
USAGE = sse({"choices": [], "usage": COUNTS})
DONE = sse(b"[DONE]")
ERROR = sse({"error": {"message": "boom", "code": 500}})
HEAD = head("Content-Type: text/event-stream", "Transfer-Encoding: chunked")
TO_CLOSE = head("Content-Type: text/event-stream")
END = b"0\r\n\r\n"


class Wire:
    """An exchange and the connection that feeds it."""

    def __init__(self, end_required: bool = True, **config: Any) -> None:
        self.provider = Provider(Config(model="m", **config))
        self.provider.end_required = end_required
        self.lags: Dict[int, int] = {}
        self.done = 0
        self.reads = 0
        self.exchange = Exchange(self.provider, self.lags, self._on_done)
        self.exchange.start = START

    def _on_done(self) -> None:
        self.done += 1
        assert self.exchange.status in STATUSES

    def read(self, data: bytes, ticks: float = 1, lag: float = 0, look: float = 0, kernel: bool = True) -> Wire:
        """One read: arrived at `ticks`, read `lag` ticks later, possibly there since `look` ticks before it arrived."""
        self.reads += 1
        stamp = at(ticks)
        self.exchange.received(data, stamp, stamp + lag * TICK, stamp - look * TICK, self.reads, kernel)
        return self

    def play(self, *reads: Tuple[float, bytes]) -> Wire:
        """Reads at their ticks."""
        for ticks, data in reads:
            self.read(data, ticks)
        return self

    def stream(self, *reads: Tuple[float, bytes], head: bytes = HEAD) -> Wire:
        """A chunked answer: the head at tick 1, then each read as one chunk."""
        return self.play((1, head), *[(ticks, framed(data)) for ticks, data in reads])

    def lost(self, clean: bool = True, reason: str = "connection closed") -> Wire:
        self.exchange.lost(clean, reason)
        return self

    @property
    def status(self) -> Optional[str]:
        assert self.done == (self.exchange.status is not None)  # on_done is called once, and only then
        return self.exchange.status

    @property
    def err(self) -> str:
        return self.exchange.err or ""

    @property
    def raw(self) -> str:
        return self.exchange.error_raw.decode()


def ticks(moment: Optional[float]) -> Optional[float]:
    return None if moment is None else (moment - START) / TICK


def times(wire: Wire) -> Dict[str, float]:
    """What METRICS defines, in ticks from the start; what is not known is absent."""
    exchange = wire.exchange
    first = exchange.content_at if exchange.content_at is not None else exchange.tool_at
    found = {"ttfb": exchange.ttfb_at, "ttfe": exchange.output_at, "ttft": first, "latency": exchange.end_at}
    return {name: (moment - START) / TICK for name, moment in found.items() if moment is not None}


# The definitions.


class Timed(NamedTuple):
    """A stream, the times that it has to have, and its status."""

    name: str
    reads: List[Tuple[float, bytes]]
    times: Dict[str, float]
    status: str = "ok"


TIMED = [
    Timed(
        "role frame is no content",
        [(2, ROLE), (5, text("a")), (7, text("b")), (9, STOP), (10, DONE)],
        {"ttfe": 5, "ttft": 5, "latency": 9},
    ),
    Timed(
        "keep-alive is no content",
        [(2, b": ping\n\n"), (3, ROLE), (6, text("a")), (9, DONE)],
        {"ttfe": 6, "ttft": 6, "latency": 9},
    ),
    Timed("whitespace is content", [(3, text("\n")), (6, text("a")), (9, DONE)], {"ttfe": 3, "ttft": 3, "latency": 9}),
    Timed("reasoning first", [(3, thought("hm")), (6, text("a")), (9, STOP)], {"ttfe": 3, "ttft": 6, "latency": 9}),
    Timed("reasoning only", [(3, thought("hm")), (9, STOP)], {"ttfe": 3, "latency": 9}),
    Timed(
        "tools only",
        [(3, call("")), (5, call("{}")), (9, sse(chunk({}, "tool_calls")))],
        {"ttfe": 3, "ttft": 3, "latency": 9},
    ),
    Timed("tool, then text", [(3, call("{}")), (6, text("a")), (9, STOP)], {"ttfe": 3, "ttft": 6, "latency": 9}),
    Timed("refusal", [(3, sse(chunk({"refusal": "No."}))), (9, STOP)], {"ttfe": 3, "ttft": 3, "latency": 9}),
    Timed(
        "typed parts",
        [(3, sse(chunk({"content": [{"type": "text", "text": "a"}]}))), (9, STOP)],
        {"ttfe": 3, "ttft": 3, "latency": 9},
    ),
    Timed(
        "text on the finish frame", [(7, sse(chunk({"content": "a"}, "stop")))], {"ttfe": 7, "ttft": 7, "latency": 7}
    ),
    Timed("[DONE] without finish reason", [(3, text("a")), (9, DONE)], {"ttfe": 3, "ttft": 3, "latency": 9}),
    Timed(
        "usage does not move the end",
        [(3, text("a")), (5, STOP), (8, USAGE), (9, DONE)],
        {"ttfe": 3, "ttft": 3, "latency": 5},
    ),
    Timed(
        "Azure's preface",
        [(2, sse({"choices": [], "prompt_filter_results": []})), (6, text("a")), (7, DONE)],
        {"ttfe": 6, "ttft": 6, "latency": 7},
    ),
    Timed(
        "think tags",
        [(2, text("<think>")), (4, text("hm")), (6, text("</think>a")), (8, text("b")), (9, STOP)],
        {"ttfe": 4, "ttft": 6, "latency": 9},
    ),
    Timed("not a think tag", [(2, text("<")), (4, text("b>")), (9, STOP)], {"ttfe": 2, "ttft": 2, "latency": 9}),
    Timed("held to the end", [(2, text("<thi")), (9, STOP)], {"ttfe": 2, "ttft": 2, "latency": 9}),
    Timed("filtered", [(2, text("a")), (9, sse(chunk({}, "content_filter")))], {"ttfe": 2, "ttft": 2, "latency": 9}),
]


@pytest.mark.parametrize("timed", TIMED, ids=[timed.name for timed in TIMED])
def test_times_are_as_defined(timed: Timed) -> None:
    wire = Wire().stream(*timed.reads)
    assert wire.status is None  # the body is not over
    wire.read(END, 20)
    assert wire.status == timed.status
    assert times(wire) == {"ttfb": 1, **timed.times}
    assert wire.exchange.over_at == at(timed.times["latency"])
    assert wire.exchange.reusable()


@pytest.mark.parametrize("timed", TIMED, ids=[timed.name for timed in TIMED])
def test_byte_by_byte_each_time_is_that_of_the_byte_that_completes_it(timed: Timed) -> None:
    """The last byte of an event is its second LF; the chunk's own line end comes after it."""
    wire = Wire().read(HEAD, 1)
    for moment, data in timed.reads:
        stream = framed(data)
        for index in range(len(stream) - 3):
            wire.read(stream[index : index + 1], moment - 0.5)
        wire.read(stream[-3:-2], moment)
        wire.read(stream[-2:], moment)
    for index in range(len(END)):
        wire.read(END[index : index + 1], 20)
    assert wire.status == timed.status
    assert times(wire) == {"ttfb": 1, **timed.times}


@pytest.mark.parametrize("closing", ["</think>", "hm</think>"])
def test_content_behind_a_closing_tag_of_its_own_frame_has_a_ttft(closing: str) -> None:
    wire = Wire().stream(
        (2, text("<think>")), (4, text("hm")), (6, text(closing)), (8, text("a")), (9, text("b")), (10, STOP)
    )
    wire.read(END, 20)
    assert times(wire) == {"ttfb": 1, "ttfe": 4, "ttft": 8, "latency": 10}
    assert wire.exchange.first_content == ("message", text("a")[6:-2])


def test_ttfb_is_the_first_byte_of_the_final_head() -> None:
    early = head("Link: </a>", status="103 Early Hints")
    for reads, ttfb in [
        ([(1, early), (4, HEAD[:1]), (5, HEAD[1:])], 4),
        ([(1, early[:5]), (2, early[5:]), (4, early), (6, HEAD)], 6),
        ([(1, early + HEAD[:1]), (5, HEAD[1:])], 1),
        ([(2, early[:-1]), (3, early[-1:] + HEAD)], 3),
        ([(2, HEAD[:1]), (5, HEAD[1:])], 2),
    ]:
        assert times(Wire().play(*reads)) == {"ttfb": ttfb}


def test_one_read_of_everything_has_one_time() -> None:
    whole = HEAD + framed(ROLE + text("a") + text("b") + STOP + USAGE + DONE) + END
    wire = Wire().read(whole, 6)
    assert wire.status == "ok"
    assert times(wire) == {"ttfb": 6, "ttfe": 6, "ttft": 6, "latency": 6}
    assert (wire.exchange.chunks, wire.exchange.chars) == (2, 2)


def test_finish_then_usage_then_done() -> None:
    wire = Wire().stream((2, text("Hi")), (3, STOP), (6, USAGE), (7, DONE))
    exchange = wire.exchange
    assert wire.status is None
    assert (exchange.finish_reason, exchange.ended_by) == ("stop", "done")
    assert exchange.usage == {"in_tokens": 9, "out_tokens": 2}
    wire.read(END, 8)
    assert wire.status == "ok"
    assert exchange.over_at == at(3)
    assert exchange.final_event == ("message", USAGE[6:-2])  # the frame before [DONE]
    assert exchange.first_content == ("message", text("Hi")[6:-2])


@pytest.mark.parametrize(
    ("frames", "usage"),
    [
        ([text("a"), STOP, USAGE], {"in_tokens": 9, "out_tokens": 2}),
        ([text("a"), sse(chunk({}, "stop", usage=COUNTS))], {"in_tokens": 9, "out_tokens": 2}),
        (
            [text(letter, usage={"prompt_tokens": 9, "completion_tokens": n}) for n, letter in enumerate("abc", 1)]
            + [STOP],
            {"in_tokens": 9, "out_tokens": 3},
        ),
        ([text("a"), STOP, USAGE, sse({"choices": [], "usage": {"completion_tokens": 5}})], {"out_tokens": 5}),
        (
            [text("a"), STOP, USAGE, sse({"choices": [], "usage": {"completion_tokens": 0}})],
            {"in_tokens": 9, "out_tokens": 2},
        ),
        ([text("a"), STOP, sse({"choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": 0}})], {}),
        ([text("a"), STOP], {}),
    ],
)
def test_the_last_usage_wins(frames: List[bytes], usage: Dict[str, int]) -> None:
    wire = Wire().stream(*[(2, frame) for frame in frames], (3, DONE)).read(END, 4)
    assert wire.status == "ok"
    assert wire.exchange.usage == usage


def test_no_output_tokens_beside_output_count_as_missing() -> None:
    nothing = sse({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 0}})
    wire = Wire().stream((2, text("a")), (3, STOP), (4, nothing), (5, DONE)).read(END, 6)
    assert wire.status == "ok"
    assert wire.exchange.usage == {"in_tokens": 9}


def test_characters_are_counted_by_kind() -> None:
    wire = (
        Wire()
        .stream((2, thought("hm")), (3, text("你好🤖")), (4, text("ab")), (5, call('{"a"')), (6, STOP))
        .read(END, 7)
    )
    exchange = wire.exchange
    assert (exchange.chars, exchange.reasoning_chars, exchange.chunks) == (11, 2, 4)


# Gaps between output frames.


def gaps_of(wire: Wire) -> Tuple[Dict[int, int], float, float, float]:
    exchange = wire.exchange
    return exchange.gaps, exchange.gap_sum, exchange.gap_min, exchange.gap_max


def test_gaps_are_between_output_frames_only() -> None:
    wire = Wire().stream((2, ROLE), (4, text("a")), (5, b": ping\n\n"), (7, text("b")), (11, thought("c")), (14, USAGE))
    assert gaps_of(wire) == ({log_bucket(3 * TICK): 1, log_bucket(4 * TICK): 1}, 7 * TICK, 3 * TICK, 4 * TICK)
    assert wire.exchange.chunks == 3


def test_frames_of_one_read_are_no_time_apart() -> None:
    wire = Wire().stream((4, text("a") + text("b") + text("c")), (6, text("d") + text("e")))
    assert gaps_of(wire) == ({0: 3, log_bucket(2 * TICK): 1}, 2 * TICK, 0.0, 2 * TICK)
    assert wire.exchange.chunks == 5


def test_one_frame_has_no_gap() -> None:
    assert Wire().stream((4, text("a")), (9, STOP)).exchange.gaps == {}


def test_the_histogram_is_fine_enough() -> None:
    for gap in (1e-7, 1e-6, 1.5e-6, 0.001, 0.0301, 1.0, 77.7, 600.0):
        assert bucket_ms(log_bucket(gap)) == pytest.approx(gap * 1000 if gap >= 1e-6 else 0.0, rel=0.01)


def test_chunk_times_are_kept_when_asked_for() -> None:
    reads = [(2, ROLE), (4, text("a")), (7, text("b") + text("c")), (9, STOP)]
    assert Wire().stream(*reads).exchange.chunk_times is None
    wire = Wire(record_chunks=True).stream(*reads)
    assert [ticks(moment) for moment in wire.exchange.chunk_times] == [4, 7, 7]


def test_gaps_add_up_to_the_span_of_the_output() -> None:
    wire = Wire(record_chunks=True).stream(
        (4, text("a")), (7, text("b")), (8, thought("c") + text("d")), (12, call("{}"))
    )
    exchange = wire.exchange
    assert exchange.gap_sum == exchange.chunk_times[-1] - exchange.output_at
    assert sum(exchange.gaps.values()) == exchange.chunks - 1 == len(exchange.chunk_times) - 1


def test_gaps_add_up_when_text_was_held_back() -> None:
    exchange = Wire(record_chunks=True).stream((4, text("<")), (7, text("b")), (8, text("c"))).exchange
    assert exchange.output_at == at(4)
    assert [ticks(moment) for moment in exchange.chunk_times] == [4, 7, 8]
    assert exchange.gap_sum == 4 * TICK


# Lag and slack: what the arrival times are worth.


def test_lag_is_the_read_behind_the_stamp() -> None:
    wire = Wire().read(HEAD, 1, lag=0).read(framed(ROLE), 2, lag=3).read(framed(text("a")), 4, lag=1)
    assert wire.exchange.lag == 3 * TICK
    assert wire.lags == {0: 1, log_bucket(3 * TICK): 1, log_bucket(TICK): 1}


def test_several_frames_in_a_read_lag_since_the_last_look() -> None:
    one, two = framed(text("a")), framed(text("a") + text("b"))
    for data, lag in [(one, 1), (two, 6)]:
        wire = Wire().read(HEAD, 1).read(data, 9, lag=1, look=5)
        assert wire.exchange.lag == lag * TICK


def test_a_look_that_has_just_been_adds_no_lag() -> None:
    wire = Wire().read(HEAD, 1).read(framed(text("a") + text("b")), 9, lag=2, look=-1)
    assert wire.exchange.lag == 2 * TICK
    assert wire.exchange.slack == 0.0


@pytest.mark.parametrize(
    ("reads", "slack"),
    [
        ([(text("a"), 5)], 0),  # alone in its read: the stamp is its own
        ([(ROLE + text("a"), 5)], 5),
        ([(text("a") + text("b"), 5)], 5),
        ([(text("a") + b": ping\n\n", 5)], 0),  # a comment is no frame
        ([(text("a"), 5), (text("b") + text("c"), 7)], 0),  # only the first content's read matters
        ([(ROLE, 5), (text("a"), 7)], 0),
        ([(thought("a") + thought("b"), 5), (text("c"), 7)], 0),
        ([(thought("a"), 5), (text("c") + text("d"), 7)], 7),
        ([(thought("a") + text("b"), 5)], 5),
        ([(call("a") + call("b"), 5)], 5),
        ([(ROLE + text("a"), -2)], 0),
    ],
)
def test_slack_is_how_much_too_late_ttft_may_be(reads: List[Tuple[bytes, float]], slack: float) -> None:
    wire = Wire().read(HEAD, 1)
    for number, (data, look) in enumerate(reads):
        wire.read(framed(data), 10 + number, look=look)
    assert wire.exchange.slack == slack * TICK


def test_a_look_that_turns_out_too_late_widens_the_slack_of_the_read_it_was_for() -> None:
    wire = Wire().read(HEAD, 1)
    exchange = wire.exchange
    assert exchange.received(framed(text("a") + text("b")), at(9), at(10), at(9), 7, True)
    assert exchange.slack == 0.0
    exchange.look_again(at(5))
    assert exchange.slack == 4 * TICK
    later = exchange.received(framed(text("c") + text("d")), at(11), at(12), at(11), 8, True)
    assert not later, "it did not bring the first content"
    exchange.look_again(at(1))
    assert exchange.slack == 4 * TICK


@pytest.mark.parametrize("first", ["\n", "<"])
def test_held_text_keeps_the_slack_of_its_own_read(first: str) -> None:
    wire = Wire().read(HEAD, 1).read(framed(ROLE + text(first)), 10, look=5).read(framed(text("a")), 12, look=1)
    assert wire.exchange.content_at == at(10)
    assert wire.exchange.slack == 5 * TICK


def test_parts_of_one_read_count_together() -> None:
    """TLS may hand over one read of the socket in several pieces."""
    wire = Wire().read(HEAD, 1)
    for data in (ROLE, text("a")):
        wire.exchange.received(framed(data), at(9), at(10), at(5), 7, True)
    assert wire.exchange.slack == 4 * TICK
    assert wire.exchange.lag == 5 * TICK


def test_one_read_without_kernel_stamp_tells_of_the_users_clock() -> None:
    assert Wire().read(HEAD, 1).exchange.kernel
    assert not Wire().read(HEAD, 1).read(framed(ROLE), 2, kernel=False).read(framed(text("a")), 3).exchange.kernel


# How an answer may end.


class Ending(NamedTuple):
    """What the wire did, and what becomes of the request."""

    name: str
    act: Callable[[], Wire]
    status: Optional[str]
    err: str = ""
    reusable: bool = False


def stream(*frames: bytes, end_required: bool = True, **config: Any) -> Wire:
    """An answer to its last chunk, the frames a read each from tick 2."""
    return Wire(end_required, **config).stream(*[(2 + n, frame) for n, frame in enumerate(frames)]).read(END, 30)


def to_close(*frames: bytes, clean: bool = True, **more: Any) -> Wire:
    """An answer that lasts until the connection closes."""
    wire = Wire(**more).play((1, TO_CLOSE), *[(2 + n, frame) for n, frame in enumerate(frames)])
    assert wire.status is None or wire.status == "stream_error"
    return wire.lost(clean)


def whole(body: Any, status: str = "200 OK", *lines: str) -> Wire:
    """An answer that is no stream."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Wire().read(head("Content-Length: %d" % len(data), *lines, status=status) + data, 5)


COMPLETION = {
    "choices": [{"message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
    "usage": COUNTS,
}
WITHOUT_END = "without an end"
CHUNK_CUT = framed(text("b"))[:-9]
HTML = b"<!DOCTYPE html><html><head><style>p{}</style></head><body><h1>502 Bad Gateway</h1>\n<p>nginx</p></body></html>"

ENDINGS = [
    Ending("all of it", lambda: stream(ROLE, text("a"), STOP, USAGE, DONE), "ok", reusable=True),
    Ending("no finish reason", lambda: stream(text("a"), DONE), "ok", reusable=True),
    Ending("no [DONE]", lambda: stream(text("a"), STOP), "ok", reusable=True),
    Ending("neither", lambda: stream(text("a")), "truncated", WITHOUT_END, reusable=True),
    Ending("neither, but optional", lambda: stream(text("a"), end_optional=True), "ok", reusable=True),
    Ending("neither, where none is required", lambda: stream(text("a"), end_required=False), "ok", reusable=True),
    Ending(
        "null is no finish reason",
        lambda: stream(text("a"), sse(chunk({}, "null"))),
        "truncated",
        WITHOUT_END,
        reusable=True,
    ),
    Ending(
        "empty finish reason", lambda: stream(text("a"), sse(chunk({}, ""))), "truncated", WITHOUT_END, reusable=True
    ),
    Ending("no LF behind [DONE]", lambda: stream(text("a"), b"data: [DONE]"), "ok", reusable=True),
    Ending("[DONE] cut", lambda: stream(text("a"), b"data: [DON"), "truncated", WITHOUT_END, reusable=True),
    Ending("finish frame without LF", lambda: stream(text("a"), STOP.rstrip()), "ok", reusable=True),
    Ending("unreachable end", lambda: Wire().stream((2, text("a")), (3, STOP), (4, DONE)), None),
    # Nothing came.
    Ending("role and end", lambda: stream(ROLE, STOP, DONE), "empty", "without any output", reusable=True),
    Ending("role only", lambda: stream(ROLE), "empty", "without any output", reusable=True),
    Ending("usage only", lambda: stream(USAGE, DONE), "empty", "without any output", reusable=True),
    Ending("comments only", lambda: stream(b": ping\n\n"), "empty", "without any output", reusable=True),
    Ending("no chunk", stream, "empty", "without any output", reusable=True),
    Ending("Content-Length 0", lambda: whole(b""), "empty", "without any output", reusable=True),
    Ending("204", lambda: Wire().read(head(status="204 No Content"), 1), "empty", "without any output", reusable=True),
    # Errors inside a 200.
    Ending("error", lambda: stream(ERROR), "stream_error", "500: boom"),
    Ending("error, then [DONE]", lambda: stream(text("a"), ERROR, DONE), "stream_error", "500: boom"),
    Ending("error, then finish reason", lambda: stream(text("a"), ERROR, STOP, DONE), "stream_error", "500: boom"),
    Ending("error after finish reason", lambda: stream(text("a"), STOP, ERROR), "stream_error", "500: boom"),
    Ending("error after [DONE]", lambda: stream(text("a"), STOP, DONE, ERROR), "ok", reusable=True),
    Ending("all in one read", lambda: stream(text("a") + ERROR + STOP + DONE), "stream_error", "500: boom"),
    Ending("error event", lambda: stream(b"event: error\n" + sse({"message": "x"})), "stream_error", "x"),
    Ending(
        "failed finish", lambda: stream(text("a"), sse(chunk({}, "network_error"))), "stream_error", "network_error"
    ),
    Ending("error unterminated", lambda: stream(text("a"), ERROR.rstrip()), "stream_error", "500: boom"),
    # Not SSE, not JSON, not HTTP.
    Ending("broken frame", lambda: stream(text("a"), b"data: {oops\n\n", STOP), "parse_error", "not JSON: '{oops'"),
    Ending("frame of a list", lambda: stream(text("a"), sse([1]), STOP), "parse_error", "not an object"),
    Ending("broken after [DONE]", lambda: stream(text("a"), DONE, b"data: {oops\n\n"), "ok", reusable=True),
    Ending("HTML", lambda: whole(HTML), "parse_error", "an HTML page"),
    Ending("HTML until the close", lambda: to_close(HTML), "parse_error", "an HTML page"),
    Ending("SSH", lambda: Wire().read(b"SSH-2.0-OpenSSH\r\n", 1), "parse_error", "not an HTTP/1.1 answer"),
    Ending("bad chunk size", lambda: Wire().read(HEAD + b"zz\r\n", 1), "parse_error", "not a chunk size"),
    Ending("brotli", lambda: Wire().read(head("Content-Encoding: br"), 1), "parse_error", "content coding"),
    # One JSON object in answer to a stream request.
    Ending("completion", lambda: whole(COMPLETION), "ok", reusable=True),
    Ending(
        "completion, no finish reason",
        lambda: whole({"choices": [{"message": {"content": "Hi"}}]}),
        "ok",
        reusable=True,
    ),
    Ending("completion of nothing", lambda: whole({"choices": [{"message": {"content": ""}}]}), "empty", reusable=True),
    Ending("completion, then a close", lambda: to_close(json.dumps(COMPLETION).encode()), "ok"),
    Ending(
        "blank lines, then completion",
        lambda: whole(b"\n\r\n \n" + json.dumps(COMPLETION).encode()),
        "ok",
        reusable=True,
    ),
    Ending("JSON error", lambda: whole({"error": {"message": "no", "code": 18}}), "stream_error", "18: no"),
    Ending("Qianfan's", lambda: whole({"error_code": 18, "error_msg": "QPS"}), "stream_error", "18: QPS"),
    Ending("JSON cut", lambda: whole(b'{"choices":[{"mess'), "parse_error", "not JSON"),
    Ending("JSON list", lambda: whole([COMPLETION]), "parse_error", "not an object"),
    # Other statuses.
    Ending(
        "401",
        lambda: whole({"error": {"message": "bad key"}}, "401 Unauthorized"),
        "auth_error",
        "HTTP 401: bad key",
        True,
    ),
    Ending("403", lambda: whole(b"", "403 Forbidden"), "auth_error", "HTTP 403: Forbidden", True),
    Ending("429", lambda: whole({"error": "slow"}, "429 Too Many Requests"), "rate_limited", "HTTP 429: slow", True),
    Ending("400", lambda: whole({"detail": "bad"}, "400 Bad Request"), "http_error", "HTTP 400: bad", True),
    Ending("404", lambda: whole({"detail": "Not Found"}, "404 Not Found"), "http_error", "HTTP 404: Not Found", True),
    Ending("502", lambda: whole(HTML, "502 Bad Gateway"), "http_error", "HTTP 502: 502 Bad Gateway nginx", True),
    Ending("503, empty", lambda: whole(b"", "503 "), "http_error", "HTTP 503", True),
    Ending("SSE-framed 400", lambda: whole(ERROR, "400 Bad Request"), "http_error", "HTTP 400: 500: boom", True),
    Ending(
        "redirect",
        lambda: whole(b"", "307 T", "Location: https://h/x"),
        "http_error",
        "redirect to https://h/x, which is not",
        True,
    ),
    Ending("redirect to nowhere", lambda: whole(b"", "302 Found"), "http_error", "HTTP 302: Found", True),
    Ending(
        "304", lambda: Wire().read(head(status="304 Not Modified"), 1), "http_error", "HTTP 304: Not Modified", True
    ),
    Ending(
        "503 cut short",
        lambda: Wire().read(head("Content-Length: 9", status="503 Busy") + b"x", 1).lost(),
        "truncated",
        "in the body",
    ),
    # The connection ends.
    Ending("lost at once", lambda: Wire().lost(), "truncated", "connection closed before the head"),
    Ending("reset at once", lambda: Wire().lost(False, "reset"), "truncated", "reset before the head"),
    Ending(
        "lost after 103", lambda: Wire().read(head(status="103 E"), 1).lost(), "truncated", "closed before the head"
    ),
    Ending("lost in the head", lambda: Wire().read(HEAD[:30], 1).lost(), "truncated", "closed in the head"),
    Ending("lost after the head", lambda: Wire().read(HEAD, 1).lost(), "truncated", "closed in the body"),
    Ending(
        "lost in a chunk",
        lambda: Wire().stream((2, text("a"))).read(CHUNK_CUT, 3).lost(),
        "truncated",
        "closed in the body",
    ),
    Ending("lost between chunks", lambda: Wire().stream((2, text("a"))).lost(), "truncated", "closed in the body"),
    Ending(
        "reset between chunks",
        lambda: Wire().stream((2, text("a"))).lost(False, "reset"),
        "truncated",
        "reset in the body",
    ),
    Ending(
        "lost in a length",
        lambda: Wire().read(head("Content-Length: 999") + text("a"), 1).lost(),
        "truncated",
        "in the body",
    ),
    Ending("lost after the finish", lambda: Wire().stream((2, text("a")), (3, STOP)).lost(), "ok"),
    Ending("reset after the finish", lambda: Wire().stream((2, text("a")), (3, STOP)).lost(False), "ok"),
    Ending("lost after [DONE]", lambda: Wire().stream((2, text("a")), (3, DONE)).lost(), "ok"),
    Ending("lost after an empty end", lambda: Wire().stream((2, ROLE), (3, DONE)).lost(), "empty"),
    Ending("lost after it all", lambda: stream(text("a"), DONE).lost(False), "ok", reusable=True),
    Ending("lost after an error", lambda: stream(text("a"), ERROR).lost(False), "stream_error", "boom"),
    Ending("closed after [DONE]", lambda: to_close(text("a"), DONE), "ok"),
    Ending("closed without an end", lambda: to_close(text("a")), "truncated", WITHOUT_END),
    Ending("closed, end optional", lambda: to_close(text("a"), end_optional=True), "ok"),
    Ending("closed, no end required", lambda: to_close(text("a"), end_required=False), "ok"),
    Ending(
        "reset, no end required",
        lambda: to_close(text("a"), clean=False, end_required=False),
        "truncated",
        "in the body",
    ),
    Ending("closed behind [DONE] without LF", lambda: to_close(text("a"), b"data: [DONE]"), "ok"),
    Ending(
        "reset behind [DONE] without LF",
        lambda: to_close(text("a"), b"data: [DONE]", clean=False),
        "truncated",
        "in the body",
    ),
    Ending("closed without output", lambda: to_close(ROLE), "empty", "without any output"),
    Ending("closed with an error", lambda: to_close(text("a"), ERROR), "stream_error", "500: boom"),
]


@pytest.mark.parametrize("ending", ENDINGS, ids=[ending.name for ending in ENDINGS])
def test_what_becomes_of_a_request(ending: Ending) -> None:
    wire = ending.act()
    assert wire.status == ending.status
    assert ending.err in wire.err
    assert (wire.err == "") is (ending.status in ("ok", None))
    assert wire.exchange.reusable() is ending.reusable
    assert wire.exchange.dead is (ending.name in ("lost at once", "reset at once"))
    if ending.status == "ok":
        assert wire.exchange.end_at is not None


def test_an_error_is_kept_as_it_came() -> None:
    assert stream(text("a"), ERROR, DONE).raw == ERROR[6:-2].decode()
    assert whole(HTML).raw == HTML.decode()
    assert whole({"detail": "x"}, "400 Bad").raw == '{"detail": "x"}'
    assert Wire().read(b"SSH-2.0\r\n", 1).raw == "SSH-2.0\r\n"
    assert len(stream(sse({"error": "x" * RAW_LIMIT * 2})).raw) == RAW_LIMIT
    assert len(whole(b"x" * RAW_LIMIT * 2, "500 Error").raw) == RAW_LIMIT


def test_a_whole_completion_has_no_ttft() -> None:
    wire = whole(COMPLETION)
    exchange = wire.exchange
    assert times(wire) == {"ttfb": 5, "latency": 5}
    assert not exchange.stream
    assert (exchange.chars, exchange.chunks, exchange.finish_reason) == (5, 1, "stop")
    assert exchange.usage == {"in_tokens": 9, "out_tokens": 2}


def test_a_whole_completion_ends_with_its_last_byte() -> None:
    data = json.dumps(COMPLETION).encode()
    wire = Wire().play((1, head("Content-Length: %d" % len(data))), (2, data[:9]), (7, data[9:]))
    assert (wire.status, times(wire)) == ("ok", {"ttfb": 1, "latency": 7})


def test_a_whole_answer_past_belief_is_refused() -> None:
    piece = b" " * (1 << 20)
    wire = Wire().read(head("Content-Length: %d" % (EVENT_LIMIT * 2)) + b"{", 1)
    for number in range(17):
        if wire.status is None:
            wire.read(piece, 2 + number)
    assert wire.status == "parse_error"
    assert "longer than" in wire.err


def test_a_refusal_of_any_size_is_read_to_its_end() -> None:
    size = 3 * RAW_LIMIT
    wire = Wire().read(head("Content-Length: %d" % size, status="500 Error"), 1)
    wire.read(b"x" * (size - 1), 2)
    assert wire.status is None
    assert wire.read(b"x", 3).status == "http_error"
    assert wire.exchange.reusable()


def test_a_compressed_stream_is_read_as_it_comes() -> None:
    members = [gzip.compress(frame) for frame in (ROLE, text("a"), STOP, DONE)]
    wire = Wire().stream(
        *[(2 + n, data) for n, data in enumerate(members)], head=HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\n"
    )
    assert times(wire) == {"ttfb": 1, "ttfe": 3, "ttft": 3, "latency": 4}
    assert wire.exchange.reader.coding == "gzip"
    assert wire.exchange.reader.body_bytes == sum(map(len, members))


def test_bytes_behind_the_answer_make_the_connection_useless() -> None:
    wire = Wire().stream((2, text("a")), (3, DONE)).read(END + b"HTTP/1.1 200 OK\r\n", 4)
    assert wire.status == "ok"
    assert not wire.exchange.reusable()


def test_the_explicit_end_is_told_once_and_at_once() -> None:
    wire, told = Wire(), []
    wire.exchange.on_end = lambda: told.append(ticks(wire.exchange.end_at))
    wire.stream((2, text("a")))
    assert told == []
    wire.play(*[(3 + n, framed(frame)) for n, frame in enumerate([STOP, USAGE, DONE])], (6, END))
    assert told == [3]


def test_finish_counts_once() -> None:
    wire = Wire().stream((2, text("a")))
    wire.exchange.finish("cancelled", "interrupt", at(3))
    wire.exchange.finish("ok", None, at(4))
    wire.lost()
    assert (wire.status, wire.err, wire.exchange.over_at) == ("cancelled", "interrupt", at(3))
    assert not wire.exchange.reusable()


@pytest.mark.parametrize("last", [DONE, ERROR], ids=["[DONE]", "error"])
def test_content_behind_the_end_is_not_read(last: bytes) -> None:
    config = {"think_tags": "off"}
    full = Wire(**config).stream((2, text("a") + last + text("\\b"))).exchange  # an escape: never read by the fast path
    fast = Wire(**config).stream((2, text("a") + last + text("bc"))).exchange
    assert (full.chunks, full.chars) == (1, 1)
    assert (fast.chunks, fast.chars) == (1, 1)


def test_usage_without_its_last_blank_line_is_read_at_a_clean_close() -> None:
    wire = to_close(text("a"), STOP, USAGE.rstrip())
    assert wire.status == "ok"
    assert wire.exchange.usage == {"in_tokens": 9, "out_tokens": 2}


def test_a_refusal_in_an_unknown_coding_is_still_a_refusal() -> None:
    wire = whole(b"\x1b\x03\0", "429 Too Many Requests", "Content-Encoding: br")
    assert (wire.status, wire.err) == ("rate_limited", "HTTP 429: Too Many Requests")


@pytest.mark.parametrize("body", [b"OK", b"no healthy upstream\n"])
def test_a_text_that_is_neither_sse_nor_json_is_a_parse_error(body: bytes) -> None:
    wire = whole(body)
    assert (wire.status, wire.raw) == ("parse_error", body.decode())


# Time-outs.


def deadline(wire: Wire) -> Tuple[float, str]:
    moment, which = wire.exchange.deadline()
    return moment - START, which


def test_deadlines() -> None:
    everything = {"timeout": 60.0, "ttft_timeout": 10.0, "idle_timeout": 4.0}
    wire = Wire(**everything)
    assert deadline(wire) == (4.0, "idle time-out (4s)")  # from the start, before anything came
    wire.read(HEAD, 3 / TICK)
    assert deadline(wire) == (7.0, "idle time-out (4s)")
    wire.read(framed(b": ping\n\n"), 6.5 / TICK)
    assert deadline(wire) == (10.0, "time-out (10s) for the first output")
    wire.read(framed(text("a")), 9 / TICK)
    assert deadline(wire) == (13.0, "idle time-out (4s)")
    wire.read(framed(text("b")), 59 / TICK)
    assert deadline(wire) == (60.0, "time-out (60s) for the whole request")
    wire.read(framed(STOP), 59.5 / TICK)
    assert deadline(wire) == (59.5 + LINGER, "linger")
    wire.read(framed(DONE), 61 / TICK)
    assert deadline(wire) == (59.5 + LINGER, "linger")  # counted from the end, not from what follows


def test_without_further_flags_only_the_whole_request_has_a_limit() -> None:
    wire = Wire(timeout=0.5)
    assert deadline(wire) == (0.5, "time-out (0.5s) for the whole request")
    assert deadline(wire.read(HEAD, 1)) == (0.5, "time-out (0.5s) for the whole request")


@pytest.mark.parametrize(
    ("frames", "status"),
    [([text("a"), STOP], "ok"), ([text("a"), DONE], "ok"), ([text("a"), STOP, USAGE], "ok"), ([ROLE, STOP], "empty")],
)
def test_patience_with_what_follows_the_end_is_no_time_out(frames: List[bytes], status: str) -> None:
    wire = Wire().stream(*[(2 + n, frame) for n, frame in enumerate(frames)])
    moment, which = wire.exchange.deadline()
    wire.exchange.expire(moment, which)
    assert wire.status == status
    assert not wire.exchange.reusable()
    if status == "ok":
        assert wire.exchange.over_at == wire.exchange.end_at


@pytest.mark.parametrize("reads", [[], [HEAD[:9]], [HEAD], [HEAD, framed(text("a"))], [HEAD, framed(text("<"))]])
def test_a_time_out_says_which(reads: List[bytes]) -> None:
    wire = Wire(timeout=2.0).play(*[(1 + n, data) for n, data in enumerate(reads)])
    moment, which = wire.exchange.deadline()
    wire.exchange.expire(moment + 0.25, which)
    assert (wire.status, wire.err) == ("timeout", "time-out (2s) for the whole request")
    assert wire.exchange.over_at == START + 2.25
    assert not wire.exchange.reusable()
    wire.lost()
    assert wire.status == "timeout"


# The same stream in any reads, whole or broken.

FULL = [
    ROLE + b"".join(text(word) for word in ("Hel", "lo", " 你好", "🤖", "\\", '"')) + STOP + USAGE + DONE,
    b": ping\n\n" * 3 + thought("hm") * 3 + text("a") * 4 + sse(chunk({"content": "!"}, "stop", usage=COUNTS)) + DONE,
    text("<think>") + text("hm") * 3 + text("</think>") + text("\n\nHi") * 2 + STOP + DONE,
    text("<") + text("b") * 5 + STOP.rstrip(),
    call("") + call("{}") * 3 + sse(chunk({}, "tool_calls")) + DONE,
    text("a") * 3 + ERROR + DONE,
    text("a") * 3,
    (ROLE + text("a") * 3 + STOP + DONE).replace(b"\n", b"\r\n"),
    json.dumps(COMPLETION).encode(),
    HTML,
]


def framings(body: bytes) -> List[bytes]:
    chunks = b"".join(framed(body[begin : begin + 50]) for begin in range(0, len(body), 50))
    return [
        HEAD + chunks + END,
        head("Content-Length: %d" % len(body)) + body,
        head(status="500 Error") + body,
        TO_CLOSE + body,
    ]


def figures(wire: Wire) -> Dict[str, Any]:
    exchange = wire.exchange
    names = ("status", "err", "chars", "reasoning_chars", "chunks", "usage", "finish_reason", "stream", "whole")
    found = {name: getattr(exchange, name) for name in names}
    if exchange.status == "stream_error":  # what follows an error is not read, or is in the same read
        found["usage"] = found["finish_reason"] = None
    return found


def played(wire: bytes, cuts: List[int], clean: bool = True) -> Wire:
    """Reads between the cuts, a tick apart, then the end of the connection."""
    play = Wire()
    for number, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(wire)])):
        if play.status is None:
            play.read(wire[begin:end], 1 + number, lag=0.5, look=1)
    return play.lost(clean)


@pytest.mark.parametrize("number", range(len(FULL)))
def test_figures_are_the_same_whatever_the_reads(number: int) -> None:
    chance = random.Random(number)
    for wire in framings(FULL[number]):
        expected = figures(played(wire, []))
        assert figures(played(wire, list(range(1, len(wire))))) == expected
        for _ in range(40):
            assert figures(played(wire, sorted(chance.sample(range(len(wire)), 3)))) == expected


class InFull(Wire):
    """The same, but every event is parsed as JSON: nothing is learnt from those before."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.exchange.decoder._learn = lambda *_: None  # type: ignore[method-assign]


def everything(wire: Wire) -> Dict[str, Any]:
    """All that an exchange knows, but for the tools it reads with."""
    tools = ("provider", "on_done", "on_end", "reader", "parser", "decoder", "think", "plain", "_consume")
    known = {name: value for name, value in vars(wire.exchange).items() if name not in tools}
    said = "".join(wire.exchange.said or [])  # in whatever pieces
    return {**known, "said": said, "crc": wire.exchange.decoder.crc, "body": wire.exchange.reader.body_bytes}


PLAIN_WORDS = [" tok", "a", " 你好", "🤖", "é", ",", "{}", "  "] * 3
WORDS = [*PLAIN_WORDS, "\\", '"', "\n", "\x7f", "<", "</think>", "data: ", ""]


def made_stream(chance: random.Random) -> List[bytes]:
    """A stream's events: one frame with ever another text, and whatever else may come between."""
    words, ends = chance.choice([PLAIN_WORDS, PLAIN_WORDS, WORDS]), chance.choice([b"\n"] * 6 + [b"\r\n"])
    others = [thought("hm"), call("{}"), b": ping\n\n", text("a", usage=COUNTS), STOP, DONE, ERROR, text("a", other=1)]
    events = [text(chance.choice(words)) for _ in range(chance.choice([3, 12, 12, 60]))]
    for _ in range(chance.choice([0, 0, 1, 3])):
        events.insert(chance.randrange(len(events)), chance.choice([*others, sse(b"{"), b"event: x\n" + text("x")]))
    events += [STOP, USAGE, DONE][: chance.choice([0, 1, 3, 3, 3])]
    return [event.replace(b"\n", ends) for event in [ROLE, *events]]


def made_wire(chance: random.Random) -> bytes:
    """A made stream on the wire, most often one event a chunk."""
    events = made_stream(chance)
    body = b"".join(events)
    form = chance.choice(["events", "events", "events", "one", "pieces", "to close"])
    if form == "to close":
        return TO_CLOSE + body
    if form == "one":
        events = [body]
    elif form == "pieces":
        events = [body[begin : begin + 100] for begin in range(0, len(body), 100)]
    return HEAD + b"".join(map(framed, events)) + chance.choice([END, END, END, b""])


def test_two_thousand_streams_read_as_if_every_event_were_parsed() -> None:
    chance, runs = random.Random(17), [0, 0]
    for number in range(2000):
        wire = made_wire(chance)
        config = {"think_tags": chance.choice(["off", "auto"]), "record_chunks": number % 2 == 0}
        fast, full = Wire(**config), InFull(**config)
        fast.exchange.said, full.exchange.said = [], []
        size = chance.choice([97, 400, 1448, 4096, len(wire)])
        cuts = sorted({*range(size, len(wire), size), *chance.sample(range(1, len(wire)), 2)})
        for read, (begin, end) in enumerate(zip([0, *cuts], [*cuts, len(wire)])):
            if fast.status is None:
                ticks, lag, look = read + chance.randrange(3), chance.randrange(2), chance.randrange(2)
                for wired in (fast, full):
                    wired.read(wire[begin:end], ticks, lag, look)
                assert everything(fast) == everything(full), (wire, cuts)
        assert everything(fast.lost()) == everything(full.lost()), (wire, cuts)
        runs[0] += fast.exchange.decoder._hits
        runs[1] += fast.exchange.chunks
    assert runs[0] > runs[1] / 2  # most were not parsed


def check_invariants(wire: Wire) -> None:
    """What holds for every answer, broken or not."""
    exchange = wire.exchange
    assert wire.status in STATUSES
    assert (exchange.err is None) is (wire.status == "ok")
    assert exchange.reasoning_chars <= exchange.chars
    assert sum(exchange.gaps.values()) == max(0, exchange.chunks - 1) or not exchange.stream
    assert 0 <= exchange.slack <= TICK
    assert 0 <= exchange.lag <= 1.5 * TICK
    order = [exchange.ttfb_at, exchange.output_at, exchange.content_at]
    seen = [moment for moment in order if moment is not None]
    assert seen == sorted(seen)
    assert all(START < moment <= exchange.arrived for moment in [*seen, exchange.end_at or exchange.arrived])
    if wire.status == "ok":
        assert exchange.end_at is not None
        assert exchange.chunks > 0
        assert exchange.over_at == exchange.end_at


def test_four_thousand_broken_answers_end_in_a_status() -> None:
    chance = random.Random(13)
    corpus = [wire for body in FULL for wire in framings(body)]
    statuses = set()
    for number in range(4000):
        wire = bytearray(corpus[number % len(corpus)])
        for _ in range(chance.choice([1, 1, 3])):
            begin, span = chance.randrange(len(wire)), chance.choice([1, 4, 40])
            change = chance.choice(["flip", "insert", "delete", "twice", "cut"])
            if change == "flip":
                wire[begin] ^= 1 << chance.randrange(8)
            elif change == "insert":
                wire[begin:begin] = chance.choice([b"\n", b"\r", b'"', b"0", b"\xff", b"data: {}\n\n", END, DONE])
            elif change == "delete":
                del wire[begin : begin + span]
            elif change == "twice":
                wire[begin:begin] = wire[begin : begin + span]
            else:
                del wire[begin:]
            wire = wire or bytearray(b"H")
        cuts = sorted(chance.randrange(len(wire)) for _ in range(chance.choice([0, 2, 9])))
        play = played(bytes(wire), cuts, chance.random() < 0.7)
        check_invariants(play)
        statuses.add(play.status)
    assert statuses >= {"ok", "truncated", "parse_error", "stream_error", "http_error", "empty"}


# What an error body and an event look like to a reader.


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", ""),
        (b"Not Found", "Not Found"),
        (b"  two\r\n  lines ", "two lines"),
        (b'{"error": {"message": "bad", "code": "x"}}', "x: bad"),
        (b'{"error": "bad"}', "bad"),
        (b'{"detail": "bad"}', "bad"),
        (b'{"message": "bad"}', "bad"),
        (b'{"object": "error", "message": "bad", "code": 400}', "400: bad"),
        (b'{"error_code": 18, "error_msg": "QPS"}', "18: QPS"),
        (b'{"error": {"message": "a\\n  b"}}', "a b"),
        (b'{"error": ', '{"error":'),
        (HTML, "502 Bad Gateway nginx"),
        (b"<script>evil()</script><p>hi", "hi"),
        (b"<html", "<html"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        ("错误".encode(), "错误"),
    ],
)
def test_an_error_body_in_one_line(body: bytes, words: str) -> None:
    assert describe_body(body) == words


@pytest.mark.parametrize(
    "body", [b"x" * 100000, b"<p>" * 100000, b"[" * 100000, b'{"error": "' + b"x" * 99999 + b'"}', b"<script>" * 9000]
)
def test_an_error_body_of_any_size_is_a_short_line(body: bytes) -> None:
    assert len(describe_body(body)) <= 300


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        (None, None),
        (("message", b"{}"), "data: {}"),
        (("message", b"{\n}"), "data: {\ndata: }"),
        (("error", b"{}"), "event: error\ndata: {}"),
        (("message", b""), "data: "),
        (("message", "好\u2028".encode()), "data: 好\u2028"),
        (("message", b"\xff"), "data: \ufffd"),
    ],
)
def test_an_event_as_it_stood_on_the_wire(event: Optional[Tuple[str, bytes]], shown: Optional[str]) -> None:
    assert event_text(event) == shown


@pytest.mark.parametrize("data", [b"x" * 200000, b"\n" * 200000])
def test_an_event_of_any_size_is_kept_in_64_kib(data: bytes) -> None:
    assert len(event_text(("message", data)).encode()) == RAW_LIMIT


@pytest.mark.parametrize("data", ["好".encode() * 50000, b"\xff" * 200000], ids=["CJK", "not UTF-8"])
def test_an_event_in_other_letters_is_kept_in_64_kib(data: bytes) -> None:
    assert len(event_text(("message", data)).encode()) <= RAW_LIMIT


class FailingDecoder(Decoder):
    """A user's code that did not expect this event."""

    def frames(self, event: Any) -> List[Any]:
        return [{}["tokens"]]

    def whole(self, message: Any) -> List[Any]:
        return [{}["tokens"]]


@pytest.mark.parametrize("body", [b'data: {"a":1}\n\n', b'{"a":1}'])
def test_code_of_a_users_that_fails_is_a_parse_error(body: bytes) -> None:
    class Failing(Provider):
        def decoder(self) -> Decoder:
            return FailingDecoder()

    done: List[int] = []
    exchange = Exchange(Failing(Config(model="m")), {}, lambda: done.append(1))
    exchange.received(TO_CLOSE + body, START, START, START, 1, True)
    exchange.lost(True, "connection closed")
    assert (exchange.status, exchange.err) == ("parse_error", "the provider's code failed: KeyError: 'tokens'")
    assert done == [1]
