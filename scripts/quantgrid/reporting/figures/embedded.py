"""Palette encoding of PNGs inside an SVG if they have few colours: half of the bytes, the same
pixels."""

from __future__ import annotations

import base64
import io
import re

from PIL import Image

EMBEDDED = re.compile(r"(data:image/png;base64,)([A-Za-z0-9+/=\s]+)")
COLORS = 256  # size limit of a palette


def lean(svg: str) -> str:
    """Rewrite every embedded PNG of ``svg`` with at most ``COLORS`` opaque colours with a palette;
    others are unchanged."""
    return EMBEDDED.sub(lambda found: found[1] + _by_palette(found[2]), svg)


def _by_palette(encoded: str) -> str:
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as picture:
        pixels = picture.convert("RGBA")
    colors = pixels.getcolors(COLORS)
    if colors is None or any(color[3] != 255 for _, color in colors):
        return encoded
    buffer = io.BytesIO()
    _indexed(pixels.convert("RGB"), sorted(color[:3] for _, color in colors)).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _indexed(pixels: Image.Image, colors: list[tuple[int, ...]]) -> Image.Image:
    """Encode the picture losslessly as positions in ``colors``."""
    place = {color: position for position, color in enumerate(colors)}
    raw = pixels.tobytes()
    result = Image.frombytes("P", pixels.size, bytes(place[tuple(raw[at : at + 3])] for at in range(0, len(raw), 3)))
    result.putpalette([value for color in colors for value in color])
    return result
