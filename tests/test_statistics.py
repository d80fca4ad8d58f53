"""Records to a summary: each figure against the standard library, or against an example that was reckoned by hand."""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
import statistics

import pytest
from made_records import collect, loaded_run, loaded_stage, made_run, record, rows_of, with_gaps

import llmbench

SHAPES = {
    "uniform": lambda draw: draw.uniform(1, 100),
    "exponential": lambda draw: draw.expovariate(1 / 30),
    "log-normal": lambda draw: draw.lognormvariate(3, 1),
    "heavy tail": lambda draw: draw.paretovariate(1.2),
    "bursts": lambda draw: 0.004 if draw.random() < 0.8 else draw.gauss(60, 3),
    "constant": lambda draw: 20.0,
    "below a microsecond": lambda draw: draw.choice([0.0, 0.0004, 0.0009]),
}


def samples(shape, n, seed=1):
    draw = random.Random(seed)
    return [abs(SHAPES[shape](draw)) for _ in range(n)]


# --- percentiles ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 7, 99, 100, 101, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_percentiles_are_those_of_the_standard_library(shape, n):
    values = samples(shape, n)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert llmbench.percentiles(values) == {"p50": cuts[49], "p90": cuts[89], "p95": cuts[94], "p99": cuts[98]}


def test_without_the_standard_librarys_quantiles_the_values_are_the_same_to_the_last_bit(monkeypatch):
    cases = [
        (samples(shape, size), n) for shape in SHAPES for size in (2, 3, 4, 37, 500) for n in (2, 4, 10, 100, 1000)
    ]
    cases += [([3, 1, 2], 100), ([1e-300, 1e300, -1e300, 0.1], 100)]
    expected = [statistics.quantiles(values, n=n, method="inclusive") for values, n in cases]
    monkeypatch.delattr(statistics, "quantiles")
    assert [llmbench.quantiles_inclusive(values, n) for values, n in cases] == expected


def test_one_value_is_every_percentile_of_itself():
    assert set(llmbench.percentiles([7.5]).values()) == {7.5}


@pytest.mark.parametrize("n,limited", [
    (1, "p50 p90 p95 p99"), (19, "p50 p90 p95 p99"), (20, "p90 p95 p99"), (99, "p90 p95 p99"), (100, "p95 p99"),
    (199, "p95 p99"), (200, "p99"), (999, "p99"), (1000, ""), (10**6, ""),
])  # fmt: skip
def test_a_percentile_is_limited_when_fewer_than_ten_samples_lie_beyond_it(n, limited):
    assert llmbench.limited_names(n) == limited.split()
    if n < 10**6:
        assert llmbench.describe([float(i) for i in range(n)])["limited"] == limited.split()
        assert llmbench.describe_histogram({5: n}, 1.0 * n, 1.0, 1.0)["limited"] == limited.split()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_description_is_that_of_the_standard_library(shape):
    values = samples(shape, 321)
    made = llmbench.describe(values)
    assert list(made) == ["n", "mean", "stdev", "min", "p50", "p90", "p95", "p99", "max", "limited"]
    assert made["n"] == 321 and made["min"] == round(min(values), 4) and made["max"] == round(max(values), 4)
    assert made["mean"] == pytest.approx(statistics.mean(values), abs=6e-5)
    assert made["stdev"] == pytest.approx(statistics.stdev(values), abs=6e-5)


def test_the_order_of_the_samples_changes_nothing():
    values = samples("heavy tail", 500)
    assert llmbench.describe(values) == llmbench.describe(values[::-1]) == llmbench.describe(sorted(values))


def test_of_nothing_there_is_no_description():
    assert llmbench.describe([]) is None
    assert llmbench.describe_histogram({}, 0.0, math.inf, 0.0) is None


# --- histograms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 10, 400, 5000])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_histograms_percentiles_are_within_one_percent(shape, n):
    gaps = samples(shape, n, seed=n)
    line = with_gaps(record(), gaps)
    made = llmbench.describe_histogram(line["itl_hist"], line["itl_sum_ms"], line["itl_min_ms"], line["itl_max_ms"])
    exact = llmbench.describe(gaps)
    assert made["n"] == n and made["mean"] == exact["mean"]
    assert (made["min"], made["max"]) == (exact["min"], exact["max"])
    for name, value in llmbench.percentiles(gaps).items():
        assert made[name] == pytest.approx(value, rel=0.01, abs=0.0011), name
    scale = math.sqrt(sum(gap * gap for gap in gaps) / max(1, n - 1))  # a value is at most 0.5 % off, and so is this
    assert made["stdev"] == pytest.approx(exact["stdev"], abs=0.01 * scale + 0.0011)


def test_gaps_that_are_all_the_same_do_not_deviate():
    line = with_gaps(record(), [20.0] * 500)
    assert llmbench.describe_histogram(line["itl_hist"], 10000.0, 20.0, 20.0)["stdev"] == 0


def test_merged_histograms_are_the_histogram_of_all():
    gaps = samples("log-normal", 3000)
    whole = rows_of([with_gaps(record(), gaps)])
    pieces = rows_of([with_gaps(record(start), gaps[start : start + 7]) for start in range(0, 3000, 7)])
    assert pieces.itl_hist == whole.itl_hist
    blocks = [llmbench.summarize_stage(rows, "usage", [])["itl_ms"] for rows in (pieces, whole)]
    assert blocks[0] == blocks[1]
    assert blocks[0]["n"] == 3000


def test_the_gaps_of_a_failed_request_are_in_no_distribution():
    good, bad = with_gaps(record(), [5.0]), with_gaps(record(status="truncated"), [5000.0])
    assert llmbench.summarize_stage(rows_of([good, bad]), "usage", [])["itl_ms"]["max"] == 5.0


# --- time and throughput, by hand -------------------------------------------------------------------------------------
#
# Two streams; each request runs a second and gives its 90 tokens evenly over its last 900 ms:
#
#   A |.=========|C.=========|E.=========|        starts at    0, 1000, 2000
#   B   |.=========|D.=========|F.=========|      starts at  200, 1200, 2200
#       [ both busy: 200 … 2200  ]
#
# In the window lie 800/900 of A (80 tokens), all of B, C and D, 100/900 of E (10) and nothing of F: 360 tokens in 2 s.

STREAMS = [record(start, start + 100, start + 1000, 90) for start in (0, 200, 1000, 1200, 2000, 2200)]


def without(records, *names):
    return [{key: value for key, value in line.items() if key not in names} for line in records]


def test_the_steady_window_and_its_throughput():
    rows = rows_of(STREAMS)
    assert llmbench.steady_window(rows) == (200, 2200)
    assert llmbench.steady_throughput(rows) == (pytest.approx(180.0), "")


@pytest.mark.parametrize("order", list(itertools.permutations(range(6)))[::97])
def test_the_order_of_the_records_changes_no_throughput(order):
    assert llmbench.steady_throughput(rows_of([STREAMS[i] for i in order])) == (pytest.approx(180.0), "")


def test_wall_time_and_whole_throughput():
    block = llmbench.summarize_stage(rows_of(STREAMS), "usage", [])
    assert block["wall_time_ms"] == 3200
    assert block["throughput"] == {
        "rps": round(6 / 3.2, 4), "output_tokens_per_s": round(540 / 3.2, 4), "steady_output_tokens_per_s": 180.0,
        "output_chars_per_s": round(2400 / 3.2, 4),
    }  # fmt: skip


def test_wall_time_runs_from_the_first_start_to_the_last_end_whatever_became_of_them():
    lines = [record(50, 60, 100, phase="warmup"), record(400, 500, 900), record(300, None, 350, status="timeout"),
             record(500, None, 4000, status="cancelled"), record(9000, status="dropped", start_ms=None)]  # fmt: skip
    assert llmbench.wall_ms(rows_of(lines)) == pytest.approx(3700)


def test_a_failed_request_keeps_its_stream_busy_and_brings_no_tokens():
    failed = record(1000, None, 2000, status="truncated", out_tokens=90)
    rows = rows_of([STREAMS[0], STREAMS[1], failed, *STREAMS[3:]], concurrency=[2])
    assert llmbench.steady_window(rows) == (200, 2200)
    value, reason = llmbench.steady_throughput(rows)
    assert value is None and "3" in reason and "4" in reason


def test_a_start_at_the_moment_of_an_end_leaves_no_gap():
    lines = [record(start, start + 10, start + 100, 9) for start in range(0, 1000, 100)]
    assert llmbench.steady_window(rows_of(lines, concurrency=[1])) == (0, 900)


def test_a_stream_that_goes_on_is_not_taken_for_another_one():
    """The first of two streams ends a request and starts its next at 100; the second joins at 200."""
    lines = [record(0, 10, 100), record(100, 110, 1000), record(200, 210, 1000)]
    assert llmbench.steady_window(rows_of(lines, concurrency=[2])) == (200, 200)


@pytest.mark.parametrize("records,streams,said", [
    (STREAMS, 5, "never all in flight"),
    (STREAMS[:5], 2, "only 3 requests"),
    ([record(0, 10, 100, 5), record(0, 10, 100, 5)], 2, "only 0 requests"),
    ([], 2, "never all in flight"),
    ([record(0, status="dropped", start_ms=None)], 1, "never all in flight"),
])  # fmt: skip
def test_where_steady_throughput_cannot_be_said_there_is_a_reason(records, streams, said):
    rows = rows_of([record(phase="warmup"), *records], concurrency=[streams])
    value, reason = llmbench.steady_throughput(rows)
    assert value is None and said in reason


def test_the_reason_stands_in_the_summary_instead_of_the_figure():
    throughput = llmbench.summarize(collect(STREAMS, concurrency=[5]))["throughput"]
    assert "steady_output_tokens_per_s" not in throughput and "never all" in throughput["steady_absent_reason"]


@pytest.mark.parametrize("missing", ["ttfe_ms", "out_tokens"])
def test_steady_throughput_is_absent_rather_than_too_low(missing):
    """A whole completion (no first output) or a request without usage gives tokens that nobody can place or count."""
    value, reason = llmbench.steady_throughput(rows_of(STREAMS[:2] + without(STREAMS[2:], missing)))
    assert value is None and reason


@pytest.mark.parametrize("begin,end,share", [
    (0, 100, 1.0), (-50, 50, 0.5), (50, 150, 0.5), (-100, 300, 0.25), (100, 200, 0.0), (-9, -1, 0.0),
    (50, 50, 1.0), (0, 0, 1.0), (100, 100, 1.0), (101, 101, 0.0),
])  # fmt: skip
def test_share_within_a_window(begin, end, share):
    assert llmbench.share_within(begin, end, 0, 100) == pytest.approx(share)


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statuses,rate", [
    ("ok ok ok timeout", 0.75), ("ok cancelled dropped", 1.0), ("timeout cancelled", 0.0),
    ("cancelled dropped", None), ("", None), ("ok " * 2 + "http_error", 2 / 3), ("ok " * 999 + "empty", 0.999),
])  # fmt: skip
def test_success_rate_leaves_out_what_was_cancelled_or_dropped(statuses, rate):
    lines = [record(number, status=status) for number, status in enumerate(statuses.split())]
    block = llmbench.count_requests([rows_of([record(phase="warmup"), record(phase="probe"), *lines])])
    names = statuses.split()
    assert block["total"] == len(names) == sum(block[key] for key in ("success", "failure", "cancelled", "dropped"))
    assert block.get("success_rate") == (rate if rate is None else pytest.approx(rate, abs=1e-7))
    assert (block["cancelled"], block["dropped"]) == (names.count("cancelled"), names.count("dropped"))
    assert block["warmup"] == 1


def test_warm_up_probes_and_failures_are_in_no_distribution():
    lines = [record(0, 77, 99), record(0, 5000, 9000, phase="warmup"), record(0, 6000, 9000, phase="probe"),
             record(0, None, 8000, status="timeout", ttft_ms=7000.0, latency_ms=8000.0)]  # fmt: skip
    summary = llmbench.summarize(collect(lines))
    assert (summary["ttft_ms"]["n"], summary["ttft_ms"]["max"], summary["latency_ms"]["max"]) == (1, 77, 99)


@pytest.mark.parametrize("mode,keys", [
    ("usage", {"mode", "in", "out", "missing"}), ("chars", {"mode"}), ("disabled", {"mode"}),
])  # fmt: skip
def test_tokens_are_counted_in_usage_mode_only(mode, keys):
    summary = llmbench.summarize(collect(STREAMS, token_mode=mode))
    assert set(summary["tokens"]) == keys
    assert ("output_tokens_per_s" in summary["throughput"]) == (mode == "usage")
    assert ("output_chars_per_s" in summary["throughput"]) == (mode != "disabled")


def test_missing_usage_is_counted_and_nothing_is_guessed():
    lines = [record(0, 1, 9, None), record(1, 2, 9, None), record(2, status="timeout")]
    summary = llmbench.summarize(collect(lines))
    assert summary["tokens"] == {"mode": "usage", "in": 24, "missing": 2}
    assert "output_tokens_per_s" not in summary["throughput"] and summary["throughput"]["output_chars_per_s"] > 0
    assert "tpot_ms" not in summary and "request_tps" not in summary


def test_tokens_sum_over_successful_requests():
    lines = [record(0, tokens=5, cached_tokens=3, reasoning_tokens=2), record(1, tokens=7, cached_tokens=0),
             record(2, status="truncated", out_tokens=100)]  # fmt: skip
    assert llmbench.count_tokens([rows_of(lines)], "usage") == {
        "mode": "usage", "in": 24, "out": 12, "cached": 3, "reasoning": 2, "missing": 0,
    }  # fmt: skip


def test_request_tps_is_the_inverse_of_tpot():
    lines = [record(0, tpot_ms=20.0), record(1, tpot_ms=50.0), record(2, tpot_ms=0.0), record(3)]
    assert llmbench.summarize_stage(rows_of(lines), "usage", [])["request_tps"]["mean"] == 35.0


# --- failures ---------------------------------------------------------------------------------------------------------

SAME_CAUSE = {
    "request id of digits": [
        "HTTP 500: upstream timed out (request id: 2026112404390012)",
        "HTTP 500: upstream timed out (request id: 2026112404390777)",
    ],
    "uuid": [
        "HTTP 502: trace 550e8400-e29b-41d4-a716-446655440000 failed",
        "HTTP 502: trace 7c9e6679-7425-40de-944b-e07fc1f90ae7 failed",
    ],
    "hex": ["HTTP 502: trace deadbeef0001 failed", "HTTP 502: trace 00facade1234 failed"],
    "numbers": ["rate limit: 4096 of 5000 used, retry in 17s", "rate limit: 5001 of 5000 used, retry in 23s"],
}
WANTED_SAME = {
    "New API's id": ["HTTP 500: timed out (request id: 20261124043900123456789AbCdEfGh)",
                     "HTTP 500: timed out (request id: 20261124043911987654321xYzWqRsT)"],
    "Anthropic's id": ["HTTP 529: overloaded_error: Overloaded, req_011CSHoEeqs5C35K2UUqR7Fy",
                       "HTTP 529: overloaded_error: Overloaded, req_022AbcDeFghiJKlmn4opQr9s"],
}  # fmt: skip
OTHER_CAUSE = [
    ("HTTP 500: x", "HTTP 502: x"), ("HTTP 429: model gpt-4 is busy", "HTTP 429: model gpt-5 is busy"),
    ("ttft time-out", "idle time-out"), ("in the head", "in the body"), ("您的账户已达到速率限制", "网络错误"),
]  # fmt: skip


@pytest.mark.parametrize("name", SAME_CAUSE)
def test_failures_that_differ_in_numbers_only_are_one_cause(name):
    assert len({llmbench.error_key(err) for err in SAME_CAUSE[name]}) == 1


@pytest.mark.parametrize("name", WANTED_SAME)
def test_failures_that_differ_in_their_id_only_are_one_cause(name):
    assert len({llmbench.error_key(err) for err in WANTED_SAME[name]}) == 1


@pytest.mark.parametrize("first,second", OTHER_CAUSE)
def test_other_causes_stay_apart(first, second):
    assert llmbench.error_key(first) != llmbench.error_key(second)


KEPT = {
    "您的账户在2026年已达到速率限制请稍后再试或联系管理员": "您的账户在#年已达到速率限制请稍后再试或联系管理员",
    "The model `Qwen2.5-7B-Instruct` does not exist": "The model `Qwen2.5-7B-Instruct` does not exist",
    "max_completion_tokens is unknown": "max_completion_tokens is unknown",
    "decade facade accede": "decade facade accede",
}


@pytest.mark.parametrize("text", KEPT)
def test_what_names_the_cause_stays_in_the_key(text):
    assert llmbench.error_key("HTTP 429: " + text) == "HTTP 429: " + KEPT[text]


def test_a_key_is_short_and_takes_little_time():
    assert len(llmbench.error_key("x" * 100000)) <= 200
    assert len(llmbench.error_key("a-1 " * 5000)) <= 200


def test_errors_are_grouped_with_count_sample_and_first_moment():
    lines = [
        record(0),
        record(30, status="http_error", err="HTTP 500: job 1234"),
        record(20, status="timeout", err="idle"),
        record(10, status="http_error", err="HTTP 500: job 77", error_raw='{"raw":1}'),
        record(40, status="timeout"),
    ]
    assert llmbench.merge_errors([rows_of(lines)]) == [
        {"status": "http_error", "key": "HTTP 500: job #", "count": 2, "sample": '{"raw":1}', "first_ms": 10},
        {"status": "timeout", "key": "idle", "count": 1, "sample": "idle", "first_ms": 20},
        {"status": "timeout", "key": llmbench.STATUSES["timeout"], "count": 1, "sample": llmbench.STATUSES["timeout"],
         "first_ms": 40},
    ]  # fmt: skip


def test_a_dropped_request_is_dated_by_when_it_was_due():
    lines = [record(70, status="dropped", start_ms=None, start_ts=None, end_ts=None)]
    assert llmbench.merge_errors([rows_of(lines)])[0]["first_ms"] == 70


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 511, 512, 513, 514, 1500])
def test_columns_hold_every_record_in_order_whenever_they_are_read(n):
    """Records wait for their columns in blocks; who reads in between sees all of them."""
    lines = [record(start, in_tokens=None if start % 3 else start, status="ok" if start % 5 else "timeout")
             for start in range(n)]  # fmt: skip
    rows = llmbench.Rows(0, {"concurrency": 1})
    for number, line in enumerate(lines):
        rows.add(line, line["start_ms"] + 7.0)
        if number % 400 == 399:
            assert list(rows.columns["start_ms"]) == list(range(number + 1))
    assert {len(column) for column in rows.columns.values()} == {n} == {len(rows)}
    assert list(rows.columns["end_ms"]) == [start + 7.0 for start in range(n)]
    known = [start for start in range(n) if start % 3 == 0]
    assert [value for value in rows.columns["in_tokens"] if value == value] == known
    assert rows.successful("in_tokens") == [start for start in known if start % 5]
    assert rows.count("ok") + rows.count("timeout") == rows.count("ok", "timeout") == n


@pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 300])
def test_the_slowest_are_kept_by_name_slowest_first_and_equals_in_their_order(n):
    draw = random.Random(n)
    took = [float(draw.randrange(40)) for _ in range(n)]
    rows = llmbench.Rows(0, {"concurrency": 1})
    for number, value in enumerate(took):
        status = "timeout" if number % 7 == 3 else "ok"
        line = {**record(number, status=status), "request_id": "r%d" % number, "latency_from_scheduled_ms": value}
        rows.add(line, number + value)
    answered = [number for number in range(n) if number % 7 != 3 and took[number] > 0]
    expected = sorted(answered, key=lambda number: (-took[number], number))[:10]
    assert [row for row, _ in rows.slowest] == expected
    assert [names["request_id"] for _, names in rows.slowest] == ["r%d" % number for number in expected]


def test_null_is_not_known_and_costs_no_other_value():
    rows = llmbench.Rows(0, {"concurrency": 1})
    for start in range(3):
        rows.add({**record(start, tokens=5), "rtt_ms": None if start == 1 else 2.5, "cached_tokens": None}, start + 9.0)
    assert rows.successful("rtt_ms") == [2.5, 2.5] and rows.successful("cached_tokens") == []
    assert rows.successful("out_tokens") == [5, 5, 5] and rows.successful("start_ms") == [0, 1, 2]


@pytest.mark.parametrize("seed", range(40))
def test_the_steady_window_is_that_of_the_events_one_after_the_other(seed):
    draw = random.Random(seed)
    streams = draw.randint(1, 6)
    lines = []
    for _ in range(draw.randint(1, 60)):
        start = draw.randrange(40)
        lines.append(record(start, start, start + draw.choice((0, 0, 1, 3, 9, 20))))
    events = sorted((line["start_ms"] + after, change) for line in lines
                    for after, change in ((0, 1), (line["latency_ms"], -1)))  # fmt: skip
    flying = itertools.accumulate(change for _, change in events)
    full = next((moment for (moment, _), number in zip(events, flying) if number >= streams), None)
    wanted = None if full is None else (full, max(line["start_ms"] for line in lines))
    assert llmbench.steady_window(rows_of(lines, concurrency=[streams])) == wanted


# --- the whole summary ------------------------------------------------------------------------------------------------


def test_with_one_stage_its_figures_stand_at_the_top_too():
    summary = llmbench.summarize(collect(STREAMS))
    stage = dict(summary["stages"][0])
    assert (stage.pop("stage"), stage.pop("load")) == (0, {"concurrency": 2})
    assert {key: summary[key] for key in stage} == stage


def test_with_several_stages_percentiles_stand_per_stage_only():
    lines = made_run(stages=3)
    summary = llmbench.summarize(collect(lines[1:], concurrency=[2, 4, 8]))
    assert [stage["load"]["concurrency"] for stage in summary["stages"]] == [2, 4, 8]
    assert not set(summary) & {*llmbench.DISTRIBUTIONS, "itl_ms", "request_tps", "throughput"}
    assert summary["wall_time_ms"] == pytest.approx(sum(stage["wall_time_ms"] for stage in summary["stages"]), abs=1e-3)
    for key in ("total", "success", "failure", "warmup"):
        assert summary["requests"][key] == sum(stage["requests"][key] for stage in summary["stages"])
    assert summary["errors"][0]["count"] == sum(stage["requests"]["failure"] for stage in summary["stages"])


def test_adding_up_stages_leaves_the_stages_as_they_were():
    collector = collect(made_run(stages=2)[1:], concurrency=[2, 4])
    before = copy.deepcopy([rows.errors for rows in collector.stages.values()])
    assert llmbench.summarize(collector) == llmbench.summarize(collector)
    assert [rows.errors for rows in collector.stages.values()] == before


def test_parts_may_be_interleaved_in_any_way():
    lines = made_run(n=60)
    mixed = lines[1:]
    random.Random(3).shuffle(mixed)
    first, second = llmbench.summarize(collect(lines[1:])), llmbench.summarize(collect(mixed))
    assert {**first, "errors": 0, "stages": 0} == {**second, "errors": 0, "stages": 0}


def test_nothing_unknown_is_null_or_not_a_number():
    def leaves(tree):
        for value in tree.values() if isinstance(tree, dict) else tree:
            if isinstance(value, (dict, list)):
                yield from leaves(value)
            else:
                yield value

    for lines in (
        made_run(),
        [record(status="timeout")],
        [record(phase="warmup")],
        [],
        [record(first=None, tokens=None)],
    ):
        values = list(leaves(llmbench.summarize(collect(lines))))
        assert None not in values
        assert all(math.isfinite(value) for value in values if isinstance(value, float))


@pytest.mark.parametrize("statuses", ["", "timeout", "cancelled", "dropped", "timeout cancelled"])
def test_a_run_without_success_has_counts_and_no_figures(statuses):
    summary = llmbench.summarize(collect([record(status=status) for status in statuses.split()]))
    assert summary["requests"]["success"] == 0
    assert not set(summary) & {*llmbench.DISTRIBUTIONS, "itl_ms", "request_tps"}


def test_the_client_says_what_its_busiest_process_did():
    late = {llmbench.log_bucket(0.002): 3}
    lines = [
        {"audit": {"stage": 0, "part": 0, "cpu_percent": 12.5, "lag_hist": {}}},
        {"audit": {"stage": 0, "part": 1, "cpu_percent": 80.0, "lag_hist": late}},
        record(),
    ]
    block = llmbench.summarize(collect(lines))["client"]
    assert (block["processes"], block["cpu_percent"], block["clock"]) == (2, 80.0, "kernel")
    assert block["lag_ms"]["n"] == 3 and block["lag_ms"]["p99"] == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("clocks,said", [("kernel", "kernel"), ("user", "user"), ("kernel user", "mixed"), ("", None)])
def test_the_clock_of_a_run(clocks, said):
    lines = [record(clock=clock) for clock in clocks.split()] or [record(clock=None)]
    assert llmbench.summarize(collect(lines))["client"].get("clock") == said


def test_the_first_samples_are_kept():
    lines = [record(0), record(1, first_content_raw="a", final_frame_raw="b"), record(2, first_content_raw="c")]
    assert llmbench.summarize(collect(lines))["samples"] == {"first_content_raw": "a", "final_frame_raw": "b"}


@pytest.mark.parametrize("text,seconds", [
    ("1970-01-01T00:00:01.500000Z", 1.5), ("1970-01-02T00:00:00Z", 86400.0),
    ("2026-01-02T03:04:05.000001Z", 1767323045.000001),
])  # fmt: skip
def test_timestamps(text, seconds):
    assert llmbench.timestamp(text) == pytest.approx(seconds, abs=1e-6)


# --- gates ------------------------------------------------------------------------------------------------------------

JUDGED = [record(100.0 * i, 100.0 * i + 200.0 + i, 100.0 * i + 1000.0, 90, tpot_ms=10.0) for i in range(40)]


def judged(texts, lines=JUDGED, **config):
    """What became of each gate: passed, and its value."""
    summary = llmbench.summarize(collect(lines, slo=texts, concurrency=[8], **config))
    return [(entry["gate"], entry["passed"], entry.get("value")) for entry in summary["slo"]]


def test_each_gate_is_held_against_its_figure_of_the_summary():
    summary = llmbench.summarize(collect(JUDGED, concurrency=[8]))
    texts = ["ttft.p95<=1s", "ttft.max<239ms", "ttft.max<=239ms", "ttft.min>=200ms", "latency.mean<1s", "success>=100%",
             "throughput>=1", "rps>1", "request_tps.p50>=100", "request_tps.p50>100", "tpot.p50<10ms"]  # fmt: skip
    expected = [True, False, True, True, False, True, True, True, True, False, False]
    found = judged(texts)
    assert [passed for _, passed, _ in found] == expected and [text for text, _, _ in found] == texts
    assert [value for _, _, value in found[:2]] == [summary["ttft_ms"]["p95"], summary["ttft_ms"]["max"]]
    assert found[6][2] == summary["throughput"]["output_tokens_per_s"]


def test_an_entry_of_slo_has_its_keys_in_order():
    summary = llmbench.summarize(collect(JUDGED, slo=[" ttft.p95 <= 0.8s"], concurrency=[8]))
    (entry,) = summary["slo"]
    assert list(entry) == ["gate", "metric", "stat", "op", "limit", "value", "n", "passed", "stage"]
    assert (entry["gate"], entry["limit"], entry["n"], entry["stage"]) == (" ttft.p95 <= 0.8s", 800.0, 40, 0)
    assert summary["stages"][0]["slo"] == summary["slo"]


@pytest.mark.parametrize("text", ["itl.p50<=1s", "tpot.p50<=1s", "throughput>=0", "steady>=0", "ttfb.p50<1s"])
def test_a_figure_that_is_not_there_fails_its_gate(text):
    lines = [record(tokens=None)]
    assert judged([text], lines) == [(text, False, None)]
    assert judged([text], []) == [(text, False, None)]


def test_a_thin_success_rate_is_judged_exactly():
    lines = [record(i, status="timeout" if i == 0 else "ok") for i in range(1000)]
    assert [passed for _, passed, _ in judged(["success>=99.9%", "success>99.9%"], lines)] == [True, False]
    assert [passed for _, passed, _ in judged(["success>=99.9%"], [record(0, status="timeout"), *lines])] == [False]


def test_every_stage_is_judged_on_its_own():
    lines = [record(0, 100), record(0, 900, stage=1)]
    summary = llmbench.summarize(collect(lines, slo=["ttft.p50<=500ms", "success>=99%"], concurrency=[1, 2]))
    assert [(entry["stage"], entry["metric"], entry["passed"]) for entry in summary["slo"]] == [
        (0, "ttft", True), (0, "success", True), (1, "ttft", False), (1, "success", True)]  # fmt: skip


def test_a_gate_of_another_version_is_a_mistake_with_a_name():
    with pytest.raises(llmbench.UserError, match="unknown metric, energy"):
        llmbench.summarize(collect(JUDGED, slo=["energy<5"]))


# --- goodput ----------------------------------------------------------------------------------------------------------
#
# Ten requests of one second each, one after the other, so that a share of 0.1 is a rate of 0.1 a second. TTFT is 100,
# 200, … 1,000 ms; the last failed, the one before has no TTFT.

TEN = [record(1000.0 * i, 1000.0 * i + 100.0 * (i + 1), 1000.0 * i + 1000.0, 11, tpot_ms=10.0 + i) for i in range(8)]
TEN += [record(8000.0, None, 9000.0, 11), record(9000.0, 9100.0, 10000.0, status="timeout", ttft_ms=100.0)]


def goodput(*texts, lines=TEN, mode="usage"):
    throughput = llmbench.summarize(collect(lines, slo=list(texts), token_mode=mode))["throughput"]
    return throughput.get("goodput_share"), throughput.get("goodput_rps")


@pytest.mark.parametrize("texts,good", [
    (["ttft.p95<=300ms"], 3), (["ttft.p95<300ms"], 2), (["ttft.p50<=9s"], 8), (["latency.p50<=1s"], 9),
    (["latency.p50<1s"], 0), (["ttft.p50<=300ms", "ttft.p99<=900ms"], 3),  # both: the stricter
    (["ttft.p95<=500ms", "tpot.p95<=13ms"], 4), (["request_tps.p50>=80"], 3), (["request_tps.p50>80"], 3),
    (["ttfe.max<=1ms"], 0), (["ttft.p95<=800ms", "success>=99%", "throughput>=5", "itl.p99<=1ms"], 8),
])  # fmt: skip
def test_goodput_counts_what_met_every_limit_of_a_request(texts, good):
    assert goodput(*texts) == (good / 10, pytest.approx(good / 10))
    assert goodput(*texts, mode="disabled") == goodput(*texts)


@pytest.mark.parametrize("texts", [[], ["success>=99%"], ["ttft.p50>=1ms"], ["request_tps.p50<=9"], ["queue.p50<1ms"]])
def test_without_a_limit_of_a_request_there_is_no_goodput(texts):
    assert goodput(*texts) == (None, None)


def test_cancelled_and_dropped_requests_are_no_part_of_goodput():
    more = [record(9500.0, status="cancelled", end=9900.0), record(9600.0, status="dropped", start_ms=None)]
    assert goodput("ttft.p95<=300ms", lines=TEN + more)[0] == 0.3
    assert goodput("ttft.p95<=300ms", lines=more) == (None, None)


def test_goodput_has_gates_of_its_own():
    texts = ["ttft.p95<=300ms", "goodput>=0.3", "goodput>=30%", "goodput>30%"]
    entries = llmbench.summarize(collect(TEN, slo=texts))["slo"][1:]
    assert [(entry["passed"], entry["value"], entry["n"]) for entry in entries] == [
        (True, 0.3, 10), (True, 0.3, 10), (False, 0.3, 10)]  # fmt: skip


def test_the_share_of_goodput_is_not_rounded_to_a_limit_that_it_misses():
    lines = [record(i, i + 100, i + 1000) for i in range(19_999)] + [record(0, status="timeout")]
    share, _ = goodput("ttft.p95<=300ms", lines=lines)
    assert share == 0.99995


# --- open loop --------------------------------------------------------------------------------------------------------


def plan(index=0, **load):
    """The line that says what a stage was to be."""
    return {"stage": {"index": index, "load": load, "total": 6, "warmup": 0}}


@pytest.mark.parametrize("order", ["before", "after", "between, twice"])
def test_the_load_of_a_stage_is_its_plans(order):
    line = plan(rps=4.0, cap=16)
    lines = {"before": [line, *STREAMS], "after": [*STREAMS, line]}
    lines["between, twice"] = [STREAMS[0], line, *STREAMS, line]
    collector = collect(lines[order], concurrency=[])
    assert [rows.load for rows in collector.rows()] == [{"rps": 4.0, "cap": 16}]
    assert len(collector.rows()[0]) == len(lines[order]) - lines[order].count(line)


def test_a_plan_without_requests_is_no_stage():
    assert [rows.stage for rows in collect([plan(0, rps=1.0), *STREAMS, plan(1, rps=2.0)]).rows()] == [0]
    assert [rows.load for rows in collect([plan(0, rps=1.0)]).rows()] == [{"rps": 1.0}]


def test_files_without_plans_take_the_load_of_the_configuration():
    assert [rows.load for rows in collect([record(), record(stage=1)], concurrency=[3, 5]).rows()] == [
        {"concurrency": 3}, {"concurrency": 5}]  # fmt: skip


def open_records(n=30, gap=100.0, **more):
    """A request each `gap` ms; each writes its 9 tokens over the 900 ms that end a second after its start."""
    return [record(gap * i, gap * i + 100, gap * i + 1000, 9, **more) for i in range(n)]


def test_the_steady_window_of_an_open_loop_goes_from_the_first_end_to_the_last_start():
    rows = rows_of([plan(rps=10.0), *open_records()])
    assert llmbench.steady_window(rows) == (1000.0, 2900.0)
    assert llmbench.steady_throughput(rows) == (pytest.approx(90.0), "")


@pytest.mark.parametrize("records,said", [
    (open_records(28), "only 18 requests ended in the steady window; 20 are needed"),
    (open_records(5), "no request started after the first one had ended"), ([], "no request started"),
    ([record(phase="warmup")], "no request started"),
])  # fmt: skip
def test_where_an_open_loop_has_no_steady_window_there_is_a_reason(records, said):
    rows = collect([plan(rps=10.0), *records]).rows()[0]
    value, reason = llmbench.steady_throughput(rows)
    assert value is None and said in reason


def client_of(*lines):
    return llmbench.summarize(collect(lines, concurrency=[]))["stages"][0]["client"]


def test_the_rate_of_the_schedule_and_of_the_starts():
    client = client_of(plan(rps=9.0), *open_records(11))
    assert (client["requested_rps"], client["achieved_rps"]) == (10.0, 10.0)
    late = [record(100.0 * i + 2000.0, 100.0 * i + 2100.0, 9000.0, scheduled_ms=50.0 * i) for i in range(11)]
    client = client_of(plan(rps=9.0), *late)
    assert (client["requested_rps"], client["achieved_rps"]) == (20.0, round(20.0 * 450 / 2900, 4))


def test_requests_that_were_never_sent_lower_the_achieved_rate():
    sent = open_records(11)
    lost = [record(100.0 * i, scheduled_ms=100.0 * i, status="dropped", start_ms=None) for i in range(11, 21)]
    client = client_of(plan(rps=10.0), *sent, *lost)
    assert (client["requested_rps"], client["achieved_rps"]) == (10.0, round(10.0 * 10 / 19, 4))


def test_one_straggler_does_not_make_a_slow_loop():
    straggler = record(9000.0, 9100.0, 9900.0, scheduled_ms=1100.0)
    client = client_of(plan(rps=10.0), *open_records(11), straggler)
    assert client["requested_rps"] == client["achieved_rps"] == 10.0


@pytest.mark.parametrize("lines", [
    [plan(concurrency=2), *STREAMS], [plan(rps=1.0), record(), record(9)],
    [plan(rps=1.0), record(status="dropped", start_ms=None)], [plan(rps=1.0)],
])  # fmt: skip
def test_a_closed_loop_or_a_single_request_has_no_rates(lines):
    assert not {"requested_rps", "achieved_rps"} & set(client_of(*lines))


def test_the_wait_under_a_cap_is_not_the_clients_own():
    lines = [plan(rps=1.0, cap=2), record(queue_ms=5.0), record(9, queue_ms=900.0, capped_ms=899.0)]
    lines.append(record(status="dropped", start_ms=None, queue_ms=None))
    assert list(llmbench.own_waits(rows_of(lines))) == [(0.0, 5.0), (9, 1.0)]


@pytest.mark.parametrize("loads,names", [
    ([{"concurrency": 1}, {"concurrency": 2}], [{"concurrency": 1}, {"concurrency": 2}]),
    ([{"rps": 2.0, "cap": 8}, {"rps": 4.0, "cap": 8}], [{"rps": 2.0}, {"rps": 4.0}]),
    ([{"rps": 2.0, "cap": 8}, {"rps": 2.0, "cap": 9}], [{"rps": 2.0, "cap": 8}, {"rps": 2.0, "cap": 9}]),
    ([{"concurrency": 8, "input_tokens": 10}, {"concurrency": 8, "input_tokens": 20}],
     [{"concurrency": 8, "input_tokens": 10}, {"concurrency": 8, "input_tokens": 20}]),
    ([{"concurrency": 8, "input_tokens": 10}], [{"concurrency": 8}]),
    ([{"rps": 2.0}] * 3, [{"rps": 2.0}, {"rps": 2.0, "again": 2}, {"rps": 2.0, "again": 3}]),
    ([{"rps": 2.17, "trace": 1}], [{"rps": 2.17, "trace": 1}]),
])  # fmt: skip
def test_what_names_a_load_among_the_others(loads, names):
    assert llmbench.load_names(loads) == names


def test_an_earlier_selftest_is_quoted_at_the_most_streams_that_an_open_loop_had():
    levels = [{"streams": streams, "first_ms": {"p99": 0.01 * streams}} for streams in (1, 10, 100)]
    collector = collect([plan(rps=10.0), *open_records()], concurrency=[])
    collector.header["selftest"] = {"errors": levels}
    assert llmbench.streams_in(collector.rows()[0]) == 10
    assert llmbench.summarize(collector)["client"]["selftest"]["streams"] == 10


# --- the highest load -------------------------------------------------------------------------------------------------


def searched(probes, kind="concurrency"):
    """What a search found: probes are (load, "ok", "bad", "client" or "short"), in their order."""
    stages = [
        {"stage": number, "load": {kind: load}, "slo": [{"passed": True}, {"passed": said != "bad"}],
         "client": {"limited_by": ["cpu"]} if said == "client" else {},
         "requests": {"total": 100, "dropped": 3 if said == "short" else 0}}
        for number, (load, said) in enumerate(probes)
    ]  # fmt: skip
    return llmbench.find_max(stages, kind)


@pytest.mark.parametrize("client,total,dropped,short", [
    ({}, 100, 0, False), ({}, 100, 1, True), ({"requested_rps": 50.0, "achieved_rps": 49.5}, 1000, 0, False),
    ({"requested_rps": 50.0, "achieved_rps": 48.0}, 1000, 0, True),
    ({"requested_rps": 50.0, "achieved_rps": 48.0}, 50, 0, False),  # two requests are no rate
])  # fmt: skip
def test_a_load_that_was_not_reached_is_known(client, total, dropped, short):
    assert llmbench.fell_short({"client": client, "requests": {"total": total, "dropped": dropped}}) is short


@pytest.mark.parametrize("probes,load,confirmed,failed", [
    ("1ok 2ok 4ok 8bad 6ok 6ok", 6, True, {"stage": 3, "load": 8}),
    ("1ok 2ok 4ok 8bad 6ok", 6, False, {"stage": 3, "load": 8}),
    ("1ok 2ok 4ok 8bad 6ok 6bad", 4, False, {"stage": 5, "load": 6}),  # not every probe of it passed
    ("1ok 2bad 4ok 8ok", 1, False, {"stage": 1, "load": 2}),  # not every lower load passed
    ("1ok 2ok 2ok", 2, True, None), ("4bad", None, False, {"stage": 0, "load": 4}),
    ("4bad 2bad 1bad", None, False, {"stage": 2, "load": 1}),
    ("1ok 2client 1ok", 1, True, {"stage": 1, "load": 2, "client": True}),
    ("1ok 2ok 4short 2ok", 2, True, {"stage": 2, "load": 4, "short": True}),
    ("1short", None, False, {"stage": 0, "load": 1, "short": True}),
    ("1client", None, False, {"stage": 0, "load": 1, "client": True}), ("", None, False, None),
])  # fmt: skip
def test_the_highest_load_of_which_and_below_which_everything_passed(probes, load, confirmed, failed):
    pairs = [(int(load), said) for load, said in re.findall(r"([0-9]+)([a-z]+)", probes)]
    found = searched(pairs)
    assert (found.get("load"), found["confirmed"], found.get("failed")) == (load, confirmed, failed)
    assert [(probe["stage"], probe["load"], probe["passed"]) for probe in found["probes"]] == [
        (number, load, said == "ok") for number, (load, said) in enumerate(pairs)]  # fmt: skip


def test_a_search_is_in_the_summary_of_one_only():
    lines = loaded_run(*(loaded_stage(i, {"rps": rate}, 30) for i, rate in enumerate((1.0, 2.0))), slo=["ttft.p95<=9s"])
    assert "find_max" not in llmbench.summarize(collect(lines[1:], slo=["ttft.p95<=9s"]))
    assert "find_max" not in llmbench.summarize(collect(lines[1:], find_max="rps"))  # nothing was asked of it
    found = llmbench.summarize(collect(lines[1:], find_max="rps", slo=["ttft.p95<=9s"]))["find_max"]
    assert list(found) == ["kind", "load", "confirmed", "probes"] and (found["kind"], found["load"]) == ("rps", 2.0)


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_lengths_are_means_over_what_had_a_target():
    lines = [record(0, tokens=100, in_tokens=2050, in_tokens_target=2048, out_tokens_target=100),
             record(1, tokens=90, in_tokens=2046, in_tokens_target=2048, out_tokens_target=100),
             record(2, tokens=110, in_tokens=4100, in_tokens_target=4096, out_tokens_target=100), record(3, tokens=7),
             record(4, status="timeout", in_tokens=9, in_tokens_target=2048, out_tokens=9, out_tokens_target=100)]
    assert llmbench.count_lengths(rows_of(lines)) == {
        "in_target": round(8192 / 3, 4), "in_actual": 2732.0, "out_target": 100.0, "out_actual": 100.0, "out_short": 1,
        "n": 3,
    }  # fmt: skip


@pytest.mark.parametrize("more,block", [
    ({}, None), ({"in_tokens_target": 24, "in_tokens": None}, None),
    ({"in_tokens_target": 24}, {"in_target": 24.0, "in_actual": 12.0, "n": 1}),
    ({"out_tokens_target": 90}, {"out_target": 90.0, "out_actual": 90.0, "out_short": 0, "n": 1}),
])  # fmt: skip
def test_without_a_target_there_are_no_lengths(more, block):
    assert llmbench.count_lengths(rows_of([record(**more)])) == block
    assert llmbench.summarize(collect([record(**more)])).get("lengths") == block


# --- drift ------------------------------------------------------------------------------------------------------------

TAILS = {
    "log-normal": lambda draw: draw.lognormvariate(5, 0.8), "exponential": lambda draw: 50 + draw.expovariate(1 / 200),
    "heavy": lambda draw: 100 * draw.paretovariate(1.5), "very skew": lambda draw: draw.lognormvariate(5, 1.2),
    "two modes": lambda draw: draw.gauss(200, 20) if draw.random() < 0.9 else draw.gauss(900, 100),
}  # fmt: skip


def soak(seed, tail="log-normal", n=6000, stretch=lambda share, draw: 1.0):
    """When requests a second apart started, and their times, stretched as a function of how far the run is."""
    draw = random.Random(seed)
    return [1000.0 * i for i in range(n)], [TAILS[tail](draw) * stretch(i / n, draw) for i in range(n)]


def wobble():
    """A level that comes and goes: each request's is mostly that of the one before."""
    level = 0.0

    def stretch(_, draw):
        nonlocal level
        level = 0.97 * level + draw.gauss(0, 0.06)
        return math.exp(level)

    return stretch


@pytest.mark.parametrize("tail", TAILS)
def test_a_stationary_run_has_no_shift_however_heavy_its_tail(tail):
    assert [seed for seed in range(200) if llmbench.find_shift(*soak(seed, tail, n=2500))] == []


def test_a_rise_of_two_fifths_is_found_in_every_run():
    for seed in range(200):
        turn = 0.25 + 0.5 * random.Random(-seed).random()
        shift = llmbench.find_shift(*soak(seed, stretch=lambda share, _, turn=turn: 1.4 if share >= turn else 1.0))
        assert shift is not None, seed
        assert abs(shift.moment / 6_000_000 - turn) < 0.12 and 1.2 < shift.after / shift.before < 1.65, seed


@pytest.mark.parametrize("tail", ["exponential", "heavy", "very skew"])
def test_a_rise_is_found_in_a_long_run_with_a_heavy_tail(tail):
    for seed in range(8):
        assert llmbench.find_shift(*soak(seed, tail, 20_000, lambda share, _: 1.4 if share > 0.4 else 1.0)), seed


def bump(share, seed):
    """A rise that comes and is gone again within the run, like a busy hour of the day."""
    draw = random.Random(seed)
    width = draw.uniform(0.04, 0.15)
    middle = draw.uniform(0.1 + 2 * width, 0.9 - 2 * width)
    return 1 + draw.uniform(0.4, 1.5) * math.exp(-(((share - middle) / width) ** 2))


@pytest.mark.parametrize("name,stretch", [
    ("a bump that returns", lambda seed: lambda share, _: bump(share, seed)),
    ("one spike", lambda seed: lambda share, _: 6.0 if 0.2 + seed / 500 < share < 0.25 + seed / 500 else 1.0),
    ("a slow start", lambda seed: lambda share, _: 3.0 if share < 0.05 else 1.0),
    ("a slow end", lambda seed: lambda share, _: 3.0 if share > 0.95 else 1.0),
    ("day and night", lambda seed: lambda share, _: 1 + 0.5 * math.sin(share * 2 * math.pi * 3 + seed)),
])  # fmt: skip
def test_what_does_not_last_is_no_shift(name, stretch):
    assert [seed for seed in range(200) if llmbench.find_shift(*soak(seed, n=3000, stretch=stretch(seed)))] == []


def test_levels_that_come_and_go_within_minutes_are_hardly_ever_taken_for_a_shift():
    assert sum(llmbench.find_shift(*soak(seed, n=3000, stretch=wobble())) is not None for seed in range(200)) <= 1


def test_a_shift_too_small_to_matter_is_none():
    stretch = lambda share, _: 1.08 if share > 0.5 else 1.0  # noqa: E731
    assert [seed for seed in range(30) if llmbench.find_shift(*soak(seed, n=20_000, stretch=stretch))] == []


def test_a_fall_and_a_slow_rise_are_shifts_too():
    fall = llmbench.find_shift(*soak(1, stretch=lambda share, _: 0.6 if share > 0.5 else 1.0))
    assert fall.after < 0.75 * fall.before
    rise = llmbench.find_shift(*soak(1, stretch=lambda share, _: 1.0 + share))
    assert rise.after > 1.3 * rise.before


@pytest.mark.parametrize("starts,values", [([], []), ([0.0], [1.0]), (range(5000), [5.0] * 5000), soak(1, n=999),
                                           (range(2000), [0.0] * 2000)])  # fmt: skip
def test_too_little_or_nothing_that_differs_has_no_shift(starts, values):
    assert llmbench.find_shift(starts, values) is None


@pytest.mark.parametrize("lag, buffered", [({}, True), ({"lag_ms": None}, True), ({"lag_ms": 150.0}, True),
                                            ({"lag_ms": 250.0}, False)])  # fmt: skip
def test_a_burst_is_the_endpoints_unless_this_client_was_late(lag, buffered):
    record = {"latency_ms": 1000.0, "itl_sum_ms": 0.4, "itl_hist": {"0": 20}}
    assert llmbench.is_buffered({**record, **lag}) is buffered


def test_ranks_share_ties():
    assert llmbench.ranks_of([5.0, 1.0, 5.0, 9.0]) == [2.5, 1.0, 2.5, 4.0]


@pytest.mark.parametrize("milliseconds,words", [
    (45_000, "45 s"), (59_600, "1 min 0 s"), (750_000, "12 min 30 s"), (11_400_000, "3 h 10 min"),
    (90_000_000, "25 h 0 min"),
])  # fmt: skip
def test_a_time_span_in_words(milliseconds, words):
    assert llmbench.span_words(milliseconds) == words
