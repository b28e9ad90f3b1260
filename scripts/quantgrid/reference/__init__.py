"""Reference models shipped with quantgrid: sizes, training, model cards. No study job imports
this."""
