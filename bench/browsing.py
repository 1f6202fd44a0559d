"""How long a reader waits in the browser: `python -m bench.browsing` (needs Playwright and Debian's chromium).

A store of raw DICOM of 2048 x 2500, scanned for this, is opened by `cxrbatch review`. From the key to the painted
canvas for `n`, to an image that was preloaded; and from the request to the painted canvas for a page opened anew. The
clock is the page's own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from bench.inputs import KINDS, make_kind

_IMAGES = 24
_WAIT_MS = 60_000
_PAUSE_MS = 700  # a quick reader; the next images are loaded meanwhile

#: From the dispatch of a key until the page says that the new image is painted.
_NEXT = """() => new Promise((done) => {
  const place = document.getElementById("workplace"), began = performance.now();
  const watch = new MutationObserver(() => {
    if (!place.dataset.shown) return;
    watch.disconnect();
    done(performance.now() - began);
  });
  watch.observe(place, { attributes: true, attributeFilter: ["data-shown"] });
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "n", bubbles: true }));
})"""
#: The same for a page that is opened, since its navigation began.
_OPENED = """() => new Promise((done) => {
  const place = document.getElementById("workplace"), said = () => place.dataset.shown && done(performance.now());
  new MutationObserver(said).observe(place, { attributes: true });
  said();
})"""


def main() -> None:
    raw = next(kind for kind in KINDS if kind.name == "raw")
    images = make_kind(raw, Path(__file__).parent / "inputs", _IMAGES)
    assert images is not None
    with tempfile.TemporaryDirectory() as folder:
        incoming = Path(folder) / "incoming"
        incoming.mkdir()
        for file in sorted(images.iterdir())[:_IMAGES]:
            shutil.copy(file, incoming)
        cxrbatch = [sys.executable, "-m", "cxrbatch", "--db", f"sqlite:///{folder}/store.db"]
        subprocess.run([*cxrbatch, "-q", "scan", str(incoming)], check=False, stderr=subprocess.DEVNULL)
        server = subprocess.Popen([*cxrbatch, "review", "--port", "0"], stderr=subprocess.PIPE, text=True, cwd=folder)
        try:
            assert server.stderr is not None
            said = next(line for line in server.stderr if "http" in line)
            address = re.search(r"http\S+", said)
            assert address is not None, said
            _report(address[0])
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


def _report(address: str) -> None:
    with sync_playwright() as started:
        chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(_WAIT_MS)
        page.goto(address)
        first, following = _opened(page), _followed(page)
        browser.close()
    for what, times in (("a page opened anew, to pixels", first), ("`n` to the next image, to pixels", following)):
        print(f"{what}: median {statistics.median(times):.0f} ms, most {max(times):.0f} ms, of {len(times)}")


def _opened(page: Page) -> list[float]:
    origin = page.evaluate("location.origin")
    links = page.locator("tr[data-id] a").evaluate_all("links => links.map((link) => link.getAttribute('href'))")
    times = []
    for link in dict.fromkeys(links[:10]):
        page.goto(f"{origin}{link}", wait_until="commit")
        page.wait_for_selector("#workplace")
        times.append(page.evaluate(_OPENED))
    return times


def _followed(page: Page) -> list[float]:
    page.goto(page.evaluate("location.origin") + "/images")
    page.locator("tr[data-id] a").first.click()
    page.wait_for_selector("#workplace[data-shown]")
    times = []
    for _ in range(_IMAGES - 4):
        page.wait_for_timeout(_PAUSE_MS)
        times.append(page.evaluate(_NEXT))
    return times


if __name__ == "__main__":
    main()
