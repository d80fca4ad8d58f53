"""Worker processes: the parts of a run add up, are kept in step, and end together however one of them ends."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from servers import CHUNKED, HELLO, LAST_CHUNK, PATIENCE, Server, answer, chunk, event, full_listener, usage
from test_end_to_end import CHECKOUT, FILES, Halves, Run, limit, linux, one_line, run, started, wait_until

import llmbench
from conftest import ROOT, interpreter

REST = chunk(event(finish="stop")) + chunk(usage(2)) + LAST_CHUNK


# Who runs: the workers of a run, from /proc.


def status_of(pid):
    """(parent, state) of a process; None when there is none, or a dead one that nobody has waited for."""
    with contextlib.suppress(OSError):
        with open("/proc/%d/stat" % pid, encoding="utf-8", errors="replace") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
        return None if state == "Z" else (int(parent), state)
    return None


def workers(run, count=2):
    """The process ids of a run's workers, in their order: against a Server, these are all its children."""

    def children():
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in sorted(pids) if (status_of(pid) or (0,))[0] == run.process.pid]

    return wait_until(lambda: len(children()) == count and children(), run.process)


@contextlib.contextmanager
def gone(pids):
    """At the end of the block these processes must end by themselves, soon; they are killed if they don't."""
    try:
        yield
        deadline = time.monotonic() + 3.0
        while any(map(status_of, pids)) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert not any(map(status_of, pids)), "a worker outlives its run"
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# Parts add up, as the server sees it.


class Steps:
    """Answers, and writes down when; the first requests of each phase wait until all its streams have sent one."""

    def __init__(self, streams, total, warmup=0):
        self.streams, self.total, self.warmup = streams, total, warmup
        self.log = {}  # (stage, measured) -> [(received, answered)]
        self.gates = {}
        self.lock = threading.Lock()

    def __call__(self, peer, request):
        stage, index = map(int, request.id.split("-")[1:])
        phase = (stage, index >= self.warmup)
        with self.lock:
            if phase not in self.gates:
                most = self.total if phase[1] else self.warmup
                self.gates[phase] = threading.Barrier(min(self.streams[stage], most or self.streams[stage]))
            seen = self.log.setdefault(phase, [])
            number = len(seen)
            seen.append(None)
        peer.send(CHUNKED + chunk(event("half ")))
        if number < self.gates[phase].parties:
            try:
                self.gates[phase].wait(PATIENCE)
            except threading.BrokenBarrierError:
                raise AssertionError("the streams were never all in flight") from None
        peer.send(chunk(event("done")))
        seen[number] = (request.at, llmbench.clock())
        peer.send(REST)

    def most_in_flight(self, phase):
        """By the server's clock: from a request's arrival to just before its end is sent."""
        moments = [(at, 1) for at, _ in self.log[phase]] + [(end, -1) for _, end in self.log[phase]]
        level = most = 0
        for _, step in sorted(moments):
            level += step
            most = max(most, level)
        return most


def run_in_step(out, *flags, streams, processes, total=None, warmup=0, **options):
    """A run of several processes against `Steps`, with everything checked that holds of any."""
    steps = Steps(streams, total, warmup)
    words = ["--processes", str(processes), "--concurrency", ",".join(map(str, streams)), "--warmup", str(warmup)]
    words += ["--total-requests", str(total)] if total else []
    with Server(steps) as server:
        result = run(out, "--url", server.url, *words, *flags, **options)
        assert result.status in (0, 4), result.stderr  # 4: this host is busy with something else
        assert result.stderr == ""
        assert not server.complaints
        assert sorted(server.ids) == sorted(record["request_id"] for record in result.records)
    assert result.files == FILES
    assert result.end["reason"] == "done"
    assert {record["status"] for record in result.records} == {"ok"}
    assert result.summary["client"]["processes"] == processes
    for stage, count in enumerate(streams):
        assert_stage(result, steps, stage, count, processes)
    assert result.summary["requests"]["total"] == len(measured(result))
    return result


def measured(result, stage=None):
    records = [record for record in result.records if record["phase"] == "measure"]
    return [record for record in records if stage in (None, record["stage"])]


def index_of(record):
    return int(record["request_id"].split("-")[2])


def assert_stage(result, steps, stage, streams, processes):
    """Numbers, streams, order of the phases and audits of one stage."""
    records, warmup, total = measured(result, stage), steps.warmup, steps.total
    indices = sorted(map(index_of, records))
    assert len(indices) == len(set(indices))
    if total is not None:
        assert indices == list(range(warmup, warmup + total))
        assert steps.most_in_flight((stage, True)) == min(streams, total)
    else:
        assert steps.most_in_flight((stage, True)) == streams
    if warmup:
        warm = [line for line in result.records if line["stage"] == stage and line["phase"] == "warmup"]
        assert sorted(map(index_of, warm)) == list(range(warmup))
        assert max(end for _, end in steps.log[stage, False]) < min(at for at, _ in steps.log[stage, True])
        assert max(line["start_ms"] + line["latency_ms"] for line in warm) < min(line["start_ms"] for line in records)
    parts = min(processes, streams)
    audits = [line["audit"] for line in result.lines if line.get("audit", {}).get("stage") == stage]
    assert sorted(audit["part"] for audit in audits) == list(range(parts)), "one audit for each part that takes part"
    for audit in audits:
        assert audit["started"] == sum(index % parts == audit["part"] for index in indices)


def spreads(result, key):
    """For each stage: how far apart its parts' first requests are, in ms."""
    found = []
    for stage in {record["stage"] for record in measured(result)}:
        first = {}
        for record in measured(result, stage):
            part = index_of(record) % result.summary["client"]["processes"]
            first[part] = min(first.get(part, record[key]), record[key])
        found.append(max(first.values()) - min(first.values()))
    return found


@pytest.mark.parametrize("processes", [2, 3])
def test_parts_add_up(programs, processes, tmp_path):
    """23 requests and 7 of warm-up on 5 streams: nothing divides by anything."""
    run_in_step(tmp_path / "out", streams=[5], processes=processes, total=23, warmup=7, program=programs)


@pytest.mark.parametrize("version, processes", [("3.7", 2), ("3.13", 3)])
def test_oldest_and_newest_python(pyz, version, processes, tmp_path):
    program = [interpreter(version), str(pyz)]
    run_in_step(tmp_path / "out", streams=[5], processes=processes, total=11, warmup=4, program=program)


def test_stages_with_fewer_streams_than_processes(tmp_path):
    """The second process sits out the first stage, and is back in the next."""
    result = run_in_step(tmp_path / "out", streams=[1, 4, 1], processes=2, total=8, warmup=2)
    assert [stage["client"]["processes"] for stage in result.summary["stages"]] == [1, 2, 1]
    assert [stage["requests"]["success"] for stage in result.summary["stages"]] == [8, 8, 8]


def test_duration(tmp_path):
    result = run_in_step(tmp_path / "out", "--duration", "300ms", streams=[5], processes=3)
    starts = [record["start_ms"] for record in measured(result)]
    assert len(starts) > 15
    assert max(starts) - min(starts) < 400.0


def test_fewer_requests_than_processes(tmp_path):
    result = run_in_step(tmp_path / "out", streams=[6], processes=3, total=2)
    assert sorted(line["audit"]["started"] for line in result.lines if "audit" in line) == [0, 1, 1]


def test_stages_start_together(tmp_path):
    result = run_in_step(tmp_path / "out", streams=[2, 3, 4, 5], processes=2, total=6)
    assert max(spreads(result, "scheduled_ms")) < 0.002, "one moment, told to all"
    assert statistics.median(spreads(result, "start_ms")) < 5.0
    begun = [min(record["scheduled_ms"] for record in measured(result, stage)) for stage in range(4)]
    assert begun == sorted(begun) and begun[0] > 0.0


def test_no_more_connections_than_requests(tmp_path):
    with Server(lambda peer, _: peer.send(HELLO)) as server:
        flags = ["--concurrency", "6", "--total-requests", "2", "--processes", "2"]
        assert run(tmp_path / "out", "--url", server.url, *flags).status in (0, 4)
        assert server.connections == 2


def test_every_request_has_an_id_of_its_own_also_a_probe(tmp_path):
    flags = ["--url", "mock:?ttft=1&itl=1&tokens=3&refuse=stream_options", "--total-requests", "8"]
    result = run(tmp_path / "out", *flags, "--concurrency", "4", "--processes", "2")
    ids = [record["request_id"] for record in result.records]
    assert len(result.end["dialect"]) == 1, "both found out the same: it is said once"
    assert len(measured(result)) == 8
    assert len(ids) == len(set(ids))


# Other ways to start a process.

SPAWNING = """
import multiprocessing

get_context = multiprocessing.get_context
multiprocessing.get_context = lambda method=None: get_context("spawn")
"""


@pytest.fixture
def spawning(tmp_path, monkeypatch):
    """What is started from here on starts its workers as macOS does, by `spawn`, the program as it stands."""
    (tmp_path / "sitecustomize.py").write_text(SPAWNING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("spawning")
def test_spawned_workers(programs, tmp_path):
    run_in_step(tmp_path / "out", streams=[3], processes=2, total=7, warmup=2, program=programs)


@pytest.mark.usefixtures("spawning")
@pytest.mark.parametrize("version", ["3.7", "3.13"])
def test_spawned_workers_of_the_oldest_and_newest_python(pyz, version, tmp_path):
    run_in_step(tmp_path / "out", streams=[2], processes=2, total=5, program=[interpreter(version), str(pyz)])


@pytest.mark.usefixtures("spawning")
@linux
def test_spawning_is_what_the_tests_above_test(tmp_path):
    with Server(Halves()) as server:
        flags = ["--url", server.url, "--concurrency", "2", "--total-requests", "2", "--processes", "2"]
        result = started(Run(tmp_path / "out", *flags), server, 2)
        pids = workers(result, 3)  # and the tracker of resources that spawning needs
        commands = [Path("/proc/%d/cmdline" % pid).read_bytes() for pid in pids]
        server.behave.released.set()
        result.wait()
    assert sum(b"--multiprocessing-fork" in command for command in commands) == 2


@linux
def test_ctrl_c_as_a_spawned_worker_starts(tmp_path, monkeypatch):
    """It is the watching process's to handle, from the first moment on."""
    (tmp_path / "sitecustomize.py").write_text(SPAWNING + INTERRUPTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Server(lambda peer, _: peer.send(HELLO)) as server:
        flags = ["--url", server.url, "--concurrency", "2", "--total-requests", "6", "--processes", "2"]
        result = run(tmp_path / "out", *flags)
    assert result.stderr == ""
    assert result.status in (0, 4)
    assert result.end["reason"] == "done"
    assert len(result.records) == 6


INTERRUPTED = """
import os, signal

with open("/proc/self/cmdline") as file:
    if "--multiprocessing-fork" in file.read():
        os.kill(os.getpid(), signal.SIGINT)
"""


WITHOUT_SHM = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o ro none /dev/shm && exec "$@"', "sh"]


@linux
def test_host_without_shared_memory(tmp_path):
    """/dev/shm, which queues and pools need, takes nothing."""
    try:
        refused = subprocess.run([*WITHOUT_SHM, "sh", "-c", "! touch /dev/shm/llmbench"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if refused.returncode != 0:
        pytest.skip("not allowed to mount over /dev/shm")
    run_in_step(tmp_path / "out", streams=[2], processes=2, total=5, program=[*WITHOUT_SHM, *CHECKOUT])


def test_start_method_of_each_platform(monkeypatch):
    for platform, method in (("linux", "fork"), ("darwin", "spawn"), ("freebsd14", "spawn")):
        monkeypatch.setattr(sys, "platform", platform)
        assert llmbench.start_method() == method


# One worker ends: the run does, and says why.


def assert_told(result, reason):
    """The end's reason stands in the file, the verdict, the terminal and the report."""
    assert result.files == FILES
    assert reason in result.end["reason"]
    assert result.summary["verdict"]["state"] in ("CAUTION", "INVALID")
    assert reason in json.dumps(result.summary["verdict"]["reasons"])
    assert reason in result.stdout
    assert reason in (result.out / "report.html").read_text(encoding="utf-8")


def split_run(out, server, *flags, **options):
    """A run of two processes with two streams each, all of them in flight."""
    words = ["--url", server.url, "--concurrency", "4", "--total-requests", "50", "--processes", "2"]
    return started(Run(out, *words, *flags, **options), server, 4)


@linux
def test_killed_worker_ends_the_run(tmp_path):
    halves = Halves()
    with Server(halves) as server:
        result = split_run(tmp_path / "out", server)
        pids = workers(result)
        with gone(pids):
            os.kill(pids[1], signal.SIGKILL)
            wait_until(lambda: status_of(pids[1]) is None)
            with pytest.raises(subprocess.TimeoutExpired):
                result.process.wait(0.2)  # what is in flight in the other is waited for
            halves.released.set()
            result.wait()
        assert len(server.requests) == 4, "nothing new is started"
    assert sorted(index_of(record) % 2 for record in result.records) == [0, 0]
    assert {record["status"] for record in result.records} == {"ok"}
    assert_told(result, "worker process 1 was killed by signal 9")
    assert result.stderr == ""


@linux
def test_exit_status_of_a_run_that_lost_a_worker(tmp_path):
    """The client failed, not the endpoint: INVALID, and 4."""
    halves = Halves()
    with Server(halves) as server:
        result = split_run(tmp_path / "out", server)
        os.kill(workers(result)[0], signal.SIGKILL)
        halves.released.set()
        result.wait()
    assert result.summary["verdict"]["state"] == "INVALID"
    assert result.status == 4


@linux
def test_killed_worker_while_the_other_waits_for_it(tmp_path):
    """One part's warm-up is over and it waits for the other, which dies."""

    def behave(peer, request):
        if request.id.endswith(("-1", "-3")):
            peer.hold()
        peer.send(HELLO)

    with Server(behave) as server:
        result = split_run(tmp_path / "out", server, "--warmup", "4")
        pids = workers(result)
        wait_until(lambda: len(result.records) == 2)
        os.kill(pids[1], signal.SIGKILL)
        with gone(pids):
            result.wait(4.0)
    assert result.status == 3, "nothing was measured"
    assert [record["phase"] for record in result.records] == ["warmup"] * 2
    assert "worker process 1 was killed by signal 9" in result.end["reason"]
    assert result.files == FILES


@linux
def test_all_workers_killed(tmp_path):
    with Server(Halves()) as server:
        result = split_run(tmp_path / "out", server)
        for pid in workers(result):
            os.kill(pid, signal.SIGKILL)
        result.wait(5.0)
    assert result.status == 3
    assert result.stderr == ""
    assert result.files == FILES
    assert re.fullmatch("worker process [01] was killed by signal 9", result.end["reason"])


PLANTED = """
import sys
sys.path.insert(0, %r)
import llmbench
fill = llmbench.Runner._fill
def fail(self, record, attempt, due):
    if self.part.process == 1 and record.request_id.endswith("-9"):
        raise ZeroDivisionError("planted")
    fill(self, record, attempt, due)
llmbench.Runner._fill = fail
sys.exit(llmbench.main(sys.argv[1:]))
"""


@linux
def test_bug_in_a_worker_is_a_traceback_and_ends_the_run(tmp_path):
    with Server(lambda peer, _: peer.send(HELLO)) as server:
        flags = ["--url", server.url, "--concurrency", "4", "--duration", "20s", "--processes", "2"]
        result = run(tmp_path / "out", *flags, program=[sys.executable, "-c", PLANTED % str(ROOT)])
    assert "ZeroDivisionError: planted" in result.stderr
    assert result.stderr.count("Traceback") == 1
    assert "never retrieved" not in result.stderr
    assert_told(result, "worker process 1 failed (exit status 1)")
    assert {index_of(record) % 2 for record in result.records} == {0, 1}


def test_worker_that_cannot_write(tmp_path):
    """A full disk, here a limit of the file size that a worker meets."""
    flags = ["--url", "mock:?ttft=1&itl=1&tokens=3", "--duration", "20s", "--concurrency", "4", "--processes", "2"]
    result = run(tmp_path / "out", *flags, preexec_fn=limit(resource.RLIMIT_FSIZE, 20000))
    assert result.status == 5
    assert one_line(result.stderr.split("\n", result.stderr.count("\n") - 1)[-1]), result.stderr
    assert "results.jsonl" in result.stderr
    assert "Traceback" not in result.stderr and "never retrieved" not in result.stderr
    lines = (tmp_path / "out" / "results.jsonl").read_text().split("\n")
    assert len([json.loads(line) for line in lines[:-1]]) > 5


def test_wrong_token_stops_all_processes_and_the_run_says_so(tmp_path):
    flags = ["--url", "mock:?ttft=1&token=right", "--token", "wrong-token", "--total-requests", "500"]
    result = run(tmp_path / "out", *flags, "--concurrency", "4", "--processes", "2")
    assert result.status == 3
    assert len(result.records) < 20
    assert_told(result, "auth")


def test_wrong_token_in_one_process_stops_the_other(tmp_path):
    """What only one part meets (a gateway with two backends) ends the run of all."""

    def behave(peer, request):
        refused = answer(401, {"error": {"message": "no"}})
        peer.send(refused if int(request.id.split("-")[2]) % 2 else HELLO)

    with Server(behave) as server:
        flags = ["--url", server.url, "--concurrency", "4", "--duration", "3s", "--processes", "2"]
        result = run(tmp_path / "out", *flags)
    assert_told(result, "auth")
    assert max(record["start_ms"] for record in result.records) < 1500.0


# The watching process ends: the workers do.


@linux
def test_killed_watcher_leaves_no_worker(programs, tmp_path):
    with Server(Halves(lambda _: True)) as server:
        result = split_run(tmp_path / "out", server, program=programs)
        with gone(workers(result)):
            result.process.kill()
            result.wait()
        assert len(server.requests) == 4
    assert result.files == {"results.jsonl"}
    assert [record["status"] for record in result.records] == ["cancelled"] * 4, "and they write what they have"
    report = subprocess.run([*CHECKOUT, "report", str(result.out)], capture_output=True)
    assert (report.returncode, report.stderr) == (0, b"")
    assert "cut_off" in json.dumps(result.summary["verdict"])


@linux
def test_watcher_killed_while_connections_are_being_opened_leaves_no_worker(tmp_path):
    with full_listener() as port:
        flags = ["--url", "http://127.0.0.1:%d" % port, "--concurrency", "2", "--processes", "2"]
        result = Run(tmp_path / "out", *flags, "--connect-timeout", "20s")
        pids = workers(result)
        wait_until(lambda: all(connecting(pid, port) for pid in pids), result.process)
        with gone(pids):
            result.process.kill()
            result.process.wait()
    result.wait()


def connecting(pid, port):
    """Whether a process has a socket that has sent its SYN to this port of loopback."""
    inodes = set()
    for name in os.listdir("/proc/%d/fd" % pid):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink("/proc/%d/fd/%s" % (pid, name)))
    with open("/proc/net/tcp", encoding="ascii") as file:
        rows = [line.split() for line in file][1:]
    waiting = [row for row in rows if row[2] == "0100007F:%04X" % port and row[3] == "02"]
    return any("socket:[%s]" % row[9] in inodes for row in waiting)


# Interrupts.


@pytest.mark.parametrize(
    "number, status, group",
    [
        (signal.SIGINT, 130, False),
        (signal.SIGINT, 130, True),
        (signal.SIGTERM, 143, False),
        (signal.SIGTERM, 143, True),
    ],
)  # fmt: skip
@linux
def test_interrupt_lets_what_is_in_flight_finish(number, status, group, tmp_path):
    halves = Halves()
    with Server(halves) as server:
        result = split_run(tmp_path / "out", server)
        pids = workers(result)
        with gone(pids):
            (os.killpg if group else os.kill)(result.process.pid, number)
            with pytest.raises(subprocess.TimeoutExpired):
                result.process.wait(0.2)
            halves.released.set()
            result.wait()
        assert len(server.requests) == 4, "nothing new is started"
    assert result.status == status
    assert result.files == FILES
    assert [record["status"] for record in result.records] == ["ok"] * 4
    assert result.end["reason"] == "interrupted by " + number.name
    assert result.stderr == ""


@linux
def test_patience_is_five_seconds_at_most_and_a_second_signal_ends_it(tmp_path):
    """Endpoints that never finish, all at once: Ctrl-C, a killed worker, Ctrl-C twice."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(Halves(lambda _: True))) for _ in range(3)]
        names = ("patient", "widowed", "hasty")
        patient, widowed, hasty = (split_run(tmp_path / name, server) for name, server in zip(names, servers))
        pids = [pid for result in (patient, widowed, hasty) for pid in workers(result)]
        stack.enter_context(gone(pids))
        began = time.monotonic()
        os.killpg(patient.process.pid, signal.SIGINT)
        os.kill(workers(widowed)[0], signal.SIGKILL)
        os.killpg(hasty.process.pid, signal.SIGINT)
        wait_until(lambda: no_signal_waits(hasty))
        os.killpg(hasty.process.pid, signal.SIGINT)
        hasty.wait()
        assert time.monotonic() - began < 3.0
        for result in (patient, widowed):
            result.wait()
            assert 4.5 < time.monotonic() - began < 8.0
    assert (patient.status, hasty.status) == (130, 130)
    assert [len(result.records) for result in (patient, widowed, hasty)] == [4, 2, 4]
    for result in (patient, widowed, hasty):
        assert {record["status"] for record in result.records} == {"cancelled"}
        assert result.files == FILES
        assert result.stderr == ""


def no_signal_waits(result):
    """Whether the watching process has taken every signal that it was sent: two at once may be one."""
    with open("/proc/%d/status" % result.process.pid, encoding="ascii") as file:
        pending = re.findall(r"^(?:Sig|Shd)Pnd:\s*([0-9a-f]+)", file.read(), re.M)
    return not any(int(mask, 16) for mask in pending)


@linux
def test_interrupt_while_connections_are_being_opened(tmp_path):
    with full_listener() as port:
        flags = ["--url", "http://127.0.0.1:%d" % port, "--concurrency", "2", "--processes", "2"]
        result = Run(tmp_path / "out", *flags, "--connect-timeout", "20s")
        pids = workers(result)
        wait_until(lambda: all(connecting(pid, port) for pid in pids), result.process)
        with gone(pids):
            os.killpg(result.process.pid, signal.SIGINT)
            result.wait(4.0)
    assert result.status == 130
    assert result.files == FILES
    assert "Traceback" not in result.stderr


@linux
def test_second_signal_ends_a_worker_that_hangs(tmp_path):
    """A worker that no longer answers, here a stopped one."""
    with Server(Halves(lambda _: True)) as server:
        result = split_run(tmp_path / "out", server)
        pids = workers(result)
        with gone(pids):
            os.kill(pids[0], signal.SIGSTOP)
            wait_until(lambda: (status_of(pids[0]) or ("", ""))[1] == "T")
            for _ in range(2):
                result.process.send_signal(signal.SIGINT)
                wait_until(lambda: no_signal_waits(result))
            try:
                result.wait(6.0)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids[0], signal.SIGKILL)
    assert result.status == 130
    assert result.files == FILES
    assert [record["status"] for record in result.records] == ["cancelled"] * 2


# Progress.

SHOWING = """
import sys, json
sys.path.insert(0, %r)
import llmbench
class Printer:
    def __init__(self, mode, stream, progress, texts):
        self.progress = progress
    def __enter__(self):
        return self
    def __exit__(self, *_):
        sys.stderr.write(json.dumps(vars(self.progress)))
llmbench.ProgressPrinter = Printer
sys.exit(llmbench.main(sys.argv[1:]))
"""


def test_progress_at_the_end_is_that_of_the_whole_last_stage(tmp_path):
    flags = ["--url", "mock:?ttft=1&itl=1&tokens=3", "--total-requests", "9", "--warmup", "3", "--processes", "3"]
    program = [sys.executable, "-c", SHOWING % str(ROOT)]
    result = run(tmp_path / "out", *flags, "--concurrency", "2,5", program=program)
    shown = json.loads(result.stderr)
    expected = {"stage": 1, "stages": 2, "phase": "measure", "concurrency": 5, "total": 9, "done": 9, "ok": 9}
    assert {name: shown[name] for name in expected} == expected
    assert (shown["failed"], shown["in_flight"], shown["tokens"]) == (0, 0, 27)
    assert sum(shown["ttft"].values()) == 9


def crew_of(*shares):
    """A crew that was told these shares, one by each worker."""
    crew = llmbench.Crew([], [], llmbench.Progress())
    for number, share in enumerate(shares):
        crew._shares[number] = vars(llmbench.Progress(**share))
    crew._add_up()
    return crew.progress


def test_progress_adds_up():
    first = {"stage": 1, "total": 5, "done": 3, "ok": 2, "failed": 1, "in_flight": 2, "tokens": 7, "chars": 9}
    first["began"] = 4.0
    total = crew_of({**first, "ttft": {5: 1, 7: 1}}, {**first, "total": 4, "ttft": {7: 2}})
    assert (total.stage, total.total, total.done, total.ok, total.failed) == (1, 9, 6, 4, 2)
    assert (total.in_flight, total.tokens, total.chars, total.ttft) == (4, 14, 18, {5: 1, 7: 3})
    assert total.began == 4.0


def test_progress_of_a_worker_that_is_still_in_the_phase_before_does_not_count():
    late = {"stage": 0, "phase": "measure", "total": 5, "done": 5}
    assert crew_of(late, {"stage": 1, "phase": "warmup", "total": 2, "done": 1}).done == 1
    assert crew_of({"phase": "warmup", "done": 5}, {"phase": "measure", "done": 1}).done == 1
    assert crew_of({"total": None}, {"total": None, "done": 1}).total is None


# How many processes.


@pytest.mark.parametrize(
    "wanted, streams, cpus, processes",
    [
        ("auto", 1, 8, 1), ("auto", 127, 8, 1), ("auto", 128, 8, 2), ("auto", 191, 8, 2), ("auto", 192, 8, 3),
        ("auto", 1000, 8, 8), ("auto", 1000, 64, 15), ("auto", 1000, 1, 1), ("auto", 128, 1, 1),
        (1, 1000, 8, 1), (4, 4, 1, 4), (4, 3, 8, 3), (3, 1, 8, 1), (16, 1000, 2, 16),
    ],
)  # fmt: skip
def test_choose_processes(wanted, streams, cpus, processes, monkeypatch):
    monkeypatch.setattr(llmbench, "usable_cpus", lambda: cpus)
    assert llmbench.choose_processes(wanted, llmbench.Config(concurrency=[1, streams])) == processes


def with_files(monkeypatch, files):
    """llmbench sees these files under /sys/fs/cgroup, and no other there."""

    def fake(path, *_, **__):
        name = path.replace("/sys/fs/cgroup/", "")
        if name not in files:
            raise FileNotFoundError(path)
        if isinstance(files[name], Exception):
            raise files[name]
        return io.StringIO(files[name])

    monkeypatch.setattr(llmbench, "open", fake, raising=False)


QUOTA, PERIOD = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"


@pytest.mark.parametrize(
    "files, quota",
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": ""}, None),
        ({"cpu.max": PermissionError()}, None),
        ({QUOTA: "-1\n", PERIOD: "100000\n"}, None),
        ({QUOTA: "400000\n", PERIOD: "100000\n"}, 4.0),
        ({QUOTA: "400000\n"}, None),
        ({PERIOD: "100000\n"}, None),
        ({"cpu.max": "max 100000\n", QUOTA: "200000\n", PERIOD: "100000\n"}, 2.0),
    ],
)
def test_quota_of_the_cgroup(files, quota, monkeypatch):
    with_files(monkeypatch, files)
    assert llmbench.cpu_quota() == quota


@pytest.mark.parametrize(
    "affinity, cpu_max, cpus",
    [(8, "max 100000", 8), (8, "250000 100000", 2), (8, "50000 100000", 1), (1, "400000 100000", 1), (2, "", 2)],
)
def test_usable_cpus(affinity, cpu_max, cpus, monkeypatch):
    with_files(monkeypatch, {"cpu.max": cpu_max})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    assert llmbench.usable_cpus() == cpus


def test_usable_cpus_where_there_is_no_affinity(monkeypatch):
    with_files(monkeypatch, {})
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for count, cpus in ((6, 6), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert llmbench.usable_cpus() == cpus


@pytest.mark.parametrize("words", [("--processes", "0"), ("--processes", "-1"), ("--processes", "many")])
def test_processes_that_are_none(words, tmp_path):
    bad = run(tmp_path / "out", "--url", "mock:", *words)
    assert bad.status == 2
    assert one_line(bad.stderr) and "--processes" in bad.stderr


@pytest.mark.parametrize("hosts, processes", [(1, 1), (1, 2), (1, 5), (2, 3), (3, 2)])
def test_parts_of_small_stages_take_every_request_and_every_stream(hosts, processes):
    """However few streams a stage has: those who take part split it, the others sit out."""
    parts = [llmbench.Part(k, hosts, p, processes) for k in range(hosts) for p in range(processes)]
    for streams in range(hosts, 12):
        active = [part.at(streams) for part in parts if part.at(streams) is not None]
        shares = [llmbench.streams_of(part, streams) for part in active]
        assert sum(shares) == streams and min(shares) >= 1
        taken = [number for part in active for number in range(3, 20) if part.takes(number)]
        assert sorted(taken) == list(range(3, 20))


def test_workers_are_told_apart_in_their_plans(tmp_path):
    """What a worker is told can be sent to a process that starts from nothing."""
    import functools
    import pickle

    opener = functools.partial(llmbench.ResultsWriter, str(tmp_path))
    plan = llmbench.WorkerPlan(llmbench.Config(), "http://h", [], llmbench.Part(process=1, processes=2), 1.0, opener)
    assert pickle.loads(pickle.dumps(plan)) [:5] == plan[:5]
    assert "inherited" in inspect.signature(llmbench.work).parameters
