"""Progress and tables: what stands on the terminal, how wide it is, and that a stuck terminal holds nothing back."""

from __future__ import annotations

import ast
import io
import os
import re
import string
import subprocess
import sys
import threading
import time

import pytest
from made_records import collect, loaded_run, loaded_stage, made_run, record, write_lines

import llmbench
from conftest import ROOT

ASSETS = llmbench.load_assets()
TEXTS = {language: llmbench.load_texts(ASSETS, language) for language in ("en", "zh")}
GATES = [llmbench.gate_example(metric) for metric in llmbench.GATE_UNITS]
SOURCE = (ROOT / "llmbench.py").read_text(encoding="utf-8")
BOTH = pytest.mark.parametrize("texts", list(TEXTS.values()), ids=list(TEXTS))


class Screen(io.StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, terminal=False):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def plain(style, text):
    return text


def lines_of(lines, texts, **config):
    return llmbench.summary_lines(llmbench.summarize(collect(lines, **config)), texts, plain)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value,shown", [
    (0, "0"), (0.0, "0"), (0.0004, "<0.001"),
    (0.001, "0.001"), (0.0851, "0.085"), (0.5, "0.500"), (0.99949, "0.999"), (0.9996, "1.00"),
    (1, "1.00"), (1.386, "1.39"), (9.99, "9.99"), (9.996, "10.0"), (64.12, "64.1"), (99.94, "99.9"), (99.96, "100"),
    (100, "100"), (903.4, "903"), (999.4, "999"), (999.6, "1,000"), (1607.2, "1,607"), (1234567.8, "1,234,568"),
    (-1.386, "-1.39"), (-1607, "-1,607"),
])  # fmt: skip
def test_three_significant_digits(value, shown):
    assert llmbench.figure(value) == shown


def test_a_larger_number_never_looks_smaller():
    values = [0.001 * 1.01**step for step in range(1600)]
    shown = [float(llmbench.figure(value).replace(",", "")) for value in values]
    assert shown == sorted(shown)
    assert all(abs(made / value - 1) < 0.006 for made, value in zip(shown, values) if value > 0.1)


@pytest.mark.parametrize("seconds,shown", [
    (0, "0:00"), (0.6, "0:01"), (59.4, "0:59"), (59.6, "1:00"), (61, "1:01"), (3599.7, "1:00:00"), (3661, "1:01:01"),
    (360000, "100:00:00"),
])  # fmt: skip
def test_short_durations(seconds, shown):
    assert llmbench.clock_text(1000.0 * seconds) == shown


# --- width ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text,width", [
    ("", 0), ("abc", 3), ("首字时间", 8), ("P50，毫秒", 9), ("한국어", 6), ("カナ", 4), ("ｶﾅ", 2), ("（全角）", 8),
    ("– × † …", 7),
])  # fmt: skip
def test_cjk_characters_take_two_columns(text, width):
    assert llmbench.text_width(text) == width


@pytest.mark.parametrize("text,width,right,shown", [
    ("ab", 5, False, "ab   "), ("ab", 5, True, "   ab"), ("中文", 5, False, "中文 "), ("中文", 3, True, "中文"),
    ("", 2, True, "  "),
])  # fmt: skip
def test_padding(text, width, right, shown):
    assert llmbench.padded(text, width, right) == shown


def test_columns_are_aligned_whatever_their_script():
    lines = llmbench.align([["", "P50", "均值"], ["首字时间, ms", "64.1†", "1"], ["TTFT", "7", "1,607"], ["short"]])
    assert lines == [
        "                P50   均值",
        "首字时间, ms  64.1†      1",
        "TTFT              7  1,607",
        "short",
    ]


@BOTH
def test_the_tables_columns_end_at_the_same_place(texts):
    lines = lines_of(made_run()[1:], texts)
    head = next(index for index, line in enumerate(lines) if "P50" in line)
    table = lines[head : head + 6]
    assert len({llmbench.text_width(line) for line in table}) == 1, "\n".join(table)
    assert max(llmbench.text_width(line) for line in lines if "://" not in line) <= 100


# --- colours ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal,environment,coloured", [
    (True, {"TERM": "xterm"}, True), (True, {}, True), (True, {"NO_COLOR": ""}, True), (True, {"NO_COLOR": "1"}, False),
    (True, {"TERM": "dumb"}, False), (False, {"TERM": "xterm"}, False),
])  # fmt: skip
def test_colour_is_for_terminals_that_want_it(monkeypatch, terminal, environment, coloured):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    shown = llmbench.Paint(Screen(terminal))("red", "bad")
    assert shown == ("\x1b[31mbad\x1b[0m" if coloured else "bad")


@BOTH
def test_the_summary_in_a_file_has_no_escape_codes(texts, capsys):
    llmbench.print_summary(llmbench.summarize(collect(made_run()[1:])), texts, "out")
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\r" not in shown and "report.html" in shown


def test_an_endpoint_cannot_send_escape_codes_to_the_terminal():
    lines = [record(), record(status="http_error", err="HTTP 500: \x1b]0;title\x07\x1b[2J\rgone\x9b31m")]
    shown = "\n".join(lines_of(lines, TEXTS["en"]))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown)


# --- the summary ------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("lines", [
    made_run()[1:], made_run(stages=3)[1:], [], [record(status="timeout")], [record(status="dropped", start_ms=None)],
    [record(tokens=None)], [record(first=None)], [record(phase="warmup")],
])  # fmt: skip
def test_whatever_became_of_a_run_it_is_shown(texts, lines):
    shown = "\n".join(lines_of(lines, texts, concurrency=[2, 4, 8]))
    assert "测试-model  http://h/v1/x" in shown
    assert not re.search(r"\{\w*\}|None|nan|\binf\b", shown)


def test_each_stage_has_its_tables():
    shown = "\n".join(lines_of(made_run(stages=3)[1:], TEXTS["en"], concurrency=[1, 4, 8]))
    for load in ("1 stream\n", "4 streams\n", "8 streams\n"):
        assert load in shown
    assert shown.count("TTFT, ms") == 3


def test_a_limited_percentile_is_marked_and_the_mark_explained():
    few, many = (lines_of([record(i, i + 50, i + 90) for i in range(n)], TEXTS["en"]) for n in (25, 1000))
    row = next(line for line in few if "TTFT" in line)
    assert row.split()[2:] == ["50.0", "50.0†", "50.0†", "50.0†", "50.0", "50.0", "25"]
    assert TEXTS["en"]["terminal.limited"] in "\n".join(few)
    assert "†" not in "\n".join(many)


@pytest.mark.parametrize("statuses,shown", [
    ("ok ok ok timeout", "3/4  75.00 %  1 failed"),
    ("ok cancelled dropped dropped", "1/4  100.00 %  1 cancelled, 2 dropped"),
    ("cancelled", "0/1  –  1 cancelled"),
    ("ok " * 2999 + "timeout", "2,999/3,000  99.96 %  1 failed"),  # never rounded up
])  # fmt: skip
def test_the_first_row_says_what_succeeded(statuses, shown):
    lines = lines_of([record(number, status=status) for number, status in enumerate(statuses.split())], TEXTS["en"])
    row = next(line for line in lines if line.lstrip().startswith("Succeeded"))
    assert re.sub(r"  +", "  ", row.replace("Succeeded", "").strip()) == shown


def test_missing_usage_and_the_commonest_failures_are_said():
    failures = [record(i, status="http_error", err="HTTP %d: no" % (500 + i % 7)) for i in range(30)]
    shown = "\n".join(lines_of([record(tokens=None), *failures], TEXTS["en"]))
    assert "1 answers came without token counts" in shown
    assert shown.count("http_error") == 5 and "and 2 other kinds of failure" in shown


# --- gates and open loops ---------------------------------------------------------------------------------------------


def shown(lines, language="en"):
    """What stands on the terminal for the lines of a whole file."""
    collector = collect(lines[1:], **lines[0]["run"]["config"])
    return "\n".join(llmbench.summary_lines(llmbench.summarize(collector), TEXTS[language], plain))


def test_each_gate_has_its_line():
    gates = ["ttft.p95<=400ms", "ttft.p99<=10s", "success>=99%", "goodput>=99.5%", "itl.p50<1ms", "throughput>=1"]
    text = shown(loaded_run(loaded_stage(n=300), slo=gates, rps=[4.0]))
    table = text[text.index("  Gates\n") :].splitlines()[1:8]
    assert table[0].split() == ["measured", "required", "n"]
    found = [re.split(r"  +", line.strip()) for line in table[1:]]
    assert [row[:2] for row in found] == [
        ["PASS", "TTFT P95"], ["PASS", "TTFT P99"], ["PASS", "Success rate"], ["FAIL", "Goodput share"],
        ["FAIL", "inter-chunk gap P50"], ["PASS", "Output throughput"]]  # fmt: skip
    assert [row[3] for row in found] == [
        "<= 400 ms", "<= 10,000 ms", ">= 99.0 %", ">= 99.50 %", "< 1.00 ms", ">= 1.00 tok/s"]  # fmt: skip
    assert "†" in found[1][2] and "†" not in found[0][2] and found[0][4] == "300"
    assert len({len(line) for line in table}) == 1


def test_a_gate_that_is_missed_by_little_shows_more_digits():
    entry = {"metric": "ttft", "stat": "p95", "op": "<=", "limit": 800.0, "value": 800.04, "gate": "ttft.p95<=800ms"}
    assert llmbench.gate_pair(entry) == ("800.04 ms", "800.00 ms")
    entry = {"metric": "success", "stat": "", "op": ">=", "limit": 0.999, "value": 0.99899, "gate": "success>=99.9%"}
    assert llmbench.gate_pair(entry)[0] != llmbench.gate_pair(entry)[1]
    assert llmbench.gate_pair({**entry, "value": None})[0] == "–"


@BOTH
def test_an_invalid_run_judges_no_gate(texts):
    lines = loaded_run(loaded_stage(n=50), slo=["ttft.p95<=400ms"], rps=[4.0])
    for line in lines:
        if "audit" in line:
            line["audit"].update(cpu_percent=99.0)
    text = "\n".join(lines_of(lines[1:], texts, slo=["ttft.p95<=400ms"], concurrency=[]))
    assert texts["terminal.gates.not_judged"] in text
    assert texts["terminal.gate.passed"] not in text.replace(texts["terminal.gates.not_judged"], "")


@pytest.mark.parametrize("load,config,title", [
    ({"rps": 4.0}, {}, "Open loop, 4 req/s Poisson"),
    ({"rps": 4.25, "cap": 16}, {"arrival": "constant"}, "Open loop, 4.25 req/s evenly spaced, at most 16 in flight"),
    ({"rps": 4.0}, {"arrival": "gamma:0.5"}, "Open loop, 4 req/s gamma of shape 0.5"),
    ({"rps": 3.98765, "trace": 1}, {}, "Open loop, 3.99 req/s on average, at the trace's own times"),
    ({"concurrency": 8, "input_tokens": 131072}, {}, "8 streams, 131,072 input tokens"),
])  # fmt: skip
def test_the_load_of_a_stage_in_words(load, config, title):
    assert "\n%s\n" % title in shown(loaded_run(loaded_stage(load=load, n=30), **config))


@pytest.mark.parametrize("language", TEXTS)
def test_in_an_open_loop_times_stand_from_start_and_from_due_and_one_sentence_says_which_to_quote(language):
    texts = TEXTS[language]
    text = shown(loaded_run(loaded_stage(load={"rps": 8.0, "cap": 10}, n=200), rps=[8.0]), language)
    for name in ("ttft_ms", "ttft_from_scheduled_ms", "latency_ms", "latency_from_scheduled_ms"):
        assert "  " + texts["metric." + name] + ", ms" in text
    folded = re.sub(r"\s+", "", text)
    assert folded.count(re.sub(r"\s+", "", texts["open.quote"])) == 1
    assert texts["metric.queue_ms.capped"] in text and texts["client.achieved"] in text
    closed = shown(loaded_run(loaded_stage(load={"concurrency": 10}, n=50)), language)
    assert texts["metric.ttft_from_scheduled_ms"] not in closed and texts["open.quote"][:20] not in closed


@BOTH
def test_the_tables_of_an_open_loop_fit_the_terminal(texts):
    lines = loaded_run(loaded_stage(load={"rps": 8.0, "cap": 10}, n=200), rps=[8.0])
    gates = ["ttft_from_scheduled.p95<=10s", "latency_from_scheduled.p99<=100s"]
    made = lines_of(lines[1:], texts, slo=gates, concurrency=[])
    assert max(llmbench.text_width(line) for line in made if "://" not in line) <= 100


@pytest.mark.parametrize("slow,said", [
    ((1, 1, 4, 1), "2 concurrent streams is the highest load that passed every gate, confirmed by a second stage"),
    ((1, 1, 4), "2 concurrent streams is the highest load that passed every gate, not confirmed by a second stage"),
    ((4,), "No load passed every gate. At 1 stream, the lowest that did not, 1 of 1 gates failed (TTFT P50"),
    ((1, 1), "2 concurrent streams passed every gate, not confirmed by a second stage"),
])  # fmt: skip
def test_a_search_leads_with_what_it_found(slow, said):
    loads = (1, 2, 4, 2)
    stages = [loaded_stage(number, {"concurrency": loads[number]}, 30, slow=one) for number, one in enumerate(slow)]
    text = re.sub(r"\s+", " ", shown(loaded_run(*stages, find_max="concurrency", slo=["ttft.p50<=400ms"])))
    assert text.count(said) == 1 and "**" not in text
    assert text.index(said) < text.index("Gates")


def test_lengths_stand_beside_what_was_asked_for():
    stage = loaded_stage(n=100, load={"concurrency": 8, "input_tokens": 2048})
    for number, line in enumerate(line for line in stage if "request_id" in line):
        line.update(in_tokens=2048 + 41, in_tokens_target=2048, out_tokens=150 - (number < 3), out_tokens_target=150)
    text = shown(loaded_run(stage))
    assert re.search(r"Prompt length +2,089  tok  asked for 2,048 \(\+2\.0 %\)\n", text)
    assert re.search(r"Answer length +150  tok  asked for 150 \(-0\.0 %\)  3 came shorter\n", text)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_an_output_that_takes_nothing_is_one_line(tmp_path):
    write_lines(tmp_path, loaded_run(loaded_stage(n=20)))
    command = [sys.executable, llmbench.__file__, "report", str(tmp_path)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (5, 1) and "standard output" in done.stderr


def test_where_nothing_succeeded_it_says_what_to_do():
    lines = made_run(n=3, failing=1.0)
    err = "connect time-out (10s) while waiting for TLS"
    lines = [{**line, "err": err} if "err" in line else line for line in lines]
    told = shown(lines)
    assert "There are no figures:" in told and "reservations" not in told
    assert "(10s)" in told and "#" not in told
    assert re.search(r"What is wrong, .*:\n  python3 llmbench\.pyz check --url http\S+\n", told + "\n")
    assert "llmbench.pyz check" not in shown(made_run(n=3))


def test_what_a_file_says_of_its_end_moves_no_cursor(capsys, tmp_path):
    odd = "\x1b]0;P\x07\x9b31m\u202e\nx"
    lines = loaded_run(loaded_stage(n=20), reason=odd)
    lines[-1]["end"]["dialect"] = [odd]
    write_lines(tmp_path, lines)
    assert llmbench.main(["report", str(tmp_path), "--lang", "en"]) == 0
    told = capsys.readouterr().out
    assert told.count("]0;P") == 3 and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", told)


# --- progress ---------------------------------------------------------------------------------------------------------


def progress(**values):
    return llmbench.Progress(**{"began": 100.0, "total": 40, "done": 10, "in_flight": 4, "concurrency": 4, **values})


@pytest.mark.parametrize("values,shown", [
    ({}, "10/40 done  4 in flight  0 failed  0:30 left"),
    ({"total": None, "duration": 60.0}, "10 done  4 in flight  0 failed  0:50 left"),
    ({"duration": 15.0}, "10/40 done  4 in flight  0 failed  0:05 left"),
    ({"done": 0, "failed": 0}, "0/40 done  4 in flight  0 failed"),
    ({"total": None}, "10 done  4 in flight  0 failed"),
    ({"duration": 5.0, "total": None}, "10 done  4 in flight  0 failed  0:00 left"),
    ({"tokens": 1500, "failed": 2}, "10/40 done  4 in flight  2 failed  150 tok/s  0:30 left"),
    ({"chars": 25}, "10/40 done  4 in flight  0 failed  2.50 chars/s  0:30 left"),
    ({"stages": 3, "stage": 1}, "stage 2/3 (4 streams)  10/40 done  4 in flight  0 failed  0:30 left"),
    ({"stages": 2, "rps": 4.0, "concurrency": 8, "waiting": 3},
     "stage 1/2 (4 req/s)  10/40 done  4 in flight  3 waiting  0 failed  0:30 left"),
    ({"stages": 0, "stage": 2}, "stage 3/? (4 streams)  10/40 done  4 in flight  0 failed  0:30 left"),
    ({"phase": "warmup"}, "warm-up  10/40 done  4 in flight  0 failed  0:30 left"),
    ({"ttft": {llmbench.log_bucket(0.2): 10}}, "10/40 done  4 in flight  0 failed  TTFT P50/P95 200/200 ms  0:30 left"),
])  # fmt: skip
def test_a_progress_line(values, shown):
    line = llmbench.progress_line(progress(**values), TEXTS["en"], now=110.0)
    assert re.sub(r"\d+/\d+ ms", "200/200 ms", line) == shown
    assert "\n" not in line


@BOTH
def test_a_progress_line_at_its_very_first_moment(texts):
    assert llmbench.progress_line(progress(done=0, in_flight=0, tokens=5), texts, now=100.0)


@pytest.fixture
def fast(monkeypatch):
    """Progress that is drawn at once."""
    monkeypatch.setattr(llmbench, "LIVE_LINE_SECONDS", 0.005)
    monkeypatch.setattr(llmbench, "PLAIN_LINE_SECONDS", 0.0)
    monkeypatch.setenv("TERM", "xterm")


def draw(mode, stream, until, state=None):
    """Runs a ProgressPrinter until `until()` is true, two seconds at most; returns how long its end took."""
    with llmbench.ProgressPrinter(mode, stream, state or progress(began=llmbench.clock()), TEXTS["zh"]):
        patience = time.monotonic() + 2
        while not until() and time.monotonic() < patience:
            time.sleep(0.002)
        assert until()
        began = time.monotonic()
    return time.monotonic() - began


@pytest.mark.parametrize("mode,terminal,live", [
    ("auto", True, True), ("auto", False, False), ("bar", False, True), ("lines", True, False),
])  # fmt: skip
def test_bar_on_a_terminal_and_lines_elsewhere(fast, mode, terminal, live):
    screen = Screen(terminal)
    draw(mode, screen, lambda: len(screen.getvalue()) > 200)
    shown = screen.getvalue()
    assert ("\x1b" in shown) == ("\r" in shown) == live
    if live:
        assert shown.endswith("\r\x1b[K") and "\n" not in shown
    else:
        assert shown.endswith("\n")


def test_a_live_line_never_wraps(fast, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    screen = Screen(True)
    state = progress(began=llmbench.clock(), tokens=10**9, stages=3, ttft={1000: 10})
    draw("bar", screen, lambda: len(screen.getvalue()) > 200, state)
    shown = re.split("\r\x1b\\[K", screen.getvalue())
    assert max(llmbench.text_width(line) for line in shown) <= 39


def test_a_note_is_said_once(fast):
    screen = Screen()
    draw(
        "lines",
        screen,
        lambda: len(screen.getvalue()) > 300,
        progress(began=llmbench.clock(), notes=["no stream_options"]),
    )
    assert screen.getvalue().count("llmbench: no stream_options\n") == 1


@pytest.mark.parametrize("mode", ["bar", "lines"])
def test_every_note_is_said_and_the_last_at_the_end(mode):
    """However fast they come one after the other: the line is drawn a few times a second."""
    screen, state = Screen(True), progress(began=llmbench.clock())
    with llmbench.ProgressPrinter(mode, screen, state, TEXTS["en"]):
        state.notes += ["probe 1", "probe 2"]
        state.notes.append("probe \x1b]0;3")
    said = re.findall("llmbench: (.*)\n", screen.getvalue())
    assert said == ["probe 1", "probe 2", "probe \ufffd]0;3"]


def test_none_writes_nothing(fast):
    screen = Screen(True)
    began = time.monotonic()
    draw("none", screen, lambda: time.monotonic() - began > 0.05, progress(began=llmbench.clock(), notes=["x"]))
    assert screen.getvalue() == ""


def test_before_the_first_request_nothing_is_drawn(fast):
    screen, began = Screen(True), time.monotonic()
    draw("bar", screen, lambda: time.monotonic() - began > 0.05, progress(began=0.0))
    assert screen.getvalue().strip("\r\x1b[K") == ""


def test_a_terminal_that_takes_nothing_holds_nothing_back(fast):
    class Stuck(Screen):
        stuck, release = threading.Event(), threading.Event()

        def write(self, text):
            self.stuck.set()
            self.release.wait(20)
            return len(text)

    screen = Stuck(True)
    try:
        assert draw("bar", screen, screen.stuck.is_set) < 1.9
    finally:
        screen.release.set()


@pytest.mark.parametrize("error", [OSError(5, "gone"), BrokenPipeError(), ValueError("closed"),
                                   UnicodeEncodeError("ascii", "中", 0, 1, "no")])  # fmt: skip
@pytest.mark.parametrize("mode", ["bar", "lines"])
def test_a_terminal_that_is_gone_is_left_alone(fast, error, mode):
    class Gone(Screen):
        tries = 0

        def write(self, text):
            self.tries += 1
            raise error

    screen = Gone(True)
    assert draw(mode, screen, lambda: screen.tries) < 0.5
    assert screen.tries <= 2


# --- texts ------------------------------------------------------------------------------------------------------------


def section(title):
    """The lines of one section of llmbench.py."""
    found = re.search(rf"^# \d+\. {title}:.*?(?=^# =+\n# \d+\. |\Z)", SOURCE, re.MULTILINE | re.DOTALL)
    return found[0]


def keys_used():
    """The keys that the terminal's code takes from its texts: written out, or made of a prefix and a table."""
    code = section("Terminal") + section("Commands")
    keys = set(re.findall(r'texts(?:\.get\(|\[)\s*"([a-z_.]+)"\s*[\]),]', code))
    keys |= {
        key for line in re.findall(r"texts\[(.*?)\]", code) for key in re.findall(r'"(terminal\.[a-z_.]*[a-z_])"', line)
    }
    keys |= {"terminal." + status for status in ("failure", "cancelled", "dropped")}
    keys.add("metric.queue_ms.capped")
    keys |= {"load." + word for word in ("cap", "input", "again", "of")} | {"rate", "streams", "streams.one"}
    keys |= {"arrival." + kind for kind in ("poisson", "constant", "gamma", "trace")}
    shown = (*llmbench.TABLED_METRICS, *(gate.figure for gate in map(llmbench.parse_gate, GATES)), "rps", "goodput_rps")
    return sorted(keys | {"metric." + name for name in shown})


@BOTH
def test_every_text_that_the_terminal_uses_is_there(texts):
    keys = keys_used()
    assert len(keys) > 25 and "terminal.load_one" in keys
    assert [key for key in keys if not texts.get(key, "").strip()] == []


def test_both_languages_have_the_same_keys_and_the_same_places_to_fill_in():
    english, chinese = TEXTS["en"], TEXTS["zh"]
    definitions = {"definition." + name for name in llmbench.METRICS}  # in English they stand in METRICS
    assert set(chinese) - definitions == set(english)
    for key, text in english.items():
        fields = [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in (text, chinese[key])]
        assert fields[0] == fields[1], key


def test_the_chinese_texts_of_the_terminal_are_chinese():
    latin = [
        key
        for key, text in TEXTS["zh"].items()
        if key.startswith("terminal.") and not re.search("[\u4e00-\u9fff]", text)
    ]
    assert latin == []


def test_the_key_search_finds_what_the_code_says():
    """What the two patterns above look for are all the ways in which the code names a text."""
    dynamic = [ast.dump(node.slice) for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Subscript)
               and isinstance(node.value, ast.Name) and node.value.id == "texts"
               and any(isinstance(part, ast.BinOp) for part in ast.walk(node.slice))]  # fmt: skip
    assert len(dynamic) <= 4, dynamic  # statuses of requests, the verdict's word and sentence, its reasons
