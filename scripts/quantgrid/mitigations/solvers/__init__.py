"""Shared solvers: column-wise rounding, Cholesky factors, singular vectors, low-rank factors."""
