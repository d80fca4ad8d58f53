"""Providers: what an event means, whoever sent it; what a request says; and that the fast reading is the full one."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import random
import sys
import zlib
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest

import llmbench
from llmbench import (
    FAILED_FINISH,
    FRAME_KINDS,
    PROVIDERS,
    Config,
    Decoder,
    Dialect,
    Frame,
    NDJSONParser,
    ParseError,
    Prompt,
    Provider,
    ResponseReader,
    SSEParser,
    ThinkTags,
    Truncated,
    UserError,
    encode_request,
    error_of,
    make_provider,
    merge,
    parse_url,
    replace_headers,
)

META = Frame("meta")
DONE = b"[DONE]"


def content(text: str) -> Frame:
    return Frame("content", text)


def reasoning(text: str) -> Frame:
    return Frame("reasoning", text)


def tool(text: str) -> Frame:
    return Frame("tool", text)


def end(reason: str = "") -> Frame:
    return Frame("end", reason)


def error(text: str) -> Frame:
    return Frame("error", text)


def usage(in_tokens: Optional[int] = None, out_tokens: Optional[int] = None, **more: int) -> Frame:
    counts = {"in_tokens": in_tokens, "out_tokens": out_tokens, **more}
    return Frame("usage", "", {key: value for key, value in counts.items() if value is not None})


def chunk(delta: Any = None, finish: Any = None, **more: Any) -> Dict[str, Any]:
    """A chat.completion.chunk as most servers write it."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **more}


def text(value: str, **more: Any) -> Dict[str, Any]:
    return chunk({"content": value}, **more)


def counted(prompt: int, completion: int, **more: Any) -> Dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, **more}


def encoded(message: Any) -> bytes:
    """As it stands on the wire: UTF-8, as FastAPI writes it."""
    return message if isinstance(message, bytes) else json.dumps(message, ensure_ascii=False).encode()


def read(message: Any, kind: str = "message") -> List[Frame]:
    return Decoder().frames((kind, encoded(message)))


# What one event means.


class Event(NamedTuple):
    """An event that some server sends, and its frames."""

    name: str
    message: Any
    frames: List[Frame]
    kind: str = "message"


CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
FILTER = {"hate": {"filtered": False, "severity": "safe"}}
PREFACE = {
    "choices": [],
    "created": 0,
    "id": "",
    "model": "",
    "object": "",
    "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": FILTER}],
}
OFFSETS = {"check_offset": 44, "start_offset": 44, "end_offset": 198}
TRAILER = {
    "choices": [
        {"index": 0, "finish_reason": None, "content_filter_results": FILTER, "content_filter_offsets": OFFSETS}
    ]
}
ABORTED = {"error": {"object": "error", "message": "abort", "type": "SERVICE_UNAVAILABLE", "code": 503}}

EVENTS = [
    # OpenAI.
    Event("role only", chunk({"role": "assistant", "content": ""}, usage=None), [META]),
    Event("content", text("Hel", usage=None), [content("Hel")]),
    Event("whitespace is content", text("\n"), [content("\n")]),
    Event("finish", chunk({}, "stop", usage=None), [end("stop")]),
    Event("[DONE]", DONE, [end()]),
    Event("[DONE] and more", b" [DONE] \n", [end()]),
    Event("refusal", chunk({"refusal": "No."}), [content("No.")]),
    Event("obfuscation", text("a", obfuscation="xyz"), [content("a")]),
    Event("moderation", {"id": "c", "object": "chat.completion.chunk", "choices": [], "moderation": {"a": 1}}, [META]),
    Event("length", chunk({}, "length"), [end("length")]),
    Event("filtered", chunk({}, "content_filter"), [end("content_filter")]),
    # Azure.
    Event("preface", PREFACE, [META]),
    Event(
        "annotated text",
        {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None, "content_filter_results": FILTER}]},
        [content("a")],
    ),
    Event("trailer without delta", TRAILER, [META]),
    # vLLM.
    Event("text on the finish frame", chunk({"content": "!"}, "stop", stop_reason=None), [content("!"), end("stop")]),
    Event("usage on every frame", text("a", usage=counted(9, 1)), [content("a"), usage(9, 1)]),
    Event("usage of the role frame", chunk({"role": "assistant", "content": ""}, usage=counted(9, 0)), [usage(9, 0)]),
    Event("usage last", {"id": "c", "choices": [], "usage": counted(9, 2)}, [usage(9, 2)]),
    Event(
        "all on one frame",
        chunk({"content": "a", "reasoning": "r"}, "stop", usage=counted(9, 2)),
        [reasoning("r"), content("a"), usage(9, 2), end("stop")],
    ),
    Event("reasoning", chunk({"reasoning": "hm"}), [reasoning("hm")]),
    Event(
        "error",
        {"error": {"message": "engine died", "type": "InternalServerError", "param": None, "code": 500}},
        [error("500: engine died")],
    ),
    Event(
        "flat error",
        {"object": "error", "message": "too long", "type": "BadRequestError", "param": None, "code": 400},
        [error("400: too long")],
    ),
    Event("token ids", chunk({"content": "a"}, None, token_ids=[7]), [content("a")]),
    # SGLang.
    Event(
        "explicit nulls", chunk({"role": None, "content": None, "reasoning_content": None, "tool_calls": None}), [META]
    ),
    Event("empty finish reason", chunk({"content": "a"}, ""), [content("a")]),
    Event("matched stop", chunk({"content": ""}, "stop", matched_stop=2), [end("stop")]),
    Event(
        "reasoning count on top",
        {"choices": [], "usage": counted(9, 5, reasoning_tokens=3)},
        [usage(9, 5, reasoning_tokens=3)],
    ),
    Event("aborted", ABORTED, [error("503: abort")]),
    # DeepSeek.
    Event("role with null content", chunk({"role": "assistant", "content": None, "reasoning_content": ""}), [META]),
    Event("thinking", chunk({"content": None, "reasoning_content": "hm"}), [reasoning("hm")]),
    Event("answer", chunk({"content": "a", "reasoning_content": None}), [content("a")]),
    Event("both reasoning keys", chunk({"reasoning_content": "hm", "reasoning": "hm"}), [reasoning("hm")]),
    Event("empty and full reasoning key", chunk({"reasoning_content": "", "reasoning": "hm"}), [reasoning("hm")]),
    Event("usage on the finish frame", chunk({"content": ""}, "stop", usage=counted(9, 2)), [usage(9, 2), end("stop")]),
    Event(
        "cache hits",
        {"choices": [], "usage": counted(9, 2, prompt_cache_hit_tokens=4, prompt_cache_miss_tokens=5)},
        [usage(9, 2, cached_tokens=4)],
    ),
    Event(
        "cache details",
        {
            "choices": [],
            "usage": counted(
                9,
                2,
                prompt_cache_hit_tokens=4,
                prompt_tokens_details={"cached_tokens": 6},
                completion_tokens_details={"reasoning_tokens": 1},
            ),
        },
        [usage(9, 2, cached_tokens=6, reasoning_tokens=1)],
    ),
    Event(
        "details are null",
        {"choices": [], "usage": counted(9, 2, prompt_tokens_details=None, completion_tokens_details=None)},
        [usage(9, 2)],
    ),
    Event(
        "overloaded", chunk({}, "insufficient_system_resource"), [error("finish reason insufficient_system_resource")]
    ),
    # LiteLLM.
    Event(
        "traceback as an error",
        {"error": {"message": 'Traceback:\n  File "x"\nboom', "type": "None", "param": "None", "code": "500"}},
        [error('500: Traceback: File "x" boom')],
    ),
    Event("stop without text", chunk({"content": None}, "stop"), [end("stop")]),
    # One-API, New-API.
    Event(
        "gateway error",
        {"error": {"message": "bad (request id: 1)", "type": "one_api_error", "param": "", "code": ""}},
        [error("one_api_error: bad (request id: 1)")],
    ),
    Event("usage of zeros", {"choices": [], "usage": counted(0, 0)}, [META]),
    # OpenRouter.
    Event(
        "error and finish reason",
        {"error": {"code": 502, "message": "upstream"}, **chunk({"content": ""}, "error")},
        [error("502: upstream")],
    ),
    # DashScope, GLM.
    Event('"null" is no finish reason', chunk({"content": "a"}, "null"), [content("a")]),
    Event("sensitive", chunk({"content": "x"}, "sensitive"), [content("x"), error("finish reason sensitive")]),
    Event("network error", chunk({}, "network_error"), [error("finish reason network_error")]),
    Event(
        "error by code and message",
        {"code": "Throttling", "message": "slow down", "request_id": "r"},
        [error("Throttling: slow down")],
    ),
    # Errors in other shapes.
    Event("error is a string", {"error": "overloaded"}, [error("overloaded")]),
    Event("error is true", {"error": True}, [error("True")]),
    Event("error without words", {"error": {"param": 1}}, [error('{"param": 1}')]),
    Event("error event", {"message": "boom"}, [error("boom")], kind="error"),
    Event("error event of text", b'"boom"', [error("boom")], kind="error"),
    Event(
        "Anthropic",
        {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}},
        [error("overloaded_error: busy")],
    ),
    Event(
        "flat error of Responses",
        {"type": "error", "code": "server_error", "message": "boom", "sequence_number": 1},
        [error("server_error: boom")],
    ),
    Event("Qianfan", {"error_code": 18, "error_msg": "QPS"}, [error("18: QPS")]),
    Event(
        "Tencent",
        {"Response": {"Error": {"Code": "AuthFailure", "Message": "no"}, "RequestId": "r"}},
        [error("AuthFailure: no")],
    ),
    Event("Hunyuan", {"ErrorMsg": {"Msg": "busy", "Code": 2003}}, [error("2003: busy")]),
    Event("a false error", {"error": False, **text("a")}, [content("a")]),
    Event("a null error", {"error": None, **text("a")}, [content("a")]),
    Event("an empty error", {"error": {}, **text("a")}, [content("a")]),
    Event("code 0", {"code": 0, "message": "ok", **text("a")}, [content("a")]),
    Event("code beside choices", {"code": 7, "message": "ok", **text("a")}, [content("a")]),
    Event("code of success", {"code": 200, "message": "ok"}, [META]),
    # Typed parts.
    Event(
        "typed parts",
        chunk({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
        [content("ab")],
    ),
    Event("parts without text", chunk({"content": [{"type": "image_url"}, "x", None, {"text": None}]}), [META]),
    Event("no parts", chunk({"content": []}), [META]),
    # Tools.
    Event("tool call begins", chunk({"content": None, "tool_calls": [CALL]}), [tool("")]),
    Event("tool arguments", chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}), [tool('{"a"')]),
    Event(
        "two calls",
        chunk({"tool_calls": [{"function": {"arguments": "1"}}, {"function": {"arguments": "2"}}]}),
        [tool("12")],
    ),
    Event("no calls", chunk({"content": "a", "tool_calls": []}), [content("a")]),
    Event("call without function", chunk({"tool_calls": [{"index": 0, "id": "c"}, None]}), [tool("")]),
    Event("function call", chunk({"function_call": {"name": "f", "arguments": "{}"}}), [tool("{}")]),
    Event("text and tool", chunk({"content": "a", "tool_calls": [CALL]}), [content("a"), tool("")]),
    Event("tool finish", chunk({}, "tool_calls"), [end("tool_calls")]),
    # Choices.
    Event("choices missing", {"id": "c"}, [META]),
    Event("choices null", {"choices": None}, [META]),
    Event("choices no list", {"choices": {"0": 1}}, [META]),
    Event("choice null", {"choices": [None]}, [META]),
    Event("delta null", chunk(None), [META]),
    Event("delta a list", chunk([1]), [META]),
    Event(
        "two choices",
        {"choices": [{"delta": {"content": "a"}}, {"delta": {"content": "b"}, "finish_reason": "stop"}]},
        [content("a"), content("b"), end("stop")],
    ),
    Event("content of another type", chunk({"content": 7}), [META]),
    Event("finish of another type", chunk({"content": "a"}, 7), [content("a")]),
    # Usage of other types.
    Event("usage a list", {"choices": [], "usage": [1]}, [META]),
    Event("usage empty", {"choices": [], "usage": {}}, [META]),
    Event("counts as text", {"choices": [], "usage": {"prompt_tokens": "9", "completion_tokens": None}}, [META]),
    Event("counts as booleans", {"choices": [], "usage": {"prompt_tokens": True, "completion_tokens": True}}, [META]),
    Event(
        "counts as floats", {"choices": [], "usage": {"prompt_tokens": 9.0, "completion_tokens": 2.0}}, [usage(9, 2)]
    ),
    Event("only output", {"choices": [], "usage": {"completion_tokens": 2}}, [usage(None, 2)]),
    # Not JSON objects, and yet no error.
    Event("nothing", b"", []),
    Event("blanks", b" \t", []),
    Event("invalid UTF-8", b'{"choices":[{"delta":{"content":"a\xff"}}]}', [content("a\ufffd")]),
    Event("escapes", b'{"choices":[{"delta":{"content":"\\u4f60\\n\\ud83e\\udd16"}}]}', [content("你\n🤖")]),
    Event("separators", text("a\u2028b\u0085"), [content("a\u2028b\u0085")]),
]


@pytest.mark.parametrize("event", EVENTS, ids=[event.name for event in EVENTS])
def test_what_an_event_means(event: Event) -> None:
    frames = read(event.message, event.kind)
    assert frames == event.frames
    assert all(frame.kind in FRAME_KINDS for frame in frames)


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"hello",
        b"{'a':1}",
        b"[1]",
        b"1",
        b'"text"',
        b"null",
        b"true",
        b"[" * 100000,
        b'{"a":' * 100000,
        b"\xff\xfe",
        b"DONE",
        b"[DON",
    ],
)
def test_what_is_no_object_is_a_parse_error(data: bytes) -> None:
    with pytest.raises(ParseError) as caught:
        read(data)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("reason", sorted(FAILED_FINISH))
def test_a_failed_finish_is_no_end(reason: str) -> None:
    assert read(chunk({}, reason)) == [error("finish reason " + reason)]


def test_a_whole_completion() -> None:
    message = {"role": "assistant", "reasoning_content": "hm", "content": "Hello"}
    whole = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": counted(9, 2)}
    assert Decoder().whole(whole) == [reasoning("hm"), content("Hello"), usage(9, 2), end("stop")]
    assert Decoder().whole({"error": {"message": "no", "code": "x"}}) == [error("x: no")]
    with pytest.raises(ParseError):
        Decoder().whole([1])


@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens"])
@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_a_count_that_is_no_number_is_not_known(field: str, number: str) -> None:
    assert read(b'{"choices":[],"usage":{"%s":%s}}' % (field.encode(), number.encode())) == [META]


def test_a_negative_count_is_not_known() -> None:
    assert read({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": -1}}) == [usage(9)]


@pytest.mark.parametrize("message", [{"error": "Traceback:\n  boom"}, {"ErrorMsg": "a\r\nb"}, "a\nb"])
def test_an_error_is_one_line(message: Any) -> None:
    found = error_of(message, "error")
    assert found
    assert "\n" not in found


def nested(depth: int) -> Iterator[bytes]:
    """Every place in which a value of any depth is made into text."""
    deep = b"[" * depth + b"]" * depth
    yield deep
    yield b'{"error":%s}' % deep
    yield b'{"error":{"x":%s}}' % deep
    yield b'{"error":{"message":%s}}' % deep
    yield b'{"choices":[{"delta":{"content":[{"text":%s}]}}]}' % deep
    yield b'{"choices":[{"delta":{"tool_calls":[{"function":{"arguments":%s}}]}}]}' % deep


def test_deep_nesting_is_read_or_refused() -> None:
    for depth in (1, 10, 300, 500, 100000):
        for data in nested(depth):
            with contextlib.suppress(ParseError):
                assert read(data)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the two have limits of their own since 3.12")
def test_nesting_at_the_limit_is_read_or_refused() -> None:
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit() + 10):
        for data in nested(depth):
            with contextlib.suppress(ParseError):
                assert read(data)


# Whole streams, as servers send them.


def long_answer(**more: Any) -> List[Any]:
    words = [
        " the",
        " cat",
        "\n",
        "你好",
        " 🤖",
        ' "quoted"',
        " back\\slash",
        "\t",
        " \u2028",
        "x" * 300,
        " end",
        "\x7f",
        "é",
    ]
    return [text(word, **more) for word in words * 2]


def annotated(message: Dict[str, Any]) -> Dict[str, Any]:
    message["choices"][0]["content_filter_results"] = FILTER
    return message


USAGE_LAST = {"id": "c1", "choices": [], "usage": counted(9, 26)}
ROLE = chunk({"role": "assistant", "content": ""})
STREAMS: Dict[str, List[Any]] = {
    "openai": [
        chunk({"role": "assistant", "content": ""}, usage=None),
        *long_answer(usage=None),
        chunk({}, "stop", usage=None),
        USAGE_LAST,
        DONE,
    ],
    "openai, obfuscated": [ROLE, *[text("ab", obfuscation=pad) for pad in "abcdefghijkl"], chunk({}, "stop"), DONE],
    "azure": [PREFACE, ROLE, *map(annotated, long_answer()), TRAILER, chunk({}, "stop"), USAGE_LAST, DONE],
    "vllm": [ROLE, *long_answer(), chunk({"content": "!"}, "stop", stop_reason=None), USAGE_LAST, DONE],
    "vllm, continuous usage": [
        *[text("a", usage=counted(9, n)) for n in range(9)],
        chunk({}, "stop", usage=counted(9, 9)),
        DONE,
    ],
    "vllm, reasoning": [ROLE, *[chunk({"reasoning": "hm"})] * 5, *long_answer(), chunk({}, "stop"), DONE],
    "vllm, token ids": [chunk({"content": "ab"}, None, token_ids=[n]) for n in range(9)],
    "sglang": [
        ROLE,
        *[chunk({"role": None, "content": word, "reasoning_content": None, "tool_calls": None}) for word in "abc"],
        chunk({"content": ""}, "stop", matched_stop=2),
        USAGE_LAST,
        DONE,
    ],
    "sglang, empty finish": [
        *[chunk({"content": word}, "") for word in "abcdef"],
        chunk({"content": None}, "stop"),
        DONE,
    ],
    "sglang, aborted": [ROLE, text("a"), ABORTED, USAGE_LAST, DONE],
    "deepseek": [
        chunk({"role": "assistant", "content": None, "reasoning_content": ""}),
        *[chunk({"content": None, "reasoning_content": "hm"})] * 4,
        *[chunk({"content": word, "reasoning_content": None}) for word in ["a", "b", "c c", "🤖"] * 3],
        chunk({"content": "", "reasoning_content": None}, "stop", usage=counted(9, 2)),
        DONE,
    ],
    "litellm, died": [
        *long_answer(),
        {"error": {"message": "Traceback", "type": "None", "param": "None", "code": "500"}},
    ],
    "one-api, cut off": [*long_answer(), DONE],
    "tools": [
        chunk({"role": "assistant", "content": None, "tool_calls": [CALL]}),
        *[chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}) for piece in '{"a": 1}'],
        chunk({}, "tool_calls"),
        USAGE_LAST,
        DONE,
    ],
    "typed parts": [*[chunk({"content": [{"type": "text", "text": word}]}) for word in "abc"], chunk({}, "stop"), DONE],
    "logprobs": [
        *[chunk({"content": word}, None) for word in "abc"],
        *[
            {"choices": [{"delta": {"content": word}, "logprobs": {"content": [{"token": word, "logprob": -1}]}}]}
            for word in "aab"
        ],
    ],
    "two choices": [{"choices": [{"index": n % 2, "delta": {"content": "ab"}}]} for n in range(8)],
    "key twice": [
        b'{"choices":[{"delta":{"content":"%s","content":"zz"}}]}' % word for word in (b"a", b"zz", b"b", b"c")
    ],
    "escaped key": [
        b'{"choices":[{"delta":{"content":"%s","\\u0063ontent":"zz"}}]}' % word for word in (b"zz", b"b", b"c")
    ],
    "blanks in JSON": [
        b'{ "choices" : [ { "delta" : { "content" : "%s" } } ] }' % word for word in (b"a", b"b", b"c", b"")
    ],
    "another key": [b'{"choices":[{"delta":{"content":"%s"}}],"content":"zz"}' % word for word in (b"zz", b"b", b"c")],
    "content elsewhere": [
        b'{"content":"%s","choices":[{"delta":{"content":["zz"]}}]}' % word for word in (b"zz", b"b")
    ],
}
streams = pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())


def plain_length(decoder: Decoder, data: bytes) -> int:
    """Characters that the fast path finds in an event; 0 when it leaves it to the full parse."""
    text = decoder.plain(data)
    return decoder.note_texts([text]) if text else 0


def check_plain(decoder: Decoder, data: bytes) -> int:
    """Holds the promise of `plain` for one event; returns what it said."""
    length = plain_length(decoder, data)
    if length:
        frames = Decoder().frames(("message", data))
        assert len(frames) == 1, data
        assert frames[0].kind == "content", data
        assert len(frames[0].text) == length, data
    return length


@streams
def test_plain_equals_the_full_reading(stream: List[Any]) -> None:
    decoder = Decoder()
    for data in map(encoded, stream * 3):
        fresh = Decoder().frames(("message", data))
        if not check_plain(decoder, data):
            assert decoder.frames(("message", data)) == fresh


@pytest.mark.parametrize("name", ["openai", "azure", "vllm", "sglang, empty finish", "deepseek", "blanks in JSON"])
def test_plain_is_what_most_events_take(name: str) -> None:
    decoder, hits, contents = Decoder(), 0, 0
    for data in map(encoded, STREAMS[name] * 10):
        is_content = [frame.kind for frame in Decoder().frames(("message", data))] == ["content"]
        contents += is_content and b"\\" not in data and b"\x7f" not in data
        hits += bool(check_plain(decoder, data)) or decoder.frames(("message", data)) is None
    assert hits > 0.9 * contents > 0


ALPHABET = [
    b'"',
    b"\\",
    b"\\n",
    b"\\u00e9",
    b"\x00",
    b"\n",
    b"\x1f",
    b"\x7f",
    b"\xff",
    b"\xc3",
    b"\xe2\x80",
    "🤖".encode(),
    b"}",
    b"]",
    b',"content":"x"',
    b'","content":"x',
    b'","refusal":"x',
    b'"},"finish_reason":"stop',
    b"[DONE]",
    b" ",
    b"a",
]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One of: a bit flipped, something put in, a span left out, a span twice, the end cut off."""
    begin = chance.randrange(len(data) + 1)
    span = chance.choice([1, 2, 5, 30])
    return chance.choice(
        [
            data[:begin]
            + bytes(byte ^ 1 << chance.randrange(8) for byte in data[begin : begin + 1])
            + data[begin + 1 :],
            data[:begin] + chance.choice(ALPHABET) + data[begin:],
            data[:begin] + data[begin + span :],
            data[: begin + span] + data[begin:],
            data[:begin],
        ]
    )


def respelled(data: bytes, chance: random.Random) -> bytes:
    """The same event with something put into the middle of its first text."""
    found = Decoder.CONTENT.search(data)
    if not found:
        return data
    middle = chance.randint(found.start(1), found.end(1))
    return data[:middle] + b"".join(chance.choice(ALPHABET) for _ in range(chance.randrange(4))) + data[middle:]


@streams
@pytest.mark.parametrize("change", [mutated, respelled])
def test_plain_equals_the_full_reading_of_broken_events(stream: List[Any], change: Any) -> None:
    chance, events = random.Random(5), [encoded(message) for message in stream]
    for _ in range(6):
        decoder = Decoder()
        for data in events * 2:
            if not check_plain(decoder, data):
                decoder.frames(("message", data))
            for _ in range(8):
                broken = change(data, chance)
                if not check_plain(decoder, broken):
                    with contextlib.suppress(ParseError):
                        decoder.frames(("message", broken))


@pytest.mark.parametrize(
    "data",
    [
        b'{"choices":[{"delta":{"content":"a\xff\xfe"}}]}',
        b'{"choices":[{"delta":{"content":"\xf0\x9f\xa4"}}]}',
        b'{"choices":[{"delta":{"content":"\xed\xa0\x80"}}]}',
        '{"choices":[{"delta":{"content":"你🤖é"}}]}'.encode(),
    ],
)
def test_plain_counts_characters_like_the_full_reading(data: bytes) -> None:
    decoder = Decoder()
    decoder.frames(("message", b'{"choices":[{"delta":{"content":"a"}}]}'))
    assert check_plain(decoder, data) > 0


def test_plain_knows_nothing_before_the_first_lesson() -> None:
    assert plain_length(Decoder(), encoded(text("a"))) == 0


@pytest.mark.parametrize(
    "second",
    [
        encoded(text("")),
        b"[DONE]",
        b"",
        encoded(text("a", usage=counted(1, 1))),
        encoded(chunk({"content": "a"}, "stop")),
        encoded(text("a")).replace(b"content", b"refusal"),
        encoded(text("a")) + b"}",
        b" " + encoded(text("a")),
    ],
)
def test_plain_leaves_everything_else_alone(second: bytes) -> None:
    decoder = Decoder()
    decoder.frames(("message", encoded(text("a"))))
    assert plain_length(decoder, encoded(text("b"))) == 1
    assert plain_length(decoder, second) == 0


def test_head_and_tail_must_not_overlap() -> None:
    decoder = Decoder()
    decoder.frames(("message", b'{"choices":[{"delta":{"content":"a"}}]}'))
    for length in range(50):
        check_plain(decoder, b'{"choices":[{"delta":{"content":"}}]}'[:length])
        check_plain(decoder, b'{"choices":[{"delta":{"content":""}}]}'[:length])


def test_an_event_of_another_type_is_never_learnt() -> None:
    decoder = Decoder()
    decoder.frames(("delta", encoded(text("a"))))
    assert plain_length(decoder, encoded(text("b"))) == 0


def test_lessons_end_where_nothing_is_learnt() -> None:
    decoder, parses = Decoder(), 0
    for n in range(1000):
        data = encoded(text("ab", obfuscation=str(n)))
        assert not decoder.plain(data)
        lessons = decoder._lessons
        decoder.frames(("message", data))
        parses += decoder._lessons - lessons
    assert parses < 10


# The events of a read at once.


def check_run(decoder: Decoder, parser: Callable[[], Any], wire: bytes) -> int:
    """Holds the promise of `run` for bytes that begin with an event; returns how many events it took."""
    texts, rest = decoder.run(wire)
    whole, behind = parser(), parser()
    events = whole.feed(wire)
    taken = events[: len(texts)]
    assert [(kind, decoder.plain(data)) for kind, data in taken] == [("message", text) for text in texts], wire
    assert [decoder.event(text) for text in texts] == taken
    assert behind.feed(rest) == events[len(texts) :], wire
    assert b"".join(behind._pending) == b"".join(whole._pending), wire
    return len(texts)


PARSERS = [SSEParser, NDJSONParser]


def taught(parser: Callable[[], Any], stream: List[Any]) -> Decoder:
    """A decoder that has read a stream in full."""
    decoder = Decoder()
    decoder.line = parser.LINE  # type: ignore[attr-defined]
    for message in stream:
        with contextlib.suppress(ParseError):
            decoder.frames(("message", encoded(message)))
    return decoder


@streams
@pytest.mark.parametrize("parser", PARSERS)
def test_a_run_is_what_the_full_reading_finds(stream: List[Any], parser: Any) -> None:
    chance = random.Random(3)
    begin, end = parser.LINE
    frames = [begin + encoded(message) + end for message in stream]
    alike = [frame for frame in frames if taught(parser, stream).plain(frame[len(begin) : -len(end)])]
    for _ in range(150):
        decoder = taught(parser, stream[: chance.randrange(len(stream) + 1)])
        wire = b"".join(chance.choice(chance.choice([alike, alike, frames]) or frames) for _ in range(9))
        if chance.random() < 0.4:
            wire = chance.choice([mutated, respelled])(wire, chance).lstrip(b"\xef\xbb\xbf").replace(b"\r", b"\n")
        check_run(decoder, parser, wire[: chance.randrange(len(wire) + 1)])
        check_run(decoder, parser, wire)


@pytest.mark.parametrize("parser", PARSERS)
def test_a_run_ends_with_the_first_event_that_is_something_else(parser: Any) -> None:
    begin, end = parser.LINE
    words = [begin + encoded(text(word)) + end for word in ("a", "bc", "你好", "🤖")]
    stop = begin + encoded(chunk({}, "stop")) + end
    decoder = taught(parser, [text("a")])
    for count in range(1, 5):
        wire = b"".join(words[:count])
        assert check_run(decoder, parser, wire) == count
        assert check_run(decoder, parser, wire + stop + stop) == count
        for cut in range(1, len(stop)):
            assert check_run(decoder, parser, wire + words[0][:cut]) == count
    assert check_run(decoder, parser, stop + words[0]) == 0
    assert check_run(decoder, parser, b"") == 0


@pytest.mark.parametrize("word", ['"', "\\", "\n", "", "\x7f", '"}}]}\n\ndata: {"choices":[{"delta":{"content":"'])
def test_a_text_that_is_not_plain_ends_no_run_it_prevents_it(word: str) -> None:
    wire = b"".join(b"data: " + encoded(text(word)) + b"\n\n" for word in ("a", word, "b"))
    assert check_run(taught(SSEParser, [text("a")]), SSEParser, wire) == 0


def declared(**form: Any) -> llmbench.Form:
    """A provider that a file declares."""
    return llmbench.parse_form(json.dumps({"body": {"q": "${prompt}"}, "text": ["t"], **form}).encode(), "gw.json")


def test_an_end_by_the_beginning_of_its_data_is_seen_behind_texts() -> None:
    decoder = llmbench.DeclaredDecoder(declared(end=[{"data": '{"t":"STOP'}]).reading)
    assert decoder.frames(("message", b'{"t":"a"}')) == [content("a")]
    assert decoder.plain(b'{"t":"STOP"}') == b""
    assert decoder.frames(("message", b'{"t":"STOP"}'))[-1].kind == "end"


def test_a_text_that_is_left_out_teaches_nothing() -> None:
    decoder = llmbench.DeclaredDecoder(declared(event="e", text_events=["piece", "all"]).reading)
    assert decoder.frames(("message", b'{"e":"piece","t":"Hi"}')) == [content("Hi")]
    for _ in range(2):  # the whole text so far, again
        whole = b'{"e":"all","t":"Hi"}'
        assert decoder.plain(whole) == b""
        assert decoder.frames(("message", whole)) == [META]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"text":["\\ud800"],"body":{}}', "half of a surrogate pair"),
        (b'{"text":["t"],"body":{"\\udfff":1}}', "half of a surrogate pair"),
        (b'{"text":["t"],"body":' + b'{"a":' * 500 + b"1" + b"}" * 501, "nested too deeply"),
        (b'{"text":["t"],"body":{"a":' + b"[" * 500 + b"]" * 500 + b"}}", "nested too deeply"),
        (b'{"text":["t"],"body":{"a":NaN}}', "is not JSON"),
    ],
)
def test_what_a_file_may_not_hold_is_one_line(data: bytes, said: str) -> None:
    with pytest.raises(UserError, match="^gw.json .*" + said) as caught:
        llmbench.parse_form(data, "gw.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("test", [{"equals": {"t": "STOP"}}, {"not_equals": [1]}, {"in": [1, {}]}, {"not_in": [[]]}])
def test_a_rule_compares_no_objects(test: Any) -> None:
    with pytest.raises(UserError, match="write the path down to one"):
        declared(end=[{"path": "d", **test}])


def test_what_was_learnt_of_several_lines_is_no_run() -> None:
    decoder, data = taught(SSEParser, [text("a")]), json.dumps(text("a"), indent=1).encode()
    line = b"data: " + encoded(text("a")) + b"\n\n"
    assert check_run(decoder, SSEParser, line) == 1
    decoder.frames(("message", data))
    assert decoder.plain(data) == b"a"
    assert check_run(decoder, SSEParser, line) == 0
    wire = b"data: " + data.replace(b"\n", b"\ndata: ") + b"\n\n"
    assert check_run(decoder, SSEParser, wire) == 0
    assert check_run(decoder, SSEParser, b"data: " + data + b"\n\n") == 0


# Ten thousand broken answers.


def body_of(stream: List[Any], chance: random.Random) -> bytes:
    """A stream as a body: one line end or another, with and without the space, keep-alives in between."""
    blank = chance.choice([b"\n\n", b"\r\n\r\n", b"\r\r"])
    name = chance.choice([b"data: ", b"data:"])
    events = [
        chance.choice([b"", b"", b": keep-alive" + blank]) + name + encoded(message) + blank for message in stream
    ]
    return b"".join(events)


def response(body: bytes, chance: random.Random) -> bytes:
    """A full answer on the wire, framed in one of four ways."""
    framing = chance.choice(["chunked", "chunked", "length", "close", "deflate"])
    early = chance.choice([b"", b"", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"])
    start = early + b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    if framing == "deflate":
        body, start = zlib.compress(body), start + b"Content-Encoding: deflate\r\n"
    if framing != "chunked":
        return start + (b"Content-Length: %d\r\n" % len(body) if framing == "length" else b"") + b"\r\n" + body
    size = chance.choice([7, 200, 5000])
    chunks = [body[begin : begin + size] for begin in range(0, len(body), size)]
    return (
        start
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in chunks)
        + b"0\r\n\r\n"
    )


def pieces_of(wire: bytes, size: int) -> List[bytes]:
    return [wire[begin : begin + size] for begin in range(0, len(wire), size)]


def read_response(pieces: List[bytes]) -> List[Frame]:
    """Bytes to frames, the way a connection's reads go through; raises ParseError or Truncated."""
    reader, parser, decoder = ResponseReader(), SSEParser(), Decoder()
    frames: List[Frame] = []
    for piece in pieces:
        for event in parser.feed(reader.feed(piece)):
            length = plain_length(decoder, event[1]) if event[0] == "message" else 0
            frames += [content("?" * length)] if length else decoder.frames(event)
    reader.end()
    for event in parser.tail():
        frames += decoder.frames(event)
    return frames


def totals(frames: List[Frame]) -> List[Tuple[str, int]]:
    """Frames without the texts, which `plain` does not give."""
    return [(frame.kind, len(frame.text)) for frame in frames]


@streams
def test_a_response_reads_the_same_whatever_the_reads(stream: List[Any]) -> None:
    chance = random.Random(7)
    expected = totals([frame for data in map(encoded, stream) for frame in Decoder().frames(("message", data))])
    for _ in range(8):
        wire = response(body_of(stream, chance), chance)
        for size in (1, 3, 100, len(wire)):
            assert totals(read_response(pieces_of(wire, size))) == expected


def test_ten_thousand_broken_responses_raise_nothing_else() -> None:
    chance = random.Random(11)
    corpus = [response(body_of(stream[:12], chance), chance) for stream in STREAMS.values() for _ in range(3)]
    outcomes: Dict[str, int] = {}
    for number in range(10000):
        wire = mutated(corpus[number % len(corpus)], chance)
        for _ in range(chance.choice([0, 0, 0, 3])):
            wire = mutated(wire, chance)
        try:
            read_response(pieces_of(wire, chance.choice([1000, 1000, 100000, 64, 17])))
            outcome = "read"
        except (ParseError, Truncated) as caught:
            outcome = type(caught).__name__
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert min(outcomes.values()) > 500, outcomes  # each of the three outcomes is met often
    assert len(outcomes) == 3


# Where a URL points.


class Site(NamedTuple):
    """A URL, and the endpoint that it means: scheme, host, port, target, Host header, user:password."""

    url: str
    endpoint: Tuple[str, str, int, str, str, Optional[str]]


CHAT = "/v1/chat/completions"
SITES = [
    Site("http://h", ("http", "h", 80, CHAT, "h", None)),
    Site("http://h/", ("http", "h", 80, CHAT, "h", None)),
    Site("https://h", ("https", "h", 443, CHAT, "h", None)),
    Site("HTTPS://API.Example.COM", ("https", "api.example.com", 443, CHAT, "api.example.com", None)),
    Site("http://h:8000", ("http", "h", 8000, CHAT, "h:8000", None)),
    Site("http://h:", ("http", "h", 80, CHAT, "h", None)),
    Site("http://h:80", ("http", "h", 80, CHAT, "h", None)),
    Site("https://h:443", ("https", "h", 443, CHAT, "h", None)),
    Site("https://h:80", ("https", "h", 80, CHAT, "h:80", None)),
    Site("http://h:443", ("http", "h", 443, CHAT, "h:443", None)),
    Site("http://10.0.0.1:8000/v1", ("http", "10.0.0.1", 8000, CHAT, "10.0.0.1:8000", None)),
    Site("http://[::1]", ("http", "::1", 80, CHAT, "[::1]", None)),
    Site("http://[fe80::1]:8000/v1", ("http", "fe80::1", 8000, CHAT, "[fe80::1]:8000", None)),
    # A path that ends in /vN.
    Site("http://h/v1", ("http", "h", 80, CHAT, "h", None)),
    Site("http://h/v1/", ("http", "h", 80, CHAT, "h", None)),
    Site("http://h/api/v3", ("http", "h", 80, "/api/v3/chat/completions", "h", None)),
    Site("http://h/compatible-mode/v1//", ("http", "h", 80, "/compatible-mode/v1/chat/completions", "h", None)),
    Site("http://h/v12?k=1", ("http", "h", 80, "/v12/chat/completions?k=1", "h", None)),
    # Any other path is taken as it is.
    Site("http://h" + CHAT, ("http", "h", 80, CHAT, "h", None)),
    Site("http://h/v1beta", ("http", "h", 80, "/v1beta", "h", None)),
    Site("http://h/v1x/", ("http", "h", 80, "/v1x/", "h", None)),
    Site("http://h/generate/", ("http", "h", 80, "/generate/", "h", None)),
    Site("http://h/a%20b", ("http", "h", 80, "/a%20b", "h", None)),
    # Queries stay, fragments don't.
    Site("http://h?a=b", ("http", "h", 80, CHAT + "?a=b", "h", None)),
    Site("http://h/x?api-version=2024&a=%2F", ("http", "h", 80, "/x?api-version=2024&a=%2F", "h", None)),
    Site("http://h/v1#part", ("http", "h", 80, CHAT, "h", None)),
    # user:password.
    Site("http://u:p@h", ("http", "h", 80, CHAT, "h", "u:p")),
    Site("http://u@h", ("http", "h", 80, CHAT, "h", "u:")),
    Site("http://u%40x:p%3A%2F@h:1", ("http", "h", 1, CHAT, "h:1", "u@x:p:/")),
    Site("http://u:p@q@h", ("http", "h", 80, CHAT, "h", "u:p@q")),
]


@pytest.fixture
def provider() -> Provider:
    return Provider(Config(model="m"))


@pytest.mark.parametrize("site", SITES, ids=[site.url for site in SITES])
def test_where_a_url_points(provider: Provider, site: Site) -> None:
    assert parse_url(site.url, provider) == (*site.endpoint, None)  # no Unix socket


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://u:pw@h:8000/v1", "http://h:8000/v1/chat/completions"),
        ("https://h?a=b", "https://h/v1/chat/completions?a=b"),
    ],
)
def test_an_endpoint_shows_its_url_without_password(provider: Provider, url: str, shown: str) -> None:
    assert parse_url(url, provider).url == shown


BAD_URLS = [
    "",
    "h",
    "h:8000",
    "h/v1",
    "/v1",
    "mock:",
    "ftp://h",
    "file:///etc/passwd",
    "http://",
    "http:///v1",
    "http://:80",
    "http://h:x",
    "http://h:65536",
    "http://h:-1",
    "http://h/a b",
    "http://h/\r\nX-Evil: 1",
    "http://h\n",
    " http://h",
    "http://h/\x00",
    "http://h/\x7f",
    "http://h/\ta",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_bad_url_is_one_line(provider: Provider, url: str) -> None:
    with pytest.raises(UserError, match="--url") as caught:
        parse_url(url, provider)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://[::1", "http://::1]", "http://h\u2100"])
def test_a_url_that_urlsplit_refuses_is_one_line(provider: Provider, url: str) -> None:
    with pytest.raises(UserError):
        parse_url(url, provider)


def test_port_0_is_refused(provider: Provider) -> None:
    with pytest.raises(UserError):
        parse_url("http://h:0", provider)


@pytest.mark.parametrize("url", ["user:hunter2@h/v1", "hunter2"])
def test_a_mistyped_url_is_not_echoed(provider: Provider, url: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_url(url, provider)
    assert "hunter2" not in str(caught.value)


# The request.

PROMPT = Prompt("p1", [{"role": "user", "content": "你好"}])


def make_request(
    url: str = "http://h:8000/v1", prompt: Prompt = PROMPT, **config: Any
) -> Tuple[Any, Dict[str, str], Any]:
    """The request, its headers and its decoded body."""
    provider = make_provider(Config(model="m", **config))
    request = provider.request(prompt, parse_url(url, provider), "run-0-1", provider.dialect)
    assert len({name.lower() for name, _ in request.headers}) == len(request.headers)
    return request, dict(request.headers), json.loads(request.body)


def test_the_request_of_a_prompt() -> None:
    request, headers, body = make_request(token="sk-1")
    assert request.target == CHAT
    assert body == {
        "model": "m",
        "messages": PROMPT.messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 256,
    }
    assert headers.pop("User-Agent").startswith("llmbench/")
    assert headers == {
        "Host": "h:8000",
        "Accept": "text/event-stream",
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
        "Content-Length": str(len(request.body)),
        "X-Request-Id": "run-0-1",
        "Authorization": "Bearer sk-1",
    }
    wire = encode_request("POST", request.target, request.headers, request.body)
    assert wire.endswith(b"\r\n\r\n" + request.body)
    assert "你好".encode() in request.body


def basic(userinfo: str) -> str:
    return "Basic " + base64.b64encode(userinfo.encode()).decode()


@pytest.mark.parametrize(
    ("url", "config", "value"),
    [
        ("http://h", {}, None),
        ("http://h", {"token": "t"}, "Bearer t"),
        ("http://u:p%C3%A9@h", {}, basic("u:pé")),
        ("http://u:p@h", {"token": "t"}, "Bearer t"),
        ("http://u:p@h", {"header": ["authorization: Key k"]}, "Key k"),
        ("http://h", {"token": "t", "header": ["Authorization: Key k"]}, "Key k"),
        ("http://h", {"token": "t", "header": ["Authorization:"]}, None),
    ],
)
def test_which_authorization_is_sent(url: str, config: Dict[str, Any], value: Optional[str]) -> None:
    _, headers, _ = make_request(url, **config)
    found = [text for name, text in headers.items() if name.lower() == "authorization"]
    assert found == ([] if value is None else [value])


@pytest.mark.parametrize(
    ("config", "limit", "field", "value"),
    [
        ({}, None, "max_tokens", 256),
        ({}, 7, "max_tokens", 7),
        ({"max_tokens": 20}, None, "max_tokens", 20),
        ({"max_tokens": 20}, 7, "max_tokens", 7),
        ({"max_tokens_field": "max_completion_tokens"}, None, "max_completion_tokens", 256),
        ({"body": {"max_tokens": 3}}, 7, "max_tokens", 3),
    ],
)
def test_how_long_the_answer_may_be(config: Dict[str, Any], limit: Optional[int], field: str, value: int) -> None:
    _, _, body = make_request(prompt=Prompt("p", [], limit), **config)
    assert {key: body[key] for key in body if key.startswith("max_")} == {field: value}


def test_body_is_merged_over_ours() -> None:
    over = {"temperature": 0, "stream_options": {"continuous_usage_stats": True}, "max_tokens": None, "x": {"y": [1]}}
    _, _, body = make_request(body=over)
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert body["temperature"] == 0
    assert body["x"] == {"y": [1]}
    assert "max_tokens" not in body
    assert over == {
        "temperature": 0,
        "stream_options": {"continuous_usage_stats": True},
        "max_tokens": None,
        "x": {"y": [1]},
    }
    assert make_request(body={"stream_options": None})[2].get("stream_options") is None


def test_lone_surrogates_of_a_prompt_do_not_stop_the_run() -> None:
    provider = make_provider(Config(model="m"))
    prompt = Prompt("p", [{"role": "user", "content": "a\ud800b"}])
    request = provider.request(prompt, parse_url("http://h", provider), "r", provider.dialect)
    assert dict(request.headers)["Content-Length"] == str(len(request.body))


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://h", "/v1/models"),
        ("http://h/v1", "/v1/models"),
        ("http://h/api/v3?k=1", "/api/v3/models"),
        ("http://h/a/chat/completions", "/a/models"),
        ("http://h/generate", "/v1/models"),
    ],
)
def test_where_the_models_are_listed(provider: Provider, url: str, target: str) -> None:
    assert provider.models_target(parse_url(url, provider)) == target


def test_providers_are_found_by_name() -> None:
    for name, make in PROVIDERS.items():
        assert make(Config()).name == name
    with pytest.raises(UserError, match="did you mean openai"):
        make_provider(Config(provider="opnai"))


MERGES: List[Tuple[Dict, Dict, Dict]] = [
    ({}, {}, {}),
    ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
    ({"a": 1}, {"a": 2}, {"a": 2}),
    ({"a": 1}, {"a": None}, {}),
    ({}, {"a": None}, {}),
    ({"a": {"b": 1, "c": 2}}, {"a": {"b": 9}}, {"a": {"b": 9, "c": 2}}),
    ({"a": {"b": 1, "c": 2}}, {"a": {"b": None}}, {"a": {"c": 2}}),
    ({"a": {"b": 1}}, {"a": 1}, {"a": 1}),
    ({"a": 1}, {"a": {"b": 1}}, {"a": {"b": 1}}),
    ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
    ({"a": {"b": {"c": 1}}}, {"a": {"b": {"d": 2}}}, {"a": {"b": {"c": 1, "d": 2}}}),
    ({"a": 1}, {"a": False}, {"a": False}),
    ({"a": 1}, {"a": 0}, {"a": 0}),
]


@pytest.mark.parametrize(("tree", "over", "merged"), MERGES)
def test_merge(tree: Dict, over: Dict, merged: Dict) -> None:
    tree = json.loads(json.dumps(tree))
    merge(tree, over)
    assert tree == merged


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], [("Host", "h"), ("Accept", "a")]),
        (["X: y"], [("Host", "h"), ("Accept", "a"), ("X", "y")]),
        (["X:y:z "], [("Host", "h"), ("Accept", "a"), ("X", "y:z")]),
        (["accept: b"], [("Host", "h"), ("accept", "b")]),
        (["HOST: i", "Accept:"], [("HOST", "i")]),
        (["X: 1", "x: 2"], [("Host", "h"), ("Accept", "a"), ("x", "2")]),
        (["Absent:"], [("Host", "h"), ("Accept", "a")]),
    ],
)
def test_replace_headers(lines: List[str], expected: List[Tuple[str, str]]) -> None:
    assert replace_headers([("Host", "h"), ("Accept", "a")], lines) == expected


@pytest.mark.parametrize(
    "line", ["", "hunter2", ": hunter2", "a b: hunter2", "X\r\nY: hunter2", "模型: hunter2", "(x): hunter2"]
)
def test_a_bad_header_line_is_not_echoed(line: str) -> None:
    with pytest.raises(UserError) as caught:
        replace_headers([], [line])
    assert "hunter2" not in str(caught.value)


def test_a_header_line_cannot_bring_a_second_header() -> None:
    headers = replace_headers([], ["X-A: a\r\nX-Evil: 1"])
    with pytest.raises(UserError):
        encode_request("POST", "/", headers)


# The fields that an endpoint may refuse.

PLEASE_SWAP = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)


def fields(dialect: Optional[Dialect]) -> Optional[Tuple[bool, str, int]]:
    return dialect and (dialect.stream_options, dialect.max_tokens_field, dialect.version)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"detail": "Extra inputs are not permitted: stream_options"}', (False, "max_tokens", 1)),
        (PLEASE_SWAP, (True, "max_completion_tokens", 1)),
        ("max_tokens is too large", (True, "max_completion_tokens", 1)),
        ("Bad Request", (False, "max_tokens", 1)),
        ("", (False, "max_tokens", 1)),
    ],
)
def test_what_is_given_up_after_a_400(body: str, expected: Tuple[bool, str, int]) -> None:
    dialect = Dialect()
    other = dialect.without(body)
    assert fields(other) == expected
    assert fields(dialect) == (True, "max_tokens", 0)  # only a probe that worked changes it
    assert (len(other.notes), dialect.notes) == (1, [])


def test_each_field_is_given_up_once() -> None:
    dialect = Dialect()
    seen = []
    for body in [PLEASE_SWAP, "stream_options", PLEASE_SWAP, "stream_options", ""]:
        other = dialect.without(body)
        seen.append(fields(other))
        if other:
            dialect.adopt(other)
    assert seen == [(True, "max_completion_tokens", 1), (False, "max_completion_tokens", 2), None, None, None]
    assert len(dialect.notes) == 2
    assert fields(dialect) == (False, "max_completion_tokens", 2)


def test_a_probe_that_failed_is_not_repeated() -> None:
    dialect = Dialect()
    assert fields(dialect.without(PLEASE_SWAP)) == (True, "max_completion_tokens", 1)
    assert fields(dialect.without(PLEASE_SWAP)) == (False, "max_tokens", 1)
    assert dialect.without(PLEASE_SWAP) is None
    assert fields(dialect) == (True, "max_tokens", 0)


def test_the_users_own_spelling_is_not_given_up() -> None:
    assert fields(Dialect("max_tokens").without(PLEASE_SWAP)) == (False, "max_tokens", 1)


def test_the_dialect_shapes_the_body(provider: Provider) -> None:
    dialect = provider.dialect.without("stream_options").without(PLEASE_SWAP)
    assert "stream_options" not in provider.body(PROMPT, dialect)
    assert "max_completion_tokens" in provider.body(PROMPT, dialect)
    assert "stream_options" in provider.body(PROMPT, provider.dialect)


# <think> … </think>.

THOUGHTS = [
    # whole content, its reasoning, its content
    ("<think>hm</think>Hi", "hm", "Hi"),
    ("<think>hm</think>\n\nHi", "hm", "\n\nHi"),
    ("\n <think>\nhm\n</think>Hi", "\nhm\n", "Hi"),
    ("<think></think>Hi", "", "Hi"),
    ("<think>hm</think>", "hm", ""),
    ("<think>a</b</think>Hi", "a</b", "Hi"),
    ("<think>a<</think>Hi", "a<", "Hi"),
    ("<think>a</think</think>Hi", "a</think", "Hi"),
    ("<think>never closed", "never closed", ""),
    ("<think>never closed</thi", "never closed</thi", ""),
    ("<think>a</think>b<think>c</think>d", "a", "b<think>c</think>d"),
    ("<think><think>a</think>b", "<think>a", "b"),
    ("Hi", "", "Hi"),
    ("Hi <think>no</think>", "", "Hi <think>no</think>"),
    ("<thing>", "", "<thing>"),
    ("<think", "", "<think"),
    ("<", "", "<"),
    ("< think>", "", "< think>"),
    ("<Think>a</Think>", "", "<Think>a</Think>"),
    ("<thinking>a", "", "<thinking>a"),
    ("\n\n Hi", "", "\n\n Hi"),
    ("  \n", "", "  \n"),
    ("</think>Hi", "", "</think>Hi"),
    ("<think>你🤖</think>好", "你🤖", "好"),
]
thoughts = pytest.mark.parametrize(("whole", "thought", "answer"), THOUGHTS, ids=[repr(row[0]) for row in THOUGHTS])


def every_split(whole: str) -> Iterator[List[str]]:
    """In one piece, at every place in two and in three, letter by letter."""
    yield [whole]
    yield list(whole)
    for cut in range(1, len(whole)):
        yield [whole[:cut], whole[cut:]]
    for first, second in itertools.combinations(range(1, len(whole)), 2):
        yield [whole[:first], whole[first:second], whole[second:]]


def split_thoughts(pieces: List[str], mode: str = "auto") -> List[Tuple[Frame, float]]:
    """Piece k arrives at 10 + k."""
    tags = ThinkTags(mode)
    frames: List[Tuple[Frame, float]] = []
    for index, piece in enumerate(pieces):
        frames += [(content(piece), 10.0 + index)] if tags.settled else tags.feed(piece, 10.0 + index)
    return frames + tags.rest()


def text_in(frames: List[Tuple[Frame, float]], kind: str) -> str:
    return "".join(frame.text for frame, _ in frames if frame.kind == kind)


def arrival_of(pieces: List[str], position: int) -> float:
    """When the letter at this place of the whole arrived."""
    ends = list(itertools.accumulate(len(piece) for piece in pieces))
    return 10.0 + next(index for index, total in enumerate(ends) if position < total)


@thoughts
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_thoughts_at_every_split(whole: str, thought: str, answer: str, mode: str) -> None:
    for pieces in every_split(whole):
        frames = split_thoughts(pieces, mode)
        assert text_in(frames, "reasoning") == thought, pieces
        assert text_in(frames, "content") == answer, pieces
        assert all(frame.text for frame, _ in frames), pieces


@thoughts
def test_the_first_content_keeps_its_time_at_every_split(whole: str, thought: str, answer: str) -> None:
    for pieces in every_split(whole):
        times = [arrived for frame, arrived in split_thoughts(pieces) if frame.kind == "content"]
        assert times[:1] == ([arrival_of(pieces, len(whole) - len(answer))] if answer else []), pieces


@thoughts
def test_times_never_run_backwards(whole: str, thought: str, answer: str) -> None:
    for pieces in every_split(whole):
        times = [arrived for _, arrived in split_thoughts(pieces)]
        assert times == sorted(times), pieces


def test_the_first_thought_keeps_its_time() -> None:
    for pieces in every_split("<think>hm</think>Hi"):
        times = [arrived for frame, arrived in split_thoughts(pieces) if frame.kind == "reasoning"]
        assert times[0] == arrival_of(pieces, len("<think>")), pieces


def test_a_thought_that_begins_like_the_closing_tag_keeps_its_time() -> None:
    frames = split_thoughts(["<think>", "</", "b", "</think>Hi"])
    assert text_in(frames, "reasoning") == "</b"
    assert frames[0][1] == 11.0


def test_what_was_held_back_stays_a_frame_of_its_own() -> None:
    assert split_thoughts(["\n", "\n", "Hi"])[-1] == (content("Hi"), 12.0)


@pytest.mark.parametrize("whole", [row[0] for row in THOUGHTS])
def test_off_leaves_content_alone(whole: str) -> None:
    assert ThinkTags("off").settled
    assert split_thoughts([whole], "off") == [(content(whole), 10.0)]


@pytest.mark.parametrize("pieces", [[" "] * 20000, [" " * 20000] * 20, ["<think", *[">"] * 3]])
def test_blanks_without_end_are_content(pieces: List[str]) -> None:
    """20,000 held pieces that are joined for each new one are a minute; so many blanks begin no thought."""
    frames = split_thoughts(pieces)
    assert "".join(frame.text for frame, _ in frames) == "".join(pieces).replace("<think>", "")
    assert [arrived for _, arrived in frames] == sorted(arrived for _, arrived in frames)


def test_settled_as_soon_as_nothing_can_change() -> None:
    for pieces, settled in [
        (["Hi"], True),
        (["<"], False),
        (["<", "b"], True),
        (["<think>a"], False),
        (["<think>a</think>"], True),
        (["\n"], False),
        (["\n", "H"], True),
    ]:
        tags = ThinkTags("auto")
        for piece in pieces:
            assert not tags.settled
            tags.feed(piece, 1.0)
        assert tags.settled is settled


# Answers of an exact length.


def asked(dialect, **given):
    config = llmbench.Config(model="m", **given)
    prompt = llmbench.Prompt("p", [{"role": "user", "content": "Hi"}], given.get("own"))
    return llmbench.Provider(config).body(prompt, dialect)


def test_an_exact_length_is_asked_for_with_the_fields_that_servers_have_for_it():
    dialect = llmbench.Dialect()
    assert "min_tokens" not in asked(dialect)
    body = asked(dialect, output_tokens=64)
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == (64, 64, True)


@pytest.mark.parametrize("body,left", [
    ("Unrecognized request argument supplied: ignore_eos", {"min_tokens": 64}),
    ("min_tokens: Extra inputs are not permitted", {"ignore_eos": True}),
    ("ignore_eos and min_tokens are not permitted", {}),
])  # fmt: skip
def test_a_field_for_an_exact_length_is_given_up_where_it_is_refused(body, left):
    dialect = llmbench.Dialect()
    asked(dialect, output_tokens=64)
    other = dialect.without(body)
    sent = asked(other, output_tokens=64)
    assert {name: sent[name] for name in ("min_tokens", "ignore_eos") if name in sent} == left
    assert other.version == 1 and "may come back shorter" in other.notes[0]
    assert sent["stream_options"], "what was not named is kept"


def test_a_refusal_that_names_nothing_gives_them_up_after_stream_options():
    dialect = llmbench.Dialect()
    asked(dialect, output_tokens=64)
    first = dialect.without("bad request")
    assert "stream_options" not in asked(first, output_tokens=64) and "ignore_eos" in asked(first, output_tokens=64)
    second = first.without("bad request")
    assert {"ignore_eos", "min_tokens"}.isdisjoint(asked(second, output_tokens=64))
    assert second.without("bad request") is None


def test_a_run_that_wants_no_exact_length_has_no_such_field_to_give_up():
    dialect = llmbench.Dialect()
    asked(dialect)
    assert dialect.without("bad request").without("bad request") is None


def test_a_copy_of_a_dialect_that_wants_an_exact_length_takes_nothing_from_the_original():
    dialect = llmbench.Dialect()
    assert dialect.copy().exact_fields() == dialect.exact_fields() == tuple(llmbench.EXACT_FIELDS)
    given_up = dialect.without("min_tokens is not known")
    assert given_up.copy().exact_fields() == given_up.exact_fields() == ("ignore_eos",)
