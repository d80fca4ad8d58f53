"""Made-up runs for the report: seeded, with a summary that is computed from the same rows the charts are drawn from."""

from __future__ import annotations

import collections
import math
import random
from array import array
from dataclasses import dataclass
from typing import Dict, List

import llmbench

COLUMNS, TIMES = llmbench.COLUMNS, llmbench.DISTRIBUTIONS
NEEDS = {"p50": 20, "p90": 100, "p95": 200, "p99": 1000}
ERRORS = (("rate_limited", "429", '{"error":{"code":"1302","message":"您的账户已达到速率限制"}}'),
          ("timeout", "ttft-timeout", "first token not within 10 s (--ttft-timeout)"),
          ("truncated", "in the body", "connection closed in the body, without an end"),
          ("stream_error", "1234", '{"error":{"code":"1234","message":"network error, please retry"}} inside a 200'))


@dataclass
class MadeRows:
    """The measured requests of one stage in columns."""

    stage: int
    load: Dict[str, float]
    status: List[str]
    columns: Dict[str, array]
    itl_hist: Dict[int, int]

    @property
    def slowest(self):
        """The successful requests that took longest from when they were due, as llmbench.Rows has them."""
        took = self.columns["latency_from_scheduled_ms"]
        answered = (row for row, status in enumerate(self.status) if status == "ok")
        order = sorted(answered, key=lambda row: (-took[row], row))
        return [(row, {"request_id": "abcd1234-%d-%d" % (self.stage, row), "prompt_id": "p%d" % (row % 7),
                       "finish_reason": "stop"}) for row in order[:10]]


def statistic(values):
    """A metric's figures, as summary.json has them."""
    ordered = sorted(values)
    if not ordered:
        return None
    mean = math.fsum(ordered) / len(ordered)
    found = {"n": len(ordered), "mean": mean, "min": ordered[0], "max": ordered[-1],
             "stdev": math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / len(ordered))}
    found.update({name: inclusive(ordered, int(name[1:]) / 100) for name in NEEDS})
    found["limited"] = [name for name, need in NEEDS.items() if len(ordered) < need]
    return found


def inclusive(ordered, share):
    """The quantile of sorted values, as statistics.quantiles(method="inclusive") has it."""
    place = share * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (place - low)


def bucket_of(gap_ms):
    """The bucket of a gap in itl_hist."""
    microseconds = gap_ms * 1000
    return 0 if microseconds < 1 else 1 + int(math.log(microseconds) / math.log(1.01))


def made_rows(stage=0, load=None, n=2000, failing=0.0, seed=1, zero=0.0, think=False, slow=1.0, cancelled=0):
    """n requests at one load, `failing` of them failed; `slow` stretches the times."""
    draw, load = random.Random(seed), load or {"concurrency": 16}
    streams = int(load.get("concurrency", 8))
    rows = MadeRows(stage, load, [], {name: array("d") for name in COLUMNS}, collections.Counter())
    free = [zero] * streams
    for index in range(n):
        row = made_request(draw, think, slow, index < streams)
        if "rps" in load:
            row["scheduled_ms"] = zero + index * 1000.0 / load["rps"]
        else:
            slot = min(range(streams), key=free.__getitem__)
            row["scheduled_ms"] = free[slot]
        row["start_ms"] = row["scheduled_ms"] + row["queue_ms"] + row["connect_ms"]
        status = "ok"
        if draw.random() < failing:
            status = draw.choices([error[0] for error in ERRORS], (12, 3, 2, 1))[0]
        if index >= n - cancelled:
            status = "cancelled"
        row["end_ms"] = row["start_ms"] + (row["latency_ms"] if status == "ok" else draw.uniform(5, 900))
        if "rps" not in load:
            free[slot] = row["end_ms"]
        wait = row["start_ms"] - row["scheduled_ms"]
        row["ttft_from_scheduled_ms"] = row["ttft_ms"] + wait
        row["latency_from_scheduled_ms"] = row["latency_ms"] + wait
        if status == "ok":
            middle = bucket_of(row["tpot_ms"])
            for _ in range(int(row["chunks"]) - 1):
                rows.itl_hist[middle + int(draw.gauss(0, 14)) + (90 if draw.random() < 0.012 else 0)] += 1
        else:
            row = {name: row[name] for name in ("scheduled_ms", "start_ms", "end_ms", "queue_ms", "reused", "rtt_ms")}
        rows.status.append(status)
        for name in COLUMNS:
            rows.columns[name].append(row.get(name, math.nan))
    return rows


def made_request(draw, think, slow, opens):
    """The figures of one successful request."""
    tokens = min(256, max(8, int(draw.lognormvariate(5.05, 0.75))))
    prompt = min(6000, max(40, int(draw.lognormvariate(6.3, 1.0))))
    ttfb = slow * draw.lognormvariate(3.96, 0.3)
    ttfe = ttfb + slow * (90 + 0.04 * prompt + draw.lognormvariate(4.9, 0.55) + (draw.random() < 0.03) * 500)
    thinking = slow * draw.lognormvariate(6.5, 0.4) if think else 0.0
    tpot = slow * draw.gauss(15.6, 1.0)
    latency = ttfe + thinking + tpot * (tokens - 1)
    return {"queue_ms": draw.lognormvariate(-2.4, 0.5), "connect_ms": draw.uniform(18, 30) if opens else 0.0,
            "ttfb_ms": ttfb, "ttfe_ms": ttfe, "ttft_ms": ttfe + thinking, "ttft_slack_ms": 0.0, "latency_ms": latency,
            "decode_ms": latency - ttfe, "tpot_ms": tpot, "in_tokens": float(prompt), "cached_tokens": 0.0,
            "reasoning_tokens": 60.0 if think else 0.0, "out_tokens": float(tokens), "out_chars": tokens * 3.0,
            "chunks": float(tokens), "lag_ms": draw.expovariate(20), "rtt_ms": draw.gauss(1.8, 0.2),
            "retransmits": float(draw.random() < 0.001), "out_of_order": float(draw.random() < 0.002),
            "reused": 0.0 if opens else 1.0}


def ok_values(rows, name):
    """The known values of a column over the successful requests."""
    return [value for status, value in zip(rows.status, rows.columns[name]) if status == "ok" and value == value]


def gap_statistic(histogram):
    """The figures of the gaps, from the middles of their buckets."""
    total, found, seen = sum(histogram.values()), {}, 0
    if not total:
        return None
    wanted = [(name, int(name[1:]) / 100 * (total - 1)) for name in NEEDS]
    for bucket, number in sorted(histogram.items()):
        seen += number
        for name, place in wanted:
            if name not in found and place < seen:
                found[name] = 0.001 * 1.01 ** (bucket - 0.5)
    edges = [0.001 * 1.01 ** (bucket - 0.5) for bucket in (min(histogram), max(histogram))]
    found.update(n=total, mean=found["p50"], stdev=1.0, min=edges[0], max=edges[1], limited=[])
    return found


def stage_summary(rows, slo=()):
    """summary.json of one stage."""
    ends = [value for value in rows.columns["end_ms"] if value == value]
    starts = [value for value in rows.columns["start_ms"] if value == value]
    wall = max(ends) - min(starts)
    success, cancelled = rows.status.count("ok"), rows.status.count("cancelled")
    failure = len(rows.status) - success - cancelled
    found = {"requests": {"total": len(rows.status), "success": success, "failure": failure, "cancelled": cancelled,
                          "dropped": 0, "success_rate": success / max(1, success + failure), "warmup": 32},
             "wall_time_ms": wall, "errors": errors_of(rows)}
    for name in TIMES:
        found[name] = statistic(ok_values(rows, name))
    found["itl_ms"] = gap_statistic(rows.itl_hist)
    found["request_tps"] = statistic([1000.0 / value for value in ok_values(rows, "tpot_ms")])
    tokens = sum(ok_values(rows, "out_tokens"))
    found["throughput"] = {"rps": success / wall * 1000}
    if success:
        found["throughput"].update(output_tokens_per_s=tokens / wall * 1000, goodput_share=0.977,
                                   steady_output_tokens_per_s=tokens / wall * 1018, goodput_rps=success / wall * 977)
    found["tokens"] = {"mode": "usage", "in": sum(ok_values(rows, "in_tokens")), "out": tokens}
    found["slo"] = [judged(found, rows.stage, *gate) for gate in slo]
    return {name: value for name, value in found.items() if value is not None}


def judged(figures, stage, metric, stat, op, limit):
    """One gate held against a stage."""
    if metric == "success":
        value = figures["requests"]["success_rate"]
    elif metric == "throughput":
        value = figures["throughput"].get("output_tokens_per_s")
    else:
        value = (figures.get(metric + "_ms") or {}).get(stat)
    passed = value is not None and {"<=": value <= limit, ">=": value >= limit, "<": value < limit}[op]
    return {"gate": "%s%s%s" % (metric, op, limit), "metric": metric, "stat": stat, "op": op, "limit": limit,
            "value": value, "n": figures["requests"]["success"], "passed": passed, "stage": stage}


def errors_of(rows):
    """The failures by kind, the commonest first."""
    counts = collections.Counter(status for status in rows.status if status not in ("ok", "cancelled"))
    first = {}
    for status, end in zip(rows.status, rows.columns["end_ms"]):
        first.setdefault(status, end)
    words = {error[0]: error for error in ERRORS}
    return [{"status": status, "key": words[status][1], "count": number, "sample": words[status][2],
             "first_ms": first[status]} for status, number in counts.most_common()]


SAMPLES = {"first_content_raw": 'event: message\ndata: {"id": "chatcmpl-9f2c", "object": "chat.completion.chunk", '
           '"choices": [{"index": 0, "delta": {"content": "当然"}, "finish_reason": null}]}\n\n',
           "final_frame_raw": 'data: {"choices": [], "usage": {"prompt_tokens": 612, "completion_tokens": 184}}\n\n'}


def header_of(rows, **changes):
    """The run's header."""
    header = {
        "run_id": "a41f09c2", "started_at": "2026-11-24T01:12:03.120Z", "host": "bench-01", "address": "10.20.3.14",
        "os": "Linux", "arch": "x86-64", "python": "3.9.16", "utc_offset": "+08:00", "tool_version": "1.0.0",
        "url": "https://llm-gw.example.com/v1/chat/completions", "model": "Qwen2.5-72B-Instruct-AWQ",
        "provider": "openai", "results_sha256": "5c1e" * 16,
        "command": "python3 llmbench.pyz run --provider openai --url https://llm-gw.example.com/v1/chat/completions "
        "--model Qwen2.5-72B-Instruct-AWQ --token '***' --concurrency 16 --total-requests 2000 --warmup 32 "
        "--max-tokens 256 --slo 'success>=99%' --slo 'ttft.p95<=800ms'",
        "config": {"concurrency": [int(one.load.get("concurrency", 0)) for one in rows], "arrival": "poisson",
                   "total_requests": len(rows[0].status), "warmup": 32, "max_tokens": 256, "token_mode": "usage",
                   "unique": True, "prompts": {"source": "built-in", "count": 64}}}
    header.update(changes)
    return header


def made_run(stages, slo=(), state="VALID", reasons=(), **changes):
    """Everything render_report takes but the assets: summary, header, rows, end."""
    figures = [stage_summary(rows, slo) for rows in stages]
    summary = dict(figures[0])
    if len(stages) > 1:
        summary["requests"] = {name: sum(one["requests"][name] for one in figures) for name in figures[0]["requests"]}
        summary["errors"] = [error for one in figures for error in one["errors"]]
    summary.update(stages=figures, samples=SAMPLES, slo=[gate for one in figures for gate in one["slo"]],
                   verdict={"state": state, "reasons": list(reasons)},
                   client={"clock": "kernel", "lag_ms": {"p99": 0.081, "n": 5}, "ttft_slack_ms": {"p99": 0.42, "n": 5},
                           "cpu_percent": 11.0, "late_percent": 0.0, "processes": 1})
    return summary, header_of(stages, **changes), stages, {"reason": "done"}


GATES = (("success", "", ">=", 0.99), ("ttft", "p95", "<=", 800.0), ("ttft", "p99", "<=", 1500.0),
         ("tpot", "p99", "<", 50.0), ("throughput", "", ">=", 500.0))
CAUTIONS = ("29.5 % of the requests failed. The percentiles describe those that succeeded, not what all users saw.",
            {"en": "10 requests (1.7 %) were still running at the end and were cancelled: the percentiles are lower "
             "bounds.",
             "zh": "结束时仍有 10 次请求（1.7%）未完成而被取消：各百分位为下限。"})


def healthy(n=2000):
    return made_run([made_rows(n=n, failing=0.0015)], GATES)


def failing():
    return made_run([made_rows(n=600, failing=0.3, load={"concurrency": 64}, cancelled=10)], GATES[:2] + GATES[4:],
                    "CAUTION", CAUTIONS, model="glm-4-plus")


def ten():
    return made_run([made_rows(n=10, load={"concurrency": 1})])


def one():
    return made_run([made_rows(n=1, load={"concurrency": 1})])


def all_failed():
    return made_run([made_rows(n=50, failing=1.0)], GATES[:1], "CAUTION", ["Nothing succeeded."])


def invalid():
    return made_run([made_rows(failing=0.0015)], GATES, "INVALID", [
        "One client process used 97 % of its CPU (limit 90 %): it could not read as fast as the endpoint wrote.",
        "Mend it: --processes 4, a bigger host, or --shard over several hosts."])


def open_loop():
    return made_run([made_rows(n=900, load={"rps": 4.0})], GATES[:2])


def sweep():
    stages, zero = [], 0.0
    for number, streams in enumerate((1, 2, 4, 8, 16, 32)):
        slow = 1.0 + (streams / 14.0) ** 2 * 0.6
        failing = 0.0 if streams < 32 else 0.025
        stages.append(made_rows(number, {"concurrency": streams}, 240, failing, number, zero, True, slow))
        zero = max(value for value in stages[-1].columns["end_ms"] if value == value) + 1000
    return made_run(stages, (("success", "", ">=", 0.99), ("ttft", "p95", "<=", 5000.0), ("tpot", "p95", "<=", 40.0)),
                    model="DeepSeek-R1-Distill-Qwen-32B")


RUNS = {"healthy": healthy, "failing": failing, "ten": ten, "one": one, "all_failed": all_failed, "invalid": invalid,
        "open_loop": open_loop, "sweep": sweep}
