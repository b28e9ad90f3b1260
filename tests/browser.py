"""Pages in headless Chromium: a script runs in the page, and its findings and the messages of the console
come back."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
HEIGHT = 900  # pixels
FRAME = """<!DOCTYPE html><body style="margin:0">
<iframe style="width:{width}px;height:{height}px;border:0" srcdoc="{inner}"></iframe>
<script>{{
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {{
  document.body.append(frame.contentDocument.querySelector("#seen").cloneNode(true));
}});
}}</script></body>"""
CONSOLE = re.compile(r"CONSOLE[:(].*")


def driven(page: Path, text: str, script: str, width: int = 500) -> dict[str, Any]:
    """Run a script in the page ``text``, in a frame of ``width`` pixels (a window has at least 500), and return
    the content of the element ``seen`` that the script adds; a message on the console, such as an error, fails
    the test."""
    inner = html.escape(text.replace("</body>", script))
    page.write_text(FRAME.format(width=width, height=HEIGHT, inner=inner), encoding="utf-8")
    size, profile = f"--window-size={max(width, 500)},{HEIGHT}", f"--user-data-dir={page.parent / 'profile'}"
    command = [CHROMIUM, *OPTIONS, size, profile, "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not CONSOLE.findall(done.stderr), CONSOLE.findall(done.stderr)
    return json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
