"""The benchmarks of llmbench itself: accuracy, CPU, events a second, memory, report, start-up.

    python3 build.py bench                          builds, then runs all of it, about ten minutes
    python3 tests/bench/run.py --quick              smaller and once each, within two minutes
    python3 tests/bench/run.py --case A,D --repeat 3
    python3 tests/bench/run.py --case A --program old=/tmp/old/llmbench.py new=llmbench.py

Clients run on loopback against truthserver.c, which logs on CLOCK_MONOTONIC when it received each request and when it
sent the first content; without gcc the built-in mock serves. Beside llmbench runs a bare asyncio read loop that looks
at nothing and, where the server may be the limit, reader.c, which shows what it can give to anybody. In every
repetition all clients run one after the other, a ratio is taken within one repetition, and each figure is the median
over the repetitions. Figures are no verdict: the exit status is 1 only when something did not run.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import made_results
from rig import BenchError, Load, Outcome, Rig, Watch, end_on_sigterm, finish, python_name, quantile, running

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BARE = "bare loop"
APART = ", apart"  # client and server on CPUs of their own


class Sizes(NamedTuple):
    """How much is measured."""

    repeat: int
    a: Load
    b: Load
    d: Load
    batched: Load
    slowed: Load
    requests: int  # of the memory case
    records: int  # of the report case
    pairs: int  # of starts


PACED, CROWD, FLOOD = Load(100, 400, 300, 25, 80), Load(1000, 2000, 800, 100, 40), Load(32, 640, 0, 0, 2000)
SLOW = Load(40, 400, 300, 25, 12)
FULL = Sizes(3, PACED, CROWD, FLOOD, FLOOD._replace(batch=50), SLOW, 100_000, 1_000_000, 9)
QUICK = Sizes(
    1, PACED._replace(requests=100), CROWD._replace(requests=1000), FLOOD._replace(requests=160),
    FLOOD._replace(requests=160, batch=50), SLOW._replace(requests=160), 10_000, 100_000, 2,
)  # fmt: skip

Row = Dict[str, float]  # column -> figure


class Column(NamedTuple):
    """A column of a table: its head, how a figure is written, and what is aimed at, where there is an aim."""

    head: str
    form: str
    aim: str = ""


# Tables.


def print_table(title: str, columns: Sequence[Column], rows: Iterable[Tuple[str, Row]]) -> None:
    """A table with one line for each client and, where there are aims, one for these."""
    lines = [[""] + [column.head for column in columns]]
    lines += [[name] + [written(column, row) for column in columns] for name, row in rows]
    if any(column.aim for column in columns):
        lines.append(["aim"] + [column.aim for column in columns])
    widths = [max(len(cell) for cell in cells) for cells in zip(*lines)]
    print("\n" + title)
    for line in lines:
        cells = [line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        print("  " + "  ".join(cells).rstrip())
    sys.stdout.flush()


def written(column: Column, row: Row) -> str:
    """A figure as its column writes it; a dash for none."""
    figure = row.get(column.head, math.nan)
    return column.form.format(figure) if figure == figure else "-"


def medians(rows: Sequence[Row]) -> Row:
    """The median of each column over the repetitions."""
    return {head: statistics.median(row[head] for row in rows) for head in rows[0]}


def repeated(
    rig: Rig, repeat: int, clients: Dict[str, Callable[[], Outcome]], figures: Callable[[Outcome, Outcome], Row]
) -> List[Tuple[str, Row]]:
    """The medians of each client's figures. In each repetition all clients run, in turn from both ends."""
    rows: Dict[str, List[Row]] = {name: [] for name in clients}
    for turn in range(repeat):
        order = list(clients) if turn % 2 == 0 else list(clients)[::-1]
        outcomes = {name: clients[name]() for name in order}
        for name, outcome in outcomes.items():
            rows[name].append(figures(outcome, outcomes[BARE + APART if name.endswith(APART) else BARE]))
    return [(name, medians(rows[name])) for name in clients]


# Cases A and B: paced streams.

ACCURACY = (
    Column("arrival P50", "{:.3f}"), Column("arrival P99", "{:.3f}", "0.1"), Column("TTFT P50", "{:.2f}"),
    Column("TTFT P99", "{:.2f}", "2"), Column("sent P99", "{:.2f}"), Column("wave, ms", "{:.1f}"),
    Column("CPU µs", "{:.1f}"), Column("ratio", "{:.2f}", "1.2"), Column("peak MB", "{:.1f}"),
    Column("server CPU", "{:.0f} %"),
)  # fmt: skip
EXPLAIN = (
    "  arrival: first content, the client's time less the server's, ms. TTFT: the client's less the server's, ms.\n"
    "  sent: from the client's start to the receipt by the server, ms: its own queue, and part of the TTFT error.\n"
    "  wave: until the first request of the last stream is out. CPU: per content event, first due to last end."
)
EXPLAIN_APART = "  apart: client and server on CPUs of their own; else the one at times waits for the other."


def paced(rig: Rig, title: str, load: Load, repeat: int, columns: Sequence[Column]) -> None:
    """How exact the arrival of the first content is, and what an event costs."""
    clients: Dict[str, Callable[[], Outcome]] = {}
    for apart in (False, True)[: len(os.sched_getaffinity(0))]:
        clients[BARE + APART * apart] = lambda apart=apart: rig.bare_loop(load, apart)  # type: ignore[misc]
        for name, program in rig.programs:
            clients[name + APART * apart] = lambda program=program, apart=apart: rig.llmbench(  # type: ignore[misc]
                program, load, "--processes", "1", watch=True, apart=apart
            )
    rows = repeated(rig, repeat, clients, lambda outcome, bare: accuracy(outcome, bare, load.streams))
    print_table("%s: %s" % (title, describe(load)), columns, rows)
    print(EXPLAIN)
    if len(rows) > 1 + len(rig.programs):
        print(EXPLAIN_APART, flush=True)


def accuracy(outcome: Outcome, bare: Outcome, streams: int) -> Row:
    """The figures of ACCURACY."""
    both = outcome.both()
    arrivals = [abs(seen.first - truth.first) / 1e6 for seen, truth in both]
    ttfts = [abs(error) for error in ttft_errors(outcome)]
    starts = sorted(seen.start for seen, _ in both)
    cpu = outcome.cpu_s / outcome.events
    return {
        "arrival P50": quantile(arrivals, 50),
        "arrival P99": quantile(arrivals, 99),
        "TTFT P50": quantile(ttfts, 50),
        "TTFT P99": quantile(ttfts, 99),
        "sent P99": quantile([(truth.received - seen.start) / 1e6 for seen, truth in both], 99),
        "wave, ms": (starts[min(streams, len(starts)) - 1] - min(seen.due for seen, _ in both)) / 1e6,
        "CPU µs": cpu * 1e6,
        "ratio": cpu / (bare.cpu_s / bare.events),
        "peak MB": outcome.peak_kb / 1024,
        "server CPU": 100 * outcome.server_cpu_s / outcome.wall_s,
    }


def ttft_errors(outcome: Outcome) -> List[float]:
    """TTFT less what the server knows of it, in ms."""
    return [seen.ttft_ms - (truth.first - truth.received) / 1e6 for seen, truth in outcome.both()]


def describe(load: Load) -> str:
    """A load in words."""
    pace = "%g ms between frames" % load.itl if load.itl else "no pauses"
    words = (load.streams, load.requests, load.ttft, pace, load.tokens)
    return "%d streams, %d requests, TTFT %g ms, %s, %d frames" % words


def case_a(rig: Rig, sizes: Sizes) -> None:
    """Accuracy and CPU at 100 streams."""
    paced(rig, "A", sizes.a, sizes.repeat, ACCURACY)


def case_b(rig: Rig, sizes: Sizes) -> None:
    """Accuracy and memory at 1,000 streams at once."""
    aims = {"arrival P99": "0.1", "TTFT P99": "3", "wave, ms": "100", "peak MB": "64"}
    columns = [column._replace(aim=aims.get(column.head, "")) for column in ACCURACY]
    paced(rig, "B", sizes.b, sizes.repeat, columns)


# Case D: as fast as it goes.

SERVER_LIMIT = 85.0  # % of a CPU from which on it can't be shown to have had time left

THROUGHPUT = (
    Column("events/s", "{:,.0f}"), Column("to bare", "{:.2f}"), Column("to 1 process", "{:.2f}"),
    Column("CPU µs", "{:.2f}"), Column("client CPU", "{:.0f} %"), Column("server CPU", "{:.0f} %"),
)  # fmt: skip


def case_d(rig: Rig, sizes: Sizes) -> None:
    """Events a second without pauses: each frame a write of its own, and many in one, which spares the server."""
    for title, load in (("D", sizes.d), ("D, batched", sizes.batched)):
        flood(rig, title, load, sizes.repeat)
    if rig.reader is not None:
        print("  reader in C: a client that looks at nothing; one that reads only every 5 ms: what the server can give")
    print("  (aims: 400,000 in one process, and in two 1.6 times that, unless the server is the limit)")
    print("  CPUs: %d, for client and server together" % len(os.sched_getaffinity(0)), flush=True)


READER_PAUSE = 5000  # us between two rounds of the reader that lets the server run


def flood(rig: Rig, title: str, load: Load, repeat: int) -> None:
    """With one process and with two; says where the server was the limit."""
    clients: Dict[str, Callable[[], Outcome]] = {BARE: lambda: rig.bare_loop(load)}
    if rig.reader is not None:
        clients["reader in C"] = lambda: rig.reading(load, 0)
        clients["reader in C, every 5 ms"] = lambda: rig.reading(load, READER_PAUSE)
    ours = len(clients)
    for name, program in rig.programs:
        for processes in ("1", "2"):
            clients["%s, %s process%s" % (name, processes, "es" * (processes > "1"))] = (
                lambda program=program, processes=processes: rig.llmbench(  # type: ignore[misc]
                    program, load, "--processes", processes
                )
            )
    rows = repeated(rig, repeat, clients, throughput)
    for (_, one), (_, two) in zip(rows[ours::2], rows[ours + 1 :: 2]):
        two["to 1 process"] = two["events/s"] / one["events/s"]
    written = "%d frames a write" % load.batch if load.batch > 1 else "a write for each frame"
    print_table("%s: %s, %s" % (title, describe(load), written), THROUGHPUT, rows)
    for name, row in rows:
        if row["server CPU"] > SERVER_LIMIT:
            print("  %s: the server was the limit, at %.0f %% CPU" % (name, row["server CPU"]))
        elif row["client CPU"] + row["server CPU"] > SERVER_LIMIT * len(os.sched_getaffinity(0)):
            print("  %s: client and server together had used up this machine's CPUs" % name)
    cpus = len(os.sched_getaffinity(0))
    for name, row in rows[ours::2]:
        share = row["client CPU"] + row["server CPU"]
        if share < 100 * cpus and cpus > 1:
            told = (name, share / cpus, 100 * cpus / share)
            print("  %s: took %.0f %% of all CPUs, with the server; they hold %.2f times as much" % told)


def throughput(outcome: Outcome, bare: Outcome) -> Row:
    """The figures of THROUGHPUT."""
    rate = outcome.events / outcome.wall_s
    return {
        "events/s": rate,
        "to bare": rate / (bare.events / bare.wall_s),
        "CPU µs": outcome.cpu_s / outcome.events * 1e6,
        "client CPU": 100 * outcome.cpu_s / outcome.wall_s,
        "server CPU": 100 * outcome.server_cpu_s / outcome.wall_s,
    }


# A client that is slowed down on purpose.

SLOWED = (
    Column("single", "{:.0f}"), Column("arrival P99", "{:.3f}"), Column("sent P99", "{:.2f}"),
    Column("TTFT P99", "{:.2f}", "2"), Column("several", "{:.0f}"), Column("TTFT P99 ", "{:.2f}"),
    Column("past slack", "{:.1f} %", "0 %"), Column("arrival past", "{:.1f} %", "0 %"), Column("lag P99", "{:.1f}"),
    Column("CPU", "{:.0f} %"),
)  # fmt: skip
TOLERANCE = 0.1  # ms by which the arrival may be off where slack is 0
TTFT_TOLERANCE = 2.0  # ms: in TTFT is the server's own queue


def case_slowed(rig: Rig, sizes: Sizes) -> None:
    """What the arrival stamps and the verdict make of a client that can't keep up."""
    load, program = sizes.slowed, rig.programs[0][1]
    run_slowed = functools.partial(rig.llmbench, program, load, apart=len(os.sched_getaffinity(0)) > 1)
    runs: Dict[str, Callable[[], Outcome]] = {
        "as it is": run_slowed,
        "lock held 10 of 25 ms": lambda: run_slowed(slow=holding(10, 15)),
        "lock held 60 of 120 ms": lambda: run_slowed(slow=holding(60, 60)),
        "stopped 15 of 25 ms": lambda: run_slowed(pause=duty(0.010, 0.015)),
        "stopped 80 of 120 ms": lambda: run_slowed(pause=duty(0.040, 0.080)),
    }
    outcomes = {name: run() for name, run in runs.items()}
    with cpu_quota(QUOTA) as join:
        if join is not None:
            outcomes["quota %g of 100 ms" % (100 * QUOTA)] = run_slowed(pause=join)
    rows = [(name, slowed(outcome)) for name, outcome in outcomes.items()]
    print_table("Slowed down on purpose: %s" % describe(load), SLOWED, rows)
    print("  single: requests with ttft_slack_ms 0; several: the others, whose first content came with more frames")
    print("  past slack: off by more than their ttft_slack_ms and %g ms (arrival: %g)" % (TTFT_TOLERANCE, TOLERANCE))
    for name, outcome in outcomes.items():
        verdict = outcome.summary["verdict"]
        reasons = ["%s %s" % (reason["state"], reason["key"]) for reason in verdict["reasons"]]
        print("  %s: %s (%s)" % (name, verdict["state"], ", ".join(reasons) or "no reason"), flush=True)


def holding(hold: float, rest: float) -> List[str]:
    """The words that start llmbench beside a thread which holds the lock for so many ms, and rests for so many."""
    return [str(HERE / "slowed_client.py"), "--hold", str(hold), "--rest", str(rest)]


def duty(running: float, stopped: float) -> Callable[[subprocess.Popen], None]:
    """Stops and continues a process in turn, like a CPU quota, once it has had time to start."""

    def throttle(process: subprocess.Popen) -> None:
        time.sleep(0.5)
        while process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            time.sleep(stopped)
            process.send_signal(signal.SIGCONT)
            time.sleep(running)

    return lambda process: threading.Thread(target=throttle, args=(process,), daemon=True).start()


QUOTA = 0.04  # CPUs: about half of what this client needs


@contextmanager
def cpu_quota(share: float) -> Iterator[Optional[Callable[[subprocess.Popen], None]]]:
    """What puts a process that has had time to start under a CPU quota, per 100 ms; None where none can be set."""
    period = 100_000
    quota = "%d" % (share * period)
    forms = (
        (Path("/sys/fs/cgroup/cpu"), (("cpu.cfs_period_us", str(period)), ("cpu.cfs_quota_us", quota))),
        (Path("/sys/fs/cgroup"), (("cpu.max", "%s %d" % (quota, period)),)),
    )
    group = None
    for root, settings in forms:
        if (root / "cgroup.procs").exists():
            with suppress(OSError):
                group = root / ("llmbench-bench-%d" % os.getpid())
                group.mkdir()
                for name, value in settings:
                    (group / name).write_text(value)
                break
            group = None
    if group is None:
        yield None
        return

    def join(process: subprocess.Popen) -> None:
        time.sleep(0.5)
        with suppress(OSError):  # it has ended
            (group / "cgroup.procs").write_text(str(process.pid))

    try:
        yield lambda process: threading.Thread(target=join, args=(process,), daemon=True).start()
    finally:
        with suppress(OSError):
            group.rmdir()


def slowed(outcome: Outcome) -> Row:
    """The figures of SLOWED."""
    both = outcome.both()
    arrivals = [abs(seen.first - truth.first) / 1e6 for seen, truth in both]
    errors = [abs(error) for error in ttft_errors(outcome)]
    slacks = [seen.slack_ms for seen, _ in both]
    single = [error for error, slack in zip(errors, slacks) if not slack]
    several = [error for error, slack in zip(errors, slacks) if slack]
    client = outcome.summary["client"]
    return {
        "single": len(single),
        "arrival P99": quantile([error for error, slack in zip(arrivals, slacks) if not slack], 99),
        "sent P99": quantile([(truth.received - seen.start) / 1e6 for seen, truth in both], 99),
        "TTFT P99": quantile(single, 99),
        "several": len(several),
        "TTFT P99 ": quantile(several, 99),
        "past slack": share(errors, slacks, TTFT_TOLERANCE),
        "arrival past": share(arrivals, slacks, TOLERANCE),
        "lag P99": client.get("lag_ms", {}).get("p99", math.nan),
        "CPU": client.get("cpu_percent", math.nan),
    }


def share(errors: Sequence[float], slacks: Sequence[float], tolerance: float) -> float:
    """How many per cent of the errors are past their slack and the tolerance."""
    return 100 * sum(error > slack + tolerance for error, slack in zip(errors, slacks)) / len(errors)


# Memory, report, start-up.


def case_memory(rig: Rig, sizes: Sizes) -> None:
    """How much the client grows by while it measures many short requests."""
    load = Load(64, sizes.requests, 1, 0, 2)
    columns = (
        Column("requests/s", "{:,.0f}"), Column("middle MB", "{:.1f}"), Column("end MB", "{:.1f}"),
        Column("bytes a request", "{:.0f}", "100"), Column("peak with report MB", "{:.1f}"),
    )  # fmt: skip
    rows = []
    for name, program in rig.programs:
        outcome = rig.llmbench(program, load, "--processes", "1", watch=True)
        watch: Watch = outcome.watch  # type: ignore[assignment]
        growth, middle, last = watch.growth(load.requests)
        figures = (load.requests / outcome.wall_s, middle / 1024, last / 1024, growth, watch.peak_kb / 1024)
        rows.append((name, {column.head: figure for column, figure in zip(columns, figures)}))
    print_table("Memory: %s" % describe(load), columns, rows)


def case_report(rig: Rig, sizes: Sizes) -> None:
    """`report` on very many records."""
    columns = (
        Column("seconds", "{:.1f}", "40"), Column("peak MB", "{:.0f}", "400"),
        Column("with all processes", "{:.0f}", "400"), Column("HTML MB", "{:.2f}", "2"), Column("results MB", "{:.0f}"),
    )  # fmt: skip
    directory = rig.fresh("report")
    made_results.write(directory, sizes.records)
    rows = []
    for name, program in rig.programs:
        began = time.monotonic()
        command = [rig.python, str(program), "report", str(directory)]
        with running(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            watch = Watch(process.pid, family=True)
            finish(process, "report", (0,))
        seconds = time.monotonic() - began
        page, results = ((directory / name).stat().st_size / 1e6 for name in ("report.html", "results.jsonl"))
        figures = (seconds, watch.peak_kb / 1024, watch.family_kb / 1024, page, results)
        rows.append((name, {column.head: figure for column, figure in zip(columns, figures)}))
    shutil.rmtree(str(directory))
    print_table("Report: %s records (aims are for 1,000,000)" % "{:,}".format(sizes.records), columns, rows)


def case_startup(rig: Rig, sizes: Sizes) -> None:
    """How long the archive takes to start."""
    archive = ROOT / "dist" / "llmbench.pyz"
    if not archive.exists():
        raise BenchError("there is no dist/llmbench.pyz; run build.py first")
    print("\nStart-up (aim: a ratio of 1.5)", flush=True)
    command = [sys.executable, str(HERE / "startup.py"), "--archive", str(archive), "--pairs", str(sizes.pairs)]
    if subprocess.call(command) not in (0, 1):  # 1: over its limit
        raise BenchError("startup.py failed")


CASES: Dict[str, Callable[[Rig, Sizes], None]] = {
    "A": case_a,
    "B": case_b,
    "D": case_d,
    "startup": case_startup,
    "memory": case_memory,
    "report": case_report,
    "slowed": case_slowed,
}


# The command line.


def read_cases(text: str) -> List[str]:
    """`A,B,report`."""
    names = text.split(",")
    if any(name not in CASES for name in names):
        raise argparse.ArgumentTypeError("cases are %s" % ",".join(CASES))
    return names


def read_program(text: str) -> Tuple[str, Path]:
    """`llmbench.py`, or `new=llmbench.py` with the name for the tables."""
    name, equals, path = text.rpartition("=")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError("%s is no file" % path)
    return (name if equals else "llmbench", Path(path).resolve())


def default_program() -> Path:
    """The archive, when it is no older than what it is made of: nothing is compiled when it starts."""
    archive, source = ROOT / "dist" / "llmbench.pyz", ROOT / "llmbench.py"
    fresh = archive.exists() and archive.stat().st_mtime >= source.stat().st_mtime
    return archive if fresh else source


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command_line = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    add = command_line.add_argument
    add("--case", type=read_cases, default=list(CASES), metavar="NAMES", help="of %s; default: all" % ",".join(CASES))
    add("--repeat", type=int, metavar="N", help="repetitions of A, B and D (default: 3, with --quick 1)")
    add("--quick", action="store_true", help="fewer requests and records")
    add("--requests", type=int, metavar="N", help="requests of the memory case (default: 100,000)")
    add("--records", type=int, metavar="N", help="records of the report case (default: 1,000,000)")
    add("--program", type=read_program, nargs="+", metavar="[NAME=]FILE",
        help="what is measured; default: dist/llmbench.pyz or, when that is older, llmbench.py")  # fmt: skip
    add("--python", default=sys.executable, metavar="FILE", help="interpreter of the clients; default: this one")
    add("--mock", action="store_true", help="the built-in mock serves, as it does without gcc")
    return command_line


def choose_sizes(options: argparse.Namespace) -> Sizes:
    """What the command line asks for."""
    sizes = QUICK if options.quick else FULL
    asked = {name: getattr(options, name) for name in ("repeat", "requests", "records") if getattr(options, name)}
    return sizes._replace(**asked)


def load_average() -> str:
    """How busy the machine has been in the last minute."""
    return "load %.2f" % os.getloadavg()[0] if hasattr(os, "getloadavg") else "load unknown"


def describe_machine(rig: Rig) -> str:
    """Where the figures come from."""
    cpus = "%d CPUs" % (os.cpu_count() or 1)
    server = "truthserver" if rig.truthserver else "the mock serves"
    words = [python_name(rig.python), platform.platform(), cpus, load_average(), server]
    return ", ".join(words + ["%s: %s" % (name, path.name) for name, path in rig.programs])


def run_case(name: str, rig: Rig, sizes: Sizes) -> Optional[str]:
    """Runs a case; why it did not run, if it did not."""
    began, before = time.monotonic(), load_average()
    try:
        CASES[name](rig, sizes)
    except (BenchError, OSError, subprocess.SubprocessError) as error:
        return "%s: %s" % (name, error)
    took = time.monotonic() - began
    print("  (%s took %.0f s; %s before, %s after)" % (name, took, before, load_average()), flush=True)
    return None


def main(arguments: Any = None) -> int:
    """Prints the tables; 1 when something did not run."""
    options = parser().parse_args(arguments)
    end_on_sigterm()
    programs = options.program or [("llmbench", default_program())]
    with tempfile.TemporaryDirectory(prefix="llmbench-bench-") as directory:
        rig = Rig(Path(directory), programs, options.python, not options.mock)
        print(describe_machine(rig), flush=True)
        outcomes = [run_case(name, rig, choose_sizes(options)) for name in options.case]
    failures = list(filter(None, outcomes))
    for failure in failures:
        print("did not run: " + failure, file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
