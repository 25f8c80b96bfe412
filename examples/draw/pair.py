"""The text-picture pair: a small contrastive pair of encoders, the teachers of ``make draw``.

    python -m examples.draw.pair [--steps 800] [--out examples/draw/assets/pair]

A text encoder (words, two transformer layers) and a picture encoder (convolutions) learn to tell which caption belongs to
which picture: the softmax over the batch of cosines times a learned scale, in both directions; equal captions share the
target. Scenes are on the training side of the rule and are not the judge's; a quarter of the texts are instructions of an
edit, whose picture is the edited one. As CLIP and Gemma are the teachers of the released model, so

    caption   rows of the text encoder    [ROWS, 128] and how many of them are words
    task      pooled text                 [3, 64]: of the instruction, and twice of the empty text (the other branches)
    visual    rows of the picture encoder [16, 64]: 4 x 4 places

Words it does not know are one word. ``main`` writes the asset with how often a held-out caption is found among 100.
"""

import argparse
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.draw.nets import ASSETS, Convolutions, Log, load, save, scenes_of, train
from examples.draw.scenes import NUM_OBJECTS, NUMBERS, draw_scene, is_held_out, paint, place, plural
from examples.quickstart.assets import load_assets

FOLDER = ASSETS / "pair"
WIDTH = 128
CAPTION_SIZE, TASK_SIZE, VISUAL_SIZE = 128, 64, 64
ROWS, PLACES = 8, 16
ENTROPY, TEST_ENTROPY = 51, 52
BATCH = 64
AMONG = 100
EDITS = 4
"""One text of so many is an instruction."""
FUNCTION_WORDS = ("left", "of", "above", "make", "the", "a", "remove", "noise", "blur", "rain", "fill", "hole", "edges", "to",
                  "picture", "draw")  # fmt: skip


@cache
def vocabulary() -> dict[str, int]:
    """Word -> number; 0 is no word, 1 an unknown one."""
    names = load_assets().english
    words = dict.fromkeys([*names, *(plural(one) for one in names), *NUMBERS, *FUNCTION_WORDS])
    return {word: number for number, word in enumerate(words, start=2)}


def encode(texts: Sequence[str]) -> Tensor:
    """[B, ROWS] word numbers; what is longer is cut."""
    rows = torch.zeros(len(texts), ROWS, dtype=torch.long)
    for row, text in zip(rows, texts):
        words = text.split()[:ROWS]
        row[: len(words)] = torch.tensor([vocabulary().get(word, 1) for word in words], dtype=torch.long)
    return rows


def edit_instruction(old: int, new: int) -> str:
    """`make the cat a dog`."""
    names = load_assets().english
    return f"make the {names[old]} a {names[new]}"


class Pair(nn.Module):
    """Both encoders."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.words = nn.Embedding(len(vocabulary()) + 2, width)
        self.places = nn.Parameter(torch.randn(ROWS, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.read = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.caption = nn.Linear(width, CAPTION_SIZE)
        self.task = nn.Linear(width, TASK_SIZE)
        self.see = Convolutions(width)
        self.visual = nn.Conv2d(width, VISUAL_SIZE, 1)
        self.picture = nn.Linear(VISUAL_SIZE * PLACES, TASK_SIZE)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def text(self, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [B, ROWS, 128], which of them are words [B, ROWS], pooled [B, 64]; no word at all pools its first row."""
        real = words > 0
        seen = real.clone()
        seen[:, 0] |= ~real.any(1)
        hidden = self.read(self.words(words) + self.places, src_key_padding_mask=~seen)
        share = seen.unsqueeze(2) / seen.sum(1)[:, None, None]
        return self.caption(hidden), real, self.task((hidden * share).sum(1))

    def pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, 64, 64] in [0, 1] -> rows [B, 16, 64], row by row, and pooled [B, 64]."""
        rows = self.visual(self.see(pictures)).flatten(2).transpose(1, 2)
        return rows, self.picture(rows.flatten(1))


def contrast(texts: Sequence[str], written: Tensor, seen: Tensor, scale: Tensor) -> Tensor:
    """Mean of both directions' cross entropies; equal texts share the target."""
    cosines = F.normalize(written, dim=1) @ F.normalize(seen, dim=1).T * scale.exp()
    same = torch.tensor([[float(one == other) for other in texts] for one in texts])
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(cosines, target) + F.cross_entropy(cosines.T, target)) / 2


def batch_of(step: int) -> tuple[list[str], Tensor]:
    """Texts and pictures of a step: captions, and instructions with the edited picture."""
    count = BATCH - BATCH // EDITS
    scenes, pictures = scenes_of(ENTROPY, step, count)
    texts, edited = [scene.caption for scene in scenes], []
    for number in range(count, BATCH):
        rng = np.random.default_rng([ENTROPY, step, number])
        scene = draw_scene(rng, held_out=False, kinds=("one", "two"))
        old = scene.objects[int(rng.integers(len(scene.objects)))]
        new = int(rng.integers(NUM_OBJECTS))
        while new in scene.objects or is_held_out(old, new) or scene.with_object(old, new).held_out:
            new = int(rng.integers(NUM_OBJECTS))
        texts.append(edit_instruction(old, new))
        edited.append(np.asarray(paint(place(rng, scene).with_object(old, new))).transpose(2, 0, 1))
    return texts, torch.cat([pictures, torch.from_numpy(np.stack(edited)).float() / 255])


def load_pair(folder: Path = FOLDER) -> Pair:
    """The asset."""
    return load(Pair, folder)


@torch.no_grad()
def taught_texts(pair: Pair, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Caption rows [N, ROWS, 128], their mask [N, ROWS] and pooled text [N, 64] of texts."""
    rows, real, pooled = pair.text(encode(texts))
    return rows.numpy(), real.numpy(), pooled.numpy()


@torch.no_grad()
def taught_pictures(pair: Pair, pictures: np.ndarray) -> np.ndarray:
    """Visual rows [N, 16, 64] of pictures [N, 3, 64, 64] uint8."""
    return pair.pictures(torch.from_numpy(pictures).float() / 255)[0].numpy()


@torch.no_grad()
def found(pair: Pair, *, count: int = AMONG, rounds: int = 5) -> float:
    """How often a held-out picture's own caption (or an equal one) is the nearest among ``count``."""
    right = 0
    for number in range(rounds):
        scenes, pictures = scenes_of(TEST_ENTROPY, number, count, held_out=True)
        texts = [scene.caption for scene in scenes]
        written, seen = pair.text(encode(texts))[2], pair.pictures(pictures)[1]
        nearest = (F.normalize(seen, dim=1) @ F.normalize(written, dim=1).T).argmax(1).tolist()
        right += sum(texts[n] == text for n, text in zip(nearest, texts))
    return round(right / (count * rounds), 4)


def main() -> None:
    """Train and write the asset."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(ENTROPY)
    pair, log = Pair(), Log()
    began = time.process_time()

    def loss_of(step: int) -> Tensor:
        texts, pictures = batch_of(step)
        return contrast(texts, pair.text(encode(texts))[2], pair.pictures(pictures)[1], pair.scale)

    seconds = train(pair, loss_of, steps=options.steps, lr=options.lr, log=log)
    facts = {
        "what": "text-picture pair (examples/draw/pair.py)", "width": WIDTH, "steps": options.steps, "batch": BATCH,
        "lr": options.lr, "seed": ENTROPY, "seconds": seconds, "cpu_seconds": round(time.process_time() - began, 1),
        "held_out_found_among_100": found(pair.eval()),
    }  # fmt: skip
    print(facts["held_out_found_among_100"])
    save(pair, options.out, facts, log)


if __name__ == "__main__":
    main()
