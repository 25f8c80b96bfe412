"""What the judge and the contrastive pair share: convolutions, training on scenes drawn as they are needed, assets.

An asset is a folder with ``NAME.safetensors`` (fp16), ``NAME.json`` (what it was made with, its hash, what it reaches) and
``log.jsonl``. Scenes of training are drawn from generators seeded by (entropy of the network, step, place in the batch), on
the training side of the rule: the judge's and the pair's are never the same.
"""

import hashlib
import json
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.draw.scenes import Scene, pixels

ASSETS = Path(__file__).parent / "assets"


class Convolutions(nn.Module):
    """[B, 3, 64, 64] in [0, 1] -> [B, width, 4, 4]: each step halves the side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [3, width // 4, width // 2, width, width]
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(sizes))
        self.same = nn.ModuleList(nn.Conv2d(b, b, 3, 1, 1) for b in sizes[1:])
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in sizes[1:])

    def forward(self, picture: Tensor) -> Tensor:
        """See the class."""
        hidden = picture * 2 - 1
        for down, same, norm in zip(self.down, self.same, self.norms):
            hidden = F.silu(norm(down(hidden)))
            if hidden.shape[-1] < picture.shape[-1] // 2:  # at 32 x 32 it would cost as much as all others
                hidden = hidden + F.silu(same(hidden))
        return hidden


def scenes_of(entropy: int, step: int, count: int, *, held_out: bool = False) -> tuple[list[Scene], Tensor]:
    """Scenes of a step and their pictures [count, 3, 64, 64] in [0, 1]."""
    drawn = [pixels(np.random.default_rng([entropy, step, place]), held_out=held_out) for place in range(count)]
    return [scene for scene, _ in drawn], torch.from_numpy(np.stack([one for _, one in drawn])).float() / 255


def train(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    log: Callable[[dict[str, Any]], None],
    every: int = 50,
) -> float:
    """AdamW with a warm-up of 5 % and a cosine to nothing; seconds it took."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    began, warm = time.perf_counter(), max(1, steps // 20)
    for step in range(steps):
        rate = min(1.0, (step + 1) / warm) * 0.5 * (1 + np.cos(np.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * float(rate)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % every == 0 or step == steps - 1:
            row = {"step": step, "loss": round(loss.item(), 4), "seconds": round(time.perf_counter() - began, 1)}
            log(row)
    return round(time.perf_counter() - began, 1)


class Log:
    """Rows of training: printed, and kept for the asset."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def __call__(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def save(model: nn.Module, folder: Path, facts: dict[str, Any], log: Log) -> None:
    """Write an asset; the folder's name is its name."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{folder.name}.safetensors"
    save_file({name: one.detach().half().contiguous() for name, one in model.state_dict().items()}, weights)
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    facts = facts | {"torch": torch.__version__, "commit": found, "sha256": sha256(weights)}
    (folder / f"{folder.name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log.rows), encoding="utf-8")


def load[Model: nn.Module](make: Callable[[int], Model], folder: Path) -> Model:
    """Read an asset, in fp32; ``make`` takes its width. ValueError where the weights are not those of its JSON."""
    facts = json.loads((folder / f"{folder.name}.json").read_text(encoding="utf-8"))
    weights = folder / f"{folder.name}.safetensors"
    if sha256(weights) != facts["sha256"]:
        raise ValueError(f"{weights}: not the file of {folder.name}.json; take both from one commit")
    model = make(facts["width"])
    model.load_state_dict({name: one.float() for name, one in load_file(weights).items()})
    return model.eval().requires_grad_(False)


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
