"""Proxies, client certificates, names and addresses: every way from this host to an endpoint, over real sockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import os
import random
import socket
import ssl
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from certificates import Authority
from running import run
from servers import (
    HELLO,
    PATIENCE,
    Server,
    answer,
    closed_port,
    event_loop,
    full_listener,
    measure,
    says,
    settings,
)  # fmt: skip

import llmbench
from conftest import ROOT, SUPPORTED, interpreter

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a full backlog is silent on Linux only")
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "request_method")
PASSWORD = "p@ss/w%rd:7"  # what a URL has to spell otherwise
SPELLED = "p%40ss%2Fw%25rd%3A7"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


# A proxy that writes down what it is asked.


class Asked(NamedTuple):
    """One request to the proxy: its first line, its headers and the client's connection, counted from 0."""

    line: str
    headers: dict[str, str]
    connection: int


class FakeProxy:
    """CONNECT and absolute form, as squid has them; all names lead to 127.0.0.1.

    userinfo: the `user:password` that it wants. reply: what it says to everything, in place of serving.
    """

    def __init__(self, userinfo: str = "", reply: Any = None) -> None:
        self.userinfo, self.reply = userinfo, reply
        self.asked: list[Asked] = []
        self.connections = 0
        self.open: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = "http://127.0.0.1:%d" % self.port

    def __enter__(self) -> FakeProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for sock in self.open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    @property
    def lines(self) -> list[str]:
        return [asked.line for asked in self.asked]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.open.append(client)
                self.connections += 1
                threading.Thread(target=self._serve, args=(client, self.connections - 1), daemon=True).start()

    def _serve(self, client: socket.socket, number: int) -> None:
        upstream = None
        with contextlib.suppress(OSError), client:
            while True:
                data = b""
                while b"\r\n\r\n" not in data:
                    more = client.recv(65536)
                    if not more:
                        return
                    data += more
                head, _, body = data.partition(b"\r\n\r\n")
                lines = head.decode("latin-1").split("\r\n")
                headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines[1:]}
                self.asked.append(Asked(lines[0], headers, number))
                if self.reply is not None:
                    self.reply(client)
                    return
                wanted = "Basic " + base64.b64encode(self.userinfo.encode()).decode()
                if self.userinfo and headers.get("proxy-authorization") != wanted:
                    client.sendall(answer(407, b"<h1>no</h1>", 'Proxy-Authenticate: Basic realm="x"'))
                    continue
                method, target, _ = lines[0].split(" ")
                if method == "CONNECT":
                    upstream = self._reach(target)
                    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    threading.Thread(target=pump, args=(upstream, client), daemon=True).start()
                    pump(client, upstream)
                    return
                authority, slash, path = target[len("http://") :].partition("/")
                if upstream is None:
                    upstream = self._reach(authority)
                    threading.Thread(target=pump, args=(upstream, client), daemon=True).start()
                while len(body) < int(headers.get("content-length", 0)):
                    body += client.recv(65536)
                passed = [line for line in lines[1:] if not line.lower().startswith("proxy-")]
                first = "%s %s HTTP/1.1" % (method, slash + path)
                upstream.sendall("\r\n".join([first, *passed, "", ""]).encode() + body)

    def _reach(self, authority: str) -> socket.socket:
        upstream = socket.create_connection(("127.0.0.1", int(authority.rpartition(":")[2])))
        self.open.append(upstream)
        return upstream


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Passes on what comes until it ends."""
    with contextlib.suppress(OSError):
        while True:
            data = source.recv(65536)
            if not data:
                break
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def replies(data: bytes, then: str = "close", pause: float = 0.0) -> Any:
    """What a proxy says, at once or byte by byte, before it closes or holds the connection."""

    def reply(client: socket.socket) -> None:
        for piece in [data] if not pause else [data[i : i + 1] for i in range(len(data))]:
            client.sendall(piece)
            time.sleep(pause)
        if then == "hold":
            client.settimeout(PATIENCE)
            client.recv(1)

    return reply


# Certificates and a network.


@pytest.fixture(scope="module")
def other_tls(authority):
    """Of a server whose certificate is elsewhere.example's."""
    return authority.server_side("elsewhere")


@pytest.fixture(scope="module")
def trusted(authority):
    """The settings that trust our authority."""
    return {"ca_cert": str(authority.certificate)}


@contextlib.contextmanager
def network_to(url, **given):
    with event_loop() as (loop, poll):
        config = settings(url, **given)
        endpoint = llmbench.parse_url(url, llmbench.make_provider(config))
        yield loop, llmbench.Network(endpoint, config, poll)


def ask(url, **given):
    """One request to an endpoint: the facts of the connection, its connect time, and the answer's body."""
    with network_to(url, **given) as (loop, network):

        async def talk():
            connection = await network.open()
            receiver, facts = llmbench.Fetch(), connection.facts
            headers = [("Host", network.endpoint.authority), ("Content-Length", "0")]
            connection.send(network.encode("POST", network.endpoint.target, headers), receiver)
            await asyncio.wait_for(receiver.done, PATIENCE)
            connection.close()
            return facts, connection.connect_seconds, receiver.body

        return loop.run_until_complete(talk())


def fail_to_open(url, **given):
    """The RequestError that opening raises, and how long it took."""
    with network_to(url, **given) as (loop, network):
        began = llmbench.clock()
        with pytest.raises(llmbench.RequestError) as caught:
            loop.run_until_complete(network.open())
        return caught.value, llmbench.clock() - began


def route(url, environment=None, **given):
    config = settings(url, **given)
    return llmbench.choose_route(llmbench.parse_url(url, llmbench.make_provider(config)), config, environment or {})


# Which way: the rules.


@pytest.mark.parametrize("text,proxy", [
    ("http://10.0.0.1:3128", ("10.0.0.1", 3128, "")), ("10.0.0.1:3128", ("10.0.0.1", 3128, "")),
    ("HTTP://Proxy.Example/", ("proxy.example", 80, "")), ("proxy", ("proxy", 80, "")),
    ("http://[::1]:8080", ("::1", 8080, "")), (" http://h:1 ", ("h", 1, "")),
    ("http://me:%s@h:1" % SPELLED, ("h", 1, "me:" + PASSWORD)), ("me@h:1", ("h", 1, "me:")),
    ("me:a@b@h:1", ("h", 1, "me:a@b")),
])  # fmt: skip
def test_what_a_proxy_may_look_like(text, proxy):
    assert llmbench.parse_proxy(text, "--proxy") == proxy


@pytest.mark.parametrize("text,says", [
    ("https://u:s3cretword@h:1", "https endpoints are reached through one at http://"),
    ("socks5://u:s3cretword@h:1", "SOCKS"),
    ("socks5h://h:1", "SOCKS"), ("SOCKS4://h:1", "SOCKS"), ("ftp://s3cretword@h:1", "--proxy: a proxy is http://"),
    ("http://", "no host"), ("http://u:s3cretword#x@h:1", "percent-encode"), ("http://h:s3cretword", "percent-encode"),
    ("http://h:99999", "percent-encode"), ("http://u:s3cret word@h:1", "percent-encode"),
])  # fmt: skip
def test_what_is_no_proxy_is_refused_without_showing_it(text, says):
    with pytest.raises(llmbench.UserError) as caught:
        llmbench.parse_proxy(text, "--proxy")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


A, B, C = "http://a:1", "http://b:1", "http://c:1"


@pytest.mark.parametrize("url,environment,host", [
    ("https://x.test", {}, None),
    ("https://x.test", {"https_proxy": A}, "a"), ("https://x.test", {"HTTPS_PROXY": A}, "a"),
    ("https://x.test", {"https_proxy": A, "HTTPS_PROXY": B}, "a"),
    ("https://x.test", {"https_proxy": "", "HTTPS_PROXY": B}, "b"),
    ("https://x.test", {"http_proxy": A}, None), ("https://x.test", {"all_proxy": C, "http_proxy": A}, "c"),
    ("https://x.test", {"ALL_PROXY": C, "https_proxy": A}, "a"), ("http://x.test", {"ALL_PROXY": C}, "c"),
    ("http://x.test", {"http_proxy": A, "https_proxy": B}, "a"), ("http://x.test", {"HTTP_PROXY": A}, "a"),
    ("http://x.test", {"HTTP_PROXY": A, "REQUEST_METHOD": "GET"}, None),
    ("http://x.test", {"http_proxy": A, "REQUEST_METHOD": "GET"}, "a"),
    ("https://x.test", {"HTTPS_PROXY": A, "REQUEST_METHOD": "GET"}, "a"),
    ("https://x.test", {"https_proxy": A, "no_proxy": "x.test"}, None),
    ("https://x.test", {"https_proxy": A, "NO_PROXY": "y.test, .test"}, None),
    ("https://x.test", {"https_proxy": A, "no_proxy": "y.test", "NO_PROXY": "x.test"}, "a"),
    ("https://x.test", {"https_proxy": A, "no_proxy": "*"}, None),
    ("http://localhost:8000", {"http_proxy": A}, None), ("http://127.0.0.5", {"http_proxy": A}, None),
    ("http://[::1]:1", {"http_proxy": A}, None), ("http://127.example", {"all_proxy": A}, "a"),
    ("unix:/run/x.sock", {"http_proxy": A, "all_proxy": A}, None),
])  # fmt: skip
def test_which_variable_counts(url, environment, host):
    found = route(url, environment)
    assert (found.proxy and found.proxy.host) == host
    assert found.reason


def test_the_flag_wins_over_every_variable():
    environment = {"https_proxy": A, "no_proxy": "*"}
    assert route("https://x.test", environment, proxy=B).proxy.host == "b"
    assert route("https://x.test", {"https_proxy": A}, proxy="none").proxy is None
    assert route("http://127.0.0.1:1", {}, proxy=B).proxy.host == "b"


def test_the_mock_is_never_reached_through_a_proxy():
    config = settings("mock:?ttft=1", proxy=A)
    endpoint = llmbench.parse_url("http://127.0.0.1:7", llmbench.make_provider(config))
    assert llmbench.choose_route(endpoint, config, {"http_proxy": A}).proxy is None


@pytest.mark.parametrize("variable", ["https_proxy", "ALL_PROXY"])
def test_a_variable_that_cannot_be_used_is_named(variable):
    with pytest.raises(llmbench.UserError, match=r"\$%s: a SOCKS proxy" % variable):
        route("https://x.test", {variable: "socks5://h:1"})
    assert route("https://x.test", {variable: "socks5://h:1", "no_proxy": "test"}).proxy is None, "it isn't used"


@pytest.mark.parametrize("entry,host,port,names", [
    ("x.test", "x.test", 443, True), ("x.test", "a.x.test", 443, True), ("x.test", "ax.test", 443, False),
    (".x.test", "a.x.test", 443, True), (".x.test", "x.test", 443, True), ("*.x.test", "a.b.x.test", 443, True),
    ("x.test.", "x.test", 443, True), ("x.test", "x.test.", 443, True), ("test", "x.test", 443, True),
    ("x.test:443", "a.x.test", 443, True), ("x.test:443", "x.test", 8443, False),
    ("x.test:https", "x.test", 443, False),
    ("*", "anything", 1, True), (".", "x.test", 1, False), ("*.", "x.test", 1, False),
    ("10.0.0.7", "10.0.0.7", 1, True), ("10.0.0.7", "10.0.0.70", 1, False), ("0.7", "10.0.0.7", 1, False),
    ("10.0.0.7:80", "10.0.0.7", 80, True), ("10.0.0.7:80", "10.0.0.7", 81, False),
    ("10.0.0.0/8", "10.200.3.4", 1, True), ("10.0.0.0/8", "11.0.0.1", 1, False), ("10.1.2.3/8", "10.9.9.9", 1, True),
    ("10.0.0.0/99", "10.0.0.1", 1, False), ("10.0.0.0/8", "x.10.0.0.0", 1, False), ("7", "10.0.0.7", 1, False),
    ("::1", "::1", 1, True), ("[::1]", "::1", 1, True), ("[::1]:8080", "::1", 8080, True),
    ("[::1]:8080", "::1", 1, False),
    ("fd00::/8", "fd12:3456::1", 1, True), ("fe80::/10", "fe80::1%eth0", 1, True), ("fd00::/8", "10.0.0.1", 1, False),
    ("2001:db8:0::1", "2001:db8::1", 1, True),
])  # fmt: skip
def test_what_an_entry_of_no_proxy_names(entry, host, port, names):
    assert llmbench.names_host(entry, host, port) == names


def test_no_proxy_by_chance():
    """Domains name what is below them and nothing else; a CIDR block names just the numbers in it."""
    chance = random.Random(5)

    def label():
        return "".join(chance.choice("abcdefghij-") for _ in range(chance.randint(1, 6))).strip("-") or "x"

    for _ in range(2000):
        domain = ".".join(label() for _ in range(chance.randint(1, 3))) + ".test"
        below, glued, port = label() + "." + domain, label() + domain, chance.randint(1, 65535)
        entry = chance.choice(["", ".", "*."]) + domain + chance.choice(["", ":%d" % port])
        assert llmbench.names_host(entry, domain, port) and llmbench.names_host(entry, below, port)
        assert not llmbench.names_host(entry, glued, port) and not llmbench.names_host(entry, domain + "x", port)
        assert llmbench.names_host(entry, below, port + 1) == (":" not in entry)
        bits, length = (32, chance.randint(0, 32)) if chance.random() < 0.5 else (128, chance.randint(0, 128))
        kind = ipaddress.IPv4Address if bits == 32 else ipaddress.IPv6Address
        base = chance.getrandbits(bits)
        other = base ^ (1 << chance.randrange(bits))
        inside = (base >> (bits - length)) == (other >> (bits - length))
        assert llmbench.names_host("%s/%d" % (kind(base), length), str(kind(other)), port) == inside


@pytest.mark.parametrize("text,parts", [
    ("h:443:10.0.0.7", ("h", 443, ["10.0.0.7"])), ("H.Example:1:::1", ("h.example", 1, ["::1"])),
    ("h:1:[::1]", ("h", 1, ["::1"])), ("h:1:10.0.0.7,::1,[::2]", ("h", 1, ["10.0.0.7", "::1", "::2"])),
    ("*:443:127.0.0.1", ("*", 443, ["127.0.0.1"])), ("[::1]:443:127.0.0.1", ("::1", 443, ["127.0.0.1"])),
])  # fmt: skip
def test_resolve(text, parts):
    assert llmbench.parse_resolve(text) == parts


@pytest.mark.parametrize("text", [
    "", "h", "h:443", "h:443:", "h:443:name", "h:0:10.0.0.7", "h:70000:10.0.0.7", "h:443:10.0.0.7,", "h:443:10.0.0",
    ":443:10.0.0.7", "h:x:10.0.0.7", "h:443:10.0.0.7 ",
])  # fmt: skip
def test_what_is_no_resolve(text):
    with pytest.raises(ValueError, match=r"^needs HOST:PORT:ADDRESS"):
        llmbench.parse_resolve(text)


def provider_of(**given):
    return llmbench.make_provider(settings("", **given))


@pytest.mark.parametrize("url,unix,target", [
    ("unix:/run/x.sock", "/run/x.sock", "/v1/chat/completions"),
    ("unix:/run/x.sock:/v1", "/run/x.sock", "/v1/chat/completions"),
    ("unix:///run/x.sock:/api/v2?a=b", "/run/x.sock", "/api/v2/chat/completions?a=b"),
    ("unix:x.sock:/generate", "x.sock", "/generate"),
])  # fmt: skip
def test_where_a_unix_url_points(url, unix, target):
    endpoint = llmbench.parse_url(url, provider_of())
    assert (endpoint.unix, endpoint.target, endpoint.authority, endpoint.scheme) == (unix, target, "localhost", "http")
    assert endpoint.url == "unix:%s:%s" % (unix, target)
    assert llmbench.parse_url(endpoint.url, provider_of()) == endpoint


@pytest.mark.parametrize(
    "url", ["unix:", "unix://", "unix::/v1", "unix:/x.sock:v1", "unix:/x y.sock", "unix:/x.sock:/v 1"]
)
def test_what_is_no_unix_url(url):
    with pytest.raises(llmbench.UserError, match=r"^--url"):
        llmbench.parse_url(url, provider_of())


def test_a_zone_is_for_the_socket_and_not_for_the_host_header():
    endpoint = llmbench.parse_url("http://[fe80::1%25eth0]:8000/v1", provider_of())
    assert (endpoint.host, endpoint.authority) == ("fe80::1%eth0", "[fe80::1]:8000")


# Flags that have no part in it.


@pytest.mark.parametrize("given,says", [
    ({"url": "http://h", "client_cert": "c.pem"}, "--client-cert is for TLS"),
    ({"url": "http://h", "server_name": "x"}, "--server-name is for TLS"),
    ({"url": "unix:/x", "proxy": A}, "--proxy: a Unix socket"),
    ({"url": "https://h", "proxy": A, "resolve": ["h:443:10.0.0.1"]}, "--resolve: h is looked up by the proxy"),
    ({"url": "https://h", "proxy": "https://p"}, "--proxy: a proxy that is itself spoken to in TLS"),
])  # fmt: skip
def test_what_does_not_go_together(given, says):
    config = settings(given.pop("url"), **given)
    with pytest.raises(llmbench.UserError) as caught:
        llmbench.check_way(llmbench.parse_url(config.url, llmbench.make_provider(config)), config)
    assert says in str(caught.value)


@pytest.mark.parametrize("words,says", [
    (["--resolve", "h:443"], "--resolve needs HOST:PORT:ADDRESS"), (["--proxy", ""], "--proxy needs http://"),
    (["--server-name", "https://h"], "--server-name needs a host name"),
    (["--server-name", "h:443"], "--server-name needs a host name"),
])  # fmt: skip
def test_values_that_cannot_be(words, says):
    with pytest.raises(llmbench.UserError, match=says):
        llmbench.read_config(["--url", "https://h", *words])


# CONNECT.


@linux
def test_tls_through_a_proxy(good_tls, trusted):
    with Server(says(HELLO), good_tls) as server, FakeProxy() as proxy:
        measured = measure(server.url, proxy=proxy.url, total_requests=5, concurrency=2, **trusted)
    assert measured.statuses == ["ok"] * 5 and not measured.complaints
    target = "127.0.0.1:%d" % server.port
    assert proxy.lines == ["CONNECT %s HTTP/1.1" % target] * 2, "one for each connection, not for each request"
    assert proxy.asked[0].headers["host"] == target and "proxy-authorization" not in proxy.asked[0].headers
    assert {record["clock"] for record in measured.records} == {"kernel"}
    assert {request.path for request in server.requests} == {"/v1/chat/completions"}
    (audit,) = measured.audits
    assert audit["network"].pop("cipher")
    assert audit["network"] == {
        "address": "127.0.0.1:%d" % proxy.port, "proxy": proxy.url, "tls_version": "TLSv1.3",
    }  # fmt: skip


def test_connect_time_holds_proxy_and_tls(good_tls, trusted):
    """Both are slow here, and each step is told apart."""

    class Slow:
        """A TLS context that takes its time."""

        def wrap_socket(self, *words, **more):
            time.sleep(0.2)
            return good_tls.wrap_socket(*words, **more)

    with Server(says(HELLO), Slow()) as server, FakeProxy() as proxy:
        server.url = server.url.replace("http:", "https:")
        reach = proxy._reach
        proxy._reach = lambda target: time.sleep(0.15) or reach(target)
        facts, seconds, _ = ask(server.url, proxy=proxy.url, **trusted)
    assert facts.proxy_s >= 0.15 and facts.tls_s >= 0.2
    assert facts.dns_s < 0.1 and facts.tcp_s < 0.1
    assert seconds == pytest.approx(facts.dns_s + facts.tcp_s + facts.proxy_s + facts.tls_s)
    assert seconds >= 0.35


def test_the_password_goes_to_the_proxy_alone(good_tls, trusted):
    with Server(says(HELLO), good_tls) as server, FakeProxy("me:" + PASSWORD) as proxy:
        given = {"proxy": "http://me:%s@127.0.0.1:%d" % (SPELLED, proxy.port), **trusted}
        measured = measure(server.url, total_requests=2, **given)
    assert measured.statuses == ["ok"] * 2
    assert all("proxy-authorization" not in request.headers for request in server.requests)
    assert measured.audits[0]["network"]["proxy"] == "http://***@127.0.0.1:%d" % proxy.port


@pytest.mark.parametrize("userinfo,told", [("", "it wants a user and password"), ("me:wrongword@", "it refuses this")])
@pytest.mark.parametrize("scheme", ["https", "http"])
def test_a_proxy_that_wants_another_password(scheme, userinfo, told, good_tls, trusted):
    with Server(says(HELLO), good_tls if scheme == "https" else None) as server, FakeProxy("me:" + PASSWORD) as proxy:
        given = {"proxy": "http://%s127.0.0.1:%d" % (userinfo, proxy.port)}
        given.update(trusted if scheme == "https" else {})
        (record,) = measure(server.url, total_requests=1, **given).records
    assert record["status"] == "proxy_error"
    assert record["err"].startswith("HTTP 407 ") and "wrongword" not in str(record)
    if scheme == "https":
        assert told in record["err"] and "127.0.0.1:%d" % proxy.port in record["err"]
    assert not server.requests


def test_a_proxy_that_speaks_no_basic():
    refusal = b"HTTP/1.1 407 Auth\r\nProxy-Authenticate: Negotiate\r\nProxy-Authenticate: NTLM\r\n\r\n"
    with FakeProxy(reply=replies(refusal)) as proxy:
        error, _ = fail_to_open("https://x.test", proxy=proxy.url)
    assert error.status == "proxy_error"
    assert "takes Negotiate or NTLM only" in str(error) and "cntlm" in str(error)


@pytest.mark.parametrize("reply,status,says", [
    (replies(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"), "proxy_error", "HTTP 403 Forbidden"),
    (replies(b"HTTP/1.0 502 Bad Gateway\n\n<html>"), "proxy_error", "HTTP 502 Bad Gateway"),
    (replies(b"HTTP/1.1 302 \r\nLocation: http://login\r\n\r\n"), "proxy_error", "HTTP 302"),
    (replies(b"SSH-2.0-OpenSSH_9.2\r\n", "hold"), "proxy_error", "not an HTTP proxy: it answers 'SSH-2.0"),
    (replies(b"HTTP/1.1 abc\r\n\r\n"), "proxy_error", "not an HTTP/1.1 answer"),
    (replies(b"HTTP/1.1 200 OK\r\nX: "), "proxy_error", "connection closed before the head"),
    (replies(b""), "proxy_error", "closed"),
    (replies(b"HTTP/1.1 200 OK\r\n\r\n220 hello\r\n", "hold"), "proxy_error", "bytes behind its answer"),
    (replies(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000, "hold"), "proxy_error", "longer than"),
    (replies(b"", "hold"), "timeout", "while waiting for the answer to CONNECT (the proxy 127.0.0.1:"),
    (replies(b"HTTP/1.1 200 OK\r\n", "hold"), "timeout", "CONNECT"),
])  # fmt: skip
def test_what_a_proxy_may_say_instead(reply, status, says):
    with FakeProxy(reply=reply) as proxy:
        patience = 0.4 if status == "timeout" else 5.0
        error, seconds = fail_to_open("https://x.test", proxy=proxy.url, connect_timeout=patience)
    assert error.status == status, error
    assert says in str(error)
    assert seconds < 2.0


def test_a_refusal_whose_words_are_cut_is_a_refusal():
    """tinyproxy leaves the request's body unread, and the reset that this makes may cut its own answer."""

    def reply(client):
        client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 500\r\n\r\n<html>")
        time.sleep(0.05)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with FakeProxy(reply=reply) as proxy:
        (record,) = measure("http://x.test", proxy=proxy.url, total_requests=1).records
    assert record["status"] == "proxy_error" and record["http_status"] == 407


@pytest.mark.parametrize("pause", [0.0, 0.002])
@pytest.mark.parametrize("head", [
    b"HTTP/1.1 200 Connection established\r\n\r\n", b"HTTP/1.0 200 OK\n\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nProxy-Agent: x\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\nX: y\r\n\r\nHTTP/1.1 204 No\r\n\r\n",
])  # fmt: skip
def test_every_form_of_a_proxys_yes(head, pause, good_tls, trusted):
    """RFC 9110 section 9.3.6: any 2xx, whose Content-Length and Transfer-Encoding mean nothing."""
    with Server(says(HELLO), good_tls) as server:

        def serve(client):
            replies(head, "", pause)(client)
            upstream = socket.create_connection(("127.0.0.1", server.port))
            threading.Thread(target=pump, args=(upstream, client), daemon=True).start()
            pump(client, upstream)

        with FakeProxy(reply=serve) as proxy:
            facts, _, body = ask("https://localhost:%d" % server.port, proxy=proxy.url, **trusted)
    assert b"[DONE]" in body and facts.proxy == proxy.url


def test_a_proxy_that_is_not_there():
    port = closed_port()
    error, _ = fail_to_open("https://x.test", proxy="http://127.0.0.1:%d" % port)
    assert (error.status, str(error)) == ("connect_error", "the proxy 127.0.0.1:%d: connection refused" % port)


def test_a_proxys_name_that_nobody_knows(monkeypatch):
    def getaddrinfo(host, *_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    error, _ = fail_to_open("https://x.test", proxy="http://proxy.invalid:1")
    assert error.status == "dns_error" and "the proxy proxy.invalid: " in str(error)


def test_names_are_the_proxys_to_resolve(monkeypatch, good_tls, trusted):
    """localhost stands for a name that only the proxy can look up."""
    asked = []
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *w, **m: asked.append(host) or look_up(host, *w, **m))
    with Server(says(HELLO), good_tls) as server, FakeProxy() as proxy:
        ask("https://localhost:%d" % server.port, proxy=proxy.url, **trusted)
    assert set(asked) == {"127.0.0.1"}
    assert proxy.lines == ["CONNECT localhost:%d HTTP/1.1" % server.port]


def test_an_address_of_version_6_is_bracketed(good_tls):
    with FakeProxy(reply=replies(b"HTTP/1.1 503 No\r\n\r\n")) as proxy:
        fail_to_open("https://[2001:db8::7]:8443", proxy=proxy.url)
        fail_to_open("https://b\u00fccher.test", proxy=proxy.url)
    assert proxy.lines == ["CONNECT [2001:db8::7]:8443 HTTP/1.1", "CONNECT xn--bcher-kva.test:443 HTTP/1.1"]


def test_failures_leave_no_descriptor_behind(trusted, good_tls):
    """On each Python: a cancelled read must not stay in the selector, where the next socket's number would meet it."""
    with Server(says(HELLO), good_tls) as server, FakeProxy() as proxy, FakeProxy(reply=replies(b"", "hold")) as silent:
        with network_to(server.url, proxy=silent.url, connect_timeout=0.1) as (loop, network):
            before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
            for _ in range(5):
                with pytest.raises(llmbench.RequestError):
                    loop.run_until_complete(network.open())
            assert len(network.poll.get_map()) == 1, "the loop's own pipe to itself"
            if before:
                assert len(os.listdir("/proc/self/fd")) <= before + 5, "the proxy's ends are in this process too"
        assert b"[DONE]" in ask(server.url, proxy=proxy.url, **trusted)[2]


# Absolute form.


def test_plain_http_through_a_proxy():
    with Server(says(HELLO)) as server, FakeProxy("me:" + PASSWORD) as proxy:
        given = {"proxy": "http://me:%s@127.0.0.1:%d" % (SPELLED, proxy.port)}
        measured = measure(server.url, total_requests=3, **given)
    assert measured.statuses == ["ok"] * 3
    assert proxy.lines == ["POST %s/v1/chat/completions HTTP/1.1" % server.url] * 3
    assert proxy.connections == 1, "a connection through a proxy is kept alive too"
    assert all(asked.headers["proxy-authorization"].startswith("Basic ") for asked in proxy.asked)
    assert all(asked.headers["host"] == "127.0.0.1:%d" % server.port for asked in proxy.asked)
    assert {request.path for request in server.requests} == {"/v1/chat/completions"}
    assert measured.audits[0]["network"] == {
        "address": "127.0.0.1:%d" % proxy.port, "proxy": "http://***@127.0.0.1:%d" % proxy.port,
    }  # fmt: skip


def test_a_proxy_authorization_of_ones_own_is_left():
    with network_to("http://x.test/v1", proxy="http://me:pw@h:1") as (_, network):
        sent = network.encode("POST", "/v1", [("Host", "x.test"), ("proxy-authorization", "Bearer t")], b"{}")
    assert sent.startswith(b"POST http://x.test/v1 HTTP/1.1\r\n") and sent.count(b"roxy-") == 1


def test_the_model_list_is_asked_through_the_proxy(good_tls, authority, tmp_path):
    def behave(peer, request):
        peer.send(answer(200, {"data": [{"id": "m1"}]}) if request.path == "/v1/models" else HELLO)

    with Server(behave) as server, FakeProxy() as proxy:
        config = settings(server.url, proxy=proxy.url)
        with network_to(server.url, proxy=proxy.url) as (loop, network):
            provider = llmbench.make_provider(config)
            asking = llmbench.first_model(provider, network.endpoint, network)
            assert loop.run_until_complete(asking) == "m1"
        with FakeProxy("a:b") as strict, network_to(server.url, proxy=strict.url) as (loop, network):
            asking = llmbench.first_model(provider, network.endpoint, network)
            refused = pytest.raises(llmbench.UserError, match=r"proxy_error.*HTTP 407")
            with refused:
                loop.run_until_complete(asking)
    assert proxy.lines == ["GET %s/v1/models HTTP/1.1" % server.url]


# Client certificates.


def wanting(authority, version=None, extensions="leaf"):
    """A server's TLS context that takes only clients whom our authority signed."""
    context = authority.server_side(extensions)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(str(authority.certificate))
    if version is not None:
        context.maximum_version = version
    return context


@pytest.fixture(scope="module")
def asking_tls(authority):
    return wanting(authority)


@pytest.fixture(scope="module")
def client(authority):
    certificate, key = authority.issue("client")
    return {"client_cert": str(certificate), "client_key": str(key)}


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_certificate_opens_the_door(authority, client, trusted, version):
    with Server(says(HELLO), wanting(authority, version)) as server, FakeProxy() as proxy:
        for given in (client, {**client, "proxy": proxy.url}):
            measured = measure(server.url, total_requests=2, **trusted, **given)
            assert measured.statuses == ["ok"] * 2
    assert measured.audits[0]["network"]["tls_version"] == version.name.replace("_", ".")


def test_certificate_and_key_may_stand_in_one_file(asking_tls, client, trusted, tmp_path):
    both = tmp_path / "both.pem"
    both.write_bytes(b"".join(Path(client[name]).read_bytes() for name in ("client_cert", "client_key")))
    with Server(says(HELLO), asking_tls) as server:
        assert b"[DONE]" in ask(server.url, client_cert=str(both), **trusted)[2]


@linux
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_without_a_client_certificate_it_is_a_tls_error_that_names_the_flag(authority, trusted, version):
    """With TLS 1.3 the client hears of it only after its handshake is done, and so after its request is sent."""
    with Server(says(HELLO), wanting(authority, version)) as server:
        measured = measure(server.url, total_requests=2, **trusted)
    # A reset that comes with the alert may overtake it: then the record says what that may mean.
    expected = {"tls_error"} if version == ssl.TLSVersion.TLSv1_2 else {"tls_error", "truncated"}
    assert set(measured.statuses) <= expected
    assert all("--client-cert" in record["err"] for record in measured.records)
    assert not measured.complaints


@linux
def test_a_client_certificate_of_a_stranger(authority, trusted, tmp_path):
    certificate, key = Authority(tmp_path).issue("client")
    with Server(says(HELLO), wanting(authority)) as server:
        given = {"client_cert": str(certificate), "client_key": str(key), **trusted}
        (record,) = measure(server.url, total_requests=1, **given).records
    assert (record["status"] == "tls_error" and "client certificate" in record["err"]) or "reset" in record["err"]


def test_client_certificates_that_cannot_be_used(authority, client, tmp_path):
    certificate, key = client["client_cert"], client["client_key"]
    encrypted, text = tmp_path / "encrypted.key", tmp_path / "text.pem"
    authority.openssl("pkey", "-in", key, "-aes256", "-passout", "pass:s3cret", "-out", encrypted)
    text.write_text("nothing")
    _, other = authority.issue("leaf")
    for given, told in [
        ({"client_cert": certificate, "client_key": str(encrypted)}, "is encrypted"),
        ({"client_cert": certificate, "client_key": str(other)}, "does not belong to the certificate"),
        ({"client_cert": certificate}, "--client-key FILE names a key"),
        ({"client_cert": str(text), "client_key": key}, "not a PEM file"),
        ({"client_cert": str(text)}, "not a PEM file"),
        ({"client_cert": certificate, "client_key": str(text)}, "not a PEM file"),
        ({"client_cert": "/no/such.pem"}, "--client-cert /no/such.pem cannot be read: no such file"),
        ({"client_cert": certificate, "client_key": "/no/such.key"}, "--client-key /no/such.key cannot be read"),
        ({"client_key": key}, "--client-key needs --client-cert"),
    ]:  # fmt: skip
        with pytest.raises(llmbench.UserError) as caught:
            llmbench.make_tls(settings("https://h", **given))
        assert told in str(caught.value) and "\n" not in str(caught.value)


# Names.


def test_server_name_is_asked_for_and_verified(authority, trusted):
    asked = []
    context = authority.server_side("elsewhere")
    context.sni_callback = lambda _, name, __: asked.append(name)
    with Server(says(HELLO), context) as server:
        _, _, body = ask(server.url, server_name="elsewhere.example", **trusted)
        error, _ = fail_to_open(server.url, **trusted)
        wrong, _ = fail_to_open(server.url, server_name="other.example", **trusted)
    assert b"[DONE]" in body
    assert asked == ["elsewhere.example", None, "other.example"], "an address is no name that could be asked for"
    assert server.requests[0].headers["host"] == "127.0.0.1:%d" % server.port
    assert error.status == wrong.status == "tls_error"
    assert "--server-name" in str(error) and "other.example" in str(wrong)


def test_server_name_through_a_proxy(other_tls, trusted):
    with Server(says(HELLO), other_tls) as server, FakeProxy() as proxy:
        ask(server.url, server_name="elsewhere.example", proxy=proxy.url, **trusted)
    assert proxy.lines == ["CONNECT 127.0.0.1:%d HTTP/1.1" % server.port]


def test_resolve_looks_nothing_up(monkeypatch, other_tls, trusted):
    def getaddrinfo(*words, **_):
        raise AssertionError(words)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with Server(says(HELLO), other_tls) as server:
        url = "https://Elsewhere.example:%d" % server.port
        for line in ("elsewhere.example:%d:127.0.0.1", "*:%d:127.0.0.1", "ELSEWHERE.example:%d:127.0.0.1"):
            facts, _, body = ask(url, resolve=["other:1:10.0.0.1", line % server.port], **trusted)
            assert b"[DONE]" in body and facts.address == "127.0.0.1:%d" % server.port
    assert server.requests[0].headers["host"] == "elsewhere.example:%d" % server.port


def test_resolve_of_the_proxys_own_name(good_tls, trusted):
    with Server(says(HELLO), good_tls) as server, FakeProxy() as proxy:
        name, pinned = "http://proxy.invalid:%d" % proxy.port, "proxy.invalid:%d:127.0.0.1" % proxy.port
        facts, _, _ = ask(server.url, proxy=name, resolve=[pinned], **trusted)
    assert facts.proxy == "http://proxy.invalid:%d" % proxy.port


@pytest.fixture
def version_6():
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        pytest.skip("this host has no ::1")


@linux
def test_an_address_of_version_6(version_6):
    with Server(says(HELLO), address="::1") as server:
        measured = measure(server.url, total_requests=2)
        named = measure("http://six.invalid:%d" % server.port, total_requests=1, resolve=["*:%d:::1" % server.port])
    assert measured.statuses == ["ok"] * 2 and named.statuses == ["ok"]
    assert {record["clock"] for record in measured.records} == {"kernel"}
    assert server.requests[0].headers["host"] == "[::1]:%d" % server.port
    assert measured.audits[0]["network"] == {"address": "[::1]:%d" % server.port}


# Unix sockets.

unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")


@unix
def test_a_unix_socket(tmp_path):
    path = str(tmp_path / "llm.sock")
    with Server(says(HELLO), address=path) as server:
        measured = measure(server.url + ":/v1", total_requests=3, concurrency=2)
    assert measured.statuses == ["ok"] * 3 and not measured.complaints
    assert {record["clock"] for record in measured.records} == {"user"}, "the kernel stamps no Unix socket's bytes"
    assert all("rtt_ms" not in record for record in measured.records)
    assert {(request.path, request.headers["host"]) for request in server.requests} == {
        ("/v1/chat/completions", "localhost")
    }
    assert measured.audits[0]["network"] == {"address": "unix:" + path}


@unix
@pytest.mark.parametrize("path,says", [("/no/such.sock", "no such file"), ("/" + "x" * 200, "too long")])
def test_a_unix_socket_that_is_not_there(path, says):
    error, _ = fail_to_open("unix:" + path)
    assert error.status == "connect_error"
    assert says in str(error) and "unix:" + path in str(error)


# Several addresses.

V4, V6 = socket.AF_INET, socket.AF_INET6


@pytest.mark.parametrize("families,order", [
    ([V4], [0]), ([V4, V4], [0, 1]), ([V6, V6, V4, V4], [0, 2, 1, 3]), ([V6, V4, V4, V4], [0, 1, 2, 3]),
    ([V4, V4, V4, V6], [0, 3, 1, 2]), ([V6, V6, V6], [0, 1, 2]),
])  # fmt: skip
def test_families_take_turns(families, order):
    found = [(family, number) for number, family in enumerate(families)]
    assert [number for _, number in llmbench.alternating(found)] == order


def resolve_to(monkeypatch, *addresses):
    kinds = [V6 if ":" in address[0] else V4 for address in addresses]
    answer = [(kind, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address) for kind, address in zip(kinds, addresses)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


@linux
def test_an_address_that_is_silent_costs_a_quarter_of_a_second_once(monkeypatch):
    """Not its share of ten seconds; and later connections begin with the address that answered."""
    with Server(says(HELLO)) as server, full_listener() as silent:
        resolve_to(monkeypatch, ("127.0.0.1", silent), ("127.0.0.1", server.port))
        with network_to("http://two.invalid") as (loop, network):
            first = loop.run_until_complete(network.open())
            assert 0.25 <= first.facts.tcp_s < 0.25 + 1.0
            assert first.facts.address == "127.0.0.1:%d" % server.port
            second = loop.run_until_complete(network.open())
            assert second.facts.tcp_s < 0.2
            server.stop_listening()
            with pytest.raises(llmbench.RequestError) as caught:  # the best one refuses: the other is tried again
                network._timeout = 0.6
                loop.run_until_complete(network.open())
            assert caught.value.status == "timeout"
            for connection in (first, second):
                connection.close()


@linux
def test_a_silent_address_of_version_6_and_one_of_version_4(monkeypatch, version_6):
    """What the dual stack of a half-configured host looks like."""
    with socket.socket(V6) as silent, contextlib.ExitStack() as waiting, Server(says(HELLO)) as server:
        silent.bind(("::1", 0))
        silent.listen(0)
        for _ in range(8):
            filler = waiting.enter_context(socket.socket(V6))
            filler.setblocking(False)
            filler.connect_ex(silent.getsockname())
        port = silent.getsockname()[1]
        resolve_to(monkeypatch, ("::1", port, 0, 0), ("::1", port, 0, 0), ("127.0.0.1", server.port))
        facts, _, body = ask("http://two.invalid")
    assert b"[DONE]" in body and facts.address.startswith("127.0.0.1:")
    assert 0.25 <= facts.tcp_s < 0.5 + 1.0, "the other family is the second to be tried"


@linux
def test_losers_and_the_given_up_are_closed(monkeypatch):
    with Server(says(HELLO)) as server, full_listener() as silent:
        resolve_to(monkeypatch, ("127.0.0.1", silent), ("127.0.0.1", server.port))
        with network_to("http://two.invalid") as (loop, network):
            loop.run_until_complete(network.open()).close()  # threads and their descriptors are there now
            loop.run_until_complete(asyncio.sleep(0.05))
            network._best = None
            before = descriptors()
            connection = loop.run_until_complete(network.open())
            assert descriptors() <= before + 2, "its two ends"
            connection.close()
            network._best = None
            opening = loop.create_task(network.open())
            loop.call_later(0.1, opening.cancel)
            with pytest.raises(asyncio.CancelledError):
                loop.run_until_complete(opening)
            loop.run_until_complete(asyncio.sleep(0.05))
            assert descriptors() <= before + 2
            assert len(network.poll.get_map()) == 1


@linux
def test_when_all_addresses_fail_the_time_out_is_kept_and_the_last_failure_told(monkeypatch):
    refusing = closed_port()
    resolve_to(monkeypatch, ("127.0.0.1", refusing), ("127.0.0.2", refusing))
    error, seconds = fail_to_open("http://two.invalid")
    assert (error.status, str(error)) == (
        "connect_error", "two.invalid (127.0.0.2:%d): connection refused" % refusing,
    )  # fmt: skip
    assert seconds < 0.25, "after a refusal nothing is waited for"
    with full_listener() as silent, full_listener() as other:
        resolve_to(monkeypatch, ("127.0.0.1", silent), ("127.0.0.1", other), ("127.0.0.1", refusing))
        error, seconds = fail_to_open("http://two.invalid", connect_timeout=1.0)
    assert error.status == "timeout"
    assert 0.9 < seconds < 2.0


def test_ways_of_several_parts_are_told_together():
    """Workers and hosts may come to different addresses of one name."""
    first = {"address": "10.0.0.7:443", "tls_version": "TLSv1.3", "cipher": "A"}
    audits = [{"stage": 0, "part": part, "network": way} for part, way in enumerate(
        [first, {**first, "address": "10.0.0.8:443"}, first])]  # fmt: skip
    assert llmbench.client_block([*audits, {"stage": 0, "part": 3}], [])["network"] == {
        **first, "address": "10.0.0.7:443, 10.0.0.8:443",
    }  # fmt: skip
    assert "network" not in llmbench.client_block([{"stage": 0, "part": 0}], [])


# Whole runs, each in a process of its own.


@pytest.fixture
def gateway(other_tls):
    """A server whose certificate is elsewhere.example's, behind a proxy with a password."""
    with Server(says(HELLO), other_tls) as server, FakeProxy("me:" + PASSWORD) as proxy:
        yield server, proxy


def flags_to(server, authority):
    return ["--url", "https://elsewhere.example:%d/v1" % server.port, "--ca-cert", str(authority.certificate)]


def is_hidden(done):
    text = done.everything
    basic = base64.b64encode(("me:" + PASSWORD).encode()).decode()
    return not any(secret in text for secret in (PASSWORD, SPELLED, basic))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("source", ["flag", "variable"])
def test_a_run_through_a_proxy(tmp_path, monkeypatch, gateway, authority, source, processes):
    server, proxy = gateway
    url = "http://me:%s@127.0.0.1:%d" % (SPELLED, proxy.port)
    words = flags_to(server, authority)
    if source == "variable":
        monkeypatch.setenv("HTTPS_PROXY", url)
    else:
        words += ["--proxy", url]
    done = run(tmp_path / "out", *words, "--total-requests", "8", "--concurrency", "4", "--processes", str(processes))
    assert done.status in (0, 4), done.stderr
    assert [record["status"] for record in done.records] == ["ok"] * 8
    assert set(proxy.lines) == {"CONNECT elsewhere.example:%d HTTP/1.1" % server.port}
    assert is_hidden(done)
    way = done.summary["client"]["network"]
    assert way["proxy"] == "http://***@127.0.0.1:%d" % proxy.port and way["tls_version"] == "TLSv1.3" and way["cipher"]
    assert way["proxy"] in (done.out / "report.html").read_text(encoding="utf-8")
    told = "through the proxy %s ($HTTPS_PROXY); --proxy none goes straight" % way["proxy"]
    assert (told in done.stderr) == (source == "variable")
    assert all(record["connect_ms"] > 0 for record in done.records if not record["reused"])


def test_a_run_that_no_proxy_sends_straight(tmp_path, monkeypatch, gateway, authority):
    server, proxy = gateway
    monkeypatch.setenv("https_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", "10.0.0.0/8,.example:%d" % server.port)
    pinned = ["--resolve", "elsewhere.example:%d:127.0.0.1" % server.port]
    done = run(tmp_path / "out", *flags_to(server, authority), *pinned, "--total-requests", "2")
    assert [record["status"] for record in done.records] == ["ok"] * 2
    assert not proxy.asked and "proxy" not in done.summary["client"]["network"]


def test_a_run_whose_proxy_refuses(tmp_path, gateway, authority):
    server, proxy = gateway
    url = "me:wr0ngword@127.0.0.1:%d" % proxy.port
    done = run(tmp_path / "out", *flags_to(server, authority), "--proxy", url, "--total-requests", "2")
    assert done.status == 3
    assert [record["status"] for record in done.records] == ["proxy_error"] * 2
    assert "it refuses this user or password" in done.records[0]["err"]
    assert "wr0ngword" not in done.everything


def test_the_mock_goes_straight_whatever_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:%d" % closed_port())
    done = run(tmp_path / "out", "--url", "mock:?ttft=5&itl=1&tokens=5", "--total-requests", "2",
               "--proxy", "http://127.0.0.1:1")  # fmt: skip
    assert [record["status"] for record in done.records] == ["ok"] * 2


def test_a_dry_run_shows_the_way(tmp_path, gateway):
    _, proxy = gateway
    url = "http://me:%s@127.0.0.1:%d" % (SPELLED, proxy.port)
    done = run(tmp_path / "a", "--url", "http://x.test", "--proxy", url, "--dry-run")
    assert "proxy                                http://***@127.0.0.1:%d (from --proxy)" % proxy.port in done.stdout
    assert "POST http://x.test/v1/chat/completions HTTP/1.1" in done.stdout
    assert "Proxy-Authorization: ***" in done.stdout
    straight = run(tmp_path / "b", "--url", "https://x.test", "--resolve", "x.test:443:10.0.0.7", "--dry-run")
    assert "10.0.0.7:443 (--resolve)" in straight.stdout
    secrets = (PASSWORD, SPELLED, base64.b64encode(("me:" + PASSWORD).encode()).decode())
    assert not any(secret in done.stdout + done.stderr for secret in secrets)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_with_a_client_certificate_and_a_name(tmp_path, authority, client, processes):
    with Server(says(HELLO), wanting(authority, extensions="elsewhere")) as server:
        done = run(tmp_path / "out", "--url", server.url, "--ca-cert", str(authority.certificate),
                   "--client-cert", client["client_cert"], "--client-key", client["client_key"],
                   "--server-name", "elsewhere.example", "--total-requests", "4", "--concurrency", "2",
                   "--processes", str(processes))  # fmt: skip
    assert [record["status"] for record in done.records] == ["ok"] * 4


@unix
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_at_a_unix_socket(tmp_path, processes):
    path = str(tmp_path / "llm.sock")
    with Server(says(HELLO), address=path) as server:
        done = run(tmp_path / "out", "--url", "unix:" + path, "--total-requests", "4", "--concurrency", "2",
                   "--processes", str(processes))  # fmt: skip
    assert [(record["status"], record["clock"]) for record in done.records] == [("ok", "user")] * 4
    assert len(server.requests) == 4
    assert done.summary["url"] == "unix:%s:/v1/chat/completions" % path
    assert done.summary["client"]["network"] == {"address": "unix:" + path}


# The oldest and the newest, which differ most in asyncio and ssl; those between them on request.
VERSIONS = [pytest.param(version, marks=[] if version in (SUPPORTED[0], SUPPORTED[-1]) else [pytest.mark.exhaustive])
            for version in SUPPORTED]  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_connect_and_tls_on_every_python(tmp_path, version, gateway, authority):
    server, proxy = gateway
    url = "http://me:%s@127.0.0.1:%d" % (SPELLED, proxy.port)
    program = [interpreter(version), str(ROOT / "llmbench.py")]
    done = run(tmp_path / "out", *flags_to(server, authority), "--proxy", url, "--total-requests", "6",
               "--concurrency", "2", program=program)  # fmt: skip
    assert [record["status"] for record in done.records] == ["ok"] * 6, done.stderr
    assert all(asked.line.startswith("CONNECT ") for asked in proxy.asked) and is_hidden(done)
    assert "Traceback" not in done.stderr


@linux
@pytest.mark.parametrize("version", VERSIONS)
def test_failing_ways_on_every_python(tmp_path, version, good_tls, asking_tls, trusted):
    """A silent proxy, a silent first address, a client certificate that is missing: the right status, no traceback."""
    program = [interpreter(version), str(ROOT / "llmbench.py")]
    common = ["--ca-cert", trusted["ca_cert"], "--total-requests", "4", "--concurrency", "4"]
    with FakeProxy(reply=replies(b"", "hold")) as silent:
        done = run(tmp_path / "a", "--url", "https://x.test", "--proxy", silent.url, "--connect-timeout", "300ms",
                   *common, program=program)  # fmt: skip
    assert {record["status"] for record in done.records} == {"timeout"} and "Traceback" not in done.stderr
    with Server(says(HELLO), good_tls) as server, full_listener("127.0.0.2", server.port):
        pinned = ["--resolve", "localhost:%d:127.0.0.2,127.0.0.1" % server.port]
        done = run(tmp_path / "b", "--url", "https://localhost:%d" % server.port, *pinned, *common, program=program)
    assert {record["status"] for record in done.records} == {"ok"} and "Traceback" not in done.stderr
    assert all(record["connect_ms"] >= 250 for record in done.records)
    with Server(says(HELLO), asking_tls) as server:
        done = run(tmp_path / "c", "--url", server.url, *common, program=program)
    assert len(done.records) == 4 and "Traceback" not in done.stderr
    assert all("--client-cert" in record["err"] for record in done.records)
