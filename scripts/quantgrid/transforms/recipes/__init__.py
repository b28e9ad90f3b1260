"""Published transforms, one file each: a list of primitives with options."""
