"""The page in Chromium, as a person uses it. CLIPFLEET_SCREENSHOTS=docs makes the pictures of the docs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.deployments.broken import BROKEN
from tests.deployments.service import Service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENSHOTS = os.environ.get("CLIPFLEET_SCREENSHOTS")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
]
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 740}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; Debian's package is chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, other_service: Service) -> Iterator[Page]:
    """The page on a desk's screen. Nothing may be asked of another host, and nothing may be wrong with its code."""
    yield from opened(browser, other_service, viewport=DESK)


def opened(browser: Browser, service: Service, **options: Any) -> Iterator[Page]:
    context = browser.new_context(**options)
    page = context.new_page()
    elsewhere: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: elsewhere.append(request.url) if not _is_own(request.url, service) else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    page.goto(service.url)
    expect(page.locator("#state")).to_contain_text("512 dimensions")
    yield page
    context.close()
    assert elsewhere == [] and wrong == []


def _is_own(url: str, service: Service) -> bool:
    return url.startswith((f"{service.url}/", "data:", "blob:"))


def shot(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS, f"{name}.png"))


def results(page: Page) -> list[str]:
    return page.locator("#results .name").all_text_contents()


def test_search_by_words_and_more_like_this(page: Page) -> None:
    page.get_by_label("What is in the picture").fill("a purple star")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("#search-said")).to_have_text("12 pictures, best first")
    found = results(page)
    assert len(found) == 12
    scores = [float(text) for text in page.locator("#results .score").all_text_contents()]
    assert scores == sorted(scores, reverse=True)
    assert page.locator("#results img").first.evaluate("image => image.complete && image.naturalWidth") == 160
    shot(page, "page-search")
    page.get_by_role("button", name=f"More like {found[4]}", exact=True).click()
    expect(page.locator("#results .name").first).to_have_text(found[4])
    expect(page.locator("#results .score").first).to_have_text("1.000")


def test_search_by_a_picture_and_with_words(page: Page, picture_files: list[Path]) -> None:
    page.locator("#search-file").set_input_files(picture_files[3])
    expect(page.locator("#results .name").first).to_have_text("03.png")
    alone = page.locator("#results .score").all_text_contents()
    page.get_by_label("What is in the picture").fill("a red circle")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("#results .score").first).not_to_have_text(alone[0])
    page.get_by_role("button", name="Remove the picture").click()
    expect(page.locator("#search-shown")).to_be_hidden()


def test_a_dropped_picture(page: Page, picture_files: list[Path]) -> None:
    content = list(picture_files[5].read_bytes())
    page.evaluate(
        """content => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(content)], "dropped.png", { type: "image/png" }));
            const dropped = new DragEvent("drop", { dataTransfer: transfer, cancelable: true });
            document.getElementById("search-drop").dispatchEvent(dropped);
        }""",
        content,
    )
    expect(page.locator("#results .name").first).to_have_text("05.png")


def test_a_broken_picture_is_said_in_words(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "<img src=x onerror=alert(1)>.png"
    file.write_bytes(BROKEN["cut PNG"].data)
    page.locator("#search-file").set_input_files(file)
    expect(page.locator("#search-said")).to_contain_text("truncated or damaged")
    expect(page.locator("#search-said")).to_have_class("wrong")
    shot(page, "page-error")
    page.locator("#zero-file").set_input_files(file)
    expect(page.locator("#zero-said")).to_contain_text("truncated or damaged")


def test_labels_for_a_picture(page: Page, picture_files: list[Path]) -> None:
    page.get_by_label("Labels, with commas").fill("a red circle, a blue star, <b>bold</b>, ")
    page.locator("#zero-file").set_input_files(picture_files[0])
    bars = page.locator("#bars li")
    expect(bars).to_have_count(3)
    assert "<b>bold</b>" in " ".join(bars.all_text_contents()), "labels are text"
    shares = [float(text.rstrip("%")) for text in page.locator("#bars span:last-child").all_text_contents()]
    assert shares == sorted(shares, reverse=True) and abs(sum(shares) - 100) < 0.3


def test_what_is_hostile_in_a_collection_is_text(page: Page, other_service: Service) -> None:
    """An answer with an id that is HTML, and a thumbnail that is an SVG with a script."""
    hostile = "<script>document.title='gone'</script>"
    svg = 'data:image/svg+xml,<svg xmlns="http://www.w3.org/2000/svg" onload="document.title=1"/>'
    body = {"object": "list", "model": "tiny", "fingerprint": "f", "results": [
        {"id": hostile, "score": 0.5, "payload": {"thumbnail": svg}},
        {"id": "javascript:alert(1)", "score": 0.4, "payload": {"thumbnail": '" onerror="document.title=2'}},
    ]}  # fmt: skip
    page.route("**/v1/search", lambda route: route.fulfill(json=body))
    page.get_by_label("What is in the picture").fill("x")
    page.keyboard.press("Enter")
    expect(page.locator("#results li")).to_have_count(2)
    assert results(page) == [hostile, "javascript:alert(1)"]
    assert page.locator("#results img, #results script").count() == 0 and page.title() == "clipfleet"


def test_by_keyboard_alone(page: Page) -> None:
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.locator("#query")).to_be_focused()
    page.keyboard.type("a ring")
    page.keyboard.press("Enter")
    expect(page.locator("#results li")).to_have_count(12)
    for _ in range(4):  # the button, the file field, then the first result's button
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "More like this":
            break
    first = results(page)[0]
    page.keyboard.press("Enter")
    expect(page.locator("#results .score").first).to_have_text("1.000")
    assert results(page)[0] == first


def test_on_a_phone_and_in_the_dark(browser: Browser, other_service: Service) -> None:
    for page in opened(browser, other_service, viewport=PHONE, color_scheme="dark", has_touch=True):
        page.get_by_label("What is in the picture").fill("a red circle")
        page.get_by_role("button", name="Search").click()
        expect(page.locator("#results li")).to_have_count(12)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing stands out to the right"
        shot(page, "page-phone")


def test_labels_in_the_dark(browser: Browser, other_service: Service, picture_files: list[Path]) -> None:
    for page in opened(browser, other_service, viewport=DESK, color_scheme="dark"):
        page.get_by_label("Labels, with commas").fill("a red circle, a purple star, a green ring")
        page.locator("#zero-file").set_input_files(picture_files[1])
        expect(page.locator("#bars li")).to_have_count(3)
        expect(page.locator("#bars li").first).to_contain_text("a purple star")
        expect(page.locator("#live div")).to_have_count(10)
        shot(page, "page-dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrasts(browser: Browser, other_service: Service, scheme: Any) -> None:
    """WCAG AA: 4.5 to 1 for text on what is behind it."""
    for page in opened(browser, other_service, viewport=DESK, color_scheme=scheme):
        colours = page.evaluate(
            """() => Object.fromEntries(["paper", "ink", "quiet", "tint", "accent", "on-accent", "wrong", "line"].map(
                name => [name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()]))"""
        )
        pairs = [(text, behind) for text in ("ink", "quiet", "accent") for behind in ("paper", "tint")]
        for text, behind in (*pairs, ("on-accent", "accent"), ("wrong", "paper")):
            assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
        assert contrast(colours["line"], colours["paper"]) >= 3.0


def contrast(one: str, other: str) -> float:
    """Of two colours such as #0b57c2, as WCAG 2 has it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
