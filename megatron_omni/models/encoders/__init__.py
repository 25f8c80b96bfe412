"""Perception: vision (SigLIP) and audio (Whisper) encoders with their projectors."""
