"""Scores on held-out sets."""
