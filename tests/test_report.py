"""The report: its figures are the summary's, its charts hold every sample, and what an endpoint sent stays text."""

from __future__ import annotations

import base64
import bisect
import functools
import hashlib
import itertools
import json
import math
import random
import re
from array import array
from html.parser import HTMLParser

import pytest
import report_data
from made_records import loaded_run, loaded_stage, reported

import llmbench
from conftest import ROOT

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028\u2029\x00\ud800\"'&<!--`**x**`"


@functools.lru_cache(maxsize=1)
def assets():
    """The report's assets, name to bytes."""
    folder = ROOT / "assets"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@functools.lru_cache(maxsize=None)
def made(name):
    """One of the made-up runs and its page: the arguments of render_report, and the HTML."""
    run = report_data.RUNS[name]()
    return run, llmbench.render_report(*run, assets=assets())


class Page(HTMLParser):
    """What a browser would find in a page: its tags, the text of one language, and the contents of its scripts."""

    VOID = frozenset(("meta", "wbr", "img", "link", "br", "input"))

    def __init__(self, text, hidden_language="zh-CN"):
        super().__init__(convert_charrefs=True)
        self.tags, self.words, self.scripts, self._open, self._hidden = [], [], [], [], hidden_language
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1]}"
        self._open.pop()

    def handle_data(self, data):
        if self._open and self._open[-1][0] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif not any(tag == "style" or attrs.get("lang") == self._hidden for tag, attrs in self._open[1:]):
            self.words.append(data)

    @property
    def text(self):
        """The visible text, its white space folded."""
        return re.sub(r"[ \t\r\n\f\u00a0]+", " ", " ".join(self.words))


def charts_of(page):
    """The charts' specifications, as the script reads them."""
    return json.loads(next(text for attrs, text in Page(page).scripts if attrs.get("type")))["charts"]


def tile_texts(page, number=0):
    """The words of each of the six figures of the stage with this number."""
    rows = page.split('<div class="tiles">')
    fragments = rows[number + 1].split('<div class="tile">')[1:7]
    return [Page(fragment.partition("</dl>")[0] + "</dl>", "zh-CN") for fragment in (
        "<html><div>" + text for text in fragments)]


def says(text, value):
    """Whether a printed figure is this value, to the last digit that is printed."""
    digits = text.replace(",", "")
    places = len(digits.partition(".")[2])
    return abs(float(digits) - value) <= 0.5 * 10.0 ** -places * (1 + 1e-9)


def number_after(pattern, text):
    """The printed number that follows."""
    return re.search(pattern + r"\s*†?\s*([\d,.]+)", text).group(1)


class TestFigures:
    """Every figure on the first screen is the summary's."""

    @pytest.mark.parametrize("name", ["healthy", "failing", "ten", "one", "open_loop"])
    def test_times(self, name):
        (summary, *_), page = made(name)
        texts = [tile.text for tile in tile_texts(page)]
        for text, metric in zip(texts[1:4], ("ttft_ms", "latency_ms", "tpot_ms")):
            statistic = summary["stages"][0][metric]
            divisor = 1000 if statistic["p50"] >= 2000 else 1
            shown = re.findall(r"([\d,.]+) (ms|s)\b", text)
            assert {unit for _, unit in shown} == {"s" if divisor == 1000 else "ms"}
            assert says(shown[0][0], statistic["p50"] / divisor), text
            for stat in ("p95", "p99"):
                assert says(number_after(stat.upper(), text), statistic[stat] / divisor), text
            assert number_after(r"\bn", text) == f"{statistic['n']:,}"

    @pytest.mark.parametrize("name", sorted(report_data.RUNS))
    def test_counts_and_rates(self, name):
        (summary, *_), page = made(name)
        for number, stage in enumerate(summary["stages"]):
            texts = [tile.text for tile in tile_texts(page, number)]
            requests, throughput = stage["requests"], stage["throughput"]
            assert number_after("succeeded", texts[0]) == f"{requests['success']:,}"
            assert number_after("failed", texts[0]) == f"{requests['failure']:,}"
            assert f"{requests['cancelled']}, {requests['dropped']}" in texts[0]
            assert says(re.search(r"([\d.]+) %", texts[0]).group(1), 100 * requests["success_rate"])
            if "output_tokens_per_s" in throughput:
                assert says(re.search(r"([\d,.]+) tok/s", texts[4]).group(1), throughput["output_tokens_per_s"])
                assert says(number_after("steady", texts[4]), throughput["steady_output_tokens_per_s"])
                assert says(number_after("goodput", texts[5]), throughput["goodput_rps"])
            assert says(re.search(r"([\d,.]+) req/s", texts[5]).group(1), throughput["rps"])

    def test_the_table_of_all_figures(self):
        (summary, *_), page = made("healthy")
        table = page[page.index('<table class="figures">'):].partition("</table>")[0]
        rows = [re.findall(r"<td[^>]*>([^<]*)", row) for row in table.split("<tr")[2:]]
        metrics = ["ttft_ms", "ttfb_ms", "latency_ms", "decode_ms", "tpot_ms", "itl_ms", "queue_ms", "connect_ms"]
        assert len(rows) == len(metrics)
        for cells, metric in zip(rows, metrics):
            statistic = summary["stages"][0][metric]
            wanted = [statistic[stat] for stat in ("n", "mean", "stdev", "min", "p50", "p90", "p95", "p99", "max")]
            assert all(says(cell, value) for cell, value in zip(cells, wanted)), (metric, cells, wanted)

    def test_a_thin_claim_is_not_rounded_up(self):
        assert llmbench.percent_number(0.99996) == "99.996"
        assert llmbench.percent_number(0.00001) == "0.001"
        assert llmbench.figure(0.0001) == "<0.001"
        assert [llmbench.figure(value) for value in (0, 3247.6, 9.996, 0.0704, None, math.nan)] == [
            "0", "3,248", "10.0", "0.070", "–", "–"]

    def test_a_gate_that_fails_by_little_shows_more_digits(self):
        gate = {"metric": "ttft", "stat": "p95", "op": "<=", "limit": 800.0, "value": 800.004, "passed": False}
        stage = llmbench.stage_views(*made("healthy")[0][:1], made("healthy")[0][2])[0]
        limit, value = llmbench.gate_numbers(llmbench.read_page(assets()), stage, gate)
        assert limit != value


class TestCharts:
    """A chart holds every sample, and its marks are the summary's percentiles."""

    @pytest.mark.parametrize("name", sorted(report_data.RUNS))
    def test_bins_sum_to_n_and_marks_are_the_summarys(self, name):
        (summary, *_), page = made(name)
        charts = charts_of(page)
        for number, stage in enumerate(summary["stages"]):
            for panel, metric in (("ttft", "ttft_ms"), ("latency", "latency_ms"), ("gaps", "itl_ms")):
                chart = charts.get(f"{number}-{panel}")
                if chart is None:
                    assert not stage.get(metric)
                    continue
                assert all(mark["value"] == stage[metric][mark["name"]] for mark in chart["marks"])
                if chart["kind"] == "strip":
                    assert len(chart["values"]) == stage[metric]["n"] < 30
                    continue
                assert sum(chart["counts"]) == stage[metric]["n"]
                assert len(chart["edges"]) == len(chart["counts"]) + 1
                assert chart["edges"] == sorted(chart["edges"])
                slack = 1.01 if panel == "gaps" else 1 + 1e-6
                assert chart["edges"][-1] >= stage[metric]["max"] / slack

    @pytest.mark.parametrize("seed", range(40))
    def test_bins_of_any_values(self, seed):
        draw = random.Random(seed)
        n = draw.choice([30, 31, 250, 5001])
        values = sorted(draw.choice([draw.lognormvariate(5, 1), draw.uniform(1, 2), 7.0]) for _ in range(n))
        for edges in (llmbench.linear_edges(values[0], values[-1], draw.choice([0.0, 0.001, 3.0, 1e6])),
                      llmbench.log_edges(values[0], values[-1], 20), llmbench.linear_edges(5.0, 5.0, 0.0)):
            counts = llmbench.binned(edges, functools.partial(bisect.bisect_left, values), n)
            assert sum(counts) == n and min(counts) >= 0
        edges = llmbench.linear_edges(values[0], values[-1], draw.choice([0.0, 0.001, 3.0, 1e6]))
        assert edges[0] <= values[0] * (1 + 1e-12) and edges[-1] >= values[-1] * (1 - 1e-12)
        assert 12 <= len(edges) - 1 <= 60

    def test_gaps_of_zero_are_in_the_first_bar(self):
        rows = report_data.made_rows(n=50)
        rows.itl_hist[0] += 500
        run = report_data.made_run([rows])
        chart = charts_of(llmbench.render_report(*run, assets=assets()))["0-gaps"]
        assert sum(chart["counts"]) == sum(rows.itl_hist.values()) and chart["counts"][0] >= 500
        assert len(chart["counts"]) < 250

    def test_amounts_spread_over_time_are_kept(self):
        draw = random.Random(3)
        buckets = llmbench.Buckets(1000.0, 500.0, 20)
        spans = []
        for _ in range(200):
            begin = draw.uniform(1000, 10500)
            spans.append((begin, min(11000.0, begin + draw.expovariate(1 / 900)), draw.uniform(0, 300)))
        assert sum(llmbench.spread(buckets, spans)) == pytest.approx(sum(amount for _, _, amount in spans))

    def test_curves_reach_from_none_to_all(self):
        for curve in charts_of(made("healthy")[1])["0-answered"]["series"]:
            shares = curve["points"][1::2]
            assert (shares[0], shares[-1]) == (0, 1) and shares == sorted(shares) and len(shares) <= 200
            assert curve["points"][0::2] == sorted(curve["points"][0::2])

    @pytest.mark.parametrize("name", sorted(report_data.RUNS))
    def test_a_stage_is_at_most_60_kilobytes(self, name):
        page, sizes = made(name)[1], {}
        for key, chart in charts_of(page).items():
            stage = key.partition("-")[0]
            sizes[stage] = sizes.get(stage, 0) + len(json.dumps(chart, separators=(",", ":")))
        assert max(sizes.values(), default=0) <= 60_000

    def test_the_words_of_the_chart_of_requests_in_flight_are_of_its_points(self):
        run = reported(loaded_run(loaded_stage(n=300, load={"concurrency": 8})))
        page = llmbench.render_report(*run, assets=assets())
        values = charts_of(page)["0-time_flight"]["series"][0]["values"]
        said = re.search(r"In flight over the run, (\d+) points, from ([\d.]+)", Page(page).text)
        assert (int(said.group(1)), float(said.group(2))) == (len(values), pytest.approx(min(values), abs=0.01))

    def test_one_request_that_is_far_away_in_time_makes_no_more_points(self):
        lines = loaded_run(loaded_stage(n=60, load={"concurrency": 8}))
        next(line for line in lines if "request_id" in line).update(start_ms=-9e13)
        charts = charts_of(llmbench.render_report(*reported(lines), assets=assets()))
        assert all(chart["number"] <= 60 for name, chart in charts.items() if "time" in name)

    def test_few_requests_have_no_chart_over_time(self):
        assert not any("time" in name for name in charts_of(made("ten")[1]))
        assert charts_of(made("all_failed")[1]) == {}


class TestSentences:
    """The sentence claims what the summary has and nothing else."""

    def sentence(self, name):
        page = made(name)[1]
        return re.sub(r"\s+", " ", Page(page[page.index('<p class="sentence">'):].partition("</p>")[0] + "</p>").text)

    def test_one_stage(self):
        text = self.sentence("healthy")
        assert "With 16 concurrent streams half of the answers began within" in text and "All 5 gates passed." in text

    def test_few(self):
        assert "The endpoint answered 10 of 10 requests" in self.sentence("ten")
        assert "P95 within" not in self.sentence("one") and "1 of 1" in self.sentence("one")

    def test_none(self):
        text = self.sentence("all_failed")
        assert "No request succeeded. All 50 failed: rate limited (429)." in text.replace(" .", ".")

    def test_failures(self):
        assert "of the requests failed , most of them rate limited (429)" in self.sentence("failing")

    def test_sweep(self):
        text = self.sentence("sweep")
        assert "Every gate holds up to 16 concurrent streams" in text and "At 32 streams 2 of 3 gates fail" in text

    def test_not_monotone_is_never_up_to(self):
        run = report_data.sweep()
        for gate in run[0]["stages"][1]["slo"]:
            gate["passed"] = False
        page = llmbench.render_report(*run, assets=assets())
        assert "Every gate holds at 1 stream, 4 streams" in Page(page).text and "holds up to" not in Page(page).text

    def test_invalid_judges_no_gate(self):
        page = Page(made("invalid")[1])
        assert "no gate is judged" in page.text and "not judged" in page.text
        assert "✓ TTFT P95" not in page.text and "5 of 5 passed" not in page.text
        html = made("invalid")[1]
        assert 'class="invalid-run"' in html
        assert html.index('data-anchor="trust"') < html.index('data-anchor="fail"') < html.index("<details")

    def test_a_limited_percentile_is_not_cited(self):
        run = report_data.made_run([report_data.made_rows(n=150)])
        text = Page(llmbench.render_report(*run, assets=assets())).text
        assert "half of the answers began within" in text and "95 % within" not in text

    def test_a_run_that_was_cut_off_says_so(self):
        summary, header, rows, _ = made("healthy")[0]
        assert "The run was cut off" in Page(llmbench.render_report(summary, header, rows, None, assets())).text
        assert "The run was cut off" not in Page(made("healthy")[1]).text

    def test_without_verdict_there_is_no_band(self):
        summary, *rest = made("healthy")[0]
        bare = {name: value for name, value in summary.items() if name != "verdict"}
        assert '<div class="verdict' not in llmbench.render_report(bare, *rest, assets=assets())


class TestStages:
    """Several stages: one is shown, the others are there."""

    def test_the_highest_load_that_passed_is_shown(self):
        page = made("sweep")[1]
        assert re.findall(r'<div class="stage" data-stage="(\d)" >', page) == ["4", "4"]
        assert len(re.findall('<div class="stage"', page)) == 12
        assert "the stage with 16 streams, the highest load that passed every gate" in Page(page).text

    @pytest.mark.parametrize("name", sorted(report_data.RUNS))
    def test_an_anchor_is_there_once_and_every_link_has_one(self, name):
        tags = Page(made(name)[1]).tags
        ids = [attrs["id"] for _, attrs in tags if attrs.get("id")]
        assert len(ids) == len(set(ids))
        assert {attrs["href"][1:] for tag, attrs in tags if tag == "a"} <= set(ids)


class TestSlowest:
    """The ten slowest, each from when it was due to its end."""

    def test_they_are_the_ten_that_took_longest(self):
        (_, _, stages, _), text = made("open_loop")
        took = stages[0].columns["latency_from_scheduled_ms"]
        longest = sorted((value for value in took if value == value), reverse=True)[:10]
        chart = charts_of(text)["0-slowest"]
        totals = [sum(values) for values in zip(*chart["values"])]
        assert totals == pytest.approx(longest, abs=1e-3 * longest[0])
        assert totals == sorted(totals, reverse=True)
        shown = Page(text.partition('id="slow"')[2].partition("</section>")[0].join(("<p>", ""))).text
        assert all(request in shown for request in chart["requests"]) and len(set(chart["requests"])) == 10

    def test_a_connection_that_was_opened_ahead_took_none_of_the_time(self):
        run = report_data.healthy(50)
        rows = run[2][0]
        row = rows.slowest[0][0]
        rows.columns["connect_ms"][row] = 900.0  # long before it was due
        chart = charts_of(llmbench.render_report(*run, assets=assets()))["0-slowest"]
        total = sum(values[0] for values in chart["values"])
        assert total == pytest.approx(rows.columns["latency_from_scheduled_ms"][row], rel=1e-3)

    def test_one_request_is_one_bar_and_none_is_no_section(self):
        assert len(charts_of(made("one")[1])["0-slowest"]["requests"]) == 1
        assert 'id="slow"' not in made("all_failed")[1]

    def test_they_are_told_by_stage(self):
        charts = charts_of(made("sweep")[1])
        assert {"%d-slowest" % number for number in range(6)} <= set(charts)


class TestSafety:
    """What came from outside is text; nothing is loaded; only our scripts run."""

    def hostile_page(self):
        summary, header, rows, end = json.loads(json.dumps(report_data.failing()[:2])) + list(
            report_data.failing()[2:])
        long_sample = (HOSTILE * 1000)[:65536]
        for error in summary["stages"][0]["errors"]:
            error.update(sample=long_sample, key=HOSTILE)
        summary["stages"][0]["errors"].append({"status": HOSTILE, "key": HOSTILE, "count": 1, "sample": HOSTILE})
        summary["samples"] = {"first_content_raw": "data: {\"a\": " + json.dumps(long_sample) + "}",
                              "final_frame_raw": "[" * 30000 + HOSTILE}
        summary["verdict"]["reasons"] = [HOSTILE, {"en": HOSTILE, "zh": HOSTILE}]
        for name in ("run_id", "host", "address", "os", "url", "model", "provider", "command", "tool_version"):
            header[name] = "javascript:" + HOSTILE
        header["config"]["prompts"] = {"source": HOSTILE, "count": 3}
        return llmbench.render_report(summary, header, rows, end, assets())

    def test_hostile_text_stays_text(self):
        text = self.hostile_page()
        text.encode("utf-8")
        page, plain = Page(text), Page(made("failing")[1])
        tags = {tag for tag, _ in page.tags}
        assert tags <= {tag for tag, _ in plain.tags} and "img" not in tags
        assert len(page.scripts) == 3
        assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
        assert "onerror=alert(2)" in page.text, "the reader should see what the endpoint sent"
        data = next(script for attrs, script in page.scripts if attrs.get("type"))
        assert "<" not in data and "\u2028" not in data and json.loads(data)["model"].startswith("javascript:")

    @pytest.mark.parametrize("name", ["healthy", "sweep"])
    def test_nothing_is_loaded(self, name):
        page = Page(made(name)[1])
        for tag, attrs in page.tags:
            for attribute in ("src", "href", "action", "data", "poster", "srcset", "formaction", "xlink:href"):
                assert attrs.get(attribute, "#").startswith("#"), (tag, attrs)
        style = made(name)[1].partition("</head>")[0]
        assert "url(" not in style and "@import" not in style

    def test_the_policy_allows_our_scripts_alone(self):
        page = Page(made("healthy")[1])
        policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for attrs, text in page.scripts
                  if not attrs.get("type")]
        assert policy == (f"default-src 'none'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'; "
                          "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'")

    def test_the_page_has_one_heading_and_its_landmarks(self):
        tags = [tag for tag, _ in Page(made("healthy")[1]).tags]
        assert tags.count("h1") == 1 and {"header", "nav", "main", "footer"} <= set(tags)

    def test_json_of_a_frame_is_indented_and_the_rest_kept(self):
        assert llmbench.indented_sample('event: x\ndata: {"a": [1]}\n\n') == (
            'event: x\ndata: {\n  "a": [\n    1\n  ]\n}')
        assert llmbench.indented_sample("data: [DONE]") == "data: [DONE]"
        assert llmbench.indented_sample('{"a": ') == '{"a": '

    def test_a_command_keeps_its_words(self):
        command = "python3 llmbench.pyz run --url 'http://a b' --slo 'ttft.p95<=1s' --model x" + " --header 'A: b'" * 5
        text = llmbench.command_text(command)
        assert max(map(len, text.split("\n"))) <= 80
        assert text.replace(" \\\n  ", " ") == command
        assert llmbench.command_text("unclosed 'quote") == "unclosed 'quote"


class TestTexts:
    """Both languages say the same things."""

    def texts(self):
        return [json.loads(assets()[f"texts/{name}.json"].decode("utf-8")) for name in ("en", "zh")]

    def test_every_key_is_in_both_languages(self):
        english, chinese = self.texts()
        translated = {name for name in chinese if name.startswith("definition.")}
        assert set(english) == set(chinese) - translated
        assert translated == {"definition." + name for name in llmbench.METRICS}

    def test_both_languages_take_the_same_values(self):
        english, chinese = self.texts()
        for key, text in english.items():
            names = [set(re.findall(r"{(\w+)", version)) for version in (text, chinese[key])]
            assert names[0] == names[1], key

    def test_chinese_is_marked_as_such(self):
        page = Page(made("healthy")[1], hidden_language="en")
        assert "测量可信" in page.text and "The measurement can be relied on" not in page.text

    def test_the_page_opens_in_the_language_of_the_run(self):
        summary, header, *rest = made("ten")[0]
        config = dict(header["config"], lang="zh")
        page = llmbench.render_report(summary, dict(header, config=config), *rest, assets=assets())
        assert '<html lang="zh-CN" class="zh">' in page


GATES = ("ttft.p95<=400ms", "success>=99%", "goodput>=95%")


@functools.lru_cache(maxsize=None)
def loaded(*loads, n=60, language="en", **config):
    """A run of stages with these loads (as tuples of pairs), each slower than the one before: its summary and page."""
    stages = [loaded_stage(number, dict(load), n, slow=1.0 + number / 4) for number, load in enumerate(loads)]
    run = reported(loaded_run(*stages, slo=list(GATES), **config), language)
    return run[0], llmbench.render_report(*run, assets=assets())


def both_languages(page):
    return [Page(page, hidden).text for hidden in ("zh-CN", "en")]


class TestOpenLoop:
    """An open loop shows its times from start and from due, side by side, and says which to quote."""

    CAPPED = (("rps", 8.0), ("cap", 10))

    def test_the_tiles_hold_both(self):
        summary, page = loaded(self.CAPPED, n=300)
        for number, metric in ((1, "ttft"), (2, "latency")):
            tile = tile_texts(page)[number].text
            statistic = summary[metric + "_from_scheduled_ms"]
            divisor = 1000 if statistic["p50"] >= 2000 else 1
            for stat in ("p50", "p95", "p99"):
                assert says(number_after("from due " + stat.upper(), tile), statistic[stat] / divisor), tile
        assert "from due" not in tile_texts(loaded((("concurrency", 8),))[1])[1].text

    def test_one_sentence_says_which_to_quote(self):
        for number, (language, text) in enumerate(zip(("en", "zh"), both_languages(loaded(self.CAPPED, n=300)[1]))):
            sentence = json.loads(assets()["texts/%s.json" % language].decode())["open.quote"]
            assert text.count(sentence) == 1, number
        assert "quote “from due”" not in both_languages(loaded((("concurrency", 8),))[1])[0]

    def test_the_load_is_said_with_arrival_and_cap(self):
        english, chinese = both_languages(loaded(self.CAPPED, n=300)[1])
        assert "Open loop, 8 req/s Poisson, at most 10 in flight × 300 requests" in english
        assert "开环，8 次/秒（泊松到达），最多 10 路在途" in chinese

    def test_the_wait_under_the_cap_is_a_phase_of_its_own_and_not_the_clients_queue(self):
        page = loaded(self.CAPPED, n=300)[1]
        chart = charts_of(page)["0-phases"]
        names = [name[0] for name in chart["names"]]
        assert names[0] == "wait under the cap" and "client queue" not in names
        network = Page(page[page.index('<table class="network">'):].partition("</table>")[0] + "</table>").text
        assert float(re.search(r"client queue 300 ([\d.]+) ms", network).group(1)) < 1
        assert float(re.search(r"wait under the cap \d+ ([\d,.]+) ms", network).group(1).replace(",", "")) > 100

    def test_the_rates_stand_in_the_audit(self):
        summary, page = loaded(self.CAPPED, n=300)
        text = Page(page).text
        assert says(number_after("schedule's rate", text), summary["client"]["requested_rps"])
        assert says(number_after("achieved rate", text), summary["client"]["achieved_rps"])
        summary, page = loaded((("rps", 2.0),), (("rps", 4.0),))
        achieved = summary["stages"][1]["client"]["achieved_rps"]
        assert says(number_after("achieved rate, 4 req/s", Page(page).text), achieved)

    def test_the_table_of_stages_holds_both_in_one_unit(self):
        page = loaded((("rps", 2.0), ("cap", 2)), (("rps", 8.0), ("cap", 2)), n=100)[1]
        table = page[page.index('<table class="stages">'):].partition("</table>")[0]
        assert "TTFT, s TTFT from due, s latency, s latency from due, s" in Page("<p>" + table + "</table></p>").text

    def test_the_sentence_counts_from_due_too(self):
        english, chinese = both_languages(loaded(self.CAPPED, n=300)[1])
        assert "From when they were due it took" in english and "自应发时刻算起为" in chinese


class TestGoodput:
    """Goodput and its gates."""

    def test_a_share_is_shown_as_one(self):
        summary, page = loaded((("rps", 4.0),), n=300)
        text = Page(page).text
        entry = summary["slo"][2]
        assert entry["metric"] == "goodput" and entry["limit"] == 0.95
        row = re.search(r"Goodput share ≥ ([\d.]+) % ([\d.]+) %", text)
        assert row.group(1) == "95.0" and says(row.group(2), 100 * entry["value"])
        assert says(number_after("goodput", tile_texts(page)[5].text), summary["throughput"]["goodput_rps"])


LADDER = tuple((("concurrency", 8), ("input_tokens", tokens)) for tokens in (1024, 8192, 131072))
GRID = tuple((("concurrency", streams), ("input_tokens", tokens)) for tokens in (1024, 8192) for streams in (1, 8))


class TestLoads:
    """Stages are told apart by what they differ in."""

    def picker(self, page):
        return [Page("<p>" + text + "</p>").text.strip() for text in re.findall(
            r'<button type="button" data-pick="\d+"[^>]*>([^<]*)', page)]

    def test_a_ladder_of_lengths_has_its_curve_over_input_tokens(self):
        page = loaded(*LADDER)[1]
        chart = charts_of(page)["run-load_ttft"]
        assert chart["loads"] == [1024, 8192, 131072] and chart["x"] == ["input tokens", "输入 token"]
        assert "names" not in chart and "linear" not in charts_of(page)["run-load_throughput"]
        assert self.picker(page) == ["1,024", "8,192", "131,072"]
        english, chinese = both_languages(page)
        assert "Closed loop, 3 stages: 8 streams; 1,024, 8,192, 131,072 input tokens" in english
        assert "Distribution · 8 streams, 131,072 input tokens" in english
        assert "分布 · 8 路，输入 131,072 token" in chinese

    def test_loads_and_lengths_stand_side_by_side(self):
        page = loaded(*GRID)[1]
        chart = charts_of(page)["run-load_ttft"]
        assert chart["names"] == ["1 · 1,024", "1 · 8,192", "8 · 1,024", "8 · 8,192"]
        assert len(set(self.picker(page))) == 4
        assert "streams · input tokens" in Page(page).text

    def test_a_load_that_comes_twice_is_there_twice(self):
        page = loaded(*((("concurrency", streams),) for streams in (1, 4, 2, 2)))[1]
        chart = charts_of(page)["run-load_ttft"]
        assert chart["loads"] == [1, 2, 2, 4] and all(len(one["values"]) == 4 for one in chart["series"])
        assert self.picker(page) == ["1", "4", "2", "2 (2)"]
        assert "Distribution · 2 streams (no. 2)" in Page(page).text

    def test_one_load_twice_is_no_reason_to_fail(self):
        page = loaded((("rps", 4.0),), (("rps", 4.0),))[1]
        assert charts_of(page)["run-load_throughput"]["loads"] == [4.0, 4.0]
        assert "linear" not in charts_of(page)["run-load_throughput"]


def searching(*probes, language="en"):
    """A search: probes are (streams, how slow); its summary and page."""
    stages = [loaded_stage(number, {"concurrency": load}, 40, slow=slow) for number, (load, slow) in enumerate(probes)]
    run = reported(loaded_run(*stages, slo=["ttft.p50<=400ms", "success>=99%"], find_max="concurrency"), language)
    return run[0], llmbench.render_report(*run, assets=assets())


class TestSearch:
    """A search for the highest load leads with what it found, and shows every probe."""

    PROBES = ((1, 1), (2, 1), (8, 4), (4, 1), (4, 1))

    def test_the_sentence(self):
        english, chinese = both_languages(searching(*self.PROBES)[1])
        assert re.search(r"4 concurrent streams +is the highest load that passed every gate, "
                         r"confirmed by a second stage, where the endpoint writes [\d,]+ tok/s and half of the answers "
                         r"begin within \d+ ms\. "
                         r"At 8 streams 1 of 2 gates failed \(TTFT P50 \d+ ms\)\.", english)
        assert re.search(r"全部门限达标的最高负载为 +4 路并发 ?（已由第二次测量确认）", chinese)
        assert "Every gate holds" not in english and "in search of the highest" in english

    def test_the_page_opens_with_the_confirmation(self):
        page = searching(*self.PROBES)[1]
        assert set(re.findall(r'<div class="stage" data-stage="(\d)" >', page)) == {"4"}
        assert "the stage with 4 streams (no. 2), the highest load that passed every gate" in Page(page).text

    def test_every_probe_is_on_the_curves(self):
        charts = charts_of(searching(*self.PROBES)[1])
        assert charts["run-load_ttft"]["loads"] == [1, 2, 4, 4, 8]
        assert charts["run-tradeoff"]["failed"] == [False] * 4 + [True]

    def test_a_client_that_was_the_limit_is_said(self):
        lines = loaded_run(*(loaded_stage(number, {"concurrency": 2 ** number}, 40) for number in range(3)),
                           slo=["ttft.p50<=9s"], find_max="concurrency")
        next(line for line in lines if line.get("audit", {}).get("stage") == 2)["audit"]["cpu_percent"] = 99.0
        summary, *rest = reported(lines)
        english, chinese = both_languages(llmbench.render_report(summary, *rest, assets=assets()))
        assert summary["verdict"]["state"] == "CAUTION" and summary["find_max"]["load"] == 2
        assert "At 4 streams this client, not the endpoint, was the limit" in english
        assert "– not judged: client" in english and "✕ failed" not in english
        assert "瓶颈在本客户端而非服务端" in chinese and "– 未判定：客户端" in chinese

    def test_gates_that_failed_where_the_client_was_the_limit_are_judged_nowhere(self):
        lines = loaded_run(*(loaded_stage(number, {"concurrency": 2 ** number}, 40, slow=1 + 9 * (number == 2))
                             for number in range(3)), slo=["ttft.p50<=300ms"], find_max="concurrency")
        next(line for line in lines if line.get("audit", {}).get("stage") == 2)["audit"]["cpu_percent"] = 99.0
        page = llmbench.render_report(*reported(lines), assets=assets())
        english, _ = both_languages(page)
        assert "– not judged: client" in english and "✕ failed" not in english
        assert charts_of(page)["run-tradeoff"]["failed"] == [False] * 3

    def test_nothing_passed(self):
        english, _ = both_languages(searching((2, 9), (1, 9))[1])
        assert "No load passed every gate." in english and "At 1 stream, the lowest that did not" in english


@functools.lru_cache(maxsize=1)
def soaked():
    """Ten hours in which the times rose by two fifths after four: the summary and the page."""
    stage = loaded_stage(0, {"rps": 0.1}, 3600, slow=lambda share: 1.4 if share > 0.4 else 1.0)
    run = reported(loaded_run(stage))
    return run[0], llmbench.render_report(*run, assets=assets())


class TestSoak:
    """A run of hours: its charts stay small and their axis has hours."""

    def test_its_charts_over_time_are_bounded(self):
        page = soaked()[1]
        charts = [chart for name, chart in charts_of(page).items() if name.startswith("0-time")]
        assert len(charts) == 5
        for chart in charts:
            assert 8 <= chart["number"] <= 60 and 34_000 < chart["step"] * chart["number"] < 40_000
            assert all(len(one["values"]) <= 60 for one in chart["series"])
        assert "Each point covers 10:00 min" in Page(page).text or "Each point covers 15:00 min" in Page(page).text

    def test_the_shift_stands_in_the_charts_and_in_the_verdict(self):
        summary, page = soaked()
        values = [value for value in charts_of(page)["0-time_ttft"]["series"][1]["values"] if value is not None]
        early, late = values[: len(values) // 3], values[len(values) // 2 :]
        assert sum(late) / len(late) > 1.25 * sum(early) / len(early)
        assert [reason["key"] for reason in summary["verdict"]["reasons"]] == ["drift", "drift_latency"]
        english, chinese = both_languages(page)
        assert re.search(r"P95 TTFT rose [34]\d\.\d % from [34] h \d+ min on and stayed there", english)
        assert re.search(r"自 [34] h \d+ min 起 P95 总时延上升", chinese)
        assert re.search(r"wall time +\d+:\d\d:\d\d h", english)


class TestLengths:
    """Lengths asked for and got."""

    def test_they_stand_in_a_table(self):
        stage = loaded_stage(n=100, load={"concurrency": 8, "input_tokens": 2048})
        for number, line in enumerate(line for line in stage if "request_id" in line):
            line.update(in_tokens=2148, in_tokens_target=2048, out_tokens=150 - (number < 3), out_tokens_target=150)
        page = llmbench.render_report(*reported(loaded_run(stage)), assets=assets())
        table = page[page.index('<table class="lengths">'):].partition("</table>")[0] + "</table>"
        assert "prompt 2,048 2,148 +4.9 % 100 answer 150 150 −0.0 % 3 100" in re.sub(r"\s+", " ", Page(table).text)
        assert "lengths" not in "".join(re.findall(r'<table class="(\w+)">', loaded((("rps", 4.0),))[1]))


class TestSweeps:
    """What a sweep's sentence claims holds whatever the order of its stages."""

    def test_stages_in_falling_order(self):
        loads = enumerate((8, 4, 2))
        stages = [loaded_stage(number, {"concurrency": load}, 40, slow=load / 4) for number, load in loads]
        run = reported(loaded_run(*stages, slo=["ttft.p50<=300ms"]))
        page = llmbench.render_report(*run, assets=assets())
        assert "Every gate holds up to 4 concurrent streams" in Page(page).text
        assert "the stage with 4 streams, the highest load that passed every gate" in Page(page).text

    def grid(self, slow, gate):
        """The text of a report over loads and lengths."""
        stages = [loaded_stage(number, dict(load), 40, slow=slow[number]) for number, load in enumerate(GRID)]
        return Page(llmbench.render_report(*reported(loaded_run(*stages, slo=[gate])), assets=assets())).text

    def test_loads_and_lengths_have_no_up_to(self):
        text = self.grid([1, 1, 1, 4], "ttft.p50<=900ms")
        assert "not at 8 streams, 8,192 input tokens" in text and "up to" not in text.partition("Success rate")[0]
        text = self.grid([9, 9, 9, 9], "ttft.p50<=90ms")
        assert "No load passed every gate. At 1 stream, 1,024 input tokens 1 of 1 gates fail" in text


@pytest.mark.long
def test_a_million_requests_make_a_small_page():
    few = report_data.made_rows(n=10_000, failing=0.01)
    times = 100
    span = max(value for value in few.columns["end_ms"] if value == value)
    columns = {name: column * times for name, column in few.columns.items()}
    for name in ("scheduled_ms", "start_ms", "end_ms"):
        shifts = itertools.chain.from_iterable(itertools.repeat(span * index, 10_000) for index in range(times))
        columns[name] = array("d", (value + shift for value, shift in zip(columns[name], shifts)))
    gaps = {bucket: number * times for bucket, number in few.itl_hist.items()}
    rows = report_data.MadeRows(0, few.load, few.status * times, columns, gaps)
    page = llmbench.render_report(*report_data.made_run([rows]), assets=assets())
    assert len(page.encode("utf-8")) < 2_000_000
    chart = charts_of(page)["0-latency"]
    assert sum(chart["counts"]) == rows.status.count("ok") > 950_000
