"""The studio as a person uses it: the command, and its page in a browser."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perfusion_jax.runtime import shipped
from perfusion_jax.web.library import find_entry, rename

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# So small that a test is quick; the thing need not be learnt well.
KEYS = "batch_size=2\nvalidate_every=4\npictures_per_prompt=1\nsampling_steps=2\nlog_every=1\ncheckpoint_every=2"
QUICK = {"steps": "3", "sampler": "dpm++"}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium (Debian: apt-get install chromium)")


def own_cache(runs):
    """The environment of commands that keep all that they compile where no other test adds to it."""
    own = {
        "JAX_COMPILATION_CACHE_DIR": str(runs.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {**os.environ, **own}


class Server:
    """The command, in a folder of its own."""

    def __init__(self, runs, *flags):
        command = [sys.executable, "-m", "perfusion_jax.studio", f"--runs={runs}", "--port=0", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=own_cache(runs))
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"(http://127\.0\.0\.1:\d+)/\?token=\S+", line)
        assert found, line
        self.entrance, self.address = found[0], found[1]

    def end(self, sign=signal.SIGTERM):
        self.process.send_signal(sign)
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("studio") / "runs"


@pytest.fixture(scope="module")
def server(runs):
    server = Server(runs)
    yield server
    server.end()


@pytest.fixture
def page(browser, server):
    """A tab of its own, that fails where the page has an error or asks anybody else."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = open_page(context, server)
    errors, asked = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    context.close()
    assert not errors
    assert all(url.startswith((server.address, "data:", "blob:")) for url in asked)


def open_page(context, server):
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(server.entrance)
    page.wait_for_selector("#cards > *", state="attached")  # the page's modules have run
    page.wait_for_selector("#loading", state="hidden")
    return page


def tab(page, name):
    page.click(f"#tab-{name}")


def fill_in(page, name, kind, files, steps):
    tab(page, "learn")
    page.set_input_files("#files", files)
    page.fill("#thing-name", name)
    page.fill("#thing-kind", kind)
    if not page.is_visible("#thing-steps"):
        page.click("details:has(#thing-steps) > summary")
    page.fill("#thing-steps", str(steps))
    page.fill("#thing-keys", KEYS)


def dog_pictures():
    return sorted(map(str, (shipped.EXAMPLES / "dog").glob("*.png")))[:3]


@pytest.fixture(scope="module")
def learnt(browser, server, runs):
    """The dog, learnt on the page in few steps."""
    context = browser.new_context()
    page = open_page(context, server)
    fill_in(page, "rex", "dog", dog_pictures(), 4)
    page.click("#look-button")
    page.wait_for_selector("#previews figure:nth-child(3) img")
    page.click("#previews figure:nth-child(1) button")
    page.wait_for_selector("#mask-canvas")
    box = page.locator("#mask-canvas").bounding_box()
    page.check("#erase")
    page.mouse.move(box["x"] + 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 380, box["y"] + 20, steps=4)
    page.mouse.up()
    page.click("#mask-keep")
    page.wait_for_selector("text=0.png, mended")
    page.click("#start-button")
    page.wait_for_selector('.job[data-run="rex"][data-state="learning"]')
    page.reload()  # in the middle of the run, which is found again
    tab(page, "learn")
    page.wait_for_selector('.job[data-run="rex"][data-state="done"]')
    context.close()
    return runs / "rex" / "concepts" / "rex.safetensors"


def draw(page, prompt, **fields):
    tab(page, "draw")
    page.fill("#prompt", prompt)
    if not page.is_visible("#steps"):
        page.click("details:has(#steps) > summary")
    for name, value in {**QUICK, **fields}.items():
        if name == "sampler":
            page.select_option("#sampler", value)
        else:
            page.fill(f"#{name}", value)
    before = page.locator("#drawn figcaption a").all_inner_texts()
    page.click("#draw-button")
    return wait_for_drawing(page, before)


def wait_for_drawing(page, before):
    for name in before:
        page.wait_for_selector(f"#drawn a:text-is('{name}')", state="detached")
    page.wait_for_selector("#drawn figure img")
    page.wait_for_selector("#stop-button[disabled]")
    return page.locator("#drawn figcaption a").all_inner_texts()


def pixels(runs, name):
    with Image.open(runs / "drawings" / name) as picture:
        return np.asarray(picture, int)


def test_a_thing_is_learnt_by_its_pictures_with_the_mask_that_was_painted(learnt, runs):
    assert learnt.is_file()
    folder = runs / "pictures" / "rex"
    with Image.open(folder / "masks" / "picture_01.png") as mask:
        row = np.asarray(mask)[mask.height * 20 // 384]
    assert row.max() == 0  # erased
    config = json.loads((runs / "rex" / "config.json").read_text())
    assert (config["masks"], config["pictures"]) == ("files", str(folder))
    assert not list((runs / ".studio" / "uploads").iterdir())


def test_a_slider_changes_the_picture_and_compiles_nothing(page, learnt, runs):
    tab(page, "draw")
    page.click("#prompt")
    page.keyboard.type("a photo of a <r")
    page.wait_for_selector("#completions li:has-text('<rex>, a dog')")
    assert page.get_attribute("#prompt", "aria-expanded") == "true"
    page.keyboard.press("Enter")
    assert page.input_value("#prompt") == "a photo of a <rex>"
    (first,) = draw(page, "a photo of a <rex>")
    compiled = sorted((runs.parent / "compiled").glob("*-cache"))
    assert compiled
    before = first
    # As if they were moved by the keyboard, each to its least.
    for control, least in (("bias", 0.0), ("temperature", 0.02), ("strength", 0.0)):
        page.locator(f"#slider-{control}-rex").focus()
        page.keyboard.press("Home")
        (before,) = wait_for_drawing(page, [before])
        assert sorted((runs.parent / "compiled").glob("*-cache")) == compiled
        with Image.open(runs / "drawings" / before) as picture:
            assert json.loads(picture.text["perfusion_jax"])["options"][control] == [least]
    assert np.abs(pixels(runs, first) - pixels(runs, before)).mean() > 1


def test_the_command_on_the_page_draws_the_same_picture(page, learnt, runs, tmp_path):
    (name,) = draw(page, "a photo of a <rex> at night", seed="7")
    page.click("#draw-command summary")
    line = page.inner_text("#draw-command pre")
    assert line.startswith("python -m perfusion_jax.sample")
    done = subprocess.run(
        line.replace("python", sys.executable, 1).replace("picture.png", str(tmp_path / "picture.png")),
        shell=True,
        cwd=ROOT,
        env=own_cache(runs),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "picture.png") as picture:
        assert np.abs(np.asarray(picture, int) - pixels(runs, name)).max() <= 1


def test_a_word_shows_where_the_picture_looked_at_it(page, learnt):
    draw(page, "a photo of a <rex>")
    assert page.locator(".words button").all_inner_texts() == ["a", "photo", "of", "a", "<rex>"]
    word, cover = page.locator(".words button").nth(4), page.locator(".looks").nth(4)
    assert not cover.is_visible()
    word.hover()
    assert cover.is_visible()
    assert page.locator(".looks:visible").count() == 1
    page.mouse.move(0, 0)
    assert not cover.is_visible()
    word.focus()  # by the keyboard too
    assert cover.is_visible()


def test_a_strip_sweeps_one_control(page, learnt):
    draw(page, "a photo of a <rex>")
    page.click("details:has(#sweep-button) > summary")
    page.select_option("#sweep-control", "strength")
    for name, value in (("first", "0"), ("last", "1"), ("count", "3")):
        page.fill(f"#sweep-{name}", value)
    page.click("#sweep-button")
    page.wait_for_selector("#drawn .strip figure:nth-child(3) img")
    labels = page.locator("#drawn figcaption span").all_inner_texts()
    assert labels == ["seed 0, strength 0", "seed 0, strength 0.5", "seed 0, strength 1"]
    page.locator("#sweep-last").press_sequentially("e")
    page.click("#sweep-button")
    page.wait_for_selector("#draw-message .error:text-is('To: it must be a number')")


def test_a_picture_gives_its_recipe_back(page, learnt, runs):
    (name,) = draw(page, "a photo of a <rex> in the snow", seed="12")
    draw(page, "something else", seed="0")
    page.set_input_files("#open", str(runs / "drawings" / name))
    page.wait_for_selector("#draw-message:has-text('recipe is back')")
    assert (page.input_value("#prompt"), page.input_value("#seed")) == ("a photo of a <rex> in the snow", "12")
    (again,) = draw(page, page.input_value("#prompt"), seed=page.input_value("#seed"))
    assert np.array_equal(pixels(runs, again), pixels(runs, name))


def test_a_concept_is_exported_renamed_and_deleted_when_asked_twice(page, learnt, runs):
    shutil.copytree(runs / "rex", runs / "max")
    rename(find_entry(runs, "max/rex"), "max")
    tab(page, "library")
    page.click('.card:has-text("<max>")')
    page.click("#export-button")
    with page.expect_download() as download:
        page.click("#exported a:has-text('max_lora.safetensors')")
    assert Path(download.value.path()).read_bytes() == (runs / "exports/max/lora/max_lora.safetensors").read_bytes()
    assert "perfusion_jax.export" in page.text_content("#export-command pre")
    page.fill("#compare-count", "1")
    page.click("#compare-button")
    page.wait_for_selector("#of-right figure img")
    page.wait_for_selector("#compare-stop[disabled]")
    lines = page.locator("#compare-commands pre").all_text_contents()
    assert len(lines) == 2
    assert all("--sampler dpm++" in line for line in lines)
    page.fill("#new-name", "moritz")
    page.click("#rename-button")
    page.wait_for_selector('.card:has-text("<moritz>")')
    page.click("#delete-button")
    page.click("#ask-no")
    page.click("#delete-button")
    page.click("#ask-yes")
    page.wait_for_selector("#ask-words:has-text('Really?')")
    assert (runs / "max" / "concepts" / "moritz.safetensors").exists()
    page.click("#ask-yes")
    page.wait_for_selector('.card:has-text("<moritz>")', state="detached")
    assert not (runs / "max").exists()
    assert learnt.exists()


def test_a_painted_mask_stays_until_it_is_let_go_of(page, learnt):
    fill_in(page, "tom", "dog", dog_pictures()[:2], 4)
    page.click("#look-button")
    page.click("#previews figure:nth-child(1) button")
    page.locator("#mask-canvas").press(" ")
    page.click("#mask-keep")
    mended = page.locator("#previews figcaption:has-text(', mended')")
    page.click("#look-button:has-text('Look at')")
    page.wait_for_selector("#look-button[aria-disabled]", state="detached")
    assert mended.count() == 1
    page.set_input_files("#files", dog_pictures()[2:])
    page.click("#look-button:has-text('Look at')")
    page.wait_for_selector("#previews figure:nth-child(3)")
    assert mended.count() == 1
    page.uncheck("#thing-crop")
    page.click("#ask-no")
    assert page.is_checked("#thing-crop")
    assert mended.count() == 1
    page.click("#dropped li:nth-child(1) button")
    page.click("#ask-yes")
    page.wait_for_selector("#dropped li:nth-child(3)", state="detached")
    assert mended.count() == 0


def test_a_run_that_is_finished_shows_its_pictures_and_is_drawn_by_a_click(page, learnt):
    tab(page, "learn")
    page.wait_for_function("() => document.querySelector('.job[data-run=rex] .grid-picture').naturalWidth > 0")
    page.click('.job[data-run="rex"] button:has-text("Draw it")')
    assert page.input_value("#prompt") == "a photo of a <rex>"
    assert page.is_visible("#slider-bias-rex")


def test_the_row_of_a_run_stays_while_its_numbers_change(page, learnt):
    job = {
        **{"run": "tom", "things": ["tom, a dog"], "state": "learning", "stopping": False, "error": "", "warnings": []},
        **{"command": ["python"], "grid": "", "learnt": [], "progress": None},
    }
    seen = {"entries": [], "jobs": [job], "interrupted": [], "drawings": [], "loading": False, "problem": ""}
    page.route("**/api/state", lambda route: route.fulfill(json={**seen, "sampler": "", "base": "emoji"}))
    tab(page, "learn")
    page.wait_for_selector(".job p:text-is('Loading the model.')")
    page.evaluate("() => { document.querySelector('.job').dataset.mark = '1'; }")
    page.evaluate("() => getSelection().selectAllChildren(document.querySelector('.job span'))")
    seen["jobs"] = [{**job, "progress": {"position": 1500, "total": 4000, "rate": 1234.5, "words": "loss 0.1"}}]
    page.wait_for_selector(
        ".job[data-mark='1'] p:text-is('Step 1,500 of 4,000, 1,235 steps a second, 2 s left: loss 0.1')"
    )
    assert page.evaluate("() => getSelection().toString()") == "tom, a dog"
    seen["jobs"] = [{**job, "stopping": True}]
    page.wait_for_selector(".job[data-mark='1'] p:has-text('Stopping')")


def test_an_empty_library_opens_where_things_are_learnt(page, server, learnt):
    seen = {"entries": [], "jobs": [], "interrupted": [], "drawings": [], "loading": False, "problem": "no such model"}
    page.route("**/api/state", lambda route: route.fulfill(json={**seen, "sampler": "", "base": "emoji"}))
    page.goto("about:blank")
    page.goto(server.address)
    page.wait_for_selector("#learn:not([hidden]) .empty:has-text('Drop pictures of a thing')")
    with page.expect_request("**/api/act") as asked:
        page.click("#connection button:text-is('Try again')")
    assert asked.value.post_data_json == {"act": "load"}


def test_a_run_that_was_begun_is_deleted_when_asked_twice(page, learnt, runs):
    (runs / "begun").mkdir()
    config = json.loads((runs / "rex" / "config.json").read_text())
    (runs / "begun" / "config.json").write_text(json.dumps({**config, "name": "begun"}))
    (runs / "begun" / "metrics.jsonl").write_text('{"step": 2}\n')
    tab(page, "learn")
    page.click('.job[data-run="begun"] button:has-text("Delete")')
    page.wait_for_selector("#ask-list li:has-text('begun/metrics.jsonl')")
    page.click("#ask-yes")
    page.wait_for_selector("#ask-words:has-text('Really?')")
    page.click("#ask-yes")
    page.wait_for_selector('.job[data-run="begun"]', state="detached")
    assert not (runs / "begun").exists()


def test_drawing_starts_from_a_picture_until_that_is_taken_away(page, learnt, runs):
    page.set_input_files("#init", dog_pictures()[0])
    (first,) = draw(page, "a photo of a dog", seed="3")
    for draft in (runs / ".studio" / "drafts").iterdir():
        shutil.rmtree(draft)  # as where the studio was started again
    (again,) = draw(page, "a photo of a dog", seed="3")
    assert np.array_equal(pixels(runs, first), pixels(runs, again))
    page.click("#init-remove")
    (without,) = draw(page, "a photo of a dog", seed="3")
    assert np.abs(pixels(runs, first) - pixels(runs, without)).mean() > 1


def test_two_tabs_see_the_same_and_draw_beside_each_other(browser, server, page, learnt):
    context = browser.new_context()
    other = open_page(context, server)
    for each in (page, other):
        draw(each, "a photo of a <rex>")
    for each in (page, other):
        each.fill("#count", "2")
        each.click("#draw-button")
    for each in (page, other):
        each.wait_for_selector("#drawn figure:nth-child(2) img")
    for each in (page, other):
        tab(each, "learn")
        each.wait_for_selector('.job[data-run="rex"][data-state="done"]')
    context.close()


def hostile_files(folder):
    svg = folder / "script.svg"
    svg.write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>document.title = "hacked"</script></svg>')
    archive = folder / "archive.png"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x.png", "x")
    huge = folder / "huge.png"
    Image.new("1", (20_000, 10_000)).save(huge)
    return {svg: "script.svg: not a picture", archive: "archive.png: not a picture", huge: "huge.png: "}


def test_hostile_files_and_names_are_refused_in_words(page, learnt, tmp_path, runs):
    (tmp_path / "notes.txt").write_text("mine")
    tab(page, "learn")
    page.set_input_files("#files", str(tmp_path / "notes.txt"))
    page.wait_for_selector("#learn-message .error:has-text('notes.txt is not a picture')")
    for file, words in hostile_files(tmp_path).items():
        fill_in(page, "tom", "dog", [str(file)], 4)
        page.click("#start-button")
        page.wait_for_selector(f"#learn-message .error:has-text('{words}')")
        page.click("#dropped button")
    names = {
        "../x": "such as x",
        "<img src=x onerror=alert(1)>": "such as img",
        "pictures": "'pictures' is one",
        "a/b": "a-b",
    }
    for name, words in names.items():
        fill_in(page, name, "dog", dog_pictures(), 4)
        page.click("#start-button")
        page.wait_for_selector(f'#learn-message .error:has-text("{words}")')
        for _ in dog_pictures():
            page.locator("#dropped button").first.click()
    fill_in(page, "tom", "<b>dog</b>", dog_pictures(), 4)
    page.keyboard.press("Tab")
    page.wait_for_selector("#learn-message .warning:has-text('no word')")
    tab(page, "draw")
    page.fill("#prompt", "a <script>alert(1)</script> <nobody>")
    page.click("#draw-button")
    page.wait_for_selector("#draw-message .error:has-text('is not in the library')")
    assert page.title() == "Perfusion studio"
    assert sorted(folder.name for folder in (runs / "pictures").iterdir()) == ["rex"]


def test_the_page_is_used_by_the_keyboard_alone(page, learnt):
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator('[role="tab"][aria-selected="true"]').inner_text() == "Library"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#details:not([hidden])")
    assert page.inner_text("#facts h2") == "rex"
    assert page.evaluate("() => document.activeElement.dataset.key") == "rex/rex"


@pytest.mark.parametrize("view", [{"width": 400, "height": 800}, {"width": 640, "height": 450}])
def test_nothing_is_wider_than_a_narrow_or_enlarged_window(browser, server, learnt, view):
    context = browser.new_context(viewport=view, color_scheme="dark")
    page = open_page(context, server)
    draw(page, "a photo of a <rex>", count="2")
    tab(page, "library")
    page.click('.card:has-text("<rex>")')
    tab(page, "learn")
    page.set_input_files("#files", dog_pictures())
    page.wait_for_selector('.job[data-run="rex"] .grid-picture')
    for name in ("draw", "learn", "library"):
        tab(page, name)
        page.evaluate("() => document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    # A picture is seen while the slider under it is moved.
    tab(page, "draw")
    page.locator("#slider-strength-rex").evaluate("slider => slider.scrollIntoView({ block: 'center' })")
    slider, picture = (
        page.locator(at).bounding_box()
        for at in ("#slider-strength-rex", "#drawn figure:first-child .frame > img:first-child")
    )
    for box in (slider, picture):
        assert 0 <= box["y"] + 20 < view["height"]
    assert picture["y"] + picture["height"] / 2 < slider["y"]
    context.close()


@pytest.mark.slow
def test_a_killed_studio_goes_on_and_its_runs_are_the_commands(browser, tmp_path):
    runs = tmp_path / "runs"
    server = Server(runs)
    context = browser.new_context()
    page = open_page(context, server)
    fill_in(page, "rex", "dog", dog_pictures(), 4_000)
    page.click("#start-button")
    until = time.monotonic() + 120
    while not list((runs / "rex" / "checkpoints").glob("[0-9]*")):
        assert time.monotonic() < until
        time.sleep(0.1)
    server.end(signal.SIGKILL)
    page.wait_for_selector("#connection:not([hidden])")
    context.close()
    # A queue that is as the killed studio left it goes on by itself.
    server = Server(runs)
    context = browser.new_context()
    page = open_page(context, server)
    tab(page, "learn")
    page.wait_for_selector('.job[data-state="learning"] p:has-text("Step"):not(:has-text("Step 0 of"))')
    page.click('.job button:has-text("Stop")')
    page.wait_for_selector('.job[data-state="stopped"]')
    page.click('summary:has-text("The command that learns it")')
    line = page.inner_text(".job pre")
    context.close()
    server.end()
    # And by its command, which finds that it has taken enough steps.
    done = re.sub(r"--config\.steps=\d+", "--config.steps=1", line).replace("python", sys.executable, 1)
    taken = subprocess.run(done, shell=True, cwd=ROOT, check=False, capture_output=True, text=True)
    assert taken.returncode == 0, taken.stderr
    assert (runs / "rex" / "concepts" / "rex.safetensors").exists()
