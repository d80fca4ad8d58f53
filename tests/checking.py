"""Runs `llmbench check` in this process, and a chat endpoint whose every answer can be replaced."""

from __future__ import annotations

import contextlib
import io
import json
import time
from typing import Any

from servers import DONE, LAST_CHUNK, Behaviour, Peer, Request, answer, chunk, event

import llmbench

MODELS = {"object": "list", "data": [{"id": "tiny"}, {"id": "large"}]}
PAUSE = 0.015  # s between two frames
FRAMES = 12
OPEN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n%sTransfer-Encoding: chunked\r\n\r\n"


class Checked:
    """What a check said: its exit status, its JSON document or its lines."""

    def __init__(self, *words: str) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            self.status = llmbench.main(["check", *words])
        self.out, self.err = out.getvalue(), err.getvalue()
        self.document: dict[str, Any] = json.loads(self.out) if "--json" in words and self.out else {}

    @property
    def steps(self) -> list[str]:
        return [finding["step"] for finding in self.document["findings"]]

    def finding(self, step: str) -> dict[str, Any]:
        """What it found at a step, which it must have told once."""
        found = [finding for finding in self.document["findings"] if finding["step"] == step]
        assert len(found) == 1, (step, self.out, self.err)
        return found[0]

    def at(self, step: str) -> tuple[str, str]:
        """State and key of a step's finding."""
        finding = self.finding(step)
        return finding["state"], finding["key"]


def check(url: str, *words: str) -> Checked:
    """A check of that URL as a document."""
    return Checked("--url", url, "--json", "--connect-timeout", "5", "--timeout", "20", *words)


def tool_call(name: str = "get_weather", arguments: str = '{"city": "Paris"}') -> list[bytes]:
    """The events of a call."""
    first = {"index": 0, "id": "c1", "type": "function", "function": {"name": name, "arguments": ""}}
    rest = {"index": 0, "function": {"arguments": arguments}}
    deltas = [{"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]} for call in (first, rest)]
    return [b"data: " + json.dumps(delta).encode() + b"\n\n" for delta in deltas]


def counted(tokens: int, prompt: int = 9) -> bytes:
    """The event with the token counts, as vLLM sends it."""
    counts = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


def role() -> bytes:
    """The frame that OpenAI's dialect begins with."""
    return b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'


def words_of(request: Request) -> list[bytes]:
    """The events of a good answer to that request: as long as it was asked to be, a call when it brings a tool."""
    fields = request.fields
    if "tools" in fields:
        return [role(), *tool_call(), event(finish="tool_calls"), counted(7), DONE]
    count = fields.get("min_tokens") or FRAMES
    finish = event(finish="length" if "min_tokens" in fields else "stop")
    texts = [event("w%d " % number) for number in range(count)]
    return [role(), *texts, finish, counted(count), DONE]


def stream(peer: Peer, events: list[bytes], headers: bytes = b"", pause: float = PAUSE) -> None:
    """A chunked stream whose frames keep their distance."""
    peer.send(OPEN % headers)
    for number, text in enumerate(events):
        if number:
            time.sleep(pause)
        peer.send(chunk(text))
    peer.send(LAST_CHUNK)


def good(peer: Peer, request: Request) -> None:
    """An endpoint as one wants it."""
    if request.path.endswith("/models"):
        peer.send(answer(200, MODELS, "Content-Type: application/json"))
    else:
        asked = {"tools", "ignore_eos"} & set(request.fields)
        stream(peer, words_of(request), pause=0.0 if asked else PAUSE)


def endpoint(**behaviours: Behaviour) -> Behaviour:
    """A good endpoint, save for what is named: models, stream, exact, tool."""

    def behave(peer: Peer, request: Request) -> None:
        kind = "models" if request.path.endswith("/models") else "stream"
        if kind == "stream":
            kind = "tool" if "tools" in request.fields else "exact" if "ignore_eos" in request.fields else "stream"
        behaviours.get(kind, good)(peer, request)

    return behave
