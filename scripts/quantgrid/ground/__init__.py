"""Foundations: files, digests, versions and errors."""
