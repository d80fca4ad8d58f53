"""Comparing runs: no difference is shown where there is none, a slower endpoint is worse, what is unfair is said."""

from __future__ import annotations

import base64
import collections
import functools
import hashlib
import itertools
import json
import math
import random
import re

import pytest
from made_records import header, loaded_run, loaded_stage, made_run, record, write_lines
from test_report import HOSTILE, Page, assets, charts_of

import llmbench

PAIRS = 100
# What is promised for 500 requests of an endpoint whose TTFT varies by a fifth, and that gets 10 % slower.
HEADLINES = [("ttft_ms", "p50"), ("tpot_ms", "p50"), ("tpot_ms", "p95"), ("steady_output_tokens_per_s", "")]


def resembling(draw, n, much):
    """A series of which each member resembles the one before (an AR(1) process of variance 1)."""
    value = draw.gauss(0, 1)
    for _ in range(n):
        yield value
        value = much * value + math.sqrt(1 - much * much) * draw.gauss(0, 1)


def made_up_rows(seed, n=500, slow=1.0, kind="", failing=0.0, streams=16):
    """The rows of a closed loop that nothing but `seed` tells from another: its endpoint is `slow` times as slow.

    kind: drift (slow and fast spells), bursts (now and then 25 slow requests), heavy (Pareto tails), outages (failures
    come twenty at a time).
    """
    draw = random.Random(seed)
    rows, slots = llmbench.Rows(0, {"concurrency": streams}), [0.0] * streams
    spells, burst, outage = list(resembling(draw, n, 0.95)), 0, 0
    for number in range(n):
        slot = min(range(streams), key=slots.__getitem__)
        start, pace = slots[slot], slow
        if kind == "drift":
            pace *= math.exp(0.15 * spells[number])
        if kind == "bursts":
            pace *= 3.0 if burst else 1.0
            burst = burst - 1 if burst else 25 * (draw.random() < 0.004)
        first = pace * (100 * draw.paretovariate(1.3) if kind == "heavy" else 300 * math.exp(0.2 * draw.gauss(0, 1)))
        step = pace * (8 * draw.paretovariate(2.5) if kind == "heavy" else 15 * math.exp(0.08 * draw.gauss(0, 1)))
        tokens = max(2, int(draw.lognormvariate(4.8, 0.35)))
        outage = outage - 1 if outage else 20 * (kind == "outages" and draw.random() < failing / 20)
        failed = outage > 0 if kind == "outages" else draw.random() < failing
        end = start + (50 if failed else first + step * (tokens - 1))
        made = {"status": "http_error" if failed else "ok", "scheduled_ms": start, "start_ms": start, "err": "HTTP 503"}
        if not failed:
            made.update(ttfe_ms=first, ttft_ms=first, latency_ms=end - start, decode_ms=end - start - first,
                        tpot_ms=step, out_tokens=tokens, in_tokens=500, out_chars=4 * tokens, finish_reason="stop")
        rows.add(made, end)
        slots[slot] = end
    return rows


METRICS = [metric for metric, stats in llmbench.COMPARED if stats and "scheduled" not in metric]


def compared_rows(rows):
    """Rows as one stage of a comparison."""
    return llmbench.compared_stage(rows, {}, llmbench.summarize_stage(rows, "usage", ()), METRICS)


def differences(first, second):
    """What two stages' rows come to, in words."""
    pair = llmbench.ComparedPair(first, second, [
        llmbench.difference_of(first, second, metric, stat, metric not in llmbench.SHARE_FIGURES)
        for metric, stat in llmbench.compared_figures(first, second)])
    llmbench.put_in_words([pair], True)
    return pair.rows


def words(rows):
    return collections.Counter(row.word for row in rows)


@functools.lru_cache(maxsize=None)
def made_up(seed, **options):
    return compared_rows(made_up_rows(seed, **options))


def false_alarms(pairs, **options):
    """In how many pairs of runs of one endpoint any figure is called better or worse, and how many are not."""
    alarms, judged = 0, 0
    for number in range(pairs):
        found = differences(made_up(2 * number, **options), made_up(2 * number + 1, **options))
        alarms += any(row.word in ("better", "worse") for row in found)
        judged += sum(row.word == "none" for row in found)
    return alarms, judged


# --- the promise ------------------------------------------------------------------------------------------------------


def test_two_runs_of_one_endpoint_show_no_difference_in_any_figure():
    alarms, judged = false_alarms(PAIRS)
    assert PAIRS - alarms >= 95
    assert judged >= 9 * PAIRS  # and that is not because nothing was judged


def test_an_endpoint_that_is_a_tenth_slower_is_worse():
    worse = collections.Counter()
    for number in range(PAIRS):
        found = differences(made_up(2 * number), made_up(100_000 + number, slow=1.1))
        worse.update((row.metric, row.stat) for row in found if row.word == "worse")
        assert not any(row.word == "better" for row in found if row.metric != "success_rate")
    assert {figure: worse[figure] for figure in HEADLINES if worse[figure] < 95} == {}


@pytest.mark.exhaustive
@pytest.mark.parametrize("options", [
    {"kind": "drift"}, {"kind": "bursts"}, {"kind": "heavy"}, {"failing": 0.3}, {"kind": "outages", "failing": 0.1},
    {"n": 100}, {"n": 60, "streams": 4}, {"n": 20, "streams": 4},
], ids=str)  # fmt: skip
def test_nor_where_requests_hang_together_have_heavy_tails_or_fail(options):
    alarms, judged = false_alarms(40, **options)
    assert alarms <= 3  # 5 % would be two
    assert judged >= 40  # the success rate at the least


def test_the_intervals_hold_what_is_true_in_95_of_100():
    """Of each judged figure: the true change of TTFT and TPOT is 10 %, and of their inverse -9.1 %."""
    held, known = collections.Counter(), collections.Counter()
    for number in range(PAIRS):
        for row in differences(made_up(2 * number), made_up(100_000 + number, slow=1.1)):
            if row.low is not None and row.metric in ("ttft_ms", "tpot_ms", "latency_ms"):
                known[row.metric, row.stat] += 1
                held[row.metric, row.stat] += row.low <= 0.1 <= row.high
    assert len(known) >= 6
    assert {figure: held[figure] for figure in known if held[figure] < 0.91 * known[figure]} == {}


def test_a_large_run_tells_small_changes():
    first, second = made_up(1, n=5000, streams=64), made_up(2, n=5000, streams=64, slow=1.03)
    rows = {(row.metric, row.stat): row for row in differences(first, second)}
    assert rows["ttft_ms", "p50"].word == rows["tpot_ms", "p50"].word == "worse"


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n,stat", [(31, "p50"), (400, "p50"), (400, "p95")])
def test_a_percentiles_chance_is_what_resampling_gives(n, stat):
    draw = random.Random(n)
    values = sorted(draw.lognormvariate(5, 0.5) for _ in range(n))
    share = int(stat[1:]) / 100.0
    chance = llmbench.percentile_chance(values, share, float(n))
    assert math.fsum(chance.weights) == pytest.approx(1) and chance.values == sorted(chance.values)
    drawn = sorted(llmbench.percentiles(draw.choices(values, k=n))[stat] for _ in range(4000))
    mean, middle = math.fsum(v * w for v, w in zip(*chance)), math.fsum(drawn) / len(drawn)
    spreads = [math.sqrt(math.fsum(w * (v - mean) ** 2 for v, w in zip(*chance))),
               math.sqrt(math.fsum((v - middle) ** 2 for v in drawn) / len(drawn))]
    assert mean == pytest.approx(middle, abs=0.15 * spreads[1])
    assert spreads[0] == pytest.approx(spreads[1], rel=0.1)


def test_a_changes_interval_is_what_drawing_gives():
    draw = random.Random(5)
    one, other = ([draw.lognormvariate(5, 0.3) * slow for _ in range(300)] for slow in (1.0, 1.2))
    chances = [llmbench.percentile_chance(sorted(values), 0.5, 300.0) for values in (one, other)]
    low, high = llmbench.likely_change(*chances, True)
    drawn = sorted(
        llmbench.percentiles(draw.choices(other, k=300))["p50"] / llmbench.percentiles(draw.choices(one, k=300))["p50"]
        for _ in range(4000))  # fmt: skip
    assert low == pytest.approx(drawn[100] - 1, abs=0.012) and high == pytest.approx(drawn[3900] - 1, abs=0.012)
    absolute = llmbench.likely_change(*chances, False)
    assert absolute[0] > 0 and absolute[1] < 100 and llmbench.chance_of_none(*chances) < 1e-4
    assert llmbench.chance_of_none(chances[0], chances[0]) == pytest.approx(1, abs=0.1)


def test_how_many_count_as_one_follows_how_much_they_resemble_each_other():
    for much in (0.0, 0.5, 0.9):
        found = [llmbench.inflation(list(resembling(random.Random(seed), 2000, much))) for seed in range(12)]
        true = (1 + much) / (1 - much)
        assert 0.75 * true < sorted(found)[6] < 1.8 * true
    assert llmbench.inflation([3.0] * 50) == 1.0 == llmbench.flags_inflation([1] * 50) == llmbench.flags_inflation([])
    assert llmbench.inflation([0.0, 1.0] * 100) == 1.0  # never less than one


@pytest.mark.parametrize("n", [513, 20_000])
def test_that_does_not_hang_on_a_series_being_cut_into_chunks(n):
    draw = random.Random(n)
    flags = [value <= 0 for value in resembling(draw, n, 0.8)]
    assert 3 < llmbench.flags_inflation(flags) < 15
    assert llmbench.flags_inflation([draw.random() < 0.5 for _ in range(n)]) < 2


def test_amounts_are_kept_when_they_are_spread_over_blocks():
    draw = random.Random(4)
    spans = []
    for _ in range(300):
        begin = draw.uniform(100, 1000)
        spans.append((begin, min(1100.0, begin + draw.choice([0.0, draw.expovariate(0.01)])), draw.uniform(0, 9)))
    spans.append((1100.0, 1100.0, 5.0))
    blocks = llmbench.spread_evenly(spans, 100.0, 50.0, 20)
    assert math.fsum(blocks) == pytest.approx(math.fsum(much for _, _, much in spans))
    outside = llmbench.spread_evenly([(0.0, 200.0, 8.0)], 100.0, 50.0, 4)
    assert outside == pytest.approx([2.0, 2.0, 0.0, 0.0])


def test_blocks_have_the_mean_that_the_summary_has():
    rows = made_up_rows(3)
    block, stage = llmbench.summarize_stage(rows, "usage", ()), made_up(3)
    for rate in ("rps", "output_tokens_per_s", "steady_output_tokens_per_s"):
        blocks = stage.rates[rate]
        assert 8 <= len(blocks) <= 60
        assert math.fsum(blocks) / len(blocks) == pytest.approx(block["throughput"][rate], rel=1e-4), rate


@pytest.mark.parametrize("one,other,word", [((0, 500), (4, 500), "none"), ((0, 500), (40, 500), "worse"),
                                            ((50, 500), (5, 500), "better"), ((0, 500), (0, 500), "none"),
                                            ((500, 500), (500, 500), "none"), ((0, 10), (9, 10), "few")])
def test_success_rates(one, other, word):
    def stage(failed, n):
        draw = random.Random(failed)
        flags = [True] * failed + [False] * (n - failed)
        draw.shuffle(flags)
        rows = llmbench.Rows(0, {"concurrency": 1})
        for number, bad in enumerate(flags):
            start = 100.0 * number
            made = {"status": "timeout", "err": "time-out"} if bad else {
                "status": "ok", "latency_ms": 90.0, "ttft_ms": 10.0, "ttfe_ms": 10.0}
            rows.add({**made, "start_ms": start, "scheduled_ms": start}, start + 90.0)
        return compared_rows(rows)

    row = next(row for row in differences(stage(*one), stage(*other)) if row.metric == "success_rate")
    assert row.word == word and row.change == pytest.approx((one[0] - other[0]) / one[1])
    if row.low is not None:
        assert row.low < row.high and row.low <= row.change + 0.01 and row.change - 0.01 <= row.high


@pytest.mark.parametrize("n", [0, 1, 2, 5, 19])
def test_of_too_few_requests_nothing_is_said(n):
    first, second = made_up(1, n=n, streams=1), made_up(2, n=500, streams=1)
    rows = differences(first, second) + differences(second, first) + differences(first, first)
    assert set(words(rows)) <= {"few", "absent"}
    assert all(row.low is None and row.likely is None for row in rows)


def test_percentiles_that_are_of_limited_meaning_are_not_judged():
    rows = {(row.metric, row.stat): row for row in differences(made_up(1, n=150), made_up(2, n=500))}
    assert rows["ttft_ms", "p95"].word == rows["tpot_ms", "p99"].word == "few"
    assert rows["ttft_ms", "p50"].word == "none"


def test_changes_that_nobody_would_feel_have_no_word():
    def noted(metric, before, after, slack, clock="kernel"):
        client = {"clock": clock, "ttft_slack_ms": {"p50": slack}, "lag_ms": {"p50": 1.0}}
        stages = [stage._replace(figures=dict(stage.figures, client=client)) for stage in (made_up(1), made_up(2))]
        change = after / before - 1
        row = llmbench.Difference(metric, "p50", (before, after), (9, 9), change, change / 2, 2 * change, 1e-9, "none")
        llmbench.put_in_words([llmbench.ComparedPair(*stages, [row])], True)
        return row.word, row.note

    assert noted("ttft_ms", 300.0, 301.2, 0.0) == ("none", "small")  # 0.4 %
    assert noted("ttft_ms", 300.0, 306.0, 0.0) == noted("ttft_ms", 300.0, 306.0, 5.0) == ("worse", "")
    assert noted("ttft_ms", 300.0, 306.0, 9.0) == ("none", "small")  # each may be 9 ms too late
    assert noted("ttft_ms", 2.0, 2.5, 0.0) == ("worse", "")
    assert noted("ttft_ms", 2.0, 2.5, 0.0, "user") == ("none", "small")  # it was read 1 ms late
    assert noted("tpot_ms", 20.0, 22.0, 9.0) == ("worse", "")  # of an answer's hundred tokens each has its share of it


def test_one_of_many_is_not_called_a_difference_by_chance():
    def rows(likely, n):
        return [llmbench.Difference("ttft_ms", "p50", (100.0, 110.0), (500, 500), 0.1, 0.01, 0.2, likely, "none")] + [
            llmbench.Difference("rps", "", (9.0, 9.0), (500, 500), 0.0, -0.1, 0.1, 0.9, "none") for _ in range(n)]

    for likely, n, word, note in ((0.02, 0, "worse", ""), (0.02, 9, "none", "chance"), (0.002, 9, "worse", "")):
        made = rows(likely, n)
        llmbench.put_in_words([llmbench.ComparedPair(made_up(1), made_up(1), made)], True)
        assert (made[0].word, made[0].note) == (word, note)


# --- conditions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text,wanted", [
    ("ttft.p95>+10%", ("ttft", "p95", ">", 0.1, True)), (" TTFT.P95 >= + 10 % ", ("ttft", "p95", ">=", 0.1, True)),
    ("ttft.p95>+50ms", ("ttft", "p95", ">", 50.0, False)),
    ("latency.mean>+.5s", ("latency", "mean", ">", 500.0, False)),
    ("success<-1%", ("success", "", "<", -0.01, False)), ("success<\u22120.5%", ("success", "", "<", -0.005, False)),
    ("throughput<-5%", ("throughput", "", "<", -0.05, True)),
    ("rps<-2req/s", ("rps", "", "<", -2.0, False)),
    ("request_tps.p50<=-3", ("request_tps", "p50", "<=", -3.0, False)),
    ("tpot.p90>+0%", ("tpot", "p90", ">", 0.0, True)),
    ("queue.p99>-5%", ("queue", "p99", ">", -0.05, True)),
])  # fmt: skip
def test_a_condition_can_be_read(text, wanted):
    condition = llmbench.parse_condition(text)
    assert condition[1:] == wanted
    assert condition.text == text.strip()


@pytest.mark.parametrize("text,error", [
    ("", "needs METRIC.STAT"), ("ttft", "needs METRIC.STAT"), ("ttft.p95>10%", "a change with its sign"),
    ("ttft.p95<=800ms", "is a --slo of run"), ("tfft.p95>+10%", r"unknown metric, tfft \(did you mean ttft\?\)"),
    ("ttft>+10%", "needs a statistic of ttft"), ("ttft.max>+10%", "that can have an interval"),
    ("ttft.p42>+10%", "needs a statistic"), ("success.p50<-1%", "leave .p50 out"), ("itl.p95>+10%", "take tpot"),
    ("goodput<-5%", "unknown metric, goodput"), ("success<-1", "needs a change of success in %"),
    ("ttft.p95>+10", "needs a change of ttft in us or ms or s or %"), ("ttft.p95>+10min", "needs a change of ttft in"),
    ("ttft.p95=+10%", "needs METRIC.STAT"), ("ttft.p95>+1e3ms", "needs"), ("ttft.p95>++1ms", "needs METRIC.STAT"),
    ("ttft.p95>+" + "9" * 400 + "ms", "a limit that no figure can have"),
])  # fmt: skip
def test_what_is_no_condition(text, error):
    with pytest.raises(ValueError, match=error):
        llmbench.parse_condition(text)


@pytest.mark.parametrize("text,shown", [("ttft.p95>+5%", True), ("ttft.p95>+9%", False), ("ttft.p95>+6%", False),
                                        ("ttft.p95>=+6%", True), ("ttft.p95<+13%", True), ("ttft.p95<+12%", False),
                                        ("ttft.p95<=+12%", True), ("ttft.p95<-1%", False)])
def test_only_a_whole_interval_beyond_the_limit_fails(text, shown):
    assert llmbench.parse_condition(text).shown(0.06, 0.12) is shown


def test_every_metric_that_can_be_compared_has_an_example_that_reads():
    for metric in llmbench.COMPARED_TIMES + llmbench.COMPARED_RATES:
        assert llmbench.parse_condition(llmbench.condition_example(metric)).metric == metric


# --- set-up, pairs ----------------------------------------------------------------------------------------------------


def run_of(lines, letter="A", conditions=()):
    collector = llmbench.Collector()
    for line in lines:
        collector.add(json.loads(json.dumps(line)))
    return llmbench.compared_run(letter, "runs/" + letter, collector, conditions)


def stages_of(loads, n=40, seed=1, **more):
    return [loaded_stage(index, load, n=n, seed=seed, zero=index * 1e6, **more) for index, load in enumerate(loads)]


@functools.lru_cache(maxsize=None)
def plain_run(letter="A", seed=1, slow=1.0, n=400):
    return run_of(loaded_run(loaded_stage(0, {"concurrency": 8}, n=n, seed=seed, slow=slow)), letter)


def test_stages_are_paired_by_load_and_the_others_are_named():
    first = run_of(loaded_run(*stages_of([{"concurrency": c} for c in (1, 4, 16)])))
    second = run_of(loaded_run(*stages_of([{"concurrency": c} for c in (16, 8, 4)], seed=2)), "B")
    against = llmbench.compare_runs(first, second)
    assert against.places == [(1, 2), (2, 0)] and against.alone == ([0], [1])
    assert [pair.first.load == pair.second.load for pair in against.pairs] == [True, True]
    texts = llmbench.load_texts(assets(), "en")
    assert llmbench.alone_words(texts, first, against) == "Only in A: 1 stream. Only in B: 8 streams."
    shown = "\n".join(llmbench.comparison_lines(first, [against], texts, lambda style, text: text))
    assert "Only in A: 1 stream. Only in B: 8 streams." in shown


def test_a_load_that_is_repeated_is_paired_in_turn():
    loads = [{"concurrency": 4}, {"concurrency": 4}, {"concurrency": 8}]
    first, second = run_of(loaded_run(*stages_of(loads))), run_of(loaded_run(*stages_of(loads[:2], seed=3)), "B")
    against = llmbench.compare_runs(first, second)
    assert against.places == [(0, 0), (1, 1)] and against.alone == ([2], [])


def test_open_loops_of_other_caps_or_lengths_are_other_loads():
    first = run_of(loaded_run(*stages_of([{"rps": 4.0, "cap": 8}, {"rps": 4.0}])))
    second = run_of(loaded_run(*stages_of([{"rps": 4.0, "cap": 16}, {"rps": 4.0}], seed=2)), "B")
    assert llmbench.compare_runs(first, second).places == [(1, 1)]


def test_two_single_stages_are_compared_whatever_their_loads_and_that_is_said():
    second = run_of(loaded_run(loaded_stage(0, {"concurrency": 16}, n=400, seed=2)), "B")
    against = llmbench.compare_runs(plain_run(), second)
    assert len(against.pairs) == 1 and next(unfair.key for unfair in against.unfair) == "load"
    for name in ("en", "zh"):
        said = llmbench.all_unfair(llmbench.load_texts(assets(), name), [against])[0]
        assert "A 8" in said and "B 16" in said


CHANGES = {
    "model": {"run": {"model": "other"}}, "provider": {"run": {"provider": "other"}},
    "arrival": {"arrival": "constant"},
    "ramp": {"ramp": 3.0}, "warmup": {"warmup": 9}, "workload": {"prompts": {"source": "x.txt", "count": 3}},
    "order": {"order": "random"}, "turns": {"turns": 2}, "trace_speed": {"trace_speed": 2.0},
    "unique": {"unique": False},
    "max_tokens": {"max_tokens": 64}, "input_tokens": {"input_tokens": "512"}, "prefix_tokens": {"prefix_tokens": 50},
    "output_tokens": {"output_tokens": 64}, "stream": {"stream": False}, "token_mode": {"token_mode": "chars"},
    "think_tags": {"think_tags": "off"}, "body": {"body": {"temperature": 0}}, "count_connect": {"count_connect": True},
    "clock": {"records": {"clock": "user"}},
}  # fmt: skip


@pytest.mark.parametrize("setting", [setting for setting in llmbench.SETTINGS if setting.unfair], ids=lambda s: s.key)
def test_every_setting_that_matters_is_warned_of_in_both_languages(setting):
    change = dict(CHANGES[setting.key])
    run, records, load = change.pop("run", {}), change.pop("records", {}), {"rps": 6.0}
    lines = loaded_run(loaded_stage(0, load, n=120, seed=2, **records), **change)
    lines[0]["run"].update(run)
    first, second = run_of(loaded_run(loaded_stage(0, load, n=120, seed=1))), run_of(lines, "B")
    against = llmbench.compare_runs(first, second)
    found = [unfair.values["key"] for unfair in against.unfair if unfair.key == "setting"]
    assert found == [setting.key]
    assert llmbench.comparison_state([against]) == "caution"
    for name in ("en", "zh"):
        texts = llmbench.load_texts(assets(), name)
        said = "\n".join(llmbench.comparison_lines(first, [against], texts, lambda style, text: text))
        assert re.sub(r"\s", "", texts["unfair." + setting.key]) in re.sub(r"\s", "", said)
        assert texts["setting." + setting.key] in said.partition(texts["setting.differ"])[2]


def test_a_setting_that_only_tells_runs_apart_is_shown_and_not_unfair():
    lines = loaded_run(loaded_stage(0, {"concurrency": 8}, n=400, seed=2), seed=7)
    lines[0]["run"].update(url="http://other/v1", host="h2", tool_version="1.1.0")
    against = llmbench.compare_runs(plain_run(), run_of(lines, "B"))
    assert llmbench.comparison_state([against]) == "valid"
    differ = {setting.key for setting, _, apart in llmbench.settings_of([plain_run(), against.run]) if apart[1]}
    assert differ == {"endpoint", "seed", "tool_version"}


def test_a_workload_is_another_one_by_its_hash():
    same = ["x", 3, None], ["x", 3, "abc"], ["y", 3, "abc"], ["x", 3, "abd"]
    asked = [llmbench.same_setting("workload", one, other) for one, other in itertools.combinations(same, 2)]
    assert asked == [True, False, True, True, False, False]


def test_lengths_and_caches_that_are_apart_are_warned_of():
    longer = [dict(line, out_tokens=2 * line["out_tokens"], in_tokens=700, cached_tokens=350) if "out_tokens" in line
              else line for line in loaded_run(loaded_stage(0, {"concurrency": 8}, n=400, seed=2))]
    against = llmbench.compare_runs(plain_run(), run_of(longer, "B"))
    said = llmbench.all_unfair(llmbench.load_texts(assets(), "en"), [against])
    assert [sum(text.startswith(start) for text in said) for start in ("Answers: A ", "Prompts: A ")] == [1, 1]
    assert "Prompt tokens from a cache: A 0 %, B 50.0 %. Cached prompts have a shorter TTFT." in said


def invalid_run(letter="B"):
    lines = loaded_run(loaded_stage(0, {"concurrency": 8}, n=400, seed=2, slow=1.5))
    for line in lines:
        if "audit" in line:
            line["audit"]["cpu_percent"] = 99.0
    return run_of(lines, letter)


def test_an_invalid_run_is_not_judged():
    condition = llmbench.parse_condition("ttft.p50>+10%")
    first, second = plain_run(), invalid_run()
    against = llmbench.compare_runs(first, second, [condition])
    assert second.state == "INVALID" and llmbench.comparison_state([against]) == "invalid"
    assert set(words(against.rows)) <= {"unjudged", "few", "absent"} and words(against.rows)["unjudged"] > 5
    assert [outcome.state for outcome in against.outcomes] == ["unjudged"]
    assert llmbench.compared_status(first, [against]) == llmbench.EXIT_CLIENT


def test_too_few_alone_makes_no_comparison_unfair():
    first, second = plain_run(n=150), plain_run("B", 2, n=150)
    assert [reason["key"] for reason in first.summary["verdict"]["reasons"]] == ["few"]
    assert llmbench.comparison_state([llmbench.compare_runs(first, second)]) == "valid"


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Directories as runs leave them: one, another of the same endpoint, and one of an endpoint half as fast again."""
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.chdir(tmp_path)
    for name, seed, slow in (("one", 1, 1.0), ("two", 2, 1.0), ("slow", 3, 1.5)):
        write_lines(tmp_path / name, loaded_run(loaded_stage(0, {"concurrency": 8}, n=400, seed=seed, slow=slow)))
    return tmp_path


def compare(capsys, *words):
    status = llmbench.main(["compare", *words])
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_the_command_writes_a_page_and_a_table(capsys, runs):
    status, out, err = compare(capsys, "one", "two", "--lang", "en")
    assert (status, err) == (0, "")
    assert "No difference shown between A and B in any of " in re.sub(r"\s+", " ", out)
    assert "worse" not in out and "COMPARABLE" in out
    assert sorted(path.name for path in runs.iterdir()) == ["compare.html", "one", "slow", "two"]
    assert [path.name for path in (runs / "one").iterdir()] == ["results.jsonl"]  # nothing is added to a run
    page = (runs / "compare.html").read_text(encoding="utf-8")
    assert "No difference shown" in Page(page).text


def test_every_figure_is_the_summarys_in_table_and_page(capsys, runs):
    out = compare(capsys, "one", "slow", "--lang", "en")[1].replace("\u00a0", " ")
    page = Page((runs / "compare.html").read_text(encoding="utf-8")).text
    collectors = [llmbench.collect_run(name, pytest.fail) for name in ("one", "slow")]
    first, second = map(llmbench.summarize, collectors)
    for metric, stats in (("ttft_ms", ("p50", "p95")), ("latency_ms", ("p50", "p95")), ("tpot_ms", ("p50", "p95"))):
        for stat in stats:
            divisor = 1000.0 if min(run[metric][stat] for run in (first, second)) >= 2000 else 1.0
            values = [llmbench.figure(run[metric][stat] / divisor) for run in (first, second)]
            name = "%s %s" % (llmbench.load_texts(assets(), "en")["metric." + metric], stat.upper())
            line = next(line for line in out.split("\n") if line.startswith("  " + name + ", "))
            for text in (line, page[page.index(name + ", "):]):
                found = re.search(r"(?:ms|s) +([\d,.]+) +([\d,.]+) +([+−][\d.]+) %", text)
                assert list(found.groups()[:2]) == values
                change = 100 * (second[metric][stat] / first[metric][stat] - 1)
                assert float(found.group(3).replace("−", "-")) == pytest.approx(change, abs=0.06)


@pytest.mark.parametrize("words,wanted", [
    (["one", "two"], 0), (["one", "slow"], 0), (["one", "slow", "--fail-if", "ttft.p50>+10%"], 1),
    (["one", "two", "--fail-if", "ttft.p50>+10%"], 0), (["slow", "one", "--fail-if", "ttft.p50>+10%"], 0),
    (["one", "two", "slow", "--fail-if=ttft.p50>+10%"], 1), (["one", "slow", "-fail-if", "ttft.p50>+20ms"], 1),
    (["one", "slow", "--fail-if", "ttft.p50>+90%", "--fail-if", "success<-5%"], 0),
    (["one", "slow", "--fail-if", "ttft.p50>+90%", "--fail-if", "tpot.mean>+20%"], 1),
    (["one", "slow", "--fail-if", "steady<-10%"], 1), (["one", "slow", "--fail-if", "request_tps.p90<-10%"], 1),
    (["one", "slow", "--fail-if", "ttft.p50>+49.9%"], 0),  # about what it is: the interval does not lie beyond
])  # fmt: skip
def test_the_exit_status(capsys, runs, words, wanted):
    status, out, err = compare(capsys, *words)
    assert (status, err) == (wanted, "")
    assert ("FAIL" in out) == (wanted == 1)


@pytest.mark.parametrize("words,error", [
    ([], "the following arguments are required|arguments"), (["one"], "two directories at least"),
    (["one", "one"], "one is given twice"), (["one", "./one/"], "is given twice"),
    (["one", "nothing"], "holds no results"),
    (["one", "two", "--fail-if", "ttft>+1%"], "--fail-if needs a statistic of ttft"),
    (["one", "two", "--lang", "fr"], "--lang"), (["one", "two", "--out", "one"], "cannot be written to"),
    (["one", "two", "--out", "no/where.html"], "cannot be written to"),
    (["one", "two", "--bad"], "--bad is not a flag"),
    (["one", "two", "--out", "one/results.jsonl"], "is there and is no comparison"),
    (["one", "two"] + ["d%d" % number for number in range(11)], "12 directories at most"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(capsys, runs, words, error):
    before = (runs / "one" / "results.jsonl").read_bytes()
    status, out, err = compare(capsys, *words)
    assert status == 2 and out == "" and re.fullmatch(r"llmbench: error: [^\n]+\n", err) and re.search(error, err)
    assert not (runs / "compare.html").exists() and (runs / "one" / "results.jsonl").read_bytes() == before


def test_an_older_comparison_is_replaced_and_no_other_page(capsys, runs):
    assert compare(capsys, "one", "two")[0] == 0
    old = (runs / "compare.html").read_bytes()
    assert compare(capsys, "one", "slow")[0] == 0 and (runs / "compare.html").read_bytes() != old
    summary = llmbench.build_outputs(str(runs / "one"), assets(), pytest.fail)
    assert summary["requests"]["success"] == 400
    status, _, err = compare(capsys, "one", "two", "--out", "one/report.html")
    assert status == 2 and "is no comparison" in err


def test_what_cant_be_judged_is_said_and_what_failed_wholly_is_3(capsys, runs):
    write_lines(runs / "few", loaded_run(loaded_stage(0, {"concurrency": 8}, n=30)))
    status, out, err = compare(capsys, "one", "few", "--fail-if", "ttft.p99>+1%")
    assert status == 0 and "not judged" in out
    assert err == "llmbench: --fail-if ttft.p99>+1% could not be judged for B\n"
    failures = [record(10.0 * n, None, 10.0 * n + 5, status="timeout", err="time-out") for n in range(60)]
    write_lines(runs / "none", [header(concurrency=[8]), *failures, {"end": {"reason": "done"}}])
    assert compare(capsys, "one", "none", "--fail-if", "ttft.p50>+1%")[0] == 3
    status, out, _ = compare(capsys, "one", "none")
    assert status == 0 and re.search(r"Success rate +100 % +0 % .* worse", out)


def test_runs_without_a_common_load(capsys, runs):
    loads = [[{"concurrency": c} for c in pair] for pair in ((1, 2), (4, 8))]
    for name, stages in zip(("low", "high"), loads):
        write_lines(runs / name, loaded_run(*stages_of(stages)))
    status, out, _ = compare(capsys, "low", "high")
    assert status == 0 and "have no load in common" in re.sub(r"\s+", " ", out)
    assert "have no load in common" in Page((runs / "compare.html").read_text(encoding="utf-8")).text
    status, _, err = compare(capsys, "low", "high", "--fail-if", "ttft.p50>+1%")
    assert status == 2 and "no load in common" in err


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("lines", [
    pytest.param([header()], id="header alone"),
    pytest.param([header(), record()], id="one request, cut off"),
    pytest.param([header(), *(record(50.0 * n, 50.0 * n + 20, 50.0 * n + 300) for n in range(5))], id="five"),
    pytest.param(made_run(20), id="twenty"), pytest.param(made_run(200, failing=0.6)[:-1], id="failures, cut off"),
    pytest.param([header(token_mode="chars"), *(
        record(50.0 * n, 50.0 * n + 20, 50.0 * n + 300, None) for n in range(300))], id="chars"),
    pytest.param([{"llmbench": "1", "run": {"run_id": "old", "model": "m"}}, *(
        record(50.0 * n, 50.0 * n + 20, 50.0 * n + 300) for n in range(60))], id="header without configuration"),
    pytest.param([header(), *(record(50.0 * n, None, 50.0 * n + 300) for n in range(60))], id="not streamed"),
    pytest.param([header(), *(record(100.0 * n, 100.0 * n + 20, 100.0 * n + 90) for n in range(900))], id="all alike"),
    pytest.param([header(), *(record(9.0, 9.0, 9.0) for _ in range(900))], id="all of nothing"),
])  # fmt: skip
def test_whatever_became_of_a_run_it_is_compared(capsys, runs, lines, language):
    write_lines(runs / "odd", lines)
    for names in (("one", "odd"), ("odd", "one"), ("odd", "two", "odd2")):
        if names[-1] == "odd2":
            write_lines(runs / "odd2", lines)
        status, out, err = compare(capsys, *names, "--lang", language, "--fail-if", "ttft.p95>+10%", "--fail-if",
                                   "rps<-3req/s", "--fail-if", "queue.p50>+5%", "--fail-if", "ttft.mean>+1ms")
        assert status in (0, 1, 3) and "Traceback" not in err and out.count("\n") > 12
        page = (runs / "compare.html").read_text(encoding="utf-8")
        Page(page)
        assert "nan" not in Page(page).text.lower().replace("nanoseconds", "")


def test_a_line_that_was_cut_off_is_left_out_with_a_notice(capsys, runs):
    with open(runs / "two" / "results.jsonl", "ab") as file:
        file.write(b'{"request_id":"ca')
    status, _, err = compare(capsys, "one", "two")
    assert status == 0 and err.count("\n") == 1 and "the last line was cut off" in err


def test_it_says_the_same_each_time(capsys, runs):
    pages = []
    for _ in range(2):
        compare(capsys, "one", "two", "slow")
        pages.append((runs / "compare.html").read_bytes())
    assert pages[0] == pages[1]


# --- the page ---------------------------------------------------------------------------------------------------------


def page_of(first, *others, language="en", conditions=()):
    against = [llmbench.compare_runs(first, other, conditions) for other in others]
    return llmbench.render_comparison(first, against, language, assets())


@functools.lru_cache(maxsize=None)
def made_page(name):
    slow = llmbench.parse_condition("ttft.p50>+5%")
    if name == "pair":
        return page_of(plain_run(), plain_run("B", 2, 1.2), conditions=[slow])
    if name == "many":
        return page_of(plain_run(), *(plain_run(letter, number) for number, letter in enumerate("BCDEFGHI", 2)))
    if name == "invalid":
        return page_of(plain_run(), invalid_run(), conditions=[slow])
    loads = [{"concurrency": c} for c in (2, 4, 8)]
    first = run_of(loaded_run(*stages_of(loads, n=250)))
    return page_of(first, run_of(loaded_run(*stages_of(loads[1:] + [{"concurrency": 16}], n=250, seed=5)), "B"))


PAGES = ["pair", "many", "invalid", "sweep"]


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_whole_and_loads_nothing(name):
    page = made_page(name)
    parsed = Page(page)
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [attrs["href"] for tag, attrs in parsed.tags if tag == "a"]
    assert all(link[0] == "#" and link[1:] in ids for link in links)
    assert not [attrs for _, attrs in parsed.tags if {"src", "onclick", "onload", "srcset"} & set(attrs)]
    policy = next(attrs["content"] for _, attrs in parsed.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    scripts = [text for attrs, text in parsed.scripts if not attrs.get("type")]
    hashes = ["'sha256-%s'" % base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert policy.startswith("default-src 'none'; script-src " + " ".join(hashes)) and "unsafe-eval" not in policy
    charts = charts_of(page)
    assert {attrs["data-chart"] for _, attrs in parsed.tags if "data-chart" in attrs} == set(charts)
    assert not re.search(r"\$\w+", re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL))


def test_curves_lie_over_one_another_and_marks_are_the_summarys():
    charts = charts_of(made_page("pair"))
    assert set(charts) == {"0-compare_ttft", "0-compare_latency", "0-compare_tpot"}
    for name, metric in (("ttft", "ttft_ms"), ("latency", "latency_ms"), ("tpot", "tpot_ms")):
        for series, run in zip(charts["0-compare_" + name]["series"], (plain_run(), plain_run("B", 2, 1.2))):
            assert series["name"] == run.letter
            wanted = [run.summary[metric][stat] for stat in ("p50", "p95", "p99")]
            assert [mark[0] for mark in series["marks"]] == wanted
            assert series["points"][1::2] == sorted(series["points"][1::2])


def test_dots_stand_where_the_change_is_on_an_axis_with_zero_in_its_middle():
    page = made_page("pair")
    against = llmbench.compare_runs(plain_run(), plain_run("B", 2, 1.2))
    end = llmbench.axis_end([against])
    mark = r'<i class="reach" style="left:([\d.]+)%;width:([\d.]+)%"></i><i class="dot" style="left:([\d.]+)%'
    dots = re.findall(mark, page)
    rows = [row for row in against.rows if row.low is not None]
    assert len(dots) == len(rows) and page.count('<i class="zero">') == len(against.rows)
    for (left, width, dot), row in zip(dots, rows):
        assert float(dot) == pytest.approx(50 + 50 * row.change / end, abs=0.01)
        assert float(left) == pytest.approx(50 + 50 * max(-end, row.low) / end, abs=0.01)
        assert float(left) + float(width) == pytest.approx(50 + 50 * min(end, row.high) / end, abs=0.31)


def test_an_axis_is_round_and_holds_the_intervals():
    rows = [llmbench.Difference("ttft_ms", "p50", (1.0, 1.0), (9, 9), 0.1, -0.02, high, 0.5) for high in (0.21, 0.27)]
    pair = llmbench.ComparedPair(made_up(1), made_up(1), rows)
    against = [llmbench.Against(plain_run(), [pair], [], ([], []), [], [], True)]
    assert llmbench.axis_end(against) == pytest.approx(0.3)
    rows[0].high = 8.0
    assert llmbench.axis_end(against) == 1.0
    page = llmbench.read_page(assets())
    assert "cut-high" in llmbench.change_mark(page, rows[0], 1.0)
    assert "cut" not in llmbench.change_mark(page, rows[1], 1.0)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_word_of_a_comparison_is_there(language):
    texts = llmbench.load_texts(assets(), language)
    groups = {
        "word": ["better", "worse", "none", "few", "absent", "unjudged"], "condition": ["failed", "kept", "unjudged"],
        "fair": [state + end for state in ("valid", "caution", "invalid") for end in ("", ".text")],
        "unfair": [setting.key for setting in llmbench.SETTINGS if setting.unfair] + [
            "load", "cached", "in_tokens", "out_tokens", "out_chars", "verdict", "setting"],
        "setting": [setting.key for setting in llmbench.SETTINGS], "footnote": ["chance", "small", "few"],
        "compare": ["none", "worse", "better", "both", "few", "unjudged", "no_pair", "rest"],
        "metric": [metric for metric, _ in llmbench.COMPARED],
        "method": [key + end for key in ("interval", "hang", "word", "limits") for end in ("", ".text")],
    }  # fmt: skip
    for group, names in groups.items():
        for name in names:
            assert llmbench.worded(texts, group, name).strip(), (group, name)


@pytest.mark.parametrize("language,word", [("en", ("worse", "better", "no difference shown")),
                                           ("zh-CN", ("更差", "更好", "未见差异"))])
def test_the_words(language, word):
    hidden = {"en": "zh-CN", "zh-CN": "en"}[language]
    slower = Page(page_of(plain_run(), plain_run("B", 2, 1.3)), hidden).text
    faster = Page(page_of(plain_run(), plain_run("B", 2, 0.7)), hidden).text
    assert word[0] in slower.partition("TTFT P50, ms")[2][:90]
    assert word[1] in faster.partition("TTFT P50, ms")[2][:90]
    assert word[2] in slower and word[2] in faster


def test_differing_facts_are_marked():
    lines = loaded_run(loaded_stage(0, {"concurrency": 8}, n=400, seed=2), max_tokens=64)
    page = page_of(plain_run(), run_of(lines, "B"))
    cells = re.findall(r'<td class="differs">(.*?)</td>', page)
    assert cells == ["64"] and page.count('class="unequal"') == 1


def test_conditions_of_an_invalid_run_are_neither_passed_nor_failed():
    text = Page(made_page("invalid")).text
    assert "Conditions (--fail-if) not judged" in text and "PASS" not in text and "FAIL" not in text
    assert "1 of 1 failed" in Page(made_page("pair")).text


def test_hostile_names_stay_text():
    lines = loaded_run(loaded_stage(0, {"concurrency": 8}, n=60, seed=2), body={"x": HOSTILE})
    lines[0]["run"].update(model=HOSTILE, url="http://h/" + HOSTILE, run_id=HOSTILE, host=HOSTILE, provider=HOSTILE)
    second = run_of(lines, "B")
    second.place = HOSTILE
    page = page_of(plain_run(n=60), second)
    parsed = Page(page)
    assert "alert(1)" in parsed.text and "\x00" not in page
    assert len(parsed.scripts) == 3 and not any(tag == "img" for tag, _ in parsed.tags)
    page.encode("utf-8")
    shown = llmbench.comparison_lines(plain_run(n=60), [llmbench.compare_runs(plain_run(n=60), second)],
                                      llmbench.load_texts(assets(), "en"), lambda style, text: text)
    assert not any(ord(letter) < 32 for line in shown for letter in line)
