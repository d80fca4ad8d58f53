"""Workload files and built-ins to prompts: what is read, what is refused and how, and the unique prefix."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
import time
from collections import Counter
from statistics import mean, stdev
from types import SimpleNamespace

import pytest

import llmbench
from conftest import ROOT

BOM = b"\xef\xbb\xbf"


def load(data, name="prompts.txt", unit="auto"):
    return llmbench.parse_workload(data if isinstance(data, bytes) else data.encode("utf-8"), name, unit)


def parse(data, name="prompts.txt"):
    return load(data, name).prompts


def contents(prompts):
    return [prompt.messages[0]["content"] for prompt in prompts]


def refusal(data, name="prompts.jsonl"):
    """The one line that says why a workload is refused."""
    with pytest.raises(llmbench.UserError) as caught:
        parse(data, name)
    line = str(caught.value)
    assert "\n" not in line and name.rsplit("/", maxsplit=1)[-1] in line
    return line


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data,expected", [
    ("one\ntwo\n", ["one", "two"]),
    ("one\r\ntwo\r\n", ["one", "two"]),
    ("one\ntwo", ["one", "two"]),
    (BOM + "第一\n第二\n".encode(), ["第一", "第二"]),
    (BOM + b"\r\none\r\n", ["one"]),
    ("\n\none\n \t\n\ntwo\n\n", ["one", "two"]),
    ("a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\n", ["a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"]),
    # str.splitlines cuts at each
    ("  indented\n", ["  indented"]),
    ("one\n{\"prompt\": \"two\"}\n", ["one", '{"prompt": "two"}']),  # the first line decides
    ("[x] list\n", ["[x] list"]),
    ('"quoted"\n', ['"quoted"']),
])  # fmt: skip
def test_a_text_file_is_a_prompt_a_line(data, expected):
    assert contents(parse(data)) == expected


def test_text_prompts_are_named_after_their_lines():
    assert [prompt.id for prompt in parse("one\n\nthree\n")] == ["line-1", "line-3"]
    assert parse("one")[0].messages == [{"role": "user", "content": "one"}]
    assert parse("one")[0].max_tokens is None


# --- JSONL ------------------------------------------------------------------------------------------------------------

JSONL = (
    '{"id":"a","prompt":"one","max_tokens":7}\n'
    '{"messages":[{"role":"system","content":"be"},{"role":"user","content":"x"}]}\n'
)


@pytest.mark.parametrize("name", ["p.jsonl", "p.JSONL", "p.ndjson", "p.json", "p.txt", "no-suffix", "stdin"])
@pytest.mark.parametrize("data", [JSONL.encode(), BOM + JSONL.encode(), JSONL.replace("\n", "\r\n").encode(),
                                  b"\n\n" + JSONL.encode(), b"  " + JSONL.encode()])  # fmt: skip
def test_jsonl_is_found_by_its_name_or_by_its_first_line(name, data):
    first, second = parse(data, name)
    assert (first.id, first.max_tokens, first.messages) == ("a", 7, [{"role": "user", "content": "one"}])
    assert second.messages == [{"role": "system", "content": "be"}, {"role": "user", "content": "x"}]
    assert second.id.startswith("line-") and second.max_tokens is None


def test_a_line_separator_in_a_json_string_ends_no_line():
    data = '{"prompt":"a\u2028b\u0085c"}\n{"prompt":"d"}\n'
    assert contents(parse(data, "p.jsonl")) == ["a\u2028b\u0085c", "d"]


def test_ids_are_texts():
    data = '{"id":7,"prompt":"a"}\n{"id":"七","prompt":"b"}\n{"prompt":"c"}\n'
    assert [prompt.id for prompt in parse(data, "p.jsonl")] == ["7", "七", "line-3"]


def test_an_id_of_null_is_none():
    assert parse('{"id":null,"prompt":"a"}', "p.jsonl")[0].id == "line-1"


def test_typed_parts_extra_fields_and_null_content_stay_as_they_are():
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]},
        {
            "role": "user",
            "name": "ann",
            "content": [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "u"}}],
        },
    ]
    assert parse(json.dumps({"messages": messages}), "p.jsonl")[0].messages == messages


GOOD = '{"prompt":"fine"}\n'
BAD_LINES = {
    "no JSON": ("this is no JSON", "not JSON"),
    "cut off": ('{"prompt":"cut', "not JSON"),
    "two objects": ('{"prompt":"a"}{"prompt":"b"}', "not JSON"),
    "nested too deep": ('{"prompt":' + "[" * 100000, "not JSON"),
    "a list": ('["a"]', "object"),
    "a text": ('"a"', "object"),
    "neither": ('{"id":"x"}', "prompt"),
    "both": ('{"prompt":"a","messages":[{"role":"user","content":"b"}]}', "either"),
    "prompt is a number": ('{"prompt":7}', "prompt"),
    "prompt is empty": ('{"prompt":""}', "prompt"),
    "prompt is blank": ('{"prompt":" \\n"}', "prompt"),
    "prompt is null": ('{"prompt":null}', "prompt"),
    "messages is empty": ('{"messages":[]}', "messages"),
    "messages is an object": ('{"messages":{"role":"user"}}', "messages"),
    "message is a text": ('{"messages":["hi"]}', "role"),
    "no role": ('{"messages":[{"content":"hi"}]}', "role"),
    "role is a number": ('{"messages":[{"role":1,"content":"hi"}]}', "role"),
    "content is a number": ('{"messages":[{"role":"user","content":1}]}', "content"),
    "content is an object": ('{"messages":[{"role":"user","content":{}}]}', "content"),
    "max_tokens is 0": ('{"prompt":"a","max_tokens":0}', "max_tokens"),
    "max_tokens is negative": ('{"prompt":"a","max_tokens":-1}', "max_tokens"),
    "max_tokens is a text": ('{"prompt":"a","max_tokens":"9"}', "max_tokens"),
    "max_tokens is a fraction": ('{"prompt":"a","max_tokens":1.5}', "max_tokens"),
    "max_tokens is true": ('{"prompt":"a","max_tokens":true}', "max_tokens"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_by_its_number(name):
    line, said = BAD_LINES[name]
    message = refusal(GOOD + "\n" + line + "\n" + GOOD)
    assert "p" in message and "line 3" in message and said in message and len(message) < 250


def test_a_bad_line_is_never_sent_as_a_prompt_even_in_a_file_that_is_jsonl_by_its_content():
    assert "line 2" in refusal(GOOD + "plain text\n", "prompts.txt")
    assert "line 1" in refusal("plain text\n", "prompts.jsonl")


@pytest.mark.parametrize("data,line", [
    (b"\xff\xfeo\x00n\x00e\x00", 1), (b"one\ntwo \xb5\n", 2), ("你好\n".encode("gbk"), 1), (b"one\n\xed\xa0\x80\n", 2),
])  # fmt: skip
def test_what_is_not_utf8_is_named_by_its_line(data, line):
    message = refusal(data, "prompts.txt")
    assert f"line {line}" in message and "UTF-8" in message


@pytest.mark.parametrize("data", [b"", b"\n", b" \n\t\r\n", BOM, BOM + b"\r\n"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_workload_without_prompts_is_refused(data, name):
    assert "no prompt" in refusal(data, name)


# --- ShareGPT and arrays ----------------------------------------------------------------------------------------------


def said(*entries):
    """A conversation of entries such as "human: hi"."""
    return [dict(zip(("from", "value"), entry.split(": ", 1))) for entry in entries]


def user(text):
    return {"role": "user", "content": text}


DUMP = [
    {"id": "QWJhYvA_0", "conversations": said("human: one", "gpt: 1", "human: two", "gpt: 2", "user: three")},
    {"id": "i6IyJda_1", "conversations": said("gpt: left over", "human: four", "bing: 4")},
    {"conversations": said("system: be brief", "Human: five", "assistant: 5", "system: shout", "human: six")},
]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["dump.json", "dump.jsonl", "dump", "stdin"])
@pytest.mark.parametrize("mark", [b"", BOM, b"\r\n \t"])
def test_of_sharegpt_the_users_turns_are_played(indent, name, mark):
    first, second, third = parse(mark + json.dumps(DUMP, indent=indent).encode(), name)
    assert [prompt.id for prompt in (first, second, third)] == ["QWJhYvA_0", "i6IyJda_1", "item-3"]
    assert (first.messages, first.turns) == ([user("one")], [[user("two")], [user("three")]])
    assert (second.messages, second.turns) == ([user("four")], [])  # the answer that a cut left at the head is no turn
    assert third.messages == [{"role": "system", "content": "be brief"}, user("five")]
    assert third.turns == [[{"role": "system", "content": "shout"}, user("six")]]


def test_sharegpt_may_come_a_line_each():
    lines = "".join(json.dumps(item) + "\n" for item in DUMP)
    prompts = parse(lines, "dump.jsonl")
    assert [prompt.id for prompt in prompts] == ["QWJhYvA_0", "i6IyJda_1", "line-3"]
    assert [prompt.turns for prompt in prompts] == [prompt.turns for prompt in parse(json.dumps(DUMP))]


def test_a_blank_system_entry_says_nothing_and_recorded_answers_may_be_of_any_form():
    entries = said("system: ", "human: hi") + [{"from": "gpt", "value": None}, {"from": "chatgpt"}]
    assert parse(json.dumps([{"conversations": entries}]))[0].messages == [user("hi")]


def test_an_array_may_hold_prompts_and_messages_too():
    parts = [{"type": "image_url", "image_url": {"url": "u"}}]
    items = [{"prompt": "a", "max_tokens": 5}, {"id": 7, "messages": [{"role": "user", "content": parts}]}, DUMP[0]]
    a, b, c = parse(json.dumps(items), "p.json")
    assert (a.id, a.max_tokens, a.messages, a.turns) == ("item-1", 5, [user("a")], [])
    assert (b.id, b.messages) == ("7", [{"role": "user", "content": parts}])
    assert len(c.turns) == 2


def test_messages_are_sent_as_they_are_and_are_no_turns():
    messages = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    prompt = parse(json.dumps({"messages": messages}), "p.jsonl")[0]
    assert (prompt.messages, prompt.turns) == (messages, [])


BAD_ITEMS = {
    "empty": ({"conversations": []}, "user"),
    "answers only": ({"conversations": said("gpt: a", "gpt: b")}, "user"),
    "system only": ({"conversations": said("system: a")}, "user"),
    "no list": ({"conversations": {"from": "human"}}, "list"),
    "null": ({"conversations": None}, "list"),
    "an odd role": ({"conversations": said("human: a", "tool: b")}, "entry 2"),
    "no role": ({"conversations": [{"value": "a"}]}, "entry 1"),
    "a role that is no text": ({"conversations": [{"from": ["human"], "value": "a"}]}, "entry 1"),
    "an entry that is no object": ({"conversations": ["hi"]}, "entry 1"),
    "a blank question": ({"conversations": said("human: a", "gpt: b", "human:  ")}, "entry 3"),
    "a question that is no text": ({"conversations": [{"from": "human", "value": 7}]}, "entry 1"),
    "no value": ({"conversations": [{"from": "human"}]}, "entry 1"),
    "an image that would not be sent": ({"image": "a.jpg", "conversations": said("human: <image> a")}, "image"),
    "both": ({"prompt": "a", "conversations": said("human: a")}, "either"),
    "a text": ("hi", "object"),
    "max_tokens": ({"max_tokens": 0, "conversations": said("human: a")}, "max_tokens"),
}


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_a_bad_item_is_named_by_its_number(name):
    item, reason = BAD_ITEMS[name]
    message = refusal(json.dumps([DUMP[0], item, DUMP[1]]), "dump.json")
    assert "item 2" in message and reason in message and len(message) < 250
    if isinstance(item, dict):
        message = refusal(json.dumps(DUMP[0]) + "\n\n" + json.dumps(item), "dump.jsonl")
        assert "line 3" in message and reason in message


def test_all_broken_items_are_counted_and_some_named_so_that_they_can_be_mended_at_once():
    items = [DUMP[0]] + [{"conversations": []}] * 2
    assert refusal(json.dumps(items), "d.json").endswith("(2 are broken: also item 3)")
    message = refusal(json.dumps(items * 20), "d.json")
    assert "item 2" in message and message.endswith("(40 are broken: also item 3, item 5, item 6, item 8, …)")
    assert refusal(GOOD + "{\n[\n", "p.jsonl").endswith("(2 are broken: also line 3)")


@pytest.mark.parametrize("data", ["[", '[{"prompt": "a"},]', '[{"prompt": "a"}] [1]', "[" * 100000, '[{"prompt": "a"'])
def test_an_array_that_is_not_json_is_one_line(data):
    assert "not JSON" in refusal(data, "p.json")


def test_an_array_that_is_not_utf8_is_named_by_its_line():
    assert "line 3 is not UTF-8" in refusal(b'[\n{"prompt": "a"},\n{"prompt": "\xb5"}\n]', "p.json")


@pytest.mark.parametrize("data", [b"[]", BOM + b" [ ]\n"])
def test_an_empty_array_is_refused(data):
    assert "no prompt" in refusal(data, "p.json")


def test_brackets_that_open_a_text_are_text():
    assert contents(parse("[] an empty box\n[x] a full one\n")) == ["[] an empty box", "[x] a full one"]


def test_a_hundred_thousand_conversations_load_in_seconds():
    entries = said("human: " + "ask " * 60, "gpt: " + "answer " * 60, "human: " + "again " * 40)
    data = json.dumps([{"id": "c", "conversations": entries}] * 100000).encode()
    started = time.perf_counter()
    prompts = parse(data, "dump.json")
    assert len(data) > 80e6 and len(prompts) == 100000 and time.perf_counter() - started < 20  # 2 s on a slow core


# --- traces -----------------------------------------------------------------------------------------------------------

MOONCAKE = """\
{"timestamp": 27000, "input_length": 6758, "output_length": 500, "hash_ids": [0,1,2,3,4,5,6,7,8,9,10,11,12,13]}
{"timestamp": 27000, "input_length": 915, "output_length": 355, "hash_ids": [0, 462]}
{"timestamp": 30500, "input_length": 512, "output_length": 3, "hash_ids": [0]}
"""
BURST = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,API log
118.5,"GPT-4, new",0,0,0,API log
127,GPT-4,1360,647.0,2007,API log
"""


def timed(workload):
    return [(prompt.at, prompt.input_tokens, prompt.output_tokens) for prompt in workload.prompts]


@pytest.mark.parametrize("name", ["conversation_trace.jsonl", "trace", "trace.json"])
def test_a_mooncake_trace(name):
    trace = load(MOONCAKE, name)
    assert timed(trace) == [(0.0, 6758, 500), (0.0, 915, 355), (3.5, 512, 3)]
    assert [list(prompt.blocks) for prompt in trace.prompts] == [list(range(14)), [0, 462], [0]]
    assert (trace.trace, trace.block_tokens) == (True, 512)
    assert [(prompt.id, prompt.messages, prompt.max_tokens) for prompt in trace.prompts][1] == ("line-2", [], 355)
    assert trace.notes == (f"{name}: a trace of 3 requests over 3.5 s, its times read as ms",)


@pytest.mark.parametrize("name", ["BurstGPT_1.csv", "trace", "trace.txt"])
def test_a_burstgpt_trace_without_its_failed_requests(name):
    trace = load(BOM + BURST.replace("\n", "\r\n").encode(), name)
    assert timed(trace) == [(0.0, 472, 18), (40.0, 1087, 230), (122.0, 1360, 647)]
    assert (trace.trace, trace.block_tokens, trace.prompts[2].id) == (True, 0, "line-6")
    assert [note.split(": ")[1] for note in trace.notes] == [
        "a trace of 3 requests over 122.0 s, its times read as s",
        "2 of 5 requests have a length of 0 and are left out",
    ]


def test_a_csv_traces_columns_are_found_by_their_names():
    rows = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    assert timed(load(rows + "7,s,1.5,m,10,20,30,API log\n", "b.csv")) == [(0.0, 10, 20)]


@pytest.mark.parametrize("data,name,unit,at", [
    (MOONCAKE, "t.jsonl", "s", 3500.0), (MOONCAKE, "t.jsonl", "ms", 3.5), (BURST, "t.csv", "ms", 0.122),
    (BURST, "t.csv", "s", 122.0),
])  # fmt: skip
def test_the_unit_of_the_times_may_be_said(data, name, unit, at):
    trace = load(data, name, unit)
    assert trace.prompts[-1].at == pytest.approx(at)
    assert trace.notes[0].endswith(f"read as {unit}")


def test_what_stands_out_of_order_is_sorted_and_what_came_at_once_stays_in_file_order():
    times = [5000, 9000, 7000, 5000, 4000, 10000]
    lines = [{"timestamp": at, "input_length": 10 + n, "output_length": 1} for n, at in enumerate(times)]
    trace = load("".join(json.dumps(line) + "\n" for line in lines), "t.jsonl")
    assert [(prompt.at, prompt.id) for prompt in trace.prompts] == [
        (0.0, "line-5"), (1.0, "line-1"), (1.0, "line-4"), (3.0, "line-3"), (5.0, "line-2"), (6.0, "line-6"),
    ]  # fmt: skip
    assert trace.notes[1:] == ("t.jsonl: 3 requests stood behind later ones, by up to 5.000 s; put in order",)


@pytest.mark.parametrize("tokens", [16, 64, 512, 1024])
def test_what_a_block_stands_for_is_told_from_the_trace(tokens):
    lengths = [5, 100, 1000, 1500, 3000, 3100]
    lines = [
        {"timestamp": n, "input_length": length, "output_length": 1, "hash_ids": list(range(-(-length // tokens)))}
        for n, length in enumerate(lengths)
    ]
    data = "".join(json.dumps(line) + "\n" for line in lines)
    assert load(data, "t.jsonl").block_tokens == tokens
    odd = json.dumps({"timestamp": 9, "input_length": 3000, "output_length": 1, "hash_ids": [1]}) + "\n"
    trace = load(data + odd, "t.jsonl")
    assert trace.block_tokens == tokens
    assert trace.notes[1] == f"t.jsonl: 1 requests have hash_ids that are not one per {tokens} tokens"


LINE = {"timestamp": 1, "input_length": 2, "output_length": 3}
BAD_TRACES = {
    "no time": {"input_length": 2, "output_length": 3},
    "no output": {"timestamp": 1, "input_length": 2},
    "a time that is a text": {**LINE, "timestamp": "1"},
    "a length that is true": {**LINE, "output_length": True},
    "a negative length": {**LINE, "input_length": -1},
    "half a token": {**LINE, "input_length": 1.5},
    "NaN": {**LINE, "timestamp": float("nan")},
    "without end": {**LINE, "output_length": float("inf")},
    "a length for no memory": {**LINE, "output_length": 99999999999999},
    "a digit too many": {**LINE, "input_length": 10**400},
    "blocks that are no list": {**LINE, "hash_ids": 5},
    "blocks that are lists": {**LINE, "hash_ids": [[1]]},
    "a prompt": {"prompt": "hi"},
    "a list": [1],
}


@pytest.mark.parametrize("name", BAD_TRACES)
def test_a_bad_trace_line_is_named_by_its_number(name):
    assert "t.jsonl line 5" in refusal(MOONCAKE + "\n" + json.dumps(BAD_TRACES[name]) + "\n" + MOONCAKE, "t.jsonl")


@pytest.mark.parametrize(
    "row", ["x,m,1,2,3,l", "1,m,1", "1,m,,2,2,l", "1,m,-1,2,1,l", "nan,m,1,2,3,l", "1,m,1.5,2,3,l", "inf,m,1,2,3,l"]
)
def test_a_bad_csv_row_is_named_by_its_number(row):
    assert "t.csv line 7" in refusal(BURST + row + "\n", "t.csv")


def test_what_json_does_not_have_is_refused():
    """In what is sent; elsewhere in a line nobody looks at it."""
    odd = '{"messages": [{"role": "user", "content": "a", "n": NaN}]}'
    assert "p.jsonl line 2" in refusal('{"prompt": "hi"}\n%s\n' % odd, "p.jsonl")
    assert "p.json item 1" in refusal("[%s]" % odd, "p.json")
    assert len(load('{"prompt": "hi", "score": NaN}\n', "p.jsonl").prompts) == 1


def test_a_csv_without_the_columns_is_no_list_of_prompts():
    assert "Request tokens" in refusal("name,age\nann,7\n", "t.csv")


def test_a_trace_in_which_all_failed_is_refused():
    assert "no prompt" in refusal(BURST.split("\n")[0] + "\n1,m,5,0,5,l\n", "t.csv")


def test_lengths_of_a_trace_among_prompts_are_refused():
    assert "line 2" in refusal('{"prompt": "a"}\n' + MOONCAKE, "t.jsonl")


def test_a_text_that_names_a_timestamp_is_a_text():
    assert contents(parse("What is a timestamp, and why?\n")) == ["What is a timestamp, and why?"]
    assert parse('{"prompt": "a", "timestamp": 5, "input_length": 3}')[0].at is None


# --- where it is read from --------------------------------------------------------------------------------------------


def test_a_file_is_read_and_named(tmp_path):
    path = tmp_path / "中文 prompts.txt"
    path.write_bytes("你好\n".encode())
    assert contents(llmbench.read_workload(str(path), []).prompts) == ["你好"]
    path.write_bytes(b"")
    with pytest.raises(llmbench.UserError, match=r"中文 prompts\.txt holds no prompt"):
        llmbench.read_workload(str(path), [])


@pytest.mark.parametrize("path", ["missing.txt", ".", ""])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(llmbench.UserError, match=r"^--workload-file .*cannot be read: ."):
        llmbench.read_workload(path, [])


def test_a_dash_reads_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(BOM + JSONL.encode())))
    assert [prompt.id for prompt in llmbench.read_workload("-", []).prompts] == ["a", "line-2"]


def test_stdin_that_is_empty_is_one_line(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    with pytest.raises(llmbench.UserError, match="stdin holds no prompt"):
        llmbench.read_workload("-", [])


def test_the_built_in_prompts_are_sound_and_told_apart():
    builtin = [(language, llmbench.read_asset(f"prompts/{language}.txt")) for language in ("en", "zh")]
    prompts = llmbench.read_workload(None, builtin).prompts
    assert len({prompt.id for prompt in prompts}) == len(prompts) >= 10
    assert len({prompt.messages[0]["content"] for prompt in prompts}) == len(prompts)
    assert {prompt.id.split("-")[0] for prompt in prompts} == {"en", "zh"}
    chinese = [prompt.messages[0]["content"] for prompt in prompts if prompt.id.startswith("zh")]
    assert all(re.search("[\u4e00-\u9fff]", text) for text in chinese)


def test_prompts_are_taken_in_file_order_and_start_again_at_the_end(tmp_path):
    workload, out = tmp_path / "three.jsonl", tmp_path / "out"
    workload.write_text("".join('{"id":"%s","prompt":"p"}\n' % name for name in "abc"), encoding="utf-8")
    command = [
        sys.executable,
        str(ROOT / "llmbench.py"),
        "run",
        "--url",
        "mock:?ttft=1&itl=0&tokens=1",
        "--out",
        str(out),
    ]
    command += ["--workload-file", str(workload), "--total-requests", "7", "--warmup", "1", "--progress", "none"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [line for line in lines if "request_id" in line]
    assert [record["prompt_id"] for record in records] == list("abcabcab")
    assert [record["phase"] for record in records] == ["warmup"] + ["measure"] * 7


# --- the order --------------------------------------------------------------------------------------------------------


def order(name, seed, count, length):
    return [llmbench.order_index(name, seed, count, index) for index in range(length)]


def test_in_order_starts_again_at_the_end():
    assert order("in-order", 5, 3, 7) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2**70])
def test_shuffled_takes_each_prompt_once_a_turn_and_turns_differ(count, seed):
    taken = order("shuffled", seed, count, 3 * count)
    turns = [taken[at : at + count] for at in range(0, 3 * count, count)]
    assert all(sorted(turn) == list(range(count)) for turn in turns)
    assert count < 10 or (turns[0] != turns[1] != turns[2] != turns[0] and turns[0] != sorted(turns[0]))


def test_every_permutation_is_as_likely_as_another():
    turns = Counter(tuple(order("shuffled", seed, 3, 3)) for seed in range(6000))
    assert len(turns) == 6 and max(turns.values()) - min(turns.values()) < 250  # six standard deviations


def test_random_draws_evenly_and_may_repeat():
    taken = Counter(order("random", 0, 10, 10000))
    assert len(taken) == 10 and all(800 < times < 1200 for times in taken.values())
    assert len(set(order("random", 0, 1000, 1000))) < 700


@pytest.mark.parametrize("name", ["shuffled", "random"])
def test_an_order_is_its_seeds_alone_whichever_part_asks_for_which_request_first(name):
    whole = order(name, 7, 50, 200)
    llmbench.permutation.cache_clear()
    assert [llmbench.order_index(name, 7, 50, index) for index in reversed(range(200))] == whole[::-1]
    assert order(name, 8, 50, 200) != whole


def test_orders_are_the_same_in_every_version():
    assert order("shuffled", 0, 8, 16) == [5, 0, 2, 4, 6, 3, 7, 1, 7, 1, 3, 6, 2, 4, 0, 5]
    assert order("random", 0, 8, 16) == [5, 4, 3, 1, 0, 3, 1, 0, 4, 3, 3, 7, 0, 7, 6, 4]


def test_an_order_that_there_is_not():
    with pytest.raises(ValueError, match="backwards"):
        llmbench.order_index("backwards", 0, 3, 1)


# --- texts of a length ------------------------------------------------------------------------------------------------

TOKENIZERS = {
    "words": lambda text: len(text.split()),
    "four characters": lambda text: -(-len(text) // 4),
    "pieces": lambda text: sum(-(-len(piece) // 5) for piece in re.findall(r" ?[A-Za-z]+|[0-9]|[^A-Za-z0-9 ]| ", text)),
    "words and marks": lambda text: len(re.findall(r" ?[A-Za-z]+|[0-9]{1,3}|[^A-Za-z0-9 ]| ", text)),
    "bytes": lambda text: len(text.encode()),
}


def endpoint(name, template):
    """What an endpoint counts for a prompt: its texts, and so many tokens of its template's own for each message."""
    return lambda prompt: sum(TOKENIZERS[name](message["content"]) + template for message in prompt.messages)


def probed(count, maker, least, most, system=False, send=lambda prompt, number: prompt):
    probes = llmbench.probe_prompts(maker, least, most, system)
    return llmbench.fit_lengths([(chars, count(send(prompt, n))) for n, (chars, prompt) in enumerate(probes, 90000)])


def unique_prompt(prompt, number):
    return llmbench.make_unique(prompt, f"run-0-{number}")


@pytest.mark.parametrize("chars", [*range(8, 320), 1000, 9999])
def test_a_text_has_the_characters_that_it_was_asked_for(chars):
    text = llmbench.TextMaker(0).text(str(chars), chars)
    assert len(text) == chars and text[0].isupper() and text[-1] == "." and text.isascii()
    assert re.fullmatch(r"([A-Z][a-z]*( [a-zA-Z]+)*\. )*[A-Z][a-z]*( [a-zA-Z]+)*\.", text)


def test_a_text_is_never_shorter_than_one_word():
    assert {len(llmbench.TextMaker(0).text("a", chars)) for chars in (-5, 0, 1, 7, 8)} == {8}


def test_a_text_is_its_seeds_and_its_names():
    maker, other = llmbench.TextMaker(0), llmbench.TextMaker(1)
    assert maker.text("a", 500) == llmbench.TextMaker(0).text("a", 500)
    heads = {made.text(name, 500)[:66] for made in (maker, other) for name in map(str, range(2000))}
    assert len(heads) == 4000  # no cache of prefixes finds two of them alike
    assert maker.text("a", 80) == "Little cover room use taste future it born private old sometimes. Fresh license."


def test_the_words_are_ordinary_and_there_are_some_of_each_length():
    words = llmbench.WORDS.split()
    assert len(set(words)) == len(words) and all(word.isalpha() and word.isascii() for word in words)
    lengths = Counter(map(len, words))
    assert set(lengths) == set(range(1, 12)) and all(20 <= lengths[n] <= 256 for n in range(2, 12))


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("template", [0, 20])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_input_tokens_are_within_two_percent_of_the_target(name, template, system):
    count, maker = endpoint(name, template), llmbench.TextMaker(3)
    fit = probed(count, maker, 16, 32000, system)
    prefix = llmbench.prefix_text(maker, 300, fit) if system else ""
    tried = 0
    for target, times in ((16, 300), (32, 300), (64, 200), (200, 100), (1024, 50), (8000, 10), (32000, 4)):
        if target >= fit.least + 4:
            built = [llmbench.build_prompt(None, target, prefix, fit, maker, f"0-{n}") for n in range(times)]
            assert {prompt.input_tokens for prompt in built} == {target + (round(fit.slope * len(prefix)))}
            near = {"rel": 0.02} if name != "words" else {"rel": 0.02, "abs": 0.5}  # a period is no token: half a word
            assert mean(map(count, built)) == pytest.approx(built[0].input_tokens, **near), target
            tried += 1
    assert tried >= 5


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_probes_take_the_unique_prefix_into_account(name):
    count, maker = endpoint(name, 20), llmbench.TextMaker(0)
    fit = probed(count, maker, 64, 1024, send=unique_prompt)
    assert fit.base > probed(count, maker, 64, 1024).base
    for target in (80, 256, 1024):
        sent = [unique_prompt(llmbench.build_prompt(None, target, "", fit, maker, f"0-{n}"), n) for n in range(100)]
        assert mean(map(count, sent)) == pytest.approx(target, rel=0.02)


def test_the_prefix_is_one_for_all_and_has_its_length():
    count, maker = endpoint("pieces", 20), llmbench.TextMaker(0)
    fit = probed(count, maker, 100, 1000, system=True)
    prefix = llmbench.prefix_text(maker, 512, fit)
    assert TOKENIZERS["pieces"](prefix) == pytest.approx(512, rel=0.02)
    first, second = (llmbench.build_prompt(None, 100, prefix, fit, maker, name) for name in "ab")
    assert first.messages[0] == second.messages[0] == {"role": "system", "content": prefix}
    assert first.messages[1]["content"][:60] != second.messages[1]["content"][:60]
    made = llmbench.make_unique(first, "run-0-1")
    assert made.messages[0] == first.messages[0] and PREFIX.match(made.messages[1]["content"])


def test_the_prefix_joins_a_system_message_that_is_there():
    prompt = llmbench.Prompt("p", [{"role": "system", "content": "own"}, user("hi")], 7, [[user("more")]])
    made = llmbench.build_prompt(prompt, None, "Shared.", llmbench.Fit(0.0, 0.2), llmbench.TextMaker(0), "n")
    assert made.messages == [{"role": "system", "content": "Shared.\n\nown"}, user("hi")]
    assert (made.id, made.max_tokens, made.turns, made.input_tokens) == ("p", 7, prompt.turns, None)
    assert llmbench.prefixed("", prompt.messages) == prompt.messages
    assert llmbench.prefixed("S", [user("hi")]) == [{"role": "system", "content": "S"}, user("hi")]
    parts = [{"type": "text", "text": "own"}]
    headed = llmbench.prefixed("S", [{"role": "system", "content": parts, "name": "n"}])
    assert headed == [{"role": "system", "content": [{"type": "text", "text": "S"}, *parts], "name": "n"}]
    assert parts == [{"type": "text", "text": "own"}] and prompt.messages[0]["content"] == "own"


def test_a_text_without_a_length_is_not_built():
    with pytest.raises(ValueError, match="length"):
        llmbench.build_prompt(None, None, "", llmbench.Fit(0.0, 0.2), llmbench.TextMaker(0), "n")


def test_long_prompts_are_built_fast():
    maker, fit = llmbench.TextMaker(0), llmbench.Fit(20.0, 0.18)
    plain, blocks = llmbench.Prompt("p", [], input_tokens=100000), llmbench.Prompt("p", [], blocks=range(196))
    blocks.input_tokens = 100000
    for prompt in (plain, blocks):
        times = []
        for _ in range(7):
            started = time.perf_counter()
            llmbench.build_prompt(prompt, None, "", fit, maker, "n", 512)
            times.append(time.perf_counter() - started)
        assert min(times) < 0.1  # 0.001 s and 0.005 s on an idle core


# --- the fit ---


def test_the_line_is_found_from_two_points_and_kept_from_more():
    assert llmbench.fit_lengths([(100, 40), (1100, 240)]) == pytest.approx((20.0, 0.2))
    fit = llmbench.fit_lengths([(100, 39), (100, 41), (500, 120), (10100, 2043), (10100, 2037)])
    assert fit == pytest.approx((20.0, 0.2), rel=0.01)
    assert (fit.chars_for(1020), fit.least) == (pytest.approx(5000, rel=0.01), 22)


def test_what_is_shorter_than_a_text_can_be_is_the_shortest_text():
    fit = llmbench.Fit(20.0, 0.2)
    assert fit.chars_for(1) == fit.chars_for(fit.least - 1) == llmbench.SHORTEST_TEXT == 8
    assert fit.tokens_for(fit.chars_for(70)) == pytest.approx(70)


@pytest.mark.parametrize("pairs", [
    [(100, 30), (1000, 30)],  # it does not count
    [(100, 30), (1000, 20)],  # nor backwards
    [(100, 1), (200, 1), (9000, 1)],
    [(100, 40), (1000, 220), (5000, 512), (10000, 512)],  # it cuts what is long
    [(100, 400), (1000, 20), (10000, 3000)],
])  # fmt: skip
def test_counts_that_make_no_sense_are_refused_and_shown(pairs):
    with pytest.raises(ValueError, match=r"do not grow evenly .*%d for 100 characters" % pairs[0][1]):
        llmbench.fit_lengths(pairs)


@pytest.mark.parametrize("pairs", [[], [(100, 30)], [(100, 30), (100, 31)]])
def test_a_line_takes_two_lengths(pairs):
    with pytest.raises(ValueError, match="two texts"):
        llmbench.fit_lengths(pairs)


@pytest.mark.parametrize("least,most", [(1, 1), (16, 16), (16, 32000), (1024, 1024), (100000, 200000)])
def test_probes_are_few_short_and_on_both_sides(least, most):
    probes = llmbench.probe_prompts(llmbench.TextMaker(0), least, most)
    chars = [chars for chars, _ in probes]
    assert 5 <= len(probes) <= 12 and max(chars) <= 40000 and max(chars) >= 3 * min(chars)
    assert len({prompt.messages[0]["content"] for _, prompt in probes}) == len(probes)
    assert all(prompt.max_tokens == 1 and len(prompt.messages[0]["content"]) == size for size, prompt in probes)


# --- lengths ---


def test_a_list_of_lengths_makes_stages():
    lengths = llmbench.parse_lengths("512, 2048,8192")
    assert (lengths.stages, lengths.bounds) == ([512, 2048, 8192], (512, 8192))
    assert [lengths.draw(0, stage, 5) for stage in range(4)] == [512, 2048, 8192, 512]
    assert llmbench.parse_lengths("1024").stages == [1024]


def test_uniform_lengths_are_even_from_end_to_end():
    lengths = llmbench.parse_lengths("uniform:1,10")
    drawn = Counter(lengths.draw(0, 0, index) for index in range(10000))
    assert sorted(drawn) == list(range(1, 11)) and all(800 < times < 1200 for times in drawn.values())
    assert (lengths.stages, lengths.bounds) == ([5], (1, 10))
    assert llmbench.parse_lengths("uniform:7,7").draw(0, 0, 0) == 7


def test_normal_lengths_have_their_mean_and_deviation_and_are_at_least_1():
    lengths = llmbench.parse_lengths("normal:1024,200")
    drawn = [lengths.draw(0, 0, index) for index in range(10000)]
    assert mean(drawn) == pytest.approx(1024, abs=8) and stdev(drawn) == pytest.approx(200, rel=0.03)
    assert sum(824 <= length <= 1224 for length in drawn) == pytest.approx(6827, abs=200)
    assert (lengths.stages, lengths.bounds) == ([1024], (424, 1624))
    wide = llmbench.parse_lengths("normal:10,100")
    assert min(wide.draw(0, 0, index) for index in range(500)) == 1 == wide.bounds[0]
    assert {llmbench.parse_lengths("normal:64,0").draw(0, 0, index) for index in range(9)} == {64}


@pytest.mark.parametrize("text,golden", [
    ("uniform:100,900", [112, 418, 425, 597, 773, 344]), ("normal:1024,200", [1422, 1140, 447, 1302, 994, 1200]),
])  # fmt: skip
def test_a_drawn_length_is_its_numbers(text, golden):
    lengths = llmbench.parse_lengths(text)
    assert [lengths.draw(0, 1, index) for index in range(6)] == golden
    drawn = {tuple(lengths.draw(seed, stage, n) for n in range(6)) for seed in (0, 1) for stage in (0, 1)}
    assert len(drawn) == 4


@pytest.mark.parametrize("text", [
    "", "0", "-5", "1.5", "1e3", "abc", "5,", ",", "5,0", "normal", "normal:", "normal:5", "normal:0,5", "normal:1,2,3",
    "normal:5,-1", "uniform:5", "uniform:9,1", "uniform:0,5", "fixed:", "gamma:1,2", "uniform:1,2,3", "٣", "5 5", ":",
])  # fmt: skip
def test_lengths_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match=r"^(needs|normal needs|uniform needs) "):
        llmbench.parse_lengths(text)


# --- the text of a trace ---


def test_the_same_blocks_are_the_same_text_and_the_lengths_are_the_traces():
    lines = [(2000, [0, 1, 2, 3]), (1500, [0, 1, 9]), (1900, [0, 1, 2, 8]), (900, [5, 1]), (100, [0]), (60, [0])]
    trace = load("".join(
        json.dumps({"timestamp": n, "input_length": length, "output_length": 7, "hash_ids": ids}) + "\n"
        for n, (length, ids) in enumerate(lines)
    ), "t.jsonl")  # fmt: skip
    count, maker = endpoint("pieces", 20), llmbench.TextMaker(0)
    fit = probed(count, maker, 60, 2000)
    made = [llmbench.build_prompt(p, None, "", fit, maker, p.id, trace.block_tokens) for p in trace.prompts]
    texts = [prompt.messages[0]["content"] for prompt in made]
    for prompt, (length, _) in zip(made, lines):
        assert (prompt.input_tokens, prompt.output_tokens, prompt.max_tokens) == (length, 7, 7)
        assert count(prompt) == pytest.approx(length, rel=0.02, abs=4)
    size = round(512 / fit.slope)
    assert shared(texts[0], texts[1]) == pytest.approx(2 * size, abs=20)
    assert shared(texts[0], texts[2]) == pytest.approx(3 * size, abs=20)
    assert shared(texts[0], texts[3]) < 20 and len(texts[3]) > 1.5 * size and texts[3][size:] in texts[0][size:]
    assert texts[0].startswith(texts[4]) and texts[4].startswith(texts[5])


def shared(one, other):
    """How many characters two texts have in common at their heads."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def test_where_the_blocks_do_not_reach_the_text_is_the_requests_own():
    maker, fit = llmbench.TextMaker(0), llmbench.Fit(0.0, 0.2)
    prompt = llmbench.Prompt("p", [], input_tokens=1000, blocks=[1])
    texts = [llmbench.build_prompt(prompt, None, "", fit, maker, name, 512).messages[0]["content"] for name in "ab"]
    assert [len(text) for text in texts] == [5000, 5000] and 2560 <= shared(*texts) < 2580
    unblocked = [llmbench.build_prompt(prompt, None, "", fit, maker, name).messages[0]["content"] for name in "ab"]
    assert shared(*unblocked) < 20


# --- the unique prefix ------------------------------------------------------------------------------------------------

PREFIX = re.compile(r"\[[0-9a-f]{8}\] ")


def unique(messages, request_id="run-0-1"):
    return llmbench.make_unique(llmbench.Prompt("p", messages, 9), request_id)


def test_the_prefix_stands_at_the_head_of_the_first_user_message_after_the_system_prefix():
    messages = [{"role": "system", "content": "shared"}, {"role": "user", "content": "hi", "name": "ann"},
                {"role": "assistant", "content": "ho"}, {"role": "user", "content": "again"}]  # fmt: skip
    made = unique(messages)
    assert (made.id, made.max_tokens) == ("p", 9)
    assert made.messages[0] == messages[0] and made.messages[2:] == messages[2:]
    assert made.messages[1]["name"] == "ann"
    assert PREFIX.match(made.messages[1]["content"]) and made.messages[1]["content"].endswith("] hi")


def test_the_prefix_of_typed_parts_is_a_text_part_before_them():
    parts = [{"type": "image_url", "image_url": {"url": "u"}}, {"type": "text", "text": "what is it"}]
    head, *rest = unique([{"role": "user", "content": parts}]).messages[0]["content"]
    assert head["type"] == "text" and PREFIX.fullmatch(head["text"])
    assert rest == parts


def test_the_prompt_itself_stays_as_it_was():
    parts = [{"type": "text", "text": "x"}]
    prompt = llmbench.Prompt("p", [{"role": "system", "content": "s"}, {"role": "user", "content": parts}])
    before = json.dumps(prompt.messages)
    llmbench.make_unique(prompt, "run-0-1")
    assert json.dumps(prompt.messages) == before


def test_prefixes_differ_between_requests_runs_and_stages_and_repeat_for_the_same_request():
    ids = [f"{run}-{stage}-{i}" for run in ("aa", "bb") for stage in range(3) for i in range(1500)]
    prefixes = {unique([{"role": "user", "content": ""}], request_id).messages[0]["content"] for request_id in ids}
    assert len(prefixes) == len(ids)
    assert unique([{"role": "user", "content": "x"}]) == unique([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("messages", [
    [{"role": "system", "content": "only"}], [{"role": "assistant", "content": "x"}],
    [{"role": "user", "content": None}],
])  # fmt: skip
def test_conversations_without_a_user_text_do_not_break(messages):
    assert len(unique(messages).messages) == 1


def test_the_unique_prefix_leaves_the_later_turns_as_they_are():
    prompt = parse(json.dumps(DUMP))[0]
    made = llmbench.make_unique(prompt, "run-0-1")
    assert made.turns == prompt.turns and PREFIX.match(made.messages[0]["content"])


def test_a_unique_prefix_changes_the_messages_and_nothing_else():
    values = {field.name: f"{field.name}'s" for field in dataclasses.fields(llmbench.Prompt)}
    made = llmbench.make_unique(llmbench.Prompt(**{**values, "messages": [user("a")]}), "run-0-1")
    assert {**vars(made), "messages": None} == {**values, "messages": None} and made.messages != [user("a")]


def test_each_later_turn_carries_the_endpoints_own_answers_and_no_new_prefix():
    first = llmbench.make_unique(parse(json.dumps(DUMP))[0], "run-0-1")
    second = llmbench.next_turn(first, "uno")
    third = llmbench.next_turn(second, "due")
    answers = [{"role": "assistant", "content": text} for text in ("uno", "due")]
    assert second.messages == [*first.messages, answers[0], user("two")]
    assert third.messages == [*first.messages, answers[0], user("two"), answers[1], user("three")]
    assert (first.id, len(first.turns)) == (third.id, 2)
    assert llmbench.next_turn(third, "tre") is None
