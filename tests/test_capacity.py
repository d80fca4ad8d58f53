"""What a run decides by its own figures: gates, the highest load, bounds; its plan, and its parts on several hosts."""

from __future__ import annotations

import datetime
import json
import signal
import subprocess
import time

import pytest
from running import CHECKOUT, FILES, Run, expected_status, wait_until
from servers import mock_server

import llmbench

FAST = ["--ttft", "20", "--itl", "2", "--tokens", "5"]

# Gates.


def test_a_gate_that_fails_is_exit_status_1(tmp_path):
    with mock_server(*FAST) as url:
        flags = ["--url", url, "--total-requests", "20", "--slo"]
        passing = Run(tmp_path / "a", *flags, "ttft.p95<=10s", "--slo", "success>=99%").wait()
        failing = Run(tmp_path / "b", *flags, "ttft.p95<=10s", "--slo", "ttft.p50<=1ms").wait()
    assert passing.status == expected_status(passing.summary, 0)
    assert [entry["passed"] for entry in passing.summary["slo"]] == [True, True]
    assert failing.status == expected_status(failing.summary, 1)
    assert [entry["passed"] for entry in failing.summary["slo"]] == [True, False]
    assert failing.files == FILES


def test_a_run_passes_if_each_stage_does(tmp_path):
    with mock_server(*FAST, "--slots", "2") as url:
        run = Run(
            tmp_path / "a", "--url", url, "--concurrency", "1,8", "--total-requests", "32", "--slo", "ttft.p50<=45ms"
        ).wait()
    assert [(entry["stage"], entry["passed"]) for entry in run.summary["slo"]] == [(0, True), (1, False)]
    assert run.status == expected_status(run.summary, 1)


def test_goodput_is_what_met_every_limit(tmp_path):
    with mock_server(*FAST, "--slots", "4") as url:
        run = Run(
            tmp_path / "a", "--url", url, "--concurrency", "8", "--total-requests", "64", "--slo", "ttft.p95<=40ms"
        ).wait()
    good = sum(record["ttft_ms"] <= 40.0 for record in run.records)
    assert 0 < good < 64
    throughput = run.summary["throughput"]
    assert throughput["goodput_share"] == pytest.approx(good / 64, abs=1e-8)
    assert throughput["goodput_rps"] == pytest.approx(good / run.summary["wall_time_ms"] * 1000.0, rel=1e-3)


# The highest load.


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_capacity_of_a_server_with_eight_slots_is_found(tmp_path, processes):
    """Service takes 60 ms, so a ninth stream waits up to 60 ms more: the limit lies halfway."""
    with mock_server("--ttft", "40", "--itl", "5", "--tokens", "5", "--slots", "8") as url:
        run = Run(
            tmp_path / "a", "--url", url, "--find-max", "concurrency", "--slo", "ttft.p90<=70ms",
            "--processes", processes, "--total-requests", "60",
        ).wait(120)  # fmt: skip
    found = run.summary["find_max"]
    loads = [stage["load"]["concurrency"] for stage in run.summary["stages"]]
    assert loads[:4] == [1, 2, 4, 8]
    assert 7 <= found["load"] <= 9, loads
    assert found["confirmed"] is True
    assert loads.count(found["load"]) >= 2
    assert run.status == expected_status(run.summary, 0)


def test_a_search_that_finds_nothing_is_exit_status_1(tmp_path):
    with mock_server(*FAST) as url:
        run = Run(tmp_path / "a", "--url", url, "--find-max", "concurrency", "--slo", "ttft.p50<=1ms",
                  "--total-requests", "10").wait()  # fmt: skip
    assert run.status == expected_status(run.summary, 1)
    assert run.summary["find_max"].get("load") is None


def test_a_rate_is_searched_in_an_open_loop(tmp_path):
    """One slot of 20 ms serves at most 50 requests a second."""
    with mock_server("--ttft", "18", "--itl", "1", "--tokens", "3", "--slots", "1") as url:
        run = Run(
            tmp_path / "a", "--url", url, "--find-max", "rps", "--rps", "10,80", "--arrival", "constant",
            "--slo", "ttft.p90<=60ms", "--duration", "2s",
        ).wait(120)  # fmt: skip
    found = run.summary["find_max"]
    assert found["load"] <= 55
    assert found["load"] >= 35 or found["failed"].get("client"), "unless this busy host was the limit before"
    assert [stage["load"]["rps"] for stage in run.summary["stages"]][:3] == [10, 20, 40]


def test_a_rate_that_a_cap_holds_back_is_not_found_to_pass(tmp_path):
    """Two at a time of 60 ms each are 33 requests a second at most, however fast each answer begins."""
    with mock_server("--ttft", "20", "--itl", "10", "--tokens", "5") as url:
        run = Run(
            tmp_path / "a", "--url", url, "--find-max", "rps", "--rps", "16,64", "--arrival", "constant",
            "--concurrency", "2", "--slo", "ttft.p95<=800ms", "--duration", "2s",
        ).wait(120)  # fmt: skip
    found = run.summary["find_max"]
    assert 16 <= found["load"] <= 40
    assert found["failed"].get("short") or found["failed"].get("client")


# Bounds.


@pytest.mark.parametrize("processes", ["1", "2"])
def test_too_many_failures_end_a_run_early_with_all_its_files(tmp_path, processes):
    with mock_server(*FAST, "--fault", "http500:0.5") as url:
        run = Run(
            tmp_path / "a", "--url", url, "--concurrency", "4", "--duration", "60s", "--max-errors", "9",
            "--processes", processes,
        ).wait()  # fmt: skip
    failed = run.summary["requests"]["failure"]
    assert 10 <= failed <= (14 if processes == "1" else 200)
    assert run.summary["end"]["reason"].startswith("max-errors: ")
    assert run.files == FILES


def test_a_share_of_failures_counts_from_twenty_requests_on(tmp_path):
    with mock_server(*FAST, "--fault", "http500:1") as url:
        run = Run(tmp_path / "a", "--url", url, "--total-requests", "100", "--max-errors", "30%").wait()
    assert run.summary["requests"]["total"] == 20
    assert "20 of 20 requests failed, more than 30%" in run.summary["end"]["reason"]


def test_tokens_that_nobody_counts_end_a_run_that_is_to_bound_them(tmp_path):
    with mock_server(*FAST, "--usage", "none") as url:
        run = Run(tmp_path / "a", "--url", url, "--total-requests", "500", "--max-total-tokens", "1000").wait()
    assert 3 <= run.summary["requests"]["total"] <= 5
    assert "reports no token counts" in run.summary["end"]["reason"]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_probe_that_was_cut_off_says_nothing(tmp_path, processes):
    """The tokens last for the probes of 1 and 2 streams and a part of the next."""
    with mock_server(*FAST) as url:
        for attempt in "abc":
            run = Run(
                tmp_path / attempt, "--url", url, "--find-max", "concurrency", "--concurrency", "1,8",
                "--slo", "ttft.p95<=9s", "--total-requests", "40", "--max-total-tokens", "3200",
                "--processes", processes,
            ).wait()  # fmt: skip
            if not any("limited_by" in stage["client"] for stage in run.summary["stages"]):
                break  # else this busy host ended the search before its tokens did
    found, loads = run.summary["find_max"], [stage["load"]["concurrency"] for stage in run.summary["stages"]]
    assert found["cut_off"] is True
    assert [probe["load"] for probe in found["probes"]] == loads[:-1]
    assert found["load"] == loads[-2] < loads[-1]
    assert "The search was cut off" in run.stdout and "the limit lies above" not in run.stdout


def test_a_run_ends_when_its_tokens_are_used_up(tmp_path):
    with mock_server(*FAST) as url:
        run = Run(tmp_path / "a", "--url", url, "--total-requests", "500", "--max-total-tokens", "1000").wait()
    tokens = run.summary["tokens"]
    assert 1000 <= tokens["in"] + tokens["out"] <= 1200
    assert run.summary["end"]["reason"].startswith("max-total-tokens: ")
    assert run.status == expected_status(run.summary, 0)


# A plan.


def test_a_dry_run_tells_all_and_sends_nothing(tmp_path):
    out = tmp_path / "out"
    command = [
        *CHECKOUT, "run", "--url", "http://127.0.0.1:9/v1", "--model", "m1", "--concurrency", "2,8", "--warmup", "3",
        "--total-requests", "40", "--timeout", "10s", "--max-tokens", "100", "--token", "sk-verysecret", "--dry-run",
        "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert not out.exists()
    words = " ".join(done.stdout.split())
    for text in (
        "http://127.0.0.1:9/v1/chat/completions", "streams: 2, requests: 40, warm-up: 3", "requests, at most 86",
        "in flight, at most 8", "output tokens, at most 8,600", "times out 4:40",
        '"max_tokens":100', "Authorization: ***",
    ):  # fmt: skip
        assert text in words
    assert "sk-verysecret" not in done.stdout


def test_a_plan_counts_the_requests_of_a_drawn_schedule_exactly(tmp_path):
    with mock_server(*FAST) as url:
        run = Run(tmp_path / "a", "--url", url, "--rps", "40", "--duration", "1.5s", "--seed", "5").wait()
    config = llmbench.Config(rps=[40.0], concurrency=[], duration=1.5, seed=5)
    (stage,) = llmbench.plan_stages(config)
    prompts = [llmbench.Prompt("p", [])]
    assert llmbench.bounds_of(config, [stage], prompts).requests == run.summary["requests"]["total"]


# Parts of a run.


def test_shards_begin_together_and_together_make_the_whole_run(tmp_path):
    with mock_server(*FAST) as url:
        moment = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=3)
        start = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
        flags = ["--url", url, "--concurrency", "6", "--total-requests", "42", "--warmup", "5", "--start-at", start]
        runs = [Run(tmp_path / str(k), *flags, "--shard", "%d/4" % k) for k in range(4)]
        for run in runs:
            run.wait()
    assert [run.status for run in runs] == [expected_status(run.summary) for run in runs]
    assert len({run.lines[0]["run"]["run_id"] for run in runs}) == 1
    numbers = [
        (int(record["request_id"].rpartition("-")[2]), k) for k, run in enumerate(runs) for record in run.records
    ]  # fmt: skip
    assert sorted(numbers) == [(number, number % 4) for number in range(47)]
    begun = llmbench.timestamp(start.replace("Z", ".000000Z"))
    for run in runs:
        first = min(llmbench.timestamp(record["start_ts"]) for record in run.records)
        assert begun <= first < begun + 1.0
        assert {record["shard"] for record in run.records} == {run.lines[0]["run"]["config"]["shard"]}
        for record in run.records:
            at = begun + record["start_ms"] / 1000.0
            assert llmbench.timestamp(record["start_ts"]) == pytest.approx(at, abs=0.05)
    merged = tmp_path / "merged"
    command = [*CHECKOUT, "merge", *(str(tmp_path / str(k)) for k in range(4)), "--out", str(merged)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    summary = json.loads((merged / "summary.json").read_text("utf-8"))
    assert done.returncode == expected_status(summary), done.stderr
    assert summary["requests"]["success"] == 42
    assert summary["ttft_ms"]["n"] == 42


def test_stages_of_shards_begin_at_moments_that_were_known_before(tmp_path):
    with mock_server(*FAST) as url:
        start = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3))
        flags = ["--url", url, "--rps", "20,40", "--duration", "1s", "--grace", "1s", "--start-at", start]
        runs = [Run(tmp_path / str(k), *flags, "--shard", "%d/2" % k) for k in range(2)]
        for run in runs:
            run.wait()
    for run in runs:
        for stage, begin in ((0, 0.0), (1, 2000.0)):
            dues = [record["scheduled_ms"] for record in run.records if record["stage"] == stage]
            assert begin <= min(dues) <= max(dues) < begin + 1000.0


def test_a_run_that_waits_for_its_start_can_be_interrupted(tmp_path):
    with mock_server(*FAST) as url:
        start = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3000))
        run = Run(tmp_path / "a", "--url", url, "--start-at", start)
        wait_until(lambda: '"stage"' in (tmp_path / "a" / "results.jsonl").read_text("utf-8"))
        run.process.send_signal(signal.SIGINT)
        run.wait(20)
    assert run.status == 130
