"""The archive, the image and what is shipped with them: does it run where nothing may be installed or written?"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, Callable

import pytest

import build
import llmbench
from conftest import ROOT, SUPPORTED, TOO_OLD, interpreter


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in an environment of the PATH and these variables alone."""
    variables = {"PATH": os.environ["PATH"], "PYTHONIOENCODING": "utf-8", **environment}
    pipe = subprocess.PIPE
    return subprocess.run(command, cwd=str(cwd), env=variables, stdout=pipe, stderr=pipe, text=True, timeout=60)


# The archive


def pack(target: Path, umask: int, cwd: Path, **environment: str) -> str:
    """Packs an archive in a process of its own; gives its sha256."""
    script = "import os, sys; from pathlib import Path; import build; os.umask({}); build.pack(Path(sys.argv[1]))"
    done = run([sys.executable, "-c", script.format(umask), str(target)], cwd, PYTHONPATH=str(ROOT), **environment)
    assert done.returncode == 0, done.stderr
    return hashlib.sha256(target.read_bytes()).hexdigest()


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    first = pack(tmp_path / "first.pyz", 0o022, ROOT, PYTHONHASHSEED="1", LC_ALL="C")
    second = pack(tmp_path / "second.pyz", 0o077, tmp_path, PYTHONHASHSEED="2", LC_ALL="C.UTF-8", PYTHONOPTIMIZE="2")
    assert first == second
    assert stat.S_IMODE((tmp_path / "second.pyz").stat().st_mode) == 0o755, "the umask must not make it unreadable"


def test_a_failed_build_leaves_the_old_archive_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "llmbench.pyz"
    target.write_bytes(b"old")
    monkeypatch.setattr(build, "contents", lambda: {"llmbench.py": None})
    with pytest.raises(TypeError):
        build.pack(target)
    assert [path.name for path in tmp_path.iterdir()] == ["llmbench.pyz"]
    assert target.read_bytes() == b"old"


def test_the_archive_holds_the_program_its_assets_and_the_licences(pyz: Path) -> None:
    hidden = re.compile(r"(^|/)(\.|__pycache__)|~$|^assets/echarts/")  # what builds the charts stays behind
    assets = [path.relative_to(ROOT).as_posix() for path in (ROOT / "assets").rglob("*") if path.is_file()]
    with zipfile.ZipFile(str(pyz)) as archive:
        names = archive.namelist()
        assert archive.read("llmbench.py") == (ROOT / "llmbench.py").read_bytes()
    compiled = [f"compiled/cpython-{version.replace('.', '')}.code" for version in build.find_interpreters(SUPPORTED)]
    shown = [name for name in assets if not hidden.search(name)]
    assert names == sorted(["LICENSE", "__main__.py", "llmbench.py", *compiled, *shown])
    assert {"assets/licenses/echarts-LICENSE", "assets/licenses/zrender-LICENSE"} <= set(names)


def test_the_archive_can_be_executed_by_its_path(pyz: Path, tmp_path: Path) -> None:
    assert pyz.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert run([str(pyz), "--version"], tmp_path).stdout.strip() == f"llmbench {llmbench.__version__}"


@pytest.mark.parametrize("version", SUPPORTED)
def test_it_runs_on_every_supported_python(version: str, pyz: Path, tmp_path: Path) -> None:
    done = run([interpreter(version), str(pyz), "--version"], tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, f"llmbench {llmbench.__version__}", "")


@pytest.mark.parametrize("version", TOO_OLD)
def test_an_older_python_is_refused_in_one_line(version: str, pyz: Path, tmp_path: Path) -> None:
    done = run([interpreter(version), str(pyz), "run", "--url", "mock:"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"llmbench: error: needs Python 3.7 or newer, this is Python {version} ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("version", ["3.7", "3.8", "3.13"])  # 3.8 is the last whose archive path is relative
@pytest.mark.parametrize("home", ["unset", "missing", "read-only"])
def test_it_needs_no_home_and_writes_nowhere(home: str, version: str, pyz: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "home").mkdir(mode=0o555)
    homes = {"unset": {}, "missing": {"HOME": "/nonexistent"}, "read-only": {"HOME": str(tmp_path / "home")}}
    archive = os.path.relpath(str(pyz), str(tmp_path / "elsewhere"))  # as typed at a prompt
    done = run([interpreter(version), archive, "providers"], tmp_path / "elsewhere", **homes[home])
    assert (done.returncode, done.stderr) == (0, "")
    assert "openai" in done.stdout
    assert not list((tmp_path / "elsewhere").iterdir()), "left something in the working directory"
    assert not list((tmp_path / "home").iterdir()), "left something in the home directory"


def test_a_module_of_the_same_name_on_the_path_is_not_run(pyz: Path, tmp_path: Path) -> None:
    (tmp_path / "llmbench.py").write_text("raise SystemExit('the wrong one')\n")
    done = run([sys.executable, str(pyz), "--version"], tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == f"llmbench {llmbench.__version__}", done.stderr


# The compiled code in the archive: the same program as its source, only sooner


def altered(pyz: Path, target: Path, alter: Callable[[str, bytes], bytes | None]) -> Path:
    """A copy of the archive: each entry is what `alter` makes of its name and bytes, or left out for None."""
    with zipfile.ZipFile(str(pyz)) as source, zipfile.ZipFile(str(target), "w") as copy:
        for name in source.namelist():
            data = alter(name, source.read(name))
            if data is not None:
                copy.writestr(name, data)
    return target


def without_source(name: str, data: bytes) -> bytes:
    return b"raise SystemExit('compiled the source')" if name == "llmbench.py" else data


def without_compiled(name: str, data: bytes) -> bytes | None:
    return None if name.startswith("compiled/") else data


def of_another_release(name: str, data: bytes) -> bytes:
    return b"\0\0\r\nnot marshal" if name.startswith("compiled/") else data


@pytest.mark.parametrize("version", SUPPORTED)
def test_the_compiled_code_is_what_runs(version: str, pyz: Path, tmp_path: Path) -> None:
    archive = altered(pyz, tmp_path / "altered.pyz", without_source)
    done = run([interpreter(version), str(archive), "--version"], tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, f"llmbench {llmbench.__version__}", "")


@pytest.mark.parametrize("version", ["3.7", "3.8", "3.13"])
@pytest.mark.parametrize("alter", [without_compiled, of_another_release])
def test_where_none_fits_the_source_runs(
    alter: Callable[[str, bytes], bytes | None], version: str, pyz: Path, tmp_path: Path
) -> None:
    done = run([interpreter(version), str(altered(pyz, tmp_path / "altered.pyz", alter)), "--version"], tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, f"llmbench {llmbench.__version__}", "")


# Runs an archive, then says in JSON what a user's own code, a traceback and a child process see of the module.
PROBE = """\
import inspect, json, multiprocessing, os, pickle, runpy, sys, traceback
archive = sys.argv[1]
sys.argv[1:] = ["--version"]
try:
    runpy.run_path(archive, run_name="__main__")
except SystemExit as end:
    status = end.code
sys.path.insert(0, archive)
os.chdir("/")
import llmbench
from llmbench import UserError
try:
    llmbench.read_asset(None)
except AttributeError:
    trace = traceback.format_exc()
child_statuses = []
for method in ("fork", "spawn"):
    child = multiprocessing.get_context(method).Process(target=llmbench.read_asset, args=("report.html",))
    child.start()
    child.join(30)
    child_statuses.append(child.exitcode)
spec = llmbench.__spec__
print(json.dumps({
    "status": status, "trace": trace, "child_statuses": child_statuses,
    "module": [llmbench.__name__, llmbench.__package__, llmbench.__file__, type(llmbench.__loader__).__name__],
    "spec": [spec.name, spec.origin, spec.loader is llmbench.__loader__, spec.submodule_search_locations],
    "code": [llmbench.main.__code__.co_filename, llmbench.read_asset.__code__.co_firstlineno],
    "source": inspect.getsource(llmbench.read_asset),
    "file": inspect.getsourcefile(llmbench.UserError),
    "pickled": pickle.loads(pickle.dumps(UserError)) is UserError,
    "asset": len(llmbench.read_asset("report.html")),
    "names": sorted(vars(llmbench)),
}))
"""


def seen_of_the_module(python: str, archive: Path, cwd: Path) -> dict[str, Any]:
    """What PROBE says of an archive, whose path is written as PYZ; less the marks under a traceback's columns."""
    done = run([python, "-c", PROBE, str(archive)], cwd)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1].replace(str(archive), "PYZ"))
    return {**seen, "trace": re.sub(r"(?m)^ +[~^]+\n", "", seen["trace"])}


@pytest.mark.parametrize("version", ["3.7", "3.8", "3.9", "3.10", "3.13"])
def test_the_compiled_module_is_that_of_the_source(version: str, pyz: Path, tmp_path: Path) -> None:
    seen = seen_of_the_module(interpreter(version), pyz, tmp_path)
    from_source = altered(pyz, tmp_path / "altered.pyz", without_compiled)
    assert seen == seen_of_the_module(interpreter(version), from_source, tmp_path)
    assert seen["module"] == ["llmbench", "", os.path.join("PYZ", "llmbench.py"), "zipimporter"]
    assert (seen["status"], seen["child_statuses"], seen["pickled"]) == (0, [0, 0], True)
    assert seen["asset"] == (ROOT / "assets" / "report.html").stat().st_size
    assert seen["source"].startswith("def read_asset(")
    assert re.search(r'File "PYZ.llmbench\.py", line \d+, in read_asset\n +return loader\.get_data\(', seen["trace"])


@pytest.mark.parametrize("version", SUPPORTED)
def test_compiling_gives_the_same_bytes_in_any_environment(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = b"shared = 'a b', 'a b'\ndef f(x): return x in {'json', 'path', 'sys', 'a', 'b', 'c', 1.5}\n"
    first = build.compile_program(interpreter(version), source)
    for name, value in {"PYTHONHASHSEED": "7", "PYTHONOPTIMIZE": "2", "LC_ALL": "C", "PYTHONUTF8": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert build.compile_program(interpreter(version), source) == first


def test_a_source_that_does_not_compile_fails_the_build() -> None:
    with pytest.raises(build.BuildError, match="SyntaxError"):
        build.compile_program(sys.executable, b"def")


def test_a_missing_interpreter_is_left_out_and_named() -> None:
    here = "%d.%d" % sys.version_info[:2]
    assert list(build.find_interpreters([here, "9.9"])) == [here]
    assert build.describe_compiled(SUPPORTED) == "compiled for Python " + ", ".join(SUPPORTED)
    assert build.describe_compiled(SUPPORTED[1:]).endswith("; not found on this machine, so slower to start: 3.7")


def test_the_startup_benchmark_prints_a_row_for_each_python(pyz: Path, tmp_path: Path) -> None:
    here = "%d.%d" % sys.version_info[:2]
    script = str(ROOT / "tests" / "bench" / "startup.py")
    done = run([sys.executable, script, "--archive", str(pyz), "--pairs", "1", "--python", here, "9.9"], tmp_path)
    assert done.returncode in (0, 1), done.stderr
    rows = [line.split()[0] for line in done.stdout.splitlines()]
    assert rows == ["llmbench.pyz,", "Python", here, "9.9"]


def processes_of(group: int) -> dict[int, str]:
    """The living processes of a process group and what each was started as."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile
            state, _, in_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(in_group) == group and state not in "ZX":
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
    return found


def wait_for(condition: Callable[[], bool]) -> bool:
    """Whether it holds within some seconds."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc")
@pytest.mark.parametrize("begun", [" mock ", " run "])
def test_a_benchmark_that_is_told_to_end_leaves_no_process_and_no_file(begun: str, tmp_path: Path) -> None:
    """As its server has just been started, and as the client runs."""
    command = [sys.executable, str(ROOT / "tests" / "bench" / "run.py"), "--mock", "--case", "slowed", "--program"]
    bench = subprocess.Popen(
        [*command, str(ROOT / "llmbench.py")], stdout=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    try:
        assert wait_for(lambda: any(begun in words for words in processes_of(bench.pid).values()))
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(20) == 128 + signal.SIGTERM
        assert wait_for(lambda: not processes_of(bench.pid)), processes_of(bench.pid)
        assert list(tmp_path.iterdir()) == []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(bench.pid, signal.SIGKILL)
        bench.wait()


# build.py's command line


@pytest.mark.parametrize("arguments", [["biuld"], ["--lnog"], ["clean", "all"]])
def test_a_mistyped_build_command_does_nothing(arguments: list[str]) -> None:
    done = run([sys.executable, str(ROOT / "build.py"), *arguments], ROOT)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_arguments_that_are_not_its_own_go_to_pytest_in_order() -> None:
    options, further = build.parser().parse_known_args(["test", "-k", "name", "--long", "tests/test_sse.py", "-x"])
    assert (options.command, options.long, further) == ("test", True, ["-k", "name", "tests/test_sse.py", "-x"])


@pytest.mark.parametrize(("planted", "found"), [("", 0), ("TAIL = 'abc'.removeprefix('a')\n", 1)])
def test_a_call_that_is_newer_than_the_floor_is_found(planted: str, found: int, tmp_path: Path) -> None:
    text = (ROOT / "llmbench.py").read_text(encoding="utf-8")
    (tmp_path / "llmbench.py").write_text(text + planted, encoding="utf-8")
    program, *arguments = build.CHECKS["vermin"]
    done = run([str(build.venv_program(program)), *arguments], tmp_path)
    assert done.returncode == found, done.stdout
    assert "Minimum required versions: 3." in done.stdout, "it must be able to tell"


def test_a_failed_check_fails_the_run_though_the_tests_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "run_tools", lambda commands: 3)
    monkeypatch.setattr(build, "build", lambda: 0)
    monkeypatch.setattr(build.subprocess, "call", lambda command, cwd: 0)
    monkeypatch.setattr(build, "run_tests", lambda selected: 0)
    assert build.test([], long=False) == build.test(["-x"], long=False) == 3


@pytest.mark.parametrize(("main", "beside"), [(0, 0), (1, 0), (0, 1)])
def test_all_tests_run_once_in_two_processes_and_either_may_fail(
    main: int, beside: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tests").mkdir()
    names = sorted(path.stem[len("test_") :] for path in (ROOT / "tests").glob("test_*.py"))
    assert set(build.TIMELESS) < set(names)
    for name in names:
        failing = name == ("sse" if beside else "runner" if main else "")
        said = f"def test_{name}():\n    assert {not failing}\n"
        (tmp_path / "tests" / f"test_{name}.py").write_text(said, encoding="utf-8")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build.run_tests([]) == (main or beside)
    counts = [int(count) for count in re.findall(r"(\d+) passed", capfd.readouterr().out)]
    assert sum(counts) == len(names) - main - beside and len(counts) == 2


# The image


def find_hadolint() -> str | None:
    """A Dockerfile linter, where one is installed."""
    return shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))


def test_the_dockerfile_has_no_lint() -> None:
    hadolint = find_hadolint()
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    done = run([hadolint, "Dockerfile"], ROOT)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_not_root_and_needs_no_shell() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    steps = dict(line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", steps["USER"]), "a name: who starts it cannot tell that it is not root"
    for step in ("ENTRYPOINT", "CMD"):
        assert isinstance(json.loads(steps[step]), list), f"{step} in shell form; the base has no shell"
    assert "RUN" not in steps, "would need emulation to build for the other architecture"


def test_the_build_context_is_the_archive_alone() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["*", "!dist/llmbench.pyz"]


# What others wrote, and what must not leave this machine


def vendored() -> dict[str, str]:
    """The table of assets/VENDORED.md: file -> sha256."""
    text = (ROOT / "assets" / "VENDORED.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| (\S+) \|.*\| ([0-9a-f]{64}) \|$", text, re.MULTILINE))


def test_vendored_files_are_as_they_were_taken() -> None:
    actual = {name: hashlib.sha256((ROOT / "assets" / name).read_bytes()).hexdigest() for name in vendored()}
    assert actual == vendored()


def test_every_vendored_file_is_in_the_table() -> None:
    licences = {path.relative_to(ROOT / "assets").as_posix() for path in (ROOT / "assets" / "licenses").iterdir()}
    assert set(vendored()) == licences | {"echarts.min.js"}


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("npm"), reason="npm is not there to build the charts with")
def test_the_charts_are_what_their_source_builds() -> None:
    try:
        built = build.make_charts()
    except build.BuildError as error:
        if "npm failed" not in str(error):
            raise
        pytest.skip("npm could not fetch the tools: " + str(error).splitlines()[-1])
    assert built == build.CHARTS.read_bytes(), "run `python3 build.py charts`"


def test_the_lock_file_names_no_host() -> None:
    lock = json.loads((build.CHARTS_SOURCE / "package-lock.json").read_text(encoding="utf-8"))
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert "node_modules/echarts" in packages
    assert all("integrity" in package and "resolved" not in package for package in packages.values())


@pytest.mark.parametrize("language", ["en", "zh"])
def test_built_in_prompts_are_many_different_and_clean(language: str) -> None:
    prompts = (ROOT / "assets" / "prompts" / f"{language}.txt").read_text(encoding="utf-8").splitlines()
    assert len(prompts) == len(set(prompts)) >= 40
    assert all(prompt and prompt == prompt.strip() for prompt in prompts)


MUST_NOT_LEAVE = {
    "a package registry": re.compile(r"pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|deb\.debian\.org"),
    "a path of one machine": re.compile(r"(?<![\w.$}/-])/(?:[r]oot|[w]ork|[h]ome/\w+)(?![\w-])"),
}


def leaks(text: str) -> list[str]:
    """What in a text belongs to the machine it was written on."""
    return [f"{what}: {found.group()}" for what, pattern in MUST_NOT_LEAVE.items() for found in pattern.finditer(text)]


def project_files() -> list[Path]:
    """The tracked files, or all of them outside a git checkout, less what others wrote."""
    listing = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    names = listing.stdout.split("\0") if listing.returncode == 0 else []
    found = [ROOT / name for name in names if name] or [ROOT / "build.py", *(ROOT / "tests").rglob("*.py")]
    others = {ROOT / "assets" / name for name in vendored()}
    return [path for path in found if path.is_file() and path not in others]


def test_no_registry_and_no_path_of_one_machine_is_in_the_project() -> None:
    found = {}
    for path in project_files():
        try:
            problems = leaks(path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError:
            continue
        if problems:
            found[str(path.relative_to(ROOT))] = problems
    assert found == {}


@pytest.mark.parametrize(
    ("text", "leaking"),
    [
        ("open('/{}/x')", "root"),
        ("cd /{}/main", "work"),
        ("--ca-cert=/{}", "home/someone/ca.pem"),
        ("https://files.python{}/", "hosted.org"),
        ("http://host/{}/", "work"),
        ("ROOT / 'a/{}'", "root"),
        ("/{}er/llm", "work"),
    ],
)
def test_the_search_for_leaks_finds_them_and_nothing_else(text: str, leaking: str) -> None:
    harmless = text.startswith(("http://host", "ROOT", "/{}er"))
    assert bool(leaks(text.format(leaking))) is not harmless
