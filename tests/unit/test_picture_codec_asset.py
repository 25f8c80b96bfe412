"""The codec of make draw: whole, small, what its files say of it is of these weights, and as good as they say."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from examples.draw.codec_data import damaged, edges, scene, write
from examples.draw.score_codec import SETS, read
from examples.draw.scoring import grid
from megatron_omni.config.load import load_recipe
from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.evaluation.pictures import psnr
from megatron_omni.models.generators.vae import WEIGHTS_FILE, load_picture_codec

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "draw" / "assets" / "vae"


def test_scores_are_of_these_weights_and_this_recipe() -> None:
    codec = load_picture_codec(FOLDER)
    scores, trained = (json.loads((FOLDER / name).read_text()) for name in ("scores.json", "training.json"))
    assert scores["fingerprint"] == trained["fingerprint"] == codec.fingerprint
    weights = FOLDER / WEIGHTS_FILE
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 3_000_000
    assert trained["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert trained["recipe_sha256"] == hashlib.sha256((ROOT / trained["recipe"]).read_bytes()).hexdigest()
    assert scores["held_out"]["psnr"] >= 28 and scores["held_out"]["pictures"] == SETS["held_out"]
    last = json.loads((FOLDER / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == trained["steps"]


def test_the_recipes_of_make_draw_fit_it() -> None:
    codec = load_picture_codec(FOLDER)
    recipes = [load_recipe(path) for path in sorted((ROOT / "recipes" / "tiny" / "draw").glob("*.yaml"))]
    images = [recipe.model.image for recipe in recipes]
    assert images and all(isinstance(image, ImageGeneratorConfig) for image in images)
    for image in images:
        assert image is not None
        codec.check(image)


def test_held_out_scenes_come_back(tmp_path: Path) -> None:
    codec = load_picture_codec(FOLDER)
    write(tmp_path, seed=1, sizes={"train": 0, "damaged": 0, "held_out": 40})
    pictures = read(tmp_path / "held_out.jsonl", 40)
    latents = codec.encode(pictures)
    made = codec.decode(latents)
    assert float(psnr(made, pictures).mean()) >= 28
    assert 0.3 < float(latents.square().mean()) < 1.5
    noise = 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert float(psnr(codec.decode(latents + noise), pictures).mean()) >= 26.5
    sides = [[*one.numpy()] for one in (made, pictures)]
    assert grid(sides[0], codec.downsampling) <= 1.1 and grid(sides[0], codec.downsampling) <= grid(
        sides[1], codec.downsampling
    )


def test_scenes_are_the_same_again_and_edges_are_where_grey_changes() -> None:
    for held_out in (False, True):
        first, again = (scene(np.random.default_rng([0, held_out]), held_out=held_out) for _ in range(2))
        assert first.shape == (64, 64, 3) and np.array_equal(first, again)
    whole = scene(np.random.default_rng(5))
    kinds = {damaged(np.random.default_rng(seed), whole).tobytes() for seed in range(12)}
    assert len(kinds) >= 8 and whole.tobytes() not in kinds
    flat = np.zeros((64, 64, 3), np.float32)
    flat[:, 32:] = 255
    found = edges(flat)
    assert set(np.unique(found)) == {0.0, 255.0} and np.argwhere(found.any(axis=0)).ravel().tolist() == [31, 32]
