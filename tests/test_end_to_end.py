"""The whole program, as a user starts it: figures against servers whose truth is known, files, exits and interrupts."""

from __future__ import annotations

import contextlib
import csv
import datetime
import json
import os
import re
import resource
import select
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from running import CHECKOUT, FILES, Run, expected_status, run, wait_until
from servers import (
    CHUNKED,
    HELLO,
    LAST_CHUNK,
    PATIENCE,
    Server,
    answer,
    chunk,
    closed_port,
    event,
    full_listener,
    measure,
    mock_server,
    says,
    streamed,
)  # fmt: skip

import llmbench
from conftest import ROOT, SUPPORTED, find_interpreters, interpreter

STOP = event(finish="stop")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


# The plan's test: 200 ms to the first token, 19 gaps of 50 ms.

PLAN = "ttft=200&itl=50&tokens=20"


def assert_plan(run, log):
    """The plan's figures. Where the mock itself was late (a busy host), its own record says what they should be."""
    summary, truth = run.summary, read_truth(log)
    assert summary["requests"]["success_rate"] == 1.0
    assert summary["tokens"]["out"] == 20 * summary["requests"]["total"]
    assert summary["ttft_ms"]["min"] >= 199.9, "earlier than the server sent it is impossible"
    wall = time.time() - llmbench.clock()  # from the clock of the truth to that of the records
    for name, moment, planned, margin in (("ttft_ms", "first", 200.0, 5.0), ("latency_ms", "end", 1150.0, 10.0)):
        true = statistics.median(
            1000.0 * (truth[record["request_id"]][moment] + wall - seconds_of(record["start_ts"]))
            for record in run.records
        )
        assert abs(summary[name]["p50"] - true) < 2.0
        if true - planned < margin - 2.0:
            assert abs(summary[name]["p50"] - planned) < margin


def read_truth(log):
    return {line["request_id"]: line for line in map(json.loads, log.read_text().splitlines())}


def seconds_of(text):
    """Seconds since 1970 of an ISO time."""
    form = "%Y-%m-%dT%H:%M:%S.%fZ"
    return datetime.datetime.strptime(text, form).replace(tzinfo=datetime.timezone.utc).timestamp()


@pytest.fixture(scope="module")
def plan_runs(tmp_path_factory):
    """The plan's test in its variants, all at once: name -> Run."""
    out = tmp_path_factory.mktemp("plan")
    variants = {
        "1 stream": ("mock:?" + PLAN, 1, 3),
        "1 stream, new connections": ("mock:?keepalive=1&" + PLAN, 1, 3),
        "100 streams": ("mock:?" + PLAN, 100, 200),
        "50 streams, new connections": ("mock:?keepalive=1&" + PLAN, 50, 100),
        "role frame at ttft": ("mock:?role_delay=200&" + PLAN, 5, 10),
    }
    runs = {
        name: Run(
            out / str(number),
            "--url",
            "%s&log=%s" % (url, out / ("%d.log" % number)),
            "--concurrency",
            str(streams),
            "--total-requests",
            str(total),
        )
        for number, (name, (url, streams, total)) in enumerate(variants.items())
    }
    return {name: run.wait() for name, run in runs.items()}


@pytest.mark.parametrize(
    "name",
    ["1 stream", "1 stream, new connections", "100 streams", "50 streams, new connections", "role frame at ttft"],
)
def test_plan(plan_runs, name):
    run = plan_runs[name]
    assert run.status == expected_status(run.summary), run.stderr
    assert run.stderr == ""
    assert run.files == FILES
    assert_plan(run, run.out.with_suffix(".log"))
    fresh = [record["reused"] for record in run.records].count(False)
    total = run.summary["requests"]["total"]
    assert fresh == (total if "new" in name else int(re.sub("[^0-9].*", "", name) or 5))
    assert all(record["connect_ms"] > 0 for record in run.records if not record["reused"])


def test_role_frame_sent_at_once_is_not_the_first_token(plan_runs):
    """The mock sends it at 0 ms by default: the first byte comes then, the TTFT does not move."""
    summary = plan_runs["1 stream"].summary
    assert summary["ttfb_ms"]["p50"] < 20.0


def test_reused_and_new_connections_agree(plan_runs):
    """The time of connecting is not in TTFT."""
    reused, new = (plan_runs["1 stream" + more].summary["ttft_ms"]["p50"] for more in ("", ", new connections"))
    assert abs(reused - new) < 5.0


@pytest.mark.parametrize("version", SUPPORTED)
def test_plan_on_every_python(pyz_runs, version):
    interpreter(version)
    run = pyz_runs[version]
    assert run.status == expected_status(run.summary), run.stderr
    assert run.stderr == ""
    assert run.files == FILES
    assert_plan(run, run.out.with_name(version + ".log"))


@pytest.fixture(scope="module")
def pyz_runs(pyz, tmp_path_factory):
    """A short run of the archive with every interpreter there is, all at once: "3.7" -> Run."""
    out = tmp_path_factory.mktemp("pythons")
    flags = ["--concurrency", "4", "--total-requests", "8"]
    found = {version: path for version, path in find_interpreters().items() if version in SUPPORTED}
    runs = {
        version: Run(
            out / version,
            "--url",
            "mock:?%s&log=%s" % (PLAN, out / (version + ".log")),
            *flags,
            program=[path, str(pyz)],
        )
        for version, path in found.items()
    }
    return {version: run.wait(90) for version, run in runs.items()}


@pytest.mark.parametrize("streams", [1, 100])
def test_every_request_against_the_mocks_own_truth(streams):
    """Start, first content and end of each record beside the moments that the server wrote down for it."""
    with mock_server("--ttft", "60", "--itl", "20", "--tokens", "10") as url:
        measured = measure(url, concurrency=streams, total_requests=2 * streams if streams > 1 else 5)
        with urllib.request.urlopen(url.replace("/v1", "/mock/truth")) as reply:
            truth = {line["request_id"]: line for line in map(json.loads, reply.read().decode().splitlines())}
    errors = []
    for record in measured.records:
        sent, start = truth[record["request_id"]], measured.runner.zero + record["start_ms"] / 1000.0
        assert record["status"] == "ok"
        assert start <= sent["received"] + 0.0005
        for moment, figure in (("first", "ttft_ms"), ("end", "latency_ms")):
            error = start + record[figure] / 1000.0 - sent[moment]
            errors.append(error)
            assert -0.0005 < error < 0.1
        assert record["out_tokens"] == sent["tokens"] == 10
    assert statistics.median(errors) < 0.002


# The smallest run, with the checkout and with the archive.


def test_smoke(programs, tmp_path):
    flags = ["--url", "mock:?ttft=20&itl=2&tokens=5", "--total-requests", "3", "--concurrency", "2", "--model", "tiny"]
    out = tmp_path / "out"
    good = run(out, *flags, program=programs)
    assert (good.status, good.stderr, good.files) == (0, "", FILES)
    assert good.summary["requests"] == {**good.summary["requests"], "total": 3, "success": 3, "failure": 0}
    assert [record["status"] for record in good.records] == ["ok"] * 3
    assert good.end["reason"] == "done"
    assert str(out / "report.html") in good.stdout

    again = run(out, *flags, program=programs)
    assert again.status == 2
    assert one_line(again.stderr) and "already holds" in again.stderr

    before = {name: (out / name).read_bytes() for name in FILES}
    for name in FILES - {"results.jsonl"}:
        (out / name).unlink()
    report = subprocess.run([*programs, "report", str(out)], capture_output=True)
    assert (report.returncode, report.stderr) == (0, b"")
    assert {name: (out / name).read_bytes() for name in FILES} == before, "the files are functions of results.jsonl"


def one_line(text):
    return re.fullmatch(r"llmbench: error: [^\n]+\n", text)


def test_no_request_succeeds(programs, tmp_path):
    dead = Run(
        tmp_path / "dead", "--url", "http://127.0.0.1:%d" % closed_port(), "--total-requests", "3", program=programs
    )
    failing = run(tmp_path / "fail", "--url", "mock:?fault=http500&ttft=1", "--total-requests", "3", program=programs)
    dead.wait()
    for result, status in ((dead, "connect_error"), (failing, "http_error")):
        assert result.status == 3, result.stderr
        assert result.stderr == ""
        assert result.files == FILES
        assert result.summary["requests"]["success"] == 0
        assert [error["status"] for error in result.summary["errors"]] == [status]


@pytest.mark.parametrize(
    "flags, hint",
    [
        ((), "--url"),
        (("--url", "localhost:8000"), "http://"),
        (("--url", "mock:?ttft=x"), "ttft"),
        (("--url", "mock:", "--concurrency", "0"), "concurrency"),
        (("--url", "mock:", "--tokken", "sk-secret-9"), "--token"),
        (("--url", "https://127.0.0.1:1", "--ca-cert", "/no/such.pem"), "--ca-cert"),
        (("--url", "mock:", "--workload-file", "/no/such.txt"), "workload"),
    ],
)
def test_bad_usage_is_one_line_and_leaves_nothing(flags, hint, tmp_path):
    bad = run(tmp_path / "out", *flags)
    assert bad.status == 2
    assert one_line(bad.stderr), bad.stderr
    assert hint in bad.stderr
    assert "sk-secret" not in bad.stderr
    assert bad.stdout == ""
    assert not bad.out.exists()


def test_endpoint_that_is_not_there_and_no_model(tmp_path):
    bad = run(tmp_path / "out", "--url", "http://127.0.0.1:%d" % closed_port(), "--model=")
    assert bad.status == 2
    assert one_line(bad.stderr) and not bad.out.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"{}",
        b'{"data": []}',
        b'{"data": [{"id": null}]}',
        b'{"data": 5}',
        b"[" * 100000,
    ],
)
def test_model_list_that_names_no_model(body, tmp_path):
    with Server(says(answer(200, body))) as server:
        bad = run(tmp_path / "out", "--url", server.url, "--model=")
        assert bad.status == 2, bad.stdout
        assert one_line(bad.stderr) and "--model" in bad.stderr
        assert not bad.out.exists()


def test_report_of_nothing(tmp_path):
    bad = subprocess.run([*CHECKOUT, "report", str(tmp_path)], capture_output=True)
    assert bad.returncode == 2
    assert one_line(bad.stderr.decode())


# Records are on disk when their requests end.


def test_each_record_is_on_disk_when_its_request_ends(tmp_path):
    """As the next request arrives, the record of the one before can be read."""
    found = []

    def behave(peer, request):
        lines = (tmp_path / "out" / "results.jsonl").read_text().split("\n")
        assert lines[-1] == ""
        found.append([json.loads(line).get("request_id") for line in lines[:-1]])
        peer.send(HELLO)

    with Server(behave) as server:
        result = run(tmp_path / "out", "--url", server.url, "--total-requests", "4")
        assert not server.complaints
    assert result.status == 0
    run_id = result.lines[0]["run"]["run_id"]
    assert found == [[None, None] + ["%s-0-%d" % (run_id, before) for before in range(number)] for number in range(4)]


# Interrupts.


class Halves:
    """A server that holds every answer after its first half until it is released; some are never finished."""

    def __init__(self, stuck=lambda request: False):
        self.stuck, self.released = stuck, threading.Event()

    def __call__(self, peer, request):
        peer.send(CHUNKED + chunk(event("half ")))
        if self.stuck(request):
            peer.hold()
        self.released.wait(PATIENCE)
        peer.send(chunk(event("done")) + chunk(STOP) + LAST_CHUNK)


def started(run, server, requests):
    """Waits until so many requests are in flight; gives the run."""
    wait_until(lambda: len(server.requests) >= requests, run.process)
    return run


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_lets_what_is_in_flight_finish_and_writes_everything(number, status, tmp_path):
    halves = Halves()
    with Server(halves) as server:
        run = started(
            Run(tmp_path / "out", "--url", server.url, "--concurrency", "3", "--total-requests", "50"), server, 3
        )
        run.process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            run.process.wait(0.3)  # it waits for what is in flight
        halves.released.set()
        run.wait()
        assert len(server.requests) == 3, "nothing new is started"
    assert run.status == status
    assert run.files == FILES
    assert [record["status"] for record in run.records] == ["ok"] * 3
    assert signal.Signals(number).name in run.end["reason"]
    assert "Traceback" not in run.stderr


def test_interrupt_waits_five_seconds_at_most_and_a_second_one_not_at_all(tmp_path):
    with Server(Halves(lambda _: True)) as server, Server(Halves(lambda _: True)) as other:
        flags = ["--concurrency", "3", "--total-requests", "50"]
        patient = started(Run(tmp_path / "patient", "--url", server.url, *flags), server, 3)
        hasty = started(Run(tmp_path / "hasty", "--url", other.url, *flags), other, 3)
        began = time.monotonic()
        patient.process.send_signal(signal.SIGINT)
        hasty.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)  # two signals at once may be one
        hasty.process.send_signal(signal.SIGINT)
        hasty.wait()
        assert time.monotonic() - began < 3.0
        patient.wait()
        assert 4.9 < time.monotonic() - began < 8.0
    assert (patient.status, hasty.status) == (130, 143)
    for result in (patient, hasty):
        assert result.files == FILES
        assert [record["status"] for record in result.records] == ["cancelled"] * 3
        assert result.end is not None
        assert result.summary["requests"]["cancelled"] == 3
        assert "Traceback" not in result.stderr


def test_ctrl_c_in_a_terminal_reaches_the_mock_too_and_it_goes_on(tmp_path):
    """A terminal signals the whole process group: what is in flight must still be answered."""
    result = Run(
        tmp_path / "out", "--url", "mock:?ttft=300&itl=20&tokens=20", "--concurrency", "2", "--total-requests", "50"
    )
    wait_until((tmp_path / "out" / "results.jsonl").exists, result.process)
    time.sleep(0.2)  # requests are in flight from here on; whenever it hits, the figures below must hold
    os.killpg(result.process.pid, signal.SIGINT)
    result.wait()
    assert result.status == 130
    assert {record["status"] for record in result.records} <= {"ok"}
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_second_interrupt_while_the_files_are_written_loses_none(number, status, tmp_path):
    """An impatient second Ctrl-C as the report is made: it still writes."""
    halves = Halves()
    with Server(halves) as server:
        run = started(Run(tmp_path / "out", "--url", server.url, "--total-requests", "5"), server, 1)
        run.process.send_signal(number)
        halves.released.set()
        wait_until(lambda: '{"end":' in (tmp_path / "out" / "results.jsonl").read_text())
        while run.process.poll() is None and run.files != FILES:
            run.process.send_signal(number)
            time.sleep(0.005)
        run.wait()
    assert run.status == status
    assert run.files == FILES
    assert "Traceback" not in run.stderr


@linux
def test_interrupts_while_connections_are_being_opened(tmp_path):
    with full_listener() as port:
        run = Run(
            tmp_path / "out", "--url", "http://127.0.0.1:%d" % port, "--concurrency", "2", "--connect-timeout", "20s"
        )
        wait_until((tmp_path / "out" / "results.jsonl").exists, run.process)
        with pytest.raises(subprocess.TimeoutExpired):
            run.process.wait(0.2)
        began = time.monotonic()
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        run.process.send_signal(signal.SIGINT)
        run.wait()
    assert time.monotonic() - began < 3.0
    assert run.status == 130
    assert run.files == FILES


def test_interrupt_before_the_run_began_is_quiet(tmp_path):
    with Server(lambda peer, _: peer.hold()) as server:
        run = started(Run(tmp_path / "out", "--url", server.url, "--model="), server, 1)  # asks for the models
        run.process.send_signal(signal.SIGINT)
        run.wait()
    assert run.status == 130
    assert "Traceback" not in run.stderr
    assert not run.out.exists()


def test_kill_loses_what_is_in_flight_at_most(tmp_path):
    halves = Halves(lambda request: request.number >= 8)
    halves.released.set()
    with Server(halves) as server:
        run = started(
            Run(tmp_path / "out", "--url", server.url, "--concurrency", "2", "--total-requests", "50"), server, 10
        )
        run.process.kill()
        run.wait()
    assert run.files == {"results.jsonl"}
    assert [record["status"] for record in run.records] == ["ok"] * 8
    assert run.end is None
    with open(tmp_path / "out" / "results.jsonl", "ab") as file:
        file.write(b'{"request_id":"torn","stat')  # what a crash in mid-write would leave
    report = subprocess.run([*CHECKOUT, "report", str(tmp_path / "out")], capture_output=True)
    assert report.returncode == 0
    assert b"Traceback" not in report.stderr
    assert run.files == FILES
    assert run.summary["requests"]["success"] == 8
    assert "cut off" in json.dumps(run.summary) + report.stdout.decode() + report.stderr.decode()


def test_report_of_a_run_that_was_killed_before_its_first_record(tmp_path):
    with Server(lambda peer, _: peer.hold()) as server:
        run = started(Run(tmp_path / "out", "--url", server.url, "--total-requests", "5"), server, 1)
        run.process.kill()
        run.wait()
    assert run.records == []
    report = subprocess.run([*CHECKOUT, "report", str(tmp_path / "out")], capture_output=True)
    assert b"Traceback" not in report.stderr, report.stderr
    assert report.returncode == 0
    assert run.files == FILES


@linux
def test_killed_run_leaves_no_mock_behind(tmp_path):
    run = Run(tmp_path / "out", "--url", "mock:?ttft=5000", "--total-requests", "5")
    wait_until(lambda: run.lines, run.process)
    url = run.lines[0]["run"]["url"]
    port = int(re.search(r":(\d+)/", url).group(1))
    run.process.kill()
    run.wait()
    wait_until(lambda: refuses(port))


def refuses(port):
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


# Output that can't be written.


def limit(kind, soft, hard=None):
    """A preexec function that sets a resource limit."""
    return lambda: resource.setrlimit(kind, (soft, soft if hard is None else hard))


@pytest.mark.parametrize("streams", [1, 4])
def test_results_that_cannot_be_written(streams, tmp_path):
    """A full disk, here a limit of the file size: it ends with 5 and a line, and what was written can be read."""
    result = run(tmp_path / "out", "--url", "mock:?ttft=1&itl=1&tokens=3", "--total-requests", "200",
                 "--concurrency", str(streams), preexec_fn=limit(resource.RLIMIT_FSIZE, 20000))  # fmt: skip
    assert result.status == 5
    assert one_line(result.stderr.split("\n", result.stderr.count("\n") - 1)[-1]), "the last line says what is wrong"
    assert "Traceback" not in result.stderr and "never retrieved" not in result.stderr
    lines = (tmp_path / "out" / "results.jsonl").read_text().split("\n")
    assert len([json.loads(line) for line in lines[:-1]]) > 5
    report = subprocess.run([*CHECKOUT, "report", str(tmp_path / "out")], capture_output=True)
    assert report.returncode == 0
    assert b"Traceback" not in report.stderr


def test_report_that_cannot_be_written(tmp_path):
    """The records fit, the report does not."""
    result = run(tmp_path / "out", "--url", "mock:?ttft=1&itl=1&tokens=3", "--total-requests", "3",
                 preexec_fn=limit(resource.RLIMIT_FSIZE, 60000))  # fmt: skip
    assert result.status == 5
    assert one_line(result.stderr), result.stderr
    assert len(result.records) == 3


@linux
def test_out_on_a_device_that_takes_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").symlink_to("/dev/full")
    result = run(tmp_path / "out", "--url", "mock:?ttft=1&itl=1&tokens=3", "--total-requests", "3")
    assert result.status in (2, 5)
    assert one_line(result.stderr), result.stderr


def test_terminal_that_is_gone(tmp_path):
    """`llmbench | head -0`, and standard output or error that were closed: no traceback, and the files are there."""
    flags = ["--url", "mock:?ttft=1&itl=1&tokens=3", "--total-requests", "2"]
    runs = []
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        runs.append(Run(tmp_path / ("pipe-" + name), *flags, **{name: writer}))
        os.close(writer)
    for name, number in (("stdout", 1), ("stderr", 2)):
        runs.append(
            Run(
                tmp_path / ("closed-" + name), *flags, **{name: None}, preexec_fn=lambda number=number: os.close(number)
            )
        )
    for result in runs:
        result.wait()
        assert "Traceback" not in result.stderr, result.stderr
        assert "Exception" not in result.stderr, result.stderr
        assert result.files == FILES
        assert result.status in (0, 141)


def test_exit_status_does_not_depend_on_who_reads(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    result = run(tmp_path / "out", "--url", "mock:?fault=http500&ttft=1", "--total-requests", "2", stdout=writer)
    os.close(writer)
    assert (result.status, result.stderr, result.files) == (3, "", FILES)


def test_progress_goes_on_where_nobody_reads_it(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    flags = ["--url", "mock:?ttft=10&itl=1&tokens=3", "--duration", "1s", "--progress", "bar"]
    result = run(tmp_path / "out", *flags, stderr=writer)
    os.close(writer)
    assert result.status == 0
    assert result.files == FILES


# Limits of this host.


def test_too_low_a_limit_of_open_files_is_one_line(tmp_path):
    flags = ["--url", "mock:?ttft=1&itl=1&tokens=2", "--concurrency", "300", "--total-requests", "300"]
    low = Run(tmp_path / "low", *flags, preexec_fn=limit(resource.RLIMIT_NOFILE, 200))
    raised = Run(tmp_path / "raised", *flags, preexec_fn=limit(resource.RLIMIT_NOFILE, 200, 1024))
    low.wait()
    assert low.status == 2
    assert one_line(low.stderr), low.stderr
    assert "ulimit -n" in low.stderr and "--concurrency" in low.stderr
    assert not low.out.exists()
    raised.wait()
    assert raised.status == expected_status(raised.summary), raised.stderr
    assert raised.summary["requests"]["success"] == 300


# An endpoint that means harm.


HARM = "</script><script>alert(1)</script>\x1b[2J\x1b]0;owned\x07\r=cmd|'/c calc'!A0 sk-Zq8xW3vT\u2028\u202e<!--"


def test_what_an_endpoint_says_can_do_no_harm(tmp_path):
    """Its words reach terminal, CSV and page as words, without control characters, markup or the token."""

    def behave(peer, request):
        said = [
            answer(500, {"error": {"message": HARM}}),
            streamed(event(HARM), event(finish=HARM), b"data: [DONE]\n\n"),
            streamed(b"data: " + json.dumps({"error": {"message": HARM, "code": HARM}}).encode() + b"\n\n"),
            answer(302, b"", "Location: javascript:alert(1)//sk-Zq8xW3vT"),
        ]
        peer.send(said[request.number % 4])

    with Server(behave) as server:
        result = run(tmp_path / "out", "--url", server.url, "--total-requests", "12", "--token", "sk-Zq8xW3vT")
    assert result.status == 0
    assert "sk-Zq8xW3vT" not in result.everything
    for text in (result.stdout, result.stderr):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\x9b]", text)
        assert "\u202e" not in text
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and '<!--"' not in page
    with open(tmp_path / "out" / "results.csv", encoding="utf-8-sig", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert any("alert(1)" in cell for cell in cells)
    assert not [cell for cell in cells if cell[:1] in ("=", "@", "\t", "\r")]


HANGING_RESOLVER = """
import socket, sys, time
sys.path.insert(0, %r)
import llmbench
socket.getaddrinfo = lambda *_, **__: time.sleep(4)
sys.exit(llmbench.main(sys.argv[1:]))
"""


def test_resolver_that_hangs_does_not_hold_up_the_exit(tmp_path):
    began = time.monotonic()
    program = [sys.executable, "-c", HANGING_RESOLVER % str(ROOT)]
    flags = [
        "--url",
        "http://slow.invalid",
        "--total-requests",
        "1",
        "--connect-timeout",
        "0.3",
        "--token",
        "sk-1234567",
    ]
    result = run(tmp_path / "out", *flags, program=program)
    assert result.status == 3
    assert result.stderr == ""
    assert "host name" in result.records[0]["err"]
    assert time.monotonic() - began < 3.5


@pytest.mark.parametrize(
    "name",
    [
        "../../%s/evil" % ("x" * 300),
        "evil\x1b[2J\x1b]0;owned\x07",
    ],
)
def test_name_of_a_model_is_no_path_and_no_command(name, tmp_path):
    """The model list names the directory and stands on the terminal: it must stay where we are, and be a word."""

    def behave(peer, request):
        peer.send(answer(200, {"data": [{"id": name}]}) if request.path.endswith("/models") else HELLO)

    with Server(behave) as server:
        words = [*CHECKOUT, "--url", server.url, "--total-requests", "1", "--progress", "none"]
        result = subprocess.run(words, cwd=str(tmp_path), capture_output=True)
    assert result.returncode in ((0,) if name.isprintable() else (0, 2)), result.stderr
    assert all(made.name.startswith("llmbench-") for made in tmp_path.iterdir())
    assert b"\x1b" not in result.stdout + result.stderr


def test_dialect_that_was_found_out_is_told(tmp_path):
    result = run(
        tmp_path / "out", "--url", "mock:?ttft=5&itl=1&tokens=3&refuse=stream_options", "--total-requests", "4"
    )
    assert result.status == 0
    assert "stream_options" in result.stdout
    assert any("stream_options" in note for note in result.end["dialect"])
    assert result.summary["requests"]["total"] == 4
    assert [record["phase"] for record in result.records].count("probe") == 1


def test_run_that_stopped_for_the_token_says_so(tmp_path):
    result = run(
        tmp_path / "out", "--url", "mock:?ttft=1&token=right", "--token", "wrong-token", "--total-requests", "500"
    )
    assert result.status == 3
    assert result.files == FILES
    assert len(result.records) < 10
    assert "auth" in result.end["reason"]
    assert "token" in result.stdout
    assert "wrong-token" not in result.everything


# A real server, and a thousand streams.


def real_server_script():
    """Where the script is that starts a real server; skips, saying why, when there is none."""
    given = os.environ.get("LLMBENCH_REAL_SERVER")
    script = Path(given) if given else ROOT.parent / "shared" / "real" / "start.sh"
    if not script.exists():
        pytest.skip("no script that starts a real server; LLMBENCH_REAL_SERVER=…/start.sh names one")
    return script


@pytest.fixture
def real_server():
    """The base URL of a real LLM server on loopback. Its first start installs it, which may take minutes."""
    script, port = real_server_script(), closed_port()
    with subprocess.Popen(["bash", str(script), str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          start_new_session=True) as process:  # fmt: skip
        try:
            seen = b""
            deadline = time.monotonic() + 600
            while b"URL" not in seen:
                ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
                more = os.read(process.stdout.fileno(), 4096) if ready else b""
                if not more:
                    pytest.skip("the real server could not be installed or started by %s" % script.name)
                seen += more
            url = "http://127.0.0.1:%d" % port
            wait_until(lambda: answers(url + "/health"))
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def tokens_predicted(url):
    with urllib.request.urlopen(url + "/metrics", timeout=10) as reply:
        return float(re.search(r"^llamacpp:tokens_predicted_total ([0-9.e+]+)", reply.read().decode(), re.M).group(1))


@pytest.mark.long
def test_real_server(real_server, tmp_path):
    before = tokens_predicted(real_server)
    flags = ["--url", real_server, "--concurrency", "4", "--total-requests", "40", "--max-tokens", "48", "--model="]
    result = run(tmp_path / "out", *flags)
    assert result.status == expected_status(result.summary), result.stderr
    assert [record["status"] for record in result.records] == ["ok"] * 40
    assert sum(record["out_tokens"] for record in result.records) == tokens_predicted(real_server) - before
    assert result.summary["tokens"]["out"] == tokens_predicted(real_server) - before
    assert result.summary["model"] == "tiny"


@pytest.mark.long
@linux
def test_a_thousand_streams_for_a_minute_leave_nothing_open_and_the_memory_flat():
    """Descriptors and memory of this very process, while it measures."""
    assert llmbench.raise_file_limit(3000) is None
    resident = []
    open_before = len(os.listdir("/proc/self/fd"))
    most = []

    def during(runner, loop):
        def look():
            if runner.progress.began and not runner.stopping:
                with open("/proc/self/statm") as file:
                    resident.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
                most.append(len(os.listdir("/proc/self/fd")))
            loop.call_later(1.0, look)

        def sink(line):
            kind = line["status"] if "request_id" in line else next(iter(line))
            counted[kind] = counted.get(kind, 0) + 1

        runner.sink = sink
        loop.call_later(1.0, look)

    counted = {}
    with mock_server("--ttft", "500", "--itl", "100", "--tokens", "20") as url:
        measured = measure(url, during=during, concurrency=1000, duration=60.0, timeout=60.0)
    assert counted.pop("audit", 0) == 1, "one audit line"
    counted.pop("stage", None)
    assert set(counted) == {"ok"} and counted["ok"] > 15000
    assert not measured.complaints
    assert 1000 < max(most) - open_before < 1000 + 64
    assert len(os.listdir("/proc/self/fd")) <= open_before + 1
    third = len(resident) // 3
    growth = statistics.median(resident[-third:]) - statistics.median(resident[5 : 5 + third])
    assert growth < 8 << 20, "memory grew by %.1f MB" % (growth / (1 << 20))
