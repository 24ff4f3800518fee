"""How long the studio takes from a click to the first picture, as a person feels it, and what it compiles on the way.

`python benchmarks/studio.py --runs runs/`, after the README's first command has learnt `runs/dog`. Needs a Chromium and
Playwright (`pip install -e '.[test]'`).
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from side_by_side import processor

PROMPT = "a photo of a <dog> on the beach"
# Each is moved a step further by the keyboard.
SLIDERS = ("bias", "temperature", "strength", "start", "end")


@contextmanager
def browsing(runs: Path, log: Path) -> Iterator[Page]:
    """The studio of a folder of runs in a browser; what it compiles goes into a log."""
    command = [sys.executable, "-m", "perfusion_jax.studio", f"--runs={runs}", "--port=0"]
    environment = {**os.environ, "JAX_LOG_COMPILES": "1"}
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as server,
        sync_playwright() as playwright,
    ):
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        if not found:
            raise SystemExit(f"the studio did not start: {log.read_text()}")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            page = browser.new_page()
            page.set_default_timeout(600_000)
            page.goto(found[0])
            page.wait_for_selector(".card", state="attached")
            page.wait_for_selector("#loading", state="hidden")
            yield page
        finally:
            browser.close()
            server.terminate()


def until_drawn(page: Page, act: Callable[[], None]) -> float:
    """Seconds until the first picture of what an act draws is shown, whole."""
    before = page.locator("#drawn figcaption a").all_inner_texts()
    start = time.perf_counter()
    act()
    page.wait_for_function(
        """before => {
            const name = document.querySelector("#drawn figcaption a"), image = document.querySelector("#drawn img");
            return name && !before.includes(name.innerText) && image.complete && image.naturalWidth > 0;
        }""",
        arg=before,
        polling=20,
    )
    taken = time.perf_counter() - start
    page.wait_for_selector("#stop-button[disabled]")
    return taken


def main() -> None:
    """Draws by clicks and by sliders, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", default="runs", help="folder of the runs; one of them is called dog")
    parser.add_argument("--rounds", type=int, default=5, help="clicks, and moves of each slider, that are timed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # A copy, so that what is drawn leaves nothing.
        runs, log = Path(folder) / "runs", Path(folder) / "log"
        shutil.copytree(Path(options.runs) / "dog", runs / "dog")

        def compiled() -> int:
            return log.read_text().count("Compiling ")

        with browsing(runs, log) as page:
            page.fill("#prompt", PROMPT)

            def move(slider: str) -> None:
                focused = page.locator(f"#slider-{slider}-dog")
                focused.focus()
                focused.press("ArrowLeft" if slider == "end" else "ArrowRight")

            print(f"{processor()}, {os.cpu_count()} cores; seconds to the first picture, medians of {options.rounds}\n")
            print("| act | the first time | then | programs compiled the first time | then |")
            print("| --- | --- | --- | --- | --- |")
            acts: dict[str, Callable[[], None]] = {"a click on Draw": lambda: page.click("#draw-button")}
            acts |= {f"a move of {slider}": partial(move, slider) for slider in SLIDERS}
            for name, act in acts.items():
                programs, seconds = [compiled()], []
                for _ in range(options.rounds + 1):
                    seconds.append(until_drawn(page, act))
                    programs.append(compiled())
                first, later = programs[1] - programs[0], programs[-1] - programs[1]
                then = statistics.median(seconds[1:])
                print(f"| {name} | {seconds[0]:.2f} | {then:.2f} | {first} | {later} |", flush=True)


if __name__ == "__main__":
    main()
