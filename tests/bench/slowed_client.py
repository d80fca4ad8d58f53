"""llmbench in a process that a thread slows down: again and again it holds the interpreter's lock for a while.

    python3 tests/bench/slowed_client.py --hold 20 --rest 20 dist/llmbench.pyz run --url ...

--hold and --rest are the mean lengths, in ms, of a burst and of the pause after it. One `sum` over a range is one
call into C, during which no other thread of the process runs.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from pathlib import Path


def calibrate() -> float:
    """How many numbers `sum` adds in one ms here."""
    best = min(timed_sum(200_000) for _ in range(20))
    return 200_000 / best / 1e3


def timed_sum(count: int) -> float:
    """Seconds that a sum of so many numbers takes, and holds the lock."""
    began = time.perf_counter()
    sum(range(count))
    return time.perf_counter() - began


def hold_lock(per_ms: float, hold: float, rest: float) -> None:
    """Bursts without end, each between half and one and a half times as long as asked."""
    draw = random.Random(1)
    while True:
        sum(range(int(per_ms * hold * draw.uniform(0.5, 1.5))))
        time.sleep(rest * draw.uniform(0.5, 1.5) / 1e3)


def main() -> int:
    """Runs the program under the bursts; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hold", type=float, required=True)
    parser.add_argument("--rest", type=float, required=True)
    parser.add_argument("program", type=Path)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    path = options.program.resolve()
    sys.path.insert(0, str(path if path.suffix == ".pyz" else path.parent))
    import llmbench

    threading.Thread(target=hold_lock, args=(calibrate(), options.hold, options.rest), daemon=True).start()
    return llmbench.main(options.words)


if __name__ == "__main__":
    sys.exit(main())
