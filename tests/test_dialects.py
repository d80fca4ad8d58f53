"""Every built-in provider against what its endpoints send: tests/dialects holds the wire bytes and what they mean.

Each case is fed event by event, which gives the times; whole, byte by byte and at many cuts, which may change nothing;
and with every event read in full. Then the requests that a provider makes, and a run of the program per provider.
"""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any, Dict, List, Optional, Tuple

import pytest
from dialect_cases import CASES, DIALECTS, REQUIRED, Case
from running import Run, expected_status
from servers import Server, answer, chunk, measure

from llmbench import PROVIDERS, Config, Exchange, Prompt, make_provider, parse_url

START = 100.0
TICK = 1 / 64
END = b"0\r\n\r\n"
SECRETS = {"hunyuan": {"auth_key": "AK", "auth_secret": "SK"}, "baidu-v1": {"auth_key": "AK", "auth_secret": "SK"}}

cases = pytest.mark.parametrize("case", CASES, ids=["%s, %s" % (case.provider, case.name) for case in CASES])
providers = pytest.mark.parametrize("name", sorted(DIALECTS))


def provider_for(name: str, whole: bool = False, **config: Any) -> Any:
    """A provider with secrets that nobody checks."""
    return make_provider(Config(provider=name, model="m", stream=not whole, **{**SECRETS.get(name, {}), **config}))


class Heard(Exchange):
    """An exchange that keeps what it was told."""

    def __init__(self, case: Case, in_full: bool = False) -> None:
        super().__init__(provider_for(case.provider, case.expected.get("whole", False)), {}, lambda: None)
        self.start = START
        self.reads = 0
        self.heard: Dict[str, str] = {"content": "", "reasoning": "", "tool": ""}
        if in_full:
            self.decoder._learn = lambda *_: None

    def _note_output(self, frame: Any, event: Any, arrived: float) -> None:
        self.heard[frame.kind] += frame.text
        super()._note_output(frame, event, arrived)

    def _note_texts(self, texts: Any) -> int:
        self.heard["content"] += b"".join(texts).decode("utf-8", "replace")
        return super()._note_texts(texts)

    def read_at(self, data: bytes, ticks: float) -> None:
        """One read that arrived at a tick."""
        self.reads += 1
        moment = START + ticks * TICK
        self.received(data, moment, moment, moment, self.reads, True)


def play(case: Case, pieces: Optional[List[bytes]] = None, in_full: bool = False) -> Heard:
    """An answer in given pieces, a tick apart; by default its head at tick 0.5 and event n at tick n, a chunk each."""
    heard = Heard(case, in_full)
    if pieces is None:
        heard.read_at(case.response_head + b"Transfer-Encoding: chunked\r\n\r\n", 0.5)
        blocks = case.blocks if case.streamed else [case.body]
        for number, block in enumerate(blocks, 1):
            heard.read_at(chunk(block), number)
        if not case.expected.get("cut"):
            heard.read_at(END, len(blocks) + 1)
    else:
        for number, piece in enumerate(pieces, 1):
            if heard.status is None:
                heard.read_at(piece, number)
    heard.lost(True, "connection closed")
    return heard


def wire(case: Case, size: Optional[int] = None) -> bytes:
    """The answer on the wire: a chunk per event, or of a size."""
    step = size or len(case.body) or 1
    parts = case.blocks if size is None else [case.body[at : at + step] for at in range(0, len(case.body), step)]
    end = b"" if case.expected.get("cut") else END
    return case.response_head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(map(chunk, parts)) + end


def figures(heard: Heard) -> Dict[str, Any]:
    """What must not depend on the reads."""
    names = ("status", "err", "chars", "reasoning_chars", "chunks", "usage", "finish_reason", "stream", "heard")
    found = {name: getattr(heard, name) for name in names}
    if heard.status == "stream_error":  # what follows an error is not read, or is in the same read
        found["usage"] = found["finish_reason"] = None
    return {**found, "crc": heard.decoder.crc}


def ticks(moment: Optional[float]) -> Optional[float]:
    return None if moment is None else (moment - START) / TICK


# The files are complete.


@providers
def test_every_kind_of_answer_is_there(name: str) -> None:
    dialect = DIALECTS[name]
    kinds = {case.kind for case in dialect.cases}
    assert kinds | set(dialect.absent) == set(REQUIRED)
    assert not kinds & set(dialect.absent)


def test_every_provider_has_its_file() -> None:
    assert set(DIALECTS) == {name for name in PROVIDERS if name != "custom" and not name.startswith("example")}


# What an answer means.


@cases
def test_an_answer_event_by_event(case: Case) -> None:
    """Status, texts, counts, and the times: the number of the event that a time is the arrival of."""
    heard, expected = play(case), case.expected
    assert (heard.status, expected.get("err", "")) == (expected.get("status", "ok"), expected.get("err", ""))
    assert expected.get("err", "") in (heard.err or "")
    assert heard.finish_reason == expected.get("finish")
    if heard.status in ("ok", "empty"):
        assert heard.usage == expected["tokens"]
    if expected.get("whole"):
        assert not heard.stream
        assert (heard.output_at, heard.content_at, heard.tool_at) == (None, None, None)
        if heard.status == "ok":
            assert ticks(heard.end_at) == 2
        frames = heard.decoder.whole(json.loads(case.body.decode()))
        said = {kind: "".join(frame.text for frame in frames if frame.kind == kind) for kind in heard.heard}
    else:
        said = heard.heard
        first = heard.content_at if heard.content_at is not None else heard.tool_at
        end = len(case.blocks) + 1 if expected.get("latency") == "body" else expected.get("latency")
        assert (ticks(heard.output_at), ticks(first)) == (expected.get("ttfe"), expected.get("ttft"))
        assert ticks(heard.end_at) == end
    assert said == {"content": expected.get("text", ""), "reasoning": expected.get("reasoning", ""),
                    "tool": expected.get("tool", "")}  # fmt: skip
    assert heard.chars == sum(map(len, said.values()))
    assert heard.reasoning_chars == len(said["reasoning"])
    assert heard.chunks == expected.get("chunks", heard.chunks)


@cases
def test_the_reads_change_nothing(case: Case) -> None:
    chance = random.Random(len(case.body))
    for size in (None, 50, len(case.body)):
        answer = wire(case, size)
        expected = figures(play(case, [answer]))
        assert figures(play(case)) == expected
        assert figures(play(case, [answer[at : at + 1] for at in range(len(answer))])) == expected
        cuts = range(1, len(answer))
        for cut in cuts if len(answer) < 300 else chance.sample(cuts, 150 if size is None else 40):
            assert figures(play(case, [answer[:cut], answer[cut:]])) == expected, cut
        for _ in range(20):
            at = [0, *sorted(chance.sample(cuts, 4)), len(answer)]
            assert figures(play(case, [answer[begin:end] for begin, end in zip(at, at[1:])])) == expected, at


@cases
def test_the_fast_reading_is_the_full_one(case: Case) -> None:
    """Also where an event comes several times, which is what the fast reading learns from."""
    for again in (1, 4):
        blocks = [block for block in case.blocks for _ in range(again)]
        answer = case.response_head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(map(chunk, blocks)) + END
        for size in (len(answer), 1448, 97):
            pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
            assert figures(play(case, pieces)) == figures(play(case, pieces, in_full=True))


# What is asked.

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "How are you?"},
]
TEXT = "Be brief.\n\nHi\n\nHello\n\nHow are you?"
USAGE = {"stream_options": {"include_usage": True}}
PASCAL = [{"Role": message["role"], "Content": message["content"]} for message in TALK]
PARTS = [
    {"role": {"assistant": "model"}.get(message["role"], message["role"]), "parts": [{"text": message["content"]}]}
    for message in TALK[1:]
]
EXACT = {"ignore_eos": True, "min_tokens": 7}


class Asked:
    """A request: its target and body for a stream, and what differs for a whole answer and an exact length."""

    def __init__(self, target: str, body: Any, whole: Any = None, exact: Any = None, headers: Any = None,
                 whole_target: Optional[str] = None, whole_headers: Any = None) -> None:  # fmt: skip
        self.target, self.body, self.exact = target, body, exact
        self.whole = body if whole is None else whole
        self.headers = headers or {}
        self.whole_target = whole_target or target
        self.whole_headers = self.headers if whole_headers is None else whole_headers


def chat(**more: Any) -> Dict[str, Any]:
    return {"model": "m", "messages": TALK, **more}


def dashscope(**parameters: Any) -> Dict[str, Any]:
    return {"model": "m", "input": {"messages": TALK}, "parameters": {"result_format": "message", **parameters}}


BEARER = {"authorization": "Bearer T"}
OPENAI = Asked(
    "/v1/chat/completions",
    chat(stream=True, max_tokens=7, **USAGE),
    chat(stream=False, max_tokens=7),
    EXACT,
    BEARER,
)
ASKED = {
    "openai": OPENAI,
    "completions": Asked(
        "/v1/completions",
        {"model": "m", "prompt": TEXT, "stream": True, "max_tokens": 7, **USAGE},
        {"model": "m", "prompt": TEXT, "stream": False, "max_tokens": 7},
        EXACT,
        BEARER,
    ),
    "responses": Asked(
        "/v1/responses",
        {"model": "m", "input": TALK, "max_output_tokens": 7, "stream": True, "store": False},
        {"model": "m", "input": TALK, "max_output_tokens": 7, "stream": False, "store": False},
        headers=BEARER,
    ),
    "azure": Asked(
        "/openai/deployments/m/chat/completions?api-version=2024-10-21",
        OPENAI.body,
        OPENAI.whole,
        headers={"api-key": "T"},
    ),
    "aliyun": Asked(
        "/api/v1/services/aigc/text-generation/generation",
        dashscope(incremental_output=True, max_tokens=7),
        dashscope(max_tokens=7),
        headers={**BEARER, "x-dashscope-sse": "enable"},
        whole_headers=BEARER,
    ),
    "baidu": Asked("/v2/chat/completions", OPENAI.body, OPENAI.whole, headers=BEARER),
    "baidu-v1": Asked(
        "/rpc/2.0/ai_custom/v1/wenxinworkshop/chat/m",
        {"messages": TALK[1:], "system": "Be brief.", "stream": True, "max_output_tokens": 7},
        {"messages": TALK[1:], "system": "Be brief.", "stream": False, "max_output_tokens": 7},
    ),
    "hunyuan": Asked(
        "/",
        {"Model": "m", "Messages": PASCAL, "Stream": True},
        {"Model": "m", "Messages": PASCAL, "Stream": False},
        headers={"x-tc-action": "ChatCompletions", "x-tc-version": "2023-09-01"},
    ),
    "anthropic": Asked(
        "/v1/messages",
        {"model": "m", "max_tokens": 7, "messages": TALK[1:], "system": "Be brief.", "stream": True},
        {"model": "m", "max_tokens": 7, "messages": TALK[1:], "system": "Be brief.", "stream": False},
        headers={"x-api-key": "T", "anthropic-version": "2023-06-01"},
    ),
    "gemini": Asked(
        "/v1beta/models/m:streamGenerateContent?alt=sse",
        {
            "contents": PARTS,
            "systemInstruction": {"parts": [{"text": "Be brief."}]},
            "generationConfig": {"maxOutputTokens": 7},
        },
        whole_target="/v1beta/models/m:generateContent",
        headers={"x-goog-api-key": "T"},
    ),
    "ollama": Asked(
        "/api/chat",
        chat(stream=True, options={"num_predict": 7}),
        chat(stream=False, options={"num_predict": 7}),
        headers=BEARER,
    ),
    "tgi": Asked(
        "/generate_stream",
        {"inputs": TEXT, "parameters": {"max_new_tokens": 7, "details": True}},
        whole_target="/generate",
        headers=BEARER,
    ),
    "triton": Asked(
        "/v2/models/m/generate_stream",
        {"text_input": TEXT, "max_tokens": 7, "stream": True, "exclude_input_in_output": True},
        {"text_input": TEXT, "max_tokens": 7, "stream": False, "exclude_input_in_output": True},
        whole_target="/v2/models/m/generate",
        headers=BEARER,
    ),
    "llamacpp": Asked(
        "/completion",
        {"prompt": TEXT, "n_predict": 7, "stream": True},
        {"prompt": TEXT, "n_predict": 7, "stream": False},
        {"ignore_eos": True},
        BEARER,
    ),
    "sglang": Asked(
        "/generate",
        {"text": TEXT, "sampling_params": {"max_new_tokens": 7}, "stream": True},
        {"text": TEXT, "sampling_params": {"max_new_tokens": 7}, "stream": False},
        {"sampling_params": {"ignore_eos": True, "min_new_tokens": 7, "max_new_tokens": 7}},
        BEARER,
    ),
    "dify": Asked(
        "/v1/chat-messages",
        {
            "inputs": {},
            "query": "How are you?",
            "user": "llmbench",
            "response_mode": "streaming",
            "conversation_id": "",
        },
        {
            "inputs": {},
            "query": "How are you?",
            "user": "llmbench",
            "response_mode": "blocking",
            "conversation_id": "",
        },
        headers=BEARER,
    ),
}


def ask(name: str, messages: Any = None, whole: bool = False, **config: Any) -> Tuple[str, Dict[str, str], Any]:
    """Target, headers and body of a request."""
    if name not in SECRETS:
        config["token"] = "T"
    provider = provider_for(name, whole, max_tokens=7, **config)
    endpoint = parse_url("http://host:8000", provider)
    request = provider.request(Prompt("p", messages or TALK), endpoint, "r-1", provider.dialect)
    headers = {key.lower(): value for key, value in request.headers}
    assert headers["content-length"] == str(len(request.body))
    return request.target, headers, json.loads(request.body.decode())


@providers
@pytest.mark.parametrize("whole", [False, True], ids=["stream", "whole"])
def test_a_request(name: str, whole: bool) -> None:
    target, headers, body = ask(name, whole=whole)
    asked = ASKED[name]
    assert target == (asked.whole_target if whole else asked.target)
    assert body == (asked.whole if whole else asked.body)
    wanted = asked.whole_headers if whole else asked.headers
    assert all(key == key.lower() for key in wanted), "headers are asked for in lower case"
    assert {key: headers.get(key) for key in wanted} == wanted
    assert {key for key in asked.headers if key in headers} == set(wanted)
    assert headers["accept"] == (
        "application/json" if whole else "application/x-ndjson" if name == "ollama" else "text/event-stream"
    )
    assert headers["x-request-id"] == "r-1"


@providers
def test_a_request_without_a_system_message(name: str) -> None:
    """What is only there for one is left out."""
    _, _, body = ask(name, [{"role": "user", "content": "Hi"}])
    text = json.dumps(body)
    assert "Be brief" not in text
    assert "system" not in text
    assert "Hi" in text
    assert "null" not in text


@providers
def test_a_request_for_an_exact_length(name: str) -> None:
    _, _, plain = ask(name)
    _, _, body = ask(name, output_tokens=7)
    assert body == {**plain, **(ASKED[name].exact or {})}


@pytest.mark.parametrize("name", ["azure", "gemini", "triton", "baidu-v1"])
def test_a_model_in_the_path_is_percent_encoded(name: str) -> None:
    provider = provider_for(name)
    provider.config.model = "a b/c?d"
    endpoint = parse_url("http://host", provider)
    target = provider.request(Prompt("p", TALK), endpoint, "r", provider.dialect).target
    assert "a%20b%2Fc%3Fd" in target


OPENAI_LIST = {"object": "list", "data": [{"id": "a", "object": "model"}, {"id": "b", "object": "model"}]}
LISTS = {
    **dict.fromkeys(
        ("openai", "completions", "responses", "anthropic", "llamacpp", "sglang"),
        ("/v1/models", OPENAI_LIST),
    ),
    "baidu": ("/v2/models", OPENAI_LIST),
    "ollama": ("/api/tags", {"models": [{"name": "a", "model": "a"}, {"name": "b", "model": "b"}]}),
    "gemini": ("/v1beta/models", {"models": [{"name": "models/a"}, {"name": "models/b"}], "nextPageToken": "x"}),
}


@providers
def test_the_list_of_models(name: str) -> None:
    provider = provider_for(name)
    target = provider.models_target(parse_url("http://host", provider))
    if name in LISTS:
        assert (target, provider.model_ids(LISTS[name][1])) == (LISTS[name][0], ["a", "b"])
    else:
        assert target == ""


@pytest.mark.parametrize(
    ("name", "url", "target"),
    [
        ("anthropic", "https://api.anthropic.com/v1", "/v1/messages"),
        ("anthropic", "https://api.deepseek.com/anthropic/v1", "/anthropic/v1/messages"),
        (
            "gemini",
            "https://generativelanguage.googleapis.com/v1beta",
            "/v1beta/models/m:streamGenerateContent?alt=sse",
        ),
        ("gemini", "https://g.example/v1beta/?key=K", "/v1beta/models/m:streamGenerateContent?alt=sse&key=K"),
        ("baidu", "https://qianfan.baidubce.com/v2", "/v2/chat/completions"),
        ("openai", "https://qianfan.baidubce.com/v2", "/v2/chat/completions"),
        ("dify", "https://api.dify.ai/v1", "/v1/chat-messages"),
        ("dify", "https://api.dify.ai/v1/workflows/run", "/v1/workflows/run"),
        ("aliyun", "https://dashscope.aliyuncs.com", "/api/v1/services/aigc/text-generation/generation"),
        ("aliyun", "https://dashscope.aliyuncs.com/api/v1/apps/7/completion", "/api/v1/apps/7/completion"),
        ("hunyuan", "https://hunyuan.tencentcloudapi.com/", "/"),
        ("triton", "http://h:8000/v2/models/n/versions/1/generate_stream", "/v2/models/n/versions/1/generate_stream"),
    ],
)
def test_where_a_url_leads(name: str, url: str, target: str) -> None:
    provider = provider_for(name)
    endpoint = parse_url(url, provider)
    assert provider.request(Prompt("p", TALK), endpoint, "r", provider.dialect).target == target


def there(tree: Any, name: str) -> bool:
    """Whether a body has a field of this dotted name."""
    for part in name.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


REFUSED = [(name, field) for name in sorted(DIALECTS) for field in provider_for(name).optional]


@pytest.mark.parametrize(("name", "field"), REFUSED, ids=["%s, %s" % pair for pair in REFUSED])
def test_a_field_of_ours_that_the_endpoint_refuses_is_given_up_and_said(name: str, field: str) -> None:
    case = next(case for case in DIALECTS[name].cases if case.name == "normal")
    normal = behave(case)

    def refusing(peer: Any, request: Any) -> None:
        if there(request.fields, field):
            peer.send(answer(400, {"error": {"message": "Unknown parameter: '%s'" % field}}))
        else:
            normal(peer, request)

    with Server(refusing) as server:
        measured = measure(server.url, provider=name, total_requests=3)
    assert [record["status"] for record in measured.of_phase("measure")] == ["ok"] * 3
    assert [there(request.fields, field) for request in server.requests].count(True) == 1
    assert any(field in note for note in measured.runner.provider.dialect.notes)


# The program, once per provider.

MODELS = {"azure": "gpt-dep", "baidu-v1": "completions_pro"}


def behave(case: Case) -> Any:
    """A server that gives this answer, an event at a time."""

    def reply(peer: Any, request: Any) -> None:
        if request.path.startswith("/oauth/"):
            body = b'{"access_token":"24.tok","expires_in":2592000}'
            peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            return
        peer.send(case.response_head + b"Transfer-Encoding: chunked\r\n\r\n")
        for block in case.blocks if case.streamed else [case.body]:
            peer.send(chunk(block))
        peer.send(END)

    return reply


def flags_of(name: str, url: str) -> List[str]:
    """What a user types for this provider."""
    flags = ["--provider", name, "--url", url, "--model", MODELS.get(name, "m"), "--total-requests", "2"]
    if name in SECRETS:
        flags += ["--auth-key", "AK", "--auth-secret", "SK"]
    if name == "baidu-v1":
        flags += ["--auth-opt", "exchange-url=%s/oauth/2.0/token" % url]
    return [*flags, "--max-tokens", "7"]


@pytest.fixture(scope="module", params=[False, True], ids=["stream", "whole"])
def runs(request: Any, tmp_path_factory: Any) -> Any:
    """A run of each provider, four at a time: name -> (run, what the server got)."""
    out = tmp_path_factory.mktemp("whole" if request.param else "stream")
    found: Dict[str, Any] = {}
    names = sorted(DIALECTS)
    for begin in range(0, len(names), 4):
        with contextlib.ExitStack() as stack:
            started = {}
            for name in names[begin : begin + 4]:
                kind = "whole" if request.param else "normal"
                case = next((case for case in DIALECTS[name].cases if case.name == kind), None)
                assert case is not None, "%s.txt has no case %s" % (name, kind)
                server = stack.enter_context(Server(behave(case)))
                flags = flags_of(name, server.url) + ["--no-stream"] * request.param
                started[name] = (Run(out / name, *flags), server, case)
            for name, (run, server, case) in started.items():
                run.wait()
                found[name] = (run, [each for each in server.requests if "/oauth/" not in each.path], case)
    return request.param, found


@providers
def test_a_run(runs: Any, name: str) -> None:
    whole, found = runs
    run, requests, case = found[name]
    assert run.status == expected_status(run.summary), run.stderr
    assert run.stderr == ""
    assert len(requests) == 2
    asked, model = ASKED[name], MODELS.get(name, "m")
    for request in requests:
        target = (asked.whole_target if whole else asked.target).replace("/m", "/" + model, 1) if name in MODELS else (
            asked.whole_target if whole else asked.target)  # fmt: skip
        assert request.path == target + ("?access_token=24.tok" if name == "baidu-v1" else "")
        assert set(request.fields) == set(asked.whole if whole else asked.body) - {"system", "systemInstruction"}
        if name == "hunyuan":
            assert request.headers["authorization"].startswith("TC3-HMAC-SHA256 Credential=AK/")
    assert [record["status"] for record in run.records] == ["ok", "ok"]
    for record in run.records:
        assert record["provider"] == name
        assert ("ttft_ms" in record) is (not whole)
        assert record["latency_ms"] > 0
        assert record["out_chars"] == sum(len(case.expected.get(key, "")) for key in ("text", "reasoning", "tool"))
        counts = {
            key: record[key]
            for key in ("in_tokens", "out_tokens", "cached_tokens", "reasoning_tokens")
            if key in record
        }
        assert counts == case.expected["tokens"]
        assert record.get("finish_reason") == case.expected.get("finish")
    assert "not_streamed" not in [reason["key"] for reason in run.summary["verdict"]["reasons"]]


# What was not asked for.


def unasked(case: Case, whole: bool) -> Heard:
    """An answer in the form that the request did not ask for."""
    other = dict(case.expected)
    other.pop("whole", None)
    return play(case._replace(expected={**other, "whole": True} if whole else other))


framed = pytest.mark.parametrize("name", sorted(set(DIALECTS) - {"ollama"}))  # there an object and a line are alike


@framed
def test_a_whole_answer_to_a_request_for_a_stream(name: str) -> None:
    for case in DIALECTS[name].cases:
        if case.expected.get("whole"):
            asked, found = play(case), unasked(case, False)
            assert not found.stream
            assert figures(found) == figures(asked)


@framed
def test_a_stream_in_answer_to_a_request_for_a_whole_answer(name: str) -> None:
    for case in DIALECTS[name].cases:
        if case.streamed:
            asked, found = play(case), unasked(case, True)
            assert found.stream
            assert figures(found) == figures(asked)
            assert (found.content_at, found.end_at) == (asked.content_at, asked.end_at)
