"""Folders of the checkout that contains this library."""

from __future__ import annotations

from pathlib import Path

LIBRARY = next(folder for folder in Path(__file__).resolve().parents if folder.name == "quantgrid")
SCRIPTS = LIBRARY.parent
ROOT = SCRIPTS.parent
