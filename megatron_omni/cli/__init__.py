"""Command lines: parsing only."""
