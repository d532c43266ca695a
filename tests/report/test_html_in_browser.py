"""A report in headless Chromium, from disk: it scrolls, switches, windows and sorts, and fits a phone and a desk."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import CHROMIUM
from matplotlib import colormaps
from test_html import add_volumes, images_of, write

from mrjax.report import html

pytestmark = pytest.mark.browser
WIDTHS = {"desk": 1280, "phone": 390}
# Every element that ends beyond the page, unless it lies in a region that scrolls by itself.
OVERFLOWING = """() => [...document.querySelectorAll("body *")].filter((element) =>
    element.getBoundingClientRect().right > innerWidth + 1 && !element.closest(".scroll")).map((e) => e.outerHTML)"""

READ_PIXELS = """() => {
    const image = document.getElementById("image"), copy = new OffscreenCanvas(image.width, image.height);
    const context = copy.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return [image.height, image.width, ...context.getImageData(0, 0, image.width, image.height).data];
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder, pages = tmp_path_factory.mktemp("report"), html.Report(3)
    add_volumes(pages, folder, 3)
    write(pages, folder / "report.html", [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4, "val/psnr": 30.0}])
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS)
def page(request, browser, report) -> Iterator:
    """The report, opened; at the end nothing was asked of the network and nothing complained."""
    context = browser.new_context(
        viewport={"width": WIDTHS[request.param], "height": 844}, has_touch=request.param == "phone"
    )
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith("data:") or complaints.append(asked.url))
    page.goto(report.as_uri())
    page.wait_for_function("document.getElementById('image').width === 32")
    yield page
    context.close()
    assert complaints == [report.as_uri()]


def pixels(page) -> np.ndarray:
    """The large image as it is shown, (height, width, 3), once it is painted."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    height, width, *values = page.evaluate(READ_PIXELS)
    return np.reshape(values, (height, width, 4))[..., :3]


def text(page, name: str) -> str:
    return page.locator(f"#{name}").inner_text()


def test_the_page_fits_its_width(page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(OVERFLOWING) == []
    page.locator("details summary").click()
    assert page.evaluate(OVERFLOWING) == []


def test_wheel_and_keys_scroll_and_switch(page) -> None:
    stage, middle = page.locator(".stage"), pixels(page)
    assert text(page, "shown-slice") == "slice 3 of 5"
    stage.hover()
    page.mouse.wheel(0, 100)
    page.wait_for_function("document.getElementById('shown-slice').textContent === 'slice 4 of 5'")
    assert not np.array_equal(pixels(page), middle)
    stage.focus()
    for key, slice_ in (("ArrowUp", 3), ("End", 5), ("ArrowDown", 5), ("PageUp", 1), ("ArrowDown", 2), ("Home", 1)):
        page.keyboard.press(key)
        assert text(page, "shown-slice") == f"slice {slice_} of 5"
    for key, image in (("1", "corrupted"), ("4", "absolute error"), ("ArrowLeft", "ground truth")):
        page.keyboard.press(key)
        assert text(page, "shown-image") == image
        assert page.locator("#images [aria-pressed=true]").inner_text() == image
    page.locator("#slice").focus()
    page.keyboard.press("ArrowRight")
    assert text(page, "shown-slice") == "slice 2 of 5"


def test_the_buttons_show_each_image_in_its_colours(page, report) -> None:
    from mrjax.io import readers

    page.locator("#volume").select_option(index=1)
    images = images_of(readers.describe(str(report.parent / "1_T101.t5")), 0.04)
    white = np.percentile(images["target"], 99.5)
    for name, label in {"corrupted": "corrupted", "target": "ground truth", "reconstruction": "reconstruction"}.items():
        page.get_by_role("button", name=label, exact=True).click()
        grey = 255 * np.clip(images[name][2] / white, 0, 1)
        assert np.abs(pixels(page) - grey[..., None]).max() <= 3
    page.get_by_role("button", name="absolute error", exact=True).click()
    found, high = pixels(page) / 255, text(page, "bar-high")
    error = np.abs(images["reconstruction"] - images["target"])[2] / (white * float(high.split()[0]) / 100)
    assert np.abs(found - colormaps["inferno"](np.clip(error, 0, 1))[..., :3]).max() < 0.04


def test_dragging_sets_window_and_level(page) -> None:
    page.locator(".stage").scroll_into_view_if_needed()
    box, before = page.locator(".stage").bounding_box(), pixels(page)
    centre = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*centre)
    page.mouse.down()
    page.mouse.move(centre[0] - 80, centre[1] - 30, steps=4)
    page.mouse.up()
    assert text(page, "shown-window").split() == ["W", "67", "%", "L", "40", "%"]
    assert pixels(page).mean() > before.mean() + 1
    page.mouse.move(*centre)  # nothing is dragged any more
    assert text(page, "shown-window").split()[1] == "67"
    page.locator(".stage").focus()
    page.keyboard.press("0")
    assert np.array_equal(pixels(page), before)
    page.locator("#window").focus()
    page.keyboard.press("ArrowLeft")
    assert text(page, "window-text") == "99 % of white"


@pytest.mark.parametrize("page", ["phone"], indirect=True)
def test_touch_scrolls_with_one_finger_and_windows_with_two(page) -> None:
    page.locator(".stage").scroll_into_view_if_needed()
    box, session = page.locator(".stage").bounding_box(), page.context.new_cdp_session(page)

    def drag(fingers: int, right: int, down: int) -> None:
        for part in (0, 0.5, 1):
            x, y = box["x"] + 120 + part * right, box["y"] + 150 + part * down
            points = [{"x": x + 60 * finger, "y": y, "id": finger} for finger in range(fingers)]
            kind = "touchMove" if part else "touchStart"
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    drag(1, 0, -35)
    assert text(page, "shown-slice") == "slice 5 of 5"
    drag(1, 35, 0)
    assert text(page, "shown-slice") == "slice 3 of 5"
    drag(2, 60, 0)
    assert text(page, "shown-slice") == "slice 3 of 5"
    assert text(page, "shown-window").startswith("W 135 %")


def test_the_table_sorts_by_mouse_and_keyboard(page) -> None:
    column = "() => [...document.querySelectorAll('#table tbody tr')].map((row) => row.cells[8].textContent)"
    heading = page.locator("#table thead th").nth(8)
    heading.get_by_role("button").click()
    rising = page.evaluate(column)
    assert rising == sorted(rising, key=float)
    assert heading.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert page.evaluate(column) == rising[::-1]
    assert page.locator("#table [aria-sort]").count() == 1
    page.locator("#table thead button").first.focus()
    for order in ("ascending", "descending"):
        page.keyboard.press("Space")
        assert page.locator("#table thead th").first.get_attribute("aria-sort") == order
    names = page.locator("#table tbody th").all_inner_texts()
    assert names[:2] == ["2_T101", "1_T101"]
    assert names[2].startswith("<script>")


def test_a_card_or_a_name_opens_the_slice_by_keyboard_with_a_visible_focus(page) -> None:
    card = page.locator(".card").first
    where = card.locator(".faint").inner_text().split(",")[0]
    card.focus()
    page.keyboard.press("Enter")
    assert text(page, "shown-slice") == where
    assert page.evaluate("document.activeElement.className") == "stage"
    page.locator(".link").last.focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert text(page, "shown-volume").startswith("2_T101")
