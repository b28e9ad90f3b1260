"""Jobs at run time: arguments, progress, records of content, locks, the fork server."""
