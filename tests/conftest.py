"""What several test files need: the programs under test, and the Python interpreters of this machine."""

from __future__ import annotations

import functools
import os
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from certificates import Authority

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = ["3.7", "3.8", "3.9", "3.10", "3.11", "3.12", "3.13"]
TOO_OLD = ["2.7", "3.6"]


@functools.lru_cache(maxsize=None)
def find_interpreters() -> dict[str, str]:
    """Every Python that SUPPORTED or TOO_OLD names and that starts on this machine: "3.7" -> path."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    candidates = [str(path) for path in pyenv.glob("versions/*/bin/python")]
    candidates += filter(None, (shutil.which("python" + version) for version in SUPPORTED + TOO_OLD))
    candidates.append(sys.executable)
    found: dict[str, str] = {}
    for path in candidates:  # a name on the PATH may be a shim that starts nothing: only an answer counts
        question = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(question, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if answer.returncode == 0:
            found.setdefault(answer.stdout.decode().strip(), path)
    return found


def interpreter(version: str) -> str:
    """The path of that Python; skips the test, saying so, where there is none."""
    path = find_interpreters().get(version)
    if path is None:
        pytest.skip(f"no Python {version} on this machine")
    return path


@pytest.fixture(scope="session")
def pyz() -> Path:
    """dist/llmbench.pyz, built anew when a source is newer."""
    target = ROOT / "dist" / "llmbench.pyz"
    sources = [ROOT / "llmbench.py", ROOT / "build.py", ROOT / "LICENSE", *(ROOT / "assets").rglob("*")]
    if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        subprocess.run([sys.executable, str(ROOT / "build.py")], check=True, stdout=subprocess.DEVNULL)
    return target


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A certificate authority of the tests' own."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl here to make certificates with")
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def good_tls(authority: Authority) -> ssl.SSLContext:
    """Of a server whose certificate is for this host and signed by that authority."""
    return authority.server_side()


@pytest.fixture(params=["checkout", "pyz"])
def programs(request: pytest.FixtureRequest, pyz: Path) -> list[str]:
    """The start of a command line: a test that takes this runs twice, with the checkout and with the archive."""
    return [sys.executable, str(ROOT / "llmbench.py" if request.param == "checkout" else pyz)]
