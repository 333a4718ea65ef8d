"""The page of `zsq report` in a real browser: sorting, sizes, colours, and that nothing leaves it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

import zsq as package
from browser import Browser, find_browser

pytestmark = pytest.mark.slow
BAD = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
ATTACK = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium (`make browser` installs it where apt can be used, or set ZSQ_BROWSER)")
    with Browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose names try to break out of the page."""
    run = Path(shutil.copytree(finished_run, tmp_path_factory.mktemp("report") / "<b>&'run"))
    for name, place in (("summary.json", "teacher"), ("summary.json", "base")):
        record = json.loads((run / name).read_text())
        record[place] = ATTACK
        (run / name).write_text(json.dumps(record))
    record = json.loads((run / "student.json").read_text())
    record["floats"][0] = {"name": ATTACK, "op": ATTACK, "why": ATTACK}
    (run / "student.json").write_text(json.dumps(record))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[-1] = json.dumps({**json.loads(lines[-1]), ATTACK: 1.0})
    (run / "metrics.jsonl").write_text("\n".join(lines))
    package.report(run, count=8, progress=False)
    return run / "report.html"


def cells(browser: Browser, column: int) -> list[str]:
    """A column of the table of layers; what it is sorted by, where that is not its text."""
    script = f"[...document.querySelectorAll('#rows tbody tr')].map(r => r.cells[{column}])"
    return browser.run(f"{script}.map(c => c.dataset.sort ?? c.textContent.trim())")  # type: ignore[no-any-return]


def click(browser: Browser, column: int) -> str:
    """Click on a heading; how it says it is sorted."""
    cell = f"document.querySelectorAll('#rows thead th')[{column}]"
    return str(browser.run(f"{cell}.querySelector('button').click(), {cell}.getAttribute('aria-sort')"))


def test_no_errors_and_nothing_leaves_the_page(browser: Browser, page: Path) -> None:
    browser.open(page)
    wanted = {p["request"]["url"].partition(":")[0] for name, p in browser.events if name == "Network.requestWillBeSent"}  # noqa: E501
    assert wanted <= {"file", "data"}
    assert any(p["request"]["url"] == page.as_uri() for n, p in browser.events if n == "Network.requestWillBeSent")
    assert not [(name, p) for name, p in browser.events if name in BAD]
    assert browser.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.run("document.images.length") > 10
    # nothing but its own parts: no address that is not a data URI or a place on the page
    links = browser.run("[...document.querySelectorAll('[src],[href]')].map(e => e.getAttribute('src') ?? e.getAttribute('href'))")  # noqa: E501
    assert all(link.startswith(("data:image/", "#")) for link in links)


def test_names_from_files_stay_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert "owned" not in browser.run("document.title").removeprefix(ATTACK)
    assert browser.run("document.querySelectorAll('script').length") == 1
    assert not browser.run("document.querySelectorAll('[onerror]').length")
    assert ATTACK in browser.run("document.querySelector('h1').textContent")
    assert page.read_text().count("<script") == 1


def test_sorting_by_click_and_by_key(browser: Browser, page: Path) -> None:
    browser.open(page)
    heads = browser.run("[...document.querySelectorAll('#rows thead th')].map(h => h.textContent.trim())")
    order = cells(browser, 0)
    assert order == [str(i + 1) for i in range(len(order))] and len(order) > 4
    for name in ("SQNR dB", "costs KL", "bits"):
        column = heads.index(name)
        assert click(browser, column) == "descending"
        values = [float(value) for value in cells(browser, column) if value != ""]
        assert values == sorted(values, reverse=True)
        assert click(browser, column) == "ascending"
        values = [float(value) for value in cells(browser, column) if value != ""]
        assert values == sorted(values)
    changed = heads.index("changed")  # activations have none: last in both directions
    for direction in ("descending", "ascending"):
        assert click(browser, changed) == direction
        known = [value != "" for value in cells(browser, changed)]
        assert known == sorted(known, reverse=True) and any(known) and not all(known)
    names = heads.index("name")
    browser.run(f"document.querySelectorAll('#rows thead th button')[{names}].focus()")
    browser.press("Enter", 13)
    assert browser.run(f"document.querySelectorAll('#rows thead th')[{names}].getAttribute('aria-sort')") == "ascending"
    assert browser.run("document.querySelectorAll('#rows [aria-sort=none]').length") == len(heads) - 1
    assert click(browser, 0) == "ascending" and cells(browser, 0) == order


def test_rows_can_be_filtered(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelector('.filter [data-show=weight]').click()")
    shown = browser.run("[...document.querySelectorAll('#rows tbody tr')].filter(r => r.offsetHeight > 0).map(r => r.dataset.kind)")  # noqa: E501
    assert set(shown) == {"weight"}
    browser.run("document.querySelector('.filter [data-show=\"\"]').click()")
    assert browser.run("[...document.querySelectorAll('#rows tbody tr')].every(r => r.offsetHeight > 0)")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_follows_the_scheme(browser: Browser, page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, height=844, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("Math.max(...[...document.querySelectorAll('main p, main h2, h1, .verdict')].map(e => "
                       "e.getBoundingClientRect().right))") <= width  # fmt: skip
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert image.width == width and image.height > 2000
        corner = image.convert("RGB").getpixel((2, 2))
        assert isinstance(corner, tuple) and (sum(corner) < 150) == dark
    # figures take the page's ink: text of the charts must not be black on black
    ink = browser.run("getComputedStyle(document.querySelector('.chart svg text')).fill")
    assert ink == browser.run("getComputedStyle(document.body).color")


def test_it_says_itself_without_pictures(browser: Browser, page: Path) -> None:
    """Images have a text, tables have headings, figures a label; one h1, no level of headings left out."""
    browser.open(page)
    assert browser.run("[...document.images].every(i => i.alt.length > 10)")
    assert browser.run("[...document.querySelectorAll('[role=img]')].every(e => e.getAttribute('aria-label').length > 10)")  # noqa: E501
    assert browser.run("[...document.querySelectorAll('table')].every(t => t.querySelector('thead th[scope=col]'))")
    levels = browser.run("[...document.querySelectorAll('h1,h2,h3')].map(h => Number(h.tagName[1]))")
    assert levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert browser.run("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size") == browser.run(
        "document.querySelectorAll('[id]').length"
    )
