"Every built page in a real browser: desktop and phone, light and dark."

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pytest

CHROMIUM = shutil.which(os.environ.get("CHROMIUM", "chromium"))
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"] # other hosts are not waited for
if CHROMIUM is None:
    pytest.skip("no chromium: the pages were not seen in a browser (Debian: apt-get install chromium)", allow_module_level=True)
for package in ("playwright", "nbdev", "smalldocs"):
    pytest.importorskip(package, reason=f"no {package}: the pages were not seen in a browser (pip install {package})")

from playwright.sync_api import Browser, Page, sync_playwright  # noqa: E402

from tools import site  # noqa: E402

View = tuple[int, Literal["light", "dark"]]
DESK, PHONE = VIEWS = list[View]([(1280, "light"), (390, "dark")])
CROSSED = list[View]([(1280, "dark"), (390, "light")])
TYPICAL = ("index.html", "ideas/losses.html", "module/freezing.html", "reference/api.html", "repairs/spot_the_bug.html")
DARK = "() => document.documentElement.classList.contains('quarto-dark')"
# What sticks out of the window at the right; things that scroll within themselves do not count.
OVERFLOW = """() => {
  const width = document.documentElement.clientWidth, scrolls = e => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
  const held = e => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement) if (scrolls(p)) return true; return false; };
  const seen = e => e.checkVisibility() && getComputedStyle(e).position !== "fixed";
  const out = [...document.querySelectorAll("main *, header *, footer *")].filter(e => seen(e) && e.getBoundingClientRect().right > width + 1 && !held(e));
  const page = document.documentElement.scrollWidth > width ? ["the page itself"] : [];
  return page.concat(out.slice(0, 3).map(e => e.outerHTML.slice(0, 100)));
}"""
CUT = """() => [...document.querySelectorAll("pre, div.sourceCode")].filter(e => e.checkVisibility() && e.querySelector("code.sourceCode")
  && e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 80))"""
BROKEN_IMAGES = "() => [...document.images].filter(i => i.loading !== 'lazy' && !(i.complete && i.naturalWidth)).map(i => i.src.slice(0, 80))"
MATHS = "() => ({all: document.querySelectorAll('.math').length, wrong: document.querySelectorAll('.math:not(:has(.katex)), .katex-error').length})"

# Each text on a page that is harder to read than WCAG's level AA allows: 4.5 to 1, for large text 3 to 1.
CONTRAST = """() => {
    const pen = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d', {willReadFrequently: true});
    const known = {};
    const numbers = colour => known[colour] ??= read(colour);
    const read = colour => {  // of any notation
        pen.clearRect(0, 0, 1, 1);
        pen.fillStyle = colour;
        pen.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
    const grounds = new Map([[null, [255, 255, 255]]]);
    const behind = element => {
        if (!grounds.has(element)) {
            const colour = numbers(getComputedStyle(element).backgroundColor);
            grounds.set(element, colour[3] > 0.99 ? colour : behind(element.parentElement));
        }
        return grounds.get(element);
    };
    const found = {};
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; (node = walker.nextNode());) {
        const element = node.parentElement, style = getComputedStyle(element);
        if (!node.textContent.trim() || !element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
        if (element.closest('.katex, svg, script, style')) continue;
        const [a, b] = [light(numbers(style.color)), light(behind(element))].sort((x, y) => y - x);
        const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < (large ? 3 : 4.5)) found[`${element.tagName.toLowerCase()}.${element.className} ${style.color}`] = ratio.toFixed(2);
    }
    return found;
}"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        "Say nothing."


@pytest.fixture(scope="module")
def address(built: tuple[Path, list[str]]) -> Iterator[tuple[str, list[str]]]:
    "The built site behind a loopback port, and its pages."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(built[0])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sorted(path.relative_to(built[0]).as_posix() for path in built[0].rglob("*.html"))
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


def listen(page: Page, home: str, said: list[str]) -> None:
    "Collect what goes wrong; other hosts are not found and do not count, nor does the icon that a browser asks for."
    ours = lambda url: url.startswith(home) and not url.endswith("/favicon.ico")
    page.on("pageerror", lambda error: said.append(f"script error: {error}"))
    page.on("console", lambda line: said.append(f"console: {line.text}")
            if line.type == "error" and ours(line.location.get("url", "")) else None)
    page.on("response", lambda found: said.append(f"{found.status} {found.url}") if ours(found.url) and found.status >= 400 else None)


def look(page: Page, view: View) -> list[str]:
    "What is wrong with the open page in a view, to which it turns without being loaded again."
    width, scheme = view
    if page.viewport_size != {"width": width, "height": 900} or page.evaluate(DARK) != (scheme == "dark"):
        page.evaluate("document.body.style.display = 'none'") # so that it is laid out once, not after each of the two; and no colour fades
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_function(f"wanted => ({DARK})() === wanted", arg=scheme == "dark")
        page.evaluate("document.body.style.display = ''")
    problems = [f"sticks out at the right: {what}" for what in page.evaluate(OVERFLOW)]
    problems += [f"a line of code is cut: {code}" for code in page.evaluate(CUT) if width > 768] # on a phone it scrolls
    return problems + [f"image not loaded: {source}" for source in page.evaluate(BROKEN_IMAGES)]


@pytest.fixture(scope="module")
def seen(browser: Browser, address: tuple[str, list[str]]) -> dict[str, dict[Any, Any]]:
    """Each page, loaded once: what is wrong with it in each view, what it said, its formulas, and texts that are hard to read.

    The second view of a page is the first of the next: half of the pages load on the desk and turn into those of a phone."""
    page, said, found, views = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light"), list[str](), {}, VIEWS
    listen(page, address[0], said)
    for name in address[1]:
        page.goto(f"{address[0]}/{name}", wait_until="load")
        if page.evaluate(DARK) != (views[0][1] == "dark"):
            said.append(f"not {views[0][1]} from the start")
        found[name] = dict[Any, Any]()
        for view in (views[0], *(CROSSED if name in TYPICAL else ()), views[1]):
            found[name][view] = look(page, view)
            if name in TYPICAL and view[0] == 1280:
                found[name][view[1]] = page.evaluate(CONTRAST)
        found[name] |= {"formulas": page.evaluate(MATHS), "said": said.copy()}
        said.clear()
        views = views[::-1]
    page.close()
    return found


@pytest.mark.parametrize("view", [*VIEWS, *CROSSED, "said"], ids=lambda view: view if view == "said" else f"{view[0]}-{view[1]}")
def test_pages(seen: dict[str, dict[Any, Any]], view: Any) -> None:
    looked = {name: found[view] for name, found in seen.items() if view in found}
    assert len(looked) == (len(TYPICAL) if view in CROSSED else len(seen)) and len(seen) > 50
    assert [f"{name}: {line}" for name, lines in looked.items() for line in lines] == []


def test_formulas_are_set(seen: dict[str, dict[Any, Any]]) -> None:
    if site.katex_folder() is None:
        pytest.skip("no local KaTeX: formulas were not seen (npm install --no-save --prefix build katex@0.16.11)")
    formulas = {name: found["formulas"] for name, found in seen.items()}
    assert sum(count["all"] for count in formulas.values()) > 20
    assert {name: count for name, count in formulas.items() if count["wrong"]} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(seen: dict[str, dict[Any, Any]], scheme: str) -> None:
    assert {f"{name} {what}": ratio for name in TYPICAL for what, ratio in seen[name][scheme].items()} == {}


@pytest.mark.parametrize("width", [1280, 390])
def test_search(browser: Browser, address: tuple[str, list[str]], width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    page.goto(f"{address[0]}/index.html", wait_until="load")
    if width < 992:
        page.locator(".navbar-toggler").first.click()
    box = page.locator(".smalldocs-search input:visible").first
    box.fill("BatchNorm")
    page.locator(".search-result:visible").first.wait_for(timeout=5000)
    links = page.locator(".search-result:visible").evaluate_all("found => found.map(a => a.getAttribute('href'))")
    assert any("freezing" in link for link in links)
    context.close()


def test_keyboard_and_order(browser: Browser, address: tuple[str, list[str]]) -> None:
    "The arrows at the foot lead through the course in the sidebar's order; Tab reaches a link that shows it has the focus."
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.goto(f"{address[0]}/index.html")
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.tagName") == "A"
    wanted = [Path(site.address(name)).with_suffix(".html").as_posix() for name in site.sidebar()]
    for name in wanted[1:6]:
        page.locator(".nav-page-next a").click()
        page.wait_for_url(f"**/{name}")
    page.context.close()
