"""What the codec of pictures loses, and how smooth its latents are:

    python -m examples.draw.score_codec --codec examples/draw/assets/vae --data runs/picture_codec/data --out scores.json

Sets are those of codec_data.py that no codec is trained on, ``held_out`` and ``other_art``, and the first 100 of ``damaged``, which
it was. ``psnr`` and ``ssim`` are means over pictures. ``noisy``: PSNR where normal noise of so large a deviation is on the latents.
``grid``: the mean step between neighbouring pixels across the borders of the latent's places over that inside them, of decoded
pictures and of the scenes themselves, which are not at 1. ``latents``: mean square of all, and mean and deviation of each channel.
The judge's accuracy through the codec is measured by ``make draw``.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from examples.draw.scoring import grid
from megatron_omni.evaluation.pictures import psnr, ssim
from megatron_omni.models.generators.vae import PictureCodec, load_picture_codec
from megatron_omni.platform.seeds import named_generator

SETS = {"held_out": 300, "other_art": 100, "damaged": 100}
NOISE = (0.1, 0.2, 0.3)


def main(arguments: list[str] | None = None) -> None:
    """Score and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    result = scores(load_picture_codec(options.codec), options.data)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def scores(codec: PictureCodec, data: Path) -> dict[str, Any]:
    """See the module."""
    result: dict[str, Any] = {"fingerprint": codec.fingerprint}
    for name, count in SETS.items():
        pictures = read(data / f"{name}.jsonl", count)
        latents = codec.encode(pictures)
        made = codec.decode(latents)
        result[name] = {
            "pictures": len(pictures),
            "pixels_sha256": hashlib.sha256(pictures.numpy().tobytes()).hexdigest(),
            "psnr": mean(psnr(made, pictures)),
            "ssim": mean(ssim(made, pictures)),
        }
        if name == "held_out":
            result[name]["noisy"] = {
                str(size): mean(psnr(codec.decode(latents + size * noise(latents)), pictures)) for size in NOISE
            }
            sides = [[*one.numpy()] for one in (made, pictures)]
            result[name]["grid"], result[name]["grid_of_scenes"] = (grid(one, codec.downsampling) for one in sides)
            spread, middle = latents.std(dim=(0, 2, 3)), latents.mean(dim=(0, 2, 3))
            result["latents"] = {
                "shape": [*latents.shape[1:]],
                "mean_square": mean(latents.square()),
                "channel_mean": [round(value, 3) for value in middle.tolist()],
                "channel_deviation": [round(value, 3) for value in spread.tolist()],
            }
    return result


def read(rows: Path, count: int) -> Tensor:
    """The first ``count`` pictures, [n, 3, 64, 64] uint8."""
    files = [json.loads(line)["images"][0] for line in rows.read_text(encoding="utf-8").splitlines()[:count]]
    return torch.stack([torch.from_numpy(np.array(Image.open(rows.parent / file))).permute(2, 0, 1) for file in files])


def noise(latents: Tensor) -> Tensor:
    """N(0, 1), the same for the same shape."""
    return torch.randn(latents.shape, generator=named_generator(0, "noise"))


def mean(values: Tensor) -> float:
    """Of all, for people."""
    return round(float(values.double().mean()), 4)


if __name__ == "__main__":
    main()
