"""The words and what must never be shown: records, definitions, the log-scaled histogram, redaction."""

from __future__ import annotations

import dataclasses
import html
import math
import re
import time

import pytest

import llmbench
from conftest import ROOT

SECRET = "sk-4f9aQz71"
RECORD_KEYS = """
    request_id prompt_id phase stage shard provider status err http_status start_ts first_content_ts end_ts scheduled_ms
    start_ms queue_ms connect_ms ttfb_ms ttfe_ms ttft_ms ttft_slack_ms latency_ms ttft_from_scheduled_ms
    latency_from_scheduled_ms decode_ms tpot_ms itl_hist itl_sum_ms itl_min_ms itl_max_ms chunks in_bytes out_bytes
    in_tokens cached_tokens reasoning_tokens out_tokens out_chars reasoning_chars finish_reason reused retried lag_ms
    clock rtt_ms retransmits out_of_order chunk_ms first_content_raw final_frame_raw error_raw
"""
STATUSES = """
    ok dns_error connect_error proxy_error tls_error auth_error rate_limited http_error stream_error parse_error
    truncated empty timeout cancelled dropped
"""

# --- redaction --------------------------------------------------------------------------------------------------------

# A text with SECRET in it that must go although nobody told redact() what the secret is.
HIDDEN = {
    "query key": f"GET /v1/chat?api-key={SECRET}&x=2",
    "query key, underscore": f"https://h/v1?api_key={SECRET}",
    "query key, second": f"https://h/v1?x=2&key={SECRET}",
    "query token": f"https://h/v1?access_token={SECRET}#top",
    "query signature": f"https://h/v1?X-Amz-Signature={SECRET}",
    "query, HTML-escaped": f'<a href="/v1?x=1&amp;api-key={SECRET}">',
    "password": f"https://user:{SECRET}@host/v1",
    "password, with @": f"https://user:{SECRET}@x@host/v1",
    "user name": f"https://{SECRET}@host/v1",
    "password in a proxy's URL": f"proxy http://user:{SECRET}@proxy:8080 refused",
    "bearer": f"Authorization: Bearer {SECRET}",
    "bearer in JSON": '{"error":"bad header: Bearer %s"}' % SECRET,
    "bearer, small": f"authorization: bearer {SECRET}",
    "a JWT anywhere": "the token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4eHh4In0.%s is over" % SECRET,
    "basic": "Authorization: Basic dXNlcjpzZWNyZXQ= was refused".replace("dXNlcjpzZWNyZXQ=", SECRET),
}
WANTED = {
    "authorization without a scheme": f"Authorization: {SECRET}",
    "key header": f"x-api-key: {SECRET}",
    "key header, quoted": f'header "x-api-key: {SECRET}" was refused',
    "cookie": f"Cookie: session={SECRET}; theme=dark",
    "second cookie": f"Cookie: theme=dark; session={SECRET}",
    "set-cookie": f"Set-Cookie: session={SECRET}; HttpOnly",
    "JSON": '{"api_key":"%s"}' % SECRET,
    "JSON with blanks": '{"model": "m", "access_token" : "%s"}' % SECRET,
    "JSON in JSON": '{"body":"{\\"api_key\\":\\"%s\\"}"}' % SECRET,
    "Python's repr": "{'password': '%s'}" % SECRET,
    "fragment": f"https://h/cb#access_token={SECRET}",
    "password with a quote": f"https://user:{SECRET}'x@host/v1",
    "camel case": f"https://h/v1?accessKey={SECRET}",
}
# What looks like a secret and is none, or is needed to understand the text.
SHOWN = [
    "max_tokens", '{"max_tokens":256,"max_completion_tokens":1}', "https://h/v1?max_tokens=256&min_tokens=2",
    "?total_tokens=5&prompt_tokens=3&completion_tokens=2&n_tokens=1", "?token_mode=usage", "token_mode: chars",
    "https://h:8000/v1/chat/completions?api-version=2024-06-01&deployment=gpt", "mail to ops@example.com",
    "http://h/@scope/package", "time to first token was 12 ms", "?design=1&monkey=2&author=x&keyword=y",
    "HTTP 401: the key is wrong", "bearer of", "?top_k=5&stop=a",
]  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_what_gives_itself_away_as_a_secret_is_hidden(name):
    shown = llmbench.redact(HIDDEN[name])
    assert SECRET not in shown and "***" in shown


@pytest.mark.parametrize("name", WANTED)
def test_secret_headers_cookies_and_fields_are_hidden(name):
    shown = llmbench.redact(WANTED[name])
    assert SECRET not in shown and "***" in shown


def test_a_password_with_an_at_sign_is_hidden_to_its_end():
    assert llmbench.redact("https://user:first@second@host/v1") == "https://***@host/v1"


@pytest.mark.parametrize("text", SHOWN)
def test_what_is_no_secret_is_shown(text):
    assert llmbench.redact(text) == text


@pytest.mark.parametrize("text", [
    f"a {SECRET} b", f'{{"error":"Incorrect API key provided: {SECRET}."}}', f"{SECRET}{SECRET}", f"x{SECRET}y",
])  # fmt: skip
def test_a_known_secret_is_hidden_wherever_it_stands(text):
    assert SECRET not in llmbench.redact(text, [SECRET])


@pytest.mark.parametrize("written", [r"sk\/with\/slash", "sk%2Fwith%2Fslash"])
def test_a_known_secret_is_hidden_however_it_is_written(written):
    config = llmbench.Config(url="http://h", token="sk/with/slash")
    secrets = llmbench.secrets_of(config, llmbench.parse_url(config.url, llmbench.make_provider(config)))
    assert llmbench.redact('{"error":"bad key %s"}' % written, secrets) == '{"error":"bad key ***"}'


def test_an_empty_secret_hides_nothing():
    assert llmbench.redact("plain text", ["", ""]) == "plain text"


def test_redacting_twice_changes_nothing():
    for text in HIDDEN.values():
        once = llmbench.redact(text)
        assert llmbench.redact(once) == once


@pytest.mark.parametrize("text", [
    "?" * 12000, "://" * 5000, "a-" * 8000, "&=" * 8000, "bearer " * 2000, '"key":' * 3000, "-eyJaaaaaaaa" * 2000,
    "eyJaaaaaaaa.eyJaaaaaaaa " * 1500,
])  # fmt: skip
def test_redacting_takes_time_in_proportion_to_the_text(text):
    began = time.perf_counter()
    llmbench.redact(text)
    assert time.perf_counter() - began < 1.0  # quadratic would be ten times that


SECRET_NAMES = """
    Authorization authorization Proxy-Authorization Cookie Set-Cookie x-api-key api-key api_key apikey key
    x-goog-api-key token access_token id-token X-Auth-Token secret SecretKey client_secret
    password passwd db_pwd signature sig sign
    ak sk X-Amz-Credential Ocp-Apim-Subscription-Key
"""
OTHER_NAMES = """
    max_tokens max_completion_tokens min_tokens prompt_tokens completion_tokens total_tokens tokens token_mode
    token-mode max_tokens_field num_tokens n_token model top_k keyword monkey author design assign task ask
    stop X-Request-Id
"""


@pytest.mark.parametrize("names,secret", [(SECRET_NAMES, True), (OTHER_NAMES, False)], ids=["secret", "other"])
def test_names_of_secrets(names, secret):
    assert [name for name in names.split() if llmbench.is_secret_name(name) != secret] == []


# --- records, configuration, definitions ------------------------------------------------------------------------------


def test_a_figure_of_requests_is_collected_and_shown_and_can_be_a_gate():
    """What the way of a new figure would otherwise forget, see the section's essay."""
    figures, elsewhere = set(llmbench.DISTRIBUTIONS), {"itl_ms"}
    assert figures <= set(llmbench.COLUMNS) and figures <= set(llmbench.METRICS)
    assert set(llmbench.TABLED) == figures | elsewhere
    in_report_alone = {"ttfb_ms", "decode_ms"}
    assert set(llmbench.TABLED_METRICS) == (figures | elsewhere | {"request_tps"}) - in_report_alone
    assert {name + "_ms" for name in llmbench.GATE_TIMES} == figures | elsewhere


def test_a_record_has_every_key_that_files_promise():
    assert [key for key in RECORD_KEYS.split() if key not in llmbench.Record.__dataclass_fields__] == []


def test_a_record_shows_only_what_is_known():
    record = llmbench.Record("r-0-0", "p", "measure", 0, out_tokens=0, err=None, reused=False)
    assert record.known() == {
        "request_id": "r-0-0", "prompt_id": "p", "phase": "measure", "stage": 0, "provider": "", "status": "ok",
        "out_tokens": 0, "reused": False,
    }  # fmt: skip


def test_the_statuses_are_the_agreed_ones_in_the_order_of_phases():
    assert list(llmbench.STATUSES) == STATUSES.split()
    assert frozenset(("cancelled", "dropped")) == llmbench.NOT_JUDGED


@pytest.mark.parametrize("total,duration,concurrency,expected", [
    (None, None, 1, 10), (None, None, 5, 10), (None, None, 16, 32),
    (7, None, 16, 7), (None, 30.0, 16, None), (7, 30.0, 16, 7),
])  # fmt: skip
def test_requests_per_stage(total, duration, concurrency, expected):
    config = llmbench.Config(total_requests=total, duration=duration)
    assert config.requests_per_stage(concurrency) == expected


def test_two_configurations_share_no_list():
    first, second = llmbench.Config(), llmbench.Config()
    first.header.append("K: V")
    first.concurrency.append(2)
    first.body["k"] = 1
    assert (second.header, second.concurrency, second.body) == ([], [1], {})


def test_every_metric_states_label_and_definition():
    for name, metric in llmbench.METRICS.items():
        assert metric.name == name and metric.label
        assert re.fullmatch(r"[A-Z(\[]?.{20,}\.", metric.definition), name


def test_every_distribution_has_a_definition():
    named = set(llmbench.DISTRIBUTIONS) | {"itl_ms", "request_tps"}
    assert named - set(llmbench.METRICS) == set()


# --- the log-scaled histogram -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("micros,bucket", [
    (0, 0), (0.5, 0), (0.999, 0), (1.0, 1), (1.005, 1), (1.02, 2),
    (1000.0, 1 + math.floor(math.log(1000) / math.log(1.01))), (1e9, 1 + math.floor(math.log(1e9) / math.log(1.01))),
])  # fmt: skip
def test_buckets(micros, bucket):
    assert llmbench.log_bucket(micros / 1e6) == bucket


def test_a_buckets_value_is_within_half_a_percent_of_all_it_holds():
    for step in range(20000):
        seconds = 1e-6 * 1.001**step
        value = llmbench.bucket_ms(llmbench.log_bucket(seconds)) / 1000.0
        assert abs(value / seconds - 1) < 0.00501, seconds


def test_buckets_never_fall_as_spans_grow():
    buckets = [llmbench.log_bucket(1e-7 * 1.0007**step) for step in range(30000)]
    assert buckets == sorted(buckets) and buckets[0] == 0


def test_below_a_microsecond_is_nothing():
    assert llmbench.bucket_ms(0) == 0.0


@pytest.mark.parametrize("seconds,expected", [(0, 0.0), (1.5, 1500.0), (0.00012345678, 0.1235), (1e-8, 0.0)])
def test_milliseconds_have_four_decimals(seconds, expected):
    assert llmbench.milliseconds(seconds) == expected


# --- the README says the same -----------------------------------------------------------------------------------------


def readme(name):
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not written yet")
    return " ".join(html.unescape(path.read_text(encoding="utf-8").replace("\\|", "|")).split())


@pytest.mark.parametrize("name", llmbench.METRICS)
def test_the_readme_gives_each_definition_word_for_word(name):
    assert " ".join(llmbench.METRICS[name].definition.split()) in readme("README.md")


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readmes_name_every_flag(name):
    text = readme(name)
    missing = [flag.name for flag in llmbench.RUN_FLAGS if not re.search(rf"--{flag.name}(?![\w-])", text)]
    assert missing == []


@pytest.mark.parametrize("status", llmbench.STATUSES)
def test_the_readme_names_every_status(status):
    assert status in readme("README.md")


def test_a_default_of_the_configuration_is_what_its_flag_shows():
    shown = {"timeout": "120s", "connect_timeout": "10s", "warmup": "0", "max_tokens": "256", "seed": "0",
             "provider": "openai", "token_mode": "usage", "think_tags": "auto", "progress": "auto"}  # fmt: skip
    flags = {flag.name.replace("-", "_"): flag for flag in llmbench.RUN_FLAGS}
    defaults = {field.name: field.default for field in dataclasses.fields(llmbench.Config)}
    for name, text in shown.items():
        assert flags[name].default == text
        assert flags[name].read(text) == defaults[name]


# --- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text,metric,stat,op,limit", [
    ("ttft.p95<=800ms", "ttft", "p95", "<=", 800.0), (" ttft . p95 <= 0.8 s ", "ttft", "p95", "<=", 800.0),
    ("TTFT.P95<=800MS", "ttft", "p95", "<=", 800.0), ("tpot.p99<50ms", "tpot", "p99", "<", 50.0),
    ("queue.max<250us", "queue", "max", "<", 0.25), ("itl.mean<.5s", "itl", "mean", "<", 500.0),
    ("latency_from_scheduled.p90<=2.3s", "latency_from_scheduled", "p90", "<=", 2300.0),
    ("connect.min>0ms", "connect", "min", ">", 0.0), ("request_tps.p50>=20", "request_tps", "p50", ">=", 20.0),
    ("request_tps.mean >= 20 tok/s", "request_tps", "mean", ">=", 20.0),
    ("success>=99%", "success", "", ">=", 0.99), ("success >= 99.9 %", "success", "", ">=", 0.999),
    ("success>=100%", "success", "", ">=", 1.0), ("throughput>=500", "throughput", "", ">=", 500.0),
    ("steady>=500 tokens/s", "steady", "", ">=", 500.0), ("rps>=4.5 req/s", "rps", "", ">=", 4.5),
    ("goodput>=4", "goodput", "", ">=", 4.0), ("goodput>=95%", "goodput", "", ">=", 0.95),
])  # fmt: skip
def test_a_gate_is_read(text, metric, stat, op, limit):
    assert llmbench.parse_gate(text) == (text, metric, stat, op, limit)


@pytest.mark.parametrize("text,said", [
    ("", "METRIC.STAT"), ("ttft", "METRIC.STAT"), ("ttft.p95", "METRIC.STAT"), ("ttft.p95=800ms", "one of <= < >= >"),
    ("ttft.p95==800ms", "one of"), ("ttft.p95=<800ms", "one of"), ("ttft.p95<=ms", "METRIC.STAT"),
    ("ttft.p95<=-800ms", "METRIC.STAT"), ("ttft.p95<=8e2ms", "METRIC.STAT"), ("ttft.p95<=1,000ms", "METRIC.STAT"),
    ("ttft.p95<=800ms tpot.p95<=1s", "METRIC.STAT"), ("ttft.p95<=nan", "METRIC.STAT"),
    ("ttft.p95<=８００ms", "METRIC.STAT"),
    ("tttf.p95<=800ms", "did you mean ttft?"), ("latencies.p95<=1s", "did you mean latency?"),
    ("sucess>=99%", "did you mean success?"), ("zzz<1", "one of ttft, ttfe"),
    ("ttft<=800ms", "needs a statistic of ttft"), ("ttft.p999<=800ms", "p50, p90, p95, p99, mean, min, max"),
    ("ttft.p99.9<=800ms", "needs a statistic"), ("request_tps>=20", "needs a statistic of request_tps"),
    ("success.p50>=99%", "leave .p50 out"), ("throughput.mean>=5", "leave .mean out"),
    ("ttft.p95<=800", "us or ms or s, such as ttft.p95<=800ms"), ("ttft.p95<=2m", "us or ms or s"),
    ("ttft.p95<=80%", "us or ms or s"), ("success>=0.99", "in %, such as success>=99%"),
    ("success>=99.9.9%", "METRIC.STAT"), ("success>=101%", "100 % is the most"), ("throughput>=5ms", "no unit"),
    ("goodput>=5tok/s", "no unit or req/s or %"), ("ttft.p95<=" + "9" * 400 + "s", "no figure can have"),
])  # fmt: skip
def test_a_gate_that_cannot_be_read_says_what_to_do(text, said):
    with pytest.raises(ValueError) as raised:
        llmbench.parse_gate(text)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_every_metric_of_a_gate_is_a_figure_that_the_summary_has():
    figures = {*llmbench.METRICS, *llmbench.DISTRIBUTIONS, "itl_ms"}
    for metric in llmbench.GATE_UNITS:
        gate = llmbench.parse_gate(llmbench.gate_example(metric))
        assert gate.metric == metric and gate.figure in figures


def test_a_share_of_goodput_is_another_figure_than_its_rate():
    assert [llmbench.parse_gate(text).figure for text in ("goodput>=4", "goodput>=90 % ")] == [
        "goodput_rps", "goodput_share"]  # fmt: skip


def test_the_limits_that_one_request_can_meet():
    texts = ["ttft.p50<=1s", "ttft.p99>1ms", "request_tps.p50>=20", "request_tps.p50<=90", "itl.p99<1s", "queue.p99<1s",
             "success>=99%", "throughput>=5", "latency_from_scheduled.mean<9s"]  # fmt: skip
    limits = llmbench.request_limits([llmbench.parse_gate(text) for text in texts])
    assert [gate.text for gate in limits] == ["ttft.p50<=1s", "request_tps.p50>=20", "latency_from_scheduled.mean<9s"]


def test_goodput_needs_a_limit_to_count_by():
    assert len(llmbench.parse_gates(["ttft.p95<=1s", "goodput>=95%"])) == 2
    for texts in (["goodput>=95%"], ["goodput>=95%", "itl.p99<=1s"]):
        with pytest.raises(ValueError, match="one request can meet"):
            llmbench.parse_gates(texts)
