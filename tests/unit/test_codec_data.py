"""Recordings for the codec's recipe: what is held out is not in training, and spliced sound is of its voice's words."""

import numpy as np

from examples.quickstart.assets import SAMPLE_RATE, load_assets, load_digits
from examples.speak.codec_data import FADE_SAMPLES, NEW_WORDS, faded, filtered, joined, spliced
from examples.speak.score_codec import COLUMNS, draw_clips


def test_recordings_hold_every_word_once_and_pieces_of_words() -> None:
    words = [np.full(4000, level, np.float32) for level in (0.1, 0.2, 0.3)]
    whole = joined(np.random.default_rng(0), words)
    assert np.allclose(np.unique(whole), [0.0, 0.1, 0.2, 0.3])
    assert all((whole == word[0]).sum() == 4000 for word in words)
    made = spliced(np.random.default_rng(0), load_digits()["flite_kal"])
    assert np.array_equal(made, spliced(np.random.default_rng(0), load_digits()["flite_kal"]))
    assert 25 < len(made) / SAMPLE_RATE < 60 and np.isfinite(made).all() and 0.05 < np.abs(made).max() < 1.0


def test_joins_are_smooth_and_filters_keep_loudness() -> None:
    fade = np.linspace(0, 1, FADE_SAMPLES, dtype=np.float32)
    level = np.full(1000, 0.5, np.float32)
    both = faded(level, level, fade)
    assert len(both) == 2000 - FADE_SAMPLES and np.allclose(both, 0.5)
    noise = np.random.default_rng(1).normal(0, 0.05, 16_000).astype(np.float32)
    made = filtered(np.random.default_rng(2), noise)
    assert np.isclose(np.std(made), np.std(noise), rtol=1e-3)
    assert not np.allclose(made, noise, atol=1e-3)


def test_columns_say_what_they_say_they_hold() -> None:
    assets = load_assets()
    new = {assets.english[word] for word in NEW_WORDS}
    clips = {column: draw_clips(assets, column, 12) for column in COLUMNS}
    for column, members in clips.items():
        assert {word in new for clip in members for word in clip.words} == {column == "new_words"}
        assert {clip.voice in assets.held_out_voices for clip in members} == {column == "new_voices"}
        assert all(len(set(clip.words)) == 3 for clip in members)
    again = draw_clips(assets, "seen", 12)
    assert all(np.array_equal(a.wave, b.wave) and a.words == b.words for a, b in zip(again, clips["seen"]))
