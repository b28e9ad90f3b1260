"""Decoder layers with their weights and input statistics; statistics transform in closed form."""
