"""The dashboard for those who do not see it, see little of it, or use no mouse: names, contrast, focus, scrolling.

Contrast is computed here, of every text that is shown on what lies behind it (WCAG 2.2, 1.4.3), in both themes, with a
run chosen so that everything else is faint, and in the comparison of two runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import CHROMIUM, Browser, browser
from report_rows import quality
from test_report_browser import ALL, rows, seen
from test_report_inspected import attention

from attention_zoo.report import build_report

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")]

PALE = """(() => {
  const parse = text => {
    const found = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith('color(srgb')
      ? [255 * found[0], 255 * found[1], 255 * found[2], found[3] ?? 1] : [found[0], found[1], found[2], found[3] ?? 1];
  };
  const over = (front, back) => [0, 1, 2].map(i => front[i] * front[3] + back[i] * (1 - front[3])).concat(1);
  const light = rgb => rgb.slice(0, 3).map(v => v / 255).map(v => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].filter(each => each.nodeType === 3 && each.textContent.trim());
    const box = node.getBoundingClientRect(), style = getComputedStyle(node);
    if (!own.length || !box.width || !box.height || style.visibility === 'hidden' || node.closest('script, style')) continue;
    if (node.disabled || node.closest('.skip')) continue;
    const inside = node.closest('.plot');
    const layers = [];
    let opacity = 1;
    for (let up = node; up; up = up.parentElement) {
      const about = getComputedStyle(up);
      layers.unshift(parse(about.backgroundColor));
      opacity *= Number(about.opacity);
    }
    let back = [255, 255, 255, 1];
    for (const layer of layers) back = over(layer, back);
    const ink = parse(inside ? style.fill : style.color);
    const front = over([ink[0], ink[1], ink[2], ink[3] * opacity], back);
    const pair = [light(front), light(back)].sort((a, b) => b - a), ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)} ${node.tagName}.${node.className.baseVal ?? node.className}: ${own[0].textContent.slice(0, 30)}`);
  }
  return found;
})()"""  # noqa: E501  (a script)

CONTROLS = "button, input, select, summary, a, [role=img], [tabindex], dialog"
NAMELESS = f"""[...document.querySelectorAll('{CONTROLS}')].filter(
    node => !(node.innerText?.trim() || node.getAttribute('aria-label') || node.getAttribute('aria-labelledby') ||
              node.closest('label')?.innerText || node.title)
  ).map(node => node.outerHTML.slice(0, 120))"""
MISNAMED = """[...document.querySelectorAll('button[aria-label]')].filter(node =>
    /[a-z]/i.test(node.innerText) && !node.getAttribute('aria-label').toLowerCase().includes(node.innerText.trim().toLowerCase())
  ).map(node => node.outerHTML.slice(0, 120))"""  # noqa: E501  (a script)
STUCK = """[...document.querySelectorAll('body *')].filter(node => {
    const {overflowX, overflowY} = getComputedStyle(node);
    const wide = node.scrollWidth > node.clientWidth + 1 && /auto|scroll/.test(overflowX);
    const high = node.scrollHeight > node.clientHeight + 1 && /auto|scroll/.test(overflowY);
    const keys = node.tabIndex >= 0 || node.querySelector('a, button, input, select, summary, [tabindex="0"]');
    return (wide || high) && !keys;
  }).map(node => node.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inspected = attention(("a", "full", "full-text-0"), ("b", "longformer", "longformer-text-1"))
    return build_report(rows(), tmp_path_factory.mktemp("page") / "report.html", attention=[("seen", inspected)])


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 390])
def test_every_text_can_be_read_and_every_control_found(tab: Browser, page: Path, width: int, dark: bool) -> None:
    tab.said.clear()
    tab.open(page.as_uri(), width, 900, dark=dark)
    for chart in [*ALL, "heads"]:
        seen(tab, chart)
    tab.run("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    tab.settle()
    for found in (PALE, NAMELESS, MISNAMED, STUCK):
        assert tab.run(found) == []
    tab.run("zoo.state.change({vs: ['full-text-0', 'reformer-text-1'], run: 'reformer-text-1'})")
    tab.settle()
    for found in (PALE, NAMELESS, MISNAMED):
        assert tab.run(found) == [], "what is faint can still be read"
    tab.run("zoo.diff.open()")
    tab.settle()
    assert tab.run("document.activeElement.closest('dialog') !== null"), "the comparison has the focus"
    assert tab.run(PALE) == []
    tab.press("Escape")
    assert not tab.run("zoo.by('diff').open")
    assert tab.said == []


def test_pale_text_would_be_noticed(tab: Browser, page: Path) -> None:
    tab.open(page.as_uri())
    assert tab.run(PALE) == []
    tab.run("document.querySelector('h1').style.opacity = 0.4")
    assert len(tab.run(PALE)) == 1


def test_focus_goes_down_the_page_and_is_seen(tab: Browser, page: Path) -> None:
    tab.open(page.as_uri())
    tab.run("document.body.focus()")
    names = []
    for _ in range(40):
        tab.press("Tab")
        name, outline, follows = tab.run("""(() => {
            const node = document.activeElement, before = window.before;
            window.before = node;
            const follows = !before || Boolean(before.compareDocumentPosition(node) & 4);
            return [node.id || node.innerText || node.ariaLabel, getComputedStyle(node).outlineStyle, follows];
        })()""")
        names.append(name)
        assert outline != "none", f"the focus on {name} is not seen"
        assert follows, f"{name} comes out of its place"
    assert names[0] == "Skip to the runs"
    assert {"theme", "search"} <= set(names)
    assert tab.run("zoo.by('count').getAttribute('aria-live')") == "polite"


def test_long_and_foreign_names_fit_a_phone(tab: Browser, tmp_path: Path) -> None:
    wide = "\u202eevil\u202c" + "w" * 150 + "'\"`${window.hurt=1}`><img src=x onerror='window.hurt=1'>"
    row = quality("bigbird", "text", 5, id="wide", config={"attention": {"name": "bigbird"}, wide[:60]: wide})
    path = build_report([*rows(), {**row, "backend": wide}], tmp_path / "report.html", title=wide)
    tab.said.clear()
    tab.open(path.as_uri(), 390, 844)
    tab.run("zoo.state.change({run: 'wide', vs: ['wide', 'full-text-0']})")
    tab.settle()
    width = "[document.documentElement.scrollWidth, zoo.by('details').scrollWidth - zoo.by('details').clientWidth]"
    assert tab.run(width) == [390, 0]
    state = f"{{where: {{mechanism: [{json.dumps(wide)}]}}, q: 'a&b=c#%20', by: 'seed', layer: '1', vs: []}}"
    tab.run(f"zoo.state.change({state})")
    said, address = tab.run("JSON.stringify(zoo.state.get())"), tab.run("location.href")
    tab.open(address, 390, 844)
    assert tab.run("JSON.stringify(zoo.state.get())") == said, "the address holds all of it"
    assert tab.run("[window.hurt ?? null, document.querySelectorAll('img').length]") == [None, 0]
    assert tab.said == []
