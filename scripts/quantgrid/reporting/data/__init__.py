"""Tidy records of results: collection, selection, names, costs, published numbers, paired tests."""
