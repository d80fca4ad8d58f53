"""Runs the program in a process of its own, and reads what it left."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from servers import PATIENCE

from conftest import ROOT

CHECKOUT = [sys.executable, str(ROOT / "llmbench.py")]
FILES = {"results.jsonl", "results.csv", "summary.json", "report.html"}


class Run:
    """llmbench in a process of its own, and what it left."""

    def __init__(self, out, *flags, program=CHECKOUT, **options):
        self.out = Path(str(out))
        words = [*program, "run", "--out", str(out), "--progress", "none", *flags]
        if not any(flag.startswith("--model") for flag in flags):
            words += ["--model", "tiny"]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True, **options}
        environment = {name: text for name, text in os.environ.items() if "TOKEN" not in name and "KEY" not in name}
        self.process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, env={**environment, "LC_ALL": "C.UTF-8"}, **options
        )

    def wait(self, seconds=60.0):
        """Waits for the end; self for chaining."""
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self.stdout, self.stderr = ((text or b"").decode("utf-8", "replace") for text in (out, err))
        self.status = self.process.returncode
        return self

    @property
    def files(self):
        return {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()

    @property
    def lines(self):
        text = (self.out / "results.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n")[:-1]]

    @property
    def records(self):
        return [line for line in self.lines if "request_id" in line]

    @property
    def end(self):
        return next((line["end"] for line in self.lines if "end" in line), None)

    @property
    def summary(self):
        return json.loads((self.out / "summary.json").read_text(encoding="utf-8"))

    @property
    def everything(self):
        """All that it wrote, files and terminal."""
        return "".join(path.read_text(encoding="utf-8") for path in self.out.iterdir()) + self.stdout + self.stderr


def run(out, *flags, **options):
    return Run(out, *flags, **options).wait()


def wait_until(condition, process=None):
    """Looks again every millisecond until `condition()` is true; its value."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            value = condition()
            if value:
                return value
        assert process is None or process.poll() is None, "it ended: " + process.stderr.read().decode()
        time.sleep(0.001)
    raise AssertionError("it never came to that")


def expected_status(summary, status=0):
    """`status`, or 4 where this busy host was the limit, which only the client's own reasons in the verdict allow."""
    verdict = summary["verdict"]
    invalid = {reason["key"] for reason in verdict["reasons"] if reason["state"] == "INVALID"}
    assert invalid <= {"cpu", "lag_ms", "ttft_slack_ms", "late"}
    assert (verdict["state"] == "INVALID") == bool(invalid)
    return 4 if invalid else status
