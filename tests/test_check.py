"""`llmbench check`: each line's verdict against endpoints that give cause for it, and what it prints and costs."""

from __future__ import annotations

import ast
import datetime
import hashlib
import hmac
import json
import re
import ssl
import string
import subprocess
import time
from pathlib import Path

import gateways
import pytest
from checking import FRAMES, PAUSE, Checked, check, counted, endpoint, good, role, stream, words_of
from running import CHECKOUT
from servers import (
    CHUNKED,
    DONE,
    LAST_CHUNK,
    Server,
    answer,
    chunk,
    closed_port,
    event,
    full_listener,
    mock_server,
    says,
)  # fmt: skip

import llmbench
from conftest import ROOT, SUPPORTED, interpreter

SECRET = "sk-7Gh2-not-to-be-seen"
SOURCE = (ROOT / "llmbench.py").read_text(encoding="utf-8")
TEXTS = {language: llmbench.load_texts(llmbench.load_assets(), language) for language in ("en", "zh")}
VARIABLES = [scheme + "_proxy" for scheme in ("http", "https", "all", "no")]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in [*VARIABLES, *map(str.upper, VARIABLES), "LLMBENCH_TOKEN", "OPENAI_API_KEY"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    monkeypatch.setattr(llmbench, "EXPIRES_SOON", 1.0)  # the authority's certificates are for two days


@pytest.fixture(scope="module")
def whole_check():
    """A check of a good endpoint, and the requests that it took."""
    with Server(good) as server:
        yield check(server.url, "--model", "tiny"), list(server.requests)


def checked(*words, **behaviours):
    """A check of an endpoint that is good save for these answers."""
    with Server(endpoint(**behaviours)) as server:
        return check(server.url, *words)


def chat(*events, headers=b"", pause=PAUSE):
    """An answer of these events."""
    return lambda peer, _: stream(peer, list(events), headers, pause)


TEXT = [event("w%d " % number) for number in range(FRAMES)]
STOP = event(finish="stop")


# The whole.


def test_a_good_endpoint_has_nothing_to_complain_of(whole_check):
    result, _ = whole_check
    states = {finding["step"]: finding["state"] for finding in result.document["findings"]}
    hosts = {"files", "cpu"}  # this host may be a narrow one
    assert {step: state for step, state in states.items() if step not in hosts and state != "ok"} == {}
    assert list(states) == ["dns", "tcp", "proxy", "tls", "models", "http", "auth", "stream", "first", "reasoning",
                            "frames", "usage", "end", "max_tokens", "exact", "tool", "kept", "rates", "clock", "files",
                            "cpu"]  # fmt: skip
    assert result.status == 0 and result.document["usable"] and "ended_at" not in result.document


def test_it_takes_five_requests_on_one_connection(whole_check):
    result, requests = whole_check
    assert [request.path for request in requests] == ["/v1/models", *["/v1/chat/completions"] * 3, "/v1/models"]
    assert {request.connection for request in requests} == {0}
    assert result.document["requests"] == 5
    assert [sorted(request.fields) for request in requests[1:4]] == [
        ["max_tokens", "messages", "model", "stream", "stream_options"],
        ["ignore_eos", "max_tokens", "messages", "min_tokens", "model", "stream", "stream_options"],
        ["max_tokens", "messages", "model", "stream", "stream_options", "tools"],
    ]


@pytest.mark.parametrize("refuses", [(), ("stream_options",), ("stream_options", "max_tokens"),
                                     ("stream_options", "max_tokens", "ignore_eos", "tools")])  # fmt: skip
def test_it_never_takes_more_than_five(refuses):
    def picky(peer, request):
        if request.raw:
            named = [name for name in refuses if name in request.fields]
            if named:
                peer.send(answer(400, {"error": {"message": "unknown field " + named[0]}}))
                return
        good(peer, request)

    with Server(picky) as server:
        result = check(server.url)
    assert len(server.requests) == result.document["requests"] == 5
    assert result.status == 0


def test_its_lines_say_the_same_as_its_document(whole_check):
    result, _ = whole_check
    with Server(good) as server:
        shown = Checked("--url", server.url, "--model", "tiny", "--lang", "en").out
    flat = " ".join(shown.split())
    for finding in result.document["findings"]:
        label = TEXTS["en"]["check.step." + finding["step"]]
        assert re.search(r"^(ok|warning) +%s  " % re.escape(label), shown, re.MULTILINE), label
    assert "streamed: %d frames" % FRAMES in flat and "Requests sent: 5." in flat
    assert shown.rstrip().endswith("llmbench.pyz run --url %s --model tiny --lang en" % server.url)


def test_a_chinese_check_is_chinese():
    with Server(good) as server:
        shown = Checked("--url", server.url, "--lang", "zh").out
    assert "正常" in shown and "压测命令" in shown and "warning" not in shown


def test_the_built_in_mock_is_checked_like_any_other():
    result = Checked("--url", "mock:?ttft=20&itl=5", "--json")
    assert result.status == 0 and result.at("proxy") == ("ok", "none_mock")
    assert result.document["command"] == "python3 llmbench.pyz run --url 'mock:?ttft=20&itl=5' --model mock"


# The way.


def test_a_name_that_nobody_knows():
    result = check("http://no-such-host.invalid")
    assert result.status == 3 and result.at("dns") == ("failed", "failed")
    assert result.document["ended_at"] == "dns" and result.document["requests"] == 0
    assert "--resolve" in result.finding("dns")["remedy"]
    assert result.steps == ["dns", "files", "cpu"], "what is known without a network is told all the same"


def test_where_a_name_leads(monkeypatch):
    with Server(good) as server:
        result = check("http://localhost:%d" % server.port)
        fixed = check("http://llm.example:%d" % server.port, "--resolve", "llm.example:%d:127.0.0.1" % server.port)
    assert result.at("dns") == ("ok", "found") and "127.0.0.1" in result.finding("dns")["values"]["addresses"]
    assert fixed.at("dns") == ("ok", "fixed") and fixed.finding("dns")["values"]["addresses"] == "127.0.0.1"


def test_a_port_on_which_nobody_listens():
    port = closed_port()
    result = check("http://127.0.0.1:%d" % port)
    assert result.status == 3 and result.at("tcp") == ("failed", "failed")
    assert "connection refused" in result.finding("tcp")["seen"] and "server up" in result.finding("tcp")["remedy"]
    assert result.document["ended_at"] == "tcp"


def test_a_host_that_does_not_answer():
    with full_listener() as port:
        result = check("http://127.0.0.1:%d" % port, "--connect-timeout", "300ms")
    assert result.status == 3 and result.at("tcp") == ("failed", "failed")
    assert "firewall" in result.finding("tcp")["remedy"]


def test_from_which_address_it_goes(whole_check):
    result, _ = whole_check
    values = result.finding("tcp")["values"]
    assert re.match(r"127\.0\.0\.1:\d+$", values["local"]) and 0 < values["ms"] < 5000
    assert result.document["url"].startswith("http://" + values["address"])


def test_a_unix_socket(tmp_path):
    path = str(tmp_path / "llm.sock")
    with Server(good, address=path):
        result = check("unix:" + path)
    assert result.status == 0
    assert [result.at(step) for step in ("dns", "tcp", "proxy", "tls")] == [
        ("ok", "unix"), ("ok", "unix"), ("ok", "none_unix"), ("ok", "unix")]  # fmt: skip


@pytest.mark.parametrize("variables,key,reason", [
    ({}, "none_unset", None),
    ({"http_proxy": "http://127.0.0.1:1", "no_proxy": "llm.example"}, "none", "$no_proxy: llm.example"),
])  # fmt: skip
def test_why_no_proxy_is_used(monkeypatch, variables, key, reason):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with Server(good) as server:
        result = check("http://llm.example:%d" % server.port, "--resolve", "llm.example:%d:127.0.0.1" % server.port)
    assert result.status == 0 and result.at("proxy") == ("ok", key)
    assert result.finding("proxy")["values"].get("reason") == reason


def test_a_proxy_that_a_variable_names_and_that_is_not_there(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://ann:%s@127.0.0.1:%d" % (SECRET, closed_port()))
    result = check("http://llm.example")
    assert result.status == 3 and result.at("tcp") == ("failed", "failed")
    assert "the proxy" in result.finding("tcp")["seen"] and SECRET not in result.out


def test_a_peer_that_speaks_first():
    with Server(good, greet=lambda peer, _: peer.send(b"SSH-2.0-OpenSSH_9.2\r\n")) as server:
        time.sleep(0.01)
        result = check(server.url)
    assert result.status == 3 and result.document["ended_at"] == "http"
    assert "http:// or https://" in result.finding("http")["remedy"]


# TLS.


def signed_by(authority, name, organisation, days=300):
    """A certificate that an authority of that name signed for localhost, as (DER, its file and key)."""
    directory = authority.directory / re.sub(r"\W", "-", name + organisation)
    directory.mkdir(exist_ok=True)
    paths = [directory / part for part in ("ca.pem", "ca.key", "leaf.pem", "leaf.key", "leaf.csr", "names")]
    root, root_key, leaf, key, request, names = map(str, paths)
    paths[5].write_text("subjectAltName = DNS:llm.example, IP:127.0.0.1\n")
    authority.openssl("req", "-utf8", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "900", "-extensions", "ca",
                      "-subj", "/O=%s/CN=%s" % (organisation, name), "-keyout", root_key, "-out", root)  # fmt: skip
    authority.openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=llm.example", "-keyout", key,
                      "-out", request)  # fmt: skip
    authority.openssl("x509", "-req", "-in", request, "-CA", root, "-CAkey", root_key, "-set_serial", "5",
                      "-days", str(days), "-extfile", names, "-out", leaf)  # fmt: skip
    return root, leaf, key


def serving(leaf, key):
    """The TLS context of a server with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(leaf, key)
    return context


def test_a_certificate_of_ones_own_authority(authority):
    with Server(good, authority.server_side()) as server:
        result = check(server.url, "--ca-cert", str(authority.certificate))
    assert result.status == 0 and result.at("tls") == ("ok", "own_ca")
    values = result.finding("tls")["values"]
    assert values["names"] == "localhost, 127.0.0.1" and 1 < values["days"] < 2.1
    assert values["chain"] == "llmbench test < llmbench test" and values["version"].startswith("TLSv1.")


def test_a_certificate_that_soon_expires(authority, monkeypatch):
    monkeypatch.setattr(llmbench, "EXPIRES_SOON", 14.0)
    with Server(good, authority.server_side()) as server:
        result = check(server.url, "--ca-cert", str(authority.certificate))
    assert result.status == 0 and result.at("tls") == ("warning", "expiring")


@pytest.mark.parametrize("words,remedy", [
    ((), "give the CA with --ca-cert"),
    (("--server-name", "other.example"), "--server-name NAME"),
])  # fmt: skip
def test_a_certificate_that_is_refused_is_read_all_the_same(authority, words, remedy):
    trust = ("--ca-cert", str(authority.certificate)) if words else ()
    with Server(good, authority.server_side()) as server:
        result = check(server.url, *words, *trust)
    assert result.status == 3 and result.at("tls") == ("failed", "distrusted")
    assert remedy in result.finding("tls")["remedy"]
    assert result.finding("tls")["values"]["names"] == "localhost, 127.0.0.1"
    assert server.requests == [] and result.document["ended_at"] == "tls"


def test_a_certificate_for_another_name(authority):
    with Server(good, authority.server_side("elsewhere")) as server:
        result = check(server.url, "--ca-cert", str(authority.certificate))
    assert result.status == 3 and "elsewhere.example" in result.finding("tls")["remedy"]


def test_a_certificate_that_signed_itself(authority):
    key = str(authority.directory / "ca.key")
    with Server(good, serving(str(authority.certificate), key)) as server:
        result = check(server.url)
    assert result.status == 3 and "that very certificate" in result.finding("tls")["remedy"]


def test_an_interceptor_is_named(authority):
    root, leaf, key = signed_by(authority, "Zscaler Intermediate Root CA (zscalertwo.net)", "Zscaler Inc.")
    with Server(good, serving(leaf, key)) as server:
        trusted, stranger = check(server.url, "--ca-cert", root), check(server.url)
    assert trusted.status == 0 and trusted.at("tls") == ("warning", "intercepted")
    assert "Zscaler" in trusted.finding("tls")["seen"] and "exemption" in trusted.finding("tls")["remedy"]
    assert stranger.status == 3 and stranger.finding("tls")["remedy"].startswith("Zscaler opens TLS")


def test_tls_that_is_not_verified(authority):
    with Server(good, authority.server_side()) as server:
        result = check(server.url, "--insecure")
    assert result.status == 0 and result.at("tls") == ("warning", "unverified")
    assert result.finding("tls")["values"]["names"] == "localhost, 127.0.0.1"


def test_a_port_that_speaks_no_tls():
    with Server(good, greet=lambda peer, _: peer.send(answer(400, b"what?"))) as server:
        result = check(server.url.replace("http:", "https:"))
    assert result.status == 3 and result.at("tls") == ("failed", "failed")
    assert "http://" in result.finding("tls")["remedy"]


def test_a_port_that_waits_for_a_request_where_tls_is_spoken():
    with Server(good) as server:
        result = Checked("--url", server.url.replace("http:", "https:"), "--json", "--connect-timeout", "0.5")
    assert result.status == 3 and result.at("tls") == ("failed", "failed")
    assert "nothing answers in TLS" in result.finding("tls")["remedy"]


def handshake(subject="llm.example", issuer="Corp CA, Corp", days=100.0, refused="", verified=True, chain=()):
    leaf = llmbench.Certificate(subject, issuer, [subject], 0.0, 1000.0 + days * 86400)
    return llmbench.Handshake("TLSv1.3", "X", [leaf, *chain], verified, refused, 0.01)


SOMEONE = "certificate: unable to get local issuer certificate"


@pytest.mark.parametrize("given,private,ca,state,key,remedy", [
    ({"issuer": "DigiCert TLS RSA SHA256 2020 CA1, DigiCert Inc"}, False, None, "ok", "public_ca", ""),
    ({"issuer": "R11, Let's Encrypt"}, False, None, "ok", "public_ca", ""),
    ({}, True, None, "ok", "private_ca", ""),
    ({}, False, None, "warning", "unknown_ca", "unknown_ca"),
    ({}, False, "ca.pem", "ok", "own_ca", ""),
    ({"days": 0.5}, False, "ca.pem", "warning", "expiring", "expiring"),
    ({"issuer": "FortiGate CA, Fortinet"}, True, "ca.pem", "warning", "intercepted", "interceptor"),
    ({"days": -1.0, "refused": "certificate: certificate has expired"}, False, None, "failed", "distrusted", "expired"),
    ({"refused": SOMEONE}, False, None, "failed", "distrusted", "private_ca"),
    ({"refused": SOMEONE, "issuer": "DigiCert TLS CA1, DigiCert Inc"}, False, None, "failed", "distrusted",
     "intermediate"),
    ({"refused": SOMEONE, "issuer": "netskope.corp, Netskope"}, False, None, "failed", "distrusted", "interceptor_ca"),
    ({"refused": "certificate: self-signed certificate"}, False, None, "failed", "distrusted", "self_signed"),
    ({"refused": "certificate: self signed certificate in certificate chain"}, False, None, "failed", "distrusted",
     "private_ca"),
    ({"refused": "certificate: Hostname mismatch, certificate is not valid for 'a'."}, False, None, "failed",
     "distrusted", "name"),
    ({"verified": False}, True, None, "warning", "unverified", "insecure"),
])  # fmt: skip
def test_what_a_certificate_comes_to(given, private, ca, state, key, remedy):
    finding = llmbench.tls_finding(handshake(**given), 1000.0, llmbench.Config(ca_cert=ca), private)
    assert (finding.state, finding.key, finding.remedy) == (state, key, remedy)


def test_a_certificate_whose_time_has_not_come():
    leaf = llmbench.Certificate("a", "b", [], 5000.0, 9000.0)
    early = llmbench.Handshake("TLSv1.2", "X", [leaf], False, "certificate is not yet valid", 0.0)
    assert llmbench.tls_finding(early, 1000.0, llmbench.Config(), False).remedy == "not_yet"


def test_certificates_are_read_from_their_der(authority):
    _, leaf, _ = signed_by(authority, "Prüf-CA 测试", "Beispiel GmbH", days=20000)  # ends past 2049: a GeneralizedTime
    found = llmbench.read_certificate(ssl.PEM_cert_to_DER_cert(Path(leaf).read_text()))
    assert found.subject == "llm.example" and found.issuer == "Prüf-CA 测试, Beispiel GmbH"
    assert found.names == ["llm.example", "127.0.0.1"]
    said = subprocess.run(["openssl", "x509", "-in", leaf, "-noout", "-dates"], capture_output=True, check=True)
    dates = dict(line.split("=") for line in said.stdout.decode().split("\n") if line)
    for moment, name in ((found.begins, "notBefore"), (found.ends, "notAfter")):
        shown = datetime.datetime.strptime(dates[name], "%b %d %H:%M:%S %Y GMT").replace(tzinfo=datetime.timezone.utc)
        assert moment == shown.timestamp()


def test_what_is_no_certificate_is_a_parse_error(authority):
    whole = ssl.PEM_cert_to_DER_cert(authority.certificate.read_text())
    for size in range(0, len(whole), 7):
        with pytest.raises(llmbench.ParseError):
            llmbench.read_certificate(whole[:size])
    for data in (b"\x30\x03\x30\x01\x00", b"\xff" * 40, b"\x30\x80\x00\x00"):
        with pytest.raises(llmbench.ParseError):
            llmbench.read_certificate(data)


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_python_reads_the_chain_that_it_can(version, authority, tmp_path):
    """From 3.10 on all that the server sends, before that its own certificate."""
    root, leaf, key = signed_by(authority, "Corp Root", "Corp")
    chain = tmp_path / "chain.pem"
    chain.write_text(Path(leaf).read_text() + Path(root).read_text())
    with Server(good, serving(str(chain), key)) as server:
        words = [interpreter(version), str(ROOT / "llmbench.py"), "check", "--url", server.url, "--json"]
        done = subprocess.run([*words, "--ca-cert", root], stdout=subprocess.PIPE, timeout=60, check=False)
        refused = subprocess.run(words, stdout=subprocess.PIPE, timeout=60, check=False)
    document = json.loads(done.stdout.decode())
    tls = next(finding for finding in document["findings"] if finding["step"] == "tls")
    assert done.returncode == 0 and tls["key"] == "own_ca"
    assert tls["values"]["chain"] == "llm.example < Corp Root, Corp"
    assert tls["values"]["names"] == "llm.example, 127.0.0.1"
    assert refused.returncode == 3 and json.loads(refused.stdout.decode())["ended_at"] == "tls"


# HTTP, who asks, and the model.


@pytest.mark.parametrize("reply,seen,remedy", [
    (answer(404, {"detail": "Not Found"}), "404", "give the whole one in --url"),
    (answer(404, {"error": {"message": "The model `x` does not exist"}}), "404", "--model is spelled"),
    (answer(307, b"", "Location: https://elsewhere.example/v1"), "elsewhere.example", "give the URL"),
    (answer(500, {"error": "CUDA out of memory"}), "CUDA out of memory", "its log"),
    (answer(503, b"<html><body><h1>503 Service Unavailable</h1></body></html>"), "503", "model server behind"),
    (answer(400, {"error": {"message": "messages: wrong form"}}), "messages: wrong form", "--provider"),
    (answer(429, {"error": {"message": "slow down"}}, "Retry-After: 30"), "slow down", "Retry-After: 30"),
    (answer(429, {"error": {"message": "slow down"}}), "slow down", "have its limit raised"),
    (answer(200, b"<html><body>Welcome to the portal</body></html>"), "HTML", "not a chat endpoint"),
    (b"220 mail.example ESMTP\r\n", "not an HTTP/1.1 answer", "not a chat endpoint"),
    (CHUNKED + chunk(b'data: {"error":{"message":"no worker"}}\n\n') + LAST_CHUNK, "no worker", "its log"),
])  # fmt: skip
def test_what_the_endpoint_says_instead(reply, seen, remedy):
    result = checked("--model", "tiny", stream=says(reply))
    finding = result.finding("http")
    assert result.status == 3 and finding["state"] == "failed"
    assert seen in finding["seen"] and remedy in finding["remedy"]
    assert result.document["ended_at"] == "http" and not result.document["usable"]


def test_an_endpoint_that_never_answers():
    result = checked("--model", "tiny", "--timeout", "300ms", stream=lambda peer, _: peer.hold())
    assert result.status == 3 and "time-out" in result.finding("http")["seen"]
    assert "--timeout" in result.finding("http")["remedy"]


def test_a_connection_that_is_cut():
    result = checked("--model", "tiny", stream=lambda peer, _: peer.reset())
    assert result.status == 3 and result.at("http") == ("failed", "silent")


def guarded(peer, request):
    if request.headers.get("authorization") != "Bearer " + SECRET:
        peer.send(answer(401, {"error": {"message": "invalid key", "code": "invalid_api_key"}}))
        return
    good(peer, request)


@pytest.mark.parametrize("token,key,remedy", [
    (None, "refused_none", "give --token"),
    ("sk-another", "refused_token", "whole and not expired"),
    ("Bearer " + SECRET, "refused_token", "leave 'Bearer ' out"),
    ("'" + SECRET + "'", "refused_token", "quote"),
    (SECRET[:6] + " " + SECRET[6:], "refused_token", "blank"),
])  # fmt: skip
def test_a_token_that_is_refused(token, key, remedy):
    with Server(guarded) as server:
        result = check(server.url, *(["--token", token] if token else []))
    assert result.status == 3 and result.at("auth") == ("failed", key)
    assert remedy in result.finding("auth")["remedy"] and "invalid key" in result.finding("auth")["seen"]
    assert result.document["states"]["failed"] == 1, "the list of models failed for the same reason"
    assert result.document["ended_at"] == "auth" and result.at("http") == ("ok", "answers_nameless")
    assert SECRET not in result.out and (token is None or token not in result.out)


def test_where_a_token_came_from(monkeypatch, tmp_path):
    monkeypatch.setenv("KEY_OF_MINE", SECRET)
    (tmp_path / "token").write_text(SECRET + "\n")
    given = {"--token env:KEY_OF_MINE": ["--token", "env:KEY_OF_MINE"], "--token": ["--token", SECRET],
             "--token file:%s" % (tmp_path / "token"): ["--token=file:%s" % (tmp_path / "token")],
             "$OPENAI_API_KEY": []}  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    with Server(guarded) as server:
        for source, words in given.items():
            result = check(server.url, *words)
            assert result.status == 0 and result.at("auth") == ("ok", "taken_token")
            values = result.finding("auth")["values"]
            assert values["source"] == source and values["length"] == len(SECRET)
            assert SECRET not in result.out + result.err


def test_a_list_that_wants_no_token_and_a_chat_that_does():
    result = checked("--model", "tiny", stream=says(answer(403, {"error": {"message": "not your model"}})))
    assert result.status == 3 and result.at("auth") == ("failed", "refused_none")


def test_rights_that_a_token_lacks():
    result = checked("--token", SECRET, stream=says(answer(403, {"error": {"message": "not your model"}})))
    assert "does not allow this" in result.finding("auth")["remedy"]


@pytest.mark.parametrize("models,words,expected,status", [
    ({"data": [{"id": "tiny"}]}, (), ("ok", "only"), 0),
    ({"data": [{"id": "tiny"}, {"id": "large"}]}, (), ("ok", "first"), 0),
    ({"data": [{"id": "tiny"}]}, ("--model", "tiny"), ("ok", "listed"), 0),
    ({"data": [{"id": "tiny"}]}, ("--model", "tinny"), ("warning", "unlisted"), 0),
    ({"data": []}, ("--model", "tiny"), ("warning", "none"), 0),
    ({"data": []}, (), ("failed", "none"), 3),
    ({"hello": "world"}, (), ("failed", "none"), 3),
])  # fmt: skip
def test_the_model_list(models, words, expected, status):
    result = checked(*words, models=says(answer(200, models)))
    assert (result.at("models"), result.status) == (expected, status)
    assert ("ended_at" in result.document) == bool(status)


def test_a_models_name_moves_no_cursor():
    odd = "m\x1b]0;P\x07\x9b31m\u202e"
    with Server(endpoint(models=says(answer(200, {"data": [{"id": odd}]})))) as server:
        result, told = check(server.url), Checked("--url", server.url)
    for shown in (result.out, told.out):
        assert "--model" in shown and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert odd in result.document["command"]


def test_an_endpoint_without_a_model_list():
    result = checked("--model", "tiny", models=says(answer(404, {"detail": "Not Found"})))
    assert result.status == 0 and result.at("models") == ("warning", "refused")
    nameless = checked(models=says(answer(404, {"detail": "Not Found"})))
    assert nameless.status == 3 and "--model" in nameless.finding("models")["remedy"]


# The stream.


def in_one_piece(peer, request):
    time.sleep(0.2)
    peer.send(CHUNKED + b"".join(map(chunk, words_of(request))) + LAST_CHUNK)


def in_blocks(peer, request):
    peer.send(CHUNKED)
    events = words_of(request)
    for first in range(0, len(events), 6):
        time.sleep(0.06)
        peer.send(b"".join(map(chunk, events[first : first + 6])))
    peer.send(LAST_CHUNK)


def late_but_open(peer, request):
    peer.send(CHUNKED + chunk(role()))
    time.sleep(0.2)
    peer.send(b"".join(map(chunk, words_of(request)[1:])) + LAST_CHUNK)


@pytest.mark.parametrize("behave,expected", [
    (good, ("ok", "streamed")),
    (in_one_piece, ("warning", "burst")),
    (in_blocks, ("warning", "blocks")),
    (late_but_open, ("warning", "at_once")),
    (chat(role(), *TEXT[:3], STOP, counted(3), DONE), ("warning", "few")),
    (chat(role(), *TEXT, STOP, counted(FRAMES), DONE, headers=b"X-Accel-Buffering: no\r\n"), ("ok", "accel")),
])  # fmt: skip
def test_whether_it_is_streamed(behave, expected):
    result = checked(stream=behave)
    assert result.at("stream") == expected and result.status == 0


def test_an_answer_that_is_no_stream():
    whole = {"choices": [{"message": {"content": "one two"}, "finish_reason": "stop"}],
             "usage": {"prompt_tokens": 9, "completion_tokens": 2}}  # fmt: skip
    result = checked(stream=says(answer(200, whole, "Content-Type: application/json")))
    assert result.status == 0 and result.at("stream") == ("warning", "whole")
    assert result.at("usage") == ("ok", "whole") and "first" not in result.steps


@pytest.mark.parametrize("times,expected", [
    ([], "few"),
    ([0.1] * 7, "few"),
    ([1.0 + n * 0.02 for n in range(40)], "streamed"),
    ([1.0 + n * 0.0005 for n in range(400)], "streamed"),  # a fast server: 2,000 frames/s
    ([1.0] * 40, "burst"),
    ([1.0 + n * 0.0001 for n in range(40)], "burst"),
    ([1.0 + n // 8 * 0.1 + n % 8 * 0.0001 for n in range(40)], "blocks"),
    ([1.0 + n // 2 * 0.1 for n in range(40)], "streamed"),  # two at a time: a speculative decoder
    ([1.0 + n // 8 * 0.01 for n in range(40)], "streamed"),  # eight each 10 ms: a fast one that schedules ahead
])  # fmt: skip
def test_patterns_of_arrival(times, expected):
    assert llmbench.arrival_pattern(times, 0.0, times[-1] + 0.001 if times else 1.0)[0] == expected


def reasoning(text, key="reasoning_content"):
    return b"data: " + json.dumps({"choices": [{"delta": {key: text}}]}).encode() + b"\n\n"


@pytest.mark.parametrize("events,expected", [
    ([role(), *TEXT, STOP], ("ok", "role")),
    ([*TEXT, STOP], ("ok", "text")),
    ([b'data: {"choices":[],"prompt_filter_results":[]}\n\n', *TEXT, STOP], ("ok", "meta")),
])  # fmt: skip
def test_what_comes_before_the_text(events, expected):
    result = checked(stream=chat(*events, counted(FRAMES), DONE))
    assert result.at("first") == expected


@pytest.mark.parametrize("events,expected,path", [
    ([*TEXT, STOP], ("ok", "none"), None),
    ([reasoning("hm"), *TEXT, STOP], ("ok", "field"), "choices.0.delta.reasoning_content"),
    ([reasoning("hm", "reasoning"), *TEXT, STOP], ("ok", "field"), "choices.0.delta.reasoning"),
    ([event("<think>hm</think>"), *TEXT, STOP], ("ok", "tags"), ""),
    ([reasoning("hm"), event(finish="length")], ("warning", "only"), "choices.0.delta.reasoning_content"),
])  # fmt: skip
def test_where_reasoning_is(events, expected, path):
    result = checked(stream=chat(role(), *events, counted(FRAMES), DONE))
    assert result.at("reasoning") == expected and result.status == 0
    assert result.finding("reasoning")["values"].get("path") == path


@pytest.mark.parametrize("tokens,expected", [(FRAMES, "single"), (3 * FRAMES, "several"), (None, "unknown")])
def test_tokens_in_a_frame(tokens, expected):
    result = checked(stream=chat(role(), *TEXT, STOP, *([counted(tokens)] if tokens else []), DONE))
    assert result.at("frames") == ("ok", expected)


USAGE = {"prompt_tokens": 9, "completion_tokens": FRAMES, "total_tokens": 0}


@pytest.mark.parametrize("events,expected", [
    ([*TEXT, STOP, counted(FRAMES)], ("ok", "own")),
    ([*TEXT, event(finish="stop", usage=USAGE)], ("ok", "finish")),
    ([event("w ", usage={**USAGE, "completion_tokens": 1 + n}) for n in range(FRAMES)] + [STOP], ("ok", "repeated")),
    ([*TEXT, STOP], ("warning", "none")),
])  # fmt: skip
def test_where_usage_is(events, expected):
    result = checked(stream=chat(role(), *events, DONE))
    assert result.at("usage") == expected and result.status == 0
    if expected[0] == "ok":
        assert result.finding("usage")["values"]["path"] == "usage.completion_tokens"
    assert ("--token-mode chars" in result.document["command"]) == (expected[1] == "none")


@pytest.mark.parametrize("events,words,expected", [
    ([STOP, counted(FRAMES), DONE], (), ("ok", "both")),
    ([STOP, counted(FRAMES)], (), ("ok", "finish")),
    ([counted(FRAMES), DONE], (), ("ok", "marker")),
    ([counted(FRAMES)], (), ("warning", "missing")),
    ([counted(FRAMES)], ("--end-optional",), ("ok", "close")),
])  # fmt: skip
def test_how_a_stream_ends(events, words, expected):
    result = checked(*words, stream=chat(role(), *TEXT, *events))
    assert result.at("end") == expected and result.status == 0
    assert ("--end-optional" in result.document["command"]) == (expected[1] in ("missing", "close"))


def test_another_name_for_the_longest_answer():
    def modern(peer, request):
        if "max_tokens" in request.fields:
            peer.send(answer(400, {"error": {"message": "use max_completion_tokens, not max_tokens"}}))
        else:
            good(peer, request)

    result = checked(stream=modern)
    assert result.status == 0 and result.at("max_tokens") == ("ok", "negotiated")
    assert "--max-tokens-field max_completion_tokens" in result.document["command"]


@pytest.mark.parametrize("name", ["tgi", "ollama", "responses"])
def test_the_command_names_no_field_that_is_the_dialects_own(name):
    result = checked("--provider", name, "--model", "tiny", stream=good)
    assert "--max-tokens-field" not in result.document["command"]


def test_a_flood_of_events_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(llmbench.Witness, "MOST", 5)
    witness = llmbench.Witness(llmbench.make_provider(llmbench.Config(model="m")), lambda: None)
    for _ in range(4):
        witness._keep([("message", b"x")] * 3, 1.0)
    assert len(witness.events) == 5


def test_a_limit_that_is_not_kept():
    result = checked(stream=chat(role(), *TEXT, STOP, counted(900), DONE))
    assert result.at("max_tokens") == ("warning", "exceeded") and result.status == 0


@pytest.mark.parametrize("reply,expected", [
    (good, ("ok", "obeyed")),
    (chat(role(), event("hello"), STOP, counted(1), DONE), ("warning", "ignored")),
    (chat(role(), event("hello"), STOP, DONE), ("warning", "uncounted")),
    (says(answer(400, {"error": {"message": "ignore_eos is not permitted"}})), ("warning", "refused")),
    (says(answer(422, {"detail": "extra fields not permitted"})), ("warning", "refused")),
    (says(answer(500, {"error": "boom"})), ("warning", "failed")),
])  # fmt: skip
def test_answers_of_an_exact_length(reply, expected):
    result = checked(exact=reply)
    assert result.at("exact") == expected and result.status == 0


@pytest.mark.parametrize("reply,expected", [
    (good, ("ok", "called")),
    (chat(role(), event("Sunny."), STOP, counted(2), DONE), ("warning", "text")),
    (says(answer(400, {"error": {"message": '"auto" tool choice requires --enable-auto-tool-choice'}})),
     ("warning", "refused")),
    (says(answer(500, {"error": "boom"})), ("warning", "failed")),
])  # fmt: skip
def test_a_question_with_a_tool(reply, expected):
    result = checked(tool=reply)
    assert result.at("tool") == expected and result.status == 0


# What the answers say beside their text.


def with_headers(*lines):
    """A model list with more headers."""
    return says(answer(200, {"data": [{"id": "tiny"}]}, *lines))


def closing(peer, request):
    stream(peer, words_of(request), headers=b"Connection: close\r\n")
    peer.close()


@pytest.mark.parametrize("behaviours,expected", [
    ({}, ("ok", "kept")),
    ({"models": with_headers("Keep-Alive: timeout=5, max=100")}, ("ok", "timeout")),
    ({"models": lambda peer, request: (peer.send(answer(200, {"data": [{"id": "tiny"}]}, "Connection: close")),
                                       peer.close()),
      "stream": closing, "exact": closing, "tool": closing}, ("warning", "closed")),
    ({"tool": closing}, ("warning", "counted")),
])  # fmt: skip
def test_whether_connections_last(behaviours, expected):
    result = checked(**behaviours)
    assert result.at("kept") == expected and result.status == 0
    if expected[1] == "timeout":
        assert result.finding("kept")["values"]["timeout"] == "5"


def test_a_kept_connection_that_is_dead_is_replaced():
    def behave(peer, request):
        if request.number == 1:
            peer.reset()  # as if the endpoint had given it up while it was idle
        else:
            good(peer, request)

    with Server(behave) as server:
        result = check(server.url)
    assert result.status == 0 and result.document["requests"] == 5


@pytest.mark.parametrize("lines,expected", [
    ([], ("ok", "none")),
    (["X-RateLimit-Limit-Requests: 60", "X-RateLimit-Remaining-Requests: 59"], ("ok", "told")),
    (["RateLimit-Limit: 60", "RateLimit-Remaining: 0"], ("warning", "spent")),
])  # fmt: skip
def test_rate_limits(lines, expected):
    result = checked(models=with_headers(*lines))
    assert result.at("rates") == expected and result.status == 0
    for line in lines:
        assert line.lower() in result.finding("rates")["seen"]


@pytest.mark.parametrize("offset,expected", [
    (0, ("ok", "right")), (-90, ("warning", "ahead")), (90, ("warning", "behind")), (None, ("ok", "unknown")),
])  # fmt: skip
def test_clocks(offset, expected):
    def models(peer, _):
        date = [] if offset is None else ["Date: " + llmbench.write_http_date(int(time.time()) + offset)]
        peer.send(answer(200, {"data": [{"id": "tiny"}]}, *date))

    result = checked(models=models)
    assert result.at("clock") == expected and result.status == 0
    if offset:
        assert 88 <= result.finding("clock")["values"]["seconds"] <= 91


def test_a_slow_answer_does_not_make_a_clock_wrong():
    """What is between sending and the head bounds what can be known."""
    slow = llmbench.Reply("stream", "ok", "", llmbench.Head(1, 200, "OK", {"date": "Tue, 24 Nov 2026 08:05:24 GMT"}),
                           b"", 1795507464.0, 1795507524.5, False, True)  # fmt: skip
    assert llmbench.clock_finding([slow]).key == "right"
    assert llmbench.clock_finding([slow._replace(sent=1795507590.0, headed=1795507591.0)]).key == "ahead"


# This host.


@pytest.mark.parametrize("limits,state,key", [
    ((1024, 1048576), "ok", "room"), ((256, 1024), "warning", "narrow"), ((1024, -1), "ok", "unlimited"),
    (None, "ok", "unknown"),
])  # fmt: skip
def test_open_files(limits, state, key):
    finding = llmbench.files_finding(limits)
    assert (finding.state, finding.key) == (state, key)


@pytest.mark.parametrize("quota,state,key", [
    (None, "ok", "usable"), (2.0, "ok", "quota"), (0.5, "warning", "narrow"),
])  # fmt: skip
def test_cpus(quota, state, key):
    finding = llmbench.cpu_finding(2, quota, 8)
    assert (finding.state, finding.key) == (state, key)


def test_what_this_host_is_asked():
    import resource

    files, cpu = llmbench.host_findings()
    assert files.values.get("soft") in (None, resource.getrlimit(resource.RLIMIT_NOFILE)[0], -1)
    assert cpu.values["usable"] == llmbench.usable_cpus()


# The command of the run, and secrets.


def test_the_command_can_be_given_as_it_is(tmp_path, pyz):
    with Server(good) as server:
        result = check(server.url, "--header", "X-Team: blue team", "--body", '{"temperature": 0}')
        end = " --total-requests 2 --progress none --out %s" % (tmp_path / "out")
        command = result.document["command"] + end
        done = subprocess.run(command, shell=True, capture_output=True, check=False, cwd=str(pyz.parent))
    assert done.returncode in (0, 4), done.stderr
    assert server.requests[-1].headers["x-team"] == "blue team" and server.requests[-1].fields["temperature"] == 0
    assert server.requests[-1].fields["model"] == "tiny"


@pytest.mark.parametrize("words,command", [
    (["--token", SECRET], "--token env:LLMBENCH_TOKEN --model tiny"),
    (["--token=" + SECRET, "--timeout", "9s"], "--token=env:LLMBENCH_TOKEN --timeout 9s --model tiny"),
    (["-token", "cmd:echo " + SECRET[:0] + "x"], "-token 'cmd:echo x' --model tiny"),
    (["--header", "X-Api-Key: " + SECRET], "--header 'X-Api-Key: ***' --model tiny"),
    (["--header", "--token: 5"], "--header '--token: ***' --model tiny"),
])  # fmt: skip
def test_secrets_in_the_command(words, command):
    with Server(good) as server:
        result = Checked("--url", server.url, *words, "--json")
    assert result.document["command"] == "python3 llmbench.pyz run --url %s %s" % (server.url, command)
    assert SECRET not in result.out + result.err
    named = "LLMBENCH_TOKEN" in result.document["command"]
    assert any("$LLMBENCH_TOKEN" in note for note in result.document["notes"]) == named
    assert any("***" in note for note in result.document["notes"]) == ("***" in command)


def test_an_endpoint_that_gives_the_token_back():
    reply = says(answer(401, {"error": {"message": "no such key: " + SECRET}}, "X-RateLimit-Key: " + SECRET))
    with Server(reply) as server:
        for words in (["--json"], []):
            result = Checked("--url", server.url, "--token", SECRET, "--model", "tiny", *words)
            assert result.status == 3 and "no such key: ***" in result.out
            assert SECRET not in result.out + result.err


def test_what_an_endpoint_says_moves_no_cursor():
    reply = says(answer(500, {"error": {"message": "a\x1b[2Jb"}}))
    with Server(endpoint(stream=reply)) as server:
        assert "\x1b" not in Checked("--url", server.url).out


@pytest.mark.parametrize("words,says_so", [
    ([], "--url is needed"),
    (["--url", "ftp://a"], "scheme"),
    (["--url", "http://a", "--concurrency", "4"], "--concurrency is not a flag"),
    (["--url", "http://a", "--provider", "nope"], "unknown"),
    (["--url", "http://a", "--ca-cert", "/nonexistent"], "--ca-cert"),
    (["--url", "http://a", "--client-cert", "x"], "https"),
])  # fmt: skip
def test_a_mistake_of_the_users_is_one_line(words, says_so):
    result = Checked(*words)
    if "--ca-cert" in words:
        result = Checked("--url", "https://127.0.0.1:1", *words[2:])
    assert result.status == 2 and says_so in result.err and result.err.count("\n") == 1
    assert result.err.startswith("llmbench: error: ")


def test_its_flags_are_those_of_run():
    known = {flag.name for flag in llmbench.RUN_FLAGS}
    assert set(llmbench.CHECK_FLAGS) <= known
    load = {"concurrency", "rps", "arrival", "ramp", "total-requests", "duration", "grace", "warmup", "slo", "find-max",
            "max-errors", "max-total-tokens", "shard", "start-at", "dry-run", "processes", "seed", "out", "progress"}
    assert not load & set(llmbench.CHECK_FLAGS)


def test_it_ends_a_pipe_that_is_closed_well(tmp_path):
    with mock_server() as url:
        words = "%s check --url %s | head -1; exit ${PIPESTATUS[0]}" % (" ".join(CHECKOUT), url)
        done = subprocess.run(["bash", "-c", words], capture_output=True, check=False)
    assert done.returncode in (0, 3) and b"Traceback" not in done.stderr
    assert done.stdout.startswith(b"Check of ")


def test_its_status_is_the_same_when_nobody_reads_on():
    words = "%s check --url http://127.0.0.1:1/v1 | true; exit ${PIPESTATUS[0]}" % " ".join(CHECKOUT)
    done = subprocess.run(["bash", "-c", words], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (3, b"")


# Texts.


def finding_calls():
    """Each call in the code that makes a finding: (step, keys, remedies), None for what is put together elsewhere."""
    tree = ast.parse(SOURCE)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("fine", "doubtful", "failing", "state"):
            step = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            parts = [strings(part) for part in node.args[1:3]]
            yield step, parts[0] if parts else [], parts[1] if len(parts) > 1 else []


def strings(node):
    """The texts that an expression may be, as far as they are written in it."""
    if isinstance(node, ast.Constant):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return strings(node.body) + strings(node.orelse)
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in strings(value)]
    return []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_finding_has_its_texts(language):
    texts, seen = TEXTS[language], set()
    for step, keys, remedies in finding_calls():
        for key in keys if step else []:
            if not key.endswith("_"):
                seen.add("check.%s.%s" % (step, key))
        seen |= {"check.do." + remedy for remedy in remedies if remedy}
    assert len(seen) > 90
    assert sorted(key for key in seen if key not in texts) == []


def test_every_text_is_of_use():
    """A text whose key stands nowhere in the code is one that nobody sees."""
    code = SOURCE[SOURCE.index(". Check: ") :]
    named = set(re.findall(r'"([a-z0-9_.]+)"', code))
    unused = []
    for key in TEXTS["en"]:
        parts = key.split(".")
        last = ".".join(parts[2:]) or parts[-1]
        if parts[0] == "check" and parts[1] not in ("step", "state"):
            whole = last in named or ".".join(parts[1:]) in named
            built = any(last.startswith(prefix) and last[len(prefix) :] in named | {"none"}
                        for prefix in ("none_", "taken_", "refused_"))  # fmt: skip
            if not whole and not built:
                unused.append(key)
    assert unused == []


def test_the_texts_ask_for_values_that_are_there():
    """By name: both languages have the same ones (test_terminal.py), and the findings above filled theirs in."""
    for language in ("en", "zh"):
        for key, text in TEXTS[language].items():
            if key.startswith("check."):
                names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
                assert all(re.match(r"^[a-z_]+$", name) for name in names), key


def test_help():
    done = subprocess.run([*CHECKOUT, "check", "--help"], stdout=subprocess.PIPE, check=True)
    text = done.stdout.decode()
    assert "exit status: 0 usable, 2 usage, 3 not usable" in text and "--client-cert" in text and "--json" in text


# Every scheme, dialect and file.

KEYS = ["--auth-key", gateways.KEY, "--auth-secret", gateways.SECRET]


@pytest.mark.parametrize("scheme", list(gateways.SCHEMES))
def test_a_check_is_signed_as_a_run_is(scheme):
    name, make, flags = gateways.SCHEMES[scheme]
    verify_post = make()

    def verify(request):
        if request.raw:  # these gateways know one method
            verify_post(request)

    with gateways.Gateway(verify, good) as server:
        result = check(server.url, "--auth", name, *KEYS, *flags)
    assert server.refusals == [] and result.status == 0
    assert result.at("auth") == ("ok", "taken_scheme") and result.finding("auth")["values"]["scheme"] == name
    assert gateways.SECRET not in result.out


def test_a_signature_that_is_refused_is_explained():
    with gateways.Gateway(gateways.check_hmac(), good) as server:
        words = ("--url", server.url, "--model", "tiny", "--auth", "hmac", "--auth-key", gateways.KEY, "--auth-secret")
        result = Checked(*words, "another-secret", "--json", "--explain")
        shown = Checked(*words, "another-secret", "--explain").out
    assert result.status == 3 and result.at("auth") == ("failed", "refused_scheme")
    assert "--explain" in result.finding("auth")["remedy"] and "the signature" in result.finding("auth")["seen"]
    told = result.document["explained"]
    assert (told["request"], told["method"], told["target"]) == ("stream", "POST", "/v1/chat/completions")
    sent = next(request for request in server.requests if request.raw)
    texts = [step["text"] for step in told["steps"]]
    canonical = "\n".join([sent.headers["x-timestamp"], sent.headers["x-nonce"],
                           hashlib.sha256(sent.raw).hexdigest()])  # fmt: skip
    assert canonical in texts, "what was signed is shown to the letter"
    signature = hmac.new(b"another-secret", canonical.encode(), hashlib.sha256).hexdigest()
    assert signature == sent.headers["x-signature"] and signature in texts
    assert "x-nonce: " in " ".join(told["headers"]).lower()
    assert "another-secret" not in result.out + shown and "How the request 'stream' was signed" in shown


def test_what_would_be_signed_is_explained_without_an_endpoint():
    result = check("http://127.0.0.1:%d" % closed_port(), "--model", "tiny", "--auth", "tc3", "--explain", *KEYS)
    assert result.status == 3 and result.document["ended_at"] == "tcp"
    told = result.document["explained"]
    assert [step["name"] for step in told["steps"]] and any("TC3-HMAC-SHA256" in step["text"] for step in told["steps"])
    assert gateways.SECRET not in result.out


def test_what_is_not_signed_is_explained_by_its_headers():
    with Server(good) as server:
        result = check(server.url, "--explain", "--token", SECRET, "--header", "X-Api-Key: " + SECRET)
    assert result.document["explained"]["steps"] == [] and SECRET not in result.out
    assert "X-Api-Key: ***" in result.document["explained"]["headers"]


def test_a_token_that_is_asked_for_first(tmp_path):
    def hands_out(peer, request):
        if request.path.startswith("/oauth"):
            peer.send(answer(200, {"access_token": SECRET, "expires_in": 3600}))
        else:
            assert "access_token=" + SECRET in request.path or SECRET in request.headers.get("authorization", "")
            good(peer, request)

    with Server(hands_out) as server:
        words = ["--auth", "baidu-oauth", *KEYS, "--auth-opt", "exchange-url=%s/oauth/2.0/token" % server.url]
        result = check(server.url, "--model", "tiny", *words)
        assert not server.complaints
    assert result.status == 0 and result.document["requests"] == 5 and SECRET not in result.out
    nowhere = ["--auth", "baidu-oauth", *KEYS, "--auth-opt", "exchange-url=http://127.0.0.1:%d/t" % closed_port()]
    with Server(good) as server:
        refused = check(server.url, "--model", "tiny", *nowhere)
    assert refused.status == 3 and refused.at("auth") == ("failed", "no_grant")
    assert refused.document["ended_at"] == "auth" and refused.document["requests"] == 0 and server.requests == []


def test_a_provider_of_ones_own(tmp_path):
    own = tmp_path / "acme.json"
    own.write_text(json.dumps({
        "name": "acme", "path": "/talk", "auth": "none",
        "body": {"question": "${prompt}", "length": "${max_tokens}"},
        "text": ["result.piece"], "reasoning": ["result.thought"], "finish": "result.why",
        "usage": {"in_tokens": ["count.prompt_tokens"], "out_tokens": ["count.answer_tokens"]},
        "end": [{"path": "finished", "equals": True}],
    }))  # fmt: skip
    pieces = [{"result": {"thought": "hm"}}] + [{"result": {"piece": "w%d " % number}} for number in range(FRAMES)]
    last = {"result": {"why": "stop"}, "count": {"prompt_tokens": 5, "answer_tokens": FRAMES}, "finished": True}
    events = [b"data: " + json.dumps(piece).encode() + b"\n\n" for piece in (*pieces, last)]
    with Server(chat(*events)) as server:
        result = check(server.url, "--provider", str(own))
    assert result.status == 0 and result.document["model"] == "acme"
    assert {request.path for request in server.requests} == {"/talk"} and len(server.requests) == 1
    assert result.at("models") == ("ok", "nowhere") and result.at("tool") == ("ok", "unknown")
    assert result.at("exact") == ("ok", "unknown") and result.at("stream") == ("ok", "streamed")
    assert result.finding("reasoning")["values"]["path"] == "result.thought"
    assert result.at("usage") == ("ok", "finish")
    assert result.finding("usage")["values"]["path"] == "count.answer_tokens"
    assert "--provider %s" % own in result.document["command"]


def test_a_dialect_of_another_kind():
    def anthropic(peer, request):
        if request.path.endswith("/models"):
            peer.send(answer(200, {"data": [{"type": "model", "id": "claude-tiny"}], "has_more": False}))
            return
        texts = [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "w%d " % number}}
                 for number in range(FRAMES)]  # fmt: skip
        if "tools" in request.fields:
            assert request.fields["tools"][0]["input_schema"]
            block = {"type": "tool_use", "id": "t", "name": "get_weather", "input": {}}
            texts = [{"type": "content_block_start", "index": 0, "content_block": block},
                     {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta",
                                                                          "partial_json": '{"city": "Paris"}'}}]
        frames = [{"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 1}}},
                  *texts,
                  {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": FRAMES}},
                  {"type": "message_stop"}]  # fmt: skip
        stream(peer, [b"event: %s\ndata: %s\n\n" % (frame["type"].encode(), json.dumps(frame).encode())
                      for frame in frames])  # fmt: skip

    with Server(anthropic) as server:
        result = check(server.url, "--provider", "anthropic", "--token", SECRET)
        assert not server.complaints
    assert result.status == 0 and result.document["model"] == "claude-tiny"
    assert server.requests[0].headers["x-api-key"] == SECRET
    expected = {"stream": "streamed", "first": "meta", "end": "both", "tool": "called", "exact": "unknown",
                "usage": "repeated"}  # fmt: skip
    assert {step: result.finding(step)["key"] for step in expected} == expected


def test_an_endpoint_that_is_not_to_stream():
    whole = {"choices": [{"message": {"content": "one two"}, "finish_reason": "stop"}],
             "usage": {"prompt_tokens": 9, "completion_tokens": 24}}  # fmt: skip

    def plain(peer, request):
        if request.raw:
            assert request.fields["stream"] is False
            peer.send(answer(200, whole, "Content-Type: application/json"))
        else:
            good(peer, request)

    with Server(plain) as server:
        result = check(server.url, "--no-stream")
        assert not server.complaints
    assert result.status == 0 and result.at("stream") == ("ok", "unwanted")
    assert result.document["command"].endswith("--no-stream --model tiny")


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_an_endpoint_that_wants_a_client_certificate(authority, version):
    """With TLS 1.3 the handshake ends well, and the alert comes behind it: as late as in place of the first answer."""
    context = authority.server_side()
    context.load_verify_locations(str(authority.certificate))
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
    certificate, key = map(str, authority.issue("client"))
    trust = ("--ca-cert", str(authority.certificate))
    with Server(good, context) as server:
        without = check(server.url, "--model", "tiny", *trust)
        result = check(server.url, *trust, "--client-cert", certificate, "--client-key", key)
    ended = without.document["ended_at"]
    assert without.status == 3 and ended in (["tls"] if version == "TLSv1_2" else ["tls", "http"])
    assert "--client-cert" in without.finding(ended)["remedy"]
    assert result.status == 0 and result.finding("tls")["values"]["version"] == version.replace("_", ".")
