"""Software that stands before real endpoints, nginx and tinyproxy, and what `check` and `run` say of it.

Each test starts the program on loopback with a configuration of its own, before an endpoint of servers.py. Without the
program the test is skipped, with the reason.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
from certificates import Authority
from checking import FRAMES, PAUSE, check, endpoint, good, words_of
from running import expected_status, run
from servers import PATIENCE, Peer, Request, Server, closed_port

import llmbench

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
TINYPROXY = shutil.which("tinyproxy")
with_nginx = pytest.mark.skipif(not NGINX, reason="nginx is not installed")
with_tinyproxy = pytest.mark.skipif(not TINYPROXY, reason="tinyproxy is not installed")
VARIABLES = [scheme + "_proxy" for scheme in ("http", "https", "all", "no")]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*VARIABLES, *map(str.upper, VARIABLES), "LLMBENCH_TOKEN", "OPENAI_API_KEY"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setattr(llmbench, "EXPIRES_SOON", 1.0)  # the authority's certificates are for two days


# The programs.


@contextlib.contextmanager
def started(command: list[str], port: int, log: Path) -> Iterator[None]:
    """A server in the foreground, once it listens on its port."""
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            deadline = time.monotonic() + PATIENCE
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.01)
            yield
        finally:
            process.terminate()
            process.wait(PATIENCE)


NGINX_CONF = """
daemon off; master_process off; pid nginx.pid;
events { worker_connections 64; }
http {
  access_log off; client_body_temp_path body; proxy_temp_path proxy;
  fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  %(http)s
  server {
    listen 127.0.0.1:%(port)d %(listen)s;
    %(server)s
    location / { proxy_pass http://127.0.0.1:%(upstream)d; %(location)s }
  }
}
"""
KEPT = 'proxy_http_version 1.1; proxy_set_header Connection "";'
GZIP = "gzip on; gzip_types text/event-stream; gzip_min_length 0;"
ASKED = ("--header", "Accept-Encoding: gzip")  # nginx packs for those who ask only


@contextlib.contextmanager
def nginx(tmp_path: Path, upstream: Server, **parts: str) -> Iterator[str]:
    """nginx before that endpoint; the URL. parts: http, server, location and listen, what is added there."""
    port, conf = closed_port(), tmp_path / "nginx.conf"
    filled = {"http": "", "server": "", "location": "", "listen": "", **parts, "port": port, "upstream": upstream.port}
    conf.write_text(NGINX_CONF % filled)
    command = [str(NGINX), "-p", str(tmp_path), "-c", str(conf), "-e", str(tmp_path / "error.log")]
    with started(command, port, tmp_path / "output"):
        yield "http%s://127.0.0.1:%d" % ("s" if parts.get("listen") else "", port)


def with_tls(authority: Authority, *more: str) -> dict[str, str]:
    """The parts of an nginx that speaks TLS with a certificate of that authority."""
    certificate, key = authority.issue("leaf")
    lines = ["ssl_certificate %s; ssl_certificate_key %s;" % (certificate, key), *more]
    return {"listen": "ssl", "server": " ".join(lines)}


@contextlib.contextmanager
def tinyproxy(tmp_path: Path, *lines: str) -> Iterator[int]:
    """The port of a tinyproxy with these lines in its configuration."""
    port, conf = closed_port(), tmp_path / "tinyproxy.conf"
    own = ["Port %d" % port, "Listen 127.0.0.1", "Allow 127.0.0.1", "Timeout 60", "MaxClients 20"]
    conf.write_text("\n".join([*own, *lines, ""]))
    with started([str(TINYPROXY), "-d", "-c", str(conf)], port, tmp_path / "output"):
        yield port


def http_1_0(peer: Peer, request: Request) -> None:
    """An endpoint that streams without chunks, as HTTP/1.0 does."""
    if request.path.endswith("/models"):
        good(peer, request)
        return
    peer.send(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
    for text in words_of(request):
        time.sleep(PAUSE)
        peer.send(text)
    peer.close()


def keys_of(summary: dict[str, Any]) -> set[str]:
    """What the verdict of a run names."""
    return {reason["key"] for reason in summary["verdict"]["reasons"]}


def measured(tmp_path: Path, url: str, *words: str) -> Any:
    """A run of six requests through there."""
    load = ("--total-requests", "6", "--concurrency", "3", "--timeout", "20")
    result = run(tmp_path / "out", "--url", url, *load, *words)
    assert result.status == expected_status(result.summary, result.status if result.status == 3 else 0), result.stderr
    return result


# nginx: what it does to a stream.

HELD = [
    ("without chunks, buffering on", http_1_0, {}, ()),
    ("gzip", good, {"http": GZIP, "location": KEPT}, ASKED),
    ("gzip, HTTP/1.0 behind it", good, {"http": GZIP}, ASKED),
]
PASSED = [
    ("chunks, buffering on", good, {"location": KEPT}, ()),
    ("chunks, HTTP/1.0 asked for, buffering on", good, {}, ()),
    ("chunks, buffering off", good, {"location": KEPT + "proxy_buffering off;"}, ()),
    ("without chunks, buffering off", http_1_0, {"location": "proxy_buffering off;"}, ()),
    ("gzip that nobody asks for", good, {"http": GZIP, "location": KEPT}, ()),
]


@with_nginx
@pytest.mark.parametrize("behave,parts,words", [case[1:] for case in HELD], ids=[case[0] for case in HELD])
def test_a_stream_that_nginx_holds_back_is_called_buffered(tmp_path, behave, parts, words):
    with Server(behave) as upstream, nginx(tmp_path, upstream, **parts) as url:
        checked = check(url, *words)
        result = measured(tmp_path, url, *words)
    assert checked.status == 0
    assert checked.at("stream") == ("warning", "burst")
    finding = checked.finding("stream")
    assert finding["values"]["frames"] == FRAMES and finding["values"]["after"] > FRAMES * PAUSE * 1000
    assert finding["values"]["coding"] == ("gzip" if words else "identity")
    assert ("text/event-stream" if words else "proxy_buffering off") in finding["remedy"]
    assert "buffered" in keys_of(result.summary)
    assert ("compressed" in keys_of(result.summary)) == bool(words)


@with_nginx
@pytest.mark.parametrize("behave,parts,words", [case[1:] for case in PASSED], ids=[case[0] for case in PASSED])
def test_a_stream_that_nginx_lets_through_is_not(tmp_path, behave, parts, words):
    with Server(behave) as upstream, nginx(tmp_path, upstream, **parts) as url:
        checked = check(url, *words)
        result = measured(tmp_path, url, *words)
    assert checked.status == 0
    assert checked.at("stream") == ("ok", "streamed")
    assert checked.at("http") == ("ok", "answers")
    assert checked.finding("http")["values"]["server"].startswith("nginx")
    assert keys_of(result.summary).isdisjoint({"buffered", "compressed", "not_streamed"})
    assert 0.5 * PAUSE * 1000 < result.summary["itl_ms"]["p50"] < 3 * PAUSE * 1000


@with_nginx
def test_gzip_that_lets_each_frame_through_is_told_apart_from_one_that_holds_back(tmp_path):
    with Server(good) as upstream, nginx(tmp_path, upstream, http=GZIP, location="proxy_buffering off;") as url:
        checked = check(url, *ASKED)
        result = measured(tmp_path, url, *ASKED)
    assert checked.at("stream") == ("warning", "packed")
    assert "compressed" in keys_of(result.summary) and "buffered" not in keys_of(result.summary)


# nginx: connections.


@with_nginx
def test_a_connection_that_carries_five_requests_only(tmp_path):
    with Server(good) as upstream, nginx(tmp_path, upstream, http="keepalive_requests 5;", location=KEPT) as url:
        checked = check(url)
        result = measured(tmp_path, url, "--total-requests", "12", "--concurrency", "1")
    assert checked.at("kept") == ("warning", "counted")
    assert checked.finding("kept")["values"]["count"] == 5 and "keepalive_requests" in checked.finding("kept")["remedy"]
    reused = [record["reused"] for record in result.records]
    assert reused == [number % 5 > 0 for number in range(12)]
    assert all(record["status"] == "ok" and not record.get("retried") for record in result.records)
    assert sum(record["connect_ms"] > 0 for record in result.records) == reused.count(False)


@with_nginx
def test_how_long_nginx_keeps_an_idle_connection(tmp_path):
    told = {"http": "keepalive_timeout 75s 20s;", "location": KEPT}  # the second is the one in the header
    with Server(good) as upstream, nginx(tmp_path, upstream, **told) as url:
        checked = check(url)
    assert checked.at("kept") == ("ok", "timeout")
    assert checked.finding("kept")["values"]["timeout"] == "20"


@with_nginx
def test_an_nginx_that_keeps_no_connection(tmp_path):
    with Server(good) as upstream, nginx(tmp_path, upstream, http="keepalive_timeout 0;", location=KEPT) as url:
        checked = check(url)
        result = measured(tmp_path, url)
    assert checked.at("kept") == ("warning", "closed")
    assert checked.status == 0
    assert [record["reused"] for record in result.records] == [False] * 6


# nginx: refusals of its own.


@with_nginx
def test_nginx_limits_the_rate(tmp_path):
    limit = "if ($request_method = POST) { add_header Retry-After 7 always; return 429; }"
    with Server(good) as upstream, nginx(tmp_path, upstream, location=limit) as url:
        checked = check(url)
        result = measured(tmp_path, url)
    assert checked.status == 3
    assert checked.at("http") == ("failed", "refuses")
    assert "429" in checked.finding("http")["seen"] and "Retry-After: 7" in checked.finding("http")["remedy"]
    assert checked.at("rates") == ("warning", "limited")
    assert checked.document["ended_at"] == "http"
    assert result.status == 3 and {record["status"] for record in result.records} == {"rate_limited"}


@with_nginx
def test_nothing_stands_behind_nginx(tmp_path):
    with Server(good) as upstream, nginx(tmp_path, upstream) as url:
        upstream.stop_listening()
        checked = check(url, "--model", "tiny")
        result = measured(tmp_path, url)
    assert checked.status == 3
    assert checked.at("http") == ("failed", "refuses")
    assert "502" in checked.finding("http")["seen"] and "gateway" not in checked.finding("http")["seen"].split("502")[0]
    assert "model server behind" in checked.finding("http")["remedy"]
    assert {record["status"] for record in result.records} == {"http_error"}


@with_nginx
def test_requests_that_are_too_long_for_nginx(tmp_path):
    with Server(good) as upstream, nginx(tmp_path, upstream, http="client_max_body_size 50;") as url:
        checked = check(url)
    assert checked.status == 3
    assert "413" in checked.finding("http")["seen"] and "size" in checked.finding("http")["remedy"]


# nginx: TLS.


@with_nginx
def test_an_authority_of_ones_own(tmp_path, authority):
    trust = ("--ca-cert", str(authority.certificate))
    with Server(good) as upstream, nginx(tmp_path, upstream, location=KEPT, **with_tls(authority)) as url:
        checked = check(url, *trust)
        stranger = check(url)
        insecure = check(url, "--insecure")
        result = measured(tmp_path, url, *trust)
    assert checked.status == 0 and checked.at("tls") == ("ok", "own_ca")
    values = checked.finding("tls")["values"]
    assert values["version"].startswith("TLSv1.") and values["names"] == "localhost, 127.0.0.1"
    assert 1 < values["days"] <= 2.1
    assert stranger.status == 3 and stranger.at("tls") == ("failed", "distrusted")
    assert stranger.document["ended_at"] == "tls" and stranger.document["requests"] == 0
    assert "--ca-cert" in stranger.finding("tls")["remedy"] and stranger.finding("tls")["values"]["chain"]
    assert insecure.status == 0 and insecure.at("tls") == ("warning", "unverified")
    assert result.summary["client"]["network"]["tls_version"] == values["version"]


@with_nginx
@pytest.mark.parametrize("location,key", [(KEPT, "burst"), (KEPT + "proxy_buffering off;", "streamed")])
def test_nginx_fills_its_tls_buffer_unless_buffering_is_off(tmp_path, authority, location, key):
    """What it lets through in plain HTTP: with buffering on it asks for no flush, and TLS collects 16 KiB."""
    with Server(good) as upstream, nginx(tmp_path, upstream, location=location, **with_tls(authority)) as url:
        checked = check(url, "--ca-cert", str(authority.certificate))
        result = measured(tmp_path, url, "--ca-cert", str(authority.certificate))
    assert checked.finding("stream")["key"] == key
    assert ("buffered" in keys_of(result.summary)) == (key == "burst")


@with_nginx
def test_nginx_that_wants_a_client_certificate(tmp_path, authority):
    certificate, key = authority.issue("client")
    wants = with_tls(authority, "ssl_client_certificate %s; ssl_verify_client on;" % authority.certificate)
    trust = ("--ca-cert", str(authority.certificate))
    shown = (*trust, "--client-cert", str(certificate), "--client-key", str(key))
    with Server(good) as upstream, nginx(tmp_path, upstream, location="proxy_buffering off;", **wants) as url:
        without, checked = check(url, *trust), check(url, *shown)
        refused, result = run(tmp_path / "refused", "--url", url, *trust), measured(tmp_path, url, *shown)
    assert without.status == 3
    assert without.finding("tls")["state"] == "ok", "TLS itself is not refused: nginx says no in HTTP"
    assert without.at("models")[0] == "failed" and "--client-cert" in without.finding("http")["remedy"]
    assert checked.status == 0 and checked.at("stream") == ("ok", "streamed")
    assert "certificate" in refused.records[0]["err"] and refused.status == 3
    assert {record["status"] for record in result.records} == {"ok"}


# tinyproxy.


@with_tinyproxy
def test_tls_through_a_proxy_with_a_password(tmp_path, authority):
    with Server(good, authority.server_side()) as upstream, tinyproxy(tmp_path, "BasicAuth ann s3cret-word") as port:
        words = ("--ca-cert", str(authority.certificate), "--proxy")
        checked = check(upstream.url, *words, "http://ann:s3cret-word@127.0.0.1:%d" % port)
        nobody = check(upstream.url, *words, "http://127.0.0.1:%d" % port)
        wrong = check(upstream.url, *words, "http://ann:another-one@127.0.0.1:%d" % port)
        result = measured(tmp_path, upstream.url, *words, "http://ann:s3cret-word@127.0.0.1:%d" % port)
        refused = run(tmp_path / "refused", "--url", upstream.url, *words, "http://127.0.0.1:%d" % port)
    assert checked.status == 0 and checked.at("proxy") == ("ok", "tunnel")
    assert checked.finding("proxy")["values"]["reason"] == "--proxy"
    assert checked.at("stream") == ("ok", "streamed")
    assert "s3cret" not in checked.out and "another-one" not in wrong.out
    for failed in (nobody, wrong):
        assert failed.status == 3 and failed.at("proxy") == ("failed", "failed")
        assert failed.document["ended_at"] == "proxy" and failed.document["requests"] == 0
    assert "USER:PASSWORD" in nobody.finding("proxy")["remedy"]
    assert {record["status"] for record in result.records} == {"ok"}
    assert "127.0.0.1:%d" % port in result.summary["client"]["network"]["proxy"]
    assert {record["status"] for record in refused.records} == {"proxy_error"}


@with_tinyproxy
def test_plain_http_through_a_proxy_with_a_password(tmp_path):
    with Server(good) as upstream, tinyproxy(tmp_path, "BasicAuth ann s3cret-word") as port:
        checked = check(upstream.url, "--proxy", "http://ann:s3cret-word@127.0.0.1:%d" % port)
        nobody = check(upstream.url, "--proxy", "http://127.0.0.1:%d" % port)
        result = measured(tmp_path, upstream.url, "--proxy", "http://ann:s3cret-word@127.0.0.1:%d" % port)
    assert checked.status == 0 and checked.at("proxy") == ("ok", "absolute")
    assert checked.at("stream") == ("ok", "streamed")
    assert all("s3cret" not in str(request.headers) for request in upstream.requests)
    assert nobody.status == 3 and nobody.at("http") == ("failed", "refuses")
    assert "407" in nobody.finding("http")["seen"] and "USER:PASSWORD" in nobody.finding("http")["remedy"]
    assert {record["status"] for record in result.records} == {"ok"}


@with_tinyproxy
def test_a_proxy_that_lets_no_one_through_to_this_port(tmp_path, authority):
    with Server(endpoint(), authority.server_side()) as upstream, tinyproxy(tmp_path, "ConnectPort 443") as port:
        checked = check(upstream.url, "--proxy", "http://127.0.0.1:%d" % port)
    assert checked.status == 3 and checked.at("proxy") == ("failed", "failed")
    assert "403" in checked.finding("proxy")["seen"]
