"""Configs: reading, validation against schema and registry, expansion into cells."""

from .validation import check, load, read

__all__ = ["check", "load", "read"]
