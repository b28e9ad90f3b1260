"""Planned steps behind the cells of a config: specifications, keys, paths and resources."""
