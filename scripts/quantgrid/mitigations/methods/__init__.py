"""Published mitigations, one file each, all with the same signature."""
