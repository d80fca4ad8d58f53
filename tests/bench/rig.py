"""What the benchmarks stand on: a server that knows the truth, the clients under test, and a watch on their memory.

Times are ns on CLOCK_MONOTONIC, which all processes of one machine share.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from startup import clean_environment

HERE = Path(__file__).resolve().parent
RUN_LIMIT = 240  # s: a client that takes longer hangs
WATCH_PAUSE = 0.05  # s between two looks at a client's memory


class BenchError(Exception):
    """Something did not run."""


class Load(NamedTuple):
    """A load and the server's part in it: streams, requests, and truthserver's ttft, itl (ms), tokens and batch."""

    streams: int
    requests: int
    ttft: float
    itl: float
    tokens: int
    batch: int = 1  # frames in one write where there are no pauses


class Truth(NamedTuple):
    """What the server knows of one request: when it had received it, and when it sent the first content."""

    received: int
    first: int
    tokens: int


class Seen(NamedTuple):
    """What a client says of one request."""

    due: int
    start: int
    first: int
    end: int
    ttft_ms: float
    slack_ms: float


class Outcome(NamedTuple):
    """One run of a client: CPU and wall time from the first due to the last end, what it saw, and its memory."""

    cpu_s: float
    wall_s: float
    seen: Dict[str, Seen]
    truth: Dict[str, Truth]
    server_cpu_s: float
    peak_kb: int
    summary: Dict[str, Any]
    drift_us: float
    watch: Optional["Watch"]

    @property
    def events(self) -> int:
        """Content events that the server sent."""
        return sum(truth.tokens for truth in self.truth.values())

    def both(self) -> List[Tuple[Seen, Truth]]:
        """What client and server say of each request."""
        missing = len(self.seen) - len(self.truth.keys() & self.seen.keys())
        if missing or not self.seen:
            raise BenchError("%d of %d requests are not in the server's log" % (missing, len(self.seen)))
        return [(seen, self.truth[request_id]) for request_id, seen in self.seen.items()]


# Processes.


def end_on_sigterm() -> None:
    """Lets SIGTERM unwind this process like an exit, so that each `with` ends what it started."""

    def leave(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough: a second one would cut the ending short
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


@contextmanager
def running(command: Sequence[str], **streams: Any) -> Iterator[subprocess.Popen]:
    """A process for the length of a `with`: whatever ends that, the process does not outlive it."""
    process = subprocess.Popen(command, text=True, env=clean_environment(), **streams)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


# Servers.


def build(directory: Path, name: str) -> Optional[Path]:
    """A compiled program of this directory; None without gcc."""
    target = directory / name
    if shutil.which("gcc") is None:
        return None
    command = ["gcc", "-O2", "-o", str(target), str(HERE / (name + ".c")), "-lm"]
    if subprocess.run(command, check=False).returncode:
        return None
    return target


class Server:
    """A server on loopback for the length of a `with`: truthserver or, without a compiler, the built-in mock."""

    def __init__(self, rig: Rig, load: Load, niceness: int = 0, cpus: Optional[Set[int]] = None) -> None:
        self.port = free_port()
        self.log = rig.fresh("server.log")
        self.native = rig.truthserver is not None
        if self.native:
            self.command = [str(rig.truthserver), str(self.port), "ttft_ms=%g" % load.ttft, "itl_ms=%g" % load.itl]
            self.command += ["tokens=%d" % load.tokens, "batch=%d" % load.batch, "log=%s" % self.log]
        else:
            self.command = [rig.python, str(rig.programs[0][1]), "mock", "--port", str(self.port), "--itl"]
            self.command += [str(load.itl), "--ttft", str(load.ttft), "--tokens", str(load.tokens)]
            self.command += ["--batch", str(load.batch), "--log", str(self.log)]
        self.cpu_s = math.nan
        self.niceness = niceness
        self.cpus = cpus

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=clean_environment()
        )
        with suppress(OSError):  # where it is allowed: a client that takes all CPUs must not hold up the truth
            os.setpriority(os.PRIO_PROCESS, self.process.pid, self.niceness)
        keep_to(self.process, self.cpus)
        deadline = time.monotonic() + 10
        try:
            while self.process.poll() is None and time.monotonic() < deadline:
                with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                    return self
                time.sleep(0.02)
            raise BenchError("the server did not start: " + " ".join(self.command))
        except BaseException:  # there is no __exit__ then
            self.process.kill()
            raise

    def __exit__(self, *_exception: object) -> None:
        """Ends it and reads how much CPU it took."""
        before = process_cpu(self.process.pid)
        self.process.send_signal(signal.SIGTERM)
        try:
            _, said = self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, said = self.process.communicate()
        words = dict(word.split("=") for word in said.splitlines()[-1].split() if "=" in word) if self.native else {}
        self.cpu_s = float(words.get("cpu", before))

    def truth(self) -> Dict[str, Truth]:
        """Its log, by request id; of a request that was sent twice the last."""
        lines = self.log.read_text().splitlines()
        if not self.native:
            told = [json.loads(line) for line in lines]
            return {
                line["request_id"]: Truth(int(line["received"] * 1e9), int(line["first"] * 1e9), line["tokens"])
                for line in told
                if "first" in line
            }
        fields = [line.rsplit(" ", 5) for line in lines]
        return {name: Truth(int(received), int(first), int(n)) for name, received, first, _, _, n in fields}


def keep_to(process: subprocess.Popen, cpus: Optional[Set[int]]) -> None:
    """Keeps a process that has just been started to these CPUs."""
    if cpus:
        os.sched_setaffinity(process.pid, cpus)


def two_sides() -> Tuple[Set[int], Set[int]]:
    """The CPUs of the clients and that of the server, where they are kept apart; raises BenchError with one CPU."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise BenchError("client and server can't be kept apart on one CPU")
    return set(cpus[:-1]), set(cpus[-1:])


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def process_cpu(pid: int) -> float:
    """User and system seconds of a process so far; NaN when it is gone or there is no /proc."""
    try:
        fields = Path("/proc/%d/stat" % pid).read_text().rpartition(")")[2].split()
    except OSError:
        return math.nan
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Clients.


class Watch(threading.Thread):
    """Looks at a process's memory until it ends: the peak while it measured, the peak of all, and a series.

    With `family` also at what it and the processes that it started hold together, memory that they share counted once.
    """

    def __init__(self, pid: int, results: Optional[Path] = None, family: bool = False) -> None:
        super().__init__(daemon=True)
        self.family = family
        self.family_kb = 0
        self.pid = pid
        self.results = results
        self.peak_kb = self.measuring_kb = 0
        self.series: List[Tuple[int, int]] = []  # (size of results.jsonl, resident kB) while it measured
        self.start()

    def run(self) -> None:
        """Until the process is gone."""
        measuring = True
        while True:
            try:
                status = Path("/proc/%d/status" % self.pid).read_text()
            except OSError:
                return
            figures = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if line.startswith("Vm")}
            if "VmHWM" not in figures:  # a zombie has none
                return
            size, ended = look_at(self.results)
            measuring = measuring and not ended  # a peak that was seen together with the end may be the report's
            self.peak_kb = int(figures["VmHWM"])
            if self.family:
                self.family_kb = max(self.family_kb, sum(map(proportional_kb, family_of(self.pid))))
            if measuring:
                self.measuring_kb = self.peak_kb
                self.series.append((size, int(figures["VmRSS"])))
            time.sleep(WATCH_PAUSE)

    def growth(self, requests: int) -> Tuple[float, int, int]:
        """Bytes a request between the middle and the end of the measurement, and the two sizes in kB."""
        whole = self.series[-1][0]
        size, middle = next(sample for sample in self.series if sample[0] >= whole / 2)
        between = requests * (whole - size) / whole
        last = self.series[-1][1]
        return (last - middle) * 1024 / between if between else math.nan, middle, last


def family_of(pid: int) -> List[int]:
    """A process and those that it started, and they."""
    found = [pid]
    with suppress(OSError):
        for children in Path("/proc/%d/task" % pid).glob("*/children"):
            for child in children.read_text().split():
                found += family_of(int(child))
    return found


def proportional_kb(pid: int) -> int:
    """What a process holds in memory, a page that n processes share as an n-th; 0 when it is gone."""
    with suppress(OSError):
        rollup = Path("/proc/%d/smaps_rollup" % pid).read_text()
        return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return 0


def look_at(results: Optional[Path]) -> Tuple[int, bool]:
    """The size of a results.jsonl, and whether its end line is written."""
    if results is None or not results.exists():
        return 0, False
    with results.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2000))
        return size, b'\n{"end":' in file.read()


def clock_offset() -> int:
    """CLOCK_REALTIME - CLOCK_MONOTONIC in ns, from the closest of some readings."""
    readings = []
    for _ in range(50):
        before, real, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        readings.append((after - before, real - (before + after) // 2))
    return min(readings)[1]


def nanoseconds(stamp: str) -> int:
    """An ISO 8601 UTC time of a record, in ns since 1970."""
    moment = datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)
    return int(moment.replace(microsecond=0).timestamp()) * 10**9 + moment.microsecond * 1000


def read_records(directory: Path) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
    """The measured requests and the audit lines of a run."""
    with (directory / "results.jsonl").open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    records = [line for line in lines if line.get("phase") == "measure"]
    bad = [line for line in records if line["status"] != "ok"]
    if bad or not records:
        why = "%s: %s" % (bad[0]["status"], bad[0].get("err")) if bad else "there are none"
        raise BenchError("%d of %d requests failed; the first: %s" % (len(bad), len(records), why))
    return records, [line["audit"] for line in lines if "audit" in line]


def seen_by_llmbench(records: Sequence[Dict[str, Any]], offset: int) -> Dict[str, Seen]:
    """The records as moments on CLOCK_MONOTONIC; their distance to it is that of the first content's wall time."""
    seen = {}
    for record in records:
        first = nanoseconds(record["first_content_ts"]) - offset
        start = first - record["ttft_ms"] * 1e6
        due = start - record["start_ms"] * 1e6 + record["scheduled_ms"] * 1e6
        end = start + record["latency_ms"] * 1e6
        ttft, slack = record["ttft_ms"], record["ttft_slack_ms"]
        seen[record["request_id"]] = Seen(int(due), int(start), first, int(end), ttft, slack)
    return seen


class Rig:
    """The directory, the interpreter, the server and the programs of one benchmark."""

    def __init__(self, directory: Path, programs: Sequence[Tuple[str, Path]], python: str, native: bool) -> None:
        self.directory = directory
        self.programs = programs
        self.python = python
        self.truthserver = build(directory, "truthserver") if native else None
        self.reader = build(directory, "reader") if native else None
        self._numbers = iter(range(10**9))

    def fresh(self, name: str) -> Path:
        """A path that nobody used yet."""
        return self.directory / ("%d-%s" % (next(self._numbers), name))

    def llmbench(
        self, program: Path, load: Load, *flags: str, watch: bool = False, slow: Sequence[str] = (), pause: Any = None,
        apart: bool = False,
    ) -> Outcome:  # fmt: skip
        """llmbench on a fresh server. slow: words before the program; pause: what is done to the process as it runs.

        apart: client and server run on CPUs of their own, so that neither waits for the other to be done.
        """
        out = self.fresh("out")
        mine, its = two_sides() if apart else (None, None)
        with Server(self, load, -10 if slow or pause else 0, its) as server:
            command = [self.python, *slow, str(program), "run", "--url", "http://127.0.0.1:%d" % server.port]
            command += ["--model", "truth", "--concurrency", str(load.streams), "--total-requests", str(load.requests)]
            command += ["--max-tokens", str(load.tokens), "--out", str(out), "--progress", "none", "--lang", "en"]
            command += flags
            before = clock_offset()
            streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            with running(command, **streams) as process:
                keep_to(process, mine)
                watching = Watch(process.pid, out / "results.jsonl") if watch else None
                if pause is not None:
                    pause(process)
                finish(process, "llmbench", (0, 4))
            after = clock_offset()
        records, audits = read_records(out)
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        seen = seen_by_llmbench(records, (before + after) // 2)
        cpu = sum(audit["cpu_percent"] * audit["wall_ms"] for audit in audits) / 1e5
        peak = watching.measuring_kb if watching else 0
        shutil.rmtree(str(out))
        drift = (after - before) / 1e3
        return Outcome(cpu, wall_of(seen), seen, server.truth(), server.cpu_s, peak, summary, drift, watching)

    def bare_loop(self, load: Load, apart: bool = False) -> Outcome:
        """The baseline on a fresh server."""
        mine, its = two_sides() if apart else (None, None)
        with Server(self, load, 0, its) as server:
            command = [self.python, str(HERE / "bare_loop.py"), "--port", str(server.port), "--streams"]
            command += [str(load.streams), "--requests", str(load.requests), "--max-tokens", str(load.tokens)]
            with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                keep_to(process, mine)
                told = json.loads(finish(process, "the bare loop", (0,)))
        seen = {
            name: Seen(due, start, first, end, (first - start) / 1e6, 0.0)
            for name, due, start, first, end in told["requests"]
        }
        return Outcome(
            told["cpu_s"], told["wall_s"], seen, server.truth(), server.cpu_s, told["peak_kb"], {}, 0.0, None
        )

    def reading(self, load: Load, pause_us: int) -> Outcome:
        """A client in C that only reads, and then waits for so long: what the server can give."""
        with Server(self, load) as server:
            command = [str(self.reader), str(server.port), str(load.streams), str(load.requests), str(pause_us)]
            with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                told = json.loads(finish(process, "the reader", (0,)))
        return Outcome(told["cpu_s"], told["wall_s"], {}, server.truth(), server.cpu_s, 0, {}, 0.0, None)


def wall_of(seen: Dict[str, Seen]) -> float:
    """Seconds from the first due to the last end."""
    return (max(one.end for one in seen.values()) - min(one.due for one in seen.values())) / 1e9


def finish(process: subprocess.Popen, name: str, good: Sequence[int]) -> str:
    """Waits for a client; its standard output. Raises BenchError when it failed."""
    try:
        output, said = process.communicate(timeout=RUN_LIMIT)
    except subprocess.TimeoutExpired:
        raise BenchError("%s took more than %d s" % (name, RUN_LIMIT)) from None
    if process.returncode not in good:
        tail = (said or "").strip()[-400:]
        raise BenchError("%s ended with %d: %s" % (name, process.returncode, tail))
    return output or ""


def quantile(values: Sequence[float], percent: int) -> float:
    """A percentile, interpolated as everywhere in llmbench."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    low = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (place - low)


def python_name(python: str) -> str:
    """What an interpreter calls itself."""
    if python == sys.executable:
        return "Python %d.%d.%d" % sys.version_info[:3]
    return subprocess.run([python, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
