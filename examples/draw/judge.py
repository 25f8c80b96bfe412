"""The judge: a classifier of scenes, what, where and how many, that never sees a drawn picture.

    python -m examples.draw.judge [--steps 2600] [--out examples/draw/assets/judge]

trains it on scenes of its own on the training side of the rule (half of the pictures a little blurred or noisy, as codecs
make them) and writes the asset with its accuracy on held-out scenes. Four heads on convolutions: the arrangement (one, left,
above, many), the first object, the second (of two), the count (of many). ``right`` is all that a scene says. Guessing one
object of 64 is right in 0.016.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.draw.nets import ASSETS, Convolutions, Log, load, save, scenes_of, train
from examples.draw.scenes import COUNTS, KINDS, NUM_OBJECTS, RELATIONS, Scene

FOLDER = ASSETS / "judge"
ARRANGEMENTS = ("one", *RELATIONS, "many")
WIDTH, HIDDEN = 128, 256
ENTROPY, TEST_ENTROPY = 41, 42
BATCH = 64
CHUNK = 100


@dataclass(frozen=True)
class Verdict:
    """What the judge sees. ``second`` counts where the arrangement is left or above, ``count`` where it is many."""

    arrangement: str
    first: int
    second: int
    count: int

    def right(self, scene: Scene) -> bool:
        """Whether it is all of the scene."""
        if self.arrangement != arrangement(scene) or self.first != scene.objects[0]:
            return False
        if scene.kind == "two":
            return self.second == scene.objects[1]
        return scene.kind == "one" or self.count == scene.count

    def at(self, slot: int) -> int:
        """The first or the second object."""
        return (self.first, self.second)[slot]


def arrangement(scene: Scene) -> str:
    """One of ``ARRANGEMENTS``."""
    return scene.relation if scene.kind == "two" else scene.kind


class Judge(nn.Module):
    """[B, 3, 64, 64] in [0, 1] -> logits of the four heads."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.see = Convolutions(width)
        self.hidden = nn.Linear(16 * width, HIDDEN)
        self.heads = nn.Linear(HIDDEN, len(ARRANGEMENTS) + 2 * NUM_OBJECTS + len(COUNTS))

    def features(self, pictures: Tensor) -> Tensor:
        """[B, 256]: of the Frechet distance "FD (judge)"."""
        return F.silu(self.hidden(self.see(pictures).flatten(1)))

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Arrangement [B, 4], first [B, 64], second [B, 64], count [B, 4]."""
        sizes = (len(ARRANGEMENTS), NUM_OBJECTS, NUM_OBJECTS, len(COUNTS))
        return self.heads(self.features(pictures)).split(sizes, dim=1)


def loss(judge: Judge, scenes: Sequence[Scene], pictures: Tensor) -> Tensor:
    """Sum of the cross entropies of the heads that count."""
    found = judge(pictures)
    two = [number for number, scene in enumerate(scenes) if scene.kind == "two"]
    many = [number for number, scene in enumerate(scenes) if scene.kind == "many"]
    total = F.cross_entropy(found[0], torch.tensor([ARRANGEMENTS.index(arrangement(one)) for one in scenes]))
    total = total + F.cross_entropy(found[1], torch.tensor([one.objects[0] for one in scenes]))
    if two:
        total = total + F.cross_entropy(found[2][two], torch.tensor([scenes[n].objects[1] for n in two]))
    if many:
        total = total + F.cross_entropy(found[3][many], torch.tensor([COUNTS.index(scenes[n].count) for n in many]))
    return total


@torch.no_grad()
def verdicts(judge: Judge, pictures: Tensor) -> list[Verdict]:
    """Of pictures [N, 3, 64, 64] uint8."""
    made = []
    for some in pictures.split(CHUNK):
        for what, first, second, count in zip(*(one.argmax(1).tolist() for one in judge(some.float() / 255))):
            made.append(Verdict(ARRANGEMENTS[what], first, second, COUNTS[count]))
    return made


@torch.no_grad()
def features(judge: Judge, pictures: Tensor) -> Tensor:
    """[N, 256] of pictures [N, 3, 64, 64] uint8."""
    return torch.cat([judge.features(some.float() / 255) for some in pictures.split(CHUNK)])


def load_judge(folder: Path = FOLDER) -> Judge:
    """The asset."""
    return load(Judge, folder)


def roughened(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures: a little blurred, or a little noise."""
    count = len(pictures)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(count, 1, 1, 1, generator=generator) * (torch.rand(count, 1, 1, 1, generator=generator) < 0.5)
    sigma = 0.04 * torch.rand(count, 1, 1, 1, generator=generator)
    sigma = sigma * (torch.rand(count, 1, 1, 1, generator=generator) < 0.5)
    rough = pictures + share * (blurred - pictures) + sigma * torch.randn(pictures.shape, generator=generator)
    return rough.clamp(0, 1)


def accuracy(judge: Judge, *, count: int, entropy: int = TEST_ENTROPY) -> dict[str, float]:
    """Share of held-out scenes of each kind that are right in all."""
    scenes, pictures = scenes_of(entropy, 0, count, held_out=True)
    found = verdicts(judge, (pictures * 255).round().to(torch.uint8))
    right = {kind: [v.right(s) for v, s in zip(found, scenes) if s.kind == kind] for kind in KINDS}
    everything = [one for some in right.values() for one in some]
    return {"all": round(sum(everything) / count, 4)} | {k: round(sum(v) / len(v), 4) for k, v in right.items()}


def main() -> None:
    """Train and write the asset."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--test", type=int, default=1500, help="held-out scenes to test on")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(ENTROPY)
    judge, log, generator = Judge(), Log(), torch.Generator().manual_seed(ENTROPY)
    began = time.process_time()

    def loss_of(step: int) -> Tensor:
        scenes, pictures = scenes_of(ENTROPY, step, BATCH)
        return loss(judge, scenes, roughened(pictures, generator))

    seconds = train(judge, loss_of, steps=options.steps, lr=options.lr, log=log)
    facts = {
        "what": "judge of scenes (examples/draw/judge.py)", "width": WIDTH, "steps": options.steps, "batch": BATCH,
        "lr": options.lr, "seed": ENTROPY, "seconds": seconds, "cpu_seconds": round(time.process_time() - began, 1),
        "held_out": accuracy(judge.eval(), count=options.test), "chance": round(1 / NUM_OBJECTS, 4),
    }  # fmt: skip
    print(facts["held_out"])
    save(judge, options.out, facts, log)


if __name__ == "__main__":
    main()
