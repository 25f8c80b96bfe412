"""Crops of pictures for the codec: the same whoever reads them, refused where there is no single picture of enough pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import validate
from megatron_omni.data.picture_codec_crops import PictureLoader

SIZES = ((16, 16), (40, 20), (8, 60), (33, 17))
"""Width and height; the third is too small for a crop of 16."""


def recipe(folder: Path, **codec: Any) -> Recipe:
    rows, rng = [], np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        rows.append({"messages": [{"role": "user", "content": "<image>"}], "images": [f"{number}.png"]})
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe_from_dict(
        {
            "task": "picture_codec",
            "model": {"moe": None, "vision": None, "audio": None, "picture_codec": {"channels": [4, 8, 8]}},
            "data": {
                "sources": [{"name": "pictures", "path": str(folder / "pictures.jsonl")}],
                "micro_batch_size": 2,
                "global_batch_size": 4,
                "max_bad_fraction": 1.0,
            },
            "optim": {"precision": "fp32"},
            "picture_codec": {"crop_size": 16, **codec},
        }
    )


def crops(loader: PictureLoader, steps: int) -> dict[int, torch.Tensor]:
    found = {}
    for _ in range(steps):
        for batch in loader.next_step():
            assert batch.pixel_values is not None and batch.pixel_values.dtype == torch.uint8
            assert batch.num_label_tokens == batch.num_tokens == len(batch.pixel_values) == 2
            found |= dict(zip(batch.sample_ids[:, 0].tolist(), batch.pixel_values))
    return found


def places(picture: np.ndarray, crop: np.ndarray) -> list[tuple[int, int]]:
    """Where ``crop`` [3, s, s] is in ``picture`` [H, W, 3]."""
    side = crop.shape[1]
    tops, lefts = range(picture.shape[0] - side + 1), range(picture.shape[1] - side + 1)
    wanted = crop.transpose(1, 2, 0)
    return [(t, c) for t in tops for c in lefts if np.array_equal(picture[t : t + side, c : c + side], wanted)]


def test_crops_are_pieces_the_same_on_any_number_of_ranks_and_after_a_pause(tmp_path: Path) -> None:
    settings = recipe(tmp_path, mirror=True)
    alone = crops(PictureLoader(settings, data_rank=0, data_size=1), 6)
    halves = [crops(PictureLoader(settings, data_rank=rank, data_size=2), 6) for rank in range(2)]
    later = crops(PictureLoader(settings, data_rank=0, data_size=1, consumed_samples=20), 1)
    assert len(alone) == 24 and {**halves[0], **halves[1]}.keys() == alone.keys()
    for sample, crop in {**halves[0], **halves[1], **later}.items():
        assert crop.shape == (3, 16, 16) and torch.equal(crop, alone[sample])
    pictures = [np.asarray(Image.open(tmp_path / f"{number}.png")) for number in (0, 1, 3)]
    straight = [sum(len(places(p, crop.numpy())) for p in pictures) for crop in alone.values()]
    turned = [sum(len(places(p, crop.numpy()[..., ::-1])) for p in pictures) for crop in alone.values()]
    assert all(a + b == 1 for a, b in zip(straight, turned)) and 4 < sum(turned) < 20
    held_out = crops(PictureLoader(settings, data_rank=0, data_size=1, sources=settings.data.sources), 2)
    assert all(any(places(p, crop.numpy()) for p in pictures) for crop in held_out.values())  # none is mirrored


def test_small_pictures_and_several_are_skipped_and_counted(tmp_path: Path) -> None:
    settings = recipe(tmp_path)
    with (tmp_path / "pictures.jsonl").open("a") as file:
        row = {"messages": [{"role": "user", "content": "<image><image>"}], "images": ["0.png", "1.png"]}
        file.write(json.dumps(row) + "\n")
    loader = PictureLoader(settings, data_rank=0, data_size=1)
    crops(loader, 5)
    skips = loader.own_skips()
    assert set(skips) == {("pictures", "too_small"), ("pictures", "no_picture")} and min(skips.values()) >= 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "supervised"}, "model.picture_codec set: task=picture_codec trains a codec"),
        ({"picture_codec": {"crop_size": 20}}, "picture_codec.crop_size=20: a place of the latent stands for 8 pixels"),
        ({"picture_codec": {"square_weight": 0.0}}, "nothing would hold the colours"),
        ({"model": {"picture_codec": {"channels": [4, 8]}}}, "give one number for each of the 2 levels"),
        ({"model": {"vision": {}}}, "model.vision: no effect in a codec"),
        ({"optim": {"precision": "bf16"}}, "optim.precision=bf16"),
        ({"init_from": "runs/x"}, "init_from='runs/x'"),
        ({"data": {"packing": True}}, "data.packing=True: no effect with task=picture_codec"),
    ],
)
def test_settings_that_cannot_be_meant(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    values: dict[str, Any] = {
        "task": "picture_codec",
        "model": {"moe": None, "vision": None, "audio": None, "picture_codec": {"channels": [4, 8, 8]}},
        "optim": {"precision": "fp32"},
        "data": {},
        "picture_codec": {"crop_size": 16},
    }
    validate(recipe_from_dict(values), check_files=False)
    for name, value in change.items():
        if isinstance(value, dict):
            values[name] |= value
        else:
            values[name] = value
    with pytest.raises(ValueError, match=said):
        validate(recipe_from_dict(values), check_files=False)
