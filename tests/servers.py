"""Servers that misbehave on purpose, and a runner in this process to measure them with.

A `Server` gives every connection a thread of its own and hands each request to `behave(peer, request)`, plain blocking
code that says what goes over the wire and when. What it sent and saw, with times on llmbench's own clock, is the truth
to which records are compared.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Iterator, NamedTuple

import llmbench
from conftest import ROOT

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CLOSED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"
PATIENCE = 20.0  # s after which a test that hangs gives up


# What an endpoint says.


def event(content: Any = None, finish: Any = None, **fields: Any) -> bytes:
    """One SSE event of a chat stream; further fields go beside `choices`."""
    delta = {} if content is None else {"content": content}
    message = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **fields}
    return b"data: " + json.dumps(message).encode() + b"\n\n"


def usage(tokens: Any, prompt: Any = 3) -> bytes:
    """The event with the token counts."""
    counts = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": 0}
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def streamed(*events: bytes) -> bytes:
    """A whole chunked answer of these events."""
    return CHUNKED + b"".join(map(chunk, events)) + LAST_CHUNK


def answer(status: int, body: Any, *headers: str) -> bytes:
    """An answer with a body of known length: bytes as they are, everything else as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = ["HTTP/1.1 %d Word" % status, "Content-Length: %d" % len(data), *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + data


HELLO = streamed(event("Hel"), event("lo"), event(finish="stop"), usage(2), DONE)


# Who says it.


class Request(NamedTuple):
    """One request as the server saw it; `number` counts from 0 over all connections."""

    number: int
    connection: int
    path: str
    headers: dict[str, str]
    raw: bytes
    at: float

    @property
    def id(self) -> str:
        return self.headers.get("x-request-id", "")

    @property
    def fields(self) -> dict[str, Any]:
        return json.loads(self.raw)


class Peer:
    """The server's end of a connection; `sent` holds (before, after) of each send that has begun."""

    def __init__(self, sock: Any, plain: socket.socket) -> None:
        self.sock, self.plain = sock, plain
        self._sent: list[tuple[float, float]] = []
        self._sending = threading.Lock()

    def send(self, data: bytes) -> None:
        with self._sending:
            before = llmbench.clock()
            self.sock.sendall(data)
            self._sent.append((before, llmbench.clock()))

    @property
    def sent(self) -> list[tuple[float, float]]:
        """Waits for the send that is under way: the client may have its bytes before it returns."""
        with self._sending:
            return list(self._sent)

    def close(self) -> None:
        """An orderly close (FIN)."""
        with contextlib.suppress(OSError):
            self.plain.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def reset(self) -> None:
        """A close by RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def wait_for_bytes(self) -> None:
        """Until something arrives, which is left unread."""
        select.select([self.plain], [], [], PATIENCE)

    def hold(self) -> None:
        """Says nothing more until the client goes."""
        self.sock.settimeout(PATIENCE)
        with contextlib.suppress(OSError):
            while self.sock.recv(65536):
                pass
        self.sock.close()


Behaviour = Callable[[Peer, Request], None]


class Server:
    """Listens on loopback and answers as `behave` says; `greet(peer, connection)` comes before the first request.

    address: another one to listen at: the path of a Unix socket, or an IPv6 address.
    """

    def __init__(
        self, behave: Behaviour, tls: ssl.SSLContext | None = None, greet: Any = None, address: str = "127.0.0.1"
    ) -> None:
        self.behave, self.tls, self.greet = behave, tls, greet
        self.requests: list[Request] = []
        self.peers: list[Peer] = []
        self.in_flight = self.most_in_flight = 0
        self.complaints: list[BaseException] = []
        self._lock = threading.Lock()
        family = socket.AF_UNIX if "/" in address else socket.AF_INET6 if ":" in address else socket.AF_INET
        self.listener = socket.socket(family)
        self.listener.bind(address if family == socket.AF_UNIX else (address, 0))
        self.listener.listen(1024)
        if family == socket.AF_UNIX:
            self.port, self.url = 0, "unix:" + address
        else:
            self.port = self.listener.getsockname()[1]
            host = "[%s]" % address if ":" in address else address
            self.url = "%s://%s:%d" % ("https" if tls else "http", host, self.port)

    def __enter__(self) -> Server:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_listening()
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.close()

    def stop_listening(self) -> None:
        """From now on connections are refused."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    @property
    def connections(self) -> int:
        return len(self.peers)

    @property
    def ids(self) -> list[str]:
        return [request.id for request in self.requests]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, plain: socket.socket) -> None:
        try:
            if plain.family != socket.AF_UNIX:
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock = self.tls.wrap_socket(plain, server_side=True) if self.tls else plain
            peer = Peer(sock, sock)
            with self._lock:
                self.peers.append(peer)
                number = len(self.peers) - 1
            if self.greet is not None:
                self.greet(peer, number)
            while True:
                request = self._read(peer, number)
                if request is None:
                    peer.close()
                    return
                self._answer(peer, request)
        except (OSError, ValueError):
            plain.close()  # the client went, or the behaviour closed the connection

    def _answer(self, peer: Peer, request: Request) -> None:
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            self.behave(peer, request)
        except AssertionError as error:
            self.complaints.append(error)
            raise OSError from error
        finally:
            with self._lock:
                self.in_flight -= 1

    def _read(self, peer: Peer, connection: int) -> Request | None:
        data = b""
        while b"\r\n\r\n" not in data:
            more = peer.sock.recv(65536)
            if not more:
                return None
            data += more
        at = llmbench.clock()
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines[1:]}
        while len(body) < int(headers.get("content-length", 0)):
            body += peer.sock.recv(65536)
        with self._lock:
            request = Request(len(self.requests), connection, lines[0].split(" ")[1], headers, body, at)
            self.requests.append(request)
        return request


def says(data: bytes, then: str = "") -> Behaviour:
    """A behaviour: sends these bytes to everyone, then does a method of Peer (`close`, `reset`, `hold`)."""

    def behave(peer: Peer, _: Request) -> None:
        peer.send(data)
        if then:
            getattr(peer, then)()

    return behave


@contextlib.contextmanager
def full_listener(address: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """The port of a listener whose backlog is full: a connection to it is neither taken nor refused."""
    with socket.socket() as listener, contextlib.ExitStack() as waiting:
        listener.bind((address, port))
        listener.listen(0)
        for _ in range(8):
            filler = waiting.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def mock_server(*flags: str) -> Iterator[str]:
    """The built-in mock in a process of its own; its base URL."""
    command = [sys.executable, str(ROOT / "llmbench.py"), "mock", "--stdin-guard", *flags]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process.stdout.readline().decode().split()[-1]
        finally:
            process.stdin.close()
            process.terminate()
            process.wait(PATIENCE)


# A runner in this process.


class Measured(NamedTuple):
    """What a run came to; `complaints` are exceptions that reached the event loop."""

    records: list[dict[str, Any]]
    audits: list[dict[str, Any]]
    runner: llmbench.Runner
    seconds: float
    complaints: list[dict[str, Any]]

    @property
    def statuses(self) -> list[str]:
        return [record["status"] for record in self.records]

    def of_phase(self, phase: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["phase"] == phase]


def settings(url: str, **given: Any) -> llmbench.Config:
    """A configuration with a model and a run id; concurrency may be one number."""
    concurrency = given.pop("concurrency", 1)
    given.setdefault("timeout", PATIENCE)
    return llmbench.Config(
        url=url, model="tiny", run_id="run", progress="none",
        concurrency=concurrency if isinstance(concurrency, list) else [concurrency], **given,
    )  # fmt: skip


def prepare(config: llmbench.Config, poll: llmbench.Poll, sink: Any, prompts: int = 3) -> llmbench.Runner:
    """A runner for that configuration."""
    provider = llmbench.make_provider(config)
    endpoint = llmbench.parse_url(config.url, provider)
    texts = [llmbench.Prompt("p%d" % number, [{"role": "user", "content": "Hi"}]) for number in range(prompts)]
    return llmbench.Runner(config, provider, endpoint, texts, llmbench.Part(), poll, sink)


@contextlib.contextmanager
def event_loop(complaints: list[Any] | None = None) -> Iterator[tuple[Any, llmbench.Poll]]:
    """llmbench's event loop, closed at the end; what reaches its exception handler is kept."""
    loop, poll = llmbench.new_loop()
    kept = [] if complaints is None else complaints
    loop.set_exception_handler(lambda _, context: kept.append(context))
    keeper = llmbench.wake_kernel_stamps()
    try:
        yield loop, poll
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
        keeper.close()


def measure(url: str, during: Any = None, **given: Any) -> Measured:
    """Runs the stages of a configuration here; `during(runner, loop)` is called as the run begins."""
    lines: list[dict[str, Any]] = []
    complaints: list[dict[str, Any]] = []
    config = settings(url, **given)
    with event_loop(complaints) as (loop, poll):
        runner = prepare(config, poll, lines.append)
        if during is not None:
            loop.call_soon(during, runner, loop)
        began = time.monotonic()
        loop.run_until_complete(runner.run(llmbench.plan_stages(config)))
        seconds = time.monotonic() - began
    records = [line for line in lines if "request_id" in line]
    return Measured(records, [line["audit"] for line in lines if "audit" in line], runner, seconds, complaints)


def measure_one(behave: Behaviour, **given: Any) -> dict[str, Any]:
    """The record of a single request to a server that behaves so."""
    with Server(behave) as server:
        measured = measure(server.url, total_requests=1, **given)
    assert not measured.complaints
    assert len(measured.records) == 1
    return measured.records[0]
