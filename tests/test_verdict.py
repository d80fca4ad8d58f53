"""The verdict: what makes a run INVALID, what calls for CAUTION, and what does neither."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from made_records import collect, record, with_gaps

import llmbench

ROOT = Path(__file__).resolve().parent.parent
TEXTS = {language: json.loads((ROOT / f"assets/texts/{language}.json").read_text("utf-8")) for language in ("en", "zh")}
DONE = {"end": {"reason": "done"}}


def good(number, **more):
    """One of many answers in which nothing is odd."""
    start = number * 10.0
    made = record(start, start + 100, start + 1000, 21, scheduled_ms=start, request_id="r-%d" % number,
                  finish_reason="stop", out_crc32="%08x" % number)  # fmt: skip
    made = with_gaps(made, [45.0] * 20)
    return {key: value for key, value in {**made, **more}.items() if value is not None}


def audit(**more):
    """The audit line of a process that had little to do."""
    bucket = llmbench.log_bucket(0.00005)
    return {"audit": {"stage": 0, "part": 0, "cpu_percent": 20.0, "lag_hist": {bucket: 5000}, **more}}


def verdict(lines, **config):
    """The verdict's state and the keys of its reasons."""
    judged = llmbench.summarize(collect(lines, **{"concurrency": [1], **config}))["verdict"]
    for reason in judged["reasons"]:
        for texts in TEXTS.values():  # each reason has its words in both languages
            assert "{" not in llmbench.reason_said(texts, reason)
    return judged["state"], [reason["key"] for reason in judged["reasons"]]


def plenty(change=None, share=1.0, n=1000):
    """A thousand good answers, the first `share` of them changed."""
    return [good(number, **(change or {} if number < share * n else {})) for number in range(n)]


def test_a_run_in_which_nothing_is_odd_is_valid():
    assert verdict([*plenty(), audit(), DONE]) == ("VALID", [])


@pytest.mark.parametrize(
    "lines,key",
    [
        ([*plenty(), audit(cpu_percent=97.0), DONE], "cpu"),
        ([*plenty(), audit(lag_hist={llmbench.log_bucket(0.038): 100}), DONE], "lag_ms"),
        ([*plenty({"ttft_slack_ms": 20.0}, 0.02), audit(), DONE], "ttft_slack_ms"),
        ([*plenty({"queue_ms": 30.0}, 0.03), audit(), DONE], "late"),
        (
            [
                *plenty(),
                record(1.0, status="connect_error", err="h: too many open files: raise `ulimit -n`"),
                audit(),
                DONE,
            ],
            "exhausted",
        ),
    ],
)
def test_the_client_as_the_limit_is_invalid(lines, key):
    assert verdict(lines) == ("INVALID", [key])


@pytest.mark.parametrize(
    "lines",
    [
        [*plenty(), audit(cpu_percent=89.0), DONE],
        [*plenty(), audit(lag_hist={llmbench.log_bucket(0.0048): 100}), DONE],
        [*plenty({"ttft_slack_ms": 20.0}, 0.005), audit(), DONE],
        [*plenty({"queue_ms": 30.0}, 0.005), audit(), DONE],
    ],
)
def test_below_the_limit_the_client_is_no_reason(lines):
    assert verdict(lines) == ("VALID", [])


def test_the_lag_that_is_allowed_follows_the_ttft():
    slow = [good(number, ttft_ms=2000.0) for number in range(1000)]
    assert verdict([*slow, audit(lag_hist={llmbench.log_bucket(0.090): 100}), DONE]) == ("VALID", [])
    assert verdict([*slow, audit(lag_hist={llmbench.log_bucket(0.110): 100}), DONE]) == ("INVALID", ["lag_ms"])


FAILED = record(5.0, status="http_error", err="HTTP 500")
CANCELLED = record(5.0, status="cancelled", err="interrupted")


@pytest.mark.parametrize(
    "lines,config,key",
    [
        ([*plenty(), audit()], {}, "cut_off"),
        ([*plenty(), audit(), {"end": {"reason": "interrupted by SIGINT"}}], {}, "ended_early"),
        ([*plenty(n=999), audit(), DONE], {}, "few"),
        ([*plenty(), *[FAILED] * 11, audit(), DONE], {}, "failures"),
        ([*plenty(), *[CANCELLED] * 11, audit(), DONE], {}, "cancelled"),
        ([*plenty(), record(5.0, status="dropped", err="late"), audit(), DONE], {}, "dropped"),
        ([*plenty({"compressed": "gzip"}), audit(), DONE], {}, "compressed"),
        ([*plenty({"streamed": False}), audit(), DONE], {}, "not_streamed"),
        ([*plenty({"itl_hist": {"0": 20}, "itl_sum_ms": 0.4}), audit(), DONE], {}, "buffered"),
        ([*plenty({"finish_reason": None}, 0.02), audit(), DONE], {}, "no_finish"),
        ([*plenty({"out_crc32": "0000abcd"}, 0.1), audit(), DONE], {}, "repeated"),
        ([*plenty({"out_tokens": None}, 0.001), audit(), DONE], {}, "usage_missing"),
        ([*plenty({"out_tokens": 63}), audit(), DONE], {}, "several_tokens"),
        ([*plenty({"cached_tokens": 6}), audit(), DONE], {}, "cached"),
        ([*plenty({"ttft_ms": 400.0}, 0.005), audit(), DONE], {}, "warmup"),
        (
            [*plenty({"clock": "user"}, 0.001), audit(lag_hist={llmbench.log_bucket(0.003): 100}), DONE],
            {},
            "clock",
        ),
    ],
)
def test_what_a_reader_must_bear_in_mind_is_caution(lines, config, key):
    assert verdict(lines, **config) == ("CAUTION", [key])


@pytest.mark.parametrize(
    "lines,config",
    [
        ([*plenty(), *[FAILED] * 9, audit(), DONE], {}),
        ([*plenty({"out_crc32": "0000abcd"}, 0.1), audit(), DONE], {"unique": False}),
        ([*plenty({"out_crc32": "0000abcd", "out_chars": 5}, 0.1), audit(), DONE], {}),
        ([*plenty({"out_tokens": None}), audit(), DONE], {"token_mode": "chars"}),
        ([*plenty({"clock": "user"}), audit(), DONE], {}),
        ([*plenty({"ttft_ms": 400.0}, 0.5), audit(), DONE], {}),
        # A quick model after a long prompt: all of it in a twentieth of the time, but not in a burst.
        ([*plenty({"latency_ms": 4000.0, "itl_sum_ms": 180.0}), audit(), DONE], {}),
        # All of it at once, as this client could not read for 900 of its 1,000 ms.
        ([*plenty({"itl_hist": {"0": 20}, "itl_sum_ms": 0.4, "lag_ms": 900.0}), audit(), DONE], {}),
    ],
)
def test_what_is_no_reason(lines, config):
    assert verdict(lines, **config) == ("VALID", [])


def test_invalid_comes_first_and_names_every_reason():
    state, keys = verdict([*plenty(n=100), audit(cpu_percent=99.0)])
    assert (state, keys) == ("INVALID", ["cpu", "cut_off", "few"])


def test_a_reason_of_several_stages_stands_once_with_its_worst_values():
    lines = []
    for stage, cpu in enumerate((95.0, 99.0, 20.0)):
        lines += [good(number, stage=stage) for number in range(1000)]
        lines.append(audit(stage=stage, cpu_percent=cpu))
    judged = llmbench.summarize(collect([*lines, DONE], concurrency=[1, 2, 4]))["verdict"]
    (reason,) = judged["reasons"]
    assert (reason["key"], reason["values"]["cpu"], reason["streams"]) == ("cpu", 99.0, [1, 2])
    assert llmbench.reason_said(TEXTS["en"], reason).startswith("1, 2 streams: A client process used 99.0 %")


@pytest.mark.parametrize("lines", [[FAILED] * 30, []])
def test_a_run_without_any_success_is_not_valid_and_says_nothing_of_percentiles(lines):
    assert verdict([*lines, audit(), DONE]) == ("CAUTION", ["nothing"])


def test_each_reason_in_the_code_has_its_text_and_each_text_its_reason():
    tree = ast.parse((ROOT / "llmbench.py").read_text("utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Reason"]
    named = {call.args[1].value for call in calls if isinstance(call.args[1], ast.Constant)}
    named |= {"lag_ms", "ttft_slack_ms", "compressed", "not_streamed", "buffered", "no_finish", "repeated"}
    named |= {"rate_cap", "rate_client", "rate_connect", "rate_dropped", "input_longer", "input_shorter",
              "drift", "drift_latency"}
    for texts in TEXTS.values():
        assert {key[len("reason.") :] for key in texts if key.startswith("reason.")} - {"stage"} == named


# --- open loop --------------------------------------------------------------------------------------------------------

OPEN = {"stage": {"index": 0, "load": {"rps": 100.0, "cap": 8}, "total": 1000}}


def late_by(wait, share=1.0, **more):
    """A thousand good answers due every 10 ms; the first `share` of them went out `wait(number)` ms late."""
    lines = []
    for number in range(1000):
        late = wait(number) if number < share * 1000 else 0.0
        changes = {key: value(late) if callable(value) else value for key, value in more.items()} if late else {}
        start = number * 10.0 + late
        lines.append(good(number, scheduled_ms=number * 10.0, start_ms=start, **changes))
    return [OPEN, *lines, audit(), DONE]


def test_an_open_loop_that_kept_its_schedule_is_valid():
    assert verdict([OPEN, *plenty(), audit(), DONE], concurrency=[]) == ("VALID", [])


def test_a_wait_under_the_cap_is_the_caps_and_not_the_clients():
    lines = late_by(lambda _: 50.0, 0.03, queue_ms=lambda late: late, capped_ms=lambda late: late)
    assert verdict(lines, concurrency=[8]) == ("CAUTION", ["cap"])
    (reason,) = llmbench.summarize(collect(lines, concurrency=[8]))["verdict"]["reasons"]
    assert reason["values"] == {"share": 3.0, "longest": 50.0, "n": 30, "cap": 8}


def test_the_clients_own_part_of_a_wait_is_judged():
    lines = late_by(lambda _: 50.0, 0.03, queue_ms=lambda late: late, capped_ms=lambda late: late - 30.0)
    assert verdict(lines, concurrency=[8]) == ("INVALID", ["late", "cap"])


@pytest.mark.parametrize(
    "more,keys",
    [
        ({"queue_ms": lambda late: late, "capped_ms": lambda late: late}, ["cap", "rate_cap"]),
        ({"queue_ms": lambda late: late}, ["late", "rate_client"]),
        ({"queue_ms": 0.0, "connect_ms": lambda late: late}, ["rate_connect"]),
    ],
)
def test_a_rate_that_was_not_reached_says_why(more, keys):
    lines = late_by(lambda number: number * 0.5, **more)
    assert verdict(lines, concurrency=[])[1] == keys
    reasons = llmbench.summarize(collect(lines, concurrency=[]))["verdict"]["reasons"]
    values = reasons[-1]["values"]
    assert values["requested"] == 100.0 and 4.5 < values["missing"] < 5.0


def test_a_rate_that_was_missed_through_dropped_requests_says_so():
    lost = [record(5.0, status="dropped", start_ms=None, scheduled_ms=10.0 * number + 5.0) for number in range(400)]
    assert verdict([OPEN, *plenty(), *lost, audit(), DONE], concurrency=[])[1] == ["dropped", "rate_dropped"]


@pytest.mark.parametrize("wait", [lambda number: 0.15 * number, lambda number: 400.0 * (number >= 995)])
def test_a_rate_within_two_percent_of_the_schedules_is_reached(wait):
    lines = late_by(wait, queue_ms=0.0, connect_ms=1.0)
    assert verdict(lines, concurrency=[]) == ("VALID", [])


def test_a_few_late_requests_of_a_short_stage_are_no_missed_rate():
    answers = [good(number, start_ms=number * 10.0 + 8.0 * (number == 29)) for number in range(30)]
    lines = [OPEN, *answers, audit(), DONE]
    assert "rate_client" not in verdict(lines, concurrency=[])[1]


def test_a_reason_of_open_stages_names_their_rates():
    lines = []
    for stage, rate in enumerate((2.0, 4.5)):
        lines.append({"stage": {"index": stage, "load": {"rps": rate}}})
        lines += [good(number, stage=stage) for number in range(50)]
    judged = llmbench.summarize(collect([*lines, audit(), DONE], concurrency=[]))["verdict"]
    few = next(reason for reason in judged["reasons"] if reason["key"] == "few")
    assert few["loads"] == [{"rps": 2.0}, {"rps": 4.5}] and "streams" not in few
    assert llmbench.reason_said(TEXTS["en"], few).startswith("2 req/s, 4.5 req/s: 50 successful")
    assert llmbench.reason_said(TEXTS["zh"], few).startswith("2 次/秒、4.5 次/秒：")


# --- a search for the highest load ------------------------------------------------------------------------------------

GATE = ["ttft.p95<=500ms"]


def probe(stage, load, change=None, cpu=20.0):
    """The lines of one probe of a search."""
    plan = {"stage": {"index": stage, "load": {"concurrency": load}}}
    answers = [good(number, stage=stage, **(change or {})) for number in range(1000)]
    return [plan, *answers, audit(stage=stage, cpu_percent=cpu)]


SLOW = {"ttft_ms": 900.0, "finish_reason": None}


def search(*probes):
    lines = [line for lines in probes for line in lines]
    summary = llmbench.summarize(collect([*lines, DONE], find_max="concurrency", slo=GATE, concurrency=[1]))
    reasons = [(reason["key"], reason.get("streams")) for reason in summary["verdict"]["reasons"]]
    return summary["find_max"].get("load"), summary["verdict"]["state"], reasons


def test_what_is_odd_above_the_load_that_was_found_is_no_reason():
    assert search(probe(0, 1), probe(1, 2), probe(2, 4, SLOW), probe(3, 2)) == (2, "VALID", [])


def test_what_is_odd_at_the_load_that_was_found_is():
    odd = {"finish_reason": None}
    assert search(probe(0, 1), probe(1, 2, odd), probe(2, 4, SLOW)) == (2, "CAUTION", [("no_finish", [2])])
    assert search(probe(0, 1, SLOW)) == (None, "CAUTION", [("no_finish", None)])


def test_a_client_that_was_the_limit_above_the_load_that_was_found_bounds_the_search():
    assert search(probe(0, 1), probe(1, 2, cpu=97.0), probe(2, 1)) == (1, "CAUTION", [("cpu", [2])])


def test_a_client_that_was_the_limit_from_the_start_makes_the_run_invalid():
    assert search(probe(0, 1, cpu=97.0), probe(1, 2)) == (None, "INVALID", [("cpu", [1])])


# --- lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,share,key",
    [
        ({"in_tokens": 103}, 1.0, "input_longer"),
        ({"in_tokens": 97}, 1.0, "input_shorter"),
        ({"out_tokens": 20}, 0.011, "output_short"),
    ],
)
def test_lengths_that_are_not_what_was_asked_for(change, share, key):
    asked = {"in_tokens": 100, "in_tokens_target": 100, "out_tokens_target": 21}
    lines = [good(number, **{**asked, **(change if number < share * 1000 else {})}) for number in range(1000)]
    assert verdict([*lines, audit(), DONE]) == ("CAUTION", [key])


@pytest.mark.parametrize(
    ("change", "share"), [({"in_tokens": 102}, 1.0), ({"out_tokens": 20}, 0.01), ({"out_tokens": 22}, 1.0)]
)
def test_lengths_that_are_near_enough(change, share):
    asked = {"in_tokens": 100, "in_tokens_target": 100, "out_tokens_target": 21}
    lines = [good(number, **{**asked, **(change if number < share * 1000 else {})}) for number in range(1000)]
    assert verdict([*lines, audit(), DONE]) == ("VALID", [])


# --- drift ------------------------------------------------------------------------------------------------------------


def soaked(turn, n=2000, gap=60.0, **shifted):
    """Answers every `gap` ms whose times change at a moment, as a share of the run."""
    return [good(number, start_ms=number * gap, scheduled_ms=number * gap, **(shifted if number >= turn * n else {}))
            for number in range(n)]  # fmt: skip


def test_a_lasting_rise_says_when_and_by_how_much():
    lines = [*soaked(0.25, ttft_ms=150.0), audit(), DONE]
    assert verdict(lines) == ("CAUTION", ["drift"])
    (reason,) = llmbench.summarize(collect(lines))["verdict"]["reasons"]
    assert reason["values"] == {"share": 50.0, "before": 100.0, "after": 150.0, "metric": "ttft", "n": 2000,
                                "change": "rose", "at": "30 s"}  # fmt: skip
    assert llmbench.reason_said(TEXTS["en"], reason).startswith(
        "P95 TTFT rose 50.0 % from 30 s on and stayed there: 100 ms before, 150 ms after")
    assert llmbench.reason_said(TEXTS["zh"], reason).startswith("自 30 s 起 P95 TTFT上升 50.0%")


def test_latency_has_a_reason_of_its_own():
    assert verdict([*soaked(0.5, latency_ms=600.0), audit(), DONE]) == ("CAUTION", ["drift_latency"])
    assert verdict([*soaked(0.5, ttft_ms=150.0, latency_ms=1600.0), audit(), DONE])[1] == ["drift", "drift_latency"]


def test_a_stage_below_a_minute_does_not_drift():
    assert verdict([*soaked(0.5, gap=29.0, ttft_ms=150.0), audit(), DONE]) == ("VALID", [])
