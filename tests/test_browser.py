"""The report in a real browser, over its DevTools protocol: what is drawn, asked for, printed, and how wide it gets."""

from __future__ import annotations

import functools
import itertools
import re
import zlib

import pytest
import report_data
from browser import Page, find, started
from test_compare import PAGES as COMPARISONS
from test_compare import made_page
from test_report import GRID, LADDER, TestSafety, assets, loaded, made

import llmbench

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium on this machine")

SHAPES = {**report_data.RUNS, "fifty": lambda: report_data.healthy(50), "many": lambda: report_data.healthy(20_000)}
WIDTHS = (1440, 768, 390)


@functools.lru_cache(maxsize=None)
def page_of(name):
    """The HTML of one of the made-up runs."""
    return made(name)[1] if name in report_data.RUNS else llmbench.render_report(*SHAPES[name](), assets=assets())


@pytest.fixture(scope="module")
def browser():
    with started() as running:
        yield running


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page from disk, as its reader would."""

    def open_page(text, width=1440, **settings):
        path = tmp_path / "report.html"
        path.write_text(text, encoding="utf-8")
        return Page(browser, path.as_uri(), width, **settings)

    return open_page


# A chart is blank when its SVG has next to no marks, or its canvas only one colour.
BLANK = Page.CHARTS + """.filter(chart => {
  const canvas = chart.querySelector('canvas'), svg = chart.querySelector('svg');
  if (svg) return svg.querySelectorAll('path, circle, text').length < 8;
  if (!canvas) return true;
  const pixels = new Uint32Array(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer);
  return new Set(pixels).size < 4;
}).map(chart => chart.dataset.chart)"""
TOO_WIDE = """[...document.querySelectorAll('body *')].filter(one => one.getBoundingClientRect().right > innerWidth + 1
  && !one.closest('.scroll, pre, .raw, .data-table, [hidden], svg, .tip, .finding'))
  .map(one => one.tagName + '.' + one.className).slice(0, 5)"""
TEXTS = "[...document.querySelectorAll('.chart svg text')].map(one => one.textContent).join(' ')"


@pytest.mark.parametrize("name", SHAPES)
def test_each_panel_draws_nothing_complains_and_nothing_is_fetched(name, opened):
    page = opened(page_of(name))
    page.draw_all()
    assert page.evaluate(BLANK) == []
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert len(page.requests) == 1, "the page itself"
    assert not page.evaluate("document.documentElement.dataset.failure")
    seen = page.evaluate(TEXTS) + page.evaluate("document.body.innerText")
    assert not re.search(r"\b(NaN|undefined|Infinity)\b", seen)


@pytest.mark.parametrize("loads", [
    LADDER, GRID, ((("rps", 4.0),),) * 2, ((("concurrency", 2),), (("concurrency", 1),)) * 2,
], ids=["lengths", "loads and lengths", "one load twice", "two loads twice"])  # fmt: skip
def test_curves_over_any_loads_are_drawn(loads, opened):
    page = opened(loaded(*loads)[1])
    page.draw_all()
    assert page.evaluate(BLANK) == [] and page.complaints == []
    assert not page.evaluate("document.documentElement.dataset.failure") and "NaN" not in page.evaluate(TEXTS)


@pytest.mark.parametrize(("name", "width"), list(itertools.product(COMPARISONS, [1440, 390])))
def test_a_comparison_is_drawn_and_nothing_sticks_out(name, width, opened):
    page = opened(made_page(name), width)
    page.draw_all()
    assert page.evaluate(BLANK) == [] and page.complaints == [] and len(page.requests) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width


TELLING = ("one", "fifty", "sweep", "failing", "all_failed")  # the other shapes lay out like one of these


@pytest.mark.long
@pytest.mark.parametrize(("name", "width"), [
    pytest.param(name, width, marks=[] if name in TELLING and width != 768 else [pytest.mark.exhaustive])
    for name, width in itertools.product(SHAPES, WIDTHS)
])  # fmt: skip
def test_nothing_sticks_out_of_the_window(name, width, opened):
    page = opened(page_of(name), width)
    page.draw_all()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(TOO_WIDE) == []


def test_language_and_theme_are_switched_with_the_keyboard_alone(opened):
    page = opened(page_of("healthy"))
    page.draw_all()
    assert page.evaluate("document.documentElement.lang") == "en"
    assert "requests" in page.evaluate(TEXTS)
    for control, seen, wanted in (
        ("language", "document.documentElement.lang", "zh-CN"),
        ("theme", "getComputedStyle(document.body).backgroundColor", "rgb(18, 22, 27)"),
    ):
        page.evaluate(f"document.querySelector('[data-control={control}]').focus()")
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
        page.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **enter)
        page.call("Input.dispatchKeyEvent", type="keyUp", **enter)
        assert page.evaluate(seen) == wanted
    page.draw_all()
    assert "请求" in page.evaluate(TEXTS) and page.evaluate(BLANK) == [] and page.complaints == []
    shown = page.evaluate("[...document.querySelectorAll('main [lang=en]')].filter(one => one.offsetWidth).length")
    assert shown == 0, "no English left on the Chinese page"


BUTTONS = """new Promise(told => {
  const all = (query) => Array.from(document.querySelectorAll(query)), one = (query) => all(query)[0];
  const seen = {}, root = document.documentElement, paper = () => getComputedStyle(root).getPropertyValue('--paper');
  const tip = () => getComputedStyle(one('.stage:not([hidden]) .tip')).display;
  const term = one('.stage:not([hidden]) .term');
  seen.tip = [tip()];
  term.click();
  seen.tip.push(tip());
  document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}));
  seen.tip.push(tip());
  const data = one('.stage:not([hidden]) [data-tool="data"]');
  data.click();
  seen.rows = all('.data-table tr').length;
  seen.expanded = data.getAttribute('aria-expanded');
  seen.theme = [root.dataset.theme];
  seen.colour = [paper()];
  one('[data-control="theme"]').click();
  seen.theme.push(root.dataset.theme);
  seen.colour.push(paper());
  one('[data-control="language"]').click();
  seen.language = root.lang;
  seen.heading = one('#dist h2').innerText;
  one('[data-pick="1"]').click();
  seen.stages = all('.stage:not([hidden])').map((stage) => stage.dataset.stage);
  seen.ids = all('#dist').length;
  window.dispatchEvent(new Event('beforeprint'));
  seen.printed = all('.printed svg').length;
  seen.visible = all('.chart').filter((place) => place.offsetWidth).length;
  window.dispatchEvent(new Event('afterprint'));
  seen.left = all('.printed').length;
  told(seen);
})"""


def test_the_buttons(opened):
    page = opened(page_of("sweep"))
    page.draw_all()
    seen = page.evaluate(BUTTONS)
    assert page.complaints == []
    assert seen["rows"] > 12 and seen["expanded"] == "true"
    assert seen["language"] == "zh-CN" and seen["heading"].startswith("分布")
    assert seen["theme"] == ["light", "dark"] and seen["colour"] == ["#ffffff", "#12161b"]
    assert seen["stages"] == ["1", "1"] and seen["ids"] == 1
    assert seen["printed"] == seen["visible"] and seen["left"] == 0
    assert seen["tip"] == ["none", "block", "none"]
    page.draw_all()
    assert page.evaluate(BLANK) == [], "the charts of the stage that was picked"


def test_it_opens_dark_where_the_system_is(opened):
    page = opened(page_of("healthy"), dark=True)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"


def streams_of(pdf):
    """The decompressed content of a PDF's pages."""
    for match in re.finditer(rb"stream\r?\n", pdf):
        try:
            yield zlib.decompressobj().decompress(pdf[match.end() :])
        except zlib.error:
            continue


@pytest.mark.parametrize("name", ["healthy", "sweep", "failing", "one"])
def test_print_has_every_panel(name, opened):
    page = opened(page_of(name))
    shown = page.evaluate(Page.CHARTS + ".length")
    # What beforeprint puts in place is gone after printing: it is watched while it is there.
    page.evaluate("""window.printedPanels = [];
        new MutationObserver(changes => changes.forEach(change => change.addedNodes.forEach(node => {
          const marks = node.className === 'printed' && node.querySelectorAll('path, circle, text').length;
          if (marks !== false) window.printedPanels.push(marks);
        }))).observe(document.body, {childList: true, subtree: true}); 0""")
    pdf = page.pdf()
    panels = page.evaluate("window.printedPanels")
    assert pdf.startswith(b"%PDF") and len(panels) == shown and (not panels or min(panels) >= 8)
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert 1 <= pages <= 12
    assert sum(len(stream) for stream in streams_of(pdf)) > 20_000 * (shown > 4), "charts are vectors in it"
    assert page.evaluate("document.querySelectorAll('.printed').length") == 0 and page.complaints == []


def test_a_table_stands_behind_each_chart(opened):
    page = opened(page_of("healthy"))
    page.draw_all()
    page.evaluate("document.querySelectorAll('[data-tool=data]').forEach(button => button.click())")
    rows = page.evaluate("[...document.querySelectorAll('.data-table')].map(one => one.querySelectorAll('tr').length)")
    charts = page.evaluate(Page.CHARTS + ".length")
    assert len(rows) == charts and min(rows) >= 2
    assert page.evaluate("[...document.querySelectorAll('.data-table')].every(t => t.querySelector('th[scope=col]'))")


def test_landmarks_headings_and_names_for_a_screen_reader(opened):
    page = opened(page_of("sweep"))
    page.draw_all()
    assert page.evaluate("document.querySelectorAll('h1').length") == 1
    assert page.evaluate("['header', 'nav', 'main', 'footer'].every(name => document.querySelector(name))")
    nameless = page.evaluate("""[...document.querySelectorAll('button, a, [role=img]')].filter(one => one.offsetWidth)
        .filter(one => !(one.getAttribute('aria-label') || one.getAttribute('aria-labelledby') || one.innerText.trim()))
        .map(one => one.outerHTML.slice(0, 90))""")
    assert nameless == []
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    images = [node for node in tree if node.get("role", {}).get("value") in ("image", "img")]
    assert images and all(node.get("name", {}).get("value") for node in images if not node.get("ignored"))


CONTRAST = """(() => {
  const linear = part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const light = colour => {
    const [red, green, blue] = colour.match(/[\\d.]+/g).slice(0, 3).map(part => linear(part / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = one => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (!/, 0\\)$|transparent/.test(colour)) return colour;
    }
    return getComputedStyle(document.documentElement).backgroundColor;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), weak = [];
  while (walker.nextNode()) {
    const text = walker.currentNode, one = text.parentElement;
    if (!text.data.trim() || !one.checkVisibility() || one.closest('script, style, .chart, svg')) continue;
    const style = getComputedStyle(one), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const pair = [light(style.color), light(behind(one))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < (large ? 3 : 4.5) - 0.02) weak.push([one.tagName, one.className, text.data.slice(0, 20), ratio]);
  }
  return weak.slice(0, 5);
})()"""


@pytest.mark.parametrize(("name", "dark"), list(itertools.product(["healthy", "failing", "invalid"], [False, True])))
def test_text_can_be_read_against_what_is_behind_it(name, dark, opened):
    page = opened(page_of(name), dark=dark)
    page.draw_all()
    assert page.evaluate(CONTRAST) == [], "WCAG AA: 4.5, or 3 for large text"


def test_what_a_hostile_endpoint_sent_is_text(opened):
    page = opened(TestSafety().hostile_page())
    page.call("Page.addScriptToEvaluateOnNewDocument", source="window.alert = () => { window.alerted = true; }")
    page.draw_all()
    assert page.evaluate("window.alerted") is None and page.complaints == []
    assert page.evaluate("document.querySelectorAll('main img, main script, main iframe').length") == 0
    assert "onerror=alert(2)" in page.evaluate("document.body.innerText")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1440
    assert len(page.requests) == 1


def test_a_png_of_a_chart_is_what_is_seen(opened):
    page = opened(page_of("healthy"))
    page.draw_all()
    page.evaluate("HTMLAnchorElement.prototype.click = function () { window.saved = [this.download, this.href]; }; 0")
    page.evaluate("document.querySelector('.stage:not([hidden]) [data-tool=png], [data-tool=png]').click()")
    page.wait("window.saved")
    name, place = page.evaluate("window.saved")
    assert name.endswith(".png")
    size = page.evaluate(f"""new Promise((done, failed) => {{ const image = new Image();
        image.onload = () => done([image.width, image.height]); image.onerror = failed; image.src = {place!r}; }})""")
    assert size[0] > 600 and size[1] > 300


@pytest.mark.exhaustive
def test_a_hundred_thousand_requests_open_at_once(opened):
    page = opened(llmbench.render_report(*report_data.healthy(100_000), assets=assets()))
    timing = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert timing < 5000, "about 300 ms on an idle machine; the page holds no records"
    page.draw_all()
    assert page.evaluate(BLANK) == []
