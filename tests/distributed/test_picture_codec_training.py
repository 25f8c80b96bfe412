"""A codec of pictures in the training loop: it learns, goes on bit by bit where it was stopped, and becomes a folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_omni.checkpoint.codec_folders import convert_codec
from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.run import Recipe
from megatron_omni.models.generators.vae import load_picture_codec
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.tasks.choice import task_of
from megatron_omni.training import loop
from megatron_omni.training.setup import setup
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_run import records


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng, rows = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for number in range(9):
        ramp = np.linspace(0, 1, 16)[:, None, None] * rng.uniform(0, 200, 3) + rng.uniform(0, 50, 3)
        values = np.broadcast_to(ramp, (16, 16, 3)).copy()
        values[4:9, 3:11] = rng.uniform(0, 255, 3)
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{number}.png")
        rows.append({"messages": [{"role": "user", "content": "<image>"}], "images": [f"{number}.png"]})
    for name, part in (("pictures", rows[:6]), ("held_out", rows[6:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def recipe(pictures: Path, run_dir: Path, *, steps: int, micro: int = 2, **optim: Any) -> Recipe:
    codec = {"latent_channels": 4, "channels": [8, 16], "encoder_blocks": [0, 1], "decoder_blocks": [0, 1]}
    source = {"name": "pictures", "path": str(pictures / "pictures.jsonl")}
    return recipe_from_dict(
        {
            "task": "picture_codec",
            "seed": 3,
            "run_dir": str(run_dir),
            "train_iters": steps,
            "load": "auto",
            "model": {"moe": None, "vision": None, "audio": None, "picture_codec": codec | {"pixel_channels": 8}},
            "data": {
                "micro_batch_size": micro,
                "global_batch_size": 4,
                "sources": [source],
                "eval_sources": [{"name": "held_out", "path": str(pictures / "held_out.jsonl"), "epochs": 1}],
            },
            "picture_codec": {"crop_size": 16, "edge_weight": 0.5, "latent_noise": 0.2},
            "optim": {"lr": 3e-3, "lr_decay_style": "constant", "precision": "fp32", **optim},
            "checkpoint": {"save_interval": 0},
            "log": {"interval": 1, "eval_interval": steps, "eval_iters": 1, "tensorboard": False},
        }
    )


def train(rank: Rank, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Train on this rank; the weights."""
    run = setup(recipe, task_of(recipe), pg=rank.initialize(recipe.parallel))
    assert loop.train(run) == 0
    return {name: value.clone() for name, value in unwrap_model(run.model).state_dict().items() if value is not None}


def losses(recipe: Recipe, name: str = "picture codec loss") -> list[float]:
    return [line[name] for line in records(recipe) if name in line]


def test_it_learns_and_a_run_that_was_stopped_has_the_same_bits(pictures: Path, tmp_path: Path) -> None:
    (whole,) = run_ranks(train, 1, recipe(pictures, tmp_path / "whole", steps=40))
    run_ranks(train, 1, recipe(pictures, tmp_path / "parts", steps=15))
    (parts,) = run_ranks(train, 1, recipe(pictures, tmp_path / "parts", steps=40))
    assert whole.keys() == parts.keys() and all(name.startswith("picture_codec.") for name in whole)
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name
    found = losses(recipe(pictures, tmp_path / "whole", steps=40))
    assert np.mean(found[-5:]) < 0.3 * found[0]
    (said,) = convert_codec(tmp_path / "whole", tmp_path / "folder", dtype="fp32")
    codec = load_picture_codec(tmp_path / "folder")
    assert codec.fingerprint in said
    assert all(torch.equal(value, whole[f"picture_codec.{name}"]) for name, value in codec.state_dict().items())
    # The held-out figure is that of the folder, without noise.
    files = [pictures / f"{number}.png" for number in (6, 7, 8)]
    given = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])
    error = (codec.decode(codec.encode(given)).double() - given).square().mean(dim=(1, 2, 3)) / 255**2
    (measured,) = losses(recipe(pictures, tmp_path / "whole", steps=40), "eval/picture codec/psnr/held_out")
    assert float((-10 * error.log10()).mean()) == pytest.approx(measured, abs=0.05)
    (said,) = convert_codec(tmp_path / "whole", tmp_path / "unit", pictures=files)
    unit = load_picture_codec(tmp_path / "unit")
    assert f"latent_scale={unit.latent_scale:g}" in said and unit.fingerprint != codec.fingerprint
    assert float(unit.encode(given).square().mean()) == pytest.approx(1, abs=0.01)
    z = codec.encode(given).double()
    values, axes = np.linalg.eigh(np.cov(z.movedim(1, 3).reshape(-1, z.shape[1]).numpy().T, bias=True))
    root = axes * np.maximum(values, 1e-3 * values.max()) ** 0.5 @ axes.T
    expected = torch.einsum("ij,bjhw->bihw", torch.from_numpy(root), z) * unit.latent_scale
    assert torch.allclose(unit.encode(given).double(), expected, rtol=1e-4, atol=1e-4)
    apart = (unit.decode(unit.encode(given)).int() - codec.decode(codec.encode(given)).int()).abs()
    assert 0 < unit.config.smoothing < 0.5 and apart[..., 1::4, 1::4].max() <= 1 < apart.max()  # at borders alone
    with pytest.raises(ValueError, match="for a run that trained a codec of pictures"):
        list(convert_codec(tmp_path / "unit", tmp_path / "new", pictures=files))
    with pytest.raises(ValueError, match="which is local already"):
        list(convert_codec(tmp_path / "whole", tmp_path / "new", span=(3, 3), recordings=[Path("a")]))


@pytest.mark.parametrize("distributed", [False, True])
def test_the_layout_changes_nothing(pictures: Path, tmp_path: Path, distributed: bool) -> None:
    optim = {"use_distributed_optimizer": distributed}
    runs = {"alone": (1, 4), "halves": (1, 2), "together": (2, 1)}
    weights = {}
    for name, (ranks, micro) in runs.items():
        settings = recipe(pictures, tmp_path / name, steps=5, micro=micro, **optim)
        weights[name] = run_ranks(train, ranks, settings)[0]
        found = losses(settings)
        assert len(found) == 5 and found == pytest.approx(
            losses(recipe(pictures, tmp_path / "alone", steps=5)), rel=1e-4
        )
    for name, value in weights["alone"].items():
        assert all(torch.allclose(value, other[name], atol=2e-3) for other in weights.values()), name
