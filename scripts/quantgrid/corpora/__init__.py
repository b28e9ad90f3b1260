"""Corpora: texts from four sources, tokenized and cut into windows."""
