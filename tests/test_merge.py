"""Shards of one run merged: exact to the last digit, every mix-up refused in one line, and what is missing is said."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tracemalloc

import pytest
from made_records import header, record, with_gaps, write_lines

import llmbench
from conftest import ROOT

ASSETS = llmbench.load_assets()
TEXTS = {language: llmbench.load_texts(ASSETS, language) for language in ("en", "zh")}
FOUR_FILES = ["report.html", "results.csv", "results.jsonl", "summary.json"]
OVER = "2026-01-02T03:05:%02d.000000Z"


# --- made-up runs, whole and in shards --------------------------------------------------------------------------------


def run_records(n=120, stages=2, streams=8, seed=7, spoiled=0.1):
    """The records of a run as one host writes them, in the order in which they ended; each stream is a closed loop."""
    draw = random.Random(seed)
    made = []
    for stage in range(stages):
        zero, free = stage * 60000.0, [stage * 60000.0] * streams
        done = []
        for number in range(n):
            due = free[number % streams]
            start = due + round(draw.expovariate(1.0), 4)
            first, end = start + round(draw.lognormvariate(5, 0.5), 4), start + round(draw.uniform(500, 900), 4)
            free[number % streams] = end
            more = {"request_id": "cafe0001-%d-%d" % (stage, number), "prompt_id": "en-%d" % (number % 7),
                    "scheduled_ms": due, "queue_ms": start - due, "first_content_raw": "content of %d" % number,
                    "out_crc32": "%08x" % draw.getrandbits(32), "finish_reason": "stop", "reused": True,
                    "rtt_ms": round(draw.uniform(0.1, 2), 3)}  # fmt: skip
            chance = draw.random()
            if number < 4:
                line = record(start, first, end, 30, stage=stage, phase="warmup", **more)
            elif chance < spoiled / 2:
                line = record(start, first, end, stage=stage, status="http_error", **more,
                              err="HTTP 503: overloaded, request %d" % draw.randrange(1000, 9999))  # fmt: skip
            elif chance < spoiled:
                line = record(start, first, end, stage=stage, status=draw.choice(["timeout", "cancelled"]), **more)
            else:
                gaps = [round(draw.expovariate(1 / 20), 4) for _ in range(29)]
                more.update(tpot_ms=(end - first) / 29, cached_tokens=draw.choice([None, 0, 1]))
                line = with_gaps(record(start, first, end, draw.randrange(20, 40), stage=stage, **more), gaps)
            done.append((end - zero, line))
        made += [line for _, line in sorted(done, key=lambda pair: pair[0])]
    return made


def audit(stage, part, **more):
    """What a process says of a stage; its lag is its own."""
    hist = {str(100 + 7 * part + step): 50 + part + step for step in range(20)}
    return {"audit": {"stage": stage, "part": part, "wall_ms": 9000.5, "cpu_percent": 10.5 + part, "lag_hist": hist,
                      "loop_delay_max_ms": 1.5 + part, "started": 30, **more}}  # fmt: skip


def stage_line(stage, streams=8):
    return {"stage": {"index": stage, "load": {"concurrency": streams}, "total": 120, "warmup": 4}}


def end(k=0, reason="done", **more):
    return {"end": {"reason": reason, "ended_at": OVER % (10 + k), **more}}


def host(k, **config):
    """The header of host k of a run."""
    line = header(concurrency=[8, 8], out="out-%d" % k, progress="none", **config)
    line["run"].update(host="bench-%d" % k, address="10.0.0.%d" % k, started_at="2026-01-02T03:04:0%d.000000Z" % k)
    return line


def shard_of(records, k, n, part=None, **config):
    """The lines of shard k of n."""
    lines = [host(k, shard="%d/%d" % (k, n), **config)]
    stages = sorted({line["stage"] for line in records})
    for stage in stages:
        lines.append(stage_line(stage))
        lines += [line for line in records
                  if line["stage"] == stage and int(line["request_id"].split("-")[2]) % n == k]  # fmt: skip
        lines.append(audit(stage, k if part is None else part))
    return [*lines, end(k)]


def shards_of(records, n=4, **config):
    return [shard_of(records, k, n, **config) for k in range(n)]


def written(tmp_path, shards):
    """The shards' directories, by name."""
    return [str(write_lines(tmp_path / ("shard-%d" % k), lines)) for k, lines in enumerate(shards)]


def merged(tmp_path, shards, order=None):
    """What the merge of these shards leaves: summary, lines of the file, notices."""
    directories, notices = written(tmp_path, shards), []
    if order is not None:
        directories = [directories[k] for k in order]
    out = tmp_path / "merged"
    llmbench.merge_shards(directories, str(out), notices.append)
    summary = llmbench.build_outputs(str(out), ASSETS, notices.append)
    return summary, read(out), notices


def read(directory):
    return [json.loads(line) for line in (directory / "results.jsonl").read_bytes().splitlines()]


def refused(tmp_path, shards, names=None):
    """The one line with which these shards are refused; nothing is left."""
    directories = written(tmp_path, shards) if names is None else names
    with pytest.raises(llmbench.UserError) as caught:
        llmbench.merge_shards(directories, str(tmp_path / "merged"), lambda _: None)
    assert not (tmp_path / "merged").exists()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


def plain(summary):
    """A summary without what is said of the run's hosts and of its end."""
    made = json.loads(json.dumps(summary))
    for block in (made, *made["stages"]):
        block["client"].pop("hosts", None)
    made["config"].pop("out")
    return {key: value for key, value in made.items() if key not in ("merged", "end", "started_at")}


# --- exactness --------------------------------------------------------------------------------------------------------


def whole_run(records, n=4):
    """The same records as one host with n processes would have left them."""
    stages = sorted({line["stage"] for line in records})
    audits = [audit(stage, part) for stage in stages for part in range(n)]
    return [host(0), *map(stage_line, stages), *records, *audits, end()]


@pytest.mark.parametrize("seed", range(8))
def test_four_shards_give_the_figures_of_one_run_to_the_last_digit(tmp_path, seed):
    draw = random.Random(seed)
    records = run_records(n=draw.randrange(40, 160), stages=draw.randrange(1, 4), seed=seed)
    single = write_lines(tmp_path / "single", whole_run(records))
    expected = llmbench.build_outputs(str(single), ASSETS, print)
    summary, lines, notices = merged(tmp_path, shards_of(records), draw.sample(range(4), 4))
    assert plain(summary) == plain(expected)
    assert notices == [] and summary["requests"]["success"] > 20
    copied = [line for line in lines if "request_id" in line]
    assert copied == json.loads(json.dumps(records)), "in the order in which they ended"


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_any_number_of_shards_gives_the_same_figures(tmp_path, n):
    records = run_records(seed=n)
    single = write_lines(tmp_path / "single", whole_run(records, n))
    expected = llmbench.build_outputs(str(single), ASSETS, print)
    assert plain(merged(tmp_path, shards_of(records, n))[0]) == plain(expected)


def test_the_order_within_a_file_changes_no_figure(tmp_path):
    """Records stand in a file in any order of its processes; only which one serves as a sample depends on it."""
    records, draw = run_records(stages=1), random.Random(3)
    expected = llmbench.build_outputs(str(write_lines(tmp_path / "single", whole_run(records))), ASSETS, print)
    shards = shards_of(records)
    for lines in shards:
        middle = lines[2:-2]
        draw.shuffle(middle)
        lines[2:-2] = middle
    summaries = [plain(expected), plain(merged(tmp_path, shards)[0])]
    for summary in summaries:
        del summary["samples"]
        for error in [*summary["errors"], *summary["stages"][0]["errors"]]:
            del error["sample"]
    assert summaries[0] == summaries[1]


def test_merging_is_a_function_of_the_shards(tmp_path):
    """Any order of the directories gives the same bytes, and `report` on the merged directory gives them again."""
    shards, made = shards_of(run_records()), []
    for place, order in (("a", (0, 1, 2, 3)), ("b", (3, 1, 0, 2))):
        (tmp_path / place).mkdir()
        merged(tmp_path / place, shards, order)
        made.append({name: (tmp_path / place / "merged" / name).read_bytes() for name in FOUR_FILES})
    assert made[0] == made[1]
    llmbench.build_outputs(str(tmp_path / "a" / "merged"), ASSETS, print)
    assert {name: (tmp_path / "a" / "merged" / name).read_bytes() for name in FOUR_FILES} == made[0]


def test_a_record_is_copied_byte_for_byte(tmp_path):
    odd = record(5.0, 6.5, 9.25, request_id="cafe0001-0-1", prompt_id="中文 \u2028", ttfb_ms=0.1 + 0.2, rtt_ms=1e-9,
                 first_content_raw='{"a":"\\u0000\x7f"}')  # fmt: skip
    merged(tmp_path, [shard_of([odd], 1, 2), shard_of([], 0, 2)])
    assert llmbench.encode_line(odd) in (tmp_path / "merged" / "results.jsonl").read_bytes().splitlines(True)


# --- the merged file --------------------------------------------------------------------------------------------------


def test_the_header_says_which_shards_it_was_merged_from(tmp_path):
    shards = shards_of(run_records(n=41, stages=1), processes=2, lang="zh")
    shards[0][0]["run"]["selftest"] = {"errors": []}
    summary, lines, _ = merged(tmp_path, shards)
    run = lines[0]["run"]
    assert lines[0]["llmbench"] == "1" and "shard" not in run["config"] and "selftest" not in run
    assert (run["run_id"], run["host"], run["config"]["lang"]) == ("cafe0001", "bench-0", "zh")
    assert run["merged"]["missing"] == [] and "clock" not in run["merged"]
    counts = [shard["records"] for shard in run["merged"]["shards"]]
    assert counts == [11, 10, 10, 10]
    third = run["merged"]["shards"][2]
    assert third == {"shard": "2/4", "host": "bench-2", "address": "10.0.0.2", "records": 10, "processes": 1,
                     "started_at": "2026-01-02T03:04:02.000000Z", "end": end(2)["end"],
                     "first_due_ms": third["first_due_ms"]}  # fmt: skip
    assert summary["merged"] == run["merged"]


def test_a_stage_line_comes_once_and_before_the_stage(tmp_path):
    _, lines, _ = merged(tmp_path, shards_of(run_records(n=40, stages=3)))
    kinds = [("begin", line["stage"]["index"]) if isinstance(line.get("stage"), dict) else
             ("record", line["stage"]) if "request_id" in line else
             ("audit", line["audit"]["stage"]) for line in lines[1:-1]]  # fmt: skip
    assert [kind for kind in kinds if kind[0] == "begin"] == [("begin", 0), ("begin", 1), ("begin", 2)]
    assert kinds == sorted(kinds, key=lambda kind: (kind[1], ("begin", "record", "audit").index(kind[0])))


def test_processes_of_different_hosts_are_not_taken_for_one(tmp_path):
    """Host 0 ran three processes, parts 0 to 2; host 1 ran one, which is its part 1."""
    records = run_records(n=40, stages=1)
    shards = [shard_of(records, 0, 2, part=0), shard_of(records, 1, 2, part=1)]
    shards[0][-1:-1] = [audit(0, 1), audit(0, 2)]
    summary, lines, _ = merged(tmp_path, shards)
    assert [(line["audit"]["shard"], line["audit"]["part"]) for line in lines if "audit" in line] == [
        ("0/2", 0), ("0/2", 1), ("0/2", 2), ("1/2", 1)]  # fmt: skip
    assert (summary["client"]["processes"], summary["client"]["hosts"]) == (4, 2)
    assert [shard["processes"] for shard in summary["merged"]["shards"]] == [3, 1]


def test_the_advice_on_processes_is_for_each_host(tmp_path):
    shards = shards_of(run_records(n=200, stages=1))
    shards[1][-2]["audit"]["cpu_percent"] = 97.0
    (reason,) = [reason for reason in merged(tmp_path, shards)[0]["verdict"]["reasons"] if reason["key"] == "cpu"]
    assert reason["values"]["processes"] == 2, "four hosts with one process each"


def test_lines_of_a_kind_that_is_not_known_are_kept(tmp_path):
    shards = shards_of(run_records(n=40, stages=1))
    shards[1].insert(1, {"remark": "by hand"})
    assert {"remark": "by hand"} in merged(tmp_path, shards)[1]


def test_probes_of_hosts_may_be_numbered_alike(tmp_path):
    shards = shards_of(run_records(n=40, stages=1))
    for lines in shards:
        lines.insert(2, record(1.0, 2.0, 3.0, request_id="cafe0001-0-probe-0-1", phase="probe"))
    summary, lines, _ = merged(tmp_path, shards)
    assert len([line for line in lines if line.get("phase") == "probe"]) == 4
    assert summary["requests"]["total"] == 36


# --- how it ended -----------------------------------------------------------------------------------------------------


def reasons(summary):
    """The verdict's reasons as both languages say them, by key; small samples apart."""
    for texts in TEXTS.values():
        for reason in summary["verdict"]["reasons"]:
            assert "{" not in llmbench.reason_said(texts, reason)
    listed = summary["verdict"]["reasons"]
    return {reason["key"]: llmbench.reason_said(TEXTS["en"], reason) for reason in listed if reason["key"] != "few"}


def test_all_done_is_done_at_the_latest_time(tmp_path):
    summary, lines, notices = merged(tmp_path, shards_of(run_records(spoiled=0.0)))
    assert lines[-1] == {"end": {"reason": "done", "ended_at": OVER % 13}}
    assert (reasons(summary), notices) == ({}, [])


def test_the_first_shard_that_ended_otherwise_gives_the_reason(tmp_path):
    shards = shards_of(run_records(spoiled=0.0))
    shards[1][-1] = end(30, "interrupted by SIGINT", dialect=["without stream_options"])
    shards[3][-1] = end(3, "auth: 401", dialect=["without stream_options", "max_completion_tokens"])
    summary, lines, _ = merged(tmp_path, shards)
    assert lines[-1]["end"] == {"reason": "interrupted by SIGINT", "shard": "1/4", "ended_at": OVER % 40,
                                "dialect": ["without stream_options", "max_completion_tokens"]}  # fmt: skip
    said = reasons(summary)
    assert list(said) == ["ended_early"]
    assert "(shard 1/4: interrupted by SIGINT; shard 3/4: auth: 401)" in said["ended_early"]


def test_lost_workers_of_any_host_make_the_run_invalid(tmp_path):
    shards = shards_of(run_records(spoiled=0.0))
    shards[0][-1] = end(0, "interrupted by SIGTERM")
    shards[2][-1] = end(2, "a worker was lost", lost_workers=1)
    shards[3][-1] = end(3, "a worker was lost", lost_workers=2)
    summary, lines, _ = merged(tmp_path, shards)
    assert lines[-1]["end"]["lost_workers"] == 3
    assert summary["verdict"]["state"] == "INVALID"
    assert "shard 0/4: interrupted by SIGTERM; shard 2/4, 3/4: a worker was lost" in reasons(summary)["ended_early"]


@pytest.mark.parametrize("tail", [b"", b'{"request_id":"cafe0001-0-'])
def test_a_shard_that_was_cut_off_is_merged_and_said(tmp_path, tail):
    shards = shards_of(run_records(spoiled=0.0))
    for k in (1, 3):
        del shards[k][-1]
    directories, notices = written(tmp_path, shards), []
    with open(directories[3] + "/results.jsonl", "ab") as file:
        file.write(tail)
    out = tmp_path / "merged"
    llmbench.merge_shards(directories, str(out), notices.append)
    summary = llmbench.build_outputs(str(out), ASSETS, notices.append)
    assert [notice for notice in notices if "shard 1/4" in notice and "was cut off" in notice]
    assert len([notice for notice in notices if "last line was cut off" in notice]) == bool(tail)
    assert read(out)[-1]["end"] == {"reason": "cut off", "shard": "1/4", "ended_at": OVER % 12}
    assert ["end" in shard for shard in summary["merged"]["shards"]] == [True, False, True, False]
    assert "(shard 1/4, 3/4: cut off)" in reasons(summary)["ended_early"]
    assert summary["verdict"]["state"] == "CAUTION"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "shard 1/4, 3/4: cut off" in page


def test_the_report_does_not_say_that_all_records_are_there_when_a_shard_was_cut_off(tmp_path):
    verdicts = []
    for name, cut in (("whole", False), ("cut", True)):
        shards = shards_of(run_records(spoiled=0.0))
        if cut:
            del shards[2][-1]
        (tmp_path / name).mkdir()
        merged(tmp_path / name, shards)
        page = (tmp_path / name / "merged" / "report.html").read_text(encoding="utf-8")
        verdicts.append(page.count("✕"))
    assert verdicts[1] == verdicts[0] + 1


def test_missing_shards_are_named(tmp_path):
    shards = shards_of(run_records(spoiled=0.0))
    summary, lines, notices = merged(tmp_path, [shards[3], shards[0]])
    assert lines[0]["run"]["merged"]["missing"] == ["1/4", "2/4"]
    assert [shard["shard"] for shard in summary["merged"]["shards"]] == ["0/4", "3/4"]
    (notice,) = notices
    assert "missing: shard 1/4, 2/4" in notice
    assert "Missing: shard 1/4, 2/4. What" in reasons(summary)["shards_missing"]
    assert summary["verdict"]["state"] == "CAUTION"


def test_very_many_missing_shards_are_counted(tmp_path):
    summary, _, (notice,) = merged(tmp_path, [shard_of(run_records(n=200, stages=1), 0, 100)])
    assert "7/100, … (99)" in notice and "8/100" not in notice
    assert len(summary["merged"]["missing"]) == 99 and "8/100" not in reasons(summary)["shards_missing"]


def test_what_a_shard_still_writes_is_left_out(tmp_path, monkeypatch):
    """A shard that is still running grows between the two readings: the header's counts stay those of the lines."""
    names = written(tmp_path, shards_of(run_records(n=40, stages=1)))
    make = llmbench.make_directory

    def grow_and_make(path):
        with open(names[1] + "/results.jsonl", "ab") as file:
            file.write(llmbench.encode_line(record(5.0, request_id="cafe0001-0-41")))
        make(path)

    monkeypatch.setattr(llmbench, "make_directory", grow_and_make)
    llmbench.merge_shards(names, str(tmp_path / "merged"), print)
    lines = read(tmp_path / "merged")
    assert sum(shard["records"] for shard in lines[0]["run"]["merged"]["shards"]) == 40
    assert len([line for line in lines if "request_id" in line]) == 40


# --- clocks -----------------------------------------------------------------------------------------------------------


def with_clocks(tmp_path, *offsets):
    """Two hosts or more with these bounds of (endpoint's clock - their clock), each a list over its audit lines."""
    records = run_records(stages=1, spoiled=0.0)
    shards = shards_of(records, len(offsets))
    for lines, bounds in zip(shards, offsets):
        audits = [audit(0, part, **({"date_offset_ms": pair} if pair else {})) for part, pair in enumerate(bounds)]
        lines[-2:-1] = audits
    return merged(tmp_path, shards)


def test_clocks_whose_bounds_overlap_may_be_right(tmp_path):
    summary, _, notices = with_clocks(tmp_path, [[-400.0, 600.0]], [[500.0, 1200.0]], [[-1.0, 550.5]])
    assert summary["merged"]["clock"] == {"disagree_ms": 0.0, "hosts": []}
    assert "clocks_disagree" not in reasons(summary) and notices == []


def test_clocks_that_cannot_both_be_right_are_named_with_the_least_gap(tmp_path):
    summary, lines, (notice,) = with_clocks(
        tmp_path, [[-400.0, -100.0], [-300.0, -50.0]], [[-200.0, 600.0]], [[240.25, 900.0], [150.0, 900.0]]
    )
    assert lines[0]["run"]["merged"]["clock"] == {"disagree_ms": 340.25, "hosts": ["bench-2 (2/3)", "bench-0 (0/3)"]}
    assert "bench-2 (2/3) and bench-0 (0/3) disagree by at least 340.2 ms" in notice
    assert "bench-2 (2/3), bench-0 (0/3) disagree by at least 340 ms" in reasons(summary)["clocks_disagree"]
    assert summary["merged"]["shards"][0]["date_offset_ms"] == [-300.0, -100.0], "the tightest of its processes"


@pytest.mark.parametrize("gap,caution", [(99.0, False), (101.0, True)])
def test_a_tenth_of_a_second_between_clocks_is_caution(tmp_path, gap, caution):
    summary, _, notices = with_clocks(tmp_path, [[0.0, 10.0]], [[10.0 + gap, 500.0]])
    assert (summary["merged"]["clock"]["disagree_ms"], len(notices)) == (gap, 1)
    assert ("clocks_disagree" in reasons(summary)) == caution


def test_a_host_that_contradicts_itself_accuses_nobody(tmp_path):
    """Its clock was set meanwhile, or servers with different clocks answered: then only the loosest bounds hold."""
    summary, _, _ = with_clocks(tmp_path, [[0.0, 10.0], [900.0, 910.0]], [[500.0, 510.0]])
    assert summary["merged"]["shards"][0]["date_offset_ms"] == [0.0, 910.0]
    assert summary["merged"]["clock"]["disagree_ms"] == 0.0


@pytest.mark.parametrize("offsets", [([None], [None]), ([[0.0, 5.0]], [None])])
def test_clocks_that_are_not_known_are_not_judged(tmp_path, offsets):
    assert "clock" not in with_clocks(tmp_path, *offsets)[0]["merged"]


def test_no_time_is_shifted(tmp_path):
    records = run_records(stages=1, spoiled=0.0)
    summary = with_clocks(tmp_path, [[0.0, 1.0]], [[5000.0, 5001.0]])[0]
    expected = llmbench.build_outputs(str(write_lines(tmp_path / "single", whole_run(records, 2))), ASSETS, print)
    assert summary["wall_time_ms"] == expected["wall_time_ms"]


def late_second_host(n=600):
    """Two hosts in closed loops; the second begins 3 ms later, and its first wave takes 30 ms to go out."""
    records = []
    for number in range(n):
        host_number, turn = number % 2, number // 2
        due = (3.0 if host_number else 0.0) if turn < n // 4 else 1000.0 + number
        wait = 30.0 if turn < n // 4 else 0.1
        records.append(record(due + wait, due + wait + 50, due + 900, 30, request_id="cafe0001-0-%d" % number,
                              scheduled_ms=due, queue_ms=wait))  # fmt: skip
    return sorted(records, key=lambda line: line["end_ts"])


def test_the_first_wave_of_every_host_is_not_judged_as_late(tmp_path):
    records = late_second_host()
    alone = llmbench.build_outputs(str(write_lines(tmp_path / "one", whole_run(records, 2))), ASSETS, print)
    assert alone["client"]["late_percent"] > 30, "without telling the hosts apart their waits would count"
    summary, _, _ = merged(tmp_path, shards_of(records, 2))
    assert summary["client"]["late_percent"] == 0.0 and summary["verdict"]["state"] != "INVALID"


def test_other_late_starts_of_a_merged_run_are_judged(tmp_path):
    records = late_second_host()
    for line in records[-100:]:
        line["queue_ms"] = 40.0
    summary, _, _ = merged(tmp_path, shards_of(records, 2))
    assert summary["client"]["late_percent"] > 20 and "late" in reasons(summary)


# --- what is refused --------------------------------------------------------------------------------------------------


def changed(change, k=1, n=4):
    """The shards of a small run, of which shard k is changed by a function of its lines."""
    shards = shards_of(run_records(n=40, stages=2), n)
    shards[k] = change(shards[k]) or shards[k]
    return shards


def configured(**config):
    return lambda lines: lines[0]["run"]["config"].update(config)


def header_with(**run):
    return lambda lines: lines[0]["run"].update(run)


def without_shard(lines):
    del lines[0]["run"]["config"]["shard"]


def with_record(**more):
    made = {"request_id": "cafe0001-0-41", **more}
    return lambda lines: lines.insert(4, record(5.0, 50.0, 90.0, **made))


REFUSED = {
    "another run": (header_with(run_id="beef0002"), "of different runs; give every host the same"),
    "another number of shards": (configured(shard="1/5"), "shards 0/4 and 1/5; name those of one number"),
    "another concurrency and seed": (configured(concurrency=[9], seed=3), "differ in concurrency, seed; give every"),
    "a flag that one host has alone": (configured(rps=[4.0]), "differ in rps"),
    "another model": (header_with(model="other"), "differ in model"),
    "another endpoint": (header_with(url="http://i/v1"), "differ in url"),
    "another version": (header_with(tool_version="1.0.1"), "differ in tool_version"),
    "the same shard twice": (configured(shard="2/4"), "shard-1 and .*shard-2 are both shard 2/4; leave one out"),
    "a whole run": (without_shard, "is no shard but a whole run; leave it out"),
    "a merged run": (header_with(merged={}), "is a merged run already; name the directories"),
    "a shard beyond the last": (configured(shard="4/4"), "names no shard k/n with k below n; restore"),
    "no shard at all": (configured(shard="second of four"), "names no shard k/n"),
    "no header": (lambda lines: lines[1:], "does not begin with a header; restore"),
    "an unfinished header": (lambda lines: [{"llmbench": "1", "run": {"run_id": "x"}}], "does not begin with a header"),
    "a second header": (lambda lines: lines.insert(3, lines[0]), "line 4 is a second header; restore"),
    "a stranger's request": (with_record(request_id="cafe0001-0-2"), "line 5 is a request that is not of shard 1/4"),
    "another run's request": (with_record(request_id="beef0002-0-41"), "line 5 is a request that is not of shard 1/4"),
    "another stage's request": (with_record(request_id="cafe0001-1-41"), "line 5 is a request that is not of shard"),
    "a record of another shard": (with_record(shard="0/4"), "line 5 is a request that is not of shard 1/4"),
    "another run's probe": (with_record(request_id="b-0-probe-0-1", phase="probe"), "line 5 is a request that is not"),
    "a request twice": (with_record(request_id="cafe0001-0-5"), r"line \d+ is a request that was there before; rest"),
    "an id without a number": (with_record(request_id="cafe0001-0-x"), "line 5 is not a record; restore"),
    "an id that is none": (with_record(request_id="x"), "line 5 is not a record"),
    "an id that is a number": (with_record(request_id=5), "line 5 is not a record"),
    "no phase": (with_record(phase=None), "line 5 is not a record"),
    "an audit that is none": (lambda lines: lines.insert(4, {"audit": {"stage": "0"}}), "line 5 is not a record"),
    "bounds that are none": (lambda lines: lines.insert(4, audit(0, 0, date_offset_ms=[1])), "line 5 is not a record"),
    "a stage that is none": (lambda lines: lines.insert(4, {"stage": 3}), "line 5 is not a record"),
    "another load": (lambda lines: lines.__setitem__(1, stage_line(0, 9)), "ran different loads as stage 0; they are"),
}


def test_shards_of_conversations_merge_whatever_the_numbers_of_their_turns(tmp_path):
    """Conversations of 2, 2, 1, 2, 2, 1 ... requests, shared out to two hosts by their own numbers."""
    records, turns, host_of = run_records(n=60, stages=1, spoiled=0.0), {}, {}
    for number, (first, count) in enumerate((5 * k + at, n) for k in range(12) for at, n in ((0, 2), (2, 2), (4, 1))):
        for turn in range(1, count + 1):
            turns[first + turn - 1], host_of[first + turn - 1] = turn, number % 2
    shards = [[host(k, shard="%d/2" % k), stage_line(0)] for k in range(2)]
    for line in records:
        number = int(line["request_id"].split("-")[2])
        more = {"turn": turns[number]} if turns[number] > 1 else {}
        shards[host_of[number]].append({**line, **more})
    assert any(number % 2 != k for number, k in host_of.items()), "the numbers alone don't tell whose they are"
    summary, _, _ = merged(tmp_path, [[*lines, audit(0, k), end(k)] for k, lines in enumerate(shards)])
    assert summary["requests"]["total"] == 56 and summary["requests"]["warmup"] == 4


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_set_of_shards_is_refused_in_one_line(tmp_path, name):
    change, said = REFUSED[name]
    assert re.search(said, refused(tmp_path, changed(change)))


def test_loads_are_compared_even_when_the_first_shard_has_not_got_so_far(tmp_path):
    shards = shards_of(run_records(n=40, stages=2))
    shards[0] = [line for line in shards[0][:-1] if line.get("stage") not in (1, stage_line(1)["stage"])][:-1]
    shards[2] = [stage_line(1, 16) if line == stage_line(1) else line for line in shards[2]]
    said = refused(tmp_path, shards)
    assert "shard-1 and " in said and "shard-2 ran different loads as stage 1" in said


@pytest.mark.parametrize("config", [
    {"out": "elsewhere"}, {"token": "***"}, {"processes": 7}, {"lang": "zh"}, {"progress": "bar"},
])  # fmt: skip
def test_hosts_may_differ_in_what_is_their_own(tmp_path, config):
    summary, _, _ = merged(tmp_path, changed(configured(**config)))
    assert summary["requests"]["total"] == 72


@pytest.mark.parametrize("spelling", ["%s", "%s/", "%s/../shard-1", "link"])
def test_a_directory_given_twice_is_refused(tmp_path, spelling):
    names = written(tmp_path, shards_of(run_records(n=40)))
    (tmp_path / "link").symlink_to(names[1])
    again = str(tmp_path / "link") if spelling == "link" else spelling % names[1]
    assert "is given twice; name each" in refused(tmp_path, [], [*names, again])


def test_directories_without_results_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    names = written(tmp_path, shards_of(run_records(n=40)))
    for name in ("empty", "not there"):
        assert "holds no results.jsonl; name a directory" in refused(tmp_path, [], [*names, str(tmp_path / name)])
    (tmp_path / "empty" / "results.jsonl").write_bytes(b"")
    assert "is empty" in refused(tmp_path, [], [*names, str(tmp_path / "empty")])


@pytest.mark.parametrize("held", ["results.jsonl", "summary.json"])
def test_nothing_is_overwritten(tmp_path, held):
    names = written(tmp_path, shards_of(run_records(n=40)))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / held).write_text("mine")
    for out in ("kept", "shard-0"):
        with pytest.raises(llmbench.UserError, match="already holds"):
            llmbench.merge_shards(names, str(tmp_path / out), print)
    assert (tmp_path / "kept" / held).read_text() == "mine"


def test_a_full_disk_is_a_write_error_and_leaves_no_half(tmp_path, monkeypatch):
    names = written(tmp_path, shards_of(run_records(n=40)))

    def full(shards):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(llmbench, "merged_lines", full)
    with pytest.raises(llmbench.WriteError, match=r"results\.jsonl could not be written: No space left"):
        llmbench.merge_shards(names, str(tmp_path / "merged"), print)
    assert list((tmp_path / "merged").iterdir()) == []


# --- size -------------------------------------------------------------------------------------------------------------


def test_every_number_is_new_once():
    numbers, draw = llmbench.Numbers(), random.Random(1)
    pairs = [(stage, number) for stage in (0, 1) for number in (0, 1, 7, 8, 65535, 65536, 65537, 10**9)]
    draw.shuffle(pairs)
    assert all(numbers.add(*pair) for pair in pairs)
    assert not any(numbers.add(*pair) for pair in pairs)
    assert numbers.add(2, 0) and numbers.add(0, 2)


def test_records_are_not_held_in_memory(tmp_path):
    """20,000 records are 8 MB of text; their ids alone would be 2 MB as a set."""
    names, per_shard = [], 10000
    for k in range(2):
        directory = tmp_path / ("shard-%d" % k)
        directory.mkdir()
        with open(directory / "results.jsonl", "wb") as file:
            file.write(llmbench.encode_line(host(k, shard="%d/2" % k)))
            for turn in range(per_shard):
                start = turn * 5.0
                file.write(llmbench.encode_line(
                    record(start, start + 50, start + 900, request_id="cafe0001-0-%d" % (2 * turn + k))))  # fmt: skip
            file.write(llmbench.encode_line(end(k)))
        names.append(str(directory))
    llmbench.survey_shard(llmbench.open_shard(names[0]), print)  # what is made once, by imports and caches
    tracemalloc.start()
    try:
        llmbench.merge_shards(names, str(tmp_path / "merged"), print)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1e6
    assert len(read(tmp_path / "merged")) == 2 * per_shard + 2


# --- the command ------------------------------------------------------------------------------------------------------


def run_main(capsys, *words):
    status = llmbench.main(list(words))
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_the_command_leaves_the_four_files(programs, tmp_path):
    names = written(tmp_path, shards_of(run_records(spoiled=0.0)))
    done = subprocess.run([*programs, "merge", *names, "--out", str(tmp_path / "merged")], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == FOUR_FILES
    assert "4 of 4 shards, merged, on bench-0, bench-1, bench-2, bench-3" in done.stdout.decode("utf-8")


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_terminal_and_report_say_from_how_many_hosts_it_was_merged(tmp_path, capsys, lang):
    shards = shards_of(run_records(spoiled=0.0))
    shards[3][0]["run"]["host"] = "bench-0"
    names = written(tmp_path, shards[1:])
    status, out, err = run_main(capsys, "merge", *names, "--out", str(tmp_path / "merged"), "--lang", lang)
    assert status == 0 and err.count("\n") == 1 and "missing: shard 0/4" in err
    said = TEXTS[lang]["from.merged"].format(shards=3, n=4, hosts="bench-1, bench-2, bench-0")
    assert said in out.replace("\n  ", " ")
    page = (tmp_path / "merged" / "report.html").read_text(encoding="utf-8")
    assert said in page and "10.0.0." not in page.split("<script")[0]


def test_a_run_that_was_not_merged_says_nothing_of_it(tmp_path, capsys):
    write_lines(tmp_path / "single", whole_run(run_records()))
    assert run_main(capsys, "report", str(tmp_path / "single"), "--lang", "en")[0] == 0
    summary = json.loads((tmp_path / "single" / "summary.json").read_text(encoding="utf-8"))
    assert "merged" not in summary and "hosts" not in summary["client"]
    assert "bench-0 (10.0.0.0" in (tmp_path / "single" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("words,said", [
    (["one"], "--out is needed; name a new directory"),
    (["--out", "new"], "required: DIR"),
    (["one", "--out"], "--out needs a value"),
    (["one", "--output", "new"], "--output is not a flag"),
    (["nowhere", "--out", "new"], "nowhere holds no results.jsonl"),
])  # fmt: skip
def test_a_mistyped_command_is_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    status, out, err = run_main(capsys, "merge", *words)
    assert (status, out) == (2, "") and err.startswith("llmbench: error: ") and err.count("\n") == 1 and said in err
    assert not (tmp_path / "new").exists()


def test_a_file_that_cannot_be_written_is_status_5(tmp_path, monkeypatch, capsys):
    names = written(tmp_path, shards_of(run_records(n=40)))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "results.jsonl.part").mkdir()
    status, _, err = run_main(capsys, "merge", *names, "--out", str(tmp_path / "merged"))
    assert status == 5 and "could not be written" in err


MANY = """
import resource, sys, llmbench
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
llmbench.merge_shards(sys.argv[2:], sys.argv[1], print)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.long
def test_four_hundred_thousand_records_are_merged_in_a_few_megabytes(tmp_path):
    names = []
    for k in range(4):
        directory = tmp_path / ("shard-%d" % k)
        directory.mkdir()
        line = llmbench.encode_line(with_gaps(record(0.0, 50.0, 900.0, request_id="ID"), [20.0, 30.0] * 20))
        with open(directory / "results.jsonl", "wb") as file:
            file.write(llmbench.encode_line(host(k, shard="%d/4" % k)))
            file.writelines(line.replace(b'"ID"', b'"cafe0001-0-%d"' % (4 * turn + k)) for turn in range(100000))
        names.append(str(directory))
    command = [sys.executable, "-c", MANY, str(tmp_path / "merged"), *names]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=str(ROOT))
    scale = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout.split()[-1]) * scale < 20e6
