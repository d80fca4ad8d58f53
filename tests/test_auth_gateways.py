"""Runs against gateways that verify each request's signature themselves, and token exchanges that renew tokens."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import sys
import threading
import time
import urllib.parse

import gateways
import pytest
from gateways import KEY, SCHEMES, SECRET, Gateway, Refused, demand
from running import FILES, expected_status, run
from servers import (
    DONE,
    HELLO,
    Measured,
    Request,
    Server,
    answer,
    event,
    event_loop,
    measure,
    prepare,
    settings,
    streamed,
    usage,
)

import llmbench

FLAGS = ["--auth-key", KEY, "--auth-secret", SECRET]


TARGET = "/v1/chat/completions?b=1&a=x%20y"


def signed_request(scheme, moment=None, nonce="a" * 32):
    """A request as llmbench signs it, as the gateway's server would read it."""
    body = b'{"model":"m"}'
    name, _, flags = SCHEMES[scheme]
    options = dict(flag.split("=", 1) for flag in flags[1::2])
    auth = llmbench.AUTHS[name](llmbench.Secrets(KEY, SECRET, "", options))
    headers = [("Host", "gw.example:8080"), ("Content-Type", "application/json"), ("X-Request-Id", "r1")]
    signed = auth.sign("POST", TARGET, headers, body, time.time() if moment is None else moment, nonce)
    return Request(0, 0, signed.target, {name.lower(): value for name, value in signed.headers}, body, 0.0)


def spoilt(text, place):
    """The text with another character at this place."""
    letter = "0" if text[place] != "0" else "1"
    return text[:place] + letter + text[place + 1 :] if place != -1 else text[:-1] + letter


# --- the gateways themselves refuse what they should ------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_signed_request_passes(scheme):
    SCHEMES[scheme][1]()(signed_request(scheme))


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in ("bce-v1", "zhipu-jwt")])
def test_a_changed_byte_of_the_body_is_refused(scheme):
    request = signed_request(scheme)
    for place in (0, 5, -1):
        changed = bytearray(request.raw)
        changed[place] ^= 1
        with pytest.raises(Refused):
            SCHEMES[scheme][1]()(request._replace(raw=bytes(changed)))


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in ("tc3", "zhipu-jwt", "hmac")])
def test_a_changed_target_is_refused(scheme):
    request = signed_request(scheme)
    for path in (request.path + "1", request.path.replace("b=1", "b=2"), request.path.replace("/v1/", "/v2/")):
        with pytest.raises(Refused):
            SCHEMES[scheme][1]()(request._replace(path=path))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_changed_signature_is_refused(scheme):
    request = signed_request(scheme)
    name = "x-signature" if scheme == "hmac" else "authorization"
    for place in (-5, -9, -12):
        headers = {**request.headers, name: spoilt(request.headers[name], place)}
        with pytest.raises(Refused):
            SCHEMES[scheme][1]()(request._replace(headers=headers))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("off", [-3600, 3600])
def test_a_wrong_time_is_refused(scheme, off):
    with pytest.raises(Refused, match="the time is off"):
        SCHEMES[scheme][1]()(signed_request(scheme, time.time() + off))


@pytest.mark.parametrize("scheme", ["hmac", "hmac-custom"])
def test_a_replayed_nonce_is_refused(scheme):
    check = SCHEMES[scheme][1]()
    check(signed_request(scheme))
    with pytest.raises(Refused, match="seen before"):
        check(signed_request(scheme))
    check(signed_request(scheme, nonce="b" * 32))


@pytest.mark.parametrize("scheme", ["tc3", "volc-v4", "huawei-sdk", "bce-v1"])
def test_a_changed_signed_header_is_refused(scheme):
    request = signed_request(scheme)
    with pytest.raises(Refused):
        SCHEMES[scheme][1]()(request._replace(headers={**request.headers, "host": "other.example"}))


# --- runs -------------------------------------------------------------------------------------------------------------


def has_no_secret(text, *secrets):
    for secret in secrets or (SECRET, KEY):
        assert secret not in text and urllib.parse.quote(secret, safe="") not in text
        assert base64.b64encode(secret.encode()).decode() not in text


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_is_let_in(tmp_path, scheme):
    name, check, flags = SCHEMES[scheme]
    with Gateway(check()) as server:
        made = run(tmp_path / "out", "--url", server.url + "/v1/chat/completions?tenant=a%2Fb", "--auth", name, *FLAGS,
                   *flags, "--concurrency", "3", "--total-requests", "12")  # fmt: skip
    assert server.refusals == [] and len(server.requests) == 12
    assert [record["status"] for record in made.records] == ["ok"] * 12
    assert made.files == FILES
    has_no_secret(made.everything)
    assert made.lines[0]["run"]["config"]["auth"] == name


def test_two_processes_and_a_list_of_models(tmp_path):
    check = gateways.check_hmac()

    def then(peer, request):
        if request.raw:  # the prompt's length is counted, so that the probes for it have something to find
            peer.send(streamed(event("Hello"), event(finish="stop"), usage(2, len(request.raw) // 4), DONE))
        else:
            peer.send(answer(200, {"data": [{"id": "tiny"}]}))

    with Gateway(check, then) as server:
        made = run(tmp_path / "out", "--url", server.url, "--auth", "hmac", *FLAGS, "--model=", "--warmup", "2",
                   "--concurrency", "4", "--processes", "2", "--total-requests", "20",
                   "--input-tokens", "128")  # fmt: skip
    assert server.refusals == []
    paths = [request.path for request in server.requests]
    assert paths.count("/v1/models") == 1 and paths.count("/v1/chat/completions") > 22
    assert {record["status"] for record in made.records} == {"ok"}


@pytest.mark.parametrize("shift", [400, -400])
def test_a_wrong_clock_is_a_refusal(monkeypatch, shift):
    check = gateways.check_hmac()
    real = time.time
    monkeypatch.setattr(gateways.time, "time", lambda: real() + shift)
    with Gateway(check) as server:
        measured = measure(server.url, auth="hmac", auth_key=KEY, auth_secret=SECRET, total_requests=2)
        assert set(measured.statuses) <= {"auth_error", "ok"}
    monkeypatch.undo()


def test_a_request_that_is_sent_again_is_signed_again():
    """A dead idle connection: the same job goes out a second time, with a nonce of its own."""
    check, drops = gateways.check_hmac(), []

    def then(peer, request):
        peer.send(HELLO)
        if request.connection == 0:
            drops.append(peer)
            peer.close()  # keep-alive was promised

    with Gateway(check, then) as server:
        measured = measure(server.url, auth="hmac", auth_key=KEY, auth_secret=SECRET, total_requests=4)
    assert server.refusals == [] and drops
    assert measured.statuses == ["ok"] * 4


def test_a_negotiated_request_is_signed_again():
    check = gateways.check_hmac()

    def then(peer, request):
        refused = "stream_options" in request.fields
        peer.send(answer(400, {"error": {"message": "unknown field stream_options"}}) if refused else HELLO)

    with Gateway(check, then) as server:
        measured = measure(server.url, auth="hmac", auth_key=KEY, auth_secret=SECRET, total_requests=3)
    assert server.refusals == []
    assert [record["status"] for record in measured.of_phase("measure")] == ["ok"] * 3
    assert len({request.headers["x-nonce"] for request in server.requests}) == len(server.requests) == 5


def test_a_wrong_secret_ends_the_run(tmp_path):
    with Gateway(gateways.check_tc3) as server:
        made = run(tmp_path / "out", "--url", server.url, "--auth", "tc3", "--auth-key", KEY, "--auth-secret",
                   "wr0ng-s3cret", "--auth-opt", "service=hunyuan", "--total-requests", "20")  # fmt: skip
    assert made.status == 3 and {record["status"] for record in made.records} == {"auth_error"}
    assert len(server.requests) == 3
    assert "wr0ng-s3cret" not in made.everything


class Declared(llmbench.Provider):
    """A provider whose headers and query hold steps, as one that a file declares."""

    name = "declared"
    summary = "steps"

    def __init__(self, config):
        super().__init__(config)
        steps = [
            {"set": "ts", "to": "time('epoch_ms')"},
            {"set": "once", "to": "nonce"},
            {"set": "sig", "to": r"hmac(secret, join('\n', method, target, ts, once, sha256(body)), out='b64url')"},
        ]
        self.auth = llmbench.Steps(self.auth, llmbench.Pipeline(steps, "declared"))

    def request(self, prompt, endpoint, request_id, dialect):
        request = super().request(prompt, endpoint, request_id, dialect)
        headers = [*request.headers, ("X-Sig", "v1 ${key} ${sig}"), ("X-Once", "${once}")]
        return request._replace(headers=headers, target=request.target + "?ts=${ts}&sig=${sig}&t=${token}")


def check_declared():
    nonces = gateways.Nonces()

    def check(request):
        query = dict(urllib.parse.parse_qsl(request.path.partition("?")[2]))
        target = request.path.replace("&sig=" + urllib.parse.quote(query["sig"], safe=""), "")
        demand(abs(time.time() - int(query["ts"]) / 1000) < 60, "the time is off")
        text = "\n".join(["POST", target, query["ts"], request.headers["x-once"], gateways.sha256(request.raw)])
        expected = base64.urlsafe_b64encode(gateways.mac(SECRET.encode(), text)).rstrip(b"=").decode()
        demand(query["sig"] == expected and request.headers["x-sig"] == f"v1 {KEY} {expected}", "the signature")
        demand(request.headers["authorization"] == "Bearer tok/en" and query["t"] == "tok/en", "the token")
        nonces.take(request.headers["x-once"])

    return check


def test_steps_fill_headers_and_query_beside_a_token(monkeypatch):
    monkeypatch.setitem(llmbench.PROVIDERS, "declared", Declared)
    with Gateway(check_declared()) as server:
        measured = measure(server.url, provider="declared", token="tok/en", auth_key=KEY, auth_secret=SECRET,
                           auth="bearer", concurrency=2, total_requests=8)  # fmt: skip
    assert server.refusals == [] and measured.statuses == ["ok"] * 8


# --- schemes without a signature --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags,name,value", [
    (["--auth", "bearer", "--token", "tok-12345"], "authorization", "Bearer tok-12345"),
    (["--auth", "api-key", "--token", "tok-12345"], "api-key", "tok-12345"),
    (["--auth", "api-key", "--token", "tok-12345", "--auth-opt", "header=x-api-key"], "x-api-key", "tok-12345"),
    (["--auth", "api-key", "--token", "tok-12345", "--auth-opt", "header=Authorization", "--auth-opt", "prefix=Token "],
     "authorization", "Token tok-12345"),
    (["--auth", "basic", *FLAGS], "authorization", "Basic " + base64.b64encode(f"{KEY}:{SECRET}".encode()).decode()),
    (["--auth", "basic", "--token", "me:tok-12345"], "authorization", "Basic bWU6dG9rLTEyMzQ1"),
    (["--auth", "none", "--token", "tok-12345"], "authorization", None),
])  # fmt: skip
def test_headers_that_depend_on_the_secret_alone(tmp_path, flags, name, value):
    with Server(lambda peer, _: peer.send(HELLO)) as server:
        made = run(tmp_path / "out", "--url", server.url, *flags, "--total-requests", "2")
    assert [request.headers.get(name) for request in server.requests] == [value] * 2
    assert made.status == expected_status(made.summary)
    has_no_secret(made.everything, "tok-12345", SECRET, "bWU6dG9rLTEyMzQ1")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_dry_run_shows_the_request_masked(tmp_path, scheme):
    name, _, flags = SCHEMES[scheme]
    made = run(tmp_path / "out", "--url", "http://gw.example", "--auth", name, *FLAGS, *flags, "--dry-run")
    assert made.status == 0 and "POST /v1/chat/completions HTTP/1.1" in made.stdout
    shown = "X-Signature: ***" if scheme == "hmac" else "Authorization: ***"
    assert shown in made.stdout
    has_no_secret(made.stdout + made.stderr)


def test_what_an_endpoint_echoes_is_masked(tmp_path):
    """Every header, and the secrets as such, in an error's text."""

    def echo(peer, request):
        said = "%s; your key %s secret %s is wrong" % (json.dumps(request.headers), KEY, SECRET)
        peer.send(answer(403, {"error": {"message": said, "seen": request.headers}}))

    with Server(echo) as server:
        made = run(tmp_path / "out", "--url", server.url, "--auth", "zhipu-jwt", *FLAGS, "--total-requests", "1",
                   "--auth-opt", "lifetime=100")  # fmt: skip
    assert made.status == 3
    has_no_secret(made.everything, SECRET, KEY, server.requests[0].headers["authorization"].split(" ")[1])


# --- tokens that are asked for ----------------------------------------------------------------------------------------


class Issuer:
    """Gives out tokens that live for so many seconds, and lets in who has one that lives."""

    def __init__(self, life=1000.0, patience=0.0):
        self.life, self.patience = life, patience
        self.issued = {}  # token: when it ends
        self.asked = []
        self.used = []
        self.broken = False
        self._lock = threading.Lock()

    def issue(self):
        with self._lock:
            token = "tk%d-%s" % (len(self.issued), hashlib.md5(b"%d" % len(self.issued)).hexdigest())
            self.issued[token] = time.time() + self.life
        return token

    def lets_in(self, token):
        with self._lock:
            self.used.append(token)
        return self.issued.get(token, 0.0) + self.patience > time.time()


def baidu(issuer):
    def behave(peer, request):
        path, _, query = request.path.partition("?")
        given = dict(urllib.parse.parse_qsl(query))
        if path == "/oauth/2.0/token":
            issuer.asked.append(request)
            right = (given.get("grant_type"), given.get("client_id"), given.get("client_secret"))
            if issuer.broken or right != ("client_credentials", KEY, SECRET):
                said = "unknown client id or secret: " + str(given.get("client_secret"))
                peer.send(answer(401, {"error": "invalid_client", "error_description": said}))
            else:
                peer.send(answer(200, {"access_token": issuer.issue(), "expires_in": issuer.life}))
            return
        let_in = issuer.lets_in(given.get("access_token", ""))
        peer.send(HELLO if let_in else answer(401, {"error": "token %s" % given.get("access_token")}))

    return behave


def baidu_flags(server):
    return ["--url", server.url, "--auth", "baidu-oauth", *FLAGS, "--auth-opt",
            f"exchange-url={server.url}/oauth/2.0/token"]  # fmt: skip


def test_an_access_token_in_the_query(tmp_path):
    issuer = Issuer()
    with Server(baidu(issuer)) as server:
        made = run(tmp_path / "out", *baidu_flags(server), "--concurrency", "4", "--total-requests", "20")
    assert len(issuer.issued) == 1 and [record["status"] for record in made.records] == ["ok"] * 20
    has_no_secret(made.everything, SECRET, KEY, *issuer.issued)
    assert "dialect" not in made.end


@pytest.mark.parametrize("processes", [pytest.param("1", marks=pytest.mark.exhaustive), "2"])
def test_a_token_is_renewed_before_its_end(tmp_path, processes):
    issuer = Issuer(life=2.0)
    with Server(baidu(issuer)) as server:
        made = run(tmp_path / "out", *baidu_flags(server), "--concurrency", "2", "--duration", "5s",
                   "--processes", processes)  # fmt: skip
    assert {record["status"] for record in made.records} == {"ok"}
    assert len(issuer.issued) >= 1 + 2 * int(processes)  # the first serves all
    assert len(set(issuer.used)) >= 1 + 2 * int(processes)
    has_no_secret(made.everything, SECRET, KEY, *issuer.issued)


def test_a_renewed_token_is_masked_in_what_the_endpoint_says(tmp_path):
    issuer = Issuer(life=2.0)

    def behave(peer, request):
        token = dict(urllib.parse.parse_qsl(request.path.partition("?")[2])).get("access_token")
        if token is None or token == next(iter(issuer.issued)):
            baidu(issuer)(peer, request)
        else:
            peer.send(answer(500, {"error": {"message": "of %s nothing is known" % token}}))

    with Server(behave) as server:
        made = run(tmp_path / "out", *baidu_flags(server), "--duration", "3s")
    assert len(issuer.issued) >= 2 and "of *** nothing is known" in made.everything
    has_no_secret(made.everything, *issuer.issued)


def test_a_token_that_cannot_be_had_is_one_line(tmp_path):
    issuer = Issuer()
    issuer.broken = True
    with Server(baidu(issuer)) as server:
        made = run(tmp_path / "out", *baidu_flags(server))
    assert made.status == 2 and made.files == set()
    assert made.stderr.count("\n") == 1
    assert "--auth baidu-oauth got no token from 127.0.0.1:%d: HTTP 401" % server.port in made.stderr
    assert "unknown client id or secret: ***" in made.stderr
    assert issuer.used == []


def test_a_token_that_cannot_be_renewed_is_noted_and_used_on(tmp_path):
    issuer = Issuer(life=1.5, patience=60.0)

    def behave(peer, request):
        issuer.broken = bool(issuer.issued)
        baidu(issuer)(peer, request)

    with Server(behave) as server:
        made = run(tmp_path / "out", *baidu_flags(server), "--duration", "3s")
    assert {record["status"] for record in made.records} == {"ok"}
    assert len(issuer.asked) == 2
    note = "the token could not be renewed, and the old one is used on: HTTP 401"
    assert [text[: len(note)] for text in made.end["dialect"]] == [note] and note in made.stdout
    has_no_secret(made.everything, SECRET, KEY, *issuer.issued)


def test_a_withdrawn_token_is_asked_for_again(monkeypatch):
    issuer = Issuer()
    serve = baidu(issuer)

    def behave(peer, request):
        if len(issuer.used) == 30:
            issuer.issued.update(dict.fromkeys(issuer.issued, 0.0))
        serve(peer, request)

    with Server(behave) as server:
        monkeypatch.setattr(llmbench.TokenKeeper, "RETRY", 0.1)
        config = {"auth": "baidu-oauth", "auth_key": KEY, "auth_secret": SECRET, "duration": 1.0,
                  "auth_opt": {"exchange-url": server.url + "/oauth/2.0/token"}}  # fmt: skip
        measured = measure_kept(server.url, **config)
    assert len(issuer.issued) == 2 and measured.statuses[-1] == "ok" and "auth_error" in measured.statuses


def measure_kept(url, **given):
    """A run in this process with its token kept, as a session keeps it."""
    lines, config = [], settings(url, **given)
    with event_loop() as (loop, poll):
        runner = prepare(config, poll, lines.append)
        keeper = llmbench.TokenKeeper(config, runner.provider, runner.endpoint, poll)
        loop.run_until_complete(keeper.first())
        runner.keep_token(keeper)
        keeper.start(loop)
        loop.run_until_complete(runner.run(llmbench.plan_stages(config)))
        keeper.stop()
        loop.run_until_complete(asyncio.sleep(0))
    return Measured([line for line in lines if "request_id" in line], [], runner, 0.0, [])


PRINTS_TOKEN = """
import base64, json, sys, time
path, life = sys.argv[1], float(sys.argv[2])
with open(path, "a") as file:
    file.write("asked\\n")
number = open(path).read().count("asked")
if number > 1 and len(sys.argv) > 3:
    sys.exit("the vault is " + sys.argv[3])
if life:
    parts = [{"alg": "none"}, {"exp": time.time() + life, "n": number}]
    texts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts]
    print(".".join(texts + ["s" * 12]))
else:
    print("plain-token-%d" % number)
"""


def prints_token(directory, *words):
    """A command that prints a token, and the file that counts how often it was asked."""
    script, count = directory / "token.py", directory / "count"
    script.write_text(PRINTS_TOKEN)
    return "cmd:" + " ".join([sys.executable, str(script), str(count), *words]), count


def bearer_checker(used):
    """Lets in who has a bearer token that has not ended, and keeps which."""

    def behave(peer, request):
        token = request.headers["authorization"].split(" ")[1]
        used.append(token)
        ends = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))["exp"] if "." in token else math.inf
        peer.send(HELLO if ends > time.time() else answer(401, {"error": "expired: " + token}))

    return behave


@pytest.mark.parametrize("processes", [pytest.param("1", marks=pytest.mark.exhaustive), "2"])
def test_a_jwt_of_a_command_is_renewed_before_its_end(tmp_path, processes):
    command, count = prints_token(tmp_path, "3")
    used = []
    with Server(bearer_checker(used)) as server:
        made = run(tmp_path / "out", "--url", server.url, "--token", command, "--concurrency", "2", "--duration", "6s",
                   "--processes", processes)  # fmt: skip
    assert {record["status"] for record in made.records} == {"ok"}
    assert count.read_text().count("asked") >= 1 + 2 * int(processes)
    has_no_secret(made.everything, *set(used))
    assert made.lines[0]["run"]["command"].count("cmd:") == 1


def test_any_token_of_a_command_can_be_renewed(tmp_path):
    command, _ = prints_token(tmp_path, "0")
    used = []
    with Server(bearer_checker(used)) as server:
        made = run(tmp_path / "out", "--url", server.url, "--token", command, "--duration", "3s", "--auth-opt",
                   "refresh=1s")  # fmt: skip
    assert {record["status"] for record in made.records} == {"ok"}
    assert used[0] == "plain-token-1" and "plain-token-2" in used
    has_no_secret(made.everything, "plain-token")


def test_a_plain_token_of_a_command_is_asked_for_once(tmp_path):
    command, count = prints_token(tmp_path, "0")
    with Server(bearer_checker([])) as server:
        run(tmp_path / "out", "--url", server.url, "--token", command, "--concurrency", "2", "--processes", "2")
    assert count.read_text().count("asked") == 1


def test_a_command_that_fails_later_is_noted(tmp_path):
    command, count = prints_token(tmp_path, "0", "sealed-with-a-secret")
    used = []
    with Server(bearer_checker(used)) as server:
        made = run(tmp_path / "out", "--url", server.url, "--token", command, "--duration", "2s", "--auth-opt",
                   "refresh=500ms")  # fmt: skip
    assert {record["status"] for record in made.records} == {"ok"} and set(used) == {"plain-token-1"}
    assert count.read_text().count("asked") == 2
    assert made.end["dialect"] == [
        "the token could not be renewed, and the old one is used on: "
        "--token cmd: ended with status 1 and printed no secret"
    ]


def test_a_token_of_a_file_is_read_again(tmp_path):
    path, used = tmp_path / "token", []
    path.write_text("first-token\n")

    def behave(peer, request):
        renewed = tmp_path / "renewed"
        renewed.write_text("second-token\n")
        renewed.replace(path)  # at once: half a file is no token
        bearer_checker(used)(peer, request)

    with Server(behave) as server:
        run(tmp_path / "out", "--url", server.url, "--token", f"file:{path}", "--duration", "2s", "--auth-opt",
            "refresh=500ms")  # fmt: skip
    assert used[0] == "first-token" and used[-1] == "second-token"


def test_ark_and_huawei_end_to_end(tmp_path):
    """Their exchanges and what the token is then used for, each with its fake."""

    def ark(peer, request):
        if request.path.startswith("/?Action="):
            given = gateways.fields(request.headers["authorization"], "HMAC-SHA256")
            assert given["Credential"].startswith(KEY + "/") and request.fields["ResourceIds"] == ["ep-1"]
            gateways.check_volc(request)
            peer.send(answer(200, {"Result": {"ApiKey": "temporary-ark-key"}}))
        else:
            right = request.headers.get("authorization") == "Bearer temporary-ark-key"
            peer.send(HELLO if right else answer(401, {}))

    def iam(peer, request):
        if request.path == "/v3/auth/tokens":
            user = request.fields["auth"]["identity"]["password"]["user"]
            assert user == {"name": KEY, "password": SECRET, "domain": {"name": "acme"}}
            ends = {"token": {"expires_at": "2999-01-01T00:00:00.000000Z"}}
            peer.send(answer(201, ends, "X-Subject-Token: temporary-iam-token"))
        else:
            right = request.headers.get("x-auth-token") == "temporary-iam-token"
            peer.send(HELLO if right else answer(401, {}))

    for name, behave, flags in (("ark-api-key", ark, ["--model", "ep-1"]),
                                ("huawei-iam", iam, ["--auth-opt", "domain=acme"])):  # fmt: skip
        with Server(behave) as server:
            place = "/v3/auth/tokens" if name == "huawei-iam" else "/"
            made = run(tmp_path / name, "--url", server.url + "/v1/chat/completions", "--auth", name, *FLAGS, *flags,
                       "--auth-opt", f"exchange-url={server.url}{place}", "--total-requests", "4")  # fmt: skip
        assert server.complaints == [] and [record["status"] for record in made.records] == ["ok"] * 4
        has_no_secret(made.everything, SECRET, KEY, "temporary-ark-key", "temporary-iam-token")


# --- a provider that a file declares ----------------------------------------------------------------------------------

DECLARED = {
    "name": "acme", "summary": "a customer's gateway", "path": "/v1/talk?tenant=${option:tenant}", "auth": "none",
    "auth_options": {"tenant": "t1"},
    "headers": {"X-Time": "${ts}", "X-Once": "${once}", "X-Sig": "${sig}"},
    "body": {"model": "${model}", "messages": "${messages}", "stream": "${stream}"},
    "text": ["result.piece"], "end": [{"path": "finished", "equals": True}],
    "error": [{"path": "code", "not_in": [0]}],
    "sign": [
        {"set": "ts", "to": "time('epoch_ms')"},
        {"set": "once", "to": "nonce"},
        {"set": "sig", "to": r"hmac(secret, join('\n', ts, once, sha256(body)))"},
    ],
}  # fmt: skip


def check_acme(tenant):
    nonces = gateways.Nonces()

    def check(request):
        head = request.headers
        demand(request.path == "/v1/talk?tenant=" + tenant, "the tenant")
        demand(abs(time.time() - int(head["x-time"]) / 1000) < 60, "the time is off")
        text = "\n".join([head["x-time"], head["x-once"], gateways.sha256(request.raw)])
        demand(head["x-sig"] == gateways.mac(SECRET.encode(), text).hex(), "the signature")
        nonces.take(head["x-once"])

    return check


def acme_stream(peer, request):
    events = [b'data: {"code":0,"result":{"piece":"Hel"}}\n\n', b'data: {"code":0,"result":{"piece":"lo"}}\n\n']
    peer.send(streamed(*events, b'data: {"code":0,"finished":true}\n\n'))


def declared_file(directory, **over):
    path = directory / "acme.json"
    path.write_text(json.dumps({**DECLARED, **over}))
    return str(path)


@pytest.mark.parametrize("flags,tenant", [([], "t1"), (["--auth-opt", "tenant=t%202", "--processes", "2"], "t%25202")])
def test_a_declared_gateway_lets_its_customer_in(tmp_path, flags, tenant):
    with Gateway(check_acme(tenant), acme_stream) as server:
        made = run(tmp_path / "out", "--url", server.url, "--provider", declared_file(tmp_path), "--auth-secret",
                   SECRET, "--concurrency", "2", "--total-requests", "8", *flags)  # fmt: skip
    assert server.refusals == [] and [record["status"] for record in made.records] == ["ok"] * 8
    has_no_secret(made.everything)


def test_a_declared_gateways_token_is_asked_for(tmp_path):
    exchange = {"url": "http://nowhere.invalid/token", "form": {"id": "${key}", "pw": "${secret}"},
                "token": "data.token", "expires_in": "data.ttl"}  # fmt: skip
    headers = {**DECLARED["headers"], "X-Token": "t ${token}"}
    issuer, check = Issuer(life=2.0), check_acme("t1")

    def behave(peer, request):
        if request.path == "/token":
            assert request.raw.decode() == "id=%s&pw=%s" % (KEY, urllib.parse.quote(SECRET, safe=""))
            peer.send(answer(200, {"data": {"token": issuer.issue(), "ttl": 2}}))
            return
        check(request)
        let_in = issuer.lets_in(request.headers["x-token"][2:])
        acme_stream(peer, request) if let_in else peer.send(answer(401, {"code": 7}))

    with Server(behave) as server:
        made = run(tmp_path / "out", "--url", server.url, "--provider", declared_file(tmp_path, exchange=exchange,
                   headers=headers), *FLAGS, "--duration", "4s", "--auth-opt",
                   f"exchange-url={server.url}/token")  # fmt: skip
    assert server.complaints == [] and {record["status"] for record in made.records} == {"ok"}
    assert len(issuer.issued) >= 2
    has_no_secret(made.everything, SECRET, KEY, *issuer.issued)


def test_a_mistake_in_a_declared_step_is_one_line_before_anything_is_sent(tmp_path):
    for sign, said in (
        ([{"set": "sig", "to": "hmac(secrt, body)"}], "sign step 1 (sig), column 6: secrt is not known here"),
        ([*DECLARED["sign"], {"set": "x", "to": "header('X-Absent')"}], "sign step 4 (x), column 1: there is no head"),
    ):
        with Server(acme_stream) as server:
            made = run(tmp_path / "out", "--url", server.url, "--provider", declared_file(tmp_path, sign=sign),
                       "--auth-secret", SECRET)  # fmt: skip
        assert (made.status, made.files, server.requests) == (2, set(), [])
        assert said in made.stderr and made.stderr.count("\n") == 1


def test_a_token_that_steps_use_is_renewed_too(tmp_path):
    command, _ = prints_token(tmp_path, "0")
    path = declared_file(tmp_path, headers={**DECLARED["headers"], "X-Token": "${token}"})
    check, used = check_acme("t1"), []

    def then(peer, request):
        used.append(request.headers["x-token"])
        acme_stream(peer, request)

    with Gateway(check, then) as server:
        made = run(tmp_path / "out", "--url", server.url, "--provider", path, "--auth-secret", SECRET, "--token",
                   command, "--duration", "3s", "--auth-opt", "refresh=1s")  # fmt: skip
    assert server.refusals == [] and {record["status"] for record in made.records} == {"ok"}
    assert used[0] == "plain-token-1" and "plain-token-2" in used


# --- through a proxy --------------------------------------------------------------------------------------------------


def test_a_signature_is_over_what_the_gateway_gets_from_a_proxy(tmp_path):
    """A proxy is sent the target in absolute form, and gives its path on."""
    check, issuer = gateways.check_custom(), Issuer()

    def through(request):
        assert request.path.startswith("http://gw.example:81/v1/")
        check(request._replace(path=request.path[len("http://gw.example:81") :]))

    with Gateway(through) as server:
        made = run(tmp_path / "out", "--url", "http://gw.example:81", "--proxy", server.url, "--auth", "hmac", *FLAGS,
                   *gateways.CUSTOM_FLAGS, "--total-requests", "6", "--concurrency", "2")  # fmt: skip
    assert server.refusals == [] and [record["status"] for record in made.records] == ["ok"] * 6

    def token_too(peer, request):
        assert request.path.startswith("http://gw.example:81/")
        baidu(issuer)(peer, request._replace(path=request.path[len("http://gw.example:81") :]))

    with Server(token_too) as server:
        made = run(tmp_path / "out2", "--url", "http://gw.example:81", "--proxy", server.url, "--auth", "baidu-oauth",
                   *FLAGS, "--auth-opt", "exchange-url=http://gw.example:81/oauth/2.0/token")  # fmt: skip
    assert server.complaints == [] and {record["status"] for record in made.records} == {"ok"}
    assert len(issuer.asked) == 1
