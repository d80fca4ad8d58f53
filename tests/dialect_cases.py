"""Reads tests/dialects/NAME.txt: what the endpoints of a provider send, and what a record has to say of it.

A file begins with comments, `absent CASE: why there is none` and `framing: ndjson`; then come cases:

    === normal                  CASE, or CASE: more words
    # a comment
    text: Hello                 expected, a line each: JSON, or plain text
    ---
    HTTP/1.1 200 OK             the head, when it is not that of a stream
                                then the body as it is on the wire

`eol: crlf`: its lines end so; `cut: true`: the body is cut short; `unterminated: true`: its last line end is missing;
`whole: true`: the answer to a request for no stream.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

FOLDER = Path(__file__).parent / "dialects"
REQUIRED = ["normal", "reasoning", "tool", "usage", "end", "truncated", "error before", "error inside", "whole"]
KEYS = {
    "status", "err", "text", "reasoning", "tool", "finish", "tokens", "chunks", "ttfe", "ttft", "latency",
    "eol", "cut", "unterminated", "whole",
}  # fmt: skip


class Case(NamedTuple):
    """One answer: its provider and name, what to expect, the head's lines and the body."""

    provider: str
    name: str
    expected: Dict[str, Any]
    head: List[str]
    body: bytes
    ndjson: bool

    @property
    def kind(self) -> str:
        """Which of REQUIRED it is."""
        return self.name.split(":")[0]

    @property
    def streamed(self) -> bool:
        """Whether its body is a stream of events under 200."""
        return not self.head

    @property
    def blocks(self) -> List[bytes]:
        """The body's events, a comment that stands alone among them."""
        if self.ndjson:
            return re.findall(b"[^\n]+\n?", self.body)
        end = b"\r\n" if self.expected.get("eol") == "crlf" else b"\n"
        pieces = re.split(b"(?<=" + end + end + b")", self.body)
        return [piece for piece in pieces if piece]

    @property
    def response_head(self) -> bytes:
        """The head on the wire, without what frames the body."""
        kind = "application/x-ndjson" if self.ndjson else "text/event-stream; charset=utf-8"
        return "\r\n".join(self.head or ["HTTP/1.1 200 OK", "Content-Type: " + kind]).encode() + b"\r\n"


class Dialect(NamedTuple):
    """All that is written down of a provider."""

    name: str
    absent: Dict[str, str]
    cases: List[Case]


def read_value(text: str) -> Any:
    """JSON, or the text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_case(provider: str, title: str, text: str, ndjson: bool) -> Case:
    """One case of a file."""
    above, _, wire = text.partition("---\n")
    lines = [line for line in above.split("\n") if line and not line.startswith("#")]
    expected = {}
    for line in lines:
        key, colon, value = line.partition(": ")
        assert colon and key in KEYS, "%s, %s: %r" % (provider, title, line)
        # Text with a number's or JSON's look is text all the same.
        expected[key] = value if key in ("text", "reasoning", "tool", "err", "finish") else read_value(value)
    head: List[str] = []
    if wire.startswith("HTTP/"):
        top, _, wire = wire.partition("\n\n")
        head, wire = top.split("\n"), wire.rstrip("\n")
    if expected.get("unterminated"):
        wire = wire.rstrip("\n")
    elif ndjson and not head:
        wire = wire.rstrip("\n") + "\n"
    body = wire.encode()
    if expected.get("eol") == "crlf":
        body = body.replace(b"\n", b"\r\n")
    return Case(provider, title, expected, head, body, ndjson)


def read_dialect(path: Path) -> Dialect:
    """One file."""
    preface, *rest = re.split(r"^=== (.*)\n", path.read_text(encoding="utf-8"), flags=re.M)
    absent = dict(re.findall(r"^absent ([a-z ]+): (.*)$", preface, flags=re.M))
    ndjson = "\nframing: ndjson\n" in preface
    cases = [read_case(path.stem, title, text, ndjson) for title, text in zip(rest[::2], rest[1::2])]
    return Dialect(path.stem, absent, cases)


DIALECTS = {path.stem: read_dialect(path) for path in sorted(FOLDER.glob("*.txt"))}
CASES = [case for dialect in DIALECTS.values() for case in dialect.cases]
