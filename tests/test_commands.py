"""Reading the command line, every user's mistake in one line, and where secrets are not to be seen."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from made_records import made_run, write_lines

import llmbench
from conftest import ROOT, SUPPORTED, interpreter

SECRET = "sk-4f9aQz71xyz"
FLAGS = {flag.name: flag for flag in llmbench.RUN_FLAGS}
ERROR = re.compile(r"llmbench: error: [^\n]{10,300}\n")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("LLMBENCH_TOKEN", "OPENAI_API_KEY", "LC_ALL", "LC_MESSAGES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANG", "C.UTF-8")


def config_of(*words):
    return llmbench.read_config(["--url", "mock:", *words])


def refusal(*words):
    """The line with which a command line is refused in this process."""
    with pytest.raises(llmbench.UserError) as caught:
        llmbench.dispatch(list(words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_main(capsys, *words):
    try:
        status = llmbench.main(list(words))
    except SystemExit as end:  # argparse's --help
        status = end.code
    shown = capsys.readouterr()
    return status, shown.out, shown.err


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text,seconds", [
    ("500ms", 0.5), ("30s", 30.0), ("5m", 300.0), ("8h", 28800.0), ("1.5s", 1.5), (".5s", 0.5), ("2.", 2.0),
    ("45", 45.0),
    ("0.25", 0.25), (" 3s ", 3.0), ("1ms", 0.001),
])  # fmt: skip
def test_durations(text, seconds):
    assert llmbench.read_duration(text) == pytest.approx(seconds)


def test_a_duration_beyond_all_reckoning():
    with pytest.raises(ValueError, match=r"^is too long$"):
        llmbench.read_duration("9" * 400)


@pytest.mark.parametrize("text", ["", "s", "0", "0s", "0.0ms", "-1s", "5 m", "1h30m", "1e3", "inf", "nan", "5d", "5S",
"5us", "１s",
                                  "1,5s", "5s\n6s"])  # fmt: skip
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match=r"^(needs a duration such as|must be above 0)"):
        llmbench.read_duration(text)


@pytest.mark.parametrize("read,text,value", [
    (llmbench.read_count(1), "1", 1), (llmbench.read_count(0), "0", 0), (llmbench.read_count(1), " 7 ", 7),
    (llmbench.read_counts, "1,2,4", [1, 2, 4]), (llmbench.read_counts, "16", [16]),
    (llmbench.read_counts, "1, 2", [1, 2]),
    (llmbench.read_choice("a", "b"), "b", "b"), (llmbench.read_json_object, '{"a": [1, null]}', {"a": [1, None]}),
])  # fmt: skip
def test_values(read, text, value):
    assert read(text) == value


@pytest.mark.parametrize("read,texts", [
    (llmbench.read_count(1), ["0", "-1", "1.0", "", "x", "１", "1e3", "0x1", "1_000", "9" * 10]),
    (llmbench.read_counts, ["", "0", "1,", ",1", "1,,2", "1;2", "1,-2", "1..4"]),
    (llmbench.read_choice("a", "b"), ["", "A", "c", "a b"]),
    (llmbench.read_json_object, ["", "x", "[1]", "1", "null", '"a"', "{", "{'a': 1}"]),
])  # fmt: skip
def test_bad_values(read, texts):
    for text in texts:
        with pytest.raises(ValueError, match=r"^needs "):
            read(text)


@pytest.mark.parametrize("text", ['{"temperature": NaN}', '{"n": Infinity}'])
def test_a_body_is_strict_json(text):
    with pytest.raises(ValueError, match=r"^needs "):
        llmbench.read_json_object(text)


# --- flags ------------------------------------------------------------------------------------------------------------

# A value for each flag and the field of the configuration that it sets.
SET_BY = {
    "url": ("http://h/v1", "http://h/v1"), "provider": ("openai2", "openai2"), "model": ("m", "m"),
    "token": ("t0k", "t0k"), "auth": ("api-key", "api-key"), "auth-key": ("ak", "ak"), "auth-secret": ("sk", "sk"),
    "auth-opt": ("header=x-api-key", {"header": "x-api-key"}),
    "slo": ("success>=99%", ["success>=99%"]), "find-max": ("concurrency", "concurrency"),
    "input-tokens": ("64,128", "64,128"), "prefix-tokens": ("50", 50), "timestamp-unit": ("s", "s"),
    "trace-speed": ("2", 2.0), "order": ("shuffled", "shuffled"), "turns": ("3", 3),
    "output-tokens": ("64", 64), "dry-run": (None, True),
    "max-errors": ("5%", "5%"), "max-total-tokens": ("9000", 9000), "shard": ("1/4", "1/4"),
    "start-at": ("2999-01-02T03:04:05+08:00", "2999-01-01T19:04:05.000000Z"),
    "rps": ("0.5,2", [0.5, 2.0]), "arrival": ("gamma:2", "gamma:2"), "ramp": ("3s", 3.0),
    "concurrency": ("2,4", [2, 4]), "total-requests": ("7", 7), "duration": ("9s", 9.0), "grace": ("1s", 1.0),
    "warmup": ("3", 3), "max-tokens": ("5", 5), "max-tokens-field": ("max_completion_tokens", "max_completion_tokens"),
    "token-mode": ("chars", "chars"), "think-tags": ("off", "off"), "workload-file": ("w.txt", "w.txt"),
    "timeout": ("1m", 60.0), "connect-timeout": ("2s", 2.0), "ttft-timeout": ("3s", 3.0), "idle-timeout": ("4s", 4.0),
    "client-cert": ("me.pem", "me.pem"), "client-key": ("me.key", "me.key"),
    "server-name": ("llm.example", "llm.example"), "proxy": ("10.0.0.1:3128", "http://10.0.0.1:3128"),
    "resolve": ("h:443:10.0.0.7", ["h:443:10.0.0.7"]),
    "insecure": (None, True), "ca-cert": ("ca.pem", "ca.pem"), "header": ("K: V", ["K: V"]),
    "body": ('{"a":1}', {"a": 1}),
    "end-optional": (None, True), "count-connect": (None, True), "record-chunks": (None, True), "out": ("o", "o"),
    "markdown": (None, True), "junit": (None, True),
    "seed": ("42", 42), "processes": ("3", 3),
    "progress": ("lines", "lines"), "lang": ("zh", "zh"), "no-unique": (None, False),
    "no-stream": (None, False), "provider-file": ("gw.json", "gw.json"),
}  # fmt: skip


NEEDS = {  # flags that say nothing without another
    "arrival": ["--rps", "1"], "find-max": ["--slo", "success>=99%"],
    "shard": ["--start-at", "2999-01-01T00:00:00Z", "--concurrency", "4"],
}  # fmt: skip
# What a flag changes beside its own value.
DRAGS = {"rps": {"concurrency"}, "provider-file": {"provider"}}


def test_every_flag_is_tried_here():
    assert set(FLAGS) - set(SET_BY) == {"unique"}  # on anyway


@pytest.mark.parametrize("name", SET_BY)
def test_every_flag_changes_the_configuration(name):
    text, value = SET_BY[name]
    words = [f"--{name}"] if text is None else [f"--{name}", text]
    needed = NEEDS.get(name, [])
    field = name[3:] if name.startswith("no-") else name.replace("-", "_")
    default, given = vars(config_of(*needed)), vars(config_of(*needed, *words))
    assert given[field] == value != default[field]
    changed = {key for key in given if given[key] != default[key]} - {"run_id", "given"}
    assert changed == {field} | DRAGS.get(name, set())


@pytest.mark.parametrize("name", SET_BY)
def test_one_dash_or_two_a_blank_or_an_equals_sign_say_the_same(name):
    text, _ = SET_BY[name]
    spellings = [[f"--{name}"], [f"-{name}"]]
    if text is not None:
        spellings = [[f"--{name}", text], [f"-{name}", text], [f"--{name}={text}"], [f"-{name}={text}"]]
    read = [dataclasses.replace(config_of(*NEEDS.get(name, []), *words), run_id="") for words in spellings]
    assert all(config == read[0] for config in read)


def test_a_value_may_hold_blanks_equals_signs_and_colons():
    config = config_of("--header=X-A: b=c d", "-header", "Cookie: a=b", '--body={"a": "b=c"}', "--token=a=b")
    assert config.header == ["X-A: b=c d", "Cookie: a=b"]
    assert (config.body, config.token) == ({"a": "b=c"}, "a=b")


def test_the_last_of_a_flag_counts_and_headers_add_up():
    config = config_of("--seed", "1", "-seed=2", "--header", "A: 1", "-header", "B: 2")
    assert (config.seed, config.header) == (2, ["A: 1", "B: 2"])


def test_unique_is_the_default_and_excludes_its_opposite():
    assert config_of().unique and config_of("--unique").unique and not config_of("-no-unique").unique
    assert "exclude each other" in refusal("run", "--url", "mock:", "--unique", "--no-unique")


@pytest.mark.parametrize("words,error", [
    (["--rps", "2", "--concurrency", "1,2"], "--concurrency takes one number with --rps"),
    (["--rps", "2", "--ramp", "3s"], "--ramp starts streams evenly and needs --concurrency without --rps"),
    (["--arrival", "constant"], "--arrival says when requests of an open loop are due and needs --rps"),
    (["--rps", "2", "--arrival", "trace"], "--arrival trace takes the trace's own times; leave --rps out"),
    (["--arrival", "trace"], "--arrival trace needs a --workload-file that is a trace"),
    (["--rps", "0", "--arrival", "constant"], "--arrival says when requests of an open loop are due and needs --rps"),
    (["--rps", "-1"], "--rps needs requests per second"), (["--rps", "1,0"], "--rps needs requests per second"),
    (["--rps", "nan"], "--rps needs requests per second"), (["--rps", "1e3"], "--rps needs requests per second"),
    (["--rps", "1", "--arrival", "gamma:0"], "--arrival needs poisson, constant, trace, or gamma:SHAPE"),
    (["--rps", "1", "--arrival", "uniform"], "--arrival needs poisson, constant, trace, or gamma:SHAPE"),
])  # fmt: skip
def test_flags_of_an_open_and_of_a_closed_loop_exclude_each_other(words, error):
    assert error in refusal("run", "--url", "mock:", *words)


@pytest.mark.parametrize("words,error", [
    (["--max-total-tokens", "9", "--token-mode", "chars"], "needs --token-mode usage"),
    (["--input-tokens", "64", "--workload-file", "x"], "leave --workload-file out"),
    (["--input-tokens", "many"], "--input-tokens needs tokens such as 1024"),
    (["--find-max", "rps", "--slo", "success>=99%", "--input-tokens", "64,128"], "one length of --input-tokens"),
    (["--slo", "tfft.p95<=1s"], "--slo has an unknown metric, tfft (did you mean ttft?)"),
    (["--slo", "ttft.p95<=800"], "--slo needs a limit of ttft in"),
    (["--find-max", "concurrency"], "--find-max needs at least one --slo"),
    (["--find-max", "streams", "--slo", "success>=99%"], "--find-max needs one of concurrency, rps"),
    (["--find-max", "concurrency", "--slo", "success>=99%", "--rps", "2"], "leave --rps out"),
    (["--find-max", "concurrency", "--slo", "success>=99%", "--concurrency", "8,8"], "START below MOST"),
    (["--find-max", "rps", "--slo", "success>=99%", "--rps", "1,2,3"], "--rps START or START,MOST"),
    (["--find-max", "rps", "--slo", "success>=99%", "--concurrency", "1,3"], "takes one number"),
    (["--find-max", "concurrency", "--slo", "success>=99%", "--ramp", "3"], "--ramp and --find-max exclude each other"),
])  # fmt: skip
def test_gates_and_a_search_that_make_no_sense_are_refused(words, error):
    assert error in refusal("run", "--url", "mock:", *words)


def test_a_search_has_its_bounds_from_the_load():
    common = ["--slo", "success>=99%", "--find-max"]
    assert llmbench.search_bounds(config_of(*common, "concurrency")) == (1.0, 4096.0, 1.0)
    assert llmbench.search_bounds(config_of(*common, "concurrency", "--concurrency", "8,100")) == (8.0, 100.0, 1.0)
    assert llmbench.search_bounds(config_of(*common, "rps"))[:2] == (1.0, 10000.0)
    assert config_of(*common, "rps").concurrency == []
    assert llmbench.search_bounds(config_of(*common, "rps", "--rps", "2,5"))[:2] == (2.0, 5.0)


@pytest.mark.parametrize("words,error", [
    (["--shard", "0/4"], "--shard needs --start-at"),
    (["--shard", "4/4"], "--shard needs k/n with k from 0 to n-1"), (["--shard", "1"], "--shard needs k/n"),
    (["--shard", "auto/4"], "--shard auto/n needs $JOB_COMPLETION_INDEX"),
    (["--shard", "0/4", "--start-at", "2999-01-01T00:00:00Z", "--concurrency", "3"], "fewer than the 4 shards"),
    (["--shard", "0/2", "--start-at", "2999-01-01T00:00:00Z", "--concurrency", "4,8"], "needs --duration and --grace"),
    (["--start-at", "2020-01-01T00:00:00Z"], "--start-at lies in the past"),
    (["--start-at", "25:00"], "--start-at needs HH:MM"), (["--start-at", "2999-01-01T00:00:00"], "with its offset"),
    (["--max-errors", "101%"], "--max-errors needs a number"), (["--max-errors", "x"], "--max-errors needs a number"),
])  # fmt: skip
def test_a_part_or_a_bound_that_makes_no_sense_is_refused(words, error, monkeypatch):
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    assert error in refusal("run", "--url", "mock:", *words)


def test_an_indexed_job_gives_the_number_of_the_shard(monkeypatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    config = config_of("--shard", "auto/4", "--start-at", "2999-01-01T00:00:00Z", "--concurrency", "4")
    assert (config.shard, config.host) == ("2/4", (2, 4))


def test_a_time_of_day_is_one_of_this_hosts_clock():
    later = datetime.datetime.now() + datetime.timedelta(seconds=90)
    if later.day == datetime.datetime.now().day:
        read = llmbench.timestamp(config_of("--start-at", later.strftime("%H:%M:%S")).start_at)
        assert read == int(later.timestamp())


def test_hosts_agree_on_the_run_id_by_what_they_have_in_common():
    same = ["--start-at", "2999-01-01T00:00:00Z", "--concurrency", "8", "--header", "A: b"]
    ids = {
        config_of(*same, "--shard", shard, "--out", shard[0], "--token", shard, "--processes", "2").run_id
        for shard in ("0/3", "1/3", "2/3")
    }  # fmt: skip
    assert len(ids) == 1
    assert config_of(*same, "--seed", "1", "--shard", "0/3").run_id not in ids
    assert config_of("--start-at", "2999-01-01T00:00:01Z", *same[2:], "--shard", "0/3").run_id not in ids
    assert config_of("--start-at", "2999-01-01T08:00:00+08:00", *same[2:], "--shard", "0/3").run_id in ids


def test_an_open_loop_has_no_cap_unless_one_is_given():
    assert config_of("--rps", "3").concurrency == []
    assert config_of("--rps", "3", "--concurrency", "7").concurrency == [7]
    assert config_of("--rps", "0").concurrency == [1]


def test_each_run_has_an_id_of_its_own():
    ids = {config_of().run_id for _ in range(50)}
    assert len(ids) == 50 and all(re.fullmatch("[0-9a-f]{8}", run_id) for run_id in ids)


@pytest.mark.parametrize("words", [["--concur", "4"], ["--tok", "x"], ["--max-tok", "5"], ["--un"], ["--ins"]])
def test_a_flag_may_not_be_abbreviated(words):
    with pytest.raises(llmbench.UserError, match=rf"{words[0]} is not a flag"):
        config_of(*words)


ABBREVIATED = [["-conc", "4"], ["-to", "x"], ["-max-t", "5"], ["-uni"], ["-ins"], ["-u", "mock:"]]


@pytest.mark.parametrize("words", ABBREVIATED, ids=" ".join)
def test_a_flag_may_not_be_abbreviated_after_one_dash_either(words):
    with pytest.raises(llmbench.UserError, match=rf"{words[0]} is not a flag"):
        config_of(*words)


@pytest.mark.parametrize("flag,near", [
    ("--tokne", "--token"), ("-modle", "--model"), ("--concurency", "--concurrency"), ("--Url", "--url"),
    ("--max_tokens", "--max-tokens"),
])  # fmt: skip
def test_a_mistyped_flag_is_named_with_the_nearest_one(flag, near):
    assert refusal("run", "--url", "mock:", flag, "5").startswith(f"{flag} is not a flag (did you mean {near}?); ")


NOT_ECHOED = [
    ["--tokne", SECRET], [f"--tokne={SECRET}"], ["-tokne", SECRET], [f"-tokne={SECRET}"], [f"-tok={SECRET}"],
    ["-tok", SECRET],
    ["--tokne", f"env:{SECRET}"], [SECRET], ["--", SECRET], ["--insecure", SECRET],
    ["--headr", f"Authorization: Bearer {SECRET}"],
    [f"--headr=Authorization: Bearer {SECRET}"], ["--header", SECRET], ["--body", SECRET], ["--lang", SECRET],
    ["--concurrency", SECRET], [f"--timeout={SECRET}"], ["--token", f"-{SECRET}"], ["--token-mode", SECRET],
]  # fmt: skip
ECHOED = [
    [f"--insecure={SECRET}"], [f"-unique={SECRET}"], [f"-h{SECRET}"], [f"--token:{SECRET}"], [f"--token{SECRET}"],
    [f"-token{SECRET}"], [f"--tokne{SECRET}"], [f"-{SECRET}"],
]  # fmt: skip


@pytest.mark.parametrize("words", NOT_ECHOED, ids=" ".join)
def test_a_mistyped_flags_value_is_not_echoed(words):
    assert SECRET not in refusal("run", "--url", "mock:", *words)
    if words[0].startswith("-"):
        assert SECRET not in refusal(*words, "--url", "mock:")


@pytest.mark.parametrize("words", ECHOED, ids=" ".join)
def test_a_value_that_sticks_to_its_flag_is_not_echoed(words):
    assert SECRET not in refusal("run", "--url", "mock:", *words)


@pytest.mark.parametrize("words", [[SECRET], [SECRET, "--url", "mock:"]])
def test_a_secret_in_the_place_of_a_command_is_not_echoed(words):
    assert SECRET not in refusal(*words)


@pytest.mark.parametrize("url", ["user:%s@host/v1" % SECRET, "host/v1?api-key=%s" % SECRET])
def test_a_url_that_is_refused_shows_no_secret(url):
    assert SECRET not in refusal("run", "--url", url, "--model", "m")


@pytest.mark.parametrize(
    "word,near", [("rnu", "run"), ("reprot", "report"), ("provider", "providers"), ("mok", "mock")]
)
def test_an_unknown_command_is_answered_with_the_nearest_one(word, near):
    line = refusal(word, "--url", "mock:")
    assert "is not a command" in line and f"did you mean {near}?" in line


PROBE = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])
import llmbench
said = []
for words in json.loads(sys.argv[2]):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            llmbench.read_config(["--url", "mock:"] + words)
        said.append("taken")
    except SystemExit:
        said.append("taken")
    except llmbench.UserError as error:
        said.append(str(error))
print(json.dumps(said))
"""


TAKEN = [["-seed", "1"], ["-seed=1"], ["--seed=1"], ["-header", "A: b=c"], ["-insecure"], ["--token=-dash"], []]


@functools.lru_cache(maxsize=None)
def said_by(version):
    """What a Python says to each command line of TAKEN, NOT_ECHOED, ECHOED and ABBREVIATED: "taken", or its error."""
    words = json.dumps(TAKEN + NOT_ECHOED + ECHOED + ABBREVIATED)
    command = [interpreter(version), "-c", PROBE, str(ROOT), words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    return json.loads(done.stdout.decode("utf-8"))


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_python_reads_a_command_line_the_same_way(version):
    """argparse changed its mind about dashes, abbreviations and what it repeats several times between 3.7 and 3.13."""
    said = said_by(version)[: len(TAKEN + NOT_ECHOED)]
    taken, refused = said[: len(TAKEN)], said[len(TAKEN) :]
    assert taken == ["taken"] * len(TAKEN)
    assert [line for line in refused if SECRET in line] == []
    assert [words for words, line in zip(NOT_ECHOED, refused) if line == "taken"] == [
        ["--header", SECRET]
    ]  # read later


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_python_refuses_guesses_and_echoes_nothing(version):
    said = said_by(version)[len(TAKEN + NOT_ECHOED) :]
    assert len(said) == len(ECHOED + ABBREVIATED)
    assert [line for line in said if line == "taken" or SECRET in line] == []


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_keys_and_secret_options_say_where_they_are_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "k1")
    (tmp_path / "sk").write_text("s1\n")
    config = config_of("--auth-key", "env:MY_KEY", "--auth-secret", f"file:{tmp_path}/sk", "--auth-opt",
                       "session-token=cmd:echo t1", "--auth-opt", "key-header=cmd:x")  # fmt: skip
    assert (config.auth_key, config.auth_secret) == ("k1", "s1")
    assert config.auth_opt == {"session-token": "t1", "key-header": "cmd:x"}
    assert config_of("--token", "cmd:echo t").token_source == "cmd:echo t"
    assert config_of("--token", "env:MY_KEY").token_source == ""


@pytest.mark.parametrize("words,said", [
    (["--auth-secret", "env:NOT_SET"], "--auth-secret env:NOT_SET: that variable is not set"),
    (["--auth-opt", "session-token=env:NOT_SET"], "--auth-opt session-token env:NOT_SET: that variable is not set"),
    (["--auth-opt", "header"], "--auth-opt needs NAME=VALUE"),
    (["--auth-opt", f"={SECRET}"], "--auth-opt needs NAME=VALUE"),
    (["--auth-opt", "a=1", "--auth-opt", "a=2"], "--auth-opt a is given twice"),
])  # fmt: skip
def test_what_is_no_key_or_option_is_one_line(words, said):
    with pytest.raises(llmbench.UserError) as caught:
        config_of(*words)
    assert said in str(caught.value) and SECRET not in str(caught.value)


def test_a_token_is_itself_or_says_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", f" {SECRET}\n")
    path = tmp_path / "token"
    path.write_bytes(f"{SECRET}\r\n".encode())
    for text in (
        SECRET,
        f" {SECRET} ",
        "env:MY_TOKEN",
        f"file:{path}",
        f"cmd:cat '{path}'",
        f"cmd:echo {SECRET}; echo more",
    ):
        assert llmbench.read_secret(text, "--token") == SECRET
    monkeypatch.setenv("HOME", str(tmp_path))
    assert llmbench.read_secret("file:~/token", "--token") == SECRET
    assert llmbench.read_secret("abc:def", "--token") == "abc:def"
    assert llmbench.read_secret("ENV:X", "--token") == "ENV:X"


@pytest.mark.parametrize("text,said", [
    ("env:NOT_SET_ANYWHERE", "env:NOT_SET_ANYWHERE: that variable is not set"), ("env:", "not set"),
    ("env:BLANK", "env:BLANK: that variable is not set"),
    ("file:/nowhere/token", "file:/nowhere/token cannot be read: No such file"),
    ("file:/", "cannot be read: Is a directory"),
    ("cmd:exit 3", "status 3"), ("cmd:true", "printed no secret"), ("cmd:no-such-command-anywhere", "status 127"),
])  # fmt: skip
def test_a_token_that_cannot_be_had_is_one_line(monkeypatch, text, said):
    monkeypatch.setenv("BLANK", " \n")
    with pytest.raises(llmbench.UserError) as caught:
        llmbench.read_secret(text, "--token")
    assert str(caught.value).startswith("--token ") and said in str(caught.value)


def test_what_a_failing_command_prints_is_not_shown():
    with pytest.raises(llmbench.UserError) as caught:
        llmbench.read_secret(
            f"cmd:v={SECRET[:5]}; echo ${{v}}{SECRET[5:]}; echo ${{v}}{SECRET[5:]} >&2; exit 1", "--token"
        )
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"\n \n", b"\xef\xbb\xbf" + SECRET.encode()], ids=["empty", "blank", "byte order mark"]
)
def test_a_token_file_holds_a_token_and_nothing_else(tmp_path, data):
    (tmp_path / "token").write_bytes(data)
    if SECRET.encode() in data:
        assert llmbench.read_secret(f"file:{tmp_path}/token", "--token") == SECRET
    else:
        with pytest.raises(llmbench.UserError):
            llmbench.read_secret(f"file:{tmp_path}/token", "--token")


@pytest.mark.parametrize("environment,url,token", [
    ({}, "http://h", ""), ({"OPENAI_API_KEY": "o"}, "http://h", "o"), ({"LLMBENCH_TOKEN": "l"}, "http://h", "l"),
    ({"OPENAI_API_KEY": "o", "LLMBENCH_TOKEN": "l"}, "http://h", "l"),
    ({"OPENAI_API_KEY": "o", "LLMBENCH_TOKEN": ""}, "http://h", "o"),
    ({"LLMBENCH_TOKEN": "l"}, "mock:", ""),
])  # fmt: skip
def test_the_environments_token_is_for_real_endpoints(monkeypatch, environment, url, token):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert llmbench.read_config(["--url", url]).token == token
    assert llmbench.read_config(["--url", url, "--token", "given"]).token == "given"
    assert llmbench.read_config(["--url", url, "--token", ""]).token == ""


@pytest.mark.parametrize("end", ["\n", "\r", " "])
def test_the_environments_token_is_stripped(monkeypatch, end):
    monkeypatch.setenv("LLMBENCH_TOKEN", SECRET + end)
    assert llmbench.read_config(["--url", "http://h"]).token == SECRET


# --- the command as it is shown ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("words,shown", [
    (["--url", "mock:", "--seed=3"], "--url mock: --seed=3"),
    (["--token", SECRET], "--token '***'"),
    (["-token", SECRET], "-token '***'"),
    ([f"--token={SECRET}"], "'--token=***'"),
    ([f"-token={SECRET}"], "'-token=***'"),
    (["--token", "env:NAME"], "--token env:NAME"),
    (["--token=file:/run/secret"], "--token=file:/run/secret"),
    (["--header", f"Authorization: Bearer {SECRET}"], "--header 'Authorization: ***'"),
    ([f"-header=X-Api-Key: {SECRET}"], "'-header=X-Api-Key: ***'"),
    (["--header", "X-Team: a b"], "--header 'X-Team: a b'"),
    (["--url", f"https://u:{SECRET}@h/v1?api-key={SECRET}&x=1"], "--url 'https://***@h/v1?api-key=***&x=1'"),
    ([f"--url=https://h/v1?key={SECRET}"], "'--url=https://h/v1?key=***'"),
    (["--workload-file", "--token", "--seed", "1"], "--workload-file --token '***' 1"),  # errs towards hiding
    (["--auth-secret", SECRET], "--auth-secret '***'"),
    ([f"--auth-key={SECRET}"], "'--auth-key=***'"),
    (["--auth-secret", "file:/run/secret"], "--auth-secret file:/run/secret"),
    (["--auth-opt", f"session-token={SECRET}"], "--auth-opt 'session-token=***'"),
    (["--auth-opt", "session-token=env:STS"], "--auth-opt session-token=env:STS"),
    (["--auth-opt", "signature-header=X-Sign"], "--auth-opt signature-header=X-Sign"),
    ([f"--auth-opt=exchange-url=http://h/t?client_secret={SECRET}"],
     "'--auth-opt=exchange-url=http://h/t?client_secret=***'"),
])  # fmt: skip
def test_the_command_can_be_given_again_and_shows_no_secret(words, shown):
    assert llmbench.shown_command(words) == f"python3 llmbench.pyz run {shown}"


# --- mistakes, each one line ------------------------------------------------------------------------------------------

MISTAKES = {
    "no url": ([], "--url is needed"),
    "empty url": (["--url", ""], "--url"),
    "url without its value": (["--url"], "--url needs a value"),
    "no scheme": (["--url", "localhost:8000/v1"], "no scheme"),
    "unknown scheme": (["--url", "ftp://h/v1"], "'ftp'"),
    "no host": (["--url", "http://:80/v1"], "no host"),
    "port too high": (["--url", "http://h:99999/"], "port"),
    "port no number": (["--url", "http://h:http/"], "port"),
    "blank in the url": (["--url", "http://h/v1 /chat"], "blank"),
    "line end in the url": (["--url", "http://h/v1\r\nX: y"], "control character"),
    "mock option": (["--url", "mock:?tttf=1"], "ttft"),
    "mock value": (["--url", "mock:?ttft=fast"], "ttft"),
    "unknown provider": (["--url", "mock:", "--provider", "openia"], "did you mean openai?"),
    "unknown flag": (["--url", "mock:", "--modle", "m"], "did you mean --model?"),
    "left over": (["--url", "mock:", "word"], "left over; `"),
    "a URL without its flag": (["http://h:8000", "--model", "m"], "left over (a URL comes after --url)"),
    "unknown mock option": (["--url", "mock:?tftt=3"], "the mock option tftt is unknown (did you mean ttft?)"),
    "unknown mock option of any form": (["--url", "mock:?sk-4f9aQz71=3"], "error: a mock option is unknown"),
    "bad number": (["--url", "mock:", "--concurrency", "0"], "--concurrency"),
    "bad duration": (["--url", "mock:", "--duration", "5 minutes"], "--duration"),
    "bad body": (["--url", "mock:", "--body", "[1]"], "--body"),
    "bad header": (["--url", "mock:", "--header", "no colon"], "--header needs"),
    "bad header name": (["--url", "mock:", "--header", "A B: c"], "--header needs"),
    "env not set": (["--url", "mock:", "--token", "env:NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE"),
    "workload missing": (["--url", "mock:", "--workload-file", "missing.txt"], "missing.txt"),
    "workload empty": (["--url", "mock:", "--workload-file", "empty.txt"], "no prompt"),
    "workload bad line": (["--url", "mock:", "--workload-file", "bad.jsonl"], "bad.jsonl line 2"),
    "workload not UTF-8": (["--url", "mock:", "--workload-file", "latin.txt"], "latin.txt line 2 is not UTF-8"),
    "out is a file": (["--url", "mock:", "--out", "empty.txt"], "not a directory"),
    "out below a file": (["--url", "mock:", "--out", "empty.txt/new"], "--out"),
    "out holds results": (["--url", "mock:", "--out", "old"], "already holds results.jsonl"),
    "out cannot be made": (["--url", "mock:", "--out", "/proc/llmbench/new"], "--out"),
}
LATER_MISTAKES = {  # found when the event loop is there already
    "CA missing": (["--url", "https://localhost:1", "--model", "m", "--ca-cert", "missing.pem"], "missing.pem"),
    "CA no PEM": (["--url", "https://localhost:1", "--model", "m", "--ca-cert", "latin.txt"], "not a PEM"),
    "CA empty": (["--url", "https://localhost:1", "--model", "m", "--ca-cert", "empty.txt"], "not a PEM"),
    "open bracket": (["--url", "http://[::1/v1", "--model", "m"], "--url"),
    "port 0": (["--url", "http://127.0.0.1:0/v1", "--model", "m"], "port"),
    "no model to be had": (["--url", "http://127.0.0.1:1/v1"], "is --url right?"),
}


def lay_out(directory):
    """What the mistakes above need."""
    (directory / "empty.txt").write_bytes(b"")
    (directory / "bad.jsonl").write_bytes(b'{"prompt":"a"}\n{"prompt":}\n')
    (directory / "latin.txt").write_bytes(b"fine\nna\xefve\n")
    (directory / "old").mkdir()
    (directory / "old" / "results.jsonl").write_bytes(b"{}\n")
    return sorted(path.relative_to(directory) for path in directory.rglob("*"))


def check_mistake(program, directory, words, said):
    before = lay_out(directory)
    done = subprocess.run([*program, *words], cwd=str(directory), capture_output=True, timeout=30)
    error = done.stderr.decode("utf-8")
    assert ERROR.fullmatch(error), error
    assert said in error
    assert (done.returncode, done.stdout) == (2, b"")
    assert sorted(path.relative_to(directory) for path in directory.rglob("*")) == before


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys, name):
    words, said = MISTAKES[name]
    before = lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    status, out, error = run_main(capsys, "run", *words)
    assert ERROR.fullmatch(error) and said in error, error
    assert (status, out) == (2, "")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", LATER_MISTAKES)
def test_a_mistake_that_is_found_later_is_one_line_too(tmp_path, name):
    check_mistake([sys.executable, str(ROOT / "llmbench.py"), "run"], tmp_path, *LATER_MISTAKES[name])


@pytest.mark.parametrize("name", ["no url", "workload bad line", "out holds results"])
def test_both_programs_refuse_alike(programs, tmp_path, name):
    words, said = MISTAKES[name]
    check_mistake([*programs, "run"], tmp_path, words, said)


CODE = "import llmbench\nclass Acme(llmbench.Provider):\n    "
FAILING_CODE = {
    "constructor": "def __init__(self, config):\n        raise ValueError('for ' + config.token)",
    "other constructor": "def __init__(self):\n        pass",
    "body": "def body(self, prompt, dialect):\n        return 1 / 0",
    "no JSON": "def body(self, prompt, dialect):\n        return {'a': {1}}",
    "request": "def request(self, *given):\n        raise KeyError(self.config.token)",
    "path": "path = 5",
}


@pytest.mark.parametrize("name", FAILING_CODE)
def test_a_provider_with_code_that_fails_is_one_line(tmp_path, capsys, name):
    file = tmp_path / "acme.py"
    file.write_text(CODE + FAILING_CODE[name] + "\n", "utf-8")
    words = ["--url", "http://127.0.0.1:9", "--model", "m", "--token", "hunter2hunter2", "--provider", str(file)]
    status, out, error = run_main(capsys, "run", *words, "--no-unique", "--dry-run")
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith("llmbench: error: --provider ") and "hunter2" not in error + out


@pytest.mark.parametrize("code", ["def decoder(self):\n        return 1 / 0", FAILING_CODE["request"]])
def test_a_check_of_it_is_one_line_too(tmp_path, capsys, code):
    file = tmp_path / "acme.py"
    file.write_text(CODE + code + "\n", "utf-8")
    words = ["--url", "mock:?ttft=1&itl=1", "--model", "m", "--token", "hunter2hunter2", "--provider", str(file)]
    status, out, error = run_main(capsys, "check", *words)
    assert status in (2, 3) and "Traceback" not in error and "hunter2" not in error + out
    assert error.count("\n") == (status == 2)


def test_a_secret_that_a_file_takes_from_the_environment_is_not_shown(tmp_path, monkeypatch, capsys):
    file = tmp_path / "acme.json"
    headers = {"X-Pass": "${env:ACME_SECRET}", "X-T": "${env:TEAM}"}
    form = {"body": {"q": "${prompt}"}, "text": ["t"], "headers": headers}
    file.write_text(json.dumps(form), "utf-8")
    monkeypatch.setenv("ACME_SECRET", "hunter2hunter2")
    monkeypatch.setenv("TEAM", "blue-team")
    words = ["--url", "http://127.0.0.1:9", "--provider", str(file), "--dry-run"]
    status, out, error = run_main(capsys, "run", *words)
    assert status == 0 and "X-T: blue-team" in out and "hunter2" not in out + error, error


def test_a_header_that_cannot_be_written_leaves_nothing_behind(tmp_path, capsys):
    words = ["--url", "http://127.0.0.1:9", "--model", "m", "--token", "t", "--header", "X-Team: \u65e5"]
    status, out, error = run_main(capsys, "run", *words, "--proxy", "none", "--out", str(tmp_path / "out"))
    assert (status, out, error.count("\n")) == (2, "", 1) and "latin-1" in error
    assert not (tmp_path / "out").exists()


def test_a_body_that_is_nested_too_deeply_is_one_line(capsys):
    status, _, error = run_main(capsys, "run", "--url", "mock:", "--body", '{"a":' * 5000 + "1" + "}" * 5000)
    assert (status, error.count("\n")) == (2, 1) and "--body" in error


def test_a_control_character_or_a_long_value_is_one_line_too(capsys):
    for name in ("a\nb.json", "x" * 5000 + ".json"):
        status, _, error = run_main(capsys, "run", "--url", "http://127.0.0.1:9", "--provider", name)
        assert (status, error.count("\n")) == (2, 1)
        assert len(error) < 2100


def test_without_a_command_flags_are_runs(tmp_path):
    words, said = MISTAKES["workload missing"]
    check_mistake([sys.executable, str(ROOT / "llmbench.py")], tmp_path, words, said)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where nobody may write")
def test_a_mistake_in_an_ascii_locale_is_one_line_too(tmp_path):
    command = [sys.executable, str(ROOT / "llmbench.py"), "run", "--url", "mock:", "--workload-file", "缺少.txt"]
    environment = {**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, cwd=str(tmp_path), env=environment, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith(b"llmbench: error: --workload-file") and done.stderr.count(b"\n") == 1


# --- help, report, other commands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["--help", "-h", "-help"])
def test_general_help_names_every_command(capsys, word):
    status, out, err = run_main(capsys, word)
    assert (status, err) == (0, "")
    for name in llmbench.COMMANDS:
        assert re.search(rf"^  {name} +\S", out, re.MULTILINE)


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_the_help_of_run_names_every_flag_once(capsys, word):
    status, out, err = run_main(capsys, "run", word)
    assert (status, err) == (0, "")
    listed = out.split("options:")[-1].split("optional arguments:")[-1]
    for name in FLAGS:
        assert len(re.findall(rf"^  --{name}[ ,\n]", listed, re.MULTILINE)) == 1, name
    assert "exit status" in out


@pytest.mark.parametrize("command", ["run", "report", "mock", "providers"])
def test_help_may_have_one_dash_as_any_flag(capsys, command):
    assert run_main(capsys, command, "-help")[0] == 0


@pytest.mark.parametrize("command", list(llmbench.COMMANDS))
def test_every_command_has_help(capsys, command):
    status, out, err = run_main(capsys, command, "--help")
    assert (status, err) == (0, "") and f"llmbench {command}" in out


def test_without_anything_there_is_help(capsys):
    status, out, _ = run_main(capsys)
    assert status == 2 and "commands:" in out


@pytest.mark.parametrize("word", ["--version", "-version"])
def test_the_version(capsys, word):
    assert run_main(capsys, word) == (0, f"llmbench {llmbench.__version__}\n", "")


def test_providers_are_listed(capsys):
    status, out, err = run_main(capsys, "providers")
    assert (status, err) == (0, "")
    listed, examples, notes = ([line.split() for line in part.splitlines()] for part in out.split("\n\n"))
    assert [words[0] for words in listed] == sorted(llmbench.PROVIDERS)
    assert [words[0] for words in examples] == list(llmbench.EXAMPLES)
    assert notes[0][0] == "[untested]:" and len(notes) == 3


@pytest.mark.parametrize("locale,language", [
    ({"LANG": "zh_CN.UTF-8"}, "zh"), ({"LANG": "en_US.UTF-8"}, "en"), ({"LANG": "de_DE"}, "en"), ({"LANG": ""}, "en"),
    ({"LANG": "en_US", "LC_ALL": "zh_TW"}, "zh"), ({"LANG": "zh_CN", "LC_MESSAGES": "C"}, "en"),
    ({"LANG": "C", "LC_ALL": ""}, "en"),
])  # fmt: skip
def test_the_language_is_the_locales(monkeypatch, locale, language):
    for name, value in locale.items():
        monkeypatch.setenv(name, value)
    assert config_of().lang == language
    assert config_of("--lang", "en").lang == "en"


def test_report_builds_the_same_files_again(programs, tmp_path):
    directory = write_lines(tmp_path / "中文 run", made_run(stages=2))
    files, made = ("summary.json", "results.csv", "report.html"), []
    for _ in range(2):
        done = subprocess.run([*programs, "report", str(directory)], capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
        assert "4 streams" in done.stdout.decode("utf-8") and b"\x1b" not in done.stdout
        made.append([(directory / name).read_bytes() for name in files])
    assert made[0] == made[1]


REPORTLESS = {
    "no directory named": ([], "DIR"),
    "no results there": (["old/.."], "holds no results.jsonl"),
    "no such directory": (["nowhere"], "nowhere"),
    "a file": (["empty.txt"], "empty.txt"),
    "an empty file": (["void"], "measured nothing"),
    "a bad line": (["broken"], "line 2"),
    "two directories": (["old", "old"], "left over"),
    "an unknown flag": (["old", "--lnag", "zh"], "did you mean --lang?"),
    "a flag of run": (["old", "--concurrency", "4"], "is not a flag of llmbench report but of run"),
}


def lay_out_runs(directory):
    for name, data in (("void", b""), ("broken", b'{"llmbench":"1","run":{}}\n{"request_id":\n{}\n')):
        (directory / name).mkdir()
        (directory / name / "results.jsonl").write_bytes(data)


@pytest.mark.parametrize("name", REPORTLESS)
def test_a_report_that_cannot_be_made_is_one_line(tmp_path, name):
    lay_out_runs(tmp_path)
    check_mistake([sys.executable, str(ROOT / "llmbench.py"), "report"], tmp_path, *REPORTLESS[name])


# --- a whole run against an endpoint that repeats everything it is sent -----------------------------------------------


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers a stream, or every other time an error, that holds the whole request: line, headers and body."""

    protocol_version = "HTTP/1.1"
    answered = 0

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode("utf-8")
        text = f"{self.requestline}\n{self.headers}\n{body}"
        Echo.answered += 1
        if Echo.answered % 2:
            data = json.dumps({"error": {"message": text, "headers": dict(self.headers)}}).encode()
            self.answer(401 if Echo.answered % 4 == 1 else 500, "application/json", data)
            return
        frames = [{"choices": [{"delta": {"content": text}}]}, {"choices": [{"delta": {}, "finish_reason": "stop"}]}]
        data = b"".join(b"data: %s\n\n" % json.dumps(frame).encode() for frame in frames) + b"data: [DONE]\n\n"
        self.answer(200, "text/event-stream", data)

    def answer(self, status, kind, data):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def echo():
    """The port of an endpoint that repeats everything."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()


SECRETS = {
    "token": "tk-11/22+33==",
    "password": "pw-44-55-66",
    "query": "qk-77-88-99",
    "header": "hd-aa-bb-cc",
    "cookie": "ck-dd-ee-ff",
}


def echoed_run(port, directory, *words, user=""):
    url = f"http://{user}127.0.0.1:{port}/v1/chat/completions?api-key={SECRETS['query']}&x=1"
    command = [sys.executable, str(ROOT / "llmbench.py"), "run", "--url", url, "--model", "m", "--total-requests", "8",
               "--header", f"X-Api-Key: {SECRETS['header']}", "--header", f"Cookie: session={SECRETS['cookie']}",
               "--progress", "lines", "--out", str(directory), *words]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=30)
    shown = {path.name: path.read_bytes().decode("utf-8") for path in directory.iterdir()}
    assert set(shown) == {"results.jsonl", "results.csv", "summary.json", "report.html"}, done.stderr
    return {**shown, "stdout": done.stdout.decode("utf-8"), "stderr": done.stderr.decode("utf-8")}


def leaks(shown):
    found = [(place, name) for place, text in shown.items() for name, secret in SECRETS.items() if secret in text]
    assert "***" in shown["results.jsonl"] and "***" in shown["report.html"]
    return found


def test_no_secret_reaches_a_file_or_the_terminal(echo, tmp_path):
    shown = echoed_run(echo, tmp_path / "out", "--token", SECRETS["token"])
    assert '"error_raw"' in shown["results.jsonl"] and '"first_content_raw"' in shown["results.jsonl"]
    assert leaks(shown) == []


def test_no_password_reaches_a_file_or_the_terminal(echo, tmp_path):
    shown = echoed_run(echo, tmp_path / "out", user=f"ann:{SECRETS['password']}@")
    assert leaks(shown) == []
    assert not re.search(r"Basic [A-Za-z0-9+/=]{8}", shown["results.jsonl"])


def test_no_secret_of_a_scheme_reaches_a_file_or_the_terminal(echo, tmp_path):
    options = ["--auth-opt", f"session-token={SECRET}1", "--auth-opt", "signed=host;x-date;x-security-token"]
    secrets = ["--auth-key", f"{SECRET}2", "--auth-secret", f"{SECRET}3/=+"]
    shown = echoed_run(echo, tmp_path / "out", "--auth", "volc-v4", *secrets, *options)
    assert [place for place, text in shown.items() if SECRET in text] == []
    assert leaks(shown) == []


def test_no_secret_of_the_body_reaches_a_file_or_the_terminal(echo, tmp_path):
    shown = echoed_run(echo, tmp_path / "out", "--body", json.dumps({"api_key": SECRET}))
    assert [place for place, text in shown.items() if SECRET in text] == []
