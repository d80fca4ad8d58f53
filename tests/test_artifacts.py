"""Records, summary and files: what is written, what is read back, what is refused, and that no secret is among it."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from made_records import made_run, record, with_gaps, write_lines

import llmbench
from conftest import ROOT

OUTPUTS = ("results.csv", "summary.json", "report.html")
SECRET = "sk-4f9aQz71/+xyz"
ASSETS = llmbench.load_assets()


def build(directory, notices=None):
    return llmbench.build_outputs(str(directory), ASSETS, ([] if notices is None else notices).append)


def read_csv(directory):
    data = (directory / "results.csv").read_bytes()
    return list(csv.reader(data.decode("utf-8-sig").splitlines()))


# --- results.jsonl: written -------------------------------------------------------------------------------------------


def test_a_line_is_one_object_and_ends_in_a_newline():
    line = llmbench.encode_line({"a": "中\n\u2028", "b": [1, None]})
    assert line.count(b"\n") == 1 and line.endswith(b"\n") and "中".encode() in line
    assert json.loads(line) == {"a": "中\n\u2028", "b": [1, None]}


def test_half_a_character_does_not_end_the_run():
    assert json.loads(llmbench.encode_line({"a": "x\ud800y"})) == {"a": "x?y"}


def test_each_line_is_appended_with_one_write(tmp_path, monkeypatch):
    first, second = llmbench.ResultsWriter(str(tmp_path)), llmbench.ResultsWriter(str(tmp_path))
    written, write = [], os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: (written.append(data), write(descriptor, data))[1])
    for number in range(6):
        (first, second)[number % 2].write({"number": number})
    first.close()
    second.close()
    assert len(written) == 6
    numbers = [json.loads(line)["number"] for line in (tmp_path / "results.jsonl").read_bytes().splitlines()]
    assert numbers == list(range(6))


def test_a_full_disk_is_a_write_error(tmp_path, monkeypatch):
    writer = llmbench.ResultsWriter(str(tmp_path))
    monkeypatch.setattr(os, "write", lambda descriptor, data: len(data) - 1)
    with pytest.raises(llmbench.WriteError, match=r"results\.jsonl could not be written: No space left"):
        writer.write({"a": 1})


def test_after_a_line_that_was_cut_off_nothing_is_written(tmp_path, monkeypatch):
    """A disk that was full for a moment must cost the last line,
    not the file: `report` refuses a bad line in the middle."""
    writer, write = llmbench.ResultsWriter(str(tmp_path)), os.write
    writer.write({"number": 0})
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[: len(data) // 2]))
    with pytest.raises(llmbench.WriteError):
        writer.write({"number": 1})
    monkeypatch.setattr(os, "write", write)
    with pytest.raises(llmbench.WriteError):
        writer.write({"number": 2})
    assert list(llmbench.read_lines(writer.path, lambda notice: None)) == [{"number": 0}]


# --- results.jsonl: read ----------------------------------------------------------------------------------------------


def read(tmp_path, data):
    path, notices = tmp_path / "results.jsonl", []
    path.write_bytes(data)
    return list(llmbench.read_lines(str(path), notices.append)), notices


def test_lines_are_read_in_order(tmp_path):
    assert read(tmp_path, b'{"a":1}\n{"b":"\xe2\x80\xa8"}\n') == ([{"a": 1}, {"b": "\u2028"}], [])


@pytest.mark.parametrize("tail", [b"{", b'{"request_id":"x","sta', b'{"a":"\xe4\xb8', b"{}x", b"17", b" "])
def test_a_last_line_that_was_cut_off_is_left_out_with_a_notice(tmp_path, tail):
    lines, notices = read(tmp_path, b'{"a":1}\n' + tail)
    assert lines == [{"a": 1}]
    assert len(notices) == 1 and "last line" in notices[0] and "results.jsonl" in notices[0]


def test_a_last_line_without_its_newline_counts_when_it_is_whole(tmp_path):
    assert read(tmp_path, b'{"a":1}\n{"b":2}') == ([{"a": 1}, {"b": 2}], [])


def test_space_around_a_line_is_no_part_of_it(tmp_path):
    assert read(tmp_path, b' \t{"a":1} \t\r\n{"b":2}\r\n') == ([{"a": 1}, {"b": 2}], [])


@pytest.mark.parametrize("line", [
    b"{", b"", b"garbage", b"[1]", b"null", b'{"a":"\xff"}', b'{"a":1}{"b":2}', b'{"a":1},{"b":2}',
    b'\xef\xbb\xbf{"a":1}', b'{"a":1}\x0b',
])  # fmt: skip
def test_a_bad_line_in_the_middle_is_named_by_its_number(tmp_path, line):
    with pytest.raises(llmbench.UserError, match=r"results\.jsonl line 2 ") as caught:
        read(tmp_path, b'{"a":1}\n' + line + b'\n{"b":2}\n')
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name,said", [("empty", "empty"), ("missing", "cannot be read"), ("folder", "cannot be read")])
def test_a_file_without_lines_is_one_line(tmp_path, name, said):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(llmbench.UserError, match=said):
        list(llmbench.read_lines(str(tmp_path / name), print))


FOREIGN = {
    "no stage": {"request_id": "x", "phase": "measure", "status": "ok"},
    "no status": {"request_id": "x", "phase": "measure", "stage": 0},
    "no phase": {"request_id": "x", "stage": 0, "status": "ok"},
    "a figure that is a text": record(latency_ms="fast"),
    "another figure that is a text": record(in_tokens="12"),
    "a bucket that is no number": record(itl_hist={"x": 1}, itl_sum_ms=1.0, itl_min_ms=1.0, itl_max_ms=1.0),
    "a bucket that holds a text": record(itl_hist={"5": "1"}, itl_sum_ms=1.0, itl_min_ms=1.0, itl_max_ms=1.0),
    "a bucket of nan": record(itl_hist={"5": float("nan")}, itl_sum_ms=1.0, itl_min_ms=1.0, itl_max_ms=1.0),
    "a bucket below zero": record(itl_hist={"5": 3, "6": -1}, itl_sum_ms=1.0, itl_min_ms=1.0, itl_max_ms=1.0),
    "an end whose notes are a number": {"end": {"reason": "done", "dialect": 7}},
    "an end whose note is a number": {"end": {"reason": "done", "dialect": [0]}},
    "an end without a text": {"end": {"reason": ["done"]}},
    "a selftest without levels": {"run": {**made_run(n=1)[0]["run"], "selftest": {"errors": {}}}},
    "a selftest of numbers": {"run": {**made_run(n=1)[0]["run"], "selftest": {"errors": [1e300]}}},
    "a selftest without a figure": {
        "run": {**made_run(n=1)[0]["run"], "selftest": {"errors": [{"streams": 1, "first_ms": 0}]}}
    },
    "a header that is a text": {"llmbench": "1", "run": "x"},
    "an audit that is a number": {"audit": 7},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_line_that_is_json_but_no_record_is_named_by_its_number(tmp_path, name):
    write_lines(tmp_path, [*made_run(n=3)[:2], FOREIGN[name], record()])
    with pytest.raises(llmbench.UserError, match="line 3"):
        build(tmp_path)


# --- the files that are made of it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 3])
def test_the_files_are_functions_of_the_lines(tmp_path, stages):
    """The same lines in another directory, at another time, give the same bytes."""
    lines, made = made_run(stages=stages), []
    for name in ("first", "second"):
        directory = write_lines(tmp_path / name, lines)
        build(directory)
        made.append({output: (directory / output).read_bytes() for output in OUTPUTS})
        time.sleep(0.01)
    assert made[0] == made[1]


def test_building_again_gives_the_same_bytes_and_touches_no_record(tmp_path):
    write_lines(tmp_path, made_run())
    before = (tmp_path / "results.jsonl").read_bytes()
    build(tmp_path)
    first = [(tmp_path / name).read_bytes() for name in OUTPUTS]
    build(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in OUTPUTS] == first
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(("results.jsonl", *OUTPUTS))


def test_the_returned_summary_is_the_written_one(tmp_path):
    write_lines(tmp_path, made_run(stages=2))
    made = build(tmp_path)
    text = (tmp_path / "summary.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(made))
    assert "测试-model" in text and "NaN" not in text and "Infinity" not in text and text.endswith("}\n")


CUT_OFF = {
    "warm-up only": made_run()[:2],
    "no end": made_run()[:-1],
    "one failure": [*made_run()[:1], record(status="timeout")],
    "one cancelled before its start": [*made_run()[:1], record(status="cancelled", start_ms=None)],
}
CUT_OFF_BEFORE_ANY_RECORD = {"header": made_run()[:1], "header and end": [made_run()[0], made_run()[-1]]}


def check_all_files(directory, lines):
    summary = build(write_lines(directory, lines))
    assert all((directory / name).stat().st_size for name in OUTPUTS)
    assert ("end" in summary) == any("end" in line for line in lines)


@pytest.mark.parametrize("name", CUT_OFF)
def test_a_run_that_was_cut_off_early_still_gives_all_files(tmp_path, name):
    check_all_files(tmp_path, CUT_OFF[name])


@pytest.mark.parametrize("name", CUT_OFF_BEFORE_ANY_RECORD)
def test_a_run_that_was_cut_off_before_any_record_still_gives_all_files(tmp_path, name):
    check_all_files(tmp_path, CUT_OFF_BEFORE_ANY_RECORD[name])


def test_a_last_line_that_was_cut_off_changes_nothing_but_a_notice(tmp_path):
    whole, cut, notices = (
        write_lines(tmp_path / "whole", made_run()[:-1]),
        write_lines(tmp_path / "cut", made_run()[:-1]),
        [],
    )
    with open(cut / "results.jsonl", "ab") as file:
        file.write(b'{"request_id":"cafe0001-0-99","status":"o')
    build(whole)
    build(cut, notices)
    assert len(notices) == 1
    for name in ("results.csv", "summary.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("data", [b"", b"no json\n{}\n", None])
def test_where_nothing_can_be_read_nothing_is_left(tmp_path, data):
    if data is not None:
        (tmp_path / "results.jsonl").write_bytes(data)
    with pytest.raises(llmbench.UserError):
        build(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != "results.jsonl"] == []


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_file_that_cannot_be_written_is_a_write_error_and_leaves_no_half(tmp_path, name):
    write_lines(tmp_path, made_run())
    (tmp_path / name).mkdir()
    with pytest.raises(llmbench.WriteError, match=name.replace(".", r"\.")):
        build(tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(RuntimeError), llmbench.WholeFile(str(path)) as file:
        file.write("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert path.read_text() == "old" and not list(tmp_path.glob("*.part"))


# --- results.csv ------------------------------------------------------------------------------------------------------


def test_the_csv_opens_in_a_spreadsheet(tmp_path):
    write_lines(tmp_path, made_run(n=5))
    build(tmp_path)
    data = (tmp_path / "results.csv").read_bytes()
    assert data.startswith(b"\xef\xbb\xbfrequest_id,prompt_id,phase,") and data.count(b"\r\n") == 1 + 6
    assert "中文" in data.decode("utf-8")
    names, *rows = read_csv(tmp_path)
    assert {len(row) for row in rows} == {len(names)}
    assert not set(names) & {"itl_hist", "chunk_ms", "first_content_raw", "final_frame_raw", "error_raw"}
    assert {"ttft_ms", "status", "out_tokens", "itl_max_ms", "err"} <= set(names)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0"])
def test_a_text_that_a_spreadsheet_would_run_gets_an_apostrophe(text):
    assert llmbench.csv_cell(text) == "'" + text


@pytest.mark.parametrize("value", ["a=b", "", "'=1", "你好", -5, -1.5, 0, True, None, "HTTP 500: x"])
def test_other_cells_stay_as_they_are(value):
    assert llmbench.csv_cell(value) is value


def test_every_cell_of_the_csv_is_guarded_and_numbers_stay_numbers(tmp_path):
    write_lines(tmp_path, [*made_run()[:1], record(prompt_id="=HYPERLINK(1)", err="@x", queue_ms=-0.5, lag_ms=None)])
    build(tmp_path)
    names, row = read_csv(tmp_path)
    cells = dict(zip(names, row))
    assert (cells["prompt_id"], cells["err"], cells["queue_ms"], cells["lag_ms"]) == (
        "'=HYPERLINK(1)",
        "'@x",
        "-0.5",
        "",
    )


ODD_TEXTS = [
    "", "plain", "a,b", 'say "hi"', '"', "two\nlines", "\r\n", "=1", "+1", "-1", "@x", "\t", "\r", "None", "x=1", "a+b",
    "a-b", "x@y", ", -", "您好，世界", "\u2028", "'", " lead", "\ud800", "%s", "🎉", "\0",
]  # fmt: skip
ODD_NUMBERS = [0, -1, 0.1, -0.5, 1e-7, 1e22, -1e-300, 105.12, True, False, 10**18, None]


@pytest.mark.parametrize("name", ["request_id", "prompt_id", "err", "finish_reason", "out_crc32"])
def test_a_row_is_the_one_that_the_csv_module_writes(name):
    """Most rows are put together without it, which is twice as fast; no reader may see which."""
    for value in ODD_TEXTS + ODD_NUMBERS:
        line = record(retransmits=0, **{name: value}) if value is not None else {**record(), name: None}
        text = io.StringIO(newline="")
        csv.writer(text).writerow([llmbench.csv_cell(line.get(column)) for column in llmbench.CSV_COLUMNS])
        assert llmbench.csv_row(line) == text.getvalue(), value


@pytest.mark.parametrize("value", ODD_NUMBERS)
def test_a_number_of_a_row_is_written_as_the_csv_module_does(value):
    line = {**record(), "queue_ms": value, "reused": value}
    text = io.StringIO(newline="")
    csv.writer(text).writerow([line.get(column) for column in llmbench.CSV_COLUMNS])
    assert llmbench.csv_row(line) == text.getvalue()


# --- the output directory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["results.jsonl", *OUTPUTS])
def test_results_are_never_overwritten(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(llmbench.UserError, match=f"already holds {name}"):
        llmbench.check_directory(str(tmp_path))


def test_an_empty_a_new_and_a_deep_directory_are_fine_and_nothing_is_made(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path), str(tmp_path / "a/b/c"), "new", "./a/../b", "中文"):
        llmbench.check_directory(path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_file_is_no_directory(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(llmbench.UserError, match=r"another .*with --out$"):
        llmbench.check_directory(str(tmp_path / path))
        llmbench.make_directory(str(tmp_path / path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(llmbench.UserError, match="cannot be written to"):
        llmbench.check_directory(str(tmp_path / "new"))


@pytest.mark.parametrize("model,name", [
    ("gpt-4o", "gpt-4o"), ("Qwen/Qwen2.5-7B", "Qwen_Qwen2.5-7B"), ("../../etc/passwd", "etc_passwd"),
    ("a b\n\x1b[2Jc", "a_b_2Jc"),
    ("", "model"), ("..", "model"), ("/", "model"), ("m" * 300, "m" * 60), ("模型", "model"),
])  # fmt: skip
def test_the_default_directory_is_a_plain_name(model, name):
    made = llmbench.default_directory(model, 0.0)
    assert made.startswith(f"llmbench-{name}-") and "/" not in made and made.isprintable()


# --- the header -------------------------------------------------------------------------------------------------------


def header_of(*words, url="https://user:p%40ss%2Fword@host:8443/v1?api-key=qk-778899&x=1"):
    """The header that a run with these words would write, as text and as a tree."""
    words = ["--url", url, "--model", "m", *words]
    config = llmbench.read_config(words)
    endpoint = llmbench.parse_url(config.url, llmbench.make_provider(config))
    tree = llmbench.make_header(config, endpoint, [], llmbench.shown_command(words), 0.0)
    return llmbench.encode_line(tree).decode("utf-8"), tree


LEAKS = {
    "--token": ["--token", SECRET],
    "--token=": [f"--token={SECRET}"],
    "-token": ["-token", SECRET],
    "-token=": [f"-token={SECRET}"],
    "--header Authorization": ["--header", f"Authorization: Bearer {SECRET}"],
    "--header=Authorization": [f"--header=Authorization: {SECRET}"],
    "-header x-api-key": ["-header", f"x-api-key:{SECRET}"],
    "--header Cookie": ["--header", f"Cookie: session={SECRET}"],
    "--header with a bearer": ["--header", f"X-Forwarded-Auth-Info: Bearer {SECRET}"],
    "the token once more": ["--token", SECRET, "--body", json.dumps({"user": f"me {SECRET}"})],
    "cmd:": ["--token", f"cmd:echo {SECRET}"],
}
WANTED = {
    "a plain header with a bearer": ["--header", f"X-Upstream: Bearer {SECRET}"],
    "a plain header with the token": ["--token", SECRET, "--header", f"X-Tenant: {SECRET}"],
    "--body": ["--body", json.dumps({"api_key": SECRET, "n": 1})],
    "--body, nested": ["--body=" + json.dumps({"extra": [{"access_token": SECRET}]})],
}


@pytest.mark.parametrize("name", LEAKS)
def test_the_header_holds_no_secret(name):
    text, tree = header_of(*LEAKS[name])
    assert SECRET not in text and json.dumps(SECRET)[1:-1] not in text
    assert "***" in tree["command"] or "cmd:" in name


@pytest.mark.parametrize("name", WANTED)
def test_the_header_holds_no_secret_of_other_headers_and_bodies(name):
    text, _ = header_of(*WANTED[name])
    assert SECRET not in text


def test_the_header_shows_no_password_and_no_query_key_of_the_url():
    text, tree = header_of()
    for hidden in ("p%40ss", "p@ss", "word@", "qk-778899"):
        assert hidden not in text
    assert tree["url"] == "https://host:8443/v1/chat/completions?api-key=***&x=1"


@pytest.mark.parametrize("password", ["p@ss-word-9", "pa'ss-word-9"])
def test_the_command_shows_no_part_of_an_odd_password(password):
    text, _ = header_of(url=f"https://user:{password}@host/v1")
    assert "ss-word-9" not in text


def test_what_is_no_secret_is_in_the_header():
    text, tree = header_of(
        "--max-tokens", "77", "--header", "X-Team: blue", "--body", '{"temperature": 0, "max_tokens": 5}'
    )
    config = tree["config"]
    assert (config["max_tokens"], config["header"], config["token_mode"]) == (77, ["X-Team: blue"], "usage")
    assert config["body"] == {"temperature": 0, "max_tokens": 5}
    assert config["token"] == "" and "77" in tree["command"] and "X-Team: blue" in text
    assert tree["started_at"] == "1970-01-01T00:00:00.000000Z"
    assert {"host", "address", "os", "arch", "python", "utc_offset", "tool_version", "run_id", "provider"} <= set(tree)


@pytest.mark.parametrize("words", [
    ["--token", "1234", "--body", '{"seed": 12345}'],
    ["--token", "null", "--body", '{"stop": [null, "null"]}'],
    ["--body", json.dumps({"note": 'see http://h/?key=a"b'})],
])  # fmt: skip
def test_redacting_a_body_leaves_it_json(words):
    assert header_of(*words)[1]["config"]["body"]


# --- assets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", llmbench.ASSETS)
def test_every_asset_is_there(name):
    assert ASSETS[name] == (ROOT / "assets" / name).read_bytes() != b""


def test_after_a_line_that_was_cut_off_every_other_one_names_the_cause(tmp_path, monkeypatch):
    writer = llmbench.ResultsWriter(str(tmp_path))
    monkeypatch.setattr(llmbench.os, "write", lambda _, line: len(line) - 1)
    for _ in range(3):
        with pytest.raises(llmbench.WriteError, match=r"results\.jsonl could not be written: No space left on device"):
            writer.write({"a": 1})
    writer.close()


# --- size -------------------------------------------------------------------------------------------------------------

BIG = """
import resource, sys, llmbench
llmbench.build_outputs(sys.argv[1], llmbench.load_assets(), print)
try:  # ru_maxrss holds what the process that started this one had, too
    with open("/proc/self/status") as status:
        print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
except OSError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.long
def test_two_hundred_thousand_records_are_summarised_in_bounded_memory_and_time(tmp_path):
    head, *_ = made_run(n=1)
    draw = random.Random(5)
    with open(tmp_path / "results.jsonl", "wb") as file:
        file.write(llmbench.encode_line(head))
        for number in range(200000):
            start = number * 5.0
            line = record(start, start + draw.uniform(50, 900), start + 1000.0, 30, request_id="cafe0001-0-%d" % number)
            line.update(itl_hist={"%d" % (800 + number % 50): 29}, itl_sum_ms=870.0, itl_min_ms=20.0, itl_max_ms=40.0)
            file.write(llmbench.encode_line(line))
    began = time.monotonic()
    command = [sys.executable, "-c", BIG, str(tmp_path)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=str(ROOT))
    scale = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * scale < 400e6
    assert time.monotonic() - began < 60
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["requests"]["success"] == 200000


# --- a results.jsonl in parts -----------------------------------------------------------------------------------------

in_parts = pytest.mark.skipif(llmbench.start_method() != "fork", reason="processes are not forked here")


def files_of(directory, lines, notices=None):
    """The bytes of the files that are made of these lines."""
    write_lines(directory, lines)
    llmbench.build_outputs(str(directory), ASSETS, ([] if notices is None else notices).append)
    assert sorted(path.name for path in directory.iterdir()) == sorted((*OUTPUTS, "results.jsonl"))
    return [(directory / name).read_bytes() for name in OUTPUTS]


def small_parts(monkeypatch, lines=7, parts=3):
    """Makes every file one that is read in parts; the list has an entry for each process that read one."""
    spans, beside = [], llmbench.Beside
    monkeypatch.setattr(llmbench, "PART_BYTES", 100)
    monkeypatch.setattr(llmbench, "PART_LINES", lines)
    monkeypatch.setattr(llmbench, "usable_cpus", lambda: parts)
    monkeypatch.setattr(llmbench, "Beside", lambda *given: spans.append(given[2]) or beside(*given))
    return spans


def varied_run(seed, stages):
    """A run in which everything occurs that a part has to add to the one before."""
    draw = random.Random(seed)
    lines = made_run(n=60, seed=seed, stages=stages, failing=0.3)
    for line in lines:
        if "request_id" not in line:
            continue
        if line["status"] == "ok":
            gaps = [draw.choice((0.2, 3.0, draw.uniform(1, 90))) for _ in range(draw.randrange(12))]
            line.update(with_gaps(line, gaps) if gaps else {})
            line.update(draw.choice(({}, {"compressed": "gzip"}, {"streamed": False}, {"clock": "user"},
                                     {"first_content_raw": "data: %d" % draw.randrange(99)})))  # fmt: skip
            line.update(out_crc32="%08x" % draw.randrange(9), out_chars=draw.choice((3, 40)))
            line["latency_from_scheduled_ms"] = float(draw.randrange(5))  # ties among the slowest
            if draw.random() < 0.3:
                line.update(cached_tokens=draw.randrange(40), rtt_ms=draw.random())
        else:
            host = "HTTP 500: on host %d" % draw.randrange(1000)
            line["err"] = draw.choice((host, "=cmd|' /C calc'!A0", 'no, "that"'))
            line.update(draw.choice(({}, {"error_raw": "<b>%d</b>" % draw.randrange(99)})))
    return lines


@in_parts
@pytest.mark.parametrize("seed", range(8))
def test_a_file_read_in_parts_gives_the_same_files_to_the_byte(tmp_path, monkeypatch, seed):
    lines = varied_run(seed, stages=1 + seed % 3)
    alone = files_of(tmp_path / "one", lines)
    spans = small_parts(monkeypatch, lines=1 + 5 * (seed % 4), parts=2 + seed % 3)
    assert files_of(tmp_path / "parts", lines) == alone
    assert len(spans) == 1 + seed % 3


@in_parts
def test_merged_files_whose_plans_come_late_are_read_in_parts_too(tmp_path, monkeypatch):
    head, *lines = varied_run(3, stages=3)
    stages = [{"stage": {"index": index, "load": {"concurrency": 3 + index}, "warmup": 0}} for index in range(3)]
    lines = [head, *lines[:50], *stages, *lines[50:]]
    alone = files_of(tmp_path / "one", lines)
    spans = small_parts(monkeypatch)
    assert files_of(tmp_path / "parts", lines) == alone
    assert len(spans) == 2


@in_parts
def test_samples_stand_in_the_order_in_which_they_came(tmp_path, monkeypatch):
    head, *lines = made_run(n=40, failing=0.0)
    lines[9]["final_frame_raw"] = "data: [DONE]"
    lines[30]["first_content_raw"] = "data: {}"
    lines[31]["final_frame_raw"] = "data: another"
    alone = files_of(tmp_path / "one", [head, *lines])
    assert b"[DONE]" in alone[1]
    spans = small_parts(monkeypatch, lines=3)
    assert files_of(tmp_path / "parts", [head, *lines]) == alone
    assert len(spans) == 2


@in_parts
def test_a_process_beside_ends_when_nobody_waits_for_it(tmp_path, monkeypatch):
    path = write_lines(tmp_path, made_run(n=40)) / "results.jsonl"
    monkeypatch.setattr(llmbench, "PART_LINES", 5)
    parents = iter([7, 7, 7, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    told = pytest.raises(llmbench.PartError, match="nobody waits")
    with open(tmp_path / "rows", "wb") as rows, open(tmp_path / "pieces", "wb") as pieces, told:
        llmbench.write_part(str(path), (0, path.stat().st_size), rows, pieces)


@in_parts
@pytest.mark.parametrize("place", [0, 1, 40, 100, -1])
@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"request_id":"x","stage":0}', b"\xff\xfe", b"7", b'{"run":7}',
                                    b'{"llmbench":"9","run":{}}', b"{} {}", b"{}"])  # fmt: skip
def test_a_damaged_file_read_in_parts_is_told_as_ever(tmp_path, monkeypatch, place, damage):
    raw = [llmbench.encode_line(line)[:-1] for line in varied_run(1, stages=2)]
    raw[place] = damage

    def outcome(directory):
        directory.mkdir()
        (directory / "results.jsonl").write_bytes(b"\n".join(raw) + (b"" if place == -1 else b"\n"))
        notices = []
        try:
            llmbench.build_outputs(str(directory), ASSETS, notices.append)
        except llmbench.UserError as error:
            notices.append("refused: %s" % error)
        files = {path.name: path.read_bytes() for path in directory.iterdir()}
        return [notice.replace(str(directory), "") for notice in notices], files

    alone = outcome(tmp_path / "one")
    spans = small_parts(monkeypatch)
    assert outcome(tmp_path / "parts") == alone
    assert spans


@in_parts
@pytest.mark.parametrize("trouble", ["killed", "no processes", "full disk"])
def test_where_a_process_is_lost_one_reads_it_all(tmp_path, monkeypatch, trouble):
    lines = varied_run(5, stages=2)
    alone = files_of(tmp_path / "one", lines)
    small_parts(monkeypatch)
    if trouble == "killed":
        monkeypatch.setattr(llmbench, "write_part", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    elif trouble == "no processes":
        monkeypatch.setattr(os, "fork", lambda: (_ for _ in ()).throw(BlockingIOError(11, "no more processes")))
    else:
        monkeypatch.setattr(llmbench, "write_part", lambda *_: (_ for _ in ()).throw(OSError(28, "no space left")))
    assert files_of(tmp_path / "parts", lines) == alone


def test_a_small_file_is_read_by_one_process(tmp_path):
    write_lines(tmp_path, varied_run(1, stages=1))
    path = tmp_path / "results.jsonl"
    assert llmbench.part_bounds(str(path)) == [0, path.stat().st_size]


# --- a results.jsonl that somebody edited -----------------------------------------------------------------------------

HEADER, PLAN, AUDIT = (json.loads(text) for text in (
    '{"llmbench":"1","run":{"run_id":"r","model":"m","config":{"concurrency":[1],"slo":["ttft.p95<=800ms"],'
    '"token_mode":"usage","prompts":{"source":"built-in","count":3}}}}',
    '{"stage":{"index":0,"load":{"concurrency":1},"total":5,"warmup":0}}',
    '{"audit":{"stage":0,"part":0,"wall_ms":5000.0,"cpu_percent":3.5,"loop_delay_max_ms":1.5,"due":5,"started":5,'
    '"dropped":0,"date_offset_ms":[-1.0,2.0],"lag_hist":{"300":7},"network":{"address":"10.0.0.7:443"}}}',
))  # fmt: skip
WRONG = ("x", None, [], {}, True, 1e308, -1, 10**30, ["x"], {"x": "x"})


def places(tree, way=()):
    """The way to each value in a tree."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*way, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*way, key))


def edited(line, way, value):
    """A line with another value in one place."""
    line = json.loads(json.dumps(line))
    tree = line
    for key in way[:-1]:
        tree = tree[key]
    tree[way[-1]] = value
    return line


def outcome(directory, lines):
    """What becomes of a file: its summary, or the one line that refuses it. Anything else is raised."""
    write_lines(directory, lines)
    try:
        return llmbench.build_outputs(str(directory), ASSETS, [].append)
    except llmbench.UserError as error:
        assert str(error).count("\n") == 0
        return str(error)


@pytest.mark.parametrize("key", ["out_tokens", "ttft_ms", "start_ms", "itl_sum_ms"])
def test_a_record_with_a_number_beyond_all_reckoning_is_refused_by_its_line(tmp_path, key):
    lines = [HEADER, PLAN, record(), record(1.0, itl_hist={"700": 3}, itl_min_ms=1.0, itl_max_ms=1.0, **{key: 10**400})]
    assert "line 4 is not a record" in outcome(tmp_path, [*lines, {"end": {"reason": "done"}}])


@pytest.mark.parametrize("which", range(3), ids=["header", "plan", "audit"])
def test_a_line_of_wrong_types_is_refused_by_its_number_or_harmless(tmp_path, which):
    lines = [HEADER, PLAN, *(record(float(n), first=100.0 + n) for n in range(5)), AUDIT, {"end": {"reason": "done"}}]
    at = [0, 1, 7][which]
    assert outcome(tmp_path, lines)["requests"]["success"] == 5
    refused = set()
    for way in places(lines[at]):
        for value in WRONG:
            made = outcome(tmp_path, [*lines[:at], edited(lines[at], way, value), *lines[at + 1 :]])
            if isinstance(made, str):
                refused.add(way)
                expected = ("line %d " % (at + 1), "of format", "--slo", "a number that no run has")
                assert any(said in made for said in expected)
    telling = [
        {("run", "config", "slo"), ("run", "config", "prompts"), ("run", "config", "concurrency")},
        {("stage", "index"), ("stage", "load", "concurrency"), ("stage", "total")},
        {("audit", "stage"), ("audit", "lag_hist"), ("audit", "network", "address"), ("audit", "cpu_percent")},
    ]
    assert telling[which] <= refused


@pytest.mark.parametrize("key", ["latency_ms", "ttft_ms", "start_ms", "ttft_from_scheduled_ms", "connect_ms"])
@pytest.mark.parametrize("value", [1e308, -1e308, 10**30])
def test_a_time_that_no_run_has_is_refused(tmp_path, key, value):
    lines = [HEADER, PLAN, *(record(float(n)) for n in range(5)), {**record(9.0), key: value}, AUDIT]
    made = outcome(tmp_path, lines)
    assert isinstance(made, dict) or "line 8 is not a record" in made or "a number that no run has" in made
    if key == "latency_ms":
        assert "line 8" in made
