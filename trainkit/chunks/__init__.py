"""Batches cut into chunks."""
