"""Signing: the vectors that vendors published and our own, to the byte; steps; what is missing or unknown."""

from __future__ import annotations

import base64
import calendar
import json
import time

import pytest

import llmbench
from llmbench import Secrets


def at(text):
    """Seconds since 1970 of an ISO time in UTC."""
    return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))


def sign(name, secrets, method, target, headers, body=b"", moment=0.0, nonce="0" * 32):
    return llmbench.AUTHS[name](secrets).sign(method, target, list(headers.items()), body, moment, nonce)


def header(signed, name="authorization"):
    values = [value for key, value in signed.headers if key.lower() == name.lower()]
    assert len(values) == 1
    return values[0]


def hash_hex(text):
    return llmbench.hash_of(text).hex()


# --- bce-v1 -----------------------------------------------------------------------------------------------------------

BCE = [
    ("a" * 32, "b" * 32, "a44cc9bab11cbd156984767aad637851", "NFzcPqhviddjRNnSOGo4rw==",
     "1d5ce5f464064cbee060330d973218821825ac6952368a482a592e6615aef479",
     "d74a04362e6a848f5b39b15421cb449427f419c95a480fd6b8cf9fc783e2999e"),
    ("0b0f67dfb88244b289b72b142befad0c", "bad522c2126a4618a8125f4b6cf6356f", "VXBsb2FkIElpZS5tMnRzIHVwbG9hZA",
     "0a52730597fb4ffa01fc117d9e71e3a9",
     "d9f35aaba8a5f3efa654851917114b6f22cd831116fd7d8431e08af22dcff24c",
     "a19e6386e990691aca1114a20357c83713f1cb4be3d74942bb4ed37469ecdacf"),
]  # fmt: skip


@pytest.mark.parametrize("key,secret,upload,md5,signing_key,signature", BCE)
def test_baidus_published_vectors(key, secret, upload, md5, signing_key, signature):
    secrets = Secrets(key, secret, options={"signed": ""})
    headers = {"Host": "bj.bcebos.com", "Content-Length": "8", "Content-MD5": md5, "Content-Type": "text/plain",
               "Accept": "not signed"}  # fmt: skip
    target = "/v1/test/myfolder/readme.txt?partNumber=9&uploadId=" + upload
    signed = sign("bce-v1", secrets, "PUT", target, headers, b"12345678", at("2015-04-27T08:23:49Z"))
    prefix = "bce-auth-v1/%s/2015-04-27T08:23:49Z/1800" % key
    assert llmbench.BceV1(secrets).signing_key(prefix) == signing_key
    assert header(signed) == prefix + "//" + signature
    assert header(signed, "x-bce-date") == "2015-04-27T08:23:49Z"
    assert signed.target == target


def test_baidus_chat_endpoint():
    secrets, target = Secrets("AKTEST0001", "SKTEST0001"), "/rpc/2.0/ai_custom/v1/wenxinworkshop/chat/completions_pro"
    signed = sign("bce-v1", secrets, "POST", target, {"Host": "aip.baidubce.com"}, b"{}", at("2025-01-02T03:04:05Z"))
    prefix = "bce-auth-v1/AKTEST0001/2025-01-02T03:04:05Z/1800"
    assert llmbench.BceV1(secrets).signing_key(prefix) == (
        "8facb67696cde3e192dd8d668d7243cc7a9129a6ee83c37a3b5f6895b5255c94"
    )
    signature = "52d81a4763c5c199041d5f75831435f4dfdfa9b98a19f176b9ff6a5ff9c3362e"
    assert header(signed) == prefix + "/host;x-bce-date/" + signature
    assert dict(signed.steps)["canonical request"] == (
        "POST\n%s\n\nhost:aip.baidubce.com\nx-bce-date:2025-01-02T03%%3A04%%3A05Z" % target
    )


def test_baidus_canonical_query_is_sorted_as_text_without_authorization():
    secrets = Secrets("k", "s")
    one = sign("bce-v1", secrets, "GET", "/a%20b?b=1&a-b=2&a=3&authorization=x&c", {"Host": "h"})
    assert dict(one.steps)["canonical request"].split("\n")[1:3] == ["/a%20b", "a-b=2&a=3&b=1&c="]


# --- tc3 --------------------------------------------------------------------------------------------------------------

TC3_BODY = (
    b'{"Limit": 1, "Filters": [{"Values": ["\\u672a\\u547d\\u540d"], "Name": "instance-name"}]}'
)
TC3_KEY = "Gu5t9xGARNpq86cd98joQYCN3EXAMPLE"


@pytest.mark.parametrize("names,canonical,signature", [
    ("content-type;host", "5ffe6a04c0664d6b969fab9a13bdab201d63ee709638e2749d62a09ca18d7031",
     "72e494ea809ad7a8c8f7a4507b9bddcbaa8e581f516e8da2f66e2c5a96525168"),
    ("content-type;host;x-tc-action", "7019a55be8395899b900fb5564e4200d984910f34794a27cb3fb7d10ff6a1e84",
     "644be983de9a8a3f00db8eadaba61467c3b429e2215758ba897b738ca469fd26"),
])  # fmt: skip
def test_tencents_published_vector(names, canonical, signature):
    secrets = Secrets("AKIDEXAMPLE", TC3_KEY, options={"signed": names, "action": "DescribeInstances"})
    headers = {"Host": "cvm.tencentcloudapi.com", "Content-Type": "application/json; charset=utf-8"}
    signed = sign("tc3", secrets, "POST", "/", headers, TC3_BODY, 1551113065.9)
    steps = dict(signed.steps)
    assert steps["canonical request"].endswith("35e9c5b0e3ae67532d3c9f17ead6c90222632e5b1ff7f6e89887f1398934f064")
    assert hash_hex(steps["canonical request"]) == canonical
    assert steps["string to sign"] == "TC3-HMAC-SHA256\n1551113065\n2019-02-25/cvm/tc3_request\n" + canonical
    assert header(signed) == (
        "TC3-HMAC-SHA256 Credential=AKIDEXAMPLE/2019-02-25/cvm/tc3_request, SignedHeaders=%s, Signature=%s"
        % (names, signature)
    )


def test_hunyuan():
    body = b'{"Model":"hunyuan-lite","Messages":[{"Role":"user","Content":"hi"}],"Stream":true}'
    headers = {"Host": "hunyuan.tencentcloudapi.com", "Content-Type": "application/json", "X-Request-Id": "r"}
    signed = sign("tc3", Secrets("AK", "SKTEST0001"), "POST", "/", headers, body, 1735787045.0)
    canonical = dict(signed.steps)["canonical request"]
    assert canonical.endswith("\n60da8f83ede36e60c7c508f041d2f46da1f4a363712a85c157ccf2b0ad261e70")
    assert hash_hex(canonical) == "7b12dd987cbd45bfb0822f361add72c0f2af97f7cbaa895fc4c8f5ad83f8d269"
    assert header(signed).endswith("Signature=f73b8056034b2320863103710e6a3b28dba92fa809e6e83ae87a211ee8e36d5a")
    assert "Credential=AK/2025-01-02/hunyuan/tc3_request," in header(signed)
    sent = {name: value for name, value in signed.headers if name.startswith("X-TC-")}
    assert sent == {"X-TC-Action": "ChatCompletions", "X-TC-Version": "2023-09-01", "X-TC-Timestamp": "1735787045"}


def test_tencents_headers_of_the_user_are_left_alone():
    headers = {"Host": "h.x", "X-TC-Action": "Other", "X-TC-Region": "ap-1"}
    options = {"region": "ap-2", "session-token": "tmp", "service": "lke"}
    signed = sign("tc3", Secrets("k", "s", options=options), "POST", "/", headers)
    assert (header(signed, "X-TC-Action"), header(signed, "X-TC-Region")) == ("Other", "ap-1")
    assert header(signed, "X-TC-Token") == "tmp" and "/lke/tc3_request" in header(signed)


# --- volc-v4 ----------------------------------------------------------------------------------------------------------


def test_volcengines_published_vector():
    secret = "WkRZeE1EQmxPVGhsWWpWak5HVmtNbUUxTXpZeU9UVXlOMlE1TmpZeVlqTQ=="
    options = {"signed": "host;x-date", "service": "iam"}
    target = "/?Action=ListUsers&Limit=10&Offset=0&Version=2018-01-01"
    secrets = Secrets("AKLT", secret, options=options)
    signed = sign("volc-v4", secrets, "GET", target, {"Host": "iam.volcengineapi.com"}, b"", at("2024-06-19T07:13:06Z"))
    steps = dict(signed.steps)
    assert hash_hex(steps["canonical request"]) == "5ed5bca3905e1fcbf789abb56a17c2d819674a3bcfa468ae476bd1ea80d135cb"
    assert llmbench.VolcV4(secrets).signing_key("20240619", "cn-beijing", "iam").hex() == (
        "abee62e533a58934c49954459a3c3237d2fccea517c9a7c8a2651d8ea7779826"
    )
    assert header(signed) == (
        "HMAC-SHA256 Credential=AKLT/20240619/cn-beijing/iam/request, SignedHeaders=host;x-date, "
        "Signature=e31c4558bcfe08a286001f59cedbf0791ffd0b2362f10e55ee2627467bcdde93"
    )


def test_ark_by_volcengines_signature():
    headers = {"Host": "ark.cn-beijing.volces.com", "Content-Type": "application/json"}
    signed = sign(
        "volc-v4", Secrets("AK", "SKTEST0001"), "POST", "/api/v3/chat/completions", headers,
        b'{"model":"ep-x","stream":true}', at("2025-01-02T03:04:05Z"),
    )  # fmt: skip
    canonical = dict(signed.steps)["canonical request"]
    assert header(signed, "X-Content-Sha256") == "9a5c727a87f657ae2482a9e8ac8c462a1ce8645bbc9e86d8bfe8546aa59dc7f0"
    assert hash_hex(canonical) == "fada3effd7c0bb37d3c2e4d4c01c2cf2fd40a9ed5141a946d8b1fc4cbf0d10c3"
    assert header(signed).endswith(
        "SignedHeaders=content-type;host;x-content-sha256;x-date, "
        "Signature=55bfdbd70c689d13a134b62bbb5c8c063cf2f73d2779da1aa9074cdf020db99e"
    )


def test_volcengines_session_token_is_sent_and_signed():
    signed = sign("volc-v4", Secrets("k", "s", options={"session-token": "sts"}), "POST", "/", {"Host": "h"})
    assert header(signed, "X-Security-Token") == "sts"
    assert "SignedHeaders=host;x-content-sha256;x-date;x-security-token," in header(signed)


# --- huawei-sdk -------------------------------------------------------------------------------------------------------


def test_huaweis_published_vector():
    target = ("/v1/77b6a44cba5143ab91d13ab9a8ff44fd/vpcs?limit=2&marker=13551d6b-755d-4757-b956-536f674975c0")
    headers = {"Host": "service.region.example.com", "Content-Type": "application/json"}
    secrets = Secrets("QTWAOYTTINDUT2QVKYUC", "MFyfvK41ba2giqM7Uio6PznpdUKGpownRZlmVmHc")
    signed = sign("huawei-sdk", secrets, "GET", target, headers, b"", at("2019-11-15T03:36:55Z"))
    canonical = dict(signed.steps)["canonical request"]
    assert canonical.split("\n")[1] == "/v1/77b6a44cba5143ab91d13ab9a8ff44fd/vpcs/"
    assert hash_hex(canonical) == "b25362e603ee30f4f25e7858e8a7160fd36e803bb2dfe206278659d71a9bcd7a"
    assert header(signed) == (
        "SDK-HMAC-SHA256 Access=QTWAOYTTINDUT2QVKYUC, SignedHeaders=content-type;host;x-sdk-date, "
        "Signature=7be6668032f70418fcc22abc52071e57aff61b84a1d2381bb430d6870f4f6ebe"
    )
    assert header(signed, "X-Sdk-Date") == "20191115T033655Z"


def test_huawei_over_a_body():
    headers = {"Host": "api.example.com", "Content-Type": "application/json"}
    body = b'{"model":"m","stream":true}'
    signed = sign(
        "huawei-sdk", Secrets("AK", "SKTEST0001"), "POST", "/v1/chat/completions", headers, body,
        at("2025-01-02T03:04:05Z"),
    )  # fmt: skip
    steps = dict(signed.steps)
    assert steps["canonical request"].endswith("cd10288a9dd408330853d37a21922e2e0ba4e48a9ca78d8094c91dc9208454c8")
    canonical = "916662daadd4c94f95308775cac16cef4a325dfad423a38d9018b212c2f52fca"
    assert hash_hex(steps["canonical request"]) == canonical
    assert steps["string to sign"] == "SDK-HMAC-SHA256\n20250102T030405Z\n" + canonical
    assert header(signed).endswith("Signature=5fdc58e3faf53488b6292652084b33b749d0d0c2415133d5330f15f1d75bd2df")


def test_huaweis_own_body_hash_stands_for_the_body():
    headers = {"Host": "h", "X-Sdk-Content-Sha256": "UNSIGNED-PAYLOAD"}
    signed = sign("huawei-sdk", Secrets("k", "s"), "POST", "/", headers, b"x")
    assert dict(signed.steps)["canonical request"].endswith("\nUNSIGNED-PAYLOAD")


# --- zhipu-jwt --------------------------------------------------------------------------------------------------------

JWT = (
    "eyJhbGciOiJIUzI1NiIsInNpZ25fdHlwZSI6IlNJR04ifQ.eyJhcGlfa2V5IjoiaWR0ZXN0IiwiZXhwIjoxNzM1Nzg3MjU1MDAwLCJ0aW1lc3Rh"
    "bXAiOjE3MzU3ODcwNDUwMDB9.HRfZzbxtlOeZDMwRcJLV1lf0L_uerJtTCBsyLxHx74M"
)


@pytest.mark.parametrize("secrets", [Secrets(token="idtest.secrettest"), Secrets("idtest", "secrettest")])
def test_zhipus_token(secrets):
    signed = sign("zhipu-jwt", secrets, "POST", "/", {"Host": "h"}, b"", 1735787045.0)
    assert header(signed) == "Bearer " + JWT


# --- what changes a signature -----------------------------------------------------------------------------------------

SIGNERS = {
    "tc3": Secrets("key", "secret"), "volc-v4": Secrets("key", "secret"), "huawei-sdk": Secrets("key", "secret"),
    "bce-v1": Secrets("key", "secret"), "zhipu-jwt": Secrets(token="id.secret"), "hmac": Secrets("key", "secret"),
}  # fmt: skip
PLAIN = {"Host": "h.example", "Content-Type": "application/json"}


def proof(name, secrets=None, target="/v1/c?a=1", headers=PLAIN, body=b'{"a":1}', moment=1735787045.0, nonce="0" * 32):
    signed = sign(name, secrets or SIGNERS[name], "POST", target, headers, body, moment, nonce)
    return header(signed, "X-Signature" if name == "hmac" else "Authorization").rpartition("=" if "=" in header(
        signed, "X-Signature" if name == "hmac" else "Authorization") else "/")[2]  # fmt: skip


@pytest.mark.parametrize("name", SIGNERS)
def test_the_same_request_has_the_same_signature(name):
    assert proof(name) == proof(name)


@pytest.mark.parametrize("name", SIGNERS)
def test_time_and_secret_change_every_signature(name):
    other = SIGNERS[name]._replace(secret="secreu", token="id.secreu")
    assert len({proof(name), proof(name, moment=1735787046.0), proof(name, other)}) == 3


@pytest.mark.parametrize("name,changed", [
    ("tc3", {"body": b'{"a":2}'}), ("volc-v4", {"body": b'{"a":2}'}), ("huawei-sdk", {"body": b'{"a":2}'}),
    ("hmac", {"body": b'{"a":2}'}), ("hmac", {"nonce": "1" * 32}),
    ("tc3", {"target": "/?a=2"}), ("volc-v4", {"target": "/v1/c?a=2"}), ("huawei-sdk", {"target": "/v1/d?a=1"}),
    ("bce-v1", {"target": "/v1/d?a=1"}), ("bce-v1", {"target": "/v1/c?a=2"}), ("volc-v4", {"target": "/v1/d?a=1"}),
    *[(name, {"headers": {**PLAIN, "Host": "i.example"}}) for name in ("tc3", "volc-v4", "huawei-sdk", "bce-v1")],
    *[(name, {"headers": {**PLAIN, "Content-Type": "text/json"}}) for name in ("tc3", "volc-v4", "huawei-sdk")],
])  # fmt: skip
def test_what_is_signed_changes_the_signature(name, changed):
    assert proof(name) != proof(name, **changed)


@pytest.mark.parametrize("name", SIGNERS)
def test_no_step_shows_a_secret(name):
    secrets = Secrets("key-of-a-customer", "s3cr3t-of-a-customer", options={"session-token": "sts-of-a-customer"})
    if name == "zhipu-jwt":
        secrets = secrets._replace(token="id.s3cr3t-of-a-customer")
    shown = json.dumps(sign(name, secrets, "POST", "/", PLAIN, b"{}").steps)
    assert "s3cr3t" not in shown and "sts-of" not in shown


# --- steps ------------------------------------------------------------------------------------------------------------

NONCE = "0123456789abcdef" * 2
OPTIONS = {"tenant": "t 1", "app-key": "hidden-option"}


def subject(target="/v1/chat%20x?b=2&a=1", headers=None, body=b'{"a": 1}', moment=1735787045.25):
    secrets = Secrets("AK", "SK-of-mine", "TOK", OPTIONS)
    headers = headers or [("Host", "gw.example"), ("Content-Type", " Application/JSON ")]
    return llmbench.Subject(secrets, "POST", target, headers, body, moment, NONCE)


def steps(*expressions, options=OPTIONS):
    """The steps s0, s1, … of these expressions."""
    return llmbench.Pipeline([{"set": f"s{n}", "to": text} for n, text in enumerate(expressions)], "gw.json", options)


def value(expression, **given):
    case = subject(**given)
    steps(expression).run(case)
    return case.values["s0"]


@pytest.mark.parametrize("expression,expected", [
    ("'a\\n\\t\\'\\\\'", "a\n\t'\\"), ('"it\'s"', "it's"), ("42", "42"), ("-1", "-1"),
    ("key", "AK"), ("method", "POST"),
    ("path", "/v1/chat%20x"), ("query", "b=2&a=1"), ("target", "/v1/chat%20x?b=2&a=1"), ("host", "gw.example"),
    ("tenant", "t 1"), ("option:tenant", "t 1"), ("option:app-key", "hidden-option"), ("nonce", NONCE),
    ("nonce()", NONCE), ("rand_hex(8)", NONCE[:8]), ("uuid", "01234567-89ab-4def-8123-456789abcdef"),
    ("join('\\n', method, path, key)", "POST\n/v1/chat%20x\nAK"), ("join('', 'a')", "a"),
    ("lower('AbC')", "abc"), ("upper('AbC')", "ABC"), ("trim('  x ')", "x"), ("urlencode('a/b c~')", "a%2Fb%20c~"),
    ("urlencode('a/b', safe='/')", "a/b"), ("urlencode('中')", "%E4%B8%AD"), ("b64('any?>')", "YW55Pz4="),
    ("b64url('any?>')", "YW55Pz4"), ("b64url(join('', '>>>', '???'))", "Pj4-Pz8_"), ("hex('az')", "617a"),
    ("hex(b64decode('_-8'))", "ffef"), ("hex(b64decode('/+8='))", "ffef"), ("slice('abcdef', 1, 3)", "bc"),
    ("slice('abcdef', end=-1)", "abcde"),
    ("md5('')", "d41d8cd98f00b204e9800998ecf8427e"), ("sha1('abc')", "a9993e364706816aba3e25717850c26c9cd0d89d"),
    ("sha256('abc')", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    ("upper(md5('a'))", "0CC175B9C0F1B6A831C399E269772661"), ("md5('a', 'HEX')", "0CC175B9C0F1B6A831C399E269772661"),
    ("sha1('abc', out='b64')", "qZk+NkcGgWq6PiVxeFDCbJzQ2J0="),
    ("hmac('key', 'The quick brown fox jumps over the lazy dog')",
     "f7bc83f430538424b13298e6aa6fb143ef4d59a14946175997479dbc2d1a3cd8"),
    ("hmac('key', 'The quick brown fox jumps over the lazy dog', 'sha1')", "de7c9b85b8b78aa6bc8a7a36f70a90701c9db4d9"),
    ("hmac('key', 'The quick brown fox jumps over the lazy dog', alg='md5')", "80070713463e7749b90c2dc24911e275"),
    ("hmac('key', 'The quick brown fox jumps over the lazy dog', 'sha1', 'b64')", "3nybhbi3iqa8ino29wqQcBydtNk="),
    ("hex(hmac('key', 'The quick brown fox jumps over the lazy dog', out='raw'))",
     "f7bc83f430538424b13298e6aa6fb143ef4d59a14946175997479dbc2d1a3cd8"),
    ("hex(chain('key', 'The quick brown fox jumps over the lazy dog'))",
     "f7bc83f430538424b13298e6aa6fb143ef4d59a14946175997479dbc2d1a3cd8"),
    ("time()", "1735787045"), ("time('epoch')", "1735787045"), ("time('epoch_ms')", "1735787045250"),
    ("time('iso')", "2025-01-02T03:04:05Z"), ("time('iso_basic')", "20250102T030405Z"), ("time('date')", "2025-01-02"),
    ("time('date_basic')", "20250102"), ("time('compact')", "20250102030405"),
    ("time('rfc1123')", "Thu, 02 Jan 2025 03:04:05 GMT"), ("time('epoch', plus=300)", "1735787345"),
    ("time('%Y%m%d%H%M%S', 28800)", "20250102110405"),
    ("canon_path()", "/v1/chat%20x"), ("canon_path(slash='yes')", "/v1/chat%20x/"), ("canon_query()", "a=1&b=2"),
    ("canon_query(skip='a')", "b=2"), ("canon_query(skip='A b')", "a=1"), ("canon_headers('host;content-type')",
                                       "content-type:Application/JSON\nhost:gw.example\n"),
    ("canon_headers('Content-Type', lower='yes', end='no')", "content-type:application/json"),
    ("canon_headers('content-type', encode='yes')", "content-type:Application%2FJSON\n"),
    ("header('content-type')", "Application/JSON"), ("json('a\"b')", '"a\\"b"'),
    ("json(k=key, exp=number(time('epoch', 60)), n=3)", '{"k":"AK","exp":1735787105,"n":3}'),
    ("body", b'{"a": 1}'), ("join(':', key, body)", b'AK:{"a": 1}'), ("hmac(secret,body,out='raw')", None),
    (" join ( '-' ,key,\n'x' ) ", "AK-x"),
])  # fmt: skip
def test_an_expression_has_the_value(expression, expected):
    got = value(expression)
    if expected is None:
        assert isinstance(got, bytes) and len(got) == 32
    else:
        assert got == expected


def test_the_usual_private_gateway():
    """Against hmac and hashlib themselves."""
    import hashlib
    import hmac

    case, body = subject(), b'{"a": 1}'
    steps("time('epoch_ms')", "nonce", r"hmac(secret, join('\n', s0, s1, sha256(body)))").run(case)
    text = "\n".join(["1735787045250", NONCE, hashlib.sha256(body).hexdigest()])
    assert case.values["s2"] == hmac.new(b"SK-of-mine", text.encode(), "sha256").hexdigest()


def test_steps_can_be_tc3():
    """A vendor's scheme written as steps gives the vendor's published vector."""
    case = llmbench.Subject(
        Secrets("AKIDEXAMPLE", TC3_KEY), "POST", "/",
        [("Host", "cvm.tencentcloudapi.com"), ("Content-Type", "application/json; charset=utf-8")],
        TC3_BODY, 1551113065.0, NONCE,
    )  # fmt: skip
    steps(
        r"join('\n', method, '/', query, canon_headers('content-type;host', lower='yes'), 'content-type;host', "
        "sha256(body))",
        r"join('\n', 'TC3-HMAC-SHA256', time('epoch'), join('/', time('date'), 'cvm', 'tc3_request'), sha256(s0))",
        "chain(join('', 'TC3', secret), time('date'), 'cvm', 'tc3_request')",
        "hmac(s2, s1)",
    ).run(case)
    assert case.values["s3"] == "72e494ea809ad7a8c8f7a4507b9bddcbaa8e581f516e8da2f66e2c5a96525168"


@pytest.mark.parametrize("expression,column,said", [
    ("hmac(secrt, 'x')", 6, "secrt is not known here (did you mean secret?)"),
    ("hmc(secret, 'x')", 1, "there is no function hmc (did you mean hmac?)"),
    ("join('\\n', 'a", 12, "a text without its closing quote"), ("'a' 'b'", 5, "is left over"),
    ("sha256(body, out='hexx')", 18, "out must be one of hex"), ("hmac(secret, 'a', 'sha2')", 19, "alg must be one of"),
    ("time('iso8601')", 6, "fmt must be one of epoch"), ("time(key)", 6, "must be a text in quotes or a number"),
    ("hmac(secret)", 1, "hmac needs (key, message, alg=sha256, out=hex)"), ("lower('a', 'b')", 12, "takes no more"),
    ("join('a')", 1, "join needs (separator, part, …)"), ("hmac(secret, 'a', 'md5', 'hex', 'x')", 33, "takes no more"),
    ("lower(value='a')", 1, "lower needs (value)"), ("sha256('a', aut='raw')", 17, "(did you mean out?)"),
    ("sha256('a', 'hex', out='raw')", 24, "once"), ("hmac(alg='md5', 'a', 'b')", 17, "can't follow one with a name"),
    ("nonce + 1", 7, "'+' means nothing"), ("'\\q'", 2, r"\q is no escape"), ("", 0, "needs an expression"),
    ("lower(", 7, "expected a text"), ("lower('a'", 10, "expected , or ) before the end"),
    ("lower('a';)", 10, "means nothing"),
    ("lower", 1, "it is a function: lower(…)"), ("(key)", 1, "expected a text"), ("json()", 1, "json needs one value"),
    ("json('a', b='c')", 1, "json needs one value"), ("rand_hex(0)", 10, "must be 1 to 128"),
    ("lower(" * 60 + "'a'" + ")" * 60, 247, "more than 40 calls inside each other"),
    ("__import__('os')", 1, "no function"),
    ("key.upper()", 4, "'.' means nothing"), ("key[0]", 4, "'[' means nothing"), ("1 if key else 2", 3, "left over"),
])  # fmt: skip
def test_a_wrong_expression_is_named_with_file_step_and_column(expression, column, said):
    with pytest.raises(llmbench.UserError) as caught:
        steps("key", expression)
    text = str(caught.value)
    assert said in text and "\n" not in text
    assert text.startswith("gw.json: sign step 2 (s1), column %d: " % column if column else "gw.json: sign step 2 (s1)")


@pytest.mark.parametrize("expression", ["header(secret)", "number(secret)", "header(token)"])
def test_what_a_step_refuses_shows_no_secret(expression):
    with pytest.raises(llmbench.UserError, match=r"^gw\.json: sign step 1 \(s0\), ") as caught:
        value(expression)
    assert "SK-of-mine" not in str(caught.value) and "TOK" not in str(caught.value)


def test_a_number_of_many_digits_is_one_line():
    with pytest.raises(llmbench.UserError, match="column 1: a number of more than 20 digits"):
        value("9" * 5000)


@pytest.mark.parametrize("expression,said", [
    ("lower(hmac(secret, 'a', out='raw'))", "column 1: lower: takes text, not bytes"),
    ("header('X-Absent')", "column 1: there is no header X-Absent"),
    ("join('', canon_headers('host;x-absent'))", "column 10: there is no header x-absent"),
    ("b64decode('a')", "column 1: b64decode: "), ("number('x')", "column 1: number: "),
])  # fmt: skip
def test_what_only_a_request_shows_is_named_too(expression, said):
    with pytest.raises(llmbench.UserError, match=r"^gw\.json: sign step 1 \(s0\), ") as caught:
        value(expression)
    assert said in str(caught.value)


@pytest.mark.parametrize("form,said", [
    ({"set": "a"}, "sign must be a list"), ([7], "sign step 1 must be an object"),
    ([{"set": "a", "two": "key"}], "sign step 1 has an unknown key 'two' (did you mean to?)"),
    ([{"set": "a-b", "to": "key"}], "sign step 1 needs a name to `set`"),
    ([{"set": "a", "to": 7}], "needs an expression"),
    ([{"set": "key", "to": "key"}], "the name key is taken"), ([{"set": "tenant", "to": "key"}], "tenant is taken"),
    ([{"set": "a", "to": "key"}, {"set": "a", "to": "key"}], "sign step 2 (a): the name a is taken"),
    ([{"set": "a", "to": "b"}, {"set": "b", "to": "key"}], "b is not known here"),
])  # fmt: skip
def test_steps_of_a_wrong_form_are_refused(form, said):
    with pytest.raises(llmbench.UserError, match=r"^gw\.json: ") as caught:
        llmbench.Pipeline(form, "gw.json", OPTIONS)
    assert said in str(caught.value)


def sign_by_steps(expressions, target, headers, inner=None):
    inner = inner or llmbench.Auth(Secrets("AK", "SK-of-mine", "TOK", OPTIONS))
    return llmbench.Steps(inner, steps(*expressions)).sign("POST", target, headers, b"{}", 1735787045.0, NONCE)


def test_a_step_sees_what_the_steps_before_it_have_filled_in():
    signed = sign_by_steps(
        ["time()", "target", "canon_headers('x-time')", "canon_query()"], "/v1/${key}?t=${s0}&a=${s1}&z=${tenant}",
        [("Host", "h"), ("X-Time", "at ${s0}"), ("X-Seen", "${s3}")],
    )  # fmt: skip
    seen = dict(signed.steps)
    assert seen["s1"] == "/v1/AK?t=1735787045&z=t%201"
    assert seen["s2"] == "x-time:at 1735787045\n"
    a = llmbench.percent_encode(seen["s1"])
    assert signed.target == "/v1/AK?t=1735787045&a=%s&z=t%%201" % a
    assert signed.headers == [("Host", "h"), ("X-Time", "at 1735787045"), ("X-Seen", "a=%s&t=1735787045&z=t%%201" % a)]


def test_the_secret_itself_fills_nothing_in():
    signed = sign_by_steps(["key"], "/?a=${secret}&b=1", [("X", "${secret}"), ("Y", "${token}")])
    assert (signed.target, signed.headers) == ("/?b=1", [("Y", "TOK")])


def test_bytes_fill_nothing_in():
    with pytest.raises(llmbench.UserError, match=r"\$\{s0\} is bytes, not text"):
        sign_by_steps(["hmac(secret, 'a', out='raw')"], "/", [("X", "${s0}")])


def test_a_header_of_a_scheme_is_there_for_the_steps_and_a_signature_is_over_what_they_filled():
    secrets = Secrets("AK", "SK-of-mine", "TOK")
    signed = sign_by_steps(["sha256(header('Authorization'))"], "/", [("Host", "h")], llmbench.Bearer(secrets))
    assert dict(signed.steps)["s0"] == hash_hex("Bearer TOK") and header(signed) == "Bearer TOK"
    signed = sign_by_steps(["time()"], "/?t=${s0}", [("Host", "h")], llmbench.VolcV4(secrets))
    assert "\nt=1735787045\n" in dict(signed.steps)["canonical request"]


HIDDEN_STEPS = [
    ("b64(secret)", True), ("join(':', key, secret)", True), ("md5(secret)", True), ("hmac(secret, 'const')", True),
    ("option:app-key", True), ("md5(join('', secret, time()))", False), ("hmac(secret, time())", False),
    ("sha256(body)", False), ("key", False), ("md5(join('', key, secret))", True), ("sha256(md5(secret))", True),
    ("hmac(md5(secret), join('', path, nonce))", False), ("hmac(secret, path)", True), ("chain(secret, nonce)", False),
     ("token", True), ("json(a=secret)", True), ("upper(tenant)", False),
]  # fmt: skip


@pytest.mark.parametrize("expression,hidden", HIDDEN_STEPS)
def test_a_step_that_gives_a_secret_away_is_not_shown(expression, hidden):
    signed = sign_by_steps([expression], "/", [("Host", "h")])
    assert (dict(signed.steps)["s0"] == "***") == hidden
    shown = json.dumps(signed.steps)
    for secret in ("SK-of-mine", "TOK", "hidden-option"):
        assert secret not in shown


def test_a_derived_key_is_not_shown_and_what_it_signs_is():
    signed = sign_by_steps(["hmac(secret, time('date'))", "time()", "hmac(s0, join('|', key, s1))"], "/", [])
    shown = dict(signed.steps)
    assert shown["s0"] == "***" and shown["s1"] == "1735787045"
    assert shown["s2 is made of"] == "AK|1735787045" and len(shown["s2"]) == 64


def test_what_a_derived_key_is_made_of_is_not_shown():
    signed = sign_by_steps(["hmac(secret, time('date'))", "lower(s0)", "trim(s1)", "hmac(s2, body)"], "/", [])
    shown = dict(signed.steps)
    assert [shown[name] for name in ("s0", "s1", "s2")] == ["***"] * 3 and len(shown["s3"]) == 64


@pytest.mark.parametrize("text,means", [
    ("|", "|"), ("\\", "\\"), ("it's", "it's"), ("\\'", "'"), ("\\n", "\n"), ("\\\\", "\\"), ("'", "'"),
    ("a\\\\'", "a\\'"),
])  # fmt: skip
def test_an_options_text_in_the_quotes_of_a_step(text, means):
    assert value(llmbench.quote_text(text)) == means


def test_a_run_that_measures_collects_no_steps():
    auth = llmbench.Steps(llmbench.Auth(Secrets("AK", "SK")), steps("key"))
    auth.explaining = False
    assert auth.sign("POST", "/", [], b"", 0.0, NONCE).steps == []


@pytest.mark.parametrize("text", [
    "", "'", "hmac(", "))", "a=b", "hmac(secret,", "\\", "'\\", "key key", "join(,)", "lower(,'a')", "json(a=)",
    "json(=1)",
    "0x10", "1.5", "''''", "\u4e2d", "lower('a',)", "time(fmt=)", "hmac(key=secret)", "\x00", "key:", "option:", "-",
])  # fmt: skip
def test_no_text_makes_the_parser_fail_otherwise_than_in_one_line(text):
    with pytest.raises(llmbench.UserError) as caught:
        steps(text)
    assert str(caught.value).startswith("gw.json: sign step 1 (s0)")


# --- which scheme a run has -------------------------------------------------------------------------------------------


def auth_of(provider="openai", **given):
    return llmbench.make_provider(llmbench.Config(url="http://h", model="m", provider=provider, **given)).auth


def test_the_default_is_a_bearer_token_where_there_is_one():
    assert auth_of(token="t").headers() == [("Authorization", "Bearer t")]
    assert (auth_of().name, auth_of().headers()) == ("none", [])
    assert auth_of(token="t", auth="none").headers() == []
    assert not auth_of(token="t").per_request


@pytest.mark.parametrize("given,said", [
    ({"auth": "tc4"}, "--auth tc4 is unknown (did you mean tc3?); it is one of bearer, "),
    ({"auth": "tc3"}, "--auth tc3 needs --auth-key and --auth-secret"),
    ({"auth": "volc-v4", "auth_key": "k"}, "--auth volc-v4 needs --auth-secret"),
    ({"auth": "bearer"}, "--auth bearer needs --token"), ({"auth": "hmac"}, "--auth hmac needs --auth-secret"),
    ({"auth": "zhipu-jwt", "token": "no-dot"}, "of the form id.secret"),
    ({"auth": "api-key", "token": "t", "auth_opt": {"heder": "x"}},
     "--auth-opt heder is no option of api-key (did you mean header?); it takes header, prefix, refresh, exchange-url"),
    ({"auth_key": "k", "auth_secret": "s"}, "--auth-key and --auth-secret need a scheme here; name it with --auth"),
    ({"auth": "bce-v1", "auth_key": "k", "auth_secret": "s", "auth_opt": {"expires": "0"}},
     "expires needs a whole number"),
    ({"auth": "hmac", "auth_secret": "s", "auth_opt": {"parts": "time,bodi"}}, "parts: 'bodi' is none of key, time"),
    ({"auth": "hmac", "auth_secret": "s", "auth_opt": {"hash": "sha2"}}, "--auth-opt hash must be one of sha256"),
    ({"auth": "hmac", "auth_secret": "s", "auth_opt": {"encoding": "hexx"}}, "out must be one of hex"),
    ({"auth": "hmac", "auth_secret": "s", "auth_opt": {"signature-format": "HMAC ${key}:${sign}"}},
     "signature-format: ${sign} is none of ${signature}, ${key}, ${time}, ${nonce} (did you mean signature?)"),
    ({"token": "t", "auth_opt": {"refresh": "5m"}}, "--auth-opt refresh needs a token to ask for again"),
    ({"token": "t", "token_source": "cmd:x", "auth_opt": {"refresh": "soon"}}, "--auth-opt refresh needs a duration"),
    ({"auth": "tc3", "auth_key": "k", "auth_secret": "s", "header": ["Authorization: x"]},
     "--header Authorization and --auth tc3 exclude each other"),
    ({"auth": "huawei-iam", "auth_key": "k", "auth_secret": "s"}, "needs --auth-opt domain=ACCOUNT"),
    ({"auth": "baidu-oauth", "auth_key": "k", "auth_secret": "s", "auth_opt": {"exchange-url": "ftp://h"}},
     "--auth baidu-oauth: exchange needs a url with http:// or https://"),
])  # fmt: skip
def test_what_a_scheme_lacks_is_one_line(given, said):
    with pytest.raises(llmbench.UserError) as caught:
        auth_of(**given)
    assert said in str(caught.value)


def test_ark_needs_an_endpoint_id_which_is_the_model():
    auth = auth_of(auth="ark-api-key", auth_key="AK", auth_secret="SKTEST0001")
    question = auth.exchange.question(at("2025-01-02T03:04:05Z"), NONCE)
    assert json.loads(question.body)["ResourceIds"] == ["m"]
    with pytest.raises(llmbench.UserError, match="needs --model ep-"):
        llmbench.make_provider(llmbench.Config(url="http://h", auth="ark-api-key", auth_key="k", auth_secret="s"))


# --- tokens that are asked for ----------------------------------------------------------------------------------------


def jwt_of(claims):
    return "a.%s.c" % base64.urlsafe_b64encode(claims.encode()).decode().rstrip("=")


def exchange(options=None, **form):
    secrets = Secrets("a k", "s&k", "", options or {})
    return llmbench.TokenExchange({"url": "http://h:8/t", "token": "access.token", **form}, secrets, "gw.json")


def test_baidus_question():
    question = auth_of(auth="baidu-oauth", auth_key="a k", auth_secret="s&k").exchange.question(0.0, NONCE)
    assert question.url == (
        "https://aip.baidubce.com/oauth/2.0/token?grant_type=client_credentials&client_id=a%20k&client_secret=s%26k"
    )
    assert (question.method, question.body) == ("POST", b"")
    assert ("Host", "aip.baidubce.com") in question.headers and ("Content-Length", "0") in question.headers


def test_arks_question_is_signed():
    auth = auth_of(auth="ark-api-key", auth_key="AK", auth_secret="SKTEST0001", auth_opt={"duration": "3600"})
    question = auth.exchange.question(at("2025-01-02T03:04:05Z"), NONCE)
    assert question.url == "https://open.volcengineapi.com/?Action=GetApiKey&Version=2024-01-01"
    assert question.body == b'{"DurationSeconds":3600,"ResourceType":"endpoint","ResourceIds":["m"]}'
    again = sign("volc-v4", Secrets("AK", "SKTEST0001"), "POST", "/?Action=GetApiKey&Version=2024-01-01",
                 {"Host": "open.volcengineapi.com", "Content-Type": "application/json"}, question.body,
                 at("2025-01-02T03:04:05Z"))  # fmt: skip
    assert dict(question.headers)["Authorization"] == header(again)
    answer = b'{"ResponseMetadata":{},"Result":{"ApiKey":"ark-1"}}'
    assert auth.exchange.read(200, {}, answer, 1000.0) == llmbench.Grant("ark-1", 4600.0)


def test_huaweis_question_and_answer():
    options = {"domain": "acme", "region": "cn-north-9"}
    auth = auth_of(auth="huawei-iam", auth_key="ann", auth_secret='p"w', auth_opt=options)
    question = auth.exchange.question(0.0, NONCE)
    assert question.url == "https://iam.cn-north-9.myhuaweicloud.com/v3/auth/tokens"
    user = {"name": "ann", "password": 'p"w', "domain": {"name": "acme"}}
    assert json.loads(question.body)["auth"] == {
        "identity": {"methods": ["password"], "password": {"user": user}}, "scope": {"project": {"name": "cn-north-9"}},
    }  # fmt: skip
    answer = b'{"token":{"expires_at":"2025-01-02T03:04:05.000000Z"}}'
    grant = auth.exchange.read(201, {"x-subject-token": " MIIC "}, answer, 0.0)
    assert grant == llmbench.Grant("MIIC", at("2025-01-02T03:04:05Z"))
    auth.renew(grant.token)
    assert ("X-Auth-Token", "MIIC") in auth.sign("POST", "/", [], b"", 0.0, NONCE).headers


def test_a_declared_exchange():
    made = exchange(
        {"scope": "chat"}, method="post", form={"id": "${key}", "scope": "${option:scope}", "n": 1},
        headers={"X-Client": "${key}"}, auth="basic",
    ).question(0.0, NONCE)  # fmt: skip
    assert made.body == b"id=a%20k&scope=chat&n=1"
    sent = dict(made.headers)
    assert (sent["X-Client"], sent["Content-Type"]) == ("a k", "application/x-www-form-urlencoded")
    assert sent["Authorization"] == "Basic YSBrOnMmaw==" and sent["Content-Length"] == "23"
    assert exchange(body={"a": ["${secret}", 1]}).question(0.0, NONCE).body == b'{"a":["s&k",1]}'


def test_the_fields_of_a_form_are_encoded_whoever_wrote_them():
    question = exchange(form={"scope": "读 a&b=c", "id": "${key}"}).question(0.0, NONCE)
    assert question.body == b"scope=%E8%AF%BB%20a%26b%3Dc&id=a%20k"


def test_the_address_of_an_exchange_can_be_another():
    other = {"exchange-url": "http://127.0.0.1:1/token"}
    assert exchange(other, url="https://v.com/x?grant=1").question(0.0, NONCE).url == "http://127.0.0.1:1/token?grant=1"
    other = {"exchange-url": "http://127.0.0.1:1/token?mine=2"}
    assert exchange(other, url="https://v.com/x?grant=1").question(0.0, NONCE).url == other["exchange-url"]
    assert exchange(url="http://h").question(0.0, NONCE).url == "http://h/"


@pytest.mark.parametrize("form,said", [
    ({"ulr": "x"}, "unknown key 'ulr' (did you mean url?)"), ({"url": "h/t"}, "needs a url with http://"),
    ({"url": "http://u:p@h/t"}, "no password"), ({"body": {}, "form": {}}, "body or form, not both"),
    ({"token": ""}, "needs token"), ({"token": 3}, "exchange.token must be"), ({"auth": "oauth"}, "'oauth' is unknown"),
    ({"auth": "baidu-oauth"}, "is unknown"), ({"headers": {"A": "${nope}"}}, "${nope} is not known"),
    ({"expires_in": []}, "exchange.expires_in must be a path or seconds"), ({"url": "http://h:99999/"}, "port"),
    ({"auth": []}, "exchange.auth must be a text"), ({"auth_options": None}, "exchange.auth_options must be an object"),
    ({"auth": "bce-v1", "auth_options": {"expires": 60}}, "exchange.auth_options.expires must be a text"),
])  # fmt: skip
def test_an_exchange_of_a_wrong_form_is_refused(form, said):
    with pytest.raises(llmbench.UserError, match=r"^gw\.json: ") as caught:
        exchange(**form)
    assert said in str(caught.value)


@pytest.mark.parametrize("status,body,said", [
    (401, b'{"error":"bad"}', 'HTTP 401: {"error":"bad"}'), (500, b"", "HTTP 500"),
    (200, b"<html>", "no token at access"),
    (200, b'{"access":{}}', "no token at access.token"), (200, b'{"access":{"token":7}}', "no token"),
    (200, b'{"access":{"token":"a\\r\\nB: c"}}', "no token"), (200, b'{"access":{"token":" "}}', "no token"),
    (302, b"", "HTTP 302"), (200, b"[" * 100000, "no token"), (200, b"\xff", "no token"),
])  # fmt: skip
def test_an_answer_without_a_token(status, body, said):
    with pytest.raises(ValueError) as caught:
        exchange().read(status, {}, body, 0.0)
    assert said in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("wanted,given,expires", [
    ("expires_in", 60, 1060.0), ("expires_in", "60", 1060.0), ("expires_in", None, None), ("expires_in", -1, None),
    ("expires_in", "soon", None), (30, None, 1030.0), ("expires_in", 1735787045, 1735787045.0),
    ("expires_in", 1735787045000, 1735787045.0), ("expires_in", "2025-01-02T03:04:05Z", 1735787045.0),
    ("expires_in", "T", None), ("absent.path", 60, None), ("expires_in", True, 1001.0), ("expires_in", 10**400, None),
    ("expires_in", "2025-01-02T11:04:05.25+08:00", 1735787045.0),
    ("expires_in", "2025-01-01T22:04:05-0500", 1735787045.0),
    ("expires_in", "2025-01-02T03:04:05", 1735787045.0), ("expires_in", "2025-01-02T03:04:05+8", None),
    ("expires_in", "2025-01-02T11:04:05+08", 1735787045.0), ("expires_in", "2025-1-2T3:4:5z", 1735787045.0),
    ("expires_in", "2025-01-02T11:04:05+08:00[Asia/Shanghai]", 1735787045.0),
])  # fmt: skip
def test_when_a_token_ends(wanted, given, expires):
    body = json.dumps({"access": {"token": "t"}, "expires_in": given}).encode()
    assert exchange(expires_in=wanted).read(200, {}, body, 1000.0) == llmbench.Grant("t", expires)


@pytest.mark.parametrize("token,expires", [
    (JWT, 1735787255000.0), ("a.b.c", None), ("", None), ("a.eyJleHAiOjV9.c", 5.0), ("a.eyJleHAiOiJ4In0.c", None),
    ("a.W10.c", None), ("sk-1", None), ("a.eyJleHAiOnRydWV9.c", None), (jwt_of('{"exp": 1e999}'), None),
    (jwt_of('{"exp": 1%s}' % ("0" * 400)), None), (jwt_of("[" * 200000), None),
])  # fmt: skip
def test_when_a_jwt_ends(token, expires):
    assert llmbench.jwt_expiry(token) == expires
