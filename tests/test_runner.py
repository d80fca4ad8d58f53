"""The runner against endpoints that answer, fail, stall and lie: what is sent, and what the records say of it."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time

import pytest
from servers import (
    CHUNKED,
    CLOSED,
    DONE,
    HELLO,
    LAST_CHUNK,
    PATIENCE,
    Server,
    answer,
    chunk,
    closed_port,
    event,
    event_loop,
    full_listener,
    measure,
    measure_one,
    mock_server,
    prepare,
    says,
    settings,
    streamed,
    usage,
)  # fmt: skip

import llmbench

STOP = event(finish="stop")


TEXT = event("Hello")


def say_hello(peer, _request):
    peer.send(HELLO)


# The closed loop.


@pytest.mark.parametrize("streams", [1, 8])
def test_closed_loop_keeps_exactly_n_in_flight(streams):
    """The server answers only when N requests are there: fewer would hang, and it counts whether there were more."""
    gate = threading.Barrier(streams)

    def behave(peer, _):
        gate.wait(PATIENCE)
        peer.send(HELLO)

    with Server(behave) as server:
        measured = measure(server.url, concurrency=streams, total_requests=4 * streams)
    assert measured.statuses == ["ok"] * 4 * streams
    assert server.most_in_flight == streams
    assert len(server.requests) == 4 * streams
    assert server.connections == streams, "each stream keeps its connection"
    assert [record["reused"] for record in measured.records].count(False) == streams


def test_fewer_requests_than_streams():
    with Server(say_hello) as server:
        measured = measure(server.url, concurrency=8, total_requests=3)
        assert measured.statuses == ["ok"] * 3
        assert len(server.requests) == 3


def test_every_request_is_made_once_with_its_own_id_and_the_prompts_in_order():
    with Server(say_hello) as server:
        measured = measure(server.url, concurrency=[1, 2], total_requests=5, warmup=2)
    expected = ["run-%d-%d" % (stage, number) for stage in (0, 1) for number in range(7)]
    assert sorted(server.ids) == expected
    assert sorted(record["request_id"] for record in measured.records) == expected
    for record in measured.records:
        stage, number = map(int, record["request_id"].split("-")[1:])
        assert record["stage"] == stage
        assert record["prompt_id"] == "p%d" % (number % 3)
        assert record["phase"] == ("warmup" if number < 2 else "measure")
    assert [(audit["stage"], audit["started"]) for audit in measured.audits] == [(0, 5), (1, 5)]


def test_warmup_ends_before_the_measurement_begins_at_its_load():
    phases = []
    with Server(say_hello) as server:
        measured = measure(server.url, concurrency=4, total_requests=8, warmup=8)
        phases = [request.id for request in sorted(server.requests, key=lambda request: request.at)]
    numbers = [int(name.split("-")[-1]) for name in phases]
    assert max(numbers[:8]) < 8 <= min(numbers[8:])
    assert len(measured.of_phase("warmup")) == len(measured.of_phase("measure")) == 8
    assert server.connections == 4, "the measurement goes on with the warm connections"
    assert all(record["reused"] for record in measured.of_phase("measure"))


def test_duration_starts_nothing_more_and_lets_what_is_in_flight_finish():
    def behave(peer, _):
        time.sleep(0.03)
        peer.send(HELLO)

    with Server(behave) as server:
        measured = measure(server.url, concurrency=4, duration=0.25)
    assert set(measured.statuses) == {"ok"}
    assert len(measured.records) == len(server.requests) >= 8
    starts = [record["start_ms"] for record in measured.records]
    assert max(starts) - min(starts) < 250.0 + 20.0
    assert max(starts) - min(starts) > 150.0
    assert measured.seconds < 2


def test_duration_and_total_whichever_comes_first():
    with Server(say_hello) as server:
        measured = measure(server.url, duration=PATIENCE, total_requests=7)
    assert len(measured.records) == 7
    assert measured.seconds < PATIENCE / 2


def test_what_is_in_flight_past_the_grace_is_cancelled():
    def behave(peer, request):
        if request.number:
            peer.send(CHUNKED + chunk(TEXT))
            peer.hold()
        peer.send(HELLO)

    with Server(behave) as server:
        measured = measure(server.url, concurrency=3, duration=0.2, grace=0.2)
    assert sorted(set(measured.statuses)) == ["cancelled", "ok"]
    assert measured.statuses.count("cancelled") == 3
    assert all("grace" in record["err"] for record in measured.records if record["status"] == "cancelled")
    assert 0.4 <= measured.seconds < 2
    assert all("latency_ms" not in record for record in measured.records if record["status"] == "cancelled")


def test_a_request_that_is_connecting_past_the_grace_is_cancelled():
    with Server(lambda peer, _: peer.close()) as server, full_listener() as silent:

        def lead_astray(runner, _):
            async def addresses():
                port = server.port if not server.requests else silent
                return [(2, 1, 6, "", ("127.0.0.1", port))]

            runner.network._addresses = lambda: llmbench.asyncio.ensure_future(addresses())

        measured = measure(server.url, during=lead_astray, duration=0.2, grace=0.1, connect_timeout=PATIENCE)
    assert measured.statuses == ["cancelled"]
    assert measured.seconds < 2
    assert not measured.complaints


# Connections.


def test_answers_that_close_the_connection_are_each_measured_on_a_new_one():
    closing = HELLO.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    with Server(says(closing, "close")) as server:
        measured = measure(server.url, concurrency=2, total_requests=10)
    assert measured.statuses == ["ok"] * 10
    assert server.connections == 10
    for record in measured.records:
        assert record["reused"] is False
        assert record["connect_ms"] > 0
        assert "retried" not in record
        assert record["queue_ms"] < 20.0, "the time of connecting is not the client's queue"


def test_idle_connection_that_turns_out_dead_is_replaced_once_and_the_request_seen_once():
    """The server resets the connection when the second request arrives, without having read it."""
    pause = 0.1

    def behave(peer, _):
        peer.send(HELLO)
        if not server.connections > 1:
            peer.wait_for_bytes()
            time.sleep(pause)
            peer.reset()

    with Server(behave) as server:
        measured = measure(server.url, total_requests=3)
    assert measured.statuses == ["ok"] * 3
    assert server.ids == ["run-0-0", "run-0-1", "run-0-2"]
    assert server.connections == 2
    _, second, third = measured.records
    assert [record.get("retried") for record in measured.records] == [None, True, None]
    assert second["reused"] is False and third["reused"] is True
    assert second["ttft_ms"] < 1000.0 * pause / 2, "start is taken anew"
    assert second["ttft_from_scheduled_ms"] > 1000.0 * pause, "what a user waited is not hidden"
    assert not measured.complaints


def test_connection_that_closed_while_idle_is_replaced():
    def behave(peer, _):
        peer.send(HELLO)
        peer.close()  # unannounced

    with Server(behave) as server:
        measured = measure(server.url, total_requests=6)
    assert measured.statuses == ["ok"] * 6
    assert sorted(set(server.ids)) == ["run-0-%d" % number for number in range(6)]


def test_nothing_is_retried_after_a_byte():
    def behave(peer, request):
        if request.number == 1:
            peer.send(b"H")
            peer.reset()
        peer.send(HELLO)

    with Server(behave) as server:
        measured = measure(server.url, total_requests=3)
    assert measured.statuses == ["ok", "truncated", "ok"]
    assert server.ids == ["run-0-0", "run-0-1", "run-0-2"]
    assert "in the head" in measured.records[1]["err"]
    assert "retried" not in measured.records[1]


def test_a_dead_connection_is_replaced_once_only():
    with Server(lambda peer, _: peer.reset()) as server:
        measured = measure(server.url, total_requests=2)
        assert measured.statuses == ["truncated"] * 2
        for name in ("run-0-0", "run-0-1"):
            assert 1 <= server.ids.count(name) <= 2
    assert all("before the head" in record["err"] for record in measured.records)


def test_answer_to_nothing_is_never_taken_for_the_next_answer():
    """A second answer behind the first: a cache poisoner's, or a broken proxy's."""
    other = streamed(event("smuggled"), STOP, DONE)
    with Server(says(HELLO + other)) as server:
        measured = measure(server.url, total_requests=4)
    assert measured.statuses == ["ok"] * 4
    assert [record["out_chars"] for record in measured.records] == [5] * 4
    assert server.connections == 4, "a connection that brought too much is not used again"


def test_answer_that_comes_before_the_request_is_sent_twice():
    """Bytes on an idle connection, before the next request: it is closed, and the request goes out on a new one."""
    with Server(say_hello) as server:

        def poison(runner, loop):
            sink = runner.sink

            def keep(line):
                sink(line)
                if line.get("request_id") == "run-0-0":
                    server.peers[0].send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nsmuggled!")

            runner.sink = keep

        measured = measure(server.url, during=poison, total_requests=2)
    assert measured.statuses[0] == "ok"
    assert measured.records[1]["status"] in ("ok", "parse_error", "empty"), "sent before or after the poison was read"
    assert not measured.complaints


# What becomes of a request: one row an answer. (name, bytes, what the peer does then, status, part of err, settings)

CUT = streamed(TEXT, TEXT, STOP)[: -len(LAST_CHUNK)]
ERROR = b'data: {"error": {"message": "out of memory", "code": 500}}\n\n'
GZIPPED = gzip.compress(TEXT + STOP + DONE)
DEEP = b"[" * 100000

ANSWERS = [
    ("401", answer(401, {"error": {"message": "no such key"}}), "", "auth_error", "no such key"),
    ("403", answer(403, {"detail": "not for you"}), "", "auth_error", "403"),
    ("429", answer(429, {"error": {"message": "slow down"}}, "Retry-After: 1"), "", "rate_limited", "slow down"),
    ("500", answer(500, {"error": {"message": "boom"}}), "", "http_error", "HTTP 500: boom"),
    ("502 as HTML", answer(502, b"<html><h1>Bad Gateway</h1></html>"), "", "http_error", "Bad Gateway"),
    ("500 without a body", answer(500, b""), "", "http_error", "500"),
    ("404 without a length", b"HTTP/1.1 404 Not Found\r\n\r\nno route", "close", "http_error", "no route"),
    ("500 nested deeply", answer(500, DEEP), "", "http_error", "500"),
    ("500 cut short", answer(500, b"x" * 100)[:-50], "close", "truncated", "in the body"),
    ("error frame", streamed(TEXT, ERROR, DONE), "", "stream_error", "out of memory"),
    ("error, then a finish", streamed(ERROR, TEXT, STOP, DONE), "", "stream_error", "out of memory"),
    ("error event", streamed(b'event: error\ndata: {"message": "overloaded"}\n\n'), "", "stream_error", "overloaded"),
    ("JSON error in a 200", answer(200, {"error": {"message": "no quota"}}), "", "stream_error", "no quota"),
    ("error code in a 200", answer(200, {"error_code": 18, "error_msg": "limit"}), "", "stream_error", "limit"),
    ("failed finish", streamed(TEXT, event(finish="network_error"), DONE), "", "stream_error", "network_error"),
    ("not HTTP", b"SSH-2.0-OpenSSH_9\r\n", "", "parse_error", "not an HTTP"),
    ("HTTP/2", b"HTTP/2 200\r\n\r\n", "", "parse_error", "not an HTTP"),
    ("endless head", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20000, "hold", "parse_error", "head is longer"),
    ("broken frame", streamed(TEXT, b'data: {"choices": [{"del\n\n', STOP, DONE), "", "parse_error", "not JSON"),
    ("frame nested deeply", streamed(TEXT, b"data: " + DEEP + b"\n\n"), "", "parse_error", "not JSON"),
    ("frame of a number", streamed(b"data: 7\n\n"), "", "parse_error", "not an object"),
    ("HTML page", answer(200, b"<!doctype html><p>log in"), "", "parse_error", "HTML"),
    ("broken chunk size", CHUNKED + b"zz\r\n", "hold", "parse_error", "chunk size"),
    ("chunk too long", CHUNKED + b"1\r\nabc\r\n", "hold", "parse_error", "chunk"),
    ("two lengths", answer(200, b"x", "Content-Length: 2"), "hold", "parse_error", "Content-Length"),
    ("unknown coding", answer(200, b"x", "Content-Encoding: br"), "hold", "parse_error", "br"),
    ("101", b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "hold", "parse_error", "101"),
    ("broken gzip", answer(200, GZIPPED[:10] + b"\xff" * 10, "Content-Encoding: gzip"), "", "parse_error", "broken"),
    ("nothing", b"", "close", "truncated", "before the head"),
    ("half a head", CHUNKED[:40], "close", "truncated", "in the head"),
    ("half a head, reset", CHUNKED[:40], "reset", "truncated", "in the head"),
    ("half a stream", CHUNKED + chunk(TEXT), "close", "truncated", "in the body"),
    ("half a stream, reset", CHUNKED + chunk(TEXT), "reset", "truncated", "in the body"),
    ("length not reached", answer(200, TEXT + TEXT)[:-20], "close", "truncated", "in the body"),
    ("no end", streamed(TEXT, TEXT), "", "truncated", "without an end"),
    ("closed without an end", CLOSED + TEXT, "close", "truncated", "without an end"),
    ("null is no finish reason", streamed(TEXT, event("", "null"), event("", "")), "", "truncated", "without an end"),
    ("204", b"HTTP/1.1 204 No Content\r\n\r\n", "", "empty", "without any output"),
    ("empty body", answer(200, b""), "", "empty", "without any output"),
    ("nothing but an end", streamed(event("", None), STOP, usage(0), DONE), "", "empty", "without any output"),
    ("only [DONE]", streamed(DONE), "", "empty", "without any output"),
    ("only comments", streamed(b": keep-alive\n\n"), "", "empty", "without any output"),
    ("in silence", b"", "hold", "timeout", "whole request", {"timeout": 0.2}),
    ("stall in the head", CHUNKED[:40], "hold", "timeout", "whole request", {"timeout": 0.2}),
    ("stall", CHUNKED + chunk(TEXT), "hold", "timeout", "whole request", {"timeout": 0.2}),
    ("no first output", CHUNKED + chunk(event("", None)), "hold", "timeout", "first output", {"ttft_timeout": 0.2}),
    ("idle", CHUNKED + chunk(TEXT), "hold", "timeout", "idle", {"idle_timeout": 0.2}),
    ("idle from the start", b"", "hold", "timeout", "idle", {"idle_timeout": 0.2}),
    ("plain", HELLO, "", "ok", None),
    ("nothing after [DONE]", CUT + chunk(DONE), "close", "ok", None),
    ("reset after the finish", CUT, "reset", "ok", None),
    ("closed after the finish", CUT, "close", "ok", None),
    ("end by close", CLOSED + TEXT + STOP, "close", "ok", None),
    ("known length", answer(200, TEXT + STOP), "", "ok", None),
    ("no blank line at the end", CLOSED + TEXT + b"data: [DONE]", "close", "ok", None),
    ("HTTP/1.0", b"HTTP/1.0 200 OK\r\n\r\n" + TEXT + STOP, "close", "ok", None),
    ("103 before", b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + HELLO, "", "ok", None),
    ("CR LF and a mark", answer(200, b"\xef\xbb\xbf" + (TEXT + STOP).replace(b"\n", b"\r\n")), "", "ok", None),
    ("gzip", answer(200, GZIPPED, "Content-Encoding: gzip"), "", "ok", None),
    ("content filter", streamed(TEXT, event(finish="content_filter"), DONE), "", "ok", None),
    ("end optional", streamed(TEXT), "", "ok", None, {"end_optional": True}),
    ("no usage", streamed(TEXT, STOP, DONE), "", "ok", None),
]  # fmt: skip


@pytest.mark.parametrize("row", ANSWERS, ids=[row[0] for row in ANSWERS])
def test_status(row):
    _, data, then, status, err, given = (*row, {})[:6]
    record = measure_one(says(data, then), **given)
    assert record["status"] == status, record.get("err")
    assert (err is None and "err" not in record) or err in record["err"]
    assert None not in record.values()
    if status == "ok":
        assert 0 <= record["ttft_ms"] <= record["latency_ms"]
        assert record["chunks"] >= 1 and record["out_chars"] >= 5
    else:
        assert "latency_ms" not in record, "a failure is in no latency distribution"
    assert "retried" not in record or status == "truncated"


@pytest.mark.parametrize("name", ["whole request", "first output", "idle"])
def test_timeouts_pass_when_they_say(name):
    """The one that comes first is named, and passes at its time."""
    limits = {"whole request": "timeout", "first output": "ttft_timeout", "idle": "idle_timeout"}
    given = {"timeout": 5.0, "ttft_timeout": 5.0, "idle_timeout": 5.0, limits[name]: 0.3}

    def behave(peer, _):
        peer.send(CHUNKED)
        peer.send(chunk(b": ping\n\n"))
        peer.hold()

    with Server(behave) as server:
        measured = measure(server.url, total_requests=1, **given)
    assert name in measured.records[0]["err"] and "0.3s" in measured.records[0]["err"]
    assert 0.29 <= measured.seconds < 1.5


def test_idle_timeout_is_between_any_bytes():
    def behave(peer, _):
        peer.send(CHUNKED)
        for _ in range(8):
            time.sleep(0.1)
            peer.send(chunk(b": ping\n\n"))
        peer.send(chunk(TEXT + STOP) + LAST_CHUNK)

    record = measure_one(behave, idle_timeout=0.4)
    assert record["status"] == "ok"
    assert record["ttft_ms"] > 700


def test_a_drip_does_not_outlive_the_whole_timeout():
    def behave(peer, _):
        peer.send(CHUNKED)
        while True:
            peer.send(chunk(TEXT))
            time.sleep(0.01)

    with Server(behave) as server:
        measured = measure(server.url, total_requests=1, timeout=0.3, idle_timeout=0.2)
    assert measured.statuses == ["timeout"]
    assert measured.seconds < 1.5


# After the end.


@pytest.mark.parametrize("finish", [STOP, DONE], ids=["finish reason", "[DONE]"])
def test_what_follows_the_end_is_waited_for_at_most_five_seconds(monkeypatch, finish):
    """The finish comes and then nothing: ok, with the latency of the finish, on a connection that is not used again."""
    assert llmbench.LINGER == 5.0
    monkeypatch.setattr(llmbench, "LINGER", 0.3)

    def behave(peer, request):
        peer.send(CHUNKED + chunk(TEXT) + chunk(finish))
        peer.hold()

    with Server(behave) as server:
        measured = measure(server.url, total_requests=2, timeout=5.0)
    assert measured.statuses == ["ok"] * 2
    assert all(record["latency_ms"] < 200 for record in measured.records)
    assert server.connections == 2
    assert 0.55 < measured.seconds < 3


def test_usage_that_follows_late_is_read_and_does_not_move_the_end():
    def behave(peer, _):
        peer.send(CHUNKED + chunk(TEXT) + chunk(STOP))
        time.sleep(0.2)
        peer.send(chunk(usage(7)) + LAST_CHUNK)

    record = measure_one(behave)
    assert record["status"] == "ok"
    assert record["out_tokens"] == 7
    assert record["latency_ms"] < 150


def test_a_flood_after_the_end_does_not_hold_a_stream_for_ever(monkeypatch):
    monkeypatch.setattr(llmbench, "LINGER", 0.3)

    def behave(peer, _):
        peer.send(CHUNKED + chunk(TEXT) + chunk(STOP))
        while True:
            peer.send(chunk(b": more\n\n" * 100))
            time.sleep(0.002)

    with Server(behave) as server:
        measured = measure(server.url, total_requests=1, timeout=5.0)
    assert measured.statuses == ["ok"]
    assert measured.seconds < 3


# Figures.


def test_times_are_the_senders_own():
    """First content, every gap and the end against the moments at which the server sent them."""

    def behave(peer, _):
        for piece in (
            CHUNKED + chunk(event("", None)),
            chunk(TEXT),
            chunk(TEXT),
            chunk(TEXT),
            chunk(STOP) + LAST_CHUNK,
        ):
            time.sleep(0.03)
            peer.send(piece)

    with Server(behave) as server:
        measured = measure(server.url, total_requests=5, record_chunks=True)
        peer = server.peers[0]
    assert measured.statuses == ["ok"] * 5
    for number, record in enumerate(measured.records):
        start = measured.runner.zero + record["start_ms"] / 1000.0
        sends = peer.sent[5 * number : 5 * number + 5]
        figures = [record["ttfb_ms"], *record["chunk_ms"], record["latency_ms"]]
        assert record["chunk_ms"][0] == record["ttft_ms"]
        for (before, after), figure in zip(sends, figures):
            assert before - 0.001 <= start + figure / 1000.0 <= after + 0.02
        assert record["chunks"] == 3 and record["out_chars"] == 15
        assert record["itl_sum_ms"] == pytest.approx(record["chunk_ms"][-1] - record["ttft_ms"], abs=0.01)
        assert sum(record["itl_hist"].values()) == 2
        assert record["start_ms"] <= 1000.0 * (server.requests[number].at - measured.runner.zero) + 0.1


def test_reasoning_only_and_tools():
    def deltas(*rows):
        return streamed(*(b'data: {"choices": [{"delta": %s}]}\n\n' % json.dumps(row).encode() for row in rows), STOP)

    record = measure_one(says(deltas({"reasoning_content": "Hm"})))
    assert (record["status"], record["reasoning_chars"]) == ("ok", 2)
    assert "ttft_ms" not in record and record["ttfe_ms"] > 0
    call = {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    assert measure_one(says(deltas(call)))["ttft_ms"] > 0


def test_whole_completion_in_answer_to_a_stream_request():
    body = {"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}
    record = measure_one(says(answer(200, body)))
    assert (record["status"], record["streamed"], record["out_chars"], record["out_tokens"]) == ("ok", False, 2, 1)
    assert "ttft_ms" not in record and record["latency_ms"] > 0


def test_bytes_are_counted_without_framing_and_before_decompression():
    assert measure_one(says(streamed(TEXT, STOP)))["out_bytes"] == len(TEXT + STOP)
    record = measure_one(says(answer(200, GZIPPED, "Content-Encoding: gzip")))
    assert (record["out_bytes"], record["compressed"]) == (len(GZIPPED), "gzip")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_any_cut_of_the_bytes_means_the_same(size):
    text = "é😀\u2028中"
    data = streamed(event(text), event(text), STOP, usage(2), DONE)

    def behave(peer, _):
        for start in range(0, len(data), size):
            peer.send(data[start : start + size])

    record = measure_one(behave)
    assert (record["status"], record["out_chars"], record["chunks"], record["out_tokens"]) == (
        "ok",
        2 * len(text),
        2,
        2,
    )


# Endpoints that lie.

UNCOUNTABLE = ["1e999", "-1e999", "NaN", "-5", "1" + "0" * 400]


@pytest.mark.parametrize("tokens", [*UNCOUNTABLE, '"many"', "[]", "true"])
def test_counts_that_cannot_be_are_not_known(tokens):
    raw = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": %s}}\n\n' % tokens.encode()
    record = measure_one(says(streamed(TEXT, TEXT, STOP, raw, DONE)))
    assert record["status"] == "ok"
    assert "out_tokens" not in record


ODD_FRAMES = [
    '{"choices": null}', '{"choices": {}}', '{"choices": "x"}', '{"choices": [null, 5, "x", []]}', "{}",
    '{"choices": [{"delta": null, "finish_reason": 5}]}', '{"choices": [{"delta": "x"}]}',
    '{"choices": [{"delta": []}]}',
    '{"choices": [{"delta": {"content": {"a": 1}}}]}', '{"choices": [{"delta": {"content": [null, 5, {"text": 7}]}}]}',
    '{"choices": [{"delta": {"tool_calls": [null, 5, {"function": 7}, {"function": {"arguments": {}}}]}}]}',
    '{"choices": [{"delta": {"tool_calls": {"a": 1}, "function_call": 5}}]}', '{"usage": [1], "choices": []}',
    '{"usage": {"completion_tokens_details": 5, "prompt_tokens_details": []}, "choices": []}',
    '{"choices": [{"delta": {"content": "\\ud800"}}]}', '{"choices": [{"delta": {"content": "\\u0000"}}]}',
]  # fmt: skip


@pytest.mark.parametrize("frame", ODD_FRAMES)
def test_odd_frames_end_no_run(frame):
    with Server(says(streamed(TEXT, b"data: " + frame.encode() + b"\n\n", STOP, DONE))) as server:
        measured = measure(server.url, total_requests=1)
    assert not measured.complaints
    assert measured.statuses == ["ok"]


def test_unterminated_tail_that_is_nested_deeply():
    with Server(says(CLOSED + TEXT + b"data: " + DEEP, "close")) as server:
        measured = measure(server.url, total_requests=1, timeout=2.0)
    assert not measured.complaints
    assert measured.statuses[0] in ("truncated", "parse_error")


def test_an_endless_event_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(llmbench.SSEParser.__init__, "__defaults__", (1 << 20,))
    behave = says(CLOSED + b"data: " + b"x" * (2 << 20), "hold")
    record = measure_one(behave)
    assert record["status"] == "parse_error"
    assert "longer than" in record["err"]


def test_redirects_are_not_followed():
    with Server(say_hello) as elsewhere:
        moved = answer(307, b"", "Location: %s/v1/chat/completions" % elsewhere.url)
        record = measure_one(says(moved), token="sk-secret-1")
        assert not elsewhere.requests
        assert elsewhere.connections == 0
    assert record["status"] == "http_error"
    assert elsewhere.url in record["err"] and "not followed" in record["err"]


def echoes(kind, secret):
    """Behaviours that give the request's secret back."""
    error = {"error": {"message": "bad key %s" % secret}}
    return {
        "refusal": says(answer(401, error)),
        "header": says(answer(500, {"error": "got Authorization: Bearer %s" % secret})),
        "stream error": says(streamed(b"data: " + json.dumps(error).encode() + b"\n\n")),
        "content": says(streamed(event("your key is " + secret), STOP)),
        "redirect": says(answer(302, b"", "Location: http://h/?x=" + secret)),
        "not HTTP": says(secret.encode() + b"\r\n"),
        "escaped": says(answer(500, json.dumps(error).replace("/", "\\/").encode())),
        "HTML": says(answer(500, b"<p>" + secret.encode() + b"</p>")),
        "cut in the line": says(answer(500, {"error": {"message": "x" * (300 - len(secret) + 4) + secret}})),
        "cut in the sample": says(answer(500, b"x" * (llmbench.RAW_LIMIT - len(secret) + 4) + secret.encode() * 2)),
        "broken frame": says(streamed(b"data: {" + secret.encode() + b"\n\n")),
    }[kind]


SECRET = "sk-Zq8/xW3vT+Lm"
ECHOES = ["refusal", "header", "escaped", "stream error", "content", "redirect", "not HTTP", "HTML", "broken frame",
          "cut in the line", "cut in the sample"]  # fmt: skip


@pytest.mark.parametrize("kind", ECHOES)
def test_secrets_that_the_endpoint_echoes_are_masked(kind):
    record = measure_one(echoes(kind, SECRET), token=SECRET)
    assert_hidden(record, SECRET)


def assert_hidden(record, secret, piece=8):
    """No stretch of the secret stands in the record, however it is escaped."""
    text = json.dumps(record).replace("\\\\", "\\").replace("\\/", "/")
    for start in range(len(secret) - piece + 1):
        assert secret[start : start + piece] not in text


@pytest.mark.parametrize(
    "given",
    [
        {"header": ["X-Api-Key: " + SECRET]},
        {"header": ["Authorization: Bearer " + SECRET]},
        {"header": ["Cookie: id=%s; theme=dark" % SECRET]},
        {"body": {"api_key": SECRET}},
    ],
    ids=["key header", "bearer header", "cookie", "body"],
)
def test_secrets_in_headers_and_body_are_masked_when_they_come_back_alone(given):
    assert_hidden(measure_one(echoes("refusal", SECRET), **given), SECRET)


def test_url_password_and_its_basic_form_are_masked():
    def behave(peer, request):
        peer.send(answer(401, {"error": {"message": "%s pa55word!" % request.headers["authorization"].split()[-1]}}))

    with Server(behave) as server:
        measured = measure(server.url.replace("://", "://user:pa55word!@"), total_requests=1)
    text = json.dumps(measured.records)
    assert "pa55word" not in text
    assert llmbench.base64.b64encode(b"user:pa55word!").decode() not in text


# An endpoint that is not there, or does not want us.


def test_refused_connections_are_not_hammered():
    url = "http://127.0.0.1:%d" % closed_port()
    began = time.process_time()
    measured = measure(url, concurrency=2, duration=0.6)
    assert set(measured.statuses) == {"connect_error"}
    assert 4 <= len(measured.records) <= 2 * 8
    assert all(record["connect_ms"] >= 0 for record in measured.records if "connect_ms" in record)
    measured = measure(url, concurrency=500, total_requests=1000)
    assert measured.statuses == ["connect_error"] * 1000
    assert measured.seconds < 6
    assert time.process_time() - began < 6


def test_endpoint_that_goes_in_mid_run_and_comes_back():
    """Connections are refused for a while; the requests of that time say so and the others are ok."""
    with Server(says(HELLO, "close")) as server:
        gone = closed_port()

        def go_away(runner, loop):
            network = runner.network

            async def addresses():
                port = gone if len(server.requests) >= 3 and llmbench.clock() < back else server.port
                return [(2, 1, 6, "", ("127.0.0.1", port))]

            network._addresses = lambda: llmbench.asyncio.ensure_future(addresses())

        back = llmbench.clock() + 0.3
        measured = measure(server.url, during=go_away, total_requests=30)
    assert measured.statuses[:3] == ["ok"] * 3
    assert "connect_error" in measured.statuses
    assert measured.statuses[-1] == "ok"


def test_endpoint_that_takes_no_connection_costs_one_timeout_a_request_not_one_a_batch():
    """200 streams, 64 at a time: what is opened ahead must not wait again and again before the first record."""
    with full_listener() as port:
        measured = measure("http://127.0.0.1:%d" % port, concurrency=200, total_requests=200, connect_timeout=0.5)
    assert measured.statuses == ["timeout"] * 200
    assert measured.seconds < 1.9


def test_run_stops_when_the_token_is_refused():
    with Server(says(answer(401, {"error": {"message": "no"}}))) as server:
        measured = measure(server.url, concurrency=2, total_requests=1000)
        assert 3 <= len(server.requests) <= 6
    assert set(measured.statuses) == {"auth_error"}
    assert measured.runner.reason.startswith("auth")


def test_a_refusal_among_answers_stops_nothing():
    def behave(peer, request):
        peer.send(HELLO if request.number % 2 == 0 else answer(403, {}))

    with Server(behave) as server:
        measured = measure(server.url, total_requests=20)
    assert measured.statuses == ["ok", "auth_error"] * 10


# Finding out the dialect.


def picky(*refused, words="Unsupported parameter: %s"):
    """A behaviour that answers 400 to requests with one of these fields, naming the first it meets."""

    def behave(peer, request):
        bad = [name for name in refused if name in request.fields]
        peer.send(answer(400, {"error": {"message": words % tuple(bad[: words.count("%s")])}}) if bad else HELLO)

    return behave


@pytest.mark.parametrize("streams", [1, 5])
@pytest.mark.parametrize("refused", [("stream_options",), ("max_tokens",)])
def test_field_of_ours_that_is_refused_is_found_out_by_one_probe(refused, streams):
    with Server(picky(*refused)) as server:
        measured = measure(server.url, concurrency=streams, total_requests=10)
    probes = measured.of_phase("probe")
    assert [probe["status"] for probe in probes] == ["ok"]
    assert [record["status"] for record in measured.of_phase("measure")] == ["ok"] * 10
    assert len(server.requests) <= 10 + 1 + streams, "each stream is refused once at most"
    assert sum(name.startswith("run-0-probe") for name in server.ids) == 1
    assert refused[0] in " ".join(measured.runner.provider.dialect.notes)
    last = server.requests[-1].fields
    assert refused[0] not in last
    assert ("max_completion_tokens" in last) == (refused[0] == "max_tokens")


@pytest.mark.parametrize("refused", [("stream_options", "max_tokens"), ("max_tokens", "stream_options")])
def test_two_fields_of_ours_that_are_refused_are_both_found_out(refused):
    with Server(picky(*refused)) as server:
        measured = measure(server.url, total_requests=4)
    assert [record["status"] for record in measured.of_phase("measure")] == ["ok"] * 4
    assert len(measured.of_phase("probe")) == 2
    notes = " ".join(measured.runner.provider.dialect.notes)
    assert "stream_options" in notes and "max_completion_tokens" in notes


def test_a_400_that_names_no_field_gets_the_probe_too():
    with Server(picky("stream_options", words="bad request")) as server:
        measured = measure(server.url, total_requests=4)
    assert [record["status"] for record in measured.of_phase("measure")] == ["ok"] * 4
    assert len(measured.of_phase("probe")) == 1


def test_a_400_for_another_reason_gets_one_probe_and_is_an_http_error():
    with Server(says(answer(400, {"error": {"message": "prompt too long"}}))) as server:
        measured = measure(server.url, total_requests=6)
        assert len(server.requests) == 7
    assert [record["status"] for record in measured.of_phase("measure")] == ["http_error"] * 6
    assert [record["status"] for record in measured.of_phase("probe")] == ["http_error"]
    assert not measured.runner.provider.dialect.notes
    assert server.requests[-1].fields["stream_options"] == {"include_usage": True}


def test_an_endpoint_that_took_our_fields_is_not_asked_again_after_a_stray_400():
    """A 400 in mid-run can't mean stream_options; giving it up would lose the usage of all that follow."""

    def behave(peer, request):
        peer.send(answer(400, {"error": {"message": "try again"}}) if request.number == 5 else HELLO)

    with Server(behave) as server:
        measured = measure(server.url, total_requests=10)
    assert not measured.of_phase("probe")
    assert measured.statuses.count("http_error") == 1
    assert all("stream_options" in request.fields for request in server.requests)


def test_no_probe_goes_to_an_endpoint_that_takes_the_request():
    with Server(say_hello) as server:
        measured = measure(server.url, concurrency=4, total_requests=8)
        assert len(server.requests) == 8
    assert not measured.of_phase("probe")
    assert not measured.runner.provider.dialect.notes


def test_a_spelling_that_the_user_gave_is_kept():
    with Server(picky("max_tokens")) as server:
        measured = measure(server.url, total_requests=3, max_tokens_field="max_tokens")
    assert [record["status"] for record in measured.of_phase("measure")] == ["http_error"] * 3


# Interrupts.


def test_stop_gives_what_is_in_flight_its_time_and_starts_nothing():
    released = threading.Event()

    def behave(peer, _):
        peer.send(CHUNKED + chunk(TEXT))
        released.wait(PATIENCE)
        peer.send(chunk(STOP) + LAST_CHUNK)

    def interrupt(runner, loop):
        def look():
            if len(server.requests) < 3:
                loop.call_later(0.01, look)
                return
            runner.stop("interrupted")
            loop.call_later(0.1, released.set)

        look()

    with Server(behave) as server:
        measured = measure(server.url, during=interrupt, concurrency=3, total_requests=100)
        assert len(server.requests) == 3
    assert measured.statuses == ["ok"] * 3
    assert measured.runner.reason == "interrupted"
    assert measured.seconds < 2


@pytest.mark.parametrize(
    "waiting",
    [
        "in the answer",
        "in the queue of the probe",
    ],
)
def test_stop_cancels_what_outlives_the_patience(waiting):
    def behave(peer, request):
        if waiting == "in the queue of the probe" and "stream_options" in request.fields:
            peer.send(answer(400, {"error": "stream_options"}))
            return
        peer.send(CHUNKED + chunk(TEXT))
        peer.hold()

    def interrupt(runner, loop):
        loop.call_later(0.2, runner.stop, "interrupted", 0.1)

    with Server(behave) as server:
        measured = measure(server.url, during=interrupt, concurrency=3, total_requests=100, timeout=4.0)
    assert "cancelled" in measured.statuses
    assert measured.seconds < 2
    assert not measured.complaints


def test_past_the_grace_nothing_is_sent_again():
    """The probe is cancelled at the end of the grace: what it was for is not sent, to wait out its own time-out."""

    def behave(peer, request):
        if "stream_options" in request.fields:
            peer.send(answer(400, {"error": "stream_options"}))
            return
        peer.send(CHUNKED + chunk(TEXT))
        peer.hold()

    with Server(behave) as server:
        measured = measure(server.url, duration=0.2, grace=0.1, timeout=4.0)
    assert measured.seconds < 2
    assert [record["status"] for record in measured.of_phase("probe")] == ["cancelled"]


@pytest.mark.parametrize(
    "when",
    [
        "opening ahead",
        "opening for a probe",
    ],
)
def test_a_second_interrupt_ends_connections_that_are_being_opened(when):
    with full_listener() as silent, Server(says(answer(400, {"error": "stream_options"}))) as server:

        def lead_astray(runner, loop):
            async def addresses():
                port = silent if when == "opening ahead" or server.requests else server.port
                return [(2, 1, 6, "", ("127.0.0.1", port))]

            runner.network._addresses = lambda: llmbench.asyncio.ensure_future(addresses())
            loop.call_later(0.2, runner.stop, "interrupted")
            loop.call_later(0.3, runner.cancel, "interrupted twice")

        measured = measure(server.url, during=lead_astray, concurrency=2, total_requests=10, connect_timeout=4.0)
    assert measured.seconds < 2
    assert not measured.complaints


def test_a_sink_that_fails_ends_the_run_with_its_error_and_no_other():
    """A full disk: the error comes out once, and the other streams' errors are not left to the loop to complain of."""
    complaints = []

    def sink(line):
        raise llmbench.WriteError("disk full")

    def run(url):
        with event_loop(complaints) as (loop, poll):
            runner = prepare(settings(url, concurrency=4, total_requests=8), poll, sink)
            loop.run_until_complete(runner.run(llmbench.plan_stages(runner.config)))

    with Server(say_hello) as server, pytest.raises(llmbench.WriteError):
        run(server.url)
    llmbench.gc.collect()  # what a task leaves behind is complained of when it is collected
    assert not [complaint["message"] for complaint in complaints]


def test_a_sink_that_fails_does_not_wait_for_the_other_streams():
    """Nothing that comes in after it could be written: time-outs of minutes must not pass first."""

    def behave(peer, request):
        if request.number:
            peer.hold()
        peer.send(HELLO)

    def sink(line):
        raise llmbench.WriteError("disk full")

    began = time.monotonic()
    with Server(behave) as server, event_loop() as (loop, poll), pytest.raises(llmbench.WriteError):
        runner = prepare(settings(server.url, concurrency=3, timeout=4.0), poll, sink)
        loop.run_until_complete(runner.run(llmbench.plan_stages(runner.config)))
    assert time.monotonic() - began < 2.0


def test_error_keys_hold_no_request_of_their_own():
    """The same failure of many requests is one raw sample, not many."""
    with Server(says(answer(500, {"error": {"message": "request 1234 failed"}}))) as server:
        measured = measure(server.url, total_requests=5)
    assert [("error_raw" in record) for record in measured.records] == [True] + [False] * 4
    assert all(re.search("1234 failed", record["err"]) for record in measured.records)


def test_no_more_records_wait_than_there_are_streams():
    """Answers that come all at once and at full speed: the writing keeps up, whatever is put off in one turn."""
    waiting = []

    def watch(runner, loop):
        hand_over = runner._hand_over

        def counted(*finished):
            hand_over(*finished)
            waiting.append(len(runner._finished))

        runner._hand_over = counted

    with mock_server("--ttft", "0", "--itl", "0", "--tokens", "2") as url:
        measured = measure(url, during=watch, concurrency=64, total_requests=2000)
    assert len(measured.records) == 2000
    assert 1 < max(waiting) <= 64
