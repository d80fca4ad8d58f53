"""A results.jsonl of very many made-up requests, as a long run leaves it: what the benchmark of `report` reads."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

STREAMS = 200
SECOND = 1767323045  # when the run began, in s since 1970
TOKENS = 100
FAILED = 0.005  # share of requests that end in HTTP 503
RECORD = (
    '{"request_id":"cafe0001-0-%d","prompt_id":"en-%d","phase":"measure","stage":0,"provider":"openai","status":"ok",'
    '"http_status":200,"start_ts":"%s","first_content_ts":"%s","end_ts":"%s","scheduled_ms":%.4f,"start_ms":%.4f,'
    '"queue_ms":0.05,"connect_ms":0.0,"ttfb_ms":%.4f,"ttfe_ms":%.4f,"ttft_ms":%.4f,"ttft_slack_ms":0.0,'
    '"latency_ms":%.4f,"ttft_from_scheduled_ms":%.4f,"latency_from_scheduled_ms":%.4f,"decode_ms":%.4f,"tpot_ms":%.6f,'
    '%s,"chunks":100,"in_bytes":346,"out_bytes":19483,"in_tokens":31,"out_tokens":100,"out_chars":470,'
    '"out_crc32":"%08x","finish_reason":"stop","reused":true,"lag_ms":%.4f,"clock":"kernel","rtt_ms":0.098,'
    '"retransmits":0,"out_of_order":0}\n'
)
FAILURE = (
    '{"request_id":"cafe0001-0-%d","prompt_id":"en-%d","phase":"measure","stage":0,"provider":"openai",'
    '"status":"http_error","err":"HTTP 503: overloaded, request %d","http_status":503,"start_ts":"%s","end_ts":"%s",'
    '"scheduled_ms":%.4f,"start_ms":%.4f,"queue_ms":0.05,"connect_ms":0.0,"ttfb_ms":5.0,"in_bytes":346,"out_bytes":88,'
    '"reused":true,"lag_ms":0.0213,"clock":"kernel"}\n'
)


def stamp(moment_ms: float) -> str:
    """A moment of the run as ISO 8601 UTC with microseconds."""
    seconds, micros = divmod(int(moment_ms * 1000), 1_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(SECOND + seconds)) + ".%06dZ" % micros


def made_gaps(draw: random.Random) -> tuple[str, float]:
    """The inter-chunk keys of one record, and the sum of its gaps in ms."""
    gaps = [draw.gauss(20, 1.5) for _ in range(TOKENS - 1)]
    buckets: dict[int, int] = {}
    for gap in gaps:
        bucket = 1 + int(math.log(gap * 1000) / math.log(1.01))
        buckets[bucket] = buckets.get(bucket, 0) + 1
    keys = {"itl_hist": buckets, "itl_sum_ms": round(sum(gaps), 4), "itl_min_ms": min(gaps), "itl_max_ms": max(gaps)}
    return json.dumps(keys, separators=(",", ":"))[1:-1], sum(gaps)


def header(records: int) -> dict:
    """The first line."""
    config = {
        "url": "http://127.0.0.1:9000/v1/chat/completions", "model": "made", "provider": "openai",
        "concurrency": [STREAMS], "total_requests": records, "max_tokens": TOKENS, "token_mode": "usage",
        "unique": True, "prompts": {"source": "built-in", "count": 50},
    }  # fmt: skip
    run = {
        "tool_version": "1.0.0", "run_id": "cafe0001", "provider": "openai", "model": "made", "url": config["url"],
        "started_at": stamp(0), "command": "llmbench run", "host": "bench", "address": "127.0.0.1", "os": "Linux",
        "arch": "x86_64", "python": "CPython 3.11.0", "utc_offset": "+00:00", "config": config,
    }  # fmt: skip
    return {"llmbench": "1", "run": run}


def write(directory: Path, records: int) -> None:
    """results.jsonl in a new directory."""
    directory.mkdir()
    draw = random.Random(7)
    shapes = [made_gaps(draw) for _ in range(500)]
    free = [0.0] * STREAMS
    with (directory / "results.jsonl").open("w", encoding="utf-8") as file:
        file.write(json.dumps(header(records)) + "\n")
        for number in range(records):
            stream = number % STREAMS
            start = free[stream]
            line, free[stream] = made_line(draw, number, start, *shapes[draw.randrange(len(shapes))])
            file.write(line)
        lags = {str(bucket): 1000 for bucket in range(300, 700)}
        audit = {
            "stage": 0, "part": 0, "wall_ms": max(free), "cpu_percent": 31.5, "polls": 10**6,
            "loop_delay_max_ms": 11.2, "started": records, "lag_hist": lags,
        }  # fmt: skip
        file.write(json.dumps({"audit": audit}) + "\n")
        file.write(json.dumps({"end": {"reason": "done", "ended_at": stamp(max(free))}}) + "\n")


def made_line(draw: random.Random, number: int, start: float, gaps: str, decode: float) -> tuple[str, float]:
    """One record that starts at a moment in ms, and the moment at which its stream is free again."""
    prompt = number % 50
    if draw.random() < FAILED:
        end = start + 5.0
        return FAILURE % (number, prompt, number, stamp(start), stamp(end), start, start), end
    ttft = 80 + draw.lognormvariate(4.5, 0.6)
    latency = ttft + decode
    stamps = (stamp(start), stamp(start + ttft), stamp(start + latency))
    times = (start, start + 0.05, 2.1, ttft, ttft, latency, ttft + 0.05, latency + 0.05, decode, decode / (TOKENS - 1))
    return RECORD % ((number, prompt, *stamps, *times, gaps, draw.getrandbits(32), draw.random())), start + latency
