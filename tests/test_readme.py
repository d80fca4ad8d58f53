"""README.md says what the program does: flags, definitions and statuses stand in it word for word, its first command
works as printed, and its example provider is one.

Its tables between `<!-- NAME -->` and `<!-- /NAME -->` are made from the program's own:
`PYTHONPATH=. python3 tests/test_readme.py` writes them anew.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterable

import pytest
from running import expected_status
from servers import CLOSED, measure_one, says

import llmbench
from conftest import ROOT

README = ROOT / "README.md"
FOUR_FILES = ["report.html", "results.csv", "results.jsonl", "summary.json"]
OTHER_COMMANDS_FLAGS = {"--explain", "--fail-if", "--help", "--host", "--json", "--port", "--redact", "--version"}
OTHER_PROGRAMS_FLAGS = {  # not ours
    "--rm", "--network", "--user", "--platform", "--long", "--exhaustive", "--from-file",
}


def readme() -> str:
    return README.read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading, to the next one of its level."""
    found = re.search(r"^## %s\n(.*?)(?=^## |\Z)" % re.escape(title), readme(), re.MULTILINE | re.DOTALL)
    assert found, "README.md has no section %r" % title
    return found.group(1)


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(r"^```%s\n(.*?)^```$" % language, text, re.MULTILINE | re.DOTALL)


def first_column(text: str) -> list[str]:
    """The code words that begin the rows of the tables in a text."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


# Tables made from the program's own.


def cell(text: str) -> str:
    """Text as Markdown shows it literally; what stands in backticks does so already."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("$", "&#36;") for part in parts[::2]]
    return "`".join(parts).replace("|", "\\|")


def table(columns: str, rows: Iterable[Iterable[str]]) -> str:
    heads = columns.split(",")
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| %s |" % " | ".join(line) for line in lines)


def flag_rows() -> list[list[str]]:
    def written(flag: llmbench.Flag) -> str:
        return cell("`--%s`" % flag.name + " `%s`" % flag.value * bool(flag.value))

    return [[written(flag), cell(flag.default), cell(flag.meaning)] for flag in llmbench.RUN_FLAGS]


def default_text(value: Any) -> str:
    """A mock option's default as one would write it in a URL."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "%g" % value if isinstance(value, (bool, int, float)) else value


def mock_rows() -> list[list[str]]:
    fields = llmbench.MOCK_FIELDS.values()
    return [
        [
            "`%s`" % field.name,
            default_text(field.default),
            cell(field.metadata["wanted"]),
            cell(field.metadata["meaning"]),
        ]
        for field in fields
    ]


def metric_rows() -> list[list[str]]:
    metrics = llmbench.METRICS.values()
    return [["`%s`" % metric.name, metric.label, metric.unit, cell(metric.definition)] for metric in metrics]


def status_rows() -> list[list[str]]:
    return [["`%s`" % name, cell(meaning)] for name, meaning in llmbench.STATUSES.items()]


def scheme_rows() -> list[list[str]]:
    flags = {"token": "`--token`", "key": "`--auth-key`", "secret": "`--auth-secret`"}
    return [
        ["`%s`" % name, cell(scheme.summary), ", ".join(flags[need] for need in scheme.needs),
         "; ".join("`%s`: %s" % (option, cell(meaning)) for option, meaning in scheme.options.items())]
        for name, scheme in llmbench.AUTHS.items()
    ]  # fmt: skip


def provider_rows() -> list[list[str]]:
    rows = []
    for name in llmbench.PROVIDERS:
        provider, form = llmbench.bare_provider(name), llmbench.form_of(name)
        scheme = form.auth if form is not None else llmbench.Provider.auth
        ends = ", ".join("`%s`" % end for end in provider.end.split(" or ")) or "a clean end of the body"
        said = cell(provider.summary) + " *untested*" * provider.untested
        rows.append(["`%s`" % name, said, cell("`%s`" % provider.path), "`%s`" % scheme, ends])
    return rows


def step_rows() -> list[list[str]]:
    return [[cell("`%s%s`" % (name, function.form)), cell(function.says)] for name, function in FUNCTIONS]


FUNCTIONS = llmbench.FUNCTIONS.items()
TABLES: dict[str, Callable[[], str]] = {
    "providers": lambda: table("provider,what it speaks,path,auth,end", provider_rows()),
    "schemes": lambda: table("scheme,what it is,needs,options", scheme_rows()),
    "steps": lambda: table("function,value", step_rows()),
    "flags": lambda: table("flag,default,meaning", flag_rows()),
    "mock": lambda: table("option,default,value,meaning", mock_rows()),
    "metrics": lambda: table("metric,in the report,unit,definition", metric_rows()),
    "statuses": lambda: table("status,meaning", status_rows()),
}


def marked(name: str) -> re.Pattern[str]:
    """What stands between the marks of a table."""
    return re.compile("(?<=<!-- %s -->\n)\n.*?\n(?=\n<!-- /%s -->)" % (name, name), re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_says_what_the_program_says(name: str) -> None:
    found = marked(name).search(readme())
    assert found, "README.md has no table between <!-- %s --> and <!-- /%s -->" % (name, name)
    assert found.group().strip() == TABLES[name]()


def test_a_flag_that_is_named_anywhere_exists() -> None:
    own = [flag.name for flag in llmbench.RUN_FLAGS] + [name.replace("_", "-") for name in llmbench.MOCK_FIELDS]
    known = {"--" + name for name in own} | OTHER_COMMANDS_FLAGS | OTHER_PROGRAMS_FLAGS
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", readme()))
    assert named - known == set()
    assert {"--url", "--out"} <= named, "the pattern finds flags"


def test_every_record_key_is_explained_in_the_order_of_the_file() -> None:
    assert first_column(section("results.jsonl")) == list(llmbench.Record.__dataclass_fields__)


def test_the_readmes_gateway_is_the_example_and_every_key_is_explained() -> None:
    text = section("A gateway of your own")
    source = llmbench.builtin_source("example-signed-headers").decode("utf-8")
    assert code_blocks(text, "json") == [source] and source.count("\n") < 40
    asked, read = text.split("### What comes back")
    explained = re.findall(r"`([a-z_]+)`", " ".join(re.findall(r"^\| (`[^|]*) \|", asked + read, re.MULTILINE)))
    assert set(llmbench.FORM_KEYS) - set(explained) == set()
    placeholders = {name.strip("${}") for name in re.findall(r"`(\$\{[a-z_]+\})`", asked)}
    assert set(llmbench.PLACEHOLDERS) | {"key", "token"} == placeholders
    words = {*llmbench.TESTS, *llmbench.TEXT_MODES, *llmbench.USAGE_MERGES, *llmbench.COUNTS}
    assert set(re.findall(r"`([a-z_]+)`", read)) >= words


def test_the_readmes_mistakes_are_told_so() -> None:
    source = llmbench.builtin_source("example-signed-headers").decode("utf-8")
    spoilt = [("text\": \"res", "txet\": \"res"), ("${model}", "${modle}"), (', "equals": true', "")]
    told = []
    for good, bad in spoilt:
        with pytest.raises(llmbench.UserError) as refused:
            llmbench.parse_form(source.replace(good, bad, 1).encode(), "gateway.json")
        told.append("llmbench: error: %s\n" % refused.value)
    assert "".join(told) in section("A gateway of your own")


def test_what_the_readme_shows_of_a_provider_is_printed(capsys: pytest.CaptureFixture) -> None:
    [shown] = code_blocks(section("Providers"), "console")
    assert llmbench.main(["providers", "triton"]) == 0
    assert shown.split("\n", 1)[1] == capsys.readouterr().out


def test_every_fault_of_the_mock_is_explained() -> None:
    assert first_column(section("Other commands").split("faults:")[1]) == list(llmbench.MOCK_FAULTS)


def test_every_command_and_provider_is_named() -> None:
    text = section("Other commands")
    missing = [name for name in llmbench.COMMANDS if name != "run" and "`llmbench.pyz %s" % name not in text]
    missing += [name for name in llmbench.PROVIDERS if "`%s`" % name not in text]
    assert missing == [], "not named in the README's section Other commands"


def test_the_exit_statuses_are_those_of_help() -> None:
    promised = llmbench.run_parser().format_help().split("exit status: ")[1]
    assert first_column(section("Exit status")) == re.findall(r"\b[0-9]+\b", promised)


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", readme(), re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", readme()):
        assert target in anchors or target.startswith("https://") or (ROOT / target).exists(), target


# The commands as a reader types them.


def copied(programs: list[str], place: Path) -> list[str]:
    """The start of a command line on a copy of the program: its own files, or the archive with nothing beside it."""
    python, program = programs
    shutil.copy(program, str(place))
    if program.endswith(".py"):
        shutil.copytree(str(ROOT / "assets"), str(place / "assets"))
    return [python, Path(program).name]


def first_mock_command() -> list[str]:
    """The arguments of the first `run --url mock:` in a code block."""
    lines = "".join(code_blocks(readme(), "sh")).splitlines()
    command = next(line for line in lines if " run --url mock:" in line)
    words = shlex.split(command, comments=True)
    assert words[:2] == ["python3", "llmbench.pyz"]
    return words[2:]


def test_the_first_command_leaves_the_four_files(programs: list[str], tmp_path: Path) -> None:
    arguments = first_mock_command()
    command = [*copied(programs, tmp_path), *arguments]
    done = subprocess.run(command, cwd=str(tmp_path), capture_output=True, timeout=60)
    directory = tmp_path / arguments[arguments.index("--out") + 1]
    assert sorted(path.name for path in directory.iterdir()) == FOUR_FILES, done.stderr.decode()
    assert done.returncode == expected_status(json.loads((directory / "summary.json").read_text("utf-8")))
    assert all(path.stat().st_size for path in directory.iterdir())


def test_every_run_command_is_one_that_run_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed as the program would; `…` stands for what the reader has to fill in."""
    monkeypatch.setenv("LLMBENCH_TOKEN", "secret")
    text = "".join(code_blocks(readme(), "sh")).replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if " run --url " in line]
    for words in commands:
        llmbench.read_config(words[words.index("--url") :])
    assert len(commands) > 3


# The provider that a reader is to write.


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> str:
    """Registers the README's example provider as if it stood in llmbench.py; gives its sample stream."""
    text = section("How to add a provider")
    (source,) = code_blocks(text, "python")
    (stream,) = code_blocks(text, "text")
    monkeypatch.setattr(llmbench, "PROVIDERS", dict(llmbench.PROVIDERS))
    exec(compile(source, str(README), "exec"), dict(vars(llmbench)))
    return stream


def test_the_example_provider_makes_a_request(acme: str) -> None:
    config = llmbench.Config(url="http://host:8000", provider="acme", model="m", token="secret", body={"seed": 1})
    provider = llmbench.make_provider(config)
    endpoint = llmbench.parse_url(config.url, provider)
    prompt = llmbench.Prompt("p", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], 7)
    request = provider.request(prompt, endpoint, "run-0-0", provider.dialect)
    assert request.target == "/api/generate"
    expected = {"model": "m", "input": "Be brief.\nHi", "limit": 7, "stream": True, "seed": 1}
    assert llmbench.parse_json(request.body) == expected
    headers = dict(request.headers)
    assert headers["Host"] == "host:8000"
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Length"] == str(len(request.body))


def test_the_example_provider_reads_its_sample_stream(acme: str) -> None:
    provider = llmbench.make_provider(llmbench.Config(provider="acme"))
    decoder = provider.decoder()
    events = provider.events().feed(acme.encode() + b"\n")
    frames = [frame for event in events for frame in decoder.frames(event)]
    assert frames == [
        llmbench.Frame("content", "Hel"),
        llmbench.Frame("content", "lo"),
        llmbench.Frame("usage", "", {"in_tokens": 12, "out_tokens": 2}),
        llmbench.Frame("end", "stop"),
    ]
    assert decoder.frames(("message", b'{"error":"no such model"}')) == [llmbench.Frame("error", "no such model")]
    with pytest.raises(llmbench.ParseError):
        decoder.frames(("message", b"[1]"))


def test_the_example_provider_measures(acme: str) -> None:
    record = measure_one(says(CLOSED + acme.encode() + b"\n", then="close"), provider="acme")
    assert (record["status"], record["out_tokens"], record["out_chars"]) == ("ok", 2, 5)
    assert 0 < record["ttft_ms"] <= record["latency_ms"]
    record = measure_one(says(CLOSED + acme.split("\n\n")[0].encode() + b"\n\n", then="close"), provider="acme")
    assert record["status"] == "truncated", "its end is required"


def write_tables() -> None:
    """Makes the tables of README.md anew."""
    text = readme()
    for name, make in TABLES.items():
        text = marked(name).sub(lambda _, make=make: "\n" + make() + "\n", text)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(write_tables())
