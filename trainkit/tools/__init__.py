"""The commands of ``python -m trainkit``."""
