"""How long the archive takes to start, on every Python of this machine: `--version` against bare imports.

    python3 tests/bench/startup.py [--archive dist/llmbench.pyz] [--pairs 25] [--python 3.12 ...]

The floor is an interpreter that imports what llmbench cannot do without. Both are started in turn, in pairs, so that
whatever else the machine does falls on both; the ratio is the median of the pairs' ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import build  # noqa: E402 - a script beside the tests finds it only now

FLOOR = ["-c", "import asyncio, ssl, argparse, json"]
LIMIT = 1.5


def clean_environment() -> dict[str, str]:
    """Ours without Python's variables: PYTHONDONTWRITEBYTECODE, for one, would slow down what it is not meant for."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def start_time(command: list[str]) -> float:
    """Milliseconds from starting a command to its end; raises CalledProcessError when it fails."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=clean_environment())
    return (time.perf_counter() - began) * 1e3


def measure(python: str, archive: Path, pairs: int) -> list[tuple[float, float]]:
    """Start times in ms, (floor, archive) for each pair; which of the two goes first alternates."""
    commands = [[python, *FLOOR], [python, str(archive), "--version"]]
    for command in commands:  # the first start may still write the standard library's bytecode
        start_time(command)
    measured = []
    for turn in range(pairs):
        first = turn % 2
        times = {which: start_time(commands[which]) for which in (first, 1 - first)}
        measured.append((times[0], times[1]))
    return measured


def row(measured: list[tuple[float, float]]) -> tuple[float, float, float]:
    """The medians: floor in ms, archive in ms, archive / floor."""
    floor, archive = (statistics.median(times) for times in zip(*measured))
    return floor, archive, statistics.median(ours / bare for bare, ours in measured)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command_line = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    command_line.add_argument("--archive", type=Path, default=build.TARGET, help="default: dist/llmbench.pyz")
    command_line.add_argument("--pairs", type=int, default=25, help="starts of each (default: 25)")
    command_line.add_argument("--python", nargs="+", default=build.SUPPORTED, help="only these: 3.8 3.13")
    return command_line


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; the exit status is 1 when a Python is over the limit."""
    options = parser().parse_args(arguments)
    interpreters = build.find_interpreters(options.python)
    over = False
    print(f"{options.archive.name}, {options.archive.stat().st_size:,} bytes, median of {options.pairs} pairs")
    print(f"{'Python':8}{'floor, ms':>11}{'--version, ms':>15}{'ratio':>8}")
    for version in options.python:
        if version not in interpreters:
            print(f"{version:8} not on this machine")
            continue
        floor, archive, ratio = row(measure(interpreters[version], options.archive, options.pairs))
        over = over or ratio > LIMIT
        print(f"{version:8}{floor:11.1f}{archive:15.1f}{ratio:8.2f}{'  over ' + str(LIMIT) if ratio > LIMIT else ''}")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
