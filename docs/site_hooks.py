"""Hooks of mkdocs: the guide for contributors as a page, and links that leave docs/.

On a forge a document may link to any file of the repository. The site has the documents alone: there
such a link becomes the name of the file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?)\[([^\]]+)\]\(([^)\s:#]+)((?:#[^)]*)?)\)")
GUIDE, PAGE = "CONTRIBUTING.md", "contributing.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the guide for contributors to the pages."""
    files.append(File.generated(config, PAGE, content=(ROOT / GUIDE).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite links of a page as those of the site."""
    source = "docs/" + page.file.src_uri if page.file.src_uri != PAGE else GUIDE

    def link(found: re.Match[str]) -> str:
        image, text, target, anchor = found.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = PAGE if path == GUIDE else path.removeprefix("docs/")
        known = files.get_file_from_path(inside) if path == GUIDE or path.startswith("docs/") else None
        if known and known.inclusion.is_included():
            return f"{image}[{text}]({posixpath.relpath(inside, posixpath.dirname(page.file.src_uri))}{anchor})"
        return f"{text} (`{path}`)" if (ROOT / path).exists() else found[0]

    return LINK.sub(link, markdown)
