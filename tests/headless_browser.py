"""A page in a headless Chromium without a network: what its console says, and what can be seen."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 120
# What a script may not do on the page itself it does on a copy: measure every figure, and count the
# pixels that are not white when it is drawn.
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
_PROBE = """
<pre id="probe"></pre>
<script>
window.addEventListener("load", () => {
  const seen = [...document.querySelectorAll("figure")].map((figure) => {
    const image = figure.querySelector("img");
    const box = image.getBoundingClientRect();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [600, 400];
    const context = canvas.getContext("2d");
    context.fillStyle = "#ffffff";
    context.fillRect(0, 0, 600, 400);
    if (image.naturalWidth) context.drawImage(image, 0, 0, 600, 400);
    const pixels = context.getImageData(0, 0, 600, 400).data;
    let inked = 0;
    for (let at = 0; at < pixels.length; at += 4)
      inked += pixels[at] + pixels[at + 1] + pixels[at + 2] < 600;
    return { id: figure.id, width: box.width, height: box.height, inked: inked };
  });
  document.getElementById("probe").textContent = JSON.stringify(seen);
});
</script>
</body>"""


class Seen(NamedTuple):
    """What a browser made of a page."""

    console: list[str]  # every line that the page, or the browser about it, wrote to the console
    document: str  # as it was when it was loaded


def browser() -> str:
    """The Chromium of this machine; skips where there is none."""
    named = os.environ.get("FASTMEMIT_BROWSER")
    found = [named] if named else [shutil.which(name) for name in NAMES]
    folder = Path.home() / ".cache" / "ms-playwright"
    found += [str(path) for path in sorted(folder.glob("chromium-*/chrome-linux*/chrome"))]
    for path in found:
        if path and os.access(path, os.X_OK):
            return path
    pytest.skip("no browser: install chromium, or name one in FASTMEMIT_BROWSER")


def open_page(page: Path, scratch: Path) -> Seen:
    """Load a file in a fresh profile and wait until all of it is there."""
    command = [
        browser(),
        "--headless",
        "--no-sandbox",  # which cannot be had as root, as in containers
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={scratch / 'profile'}",
        "--window-size=1200,900",
        "--dump-dom",
        page.resolve().as_uri(),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        document, log = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0 and "</html>" in document, log[-2000:]
    return Seen([line for line in log.splitlines() if "CONSOLE" in line], document)


def figures_seen(page: Path, scratch: Path) -> list[dict[str, Any]]:
    """Each figure's id, its box in pixels, and how many of 240,000 pixels have ink."""
    source, policies = _POLICY.subn("", page.read_text(encoding="utf-8"))
    assert policies == 1 and source.count("</body>") == 1
    copy = scratch / f"probed-{page.name}"
    copy.write_text(source.replace("</body>", _PROBE), encoding="utf-8")
    found = re.search(r'<pre id="probe">(.*?)</pre>', open_page(copy, scratch).document, re.S)
    assert found and found[1], "the probe did not run"
    seen: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
    return seen
