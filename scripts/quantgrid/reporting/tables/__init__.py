"""Tables of studies and comparisons, and their files."""
