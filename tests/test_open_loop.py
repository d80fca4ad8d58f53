"""The open loop: requests go out when they are due, whatever the endpoint does; what waits or is dropped is told."""

from __future__ import annotations

import asyncio
import json
import statistics
import urllib.request

import pytest
from servers import closed_port, measure, mock_server

import llmbench


def truth_of(url):
    """What the mock wrote down, by request id."""
    with urllib.request.urlopen(url.replace("/v1", "/mock/truth")) as reply:
        return {line["request_id"]: line for line in map(json.loads, reply.read().decode().splitlines())}


def open_loop(url, rate, **given):
    """A run at a rate, without a cap unless one is given."""
    return measure(url, rps=[rate], concurrency=given.pop("cap", []), **given)


def dues(measured):
    """When the requests were due, in s from the run's zero, in the order of their numbers."""
    ordered = sorted(measured.records, key=lambda record: int(record["request_id"].rpartition("-")[2]))
    return [record["scheduled_ms"] / 1000.0 for record in ordered]


def test_requests_go_out_when_they_are_due_and_not_when_another_ended():
    """25 a second for 4 s at an endpoint that takes 1 s for each: a closed loop of any size would adapt."""
    with mock_server("--ttft", "900", "--itl", "10", "--tokens", "10") as url:
        measured = open_loop(url, 25.0, arrival="constant", duration=4.0)
        truth = truth_of(url)
    assert measured.statuses == ["ok"] * 100
    assert not measured.complaints
    received = sorted(line["received"] for line in truth.values())
    gaps = [later - earlier for earlier, later in zip(received, received[1:])]
    assert statistics.mean(gaps) == pytest.approx(0.04, rel=0.02)
    assert statistics.median(gaps) == pytest.approx(0.04, abs=0.004)
    assert sorted(record["queue_ms"] for record in measured.records)[89] < 100, "one stall of the machine apart"
    assert all("capped_ms" not in record for record in measured.records)


def test_the_times_at_which_requests_are_due_are_those_of_the_schedule():
    with mock_server("--ttft", "5", "--itl", "1", "--tokens", "2") as url:
        measured = open_loop(url, 60.0, total_requests=60, seed=7)
    schedule = llmbench.due_times("poisson", 60.0, "arrival 7 0 measure")
    expected = [next(schedule) for _ in range(60)]
    began = dues(measured)[0] - expected[0]
    assert [due - began for due in dues(measured)] == pytest.approx(expected, abs=1e-6)


def test_a_stall_shows_from_scheduled_and_a_cap_of_one_hides_it_from_start():
    """The server stands still once for 1 s. Under a cap of 1, TTFT from start sees that once; its users all saw it."""
    with mock_server("--ttft", "2", "--itl", "1", "--tokens", "2", "--stall-once", "0.5,1.0") as url:
        measured = open_loop(url, 50.0, cap=[1], arrival="constant", duration=3.0)
    ok = [record for record in measured.records if record["status"] == "ok"]
    assert len(ok) > 130
    from_start = sorted(record["ttft_ms"] for record in ok)
    from_due = sorted(record["ttft_from_scheduled_ms"] for record in ok)
    assert from_start[int(len(ok) * 0.98)] < 200 < 800 < from_start[-1]
    assert from_due[int(len(ok) * 0.98)] > 700
    waited = [record for record in ok if record.get("capped_ms", 0) > 100]
    assert len(waited) >= 30, "those that were due during the stall waited for the slot"
    for record in ok:
        assert record.get("capped_ms", 0.0) <= record["queue_ms"] + 0.001
        wait = record["start_ms"] - record["scheduled_ms"]
        assert record["ttft_from_scheduled_ms"] == pytest.approx(record["ttft_ms"] + wait, abs=0.01)


def test_under_a_cap_never_more_are_in_flight_and_none_is_lost():
    with mock_server("--ttft", "60", "--itl", "1", "--tokens", "2") as url:
        measured = open_loop(url, 200.0, cap=[5], total_requests=80)
    assert measured.statuses == ["ok"] * 80
    changes = []
    for record in measured.records:
        changes += [(record["start_ms"], 1), (record["start_ms"] + record["latency_ms"], -1)]
    flying = most = 0
    for _, change in sorted(changes):
        flying += change
        most = max(most, flying)
    assert most == 5
    waits = [record for record in measured.records if "capped_ms" in record]
    assert len(waits) >= 60
    own = [record["queue_ms"] - record.get("capped_ms", 0.0) for record in measured.records]
    assert min(own) > -0.01
    assert statistics.median(own) < 20


def test_what_is_still_queued_when_the_duration_is_over_is_dropped():
    with mock_server("--ttft", "400", "--itl", "1", "--tokens", "2") as url:
        measured = open_loop(url, 40.0, cap=[2], arrival="constant", duration=1.0)
    dropped = [record for record in measured.records if record["status"] == "dropped"]
    assert len(measured.records) == 40
    assert len(dropped) == 40 - measured.statuses.count("ok")
    assert measured.statuses.count("ok") in (4, 5, 6)
    for record in dropped:
        assert "start_ms" not in record and "scheduled_ms" in record
        assert record["err"] == "due, but never sent: the duration was over"
    numbers = sorted(int(record["request_id"].rpartition("-")[2]) for record in measured.records)
    assert numbers == list(range(40))


def test_a_stopped_run_drops_what_was_due_and_begins_nothing_new():
    def during(runner, loop):
        loop.call_later(0.5, runner.stop, "interrupted by SIGINT", 5.0)

    with mock_server("--ttft", "300", "--itl", "1", "--tokens", "2") as url:
        measured = measure(
            url, during, rps=[40.0], concurrency=[2], arrival="constant", total_requests=1000
        )
    assert measured.seconds < 5
    assert set(measured.statuses) == {"ok", "dropped"}
    assert 10 <= len(measured.records) <= 25
    errors = {record.get("err") for record in measured.records if record["status"] == "dropped"}
    assert errors == {"due, but never sent: the run was stopped"}


def test_a_long_wait_for_the_next_request_ends_with_the_run():
    def during(runner, loop):
        loop.call_later(0.3, runner.stop, "interrupted by SIGINT", 5.0)

    with mock_server("--ttft", "1", "--itl", "1", "--tokens", "2") as url:
        measured = measure(url, during, rps=[0.001], concurrency=[], arrival="poisson", total_requests=5)
    assert measured.seconds < 5
    assert measured.records == []


def test_a_warmup_has_a_schedule_of_its_own_and_the_measured_numbers_follow():
    with mock_server("--ttft", "5", "--itl", "1", "--tokens", "2") as url:
        measured = open_loop(url, 50.0, warmup=10, total_requests=15)
    numbers = {
        phase: sorted(int(record["request_id"].rpartition("-")[2]) for record in measured.of_phase(phase))
        for phase in ("warmup", "measure")
    }
    assert numbers == {"warmup": list(range(10)), "measure": list(range(10, 25))}
    last = max(record["start_ms"] + record["latency_ms"] for record in measured.of_phase("warmup"))
    assert min(record["scheduled_ms"] for record in measured.of_phase("measure")) >= last


def test_connections_are_open_before_their_requests_are_due():
    with mock_server("--ttft", "100", "--itl", "1", "--tokens", "2") as url:
        measured = open_loop(url, 30.0, total_requests=60)
    in_the_way = [
        record for record in measured.records
        if record["start_ms"] - record["scheduled_ms"] - record["queue_ms"] > 0.001
    ]  # fmt: skip
    assert len(in_the_way) <= 6, "a connection was opened while its request was due"
    assert any(record["reused"] for record in measured.records)


def test_a_dead_endpoint_gives_a_record_for_each_request_that_was_due():
    measured = open_loop("http://127.0.0.1:%d" % closed_port(), 50.0, total_requests=25, arrival="constant")
    assert measured.statuses == ["connect_error"] * 25
    assert measured.seconds < 10
    assert not measured.complaints


def test_an_endpoint_that_closes_each_connection_is_no_hindrance():
    with mock_server("--ttft", "20", "--itl", "1", "--tokens", "2", "--keepalive", "1") as url:
        measured = open_loop(url, 60.0, total_requests=60)
    assert measured.statuses == ["ok"] * 60
    assert not any(record.get("retried") for record in measured.records)


def test_a_full_disk_ends_an_open_loop_at_once():
    """The sink fails at the fifth record of a run that would take a minute."""
    lines = []

    def sink(line):
        if len(lines) == 5:
            raise llmbench.WriteError("no space left")
        lines.append(line)

    from servers import event_loop, prepare, settings

    with mock_server("--ttft", "5", "--itl", "1", "--tokens", "2") as url, event_loop() as (loop, poll):
        config = settings(url, rps=[20.0], concurrency=[], duration=60.0)
        runner = prepare(config, poll, sink)
        with pytest.raises(llmbench.WriteError, match="no space left"):
            loop.run_until_complete(asyncio.wait_for(runner.run(llmbench.plan_stages(config)), 20))


def test_the_audit_counts_what_became_due_and_what_was_dropped():
    with mock_server("--ttft", "400", "--itl", "1", "--tokens", "2") as url:
        measured = open_loop(url, 40.0, cap=[2], arrival="constant", duration=1.0)
    (audit,) = measured.audits
    assert audit["due"] == 40
    assert audit["dropped"] == measured.statuses.count("dropped")


def test_a_ramp_starts_the_streams_of_a_closed_loop_evenly():
    with mock_server("--ttft", "20", "--itl", "1", "--tokens", "2") as url:
        measured = measure(url, concurrency=[10], ramp=1.0, duration=1.5)
    firsts = sorted(record["scheduled_ms"] for record in measured.records if not record["reused"])
    assert len(firsts) == 10
    gaps = [later - earlier for earlier, later in zip(firsts, firsts[1:])]
    assert gaps == pytest.approx([100.0] * 9, abs=0.1)
    assert statistics.median(record["queue_ms"] for record in measured.records) < 20, "one stall of the machine apart"
