"""Scenes of one to five objects from the quickstart's art, 64 x 64 px, with captions and the rule of what is held out.

    one     one object, 28 to 56 px, anywhere                        "cat"
    two     side by side or one over the other, 29 to 32 px          "cat left of dog", "cat above dog"
    many    two to five of a kind, 19 to 21 px, in cells of 3 x 3    "three cats"

A ``Scene`` is what a caption says; ``place`` draws where everything stands and on what background, ``paint`` makes the
picture. So an edit ("make the cat a dog") is the same placement painted with another object. One rule holds out a fifth of
what has two numbers, that of the quickstart (``is_held_out``): ordered pairs of a scene of two, (object, count) of many,
(old, new) of an edit. Single objects have no second number: their held-out pictures are new placements alone. Every draw
comes from the generator that is handed in. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from examples.quickstart import media
from examples.quickstart.assets import load_assets
from examples.quickstart.compose import ENGLISH_RELATIONS, is_held_out

SIZE_PX = media.TILE_PX
NUM_OBJECTS = 64
KINDS = ("one", "two", "many")
RELATIONS = ("left", "above")
COUNTS = (2, 3, 4, 5)
NUMBERS = ("zero", "one", "two", "three", "four", "five")
CELLS = 3
"""A side of the grid that many objects stand in."""
UNCOUNTED = ("fish", "cherries", "scissors")
"""Their plural is the word."""

Kind = Literal["one", "two", "many"]


@dataclass(frozen=True)
class Scene:
    """What a caption says. ``objects`` are numbers of concepts: two of a scene of two (left or upper first), else one."""

    kind: Kind
    objects: tuple[int, ...]
    relation: str = ""
    count: int = 1

    @property
    def caption(self) -> str:
        """In English."""
        words = load_assets().english
        if self.kind == "two":
            first, second = self.objects
            return f"{words[first]} {ENGLISH_RELATIONS[self.relation]} {words[second]}"
        return words[self.objects[0]] if self.count == 1 else f"{NUMBERS[self.count]} {plural(words[self.objects[0]])}"

    @property
    def held_out(self) -> bool:
        """Whether the rule keeps it out of training; a single object never is."""
        if self.kind == "two":
            return is_held_out(*self.objects)
        return self.kind == "many" and is_held_out(self.objects[0], self.count)

    def with_object(self, old: int, new: int) -> Scene:
        """The same scene with another object in the place of ``old``."""
        return replace(self, objects=tuple(new if one == old else one for one in self.objects))


@dataclass(frozen=True)
class Placed:
    """Where everything of a scene stands: an object's number, width and upper left corner; and the background."""

    objects: tuple[tuple[int, int, int, int], ...]
    background: Image.Image

    def with_object(self, old: int, new: int) -> Placed:
        """Another object at the very place of ``old``."""
        return replace(self, objects=tuple((new if o == old else o, *rest) for o, *rest in self.objects))

    def mask(self, wanted: int) -> np.ndarray:
        """[64, 64] bool: the squares in which an object stands."""
        inside = np.zeros((SIZE_PX, SIZE_PX), dtype=bool)
        for concept, size, x, y in self.objects:
            if concept == wanted:
                inside[y : y + size, x : x + size] = True
        return inside


def plural(word: str) -> str:
    """`cats`, `buses`, `tomatoes`, `cherries`."""
    if word in UNCOUNTED:
        return word
    return word + ("es" if word.endswith(("s", "ch", "o")) and word != "piano" else "s")


def draw_scene(
    rng: np.random.Generator, *, held_out: bool, kinds: tuple[Kind, ...] = KINDS, num_objects: int = NUM_OBJECTS
) -> Scene:
    """A scene on a side of the rule; all ``kinds`` equally often. A single object is on both sides."""
    kind = kinds[int(rng.integers(len(kinds)))]
    if kind == "one":
        return Scene("one", (int(rng.integers(num_objects)),))
    while True:
        if kind == "two":
            first, second = (int(one) for one in rng.integers(num_objects, size=2))
            scene = Scene("two", (first, second), RELATIONS[int(rng.integers(2))], count=2)
        else:
            scene = Scene("many", (int(rng.integers(num_objects)),), count=COUNTS[int(rng.integers(len(COUNTS)))])
        if len(set(scene.objects)) == len(scene.objects) and scene.held_out == held_out:
            return scene


def place(rng: np.random.Generator, scene: Scene) -> Placed:
    """Sizes, places and background of a scene."""
    background = media.gradient(rng)
    return Placed({"one": _one, "two": _two, "many": _many}[scene.kind](rng, scene), background)


def _one(rng: np.random.Generator, scene: Scene) -> tuple[tuple[int, int, int, int], ...]:
    size = int(rng.integers(28, 57))
    x, y = (int(one) for one in rng.integers(0, SIZE_PX - size + 1, size=2))
    return ((scene.objects[0], size, x, y),)


def _two(rng: np.random.Generator, scene: Scene) -> tuple[tuple[int, int, int, int], ...]:
    level = int(rng.integers(4, 29))  # of both across the relation, to 4 px: never diagonal
    placed = []
    for order, concept in enumerate(scene.objects):
        size = int(rng.integers(29, 33))
        along, across = order * 32 + int(rng.integers(0, 33 - size)), level + int(rng.integers(-4, 5))
        placed.append((concept, size, *((along, across) if scene.relation == "left" else (across, along))))
    return tuple(placed)


def _many(rng: np.random.Generator, scene: Scene) -> tuple[tuple[int, int, int, int], ...]:
    cells = rng.choice(CELLS * CELLS, size=scene.count, replace=False)
    placed = []
    for cell in sorted(int(one) for one in cells):
        size = int(rng.integers(19, 22))
        row, column = divmod(cell, CELLS)
        x, y = (one * SIZE_PX // CELLS + int(rng.integers(0, 22 - size)) for one in (column, row))
        placed.append((scene.objects[0], size, x, y))
    return tuple(placed)


def paint(placed: Placed, style: str = "noto") -> Image.Image:
    """The picture, RGB, 64 x 64."""
    canvas, art = placed.background.copy(), load_assets().pictures[style]
    for concept, size, x, y in placed.objects:
        media.paste(canvas, art[concept], size, x, y)
    return canvas


def pixels(rng: np.random.Generator, *, held_out: bool, kinds: tuple[Kind, ...] = KINDS) -> tuple[Scene, np.ndarray]:
    """A scene and its picture [3, 64, 64] uint8: what networks are trained on."""
    scene = draw_scene(rng, held_out=held_out, kinds=kinds)
    return scene, np.asarray(paint(place(rng, scene))).transpose(2, 0, 1)
