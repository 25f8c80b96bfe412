"""Measurements of this project's own parts against the alternatives; results under ``results/``."""
