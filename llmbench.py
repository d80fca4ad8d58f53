#!/usr/bin/env python3
"""llmbench measures a streaming LLM chat endpoint, with CPython's standard library alone.

`python3 llmbench.py run --url http://host:8000 --model NAME` leaves results.jsonl, results.csv,
summary.json and one offline report.html. Data flows down this file once:
prompt -> request -> bytes -> events -> frames -> record -> summary -> files,
and a section uses only what stands above it (`grep -n '^# [0-9]' llmbench.py` lists them):

 1. Vocabulary   the words, the record, the configuration, every metric's definition
 2. SSE          bytes -> events
 3. HTTP         request encoding; response bytes -> body bytes
 4. Steps        what a signature is computed with
 5. Signing      secrets -> the headers that prove who asks
 6. Providers    prompt -> HTTP request; event -> frames
 7. Registry     all providers by name
 8. Workload     files and built-ins -> prompts
 9. Statistics   records -> summary
10. Comparison   two runs, and what of their difference is more than chance
11. Load         which request belongs to which part, and when it is due
12. Connection   sockets, TLS, arrival stamps, keep-alive
13. Exchange     one request from its first byte to its end
14. Runner       load + prompts + connections -> records
15. Processes    the same in several processes
16. Report       summary and rows -> one offline page
17. Exits        a run for a ticket, for a CI server, in one archive
18. Artifacts    records, summary <-> files
19. Terminal     progress and tables
20. Mock         the built-in server
21. Probes       what a run needs to know before it starts, what this host can measure
22. Check        what an endpoint and the way to it are like
23. Commands     run and the others; main()
"""

from __future__ import annotations

import argparse
import array
import asyncio
import base64
import binascii
import bisect
import collections
import contextlib
import dataclasses
import datetime
import errno
import functools
import gc
import hashlib
import heapq
import io
import itertools
import json
import math
import operator
import os
import re
import select
import selectors
import shlex
import signal
import socket
import ssl
import string
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import zlib
from dataclasses import dataclass, field
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    Awaitable,
    BinaryIO,
    Callable,
    Coroutine,
    Deque,
    Dict,
    FrozenSet,
    Generator,
    Iterable,
    Iterator,
    List,
    Mapping,
    Match,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    TextIO,
    Tuple,
    Type,
    Union,
)
from urllib.parse import parse_qsl, unquote, urlsplit

if TYPE_CHECKING:
    import random  # imported where it is used: start-up matters

__version__ = "1.0.0"

# ==================================================================================================
# 1. Vocabulary: the words every other section speaks
# ==================================================================================================
#
# A *prompt* is one workload item. A *request* is one HTTP exchange made for a prompt. The answer is
# a row of *events* (one dispatched SSE event each); a provider makes *frames* of an event: meta,
# reasoning, content, tool, usage, end, error. What is known of one finished request is a *record*,
# one line of results.jsonl; a *stage* is one steady load level, a *part* what one process or host
# does of a run. The *summary* is computed from the records and from nothing else.
#
# Every figure's definition stands once, in METRICS: the report prints it from there, and the README's
# table is made of it. Times are on one monotonic clock, written in milliseconds as floats. A value that
# is not known is absent, never 0 and never null. The way of a new figure through the file: Record and
# METRICS here; Exchange, which notes the moments, and Runner, which fills the record; COLUMNS and
# DISTRIBUTIONS in Statistics; TABLED in Report and TABLED_METRICS in Terminal, which show it; GATE_TIMES,
# by which gates and comparisons name it.


class UserError(Exception):
    """A mistake of the user's: its text is the one line that says what is wrong and what to do."""


class ParseError(Exception):
    """The peer sent bytes that are not HTTP, SSE or JSON where they must be."""


class Truncated(Exception):
    """The connection or the body ended before its explicit end; the text says where."""


class WriteError(Exception):
    """Results could not be written; the text says what and why."""


class RequestError(Exception):
    """A request that failed before an answer could be read: `status` and what happened."""

    def __init__(self, status: str, err: str) -> None:
        super().__init__(err)
        self.status = status


@dataclass
class Prompt:
    """One workload item: chat messages, and how long the answer to it may be.

    turns: what is appended for the user's 2nd, 3rd, … turn of a conversation, each after the endpoint's own answer.
    Of a trace: at, seconds from its first request; the lengths that the request and its answer are to have; and
    blocks, the names of the blocks of its text in order, of which the same name stands for the same text.
    """

    id: str
    messages: List[Dict[str, Any]]
    max_tokens: Optional[int] = None
    turns: List[List[Dict[str, Any]]] = field(default_factory=list)
    at: Optional[float] = None
    input_tokens: Optional[int] = None
    output_tokens: Optional[int] = None
    blocks: Sequence[Union[int, str]] = ()

    def saying(self, messages: List[Dict[str, Any]]) -> "Prompt":
        """This prompt with other messages (dataclasses.replace takes five times as long, for each request)."""
        return Prompt(
            self.id, messages, self.max_tokens, self.turns, self.at, self.input_tokens, self.output_tokens, self.blocks
        )


class Frame(NamedTuple):
    """What a provider makes of an event, e.g. Frame("content", " world").

    kind: one of FRAME_KINDS. text: the generated text, the finish reason of an end, the message of
    an error. usage: token counts, keyed as in a record, of a usage frame.
    """

    kind: str
    text: str = ""
    usage: Optional[Dict[str, int]] = None


FRAME_KINDS = ("meta", "reasoning", "content", "tool", "usage", "end", "error")
OUTPUT_KINDS = frozenset(("reasoning", "content", "tool"))


@dataclass
class Record:
    """Everything known of one finished request; None means not known and is left out of the file.

    Times end in _ms; `*_ts` are ISO 8601 UTC. The keys are those of a line of results.jsonl.
    """

    request_id: str
    prompt_id: str
    phase: str
    stage: int
    shard: Optional[str] = None
    provider: str = ""
    turn: Optional[int] = None
    status: str = "ok"
    err: Optional[str] = None
    http_status: Optional[int] = None
    start_ts: Optional[str] = None
    first_content_ts: Optional[str] = None
    end_ts: Optional[str] = None
    scheduled_ms: Optional[float] = None
    start_ms: Optional[float] = None
    queue_ms: Optional[float] = None
    capped_ms: Optional[float] = None
    connect_ms: Optional[float] = None
    ttfb_ms: Optional[float] = None
    ttfe_ms: Optional[float] = None
    ttft_ms: Optional[float] = None
    ttft_slack_ms: Optional[float] = None
    latency_ms: Optional[float] = None
    ttft_from_scheduled_ms: Optional[float] = None
    latency_from_scheduled_ms: Optional[float] = None
    decode_ms: Optional[float] = None
    tpot_ms: Optional[float] = None
    itl_hist: Optional[Dict[int, int]] = None
    itl_sum_ms: Optional[float] = None
    itl_min_ms: Optional[float] = None
    itl_max_ms: Optional[float] = None
    chunks: Optional[int] = None
    in_bytes: Optional[int] = None
    out_bytes: Optional[int] = None
    in_tokens: Optional[int] = None
    in_tokens_target: Optional[int] = None
    cached_tokens: Optional[int] = None
    reasoning_tokens: Optional[int] = None
    out_tokens: Optional[int] = None
    out_tokens_target: Optional[int] = None
    out_chars: Optional[int] = None
    out_crc32: Optional[str] = None
    rewrites: Optional[int] = None
    reasoning_chars: Optional[int] = None
    finish_reason: Optional[str] = None
    reused: Optional[bool] = None
    retried: Optional[bool] = None
    lag_ms: Optional[float] = None
    clock: Optional[str] = None
    rtt_ms: Optional[float] = None
    retransmits: Optional[int] = None
    out_of_order: Optional[int] = None
    compressed: Optional[str] = None
    streamed: Optional[bool] = None
    chunk_ms: Optional[List[float]] = None
    first_content_raw: Optional[str] = None
    final_frame_raw: Optional[str] = None
    error_raw: Optional[str] = None

    def known(self) -> Dict[str, Any]:
        """The record as a line of results.jsonl holds it: only what is known."""
        return {key: value for key, value in vars(self).items() if value is not None}


# What can become of a request, in the order of its phases; the text is for the terminal and the README.
STATUSES: Dict[str, str] = {
    "ok": "answered to its explicit end",
    "dns_error": "the host name could not be resolved",
    "connect_error": "no TCP connection",
    "proxy_error": "the proxy refused",
    "tls_error": "TLS failed: certificate, name or protocol",
    "auth_error": "HTTP 401 or 403",
    "rate_limited": "HTTP 429",
    "http_error": "another HTTP status outside 2xx",
    "stream_error": "the endpoint reported an error inside a 200",
    "parse_error": "not HTTP, SSE or JSON where it must be",
    "truncated": "the connection or body ended before the explicit end",
    "empty": "ended well, but without any output",
    "timeout": "one of the time-outs passed; err says which",
    "cancelled": "in flight at an interrupt or past the grace",
    "dropped": "due, but never sent",
}
NOT_JUDGED = frozenset(("cancelled", "dropped"))  # counted apart: neither success nor failure


class Metric(NamedTuple):
    """A figure: its key in summary.json, unit, short label and the one definition that stands for it."""

    name: str
    unit: str
    label: str
    definition: str


METRICS: Dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "success_rate",
            "%",
            "Success rate",
            "Successful requests / (successful + failed). Cancelled and dropped requests are counted apart; "
            "warm-up and probes are in neither.",
        ),
        Metric(
            "ttft_ms",
            "ms",
            "TTFT",
            "From start, just before the request's first byte is handed to the kernel on a connection that is ready, "
            "to the first visible content frame: non-empty content text, whitespace included. A role-only, empty, "
            "reasoning, usage or keep-alive frame is not content. A reply that is only tool calls: first tool frame.",
        ),
        Metric(
            "ttfe_ms",
            "ms",
            "TTFE",
            "From start to the first frame that carries any generated output: reasoning, content or tool.",
        ),
        Metric("ttfb_ms", "ms", "TTFB", "From start to the first byte of the response head."),
        Metric(
            "latency_ms",
            "ms",
            "Latency",
            "From start to the explicit end: the first of [DONE], a finish reason or the provider's own end event; "
            "where the provider has none, a clean end of the body. Usage that follows the finish reason is still "
            "read and does not move the end.",
        ),
        Metric("decode_ms", "ms", "Decode", "From the first generated output (TTFE) to the explicit end."),
        Metric(
            "tpot_ms",
            "ms",
            "TPOT",
            "Decode time / (n - 1), n = output tokens, less the reasoning tokens when no reasoning frame was seen "
            "(they came before TTFE). Absent when tokens are unknown or n < 2.",
        ),
        Metric(
            "itl_ms",
            "ms",
            "Inter-chunk",
            "Gap between consecutive output frames of one request. A frame may hold several tokens, so this is not "
            "inter-token. Kept as a histogram with at most 1 % error.",
        ),
        Metric("request_tps", "tok/s", "Tokens/s per request", "(n - 1) / decode time, with the n of TPOT."),
        Metric(
            "queue_ms",
            "ms",
            "Client queue",
            "start - scheduled - the connect time spent after scheduled: waiting inside this client, never hidden. "
            "Scheduled is when the load model wanted the request to go out (closed loop: when its slot became free). "
            "In an open loop with a cap it holds the wait for a free slot too, which capped_ms tells apart.",
        ),
        Metric(
            "connect_ms",
            "ms",
            "Connect",
            "DNS + TCP + proxy + TLS of a new connection, 0 when one is reused. Reported on its own and not part of "
            "TTFT unless --count-connect is given.",
        ),
        Metric(
            "ttft_from_scheduled_ms",
            "ms",
            "TTFT from due",
            "TTFT counted from scheduled instead of start: what a user waiting in the queue felt.",
        ),
        Metric(
            "latency_from_scheduled_ms", "ms", "Latency from due", "Latency counted from scheduled instead of start."
        ),
        Metric(
            "output_tokens_per_s",
            "tok/s",
            "Output throughput",
            "Sum of the output tokens of successful measured requests / wall time.",
        ),
        Metric(
            "steady_output_tokens_per_s",
            "tok/s",
            "Steady throughput",
            "Over the window from the first moment at which all streams are in flight (open loop: from the first "
            "request's end) to the last start of the stage; a request contributes its output tokens x the part of "
            "[first output, end] that lies in the window. Absent when fewer than 2 x concurrency requests (open loop: "
            "20) end in it.",
        ),
        Metric("rps", "req/s", "Requests per second", "Successful measured requests / wall time."),
        Metric(
            "goodput_rps",
            "req/s",
            "Goodput",
            "Requests that met every limit that the gates set for one request / wall time: upper limits on TTFT, TTFE, "
            "TTFB, latency, decode and TPOT, from start or from due, lower ones on tokens/s per request, whatever the "
            "statistic. A request that failed, or that has no such value, did not meet them.",
        ),
        Metric(
            "goodput_share",
            "%",
            "Goodput share",
            "Requests that met every limit that the gates set for one request / (successful + failed).",
        ),
        Metric(
            "wall_time_ms",
            "ms",
            "Wall time",
            "Per stage from the first measured start to the last measured end; of a run the sum of its stages'.",
        ),
        Metric(
            "percentiles",
            "",
            "Percentiles",
            "Linear interpolation (Python's statistics.quantiles, inclusive) over successful measured requests. One "
            "with fewer than ten samples beyond it (P50 needs 20, P90 100, P95 200, P99 1,000) is of limited meaning.",
        ),
    )
}

RAW_LIMIT = 64 * 1024  # bytes of a raw sample that are kept
EVENT_LIMIT = 16 * 1024 * 1024  # bytes of one event; past it the peer is not believed any more


@dataclass
class Config:
    """What a run does: the flags of `run` after reading, under the flags' own names (durations in seconds)."""

    url: str = ""
    provider: str = "openai"  # a name, or the path of a file
    provider_file: Optional[str] = None
    model: str = ""
    token: str = ""
    auth: Optional[str] = None  # None: the provider's own scheme
    auth_key: str = ""
    auth_secret: str = ""
    auth_opt: Dict[str, str] = field(default_factory=dict)
    timeout: float = 120.0
    connect_timeout: float = 10.0
    ttft_timeout: Optional[float] = None
    idle_timeout: Optional[float] = None
    concurrency: List[int] = field(default_factory=lambda: [1])  # an open loop's cap; empty: none
    rps: List[float] = field(default_factory=list)  # an open loop's rates; empty: a closed loop
    arrival: str = "poisson"
    ramp: Optional[float] = None
    slo: List[str] = field(default_factory=list)
    find_max: Optional[str] = None
    total_requests: Optional[int] = None
    duration: Optional[float] = None
    grace: Optional[float] = None
    warmup: int = 0
    max_tokens: int = 256
    max_tokens_field: Optional[str] = None
    token_mode: str = "usage"
    think_tags: str = "auto"
    input_tokens: Optional[str] = None
    output_tokens: Optional[int] = None
    prefix_tokens: int = 0
    workload_file: Optional[str] = None
    timestamp_unit: str = "auto"
    trace_speed: float = 1.0
    order: str = "in-order"
    turns: Optional[int] = None
    unique: bool = True
    insecure: bool = False
    ca_cert: Optional[str] = None
    client_cert: Optional[str] = None
    client_key: Optional[str] = None
    server_name: Optional[str] = None  # of the certificate, where it isn't the URL's host
    proxy: str = ""  # http://[user:password@]host:port, none, or "": what the environment says
    resolve: List[str] = field(default_factory=list)  # HOST:PORT:ADDRESS
    header: List[str] = field(default_factory=list)
    body: Dict[str, Any] = field(default_factory=dict)
    end_optional: bool = False
    stream: bool = True
    count_connect: bool = False
    record_chunks: bool = False
    seed: int = 0
    out: Optional[str] = None
    markdown: bool = False
    junit: bool = False
    processes: Union[int, str] = "auto"
    max_errors: Optional[str] = None
    max_total_tokens: Optional[int] = None
    shard: Optional[str] = None
    start_at: Optional[str] = None  # ISO 8601 UTC
    dry_run: bool = False
    given: Tuple[str, ...] = ()  # which of these the user named, so that a workload does not decide them
    progress: str = "auto"
    lang: str = "en"
    run_id: str = ""
    token_source: str = ""  # the cmd: or file: that the token came from
    fetched: List[str] = field(default_factory=list)  # tokens that were asked for, so that none is shown

    def requests_per_stage(self, streams: int, rate: Optional[float] = None) -> Optional[int]:
        """Measured requests of a stage, over all parts; None when only the duration ends it."""
        if self.total_requests is None and self.duration is None:
            return max(10, 2 * streams) if rate is None else max(20, math.ceil(10 * rate))
        return self.total_requests

    @property
    def host(self) -> Tuple[int, int]:
        """This host's number and how many hosts there are: (0, 1) without --shard."""
        number, _, hosts = (self.shard or "0/1").partition("/")
        return int(number), int(hosts)


class Stage(NamedTuple):
    """One steady load level of a run.

    concurrency: streams in flight; in an open loop the most that may be, 0: any number. total: measured
    requests, None: until duration (s) is over. rps: requests due per second, None in a closed loop.
    """

    index: int
    concurrency: int
    total: Optional[int]
    duration: Optional[float]
    warmup: int
    rps: Optional[float] = None
    trace: bool = False  # the moments are a trace's, and rps is their mean rate
    input_tokens: Optional[int] = None  # the length that prompts of this stage are to have, or its mean
    length: int = 0  # which of the lengths of --input-tokens that is

    @property
    def load(self) -> Dict[str, float]:
        """The load as summary.json names it: `{"concurrency": 8}`, or `{"rps": 4.0, "cap": 16}`."""
        load: Dict[str, float] = {"concurrency": self.concurrency} if self.rps is None else {"rps": self.rps}
        if self.rps is not None and self.concurrency:
            load["cap"] = self.concurrency
        if self.trace:
            load["trace"] = 1
        if self.input_tokens is not None:
            load["input_tokens"] = self.input_tokens
        return load

    def described(self) -> Dict[str, Any]:
        """The stage as its line in results.jsonl tells it."""
        told = {"index": self.index, "load": self.load, "total": self.total, "duration": self.duration,
                "warmup": self.warmup}  # fmt: skip
        return {key: value for key, value in told.items() if value is not None}


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that a mistyped one most likely means, as ` (did you mean …?)`; "" when none is near."""
    import difflib

    found = difflib.get_close_matches(word, list(known), 1)
    return " (did you mean %s?)" % found[0] if found else ""


class Gate(NamedTuple):
    """A requirement on one figure, e.g. Gate("ttft.p95<=800ms", "ttft", "p95", "<=", 800.0).

    The limit is in the summary's unit: milliseconds, tokens/s, requests/s, and shares of 1 for success and a goodput
    in %. `stat` is "" where the metric has one figure only.
    """

    text: str
    metric: str
    stat: str
    op: str
    limit: float

    @property
    def figure(self) -> str:
        """The summary's name of the gate's metric: ttft is ttft_ms, success is success_rate."""
        if self.metric == "goodput":
            return "goodput_share" if self.text.rstrip().endswith("%") else "goodput_rps"
        return GATE_FIGURES.get(self.metric, self.metric)

    def holds(self, value: Optional[float]) -> bool:
        """Whether a value meets the limit; one that is not known does not."""
        if value is None:
            return False
        return {"<=": value <= self.limit, "<": value < self.limit, ">=": value >= self.limit, ">": value > self.limit}[
            self.op
        ]


GATE_TIMES = (
    "ttft", "ttfe", "ttfb", "latency", "decode", "tpot", "itl", "queue", "connect", "ttft_from_scheduled",
    "latency_from_scheduled",
)  # fmt: skip
GATE_STATS = ("p50", "p90", "p95", "p99", "mean", "min", "max")
GATE_FIGURES = {name: name + "_ms" for name in GATE_TIMES}
GATE_FIGURES.update(
    success="success_rate", throughput="output_tokens_per_s", steady="steady_output_tokens_per_s", goodput="goodput_rps"
)
# What a limit is multiplied by to be in the summary's unit; "" where a bare number will do.
TIME_UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0}
TOKEN_UNITS = {"": 1.0, "tok/s": 1.0, "tokens/s": 1.0}
REQUEST_UNITS = {"": 1.0, "req/s": 1.0}
GATE_UNITS: Dict[str, Dict[str, float]] = {
    **dict.fromkeys(GATE_TIMES, TIME_UNITS),
    "request_tps": TOKEN_UNITS,
    "success": {"%": 0.01},
    "throughput": TOKEN_UNITS,
    "steady": TOKEN_UNITS,
    "rps": REQUEST_UNITS,
    "goodput": {**REQUEST_UNITS, "%": 0.01},
}
WITH_STAT = frozenset((*GATE_TIMES, "request_tps"))
GATE = re.compile(
    r"(?ai)^\s*(?P<metric>[a-z_]+)\s*(?:\.\s*(?P<stat>[a-z0-9.]+))?\s*(?P<op><=|>=|<|>)\s*"
    r"(?P<value>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?P<unit>%|[a-z]+(?:/s)?)?\s*$"
)


def parse_gate(text: str) -> Gate:
    """A gate such as `ttft.p95<=800ms`, `success>=99%` or `throughput >= 500`; raises ValueError, which says how.

    >>> parse_gate("ttft.p95 <= 0.8s").limit, parse_gate("success>=99.9%").limit
    (800.0, 0.999)
    """
    found = GATE.match(text)
    if not found:
        raise ValueError("needs METRIC.STAT, one of <= < >= > and a limit, such as ttft.p95<=800ms or success>=99%")
    metric, stat, unit = (str(found.group(name) or "").lower() for name in ("metric", "stat", "unit"))
    if metric not in GATE_UNITS:
        known = nearest(metric, GATE_UNITS) or "; one of %s" % ", ".join(GATE_UNITS)
        raise ValueError("has an unknown metric, %s%s" % (metric, known))
    if metric in WITH_STAT and stat not in GATE_STATS:
        raise ValueError("needs a statistic of %s: %s.p95, or one of %s" % (metric, metric, ", ".join(GATE_STATS)))
    if metric not in WITH_STAT and stat:
        raise ValueError("needs %s without a statistic: leave .%s out" % (metric, stat))
    units = GATE_UNITS[metric]
    if unit not in units:
        wanted = " or ".join(name or "no unit" for name in units)
        raise ValueError("needs a limit of %s in %s, such as %s" % (metric, wanted, gate_example(metric)))
    limit = round(float(found.group("value")) * units[unit], 10)
    if not math.isfinite(limit) or (unit == "%" and limit > 1):
        raise ValueError("has a limit that no figure can have; 100 % is the most of a share")
    return Gate(text, metric, stat, found.group("op"), limit)


def gate_example(metric: str) -> str:
    """How a gate on this metric may look."""
    if metric in GATE_TIMES:
        return metric + ".p95<=800ms"
    return {"success": "success>=99%", "request_tps": "request_tps.p50>=20"}.get(metric, metric + ">=5")


# What one request can meet or miss, and in which direction: the limits that goodput counts by.
REQUEST_LIMITS = {
    **{name + "_ms": "<" for name in GATE_TIMES if name not in ("itl", "queue", "connect")}, "request_tps": ">",
}  # fmt: skip


def request_limits(gates: Sequence[Gate]) -> List[Gate]:
    """The gates whose limits one request can meet or miss: upper ones on its times, lower ones on its tokens/s."""
    return [gate for gate in gates if gate.op.startswith(REQUEST_LIMITS.get(gate.figure, "none"))]


def parse_gates(texts: Sequence[str]) -> List[Gate]:
    """Several gates; raises ValueError for one that can't be read, and for a goodput without a limit to count by."""
    gates = [parse_gate(text) for text in texts]
    if any(gate.metric == "goodput" for gate in gates) and not request_limits(gates):
        raise ValueError("needs, beside a goodput, a limit that one request can meet, such as ttft.p95<=800ms")
    return gates


# What a change between two runs is held against. A figure can be compared where the requests behind it are known one by
# one: gaps between chunks are kept as one histogram, and a minimum or maximum has no interval.
SHARE_FIGURES = frozenset(("success_rate",))  # of 1: they change by points
COMPARED_TIMES = tuple(name for name in GATE_TIMES if name != "itl") + ("request_tps",)
COMPARED_STATS = ("p50", "p90", "p95", "p99", "mean")
COMPARED_RATES = ("success", "throughput", "steady", "rps")
CONDITION = re.compile(
    r"(?ai)^\s*(?P<metric>[a-z_]+)\s*(?:\.\s*(?P<stat>[a-z0-9.]+))?\s*(?P<op><=|>=|<|>)\s*"
    r"(?P<sign>[+\u2212-])\s*(?P<value>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*(?P<unit>%|[a-z]+(?:/s)?)?\s*$"
)


class Condition(NamedTuple):
    """A change of one figure that fails a comparison: Condition("ttft.p95>+10%", "ttft", "p95", ">", 0.1, True).

    The limit is a share of the first run's figure where `relative`, else in the summary's unit; of a success rate,
    which is a share itself, % are points.
    """

    text: str
    metric: str
    stat: str
    op: str
    limit: float
    relative: bool

    @property
    def figure(self) -> str:
        """The summary's name of the metric: ttft is ttft_ms."""
        return GATE_FIGURES.get(self.metric, self.metric)

    def shown(self, low: float, high: float) -> bool:
        """Whether all of an interval lies beyond the limit: its near end does."""
        near = low if self.op.startswith(">") else high
        return {"<=": near <= self.limit, "<": near < self.limit, ">=": near >= self.limit, ">": near > self.limit}[
            self.op
        ]


def parse_condition(text: str) -> Condition:
    """A change such as `ttft.p95>+10%`, `ttft.p95>+50ms` or `success<-1%`; raises ValueError, which says how.

    >>> parse_condition("ttft.p95 > +0.05s").limit, parse_condition("success<-1%")[4:], parse_condition("rps<-5%").limit
    (50.0, (-0.01, False), -0.05)
    """
    found = CONDITION.match(text)
    if not found:
        raise ValueError("needs METRIC.STAT, one of < <= > >= and a change with its sign, such as ttft.p95>+10%, "
                         "ttft.p95>+50ms or success<-1%; a limit on the figure itself is a --slo of run")
    metric, stat, unit = (str(found.group(name) or "").lower() for name in ("metric", "stat", "unit"))
    if metric == "itl":
        raise ValueError("has no interval on itl, whose gaps are kept as one histogram; take tpot")
    if metric not in COMPARED_TIMES and metric not in COMPARED_RATES:
        names = COMPARED_TIMES + COMPARED_RATES
        raise ValueError("has an unknown metric, %s%s" % (
            metric, nearest(metric, names) or "; one of %s" % ", ".join(names)))
    timed = metric in COMPARED_TIMES
    if timed and stat not in COMPARED_STATS:
        words = (metric, metric, ", ".join(COMPARED_STATS))
        raise ValueError("needs a statistic of %s that can have an interval: %s.p95, or one of %s" % words)
    if not timed and stat:
        raise ValueError("needs %s without a statistic: leave .%s out" % (metric, stat))
    units = {**GATE_UNITS[metric], "%": 0.01}
    if unit not in units:
        wanted = " or ".join(name or "no unit" for name in units)
        raise ValueError("needs a change of %s in %s, such as %s" % (metric, wanted, condition_example(metric)))
    limit = round(float(found.group("value")) * units[unit], 10)
    if not math.isfinite(limit):
        raise ValueError("has a limit that no figure can have")
    limit = limit if found.group("sign") == "+" else -limit
    relative = unit == "%" and GATE_FIGURES.get(metric, metric) not in SHARE_FIGURES
    return Condition(text.strip(), metric, stat, found.group("op"), limit, relative)


def condition_example(metric: str) -> str:
    """How a condition on this metric may look."""
    if metric in COMPARED_TIMES:
        return metric + (".p50<-10%" if metric == "request_tps" else ".p95>+10%")
    return metric + ("<-1%" if metric == "success" else "<-5%")


# Query parameters and headers whose values are never shown. A token inside a longer name counts too
# (x-api-key, access_token), so the pattern errs towards hiding.
SECRET_NAME = re.compile(
    r"(?i)(authorization|cookie|token|secret|signature|password|passwd|credential|(api|access|app|auth|private)[-_]?key|"
    r"(^|[-_])(key|sign|sig|auth|pwd|ak|sk)($|[-_]))"
)
SECRET_IN_TEXT = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/=._~-]{6,}")
SECRET_JWT = re.compile(r"(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}", re.ASCII)  # wherever it stands
SECRET_IN_QUERY = re.compile(r"([?&#])([^=&?#\s\"']+)(=)([^&#\s\"']+)")
SECRET_IN_AUTHORITY = re.compile(r"(?<=://)[^/?#\s\"]+@")  # a password may hold an @ or a quote
# `"api_key": "…"` in JSON, in JSON inside JSON and as Python prints it; `X-Api-Key: …` and `Cookie: …` to the line end
SECRET_IN_FIELD = re.compile(r"""()\b([\w.-]{1,64})(\\*["']\s*:\s*\\*["'])((?:[^"'\\]|\\+[^"'\\])+)""")
SECRET_IN_HEADER = re.compile(
    r"(?i)(\b|(?<=\\[nrt]))((?:set-)?cookie|(?:proxy-)?authorization|[a-z0-9]{1,32}(?:-[a-z0-9]{1,32}){1,6})"
    r"(:[ \t]*)([^\r\n\"'\\]+)"
)
NOT_SECRET_NAME = re.compile(
    r"(?i)^(max|min|total|prompt|completion|input|output|num|n)[-_].*token|tokens$|^token[-_]mode$"
)


def is_secret_name(name: str) -> bool:
    """Whether a header, query parameter or body field of this name holds a secret: api-key yes, max_tokens no."""
    return bool(SECRET_NAME.search(name)) and not NOT_SECRET_NAME.search(name)


def redact(text: str, secrets: Sequence[str] = ()) -> str:
    """`text` with the given secrets, URL passwords, secret query values and bearer tokens shown as `***`.

    >>> redact("POST https://u:p@h/v1?api-key=k1&x=2")
    'POST https://***@h/v1?api-key=***&x=2'
    """
    for secret in secrets:
        text = mask(text, secret)
    text = SECRET_IN_AUTHORITY.sub("***@", text)
    for pattern in (SECRET_IN_QUERY, SECRET_IN_FIELD, SECRET_IN_HEADER):
        text = pattern.sub(hide_value, text)
    text = SECRET_JWT.sub("***", text)
    return SECRET_IN_TEXT.sub(lambda m: m.group(1) + " ***", text)


def mask(text: str, secret: str) -> str:
    """`text` with `***` for the secret, and for its beginning of 8 characters or more, which a cut may have left.

    >>> mask("key sk-123456789 or sk-12345", "sk-123456789")
    'key *** or ***'
    """
    beginning = secret[:8]
    pieces, end = [], 0
    start = text.find(beginning) if beginning else -1
    while start >= 0:
        pieces += [text[end:start], "***"]
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text[start : start + len(secret)], secret))
        end = start + sum(1 for _ in alike)
        start = text.find(beginning, end)
    return "".join([*pieces, text[end:]])


def hide_value(match: Match[str]) -> str:
    """A name and its value, as the patterns above find them, with the value hidden when the name is a secret's."""
    before, name, between, value = match.groups()
    return before + name + between + ("***" if is_secret_name(name) else value)


def spellings(secret: str) -> List[str]:
    """A text as it is, as JSON writes it, with escaped slashes or not, and as a URL does."""
    written = json.dumps(secret, ensure_ascii=False)[1:-1]
    ways = (secret, written, json.dumps(secret)[1:-1], written.replace("/", "\\/"), urllib.parse.quote(secret, safe=""))
    return list(dict.fromkeys(ways))


# In a text from elsewhere: what moves a terminal's cursor, turns the text around it, shows nothing, or is no character.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    """A text from elsewhere on one line of a terminal, without what is not to be seen."""
    return INVISIBLE.sub("\ufffd", text).translate({9: " ", 10: " ", 13: " "})


def read_no_constant(name: str) -> NoReturn:
    """Refuses NaN and Infinity, which Python reads and writes but JSON does not have."""
    raise ValueError(name)


def read_duration(text: str) -> float:
    """Seconds of `500ms`, `30s`, `5m`, `8h` or plain seconds; raises ValueError.

    >>> [read_duration(text) for text in ("500ms", "1.5", "2m")]
    [0.5, 1.5, 120.0]
    """
    match = re.match(r"^([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ms|s|m|h)?$", text.strip())
    if not match:
        raise ValueError("needs a duration such as 500ms, 30s, 5m or 8h")
    seconds = float(match.group(1)) * {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}[match.group(2)]
    if not 0 < seconds < math.inf:
        raise ValueError("must be above 0" if seconds <= 0 else "is too long")
    return seconds


def milliseconds(seconds: float) -> float:
    """Seconds as the milliseconds that files hold: 0.1 µs is the last digit."""
    return round(seconds * 1000.0, 4)


# A log-scaled histogram merges exactly across parts and is at most 1 % off: bucket 0 holds what is
# below 1 µs, bucket b >= 1 what lies in [1.01^(b-1), 1.01^b) µs.
LOG_STEP = math.log(1.01)


def log_bucket(seconds: float) -> int:
    """The bucket of a time span: 0 below 1 µs, else 1 + floor(ln(µs) / ln 1.01)."""
    micros = seconds * 1e6
    return 1 + int(math.log(micros) / LOG_STEP) if micros >= 1.0 else 0


def bucket_ms(bucket: int) -> float:
    """The value a bucket stands for, in ms: its geometric middle; 0 for the bucket below 1 µs."""
    return math.exp((bucket - 0.5) * LOG_STEP) / 1000.0 if bucket else 0.0


# ==================================================================================================
# 2. SSE: bytes in, events out, whatever the chunking
# ==================================================================================================
#
# The rules are those of WHATWG HTML, "Server-sent events", on bytes: lines end in CR, LF or CRLF,
# mixed at will; one byte order mark at the start is skipped; a line with a leading colon is a
# comment; one space after the colon of a field belongs to the syntax; `data` lines of one event are
# joined by LF; a blank line dispatches the event, if it had a data field at all.
#
# CR and CRLF become LF first (a CR that ends a read swallows an LF that begins the next), so that an
# event is what stands between two LFs and one `split` cuts a whole read. A piece that is not yet
# terminated is kept in a list and joined once, so that an event of many reads costs no quadratic
# copying. `str.splitlines` is not used anywhere: it also splits at U+2028, which is legal in JSON.
#
# Where we differ from a browser: `id` and `retry` serve reconnection, which a benchmark must not
# do, and are ignored; and after a *clean* end of the body an unterminated tail counts when it is
# JSON or [DONE], since several gateways forget the last blank line. Errors that stand beside the
# fields are found by `LooseSSEParser`. An event is a plain tuple
# (type, data) because making anything richer for each event would be the largest cost of the file.

Event = Tuple[str, bytes]
STRAY = "stray"  # the type of what is JSON but stands in no field
CR = 13  # `in` finds a number in bytes three times faster than a byte string
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DONE = b"[DONE]"


def is_complete_data(data: bytes) -> bool:
    """Whether unterminated data at a clean end of the body may be used: it is JSON or [DONE]."""
    if data.strip() == DONE:
        return True
    try:
        json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return False
    return True


class SSEParser:
    """Feeds on body bytes in any portions and gives the events that they complete.

    `feed` is `gather`, then `split`: who knows the data of the events beforehand looks at what is between the two.
    """

    LINE = (b"data: ", b"\n\n")  # what stands around the data of an event that is one line, as nearly all are

    def __init__(self, limit: int = EVENT_LIMIT) -> None:
        self._limit = limit
        self._pending: List[bytes] = []  # non-empty pieces of the event that is not yet terminated
        self._size = 0  # bytes in _pending
        self._skip_lf = False  # the last read ended in CR: an LF that follows belongs to it
        self._head: Optional[bytes] = b""  # up to two bytes that may begin a byte order mark; None: decided

    def feed(self, data: bytes) -> List[Event]:
        """Events completed by `data`; raises ParseError when one grows past the limit."""
        return self.split(self.gather(data))

    def gather(self, data: bytes) -> bytes:
        """`data` with LF for line ends, behind the bytes of the event that it goes on with; b"" if it ends none."""
        if self._skip_lf or CR in data:
            data = self._normalise(data)
        if self._head is not None:
            data = self._skip_mark(data)
        if self._pending and data:
            if not self._terminates(data):
                self._keep(data)
                return b""
            self._pending.append(data)
            data = b"".join(self._pending)
            self._pending, self._size = [], 0
        return data

    def split(self, data: bytes) -> List[Event]:
        """Events in what was gathered; what is behind the last blank line is kept."""
        cut = data.rfind(b"\n\n")
        if cut >= 0 and data[:6] == b"data: ":
            pieces = data[6:cut].split(b"\n\ndata: ")
            if data.count(b"\n", 0, cut) == 2 * (len(pieces) - 1):  # every event is one line `data: …`
                if cut + 2 < len(data):
                    self._keep(data[cut + 2 :])
                return list(zip(itertools.repeat("message"), pieces))
        blocks = data.split(b"\n\n")
        rest = blocks.pop()
        if rest:
            self._keep(rest)
        return [event for block in blocks for event in self._block(block)]

    def tail(self) -> List[Event]:
        """The unterminated event that a clean end of the body leaves, when it is JSON or [DONE]."""
        rest = b"".join(self._pending)
        self._pending, self._size = [], 0
        return [event for event in self._block(rest) if is_complete_data(event[1])]

    def _normalise(self, data: bytes) -> bytes:
        if self._skip_lf and data:
            self._skip_lf = False
            if data[:1] == b"\n":
                data = data[1:]
        if b"\r" in data:
            self._skip_lf = data[-1:] == b"\r"
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return data

    def _skip_mark(self, data: bytes) -> bytes:
        data = (self._head or b"") + data
        if len(data) < 3 and BYTE_ORDER_MARK.startswith(data):
            self._head = data
            return b""
        self._head = None
        return data[3:] if data.startswith(BYTE_ORDER_MARK) else data

    def _terminates(self, data: bytes) -> bool:
        return b"\n\n" in data or (data[:1] == b"\n" and self._pending[-1][-1:] == b"\n")

    def _keep(self, piece: bytes) -> None:
        self._pending.append(piece)
        self._size += len(piece)
        if self._size > self._limit:
            raise ParseError("an event is longer than %d bytes" % self._limit)

    def _block(self, block: bytes) -> List[Event]:
        """The event of the lines between two blank lines; none when no line was a data field."""
        kind, data = "message", []
        for line in block.split(b"\n"):
            name, _, value = line.partition(b":")
            if value[:1] == b" ":
                value = value[1:]
            if name == b"data":
                data.append(value)
            elif name == b"event":
                kind = value.decode("utf-8", "replace") or "message"
        return [(kind, b"\n".join(data))] if data else []


class LooseSSEParser(SSEParser):
    """The same, and errors that servers put beside the standard's fields, which a browser would skip.

    A field `error` is an event of that type (llama.cpp until September 2025, before a [DONE] that claims success); JSON
    that stands in no field, pretty-printed or not, is one of the type STRAY (Gemini, Qianfan v1).
    """

    BESIDE = re.compile(rb"^(?:error:|[{\[])", re.M)

    def _block(self, block: bytes) -> List[Event]:
        events = super()._block(block)
        found = self.BESIDE.search(block)
        if found is None:
            return events
        kind, data = STRAY, block[found.start() :]
        if found.group() == b"error:":
            kind, data = "error", data.split(b"\n")[0][len(b"error:") :]
        data = data.strip()
        return [*events, (kind, data)] if data != b"{}" and is_complete_data(data) else events


class NDJSONParser:
    """The same for newline-delimited JSON: a line is an event, blank lines are skipped."""

    LINE = (b"", b"\n")

    def __init__(self, limit: int = EVENT_LIMIT) -> None:
        self._limit = limit
        self._pending: List[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> List[Event]:
        """Events completed by `data`; raises ParseError when a line grows past the limit."""
        return self.split(self.gather(data))

    def gather(self, data: bytes) -> bytes:
        """`data` behind the bytes of the line that it goes on with; b"" if it ends none."""
        if b"\n" not in data:
            self._keep(data)
            return b""
        self._pending.append(data)
        data = b"".join(self._pending)
        self._pending, self._size = [], 0
        return data

    def split(self, data: bytes) -> List[Event]:
        """Events in what was gathered; what is behind the last LF is kept."""
        lines = data.split(b"\n")
        self._keep(lines.pop())
        return [("message", line.strip()) for line in lines if line.strip()]

    def tail(self) -> List[Event]:
        """The last line, which needs no LF."""
        rest = b"".join(self._pending).strip()
        self._pending, self._size = [], 0
        return [("message", rest)] if rest and is_complete_data(rest) else []

    def _keep(self, piece: bytes) -> None:
        if piece:
            self._pending.append(piece)
            self._size += len(piece)
            if self._size > self._limit:
                raise ParseError("a line is longer than %d bytes" % self._limit)


# ==================================================================================================
# 3. HTTP: a request to bytes; response bytes to body bytes
# ==================================================================================================
#
# HTTP/1.1 as RFC 9112 has it, sans-IO: `ResponseReader.feed` takes what one read brought and gives
# the body bytes in it at once, never waiting for the rest of a chunk, since waiting would be counted
# as the endpoint's time. The length of a body follows RFC 9112 section 6.3: none for 1xx, 204 and
# 304; chunked wins over Content-Length (both at once is a smuggling sign: read chunked, then close);
# several Content-Lengths must agree; with neither, the body lasts until the connection closes.
#
# Refused, as ParseError: a status line that is not HTTP/1.x, a head over 64 KiB, chunk sizes that
# are not plain hex, codings that the standard library cannot decode. gzip and deflate are decoded as
# they arrive although we ask for identity, because some gateways compress regardless; the record
# then says `compressed`, for its chunk times are the compressor's. Interim 1xx answers are skipped.
# Redirects are not followed: the token would travel with them.

HEAD_LIMIT = 64 * 1024  # bytes of a head; of all trailers
HEAD_END = re.compile(rb"\r?\n\r?\n")
TRAILERS_END = re.compile(rb"(?:\A|\n)\r?\n")
INTERIM_LIMIT = 100  # 1xx answers before the answer
UNPACKED_LIMIT = 1 << 25  # bytes that one read may unpack to
LINE_LIMIT = 8 * 1024  # a chunk-size line with its extensions
SPLIT_WORTH = 1024  # bytes of a read from which on splitting it at once pays: it may hold several chunks
CHUNK_SIZE = re.compile(rb"^([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?\r?$")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
STATUS_LINE = re.compile(rb"^HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([^\r\n]*))?$")


def encode_request(method: str, target: str, headers: Sequence[Tuple[str, str]], body: bytes = b"") -> bytes:
    """One HTTP/1.1 request as bytes. A control character in a header is a UserError: it could split the head."""
    if not re.match(r"^[!-~]+\Z", target):
        raise UserError("the URL's path or query holds a character outside visible ASCII; percent-encode it")
    lines = ["%s %s HTTP/1.1" % (method, target)]
    for name, value in headers:
        if CONTROL.search(name) or CONTROL.search(value):
            raise UserError("header %s holds a control character; remove it" % name.strip())
        lines.append("%s: %s" % (name, value))
    try:
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    except UnicodeEncodeError:
        raise UserError("a header holds a character outside latin-1; percent-encode it") from None
    return head + body


class Head(NamedTuple):
    """A response head: version minor (0 or 1), status, reason, headers with lower-case names."""

    minor: int
    status: int
    reason: str
    headers: Dict[str, str]


def parse_head(block: bytes) -> Head:
    """The head whose lines (without the blank one) are `block`; repeated headers are joined by a comma."""
    lines = block.replace(b"\r\n", b"\n").split(b"\n")
    match = STATUS_LINE.match(lines[0])
    if not match:
        raise ParseError("not an HTTP/1.1 answer: it begins with %r" % lines[0][:60].decode("latin-1"))
    headers: Dict[str, str] = {}
    name = ""
    for raw in lines[1:]:
        line = raw.decode("latin-1")
        if line[:1] in (" ", "\t") and name:  # obs-fold, RFC 9112 section 5.2
            headers[name] += " " + line.strip()
            continue
        name, colon, value = line.partition(":")
        name = name.strip().lower()
        if not colon or not name:
            raise ParseError("a header line without a name: %r" % line[:60])
        value = value.strip()
        headers[name] = headers[name] + ", " + value if name in headers else value
    return Head(int(match.group(1)), int(match.group(2)), (match.group(3) or b"").decode("latin-1"), headers)


MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
HTTP_DATE = re.compile(r"^\w{3}, ([0-9]{2}) (\w{3}) ([0-9]{4}) ([0-9]{2}):([0-9]{2}):([0-9]{2}) GMT$")


@functools.lru_cache(maxsize=8)  # many answers come within one second
def read_http_date(text: str) -> Optional[int]:
    """Seconds since 1970 of a Date header (RFC 9110, IMF-fixdate); None when it is none.

    >>> read_http_date("Tue, 24 Nov 2026 08:05:24 GMT")
    1795507524
    """
    match = HTTP_DATE.match(text)
    if match is None or match.group(2) not in MONTHS:
        return None
    day, _, year, *clock_time = match.groups()
    month = MONTHS.index(match.group(2)) + 1
    try:
        moment = datetime.datetime(int(year), month, int(day), *map(int, clock_time), tzinfo=datetime.timezone.utc)
    except ValueError:
        return None
    return int(moment.timestamp())


@functools.lru_cache(maxsize=2)
def write_http_date(seconds: int) -> str:
    """The Date header of a moment.

    >>> write_http_date(1795507524)
    'Tue, 24 Nov 2026 08:05:24 GMT'
    """
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    names = WEEKDAYS[moment.weekday()], moment.day, MONTHS[moment.month - 1], moment.year
    return "%s, %02d %s %04d" % names + moment.strftime(" %H:%M:%S GMT")


class Decompressor:
    """gzip or deflate, decoded as it arrives: whatever can be had of each portion is given at once."""

    def __init__(self, coding: str) -> None:
        self._wbits = 31 if "gzip" in coding else 15
        self._engine = zlib.decompressobj(self._wbits)
        self._start: Optional[bytes] = b"" if self._wbits == 15 else None  # until two bytes tell zlib from raw deflate

    def feed(self, data: bytes) -> bytes:
        """The decoded bytes; raises ParseError on a broken stream."""
        if self._start is not None:
            data = self._start + data
            self._start = data if len(data) < 2 else None
            if self._start is not None:
                return b""
            if data[0] & 15 != 8 or (data[0] << 8 | data[1]) % 31:  # RFC 1950; many servers send it without the wrapper
                self._wbits = -15
                self._engine = zlib.decompressobj(self._wbits)
        try:
            return self._decode(data)
        except zlib.error as error:
            raise ParseError("broken compressed body: %s" % error) from None

    def _decode(self, data: bytes) -> bytes:
        pieces, room = [], UNPACKED_LIMIT
        while data:
            if self._engine.eof:  # another gzip member follows
                self._engine = zlib.decompressobj(self._wbits)
            pieces.append(self._engine.decompress(data, room))
            if self._engine.unconsumed_tail:
                raise ParseError("a compressed body that unpacks to more than %d bytes at once" % UNPACKED_LIMIT)
            room -= len(pieces[-1]) - 1  # never 0, which would be no bound
            data = self._engine.unused_data
        return b"".join(pieces)


def discard(_: bytes) -> bytes:
    """Stands in for decoding where the body can't be decoded and doesn't matter."""
    return b""


class ResponseReader:
    """Reads one response. After `complete`, `leftover` holds bytes that belong to no response."""

    def __init__(self) -> None:
        self.head: Optional[Head] = None
        self.complete = False
        self.leftover = b""
        self.body_bytes = 0  # without chunk framing, before decompression
        self.interim = 0  # 1xx answers skipped
        self.coding = ""  # content coding that is being undone
        self._buffer = b""  # unread bytes of the head or of a chunk-size line
        self._remaining = 0  # bytes of the chunk, or of the whole body, still to come
        self._sizes: Dict[bytes, int] = {}  # chunk-size lines seen, with and without CR: a stream repeats few
        self._splits = True  # whether one `split` may cut a read into chunks: no CRLF was seen in their data
        self._after_chunk = False  # the CRLF that ends a chunk's data is still to come
        self._read: Callable[[bytes], bytes] = self._read_head
        self._decode: Optional[Callable[[bytes], bytes]] = None

    @property
    def waiting(self) -> bool:
        """Whether bytes of an unfinished head are held."""
        return self.head is None and bool(self._buffer)

    def feed(self, data: bytes) -> bytes:
        """Body bytes that `data` brings, decoded; raises ParseError."""
        body = self._read(data)
        return self._decode(body) if body and self._decode is not None else body

    def end(self) -> None:
        """The peer closed cleanly: the end of a body that has no length, else Truncated."""
        if self.complete:
            return
        if self.head is None:
            raise Truncated("in the head" if self._buffer else "before the head")
        if self._read != self._read_to_close:
            raise Truncated("in the body")
        self.complete = True

    def reusable(self) -> bool:
        """Whether the connection may carry another request (RFC 9112 section 9.3)."""
        if self.head is None or not self.complete or self.leftover or self._read == self._read_to_close:
            return False
        options = {option.strip() for option in self.head.headers.get("connection", "").lower().split(",")}
        if "transfer-encoding" in self.head.headers and ("content-length" in self.head.headers or not self.head.minor):
            return False  # smuggling, or chunked in HTTP/1.0: faulty framing (RFC 9112 section 6.1)
        return "close" not in options and (self.head.minor == 1 or "keep-alive" in options)

    def _read_head(self, data: bytes) -> bytes:
        searched = max(0, len(self._buffer) - 3)  # no blank line ends before it
        self._buffer += data
        while True:
            start = self._buffer[:8]
            if not b"HTTP/1.".startswith(start[:7]):
                raise ParseError("not an HTTP/1.1 answer: it begins with %r" % self._buffer[:60].decode("latin-1"))
            match = HEAD_END.search(self._buffer, searched)
            if (match.start() if match else len(self._buffer)) > HEAD_LIMIT:
                raise ParseError("the response head is longer than %d bytes" % HEAD_LIMIT)
            if match is None:
                return b""
            head = parse_head(self._buffer[: match.start()])
            rest, self._buffer = self._buffer[match.end() :], b""
            if head.status == 101:
                raise ParseError("the endpoint switched protocols (101) without being asked")
            if head.status >= 200:
                self.head = head
                self._choose_body(head)
                return self._read(rest)
            self.interim += 1
            if self.interim > INTERIM_LIMIT:
                raise ParseError("more than %d interim answers (1xx)" % INTERIM_LIMIT)
            self._buffer, searched = rest, 0
            if not rest:
                return b""

    def _choose_body(self, head: Head) -> None:
        if head.status in (204, 304):
            self._finish(b"")
            return
        transfer = head.headers.get("transfer-encoding", "").lower()
        codings, _, last = transfer.rpartition(",")
        chunked = last.strip() == "chunked"
        self._choose_coding(head, (codings if chunked else "") + "," + head.headers.get("content-encoding", ""))
        if transfer:
            self._read = self._read_chunked if chunked else self._read_to_close
        elif "content-length" in head.headers:
            self._remaining = self._content_length(head.headers["content-length"])
            self._read = self._read_length
            if not self._remaining:
                self._finish(b"")
        else:
            self._read = self._read_to_close

    def _choose_coding(self, head: Head, listed: str) -> None:
        codings = {coding.strip().lower() for coding in listed.split(",")} - {"", "identity"}
        if not codings:
            return
        self.coding = ", ".join(sorted(codings))
        if self.coding in ("gzip", "x-gzip", "deflate"):
            self._decode = Decompressor(self.coding).feed
        elif head.status < 300:
            raise ParseError("content coding %r cannot be decoded; identity was asked for" % self.coding)
        else:  # the status says what went wrong, whatever the body would add
            self._decode = discard

    @staticmethod
    def _content_length(value: str) -> int:
        lengths = {part.strip() for part in value.split(",")}
        length = lengths.pop()
        if lengths or not re.match(r"^[0-9]{1,18}$", length):
            raise ParseError("Content-Length %r is not one number" % value[:60])
        return int(length)

    def _finish(self, leftover: bytes) -> None:
        self.complete = True
        self.leftover = leftover
        self._read = self._read_nothing

    def _read_nothing(self, data: bytes) -> bytes:
        self.leftover += data
        return b""

    def _read_to_close(self, data: bytes) -> bytes:
        self.body_bytes += len(data)
        return data

    def _read_length(self, data: bytes) -> bytes:
        body = data[: self._remaining]
        self.body_bytes += len(body)
        self._remaining -= len(body)
        if not self._remaining:
            self._finish(data[len(body) :])
        return body

    def _read_chunked(self, data: bytes) -> bytes:
        """The data of the chunks in `data`; the pieces are joined once."""
        if self._buffer:
            data, self._buffer = self._buffer + data, b""
        sizes = self._sizes
        if not self._remaining:  # one whole chunk is what most reads bring
            end = data.find(b"\r\n")
            size = sizes.get(data[:end])
            if size and len(data) == end + size + 4 and data[-2:] == b"\r\n":
                self.body_bytes += size
                return data[end + 2 : -2]
        pieces: List[bytes] = []
        position = self._split_chunks(data, pieces) if self._splits and len(data) > SPLIT_WORTH else 0
        remaining, after = 0 if position else self._remaining, self._after_chunk
        while True:
            if remaining:
                piece = data[position : position + remaining]
                pieces.append(piece)
                position += len(piece)
                remaining -= len(piece)
                if remaining:
                    break
                if data[position : position + 2] == b"\r\n":
                    position += 2
                else:
                    after = True
            end = data.find(b"\n", position)
            if end < 0:
                self._hold(data[position:])
                break
            line = data[position:end]
            position = end + 1
            if after:  # the CRLF behind a chunk's data came in pieces, or as a bare LF
                if line not in (b"\r", b""):
                    raise ParseError("a chunk is longer than its size says")
                after = False
                continue
            remaining = sizes.get(line, -1)
            if remaining < 0:
                remaining = self._chunk_size(line)
            if not remaining:
                self._read = self._read_trailers
                self._after_chunk = False
                body = b"".join(pieces)
                self.body_bytes += len(body)
                self._remaining = 0
                self._read_trailers(data[position:])
                return body
        self._remaining, self._after_chunk = remaining, after
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self.body_bytes += len(body)
        return body

    def _split_chunks(self, data: bytes, pieces: List[bytes]) -> int:
        """Cuts the chunks that are whole in `data` with one `split`; returns where the rest begins.

        A piece that is as long as the line before it says is a chunk. The first that is not ends what can be had
        like this: a size that was not seen yet (as the 0 of the end never was), the CRLF behind a chunk that came
        before, or data with a CRLF of their own.
        """
        start = self._remaining
        if start:
            if data[start : start + 2] != b"\r\n":
                return 0
            pieces.append(data[:start])
            start += 2
        parts = data[start:].split(b"\r\n")
        count = (len(parts) - 1) // 2
        chunks = parts[1 : 2 * count : 2]
        said, found = list(map(self._sizes.get, parts[: 2 * count : 2])), list(map(len, chunks))
        if said != found:
            count = next(number for number in range(count) if said[number] != found[number])
            self._splits = said[count] is None
        pieces += chunks[:count]
        rest = parts[2 * count :]
        return len(data) - sum(map(len, rest)) - 2 * (len(rest) - 1)

    def _hold(self, rest: bytes) -> None:
        if len(rest) > LINE_LIMIT:
            raise ParseError("a chunk-size line is longer than %d bytes" % LINE_LIMIT)
        self._buffer = rest

    def _chunk_size(self, line: bytes) -> int:
        match = CHUNK_SIZE.match(line)
        if not match:
            raise ParseError("not a chunk size: %r" % line[:40].decode("latin-1"))
        size = int(match.group(1), 16)
        if len(self._sizes) < 8192 and len(line) <= 18:  # without extensions, which may be different each time
            self._sizes[line] = self._sizes[line[:-1] if line[-1:] == b"\r" else line] = size
        return size

    def _read_trailers(self, data: bytes) -> bytes:
        """Trailer fields are read to the blank line and thrown away (RFC 9112 section 7.1.2)."""
        searched = max(0, len(self._buffer) - 2)
        self._buffer += data
        match = TRAILERS_END.search(self._buffer, searched)
        if (match.start() if match else len(self._buffer)) > HEAD_LIMIT:
            raise ParseError("the trailers are longer than %d bytes" % HEAD_LIMIT)
        if match is not None:
            rest, self._buffer = self._buffer[match.end() :], b""
            self._finish(rest)
        return b""


# ==================================================================================================
# 4. Steps: what a signature is computed with
# ==================================================================================================
#
# Pure functions of a request and its secrets: what is sent, a moment and a nonce go in, texts and bytes come out.
# Nothing here reads a clock, a file or the environment, so each vector that a vendor published is a test.
#
# First what all signatures have in common: hashes, encodings, a canonical request. Then, for a gateway that
# nobody has heard of, *steps* (`Pipeline`): small expressions over these functions, each of which may use the
# values of those before it. They are read by a parser of our own, which knows texts, numbers, names and
# calls and nothing else, so that a gateway's file can compute a signature and can't do anything else.
# A mistake in one is found when the file is read, and its error names file, step and column.
#
# A step's name and text may be shown to who looks for the cause of a 401; a secret is in neither. What is
# computed from a secret is ***, unless it is a hash over something that each request has anew, as a signature
# is, and is not the key of a later hash.

Value = Union[str, bytes]
Headers = List[Tuple[str, str]]
HASHES = ("sha256", "sha1", "sha512", "md5", "sm3")
OUTPUTS: Dict[str, Callable[[bytes], Value]] = {
    "hex": bytes.hex,
    "HEX": lambda data: data.hex().upper(),
    "b64": lambda data: base64.b64encode(data).decode("ascii"),
    "b64url": lambda data: base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii"),
    "raw": bytes,
}  # fmt: skip
TIME_FORMATS = {
    "epoch": "", "epoch_ms": "", "rfc1123": "",  # made otherwise
    "iso": "%Y-%m-%dT%H:%M:%SZ", "iso_basic": "%Y%m%dT%H%M%SZ", "date": "%Y-%m-%d", "date_basic": "%Y%m%d",
    "compact": "%Y%m%d%H%M%S",
}  # fmt: skip
PLACEHOLDER = re.compile(r"\$\{([^{}]*)\}")


class Secrets(NamedTuple):
    """What proves who asks, as the flags gave it; an empty text was not given. options: those of --auth-opt."""

    key: str = ""
    secret: str = ""
    token: str = ""
    options: Mapping[str, str] = {}


class Signed(NamedTuple):
    """A request's target and headers as they are sent, and how they came about: (name, text) without secrets."""

    target: str
    headers: Headers
    steps: List[Tuple[str, str]]


def is_secret_option(name: str) -> bool:
    """Whether an --auth-opt of this name holds a secret: session-token yes, signature-header no."""
    return is_secret_name(name) and not name.endswith(("-header", "-format"))


def bearer_header(token: str) -> Tuple[str, str]:
    """The header that carries a token, as RFC 6750 has it."""
    return "Authorization", "Bearer " + token


def basic_header(userinfo: str) -> Tuple[str, str]:
    """The header that carries `user:password`, as RFC 7617 has it."""
    return "Authorization", "Basic " + base64.b64encode(userinfo.encode("utf-8")).decode("ascii")


# What the schemes have in common.


def octets(value: Value) -> bytes:
    """A text as UTF-8; bytes as they are."""
    return value.encode("utf-8") if isinstance(value, str) else value


def hash_of(value: Value, algorithm: str = "sha256") -> bytes:
    """The raw hash."""
    return hashlib.new(algorithm, octets(value)).digest()


def hmac_of(key: Value, message: Value, algorithm: str = "sha256") -> bytes:
    """The raw HMAC."""
    import hmac

    return hmac.digest(octets(key), octets(message), algorithm)


@functools.lru_cache(maxsize=8)  # a key holds for a day
def key_chain(key: Value, *parts: Value) -> bytes:
    """HMAC-SHA256 of the first part, which is the key for the second, and so on: a key bound to date and service."""
    for part in parts:
        key = hmac_of(key, part)
    return octets(key)


def format_time(moment: float, form: str, plus: int = 0) -> str:
    """Seconds since 1970 in UTC, in a form of TIME_FORMATS or one of strftime's. plus: s ahead, such as a zone's.

    >>> format_time(1735787045.25, "epoch_ms"), format_time(1735787045, "iso"), format_time(0, "%H:%M", 28800)
    ('1735787045250', '2025-01-02T03:04:05Z', '08:00')
    """
    if form == "epoch_ms":
        return "%d" % round((moment + plus) * 1000)
    if form == "epoch":
        return "%d" % (moment + plus)
    if form == "rfc1123":
        return write_http_date(int(moment + plus))
    when = datetime.datetime.fromtimestamp(int(moment + plus), datetime.timezone.utc)
    return when.strftime(TIME_FORMATS.get(form, form))


def percent_encode(value: Value, safe: str = "") -> str:
    """Every byte but letters, digits and -._~ percent-encoded, in capitals, as RFC 3986 and all the vendors have it."""
    return urllib.parse.quote(value, safe="-._~" + safe)


def canonical_path(path: str, slash: bool = False) -> str:
    """A path percent-encoded in one way, however it was written. slash: ends with one."""
    path = percent_encode(urllib.parse.unquote_to_bytes(path), "/")
    return path + "/" * (slash and not path.endswith("/"))


def query_pairs(query: str, skip: Iterable[str] = ()) -> List[Tuple[str, str]]:
    """A query's names and values, each percent-encoded in one way; a value that is missing is empty."""
    pairs = [item.partition("=")[::2] for item in query.split("&") if item]
    pairs = [(urllib.parse.unquote_to_bytes(name), urllib.parse.unquote_to_bytes(value)) for name, value in pairs]
    left_out = {octets(name) for name in skip}
    return [(percent_encode(name), percent_encode(value)) for name, value in pairs if name not in left_out]


def canonical_query(query: str, skip: Iterable[str] = ()) -> str:
    """A query sorted by name and then value, percent-encoded in one way."""
    return "&".join("%s=%s" % pair for pair in sorted(query_pairs(query, skip)))


def header_values(headers: Headers, names: Iterable[str]) -> Headers:
    """Of these headers (lower-case names) the ones that are sent, sorted: (lower-case name, trimmed value)."""
    sent = {name.lower(): value.strip() for name, value in reversed(headers)}
    return sorted((name, sent[name]) for name in set(names) if name in sent)


def with_headers(headers: Headers, new: Headers) -> Headers:
    """Headers with new ones added, each in place of those of its name."""
    names = {name.lower() for name, _ in new}
    return [header for header in headers if header[0].lower() not in names] + new


def names_in(text: str) -> List[str]:
    """Header names of a list with ; or commas, in lower case."""
    return [name.lower() for name in re.split(r"[\s;,]+", text) if name]


# Steps: expressions over pure functions.


class Subject:
    """One request as the steps see it, and the values of the steps so far."""

    def __init__(
        self, secrets: Secrets, method: str, target: str, headers: Headers, body: bytes, moment: float, nonce: str
    ) -> None:
        self.method, self.body, self.moment, self.nonce = method, body, moment, nonce
        self._target, self._headers = target, headers
        self.values: Dict[str, Value] = dict(secrets.options)
        self.values.update(("option:" + name, value) for name, value in secrets.options.items())
        self.values.update(key=secrets.key, secret=secrets.secret, token=secrets.token, nonce=nonce, uuid=self.uuid)
        self.trace: List[Tuple[Value, bool]] = []  # what was hashed, and whether it shows a secret

    def fill(self, template: str, encode: bool) -> Optional[str]:
        """A text with the values of its `${name}`, percent-encoded on request; None when one is not known yet."""
        if "${" not in template:
            return template
        names = PLACEHOLDER.findall(template)
        if "secret" in names or any(name not in self.values for name in names):
            return None
        if any(isinstance(self.values[name], bytes) for name in names):
            raise UserError("${%s} is bytes, not text; take hex() or b64() of it"
                            % next(name for name in names if isinstance(self.values[name], bytes)))  # fmt: skip
        return PLACEHOLDER.sub(
            lambda match: percent_encode(self.values[match[1]]) if encode else str(self.values[match[1]]), template
        )

    @property
    def path(self) -> str:
        """The request target's path as it is sent."""
        path = self.fill(self._target.partition("?")[0], True)
        if path is None:
            raise UserError("the path holds a ${…} of a step that comes later or isn't there")
        return path

    @property
    def query(self) -> str:
        """The query as it is sent, without the parameters that are not known yet."""
        filled = (self.fill(item, True) for item in self._target.partition("?")[2].split("&"))
        return "&".join(item for item in filled if item)

    @property
    def target(self) -> str:
        """Path and query."""
        query = self.query
        return self.path + ("?" + query if query else "")

    @property
    def headers(self) -> Headers:
        """The headers, without those that are not known yet."""
        filled = ((name, self.fill(value, False)) for name, value in self._headers)
        return [(name, value) for name, value in filled if value is not None]

    def header(self, name: str) -> str:
        """A header's value; raises UserError when it isn't sent."""
        values = header_values(self.headers, [name.lower()])
        if not values:
            raise UserError("there is no header %s, or it is filled in by a later step" % name)
        return values[0][1]

    def hidden(self, text: str) -> str:
        """A text without the secrets: what a step refuses may be one."""
        secret = (name for name in self.values if name in ("secret", "token") or is_secret_option(name))
        return redact(text, [str(self.values[name]) for name in secret if self.values[name]])

    def random_hex(self, count: int) -> str:
        """So many hex digits, the same throughout one request."""
        return (self.nonce if count <= len(self.nonce) else hash_of("more " + self.nonce, "sha512").hex())[:count]

    @property
    def uuid(self) -> str:
        """A UUID of version 4 made of the nonce."""
        digits = self.random_hex(32)
        variant = "%x" % (8 + int(digits[16], 16) % 4)
        return "-".join((digits[:8], digits[8:12], "4" + digits[13:16], variant + digits[17:20], digits[20:]))


NAMES: Dict[str, Callable[[Subject], Value]] = {
    "method": lambda subject: subject.method,
    "path": lambda subject: subject.path,
    "query": lambda subject: subject.query,
    "target": lambda subject: subject.target,
    "host": lambda subject: subject.header("Host"),
    "body": lambda subject: subject.body,
    "nonce": lambda subject: subject.nonce,
    "uuid": lambda subject: subject.uuid,
    **{name: lambda subject, name=name: subject.values[name] for name in ("key", "secret", "token")},
}


def as_text(value: Any) -> str:
    """A value as text; raises ValueError for bytes."""
    if isinstance(value, bytes):
        raise ValueError("takes text, not bytes; take hex() or b64() of them")
    return str(value)


def join_values(separator: Any, *parts: Any) -> Value:
    """The parts as one text; as bytes when one of them is bytes."""
    if isinstance(separator, bytes) or any(isinstance(part, bytes) for part in parts):
        pieces = [part if isinstance(part, bytes) else str(part).encode("utf-8") for part in (separator, *parts)]
        return pieces[0].join(pieces[1:])
    return str(separator).join(map(str, parts))


def canonical_headers(subject: Subject, names: Any, encode: bool, lower: bool, end: bool) -> str:
    """One line `name:value` for each of the headers, sorted; raises UserError for one that isn't sent."""
    wanted = names_in(as_text(names))
    for name in wanted:
        subject.header(name)
    lines = []
    for name, value in header_values(subject.headers, wanted):
        shown = value.lower() if lower else value
        lines.append(percent_encode(name) + ":" + percent_encode(shown) if encode else name + ":" + shown)
    return "\n".join(lines) + "\n" * end


def decode_base64(text: Any) -> bytes:
    """The bytes of base64, of either alphabet; raises ValueError."""
    plain = as_text(text).strip().replace("-", "+").replace("_", "/")
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)


def json_of(*values: Any, **fields: Any) -> str:
    """A text or number as JSON, or named values as an object in their order."""
    tree = {name: value if isinstance(value, int) else as_text(value) for name, value in fields.items()}
    one = [value if isinstance(value, int) else as_text(value) for value in values]
    return json.dumps(one[0] if one else tree, ensure_ascii=False, separators=(",", ":"))


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    """A reader of one of these words; raises ValueError."""

    def read(text: str) -> str:
        if text not in known:
            raise ValueError("must be one of %s, not %r" % (", ".join(known), text))
        return text

    return read


def read_hash(text: str) -> str:
    """The name of a hash that this Python has; raises ValueError."""
    one_of(HASHES)(text)
    if text not in hashlib.algorithms_available:
        raise ValueError("%s is not in this Python's OpenSSL" % text)
    return text


def read_yes(text: str) -> bool:
    """yes or no; raises ValueError."""
    return one_of(("yes", "no"))(text) == "yes"


def read_time_format(text: str) -> str:
    """A name of TIME_FORMATS, or a form of strftime's; raises ValueError."""
    return text if "%" in text else one_of(TIME_FORMATS)(text)


def read_whole(text: str) -> int:
    """A whole number; raises ValueError."""
    if not re.match(r"^-?[0-9]{1,9}$", text):
        raise ValueError("must be a whole number, not %r" % text)
    return int(text)


def read_digits(text: str) -> int:
    """How many hex digits: 1 to 128; raises ValueError."""
    if not 1 <= read_whole(text) <= 128:
        raise ValueError("must be 1 to 128")
    return int(text)


class Function(NamedTuple):
    """A function of the steps, and what it gives. run(subject, *arguments, **options).

    takes: the arguments, * for any number more; options: (name, default, reader), which are constants. hashes: which
    argument is hashed; keyed: which one is the key.
    """

    says: str
    run: Callable[..., Any]
    takes: Tuple[str, ...] = ("value",)
    options: Tuple[Tuple[str, str, Callable[[str], Any]], ...] = ()
    hashes: Optional[int] = None
    keyed: Optional[int] = None

    @property
    def form(self) -> str:
        """Its arguments and options, as one writes them."""
        words = [*self.takes, *("%s=%s" % (name, default) for name, default, _ in self.options)]
        return "(%s)" % ", ".join(words).replace(", *", ", …")


OUT = ("out", "hex", one_of(OUTPUTS))
FUNCTIONS: Dict[str, Function] = {
    "hmac": Function(
        "the HMAC of a message",
        lambda _, key, message, alg, out: OUTPUTS[out](hmac_of(key, message, alg)), ("key", "message"),
        (("alg", "sha256", read_hash), OUT), 1, 0,
    ),
    "chain": Function(
        "HMAC-SHA256 of the first part, which is the key for the next, and so on; bytes",
        lambda _, key, *parts: key_chain(key, *parts), ("key", "part", "*"), (), 1, 0,
    ),
    **{
        name: Function(
            "the hash %s" % name, lambda _, value, out, name=name: OUTPUTS[out](hash_of(value, name)),
            options=(OUT,), hashes=0,
        )
        for name in HASHES
    },
    "join": Function("the parts with the separator between them", lambda _, *parts: join_values(*parts),
                     ("separator", "part", "*")),
    "lower": Function("in lower case", lambda _, value: as_text(value).lower()),
    "upper": Function("in capitals", lambda _, value: as_text(value).upper()),
    "trim": Function("without the blanks around it", lambda _, value: as_text(value).strip()),
    "slice": Function(
        "the characters from start on, to before end; negative ones count from the end",
        lambda _, value, start, end: as_text(value)[start:end],
        options=(("start", "0", read_whole), ("end", "999999999", read_whole)),
    ),
    "urlencode": Function("percent-encoded, save letters, digits, -._~ and what is in safe",
                          lambda _, value, safe: percent_encode(value, safe), options=(("safe", "", str),)),
    "b64": Function("as base64", lambda _, value: OUTPUTS["b64"](octets(value))),
    "b64url": Function("as base64 for URLs, without =", lambda _, value: OUTPUTS["b64url"](octets(value))),
    "b64decode": Function("the bytes of base64, as some keys are given", lambda _, value: decode_base64(value)),
    "hex": Function("the bytes as hex digits", lambda _, value: octets(value).hex()),
    "json": Function("`json(value)`: a text as JSON writes it; `json(name=value, …)`: an object",
                     lambda _, *values, **fields: json_of(*values, **fields), ("value",)),
    "number": Function("a text of digits as a number, for json", lambda _, value: int(as_text(value))),
    "time": Function(
        "the request's time in UTC: epoch, epoch_ms, iso, iso_basic, date, date_basic, compact, rfc1123 or a form of "
        "strftime's; plus: seconds ahead",
        lambda subject, fmt, plus: format_time(subject.moment, fmt, plus), (),
        (("fmt", "epoch", read_time_format), ("plus", "0", read_whole)),
    ),
    "nonce": Function("32 random hex digits, the same throughout a request", lambda subject: subject.nonce, ()),
    "rand_hex": Function("the first n of them", lambda subject, n: subject.random_hex(n), (),
                         (("n", "32", read_digits),)),
    "uuid": Function("a UUID made of them", NAMES["uuid"], ()),
    "header": Function("a header's value", lambda subject, name: subject.header(as_text(name)), ("name",)),
    "canon_path": Function(
        "the path, percent-encoded in one way; slash=yes: ends with one",
        lambda subject, slash: canonical_path(subject.path, slash), (), (("slash", "no", read_yes),),
    ),
    "canon_query": Function(
        "the query sorted and percent-encoded in one way, without the parameters to skip, with blanks between them",
        lambda subject, skip: canonical_query(subject.query, skip), (), (("skip", "", str.split),),
    ),
    "canon_headers": Function(
        "a line name:value of each of the headers, sorted; encode=yes: percent-encoded, lower=yes: values in lower "
        "case, end=no: without a line feed after the last",
        canonical_headers, ("names",),
        (("encode", "no", read_yes), ("lower", "no", read_yes), ("end", "yes", read_yes)),
    ),
}  # fmt: skip


class Shade(NamedTuple):
    """What may be shown of a value.

    secret: it gives a secret away; derived: it is computed with one, through a hash or not; varied: it is another one
    for each request, so that a hash over it and a secret stands for no secret.
    """

    secret: bool = False
    derived: bool = False
    varied: bool = False


class Node(NamedTuple):
    """A compiled expression: its value for a subject, where it begins, and what may be shown of it."""

    value: Callable[[Subject], Any]
    column: int
    constant: Optional[str] = None
    shade: Shade = Shade()
    names: FrozenSet[str] = frozenset()  # that it mentions
    keys: FrozenSet[str] = frozenset()  # those of them that make the key of a hash


class Word(NamedTuple):
    """A word of an expression: its kind, its text, and the column of its first character, from 1."""

    kind: str
    text: str
    column: int


BLANK = re.compile(r"\s*")
WORD = re.compile(
    r"(?P<text>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")|(?P<number>-?[0-9]+)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*(?:[:-][A-Za-z0-9_]+)*)|(?P<mark>[(),=])",
    re.DOTALL,
)
# Names and functions whose value is another one for each request.
VARIED = frozenset((
    "body", "query", "target", "nonce", "uuid", "time", "rand_hex", "header", "canon_headers", "canon_query"
))  # fmt: skip
DEEPEST = 40  # calls inside each other
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "0": "\0", "\\": "\\", "'": "'", '"': '"'}


class Parser:
    """Compiles one expression into a Node, by recursive descent; raises UserError that names place and column."""

    def __init__(self, text: str, where: str, names: Mapping[str, Shade]) -> None:
        self._text = text
        self._where = where
        self._names = names
        self._tokens = self._tokenize()
        self._at = self._depth = 0

    def parse(self) -> Node:
        """The whole text as one expression."""
        node = self._expression()
        if self._next.kind != "end":
            self._fail(self._next, "%r is left over after the end of the expression" % self._next.text)
        return node

    def _fail(self, at: Union[Word, Node], what: str) -> NoReturn:
        raise UserError("%s, column %d: %s" % (self._where, at.column, what))

    def _tokenize(self) -> List[Word]:
        tokens, at = [], 0
        while True:
            at = BLANK.match(self._text, at).end()  # type: ignore[union-attr]
            if at == len(self._text):
                return [*tokens, Word("end", "", at + 1)]
            match = WORD.match(self._text, at)
            if match is None:
                token = Word("", self._text[at], at + 1)
                unclosed = token.text in "'\""
                self._fail(token, "a text without its closing quote" if unclosed else "%r means nothing" % token.text)
            tokens.append(Word(str(match.lastgroup), match.group(), at + 1))
            at = match.end()

    @property
    def _next(self) -> Word:
        return self._tokens[self._at]

    def _take(self) -> Word:
        self._at += 1
        return self._tokens[self._at - 1]

    def _expect(self, mark: str, said: str) -> None:
        if (self._next.kind, self._next.text) != ("mark", mark):
            self._fail(self._next, "expected %s before %s" % (said, self._next.text or "the end"))
        self._take()

    def _expression(self) -> Node:
        token = self._take()
        if self._depth > DEEPEST:
            self._fail(token, "more than %d calls inside each other; cut it into steps" % DEEPEST)
        if token.kind == "text":
            text = self._unescaped(token)
            return Node(lambda _: text, token.column, constant=text)
        if token.kind == "number":
            if len(token.text) > 20:
                self._fail(token, "a number of more than 20 digits; write it in quotes")
            return Node(lambda _: int(token.text), token.column, constant=token.text)
        if token.kind == "name" and (self._next.kind, self._next.text) == ("mark", "("):
            self._depth += 1
            node = self._call(token)
            self._depth -= 1
            return node
        if token.kind == "name":
            return self._name(token)
        return self._fail(token, "expected a text in quotes, a number, a name or a function")

    def _unescaped(self, token: Word) -> str:
        def escape(match: Match[str]) -> str:
            if match[1] not in ESCAPES:
                self._fail(token._replace(column=token.column + match.start() + 1), "\\%s is no escape" % match[1])
            return ESCAPES[match[1]]

        return re.sub(r"\\(.)", escape, token.text[1:-1], flags=re.DOTALL)

    def _name(self, token: Word) -> Node:
        name = token.text
        if name not in self._names:
            hint = nearest(name, [*self._names, *FUNCTIONS])
            if name in FUNCTIONS:
                hint = "; it is a function: %s(…)" % name
            self._fail(token, "%s is not known here%s" % (name, hint))
        known = NAMES.get(name)
        value = known if known is not None else lambda subject: subject.values[name]
        return Node(value, token.column, None, self._names[name], frozenset([name]))

    def _call(self, token: Word) -> Node:
        if token.text not in FUNCTIONS:
            self._fail(token, "there is no function %s%s" % (token.text, nearest(token.text, FUNCTIONS)))
        function = FUNCTIONS[token.text]
        self._take()  # the parenthesis
        given: List[Node] = []
        named: Dict[str, Node] = {}
        while (self._next.kind, self._next.text) != ("mark", ")"):
            if given or named:
                self._expect(",", ", or )")
            following = self._tokens[self._at + 1] if self._next.kind == "name" else self._next
            if (following.kind, following.text) == ("mark", "="):
                name = self._take().text
                self._take()
                named[name] = self._expression()
                continue
            if named:
                self._fail(self._next, "an argument without a name can't follow one with a name")
            given.append(self._expression())
        self._take()
        if token.text == "json":
            return self._json(token, given, named)
        arguments, options = self._arguments(token, function, given, named)
        return self._node(token, function, arguments, options)

    def _arguments(
        self, token: Word, function: Function, given: Sequence[Node], named: Mapping[str, Node]
    ) -> Tuple[List[Node], Dict[str, Any]]:
        """A call's arguments, and its options as they are read."""
        takes = [name for name in function.takes if name != "*"]
        endless = "*" in function.takes
        count = len(given) if endless else min(len(given), len(takes))
        if count < len(takes):
            self._fail(token, "%s needs %s" % (token.text, function.form))
        known = [name for name, _, _ in function.options]
        options = dict(zip(known, given[count:]))
        if len(given) - count > len(known):
            self._fail(given[count + len(known)], "%s takes no more than %s" % (token.text, function.form))
        for name, node in named.items():
            if name not in known or name in options:
                self._fail(node, "%s takes %s once%s" % (token.text, function.form, nearest(name, known)))
            options[name] = node
        return list(given[:count]), {
            name: self._option(name, read, options[name]) if name in options else read(default)
            for name, default, read in function.options
        }

    def _option(self, name: str, read: Callable[[str], Any], node: Node) -> Any:
        if node.constant is None:
            self._fail(node, "%s must be a text in quotes or a number, known when this is read" % name)
        try:
            return read(node.constant)  # type: ignore[arg-type]
        except ValueError as error:
            return self._fail(node, "%s %s" % (name, error))

    def _json(self, token: Word, given: Sequence[Node], named: Mapping[str, Node]) -> Node:
        if len(given) + bool(named) != 1:
            self._fail(token, "json needs one value, or name=value, …")
        values, fields = [node.value for node in given], {name: node.value for name, node in named.items()}
        run = self._guarded(
            token, lambda subject: json_of(*(value(subject) for value in values),
                                           **{name: value(subject) for name, value in fields.items()})
        )  # fmt: skip
        return self._over([*given, *named.values()], Node(run, token.column))

    @staticmethod
    def _over(parts: Sequence[Node], node: Node) -> Node:
        """A node with what its parts tell of secrets."""
        return node._replace(
            shade=Shade(*(any(flags) for flags in zip(node.shade, *(part.shade for part in parts)))),
            names=frozenset().union(*(part.names for part in parts)),
            keys=node.keys.union(*(part.keys for part in parts)),
        )  # fmt: skip

    def _node(
        self, token: Word, function: Function, arguments: Sequence[Node], options: Mapping[str, Any]
    ) -> Node:
        values, run, hashed = [node.value for node in arguments], function.run, function.hashes
        hidden = hashed is not None and arguments[hashed].shade.secret

        def value(subject: Subject) -> Any:
            parts = [part(subject) for part in values]
            if hashed is not None:
                subject.trace.append((parts[hashed], hidden))
            return run(subject, *parts, **options)

        keys = arguments[function.keyed].names if function.keyed is not None else frozenset()
        shade = Shade(varied=token.text in VARIED)
        node = self._over(arguments, Node(self._guarded(token, value), token.column, shade=shade, keys=keys))
        if hashed is None or not node.shade.varied:
            return node
        return node._replace(shade=node.shade._replace(secret=False))  # it is what is sent

    def _guarded(self, token: Word, value: Callable[[Subject], Any]) -> Callable[[Subject], Any]:
        """The value, with what it refuses as a UserError of this place."""

        def run(subject: Subject) -> Any:
            try:
                return value(subject)
            except (ValueError, TypeError) as error:
                said = "takes another kind of value" if isinstance(error, TypeError) else subject.hidden(str(error))
                self._fail(Node(run, token.column), "%s: %s" % (token.text, said))
            except UserError as error:
                if str(error).startswith(self._where):
                    raise
                self._fail(Node(run, token.column), subject.hidden(str(error)))

        return run


class Step(NamedTuple):
    """A compiled step: the name that it sets, and whether its value may not be shown."""

    name: str
    node: Node
    secret: bool


class Pipeline:
    """The `sign` steps that a file declares: `[{"set": NAME, "to": EXPRESSION}, …]`; raises UserError for a wrong one.

    where: the file's name, for errors. options: the names of --auth-opt that the steps may use, beside those in NAMES.
    """

    def __init__(self, steps: Sequence[Mapping[str, Any]], where: str, options: Iterable[str] = ()) -> None:
        names = {name: Shade(*(name in ("secret", "token"),) * 2, name in VARIED) for name in NAMES}
        for option in options:
            names[option] = names["option:" + option] = Shade(*(is_secret_option(option),) * 2)
        compiled: List[Tuple[str, Node]] = []
        if not isinstance(steps, (list, tuple)):
            raise UserError('%s: sign must be a list of steps such as {"set": "ts", "to": "time()"}' % where)
        for number, step in enumerate(steps, 1):
            name, text = self._read(step, "%s: sign step %d" % (where, number))
            place = "%s: sign step %d (%s)" % (where, number, name)
            if name in names:
                raise UserError("%s: the name %s is taken; choose another" % (place, name))
            node = Parser(text, place, names).parse()
            names[name] = node.shade
            compiled.append((name, node))
        keys = {key for _, node in compiled for key in node.keys}
        for name, node in reversed(compiled):  # what a key is made of is as good as the key
            keys |= node.names if name in keys else set()
        self.steps = [
            Step(name, node, node.shade.secret or (node.shade.derived and name in keys)) for name, node in compiled
        ]
        self.names = [step.name for step in self.steps]

    @staticmethod
    def _read(step: Any, place: str) -> Tuple[str, str]:
        if not isinstance(step, dict):
            raise UserError('%s must be an object such as {"set": "ts", "to": "time()"}' % place)
        for key in step:
            if key not in ("set", "to"):
                raise UserError("%s has an unknown key %r%s" % (place, key, nearest(str(key), ("set", "to"))))
        name, text = step.get("set"), step.get("to")
        if not isinstance(name, str) or not re.match(r"^[A-Za-z_][A-Za-z0-9_]*\Z", name):
            raise UserError("%s needs a name to `set`: letters, digits and _" % place)
        if not isinstance(text, str) or not text.strip():
            raise UserError("%s (%s) needs an expression `to` set it to, as a text" % (place, name))
        return name, text

    def run(self, subject: Subject) -> List[Tuple[str, Value, bool]]:
        """Runs the steps on a request, whose `values` they fill: (name, text, hidden) of each and of what it hashed."""
        shown: List[Tuple[str, Value, bool]] = []
        for step in self.steps:
            subject.trace = []
            value = step.node.value(subject)
            subject.values[step.name] = value if isinstance(value, bytes) else str(value)
            shown += [(step.name + " is made of", text, hidden) for text, hidden in subject.trace]
            shown.append((step.name, subject.values[step.name], step.secret))
        return shown


# ==================================================================================================
# 5. Signing: secrets to the headers that prove who asks
# ==================================================================================================
#
# A *scheme* (`Auth`) is a vendor's way in code, or the steps of a gateway's file; AUTHS lists them. A header
# that depends on neither moment nor body is made once; one that does is made at send time, over the very
# bytes that are sent. A header or query parameter may hold `${name}` of a step: what a step sees of the
# request is what has been filled in by the steps before it, so a signature can cover the time and can't
# cover itself.
#
# Some endpoints want a token that must be asked for first. What is asked and how the answer is read stands
# here; who asks, when and again is the Runner's (`TokenKeeper`), beside the requests that are measured.

SIGNED_NAMES = "names of the headers to sign, with ; between them"


class Auth:
    """A scheme: how a request proves who asks. One object serves all requests of a process.

    needs: of "token", "key" and "secret" those without which it can't be; options: --auth-opt names and meanings.
    per_request: `sign` depends on the moment, the body or a token that is refreshed, and so happens at send time;
    else `headers` is all there is. exchange: how a token is had first, in the form of a file's "exchange".
    """

    name = "none"
    summary = "no authorization"
    needs: Tuple[str, ...] = ()
    options: Dict[str, str] = {}
    per_request = False
    exchange: Optional["TokenExchange"] = None

    def __init__(self, secrets: Secrets) -> None:
        self.secrets = secrets
        self.explaining = True  # whether `sign` says its steps; a run that measures switches it off
        missing = [name for name in self.needs if not getattr(secrets, name)]
        if missing:
            flags = {"token": "--token", "key": "--auth-key", "secret": "--auth-secret"}
            raise UserError("--auth %s needs %s" % (self.name, " and ".join(flags[name] for name in missing)))

    def option(self, name: str, default: str = "") -> str:
        """An option's value."""
        return self.secrets.options.get(name, default)

    def renew(self, token: str) -> None:
        """Takes a new token; from now on requests are signed with it."""
        self.secrets = self.secrets._replace(token=token)

    def headers(self) -> Headers:
        """The headers that depend on the secrets alone."""
        return []

    def sign(self, method: str, target: str, headers: Headers, body: bytes, moment: float, nonce: str) -> Signed:
        """The request as it is sent. headers: all of it; moment: s since 1970; nonce: 32 random hex digits."""
        return Signed(target, with_headers(headers, self.headers()), [])

    def shown(self, steps: Iterable[Tuple[str, str]]) -> List[Tuple[str, str]]:
        """Steps as they may be shown; none where nobody looks."""
        if not self.explaining:
            return []
        hidden = [self.secrets.secret, self.secrets.token]
        hidden += [value for name, value in self.secrets.options.items() if is_secret_option(name)]
        masked = []
        for name, text in steps:
            for word in hidden:
                text = mask(text, word)  # noqa: PLW2901
            masked.append((name, text))
        return masked


class Bearer(Auth):
    """A token in the header Authorization."""

    name = "bearer"
    summary = "Authorization: Bearer and the token"
    needs = ("token",)

    def headers(self) -> Headers:
        """The header with the token."""
        return [bearer_header(self.secrets.token)]


class ApiKey(Auth):
    """A token in a header of its own."""

    name = "api-key"
    summary = "the token in a header of its own"
    needs = ("token",)
    options = {
        "header": "the header's name: api-key (the default), x-api-key, x-goog-api-key, …",
        "prefix": "what stands before the token",
    }

    def headers(self) -> Headers:
        """The header with the token."""
        return [(self.option("header", "api-key"), self.option("prefix") + self.secrets.token)]


class Basic(Auth):
    """User and password, as RFC 7617 has it."""

    name = "basic"
    summary = "Authorization: Basic with user (--auth-key) and password (--auth-secret)"
    needs = ("key", "secret")

    def headers(self) -> Headers:
        """The header with user and password."""
        return [basic_header(self.secrets.key + ":" + self.secrets.secret)]


class BceV1(Auth):
    """Baidu's bce-auth-v1: an HMAC over the request without its body, with a key bound to the time."""

    name = "bce-v1"
    summary = "Baidu: HMAC over method, path, query and headers"
    needs = ("key", "secret")
    options = {"expires": "seconds for which a signature holds (default 1800)", "signed": SIGNED_NAMES}
    per_request = True
    DEFAULT = ("host", "content-length", "content-type", "content-md5")  # and x-bce-*: what an empty list means

    def __init__(self, secrets: Secrets) -> None:
        super().__init__(secrets)
        self._expires = read_positive(self.option("expires", "1800"), "expires")
        self._names = names_in(self.option("signed", "host;x-bce-date"))

    def sign(self, method: str, target: str, headers: Headers, body: bytes, moment: float, nonce: str) -> Signed:
        """Adds x-bce-date and Authorization."""
        when = format_time(moment, "iso")
        headers = with_headers(headers, [("x-bce-date", when)])
        names = [name.lower() for name, _ in headers]
        chosen = self._names or [name for name in names if name in self.DEFAULT or name.startswith("x-bce-")]
        pairs = [(name, value) for name, value in header_values(headers, chosen) if value]
        path, _, query = target.partition("?")
        canonical = "\n".join((
            method,
            canonical_path(path),
            "&".join(sorted("%s=%s" % pair for pair in query_pairs(query, ("authorization",)))),
            "\n".join(sorted(percent_encode(name) + ":" + percent_encode(value) for name, value in pairs)),
        ))  # fmt: skip
        prefix = "bce-auth-v1/%s/%s/%d" % (self.secrets.key, when, self._expires)
        signature = hmac_of(self.signing_key(prefix), canonical).hex()
        listed = ";".join(name for name, _ in pairs) if self._names else ""
        value = "%s/%s/%s" % (prefix, listed, signature)
        steps = [("canonical request", canonical), ("prefix", prefix), ("signature", signature)]
        return Signed(target, with_headers(headers, [("Authorization", value)]), self.shown(steps))

    def signing_key(self, prefix: str) -> str:
        """The key as hex text, which is what the next HMAC takes."""
        return hmac_of(self.secrets.secret, prefix).hex()


def read_positive(text: str, name: str) -> int:
    """A whole number above 0 of --auth-opt; raises UserError."""
    if not re.match(r"^[1-9][0-9]{0,8}$", text):
        raise UserError("--auth-opt %s needs a whole number above 0" % name)
    return int(text)


def canonical_request(method: str, path: str, query: str, pairs: Headers, body_hash: str) -> str:
    """The form that TC3, Volcengine and Huawei share: the block of headers ends with a line feed of its own."""
    lines = "".join("%s:%s\n" % pair for pair in pairs)
    return "\n".join((method, path, query, lines, ";".join(name for name, _ in pairs), body_hash))


class TC3(Auth):
    """Tencent Cloud's TC3-HMAC-SHA256."""

    name = "tc3"
    summary = "Tencent Cloud: HMAC over headers and body"
    needs = ("key", "secret")
    options = {
        "service": "default: the first part of the host name",
        "action": "default ChatCompletions",
        "version": "default 2023-09-01",
        "region": "of the header X-TC-Region; by default there is none",
        "session-token": "of temporary keys",
        "signed": SIGNED_NAMES,
    }
    per_request = True

    def __init__(self, secrets: Secrets) -> None:
        super().__init__(secrets)
        self._names = names_in(self.option("signed", "content-type;host;x-tc-action"))

    def sign(self, method: str, target: str, headers: Headers, body: bytes, moment: float, nonce: str) -> Signed:
        """Adds Authorization and the headers X-TC-…, each unless it is there."""
        there = {name.lower() for name, _ in headers}
        own = [("X-TC-Action", self.option("action", "ChatCompletions")),
               ("X-TC-Version", self.option("version", "2023-09-01")), ("X-TC-Region", self.option("region")),
               ("X-TC-Token", self.option("session-token"))]  # fmt: skip
        headers = headers + [header for header in own if header[1] and header[0].lower() not in there]
        stamp, date = format_time(moment, "epoch"), format_time(moment, "date")
        headers = with_headers(headers, [("X-TC-Timestamp", stamp)])
        pairs = [(name, value.lower()) for name, value in header_values(headers, self._names)]
        canonical = canonical_request(method, "/", target.partition("?")[2], pairs, hash_of(body).hex())
        service = self.option("service") or dict(header_values(headers, ["host"])).get("host", "").partition(".")[0]
        scope = "%s/%s/tc3_request" % (date, service)
        to_sign = "\n".join(("TC3-HMAC-SHA256", stamp, scope, hash_of(canonical).hex()))
        signature = hmac_of(self.signing_key(date, service), to_sign).hex()
        value = "TC3-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%s" % (
            self.secrets.key, scope, ";".join(name for name, _ in pairs), signature)  # fmt: skip
        steps = [("canonical request", canonical), ("string to sign", to_sign), ("signature", signature)]
        return Signed(target, with_headers(headers, [("Authorization", value)]), self.shown(steps))

    def signing_key(self, date: str, service: str) -> bytes:
        """The key bound to date and service."""
        return key_chain("TC3" + self.secrets.secret, date, service, "tc3_request")


class VolcV4(Auth):
    """Volcengine's HMAC-SHA256, AWS's version 4 under other names and without a prefix to the secret."""

    name = "volc-v4"
    summary = "Volcengine: HMAC over path, query, headers and body"
    needs = ("key", "secret")
    options = {
        "region": "default cn-beijing", "service": "default ark", "session-token": "of temporary keys",
        "signed": SIGNED_NAMES,
    }  # fmt: skip
    per_request = True

    def __init__(self, secrets: Secrets) -> None:
        super().__init__(secrets)
        default = "content-type;host;x-content-sha256;x-date;x-security-token"
        self._names = names_in(self.option("signed", default))

    def sign(self, method: str, target: str, headers: Headers, body: bytes, moment: float, nonce: str) -> Signed:
        """Adds X-Date, X-Content-Sha256 and Authorization."""
        when, date = format_time(moment, "iso_basic"), format_time(moment, "date_basic")
        body_hash = hash_of(body).hex()
        own = [("X-Date", when), ("X-Content-Sha256", body_hash), ("X-Security-Token", self.option("session-token"))]
        headers = with_headers(headers, [header for header in own if header[1]])
        pairs = header_values(headers, self._names)
        path, _, query = target.partition("?")
        canonical = canonical_request(method, canonical_path(path) or "/", canonical_query(query), pairs, body_hash)
        region, service = self.option("region", "cn-beijing"), self.option("service", "ark")
        scope = "/".join((date, region, service, "request"))
        to_sign = "\n".join(("HMAC-SHA256", when, scope, hash_of(canonical).hex()))
        signature = hmac_of(self.signing_key(date, region, service), to_sign).hex()
        value = "HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%s" % (
            self.secrets.key, scope, ";".join(name for name, _ in pairs), signature)  # fmt: skip
        steps = [("canonical request", canonical), ("string to sign", to_sign), ("signature", signature)]
        return Signed(target, with_headers(headers, [("Authorization", value)]), self.shown(steps))

    def signing_key(self, date: str, region: str, service: str) -> bytes:
        """The key bound to date, region and service. The secret looks like base64 and is taken as it is written."""
        return key_chain(self.secrets.secret, date, region, service, "request")


class HuaweiSDK(Auth):
    """Huawei Cloud's SDK-HMAC-SHA256."""

    name = "huawei-sdk"
    summary = "Huawei Cloud: HMAC over path, query, headers and body"
    needs = ("key", "secret")
    options = {"signed": SIGNED_NAMES, "session-token": "of temporary keys"}
    per_request = True

    def __init__(self, secrets: Secrets) -> None:
        super().__init__(secrets)
        self._names = names_in(self.option("signed", "content-type;host;x-sdk-date;x-security-token"))

    def sign(self, method: str, target: str, headers: Headers, body: bytes, moment: float, nonce: str) -> Signed:
        """Adds X-Sdk-Date and Authorization. A header X-Sdk-Content-Sha256 that is sent stands for the body's hash."""
        when = format_time(moment, "iso_basic")
        own = [("X-Sdk-Date", when), ("X-Security-Token", self.option("session-token"))]
        headers = with_headers(headers, [header for header in own if header[1]])
        pairs = header_values(headers, self._names)
        body_hash = dict(header_values(headers, ["x-sdk-content-sha256"])).get("x-sdk-content-sha256")
        path, _, query = target.partition("?")
        canonical = canonical_request(
            method, canonical_path(path, True), canonical_query(query), pairs, body_hash or hash_of(body).hex()
        )
        to_sign = "\n".join(("SDK-HMAC-SHA256", when, hash_of(canonical).hex()))
        signature = hmac_of(self.secrets.secret, to_sign).hex()
        value = "SDK-HMAC-SHA256 Access=%s, SignedHeaders=%s, Signature=%s" % (
            self.secrets.key, ";".join(name for name, _ in pairs), signature)  # fmt: skip
        steps = [("canonical request", canonical), ("string to sign", to_sign), ("signature", signature)]
        return Signed(target, with_headers(headers, [("Authorization", value)]), self.shown(steps))


class ZhipuJWT(Auth):
    """Zhipu's token that the client makes itself of `id.secret`; its times are in milliseconds."""

    name = "zhipu-jwt"
    summary = "Zhipu: a short-lived token made of --token id.secret"
    needs = ("token",)
    options = {"lifetime": "seconds for which a token holds (default 210)"}
    per_request = True
    HEADER = '{"alg":"HS256","sign_type":"SIGN"}'

    def __init__(self, secrets: Secrets) -> None:
        if not secrets.token and secrets.key and secrets.secret:
            secrets = secrets._replace(token=secrets.key + "." + secrets.secret)
        super().__init__(secrets)
        self.renew(self.secrets.token)
        self._lifetime = read_positive(self.option("lifetime", "210"), "lifetime")

    def renew(self, token: str) -> None:
        """Takes a new key; raises UserError for one of another form."""
        self._id, _, self._secret = token.partition(".")
        if not self._id or not self._secret:
            raise UserError("--auth zhipu-jwt needs a --token of the form id.secret")
        super().renew(token)

    def sign(self, method: str, target: str, headers: Headers, body: bytes, moment: float, nonce: str) -> Signed:
        """Adds Authorization."""
        made = round(moment * 1000)
        payload = json_of(api_key=self._id, exp=made + self._lifetime * 1000, timestamp=made)
        text = ".".join(str(OUTPUTS["b64url"](octets(part))) for part in (self.HEADER, payload))
        token = text + "." + str(OUTPUTS["b64url"](hmac_of(self._secret, text)))
        steps = [("header", self.HEADER), ("payload", payload)]
        return Signed(target, with_headers(headers, [bearer_header(token)]), self.shown(steps))


class Steps(Auth):
    """The steps that a file declares, around another scheme.

    A scheme that depends on the secrets alone has its headers in the request before the steps; one that signs does
    so after them, over what they have filled in.
    """

    per_request = True

    def __init__(self, inner: Auth, pipeline: Pipeline) -> None:
        super().__init__(inner.secrets)
        self.name, self.exchange = inner.name, inner.exchange
        self.inner = inner
        self.pipeline = pipeline

    def renew(self, token: str) -> None:
        """Takes a new token."""
        super().renew(token)
        self.inner.renew(token)

    def sign(self, method: str, target: str, headers: Headers, body: bytes, moment: float, nonce: str) -> Signed:
        """The request with the values of the steps in it."""
        signed = Signed(target, headers, [])
        if not self.inner.per_request:
            signed = self.inner.sign(method, target, headers, body, moment, nonce)
        subject = Subject(self.secrets, method, signed.target, signed.headers, body, moment, nonce)
        shown = self.pipeline.run(subject)
        signed = Signed(subject.target, subject.headers, self.shown(self._readable(shown)))
        if self.inner.per_request:
            outer = self.inner.sign(method, signed.target, signed.headers, body, moment, nonce)
            signed = outer._replace(steps=signed.steps + outer.steps)
        return signed

    @staticmethod
    def _readable(shown: Sequence[Tuple[str, Value, bool]]) -> Iterator[Tuple[str, str]]:
        """Steps as text: secrets as ***, bytes that are not text as hex."""
        for name, value, hidden in shown:
            try:
                text = value.decode("utf-8") if isinstance(value, bytes) else value
            except UnicodeDecodeError:
                text = octets(value).hex()
            yield name, "***" if hidden else text


class HmacAuth(Steps):
    """The usual HMAC of time, nonce and body, with the parts and headers that the options name."""

    name = "hmac"
    summary = "HMAC of time, nonce and body in headers of your choice"
    needs = ("secret",)
    options = {
        "parts": "what is signed, in order, of key, time, nonce, method, path, query, target, host, body, body-hash "
                 "and 'text' (default time,nonce,body-hash)",
        "separator": r"between the parts (default \n)",
        "hash": "sha256 (the default), sha1, sha512, md5, sm3",
        "encoding": "hex (the default), HEX, b64, b64url",
        "time": "epoch (s, the default), epoch_ms, iso, iso_basic, rfc1123, compact, or a form of strftime's",
        "key-header": "default X-Access-Key; an empty name leaves a header out",
        "time-header": "default X-Timestamp",
        "nonce-header": "default X-Nonce",
        "signature-header": "default X-Signature",
        "signature-format": "the signature header's value (default ${signature}); also ${key}, ${time}, ${nonce}",
    }  # fmt: skip
    PARTS = ("key", "time", "nonce", "method", "path", "query", "target", "host", "body", "body-hash")
    FORMAT = ("signature", "key", "time", "nonce")
    HEADERS = (("key", "X-Access-Key"), ("time", "X-Timestamp"), ("nonce", "X-Nonce"), ("signature", "X-Signature"))

    def __init__(self, secrets: Secrets) -> None:
        options = secrets.options
        try:
            one_of(HASHES)(options.get("hash", "sha256"))
        except ValueError as error:
            raise UserError("--auth-opt hash %s" % error) from None
        parts = [self._part(part) for part in options.get("parts", "time,nonce,body-hash").split(",")]
        quoted = [quote_text(options[name]) if name in options else default for name, default in (
            ("separator", "'\\n'"), ("hash", "'sha256'"), ("encoding", "'hex'"), ("time", "'epoch'"))]  # fmt: skip
        separator, algorithm, encoding, form = quoted
        steps = [
            {"set": "stamp", "to": "time(%s)" % form},
            {"set": "body_hash", "to": "%s(body)" % options.get("hash", "sha256")},
            {"set": "signature", "to": "hmac(secret, join(%s, %s), %s, %s)"
                                       % (separator, ", ".join(parts), algorithm, encoding)},
        ]  # fmt: skip
        super().__init__(Auth(secrets), Pipeline(steps, "--auth hmac"))
        self.name = "hmac"
        values = {"key": "${key}" if secrets.key else "", "time": "${stamp}", "nonce": "${nonce}"}
        form = options.get("signature-format", "${signature}")
        for name in PLACEHOLDER.findall(form):
            if name not in self.FORMAT:
                raise UserError("--auth-opt signature-format: ${%s} is none of %s%s"
                                % (name, ", ".join("${%s}" % known for known in self.FORMAT),
                                   nearest(name, self.FORMAT)))  # fmt: skip
        values["signature"] = form.replace("${time}", "${stamp}")
        named = ((options.get(what + "-header", default), values[what]) for what, default in self.HEADERS)
        self._added = [(name, value) for name, value in named if name and value]

    def _part(self, part: str) -> str:
        part = part.strip()
        if re.match(r"^'[^']*'$", part):
            return quote_text(part[1:-1])
        if part not in self.PARTS:
            raise UserError("--auth-opt parts: %r is none of %s, or 'text'%s"
                            % (part, ", ".join(self.PARTS), nearest(part, self.PARTS)))  # fmt: skip
        return {"time": "stamp", "body-hash": "body_hash"}.get(part, part)

    def sign(self, method: str, target: str, headers: Headers, body: bytes, moment: float, nonce: str) -> Signed:
        """Adds the headers that the options name."""
        return super().sign(method, target, with_headers(headers, self._added), body, moment, nonce)


def quote_text(text: str) -> str:
    r"""A text of an option in the quotes of a step's expression; \n and \t in it mean what they mean there."""
    return "'%s'" % re.sub(r"\\.|'|\\\Z", lambda match: match[0].rjust(2, "\\"), text, flags=re.DOTALL)


# A token that must be asked for first.


class Grant(NamedTuple):
    """A token, and when it ends in s since 1970, where that is known."""

    token: str
    expires: Optional[float] = None


class TokenQuestion(NamedTuple):
    """The request that brings a token: where it goes, and what it says."""

    url: str
    method: str
    headers: Headers
    body: bytes


EXCHANGE_KEYS = ("url", "method", "headers", "body", "form", "auth", "auth_options", "token", "expires_in")


class TokenExchange:
    """How a token is asked for and read from the answer, in the form of a file's "exchange"; raises UserError.

    url, headers, form and the texts in body may hold ${key}, ${secret} and ${option:NAME}; auth: the scheme that signs
    the question; token: the path to it in the answer, or header:NAME; expires_in: the path to seconds, to a moment in s
    or ms since 1970 or in ISO 8601, or seconds as a number.
    """

    def __init__(self, form: Mapping[str, Any], secrets: Secrets, where: str) -> None:
        if not isinstance(form, dict):
            raise UserError("%s: exchange must be an object" % where)
        for key in form:
            if key not in EXCHANGE_KEYS:
                raise UserError("%s: exchange has an unknown key %r%s" % (where, key, nearest(key, EXCHANGE_KEYS)))
        self._where, self._form, self._secrets = where, form, secrets
        for key, kind, said in (("url", str, "a text"), ("method", str, "a text"), ("headers", dict, "an object"),
                                ("form", dict, "an object"), ("token", str, "a path or header:NAME"),
                                ("auth", str, "a text"), ("auth_options", dict, "an object"),
                                ("expires_in", (str, int, float), "a path or seconds")):  # fmt: skip
            if key in form and not isinstance(form[key], kind):
                raise UserError("%s: exchange.%s must be %s" % (where, key, said))
        for name, value in form.get("auth_options", {}).items():
            if not isinstance(value, str):
                raise UserError("%s: exchange.auth_options.%s must be a text" % (where, name))
        url, other = form.get("url", ""), secrets.options.get("exchange-url")
        if other:  # the query says what is asked, which doesn't change with the address
            url = other if "?" in other else other + "".join(url.partition("?")[1:])
        if not re.match(r"^https?://[^/?#@]+([/?].*)?\Z", url):
            raise UserError("%s: exchange needs a url with http:// or https://, a host and no password" % where)
        try:
            _ = urlsplit(url).port
        except ValueError:
            raise UserError("%s: exchange has a url with a port that is none" % where) from None
        if "body" in form and "form" in form:
            raise UserError("%s: exchange takes body or form, not both" % where)
        if not form.get("token"):
            raise UserError("%s: exchange needs token: where the answer holds it" % where)
        parts = urlsplit(url)
        self._url = url if parts.path else urllib.parse.urlunsplit(parts._replace(path="/"))
        self._values = {"key": secrets.key, "secret": secrets.secret}
        self._values.update(("option:" + name, value) for name, value in secrets.options.items())
        name = form.get("auth", "none")
        if name not in AUTHS or issubclass(AUTHS[name], Exchanging):
            raise UserError("%s: exchange.auth %r is unknown%s" % (where, name, nearest(str(name), AUTHS)))
        self._auth = AUTHS[name](secrets._replace(options={**secrets.options, **form.get("auth_options", {})}))
        self.question(0.0, "0" * 32)  # what can't be filled in is found now

    def _filled(self, text: str, encode: bool = False) -> str:
        def value(match: Match[str]) -> str:
            if match[1] not in self._values:
                raise UserError("%s: exchange: ${%s} is not known%s"
                                % (self._where, match[1], nearest(match[1], self._values)))  # fmt: skip
            known = self._values[match[1]]
            return percent_encode(known) if encode else known

        return PLACEHOLDER.sub(value, text)

    def _tree(self, tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: self._tree(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [self._tree(value) for value in tree]
        return self._filled(tree) if isinstance(tree, str) else tree

    def question(self, moment: float, nonce: str) -> TokenQuestion:
        """The request to send now."""
        form = self._form
        url, method = self._filled(self._url, True), form.get("method", "POST").upper()
        parts, body, kind = urlsplit(url), b"", ""
        if "body" in form:
            kind, tree = "application/json", self._tree(form["body"])
            body = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        elif "form" in form:
            fields = form["form"].items()
            pairs = (percent_encode(name) + "=" + percent_encode(self._filled(str(value))) for name, value in fields)
            body, kind = "&".join(pairs).encode("ascii"), "application/x-www-form-urlencoded"
        headers = [
            ("Host", parts.netloc), ("User-Agent", "llmbench/" + __version__), ("Accept", "application/json"),
            ("Accept-Encoding", "identity"), ("Connection", "close"),
        ]  # fmt: skip
        headers += [("Content-Type", kind)] * bool(kind)
        headers += [("Content-Length", str(len(body)))] * (method != "GET" or bool(body))
        own = [(str(name), self._filled(str(value))) for name, value in form.get("headers", {}).items()]
        target = parts.path + ("?" + parts.query if parts.query else "")
        signed = self._auth.sign(method, target, with_headers(headers, own), body, moment, nonce)
        origin = "%s://%s" % (parts.scheme, parts.netloc)
        return TokenQuestion(origin + signed.target, method, signed.headers, body)

    def read(self, status: int, headers: Mapping[str, str], body: bytes, moment: float) -> Grant:
        """The token of an answer; raises ValueError, whose text may quote the answer."""
        try:
            tree = json.loads(body.decode("utf-8"))
        except (ValueError, RecursionError):
            tree = None
        said = body[:200].decode("utf-8", "replace").strip()
        if not 200 <= status < 300:
            raise ValueError("HTTP %d%s" % (status, ": " + said if said else ""))
        where = self._form["token"]
        if where.startswith("header:"):
            token: Any = headers.get(where[7:].strip().lower())
        else:
            token = value_at(tree, where)
        if not isinstance(token, str) or not token.strip() or CONTROL.search(token.strip()):
            raise ValueError("its answer (HTTP %d) holds no token at %s: %s" % (status, where, said))
        return Grant(token.strip(), self._expiry(tree, moment))

    def _expiry(self, tree: Any, moment: float) -> Optional[float]:
        wanted = self._form.get("expires_in")
        value = value_at(tree, wanted) if isinstance(wanted, str) else wanted
        if isinstance(value, str) and "T" in value:
            with contextlib.suppress(ValueError):
                return read_iso(value)
        try:
            seconds = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            return None
        if not 0.0 < seconds < 1e15:
            return None
        if seconds < 1e9:  # 31 years: a span; what is more is a moment
            return moment + seconds
        return seconds / 1000.0 if seconds > 1e11 else seconds


def value_at(tree: Any, path: str) -> Any:
    """What a dotted path of keys and list indexes leads to in a JSON tree; None where it leads nowhere."""
    for part in path.split("."):
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and re.match(r"^-?[0-9]{1,6}$", part) and -len(tree) <= int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return None
    return tree


def read_iso(text: str) -> float:
    """Seconds since 1970 of an ISO 8601 time, in UTC where it names no offset; raises ValueError.

    >>> read_iso("2026-11-24T08:05:24.5+08:00") == read_iso("2026-11-24T00:05:24Z")
    True
    """
    match = re.match(r"^(.{19})(?:[.,][0-9]+)?(?:Z|([+-])([0-9]{2}):?([0-9]{2}))?\Z", text.strip())
    if match is None:
        raise ValueError("not an ISO 8601 time")
    when = datetime.datetime.strptime(match[1], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=datetime.timezone.utc)
    ahead = int(match[2] + "1") * (3600 * int(match[3]) + 60 * int(match[4])) if match[2] else 0
    return when.timestamp() - ahead


def jwt_expiry(token: str) -> Optional[float]:
    """When a JWT ends, in s since 1970; None for a token that is no JWT or does not say."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    try:
        expiry = json.loads(decode_base64(parts[1]).decode("utf-8"))["exp"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    known = isinstance(expiry, (int, float)) and not isinstance(expiry, bool) and 0 < expiry < 1e15
    return float(expiry) if known else None


class Exchanging(Auth):
    """A scheme whose token must be asked for first; `form` says how."""

    per_request = True

    def form(self) -> Dict[str, Any]:
        """The exchange, as a file would declare it."""
        raise NotImplementedError


class BaiduOAuth(Exchanging):
    """Baidu's access token, in the query of each request."""

    name = "baidu-oauth"
    summary = "Baidu: an access token for API key and secret key, in the query"
    needs = ("key", "secret")

    def form(self) -> Dict[str, Any]:
        """The exchange; it lives for 30 days."""
        query = "?grant_type=client_credentials&client_id=${key}&client_secret=${secret}"
        url = "https://aip.baidubce.com/oauth/2.0/token" + query
        return {"url": url, "token": "access_token", "expires_in": "expires_in"}

    def sign(self, method: str, target: str, headers: Headers, body: bytes, moment: float, nonce: str) -> Signed:
        """Adds access_token to the query."""
        token = "access_token=" + percent_encode(self.secrets.token)
        return Signed(target + ("&" if "?" in target else "?") + token, headers, [])


class ArkApiKey(Exchanging):
    """A temporary key of Volcengine's Ark, which access key and secret key sign for."""

    name = "ark-api-key"
    summary = "Volcengine Ark: a temporary key for access key and secret key, then bearer"
    needs = ("key", "secret")
    options = {
        "endpoint-id": "the endpoint ep-… that the key is for (default: --model)",
        "duration": "seconds for which the key is asked for (default 2592000)",
        "region": "default cn-beijing", "session-token": "of temporary keys",
    }  # fmt: skip

    def form(self) -> Dict[str, Any]:
        """The exchange, of the control plane."""
        endpoint, duration = self.option("endpoint-id"), read_positive(self.option("duration", "2592000"), "duration")
        if not endpoint:
            raise UserError("--auth ark-api-key needs --model ep-…, or --auth-opt endpoint-id=ep-…")
        return {
            "url": "https://open.volcengineapi.com/?Action=GetApiKey&Version=2024-01-01", "auth": "volc-v4",
            "body": {"DurationSeconds": duration, "ResourceType": "endpoint", "ResourceIds": [endpoint]},
            "auth_options": {"service": "ark"}, "token": "Result.ApiKey", "expires_in": duration,
        }  # fmt: skip

    def sign(self, method: str, target: str, headers: Headers, body: bytes, moment: float, nonce: str) -> Signed:
        """Adds Authorization with the key."""
        return Signed(target, with_headers(headers, [bearer_header(self.secrets.token)]), [])


class HuaweiIAM(Exchanging):
    """Huawei Cloud's IAM token of a user, in the header X-Auth-Token."""

    name = "huawei-iam"
    summary = "Huawei Cloud: an IAM token for user (--auth-key) and password (--auth-secret)"
    needs = ("key", "secret")
    options = {
        "domain": "the account that the user belongs to", "region": "default cn-north-4",
        "project": "the project's name (default: the region)",
    }  # fmt: skip

    def form(self) -> Dict[str, Any]:
        """The exchange; a token lives for 24 hours."""
        if not self.option("domain"):
            raise UserError("--auth huawei-iam needs --auth-opt domain=ACCOUNT")
        region = self.option("region", "cn-north-4")
        if not re.match(r"^[a-z0-9-]+$", region):
            raise UserError("--auth-opt region must be a name such as cn-north-4")
        user = {"name": "${key}", "password": "${secret}", "domain": {"name": self.option("domain")}}
        return {
            "url": "https://iam.%s.myhuaweicloud.com/v3/auth/tokens" % region,
            "body": {"auth": {
                "identity": {"methods": ["password"], "password": {"user": user}},
                "scope": {"project": {"name": self.option("project", region)}},
            }},
            "token": "header:X-Subject-Token", "expires_in": "token.expires_at",
        }  # fmt: skip

    def sign(self, method: str, target: str, headers: Headers, body: bytes, moment: float, nonce: str) -> Signed:
        """Adds X-Auth-Token."""
        return Signed(target, with_headers(headers, [("X-Auth-Token", self.secrets.token)]), [])


AUTHS: Dict[str, Type[Auth]] = {
    scheme.name: scheme for scheme in (
        Bearer, ApiKey, Basic, Auth, BceV1, TC3, VolcV4, HuaweiSDK, ZhipuJWT, HmacAuth, BaiduOAuth, ArkApiKey, HuaweiIAM
    )
}  # fmt: skip
COMMON_OPTIONS = {
    "refresh": "ask for the token again after this time, such as 50m",
    "exchange-url": "where the token is asked for, instead of the vendor's own address",
}


NOT_YET = "***"  # stands for a token that has not been asked for
SIGNED_ALONE = ("authorization", "x-auth-token")  # headers that a signature must have for itself


def make_auth(config: Config, provider: Any) -> Auth:
    """The scheme of a run: --auth, or the provider's own; raises UserError for what is missing or unknown.

    provider: its `auth` (a name), `auth_options`, `option_names` (more names that --auth-opt may have) and `exchange`.
    """
    name = config.auth or provider.auth
    if name not in AUTHS:
        raise UserError("--auth %s is unknown%s; it is one of %s" % (name, nearest(name, AUTHS), ", ".join(AUTHS)))
    scheme, secrets = AUTHS[name], secrets_for(config, name, provider)
    missing = [need for need in scheme.needs if not getattr(secrets, need)]
    if config.auth is None and missing and not provider.exchange:
        if not (config.auth_key or config.auth_secret or "token" in config.given):
            return Auth(secrets)  # the endpoint may need none: one in a test, or behind a gateway
        if "token" in scheme.needs and not config.token:
            raise UserError("--auth-key and --auth-secret need a scheme here; name it with --auth")
    asks = bool(provider.exchange) or issubclass(scheme, Exchanging)
    auth = scheme(secrets._replace(token=NOT_YET) if asks else secrets)
    if asks:
        form = auth.form() if isinstance(auth, Exchanging) else provider.exchange
        where = provider.name if form is provider.exchange else "--auth " + name
        auth.exchange = TokenExchange(form, secrets, where)
    auth.per_request = auth.per_request or is_renewed(config, auth)
    if auth.per_request and not isinstance(auth, Steps):
        for line in config.header:
            if line.partition(":")[0].strip().lower() in SIGNED_ALONE:
                raise UserError("--header %s and --auth %s exclude each other; leave one out"
                                % (line.partition(":")[0].strip(), name))  # fmt: skip
    return auth


def secrets_for(config: Config, name: str, provider: Any) -> Secrets:
    """What a configuration gives a scheme; raises UserError for an option that nobody knows."""
    scheme = AUTHS[name]
    known = {**scheme.options, **COMMON_OPTIONS, **dict.fromkeys([*provider.auth_options, *provider.option_names])}
    for option in config.auth_opt:
        if option not in known:
            raise UserError("--auth-opt %s is no option of %s%s; it takes %s"
                            % (option, name, nearest(option, known), ", ".join(known)))  # fmt: skip
    options = {**provider.auth_options, **config.auth_opt}
    if "endpoint-id" in scheme.options and config.model:
        options.setdefault("endpoint-id", config.model)
    key, secret = config.auth_key, config.auth_secret
    if name == "basic" and not (key or secret):
        user, _, password = config.token.partition(":")
        key, secret = (user, password) if password else userinfo_of(config.url)
    return Secrets(key, secret, config.token, options)


def userinfo_of(url: str) -> Tuple[str, str]:
    """User and password that a URL names; none of one that can't be read, which is said where it is used."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "", ""
    return unquote(parts.username or ""), unquote(parts.password or "")


def is_renewed(config: Config, auth: Auth) -> bool:
    """Whether a run's token is asked for again before it ends; raises UserError for a refresh of what can't be."""
    asked = "refresh" in config.auth_opt
    if asked:
        refresh_seconds(config)
    if auth.exchange is not None:
        return True
    if config.token_source:
        return asked or jwt_expiry(config.token) is not None
    if asked:
        raise UserError("--auth-opt refresh needs a token to ask for again: --token cmd:COMMAND or file:PATH")
    return False


def refresh_seconds(config: Config) -> Optional[float]:
    """The span of --auth-opt refresh; raises UserError."""
    try:
        return read_duration(config.auth_opt["refresh"]) if "refresh" in config.auth_opt else None
    except ValueError as error:
        raise UserError("--auth-opt refresh %s" % error) from None


# ==================================================================================================
# 6. Providers: a prompt to an HTTP request, an event to frames
# ==================================================================================================
#
# A provider owns four things and nothing else: the request (path, headers, body), what the first
# visible content is, what the end is, and how usage is read. `Provider` states them for OpenAI's
# chat dialect, which vLLM, SGLang, llama.cpp, DeepSeek, GLM, Ark, LiteLLM and One-API speak with
# quirks of their own; another dialect is a file in assets/providers and its name in DECLARED, or, where
# data can't say it, a subclass and one line in PROVIDERS.
#
# For each request `decoder()` gives a fresh decoder: `frames(event)` is the full, certain reading;
# `plain(data)` is the hot path. A stream repeats one frame with another text in it, so after a full
# parse has yielded exactly one content frame the decoder learns what stands before and after that
# text, proves with a second parse that a marker put in its place comes back as the content and
# changes nothing else, and from then on compares bytes: same head, same tail, and between them no
# quote, backslash or control character. By JSON's grammar such an event can mean nothing else than
# "content, this text". Everything else takes the full parse. `run(data)` is the same for all the events
# with which a read begins, on the bytes as they stand on the wire: what is between two texts is as
# constant as head and tail.
#
# What the wire may do, and where it is handled: `choices` may be empty, missing or null (Azure's
# preface, usage frames); `delta` may be missing; content may be null, "", or typed parts; the last
# text may ride on the frame with the finish reason, so text is read before the end; `finish_reason`
# null, "" and "null" are none; usage may come on the last frame, on the finish frame or on every
# frame, and the last one wins; an error may stand inside a 200 and be followed by [DONE].


class HTTPRequest(NamedTuple):
    """What a provider wants sent: request target, headers without Host and Content-Length, body bytes."""

    target: str
    headers: List[Tuple[str, str]]
    body: bytes


class Endpoint(NamedTuple):
    """Where a URL points: scheme, host and port to connect to, the request target, Host header, user:password.

    unix: the path of a Unix socket, which is then connected to instead.
    """

    scheme: str
    host: str
    port: int
    target: str
    authority: str
    userinfo: Optional[str]
    unix: Optional[str] = None

    @property
    def url(self) -> str:
        """The URL without its password."""
        if self.unix is not None:
            return "unix:%s:%s" % (self.unix, self.target)
        return "%s://%s%s" % (self.scheme, self.authority, self.target)


# What makes a server go on to exactly so many tokens, as vLLM, SGLang and llama.cpp take it.
EXACT_FIELDS: Dict[str, Callable[[int], Any]] = {"ignore_eos": lambda _: True, "min_tokens": lambda tokens: tokens}


# The two spellings of the longest answer that chat servers have.
SPELLINGS = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}


class Dialect:
    """The fields that we add on our own and that this endpoint takes; `version` grows when one is given up.

    An endpoint that answers 400 to such a field is asked once without it; see `Runner`. optional: those that an
    answer can do without, as dotted names; exact: those that ask for an answer of just so many tokens, once a run
    has wanted that; max_tokens_field: how the longest answer is spelt, given up for the other spelling if it has one.
    """

    def __init__(
        self, max_tokens_field: Optional[str] = None, optional: Sequence[str] = ("stream_options",),
        exact: Sequence[str] = tuple(EXACT_FIELDS), spelling: str = "max_tokens",
    ) -> None:  # fmt: skip
        self.optional = tuple(optional)
        self.exact: Tuple[str, ...] = ()
        self.max_tokens_field = max_tokens_field or spelling
        self.version = 0
        self.notes: List[str] = []
        self._exact_names = tuple(exact)
        self._wants_exact = False
        self._fixed = max_tokens_field is not None or spelling not in SPELLINGS
        self._tried: set = set()

    @property
    def stream_options(self) -> bool:
        """Whether stream_options are sent."""
        return "stream_options" in self.optional

    def copy(self) -> "Dialect":
        """An independent dialect with the same fields, to try a change on."""
        other = Dialect(self.max_tokens_field)
        other.__dict__.update(self.__dict__)
        other.notes = list(self.notes)
        return other

    def without(self, body: str) -> Optional["Dialect"]:
        """The dialect to try after a 400 with this body; None when there is nothing left to give up.

        A body that names some of our fields says which; one that names none is taken to mean all that are optional,
        and after them those that ask for an exact length.
        """
        other = self.copy()
        exact = [name for name in self.exact if is_named(name, body)]
        left = [name for name in self.optional if name not in self._tried]
        optional = [name for name in left if is_named(name, body)] or left
        if exact:
            self._give_up_exact(other, exact)
        elif not self._fixed and self.max_tokens_field in body and "max_tokens" not in self._tried:
            self._tried.add("max_tokens")
            other.max_tokens_field = SPELLINGS[self.max_tokens_field]
            other.notes.append(
                "the endpoint refuses %s; %s is sent instead" % (self.max_tokens_field, other.max_tokens_field)
            )
        elif optional:
            self._give_up(other, optional)
        elif self.exact:
            self._give_up_exact(other, self.exact)
        else:
            return None
        other.version += 1
        return other

    def exact_fields(self) -> Tuple[str, ...]:
        """The fields that ask for an exact length and that are not given up; from now on they are among ours."""
        if not self._wants_exact:  # its own, unlike what was tried: a copy that wants it says nothing for the others
            self._wants_exact = True
            self.exact = self._exact_names
        return self.exact

    def _give_up(self, other: "Dialect", names: Sequence[str]) -> None:
        """Takes optional fields out."""
        self._tried.update(names)
        other.optional = tuple(name for name in other.optional if name not in names)
        without = "usage is read where it is sent unasked" if "stream_options" in names else "it is asked without"
        other.notes.append("the endpoint refuses %s; %s" % (" and ".join(names), without))

    @staticmethod
    def _give_up_exact(other: "Dialect", names: Sequence[str]) -> None:
        """Takes fields that ask for an exact length out."""
        other.exact = tuple(name for name in other.exact if name not in names)
        other.notes.append("the endpoint refuses %s; answers may come back shorter than asked" % " and ".join(names))

    def adopt(self, other: "Dialect") -> None:
        """Takes over what a probe found to work."""
        self.__dict__.update(other.__dict__)


def is_named(field: str, text: str) -> bool:
    """Whether a refusal names a field, by the last part of its dotted name."""
    return re.search(r"(?<![A-Za-z0-9_])%s(?![A-Za-z0-9_])" % re.escape(field.split(".")[-1]), text) is not None


def parse_url(url: str, provider: "Provider") -> Endpoint:
    """The endpoint that `url` means for this provider; raises UserError.

    No path: the provider's path is added; a path that ends in /vN, or in the version that the provider's has: what
    follows that in the provider's; any other path stays.
    """
    if url.startswith("unix:"):
        return parse_unix_url(url, provider)
    if "://" not in url:
        raise UserError("--url has no scheme; write http:// or https:// before it")
    if any(ord(letter) <= 32 or ord(letter) == 127 for letter in url):
        raise UserError("--url holds a blank or control character; remove it")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise UserError("--url has no valid host or port; write https://HOST:PORT/…") from None
    if parts.scheme not in ("http", "https"):
        raise UserError("--url scheme %r is unknown; use http, https, unix: or mock:" % parts.scheme)
    if not host or port == 0:
        raise UserError("--url has no host, or port 0; write https://HOST:PORT/…")
    path, query = parts.path.rstrip("/"), parts.query
    known, _, asked = provider.path.partition("?")
    version, rest = versioned(known)
    if not path or re.search(r"/v[0-9]+$", path) or (version and path.endswith(version)):
        path = path + rest if path else known
        query = "&".join(filter(None, (asked, query)))
    else:
        path = parts.path
    target = path + ("?" + query if query else "")
    host, _, zone = unquote(host).partition("%") if ":" in host else (host, "", "")
    shown = "[%s]" % host if ":" in host else host  # a zone means something on this machine only (RFC 6874)
    authority = shown if port in (None, 443 if parts.scheme == "https" else 80) else "%s:%d" % (shown, port)
    userinfo = None
    if parts.username is not None:
        userinfo = unquote(parts.username) + ":" + unquote(parts.password or "")
    provider.check_target(target)
    host += "%" + zone if zone else ""
    return Endpoint(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), target, authority, userinfo)


def versioned(path: str) -> Tuple[str, str]:
    """A path up to and with its version, and what follows; a path without a version follows as a whole.

    >>> versioned("/v1/chat/completions"), versioned("/api/chat")
    (('/v1', '/chat/completions'), ('', '/api/chat'))
    """
    match = re.match(r"((?:/[^/]+)*?/v[0-9]+[a-z0-9]*)(/.*)", path)
    return (match.group(1), match.group(2)) if match else ("", path)


def parse_unix_url(url: str, provider: "Provider") -> Endpoint:
    """The endpoint behind a Unix socket: `unix:/run/llm.sock`, or `unix:/run/llm.sock:/v1`; raises UserError."""
    path, _, target = url[len("unix:") :].partition(":")
    if not path.strip("/") or re.search(r"[\x00-\x20\x7f]", path) or (target and not target.startswith("/")):
        raise UserError("--url unix: needs a socket's path and may have a request's: unix:/run/llm.sock:/v1")
    return parse_url("http://localhost" + target, provider)._replace(unix=re.sub("^//+", "/", path))


def text_of(value: Any) -> str:
    """Generated text of a content field: a string, or typed parts `[{"type": "text", "text": …}]`."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(str(part.get("text") or "") for part in value if isinstance(part, dict))
    return ""


def integer(value: Any) -> Optional[int]:
    """A token count as an int; None for what can be none: text, NaN, infinity, and the -1 that says "unknown"."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if 0 <= value < 1e15 else None


def error_of(message: Any, kind: str = "message") -> Optional[str]:
    """The error that a JSON object reports, whatever its dialect; None when it reports none."""
    if isinstance(message, list) and len(message) == 1:  # Gemini wraps its errors at times
        message = message[0]
    if not isinstance(message, dict):
        return describe_error(message) if kind == "error" else None
    error = message.get("error")
    if not error and isinstance(message.get("Response"), dict):
        error = message["Response"].get("Error")
    error = error or message.get("ErrorMsg")
    if error:
        return describe_error(error)
    if (
        kind == "error"
        or message.get("type") == "error"
        or message.get("object") == "error"
        or message.get("error_code")
    ):
        return describe_error(message)
    code = message.get("code")
    if (
        code
        and message.get("message")
        and "choices" not in message
        and str(code).lower() not in ("0", "200", "success", "ok")
    ):
        return describe_error(message)
    return None


def describe_error(error: Any) -> str:
    """One line of an error in any shape: its code or type, then its message."""
    if not isinstance(error, dict):
        return " ".join(str(error).split())[:300]
    code = next(
        (error[key] for key in ("code", "error_code", "Code", "type", "status") if error.get(key) not in (None, "")), ""
    )
    said = ("message", "error_msg", "Message", "Msg", "detail", "msg")
    text = next((error[key] for key in said if error.get(key)), "")
    line = "%s: %s" % (code, text) if code and text else str(code or text or json.dumps(error))
    return " ".join(line.split())[:300]


# A finish reason that means failure (DeepSeek, GLM, OpenRouter); content_filter is an answer.
FAILED_FINISH = frozenset(("sensitive", "network_error", "insufficient_system_resource", "error"))


def finish_of(value: Any) -> str:
    """A finish reason, "" for none: null, "" (old SGLang) and "null" (DashScope) are none."""
    return value if isinstance(value, str) and value not in ("", "null") else ""


def openai_usage(usage: Any) -> Optional[Dict[str, int]]:
    """Token counts of OpenAI's usage object under a record's keys; None when there are none or all are 0."""
    if not isinstance(usage, dict):
        return None
    inward = usage.get("prompt_tokens_details") if isinstance(usage.get("prompt_tokens_details"), dict) else {}
    outward = usage.get("completion_tokens_details") if isinstance(usage.get("completion_tokens_details"), dict) else {}
    counts = {
        "in_tokens": integer(usage.get("prompt_tokens")),
        "out_tokens": integer(usage.get("completion_tokens")),
        "cached_tokens": integer(inward.get("cached_tokens", usage.get("prompt_cache_hit_tokens"))),
        "reasoning_tokens": integer(outward.get("reasoning_tokens", usage.get("reasoning_tokens"))),
    }
    known = {key: value for key, value in counts.items() if value is not None}
    return known if any(known.values()) else None


class Decoder:
    """Reads one stream in OpenAI's chat dialect; see the head of this section."""

    NOT_PLAIN = b'"\\\x7f' + bytes(range(32))  # what ends a JSON string, escapes in it, or may not stand in one
    CONTENT = re.compile(rb'"content"\s*:\s*"([^"\\\x00-\x1f]+)"')  # where the text may stand
    MARKER = "\u2042llmbench"

    def __init__(self) -> None:
        self.kind = "message"  # the type of the events that `plain` reads
        self.rewrites = 0  # how often an answer that is sent as the whole text so far took text back
        self._head = b""
        self._tail = b""
        self._tail_length = 0
        self._head_length = 0
        self.line: Optional[Tuple[bytes, bytes]] = None  # what stands around an event's data on the wire; see `run`
        self._before = b""  # head and tail as they stand on the wire
        self._behind = b""
        self._between = b""
        self._gap = b""  # what stands between the data of two events
        self.crc = 0  # CRC-32 of the generated text so far: answers that share it are the same answer
        self._hits = 0
        self._lessons = 0

    def plain(self, data: bytes) -> bytes:
        """The text when `data` is certainly one content frame and nothing else; b"": read it in full."""
        length = self._head_length
        if not length or not data.startswith(self._head) or not data.endswith(self._tail):
            return b""
        text = data[length : len(data) - self._tail_length]
        if len(data) <= length + self._tail_length or len(text.translate(None, self.NOT_PLAIN)) != len(text):
            return b""
        return text

    def run(self, data: bytes) -> Tuple[List[bytes], bytes]:
        """The texts of the events at the beginning of `data` that `plain` would let through, and what follows them.

        `data` begins with an event. That all have this head and tail is one comparison, that no text holds what
        `NOT_PLAIN` lists is another; with no line feed in it, each text stood in an event of its own.
        """
        before, behind = self._before, self._behind
        if not before or not data.startswith(before):
            return [], data
        begin, size = len(before), len(behind)
        if data.endswith(behind):
            inner, rest = data[begin:-size], b""
            if inner and len(inner.translate(None, self.NOT_PLAIN)) == len(inner):  # one event: nearly every read
                return [inner], rest
        else:
            end = data.rfind(behind, begin)
            if end < 0:
                return [], data
            inner, rest = data[begin:end], data[end + size :]
        pieces = inner.split(self._gap)
        texts = pieces if len(pieces) == 1 else self._texts(pieces)
        if not all(texts) or self._between.join(texts) != inner:
            return [], data
        joined = b"".join(texts)
        return (texts, rest) if len(joined.translate(None, self.NOT_PLAIN)) == len(joined) else ([], data)

    def _texts(self, pieces: Sequence[bytes]) -> List[bytes]:
        """What is left of an event's data without head and tail; the first has no head, and the last no tail."""
        head, tail = self._head_length, -self._tail_length
        return [pieces[0][:tail], *[piece[head:tail] for piece in pieces[1:-1]], pieces[-1][head:]]

    def event(self, text: bytes) -> Event:
        """The event in which `run` found a text."""
        return self.kind, self._head + text + self._tail

    def note_texts(self, texts: Sequence[bytes]) -> int:
        """Texts that came through `plain`, in their order; returns how many characters they have."""
        self._hits += len(texts)
        joined = b"".join(texts)
        self.crc = zlib.crc32(joined, self.crc)
        if joined.isascii():
            return len(joined)
        return sum(len(text.decode("utf-8", "replace")) for text in texts)

    def frames(self, event: Event) -> List[Frame]:
        """All frames of an event, text before usage before the end; raises ParseError when it is not JSON."""
        kind, data = event
        stripped = data.strip()
        if stripped.startswith(DONE):
            return [Frame("end")]
        if not stripped:
            return []
        if kind == STRAY:
            error = error_of(parse_json(data))
            return [Frame("error", error)] if error else []
        frames = self._guarded(parse_json(data), kind)
        if len(frames) == 1 and frames[0].kind == "content" and kind == "message":
            self._learn(data, frames[0].text, kind)
        return frames

    def refusal(self, message: Any) -> Optional[str]:
        """The error that the body of a refusal reports, in one line; None when it names none."""
        return error_of(message, "error")

    def note_text(self, text: str) -> None:
        """Text that did not come through `plain`, in its order."""
        self.crc = zlib.crc32(text.encode("utf-8", "replace"), self.crc)

    def whole(self, message: Any) -> List[Frame]:
        """Frames of a whole completion, the answer of an endpoint that doesn't stream."""
        return self._guarded(message, "message")

    def _learn(self, data: bytes, text: str, kind: str) -> None:
        # Streams in which every frame differs elsewhere (obfuscation, token ids) must not pay twice for each.
        if self._lessons > 3 + self._hits // 16:
            return
        self._lessons += 1
        found = self.CONTENT.findall(data)
        if len(found) != 1 or found[0] != text.encode("utf-8", "replace"):
            return
        start = self.CONTENT.search(data).start(1)  # type: ignore[union-attr]
        head, tail = data[:start], data[start + len(found[0]) :]
        try:
            proof = self._guarded(parse_json(head + self.MARKER.encode() + tail), kind)
        except ParseError:
            return
        if proof == [Frame("content", self.MARKER)]:
            self.kind, self._head, self._tail = kind, head, tail
            self._head_length, self._tail_length = len(head), len(tail)
            self._before = b""
            if self.line and kind == "message" and b"\n" not in head + tail:  # else its data were several lines
                self._before, self._behind = self.line[0] + head, tail + self.line[1]
                self._between = self._behind + self._before
                self._gap = self.line[1] + self.line[0]

    def _guarded(self, message: Any, kind: str) -> List[Frame]:
        try:
            return self._read(message, kind)
        except RecursionError:  # what json.loads just manages, str and json.dumps may not
            raise ParseError("JSON that is nested too deeply") from None

    def _read(self, message: Any, kind: str) -> List[Frame]:
        error = error_of(message, kind)
        if error is not None:
            return [Frame("error", error)]
        if not isinstance(message, dict):
            raise ParseError("an event is JSON but not an object: %s" % json.dumps(message)[:60])
        frames: List[Frame] = []
        ends: List[Frame] = []
        choices = message.get("choices")
        for choice in choices if isinstance(choices, list) else []:
            if isinstance(choice, dict):
                frames.extend(self._choice(choice))
                finish = finish_of(choice.get("finish_reason"))
                if finish in FAILED_FINISH:
                    ends.append(Frame("error", "finish reason " + finish))
                elif finish:
                    ends.append(Frame("end", finish))
        usage = openai_usage(message.get("usage"))
        if usage:
            frames.append(Frame("usage", "", usage))
        return frames + ends or [Frame("meta")]

    def _choice(self, choice: Dict[str, Any]) -> List[Frame]:
        delta = choice.get("delta") or choice.get("message")
        if not isinstance(delta, dict):
            return []
        frames = []
        # Both keys at once would double the text, so one is taken.
        reasoning = text_of(delta.get("reasoning_content")) or text_of(delta.get("reasoning"))
        if reasoning:
            frames.append(Frame("reasoning", reasoning))
        content = text_of(delta.get("content")) or text_of(delta.get("refusal"))
        if content:
            frames.append(Frame("content", content))
        calls = delta.get("tool_calls") or (
            [{"function": delta["function_call"]}] if delta.get("function_call") else None
        )
        if isinstance(calls, list) and calls:
            functions = [call.get("function") for call in calls if isinstance(call, dict)]
            arguments = [str(function.get("arguments") or "") for function in functions if isinstance(function, dict)]
            frames.append(Frame("tool", "".join(arguments)))
        return frames


def parse_json(data: bytes) -> Any:
    """JSON of UTF-8 bytes, invalid sequences replaced; raises ParseError that shows how it begins."""
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        raise ParseError("not JSON: %r" % data[:60].decode("utf-8", "replace")) from None


class Provider:
    """OpenAI chat completions, and what every provider has to state.

    path: where the endpoint is on a host, and whole_path where answers that are not streamed come from, if elsewhere.
    end_required: a stream that brings neither finish reason nor end marker is truncated. end: that marker, in words.
    events: the parser of its streams. streams: whether answers are streamed at all. untested: it follows its
    documentation and was never tried on a live endpoint. needs_model: a request says which model is wanted. optional:
    fields of the body that are given up when the endpoint refuses them. models: where a host lists its models.
    """

    name = "openai"
    summary = "OpenAI chat completions: vLLM, SGLang, llama.cpp, DeepSeek, GLM, Ark, LiteLLM, One-API, …"
    path = "/v1/chat/completions"
    whole_path: Optional[str] = None
    models: Optional[str] = "/v1/models"
    end_required = True
    end = "finish_reason or [DONE]"
    untested = False
    needs_model = True
    streams = True
    accept = "text/event-stream"
    optional: Sequence[str] = ("stream_options",)
    exact: Sequence[str] = tuple(EXACT_FIELDS)
    spelling = "max_tokens"  # how the longest answer is spelt, until the endpoint refuses it
    events: Callable[[], Any] = LooseSSEParser
    auth: Any = "bearer"  # the default scheme's name; of an instance the `Auth` itself
    auth_options: Dict[str, str] = {}
    option_names: Sequence[str] = ()  # of --auth-opt, that it uses beside its scheme's
    exchange: Optional[Mapping[str, Any]] = None

    def __init__(self, config: Config) -> None:
        self.config = config
        if not config.stream:
            self.streams, self.accept = False, "application/json"
            self.path = self.whole_path or self.path
            self.optional = [name for name in self.optional if name != "stream_options"]
        if config.max_tokens_field and self.spelling not in SPELLINGS:
            raise UserError("--max-tokens-field: provider %s says the longest answer in its own way; leave it out"
                            % self.name)  # fmt: skip
        self.dialect = Dialect(config.max_tokens_field, self.optional, self.exact, self.spelling)
        self.auth: Any = make_auth(config, self)

    def decoder(self) -> Decoder:
        """A fresh decoder for one request's stream."""
        return Decoder()

    def check_target(self, target: str) -> None:
        """Raises UserError for a request target that this provider can't ask for."""

    def request(self, prompt: Prompt, endpoint: Endpoint, request_id: str, dialect: Dialect) -> HTTPRequest:
        """The request for a prompt, but for what depends on the moment at which it is sent."""
        return self.written(self.body(prompt, dialect), endpoint.target, [], endpoint, request_id)

    def written(
        self, body: Dict[str, Any], target: str, headers: Sequence[Tuple[str, str]], endpoint: Endpoint, request_id: str
    ) -> HTTPRequest:
        """A request with this body and these headers. --body is merged over it, --header put in place of ours."""
        merge(body, self.config.body)
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        ours = [
            ("Host", endpoint.authority),
            ("User-Agent", "llmbench/" + __version__),
            ("Accept", self.accept),
            ("Accept-Encoding", "identity"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(data))),
            ("X-Request-Id", request_id),
        ]
        if headers:
            own = {name.lower() for name, _ in headers}
            ours = [header for header in ours if header[0].lower() not in own] + list(headers)
        ours += self.authorization(endpoint)
        return HTTPRequest(target, replace_headers(ours, self.config.header), data)

    def authorization(self, endpoint: Endpoint) -> List[Tuple[str, str]]:
        """The headers of a scheme that depends on the secrets alone, or the URL's user:password as Basic."""
        if self.auth.per_request:
            return []
        if endpoint.userinfo is not None and self.config.auth is None and self.auth.name == "none":
            return [basic_header(endpoint.userinfo)]
        return self.auth.headers()

    def signed(self, request: HTTPRequest, moment: float, nonce: str, method: str = "POST") -> Signed:
        """A request as it is sent at this moment (s since 1970), over the very bytes of its body."""
        if not self.auth.per_request:
            return Signed(request.target, request.headers, [])
        return self.auth.sign(method, request.target, request.headers, request.body, moment, nonce)

    def body(self, prompt: Prompt, dialect: Dialect) -> Dict[str, Any]:
        """The request body as a JSON tree."""
        tree: Dict[str, Any] = {"model": self.config.model, "messages": prompt.messages, "stream": self.streams}
        if dialect.stream_options:
            tree["stream_options"] = {"include_usage": True}
        wanted = self.config.output_tokens or prompt.output_tokens
        tree[dialect.max_tokens_field] = wanted or prompt.max_tokens or self.config.max_tokens
        if wanted:
            tree.update((name, EXACT_FIELDS[name](wanted)) for name in dialect.exact_fields())
        return tree

    def models_request(self, endpoint: Endpoint) -> HTTPRequest:
        """The GET request for the list of models."""
        ours = [("Host", endpoint.authority), ("User-Agent", "llmbench/" + __version__),
                ("Accept", "application/json"), ("Accept-Encoding", "identity")]  # fmt: skip
        headers = replace_headers(ours + self.authorization(endpoint), self.config.header)
        return HTTPRequest(self.models_target(endpoint), headers, b"")

    def models_target(self, endpoint: Endpoint) -> str:
        """The request target that lists the models, beside this endpoint's own; "" where there is no such list."""
        if not self.models:
            return ""
        path, own, (version, rest) = endpoint.target.split("?")[0], self.path.split("?")[0], versioned(self.models)
        if path.endswith(own):
            return path[: -len(own)] + self.models
        suffix = versioned(own)[1]
        return path[: -len(suffix)] + rest if version and path.endswith(suffix) else self.models

    def model_ids(self, answer: Any) -> List[str]:
        """The models that such a list names."""
        rows = answer.get("data") if isinstance(answer, dict) else None
        names = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        return [name for name in names if isinstance(name, str) and name.strip()]


def merge(tree: Dict[str, Any], over: Mapping[str, Any]) -> None:
    """Puts `over` into `tree`, objects merged key by key; a null takes the key out.

    >>> tree = {"a": {"b": 1, "c": 2}, "d": 3}; merge(tree, {"a": {"b": 9}, "d": None}); tree
    {'a': {'b': 9, 'c': 2}}
    """
    for key, value in over.items():
        if value is None:
            tree.pop(key, None)
        elif isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = value


def replace_headers(headers: List[Tuple[str, str]], lines: Sequence[str]) -> List[Tuple[str, str]]:
    """`headers` with the `K: V` lines added, or put in place of a header of the same name."""
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not re.match(r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$", name.strip()):
            raise UserError("--header needs 'Name: value'")
        headers = [header for header in headers if header[0].lower() != name.strip().lower()]
        if value.strip():
            headers.append((name.strip(), value.strip()))
    return headers


Piece = Tuple[str, float]  # text, and when it arrived


def split_pieces(pieces: Sequence[Piece], length: int) -> Tuple[List[Piece], List[Piece]]:
    """The pieces of the first `length` characters, and those of the rest."""
    first: List[Piece] = []
    rest: List[Piece] = []
    for text, arrived in pieces:
        first += [(text[:length], arrived)] if text[:length] else []
        rest += [(text[length:], arrived)] if text[length:] else []
        length = max(0, length - len(text))
    return first, rest


class ThinkTags:
    """Splits `<think>…</think>` at the start of the content into reasoning and content.

    `feed` gives frames, each with the time at which its text arrived: a beginning that may still become a tag is
    held back, and what turns out not to be it comes as the pieces in which it arrived, with their times.
    `settled` is true once nothing can change any more: then content is content.
    """

    OPEN, CLOSE = "<think>", "</think>"
    BLANKS = 256  # before the tag, and pieces that make them: text with more of them is no thought

    def __init__(self, mode: str) -> None:
        self.settled = mode == "off"
        self._held: List[Piece] = []
        self._inside = False

    @property
    def held(self) -> Optional[float]:
        """When the text that is held back began to arrive."""
        return self._held[0][1] if self._held else None

    def feed(self, text: str, arrived: float) -> List[Tuple[Frame, float]]:
        """Frames of one content text, each with the time at which its text arrived."""
        pieces = [*self._held, (text, arrived)]
        self._held = []
        if not self._inside:
            whole = "".join(piece for piece, _ in pieces)
            start = len(whole) - len(whole.lstrip())
            begin = whole[start : start + len(self.OPEN)]
            if begin != self.OPEN and self.OPEN.startswith(begin) and max(len(pieces), start) <= self.BLANKS:
                self._held = pieces
                return []
            if begin != self.OPEN:
                self.settled = True
                return self._frames("content", pieces)
            self._inside = True
            pieces = split_pieces(pieces, start + len(self.OPEN))[1]
        return self._thinking(pieces)

    def _thinking(self, pieces: List[Piece]) -> List[Tuple[Frame, float]]:
        whole = "".join(piece for piece, _ in pieces)
        end = whole.find(self.CLOSE)
        if end >= 0:
            self.settled = True
            thought, rest = split_pieces(pieces, end)
            return self._frames("reasoning", thought) + self._frames("content", split_pieces(rest, len(self.CLOSE))[1])
        # The end of the text may be the beginning of the closing tag: at most 7 characters are kept for the next.
        keep = next((n for n in range(len(self.CLOSE) - 1, 0, -1) if whole.endswith(self.CLOSE[:n])), 0)
        thought, self._held = split_pieces(pieces, len(whole) - keep)
        return self._frames("reasoning", thought)

    @staticmethod
    def _frames(kind: str, pieces: Sequence[Piece]) -> List[Tuple[Frame, float]]:
        return [(Frame(kind, text), arrived) for text, arrived in pieces]

    def rest(self) -> List[Tuple[Frame, float]]:
        """What is still held at the end: content, or reasoning inside the tag."""
        pieces, self._held = self._held, []
        return self._frames("reasoning" if self._inside else "content", pieces)


# What data can say of a provider. A file's paths, templates and rules are compiled once, when it is read; for each
# event then only the compiled forms run. None of them can do more than look into JSON and put values into it.


def plainly(value: Any) -> Any:
    """A value as text, so that 0 is "0" and true "true"; objects and lists as they are.

    >>> plainly(200.0) == plainly("200"), plainly(True), plainly(None)
    (True, 'true', 'null')
    """
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, (int, float)) else value


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, false, "", [] and {}; 0 says something."""
    return value is None or value is False or value in ("", [], {})


class Place:
    """A place in a JSON tree, or several: `choices.*.delta.content`, `parts[thought!=true].text`, `usage.-1`.

    Names and numbers (of list items, negative ones from the end) with dots between; `*` is every item of a list or
    object; `[name=value]` and `[name!=value]` keep the items whose field has that value or has it not. A name with a
    dot or bracket in it stands in double quotes.
    """

    PART = re.compile(
        r'(?:(?P<name>[^\s."\[\]][^."\[\]]*)|"(?P<quoted>[^"]+)")?(?P<filters>(?:\[[^\[\]]*\])*)(?:\.(?=.)|\Z)'
    )
    FILTER = re.compile(r"\[(?P<name>[^\[\]=!]+)(?P<op>!?=)(?P<value>[^\[\]]*)\]")

    def __init__(self, text: Any, where: str, event: Optional[str] = None) -> None:
        if not isinstance(text, str) or not text.strip():
            raise UserError("%s must be a path such as choices.0.delta.content" % where)
        self.text = text
        self.event = event  # it is looked at in events of this kind alone; None: in all
        self.last = ""  # the last name, under which the value stands
        self.asked: Set[str] = set()  # the names that filters look at
        self._steps: List[Tuple[str, Any, Any]] = []
        self.single = True  # it leads to one place at most
        at = 0
        while at < len(text):
            match = self.PART.match(text, at)
            if match is None or not any(match.group("name", "quoted", "filters")):
                raise UserError("%s: the path %r can't be read at column %d" % (where, text, at + 1))
            self._add(match.group("name"), match.group("quoted"), match.group("filters"), where)
            at = match.end()

    def _add(self, name: Optional[str], quoted: Optional[str], filters: str, where: str) -> None:
        if name == "*":
            self._steps.append(("all", None, None))
            self.single, self.last = False, ""
        elif name is not None and re.match(r"-?[0-9]{1,9}\Z", name):
            self._steps.append(("item", name, int(name)))
            self.last = ""
        elif name is not None or quoted is not None:
            self.last = str(quoted if name is None else name.strip())
            self._steps.append(("name", self.last, None))
        for condition in re.findall(r"\[[^\[\]]*\]", filters):
            match = self.FILTER.match(condition)
            if match is None or not match.group("name").strip():
                raise UserError("%s: %s is no condition; write [name=value] or [name!=value]" % (where, condition))
            name, wanted = match.group("name").strip(), match.group("value").strip().strip('"')
            self.asked.add(name)
            self._steps.append(("filter", name, (match.group("op") == "=", wanted)))
            self.single, self.last = False, ""

    def values(self, tree: Any) -> List[Any]:
        """All values that it leads to, in their order."""
        return self._walk(tree, 0)

    def _walk(self, node: Any, at: int) -> List[Any]:
        """The values from one node on; where several are next, each of them is walked from."""
        steps = self._steps
        while at < len(steps):
            kind, name, detail = steps[at]
            at += 1
            if kind == "all" or kind == "filter":
                items = list(node.values()) if isinstance(node, dict) and kind == "all" else node
                items = [node] if isinstance(items, dict) else items
                if not isinstance(items, list):
                    return []
                if kind == "filter":
                    kept = (item for item in items if isinstance(item, dict))
                    items = [item for item in kept if (plainly(item.get(name)) == detail[1]) is detail[0]]
                if len(items) != 1:
                    return [value for item in items for value in self._walk(item, at)]
                node = items[0]
            elif isinstance(node, dict):
                if name not in node:
                    return []
                node = node[name]
            elif isinstance(node, list) and detail is not None and -len(node) <= detail < len(node):
                node = node[detail]
            else:
                return []
        return [node]

    def value(self, tree: Any) -> Any:
        """The first value that it leads to; None when there is none."""
        if not self.single:
            values = self.values(tree)
            return values[0] if values else None
        for _, name, number in self._steps:
            if isinstance(tree, dict):
                tree = tree.get(name)
            elif isinstance(tree, list) and number is not None and -len(tree) <= number < len(tree):
                tree = tree[number]
            else:
                return None
        return tree

    def read(self, tree: Any) -> str:
        """The text that stands there, of several places joined."""
        if self.single:
            value = self.value(tree)
            return value if isinstance(value, str) else text_of(value)
        return "".join(text_of(value) for value in self.values(tree))

    def read_call(self, tree: Any) -> Optional[str]:
        """A tool call that stands there: text as it is, an object or list as JSON; None when there is none.

        A call often begins with its name and no arguments yet: it is output all the same where the place is one of
        several, or of an event of its own. Elsewhere an empty text is a field that says nothing.
        """
        written = []
        for value in self.values(tree):
            if isinstance(value, str):
                written.append(value)
            elif isinstance(value, (dict, list)):
                written.append(json.dumps(value, ensure_ascii=False, separators=(",", ":")) if value else "")
        begun = not self.single or self.event is not None or any(written)
        return "".join(written) if written and begun else None


class Count:
    """A token count: one path, or several with + between them, of which those that are absent count 0."""

    def __init__(self, text: Any, where: str) -> None:
        if not isinstance(text, str):
            raise UserError("%s must be a path such as usage.prompt_tokens, or a sum of paths with + between" % where)
        self.paths = [Place(part.strip(), where) for part in text.split("+")]

    def read(self, tree: Any) -> Optional[int]:
        """The count; None when none of its parts is there."""
        if len(self.paths) == 1 and self.paths[0].single:
            return integer(self.paths[0].value(tree))
        counts = [integer(value) for path in self.paths for value in path.values(tree)]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None


class Rule(NamedTuple):
    """When an event is an end or an error: by its data, by its kind, by a value in it; all that is given must hold."""

    data: Optional[bytes] = None
    event: Optional[str] = None
    path: Optional[Place] = None
    test: Callable[[Any], bool] = bool  # of the value at the path

    def holds(self, message: Any, kind: str) -> bool:
        """Whether it holds for an event whose data are JSON."""
        if self.data is not None or (self.event is not None and self.event != kind):
            return False
        return self.path is None or self.test(self.path.value(message))

    @property
    def name(self) -> str:
        """What an end that this rule finds is called."""
        return self.event or (self.path.text if self.path is not None else (self.data or b"").decode("utf-8"))


class Answer(NamedTuple):
    """Where the parts of an event, or of a whole answer, stand; the first of the paths with a value wins."""

    text: Sequence[Place]
    reasoning: Sequence[Place]
    tool: Sequence[Place]
    finish: Sequence[Place]

    def outputs(self, message: Any, event: str) -> List[Frame]:
        """The frames of its generated output. event: its kind."""
        frames = []
        for kind, paths in (("reasoning", self.reasoning), ("content", self.text)):
            for path in paths:
                text = path.read(message) if path.event in (None, event) else ""
                if text:
                    frames.append(Frame(kind, text))
                    break
        calls = [path.read_call(message) for path in self.tool if path.event in (None, event)]
        there = [call for call in calls if call is not None]
        if there:
            frames.append(Frame("tool", next(filter(None, there), "")))
        return frames

    def reason(self, message: Any, no_reasons: Iterable[str]) -> str:
        """The finish reason; "" for none."""
        for path in self.finish:
            value = path.value(message)
            reason = finish_of(plainly(value) if isinstance(value, int) and not isinstance(value, bool) else value)
            if reason and reason not in no_reasons:
                return reason
        return ""


class Reading(NamedTuple):
    """How a declared provider's answers are read, compiled."""

    stream: Answer
    whole: Answer
    no_reasons: FrozenSet[str]
    failed: FrozenSet[str]
    event: Optional[Place]  # where an event's kind stands; None: it is the type of the SSE event
    skip_events: FrozenSet[str]
    text_events: FrozenSet[str]  # empty: all
    ends: Sequence[Rule]
    errors: Optional[Sequence[Rule]]  # None: what `error_of` knows
    error_code: Sequence[Place]
    error_message: Sequence[Place]
    usage: Mapping[str, Sequence[Count]]
    usage_merge: str
    text_mode: str
    content: Optional[Any]  # the pattern of a text that `plain` may take; None: each event is read in full

    def kind_of(self, message: Any, kind: str) -> str:
        """An event's kind."""
        if self.event is None:
            return kind
        value = self.event.value(message)
        return kind if value is None else str(plainly(value))


def content_pattern(reading: Reading) -> Optional[Any]:
    """The pattern of a text that may be taken without a full reading.

    None when a rule looks at a name that a text stands under, or at the beginning of an event's JSON: then another
    text may mean more than another text.
    """
    if any(rule.data is not None and re.match(rb"\{|\[(?![A-Za-z])", rule.data) for rule in reading.ends):
        return None
    names = {path.last for path in reading.stream.text}
    asking = [rule.path for rule in [*reading.ends, *(reading.errors or ())] if rule.path is not None]
    asking += [*reading.stream.finish, *([reading.event] if reading.event is not None else [])]
    asking += [path for counts in reading.usage.values() for count in counts for path in count.paths]
    asked = {path.last for path in asking}
    for path in [*asking, *reading.stream.text, *reading.stream.reasoning, *reading.stream.tool]:
        asked |= path.asked
    if reading.errors is None:
        asked |= {"type", "object", "code", "error"}
    if "" in names or "" in asked or names & asked:
        return None
    # As JSON writes the name: with or without escapes.
    spelt = {json.dumps(name, ensure_ascii=ascii_only) for name in names for ascii_only in (True, False)}
    either = b"|".join(re.escape(name.encode("utf-8")) for name in sorted(spelt))
    return re.compile(rb'(?:%s)\s*:\s*"([^"\\\x00-\x1f]+)"' % either)


class Growth:
    """One kind of output of a stream that may send the whole text so far in every event."""

    def __init__(self) -> None:
        self.seen = ""  # the text of the last event
        self.lost = ""  # what was taken for a repetition, as long as nobody knows
        self.grown = 0  # how often a text began with the one before it

    def suffix(self, text: str) -> Tuple[str, bool]:
        """What is new in the whole text so far, and whether it took text back."""
        seen, rewritten = self.seen, False
        if text.startswith(seen):
            new = text[len(seen) :]
        elif seen.startswith(text):  # shorter: nothing new, and nothing else either
            return "", False
        else:
            alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(seen, text))
            new, rewritten = text[sum(1 for _ in alike) :], True
        self.seen = text
        return new, rewritten


class DeclaredDecoder(Decoder):
    """Reads one stream of a provider that is declared by a file.

    text_mode: in "delta" each event brings the next piece, in "cumulative" all the text so far, of which what is new
    is taken; "auto" finds out. There a text that begins with all of the one before it speaks for cumulative: three
    of them decide so, and one that doesn't decides for delta, with what had been left out until then given at once.
    """

    ENOUGH = 3

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self.reading = reading
        self.mode = reading.text_mode
        if reading.content is not None:
            self.CONTENT = reading.content
        self._growth: Dict[str, Growth] = {}
        self._usage: Dict[str, int] = {}
        self._kinds: Set[str] = set()  # the kinds of events that brought content
        self._content = (0, 0)  # CRC-32 and bytes of the content, where a later event may repeat all of it

    def frames(self, event: Event) -> List[Frame]:
        """All frames of an event, text before usage before the end; raises ParseError when it is not JSON."""
        kind, data = event
        reading, stripped = self.reading, data.strip()
        for rule in reading.ends:
            if rule.data is not None and stripped.startswith(rule.data):
                return [Frame("end"), *([] if reading.stream.finish else [Frame("end", rule.name)])][::-1]
        if not stripped or stripped.startswith(DONE) or (reading.event is None and kind in reading.skip_events):
            return []
        message = parse_json(data)
        frames = self._guarded(message, kind)
        delta = self.mode == "delta"
        told = self._told(frames, reading.kind_of(message, kind))
        if delta and reading.content is not None and told == frames and [frame.kind for frame in frames] == ["content"]:
            self._learn(data, frames[0].text, kind)
        return told

    def note_texts(self, texts: Sequence[bytes]) -> int:
        """Texts that came through `plain`, in their order; returns how many characters they have."""
        if self._kinds:
            self._note_content(b"".join(texts))
        return super().note_texts(texts)

    def whole(self, message: Any) -> List[Frame]:
        """Frames of a whole answer."""
        try:
            return self._read_parts(message, "message", self.reading.whole, True)
        except RecursionError:
            raise ParseError("JSON that is nested too deeply") from None

    def refusal(self, message: Any) -> Optional[str]:
        """The error that the body of a refusal reports, in one line; None when it names none."""
        return self._declared_error(message) or error_of(message, "error")

    # What an event says by itself; nothing here changes the decoder.

    def _read(self, message: Any, kind: str) -> List[Frame]:
        reading = self.reading
        kind = reading.kind_of(message, kind)
        if kind in reading.skip_events:
            return [Frame("meta")]
        return self._read_parts(message, kind, reading.stream, not reading.text_events or kind in reading.text_events)

    def _read_parts(self, message: Any, kind: str, answer: Answer, with_text: bool) -> List[Frame]:
        reading = self.reading
        error = self._error(message, kind)
        if error is not None:
            return [Frame("error", error)]
        if not isinstance(message, (dict, list)):
            raise ParseError("an event is JSON but not an object: %s" % json.dumps(message)[:60])
        frames = answer.outputs(message, kind) if with_text else []
        usage = {name: self._count(counts, message) for name, counts in reading.usage.items()}
        known = {name: count for name, count in usage.items() if count is not None}
        if any(known.values()):
            frames.append(Frame("usage", "", known))
        reason = answer.reason(message, reading.no_reasons)
        if reason in reading.failed:
            frames.append(Frame("error", "finish reason " + reason))
        elif reason:
            frames.append(Frame("end", reason))
        for rule in reading.ends:
            if rule.holds(message, kind):
                frames.append(Frame("end", "" if answer.finish else rule.name))
                break
        return frames or [Frame("meta")]

    @staticmethod
    def _count(counts: Sequence[Count], message: Any) -> Optional[int]:
        return next((count for count in (way.read(message) for way in counts) if count is not None), None)

    def _error(self, message: Any, kind: str) -> Optional[str]:
        """The error that an event reports; None for none."""
        if self.reading.errors is None:
            error = error_of(message, kind)
            return error and (self._declared_error(message) or error)
        for rule in self.reading.errors:
            if rule.holds(message, kind):
                found = rule.path.value(message) if rule.path is not None else None
                named = found if isinstance(found, dict) or (isinstance(found, str) and found) else message
                return self._declared_error(message) or describe_error(named) or "an error without a message"
        return None

    def _declared_error(self, message: Any) -> str:
        """Code and message of an error where the file says that they stand."""
        found = []
        for paths in (self.reading.error_code, self.reading.error_message):
            values = (plainly(path.value(message)) for path in paths)
            found.append(next((value for value in values if isinstance(value, str) and value not in ("", "null")), ""))
        return " ".join((": " if all(found) else "").join(found).split())[:300]

    # What it says after those before it.

    def _told(self, frames: List[Frame], kind: str) -> List[Frame]:
        told = []
        for frame in frames:
            if frame.kind == "usage":
                told.append(Frame("usage", "", self._merged(frame.usage or {})))
                continue
            if frame.kind in OUTPUT_KINDS and (self.mode != "delta" or self._growth):
                new = self._new_text(frame)
                if not new and (frame.text or frame.kind != "tool"):  # a call without arguments yet is none the less
                    continue
                frame = Frame(frame.kind, new)  # noqa: PLW2901
            if frame.kind == "content" and len(self.reading.text_events) > 1 and self._repeats(frame.text, kind):
                continue
            told.append(frame)
        return told or [Frame("meta")]

    def _merged(self, usage: Mapping[str, int]) -> Dict[str, int]:
        """The counts so far, with those of one more event."""
        merge_two = {"last": lambda _, new: new, "max": max, "sum": lambda old, new: old + new}
        for name, count in usage.items():
            old = self._usage.get(name)
            self._usage[name] = count if old is None else merge_two[self.reading.usage_merge](old, count)
        return dict(self._usage)

    def _new_text(self, frame: Frame) -> str:
        """What is new in an output frame's text."""
        growth = self._growth.setdefault(frame.kind, Growth())
        text, seen = frame.text, growth.seen
        if self.mode == "delta":  # another kind of output decided it
            del self._growth[frame.kind]
            return growth.lost + text
        if self.mode == "cumulative" or not seen:
            new, rewritten = growth.suffix(text)
            self.rewrites += rewritten
            return new
        if text.startswith(seen):
            growth.lost += seen
            growth.grown += text != seen
            if growth.grown >= self.ENOUGH:
                self.mode = "cumulative"
            return growth.suffix(text)[0]
        self.mode = "delta"
        del self._growth[frame.kind]
        return growth.lost + text

    def _repeats(self, text: str, kind: str) -> bool:
        """Whether an event of a kind that brought no text yet repeats all that others did, as agents' last one may."""
        data = text.encode("utf-8", "replace")
        if self._kinds and kind not in self._kinds and self._content == (zlib.crc32(data), len(data)):
            return True
        self._kinds.add(kind)
        self._note_content(data)
        return False

    def _note_content(self, data: bytes) -> None:
        self._content = (zlib.crc32(data, self._content[0]), self._content[1] + len(data))


# What is asked. A body is a JSON tree with placeholders, never a text with holes: a prompt can't break out of it.


class Later(str):
    """A placeholder that is filled in when the request is sent, by the steps that sign it."""


ABSENT = object()  # stands for a value that is not there: its field is left out
Filler = Callable[[Mapping[str, Any]], Any]  # makes a value of the placeholders' values
IN_TEXT = re.compile(r"\$(\$\{)|\$\{([^{}]*)\}")  # $${ is a ${ that stands for itself


def compile_text(text: str, where: str, known: Callable[[str, str], str], encode: bool = False) -> Filler:
    """A text with `${name}` in it; a lone one keeps its value's type. known: gives the name, or raises UserError."""
    pieces: List[Tuple[str, str]] = []  # (what stands there, "") or ("", a name)
    at = 0
    for match in IN_TEXT.finditer(text):
        literal = text[at : match.start()] + (match.group(1) or "")
        pieces.append((literal, ""))
        if match.group(1) is None:
            pieces.append(("", known(match.group(2).strip(), where)))
        at = match.end()
    rest = text[at:]
    if "${" in rest:
        raise UserError("%s: a ${ without its }; write $${ where it stands for itself" % where)
    pieces = [piece for piece in [*pieces, (rest, "")] if piece != ("", "")]
    if len(pieces) == 1 and pieces[0][1] and not encode:
        lone = pieces[0][1]
        return lambda values: ABSENT if values[lone] is None else values[lone]

    def fill(values: Mapping[str, Any]) -> str:
        filled = []
        for literal, name in pieces:
            value = values[name] if name else literal
            if not isinstance(value, str):
                scalar = value is None or isinstance(value, (bool, int, float))
                value = ("" if value is None else plainly(value)) if scalar else json.dumps(value, ensure_ascii=False)
            filled.append(percent_encode(value) if name and encode and not isinstance(value, Later) else value)
        return "".join(filled)

    return fill


def compile_tree(tree: Any, where: str, known: Callable[[str, str], str]) -> Filler:
    """A JSON tree with placeholders in its texts. What holds nothing but absent values is left out with them."""
    if isinstance(tree, str):
        return compile_text(tree, where, known) if "${" in tree else lambda _: tree
    if isinstance(tree, dict) and "$each" in tree:
        return compile_each(tree, where, known)
    if isinstance(tree, dict):
        fields = [(key, compile_tree(value, "%s.%s" % (where, key), known)) for key, value in tree.items()]

        def fill_object(values: Mapping[str, Any]) -> Any:
            filled = {key: fill(values) for key, fill in fields}
            there = {key: value for key, value in filled.items() if value is not ABSENT}
            return ABSENT if filled and not there else there

        return fill_object
    if isinstance(tree, list):
        items = [compile_tree(value, "%s.%d" % (where, number), known) for number, value in enumerate(tree)]

        def fill_list(values: Mapping[str, Any]) -> Any:
            filled = [fill(values) for fill in items]
            there = [value for value in filled if value is not ABSENT]
            return ABSENT if filled and not there else there

        return fill_list
    return lambda _: tree


EACH_KEYS = ("$each", "as", "roles", "skip")
OF_MESSAGE = ("message.role", "message.content", "message.text")


def compile_each(tree: Mapping[str, Any], where: str, known: Callable[[str, str], str]) -> Filler:
    """`{"$each": "messages", "as": {…}, "roles": {…}, "skip": […]}`: the messages of a prompt in another form."""
    refuse_unknown(tree, EACH_KEYS, where)
    roles, skip = tree.get("roles", {}), tree.get("skip", [])
    if tree["$each"] != "messages" or "as" not in tree:
        raise UserError('%s: needs "$each": "messages", and "as" with the form of each' % where)
    if not isinstance(roles, dict) or not all(isinstance(name, str) for name in roles.values()):
        raise UserError('%s.roles must be an object such as {"assistant": "model"}' % where)
    if not isinstance(skip, list) or not all(isinstance(name, str) for name in skip):
        raise UserError('%s.skip must be a list of roles such as ["system"]' % where)
    form = compile_tree(
        tree["as"], where + ".as", lambda name, place: name if name in OF_MESSAGE else known(name, place)
    )

    def fill(values: Mapping[str, Any]) -> Any:
        filled = []
        for message in values["messages"]:
            role = str(message.get("role", "user"))
            if role not in skip:
                content = message.get("content")
                own = {"message.role": roles.get(role, role), "message.content": content,
                       "message.text": text_of(content)}  # fmt: skip
                filled.append(form({**values, **own}))
        return [value for value in filled if value is not ABSENT]

    return fill


def refuse_unknown(tree: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raises UserError for a key that nobody reads."""
    for key in tree:
        if key not in known:
            hint = nearest(key, known) or "; it takes " + ", ".join(known)
            raise UserError("%s: unknown key %r%s" % (where, key, hint))


def uuid_of(text: str) -> str:
    """A UUID of version 4 that is the same for the same text."""
    digits = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return "-".join((digits[:8], digits[8:12], "4" + digits[13:16], "8" + digits[17:20], digits[20:32]))


class Asked(NamedTuple):
    """What placeholders take their values from."""

    config: Config
    prompt: Prompt
    request_id: str
    streams: bool


def spoken(messages: Sequence[Mapping[str, Any]], role: str) -> List[str]:
    """The texts of a role's messages."""
    return [text_of(message.get("content")) for message in messages if message.get("role") == role]


PLACEHOLDERS: Dict[str, Callable[[Asked], Any]] = {
    "model": lambda asked: asked.config.model,
    "messages": lambda asked: asked.prompt.messages,
    "prompt": lambda asked: (spoken(asked.prompt.messages, "user") or [""])[-1],
    "transcript": lambda asked: "\n\n".join(text_of(message.get("content")) for message in asked.prompt.messages),
    "system": lambda asked: "\n".join(spoken(asked.prompt.messages, "system")) or None,
    "max_tokens": lambda asked: (
        asked.config.output_tokens or asked.prompt.output_tokens or asked.prompt.max_tokens or asked.config.max_tokens
    ),
    "output_tokens": lambda asked: asked.config.output_tokens or asked.prompt.output_tokens,
    "stream": lambda asked: asked.streams,
    "request_id": lambda asked: asked.request_id,
    "uuid": lambda asked: uuid_of(asked.request_id),
}


def places_of(tree: Any, wanted: str, path: Tuple[str, ...] = ()) -> Iterator[Tuple[str, ...]]:
    """Where in the objects of a tree a value stands."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from places_of(value, wanted, (*path, key))
    elif tree == wanted:
        yield path


def leaves_of(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The dotted names of the fields that hold no object."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves_of(value, path + key + ".")
        else:
            yield path + key


def take_out(tree: Any, name: str) -> Any:
    """Takes the field of a dotted name out of a tree, and gives its value; None when it isn't there."""
    *parents, last = name.split(".")
    for parent in parents:
        tree = tree.get(parent) if isinstance(tree, dict) else None
    return tree.pop(last, None) if isinstance(tree, dict) else None


def nested(name: str, tree: Dict[str, Any]) -> Dict[str, Any]:
    """A tree inside the objects of a dotted name.

    >>> nested("a.b", {"c": 1}), nested("", {"c": 1})
    ({'a': {'b': {'c': 1}}}, {'c': 1})
    """
    for part in reversed([part for part in name.split(".") if part]):
        tree = {part: tree}
    return tree


class Form(NamedTuple):
    """A declared provider, compiled: what does not depend on a run's configuration."""

    name: str
    summary: str
    where: str  # the file, for errors
    untested: bool
    path: str
    whole_path: Optional[str]
    models: Optional[str]
    model_ids: Place
    model_prefix: str  # what stands before each name in the list and is not part of it
    auth: str
    auth_options: Dict[str, str]
    option_names: List[str]
    exchange: Optional[Dict[str, Any]]
    sign: Optional[Pipeline]
    later: FrozenSet[str]  # the placeholders that are filled in when a request is sent
    headers: List[Tuple[str, Filler]]
    whole_headers: List[Tuple[str, Filler]]
    body: Filler
    whole_body: Filler
    exact: Filler
    optional: List[str]
    exact_names: List[str]
    length: str  # the dotted name of the field that limits the answer; "" for none
    framing: str
    reading: Reading
    end_required: bool
    end: str
    names: FrozenSet[str]  # the placeholders in it
    secrets: FrozenSet[str]  # of key, secret and token those that it can't do without
    hidden: FrozenSet[str]  # the placeholders whose values are never shown


class DeclaredProvider(Provider):
    """A provider that a file declares."""

    def __init__(self, form: Form, config: Config) -> None:
        self.form = form
        self.name, self.summary, self.untested = form.name, form.summary, form.untested
        self.path, self.whole_path, self.models = form.path, form.whole_path, form.models
        self.end_required, self.end = form.end_required, form.end
        self.needs_model = "model" in form.names
        self.optional, self.exact = form.optional, form.exact_names
        self.spelling = form.length.split(".")[-1]
        self.auth, self.auth_options, self.exchange = form.auth, form.auth_options, form.exchange
        self.option_names = form.option_names
        self.events = NDJSONParser if form.framing == "ndjson" else LooseSSEParser
        if form.framing != "sse":
            self.accept = "application/x-ndjson" if form.framing == "ndjson" else "application/json"
        self.streams = form.framing != "json"
        super().__init__(config)
        self._given: Dict[str, Any] = {name: self._outside(name) for name in form.names if ":" in name}
        secret = {name for name in self._given if name.startswith("env:") and is_secret_name(name[len("env:") :])}
        hidden = [value for name, value in self._given.items() if name in form.hidden or name in secret]
        config.fetched += [value for value in hidden if value not in config.fetched]
        self._given.update((name, Later("${%s}" % name)) for name in form.later)
        self._target: Optional[Tuple[str, Filler]] = None
        if form.sign is not None:
            self.auth = Steps(self.auth, form.sign)
        flags = {"token": "--token", "key": "--auth-key", "secret": "--auth-secret"}
        given = self.auth.secrets
        missing = [flag for name, flag in flags.items() if name in form.secrets and not getattr(given, name)]
        if missing:
            raise UserError("provider %s needs %s" % (self.name, " and ".join(missing)))

    def _outside(self, name: str) -> str:
        """The value of ${env:NAME} or ${option:NAME}; raises UserError when it isn't given."""
        kind, _, name = name.partition(":")
        if kind == "env":
            if name not in os.environ:
                raise UserError("%s needs the environment variable %s; set it" % (self.form.where, name))
            return os.environ[name]
        value = {**self.form.auth_options, **self.config.auth_opt}.get(name)
        if value is None:
            raise UserError("%s needs --auth-opt %s=VALUE" % (self.form.where, name))
        return value

    def check_target(self, target: str) -> None:
        """Compiles a request target; raises UserError for a placeholder that it can't have."""
        filler = compile_text(target, "--url" if target != self.path else self.form.where, self._name_of, encode=True)
        self._target = target, filler

    def _name_of(self, name: str, where: str) -> str:
        if name in PLACEHOLDERS or name in self._given:
            return name
        raise UserError("%s: ${%s} is not known%s" % (where, name, nearest(name, [*PLACEHOLDERS, *self._given])))

    def decoder(self) -> Decoder:
        """A fresh decoder for one request's stream."""
        return DeclaredDecoder(self.form.reading)

    def request(self, prompt: Prompt, endpoint: Endpoint, request_id: str, dialect: Dialect) -> HTTPRequest:
        """The request for a prompt, but for what depends on the moment at which it is sent."""
        values = self._values(prompt, request_id)
        named = self.form.headers if self.streams else self.form.whole_headers
        filled = ((name, fill(values)) for name, fill in named)
        headers = [(name, str(plainly(value))) for name, value in filled if value is not ABSENT]
        if self._target is None or self._target[0] != endpoint.target:
            self.check_target(endpoint.target)
        target = self._target[1](values)  # type: ignore[index]
        return self.written(self._body(values, dialect), target, headers, endpoint, request_id)

    def body(self, prompt: Prompt, dialect: Dialect) -> Dict[str, Any]:
        """The request body as a JSON tree."""
        return self._body(self._values(prompt, ""), dialect)

    def _values(self, prompt: Prompt, request_id: str) -> Dict[str, Any]:
        """The placeholders' values."""
        asked = Asked(self.config, prompt, request_id, self.streams)
        values = {name: value(asked) for name, value in PLACEHOLDERS.items()}
        values.update(self._given)
        return values

    def _body(self, values: Mapping[str, Any], dialect: Dialect) -> Dict[str, Any]:
        form = self.form
        tree = (form.body if self.streams else form.whole_body)(values)
        tree = {} if tree is ABSENT else tree
        if values["output_tokens"] and form.exact_names:
            exact, sent = form.exact(values), dialect.exact_fields()
            for name in form.exact_names:
                if name not in sent:
                    take_out(exact, name)
            merge(tree, exact)
        for name in form.optional:
            if name not in dialect.optional:
                take_out(tree, name)
        if form.length and dialect.max_tokens_field != self.spelling:
            parent = form.length.rpartition(".")[0]
            merge(tree, nested(parent, {dialect.max_tokens_field: take_out(tree, form.length)}))
        return tree

    def model_ids(self, answer: Any) -> List[str]:
        """The models that the endpoint's list names."""
        names = [name for name in self.form.model_ids.values(answer) if isinstance(name, str) and name.strip()]
        prefix = self.form.model_prefix
        return [name[len(prefix) :] if prefix and name.startswith(prefix) else name for name in names]


# ==================================================================================================
# 7. Registry: all providers by name
# ==================================================================================================
#
# One table holds every dialect that `--provider` can name. What data can say is a JSON file, read by the
# loader that reads a customer's own; what needs code is a class of the section above. Either way the rest
# of the program sees a `Provider` and does not know the difference.
#
# A file is read as a whole before anything is sent, and is refused for what it can't mean: a key that
# nobody reads (the nearest known one is offered), a key given twice, a path or placeholder that doesn't
# parse. Each refusal is one line that names file and key. A file can look into JSON, put values into it
# and hash them; it can't run anything. A `.py` file can: it is code, named by the user, and runs as such.

DECLARED: Tuple[str, ...] = (  # assets/providers/NAME.json
    "completions", "responses", "azure", "aliyun", "baidu", "baidu-v1", "hunyuan", "anthropic", "gemini", "ollama",
    "tgi", "triton", "llamacpp", "sglang", "dify",
)  # fmt: skip
EXAMPLES: Tuple[str, ...] = (  # assets/providers/examples/NAME.json: to copy
    "example-signed-headers", "example-sorted-query", "example-signed-body-jwt", "example-kong-hmac",
    "example-api-gateway", "example-token-first", "example-key-in-query", "example-whole-text", "example-plain-json",
    "example-agent-events",
)  # fmt: skip
HERE = os.path.dirname(os.path.abspath(__file__))
FORM_KEYS = (
    "name", "summary", "untested", "path", "whole_path", "models", "auth", "auth_options", "headers", "whole_headers",
    "body", "whole_body", "optional", "exact", "framing", "text_mode", "event", "skip_events", "text_events", "text",
    "reasoning", "tool", "whole", "finish", "end", "end_required", "error", "error_code", "error_message", "usage",
    "usage_merge", "sign", "exchange",
)  # fmt: skip
FRAMINGS = ("sse", "ndjson", "json")
TEXT_MODES = ("delta", "cumulative", "auto")
USAGE_MERGES = ("last", "max", "sum")
COUNTS = ("in_tokens", "out_tokens", "cached_tokens", "reasoning_tokens")
TESTS = ("exists", "equals", "not_equals", "in", "not_in")
FORM_LIMIT = 1024 * 1024  # bytes of a file
FORM_DEPTH = 64  # objects and lists in each other


def read_asset(name: str) -> bytes:
    """A file of assets/, from the checkout or out of the archive."""
    loader = getattr(globals().get("__spec__"), "loader", None)
    if loader is not None:
        return loader.get_data(os.path.join(os.path.dirname(__file__), "assets", *name.split("/")))
    with open(os.path.join(HERE, "assets", *name.split("/")), "rb") as file:
        return file.read()


class FormReader:
    """Reads a file's tree into a Form; raises UserError, one line that names file and key."""

    def __init__(self, tree: Any, where: str, name: str) -> None:
        self.where = where
        if not isinstance(tree, dict):
            raise UserError("%s must hold a JSON object, such as {\"text\": [\"choices.0.delta.content\"], …}" % where)
        refuse_unknown(tree, FORM_KEYS, where)
        self.tree = tree
        self.default_name = name
        self.names: Set[str] = set()  # the placeholders met
        options = self._objects("auth_options")
        for option, value in options.items():
            if value is not None and not isinstance(value, str):
                raise self._wrong("auth_options." + option, 'a text, or null where --auth-opt must give it')
        self.options = {name: value for name, value in options.items() if value is not None}
        self.required = [name for name, value in options.items() if value is None]
        self.sign = self._pipeline()
        later = ["key", "token", *(self.sign.names if self.sign is not None else ())]
        self.later = frozenset(later)
        self.later_used: Set[str] = set()

    # What a key may hold.

    def _wrong(self, key: str, wanted: str) -> UserError:
        return UserError("%s: %s must be %s" % (self.where, key, wanted))

    def _text(
        self, key: str, default: Any = None, tree: Optional[Mapping[str, Any]] = None, where: str = ""
    ) -> Any:  # fmt: skip
        value = (self.tree if tree is None else tree).get(key, default)
        if value is not default and not (isinstance(value, str) and value.strip()):
            raise self._wrong(where + key, "a text")
        return value

    def _flag(self, key: str, default: bool) -> bool:
        value = self.tree.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def _one_of(self, key: str, known: Sequence[str]) -> str:
        value = self.tree.get(key, known[0])
        if value not in known:
            hint = nearest(value, known) if isinstance(value, str) else ""
            raise self._wrong(key, "one of %s%s" % (", ".join(known), hint))
        return value

    def _objects(self, key: str) -> Dict[str, Any]:
        value = self.tree.get(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return value

    def _texts(self, key: str, tree: Optional[Mapping[str, Any]] = None, where: str = "") -> List[str]:
        """A list of texts, or one text."""
        value = (self.tree if tree is None else tree).get(key, [])
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise self._wrong(where + key, "a list of texts")
        return value

    def _paths(self, key: str, tree: Optional[Mapping[str, Any]] = None, where: str = "") -> List[Place]:
        texts = self._texts(key, tree, where)
        return [Place(text, "%s: %s" % (self.where, where + key)) for text in texts]

    def _output_paths(self, key: str, tree: Mapping[str, Any], where: str) -> List[Place]:
        """Paths of generated output, of which each may be bound to the events of a kind."""
        value, here = tree.get(key, []), "%s: %s" % (self.where, where + key)
        places = []
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                refuse_unknown(item, ("event", "path"), here)
                if not (isinstance(item.get("event"), str) and item["event"]):
                    raise self._wrong(where + key + ".event", "a text")
                places.append(Place(item.get("path"), here + ".path", item["event"]))
            elif isinstance(item, str) and item:
                places.append(Place(item, here))
            else:
                raise self._wrong(where + key, 'a list of texts, or of {"event": "delta", "path": "text"}')
        return places

    # Requests.

    def _pipeline(self) -> Optional[Pipeline]:
        """The steps that sign; also where a header holds the token or key itself."""
        places = json.dumps([self.tree.get(key) for key in ("headers", "whole_headers", "path", "whole_path")])
        later = re.search(r"\$\{\s*(key|token)\s*\}", places)
        if "sign" not in self.tree and later is None:
            return None
        return Pipeline(self.tree.get("sign", []), self.where, [*self.options, *self.required])

    def _known(self, name: str, where: str) -> str:
        """A placeholder that bodies may have."""
        kind, colon, rest = name.partition(":")
        if not (name in PLACEHOLDERS or (colon and kind in ("env", "option") and rest)):
            known = [*PLACEHOLDERS, "env:NAME", "option:NAME"]
            later = "; it can stand in headers and path alone" if name in self.later else ""
            if name in OF_MESSAGE:
                later = '; it can stand inside "$each" alone'
            if name == "secret":
                later = "; a secret can stand in sign alone"
            hint = later or nearest(name, known) or "; known are " + ", ".join(known)
            raise UserError("%s: ${%s} is not known here%s" % (where, name, hint))
        self.names.add(name)
        return name

    def _known_later(self, name: str, where: str) -> str:
        """A placeholder that headers and query may have."""
        if name not in self.later:
            return self._known(name, where)
        self.later_used.add(name)
        return name

    def _path(self, key: str, default: Optional[str]) -> Optional[str]:
        path = self._text(key, default)
        if path is not None:
            if not path.startswith("/") or re.search(r"[\s#]", path):
                raise self._wrong(key, "a path that begins with /, such as /v1/chat/completions")
            compile_text(path, "%s: %s" % (self.where, key), self._known_later)
        return path

    def _headers(self, whole: bool) -> List[Tuple[str, Filler]]:
        headers, named = [], dict(self._objects("headers"))
        if whole:
            merge(named, self._objects("whole_headers"))
        for name, text in named.items():
            key = "headers." + name
            if not re.match(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z", name):
                raise UserError("%s: %s is no name that a header can have" % (self.where, key))
            if not isinstance(text, str) or CONTROL.search(text):
                raise self._wrong(key, "a text of one line")
            headers.append((name, compile_text(text, "%s: %s" % (self.where, key), self._known_later)))
        return headers

    def _body(self, tree: Mapping[str, Any], key: str) -> Filler:
        return compile_tree(tree, "%s: %s" % (self.where, key), self._known)

    # Answers.

    def _answer(self, tree: Mapping[str, Any], where: str, base: Optional[Answer]) -> Answer:
        """The paths of an event, or those of a whole answer, which are the same where the file gives no others."""
        parts = {}
        for key in ("text", "reasoning", "tool"):
            parts[key] = self._output_paths(key, tree, where) if key in tree or base is None else getattr(base, key)
        finish = self._finish(tree, where)[0] if "finish" in tree or base is None else base.finish
        return Answer(finish=finish, **parts)

    def _finish(self, tree: Mapping[str, Any], where: str) -> Tuple[List[Place], FrozenSet[str], FrozenSet[str]]:
        finish = tree.get("finish", [])
        if not isinstance(finish, dict):
            return self._paths("finish", tree, where), frozenset(), FAILED_FINISH
        where += "finish"
        refuse_unknown(finish, ("path", "not_in", "failed"), "%s: %s" % (self.where, where))
        paths = self._paths("path", finish, where + ".")
        if not paths:
            raise self._wrong(where + ".path", "a path such as choices.0.finish_reason")
        failed = frozenset(self._texts("failed", finish, where + ".")) if "failed" in finish else FAILED_FINISH
        return paths, frozenset(self._texts("not_in", finish, where + ".")), failed

    def _rules(self, key: str, kinds: Sequence[str]) -> List[Rule]:
        rules = self.tree.get(key, [])
        rules = [rules] if isinstance(rules, dict) else rules
        if not isinstance(rules, list):
            raise self._wrong(key, "a list of rules such as [{\"event\": \"%s\"}]" % key)
        return [self._rule(rule, "%s.%d" % (key, number), kinds) for number, rule in enumerate(rules)]

    def _rule(self, rule: Any, key: str, kinds: Sequence[str]) -> Rule:
        where = "%s: %s" % (self.where, key)
        if not isinstance(rule, dict) or not rule:
            raise self._wrong(key, 'an object such as {"path": "is_end", "equals": true}')
        refuse_unknown(rule, (*kinds, *TESTS), where)
        for kind in kinds:
            if kind in rule and not (isinstance(rule[kind], str) and rule[kind].strip()):
                raise self._wrong("%s.%s" % (key, kind), "a text")
        tests = [name for name in TESTS if name in rule]
        if "data" in rule and len(rule) > 1:
            raise UserError("%s: data stands alone" % where)
        if ("path" in rule) != bool(tests) or len(tests) > 1:
            raise UserError("%s: a path goes with one of %s" % (where, ", ".join(TESTS)))
        if not tests:
            data = rule["data"].strip().encode("utf-8") if "data" in rule else None
            return Rule(data, rule.get("event"))
        return Rule(None, rule.get("event"), Place(rule["path"], where + ".path"), self._test(tests[0], rule, key))

    def _test(self, name: str, rule: Mapping[str, Any], key: str) -> Callable[[Any], bool]:
        """The test of a value. One that is absent is null, and is neither in a list nor not in it."""
        wanted = rule[name]
        if name == "exists":
            if not isinstance(wanted, bool):
                raise self._wrong(key + ".exists", "true or false")
            return lambda value: is_empty(value) is not wanted
        several = name in ("in", "not_in")
        if several and not isinstance(wanted, list):
            raise self._wrong("%s.%s" % (key, name), "a list")
        if any(isinstance(value, (dict, list)) for value in (wanted if several else [wanted])):
            raise UserError("%s: %s.%s compares texts, numbers, true, false and null; write the path down to one"
                            % (self.where, key, name))  # fmt: skip
        if several:
            plain, inside = [plainly(value) for value in wanted], name == "in"
            return lambda value: value is not None and (plainly(value) in plain) is inside
        same = plainly(wanted)
        if name == "equals":
            return lambda value: plainly(value) == same
        return lambda value: value is not None and plainly(value) != same

    def _usage(self) -> Dict[str, List[Count]]:
        usage = self._objects("usage")
        refuse_unknown(usage, COUNTS, self.where + ": usage")
        return {name: [Count(text, "%s: usage.%s" % (self.where, name)) for text in self._texts(name, usage, "usage.")]
                for name in usage}  # fmt: skip

    def _reading(self) -> Reading:
        stream = self._answer(self.tree, "", None)
        whole = self._objects("whole")
        refuse_unknown(whole, ("text", "reasoning", "tool", "finish"), self.where + ": whole")
        if not (stream.text or "text" in whole):
            raise UserError('%s: text is needed: where an event has its text, such as ["choices.0.delta.content"]'
                            % self.where)  # fmt: skip
        _, no_reasons, failed = self._finish(self.tree, "")
        event = self._text("event")
        reading = Reading(
            stream, self._answer(whole, "whole.", stream), no_reasons, failed,
            Place(event, self.where + ": event") if event else None,
            frozenset(self._texts("skip_events")), frozenset(self._texts("text_events")),
            self._rules("end", ("data", "event", "path")) if "end" in self.tree else [Rule(DONE)],
            self._rules("error", ("event", "path")) if "error" in self.tree else None,
            self._paths("error_code"), self._paths("error_message"), self._usage(),
            self._one_of("usage_merge", USAGE_MERGES), self._one_of("text_mode", TEXT_MODES), None,
        )  # fmt: skip
        return reading._replace(content=content_pattern(reading) if reading.text_mode != "cumulative" else None)

    def form(self) -> Form:
        """All of it."""
        name = self._text("name", self.default_name)
        if not re.match(r"[A-Za-z0-9][A-Za-z0-9_.-]*\Z", name):
            raise self._wrong("name", "letters, digits and _.-")
        body, exact, models = self._objects("body"), self._objects("exact"), self._objects("models")
        if "body" not in self.tree:
            raise UserError('%s: body is needed: what is asked, such as {"messages": "${messages}"}' % self.where)
        refuse_unknown(models, ("path", "ids", "prefix"), self.where + ": models")
        whole_body = copy_tree(body)
        merge(whole_body, self._objects("whole_body"))
        length = next(places_of(body, "${max_tokens}"), next(places_of(body, "${output_tokens}"), ()))
        reading = self._reading()
        ends = [path.text for path in reading.stream.finish]
        required = self._flag("end_required", "end" in self.tree or "finish" in self.tree)
        ends += [rule.name for rule in reading.ends if "end" in self.tree or (required and not ends)]
        return Form(
            name=name, summary=self._text("summary", ""), where=self.where, untested=self._flag("untested", False),
            path=self._path("path", "/"), whole_path=self._path("whole_path", None),
            models=self._model_path(models),
            model_ids=Place(models.get("ids", "data.*.id"), self.where + ": models.ids"),
            model_prefix=self._text("prefix", "", models, "models."),
            auth=self._text("auth", "bearer" if self.sign is None else "none"), auth_options=self.options,
            option_names=self.required,
            exchange=self._objects("exchange") or None, sign=self.sign, later=self.later,
            headers=self._headers(False), whole_headers=self._headers(True),
            body=self._body(body, "body"), whole_body=self._body(whole_body, "whole_body"),
            exact=self._body(exact, "exact"), exact_names=list(leaves_of(exact)), length=".".join(length),
            optional=self._optional(body), framing=self._one_of("framing", FRAMINGS), reading=reading,
            end_required=required, end=" or ".join(ends),
            # Last, since the others collect them.
            names=frozenset(self.names), secrets=self._secrets(), hidden=self._hidden(),
        )  # fmt: skip

    def _secrets(self) -> FrozenSet[str]:
        signing = [step.node.names for step in self.sign.steps] if self.sign is not None else []
        asking = re.findall(r"\$\{\s*(key|secret)\s*\}", json.dumps(self._objects("exchange")))
        return self.later_used.union(asking, *signing) & frozenset(("key", "secret", "token"))

    def _hidden(self) -> FrozenSet[str]:
        """Of ${env:NAME} and ${option:NAME} those that are named like a secret, or fill a field that is."""
        pairs = [(name.partition(":")[2], "${%s}" % name) for name in self.names if ":" in name]
        for key in ("path", "whole_path"):
            pairs += parse_qsl(str(self.tree.get(key)).partition("?")[2])
        for key in ("headers", "whole_headers", "body", "whole_body"):
            pairs += text_fields(self.tree.get(key))
        return frozenset(name.strip() for key, text in pairs if is_secret_name(key) for _, name in IN_TEXT.findall(text)
                         if ":" in name)  # fmt: skip

    def _model_path(self, models: Mapping[str, Any]) -> Optional[str]:
        path = models.get("path")
        if path is not None and not (isinstance(path, str) and re.match(r"/\S*\Z", path)):
            raise self._wrong("models.path", "a path that begins with /, such as /v1/models")
        return path

    def _optional(self, body: Mapping[str, Any]) -> List[str]:
        """The names of fields that can be given up; raises UserError for one that the body doesn't have."""
        names = self._texts("optional")
        for name in names:
            if take_out(copy_tree(body), name) is None:
                raise UserError("%s: optional: the body has no field %s" % (self.where, name))
        return names


def text_fields(tree: Any, key: str = "") -> Iterator[Tuple[str, str]]:
    """The texts of a JSON tree, each with the name of its field."""
    if isinstance(tree, str):
        yield key, tree
    for name, value in tree.items() if isinstance(tree, dict) else ():
        yield from text_fields(value, name)
    for value in tree if isinstance(tree, list) else ():
        yield from text_fields(value, key)


def copy_tree(tree: Any) -> Any:
    """A JSON tree of its own."""
    return json.loads(json.dumps(tree))


def once(pairs: Sequence[Tuple[str, Any]]) -> Dict[str, Any]:
    """An object of JSON; raises ValueError for a key that is given twice."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen: Set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError("the key %r is given twice" % twice)
    return tree


def check_tree(tree: Any, where: str) -> None:
    """Raises UserError for JSON that can be read but not be worked with or sent."""
    level: List[Any] = [tree]
    for _ in range(FORM_DEPTH):
        values = [one for node in level if isinstance(node, dict) for pair in node.items() for one in pair]
        values += [one for node in level if isinstance(node, list) for one in node]
        if any(isinstance(one, str) and re.search("[\ud800-\udfff]", one) for one in values):
            raise UserError("%s holds half of a surrogate pair; write the character itself" % where)
        level = [one for one in values if isinstance(one, (dict, list))]
        if not level:
            return
    raise UserError("%s is nested too deeply" % where)


def parse_form(data: bytes, where: str, name: str = "custom") -> Form:
    """The provider that a JSON file declares; raises UserError.

    where: the file, for errors; name: what it is called where it names nothing itself.
    """
    try:
        tree = json.loads(data.decode("utf-8-sig"), object_pairs_hook=once, parse_constant=read_no_constant)
    except UnicodeDecodeError:
        raise UserError("%s is not UTF-8; save it as such" % where) from None
    except RecursionError:
        raise UserError("%s is nested too deeply" % where) from None
    except ValueError as error:
        raise UserError("%s is not JSON: %s" % (where, error)) from None
    check_tree(tree, where)
    try:
        return FormReader(tree, where, name).form()
    except UserError as error:  # a name in the file may hold a line feed
        raise UserError(" ".join(str(error).split())) from None


def read_provider_file(path: str) -> bytes:
    """What a provider's file holds; raises UserError."""
    try:
        with open(path, "rb") as file:
            data = file.read(FORM_LIMIT + 1)
    except OSError as error:
        raise UserError("--provider %s can't be read: %s" % (path, error.strerror or error)) from None
    if len(data) > FORM_LIMIT:
        raise UserError("--provider %s is longer than %d bytes; that is no provider's file" % (path, FORM_LIMIT))
    return data


@functools.lru_cache(maxsize=None)
def builtin_form(name: str) -> Form:
    """A provider that llmbench brings as a file."""
    return parse_form(builtin_source(name), name, name)


def builtin_source(name: str) -> bytes:
    """The file of such a provider."""
    return read_asset("providers/%s%s.json" % ("examples/" if name in EXAMPLES else "", name))


def provider_of_code(path: str) -> Type[Provider]:
    """The subclass of Provider in a .py file, in which `import llmbench` is the running program; raises UserError."""
    import importlib.util

    sys.modules.setdefault("llmbench", sys.modules[__name__])
    read_provider_file(path)
    spec = importlib.util.spec_from_file_location(
        "llmbench_provider_" + hashlib.sha256(os.path.abspath(path).encode("utf-8", "replace")).hexdigest()[:8], path
    )
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except UserError:
        raise
    except Exception as error:
        raise UserError("--provider %s: %s" % (path, where_it_failed(error, path))) from None
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Provider)
             and value.__module__ == module.__name__]  # fmt: skip
    last = [one for one in found if not any(issubclass(other, one) and other is not one for other in found)]
    if len(last) != 1:
        raise UserError("--provider %s must define one subclass of llmbench.Provider; it has %d" % (path, len(last)))
    return last[0]


def where_it_failed(error: BaseException, path: str) -> str:
    """An error in a file of code, with its line there."""
    line, traceback = getattr(error, "lineno", None), error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == path:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    said = " ".join(str(getattr(error, "msg", None) or error).split())[:200]
    return "%s%s%s" % ("line %d: " % line if line else "", type(error).__name__, ": " + said if said else "")


def form_of(name: str) -> Optional[Form]:
    """The form of a provider that a file declares, by name or path; None for one that is code; raises UserError."""
    if name.endswith(".json"):
        default = re.sub(r"[^A-Za-z0-9_.-]", "-", os.path.basename(name)[:-5]).lstrip("_.-") or "custom"
        return parse_form(read_provider_file(name), name, default)
    return builtin_form(name) if name in DECLARED or name in EXAMPLES else None


def make_declared(name: str, config: Config) -> Provider:
    """A provider that llmbench brings as a file."""
    return DeclaredProvider(builtin_form(name), config)


PROVIDERS: Dict[str, Callable[[Config], Provider]] = {
    "openai": Provider,
    **{name: functools.partial(make_declared, name) for name in DECLARED},
}


def make_provider(config: Config) -> Provider:
    """The provider that the configuration names, by name or by file; raises UserError."""
    name = config.provider
    if name in PROVIDERS:
        return PROVIDERS[name](config)
    if name.endswith(".py"):
        return provider_of_code(name)(config)
    form = form_of(name)
    if form is None:
        raise UserError(
            "provider %r is unknown%s; `llmbench providers` lists them, and a path ending in .json or .py names a file"
            % (name, nearest(name, PROVIDERS))
        )
    return DeclaredProvider(form, config)


# ==================================================================================================
# 8. Workload: files and built-ins to prompts
# ==================================================================================================
#
# A workload is the built-in prompts, a text file (a prompt a line), JSON objects one a line (JSONL) or
# in one array; `-` reads stdin. A file is JSONL when its name ends in .jsonl, .ndjson or .json, or when its
# first line begins with `{`; it is an array when it begins with `[` and an object, or with `[` and its name
# ends in .json. An object is one of
#   {"prompt": text}               one user message
#   {"messages": […]}              sent as it is, whatever roles and typed parts are in it
#   {"conversations": […]}         ShareGPT: the user's turns are played, each answered by the endpoint itself
# with `id` and `max_tokens` where wanted. What is broken is named by its line or item number: it is never
# sent as a prompt, and never left out in silence.
#
# A trace holds no text, but when each request came and how long it and its answer were: JSONL of
# `timestamp`, `input_length`, `output_length` (Mooncake's, in ms, with `hash_ids`: a name for each block of
# the text, by which prefixes are shared), or CSV with the columns of BurstGPT (in seconds). Rows of length 0
# are failed requests: they are left out, and counted in a note.
#
# Which prompt a request takes is a function of its number (order_index), so that all parts of a run agree
# without talking: in file order, starting again at the end; shuffled anew each time round; or drawn.
#
# A text of a length is built where none is given, for a trace or for a target of input tokens, without a
# tokenizer: the endpoint says in a few probes how many tokens it counts for texts of known characters, and
# the line through these is what all targets are converted by (Fit). That is exact enough only if the texts
# are alike: they are sentences of common words, which nearly every tokenizer knows as one token each, whose
# lengths follow one pattern, so that as many characters are as many words. The text is a function of the
# seed and a name, differs from name to name from its first words on, and is the same in every part of a run.
#
# Unless `--no-unique` is given, the first user message of each conversation begins with a few characters
# that no earlier one had, so that no prefix cache answers in the endpoint's stead.

ARRAY_START = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[(\s*\{)?")
BROKEN_SHOWN = 5  # how many broken lines or items one message names

# Who speaks, as ShareGPT's dumps and their relatives write it.
SHAREGPT_ROLES: Dict[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}


class Workload(NamedTuple):
    """The prompts of a run in the order of their file, and what its reader should know about them."""

    prompts: List[Prompt]
    notes: Tuple[str, ...] = ()
    trace: bool = False  # each prompt has `at`, `input_tokens` and `output_tokens`, and no messages yet
    block_tokens: int = 0  # how many tokens each of a trace's blocks stands for


def not_utf8(name: str, number: int) -> UserError:
    """What is said of a line that is not UTF-8."""
    return UserError("%s line %d is not UTF-8; convert the file" % (name, number))


def decode_workload(data: bytes, name: str) -> List[str]:
    """The lines of a workload file; raises UserError naming the line that is not UTF-8."""
    lines = []
    for number, line in enumerate(data.replace(b"\r\n", b"\n").split(b"\n"), 1):
        try:
            lines.append(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            raise not_utf8(name, number) from None
    return lines


def parse_workload(data: bytes, name: str, timestamp_unit: str = "auto") -> Workload:
    """The workload in a file's bytes; raises UserError with the number of a bad line or item.

    timestamp_unit: ms, s, or auto: ms in a JSONL trace and s in a CSV one.
    """
    start = ARRAY_START.match(data)
    if start and (start.group(1) or name.lower().endswith(".json")):
        workload = Workload(parse_array(data, name))
    else:
        numbered = enumerate(decode_workload(data, name), 1)
        lines = [("line %d" % number, line) for number, line in numbered if line.strip()]
        workload = parse_lines(lines, name, timestamp_unit)
    if not workload.prompts:
        raise UserError("%s holds no prompt; write one a line" % name)
    return workload


def parse_lines(lines: List[Tuple[str, str]], name: str, timestamp_unit: str) -> Workload:
    """The workload in labelled lines, none blank: a trace, JSONL or text, told by the name and the first line."""
    first = lines[0][1] if lines else ""
    columns = trace_columns(first)
    if columns or name.lower().endswith(".csv"):
        return parse_csv_trace(lines, name, columns, timestamp_unit)
    if not (name.lower().endswith((".jsonl", ".ndjson", ".json")) or first.lstrip().startswith("{")):
        return Workload([Prompt(label.replace(" ", "-"), [user_message(line)]) for label, line in lines])
    if is_trace_line(first):
        unit = "ms" if timestamp_unit == "auto" else timestamp_unit
        rows = parse_each(functools.partial(parse_trace_line, TRACE_UNITS[unit]), lines, name)
        return make_trace(rows, name, unit)
    return Workload(parse_each(parse_line, lines, name))


def user_message(text: str) -> Dict[str, Any]:
    """What a user says, as a chat message."""
    return {"role": "user", "content": text}


def read_json(line: str, name: str, label: str) -> Any:
    """One line of JSONL; raises UserError when it is not JSON."""
    try:
        return json.loads(line, parse_constant=read_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError("%s %s is not JSON (%s); mend or remove it" % (name, label, error)) from None


def parse_each(parse: Callable[[Any, str, str], Prompt], items: Iterable[Tuple[str, Any]], name: str) -> List[Prompt]:
    """Every item as a prompt; raises UserError with what is wrong with the first broken one and which others are."""
    prompts: List[Prompt] = []
    errors: List[str] = []
    broken: List[str] = []
    for label, item in items:
        try:
            prompts.append(parse(item, name, label))
        except UserError as error:
            errors.append(str(error))
            broken.append(label)
    if len(broken) > 1:
        others = ", ".join(broken[1:BROKEN_SHOWN]) + (", …" if len(broken) > BROKEN_SHOWN else "")
        raise UserError("%s (%d are broken: also %s)" % (errors[0], len(broken), others))
    if broken:
        raise UserError(errors[0])
    return prompts


def parse_array(data: bytes, name: str) -> List[Prompt]:
    """The prompts of a JSON array of objects, each named by its place from 1."""
    try:
        items = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise not_utf8(name, data.count(b"\n", 0, error.start) + 1) from None
    except (ValueError, RecursionError) as error:
        raise UserError("%s is not JSON (%s); mend it" % (name, error)) from None
    return parse_each(parse_item, (("item %d" % number, item) for number, item in enumerate(items, 1)), name)


def parse_line(line: str, name: str, label: str) -> Prompt:
    """One JSONL line as a prompt; raises UserError that says what is wrong with it."""
    return parse_item(read_json(line, name, label), name, label)


def parse_item(item: Any, name: str, label: str) -> Prompt:
    """One JSON object as a prompt; raises UserError that says what is wrong with it."""
    where = "%s %s" % (name, label)
    if not isinstance(item, dict):
        raise UserError('%s is not a JSON object; write {"prompt": …} or {"messages": […]}' % where)
    if sum(key in item for key in ("prompt", "messages", "conversations")) != 1:
        hint = " (a trace begins with its first request)" if "input_length" in item else ""
        raise UserError('%s needs either "prompt", "messages" or "conversations"%s' % (where, hint))
    limit = item.get("max_tokens")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise UserError("%s: max_tokens must be a whole number above 0" % where)
    turns = conversation_turns(item, where) if "conversations" in item else [prompt_messages(item, where)]
    own = item.get("id")
    return Prompt(label.replace(" ", "-") if own is None else str(own), turns[0], limit, turns[1:])


def prompt_messages(item: Dict[str, Any], where: str) -> List[Dict[str, Any]]:
    """The chat messages of a JSON object with a prompt or messages, checked."""
    if "prompt" in item:
        if not isinstance(item["prompt"], str) or not item["prompt"].strip():
            raise UserError('%s: "prompt" must be a text that is not empty' % where)
        return [user_message(item["prompt"])]
    messages = item["messages"]
    if not isinstance(messages, list) or not messages:
        raise UserError('%s: "messages" must be a list that is not empty' % where)
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError('%s: each message must be an object with a "role"' % where)
        if not isinstance(message.get("content"), (str, list, type(None))):
            raise UserError('%s: a message\'s "content" must be a text or a list of parts' % where)
    return messages


def conversation_turns(item: Dict[str, Any], where: str) -> List[List[Dict[str, Any]]]:
    """The user's turns of a ShareGPT conversation, each the messages to send for it: at least one.

    The recorded answers are left out, those before the first question too (dumps are cut into pieces). A system
    message goes out with the user's turn that follows it.
    """
    if not isinstance(item["conversations"], list):
        raise UserError('%s: "conversations" must be a list' % where)
    for key in ("image", "images", "video", "videos"):
        if item.get(key):
            raise UserError('%s: its "%s" would not be sent; write it as {"messages": […]} with parts' % (where, key))
    turns: List[List[Dict[str, Any]]] = []
    waiting: List[Dict[str, Any]] = []
    for number, entry in enumerate(item["conversations"], 1):
        role, text = conversation_entry(entry, "%s, entry %d" % (where, number))
        if role == "user":
            turns.append(waiting + [user_message(text)])
            waiting = []
        elif role == "system" and text.strip():
            waiting.append({"role": "system", "content": text})
    if not turns:
        raise UserError('%s: no entry of its conversation is a user\'s ("from": "human"); remove it' % where)
    return turns


def conversation_entry(entry: Any, where: str) -> Tuple[str, str]:
    """Who speaks in a ShareGPT entry (user, assistant or system), and what; a user says something."""
    if not isinstance(entry, dict):
        raise UserError('%s must be an object with "from" and "value"' % where)
    speaker, text = entry.get("from"), entry.get("value")
    role = SHAREGPT_ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise UserError('%s: "from" must be one of %s' % (where, ", ".join(SHAREGPT_ROLES)))
    if role == "assistant":
        return role, ""
    if not isinstance(text, str) or (role == "user" and not text.strip()):
        raise UserError('%s: "value" must be a text that is not empty' % where)
    return role, text


# How a trace's column or key may be called, in lower case.
TRACE_TIME = ("timestamp",)
TRACE_INPUT = ("input_length", "request tokens")
TRACE_OUTPUT = ("output_length", "response tokens")
TRACE_UNITS = {"ms": 0.001, "s": 1.0}
TRACE_LIMIT = 1e15  # a time in ms above it is a mistake
LENGTH_CEILING = 1e8  # tokens of one request: a length above it is a mistake
# What a block of a trace may stand for. Mooncake's have 512 tokens; serving engines' own blocks are smaller.
BLOCK_TOKENS = (512, 16, 32, 64, 128, 256, 1024, 2048)


def trace_columns(line: str) -> Optional[Tuple[int, int, int]]:
    """Where a CSV trace's time, input length and output length stand, by its head line; None: it is not such a line."""
    cells = [cell.strip().strip('"').lower() for cell in line.split(",")]
    found = [
        next((place for place, cell in enumerate(cells) if cell in names), None)
        for names in (TRACE_TIME, TRACE_INPUT, TRACE_OUTPUT)
    ]
    return None if None in found else (found[0], found[1], found[2])


def is_trace_line(line: str) -> bool:
    """Whether a JSONL line is one of a trace: a time and lengths, and no text."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        return False
    texts = ("prompt", "messages", "conversations")
    return isinstance(item, dict) and "input_length" in item and not any(key in item for key in texts)


def parse_trace_line(scale: float, line: str, name: str, label: str) -> Prompt:
    """One line of a JSONL trace; raises UserError that says what is wrong with it."""
    item = read_json(line, name, label)
    where = "%s %s" % (name, label)
    if not isinstance(item, dict):
        raise UserError("%s is not a JSON object" % where)
    blocks = item.get("hash_ids") or ()
    if not isinstance(blocks, (list, tuple)) or not all(isinstance(block, (int, str)) for block in blocks):
        raise UserError('%s: "hash_ids" must be a list of numbers or texts' % where)
    values = [item.get(key) for key in ("timestamp", "input_length", "output_length")]
    return trace_prompt(values, scale, where, label, blocks)


def parse_csv_trace(
    lines: List[Tuple[str, str]], name: str, columns: Optional[Tuple[int, int, int]], timestamp_unit: str
) -> Workload:
    """A CSV trace with its head line; raises UserError with the number of a bad row."""
    if columns is None:
        needed = "Timestamp, Request tokens and Response tokens"
        raise UserError("%s: the first line of a CSV trace must name the columns %s" % (name, needed))
    import csv

    unit = "s" if timestamp_unit == "auto" else timestamp_unit

    def parse(line: str, name: str, label: str) -> Prompt:
        where = "%s %s" % (name, label)
        try:
            cells = next(csv.reader([line]))
            values = [float(cells[column]) for column in columns]
        except (ValueError, IndexError, csv.Error):
            raise UserError("%s: its time and lengths must be numbers" % where) from None
        return trace_prompt(values, TRACE_UNITS[unit], where, label, ())

    return make_trace(parse_each(parse, lines[1:], name), name, unit)


def trace_prompt(values: Sequence[Any], scale: float, where: str, label: str, blocks: Sequence[Any]) -> Prompt:
    """A request of a trace from its time, input length and output length; a length may be 0 here."""
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values):
        raise UserError("%s: its timestamp, input_length and output_length must be numbers" % where)
    limits = (TRACE_LIMIT, LENGTH_CEILING, LENGTH_CEILING)
    if not all(abs(value) < limit for value, limit in zip(values, limits)):  # NaN is below nothing
        raise UserError("%s: its timestamp or one of its lengths is out of range" % where)
    moment, source, target = values
    if source < 0 or target < 0 or source != int(source) or target != int(target):
        raise UserError("%s: its lengths must be whole numbers, 0 or above" % where)
    return Prompt(label.replace(" ", "-"), [], int(target), [], moment * scale, int(source), int(target), blocks)


def make_trace(rows: List[Prompt], name: str, unit: str) -> Workload:
    """The workload of a trace's rows: those of some length, in the order of their times, counted from the first's."""
    prompts = [row for row in rows if row.input_tokens and row.output_tokens]
    late = lateness([prompt.at for prompt in prompts])
    prompts.sort(key=lambda prompt: prompt.at)  # a stable sort: what came at one time stays in file order
    zero = prompts[0].at if prompts else 0.0
    for prompt in prompts:
        prompt.at = round(prompt.at - zero, 6)
    tokens = block_length(prompts)
    uneven = sum(1 for prompt in prompts if prompt.blocks and not fills_blocks(prompt, tokens))
    span = prompts[-1].at if prompts else 0.0
    notes = ["a trace of %d requests over %.1f s, its times read as %s" % (len(prompts), span, unit)]
    if len(prompts) < len(rows):
        notes.append("%d of %d requests have a length of 0 and are left out" % (len(rows) - len(prompts), len(rows)))
    if late:
        notes.append("%d requests stood behind later ones, by up to %.3f s; put in order" % (len(late), max(late)))
    if uneven:
        notes.append("%d requests have hash_ids that are not one per %d tokens" % (uneven, tokens))
    return Workload(prompts, tuple("%s: %s" % (name, note) for note in notes), True, tokens)


def lateness(times: Sequence[float]) -> List[float]:
    """By how much each time that stands behind a later one does.

    >>> lateness([1.0, 4.0, 3.0, 2.0, 5.0])
    [1.0, 2.0]
    """
    behind = (latest - time for latest, time in zip(itertools.accumulate(times, max), times))
    return [span for span in behind if span > 0.0]


def fills_blocks(prompt: Prompt, tokens: int) -> bool:
    """Whether a trace's request has as many blocks as its length needs, the last one begun or not."""
    return len(prompt.blocks) in (prompt.input_tokens // tokens, -(-prompt.input_tokens // tokens))


def block_length(prompts: Sequence[Prompt]) -> int:
    """The number of tokens that a trace's blocks stand for: the one that fits most requests; 0 without blocks."""
    with_blocks = [prompt for prompt in prompts if prompt.blocks]
    if not with_blocks:
        return 0
    return max(BLOCK_TOKENS, key=lambda tokens: sum(fills_blocks(prompt, tokens) for prompt in with_blocks))


def read_workload(path: Optional[str], builtin: Sequence[Tuple[str, bytes]], timestamp_unit: str = "auto") -> Workload:
    """The workload of `--workload-file`, or the built-in prompts in all languages; raises UserError."""
    if path is None:
        prompts = []
        for language, data in builtin:
            for number, prompt in enumerate(parse_workload(data, "built-in prompts").prompts, 1):
                prompts.append(Prompt("%s-%d" % (language, number), prompt.messages))
        return Workload(prompts)
    if path == "-":
        return parse_workload(sys.stdin.buffer.read(), "stdin", timestamp_unit)
    try:
        with open(path, "rb") as file:
            return parse_workload(file.read(), os.path.basename(path), timestamp_unit)
    except OSError as error:
        raise UserError("--workload-file %s cannot be read: %s" % (path, error.strerror or error)) from None


def next_turn(prompt: Prompt, answer: str) -> Optional[Prompt]:
    """The prompt of a conversation's next turn, given what the endpoint answered to this one; None after the last.

    Made of the prompt as it was sent: a unique prefix stays where it is, and no turn gets another.
    """
    if not prompt.turns:
        return None
    said = {"role": "assistant", "content": answer}
    return dataclasses.replace(prompt, messages=prompt.messages + [said] + prompt.turns[0], turns=prompt.turns[1:])


ORDERS = ("in-order", "shuffled", "random")


def order_index(order: str, seed: int, count: int, index: int) -> int:
    """Which of `count` prompts the request of this number takes, in one of ORDERS.

    shuffled: each time round another permutation; random: drawn, so that one may come twice before another came.

    >>> [order_index("in-order", 0, 3, index) for index in range(5)]
    [0, 1, 2, 0, 1]
    """
    if order == "in-order":
        return index % count
    if order == "shuffled":
        turn, place = divmod(index, count)
        return permutation(seed, count, turn)[place]
    if order == "random":
        return seeded_numbers(1, seed, "random", index)[0] % count
    raise ValueError("no order is called %s" % order)


@functools.lru_cache(maxsize=2)  # the requests around the end of a turn take from two
def permutation(seed: int, count: int, turn: int) -> Sequence[int]:
    """The numbers below `count` in an order of their own for each seed and turn."""
    keys = seeded_numbers(count, seed, "shuffled", turn)
    return array.array("L", sorted(range(count), key=keys.__getitem__))


def seeded_numbers(count: int, *seed: Union[int, str]) -> Sequence[int]:
    """Numbers below 2 ** 64, the same for the same seed in every version of Python."""
    return struct.unpack("<%dQ" % count, seeded_bytes(8 * count, *seed))


def seeded_bytes(count: int, *seed: Union[int, str]) -> bytes:
    """Bytes, the same for the same seed, unrelated for different ones.

    >>> seeded_bytes(4, 0, "a").hex()
    '9f70a822'
    """
    return hashlib.shake_256("/".join(map(str, seed)).encode("utf-8", "surrogatepass")).digest(count)


# --- texts of a length ---------------------------------------------------------------------------------------------

WORDS = """
a I am an as at be by do go he if in is it me my no of on or so to up us we all and any are ask big boy but can car
cat dad day did dog eat end far few for get got had has her him his hot how its job law let low man mom new not now
off old one our out own put red run say sea see she sky sun the too try two use was way who why you area army away
back bank beat blue born come data deep drop easy firm form from goal good half have help here hill hold idea iron
item join know lack land lead life make many mark mind mine most next note over paid park pass path plan race read
rock room root said same save seed self ship size slow sold song team text thus tiny told trip west will wine wood
being built cause child close cover eight faith first floor forth found fresh front fruit great group horse human
learn legal level lunch match month night north novel nurse older panel pilot plane plate print quick radio relax
reply right rules scale scene score sense shall short skill smoke sorry sound space speak speed stone story strip
taste their these third trade treat until upper usual which women worry wrong young youth advice appear beyond
chance common defeat demand double driver easily effort either entire future happen higher highly income island
jacket larger legacy little manage medium memory mental method minute mirror moment motion moving museum nearby
origin parent planet random rather recent reform relate remote remove rescue result return rising safety salary
screen season secret seller senior silver soccer stream strike target theory trying twenty unable varied visual
volume wealth wonder worker yellow ability balance benefit brother century climate combine concept contain contest
culture digital dollars edition exactly explore express fashion forever forward genuine include intense journal
library license manager mention mystery nothing painted passage popular predict prevent primary private protect
receive regular request service session student subject succeed suggest totally trouble uniform visitor waiting
warning weekend whether without absolute announce anywhere consumer customer describe directly disaster distance
distinct download dramatic exercise football grateful heritage incident internet judgment likewise maintain midnight
moderate official operator painting peaceful petition physical planning preserve princess priority property prospect
quantity reporter restrict revealed selected sensible separate strongly struggle tracking training withdraw yourself
afternoon assistant attention available beautiful condition confident construct developer different direction
emergency encourage equipment establish excellent executive existence expensive following generally important
introduce necessary newspaper otherwise political potential professor questions reference represent scientist
sensitive situation something sometimes statement structure substance technical therefore tradition yesterday
background commercial conference definition department discussion efficiency experience expression generation
historical individual industrial instrument laboratory leadership literature management membership operations
originally particular percentage perception permission personally philosophy population previously production
psychology publishing reasonable regulation relatively resolution settlement statistics suggestion television
themselves throughout understand university appropriate arrangement association combination comfortable competition
complicated consequence considering corporation demonstrate description distinction electricity engineering
environment examination explanation immediately improvement independent information intelligent legislation
measurement opportunity performance personality perspective photography possibility preparation progressive
recognition recommended requirement responsible sensitivity temperature theoretical traditional transaction
translation unfortunate
"""
# The letters of a sentence's words, each with the blank before it, over and over. A period is a token of one character:
# the long last word makes up for it, so that tokens grow evenly with characters wherever a text ends.
SENTENCE_PARTS = (4, 6, 7, 3, 5, 8, 4, 7, 6, 5)
SHORTEST_ENDING, LONGEST_ENDING = 8, 12
SENTENCE = sum(SENTENCE_PARTS) + 10
SHORTEST_TEXT = SHORTEST_ENDING
SENTENCES = 256  # of which one byte chooses one
PROBE_TEXT_LIMIT = 40000  # characters: a few seconds of prefill at most, and the error of the slope is well below 1 %


class TextMaker:
    """Builds texts of a number of characters: ordinary words in sentences, a function of the seed and a name."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._words: Dict[int, List[str]] = {}
        for word in WORDS.split():
            self._words.setdefault(len(word), []).append(word)
        chances = (seeded_bytes(32, seed, "sentence", number) for number in range(SENTENCES))
        places = itertools.cycle(range(len(SENTENCE_PARTS)))
        self._sentences = [self._sentence(SENTENCE, chance, place) + " " for chance, place in zip(chances, places)]

    def text(self, name: str, chars: int, place: Optional[int] = None) -> str:
        """A text of so many characters, SHORTEST_TEXT at least; another name's differs from its first words on.

        place: where in the pattern of word lengths it begins; drawn when None, so that texts of a length average out.
        """
        chars = max(chars, SHORTEST_TEXT)
        chance = seeded_bytes(65, self.seed, "text", name)
        place = (chance[0] if place is None else place) % len(SENTENCE_PARTS)
        rest = chars - SENTENCE - 1
        if rest < SHORTEST_TEXT:
            return self._sentence(chars, chance[1:], place)
        whole = (rest - SHORTEST_TEXT) // (SENTENCE + 1)
        middle = map(self._sentences.__getitem__, seeded_bytes(whole, self.seed, "middle", name))
        ending = self._sentence(rest - whole * (SENTENCE + 1), chance[33:], place)
        return self._sentence(SENTENCE, chance[1:33], place) + " " + "".join(middle) + ending

    def _sentence(self, length: int, chance: bytes, place: int) -> str:
        rows = map(self._words.__getitem__, sentence_parts(length, place))
        return " ".join([row[byte * len(row) >> 8] for row, byte in zip(rows, chance)]).capitalize() + "."


@functools.lru_cache(maxsize=2 * SENTENCE * len(SENTENCE_PARTS))  # all that there are
def sentence_parts(length: int, place: int) -> Tuple[int, ...]:
    """The letters of the words of a sentence of so many characters, its pattern begun at a place.

    >>> sentence_parts(30, 0)
    (3, 5, 6, 2, 9)
    """
    parts = []
    while length > LONGEST_ENDING:
        parts.append(min(SENTENCE_PARTS[(place + len(parts)) % len(SENTENCE_PARTS)], length - SHORTEST_ENDING))
        length -= parts[-1]
    return tuple(part - 1 for part in [*parts, length])


class Fit(NamedTuple):
    """How many tokens an endpoint counts for one of our texts: `base`, its template's own, and `slope` a character."""

    base: float
    slope: float

    def tokens_for(self, chars: int) -> float:
        """The tokens that a request with a text of so many characters has."""
        return self.base + self.slope * chars

    def chars_for(self, tokens: float) -> int:
        """The characters of the text with which a request has so many tokens; SHORTEST_TEXT where none is so short.

        >>> Fit(20.0, 0.2).chars_for(1020)
        5000
        """
        return max(SHORTEST_TEXT, round((tokens - self.base) / self.slope))

    @property
    def least(self) -> int:
        """The smallest number of input tokens that a request can have."""
        return math.ceil(self.tokens_for(SHORTEST_TEXT))


def probe_prompts(maker: TextMaker, least: int, most: int, system: bool = False) -> List[Tuple[int, Prompt]]:
    """Prompts whose input tokens tell the Fit for targets from `least` to `most`, each with its texts' characters.

    They are to be sent the way the run's own are: with a unique prefix or without; `system`: with a system message.
    A token more or less is 6 % of a target of 16: for short targets each place of the pattern has its probe.
    """
    low = min(max(64, least), PROBE_TEXT_LIMIT // 5)
    high = min(max(2000, 4 * most), PROBE_TEXT_LIMIT)
    sizes = [low] * (len(SENTENCE_PARTS) if least < 200 else 3) + [high] * 2
    prompts = []
    for number, size in enumerate(sizes):
        name = "probe-%d" % number
        texts = [("user", maker.text(name, size, number))]
        if system:
            texts.insert(0, ("system", maker.text("probe system", 64)))
        messages = [{"role": role, "content": text} for role, text in texts]
        prompts.append((sum(len(text) for _, text in texts), Prompt(name, messages, 1)))
    return prompts


def fit_lengths(pairs: Sequence[Tuple[int, int]]) -> Fit:
    """The line through pairs of characters and reported input tokens; ValueError when there is none.

    Weighted least squares: the tokens of a text scatter with the root of its length, so that a pair weighs 1 / length.
    math.fsum: the sum of floats changed with Python 3.12, and hosts of one run are to agree.
    """
    if len({chars for chars, _ in pairs}) < 2:
        raise ValueError("input tokens of at least two texts of different lengths are needed")
    weights = [1.0 / chars for chars, _ in pairs]
    total = math.fsum(weights)
    mean_chars = math.fsum(weight * chars for weight, (chars, _) in zip(weights, pairs)) / total
    mean_tokens = math.fsum(weight * tokens for weight, (_, tokens) in zip(weights, pairs)) / total
    spread = math.fsum(weight * (chars - mean_chars) ** 2 for weight, (chars, _) in zip(weights, pairs))
    joint = math.fsum(w * (chars - mean_chars) * (tokens - mean_tokens) for w, (chars, tokens) in zip(weights, pairs))
    fit = Fit(mean_tokens - joint / spread * mean_chars, joint / spread)
    off = [abs(tokens - fit.tokens_for(chars)) > 4.0 + 0.1 * tokens for chars, tokens in pairs]
    if fit.slope <= 0.0 or any(off):
        counts = ", ".join("%d for %d characters" % (tokens, chars) for chars, tokens in sorted(pairs))
        raise ValueError("the endpoint's input tokens do not grow evenly with the text: " + counts)
    return fit


class Lengths(NamedTuple):
    """Target lengths in tokens: fixed ones, of which each makes a stage, or a distribution.

    kind: fixed, normal (values: mean and standard deviation) or uniform (values: lowest and highest).
    """

    kind: str
    values: Tuple[int, ...]

    @property
    def stages(self) -> List[int]:
        """The length that each stage stands for: the fixed ones, or a distribution's mean.

        >>> parse_lengths("512,2048").stages, parse_lengths("uniform:100,900").stages
        ([512, 2048], [500])
        """
        if self.kind == "fixed":
            return list(self.values)
        return [sum(self.values) // 2 if self.kind == "uniform" else self.values[0]]

    @property
    def bounds(self) -> Tuple[int, int]:
        """The least and the most that is to be expected: three standard deviations of a normal one."""
        if self.kind == "normal":
            return max(1, self.values[0] - 3 * self.values[1]), self.values[0] + 3 * self.values[1]
        return min(self.values), max(self.values)

    def draw(self, seed: int, stage: int, index: int) -> int:
        """The length of a request, at least 1, by its number in its stage; fixed ones are taken by stage, in turn."""
        if self.kind == "fixed":
            return self.values[stage % len(self.values)]
        first, second = seeded_numbers(2, seed, "length", stage, index)
        low, high = self.values
        if self.kind == "uniform":
            return low + first % (high - low + 1)
        radius = math.sqrt(-2.0 * math.log((first + 1) / 2.0**64))  # Box and Muller: two even numbers, one normal one
        return max(1, round(low + high * radius * math.cos(2.0 * math.pi * second / 2.0**64)))


def parse_lengths(text: str) -> Lengths:
    """`1024`, a list `512,2048,8192`, `normal:MEAN,SD` or `uniform:LOW,HIGH`; raises ValueError."""
    kind, colon, values = text.rpartition(":")
    kind = kind.strip() if colon else "fixed"
    numbers = [value.strip() for value in values.split(",")]
    if kind not in ("fixed", "normal", "uniform") or not all(re.match(r"[0-9]{1,9}$", number) for number in numbers):
        raise ValueError("needs tokens such as 1024, a list 512,2048, normal:1024,200 or uniform:100,900")
    lengths = Lengths(kind, tuple(int(number) for number in numbers))
    if kind != "fixed" and len(numbers) != 2:
        raise ValueError("%s needs two numbers, such as normal:1024,200 or uniform:100,900" % kind)
    if min(lengths.values[:1] if kind == "normal" else lengths.values) < 1:
        raise ValueError("needs lengths of at least 1 token")
    if kind == "uniform" and lengths.values[0] > lengths.values[1]:
        raise ValueError("uniform needs the lower length first")
    return lengths


def prefix_text(maker: TextMaker, tokens: int, fit: Fit) -> str:
    """The text of the system message of so many tokens that all requests of a run share."""
    return maker.text("prefix", round(tokens / fit.slope))


def build_prompt(
    prompt: Optional[Prompt], target: Optional[int], prefix: str, fit: Fit, maker: TextMaker, name: str,
    block_tokens: int = 0,
) -> Prompt:  # fmt: skip
    """The prompt as it is sent: one that has messages keeps them; else its text is built to `target` tokens.

    prompt: of a workload, or None. target: the request's tokens without the prefix; a trace's prompt brings its own.
    prefix: the shared text, which goes to the head as system message. name: what tells this request from all others.
    `input_tokens` of what comes back is what the endpoint should count, the prefix included.
    """
    made = Prompt(name, []) if prompt is None else prompt
    if made.messages:
        return made.saying(prefixed(prefix, made.messages))
    tokens = made.input_tokens if target is None else target
    if tokens is None:
        raise ValueError("a text needs a length")
    messages = [user_message(build_text(made, fit.chars_for(tokens), fit, maker, name, block_tokens))]
    tokens += round(fit.slope * len(prefix))
    return dataclasses.replace(made, messages=prefixed(prefix, messages), input_tokens=tokens)


def build_text(prompt: Prompt, chars: int, fit: Fit, maker: TextMaker, name: str, block_tokens: int) -> str:
    """A text of so many characters, made of the prompt's blocks as far as they reach."""
    if not prompt.blocks or not block_tokens:
        return maker.text(name, chars)
    size = max(SHORTEST_TEXT + 1, round(block_tokens / fit.slope))
    blocks = prompt.blocks[: -(-chars // size)]
    text = "".join([maker.text("block/%s" % block, size - 1) + " " for block in blocks])
    rest = chars - len(text)
    return text + maker.text(name, rest)[:rest] if rest > 0 else text[:chars]


def prefixed(prefix: str, messages: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The messages with the shared text at the head of their system message (templates take but one), or as one."""
    if not prefix:
        return messages
    if not messages or messages[0].get("role") != "system":
        return [{"role": "system", "content": prefix}, *messages]
    content = messages[0].get("content")
    if isinstance(content, list):
        content = [{"type": "text", "text": prefix}] + content
    else:
        content = prefix + "\n\n" + (content or "")
    return [{**messages[0], "content": content}, *messages[1:]]


class Shape(NamedTuple):
    """How a run's prompts get their lengths: what a few probes told of the endpoint, and what is wanted of it."""

    fit: Fit
    lengths: Optional[Lengths]  # None: the prompts bring text or lengths of their own
    prefix_tokens: int
    block_tokens: int
    seed: int


class Shaper:
    """Makes prompts to a Shape; a process has one of its own, which draws the same texts as every other."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._maker = TextMaker(shape.seed)
        self._prefix = prefix_text(self._maker, shape.prefix_tokens, shape.fit) if shape.prefix_tokens else ""

    def prompt(self, prompt: Prompt, length: int, name: str, number: int) -> Prompt:
        """The prompt of the conversation `number`; `name` tells its text from every other of the run."""
        shape = self._shape
        if shape.lengths is None:
            return build_prompt(prompt, None, self._prefix, shape.fit, self._maker, name, shape.block_tokens)
        target = shape.lengths.draw(shape.seed, length, number)
        return build_prompt(None, target, self._prefix, shape.fit, self._maker, name)


def target_bounds(config: Config, workload: Workload) -> Tuple[int, int]:
    """The shortest and the longest prompt, in tokens, that a run will make."""
    if config.input_tokens:
        return parse_lengths(config.input_tokens).bounds
    targets = [prompt.input_tokens for prompt in workload.prompts if prompt.input_tokens]
    return min(targets, default=config.prefix_tokens), max(targets, default=config.prefix_tokens)


def makes_text(config: Config, workload: Workload) -> bool:
    """Whether a run makes text to a length, for which it has to know how the endpoint counts."""
    return bool(config.input_tokens or config.prefix_tokens or workload.trace)


def make_unique(prompt: Prompt, request_id: str) -> Prompt:
    """The prompt with a short prefix, different for each request id, at the head of its first user message."""
    prefix = "[%s] " % hashlib.sha256(request_id.encode("utf-8")).hexdigest()[:8]
    messages = list(prompt.messages)
    for position, message in enumerate(messages):
        if message.get("role") == "user":
            content = message.get("content")
            headed = (
                [{"type": "text", "text": prefix}] + content if isinstance(content, list) else prefix + (content or "")
            )
            messages[position] = {**message, "content": headed}
            break
    return prompt.saying(messages)


# ==================================================================================================
# 9. Statistics: records to a summary, pure
# ==================================================================================================
#
# `Collector` takes the lines of results.jsonl one by one and keeps measured requests in columns, one
# `Rows` a stage: arrays of doubles of equal length, NaN where a value is not known, so that a million
# requests fit in memory. `summarize` makes summary.json of them; the report draws from the same rows.
# A list of a million floats is four times its array: at most a few columns are lists at any moment.
# Nothing here reads a clock or a file, and nothing prints.
#
# Percentiles are `statistics.quantiles(method="inclusive")`: linear interpolation between the two
# nearest samples, the definition that numpy and Excel share. They are never averaged over parts or
# stages. Inter-chunk gaps come as merged histograms (at most 1 % off); everything else is exact.

COLUMNS = (
    "scheduled_ms", "start_ms", "end_ms", "queue_ms", "capped_ms", "connect_ms", "ttfb_ms", "ttfe_ms", "ttft_ms",
    "ttft_slack_ms", "latency_ms", "ttft_from_scheduled_ms", "latency_from_scheduled_ms", "decode_ms", "tpot_ms",
    "chunks", "in_tokens", "in_tokens_target", "cached_tokens", "reasoning_tokens", "out_tokens", "out_tokens_target",
    "out_chars", "rtt_ms", "retransmits", "out_of_order", "reused",
)  # fmt: skip
DISTRIBUTIONS = (
    "ttft_ms", "ttfe_ms", "latency_ms", "ttft_from_scheduled_ms", "latency_from_scheduled_ms", "decode_ms", "tpot_ms",
    "queue_ms", "connect_ms", "ttfb_ms",
)  # fmt: skip
PERCENTILES = (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99))
NAN = float("nan")


def quantiles_inclusive(values: Sequence[float], n: int) -> List[float]:
    """`statistics.quantiles(values, n=n, method="inclusive")`, which Python 3.7 does not have yet."""
    import statistics

    if hasattr(statistics, "quantiles"):
        return statistics.quantiles(values, n=n, method="inclusive")
    ordered = sorted(values)
    last = len(ordered) - 1
    cuts = []
    for i in range(1, n):
        below, rest = divmod(i * last, n)
        cuts.append((ordered[below] * (n - rest) + ordered[min(below + 1, last)] * rest) / n)
    return cuts


def limited_names(n: int) -> List[str]:
    """The percentiles that n samples are too few for: fewer than ten lie beyond them."""
    return [name for name, percent in PERCENTILES if n * (100 - percent) < 1000]


def percentiles(values: Sequence[float]) -> Dict[str, float]:
    """P50, P90, P95 and P99; one value is every percentile of itself."""
    if len(values) == 1:
        return {name: values[0] for name, _ in PERCENTILES}
    cuts = quantiles_inclusive(values, 100)
    return {name: cuts[percent - 1] for name, percent in PERCENTILES}


def describe(values: Sequence[float]) -> Optional[Dict[str, Any]]:
    """`{n, mean, stdev, min, p50, p90, p95, p99, max, limited}` of samples; None when there are none."""
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n  # exact in any order; in the values' own, memory is read as it lies
    squares = map(pow, map(mean.__rsub__, values), itertools.repeat(2))
    spread = math.sqrt(math.fsum(squares) / (n - 1)) if n > 1 else 0.0
    ordered = sorted(values)
    figures: Dict[str, Any] = {"n": n, "mean": mean, "stdev": spread, "min": ordered[0]}
    figures.update(percentiles(ordered))
    figures["max"] = ordered[-1]
    return rounded({**figures, "limited": limited_names(n)})


def rounded(figures: Dict[str, Any]) -> Dict[str, Any]:
    """The figures with floats cut to 4 decimals: 0.1 µs, or one in ten thousand; a share of 1 keeps 8."""
    return {
        key: round(value, 8 if key.endswith("_share") else 4) if isinstance(value, float) else value
        for key, value in figures.items()
    }


def describe_histogram(
    buckets: Mapping[int, int], total_ms: float, low: float, high: float
) -> Optional[Dict[str, Any]]:
    """The same figures of a log-scaled histogram: mean, min and max exact, the others at most 1 % off."""
    n = sum(buckets.values())
    if not n:
        return None
    ordered = sorted(buckets.items())
    mean = total_ms / n
    middle = math.fsum(count * bucket_ms(bucket) for bucket, count in ordered) / n  # gaps all alike have no spread
    square = math.fsum(count * (bucket_ms(bucket) - middle) ** 2 for bucket, count in ordered)
    figures: Dict[str, Any] = {"n": n, "mean": mean, "stdev": math.sqrt(square / (n - 1)) if n > 1 else 0.0, "min": low}
    for name, percent in PERCENTILES:
        figures[name] = min(high, max(low, histogram_quantile(ordered, n, percent / 100.0)))
    figures["max"] = high
    return rounded({**figures, "limited": limited_names(n)})


def histogram_quantile(ordered: Sequence[Tuple[int, int]], n: int, share: float) -> float:
    """The value in ms at rank (n - 1) x share of sorted `(bucket, count)` pairs, interpolated like a sample's."""
    rank = (n - 1) * share
    below, seen, low = math.floor(rank), 0, None
    for bucket, count in ordered:
        seen += count
        if low is None and seen > below:
            low = bucket_ms(bucket)
        if low is not None and seen > min(below + 1, n - 1):
            return low + (bucket_ms(bucket) - low) * (rank - below)
    return low or 0.0


RECORDED = tuple(name for name in COLUMNS if name != "end_ms")  # what a column takes from a record as it stands
UNKNOWN = itertools.repeat(NAN)
WAITING = 512 * len(RECORDED)  # values, 100 kB of them: they stay in the processor's cache
NOTHING = array.array("d", [NAN])


SLOWEST = 10  # requests that the report shows one by one
NAMED = ("request_id", "prompt_id", "turn", "finish_reason")  # what it says of them beside their figures


class Rows:
    """The measured requests of one stage in columns of equal length, in the file's order; NaN is not known."""

    def __init__(self, stage: int, load: Dict[str, float]) -> None:
        self.stage = stage
        self.load = load
        self.status: List[str] = []
        self._columns: Dict[str, array.array] = {"end_ms": array.array("d")}  # and those of which a value is known
        self._unknown = array.array("d")  # what each of the others holds
        self._settled = 0  # rows that are in their columns
        self._answered = bytearray()  # 1 for each successful request, 0 for another
        self._waiting = array.array("d")  # the last records one after the other, not yet in their columns
        self._gaps: Dict[str, int] = {}  # how many lie in each bucket, the bucket as a record's JSON names it
        self._gap_sums = array.array("d")  # of each answer that has gaps, in ms
        self.itl_min_ms, self.itl_max_ms = math.inf, 0.0
        self.errors: Dict[Tuple[str, str], Dict[str, Any]] = {}
        self._verbatim: Set[Tuple[str, str]] = set()  # those whose sample is what the endpoint sent
        self.warmup = 0
        self.compressed = self.not_streamed = self.buffered = self.no_finish = 0
        self.clocks: Set[str] = set()
        self._texts = array.array("L")  # CRC-32 of each answer long enough to tell one from another
        self._slow: List[Tuple[float, int, Dict[str, Any]]] = []  # a heap; the least slow of the ten is its first
        self._slow_from = 0.0  # a request that took no longer than this is not among them

    def __len__(self) -> int:
        return len(self.status)

    def add(self, record: Mapping[str, Any], end_ms: Optional[float]) -> None:
        """One measured record; `end_ms` is when it was over, from the run's zero."""
        status = sys.intern(record["status"])
        self._add_values(record)
        self._columns["end_ms"].append(NAN if end_ms is None else end_ms)
        self.status.append(status)
        self._answered.append(status == "ok")
        if "clock" in record:
            self.clocks.add(record["clock"])
        if status == "ok":
            self._add_gaps(record)
            self._add_traits(record)
            if record.get("latency_from_scheduled_ms", 0.0) > self._slow_from:
                self._add_slow(record)
        else:
            self._add_error(status, record)

    def _add_slow(self, record: Mapping[str, Any]) -> None:
        """One that is among the slowest so far: its row, and what no column holds."""
        names = {key: record[key] for key in NAMED if key in record}
        self._keep_slow((record["latency_from_scheduled_ms"], 1 - len(self), names))  # of equals the first is slower

    def _keep_slow(self, entry: Tuple[float, int, Dict[str, Any]]) -> None:
        (heapq.heappush if len(self._slow) < SLOWEST else heapq.heapreplace)(self._slow, entry)
        if len(self._slow) == SLOWEST:
            self._slow_from = self._slow[0][0]

    @property
    def slowest(self) -> List[Tuple[int, Dict[str, Any]]]:
        """The successful requests that took longest from when they were due, slowest first: their row, their names."""
        return [(-place, names) for _, place, names in sorted(self._slow, key=lambda entry: entry[:2], reverse=True)]

    def _add_values(self, record: Mapping[str, Any]) -> None:
        """The recorded values, at first row by row: one call for a record, not one for each of its values."""
        waiting = self._waiting
        held = len(waiting)
        try:
            waiting.extend(map(record.get, RECORDED, UNKNOWN))
        except TypeError:  # a null, or a text, which the columns refuse once more
            del waiting[held:]
            waiting.extend([NAN if value is None else value for value in map(record.get, RECORDED)])
        if held >= WAITING:
            self._settle()

    def _settle(self) -> None:
        """Moves what waits into its columns; one of which nothing is known yet takes no memory."""
        number = len(self._waiting) // len(RECORDED)
        for place, name in enumerate(RECORDED):
            values = self._waiting[place :: len(RECORDED)]
            if name in self._columns:
                self._columns[name].extend(values)
            elif any(value == value for value in values):
                self._columns[name] = NOTHING * self._settled + values
        self._settled += number
        del self._waiting[:]

    @property
    def columns(self) -> Dict[str, array.array]:
        """The columns by name, to be read only: those of which nothing is known are one and the same."""
        if self._waiting:
            self._settle()
        if len(self._unknown) != len(self):
            self._unknown = NOTHING * len(self)
        return {name: self._columns.get(name, self._unknown) for name in COLUMNS}

    @property
    def itl_sum_ms(self) -> float:
        """All inter-chunk gaps of the successful requests together."""
        return math.fsum(self._gap_sums)

    @property
    def itl_hist(self) -> Dict[int, int]:
        """The inter-chunk gaps of the successful requests, one histogram."""
        merged: Dict[int, int] = collections.defaultdict(int)
        for bucket, count in self._gaps.items():
            merged[int(bucket)] += count
        return dict(merged)

    def successful(self, name: str) -> List[float]:
        """The known values of a column over successful requests."""
        values = list(itertools.compress(self.columns[name], self._answered))
        total = sum(values)  # not known as soon as one of them is not
        return values if total == total else [value for value in values if value == value]

    def known(self, name: str) -> array.array:
        """The rows of successful requests of which a column's value is known."""
        answered = zip(self._answered, self.columns[name])
        return array.array("L", (row for row, (ok, value) in enumerate(answered) if ok and value == value))

    def total(self, name: str) -> int:
        """The sum of a count column over successful requests."""
        return int(sum(self.successful(name)))

    def count(self, *statuses: str) -> int:
        """How many requests ended with one of these statuses."""
        return sum(self.status.count(status) for status in statuses)

    def _add_gaps(self, record: Mapping[str, Any]) -> None:
        gaps, counts = self._gaps, record.get("itl_hist") or {}
        if counts and (type(sum(counts.values())) is not int or min(counts.values()) < 0):
            raise ValueError("no count of gaps")
        for bucket, count in counts.items():
            try:
                gaps[bucket] += count
            except KeyError:
                int(bucket)  # what is no number is refused here, where its line is known
                gaps[bucket] = 0 + count
        if "itl_sum_ms" in record:
            if not -FAR < record["itl_sum_ms"] < FAR:
                raise ValueError("no time of a run")
            self._gap_sums.append(record["itl_sum_ms"])
            self.itl_min_ms = min(self.itl_min_ms, record["itl_min_ms"])
            self.itl_max_ms = max(self.itl_max_ms, record["itl_max_ms"])

    def _add_traits(self, record: Mapping[str, Any]) -> None:
        """What an answer says of the endpoint, or of a gateway before it."""
        self.compressed += "compressed" in record
        self.not_streamed += record.get("streamed") is False
        self.buffered += is_buffered(record)
        self.no_finish += "finish_reason" not in record
        if record.get("out_chars", 0) >= 20 and "out_crc32" in record:
            self._texts.append(int(record["out_crc32"], 16))

    def repeated(self) -> int:
        """Answers that are, to the byte, an answer that another request got."""
        return len(self._texts) - len(set(self._texts))

    def _add_error(self, status: str, record: Mapping[str, Any]) -> None:
        err = record.get("err") or STATUSES.get(status, status)
        cause = (status, error_key(err))
        known = self.errors.setdefault(cause, {"status": status, "key": cause[1], "count": 0, "sample": err})
        known["count"] += 1
        if "error_raw" in record:
            known["sample"] = record["error_raw"]
            self._verbatim.add(cause)
        first = record.get("start_ms", record.get("scheduled_ms"))
        if first is not None:
            known["first_ms"] = min(first, known.get("first_ms", first))

    def take_columns(self) -> Dict[str, array.array]:
        """The columns of which a value is known; from now on they are the caller's and no longer here."""
        if self._waiting:
            self._settle()
        columns, self._columns = self._columns, {}
        return columns

    def extend(self, other: "Rows", columns: Iterable[Tuple[str, array.array]]) -> None:
        """The rows of this stage that come next in the file; `columns` are what `take_columns` gave of them.

        Afterwards all is as if their records had been added one by one.
        """
        if self._waiting:
            self._settle()
        for latency, place, names in sorted(other._slow, key=lambda entry: entry[:2], reverse=True):
            if latency > self._slow_from:
                self._keep_slow((latency, place - len(self), names))
        for name, column in columns:
            self._columns.setdefault(name, NOTHING * self._settled).extend(column)
        self.status += map(sys.intern, other.status)
        self._settled = len(self)
        for column in self._columns.values():
            column.extend(NOTHING * (len(self) - len(column)))
        self._answered += other._answered
        self._texts += other._texts
        self._gap_sums += other._gap_sums
        self.itl_min_ms = min(self.itl_min_ms, other.itl_min_ms)
        self.itl_max_ms = max(self.itl_max_ms, other.itl_max_ms)
        for bucket, count in other._gaps.items():
            self._gaps[bucket] = self._gaps.get(bucket, 0) + count
        for name in ("warmup", "compressed", "not_streamed", "buffered", "no_finish"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.clocks |= other.clocks
        self._extend_errors(other)

    def _extend_errors(self, other: "Rows") -> None:
        for cause, error in other.errors.items():
            known = self.errors.get(cause)
            if known is None:
                self.errors[cause] = error
                continue
            known["count"] += error["count"]
            if cause in other._verbatim:
                known["sample"] = error["sample"]
            firsts = [entry["first_ms"] for entry in (error, known) if "first_ms" in entry]
            if firsts:
                known["first_ms"] = min(firsts)
        self._verbatim |= other._verbatim


BURST_BUCKET = log_bucket(0.001)


def is_buffered(record: Mapping[str, Any]) -> bool:
    """Whether an answer was held back and came in a burst: nine tenths of its gaps below 1 ms, in 5 % of its time.

    What this client itself read late, by a fifth of the answer's time, looks like a burst as well, and is none.
    """
    latency = record.get("latency_ms", 0.0)
    if not record.get("itl_sum_ms", math.inf) < 0.05 * latency or (record.get("lag_ms") or 0.0) > 0.2 * latency:
        return False  # so it is of most answers
    gaps = record.get("itl_hist") or {}
    count = sum(gaps.values())
    return count >= 8 and sum(number for bucket, number in gaps.items() if int(bucket) <= BURST_BUCKET) >= 0.9 * count


def error_key(err: str) -> str:
    """The cause of a failure without what differs from one to the next: numbers of two digits and more, ids.

    >>> error_key("HTTP 500: upstream timed out (request id: 2026112404390012)")
    'HTTP 500: upstream timed out (request id: #)'
    """
    head, tail = err[:8], err[8:]  # "HTTP 500" stays readable
    tail = re.sub(r"(?a)\b(?=[0-9a-fA-F-]*[0-9])[0-9a-fA-F-]{8,}\b|\b(?=\w*[0-9])\w{14,}\b|[0-9]{2,}", "#", tail)
    return (head + tail)[:200]


def timestamp(text: str) -> float:
    """Seconds since 1970 of an ISO 8601 UTC time as records hold it."""
    form = "%Y-%m-%dT%H:%M:%S.%fZ" if "." in text else "%Y-%m-%dT%H:%M:%SZ"
    return datetime.datetime.strptime(text, form).replace(tzinfo=datetime.timezone.utc).timestamp()


# A line of results.jsonl that somebody edited, or that is another program's, is refused where it is read: what the
# known keys of a header, plan or audit hold has one of these forms. Keys that are not known are nobody's business.
FAR = 1e15  # nothing in a run is as large


def is_number(value: Any) -> bool:
    """A number as a measurement has it: finite, and not true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -FAR < value < FAR


def is_whole(value: Any) -> bool:
    """A number of things."""
    return isinstance(value, int) and is_number(value)


def is_text(value: Any) -> bool:
    """A text."""
    return isinstance(value, str)


def each(holds: Callable[[Any], bool], kind: type) -> Callable[[Any], bool]:
    """A list, or an object, whose values have a form."""

    def check(value: Any) -> bool:
        return isinstance(value, kind) and all(map(holds, value.values() if isinstance(value, dict) else value))

    return check


def is_object(value: Any) -> bool:
    """A JSON object."""
    return isinstance(value, dict)


def is_histogram(value: Any) -> bool:
    """A log-scaled histogram, its buckets as JSON names them."""
    return each(is_whole, dict)(value) and all(re.match(r"^[0-9]{1,6}$", str(bucket)) for bucket in value)


PLAN_FORMS: Dict[str, Callable[[Any], bool]] = {
    "index": is_whole, "load": each(is_number, dict), "total": is_whole, "duration": is_number, "warmup": is_whole,
}  # fmt: skip
AUDIT_FORMS: Dict[str, Callable[[Any], bool]] = {
    "stage": is_whole, "part": is_whole, "shard": is_text, "wall_ms": is_number, "cpu_percent": is_number,
    "loop_delay_max_ms": is_number, "due": is_whole, "started": is_whole, "dropped": is_whole,
    "date_offset_ms": each(is_number, list), "lag_hist": is_histogram, "network": each(is_text, dict),
}  # fmt: skip
# Of the configuration by the type of Config's field, as it is written there.
CONFIG_FORMS: Dict[str, Callable[[Any], bool]] = {
    "str": is_text, "Optional[str]": is_text, "int": is_whole, "Optional[int]": is_whole, "float": is_number,
    "Optional[float]": is_number, "List[int]": each(is_number, list), "List[float]": each(is_number, list),
    "List[str]": each(is_text, list), "Dict[str, Any]": is_object, "Dict[str, str]": is_object,
}  # fmt: skip
END_FORMS: Dict[str, Callable[[Any], bool]] = {
    "reason": is_text, "dialect": each(is_text, list), "lost_workers": is_whole,
}  # fmt: skip


def is_selftest(value: Any) -> bool:
    """What a selftest found, as far as a run quotes it: `{"errors": [{"streams": N, "first_ms": {"p99": ms}}, …]}`."""
    with contextlib.suppress(LookupError, TypeError):
        levels = [(level["streams"], level["first_ms"]["p99"]) for level in value["errors"]]
        return bool(levels) and all(1 <= streams < FAR and abs(p99) < FAR for streams, p99 in levels)
    return False


HEADER_FORMS: Dict[str, Callable[[Any], bool]] = {"config": is_object, "merged": is_object, "selftest": is_selftest}


def check_forms(told: Mapping[str, Any], forms: Mapping[str, Callable[[Any], bool]]) -> None:
    """Raises TypeError where a known key holds what it can't hold."""
    for key, holds in forms.items():
        if key in told and not holds(told[key]):
            raise TypeError(key)


def check_header(run: Mapping[str, Any]) -> None:
    """Raises TypeError where a header is none that a run writes."""
    check_forms(run, HEADER_FORMS)
    kinds = ((field.name, CONFIG_FORMS.get(str(field.type))) for field in dataclasses.fields(Config))
    check_forms(run.get("config", {}), {"prompts": is_object, **{name: kind for name, kind in kinds if kind}})
    check_forms(run.get("config", {}).get("prompts", {}), {"count": is_whole})


class Collector:
    """Takes the parsed lines of results.jsonl in any order of parts; afterwards holds everything a summary needs."""

    def __init__(self) -> None:
        self.header: Dict[str, Any] = {}
        self.stages: Dict[int, Rows] = {}
        self.plans: Dict[int, Dict[str, Any]] = {}
        self.audits: List[Dict[str, Any]] = []
        self.end: Optional[Dict[str, Any]] = None
        self.samples: Dict[str, str] = {}

    def add(self, line: Mapping[str, Any]) -> None:
        """One line of the file: header, the plan of a stage, record, audit or end."""
        if "run" in line:
            check_header(line["run"])
            self.header = dict(line["run"])
        elif "audit" in line:
            check_forms({"stage": None, **line["audit"]}, AUDIT_FORMS)
            self.audits.append(dict(line["audit"]))
        elif "end" in line:
            check_forms(line["end"], END_FORMS)
            self.end = dict(line["end"])
        elif "request_id" in line:
            self._add_record(line)
        elif "stage" in line:
            self._add_plan(dict(line["stage"]))

    def _add_plan(self, plan: Dict[str, Any]) -> None:
        """What a stage was to be; in merged files it comes once a host, and after other hosts' records."""
        check_forms({"index": None, "load": None, **plan}, PLAN_FORMS)
        self.plans[plan["index"]] = plan
        if plan["index"] in self.stages:
            self.stages[plan["index"]].load = self._load(plan["index"])

    def pieces(self) -> Iterator[Any]:
        """All that it holds, in pieces of a few MB for another collector's `extend`; afterwards it has no rows."""
        stages, self.stages = self.stages, {}
        yield self, len(stages)
        while stages:
            rows = stages.pop(min(stages))
            columns = rows.take_columns()
            yield rows, list(columns)
            while columns:
                yield columns.pop(next(iter(columns)))

    def extend(self, pieces: Iterator[Any]) -> None:
        """What comes next in the file, as another collector's `pieces` give it."""
        other, stages = next(pieces)
        self.header = other.header or self.header
        for plan in other.plans.values():
            self._add_plan(plan)
        for _ in range(stages):
            rows, names = next(pieces)
            self._rows(rows.stage).extend(rows, ((name, next(pieces)) for name in names))
        self.audits += other.audits
        self.end = self.end if other.end is None else other.end
        for name, sample in other.samples.items():
            self.samples.setdefault(name, sample)

    def _rows(self, stage: int) -> Rows:
        rows = self.stages.get(stage)
        if rows is None:
            rows = self.stages[stage] = Rows(stage, self._load(stage))
        return rows

    def _add_record(self, record: Mapping[str, Any]) -> None:
        rows = self._rows(record["stage"])
        if record["phase"] != "measure":
            rows.warmup += record["phase"] == "warmup"
            return
        rows.add(record, self._end_ms(record))
        for name in ("first_content_raw", "final_frame_raw"):
            if name in record:
                self.samples.setdefault(name, record[name])

    def rows(self) -> List[Rows]:
        """The stages in order; one without requests when the run was over before any."""
        return [self.stages[index] for index in sorted(self.stages)] or [Rows(0, self._load(0))]

    def _load(self, stage: int) -> Dict[str, float]:
        """The load of a stage: its plan's; files without plans give it in the configuration."""
        if stage in self.plans:
            return dict(self.plans[stage]["load"])
        loads = self.header.get("config", {}).get("concurrency") or [1]
        return {"concurrency": loads[stage] if stage < len(loads) else loads[-1]}

    @staticmethod
    def _end_ms(record: Mapping[str, Any]) -> Optional[float]:
        start = record.get("start_ms")
        if start is None:
            return record.get("scheduled_ms")
        if "latency_ms" in record:
            end = start + record["latency_ms"]
            if not -FAR < end < FAR:
                raise ValueError("no time of a run")
            return end
        if "end_ts" in record and "start_ts" in record:
            return start + (timestamp(record["end_ts"]) - timestamp(record["start_ts"])) * 1000.0
        return start


OPEN_LOOP_NEED = 20  # requests that must end in an open loop's steady window; a closed loop needs two a stream


def is_open(load: Mapping[str, float]) -> bool:
    """Whether requests go out by a schedule, however many are in flight."""
    return "rps" in load


def load_names(loads: Sequence[Mapping[str, float]]) -> List[Dict[str, float]]:
    """What tells each of a run's loads from the others: level, cap and length where they differ, `again` for a repeat.

    >>> load_names([{"concurrency": 8}, {"concurrency": 16}, {"concurrency": 16}])[1:]
    [{'concurrency': 16}, {'concurrency': 16, 'again': 2}]
    """
    varied = [key for key in ("cap", "input_tokens") if len({load.get(key) for load in loads}) > 1]
    names, seen = [], collections.Counter()  # type: Tuple[List[Dict[str, float]], collections.Counter]
    for load in loads:
        level = "rps" if is_open(load) else "concurrency"
        name = {level: load.get(level, 1)}
        name.update({key: load[key] for key in ("trace", *varied) if key in load})
        key = tuple(name.items())
        seen[key] += 1
        names.append({**name, "again": seen[key]} if seen[key] > 1 else name)
    return names


def own_waits(rows: Rows) -> Iterator[Tuple[float, float]]:
    """Of each request that was sent: when it was due, and how long it waited by this client's own fault, in ms.

    The wait for a free slot under a cap is what the user asked for; it is no fault of the client's.
    """
    columns = rows.columns
    for due, wait, capped in zip(columns["scheduled_ms"], columns["queue_ms"], columns["capped_ms"]):
        if wait == wait and due == due:
            yield due, wait - capped if capped == capped else wait


def rates_of(rows: Rows) -> Dict[str, float]:
    """An open loop's requested and achieved rate, in requests/s: of the dues there were, and of the starts.

    The latest hundredth of the starts is left out, so that one straggler at the end does not make a slow loop; a
    request that was dropped never started.
    """
    if not is_open(rows.load):
        return {}
    dues = sorted(due for due in rows.columns["scheduled_ms"] if due == due)
    kept = len(dues) - max(1, len(dues) // 100)
    starts = sorted(start for start in rows.columns["start_ms"] if start == start)[:kept]
    if kept < 2 or dues[kept - 1] <= dues[0] or not starts:
        return {}
    requested = 1000.0 * (len(dues) - 1) / (dues[-1] - dues[0])
    planned, took = dues[kept - 1] - dues[0], max(starts[-1], dues[kept - 1]) - dues[0]
    achieved = requested * (len(starts) - 1) / (kept - 1) * planned / took
    return {"requested_rps": round(requested, 4), "achieved_rps": round(achieved, 4)}


def sorted_spans(rows: Rows) -> Tuple[array.array, array.array]:
    """When the requests that were sent started, and when they ended, in ms, each in order."""
    starts = array.array("d", sorted(start for start in rows.columns["start_ms"] if start == start))
    spans = zip(rows.columns["start_ms"], rows.columns["end_ms"])
    return starts, array.array("d", sorted(end for start, end in spans if start == start))


def ordered_places(
    values: Sequence[float], places: Sequence[int], ties: Optional[Sequence[float]] = None
) -> array.array:
    """These places of a column by their value, and where that is the same by another column or as they come.

    They are sorted in some twenty parts, one after the other: sorting a million at once takes 80 MB.
    """
    key = values.__getitem__ if ties is None else lambda place: (values[place], ties[place])
    bounds = sorted(values[place] for place in evenly(places, 20))
    parts = [array.array("L") for _ in range(len(bounds) + 1)]
    for place in places:
        parts[bisect.bisect_right(bounds, values[place])].append(place)
    return array.array("L", itertools.chain.from_iterable(sorted(part, key=key) for part in parts))


def evenly(items: Sequence[int], most: int) -> Sequence[int]:
    """At most so many of the items, at equal distances in their order."""
    return items if len(items) <= most else [items[index * len(items) // most] for index in range(most)]


def streams_in(rows: Rows) -> int:
    """The streams of a stage: its concurrency, or the most that an open loop had in flight."""
    if not is_open(rows.load):
        return int(rows.load["concurrency"])
    starts, ends = sorted_spans(rows)
    ended, most = 0, 1
    for started, moment in enumerate(starts, 1):
        while ended < started and ends[ended] <= moment:
            ended += 1
        most = max(most, started - ended)
    return most


def wall_ms(rows: Rows) -> float:
    """First measured start to last measured end of a stage, in ms."""
    first = min((start for start in rows.columns["start_ms"] if start == start), default=0.0)
    spans = zip(rows.columns["start_ms"], rows.columns["end_ms"])
    return max((end for start, end in spans if start == start), default=first) - first


def steady_window(rows: Rows) -> Optional[Tuple[float, float]]:
    """From the first moment at which all streams are in flight to the last start, in ms; None when never full.

    An open loop is never full: there the window begins when the request that started first has ended.
    """
    if is_open(rows.load):
        spans = zip(rows.columns["start_ms"], rows.columns["end_ms"])
        begin = min((span for span in spans if span[0] == span[0]), default=(0.0, 0.0))[1]
        end = max((start for start in rows.columns["start_ms"] if start == start), default=0.0)
        return (begin, end) if begin < end else None
    starts, ends = sorted_spans(rows)
    ended, streams = 0, rows.load.get("concurrency", 1)
    for started, moment in enumerate(starts, 1):
        while ended < started and ends[ended] <= moment:  # a stream ends a request before it starts its next
            ended += 1
        if started - ended >= streams:
            return moment, starts[-1]
    return None


def steady_throughput(rows: Rows) -> Tuple[Optional[float], str]:
    """Output tokens/s in the steady window; None with the reason where it can't be said."""
    window = steady_window(rows)
    if window is None and is_open(rows.load):
        return None, "no request started after the first one had ended"
    if window is None:
        return None, "the streams were never all in flight at once"
    low, high = window
    columns = rows.columns
    tokens, ended, unknown = 0.0, 0, 0
    for status, start, latency, first, out in zip(
        rows.status, columns["start_ms"], columns["latency_ms"], columns["ttfe_ms"], columns["out_tokens"]
    ):
        if status != "ok":
            continue
        begin, end = start + first, start + latency
        ended += low <= end <= high
        if out == out and begin == begin:
            tokens += out * share_within(begin, end, low, high)
        else:
            unknown += end >= low and start <= high
    need = OPEN_LOOP_NEED if is_open(rows.load) else 2 * rows.load.get("concurrency", 1)
    if ended < need:
        where = "in the steady window" if is_open(rows.load) else "while all streams were busy"
        return None, "only %d requests ended %s; %d are needed" % (ended, where, need)
    if unknown:
        return None, "%d requests of the steady window gave no token counts or no first output" % unknown
    return (tokens / (high - low) * 1000.0, "") if high > low else (None, "the steady window is empty")


def share_within(begin: float, end: float, low: float, high: float) -> float:
    """The part of [begin, end] that lies in [low, high]; of a moment: whether it does."""
    if end <= begin:
        return float(low <= end <= high)
    return max(0.0, min(end, high) - max(begin, low)) / (end - begin)


def count_requests(rows: Sequence[Rows]) -> Dict[str, Any]:
    """The `requests` block of summary.json over these stages."""
    total = sum(len(stage) for stage in rows)
    success = sum(stage.count("ok") for stage in rows)
    cancelled = sum(stage.count("cancelled") for stage in rows)
    dropped = sum(stage.count("dropped") for stage in rows)
    failure = total - success - cancelled - dropped
    block = {"total": total, "success": success, "failure": failure, "cancelled": cancelled, "dropped": dropped}
    if success + failure:
        block["success_rate"] = round(success / (success + failure), 8)
    block["warmup"] = sum(stage.warmup for stage in rows)
    return block


def count_tokens(rows: Sequence[Rows], mode: str) -> Dict[str, Any]:
    """The `tokens` block: sums over successful requests; `missing` says how many came without usage."""
    block: Dict[str, Any] = {"mode": mode}
    for key, name in (
        ("in", "in_tokens"),
        ("out", "out_tokens"),
        ("cached", "cached_tokens"),
        ("reasoning", "reasoning_tokens"),
    ):
        values = [value for stage in rows for value in stage.successful(name)]
        if values and mode == "usage":
            block[key] = int(sum(values))
    if mode == "usage":
        block["missing"] = sum(stage.count("ok") - len(stage.successful("out_tokens")) for stage in rows)
    return block


def count_lengths(rows: Rows) -> Optional[Dict[str, Any]]:
    """The `lengths` block: mean lengths asked for and got, over successful requests that had a target; None without."""
    columns, block, asked = rows.columns, {}, set()  # type: Tuple[Dict[str, array.array], Dict[str, Any], Set[int]]
    for side in ("in", "out"):
        pairs = zip(rows.status, columns[side + "_tokens_target"], columns[side + "_tokens"])
        found = [(number, target, actual) for number, (status, target, actual) in enumerate(pairs)
                 if status == "ok" and target == target and actual == actual]  # fmt: skip
        if found:
            asked.update(number for number, _, _ in found)
            block[side + "_target"] = math.fsum(target for _, target, _ in found) / len(found)
            block[side + "_actual"] = math.fsum(actual for _, _, actual in found) / len(found)
        if found and side == "out":
            block["out_short"] = sum(actual < target for _, target, actual in found)
    return rounded({**block, "n": len(asked)}) if block else None


def merge_errors(rows: Sequence[Rows]) -> List[Dict[str, Any]]:
    """The `errors` block: one entry for each status and cause, the commonest first."""
    merged: Dict[Tuple[str, str], Dict[str, Any]] = {}
    for stage in rows:
        for cause, error in stage.errors.items():
            known = merged.get(cause)
            if known is None:
                merged[cause] = dict(error)
                continue
            known["count"] += error["count"]
            if "first_ms" in error:
                known["first_ms"] = min(error["first_ms"], known.get("first_ms", error["first_ms"]))
    return sorted(merged.values(), key=lambda error: (-error["count"], error["status"], error["key"]))


def lag_figures(audits: Sequence[Mapping[str, Any]]) -> Optional[Dict[str, Any]]:
    """How late reads came, over all reads: the audit lines' histograms merged. Mean, min and max are 1 % off too."""
    merged: Dict[int, int] = {}
    for audit in audits:
        for bucket, count in audit.get("lag_hist", {}).items():
            merged[int(bucket)] = merged.get(int(bucket), 0) + count
    if not merged:
        return None
    total = sum(bucket_ms(bucket) * count for bucket, count in merged.items())
    return describe_histogram(merged, total, bucket_ms(min(merged)), bucket_ms(max(merged)))


WAY = ("address", "proxy", "tls_version", "cipher")  # what an audit line may say of the way to the endpoint


def client_block(audits: Sequence[Mapping[str, Any]], rows: Sequence[Rows]) -> Dict[str, Any]:
    """What the client says of itself: clock, lag of its reads, slack of TTFT, CPU of its busiest process."""
    parts = {(audit.get("shard"), audit.get("part", 0)) for audit in audits}  # hosts may number theirs alike
    block: Dict[str, Any] = {"processes": len(parts) or 1}
    hosts = {shard for shard, _ in parts if shard is not None}
    if hosts:
        block["hosts"] = len(hosts)
    clocks = set().union(*(stage.clocks for stage in rows))
    if clocks:
        block["clock"] = "mixed" if len(clocks) > 1 else clocks.pop()
    lag = lag_figures(audits)
    if lag is not None:
        block["lag_ms"] = lag
    slacks = [value for stage in rows for value in stage.successful("ttft_slack_ms")]
    if slacks:
        block["ttft_slack_ms"] = describe(slacks)
    ways = [audit["network"] for audit in audits if "network" in audit]
    if ways:  # parts may have come to different addresses of one name
        values = {key: dict.fromkeys(way[key] for way in ways if key in way) for key in WAY}
        block["network"] = {key: ", ".join(map(str, known)) for key, known in values.items() if known}
    if audits:
        block["cpu_percent"] = max(audit.get("cpu_percent", 0.0) for audit in audits)
        block["loop_delay_max_ms"] = max(audit.get("loop_delay_max_ms", 0.0) for audit in audits)
    return block


# Drift. Did the slow end of a long stage shift for good? Its requests are cut, in the order of their starts, into
# windows of equal size. Each is put by the geometric mean of its slowest fifth, which is steadier than its P95, and
# only by the rank of that among the windows: a heavy tail or one spike moves a rank or two. The best split into
# before and after is a rank-sum test's, its z lessened by how much one window resembles the next, since neighbours
# that do are worth less. A shift counts when it is certain, when P95 moved enough to matter, and when it lasts: each
# third of what came before lies on the one side of the middle, each third of what came after on the other. A bump
# that returns does not.

DRIFT_MS = 60_000.0  # a shorter stage has no time to drift
DRIFT_WINDOWS, DRIFT_WINDOW = 60, 20  # at most so many windows, of at least so many requests
DRIFT_REQUESTS = 1000  # fewer can't tell a shift of two fifths from chance
DRIFT_Z = 4.2  # of the best of all splits: with the other two, none of thousands of simulated steady runs has it
DRIFT_SHARE = 20.0  # % that P95 must have moved
DRIFT_KEPT = 0.5  # the part of the shift by which each third of a side must be on its side


class Shift(NamedTuple):
    """A lasting shift: when it began, the median P95 of the windows before and after, over how many requests."""

    moment: float
    before: float
    after: float
    n: int


def middle_of(values: Sequence[float]) -> float:
    """The median."""
    return percentiles(values)["p50"]


def slow_end(window: Sequence[float]) -> float:
    """The logarithm of the geometric mean of the slowest fifth of sorted values."""
    slowest = window[-max(1, len(window) // 5) :]
    return math.fsum(math.log(max(value, 1e-9)) for value in slowest) / len(slowest)


def ranks_of(values: Sequence[float]) -> List[float]:
    """Ranks from 1 on; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [(bisect.bisect_left(ordered, value) + bisect.bisect_right(ordered, value) + 1) / 2 for value in values]


def best_split(ranks: Sequence[float]) -> Tuple[int, float]:
    """Where before and after differ most, with a fifth of the windows on either side at least, and the test's z."""
    number = len(ranks)
    sums = list(itertools.accumulate(ranks))
    scores = {
        split: (sums[split - 1] - split * (number + 1) / 2) / math.sqrt(split * (number - split) * (number + 1) / 12)
        for split in range(number // 5, number - number // 5 + 1)
    }
    split = max(scores, key=lambda place: abs(scores[place]))
    sides = (ranks[:split], ranks[split:])
    rests = [rank - math.fsum(side) / len(side) for side in sides for rank in side]
    square = math.fsum(rest * rest for rest in rests)
    alike = math.fsum(one * next_one for one, next_one in zip(rests, rests[1:])) / square if square else 0.0
    alike = min(0.9, max(0.0, alike))
    return split, abs(scores[split]) * math.sqrt((1 - alike) / (1 + alike))


def trimmed_mean(values: Sequence[float]) -> float:
    """The mean without the lowest and the highest fifth."""
    ordered, cut = sorted(values), len(values) // 5
    return math.fsum(ordered[cut : len(ordered) - cut]) / (len(ordered) - 2 * cut)


def lasts(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether each third of either side lies on its own side: nowhere in between is most of the shift undone."""
    low, high = trimmed_mean(before), trimmed_mean(after)
    for side, own, other in ((before, low, high), (after, high, low)):
        for part in range(3):
            third = trimmed_mean(side[part * len(side) // 3 : (part + 1) * len(side) // 3])
            if own == other or (third - other) / (own - other) < DRIFT_KEPT:
                return False
    return True


def find_shift(starts: Sequence[float], values: Sequence[float]) -> Optional[Shift]:
    """The lasting shift in values ordered by their starts; None where there is none, or too little to tell."""
    if len(starts) < DRIFT_REQUESTS:
        return None
    number = min(DRIFT_WINDOWS, len(starts) // DRIFT_WINDOW)
    bounds = [index * len(starts) // number for index in range(number + 1)]
    windows = [sorted(values[low:high]) for low, high in zip(bounds, bounds[1:])]
    ends = [slow_end(window) for window in windows]
    split, z = best_split(ranks_of(ends))
    if z < DRIFT_Z or not lasts(ends[:split], ends[split:]):
        return None
    p95s = [percentiles(window)["p95"] for window in windows]
    before, after = middle_of(p95s[:split]), middle_of(p95s[split:])
    if before <= 0 or abs(100.0 * after / before - 100.0) < DRIFT_SHARE:
        return None
    return Shift(starts[bounds[split]], before, after, len(starts))


def span_words(milliseconds: float) -> str:
    """A time span for a sentence: 3 h 10 min, 12 min 30 s, 45 s."""
    seconds = round(milliseconds / 1000.0)
    minutes, hours = seconds // 60, seconds // 3600
    if hours:
        return "%d h %d min" % (hours, minutes % 60)
    return "%d min %d s" % (minutes, seconds % 60) if minutes else "%d s" % seconds


# The verdict. Can the measurement be trusted? INVALID for client causes alone: then the client, not the endpoint, was
# the limit. CAUTION where a figure has to be read with a reservation. A reason is a key with the values of its text;
# its words, with what to do about it, stand in the message files under `reason.KEY`, once in each language.

CPU_LIMIT = 90.0  # % of one CPU: a process above it can't be shown to have kept up
SHORT_RUN_MS = 1000.0  # the CPU share of less says nothing: starting and ending are part of it
LATE_LIMIT = 1.0  # % of starts that came late by our own delay
LENGTH_LIMIT = 2.0  # % that the mean prompt may be off the length asked for
RATE_LIMIT = 2.0  # % that the starts of an open loop may fall short of its schedule's rate
SHARE_LIMIT = 1.0  # % of requests from which on failures, cancellations and odd answers count
CLOCK_LIMIT_MS = 100.0  # how far the clocks of hosts may be apart before the load of a stage is not one load any more
CUT_OFF = "cut off"  # how a shard ended whose file has no end line
EXHAUSTED = ("too many open files", "no free local port")  # causes of a connect_error that are this host's


class Reason(NamedTuple):
    """Why a verdict is not VALID: the state that it forces, the key of its text, the values in it."""

    state: str
    key: str
    values: Dict[str, Any]


def lag_limit_ms(ttft_p50: Optional[float]) -> float:
    """How late the client may have read, at P99: 5 ms, or 5 % of TTFT P50 where that is more."""
    return max(5.0, 0.05 * (ttft_p50 or 0.0))


def judged_percentile(n: int) -> str:
    """The percentile by which the client is judged: P99, or with few samples the highest that five lie beyond."""
    return next((name for name, percent in reversed(PERCENTILES) if n * (100 - percent) >= 500), "")


def part_of(part: float, whole: float) -> float:
    """part / whole in %; 0 of nothing."""
    return 100.0 * part / whole if whole else 0.0


def client_reasons(rows: Rows, stage: Mapping[str, Any]) -> Iterator[Reason]:
    """What makes a stage INVALID: this host could not keep up."""
    client = stage["client"]
    limit = lag_limit_ms((stage.get("ttft_ms") or {}).get("p50"))
    if client.get("cpu_percent", 0.0) > CPU_LIMIT and stage["wall_time_ms"] >= SHORT_RUN_MS:
        more = -(-2 * client["processes"] // client.get("hosts", 1))  # on each host
        yield Reason("INVALID", "cpu", {"cpu": client["cpu_percent"], "limit": CPU_LIMIT, "processes": more})
    for name in ("lag_ms", "ttft_slack_ms"):
        figures = client.get(name) or {}
        which = judged_percentile(figures.get("n", 0))
        if which and figures[which] > limit:
            yield Reason("INVALID", name, {"late": figures[which], "limit": limit, "which": which.upper()})
    late = client.get("late_percent", 0.0)
    if late > LATE_LIMIT and late * len(rows) >= 500:
        yield Reason("INVALID", "late", {"share": late, "limit": limit})
    exhausted = sum(error["count"] for error in rows.errors.values() if any(text in error["key"] for text in EXHAUSTED))
    if exhausted:
        yield Reason("INVALID", "exhausted", {"n": exhausted})


def first_dues(merged: Mapping[str, Any], stage: int) -> Set[float]:
    """When each shard's first request of a stage was due, in ms: hosts do not begin a stage in the same moment."""
    dues = (shard.get("first_due_ms", {}).get(str(stage)) for shard in merged.get("shards", ()))
    return {due for due in dues if due is not None}


def late_percent(rows: Rows, limit: float, firsts: Iterable[float] = ()) -> float:
    """The share of starts (%) that waited in this client for more than `limit` ms; a stage's first wave is not judged.

    In a closed loop the first wave is due in one moment and can only go out one after the other. `firsts`: those
    moments, where there were several hosts.
    """
    first = min((due for due in rows.columns["scheduled_ms"] if due == due), default=0.0)
    late = judged = 0
    for due, wait in own_waits(rows):
        if due > first and due not in firsts:
            judged += 1
            late += wait > limit
    return part_of(late, judged)


def sample_reasons(rows: Rows, stage: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Reason]:
    """What a reader has to bear in mind of a stage's figures."""
    requests = stage["requests"]
    success, failure = requests["success"], requests["failure"]
    failed = part_of(failure, success + failure)
    if failed > SHARE_LIMIT and success:
        yield Reason("CAUTION", "failures", {"share": failed, "n": success})
    if part_of(requests["cancelled"], requests["total"]) > SHARE_LIMIT:
        share = part_of(requests["cancelled"], requests["total"])
        yield Reason("CAUTION", "cancelled", {"n": requests["cancelled"], "share": share})
    if requests["dropped"]:
        yield Reason("CAUTION", "dropped", {"n": requests["dropped"]})
    if requests.get("unmade"):
        yield Reason("CAUTION", "unmade", {"n": requests["unmade"]})
    if not success:
        yield Reason("CAUTION", "nothing", {"n": requests["total"]})
    else:
        limited = limited_names(success)
        if limited:
            yield Reason("CAUTION", "few", {"n": success, "names": ", ".join(name.upper() for name in limited)})
        yield from answer_reasons(rows, success, config)
        yield from warmup_reasons(rows)
    yield from length_reasons(stage.get("lengths", {}))
    yield from drift_reasons(rows, stage["wall_time_ms"])
    if is_open(rows.load):
        yield from schedule_reasons(rows, stage["client"])


def drift_reasons(rows: Rows, wall: float) -> Iterator[Reason]:
    """A lasting shift of TTFT or latency within a stage: one percentile describes neither part of it."""
    if wall < DRIFT_MS:
        return
    starts = rows.columns["start_ms"]
    zero = min(start for start in starts if start == start)
    for metric, key in (("ttft", "drift"), ("latency", "drift_latency")):
        times = rows.columns[metric + "_ms"]
        order = ordered_places(starts, rows.known(metric + "_ms"), times)
        shift = find_shift(*(array.array("d", map(column.__getitem__, order)) for column in (starts, times)))
        if shift is None:
            continue
        values: Dict[str, Any] = {"share": abs(100.0 * shift.after / shift.before - 100.0)}
        values.update(before=shift.before, after=shift.after, metric=metric, n=shift.n)
        values.update(change="rose" if shift.after > shift.before else "fell", at=span_words(shift.moment - zero))
        yield Reason("CAUTION", key, values)


def length_off(lengths: Mapping[str, Any], side: str) -> float:
    """How far the mean length is off its target, in %: above 0 it is longer."""
    target = lengths.get(side + "_target")
    return round(100.0 * (lengths[side + "_actual"] / target - 1.0), 6) if target else 0.0


def length_reasons(lengths: Mapping[str, Any]) -> Iterator[Reason]:
    """Prompts or answers that are not as long as they were asked to be."""
    off = length_off(lengths, "in")
    if abs(off) > LENGTH_LIMIT:
        values = {"off": abs(off), "actual": lengths["in_actual"], "target": lengths["in_target"]}
        yield Reason("CAUTION", "input_longer" if off > 0 else "input_shorter", values)
    short = part_of(lengths.get("out_short", 0), lengths.get("n", 0))
    if short > SHARE_LIMIT:
        values = {"share": short, "n": lengths["out_short"], "actual": lengths["out_actual"]}
        yield Reason("CAUTION", "output_short", {**values, "target": lengths["out_target"]})


def schedule_reasons(rows: Rows, client: Mapping[str, Any]) -> Iterator[Reason]:
    """What kept an open loop from its schedule: a cap that bound, and a rate that was not reached."""
    capped = [wait for wait in rows.columns["capped_ms"] if wait > 0]
    if capped:
        share = part_of(len(capped), len(rows))
        values = {"share": share, "longest": max(capped), "n": len(capped), "cap": rows.load.get("cap", 0)}
        yield Reason("CAUTION", "cap", values)
    requested, achieved = client.get("requested_rps", 0.0), client.get("achieved_rps", 0.0)
    missing = 100.0 - part_of(achieved, requested) if requested else 0.0
    if missing > RATE_LIMIT and missing * len(rows) >= 500:
        values = {"missing": missing, "achieved": achieved, "requested": requested}
        yield Reason("CAUTION", missed_by(rows, missing), values)


def missed_by(rows: Rows, missing: float) -> str:
    """What most of a missed rate is due to: requests that were dropped, the cap, slow connects, or this client."""
    if part_of(rows.count("dropped"), len(rows)) > missing / 2:
        return "rate_dropped"
    columns = rows.columns
    late = zip(columns["start_ms"], columns["scheduled_ms"], columns["queue_ms"])
    causes = {
        "rate_cap": sum(wait for wait in columns["capped_ms"] if wait == wait),
        "rate_client": sum(wait for _, wait in own_waits(rows)),
        "rate_connect": sum(start - due - wait for start, due, wait in late if start == start and wait == wait),
    }
    return max(causes, key=causes.__getitem__)


def answer_reasons(rows: Rows, success: int, config: Mapping[str, Any]) -> Iterator[Reason]:
    """What the answers of a stage say of the endpoint or of a gateway before it."""
    traits = {
        "compressed": rows.compressed,
        "not_streamed": rows.not_streamed,
        "buffered": rows.buffered,
        "no_finish": rows.no_finish,
        "repeated": rows.repeated() if config.get("unique", True) else 0,  # else the same prompt may come again
    }
    for key, count in traits.items():
        if part_of(count, success) > 1.0:
            yield Reason("CAUTION", key, {"n": count, "share": part_of(count, success)})
    if config.get("token_mode", "usage") != "usage":
        return
    missing = success - len(rows.successful("out_tokens"))
    if missing:
        yield Reason("CAUTION", "usage_missing", {"n": missing})
    tokens, chunks = rows.total("out_tokens"), rows.total("chunks")
    if config.get("stream", True) and chunks and missing < success and tokens / chunks > 1.2:
        yield Reason("CAUTION", "several_tokens", {"tokens": tokens / chunks})
    cached = part_of(rows.total("cached_tokens"), rows.total("in_tokens"))
    if cached > 10.0:
        yield Reason("CAUTION", "cached", {"share": cached})


def begun_answers(rows: Rows) -> Iterator[Tuple[float, float, int]]:
    """Start, TTFT and row of each successful request with a TTFT: with the row no two are alike."""
    times = zip(rows.status, rows.columns["start_ms"], rows.columns["ttft_ms"])
    return ((start, ttft, row) for row, (status, start, ttft) in enumerate(times) if status == "ok" and ttft == ttft)


def warmup_reasons(rows: Rows) -> Iterator[Reason]:
    """A first wave that was much slower than what followed."""
    wave = max(5, int(rows.load.get("concurrency", 1)))
    early = heapq.nsmallest(wave, begun_answers(rows))
    rest = [answer[1] for answer in begun_answers(rows) if answer > early[-1]]
    if len(rest) < 2 * wave:
        return
    first = [ttft for _, ttft, _ in early]
    slow, usual = sorted(first)[len(first) // 2], percentiles(rest)
    if slow > 1.5 * usual["p50"] and slow > usual["p95"] and slow - usual["p50"] > 5.0:
        yield Reason("CAUTION", "warmup", {"first": slow, "usual": usual["p50"], "n": len(first)})


def early_ends(end: Mapping[str, Any], merged: Mapping[str, Any]) -> str:
    """Why a run ended before its time; of a merged one what each such shard said, shards that said the same together.

    >>> shards = [{"shard": "0/3"}, {"shard": "1/3", "end": {"reason": "done"}}, {"shard": "2/3"}]
    >>> early_ends({"reason": "cut off", "shard": "0/3"}, {"shards": shards})
    'shard 0/3, 2/3: cut off'
    """
    told: Dict[str, List[str]] = {}
    for shard in merged.get("shards", ()):
        told.setdefault(shard.get("end", {"reason": CUT_OFF}).get("reason", "done"), []).append(shard["shard"])
    told.pop("done", None)
    return "; ".join("shard %s: %s" % (few_of(names), reason) for reason, names in told.items()) or end["reason"]


def few_of(names: Sequence[str], most: int = 8) -> str:
    """The names in a row; of very many the first ones and how many more there are.

    >>> few_of("abcde", 3)
    'a, b, … (5)'
    """
    return ", ".join(names if len(names) <= most else [*names[: most - 1], "… (%d)" % len(names)])


def merged_reasons(merged: Mapping[str, Any]) -> Iterator[Reason]:
    """What concerns the shards that a run was merged from."""
    if merged.get("missing"):
        yield Reason("CAUTION", "shards_missing", {"shards": few_of(merged["missing"])})
    apart = merged.get("clock", {}).get("disagree_ms", 0.0)
    if apart > CLOCK_LIMIT_MS:
        yield Reason("CAUTION", "clocks_disagree", {"ms": apart, "hosts": ", ".join(merged["clock"]["hosts"])})


def run_reasons(
    end: Optional[Mapping[str, Any]], client: Mapping[str, Any], merged: Mapping[str, Any]
) -> Iterator[Reason]:
    """What concerns the run as a whole."""
    if end is None:
        yield Reason("CAUTION", "cut_off", {})
    elif end.get("reason", "done") != "done":
        state = "INVALID" if end.get("lost_workers") else "CAUTION"  # a part of the client failed
        yield Reason(state, "ended_early", {"reason": early_ends(end, merged)})
    yield from merged_reasons(merged)
    lag = (client.get("lag_ms") or {}).get("p99", 0.0)
    if client.get("clock", "kernel") != "kernel" and lag > 1.0:
        yield Reason("CAUTION", "clock", {"lag": lag})


def stage_reasons(rows: Rows, stage: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[Reason]:
    """The reasons of one stage. Above what a search found only this client's limits count, as a reservation.

    A probe there was to fail; that this client was its limit bounds the search, not the figures of the load it found.
    """
    above = is_above(stage["load"], summary.get("find_max", {}))
    for reason in client_reasons(rows, stage):
        yield reason._replace(state="CAUTION") if above else reason
    if not above:
        yield from sample_reasons(rows, stage, summary["config"])


def judge(summary: Mapping[str, Any], rows: Sequence[Rows]) -> Dict[str, Any]:
    """The verdict: `{state, reasons: [{state, key, values, streams}]}`; streams: of which stages, among several.

    Where their number of streams does not name the stages, `loads` does, each as load_names has it.

    A reason that several stages give stands once, with the values of the stage where it is worst.
    """
    found: Dict[Tuple[str, str], List[Tuple[Reason, Dict[str, float]]]] = {}
    for reason in run_reasons(summary.get("end"), summary["client"], summary.get("merged", {})):
        found[reason.state, reason.key] = [(reason, {})]
    for stage, stage_rows, name in zip(summary["stages"], rows, load_names([stage.load for stage in rows])):
        for reason in stage_reasons(stage_rows, stage, summary):
            found.setdefault((reason.state, reason.key), []).append((reason, name))
    entries = []
    for (state, key), given in sorted(found.items(), key=lambda item: item[0][0] != "INVALID"):
        worst = max((reason for reason, _ in given), key=badness)
        entry: Dict[str, Any] = {"state": state, "key": key, "values": rounded(worst.values)}
        entry.update(whose([name for _, name in given if name], len(rows)))
        entries.append(entry)
    states = {state for state, _ in found}
    return {"state": "INVALID" if "INVALID" in states else "CAUTION" if states else "VALID", "reasons": entries}


def whose(names: Sequence[Mapping[str, float]], stages: int) -> Dict[str, Any]:
    """Which of a run's stages a reason is of: their streams, or their loads where streams don't name them."""
    once = {tuple((key, value) for key, value in name.items() if key != "again"): None for name in names}
    loads = [dict(name) for name in once]  # a repeat of a load is not named again
    if stages < 2 or not loads:
        return {}
    if all(list(load) == ["concurrency"] for load in loads):
        return {"streams": [load["concurrency"] for load in loads]}
    return {"loads": loads, "all_stages": stages} if len(names) == stages > 3 else {"loads": loads}


def badness(reason: Reason) -> List[float]:
    """What orders one reason's values from mild to bad: its shares and times."""
    return [value for value in reason.values.values() if isinstance(value, float)]


def summarize_stage(
    rows: Rows, mode: str, audits: Sequence[Mapping[str, Any]], gates: Sequence[Gate] = (), firsts: Iterable[float] = ()
) -> Dict[str, Any]:
    """The figures of one stage; the same keys stand at the top of summary.json when there is only one."""
    wall = wall_ms(rows)
    block: Dict[str, Any] = {"stage": rows.stage, "load": rows.load}
    block["wall_time_ms"] = round(wall, 4)
    block["requests"] = count_requests([rows])
    for name in DISTRIBUTIONS:
        block[name] = describe(rows.successful(name))
    block["itl_ms"] = describe_histogram(rows.itl_hist, rows.itl_sum_ms, rows.itl_min_ms, rows.itl_max_ms)
    block["request_tps"] = describe([1000.0 / value for value in rows.successful("tpot_ms") if value > 0])
    block["tokens"] = count_tokens([rows], mode)
    block["lengths"] = count_lengths(rows)
    block["throughput"] = throughput_of(rows, wall, mode, gates)
    block["errors"] = merge_errors([rows])
    mine = [audit for audit in audits if audit["stage"] == rows.stage]
    block["client"] = client_block(mine, [rows])
    limit = lag_limit_ms((block["ttft_ms"] or {}).get("p50"))
    block["client"]["late_percent"] = round(late_percent(rows, limit, firsts), 4)
    block["client"].update(rates_of(rows))
    limited = [reason.key for reason in client_reasons(rows, block)]
    if limited:
        block["client"]["limited_by"] = limited
    if gates:
        block["slo"] = judge_gates(block, gates)
    return {key: value for key, value in block.items() if value is not None}


def count_good(rows: Rows, limits: Sequence[Gate]) -> int:
    """How many requests succeeded and met every one of these limits."""
    columns = [rows.columns["tpot_ms" if gate.figure == "request_tps" else gate.figure] for gate in limits]
    good = 0
    for status, *values in zip(rows.status, *columns):
        if status == "ok" and all(map(meets, limits, values)):
            good += 1
    return good


def meets(limit: Gate, value: float) -> bool:
    """Whether one request's value of a column meets a limit; tokens/s are the inverse of TPOT; NaN never does."""
    if limit.figure == "request_tps":
        return value > 0 and limit.holds(1000.0 / value)
    return limit.holds(value)


def goodput_of(rows: Rows, seconds: float, gates: Sequence[Gate]) -> Dict[str, float]:
    """Goodput as a rate and as a share; nothing when no gate limits a single request."""
    limits = request_limits(gates)
    finished = len(rows) - rows.count(*NOT_JUDGED)
    if not limits or not finished:
        return {}
    good = count_good(rows, limits)
    return {"goodput_rps": good / seconds, "goodput_share": good / finished}


def throughput_of(rows: Rows, wall: float, mode: str, gates: Sequence[Gate] = ()) -> Dict[str, Any]:
    """The `throughput` block of one stage; token rates are absent when the endpoint reports no usage."""
    seconds = wall / 1000.0
    block: Dict[str, Any] = {}
    if seconds <= 0:
        return block
    block["rps"] = rows.count("ok") / seconds
    if mode == "usage" and rows.successful("out_tokens"):
        block["output_tokens_per_s"] = rows.total("out_tokens") / seconds
        steady, reason = steady_throughput(rows)
        if steady is not None:
            block["steady_output_tokens_per_s"] = steady
        else:
            block["steady_absent_reason"] = reason
    if mode != "disabled":
        block["output_chars_per_s"] = rows.total("out_chars") / seconds
    block.update(goodput_of(rows, seconds, gates))
    return rounded(block)


# Gates. A gate names a figure of a stage and a limit; `slo` holds what became of each, stage by stage, and a run passes
# if each stage does. A figure that is not there fails its gate: nobody can vouch for it.


def gate_value(block: Mapping[str, Any], gate: Gate) -> Tuple[Optional[float], int]:
    """The figure of a stage that a gate is held against, and of how many requests (or gaps) it is made."""
    requests = block["requests"]
    if gate.stat:
        figures = block.get(gate.figure) or {}
        return figures.get(gate.stat), figures.get("n", 0)
    finished = requests["success"] + requests["failure"]
    if gate.figure == "success_rate":
        return requests.get("success_rate"), finished
    n = finished if gate.metric == "goodput" else requests["success"]
    return block.get("throughput", {}).get(gate.figure), n


def judge_gates(block: Mapping[str, Any], gates: Sequence[Gate]) -> List[Dict[str, Any]]:
    """The `slo` entries of one stage: `{gate, metric, stat, op, limit, value, n, passed, stage}`, value if known."""
    entries = []
    for gate in gates:
        value, n = gate_value(block, gate)
        entry = {"gate": gate.text, "metric": gate.metric, "stat": gate.stat, "op": gate.op, "limit": gate.limit}
        if value is not None:
            entry["value"] = value
        entries.append({**entry, "n": n, "passed": gate.holds(value), "stage": block["stage"]})
    return entries


def gates_of(config: Mapping[str, Any]) -> List[Gate]:
    """The gates that a run's configuration names; raises UserError for one that this version can't read."""
    try:
        return parse_gates(config.get("slo") or [])
    except ValueError as error:
        raise UserError("the run's --slo %s; this version of llmbench can't judge it" % error) from None


def fell_short(stage: Mapping[str, Any]) -> bool:
    """Whether a stage never had the load that it stands for: requests were dropped, or went out too late."""
    requests, client = stage.get("requests", {}), stage["client"]
    requested = client.get("requested_rps", 0.0)
    missing = 100.0 - part_of(client.get("achieved_rps", 0.0), requested) if requested else 0.0
    return requests.get("dropped", 0) > 0 or (missing > RATE_LIMIT and missing * requests.get("total", 0) >= 500)


def judge_stage(lines: Iterable[Mapping[str, Any]], stage: int) -> Tuple[List[Dict[str, Any]], Dict[str, Any]]:
    """How one stage of results.jsonl did: its `slo` entries, and its whole block."""
    collector = Collector()
    for line in lines:
        of = line["audit"]["stage"] if "audit" in line else line.get("stage", stage)
        if stage == (of["index"] if isinstance(of, dict) else of):
            collector.add(line)
    config, rows = collector.header["config"], collector.rows()[-1]
    block = summarize_stage(rows, config["token_mode"], collector.audits, gates_of(config))
    return block["slo"], block


def all_passed(summary: Mapping[str, Any]) -> bool:
    """Whether the run met its gates: each stage did, or --find-max found a load that does."""
    if "find_max" in summary:
        return summary["find_max"].get("load") is not None
    return all(entry["passed"] for entry in summary["slo"])


def find_max(stages: Sequence[Mapping[str, Any]], kind: str, whole: bool = True) -> Dict[str, Any]:
    """What a search for the highest load found: `{kind, load, confirmed, failed, probes, cut_off}`; pure.

    A probe passed if its stage passed every gate, this client was not its limit, and its load was reached. `load` is
    the highest of which every probe passed, as did those of every lower load; it is confirmed by a second probe.
    `failed` is the lowest load of which a probe did not pass: `{stage, load}`, with `client: true` where this client
    was the limit, and `short: true` where requests were dropped or late under a cap. Either may be absent. `whole`:
    whether the search came to its end; a probe that was under way when it was cut off says nothing.
    """
    probes: List[Dict[str, Any]] = []
    for stage in stages if whole else stages[:-1]:
        limited = bool(stage["client"].get("limited_by"))
        short = fell_short(stage) and not limited
        met = bool(stage.get("slo")) and all(entry["passed"] for entry in stage["slo"])
        passed = met and not limited and not short
        probe = {"stage": stage["stage"], "load": stage["load"].get(kind, 0), "passed": passed}
        marks = {"client": limited, "short": short and met}
        probes.append({**probe, **{mark: True for mark, given in marks.items() if given}})
    ordered = sorted(probes, key=lambda probe: (probe["load"], probe["passed"]))
    failed = next((probe for probe in ordered if not probe["passed"]), None)
    below = [probe["load"] for probe in ordered if failed is None or probe["load"] < failed["load"]]
    found: Dict[str, Any] = {"kind": kind}
    if below:
        found["load"] = below[-1]
    found["confirmed"] = len(below) > 1 and below[-2] == below[-1]
    if failed is not None:
        found["failed"] = {key: value for key, value in failed.items() if key != "passed"}
    if not whole:
        found["cut_off"] = True
    return {**found, "probes": probes}


def is_above(load: Mapping[str, float], found: Mapping[str, Any]) -> bool:
    """Whether a load lies above the highest that a search found; in a run that is no search nothing does."""
    return "load" in found and load.get(found["kind"], 0) > found["load"]


def noise_floor(selftest: Mapping[str, Any], streams: int) -> Dict[str, Any]:
    """What an earlier selftest of this host found at the level next to a run's: `{streams, first_p99_ms, at}`."""
    level = min(selftest["errors"], key=lambda error: abs(math.log(error["streams"] / streams)))
    return {"streams": level["streams"], "first_p99_ms": level["first_ms"]["p99"], "at": selftest.get("at", "")}


def unmade_of(collector: Collector, stage: Mapping[str, Any]) -> int:
    """The planned requests of a stage that were never made, in a run that came to its end: turns behind a failed one.

    Not known of a stage that time ended, nor of a part of a run.
    """
    plan, header = collector.plans.get(stage["stage"], {}), collector.header
    part = "shard" in header.get("config", {}) or bool(header.get("merged", {}).get("missing"))
    done = collector.end is not None and collector.end.get("reason", "done") == "done"
    if part or not done or not stage["requests"]["failure"] or "duration" in plan or "total" not in plan:
        return 0
    return max(0, plan["total"] - stage["requests"]["total"])


def summarize(collector: Collector) -> Dict[str, Any]:
    """summary.json. With several stages the percentiles stand per stage only: pooled they would mean nothing."""
    header = collector.header
    config = header.get("config", {})
    mode = config.get("token_mode", "usage")
    rows = collector.rows()
    gates, merged = gates_of(config), header.get("merged", {})
    stages = [
        summarize_stage(stage, mode, collector.audits, gates, first_dues(merged, stage.stage)) for stage in rows
    ]
    for stage in stages:
        unmade = unmade_of(collector, stage)
        if unmade:
            stage["requests"]["unmade"] = unmade
    summary: Dict[str, Any] = {"schema": 1}
    for key in ("tool_version", "run_id", "provider", "model", "url", "started_at", "merged"):
        if header.get(key) is not None:
            summary[key] = header[key]
    if len(stages) == 1:
        summary.update({key: value for key, value in stages[0].items() if key not in ("stage", "load")})
    else:
        summary["wall_time_ms"] = round(sum(stage["wall_time_ms"] for stage in stages), 4)
        summary["requests"] = count_requests(rows)
        summary["tokens"] = count_tokens(rows, mode)
        summary["errors"] = merge_errors(rows)
    summary["samples"] = collector.samples
    summary["slo"] = [entry for stage in stages for entry in stage.get("slo", [])]
    summary["stages"] = stages
    summary["client"] = client_block(collector.audits, rows)
    if "selftest" in header:
        streams = max(1, *(streams_in(stage) for stage in rows))
        summary["client"]["selftest"] = noise_floor(header["selftest"], streams)
    summary["client"]["late_percent"] = max(stage["client"]["late_percent"] for stage in stages)
    if len(stages) == 1:
        summary["client"].update(rates_of(rows[0]))
    if collector.end is not None:
        summary["end"] = collector.end
    summary["config"] = config
    if config.get("find_max") and gates:
        whole = collector.end is not None and collector.end.get("reason", "done") == "done"
        summary["find_max"] = find_max(stages, config["find_max"], whole)
    summary["verdict"] = judge(summary, rows)
    return summary


# ==================================================================================================
# 10. Comparison: two runs, and what of their difference is more than chance
# ==================================================================================================
#
# What of the difference between two runs is more than chance? Each figure has a `Chance`: the values that
# it might as well have had, and how likely each was. Two of them together give the 95 % interval of the difference and
# how likely a difference as large is where there is none. Nothing is drawn at random, so nothing depends on a seed:
#
# - A percentile's is the bootstrap distribution of an order statistic, in closed form (Maritz and Jarrett, 1978): the
#   share of requests below it follows a Beta distribution, whatever the times are distributed like.
# - A success rate's is a Beta distribution with Jeffreys' half request on either side.
# - A throughput's or mean's is that of the rates in up to sixty equal blocks of time (or of requests, by start), which
#   follows Student's t: a method that respects time, since neighbours in time are alike.
#
# Requests hang together: an endpoint is slow for a while. `inflation` is how many of them count as one, by how much
# each resembles those after it (the integrated autocorrelation, cut off as Sokal proposed); a comparison takes the
# larger of two runs', because bursts that only one of them met are what both might have met.
#
# Of twenty figures without a difference one is bound to lie outside its 95 % interval. So "better" or "worse" is only
# said where the difference still stands when all figures of a comparison, of all its stages, are considered together
# (Holm's correction at 5 %), and where it is at least 1 % and more than this client's own error. What the interval
# can't know is what was different about the hour or the host: only repeated runs can tell.

CHANCE_STEPS = 200
ALIKE_CHUNKS = 512  # a longer series is cut into so many, so that its correlations cost no more
SOKAL, LEAST_WINDOW = 5.0, 11  # lags that count: up to so many times the sum so far, which is 11 with those before
TIME_BLOCKS, FEWEST_BLOCKS = 60, 8  # blocks of a rate: at most, and at least
BLOCK_LATENCIES = 2.0  # how many mean latencies a block lasts, so that few requests lie in two
INDEPENDENT, BEYOND = 20.0, 5.0  # requests' worth that a percentile needs in all, and beyond it
CERTAIN = 0.05  # of all comparisons without any difference so many show one
SMALLEST_CHANGE = 0.01  # a smaller change of a time or rate is not called one: two runs of one endpoint differ by it
SMALLEST_MS = 0.1  # nor is one below what a client can tell apart


class Chance(NamedTuple):
    """What a figure might as well have been: possible values in order, and the likelihood of each; they sum to 1."""

    values: Sequence[float]
    weights: Sequence[float]


def beta_chance(one: float, other: float, place: Callable[[float], float]) -> Chance:
    """A Beta distribution (parameters of at least a half) of a share, each taken to its place by a growing function.

    It is cut into equal steps of the share's arcsine, in which it is about equally wide everywhere.
    """
    middle, reach = math.asin(math.sqrt(one / (one + other))), 6.0 / math.sqrt(one + other)
    low, high = max(0.0, middle - reach), min(math.pi / 2, middle + reach)
    angles = [low + (high - low) * (step + 0.5) / CHANCE_STEPS for step in range(CHANCE_STEPS)]
    heights = [
        (2 * one - 1) * math.log(math.sin(angle)) + (2 * other - 1) * math.log(math.cos(angle)) for angle in angles
    ]
    top = max(heights)
    weights = [math.exp(height - top) for height in heights]
    total = math.fsum(weights)
    return Chance([place(math.sin(angle) ** 2) for angle in angles], [weight / total for weight in weights])


def percentile_chance(ordered: Sequence[float], share: float, independent: float) -> Chance:
    """The bootstrap distribution of a percentile of sorted values that are worth so many independent ones."""
    n = len(ordered)

    def place(below: float) -> float:
        return ordered[min(n - 1, int(below * n))]

    return beta_chance((independent - 1) * share + 1, (independent - 1) * (1 - share) + 1, place)


def mean_error(parts: Sequence[float]) -> Optional[float]:
    """The standard error of a mean, as a share of it, from the values in blocks; None of fewer than eight."""
    number = len(parts)
    middle = math.fsum(parts) / number if number else 0.0
    if number < FEWEST_BLOCKS or middle <= 0:
        return None
    variance = math.fsum((part - middle) ** 2 for part in parts) / (number - 1)
    return math.sqrt(variance / number * inflation(parts)) / middle


def mean_chance(mean: float, error: float, number: int) -> Chance:
    """Student's t about a mean with this error, from so many blocks."""
    if not error:
        return Chance([mean], [1.0])
    steps = [10.0 * (step + 0.5) / CHANCE_STEPS - 5.0 for step in range(CHANCE_STEPS)]  # sinh(5) is 74 errors
    weights = [(1 + math.sinh(step) ** 2 / (number - 1)) ** (-number / 2) * math.cosh(step) for step in steps]
    total = math.fsum(weights)
    values = [max(0.0, mean + error * math.sinh(step)) for step in steps]  # neither a rate nor a time is below 0
    return Chance(values, [weight / total for weight in weights])


def inflation(series: Sequence[float]) -> float:
    """How many members of a series in order of time count as one, because they resemble each other; at least 1."""
    number = len(series)
    mean = math.fsum(series) / number
    rests = [value - mean for value in series]
    square = math.fsum(rest * rest for rest in rests)
    if square <= 1e-18 * mean * mean * number:
        return 1.0
    total, window = 1.0, 1
    for lag in range(1, number // 3):
        total += 2.0 * math.fsum(map(operator.mul, rests, rests[lag:])) / square
        window += 2
        if lag >= SOKAL * total:
            break
    total /= 1.0 - min(0.5, window / number)  # rests from the series' own mean resemble each other too little
    unsure = math.sqrt(2.0 * window / number) - math.sqrt(2.0 * LEAST_WINDOW / number)  # beyond that of no resemblance
    return max(1.0, total * (1.0 + max(0.0, unsure)))


def chunk_means(series: Sequence[float], most: int) -> List[float]:
    """A series in at most so many chunks of equal size, each by its mean; what is left at the end is in none."""
    size = -(-len(series) // most) or 1
    return [math.fsum(series[start : start + size]) / size for start in range(0, len(series) - size + 1, size)]


def flags_inflation(flags: Sequence[int]) -> float:
    """The inflation of yes and no, in order of time: over the mean of so many independent ones' variance."""
    chunks = chunk_means(flags, ALIKE_CHUNKS)
    if not chunks:
        return 1.0
    size, number = -(-len(flags) // ALIKE_CHUNKS) or 1, len(chunks)
    share = math.fsum(chunks) / number
    if not 0.0 < share < 1.0:
        return 1.0
    variance = math.fsum((chunk - share) ** 2 for chunk in chunks) / number
    return max(1.0, inflation(chunks) * variance * size / (share * (1.0 - share)))


def likelihood_below(first: Chance, second: Chance, moved: Callable[[float], float], equal: bool = True) -> float:
    """How likely the second figure is at most what the first is moved to; `equal` False: less than it."""
    sums = [0.0, *itertools.accumulate(second.weights)]
    find = bisect.bisect_right if equal else bisect.bisect_left
    return math.fsum(
        weight * sums[find(second.values, moved(value))] for value, weight in zip(first.values, first.weights)
    )


def likely_change(first: Chance, second: Chance, relative: bool) -> Tuple[float, float]:
    """The 95 % interval of the change from the first figure to the second, as a share of the first or as it is."""
    if relative:
        least = max(first.values[0], 0.001 * first.values[-1])
        bounds = [second.values[0] / first.values[-1] - 1.0, second.values[-1] / least - 1.0]
    else:
        bounds = [second.values[0] - first.values[-1], second.values[-1] - first.values[0]]
    ends = []
    for likelihood in (0.025, 0.975):
        low, high = bounds
        exact = 1e-7 * max(abs(low), abs(high))
        while high - low > exact:
            middle = (low + high) / 2.0
            moved = (lambda value, by=middle: value * (1.0 + by)) if relative else (lambda value, by=middle: value + by)
            if likelihood_below(first, second, moved) < likelihood:
                low = middle
            else:
                high = middle
        ends.append((low + high) / 2.0)
    return ends[0], ends[1]


def chance_of_none(first: Chance, second: Chance) -> float:
    """How likely a difference as large, in either direction, is where there is none (the p-value)."""
    same = _as_it_is
    below = likelihood_below(first, second, same)
    above = 1.0 - likelihood_below(first, second, same, equal=False)
    return max(0.0, min(1.0, 2.0 * below, 2.0 * above))


def _as_it_is(value: float) -> float:
    return value


def holm(chances: Sequence[float]) -> List[float]:
    """Holm's correction: each p-value as if it were the only one, though the smallest of many was bound to be small.

    >>> holm([0.01, 0.04, 0.5])
    [0.03, 0.08, 0.5]
    """
    adjusted, least = [0.0] * len(chances), 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        least = max(least, min(1.0, (len(chances) - rank) * chances[place]))
        adjusted[place] = least
    return adjusted


@dataclass
class Sample:
    """A time of a stage's successful requests: sorted; how many count as one at each percentile; means by start."""

    ordered: array.array
    alike: Dict[str, float]
    parts: List[float]


class ComparedStage(NamedTuple):
    """A stage as a comparison sees it: load, name among its run's stages, summary block, samples, rates in blocks."""

    load: Mapping[str, float]
    name: Mapping[str, float]
    figures: Mapping[str, Any]
    samples: Mapping[str, Sample]
    success_alike: float
    rates: Mapping[str, Sequence[float]]
    means: Mapping[str, Tuple[float, float]]  # mean and its error: tokens of prompts, answers; characters of answers


@dataclass
class ComparedRun:
    """One of the runs of a comparison: letter, where it was read from, and what the comparison takes of it."""

    letter: str
    place: str
    header: Mapping[str, Any]
    summary: Mapping[str, Any]
    end: Optional[Mapping[str, Any]]
    rows: Sequence[Rows]
    stages: Sequence[ComparedStage]

    @property
    def state(self) -> str:
        """VALID, CAUTION or INVALID."""
        return self.summary["verdict"]["state"]

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's configuration; files of an early format may lack it."""
        return self.header.get("config") or {}


def by_start(rows: Rows) -> List[int]:
    """The rows in the order in which their requests started, or were due."""
    starts, dues = rows.columns["start_ms"], rows.columns["scheduled_ms"]
    moments = [start if start == start else due if due == due else math.inf for start, due in zip(starts, dues)]
    return sorted(range(len(moments)), key=moments.__getitem__)


def sample_of(rows: Rows, order: Sequence[int], metric: str) -> Optional[Sample]:
    """The values of one time over the successful requests; None without any."""
    column, status = rows.columns["tpot_ms" if metric == "request_tps" else metric], rows.status
    values = [column[row] for row in order if status[row] == "ok" and column[row] == column[row]]
    if metric == "request_tps":
        values = [1000.0 / value for value in values if value > 0]
    if not values:
        return None
    bounds = percentiles(values)
    alike = {name: flags_inflation([value <= bounds[name] for value in values]) for name, _ in PERCENTILES}
    # The few beyond a high percentile tell badly how much they hang together: not less than all do.
    alike = {name: max(number, alike["p50"]) for name, number in alike.items()}
    return Sample(array.array("d", sorted(values)), alike, chunk_means(values, TIME_BLOCKS))


AMOUNTS = {"rps": ("start_ms", None), "output_tokens_per_s": ("ttfe_ms", "out_tokens"),
           "output_chars_per_s": ("ttfe_ms", "out_chars")}  # a rate: since when a request gives it, and how much


def given_spans(rows: Rows, rate: str) -> List[Tuple[float, float, float]]:
    """(from, to, how much) of what each successful request gave to a rate."""
    since, amount = AMOUNTS[rate]
    columns, spans = rows.columns, []
    amounts = columns[amount] if amount else itertools.repeat(1.0)
    delays = itertools.repeat(0.0) if since == "start_ms" else columns[since]
    for status, start, delay, latency, much in zip(
        rows.status, columns["start_ms"], delays, columns["latency_ms"], amounts
    ):
        if status == "ok" and latency == latency and much == much:
            spans.append((start + (delay if delay == delay else latency), start + latency, much))
    return spans


def spread_evenly(spans: Iterable[Tuple[float, float, float]], zero: float, width: float, number: int) -> List[float]:
    """The amount in each of so many equal blocks of time, of spans (from, to, how much) spread evenly over theirs."""
    totals, last_end = [0.0] * number, zero + number * width
    for begin, end, much in spans:
        first = int((begin - zero) // width)
        last = int((end - zero) // width)
        if first == last or end <= begin:
            if last >= 0 and end <= last_end * (1 + 1e-12):  # the very end belongs to the last block
                totals[min(last, number - 1)] += much
            continue
        for block in range(max(0, first), min(last, number - 1) + 1):
            low = zero + block * width
            totals[block] += much * share_within(begin, end, low, low + width)
    return totals


def rate_blocks(rows: Rows, rate: str, window: Optional[Tuple[float, float]]) -> List[float]:
    """A rate, per second, in equal blocks of a window of time; nothing where fewer than eight blocks fit into it."""
    spans = given_spans(rows, rate)
    if window is None or not spans:
        return []
    took = rows.successful("latency_ms")
    shortest = BLOCK_LATENCIES * math.fsum(took) / len(took)
    low, high = window
    number = min(TIME_BLOCKS, len(spans), int((high - low) / shortest) if shortest else TIME_BLOCKS)
    if number < FEWEST_BLOCKS or high <= low:
        return []
    width = (high - low) / number
    return [1000.0 * amount / width for amount in spread_evenly(spans, low, width, number)]


def compared_stage(
    rows: Rows, name: Mapping[str, float], figures: Mapping[str, Any], metrics: Iterable[str]
) -> ComparedStage:
    """What a comparison takes of one stage: samples of these times, and all its rates."""
    order = by_start(rows)
    samples = {metric: sample_of(rows, order, metric) for metric in metrics}
    flags = [rows.status[row] == "ok" for row in order if rows.status[row] not in NOT_JUDGED]
    first = min((start for start in rows.columns["start_ms"] if start == start), default=0.0)
    whole = (first, first + wall_ms(rows))
    rates = {rate: rate_blocks(rows, rate, whole) for rate in AMOUNTS}
    if "steady_output_tokens_per_s" in figures.get("throughput", {}):
        rates["steady_output_tokens_per_s"] = rate_blocks(rows, "output_tokens_per_s", steady_window(rows))
    means = {}
    for column in ("in_tokens", "out_tokens", "out_chars"):
        values = rows.successful(column)
        if values:
            figures_of = describe(values) or {}
            means[column] = figures_of["mean"], figures_of["stdev"] / math.sqrt(len(values))
    known = {metric: sample for metric, sample in samples.items() if sample is not None}
    return ComparedStage(rows.load, name, figures, known, flags_inflation(flags), rates, means)


def compared_run(letter: str, place: str, collector: Collector, conditions: Sequence[Condition] = ()) -> ComparedRun:
    """A run whose results.jsonl was read, as a comparison under these conditions takes it."""
    summary, rows = summarize(collector), collector.rows()
    metrics = dict.fromkeys([metric for metric, stats in COMPARED if stats])
    metrics.update(dict.fromkeys(condition.figure for condition in conditions if condition.stat))
    names = load_names([stage.load for stage in rows])
    stages = [
        compared_stage(stage, name, figures, metrics) for stage, name, figures in zip(rows, names, summary["stages"])
    ]
    return ComparedRun(letter, place, collector.header, summary, collector.end, rows, stages)


# What is compared, in the order of the table: a summary's figure and its statistics. A rate or share has none.
MAIN_STATS = ("p50", "p95", "p99")
COMPARED: Tuple[Tuple[str, Tuple[str, ...]], ...] = (
    ("success_rate", ()), ("ttft_ms", MAIN_STATS), ("ttft_from_scheduled_ms", MAIN_STATS), ("ttfe_ms", MAIN_STATS),
    ("latency_ms", MAIN_STATS), ("latency_from_scheduled_ms", MAIN_STATS), ("tpot_ms", MAIN_STATS),
    ("output_tokens_per_s", ()), ("steady_output_tokens_per_s", ()), ("output_chars_per_s", ()), ("rps", ()),
)  # fmt: skip


@dataclass
class Difference:
    """One figure of two stages: both values with their n, the change with its 95 % interval, and the word for it.

    The change is a share of the first value, of a success rate a difference of shares. `word` is better, worse, none,
    few (too few requests to say), absent (a run has no such figure) or unjudged (a run is INVALID). `note` says why
    there is no better or worse though the interval leaves out zero: chance (of so many figures one was bound to) or
    small. `likely` is the p-value.
    """

    metric: str
    stat: str
    values: Tuple[Optional[float], Optional[float]]
    counts: Tuple[int, int]
    change: Optional[float] = None
    low: Optional[float] = None
    high: Optional[float] = None
    likely: Optional[float] = None
    word: str = "absent"
    note: str = ""


def is_better_high(metric: str) -> bool:
    """Whether more of a figure is better: rates and shares; of a time less is."""
    return not metric.endswith("_ms")


def figure_of(stage: ComparedStage, metric: str, stat: str) -> Tuple[Optional[float], int]:
    """The summary's value of a figure, and of how many requests it is made."""
    requests = stage.figures["requests"]
    if stat:
        block = stage.figures.get(metric) or {}
        return block.get(stat), block.get("n", 0)
    if metric in SHARE_FIGURES:
        return requests.get(metric), requests["success"] + requests["failure"]
    return stage.figures.get("throughput", {}).get(metric), requests["success"]


def share_chances(values: Sequence[float], counts: Sequence[int], alike: float) -> Optional[List[Chance]]:
    """Of two success rates, each of so many requests of which `alike` count as one."""
    worth = [n / alike for n in counts]
    if min(worth) < INDEPENDENT:
        return None
    return [beta_chance(value * n + 0.5, (1.0 - value) * n + 0.5, _as_it_is) for value, n in zip(values, worth)]


def mean_chances(
    values: Sequence[float], counts: Sequence[int], parts: Sequence[Sequence[float]]
) -> Optional[List[Chance]]:
    """Of two means or rates, from their values in blocks; both with the larger of the two errors."""
    errors = [mean_error(blocks) for blocks in parts]
    if min(counts) < INDEPENDENT or errors[0] is None or errors[1] is None:
        return None
    return [mean_chance(value, value * max(errors), len(blocks)) for value, blocks in zip(values, parts)]


def percentile_chances(samples: Sequence[Sample], stat: str) -> Optional[List[Chance]]:
    """Of one percentile of two samples."""
    share, alike = int(stat[1:]) / 100.0, max(sample.alike[stat] for sample in samples)
    worth = [len(sample.ordered) / alike for sample in samples]
    if any(stat in limited_names(len(sample.ordered)) for sample in samples) or min(worth) < INDEPENDENT:
        return None
    if min(worth) * min(share, 1.0 - share) < BEYOND * (1.0 - 1e-9):
        return None
    return [percentile_chance(sample.ordered, share, n) for sample, n in zip(samples, worth)]


def chances_of(stages: Sequence[ComparedStage], metric: str, stat: str) -> Optional[List[Chance]]:
    """What a figure of two stages, which both have it, might as well have been; None where the requests are too few."""
    values, counts = zip(*(figure_of(stage, metric, stat) for stage in stages))
    if metric in SHARE_FIGURES:
        return share_chances(values, counts, max(stage.success_alike for stage in stages))
    if not stat:
        return mean_chances(values, counts, [stage.rates.get(metric, ()) for stage in stages])
    samples = [stage.samples[metric] for stage in stages]
    if stat == "mean":
        return mean_chances(values, counts, [sample.parts for sample in samples])
    return percentile_chances(samples, stat)


def changed(before: float, after: float, relative: bool) -> Optional[float]:
    """The change between two values; None as a share of nothing."""
    if not relative:
        return after - before
    return after / before - 1.0 if before > 0 else None


def difference_of(first: ComparedStage, second: ComparedStage, metric: str, stat: str, relative: bool) -> Difference:
    """One figure of two stages, not yet put into words but for `few` and `absent`."""
    (before, n), (after, m) = figure_of(first, metric, stat), figure_of(second, metric, stat)
    found = Difference(metric, stat, (before, after), (n, m))
    if before is None or after is None:
        return found
    found.change, found.word = changed(before, after, relative), "few"
    chances = chances_of((first, second), metric, stat)
    if chances is None or found.change is None:
        return found
    one, other = chances
    found.low, found.high = likely_change(one, other, relative)
    found.likely, found.word = chance_of_none(one, other), "none"
    return found


class ComparedPair(NamedTuple):
    """Two stages of one load, and every difference between them."""

    first: ComparedStage
    second: ComparedStage
    rows: List[Difference]


def own_error_ms(pair: ComparedPair, metric: str, stat: str) -> float:
    """What the clients of two stages can't tell apart in a time, in ms, at the same percentile.

    By how much a first text may have come earlier than its read shows; where the kernel gives no arrival times also how
    late it was read. Between the tokens of an answer it is shared.
    """
    worst = SMALLEST_MS
    for stage in (pair.first, pair.second):
        client = stage.figures.get("client", {})
        names = ["ttft_slack_ms"] + ["lag_ms"] * (client.get("clock", "kernel") != "kernel")
        worst = max([worst] + [(client.get(name) or {}).get(stat, 0.0) for name in names])
    tokens = min(stage.means.get("out_tokens", (2.0, 0.0))[0] for stage in (pair.first, pair.second))
    return worst / max(1.0, tokens - 1.0) if metric == "tpot_ms" else worst


def too_small(pair: ComparedPair, difference: Difference) -> bool:
    """Whether a change is less than what can be told apart, or than two runs of one endpoint differ by."""
    if difference.metric in SHARE_FIGURES:
        return False
    (before, after), metric = difference.values, difference.metric
    if metric.endswith("_ms") and abs(after - before) < own_error_ms(pair, metric, difference.stat):
        return True
    return abs(difference.change) < SMALLEST_CHANGE


def put_in_words(pairs: Sequence[ComparedPair], judged: bool) -> None:
    """Better, worse or none for every difference of two runs, all of their stages considered together."""
    known = [(pair, row) for pair in pairs for row in pair.rows if row.likely is not None]
    for (pair, row), likely in zip(known, holm([row.likely for _, row in known])):
        if not judged:
            row.word = "unjudged"
        elif likely <= CERTAIN and not too_small(pair, row):
            row.word = "better" if (row.change > 0) == is_better_high(row.metric) else "worse"
        elif not row.low <= 0.0 <= row.high:
            row.note = "small" if too_small(pair, row) else "chance"


def compared_figures(first: ComparedStage, second: ComparedStage) -> Iterator[Tuple[str, str]]:
    """The figures of two stages that are worth a row: (metric, statistic); there in one of them, and no repetition."""
    stages = (first, second)
    for metric, stats in COMPARED:
        if metric.endswith("_from_scheduled_ms") and not all(is_open(stage.load) for stage in stages):
            continue
        if metric == "ttfe_ms" and all(stage.figures.get(metric) == stage.figures.get("ttft_ms") for stage in stages):
            continue
        if metric == "output_chars_per_s" and all(figure_of(stage, "output_tokens_per_s", "")[0] for stage in stages):
            continue
        for stat in stats or ("",):
            if any(figure_of(stage, metric, stat)[0] is not None for stage in stages):
                yield metric, stat


def pair_stages(first: ComparedRun, second: ComparedRun) -> Tuple[List[Tuple[int, int]], List[int], List[int]]:
    """Which stages have the same load, by their numbers, and which of either run are left over.

    Two runs of one stage each are compared whatever their loads: that they differ is said.
    """
    if len(first.stages) == len(second.stages) == 1:
        return [(0, 0)], [], []
    waiting: Dict[Any, List[int]] = {}
    for number, stage in enumerate(second.stages):
        waiting.setdefault(tuple(sorted(stage.load.items())), []).append(number)
    pairs, alone = [], []
    for number, stage in enumerate(first.stages):
        same = waiting.get(tuple(sorted(stage.load.items())))
        if same:
            pairs.append((number, same.pop(0)))
        else:
            alone.append(number)
    taken = {number for _, number in pairs}
    return pairs, alone, [number for number in range(len(second.stages)) if number not in taken]


class Unfair(NamedTuple):
    """Why a comparison is not of like with like: the key of its text, the other run's letter, the values in it."""

    key: str
    letter: str
    values: Dict[str, Any]


class Outcome(NamedTuple):
    """What became of a condition in a pair of stages: the change with its interval, and failed, kept or unjudged."""

    condition: Condition
    letter: str
    name: Mapping[str, float]
    difference: Difference
    state: str


@dataclass
class Against:
    """One run against the first: its pairs of stages, those left over, what is unfair, and the conditions' outcomes."""

    run: ComparedRun
    pairs: List[ComparedPair]
    places: List[Tuple[int, int]]
    alone: Tuple[List[int], List[int]]
    unfair: List[Unfair]
    outcomes: List[Outcome]
    judged: bool

    @property
    def rows(self) -> List[Difference]:
        """Every difference, of all stages."""
        return [row for pair in self.pairs for row in pair.rows]


def hold_condition(condition: Condition, letter: str, pair: ComparedPair, judged: bool) -> Outcome:
    """Whether a condition's whole interval lies beyond its limit in a pair of stages."""
    found = difference_of(pair.first, pair.second, condition.figure, condition.stat, condition.relative)
    state = "unjudged"
    if judged and found.low is not None:
        state = "failed" if condition.shown(found.low, found.high) else "kept"
    return Outcome(condition, letter, pair.first.name, found, state)


def compare_runs(first: ComparedRun, second: ComparedRun, conditions: Sequence[Condition] = ()) -> Against:
    """One run against another; pure."""
    places, mine, theirs = pair_stages(first, second)
    judged = "INVALID" not in (first.state, second.state)
    pairs = []
    for number, other in places:
        one, two = first.stages[number], second.stages[other]
        rows = [difference_of(one, two, metric, stat, metric not in SHARE_FIGURES)
                for metric, stat in compared_figures(one, two)]  # fmt: skip
        pairs.append(ComparedPair(one, two, rows))
    put_in_words(pairs, judged)
    outcomes = [hold_condition(condition, second.letter, pair, judged) for condition in conditions for pair in pairs]
    return Against(second, pairs, places, (mine, theirs), find_unfair(first, second, pairs), outcomes, judged)


# What was set up. Some settings only tell runs apart (host, moment, tool), some make their figures answer different
# questions: those are unfair. A setting that a file does not have was at its default, as a flag that did not exist yet.


class Setting(NamedTuple):
    """One fact of the set-up: key, how it is read from a run, whether a difference is unfair, what it usually is."""

    key: str
    read: Callable[[ComparedRun], Any]
    unfair: bool
    usual: Any = None


def flag_setting(name: str, unfair: bool, usual: Any = None) -> Setting:
    """A flag of `run`; `usual` is its default."""
    return Setting(name, lambda run: run.config.get(name, usual), unfair, usual)


def header_setting(key: str, name: str, unfair: bool) -> Setting:
    """An entry of the header of results.jsonl."""
    return Setting(key, lambda run: run.header.get(name), unfair)


def workload_of(run: ComparedRun) -> Any:
    """Which prompts a run sent: source, number and, where the file has it, the hash of all of them."""
    prompts = run.config.get("prompts") or {}
    return [prompts.get("source", "built-in"), prompts.get("count"), prompts.get("digest")]


def clock_of(run: ComparedRun) -> Any:
    """Whose clock told when data arrived."""
    return run.summary["client"].get("clock")


SETTINGS = (
    header_setting("endpoint", "url", False), header_setting("provider", "provider", True),
    header_setting("model", "model", True), flag_setting("arrival", True, "poisson"), flag_setting("ramp", True),
    flag_setting("total_requests", False), flag_setting("duration", False), flag_setting("warmup", True, 0),
    Setting("workload", workload_of, True), flag_setting("order", True, "in-order"), flag_setting("turns", True),
    flag_setting("trace_speed", True, 1.0), Setting("unique", lambda run: run.config.get("unique", True), True),
    flag_setting("seed", False, 0), Setting("max_tokens", lambda run: run.config.get("max_tokens", 256), True),
    flag_setting("input_tokens", True), flag_setting("prefix_tokens", True, 0), flag_setting("output_tokens", True),
    flag_setting("stream", True, True), Setting("token_mode", lambda run: run.config.get("token_mode", "usage"), True),
    flag_setting("think_tags", True, "auto"), flag_setting("body", True, {}), flag_setting("header", False, []),
    flag_setting("count_connect", True, False), flag_setting("end_optional", False, False),
    flag_setting("timeout", False, 120.0), Setting("clock", clock_of, True), flag_setting("processes", False),
    header_setting("tool_version", "tool_version", False), header_setting("python", "python", False),
)  # fmt: skip
LENGTH_APART = 0.05  # of the mean length of prompts or answers: more makes times and token rates another matter
LENGTH_ERRORS = 3.0  # standard errors that it is apart at least: a few answers differ in length by chance
CACHED_APART = 5.0  # points of the share of prompt tokens that came from a cache
SET_BY_LOAD = frozenset(("arrival",))  # says nothing of a closed loop
SAID_OTHERWISE = frozenset(("few", "clock"))  # reasons of a verdict that rows or settings say themselves


def same_setting(key: str, one: Any, other: Any) -> bool:
    """Whether two runs' values of a setting say the same; workloads by their hash where both have one."""
    if key == "workload" and not (one[2] and other[2]):
        return one[:2] == other[:2]
    if key == "workload":
        return one[2] == other[2]
    return one == other


def settings_of(runs: Sequence[ComparedRun]) -> List[Tuple[Setting, List[Any], List[bool]]]:
    """Each fact: its values, run by run, and which of them differ from the first run's."""
    found = []
    for setting in SETTINGS:
        if setting.key in SET_BY_LOAD and not any(is_open(stage.load) for run in runs for stage in run.stages):
            continue
        values = [setting.read(run) for run in runs]
        if all(value in (None, "", setting.usual) for value in values):  # nobody chose it
            continue
        found.append((setting, values, [not same_setting(setting.key, values[0], value) for value in values]))
    return found


def find_unfair(first: ComparedRun, second: ComparedRun, pairs: Sequence[ComparedPair]) -> List[Unfair]:
    """What makes a comparison of two runs unfair, the gravest first."""
    letter, found = second.letter, []  # type: Tuple[str, List[Unfair]]
    for run in (first, second):
        reasons = [reason for reason in run.summary["verdict"]["reasons"] if reason["key"] not in SAID_OTHERWISE]
        if reasons:
            found.append(Unfair("verdict", letter, {"run": run.letter, "state": run.state, "reasons": reasons}))
    for pair in pairs:
        if dict(pair.first.load) != dict(pair.second.load):
            found.append(Unfair("load", letter, {"first": pair.first.load, "second": pair.second.load}))
    for setting, values, differ in settings_of([first, second]):
        if setting.unfair and differ[1]:
            found.append(Unfair("setting", letter, {"key": setting.key, "first": values[0], "second": values[1]}))
    return found + list(unlike_lengths(letter, pairs))


def unlike_lengths(letter: str, pairs: Sequence[ComparedPair]) -> Iterator[Unfair]:
    """Prompts or answers that were longer in one run, and shares of cached tokens that are apart: the worst stage's."""
    for side in ("in_tokens", "out_tokens", "out_chars"):
        apart = []
        for pair in pairs:
            (one, error), (two, other) = (stage.means.get(side, (0.0, 0.0)) for stage in (pair.first, pair.second))
            tokens_known = "out_tokens" in pair.first.means and "out_tokens" in pair.second.means
            certain = abs(two - one) > LENGTH_ERRORS * math.hypot(error, other)
            if one and two and abs(two / one - 1.0) > LENGTH_APART and certain and not (
                side == "out_chars" and tokens_known
            ):
                apart.append((abs(math.log(two / one)), one, two, pair.first.name))
        if apart:
            _, one, two, name = max(apart, key=lambda entry: entry[0])
            yield Unfair("length", letter, {"side": side, "first": one, "second": two, "name": name,
                                            "several": len(pairs) > 1})  # fmt: skip
    shares = []
    for pair in pairs:
        blocks = [stage.figures.get("tokens", {}) for stage in (pair.first, pair.second)]
        one, two = (part_of(block.get("cached", 0), block.get("in", 0)) for block in blocks)
        shares.append((abs(two - one), one, two))
    worst = max(shares, default=(0.0, 0.0, 0.0))
    if worst[0] > CACHED_APART:
        yield Unfair("cached", letter, {"first": worst[1] / 100.0, "second": worst[2] / 100.0})


# ==================================================================================================
# 11. Load: which request belongs to which part, and when it is due
# ==================================================================================================
#
# Pure arithmetic without a clock. Every part (a process p of P on host k of n) computes the whole
# schedule and takes its share, so that parts agree without talking: host k takes the conversations i
# with i mod n = k, process p of those the ones with (i // n) mod P = p, and in the closed loop part j
# of m runs c // m + (j < c mod m) streams. Most conversations are a single request; then their number
# is the request's, which is also the last part of its id.
#
# The numbers of a stage's requests begin with its warm-up: with 8 warm-up requests the measured ones
# are 8, 9, 10, …, so that no two requests of a stage share a prompt prefix.
#
# In a closed loop a request is due when its stream is free. In an open loop the moments are drawn
# beforehand, by the seed, and do not depend on how the endpoint does: `due_times`.


class Part(NamedTuple):
    """One process's share of a run: host k of n, process p of P on it."""

    host: int = 0
    hosts: int = 1
    process: int = 0
    processes: int = 1

    def at(self, streams: int) -> Optional["Part"]:
        """This part in a stage of so many streams (0: any number), never fewer than processes; None: it sits out."""
        processes = max(1, min(self.processes, streams // self.hosts)) if streams else self.processes
        return self._replace(processes=processes) if self.process < processes else None

    def takes(self, number: int) -> bool:
        """Whether the conversation of this number is this part's."""
        return number % self.hosts == self.host and number // self.hosts % self.processes == self.process

    @property
    def number(self) -> int:
        """This part among all parts, j of m."""
        return self.host * self.processes + self.process

    @property
    def parts(self) -> int:
        """All parts of the run, m."""
        return self.hosts * self.processes


def streams_of(part: Part, concurrency: int) -> int:
    """The streams that a part runs of `concurrency`.

    >>> [streams_of(Part(process=p, processes=3), 8) for p in range(3)]
    [3, 3, 2]
    """
    share, rest = divmod(concurrency, part.parts)
    return share + (part.number < rest)


class Talk(NamedTuple):
    """A conversation of a stage: its number, the number of its first request, and how many requests it takes."""

    number: int
    first: int
    turns: int


def talks_from(first: int, last: Optional[int], turns: Callable[[int], int]) -> Iterator[Talk]:
    """The conversations whose requests are numbered from `first` to before `last`, without end when that is None.

    `turns` gives the requests that a conversation takes; the last one is cut where the numbers end.

    >>> [tuple(talk) for talk in talks_from(4, 9, lambda number: 2)]
    [(4, 4, 2), (5, 6, 2), (6, 8, 1)]
    """
    number = index = first
    while last is None or index < last:
        count = turns(number) if last is None else min(turns(number), last - index)
        yield Talk(number, index, count)
        number, index = number + 1, index + count


SHORTEST_GAP = 1e-6  # s between a trace's requests in the mean: less is no rate


def due_times(arrival: str, rate: float, seed: str) -> Iterator[float]:
    """The moments at which an open loop's conversations are due, in s from the phase's beginning, without end.

    arrival: `constant` (every 1/rate s from 0 on), `poisson` (exponential gaps, as many independent users make
    them), or `gamma:SHAPE` (gamma gaps of the same mean: burstier below shape 1, more even above).

    >>> [round(moment, 2) for moment in itertools.islice(due_times("constant", 4, ""), 3)]
    [0.0, 0.25, 0.5]
    """
    import random

    if arrival == "constant":
        yield from (number / rate for number in itertools.count())
    chance = random.Random(seed)  # of a text: the same on every Python
    shape = float(arrival.partition(":")[2] or 1.0)
    moment = 0.0
    while True:
        gap = -math.log(1.0 - chance.random()) if shape == 1.0 else chance.gammavariate(shape, 1.0 / shape)
        moment += gap / rate
        yield moment


def trace_gap(times: Sequence[float]) -> float:
    """The mean gap of a trace, in s; 1 where it has none: a single request, or all in one moment."""
    gap = times[-1] / (len(times) - 1) if len(times) > 1 else 0.0
    return gap if gap > SHORTEST_GAP else 1.0


def trace_times(times: Sequence[float], speed: float) -> Iterator[float]:
    """The moments of a trace, `speed` times as fast; it starts again one mean gap after its end.

    >>> list(itertools.islice(trace_times([0.0, 1.0, 4.0], 2.0), 5))
    [0.0, 0.5, 2.0, 3.0, 3.5]
    """
    span = trace_gap(times) * len(times)
    for lap in itertools.count():
        for moment in times:
            yield (lap * span + moment) / speed


def stage_dues(config: Config, stage: Stage, phase: str, prompts: Sequence[Prompt]) -> Iterator[float]:
    """The moments at which an open loop's conversations are due, in s from the beginning of a phase."""
    if config.arrival == "trace":
        return trace_times([prompt.at or 0.0 for prompt in prompts], config.trace_speed)
    seed = "arrival %d %d %s" % (config.seed, stage.index, phase)
    return due_times(config.arrival, stage.rps, seed)  # type: ignore[arg-type]


def trace_rate(times: Sequence[float], speed: float) -> float:
    """The mean rate of a trace, in requests per second."""
    return speed / trace_gap(times)


def ramp_delay(part: Part, stream: int, concurrency: int, ramp: Optional[float]) -> float:
    """When a part's stream begins after its phase, in s, so that all streams of the run begin evenly over `ramp`.

    >>> [ramp_delay(Part(process=1, processes=2), stream, 4, 8.0) for stream in range(2)]
    [2.0, 6.0]
    """
    return (ramp or 0.0) * (part.number + stream * part.parts) / concurrency


def begin_of(config: Config, stage: Stage) -> float:
    """When a stage begins after --start-at, in s: with a moment for each, hosts keep step without talking."""
    return stage.index * ((config.duration or 0.0) + (config.grace or 0.0))


PROBE_SECONDS, PROBE_REQUESTS = 30.0, 100  # of a probe of --find-max: at most so long, and at least so many if it can
MOST_PROBES = 24
MOST_STREAMS, MOST_RATE = 4096, 10000.0  # where --find-max gives up if nothing else bounds it


def search_maximum(first: float, most: float, step: float) -> Generator[float, bool, None]:
    """The loads to try in order to find the highest that passes; `send` tells whether the one before did.

    Doubles from `first` until a load fails or `most` is reached, then halves what lies between; two loads less than
    `step` or 5 % apart are told apart no further. The answer is tried a second time; when it fails there, the search
    goes on below it.
    """
    passed: List[float] = []
    high, load = math.inf, first
    for _ in range(MOST_PROBES):
        again = load in passed
        if not (yield load):
            high = load
            passed = [lower for lower in passed if lower < load]
        elif again:
            return
        else:
            passed.append(load)
        low = max(passed, default=0.0)
        if low >= most or high <= low + max(step, 0.05 * low) * 1.001:
            if not passed:
                return
            load = low
        else:
            load = min(most, 2.0 * low) if high == math.inf else (low + high) / 2.0
            load = float(math.ceil(load)) if step >= 1.0 else load


def search_bounds(config: Config) -> Tuple[float, float, float]:
    """Where --find-max begins, where it ends at the latest, and the smallest step between two loads."""
    if config.find_max == "rps":
        bounds = config.rps
        return bounds[0], bounds[1] if len(bounds) > 1 else MOST_RATE, bounds[0] / 64.0
    counts = config.concurrency
    return float(counts[0]), float(counts[1] if len(counts) > 1 else MOST_STREAMS), 1.0


def probe_stage(config: Config, index: int, load: float) -> Stage:
    """The stage that tries a load for --find-max."""
    own_end = config.total_requests is not None or config.duration is not None
    duration = config.duration if own_end else PROBE_SECONDS
    tokens = parse_lengths(config.input_tokens).stages[0] if config.input_tokens else None
    if config.find_max == "rps":
        cap = config.concurrency[0] if config.concurrency else 0
        total = config.total_requests if own_end else max(PROBE_REQUESTS, math.ceil(20 * load))
        return Stage(index, cap, total, duration, config.warmup, load, False, tokens)
    total = config.total_requests if own_end else max(PROBE_REQUESTS, 5 * int(load))
    return Stage(index, int(load), total, duration, config.warmup, None, False, tokens)


def plan_stages(config: Config) -> List[Stage]:
    """The stages that a configuration asks for, in order: for each length of its prompts each load."""
    cap = config.concurrency[0] if config.concurrency else 0
    loads = [(cap, rate) for rate in config.rps] or [(streams, None) for streams in config.concurrency]
    lengths: Sequence[Optional[int]] = parse_lengths(config.input_tokens).stages if config.input_tokens else [None]
    planned = itertools.product(enumerate(lengths), loads)
    return [
        Stage(
            number, streams, config.requests_per_stage(streams, rate), config.duration, config.warmup, rate,
            config.arrival == "trace", tokens, length,
        )
        for number, ((length, tokens), (streams, rate)) in enumerate(planned)
    ]


class Bounds(NamedTuple):
    """What a run comes to at the worst; None: nothing bounds it."""

    requests: Optional[int]  # warm-up included
    in_flight: int
    out_tokens: Optional[int]
    seconds: float

    def after(self, other: "Bounds") -> "Bounds":
        """This and what comes before it, one after the other."""
        requests = None if None in (self.requests, other.requests) else self.requests + other.requests  # type: ignore[operator]
        tokens = None if None in (self.out_tokens, other.out_tokens) else self.out_tokens + other.out_tokens  # type: ignore[operator]
        return Bounds(requests, max(self.in_flight, other.in_flight), tokens, self.seconds + other.seconds)


def phase_bounds(config: Config, stage: Stage, phase: str, prompts: Sequence[Prompt]) -> Bounds:
    """What a phase of a stage comes to if every request takes its whole time-out and answers as long as it may."""
    total, duration = (stage.warmup, None) if phase == "warmup" else (stage.total, stage.duration)
    turns = min(max(1 + len(prompt.turns) for prompt in prompts), config.turns or sys.maxsize)
    longest = max(config.output_tokens or prompt.output_tokens or prompt.max_tokens or config.max_tokens
                  for prompt in prompts)  # fmt: skip
    patience, streams, last = config.timeout * turns, stage.concurrency, 0.0
    if stage.rps is not None:
        dues = itertools.islice(stage_dues(config, stage, phase, prompts), total)
        due, last, crowd = count_dues(dues, math.inf if duration is None else duration, patience)
        streams = min(streams or crowd, crowd)
        total = due * turns if total is None else min(total, due * turns)
    seconds = math.inf if total is None else last + patience * math.ceil(total / max(1, streams))
    if duration is not None:
        seconds = min(seconds, duration + (config.timeout if config.grace is None else config.grace))
    in_flight = streams if total is None else min(streams, total)
    return Bounds(total, in_flight, None if total is None else total * longest, seconds + (config.ramp or 0.0))


def count_dues(dues: Iterable[float], end: float, span: float) -> Tuple[int, float, int]:
    """Of rising moments before `end`: how many, the last one, and the most that lie within any `span`.

    >>> count_dues([0.0, 1.0, 1.5, 9.0], 5.0, 1.0)
    (3, 1.5, 2)
    """
    count, last, most = 0, 0.0, 0
    within: Deque[float] = collections.deque()
    for last in itertools.takewhile(lambda due: due < end, dues):
        count += 1
        within.append(last)
        while within[0] <= last - span:
            within.popleft()
        most = max(most, len(within))
    return count, last, most


def bounds_of(config: Config, stages: Sequence[Stage], prompts: Sequence[Prompt]) -> Bounds:
    """What these stages come to at the worst."""
    whole = Bounds(0, 0, 0, 0.0)
    for stage in stages:
        if stage.warmup:
            whole = phase_bounds(config, stage, "warmup", prompts).after(whole)
        whole = phase_bounds(config, stage, "measure", prompts).after(whole)
    if config.max_total_tokens is not None and (whole.out_tokens is None or whole.out_tokens > config.max_total_tokens):
        return whole._replace(out_tokens=config.max_total_tokens)
    return whole


def planned_stages(config: Config) -> List[Stage]:
    """The stages of a run before it is made; of --find-max the most and the heaviest there can be."""
    if config.find_max is None:
        return plan_stages(config)
    most = search_bounds(config)[1]
    return [probe_stage(config, number, most) for number in range(MOST_PROBES)]


# ==================================================================================================
# 12. Connection: sockets, TLS, and the moment at which bytes arrived
# ==================================================================================================
#
# The event loop gets to a socket late when a thousand of them become readable at once; the kernel
# knows when the bytes arrived. `StampedSocket` asks for that stamp (SO_TIMESTAMPNS) and reads with
# recvmsg, so that `asyncio.open_connection(sock=…)` works as ever, with TLS too, while the stamp of
# the last read stands on the socket. It is on CLOCK_REALTIME; `Poll` measures the distance of the two
# clocks at each return of the selector, and `Connection` brings the stamp to the monotonic clock. A
# stamp that lies in the future, or before the previous one of its connection, is not believed: then
# the time of reading serves and the record says `clock: user`, as it does where there are no stamps.
#
# One read may bring several segments and has the stamp of the newest. The earlier ones arrived after
# the loop last looked: if this poll had to wait, as it returned; if it returned at once, after the
# return of the poll before. `Poll.look` is that moment, and bounds how much too late a time may be.
#
# A process that could not run when it should have been woken (a CPU quota, another thread that holds the
# interpreter's lock) returns late from a wait, and what it finds may have come at any time of it: a stamp
# well before the return gives that away, or CPU time that other threads took, and `look` is taken back to
# before the wait. A poll that doesn't wait may return late as well, and has not seen what came meanwhile:
# what follows it counts from its call.
#
# Opening is a row of steps: look the name up, connect, have the proxy put us through, agree on TLS. Each may be
# asked alone, since whoever looks for a fault wants to know at which one it ended. An https endpoint behind a proxy is
# reached by CONNECT, spoken on the stamped socket before asyncio gets it, so that the stamps stay; an http one in
# absolute form, as proxies refuse CONNECT to port 80. A proxy that is itself spoken to in TLS is refused: TLS inside
# TLS would take the socket, and with it the stamps, away from us. With several addresses the next one is tried beside
# one that lets us wait (RFC 8305), and the one that answered is the first to be tried from then on.
#
# `Connection` is the only I/O in the hot path. Once open_connection has set up the transport it takes
# the place of its StreamReader: bytes go to the receiver in the callback in which they were read,
# without waking a coroutine for each.

clock = time.monotonic  # the one clock of every interval; tests pass times in instead
SO_TIMESTAMPNS = 35 if sys.platform.startswith("linux") else None  # <asm-generic/socket.h>, not named in `socket`
SOL_SOCKET = socket.SOL_SOCKET
STAMP = struct.Struct("@ll")  # struct timespec
STAMP_SIZE, read_stamp = STAMP.size, STAMP.unpack
STAMP_SPACE = socket.CMSG_SPACE(STAMP.size) if hasattr(socket, "CMSG_SPACE") else 0
READ_SIZE = 65536  # asyncio asks for 256 KiB, whose allocation costs more than a second read would
CLOCK_JITTER = 5e-6  # two clocks can't be read at the very same moment
LONGEST_GIVEN = 1e-3  # s that the CPU may be given to others before a request: a server takes a tenth of it
LATE_WAKE = 1e-3  # s from an arrival to the return of the poll that waited for it: this process could not run
thread_time = getattr(time, "thread_time", time.process_time)  # not every Unix has it


class StampedSocket(socket.socket):
    """A TCP socket on which `stamp` is the kernel's arrival time (CLOCK_REALTIME, s) of the last read, 0 for none."""

    stamp = 0.0
    reads = 0  # distinguishes one read from the next: TLS may hand out a read in pieces
    ended = False  # the peer closed its side

    def ask_for_stamps(self) -> None:
        """Switches the kernel's stamps on where it has them."""
        if SO_TIMESTAMPNS is not None:
            with contextlib.suppress(OSError):  # no stamps: the time of reading serves
                self.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As socket.recv, noting the stamp."""
        data, ancillary, _, _ = self.recvmsg(size if size < READ_SIZE else READ_SIZE, STAMP_SPACE, flags)
        self._note(len(data), ancillary)
        return data

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> int:
        """As socket.recv_into, noting the stamp."""
        count, ancillary, _, _ = self.recvmsg_into([memoryview(buffer)[:size] if size else buffer], STAMP_SPACE, flags)
        self._note(count, ancillary)
        return count

    def _note(self, size: int, ancillary: Sequence[Tuple[int, int, bytes]]) -> None:
        if not size:
            self.ended = True
            return
        self.reads += 1
        for level, kind, data in ancillary:
            if kind == SO_TIMESTAMPNS and level == SOL_SOCKET and len(data) == STAMP_SIZE:
                seconds, nanoseconds = read_stamp(data)
                self.stamp = seconds + nanoseconds * 1e-9
                return
        self.stamp = 0.0


class ExactSelector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """A selector whose time-outs are exact: epoll rounds up to milliseconds, select on the epoll descriptor doesn't."""

    exact = selectors.DefaultSelector.__name__ == "EpollSelector"

    def select(self, timeout: Optional[float] = None) -> List[Tuple[selectors.SelectorKey, int]]:
        """As in selectors; the second question is asked only where `exact` makes it worth its while."""
        wait = timeout and timeout > 0 and self.exact
        if wait and not select.select([self.fileno()], [], [], timeout)[0]:
            return []
        return super().select(timeout)


def time_of_others() -> float:
    """CPU time in s that the other threads of this process have taken; as long we may have been kept waiting."""
    return time.process_time() - thread_time()


select_now = selectors.DefaultSelector.select  # not to wait at all is exact anyway
sched_yield: Callable[[], None] = getattr(os, "sched_yield", lambda: None)  # not every Unix has it


class Poll(ExactSelector):
    """The loop's selector, which knows when it last looked and how far apart the two clocks are.

    returned: when the last poll returned. look: since when what it brought can have arrived, if a poll that
    had to wait was woken in time; else `before`, when that poll was asked.
    offset: CLOCK_MONOTONIC - CLOCK_REALTIME in s. polls, longest: how often it was asked, and the
    longest time between a return and the next poll, which is the loop's own delay. exact: whether timers
    must not be late by up to a millisecond, as in an open loop.
    """

    exact = False

    def __init__(self) -> None:
        super().__init__()
        self.returned = self.look = self.before = self._asked = clock()
        self._waited = False
        self._others = time_of_others()
        self.resting: List[Any] = []  # receivers of this poll for whom `look` matters
        self.offset = 0.0
        self.polls = 0
        self.longest = 0.0
        self._sent_at = -1  # the poll after which a request was sent
        self._keep_until = 0.0  # until when nobody is given way to
        for _ in range(10):
            self._measure_offset(1.0)

    def select(self, timeout: Optional[float] = None) -> List[Tuple[Any, int]]:
        """As the base class; asks without waiting first, so that whether it had to wait is certain."""
        if self.resting:
            self.resting = []
        looked, seen = self.returned, self.look if self._waited else self._asked
        self._asked = clock()
        ready = select_now(self, 0)
        if ready or (timeout is not None and timeout <= 0):
            self._waited = False
            self._measure_offset(20e-6)
            busy = self.returned - looked
            self.look = self.before = seen
        else:
            self._waited = True
            busy = clock() - looked
            ready = super().select(timeout)
            self._measure_offset(20e-6)
            self.look, self.before = self._asked if self._was_kept() else self.returned, self._asked
        if busy > self.longest:
            self.longest = busy
        self.polls += 1
        return ready

    def _was_kept(self) -> bool:
        """Whether another thread may have kept this one from returning in time."""
        if threading.active_count() == 1:
            return False
        before, self._others = self._others, time_of_others()
        return self._others - before > LATE_WAKE

    def wake_was_late(self) -> None:
        """A read of this poll shows that it returned late from its wait: all of it may have come since before that."""
        self.look = self.before
        for receiver in self.resting:
            receiver.look_again(self.before)

    def give_way(self) -> None:
        """Before a request is sent: lets run who waits for this CPU, from the second one of a turn of the loop on.

        An endpoint, or a proxy, on this host may have been woken here by the request before: until it runs, its
        answer is late by what we do, which may be all of a slice (3 to 4 ms). Who takes the CPU for longer than an
        answer's beginning takes is somebody else, and is not given it again for a while.
        """
        if self._sent_at != self.polls:
            self._sent_at = self.polls
            return
        before = clock()
        if before >= self._keep_until:
            sched_yield()
            given = clock() - before
            if given > LONGEST_GIVEN:
                self._keep_until = before + 50 * given

    def _measure_offset(self, tolerance: float) -> None:
        """Notes the moment as that of the return, and reads both clocks; a reading that was interrupted is not used."""
        before = clock()
        real = time.time()
        after = clock()
        self.returned = before
        if after - before < tolerance:
            self.offset = (before + after) / 2 - real


class Path(NamedTuple):
    """What the kernel knows of a path: smoothed round trip in s, our retransmits, segments out of order."""

    rtt: Optional[float]
    retransmits: Optional[int]
    out_of_order: Optional[int]


def read_path(sock: socket.socket) -> Path:
    """TCP_INFO of a socket: bytes 68-71 (µs), 100-103 and, in newer kernels, 224-227; None what there isn't."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256) if hasattr(socket, "TCP_INFO") else b""
    except OSError:
        info = b""
    if not sys.platform.startswith("linux") or len(info) < 104:
        return Path(None, None, None)
    rtt, retransmits = struct.unpack_from("=I", info, 68)[0], struct.unpack_from("=I", info, 100)[0]
    return Path(rtt / 1e6, retransmits, struct.unpack_from("=I", info, 224)[0] if len(info) >= 228 else None)


class Spans(NamedTuple):
    """How long each step of opening a connection took, in s."""

    dns: float = 0.0
    tcp: float = 0.0
    proxy: float = 0.0
    tls: float = 0.0


NO_SPANS = Spans()


class Facts(NamedTuple):
    """What is known of an open connection: both ends, the way, TLS, and how long each step took (s).

    address, local: `10.0.0.7:443`, `[::1]:8000`. proxy: its URL without a password. certificate: the peer's, as DER.
    """

    address: str
    local: str
    proxy: Optional[str]
    tls_version: Optional[str]
    cipher: Optional[str]
    certificate: Optional[bytes]
    dns_s: float
    tcp_s: float
    proxy_s: float
    tls_s: float


class Connection(asyncio.Protocol):
    """One open connection: sends a request, and hands what arrives to its receiver with the arrival time.

    A receiver has `received(data, stamp, now, look, read, kernel)`, which says whether what it made of the read rests
    on `look` and is to be told by `look_again(look)` should that turn out too late, and `lost(clean, reason)`; see
    `Exchange`.
    """

    def __init__(
        self, sock: StampedSocket, writer: asyncio.StreamWriter, poll: Poll, connect_seconds: float,
        proxy: Optional[str] = None, spans: Spans = NO_SPANS,
    ) -> None:  # fmt: skip
        self.connect_seconds = connect_seconds
        self.used = False  # carried a request already
        self.open = True
        self.alert = ""  # why TLS ended the connection: with TLS 1.3 a client learns it after the handshake
        self.path = Path(None, None, None)
        self._socket = sock
        self._writer = writer  # kept: its end would close the transport
        self._transport = writer.transport
        self._poll = poll
        self._receiver: Any = None
        self._last = 0.0  # the previous stamp on the monotonic clock
        self._transport.set_protocol(self)
        self._proxy = proxy
        self._spans = spans

    @property
    def facts(self) -> Facts:
        """What is known of this connection; asked of the transport, so that a run pays for it only where it asks."""
        tell = self._transport.get_extra_info
        tls, version, cipher, certificate = tell("ssl_object"), None, None, None
        if tls is not None:
            with contextlib.suppress(ValueError):  # an alert has undone the handshake
                version, cipher, certificate = tls.version(), tls.cipher(), tls.getpeercert(binary_form=True)
        return Facts(
            show_address(tell("peername")), show_address(tell("sockname")), self._proxy, version,
            cipher[0] if cipher else None, certificate, *self._spans,
        )  # fmt: skip

    def send(self, payload: bytes, receiver: Any) -> float:
        """Hands a request to the kernel; returns the moment just before."""
        self._receiver = receiver
        self._poll.give_way()
        start = clock()
        self._transport.write(payload)
        return start

    def release(self) -> None:
        """The exchange is over and the connection may carry another."""
        self._receiver = None
        self.used = True

    def measure_path(self) -> Path:
        """The path's round trip now, and the retransmits and out-of-order segments since the last call."""
        before, now = self.path, read_path(self._socket)
        self.path = now
        return Path(
            now.rtt, difference(now.retransmits, before.retransmits), difference(now.out_of_order, before.out_of_order)
        )

    def close(self) -> None:
        """Closes at once: what is still buffered belongs to a request that is over."""
        self.open = False
        self._receiver = None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Called by the transport with what one read brought."""
        now = clock()
        sock, poll = self._socket, self._poll
        stamp = sock.stamp
        kernel = stamp > 0.0
        if kernel:
            stamp += poll.offset
            if stamp > now:
                kernel = stamp - now < CLOCK_JITTER
                stamp = now
            elif stamp < self._last:
                kernel = self._last - stamp < CLOCK_JITTER
                stamp = self._last if kernel else now
        else:
            stamp = now
        if kernel:  # a time of reading is no stamp: what was read late must not make the next stamp look old
            self._last = stamp
            if poll.look - stamp > LATE_WAKE:  # holds for the other connections of this poll too
                poll.wake_was_late()
        receiver = self._receiver
        if receiver is None:  # nobody asked: the connection can't be trusted with another request
            self.close()
            return
        if receiver.received(data, stamp, now, poll.look, sock.reads, kernel):
            poll.resting.append(receiver)

    def eof_received(self) -> bool:
        """The peer closed its side."""
        self._lost(True, "connection closed")
        return False

    def connection_lost(self, exc: Optional[Exception]) -> None:
        """The connection is gone."""
        if isinstance(exc, ssl.SSLError):
            self.alert = describe_tls_error(exc)
        self._lost(exc is None, "connection closed" if exc is None else self.alert or describe_os_error(exc))

    def _lost(self, clean: bool, reason: str) -> None:
        self.open = False
        receiver, self._receiver = self._receiver, None
        if receiver is not None:
            receiver.lost(clean, reason)


def show_address(address: Any) -> str:
    """A socket's address as a URL has it: `10.0.0.7:443`, `[::1]:8000`, `unix:/run/llm.sock`; "" for none.

    >>> show_address(("::1", 8000, 0, 0)), show_address(("10.0.0.7", 443))
    ('[::1]:8000', '10.0.0.7:443')
    """
    if isinstance(address, tuple) and len(address) >= 2:
        return "%s:%d" % ("[%s]" % address[0] if ":" in address[0] else address[0], address[1])
    return "unix:" + address if address and isinstance(address, str) else ""


def difference(now: Optional[int], before: Optional[int]) -> Optional[int]:
    """How much a counter grew; None where it isn't there."""
    return None if now is None else now - (before or 0)


def describe_os_error(error: BaseException) -> str:
    """An operating system's error in a few words, without addresses: `connection refused`."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    number = getattr(error, "errno", None)
    if number == errno.EMFILE:
        return "too many open files: raise `ulimit -n` or lower --concurrency"
    if number == errno.EADDRNOTAVAIL:
        return "no free local port: lower --concurrency or keep connections alive"
    if isinstance(number, int) and number > 0 and not isinstance(error, (ssl.SSLError, socket.gaierror)):
        text = os.strerror(number)
    return text[:1].lower() + text[1:]


def make_tls(config: Config) -> ssl.SSLContext:
    """The TLS settings of a configuration; raises UserError for a CA, certificate or key that can't be read."""
    try:
        if config.ca_cert and os.path.isdir(config.ca_cert):
            context = ssl.create_default_context(capath=config.ca_cert)
        else:
            context = ssl.create_default_context(cafile=config.ca_cert)
    except OSError as error:  # ssl.SSLError is one
        reason = "it is not a PEM file" if isinstance(error, ssl.SSLError) else describe_os_error(error)
        raise UserError("--ca-cert %s cannot be used: %s" % (config.ca_cert, reason)) from None
    if config.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["http/1.1"])
    if config.client_cert:
        load_client_certificate(context, config.client_cert, config.client_key)
    elif config.client_key:
        raise UserError("--client-key needs --client-cert, the certificate that the key belongs to")
    return context


def load_client_certificate(context: ssl.SSLContext, certificate: str, key: Optional[str]) -> None:
    """Has the context show this certificate to who asks for one; raises UserError."""

    def no_password() -> NoReturn:  # OpenSSL would ask on the terminal
        raise UserError("the client key %s is encrypted; decrypt it into a file of your own: openssl pkey -in %s -out "
                        "FILE" % (key or certificate, key or certificate))  # fmt: skip

    for flag, path in (("--client-cert", certificate), ("--client-key", key)):
        try:
            with open(path or os.devnull, "rb"):
                pass
        except OSError as error:
            raise UserError("%s %s cannot be read: %s" % (flag, path, describe_os_error(error))) from None
    try:
        context.load_cert_chain(certificate, key, no_password)
    except ssl.SSLError as error:
        if "MISMATCH" in (error.reason or ""):
            reason = "the key does not belong to the certificate"
        elif key:
            reason = "one of the two is not a PEM file of what it should hold"
        else:
            reason = "it is not a PEM file with a certificate and its key; --client-key FILE names a key of its own"
        flags = "--client-cert %s" % certificate + (" with --client-key %s" % key if key else "")
        raise UserError("%s cannot be used: %s" % (flags, reason)) from None


# What the other side's alert means for us, by a part of OpenSSL's name for it.
TLS_ALERTS = {
    "ALERT_CERTIFICATE_REQUIRED": "the endpoint wants a client certificate: give --client-cert and --client-key",
    "ALERT_HANDSHAKE_FAILURE": "the endpoint refuses the handshake: it may want a client certificate (--client-cert), "
    "another name (--server-name), or ciphers that this Python lacks",
    "ALERT_UNKNOWN_CA": "the endpoint does not trust who signed our client certificate (--client-cert)",
    "ALERT_BAD_CERTIFICATE": "the endpoint refuses our client certificate (--client-cert)",
    "ALERT_CERTIFICATE_EXPIRED": "the endpoint says that our client certificate has expired (--client-cert)",
    "ALERT_CERTIFICATE_REVOKED": "the endpoint says that our client certificate is revoked (--client-cert)",
    "ALERT_PROTOCOL_VERSION": "the endpoint speaks no version of TLS that this Python does",
    "UNRECOGNIZED_NAME": "the endpoint knows no such name: --server-name NAME is what it is asked for",
}


def describe_tls_error(error: BaseException) -> str:
    """Why TLS failed, with the way out where one is known."""
    text = getattr(error, "verify_message", "") or getattr(error, "reason", "") or str(error) or type(error).__name__
    text = str(text).strip()
    if "WRONG_VERSION_NUMBER" in text or "HTTP_REQUEST" in text or "RECORD_LAYER" in text:
        return "the port does not speak TLS: use http:// if it is plain HTTP"
    shouted = text.upper().replace(" ", "_")  # Python 3.7 has no names for the alerts of TLS 1.3, but their words
    meaning = next((meaning for name, meaning in TLS_ALERTS.items() if name in shouted), "")
    if meaning:
        return meaning
    if "mismatch" in text and getattr(error, "verify_message", ""):
        return "certificate: %s (--server-name NAME expects another name, --insecure takes any certificate)" % text
    if isinstance(error, ssl.SSLError) and getattr(error, "verify_message", ""):
        return "certificate: %s (--ca-cert FILE trusts a private CA, --insecure any certificate)" % text
    if isinstance(error, ssl.CertificateError):
        return "certificate: %s" % text
    return text.lower().replace("_", " ") if text.isupper() else text


def in_thread(work: Callable[[], Any]) -> asyncio.Future:
    """What `work` returns or raises, done in a thread that holds up neither the loop nor the exit."""
    loop = asyncio.get_event_loop()
    future = loop.create_future()

    def settle(value: Any, error: Optional[BaseException]) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)
            future.exception()  # nobody may be waiting any more, and asyncio would complain of it

    def run() -> None:
        value, failure = None, None  # type: Any, Optional[BaseException]
        try:
            value = work()
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=run, daemon=True).start()
    return future


def resolve(host: str, port: int) -> asyncio.Future:
    """The addresses of a host, as `getaddrinfo` gives them; OSError."""

    def ask() -> List[Any]:
        try:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        except UnicodeError:  # an empty label, or one of more than 63 letters
            raise OSError("not a host name") from None

    return in_thread(ask)


class Proxy(NamedTuple):
    """An HTTP proxy: where it listens, and the `user:password` that it wants, "" for none."""

    host: str
    port: int
    userinfo: str

    @property
    def authority(self) -> str:
        """`host:port`."""
        return show_address((self.host, self.port))

    @property
    def url(self) -> str:
        """Its URL, user and password as ***."""
        return "http://%s%s" % ("***@" if self.userinfo else "", self.authority)

    @property
    def headers(self) -> List[Tuple[str, str]]:
        """What it wants to see beside a request."""
        return [("Proxy-Authorization", basic_header(self.userinfo)[1])] if self.userinfo else []


def parse_proxy(text: str, where: str) -> Proxy:
    """The proxy that a flag or variable, `where`, names; raises UserError, which never shows the text."""
    scheme, separator, rest = text.strip().partition("://")
    scheme, rest = (scheme.lower(), rest) if separator else ("http", text.strip())
    if scheme == "https":
        raise UserError("%s: a proxy that is itself spoken to in TLS is not supported; https endpoints are reached "
                        "through one at http://HOST:PORT too" % where)  # fmt: skip
    if scheme.startswith("socks"):
        raise UserError("%s: a SOCKS proxy is not supported; give an HTTP proxy, http://HOST:PORT, or --proxy none"
                        % where)  # fmt: skip
    if scheme != "http":
        raise UserError("%s: a proxy is http://[USER:PASSWORD@]HOST:PORT" % where)
    try:
        parts = urlsplit("http://" + rest)
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port = None, 0
    if not host or CONTROL.search(rest) or " " in rest:
        raise UserError("%s: no host, or no number as port; percent-encode what is odd in user and password" % where)
    if parts.username is None:
        return Proxy(unquote(host), port, "")
    return Proxy(unquote(host), port, unquote(parts.username) + ":" + unquote(parts.password or ""))


def names_host(entry: str, host: str, port: int) -> bool:
    """Whether an entry of no_proxy, in lower case, names a host and port.

    `*` is all; `corp.example`, `.corp.example` and `*.corp.example` are that domain and what is below it; `10.0.0.7`,
    `::1` and `10.0.0.0/8` are addresses, which names are never resolved for; `:8080` behind one holds for that port.
    """
    import ipaddress

    if entry == "*":
        return True
    found = re.match(r"^(\[[^]]*\]|[^:]*):([0-9]{1,5})$", entry)
    if found and int(found.group(2)) != port:
        return False
    name = (found.group(1) if found else entry).strip("[]")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        domain = re.sub(r"^\*?\.", "", name).rstrip(".")
        return bool(domain) and (host.rstrip(".") == domain or host.rstrip(".").endswith("." + domain))
    try:
        return address in ipaddress.ip_network(name, strict=False)
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself, as its URL says it."""
    return host in ("localhost", "::1") or bool(re.match(r"^127(\.[0-9]+){3}$|.*\.localhost$", host))


class Route(NamedTuple):
    """The way to an endpoint: through a proxy or straight (None), and which setting says so."""

    proxy: Optional[Proxy]
    reason: str


def choose_route(endpoint: Endpoint, config: Config, environment: Mapping[str, str]) -> Route:
    """The way to an endpoint by --proxy, else by the proxy variables; raises UserError.

    As with curl, lower case comes first, and HTTP_PROXY does not count in a CGI program, where it is a client's header
    (CVE-2016-5385). As with Go, variables don't hold for the loopback; a --proxy does, and no_proxy is not asked.
    """
    if config.url.startswith("mock:"):
        return Route(None, "the built-in mock")
    if endpoint.unix is not None:
        if config.proxy not in ("", "none"):
            raise UserError("--proxy: a Unix socket is not reached through a proxy; leave it out")
        return Route(None, "a Unix socket")
    if config.proxy:
        return Route(None if config.proxy == "none" else parse_proxy(config.proxy, "--proxy"), "--proxy")
    scheme = endpoint.scheme + "_proxy"
    names = [scheme, scheme.upper(), "all_proxy", "ALL_PROXY"]
    if "REQUEST_METHOD" in environment and scheme == "http_proxy":
        names.remove("HTTP_PROXY")
    name = next((name for name in names if environment.get(name, "").strip()), "")
    if not name:
        return Route(None, "no proxy variable is set")
    if is_loopback(endpoint.host):
        return Route(None, "loopback")
    exempt = next((exempt for exempt in ("no_proxy", "NO_PROXY") if environment.get(exempt, "").strip()), "")
    for entry in re.split(r"[\s,]+", environment.get(exempt, "")):
        if entry and names_host(entry.lower(), endpoint.host, endpoint.port):
            return Route(None, "$%s: %s" % (exempt, entry))
    return Route(parse_proxy(environment[name], "$" + name), "$" + name)


RESOLVE = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+):([0-9]{1,5}):(\S+)$")


def parse_resolve(text: str) -> Tuple[str, int, List[str]]:
    """Host (`*`: any), port and addresses of `HOST:PORT:ADDRESS[,ADDRESS…]`; raises ValueError.

    >>> parse_resolve("llm.example:443:10.0.0.7,[2001:db8::7]")
    ('llm.example', 443, ['10.0.0.7', '2001:db8::7'])
    """
    found = RESOLVE.match(text)
    addresses = [address.strip("[]") for address in found.group(3).split(",")] if found else []
    for address in addresses:
        try:
            socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
        except OSError:
            addresses = []
            break
    if not found or not addresses or not 0 < int(found.group(2)) < 65536:
        raise ValueError("needs HOST:PORT:ADDRESS with an IP address, such as llm.example:443:10.0.0.7")
    return found.group(1).strip("[]").lower(), int(found.group(2)), addresses


def fixed_addresses(lines: Sequence[str], host: str, port: int) -> List[Any]:
    """What --resolve says of a host, as getaddrinfo would; [] when it says nothing."""
    for name, number, addresses in map(parse_resolve, lines):
        if number == port and name in ("*", host):
            ends = [(socket.AF_INET6, (text, port, 0, 0)) if ":" in text else (socket.AF_INET, (text, port))
                    for text in addresses]  # fmt: skip
            return [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", end) for family, end in ends]
    return []


def peer_of(endpoint: Endpoint, route: Route) -> Tuple[str, int]:
    """Host and port that a connection goes to: the proxy's, or the endpoint's own."""
    return (endpoint.host, endpoint.port) if route.proxy is None else route.proxy[:2]


def check_way(endpoint: Endpoint, config: Config) -> Route:
    """The way to the endpoint of --url; raises UserError for settings that have no part in it."""
    route = choose_route(endpoint, config, os.environ)
    for flag, value in (("client-cert", config.client_cert), ("client-key", config.client_key),
                        ("server-name", config.server_name)):  # fmt: skip
        if value and endpoint.scheme != "https":
            raise UserError("--%s is for TLS, which --url does not ask for: it needs https://" % flag)
    if endpoint.unix is not None and not hasattr(socket, "AF_UNIX"):
        raise UserError("--url unix: this system has no Unix sockets")
    if route.proxy is not None and fixed_addresses(config.resolve, endpoint.host, endpoint.port):
        raise UserError("--resolve: %s is looked up by the proxy (%s), not by us; --proxy none goes straight"
                        % (endpoint.host, route.reason))  # fmt: skip
    return route


def refused_by_proxy(head: Head, proxy: Optional[Proxy]) -> RequestError:
    """What a proxy's refusal means; None: a proxy of which no more is known here."""
    told = ("HTTP %d %s" % (head.status, head.reason)).strip() + " from the proxy"
    told += " " + proxy.authority if proxy is not None else ""
    if head.status in (401, 407):  # tinyproxy answers 401 to a wrong password
        offered = head.headers.get("proxy-authenticate", "")
        schemes = re.findall(r"(?i)\b(basic|digest|ntlm|negotiate|kerberos)\b", offered)
        if schemes and "basic" not in map(str.lower, schemes):
            told += ": it takes %s only, and we speak Basic" % " or ".join(dict.fromkeys(schemes))
            told += "; a local proxy that speaks it, such as cntlm or px, can stand between"
        elif proxy is not None and proxy.userinfo:
            told += ": it refuses this user or password"
        else:
            told += ": it wants a user and password that it knows, as USER:PASSWORD@ before its host in --proxy"
    return RequestError("proxy_error", told)


NEXT_ADDRESS = 0.25  # s that an address has before the next is tried beside it (RFC 8305 section 5)


def alternating(addresses: Sequence[Any]) -> List[Any]:
    """The addresses with their families taking turns, as RFC 8305 section 4 wants it; the first stays the first."""
    same = [found for found in addresses if found[0] == addresses[0][0]]
    other = [found for found in addresses if found[0] != addresses[0][0]]
    pairs = itertools.zip_longest(same, other)
    return [found for pair in pairs for found in pair if found is not None]


class Network:
    """What the connections of a part share: where to and which way, TLS, time-outs, and the resolved addresses.

    facts: those of the connection that was opened last.
    """

    def __init__(self, endpoint: Endpoint, config: Config, poll: Poll) -> None:
        self.endpoint = endpoint
        self.poll = poll
        self.route = choose_route(endpoint, config, os.environ)
        self.facts: Optional[Facts] = None
        self._timeout = config.connect_timeout
        self._tls = make_tls(config) if endpoint.scheme == "https" else None
        self._name = config.server_name or endpoint.host.partition("%")[0]  # what the certificate has to hold
        self._host, self._port = peer_of(endpoint, self.route)
        self._fixed = fixed_addresses(config.resolve, self._host, self._port)
        self._lookup: Optional[asyncio.Future] = None
        self._looked_up = 0.0
        self._best: Any = None  # the address that answered when the first did not
        proxy = self.route.proxy
        self._whom = endpoint.authority if proxy is None else "the proxy " + proxy.authority
        self._before = b"" if proxy is None or self._tls is None else encode_tunnel(endpoint, proxy)

    def encode(self, method: str, target: str, headers: Sequence[Tuple[str, str]], body: bytes = b"") -> bytes:
        """A request as it goes out this way: through a proxy without TLS in absolute form (RFC 9112 section 3.2.2).

        A signature over method and target is over the origin's form all the same: the proxy turns it back.
        """
        if self.route.proxy is not None and self._tls is None:
            target = "http://" + self.endpoint.authority + target
            if not any(name.lower() == "proxy-authorization" for name, _ in headers):
                headers = [*headers, *self.route.proxy.headers]
        return encode_request(method, target, headers, body)

    async def open(self) -> Connection:
        """A new connection, ready to carry a request; raises RequestError."""
        began = clock()
        deadline = began + self._timeout
        addresses = await self.lookup()
        looked_up = clock()
        sock = await self.connect(addresses, deadline)
        connected = clock()
        try:
            await self.tunnel(sock, deadline)
            tunnelled = clock()
            writer = await self.secure(sock, deadline)
        except BaseException:
            sock.close()
            raise
        steps = (looked_up - began, connected - looked_up, tunnelled - connected, clock() - tunnelled)
        return self.take(sock, writer, Spans(*steps))

    # The steps of `open`, each of which raises RequestError. Whoever calls them one by one closes the socket.

    async def lookup(self) -> Sequence[Any]:
        """The addresses of whom the connection goes to, as getaddrinfo gives them."""
        if self.endpoint.unix is not None:
            return [(socket.AF_UNIX, socket.SOCK_STREAM, 0, "", self.endpoint.unix)]
        if self._fixed:
            return self._fixed
        try:
            return await asyncio.wait_for(asyncio.shield(self._addresses()), self._timeout)
        except asyncio.TimeoutError:
            raise self._timed_out("resolving the host name") from None
        except OSError as error:
            whom = "" if self.route.proxy is None else "the proxy "
            raise RequestError("dns_error", "%s%s: %s" % (whom, self._host, describe_os_error(error))) from None

    async def connect(self, addresses: Sequence[Any], deadline: float) -> StampedSocket:
        """A socket connected to the first address that answers: the next is tried beside one that lets us wait."""
        if not addresses:
            raise RequestError("dns_error", "%s: no address" % self._host)
        waiting = alternating(sorted(addresses, key=lambda found: found[4] != self._best))
        running: Set[asyncio.Future] = set()
        failure: Optional[RequestError] = None
        try:
            while waiting or running:
                left = max(0.05, deadline - clock())
                if waiting:
                    running.add(asyncio.ensure_future(self._reach(waiting.pop(0), len(addresses) > 1)))
                pause = min(NEXT_ADDRESS, left / (len(waiting) + 1)) if waiting else left
                done, running = await asyncio.wait(running, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                reached = [task.result() for task in done if task.exception() is None]
                for spare in reached[1:]:
                    spare.close()
                if reached:
                    return reached[0]
                failure = next((task.exception() for task in done), failure)  # type: ignore[assignment]
                if not done and not waiting:
                    raise self._timed_out("waiting for TCP")
        finally:
            await self._give_up(running)
        raise failure  # type: ignore[misc]

    async def tunnel(self, sock: StampedSocket, deadline: float) -> None:
        """Has the proxy put us through to the endpoint, where there is one and TLS follows."""
        if not self._before:
            return
        proxy: Proxy = self.route.proxy  # type: ignore[assignment]
        told = "the proxy %s: " % proxy.authority
        loop, descriptor = asyncio.get_event_loop(), sock.fileno()
        try:
            head = await asyncio.wait_for(self._ask_proxy(sock), max(0.05, deadline - clock()))
        except asyncio.TimeoutError:
            raise self._timed_out("waiting for the answer to CONNECT") from None
        except (Truncated, ParseError) as error:
            raise RequestError("proxy_error", told + str(error)) from None
        except OSError as error:
            raise RequestError("proxy_error", told + describe_os_error(error)) from None
        finally:  # Python 3.7 leaves a reader behind that was cancelled
            loop.remove_reader(descriptor)
            loop.remove_writer(descriptor)
        if not 200 <= head.status < 300:
            raise refused_by_proxy(head, proxy)

    async def secure(self, sock: StampedSocket, deadline: float) -> asyncio.StreamWriter:
        """asyncio's transport on a connected socket, TLS included."""
        settings: Dict[str, Any] = {}
        left = max(0.05, deadline - clock())
        if self._tls is not None:
            settings = {"ssl": self._tls, "server_hostname": self._name, "ssl_handshake_timeout": left + 1}
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(sock=sock, **settings), left)
        except asyncio.CancelledError:
            raise
        except asyncio.TimeoutError:
            raise self._timed_out("waiting for TLS") from None
        except (ssl.SSLError, ssl.CertificateError) as error:
            raise RequestError("tls_error", describe_tls_error(error)) from None
        except OSError as error:
            why = describe_os_error(error)
            if self._tls is None:
                raise RequestError("connect_error", why) from None
            raise RequestError("tls_error", "during the TLS handshake: " + why) from None
        if self._tls is not None and sock.fileno() < 0:  # an alert came right behind the handshake's end
            await asyncio.sleep(0)  # the turn of the loop in which the reader is told
            why = reader.exception()
            raise RequestError("tls_error", describe_tls_error(why) if why else "closed after the TLS handshake")
        return writer

    def take(self, sock: StampedSocket, writer: asyncio.StreamWriter, spans: Spans) -> Connection:
        """The connection that these steps made; raises RequestError when the peer spoke or left before it was asked."""
        if sock.fileno() < 0:  # its end was told to the reader that `Connection` would take the place of
            raise RequestError("truncated", "connection closed before the head")
        proxy = self.route.proxy.url if self.route.proxy is not None else None
        connection = Connection(sock, writer, self.poll, sum(spans), proxy, spans)
        if sock.ended:  # before `Connection` took over, which so never hears of it
            connection.close()
            raise RequestError("truncated", "connection closed before the head")
        if sock.reads and self._tls is None:
            connection.close()
            raise RequestError("parse_error", "the peer spoke before it was asked: not an HTTP server")
        facts = connection.facts
        if self._tls is None or facts.tls_version is not None:
            self.facts = facts
        return connection

    def _addresses(self) -> asyncio.Future:
        """The peer's addresses; one look-up serves all connections of half a minute."""
        if self._lookup is None or (
            self._lookup.done() and (clock() - self._looked_up > 30 or self._lookup.exception())
        ):
            self._looked_up = clock()
            self._lookup = resolve(self._host, self._port)
        return self._lookup

    def _timed_out(self, doing: str) -> RequestError:
        whom = "" if self.route.proxy is None else " (%s)" % self._whom
        return RequestError("timeout", "connect time-out (%gs) while %s%s" % (self._timeout, doing, whom))

    async def _reach(self, found: Any, one_of_several: bool) -> StampedSocket:
        """A socket connected to this address. Cancelled when another was faster, or the time is over."""
        family, kind, protocol, _, address = found
        sock = None
        try:
            sock = StampedSocket(family, kind, protocol)
            sock.setblocking(False)
            if family != getattr(socket, "AF_UNIX", None):  # which has no stamps
                sock.ask_for_stamps()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_event_loop().sock_connect(sock, address)
        except BaseException as error:
            if sock is not None:
                sock.close()
            if not isinstance(error, OSError):
                raise
            whom = self._whom if self.endpoint.unix is None else show_address(address)
            whom += " (%s)" % show_address(address) if one_of_several else ""
            raise RequestError("connect_error", "%s: %s" % (whom, describe_os_error(error))) from None
        if one_of_several:
            self._best = address
        return sock

    @staticmethod
    async def _give_up(running: Iterable[asyncio.Future]) -> None:
        """Ends attempts that are not needed any more, and closes what they have reached meanwhile."""
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        for task in running:
            if not task.cancelled() and task.exception() is None:
                task.result().close()

    async def _ask_proxy(self, sock: StampedSocket) -> Head:
        """The head of the proxy's answer to CONNECT, behind which nothing may stand yet."""
        loop = asyncio.get_event_loop()
        await loop.sock_sendall(sock, self._before)
        data = b""
        while True:
            more = await loop.sock_recv(sock, 4096)
            if not more:
                raise Truncated("connection closed before the head")
            data += more
            if data[:5] != b"HTTP/"[: len(data)]:
                raise ParseError("not an HTTP proxy: it answers %r" % data[:60].decode("latin-1"))
            end = re.search(rb"\r?\n\r?\n", data)
            while end:
                head, data = parse_head(data[: end.start()]), data[end.end() :]
                if head.status >= 200:
                    if data and head.status < 300:
                        raise ParseError("it sends bytes behind its answer to CONNECT")
                    return head
                end = re.search(rb"\r?\n\r?\n", data)  # what went before was an interim answer
            if len(data) > HEAD_LIMIT:
                raise ParseError("the head of its answer is longer than %d bytes" % HEAD_LIMIT)


def encode_tunnel(endpoint: Endpoint, proxy: Proxy) -> bytes:
    """The request that has a proxy put us through to the endpoint (RFC 9110 section 9.3.6)."""
    try:
        host = endpoint.host.partition("%")[0].encode("ascii" if ":" in endpoint.host else "idna").decode("ascii")
    except UnicodeError:
        raise UserError("--url has no valid host; write https://HOST:PORT/…") from None
    target = show_address((host, endpoint.port))
    headers = [("Host", target), ("User-Agent", "llmbench/" + __version__), *proxy.headers]
    return encode_request("CONNECT", target, headers)


class Fetch:
    """A receiver that collects one whole response, for questions that are not measured."""

    def __init__(self) -> None:
        self.reader = ResponseReader()
        self.body = b""
        self.done: asyncio.Future = asyncio.get_event_loop().create_future()

    def received(self, data: bytes, stamp: float, now: float, look: float, read: int, kernel: bool) -> None:
        """Bytes of the response."""
        try:
            self.body += self.reader.feed(data)
        except ParseError as error:
            self._fail(RequestError("parse_error", str(error)))
            return
        if self.reader.complete and not self.done.done():
            self.done.set_result(None)
        elif len(self.body) > EVENT_LIMIT:
            self._fail(RequestError("parse_error", "the answer is longer than %d bytes" % EVENT_LIMIT))

    def lost(self, clean: bool, reason: str) -> None:
        """The connection ended."""
        try:
            if not clean:
                raise Truncated(reason)
            self.reader.end()
            if not self.done.done():
                self.done.set_result(None)
        except Truncated as error:
            self._fail(RequestError("truncated", str(error)))

    def _fail(self, error: RequestError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


async def fetch(network: Network, payload: bytes, timeout: float) -> Tuple[Head, bytes]:
    """Sends one request on a connection of its own; returns head and body, or raises RequestError."""
    connection = await network.open()
    try:
        receiver = Fetch()
        connection.send(payload, receiver)
        await asyncio.wait_for(receiver.done, timeout)
        return receiver.reader.head, receiver.body  # type: ignore[return-value]
    except asyncio.TimeoutError:
        raise RequestError("timeout", "no answer within %gs" % timeout) from None
    finally:
        connection.close()


def raise_file_limit(need: int) -> Optional[str]:
    """Raises the open-file limit to `need` descriptors where allowed; else the line that says what to do."""
    try:
        import resource
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= need:
        return None
    target = need if hard == unlimited else min(need, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    except (ValueError, OSError):
        target = soft
    if target >= need:
        return None
    return "the open-file limit is %d but %d are needed; raise it (ulimit -n %d) or lower --concurrency" % (
        target,
        need,
        need,
    )


def new_loop() -> Tuple[asyncio.AbstractEventLoop, Poll]:
    """An event loop on a `Poll`, set as the current one."""
    poll = Poll()
    loop = asyncio.SelectorEventLoop(poll)
    asyncio.set_event_loop(loop)
    return loop, poll


def close_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Ends what an interrupt left running on a loop, and closes it."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def wake_kernel_stamps() -> socket.socket:
    """A socket that keeps the kernel's stamps switched on for this run.

    The kernel switches stamping on when the first socket asks for it, but not at once: a deferred job
    does it (net_enable_timestamp). Waits up to 50 ms for the first stamp on a loopback pair.
    """
    keeper = StampedSocket(socket.AF_INET, socket.SOCK_STREAM)
    keeper.ask_for_stamps()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        keeper.connect(listener.getsockname())
        keeper.settimeout(0.05)
        peer, _ = listener.accept()
        with peer:
            deadline = clock() + 0.05
            while not keeper.stamp and SO_TIMESTAMPNS is not None and clock() < deadline:
                peer.send(b"x")
                keeper.recv(1)
    return keeper


# ==================================================================================================
# 13. Exchange: one request from its first byte to its end
# ==================================================================================================
#
# Arrived bytes with their times go in, frames are taken from them, and what a record needs is kept:
# `Exchange` knows no socket and no clock, so a test feeds it like the wire would.
#
# Hard cases, decided once:
# - The end is reached at the finish reason or [DONE]. What follows (usage, terminator) is waited for
#   at most LINGER seconds; if the connection dies or stalls there the request is ok all the same.
# - A stream with neither is truncated however cleanly its body ended, where the provider says that an
#   end is required. One that ends well without any output is `empty`.
# - An error frame ends the request as stream_error, whatever follows it.

LINGER = 5.0  # s after the end for usage and terminator; s that an interrupt leaves what is in flight


def may_begin_stream(begin: bytes) -> bool:
    """Whether an event stream may begin like this: blank, a comment or a field, cut anywhere."""
    line = begin.lstrip(b"\xef\xbb\xbf \t\r\n")
    name = re.split(rb"[:\r\n]", line, maxsplit=1)[0]
    fields = (b"data", b"event", b"id", b"retry")
    return name in (b"", *fields) or (name == line and any(field.startswith(name) for field in fields))


class Exchange:
    """One request's answer: arrived bytes and their times in, status and figures out.

    Times are seconds on the monotonic clock. `on_done` is called once, when `status` is known.
    `dead` instead of a status: the connection ended before any byte of an answer.
    """

    def __init__(self, provider: Provider, lags: Dict[int, int], on_done: Callable[[], None]) -> None:
        config = provider.config
        self.provider = provider
        self.on_done = on_done
        self.on_end: Callable[[], None] = no_call  # called when the explicit end is reached
        self.lags = lags  # histogram over all reads of a part
        self.reader = ResponseReader()
        self.parser = provider.events()
        self.decoder = provider.decoder()
        self.decoder.line = self.parser.LINE
        own = type(self.decoder).__module__ == __name__
        self.failures: Type[Exception] = ParseError if own else Exception  # code of a user's may raise anything
        self.think = ThinkTags(config.think_tags)
        self.plain: Callable[[bytes], bytes] = self.decoder.plain if self.think.settled else never_plain
        self.chunk_times: Optional[List[float]] = [] if config.record_chunks else None
        self.start = 0.0
        self.status: Optional[str] = None
        self.err: Optional[str] = None
        self.dead = False
        self.ttfb_at: Optional[float] = None
        self.output_at: Optional[float] = None  # first frame of any output
        self.content_at: Optional[float] = None  # first visible content
        self.tool_at: Optional[float] = None
        self.end_at: Optional[float] = None  # the explicit end
        self.over_at: Optional[float] = None  # when the status became known
        self.arrived = 0.0  # the last arrival
        self.chunks = self.chars = self.reasoning_chars = 0
        self.gaps: Dict[int, int] = {}
        self.gap_sum, self.gap_min, self.gap_max = 0.0, math.inf, 0.0
        self.last_output = 0.0
        self.lag = self.slack = 0.0
        self.kernel = True
        self.usage: Dict[str, int] = {}
        self.finish_reason: Optional[str] = None
        self.ended_by = ""  # "done" after [DONE]: what follows is not read
        self.first_content: Optional[Event] = None
        self.final_event: Optional[Event] = None
        self.error_raw = b""
        self.stream = True
        self.whole = bytearray()  # the body of an answer that is not a stream
        self.said: Optional[List[str]] = None  # a list: the content is kept, for the next turn of a conversation
        self.read = -1
        self.read_frames = 0
        self._slack_read = -1
        self._interim = 0
        self._begin = b""  # how the stream begins, in case that it is none
        self._consume: Callable[[bytes, float, float, float], None] = self._sniff

    # What the connection calls.

    def received(self, data: bytes, stamp: float, now: float, look: float, read: int, kernel: bool) -> bool:
        """What one read brought: it arrived at `stamp`, was read at `now`, may have been there since `look`.

        Returns whether `slack` rests on this look.
        """
        if stamp < self.arrived:  # nothing arrives before what came ahead of it
            stamp = self.arrived
        self.arrived = stamp
        if not kernel:
            self.kernel = False
        if read != self.read:
            self.read, self.read_frames = read, 0
        lag, reader = now - stamp, self.reader
        try:
            body = reader.feed(data)
            if self.ttfb_at is None or self._interim != reader.interim:
                self._note_head(stamp)
            if body:
                before = self.read_frames
                self._consume(body, stamp, now, look)
                frames = self.read_frames
                if frames > 1 and frames > before and now - look > lag:
                    lag = now - look
        except self.failures as error:
            self.error_raw = self.error_raw or data[:RAW_LIMIT]
            self.finish("parse_error", failure_text(error), stamp)
            return False
        if lag > self.lag:
            self.lag = lag
        bucket = log_bucket(lag)
        self.lags[bucket] = self.lags.get(bucket, 0) + 1
        if reader.complete and self.status is None:
            self._complete()
        return self._slack_read == read and self.read_frames > 1

    def look_again(self, look: float) -> None:
        """What the last read brought may have been there since an earlier `look` than was said."""
        if self._slack_read == self.read and self.read_frames > 1:
            self.slack = max(self.slack, self.arrived - look)

    def lost(self, clean: bool, reason: str) -> None:
        """The connection ended; `clean`: by the peer's orderly close."""
        if self.status is not None:
            return
        if not self.arrived:
            self.dead = True
            self.finish("truncated", "%s before the head" % reason, None)
        else:
            try:
                self.reader.end()
                if not clean:
                    raise Truncated("in the body")
                self._complete()
            except Truncated as error:
                if self.end_at is not None:
                    self._settle()
                    return
                head = self.reader.head
                if head is not None and head.status == 407:  # the proxy resets, for it left our body unread
                    self._refused(head)
                    return
                self._give_held()
                self.finish("truncated", "%s %s" % (reason, error), self.arrived)

    # From here on bytes become frames.

    def _note_head(self, stamp: float) -> None:
        if self._interim != self.reader.interim:  # 1xx answers are not the head
            self._interim, self.ttfb_at = self.reader.interim, None
        if self.ttfb_at is None and (self.reader.head is not None or self.reader.waiting):
            self.ttfb_at = stamp

    def _sniff(self, body: bytes, stamp: float, now: float, look: float) -> None:
        """The first body bytes decide what the answer is, since Content-Type is not trustworthy."""
        head = self.reader.head
        first = body.lstrip(b" \t\r\n\xef\xbb\xbf")[:1]
        if head is None or (not first and head.status < 300):
            if not first:
                self._consume_stream(body, stamp, now, look)  # blank lines before a stream
            return
        whole = first in b"{[<" and not (self.provider.streams and isinstance(self.parser, NDJSONParser))
        if head.status >= 300 or whole:
            self.stream = False
            self._consume = self._collect
        else:
            self._consume = self._consume_stream
            self._begin = body[:RAW_LIMIT]
        self._consume(body, stamp, now, look)

    def _collect(self, body: bytes, stamp: float, now: float, look: float) -> None:
        self.read_frames += 1
        room = EVENT_LIMIT + 1 if self.reader.head.status < 300 else RAW_LIMIT  # type: ignore[union-attr]
        self.whole += body[: room - len(self.whole)]
        if len(self.whole) > EVENT_LIMIT:
            raise ParseError("the answer is longer than %d bytes" % EVENT_LIMIT)

    def _consume_stream(self, body: bytes, stamp: float, now: float, look: float) -> None:
        data = self.parser.gather(body)
        if not data:
            return
        texts: List[bytes] = []
        if self.plain is not never_plain:
            texts, data = self.decoder.run(data)
        events = self.parser.split(data) if data else []
        if events:
            self._take(events, stamp, texts)
        elif texts:
            self._take_run(texts, stamp)
        else:
            return
        self.read_frames += len(texts) + len(events)
        if self._slack_read == self.read and self.read_frames > 1:
            self.slack = max(0.0, stamp - look)

    def _take_run(self, texts: Sequence[bytes], stamp: float) -> None:
        """The hot path: a read of content frames and nothing else."""
        outputs = self._note_texts(texts)
        self.final_event = self.decoder.event(texts[-1])
        self._note_outputs(outputs, stamp)

    def _take(self, events: Sequence[Event], stamp: float, run: Sequence[bytes] = ()) -> None:
        """All events of one read, which share its stamp, behind those of a run."""
        outputs = self._note_texts(run) if run else 0
        plain, texts = self.plain, []  # type: Callable[[bytes], bytes], List[bytes]
        wanted = self.decoder.kind
        for kind, data in events:
            text = plain(data)
            if text and kind == wanted:
                texts.append(text)
                continue
            if texts:
                outputs += self._note_texts(texts)
                texts = []
            if self.ended_by != "done" and self.status is None:
                outputs += self._read_event((kind, data), stamp)
                plain, wanted = self.plain, self.decoder.kind
        if texts:
            outputs += self._note_texts(texts)
        last = events[-1]
        if self.ended_by != "done" or last[1] != DONE:
            self.final_event = last
        elif len(events) > 1:
            self.final_event = events[-2]
        elif run:
            self.final_event = self.decoder.event(run[-1])
        if outputs:
            self._note_outputs(outputs, stamp)

    def _note_texts(self, texts: Sequence[bytes]) -> int:
        self.chars += self.decoder.note_texts(texts)
        if self.said is not None:
            self.said.append(b"".join(texts).decode("utf-8", "replace"))
        return len(texts)

    def _note_outputs(self, outputs: int, stamp: float) -> None:
        if self.chunks:
            gap = stamp - self.last_output
            bucket = log_bucket(gap)
            self.gaps[bucket] = self.gaps.get(bucket, 0) + 1
            self.gap_sum += gap
            if gap < self.gap_min:
                self.gap_min = gap
            if gap > self.gap_max:
                self.gap_max = gap
        if outputs > 1:  # frames of one read share its stamp
            self.gaps[0] = self.gaps.get(0, 0) + outputs - 1
            self.gap_min = 0.0
        self.chunks += outputs
        self.last_output = stamp
        if self.chunk_times is not None:
            self.chunk_times.extend([stamp] * outputs)

    def _read_event(self, event: Event, stamp: float) -> int:
        """The full reading of one event; returns how many output frames it held."""
        outputs = 0
        for frame in self.decoder.frames(event):
            kind = frame.kind
            if kind in OUTPUT_KINDS:
                outputs += self._output(frame, event, stamp)
            elif kind == "usage" and frame.usage:
                self.usage = frame.usage
            elif kind == "end":
                self._end(frame.text, stamp)
            elif kind == "error":
                self.error_raw = event[1][:RAW_LIMIT]
                self.finish("stream_error", frame.text, stamp)
        return outputs

    def _output(self, frame: Frame, event: Optional[Event], stamp: float) -> int:
        if frame.kind == "content" and not self.think.settled:
            pieces = self.think.feed(frame.text, stamp)
            if self.think.held == stamp:  # the slack of its read stays with the text that is held back
                self._slack_read, self.slack = self.read, 0.0
        else:
            pieces = [(frame, stamp)]
        for piece, arrived in pieces:
            self._note_output(piece, event, arrived)
            if arrived != stamp:
                self._note_outputs(1, arrived)
        if self.think.settled and self.content_at is not None:  # not before: the fast path takes no times
            self.plain = self.decoder.plain
        return sum(1 for _, arrived in pieces if arrived == stamp)

    def _note_output(self, frame: Frame, event: Optional[Event], arrived: float) -> None:
        length = len(frame.text)
        self.chars += length
        self.decoder.note_text(frame.text)
        if self.said is not None and frame.kind == "content":
            self.said.append(frame.text)
        first = self.output_at is None or (frame.kind == "content" and self.content_at is None)
        if first and arrived == self.arrived:
            self._slack_read, self.slack = self.read, 0.0
        if self.output_at is None:
            self.output_at = arrived
        if frame.kind == "reasoning":
            self.reasoning_chars += length
        elif frame.kind == "tool":
            if self.tool_at is None:
                self.tool_at = arrived
        elif self.content_at is None:
            self.content_at, self.first_content = arrived, event

    def _end(self, reason: str, stamp: float) -> None:
        if self.end_at is None:
            self.end_at = stamp
            self.on_end()
        if reason:
            self.finish_reason = self.finish_reason or reason
        else:
            self.ended_by, self.plain = "done", never_plain

    def _give_held(self) -> None:
        """What the think tags still hold back at the end is output after all."""
        for frame, arrived in self.think.rest():
            self._note_output(frame, self.final_event, arrived)
            self._note_outputs(1, arrived)

    # From here on the answer is over.

    def _complete(self) -> None:
        """The body ended well."""
        head = self.reader.head
        stamp = self.arrived
        try:
            if head.status >= 300:  # type: ignore[union-attr]
                self._refused(head)  # type: ignore[arg-type]
                return
            if not self.stream:
                self._take_whole(stamp)
            else:
                tail = self.parser.tail()
                if tail:
                    self._take(tail, stamp)
        except self.failures as error:
            self.error_raw = self.error_raw or bytes(self.whole[:RAW_LIMIT])
            self.finish("parse_error", failure_text(error), stamp)
            return
        if self.status is None:
            self._settle()

    def _settle(self) -> None:
        """Judges a stream that ended, by itself or by our patience after its explicit end."""
        self._give_held()
        required = self.provider.end_required and not self.provider.config.end_optional
        if not self.chunks and self.final_event is None and not may_begin_stream(self._begin):
            self.error_raw = self.error_raw or self._begin
            begin = self._begin[:60].decode("utf-8", "replace")
            self.finish("parse_error", "neither an event stream nor JSON: it begins with %r" % begin, self.arrived)
        elif not self.chunks:
            self.finish("empty", "the answer ended without any output", self.end_at or self.arrived)
        elif self.end_at is None and required:
            missing = "the stream ended without an end: neither finish reason nor end marker"
            self.finish("truncated", missing, self.arrived)
        else:
            if self.end_at is None:
                self.end_at = self.arrived
            if not self.usage.get("out_tokens", 1):  # beside output, none is no count
                self.usage = {key: count for key, count in self.usage.items() if key != "out_tokens"}
            self.finish("ok", None, self.end_at)

    def _take_whole(self, stamp: float) -> None:
        """A whole completion in answer to a stream request: ok without TTFT, or the error that it reports."""
        raw = bytes(self.whole)
        if raw.lstrip()[:1] == b"<":
            raise ParseError("an HTML page in place of a stream: %r" % raw[:60].decode("utf-8", "replace"))
        event = ("message", raw)
        self.final_event = event
        for frame in self.decoder.whole(parse_json(raw)):
            if frame.kind in OUTPUT_KINDS:
                self.chars += len(frame.text)
                self.decoder.note_text(frame.text)
                if self.said is not None and frame.kind == "content":
                    self.said.append(frame.text)
                self.reasoning_chars += len(frame.text) if frame.kind == "reasoning" else 0
                self.chunks += 1
            elif frame.kind == "usage" and frame.usage:
                self.usage = frame.usage
            elif frame.kind == "end":
                self.finish_reason = self.finish_reason or frame.text or None
            elif frame.kind == "error":
                self.error_raw = raw[:RAW_LIMIT]
                self.finish("stream_error", frame.text, stamp)
        if self.status is None:
            self.end_at = stamp

    def _refused(self, head: Head) -> None:
        body = bytes(self.whole)
        self.error_raw = body[:RAW_LIMIT]
        if head.status == 407:  # of a proxy that takes requests in absolute form
            error = refused_by_proxy(head, None)
            self.finish(error.status, str(error), self.arrived)
            return
        status = {401: "auth_error", 403: "auth_error", 429: "rate_limited"}.get(head.status, "http_error")
        if head.status < 400 and "location" in head.headers:
            cause = "redirect to %s, which is not followed; give that URL" % head.headers["location"][:200]
        else:
            cause = describe_body(body, self.decoder.refusal) or head.reason
        self.finish(status, "HTTP %d%s" % (head.status, ": " + cause if cause else ""), self.arrived)

    def deadline(self) -> Tuple[float, str]:
        """Until when the answer may take as things stand, and which time-out that is."""
        config = self.provider.config
        if self.end_at is not None:
            return self.end_at + LINGER, "linger"
        limits = [(self.start + config.timeout, "time-out (%gs) for the whole request" % config.timeout)]
        if config.ttft_timeout and self.output_at is None:
            limits.append(
                (self.start + config.ttft_timeout, "time-out (%gs) for the first output" % config.ttft_timeout)
            )
        if config.idle_timeout:
            limits.append(
                (max(self.arrived, self.start) + config.idle_timeout, "idle time-out (%gs)" % config.idle_timeout)
            )
        return min(limits)

    def expire(self, now: float, which: str) -> None:
        """A deadline passed."""
        if which == "linger":
            self._settle()
        else:
            self.finish("timeout", which, now)

    def finish(self, status: str, err: Optional[str], at: Optional[float]) -> None:
        """Ends the request; only the first call counts."""
        if self.status is None:
            self.status, self.err, self.over_at = status, err, at
            self.plain = never_plain
            self.on_done()

    def reusable(self) -> bool:
        """Whether the connection may carry another request."""
        return self.reader.reusable() and self.status not in ("cancelled", "timeout", "parse_error", "stream_error")


def failure_text(error: Exception) -> str:
    """What could not be read, or how the code of a provider's file failed on it."""
    return str(error) if isinstance(error, ParseError) else "the provider's code failed: " + where_it_failed(error, "")


def no_call() -> None:
    """Stands in for a callback that nobody asked for."""


def never_plain(_: bytes) -> bytes:
    """Stands in for Decoder.plain where nothing may take the fast path."""
    return b""


def describe_body(body: bytes, refusal: Callable[[Any], Optional[str]] = Decoder().refusal) -> str:
    """What an error body says, in one line: its JSON error, also inside an event stream, or its first words."""
    datas = [body]
    if may_begin_stream(body):  # DashScope's refusals are, under whatever Content-Type
        parser = LooseSSEParser()
        datas += [data for _, data in [*parser.feed(body), *parser.tail()]]
    for data in datas:
        with contextlib.suppress(ValueError, RecursionError):
            return refusal(json.loads(data.decode("utf-8", "replace"))) or ""
    text = re.sub(
        r"<(script|style)[^>]*>.*?</\1>|<[^>]*>", " ", body[:4096].decode("utf-8", "replace"), flags=re.S | re.I
    )
    return " ".join(text.split())[:200]


def event_text(event: Optional[Event]) -> Optional[str]:
    """An event as it stood on the wire, at most RAW_LIMIT bytes of it."""
    if event is None:
        return None
    kind, data = event
    field = "" if kind == STRAY else "data: "
    lines = [field + line for line in data[:RAW_LIMIT].decode("utf-8", "replace").split("\n")]
    text = "\n".join((["event: " + kind] if kind not in ("message", STRAY) else []) + lines)
    return text.encode("utf-8", "replace")[:RAW_LIMIT].decode("utf-8", "ignore")


# ==================================================================================================
# 14. Runner: load, prompts and connections to records
# ==================================================================================================
#
# `Runner` knows two kinds of load. In a closed loop each of N streams sends its next request when the
# last one ended. In an open loop a request goes out when it is due, on a stream that is free or a new
# one, however the endpoint does; under a cap it waits in a queue, which its record tells apart from
# our own delay (`capped_ms`), and what never got out is recorded as dropped. Connections are opened
# before a phase's clock starts, so that the first wave goes out at once. Records go to a sink that the
# runner is given, as each request ends.
#
# Hard cases, decided once:
# - An idle connection that turns out dead before any byte of an answer is replaced once: `start` is
#   taken anew and the record says `retried`.
# - A 400 that our own fields may have caused gets one probe without them; when that works, what was
#   refused is sent again, and the run says so.

AUTH_FAILURES = 3  # refused in a row from the start: the token is wrong, and more requests won't mend it
WRITE_BATCH = 8  # records that are written before the loop looks at its sockets again
START_BATCH = 16  # streams of a first wave that start before the loop looks at what the others were sent
BACK_OFF = 0.1  # s that a stream waits after a connection failed, so that a dead endpoint isn't hammered
OPEN_AHEAD = 64  # connections that an open loop without a cap opens at most before it begins
SPARE_STREAMS = 4  # of an open loop: idle connections at hand, so that the next request need not open its own


@dataclass
class Progress:
    """What a live line shows of a running stage."""

    stage: int = 0
    stages: int = 1  # 0: nobody knows
    concurrency: int = 1
    phase: str = "measure"
    total: Optional[int] = None
    duration: Optional[float] = None
    began: float = 0.0
    done: int = 0
    ok: int = 0
    failed: int = 0
    dropped: int = 0
    in_flight: int = 0
    tokens: int = 0
    chars: int = 0
    ttft: Dict[int, int] = field(default_factory=dict)  # log-scaled histogram
    notes: List[str] = field(default_factory=list)  # what is said once, in lines of their own
    rps: Optional[float] = None
    waiting: int = 0  # due, but held back by the cap
    all_done: int = 0  # from here on of all phases so far
    all_failed: int = 0
    all_tokens: int = 0  # of prompts and answers


class Phase(NamedTuple):
    """The warm-up or the measurement of a stage, as one part runs it."""

    stage: Stage
    name: str  # "warmup" or "measure"
    part: Part
    talks: Iterator[Talk]
    began: float
    deadline: Optional[float]  # when it stops to start requests


class Job(NamedTuple):
    """One request to be made: the prompt as it is sent, and its bytes."""

    sent: Prompt
    request_id: str
    payload: bytes
    in_bytes: int
    version: int
    request: Optional[HTTPRequest] = None  # to be signed when it is sent; there is no payload then


class Due(NamedTuple):
    """A conversation of an open loop that is due; job: its first request, where it was made ahead."""

    talk: Talk
    moment: float
    job: Optional[Job] = None


@dataclass
class Stream:
    """One of those that a load keeps busy: its connection, and what it is doing."""

    number: int
    connection: Optional[Connection] = None
    exchange: Optional[Exchange] = None
    talk: Optional[Talk] = None  # the first one, made ready before the clock starts
    job: Optional[Job] = None
    task: Optional[asyncio.Task] = None
    opening: bool = False


class Attempt(NamedTuple):
    """What one sending of a request came to."""

    exchange: Exchange
    reused: bool  # the connection had carried a request before
    connect: float  # s that opening the connection took, whenever that was
    opened: Optional[float]  # s of it spent after the request was due; None when it was open already
    path: Path
    freed: float  # when its stream became free for the next request


class Runner:
    """Runs the stages of one part and hands each finished record to `sink`."""

    def __init__(
        self, config: Config, provider: Provider, endpoint: Endpoint, prompts: Sequence[Prompt], part: Part, poll: Poll,
        sink: Callable[[Dict[str, Any]], None], together: Optional[Callable[[], Awaitable[float]]] = None,
        shape: Optional[Shape] = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.provider = provider
        self.endpoint = endpoint
        self.prompts = prompts
        self.part = part
        self.poll = poll
        self.sink = sink
        self._shaper = None if shape is None else Shaper(shape)
        self._together = together  # waits for the other parts; gives the moment at which a phase begins
        self.network = Network(endpoint, config, poll)
        self.progress = Progress()
        self.zero = 0.0  # the run's zero on the monotonic clock
        self.epoch = 0.0  # CLOCK_REALTIME - CLOCK_MONOTONIC, in s
        self.reason = "done"  # why the run ended
        self.stopping = False
        self._ending = False  # what was in flight has been cancelled
        self.lags: Dict[int, int] = {}
        self.secrets = secrets_of(config, endpoint)
        self._keeper: Optional[TokenKeeper] = None
        self._streams: List[Stream] = []
        self._finished: Deque[Tuple[Record, Optional[Attempt], float]] = collections.deque()  # not yet written
        self._wake: Optional[asyncio.Future] = None  # the writer waits for it
        self._written_at = self._written = 0  # records written in this turn of the loop
        self._failure: Optional[Exception] = None
        self._failures_seen: set = set()
        self._sampled = False
        self._auth_failures = 0
        self._dialect_lock: Optional[asyncio.Lock] = None
        self._accepted = -1  # the version of the dialect that the endpoint took
        self._ahead: Optional[asyncio.Future] = None  # connections being opened before a phase
        self._sleepers: set = set()
        self._audit: Optional[Audit] = None
        self._tasks: Set[asyncio.Task] = set()  # of an open loop
        self._opening = False  # a spare connection
        self._idle: List[Stream] = []  # of an open loop: the last one in is the first one out
        self._backlog: Deque[Due] = collections.deque()  # of an open loop: due, but held back by the cap

    async def run(self, stages: Iterable[Stage]) -> None:
        """All stages in order; returns when the last record is written."""
        self.begin()
        for stage in stages:
            if self.stopping:
                break
            await self.run_stage(stage)

    def begin(self) -> None:
        """Before the first stage, inside the loop: what ties the run to the clocks."""
        self.zero = self.zero or clock()
        self.epoch = time.time() - clock()
        self._dialect_lock = asyncio.Lock()

    def stop(self, reason: str, patience: Optional[float] = LINGER) -> None:
        """Starts nothing new; what is in flight gets `patience` seconds (None: as long as it takes)."""
        if not self.stopping:
            self.stopping, self.reason = True, reason
        for waiting in [*self._sleepers, self._ahead]:
            if waiting is not None:
                waiting.cancel()
        if patience is not None:
            asyncio.get_event_loop().call_later(patience, self.cancel, "interrupted")

    def cancel(self, why: str) -> None:
        """Ends what is in flight now, as cancelled; nothing of it is sent again."""
        now = clock()
        self._ending = True
        for stream in self._streams:
            if stream.exchange is not None:
                stream.exchange.finish("cancelled", why, now)
            elif stream.opening and stream.task is not None:
                stream.task.cancel()

    def sample(self, stage: Stage) -> bytes:
        """The first request of a stage as it would be sent."""
        return self._payload(self._first_job(stage, Talk(0, 0, 1)))

    async def ask(self, prompt: Prompt, name: str) -> Record:
        """Sends one prompt outside of any stage, as the run would, and gives its record, of phase `probe`."""
        self.begin()
        stage, due = Stage(0, 1, 1, None, 0), clock()
        request_id = "%s-%s" % (self.config.run_id, name)
        sent = make_unique(prompt, request_id) if self.config.unique else prompt
        stream = Stream(0, task=asyncio.current_task())
        self._streams = [stream]
        phase = Phase(stage, "probe", self.part, iter(()), due, None)
        record, attempt = await self._perform(
            stream, phase, self._make_job(sent, request_id, self.provider.dialect), due
        )
        if attempt is not None:
            self._fill(record, attempt, due)
        self._finish_record(record)
        if stream.connection is not None:
            stream.connection.close()
        return record

    # One stage.

    async def run_stage(self, stage: Stage) -> None:
        """Warm-up and measurement of one stage."""
        part = self.part.at(stage.concurrency)
        streams = streams_of(part, stage.concurrency or self._open_ahead_of(stage)) if part else 0
        self._streams = [Stream(number) for number in range(streams)]
        self._idle, self._backlog = [], collections.deque()
        self.lags = {}
        self.poll.exact = ExactSelector.exact and stage.rps is not None
        if self.part.number == 0:
            self.sink({"stage": stage.described()})
        try:
            for name, first, total in (("warmup", 0, stage.warmup), ("measure", stage.warmup, stage.total)):
                if total != 0 and not self.stopping:
                    await self._run_phase(stage, name, part, first, total)
        finally:
            for stream in self._streams:
                if stream.connection is not None:
                    stream.connection.close()
            await asyncio.sleep(0)  # lets the transports close their sockets

    @staticmethod
    def _open_ahead_of(stage: Stage) -> int:
        """The connections that an open loop without a cap begins with: those of a second's requests."""
        return max(SPARE_STREAMS, min(OPEN_AHEAD, math.ceil(stage.rps or 0)))

    def _talks(self, part: Optional[Part], first: int, total: Optional[int]) -> Iterator[Talk]:
        """This part's conversations of a phase."""
        talks = talks_from(first, None if total is None else first + total, self._turns_of)
        return (talk for talk in talks if part.takes(talk.number)) if part is not None else iter(())

    async def _run_phase(self, stage: Stage, name: str, part: Optional[Part], first: int, total: Optional[int]) -> None:
        self._ending = False
        talks = self._talks(part, first, total)
        busy = self._streams
        if stage.rps is None:
            for stream in self._streams:
                stream.talk = next(talks, None)
                stream.job = self._first_job(stage, stream.talk) if stream.talk is not None else None
            busy = [stream for stream in self._streams if stream.talk is not None]
        await self._open_connections(busy)
        share = self._share_of(stage, name, first)  # before the clock starts: it may take a while
        began = await self._begin_together(stage, first == 0)
        audit = self._audit = Audit(began, self.poll) if name == "measure" else None
        self._show_phase(stage, name, began, share)
        deadline = began + stage.duration if stage.duration is not None and name == "measure" else None
        phase = Phase(stage, name, part or self.part, talks, began, deadline)
        grace = self._end_at(deadline)
        load = self._keep_busy(phase, busy) if stage.rps is None else self._send_when_due(phase)
        await self._run_load(load)
        if grace is not None:
            grace.cancel()
        if audit is not None and part is not None:
            audited = audit.finish(clock(), stage.index, self.part.number, self.progress, self.lags)
            if self.network.facts is not None:
                audited["network"] = told_of(self.network.facts)
            self.sink({"audit": audited})

    async def _run_load(self, load: Coroutine[Any, Any, None]) -> None:
        """Lets a load run to its end, and writes what it finishes."""
        writer = asyncio.get_event_loop().create_task(self._write_finished())
        try:
            await load
        finally:
            await self._finish_writing(writer)

    async def _keep_busy(self, phase: Phase, busy: Sequence[Stream]) -> None:
        """The closed loop."""
        loop = asyncio.get_event_loop()
        for number, stream in enumerate(busy):
            stream.task = loop.create_task(self._live(stream, phase))
            if number % START_BATCH == START_BATCH - 1:
                await asyncio.sleep(0)
        if busy:
            await self._wait_for([stream.task for stream in busy])  # type: ignore[misc]

    async def _begin_together(self, stage: Stage, first: bool) -> float:
        """The moment at which a phase begins: now, with other parts when all are ready, or when --start-at says."""
        began = clock() if self._together is None else await self._together()
        if self.config.start_at is not None and first:
            began = max(began, self.zero + begin_of(self.config, stage))
        await self._pause(began - clock())
        return began

    async def _wait_for(self, tasks: Sequence[asyncio.Task]) -> None:
        """Until all streams are done. One that fails (a full disk, a bug) ends the others; its exception is raised."""
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            self.stop("failed", 0.0)
            await asyncio.wait(pending)
        failures = [task.exception() for task in tasks]  # all are asked, or asyncio complains of them
        for failure in filter(None, failures):
            raise failure

    def _end_at(self, deadline: Optional[float]) -> Optional[asyncio.TimerHandle]:
        """Arranges that what is still in flight at the end of the grace is cancelled."""
        if deadline is None:
            return None
        grace = self.config.timeout if self.config.grace is None else self.config.grace
        return asyncio.get_event_loop().call_at(deadline + grace, self.cancel, "past the grace of %gs" % grace)

    def _share_of(self, stage: Stage, name: str, first: int) -> Optional[int]:
        """How many requests of a phase are this part's; None when only time ends it."""
        total = stage.warmup if name == "warmup" else stage.total
        if total is None or self.part.parts == 1:
            return total
        return sum(talk.turns for talk in self._talks(self.part.at(stage.concurrency), first, total))

    def _show_phase(self, stage: Stage, name: str, began: float, share: Optional[int]) -> None:
        fresh = Progress(
            stage.index, self.progress.stages, stage.concurrency, name, share, stage.duration, began, rps=stage.rps
        )
        for kept in ("notes", "all_done", "all_failed", "all_tokens"):
            setattr(fresh, kept, getattr(self.progress, kept))
        self.progress.__dict__.update(fresh.__dict__)

    async def _open_connections(self, streams: Sequence[Stream]) -> None:
        """Opens the streams' connections before the clock starts; what fails here fails again, as a record."""
        missing = [stream for stream in streams if stream.connection is None or not stream.connection.open]
        gate = asyncio.Semaphore(64)  # a listener's backlog is often 128
        failed: List[Stream] = []

        async def open_one(stream: Stream) -> None:
            async with gate:
                if not (self.stopping or failed):
                    try:
                        stream.connection = await self.network.open()
                    except RequestError:
                        failed.append(stream)  # the others open theirs when due: time-outs would add up

        if missing and not self.stopping:
            self._ahead = asyncio.gather(*(open_one(stream) for stream in missing))
            with contextlib.suppress(asyncio.CancelledError):  # the run was stopped
                await self._ahead
            self._ahead = None

    def _may_start(self, phase: Phase, moment: float) -> bool:
        """Whether a request may still begin at a moment."""
        return not self.stopping and (phase.deadline is None or moment < phase.deadline)

    async def _live(self, stream: Stream, phase: Phase) -> None:
        """The life of a closed loop's stream: one conversation after the other until there is none or time is up."""
        delay = ramp_delay(phase.part, stream.number, phase.stage.concurrency, self.config.ramp)
        due = phase.began + delay
        if delay and self._may_start(phase, due):
            await self._pause(due - clock())
        while self._may_start(phase, due):
            talk = stream.talk or next(phase.talks, None)
            stream.talk = None
            if talk is None:
                return
            due = await self._converse(stream, phase, talk, due)

    async def _converse(self, stream: Stream, phase: Phase, talk: Talk, due: float, capped: float = 0.0) -> float:
        """The requests of a conversation, each when the one before it was answered; when its stream became free.

        A turn carries what the endpoint answered to those before it. One that fails ends the conversation.
        """
        job = stream.job or self._first_job(phase.stage, talk)
        stream.job = None
        freed = due
        for turn in range(1, talk.turns + 1):
            self.progress.in_flight += 1
            record, attempt = await self._perform(stream, phase, job, freed)
            self.progress.in_flight -= 1
            if turn > 1:
                record.turn = turn
            elif capped > 0.0:
                record.capped_ms = milliseconds(capped)
            self._hand_over(record, attempt, freed)
            if attempt is None:
                if not self.stopping:
                    await self._pause(BACK_OFF)
                return clock()
            freed = attempt.freed
            if turn == talk.turns or attempt.exchange.status != "ok" or not self._may_start(phase, freed):
                break
            sent = next_turn(job.sent, "".join(attempt.exchange.said or ()))
            assert sent is not None, "a talk has no more turns than its prompt"
            job = self._make_job(sent, self._request_id(phase.stage, talk.first + turn), self.provider.dialect)
        return freed

    # The open loop.

    async def _send_when_due(self, phase: Phase) -> None:
        """Sends each request when it is due; returns when the last one is over."""
        self._idle = self._streams[::-1]
        for due in self._dues(phase):
            await self._pause(due.moment - clock())
            if not self._may_start(phase, due.moment):
                break
            stream = self._free_stream(phase)
            if stream is None:
                self._backlog.append(due._replace(job=None))  # the queue may become long: it holds no bodies
                self.progress.waiting = len(self._backlog)
            else:
                stream.task = self._start(self._serve(stream, phase, due))
                self._keep_spares(phase)
        if phase.deadline is not None and self._backlog:
            await self._pause(phase.deadline - clock())
            self._drop_backlog(phase, "the duration was over")
        if self._tasks:
            await self._wait_for(list(self._tasks))
        self._drop_backlog(phase, "the run was stopped")

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task:
        """A task that is forgotten when it ends well; one that fails ends the run, and is asked why at the end."""
        task = asyncio.get_event_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task) -> None:
        if task.cancelled() or task.exception() is None:
            self._tasks.discard(task)
        else:
            self.stop("failed", 0.0)

    def _dues(self, phase: Phase) -> Iterator[Due]:
        """This part's conversations with the moments at which they are due; each is made ready ahead of its own."""
        stage, name = phase.stage, phase.name
        offsets = stage_dues(self.config, stage, name, self.prompts)
        number = 0 if name == "warmup" else stage.warmup  # of the next offset
        for talk in phase.talks:
            moment = phase.began + next(itertools.islice(offsets, talk.number - number, None))
            number = talk.number + 1
            if phase.deadline is not None and moment >= phase.deadline:
                return
            yield Due(talk, moment, self._first_job(stage, talk))

    def _add_stream(self) -> Stream:
        stream = Stream(len(self._streams))
        self._streams.append(stream)
        return stream

    def _free_stream(self, phase: Phase) -> Optional[Stream]:
        """A stream that may send now: an idle one, if possible with an open connection, or a new one."""
        idle = self._idle
        for position in range(len(idle) - 1, -1, -1):
            connection = idle[position].connection
            if connection is not None and connection.open:
                return idle.pop(position)
        if idle:
            return idle.pop()
        return self._add_stream() if not phase.stage.concurrency else None  # a cap's streams were made at the start

    def _keep_spares(self, phase: Phase) -> None:
        """Opens a connection ahead when few idle ones are left: opening it when a request is due would delay that."""
        if len(self._idle) < SPARE_STREAMS and not phase.stage.concurrency and not self._opening:
            self._opening = True
            self._start(self._open_spare())

    async def _open_spare(self) -> None:
        stream = self._add_stream()
        with contextlib.suppress(RequestError):  # the request that needs it will fail again, as a record
            stream.connection = await self.network.open()
        self._opening = False
        self._idle.append(stream)

    async def _serve(self, stream: Stream, phase: Phase, due: Optional[Due]) -> None:
        """One stream of an open loop: the conversation that is due, then those that wait in the queue."""
        capped = 0.0
        while due is not None:
            stream.job = due.job
            freed = await self._converse(stream, phase, due.talk, due.moment, capped)
            due = None
            if self._backlog and self._may_start(phase, clock()):
                due = self._backlog.popleft()
                self.progress.waiting = len(self._backlog)
                capped = freed - due.moment
        self._idle.append(stream)

    def _drop_backlog(self, phase: Phase, why: str) -> None:
        """Records what waits in the queue as dropped."""
        while self._backlog:
            due = self._backlog.popleft()
            request_id = self._request_id(phase.stage, due.talk.first)
            record = self._new_record(request_id, self._prompt_of(due.talk.number), phase.name, phase.stage)
            record.status, record.err = "dropped", "due, but never sent: " + why
            record.scheduled_ms = milliseconds(due.moment - self.zero)
            self._finish_record(record)
        self.progress.waiting = 0

    def _hand_over(self, record: Record, attempt: Optional[Attempt], due: float) -> None:
        """Writes a finished request's record at once; when many end in one turn of the loop, those behind wait."""
        if self._written_at != self.poll.polls:
            self._written_at, self._written = self.poll.polls, 0
        self._finished.append((record, attempt, due))
        crowded = len(self._finished) > len(self._streams)  # never more than one record a stream may wait
        if crowded or (self._written < WRITE_BATCH and len(self._finished) == 1):
            self._written += 1
            self._write_next()
        elif self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _write_finished(self) -> None:
        """Writes the records that wait, a few a turn of the loop: sending and reading come first."""
        try:
            while True:
                while self._finished:
                    for _ in range(min(WRITE_BATCH, len(self._finished))):
                        self._write_next()
                    await asyncio.sleep(0)
                self._wake = asyncio.get_event_loop().create_future()
                await self._wake
        except asyncio.CancelledError:
            raise
        except Exception as error:  # raised again when the streams have ended
            self._failure = error
            self.stop("failed", 0.0)

    def _write_next(self) -> None:
        record, attempt, due = self._finished.popleft()
        if attempt is not None:
            self._fill(record, attempt, due)
        self._finish_record(record)

    async def _finish_writing(self, writer: asyncio.Task) -> None:
        """The phase is over: what is still to be written, and the writer's failure if it had one."""
        writer.cancel()
        await asyncio.wait([writer])
        if self._failure is not None:
            raise self._failure
        while self._finished:
            self._write_next()

    async def _pause(self, seconds: float) -> None:
        """Sleeps, if only for a turn of the loop, until the time is over or the run is stopped."""
        if self.stopping:
            return
        sleeper = asyncio.ensure_future(asyncio.sleep(seconds))
        self._sleepers.add(sleeper)
        try:
            await sleeper
        except asyncio.CancelledError:
            pass
        finally:
            self._sleepers.discard(sleeper)

    # One request.

    def _request_id(self, stage: Stage, index: int) -> str:
        return "%s-%d-%d" % (self.config.run_id, stage.index, index)

    def _prompt_of(self, number: int) -> Prompt:
        """The prompt of a conversation."""
        return self.prompts[order_index(self.config.order, self.config.seed, len(self.prompts), number)]

    def _turns_of(self, number: int) -> int:
        """How many requests a conversation takes."""
        turns = 1 + len(self._prompt_of(number).turns)
        return turns if self.config.turns is None else min(turns, self.config.turns)

    def _first_job(self, stage: Stage, talk: Talk) -> Job:
        """The first request of a conversation."""
        prompt, request_id = self._prompt_of(talk.number), self._request_id(stage, talk.first)
        if self._shaper is not None:
            name = "%d-%d" % (stage.index, talk.number)
            prompt = self._shaper.prompt(prompt, stage.length, name, talk.number)
        sent = make_unique(prompt, request_id) if self.config.unique else prompt
        return self._make_job(sent, request_id, self.provider.dialect)

    def _make_job(self, sent: Prompt, request_id: str, dialect: Dialect) -> Job:
        request = self.provider.request(sent, self.endpoint, request_id, dialect)
        if self.provider.auth.per_request:
            return Job(sent, request_id, b"", len(request.body), dialect.version, request)
        payload = self.network.encode("POST", request.target, request.headers, request.body)
        return Job(sent, request_id, payload, len(request.body), dialect.version)

    def _payload(self, job: Job) -> bytes:
        """A job's bytes as they are sent now."""
        return job.payload if job.request is None else sign_now(self.network, self.provider, job.request)

    def keep_token(self, keeper: TokenKeeper) -> None:
        """Masks each token that the keeper gets, and tells it when one is refused."""
        self._keeper = keeper
        self.provider.auth.explaining = False  # nobody looks
        keeper.changed = self._learn_secrets
        self._learn_secrets()

    def _learn_secrets(self) -> None:
        self.secrets = secrets_of(self.config, self.endpoint)

    def _new_record(self, request_id: str, prompt: Prompt, phase: str, stage: Stage) -> Record:
        return Record(request_id, prompt.id, phase, stage.index, self.config.shard, self.provider.name)

    async def _perform(self, stream: Stream, phase: Phase, job: Job, due: float) -> Tuple[Record, Optional[Attempt]]:
        """One request, sent again after a dead idle connection or in another dialect.

        Returns its record, and the attempt that still has to be filled into it; None when it was never sent.
        """
        record = self._new_record(job.request_id, job.sent, phase.name, phase.stage)
        record.scheduled_ms = milliseconds(due - self.zero)
        record.in_bytes = job.in_bytes
        record.in_tokens_target = job.sent.input_tokens
        record.out_tokens_target = self.config.output_tokens or job.sent.output_tokens
        while True:
            try:
                attempt = await self._attempt(stream, job, due)
            except RequestError as error:
                record.status, record.err = error.status, error.args[0]
                record.end_ts = iso_time(clock() + self.epoch)
                return record, None
            except asyncio.CancelledError:
                record.status, record.err = "cancelled", "while connecting"
                record.end_ts = iso_time(clock() + self.epoch)
                return record, None
            exchange = attempt.exchange
            if exchange.dead and attempt.opened is None and not record.retried and not self._closing():
                record.retried = True
                continue
            if exchange.status == "http_error" and exchange.reader.head.status == 400:  # type: ignore[union-attr]
                again = await self._negotiate(phase.stage, job, exchange)
                if again is not None:
                    job = again
                    record.in_bytes = job.in_bytes
                    continue
                attempt = attempt._replace(freed=clock())  # finding that out took its time
            if exchange.status == "ok":
                self._accepted = job.version
            return record, attempt

    async def _attempt(self, stream: Stream, job: Job, due: float) -> Attempt:
        """Sends a job on the stream's connection, opened if need be, and waits for the end."""
        connection, opened = stream.connection, None
        if connection is None or not connection.open:
            stream.connection, stream.opening = None, True
            try:
                began = clock()
                connection = stream.connection = await self.network.open()
                opened = clock() - max(began, due)
            finally:
                stream.opening = False
        done = asyncio.get_event_loop().create_future()
        exchange = Exchange(self.provider, self.lags, lambda: done.done() or done.set_result(clock()))
        stream.exchange = exchange
        if job.sent.turns:
            exchange.said = []
        exchange.start = connection.send(self._payload(job), exchange)
        watch = Watch(exchange)
        try:
            freed = await done
        finally:
            watch.stop()
            stream.exchange = None
        if exchange.dead and not connection.used:
            self._blame_tls(stream, connection, exchange)
        path = connection.measure_path()
        attempt = Attempt(exchange, connection.used, connection.connect_seconds, opened, path, freed)
        if exchange.reusable() and connection.open:
            connection.release()
        else:
            connection.close()
            stream.connection = None
        return attempt

    def _blame_tls(self, stream: Stream, connection: Connection, exchange: Exchange) -> None:
        """Says why a new connection ended unused, where TLS may be it: a refusal of 1.3 comes after the handshake."""
        if connection.alert:
            connection.close()
            stream.connection = None
            raise RequestError("tls_error", connection.alert)
        facts = self.network.facts
        if facts is not None and facts.tls_version == "TLSv1.3" and not self.config.client_cert:
            exchange.err = "%s, right after the TLS handshake: an endpoint that wants a client certificate " \
                "(--client-cert) does that" % exchange.err

    def _closing(self) -> bool:
        """Whether nothing may be sent any more."""
        return self.stopping or self._ending

    async def _negotiate(self, stage: Stage, job: Job, exchange: Exchange) -> Optional[Job]:
        """After a 400: the job in the dialect that the endpoint takes, found by a probe; None when that isn't it."""
        async with self._dialect_lock:  # type: ignore[union-attr]
            dialect = self.provider.dialect
            if dialect.version == job.version and self._accepted != job.version:
                candidate = await self._find_dialect(stage, job, bytes(exchange.whole))
                if candidate is not None:
                    dialect.adopt(candidate)
                    self.progress.notes.append(candidate.notes[-1])
            if dialect.version == job.version or self._closing():
                return None
        return self._make_job(job.sent, job.request_id, self.provider.dialect)

    async def _find_dialect(self, stage: Stage, job: Job, refusal: bytes) -> Optional[Dialect]:
        """Gives up one field after the other, as the refusals name them, until a probe is taken."""
        candidate: Optional[Dialect] = self.provider.dialect
        while not self._closing():
            candidate = candidate.without(refusal.decode("utf-8", "replace"))  # type: ignore[union-attr]
            probe = await self._probe(stage, job, candidate) if candidate is not None else None
            if probe is None or probe.reader.head is None:
                return None
            if probe.reader.head.status < 300:
                return candidate
            if probe.reader.head.status != 400 or bytes(probe.whole) == refusal:
                return None  # the same words without the field: that isn't it
            refusal = bytes(probe.whole)
        return None

    async def _probe(self, stage: Stage, job: Job, candidate: Dialect) -> Optional[Exchange]:
        """One request in another dialect, recorded in phase `probe`; None when it could not be sent."""
        request_id = "%s-%d-probe-%d-%d" % (self.config.run_id, stage.index, self.part.number, candidate.version)
        probe = self._make_job(job.sent, request_id, candidate)
        record = self._new_record(request_id, job.sent, "probe", stage)
        stream, due, exchange = Stream(-1, task=asyncio.current_task()), clock(), None
        record.scheduled_ms, record.in_bytes = milliseconds(due - self.zero), probe.in_bytes
        self._streams.append(stream)
        try:
            attempt = await self._attempt(stream, probe, due)
            exchange = attempt.exchange
            self._fill(record, attempt, due)
        except RequestError as error:
            record.status, record.err = error.status, error.args[0]
        except asyncio.CancelledError:
            record.status, record.err = "cancelled", "while connecting"
        finally:
            self._streams.remove(stream)
            if stream.connection is not None:
                stream.connection.close()
        self._finish_record(record)
        return exchange

    # The record.

    def _fill(self, record: Record, attempt: Attempt, due: float) -> None:
        """Everything the exchange knows, under the record's keys."""
        exchange = attempt.exchange
        record.status, record.err = exchange.status or "truncated", exchange.err
        record.reused = attempt.reused
        connect = 0.0 if attempt.reused else attempt.connect
        record.connect_ms = milliseconds(connect)
        record.queue_ms = milliseconds(max(0.0, exchange.start - due - (attempt.opened or 0.0)))
        start = exchange.start - (connect if self.config.count_connect else 0.0)
        record.start_ms, record.start_ts = milliseconds(start - self.zero), iso_time(start + self.epoch)
        over = exchange.over_at or exchange.arrived or clock()
        record.end_ts = iso_time(over + self.epoch)
        record.clock = "kernel" if exchange.kernel and exchange.arrived else "user"
        record.lag_ms = milliseconds(exchange.lag)
        self._fill_answer(record, exchange)
        self._fill_times(record, exchange, start, due)
        self._fill_output(record, exchange)
        path = attempt.path
        record.rtt_ms = None if path.rtt is None else milliseconds(path.rtt)
        record.retransmits, record.out_of_order = path.retransmits, path.out_of_order

    def _fill_answer(self, record: Record, exchange: Exchange) -> None:
        reader = exchange.reader
        if reader.head is not None:
            record.http_status = reader.head.status
            record.out_bytes = reader.body_bytes
            record.compressed = reader.coding or None
            date = read_http_date(reader.head.headers.get("date", ""))
            if date is not None and exchange.ttfb_at is not None and self._audit is not None:
                self._audit.note_date(date, exchange.start + self.epoch, exchange.ttfb_at + self.epoch)
            if reader.head.status < 300 and not exchange.stream and self.provider.streams:
                record.streamed = False
        record.finish_reason = exchange.finish_reason
        if record.status != "ok" and exchange.error_raw:
            record.error_raw = exchange.error_raw.decode("utf-8", "replace")

    def _fill_times(self, record: Record, exchange: Exchange, start: float, due: float) -> None:
        if exchange.ttfb_at is not None:
            record.ttfb_ms = milliseconds(exchange.ttfb_at - start)
        if exchange.output_at is not None:
            record.ttfe_ms = milliseconds(exchange.output_at - start)
        first = exchange.content_at if exchange.content_at is not None else exchange.tool_at
        if first is not None:
            record.ttft_ms = milliseconds(first - start)
            record.ttft_from_scheduled_ms = milliseconds(first - due)
            record.first_content_ts = iso_time(first + self.epoch)
            record.ttft_slack_ms = milliseconds(exchange.slack)
        if record.status == "ok":
            end: float = exchange.end_at  # type: ignore[assignment]
            record.latency_ms = milliseconds(end - start)
            record.latency_from_scheduled_ms = milliseconds(end - due)
            if exchange.output_at is not None:
                record.decode_ms = milliseconds(end - exchange.output_at)

    def _fill_output(self, record: Record, exchange: Exchange) -> None:
        if exchange.chunks:
            record.chunks = exchange.chunks
        if exchange.gaps:
            record.itl_hist = exchange.gaps
            record.itl_sum_ms = milliseconds(exchange.gap_sum)
            record.itl_min_ms, record.itl_max_ms = milliseconds(exchange.gap_min), milliseconds(exchange.gap_max)
        if exchange.chunk_times is not None:
            record.chunk_ms = [milliseconds(moment - exchange.start) for moment in exchange.chunk_times]
        if self.config.token_mode != "disabled":
            record.out_chars = exchange.chars
            record.out_crc32 = "%08x" % exchange.decoder.crc if exchange.chars else None
            record.reasoning_chars = exchange.reasoning_chars or None
            record.rewrites = exchange.decoder.rewrites or None
        if self.config.token_mode == "usage":
            for key, value in exchange.usage.items():
                setattr(record, key, value)
            record.tpot_ms = tpot_ms(record)
        if (
            record.status == "ok"
            and record.phase == "measure"
            and not self._sampled
            and exchange.first_content is not None
        ):
            self._sampled = True
            record.first_content_raw = event_text(exchange.first_content)
            record.final_frame_raw = event_text(exchange.final_event)

    def _finish_record(self, record: Record) -> None:
        """Masks secrets, keeps one raw sample for each kind of failure, and hands the record on."""
        self._watch_authorization(record)
        if record.error_raw is not None:
            kind = (record.status, error_key(record.err or ""))
            if kind in self._failures_seen:
                record.error_raw = None
            self._failures_seen.add(kind)
        for name in ("err", "finish_reason", "error_raw", "first_content_raw", "final_frame_raw"):
            text = getattr(record, name)
            if text is not None:
                setattr(record, name, redact(text, self.secrets)[: None if name.endswith("_raw") else 500])
        self._count(record)
        self.sink(record.known())

    def _watch_authorization(self, record: Record) -> None:
        if record.status != "auth_error":
            self._auth_failures = AUTH_FAILURES + 1 if record.status == "ok" else self._auth_failures
            return
        if self._keeper is not None:
            self._keeper.refused()
        if self._auth_failures <= AUTH_FAILURES and not self.stopping:
            self._auth_failures += 1
            if self._auth_failures == AUTH_FAILURES:
                self.stop("auth: the endpoint refused the token %d times and accepted it never" % AUTH_FAILURES)

    def _count(self, record: Record) -> None:
        progress = self.progress
        failed = record.status != "ok" and record.status not in NOT_JUDGED
        progress.all_done += record.phase != "probe" and record.status not in NOT_JUDGED
        progress.all_failed += failed and record.phase != "probe"
        progress.all_tokens += (record.in_tokens or 0) + (record.out_tokens or 0)
        if self._together is None and not self.stopping:  # else who watches over all parts adds up
            self._watch_budget()
        if record.phase != progress.phase:
            return
        progress.done += 1
        progress.ok += record.status == "ok"
        progress.failed += failed
        progress.dropped += record.status == "dropped"
        progress.tokens += record.out_tokens or 0
        progress.chars += record.out_chars or 0
        if record.ttft_ms is not None and record.status == "ok":
            bucket = log_bucket(record.ttft_ms / 1000.0)
            progress.ttft[bucket] = progress.ttft.get(bucket, 0) + 1


    def _watch_budget(self) -> None:
        reason = over_budget(self.config, self.progress)
        if reason:
            self.stop(reason)


UNCOUNTED_ANSWERS = 3  # answers without any token count, after which --max-total-tokens can't be kept
PERCENT_OF = 20  # requests that must be over before --max-errors N% is judged


def over_budget(config: Config, progress: Progress) -> str:
    """Why --max-errors or --max-total-tokens must end a run; "" while it may go on."""
    done, failed, tokens = progress.all_done, progress.all_failed, progress.all_tokens
    if config.max_errors is not None and failed:
        share = config.max_errors.endswith("%")
        limit = float(config.max_errors.rstrip("%"))
        if done >= PERCENT_OF and failed * 100.0 > limit * done if share else failed > limit:
            return "max-errors: %d of %d requests failed, more than %s" % (failed, done, config.max_errors)
    if config.max_total_tokens is not None and tokens >= config.max_total_tokens:
        return "max-total-tokens: %d tokens were used" % tokens
    if config.max_total_tokens is not None and not tokens and done - failed >= UNCOUNTED_ANSWERS:
        return "max-total-tokens: the endpoint reports no token counts, so that nothing would bound them"
    return ""


class Watch:
    """Ends an exchange when a time-out passes: one timer, which looks again when the deadline has moved."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._loop = asyncio.get_event_loop()
        self._timer = self._loop.call_at(exchange.deadline()[0], self._look)
        exchange.on_end = self._arm  # the end brings the deadline nearer; everything else only puts it off

    def _arm(self) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_at(self._exchange.deadline()[0], self._look)

    def _look(self) -> None:
        if self._exchange.status is not None:
            return
        deadline, which = self._exchange.deadline()
        now = clock()
        if now >= deadline:
            self._exchange.expire(now, which)
        else:
            self._arm()

    def stop(self) -> None:
        """The exchange is over."""
        self._timer.cancel()


class Audit:
    """What a part's process did during a stage: CPU, polls, the loop's longest delay.

    Answers that carry a Date bound how far the endpoint's clock is ahead of ours: a server that writes D for the second
    in which it answered did so after we sent and before we received. Hosts of one run whose bounds differ have clocks
    that do.
    """

    def __init__(self, began: float, poll: Poll) -> None:
        self._began = began
        self._poll = poll
        self._cpu = time.process_time()
        self._polls = poll.polls
        self._ahead = [-math.inf, math.inf]
        poll.longest = 0.0

    def note_date(self, date: int, sent: float, received: float) -> None:
        """An answer of the second `date`; the others in s since 1970 by our clock."""
        self._ahead = [max(self._ahead[0], date - received), min(self._ahead[1], date + 1 - sent)]

    def finish(
        self, now: float, stage: int, part: int, progress: Progress, lags: Mapping[int, int]
    ) -> Dict[str, Any]:
        """The audit line's content."""
        wall = now - self._began
        low, high = self._ahead
        bounds = {"date_offset_ms": [milliseconds(low), milliseconds(high)]} if -math.inf < low <= high else {}
        return {
            "stage": stage,
            "part": part,
            "wall_ms": milliseconds(wall),
            "cpu_percent": round(100.0 * (time.process_time() - self._cpu) / wall, 2) if wall > 0 else 0.0,
            "polls": self._poll.polls - self._polls,
            "loop_delay_max_ms": milliseconds(self._poll.longest),
            "due": progress.done,
            "started": progress.done - progress.dropped,
            "dropped": progress.dropped,
            **bounds,
            "lag_hist": dict(lags),
        }


def told_of(facts: Facts) -> Dict[str, str]:
    """What an audit line says of the way to the endpoint: those of WAY that there are."""
    return {key: getattr(facts, key) for key in WAY if getattr(facts, key)}


def tpot_ms(record: Record) -> Optional[float]:
    """TPOT of a record as METRICS defines it; None where it can't be said."""
    n = record.out_tokens
    if n is None or record.decode_ms is None or record.status != "ok":
        return None
    if record.reasoning_tokens and not record.reasoning_chars:
        n -= record.reasoning_tokens
    return round(record.decode_ms / (n - 1), 6) if n >= 2 else None


def iso_time(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601 UTC with microseconds."""
    whole, micros = divmod(round(seconds * 1e6), 1000000)
    return "%s.%06dZ" % (iso_second(whole), micros)


@functools.lru_cache(maxsize=8)  # the times of a run lie close together
def iso_second(seconds: int) -> str:
    """Whole seconds since 1970 as ISO 8601 without a zone."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")


def secret_texts(tree: Any, secret: bool = False) -> Iterator[str]:
    """The texts of a JSON tree that stand under a key that names a secret."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from secret_texts(value, is_secret_name(key))
    elif isinstance(tree, list):
        for value in tree:
            yield from secret_texts(value, secret)
    elif secret and isinstance(tree, str):
        yield tree


def secrets_of(config: Config, endpoint: Endpoint) -> List[str]:
    """Every text that must never be shown: tokens, keys, passwords of URL and proxy, values of telling headers."""
    secrets = [config.token, *config.fetched, config.auth_secret, config.auth_key]
    secrets += [value for name, value in config.auth_opt.items() if is_secret_option(name)]
    exchange = urlsplit(config.auth_opt.get("exchange-url", ""))
    secrets += [value for name, value in parse_qsl(exchange.query) if is_secret_name(name)]
    if config.auth_secret:
        secrets.append(basic_header(config.auth_key + ":" + config.auth_secret)[1].split(" ")[1])
    if config.auth == "basic" and config.token:
        secrets += [config.token.partition(":")[2], basic_header(config.token)[1].split(" ")[1]]
    if config.auth == "zhipu-jwt":
        secrets.append(config.token.partition(".")[2])
    proxy = choose_route(endpoint, config, os.environ).proxy
    for userinfo in (endpoint.userinfo, proxy.userinfo if proxy is not None else None):
        if userinfo:
            secrets += [userinfo, userinfo.split(":", 1)[1], basic_header(userinfo)[1].split(" ")[1]]
    for line in config.header:
        name, _, value = line.partition(":")
        if is_secret_name(name):
            secrets += [value.strip(), *re.findall(r"[^\s;,=]{8,}", value)]  # cookies may come back in parts
    secrets += [value for name, value in parse_qsl(urlsplit(endpoint.url).query) if is_secret_name(name)]
    secrets += secret_texts(config.body)
    secrets = [spelling for secret in secrets for spelling in spellings(secret)]
    return sorted((secret for secret in secrets if len(secret) > 3), key=len, reverse=True)


def read_secret(text: str, flag: str) -> str:
    """A secret given as itself, env:NAME, file:PATH or cmd:COMMAND; raises UserError, which never shows it."""
    kind, colon, rest = text.partition(":")
    if colon and kind == "env":
        secret = os.environ.get(rest, "").strip()
        if not secret:
            raise UserError("%s env:%s: that variable is not set" % (flag, rest))
        return secret
    if colon and kind == "file":
        try:
            with open(os.path.expanduser(rest), encoding="utf-8-sig") as file:
                secret = file.read().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                "%s file:%s cannot be read: %s" % (flag, rest, getattr(error, "strerror", None) or "not text")
            ) from None
        if not secret:
            raise UserError("%s file:%s holds nothing" % (flag, rest))
        return secret
    if colon and kind == "cmd":
        return secret_of_command(rest, flag)
    return text.strip()


def secret_of_command(command: str, flag: str) -> str:
    """What a command prints on its first line."""
    try:
        answer = subprocess.run(command, shell=True, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise UserError("%s cmd: did not end within 60 s" % flag) from None
    lines = answer.stdout.decode("utf-8", "replace").strip().split("\n")
    if answer.returncode or not lines[0]:
        raise UserError("%s cmd: ended with status %d and printed no secret" % (flag, answer.returncode))
    return lines[0].strip()


def random_nonce() -> str:
    """32 random hex digits."""
    return binascii.hexlify(os.urandom(16)).decode("ascii")


def sign_now(network: Network, provider: Provider, request: HTTPRequest, method: str = "POST") -> bytes:
    """A request's bytes as they go out this way, signed at this moment."""
    signed = provider.signed(request, time.time(), random_nonce(), method)
    return network.encode(method, signed.target, signed.headers, request.body)


class TokenKeeper:
    """Asks for a run's token where that must be done, and again before it ends, beside the requests.

    A token that can't be had before the run is a UserError; one that can't be renewed is a note, and the old one is
    used on. `changed` is called after each new token.
    """

    PATIENCE = 30.0  # s for an answer
    RETRY = 10.0  # s between two tries
    AHEAD = 300.0  # s before its end at which a token is renewed; of a short-lived one a fifth of its life

    def __init__(self, config: Config, provider: Provider, endpoint: Endpoint, poll: Poll) -> None:
        self.config = config
        self.auth: Auth = provider.auth
        self.grant = Grant(config.token, jwt_expiry(config.token))
        self.notes: List[str] = []
        self.changed: Callable[[], Any] = list  # does nothing
        self._provider = provider
        self._endpoint = endpoint
        self._poll = poll
        self._network: Optional[Network] = None
        self._task: Optional[asyncio.Task] = None
        self._refused: Optional[asyncio.Future] = None
        self._asked = -math.inf

    @property
    def renews(self) -> bool:
        """Whether there is a token to ask for again."""
        return is_renewed(self.config, self.auth)

    async def first(self) -> None:
        """Asks for the token where that must be done; raises UserError when it can't be had."""
        exchange = self.auth.exchange
        if exchange is None:
            return
        where = urlsplit(exchange.question(0.0, "0" * 32).url).netloc
        try:
            self.adopt(await self._ask())
        except (RequestError, ValueError) as error:
            status = error.status + ": " if isinstance(error, RequestError) else ""
            said = redact("%s%s" % (status, error), self._secrets())
            raise UserError("--auth %s got no token from %s: %s" % (self.auth.name, where, said)) from None

    def adopt(self, grant: Grant) -> None:
        """Takes a token; from now on requests are signed with it. Raises ValueError for one that no header can hold."""
        if CONTROL.search(grant.token) or not grant.token or not grant.token.isascii():
            raise ValueError("the token holds a character that no header can carry")
        self.auth.renew(grant.token)
        self.grant = grant
        if grant.token not in self.config.fetched and grant.token != self.config.token:
            self.config.fetched.append(grant.token)
        self.changed()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins to renew the token on this loop, where it ever needs that."""
        if self.renews and self._task is None:
            self._refused = loop.create_future()
            self._task = loop.create_task(self._keep())

    def stop(self) -> None:
        """Ends that."""
        if self._task is not None:
            self._task.cancel()

    def refused(self) -> None:
        """A request was refused: the token may have been withdrawn before its time."""
        if self._refused is not None and not self._refused.done() and clock() - self._asked > self.RETRY:
            self._refused.set_result(None)

    def _delay(self) -> Optional[float]:
        """Seconds until the token should be renewed; None: never."""
        delays = [span for span in [refresh_seconds(self.config)] if span is not None]
        if self.grant.expires is not None:
            life = self.grant.expires - time.time()
            delays.append(life - min(self.AHEAD, 0.2 * life) if life > 0 else self.RETRY)
        return max(0.5, min(delays)) if delays else None

    async def _keep(self) -> None:
        delay = self._delay()
        while True:
            await asyncio.wait([self._refused], timeout=delay)  # type: ignore[list-item]
            self._refused = asyncio.get_event_loop().create_future()
            try:
                self.adopt(await self._ask())
                delay = self._delay()
            except (RequestError, UserError, ValueError) as error:
                note = "the token could not be renewed, and the old one is used on: %s" % error
                note = redact(note, self._secrets())[:300]
                if note not in self.notes:
                    self.notes.append(note)
                delay = self.RETRY

    async def _ask(self) -> Grant:
        self._asked = clock()
        exchange, source = self.auth.exchange, self.config.token_source
        if exchange is None:
            text = await in_thread(lambda: read_secret(source, "--token"))
            return Grant(text, jwt_expiry(text))
        question = exchange.question(time.time(), random_nonce())
        parts = urlsplit(question.url)
        target = parts.path + ("?" + parts.query if parts.query else "")
        if self._network is None:
            endpoint = parse_url(question.url, self._provider)
            # The way there is another: its own name in the certificate, its own proxy.
            config = dataclasses.replace(self.config, url=question.url, server_name=None)
            self._network = Network(endpoint, config, self._poll)
        payload = self._network.encode(question.method, target, question.headers, question.body)
        head, body = await fetch(self._network, payload, self.PATIENCE)
        return exchange.read(head.status, head.headers, body, time.time())

    def _secrets(self) -> List[str]:
        return secrets_of(self.config, self._endpoint)


# ==================================================================================================
# 15. Processes: a run in several processes
# ==================================================================================================
#
# With several processes each is a part with a loop of its own, which appends its own records. They are
# kept in step by messages over pipes: a worker says `next` and waits for the stage to run (none: it is
# over); it says `ready` before each phase and waits for `go` with the moment at which the phase begins
# (CLOCK_MONOTONIC is the machine's, so they share it). Process and Pipe only: Queue and Pool need
# /dev/shm, which a locked-down host may lack. The start method is named: fork on Linux, as it
# costs nothing and needs no import; no thread runs yet when it happens.

HEAD_START = 0.02  # s between `go` and the beginning of a phase: every worker has read it by then
CANCEL_PATIENCE = 2.0  # s that a cancelled worker has to write its records


class WorkerPlan(NamedTuple):
    """What a worker process is told: everything that Runner takes, and how to open its sink."""

    config: Config
    url: str
    prompts: Sequence[Prompt]
    part: Part
    zero: float
    open_sink: Callable[[], Any]  # gives an object with write(line) and close()
    shape: Optional[Shape] = None
    grant: Optional[Grant] = None  # the token that the watching process asked for


class Worker:
    """A part in a process of its own: a Runner, with the pipe to the process that watches over it."""

    def __init__(self, pipe: Any, plan: WorkerPlan) -> None:
        self._pipe = pipe
        self._plan = plan
        self._answer: Optional[asyncio.Future] = None  # to what was asked last

    def run(self) -> None:
        """The whole life of the process."""
        signal.set_wakeup_fd(-1)  # a fork copies the watching process's
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the watching process gets Ctrl-C too and tells us
        plan = self._plan
        self._loop, poll = new_loop()
        sink = plan.open_sink()
        provider = make_provider(plan.config)
        endpoint = parse_url(plan.url, provider)
        self._runner = runner = Runner(
            plan.config, provider, endpoint, plan.prompts, plan.part, poll, sink.write, self._together, plan.shape
        )
        runner.zero = plan.zero
        self._keeper = TokenKeeper(plan.config, provider, endpoint, poll)
        if plan.grant is not None:
            self._keeper.adopt(plan.grant)
        runner.keep_token(self._keeper)
        self._keeper.start(self._loop)
        # Batch systems and systemd send it to every process; it is also how multiprocessing ends a worker at its exit.
        self._loop.add_signal_handler(signal.SIGTERM, self._stop, "interrupted by SIGTERM", LINGER)
        self._loop.add_reader(self._pipe.fileno(), self._receive)
        self._report_progress()
        gc.freeze()
        try:
            self._loop.run_until_complete(self._run_stages())
            self._tell()
            self._send("end", {"notes": provider.dialect.notes + self._keeper.notes})
        except WriteError as error:
            self._send("unwritten", str(error))
            self._send("end", {"notes": []})
        finally:
            self._keeper.stop()
            sink.close()

    async def _run_stages(self) -> None:
        self._runner.begin()
        while True:
            stage = await self._ask("next")
            if stage is None:
                return
            await self._runner.run_stage(stage)

    async def _together(self) -> float:
        """Waits until every worker is ready; returns when the phase begins."""
        moment = await self._ask("ready")
        return clock() if moment is None else moment

    async def _ask(self, what: str) -> Any:
        """The watching process's answer; None when nothing begins any more."""
        if self._runner.stopping:  # who watches may be gone
            return None
        self._answer = self._loop.create_future()
        self._send(what, None)
        return await self._answer

    def _receive(self) -> None:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError):  # the watching process is gone: nobody would write the report
            self._loop.remove_reader(self._pipe.fileno())
            kind, value = "stop", ("the watching process ended", 0.0)
        if kind == "stop":
            self._stop(*value)
        elif kind == "cancel":
            self._runner.cancel(value)
        else:
            self._give(value)

    def _stop(self, reason: str, patience: float) -> None:
        self._runner.stop(reason, patience)
        self._give(None)  # a worker that waits for the others must not wait on

    def _give(self, answer: Any) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)

    def _report_progress(self) -> None:
        self._tell()
        self._loop.call_later(0.25, self._report_progress)

    def _tell(self) -> None:
        self._send("progress", vars(self._runner.progress))
        if self._runner.stopping:
            self._send("stopping", self._runner.reason)

    def _send(self, kind: str, value: Any) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send((kind, value))


def work(pipe: Any, plan: WorkerPlan, inherited: Sequence[Any]) -> None:
    """The target of a worker process. `inherited`: pipe ends that a fork copied; held open they hide an end."""
    for end in inherited:
        end.close()
    Worker(pipe, plan).run()


def start_method() -> str:
    """How workers are started: fork on Linux costs nothing and needs no import; elsewhere it is not safe, or absent."""
    return "fork" if sys.platform.startswith("linux") else "spawn"


@contextlib.contextmanager
def born_deaf() -> Iterator[None]:
    """Processes started meanwhile ignore Ctrl-C from their first moment on: this one gets it and tells them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Crew:
    """Watches over the worker processes of a run: starts them, keeps them in step, adds up their progress."""

    def __init__(self, plans: Sequence[WorkerPlan], stages: Iterable[Stage], progress: Progress) -> None:
        self._plans = plans
        self._stages = iter(stages)
        self.progress = progress
        self.reason = "done"
        self.notes: List[str] = []
        self._config = plans[0].config if plans else Config()
        self._stopped = False
        self._pipes: Dict[int, Any] = {}
        self._processes: Dict[int, Any] = {}
        self._asking: Dict[str, Set[int]] = {"next": set(), "ready": set()}  # which workers wait for what
        self._ended: Set[int] = set()
        self._shares: Dict[int, Dict[str, Any]] = {}
        self.lost = 0  # workers that were killed or failed
        self._unwritten = ""

    def start(self) -> None:
        """Starts the workers: before any thread runs and before this process handles signals."""
        import multiprocessing

        context = multiprocessing.get_context(start_method())
        with born_deaf():
            for number, plan in enumerate(self._plans):
                ours, theirs = context.Pipe()
                self._pipes[number] = ours
                inherited = list(self._pipes.values()) if context.get_start_method() == "fork" else []
                process = context.Process(target=work, args=(theirs, plan, inherited), daemon=True)
                process.start()
                theirs.close()
                self._processes[number] = process

    async def run(self) -> None:
        """Returns when every worker has ended; raises WriteError when one could not write."""
        loop = asyncio.get_event_loop()
        self._over = loop.create_future()
        for number, pipe in self._pipes.items():
            loop.add_reader(pipe.fileno(), self._receive, number)
        await self._over
        for process in self._processes.values():
            process.join(5.0)
        if self._unwritten:
            raise WriteError(self._unwritten)

    def stop(self, reason: str, patience: Optional[float] = LINGER) -> None:
        """As Runner.stop, in every worker."""
        if not self._stopped:
            self._stopped, self.reason = True, reason
            self._broadcast("stop", (reason, patience))

    def cancel(self, why: str) -> None:
        """As Runner.cancel, in every worker; one that hangs is killed."""
        self._broadcast("cancel", why)
        asyncio.get_event_loop().call_later(CANCEL_PATIENCE, self.kill)

    def kill(self) -> None:
        """Kills the workers that are still there."""
        for number in self._pipes:
            self._processes[number].kill()

    def _broadcast(self, kind: str, value: Any) -> None:
        for pipe in self._pipes.values():
            with contextlib.suppress(OSError):
                pipe.send((kind, value))

    def _receive(self, number: int) -> None:
        try:
            kind, value = self._pipes[number].recv()
        except (EOFError, OSError):
            self._lose(number)
            return
        if kind in self._asking:
            self._asking[kind].add(number)
        elif kind == "progress":
            self._shares[number] = value
            self._add_up()
            reason = "" if self._stopped else over_budget(self._config, self.progress)
            if reason:
                self.stop(reason)
        elif kind == "stopping":
            self.stop(value)
        elif kind == "unwritten":
            self._unwritten = value
            self.stop("results could not be written", 0.0)
        elif kind == "end":
            self._ended.add(number)
            self.notes += [note for note in value["notes"] if note not in self.notes]
        self._go_on()

    def _lose(self, number: int) -> None:
        """A pipe ended: well when the worker had said so, else it was killed or failed."""
        asyncio.get_event_loop().remove_reader(self._pipes[number].fileno())
        self._pipes.pop(number).close()
        if number not in self._ended:
            self._ended.add(number)
            process = self._processes[number]
            process.join(1.0)
            code = process.exitcode
            killed = code is not None and code < 0
            how = "was killed by signal %d" % -code if killed else "failed (exit status %s)" % code
            self.lost += 1
            self.stop("worker process %d %s" % (number, how))
        if not self._pipes and not self._over.done():
            self._over.set_result(None)
        self._go_on()

    def _go_on(self) -> None:
        """Answers the workers when all that are left wait for the same."""
        for kind, asking in self._asking.items():
            waiting = asking - self._ended
            if waiting and (waiting | self._ended) >= set(self._processes):
                asking.clear()
                if kind == "ready":
                    answer = ("go", clock() + HEAD_START)
                else:
                    answer = ("stage", None if self._stopped else next(self._stages, None))  # type: ignore[assignment]
                for number in waiting:
                    with contextlib.suppress(OSError):
                        self._pipes[number].send(answer)

    def _add_up(self) -> None:
        phase = max((share["stage"], share["phase"] == "measure") for share in self._shares.values())
        shares = [share for share in self._shares.values() if (share["stage"], share["phase"] == "measure") == phase]
        total = dict(shares[0], stages=self.progress.stages)
        for name in ("done", "ok", "failed", "dropped", "in_flight", "waiting", "tokens", "chars"):
            total[name] = sum(share[name] for share in shares)
        for name in ("all_done", "all_failed", "all_tokens"):
            total[name] = sum(share[name] for share in self._shares.values())
        totals = [share["total"] for share in shares]
        total["total"] = None if None in totals else sum(totals)
        total["ttft"] = {}
        for share in shares:
            for bucket, count in share["ttft"].items():
                total["ttft"][bucket] = total["ttft"].get(bucket, 0) + count
        self.progress.__dict__.update(total)


class Beside:
    """A function that runs in a process of its own, while this one does something else; for a `with`.

    An exception there ends it and is not told: who wants to know what it was does the same here. Only where processes
    are forked, so that what it is given, as open files, needs not be picklable.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        import multiprocessing

        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=self._run, args=(function, arguments), daemon=True)
        with born_deaf():
            self._process.start()

    @staticmethod
    def _run(function: Callable[..., None], arguments: Sequence[Any]) -> None:
        try:
            function(*arguments)
        except Exception:
            raise SystemExit(1) from None

    def __enter__(self) -> "Beside":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._process.kill()
        self._process.join()

    def succeeded(self) -> bool:
        """Whether the function came to its end, which is waited for."""
        self._process.join()
        return self._process.exitcode == 0


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity and its cgroup's quota, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, min(count, int(quota))) if quota else count


def cpu_quota() -> Optional[float]:
    """The cgroup's CPU quota in CPUs; None where there is none."""
    for read in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        words: List[str] = []
        for name in read:
            try:
                with open("/sys/fs/cgroup/" + name, encoding="ascii") as file:
                    words += file.read().split()
            except (OSError, UnicodeDecodeError):
                break
        if len(words) == 2 and words[0] not in ("max", "-1"):
            return float(words[0]) / float(words[1])
    return None


def choose_processes(wanted: Union[int, str], config: Config) -> int:
    """Worker processes for `--processes N|auto`: never more than streams; auto is 1 below 128 streams.

    An open loop without a cap has no number of streams: auto takes the requests of a second for it. A search for the
    highest load ends nobody knows where: auto takes all CPUs, so that the client is not the first to be busy.
    """
    if config.find_max is not None:
        return usable_cpus() if wanted == "auto" else int(wanted)
    hosts = config.host[1]
    streams = max(config.concurrency, default=0) // hosts
    if wanted == "auto":
        expected = streams or math.ceil(max(config.rps) / hosts)
        return 1 if expected < 128 else max(1, min(usable_cpus(), expected // 64))
    return max(1, min(int(wanted), streams or int(wanted)))


# ==================================================================================================
# 16. Report: a summary and its rows to one offline page
# ==================================================================================================
#
# report.html is a function of the summary, the run's header and the measured requests in columns. Python writes the
# whole page, every figure and table of it, in both languages; the script in it draws the charts and works the buttons,
# so a reader whose mail program blocks scripts still sees what was measured.
#
# Three rules keep the page safe and small:
# - Every string is escaped when it is filled in, unless it is Markup, and only a fragment of report.html makes Markup.
#   What an endpoint sent can therefore appear as text and as nothing else.
# - The page holds no records: bins, quantiles, buckets and samples are computed here, a few kilobytes a stage. What
#   that takes of a million requests is kept in arrays, row by row or value by value, never as a tuple for each request.
# - A figure is taken from the summary and never computed a second time; a chart's marks are the tiles' figures.
#
# The page is made of tables: TILES, the PANELS of each section, STAGE_COLUMNS, CLIENT_CHECKS, NETWORK_ROWS. A panel
# whose data isn't there returns None and is left out; an axis without data is never drawn.

LANGUAGES = ("en", "zh")
MARKED_PERCENTILES = ("p50", "p95", "p99")
DASH = "–"
# Marks in a text: **bold** and `code` stand between control characters, which plain() takes out of every value.
MARKS = (("**", "\x01", "bold"), ("`", "\x02", "code"))


class Both(NamedTuple):
    """One plain text in both languages of the page."""

    en: str
    zh: str


class Markup(str):
    """HTML made by a fragment; any other string is escaped when it is filled in."""


Text = Union[str, Both]


def plain(value: object) -> str:
    """The value as text that HTML and UTF-8 can hold, without what is not to be seen."""
    return INVISIBLE.sub("\ufffd", str(value))


def escape_html(text: str) -> str:
    """The text with the characters that mean something to HTML written as entities."""
    for letter, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;"), ("'", "&#x27;")):
        text = text.replace(letter, entity)
    return text


def both(text: Text) -> Both:
    """A text that reads the same in both languages, as a pair."""
    return text if isinstance(text, Both) else Both(plain(text), plain(text))


def joined(parts: Iterable[str]) -> Markup:
    """Fragments one after the other."""
    return Markup("".join(parts))


def joined_texts(separator: Text, texts: Iterable[Text]) -> Both:
    """Texts as a list in words, in each language."""
    pairs, between = [both(text) for text in texts], both(separator)
    return Both(between.en.join(pair.en for pair in pairs), between.zh.join(pair.zh for pair in pairs))


@dataclass(frozen=True)
class Page:
    """What turns texts and fragments into HTML: the fragments of report.html and the texts of both languages."""

    fragments: Mapping[str, string.Template]
    texts: Tuple[Mapping[str, str], Mapping[str, str]]

    def said(self, key: str, **values: object) -> Both:
        """The text of this key in both languages, its {names} replaced by the values."""
        pairs = {name: both(value if isinstance(value, Both) else str(value)) for name, value in values.items()}
        return Both(*(texts[key].format(**{name: pair[language] for name, pair in pairs.items()})
                      for language, texts in enumerate(self.texts)))

    def fill(self, fragment: str, **values: object) -> Markup:
        """The fragment with the values in it, each escaped unless it is Markup."""
        return Markup(self.fragments[fragment].substitute({name: self.html(value) for name, value in values.items()}))

    def html(self, value: object) -> Markup:
        """One value as HTML: a pair of texts becomes two spans, of which the style sheet shows one."""
        if isinstance(value, Markup):
            return value
        if not isinstance(value, Both):
            return Markup(escape_html(plain(value)))
        if value.en == value.zh:
            return self.emphasised(value.en)
        return self.fill("both", en=self.emphasised(value.en), zh=self.emphasised(value.zh))

    def emphasised(self, text: str) -> Markup:
        """Escaped text with its marked parts in their fragments."""
        text = escape_html(text)
        for _, sign, fragment in MARKS:
            pieces = text.split(sign)
            text = "".join(self.fill(fragment, text=Markup(piece)) if odd % 2 else piece
                           for odd, piece in enumerate(pieces))
        return Markup(text)


def asset_text(assets: Mapping[str, Union[bytes, str]], name: str) -> str:
    """One asset as text."""
    content = assets[name]
    return content.decode("utf-8") if isinstance(content, bytes) else content


def with_signs(text: str) -> str:
    """One text with its marks as signs; a mark that isn't closed stays as it is."""
    for mark, sign, _ in MARKS:
        text = re.sub("%s(.+?)%s" % (re.escape(mark), re.escape(mark)), sign + r"\1" + sign, text)
    return text


def marked(texts: Mapping[str, str]) -> Dict[str, str]:
    """Texts whose marks are replaced by signs that no value can contain."""
    return {key: with_signs(text) for key, text in texts.items()}


def read_page(assets: Mapping[str, Union[bytes, str]]) -> Page:
    """The page's fragments and texts from the assets."""
    pieces = re.split(r"<!-- fragment: (\w+) -->\n", asset_text(assets, "report.html"))
    fragments = {name: string.Template(body.strip("\n")) for name, body in zip(pieces[1::2], pieces[2::2])}
    texts = tuple(marked(json.loads(asset_text(assets, "texts/%s.json" % name))) for name in LANGUAGES)
    return Page(fragments, (texts[0], texts[1]))


# Numbers: three significant digits, thousands with a comma; a claim is never printed rounder than it is.


def known(value: object) -> bool:
    """Whether this is a number: neither absent nor NaN nor infinite."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def figure(value: Optional[float], digits: int = 3) -> str:
    """Three significant digits, at most three decimals: 3.25, 15.6, 1,607, 0.104.

    >>> figure(3247.6), figure(0.0704), figure(9.996), figure(None)
    ('3,248', '0.070', '10.0', '–')
    """
    if not known(value):
        return DASH
    size = abs(float("%.*g" % (digits, value)))
    if 0 < size < 0.0005:
        return "<0.001"
    decimals = digits - 1 - math.floor(math.log10(size)) if size else 0
    return "{:,.{}f}".format(value, max(0, min(digits, decimals)))


def count(value: float) -> str:
    """A whole number with commas."""
    return "{:,.0f}".format(value)


def percent_number(share: float, extra: int = 0) -> str:
    """A share as a percentage without its sign: 97.9, 99.85; 99.96 % never becomes 100 and 0.004 % never 0.

    >>> percent_number(0.979), percent_number(0.9985), percent_number(0.99996), percent_number(1.0)
    ('97.9', '99.85', '99.996', '100')
    """
    number = 100.0 * share
    if number in (0.0, 100.0):
        return "%d" % number
    places = (1 if 1 <= number <= 99 else 2) + extra
    while places < 9 and round(number, places) in (0.0, 100.0):
        places += 1
    return "%.*f" % (places, number)


def percent(share: Optional[float], extra: int = 0) -> Both:
    """A share with its sign: "97.9 %" in English, "97.9%" in Chinese."""
    if not known(share):
        return both(DASH)
    number = percent_number(float(share), extra)  # type: ignore[arg-type]
    return Both(number + "\u00a0%", number + "%")


def measured(value: Optional[float], unit: Text) -> Both:
    """A figure with its unit."""
    pair = both(unit)
    return Both(figure(value) + "\u00a0" + pair.en, figure(value) + "\u00a0" + pair.zh) if known(value) else both(DASH)


class Scale(NamedTuple):
    """The unit in which one metric of one stage is shown, the same in tile, chart and time line."""

    divisor: float
    unit: str

    def said(self, value_ms: Optional[float]) -> str:
        """A time in this unit, with it."""
        return figure(value_ms / self.divisor) + "\u00a0" + self.unit if known(value_ms) else DASH


MILLISECONDS, SECONDS = Scale(1.0, "ms"), Scale(1000.0, "s")


def scale_of(statistic: Optional[Mapping]) -> Scale:
    """Seconds for a metric whose P50 is two seconds or more, else milliseconds."""
    return SECONDS if statistic and statistic.get("p50", 0) >= 2000 else MILLISECONDS


def clock_text(milliseconds: float) -> str:
    """A duration as minutes and seconds, from an hour on with hours.

    >>> clock_text(387_000), clock_text(11_400_000)
    ('6:27', '3:10:00')
    """
    minutes, seconds = divmod(int(milliseconds / 1000.0 + 0.5), 60)
    return "%d:%02d:%02d" % (minutes // 60, minutes % 60, seconds) if minutes >= 60 else "%d:%02d" % (minutes, seconds)


# One stage, and what the gates say of it

def gate_metric(gate: Mapping) -> str:
    """The summary's name of the metric of a gate: ttft is ttft_ms, success is success_rate."""
    name = str(gate.get("metric", ""))
    if name == "goodput" and str(gate.get("gate", "")).rstrip().endswith("%"):
        return "goodput_share"
    return GATE_FIGURES.get(name, name)


@dataclass(frozen=True)
class StageView:
    """One stage as the report sees it: its summary, its requests and its gates."""

    number: int
    figures: Mapping
    rows: "Rows"
    gates: Sequence[Mapping]
    judged: bool
    samples: Mapping[str, Sequence[float]]
    name: Mapping[str, float]

    @property
    def is_open(self) -> bool:
        """Whether its requests went out by a schedule."""
        return is_open(self.rows.load)

    @property
    def requests(self) -> Mapping:
        """The summary's counts of requests."""
        return self.figures.get("requests", {})

    @property
    def successes(self) -> int:
        """How many requests succeeded."""
        return self.requests.get("success", 0)

    @property
    def failed_gates(self) -> List[Mapping]:
        """The gates that failed; none where they are not judged."""
        return [gate for gate in self.gates if not gate.get("passed")] if self.judged and not self.limited else []

    @property
    def limited(self) -> bool:
        """Whether this client was the limit of a probe, which then says nothing of the endpoint."""
        return self.judged and bool(self.figures.get("client", {}).get("limited_by"))

    def statistic(self, metric: str) -> Mapping:
        """The summary's figures of a metric; empty when it has none."""
        found = self.figures.get(metric)
        return found if isinstance(found, dict) and found.get("n") else {}

    @property
    def holds(self) -> bool:
        """Whether it passed every gate and this client was not its limit."""
        return not self.failed_gates and not self.limited

    def failed(self, metric: str, stat: str) -> bool:
        """Whether a gate on this figure failed."""
        return any(gate_metric(gate) == metric and gate.get("stat", stat) == stat for gate in self.failed_gates)


SAMPLED = ("ttft_ms", "latency_ms")
DUE_SAMPLED = ("ttft_from_scheduled_ms", "latency_from_scheduled_ms")  # drawn where requests are due at set moments


def successful(rows: "Rows", name: str) -> List[float]:
    """The known values of one column over the successful requests."""
    column = rows.columns.get(name)
    return [value for status, value in zip(rows.status, column) if status == "ok" and value == value] if column else []


def successful_pairs(rows: "Rows", one: str, other: str) -> Tuple[array.array, array.array]:
    """Two columns over the successful requests of which both values are known."""
    columns = rows.columns[one], rows.columns[other]
    both = bytearray(status == "ok" and first == first and second == second
                     for status, first, second in zip(rows.status, *columns))
    firsts, seconds = (array.array("d", itertools.compress(column, both)) for column in columns)
    return firsts, seconds


def stage_view(number: int, figures: Mapping, rows: "Rows", gates: Sequence[Mapping], judged: bool,
               name: Mapping[str, float], drawn: bool) -> StageView:
    """One stage, with the samples that several charts need sorted once; without them where nothing is drawn."""
    sampled = () if not drawn else SAMPLED + DUE_SAMPLED if is_open(rows.load) else SAMPLED
    samples = {column: array.array("d", sorted(successful(rows, column))) for column in sampled}
    return StageView(number, figures, rows, gates, judged, samples, name)


def stage_gates(summary: Mapping, figures: Mapping, stage: int) -> Sequence[Mapping]:
    """The gates of one stage: its own list, or the run's entries that name it."""
    return figures.get("slo") or [gate for gate in summary.get("slo", ()) if gate.get("stage") in (None, stage)]


def stage_views(summary: Mapping, rows: Sequence["Rows"], drawn: bool = True) -> List[StageView]:
    """The stages of a run; a gate belongs to the stage that it names."""
    judged = summary.get("verdict", {}).get("state") != "INVALID"
    names = load_names([stage_rows.load for stage_rows in rows])
    return [stage_view(number, block, stage_rows, stage_gates(summary, block, stage_rows.stage), judged, name, drawn)
            for number, (block, stage_rows, name) in enumerate(zip(summary.get("stages") or [summary], rows, names))]


def queue_metric(metric: str, load: Mapping[str, float]) -> str:
    """The key of a metric's name: the queue of a stage with a cap holds the wait under it too, and says so."""
    return "queue_ms.capped" if metric == "queue_ms" and "cap" in load else metric


def metric_label(page: Page, metric: str) -> Both:
    """What the page calls a metric."""
    key = "metric." + metric
    return page.said(key) if key in page.texts[0] else both(METRICS[metric].label if metric in METRICS else metric)


def gate_title(page: Page, gate: Mapping) -> Both:
    """The name of a gate: TTFT P95, Success rate."""
    metric = gate_metric(gate)
    title = metric_label(page, metric)
    stat = str(gate.get("stat") or "")
    plain_metric = metric in ("success_rate", "output_tokens_per_s") or not stat
    return title if plain_metric else joined_texts(" ", (title, stat.upper()))


SHARES = ("success_rate", "goodput_share")  # of 1; shown in %


def gate_scale(gate: Mapping) -> float:
    """What a share's numbers are divided by to be shares of 1: the limit may have been kept as a percentage."""
    return 100.0 if gate_metric(gate) in SHARES and gate["limit"] > 1 else 1.0


def gate_number(page: Page, gate: Mapping, value: Optional[float], scale: Scale, extra: int = 0) -> Both:
    """A gate's limit or measured value in the unit of its metric."""
    metric = gate_metric(gate)
    if not known(value):
        return both(DASH)
    if metric in SHARES:
        return percent(value / gate_scale(gate), extra)
    if metric.endswith("_ms"):
        return both(figure(value / scale.divisor, 3 + extra) + "\u00a0" + scale.unit)
    unit = "unit.tokens_per_s" if "token" in metric or metric == "request_tps" else "unit.requests_per_s"
    return joined_texts("\u00a0", (figure(value, 3 + extra), page.said(unit)))


def gate_numbers(page: Page, stage: StageView, gate: Mapping) -> Tuple[Both, Both]:
    """Limit and measured value, with as many digits as it takes to tell them apart."""
    limit, value, scale = gate["limit"], gate.get("value"), scale_of(stage.statistic(gate_metric(gate)))
    for extra in range(5):
        texts = [gate_number(page, gate, number, scale, extra) for number in (limit, value)]
        if texts[0] != texts[1] or limit == value:
            break
    return texts[0], texts[1]


def gate_words(entry: Mapping[str, Any], value: Optional[float], extra: int = 0) -> str:
    """A gate's limit or its measured value, with its unit."""
    metric = gate_metric(entry)
    if value is None:
        return "–"
    if metric in SHARES:
        return percent_number(value / gate_scale(entry), extra) + " %"
    return "%s %s" % (figure(value, 3 + extra), METRICS[metric].unit)


def gate_name(texts: Mapping[str, str], entry: Mapping[str, Any]) -> str:
    """What a gate is on, in the words of a language: TTFT P95."""
    metric = gate_metric(entry)
    return texts.get("metric." + metric, METRICS[metric].label) + (" " + entry["stat"].upper() if entry["stat"] else "")


def gate_pair(entry: Mapping[str, Any]) -> Tuple[str, str]:
    """Measured value and limit, with as many digits as it takes to tell them apart."""
    limit, value = entry["limit"], entry.get("value")
    for extra in range(5):
        shown = gate_words(entry, value, extra), gate_words(entry, limit, extra)
        if shown[0] != shown[1] or value == limit:
            break
    return shown


OPERATORS = {"<=": "≤", ">=": "≥", "<": "<", ">": ">", "==": "="}


def required(gate: Mapping, limit: Both) -> Both:
    """What a gate demands: ≤ 800 ms."""
    return joined_texts("\u00a0", (OPERATORS.get(gate.get("op", "<="), str(gate.get("op"))), limit))


def requirement(page: Page, gate: Mapping, scale: Scale) -> Both:
    """A gate as one text: TTFT P95 ≤ 5.00 s."""
    return joined_texts(" ", (gate_title(page, gate), required(gate, gate_number(page, gate, gate["limit"], scale))))


def gate_margin(page: Page, gate: Mapping) -> Both:
    """How far the measured value is on the right side of the limit: percent of the limit, for rates points."""
    limit, value = gate["limit"], gate.get("value")
    if not known(value):
        return both(DASH)
    distance = value - limit if gate.get("op", "<=").startswith(">") else limit - value
    sign = "+" if distance >= 0 else "\u2212"
    if gate_metric(gate) in SHARES:
        return page.said("unit.points", n="%s%.2f" % (sign, abs(100.0 * distance / gate_scale(gate))))
    if not limit:
        return both(DASH)
    number = sign + "{:,.0f}".format(abs(100.0 * distance / limit))
    return Both(number + "\u00a0%", number + "%")


def bullet(page: Page, stage: StageView, gate: Mapping) -> Markup:
    """Measured against the limit on a bar from 0; of a share what is missing to 100 %, since 99.85 % can't be read."""
    limit, value = gate["limit"], gate.get("value")
    if not known(value):
        return Markup("")
    if gate_metric(gate) in SHARES:
        limit, value = 1 - limit / gate_scale(gate), 1 - value / gate_scale(gate)
    full = max(1.5 * limit, 1.05 * value) or 1.0
    kind = "failed" if gate in stage.failed_gates else ""
    return page.fill("bullet", kind=kind, value="%.1f" % (100 * value / full), limit="%.1f" % (100 * limit / full))


# Tables


class Cell(NamedTuple):
    """One cell of a table and how it looks."""

    text: object
    kind: str = ""
    span: int = 1


def heads(page: Page, *keys: str) -> List[List[Cell]]:
    """One row of head cells: the first at the left, the others over figures."""
    return [[Cell(page.said(key), "number" if index else "") for index, key in enumerate(keys)]]


def table(page: Page, heads: Sequence[Sequence[Cell]], rows: Iterable[Tuple[str, Sequence[Cell]]],
          kind: str = "") -> Markup:
    """A table: rows of head cells, then rows of (look, cells), the first of which names its row."""
    head = joined(page.fill("row", kind="", cells=joined(
        page.fill("head", text=cell.text, kind=cell.kind, span=cell.span) for cell in cells)) for cells in heads)
    body = joined(page.fill("row", kind=look, cells=joined(
        page.fill("cell" if index else "row_head", text=cell.text, kind=cell.kind)
        for index, cell in enumerate(cells))) for look, cells in rows)
    return page.fill("table", kind=kind, head=head, rows=body)


# The first screen: facts, verdict, the sentence, six figures, gates


LEVELS = {"rps": "rate", "concurrency": "streams", "cap": "cap", "input_tokens": "input"}  # key of a load -> its word


def level_keys(names: Sequence[Mapping[str, float]]) -> List[str]:
    """In what the loads of a run differ, of LEVELS; their level where they do not."""
    varied = [key for key in LEVELS if len({name.get(key) for name in names}) > 1]
    return varied or ["rps" if is_open(names[0]) else "concurrency"]


def in_order(stages: Sequence[StageView]) -> List[StageView]:
    """The stages by what they differ in, as an axis has them."""
    keys = level_keys([stage.name for stage in stages])
    return sorted(stages, key=lambda stage: [stage.name.get(key, 0) for key in keys])


def level_number(name: Mapping[str, float], key: str) -> str:
    """One number of a load: 16, 4.25, 131,072; a trace's rate is a mean and has three digits."""
    value = name.get(key, 1)
    if "trace" in name and key == "rps":
        return figure(value)
    return count(value) if value == int(value) else "{:,g}".format(value)


def level(name: Mapping[str, float], keys: Sequence[str] = ()) -> str:
    """A load's numbers alone: how many streams, or requests a second, or what the loads differ in; (2) is a repeat."""
    text = " · ".join(level_number(name, key) for key in keys or level_keys([name]) if key in name)
    return text + (" (%d)" % name["again"] if "again" in name else "")


def level_words(page: Page, prefix: str, keys: Sequence[str]) -> Both:
    """What the numbers of a load count: streams, req/s; `prefix` is where they stand."""
    return joined_texts(" · ", (page.said("%s.%s" % (prefix, LEVELS[key])) for key in keys))


def load_words(texts: Mapping[str, str], name: Mapping[str, float], concurrent: bool = False) -> str:
    """A load in the words of a language: 16 streams; 4 req/s, at most 8 in flight; 16 streams (no. 2)."""
    if is_open(name):
        text = texts["rate"].format(n=level_number(name, "rps"))
    else:
        key = "streams.concurrent" if concurrent else "streams"
        key += ".one" if name.get("concurrency", 1) == 1 else ""
        text = texts[key].format(n=level_number(name, "concurrency"))
    for key, word in (("cap", "load.cap"), ("input_tokens", "load.input"), ("again", "load.again")):
        if key in name:
            text = texts[word].format(load=text, n=level_number(name, key))
    return text


def load_text(page: Page, stage: StageView, concurrent: bool = False) -> Both:
    """A stage's load in words, as far as it takes to tell it from the others."""
    return Both(*(load_words(texts, stage.name, concurrent) for texts in page.texts))


def arrival_words(texts: Mapping[str, str], config: Mapping, load: Mapping[str, float]) -> str:
    """How an open loop's requests arrive, in the words of a language."""
    kind, _, shape = str(config.get("arrival", "poisson")).partition(":")
    kind = "trace" if "trace" in load else kind
    key = "arrival." + kind
    return texts[key].format(shape=shape) if key in texts else kind


def shared_by(loads: Sequence[Mapping[str, float]], key: str) -> Optional[float]:
    """What all loads have in common; None where they differ or don't have it."""
    values = {load.get(key) for load in loads}
    return values.pop() if len(values) == 1 else None


def load_levels(page: Page, stages: Sequence[StageView], config: Mapping) -> Both:
    """The kind of load and its levels; where more than the level differs, each number's values in turn."""
    loads, keys = [stage.rows.load for stage in stages], level_keys([stage.name for stage in stages])
    kind = "open" if stages[0].is_open else "closed"
    levels = joined_texts(page.said("list.comma"), [level(stage.name) for stage in stages])
    arrival = Both(*(arrival_words(texts, config, loads[0]) for texts in page.texts))
    if len(stages) > 1 and keys in (["rps"], ["concurrency"]):
        text = page.said("load.%s_stages" % kind, n=len(stages), levels=levels, arrival=arrival)
    elif len(stages) > 1:
        listed = [page.said("load.values", values=joined_texts(page.said("list.comma"), dict.fromkeys(
            level_number(load, key) for load in loads)), what=page.said("picker." + LEVELS[key]))
            for key in LEVELS if any(key in load for load in loads)]
        levels = joined_texts(page.said("list.semicolon"), listed)
        return page.said("load.%s_listed" % kind, n=len(stages), levels=levels, arrival=arrival)
    elif kind == "open":
        text = page.said("load.open", rate=levels, arrival=arrival)
    else:
        text = page.said("load.closed", streams=load_text(page, stages[0]))
    for key, word in (("cap", "load.cap"), ("input_tokens", "load.input")):
        value = shared_by(loads, key)
        if value is not None:
            text = page.said(word, load=text, n=count(value))
    return page.said("load.search", load=text) if config.get("find_max") else text


def duration_text(page: Page, milliseconds: float) -> Both:
    """A duration: 3:10:00 h, 6:27 min, or 45.2 s below a minute."""
    if milliseconds >= 3599500:
        return page.said("wall.hours", n=clock_text(milliseconds))
    if milliseconds >= 60000:
        return page.said("wall.minutes", n=clock_text(milliseconds))
    return page.said("wall.seconds", n=figure(milliseconds / 1000.0))


def load_fact(page: Page, stages: Sequence[StageView], config: Mapping) -> Both:
    """The load of the whole run in words."""
    text, totals = load_levels(page, stages, config), {len(stage.rows.status) for stage in stages}
    duration = config.get("duration_s") or config.get("duration")
    planned = config.get("total_requests") or (totals.pop() if len(totals) == 1 and not duration else None)
    if planned:
        key = "load.requests_each" if len(stages) > 1 else "load.requests"
        text = page.said(key, load=text, n=count(planned))
    if duration:
        text = page.said("load.duration", load=text, duration=duration_text(page, duration * 1000))
    if config.get("warmup"):
        text = page.said("load.warmup", load=text, n=count(config["warmup"]))
    if config.get("shard"):
        text = page.said("load.shard", load=text, shard=config["shard"])
    return text


def read_iso_time(text: str) -> Optional[datetime.datetime]:
    """A UTC time of results.jsonl; None when it can't be read."""
    found = re.match(r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)", text)
    try:
        return datetime.datetime(*map(int, found.groups())) if found else None
    except ValueError:
        return None


def utc_offset(text: str) -> datetime.timedelta:
    """+08:00 as a time span."""
    found = re.match(r"([+-])(\d\d):?(\d\d)", text)
    if not found:
        return datetime.timedelta(0)
    span = datetime.timedelta(hours=int(found.group(2)), minutes=int(found.group(3)))
    return -span if found.group(1) == "-" else span


def span_text(started: datetime.datetime, ended: datetime.datetime, zone: str) -> str:
    """From – to, the date only once when it is the same."""
    end_format = "%H:%M:%S" if started.date() == ended.date() else "%Y-%m-%d %H:%M:%S"
    return "%s – %s %s" % (started.strftime("%Y-%m-%d %H:%M:%S"), ended.strftime(end_format), zone)


def last_end(stages: Sequence[StageView]) -> float:
    """The end of the last measured request, in ms from the run's zero."""
    return max((end for stage in stages for end in stage.rows.columns.get("end_ms", ()) if end == end), default=0.0)


def run_times(header: Mapping, stages: Sequence[StageView]) -> Tuple[str, str]:
    """When the run was: local time with its offset, and the same in UTC."""
    started = read_iso_time(str(header.get("started_at", "")))
    if started is None:
        return str(header.get("started_at", DASH)), ""
    ended = started + datetime.timedelta(milliseconds=last_end(stages))
    offset = str(header.get("utc_offset", "+00:00"))
    zone = utc_offset(offset)
    name = re.sub(r"^([+-])0?(\d+):?(00)?", r"\1\2", offset) if zone else ""
    return span_text(started + zone, ended + zone, "UTC" + name), span_text(started, ended, "UTC")


def merged_values(merged: Mapping) -> Dict[str, object]:
    """What the text of a merged run says: how many shards of how many, and the hosts that they ran on."""
    shards = merged["shards"]
    hosts = list(dict.fromkeys(str(shard.get("host", DASH)) for shard in shards))
    return {"shards": len(shards), "n": len(shards) + len(merged.get("missing", ())), "hosts": few_of(hosts)}


def host_fact(page: Page, header: Mapping) -> Text:
    """From where the endpoint was loaded: a host with its address and system, or the shards that were merged."""
    if header.get("merged"):
        return page.said("from.merged", **merged_values(header["merged"]))
    details = ", ".join(str(part) for part in (
        header.get("address"), " ".join(str(header[key]) for key in ("os", "arch") if header.get(key))) if part)
    return page.said("from", host=header.get("host", DASH), details=details) if details else header.get("host", DASH)


def facts(page: Page, header: Mapping, stages: Sequence[StageView]) -> Markup:
    """Endpoint, when, from where, under which load."""
    local, utc = run_times(header, stages)
    parts = re.split("(?<=/)(?=[^/])", str(header.get("url", DASH)))
    url = joined(page.html(part) + page.fill("break") for part in parts)
    table_of_facts = (("fact.endpoint", url, ""), ("fact.when", local, utc), ("fact.from", host_fact(page, header), ""),
                      ("fact.load", load_fact(page, stages, header.get("config", {})), ""))
    return joined(page.fill("fact", name=page.said(key), value=value, hover=hover)
                  for key, value, hover in table_of_facts)


def reason_text(page: Page, reason: object) -> Text:
    """A reason as the summary gives it: a text, one text a language, or the key of a text with its values."""
    if not isinstance(reason, dict):
        return str(reason)
    if "en" in reason:
        return Both(plain(reason["en"]), plain(reason.get("zh", reason["en"])))
    return Both(*(reason_said(texts, reason) for texts in page.texts))


def reason_said(texts: Mapping[str, str], reason: Mapping[str, Any]) -> str:
    """A reason of the verdict in a language; numbers have the digits that the tables give them."""
    values = {name: figure(value) if isinstance(value, float) else texts.get("value.%s" % value, value)
              for name, value in reason["values"].items()}
    text = texts["reason." + reason["key"]].format(**values)
    if "all_stages" in reason:
        return texts["load.of"].format(loads=texts["load.all"].format(n=reason["all_stages"]), text=text)
    if "loads" in reason:
        between = "list.comma" if all(len(name) == 1 for name in reason["loads"]) else "list.semicolon"
        loads = texts[between].join(load_words(texts, name) for name in reason["loads"])
        return texts["load.of"].format(loads=loads, text=text)
    streams = reason.get("streams")
    if streams is None:
        return text
    return texts["reason.stage"].format(streams=", ".join(map(str, streams)), text=text)


def verdict_key(verdict: Mapping) -> str:
    """The key of the sentence behind a verdict's word."""
    nothing = any(isinstance(reason, dict) and reason.get("key") == "nothing" for reason in verdict.get("reasons", ()))
    return "verdict.nothing.text" if nothing else "verdict.%s.text" % verdict["state"].lower()


def verdict_band(page: Page, summary: Mapping) -> Markup:
    """Can the measurement be trusted: shape, word, sentence and every reason."""
    verdict = summary.get("verdict")
    if not verdict:
        return Markup("")
    state = {"VALID": "valid", "INVALID": "invalid"}.get(verdict.get("state"), "caution")
    items = joined(page.fill("item", text=reason_text(page, reason)) for reason in verdict.get("reasons", ()))
    return page.fill("verdict", state=state, shape=page.fill("shape_" + state), word=page.said("verdict." + state),
                     text=page.said(verdict_key({"state": state, **verdict})),
                     reasons=page.fill("list", items=items) if items else "")


def cut_off_line(page: Page, stages: Sequence[StageView], end: Optional[Mapping]) -> Markup:
    """The line that says that a run has no end line."""
    if end is not None:
        return Markup("")
    total = sum(len(stage.rows.status) for stage in stages)
    text = page.said("cut_off", at=duration_text(page, last_end(stages)), n=count(total))
    return page.fill("note", kind="cut-off", text=text)


def status_name(page: Page, status: str) -> Both:
    """A status in words; one that the texts don't know as it is."""
    key = "status." + status
    return page.said(key) if key in page.texts[0] else both(status)


def error_name(page: Page, error: Mapping) -> Both:
    """The kind of a failure, and its own words where they add something."""
    name, key = status_name(page, str(error.get("status", "other"))), str(error.get("key") or "")
    code = re.search(r"\b[1-5]\d\d\b", key)
    return Both("%s (%s)" % (name.en, code.group()), "%s（%s）" % (name.zh, code.group())) if code else name


def sentence_of_none(page: Page, summary: Mapping) -> Both:
    """Nothing succeeded: the commonest error, as text."""
    failure = summary.get("requests", {}).get("failure", 0)
    errors = sorted(summary.get("errors", ()), key=lambda error: -error.get("count", 0))
    errors = [error for error in errors if error.get("status") not in NOT_JUDGED] or errors
    if not errors:
        return page.said("sentence.nothing")
    return page.said("sentence.none", n=count(failure or summary["requests"].get("total", 0)),
                     error=error_name(page, errors[0]))


def which_passed(page: Page, stages: Sequence[StageView]) -> Both:
    """The loads that passed every gate and those that didn't."""
    lists = [joined_texts(page.said("list.comma"), [load_text(page, view) for view in stages
                                                    if bool(view.failed_gates) == failed]) for failed in (False, True)]
    return page.said("sentence.not_monotone", passed=lists[0], failed=lists[1])


def token_rate(value: float) -> Both:
    """A throughput in words."""
    return Both(figure(value) + " tokens/s", figure(value) + " token/s")


def quotable(statistic: Mapping, stat: str) -> bool:
    """Whether a sentence may cite a percentile: it is there and n is large enough for it."""
    return stat in statistic and stat.lower() not in [str(name).lower() for name in statistic.get("limited", ())]


def what_holds(page: Page, stage: StageView) -> Both:
    """What the endpoint does at the load that held."""
    parts = []
    total, first = stage.figures.get("throughput", {}).get("output_tokens_per_s"), stage.statistic("ttft_ms")
    if known(total):
        parts.append(page.said("sentence.where_tokens", total=token_rate(total)))
    if quotable(first, "p50"):
        parts.append(page.said("sentence.where_began", p50=scale_of(first).said(first["p50"])))
    return page.said("sentence.where", parts=joined_texts(page.said("sentence.and"), parts)) if parts else both("")


def next_fails(page: Page, stage: StageView) -> Both:
    """Which gates fail at the next load."""
    failures = [page.said("failed_gate", name=gate_title(page, gate), value=gate_numbers(page, stage, gate)[1])
                for gate in stage.failed_gates]
    return page.said("sentence.next", load=load_text(page, stage), k=len(failures), n=len(stage.gates),
                     failures=joined_texts(page.said("list.comma"), failures))


def sentence_of_sweep(page: Page, stages: Sequence[StageView]) -> Both:
    """Up to which load every gate holds; where it isn't a question of "up to", which loads passed."""
    stages, keys = in_order(stages), level_keys([view.name for view in stages])
    passing = [not view.failed_gates for view in stages]
    highest = passing.count(True)
    if not highest:
        return joined_texts("", (page.said("sentence.no_stage"), next_fails(page, stages[0])))
    if passing != [True] * highest + [False] * (len(stages) - highest) or (len(keys) > 1 and highest < len(stages)):
        return which_passed(page, stages)
    key = "sentence.up_to" if highest < len(stages) else "sentence.up_to_all" if len(keys) == 1 else "sentence.all"
    text = page.said(key, load=load_text(page, stages[highest - 1], concurrent=True),
                     where=what_holds(page, stages[highest - 1]))
    return joined_texts("", (text, next_fails(page, stages[highest]))) if highest < len(stages) else text


def search_failures(texts: Mapping[str, str], stage: Mapping[str, Any]) -> Dict[str, Any]:
    """How many gates of a stage failed, and which, with what was measured."""
    failed = [entry for entry in stage.get("slo", ()) if not entry["passed"]]
    named = [texts["failed_gate"].format(name=gate_name(texts, entry), value=gate_pair(entry)[0]) for entry in failed]
    return {"k": len(failed), "n": len(stage.get("slo", ())), "failures": texts["list.comma"].join(named)}


def search_place(texts: Mapping[str, str], stage: Mapping[str, Any]) -> str:
    """What the endpoint did at the load that a search found."""
    total, first = stage.get("throughput", {}).get("output_tokens_per_s"), stage.get("ttft_ms") or {}
    parts = [texts["sentence.where_tokens"].format(total=figure(total) + " tok/s")] if known(total) else []
    if quotable(first, "p50"):
        parts.append(texts["sentence.where_began"].format(p50=scale_of(first).said(first["p50"])))
    return texts["sentence.where"].format(parts=texts["sentence.and"].join(parts)) if parts else ""


def search_words(texts: Mapping[str, str], summary: Mapping[str, Any]) -> str:
    """What a search for the highest load found, in the words of a language."""
    search = summary["find_max"]
    kind, failed, blocks = search["kind"], search.get("failed"), {block["stage"]: block for block in summary["stages"]}
    values: Dict[str, Any] = {}
    if failed:
        values.update(search_failures(texts, blocks[failed["stage"]]))
        values["next"] = load_words(texts, {kind: failed["load"]})
    if "load" in search:
        found = [probe["stage"] for probe in search["probes"] if probe["load"] == search["load"]]
        values["load"] = load_words(texts, {kind: search["load"]}, concurrent=True)
        values["confirmed"] = texts["search.confirmed" if search["confirmed"] else "search.unconfirmed"]
        values["where"] = search_place(texts, blocks[found[-1]])
    key = "search.found" if "load" in search else "search.none"
    if failed:
        key += "_client" if failed.get("client") else "_short" if failed.get("short") else ""
    else:
        key += "_cut" if search.get("cut_off") else "_open"
    return texts[key].format(**values)


def finished(stage: StageView) -> int:
    """Requests that succeeded or failed."""
    return stage.requests.get("success", 0) + stage.requests.get("failure", 0)


def sentence_of_few(page: Page, stage: StageView) -> Both:
    """Fewer than twenty answers: their range, no percentiles."""
    first, values = stage.statistic("ttft_ms"), {"k": count(stage.successes), "n": count(finished(stage))}
    if not first:
        return page.said("sentence.few_silent", **values)
    scale = scale_of(first)
    return page.said("sentence.few", min=scale.said(first["min"]), max=scale.said(first["max"]), **values)


def at_load(page: Page, stage: StageView) -> Both:
    """The opening of a sentence: With 16 concurrent streams."""
    key = "sentence.at_rate" if stage.is_open else "sentence.at_streams"
    return page.said(key, load=load_text(page, stage, concurrent=True))


def failure_span(page: Page, stage: StageView) -> Both:
    """When the failures were, if four in five lie in under half the wall time."""
    ends = sorted(end for status, end in zip(stage.rows.status, stage.rows.columns.get("end_ms", ()))
                  if status != "ok" and status not in NOT_JUDGED and end == end)
    window = math.ceil(0.8 * len(ends))
    if window < 2:
        return both("")
    first = min(range(len(ends) - window + 1), key=lambda index: ends[index + window - 1] - ends[index])
    begin, end = ends[first], ends[first + window - 1]
    if end - begin >= 0.5 * stage.figures.get("wall_time_ms", 0):
        return both("")
    return page.said("sentence.failed_span", from_time=clock_text(begin), to_time=clock_text(end))


def began(page: Page, stage: StageView, prefix: str = "") -> Both:
    """How soon the answers began; where nothing was streamed, how soon they were complete."""
    first = stage.statistic("ttft_ms")
    statistic = first or stage.statistic("latency_ms")
    key = prefix or ("sentence.began" if first else "sentence.took")
    scale = scale_of(statistic)
    values = {stat: scale.said(statistic.get(stat)) for stat in ("p50", "p95")}
    if prefix and not first:
        return page.said("sentence.rest_none", n=count(stage.successes))
    key += "_p95" if quotable(statistic, "p95") else ""
    return page.said(key, at=at_load(page, stage), **values)


def felt(page: Page, stage: StageView) -> List[Both]:
    """In an open loop, how soon the answers began for those who waited for their turn."""
    statistic = stage.statistic("ttft_from_scheduled_ms")
    if not stage.is_open or not statistic:
        return []
    key = "sentence.due_p95" if quotable(statistic, "p95") else "sentence.due"
    scale = scale_of(statistic)
    return [page.said(key, p50=scale.said(statistic["p50"]), p95=scale.said(statistic["p95"]))]


def sentence_of_failures(page: Page, stage: StageView) -> Both:
    """More than one request in twenty failed."""
    errors = sorted(stage.figures.get("errors", ()), key=lambda error: -error.get("count", 0))
    errors = [error for error in errors if error.get("status") not in NOT_JUDGED] or errors
    status = error_name(page, errors[0]) if errors else page.said("status.other")
    share = 1.0 - stage.requests["success_rate"]
    opening = page.said("sentence.failed", at=at_load(page, stage), x=percent(share), status=status,
                        span=failure_span(page, stage))
    return joined_texts("", (opening, began(page, stage, "sentence.rest")))


def gates_passed(page: Page, stage: StageView) -> List[Both]:
    """How many of the gates passed."""
    if not stage.gates:
        return []
    passed = len(stage.gates) - len(stage.failed_gates)
    key = "sentence.gates_some" if stage.failed_gates else "sentence.gates" if passed > 1 else "sentence.gate"
    return [page.said(key, k=passed, n=len(stage.gates))]


def wrote(page: Page, stage: StageView) -> List[Both]:
    """How much the endpoint wrote, where tokens are known."""
    total = stage.figures.get("throughput", {}).get("output_tokens_per_s")
    if not known(total):
        return []
    each = stage.statistic("request_tps").get("p50")
    key = "sentence.wrote_each" if known(each) else "sentence.wrote"
    return [page.said(key, total=token_rate(total), each=figure(each))]


def sentence(page: Page, summary: Mapping, stages: Sequence[StageView], stage: StageView) -> Both:
    """The run in one sentence; it claims nothing that isn't a figure of the summary."""
    total = sum(view.successes for view in stages)
    if summary.get("verdict", {}).get("state") == "INVALID":
        return page.said("sentence.invalid")
    if not total:
        return sentence_of_none(page, summary)
    if "find_max" in summary:
        return Both(*(search_words(texts, summary) for texts in page.texts))
    if len(stages) > 1 and stage.gates:
        return sentence_of_sweep(page, stages)
    if stage.successes < 20:
        return sentence_of_few(page, stage)
    if stage.requests.get("success_rate", 1.0) < 0.95:
        return sentence_of_failures(page, stage)
    return joined_texts("", [began(page, stage)] + felt(page, stage) + wrote(page, stage) + gates_passed(page, stage))


class Pair(NamedTuple):
    """One line under a big figure."""

    name: object
    value: Text
    kind: str = ""
    hover: str = ""


class Tile(NamedTuple):
    """One of the six figures."""

    title: str
    metric: str
    value: Text
    unit: Text
    stat: Text
    kind: str
    pairs: List[Pair]


def stat_name(page: Page, statistic: Mapping, stat: str) -> Markup:
    """P99, with a dagger where n is too small for it."""
    return joined((page.html(stat.upper()), dagger(page, statistic, stat)))


def dagger(page: Page, statistic: Mapping, stat: str) -> Markup:
    """The mark of a percentile that n is too small for."""
    return page.fill("limited") if statistic and not quotable(statistic, stat) else Markup("")


def due_pairs(page: Page, stage: StageView, metric: str) -> List[Pair]:
    """In an open loop: the same time counted from when the request was due."""
    name = metric.replace("_ms", "_from_scheduled_ms")
    statistic = stage.statistic(name)
    if not stage.is_open or not statistic:
        return []
    scale = scale_of(statistic)
    return [Pair(joined((page.html(page.said("pair.due_" + stat)), dagger(page, statistic, stat))),
                 scale.said(statistic.get(stat)), "bad" if stage.failed(name, stat) else "")
            for stat in MARKED_PERCENTILES]


def first_output_pair(page: Page, stage: StageView, metric: str) -> List[Pair]:
    """A model that thinks first: when its first output came."""
    first, text = stage.statistic("ttfe_ms"), stage.statistic("ttft_ms")
    if metric != "ttft_ms" or not first or first.get("p50") == text.get("p50"):
        return []
    return [Pair(page.said("pair.first_output"), scale_of(first).said(first["p50"]))]


def time_tile(page: Page, stage: StageView, title: str, metric: str) -> Tile:
    """P50 of a time, with P95, P99 and n under it."""
    statistic, scale = stage.statistic(metric), scale_of(stage.statistic(metric))
    pairs = [Pair(stat_name(page, statistic, stat), scale.said(statistic.get(stat)),
                  "bad" if stage.failed(metric, stat) else "") for stat in ("p95", "p99")]
    pairs += due_pairs(page, stage, metric) + first_output_pair(page, stage, metric)
    pairs.append(Pair(page.said("pair.n"), count(statistic.get("n", 0)), "minor"))
    value = figure(statistic["p50"] / scale.divisor) if statistic else DASH
    return Tile(title, metric, value, scale.unit if statistic else "", stat_name(page, statistic, "p50") if statistic
                else "", "bad" if stage.failed(metric, "p50") else "", pairs)


def success_tile(page: Page, stage: StageView) -> Tile:
    """The success rate and what it is made of."""
    requests = stage.requests
    lost = "%s, %s" % (count(requests.get("cancelled", 0)), count(requests.get("dropped", 0)))
    share = requests.get("success_rate")
    pairs = [Pair(page.said("pair.succeeded"), count(stage.successes)),
             Pair(page.said("pair.failed"), count(requests.get("failure", 0))),
             Pair(page.said("pair.cancelled"), lost, "minor")]
    bad = any(gate_metric(gate) == "success_rate" for gate in stage.failed_gates)
    return Tile("tile.success", "success_rate", percent_number(share) if known(share) else DASH,
                page.said("unit.percent") if known(share) else "", "", "bad" if bad else "", pairs)


def ttft_tile(page: Page, stage: StageView) -> Tile:
    """Time to the first visible text."""
    return time_tile(page, stage, "tile.ttft", "ttft_ms")


def latency_tile(page: Page, stage: StageView) -> Tile:
    """Time to the end of the answer."""
    return time_tile(page, stage, "tile.latency", "latency_ms")


def tpot_tile(page: Page, stage: StageView) -> Tile:
    """Time per token; where tokens are unknown, the gap between chunks."""
    if stage.statistic("tpot_ms") or not stage.statistic("itl_ms"):
        return time_tile(page, stage, "tile.tpot", "tpot_ms")
    return time_tile(page, stage, "tile.itl", "itl_ms")


def throughput_tile(page: Page, stage: StageView) -> Tile:
    """Tokens per second in all; characters where tokens aren't counted."""
    throughput, tokens = stage.figures.get("throughput", {}), stage.figures.get("tokens", {})
    total, characters = throughput.get("output_tokens_per_s"), throughput.get("output_chars_per_s")
    if not known(total) and known(characters):
        unit = page.said("unit.chars_per_s")
        return Tile("tile.throughput", "output_chars_per_s", figure(characters), unit, "", "", [])
    unit = page.said("unit.tokens_per_s")
    steady = measured(throughput.get("steady_output_tokens_per_s"), unit)
    pairs = [Pair(page.said("pair.steady"), steady, "", plain(throughput.get("steady_absent_reason", ""))),
             Pair(page.said("pair.each"), measured(stage.statistic("request_tps").get("p50"), unit)),
             Pair(page.said("pair.tokens"), count(tokens["out"]) if known(tokens.get("out")) else DASH, "minor")]
    bad = any(gate_metric(gate) in ("output_tokens_per_s", "steady_output_tokens_per_s") for gate in stage.failed_gates)
    return Tile("tile.throughput", "output_tokens_per_s", figure(total), unit if known(total) else "", "",
                "bad" if bad else "", pairs)


def requests_tile(page: Page, stage: StageView) -> Tile:
    """Requests per second, and how many of them met every limit."""
    throughput, unit = stage.figures.get("throughput", {}), page.said("unit.requests_per_s")
    pairs = []
    if known(throughput.get("goodput_rps")):
        bad = ["bad" if stage.failed(name, "") else "" for name in ("goodput_rps", "goodput_share")]
        pairs = [Pair(page.said("pair.goodput"), measured(throughput["goodput_rps"], unit), bad[0]),
                 Pair(page.said("pair.share"), percent(throughput.get("goodput_share")), bad[1])]
    wall = stage.figures.get("wall_time_ms")
    pairs.append(Pair(page.said("pair.wall"), duration_text(page, wall) if known(wall) else DASH, "minor"))
    return Tile("tile.requests", "rps", figure(throughput.get("rps")), unit if known(throughput.get("rps")) else "", "",
                "bad" if any(gate_metric(gate) == "rps" for gate in stage.failed_gates) else "", pairs)


TILES = (success_tile, ttft_tile, latency_tile, tpot_tile, throughput_tile, requests_tile)


def definition(page: Page, metric: str) -> Optional[Both]:
    """What a metric means, in both languages."""
    if metric not in METRICS:
        return None
    english = METRICS[metric].definition
    return Both(with_signs(plain(english)), page.texts[1].get("definition." + metric, with_signs(plain(english))))


def term(page: Page, metric: str, label: Both, name: str) -> Markup:
    """A label that shows its definition when it is pointed at."""
    text = definition(page, metric)
    return page.fill("term", text=label, definition=text, id=name) if text else page.html(label)


def tile_markup(page: Page, stage: StageView, tile: Tile) -> Markup:
    """One figure as HTML."""
    label = term(page, tile.metric, page.said(tile.title), "tip-%s-%d" % (tile.metric, stage.number))
    pairs = joined(page.fill("pair", name=pair.name, value=pair.value, kind=pair.kind, hover=pair.hover)
                   for pair in tile.pairs)
    return page.fill("tile", label=label, value=tile.value, unit=tile.unit, stat=tile.stat, kind=tile.kind, pairs=pairs)


def tiles(page: Page, stage: StageView) -> Markup:
    """The six figures, and the footnote when one of them is of limited meaning."""
    made = [build(page, stage) for build in TILES]
    row = page.fill("tiles", tiles=joined(tile_markup(page, stage, tile) for tile in made))
    limited = any(statistic and not all(quotable(statistic, stat) for stat in MARKED_PERCENTILES) for statistic in (
        stage.statistic(tile.metric) for tile in made))
    notes = [page.said("open.quote")] if stage.is_open and stage.successes else []
    notes += [page.said("limited", n=count(stage.successes))] if limited else []
    return joined([row] + [page.fill("note", kind="", text=note) for note in notes])


def gate_row(page: Page, stage: StageView, gate: Mapping) -> Tuple[str, List[Cell]]:
    """Name, required, measured, margin, bar, result."""
    limit, value = gate_numbers(page, stage, gate)
    state = "" if not stage.judged or stage.limited else "passed" if gate.get("passed") else "failed"
    mark = {"passed": "✓ ", "failed": "✕ ", "": ""}[state]
    result = page.said("gate." + state) if state else DASH
    return state, [Cell(joined_texts("", (mark, gate_title(page, gate))), "mark"),
                   Cell(required(gate, limit), "number"), Cell(value, "number value"),
                   Cell(gate_margin(page, gate), "number margin"), Cell(bullet(page, stage, gate), "against"),
                   Cell(result, "number result value")]


def gates_block(page: Page, stage: StageView) -> Markup:
    """The gates of a run of one stage; nothing when it has none."""
    if not stage.gates:
        return Markup("")
    passed = len(stage.gates) - len(stage.failed_gates)
    said = page.said("gates.passed", k=passed, n=len(stage.gates)) if stage.judged else page.said("gates.not_judged")
    kind = "" if not stage.judged else "failed" if stage.failed_gates else "passed"
    head = [[Cell(page.said("gate.name")), Cell(page.said("gate.required"), "number"),
             Cell(page.said("gate.measured"), "number"), Cell(page.said("gate.margin"), "number margin"),
             Cell(page.said("gate.against"), "number against"), Cell(page.said("gate.result"), "number result")]]
    content = table(page, head, (gate_row(page, stage, gate) for gate in stage.gates), "gates")
    return page.fill("subsection", title=page.said("gates"), said=said, kind=kind, content=content)


class StageColumn(NamedTuple):
    """One figure a stage: the metric and statistic a gate would name, or a path into the summary."""

    metric: str
    stat: str
    group: str
    title: str


STAGE_COLUMNS = tuple(
    [StageColumn(metric, stat, group, "column." + stat) for metric, group, stats in (
        ("ttft_ms", "stage.ttft", MARKED_PERCENTILES),
        ("ttft_from_scheduled_ms", "stage.ttft_due", MARKED_PERCENTILES),
        ("latency_ms", "stage.latency", MARKED_PERCENTILES),
        ("latency_from_scheduled_ms", "stage.latency_due", MARKED_PERCENTILES),
        ("tpot_ms", "stage.tpot", MARKED_PERCENTILES[:2])) for stat in stats]
    + [StageColumn("request_tps", "p50", "stage.tokens", "stage.each"),
       StageColumn("output_tokens_per_s", "", "stage.tokens", "stage.all"),
       StageColumn("rps", "", "", "stage.requests")])


def stage_head(page: Page, stages: Sequence[StageView], columns: Sequence[StageColumn],
               scales: Mapping[str, Scale]) -> List[List[Cell]]:
    """The head of the stage table in two rows: groups with their unit, then the columns."""
    groups = [Cell("", span=3 if any(stage.gates for stage in stages) else 2)]
    for group, members in itertools.groupby(columns, key=lambda column: column.group):
        inside = list(members)
        title = page.said(group, unit=scales[inside[0].metric].unit) if group else ""
        groups.append(Cell(title, "group" if group else "", len(inside)))
    load = level_words(page, "stage", level_keys([stage.name for stage in stages]))
    gates = [Cell(page.said("stage.gates"))] if any(stage.gates for stage in stages) else []
    titles = [Cell(load)] + gates + [Cell(page.said("stage.success"), "number")]
    for column in columns:
        limited = any(stage.statistic(column.metric) and column.stat and not quotable(
            stage.statistic(column.metric), column.stat) for stage in stages)
        mark = page.fill("limited") if limited else ""
        titles.append(Cell(joined((page.html(page.said(column.title)), mark)), "number"))
    return [groups, titles]


def stage_scale(stages: Sequence[StageView], metric: str) -> Scale:
    """The unit of a column: seconds if any stage shows this metric in seconds."""
    if not metric.endswith("_ms"):
        return MILLISECONDS
    return SECONDS if any(scale_of(stage.statistic(metric)) is SECONDS for stage in stages) else MILLISECONDS


def stage_value(stage: StageView, column: StageColumn) -> Optional[float]:
    """The figure of a stage that a column shows."""
    if column.stat:
        return stage.statistic(column.metric).get(column.stat)
    return stage.figures.get("throughput", {}).get(column.metric)


def stage_row(page: Page, stage: StageView, keys: Sequence[str], columns: Sequence[StageColumn],
              scales: Mapping[str, Scale]) -> List[Cell]:
    """The figures of one stage."""
    cells = [Cell(level(stage.name, keys))]
    if stage.gates:
        state = "" if not stage.judged or stage.limited else "failed" if stage.failed_gates else "passed"
        mark = {"passed": "✓ ", "failed": "✕ ", "": "– " if stage.limited else ""}[state]
        said = page.said("gate.client" if stage.limited else "gate." + state) if state or stage.limited else DASH
        cells.append(Cell(joined_texts("", (mark, said)), state + " mark"))
    bad = any(gate_metric(gate) == "success_rate" for gate in stage.failed_gates)
    cells.append(Cell(percent(stage.requests.get("success_rate")), "number failed" if bad else "number"))
    for column in columns:
        value = stage_value(stage, column)
        text = figure(value / scales[column.metric].divisor) if known(value) else DASH
        cells.append(Cell(text, "number failed" if stage.failed(column.metric, column.stat) else "number"))
    return cells


def stage_table(page: Page, stages: Sequence[StageView], shown: StageView) -> Markup:
    """One line a stage, one unit a column, failing cells marked, the shown stage highlighted."""
    columns = [column for column in STAGE_COLUMNS if any(known(stage_value(stage, column)) for stage in stages)
               and (stages[0].is_open or not column.metric.endswith("_from_scheduled_ms"))]
    scales = {column.metric: stage_scale(stages, column.metric) for column in columns}
    for metric in [metric for metric in scales if metric.endswith("_from_scheduled_ms")]:
        twin = metric.replace("_from_scheduled", "")  # a time from due is read beside the one from start: in one unit
        if scales.get(twin, scales[metric]) != scales[metric]:
            scales[metric] = scales[twin] = SECONDS
    head = stage_head(page, stages, columns, scales)
    keys = level_keys([stage.name for stage in stages])
    rows = (("chosen" if stage is shown else "", stage_row(page, stage, keys, columns, scales)) for stage in stages)
    gated = any(stage.gates for stage in stages)
    said = joined_texts(" · ", (requirement(page, gate, stage_scale(stages, gate_metric(gate)))
                                for gate in shown.gates))
    limited = any(stage.statistic(column.metric).get("limited") for stage in stages for column in columns)
    note = page.fill("note", kind="", text=page.said("limited.stages" if limited else "highlighted"))
    return page.fill("subsection", title=page.said("gates.stages" if gated else "stages"), said=said if gated else "",
                     kind="", content=joined((table(page, head, rows, "stages"), note)))


def throughput_rank(stage: StageView) -> Tuple[float, float]:
    """What the best stage has most of: steady tokens, or tokens, or else requests per second."""
    throughput = stage.figures.get("throughput", {})
    tokens = throughput.get("steady_output_tokens_per_s", throughput.get("output_tokens_per_s", 0))
    return tokens if known(tokens) else 0.0, throughput.get("rps", 0.0)


def choose_stage(stages: Sequence[StageView], search: Mapping) -> Tuple[StageView, str]:
    """The stage that the page opens with, and why: the highest load that passed every gate, or that a search found."""
    found = [stage for stage in stages if "load" in search and stage.rows.load.get(search["kind"]) == search["load"]]
    if found:
        return found[-1], "chosen.passed"
    stages = in_order(stages)
    if not any(stage.gates for stage in stages):
        return max(stages, key=throughput_rank), "chosen.throughput"
    passed = [stage for stage in stages if stage.holds]
    return (passed[-1], "chosen.passed") if passed else (stages[0], "chosen.none")


# Charts: what each one draws, computed here so that the page needs no records


class Chart(NamedTuple):
    """What a panel draws: the specification for the script, and the words around it."""

    spec: Mapping
    finding: Both
    sub: Text = ""
    note: Text = ""
    key: Tuple[str, ...] = ()


def rounded_to(value: float, digits: int = 5) -> Optional[float]:
    """A number short enough for the page; None for one that JSON can't hold."""
    return float("%.*g" % (digits, value)) if math.isfinite(value) else None


def interpolated(ordered: Sequence[float], share: float) -> float:
    """The quantile of sorted values by linear interpolation, as statistics.quantiles(method="inclusive") has it."""
    place = share * (len(ordered) - 1)
    low = min(int(place), len(ordered) - 1)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


ROUND_STEPS = (1.0, 2.0, 2.5, 5.0)


def round_step(width: float) -> float:
    """The largest 1, 2, 2.5 or 5 times a power of ten that is not above this width."""
    power = 10.0 ** math.floor(math.log10(width))
    return max((step * power for step in ROUND_STEPS if step * power <= width * (1 + 1e-9)), default=power)


def edge_count(low: float, high: float, step: float) -> int:
    """How many bins of this width cover the values."""
    return max(1, math.ceil(high / step) - math.floor(low / step))


def linear_edges(low: float, high: float, width: float) -> List[float]:
    """Bin edges on round values: the width brought down to a round one, 12 bins at least and 60 at most."""
    if high <= low:
        return [math.floor(low), math.floor(low) + 1.0]
    span = high - low
    step = round_step(min(width, span) if width > 0 else span / 30)
    while edge_count(low, high, step) < 12:
        step = round_step(step * 0.99)
    while edge_count(low, high, step) > 60:
        step = min(factor * 10.0 ** power for factor in ROUND_STEPS for power in range(
            math.floor(math.log10(step)), math.floor(math.log10(step)) + 2) if factor * 10.0 ** power > step * 1.001)
    first = math.floor(low / step)
    return [(first + index) * step for index in range(edge_count(low, high, step) + 1)]


def log_edges(low: float, high: float, per_decade: int) -> List[float]:
    """Bin edges at equal ratios, so many a decade."""
    first, last = math.floor(math.log10(low) * per_decade), math.ceil(math.log10(high) * per_decade)
    return [10.0 ** (index / per_decade) for index in range(first, max(last, first + 1) + 1)]


def is_logarithmic(low: float, middle: float, high: float) -> bool:
    """The log rule: the largest is more than six times the median."""
    return low > 0 and middle > 0 and high / middle > 6


def binned(edges: Sequence[float], below: Callable[[float], float], total: int) -> List[int]:
    """Counts between the edges from the number of values below each; every value is in one bin."""
    inner = [min(total, max(0, round(below(edge)))) for edge in edges[1:-1]]
    bounds = [0] + inner + [total]
    return [after - before for before, after in zip(bounds, bounds[1:])]


def histogram_spec(edges: Sequence[float], counts: Sequence[int], logarithmic: bool, scale: Scale) -> Dict:
    """The part of a histogram's specification that all of them share; empty bins at either end are left out."""
    filled = [index for index, number in enumerate(counts) if number]
    first, last = filled[0], filled[-1] + 1
    return {"kind": "histogram", "log": logarithmic, "divisor": scale.divisor, "unit": scale.unit,
            "edges": [rounded_to(edge, 7) for edge in edges[first:last + 1]], "counts": list(counts[first:last])}


def marks_of(statistic: Mapping, scale: Scale, names: Sequence[str] = MARKED_PERCENTILES) -> List[Dict]:
    """The percentiles of the summary as marks of a chart, with their labels."""
    return [{"name": name, "value": statistic[name], "text": "%s %s%s" % (
        name.upper(), scale.said(statistic[name]), "" if quotable(statistic, name) else " †")}
        for name in names if known(statistic.get(name))]


def figures_text(statistic: Mapping, scale: Scale) -> str:
    """P50, P95 and P99 in words."""
    return ", ".join(mark["text"] for mark in marks_of(statistic, scale))


def time_histogram(page: Page, stage: StageView, metric: str, title: str) -> Optional[Chart]:
    """The distribution of a time; fewer than thirty values are shown one by one."""
    ordered, statistic = stage.samples[metric], stage.statistic(metric)
    if not ordered or not statistic:
        return None
    scale, total = scale_of(statistic), len(ordered)
    low, high = ordered[0], ordered[-1]
    logarithmic = is_logarithmic(low, statistic["p50"], high)
    if total < 30:
        spec = {"kind": "strip", "log": logarithmic, "divisor": scale.divisor, "unit": scale.unit,
                "values": [rounded_to(value) for value in ordered]}
    else:
        width = 2 * (interpolated(ordered, 0.75) - interpolated(ordered, 0.25)) / total ** (1 / 3)
        edges = log_edges(low, high, 40 if total > 5000 else 20) if logarithmic else linear_edges(low, high, width)
        counts = binned(edges, lambda edge: bisect.bisect_left(ordered, edge), total)
        spec = histogram_spec(edges, counts, logarithmic, scale)
    axis = page.said("axis." + title, unit=scale.unit)
    spec.update(marks=marks_of(statistic, scale, MARKED_PERCENTILES if total >= 30 else MARKED_PERCENTILES[:1]),
                x=page.said("axis.log", name=axis) if logarithmic else axis, y=page.said("axis.requests"))
    finding = page.said("finding.times", name=metric_label(page, metric), n=count(total),
                        figures=figures_text(statistic, scale))
    return Chart(spec, finding, page.said("panel.n", n=count(total)))


def ttft_histogram(page: Page, stage: StageView) -> Optional[Chart]:
    """The distribution of TTFT."""
    return time_histogram(page, stage, "ttft_ms", "ttft")


def latency_histogram(page: Page, stage: StageView) -> Optional[Chart]:
    """The distribution of the latency."""
    return time_histogram(page, stage, "latency_ms", "latency")


CURVE_SHARES = tuple([index / 120 for index in range(109)] + [0.9 + index / 800 for index in range(1, 81)])
CURVES = (("ttft_ms", "curve.ttft", "b", False), ("latency_ms", "curve.latency", "a", False),
          ("ttft_from_scheduled_ms", "curve.ttft_due", "b", True),
          ("latency_from_scheduled_ms", "curve.latency_due", "a", True))


def curve_points(ordered: Sequence[float]) -> List[Optional[float]]:
    """Time and share, one after the other, at fewer than two hundred quantiles, denser at the slow end."""
    shares = CURVE_SHARES if len(ordered) > len(CURVE_SHARES) else [
        index / (len(ordered) - 1) for index in range(len(ordered))]
    return [number for share in shares for number in (rounded_to(interpolated(ordered, share)), rounded_to(share, 4))]


def answered_curves(page: Page, stage: StageView) -> Optional[Chart]:
    """The share of requests answered within a time; in an open loop also counted from when they were due."""
    chosen = [curve for curve in CURVES if len(stage.samples.get(curve[0], ())) >= 5
              and stage.samples[curve[0]][0] > 0 and stage.statistic(curve[0]) and (stage.is_open or not curve[3])]
    if not chosen:
        return None
    series = [{"name": page.said(label), "colour": colour, "dashed": dashed,
               "points": curve_points(stage.samples[metric]),
               "marks": [[stage.statistic(metric)[stat], int(stat[1:]) / 100] for stat in MARKED_PERCENTILES
                         if known(stage.statistic(metric).get(stat))]} for metric, label, colour, dashed in chosen]
    words = "; ".join("%s %s" % (metric[:-3], figures_text(stage.statistic(metric), scale_of(stage.statistic(metric))))
                      for metric, _, _, _ in chosen)
    spec = {"kind": "curves", "series": series, "x": page.said("axis.time")}
    return Chart(spec, page.said("finding.answered", figures=words), page.said("panel.answered.sub"))


def gap_edge(bucket: int) -> float:
    """The lower edge of a bucket of itl_hist in ms; bucket 0 holds everything below a microsecond."""
    return 0.001 * math.exp((bucket - 1) * LOG_STEP) if bucket else 0.0


def gaps_below(buckets: Sequence[Tuple[int, int]]) -> Callable[[float], float]:
    """How many gaps are shorter than a time; within a bucket they count as evenly spread."""
    lows = [gap_edge(bucket) for bucket, _ in buckets]
    before = [0] + list(itertools.accumulate(number for _, number in buckets))

    def below(edge: float) -> float:
        index = bisect.bisect_right(lows, edge) - 1
        if index < 0:
            return 0.0
        low, high = lows[index], gap_edge(buckets[index][0] + 1)
        return before[index] + min(1.0, (edge - low) / (high - low)) * buckets[index][1]

    return below


def gaps_histogram(page: Page, stage: StageView) -> Optional[Chart]:
    """The distribution of the gaps between chunks, from the merged histograms of the requests."""
    buckets, statistic = sorted(stage.rows.itl_hist.items()), stage.statistic("itl_ms")
    total = sum(number for _, number in buckets)
    if not total or not statistic:
        return None
    scale, low, high = scale_of(statistic), gap_edge(buckets[0][0]), gap_edge(buckets[-1][0] + 1)
    floor = max(low, statistic["p50"] / 100, 0.001)
    logarithmic = is_logarithmic(floor, statistic["p50"], high) or low < floor
    if logarithmic:
        edges = log_edges(floor, high, 40 if total > 5000 else 20)
    else:
        width = 2 * (statistic["p90"] - statistic["p50"]) / total ** (1 / 3)
        edges = linear_edges(low, high, width)
    spec = histogram_spec(edges, binned(edges, gaps_below(buckets), total), logarithmic, scale)
    axis = page.said("axis.gap", unit=scale.unit)
    spec.update(marks=marks_of(statistic, scale), x=page.said("axis.log", name=axis) if logarithmic else axis,
                y=page.said("axis.gaps"))
    first = page.said("panel.gaps.first", edge=scale.said(edges[1])) if low < edges[0] else both("")
    return Chart(spec, page.said("finding.gaps", n=count(total), figures=figures_text(statistic, scale)),
                 page.said("panel.gaps.sub", n=count(total)), joined_texts("", (page.said("panel.gaps.note"), first)))


# Where the time goes

PHASES = ("cap", "queue", "connect", "head", "first", "think", "answer")
PHASE_COLOURS = {"cap": "a"}  # the others have a colour of their own name


def fastest_first(rows: "Rows") -> array.array:
    """The rows of the successful requests whose latency and beginning are known, by latency."""
    latencies = rows.columns["latency_ms"]
    columns = zip(rows.status, rows.columns["ttfb_ms"], rows.columns["ttfe_ms"], latencies)
    known = array.array("L", (row for row, (status, head, first, latency) in enumerate(columns)
                              if status == "ok" and head == head and first == first and latency == latency))
    return ordered_places(latencies, known)


def phases_of(rows: "Rows", order: Sequence[int]) -> Iterator[array.array]:
    """The milliseconds of the seven phases of these requests, one phase after the other."""
    def taken(name: str) -> Iterator[float]:
        return map(rows.columns[name].__getitem__, order)

    heads, firsts = array.array("d", taken("ttfb_ms")), array.array("d", taken("ttfe_ms"))
    # No text, NaN, is not larger than the first output and leaves it as the beginning of the answer.
    begun = array.array("d", map(max, firsts, taken("ttft_ms")))
    capped = array.array("d", (wait if wait == wait else 0.0 for wait in taken("capped_ms")))
    yield capped
    yield array.array("d", (max(0.0, queue - slot) if queue == queue else 0.0
                            for queue, slot in zip(taken("queue_ms"), capped)))
    yield array.array("d", (connect if connect == connect else 0.0 for connect in taken("connect_ms")))
    yield heads
    yield array.array("d", (max(0.0, first - head) for first, head in zip(firsts, heads)))
    yield array.array("d", map(float.__sub__, begun, firsts))
    yield array.array("d", (max(0.0, latency - text) for latency, text in zip(taken("latency_ms"), begun)))


def phases_chart(page: Page, stage: StageView) -> Optional[Chart]:
    """Mean time per phase in groups of equal size from the fastest to the slowest requests."""
    order = fastest_first(stage.rows)
    total = len(order)
    if total < 10:
        return None
    groups = 20 if total >= 200 else 10 if total >= 40 else 5
    bounds = [round(index * total / groups) for index in range(groups + 1)]
    means, overall = [], []
    for spans in phases_of(stage.rows, order):
        means.append([sum(spans[low:high]) / (high - low) for low, high in zip(bounds, bounds[1:])])
        overall.append(sum(spans) / total)
    drawn = [phase for phase in range(len(PHASES)) if overall[phase] >= 0.0004 * sum(overall)]
    tiny = [phase for phase in range(len(PHASES)) if phase not in drawn and overall[phase] > 0]
    scale = scale_of(stage.statistic("latency_ms"))
    each = percent(1.0 / groups)
    each = Both(each.en.replace(".0", ""), each.zh.replace(".0", ""))
    spec = {"kind": "phases", "divisor": scale.divisor, "unit": scale.unit, "x": page.said("axis.groups"),
            "names": [page.said("phase." + PHASES[phase]) for phase in drawn],
            "colours": [PHASE_COLOURS.get(PHASES[phase], PHASES[phase]) for phase in drawn],
            "values": [[rounded_to(value, 4) for value in means[phase]] for phase in drawn],
            "ends": [page.said("axis.fastest", x=each), page.said("axis.median"), page.said("axis.slowest", x=each)]}
    words = [page.said("panel.phases.mean", phase=page.said("phase." + PHASES[phase]), value=figure(overall[phase]))
             for phase in range(len(PHASES)) if overall[phase] > 0]
    comma = Both(", ", "、")
    note = page.said("panel.phases.note", phases=joined_texts(comma, [page.said(
        "panel.phases.mean", phase=page.said("phase." + PHASES[phase]), value=figure(overall[phase]))
        for phase in tiny])) if tiny else ""
    return Chart(spec, page.said("finding.phases", n=count(total), k=groups, figures=joined_texts(comma, words)),
                 page.said("panel.phases.sub"), note, tuple(PHASES[phase] for phase in drawn))


def slowest_chart(page: Page, stage: StageView) -> Optional[Chart]:
    """The slowest requests one by one, each from when it was due to its end."""
    order = [row for row, _ in stage.rows.slowest]
    if not order:
        return None
    spans = list(phases_of(stage.rows, order))
    # A connection that was opened ahead of time took none of it: what stands between due and start, less the queue.
    due, start, queue = (stage.rows.columns[name] for name in ("scheduled_ms", "start_ms", "queue_ms"))
    spans[PHASES.index("connect")] = array.array("d", (max(0.0, start[row] - due[row] - queue[row]) for row in order))
    totals = list(map(math.fsum, zip(*spans)))
    drawn = [phase for phase in range(len(PHASES)) if max(spans[phase]) >= 0.0004 * max(totals)]
    scale = scale_of(stage.statistic("latency_ms"))
    spec = {"kind": "timelines", "divisor": scale.divisor, "unit": scale.unit,
            "x": page.said("axis.from_due", unit=scale.unit),
            "names": [page.said("phase." + PHASES[phase]) for phase in drawn],
            "colours": [PHASE_COLOURS.get(PHASES[phase], PHASES[phase]) for phase in drawn],
            "values": [[rounded_to(value, 4) for value in spans[phase]] for phase in drawn],
            "requests": [plain(names.get("request_id", "")) for _, names in stage.rows.slowest]}
    finding = page.said("finding.slowest", n=len(order), low=measured(min(totals) / scale.divisor, scale.unit),
                        high=measured(max(totals) / scale.divisor, scale.unit))
    return Chart(spec, finding, page.said("panel.slowest.sub"), "", tuple(PHASES[phase] for phase in drawn))


SCATTER_POINTS = 1500


def scatter_places(across: Sequence[float], up: Sequence[float]) -> Sequence[int]:
    """The places of at most SCATTER_POINTS points: those beyond P99 on either axis first, then evenly picked ones."""
    if len(across) <= SCATTER_POINTS:
        return range(len(across))
    right, top = (interpolated(sorted(values), 0.99) for values in (across, up))
    far, near = array.array("L"), array.array("L")
    for place, (x, y) in enumerate(zip(across, up)):
        (far if x > right or y > top else near).append(place)
    shown = evenly(far, SCATTER_POINTS // 2)
    return [*shown, *evenly(near, SCATTER_POINTS - len(shown))]


def scatter_chart(page: Page, stage: StageView, size: str, metric: str, names: Tuple[str, str, str]) -> Optional[Chart]:
    """One time of each request against its length; not drawn when the lengths are all the same."""
    if size not in stage.rows.columns or metric not in stage.rows.columns:
        return None
    lengths, times = successful_pairs(stage.rows, size, metric)
    total = len(lengths)
    if total < 5 or min(lengths) == max(lengths):
        return None
    shown, scale = scatter_places(lengths, times), scale_of(stage.statistic(metric))
    logarithmic = is_logarithmic(min(lengths), interpolated(sorted(lengths), 0.5), max(lengths))
    title, x_axis, y_axis = names
    axis = page.said(x_axis)
    spec = {"kind": "scatter", "log": logarithmic, "divisor": scale.divisor, "unit": scale.unit,
            "x": page.said("axis.log", name=axis) if logarithmic else axis, "y": page.said(y_axis, unit=scale.unit),
            "points": [rounded_to(number, 4) for place in shown for number in (lengths[place], times[place])]}
    sub = page.said("panel.n", n=count(total)) if len(shown) == total else page.said(
        "panel.shown", k=count(len(shown)), n=count(total))
    return Chart(spec, page.said("finding.scatter", name=page.said(title), n=count(total)), sub)


def ttft_by_prompt(page: Page, stage: StageView) -> Optional[Chart]:
    """TTFT against prompt tokens."""
    names = ("panel.ttft_by_prompt", "axis.prompt_tokens", "axis.ttft")
    return scatter_chart(page, stage, "in_tokens", "ttft_ms", names)


def latency_by_output(page: Page, stage: StageView) -> Optional[Chart]:
    """Latency against output tokens, or characters where tokens are unknown."""
    names = ("panel.latency_by_output", "axis.output_tokens", "axis.latency")
    return scatter_chart(page, stage, "out_tokens", "latency_ms", names) or scatter_chart(
        page, stage, "out_chars", "latency_ms", ("panel.latency_by_output", "axis.output_chars", "axis.latency"))


# Over time

BUCKET_SECONDS = (0.5, 1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)


class Buckets(NamedTuple):
    """Equal spans of time from the stage's first start: zero and width in ms, and how many."""

    zero: float
    width: float
    number: int

    def edges(self) -> List[float]:
        """Where the second bucket begins, the third and so on: `bisect_right` in them is the bucket of a moment."""
        return [self.zero + index * self.width for index in range(1, self.number)]


def time_buckets(stage: StageView) -> Optional[Buckets]:
    """At most 60 buckets of about 22 finished requests each and, where that allows it, at least 8."""
    zero = min((value for value in stage.rows.columns["start_ms"] if value == value), default=math.nan)
    ended = sum(value == value for value in stage.rows.columns["end_ms"])
    if ended < 20 or zero != zero:
        return None
    span = max(last_end([stage]) - zero, 1.0)
    wanted = min(60.0, max(8.0, ended / 22))
    widths = [1000.0 * seconds for seconds in BUCKET_SECONDS]
    width = next((width for width in widths if span / width <= wanted), widths[-1])
    if span / width < 8 and width > widths[0]:
        smaller = widths[widths.index(width) - 1]
        width = smaller if span / smaller <= 60 else width
    width = max(width, span / 60)
    return Buckets(zero, width, max(1, math.ceil(span / width)))


def by_bucket(buckets: Buckets, moments: Iterable[float], values: Iterable[float]) -> List[array.array]:
    """The known values in the buckets of their moments."""
    held, edges = [array.array("d") for _ in range(buckets.number)], buckets.edges()
    for moment, value in zip(moments, values):
        if moment == moment and value == value:
            held[bisect.bisect_right(edges, moment)].append(value)
    return held


def spread(buckets: Buckets, spans: Iterable[Tuple[float, float, float]]) -> List[float]:
    """The amount per bucket of spans (from, to, amount), each amount spread evenly over its time."""
    totals, edges = [0.0] * buckets.number, buckets.edges()
    for begin, end, amount in spans:
        first, last = bisect.bisect_right(edges, begin), bisect.bisect_right(edges, end)
        if first == last:
            totals[first] += amount
            continue
        rate = amount / (end - begin)
        for index in range(first, last + 1):
            low = buckets.zero + index * buckets.width
            totals[index] += rate * (min(end, low + buckets.width) - max(begin, low))
    return totals


def time_spec(buckets: Buckets, form: str, series: List[Dict], unit: Text) -> Dict:
    """The specification of one chart over time; the script puts each value at the middle of its bucket."""
    return {"kind": "time", "form": form, "step": buckets.width / 1000.0, "number": buckets.number,
            "series": series, "y": unit}


def time_finding(page: Page, title: str, values: Sequence[Optional[float]], unit: Text) -> Both:
    """A chart over time in words: its range."""
    there = [value for value in values if value is not None]
    low, high = (measured(pick(there), unit) for pick in (min, max)) if there else (both(DASH), both(DASH))
    return page.said("finding.time", name=page.said(title), n=count(len(there)), low=low, high=high)


def percentiles_over_time(page: Page, stage: StageView, buckets: Buckets, metric: str, title: str) -> Optional[Chart]:
    """P50 and P95 a bucket, by the end of the requests; below 160 of them one dot a request."""
    statistic = stage.statistic(metric)
    if not statistic:
        return None
    scale = scale_of(statistic)
    ends, values = successful_pairs(stage.rows, "end_ms", metric)
    if len(ends) < 160:
        points = [rounded_to(number) for end, value in zip(ends, values)
                  for number in ((end - buckets.zero) / 1000, value / scale.divisor)]
        spec = time_spec(buckets, "dots", [{"colour": "p95", "points": points}], scale.unit)
        return Chart(spec, time_finding(page, title, points[1::2], scale.unit), page.said("panel.time.dots"))
    held = [sorted(inside) for inside in by_bucket(buckets, ends, values)]
    lines = [{"name": name.upper(), "colour": name, "values": [
        rounded_to(interpolated(values, share) / scale.divisor) if len(values) >= need else None for values in held]}
        for name, share, need in (("p95", 0.95, 10), ("p50", 0.50, 5))]
    spec = time_spec(buckets, "line", lines, scale.unit)
    return Chart(spec, time_finding(page, title, lines[1]["values"], scale.unit), page.said("panel.time.lines"))


def ttft_over_time(page: Page, stage: StageView, buckets: Buckets) -> Optional[Chart]:
    """TTFT over the run."""
    return percentiles_over_time(page, stage, buckets, "ttft_ms", "panel.time_ttft")


def latency_over_time(page: Page, stage: StageView, buckets: Buckets) -> Optional[Chart]:
    """Latency over the run."""
    return percentiles_over_time(page, stage, buckets, "latency_ms", "panel.time_latency")


def whole_buckets(stage: StageView, buckets: Buckets, totals: Sequence[float]) -> List[Optional[float]]:
    """Amounts as rates per second; the last, incomplete bucket is left out."""
    ended = max(value for value in stage.rows.columns["end_ms"] if value == value) - buckets.zero
    whole = max(1, int(ended // buckets.width))
    return [rounded_to(total / (buckets.width / 1000.0)) for total in totals[:whole]]


def written_spans(rows: "Rows", column: str) -> Iterator[Tuple[float, float, float]]:
    """From the first output to the end of each successful request, and how much it wrote."""
    first = rows.columns.get("ttfe_ms", itertools.repeat(math.nan))
    for status, start, wait, end, amount in zip(rows.status, rows.columns["start_ms"], first, rows.columns["end_ms"],
                                                rows.columns.get(column, ())):
        if status == "ok" and amount == amount and start == start and end == end:
            yield (min(end, start + wait) if wait == wait else end), end, amount


def written_over_time(page: Page, stage: StageView, buckets: Buckets) -> Optional[Chart]:
    """Output tokens per second, or characters, spread over the time in which they were written."""
    for column, title, unit in (("out_tokens", "panel.time_tokens", "unit.tokens_per_s"),
                                ("out_chars", "panel.time_chars", "unit.chars_per_s")):
        spans = written_spans(stage.rows, column)
        some = next(spans, None)
        if some is not None:
            values = whole_buckets(stage, buckets, spread(buckets, itertools.chain((some,), spans)))
            spec = time_spec(buckets, "area", [{"colour": "a", "values": values}], page.said(unit))
            spec["title"] = page.said(title)
            return Chart(spec, time_finding(page, title, values, page.said(unit)))
    return None


def finished_over_time(page: Page, stage: StageView, buckets: Buckets) -> Optional[Chart]:
    """Successful requests finished per second."""
    ends, edges = successful(stage.rows, "end_ms"), buckets.edges()
    finished = collections.Counter(map(functools.partial(bisect.bisect_right, edges), ends))
    values = whole_buckets(stage, buckets, [finished[index] for index in range(buckets.number)])
    unit = page.said("unit.requests_per_s")
    spec = time_spec(buckets, "area", [{"colour": "a", "values": values}], unit)
    return Chart(spec, time_finding(page, "panel.time_requests", values, unit))


def flight_over_time(page: Page, stage: StageView, buckets: Buckets) -> Optional[Chart]:
    """How many requests were in flight, on average over each bucket."""
    columns = stage.rows.columns
    spans = ((start, end, end - start) for start, end in zip(columns["start_ms"], columns["end_ms"])
             if start == start and end == end and end > start)
    values = [rounded_to(total / buckets.width) for total in spread(buckets, spans)]
    values = values[:max(1, len(values) - 1)]  # the last bucket is not over
    spec = time_spec(buckets, "area", [{"colour": "ink3", "values": values}], page.said("axis.flight"))
    return Chart(spec, time_finding(page, "panel.time_flight", values, page.said("axis.flight")))


def failures_over_time(page: Page, stage: StageView, buckets: Buckets) -> Optional[Chart]:
    """Failed requests per bucket."""
    ends = [end for status, end in zip(stage.rows.status, stage.rows.columns["end_ms"])
            if status != "ok" and status not in NOT_JUDGED and end == end]
    if not ends:
        return None
    values = [len(inside) for inside in by_bucket(buckets, ends, itertools.repeat(1.0))]
    spec = time_spec(buckets, "bar", [{"colour": "first", "values": values}], page.said("axis.requests"))
    return Chart(spec, time_finding(page, "panel.time_failures", values, page.said("axis.requests")),
                 page.said("panel.time_failures.sub", n=count(len(ends))))


# Several stages


def load_spec(page: Page, stages: Sequence[StageView], kind: str, unit: Text) -> Dict:
    """What every chart over load shares; where stages differ in more than one number they stand side by side."""
    keys = level_keys([stage.name for stage in stages])
    spec = {"kind": kind, "y": unit, "x": level_words(page, "axis", keys),
            "loads": [stage.name.get(keys[0], 1) for stage in stages]}
    if len(keys) > 1 or min(spec["loads"]) <= 0:
        spec["names"] = [level(stage.name, keys) for stage in stages]
    return spec


def throughput_by_load(page: Page, stages: Sequence[StageView]) -> Optional[Chart]:
    """Throughput of each stage, against what it would be if the first stage scaled linearly."""
    stages = in_order(stages)
    values = [stage.figures.get("throughput", {}).get("output_tokens_per_s") for stage in stages]
    unit = page.said("axis.tokens_all")
    if not all(known(value) for value in values):
        values = [stage.figures.get("throughput", {}).get("rps") for stage in stages]
        unit = page.said("unit.requests_per_s")
    if not all(known(value) for value in values):
        return None
    spec = load_spec(page, stages, "load", unit)
    loads = spec["loads"]
    spec["series"] = [{"name": "", "colour": "a", "values": [rounded_to(value) for value in values], "labels": True}]
    scales = "names" not in spec and level_keys([stage.name for stage in stages])[0] in ("rps", "concurrency")
    if scales and loads[0] < loads[-1]:
        spec["linear"] = [rounded_to(values[0] * load / loads[0]) for load in loads]
    words = joined_texts(", ", (joined_texts(" ", (load_text(page, stage), figure(value)))
                                for stage, value in zip(stages, values)))
    return Chart(spec, page.said("finding.load", name=page.said("panel.load_throughput"), figures=words),
                 page.said("panel.load_throughput.sub") if "linear" in spec else "")


def trade_off(page: Page, stages: Sequence[StageView]) -> Optional[Chart]:
    """What one user sees against what the endpoint writes in all, a point a stage."""
    stages = in_order(stages)
    keys = level_keys([stage.name for stage in stages])
    pairs = [(stage.statistic("request_tps").get("p50"), stage.figures.get("throughput", {}).get("output_tokens_per_s"))
             for stage in stages]
    if not all(known(each) and known(total) for each, total in pairs):
        return None
    spec = load_spec(page, stages, "tradeoff", page.said("axis.tokens_all"))
    spec.update(x=page.said("axis.tokens_each"),
                points=[[rounded_to(each), rounded_to(total)] for each, total in pairs],
                labels=[load_text(page, stages[0])] + [level(stage.name, keys) for stage in stages[1:]],
                failed=[bool(stage.failed_gates) for stage in stages])
    words = joined_texts("; ", (page.said("failed_gate", name=load_text(page, stage), value="%s, %s" % (
        figure(each), figure(total))) for stage, (each, total) in zip(stages, pairs)))
    return Chart(spec, page.said("finding.load", name=page.said("panel.tradeoff"), figures=words),
                 page.said("panel.tradeoff.sub"))


def metric_by_load(page: Page, stages: Sequence[StageView], metric: str, title: str) -> Optional[Chart]:
    """P50, P95 and P99 of a time by load, and the gates on it."""
    stages = in_order(stages)
    if not all(stage.statistic(metric) for stage in stages):
        return None
    scale = stage_scale(stages, metric)
    spec = load_spec(page, stages, "load", scale.unit)
    spec["series"] = [{
        "name": stat.upper() + ("" if all(quotable(stage.statistic(metric), stat) for stage in stages) else " †"),
        "colour": stat, "values": [rounded_to(stage.statistic(metric)[stat] / scale.divisor) for stage in stages]}
        for stat in reversed(MARKED_PERCENTILES)]
    gates = [gate for gate in stages[-1].gates if gate_metric(gate) == metric]
    spec["limits"] = [{"value": gate["limit"] / scale.divisor, "text": page.said(
        "gate.line", name=requirement(page, gate, scale))} for gate in gates]
    words = joined_texts(", ", (joined_texts(" P50 ", (load_text(page, stage), scale.said(
        stage.statistic(metric)["p50"]))) for stage in stages))
    sizes = {stage.statistic(metric)["n"] for stage in stages}
    sub = page.said("panel.load.sub", n=count(sizes.pop())) if len(sizes) == 1 else ""
    return Chart(spec, page.said("finding.load", name=page.said(title), figures=words), sub)


def ttft_by_load(page: Page, stages: Sequence[StageView]) -> Optional[Chart]:
    """TTFT of each load."""
    return metric_by_load(page, stages, "ttft_ms", "panel.load_ttft")


def latency_by_load(page: Page, stages: Sequence[StageView]) -> Optional[Chart]:
    """Latency of each load."""
    return metric_by_load(page, stages, "latency_ms", "panel.load_latency")


def tpot_by_load(page: Page, stages: Sequence[StageView]) -> Optional[Chart]:
    """TPOT of each load."""
    return metric_by_load(page, stages, "tpot_ms", "panel.load_tpot")


# Panels and sections


class Panel(NamedTuple):
    """One chart of a section: the key of its title, what draws it, its look."""

    name: str
    draw: Callable[..., Optional[Chart]]
    kind: str = ""
    absent: str = ""  # the text that stands in for it; without one the panel isn't there


LOAD_PANELS = (Panel("load_throughput", throughput_by_load), Panel("tradeoff", trade_off),
               Panel("load_ttft", ttft_by_load), Panel("load_tpot", tpot_by_load),
               Panel("load_latency", latency_by_load))
DISTRIBUTION_PANELS = (Panel("ttft", ttft_histogram, absent="panel.ttft.none"), Panel("latency", latency_histogram),
                       Panel("answered", answered_curves), Panel("gaps", gaps_histogram))
WHERE_PANELS = (Panel("phases", phases_chart, "wide"), Panel("ttft_by_prompt", ttft_by_prompt, "points"),
                Panel("latency_by_output", latency_by_output, "points"))
TIME_PANELS = (Panel("time_ttft", ttft_over_time, "small"), Panel("time_latency", latency_over_time, "small"),
               Panel("time_tokens", written_over_time, "small"), Panel("time_requests", finished_over_time, "small"),
               Panel("time_flight", flight_over_time, "small"),
               Panel("time_failures", failures_over_time, "small", "outcome.none"))
SLOW_PANELS = (Panel("slowest", slowest_chart, "wide"),)
Charts = Dict[str, Mapping]


def panel_markup(page: Page, panel: Panel, chart: Optional[Chart], charts: Charts, prefix: str) -> Markup:
    """One panel: its head, the place of its chart and the finding in words."""
    title = page.said("panel." + panel.name)
    if chart is None:
        return page.fill("empty_panel", kind=panel.kind, title=title, text=page.said(panel.absent)) if panel.absent \
            else Markup("")
    name = prefix + panel.name
    title = chart.spec.get("title", title)
    charts[name] = dict(chart.spec, title=title)
    key = page.fill("key", items=joined(page.fill("key_item", colour=PHASE_COLOURS.get(phase, phase), text=page.said(
        "phase." + phase)) for phase in chart.key)) if chart.key else ""
    note = page.fill("note", kind="", text=chart.note) if chart.note and any(both(chart.note)) else ""
    return page.fill("panel", kind=panel.kind, title=title, sub=chart.sub, chart=name, finding=chart.finding, note=note,
                     data=page.said("button.data"), key=key)


def grid(page: Page, panels: Sequence[Panel], charts: Charts, prefix: str, *drawn_from: object) -> Markup:
    """The panels that have data, side by side; their specifications go into `charts`."""
    return page.fill("grid", panels=joined(panel_markup(page, panel, panel.draw(page, *drawn_from), charts, prefix)
                                           for panel in panels))


def section(page: Page, anchor: str, content: Markup, sub: Text = "", stage: Optional[StageView] = None,
            shown: bool = True) -> Markup:
    """One section; where there are several stages its heading names the stage."""
    title = page.said("section." + anchor)
    if stage is not None:
        title = page.said("heading.stage", title=title, load=load_text(page, stage))
    lead = page.fill("lead", text=sub) if any(both(sub)) else ""
    return page.fill("section", anchor=anchor, id=page.fill("id", anchor=anchor) if shown else "", title=title,
                     sub=lead, content=content)


TABLED = ("ttft_ms", "ttft_from_scheduled_ms", "ttfe_ms", "ttfb_ms", "latency_ms", "latency_from_scheduled_ms",
          "decode_ms", "tpot_ms", "itl_ms", "queue_ms", "connect_ms")
TABLED_STATS = ("mean", "stdev", "min", "p50", "p90", "p95", "p99", "max")


def figures_row(page: Page, stage: StageView, metric: str) -> List[Cell]:
    """One metric of the table of all figures."""
    statistic = stage.statistic(metric)
    cells = [Cell(metric_label(page, queue_metric(metric, stage.rows.load))), Cell(count(statistic["n"]), "number")]
    for stat in TABLED_STATS:
        text = page.html(figure(statistic.get(stat)))
        mark = dagger(page, statistic, stat) if stat.startswith("p") else ""
        cells.append(Cell(joined((text, mark)), "number"))
    return cells


def figures_table(page: Page, stage: StageView) -> Markup:
    """All figures, in milliseconds."""
    first, text = stage.statistic("ttfe_ms"), stage.statistic("ttft_ms")
    left_out = {"ttfe_ms"} if first and all(first.get(stat) == text.get(stat) for stat in TABLED_STATS) else set()
    if not stage.is_open:
        left_out |= {"ttft_from_scheduled_ms", "latency_from_scheduled_ms"}
    rows = [("", figures_row(page, stage, metric)) for metric in TABLED
            if stage.statistic(metric) and metric not in left_out]
    head = heads(page, "column.metric", "column.n", *("column." + stat for stat in TABLED_STATS))
    return page.fill("plain_panel", kind="wide", title=page.said("panel.all"), sub=page.said("panel.all.sub"),
                     tools=page.fill("copy"), content=table(page, head, rows, "figures"))


def distribution_section(page: Page, stage: StageView, charts: Charts, several: bool, shown: bool) -> Markup:
    """The six figures in full."""
    if not stage.successes:
        return Markup("")
    panels = grid(page, DISTRIBUTION_PANELS, charts, "%d-" % stage.number, stage)
    return section(page, "dist", joined((panels, figures_table(page, stage))), page.said("section.dist.sub"),
                   stage if several else None, shown)


def signed_percent(value: float) -> Both:
    """A deviation: +0.1 %, −2.4 %."""
    text = "%s%.1f" % ("\u2212" if value < 0 else "+", abs(value))
    return Both(text + "\u00a0%", text + "%")


def lengths_panel(page: Page, stage: StageView) -> Markup:
    """Prompts and answers as long as they were asked to be, or not; nothing where no length was asked for."""
    lengths, rows = stage.figures.get("lengths", {}), []
    for side in ("in", "out"):
        if side + "_target" in lengths:
            off = length_off(lengths, side)
            kept = abs(off) <= LENGTH_LIMIT if side == "in" else None
            short = lengths.get("out_short") if side == "out" else None
            cells = [Cell(page.said("lengths." + side)), Cell(count(lengths[side + "_target"]), "number"),
                     Cell(count(lengths[side + "_actual"]), "number"),
                     Cell(signed_percent(off), "number" if kept is not False else "number failed"),
                     Cell(count(short) if short is not None else "", "number"), Cell(count(lengths["n"]), "number")]
            rows.append(("", cells))
    if not rows:
        return Markup("")
    head = heads(page, "lengths.tokens", "lengths.target", "lengths.actual", "lengths.off", "lengths.short", "column.n")
    return page.fill("plain_panel", kind="wide", title=page.said("panel.lengths"), sub=page.said("panel.lengths.sub"),
                     tools="", content=table(page, head, rows, "lengths"))


def where_section(page: Page, stage: StageView, charts: Charts, several: bool, shown: bool) -> Markup:
    """In which phases the time went, and on what it depends."""
    before = len(charts)
    panels = grid(page, WHERE_PANELS, charts, "%d-" % stage.number, stage)
    lengths = lengths_panel(page, stage)
    if len(charts) == before and not lengths:
        return Markup("")
    return section(page, "where", joined((panels, lengths)), "", stage if several else None, shown)


SLOWEST_COLUMNS = ("in_tokens", "out_tokens", "ttft_ms", "latency_ms", "tpot_ms")


def slowest_table(page: Page, stage: StageView) -> Markup:
    """The slowest requests by name, in the order of their bars."""
    scales = {name: scale_of(stage.statistic(name)) for name in SLOWEST_COLUMNS if name.endswith("_ms")}
    head = [Cell(page.said("column.rank")), Cell(page.said("column.request")), Cell(page.said("column.prompt")),
            Cell(page.said("column.due_at"), "number")]
    for name in SLOWEST_COLUMNS:
        title = page.said("column." + name)
        if name in scales:
            title = Both(*("%s, %s" % (text, scales[name].unit) for text in title))
        head.append(Cell(title, "number"))
    head.append(Cell(page.said("column.finish"), "number"))
    rows = []
    for rank, (row, names) in enumerate(stage.rows.slowest, 1):
        cells = [Cell(str(rank)), Cell(names.get("request_id", DASH), "id"), Cell(names.get("prompt_id", DASH), "id"),
                 Cell("{:,.2f}".format(stage.rows.columns["scheduled_ms"][row] / 1000.0), "number")]
        for name in SLOWEST_COLUMNS:
            value = stage.rows.columns[name][row]
            known_value = value / (scales[name].divisor if name in scales else 1.0) if value == value else None
            cells.append(Cell((figure if name in scales else count)(known_value) if known_value is not None else DASH,
                              "number"))
        rows.append(("", [*cells, Cell(names.get("finish_reason", DASH), "number")]))
    return page.fill("plain_panel", kind="wide", title=page.said("panel.slowest_table"), sub="",
                     tools=page.fill("copy"), content=table(page, [head], rows, "slowest"))


def slow_section(page: Page, stage: StageView, charts: Charts, several: bool, shown: bool) -> Markup:
    """The outliers, each explained by where its time went."""
    if not stage.rows.slowest:
        return Markup("")
    panels = grid(page, SLOW_PANELS, charts, "%d-" % stage.number, stage)
    return section(page, "slow", joined((panels, slowest_table(page, stage))), page.said("section.slow.sub"),
                   stage if several else None, shown)


def time_section(page: Page, stage: StageView, charts: Charts, several: bool, shown: bool) -> Markup:
    """Whether it was steady."""
    buckets = time_buckets(stage) if stage.successes else None
    if buckets is None:
        return Markup("")
    width = page.said("wall.seconds", n="%g" % (buckets.width / 1000)) if buckets.width < 60000 else duration_text(
        page, buckets.width)
    key = "section.time.sub" if stage.successes >= 160 else "section.time.dots"
    panels = grid(page, TIME_PANELS, charts, "%d-" % stage.number, stage, buckets)
    return section(page, "time", panels, page.said(key, width=width), stage if several else None, shown)


STATUS_COLOURS = {"ok": "ok", "rate_limited": "head", "timeout": "first", "truncated": "queue", "stream_error": "think",
                  "http_error": "a"}


def status_counts(stage: StageView) -> List[Tuple[str, int]]:
    """How many requests have each status, ok first, then the commonest."""
    found = collections.Counter()  # type: collections.Counter
    for error in stage.figures.get("errors", ()):
        found[str(error.get("status", "other"))] += error.get("count", 0)
    for status in ("cancelled", "dropped"):
        found[status] = max(found[status], stage.requests.get(status, 0))
    failures = [(status, number) for status, number in found.most_common() if number]
    return ([("ok", stage.successes)] if stage.successes else []) + failures


def failure_row(page: Page, error: Mapping, total: int) -> List[Cell]:
    """One kind of failure: count, share of all requests, when it first happened, what the endpoint said."""
    first = error.get("first_ms")
    sample = str(error.get("sample") or error.get("key") or "")
    return [Cell(status_name(page, str(error.get("status", "other")))), Cell(count(error.get("count", 0)), "number"),
            Cell(percent(error.get("count", 0) / total), "number"),
            Cell("+%.1f\u00a0s" % (first / 1000.0) if known(first) else DASH, "number"),
            Cell(sample if len(sample) <= 400 else sample[:400] + " …", "sample")]


def failure_table(page: Page, stage: StageView, total: int) -> Optional[Markup]:
    """The ten commonest failures, the others in one line."""
    errors = sorted(stage.figures.get("errors", ()), key=lambda error: -error.get("count", 0))
    if not errors:
        return None
    rows = [("", failure_row(page, error, total)) for error in errors[:10]]
    rest = sum(error.get("count", 0) for error in errors[10:])
    if rest:
        rows.append(("", failure_row(page, {"status": "other", "count": rest}, total)))
    head = [[Cell(page.said("fail.failure")), Cell(page.said("fail.count"), "number"),
             Cell(page.said("fail.share"), "number"), Cell(page.said("fail.first"), "number"),
             Cell(page.said("fail.sample"), "sample")]]
    return table(page, head, rows, "failures")


def outcome_slices(page: Page, counts: Sequence[Tuple[str, int]], total: int) -> Markup:
    """The slices of the ring, one a status."""
    before, slices = 0.0, []
    for status, number in counts:
        share = 100.0 * number / total
        name = status_name(page, status)
        slices.append(page.fill("slice", colour=STATUS_COLOURS.get(status, "connect"), share="%.3f" % share,
                                rest="%.3f" % (100.0 - share), before="%.3f" % before,
                                text="%s · %s: %s" % (name.en, name.zh, count(number))))
        before += share
    return joined(slices)


def svg_text(page: Page, text: Both) -> Markup:
    """A pair of texts inside an SVG, which knows no span."""
    return page.fill("svg_both", en=text.en, zh=text.zh)


def outcome_key(page: Page, counts: Sequence[Tuple[str, int]], total: int) -> Markup:
    """What the colours mean, with counts and shares of all requests."""
    return page.fill("key", items=joined(page.fill(
        "key_item", colour=STATUS_COLOURS.get(status, "connect"), text=page.said(
            "outcome.key", name=status_name(page, status), n=count(number), x=percent(number / total)))
        for status, number in counts))


def outcome_section(page: Page, stage: StageView, several: bool, shown: bool) -> Markup:
    """The success rate as a ring, every failure in a table."""
    counts = status_counts(stage)
    total = sum(number for _, number in counts)
    if not total:
        nothing = page.fill("empty", text=page.said("outcome.none"))
        return section(page, "fail", nothing, "", stage if several else None, shown)
    rate = stage.requests.get("success_rate")
    errors = failure_table(page, stage, total)
    finding = page.said("finding.outcome", x=percent(rate), n=count(finished(stage)))
    content = page.fill(
        "outcome", kind="" if errors else "clean", number=stage.number, finding=both("%s · %s" % finding),
        slices=outcome_slices(page, counts, total), rate=svg_text(page, percent(rate)),
        what=svg_text(page, page.said("outcome.success")), key=outcome_key(page, counts, total),
        segments=joined(page.fill("segment", colour=STATUS_COLOURS.get(status, "connect"), share=number)
                        for status, number in counts),
        table=errors or page.fill("empty", text=page.said("outcome.none")))
    return section(page, "fail", content, "", stage if several else None, shown)


# Can these figures be trusted?


class ClientCheck(NamedTuple):
    """One line of the client's audit: where its figure is, in which unit, and the limit it is held to."""

    title: str
    field: str
    unit: str
    limit: Optional[str]  # a percentage, or "lag": the larger of 5 ms and 5 % of the TTFT's P50


CLIENT_CHECKS = (
    ClientCheck("client.lag", "lag_ms", "ms", "lag"), ClientCheck("client.slack", "ttft_slack_ms", "ms", "lag"),
    ClientCheck("client.cpu", "cpu_percent", "%", "90"), ClientCheck("client.late", "late_percent", "%", "1"),
    ClientCheck("client.processes", "processes", "", None))


def client_value(client: Mapping, name: str) -> Optional[float]:
    """A figure of the audit: a number, the P99 of a statistic, the largest of a list."""
    value = client.get(name)
    if isinstance(value, dict):
        value = value.get("p99")
    if isinstance(value, (list, tuple)):
        value = max(value, default=None)
    return value if known(value) else None


def client_limit(check: ClientCheck, summary: Mapping) -> Optional[float]:
    """The limit of a check; that of the lag follows the TTFT."""
    if check.limit == "lag":
        return max(5.0, 0.05 * ((summary.get("ttft_ms") or {}).get("p50") or 0))
    return float(check.limit) if check.limit else None


def client_row(title: Text, limit: Text, value: Text, kept: Optional[bool]) -> Tuple[str, List[Cell]]:
    """One check; one without a limit has no mark."""
    mark, kind = {True: ("✓", "passed"), False: ("✕", "failed"), None: ("", "")}[kept]
    return kind, [Cell(title), Cell(limit, "number"), Cell(value, "number value"), Cell(mark, "mark value")]


def measured_as(value: Optional[float], unit: str) -> Text:
    """A figure of the audit with its unit."""
    if unit == "%":
        return Both("%.3g\u00a0%%" % (value or 0), "%.3g%%" % (value or 0))
    return measured(value, unit) if unit else count(value or 0)


def rate_rows(page: Page, stages: Sequence[StageView]) -> List[Tuple[str, List[Cell]]]:
    """Of each open stage the rate of its schedule and the rate at which its requests went out."""
    rows = []
    for stage in stages:
        for title in ("requested", "achieved"):
            value = stage.figures.get("client", {}).get(title + "_rps")
            if known(value):
                said = page.said("client." + title) if len(stages) == 1 else page.said(
                    "client.%s_at" % title, load=load_text(page, stage))
                rows.append(client_row(said, "", measured(value, page.said("unit.requests_per_s")), None))
    return rows


def client_table(page: Page, summary: Mapping, stages: Sequence[StageView], end: Optional[Mapping]) -> Markup:
    """What the client says of itself: limit, measured, kept or not."""
    client, rows = summary.get("client", {}), []
    if client.get("clock"):
        kernel = client["clock"] == "kernel"
        clock_name = page.said(client["clock"]) if client["clock"] in page.texts[0] else client["clock"]
        rows.append(client_row(page.said("client.clock"), page.said("kernel"), clock_name, kernel or None))
    for check in CLIENT_CHECKS:
        value, limit = client_value(client, check.field), client_limit(check, summary)
        if value is not None:
            limit_text = measured_as(limit, check.unit) if limit is not None else ""
            rows.append(client_row(page.said(check.title), limit_text, measured_as(value, check.unit),
                                   value <= limit if limit is not None else None))
    rows += rate_rows(page, stages)
    floor = client.get("selftest")
    if floor:
        title = page.said("client.floor", streams=floor["streams"])
        rows.append(client_row(title, "", measured_as(floor["first_p99_ms"], "ms"), None))
    dropped = sum(stage.requests.get("dropped", 0) for stage in stages)
    if any(stage.is_open for stage in stages):
        rows.append(client_row(page.said("client.dropped"), "0", count(dropped), not dropped))
    whole = end is not None and all("end" in shard for shard in summary.get("merged", {}).get("shards", ()))
    rows.append(client_row(page.said("client.records"), page.said("client.end_line"),
                           page.said("yes" if whole else "no"), whole))
    head = heads(page, "client.check", "client.limit", "client.measured")
    return table(page, [head[0] + [Cell("")]], rows, "audit")


NETWORK_ROWS = (("network.connect", "connect_ms", "ms", 0.0), ("network.rtt", "rtt_ms", "ms", None),
                ("network.queue", "queue_ms", "ms", None), ("network.capped", "capped_ms", "ms", 0.0),
                ("network.retransmits", "retransmits", "", None),
                ("network.out_of_order", "out_of_order", "", None))


def measured_column(rows: "Rows", column: str) -> Iterable[float]:
    """A column of the requests; of the client's queue without the wait under a cap, which has a line of its own."""
    values, capped = rows.columns.get(column, ()), rows.columns.get("capped_ms")
    if column != "queue_ms" or not capped:
        return values
    return [wait - cap if cap == cap else wait for wait, cap in zip(values, capped)]


def network_table(page: Page, stages: Sequence[StageView]) -> Markup:
    """What the network did, over all measured requests: n, P50, P95, max."""
    rows = []
    for title, column, unit, above in NETWORK_ROWS:
        values = sorted(value for stage in stages for value in measured_column(stage.rows, column)
                        if value == value and (above is None or value > above))
        if values:
            texts = [measured(value, unit) if unit else count(value)
                     for value in (interpolated(values, 0.5), interpolated(values, 0.95), values[-1])]
            rows.append(("", [Cell(page.said(title)), Cell(count(len(values)), "number")] + [
                Cell(text, "number") for text in texts]))
    reused = [value for stage in stages for value in stage.rows.columns.get("reused", ()) if value == value]
    if reused:
        share = percent(sum(1 for value in reused if value) / len(reused))
        rows.append(("", [Cell(page.said("network.reused")), Cell(count(len(reused)), "number"), Cell(share, "number"),
                          Cell(""), Cell("")]))
    known_rtt = any(value == value for stage in stages for value in stage.rows.columns.get("rtt_ms", ()))
    note = "" if known_rtt else page.fill("note", kind="", text=page.said("network.absent"))
    head = heads(page, "network.measure", "column.n", "column.p50", "column.p95", "column.max")
    return joined((table(page, head, rows, "network") if rows else "", note))


def trust_section(page: Page, summary: Mapping, stages: Sequence[StageView], end: Optional[Mapping]) -> Markup:
    """The client's audit beside the network's figures."""
    left, right = (page.fill("plain_panel", kind="", title=page.said(title), sub=sub, tools="", content=content)
                   for title, sub, content in (("client", "", client_table(page, summary, stages, end)),
                                               ("network", page.said("network.sub"), network_table(page, stages))))
    content = page.fill("grid", panels=joined((left, right)))
    return section(page, "trust", content, page.said("section.trust.search" if "find_max" in summary else
                                                     "section.trust.sub"))


# Set-up


def split_command(command: str) -> Optional[List[str]]:
    """The words of a command line; None when its quotes don't match."""
    try:
        return shlex.split(command) or None
    except ValueError:
        return None


def flag_groups(words: Sequence[str]) -> List[List[str]]:
    """Words grouped so that each flag keeps its value."""
    groups = [[]]  # type: List[List[str]]
    for word in words:
        if word.startswith("-") and len(word) > 1 and groups[-1]:
            groups.append([])
        groups[-1].append(word)
    return groups


def command_text(command: object) -> str:
    """The command line, a line for about seventy characters, broken only before a flag."""
    words = [str(word) for word in command] if isinstance(command, (list, tuple)) else split_command(str(command))
    if words is None:
        return str(command)
    groups = [" ".join(shlex.quote(word) for word in group) for group in flag_groups(words)]
    lines = [groups[0]]
    for group in groups[1:]:
        if len(lines[-1]) + len(group) > 64:
            lines.append("  " + group)
        else:
            lines[-1] += " " + group
    return " \\\n".join(lines)


def indented_line(line: str) -> str:
    """One line of a frame: JSON after `data:` or alone is indented, unless that would blow it up."""
    found = re.match(r"(\s*data:\s?)?(\s*[\[{].*)", line, re.DOTALL)
    if not found:
        return line
    try:
        pretty = json.dumps(json.loads(found.group(2)), ensure_ascii=False, indent=2)
    except (ValueError, RecursionError):
        return line
    return (found.group(1) or "") + pretty if len(pretty) < 4 * len(line) + 400 else line


def indented_sample(raw: str) -> str:
    """A raw frame with the JSON in its lines indented; what isn't JSON stays as it was received."""
    return "\n".join(indented_line(line) for line in raw.rstrip("\n").split("\n"))


def prompts_text(page: Page, config: Mapping) -> Both:
    """Where the prompts came from, and whether they were made unique."""
    prompts = config.get("prompts") or {}
    source = str(prompts.get("source", "builtin"))
    text = page.said("prompts.builtin") if source in ("builtin", "built-in") else both(source)
    if prompts.get("count"):
        text = page.said("setup.prompt_count", source=text, n=count(prompts["count"]))
    return page.said("setup.unique" if config.get("unique", True) else "setup.not_unique", prompts=text)


def way_text(page: Page, way: Mapping[str, str]) -> Optional[Both]:
    """The address that was connected to, the proxy before it, and what TLS agreed on."""
    if not way.get("address"):
        return None
    through = page.said("setup.through", address=way["address"], proxy=way["proxy"]) if way.get("proxy") else None
    tls = ", ".join(way[key] for key in ("tls_version", "cipher") if way.get(key))
    address = through or both(way["address"])
    return page.said("setup.tls", address=address, tls=tls) if tls else address


def setup_facts(page: Page, header: Mapping, way: Mapping[str, str]) -> List[Tuple[Both, Text]]:
    """What it takes to repeat the run."""
    config = header.get("config", {})
    tool = "llmbench %s, %s" % (header.get("tool_version", ""), header.get("python", ""))
    mode = "tokens.%s" % config.get("token_mode", "usage")
    entries = (("setup.run", header.get("run_id")), ("setup.tool", tool), ("setup.provider", header.get("provider")),
               ("setup.network", way_text(page, way)), ("setup.prompts", prompts_text(page, config)),
               ("setup.tokens", page.said(mode) if mode in page.texts[0] else config.get("token_mode")),
               ("setup.max_tokens", config.get("max_tokens")),
               ("setup.records", page.said("setup.sha", sha=header["results_sha256"])
                if header.get("results_sha256") else None))
    return [(page.said(key), value if isinstance(value, Both) else str(value)) for key, value in entries if value]


def list_of_facts(page: Page, entries: Iterable[Tuple[Text, Text]], fragment: str = "facts_list",
                  **values: object) -> Markup:
    """Names and values as a list of definitions."""
    made = joined(page.fill("fact", name=name, value=value, hover="") for name, value in entries)
    return page.fill(fragment, facts=made, **values)


def setup_section(page: Page, summary: Mapping, header: Mapping) -> Markup:
    """The exact command, what the endpoint sent, and every definition."""
    left = page.fill("raw", title=page.said("setup.command"), sub=page.said("setup.command.sub"),
                     text=command_text(header.get("command", "")))
    samples, way = summary.get("samples", {}), summary.get("client", {}).get("network", {})
    right = joined(page.fill("raw", title=page.said(title), sub=page.said("setup.as_received"),
                             text=indented_sample(str(samples[name])))
                   for title, name in (("setup.first", "first_content_raw"), ("setup.final", "final_frame_raw"))
                   if samples.get(name))
    columns = page.fill("columns", left=joined((left, list_of_facts(page, setup_facts(page, header, way)))),
                        right=right or page.fill("empty", text=page.said("setup.no_sample")))
    defined = [(metric_label(page, name), definition(page, name)) for name in METRICS]
    definitions = list_of_facts(page, defined, "definitions", title=page.said("definitions"))
    return section(page, "setup", joined((columns, definitions)))


# The page


def stage_sections(page: Page, stage: StageView, charts: Charts, several: bool, shown: bool) -> Markup:
    """What belongs to one stage; failures come first where more than one request in a hundred failed.

    In a run that isn't judged they stand outside, where they can be seen: `body_of` puts them there.
    """
    fail = outcome_section(page, stage, several, shown) if stage.judged else Markup("")
    parts = [build(page, stage, charts, several, shown) for build in (distribution_section, where_section)]
    late = [build(page, stage, charts, several, shown) for build in (time_section, slow_section)]
    first = stage.requests.get("success_rate", 0.0) < 0.99
    return joined([fail] + parts + late if first else parts + [fail] + late)


def stage_block(page: Page, stages: Sequence[StageView], shown: StageView,
                build: Callable[[StageView], Markup]) -> Markup:
    """What `build` makes of each stage, of which the page shows one."""
    return joined(page.fill("stage", number=stage.number, hidden="" if stage is shown else "hidden",
                            content=build(stage)) for stage in stages)


def stage_picker(page: Page, stages: Sequence[StageView], shown: StageView) -> Markup:
    """Buttons that choose the stage; those that failed a gate carry a cross."""
    keys = level_keys([view.name for view in stages])
    buttons = joined(page.fill(
        "pick", number=stage.number, pressed="true" if stage is shown else "false",
        text=level(stage.name, keys),
        mark=page.fill("cross") if stage.failed_gates else "") for stage in stages)
    return page.fill("picker", before=page.said("picker.before"), buttons=buttons,
                     after=level_words(page, "picker", keys))


def load_section(page: Page, stages: Sequence[StageView], charts: Charts) -> Markup:
    """How the endpoint behaves under load, where there are several loads."""
    stages = in_order(stages)
    totals = [stage.figures.get("throughput", {}).get("output_tokens_per_s", 0) or 0 for stage in stages]
    over_level = level_keys([stage.name for stage in stages]) in (["rps"], ["concurrency"])
    knee = over_level and (any(stage.failed_gates for stage in stages) or any(
        later < earlier for earlier, later in zip(totals, totals[1:])))
    content = grid(page, LOAD_PANELS, charts, "run-", stages)
    return section(page, "stages", content, page.said("section.stages.knee" if knee else "section.stages.sub"))


def figures_block(page: Page, stages: Sequence[StageView], shown: StageView, reason: str) -> Markup:
    """The six figures of each stage, with the note that says which stage they are of."""
    if len(stages) == 1:
        return tiles(page, shown)
    return stage_block(page, stages, shown, lambda stage: joined((tiles(page, stage), page.fill(
        "note", kind="", text=page.said(reason if stage is shown else "chosen.picked", load=load_text(page, stage))))))


def body_of(page: Page, summary: Mapping, stages: Sequence[StageView], shown: StageView, end: Optional[Mapping],
            charts: Charts) -> Markup:
    """The sections between the first screen and the set-up; those of an INVALID run are folded away."""
    several = len(stages) > 1
    inner = stage_block(page, stages, shown,
                        lambda stage: stage_sections(page, stage, charts, several, stage is shown))
    if several:
        inner = joined((load_section(page, stages, charts), stage_picker(page, stages, shown), inner))
    trust = trust_section(page, summary, stages, end)
    if shown.judged:
        return joined((inner, trust))
    fail = stage_block(page, stages, shown, lambda stage: outcome_section(page, stage, several, stage is shown))
    return joined((trust, fail, page.fill("anyway", summary=page.said("anyway"), content=inner)))


ANCHORS = ("stages", "differences", "fail", "dist", "where", "time", "slow", "trust", "setup", "settings")


def navigation(page: Page, body: str) -> Markup:
    """Links to the sections that are there, in their order."""
    places = sorted((body.find('id="%s"' % anchor), anchor) for anchor in ANCHORS)
    present = ["top"] + [anchor for place, anchor in places if place >= 0]
    return joined(page.fill("link", anchor=anchor, text=page.said("nav." + anchor)) for anchor in present)


def script_policy(scripts: Sequence[str]) -> str:
    """A policy that runs these scripts and nothing else, and loads nothing from anywhere."""
    hashes = " ".join("'sha256-%s'" % base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
                      for script in scripts)
    return ("default-src 'none'; script-src %s; style-src 'unsafe-inline'; img-src data: blob:; "
            "base-uri 'none'; form-action 'none'" % hashes)


def script_json(value: object) -> Markup:
    """JSON that a script element can hold: ASCII only, and no < that could end the element."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def chart_data(page: Page, header: Mapping, charts: Charts) -> Markup:
    """What the script draws from: the charts' specifications and the words of the buttons' results."""
    words = {key: page.said(key) for key in page.texts[0] if key.startswith(("column.", "state.", "button."))}
    return script_json({"model": plain(header.get("model", "")), "run": plain(header.get("run_id", "")),
                        "words": words, "charts": charts})


def page_language(header: Mapping) -> str:
    """The language in which the page opens."""
    return "zh" if str(header.get("config", {}).get("lang", "en")).startswith("zh") else "en"


def render_report(summary: Mapping, header: Mapping, rows: Sequence["Rows"],
                  end: Optional[Mapping], assets: Mapping[str, Union[bytes, str]]) -> str:
    """report.html, complete: from summary.json, the header of results.jsonl, the measured requests and the assets."""
    page, stages, charts = read_page(assets), stage_views(summary, rows), {}  # type: Page, List[StageView], Charts
    shown, reason = choose_stage(stages, summary.get("find_max", {}))
    body = body_of(page, summary, stages, shown, end, charts)
    setup = setup_section(page, summary, header)
    echarts, script = asset_text(assets, "echarts.min.js"), asset_text(assets, "report.js")
    language = page_language(header)
    gates = stage_table(page, stages, shown) if len(stages) > 1 else gates_block(page, shown)
    return page.fill(
        "page", lang={"zh": "zh-CN"}.get(language, language), language=language, policy=Markup(script_policy([
            echarts, script])), title=header.get("model", ""), state="" if shown.judged else "invalid-run",
        style=Markup(asset_text(assets, "report.css")), run_id=re.sub(r"[^\w.-]", "", plain(header.get("run_id", ""))),
        skip=page.said("skip"), sections_label=page.texts[LANGUAGES.index(language)]["sections"],
        links=navigation(page, body + setup),
        dark=page.said("button.dark"), light=page.said("button.light"), print=page.said("button.print"),
        kicker=page.said("kicker"), model=header.get("model", DASH), facts=facts(page, header, stages),
        verdict=verdict_band(page, summary), cut_off=cut_off_line(page, stages, end),
        sentence=sentence(page, summary, stages, shown), figures=figures_block(page, stages, shown, reason),
        gates=gates, body=body, setup=setup, footer=page.said("footer", version=header.get("tool_version", "")),
        data=chart_data(page, header, charts), echarts=Markup(echarts), script=Markup(script)) + "\n"


# Two or more runs on one page: compare.html. It is made of the same fragments, and its words are also the terminal's.

COMPARISON_PAGE = "comparison"  # the class of its body, by which an older one is known and may be replaced
RUN_COLOURS = ("a", "b", "think", "queue", "head", "connect")  # from the seventh run on they come again, dashed
NAME_HEIGHTS = (0.62, 0.84, 0.3, 0.45, 0.15, 0.74)  # where along a curve its name stands: apart from the others'
HEADLINES = (("success_rate", ""), ("ttft_ms", "p50"), ("latency_ms", "p50"), ("tpot_ms", "p50"),
             ("output_tokens_per_s", ""))  # what the table over several loads shows
Said = Mapping[str, str]  # the texts of one language


def worded(texts: Said, group: str, name: str) -> str:
    """The text of a name in a group: of a word, a setting, why its difference is unfair, a condition's outcome."""
    key = group + "." + name
    return texts[key]


def signed(value: float) -> str:
    """A change in numbers, with as many decimals as it takes not to be 0: +10.2, −0.35, +120."""
    size = abs(value)
    if not size:
        return "0"
    places = 0 if size >= 99.95 else 1 if size >= 0.95 else 2
    while places < 5 and not round(size, places):
        places += 1
    return ("+" if value >= 0 else "\u2212") + "{:,.{}f}".format(size, places)


def is_in_points(metric: str) -> bool:
    """Whether a figure is a share and changes by points."""
    return metric in SHARE_FIGURES


def change_words(texts: Said, metric: str, change: Optional[float], relative: bool = True) -> str:
    """A change in the words of a language: +10.2 %, −0.35 points, +48.0 ms."""
    if not known(change):
        return DASH
    if is_in_points(metric):
        return texts["unit.points"].format(n=signed(100.0 * change))
    if relative:
        return texts["change.percent"].format(n=signed(100.0 * change))
    return "%s\u00a0%s" % (signed(change), METRICS[metric].unit)  # only conditions; none is on characters


def interval_words(texts: Said, found: Difference, relative: bool = True) -> str:
    """The 95 % interval of a change in the words of a language: +7.9 to +12.4; its unit is the change's."""
    if found.low is None or found.high is None:
        return DASH
    times = 100.0 if relative or is_in_points(found.metric) else 1.0
    return texts["change.interval"].format(low=signed(times * found.low), high=signed(times * found.high))


def metric_words(texts: Said, metric: str) -> str:
    """What a metric is called in a language."""
    return worded(texts, "metric", metric) if "metric." + metric in texts else METRICS[metric].label


def figure_words(texts: Said, metric: str, stat: str) -> str:
    """What a figure is called in a language: TTFT P95."""
    name = metric_words(texts, metric)
    return "%s %s" % (name, texts.get("column." + stat, stat.upper())) if stat else name


def row_scale(found: Difference) -> Scale:
    """The unit of a row: seconds where both values are two seconds or more, else milliseconds."""
    values = [value for value in found.values if value is not None]
    return SECONDS if values and min(values) >= 2000.0 else MILLISECONDS


def row_name(texts: Said, found: Difference) -> str:
    """What a row is called, with its unit: TTFT P95, ms; a share's values carry their own."""
    name = figure_words(texts, found.metric, found.stat)
    if is_in_points(found.metric):
        return name
    unit = row_scale(found).unit if found.metric.endswith("_ms") else figure_unit(texts, found.metric)
    return "%s, %s" % (name, unit)


def figure_unit(texts: Said, metric: str) -> str:
    """The unit of a figure as the summary has it; characters have no entry in METRICS."""
    return METRICS[metric].unit if metric in METRICS else texts["terminal.chars_per_s"]


def row_value(texts: Said, found: Difference, value: Optional[float]) -> str:
    """One value of a row in a language."""
    if value is None:
        return DASH
    if is_in_points(found.metric):
        return texts["change.percent"].format(n=percent_number(value))
    return figure(value / row_scale(found).divisor) if found.metric.endswith("_ms") else figure(value)


def word_of(texts: Said, found: Difference) -> str:
    """Better, worse, no difference shown; with the mark of its footnote."""
    return worded(texts, "word", found.word) + {"chance": " ‡", "small": " §"}.get(found.note, "")


def footnotes(texts: Said, against: Sequence[Against]) -> List[str]:
    """What the marks of these comparisons mean, those that are there."""
    rows = [row for one in against for row in one.rows]
    judged = sum(row.likely is not None for row in rows)
    notes = [note for note in ("chance", "small") if any(row.note == note for row in rows)]
    notes += ["few"] if any(row.word == "few" for row in rows) else []
    return [worded(texts, "footnote", note).format(n=judged) for note in notes]


def setting_words(texts: Said, key: str, value: Any) -> str:
    """The value of a setting in a language."""
    if key == "workload":
        source = texts["prompts.builtin"] if value[0] in ("builtin", "built-in") else plain(value[0])
        named = texts["setup.prompt_count"].format(source=source, n=count(value[1])) if value[1] else source
        return "%s (%s)" % (named, str(value[2])[:8]) if value[2] else named
    if value is None or value in ("", [], {}):
        return DASH
    if isinstance(value, bool):
        return texts["yes" if value else "no"]
    if key == "arrival":
        return arrival_words(texts, {"arrival": value}, {})
    if key in ("duration", "timeout", "ramp"):
        return texts["wall.seconds"].format(n="%g" % value)
    named = {"token_mode": "tokens.", "clock": ""}.get(key)
    if named is not None and named + str(value) in texts:
        return texts.get(named + str(value), "")
    return plain(json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value)


def unfair_words(texts: Said, unfair: Unfair) -> str:
    """Why a comparison is unfair, in the words of a language."""
    values = unfair.values
    if unfair.key == "verdict":
        reasons = texts["reasons.between"].join(reason_said(texts, reason) for reason in values["reasons"])
        state = worded(texts, "verdict", values["state"].lower())
        return texts["unfair.verdict"].format(run=values["run"], state=state,
                                              reasons=reasons)
    if unfair.key == "setting":
        key = values["key"]
        first, second = (setting_words(texts, key, values[side]) for side in ("first", "second"))
        return texts["unfair.setting"].format(name=worded(texts, "setting", key), first=first, letter=unfair.letter,
                                              second=second, why=worded(texts, "unfair", key))
    if unfair.key == "load":
        first, second = (load_words(texts, values[side], True) for side in ("first", "second"))
    elif unfair.key == "cached":
        first, second = (percent_number(values[side]) for side in ("first", "second"))
    else:
        first, second = (figure(values[side]) for side in ("first", "second"))
    name = values["side"] if unfair.key == "length" else unfair.key
    text = worded(texts, "unfair", name).format(first=first, letter=unfair.letter, second=second)
    if not values.get("several"):
        return text
    return texts["load.of"].format(loads=load_words(texts, values["name"]), text=text)


def all_unfair(texts: Said, against: Sequence[Against]) -> List[str]:
    """Every reason once, in the words of a language."""
    return list(dict.fromkeys(unfair_words(texts, unfair) for one in against for unfair in one.unfair))


def comparison_state(against: Sequence[Against]) -> str:
    """valid: like with like; caution: not quite; invalid: a run is INVALID, nothing is judged."""
    if not all(one.judged for one in against):
        return "invalid"
    return "caution" if any(one.unfair for one in against) else "valid"


def alone_words(texts: Said, first: ComparedRun, one: Against) -> str:
    """The stages of two runs that have no counterpart, in the words of a language; "" where all have one."""
    said = []
    for run, numbers in ((first, one.alone[0]), (one.run, one.alone[1])):
        if numbers:
            loads = texts["list.comma"].join(load_words(texts, run.stages[number].name) for number in numbers)
            said.append(texts["compare.alone"].format(run=run.letter, loads=loads))
    return " ".join(said)


def few_changes(texts: Said, one: Against, word: str, most: int = 4) -> str:
    """The figures that are better, or worse, with their changes; the first few of many."""
    found = [(pair, row) for pair in one.pairs for row in pair.rows if row.word == word]
    said = []
    for pair, row in found[:most]:
        name = figure_words(texts, row.metric, row.stat)
        if len(one.pairs) > 1:
            name = texts["compare.at"].format(name=name, load=load_words(texts, pair.first.name))
        said.append("%s %s" % (name, change_words(texts, row.metric, row.change)))
    return texts["list.comma"].join(said) + (" …" if len(found) > most else "")


def comparison_sentence(texts: Said, first: ComparedRun, one: Against) -> str:
    """What became of one comparison, in one sentence of a language."""
    if not one.pairs:
        return texts["compare.no_pair"].format(a=first.letter, b=one.run.letter)
    if not one.judged:
        return texts["compare.unjudged"].format(a=first.letter, b=one.run.letter)
    counts = collections.Counter(row.word for row in one.rows)
    judged = counts["better"] + counts["worse"] + counts["none"]
    values: Dict[str, Any] = {"a": first.letter, "b": one.run.letter, "n": judged}
    for word in ("better", "worse"):
        values[word], values[word + "_list"] = counts[word], few_changes(texts, one, word)
    if not judged:
        return texts["compare.few"].format(**values)
    kind = "both" if counts["better"] and counts["worse"] else \
        "better" if counts["better"] else "worse" if counts["worse"] else "none"
    text = worded(texts, "compare", kind).format(**values)
    rest = kind != "none" and judged > counts["better"] + counts["worse"]
    return text + texts["compare.rest"] if rest else text


def in_both(page: Page, say: Callable[..., str], *values: object) -> Both:
    """What a function of one language's texts says, in both."""
    return Both(*(say(texts, *values) for texts in page.texts))


def axis_end(against: Sequence[Against]) -> float:
    """How far a common axis reaches on either side of zero, as a share: a round number that holds every interval.

    At most 1: what is further off is cut off, so that one figure does not flatten all the others.
    """
    reached = [abs(end) for one in against for row in one.rows for end in (row.low, row.high, row.change)
               if end is not None and row.likely is not None]
    most = min(max(reached, default=0.1), 1.0) or 0.1
    steps = [step * 10.0 ** power for power in range(-4, 1) for step in (1, 2, 3, 5)]
    return next(step for step in steps if step >= most * 0.999)


def change_mark(page: Page, found: Difference, end: float) -> Markup:
    """A change as a dot with its interval on an axis from -end to +end; zero is in the middle."""
    if found.change is None or found.low is None or found.high is None:
        return page.fill("axis", kind="", mark="")
    low, high, dot = (50.0 + 50.0 * max(-1.0, min(1.0, value / end)) for value in (found.low, found.high, found.change))
    cut = (" cut-low" if found.low < -end else "") + (" cut-high" if found.high > end else "")
    mark = page.fill("change_mark", low="%.2f" % low, width="%.2f" % max(0.3, high - low), dot="%.2f" % dot)
    return page.fill("axis", kind=found.word + cut, mark=mark)


def axis_head(page: Page, end: float) -> Markup:
    """The numbers over the axis."""
    number = "%g" % (100.0 * end)
    return page.fill("axis_head", low="\u2212%s" % number, high="+%s" % number, unit=page.said("unit.percent"))


def change_row(page: Page, pair: ComparedPair, found: Difference, end: float) -> Tuple[str, List[Cell]]:
    """One figure of the table of differences."""
    def value_cell(stage: ComparedStage, value: Optional[float]) -> Cell:
        block = stage.figures.get(found.metric) if found.stat else None
        mark = dagger(page, block, found.stat) if block and found.stat.startswith("p") else Markup("")
        shown = page.html(in_both(page, row_value, found, value))
        return Cell(joined((shown, mark)), "number value")

    cells = [Cell(in_both(page, row_name, found)), value_cell(pair.first, found.values[0]),
             value_cell(pair.second, found.values[1]),
             Cell(in_both(page, change_words, found.metric, found.change), "number change"),
             Cell(in_both(page, interval_words, found), "number interval"),
             Cell(change_mark(page, found, end), "against"), Cell(in_both(page, word_of, found), "word")]
    return found.word, cells


def change_table(page: Page, first: ComparedRun, one: Against, pair: ComparedPair, end: float) -> Markup:
    """Every figure of two stages side by side, the change, its interval, and the word for it."""
    head = [[Cell(page.said("change.figure")), Cell(first.letter, "number value"), Cell(one.run.letter, "number value"),
             Cell(page.said("change.change"), "number change"), Cell(page.said("change.95"), "number interval"),
             Cell(axis_head(page, end), "against"), Cell(page.said("change.word"), "word")]]
    counts = [pair.first.figures["requests"], pair.second.figures["requests"]]
    sub = page.said("change.n", a=first.letter, b=one.run.letter, n=count(counts[0]["success"]),
                    m=count(counts[1]["success"]))
    return page.fill("plain_panel", kind="wide", title=page.said("change.title", a=first.letter, b=one.run.letter),
                     sub=sub, tools=page.fill("copy"),
                     content=table(page, head, [change_row(page, pair, row, end) for row in pair.rows], "changes"))


class LoadGroup(NamedTuple):
    """The stages of one load: number and stage of the first run's, and the pair with each run that has it."""

    number: int
    stage: ComparedStage
    pairs: List[Tuple[Against, ComparedPair]]

    @property
    def shown(self) -> int:
        """How many figures are better or worse."""
        return sum(row.word in ("better", "worse") for _, pair in self.pairs for row in pair.rows)


def load_groups(first: ComparedRun, against: Sequence[Against]) -> List[LoadGroup]:
    """The first run's stages that another run has a counterpart of."""
    groups = []
    for number, stage in enumerate(first.stages):
        pairs = [(one, pair) for one in against for place, pair in zip(one.places, one.pairs) if place[0] == number]
        if pairs:
            groups.append(LoadGroup(number, stage, pairs))
    return groups


def compared_curves(page: Page, first: ComparedRun, group: LoadGroup, letters: str, metric: str) -> Optional[Chart]:
    """The cumulative curves of one time, one for each run, laid over one another."""
    stages = [(first.letter, group.stage)] + [(one.run.letter, pair.second) for one, pair in group.pairs]
    drawn = [(letter, stage) for letter, stage in stages
             if metric in stage.samples and len(stage.samples[metric].ordered) >= 5
             and stage.samples[metric].ordered[0] > 0]
    if len(drawn) < 2:
        return None
    series, words = [], []
    for place, (letter, stage) in enumerate(drawn):
        statistic, number = stage.figures[metric], letters.index(letter)
        marks = [[statistic[stat], int(stat[1:]) / 100] for stat in MARKED_PERCENTILES]
        series.append({"name": letter, "colour": RUN_COLOURS[number % len(RUN_COLOURS)],
                       "at": NAME_HEIGHTS[place % len(NAME_HEIGHTS)],
                       "dashed": number >= len(RUN_COLOURS),
                       "points": curve_points(stage.samples[metric].ordered), "marks": marks})
        words.append("%s %s" % (letter, figures_text(statistic, scale_of(statistic))))
    spec = {"kind": "curves", "series": series, "x": page.said("axis.time")}
    return Chart(spec, page.said("finding.answered", figures="; ".join(words)), page.said("panel.compare.sub"))


COMPARED_CURVES = ("ttft_ms", "latency_ms", "tpot_ms")


def compared_stage_block(page: Page, first: ComparedRun, group: LoadGroup, letters: str, ends: Mapping[str, float],
                         charts: Charts) -> Markup:
    """One load: curves first, then a table for each run against the first."""
    panels = []
    for metric in COMPARED_CURVES:
        chart = compared_curves(page, first, group, letters, metric)
        if chart is not None:
            panel = Panel("compare_" + metric[:-3], compared_curves)
            panels.append(panel_markup(page, panel, chart, charts, "%d-" % group.number))
    tables = [change_table(page, first, one, pair, ends[one.run.letter]) for one, pair in group.pairs]
    return joined(([page.fill("thirds", panels=joined(panels))] if panels else []) + tables)


def overview_row(page: Page, pair: ComparedPair) -> Tuple[str, List[Cell]]:
    """One load of the table over several: the change of each headline."""
    cells = [Cell(in_both(page, load_words, pair.first.name))]
    for metric, stat in HEADLINES:
        found = next((row for row in pair.rows if (row.metric, row.stat) == (metric, stat)), None)
        if found is None:
            cells.append(Cell(DASH, "number"))
            continue
        spoken = found.word in ("better", "worse")
        text = in_both(page, lambda texts, row=found, both_said=spoken: change_words(texts, row.metric, row.change) + (
            " " + worded(texts, "word", row.word) if both_said else ""))
        cells.append(Cell(text, "number " + found.word))
    return "", cells


def overview_tables(page: Page, first: ComparedRun, against: Sequence[Against]) -> Markup:
    """Where there are several loads: the headline changes, load by load, a table for each run."""
    made = []
    for one in against:
        if len(one.pairs) < 2:
            continue
        head = [[Cell(page.said("column.load"))] + [Cell(in_both(page, figure_words, metric, stat), "number")
                                                    for metric, stat in HEADLINES]]
        rows = [overview_row(page, pair) for pair in one.pairs]
        made.append(page.fill("plain_panel", kind="wide", title=page.said(
            "change.title", a=first.letter, b=one.run.letter), sub=page.said("compare.overview.sub"),
            tools=page.fill("copy"), content=table(page, head, rows, "changes overview")))
    return joined(made)


def differences_section(page: Page, first: ComparedRun, against: Sequence[Against], charts: Charts) -> Markup:
    """Curves and tables, load by load; with several loads one is shown at a time."""
    groups = load_groups(first, against)
    letters = first.letter + "".join(one.run.letter for one in against)
    notes = [in_both(page, alone_words, first, one) for one in against]
    notes += [in_both(page, lambda texts, place=place: footnotes(texts, against)[place])
              for place in range(len(footnotes(page.texts[0], against)))]
    below = joined(page.fill("note", kind="", text=note) for note in notes if note.en)
    if not groups:
        return section(page, "differences", below)
    ends = {one.run.letter: axis_end([one]) for one in against}
    chosen = max(groups, key=lambda group: (group.shown, group.number))
    blocks = [(group, compared_stage_block(page, first, group, letters, ends, charts)) for group in groups]
    if len(groups) == 1:
        return section(page, "differences", joined((blocks[0][1], below)), page.said("section.differences.sub"))
    buttons = joined(page.fill("pick", number=group.number, pressed="true" if group is chosen else "false", mark="",
                               text=level(group.stage.name)) for group in groups)
    picker = page.fill("picker", before=page.said("picker.before"), buttons=buttons,
                       after=level_words(page, "picker", level_keys([group.stage.name for group in groups])))
    shown = joined(page.fill("stage", number=group.number, hidden="" if group is chosen else "hidden", content=joined((
        page.fill("stage_title", title=in_both(page, load_words, group.stage.name, True)), block)))
        for group, block in blocks)
    content = joined((overview_tables(page, first, against), picker, shown, below))
    return section(page, "differences", content, page.said("section.differences.sub"))


def fact_rows(page: Page, runs: Sequence[ComparedRun]) -> List[Tuple[Text, List[Text], List[bool]]]:
    """The set-up fact by fact: name, each run's value, and which differ from the first's."""
    views = [stage_views(run.summary, run.rows) for run in runs]
    rows: List[Tuple[Text, List[Text]]] = [
        (page.said("setting.place"), [run.place for run in runs]),
        (page.said("setup.run"), [str(run.header.get("run_id", DASH)) for run in runs]),
        (page.said("fact.when"), [run_times(run.header, stages)[0] for run, stages in zip(runs, views)]),
        (page.said("fact.from"), [host_fact(page, run.header) for run in runs]),
        (page.said("setting.load"), [load_fact(page, stages, run.config) for run, stages in zip(runs, views)]),
        (page.said("setting.verdict"), [page.said("verdict." + run.state.lower()) for run in runs])]
    found = [(name, values, [value != values[0] for value in values]) for name, values in rows]
    found[:3] = [(name, values, [False] * len(runs)) for name, values, _ in found[:3]]  # always other ones
    for setting, values, differ in settings_of(runs):
        said = [in_both(page, setting_words, setting.key, value) for value in values]
        found.append((page.said("setting." + setting.key), said, differ))
    for side in ("in_tokens", "out_tokens"):
        means = [mean_length(run, side) for run in runs]
        if any(mean is not None for mean in means):
            apart = [mean is not None and means[0] is not None and abs(mean / means[0] - 1.0) > LENGTH_APART
                     for mean in means]
            found.append((page.said("setting.mean_" + side), [figure(mean) for mean in means], apart))
    return sorted(found, key=lambda row: not any(row[2]))  # what differs first


def mean_length(run: ComparedRun, side: str) -> Optional[float]:
    """The mean length of a run's prompts or answers in tokens, over its stages' successful requests."""
    values = [value for rows in run.rows for value in successful(rows, side)]
    return math.fsum(values) / len(values) if values and math.fsum(values) > 0 else None


def setup_comparison(page: Page, runs: Sequence[ComparedRun]) -> Markup:
    """The facts in columns, differing ones marked; and how the differences were judged."""
    head = [[Cell("")] + [Cell(run.letter) for run in runs]]
    rows = [("", [Cell(joined((page.html(name), page.fill("unequal")) if any(differ) else (page.html(name),)))] + [
        Cell(value, "differs" if apart else "") for value, apart in zip(values, differ)])
        for name, values, differ in fact_rows(page, runs)]
    method = [(page.said("method." + key), page.said("method.%s.text" % key))
              for key in ("interval", "hang", "word", "limits")]
    metrics = [metric for metric, _ in COMPARED if metric in METRICS]
    defined = [(metric_label(page, name), definition(page, name)) for name in metrics]
    facts_table = page.fill("plain_panel", kind="wide", title=page.said("setting.title"), sub=page.said("setting.sub"),
                            tools=page.fill("copy"), content=table(page, head, rows, "settings"))
    lists = [list_of_facts(page, method, "definitions", title=page.said("method.title")),
             list_of_facts(page, defined, "definitions", title=page.said("definitions"))]
    return section(page, "settings", joined([facts_table] + lists))


def outcome_words(texts: Said, outcome: Outcome) -> str:
    """What became of a condition in the words of a language."""
    return worded(texts, "condition", outcome.state)


def conditions_table(page: Page, against: Sequence[Against]) -> Markup:
    """The --fail-if conditions with the change and interval that each was held against; nothing without any."""
    outcomes = [outcome for one in against for outcome in one.outcomes]
    if not outcomes:
        return Markup("")
    several = len({outcome.letter for outcome in outcomes}) > 1 or any(len(one.pairs) > 1 for one in against)
    rows = []
    for outcome in outcomes:
        found, relative = outcome.difference, outcome.condition.relative
        where = in_both(page, lambda texts, place=outcome: "%s · %s" % (place.letter, load_words(texts, place.name)))
        cells = [Cell(outcome.condition.text)] + ([Cell(where)] if several else []) + [
            Cell(in_both(page, change_words, found.metric, found.change, relative), "number"),
            Cell(in_both(page, interval_words, found, relative), "number"),
            Cell(in_both(page, outcome_words, outcome), "result")]
        rows.append(({"failed": "failed", "kept": "passed"}.get(outcome.state, ""), cells))
    head = [[Cell(page.said("condition"))] + ([Cell(page.said("condition.where"))] if several else []) + [
        Cell(page.said("change.change"), "number"), Cell(page.said("change.95"), "number"),
        Cell(page.said("gate.result"), "result")]]
    failed = sum(outcome.state == "failed" for outcome in outcomes)
    judged = any(outcome.state != "unjudged" for outcome in outcomes)
    said = page.said("condition.said", k=failed, n=len(outcomes)) if judged else page.said("gates.not_judged")
    kind = "failed" if failed else "passed" if judged else ""
    return page.fill("subsection", title=page.said("condition.title"), said=said, kind=kind,
                     content=table(page, head, rows, "gates conditions"))


def comparison_band(page: Page, against: Sequence[Against]) -> Markup:
    """Whether like is compared with like: shape, word, sentence, and everything that is not alike."""
    state = comparison_state(against)
    reasons = list(zip(*(all_unfair(texts, against) for texts in page.texts)))
    items = joined(page.fill("item", text=Both(en, zh)) for en, zh in reasons)
    return page.fill("verdict", state=state, shape=page.fill("shape_" + state), word=page.said("fair." + state),
                     text=page.said("fair.%s.text" % state), reasons=page.fill("list", items=items) if items else "")


def compared_facts(page: Page, runs: Sequence[ComparedRun]) -> Markup:
    """Which run has which letter: its directory, model, moment and load."""
    made = []
    for number, run in enumerate(runs):
        stages = stage_views(run.summary, run.rows)
        name = page.fill("run_name", letter=run.letter, colour=RUN_COLOURS[number % len(RUN_COLOURS)], place=run.place)
        local, utc = run_times(run.header, stages)
        lines = [str(run.header.get("model", DASH)), local, load_fact(page, stages, run.config)]
        value = joined(page.fill("line", text=line) for line in lines)
        made.append(page.fill("fact", name=name, value=value, hover=utc))
    return joined(made)


def render_comparison(first: ComparedRun, against: Sequence[Against], language: str,
                      assets: Mapping[str, Union[bytes, str]]) -> str:
    """compare.html, complete: of one run and what others are against it."""
    page, charts = read_page(assets), {}  # type: Page, Charts
    runs = [first] + [one.run for one in against]
    models = list(dict.fromkeys(str(run.header.get("model", DASH)) for run in runs))
    sentences = [in_both(page, comparison_sentence, first, one) for one in against]
    body, setup = differences_section(page, first, against, charts), setup_comparison(page, runs)
    echarts, script = asset_text(assets, "echarts.min.js"), asset_text(assets, "report.js")
    header = {"model": " / ".join(models), "run_id": " / ".join(str(run.header.get("run_id", "")) for run in runs)}
    return page.fill(
        "page", lang={"zh": "zh-CN"}.get(language, language), language=language,
        policy=Markup(script_policy([echarts, script])), title=", ".join(run.place for run in runs),
        state=COMPARISON_PAGE, style=Markup(asset_text(assets, "report.css")),
        run_id=re.sub(r"[^\w./ -]", "", plain(header["run_id"])), skip=page.said("skip"),
        sections_label=page.texts[LANGUAGES.index(language)]["sections"], links=navigation(page, body + setup),
        dark=page.said("button.dark"), light=page.said("button.light"), print=page.said("button.print"),
        kicker=page.said("compare.kicker", n=len(runs)), model=header["model"], facts=compared_facts(page, runs),
        verdict=comparison_band(page, against), cut_off="",
        sentence=joined(page.fill("line", text=sentence) for sentence in sentences), figures="",
        gates=conditions_table(page, against), body=body, setup=setup,
        footer=page.said("footer", version=__version__), data=chart_data(page, header, charts),
        echarts=Markup(echarts), script=Markup(script)) + "\n"


# ==================================================================================================
# 17. Exits: a run for a ticket, for a CI server, and in one archive
# ==================================================================================================
#
# What leaves the report's house. summary.md is a table to paste: what an endpoint said stands in code spans, where no
# pipe, HTML, link or @name means anything. junit.xml is what CI servers read: a test for each gate of each stage, one
# for each stage, one for the verdict; it fails where the exit status would be 1, 3 or 4, and where a stage has no
# success. Both are functions of the summary, and neither computes a figure.
#
# An archive is a gzipped tar of five plain files, results.jsonl last. The same run gives the same bytes. Whoever opens
# one trusts nothing in it: nothing is unpacked by a name that stands in it, links and devices are refused, no file
# and no line may be longer than its limit, and all of it may not be larger than a run can be beside the archive's size.
#
# `Redactor` takes hosts, prompts and texts out of a run's lines. It keeps what it knows to be harmless and masks every
# other text, keys that a later version adds included; numbers stay, and the same text gets the same name throughout, so
# that every figure of the summary is the one it was.


# summary.md

PLACE_OF_CODE = "\ue000"  # stands in a sentence for the code span that takes its place


def code(text: object, most: int = 160) -> str:
    """Text of a stranger's as a code span in a cell: no pipe, HTML, link or @name in it means anything.

    >>> code("a|b `c`"), code("")
    ('``a\\\\|b `c` ``', '–')
    """
    shown = re.sub(r"\s+", " ", INVISIBLE.sub("\ufffd", plain(text))).strip()
    if not shown:
        return DASH
    shown = shown if len(shown) <= most else shown[:most].rstrip() + "…"
    shown = re.sub(r"\\+(?=\|)", lambda match: match.group() + " ", shown).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    blanks = [" " * (edge == "`") for edge in (shown[0], shown[-1])]
    return ticks + blanks[0] + shown + blanks[1] + ticks


def prose(text: str) -> str:
    """A text of ours with its marks as Markdown's, everything else in it as it reads."""
    text = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", INVISIBLE.sub("\ufffd", text.replace("\x01", "\ue001").replace(
        "\x02", "\ue002"))).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    lines = text.replace("\ue001", "**").replace("\ue002", "`").split("\n")
    return " ".join(line.strip() for line in lines) if len(lines) > 1 else lines[0]


def pipe_table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> List[str]:
    """A table as lines; the columns after the first ones are numbers and stand to the right."""
    rule = ["---" if column < left else "--:" for column in range(len(heads))]
    return ["", *("| %s |" % " | ".join(cells) for cells in (heads, rule, *rows))]


class Ticket:
    """What summary.md says of a run, in one language."""

    def __init__(self, page: Page, language: str, summary: Mapping, header: Mapping, rows: Sequence["Rows"],
                 end: Optional[Mapping]) -> None:
        self.page, self.language = page, LANGUAGES.index(language)
        self.summary, self.header, self.end = summary, header, end
        self.stages = stage_views(summary, rows, False)
        self.shown, self.why = choose_stage(self.stages, summary.get("find_max", {}))

    def _said(self, key: str, **values: object) -> str:
        return self._prose(self.page.said(key, **values))

    def _prose(self, text: Text) -> str:
        return prose(both(text)[self.language] if isinstance(text, Both) else plain(text))

    def lines(self) -> List[str]:
        """The whole of it."""
        several = len(self.stages) > 1
        made = ["### %s%s%s" % (self._said("kicker"), self._said("md.colon"), code(self.header.get("model", DASH)))]
        made += pipe_table(["", ""], self._facts(), 2) + ["", *self._verdict()]
        made += ["", self._prose(sentence(self.page, self.summary, self.stages, self.shown))]
        if several:
            made += ["", "**%s**" % self._said("md.figures_at", load=load_text(self.page, self.shown))]
        made += self._figures()
        made += self._stages() if several else self._gates()
        made += self._errors()
        if any("†" in line for line in made):
            made += ["", self._said("terminal.limited")]
        return [*made, "", self._footer(), ""]

    def _facts(self) -> List[List[str]]:
        header = self.header
        if header.get("merged"):
            place = code(both(host_fact(self.page, header))[self.language])
        else:
            place = ", ".join([code(header.get("host", DASH))] + [code(header[key]) for key in ("address", "os", "arch")
                                                                  if header.get(key)])
        load = self._prose(load_fact(self.page, self.stages, header.get("config", {})))
        return [[self._said("fact.endpoint"), code(header.get("url", DASH), 400)],
                [self._said("fact.when"), self._prose(run_times(header, self.stages)[0])],
                [self._said("fact.from"), place], [self._said("fact.load"), load]]

    def _verdict(self) -> List[str]:
        verdict = self.summary["verdict"]
        state = verdict["state"].lower()
        made = ["**%s** %s" % (self._said("verdict." + state), self._said(verdict_key(verdict)))]
        reasons = ["- " + self._reason(reason) for reason in verdict["reasons"]]
        made += [""] + reasons if reasons else []
        early = self.end is not None and self.end.get("reason", "done") != "done"
        cut = self.page.said("cut_off", at=duration_text(self.page, last_end(self.stages)), n=count(
            sum(len(stage.rows) for stage in self.stages))) if self.end is None else both("")
        made += ["", self._prose(cut)] if self.end is None else []
        ended = self._said("terminal.ended_early", reason=PLACE_OF_CODE)
        return made + (["", ended.replace(PLACE_OF_CODE, code(self.end["reason"]))] if early else [])

    def _reason(self, reason: object) -> str:
        """A reason of the verdict, with what it quotes from the file in a code span."""
        values = reason.get("values", {}) if isinstance(reason, dict) else {}
        quoted = next((name for name in ("reason", "hosts") if name in values), "")
        if not quoted:
            return self._prose(reason_text(self.page, reason))
        told = {**reason, "values": {**values, quoted: PLACE_OF_CODE}}  # type: ignore[dict-item]
        return self._prose(reason_text(self.page, told)).replace(PLACE_OF_CODE, code(values[quoted]))

    def _figures(self) -> List[str]:
        """The six figures, each with the number of requests that it is made of."""
        stage, rows = self.shown, []
        requests, throughput = stage.requests, stage.figures.get("throughput", {})
        rows.append([self._said("tile.success"), self._prose(percent(requests.get("success_rate"))), "", "",
                     count(finished(stage))])
        last = "tpot_ms" if stage.statistic("tpot_ms") or not stage.statistic("itl_ms") else "itl_ms"
        metrics = [("tile.ttft", "ttft_ms"), ("tile.latency", "latency_ms"), ("tile." + last[:-3], last)]
        if stage.is_open:
            metrics[1:1] = [("stage.ttft_due", "ttft_from_scheduled_ms")]
            metrics[3:3] = [("stage.latency_due", "latency_from_scheduled_ms")]
        for title, metric in metrics:
            statistic, scale = stage.statistic(metric), scale_of(stage.statistic(metric))
            cells = [scale.said(statistic.get(stat)) + self._dagger(statistic, stat) for stat in MARKED_PERCENTILES]
            name = self._said(title, unit="").rstrip(", ")
            rows.append([name, *map(prose, cells), count(statistic.get("n", 0))])
        tokens = known(throughput.get("output_tokens_per_s"))
        key, unit = ("output_tokens_per_s", "unit.tokens_per_s") if tokens else ("output_chars_per_s",
                                                                                  "unit.chars_per_s")
        for title, metric, each in (("tile.throughput", key, unit), ("tile.requests", "rps", "unit.requests_per_s")):
            value = self._prose(measured(throughput.get(metric), self.page.said(each)))
            rows.append([self._said(title), value, "", "", count(stage.successes)])
        heads = [self._said("md.figure"), self._said("md.value"), "P95", "P99", "n"]
        return pipe_table(heads, rows)

    @staticmethod
    def _dagger(statistic: Mapping, stat: str) -> str:
        return "†" if statistic and not quotable(statistic, stat) else ""

    def _result(self, stage: StageView, gate: Mapping) -> str:
        if not stage.judged or stage.limited:
            return DASH
        state = "passed" if gate.get("passed") else "failed"
        return ("✓ " if gate.get("passed") else "✕ **") + self._said("gate." + state) + "**" * (not gate.get("passed"))

    def _gates(self) -> List[str]:
        """The gates of a run of one stage."""
        stage, rows = self.shown, []
        for gate in stage.gates:
            limit, value = (self._prose(text) for text in gate_numbers(self.page, stage, gate))
            mark = self._dagger(stage.statistic(gate_metric(gate)), str(gate.get("stat") or "")) if gate.get(
                "stat") else ""
            rows.append([self._prose(gate_title(self.page, gate)), self._prose(required(gate, both(limit))),
                         value + mark, count(gate.get("n", 0)), self._result(stage, gate)])
        heads = [self._said("gate." + key) for key in ("name", "required", "measured")]
        said = "" if stage.judged else self._said("md.colon") + self._said("gates.not_judged")
        title = ["", "**%s**%s" % (self._said("gates"), said)]
        return title + pipe_table([*heads, "n", self._said("gate.result")], rows) if rows else []

    def _stages(self) -> List[str]:
        """A line for each stage, with the gates that it failed by name."""
        stages = in_order(self.stages)
        columns = [column for column in STAGE_COLUMNS if any(known(stage_value(stage, column)) for stage in stages)
                   and (stages[0].is_open or not column.metric.endswith("_from_scheduled_ms"))]
        scales = {column.metric: stage_scale(stages, column.metric) for column in columns}
        keys, gated = level_keys([stage.name for stage in stages]), any(stage.gates for stage in stages)
        heads = [self._prose(level_words(self.page, "stage", keys)), self._said("stage.success")]
        for column in columns:
            group = [self._said(column.group, unit=scales[column.metric].unit)] if column.group else []
            heads.append(" · ".join([*group, self._said(column.title)]))
        rows = [self._stage(stage, keys, columns, scales, gated) for stage in stages]
        asked = self._prose(joined_texts(" · ", (requirement(self.page, gate, stage_scale(stages, gate_metric(gate)))
                                                 for gate in self.shown.gates)))
        title = "**%s**" % self._said("gates.stages" if gated else "stages")
        title += self._said("md.colon") + asked if asked else ""
        return ["", title, *pipe_table(heads + [self._said("stage.gates")] * gated, rows)]

    def _stage(self, stage: StageView, keys: Sequence[str], columns: Sequence[StageColumn], scales: Mapping[str, Scale],
               gated: bool) -> List[str]:
        cells = [level(stage.name, keys), self._prose(percent(stage.requests.get("success_rate")))]
        for column in columns:
            value = stage_value(stage, column)
            text = figure(value / scales[column.metric].divisor) if known(value) else DASH
            mark = self._dagger(stage.statistic(column.metric), column.stat) if column.stat else ""
            cells.append(prose(text) + mark)
        if gated:
            failed = [self._prose(gate_title(self.page, gate)) for gate in stage.failed_gates]
            held = "– " + self._said("gate.client") if stage.limited else "✓ " + self._said("gate.passed")
            cells.append(DASH if not stage.judged else "✕ **%s**" % ", ".join(failed) if failed else held)
        return [cell.replace("|", "\\|") if "|" in cell and "`" not in cell else cell for cell in cells]

    def _errors(self) -> List[str]:
        """The commonest failures; what the endpoint said is in code spans."""
        errors = self.summary.get("errors", ())
        total = self.summary["requests"]["total"]
        rows = [[self._prose(status_name(self.page, error["status"])), code(redact(error["key"])),
                 count(error["count"]), self._prose(percent(error["count"] / total))] for error in errors[:10]]
        if not rows:
            return []
        more = ["", self._said("terminal.more_failures", n=len(errors) - 10)] if len(errors) > 10 else []
        heads = [self._said(key) for key in ("md.failure", "md.what", "column.count", "column.share")]
        return ["", "**%s**" % self._said("terminal.failures"), *pipe_table(heads, rows, 2), *more]

    def _footer(self) -> str:
        header = self.header
        parts = [self._said("setup.run") + " " + code(header.get("run_id", DASH)),
                 code("llmbench %s" % header.get("tool_version", DASH)), code(header.get("python", DASH))]
        if header.get("results_sha256"):
            parts.append("SHA-256 " + code(header["results_sha256"]))
        return " · ".join(parts)


def markdown_of(page: Page, language: str, summary: Mapping, header: Mapping, rows: Sequence["Rows"],
                end: Optional[Mapping]) -> str:
    """summary.md: facts, verdict, the six figures, gates or stages, and the commonest failures."""
    return "\n".join(Ticket(page, language, summary, header, rows, end).lines())


# junit.xml

XML_UNFIT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\x7f-\x9f]")


def xml_text(text: object) -> str:
    """Text that XML 1.0 can hold, in an attribute or an element: what it can't is left out."""
    return escape_html(XML_UNFIT.sub("", str(text))).replace("\r", "&#13;").replace("\n", "&#10;").replace("\t", "&#9;")


def element(name: str, attributes: Mapping[str, object], *inside: str) -> str:
    """An element with these attributes, and with what is inside, which is XML already."""
    head = name + "".join(' %s="%s"' % (key, xml_text(value)) for key, value in attributes.items())
    return "<%s>%s</%s>" % (head, "".join(inside), name) if inside else "<%s/>" % head


class Case(NamedTuple):
    """One test: of which group, its name, its seconds, and what became of it: "", failure, error or skipped."""

    group: str
    name: str
    seconds: float
    state: str = ""
    said: str = ""
    kind: str = ""

    def xml(self) -> str:
        """As an element."""
        given = {"classname": "llmbench." + self.group, "name": self.name, "time": "%.3f" % self.seconds}
        if not self.state:
            return element("testcase", given)
        told = {"message": self.said, "type": self.kind} if self.state != "skipped" else {"message": self.said}
        return element("testcase", given, element(self.state, told, xml_text(self.said)))


def verdict_case(texts: Mapping[str, str], summary: Mapping) -> Case:
    """Whether the figures can be trusted: INVALID is an error of the test itself, not a failure of the endpoint."""
    verdict = summary["verdict"]
    if verdict["state"] != "INVALID":
        return Case("run", "verdict", 0.0)
    reasons = [reason_said(texts, reason) for reason in verdict["reasons"] if reason["state"] == "INVALID"]
    return Case("run", "verdict", 0.0, "error", " ".join([texts["verdict.invalid.text"], *reasons]), "INVALID")


def search_case(texts: Mapping[str, str], summary: Mapping) -> Case:
    """Whether a search found a load that meets the gates."""
    said = search_words(texts, summary).replace("**", "")
    if "load" in summary["find_max"]:
        return Case("run", "find-max", 0.0)
    return Case("run", "find-max", 0.0, "failure", said, "find-max")


def gate_case(stage: Mapping, gate: Mapping, group: str, judged: bool, search: bool) -> Case:
    """One gate of one stage, with what was measured and what was required."""
    value, limit = gate_pair(gate)
    said = "measured %s, required %s %s (n = %s)" % (value, gate["op"], limit, count(gate["n"]))
    if gate["stat"] in ((stage.get(gate_metric(gate)) or {}).get("limited") or ()):
        said += "; n is too small for this percentile"
    if not judged:
        return Case(group, str(gate["gate"]), 0.0, "skipped", "not judged, the client was the limit: " + said)
    if gate["passed"]:
        return Case(group, str(gate["gate"]), 0.0)
    if search:
        return Case(group, str(gate["gate"]), 0.0, "skipped", "a probe of the search did not pass: " + said)
    return Case(group, str(gate["gate"]), 0.0, "failure", said, "gate")


def stage_case(stage: Mapping, group: str, search: bool) -> Case:
    """Whether a stage had any answer at all; it takes the stage's time."""
    requests, seconds = stage["requests"], stage["wall_time_ms"] / 1000.0
    if requests["success"]:
        return Case(group, "answers", seconds)
    said = "none of %s requests succeeded" % count(requests["total"])
    if stage.get("errors"):
        first = stage["errors"][0]
        said += "; %s × %s: %s" % (count(first["count"]), first["status"], redact(first["key"]))
    return Case(group, "answers", seconds, "skipped" if search else "failure", said, "no success")


def junit_cases(texts: Mapping[str, str], summary: Mapping) -> List[Case]:
    """The verdict, a search's result, each stage and each gate of it."""
    search = "find_max" in summary
    cases = [verdict_case(texts, summary)] + ([search_case(texts, summary)] if search else [])
    valid = summary["verdict"]["state"] != "INVALID"
    for stage, name in zip(summary["stages"], load_names([stage["load"] for stage in summary["stages"]])):
        group = load_words(texts, name).replace(".", "_")  # a dot would begin a package
        judged = valid and not stage["client"].get("limited_by")
        cases.append(stage_case(stage, group, search))
        cases += [gate_case(stage, gate, group, judged, search) for gate in stage.get("slo", ())]
    if search and not summary["requests"]["success"]:
        cases.append(Case("run", "answers", 0.0, "failure", "not one request of the search succeeded", "no success"))
    return cases


JUNIT_FACTS = ("run_id", "provider", "model", "url", "started_at", "tool_version", "python", "host", "address", "os",
               "arch", "command", "results_sha256")
JUNIT_FIGURES = (("success_rate", ""), ("ttft_ms", "p50"), ("ttft_ms", "p95"), ("ttft_ms", "p99"),
                 ("latency_ms", "p50"), ("latency_ms", "p95"), ("latency_ms", "p99"), ("tpot_ms", "p50"),
                 ("tpot_ms", "p95"), ("output_tokens_per_s", ""), ("rps", ""))


def junit_properties(texts: Mapping[str, str], summary: Mapping, header: Mapping) -> List[Tuple[str, str]]:
    """What is known of the run, and the figures of each stage as summary.json has them."""
    made = [(key, str(header[key])) for key in JUNIT_FACTS if header.get(key)]
    made.append(("verdict", summary["verdict"]["state"]))
    names = load_names([stage["load"] for stage in summary["stages"]])
    for stage, name in zip(summary["stages"], names):
        before = load_words(texts, name) + ": " if len(names) > 1 else ""
        places = {**stage.get("throughput", {}), **stage["requests"]}
        for metric, stat in JUNIT_FIGURES:
            value = (stage.get(metric) or {}).get(stat) if stat else places.get(metric)
            if known(value):
                made.append((before + metric + ("." + stat if stat else ""), "%.10g" % value))
    return made


def junit_of(page: Page, language: str, summary: Mapping, header: Mapping, rows: Sequence["Rows"],
             end: Optional[Mapping]) -> str:
    """junit.xml; names are English whatever the language, so that a CI server knows a test again."""
    texts = {key: text.replace("\x01", "").replace("\x02", "") for key, text in page.texts[0].items()}
    cases = junit_cases(texts, summary)
    numbers = {"tests": len(cases), "failures": sum(case.state == "failure" for case in cases),
               "errors": sum(case.state == "error" for case in cases)}  # fmt: skip
    seconds = "%.3f" % (summary["wall_time_ms"] / 1000.0)
    reasons = ["%s %s" % (reason["state"], reason_said(texts, reason)) for reason in summary["verdict"]["reasons"]]
    said = [summary["verdict"]["state"], *reasons]
    if end is None or end.get("reason", "done") != "done":
        said.append("the run ended early: %s" % (CUT_OFF if end is None else end["reason"]))
    properties = [element("property", {"name": key, "value": value}) for key, value in junit_properties(
        texts, summary, header)]
    suite = {"name": "llmbench " + str(header.get("model", "")), "id": 0, "package": "llmbench",
             "timestamp": str(header.get("started_at", ""))[:19], "hostname": header.get("host", "") or "unknown",
             **numbers, "skipped": sum(case.state == "skipped" for case in cases), "time": seconds}  # fmt: skip
    inside = [element("properties", {}, *properties), *(case.xml() for case in cases),
              element("system-out", {}, xml_text("\n".join(said)) or " "), element("system-err", {})]
    root = element("testsuites", {"name": "llmbench", **numbers, "time": seconds},
                   "\n", element("testsuite", suite, "\n", "\n".join(inside), "\n"), "\n")
    return '<?xml version="1.0" encoding="UTF-8"?>\n%s\n' % root


FORMS: Dict[str, Tuple[str, Callable[..., str]]] = {
    "markdown": ("summary.md", markdown_of), "junit": ("junit.xml", junit_of),
}  # fmt: skip


# Archives

ARCHIVED = "README.txt", "SHA256SUMS", "config.json", "run.json", "results.jsonl"
ARCHIVE_FILES = 1000  # that may lie in an archive, those beside ours included
ARCHIVE_TEXT = 1 << 24  # bytes of a file other than results.jsonl
ARCHIVE_LINE = 1 << 26  # bytes of a line of results.jsonl
ARCHIVE_FREE = 1 << 28  # bytes to which any archive may unpack; above, so many times its size:
ARCHIVE_RATIO = 100  # records are packed to a seventh, a run of failures that are all alike to a fortieth


class ArchiveError(Exception):
    """An archive that can't be trusted, in the words that follow its name."""


class Unpacked:
    """The bytes of a gzipped file, read in pieces and never beyond what its size allows; raises ArchiveError."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        import gzip

        self._stream = gzip.GzipFile(fileobj=file, mode="rb")
        self._left = max(ARCHIVE_FREE, ARCHIVE_RATIO * size)

    def _taken(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise ArchiveError("unpacks to far more than a run can hold")
        return data

    def read(self, size: int) -> bytes:
        """Exactly so many bytes, of which there may be at most ARCHIVE_TEXT."""
        data = self._taken(self._stream.read(size))
        if len(data) < size:
            raise ArchiveError("is cut off")
        return data

    def line(self, most: int) -> bytes:
        """A line with its end, or what there is of it in so many bytes."""
        data = self._taken(self._stream.readline(min(most, ARCHIVE_LINE + 1)))
        if not data:
            raise ArchiveError("is cut off")
        if len(data) > ARCHIVE_LINE:
            raise ArchiveError("holds a line of more than %d bytes" % ARCHIVE_LINE)
        return data

    def skip(self, size: int) -> None:
        """Passes over so many bytes."""
        while size > 0:
            size -= len(self.read(min(size, 1 << 16)))

    def drain(self) -> None:
        """Reads to the end, where gzip tells whether anything was damaged."""
        while self._taken(self._stream.read(1 << 16)):
            pass


def archived_files(stream: Unpacked) -> Iterator[Tuple[str, int]]:
    """Each file of ours in a tar stream as (name, bytes); its bytes must have been taken when the next is asked for."""
    import tarfile

    plain_types = (tarfile.REGTYPE, tarfile.AREGTYPE)
    carriers = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
    seen: Set[str] = set()
    for _ in range(ARCHIVE_FILES):
        block = stream.read(tarfile.BLOCKSIZE)
        if not block.strip(b"\0"):
            return
        try:
            member = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.HeaderError:
            raise ArchiveError("is no tar archive") from None
        parts = [part for part in member.name.split("/") if part != "."]
        if not (member.type in plain_types or member.isdir() or member.type in carriers):
            raise ArchiveError("holds a link or a device")
        if member.name.startswith("/") or ".." in parts or member.size < 0:
            raise ArchiveError("holds a path that leads out of it")
        ours = member.type in plain_types and 0 < len(parts) < 3 and parts[-1] in ARCHIVED
        if ours and parts[-1] in seen:
            raise ArchiveError("holds %s twice" % parts[-1])
        if ours:
            seen.add(parts[-1])
            yield parts[-1], member.size
        else:
            stream.skip(member.size)
        stream.skip(-member.size % tarfile.BLOCKSIZE)
    raise ArchiveError("holds more than %d files" % ARCHIVE_FILES)


def archived_lines(stream: Unpacked) -> Iterator[bytes]:
    """The lines of an archive's results.jsonl as they are; at its end raises ArchiveError where a checksum differs."""
    digests: Dict[str, str] = {}
    promised: Dict[str, str] = {}
    for name, size in archived_files(stream):
        digest, taken = hashlib.sha256(), 0
        if name == "results.jsonl":
            while taken < size:
                line = stream.line(size - taken)
                taken += len(line)
                digest.update(line)
                yield line
        elif size > ARCHIVE_TEXT:
            raise ArchiveError("holds a %s of more than %d bytes" % (name, ARCHIVE_TEXT))
        else:
            data = stream.read(size)
            digest.update(data)
            if name == "SHA256SUMS":
                found = re.findall(r"^([0-9a-f]{64})[ *]{2}(\S+)$", data.decode("utf-8", "replace"), re.MULTILINE)
                promised = {path: told for told, path in found}
        digests[name] = digest.hexdigest()
    stream.drain()
    if "results.jsonl" not in digests:
        raise ArchiveError("holds no results.jsonl")
    if "results.jsonl" not in promised:
        raise ArchiveError("has no checksum of its results.jsonl in a SHA256SUMS")
    for name in promised:
        if digests.get(name) != promised[name]:
            raise ArchiveError("holds a %s that is not the one of its SHA256SUMS" % name)


def archive_head(name: str, size: int, moment: float) -> bytes:
    """The tar header of a file that anybody may read, of nobody in particular."""
    import tarfile

    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size, int(moment), 0o644
    return member.tobuf(tarfile.GNU_FORMAT)


def archive_bytes(top: str, moment: float, texts: Mapping[str, bytes], size: int,
                  blocks: Iterable[bytes]) -> Iterator[bytes]:
    """An archive in pieces: these texts by name, then results.jsonl of so many bytes, all below the directory `top`."""
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)  # zlib's own gzip header: no name and no time
    for name, text in texts.items():
        yield packer.compress(archive_head("%s/%s" % (top, name), len(text), moment) + text)
        yield packer.compress(b"\0" * (-len(text) % 512))
    yield packer.compress(archive_head("%s/%s" % (top, ARCHIVED[-1]), size, moment))
    for block in blocks:
        yield packer.compress(block)
    yield packer.compress(b"\0" * (-size % 512 + 1024))
    yield packer.flush()


ARCHIVE_README = """\
A run of llmbench, a load test of a streaming LLM endpoint, as it was recorded.

  results.jsonl   a line for each request, with its times and counts; the truth that every figure is made of
  config.json     what the run was asked to do, secrets masked
  run.json        the run's id, the command, the tool's and Python's version, and the host that it ran on
  SHA256SUMS      a checksum of each of these files
%s
Is everything as it was packed?

  tar xzf FILE.tar.gz
  cd {top} && sha256sum -c SHA256SUMS     (macOS: shasum -a 256 -c SHA256SUMS)

Open it: this builds summary.json, results.csv and report.html again, and refuses an archive that was changed.

  python3 llmbench.pyz report FILE.tar.gz
"""
ARCHIVE_REDACTED = """
Hosts, addresses, prompt names and what the endpoint said were replaced before packing: host-A, address-B, text-C and
[redacted] stand for them, the same name for the same thing within this archive. No number was changed, so every figure
is that of the run. Equal names in two archives need not mean the same host.
"""


def archive_texts(
    run: Mapping[str, Any], end: Optional[Mapping[str, Any]], top: str, redacted: bool, digest: str
) -> Dict[str, bytes]:
    """The files beside results.jsonl, of which the digest is given, by name in the order of the archive."""
    facts = {key: value for key, value in run.items() if key != "config"}
    facts = {"packed_by": "llmbench " + __version__, "redacted": redacted, **facts, "end": end}
    readme = (ARCHIVE_README % (ARCHIVE_REDACTED if redacted else "")).format(top=top)
    told = {"config.json": run.get("config", {}), "run.json": facts}
    made = {name: (json.dumps(tree, ensure_ascii=False, indent=2) + "\n").encode("utf-8", "replace")
            for name, tree in told.items()}  # fmt: skip
    made["README.txt"] = readme.encode("utf-8")
    sums = {**{key: hashlib.sha256(text).hexdigest() for key, text in made.items()}, ARCHIVED[-1]: digest}
    listed = "".join("%s  %s\n" % (sums[key], key) for key in ARCHIVED if key in sums)
    return {key: listed.encode("ascii") if key == "SHA256SUMS" else made[key] for key in ARCHIVED[:-1]}


# Redaction


MASKED = "[redacted]"
NO_SECRET = frozenset(("", "***", "none", "auto", "built-in", MASKED))
# Keys of a line whose texts this program makes itself and that hold no name of anything.
FIXED = frozenset((
    "llmbench", "tool_version", "run_id", "request_id", "started_at", "ended_at", "start_at", "at", "start_ts",
    "first_content_ts", "end_ts", "utc_offset", "phase", "status", "clock", "shard", "missing", "digest",
))  # fmt: skip
# Keys whose texts name nobody, unless a host is named in passing.
HARMLESS = frozenset((
    "provider", "model", "os", "arch", "python", "hosts", "compressed", "tls_version", "cipher", "token_mode",
    "think_tags", "arrival", "find_max", "order", "timestamp_unit", "max_tokens_field", "input_tokens", "max_errors",
    "lang", "progress", "processes", "auth", "slo", "reason", "dialect", "workload_notes",
))  # fmt: skip
NAMED_AS = {  # keys whose texts get a name, and its kind
    "host": "host", "server_name": "host", "address": "address", "proxy": "proxy", "prompt_id": "prompt",
    "source": "workload", "workload_file": "workload",
}  # fmt: skip
PUBLIC_PATHS = frozenset((
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/api/chat", "/api/generate",
    "/v1/chat-messages", "/chat/completions", "/completions",
))  # fmt: skip
FINISHES = frozenset((  # why an answer ends, in the dialects' own words; any other text is the endpoint's
    "stop", "length", "tool_calls", "function_call", "content_filter", "sensitive", "end_turn", "max_tokens",
    "tool_use", "stop_sequence", "pause_turn", "refusal", "STOP", "MAX_TOKENS", "SAFETY", "RECITATION", "eos", "limit",
    "word", "eos_token", "completed", "incomplete", "max_output_tokens", "normal", "message_end", "workflow_finished",
    "done",
))  # fmt: skip
OWN_ERRORS = frozenset(("timeout", "truncated", "empty", "cancelled", "dropped"))  # in the client's own words
SYSTEM_ERRORS = frozenset(("dns_error", "connect_error"))  # in the operating system's, behind a host's name
ADDRESS = re.compile(
    r"\b(?:[0-9]{1,3}\.){3}[0-9]{1,3}\b|(?<![\w:.])(?=[0-9a-fA-F:]*::|(?:[0-9a-fA-F]{1,4}:){3})"
    r"(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4}(?![\w:])"
)
PLACE = re.compile(r"\b[A-Za-z][\w.-]*:[0-9]{2,5}\b")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|[a-z+]+://\S+")


def letters(number: int) -> str:
    """A, B, … Z, AA, AB: numbers that the grouping of failures does not take for one that differs each time.

    >>> letters(0), letters(25), letters(26), letters(702)
    ('A', 'Z', 'AA', 'AAA')
    """
    text = ""
    while number >= 0:
        number, rest = divmod(number, 26)
        text, number = chr(65 + rest) + text, number - 1
    return text


LONGEST_SCRUBBED = 2000  # characters of a harmless text; none that a run writes is longer


class Redactor:
    """Takes hosts, prompts and texts out of a run's lines, consistently; every number stays.

    `key` must be known to nobody who gets the lines: checksums of answers are enciphered with it, so that equal ones
    stay equal and none can be checked against a guess.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._names: Dict[str, Dict[str, str]] = {}  # kind -> what stood there -> what stands for it
        self._errors: Dict[Tuple[str, str], str] = {}  # status and cause -> what is said instead
        self._said: Set[Tuple[str, str]] = set()  # status and cause of what is said instead
        self._keys: Dict[str, str] = {}
        self.masked = 0

    def line(self, line: Mapping[str, Any]) -> Dict[str, Any]:
        """A line of results.jsonl without hosts, prompts and texts."""
        if "run" in line:
            self._learn(line["run"])
            return {**self._tree("", line), "run": {**self._tree("", line["run"]), "redacted": True}}
        made = self._tree("", line)
        if "request_id" in line and "err" in line:
            made["err"] = self._error(str(line.get("status", "")), str(line["err"]))
        return made

    def counts(self) -> Dict[str, int]:
        """How many different things of each kind were replaced."""
        found = {kind: len(names) for kind, names in sorted(self._names.items())}
        return {**found, "error": len(self._errors), "other": self.masked}

    def _learn(self, run: Mapping[str, Any]) -> None:
        """Names the hosts that a header tells of, wherever they stand later."""
        for told in [run, *run.get("merged", {}).get("shards", ())]:
            for key in ("host", "address"):
                if isinstance(told.get(key), str) and told[key] not in NO_SECRET:
                    self._name(key, told[key])
        self._tree("", {key: run.get("config", {}).get(key) for key in ("url", "server_name", "proxy")})

    def _name(self, kind: str, text: str) -> str:
        names = self._names.setdefault(kind, {})
        text = re.sub(r"^[a-z]+://([^/@]*@)?", "", text) if kind == "proxy" else text
        if text not in names:
            names[text] = "%s-%s" % (kind, letters(len(names)))
        return names[text]

    def _tree(self, key: str, value: Any) -> Any:
        """A value of a line, below the key that it stands at."""
        if isinstance(value, str):
            return self._text(key, value)
        if isinstance(value, list):
            return [self._tree(key, part) for part in value]
        if not isinstance(value, dict):
            return value
        inside = key in ("body", "auth_opt")  # the user's own keys: none of them says what its text is
        return {self._key_of(name): self._tree("" if inside else name, part) for name, part in value.items()}

    def _key_of(self, name: str) -> str:
        if name not in self._keys:
            self._keys[name] = name if re.match(r"^[\w.-]{1,40}$", name) else MASKED
        return self._keys[name]

    def _text(self, key: str, text: str) -> str:
        """A text, by its key: kept, named or masked."""
        if key in FIXED or text in NO_SECRET:
            return text
        if key == "provider" and text not in PROVIDERS:
            return "custom"
        if key in HARMLESS:
            return self._scrubbed(text)
        if key in NAMED_AS:
            return self._name(NAMED_AS[key], text)
        if key == "url":
            return self._url(text)
        if key == "command":
            return self._command(text)
        if key == "header":
            return self._masked(text.partition(":")[0] + ": ")
        if key == "out_crc32":
            return self._enciphered(text)
        if key == "err":  # a record's is told by its status
            return MASKED
        if key == "finish_reason" and text in FINISHES:
            return text
        return self._masked()

    def _masked(self, before: str = "") -> str:
        self.masked += 1
        return before + MASKED

    def _scrubbed(self, text: str) -> str:
        """A harmless text in which a host may be named all the same."""
        text = text[:LONGEST_SCRUBBED]
        for kind in ("host", "address", "proxy"):
            named = [name for name in self._names.get(kind, ()) if name in text]
            for name in sorted(named, key=len, reverse=True):
                text = re.sub(r"(?<![\w.-])%s(?![\w-])" % re.escape(name), self._names[kind][name], text)
        return ADDRESS.sub(lambda match: self._name("address", match.group()), text)

    def _url(self, text: str) -> str:
        """A URL with a name for its host; a path that every endpoint of a dialect has stays."""
        try:
            parts = urlsplit(text)
            host = parts.hostname
        except ValueError:
            return self._masked()
        if not host or not re.match(r"^[a-z]{1,12}$", parts.scheme):
            return self._masked()
        name = self._name("host", host)
        return "%s://%s%s" % (parts.scheme, name, parts.path if parts.path in PUBLIC_PATHS else "/" + MASKED)

    def _command(self, text: str) -> str:
        """A command line with the values of flags that say nothing of anybody."""
        shown, flag = [], ""
        words = split_command(text) or []
        for word in words:
            name, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
            if name:
                flag = name.lstrip("-").replace("-", "_") if re.match(r"^-{1,2}[a-z-]{1,30}$", name) else ""
                shown.append((name if flag else MASKED) + (equals and "=" + self._flag_value(flag, value)))
            else:
                program = len(shown) < 3 and "run" not in shown  # python3 llmbench.pyz run
                shown.append(word.rpartition("/")[2] if program else self._flag_value(flag, word))
        return " ".join(word if re.match(r"^[\w./:,=%\[\]-]+$", word) else shlex.quote(word) for word in shown)

    def _flag_value(self, flag: str, value: str) -> str:
        if re.match(r"^[0-9.,]+(ms|s|m|h|%)?$", value) or value in ("run", "***"):
            return value
        return self._text(flag, value) if flag in HARMLESS or flag in ("url", "start_at") else self._masked()

    def _error(self, status: str, err: str) -> str:
        """What is said in place of an error: the same for all that count as one cause, and no two causes alike."""
        cause = status, error_key(err)
        if cause not in self._errors:
            text = self._error_text(status, err)
            if (status, error_key(text)) in self._said:
                text += " (%s)" % self._name("text", "\0".join(cause))
            self._said.add((status, error_key(text)))
            self._errors[cause] = text
        return self._errors[cause]

    def _error_text(self, status: str, err: str) -> str:
        if status in OWN_ERRORS:
            told = self._scrubbed(QUOTED.sub(MASKED, err))
            told = PLACE.sub(lambda match: self._name("address", match.group()), told)
            return re.sub(r"(?<=proxy )[\w-]*\.[\w.-]+", MASKED, told)
        if status in SYSTEM_ERRORS and ": " in err:
            return self._scrubbed("host: " + QUOTED.sub(MASKED, err.rpartition(": ")[2]))
        code = re.match(r"HTTP [1-5][0-9]{2}\b", err)
        return (code.group() + ": " if code else "") + self._name("text", "\0".join((status, error_key(err))))

    def _enciphered(self, checksum: str) -> str:
        """A CRC-32 by a cipher of 32 bits (four rounds of Feistel's): equal ones stay equal, others different."""
        try:
            number = int(checksum, 16) & 0xFFFFFFFF
        except ValueError:
            return self._masked()
        left, right = divmod(number, 65536)
        for turn in range(4):
            mixed = hashlib.blake2b(struct.pack(">BH", turn, right), key=self._key, digest_size=2).digest()
            left, right = right, left ^ int.from_bytes(mixed, "big")
        return "%04x%04x" % (left, right)


# ==================================================================================================
# 18. Artifacts: records, summary <-> files
# ==================================================================================================
#
# results.jsonl is the truth: a header line, a line for each finished request, an audit line for each
# process and stage, an end line. Every line is appended by one os.write on a descriptor opened with
# O_APPEND, so that several processes can share the file and a crash loses at most what was in flight.
# summary.json, results.csv and report.html are functions of these lines (`report DIR` makes them
# again); they are written beside their place and moved into it, so that nobody reads half of one.
#
# The header names the format of the lines. Within a format keys are added and never change their meaning: a reader
# takes what is absent for not known and passes over what it does not know. A file of another format is refused.

RESULTS, RESULTS_CSV, SUMMARY, REPORT = "results.jsonl", "results.csv", "summary.json", "report.html"
ASSETS = (
    "report.html", "report.css", "report.js", "echarts.min.js", "texts/en.json", "texts/zh.json", "prompts/en.txt",
    "prompts/zh.txt",
)  # fmt: skip
FORMAT = "1"  # of results.jsonl
RUN_FILES = (RESULTS, RESULTS_CSV, SUMMARY, REPORT, *(name for name, _ in FORMS.values()))
CSV_LEFT_OUT = frozenset(("itl_hist", "chunk_ms", "first_content_raw", "final_frame_raw", "error_raw"))
CSV_COLUMNS = tuple(name for name in Record.__dataclass_fields__ if name not in CSV_LEFT_OUT)
CSV_FORM, CSV_COMMAS = ",".join(["%s"] * len(CSV_COLUMNS)), len(CSV_COLUMNS) - 1
CSV_ODD = ('"', "=", "+", "@", "\t", "\r", "\n", "\0", ",-", "None")  # a row without: no quotes, no guards
CSV_ABSENT = itertools.repeat("")
CSV_HEAD = "\ufeff%s\r\n" % ",".join(CSV_COLUMNS)  # the mark by which a spreadsheet knows UTF-8


def load_assets() -> Dict[str, bytes]:
    """All assets, read before the load starts: an archive that is replaced during a run can't be read any more."""
    return {name: read_asset(name) for name in ASSETS}


def load_texts(assets: Mapping[str, bytes], language: str) -> Dict[str, str]:
    """The texts of a language, key -> text."""
    return json.loads(assets["texts/%s.json" % language].decode("utf-8"))


def encode_line(value: Mapping[str, Any]) -> bytes:
    """One line of results.jsonl."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"


class ResultsWriter:
    """Appends lines to results.jsonl, each with one write."""

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, RESULTS)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._broken = ""  # why a line was cut off: what is written after it could not be read

    def write(self, value: Mapping[str, Any]) -> None:
        """One line; raises WriteError."""
        line = encode_line(value)
        if self._broken:
            raise WriteError("%s could not be written: %s" % (self.path, self._broken))
        try:
            if os.write(self._descriptor, line) != len(line):  # a full disk writes a part first
                self._broken = os.strerror(errno.ENOSPC)
                raise OSError(errno.ENOSPC, self._broken)
        except OSError as error:
            raise WriteError("%s could not be written: %s" % (self.path, error.strerror or error)) from None

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def default_directory(model: str, now: float) -> str:
    """`llmbench-MODEL-TIME`, with what a file name can't hold replaced."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", model).strip("._") or "model"
    return "llmbench-%s-%s" % (name[:60], time.strftime("%Y%m%d-%H%M%S", time.localtime(now)))


def check_directory(path: str) -> None:
    """Refuses an output directory that holds results or is no directory; raises UserError, makes nothing."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError("%s is not a directory; name another with --out" % path)
    held = [name for name in RUN_FILES if os.path.exists(os.path.join(path, name))]
    if held:
        raise UserError("%s already holds %s; name another directory with --out" % (path, held[0]))
    place = path
    while not os.path.exists(place):
        place = os.path.dirname(os.path.abspath(place))
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError("%s cannot be written to; name another directory with --out" % path)


def make_directory(path: str) -> None:
    """Makes the output directory; raises UserError."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError("--out %s cannot be made: %s" % (path, error.strerror or error)) from None


def is_archive(path: str) -> bool:
    """Whether a file begins with gzip's mark, with which no line of results.jsonl does."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"
    return False


def results_path(place: str) -> str:
    """Where a run's lines are read from: results.jsonl of a directory, or an archive; raises UserError."""
    path = place if os.path.isfile(place) and is_archive(place) else os.path.join(place, RESULTS)
    if not os.path.isfile(path):
        raise UserError("%s holds no %s; name a directory that a run left, or an archive of one" % (place, RESULTS))
    return path


def raw_lines(path: str) -> Iterator[bytes]:
    """The lines of a results.jsonl, or of the one in an archive, as they are; raises UserError."""
    archived = is_archive(path)
    try:
        with open(path, "rb") as file:
            yield from archived_lines(Unpacked(file, os.fstat(file.fileno()).st_size)) if archived else file
    except ArchiveError as error:
        raise UserError("%s %s; get it anew from whoever packed it" % (path, error)) from None
    except (EOFError, zlib.error) as error:
        raise UserError("%s is damaged: %s; get it anew from whoever packed it" % (path, error)) from None
    except OSError as error:
        raise UserError("%s cannot be read: %s" % (path, error.strerror or error)) from None


# What may happen to who takes a line for what it is not.
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


def read_lines(path: str, notice: Callable[[str], None]) -> Iterator[Dict[str, Any]]:
    """The lines of a results.jsonl; a last line that was cut off is left out with a notice; raises UserError.

    `path` may also be an archive, whose results.jsonl is read without unpacking anything.
    """
    number = 0
    read = json.JSONDecoder().decode
    for raw in raw_lines(path):
        number += 1
        try:
            line = read(raw.decode("utf-8"))
            if not isinstance(line, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError):
            if raw.endswith(b"\n"):
                raise UserError("%s line %d is not a record; restore or remove that line" % (path, number)) from None
            notice("%s: the last line was cut off and is left out" % path)
            return
        if number == 1 and line.get("llmbench", FORMAT) != FORMAT:
            found = json.dumps(line["llmbench"])[:20]
            told = (path, found, __version__, FORMAT)
            raise UserError("%s is of format %s and llmbench %s reads format %s; use the one that wrote it" % told)
        yield line
    if not number:
        raise UserError("%s is empty: that run measured nothing" % path)


def read_run(path: str, collector: Collector, notice: Callable[[str], None]) -> Iterator[Dict[str, Any]]:
    """The lines of a whole run, each when the collector has it; raises UserError where they are none of a run's."""
    number = 0
    for number, line in enumerate(read_lines(path, notice), 1):
        try:
            if number == 1 and "run" not in line:
                raise TypeError("no header")
            collector.add(line)
        except UNREADABLE:
            what = "is not a record; restore or remove that line"
            if number == 1:
                what = "is not the header of a run; restore the file as the run left it"
            raise UserError("%s line %d %s" % (path, number, what)) from None
        yield line
    if not number:
        raise UserError("%s holds no whole line: that run measured nothing" % path)


def csv_cell(value: Any) -> Any:
    """A cell that a spreadsheet can't take for a formula."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value


def csv_row(record: Mapping[str, Any]) -> str:
    """A line of results.csv: cells are quoted and guarded where one needs it, which is seldom."""
    row = CSV_FORM % tuple(map(record.get, CSV_COLUMNS, CSV_ABSENT))
    if row.count(",") == CSV_COMMAS and row[0] != "-":
        for odd in CSV_ODD:
            if odd in row:
                break
        else:
            return row + "\r\n"
    import csv

    text = io.StringIO(newline="")
    csv.writer(text).writerow([csv_cell(record.get(name)) for name in CSV_COLUMNS])
    return text.getvalue()


class WholeFile:
    """Writes a file beside its place and moves it there at the end; raises WriteError."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> io.TextIOWrapper:
        try:
            self._file = open(self._path + ".part", "w", encoding="utf-8", errors="replace", newline="")
        except OSError as error:
            raise WriteError("%s could not be written: %s" % (self._path, error.strerror or error)) from None
        return self._file

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        try:
            self._file.close()
            if error is None:
                os.replace(self._path + ".part", self._path)
        except OSError as failure:
            error = error or failure
        if error is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path + ".part")
        if isinstance(error, OSError):
            raise WriteError("%s could not be written: %s" % (self._path, error.strerror or error)) from None


@contextlib.contextmanager
def refusing_excess(path: str) -> Iterator[None]:
    """Refuses a file whose numbers are too large to reckon with: no run has them; raises UserError."""
    try:
        yield
    except OverflowError:
        raise UserError("%s holds a number that no run has; restore the file as the run left it" % path) from None


# A large file is read in parts of equal size, each by a process on a CPU of its own: this one reads the first and then
# takes over what the others found. Whatever is odd in any of them, a damaged line as much as a lost process, makes it
# read the whole file alone: that is the way which knows what to say of it.

PART_BYTES = 64 << 20  # of results.jsonl that are worth a process
PART_LINES = 20_000  # at a time, so that what a process holds is little
MOST_PARTS = 4


def collect_and_tabulate(path: str, table: str, notice: Callable[[str], None]) -> Collector:
    """Reads a results.jsonl into a collector and writes its records to a results.csv; raises UserError, WriteError."""
    bounds = part_bounds(path)
    if len(bounds) > 2:
        with contextlib.suppress(PartError):
            return collect_in_parts(path, table, bounds)
    collector = Collector()
    with WholeFile(table) as file:
        file.write(CSV_HEAD)
        for line in read_run(path, collector, notice):
            if "request_id" in line:
                file.write(csv_row(line))
    return collector


class PartError(Exception):
    """A part of a file could not be read as it should be."""


def part_bounds(path: str) -> List[int]:
    """Where the parts of a results.jsonl begin, and where the last one ends; two where one process reads it."""
    bounds: Set[int] = set()
    with contextlib.suppress(OSError), open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        bounds = {0, size}
        number = min(usable_cpus(), MOST_PARTS, size // PART_BYTES) if start_method() == "fork" else 1
        for part in range(1, number):
            file.seek(size * part // number)
            file.readline()
            bounds.add(file.tell())
    return sorted(bounds)


def collect_in_parts(path: str, table: str, bounds: Sequence[int]) -> Collector:
    """As collect_and_tabulate, in several processes; raises PartError, WriteError."""
    collector, (first, *others) = Collector(), zip(bounds, bounds[1:])
    with contextlib.ExitStack() as stack:
        parts = []
        try:
            for span in others:
                rows, pieces = (stack.enter_context(beside_file(table)) for _ in range(2))
                parts.append((rows, pieces, stack.enter_context(Beside(write_part, path, span, rows, pieces))))
            file = stack.enter_context(WholeFile(table))
            file.write(CSV_HEAD)
            for found in read_part(path, first, file):
                collector.extend(found.pieces())
            for rows, pieces, beside in parts:
                if not beside.succeeded():
                    raise PartError("a process could not read its part")
                take_part(collector, file, rows, pieces)
        except (OSError, *UNREADABLE) as error:
            raise PartError(str(error)) from None
    return collector


def beside_file(path: str) -> IO[bytes]:
    """A file without a name in the directory of another one: it is gone with the processes that hold it open."""
    import tempfile

    return tempfile.TemporaryFile(dir=os.path.dirname(os.path.abspath(path)))


def write_part(path: str, span: Tuple[int, int], rows: IO[bytes], pieces: IO[bytes]) -> None:
    """Reads a part: its rows of results.csv go to one file, what collectors hold of it to another, None at its end."""
    import pickle

    table = io.TextIOWrapper(rows, encoding="utf-8", errors="replace", newline="")  # type: ignore[arg-type]
    parent = os.getppid()
    for found in read_part(path, span, table):
        if os.getppid() != parent:
            raise PartError("nobody waits for it any more")
        for piece in found.pieces():
            pickle.dump(piece, pieces, pickle.HIGHEST_PROTOCOL)
    pickle.dump(None, pieces)
    table.flush()
    pieces.flush()


def take_part(collector: Collector, file: io.TextIOWrapper, rows: IO[bytes], pieces: IO[bytes]) -> None:
    """Takes over what write_part made of the part that comes next."""
    import pickle
    import shutil

    rows.seek(0)
    pieces.seek(0)
    told = iter(functools.partial(pickle.load, pieces), None)
    for first in told:
        collector.extend(itertools.chain((first,), told))
    file.flush()
    shutil.copyfileobj(rows, file.buffer, 1 << 20)


def read_part(path: str, span: Tuple[int, int], table: TextIO) -> Iterator[Collector]:
    """The lines from one byte to another in collectors of some thousand each, their rows in a table.

    Raises PartError or one of UNREADABLE where a line is not as it should be.
    """
    lines = part_lines(path, span)
    for first in lines:
        collector = Collector()
        for line in itertools.chain((first,), itertools.islice(lines, PART_LINES - 1)):
            collector.add(line)
            if "request_id" in line:
                table.write(csv_row(line))
        yield collector


def part_lines(path: str, span: Tuple[int, int]) -> Iterator[Dict[str, Any]]:
    """The lines from one byte to another; raises PartError or one of UNREADABLE where one is not as it should be."""
    read, (place, end) = json.JSONDecoder().raw_decode, span
    with open(path, "rb") as file:
        file.seek(place)
        while place < end:
            raw = file.readline()
            text = raw.decode("utf-8")
            line, length = read(text)
            if text[length:] != "\n" or line.get("llmbench", FORMAT) != FORMAT:
                raise PartError("a line that is cut off, or of another format")
            if not place and "run" not in line:
                raise PartError("the first line is no header")
            place += len(raw)
            yield line


def build_outputs(
    directory: str, assets: Mapping[str, bytes], notice: Callable[[str], None], forms: Sequence[str] = (),
    language: str = "en",
) -> Dict[str, Any]:  # fmt: skip
    """Makes results.csv, summary.json and report.html from results.jsonl alone, and these FORMS in a language.

    Returns the summary.
    """
    path = os.path.join(directory, RESULTS)
    collector = collect_and_tabulate(path, os.path.join(directory, RESULTS_CSV), notice)
    with refusing_excess(path):
        summary = summarize(collector)
        with WholeFile(os.path.join(directory, SUMMARY)) as file:
            json.dump(summary, file, ensure_ascii=False, indent=2)
            file.write("\n")
        header = {**collector.header, "results_sha256": file_digest(path)}
        stages = collector.rows()
        for form in forms:
            name, make = FORMS[form]
            with WholeFile(os.path.join(directory, name)) as file:
                file.write(make(read_page(assets), language, summary, header, stages, collector.end))
        with WholeFile(os.path.join(directory, REPORT)) as file:
            file.write(render_report(summary, header, stages, collector.end, assets))
    return summary


# Archives. `pack_run` writes the lines it packs to a file without a name first: their checksum stands before them.


def pack_run(place: str, out: str, redacted: bool, notice: Callable[[str], None]) -> Dict[str, int]:
    """Makes an archive of a run in a new file; raises UserError, WriteError. Gives how much was replaced, by kind."""
    path = results_path(place)
    next(read_run(path, Collector(), notice))  # what has no header of a run is not packed
    redactor = Redactor(digest_of_lines(path)) if redacted else None
    import tempfile

    with WholeFile(out) as file, tempfile.TemporaryFile(dir=os.path.dirname(os.path.abspath(out))) as lines:
        digest, first, last = hashlib.sha256(), b"", b""
        for last in packed_lines(path, redactor, notice):
            first = first or last
            lines.write(last)
            digest.update(last)
        size = lines.tell()
        lines.seek(0)
        run, end = json.loads(first.decode("utf-8"))["run"], None
        with contextlib.suppress(ValueError, LookupError):  # a run that was cut off has no end line
            end = json.loads(last.decode("utf-8"))["end"]
        top = "llmbench-" + (re.sub(r"[^A-Za-z0-9]", "", str(run.get("run_id", "")))[:40] or "run")
        texts = archive_texts(run, end, top, redacted, digest.hexdigest())
        started = read_iso_time(str(run.get("started_at", "")))
        moment = started.replace(tzinfo=datetime.timezone.utc).timestamp() if started else 0.0
        for block in archive_bytes(top, moment, texts, size, iter(lambda: lines.read(1 << 20), b"")):
            file.buffer.write(block)
    return redactor.counts() if redactor is not None else {}


def packed_lines(path: str, redactor: Optional[Redactor], notice: Callable[[str], None]) -> Iterator[bytes]:
    """The lines as an archive holds them: as they are, or each redacted, without one that was cut off."""
    if redactor is None:
        yield from raw_lines(path)
        return
    for line in read_lines(path, notice):
        yield encode_line(redactor.line(line))


def digest_of_lines(path: str) -> bytes:
    """What only somebody knows who has the lines: their SHA-256."""
    digest = hashlib.sha256()
    for raw in raw_lines(path):
        digest.update(raw)
    return digest.digest()


@contextlib.contextmanager
def opened_run(path: str, directory: str) -> Iterator[None]:
    """results.jsonl of an archive in a new directory; raises UserError, WriteError.

    One that is refused, here or by who builds the other files of it, leaves nothing.
    """
    check_directory(directory)
    made = not os.path.isdir(directory)
    make_directory(directory)
    try:
        with WholeFile(os.path.join(directory, RESULTS)) as file:
            for raw in raw_lines(path):
                file.buffer.write(raw)
        yield
    except BaseException:
        for name in RUN_FILES:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(directory, name))
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        raise


# Comparisons. compare.html is a function of the runs' records as report.html is: made again, it replaces an older one.
# Any other file that stands in its place is not touched.

MOST_COMPARED = 12
LETTERS = "ABCDEFGHIJKL"


def collect_run(place: str, notice: Callable[[str], None]) -> Collector:
    """Everything that the results.jsonl of a directory or an archive says of its run; raises UserError."""
    collector = Collector()
    for _ in read_run(results_path(place), collector, notice):
        pass
    return collector


def check_comparison_file(path: str) -> None:
    """Refuses a place for compare.html that can't be written, or that holds anything but an older comparison."""
    place = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.access(place, os.W_OK | os.X_OK):
        raise UserError("%s cannot be written to; name another file with --out" % path)
    if not os.path.exists(path):
        return
    try:
        with open(path, "rb") as file:
            known = b'<body class="%s">' % COMPARISON_PAGE.encode("ascii") in file.read(1 << 18)
    except OSError as error:
        raise UserError("--out %s cannot be read: %s" % (path, error.strerror or error)) from None
    if not known:
        raise UserError("--out %s is there and is no comparison; name another file" % path)


def read_runs(
    directories: Sequence[str], conditions: Sequence[Condition], notice: Callable[[str], None]
) -> List[ComparedRun]:
    """The runs of these directories, as they are compared; raises UserError."""
    if len(directories) < 2:
        raise UserError("compare needs two directories at least; name the run to compare with first")
    if len(directories) > MOST_COMPARED:
        raise UserError("compare takes %d directories at most; the first is compared with each other" % MOST_COMPARED)
    places = list(map(os.path.realpath, directories))
    twice = [directory for directory, place in zip(directories, places) if places.count(place) > 1]
    if twice:
        raise UserError("%s is given twice; name each run's directory once" % twice[-1])
    runs = []
    for letter, directory in zip(LETTERS, directories):
        collector = collect_run(directory, notice)
        with refusing_excess(directory):
            runs.append(compared_run(letter, directory, collector, conditions))
    return runs


def write_comparison(
    path: str, first: ComparedRun, against: Sequence[Against], language: str, assets: Mapping[str, bytes]
) -> None:
    """compare.html; raises WriteError."""
    with WholeFile(path) as file:
        file.write(render_comparison(first, against, language, assets))


# The shards of a run. Host k of n leaves a directory of its own. Its requests are those whose number i has i mod n = k,
# or it is the conversations that are so numbered and shared out: a record's id says whether it belongs there, and one
# bit for each number whether it came before. All files are read once to find out whether they can be merged; only then
# is anything written, in a second reading. Records are copied as they are, in the order in which they ended; nothing is
# averaged and no time is shifted. Times count from the run's zero, the --start-at that all hosts share, each on its own
# clock: how far these are apart is said, not corrected.

SHARD = re.compile(r"^([0-9]{1,5})/([0-9]{1,5})$")
AUTH_SETTINGS = ("auth_key", "auth_secret", "auth_opt", "token_source", "fetched")
# What hosts need not share of the configuration.
PER_HOST = frozenset(("shard", "out", "token", "processes", "lang", "progress", *FORMS, *AUTH_SETTINGS))
ONE_RUN = ("tool_version", "provider", "model", "url")  # what else they share
PAGE = 65536  # numbers in 8 KiB


class Numbers:
    """Which request numbers were there, one bit for each."""

    def __init__(self) -> None:
        self._pages: Dict[Tuple[int, int], bytearray] = {}

    def add(self, stage: int, number: int) -> bool:
        """Notes a number; whether it is there for the first time."""
        place, bit = divmod(number % PAGE, 8)
        page = self._pages.get((stage, number // PAGE))
        if page is None:
            page = self._pages[stage, number // PAGE] = bytearray(PAGE // 8)
        new = not page[place] >> bit & 1
        page[place] |= 1 << bit
        return new


@dataclass
class Shard:
    """What is known of one shard when its results.jsonl has been read."""

    directory: str
    number: int
    of: int
    run: Dict[str, Any]
    lines: int = 1
    records: int = 0
    end: Optional[Dict[str, Any]] = None
    stages: Dict[int, Dict[str, Any]] = field(default_factory=dict)
    first_due_ms: Dict[int, float] = field(default_factory=dict)
    parts: Set[int] = field(default_factory=set)
    offsets: List[Tuple[float, float]] = field(default_factory=list)
    seen: Numbers = field(default_factory=Numbers)
    astray: int = 0  # the line of the first request whose number is another shard's
    turns: bool = False  # whether it plays conversations: all turns of one are its shard's, whatever their numbers

    @property
    def name(self) -> str:
        """k/n."""
        return "%d/%d" % (self.number, self.of)

    @property
    def host(self) -> str:
        """The host with the shard: on one machine or in containers hosts may be named alike."""
        return "%s (%s)" % (self.run.get("host", "?"), self.name)

    def offset_ms(self) -> Optional[Tuple[float, float]]:
        """Bounds of (endpoint's clock - this host's clock): the tightest that all its processes found.

        Where they contradict each other (a clock was set, or several servers answer) the loosest: no more can be said.
        """
        if not self.offsets:
            return None
        lows, highs = zip(*self.offsets)
        return (max(lows), min(highs)) if max(lows) <= min(highs) else (min(lows), max(highs))

    def facts(self) -> Dict[str, Any]:
        """What the merged header says of this shard."""
        processes = self.run.get("config", {}).get("processes")
        made = {
            "shard": self.name, "host": self.run.get("host"), "address": self.run.get("address"),
            "started_at": self.run.get("started_at"), "records": self.records,
            "processes": len(self.parts) or (processes if isinstance(processes, int) else None),
            "first_due_ms": {str(stage): due for stage, due in sorted(self.first_due_ms.items())},
            "date_offset_ms": self.offset_ms(), "end": self.end,
        }  # fmt: skip
        return {key: value for key, value in made.items() if value is not None}

    def take(self, line: Mapping[str, Any]) -> str:
        """One line of the file after its header; gives what is wrong with it."""
        self.lines += 1
        if "run" in line:
            return "is a second header"
        if "request_id" in line:
            self.records += 1
            return self._take_record(line)
        if "audit" in line:
            audit = line["audit"]
            if not isinstance(audit["stage"], int):
                return "is not a record"
            self.parts.add(audit.get("part", 0))
            if "date_offset_ms" in audit:
                low, high = audit["date_offset_ms"]
                self.offsets.append((float(low), float(high)))
        elif "stage" in line:
            self.stages[int(line["stage"]["index"])] = line["stage"]
        elif "end" in line:
            self.end = dict(line["end"])
        return ""

    def _take_record(self, record: Mapping[str, Any]) -> str:
        run_id, stage, number = record["request_id"].rsplit("-", 2)
        if record["phase"] == "probe":  # RUN-STAGE-probe-PART-VERSION: in no figure
            foreign = run_id != "%s-%d-probe" % (self.run["run_id"], record["stage"])
        else:
            foreign = int(stage) != record["stage"] or run_id != self.run["run_id"]
            self.turns = self.turns or "turn" in record
            if int(number) % self.of != self.number:
                self.astray = self.astray or self.lines
        if foreign or record.get("shard", self.name) != self.name:
            return self.not_of_it()
        if record["phase"] == "probe":
            return ""
        due = record.get("scheduled_ms")
        if record["phase"] == "measure" and due is not None:
            self.first_due_ms[record["stage"]] = min(due, self.first_due_ms.get(record["stage"], due))
        return "" if self.seen.add(record["stage"], int(number)) else "is a request that was there before"

    def not_of_it(self) -> str:
        """What is wrong with a request of somebody else's."""
        return "is a request that is not of shard %s" % self.name


def open_shard(directory: str) -> Shard:
    """The shard that a directory's or an archive's results.jsonl speaks of in its first line; raises UserError."""
    path = results_path(directory)
    run = next(read_lines(path, lambda _: None), {}).get("run")
    if not isinstance(run, dict) or not isinstance(run.get("config"), dict) or not run.get("run_id"):
        raise UserError("%s does not begin with a header; restore the file as the run left it" % directory)
    if "merged" in run:
        raise UserError("%s is a merged run already; name the directories that it was merged from" % directory)
    name = run["config"].get("shard")
    if name is None:
        raise UserError("%s is no shard but a whole run; leave it out, `llmbench report` shows it" % directory)
    match = SHARD.match(str(name))
    if match is None or int(match.group(1)) >= int(match.group(2)):
        raise UserError("%s names no shard k/n with k below n; restore the file as the run left it" % directory)
    return Shard(directory, int(match.group(1)), int(match.group(2)), run)


def survey_shard(shard: Shard, notice: Callable[[str], None]) -> None:
    """Reads a shard's results.jsonl to its end; raises UserError where it is not what one shard of one run leaves."""
    path = results_path(shard.directory)
    for line in itertools.islice(read_lines(path, notice), 1, None):
        try:
            wrong = shard.take(line)
        except UNREADABLE:
            wrong = "is not a record"
        if wrong:
            raise UserError("%s line %d %s; restore the file as the run left it" % (path, shard.lines, wrong))
    if shard.astray and not shard.turns:
        told = (path, shard.astray, shard.not_of_it())
        raise UserError("%s line %d %s; restore the file as the run left it" % told)
    shard.seen = Numbers()  # its work is done


def check_shards(shards: Sequence[Shard]) -> None:
    """Whether these are different shards of one run, by their headers; raises UserError."""
    first = shards[0]
    known: Dict[int, Shard] = {}
    for shard in shards:
        two = "%s and %s " % (first.directory, shard.directory)
        if shard.run["run_id"] != first.run["run_id"]:
            raise UserError(two + "are of different runs; give every host the same flags and the same --start-at")
        if shard.of != first.of:
            raise UserError(two + "are shards %s and %s; name those of one number only" % (first.name, shard.name))
        differing = differences(first.run, shard.run)
        if differing:
            raise UserError(two + "differ in %s; give every host the same flags" % ", ".join(differing))
        twin = known.setdefault(shard.number, shard)
        if twin is not shard:
            two = "%s and %s " % (twin.directory, shard.directory)
            raise UserError(two + "are both shard %s; leave one out" % shard.name)


def check_loads(shards: Sequence[Shard]) -> None:
    """Whether all shards ran the same loads in the same order, by their stage lines; raises UserError."""
    known: Dict[int, Shard] = {}
    for shard in shards:
        for index, stage in shard.stages.items():
            other = known.setdefault(index, shard)
            if other.stages[index] != stage:
                two = "%s and %s" % (other.directory, shard.directory)
                raise UserError("%s ran different loads as stage %d; they are no one run, compare them" % (two, index))


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> List[str]:
    """The settings that two hosts of one run should share and don't, by name."""
    found = [key for key in ONE_RUN if one.get(key) != other.get(key)]
    mine, theirs = one["config"], other["config"]
    shared = [key for key in sorted({*mine, *theirs} - PER_HOST) if mine.get(key) != theirs.get(key)]
    return found + [key for key in shared if key not in found]


def clocks_of(shards: Sequence[Shard]) -> Optional[Dict[str, Any]]:
    """By how much the hosts' clocks disagree at least: `{disagree_ms, hosts}`, the two furthest apart; None: unknown.

    Each host knows bounds of its distance to the endpoint's clock. Two whose bounds overlap may be of one mind.
    """
    bounds = [(shard.offset_ms(), shard.host) for shard in shards]
    known = [(offset, host) for offset, host in bounds if offset is not None]
    if len(known) < 2:
        return None
    (low, _), behind = max(known, key=lambda pair: pair[0][0])
    (_, high), ahead = min(known, key=lambda pair: pair[0][1])
    return {"disagree_ms": round(max(0.0, low - high), 4), "hosts": [behind, ahead] if low > high else []}


def merged_run(shards: Sequence[Shard]) -> Dict[str, Any]:
    """The merged header's `run`: the first shard's, with what is known of each.

    A selftest is of one host and at its own load: it says nothing of all hosts together.
    """
    run = {key: value for key, value in shards[0].run.items() if key != "selftest"}
    run["config"] = {key: value for key, value in run["config"].items() if key != "shard"}
    present = {shard.number for shard in shards}
    missing = ["%d/%d" % (number, shards[0].of) for number in range(shards[0].of) if number not in present]
    run["merged"] = {"shards": [shard.facts() for shard in shards], "missing": missing}
    clock_facts = clocks_of(shards)
    if clock_facts is not None:
        run["merged"]["clock"] = clock_facts
    return run


def merged_end(shards: Sequence[Shard]) -> Dict[str, Any]:
    """The merged end line: done when every shard was, else the first other end with its shard; the latest time."""
    ends = [(shard.name, shard.end or {"reason": CUT_OFF}) for shard in shards]
    end: Dict[str, Any] = {"reason": "done"}
    for name, told in ends:
        if told.get("reason", "done") != "done":
            end = {"reason": told["reason"], "shard": name}
            break
    notes = list(dict.fromkeys(note for _, told in ends for note in told.get("dialect", ())))
    lost = sum(told.get("lost_workers", 0) for _, told in ends)
    ended = max((told["ended_at"] for _, told in ends if "ended_at" in told), default=None)
    made = {**end, "dialect": notes or None, "lost_workers": lost or None, "ended_at": ended}
    return {key: value for key, value in made.items() if value is not None}


def line_order(line: Mapping[str, Any]) -> Tuple[int, int, str]:
    """Where a line belongs among other shards' lines: by stage; in it the stage line, records as they ended, audits."""
    if "request_id" in line:
        return line["stage"], 1, str(line.get("end_ts") or line.get("start_ts") or "")
    if "audit" in line:
        return line["audit"]["stage"], 2, ""
    return (line["stage"]["index"] if "stage" in line else 0), 0, ""


def shard_lines(shard: Shard) -> Iterator[Dict[str, Any]]:
    """A surveyed shard's lines as the merged file holds them, without header and end; never more than were surveyed."""
    lines = read_lines(results_path(shard.directory), lambda _: None)
    for line in itertools.islice(lines, shard.lines):
        if "audit" in line:
            yield {"audit": {**line["audit"], "shard": shard.name}}
        elif "run" not in line and "end" not in line:
            yield line


def merged_lines(shards: Sequence[Shard]) -> Iterator[Dict[str, Any]]:
    """All shards' lines, one by one; a stage line once."""
    import heapq

    begun: Set[int] = set()
    for line in heapq.merge(*map(shard_lines, shards), key=line_order):
        if "stage" in line and "request_id" not in line:
            if line["stage"]["index"] in begun:
                continue
            begun.add(line["stage"]["index"])
        yield line


def tell_shards(merged: Mapping[str, Any], notice: Callable[[str], None]) -> None:
    """Says what is not whole: shards that are missing or were cut off, clocks that disagree."""
    if merged["missing"]:
        missing = few_of(merged["missing"])
        notice("missing: shard %s; what was measured there is in no figure: merge again with it" % missing)
    for shard in merged["shards"]:
        if "end" not in shard:
            notice("shard %s was cut off: its file has no end line" % shard["shard"])
    told = merged.get("clock", {})
    if told.get("hosts"):
        notice("the clocks of %s and %s disagree by at least %.1f ms" % (*told["hosts"], told["disagree_ms"]))


def merge_shards(directories: Sequence[str], out: str, notice: Callable[[str], None]) -> None:
    """Joins the shards of one run into a results.jsonl in a new directory; raises UserError, WriteError."""
    check_directory(out)
    places: Set[str] = set()
    for directory in directories:
        place = os.path.realpath(directory)
        if place in places:
            raise UserError("%s is given twice; name each shard's directory once" % directory)
        places.add(place)
    shards = sorted(map(open_shard, directories), key=lambda shard: shard.number)
    check_shards(shards)
    for shard in shards:
        survey_shard(shard, notice)
    check_loads(shards)
    run = merged_run(shards)
    tell_shards(run["merged"], notice)
    make_directory(out)
    with WholeFile(os.path.join(out, RESULTS)) as file:
        file.buffer.write(encode_line({"llmbench": FORMAT, "run": run}))
        for line in merged_lines(shards):
            file.buffer.write(encode_line(line))
        file.buffer.write(encode_line({"end": merged_end(shards)}))


def file_digest(path: str) -> str:
    """SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def host_facts(endpoint: Endpoint, config: Config) -> Dict[str, str]:
    """What the header says of this machine: name, address towards the endpoint, OS, architecture, Python."""
    import platform

    offset = time.strftime("%z")
    return {
        "host": socket.gethostname(),
        "address": local_address(endpoint, config),
        "os": platform.system(),
        "arch": platform.machine().replace("x86_64", "x86-64"),
        "python": platform.python_implementation() + " " + platform.python_version(),
        "utc_offset": offset[:3] + ":" + offset[3:],
    }


def local_address(endpoint: Endpoint, config: Config) -> str:
    """The address from which this host reaches the endpoint, or its proxy; nothing is sent to find it out."""
    if endpoint.unix is not None:
        return ""
    host, port = peer_of(endpoint, choose_route(endpoint, config, os.environ))
    fixed = fixed_addresses(config.resolve, host, port)
    target = fixed[0][4] if fixed else (host, port)
    try:
        with socket.socket(socket.AF_INET6 if ":" in target[0] else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(target)
            return sock.getsockname()[0]
    except OSError:
        return ""


NOT_SHOWN = frozenset((  # of the configuration
    "token", "out", *FORMS, "run_id", "dry_run", "given", "token_source", "fetched",
))  # fmt: skip


def digest_of(prompts: Sequence[Prompt]) -> str:
    """What tells workloads of one name apart: a hash of all their prompts."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(vars(prompt), sort_keys=True).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def make_header(
    config: Config, endpoint: Endpoint, prompts: Sequence[Prompt], command: str, started: float
) -> Dict[str, Any]:
    """The first line's `run` object: what was asked for, redacted, and from where."""
    secrets = secrets_of(config, endpoint)
    shown = {
        key: value for key, value in vars(config).items() if value is not None and key not in NOT_SHOWN
    }
    shown["url"] = redact(endpoint.url, secrets)
    shown["proxy"] = redact(config.proxy, secrets)
    shown["header"] = [redact(mask_header(line), secrets) for line in config.header]
    shown["body"] = mask_body(config.body, secrets)
    for name in ("token", "auth_key", "auth_secret"):
        shown[name] = "***" if getattr(config, name) else ""
    shown["auth_opt"] = {
        name: "***" if is_secret_option(name) else redact(value, secrets) for name, value in config.auth_opt.items()
    }
    source = config.workload_file or "built-in"
    shown["prompts"] = {"source": source, "count": len(prompts), "digest": digest_of(prompts)}
    if not config.rps:
        del shown["rps"], shown["arrival"]
    header = {
        "tool_version": __version__, "run_id": config.run_id, "provider": config.provider, "model": config.model,
        "url": shown["url"], "started_at": iso_time(started), "command": redact(command, secrets),
    }  # fmt: skip
    return {**header, **host_facts(endpoint, config), "config": shown}


def mask_header(line: str) -> str:
    """A `K: V` line with the value of a secret header shown as ***."""
    name, _, value = line.partition(":")
    return name + ": ***" if is_secret_name(name) else name + ":" + value


def mask_body(tree: Any, secrets: Sequence[str]) -> Any:
    """A JSON tree with the values of secret keys shown as ***, and every other text redacted."""
    if isinstance(tree, dict):
        return {
            key: "***" if is_secret_name(key) and isinstance(value, str) else mask_body(value, secrets)
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [mask_body(value, secrets) for value in tree]
    return redact(tree, secrets) if isinstance(tree, str) else tree

# ==================================================================================================
# 19. Terminal: progress and tables
# ==================================================================================================
#
# Progress goes to stderr: one live line on a terminal, a plain line every few seconds elsewhere. It is
# drawn by a thread of its own, so that a terminal that takes no output (Ctrl-S, a slow ssh) stops the
# drawing and not the measurement. The summary is a table on stdout in which every figure carries its
# unit and n. Colour is used on terminals only, and not where NO_COLOR is set. Words come from the
# message files, so that a table reads the same in the terminal and in the report.

PLAIN_LINE_SECONDS = 5.0
LIVE_LINE_SECONDS = 0.25


def text_width(text: str) -> int:
    """Columns that a text takes on a terminal: CJK characters take two."""
    if text.isascii():
        return len(text)
    import unicodedata

    return len(text) + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)


def terminal_columns() -> int:
    """The width of the terminal that stderr is, 80 where it can't be told."""
    try:
        return int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def padded(text: str, width: int, right: bool) -> str:
    """The text filled with blanks to a width."""
    blank = " " * max(0, width - text_width(text))
    return blank + text if right else text + blank


class Paint:
    """Colours for a terminal; gives texts back unchanged where there is none or NO_COLOR is set."""

    CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}

    def __init__(self, stream: Any) -> None:
        self._on = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def __call__(self, style: str, text: str) -> str:
        return "\x1b[%sm%s\x1b[0m" % (self.CODES[style], text) if self._on else text


def seconds_left(progress: Progress, now: float) -> Optional[float]:
    """How long the phase will still take at the rate so far, or until its duration is over."""
    spent = now - progress.began
    left = []
    if progress.total is not None and progress.done:
        left.append(spent / progress.done * (progress.total - progress.done))
    if progress.duration is not None:
        left.append(progress.duration - spent)
    return max(0.0, min(left)) if left else None


def progress_line(progress: Progress, texts: Mapping[str, str], now: float) -> str:
    """What a live or plain line says of a running phase."""
    spent = max(1e-9, now - progress.began)
    total = "/%d" % progress.total if progress.total is not None else ""
    parts = [
        "%d%s %s" % (progress.done, total, texts["terminal.done"]),
        "%d %s" % (progress.in_flight, texts["terminal.in_flight"]),
    ]
    parts.append("%d %s" % (progress.failed, texts["terminal.failed"]))
    ttft = sorted(progress.ttft.copy().items())
    count = sum(n for _, n in ttft)
    if count:
        figures = "/".join(figure(histogram_quantile(ttft, count, share)) for share in (0.5, 0.95))
        parts.append("TTFT P50/P95 %s ms" % figures)
    if progress.tokens:
        parts.append("%s tok/s" % figure(progress.tokens / spent))
    elif progress.chars:
        parts.append("%s %s" % (figure(progress.chars / spent), texts["terminal.chars_per_s"]))
    left = seconds_left(progress, now)
    if left is not None:
        parts.append(texts["terminal.left"].format(time=clock_text(1000.0 * left)))
    if progress.waiting:
        parts.insert(2, "%d %s" % (progress.waiting, texts["terminal.waiting"]))
    load = {"concurrency": progress.concurrency} if progress.rps is None else {"rps": progress.rps}
    stage = texts["terminal.stage"].format(
        number=progress.stage + 1, stages=progress.stages or "?", load=load_words(texts, load)
    )
    head = [stage] if progress.stages != 1 else []
    head += [texts["terminal.warmup"]] if progress.phase == "warmup" else []
    return "  ".join(head + parts)


class ProgressPrinter:
    """Draws a run's progress on a stream until it is stopped."""

    def __init__(self, mode: str, stream: Any, progress: Progress, texts: Mapping[str, str]) -> None:
        live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._mode = ("bar" if live else "lines") if mode == "auto" else mode
        self._stream, self._progress, self._texts = stream, progress, texts
        self._over = threading.Event()
        self._noted = 0
        self._last = 0.0
        self._thread = threading.Thread(target=self._draw, daemon=True)

    def __enter__(self) -> "ProgressPrinter":
        if self._mode != "none":
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        if self._mode != "none":
            self._thread.join(1.0)  # a stuck terminal does not hold the results back
            if not self._thread.is_alive():
                self._write_notes()
                self._write("\r\x1b[K" if self._mode == "bar" else "")

    def _draw(self) -> None:
        while not self._over.wait(LIVE_LINE_SECONDS):
            progress, now = self._progress, clock()
            self._write_notes()
            if not progress.began:
                continue
            if self._mode == "bar":
                width = max(20, terminal_columns() - 1)
                line = progress_line(progress, self._texts, now)
                while text_width(line) > width:
                    line = line[:-1]
                self._write("\r\x1b[K" + line)
            elif now - max(self._last, progress.began) >= PLAIN_LINE_SECONDS:
                self._last = now
                self._write(progress_line(progress, self._texts, now) + "\n")

    def _write_notes(self) -> None:
        for note in self._progress.notes[self._noted :]:
            self._noted += 1
            self._write(("\r\x1b[K" if self._mode == "bar" else "") + "llmbench: %s\n" % printable(note))

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._over.set()


def align(rows: Sequence[Sequence[str]]) -> List[str]:
    """Rows as lines with aligned columns: the first to the left, the others to the right."""
    widths = [
        max(text_width(row[column]) for row in rows if column < len(row)) for column in range(max(map(len, rows)))
    ]
    return [
        "  ".join(padded(cell, widths[column], column > 0) for column, cell in enumerate(row)).rstrip() for row in rows
    ]


PROGRAM = "python3 llmbench.pyz"  # as it is started where it lies

TABLED_METRICS = (
    "ttft_ms", "ttft_from_scheduled_ms", "ttfe_ms", "latency_ms", "latency_from_scheduled_ms", "tpot_ms", "itl_ms",
    "request_tps", "queue_ms", "connect_ms",
)  # fmt: skip


def metric_rows(block: Mapping[str, Any], texts: Mapping[str, str]) -> List[List[str]]:
    """The table of a stage's distributions: label with unit, P50 to P99, mean, max, n; † marks a limited one."""
    rows = [["", "P50", "P90", "P95", "P99", texts["terminal.mean"], texts["terminal.max"], "n"]]
    for name in TABLED_METRICS:
        figures = block.get(name)
        if not figures or (name == "ttfe_ms" and figures == block.get("ttft_ms")):
            continue
        if name.endswith("_from_scheduled_ms") and not is_open(block["load"]):
            continue
        marked = [figure(figures[key]) + ("†" if key in figures["limited"] else "") for key, _ in PERCENTILES]
        key = "metric." + queue_metric(name, block["load"])
        label = "%s, %s" % (texts.get(key, METRICS[name].label), METRICS[name].unit)
        rows.append(
            [label] + marked + [figure(figures["mean"]), figure(figures["max"]), "{:,}".format(figures["n"])]
        )
    return rows


def headline_rows(block: Mapping[str, Any], texts: Mapping[str, str]) -> List[List[str]]:
    """Requests, success rate and throughput of a stage."""
    requests, throughput = block["requests"], block.get("throughput", {})
    counts = "{success:,}/{total:,}".format(**requests)
    extra = [
        "%d %s" % (requests[key], texts["terminal." + key])
        for key in ("failure", "cancelled", "dropped")
        if requests[key]
    ]
    rate = "%.2f %%" % (math.floor(requests["success_rate"] * 10000) / 100) if "success_rate" in requests else "–"
    rows = [[texts["terminal.succeeded"], counts, rate, ", ".join(extra)]]
    for key in ("rps", "goodput_rps", "output_tokens_per_s", "steady_output_tokens_per_s"):
        if key in throughput:
            row = [texts.get("metric." + key, METRICS[key].label), figure(throughput[key]), METRICS[key].unit]
            share = percent_number(throughput["goodput_share"]) + " %" if key == "goodput_rps" else ""
            rows.append([*row, share])
    client = block.get("client", {})
    if "achieved_rps" in client:
        row = [texts["client.achieved"], figure(client["achieved_rps"]), METRICS["rps"].unit]
        rows.append([*row, "%s %s" % (texts["client.requested"], figure(client["requested_rps"]))])
    if "output_tokens_per_s" not in throughput and "output_chars_per_s" in throughput:
        rows.append(
            [texts["terminal.chars"], figure(throughput["output_chars_per_s"]), texts["terminal.chars_per_s"]]
        )
    rows += length_rows(block.get("lengths", {}), texts)
    seconds = block["wall_time_ms"] / 1000.0
    clock_time = "(%s)" % clock_text(1000.0 * seconds) if seconds >= 600 else ""
    rows.append([texts["terminal.wall_time"], figure(seconds), "s", clock_time])
    return rows


def length_rows(lengths: Mapping[str, Any], texts: Mapping[str, str]) -> List[List[str]]:
    """Mean lengths of prompts and answers beside what was asked for."""
    rows = []
    for side, name in (("in", texts["terminal.length.in"]), ("out", texts["terminal.length.out"])):
        if side + "_target" in lengths:
            values = {"target": count(lengths[side + "_target"]), "off": "%+.1f" % length_off(lengths, side)}
            target = texts["terminal.length.target"].format(**values)
            row = [name, count(lengths[side + "_actual"]), "tok", target]
            short = lengths.get("out_short") if side == "out" else 0
            rows.append([*row, texts["terminal.length.short"].format(n=count(short)) if short else ""])
    return rows


def gate_cells(
    block: Mapping[str, Any], entry: Mapping[str, Any], texts: Mapping[str, str], judged: bool
) -> List[str]:
    """One gate of the table: result, name, measured, required, n; † marks a percentile of limited meaning."""
    limited = entry["stat"] in ((block.get(gate_metric(entry)) or {}).get("limited") or ())
    value, limit = gate_pair(entry)
    name = gate_name(texts, entry)
    result = texts["terminal.gate.passed" if entry["passed"] else "terminal.gate.failed"] if judged else "–"
    return [result, name, value + ("†" if limited else ""), "%s %s" % (entry["op"], limit), "{:,}".format(entry["n"])]


def gate_lines(
    block: Mapping[str, Any], texts: Mapping[str, str], paint: Callable[[str, str], str], judged: bool
) -> List[str]:
    """The gates of a stage as a table; nothing where none is set."""
    entries = block.get("slo", ())
    if not entries:
        return []
    head = ["", "", texts["terminal.gate.measured"], texts["terminal.gate.required"], "n"]
    rows = [head] + [gate_cells(block, entry, texts, judged) for entry in entries]
    widths = [max(text_width(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(padded(cell, width, column > 1) for column, (cell, width) in enumerate(zip(row, widths)))
             for row in rows]  # fmt: skip
    colours = ["dim"] + ["green" if entry["passed"] else "red" for entry in entries]
    title = texts["terminal.gates" if judged else "terminal.gates.not_judged"]
    shown = [paint(colour, line) if judged or colour == "dim" else line for colour, line in zip(colours, lines)]
    return ["", "  " + title, *("  " + line.rstrip() for line in shown)]


VERDICT_COLOURS = {"VALID": "green", "CAUTION": "yellow", "INVALID": "red"}


def verdict_lines(
    verdict: Mapping[str, Any], texts: Mapping[str, str], paint: Callable[[str, str], str]
) -> List[str]:
    """The verdict with its reasons, each on lines of its own."""
    state = verdict["state"]
    word, sentence = texts["verdict." + state.lower()], texts[verdict_key(verdict)]
    lines = [paint(VERDICT_COLOURS[state], word) + "  " + sentence]
    for reason in verdict["reasons"]:
        lines += wrapped("- " + printable(reason_said(texts, reason)), 98, "  ")
    return lines


def wrapped(text: str, width: int, indent: str) -> List[str]:
    """A text as lines of at most `width` columns, the later ones indented by two more; CJK text breaks anywhere."""
    lines, line = [], indent
    for word in re.findall(r"[\u2e80-\uffef]|[^ \t\n\u2e80-\uffef]+[ \t\n]*|[ \t\n]+", text):  # not at a hard space
        if text_width(line + word.rstrip()) > width:
            lines.append(line.rstrip())
            line = indent + "  "
        line += word
    return [*lines, line.rstrip()]


def stage_title(
    load: Mapping[str, float], name: Mapping[str, float], config: Mapping[str, Any], texts: Mapping[str, str]
) -> str:
    """A stage's load: 8 streams; Open loop, 4 req/s Poisson, at most 16 in flight; a repeat says so."""
    if is_open(load):
        arrival = arrival_words(texts, config, load)
        title = texts["load.open"].format(rate=level_number({**load, **name}, "rps"), arrival=arrival)
    else:
        streams = load.get("concurrency", 1)
        title = texts["terminal.load_one" if streams == 1 else "terminal.load"].format(streams=streams)
    for key, word in (("cap", "load.cap"), ("input_tokens", "load.input"), ("again", "load.again")):
        if key in load or key in name:
            title = texts[word].format(load=title, n=level_number({**load, **name}, key))
    return title


def stage_lines(stage: Mapping[str, Any], texts: Mapping[str, str], paint: Callable[[str, str], str]) -> List[str]:
    """Requests, rates and distributions of one stage."""
    lines = []
    for row in headline_rows(stage, texts):
        cells = "  ".join(cell for cell in row[2:] if cell)
        lines.append("  " + padded(row[0], 22, False) + " " + padded(row[1], 12, True) + "  " + cells)
    rows = metric_rows(stage, texts)
    if len(rows) > 1:
        table = align(rows)
        lines += [""] + ["  " + paint("dim", table[0])] + ["  " + line for line in table[1:]]
    return lines


def summary_lines(summary: Mapping[str, Any], texts: Mapping[str, str], paint: Callable[[str, str], str]) -> List[str]:
    """The summary as lines for a terminal."""
    lines = [paint("bold", printable("%s  %s" % (summary.get("model", ""), summary.get("url", ""))))]
    if "merged" in summary:
        lines += wrapped(printable(texts["from.merged"].format(**merged_values(summary["merged"]))), 98, "")
    lines += [""] + verdict_lines(summary["verdict"], texts, paint)
    judged = summary["verdict"]["state"] != "INVALID"
    if "find_max" in summary and judged:
        said = wrapped(search_words(texts, summary).replace("**", ""), 98, "")
        lines += [""] + [paint("bold", line) for line in said]
    names = load_names([stage["load"] for stage in summary["stages"]])
    for stage, name in zip(summary["stages"], names):
        lines += ["", paint("bold", stage_title(stage["load"], name, summary.get("config", {}), texts))]
        lines += stage_lines(stage, texts, paint)
        lines += gate_lines(stage, texts, paint, judged and not stage["client"].get("limited_by"))
    if any(is_open(stage["load"]) and stage["requests"]["success"] for stage in summary["stages"]):
        lines += [""] + wrapped(texts["open.quote"], 98, "  ")
    lines += summary_notes(summary, texts, paint)
    return lines


def cause_shown(error: Mapping[str, Any]) -> str:
    """A cause of failures as one of them said it; by its key where the sample is all that the endpoint sent."""
    return error["sample"] if error_key(error["sample"]) == error["key"] else error["key"]


def summary_notes(summary: Mapping[str, Any], texts: Mapping[str, str], paint: Callable[[str, str], str]) -> List[str]:
    """What stands under the tables: the mark's meaning, missing usage, the commonest failures."""
    lines = []
    blocks = [stage[name] for stage in summary["stages"] for name in TABLED_METRICS if name in stage]
    if any(block["limited"] for block in blocks):
        lines += ["", paint("dim", "  " + texts["terminal.limited"])]
    if summary["tokens"].get("missing") and summary["requests"]["success"]:
        lines += ["", paint("yellow", "  " + texts["terminal.usage_missing"].format(n=summary["tokens"]["missing"]))]
    if summary["errors"]:
        lines += ["", paint("bold", texts["terminal.failures"])]
        for error in summary["errors"][:5]:
            lines.append(
                "  "
                + paint("red", "%5d  %-13s" % (error["count"], error["status"]))
                + "  "
                + printable(cause_shown(error))[:150]
            )
        if len(summary["errors"]) > 5:
            lines.append("  " + texts["terminal.more_failures"].format(n=len(summary["errors"]) - 5))
        if not summary["requests"]["success"]:
            given = summary.get("config", {})
            words = ["check", "--url", str(given.get("url") or summary.get("url", ""))]
            words += ["--provider", str(given["provider"])] if given.get("provider", "openai") != "openai" else []
            command = " ".join([PROGRAM, *map(shlex.quote, words)])
            lines += ["", texts["terminal.check"].format(command=printable(command))]
    return lines


def plan_lines(stages: Sequence[Stage], bounds: Bounds, facts: Sequence[Tuple[str, str]], texts: Mapping[str, str],
               shown: int = 12) -> List[str]:
    """What --dry-run prints of a run: facts as (label, value), its stages, and what it comes to at the worst."""
    unknown = texts["plan.unknown"]
    rows = [list(fact) for fact in facts]
    for stage in stages[:shown]:
        rows.append([texts["plan.stage"].format(number=stage.index + 1), stage_said(stage, texts)])
    if len(stages) > shown:
        rows.append(["", texts["plan.more"].format(n=len(stages) - shown)])
    numbers = (
        (texts["plan.requests"], bounds.requests), (texts["plan.in_flight"], bounds.in_flight),
        (texts["plan.out_tokens"], bounds.out_tokens),
    )  # fmt: skip
    rows += [[label, unknown if value is None else "{:,}".format(value)] for label, value in numbers]
    rows.append([texts["plan.seconds"], clock_text(1000.0 * bounds.seconds)])
    width = max(text_width(row[0]) for row in rows)
    return [texts["plan.nothing_sent"], ""] + ["%s  %s" % (padded(row[0], width, False), row[1]) for row in rows]


def stage_said(stage: Stage, texts: Mapping[str, str]) -> str:
    """A stage in words: its load, and what ends it."""
    if stage.rps is None:
        parts = [texts["plan.streams"].format(n=stage.concurrency)]
    else:
        parts = [texts["plan.rate"].format(n="%g" % stage.rps)]
        parts += [texts["plan.cap"].format(n=stage.concurrency)] if stage.concurrency else []
    parts += [texts["plan.total"].format(n="{:,}".format(stage.total))] if stage.total is not None else []
    parts += [clock_text(1000.0 * stage.duration)] if stage.duration is not None else []
    parts += [texts["plan.warmup"].format(n=stage.warmup)] if stage.warmup else []
    return texts["list.comma"].join(parts)


def selftest_lines(result: Mapping[str, Any], texts: Mapping[str, str]) -> List[str]:
    """The selftest's result as two tables: the client's own error, and how much it can take in."""
    first, end = texts["terminal.selftest.first"] + " P50", texts["terminal.selftest.end"] + " P50"
    rows = [["", first, "P99", end, "P99", "CPU", "n"]]
    for level in result["errors"]:
        key = "terminal.load_one" if level["streams"] == 1 else "terminal.load"
        row = [texts[key].format(streams=level["streams"])]
        for name in ("first_ms", "end_ms"):
            figures = level[name]
            row += ["%.3f ms%s" % (figures[key], "†" if key in figures["limited"] else "") for key in ("p50", "p99")]
        rows.append([*row, "%.0f %%" % level["cpu_percent"], "{:,}".format(level["n"])])
    capacity = [["", texts["terminal.selftest.events"], "CPU"]]
    for entry in result["capacity"]:
        name = texts["terminal.selftest.processes"].format(n=entry["processes"])
        capacity.append([name, "{:,}".format(entry["events_per_s"]), "%.0f %%" % entry["cpu_percent"]])
    lines = [texts["terminal.selftest.error"], *("  " + line for line in align(rows))]
    lines += ["", texts["terminal.selftest.capacity"], *("  " + line for line in align(capacity))]
    if any(entry["cpu_percent"] < 85 for entry in result["capacity"]):
        lines.append("  " + texts["terminal.selftest.mock"])
    return lines

# A comparison


WORD_COLOURS = {"better": "green", "worse": "red", "unjudged": "yellow"}
FAIR_COLOURS = {"valid": "green", "caution": "yellow", "invalid": "red"}


def comparison_lines(
    first: ComparedRun, against: Sequence[Against], texts: Mapping[str, str], paint: Callable[[str, str], str]
) -> List[str]:
    """Several runs against the first as lines for a terminal: who is who, what is not alike, then every figure."""
    runs = [first] + [one.run for one in against]
    rows = [[run.letter, run.place, str(run.header.get("model", "")), str(run.header.get("started_at", ""))[:19],
             worded(texts, "verdict", run.state.lower())] for run in runs]  # fmt: skip
    lines = [printable(line) for line in left_aligned(rows)]
    state = comparison_state(against)
    word = paint(FAIR_COLOURS[state], worded(texts, "fair", state))
    lines += ["", *wrapped(word + "  " + worded(texts, "fair", state + ".text"), 110, "")]
    for reason in all_unfair(texts, against):
        lines += wrapped(printable("- " + reason.replace("**", "").replace("`", "")), 98, "  ")
    lines += settings_lines(runs, texts, paint)
    for one in against:
        lines += against_lines(first, one, texts, paint)
    lines += conditions_lines(against, texts, paint)
    return lines


def left_aligned(rows: Sequence[Sequence[str]]) -> List[str]:
    """Rows as lines with all columns at the left."""
    widths = [max(text_width(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(padded(cell, width, False) for cell, width in zip(row, widths)).rstrip() for row in rows]


def settings_lines(
    runs: Sequence[ComparedRun], texts: Mapping[str, str], paint: Callable[[str, str], str]
) -> List[str]:
    """The settings in which the runs differ, in columns."""
    rows = []
    for setting, values, differ in settings_of(runs):
        if any(differ):
            said = [setting_words(texts, setting.key, value) for value in values]
            short = [text if len(text) < 40 else text[:39] + "…" for text in said]
            rows.append([worded(texts, "setting", setting.key), *short])
    if not rows:
        return []
    table = left_aligned([[""] + [run.letter for run in runs]] + rows)
    return ["", paint("bold", texts["setting.differ"])] + ["  " + printable(line) for line in table]


def against_lines(
    first: ComparedRun, one: Against, texts: Mapping[str, str], paint: Callable[[str, str], str]
) -> List[str]:
    """One run against the first: the sentence, then a table for each load, and what its marks mean."""
    sentence = comparison_sentence(texts, first, one).replace("**", "")
    lines = [""] + [paint("bold", line) for line in wrapped(sentence, 98, "")]
    for pair in one.pairs:
        load = load_words(texts, pair.first.name)
        lines += ["", paint("bold", texts["change.head"].format(a=first.letter, b=one.run.letter, load=load))]
        lines += pair_lines(first, one, pair, texts, paint)
    alone = alone_words(texts, first, one)
    lines += ["", "  " + paint("yellow", alone)] if alone else []
    notes = [line for note in footnotes(texts, [one]) for line in wrapped(note, 98, "  ")]
    return lines + ([""] + [paint("dim", note) for note in notes] if notes else [])


def pair_lines(
    first: ComparedRun, one: Against, pair: ComparedPair, texts: Mapping[str, str], paint: Callable[[str, str], str]
) -> List[str]:
    """The figures of two stages side by side, with the change, its interval and the word for it."""
    head = ["", first.letter, one.run.letter, texts["change.change"], texts["change.95"]]
    rows, words = [head], [("dim", texts["change.word"])]
    for found in pair.rows:
        name, values = row_name(texts, found), []  # type: str, List[str]
        for stage, value in zip((pair.first, pair.second), found.values):
            limited = found.stat in ((stage.figures.get(found.metric) or {}).get("limited", ()) if found.stat else ())
            values.append(row_value(texts, found, value) + "†" * limited)
        rows.append([name, *values, change_words(texts, found.metric, found.change), interval_words(texts, found)])
        words.append((WORD_COLOURS.get(found.word, ""), word_of(texts, found)))
    width = max(map(text_width, align(rows)))
    lines = []
    for line, (colour, word) in zip(align(rows), words):
        filled = padded(line, width, False).replace("\u00a0", " ")
        lines.append("  %s  %s" % (filled, paint(colour, word) if colour else word))
    lines[0] = paint("dim", lines[0])
    return [line.rstrip() for line in lines]


def conditions_lines(
    against: Sequence[Against], texts: Mapping[str, str], paint: Callable[[str, str], str]
) -> List[str]:
    """What became of each --fail-if."""
    outcomes = [outcome for one in against for outcome in one.outcomes]
    rows = []
    for outcome in outcomes:
        found, relative = outcome.difference, outcome.condition.relative
        change = change_words(texts, found.metric, found.change, relative).replace("\u00a0", " ")
        where = "%s · %s" % (outcome.letter, load_words(texts, outcome.name))
        rows.append([worded(texts, "condition", outcome.state), outcome.condition.text, where, change,
                     interval_words(texts, found, relative)])  # fmt: skip
    colours = {"failed": "red", "kept": "green", "unjudged": "yellow"}
    if not rows:
        return []
    painted = [paint(colours[outcome.state], line) for outcome, line in zip(outcomes, left_aligned(rows))]
    return ["", paint("bold", texts["condition.title"])] + ["  " + line for line in painted]


# ==================================================================================================
# 20. Mock: a streaming chat server whose every pause is known
# ==================================================================================================
#
# A benchmark is believed when it measures a server whose truth is known. This one speaks OpenAI chat over real loopback
# HTTP/1.1, keeps its pauses exactly, writes down what it did and when, and fails on request in all the ways in which
# endpoints fail. It serves 1,000 streams from one process.
#
# How. An answer is an iterator of writes (due, mark, bytes), made by generators that know no socket and no clock:
#     plan -> frames (due, mark, group, SSE bytes) -> groups -> compression and chunk framing -> head in front
# `due` counts from the start of service and is absolute (first = ttft, k-th = ttft + k x itl), so lateness never adds
# up. A MockExchange plays the writes with one loop.call_at for each (measured with 1,000 streams: a heap and timer of
# our own cost as much). epoll counts time-outs in whole milliseconds, so run_mock's selector waits with select on the
# epoll descriptor, which counts in microseconds: writes are 0.1 ms late at the median instead of 0.6.
#
# What the options mean where it could be doubted (times in milliseconds, from the start of service: that is the time
# at which the request was read, or with `slots` the time at which it got its slot; nothing at all is sent before it):
#   ttft      to the first output frame, reasoning included: with reasoning=N the first content is due at ttft + N x itl
#   batch=B   B output frames leave in one write, which is due when its first frame is: ttft stays what it says
#   per_frame tokens in one output frame: tokens=20&per_frame=3 are 20 frames and 60 tokens. With tokens=0 the request's
#             max_tokens (16 without) is the number of tokens, and the last frame has what is left
#   tokens    is kept whatever max_tokens says, unless it is 0
#   split=N   the body goes in HTTP chunks of N bytes, N bytes of wire a write: every kind of border shows up
#   finish    with `tool` the default is tool_calls; with none and usage=finish the usage frame has a null reason
#   jitter=J  every pause is drawn anew as pause x (1 - J + J x Exp(1)): the mean stays
#   stall     of stall_once=AT,FOR (seconds from the server's start): time stands still for everything that is pending
#   faults    in mid-stream come when the frame after the first half is due. `slowhead`: status line at once, the rest
#             of the head at ttft. Faults that need a stream (garbage, error, …) leave a plain JSON answer alone
# Usage: prompt_tokens = max(1, characters of all message texts // 4); completion_tokens = the tokens sent, reasoning
# included.
#
# Truth, a line of JSON for each chat request, at GET /mock/truth and in `log`: request_id, path, status, fault,
# received (this process had read it), started (it got its slot), head, output (first output of any kind), first and
# last (content or tool frame), end (the write with the explicit end: finish reason or [DONE]), closed (the exchange was
# over), all in seconds on the machine's monotonic clock, taken just before the write; tokens; late (the worst lateness
# of its writes, in seconds).
# What did not happen is absent.

MOCK_DEFAULT_MAX_TOKENS = 16
MOCK_HEAD_LIMIT = 1 << 16
MOCK_CREATED = 1700000000           # a fixed date makes every frame the same in every run
MOCK_OPEN_FILES = 1 << 16
MOCK_START_TIMEOUT = 10.0          # seconds for a child to say where it listens

MockFrame = Tuple[float, str, int, bytes]       # due, mark, group (frames of one group leave in one write), SSE bytes
MockWrite = Tuple[float, str, bytes]            # due, mark, wire bytes


# --- options ----------------------------------------------------------------------------------------------------------

def mock_names(text: str) -> Tuple[str, ...]:
    """Names between commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def mock_stall(text: str) -> Tuple[float, float]:
    """`AT,FOR` in seconds -> (begin, length)."""
    begin, length = map(float, text.split(","))
    if not (0 <= begin < float("inf") and 0 <= length < float("inf")):
        raise ValueError(text)
    return begin, length


def mock_fault_rates(text: str) -> Tuple[Tuple[str, float], ...]:
    """`name:rate,…` -> ((name, rate), …); a name without a rate is certain."""
    pairs = [name.partition(":") for name in mock_names(text)]
    rates = tuple((name, float(rate or 1)) for name, _, rate in pairs)
    shares = [rate for _, rate in rates]
    if any(name not in MOCK_FAULTS for name, _ in rates) or min(shares, default=0) < 0 or not sum(shares) < 1.000001:
        raise ValueError(text)
    return rates


MOCK_READERS: Dict[type, Tuple[Callable[[str], Any], str]] = {      # type of the default -> reader, what is wanted
    bool: (lambda text: bool(("0", "1").index(text)), "0 or 1"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "text"),
    tuple: (mock_names, "names between commas"),
}


def mock_option(default: Any, meaning: str, choices: Sequence[str] = (), lowest: float = 0, highest: float = 1e9,
                read: Optional[Callable[[str], Any]] = None, wanted: str = "") -> Any:
    """A field of MockOptions: what it means (for --help), how its text is read and what is wanted (for errors)."""
    usual_read, usual_wanted = MOCK_READERS[type(default)]
    numeric = type(default) in (int, float)

    def checked(text: str) -> Any:
        value = (read or usual_read)(text)
        if (choices and value not in choices) or (numeric and not lowest <= value <= highest):
            raise ValueError(text)
        return value

    bounds = f", at least {lowest:g}" + f" and at most {highest:g}" * (highest < 1e9)
    wanted = wanted or ", ".join(choices) or usual_wanted + bounds * numeric
    return dataclasses.field(default=default, metadata={"read": checked, "wanted": wanted, "meaning": meaning})


@dataclasses.dataclass(frozen=True)
class MockOptions:
    """What the mock server does: the keys of `mock:?key=value&…` and the flags of the mock command."""

    ttft: float = mock_option(200.0, "ms from the start of service to the first output frame")
    itl: float = mock_option(50.0, "ms between output frames")
    tokens: int = mock_option(20, "content frames; 0, or a request with ignore_eos: as many tokens as its max_tokens")
    role: bool = mock_option(True, "send a role-only frame first")
    role_delay: float = mock_option(0.0, "when the role-only frame is due, in ms, at most ttft")
    reasoning: int = mock_option(0, "reasoning frames before the content")
    reasoning_key: str = mock_option("reasoning_content", "delta key of the reasoning",
                                     ("reasoning_content", "reasoning"))
    think: bool = mock_option(False, "the reasoning comes as <think>…</think> inside the content")
    tool: int = mock_option(0, "tool-call frames, instead of the content")
    usage: str = mock_option("final", "where usage is: a last frame, the finish frame, every frame, nowhere",
                             ("final", "finish", "every", "none"))
    usage_asked: bool = mock_option(True, "send usage only if stream_options.include_usage asks for it")
    done: bool = mock_option(True, "send [DONE]")
    finish: str = mock_option("stop", "finish reason; empty: none")
    text: str = mock_option("tok", "what the tokens look like", ("tok", "zh", "emoji", "ascii"))
    vary: bool = mock_option(True, "begin each answer with its number, so that no two are the same")
    pad: int = mock_option(0, "bytes added to every token")
    batch: int = mock_option(1, "output frames in one write", lowest=1)
    per_frame: int = mock_option(1, "tokens in one output frame", lowest=1)
    framing: str = mock_option("chunked", "how the end of a stream is told", ("chunked", "length", "close", "http10"))
    gzip: str = mock_option("0", "compress streams, asked or not", ("0", "1", "deflate"))
    crlf: bool = mock_option(False, "end SSE lines with CR LF")
    comments: float = mock_option(0.0, "ms between keep-alive comments before the first output; 0: none")
    split: int = mock_option(0, "send in pieces of so many bytes; 0: whole frames")
    slots: int = mock_option(0, "serve so many at a time, the others wait in line; 0: all")
    jitter: float = mock_option(0.0, "share of every pause that is exponentially distributed", highest=1)
    seed: int = mock_option(1, "seed of jitter and faults")
    refuse: Tuple[str, ...] = mock_option((), "body fields that are answered with 400")
    token: str = mock_option("", "bearer token that requests need, else 401")
    models: Tuple[str, ...] = mock_option(("mock",), "ids that GET /v1/models lists")
    keepalive: int = mock_option(-1, "close a connection after so many answers; -1: never", lowest=-1)
    idle: float = mock_option(0.0, "close a connection, unannounced, that is idle for so many ms; 0: never")
    cached: int = mock_option(0, "prompt tokens reported as cached")
    stall_once: Tuple[float, ...] = mock_option((), "the server stands still once: from its second AT for FOR seconds",
                                                read=mock_stall, wanted="AT,FOR in seconds")
    fault: Tuple[Tuple[str, float], ...] = mock_option(
        (), "share of requests that fail, and how", read=mock_fault_rates,
        wanted="NAME:RATE,… with rates of at most 1 together, and names of reset, truncate, noend, stall, error, "
               "garbage, empty, slowhead, http500, http429, http401, redirect, nothttp, html")
    truth: int = mock_option(100000, "requests remembered for GET /mock/truth")
    log: str = mock_option("", "file to which the truth of each request is appended")


MOCK_FIELDS: Dict[str, dataclasses.Field] = {field.name: field for field in dataclasses.fields(MockOptions)}


def mock_options(pairs: Iterable[Tuple[str, str]]) -> MockOptions:
    """(key, text) pairs -> options. Raises UserError for an unknown key or a bad value, and does not repeat them."""
    values = {}
    for key, text in pairs:
        name = key.replace("-", "_")
        if name not in MOCK_FIELDS:
            known = nearest(name, MOCK_FIELDS)
            named = "the mock option %s" % name if re.match(r"^[a-z_]{1,20}$", name) else "a mock option"
            raise UserError("%s is unknown%s; `llmbench mock --help` lists them" % (named, known))
        known = MOCK_FIELDS[name].metadata
        try:
            values[name] = known["read"](text)
        except ValueError:
            wanted = f"{known['wanted']} ({known['meaning']})"
            raise UserError(f"bad value for the mock option {name}; give {wanted}") from None
    return MockOptions(**values)


def mock_pairs(url: str) -> List[Tuple[str, str]]:
    """`mock:?ttft=200&itl=50` -> [("ttft", "200"), ("itl", "50")]."""
    scheme, _, query = url.partition("?")
    if scheme not in ("mock:", "mock://"):
        raise UserError("a mock URL begins with mock: ; write mock:?ttft=200&itl=50&tokens=20")
    return urllib.parse.parse_qsl(query, keep_blank_values=True)


def parse_mock_url(url: str) -> MockOptions:
    """`mock:` or `mock:?key=value&…` -> options."""
    return mock_options(mock_pairs(url))


def mock_flags(url: str) -> List[str]:
    """A mock URL, checked -> the flags of the mock command that say the same."""
    parse_mock_url(url)
    return [f"--{key.replace('_', '-')}={text}" for key, text in mock_pairs(url)]


def read_port(text: str) -> int:
    """A port to listen on; raises ArgumentTypeError."""
    if not re.match(r"^[0-9]{1,5}$", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError("needs a port from 0 to 65535")
    return int(text)


def add_mock_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the mock command: where to listen, and one flag for each option (`--role-delay`, `--role_delay`)."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=read_port, default=0, metavar="PORT",
                        help="port to listen on; 0, the default, takes a free one")
    parser.add_argument("--stdin-guard", action="store_true", help="end when standard input does")
    for name, option in MOCK_FIELDS.items():
        spellings = dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"])
        text = f"{option.metadata['meaning']} ({option.metadata['wanted']})".replace("%", "%%")
        parser.add_argument(*spellings, dest=name, metavar="VALUE", help=text)


def options_from_arguments(args: argparse.Namespace) -> MockOptions:
    """Parsed flags of add_mock_arguments -> options."""
    given = vars(args)
    return mock_options((name, given[name]) for name in MOCK_FIELDS if given.get(name) is not None)


# --- the plan of an answer, and what faults make of it ----------------------------------------------------------------

class MockRefusal(Exception):
    """A request that can't be taken: (status, message)."""


class MockRequest(NamedTuple):
    """One request that was read completely."""

    method: str
    path: str                       # without the query
    version: str
    headers: Dict[str, str]         # lower-case names
    fields: Dict[str, Any]          # the JSON body, {} where there is none
    received: float

    @property
    def prompt_tokens(self) -> int:
        """Four characters of message text make a token, and there is at least one."""
        contents = [message.get("content") for message in self.fields.get("messages") or []]
        parts = [part for content in contents
                 for part in (content if isinstance(content, list) else [{"text": content}])]
        return max(1, sum(len(part.get("text") or "") for part in parts) // 4)


@dataclasses.dataclass(frozen=True)
class MockPlan:
    """What one answer consists of: the options with the request's own numbers and its fault applied."""

    options: MockOptions
    prompt_tokens: int
    tokens: int                     # tokens of the whole answer, reasoning included
    reasoning: int                  # reasoning frames
    frames: int                     # output frames, reasoning included
    usage: str                      # as the option, and none when nobody asked
    finish: str
    done: bool
    cut: bool = False               # nothing is generated after the first half
    inserted: str = ""              # data of an SSE event that comes after the first half
    slow_head: bool = False
    ending: str = "keep"            # a key of MOCK_ENDINGS
    opening: str = ""               # what the text begins with

    @property
    def half(self) -> int:
        """Output frames before the fault; a cut leaves at least one."""
        return max(int(self.cut), self.frames // 2)

    @property
    def tokens_sent(self) -> int:
        """Tokens that a stream carries, unless the client goes first."""
        return min(self.tokens, self.half * self.options.per_frame) if self.cut else self.tokens


MOCK_ERROR_EVENT = json.dumps({"error": {"message": "mock failure in mid-stream", "type": "server_error",
                                         "param": None, "code": "mock_error"}})

# name -> the fields of the plan that it replaces; {} marks those that answer at once, without a stream (MOCK_REFUSALS)
MOCK_FAULTS: Dict[str, Dict[str, Any]] = {
    "reset": {"cut": True, "ending": "reset"},
    "truncate": {"cut": True, "ending": "close"},
    "noend": {"finish": "", "done": False, "usage": "none"},
    "stall": {"cut": True, "ending": "hold"},
    "error": {"cut": True, "inserted": MOCK_ERROR_EVENT, "finish": "", "usage": "none", "done": True},
    "garbage": {"inserted": '{"choices": [{"delta": {"content": "half a fra'},
    "empty": {"frames": 0, "reasoning": 0, "tokens": 0},
    "slowhead": {"slow_head": True},
    "http500": {}, "http429": {}, "http401": {}, "redirect": {}, "nothttp": {}, "html": {},
}


def plan_answer(options: MockOptions, request: MockRequest, fault: str) -> MockPlan:
    """The plan of the answer to `request`, with `fault` ("" for none). Raises MockRefusal for a body without sense."""
    content = options.tool or options.tokens
    content_tokens = content * options.per_frame
    try:
        prompt_tokens = request.prompt_tokens
        usage_asked = (request.fields.get("stream_options") or {}).get("include_usage")
        max_tokens = request.fields.get("max_completion_tokens") or request.fields.get("max_tokens")
        max_tokens = max(1, int(max_tokens or MOCK_DEFAULT_MAX_TOKENS))
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise MockRefusal(400, "the body is not a chat request") from None
    if not content or (request.fields.get("ignore_eos") and not options.tool):
        content, content_tokens = -(-max_tokens // options.per_frame), max_tokens
    plan = MockPlan(
        options, prompt_tokens, options.reasoning * options.per_frame + content_tokens,
        options.reasoning, options.reasoning + content,
        options.usage if usage_asked or not options.usage_asked else "none",
        "tool_calls" if options.tool and options.finish == "stop" else options.finish, options.done)
    return dataclasses.replace(plan, **MOCK_FAULTS.get(fault, {}))


def draw_fault(rates: Sequence[Tuple[str, float]], draw: float) -> str:
    """The fault that a draw from [0, 1) falls on, or \"\".

    >>> [draw_fault([("reset", 0.1), ("html", 0.2)], draw) for draw in (0.05, 0.15, 0.35)]
    ['reset', 'html', '']
    """
    for name, rate in rates:
        if draw < rate:
            return name
        draw -= rate
    return ""


# --- frames: what is said, and when it is due -------------------------------------------------------------------------

MOCK_TEXTS: Dict[str, Sequence[str]] = {
    "tok": [f" tok{number}" for number in range(256)],      # then again: so all frames are encoded once
    "ascii": "The quick brown fox jumps over the lazy dog. ",
    "zh": "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "emoji": "😀🚀🎉🌍🔥🐍🍜🧪",
}


def mock_text(plan: MockPlan, first: int, last: int) -> str:
    """The text of the output frames from `first` to before `last`."""
    options, alphabet = plan.options, MOCK_TEXTS[plan.options.text]
    numbers = range(first * options.per_frame, min(last * options.per_frame, plan.tokens))
    opening = plan.opening if first == 0 else ""
    return opening + "".join([alphabet[number % len(alphabet)] + "x" * options.pad for number in numbers])


def mock_tool_call(plan: MockPlan, frame: int) -> Dict[str, Any]:
    """The piece of a tool call in one frame: name first, then arguments that add up to one JSON object."""
    number, last = frame - plan.reasoning, frame == plan.frames - 1
    if number == 0:
        return {"index": 0, "id": "call_1", "type": "function",
                "function": {"name": "lookup", "arguments": "{}" if last else ""}}
    arguments = '{"query": "' * (number == 1) + mock_text(plan, frame, frame + 1) + '"}' * last
    return {"index": 0, "function": {"arguments": arguments}}


def mock_delta(plan: MockPlan, frame: int) -> Dict[str, Any]:
    """The delta of one output frame."""
    text = mock_text(plan, frame, frame + 1)
    if frame >= plan.reasoning:
        return {"tool_calls": [mock_tool_call(plan, frame)]} if plan.options.tool else {"content": text}
    if not plan.options.think:
        return {plan.options.reasoning_key: text}
    return {"content": "<think>" * (frame == 0) + text + "</think>" * (frame == plan.reasoning - 1)}


def mock_usage(plan: MockPlan, frames: int) -> Dict[str, Any]:
    """The usage object after so many output frames; a server that leaves <think> in the text counts no reasoning."""
    sent = min(frames * plan.options.per_frame, plan.tokens)
    reasoning = 0 if plan.options.think else min(sent, plan.reasoning * plan.options.per_frame)
    return {"prompt_tokens": plan.prompt_tokens, "completion_tokens": sent, "total_tokens": plan.prompt_tokens + sent,
            "prompt_tokens_details": {"cached_tokens": min(plan.options.cached, plan.prompt_tokens)},
            "completion_tokens_details": {"reasoning_tokens": reasoning}}


class MockFrames:
    """Encodes the SSE frames of a server, each kind once."""

    def __init__(self, options: MockOptions) -> None:
        self.line_end = "\r\n" if options.crlf else "\n"
        self.comment = (": keep-alive" + 2 * self.line_end).encode()
        self.model = (options.models or ("mock",))[0]
        self.encoded: Dict[Tuple[str, int, int], bytes] = {}

    def event(self, data: str) -> bytes:
        """One SSE event."""
        return f"data: {data}{self.line_end}{self.line_end}".encode()

    def chunk(self, plan: MockPlan, delta: Optional[Dict[str, Any]], sent: int, finish: Optional[str] = None,
              usage: bool = False) -> bytes:
        """One chat.completion.chunk after `sent` output frames; without a delta `choices` is empty."""
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
        chunk = {"id": "chatcmpl-mock", "object": "chat.completion.chunk", "created": MOCK_CREATED,
                 "model": self.model, "choices": choices}
        if usage or plan.usage == "every":
            chunk["usage"] = mock_usage(plan, sent)
        elif plan.usage == "final":
            chunk["usage"] = None           # as OpenAI does on every other frame once usage was asked for
        return self.event(json.dumps(chunk, ensure_ascii=False, separators=(",", ":")))

    def output(self, plan: MockPlan, frame: int) -> bytes:
        """One output frame; a plain content frame in the middle of an answer comes from the cache."""
        size = plan.options.per_frame
        plain = frame >= plan.reasoning and not plan.options.tool and (frame + 1) * size <= plan.tokens
        if plan.opening and frame == 0:
            plain = False
        if not plain or plan.usage == "every":
            return self.chunk(plan, mock_delta(plan, frame), frame + 1)
        key = (plan.usage, frame * size % len(MOCK_TEXTS[plan.options.text]), size)
        if key not in self.encoded:
            self.encoded[key] = self.chunk(plan, mock_delta(plan, frame), frame + 1)
        return self.encoded[key]

    def completion(self, plan: MockPlan) -> bytes:
        """The whole answer as one JSON document: what the deltas of a stream add up to."""
        deltas = [mock_delta(plan, frame) for frame in range(plan.frames)]
        message: Dict[str, Any] = {"role": "assistant", "content": ""}
        for key in ("content", plan.options.reasoning_key):
            message[key] = "".join(delta.get(key, "") for delta in deltas)
        pieces = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
        if pieces:
            arguments = "".join(piece["function"]["arguments"] for piece in pieces)
            message["tool_calls"] = [{**pieces[0], "function": {"name": "lookup", "arguments": arguments}}]
        choices = [{"index": 0, "message": message, "finish_reason": plan.finish or None}]
        completion = {"id": "chatcmpl-mock", "object": "chat.completion", "created": MOCK_CREATED,
                      "model": self.model, "choices": choices}
        if plan.options.usage != "none":
            completion["usage"] = mock_usage(plan, plan.frames)
        return json.dumps(completion).encode()


def output_dues(options: MockOptions, chance: random.Random) -> Iterator[float]:
    """When the output frames are due, in seconds from the start of service, without end."""
    def pause(milliseconds: float) -> float:
        stretch = 1 - options.jitter + options.jitter * chance.expovariate(1) if options.jitter else 1
        return milliseconds / 1000 * stretch

    due = pause(options.ttft)
    while True:
        write_due = due
        for _ in range(options.batch):
            yield write_due
            due += pause(options.itl)


def preface_frames(plan: MockPlan, frames: MockFrames, first_due: float) -> Iterator[MockFrame]:
    """What comes before the first output: nothing but the head, then the role frame and comments in order."""
    every = plan.options.comments / 1000
    count = int(first_due / every) if every else 0
    timed = [(number * every, frames.comment) for number in range(1, count + 1) if number * every < first_due]
    if plan.options.role:
        role = frames.chunk(plan, {"role": "assistant", "content": ""}, 0)
        timed.append((min(plan.options.role_delay / 1000, first_due), role))
    yield 0.0, "head", 0, b""
    if plan.slow_head:
        yield first_due, "head", 1, b""
    for due, data in sorted(timed, key=lambda pair: pair[0]):
        yield (first_due, "head", 1, data) if plan.slow_head else (due, "head", 0, data)


def tail_frames(plan: MockPlan, frames: MockFrames, due: float, sent: int) -> Iterator[MockFrame]:
    """What comes after the last output: finish reason, usage, [DONE], as far as the plan has them."""
    mark = "end" if plan.finish or plan.done else "tail"
    if plan.finish or plan.usage == "finish":
        yield due, mark, 0, frames.chunk(plan, {}, sent, plan.finish or None, plan.usage == "finish")
    if plan.usage in ("final", "every"):
        yield due, mark, 0, frames.chunk(plan, None, sent, usage=True)
    if plan.done:
        yield due, mark, 0, frames.event("[DONE]")


def stream_frames(plan: MockPlan, frames: MockFrames, chance: random.Random) -> Iterator[MockFrame]:
    """All frames of a streamed answer in order; marks: head, reasoning, content, fault, end, tail."""
    dues = output_dues(plan.options, chance)
    due = next(dues)
    yield from preface_frames(plan, frames, due)
    inserted = frames.event(plan.inserted) if plan.inserted else b""
    sending = plan.half if plan.cut else plan.frames
    for frame in range(sending):
        if inserted and frame == plan.half:
            yield due, "fault", 0, inserted
        mark = "reasoning" if frame < plan.reasoning else "content"
        yield due, mark, frame // plan.options.batch, frames.output(plan, frame)
        if frame < sending - 1 or plan.cut:
            due = next(dues)
    if plan.cut:
        yield due, "fault", 0, inserted
    if plan.ending == "keep":
        yield from tail_frames(plan, frames, due, sending)


# --- wire: compression, framing, head ---------------------------------------------------------------------------------

MOCK_FRAMINGS = {       # option -> version, header that tells where the body ends, ending of a complete body
    "chunked": ("HTTP/1.1", "Transfer-Encoding: chunked", "keep"),
    "length": ("HTTP/1.1", "Content-Length: {length}", "keep"),
    "close": ("HTTP/1.1", "Connection: close", "close"),
    "http10": ("HTTP/1.0", "", "close"),
}
MOCK_CODINGS = {"0": ("", 0), "1": ("gzip", 31), "deflate": ("deflate", 15)}     # option -> name, window bits of zlib


class MockBody:
    """Turns body bytes into wire bytes: compression that is flushed at each write, then chunk framing."""

    def __init__(self, options: MockOptions, framing: str) -> None:
        bits = MOCK_CODINGS[options.gzip][1]
        self.compressor = zlib.compressobj(wbits=bits) if bits else None
        self.chunked = framing == "chunked"
        self.split = options.split

    def encode(self, data: bytes, flush: int = zlib.Z_SYNC_FLUSH) -> bytes:
        """The wire bytes of some body bytes; none for none (an empty chunk would be the end)."""
        if self.compressor and (data or flush == zlib.Z_FINISH):
            data = self.compressor.compress(data) + self.compressor.flush(flush)
        if not self.chunked or not data:
            return data
        return b"".join([b"%x\r\n%b\r\n" % (len(piece), piece) for piece in cut_bytes(data, self.split)])

    def end(self) -> bytes:
        """The wire bytes that end the body cleanly."""
        return self.encode(b"", zlib.Z_FINISH) + b"0\r\n\r\n" * self.chunked


def cut_bytes(data: bytes, size: int) -> List[bytes]:
    """The bytes in pieces of `size`; whole when it is 0."""
    if not size or len(data) <= size:
        return [data]
    return [data[at:at + size] for at in range(0, len(data), size)]


def body_writes(frames: Iterable[MockFrame], body: MockBody, complete: bool) -> Iterator[MockWrite]:
    """One write for each group of frames, and one that ends the body when it is to be `complete`."""
    due = 0.0
    for (due, mark, _), group in itertools.groupby(frames, key=lambda frame: frame[:3]):
        yield due, mark, body.encode(b"".join([frame[3] for frame in group]))
    ending = body.end() if complete else b""
    if ending:
        yield due, "tail", ending


def with_head(pieces: Sequence[bytes], writes: Iterable[MockWrite]) -> Iterator[MockWrite]:
    """Puts one piece of the head in front of each of the first writes."""
    for piece, (due, mark, data) in itertools.zip_longest(pieces, itertools.islice(writes, len(pieces))):
        yield due, mark, piece + data
    yield from writes


def encode_head(status: int, headers: Iterable[str], version: str = "HTTP/1.1") -> bytes:
    """Status line and header lines; empty and repeated ones are left out."""
    import http

    lines = [f"{version} {status} {http.HTTPStatus(status).phrase}", "Date: " + write_http_date(int(time.time())),
             *dict.fromkeys(filter(None, headers))]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class MockAnswer(NamedTuple):
    """What is written in answer to one request, and what becomes of the connection."""

    writes: Iterator[MockWrite]
    status: int                     # 0 where it is not HTTP
    ending: str = "keep"            # a key of MOCK_ENDINGS


def plain_answer(status: int, body: bytes, headers: Sequence[str] = (), content_type: str = "application/json",
                 due: float = 0.0, mark: str = "head") -> MockAnswer:
    """A whole answer with a length, in one write."""
    head = encode_head(status, [f"Content-Type: {content_type}", f"Content-Length: {len(body)}", *headers])
    return MockAnswer(iter([(due, mark, head + body)]), status)


def error_answer(status: int, message: str, headers: Sequence[str] = (), code: str = "", param: str = "") -> MockAnswer:
    """An error in OpenAI's shape."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param or None, "code": code or None}
    return plain_answer(status, json.dumps({"error": error}).encode(), headers)


# faults that answer at once: name -> headers that every answer of the connection has -> answer
MOCK_REFUSALS: Dict[str, Callable[[List[str]], MockAnswer]] = {
    "http500": lambda headers: error_answer(500, "mock failure", headers, "mock_error"),
    "http429": lambda headers: error_answer(429, "mock rate limit", [*headers, "Retry-After: 1"], "rate_limit"),
    "http401": lambda headers: error_answer(401, "mock: incorrect API key", headers, "invalid_api_key"),
    "redirect": lambda headers: plain_answer(307, b"", ["Location: /elsewhere/v1/chat/completions", *headers]),
    "html": lambda headers: plain_answer(200, b"<!DOCTYPE html><title>Sign in</title>", headers, "text/html"),
    "nothttp": lambda headers: MockAnswer(iter([(0.0, "head", b"SSH-2.0-OpenSSH_9.6\r\n")]), 0, "close"),
}


def stream_answer(plan: MockPlan, frames: MockFrames, chance: random.Random, headers: Sequence[str],
                  framing: str) -> MockAnswer:
    """A streamed answer."""
    version, length_header, ending = MOCK_FRAMINGS[framing]
    complete = plan.ending == "keep"
    writes = body_writes(stream_frames(plan, frames, chance), MockBody(plan.options, framing), complete)
    length = 0
    if framing == "length":         # the whole body must be known; one that is cut promises more than comes
        known = list(writes)
        length = sum(len(data) for _, _, data in known) + 1000 * (not complete)
        writes = iter(known)
    coding = MOCK_CODINGS[plan.options.gzip][0]
    head = encode_head(200, ["Content-Type: text/event-stream; charset=utf-8", "Cache-Control: no-cache",
                             length_header.format(length=length), f"Content-Encoding: {coding}" if coding else "",
                             *headers], version)
    first_line = head.index(b"\n") + 1
    pieces = [head[:first_line], head[first_line:]] if plan.slow_head else [head]
    return MockAnswer(with_head(pieces, writes), 200, ending if complete else plan.ending)


def completion_answer(plan: MockPlan, frames: MockFrames, headers: Sequence[str]) -> MockAnswer:
    """The answer to `"stream": false`: all of it when the last token is due."""
    due = (plan.options.ttft + max(0, plan.frames - 1) * plan.options.itl) / 1000
    return plain_answer(200, frames.completion(plan), headers, due=due, mark="whole")


# --- requests ---------------------------------------------------------------------------------------------------------

def read_head(head: bytes) -> Tuple[List[str], Dict[str, str]]:
    """Bytes before the empty line -> the words of the request line, headers with lower-case names."""
    request_line, *lines = head.decode("latin-1").split("\r\n")
    words = request_line.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise MockRefusal(400, "this is not an HTTP/1 request")
    pairs = [line.partition(":") for line in lines]
    return words, {name.strip().lower(): value.strip() for name, _, value in pairs}


def read_body(body: bytes) -> Dict[str, Any]:
    """The JSON object of a body; {} for none."""
    try:
        fields = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        raise MockRefusal(400, "the body is not JSON") from None
    if not isinstance(fields, dict):
        raise MockRefusal(400, "the body is not a JSON object")
    return fields


def read_request(buffer: bytearray, now: float) -> Optional[MockRequest]:
    """Takes one request from the head of the buffer; None while it is not all there. Raises MockRefusal."""
    size = buffer.find(b"\r\n\r\n")
    if size < 0:
        if len(buffer) > MOCK_HEAD_LIMIT:
            raise MockRefusal(431, "the request head is too long")
        return None
    (method, target, version), headers = read_head(bytes(buffer[:size]))
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers or not re.match(r"[0-9]{1,18}\Z", length):
        raise MockRefusal(411, "send a Content-Length")
    end = size + 4 + int(length)
    if len(buffer) < end:
        return None
    body = bytes(buffer[size + 4:end])
    del buffer[:end]
    return MockRequest(method, target.partition("?")[0], version, headers, read_body(body), now)


# --- playing ----------------------------------------------------------------------------------------------------------

def stalled_due(start: float, delay: float, stall: Tuple[float, float]) -> float:
    """start + delay on a clock that stands still during the stall (begin, end).

    >>> [stalled_due(start, 2.0, (10.0, 15.0)) for start in (7.0, 9.0, 11.0, 16.0)]
    [9.0, 16.0, 17.0, 18.0]
    """
    begin, end = stall
    if start >= end or start + delay < begin:
        return start + delay
    return start + delay + end - max(start, begin)


class MockExchange:
    """One request being answered: plays the writes of its answer and notes when they were made."""

    def __init__(self, server: MockServer, connection: MockConnection, answer: MockAnswer,
                 truth: Dict[str, Any]) -> None:
        self.server, self.connection, self.answer, self.truth = server, connection, answer, truth
        self.write: MockWrite = (0.0, "", b"")
        self.due = self.started = 0.0
        self.over = False

    def start(self, moment: float) -> None:
        """Begins service; what is due counts from `moment`."""
        self.started = self.truth["started"] = moment
        self.advance()

    def advance(self) -> None:
        """Puts the next write on the ticker, or ends the exchange."""
        write = next(self.answer.writes, None)
        if write is not None:
            self.write = write
            self.due = stalled_due(self.started, write[0], self.server.stall)
            self.server.loop.call_at(self.due, self.step)
        elif self.answer.ending != "hold":
            self.close()
            MOCK_ENDINGS[self.answer.ending](self.connection)

    def step(self) -> None:
        """Makes the write that is due; where the peer reads too slowly, when it has caught up."""
        if self.connection.paused:
            self.connection.held = self.step
        elif not self.over:
            _, mark, data = self.write
            self.note(mark, self.server.now())
            self.connection.send(data)
            self.advance()

    def note(self, mark: str, now: float) -> None:
        """Writes the moment of a write into the truth."""
        truth = self.truth
        truth.setdefault("head", now)
        truth["late"] = max(truth.get("late", 0.0), now - self.due)
        if mark in ("reasoning", "content", "whole"):
            truth.setdefault("output", now)
        if mark in ("content", "whole"):
            truth.setdefault("first", now)
            truth["last"] = now
        if mark in ("end", "whole"):
            truth.setdefault("end", now)

    def close(self) -> None:
        """The exchange is over, however it ended: notes it once, and lets the next one have the slot."""
        if not self.over:
            self.over = True
            self.truth["closed"] = self.server.now()
            self.server.finished(self)


class MockConnection(asyncio.Protocol):
    """One client connection: requests in, one at a time; writes out."""

    transport: asyncio.Transport

    def __init__(self, server: MockServer) -> None:
        self.server = server
        self.buffer = bytearray()
        self.exchange: Optional[MockExchange] = None
        self.answers = 0
        self.last = False                   # the answer being given is the last of this connection
        self.paused = False
        self.held: Optional[Callable[[], None]] = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins to wait for a request."""
        self.transport = transport          # type: ignore[assignment]
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.connections.add(self)
        self.expect()

    def connection_lost(self, exc: Optional[Exception]) -> None:
        """Ends the exchange that there was."""
        self.server.connections.discard(self)
        if self.exchange:
            self.exchange.close()

    def data_received(self, data: bytes) -> None:
        """Keeps what comes, and reads it unless an answer is being given."""
        self.buffer += data
        if not self.exchange:
            self.read()

    def pause_writing(self) -> None:
        """The peer reads too slowly."""
        self.paused = True

    def resume_writing(self) -> None:
        """The peer has caught up."""
        self.paused, held, self.held = False, self.held, None
        if held:
            held()

    def read(self) -> None:
        """Answers the next request if all of it is there."""
        try:
            request = read_request(self.buffer, self.server.now())
        except MockRefusal as refusal:
            self.last = True
            self.server.play(self, error_answer(*refusal.args, headers=["Connection: close"]), {})
            return
        if request:
            kept = request.headers.get("connection", "").lower() != "close" and request.version == "HTTP/1.1"
            self.last = self.last or not kept or self.answers + 1 >= (self.server.keepalive or 1)
            self.server.answer(request, self)

    def send(self, data: bytes) -> None:
        """Writes to the kernel, in pieces if the options say so."""
        for piece in cut_bytes(data, self.server.options.split):
            if piece:
                self.transport.write(piece)

    def answered(self) -> None:
        """An answer is complete: closes the connection or turns to the next request."""
        self.answers += 1
        self.exchange = None
        if self.last:
            self.transport.close()
        else:
            self.expect()
            if self.buffer:
                self.server.loop.call_soon(self.read)

    def reset(self) -> None:
        """Closes with RST: that is what a socket does that lingers for no time."""
        socket_option = self.transport.get_extra_info("socket").setsockopt
        socket_option(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def expect(self) -> None:
        """Waits for a request, with the option `idle` not for ever."""
        idle, answers = self.server.options.idle / 1000, self.answers
        if idle:
            self.server.loop.call_later(idle, self.expire, answers)

    def expire(self, answers: int) -> None:
        """Closes the connection if nothing was asked since `answers` answers."""
        if not self.exchange and self.answers == answers:
            self.transport.close()


MOCK_ENDINGS: Dict[str, Callable[[MockConnection], None]] = {       # "hold" has none: it lasts until the client goes
    "keep": MockConnection.answered,
    "close": lambda connection: connection.transport.close(),       # FIN, whatever the framing promised
    "reset": MockConnection.reset,
}


class MockServer:
    """What all connections share: options, encoded frames, slots, chance and the truth."""

    def __init__(self, options: MockOptions, loop: asyncio.AbstractEventLoop) -> None:
        self.options, self.loop = options, loop
        self.now = loop.time                # CLOCK_MONOTONIC, as time.monotonic
        self.frames = MockFrames(options)
        self.keepalive = float("inf") if options.keepalive < 0 else options.keepalive
        begin, length = options.stall_once or (0.0, 0.0)
        self.stall = (self.now() + begin, self.now() + begin + length)
        self.connections: Set[MockConnection] = set()
        self.running: Set[MockExchange] = set()
        self.waiting: Deque[MockExchange] = collections.deque()
        self.truths: Deque[str] = collections.deque(maxlen=options.truth)
        self.log: Optional[TextIO] = open_mock_log(options.log)
        self.requests = 0

    def answer(self, request: MockRequest, connection: MockConnection) -> None:
        """Routes a request."""
        headers = ["Connection: close"] if connection.last else []
        kind = (request.method, request.path[request.path.rfind("/"):])
        if request.path.endswith("/chat/completions") and request.method == "POST":
            self.answer_chat(request, connection, headers)
        elif kind == ("GET", "/models"):
            self.play(connection, self.refusal(request, headers) or self.models_answer(headers), {})
        elif kind == ("GET", "/truth"):
            truth = "".join(self.truths).encode()
            self.play(connection, plain_answer(200, truth, headers, "application/x-ndjson"), {})
        else:
            self.play(connection, error_answer(404, "no such path; POST /v1/chat/completions", headers), {})

    def answer_chat(self, request: MockRequest, connection: MockConnection, headers: List[str]) -> None:
        """Answers a chat request. Each draws its fault, whatever becomes of it, so that the seed fixes all."""
        import random

        self.requests += 1
        chance = random.Random(self.options.seed * 1000003 + self.requests)
        fault, streams = draw_fault(self.options.fault, chance.random()), bool(request.fields.get("stream"))
        truth = {"request_id": request.headers.get("x-request-id", f"mock-{self.requests}"), "path": request.path,
                 "received": request.received, "status": 200, "tokens": 0}
        headers = [f"X-Request-Id: {truth['request_id']}", *headers]
        if fault and (streams or fault in MOCK_REFUSALS):
            truth["fault"] = fault
        refusal = self.refusal(request, headers)
        if fault in MOCK_REFUSALS and not refusal:
            refusal = MOCK_REFUSALS[fault](headers)
        try:
            plan = plan_answer(self.options, request, truth.get("fault", ""))
            if self.options.vary:
                plan = dataclasses.replace(plan, opening="%d." % self.requests)
        except MockRefusal as problem:
            refusal = error_answer(*problem.args, headers=headers)
        if refusal:
            self.play(connection, refusal, {**truth, "status": refusal.status})
            return
        framing = self.options.framing if request.version == "HTTP/1.1" else "http10"
        answer = (stream_answer(plan, self.frames, chance, headers, framing) if streams
                  else completion_answer(plan, self.frames, headers))
        self.play(connection, answer, {**truth, "tokens": plan.tokens_sent}, self.options.slots > 0)

    def play(self, connection: MockConnection, answer: MockAnswer, truth: Dict[str, Any], queued: bool = False) -> None:
        """Gives an answer on a connection, now or when there is a slot."""
        connection.exchange = exchange = MockExchange(self, connection, answer, truth)
        if queued:
            self.waiting.append(exchange)
            self.fill_slots()
        else:
            exchange.start(truth.get("received", self.now()))

    def refusal(self, request: MockRequest, headers: List[str]) -> Optional[MockAnswer]:
        """An error for a request without the token or with a field that is refused."""
        if self.options.token and request.headers.get("authorization") != f"Bearer {self.options.token}":
            return error_answer(401, "incorrect API key", ["WWW-Authenticate: Bearer", *headers], "invalid_api_key")
        for name in self.options.refuse:
            if name in request.fields:
                message = f"Unrecognized request argument supplied: {name}"
                return error_answer(400, message, headers, "unknown_parameter", name)
        return None

    def models_answer(self, headers: List[str]) -> MockAnswer:
        """The list of models."""
        listed = [{"id": name, "object": "model", "created": MOCK_CREATED, "owned_by": "mock"}
                  for name in self.options.models]
        return plain_answer(200, json.dumps({"object": "list", "data": listed}).encode(), headers)

    def fill_slots(self) -> None:
        """Starts those at the head of the line while there are slots."""
        while self.waiting and len(self.running) < self.options.slots:
            exchange = self.waiting.popleft()
            if not exchange.over:           # its client may have gone while it waited
                self.running.add(exchange)
                exchange.start(self.now())

    def finished(self, exchange: MockExchange) -> None:
        """Keeps the truth of an exchange that is over and gives its slot to the next."""
        if "request_id" in exchange.truth:
            line = json.dumps(exchange.truth) + "\n"
            self.truths.append(line)
            if self.log:
                self.log.write(line)
        if self.options.slots:
            self.running.discard(exchange)
            self.fill_slots()

    def close(self) -> None:
        """Ends everything."""
        for connection in list(self.connections):
            if connection.exchange:
                connection.exchange.close()
            connection.transport.abort()
        if self.log:
            self.log.close()


# --- running ----------------------------------------------------------------------------------------------------------

def open_mock_log(path: str) -> Optional[TextIO]:
    """The truth log, appended to a line at a time."""
    try:
        return open(path, "a", buffering=1, encoding="utf-8") if path else None
    except OSError as error:
        raise UserError(f"can't write the mock log: {error.strerror}; give another file to log") from None


async def serve_mock(options: MockOptions, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serves until cancelled; `ready` gets the base URL once connections are accepted. Port 0 takes a free one."""
    loop = asyncio.get_running_loop()
    server = MockServer(options, loop)
    try:
        listener = await loop.create_server(lambda: MockConnection(server), host, port, backlog=4096)
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: of a name with an empty or a long label
        raise UserError(f"can't listen on {host}:{port}: {error}; give another --host or --port") from None
    try:
        address = f"[{host}]" if ":" in host else host
        ready(f"http://{address}:{listener.sockets[0].getsockname()[1]}/v1")
        await asyncio.Event().wait()
    finally:
        listener.close()
        server.close()


def watch_stdin(stop: Callable[[], None]) -> None:
    """Calls `stop` when standard input ends, which it does when the parent dies, however it dies."""
    while os.read(0, 4096):
        pass
    with contextlib.suppress(RuntimeError):             # the loop may have been closed already
        stop()


async def serve_until_told(options: MockOptions, host: str, port: int, stdin_guard: bool) -> None:
    """Serves until SIGTERM, SIGINT or, with the guard, the end of standard input."""
    loop = asyncio.get_running_loop()
    serving = asyncio.ensure_future(
        serve_mock(options, host, port, lambda url: print(f"mock server on {url}", flush=True)))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, serving.cancel)
    if stdin_guard:
        stop = functools.partial(loop.call_soon_threadsafe, serving.cancel)
        threading.Thread(target=watch_stdin, args=(stop,), daemon=True).start()
    with contextlib.suppress(asyncio.CancelledError):
        await serving


def run_mock(options: MockOptions, host: str = "127.0.0.1", port: int = 0, stdin_guard: bool = False) -> int:
    """The mock command: says where it listens in one line on stdout, serves until told to stop. The exit status."""
    raise_file_limit(MOCK_OPEN_FILES)
    loop = asyncio.SelectorEventLoop(ExactSelector())
    try:
        loop.run_until_complete(serve_until_told(options, host, port, stdin_guard))
        loop.run_until_complete(asyncio.sleep(0))       # aborted connections close their sockets in the next turn
    finally:
        loop.close()
    return 0


def program_path() -> str:
    """The file to start this program from again: this module or, when it is in an archive, the archive."""
    path = os.path.abspath(__file__)
    while not os.path.isfile(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


class MockProcess:
    """The mock server in a process of its own, for the length of a `with`; `url` is its base URL, ending in /v1.

    `flags` are those of the mock command (see mock_flags). The child watches its standard input, so it never outlives
    us.
    """

    def __init__(self, flags: Sequence[str] = ()) -> None:
        self.command = [sys.executable, program_path(), "mock", "--stdin-guard", *flags]
        self.url = ""

    def __enter__(self) -> MockProcess:
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        start_new_session=True)     # Ctrl-C is for us to handle, not for the server
        try:
            self.url = self.read_url()
        except BaseException:
            self.__exit__()
            raise
        return self

    def read_url(self) -> str:
        """Waits for the line that says where the server listens."""
        output, line = self.process.stdout.fileno(), b""
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while not line.endswith(b"\n"):         # unbuffered, print writes the line end by itself
                piece = os.read(output, 4096) if selector.select(MOCK_START_TIMEOUT) else b""
                if not piece:
                    raise UserError("the built-in mock server did not start; run the mock command to see why")
                line += piece
        return line.decode().split()[-1]

    def __exit__(self, *_exception: object) -> None:
        for end in (self.process.stdin.close, self.process.terminate, self.process.kill):
            end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
                break
        self.process.stdout.close()


# ==================================================================================================
# 21. Probes: what a run needs to know before it starts, and what this host can measure
# ==================================================================================================
#
# Questions that are asked of the endpoint before anything is measured, on connections of their own that no
# figure includes. `run` asks which model to name when the user named none, answered by the first id of the
# endpoint's own list, and how the endpoint counts tokens. An endpoint that has no list, or refuses the token,
# leaves nothing to guess: that is a UserError which says which flag to give, before any directory is
# made or any prompt is sent.
# `selftest` asks what this host can measure.


async def first_model(provider: Provider, endpoint: Endpoint, network: Network) -> str:
    """The first id that the endpoint's model list has; raises UserError when there is none to be had.

    For a provider whose requests name no model, it is what the results are to call it.
    """
    target = provider.models_target(endpoint)
    if not provider.needs_model:
        return provider.name
    if not target:
        raise UserError("provider %s has no list of models; give --model" % provider.name)
    payload = sign_now(network, provider, provider.models_request(endpoint), "GET")
    try:
        head, body = await fetch(network, payload, min(30.0, provider.config.timeout))
        if head.status == 407:
            raise refused_by_proxy(head, network.route.proxy)
    except RequestError as error:
        raise UserError("GET %s failed (%s: %s); is --url right?" % (target, error.status, error)) from None
    if head.status in (401, 403):
        raise UserError("GET %s answers HTTP %d: the token is missing or refused; give --token" % (target, head.status))
    try:
        return provider.model_ids(parse_json(body))[0]
    except (ParseError, LookupError):
        raise UserError("GET %s (HTTP %d) lists no model; give --model" % (target, head.status)) from None


def fit_endpoint(
    config: Config, workload: Workload, ask: Callable[[Prompt, str], Record]
) -> Fit:
    """How the endpoint counts the tokens of our texts, by its own usage for a few probes; raises UserError."""
    least, most = target_bounds(config, workload)
    pairs = []
    for number, (chars, prompt) in enumerate(
        probe_prompts(TextMaker(config.seed), least, most, bool(config.prefix_tokens))
    ):
        record = ask(prompt, "length-%d" % number)
        if record.in_tokens is None:
            if record.status in ("ok", "empty"):
                raise UserError("the endpoint reports no usage, so prompts can't be made to a length in tokens; "
                                "give a --workload-file with texts")  # fmt: skip
            raise UserError("a probe for the length of prompts failed (%s: %s); see that a plain run works first"
                            % (record.status, record.err))  # fmt: skip
        pairs.append((chars, record.in_tokens))
    try:
        fit = fit_lengths(pairs)
    except ValueError as error:
        raise UserError("prompts can't be made to a length in tokens: %s" % error) from None
    if config.input_tokens and most < fit.least:
        raise UserError("--input-tokens %s is less than the %d tokens that every request has at this endpoint"
                        % (config.input_tokens, math.ceil(fit.least)))  # fmt: skip
    return fit


# What this host can measure. `selftest` runs against the built-in mock, which writes down when it sent
# what; the error is the client's time of the first content, or of the end, less the server's time of
# writing it, both on this machine's monotonic clock. So it holds the way through the loopback too.


class Level(NamedTuple):
    """A load of the selftest: streams, requests, and the mock's pauses."""

    streams: int
    requests: int
    mock: str


SELFTEST_LEVELS = (
    Level(1, 40, "mock:?ttft=50&itl=10&tokens=10"),
    Level(100, 400, "mock:?ttft=300&itl=25&tokens=40"),
    Level(1000, 2000, "mock:?ttft=800&itl=100&tokens=20"),
)
FLOOD = Level(32, 256, "mock:?ttft=0&itl=0&tokens=2000&batch=100")  # as fast as the mock can write
SELFTEST_FILE = "llmbench-selftest.json"


def selftest_config(level: Level, processes: int) -> Config:
    """The configuration that runs a level."""
    config = Config(model="mock", concurrency=[level.streams], total_requests=level.requests, timeout=60.0)
    config.run_id, config.processes = binascii.hexlify(os.urandom(4)).decode("ascii"), processes
    return config


def measure_error(level: Level, prompts: Sequence[Prompt]) -> Dict[str, Any]:
    """How late the client takes first contents and ends at a level: `{streams, n, first_ms, end_ms, cpu_percent}`."""
    loop, poll = new_loop()
    lines: List[Dict[str, Any]] = []
    try:
        with MockProcess(mock_flags(level.mock)) as mock:
            config = selftest_config(level, 1)
            provider = make_provider(config)
            endpoint = parse_url(mock.url, provider)
            runner = Runner(config, provider, endpoint, prompts, Part(), poll, lines.append)
            loop.run_until_complete(runner.run(plan_stages(config)))
            question = encode_request("GET", "/mock/truth", [("Host", endpoint.authority), ("Connection", "close")])
            _, body = loop.run_until_complete(fetch(Network(endpoint, config, poll), question, 30.0))
    finally:
        close_loop(loop)
    truth = {item["request_id"]: item for item in map(json.loads, body.decode("utf-8").strip().split("\n"))}
    audit = next(line["audit"] for line in lines if "audit" in line)
    done = [line for line in lines if line.get("status") == "ok"]
    begun = [(line, truth[line["request_id"]], runner.zero * 1000.0 + line["start_ms"]) for line in done]
    return {
        "streams": level.streams,
        "n": len(done),
        "first_ms": describe([start + line["ttft_ms"] - sent["first"] * 1000.0 for line, sent, start in begun]),
        "end_ms": describe([start + line["latency_ms"] - sent["end"] * 1000.0 for line, sent, start in begun]),
        "cpu_percent": audit["cpu_percent"],
    }


def measure_capacity(processes: int, prompts: Sequence[Prompt]) -> Dict[str, Any]:
    """Events a second that so many processes take in: `{processes, events_per_s, cpu_percent}` (of the busiest)."""
    import tempfile

    loop, _ = new_loop()
    config = selftest_config(FLOOD, processes)
    try:
        with tempfile.TemporaryDirectory() as directory, MockProcess(mock_flags(FLOOD.mock)) as mock:
            opener = functools.partial(ResultsWriter, directory)
            parts = [Part(process=number, processes=processes) for number in range(processes)]
            plans = [WorkerPlan(config, mock.url, prompts, part, clock(), opener) for part in parts]
            crew = Crew(plans, plan_stages(config), Progress())
            try:
                crew.start()
                loop.run_until_complete(crew.run())
            finally:
                crew.kill()  # none are left but after Ctrl-C
            lines = list(read_lines(os.path.join(directory, RESULTS), lambda _: None))
    finally:
        close_loop(loop)
    audits = [line["audit"] for line in lines if "audit" in line]
    events = sum(line.get("chunks", 0) for line in lines)
    return {
        "processes": processes,
        "events_per_s": round(events / max(audit["wall_ms"] for audit in audits) * 1000.0),
        "cpu_percent": max(audit["cpu_percent"] for audit in audits),
    }


def selftest(prompts: Sequence[Prompt], tell: Callable[[str], None]) -> Dict[str, Any]:
    """What this host can measure: `{host, tool_version, at, errors: […], capacity: […]}`."""
    errors = []
    for level in SELFTEST_LEVELS:
        tell("selftest: streams: %d" % level.streams)
        errors.append(measure_error(level, prompts))
    capacity = []
    for processes in sorted({1, usable_cpus()}):
        tell("selftest: capacity, processes: %d" % processes)
        capacity.append(measure_capacity(processes, prompts))
    return {
        "host": socket.gethostname(),
        "tool_version": __version__,
        "at": iso_time(time.time()),
        "errors": errors,
        "capacity": capacity,
    }


def find_selftest(host: str) -> Optional[Dict[str, Any]]:
    """The result of an earlier selftest of this host, from the working directory or beside the program."""
    for directory in (os.getcwd(), os.path.dirname(program_path())):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            with open(os.path.join(directory, SELFTEST_FILE), encoding="utf-8") as file:
                found = json.load(file)
            if found["host"] == host and is_selftest(found):
                return found
    return None


# ==================================================================================================
# 22. Check: what an endpoint and the way to it are like
# ==================================================================================================
#
# What an endpoint is like, before anything is measured: `check`. Each thing that is looked at is a step,
# and gives a finding: ok; warning, where a run works but some of its figures are not what they seem; or
# failed, where a run can't succeed. A finding is a key and values. Its texts stand in assets/texts as
# `check.STEP.KEY`, and what to do about it as `check.do.KEY`, so a finding is data for `--json` too.
#
# The way is walked step by step (DNS, TCP, proxy, TLS), and ends where it can't go on. A certificate that
# is refused is read all the same, on a connection over which nothing is sent: who signed it is the
# question. Then come at most five requests, each on the connection of the one before it if that is open:
#   models   the list of models, with the token
#   stream   a chat that is long enough to tell whether it is streamed; asked again without a field of ours
#            that the endpoint refuses
#   exact    an answer of so many tokens, by ignore_eos and min_tokens
#   tool     a question that a tool answers
#   kept     the list once more: whether the connection lasts
# What they say is judged by functions of the answers alone, without socket and clock.


class Finding(NamedTuple):
    """What a step came to (ok, warning or failed), the keys of its two texts ("": nothing to do), and their values."""

    step: str
    state: str
    key: str
    remedy: str
    values: Dict[str, Any]


def fine(step: str, key: str, remedy: str = "", **values: Any) -> Finding:
    """A finding that is as it should be."""
    return Finding(step, "ok", key, remedy, values)


def doubtful(step: str, key: str, remedy: str = "", **values: Any) -> Finding:
    """A finding with which a run works, but not every figure is what it seems."""
    return Finding(step, "warning", key, remedy, values)


def failing(step: str, key: str, remedy: str = "", **values: Any) -> Finding:
    """A finding with which a run can't succeed."""
    return Finding(step, "failed", key, remedy, values)


# Certificates, as far as a reader of the findings wants to know them. `ssl` tells what is in one only
# after it has verified it, so this reads the DER itself (X.690; RFC 5280 section 4.1).


class Certificate(NamedTuple):
    """A certificate: whose it is and who signed it (`CN, O, OU`), what it is for, and its times (s since 1970)."""

    subject: str
    issuer: str
    names: List[str]
    begins: float
    ends: float


DER_NAMES = {b"\x55\x04\x03": 0, b"\x55\x04\x0a": 1, b"\x55\x04\x0b": 2}  # common name, organisation, unit
DER_ALTERNATIVE_NAMES = b"\x55\x1d\x11"


def read_der(data: bytes) -> List[Tuple[int, bytes]]:
    """The (tag, content) pairs of which some DER consists; raises ParseError."""
    items, at = [], 0
    while at < len(data):
        if len(data) < at + 2:
            raise ParseError("a certificate that is cut")
        tag, size, begin = data[at], data[at + 1], at + 2
        if size & 128:
            begin += size & 127
            size = int.from_bytes(data[at + 2 : begin], "big")
        at = begin + size
        if at > len(data):
            raise ParseError("a certificate that is cut")
        items.append((tag, data[begin:at]))
    return items


def der_name(content: bytes) -> str:
    """A distinguished name as `common name, organisation, unit`, each that there is."""
    parts: Dict[int, str] = {}
    for _, attributes in read_der(content):
        for _, attribute in read_der(attributes):
            (_, kind), (tag, text) = read_der(attribute)[:2]
            if kind in DER_NAMES:
                parts.setdefault(DER_NAMES[kind], text.decode("utf-16-be" if tag == 0x1E else "utf-8", "replace"))
    return ", ".join(dict.fromkeys(parts[place] for place in sorted(parts)))


def der_time(tag: int, content: bytes) -> float:
    """A UTCTime (0x17), whose years run from 1950 to 2049, or a GeneralizedTime."""
    text = content.decode("ascii")
    if tag == 0x17:
        text = ("20" if text < "5" else "19") + text
    moment = datetime.datetime.strptime(text, "%Y%m%d%H%M%SZ")
    return moment.replace(tzinfo=datetime.timezone.utc).timestamp()


def der_alternative_names(extensions: bytes) -> List[str]:
    """The host names and addresses that a certificate is for."""
    for _, extension in read_der(read_der(extensions)[0][1]):
        parts = read_der(extension)
        if parts[0][1] == DER_ALTERNATIVE_NAMES:
            found = read_der(read_der(parts[-1][1])[0][1])
            hosts = [text.decode("ascii", "replace") for tag, text in found if tag == 0x82]
            addresses = [text for tag, text in found if tag == 0x87 and len(text) in (4, 16)]
            family = {4: socket.AF_INET, 16: socket.AF_INET6}
            return hosts + [socket.inet_ntop(family[len(text)], text) for text in addresses]
    return []


def read_certificate(data: bytes) -> Certificate:
    """A certificate from its DER; raises ParseError."""
    try:
        fields = read_der(read_der(read_der(data)[0][1])[0][1])
        if fields[0][0] == 0xA0:  # the version, which the first version leaves out
            del fields[0]
        begins, ends = (der_time(*moment) for moment in read_der(fields[3][1]))
        extensions = next((content for tag, content in fields if tag == 0xA3), b"")
        names = der_alternative_names(extensions) if extensions else []
        return Certificate(der_name(fields[4][1]), der_name(fields[2][1]), names, begins, ends)
    except (LookupError, ValueError, OverflowError):
        raise ParseError("not a certificate") from None


def peer_chain(tls: Any) -> List[bytes]:
    """What the peer sent, its own certificate first, as DER: all of it from Python 3.10 on, before that its own."""
    public = getattr(tls, "get_unverified_chain", None)  # Python 3.13
    if public is not None:
        return list(public())
    private = getattr(getattr(tls, "_sslobj", None), "get_unverified_chain", None)
    if private is not None:
        return [certificate.public_bytes(2) for certificate in private() or ()]  # 2: _ssl.ENCODING_DER
    own = tls.getpeercert(binary_form=True)
    return [own] if own else []


# Products that open TLS on the way sign with a CA of their own: what its name holds, and who that is.
INTERCEPTORS = {
    "zscaler": "Zscaler", "netskope": "Netskope", "goskope": "Netskope", "bluecoat": "Blue Coat ProxySG",
    "blue coat": "Blue Coat ProxySG", "palo alto": "Palo Alto Networks", "fortinet": "Fortinet FortiGate",
    "fortigate": "Fortinet FortiGate", "check point": "Check Point", "cisco umbrella": "Cisco Umbrella",
    "opendns": "Cisco Umbrella", "ironport": "Cisco IronPort", "mcafee web": "McAfee Web Gateway",
    "skyhigh": "Skyhigh Web Gateway", "sophos": "Sophos", "forcepoint": "Forcepoint", "websense": "Forcepoint",
    "barracuda": "Barracuda", "sangfor": "Sangfor", "深信服": "Sangfor", "qianxin": "QiAnXin", "奇安信": "QiAnXin",
    "hillstone": "Hillstone", "nsfocus": "NSFOCUS", "topsec": "Topsec", "天融信": "Topsec", "menlo security": "Menlo",
    "iboss": "iboss", "watchguard": "WatchGuard", "sonicwall": "SonicWall", "cloudflare gateway": "Cloudflare Gateway",
    "gateway ca - cloudflare": "Cloudflare Gateway", "mitmproxy": "mitmproxy", "charles proxy": "Charles",
    "do_not_trust_fiddler": "Fiddler", "portswigger": "Burp Suite", "squid": "Squid", "kaspersky": "Kaspersky",
    "eset ssl": "ESET", "avast": "Avast", "bitdefender": "Bitdefender", "smoothwall": "Smoothwall",
    "untangle": "Untangle", "trend micro": "Trend Micro", "contentkeeper": "ContentKeeper", "lightspeed": "Lightspeed",
}  # fmt: skip
# Who signs for the public, by a part of the name: with anybody else it is a company's own CA, or a proxy's.
PUBLIC_CAS = (
    "digicert", "let's encrypt", "internet security research group", "sectigo", "comodo", "usertrust", "globalsign",
    "godaddy", "starfield", "entrust", "amazon", "google trust services", "microsoft corporation", "trustasia",
    "wotrus", "cfca", "china financial certification", "geotrust", "rapidssl", "thawte", "certum", "asseco",
    "swisssign", "buypass", "zerossl", "ssl corporation", "ssl.com", "actalis", "harica", "quovadis", "identrust",
    "cloudflare, inc", "apple inc", "secom", "telia", "d-trust", "deutsche telekom", "t-systems", "certigna",
    "e-tugra", "twca", "taiwan-ca", "chunghwa telecom", "bjca", "beijing certificate authority", "unitrust", "sheca",
    "gdca", "global digital cybersecurity", "itruschina", "vtrus", "ssltrus", "encryption everywhere", "naver",
    "hongkong post", "cybertrust", "baltimore", "verisign", "network solutions", "trustcor", "izenpe",
)  # fmt: skip


def names_interceptor(chain: Sequence[Certificate]) -> str:
    """Which product that opens TLS signed one of these certificates, "" when none is known to have."""
    signers = " / ".join(certificate.issuer for certificate in chain).lower()
    return next((product for part, product in INTERCEPTORS.items() if part in signers), "")


def is_public_ca(chain: Sequence[Certificate]) -> bool:
    """Whether a well-known public CA signed, as far as names tell."""
    signers = " / ".join(certificate.issuer for certificate in chain).lower()
    return any(name in signers for name in PUBLIC_CAS)


def is_private_address(address: str) -> bool:
    """Whether an address as `show_address` writes it is of a network that is not the internet."""
    import ipaddress

    host = address.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return True  # a Unix socket


EXPIRES_SOON = 14.0  # days


class Handshake(NamedTuple):
    """What TLS came to: version and cipher, the chain, whether it was verified, and why it was refused ("" if not)."""

    version: str
    cipher: str
    chain: List[Certificate]
    verified: bool
    refused: str
    seconds: float


def tls_cause(handshake: Handshake, now: float) -> str:
    """Why a certificate is refused, as the key of what to do."""
    leaf = handshake.chain[0]
    if "mismatch" in handshake.refused or "not valid for" in handshake.refused or "doesn't match" in handshake.refused:
        return "name"
    if leaf.ends < now:
        return "expired"
    if leaf.begins > now:
        return "not_yet"
    if names_interceptor(handshake.chain):
        return "interceptor_ca"
    if re.search("self.signed certificate$", handshake.refused):  # not `… in certificate chain`
        return "self_signed"
    if len(handshake.chain) == 1 and is_public_ca(handshake.chain):
        return "intermediate"
    return "private_ca"


def chain_text(chain: Sequence[Certificate]) -> str:
    """Who signed whom, in one line: `*.corp.example < Corp Issuing CA, Corp < Corp Root, Corp`."""
    names = [certificate.subject for certificate in chain] + [chain[-1].issuer]
    if len(chain) > 1 and names[-1] == names[-2]:  # the root was sent, too
        names.pop()
    return " < ".join(name or "?" for name in names)


def tls_finding(handshake: Handshake, now: float, config: Config, private: bool) -> Finding:
    """What is to be said of TLS. private: whether the endpoint has an address that is not of the internet."""
    if not handshake.chain:
        return failing("tls", "refused", "", err=handshake.refused)
    leaf = handshake.chain[0]
    product = names_interceptor(handshake.chain)
    days = (leaf.ends - now) / 86400.0
    values = {
        "version": handshake.version, "cipher": handshake.cipher, "ms": handshake.seconds * 1000.0, "days": days,
        "names": few_of(leaf.names or [leaf.subject]), "issuer": leaf.issuer, "chain": chain_text(handshake.chain),
        "product": product, "err": handshake.refused,
    }  # fmt: skip
    if handshake.refused:
        return failing("tls", "distrusted", tls_cause(handshake, now), **values)
    if product:
        return doubtful("tls", "intercepted", "interceptor", **values)
    if not handshake.verified:
        return doubtful("tls", "unverified", "insecure", **values)
    if days < EXPIRES_SOON:
        return doubtful("tls", "expiring", "expiring", **values)
    if config.ca_cert or is_public_ca(handshake.chain):
        return fine("tls", "own_ca" if config.ca_cert else "public_ca", **values)
    if private:
        return fine("tls", "private_ca", **values)
    return doubtful("tls", "unknown_ca", "unknown_ca", **values)


# The way to the endpoint.


def dns_finding(network: Network, addresses: Sequence[Any], seconds: float, fixed: bool) -> Finding:
    """Where the name leads."""
    shown = [show_address(found[4]) for found in addresses]
    if network.endpoint.unix is not None:
        return fine("dns", "unix")
    values = {"addresses": few_of([text.rpartition(":")[0] for text in shown]), "ms": seconds * 1000.0,
              "host": network.endpoint.host if network.route.proxy is None else network.route.proxy.host}  # fmt: skip
    if fixed:
        return fine("dns", "fixed", **values)
    if values["addresses"].strip("[]") == values["host"]:
        return fine("dns", "literal", **values)
    return fine("dns", "found" if network.route.proxy is None else "found_proxy", **values)


WAY_REASONS = {"no proxy variable is set": "unset", "loopback": "loopback", "a Unix socket": "unix",
               "the built-in mock": "mock"}  # fmt: skip


def proxy_finding(route: Route, seconds: float, tunnelled: bool) -> Finding:
    """Whether a proxy is used, and why."""
    if route.proxy is None:
        if route.reason in WAY_REASONS:
            return fine("proxy", "none_" + WAY_REASONS[route.reason])
        return fine("proxy", "none", reason=route.reason)
    values = {"proxy": route.proxy.url, "reason": route.reason, "ms": seconds * 1000.0}
    return fine("proxy", "tunnel", **values) if tunnelled else fine("proxy", "absolute", "proxy_between", **values)


def unreached(step: str, error: RequestError) -> Finding:
    """A step on which the way ended."""
    text = str(error)
    known = {
        "dns": (("", "dns"),),
        "tcp": (("refused", "refused"), ("time-out", "silent"), ("", "unreachable")),
        "proxy": (("HTTP 407", "proxy_password"), ("", "proxy")),
        "tls": (("does not speak TLS", "plain_http"), ("client certificate", "client_cert"),
                ("time-out", "plain_http"), ("", "")),
        "http": (("", "not_http"),),
    }
    return failing(step, "failed", next(remedy for part, remedy in known[step] if part in text), err=text)


# What the answers say. A `Reply` holds all that is known of one request.


class Witness(Exchange):
    """An exchange that keeps its first events, each with the time of its arrival."""

    MOST = 10_000  # events; a check asks for an answer of some dozens of tokens

    def __init__(self, provider: Provider, on_done: Callable[[], None]) -> None:
        super().__init__(provider, {}, on_done)
        self.events: List[Tuple[float, Event]] = []

    def _take_run(self, texts: Sequence[bytes], stamp: float) -> None:
        self._keep(map(self.decoder.event, texts), stamp)
        super()._take_run(texts, stamp)

    def _take(self, events: Sequence[Event], stamp: float, run: Sequence[bytes] = ()) -> None:
        self._keep(map(self.decoder.event, run), stamp)
        self._keep(events, stamp)
        super()._take(events, stamp, run)

    def _keep(self, events: Iterable[Event], stamp: float) -> None:
        room = self.MOST - len(self.events)
        self.events += [(stamp, event) for event in itertools.islice(events, max(0, room))]


class Listing(Exchange):
    """An exchange whose answer is a document, kept as it is in `whole`."""

    def __init__(self, provider: Provider, on_done: Callable[[], None]) -> None:
        super().__init__(provider, {}, on_done)
        self.stream = False
        self._consume = self._collect

    def _take_whole(self, stamp: float) -> None:
        self.finish("ok", None, stamp)


class Reply(NamedTuple):
    """One request and what came of it. sent, headed: s since 1970; headed: when its head was there, or it was given up.

    reused: on a connection that had carried another. kept: the connection may carry one more.
    """

    name: str
    status: str
    err: str
    head: Optional[Head]
    body: bytes
    sent: float
    headed: float
    reused: bool
    kept: bool
    witness: Optional[Witness] = None

    @property
    def code(self) -> int:
        """The HTTP status, 0 when there was no head."""
        return self.head.status if self.head is not None else 0

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of the answer, names in lower case."""
        return self.head.headers if self.head is not None else {}


def refusal_remedy(reply: Reply) -> str:
    """What to do about an answer that is none, as a key."""
    said = reply.err.lower()
    if "client certificate" in said or "ssl certificate was sent" in said or "ssl certificate error" in said:
        return "client_cert"
    if reply.code in (301, 302, 303, 307, 308):
        return "redirect"
    if reply.code == 404:
        return "model_unknown" if "model" in said else "path"
    if reply.code in (502, 503, 504):
        return "upstream"
    if reply.code == 429:
        return "rate_limited" if "retry-after" in reply.headers else "rate_limited_blind"
    by_code = {400: "bad_request", 405: "path", 407: "proxy_password", 413: "too_large", 422: "bad_request"}
    by_status = {"timeout": "slow", "parse_error": "not_http", "truncated": "cut", "empty": "empty",
                 "stream_error": "server_log"}  # fmt: skip
    return by_code.get(reply.code) or by_status.get(reply.status) or ("server_log" if reply.code >= 500 else "")


def http_finding(reply: Reply) -> Finding:
    """Whether the endpoint answers, and what it says if not as it should."""
    kind = reply.headers.get("content-type", "").partition(";")[0]
    values = {"code": reply.code, "type": kind, "server": reply.headers.get("server", ""), "err": reply.err,
              "version": "HTTP/1.%d" % reply.head.minor if reply.head is not None else ""}  # fmt: skip
    if reply.head is None:
        return failing("http", "silent", refusal_remedy(reply), **values)
    endless = reply.status == "truncated" and reply.witness is not None and reply.witness.chunks > 0
    if reply.status in ("ok", "auth_error") or endless:
        return fine("http", "answers" if values["server"] else "answers_nameless", **values)
    return failing("http", "refuses", refusal_remedy(reply), wait=reply.headers.get("retry-after", ""), **values)


def token_trouble(token: str) -> str:
    """What is odd about a token, as the key of what to do."""
    if re.match(r"(?i)bearer\s", token):
        return "token_bearer"
    if token[:1] in "'\"" or token[-1:] in "'\"":
        return "token_quotes"
    return "token_blank" if re.search(r"\s|[^\x20-\x7e]", token) else ""


def who_asks(provider: Provider, endpoint: Endpoint) -> str:
    """How a request says who asks, as the key of a finding: token, scheme, password, header or none."""
    if any(is_secret_name(line.partition(":")[0]) for line in provider.config.header):
        return "header"
    if type(provider.auth) is not Auth:
        return "token" if provider.auth.name in ("bearer", "api-key") else "scheme"
    return "password" if endpoint.userinfo is not None else "none"


def auth_finding(reply: Reply, provider: Provider, endpoint: Endpoint, source: str) -> Finding:
    """Whether the endpoint takes who we say we are. source: where the token came from."""
    token, sent = provider.config.token, who_asks(provider, endpoint)
    values = {"code": reply.code, "err": reply.err, "length": len(token), "source": source,
              "scheme": provider.auth.name}  # fmt: skip
    if reply.status != "auth_error":
        return fine("auth", "taken_" + sent, **values)
    remedies = {"none": "no_token", "scheme": "signature"}
    remedy = token_trouble(token) if sent == "token" else ""
    if not remedy and reply.code == 403 and sent != "none":
        remedy = "forbidden"
    return failing("auth", "refused_" + sent, remedy or remedies.get(sent, "token"), **values)


def listed_models(reply: Reply, provider: Provider) -> List[str]:
    """The ids of a model list; none when the answer is no such list."""
    try:
        return provider.model_ids(parse_json(reply.body))
    except ParseError:
        return []


def models_finding(reply: Reply, names: Sequence[str], wanted: str) -> Finding:
    """Whether the model is in the list. wanted: the model that the user named, "" for none."""
    values = {"code": reply.code, "err": reply.err, "model": wanted or "".join(names[:1]), "count": len(names),
              "models": few_of(names)}  # fmt: skip
    if not names:
        # A token that is refused is told where it is judged.
        state, remedy = (doubtful, "") if wanted or reply.status == "auth_error" else (failing, "model")
        key = "none" if reply.status == "ok" else "silent" if reply.head is None else "refused"
        return state("models", key, remedy, **values)
    if not wanted:
        return fine("models", "first" if len(names) > 1 else "only", **values)
    if wanted in names:
        return fine("models", "listed", **values)
    return doubtful("models", "unlisted", "model_unknown", **values)


BURST_FRAMES = 8  # fewer tell nothing
BURST_GAP = 0.005  # s: what is further apart came separately
BURST_PAUSE = 0.02  # s between bursts that no model's own rhythm explains, with several frames in each


def arrival_pattern(times: Sequence[float], start: float, end: float) -> Tuple[str, Dict[str, Any]]:
    """How output frames came: `few` (too few to tell), `streamed`, `burst` (all at once), `blocks` (in several)."""
    gaps = [after - before for before, after in zip(times, times[1:])]
    values: Dict[str, Any] = {"frames": len(times)}
    if times:
        values.update(after=(times[0] - start) * 1000.0, spread=(times[-1] - times[0]) * 1000.0)
    if len(times) < BURST_FRAMES:
        return "few", values
    values["gap"] = middle_of(gaps) * 1000.0
    quick = sum(gap <= 0.001 for gap in gaps)
    if times[-1] - times[0] < 0.05 * (end - start) and quick >= 0.9 * len(gaps):
        return "burst", values
    pauses = [gap for gap in gaps if gap > BURST_GAP]
    values.update(bursts=len(pauses) + 1, each=len(times) / (len(pauses) + 1.0))
    if pauses and values["each"] >= 4 and middle_of(pauses) >= BURST_PAUSE:
        values["pause"] = middle_of(pauses) * 1000.0
        return "blocks", values
    return "streamed", values


def stream_finding(reply: Reply) -> Finding:
    """Whether what is generated comes as it is generated."""
    witness = reply.witness
    assert witness is not None, "asked as a stream"
    if not witness.provider.streams:
        return fine("stream", "unwanted")
    if not witness.stream:
        return doubtful("stream", "whole", "whole", type=reply.headers.get("content-type", "?"))
    end = witness.end_at or witness.arrived
    opened = witness.events[0][0] - witness.start if witness.events else 0.0
    pattern, values = arrival_pattern(witness.chunk_times or (), witness.start, end)
    coding = reply.headers.get("content-encoding", "identity").lower()
    values["buffering"] = reply.headers.get("x-accel-buffering", "")
    values["coding"] = coding
    if pattern == "burst" and values["after"] / 1000.0 - opened > BURST_PAUSE:
        return doubtful("stream", "at_once", "at_once", **values)  # a frame without text was let through before
    if pattern in ("burst", "blocks"):
        return doubtful("stream", pattern, "gzip" if coding != "identity" else "buffering", **values)
    if coding != "identity":
        return doubtful("stream", "packed", "gzip", **values)
    if pattern == "few":
        return doubtful("stream", "few", "few", **values)
    return fine("stream", "accel" if values["buffering"] else "streamed", **values)


class Heard(NamedTuple):
    """One event of a stream: when it came, its JSON (None: it is none), and the kinds and texts of its frames."""

    at: float
    tree: Any
    frames: List[Frame]

    @property
    def speaks(self) -> bool:
        """Whether it carries any output."""
        return any(frame.kind in OUTPUT_KINDS for frame in self.frames)


def read_again(witness: Witness) -> List[Heard]:
    """The events of a stream, each in full."""
    decoder, said = witness.provider.decoder(), []
    for at, event in witness.events:
        tree, frames = None, []  # type: Any, List[Frame]
        with contextlib.suppress(ParseError):
            frames = decoder.frames(event)
            tree = parse_json(event[1]) if event[1].strip() != DONE else None
        said.append(Heard(at, tree, frames))
    return said


def path_of(tree: Any, wanted: Callable[[str, Any], bool], path: str = "") -> str:
    """Where in some JSON stands what is wanted, asked by key and value: `choices.0.delta.content`; "" for nowhere.

    >>> path_of({"a": [{"b": 1, "c": "x"}]}, lambda key, value: value == "x")
    'a.0.c'
    """
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        here = "%s.%s" % (path, key) if path else str(key)
        if not isinstance(value, (dict, list)) and wanted(str(key), value):
            return here
        found = path_of(value, wanted, here)
        if found:
            return found
    return ""


def first_finding(said: Sequence[Heard]) -> Finding:
    """What stands before the first output: a frame with the role alone is not the first token."""
    before = list(itertools.takewhile(lambda event: not event.speaks, said))
    if len(before) == len(said):
        return doubtful("first", "none", "reasoning_only")
    if not before:
        return fine("first", "text")
    role = path_of(before[0].tree, lambda key, value: key == "role")
    ms = (said[len(before)].at - before[0].at) * 1000.0
    return fine("first", "role" if role else "meta", count=len(before), ms=ms)


def reasoning_finding(witness: Witness, said: Sequence[Heard]) -> Finding:
    """Where reasoning stands, and whether anything else came."""
    pieces = ((event.tree, frame.text) for event in said for frame in event.frames if frame.kind == "reasoning")
    tree, text = next(pieces, (None, ""))
    path = path_of(tree, lambda _, value: value == text) if text else ""
    values = {"path": path, "chars": witness.reasoning_chars}
    if not witness.reasoning_chars:
        return fine("reasoning", "none")
    if witness.content_at is None:
        return doubtful("reasoning", "only", "reasoning_only", **values)
    if not text:
        return fine("reasoning", "tags", **values)
    return fine("reasoning", "field", **values)


def frames_finding(witness: Witness) -> Finding:
    """How many tokens a frame holds."""
    tokens = witness.usage.get("out_tokens")
    if not tokens or not witness.chunks:
        return fine("frames", "unknown", frames=witness.chunks)
    if not witness.reasoning_chars:
        tokens -= witness.usage.get("reasoning_tokens", 0)
    each = tokens / witness.chunks
    return fine("frames", "several" if each >= 1.5 else "single", tokens=tokens, frames=witness.chunks, each=each)


def usage_finding(witness: Witness, said: Sequence[Heard], notes: Sequence[str]) -> Finding:
    """Whether the endpoint counts its tokens, and where it says so."""
    tokens = witness.usage.get("out_tokens")
    holders = [event for event in said if any(frame.kind == "usage" for frame in event.frames)]
    if not witness.stream and tokens:
        return fine("usage", "whole", tokens=tokens, prompt=witness.usage.get("in_tokens", "?"))
    if not holders or not tokens:
        return doubtful("usage", "none", "usage", notes="; ".join(notes))
    last = holders[-1]
    path = path_of(last.tree, lambda key, value: value == tokens and not isinstance(value, bool)
                   and re.search("token|count", key.lower()) is not None)  # fmt: skip
    values = {"path": path or "?", "tokens": tokens, "prompt": witness.usage.get("in_tokens", "?"),
              "count": len(holders), "events": len(said), "cached": witness.usage.get("cached_tokens", 0)}  # fmt: skip
    if len(holders) > 1:
        return fine("usage", "repeated", **values)
    if any(frame.kind == "end" for frame in last.frames):
        return fine("usage", "finish", **values)
    return fine("usage", "own", **values)


def end_finding(witness: Witness, said: Sequence[Heard]) -> Finding:
    """What marks the end of a stream."""
    done = any(frame.kind == "end" and not frame.text for event in said for frame in event.frames)
    values = {"reason": witness.finish_reason or "", "err": witness.err or ""}
    if witness.status == "truncated":
        return doubtful("end", "missing", "end_optional", **values)
    if not witness.stream:
        return fine("end", "whole", **values)
    if witness.finish_reason:
        return fine("end", "both" if done else "finish", **values)
    return fine("end", "marker" if done else "close", **values)


def limit_finding(witness: Witness, dialect: Dialect, asked: int) -> Finding:
    """How the longest answer is asked for, and whether that holds."""
    tokens = witness.usage.get("out_tokens")
    values = {"field": dialect.max_tokens_field, "asked": asked, "tokens": tokens or 0,
              "notes": "; ".join(dialect.notes)}  # fmt: skip
    if tokens is not None and tokens > asked:
        return doubtful("max_tokens", "exceeded", "exceeded", **values)
    if dialect.notes:
        return fine("max_tokens", "negotiated", **values)
    return fine("max_tokens", "taken", **values)


def is_refusal(reply: Reply) -> bool:
    """Whether an endpoint that answers other requests refused what this one asked for."""
    return 400 <= reply.code < 500 and reply.code not in (401, 403, 407, 408, 429)


def exact_finding(reply: Reply, asked: int, fields: Sequence[str]) -> Finding:
    """Whether answers can be had at a length of our choice."""
    witness = reply.witness
    tokens = witness.usage.get("out_tokens") if witness is not None else None
    values = {"asked": asked, "tokens": tokens or 0, "err": reply.err, "fields": ", ".join(fields)}
    if is_refusal(reply):
        return doubtful("exact", "refused", "exact", **values)
    if reply.status != "ok":
        return doubtful("exact", "failed", "server_log", **values)
    if tokens is None:
        return doubtful("exact", "uncounted", "exact", **values)
    if tokens == asked:
        return fine("exact", "obeyed", **values)
    return doubtful("exact", "ignored", "exact", **values)


def tool_finding(reply: Reply) -> Finding:
    """Whether a question with a tool is answered with a call."""
    witness = reply.witness
    if is_refusal(reply):
        return doubtful("tool", "refused", "tool", err=reply.err)
    if reply.status != "ok" or witness is None:
        return doubtful("tool", "failed", "server_log", err=reply.err)
    kinds = [frame.kind for event in read_again(witness) for frame in event.frames]
    if "tool" in kinds or witness.tool_at is not None:
        return fine("tool", "called", pieces=max(1, kinds.count("tool")))
    if witness.finish_reason in ("tool_calls", "function_call"):
        return fine("tool", "called", pieces=1)
    return doubtful("tool", "text", "tool_text", chars=witness.chars)


def kept_finding(replies: Sequence[Reply]) -> Finding:
    """Whether connections last, and how long they may be idle."""
    heard = [reply for reply in replies if reply.head is not None]
    idle = next((reply.headers["keep-alive"] for reply in heard if "keep-alive" in reply.headers), "")
    found = re.search(r"timeout=([0-9]+)", idle)
    most = re.search(r"max=([0-9]+)", idle)
    row = longest = 0  # how many requests in a row one connection carried
    for reply in heard:
        row = row + 1 if reply.reused else 1
        longest = max(longest, row)
    values = {"count": longest, "timeout": found.group(1) if found else "", "most": most.group(1) if most else "",
              "answers": len(heard)}  # fmt: skip
    closed = [reply for reply in heard if not reply.kept]
    if not heard or (len(heard) == 1 and not closed):
        return fine("kept", "unknown", **values)
    if longest == 1:
        return doubtful("kept", "closed", "closed", **values)
    if any(reply.headers.get("connection", "").lower() == "close" and not is_refusal(reply) for reply in closed):
        return doubtful("kept", "counted", "counted", **values)
    return fine("kept", "timeout" if found else "kept", **values)


RATE_HEADER = re.compile(r"^(x-ratelimit-|ratelimit|anthropic-ratelimit-|x-rate-limit-|retry-after)")


def rates_finding(replies: Sequence[Reply]) -> Finding:
    """What headers say of rate limits."""
    found: Dict[str, str] = {}
    for reply in replies:
        found.update((name, value) for name, value in reply.headers.items() if RATE_HEADER.match(name))
    shown = few_of(["%s: %s" % pair for pair in sorted(found.items())], 12)
    limited = next((reply for reply in replies if reply.code == 429), None)
    if limited is not None:
        wait = limited.headers.get("retry-after", "")
        return doubtful("rates", "limited", refusal_remedy(limited), headers=shown or "-", wait=wait)
    if not found:
        return fine("rates", "none")
    spent = any("remaining" in name and re.match(r"^0+$", value.strip()) for name, value in found.items())
    return doubtful("rates", "spent", "spent", headers=shown) if spent else fine("rates", "told", headers=shown)


CLOCK_LIMIT = 5.0  # s; what is signed is refused from 60 to 900 s on, by vendor


def clock_finding(replies: Sequence[Reply]) -> Finding:
    """How far this host's clock is from the endpoint's, by a header that tells whole seconds."""
    for reply in replies:
        date = read_http_date(reply.headers.get("date", ""))
        if date is not None:
            early, late = date - reply.headed, date + 1.0 - reply.sent  # the bounds of theirs less ours
            skew = early if early > 0 else min(0.0, late)
            if abs(skew) <= CLOCK_LIMIT:
                return fine("clock", "right", seconds=max(1.0, abs(skew)))
            return doubtful("clock", "behind" if skew > 0 else "ahead", "clock", seconds=abs(skew))
    return fine("clock", "unknown")


# This host.


def files_finding(limits: Optional[Tuple[int, int]]) -> Finding:
    """How many streams the limit of open files leaves room for. limits: soft and hard, -1 for none."""
    if limits is None:
        return fine("files", "unknown")
    soft, hard = limits
    if hard < 0:
        return fine("files", "unlimited", soft=soft)
    values = {"soft": soft, "hard": hard, "streams": max(1, hard - 64)}
    return fine("files", "room", **values) if hard >= 1024 + 64 else doubtful("files", "narrow", "files", **values)


def cpu_finding(usable: int, quota: Optional[float], present: int) -> Finding:
    """How much CPU this process may use."""
    values = {"usable": usable, "quota": quota or 0.0, "present": present}
    if quota is None:
        return fine("cpu", "usable", **values)
    return doubtful("cpu", "narrow", "cpu", **values) if quota < 1.0 else fine("cpu", "quota", **values)


def open_file_limits() -> Optional[Tuple[int, int]]:
    """Soft and hard limit of open files, -1 for none; None where the system has no such thing."""
    try:
        import resource
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    return (-1 if soft == unlimited else soft), (-1 if hard == unlimited else hard)


def host_findings() -> List[Finding]:
    """What this host leaves a run."""
    return [files_finding(open_file_limits()), cpu_finding(usable_cpus(), cpu_quota(), os.cpu_count() or 1)]


# The requests.

MOST_REQUESTS = 5
STREAM_TOKENS = 64  # enough frames to see a rhythm
EXACT_TOKENS = 24
TOOL_TOKENS = 128
QUESTIONS = {
    "stream": "Count from 1 to 60 in words, one number per line, and write nothing else.",
    "exact": "Say the word hello once, and nothing else.",
    "tool": "What is the weather in Paris right now? Use the tool.",
}
WEATHER = {
    "name": "get_weather",
    "description": "The current weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
OPENAI_TOOL = {"tools": [{"type": "function", "function": WEATHER}]}
# How each dialect is told of a tool; where it isn't known, none is asked for.
TOOL_FIELDS: Dict[str, Dict[str, Any]] = {
    "openai": OPENAI_TOOL, "azure": OPENAI_TOOL, "baidu": OPENAI_TOOL, "ollama": OPENAI_TOOL,
    "aliyun": {"parameters": OPENAI_TOOL},
    "responses": {"tools": [{"type": "function", **WEATHER}]},
    "gemini": {"tools": [{"functionDeclarations": [WEATHER]}]},
    "anthropic": {"tools": [{"name": WEATHER["name"], "description": WEATHER["description"],
                             "input_schema": WEATHER["parameters"]}]},
}  # fmt: skip


class Explained(NamedTuple):
    """A request as it was signed: which of the five, its method, and what `Provider.signed` says of it."""

    name: str
    method: str
    signed: Signed


class Preflight:
    """A check under way: the connection it has, the answers it got, and what it found, told as it goes.

    ended: the step at which it could not go on, "" when it came to its end.
    """

    def __init__(
        self, config: Config, provider: Provider, endpoint: Endpoint, poll: Poll, source: str,
        tell: Callable[[Finding], None],
    ) -> None:  # fmt: skip
        self.config = config
        self.provider = provider
        self.endpoint = endpoint
        self.poll = poll
        self.source = source
        self.tell = tell
        self.network = Network(endpoint, config, poll)
        self.replies: List[Reply] = []
        self.requests = 0
        self.ended = ""
        self.explained: Optional[Explained] = None
        self.began_with = provider.dialect.max_tokens_field
        self._wanted = config.model
        self._connection: Optional[Connection] = None
        self._address = ""

    async def run(self) -> None:
        """All steps that can be taken."""
        try:
            if await self._walk():
                await self._ask()
                self._judge_answers()
        finally:
            if self._connection is not None:
                self._connection.close()
        for finding in host_findings():
            self.tell(finding)

    # The way.

    async def _walk(self) -> bool:
        """Opens the first connection step by step; whether it is open."""
        step, began = "dns", clock()
        deadline = began + self.config.connect_timeout
        sock: Optional[StampedSocket] = None
        try:
            addresses = await self.network.lookup()
            looked_up = clock()
            fixed = bool(self.config.resolve) and self._is_fixed(addresses)
            self.tell(dns_finding(self.network, addresses, looked_up - began, fixed))
            step = "tcp"
            sock = await self.network.connect(addresses, deadline)
            connected = clock()
            self._address = show_address(sock.getpeername())
            local = show_address(sock.getsockname())
            self.tell(fine("tcp", "unix" if self.endpoint.unix else "connected", address=self._address, local=local,
                           ms=(connected - looked_up) * 1000.0))  # fmt: skip
            step = "proxy"
            await self.network.tunnel(sock, deadline)
            tunnelled = clock()
            secure = self.endpoint.scheme == "https"
            self.tell(proxy_finding(self.network.route, tunnelled - connected, secure))
            step = "tls"
            writer = await self.network.secure(sock, deadline)
            ready = clock()
            self._tell_tls(writer, ready - tunnelled)
            step = "http"
            spans = Spans(looked_up - began, connected - looked_up, tunnelled - connected, ready - tunnelled)
            self._connection = self.network.take(sock, writer, spans)
            return True
        except RequestError as error:
            if sock is not None:
                sock.close()
            self.ended = step
            self.tell(await self._refused_tls(error) if step == "tls" else unreached(step, error))
            return False

    def _is_fixed(self, addresses: Sequence[Any]) -> bool:
        """Whether --resolve named these addresses."""
        host, port = peer_of(self.endpoint, self.network.route)
        return fixed_addresses(self.config.resolve, host, port) == addresses

    def _tell_tls(self, writer: asyncio.StreamWriter, seconds: float) -> None:
        tls = writer.get_extra_info("ssl_object")
        if tls is None:
            self.tell(fine("tls", "unix" if self.endpoint.unix else "none"))
            return
        private = is_private_address(self._address) and self.network.route.proxy is None
        handshake = self._handshake(tls, seconds, not self.config.insecure, "")
        self.tell(tls_finding(handshake, time.time(), self.config, private))

    @staticmethod
    def _handshake(tls: Any, seconds: float, verified: bool, refused: str) -> Handshake:
        chain = []
        with contextlib.suppress(ParseError):
            chain = [read_certificate(data) for data in peer_chain(tls)]
        cipher = tls.cipher()
        return Handshake(tls.version() or "?", cipher[0] if cipher else "?", chain, verified, refused, seconds)

    async def _refused_tls(self, error: RequestError) -> Finding:
        """What is to be said of TLS that failed: the certificate is asked for again, without judging it."""
        if not str(error).startswith("certificate"):
            return unreached("tls", error)
        network = Network(self.endpoint, dataclasses.replace(self.config, insecure=True), self.poll)
        deadline = clock() + self.config.connect_timeout
        sock: Optional[StampedSocket] = None
        try:
            sock = await network.connect(await network.lookup(), deadline)
            await network.tunnel(sock, deadline)
            writer = await network.secure(sock, deadline)
        except RequestError:  # it let us in a moment ago
            if sock is not None:
                sock.close()
            return unreached("tls", error)
        try:
            refused = re.sub(r" \(--.*\)$", "", str(error))  # what to do is said by what is found in it
            handshake = self._handshake(writer.get_extra_info("ssl_object"), 0.0, False, refused)
        finally:
            writer.transport.abort()
        return tls_finding(handshake, time.time(), self.config, False)

    # The requests.

    async def _ask(self) -> None:
        """The five requests, as far as the replies let us go on."""
        if not await self._has_token():
            return
        models = await self._ask_models("models") if self.provider.models_target(self.endpoint) else None
        self._choose_model(models)
        if not self.config.model:
            self.ended = "models"
            if models is not None:
                self.ended = "auth" if models.status == "auth_error" else "http" if models.head is None else "models"
                self._judge_refusal(models)
            return
        stream = await self._ask_stream()
        self._judge_refusal(stream)
        if http_finding(stream).state == "failed" or stream.status == "auth_error":
            self.ended = "auth" if stream.status == "auth_error" else "http"
            return
        self._judge_stream(stream)
        await self._ask_exact()
        await self._ask_tool()
        if self._may_ask() and models is not None:
            await self._ask_models("kept")

    async def _has_token(self) -> bool:
        """Asks for the token where the scheme wants that, which is not a request to the endpoint."""
        try:
            await TokenKeeper(self.config, self.provider, self.endpoint, self.poll).first()
            return True
        except UserError as error:
            self.ended = "auth"
            self.tell(failing("auth", "no_grant", "no_grant", err=str(error)))
            return False

    def _choose_model(self, models: Optional[Reply]) -> None:
        """The model to ask for: the one that was named, else the first of the list."""
        if models is not None:
            names = listed_models(models, self.provider)
            self.tell(models_finding(models, names, self._wanted if self.provider.needs_model else self.provider.name))
        else:
            names = []
            bad = self.provider.needs_model and not self._wanted
            self.tell(failing("models", "nowhere", "model") if bad else fine("models", "nowhere"))
        self.config.model = self._wanted or ("".join(names[:1]) if self.provider.needs_model else self.provider.name)

    def _may_ask(self) -> bool:
        return self.requests < MOST_REQUESTS

    def _variant(self, **settings: Any) -> Provider:
        """The provider with other settings, which signs as the same one."""
        provider = make_provider(dataclasses.replace(self.config, **settings))
        provider.auth = self.provider.auth
        return provider

    async def _ask_models(self, name: str) -> Reply:
        return await self._send(name, "GET", self.provider.models_request(self.endpoint), self.provider)

    def _chat(self, name: str, provider: Provider, dialect: Dialect, tokens: Optional[int] = None) -> HTTPRequest:
        """A chat of one question. tokens: of an answer that is to have so many."""
        most = {"stream": STREAM_TOKENS, "tool": TOOL_TOKENS}.get(name)
        prompt = Prompt(name, [{"role": "user", "content": QUESTIONS[name]}], max_tokens=most, output_tokens=tokens)
        return provider.request(prompt, self.endpoint, "%s-%s" % (self.config.run_id, name), dialect)

    async def _ask_stream(self) -> Reply:
        """The chat, in the dialect that the endpoint takes."""
        provider, dialect = self._variant(record_chunks=True), self.provider.dialect
        reply = await self._send("stream", "POST", self._chat("stream", provider, dialect), provider)
        while reply.code == 400 and self._may_ask():
            other = dialect.without(reply.body.decode("utf-8", "replace"))
            if other is None:
                break
            dialect = other
            reply = await self._send("stream", "POST", self._chat("stream", provider, dialect), provider)
            if reply.status == "ok":
                self.provider.dialect.adopt(dialect)
        return reply

    async def _ask_exact(self) -> None:
        dialect = self.provider.dialect.copy()
        fields = dialect.exact_fields()
        if not fields:
            self.tell(fine("exact", "unknown", provider=self.provider.name))
        elif not self._may_ask():
            self.tell(fine("exact", "unasked", most=MOST_REQUESTS))
        else:
            request = self._chat("exact", self.provider, dialect, EXACT_TOKENS)
            reply = await self._send("exact", "POST", request, self.provider)
            self.tell(exact_finding(reply, EXACT_TOKENS, fields))

    async def _ask_tool(self) -> None:
        fields = TOOL_FIELDS.get(self.provider.name)
        if fields is None:
            self.tell(fine("tool", "unknown", provider=self.provider.name))
        elif not self._may_ask():
            self.tell(fine("tool", "unasked", most=MOST_REQUESTS))
        else:
            body = copy_tree(fields)
            merge(body, self.config.body)
            provider = self._variant(body=body)
            request = self._chat("tool", provider, self.provider.dialect)
            self.tell(tool_finding(await self._send("tool", "POST", request, provider)))

    async def _send(self, name: str, method: str, request: HTTPRequest, provider: Provider) -> Reply:
        """Sends a request on the connection that is open, or on a new one, and waits for its end."""
        self.requests += 1
        while True:
            reused = self._connection is not None and self._connection.open and self._connection.used
            try:
                reply, dead = await self._exchange(name, method, request, provider)
            except RequestError as error:
                now = time.time()
                reply, dead = Reply(name, error.status, str(error), None, b"", now, now, False, False), False
            if not (dead and reused):  # an idle connection that turns out dead has carried nothing
                self.replies.append(reply)
                return reply

    async def _exchange(
        self, name: str, method: str, request: HTTPRequest, provider: Provider
    ) -> Tuple[Reply, bool]:  # fmt: skip
        """One sending, and whether the connection was dead."""
        if self._connection is None or not self._connection.open:
            self._connection = await self.network.open()
        connection, reused = self._connection, self._connection.used
        payload = self._sign(name, method, request, provider)
        done: asyncio.Future = asyncio.get_event_loop().create_future()
        kind = Witness if method == "POST" else Listing
        exchange = kind(provider, lambda: done.done() or done.set_result(None))
        sent = time.time()
        exchange.start = connection.send(payload, exchange)
        watch = Watch(exchange)
        try:
            await done
        finally:
            watch.stop()
        kept = exchange.reusable() and connection.open
        if kept:
            connection.release()
        else:
            connection.close()
            self._connection = None
        if exchange.dead and connection.alert and not reused:
            raise RequestError("tls_error", connection.alert)
        headed = sent + max(0.0, (exchange.ttfb_at or clock()) - exchange.start)
        witness = exchange if isinstance(exchange, Witness) else None
        reply = Reply(name, exchange.status or "", exchange.err or "", exchange.reader.head, bytes(exchange.whole),
                      sent, headed, reused, kept, witness)  # fmt: skip
        return reply, exchange.dead

    def _sign(self, name: str, method: str, request: HTTPRequest, provider: Provider) -> bytes:
        """The request's bytes, signed now; how that came about is kept of the first chat, and of a list before it."""
        signed = provider.signed(request, time.time(), random_nonce(), method)
        if self.explained is None or (name == "stream" and self.explained.name == "models"):
            self.explained = Explained(name, method, signed)
        return self.network.encode(method, signed.target, signed.headers, request.body)

    def explain(self) -> Explained:
        """How the chat is signed; where it was never sent, how it would be."""
        if self.explained is None:
            self._sign("stream", "POST", self._chat("stream", self.provider, self.provider.dialect), self.provider)
        assert self.explained is not None, "signed just now"
        return self.explained

    # What the replies come to.

    def _judge_refusal(self, reply: Reply) -> None:
        self.tell(http_finding(reply))
        if reply.head is not None and reply.code != 407:
            self.tell(auth_finding(reply, self.provider, self.endpoint, self.source))

    def _judge_stream(self, reply: Reply) -> None:
        witness = reply.witness
        assert witness is not None, "an answer that was read"
        dialect = self.provider.dialect
        self.tell(stream_finding(reply))
        said = read_again(witness)
        if witness.stream:
            self.tell(first_finding(said))
        self.tell(reasoning_finding(witness, said))
        if witness.stream:
            self.tell(frames_finding(witness))
        self.tell(usage_finding(witness, said, dialect.notes))
        self.tell(end_finding(witness, said))
        self.tell(limit_finding(witness, dialect, STREAM_TOKENS))

    def _judge_answers(self) -> None:
        self.tell(kept_finding(self.replies))
        self.tell(rates_finding(self.replies))
        self.tell(clock_finding(self.replies))


# What is shown.


def check_text(texts: Mapping[str, str], *key: str, **values: Any) -> str:
    """The text of check.KEY with its values filled in."""
    return texts[".".join(("check", *key))].format(**values).strip()


def shown_values(finding: Finding, hide: Callable[[str], str]) -> Dict[str, Any]:
    """A finding's values without secrets."""
    return {name: hide(value) if isinstance(value, str) else value for name, value in finding.values.items()}


def finding_texts(finding: Finding, texts: Mapping[str, str], hide: Callable[[str], str]) -> Tuple[str, str]:
    """What was seen, and what to do ("" for nothing)."""
    values = shown_values(finding, hide)
    seen = check_text(texts, finding.step, finding.key, **values)
    return seen, check_text(texts, "do", finding.remedy, **values) if finding.remedy else ""


STATE_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def finding_lines(
    finding: Finding, texts: Mapping[str, str], paint: Callable[[str, str], str], hide: Callable[[str], str]
) -> List[str]:  # fmt: skip
    """A finding as lines for a terminal: verdict, step, what was seen, and below it what to do."""
    width, columns = max(60, terminal_columns()), (9, 14)
    indent = " " * sum(columns)
    seen, remedy = map(printable, finding_texts(finding, texts, hide))
    lines = wrapped(seen, width, indent)
    state = padded(check_text(texts, "state", finding.state), columns[0], False)
    step = padded(check_text(texts, "step", finding.step), columns[1], False)
    lines[0] = paint(STATE_COLOURS[finding.state], state) + step + lines[0].lstrip()
    return lines + (wrapped("-> " + remedy, width, indent) if remedy else [])


def finding_json(finding: Finding, texts: Mapping[str, str], hide: Callable[[str], str]) -> Dict[str, Any]:
    """A finding as `--json` has it: texts for a reader, key and values for a program."""
    seen, remedy = finding_texts(finding, texts, hide)
    values = {name: round(value, 3) if isinstance(value, float) else value
              for name, value in shown_values(finding, hide).items()}  # fmt: skip
    entry = {"step": finding.step, "state": finding.state, "key": finding.key, "seen": seen, "values": values}
    return {**entry, "remedy": remedy} if remedy else entry


def explain_json(explained: Explained, hide: Callable[[str], str]) -> Dict[str, Any]:
    """How a request was signed, as `--json` has it."""
    signed = explained.signed
    headers = [name + ": " + value for name, value in signed.headers]
    return {
        "request": explained.name, "method": explained.method, "target": hide(signed.target),
        "steps": [{"name": name, "text": hide(text)} for name, text in signed.steps],
        "headers": [mask_header(hide(line)) for line in headers],
    }  # fmt: skip


def explain_lines(explained: Explained, texts: Mapping[str, str], hide: Callable[[str], str]) -> List[str]:
    """How a request was signed, as lines: each step's text as it is, line by line, and then what was sent."""
    told = explain_json(explained, hide)
    title = check_text(texts, "explain" if told["steps"] else "explain.plain", name=explained.name)
    lines = ["", title, ""]
    for step in told["steps"]:
        lines += ["  " + printable(step["name"])]
        lines += ["      | " + printable(line) for line in step["text"].split("\n")]
    lines += ["  " + check_text(texts, "explain.sent")]
    sent = ["%s %s" % (told["method"], told["target"]), *told["headers"]]
    return lines + ["      | " + printable(line) for line in sent]


def count_states(findings: Sequence[Finding]) -> Dict[str, int]:
    """How many findings are of each state."""
    return {state: sum(finding.state == state for finding in findings) for state in STATE_COLOURS}


def found_flags(preflight: Preflight, findings: Sequence[Finding]) -> List[str]:
    """The flags that a run needs beside those that the check was given."""
    keys = {(finding.step, finding.key) for finding in findings}
    given, words = preflight.config.given, []  # type: Tuple[str, ...], List[str]
    if "model" not in given and preflight.config.model:
        words += ["--model", preflight.config.model]
    if preflight.provider.dialect.max_tokens_field != preflight.began_with:
        words += ["--max-tokens-field", preflight.provider.dialect.max_tokens_field]
    if ("end", "missing") in keys:
        words.append("--end-optional")
    if ("usage", "none") in keys:
        words += ["--token-mode", "chars"]
    return words


def closing_lines(preflight: Preflight, findings: Sequence[Finding], command: str, notes: Sequence[str],
                  texts: Mapping[str, str]) -> List[str]:  # fmt: skip
    """The verdict, where the check ended if not at its end, and the run's command."""
    states, width = count_states(findings), max(60, terminal_columns())
    values = {"requests": preflight.requests, "warnings": states["warning"], "failed": states["failed"]}
    usable = not states["failed"]
    lines = ["", *wrapped(check_text(texts, "usable" if usable else "unusable", **values), width, "")]
    if preflight.ended:
        step = check_text(texts, "step", preflight.ended)
        lines += wrapped(check_text(texts, "ended", step=step), width, "")
    lines += ["", check_text(texts, "command" if usable else "command.later"), "", "  " + printable(command)]
    return lines + ([""] + [line for note in notes for line in wrapped(note, width, "")] if notes else [])


def check_document(
    preflight: Preflight, findings: Sequence[Finding], command: str, notes: Sequence[str], texts: Mapping[str, str],
    hide: Callable[[str], str],
) -> Dict[str, Any]:  # fmt: skip
    """What `--json` prints: the findings, and what follows from them."""
    states = count_states(findings)
    document = {
        "llmbench": __version__, "url": hide(preflight.endpoint.url), "provider": preflight.provider.name,
        "model": preflight.config.model, "usable": not states["failed"], "requests": preflight.requests,
        "states": states, "findings": [finding_json(finding, texts, hide) for finding in findings],
        "command": command, "notes": list(notes),
    }  # fmt: skip
    return {**document, "ended_at": preflight.ended} if preflight.ended else document


# ==================================================================================================
# 23. Commands: run and the others; main()
# ==================================================================================================
#
# Flags are one table, RUN_FLAGS, from which the parser and `--help` are made and against which the
# README is tested. A mistake of the user's is a UserError: one line on stderr, exit status 2, and
# nothing is left behind. The value of a flag that is not known is never echoed: it may be a secret.
#
# `Session` is one run: it asks for the model where none was named, makes the directory last of all
# checks, drives the Runner with signals and progress around it, and then builds every file from
# results.jsonl alone, which is what `report DIR` does too.

UNCAPPED_STREAMS = 16384  # of an open loop: for so many the open-file limit is raised where that is allowed
EXIT_OK, EXIT_GATE, EXIT_USAGE, EXIT_NO_SUCCESS, EXIT_CLIENT, EXIT_WRITE = 0, 1, 2, 3, 4, 5


def read_count(lowest: int) -> Callable[[str], int]:
    """A reader of whole numbers from `lowest` on."""

    def read(text: str) -> int:
        if not re.match(r"^[0-9]{1,9}$", text.strip()) or int(text) < lowest:
            raise ValueError("needs a whole number from %d on" % lowest)
        return int(text)

    return read


def read_counts(text: str) -> List[int]:
    """A list such as `1,2,4,8`."""
    return [read_count(1)(part) for part in text.split(",")]


def read_rate(text: str) -> float:
    """Requests per second above 0."""
    if not re.match(r"^([0-9]{1,9}(\.[0-9]*)?|\.[0-9]+)$", text.strip()) or not float(text):
        raise ValueError("needs requests per second above 0, a plain number of at most nine digits such as 0.5 or 20")
    return float(text)


def read_factor(text: str) -> float:
    """How many times as fast: a number above 0."""
    try:
        return read_rate(text)
    except ValueError:
        raise ValueError("needs a factor such as 0.5 or 2") from None


def read_rates(text: str) -> List[float]:
    """A list such as `0.5,1,2`; 0 is no rate at all: a closed loop."""
    return [] if text.strip() == "0" else [read_rate(part) for part in text.split(",")]


def read_arrival(text: str) -> str:
    """`poisson`, `constant`, `gamma:SHAPE` or `trace`."""
    if text not in ("poisson", "constant", "trace"):
        match = re.match(r"^gamma:([0-9]{1,6}(\.[0-9]*)?|\.[0-9]+)$", text)
        if not match or float(match.group(1)) < 0.01:
            raise ValueError("needs poisson, constant, trace, or gamma:SHAPE with a shape from 0.01 on")
    return text


def read_lengths(text: str) -> str:
    """Lengths as they were written, if they can be read."""
    parse_lengths(text)
    return text


def read_gate(text: str) -> str:
    """A gate as it was written, if it can be read."""
    parse_gate(text)
    return text


def read_error_limit(text: str) -> str:
    """A number of failed requests, or a percentage: `10`, `5%`."""
    match = re.match(r"^[0-9]{1,9}$|^([0-9]{1,2}(\.[0-9]*)?)%$", text)
    if not match:
        raise ValueError("needs a number of failed requests such as 10, or a share such as 5%")
    return text


def read_shard(text: str) -> str:
    """`k/n`, k from 0; `auto/n` takes k from $JOB_COMPLETION_INDEX, as a Kubernetes Indexed Job sets it."""
    number, _, hosts = text.partition("/")
    if number == "auto":
        number = os.environ.get("JOB_COMPLETION_INDEX", "")
        if not number:
            raise ValueError("auto/n needs $JOB_COMPLETION_INDEX, which an Indexed Job sets; give k/n")
    if not re.match(r"^[0-9]{1,6}/[1-9][0-9]{0,5}$", number + "/" + hosts) or int(number) >= int(hosts):
        raise ValueError("needs k/n with k from 0 to n-1, such as 0/4")
    return "%d/%d" % (int(number), int(hosts))


def read_start(text: str) -> str:
    """A moment to come, as ISO 8601 UTC: `14:00[:00]` of today by this host's clock, or ISO 8601 with an offset."""
    now = time.time()
    match = re.match(r"^([01]?[0-9]|2[0-3]):([0-5][0-9])(?::([0-5][0-9]))?$", text)
    if match:
        day = datetime.datetime.fromtimestamp(now)
        hour, minute, second = (int(part or 0) for part in match.groups())
        moment = day.replace(hour=hour, minute=minute, second=second, microsecond=0).timestamp()
    else:
        try:
            moment = datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
        except ValueError:
            raise ValueError("needs HH:MM[:SS], or a date with its offset such as 2026-11-24T14:00:00+08:00") from None
    if moment <= now:
        raise ValueError("lies in the past by this host's clock; give a moment to come, a date for another day")
    return iso_time(moment)


def read_proxy(text: str) -> str:
    """`none`, or a proxy's URL; without a scheme it gets http://."""
    text = text.strip()
    if not text:
        raise ValueError("needs http://[USER:PASSWORD@]HOST:PORT, or none")
    return text if text == "none" or "://" in text else "http://" + text


def read_server_name(text: str) -> str:
    """The name that a certificate must hold: a host's, without scheme or port."""
    if not re.match(r"^[^\s/:@\x00-\x1f]+$|^[0-9A-Fa-f:.]+$", text):
        raise ValueError("needs a host name alone, such as llm.example.com")
    return text


def read_resolve(text: str) -> str:
    """HOST:PORT:ADDRESS."""
    parse_resolve(text)
    return text


def read_processes(text: str) -> Union[int, str]:
    """`auto`, or a whole number."""
    return text if text == "auto" else read_count(1)(text)


def read_choice(*choices: str) -> Callable[[str], str]:
    """A reader of one of these words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError("needs one of %s" % ", ".join(choices))
        return text

    return read


def read_json_object(text: str) -> Dict[str, Any]:
    """A JSON object."""
    try:
        tree = json.loads(text, parse_constant=read_no_constant)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise ValueError('needs a JSON object such as {"temperature": 0}')
    return tree


def read_auth_option(text: str) -> Tuple[str, str]:
    """NAME=VALUE of --auth-opt; raises ValueError, which doesn't show it."""
    name, equals, value = text.partition("=")
    if not equals or not re.match(r"^[A-Za-z][A-Za-z0-9_-]*\Z", name):
        raise ValueError("needs NAME=VALUE, such as header=x-api-key")
    return name, value


class Flag(NamedTuple):
    """A flag of `run`: name, reader of its value (None: a switch), the value's name, its default as shown, meaning."""

    name: str
    read: Optional[Callable[[str], Any]]
    value: str
    default: str
    meaning: str
    repeat: bool = False


RUN_FLAGS = (
    Flag("url", str, "URL", "", "endpoint; without a path the provider's is added, a path ending in /vN gets its last "
         "part; unix:/path.sock:/v1 is behind a Unix socket; mock: or mock:?ttft=200&itl=50&tokens=20 starts the "
         "built-in mock server in a process of its own"),
    Flag("provider", str, "NAME", "openai",
         "the endpoint's dialect; `llmbench providers` lists them; a path ending in .json or .py is one of your own"),
    Flag("provider-file", str, "FILE", "", "the same as --provider FILE, beside --provider custom"),
    Flag("model", str, "NAME", "the first id of GET …/models", "model to ask for"),
    Flag("token", str, "SECRET", "$LLMBENCH_TOKEN, then $OPENAI_API_KEY",
         "the secret itself, or env:NAME, file:PATH, cmd:COMMAND"),
    Flag("auth", str, "SCHEME", "the provider's",
         "how requests prove who asks: bearer, api-key, basic, none, a signature (bce-v1, tc3, volc-v4, huawei-sdk, "
         "zhipu-jwt, hmac), or a token that is asked for first (baidu-oauth, ark-api-key, huawei-iam)"),
    Flag("auth-key", str, "SECRET", "", "access key, user or client id of the scheme; as --token"),
    Flag("auth-secret", str, "SECRET", "", "secret key or password of the scheme; as --token"),
    Flag("auth-opt", read_auth_option, "NAME=VALUE", "",
         "option of the scheme, such as header=x-api-key, service=hunyuan or refresh=50m; "
         "one that holds a secret is read as --token is (repeat)", True),
    Flag("concurrency", read_counts, "N[,N…]", "1; no cap with --rps",
         "streams in flight, a list makes one stage each; with --rps the most requests that may be in flight"),
    Flag("rps", read_rates, "R[,R…]", "0",
         "open loop: so many requests per second go out when they are due, not when a stream is free; "
         "a list makes one stage each; 0: closed loop"),
    Flag("arrival", read_arrival, "KIND", "poisson",
         "when an open loop's requests are due: poisson (independent users), constant, gamma:SHAPE (burstier below "
         "shape 1), drawn by --seed; or trace: when the trace says, which is the default of a trace without a load"),
    Flag("ramp", read_duration, "TIME", "off", "start the streams of a closed loop evenly over this time, not at once"),
    Flag("total-requests", read_count(1), "N", "max(10, 2 × concurrency), or 10 s of --rps",
         "measured requests per stage; none when only --duration is given"),
    Flag("duration", read_duration, "TIME", "",
         "time per stage after which no request is started; with both, whichever comes first"),
    Flag("grace", read_duration, "TIME", "the time-out",
         "how long requests in flight at the end of the duration may take before they are cancelled"),
    Flag("warmup", read_count(0), "N", "0", "requests per stage before the measurement, at its load, not counted"),
    Flag("max-tokens", read_count(1), "N", "256", "longest answer to ask for; a prompt's own max_tokens wins"),
    Flag("max-tokens-field", read_choice("max_tokens", "max_completion_tokens"), "NAME", "max_tokens",
         "how the endpoint spells it; by default found out when it refuses the first"),
    Flag("token-mode", read_choice("usage", "chars", "disabled"), "MODE", "usage",
         "usage takes the endpoint's own token counts, chars counts Unicode characters, disabled counts nothing"),
    Flag("think-tags", read_choice("auto", "on", "off"), "MODE", "auto",
         "whether <think>…</think> at the start of the content is reasoning; off leaves content alone"),
    Flag("workload-file", str, "FILE", "built-in prompts",
         "prompts: text (one a line), JSONL or a JSON array ({\"prompt\"} or {\"messages\"}, id, max_tokens), ShareGPT "
         "({\"conversations\"}), or a trace (timestamp, input_length, output_length; BurstGPT's CSV); - reads stdin"),
    Flag("timestamp-unit", read_choice("auto", "ms", "s"), "UNIT", "auto",
         "unit of a trace's timestamps; auto: ms in JSONL, s in CSV"),
    Flag("trace-speed", read_factor, "X", "1", "replay a trace so many times as fast"),
    Flag("order", read_choice(*ORDERS), "ORDER", "in-order",
         "which prompt comes next: in-order of the file, shuffled anew each time round, or random, by --seed"),
    Flag("turns", read_count(1), "N", "all", "of a conversation, play so many of the user's turns at most"),
    Flag("input-tokens", read_lengths, "N[,N…]", "",
         "make prompts of so many tokens by the endpoint's own count, which a few probes find out first; a list makes "
         "stages; also normal:MEAN,SD and uniform:LOW,HIGH"),
    Flag("prefix-tokens", read_count(1), "N", "0", "put the same system message of so many tokens before every prompt"),
    Flag("output-tokens", read_count(1), "N", "",
         "ask for answers of exactly so many tokens: max_tokens, with ignore_eos and min_tokens where they are taken"),
    Flag("unique", None, "", "on",
         "put a short unique prefix before each first user message, so that no prefix cache flatters the endpoint"),
    Flag("no-unique", None, "", "", "send the prompts as they are"),
    Flag("timeout", read_duration, "TIME", "120s", "for a whole request"),
    Flag("connect-timeout", read_duration, "TIME", "10s", "for DNS, TCP, proxy and TLS of a new connection"),
    Flag("ttft-timeout", read_duration, "TIME", "off", "until the first output"),
    Flag("idle-timeout", read_duration, "TIME", "off", "between any bytes of an answer"),
    Flag("insecure", None, "", "off", "accept any TLS certificate"),
    Flag("ca-cert", str, "FILE", "the system's", "PEM file or directory of the CAs to trust"),
    Flag("client-cert", str, "FILE", "", "PEM file of the certificate that the endpoint asks of us, with its key or "
         "with --client-key"),
    Flag("client-key", str, "FILE", "in --client-cert", "PEM file of that certificate's key, not encrypted"),
    Flag("server-name", read_server_name, "NAME", "the URL's host", "the name that TLS asks for (SNI) and that the "
         "certificate must hold; the Host header stays"),
    Flag("proxy", read_proxy, "URL", "$https_proxy, $http_proxy, $all_proxy, save $no_proxy",
         "HTTP proxy, http://[USER:PASSWORD@]HOST:PORT: https endpoints by CONNECT; none goes straight"),
    Flag("resolve", read_resolve, "HOST:PORT:ADDR", "", "connect to this address for that host and port; HOST may be "
         "*, ADDR a list with commas (repeat)", True),
    Flag("header", str, "'K: V'", "",
         "header to add, or to put in place of ours; an empty value takes it out (repeat)", True),
    Flag("body", read_json_object, "JSON", "", "object merged into the request body; null takes a field out"),
    Flag("no-stream", None, "", "", "ask for whole answers: latency and tokens are measured, and there is no TTFT"),
    Flag("end-optional", None, "", "off", "a stream may end without finish reason or end marker"),
    Flag("count-connect", None, "", "off", "count a new connection's set-up into TTFT and latency"),
    Flag("record-chunks", None, "", "off", "keep every output frame's time in the record, as chunk_ms"),
    Flag("out", str, "DIR", "llmbench-MODEL-TIME", "where the four files go; never overwrites results"),
    Flag("markdown", None, "", "off", "leave summary.md too: tables to paste in a ticket"),
    Flag("junit", None, "", "off", "leave junit.xml too: a test for each gate and stage, for a CI server"),
    Flag("seed", read_count(0), "N", "0", "everything random, save the unique prefixes"),
    Flag("processes", read_processes, "N", "auto",
         "worker processes; auto: 1 below 128 streams, else min(usable CPUs, streams // 64)"),
    Flag("slo", read_gate, "GATE", "",
         "requirement on a figure, such as ttft.p95<=800ms, tpot.p99<50ms, success>=99% or throughput>=500 (output "
         "tokens/s); exit status 1 when one fails; its limits also define goodput (repeat)", True),
    Flag("find-max", read_choice("concurrency", "rps"), "LOAD", "",
         "find the highest load that meets every --slo: doubles from the first --concurrency or --rps (default 1) "
         "up to the second (default 4096 streams, 10,000 req/s), halves between, and tries the answer twice; each "
         "probe is a stage, of at most 30 s unless --duration or --total-requests says else"),
    Flag("max-errors", read_error_limit, "N|N%", "off",
         "end the run early, with all its files, when more requests failed; a share counts from 20 requests on"),
    Flag("max-total-tokens", read_count(1), "N", "off",
         "end the run early when prompts and answers together have used so many tokens by the endpoint's own count"),
    Flag("shard", read_shard, "K/N", "", "this host's part of a run spread over N hosts, K from 0; needs --start-at; "
         "auto/N takes K from $JOB_COMPLETION_INDEX; `llmbench merge` joins the results"),
    Flag("start-at", read_start, "TIME", "now",
         "begin at HH:MM[:SS] by this host's clock, or at an ISO 8601 date and time with its offset"),
    Flag("dry-run", None, "", "off",
         "print what would be sent, what it comes to at the worst, and the first request; send nothing"),
    Flag("progress", read_choice("auto", "bar", "lines", "none"), "MODE", "auto", "bar on a terminal, lines elsewhere"),
    Flag("lang", read_choice("en", "zh"), "LANG", "from the locale", "language of terminal and report: en or zh"),
)  # fmt: skip
FLAGS = {flag.name: flag for flag in RUN_FLAGS}


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with our error line, and without ever echoing what it didn't understand."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(add_help=False, allow_abbrev=False, **settings)
        self.add_argument("-h", "--help", "-help", action="help", help="this text")

    def _get_option_tuples(self, option_string: str) -> List[Any]:
        # What a flag may abbreviate: from 3.8 on argparse asks after one dash too, in spite of allow_abbrev.
        return []

    def error(self, message: str) -> NoReturn:
        """One line that says what is wrong: argparse's, with the flag named as it is documented."""
        message = re.sub(r"ignored explicit argument .*", "takes no value", message, flags=re.S)
        named = r"^argument (--[a-z-]+)(?:/-[a-z-]+)?: (expected one argument)?"
        raise UserError(re.sub(named, self._flag_error, message))

    @staticmethod
    def _flag_error(match: Any) -> str:
        return match.group(1) + (" needs a value" if match.group(2) else " ")

    def parse_all(self, words: Sequence[str]) -> argparse.Namespace:
        """As parse_args; names an unknown flag, but not its value."""
        parsed, unknown = self.parse_known_args(list(words))
        if unknown:
            name = next((word.split("=")[0] for word in unknown if word.startswith("-")), "")
            if name and not re.match(r"^--?[A-Za-z][A-Za-z_-]{,24}$", name):  # a value sticks to it
                raise UserError("an argument begins with - but is no flag; `%s --help` lists them" % self.prog)
            if not name:
                url = any(re.match(r"^(https?://|mock:)", word) for word in unknown) and "--url" in self.flags()
                hint = " (a URL comes after --url)" if url else ""
                raise UserError("an argument is left over%s; `%s --help` lists the flags" % (hint, self.prog))
            bare = name.lstrip("-")
            hint = " of %s but of run" % self.prog if bare in FLAGS else nearest("--" + bare, self.flags())
            raise UserError("%s is not a flag%s; `%s --help` lists them" % (name, hint, self.prog))
        return parsed

    def flags(self) -> List[str]:
        """All flags that it takes."""
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]


def read_argument(flag: Flag) -> Callable[[str], Any]:
    """The flag's reader as argparse wants it; a value that may be secret is not in the error."""

    def read(text: str) -> Any:
        try:
            return flag.read(text)  # type: ignore[misc]
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def add_flags(parser: ArgumentParser, flags: Iterable[Flag]) -> None:
    """Has a parser take these flags: `-flag`, `--flag`, with a blank or `=`; no abbreviations."""
    for flag in flags:
        spellings = ["--" + flag.name, "-" + flag.name]
        meaning = (flag.meaning + (" (default: %s)" % flag.default if flag.default else "")).replace("%", "%%")
        if flag.read is None:
            parser.add_argument(*spellings, action="store_true", default=None, help=meaning)
        else:
            parser.add_argument(
                *spellings,
                type=read_argument(flag),
                metavar=flag.value,
                help=meaning,
                action="append" if flag.repeat else "store",
            )


def run_parser() -> ArgumentParser:
    """The parser of `run`, made of RUN_FLAGS."""
    parser = ArgumentParser(
        prog="llmbench run", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures a streaming chat endpoint; leaves results.jsonl, results.csv, summary.json, report.html",
        epilog="durations: 500ms, 30s, 5m, 8h, or plain seconds\nexit status: 0 done, 1 a gate failed, 2 usage, "
        "3 no request succeeded, 4 the client was the limit (INVALID), 5 results could not be written, "
        "130/143 interrupted",
    )  # fmt: skip
    add_flags(parser, RUN_FLAGS)
    return parser


def read_config(words: Sequence[str]) -> Config:
    """The configuration that `run`'s arguments mean; raises UserError."""
    return make_config(vars(run_parser().parse_all(words)))


def make_config(parsed: Mapping[str, Any]) -> Config:
    """The configuration that parsed flags mean, None for those that were not given; raises UserError."""
    given = {key: value for key, value in parsed.items() if value is not None}
    if not given.get("url"):
        raise UserError("--url is needed; try --url mock: for the built-in server, or --url http://HOST:PORT")
    if given.get("unique") and given.get("no_unique"):
        raise UserError("--unique and --no-unique exclude each other; give one")
    if given.pop("no_unique", False):
        given["unique"] = False
    if given.pop("no_stream", False):
        given["stream"] = False
    check_provider(given)
    check_load(given)
    read_secrets(given)
    config = Config(**given)
    config.given = tuple(name for name, value in given.items() if value not in (None, []))
    if config.find_max == "rps" and not config.rps:
        config.rps = [1.0]
    if config.rps and "concurrency" not in given:
        config.concurrency = []  # no cap
    if "lang" not in given:
        config.lang = language_of_locale()
    config.token = given["token"] if "token" in given else default_token(config.url)
    check_shard(config)
    alone = config.start_at is None
    config.run_id = binascii.hexlify(os.urandom(4)).decode("ascii") if alone else shared_run_id(config)
    return config


def read_secrets(given: Dict[str, Any]) -> None:
    """Puts the secrets that flags name in place of env:, file: and cmd:, and notes where the token came from."""
    if re.match(r"^(file|cmd):", given.get("token", "")):
        given["token_source"] = given["token"]
    for name in ("token", "auth_key", "auth_secret"):
        if name in given:
            given[name] = read_secret(given[name], "--" + name.replace("_", "-"))
    options: Dict[str, str] = {}
    for name, value in given.get("auth_opt", ()):
        if name in options:
            raise UserError("--auth-opt %s is given twice; leave one out" % name)
        options[name] = read_secret(value, "--auth-opt " + name) if is_secret_option(name) else value
    if options:
        given["auth_opt"] = options


# What is measured at streams alone.
OF_STREAMS = frozenset(("ttft", "ttfe", "ttft_from_scheduled", "decode", "tpot", "itl", "request_tps"))


def check_provider(given: Dict[str, Any]) -> None:
    """Puts a provider's file in the place of its name, and refuses what goes with streams alone; raises UserError."""
    custom, file = given.get("provider") in (None, "custom"), given.get("provider_file")
    if file is not None and not custom:
        raise UserError("--provider-file goes with --provider custom; give one of the two")
    if file is None and given.get("provider") == "custom":
        raise UserError("--provider custom needs --provider-file FILE, a provider of your own in JSON or Python")
    if file is not None:
        if not file.endswith((".json", ".py")):
            raise UserError("--provider-file needs a file whose name ends in .json or .py")
        given["provider"] = file
    if not given.get("stream", True):
        for name in ("ttft_timeout", "record_chunks"):
            if name in given:
                raise UserError("--%s needs a stream; leave --no-stream out" % name.replace("_", "-"))


def check_load(given: Mapping[str, Any]) -> None:
    """Refuses flags of one kind of load beside those of the other; raises UserError."""
    try:
        gates = parse_gates(given.get("slo", []))
    except ValueError as error:
        raise UserError("--slo %s" % error) from None
    for gate in gates:
        if not given.get("stream", True) and gate.metric in OF_STREAMS:
            raise UserError("--slo %s needs a stream; leave --no-stream out" % gate.text)
    if "max_total_tokens" in given and given.get("token_mode", "usage") != "usage":
        raise UserError("--max-total-tokens counts by the endpoint's usage and needs --token-mode usage")
    if "input_tokens" in given and "workload_file" in given:
        raise UserError("--input-tokens makes prompts of its own; leave --workload-file out")
    if "find_max" in given:
        check_search(given)
    elif given.get("rps"):
        if given.get("arrival") == "trace":
            raise UserError("--arrival trace takes the trace's own times; leave --rps out")
        if len(given.get("concurrency", [])) > 1:
            raise UserError("--concurrency takes one number with --rps: the most requests in flight")
        if "ramp" in given:
            raise UserError("--ramp starts streams evenly and needs --concurrency without --rps")
    elif given.get("arrival", "trace") != "trace":
        raise UserError("--arrival says when requests of an open loop are due and needs --rps")


def check_search(given: Mapping[str, Any]) -> None:
    """Refuses flags that --find-max has no use for; raises UserError."""
    kind = given["find_max"]
    if not given.get("slo"):
        raise UserError("--find-max needs at least one --slo, such as --slo 'ttft.p95<=800ms'")
    bounds = given.get(kind, [])
    if len(bounds) > 2 or (len(bounds) == 2 and bounds[0] >= bounds[1]):
        raise UserError("--find-max takes --%s START or START,MOST with START below MOST" % kind)
    if kind == "concurrency" and given.get("rps"):
        raise UserError("--find-max concurrency is a closed loop; leave --rps out, or give --find-max rps")
    if kind == "rps" and len(given.get("concurrency", [])) > 1:
        raise UserError("--concurrency takes one number with --find-max rps: the most requests in flight")
    for name in ("shard", "ramp"):
        if name in given:
            raise UserError("--%s and --find-max exclude each other" % name)
    if "input_tokens" in given and len(parse_lengths(given["input_tokens"]).stages) > 1:
        raise UserError("--find-max takes one length of --input-tokens; search each in a run of its own")
    if kind == "concurrency" and "arrival" in given:
        raise UserError("--arrival says when requests of an open loop are due and needs --find-max rps")


def check_shard(config: Config) -> None:
    """Refuses what hosts that don't talk can't do together; raises UserError."""
    if config.shard is None:
        return
    hosts = config.host[1]
    if config.start_at is None:
        raise UserError("--shard needs --start-at, so that all hosts begin together and know each other's run")
    if config.concurrency and min(config.concurrency) < hosts:
        raise UserError("--concurrency %d is fewer than the %d shards" % (min(config.concurrency), hosts))
    if len(plan_stages(config)) > 1 and (config.duration is None or config.grace is None):
        raise UserError("--shard with several stages needs --duration and --grace: by them hosts keep step")


def shared_run_id(config: Config) -> str:
    """The run id that hosts agree on without talking: a hash of what they have in common."""
    own = ("shard", "out", *FORMS, "token", "processes", "run_id", "progress", "lang", "given", "proxy", "resolve",
           "client_cert", "client_key", *AUTH_SETTINGS)  # fmt: skip  # hosts may go different ways to one endpoint
    common = {key: value for key, value in vars(config).items() if key not in own}
    if config.provider.endswith((".json", ".py")):  # hosts may keep it in different places
        common["provider"] = hashlib.sha256(read_provider_file(config.provider)).hexdigest()
        common["provider_file"] = None
    return hashlib.sha256(json.dumps(common, sort_keys=True).encode("utf-8")).hexdigest()[:8]


def language_of_locale() -> str:
    """zh where the locale is Chinese, else en."""
    locale = next((os.environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(name)), "")
    return "zh" if locale.lower().startswith("zh") else "en"


def default_token(url: str) -> str:
    """The token of the environment; the mock server gets none."""
    if url.startswith("mock:"):
        return ""
    return (os.environ.get("LLMBENCH_TOKEN") or os.environ.get("OPENAI_API_KEY") or "").strip()


SECRET_FLAGS = ("token", "header", "auth-key", "auth-secret", "auth-opt", "proxy")


def shown_command(words: Sequence[str]) -> str:
    """The command line as it can be given again, with secrets masked; a token that only names a source is shown."""
    shown: List[str] = []
    secret = ""  # the flag whose value comes next
    for word in words:
        name, equals, value = word.partition("=")
        bare = name.lstrip("-") if name.startswith("-") else ""
        if secret:
            shown.append(masked_value(secret, word))
            secret = ""
        elif bare in SECRET_FLAGS and equals:
            shown.append(name + "=" + masked_value(bare, value))
        else:
            secret = bare if bare in SECRET_FLAGS else ""
            shown.append(word)
    # Redacted before quoting: a quoted quote would end the pattern of a password.
    return " ".join([PROGRAM, "run"] + [shlex.quote(redact(word)) for word in shown])


def masked_value(flag: str, value: str) -> str:
    """The value of one of SECRET_FLAGS as it may be shown."""
    if flag == "header":
        return mask_header(value)
    if flag == "proxy":
        return value if "@" not in value else "http://***@" + value.rpartition("@")[2]
    name, equals, rest = value.partition("=")
    if flag == "auth-opt" and equals:
        return name + equals + (masked_value("", rest) if is_secret_option(name) else rest)
    return value if re.match(r"^(env|file|cmd):", value) else "***"


def warn(line: str) -> None:
    """A line on stderr that is no error."""
    sys.stderr.write("llmbench: %s\n" % line)
    sys.stderr.flush()


class Session:
    """One run from its checked configuration to its files."""

    def __init__(
        self, config: Config, url: str, workload: Workload, assets: Mapping[str, bytes], words: Sequence[str]
    ) -> None:
        config.processes = choose_processes(config.processes, config)
        self.config = config
        self.assets = assets
        self.workload = workload
        self.prompts = workload.prompts
        self.shape: Optional[Shape] = None
        self.words = words
        self.provider = make_provider(config)
        config.stream = self.provider.streams
        self.endpoint = parse_url(url, self.provider)
        self.route = check_way(self.endpoint, config)
        self.endpoint_url = url
        self.texts = load_texts(assets, config.lang)
        self.signal = 0
        self.loop, self.poll = new_loop()
        self.keeper = TokenKeeper(config, self.provider, self.endpoint, self.poll)
        self.stamps = wake_kernel_stamps()

    def run(self) -> int:
        """Measures, writes everything and returns the exit status."""
        config = self.config
        try:
            if config.dry_run:
                return self._show_plan()
            network = Network(self.endpoint, config, self.poll)
            self.loop.run_until_complete(self.keeper.first())
            self._try_signing()
            if not config.model:
                config.model = self.loop.run_until_complete(first_model(self.provider, self.endpoint, network))
            started = time.time()
            probes: List[Dict[str, Any]] = []
            if makes_text(config, self.workload):
                self.shape = self._make_shape(probes.append)
            if hasattr(self.loop, "shutdown_default_executor"):  # a process is best forked without threads
                self.loop.run_until_complete(self.loop.shutdown_default_executor())
            directory = config.out or default_directory(config.model, started)
            check_directory(directory)
            make_directory(directory)
            return self._measure(directory, started, probes)
        except KeyboardInterrupt:  # while the run is made its own handler takes it
            warn("interrupted before anything was measured; no files are left")
            raise
        finally:
            close_loop(self.loop)
            self.stamps.close()

    def _try_signing(self) -> None:
        """Signs a request that is not sent: what can't be signed or written is one line now, before there are files."""
        request_id, dialect = self.config.run_id + "-0", self.provider.dialect.copy()
        prompt = Prompt(request_id, [{"role": "user", "content": "?"}])
        request = self.provider.request(prompt, self.endpoint, request_id, dialect)
        signed = self.provider.signed(request, time.time(), random_nonce(), "POST")
        encode_request("POST", signed.target, signed.headers)

    def _show_plan(self) -> int:
        """--dry-run."""
        config, texts = self.config, self.texts
        stages = planned_stages(config)
        if makes_text(config, self.workload):
            self.shape = self._shape_of(GUESSED_FIT)
        sizes = sorted(
            sum(len(text_of(message.get("content"))) for message in prompt.messages) for prompt in self.prompts
        )
        secrets = secrets_of(config, self.endpoint)
        facts = [
            (texts["plan.target"], redact(self.endpoint.url, secrets)),
            *self._way(),
            (texts["plan.model"], config.model or texts["plan.first_model"]),
            (texts["plan.prompts"], texts["plan.sizes"].format(n=len(sizes), low=sizes[0], high=sizes[-1])),
            (texts["plan.out"], config.out or default_directory(config.model, time.time())),
        ]
        for line in plan_lines(stages, bounds_of(config, stages, self.prompts), facts, texts):
            print(line)
        part = Part(*config.host)
        runner = Runner(
            config, self.provider, self.endpoint, self.prompts, part, self.poll, no_record, None, self.shape
        )
        print("\n" + texts["plan.sample"] + "\n")
        print(redact(runner.sample(stages[0]).decode("utf-8", "replace"), secrets).replace("\r\n", "\n"))
        return EXIT_OK

    def _way(self) -> List[Tuple[str, str]]:
        """What --dry-run says of the way to the endpoint, where it is not straight."""
        texts, route = self.texts, self.route
        facts = []
        if route.proxy is not None:
            value = texts["plan.proxy.from"].format(proxy=route.proxy.url, reason=route.reason)
            facts.append((texts["plan.proxy"], value))
        fixed = fixed_addresses(self.config.resolve, *peer_of(self.endpoint, route))
        if fixed:
            facts.append((texts["plan.address"], ", ".join(show_address(found[4]) for found in fixed) + " (--resolve)"))
        return facts

    def _make_shape(self, sink: Callable[[Dict[str, Any]], None]) -> Shape:
        """Asks the endpoint how it counts; the dialect that this finds out holds for a run in this process too."""
        config = self.config
        asking = dataclasses.replace(config, output_tokens=None)
        provider = make_provider(asking)
        provider.dialect, provider.auth = self.provider.dialect, self.provider.auth
        runner = Runner(asking, provider, self.endpoint, self.prompts, Part(), self.poll, sink)
        fit = fit_endpoint(
            config, self.workload, lambda prompt, name: self.loop.run_until_complete(runner.ask(prompt, name))
        )
        return self._shape_of(fit)

    def _shape_of(self, fit: Fit) -> Shape:
        config = self.config
        lengths = parse_lengths(config.input_tokens) if config.input_tokens else None
        return Shape(fit, lengths, config.prefix_tokens, self.workload.block_tokens, config.seed)

    def _measure(self, directory: str, started: float, probes: Sequence[Mapping[str, Any]]) -> int:
        try:
            writer = ResultsWriter(directory)
        except OSError as error:
            what = "%s cannot be written to (%s)" % (directory, error.strerror or error)
            raise UserError(what + "; name another directory with --out") from None
        failure = ""
        try:
            command = shown_command(self.words)
            header = make_header(self.config, self.endpoint, self.prompts, command, started)
            header["provider"] = self.provider.name
            earlier = find_selftest(header["host"])
            if earlier is not None:
                header["selftest"] = earlier
            if self.shape is not None:
                header["fit"] = dict(zip(Fit._fields, self.shape.fit))
            if self.workload.notes:
                header["workload_notes"] = list(self.workload.notes)
            writer.write({"llmbench": FORMAT, "run": header})
            for record in probes:
                writer.write(record)
            end = self._drive(writer, directory)
            writer.write({"end": {**end, "ended_at": iso_time(time.time())}})
        except WriteError as error:
            failure = str(error)
        finally:
            writer.close()
        return self._conclude(directory, failure)

    def _drive(self, writer: ResultsWriter, directory: str) -> Dict[str, Any]:
        """The measurement itself, with signals and progress around it; what the end line says of it."""
        planned = plan_stages(self.config)
        progress, stages = Progress(stages=len(planned)), iter(planned)
        if self.config.find_max is not None:
            progress.stages, stages = 0, self._probes(directory, progress)
        measuring: Union[Runner, Crew]
        if self.config.processes == 1:
            part = Part(*self.config.host)
            measuring = Runner(
                self.config, self.provider, self.endpoint, self.prompts, part, self.poll, writer.write, None, self.shape
            )
            measuring.progress, measuring.zero = progress, self._zero()
            measuring.keep_token(self.keeper)
            self.keeper.start(self.loop)
            work = measuring.run(stages)
        else:
            measuring = Crew(self._worker_plans(directory), stages, progress)
            measuring.start()
            work = measuring.run()
        for number in (signal.SIGINT, signal.SIGTERM):
            self.loop.add_signal_handler(number, self._interrupt, measuring, number)
        gc.collect()
        gc.freeze()  # what start-up made is not looked at again during the run
        with ProgressPrinter(self.config.progress, sys.stderr, progress, self.texts):
            self.loop.run_until_complete(work)
        end: Dict[str, Any] = {"reason": measuring.reason}
        own = self.provider.dialect.notes + self.keeper.notes
        notes = measuring.notes if isinstance(measuring, Crew) else own
        if notes:
            end["dialect"] = notes
        if isinstance(measuring, Crew) and measuring.lost:
            end["lost_workers"] = measuring.lost
        return end

    def _probes(self, directory: str, progress: Progress) -> Iterator[Stage]:
        """The stages of --find-max: each follows from how those before it did, read back from their records."""
        search = search_maximum(*search_bounds(self.config))
        load, path = next(search), os.path.join(directory, RESULTS)
        for index in itertools.count():
            stage = probe_stage(self.config, index, load)
            yield stage
            entries, block = judge_stage(read_lines(path, warn), index)
            failed = [entry["gate"] for entry in entries if not entry["passed"]]
            failed += ["the client was the limit"] * ("limited_by" in block["client"])
            failed += ["the load was not reached"] * fell_short(block)
            said = "%d streams" % stage.concurrency if stage.rps is None else "%g req/s" % stage.rps
            progress.notes.append("probe %d, %s: %s" % (index + 1, said, ", ".join(failed) or "all gates passed"))
            try:
                load = search.send(not failed)
            except StopIteration:
                return

    def _worker_plans(self, directory: str) -> List[WorkerPlan]:
        """One plan for each worker process."""
        count, zero = int(self.config.processes), self._zero()
        host, hosts = self.config.host
        return [
            WorkerPlan(
                self.config,
                self.endpoint_url,
                self.prompts,
                Part(host, hosts, number, count),
                zero,
                functools.partial(ResultsWriter, directory),
                self.shape,
                self.keeper.grant if self.keeper.renews else None,
            )
            for number in range(count)
        ]

    def _zero(self) -> float:
        """The run's zero on the monotonic clock: now, or the moment that --start-at names."""
        if self.config.start_at is None:
            return clock()
        moment = timestamp(self.config.start_at)
        return moment - time.time() + clock()  # both clocks read at once: what is slow is done before

    def _interrupt(self, measuring: Union[Runner, Crew], number: int) -> None:
        """The first signal stops the run gently, the second at once."""
        if self.signal:
            measuring.cancel("interrupted twice")
            return
        self.signal = number
        measuring.stop("interrupted by " + signal.Signals(number).name)

    def _conclude(self, directory: str, failure: str) -> int:
        """Summary, report and the exit status."""
        for number in (signal.SIGINT, signal.SIGTERM):  # an impatient second one must not cost the files
            self.loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        try:
            forms = [form for form in FORMS if getattr(self.config, form)]
            summary = build_outputs(directory, self.assets, warn, forms, self.config.lang)
        except WriteError as error:
            failure = failure or str(error)
            summary = None
        if summary is not None:
            print_summary(summary, self.texts, directory)
        if failure:
            sys.stderr.write("llmbench: error: %s\n" % failure)
            return EXIT_WRITE
        if self.signal:
            return 128 + self.signal
        return EXIT_NO_SUCCESS if summary is None else status_of(summary)


def status_of(summary: Mapping[str, Any]) -> int:
    """The exit status that a run's figures stand for."""
    if not summary["requests"]["success"]:
        return EXIT_NO_SUCCESS
    if summary["verdict"]["state"] == "INVALID":
        return EXIT_CLIENT
    return EXIT_OK if all_passed(summary) else EXIT_GATE


def say(text: str) -> None:
    """A text on stdout; a reader that has gone, as of `llmbench … | head`, changes neither work nor exit status."""
    with contextlib.suppress(BrokenPipeError):
        print(text, flush=True)


def print_summary(summary: Mapping[str, Any], texts: Mapping[str, str], directory: str) -> None:
    """The summary's tables on stdout, and where the files are."""
    paint = Paint(sys.stdout)
    lines = summary_lines(summary, texts, paint)
    end = summary.get("end") or {}
    if end.get("reason", "done") != "done":
        reason = printable(str(end["reason"]))
        lines += ["", paint("yellow", texts["terminal.ended_early"].format(reason=reason))]
    for note in end.get("dialect", []):
        lines += ["", printable(note)]
    say("\n".join([*lines, "", "%s  %s" % (texts["terminal.report"], os.path.join(directory, REPORT))]))


def command_run(words: Sequence[str]) -> int:
    """`run`: the benchmark."""
    config = read_config(words)
    with failures_of_provider(config):
        return run_benchmark(config, words)


@contextlib.contextmanager
def failures_of_provider(config: Config) -> Iterator[None]:
    """What fails in here because of a provider in a .py file becomes a UserError that says where in the file."""
    try:
        yield
    except (UserError, WriteError, BrokenPipeError):
        raise
    except Exception as error:
        if not config.provider.endswith(".py"):
            raise
        secrets = [config.token, config.auth_key, config.auth_secret, *config.auth_opt.values()]
        secrets += [line.partition(":")[2].strip() for line in config.header]
        known = [spelling for secret in secrets if len(secret) > 3 for spelling in spellings(secret)]
        failed = redact(where_it_failed(error, config.provider), known)
        raise UserError("--provider %s: %s" % (config.provider, failed)) from None


def run_benchmark(config: Config, words: Sequence[str]) -> int:
    """The benchmark that a configuration describes; returns the exit status."""
    if config.out is not None:
        check_directory(config.out)
    make_provider(config)
    assets = load_assets()
    builtin = [(language, assets["prompts/%s.txt" % language]) for language in ("en", "zh")]
    workload = read_workload(config.workload_file, builtin, config.timestamp_unit)
    follow_trace(config, workload)
    for note in workload.notes:
        warn(note)
    replace_headers([], config.header)
    known = bool(config.concurrency) and config.find_max is None
    trouble = raise_file_limit((max(config.concurrency) if known else UNCAPPED_STREAMS) + 64)
    if trouble and known:  # else nobody knows how many are needed
        raise UserError(trouble)
    if not config.url.startswith("mock:"):
        session = Session(config, config.url, workload, assets, words)
        warn_without_token(config, session.endpoint, session.provider.auth)
        if session.route.proxy is not None and not config.proxy:
            told = (session.route.proxy.url, session.route.reason)
            warn("through the proxy %s (%s); --proxy none goes straight" % told)
        return session.run()
    with MockProcess(mock_flags(config.url)) as mock:
        return Session(config, mock.url, workload, assets, words).run()


GUESSED_FIT = Fit(10.0, 0.25)  # of --dry-run, which asks no endpoint: four characters a token, and a template


def no_record(_: Mapping[str, Any]) -> None:
    """The sink of a run that is not made."""


def follow_trace(config: Config, workload: Workload) -> None:
    """Takes the load from a trace, unless the user named one; raises UserError where flags and workload disagree."""
    if workload.block_tokens and "unique" not in config.given:
        config.unique = False  # a prefix of its own would end what the trace's requests have in common
    if not workload.trace:
        for flag, named in (("arrival trace", config.arrival == "trace"), ("trace-speed", config.trace_speed != 1.0),
                            ("timestamp-unit", config.timestamp_unit != "auto")):  # fmt: skip
            if named:
                raise UserError("--%s needs a --workload-file that is a trace, with timestamps" % flag)
        return
    load_given = not {"concurrency", "rps", "find_max"}.isdisjoint(config.given)
    if load_given and config.arrival != "trace":
        return  # the lengths are the trace's, the load is not
    refused = {"warmup": config.warmup, "ramp": config.ramp, "order": config.order != "in-order"}
    for flag, value in refused.items():
        if value:
            raise UserError("--%s does not go with a trace's own times; give a load with --rps or --concurrency" % flag)
    if not load_given:
        config.concurrency = []
    config.arrival = "trace"
    config.rps = [trace_rate([prompt.at or 0.0 for prompt in workload.prompts], config.trace_speed)]
    if config.total_requests is None and config.duration is None:
        config.total_requests = len(workload.prompts)


def warn_without_token(config: Config, endpoint: Endpoint, auth: Auth) -> None:
    """Says that requests go out without authorization, unless the endpoint is this host itself."""
    named = any(line.lower().startswith(("authorization:", "api-key:", "x-api-key:")) for line in config.header)
    local = is_loopback(endpoint.host)
    if type(auth) is Auth and not (config.auth or endpoint.userinfo or named or local):
        warn("warning: no token; give --token or set LLMBENCH_TOKEN if the endpoint needs one")


# What `check` takes of `run`'s flags: all that say where to, which way, as whom and in which dialect.
CHECK_FLAGS = (
    "url", "provider", "provider-file", "model", "token", "auth", "auth-key", "auth-secret", "auth-opt", "no-stream",
    "max-tokens-field", "think-tags", "timeout", "connect-timeout", "ttft-timeout",
    "idle-timeout", "insecure", "ca-cert", "client-cert", "client-key", "server-name", "resolve", "proxy", "header",
    "body", "end-optional", "lang",
)  # fmt: skip


def check_parser() -> ArgumentParser:
    """The parser of `check`: the flags of `run` that have to do with the endpoint, and two of its own."""
    parser = ArgumentParser(
        prog="llmbench check", formatter_class=argparse.RawDescriptionHelpFormatter, description=command_check.__doc__,
        epilog="exit status: 0 usable, 2 usage, 3 not usable",
    )  # fmt: skip
    add_flags(parser, (FLAGS[name] for name in CHECK_FLAGS))
    parser.add_argument("--json", "-json", action="store_true", help="one JSON document instead of lines")
    parser.add_argument("--explain", "-explain", action="store_true",
                        help="print what is signed, step by step, and the headers as they are sent, secrets masked")
    return parser


# Where the command of a run takes a secret from that was written out.
SOURCES = {"token": "LLMBENCH_TOKEN", "auth-key": "LLMBENCH_AUTH_KEY", "auth-secret": "LLMBENCH_AUTH_SECRET"}


def sourced_words(words: Sequence[str]) -> Tuple[List[str], List[str]]:
    """A check's words as a run takes them, with secrets that were written out taken from variables: which ones."""
    kept, variables, flag = [], [], ""
    for word in words:
        name, equals, value = word.partition("=")
        bare = name.lstrip("-") if name.startswith("-") and not flag else ""
        if bare in ("json", "explain"):
            continue
        secret, text = (flag, word) if flag else (bare, value) if equals else ("", "")
        flag = bare if bare in SECRET_FLAGS and not equals else ""
        if secret in SOURCES and not re.match(r"^(env|file|cmd):", text):
            variables.append("$" + SOURCES[secret])
            kept.append(word[: len(word) - len(text)] + "env:" + SOURCES[secret])
        else:
            kept.append(word)
    return kept, variables


def token_source(words: Sequence[str], config: Config) -> str:
    """Where the token came from, without the token."""
    if "token" not in config.given:
        return "$LLMBENCH_TOKEN" if os.environ.get("LLMBENCH_TOKEN", "").strip() else "$OPENAI_API_KEY"
    text = check_parser().parse_all(words).token
    return "--token " + text if re.match(r"^(env|file|cmd):", text) else "--token"


def command_check(words: Sequence[str]) -> int:
    """`check`: what a run would meet at an endpoint, found out with at most five requests."""
    parsed = vars(check_parser().parse_all(words))
    as_json, explain = parsed.pop("json"), parsed.pop("explain")
    config = make_config(parsed)
    replace_headers([], config.header)
    texts = load_texts(load_assets(), config.lang)
    with failures_of_provider(config):
        if not config.url.startswith("mock:"):
            return run_check(config, config.url, words, as_json, explain, texts)
        with MockProcess(mock_flags(config.url)) as mock:
            return run_check(config, mock.url, words, as_json, explain, texts)


def run_check(
    config: Config, url: str, words: Sequence[str], as_json: bool, explain: bool, texts: Mapping[str, str]
) -> int:  # fmt: skip
    """The check, told as it goes; the exit status."""
    provider = make_provider(config)
    config.stream = provider.streams
    endpoint = parse_url(url, provider)
    check_way(endpoint, config)
    findings: List[Finding] = []
    paint = Paint(sys.stdout)

    def hide(text: str) -> str:
        return redact(text, secrets_of(config, endpoint))  # tokens that were fetched meanwhile, too

    def tell(finding: Finding) -> None:
        findings.append(finding)
        if not as_json:
            say("\n".join(finding_lines(finding, texts, paint, hide)))

    if not as_json:
        say(check_text(texts, "title", url=printable(hide(endpoint.url))) + "\n")
    loop, poll = new_loop()
    keeper = wake_kernel_stamps()
    try:
        preflight = Preflight(config, provider, endpoint, poll, token_source(words, config), tell)
        loop.run_until_complete(preflight.run())
    finally:
        close_loop(loop)
        keeper.close()
    explained = preflight.explain() if explain else None
    kept, variables = sourced_words(words)
    command = hide(shown_command([*kept, *found_flags(preflight, findings)]))
    notes = [check_text(texts, "command.secrets", names=", ".join(variables))] if variables else []
    notes += [check_text(texts, "command.masked")] if "***" in command else []
    if as_json:
        document = check_document(preflight, findings, command, notes, texts, hide)
        if explained is not None:
            document["explained"] = explain_json(explained, hide)
        text = json.dumps(document, ensure_ascii=False, indent=1)
        say(INVISIBLE.sub(lambda match: "\\u%04x" % ord(match.group()), text))
    else:
        lines = explain_lines(explained, texts, hide) if explained is not None else []
        say("\n".join(lines + closing_lines(preflight, findings, command, notes, texts)))
    return EXIT_NO_SUCCESS if count_states(findings)["failed"] else EXIT_OK


def add_form_arguments(parser: ArgumentParser) -> None:
    """The flags that `report` and `merge` share with `run`."""
    for form in FORMS:
        parser.add_argument("--" + form, "-" + form, action="store_true", help=FLAGS[form].meaning)
    parser.add_argument("--lang", "-lang", type=read_argument(FLAGS["lang"]), metavar="LANG",
                        help="language of the terminal and of summary.md: en or zh")


def rebuild(directory: str, given: argparse.Namespace) -> Dict[str, Any]:
    """Every file of a directory again from its results.jsonl, and the summary on the terminal; raises WriteError."""
    assets, language = load_assets(), given.lang or language_of_locale()
    summary = build_outputs(directory, assets, warn, [form for form in FORMS if getattr(given, form)], language)
    print_summary(summary, load_texts(assets, language), directory)
    return summary


def command_report(words: Sequence[str]) -> int:
    """`report DIR`: results.csv, summary.json and report.html again, from results.jsonl alone."""
    parser = ArgumentParser(prog="llmbench report", description=command_report.__doc__)
    parser.add_argument("place", metavar="DIR", help="a directory that a run left, or an archive that `pack` made")
    parser.add_argument("--out", "-out", metavar="DIR", help="of an archive: where it is opened; a new directory "
                        "(default: named as the archive, here)")
    add_form_arguments(parser)
    given = parser.parse_all(words)
    path = results_path(given.place)
    archived = path == given.place
    if not archived and given.out:
        raise UserError("--out is for an archive; a directory's files are built where they are")
    directory = given.out or (archive_stem(path) if archived else given.place)
    try:
        with opened_run(path, directory) if archived else contextlib.nullcontext():
            rebuild(directory, given)
    except WriteError as error:
        sys.stderr.write("llmbench: error: %s\n" % error)
        return EXIT_WRITE
    return EXIT_OK


def archive_stem(path: str) -> str:
    """The name of an archive without its endings, in the working directory."""
    name = os.path.basename(path)
    stem = re.sub(r"(?i)(\.tar)?\.t?gz$", "", name)
    return stem if stem and stem != name else name + ".opened"


def command_merge(words: Sequence[str]) -> int:
    """`merge DIR… --out DIR`: joins the shards of one run exactly, from their records, into a new directory."""
    parser = ArgumentParser(prog="llmbench merge", description=command_merge.__doc__)
    parser.add_argument("directories", metavar="DIR", nargs="+",
                        help="a directory that `run --shard` left, or an archive of one")
    parser.add_argument("--out", "-out", metavar="DIR", help="where the files go; never overwrites results")
    add_form_arguments(parser)
    given = parser.parse_all(words)
    if not given.out:
        raise UserError("--out is needed; name a new directory for the merged run")
    try:
        merge_shards(given.directories, given.out, warn)
        return status_of(rebuild(given.out, given))
    except WriteError as error:
        sys.stderr.write("llmbench: error: %s\n" % error)
        return EXIT_WRITE


def command_pack(words: Sequence[str]) -> int:
    """`pack DIR`: one archive of a run that `report` opens again: records, configuration, host, checksums."""
    parser = ArgumentParser(prog="llmbench pack", description=command_pack.__doc__)
    parser.add_argument("place", metavar="DIR", help="a directory that a run left, or an archive of one")
    parser.add_argument("--out", "-out", metavar="FILE",
                        help="the archive; never overwrites one (default: DIR.tar.gz, redacted DIR-redacted.tar.gz)")
    parser.add_argument("--redact", "-redact", action="store_true",
                        help="put names in place of hosts, addresses, prompts and texts; no figure changes")
    given = parser.parse_all(words)
    path = results_path(given.place)
    stem = archive_stem(path) if path == given.place else os.path.abspath(given.place)
    out = given.out or stem + "-redacted" * given.redact + ".tar.gz"
    if os.path.exists(out):
        raise UserError("%s is there already; name another file with --out" % out)
    if not os.access(os.path.dirname(os.path.abspath(out)), os.W_OK | os.X_OK):
        raise UserError("%s cannot be written to; name another file with --out" % out)
    try:
        replaced = pack_run(given.place, out, given.redact, warn)
    except WriteError as error:
        sys.stderr.write("llmbench: error: %s\n" % error)
        return EXIT_WRITE
    texts = load_texts(load_assets(), language_of_locale())
    if given.redact:
        print(texts["terminal.replaced"].format(**{kind: replaced.get(kind, 0) for kind in (
            "host", "address", "prompt", "text", "other")}))
    print("%s  %s" % (texts["terminal.archive"], os.path.relpath(out) if given.out is None else out))
    return EXIT_OK


def compare_parser() -> ArgumentParser:
    """The parser of `compare`."""
    parser = ArgumentParser(
        prog="llmbench compare", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="sets runs side by side: one offline page and a table of what differs, in set-up and figures",
        epilog="exit status: 0 done; 1 a --fail-if is shown to hold; 2 usage; 5 the page could not be written; with\n"
        "--fail-if also 3 a run has no successful request, 4 a run is INVALID: nothing is judged. A --fail-if that\n"
        "can't be judged for lack of requests is said on stderr and does not fail",
    )  # fmt: skip
    parser.add_argument("directories", metavar="DIR", nargs="+",
                        help="a directory that a run left, or an archive; the others are compared with the first")
    parser.add_argument("--out", "-out", default="compare.html", metavar="FILE",
                        help="the page (default: compare.html); replaces an older comparison and no other file")
    parser.add_argument("--fail-if", "-fail-if", action="append", default=[], metavar="CHANGE",
                        help="a change such as ttft.p95>+10%%, ttft.p95>+50ms, throughput<-5%% or success<-1%% "
                        "(points); exit status 1 when all of its 95 %% interval lies beyond the limit (repeat)")
    parser.add_argument("--lang", "-lang", type=read_argument(FLAGS["lang"]), metavar="LANG",
                        help="language of terminal and page: en or zh (default: from the locale)")
    return parser


def read_conditions(texts: Sequence[str]) -> List[Condition]:
    """The --fail-if conditions; raises UserError."""
    try:
        return [parse_condition(text) for text in texts]
    except ValueError as error:
        raise UserError("--fail-if %s" % error) from None


def compared_status(first: ComparedRun, against: Sequence[Against]) -> int:
    """The exit status that a comparison's conditions stand for; 0 without any."""
    outcomes = [outcome for one in against for outcome in one.outcomes]
    if not outcomes:
        return EXIT_OK
    if not all(run.summary["requests"]["success"] for run in [first] + [one.run for one in against]):
        return EXIT_NO_SUCCESS
    if not all(one.judged for one in against):
        return EXIT_CLIENT
    return EXIT_GATE if any(outcome.state == "failed" for outcome in outcomes) else EXIT_OK


def command_compare(words: Sequence[str]) -> int:
    """`compare DIR DIR…`: one offline compare.html and a table: what differs in the set-up, and in every figure."""
    given = compare_parser().parse_all(words)
    conditions = read_conditions(given.fail_if)
    check_comparison_file(given.out)
    assets, language = load_assets(), given.lang or language_of_locale()
    first, *others = read_runs(given.directories, conditions, warn)
    against = [compare_runs(first, other, conditions) for other in others]
    for one in against:
        if conditions and not one.pairs:
            raise UserError("%s and %s have no load in common; there is nothing to hold --fail-if against"
                            % (first.place, one.run.place))  # fmt: skip
    texts = load_texts(assets, language)
    try:
        write_comparison(given.out, first, against, language, assets)
    except WriteError as error:
        sys.stderr.write("llmbench: error: %s\n" % error)
        return EXIT_WRITE
    paint = Paint(sys.stdout)
    with contextlib.suppress(BrokenPipeError):  # `llmbench … | head` keeps its exit status
        for line in comparison_lines(first, against, texts, paint):
            print(line)
        print("\n%s  %s" % (texts["compare.page"], given.out))
    for outcome in (outcome for one in against for outcome in one.outcomes if outcome.state == "unjudged"):
        warn("--fail-if %s could not be judged for %s" % (outcome.condition.text, outcome.letter))
    return compared_status(first, against)


def command_providers(words: Sequence[str]) -> int:
    """`providers`: the registered providers and what each expects; with a NAME, the details of one."""
    parser = ArgumentParser(prog="llmbench providers", description=command_providers.__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a provider, an example, or a .json or .py file")
    parser.add_argument("--json", action="store_true", help="print the file that declares NAME, to copy and change")
    given = parser.parse_all(words)
    if given.name is None:
        if given.json:
            raise UserError("--json needs the NAME of a provider that a file declares; `llmbench providers` lists them")
        for line in provider_lines():
            print(line)
        return EXIT_OK
    if given.json:
        print(declared_source(given.name).decode("utf-8").rstrip())
        return EXIT_OK
    for line in provider_details(given.name):
        print(line)
    return EXIT_OK


def provider_lines() -> Iterator[str]:
    """A line for each provider and example."""
    names = sorted(PROVIDERS)
    width = max(map(len, [*names, *EXAMPLES]))
    for name in names:
        provider = bare_provider(name)
        yield "%s  %s%s" % (name.ljust(width), provider.summary, " [untested]" * provider.untested)
    yield ""
    for name in EXAMPLES:
        yield "%s  %s" % (name.ljust(width), bare_provider(name).summary)
    yield ""
    yield "[untested]: it follows the vendor's documentation and has not been tried on a live endpoint."
    yield "The second list is of examples to copy. An endpoint of your own: --provider FILE.json, or FILE.py."
    yield "`llmbench providers NAME` prints what one expects, and `providers NAME --json` the file that declares it."


def bare_provider(name: str) -> Provider:
    """A provider to look at, without what a run gives it: a stand-in for each option that it needs."""
    form = form_of(name)
    if form is None:
        return make_provider(Config(provider=name))
    bare = form._replace(auth_options={**dict.fromkeys(form.option_names, ""), **form.auth_options}, exchange=None)
    kept = {known for known in form.names if not known.startswith("env:")}
    bare = bare._replace(names=frozenset(kept), sign=None, secrets=frozenset())
    return DeclaredProvider(bare, Config(provider=name))


def declared_source(name: str) -> bytes:
    """The file that declares a provider; raises UserError for one that is code."""
    if name.endswith(".json"):
        return read_provider_file(name)
    if name in DECLARED or name in EXAMPLES:
        return builtin_source(name)
    make_provider(Config(provider=name))
    raise UserError("provider %s is code; `llmbench providers` says which are files" % name)


def provider_details(name: str) -> Iterator[str]:
    """What a provider expects, a line each."""
    provider, form = bare_provider(name), form_of(name)
    scheme = form.auth if form is not None else type(provider).auth
    auth = AUTHS[scheme]
    rows = [
        ("provider", provider.name), ("", provider.summary), ("path", provider.path),
        ("path without stream", provider.whole_path), ("models", provider.models or "no list: --model is needed"),
        ("auth", "%s: %s" % (scheme, auth.summary)),
        ("options", ", ".join(option if option not in provider.auth_options else "%s=%s" % (
            option, provider.auth_options[option]) for option in sorted(
                {*auth.options, *provider.auth_options, *provider.option_names}))),
        ("end", " or ".join(filter(None, (provider.end, "a clean end of the body" * (not provider.end_required))))),
        ("given up if refused", ", ".join([*provider.optional, *provider.exact])),
        ("declared by", "a file: `llmbench providers %s --json`" % name if form is not None else "code"),
        ("untested", "it follows the documentation and has not been tried on a live endpoint" * provider.untested),
    ]  # fmt: skip
    if not provider.needs_model:
        rows[4] = ("models", "its requests name none")
    for label, text in rows:
        if text:
            yield "%-20s %s" % (label, text)


def command_mock(words: Sequence[str]) -> int:
    """`mock`: the built-in mock LLM server."""
    parser = ArgumentParser(prog="llmbench mock", description=command_mock.__doc__)
    add_mock_arguments(parser)
    given = parser.parse_all(words)
    return run_mock(options_from_arguments(given), given.host, given.port, given.stdin_guard)


def command_selftest(words: Sequence[str]) -> int:
    """`selftest`: what this host can measure, found out against the built-in mock; takes about half a minute."""
    parser = ArgumentParser(prog="llmbench selftest", description=command_selftest.__doc__)
    parser.add_argument("--out", default=SELFTEST_FILE, metavar="FILE", help="where the result goes; a run quotes it")
    parser.add_argument("--lang", type=read_argument(FLAGS["lang"]), metavar="LANG", help="language of the terminal")
    given = parser.parse_all(words)
    assets = load_assets()
    texts = load_texts(assets, given.lang or language_of_locale())
    trouble = raise_file_limit(max(level.streams for level in SELFTEST_LEVELS) + 64)
    if trouble:
        raise UserError(trouble)
    place = os.path.dirname(os.path.abspath(given.out))
    if os.path.isdir(given.out) or not os.access(place, os.W_OK | os.X_OK):
        raise UserError("%s cannot be written to; name another file with --out" % given.out)
    keeper = wake_kernel_stamps()
    try:
        result = selftest(parse_workload(assets["prompts/en.txt"], "built-in prompts").prompts, warn)
        for line in selftest_lines(result, texts):
            print(line)
        with WholeFile(given.out) as file:
            json.dump(result, file, indent=2)
            file.write("\n")
    except WriteError as error:
        sys.stderr.write("llmbench: error: %s\n" % error)
        return EXIT_WRITE
    finally:
        keeper.close()
    print("\n%s  %s" % (texts["terminal.selftest.file"], given.out))
    return EXIT_OK


COMMANDS: Dict[str, Tuple[Callable[[Sequence[str]], int], str]] = {
    "run": (command_run, "the benchmark (the default)"),
    "check": (command_check, "what a run would meet: network, TLS, token, model, stream; the command to run"),
    "report": (command_report, "build summary.json, results.csv and report.html again from results.jsonl alone"),
    "compare": (command_compare, "set runs side by side: what differs in the set-up, and in every figure"),
    "pack": (command_pack, "put a run in one archive that `report` opens again; --redact takes hosts and texts out"),
    "merge": (command_merge, "join the shards of one run, from their records, into a new directory"),
    "selftest": (command_selftest, "what this host can measure: the tool's own error and capacity"),
    "mock": (command_mock, "the built-in mock LLM server"),
    "providers": (command_providers, "the registered providers and what each expects"),
}


def general_help() -> str:
    """What `llmbench --help` prints."""
    lines = ["usage: llmbench [COMMAND] [flags]", "", "commands:"]
    lines += ["  %s  %s" % (padded(row, 10, False), meaning) for row, (_, meaning) in COMMANDS.items()]
    lines += ["", "`llmbench COMMAND --help` lists a command's flags."]
    return "\n".join([*lines, "first try:  %s run --url mock: --out first" % PROGRAM])


def dispatch(words: Sequence[str]) -> int:
    """Runs the command that the arguments name; raises UserError."""
    if words and words[0] in ("--version", "-version"):
        print("llmbench " + __version__)
        return EXIT_OK
    if not words or words[0] in ("--help", "-help", "-h"):
        print(general_help())
        return EXIT_OK if words else EXIT_USAGE
    if words[0].startswith("-"):
        return command_run(words)
    if words[0] not in COMMANDS:
        near = nearest(words[0], COMMANDS)  # a word that is near no command may be a secret
        named = "%r is not a command%s" % (words[0], near) if near else "the first word is not a command"
        raise UserError(named + "; `llmbench --help` lists them")
    return COMMANDS[words[0]][0](words[1:])


def main(words: Optional[Sequence[str]] = None) -> int:
    """The program: returns the exit status."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before we started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # takes the free descriptor, too
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an ASCII locale must not end a run with a UnicodeEncodeError
            stream.reconfigure(errors="replace" if "utf" in (stream.encoding or "").lower() else "backslashreplace")
    try:
        status = dispatch(sys.argv[1:] if words is None else words)
        with contextlib.suppress(BrokenPipeError):  # it is raised again at the exit, if at all
            sys.stdout.flush()
            return status
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return status
    except UserError as error:
        line = CONTROL.sub(" ", str(error))  # a file's name or a mistyped value may have any length and form
        sys.stderr.write("llmbench: error: %s\n" % (line if len(line) <= 2000 else line[:1500] + " … " + line[-200:]))
        return EXIT_USAGE
    except BrokenPipeError:  # `llmbench … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except KeyboardInterrupt:
        sys.stderr.write("llmbench: interrupted\n")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
