"""Prompts and answers of a length, and traces: what is asked for, against what the endpoint counts."""

from __future__ import annotations

import json
import signal
import statistics

import pytest
from running import Run, expected_status, wait_until
from servers import Server, event, mock_server, streamed, usage

import llmbench

FAST = ["--ttft", "5", "--itl", "1", "--tokens", "3"]
MOONCAKE = [
    {"timestamp": 0, "input_length": 1100, "output_length": 12, "hash_ids": [0, 1, 2]},
    {"timestamp": 300, "input_length": 1500, "output_length": 5, "hash_ids": [0, 1, 3]},
    {"timestamp": 300, "input_length": 600, "output_length": 7, "hash_ids": [4, 5]},
    {"timestamp": 900, "input_length": 1536, "output_length": 3, "hash_ids": [0, 1, 2]},
]
BURST_GPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
5,GPT-4,100,0,100,API log
6,ChatGPT,1087,23,1110,Conversation log
6,ChatGPT,417,27,444,Conversation log
"""


def measured(run, stage=0):
    return [record for record in run.records if record["phase"] == "measure" and record["stage"] == stage]


def word_counter(peer, request):
    """An endpoint that counts words and punctuation, and a template of 20 tokens."""
    text = " ".join(message["content"] for message in request.fields["messages"])
    tokens = 20 + len(text.replace(".", " . ").replace(",", " , ").split())
    peer.send(streamed(event("ok"), event(finish="length"), usage(1, prompt=tokens), b"[DONE]"))


@pytest.mark.parametrize("processes", ["1", "2"])
def test_prompts_have_the_length_that_was_asked_for_by_the_endpoints_own_count(tmp_path, processes):
    with Server(word_counter) as server:
        run = Run(
            tmp_path / "a", "--url", server.url, "--input-tokens", "64,1000", "--concurrency", "4", "--total-requests",
            "40", "--processes", processes,
        ).wait()  # fmt: skip
    assert run.status == expected_status(run.summary), run.stderr
    for stage, target in ((0, 64), (1, 1000)):
        counts = [record["in_tokens"] for record in measured(run, stage)]
        assert statistics.mean(counts) == pytest.approx(target, rel=0.02)
        assert {record["in_tokens_target"] for record in measured(run, stage)} == {target}
    assert [stage["load"]["input_tokens"] for stage in run.summary["stages"]] == [64, 1000]
    probes = [record for record in run.records if record["phase"] == "probe"]
    assert 2 <= len(probes) <= 12
    assert len({json.dumps(request.fields["messages"]) for request in server.requests}) == len(server.requests)


def test_drawn_lengths_have_the_mean_and_the_spread_that_was_asked_for(tmp_path):
    with mock_server(*FAST) as url:
        run = Run(
            tmp_path / "a", "--url", url, "--input-tokens", "normal:400,50", "--concurrency", "8",
            "--total-requests", "200",
        ).wait()  # fmt: skip
    counts = [record["in_tokens"] for record in measured(run)]
    assert statistics.mean(counts) == pytest.approx(400, rel=0.03)
    assert 35 < statistics.stdev(counts) < 65
    for record in measured(run):
        assert record["in_tokens"] == pytest.approx(record["in_tokens_target"], rel=0.05)


def test_a_shared_prefix_is_the_same_for_all_and_comes_before_what_makes_them_differ(tmp_path):
    with Server(word_counter) as server:
        Run(
            tmp_path / "a", "--url", server.url, "--input-tokens", "50", "--prefix-tokens", "300",
            "--total-requests", "10",
        ).wait()  # fmt: skip
    bodies = [request.fields["messages"] for request in server.requests if "-length-" not in request.id]
    assert len(bodies) == 10
    assert {body[0]["role"] for body in bodies} == {"system"}
    assert len({body[0]["content"] for body in bodies}) == 1
    assert len({body[1]["content"] for body in bodies}) == 10


def test_an_endpoint_without_usage_is_told_in_one_line_and_leaves_nothing(tmp_path):
    with mock_server(*FAST, "--usage", "none") as url:
        run = Run(tmp_path / "a", "--url", url, "--input-tokens", "100").wait()
    assert run.status == 2
    assert run.stderr.count("\n") == 1 and "reports no usage" in run.stderr
    assert not (tmp_path / "a").exists()


def test_an_endpoint_that_refuses_the_probe_is_told_in_one_line(tmp_path):
    with mock_server(*FAST, "--fault", "http500:1") as url:
        run = Run(tmp_path / "a", "--url", url, "--input-tokens", "100").wait()
    assert run.status == 2
    assert run.stderr.count("\n") == 1 and "http_error" in run.stderr


def test_a_length_that_no_request_can_have_is_refused(tmp_path):
    with Server(word_counter) as server:
        run = Run(tmp_path / "a", "--url", server.url, "--input-tokens", "10").wait()
    assert run.status == 2
    assert "every request has at this endpoint" in run.stderr


def test_an_interrupt_while_the_endpoint_is_asked_is_said_and_leaves_nothing(tmp_path):
    def silent(peer, _):
        peer.hold()

    with Server(silent) as server:
        run = Run(tmp_path / "a", "--url", server.url, "--input-tokens", "100")
        wait_until(lambda: server.requests)
        run.process.send_signal(signal.SIGINT)
        run.wait(20)
    assert run.status == 130
    assert run.stderr == "llmbench: interrupted before anything was measured; no files are left\n"
    assert not (tmp_path / "a").exists()


def test_answers_of_an_exact_length(tmp_path):
    with mock_server(*FAST) as url:
        run = Run(tmp_path / "a", "--url", url, "--output-tokens", "33", "--total-requests", "10").wait()
    assert [(record["out_tokens"], record["out_tokens_target"]) for record in measured(run)] == [(33, 33)] * 10


def test_an_endpoint_that_takes_no_exact_length_answers_shorter_and_the_run_says_so(tmp_path):
    with mock_server(*FAST, "--refuse", "ignore_eos,min_tokens") as url:
        run = Run(tmp_path / "a", "--url", url, "--output-tokens", "33", "--total-requests", "10").wait()
    assert [(record["status"], record["out_tokens"]) for record in measured(run)] == [("ok", 3)] * 10
    assert "may come back shorter" in " ".join(run.end["dialect"])


def trace_file(tmp_path, rows=None):
    path = tmp_path / ("trace.jsonl" if rows else "trace.csv")
    path.write_text("\n".join(map(json.dumps, rows)) + "\n" if rows else BURST_GPT, encoding="utf-8")
    return str(path)


def test_a_trace_is_replayed_at_its_own_times_and_lengths(tmp_path):
    with mock_server(*FAST) as url:
        run = Run(tmp_path / "a", "--url", url, "--workload-file", trace_file(tmp_path, MOONCAKE)).wait()
    assert run.status == expected_status(run.summary), run.stderr
    records = sorted(measured(run), key=lambda record: record["request_id"])
    dues = [record["scheduled_ms"] - records[0]["scheduled_ms"] for record in records]
    assert dues == pytest.approx([0.0, 300.0, 300.0, 900.0], abs=0.01)
    assert [record["out_tokens"] for record in records] == [12, 5, 7, 3]
    for record, row in zip(records, MOONCAKE):
        assert record["in_tokens_target"] == row["input_length"]
        assert record["in_tokens"] == pytest.approx(row["input_length"], rel=0.03)
    assert run.summary["stages"][0]["load"]["trace"] == 1


def test_blocks_of_a_trace_that_have_one_name_have_one_text(tmp_path):
    with Server(word_counter) as server:
        Run(tmp_path / "a", "--url", server.url, "--workload-file", trace_file(tmp_path, MOONCAKE)).wait()
    texts = {
        int(request.id.rpartition("-")[2]): request.fields["messages"][-1]["content"]
        for request in server.requests if "-length-" not in request.id
    }  # fmt: skip
    common = len(texts[0]) * 2 // 3
    assert texts[0][:common] == texts[1][:common]
    assert texts[2][:200] != texts[0][:200]


def test_a_csv_trace_is_read_in_seconds_and_says_what_it_leaves_out(tmp_path):
    with mock_server(*FAST) as url:
        run = Run(tmp_path / "a", "--url", url, "--workload-file", trace_file(tmp_path), "--trace-speed", "4").wait()
    records = sorted(measured(run), key=lambda record: record["request_id"])
    dues = [record["scheduled_ms"] - records[0]["scheduled_ms"] for record in records]
    assert dues == pytest.approx([0.0, 250.0, 250.0], abs=0.01)
    assert "1 of 4 requests have a length of 0 and are left out" in run.stderr


def test_a_trace_gives_its_lengths_to_another_load(tmp_path):
    with mock_server(*FAST) as url:
        run = Run(
            tmp_path / "a", "--url", url, "--workload-file", trace_file(tmp_path, MOONCAKE), "--concurrency", "2",
            "--total-requests", "8",
        ).wait()  # fmt: skip
    assert run.summary["stages"][0]["load"] == {"concurrency": 2}
    assert sorted(record["out_tokens"] for record in measured(run)) == [3, 3, 5, 5, 7, 7, 12, 12]


@pytest.mark.parametrize("flags", [["--warmup", "2"], ["--ramp", "2s"], ["--order", "shuffled"]])
def test_what_would_take_requests_out_of_a_trace_is_refused(tmp_path, flags):
    run = Run(tmp_path / "a", "--url", "mock:", "--workload-file", trace_file(tmp_path, MOONCAKE), *flags).wait()
    assert run.status == 2
    assert "does not go with a trace's own times" in run.stderr


@pytest.mark.parametrize("flags", [["--arrival", "trace"], ["--trace-speed", "2"], ["--timestamp-unit", "s"]])
def test_what_only_a_trace_has_is_refused_without_one(tmp_path, flags):
    run = Run(tmp_path / "a", "--url", "mock:", *flags).wait()
    assert run.status == 2
    assert "needs a --workload-file that is a trace" in run.stderr
    assert not (tmp_path / "a").exists()


def test_a_bad_line_of_a_trace_is_named(tmp_path):
    rows = [*MOONCAKE, {"timestamp": 1000, "input_length": -3, "output_length": 1}]
    run = Run(tmp_path / "a", "--url", "mock:", "--workload-file", trace_file(tmp_path, rows)).wait()
    assert run.status == 2
    assert "trace.jsonl line 5" in run.stderr


def test_shuffled_prompts_come_once_each_time_round(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\n".join("prompt %d" % number for number in range(7)), "utf-8")
    with mock_server(*FAST) as url:
        run = Run(
            tmp_path / "a", "--url", url, "--workload-file", str(path), "--order", "shuffled", "--total-requests", "14"
        ).wait()
    order = [
        record["prompt_id"] for record in sorted(run.records, key=lambda one: int(one["request_id"].rpartition("-")[2]))
    ]
    names = ["line-%d" % number for number in range(1, 8)]
    assert sorted(order[:7]) == sorted(order[7:]) == names
    assert order[:7] != order[7:] and order[:7] != names
    assert llmbench.ORDERS[0] == "in-order"
