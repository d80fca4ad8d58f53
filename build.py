#!/usr/bin/env python3
"""Builds and checks llmbench.

    python3 build.py                       dist/llmbench.pyz
    python3 build.py test [--long] [...]   lint, version floor, build, tests; further arguments go to pytest
    python3 build.py test --exhaustive     the tests that repeat others on every Python, in every shape, more often, too
    python3 build.py bench [...]           the benchmarks of llmbench itself; further arguments go to them
    python3 build.py charts                assets/echarts.min.js, made of the parts that the report draws with
    python3 build.py clean                 removes everything that this script made

Needs Python 3.7 or newer and, the first time, pip's package index: the tools are installed into .venv. `charts` needs
node, npm and npm's registry; its result is kept in the repository, so nothing else does.
The .pyz needs neither; it runs on Python 3.7 and newer, and starts faster on those that the build found on this machine
(on the PATH or from pyenv). The tests on another Python, in an environment of its own:

    LLMBENCH_VENV=.venv-3.7 python3.7 build.py test
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Iterable, Sequence

ROOT = Path(__file__).resolve().parent
PROGRAM = ROOT / "llmbench.py"
TARGET = ROOT / "dist" / "llmbench.pyz"
VENV = ROOT / os.environ.get("LLMBENCH_VENV", ".venv")
REQUIREMENTS = ROOT / "requirements-dev.txt"
SUPPORTED = ["3.7", "3.8", "3.9", "3.10", "3.11", "3.12", "3.13"]
ZIP_EPOCH = 315532800  # 1980-01-01: a zip archive can hold no older time
BENCHMARKS = ROOT / "tests" / "bench" / "run.py"
CHARTS = ROOT / "assets" / "echarts.min.js"
CHARTS_SOURCE = ROOT / "assets" / "echarts"  # which parts, and the tools' versions and hashes

# The two tools that make echarts.min.js: one bundles what is imported, the other makes it smaller by a further 5 %.
BUNDLE = [
    "node_modules/.bin/esbuild", "charts.js", "--bundle", "--format=iife", "--target=es2017", "--charset=ascii",
    "--legal-comments=none", '--define:process.env.NODE_ENV="production"', "--outfile=bundle.js",
]  # fmt: skip
MINIFY = [
    "node_modules/.bin/terser", "bundle.js", "--toplevel", "--mangle", "--compress",
    "passes=3,ecma=2017,pure_getters=true,unsafe_arrows=true", "--format", "ascii_only=true,ecma=2017",
    "--output", "minified.js",
]  # fmt: skip
CHARTS_HEADER = """\
/*! Apache ECharts %s, of which the parts named in assets/echarts/charts.js; changed only by bundling and minifying.
Copyright 2017-2026 The Apache Software Foundation. Licensed under the Apache License, Version 2.0.
Contains zrender (BSD-3-Clause), tslib (0BSD) and parts of d3 (BSD-3-Clause); see assets/licenses of llmbench. */
"""

# Test files whose verdict hangs on no time: they may run while others do. The browser sets its own priority.
TIMELESS = (
    "artifacts", "build", "commands", "compare", "dialects", "exchange", "exits", "http", "kubernetes", "load",
    "merge", "network", "providers", "registry", "report", "signing", "sse", "statistics", "structure",
    "terminal", "vocabulary", "workload",
)  # fmt: skip

# Runs the command of its arguments so that it gives way to whatever else wants the CPU. Linux shares the CPU between
# sessions first (sched(7), autogroup), so the idle class alone would count within its own session only: beside two
# processes that compress, a P99 of 0.2 ms of a client's read lag became 3 to 4 with it, and stays 0.2 with both.
YIELDING = """\
import contextlib, os, sys
with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as file:
    file.write("19")
if hasattr(os, "SCHED_IDLE"):
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
os.execv(sys.argv[1], sys.argv[1:])
"""

# The archive's __main__.py. It must parse on Python 2.7, or an old interpreter answers with a traceback instead of
# the line. Up to Python 3.8 the path of a running archive is relative: made absolute, assets are found after a chdir.
# zipimport compiles llmbench.py at every start, on 3.10 and newer twice, 0.1 s each; hence import_compiled. The module
# is the same either way: a zipimporter's, with the path of its source, so that tracebacks and inspect show lines.
# spec_from_loader would not do: it asks the zipimporter for the path, which compiles the source to tell it.
# At the end gc.freeze keeps the collector from searching all that is left before the process ends: 0.01 s.
MAIN = b"""\
# -*- coding: utf-8 -*-
import sys

if sys.version_info < (3, 7):
    sys.stderr.write(
        "llmbench: error: needs Python 3.7 or newer, this is Python %d.%d (%s); run it with a newer one\\n"
        % (sys.version_info[0], sys.version_info[1], sys.executable)
    )
    sys.exit(2)


def import_compiled(archive):
    # Puts llmbench in sys.modules, made of the code compiled for this interpreter, if the archive has that.
    import _imp
    import importlib.util
    import marshal
    import os
    import zipimport

    loader = zipimport.zipimporter(archive)
    try:
        data = loader.get_data(os.path.join("compiled", "%s.code" % sys.implementation.cache_tag))
    except OSError:
        return
    magic = importlib.util.MAGIC_NUMBER
    if data[: len(magic)] != magic:
        return
    source = os.path.join(archive, "llmbench.py")
    code = marshal.loads(data[len(magic) :])
    _imp._fix_co_filename(code, source)
    spec = importlib.util.spec_from_file_location("llmbench", source, loader=loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules["llmbench"] = module
    exec(code, module.__dict__)


if __name__ == "__main__":
    import gc
    import os

    sys.path[0] = os.path.abspath(sys.path[0])
    try:
        import_compiled(sys.path[0])
        import llmbench
    except KeyboardInterrupt:
        sys.exit(130)
    status = llmbench.main()
    gc.freeze()
    sys.exit(status)
"""

# Compiles the source on its standard input, on the interpreter that is to run it. Marshal's version 2 knows no
# references: which objects of versions 3 and 4 are references depends on what else the interpreter happens to hold.
COMPILE = """\
import importlib.util, marshal, sys

code = compile(sys.stdin.buffer.read(), "llmbench.py", "exec", dont_inherit=True, optimize=0)
tag = sys.implementation.cache_tag.encode()
sys.stdout.buffer.write(tag + b"\\n" + importlib.util.MAGIC_NUMBER + marshal.dumps(code, 2))
"""
# -S: no site-packages, so nothing but the interpreter's own; the option leaves out the columns, a third of the size.
COMPILE_OPTIONS = ["-S", "-X", "no_debug_ranges"]

# What `test` runs before the tests. vermin finds what ruff does not, library calls newer than the floor. Annotations
# are never evaluated, and below 3.8 llmbench brings its own quantiles. It takes some bytes for Python 2's text, and
# would then find no floor at all.
CHECKS = {
    "ruff check": ["ruff", "check", "."],
    "vermin": ["vermin", "-t=3.7-", "--no-tips", "--violations", "--exclude", "statistics.quantiles",
               "--exclude", "str.decode", "llmbench.py"],
}  # fmt: skip


class BuildError(Exception):
    """What is wrong and what to do, in one line."""


# The tools: a virtual environment beside this file, made when missing and filled again when the requirements change.


def venv_program(name: str) -> Path:
    """The path of a program of the virtual environment."""
    return VENV / "Scripts" / (name + ".exe") if os.name == "nt" else VENV / "bin" / name


def in_venv() -> bool:
    """Whether this process runs on the virtual environment's Python."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def prepare_venv() -> None:
    """Makes .venv hold exactly what requirements-dev.txt asks for; costs nothing when it does already."""
    stamp = VENV / "requirements.sha256"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if venv_program("python").exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    print("installing the tools into .venv", flush=True)
    if subprocess.call([sys.executable, "-m", "venv", "--clear", str(VENV)]) != 0:
        raise BuildError("python -m venv failed; on Debian and Ubuntu install python3-venv, or name another python3")
    install = [str(venv_program("python")), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.call([*install, "-r", str(REQUIREMENTS)]) != 0:
        raise BuildError("pip could not install requirements-dev.txt; see its message above")
    stamp.write_text(wanted)


def run_in_venv(arguments: list[str]) -> int:
    """Runs this script again on the virtual environment's Python; gives its exit status."""
    prepare_venv()
    return subprocess.call([str(venv_program("python")), str(Path(__file__).resolve()), *arguments])


# The archive. shiv's own bootstrap unpacks itself into the home directory before it runs, which a locked-down host may
# not allow; so shiv's builder writes the archive, and our own __main__.py runs it in place.


def version() -> str:
    """llmbench's version, read without running it."""
    found = re.search(r'^__version__ = "([^"]+)"', PROGRAM.read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        raise BuildError('llmbench.py has no line __version__ = "…"; add it')
    return found.group(1)


def contents() -> dict[str, bytes]:
    """Everything that goes into the archive: name -> bytes, sorted by name."""
    assets = [path for path in (ROOT / "assets").rglob("*") if path.is_file() and is_asset(path)]
    files = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in [PROGRAM, ROOT / "LICENSE", *assets]}
    files["__main__.py"] = MAIN
    compile_source = functools.partial(compile_program, source=files["llmbench.py"])
    with concurrent.futures.ThreadPoolExecutor() as pool:  # the work is done by other processes
        files.update(pool.map(compile_source, find_interpreters(SUPPORTED).values()))
    return dict(sorted(files.items()))


def is_asset(path: Path) -> bool:
    """Whether a file under assets/ belongs to the program: no dot files, editors' copies, bytecode, charts' source."""
    names = path.relative_to(ROOT).parts
    if CHARTS_SOURCE in path.parents:
        return False
    return not any(name.startswith(".") or name == "__pycache__" for name in names) and not path.name.endswith("~")


def find_interpreters(versions: Sequence[str]) -> dict[str, str]:
    """Those of these Pythons that start on this machine, "3.7" -> path; of two alike always the same one."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates = sorted(str(path) for path in pyenv.glob("versions/*/bin/python"))
    candidates += filter(None, (shutil.which("python" + version) for version in versions))
    found: dict[str, str] = {}
    for path in [*candidates, sys.executable]:  # one may be a shim that starts nothing: only an answer counts
        question = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(question, check=False, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if answer.returncode == 0:
            found.setdefault(answer.stdout.decode().strip(), path)
    return {version: found[version] for version in versions if version in found}


def compile_program(python: str, source: bytes) -> tuple[str, bytes]:
    """The archive's entry, name and bytes, of llmbench.py compiled by a Python: the same bytes in any environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONHASHSEED"] = "0"  # up to 3.10 the order of a frozenset in compiled code follows it
    command = [python, *COMPILE_OPTIONS, "-c", COMPILE]
    done = subprocess.run(command, check=False, input=source, capture_output=True, env=environment)
    if done.returncode != 0:
        raise BuildError(f"{python} can't compile llmbench.py: {done.stderr.decode(errors='replace').strip()[-300:]}")
    tag, _, code = done.stdout.partition(b"\n")
    return f"compiled/{tag.decode()}.code", code


def describe_compiled(found: Iterable[str]) -> str:
    """The line that says which Pythons the archive holds compiled code for, and which it does not."""
    inside = list(found)
    missing = [version for version in SUPPORTED if version not in inside]
    slower = f"; not found on this machine, so slower to start: {', '.join(missing)}" if missing else ""
    return f"compiled for Python {', '.join(inside) or 'none'}{slower}"


def pack(target: Path) -> None:
    """Writes the archive: the same bytes from the same sources, whatever the clock, the file modes or the umask.

    It is written beside the target and then put in its place: whoever runs or copies it never sees half of it.
    """
    from shiv import builder

    date_time = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", ZIP_EPOCH)))[:6]
    draft = target.with_name(f"{target.name}.{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with draft.open("wb") as file:
            builder.write_file_prefix(file, "/usr/bin/env python3")
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in contents().items():
                    builder.write_to_zipapp(archive, name, data, date_time, zipfile.ZIP_DEFLATED)
        draft.chmod(0o755)
        draft.replace(target)
    finally:
        if draft.exists():
            draft.unlink()


# The commands. Each gets the arguments that are not this script's own and gives an exit status.


def build() -> int:
    """Builds dist/llmbench.pyz and says what it is."""
    if not PROGRAM.exists():
        raise BuildError("llmbench.py is not beside build.py; run it from a whole checkout")
    pack(TARGET)
    data = TARGET.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    print(f"{TARGET.relative_to(ROOT)}: llmbench {version()}, {len(data):,} bytes, sha256 {digest}")
    print(describe_compiled(find_interpreters(SUPPORTED)), flush=True)
    return 0


def run_tools(commands: dict[str, list[str]]) -> int:
    """Runs programs of the virtual environment one after the other, all of them; the first status that is not 0."""
    statuses = []
    for name, (program, *arguments) in commands.items():
        statuses.append(subprocess.call([str(venv_program(program)), *arguments], cwd=str(ROOT)))
        print(f"{name}: {'failed' if statuses[-1] else 'passed'}", flush=True)
    return next(filter(None, statuses), 0)


def run_tests(selected: list[str]) -> int:
    """All tests in two processes: those that measure no time run beside the others, with what they leave of the CPU."""
    command = [sys.executable, "-m", "pytest", *selected]
    calm = [f"tests/test_{name}.py" for name in TIMELESS]
    with tempfile.TemporaryFile() as output:
        beside = subprocess.Popen(
            [sys.executable, "-c", YIELDING, *command, "-q", "-p", "no:cacheprovider", *calm],
            cwd=str(ROOT), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            tested = subprocess.call([*command, *(f"--ignore={path}" for path in calm)], cwd=str(ROOT))
            beside.wait()
        finally:
            if beside.poll() is None:
                beside.terminate()
                beside.wait()
        output.seek(0)
        print("\nThe tests that measure no time:\n" + output.read().decode("utf-8", "replace"), flush=True)
    return tested or beside.returncode


def test(arguments: list[str], long: bool, exhaustive: bool = False) -> int:
    """Lint, version floor, build, tests. A failed check does not keep the tests from running, and is not forgotten."""
    checked = run_tools(CHECKS)
    built = build()
    left_out = "not exhaustive" if long else "not long and not exhaustive"
    selected = [] if exhaustive else ["-m", left_out]
    if arguments:
        tested = subprocess.call([sys.executable, "-m", "pytest", *selected, *arguments], cwd=str(ROOT))
    else:
        tested = run_tests(selected)
    if checked and not tested:
        print("the tests passed, a check before them failed", file=sys.stderr)
    return tested or checked or built


def bench(arguments: list[str]) -> int:
    """Builds, then runs the benchmarks of llmbench itself."""
    if not BENCHMARKS.exists():
        raise BuildError(f"{BENCHMARKS.relative_to(ROOT)} is missing; there is nothing to run")
    return build() or subprocess.call([sys.executable, str(BENCHMARKS), *arguments], cwd=str(ROOT))


def make_charts() -> bytes:
    """The text of echarts.min.js, made in a directory of its own by the tools that the lock file names."""
    if not shutil.which("npm"):
        raise BuildError("npm is needed to build the charts; install node with npm")
    with tempfile.TemporaryDirectory() as directory:
        for source in CHARTS_SOURCE.iterdir():
            shutil.copy(str(source), directory)
        for command in (["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], BUNDLE, MINIFY):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            done = subprocess.run(command, cwd=directory, timeout=300, check=False, **pipes)
            if done.returncode:
                raise BuildError(f"{command[0]} failed:\n{done.stdout.decode('utf-8', 'replace')[-2000:]}")
        package = Path(directory, "node_modules", "echarts", "package.json").read_text(encoding="utf-8")
        script = Path(directory, "minified.js").read_text(encoding="ascii")
    return (CHARTS_HEADER % json.loads(package)["version"] + script.strip() + "\n").encode("ascii")


def charts() -> int:
    """Builds echarts.min.js and says what its row in assets/VENDORED.md has to hold."""
    data = make_charts()
    CHARTS.write_bytes(data)
    print(f"{CHARTS.relative_to(ROOT)}: {len(data):,} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    print("write the sha256 into assets/VENDORED.md")
    return 0


def clean() -> int:
    """Removes what this script and its tools made; results of runs are the user's and stay."""
    made = [*ROOT.glob(".venv*"), TARGET.parent, ROOT / ".pytest_cache", ROOT / ".ruff_cache", ROOT / "__pycache__"]
    for path in [*made, *(ROOT / "tests").rglob("__pycache__")]:
        shutil.rmtree(str(path), ignore_errors=True)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line; what it does not know belongs to pytest or the benchmarks."""
    command_line = argparse.ArgumentParser(
        prog="build.py",
        usage=argparse.SUPPRESS,
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_argument(
        "command",
        nargs="?",
        default="build",
        choices=["build", "test", "bench", "charts", "clean"],
        help=argparse.SUPPRESS,
    )
    command_line.add_argument("--long", action="store_true", help="with test: the long tests too")
    command_line.add_argument("--exhaustive", action="store_true", help="with test: all tests there are")
    return command_line


def main(arguments: list[str]) -> int:
    """Runs one command; everything but clean runs on the virtual environment's Python."""
    options, further = parser().parse_known_args(arguments)
    if further and options.command not in ("test", "bench"):
        parser().error(f"unknown argument: {further[0]}")
    if options.command == "clean":
        return clean()
    if not in_venv():
        return run_in_venv(arguments)
    commands = {
        "build": build,
        "test": lambda: test(further, options.long, options.exhaustive),
        "bench": lambda: bench(further),
        "charts": charts,
    }
    return commands[options.command]()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BuildError as error:
        print(f"build.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
