"""The codec of the repository: whole, small, scored as it is, and streamed as it decodes at once."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from examples.quickstart.assets import load_assets
from examples.speak.codec_data import joined
from megatron_omni.models.generators.codec import StreamingDecoder, load_codec
from megatron_omni.models.generators.codec_files import WEIGHTS_FILE

FOLDER = Path(__file__).parents[2] / "examples" / "speak" / "assets" / "codec"
ROOT = FOLDER.parents[3]


def test_scores_are_of_these_weights_and_this_recipe() -> None:
    codec = load_codec(FOLDER)
    scores = json.loads((FOLDER / "scores.json").read_text())
    trained = json.loads((FOLDER / "training.json").read_text())
    assert scores["codec_fingerprint"] == trained["fingerprint"] == codec.fingerprint
    weights = FOLDER / WEIGHTS_FILE
    assert weights.stat().st_size <= 6_000_000
    assert trained["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert trained["recipe_sha256"] == hashlib.sha256((ROOT / trained["recipe"]).read_bytes()).hexdigest()
    assert codec.codes_per_second == 40
    assert all(
        scores[kind][column]["words"] >= 200 for kind in ("natural", "codec") for column in ("seen", "new_words")
    )


def test_streamed_sound_is_the_whole_at_28_db_and_has_no_step_at_joins() -> None:
    codec, assets = load_codec(FOLDER), load_assets()
    noise = []
    for seed, voice in enumerate(("espeak_us", "flite_slt", "flite_rms")):
        rng = np.random.default_rng(seed)
        wave = torch.from_numpy(joined(rng, assets.words[voice][:12]))
        codes = codec.encode(wave[None])[0]
        whole = codec.decode(codes[None])[0]
        stream = StreamingDecoder(codec)
        parts = [stream.push(some) for some in codes.split(7)]
        streamed = torch.cat([*parts, stream.finish()])
        assert streamed.shape == whole.shape
        noise.append(float(10 * torch.log10(whole.square().sum() / (streamed - whole).square().sum())))
        steps = (streamed.diff() - whole.diff()).abs().max()
        assert float(steps) < 0.5 * float(whole.diff().abs().max())
    assert np.mean(noise) >= 28, noise
