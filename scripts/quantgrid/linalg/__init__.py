"""Orthogonal matrices and structured products: Hadamard, random orthogonal, Kronecker."""
