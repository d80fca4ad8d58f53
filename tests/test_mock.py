"""The mock server over real loopback sockets: what is on the wire, when, and whether its truth says the same."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any, Iterator, Sequence

import pytest

import llmbench

FAST = "ttft=20&itl=5&tokens=4"
TEXT = " tok0 tok1 tok2 tok3"
USAGE = {"stream_options": {"include_usage": True}}


class Reply:
    """One answer as a plain blocking socket sees it: raw bytes, the moments of its reads, and how it ended."""

    def __init__(self, raw: bytes, moments: list[tuple[int, float]], ending: str) -> None:
        self.raw, self.moments, self.ending = raw, moments, ending
        self.head, _, self.wire = raw.partition(b"\r\n\r\n")
        lines = self.head.decode("latin-1").split("\r\n")
        self.status_line = lines[0]
        self.headers = {line.partition(":")[0].lower(): line.partition(": ")[2] for line in lines[1:]}

    @property
    def status(self) -> int:
        return int(self.status_line.split(" ")[1])

    @property
    def body(self) -> bytes:
        return join_chunks(self.wire)[0] if "transfer-encoding" in self.headers else self.wire

    @property
    def complete(self) -> bool:
        """Whether the body ends as its framing says."""
        if "transfer-encoding" in self.headers:
            return join_chunks(self.wire)[1]
        return len(self.wire) == int(self.headers.get("content-length", len(self.wire)))

    @property
    def data(self) -> list[str]:
        """The data of all SSE events."""
        lines = self.body.decode().replace("\r\n", "\n").split("\n")
        return [line[6:] for line in lines if line.startswith("data: ")]

    @property
    def frames(self) -> list[dict[str, Any]]:
        return [json.loads(data) for data in self.data if data != "[DONE]"]

    def text(self, key: str = "content") -> str:
        deltas = [choice["delta"] for frame in self.frames for choice in frame.get("choices", [])]
        return "".join(delta.get(key) or "" for delta in deltas)

    @property
    def finish(self) -> list[str]:
        return [choice["finish_reason"] for frame in self.frames for choice in frame.get("choices", [])
                if choice["finish_reason"]]

    @property
    def usages(self) -> list[dict[str, Any]]:
        return [frame["usage"] for frame in self.frames if frame.get("usage")]

    def moment(self, text: bytes) -> float:
        """When the read came that completed the first appearance of `text`."""
        end = self.raw.index(text) + len(text)
        return next(now for size, now in self.moments if size >= end)


def join_chunks(wire: bytes) -> tuple[bytes, bool]:
    """Chunked bytes -> (body so far, whether the last chunk is there)."""
    pieces, start = [], 0
    while b"\r\n" in wire[start:start + 20]:
        data = wire.index(b"\r\n", start) + 2
        size = int(wire[start:data - 2], 16)
        if size == 0:
            return b"".join(pieces), wire[data:] == b"\r\n"
        pieces.append(wire[data:data + size])
        start = data + size + 2
    return b"".join(pieces), False


class Client:
    """A keep-alive connection."""

    def __init__(self, url: str) -> None:
        host, port = url.split("/")[2].split(":")
        self.sock = socket.create_connection((host, int(port)), timeout=5)

    def send(self, method: str = "POST", path: str = "/v1/chat/completions", headers: Sequence[str] = (),
             stream: bool = True, version: str = "1.1", **fields: object) -> Client:
        """Sends one request; `fields` go into its body."""
        fields = {"messages": [{"role": "user", "content": "x" * 40}], "stream": stream, **fields}
        body = json.dumps(fields).encode() if method == "POST" else b""
        lines = [f"{method} {path} HTTP/{version}", "Host: mock", f"Content-Length: {len(body)}", *headers]
        self.sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        return self

    def receive(self, timeout: float = 5) -> Reply:
        """Reads one answer, to its own end, to the end of the connection, or until nothing comes for `timeout`."""
        self.sock.settimeout(timeout)
        raw, moments, chunked = bytearray(), [], False
        while True:
            try:
                data = self.sock.recv(65536)
            except socket.timeout:
                return Reply(bytes(raw), moments, "silent")
            except ConnectionResetError:
                return Reply(bytes(raw), moments, "reset")
            raw += data
            moments.append((len(raw), time.monotonic()))
            if not data:
                return Reply(bytes(raw), moments, "closed")
            if chunked and not raw.endswith(b"0\r\n\r\n"):
                continue
            reply = Reply(bytes(raw), moments, "open")
            chunked = "transfer-encoding" in reply.headers
            if (chunked or "content-length" in reply.headers) and reply.complete:
                return reply

    def ask(self, **options: Any) -> Reply:
        return self.send(**options).receive()


@contextlib.contextmanager
def serving(query: str = FAST) -> Iterator[str]:
    """The server in a thread of its own, which starts much faster than a process."""
    loop, urls = asyncio.SelectorEventLoop(llmbench.ExactSelector()), queue.Queue()
    options = llmbench.parse_mock_url("mock:?vary=0&" + query)
    task = loop.create_task(llmbench.serve_mock(options, "127.0.0.1", 0, urls.put))

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield urls.get(timeout=5)
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(5)


def ask(url: str, timeout: float = 5, **options: Any) -> Reply:
    client = Client(url)
    with contextlib.closing(client.sock):
        return client.send(**options).receive(timeout)


def ask_once(query: str, **options: Any) -> Reply:
    with serving(query) as url:
        return ask(url, **options)


def truths(url: str) -> list[dict[str, Any]]:
    body = ask(url, method="GET", path="/mock/truth").body
    return [json.loads(line) for line in body.decode().split("\n") if line]


# --- options


def test_the_defaults_are_those_of_the_contract() -> None:
    options = llmbench.parse_mock_url("mock:")
    assert (options.ttft, options.itl, options.tokens) == (200, 50, 20)
    assert llmbench.parse_mock_url("mock:?ttft=200&itl=50&tokens=20") == options


@pytest.mark.parametrize("query, name, value", [
    ("ttft=1.5", "ttft", 1.5), ("role=0", "role", False), ("finish=", "finish", ""), ("keepalive=-1", "keepalive", -1),
    ("refuse=a,b", "refuse", ("a", "b")), ("stall_once=1,0.5", "stall_once", (1.0, 0.5)),
   ("role-delay=3", "role_delay", 3),
    ("fault=reset:0.25,html:.5", "fault", (("reset", 0.25), ("html", 0.5))),
    ("fault=stall", "fault", (("stall", 1.0),)),
    ("gzip=deflate", "gzip", "deflate"), ("models=a,b", "models", ("a", "b")), ("text=zh", "text", "zh"),
])
def test_an_option_reads_the_same_from_the_url_and_from_the_flag(query: str, name: str, value: object) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    llmbench.add_mock_arguments(parser)
    from_url = llmbench.parse_mock_url("mock:?" + query)
    assert getattr(from_url, name) == value
    assert llmbench.options_from_arguments(parser.parse_args(["--" + query])) == from_url
    assert llmbench.options_from_arguments(parser.parse_args(llmbench.mock_flags("mock:?" + query))) == from_url


@pytest.mark.parametrize("query, told", [
    ("tft=5", "ttft"), ("token_s=5", "tokens"), ("finsh=stop", "finish"), ("ttft=-5", "ttft"), ("ttft=nan", "ttft"),
    ("ttft=sekret", "ms from"), ("usage=sekret", "every"), ("role=sekret", "0 or 1"), ("batch=0", "batch"),
    ("fault=sekret:0.1", "truncate"), ("fault=reset:0.6,stall:0.6", "at most 1"), ("stall_once=3", "AT,FOR"),
    ("jitter=2", "jitter"), ("tokens=1e3", "whole"), ("keepalive=-2", "keepalive"),
])
def test_a_mistake_is_named_in_one_line_without_its_value(query: str, told: str) -> None:
    with pytest.raises(llmbench.UserError) as error:
        llmbench.parse_mock_url("mock:?" + query)
    assert told in str(error.value) and "\n" not in str(error.value) and "sekret" not in str(error.value)


def test_every_option_has_help() -> None:
    parser = argparse.ArgumentParser()
    llmbench.add_mock_arguments(parser)
    for name in llmbench.MOCK_FIELDS:
        assert "--" + name.replace("_", "-") in parser.format_help()


# --- time without a clock


def test_pauses_are_absolute_and_batches_are_due_with_their_first_frame() -> None:
    def dues(query: str, count: int) -> list[float]:
        made = llmbench.output_dues(llmbench.parse_mock_url("mock:?" + query), random.Random(1))
        return [round(1000 * next(made), 6) for _ in range(count)]
    assert dues("ttft=200&itl=50", 4) == [200, 250, 300, 350]
    assert dues("ttft=200&itl=50&batch=2", 5) == [200, 200, 300, 300, 400]
    drawn = dues("ttft=100&itl=100&jitter=1", 2000)
    assert dues("ttft=100&itl=100&jitter=1", 5) == drawn[:5] and 90 < drawn[-1] / 2000 < 110


def test_a_stall_stops_time_for_what_is_pending() -> None:
    assert [llmbench.stalled_due(start, 2.0, (10.0, 15.0)) for start in (7, 9, 11, 16)] == [9, 16, 17, 18]
    with serving("ttft=0&itl=100&tokens=5&stall_once=0.3,0.5") as url:
        reply = ask(url)
        moments = [reply.moment(b" tok%d" % number) for number in range(5)]
        gaps = [later - earlier for earlier, later in zip(moments, moments[1:])]
    assert 0.55 < max(gaps) < 0.75 and sum(gap > 0.2 for gap in gaps) == 1


# --- the stream


def test_a_stream_is_what_openai_sends() -> None:
    reply = ask_once(FAST, **USAGE)
    assert reply.status_line == "HTTP/1.1 200 OK" and reply.headers["content-type"].startswith("text/event-stream")
    assert reply.frames[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (reply.text(), reply.finish, reply.data[-1], reply.complete) == (TEXT, ["stop"], "[DONE]", True)
    assert reply.usages == [{"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14,
                             "prompt_tokens_details": {"cached_tokens": 0},
                             "completion_tokens_details": {"reasoning_tokens": 0}}]
    assert reply.frames[-1]["choices"] == []


def test_the_truth_is_what_the_socket_saw() -> None:
    with serving("ttft=150&itl=40&tokens=4") as url:
        before = time.monotonic()
        reply = ask(url, headers=["X-Request-Id: r-1"])
        truth, = truths(url)
    assert truth["request_id"] == reply.headers["x-request-id"] == "r-1"
    assert truth["path"] == "/v1/chat/completions" and truth["tokens"] == 4 and truth["status"] == 200
    assert 0 <= truth["received"] - before < 0.1
    for name, text in [("head", b"HTTP/1.1"), ("first", b"tok0"), ("last", b"tok3"), ("end", b'"stop"')]:
        assert 0 <= reply.moment(text) - truth[name] < 0.05, name
    assert 0 <= truth["first"] - truth["received"] - 0.150 < 0.05
    assert 0 <= truth["last"] - truth["received"] - 0.270 < 0.05
    assert truth["last"] <= truth["end"] <= truth["closed"] and truth["late"] < 0.05


def test_the_log_is_the_truth_and_memory_is_bounded(tmp_path: Path) -> None:
    with serving(FAST + "&truth=2&log=" + str(tmp_path / "log")) as url:
        for number in range(3):
            ask(url, headers=[f"X-Request-Id: {number}"])
        assert [truth["request_id"] for truth in truths(url)] == ["1", "2"]
        logged = [json.loads(line) for line in (tmp_path / "log").read_text().split("\n")[:-1]]
    assert [line["request_id"] for line in logged] == ["0", "1", "2"]


@pytest.mark.parametrize("query, text, key", [
    ("tokens=2&reasoning=2", " tok2 tok3", "content"), ("tokens=2&reasoning=2", " tok0 tok1", "reasoning_content"),
    ("tokens=2&reasoning=2&reasoning_key=reasoning", " tok0 tok1", "reasoning"),
    ("tokens=2&reasoning=2&think=1", "<think> tok0 tok1</think> tok2 tok3", "content"),
    ("tokens=2&pad=3", " tok0xxx tok1xxx", "content"), ("tokens=2&per_frame=2", TEXT, "content"),
    ("tokens=5&text=zh", "床前明月光", "content"), ("tokens=2&text=emoji", "😀🚀", "content"),
    ("tokens=3&text=ascii", "The", "content"), ("tokens=4&crlf=1", TEXT, "content"),
    ("tokens=4&batch=3", TEXT, "content"), ("tokens=4&split=1", TEXT, "content"), ("tokens=4&split=7", TEXT, "content"),
    ("tokens=6&text=emoji&split=1", "😀🚀🎉🌍🔥🐍", "content"),
])
def test_what_the_tokens_say(query: str, text: str, key: str) -> None:
    reply = ask_once("ttft=5&itl=1&" + query)
    assert reply.text(key) == text and reply.complete
    assert ("\r\n\r\n" in reply.body.decode()) == ("crlf" in query)


def test_reasoning_has_the_ttft_and_content_follows() -> None:
    with serving("ttft=50&itl=50&reasoning=2&tokens=2") as url:
        ask(url)
        truth, = truths(url)
    assert 0.05 <= truth["output"] - truth["received"] < 0.09
    assert 0.15 <= truth["first"] - truth["received"] < 0.19


def test_tokens_0_takes_max_tokens_and_the_last_frame_has_the_rest() -> None:
    with serving("ttft=1&itl=1&tokens=0&per_frame=3") as url:
        assert ask(url, max_tokens=9, **USAGE).text().count("tok") == 9
        reply = ask(url, max_tokens=7, **USAGE)
        assert reply.usages[0]["completion_tokens"] == 7 and reply.text().count("tok") == 7
        assert sum(" tok" in data for data in reply.data) == 3
        assert ask(url).text().count("tok") == 16


def test_tool_frames_make_one_call() -> None:
    reply = ask_once("ttft=1&itl=1&tool=4")
    calls = [call for frame in reply.frames for choice in frame["choices"]
             for call in choice["delta"].get("tool_calls", [])]
    assert calls[0]["function"]["name"] == "lookup" and len(calls) == 4 and reply.finish == ["tool_calls"]
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"query": " tok1 tok2 tok3"}


@pytest.mark.parametrize(("query", "asked", "counts"), [
    ("usage=final", True, [4]), ("usage=final", False, []), ("usage=final&usage_asked=0", False, [4]),
    ("usage=finish", True, [4]), ("usage=finish&finish=", True, [4]), ("usage=none", True, []),
    ("usage=every", True, [0, 1, 2, 3, 4, 4, 4]), ("usage=final&reasoning=2", True, [6])])
def test_where_usage_is(query: str, asked: bool, counts: list[int]) -> None:
    reply = ask_once(FAST + "&" + query, **(USAGE if asked else {}))
    assert [usage["completion_tokens"] for usage in reply.usages] == counts
    if "usage=finish" in query:
        assert reply.frames[-1]["choices"][0]["delta"] == {} and reply.frames[-1]["usage"]
    if "usage=final" in query:          # the other frames say null, once usage was asked for
        assert all("usage" in frame for frame in reply.frames) == bool(counts)
    if "reasoning" in query:
        assert reply.usages[0]["completion_tokens_details"] == {"reasoning_tokens": 2}


def test_the_end_can_be_left_out_piece_by_piece() -> None:
    with serving(FAST + "&done=0") as url:
        assert ask(url).data[-1] != "[DONE]"
        assert "end" in truths(url)[0]
    with serving(FAST + "&done=0&finish=") as url:
        reply = ask(url)
        assert reply.finish == [] and reply.complete and "end" not in truths(url)[0]
    assert ask_once(FAST + "&finish=length&role=0&cached=3&usage_asked=0").finish == ["length"]


def test_role_delay_and_comments_come_before_the_first_token() -> None:
    reply = ask_once("ttft=200&itl=1&tokens=1&role_delay=100&comments=60")
    assert reply.body.decode().index(": keep-alive") < reply.body.decode().index("assistant")
    assert reply.body.count(b": keep-alive\n\n") == 3
    start = reply.moment(b"HTTP/1.1")
    assert 0.08 < reply.moment(b"assistant") - start < 0.15 and 0.18 < reply.moment(b"tok0") - start < 0.26


# --- framing and compression


@pytest.mark.parametrize("framing, version, ending, header", [
    ("chunked", "HTTP/1.1", "open", "transfer-encoding"), ("length", "HTTP/1.1", "open", "content-length"),
    ("close", "HTTP/1.1", "closed", None), ("http10", "HTTP/1.0", "closed", None)])
def test_framing(framing: str, version: str, ending: str, header: str | None) -> None:
    reply = ask_once(FAST + "&framing=" + framing)
    assert reply.status_line == version + " 200 OK" and reply.ending == ending
    assert {"transfer-encoding", "content-length"} & set(reply.headers) == ({header} if header else set())
    assert reply.text() == TEXT and reply.complete and reply.data[-1] == "[DONE]"


@pytest.mark.parametrize("gzip, coding, bits", [("1", "gzip", 31), ("deflate", "deflate", 15)])
@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_compression_is_flushed_at_each_frame(gzip: str, coding: str, bits: int, framing: str) -> None:
    reply = ask_once(f"ttft=20&itl=30&tokens=4&gzip={gzip}&framing={framing}")
    assert reply.headers["content-encoding"] == coding
    plain = Reply(reply.head + b"\r\n\r\n" + reply.wire, reply.moments, "").body
    decoder = zlib.decompressobj(bits)
    assert decoder.decompress(plain).endswith(b"data: [DONE]\n\n") and decoder.eof
    assert len(reply.moments) >= 4


def test_a_client_of_http_1_0_gets_a_body_that_ends_with_the_connection() -> None:
    reply = ask_once(FAST, version="1.0")
    assert reply.status_line == "HTTP/1.0 200 OK" and reply.text() == TEXT and reply.ending == "closed"


# --- faults


@pytest.mark.parametrize("fault, status, told", [
    ("http500", 500, b"server_error"), ("http429", 429, b"rate_limit"), ("http401", 401, b"invalid_api_key"),
    ("redirect", 307, b""), ("html", 200, b"<!DOCTYPE html>")])
def test_faults_that_answer_at_once(fault: str, status: int, told: bytes) -> None:
    with serving(FAST + "&fault=" + fault) as url:
        reply = ask(url)
        assert reply.status == status and told in reply.body and reply.complete
        assert reply.headers.get("retry-after") == ("1" if status == 429 else None)
        assert ("location" in reply.headers) == (status == 307)
        truth, = truths(url)
    assert truth["fault"] == fault and truth["status"] == status and "first" not in truth


@pytest.mark.parametrize("fault, ending, complete, done, text", [
    ("reset", "reset", False, False, " tok0 tok1"), ("truncate", "closed", False, False, " tok0 tok1"),
    ("stall", "silent", False, False, " tok0 tok1"), ("noend", "open", True, False, TEXT),
    ("empty", "open", True, True, ""), ("slowhead", "open", True, True, TEXT)])
def test_faults_in_the_stream(fault: str, ending: str, complete: bool, done: bool, text: str) -> None:
    with serving(FAST + "&fault=" + fault) as url:
        reply = ask(url, timeout=0.4)
        time.sleep(0.05 * (fault == "stall"))
        truth, = truths(url)
    assert (reply.status, reply.ending, reply.complete, reply.text()) == (200, ending, complete, text)
    assert (reply.data[-1] == "[DONE]") == done and bool(reply.finish) == done
    assert truth["fault"] == fault and ("end" in truth) == done and truth["tokens"] == text.count("tok")


def test_an_error_frame_is_followed_by_done() -> None:
    reply = ask_once(FAST + "&fault=error")
    assert json.loads(reply.data[-2])["error"]["type"] == "server_error" and reply.data[-1] == "[DONE]"
    assert reply.complete and '"content":" tok1"' in reply.data[2] and len(reply.data) == 5


def test_garbage_is_one_broken_frame() -> None:
    broken = []
    for data in ask_once(FAST + "&fault=garbage").data[:-1]:
        try:
            json.loads(data)
        except ValueError:
            broken.append(data)
    assert len(broken) == 1


def test_a_slow_head_is_complete_at_ttft() -> None:
    with serving("ttft=150&itl=1&tokens=1&fault=slowhead") as url:
        reply = ask(url)
        assert truths(url)[0]["late"] < 0.1
    assert 0.1 < reply.moment(b"\r\n\r\n") - reply.moment(b"200 OK") < 0.25


def test_what_is_not_http_is_not_http() -> None:
    reply = ask_once(FAST + "&fault=nothttp")
    assert reply.raw.startswith(b"SSH-2.0") and reply.ending == "closed"


def test_a_cut_body_with_a_length_is_short_of_it() -> None:
    reply = ask_once(FAST + "&fault=truncate&framing=length")
    assert reply.ending == "closed" and not reply.complete and reply.text() == " tok0 tok1"


def test_faults_are_drawn_from_the_seed() -> None:
    def drawn(seed: int) -> list[int]:
        with serving(f"ttft=0&itl=0&tokens=1&fault=http500:0.3,http429:0.2&seed={seed}") as url:
            client = Client(url)
            return [client.ask().status for _ in range(200)]
    statuses = drawn(3)
    assert statuses == drawn(3) != drawn(4)
    assert 35 < statuses.count(500) < 85 and 20 < statuses.count(429) < 62


# --- requests, connections, slots


def test_a_whole_completion_comes_when_its_last_token_is_due() -> None:
    with serving("ttft=60&itl=20&tokens=4&reasoning=1") as url:
        begin = time.monotonic()
        reply = ask(url, stream=False)
        whole = json.loads(reply.body.decode())
        assert 0.14 <= time.monotonic() - begin < 0.22
        assert whole["choices"][0]["message"]["content"] == " tok1 tok2 tok3 tok4"
        assert whole["usage"]["completion_tokens"] == 5 and whole["choices"][0]["finish_reason"] == "stop"
        assert "end" in truths(url)[0]


def test_models_token_and_unknown_paths() -> None:
    with serving("models=a,b&token=secret") as url:
        get = {"method": "GET", "path": "/v1/models"}
        assert ask(url, **get).status == 401 and ask(url).status == 401
        listed = json.loads(ask(url, headers=["Authorization: Bearer secret"], **get).body.decode())
        assert [model["id"] for model in listed["data"]] == ["a", "b"]
        assert ask(url, path="/nothing").status == 404


def test_a_refused_field_is_named() -> None:
    with serving(FAST + "&refuse=stream_options,max_tokens") as url:
        reply = ask(url, **USAGE)
        assert reply.status == 400
        assert json.loads(reply.body.decode())["error"]["param"] == "stream_options"
        assert json.loads(ask(url, max_tokens=3).body.decode())["error"]["param"] == "max_tokens"
        assert ask(url).status == 200


@pytest.mark.parametrize("raw, status", [
    (b"hello\r\n\r\n", 400), (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
    (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 3\r\n\r\n{x}", 400), (b"x" * 65537, 431),
    (b"POST / HTTP/1.1\r\nContent-Length: \xb2\r\n\r\n", 411),
    (b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99999\r\n\r\n" + b"[" * 99999, 400)])
def test_what_cant_be_read_is_refused(raw: bytes, status: int) -> None:
    with serving() as url:
        client = Client(url)
        client.sock.sendall(raw)
        reply = client.receive()
        assert reply.status == status and reply.headers["connection"] == "close"


@pytest.mark.parametrize("fields", [{"messages": "hello"}, {"messages": [1]}, {"max_tokens": "many"},
                                    {"stream_options": 5}, {"max_tokens": float("inf")}])
def test_a_body_without_sense_is_refused_and_the_connection_kept(fields: dict[str, object]) -> None:
    with serving() as url:
        client = Client(url)
        assert client.ask(**fields).status == 400 and client.ask().text() == TEXT


def test_a_request_may_come_byte_by_byte_and_two_at_once() -> None:
    with serving("ttft=0&itl=0&tokens=2") as url:
        client = Client(url)
        raw = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 16\r\n\r\n{\"stream\": true}"
        for byte in raw:
            client.sock.send(bytes([byte]))
        assert client.receive().text() == " tok0 tok1"
        client.sock.sendall(raw + raw)
        deadline, got = time.monotonic() + 3, b""
        while got.count(b"[DONE]") < 2 and time.monotonic() < deadline:
            got += client.sock.recv(65536)
        assert got.count(b"200 OK") == 2


def test_keepalive_counts_answers() -> None:
    with serving(FAST + "&keepalive=2") as url:
        client = Client(url)
        first, second = client.ask(), client.ask()
        assert "connection" not in first.headers and second.headers["connection"] == "close"
        assert client.sock.recv(1) == b""
    assert ask_once("keepalive=1&fault=http500").headers["connection"] == "close"


def test_a_client_that_asks_to_close_is_heard() -> None:
    with serving() as url:
        client = Client(url)
        assert client.ask(headers=["Connection: close"]).complete and client.sock.recv(1) == b""


def test_an_idle_connection_is_closed_unannounced() -> None:
    with serving(FAST + "&idle=150") as url:
        client = Client(url)
        assert "connection" not in client.ask().headers
        begin = time.monotonic()
        assert client.sock.recv(1) == b"" and 0.1 < time.monotonic() - begin < 0.3


def test_slots_are_a_line() -> None:
    with serving("ttft=50&itl=10&tokens=3&slots=1") as url:
        clients = []
        for number in range(4):
            clients.append(Client(url).send(headers=[f"X-Request-Id: {number}"]))
            time.sleep(0.01)
        clients.pop(2).sock.close()             # one that goes while it waits holds nobody up
        assert all(client.receive().complete for client in clients)
        seen = {truth["request_id"]: truth for truth in truths(url)}
    order = [seen[name] for name in "013"]
    assert "started" not in seen["2"]
    for earlier, later in zip(order, order[1:]):
        assert later["received"] < earlier["closed"] <= later["started"] <= later["head"]
        assert 0.05 <= later["first"] - later["started"] < 0.1


def test_a_slow_reader_holds_only_itself_up() -> None:
    with serving("ttft=0&itl=0&tokens=300&pad=65536") as url:
        slow = Client(url).send()
        time.sleep(0.2)
        assert ask(url, method="GET", path="/v1/models").status == 200
        assert truths(url) == []                # what is not read is not even made
        assert slow.receive().text().count("tok") == 300


# --- the process


def test_a_process_serves_and_ends() -> None:
    with llmbench.MockProcess(llmbench.mock_flags("mock:?vary=0&" + FAST + "&keepalive=-1")) as mock:
        assert ask(mock.url).text() == TEXT
    assert mock.process.returncode == 0


def test_an_orphan_ends_with_its_parent() -> None:
    code = (f"import sys, os; sys.path.insert(0, {os.path.dirname(llmbench.__file__)!r})\n"
            f"import {llmbench.__name__} as llmbench; mock = llmbench.MockProcess(['--ttft=5']).__enter__()\n"
            "print(mock.process.pid, flush=True); os.kill(os.getpid(), 9)")
    parent = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=10)
    assert parent.returncode == -9
    orphan = int(parent.stdout)
    deadline = time.monotonic() + 3
    while os.path.exists(f"/proc/{orphan}/fd/0") and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(OSError):
        os.readlink(f"/proc/{orphan}/fd/0")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_0_and_one_line(number: int) -> None:
    command = [sys.executable, llmbench.program_path(), "mock", "--ttft=5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    line = process.stdout.readline().decode()
    assert line.startswith("mock server on http://127.0.0.1:") and line.endswith("/v1\n")
    client = Client(line.split()[-1]).send()
    process.send_signal(number)
    assert process.wait(5) == 0 and process.communicate() == (b"", b"")
    client.sock.close()


def test_a_mock_that_cant_start_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        mock = llmbench.MockProcess([f"--port={taken.getsockname()[1]}"])
        with pytest.raises(llmbench.UserError), mock:
            pass
    assert mock.process.returncode not in (None, 0) and "already in use" in capfd.readouterr().err


@pytest.mark.parametrize("port", ["99999", "-1", "s3cret"])
def test_a_port_that_is_none_is_one_line_without_it(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert llmbench.main(["mock", "--port", port]) == 2
    assert capsys.readouterr().err == "llmbench: error: --port needs a port from 0 to 65535\n"


@pytest.mark.parametrize("host", ["a..b", "x" * 70])
def test_a_mock_on_a_host_that_is_none_says_so(host: str) -> None:
    with pytest.raises(llmbench.UserError, match="can't listen on"):
        asyncio.run(llmbench.serve_mock(llmbench.MockOptions(), host, 0, print))
