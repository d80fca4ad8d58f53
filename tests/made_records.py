"""Lines of results.jsonl made by hand: what the tests of Statistics, Artifacts and Terminal summarise."""

from __future__ import annotations

import json
import random

import llmbench


def header(**config):
    """The first line of a file; `config` goes into the run's configuration."""
    run = {"tool_version": "1.0.0", "run_id": "cafe0001", "provider": "openai", "model": "测试-model",
    "url": "http://h/v1/x",
           "started_at": "2026-01-02T03:04:05.000000Z", "command": "llmbench run", "host": "bench-1",
           "address": "10.0.0.1",
           "os": "Linux", "arch": "x86-64", "python": "CPython 3.11.0", "utc_offset": "+08:00"}  # fmt: skip
    settings = {"concurrency": [2], "token_mode": "usage", "prompts": {"source": "built-in", "count": 3}, **config}
    return {"llmbench": "1", "run": {**run, "config": settings}}


def record(start=0.0, first=100.0, end=1000.0, tokens=90, status="ok", stage=0, phase="measure", **more):
    """A request that starts, has its first output and ends at these moments in ms; None leaves a value out."""
    made = {"request_id": "cafe0001-%d-%s" % (stage, start), "prompt_id": "en-1", "phase": phase, "stage": stage,
            "provider": "openai", "status": status, "scheduled_ms": start, "start_ms": start, "queue_ms": 0.0,
            "connect_ms": 0.0, "start_ts": stamp(start), "end_ts": stamp(end),
            "lag_ms": 0.01, "clock": "kernel"}  # fmt: skip
    if status == "ok":
        made.update(latency_ms=end - start, out_tokens=tokens, out_chars=400, in_tokens=12, ttft_slack_ms=0.0)
        if first is not None:
            made.update(ttfe_ms=first - start, ttft_ms=first - start, decode_ms=end - first)
    made.update(more)
    return {key: value for key, value in made.items() if value is not None}


def stamp(moment):
    """A moment of the run, in ms, as the ISO 8601 time that records hold."""
    return llmbench.iso_time(1767323045.0 + moment / 1000.0)


def with_gaps(line, gaps_ms):
    """The record with these inter-chunk gaps."""
    hist = {}
    for gap in gaps_ms:
        bucket = llmbench.log_bucket(gap / 1000.0)
        hist[bucket] = hist.get(bucket, 0) + 1
    return {**line, "itl_hist": hist, "itl_sum_ms": sum(gaps_ms), "itl_min_ms": min(gaps_ms),
    "itl_max_ms": max(gaps_ms),
            "chunks": len(gaps_ms) + 1}  # fmt: skip


def collect(records, **config):
    """The collector that has seen a header and these lines."""
    collector = llmbench.Collector()
    for line in [header(**config), *records]:
        collector.add(json.loads(json.dumps(line)))  # as a file gives it: the keys of a histogram are texts
    return collector


def rows_of(records, **config):
    """The rows of stage 0 of these records."""
    return collect(records, **config).stages[0]


def made_run(n=40, seed=7, stages=1, failing=0.1):
    """The lines of a whole run: header, records of several kinds, audits, end."""
    draw = random.Random(seed)
    lines = [header(concurrency=[2, 4, 8][:stages])]
    for stage in range(stages):
        lines.append(record(0, 50, 300, phase="warmup", stage=stage))
        moment = 0.0
        for number in range(n):
            moment += draw.uniform(5, 40)
            first, end = moment + draw.uniform(80, 200), moment + draw.uniform(300, 900)
            if draw.random() < failing:
                lines.append(record(moment, first, end, status="http_error", stage=stage, http_status=503,
                                    err="HTTP 503: overloaded, request %d" % (1000 + number)))  # fmt: skip
            else:
                made = record(moment, first, end, 30, stage=stage, prompt_id="=cmd|'中文'", tpot_ms=(end - first) / 29)
                lines.append(with_gaps(made, [draw.expovariate(1 / 20) for _ in range(29)]))
        lines.append({"audit": {"stage": stage, "part": 0, "wall_ms": moment, "cpu_percent": 3.5, "started": n}})
    return lines + [{"end": {"reason": "done", "ended_at": "2026-01-02T03:05:05.000000Z"}}]


def write_lines(directory, lines):
    """results.jsonl in a directory, as the program writes it."""
    directory.mkdir(exist_ok=True)
    (directory / "results.jsonl").write_bytes(b"".join(llmbench.encode_line(line) for line in lines))
    return directory


def loaded_stage(index=0, load=None, n=200, seed=1, slow=1.0, zero=0.0, **more):
    """The lines of a stage that runs at its load: plan, requests, audit. Open loops are Poisson; a cap makes them wait.

    `slow` stretches the times, evenly or as a function of how far the stage is; `more` goes into every record.
    """
    load = load or {"rps": 4.0}
    draw, moment = random.Random(seed * 1000 + index), zero
    slots = [zero] * int(load.get("cap", load.get("concurrency", n)))
    lines = [{"stage": {"index": index, "load": load, "total": n, "warmup": 0}}]
    for number in range(n):
        slot = min(range(len(slots)), key=slots.__getitem__)
        if "rps" in load:
            moment += draw.expovariate(load["rps"]) * 1000.0
        else:
            moment = slots[slot]
        capped = max(0.0, slots[slot] - moment)
        stretch = slow(number / n) if callable(slow) else slow
        begin = moment + capped + 0.05
        wait = stretch * (80 + draw.lognormvariate(4.5, 0.5) + 0.02 * load.get("input_tokens", 0))
        tokens = min(256, max(8, int(draw.lognormvariate(4.4, 0.5))))
        step = stretch * draw.gauss(15.6, 1.0)
        first = begin + wait
        end = first + step * (tokens - 1)
        slots[slot] = end
        made = record(begin, first, end, tokens, stage=index, scheduled_ms=moment, queue_ms=begin - moment,
                      request_id="cafe0001-%d-%d" % (index, number), tpot_ms=step, finish_reason="stop", rtt_ms=1.8,
                      ttfb_ms=wait / 2,
                      ttft_from_scheduled_ms=first - moment, latency_from_scheduled_ms=end - moment,
                      in_tokens=load.get("input_tokens", 512) + draw.randrange(-3, 4),
                      capped_ms=capped if capped and "rps" in load else None)  # fmt: skip
        lines.append({**with_gaps(made, [step] * (tokens - 1)), **more})
    wall = max(line["start_ms"] + line.get("latency_ms", 0.0) for line in lines[1:]) - zero
    lines.append({"audit": {"stage": index, "part": 0, "wall_ms": wall, "cpu_percent": 4.0, "started": n, "due": n,
                            "lag_hist": {str(llmbench.log_bucket(0.00003)): 20 * n}}})  # fmt: skip
    return lines


def loaded_run(*stages, reason="done", **config):
    """A whole file of such stages, and its end line."""
    opened = {"arrival": "poisson", "concurrency": [], "output_tokens": None, **config}
    settings = {key: value for key, value in opened.items() if value is not None}
    return [header(**settings), *(line for stage in stages for line in stage), {"end": {"reason": reason}}]


def reported(lines, language="en"):
    """What render_report is called with for these lines."""
    collector = llmbench.Collector()
    for line in lines:
        collector.add(json.loads(json.dumps(line)))
    header_line = {**collector.header, "config": {**collector.header["config"], "lang": language}}
    return llmbench.summarize(collector), header_line, collector.rows(), collector.end
