"""What the model makes besides text: speech out of codes (MoE-TTS), sound out of codes (the codec)."""
