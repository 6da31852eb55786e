"""``python -m trainkit doctor``."""
