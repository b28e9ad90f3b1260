"""Decoders on disk: tensors by role, shapes, canonical folders, loading into transformers."""
