"""Registry: providers that a file declares or that a file is, what is refused in one, and the examples to copy."""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import hmac
import itertools
import json
import random
import re
import subprocess
import tempfile
import time
import urllib.parse
from typing import Any, Callable, NamedTuple, Set

import pytest
from running import expected_status, run
from servers import CHUNKED, LAST_CHUNK, Peer, Request, Server, answer, chunk, event, measure, mock_server, streamed

import llmbench
from conftest import ROOT
from llmbench import (
    DECLARED,
    EXAMPLES,
    Config,
    Count,
    Frame,
    Place,
    Prompt,
    UserError,
    make_provider,
    parse_form,
    parse_url,
)

KEY, SECRET = "customer-7", "s3cr3t/of+the=customer"
MINIMAL = {"body": {"m": "${messages}"}, "text": "t"}
SAYS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
]


def written(tree: Any) -> bytes:
    return json.dumps(tree, ensure_ascii=False).encode()


def form_of(**keys: Any) -> llmbench.Form:
    return parse_form(written({**MINIMAL, **keys}), "gw.json")


def provider_of(form: llmbench.Form, **config: Any) -> llmbench.Provider:
    return llmbench.DeclaredProvider(form, Config(model="tiny", run_id="run", **config))


def decoder_of(**keys: Any) -> Any:
    provider = provider_of(form_of(**keys))
    decoder = provider.decoder()
    decoder.line = provider.events.LINE
    return decoder


def frames_of(*messages: Any, kind: str = "message", **keys: Any) -> list[Frame]:
    decoder = decoder_of(**keys)
    return [frame for message in messages for frame in decoder.frames((kind, written(message)))]


def texts_of(frames: list[Frame], kind: str = "content") -> list[str]:
    return [frame.text for frame in frames if frame.kind == kind]


# Paths.

TREE = {
    "a": {"b": [1, {"c": "x"}, {"c": "y", "k": True}]},
    "list": ["p", "q", 7],
    "0": "zero",
    "a.b": {"c[0]": "odd"},
    "parts": [{"text": "one"}, {"text": "two", "thought": True}, {"text": "three", "thought": False}, "bare"],
    "null": None,
    "码": "汉",
}


@pytest.mark.parametrize(
    "path,values",
    [
        ("a.b.0", [1]),
        ("a.b.1.c", ["x"]),
        ("a.b.-1.c", ["y"]),
        ("a.b.*.c", ["x", "y"]),
        ("a.b.9", []),
        ("a.b.-9", []),
        ("a.b.c", []),
        ("a.c.b", []),
        ("list.*", ["p", "q", 7]),
        ("0", ["zero"]),
        ('"a.b"."c[0]"', ["odd"]),
        ("null", [None]),
        ("parts[thought=true].text", ["two"]),
        ("parts[thought!=true].text", ["one", "three"]),
        ("码", ["汉"]),
        ("a.b[k=true].c", ["y"]),
        ("a.*.1.c", ["x"]),
        ("parts.0[text=one].text", ["one"]),
        ('parts[text="two"].thought', [True]),
        ("list[x=1]", []),
        ("a.b.0.c", []),
        ("a[b=1].c", []),
        ("*.b.0", [1]),
    ],
)
def test_where_a_path_leads(path, values):
    place = Place(path, "gw.json: text")
    assert place.values(TREE) == values
    assert place.value(TREE) == (values[0] if values else None)


@pytest.mark.parametrize(
    "path", ["", " ", ".a", "a.", "a..b", "a[b]", "a[", "a]b", 'a"b"', '"a', 7, None, ["a"], "a[=1]"]
)
def test_what_is_no_path(path):
    with pytest.raises(UserError, match=r"^gw.json: text") as refused:
        Place(path, "gw.json: text")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tree", [None, 7, "text", [], {}, [[]], {"a": "text"}, {"a": [None]}, {"a": {"b": 3}}])
def test_a_path_into_anything_else_leads_nowhere(tree):
    for path in ("a.b.c", "a.0.x", "*.*.*", "a[b=1].c", "-1.a"):
        assert Place(path, "").values(tree) == [] and Place(path, "").value(tree) is None


@pytest.mark.parametrize(
    "text,count",
    [
        ("u.a", 1),
        ("u.a + u.b", 3),
        ("u.a + u.none", 1),
        ("u.none", None),
        ("u.none + u.other", None),
        ("u.bad + u.b", 2),
        ("u.bad", None),
        ("u.each.*.n", 7),
        ("u.f", 5),
    ],
)
def test_a_count_may_be_a_sum(text, count):
    tree = {"u": {"a": 1, "b": 2, "bad": "many", "each": [{"n": 3}, {"n": 4}, {}], "f": 5.0}}
    assert Count(text, "").read(tree) == count


@pytest.mark.parametrize(
    "one,other,alike",
    [
        (0, "0", True),
        (200.0, "200", True),
        (True, "true", True),
        (True, 1, False),
        (None, "null", True),
        ("a", "A", False),
        (1.5, "1.5", True),
        ([], "", False),
    ],
)
def test_values_are_compared_as_they_are_written(one, other, alike):
    assert (llmbench.plainly(one) == llmbench.plainly(other)) is alike


# What is asked.


def asked(
    form: llmbench.Form, prompt: Prompt | None = None, url: str = "http://h", request_id: str = "r-1", **config: Any
) -> tuple[str, dict[str, str], Any]:
    provider = provider_of(form, **config)
    request = provider.request(prompt or Prompt("p", SAYS, 9), parse_url(url, provider), request_id, provider.dialect)
    return request.target, dict(request.headers), json.loads(request.body.decode())


@pytest.mark.parametrize(
    "template,filled",
    [
        ("${model}", "tiny"),
        ("${messages}", SAYS),
        ("${prompt}", "And now?"),
        ("${system}", "Be brief."),
        ("${max_tokens}", 9),
        ("a ${max_tokens} b", "a 9 b"),
        ("${stream}", True),
        ("is ${stream}", "is true"),
        ("${request_id}", "r-1"),
        ("$${model}", "${model}"),
        ("$ {model} $x", "$ {model} $x"),
        (7, 7),
        (None, None),
        ("${ model }", "tiny"),
        ("[${output_tokens}]", "[]"),
        ([1, "${model}", {"a": "${stream}"}], [1, "tiny", {"a": True}]),
        ("m: ${messages}", "m: " + json.dumps(SAYS, ensure_ascii=False)),
        ("${model}${model}", "tinytiny"),
        ("${transcript}", "Be brief.\n\nHi\n\nHello\n\nAnd now?"),
    ],
)
def test_what_a_template_becomes(template, filled):
    assert asked(form_of(body={"x": template, "y": 1}))[2] == {"x": filled, "y": 1}


def test_what_is_absent_is_left_out_with_what_holds_nothing_else():
    body = {
        "a": {"b": ["${output_tokens}"], "c": {}},
        "d": {"e": [{"f": "${output_tokens}"}]},
        "g": [],
        "h": None,
        "i": ["${output_tokens}", 1],
    }
    assert asked(form_of(body=body))[2] == {"a": {"c": {}}, "g": [], "h": None, "i": [1]}


def test_messages_take_another_form():
    each = {
        "$each": "messages",
        "as": {"Role": "${message.role}", "Text": "${message.text}", "Model": "${model}"},
        "roles": {"assistant": "model", "user": "human"},
        "skip": ["system"],
    }
    assert asked(form_of(body={"x": each}))[2]["x"] == [
        {"Role": "human", "Text": "Hi", "Model": "tiny"},
        {"Role": "model", "Text": "Hello", "Model": "tiny"},
        {"Role": "human", "Text": "And now?", "Model": "tiny"},
    ]
    kept = {"$each": "messages", "as": "${message.content}"}
    assert asked(form_of(body={"x": kept}))[2]["x"] == [message["content"] for message in SAYS]


def test_a_prompt_cannot_break_out_of_its_place():
    nasty = '"}], "model": "other", "x": "${secret}${env:HOME}'
    body = asked(
        form_of(body={"q": "say: ${prompt}", "m": "${messages}"}), Prompt("p", [{"role": "user", "content": nasty}])
    )[2]
    assert body == {"q": "say: " + nasty, "m": [{"role": "user", "content": nasty}]}


def test_path_and_headers_are_filled(monkeypatch):
    monkeypatch.setenv("TENANT", "t/1 ü")
    form = form_of(
        path="/v1/${model}/talk?tenant=${env:TENANT}&v=${option:version}",
        auth_options={"version": "2"},
        headers={
            "X-Tenant": "${env:TENANT}",
            "X-Id": "${request_id}",
            "Accept": "text/plain",
            "X-Limit": "${max_tokens}",
            "X-None": "${output_tokens}",
            "X-UUID": "${uuid}",
        },
    )
    target, headers, _ = asked(form)
    assert target == "/v1/tiny/talk?tenant=t%2F1%20%C3%BC&v=2"
    assert (headers["X-Tenant"], headers["X-Id"], headers["Accept"], headers["X-Limit"]) == (
        "t/1 ü",
        "r-1",
        "text/plain",
        "9",
    )
    assert "X-None" not in headers and re.match(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-8", headers["X-UUID"])
    assert asked(form, auth_opt={"version": "3"})[0].endswith("&v=3")
    assert asked(form, url="http://h/other?model=${model}")[0] == "/other?model=tiny"
    assert asked(form, url="http://h/prefix/v1")[0].startswith("/prefix/v1/tiny/talk?tenant=")
    assert asked(form)[1]["X-UUID"] == headers["X-UUID"] != asked(form, request_id="r-2")[1]["X-UUID"]
    monkeypatch.delenv("TENANT")
    with pytest.raises(UserError, match=r"^gw.json needs the environment variable TENANT"):
        asked(form)


def test_what_a_file_takes_from_the_environment_for_a_secret_field_is_masked(tmp_path, monkeypatch):
    values = {"GW_PASS": "p4ssw0rd-1", "PLAIN": "plain-words", "MY_TOKEN": "t0ken-value", "IN_BODY": "b0dy-value"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "gw.json"
    tree = {
        **MINIMAL,
        "path": "/talk?app_key=${env:GW_PASS}",
        "headers": {"X-Plain": "${env:PLAIN}", "X-Other": "${env:MY_TOKEN}"},
        "body": {"m": "${messages}", "login": {"api_key": "${env:IN_BODY}"}},
    }
    path.write_bytes(written(tree))
    config = Config(provider=str(path), model="tiny")
    provider = make_provider(config)
    endpoint = parse_url("http://h", provider)
    request = provider.request(Prompt("p", SAYS), endpoint, "r-1", provider.dialect)
    text = "%r echoes p4ssw0rd-1 t0ken-value b0dy-value plain-words" % (request,)
    shown = llmbench.redact(text, llmbench.secrets_of(config, endpoint))
    assert [value for value in values.values() if value in shown] == ["plain-words"]


def test_an_option_without_default_must_be_given():
    form = form_of(path="/${option:app}", auth_options={"app": None})
    assert asked(form, auth_opt={"app": "a1"})[0] == "/a1"
    with pytest.raises(UserError, match="--auth-opt app=VALUE"):
        asked(form)


def test_a_placeholder_in_the_url_must_be_known():
    with pytest.raises(UserError, match=r"--url: \$\{modle\} is not known \(did you mean model\?\)"):
        asked(form_of(), url="http://h/x/${modle}")


def test_no_stream_asks_for_a_whole_answer():
    form = form_of(
        path="/v1/${model}:stream",
        whole_path="/v1/${model}:whole",
        body={"stream": "${stream}", "stream_options": {"x": 1}, "p": {"a": 1, "b": 2}},
        whole_body={"stream_options": None, "p": {"b": 3}, "reply": "all"},
        optional=["stream_options"],
    )
    target, headers, body = asked(form, stream=False)
    assert (target, headers["Accept"]) == ("/v1/tiny:whole", "application/json")
    assert body == {"stream": False, "p": {"a": 1, "b": 3}, "reply": "all"}
    assert asked(form)[2] == {"stream": True, "stream_options": {"x": 1}, "p": {"a": 1, "b": 2}}


def test_fields_that_an_endpoint_may_refuse_are_given_up_one_after_the_other():
    form = form_of(
        body={"m": "${messages}", "opts": {"max_tokens": "${max_tokens}", "seed": 1}, "usage": True},
        optional=["opts.seed", "usage"],
        exact={"opts": {"min_tokens": "${output_tokens}", "ignore_eos": True}},
    )
    provider = provider_of(form, output_tokens=5)
    prompt, dialect = Prompt("p", SAYS[1:2]), provider.dialect
    assert provider.body(prompt, dialect)["opts"] == {"max_tokens": 5, "seed": 1, "min_tokens": 5, "ignore_eos": True}
    dialect = dialect.without("unknown field: min_tokens")
    assert provider.body(prompt, dialect)["opts"] == {"max_tokens": 5, "seed": 1, "ignore_eos": True}
    dialect = dialect.without("'seed' is not permitted")
    assert provider.body(prompt, dialect)["opts"] == {"max_tokens": 5, "ignore_eos": True}
    dialect = dialect.without("max_tokens is not supported, use max_completion_tokens")
    assert provider.body(prompt, dialect) == {
        "m": SAYS[1:2],
        "opts": {"max_completion_tokens": 5, "ignore_eos": True},
        "usage": True,
    }
    dialect = dialect.without("bad request")
    assert "usage" not in provider.body(prompt, dialect)
    dialect = dialect.without("bad request")
    assert provider.body(prompt, dialect)["opts"] == {"max_completion_tokens": 5}
    assert dialect.without("bad request") is None
    assert len(dialect.notes) == 5 and dialect.notes[1].startswith("the endpoint refuses opts.seed; ")


def test_a_spelling_that_a_provider_has_not_is_refused():
    with pytest.raises(UserError, match="--max-tokens-field"):
        provider_of(
            form_of(body={"options": {"num_predict": "${max_tokens}"}}), max_tokens_field="max_completion_tokens"
        )


# What comes back.


def test_the_first_path_with_text_wins_and_usage_precedes_the_end():
    keys = {
        "text": ["a.text", "b"],
        "reasoning": "r",
        "tool": "c.*.args",
        "finish": "stop",
        "usage": {"out_tokens": "n"},
    }
    assert frames_of(
        {"a": {"text": ""}, "b": "x", "r": "hm", "c": [{"args": "{"}, {"args": "}"}], "n": 3, "stop": "length"}, **keys
    ) == [
        Frame("reasoning", "hm"),
        Frame("content", "x"),
        Frame("tool", "{}"),
        Frame("usage", "", {"out_tokens": 3}),
        Frame("end", "length"),
    ]
    assert frames_of({"a": {"text": "y"}, "b": "x"}, **keys) == [Frame("content", "y")]
    assert frames_of({"a": None}, **keys) == [Frame("meta")]
    assert frames_of({"c": [{"args": {"city": "Jena"}}]}, **keys) == [Frame("tool", '{"city":"Jena"}')]


def test_kinds_of_events_come_from_json_or_from_the_stream():
    keys = {"event": "type", "text_events": ["say", "more"], "skip_events": ["ping"], "error": {"event": "bad"}}
    assert frames_of(
        {"type": "say", "t": "a"},
        {"type": "other", "t": "b"},
        {"type": "more", "t": "c"},
        {"t": "d"},
        {"type": "ping", "t": "e"},
        **keys,
    ) == [
        Frame("content", "a"),
        Frame("meta"),
        Frame("content", "c"),
        Frame("meta"),
        Frame("meta"),
    ]
    assert frames_of({"type": "bad", "message": "no"}, **keys) == [Frame("error", "bad: no")]
    del keys["event"]
    assert texts_of(frames_of({"t": "a"}, kind="say", **keys)) == ["a"]
    assert frames_of({"t": "a"}, **keys) == [Frame("meta")]
    assert decoder_of(**keys).frames(("ping", b"no JSON at all")) == []


@pytest.mark.parametrize(
    "rule,message,holds",
    [
        ({"path": "x", "exists": True}, {"x": 0}, True),
        ({"path": "x", "exists": True}, {"x": ""}, False),
        ({"path": "x", "exists": True}, {"x": {}}, False),
        ({"path": "x", "exists": True}, {}, False),
        ({"path": "x", "exists": False}, {"t": "a"}, True),
        ({"path": "x", "equals": True}, {"x": True}, True),
        ({"path": "x", "equals": True}, {"x": 1}, False),
        ({"path": "x", "equals": 0}, {"x": "0"}, True),
        ({"path": "x", "equals": 0}, {}, False),
        ({"path": "x", "not_equals": 0}, {"x": 1}, True),
        ({"path": "x", "not_equals": 0}, {}, False),
        ({"path": "x", "in": [1, "two"]}, {"x": "1"}, True),
        ({"path": "x", "in": [1, "two"]}, {"x": 3}, False),
        ({"path": "x", "not_in": [0, 200]}, {"x": 200}, False),
        ({"path": "x", "not_in": [0, 200]}, {"x": 500}, True),
        ({"path": "x", "not_in": [0, 200]}, {}, False),
        ({"event": "message", "path": "x", "equals": 1}, {"x": 1}, True),
        ({"event": "other", "path": "x", "equals": 1}, {"x": 1}, False),
    ],
)
def test_when_a_rule_holds(rule, message, holds):
    assert (frames_of(message, end=rule)[-1].kind == "end") is holds
    assert (frames_of(message, error=[rule])[-1].kind == "error") is holds


def test_what_an_end_is_called():
    assert frames_of({"done": True}, end={"path": "done", "equals": True}) == [Frame("end", "done")]
    assert frames_of({"done": True}, end={"path": "done", "equals": True}, finish="f") == [Frame("end")]
    assert frames_of({"x": 1}, kind="bye", end={"event": "bye"}) == [Frame("end", "bye")]
    decoder = decoder_of(end={"data": "[END]"})
    assert decoder.frames(("message", b" [END] ")) == [Frame("end", "[END]"), Frame("end")]
    assert decoder.frames(("message", b"[DONE]")) == [], "which is no JSON, and no end that was declared"
    assert decoder_of().frames(("message", b"[DONE]"))[-1] == Frame("end")


def test_finish_reasons():
    finish = {"path": ["f", "g"], "not_in": ["normal"], "failed": ["sensitive"]}
    for value, frames in (
        ("normal", ["meta"]),
        ("stop", ["end"]),
        ("sensitive", ["error"]),
        ("", ["meta"]),
        (None, ["meta"]),
        ("null", ["meta"]),
        (False, ["meta"]),
        (3, ["end"]),
    ):
        assert [frame.kind for frame in frames_of({"f": value}, finish=finish)] == frames
    assert frames_of({"g": "stop"}, finish=finish) == [Frame("end", "stop")]
    assert frames_of({"f": "network_error"}, finish="f") == [Frame("error", "finish reason network_error")]


@pytest.mark.parametrize(
    "message,said",
    [
        ({"code": 7, "info": {"why": "no   quota\nleft"}}, "7: no quota left"),
        ({"code": 7}, "7"),
        ({"code": "0"}, None),
        ({"code": 0, "t": "a"}, None),
        ({"info": {"why": "?"}}, None),
    ],
)
def test_what_an_error_says(message, said):
    keys = {"error": {"path": "code", "not_in": [0]}, "error_code": "code", "error_message": ["none", "info.why"]}
    frames = frames_of(message, **keys)
    assert texts_of(frames, "error") == ([] if said is None else [said])
    body = llmbench.describe_body(written(message), decoder_of(**keys).refusal)
    assert body.endswith(said or "") or said is None


def test_without_rules_of_its_own_every_known_error_is_one():
    for message in (
        {"error": {"message": "boom"}},
        {"error_code": 17, "error_msg": "boom"},
        {"type": "error", "message": "boom"},
        {"Response": {"Error": {"Message": "boom"}}},
    ):
        assert "boom" in texts_of(frames_of(message), "error")[0]
    assert frames_of({"error": {"message": "x"}, "t": "a"}, error=[]) == [Frame("content", "a")]


def test_usage_is_merged_as_declared():
    usage = {"in_tokens": "u.i", "out_tokens": ["u.o", "o"]}
    messages = [{"u": {"i": 9, "o": 1}}, {"u": {"o": 5}}, {"o": 3}, {"u": {"i": 0, "o": 0}}]
    merged = {
        way: [frame.usage for frame in frames_of(*messages, usage=usage, usage_merge=way) if frame.kind == "usage"]
        for way in ("last", "max", "sum")
    }
    assert [counts["out_tokens"] for counts in merged["last"]] == [1, 5, 3]
    assert [counts["out_tokens"] for counts in merged["max"]] == [1, 5, 5]
    assert [counts["out_tokens"] for counts in merged["sum"]] == [1, 6, 9]
    assert all(counts["in_tokens"] == 9 for counts in itertools.chain(*merged.values()))


# Delta and cumulative text.


def grown(pieces: list[str]) -> list[str]:
    return list(itertools.accumulate(pieces))


def heard(texts: list[str], mode: str, key: str = "t", **keys: Any) -> tuple[list[str], Any]:
    decoder = decoder_of(text_mode=mode, **keys)
    frames = [frame for text in texts for frame in decoder.frames(("message", written({key: text})))]
    return texts_of(frames, "content" if key == "t" else "reasoning"), decoder


PIECES = ["The", " quick", " brown", "\n", "fox", "", " ", "jumps", "跳", "🦊", "."]


@pytest.mark.parametrize("mode", ["cumulative", "auto"])
def test_of_a_whole_text_so_far_what_is_new_is_taken(mode):
    texts, decoder = heard(grown(PIECES), mode)
    assert "".join(texts) == "".join(PIECES) and len(texts) == len([piece for piece in PIECES if piece])
    assert decoder.rewrites == 0 and decoder.mode == "cumulative"


@pytest.mark.parametrize("cut", list(itertools.combinations(range(1, 12), 2)), ids=str)
@pytest.mark.parametrize("mode", ["delta", "cumulative", "auto"])
def test_every_way_to_cut_a_text(mode, cut):
    text = "one, two 🦊." if mode == "auto" else "aaab aaab 🦊."  # three texts that grow could be either
    pieces = [text[: cut[0]], text[cut[0] : cut[1]], text[cut[1] :]]
    texts, _ = heard(grown(pieces) if mode == "cumulative" else pieces, mode)
    assert sorted("".join(texts)) == sorted(text)


def test_auto_finds_deltas_out_and_gives_what_it_had_left_out():
    texts, decoder = heard(["ha", "ha", "ha!", " so"], "auto")
    assert ("".join(sorted("".join(texts))), decoder.mode) == ("".join(sorted("hahaha! so")), "delta")
    texts, decoder = heard(["a", "b"], "auto")
    assert (texts, decoder.mode) == (["a", "b"], "delta")
    texts, decoder = heard(["a", "ab", "abc", "abcd", "xy"], "auto")
    assert (texts, decoder.mode, decoder.rewrites) == (["a", "b", "c", "d", "xy"], "cumulative", 1)


def test_a_rewrite_gives_what_follows_the_common_beginning_and_is_counted():
    texts, decoder = heard(["The quick", "The quack", "The quack!", "The quack", ""], "cumulative")
    assert (texts, decoder.rewrites) == (["The quick", "ack", "!"], 1)


def test_reasoning_and_text_grow_apart():
    keys = {"reasoning": "r", "text_mode": "cumulative"}
    frames = frames_of({"r": "h"}, {"r": "hm"}, {"r": "hm", "t": "a"}, {"r": "hm", "t": "ab"}, **keys)
    assert (texts_of(frames, "reasoning"), texts_of(frames)) == (["h", "m"], ["a", "b"])
    keys["text_mode"] = "auto"
    frames = frames_of({"r": "no"}, {"r": "no"}, {"r": "yes"}, {"t": "a"}, {"t": "ab"}, **keys)
    assert (texts_of(frames, "reasoning"), texts_of(frames)) == (["no", "noyes"], ["a", "ab"])


def test_an_event_of_another_kind_that_repeats_everything_is_no_text():
    keys = {"event": "e", "text_events": ["delta", "final"]}
    stream = [{"e": "delta", "t": text} for text in "abcd"] + [{"e": "final", "t": "abcd"}]
    decoder = decoder_of(**keys)
    said = []
    for message in stream:
        text = decoder.plain(written(message))
        if text:
            decoder.note_texts([text])
        frames = [Frame("content", text.decode())] if text else decoder.frames(("message", written(message)))
        said += texts_of(frames)
    assert said == ["a", "b", "c", "d"]
    assert texts_of(frames_of({"e": "delta", "t": "ab"}, {"e": "final", "t": "c"}, **keys)) == ["ab", "c"]


# The fast reading is the full one.

SHAPES = [
    ({"text": "result.piece"}, lambda text, n: {"code": 0, "result": {"piece": text}}),
    ({"text": ["x.y", "a.*.b"]}, lambda text, n: {"a": [{"b": text, "c": None}], "done": False}),
    ({"text": "正文"}, lambda text, n: {"正文": text, "序": 1}),
    ({"text": "p[k!=true].text", "reasoning": "p[k=true].text"}, lambda text, n: {"p": [{"text": text}], "i": 0}),
    ({"text": "t", "event": "e", "text_events": ["m"]}, lambda text, n: {"e": "m", "t": text}),
    ({"text": "t", "text_mode": "auto"}, lambda text, n: {"t": text}),
    ({"text": "t", "usage": {"out_tokens": "n"}}, lambda text, n: {"t": text, "n": n + 1}),
    ({"text": "t", "end": {"path": "t", "equals": "<END>"}}, lambda text, n: {"t": text}),
    ({"text": "t", "error": {"path": "t", "in": ["oops", "."]}}, lambda text, n: {"t": text}),
    ({"text": "t", "finish": {"path": "t", "not_in": ["a"]}}, lambda text, n: {"t": text}),
    ({"text": "d[t!=.].t"}, lambda text, n: {"d": [{"t": text}]}),
    ({"text": "code", "usage": {"out_tokens": "z"}}, lambda text, n: {"code": text, "message": "m"}),
]
WORDS = [
    "a",
    "b",
    ".",
    "oops",
    "<END>",
    "it's",
    "\\",
    '"',
    "\n",
    "é",
    "🦊",
    "",
    "data: ",
    '{"t":"x"}',
    "x" * 50,
    "null",
]


def read_fast(decoder: Any, events: list[tuple[str, bytes]]) -> list[Frame]:
    """As Exchange does: `plain` where it will, else the full reading."""
    frames = []
    for kind, data in events:
        text = decoder.plain(data)
        if text and kind == decoder.kind:
            decoder.note_texts([text])
            frames.append(Frame("content", text.decode("utf-8", "replace")))
        else:
            frames += decoder.frames((kind, data))
            for frame in frames[-1:]:
                decoder.note_text(frame.text)
    return frames


def read_slowly(decoder: Any, events: list[tuple[str, bytes]]) -> list[Frame]:
    return [frame for event in events for frame in decoder.frames(event)]


@pytest.mark.parametrize("number", range(len(SHAPES)))
@pytest.mark.parametrize("kind", ["message", "result"])
def test_the_fast_reading_is_the_full_one(number, kind):
    keys, make = SHAPES[number]
    chance, hits = random.Random(number), 0
    for _ in range(30):
        words = [chance.choice(WORDS) for _ in range(40)]
        events = [(kind, written(make(word, place))) for place, word in enumerate(words)]
        events += [
            (kind, bytes(data[: chance.randrange(len(data))]) + data[chance.randrange(len(data)) :])
            for _, data in events[:5]
        ]
        fast, slow = decoder_of(**keys), decoder_of(**keys)
        for one in events:
            outcomes = []
            for decoder, read in ((fast, read_fast), (slow, read_slowly)):
                try:
                    outcomes.append(read(decoder, [one]))
                except llmbench.ParseError as error:
                    outcomes.append(str(error))
            assert outcomes[0] == outcomes[1], one
        hits += fast._hits
        assert slow._hits == 0
    looks_at_it = number in (7, 8, 9, 10, 11)
    assert (hits == 0) is (looks_at_it or number == 6), "it is taken where it may be, and nowhere else"


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("framing", ["sse", "ndjson"])
def test_a_run_of_declared_events_is_what_the_full_reading_finds(number, framing):
    keys, make = SHAPES[number]
    provider = provider_of(form_of(framing=framing, **keys))
    decoder, parser = provider.decoder(), provider.events()
    decoder.line = parser.LINE
    head, tail = parser.LINE
    for word in ("one", "two", "three"):
        decoder.frames(("message", written(make(word, 0))))
    wire = b"".join(head + written(make(word, 0)) + tail for word in ("four", "five", "sïx"))
    texts, rest = decoder.run(wire)
    assert ([text.decode() for text in texts], rest) == (["four", "five", "sïx"], b"")
    assert decoder.run(head + written({"other": 1}) + tail)[0] == []


# What is refused in a file, in one line that names file and key.

WRONG: list[tuple[Any, str]] = [
    (b"", "gw.json is not JSON"),
    (b"{", "gw.json is not JSON"),
    (b"[]", "must hold a JSON object"),
    (b"\xff", "not UTF-8"),
    (b'{"text": "a", "text": "b"}', "'text' is given twice"),
    (b'{%s,"k9":0}' % b",".join(b'"k%d":0' % number for number in range(20000)), "'k9' is given twice"),
    (b"[" * 100000, "nested too deeply|not JSON"),
    ({}, "text is needed|body is needed"),
    ({"body": {}}, "text is needed"),
    ({"text": "t"}, "body is needed"),
    ({"txet": "t"}, r"unknown key 'txet' \(did you mean text\?\)"),
    ({"bdoy": {}}, "did you mean body"),
    ({"text": 7}, "text must be"),
    ({"text": ["a", 7]}, "text must be"),
    ({"text": "a..b"}, "text: the path 'a..b'"),
    ({"text": [{"event": "e"}]}, "text.path must be a path"),
    ({"text": [{"evnet": "e", "path": "a"}]}, "did you mean event"),
    ({"body": []}, "body must be an object"),
    ({"body": {"a": {"b": "${modle}"}}}, r"body.a.b: \$\{modle\} .*did you mean model"),
    ({"body": {"a": "${secret}"}}, "a secret can stand in sign alone"),
    ({"body": {"a": "${token}"}}, "headers and path alone"),
    ({"body": {"a": "${model"}}, "without its }"),
    ({"body": {"a": "${message.role}"}}, r'inside "\$each" alone'),
    ({"body": {"a": {"$each": "message", "as": 1}}}, r'needs "\$each": "messages"'),
    ({"body": {"a": {"$each": "messages", "as": 1, "role": {}}}}, r"a: unknown key 'role' \(did you mean roles"),
    ({"body": {"a": {"$each": "messages", "as": 1, "skip": "system"}}}, "skip must be a list"),
    ({"body": {"a": {"$each": "messages", "as": 1, "roles": {"a": 1}}}}, "roles must be an object"),
    ({"body": {"a": "${env:}"}}, "not known"),
    ({"path": "v1/talk"}, "path must be a path that begins with /"),
    ({"path": "/a b"}, "path must be"),
    ({"path": "/${modle}"}, "path: .*did you mean model"),
    ({"whole_path": 7}, "whole_path"),
    ({"headers": {"A B": "x"}}, "no name that a header can have"),
    ({"headers": {"A": "x\ny"}}, "headers.A must be a text of one"),
    ({"headers": {"A": 7}}, "headers.A must be"),
    ({"headers": {"A": "${sig}"}}, r"headers.A: \$\{sig\} is not known"),
    ({"name": "a b"}, "name must be"),
    ({"name": 7}, "name must be a text"),
    ({"untested": "yes"}, "true or false"),
    ({"framing": "ssee"}, r"framing must be one of sse, ndjson, json \(did you mean sse"),
    ({"text_mode": 1}, "text_mode must be"),
    ({"usage_merge": "least"}, "usage_merge must be one of"),
    ({"usage": {"out": "a"}}, r"usage: unknown key 'out'"),
    ({"usage": {"out_tokens": "a + "}}, "usage.out_tokens"),
    ({"usage": {"out_tokens": [7]}}, "usage.out_tokens must be"),
    ({"event": "a..b"}, "event: the path"),
    ({"skip_events": [1]}, "skip_events must be"),
    ({"text_events": {}}, "text_events"),
    ({"whole": {"txt": "a"}}, r"whole: unknown key 'txt' \(did you mean text"),
    ({"whole": []}, "whole must be an object"),
    ({"finish": {"path": "a", "fialed": []}}, "did you mean failed"),
    ({"finish": {"not_in": []}}, "finish.path must be"),
    ({"finish": 3}, "finish must be"),
    ({"finish": {"path": "a", "failed": 3}}, "finish.failed must be"),
    ({"end": "x"}, "end must be a list of rules"),
    ({"end": [{}]}, "end.0 must be an object"),
    ({"end": ["x"]}, "end.0 must be"),
    ({"end": {"path": "a"}}, "a path goes with one of exists"),
    ({"end": {"equals": 1}}, "a path goes with"),
    ({"end": {"path": "a", "equals": 1, "in": []}}, "a path goes with one of"),
    ({"end": {"data": "x", "event": "y"}}, "stands alone"),
    ({"end": {"path": "a", "euqals": 1}}, "did you mean equals"),
    ({"end": {"event": ""}}, "end.0.event must be a text"),
    ({"end": {"path": "a", "exists": 1}}, "exists must be true or false"),
    ({"end": {"path": "a", "in": 1}}, "in must be a list"),
    ({"error": {"data": "x"}}, "unknown key 'data'"),
    ({"end_required": 1}, "end_required must be"),
    ({"optional": "x"}, "no field x"),
    ({"optional": ["m.x"]}, "the body has no field m.x"),
    ({"models": {"pth": "/x"}}, "did you mean path"),
    ({"models": "/x"}, "models"),
    ({"models": {"path": "x"}}, "models.path must be"),
    ({"exact": []}, "exact must be an object"),
    ({"auth_options": {"a": 1}}, "auth_options.a must be"),
    ({"text": "a[ =b]"}, "is no condition"),
    ({"text": "a[" + " " * 20000 + "]"}, "is no condition"),
    ({"sign": {}}, "sign must be a list"),
    ({"error_code": 1}, "error_code"),
    ({"sign": [{"set": "a", "to": "md6(body)"}]}, "there is no function md6"),
    ({"error_message": "a..b"}, "error_message: the path"),
]


@pytest.mark.parametrize("tree,said", WRONG, ids=[str(row[0])[:50] for row in WRONG])
def test_a_wrong_form_is_one_line_that_names_file_and_key(tree, said):
    whole = tree in ({}, {"body": {}}, {"text": "t"}) or isinstance(tree, bytes)
    data = tree if isinstance(tree, bytes) else written(tree if whole else {**MINIMAL, **tree})
    with pytest.raises(UserError) as refused:
        parse_form(data, "gw.json")
    text = str(refused.value)
    assert re.search(said, text) and text.startswith("gw.json") and "\n" not in text and len(text) < 700


def mutated_tree(tree: Any, chance: random.Random) -> Any:
    """The tree with something in it gone, renamed, doubled or of another kind."""
    tree = copy.deepcopy(tree)
    node, found = tree, []
    waiting = [tree]
    for node in waiting:
        children = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        found += [(node, key) for key, _ in children]
        waiting += [value for _, value in children if isinstance(value, (dict, list))]
    node, key = chance.choice(found)
    change = chance.randrange(4)
    if change == 0:
        del node[key]
    elif change == 1 and isinstance(node, dict):
        node[str(key)[:-1] + "x"] = node.pop(key)
    elif change == 2:
        node[key] = chance.choice(
            [None, True, 0, -1, 1.5, "", "x", "${model}", "${nobody}", "a.b.*", "[", [], {}, ["x"], {"a": 1}]
        )
    elif isinstance(node[key], str) and node[key]:
        text = node[key]
        place = chance.randrange(len(text))
        node[key] = (
            text[:place] + chance.choice(["", ".", "*", "${", "}", "[", "]", '"', "\n", "é"]) + text[place + 1 :]
        )
    return tree


ALL = [*DECLARED, *EXAMPLES]


@pytest.mark.parametrize("name", ALL)
def test_a_mutated_file_is_read_or_refused_in_one_line(name):
    source, chance = json.loads(llmbench.builtin_source(name)), random.Random(name)
    provider_answers = [
        b'{"choices":[{"delta":{"content":"a"}}]}',
        b"[]",
        b"7",
        b'{"error":{"message":"x"}}',
        b'{"x":{"y":[1]}}',
    ]
    refused = 0
    for _ in range(150):
        try:
            form = parse_form(written(mutated_tree(source, chance)), "gw.json")
        except UserError as error:
            refused += 1
            assert str(error).startswith("gw.json") and "\n" not in str(error)
            continue
        decoder = llmbench.DeclaredDecoder(form.reading)
        for data in provider_answers:
            with contextlib.suppress(llmbench.ParseError):
                assert all(isinstance(frame, Frame) for frame in decoder.frames(("message", data)))
                decoder.whole(json.loads(data))
    assert 20 < refused < 150


# One registry.


def test_the_table_lists_the_files():
    places = {
        place: {path.stem for path in (ROOT / "assets" / "providers" / place).glob("*.json")}
        for place in ("", "examples")
    }
    assert places == {"": set(DECLARED), "examples": set(EXAMPLES)} and len(EXAMPLES) == 10
    assert all(llmbench.builtin_form(name).name == name for name in ALL)
    assert all(len(llmbench.builtin_form(name).summary) > 10 for name in ALL)


def test_a_name_that_is_not_known_and_a_file_that_is_not_there():
    with pytest.raises(UserError, match=r"did you mean gemini\?"):
        make_provider(Config(provider="gemni"))
    with pytest.raises(UserError, match=r"nowhere.json can't be read: No such file"):
        make_provider(Config(provider="nowhere.json"))
    with pytest.raises(UserError, match=r"nowhere.py can't be read"):
        make_provider(Config(provider="nowhere.py"))


def test_what_providers_prints(programs):
    def printed(*words: str) -> str:
        done = subprocess.run(
            [*programs, "providers", *words], capture_output=True, text=True, encoding="utf-8", cwd="/"
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    for name in ("dify", "example-signed-headers"):
        assert json.loads(printed(name, "--json")) == json.loads(llmbench.builtin_source(name))
    shown = printed("gemini")
    for text in (
        "/v1beta/models/${model}:streamGenerateContent",
        "api-key",
        "candidates.0.finishReason",
        "not been tried",
    ):
        assert text in shown
    assert "declared by          code" in printed("openai")


@pytest.mark.parametrize(
    "words,said",
    [
        (["openai", "--json"], "provider openai is code"),
        (["--json"], "needs the NAME"),
        (["opnai"], "did you mean openai"),
        (["gone.json"], "can't be read"),
    ],
)
def test_what_providers_refuses(capsys, words, said):
    assert llmbench.main(["providers", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words,said",
    [
        (["--provider", "custom"], "--provider custom needs --provider-file"),
        (["--provider", "openai", "--provider-file", "x.json"], "--provider-file goes with --provider custom"),
        (["--provider-file", "x.toml"], "ends in .json or .py"),
        (["--provider-file", "x.json"], "x.json can't be read"),
        (["--no-stream", "--ttft-timeout", "3s"], "--ttft-timeout needs a stream"),
        (["--no-stream", "--record-chunks"], "--record-chunks needs a stream"),
        (["--no-stream", "--slo", "tpot.p50<9ms"], "--slo tpot.p50<9ms needs a stream"),
    ],
)
def test_flags_of_providers_that_go_with_nothing(capsys, words, said):
    assert llmbench.main(["run", "--url", "mock:", "--model", "m", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_hosts_may_keep_the_file_in_different_places(tmp_path):
    ids = []
    for place, text in (("a", MINIMAL), ("b", MINIMAL), ("c", {**MINIMAL, "text": "u"})):
        (tmp_path / place).mkdir()
        path = tmp_path / place / "gw.json"
        path.write_bytes(written(text))
        config = Config(provider=str(path), provider_file=str(path), start_at="2999-01-01T00:00:00.000000Z")
        ids.append(llmbench.shared_run_id(config))
    assert ids[0] == ids[1] != ids[2]


# A provider with code.


def test_the_readmes_provider_with_code_runs(tmp_path, programs):
    code = re.search(
        r"```python\n(# my_gateway\.py\n.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    ).group(1)
    path = tmp_path / "my_gateway.py"
    path.write_text(code)

    def behave(peer: Peer, request: Request) -> None:
        body = request.fields
        assert (request.path, body["stream"], body["model"]) == ("/talk", True, "tiny")
        assert body["question"] and request.headers["x-app"] == "loadtest"
        lines = [{"word": "Hel"}, {"word": "lo"}, {"bye": True, "words": 2}]
        peer.send(streamed(*(b"data: " + written(line) + b"\n\n" for line in lines)))

    with Server(behave) as server:
        made = run(
            tmp_path / "out",
            "--url",
            server.url,
            "--provider",
            str(path),
            "--total-requests",
            "4",
            "--processes",
            "2",
            "--concurrency",
            "2",
            program=programs,
        )
    assert server.complaints == []
    assert [
        (record["status"], record["provider"], record["out_tokens"], record["out_chars"]) for record in made.records
    ] == [("ok", "my-gateway", 2, 5)] * 4
    assert made.summary["provider"] == "my-gateway" and made.status == expected_status(made.summary)


@pytest.mark.parametrize(
    "code,said",
    [
        ("x = 1\n", "must define one subclass of llmbench.Provider; it has 0"),
        ("import llmbench\nclass A(llmbench.Provider): pass\nclass B(llmbench.Provider): pass\n", "it has 2"),
        ("\n\nthis is no code\n", "line 3: SyntaxError"),
        ("import llmbench\n\nllmbench.nothing\n", "line 3: AttributeError"),
        ("raise ValueError('two\\nlines')\n", "line 1: ValueError: two lines"),
        ("import nowhere_to_be_found\n", "ModuleNotFoundError"),
    ],
)
def test_code_that_is_no_provider_is_one_line(tmp_path, code, said):
    path = tmp_path / "gw.py"
    path.write_text(code)
    with pytest.raises(UserError) as refused:
        make_provider(Config(provider=str(path)))
    assert said in str(refused.value) and "\n" not in str(refused.value) and "gw.py" in str(refused.value)


def test_code_sees_the_running_program_and_may_build_on_its_own_classes(tmp_path):
    path = tmp_path / "gw.py"
    path.write_text(
        "import llmbench\nclass Base(llmbench.Provider):\n    name = 'base'\n"
        "class Mine(Base):\n    name = 'mine'\n    version = llmbench.__version__\n"
    )
    provider = make_provider(Config(provider=str(path)))
    assert (provider.name, provider.version) == ("mine", llmbench.__version__) and isinstance(
        provider, llmbench.Provider
    )


# --no-stream.


def test_whole_answers_that_were_asked_for_are_no_fault(tmp_path):
    with mock_server("--ttft", "5", "--itl", "1", "--tokens", "8") as url:
        made = run(tmp_path / "out", "--url", url, "--no-stream", "--total-requests", "6")
    assert made.status == expected_status(made.summary)
    for record in made.records:
        assert (record["status"], record["out_tokens"]) == ("ok", 8) and record["latency_ms"] > 5
        assert {"ttft_ms", "ttfe_ms", "tpot_ms", "decode_ms", "itl_hist", "streamed"}.isdisjoint(record)
    summary = made.summary
    assert "ttft_ms" not in summary and summary["latency_ms"]["n"] == 6 and summary["tokens"]["out"] == 48
    keys = {reason["key"] for reason in summary["verdict"]["reasons"]}
    assert keys.isdisjoint({"not_streamed", "several_tokens", "buffered", "no_finish", "usage_missing"})
    assert summary["config"]["stream"] is False


def test_an_endpoint_that_streams_all_the_same_is_read():
    stream = streamed(event("Hel"), event("lo"), event(finish="stop"), b"data: [DONE]\n\n")
    with Server(lambda peer, _: peer.send(stream)) as server:
        [record] = measure(server.url, total_requests=1, stream=False).records
    assert (record["status"], record["out_chars"]) == ("ok", 5) and "ttft_ms" in record


def test_of_a_whole_answer_that_is_cut_off_nothing_is_made():
    cut = answer(200, {"choices": [{"message": {"content": "Hello"}}]})[:-9]

    def behave(peer: Peer, _: Request) -> None:
        peer.send(cut)
        peer.close()

    with Server(behave) as server:
        [record] = measure(server.url, total_requests=1, stream=False).records
    assert record["status"] == "truncated"


def test_a_field_that_a_declared_endpoint_refuses_is_negotiated(tmp_path):
    def behave(peer: Peer, request: Request) -> None:
        if "minTokens" in request.fields["params"]:
            peer.send(answer(400, {"errorCode": "E1", "errorMsg": "unknown field minTokens"}))
        else:
            jwt_gateway(peer, request)

    with Server(behave) as server:
        made = run(
            tmp_path / "out",
            "--url",
            server.url,
            "--provider",
            "example-signed-body-jwt",
            "--auth-key",
            KEY,
            "--auth-secret",
            SECRET,
            "--total-requests",
            "4",
        )
    assert server.complaints == []
    assert [(record["phase"], record["status"]) for record in made.records].count(("measure", "ok")) == 4
    assert [record["phase"] for record in made.records].count("probe") == 1
    assert made.end["dialect"] == ["the endpoint refuses params.minTokens; it is asked without"]
    assert "the endpoint refuses params.minTokens" in made.stdout


# The examples, each before a gateway that checks on its own side what it asks for.


class Refused(Exception):
    """What a gateway says no to."""


def demand(condition: Any, what: str) -> None:
    if not condition:
        raise Refused(what)


def hex_mac(text: str) -> str:
    return hmac.new(SECRET.encode(), text.encode(), hashlib.sha256).hexdigest()


def b64_mac(text: str) -> str:
    return base64.b64encode(hmac.new(SECRET.encode(), text.encode(), hashlib.sha256).digest()).decode()


def near(seconds: float) -> None:
    demand(abs(time.time() - seconds) < 60, "the time is off")


def sse(*messages: Any, name: str = "") -> list[bytes]:
    head = b"event: " + name.encode() + b"\n" if name else b""
    return [
        head + b"data: " + (message if isinstance(message, bytes) else written(message)) + b"\n\n"
        for message in messages
    ]


def sends(events: list[bytes], cut: bool = False) -> Callable[[Peer], None]:
    """Event by event, a chunk each; `cut`: without the last event, and without an end of the body."""

    def send(peer: Peer) -> None:
        peer.send(CHUNKED)
        for data in events[: len(events) - cut]:
            peer.send(chunk(data))
        peer.send(LAST_CHUNK)

    return send


def openai_like(wrap: Callable[[Any], Any] = lambda message: message) -> list[bytes]:
    messages = [{"choices": [{"delta": {"content": text}}]} for text in ("Hel", "lo")]
    messages.append(
        {"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    )
    return [*sse(*map(wrap, messages)), *sse(b"[DONE]")]


class Example(NamedTuple):
    """An example's gateway: what it checks, its stream, its whole answer, its errors in a stream and before it."""

    check: Callable[[Request], None]
    stream: list[bytes]
    whole: Any
    error: list[bytes]
    said: str
    flags: dict[str, Any]
    refusal: Any = {"code": 40101, "message": "who are you"}
    refused: str = "who are you"
    tokens: tuple[Any, ...] = (3, 2)
    ended: bool = True  # its stream has an end of its own


SIGNED = {"auth_secret": SECRET}
BOTH = {"auth_key": KEY, "auth_secret": SECRET}
BEARER = {"token": "tok-123456"}


class Once(Set[str]):
    """What must come once."""

    def take(self, text: str) -> None:
        demand(len(text) >= 16 and text not in self, "a nonce again")
        self.add(text)


nonces = Once()


def check_signed_headers(request: Request) -> None:
    near(float(request.headers["x-timestamp"]))
    nonces.take(request.headers["x-nonce"])
    text = (
        request.headers["x-timestamp"]
        + "\n"
        + request.headers["x-nonce"]
        + "\n"
        + hashlib.sha256(request.raw).hexdigest()
    )
    demand(request.headers["x-signature"] == hex_mac(text), "the signature")
    demand(request.path == "/v1/talk" and request.fields["messages"], "the request")


def check_sorted_query(request: Request) -> None:
    path, _, query = request.path.partition("?")
    asked = dict(urllib.parse.parse_qsl(query))
    near(float(asked["ts"]))
    nonces.take(asked["nonce"])
    sign = asked.pop("sign")
    text = "&".join(f"{name}={value}" for name, value in sorted(asked.items())) + request.raw.decode() + SECRET
    demand(sign == hashlib.md5(text.encode()).hexdigest().upper(), "the sign")
    demand((path, asked["appid"]) == ("/gateway/chat", KEY), "the request")


def unpadded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def check_jwt(request: Request) -> None:
    demand(request.headers["authorization"].startswith("Bearer "), "no token")
    head, claims, signature = request.headers["authorization"][7:].split(".")
    demand(
        signature == unpadded(hmac.new(SECRET.encode(), f"{head}.{claims}".encode(), hashlib.sha256).digest()),
        "the token",
    )
    told = json.loads(base64.urlsafe_b64decode(claims + "=="))
    near(told["iat"])
    nonces.take(told["jti"])
    demand((told["iss"], told["body"]) == (KEY, hashlib.sha256(request.raw).hexdigest()), "the claims")
    demand(
        request.fields["modelName"] == "tiny" and isinstance(request.fields["params"]["maxTokens"], int), "the request"
    )


def jwt_gateway(peer: Peer, request: Request) -> None:
    check_jwt(request)  # complains in the server's list
    sends(TELLS["example-signed-body-jwt"].stream)(peer)


def check_kong(request: Request) -> None:
    near(time.mktime(time.strptime(request.headers["date"], "%a, %d %b %Y %H:%M:%S GMT")) - time.timezone)
    digest = "SHA-256=" + base64.b64encode(hashlib.sha256(request.raw).digest()).decode()
    demand(request.headers["digest"] == digest, "the digest")
    line = "POST " + request.path + " HTTP/1.1"
    text = "date: " + request.headers["date"] + "\n" + line + "\ndigest: " + digest
    signed = 'algorithm="hmac-sha256", headers="date request-line digest"'
    wanted = f'hmac username="{KEY}", {signed}, signature="{b64_mac(text)}"'
    demand(request.headers["authorization"] == wanted, "the authorization")


def check_api_gateway(request: Request) -> None:
    head = request.headers
    near(float(head["x-ca-timestamp"]) / 1000)
    nonces.take(head["x-ca-nonce"])
    demand(head["content-md5"] == base64.b64encode(hashlib.md5(request.raw).digest()).decode(), "the MD5")
    names = "".join(f"{name}:{head[name]}\n" for name in ("x-ca-key", "x-ca-nonce", "x-ca-timestamp"))
    text = f"POST\n{head['accept']}\n{head['content-md5']}\n{head['content-type']}\n\n{names}{request.path}"
    demand(head["x-ca-signature"] == b64_mac(text), "the signature")
    demand((head["x-ca-key"], request.path) == (KEY, "/prod/chat?stage=RELEASE"), "the request")


def check_token_first(request: Request) -> None:
    demand(request.headers.get("authorization") == "Bearer fetched-token-1", "the token")
    demand(request.path == "/llm/v1/chat/completions", "the path")


def check_key_in_query(request: Request) -> None:
    demand(request.path == "/chat/completions?ak=tok-123456&app=loadtest", "the key")
    demand("authorization" not in request.headers and request.fields["question"], "the request")


def check_whole_text(request: Request) -> None:
    demand(request.headers["x-api-token"] == "tok-123456", "the token")
    demand([line["speaker"] for line in request.fields["dialogue"]] == ["human"], "the dialogue")


def check_plain_json(request: Request) -> None:
    demand(
        request.headers["authorization"] == "Basic " + base64.b64encode(f"{KEY}:{SECRET}".encode()).decode(), "the user"
    )
    demand(len(request.fields["requestId"]) == 36 and request.fields["payload"]["history"], "the request")


def check_agent(request: Request) -> None:
    demand((request.path, request.headers["x-tenant"]) == ("/agents/tiny/runs", "t-9"), "the tenant")
    demand(request.headers["authorization"] == "Bearer tok-123456", "the token")
    demand(request.fields["input"][0]["parts"][0]["kind"] == "text", "the parts")


def line(message: Any) -> bytes:
    return written(message) + b"\n"


CHOICE = {
    "choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2},
}
OPENAI_ERROR = sse({"error": {"message": "boom"}})
SORTED = {"errno": 0, "data": CHOICE}
TELLS = {
    "example-signed-headers": Example(
        check_signed_headers,
        sse(
            {"code": 0, "result": {"piece": "Hel"}},
            {"code": 0, "result": {"piece": "lo"}, "usage": {"input": 3, "output": 2}},
            {"finished": True},
        ),
        {"code": 0, "result": {"piece": "Hello"}, "usage": {"input": 3, "output": 2}, "finished": True},
        sse({"code": 0, "result": {"piece": "Hel"}}, {"code": 51, "message": "boom"}),
        "51: boom",
        SIGNED,
    ),
    "example-sorted-query": Example(
        check_sorted_query,
        openai_like(lambda message: {"errno": 0, "data": message}),
        SORTED,
        sse({"errno": 9, "errmsg": "boom"}),
        "9: boom",
        BOTH,
        {"errno": 4, "errmsg": "who are you"},
        "4: who are you",
    ),
    "example-signed-body-jwt": Example(
        check_jwt,
        sse(
            *({"success": True, "data": {"delta": text, "status": "RUNNING"}} for text in ("Hel", "lo")),
            {"success": True, "data": {"status": "FINISHED", "usage": {"promptTokens": 3, "completionTokens": 2}}},
        ),
        {
            "success": True,
            "data": {"text": "Hello", "status": "FINISHED", "usage": {"promptTokens": 3, "completionTokens": 2}},
        },
        sse({"success": False, "errorCode": "B9", "errorMsg": "boom"}),
        "B9: boom",
        BOTH,
        {"success": False, "errorCode": "A1", "errorMsg": "who are you"},
        "A1: who are you",
    ),
    "example-kong-hmac": Example(check_kong, openai_like(), CHOICE, OPENAI_ERROR, "boom", BOTH),
    "example-api-gateway": Example(check_api_gateway, openai_like(), CHOICE, OPENAI_ERROR, "boom", BOTH),
    "example-token-first": Example(check_token_first, openai_like(), CHOICE, OPENAI_ERROR, "boom", BOTH),
    "example-key-in-query": Example(
        check_key_in_query,
        [
            *map(
                line,
                (
                    {"type": "heartbeat"},
                    {"type": "delta", "content": "Hel"},
                    {"type": "delta", "content": "lo"},
                    {"type": "cost", "tokens": {"in": 3, "out": 2}},
                    {"type": "done", "reason": "length"},
                ),
            )
        ],
        {"type": "answer", "content": "Hello", "reason": "length", "tokens": {"in": 3, "out": 2}},
        [line({"type": "delta", "content": "H"}), line({"type": "failed", "message": "boom"})],
        "failed: boom",
        BEARER,
    ),
    "example-whole-text": Example(
        check_whole_text,
        [
            *sse({}, name="ping"),
            *sse({"output": {"text": "Hel", "stop": "running"}}, name="result"),
            *sse({"output": {"text": "Hello", "stop": "running"}}, name="result"),
            *sse(
                {"output": {"text": "Hello", "stop": "eos"}, "usage": {"prompt": 2, "prefix": 1, "answer": 2}},
                name="complete",
            ),
        ],
        {"output": {"text": "Hello", "stop": "eos"}, "usage": {"prompt": 2, "prefix": 1, "answer": 2}},
        sse({"message": "boom"}, name="error"),
        "boom",
        BEARER,
    ),
    "example-plain-json": Example(
        check_plain_json,
        [],
        {
            "header": {"success": True},
            "payload": {"answers": [{"text": "Hello", "endReason": "stop"}], "cost": {"question": 3, "answer": 2}},
        },
        [written({"header": {"success": False, "code": "X1", "reason": "boom"}})],
        "X1: boom",
        BOTH,
        {"header": {"code": "Z", "reason": "who are you"}},
        "Z: who are you",
    ),
    "example-agent-events": Example(
        check_agent,
        sse(
            {"event": "run.created"},
            {"event": "thought.delta", "data": {"text": "hm"}},
            {"event": "tool.call", "data": {"arguments": {"q": 1}, "usage": {"input": 1, "output": 1}}},
            {"event": "answer.delta", "data": {"text": "Hel"}},
            {"event": "ping"},
            {
                "event": "answer.delta",
                "data": {"parts": [{"kind": "text", "value": "lo"}, {"kind": "image", "value": "x"}]},
            },
            {"event": "run.completed", "data": {"status": "done", "usage": {"input": 2, "output": 1}}},
        ),
        {"status": "done", "answer": {"parts": [{"kind": "text", "value": "Hello"}]}},
        sse({"event": "run.failed", "data": {"error": {"code": 3, "message": "boom"}}}),
        "3: boom",
        BEARER,
        {"error": {"code": 1, "message": "who are you"}},
        "1: who are you",
    ),
}


@contextlib.contextmanager
def gateway(name: str, send: Callable[[Peer], None], monkeypatch: Any) -> Any:
    """The example's gateway; what it complains of is answered with 401."""
    tells = TELLS[name]
    monkeypatch.setenv("AGENT_TENANT", "t-9")

    def behave(peer: Peer, request: Request) -> None:
        if request.path == "/oauth2/token":
            fields = dict(urllib.parse.parse_qsl(request.raw.decode()))
            assert fields == {"grant_type": "client_credentials", "client_id": KEY, "client_secret": SECRET}
            peer.send(answer(200, {"access_token": "fetched-token-1", "expires_in": 3600}))
            return
        try:
            tells.check(request)
        except (Refused, ValueError, KeyError) as refused:
            server.refusals.append(str(refused))
            peer.send(answer(401, tells.refusal))
        else:
            send(peer)

    with Server(behave) as server:
        server.refusals = []
        yield server
    assert server.complaints == []


def measured(name: str, server: Any, **given: Any) -> dict[str, Any]:
    """The record of one request."""
    flags = {**TELLS[name].flags, **given}
    if name == "example-token-first":  # the token is asked for before a run, not by a runner
        with tempfile.TemporaryDirectory() as directory:
            words = [] if flags.pop("stream", True) else ["--no-stream"]
            words += itertools.chain(*(("--" + flag.replace("_", "-"), value) for flag, value in flags.items()))
            made = run(
                directory + "/out",
                "--url",
                server.url,
                "--provider",
                name,
                "--total-requests",
                "1",
                "--auth-opt",
                f"exchange-url={server.url}/oauth2/token",
                *words,
            )
            [record] = made.records
            return record
    flags["given"] = tuple(flags)
    [record] = measure(server.url, total_requests=1, provider=name, **flags).records
    return record


STREAMING = [name for name in TELLS if TELLS[name].stream]


def test_every_example_has_its_gateway():
    assert list(TELLS) == list(EXAMPLES)


@pytest.mark.parametrize("name", STREAMING)
def test_an_example_is_let_in_and_read(name, monkeypatch):
    with gateway(name, sends(TELLS[name].stream), monkeypatch) as server:
        record = measured(name, server)
    assert (server.refusals, record["status"], record.get("err")) == ([], "ok", None)
    assert record["ttft_ms"] > 0 and (record["in_tokens"], record["out_tokens"]) == TELLS[name].tokens
    assert record["out_chars"] - record.get("reasoning_chars", 0) - 7 * (name == "example-agent-events") == 5
    assert record["provider"] == name


@pytest.mark.parametrize("name", TELLS)
def test_an_examples_whole_answer_is_read(name, monkeypatch):
    with gateway(name, lambda peer: peer.send(answer(200, TELLS[name].whole)), monkeypatch) as server:
        record = measured(name, server, stream=False)
    assert (server.refusals, record["status"], record.get("err")) == ([], "ok", None)
    assert record["out_chars"] == 5 and "ttft_ms" not in record and record["latency_ms"] > 0
    assert record.get("out_tokens", 2) == 2


@pytest.mark.parametrize("name", TELLS)
def test_an_examples_errors_are_told(name, monkeypatch):
    tells = TELLS[name]
    send = sends(tells.error) if tells.stream else lambda peer: peer.send(answer(200, tells.error[0]))
    with gateway(name, send, monkeypatch) as server:
        record = measured(name, server)
    assert (record["status"], record["err"]) == ("stream_error", tells.said)
    wrong = {key: "wrong-" + value for key, value in tells.flags.items()}
    if name != "example-token-first":
        with gateway(name, send, monkeypatch) as server:
            record = measured(name, server, **wrong)
        assert record["status"] == "auth_error" and record["err"].endswith(tells.refused) and server.refusals


@pytest.mark.parametrize("name", STREAMING)
def test_an_example_that_is_cut_short_is_truncated(name, monkeypatch):
    events = TELLS[name].stream
    short = [data for data in events if b"[DONE]" not in data and b"finish_reason" not in data]
    with gateway(name, sends(short if len(short) < len(events) else events[:-1]), monkeypatch) as server:
        record = measured(name, server)
    assert record["status"] == "truncated" and "without an end" in record["err"]


@pytest.mark.parametrize("name", [name for name in TELLS if llmbench.builtin_form(name).secrets])
def test_an_example_without_its_secret_is_one_line(name):
    with pytest.raises(UserError, match=r"provider example-.* needs --") as refused:
        make_provider(Config(provider=name))
    assert "\n" not in str(refused.value)
