"""What leaves the house: summary.md, junit.xml, archives, and the files of earlier versions of the format."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tracemalloc
import xml.etree.ElementTree as ElementTree
import zlib

import pytest
from made_records import header, loaded_run, loaded_stage, made_run, record, write_lines

import llmbench
from conftest import ROOT

ASSETS = llmbench.load_assets()
PAGE = llmbench.read_page(ASSETS)
FORMATS = ROOT / "tests" / "formats"
FIGURES = json.loads((FORMATS / "figures.json").read_text(encoding="utf-8"))
BOTH = pytest.mark.parametrize("language", ["en", "zh"])


def build(directory, notices=None, forms=(), language="en"):
    say = ([] if notices is None else notices).append
    return llmbench.build_outputs(str(directory), ASSETS, say, forms, language)


def run_main(capsys, *words):
    try:
        status = llmbench.main([str(word) for word in words])
    except SystemExit as end:
        status = end.code
    shown = capsys.readouterr()
    return status, shown.out, shown.err


# --- files of earlier versions ----------------------------------------------------------------------------------------


def test_every_earlier_format_has_its_figures():
    assert {path.stem for path in FORMATS.glob("*.jsonl")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_a_file_of_an_earlier_version_gives_the_figures_that_it_gave(tmp_path, name):
    """figures.json holds what each version's own summary said of its file."""
    shutil.copy(str(FORMATS / (name + ".jsonl")), str(tmp_path / "results.jsonl"))
    notices = []
    summary = json.loads(json.dumps(build(tmp_path, notices, ("markdown", "junit"))))
    assert notices == []
    for stage, expected in zip(summary["stages"], FIGURES[name]["stages"]):
        for key, figures in expected.items():
            if key == "errors":
                found = [{part: error[part] for part in ("status", "key", "count")} for error in stage["errors"]]
                assert found == figures
            else:
                assert {part: stage[key].get(part) for part in figures} == figures, key
    assert len(summary["stages"]) == len(FIGURES[name]["stages"])
    assert summary["slo"] == FIGURES[name]["slo"]
    assert summary.get("find_max", {}).get("load") == FIGURES[name]["find_max"]
    for made in ("results.csv", "summary.json", "report.html", "summary.md", "junit.xml"):
        assert (tmp_path / made).stat().st_size > 300


@pytest.mark.parametrize("name", FIGURES)
def test_a_file_of_an_earlier_version_that_was_cut_off_loses_its_last_line(tmp_path, name):
    data = (FORMATS / (name + ".jsonl")).read_bytes()
    (tmp_path / "results.jsonl").write_bytes(data[:-20])
    notices = []
    summary = build(tmp_path, notices)
    assert len(notices) == 1 and "last line" in notices[0]
    assert "end" not in summary and len(summary["stages"]) == len(FIGURES[name]["stages"])


@pytest.mark.parametrize("form", ["2", "1.1", 1, None, ["1"], "x" * 500])
def test_a_later_format_is_refused_in_plain_words(tmp_path, form):
    lines = made_run(n=3)
    write_lines(tmp_path, [{**lines[0], "llmbench": form}, *lines[1:]])
    with pytest.raises(
        llmbench.UserError, match=r"is of format .* reads format 1; use the one that wrote it"
    ) as caught:
        build(tmp_path)
    assert len(str(caught.value)) < len(str(tmp_path)) + 150
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize("first", [
    record(), {"audit": {"stage": 0}}, {}, {"llmbench": "1"}, {"run": []}, {"run": {"config": []}}, {"run": "x"},
])  # fmt: skip
def test_a_file_without_the_header_of_a_run_is_refused(tmp_path, first):
    write_lines(tmp_path, [first, *made_run(n=3)[1:]])
    with pytest.raises(llmbench.UserError, match="line 1 is not the header of a run"):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_header_that_was_cut_off_leaves_nothing_to_report(tmp_path):
    (tmp_path / "results.jsonl").write_bytes(b'{"llmbench":"1","run":{"tool')
    with pytest.raises(llmbench.UserError, match="no whole line"):
        build(tmp_path)


def test_keys_and_lines_that_a_later_version_adds_are_passed_over(tmp_path):
    lines = made_run(stages=2)
    plain = build(write_lines(tmp_path / "plain", lines))
    added = [{**line, "new": {"a": [1, "x"]}, "also": "x"} for line in lines]
    added[0]["run"] = {**added[0]["run"], "novel": "y"}
    added.insert(3, {"weather": {"stage": 0, "sky": "blue"}})
    summary = build(write_lines(tmp_path / "added", added))
    assert json.dumps(summary) == json.dumps(plain)
    assert (tmp_path / "added" / "results.csv").read_bytes() == (tmp_path / "plain" / "results.csv").read_bytes()


def test_a_line_that_is_nested_too_deeply_is_no_record(tmp_path):
    lines = write_lines(tmp_path, made_run(n=3)) / "results.jsonl"
    lines.write_bytes(lines.read_bytes().replace(b'{"end"', b"[" * 200000 + b'\n{"end"', 1))
    with pytest.raises(llmbench.UserError, match="is not a record"):
        build(tmp_path)


# --- summary.md -------------------------------------------------------------------------------------------------------

HOSTILE = "a|b <img src=x onerror=1> `c` ``d`` \\| @team #12 http://x.y/ [l](u) **b** \u202e\x07\nnext | row"


def cells_of(line):
    """The cells of a table's row, as the reference parser of GitHub's Markdown splits them."""
    found = re.findall(r"((?:\\[!-/:-@\[-`{-~]|[^|])*)\|", line.strip()[1:])
    assert "".join(cell + "|" for cell in found) == line.strip()[1:]
    return [cell.strip() for cell in found]


def tables_of(text):
    """The tables of a Markdown text, as rows of cells; every row must have as many cells as its head."""
    tables = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.split("\n")
        if len(lines) > 1 and re.fullmatch(r"\|( *:?-+:? *\|)+", lines[1]):
            rows = [cells_of(line) for line in lines]
            assert len({len(row) for row in rows}) == 1, block
            tables.append([rows[0], *rows[2:]])
    return tables


def outside_code(text):
    """A Markdown text without its code spans."""
    return re.sub(r"(?<!`)(?<!\\)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", text)


def hostile_lines():
    """A run whose endpoint, model and errors say what Markdown and HTML would act on."""
    lines = made_run(n=60, failing=0.3)
    lines[0]["run"].update(model=HOSTILE, url="http://h/" + HOSTILE, host=HOSTILE, run_id=HOSTILE)
    lines[0]["run"].update(python=HOSTILE, tool_version=HOSTILE)
    lines[-1]["end"]["reason"] = HOSTILE
    return [{**line, "err": "HTTP 503: " + HOSTILE} if "err" in line else line for line in lines]


def markdown(tmp_path, lines, language="en"):
    summary = build(write_lines(tmp_path, lines), None, ("markdown",), language)
    return (tmp_path / "summary.md").read_text(encoding="utf-8"), summary


@BOTH
def test_what_a_stranger_said_is_text_in_a_code_span(tmp_path, language):
    text, _ = markdown(tmp_path, hostile_lines(), language)
    rest = outside_code(text)
    assert not re.search(r"<|onerror|@team|#12|x\.y|\[l\]", rest)
    assert "<img src=x onerror=1>" in text and "@team" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", text)
    assert len(tables_of(text)) == 3


@pytest.mark.parametrize(
    "text", ["`", "``", "a`", "`a", "\\", "\\|", "|", "a\\\\|b", "", " ", "\n", "`|`", "<b>", "a" * 999]
)
def test_a_code_span_holds_what_it_was_given(text):
    span = llmbench.code(text)
    assert cells_of("| %s |" % span) == [span]
    if text.strip():
        ticks, inside = re.fullmatch(r"(`+)(.*?)\1", span).groups()
        assert ticks not in re.findall("`+", inside)
        found = inside.strip().replace("\\|", "|").replace("\\ |", "\\|")
        assert found.replace(" ", "") == text.replace(" ", "")[:160] + "…" * (len(text) > 160)


def test_a_ticket_says_what_the_summary_says(tmp_path):
    lines = loaded_run(loaded_stage(load={"concurrency": 8}, n=300), concurrency=[8], total_requests=300,
                       slo=["ttft.p95<=100ms", "success>=99%"])  # fmt: skip
    text, summary = markdown(tmp_path, lines)
    facts, figures, gates = tables_of(text)
    assert facts[1:][0] == ["Endpoint", "`http://h/v1/x`"]
    assert "8 streams × 300 requests" in facts[4][1] and "`bench-1`" in facts[3][1]
    named = {row[0]: row[1:] for row in figures[1:]}
    assert len(named) == 6 and all(row[-1] == "300" for row in named.values())
    for title, metric in (("TTFT: first text", "ttft_ms"), ("Latency: whole answer", "latency_ms")):
        block = summary[metric]
        scale = llmbench.scale_of(block)
        for cell, stat in zip(named[title], ("p50", "p95", "p99")):
            assert cell.replace("\u00a0", " ") == scale.said(block[stat]).replace("\u00a0", " ") + "†" * (stat == "p99")
    assert named["Requests per second"][0].split("\u00a0")[0] == llmbench.figure(summary["throughput"]["rps"])
    assert [row[-1] for row in gates[1:]] == ["✕ **failed**", "✓ passed"] and gates[1][3] == "300"
    verdict = summary["verdict"]
    assert "**%s**" % verdict["state"] in text and text.count("\n- ") == len(verdict["reasons"]) > 0
    assert "† of limited meaning" in text
    assert "`cafe0001`" in text and "llmbench 1.0.0" in text and re.search(r"SHA-256 `[0-9a-f]{64}`", text)


@BOTH
def test_stages_are_one_table_with_the_gates_that_failed(tmp_path, language):
    stages = [loaded_stage(index, {"concurrency": streams}, n=60, slow=1 + index, zero=index * 1e6)
              for index, streams in enumerate((2, 4, 8))]  # fmt: skip
    text, summary = markdown(tmp_path, loaded_run(*stages, concurrency=[2, 4, 8], slo=["ttft.p50<=350ms"]), language)
    *_, table = tables_of(text)
    assert [row[0] for row in table[1:]] == ["2", "4", "8"]
    assert ["✕" in row[-1] for row in table[1:]] == [not entry["passed"] for entry in summary["slo"]]
    assert {"✕ **TTFT P50**"} == {row[-1] for row in table[1:] if "✕" in row[-1]}
    assert "†" in table[1][4]


def test_an_open_loop_is_quoted_from_due_too(tmp_path):
    text, summary = markdown(tmp_path, loaded_run(loaded_stage(load={"rps": 8.0, "cap": 4}, n=120)))
    named = {row[0]: row[1:] for row in tables_of(text)[1][1:]}
    assert len(named) == 8
    assert llmbench.figure(summary["ttft_from_scheduled_ms"]["p50"] / 1000 if summary["ttft_from_scheduled_ms"][
        "p50"] >= 2000 else summary["ttft_from_scheduled_ms"]["p50"]) in named["TTFT from due"][0]  # fmt: skip


def invalid_lines(**config):
    """A run whose client was the limit."""
    lines = loaded_run(loaded_stage(load={"concurrency": 4}, n=80), concurrency=[4], slo=["ttft.p50<=1ms"], **config)
    return [{"audit": {**line["audit"], "cpu_percent": 99.0}} if "audit" in line else line for line in lines]


def test_the_gates_of_an_invalid_run_are_not_judged(tmp_path):
    text, summary = markdown(tmp_path, invalid_lines())
    assert summary["verdict"]["state"] == "INVALID"
    assert "**INVALID**" in text and "✕" not in text and "✓" not in text
    assert tables_of(text)[2][1][-1] == "–"


def test_a_run_without_success_and_one_that_was_cut_off_have_their_ticket(tmp_path):
    lines = [header(), *(record(float(n), status="timeout", err="time-out (1s)") for n in range(5))]
    text, _ = markdown(tmp_path, lines)
    assert "No request succeeded" in text and "cut off" in text
    assert {row[1] for row in tables_of(text)[1][2:5]} == {"–"}


def test_a_secret_is_in_neither_form(tmp_path):
    lines = made_run(n=30, failing=0.3)
    lines = [{**line, "err": "HTTP 401: bad key, Bearer sk-4f9aQz71xyz"} if "err" in line else line for line in lines]
    build(write_lines(tmp_path, lines), None, ("markdown", "junit"))
    for name in ("summary.md", "junit.xml"):
        assert "sk-4f9aQz71xyz" not in (tmp_path / name).read_text(encoding="utf-8")


# --- junit.xml --------------------------------------------------------------------------------------------------------

# What JUnit.xsd (Ant) and junit-10.xsd (Jenkins) have in common: which attributes an element must and may have, and
# which elements may stand in it, in this order.
NUMBER, SECONDS = r"[0-9]+", r"[0-9]+(\.[0-9]+)?"
RULES = {
    "testsuites": ({}, {"name": ".*", "tests": NUMBER, "failures": NUMBER, "errors": NUMBER, "time": SECONDS},
                   ["testsuite*"]),
    "testsuite": ({"name": ".+", "tests": NUMBER, "failures": NUMBER, "errors": NUMBER, "time": SECONDS,
                   "hostname": ".+", "timestamp": r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}",
                   "id": NUMBER, "package": ".+"}, {"skipped": NUMBER},
                  ["properties", "testcase*", "system-out", "system-err"]),
    "properties": ({}, {}, ["property*"]), "property": ({"name": ".+", "value": ".*"}, {}, []),
    "testcase": ({"name": ".+", "classname": ".+", "time": SECONDS}, {}, ["skipped?", "error?", "failure?"]),
    "skipped": ({}, {"message": ".*"}, []), "error": ({"type": ".+"}, {"message": ".*"}, []),
    "failure": ({"type": ".+"}, {"message": ".*"}, []), "system-out": ({}, {}, []), "system-err": ({}, {}, []),
}  # fmt: skip


def check_element(node):
    """One element, and all that is in it, against RULES."""
    required, optional, inside = RULES[node.tag]
    assert set(required) <= set(node.attrib) <= set(required) | set(optional), (node.tag, node.attrib)
    for name, value in node.attrib.items():
        assert re.fullmatch({**required, **optional}[name], value, re.DOTALL), (node.tag, name, value)
    pattern = "".join("(%s,)%s" % (part.rstrip("*?"), part[-1] if part[-1] in "*?" else "") for part in inside)
    assert re.fullmatch(pattern, "".join(child.tag + "," for child in node)), (node.tag, [child.tag for child in node])
    if node.tag == "testcase":
        assert len(node) <= 1
    for child in node:
        check_element(child)


def junit(tmp_path, lines):
    """The parsed file, its cases as {(class, name): state}, and the summary."""
    summary = build(write_lines(tmp_path, lines), None, ("junit",), "zh")
    root = ElementTree.fromstring((tmp_path / "junit.xml").read_bytes())
    check_element(root)
    (suite,) = root
    cases = {(case.get("classname"), case.get("name")): case[0].tag if len(case) else "passed"
             for case in suite.iter("testcase")}  # fmt: skip
    states = list(cases.values())
    assert [int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")] == [
        len(states), states.count("failure"), states.count("error"), states.count("skipped")]  # fmt: skip
    assert [root.get(key) for key in ("tests", "failures", "errors")] == [
        suite.get(key) for key in ("tests", "failures", "errors")]  # fmt: skip
    assert float(suite.get("time")) == pytest.approx(sum(float(case.get("time")) for case in suite.iter("testcase")),
                                                    abs=0.002 * len(states))  # fmt: skip
    return suite, cases, summary


def sweep(**config):
    return loaded_run(*(loaded_stage(index, {"concurrency": streams}, n=60, slow=1 + index, zero=index * 1e6)
                        for index, streams in enumerate((2, 4, 8))), concurrency=[2, 4, 8], **config)  # fmt: skip


def failed_run():
    return [header(), *(record(float(n), status="http_error", err="HTTP 503: no") for n in range(5)), made_run()[-1]]


RUNS = {
    "no gates": sweep(), "gates": sweep(slo=["ttft.p50<=350ms", "success>=50%"]), "passed": sweep(slo=["success>=50%"]),
    "invalid": invalid_lines(), "failed": failed_run(),
    "search": sweep(slo=["ttft.p50<=350ms"], find_max="concurrency"),
    "search without a load": sweep(slo=["ttft.p50<=1ms"], find_max="concurrency"),
    "search without success": [
        header(slo=["ttft.p50<=1ms"], find_max="concurrency", concurrency=[2]), *failed_run()[1:]],
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_ci_server_sees_a_failure_where_the_exit_status_is_one(tmp_path, name):
    suite, cases, summary = junit(tmp_path, RUNS[name])
    bad = any(state in ("failure", "error") for state in cases.values())
    assert bad == (llmbench.status_of(summary) != 0)
    assert len(cases) == len(list(suite.iter("testcase"))), "no two cases are named alike"


def test_each_gate_of_each_stage_is_a_case_with_what_was_measured_and_what_was_required(tmp_path):
    suite, cases, summary = junit(tmp_path, RUNS["gates"])
    assert len(cases) == 1 + 3 + 3 * 2
    for entry, stage in zip(summary["slo"][::2], (2, 4, 8)):
        group = ("llmbench.%d streams" % stage, "ttft.p50<=350ms")
        assert cases[group] == ("passed" if entry["passed"] else "failure")
    said = [node.get("message") for node in suite.iter("failure")]
    failed = [entry for entry in summary["slo"] if not entry["passed"]]
    assert len(said) == len(failed) > 0
    for message, entry in zip(said, failed):
        assert message == "measured %s ms, required <= 350 ms (n = 60)" % llmbench.figure(entry["value"])


def test_an_invalid_run_is_an_error_and_its_gates_are_skipped(tmp_path):
    suite, cases, _ = junit(tmp_path, RUNS["invalid"])
    assert cases == {("llmbench.run", "verdict"): "error", ("llmbench.4 streams", "answers"): "passed",
                     ("llmbench.4 streams", "ttft.p50<=1ms"): "skipped"}  # fmt: skip
    assert "not judged" in next(suite.iter("skipped")).get("message")
    assert "99" in next(suite.iter("error")).get("message")


def test_a_probe_of_a_search_that_did_not_pass_is_no_failure(tmp_path):
    _, cases, summary = junit(tmp_path, RUNS["search"])
    assert summary["find_max"]["load"] and cases["llmbench.run", "find-max"] == "passed"
    assert "skipped" in cases.values() and "failure" not in cases.values()
    _, cases, _ = junit(tmp_path / "none", RUNS["search without a load"])
    assert cases["llmbench.run", "find-max"] == "failure"


def test_the_facts_of_the_run_are_properties(tmp_path):
    suite, _, summary = junit(tmp_path, RUNS["passed"])
    found = {node.get("name"): node.get("value") for node in suite.iter("property")}
    assert found["run_id"] == "cafe0001" and found["model"] == "测试-model" and found["verdict"] == "CAUTION"
    for stage in summary["stages"]:
        name = "%d streams: ttft_ms.p95" % stage["load"]["concurrency"]
        assert float(found[name]) == stage["ttft_ms"]["p95"]


def test_what_xml_cannot_hold_is_left_out(tmp_path):
    lines = hostile_lines()
    evil = "".join(map(chr, range(32))) + "\x7f\x85\ufffe\uffff]]>&<'\"\u2028"
    lines[0]["run"]["model"] = evil
    lines = [{**line, "err": "HTTP 503: " + evil + "\ud800"} if "err" in line else line for line in lines]
    lines = [line for line in lines if line.get("status") != "ok"]
    suite, cases, _ = junit(tmp_path, lines)
    assert suite.get("name") == "llmbench \t\n\r]]>&<'\"\u2028"
    assert "failure" in cases.values() and "]]>&<" in next(suite.iter("failure")).text


# --- archives ---------------------------------------------------------------------------------------------------------

FILES = ["README.txt", "SHA256SUMS", "config.json", "run.json", "results.jsonl"]


def packed(directory, out, redacted=False):
    llmbench.pack_run(str(directory), str(out), redacted, [].append)
    return out


def untarred(path):
    """The files of an archive by their names without the directory."""
    with tarfile.open(str(path)) as archive:
        return {member.name.split("/")[-1]: archive.extractfile(member).read() for member in archive}


def test_an_archive_holds_the_records_and_what_they_need(tmp_path):
    directory = write_lines(tmp_path / "run", made_run(stages=2))
    path = packed(directory, tmp_path / "run.tar.gz")
    files = untarred(path)
    assert list(files) == FILES
    assert files["results.jsonl"] == (directory / "results.jsonl").read_bytes()
    run = made_run(stages=2)[0]["run"]
    assert json.loads(files["config.json"]) == run["config"]
    told = json.loads(files["run.json"])
    assert (told["tool_version"], told["python"], told["host"], told["end"]["reason"]) == (
        "1.0.0", "CPython 3.11.0", "bench-1", "done")  # fmt: skip
    for line in files["SHA256SUMS"].decode().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256(files[name]).hexdigest() == digest
    assert files["SHA256SUMS"].decode().split()[1::2] == [name for name in FILES if name != "SHA256SUMS"]
    with tarfile.open(str(path)) as archive:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in archive} == {(1767323045, 0, 0, "", 0o644)}


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum here")
def test_an_archive_is_verified_as_its_readme_says(tmp_path):
    path = packed(write_lines(tmp_path / "run", made_run()), tmp_path / "FILE.tar.gz")
    readme = untarred(path)["README.txt"].decode()
    commands = [line.strip().split("     (")[0] for line in readme.splitlines() if line.startswith("  ")]
    commands = [line for line in commands if line.startswith(("tar ", "cd "))]
    done = subprocess.run(" && ".join(commands), shell=True, cwd=str(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 4, done.stderr


def test_the_same_run_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_lines(tmp_path / name, made_run(stages=2))
    build(tmp_path / "two")
    for redacted in (False, True):
        made = [packed(tmp_path / name, tmp_path / ("%s%d.tgz" % (name, redacted)), redacted).read_bytes()
                for name in ("one", "two")]  # fmt: skip
        assert made[0] == made[1]


@pytest.mark.parametrize("name", FIGURES)
def test_an_archive_gives_the_same_summary(tmp_path, capsys, name):
    (tmp_path / "run").mkdir()
    shutil.copy(str(FORMATS / (name + ".jsonl")), str(tmp_path / "run" / "results.jsonl"))
    expected = build(tmp_path / "run")
    path = packed(tmp_path / "run", tmp_path / "run.tar.gz")
    status, shown, errors = run_main(capsys, "report", path, "--out", tmp_path / "opened", "--junit")
    assert (status, errors) == (0, "")
    found = json.loads((tmp_path / "opened" / "summary.json").read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(expected))
    assert (tmp_path / "opened" / "junit.xml").exists() and str(tmp_path / "opened" / "report.html") in shown


def test_a_run_that_was_cut_off_is_packed_as_it_is(tmp_path):
    directory = write_lines(tmp_path / "run", made_run()[:-1])
    with open(directory / "results.jsonl", "ab") as file:
        file.write(b'{"request_id":"cafe')
    files = untarred(packed(directory, tmp_path / "run.tar.gz"))
    assert files["results.jsonl"].endswith(b'{"request_id":"cafe') and json.loads(files["run.json"])["end"] is None
    assert not untarred(packed(directory, tmp_path / "r.tar.gz", True))["results.jsonl"].endswith(b"cafe")


SECRETS = ["customer", "prompt", "10.20.30.40", "10.1.2.3", "fd00::17", "bench-nine", "squid", "said", "tenant",
           "colleague", "acme.py"]  # fmt: skip


def private_lines():
    """A run in which everything that `--redact` is for is named, each with a word of SECRETS."""
    url = "https://llm.customer.example:8443/tenant-7/v1/chat/completions?region=tenant"
    config = {
        "url": url, "provider": "./acme.py", "concurrency": [2], "token_mode": "usage", "max_tokens": 64,
        "prompts": {"source": "customer-prompts.jsonl", "count": 9, "digest": "20f5de40522314c2"}, "token": "***",
        "workload_file": "customer-prompts.jsonl", "proxy": "http://squid:3128", "header": ["X-Tenant: tenant-7"],
        "resolve": ["llm.customer.example:8443:10.20.30.40"], "server_name": "llm.customer.example",
        "ca_cert": "said.pem",
        "body": {"user": "colleague", "system prompt": "x", "temperature": 0.5, "stop": ["said"]},
        "slo": ["success>=50%"],
    }  # fmt: skip
    lines = made_run(n=120, failing=0.4)
    run = {**lines[0]["run"], "host": "bench-nine", "address": "10.1.2.3", "url": url, "provider": "./acme.py",
           "command": "llmbench.pyz run --url %s --model 测试-model --concurrency 2 --slo 'success>=50%%' "
           "--header 'X-Tenant: tenant-7' --proxy=http://squid:3128 --out said --max-tokens 64" % url,
           "selftest": {"host": "bench-nine", "errors": [{"streams": 1, "first_ms": {"p99": 0.1}}]},
           "config": config}  # fmt: skip
    made = [{"llmbench": "1", "run": run}]
    errors = [("http_error", "HTTP 503: the model said no, request %d"), ("http_error", "HTTP 503: customer quota %d"),
              ("http_error", "HTTP 429: customer quota %d"),
              ("timeout", "connect time-out (10s) while connecting to squid:3128"),
              ("connect_error", "llm.customer.example:8443 (10.20.30.40): connection refused"),
              ("connect_error", "llm.customer.example:8443 (10.20.30.40): no route to host"),
              ("truncated", "connection to fd00::17 closed before the head"),
              ("stream_error", "it said 'prompt'")]  # fmt: skip
    for number, line in enumerate(lines[1:-2]):
        more = {"prompt_id": "customer-prompt-%d" % (number % 9), "provider": "./acme.py", "novel": "said so"}
        if line["status"] == "ok":
            more.update(
                out_crc32="%08x" % (number % 40 * 7919), first_content_raw="data: said", finish_reason="it said"
            )
        else:
            status, err = errors[number % len(errors)]
            more.update(status=status, err=err % (1000 + number) if "%" in err else err, error_raw="said")
        made.append({**line, **more})
    audit = {**lines[-2]["audit"], "network": {"address": "10.20.30.40:8443", "proxy": "squid:3128",
             "tls_version": "TLSv1.3",
             "cipher": "AES"}}  # fmt: skip
    return [*made, {"audit": audit}, {"end": {"reason": "done", "dialect": ["the endpoint refuses stream_options"]}}]


def without_texts(summary):
    """A summary without what is no figure: names, texts and addresses."""
    made = json.loads(json.dumps({key: value for key, value in summary.items() if key not in (
        "url", "provider", "samples", "config", "verdict")}))  # fmt: skip
    made["verdict"] = [(reason["state"], reason["key"]) for reason in summary["verdict"]["reasons"]]
    for block in [made, *made["stages"]]:
        block.get("client", {}).pop("network", None)
        block["errors"] = sorted(
            (error["status"], error["count"], error.get("first_ms", 0)) for error in block["errors"]
        )
    return made


def test_a_redacted_archive_names_nobody_and_keeps_every_figure(tmp_path, capsys):
    directory = write_lines(tmp_path / "run", private_lines())
    expected = build(directory)
    assert sum(error["count"] for error in expected["errors"]) > 20 and len(expected["errors"]) == 8
    status, shown, _ = run_main(capsys, "pack", directory, "--redact", "--out", tmp_path / "r.tar.gz")
    assert status == 0 and "hosts 2" in shown
    for name, data in untarred(tmp_path / "r.tar.gz").items():
        text = data.decode("utf-8")
        own = "Hosts, addresses, prompt names and what the endpoint said were replaced"
        found = [secret for secret in SECRETS if secret in text.replace(own, "").replace("prompt-", "").replace(
            "prompt_id", "").replace('"prompts"', "")]  # fmt: skip
        assert found == [], name
    assert run_main(capsys, "report", tmp_path / "r.tar.gz", "--out", tmp_path / "opened")[0] == 0
    summary = json.loads((tmp_path / "opened" / "summary.json").read_text(encoding="utf-8"))
    assert without_texts(summary) == without_texts(expected)
    for name in ("report.html", "results.csv"):
        text = (tmp_path / "opened" / name).read_text(encoding="utf-8")
        assert not re.search(r"customer|10\.20\.30|bench-nine|squid|tenant", text)


def test_a_redacted_run_still_says_what_is_nobodys(tmp_path):
    files = untarred(packed(write_lines(tmp_path / "run", private_lines()), tmp_path / "r.tar.gz", True))
    first, *lines = [json.loads(line) for line in files["results.jsonl"].splitlines()]
    run, config = first["run"], first["run"]["config"]
    assert first["llmbench"] == "1" and run["redacted"] is True and run["model"] == "测试-model"
    assert run["url"] == config["url"] == "https://host-B/[redacted]" and run["host"] == "host-A"
    assert run["selftest"]["host"] == "host-A" and config["server_name"] == "host-B"
    assert run["command"] == (
        "llmbench.pyz run --url https://host-B/[redacted] --model 测试-model --concurrency 2 --slo 'success>=50%' "
        "--header [redacted] --proxy=[redacted] --out [redacted] --max-tokens 64"
    )
    assert config["header"] == ["X-Tenant: [redacted]"] and config["prompts"]["digest"] == "20f5de40522314c2"
    assert config["body"] == {
        "user": "[redacted]",
        "[redacted]": "[redacted]",
        "temperature": 0.5,
        "stop": ["[redacted]"],
    }
    errors = {(line["status"], line["err"]) for line in lines if "err" in line}
    assert errors == {
        ("http_error", "HTTP 503: text-A"), ("http_error", "HTTP 503: text-B"), ("http_error", "HTTP 429: text-D"),
        ("timeout", "connect time-out (10s) while connecting to proxy-A"),
        ("connect_error", "host: connection refused"),
        ("connect_error", "host: no route to host"), ("truncated", "connection to address-B closed before the head"),
        ("stream_error", "text-C"),
    }  # fmt: skip
    assert {line["prompt_id"] for line in lines if "prompt_id" in line} <= {
        "prompt-" + letter for letter in "ABCDEFGHI"
    }
    (network,) = [line["audit"]["network"] for line in lines if "audit" in line]
    assert network["tls_version"] == "TLSv1.3" and network["address"].startswith("address-")
    assert lines[-1]["end"] == {"reason": "done", "dialect": ["the endpoint refuses stream_options"]}


def test_equal_answers_stay_equal_and_no_checksum_is_the_answers_own(tmp_path):
    directory = write_lines(tmp_path / "run", private_lines())
    seen = {}
    for redacted in (False, True):
        lines = untarred(packed(directory, tmp_path / ("%d.tgz" % redacted), redacted))["results.jsonl"].splitlines()
        seen[redacted] = [json.loads(line).get("out_crc32") for line in lines]
    pairs = {pair for pair in zip(seen[False], seen[True]) if pair[0]}
    assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs}) > 20
    assert all(old != new and re.fullmatch("[0-9a-f]{8}", new) for old, new in pairs)


def test_the_cipher_of_checksums_is_one_to_one():
    redactor = llmbench.Redactor(b"k" * 32)
    made = {redactor._enciphered("%08x" % number) for number in range(0, 1 << 32, 65537)}
    assert len(made) == len(range(0, 1 << 32, 65537))


def test_a_key_that_nobody_knows_is_not_let_through():
    line = {"request_id": "r-0-1", "status": "ok", "novel": "secret", "more": {"deep": ["secret", 3, {"x": "secret"}]},
            "count": 7, "flag": True, "a secret key": "x", "finish_reason": "secret_reason"}  # fmt: skip
    assert llmbench.Redactor(b"k").line({**line, "finish_reason": "length"})["finish_reason"] == "length"
    made = llmbench.Redactor(b"k").line(line)
    assert "ecret" not in json.dumps(made).replace("[redacted]", "")
    assert (made["count"], made["flag"], made["more"]["deep"][1]) == (7, True, 3)


def test_failures_that_are_one_cause_stay_one_and_two_stay_two():
    """Fifty causes of one status: the names that stand for them must not be grouped by a number in them."""
    lines = [record(float(n), status="stream_error", err="cause %s of many" % ("x" * (1 + n % 50))) for n in range(200)]
    redactor = llmbench.Redactor(b"k")
    made = [redactor.line(line) for line in lines]
    causes = [{llmbench.error_key(line["err"]) for line in told} for told in (lines, made)]
    assert len(causes[0]) == len(causes[1]) == 50


def test_many_causes_are_told_apart_in_time_that_grows_with_them():
    """Each compared with all before it, 6,000 take a minute of CPU; this is less than one second."""
    redactor, begin = llmbench.Redactor(b"k"), time.process_time()
    for number in range(6000):
        err = "cause %s of many" % "".join(chr(97 + int(digit)) for digit in str(number))
        redactor.line(record(float(number), status="stream_error", err=err))
    assert len(set(redactor._errors.values())) == 6000
    assert time.process_time() - begin < 10.0


def test_a_long_error_is_cut_before_it_is_searched():
    begin = time.process_time()
    llmbench.Redactor(b"k").line(record(0.0, status="connect_error", err="x: " + "1.1.1." * 50000))
    assert llmbench.prose(" " * 100000 + "x").strip() == "x" and llmbench.prose("a \n b\nc") == "a b c"
    assert time.process_time() - begin < 5.0


# --- archives of strangers --------------------------------------------------------------------------------------------


def tarred(*members, level=6):
    """A gzipped tar of (TarInfo or name, bytes)."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(data) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(data))
    return gzip.compress(raw.getvalue(), level)


def of_type(name, kind, target="results.jsonl"):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def claiming(size, kind=tarfile.REGTYPE, name="x/results.jsonl"):
    """A tar that says of a file that it has so many bytes, and zeros without end behind it."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    head = member.tobuf(tarfile.GNU_FORMAT)
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = b"\0" * (1 << 20)
    return packer.compress(head) + b"".join(packer.compress(zeros) for _ in range(600)) + packer.flush()


LINES = b"".join(llmbench.encode_line(line) for line in made_run(n=5))
SUMS = ("%s  results.jsonl\n" % hashlib.sha256(LINES).hexdigest()).encode()
GOOD = [("x/SHA256SUMS", SUMS), ("x/results.jsonl", LINES)]
WHOLE = tarred(*GOOD)
BAD = {
    "a link": (tarred(*GOOD, (of_type("x/y", tarfile.SYMTYPE), b"")), "a link or a device"),
    "results that are a link": (
        tarred(GOOD[0], (of_type("x/results.jsonl", tarfile.SYMTYPE, "/etc/passwd"), b"")),
        "link",
    ),
    "a hard link": (tarred(*GOOD, (of_type("x/y", tarfile.LNKTYPE), b"")), "a link or a device"),
    "a device": (tarred(*GOOD, (of_type("x/y", tarfile.CHRTYPE), b"")), "a link or a device"),
    "a pipe": (tarred(*GOOD, (of_type("x/y", tarfile.FIFOTYPE), b"")), "a link or a device"),
    "a path upwards": (tarred(*GOOD, ("x/../../y", b"")), "leads out of it"),
    "results upwards": (tarred(GOOD[0], ("../results.jsonl", LINES)), "leads out of it"),
    "an absolute path": (tarred(*GOOD, ("/etc/cron.d/y", b"")), "leads out of it"),
    "the same file twice": (tarred(*GOOD, GOOD[1]), "results.jsonl twice"),
    "no results": (tarred(GOOD[0]), "holds no results.jsonl"),
    "results too deep": (tarred(GOOD[0], ("x/y/results.jsonl", LINES)), "holds no results.jsonl"),
    "no checksums": (tarred(GOOD[1]), "has no checksum"),
    "other checksums": (tarred(("x/SHA256SUMS", SUMS.replace(b"  r", b"  x/r")), GOOD[1]), "has no checksum"),
    "changed records": (
        tarred(GOOD[0], ("x/results.jsonl", LINES.replace(b"1.0.0", b"1.0.1"))),
        "is not the one of its SHA",
    ),
    "a file that is gone": (
        tarred(("x/SHA256SUMS", SUMS + b"0" * 64 + b"  run.json\n"), GOOD[1]),
        "run.json that is not",
    ),
    "cut off": (WHOLE[:-200], ""),
    "only a beginning": (WHOLE[:30], ""),
    "a bit that flipped": (WHOLE[:-5] + bytes([WHOLE[-5] ^ 1]) + WHOLE[-4:], ""),
    "garbage behind it": (WHOLE + b"garbage", ""),
    "no tar": (gzip.compress(b"hello, world" * 100), "is no tar archive"),
    "no gzip": (b"\x1f\x8b garbage", ""),
    "empty": (gzip.compress(b""), "is cut off"),
    "zeros": (gzip.compress(b"\0" * 10240), "holds no results.jsonl"),
    "a bomb": (claiming(1 << 33), "far more than a run can hold|a line of more than"),
    "a bomb beside the results": (claiming(1 << 33, name="x/y"), "far more than a run can hold"),
    "a bomb of a text": (claiming(1 << 33, name="x/README.txt"), "README.txt of more than"),
    "a bomb of a long name": (claiming(1 << 33, tarfile.GNUTYPE_LONGNAME), "far more than a run can hold"),
    "a bomb of a header": (claiming(1 << 33, tarfile.XHDTYPE), "far more than a run can hold"),
    "a sparse file": (claiming(512, tarfile.GNUTYPE_SPARSE), "a link or a device"),
    "a file without a name": (tarred((".", b"x")), "holds no results.jsonl"),
    "less than nothing": (claiming(-512), "leads out of it|is no tar"),
    "very many files": (tarred(*GOOD, *(("x/%d" % n, b"") for n in range(1100))), "more than 1000 files"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_hostile_archive_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    data, said = BAD[name]
    (tmp_path / "bad.tar.gz").write_bytes(data)
    status, shown, errors = run_main(capsys, "report", "bad.tar.gz")
    assert (status, shown) == (2, "") and re.search(said, errors), errors
    assert re.fullmatch(r"llmbench: error: bad\.tar\.gz [^\n]{10,160}\n", errors)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar.gz"]


@pytest.mark.parametrize("name", [name for name in BAD if name.startswith("a bomb")])
def test_a_bomb_takes_no_memory(tmp_path, name):
    (tmp_path / "bad.tar.gz").write_bytes(BAD[name][0])
    tracemalloc.start()
    try:
        with pytest.raises(llmbench.UserError):
            llmbench.opened_run(str(tmp_path / "bad.tar.gz"), str(tmp_path / "out")).__enter__()
        assert tracemalloc.get_traced_memory()[1] < 3 * llmbench.ARCHIVE_LINE
    finally:
        tracemalloc.stop()


def test_an_archive_whose_lines_are_none_of_a_run_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = made_run()
    packed(write_lines(tmp_path / "run", lines), tmp_path / "a.tar.gz")
    monkeypatch.setattr(llmbench, "summarize", lambda collector: (_ for _ in ()).throw(OverflowError()))
    status, _, errors = run_main(capsys, "report", "a.tar.gz", "--out", "opened")
    assert status == 2 and errors.count("\n") == 1 and "a number that no run has" in errors
    assert not (tmp_path / "opened").exists()


def test_a_good_archive_of_the_same_form_opens(tmp_path, capsys):
    (tmp_path / "good.tar.gz").write_bytes(WHOLE)
    assert run_main(capsys, "report", tmp_path / "good.tar.gz", "--out", tmp_path / "out")[0] == 0


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar here")
@pytest.mark.parametrize("form", ["gnu", "ustar", "pax"])
def test_an_archive_that_was_unpacked_and_packed_again_opens(tmp_path, capsys, form):
    packed(write_lines(tmp_path / "run", made_run()), tmp_path / "a.tar.gz")
    script = (
        "mkdir t && tar xzf a.tar.gz -C t && for d in t/*; do touch $d/notes; done && "
        "tar --format=%s -czf b.tar.gz -C t ."
        % form
    )
    done = subprocess.run(script, shell=True, cwd=str(tmp_path), capture_output=True, text=True)
    if done.returncode and "format" in done.stderr:
        pytest.skip("this tar has no --format")
    assert done.returncode == 0, done.stderr
    assert run_main(capsys, "report", tmp_path / "b.tar.gz", "--out", tmp_path / "out")[0] == 0


# --- the commands -----------------------------------------------------------------------------------------------------


def test_pack_names_the_archive_after_the_directory_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "run", made_run())
    for words, name in ((["run/"], "run.tar.gz"), (["run", "--redact"], "run-redacted.tar.gz"),
                        (["run.tar.gz", "-redact", "-out=x.tgz"], "x.tgz")):  # fmt: skip
        status, shown, errors = run_main(capsys, "pack", *words)
        assert (status, errors) == (0, "") and shown.endswith("  %s\n" % name)
        before = (tmp_path / name).read_bytes()
        status, _, errors = run_main(capsys, "pack", *words)
        assert status == 2 and "is there already" in errors and (tmp_path / name).read_bytes() == before
    assert (tmp_path / "x.tgz").read_bytes() == (tmp_path / "run-redacted.tar.gz").read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_report_opens_an_archive_here_and_never_over_results(tmp_path, monkeypatch, capsys):
    packed(write_lines(tmp_path / "run", made_run()), tmp_path / "run.tar.gz")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_main(capsys, "report", "../run.tar.gz", "--markdown")[0] == 0
    assert sorted(path.name for path in (tmp_path / "here" / "run").iterdir()) == [
        "report.html", "results.csv", "results.jsonl", "summary.json", "summary.md"]  # fmt: skip
    status, _, errors = run_main(capsys, "report", "../run.tar.gz")
    assert status == 2 and "already holds results.jsonl" in errors


@pytest.mark.parametrize("words,said", [
    (["report", "run", "--out", "x"], "--out is for an archive"), (["report", "nowhere"], "holds no results.jsonl"),
    (["report", "run/results.jsonl"], "name a directory"), (["pack", "nowhere"], "holds no results.jsonl"),
    (["pack", "run", "--out", "no/such/place.tgz"], "cannot be written to"), (["pack"], "required"),
])  # fmt: skip
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "run", made_run())
    status, _, errors = run_main(capsys, *words)
    assert status == 2 and said in errors and errors.count("\n") == 1


def test_compare_and_merge_read_archives(tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 2)):
        packed(write_lines(tmp_path / name, made_run(n=60, seed=seed)), tmp_path / (name + ".tgz"))
    places = [tmp_path / "a.tgz", tmp_path / "b.tgz"]
    assert run_main(capsys, "compare", *places, "--out", tmp_path / "c.html")[0] == 0
    shards = []
    for number in (0, 1):
        run = header(shard="%d/2" % number)
        lines = [record(10.0 * n, 10.0 * n + 5, 10.0 * n + 9, request_id="cafe0001-0-%d" % n, shard="%d/2" % number)
                 for n in range(number, 40, 2)]  # fmt: skip
        shards.append(write_lines(tmp_path / ("s%d" % number), [run, *lines, {"end": {"reason": "done"}}]))
    archives = [packed(shard, tmp_path / (shard.name + ".tar.gz")) for shard in shards]
    made = []
    for places, out in ((shards, "whole"), (archives, "archived")):
        status, _, errors = run_main(capsys, "merge", *places, "--out", tmp_path / out, "--junit", "--markdown")
        assert (status, errors) == (0, "")
        made.append({path.name: path.read_bytes() for path in (tmp_path / out).iterdir()})
    assert made[0] == made[1] and len(made[0]) == 6


def test_run_leaves_them_where_they_are_asked_for(tmp_path):
    words = ["run", "--url", "mock:?ttft=5&itl=1&tokens=4", "--model", "m", "--total-requests", "4", "--out",
             str(tmp_path / "out"), "--progress", "none", "--markdown", "-junit", "--lang", "zh"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "llmbench.py"), *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode in (0, 4), done.stderr
    assert "大模型" in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    check_element(ElementTree.fromstring((tmp_path / "out" / "junit.xml").read_bytes()))
    config = json.loads((tmp_path / "out" / "results.jsonl").open(encoding="utf-8").readline())["run"]["config"]
    assert not {"markdown", "junit"} & set(config), "hosts of one run need not agree on them"
