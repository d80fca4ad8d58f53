"""Signing: the vectors that vendors published and our own, to the byte; steps; what is missing or unknown."""

from __future__ import annotations

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
