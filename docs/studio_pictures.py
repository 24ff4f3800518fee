"""Draws the pictures of the studio in the documents: `python docs/studio_pictures.py --runs runs/`.

The folder holds a run called `dog` (the README's first command) and one called `cat`. Needs a Chromium and Playwright
(`pip install -e '.[test]'`).
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from perfusion_jax.runtime import shipped

DOCS = Path(__file__).parent


def draw(page: Page, light: bool) -> None:
    """The tab that draws: the dog, and where the picture looked at its name."""
    page.fill("#prompt", "a photo of a <dog> on the beach")
    page.fill("#count", "2")
    page.click("#draw-button")
    page.wait_for_selector("#drawn figure:nth-child(2) img")
    page.wait_for_selector("#stop-button[disabled]")
    if not light:
        page.hover('.words button:text-is("<dog>")')
    page.screenshot(path=DOCS / ("studio_draw.png" if light else "studio_attention.png"), full_page=True)


def learn(page: Page) -> None:
    """The tab that learns: pictures, the masks that were found, and a run."""
    page.click("#tab-learn")
    files = sorted((shipped.EXAMPLES / "teddy").glob("*.png"))
    page.set_input_files("#files", [str(file) for file in files])
    page.fill("#thing-name", "ted")
    page.fill("#thing-kind", "bear")
    page.click("#look-button")
    page.wait_for_selector(f"#previews figure:nth-child({len(files)}) img")
    page.screenshot(path=DOCS / "studio_learn.png", full_page=True)


def library(page: Page) -> None:
    """The tab that keeps what was learnt."""
    page.click("#tab-library")
    page.click('.card:has-text("<dog>")')
    page.wait_for_selector("#facts img")
    page.wait_for_timeout(500)  # until its pictures are there
    page.screenshot(path=DOCS / "studio_library.png", full_page=True)


def main() -> None:
    """Opens the studio, and takes its pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    runs = Path(parser.parse_args().runs)
    command = [sys.executable, "-m", "perfusion_jax.studio", f"--runs={runs}", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found, "the studio did not start"
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport={"width": 1100, "height": 700}, color_scheme=scheme)  # type: ignore[arg-type]
                page.set_default_timeout(300_000)
                page.goto(found[0])
                page.wait_for_selector(".card", state="attached")
                page.wait_for_selector("#loading", state="hidden")
                draw(page, scheme == "light")
                if scheme == "light":
                    learn(page)
                    library(page)
        finally:
            browser.close()
            server.terminate()


if __name__ == "__main__":
    main()
