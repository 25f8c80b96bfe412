"""The model: read omni.py first."""
