"""Scenes of ``make draw``: what is held out, what stands where, and edits that change nothing else."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # examples/ is not installed

from examples.draw import scenes
from examples.draw.scenes import Scene
from examples.quickstart.assets import load_assets


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng([1, *seed])


def test_captions_and_the_rule() -> None:
    assert Scene("one", (0,)).caption == "cat"
    assert Scene("two", (0, 1), "above", 2).caption == "cat above dog"
    assert Scene("many", (0,), count=3).caption == "three cats"
    assert [scenes.plural(one) for one in ("bus", "church", "tomato", "piano", "fish")] == [
        "buses", "churches", "tomatoes", "pianos", "fish"
    ]  # fmt: skip
    # (7919 a + 104729 b) % 5 = (4 a + 4 b) % 5: held out where a + b is a multiple of 5
    assert Scene("two", (2, 3), "left", 2).held_out and not Scene("two", (2, 4), "left", 2).held_out
    assert Scene("many", (3,), count=2).held_out and not Scene("many", (3,), count=3).held_out


@pytest.mark.parametrize("held_out", [False, True])
def test_draws_are_on_their_side_and_of_all_kinds(held_out: bool) -> None:
    drawn = [scenes.draw_scene(rng(n), held_out=held_out) for n in range(300)]
    assert all(one.held_out == held_out for one in drawn if one.kind != "one")
    assert all(70 < sum(one.kind == kind for one in drawn) < 130 for kind in scenes.KINDS)
    captions = {one.caption for one in drawn if one.kind != "one"}
    others = {scenes.draw_scene(rng(9, n), held_out=not held_out).caption for n in range(300)}
    assert not captions & others


def test_objects_stand_where_the_caption_says() -> None:
    for n in range(200):
        generator = rng(2, n)
        scene = scenes.draw_scene(generator, held_out=False)
        placed = scenes.place(generator, scene)
        assert len(placed.objects) == scene.count
        taken = np.zeros((64, 64), dtype=int)
        for _, size, x, y in placed.objects:
            assert 0 <= x <= 64 - size and 0 <= y <= 64 - size
            taken[y : y + size, x : x + size] += 1
        assert taken.max() == 1  # none covers another
        if scene.kind == "two":
            (first, size, x, y), (second, _, other_x, other_y) = placed.objects
            assert (first, second) == scene.objects
            assert (x + size <= other_x) if scene.relation == "left" else (y + size <= other_y)


def test_an_edit_changes_one_place_alone() -> None:
    cat, dog, bus = (load_assets().english.index(one) for one in ("cat", "dog", "bus"))
    scene = Scene("two", (cat, bus), "left", 2)
    placed = scenes.place(rng(3), scene)
    before, after = (np.asarray(scenes.paint(one)) for one in (placed, placed.with_object(cat, dog)))
    changed = (before != after).any(axis=2)
    assert changed.any() and not changed[~placed.mask(cat)].any()
    assert scene.with_object(cat, dog).caption == "dog left of bus"
    again = np.asarray(scenes.paint(scenes.place(rng(3), scene)))
    assert (again == before).all()
