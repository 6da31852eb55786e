"""``python -m trainkit doctor``: facts, rules and report in ``machine``; a model in ``trial``."""
