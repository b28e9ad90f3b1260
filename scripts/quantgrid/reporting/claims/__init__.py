"""Claims judged by results, and recommended recipes."""
