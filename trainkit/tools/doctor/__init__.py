"""``python -m trainkit doctor``: ``machine`` has facts, rules and report; ``trial`` runs a model."""
