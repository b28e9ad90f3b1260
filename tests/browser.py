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
CONSOLE = re.compile(r"CONSOLE[:(].*")


def driven(page: Path, text: str, script: str, width: int = 500) -> dict[str, Any]:
    """Run a script in the page ``text``, in a window of ``width`` pixels, and return the content of its
    element ``seen``; a message on the console, such as an error, fails the test."""
    page.write_text(text.replace("</body>", script), encoding="utf-8")
    size, profile = f"--window-size={width},900", f"--user-data-dir={page.parent / 'profile'}"
    command = [CHROMIUM, *OPTIONS, size, profile, "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not CONSOLE.findall(done.stderr), CONSOLE.findall(done.stderr)
    return json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)[1]))
