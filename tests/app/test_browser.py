"""The page in Chromium, as a person uses it: `pytest -m browser`; needs the extra `browser` and Chromium or Chrome."""

import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from urllib.parse import urlsplit

import numpy as np
import PIL.Image
import pytest
from conftest import make_pipeline

from app.test_page import png
from app.test_tabs import make_run

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-quic"
).split()
PHONE = {"width": 390, "height": 844}
PATIENCE = 120_000  # milliseconds: of a slow computer
DRAW = {"en": "Draw", "zh": "生成图片"}
TABS = {"en": ("Generate", "Edit", "Train"), "zh": ("生成", "编辑", "训练")}
EDITS = {"en": ("Variations", "Inpaint", "Interpolate"), "zh": ("变体", "修补", "两图插值")}
FINISHED = {"en": "Finished after", "zh": "完成，用时"}
# gradio's own: what its picture editor (PixiJS) and the browser's software renderer say.
NOT_ERRORS = ("debug", "log", "info", "warning", "startGroupCollapsed", "endGroup")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page on a model with three classes, and one run."""
    folder = tmp_path_factory.mktemp("page")
    make_pipeline(classes=3, num_train_timesteps=1000).save_pretrained(folder / "model")
    make_run(folder / "runs" / "first")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["app", "model", "--port", str(port), "--runs", "runs", "--max_upload_mb", "1", "--max_seconds", "600"]
    words += ["--max_steps", "1000"]
    command = [sys.executable, "-m", "custom_ddpm.cli", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("http://127.0.0.1")
        yield f"http://127.0.0.1:{port}"
        process.terminate()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is neither chromium nor google-chrome")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page as a visitor; at the end no console errors, failed requests, or requests to elsewhere are left."""
    contexts, problems = [], []

    def watch(request):
        if not request.url.startswith(("data:", "blob:")) and urlsplit(request.url).netloc != urlsplit(address).netloc:
            problems.append(f"a request to {request.url}")

    def listen(message):
        if message.type not in NOT_ERRORS and "status of 413" not in message.text:
            problems.append(f"console {message.type}: {message.text}")

    def open_page(language="en", **options):
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 900}, "locale": "en", **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", watch)
        page.on("console", listen)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address + ("/zh" if language == "zh" else "/"))
        page.locator(f"#draw-generate-{language}").wait_for()
        return page

    expect.set_options(timeout=PATIENCE)
    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def choose(page, name):
    """Select a tab, which on a narrow screen may stand in the menu at the end of the row."""
    page.get_by_role("tab", name=name, exact=True).click()


def set_steps(page, steps):
    field = page.get_by_label("number input for Steps").locator("visible=true")
    field.fill(str(steps))
    field.press("Tab")


def decoded(element):
    """The picture of an <img> of the page."""
    source = element.evaluate(
        """async image => {
          const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
          return Array.from(bytes);
        }"""
    )
    return PIL.Image.open(io.BytesIO(bytes(source)))


def upload(page, place, file, index=0):
    page.locator(f"{place} input[type=file]").nth(index).set_input_files(file)


def picture_file(name="picture.png", side=32):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": file.getvalue()}


def toast(page):
    """The one line in which the page refuses."""
    shown = page.get_by_test_id("toast-body").first
    shown.wait_for()
    return shown.inner_text()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_generate_shows_the_way_the_result_and_the_lines(visit, language, tmp_path):
    page = visit(language)
    assert page.evaluate("document.documentElement.lang") == language
    page.get_by_role("button", name=DRAW[language]).click()
    expect(page.locator(".view img").first).to_be_visible()
    expect(page.get_by_text(FINISHED[language])).to_be_visible()
    result = page.locator(".pixels img")
    expect(result).to_be_visible()
    with page.expect_download() as started:
        page.get_by_role("link", name="Download as PNG" if language == "en" else "下载 PNG").or_(
            page.get_by_role("button", name="Download as PNG" if language == "en" else "下载 PNG")
        ).first.click()
    started.value.save_as(tmp_path / "pictures.png")
    saved = PIL.Image.open(tmp_path / "pictures.png")
    assert np.array_equal(np.asarray(saved), np.asarray(decoded(result).convert(saved.mode)))
    assert "sample_images(" in page.locator(".cm-content").inner_text()


def test_the_languages_are_linked(visit):
    page = visit("en")
    page.get_by_role("link", name="中文").click()
    page.locator("#draw-generate-zh").wait_for()
    assert page.title() == "去噪扩散模型"
    page.get_by_role("link", name="English").click()
    page.locator("#draw-generate-en").wait_for()
    assert page.title() == "Denoising diffusion"


def test_cancel_ends_a_request_and_the_next_one_runs(visit):
    page = visit()
    set_steps(page, 250)
    page.get_by_role("button", name="Draw").click()
    expect(page.locator(".view img").first).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("Cancelled.")).to_be_visible()
    set_steps(page, 3)
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_text(FINISHED["en"])).to_be_visible()


# The lines under the views, as they come.
WATCH_LINES = """() => {
  window.lines = [];
  const note = () => window.lines.push(...[...document.querySelectorAll(".view + p")].map(line => line.innerText));
  new MutationObserver(note).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""


def test_a_second_request_takes_the_first_out_of_the_queue(visit):
    page, other = visit(), visit()
    page.evaluate(WATCH_LINES)
    set_steps(other, 1000)
    other.get_by_role("button", name="Draw").click()
    expect(other.locator(".view img").first).to_be_visible()
    for steps in (222, 3):
        set_steps(page, steps)
        page.get_by_role("button", name="Draw").click()
        expect(page.get_by_text("Waiting for its turn")).to_be_visible()
    other.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text(FINISHED["en"])).to_be_visible()
    lines = page.evaluate("window.lines")
    assert any("Waiting" in line for line in lines)
    assert not any("of 222" in line or "Not possible" in line for line in lines)


def test_a_second_request_can_be_cancelled_while_it_waits(visit):
    page, other = visit(), visit()
    page.evaluate(WATCH_LINES)
    set_steps(other, 1000)
    other.get_by_role("button", name="Draw").click()
    expect(other.locator(".view img").first).to_be_visible()
    for steps in (222, 333):
        set_steps(page, steps)
        page.get_by_role("button", name="Draw").click()
        expect(page.get_by_text("Waiting for its turn")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("Cancelled.")).to_be_visible()
    other.get_by_role("button", name="Cancel").click()
    expect(other.get_by_text("Cancelled.")).to_be_visible()
    # What waited has had its turn when a later request is done.
    set_steps(other, 3)
    other.get_by_role("button", name="Draw").click()
    expect(other.get_by_text(FINISHED["en"])).to_be_visible()
    expect(page.get_by_text("Cancelled.")).to_be_visible()
    lines = page.evaluate("window.lines")
    assert not any(word in line for line in lines for word in ("of 222", "of 333", "Not possible"))


def test_two_visitors_at_once_get_their_own_pictures(visit):
    pages = [visit(), visit()]
    for seed, page in enumerate(pages):
        page.get_by_label("Seed of the first picture").fill(str(100 + seed))
        page.get_by_label("Seed of the first picture").press("Tab")
        set_steps(page, 20)
    for page in pages:
        page.get_by_role("button", name="Draw").click()
    shown = []
    for seed, page in enumerate(pages):
        expect(page.get_by_text(FINISHED["en"])).to_be_visible()
        expect(page.locator(".pixels img")).to_be_visible()
        assert f"range({100 + seed}," in page.locator(".cm-content").inner_text()
        shown.append(decoded(page.locator(".pixels img")).tobytes())
    assert shown[0] != shown[1]


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"name": "words.png", "mimeType": "image/png", "buffer": b"no picture"}, "words.png is not a picture"),
        ({"name": "bomb.png", "mimeType": "image/png", "buffer": png(6000, 6000)}, "bomb.png has 6000x6000 pixels"),
    ],
)
def test_a_wrong_file_and_a_bomb_are_refused_in_one_line(visit, file, words):
    page = visit()
    choose(page, "Edit")
    upload(page, "#picture-en", file)
    page.locator("#picture-en img").wait_for(state="attached")
    page.locator("#draw-variations-en").click()
    assert words in toast(page)


def test_a_file_that_is_too_large_is_refused(visit):
    page = visit()
    choose(page, "Edit")
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(noise).save(file, "PNG")
    upload(page, "#picture-en", {"name": "large.png", "mimeType": "image/png", "buffer": file.getvalue()})
    assert re.search("size", toast(page))


def test_variations_and_pictures_between_two(visit):
    page = visit()
    choose(page, "Edit")
    upload(page, "#picture-en", picture_file())
    page.locator("#picture-en img").wait_for()
    set_steps(page, 4)
    page.locator("#draw-variations-en").click()
    expect(page.get_by_text(FINISHED["en"])).to_be_visible()
    choose(page, "Interpolate")
    for place in ("#first_picture-en", "#second_picture-en"):
        upload(page, place, picture_file(side=8 if "first" in place else 16))
        page.locator(f"{place} img").wait_for()
    set_steps(page, 4)
    page.locator("#draw-between-en").click()
    expect(page.get_by_text(FINISHED["en"]).locator("visible=true")).to_be_visible()


def test_inpaint_with_the_brush(visit):
    page = visit()
    choose(page, "Edit")
    choose(page, "Inpaint")
    page.locator("#draw-inpaint-en").click()
    assert "upload one" in toast(page)
    upload(page, "#editor-en", picture_file(side=8))
    page.wait_for_timeout(3000)
    page.locator("#editor-en").get_by_label("Brush").first.click()
    canvas = page.locator("#editor-en canvas").first
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y)
    page.mouse.down()
    for i in range(9):
        page.mouse.move(x - 40 + 10 * i, y)
    page.mouse.up()
    page.wait_for_timeout(1000)
    set_steps(page, 4)
    page.locator("#draw-inpaint-en").click()
    expect(page.get_by_text(FINISHED["en"]).locator("visible=true")).to_be_visible()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_train_shows_a_run(visit, language):
    page = visit(language)
    choose(page, TABS[language][2])
    expect(page.locator(f"#run-{language} img")).to_have_count(2)
    expect(page.locator(f"#run-{language}")).to_contain_text("Step 20 of 100" if language == "en" else "第 20 步")


def test_with_the_keyboard_alone(visit):
    """Tab to the fields and buttons, arrows on the slider and the tabs, Enter on the button."""
    page = visit()

    def tab_to(target):
        for _ in range(60):
            page.keyboard.press("Tab")
            if target.evaluate("element => element === document.activeElement"):
                return
        pytest.fail(f"{target} is not reached")

    slider = page.get_by_role("slider", name="Steps")
    tab_to(slider.first)
    for _ in range(15):
        page.keyboard.press("ArrowLeft")
    tab_to(page.get_by_role("button", name="Draw"))
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.get_by_text(FINISHED["en"])).to_be_visible()
    page.reload()
    page.locator("#draw-generate-en").wait_for()
    tab_to(page.get_by_role("tab", name="Edit", exact=True))
    page.keyboard.press("Enter")
    expect(page.locator("#draw-variations-en")).to_be_visible()


@pytest.mark.parametrize(("language", "scheme", "viewport"), [("en", "light", None), ("zh", "dark", PHONE)])
def test_no_serious_findings_of_axe_and_no_sideways_scrolling(visit, language, scheme, viewport):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = visit(language, color_scheme=scheme, **({"viewport": viewport} if viewport else {}))
    found = []

    def look(where):
        page.wait_for_timeout(500)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        found.extend([f"{where} is {wide} pixels too wide"] * (wide > 0))
        for finding in axe.run(page).response["violations"]:
            if finding["impact"] in ("serious", "critical"):
                found.append(f"{where}: {finding['help']}: {finding['nodes'][0]['html'][:200]}")

    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 300) == (scheme == "dark")
    page.get_by_role("button", name=DRAW[language]).click()
    expect(page.get_by_text(FINISHED[language])).to_be_visible()
    look("generate")
    choose(page, TABS[language][1])
    for name in EDITS[language]:
        choose(page, name)
        look(name)
    choose(page, TABS[language][2])
    expect(page.locator(f"#run-{language} img")).to_have_count(2)
    look("train")
    assert found == []


def test_a_stranger_does_not_get_files_of_this_computer(visit, address):
    page = visit()
    for path in ("/etc/passwd", "model/unet/config.json", "../page/model/model_index.json"):
        answer = page.request.get(f"{address}/gradio_api/file={path}")
        assert answer.status in (403, 404), path
    answer = page.request.get(address, headers={"Host": "evil.example"})
    assert answer.status == 400


def test_the_first_picture_comes_soon(visit):
    """Prints the seconds from the page's opening to the first picture; no test asserts a time."""
    started = time.monotonic()
    page = visit()
    opened = time.monotonic()
    page.get_by_role("button", name="Draw").click()
    page.locator(".view img").first.wait_for()
    print(f"open {opened - started:.1f} s, first picture {time.monotonic() - started:.1f} s")
