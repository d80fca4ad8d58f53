"""The baseline of the benchmarks: a bare asyncio read loop that asks what llmbench asks and looks at nothing else.

    python3 tests/bench/bare_loop.py --port 9000 --streams 100 --requests 400 --max-tokens 80

Each stream is a coroutine on one kept connection: write the request, `await reader.read(65536)`, and one byte search a
read, for the first content until it came and for [DONE] from then on. All connections are opened before the clock
starts. Prints one JSON object: CPU and wall time from the first due to the last end, and what each request saw, on
CLOCK_MONOTONIC in ns, so that it can be held against the server's log.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import time
import uuid

READ_SIZE = 65536
SPLIT = 24  # a read shorter than this may hold the rest of a [DONE] that the read before began
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUser-Agent: bare-loop\r\nAccept: text/event-stream\r\n"
    "Accept-Encoding: identity\r\nContent-Type: application/json\r\nContent-Length: %d\r\nX-Request-Id: %s\r\n\r\n"
)


class BareLoop:
    """The streams of one measurement; `seen` holds (request id, due, start, first content, end) of each request."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.marker = options.marker.encode()
        self.run_id = uuid.uuid4().hex[:8]
        self.numbers = iter(range(options.requests))
        self.seen: list = []

    def payload(self, request_id: str) -> bytes:
        """The request, of the size and shape of llmbench's."""
        prompt = "[%s] Explain in a few sentences how a suspension bridge carries its load." % request_id
        body = {
            "model": "truth",
            "messages": [{"role": "user", "content": prompt}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": self.options.max_tokens,
        }
        data = json.dumps(body, separators=(",", ":")).encode()
        return (HEAD % (self.options.port, len(data), request_id)).encode() + data

    async def run(self) -> dict:
        """Opens all connections, then measures."""
        gate = asyncio.Semaphore(64)

        async def open_one() -> tuple:
            async with gate:
                return await asyncio.open_connection("127.0.0.1", self.options.port)

        pairs = await asyncio.gather(*(open_one() for _ in range(min(self.options.streams, self.options.requests))))
        cpu, began = cpu_seconds(), time.monotonic_ns()
        await asyncio.gather(*(self.stream(reader, writer, began) for reader, writer in pairs))
        ended, cpu = time.monotonic_ns(), cpu_seconds() - cpu
        for _, writer in pairs:
            writer.close()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"cpu_s": cpu, "wall_s": (ended - began) / 1e9, "peak_kb": peak, "requests": self.seen}

    async def stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, due: int) -> None:
        """One request after the other until there is none."""
        for number in self.numbers:
            request_id = "%s-%d" % (self.run_id, number)
            payload = self.payload(request_id)
            start = time.monotonic_ns()
            writer.write(payload)
            first, before = 0, b""
            while True:
                data = await reader.read(READ_SIZE)
                if not data:
                    raise ConnectionError("the server closed the connection")
                if not first and self.marker in data:
                    first = time.monotonic_ns()
                if first and (b"[DONE]" in data or (len(data) < SPLIT and b"[DONE]" in before + data)):
                    break
                before = before[-SPLIT:] + data if len(data) < SPLIT else data[-SPLIT:]
            end = time.monotonic_ns()
            self.seen.append((request_id, due, start, first, end))
            due = end


def cpu_seconds() -> float:
    """User and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> int:
    """Prints the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--max-tokens", type=int, default=80)
    parser.add_argument("--marker", default=" tok", help="bytes that the first content holds and nothing before it")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if soft != resource.RLIM_INFINITY else (soft, hard))
    json.dump(asyncio.run(BareLoop(options).run()), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
