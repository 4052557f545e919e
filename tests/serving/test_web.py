"""The page in a real browser, on the embedded model: chat about an upload, draw and watch, paint and edit."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.browser import CHROMIUM, in_a_browser
from unimm.data.shapes import Scene, SceneObject, render
from unimm.serving.app import create_app
from unimm.serving.engine import Engine
from unimm.serving.run import serving
from unimm.serving.settings import ServingSettings

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
from unimm.serving.web import mount_page  # noqa: E402

pytestmark = [in_a_browser, pytest.mark.slow]

PHONE = {"width": 390, "height": 844}
DRAWN = "#draw-result img"
WEBGL = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")  # the editor's canvas, without a GPU


@pytest.fixture(scope="module")
def address(parts: tuple[Any, Any]) -> Iterator[str]:
    """The page's address."""
    torch.set_num_threads(1)
    app = create_app(Engine(*parts), ServingSettings())
    mount_page(app, knows_shapes=True)
    with serving(app) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The browser."""
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *WEBGL])


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Open the page; at the end, no request has gone to another host and no error has been written."""
    requests: list[str] = []
    errors: list[str] = []
    contexts = []

    def open_page(**options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.get_by_role("tab", name="Chat").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert requests and errors == []
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []


@pytest.fixture
def upload(tmp_path: Path) -> str:
    """A file with a blue square, left, and a yellow circle, right."""
    objects = (SceneObject("square", "blue", 16, 32, 9), SceneObject("circle", "yellow", 47, 32, 10))
    path = tmp_path / "upload.png"
    render(Scene(objects, "white")).save(path)
    return str(path)


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def pixels(page: Any, selector: str) -> np.ndarray:
    """Return the pixels [H, W, 3] of an image, as the server sent it."""
    image = page.locator(selector).first
    image.wait_for()
    body = page.request.get(image.get_attribute("src")).body()

    return np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(int)


def is_color(array: np.ndarray, color: str) -> np.ndarray:
    """Return which pixels are of a color, roughly."""
    red, green, blue = (array[..., channel] for channel in range(3))
    return {
        "blue": (blue > 150) & (red < 110),
        "yellow": (red > 190) & (green > 160) & (blue < 130),
        "red": (red > 170) & (green < 100) & (blue < 100),
        "green": (green > 110) & (red < 110) & (blue < 130),
    }[color]


def test_chat_about_an_uploaded_image_and_draw_in_the_conversation(visit: Callable[..., Any], upload: str) -> None:
    page = visit()
    page.locator("#message input[type=file]").set_input_files(upload)
    page.locator("#message img").wait_for()
    box = page.locator("#message textarea")
    box.fill("What color is the circle?")
    box.press("Enter")
    sync_api.expect(page.get_by_test_id("bot").last).to_have_text("yellow", timeout=60_000)
    sync_api.expect(box).to_have_value("")
    page.locator("#message .submit-button").wait_for()  # until then Enter sends nothing
    box.fill("Draw two green squares")
    box.press("Enter")
    page.locator("#talk [data-testid=bot] img").wait_for()
    page.locator("#message .submit-button").wait_for()  # it is back once the image is complete
    drawn = pixels(page, "#talk [data-testid=bot] img")
    assert drawn.shape == (64, 64, 3) and is_color(drawn, "green").mean() > 0.03
    page.get_by_role("button", name="New conversation").click()
    page.get_by_text("What do you see?").wait_for()


def test_a_drawing_is_seen_to_grow_and_its_seed_draws_it_again(visit: Callable[..., Any]) -> None:
    page = visit()
    tab(page, "Draw")
    page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => {
                const image = document.querySelector("#draw-result img");
                if (image && image.src && window.seen.at(-1) !== image.src) window.seen.push(image.src);
            }).observe(document.body, {subtree: true, childList: true, attributes: true, attributeFilter: ["src"]});
        }"""
    )
    page.locator("#draw-prompt textarea").fill("a red circle on a white background")
    page.get_by_text("More settings").first.click()
    page.get_by_label("Seed").first.fill("1")
    page.locator("#draw-go").click()
    line = page.locator("#draw-line")
    sync_api.expect(line).to_contain_text("Seed 1 ", timeout=60_000)
    first = pixels(page, DRAWN)
    assert is_color(first, "red").mean() > 0.03
    assert len(page.evaluate("window.seen")) >= 3
    page.locator("#draw-prompt textarea").fill("two blue squares on a white background")
    page.locator("#draw-number").get_by_text("2").click()
    page.locator("#draw-go").click()
    sync_api.expect(page.locator(DRAWN)).to_have_count(2, timeout=60_000)
    sync_api.expect(line).to_contain_text("Seed 1 ", timeout=60_000)
    assert is_color(pixels(page, DRAWN), "blue").mean() > 0.03


def test_what_is_painted_is_drawn_anew_and_the_rest_stays(visit: Callable[..., Any]) -> None:
    page = visit()
    tab(page, "Edit")
    canvas = page.locator("#edit-image canvas").first
    canvas.wait_for()
    page.get_by_role("button", name="Brush", exact=True).click()
    page.wait_for_timeout(500)
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(middle[0] + 30, middle[1] - 70)
    page.mouse.down()
    for step in range(9):  # over the yellow circle, in the right half
        page.mouse.move(middle[0] + 30 + 10 * step, middle[1] + (50 if step % 2 else -70), steps=4)
    page.mouse.up()
    page.locator("#edit-meaning").get_by_text("Describe the finished image").click()
    page.locator("#edit-prompt textarea").fill("a blue square left of a red ring on a white background")
    page.locator("#edit-go").click()
    sync_api.expect(page.locator("#edit-line")).to_contain_text("Seed", timeout=60_000)
    edited = pixels(page, "#edit-result img")
    assert not is_color(edited, "yellow").any()  # it was painted over
    left = edited[:, : 64 * 3 // 8]
    assert is_color(left, "blue").mean() > 0.1  # the square stays


def test_an_instruction_changes_what_it_names(visit: Callable[..., Any]) -> None:
    """The image that the tab starts with, a blue square and a yellow circle, without any painting."""
    page = visit()
    tab(page, "Edit")
    page.locator("#edit-image canvas").first.wait_for()
    page.get_by_text("More settings").locator("visible=true").first.click()
    page.get_by_label("Seed").locator("visible=true").first.fill("1")
    page.locator("#edit-prompt textarea").fill("Make the yellow circle red.")
    page.locator("#edit-go").click()
    sync_api.expect(page.locator("#edit-line")).to_contain_text("Seed 1", timeout=60_000)
    edited = pixels(page, "#edit-result img")
    assert not is_color(edited, "yellow").any() and is_color(edited, "red").mean() > 0.02
    assert is_color(edited, "blue").mean() > 0.05


def test_a_reconstruction_beside_its_original_on_a_phone_in_the_dark(visit: Callable[..., Any], upload: str) -> None:
    page = visit(viewport=PHONE, color_scheme="dark", has_touch=True)
    for name in ("Chat", "Draw", "Edit", "Reconstruct"):
        tab(page, name)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], name
    luminance = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert max(luminance) < 64
    page.locator("#reconstruct-image input[type=file]").set_input_files(upload)
    page.locator("#reconstruct-go").click()
    sync_api.expect(page.locator("#reconstruct-line")).to_contain_text("64 codes", timeout=60_000)
    original, image, codes = (pixels(page, f"#reconstruct-{number} img") for number in range(3))
    assert original.shape == image.shape == codes.shape == (64, 64, 3)
    assert np.abs(original - image).mean() < 12 < np.abs(original - codes).mean()


def test_a_mistake_is_one_sentence_and_markup_in_it_is_text(visit: Callable[..., Any]) -> None:
    page = visit()
    tab(page, "Draw")
    page.get_by_text("More settings").first.click()
    page.get_by_label("Seed").first.fill("<img src=x onerror=alert(1)>")
    page.locator("#draw-prompt textarea").fill("a red circle")
    page.locator("#draw-go").click()
    toast = page.get_by_test_id("toast-body")
    sync_api.expect(toast).to_contain_text("seed: Input should be a valid integer")
    assert "Traceback" not in toast.inner_text() and page.locator(".toast-body img").count() == 0
