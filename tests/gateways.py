"""Gateways that check signatures on their side, each by an implementation of its own from the request as it came.

A `Gateway` is a `Server` whose behaviour asks a verifier first; what it complains of is answered with 401, and the
complaint is kept. Nothing here uses llmbench's own signing.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
import re
import threading
import time
import urllib.parse
from typing import Any, Callable

from servers import HELLO, Peer, Request, Server, answer

KEY = "AKID-of-the-customer"
SECRET = "s3cr3t/of+the=customer"


class Refused(Exception):
    """What is wrong with a request's signature."""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def mac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def demand(condition: Any, what: str) -> None:
    if not condition:
        raise Refused(what)


def check_time(text: str, form: str, skew: float) -> None:
    when = datetime.datetime.strptime(text, form).replace(tzinfo=datetime.timezone.utc).timestamp()
    demand(abs(time.time() - when) <= skew, "the time is off")


def quoted(text: str) -> str:
    """RFC 3986, byte by byte."""
    plain = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
    return "".join(chr(byte) if byte in plain else "%%%02X" % byte for byte in text.encode())


def sorted_query(query: str) -> str:
    pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
    return "&".join(f"{quoted(name)}={quoted(value)}" for name, value in sorted(pairs))


def fields(header: str, scheme: str) -> dict[str, str]:
    """`SCHEME A=b, C=d` as a dictionary."""
    demand(header.startswith(scheme + " "), "another scheme")
    return dict(part.strip().split("=", 1) for part in header[len(scheme) :].split(","))


def header_block(request: Request, names: list[str], lower: bool = False) -> str:
    demand(names == sorted(names) and all(name in request.headers for name in names), "the signed headers")
    values = [request.headers[name].strip() for name in names]
    return "".join(f"{name}:{value.lower() if lower else value}\n" for name, value in zip(names, values))


def check_bce(request: Request) -> None:
    version, key, when, expires, names, signature = request.headers["authorization"].split("/")
    demand((version, key) == ("bce-auth-v1", KEY), "the key")
    check_time(when, "%Y-%m-%dT%H:%M:%SZ", float(expires))
    demand("host" in names.split(";"), "Host is not signed")
    path, _, query = request.path.partition("?")
    lines = sorted(f"{quoted(name)}:{quoted(request.headers[name].strip())}" for name in names.split(";"))
    pairs = urllib.parse.parse_qsl(query, keep_blank_values=True)
    text = "&".join(sorted(f"{quoted(name)}={quoted(value)}" for name, value in pairs if name != "authorization"))
    path = "/".join(quoted(urllib.parse.unquote(part)) for part in path.split("/"))
    canonical = "\n".join(["POST", path, text, "\n".join(lines)])
    signing_key = mac(SECRET.encode(), f"{version}/{key}/{when}/{expires}").hex().encode()
    demand(hmac.compare_digest(signature, mac(signing_key, canonical).hex()), "the signature")


def check_tc3(request: Request) -> None:
    given = fields(request.headers["authorization"], "TC3-HMAC-SHA256")
    key, date, service, _ = given["Credential"].split("/")
    demand(key == KEY, "the key")
    stamp = int(request.headers["x-tc-timestamp"])
    demand(abs(time.time() - stamp) <= 300, "the time is off")
    demand(date == time.strftime("%Y-%m-%d", time.gmtime(stamp)), "the date is not the time's")
    demand(request.headers["x-tc-action"] == "ChatCompletions", "the action")
    names = given["SignedHeaders"].split(";")
    demand({"content-type", "host"} <= set(names), "what must be signed")
    query = request.path.partition("?")[2]
    block = header_block(request, names, lower=True)
    canonical = f"POST\n/\n{query}\n{block}\n{given['SignedHeaders']}\n{sha256(request.raw)}"
    text = f"TC3-HMAC-SHA256\n{stamp}\n{date}/{service}/tc3_request\n{sha256(canonical.encode())}"
    signing_key = mac(mac(mac(b"TC3" + SECRET.encode(), date), service), "tc3_request")
    demand(hmac.compare_digest(given["Signature"], mac(signing_key, text).hex()), "the signature")


def check_volc(request: Request) -> None:
    given = fields(request.headers["authorization"], "HMAC-SHA256")
    key, date, region, service, _ = given["Credential"].split("/")
    demand(key == KEY, "the key")
    when = request.headers["x-date"]
    check_time(when, "%Y%m%dT%H%M%SZ", 300)
    demand(when.startswith(date), "the date is not the time's")
    demand(request.headers["x-content-sha256"] == sha256(request.raw), "the body's hash")
    names = given["SignedHeaders"].split(";")
    demand({"host", "x-date"} <= set(names), "what must be signed")
    path, _, query = request.path.partition("?")
    block = header_block(request, names)
    canonical = "\n".join(["POST", path, sorted_query(query), block, given["SignedHeaders"], sha256(request.raw)])
    text = f"HMAC-SHA256\n{when}\n{date}/{region}/{service}/request\n{sha256(canonical.encode())}"
    signing_key = mac(mac(mac(mac(SECRET.encode(), date), region), service), "request")
    demand(hmac.compare_digest(given["Signature"], mac(signing_key, text).hex()), "the signature")


def check_huawei(request: Request) -> None:
    given = fields(request.headers["authorization"], "SDK-HMAC-SHA256")
    demand(given["Access"] == KEY, "the key")
    when = request.headers["x-sdk-date"]
    check_time(when, "%Y%m%dT%H%M%SZ", 900)
    path, _, query = request.path.partition("?")
    path = path if path.endswith("/") else path + "/"
    names = given["SignedHeaders"].split(";")
    demand("x-sdk-date" in names, "what must be signed")
    block = header_block(request, names)
    canonical = "\n".join(["POST", path, sorted_query(query), block, given["SignedHeaders"], sha256(request.raw)])
    text = f"SDK-HMAC-SHA256\n{when}\n{sha256(canonical.encode())}"
    demand(hmac.compare_digest(given["Signature"], mac(SECRET.encode(), text).hex()), "the signature")


def check_jwt(request: Request) -> None:
    scheme, token = request.headers["authorization"].split(" ")
    demand(scheme == "Bearer", "the scheme")
    head, payload, signature = token.split(".")
    expected = base64.urlsafe_b64encode(mac(SECRET.encode(), head + "." + payload)).rstrip(b"=").decode()
    demand(hmac.compare_digest(signature, expected), "the signature")
    says = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    now = time.time() * 1000
    demand(says["api_key"] == KEY and says["timestamp"] <= now + 1000 < says["exp"], "the time is off")
    demand(says["exp"] - says["timestamp"] <= 300_000, "it lives too long")


class Nonces:
    """Which nonces were seen."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def take(self, nonce: str) -> None:
        demand(re.fullmatch("[0-9a-f]{32}", nonce), "the nonce's form")
        with self._lock:
            demand(nonce not in self._seen, "the nonce was seen before")
            self._seen.add(nonce)


def check_hmac() -> Callable[[Request], None]:
    """The usual private gateway: hex(hmac(secret, time LF nonce LF sha256(body))), and no nonce twice."""
    nonces = Nonces()

    def check(request: Request) -> None:
        head = request.headers
        demand(head["x-access-key"] == KEY, "the key")
        demand(abs(time.time() - int(head["x-timestamp"])) <= 60, "the time is off")
        text = "\n".join([head["x-timestamp"], head["x-nonce"], sha256(request.raw)])
        demand(hmac.compare_digest(head["x-signature"], mac(SECRET.encode(), text).hex()), "the signature")
        nonces.take(head["x-nonce"])

    return check


def check_custom() -> Callable[[Request], None]:
    """Another one: base64 of HMAC-SHA1 of method, target, time in ms and body, in one header of four parts."""
    nonces = Nonces()

    def check(request: Request) -> None:
        scheme, rest = request.headers["authorization"].split(" ", 1)
        key, when, nonce, signature = rest.split(":")
        demand((scheme, key) == ("HMAC", KEY), "the key")
        demand(abs(time.time() - int(when) / 1000) <= 60, "the time is off")
        text = "|".join(["POST", request.path, when, nonce, hashlib.sha1(request.raw).hexdigest(), "v2"])
        expected = base64.b64encode(hmac.new(SECRET.encode(), text.encode(), hashlib.sha1).digest()).decode()
        demand(hmac.compare_digest(signature, expected), "the signature")
        nonces.take(nonce)

    return check


CUSTOM_FLAGS = [
    "--auth-opt", "parts=method,target,time,nonce,body-hash,'v2'", "--auth-opt", "separator=|",
    "--auth-opt", "hash=sha1", "--auth-opt", "encoding=b64", "--auth-opt", "time=epoch_ms",
    "--auth-opt", "key-header=", "--auth-opt", "time-header=", "--auth-opt", "nonce-header=",
    "--auth-opt", "signature-header=Authorization",
    "--auth-opt", "signature-format=HMAC ${key}:${time}:${nonce}:${signature}",
]  # fmt: skip

# Scheme: how its gateway checks, and the flags beside key and secret that a run needs.
SCHEMES: dict[str, tuple[str, Callable[[], Callable[[Request], None]], list[str]]] = {
    "bce-v1": ("bce-v1", lambda: check_bce, []),
    "tc3": ("tc3", lambda: check_tc3, ["--auth-opt", "service=hunyuan"]),
    "volc-v4": ("volc-v4", lambda: check_volc, []),
    "huawei-sdk": ("huawei-sdk", lambda: check_huawei, []),
    "zhipu-jwt": ("zhipu-jwt", lambda: check_jwt, []),
    "hmac": ("hmac", check_hmac, []),
    "hmac-custom": ("hmac", check_custom, CUSTOM_FLAGS),
}


class Gateway(Server):
    """Answers requests whose signature holds, and 401 with the complaint to the others."""

    def __init__(self, check: Callable[[Request], None], then: Callable[[Peer, Request], None] | None = None) -> None:
        super().__init__(self._judge)
        self._check = check
        self._then = then or (lambda peer, _: peer.send(HELLO))
        self.refusals: list[str] = []

    def _judge(self, peer: Peer, request: Request) -> None:
        try:
            self._check(request)
        except (Refused, KeyError, ValueError) as error:
            self.refusals.append(repr(error))
            peer.send(answer(401, {"error": {"message": str(error)}}))
            return
        self._then(peer, request)
