"""Pictures of the documents: small WebP files next to the page that shows them."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).resolve().parent
# of a picture in the documents: columns of pixels, colours without loss, quality (percent) with loss
WIDTH, COLORS, QUALITY = 800, 32, 70


def drawn(image: bytes, name: str) -> str:
    """Save an image as ``name`` below docs/, the smaller of two WebP encodings; return the Markdown
    that shows it in a document of the same folder."""
    with Image.open(io.BytesIO(image)) as full:
        shown = full.convert("RGB")
    if shown.width > WIDTH:
        shown = shown.resize((WIDTH, shown.height * WIDTH // shown.width), Image.Resampling.LANCZOS)
    lossy, lossless = io.BytesIO(), io.BytesIO()
    shown.save(lossy, "WEBP", quality=QUALITY, method=6)
    few = shown.quantize(COLORS, dither=Image.Dither.NONE).convert("RGB")
    few.save(lossless, "WEBP", lossless=True, quality=100, method=6)
    target = DOCS / f"{name}.webp"
    target.write_bytes(min(lossy.getvalue(), lossless.getvalue(), key=len))
    return f"![{target.stem}]({target.name})\n"


def shown(name: str) -> str:
    """Markdown that shows a kept picture; empty if there is none."""
    return f"![{Path(name).name}]({Path(name).name}.webp)\n" if (DOCS / f"{name}.webp").is_file() else ""
