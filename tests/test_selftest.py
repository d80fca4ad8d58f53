"""`selftest`: what it measures and leaves, and how later runs quote it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from made_records import made_run, write_lines
from test_end_to_end import CHECKOUT, limit, linux, one_line, run, wait_until
from test_processes import gone, status_of

import llmbench
from conftest import ROOT, interpreter

FILE = llmbench.SELFTEST_FILE
HERE = socket.gethostname()

# The program with levels of a moment, and two CPUs whatever the host has.
SHORT = """
import sys
sys.path.insert(0, %r)
import llmbench
llmbench.SELFTEST_LEVELS = (
    llmbench.Level(1, 5, "mock:?ttft=5&itl=2&tokens=3"), llmbench.Level(8, 24, "mock:?ttft=20&itl=5&tokens=5"))
llmbench.FLOOD = llmbench.Level(4, %d, "mock:?ttft=0&itl=0&tokens=200&batch=100")
llmbench.usable_cpus = lambda: 2
sys.exit(llmbench.main(sys.argv[1:]))
"""


def short(program, requests=16, python=sys.executable):
    """The start of a command line: the checkout or an archive, as a module, with short levels."""
    return [python, "-c", SHORT % (str(program), requests)]


def start(cwd, *words, program=None, temporary=None, **options):
    command = [*(program or short(ROOT)), "selftest", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    environment = {**os.environ, "LC_ALL": "C.UTF-8", **({"TMPDIR": str(temporary)} if temporary else {})}
    return subprocess.Popen(
        command, cwd=str(cwd), env=environment, universal_newlines=True, start_new_session=True, **pipes, **options
    )


def selftest(cwd, *words, **options):
    """(exit status, stdout, stderr) of a whole selftest."""
    process = start(cwd, *words, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def assert_result(result):
    """The file's shape, and figures that can be."""
    assert set(result) == {"host", "tool_version", "at", "errors", "capacity"}
    assert (result["host"], result["tool_version"]) == (HERE, llmbench.__version__)
    assert result["at"].endswith("Z")
    assert [(level["streams"], level["n"]) for level in result["errors"]] == [(1, 5), (8, 24)]
    for level in result["errors"]:
        assert set(level) == {"streams", "n", "first_ms", "end_ms", "cpu_percent"}
        for name in ("first_ms", "end_ms"):
            figures = level[name]
            assert figures["n"] == level["n"]
            assert -0.5 < figures["min"] <= figures["p50"] <= figures["p99"] <= figures["max"] < 100.0
            assert "p99" in figures["limited"], "24 are too few for a P99, and it says so"
        assert level["first_ms"]["p50"] < 5.0
        assert 0.0 <= level["cpu_percent"] < 150.0
    assert [entry["processes"] for entry in result["capacity"]] == [1, 2]
    for entry in result["capacity"]:
        assert set(entry) == {"processes", "events_per_s", "cpu_percent"}
        assert entry["events_per_s"] > 100


def test_what_it_leaves_and_how_it_is_quoted(tmp_path):
    """The file, the tables, and a run from the same directory."""
    status, out, err = selftest(tmp_path)
    assert status == 0, err
    assert [line.split(":")[0] for line in err.splitlines()] == ["llmbench"] * 4, "only what it is at"
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    result = json.loads((tmp_path / FILE).read_text())
    assert_result(result)
    for shown in ("1 stream ", "8 streams", "{:,}".format(result["capacity"][1]["events_per_s"]), FILE):
        assert shown in out

    quoting = run(tmp_path / "out", *RUN, "--concurrency", "2", cwd=str(tmp_path))
    assert (quoting.status in (0, 4), quoting.stderr) == (True, "")
    assert quoting.lines[0]["run"]["selftest"] == result
    assert_quoted(quoting, result["errors"][0])
    again = subprocess.run([*CHECKOUT, "report", str(quoting.out)], capture_output=True)
    assert again.returncode == 0
    assert_quoted(quoting, result["errors"][0])


RUN = ["--url", "mock:?ttft=1&itl=1&tokens=2", "--total-requests", "4"]


def assert_quoted(result, level):
    """The summary and the report name the noise floor of that level."""
    floor = result.summary["client"]["selftest"]
    assert floor["streams"] == level["streams"]
    assert floor["first_p99_ms"] == level["first_ms"]["p99"]
    page = (result.out / "report.html").read_text(encoding="utf-8")
    title = llmbench.load_texts(llmbench.load_assets(), "en")["client.floor"].format(streams=level["streams"])
    assert title in page


@pytest.mark.parametrize("version", ["", "3.7", "3.13"])
def test_archive(pyz, version, tmp_path):
    python = interpreter(version) if version else sys.executable
    status, _, err = selftest(tmp_path, "--out", "mine.json", "--lang", "zh", program=short(pyz, python=python))
    assert status == 0, err
    assert_result(json.loads((tmp_path / "mine.json").read_text()))
    assert not (tmp_path / FILE).exists()


def made(**given):
    """A result as a selftest would leave it."""
    errors = [{"streams": streams, "first_ms": {"p99": streams / 1000.0}} for streams in (1, 100, 1000)]
    return {"host": HERE, "tool_version": "1", "at": "2026-01-02T03:04:05.000000Z", "errors": errors, **given}


def test_result_beside_the_program_is_quoted_too(pyz, tmp_path):
    """As one copies the archive over: with the file beside it, from wherever it is started."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "bin" / FILE).write_text(json.dumps(made()))
    archive = shutil.copy(str(pyz), str(tmp_path / "bin" / "llmbench.pyz"))
    result = run(tmp_path / "out", *RUN, program=[sys.executable, archive], cwd=str(tmp_path / "work"))
    assert result.status in (0, 4), result.stderr
    assert result.summary["client"]["selftest"]["first_p99_ms"] == 0.001


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The working directory and that of the program, both empty."""
    made_places = [tmp_path / "work", tmp_path / "bin"]
    for place in made_places:
        place.mkdir()
    monkeypatch.chdir(made_places[0])
    monkeypatch.setattr(llmbench, "program_path", lambda: str(made_places[1] / "llmbench.pyz"))
    return made_places


def test_which_result_is_found(places):
    assert llmbench.find_selftest(HERE) is None
    (places[1] / FILE).write_text(json.dumps(made(at="beside")))
    assert llmbench.find_selftest(HERE)["at"] == "beside"
    (places[0] / FILE).write_text(json.dumps(made(host="elsewhere")))
    assert llmbench.find_selftest(HERE)["at"] == "beside", "one of another host is passed over"
    (places[0] / FILE).write_text(json.dumps(made(at="here")))
    assert llmbench.find_selftest(HERE)["at"] == "here", "the working directory comes first"
    assert llmbench.find_selftest("elsewhere") is None


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"null", b"[]", b"5", b'"text"', b"\xff\xfe", b"{}", json.dumps({"host": HERE}).encode(),
     json.dumps(made(errors=[])).encode(), json.dumps(made(errors=None)).encode()],
)  # fmt: skip
def test_broken_result_is_ignored(text, places):
    (places[0] / FILE).write_bytes(text)
    assert llmbench.find_selftest(HERE) is None


BROKEN = [
    [{}], [1], {"a": 1}, "text", [{"streams": 1}], [{"streams": 1, "first_ms": None}],
    [{"streams": 1, "first_ms": {}}], [{"streams": 0, "first_ms": {"p99": 0.1}}],
    [{"streams": "1", "first_ms": {"p99": 0.1}}], [{"streams": 1, "first_ms": {"p99": "0.1"}}],
    [{"streams": 1, "first_ms": {"p99": float("nan")}}], [*made()["errors"], {"streams": 5}],
]  # fmt: skip


@pytest.mark.parametrize("errors", BROKEN, ids=repr)
def test_broken_levels_are_ignored(errors, places):
    """Whatever it holds must not cost the run its report."""
    (places[0] / FILE).write_text(json.dumps(made(errors=errors)))
    assert llmbench.find_selftest(HERE) is None


def test_run_beside_a_broken_result(tmp_path):
    (tmp_path / FILE).write_text(json.dumps(made(errors=[{}])))
    result = run(tmp_path / "out", *RUN, cwd=str(tmp_path))
    assert result.status in (0, 4)
    assert result.stderr == ""
    assert "selftest" not in result.lines[0]["run"]


@pytest.mark.parametrize(
    "streams, level", [(1, 1), (9, 1), (11, 100), (100, 100), (300, 100), (320, 1000), (9999, 1000)]
)
def test_level_next_to_a_runs(streams, level):
    """Next by ratio: 9 streams are nearer to 1 than to 100."""
    floor = llmbench.noise_floor(made(), streams)
    assert floor == {"streams": level, "first_p99_ms": level / 1000.0, "at": made()["at"]}


def test_stages_are_quoted_with_the_largest(tmp_path):
    lines = made_run(stages=3)
    lines[0]["run"]["selftest"] = made(errors=[*made()["errors"], {"streams": 8, "first_ms": {"p99": 0.5}}])
    directory = write_lines(tmp_path / "run", lines)
    summary = llmbench.build_outputs(str(directory), llmbench.load_assets(), lambda _: None)
    assert summary["client"]["selftest"]["streams"] == 8
    del lines[0]["run"]["selftest"]
    write_lines(tmp_path / "run", lines)
    summary = llmbench.build_outputs(str(directory), llmbench.load_assets(), lambda _: None)
    assert "selftest" not in summary["client"]


def test_place_that_is_none_is_bad_usage_at_once(tmp_path):
    """As run's --out: a directory that is not there, and one in the file's place."""
    for place in (str(tmp_path / "no" / "such.json"), str(tmp_path)):
        status, out, err = selftest(tmp_path, "--out", place)
        assert (status, out) == (2, "")
        assert one_line(err) and "--out" in err
    assert list(tmp_path.iterdir()) == []


def test_temporary_records_that_cannot_be_written(tmp_path):
    """A full /tmp."""
    status, _, err = selftest(tmp_path, preexec_fn=limit(resource.RLIMIT_FSIZE, 2000))
    assert status == 5
    assert one_line(err.splitlines(True)[-1]) and "Traceback" not in err


@linux
@pytest.mark.parametrize("when", ["level", "flood"])
def test_interrupt_is_quiet_and_leaves_nothing(when, tmp_path):
    """Ctrl-C with requests of a minute in flight, and while a worker takes in a flood that does not end."""
    (tmp_path / "tmp").mkdir()
    program = short(ROOT, requests=10**6)
    if when == "level":
        program[-1] = program[-1].replace("ttft=20", "ttft=60000")
    process = start(tmp_path, program=program, temporary=tmp_path / "tmp")
    try:
        if when == "level":
            wait_until(lambda: sockets_of(process.pid) >= 8, process)
        else:
            wait_until(lambda: records_in(tmp_path / "tmp"), process)
        with gone(family(process.pid)):
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert [line for line in err.splitlines() if not line.startswith("llmbench: selftest: ")] == []
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp"]


def records_in(directory):
    """Whether a results file under it holds a record."""
    return any(b"request_id" in path.read_bytes() for path in directory.rglob("results.jsonl"))


def family(parent):
    """The process ids of a process's children."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if (status_of(pid) or (0,))[0] == parent]


def sockets_of(pid):
    """How many established TCP connections a process has."""
    inodes = set()
    for name in os.listdir("/proc/%d/fd" % pid):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink("/proc/%d/fd/%s" % (pid, name)))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[3] == "01" and "socket:[%s]" % row[9] in inodes for row in rows)
