"""Layers of a module: naming, freezing, recomputing and listing them."""
