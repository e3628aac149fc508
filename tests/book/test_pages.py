"""The built pages in a real browser, read from disk: what a reader without a network sees."""

import shutil

import pytest
from playwright.sync_api import sync_playwright

pytestmark = pytest.mark.xdist_group("pages")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail("No Chromium browser on this machine: apt-get install chromium", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=["light", "dark"])
def page(request, browser):
    """A page that records what it must not do: console errors, and requests that leave the disk."""
    context = browser.new_context(
        color_scheme=request.param, viewport={"width": 1300, "height": 900}
    )
    context.set_offline(True)
    context.set_default_timeout(10_000)
    page = context.new_page()
    page.scheme, page.problems = request.param, []
    page.on("console", lambda m: m.type == "error" and page.problems.append(m.text))
    page.on("pageerror", lambda e: page.problems.append(str(e)))
    page.on("requestfailed", lambda r: page.problems.append(f"failed: {r.url}"))
    page.on(
        "request",
        lambda r: (
            r.url.startswith(("file:", "data:", "blob:"))
            or page.problems.append(f"leaves: {r.url}")
        ),
    )
    yield page
    context.close()


def _pages(html):
    return sorted(p for p in html.glob("book/*.html"))


def test_first_page_opens(html, page):
    page.goto(f"file://{html}/index.html")
    page.wait_for_selector("article h1:has-text('Accelerating Keras')")
    assert not page.problems


def test_every_page_is_clean(html, page, book_build):
    paths = _pages(html)
    assert {p.stem for p in paths} >= {"index", "glossary", "api", "status", *book_build.chapters()}
    for path in paths:
        page.goto(f"file://{path}")
        # MathJax has typeset every formula that the page has, and reported none as wrong.
        page.wait_for_function(
            "[...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container'))"
        )
        assert page.locator("mjx-merror").count() == 0, path.name
        assert page.locator("html").get_attribute("data-theme") == page.scheme
        missing = page.evaluate(
            "[...document.querySelectorAll('article img')].filter(i => !i.alt || !i.complete ||"
            " !i.naturalWidth).map(i => i.src)"
        )
        assert not missing, f"{path.name}: images without alt text or content: {missing}"
        assert not page.problems, f"{path.name}: {page.problems}"


def test_chapters_have_formulas_and_figures(html, page, chapter):
    page.goto(f"file://{html}/book/{chapter}.html")
    assert page.locator("article .math").count() > 0
    assert page.locator("article figure img").count() > 0
    assert page.locator("article .exercise").count() >= 2
    assert page.locator("article .solution").count() >= 2


def test_references_resolve(html, page):
    """A role such as {py:func} that names nothing would be left as plain code, without a link."""
    for path in _pages(html):
        page.goto(f"file://{path}")
        dangling = page.evaluate(
            "[...document.querySelectorAll('article code.xref, article span.xref')]"
            ".filter(e => !e.closest('a')).map(e => e.textContent)"
        )
        assert not dangling, f"{path.name}: {dangling}"


def test_search_finds_a_chapter(html, page):
    page.goto(f"file://{html}/search.html?q=pruning")
    page.wait_for_selector("#search-results li a")
    links = page.locator("#search-results li a").evaluate_all("es => es.map(e => e.href)")
    assert any("book/pruning.html" in link for link in links)
    assert not page.problems


def test_dark_text_is_readable(html, page, chapter):
    """Text against its background: the contrast that WCAG 2.1 asks of body text, 4.5 to 1."""
    page.goto(f"file://{html}/book/{chapter}.html")
    ratio = page.evaluate(
        """() => {
            const luminance = (rgb) => {
              const [r, g, b] = rgb.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
                .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
              return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const text = getComputedStyle(document.querySelector('article p')).color;
            const back = getComputedStyle(document.body).backgroundColor;
            const [a, b] = [luminance(text), luminance(back)].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
        }"""
    )
    assert ratio >= 4.5


def test_chapter_downloads_as_a_notebook(html, page, chapter):
    page.goto(f"file://{html}/book/{chapter}.html")
    link = page.locator("a.btn-download-notebook-button, a[href$='.ipynb']").first
    target = link.get_attribute("href")
    assert (html / "book" / target).resolve().exists()
