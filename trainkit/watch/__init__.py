"""Record and show the numbers of a run while it trains."""
