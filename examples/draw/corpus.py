"""Compose the corpus of ``make draw``: pictures, records of four families of tasks, what the teachers say of them.

    python -m examples.draw.corpus --out DIR [--fast] [--seed 0]

    DIR/train/draw.jsonl       scenes:  "draw cat left of dog" -> <generate>
    DIR/train/edit.jsonl       "<image> make the cat a dog" -> <generate>: the same placement, another object
    DIR/train/restore.jsonl    "<image> remove the noise" .. : damage made when a sample is built (``degrade``)
    DIR/train/edges.jsonl      "<image> edges to picture"
    DIR/train/think.jsonl      "draw what says meow" -> <think>cat</think><generate>, after the system turn ``think``
    DIR/train/teachers.*.safetensors   rows of the pair (pair.py): caption, task, visual
    DIR/eval/draw.jsonl        held-out scenes: half single, half of two
    DIR/eval/edit.jsonl, restore.jsonl, edges.jsonl   held out, sources as files, damage fixed (damage.py)
    DIR/eval/think.jsonl       held-out riddles with their thought; swapped.jsonl: with that of another; bare.jsonl: without
    DIR/manifest.json          counts

A row of evaluation says in ``scene`` what the judge should see. Every record is drawn from a generator seeded by (seed, set,
index). What is held out: scenes.py, clues.py.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples.draw import clues, damage
from examples.draw.pair import edit_instruction
from examples.draw.scenes import NUM_OBJECTS, Scene, draw_scene, paint, place
from examples.quickstart.compose import in_processes, is_held_out, png_bytes
from megatron_omni.data.degradations import edges
from megatron_omni.generation.text import THINK, THINK_END

SIZES = {
    "draw": 12000, "edit": 6000, "restore": 4000, "edges": 2000, "think": 3000,
    "eval/draw": 300, "eval/edit": 150, "eval/restore": 160, "eval/edges": 60, "eval/think": 300,
}  # fmt: skip
FAST_SIZES = {
    "draw": 48, "edit": 24, "restore": 16, "edges": 8, "think": 24,
    "eval/draw": 8, "eval/edit": 4, "eval/restore": 8, "eval/edges": 2, "eval/think": 8,
}  # fmt: skip
FIRST_ENTROPY = 40
"""Sets the draws apart from those of the other examples."""
CHUNK = 200
SYSTEM = "think"
TASKS = {"noise": "denoise", "blur": "deblur", "rain": "derain", "hole": "inpaint"}
INSTRUCTIONS = {
    "noise": "remove the noise", "blur": "remove the blur", "rain": "remove the rain", "hole": "fill the hole",
    "edges": "edges to picture", "draw": "draw",
}  # fmt: skip
TRAINED_DAMAGE: dict[str, dict[str, Any]] = {
    "noise": {"kind": "noise", "sigma": [0.1, 0.25]},
    "blur": {"kind": "blur", "sigma": [1.0, 2.5]},
    "rain": {"kind": "rain", "streaks": [10, 40], "strength": [0.5, 0.95]},
    "hole": {"kind": "hole", "size": [16, 28], "fill": damage.GREY},
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Some consecutive records: the unit of work of a process."""

    out: Path
    seed: int
    name: str
    start: int
    stop: int


def compose_chunk(chunk: Chunk) -> list[Row]:
    """Write the pictures of a chunk; its rows, with ``said`` (caption, instruction) for the teachers."""
    rows = []
    for index in range(chunk.start, chunk.stop):
        rng = np.random.default_rng([FIRST_ENTROPY, chunk.seed, list(SIZES).index(chunk.name), index])
        rows.append(_MAKERS[chunk.name.rpartition("/")[2]](_Files(chunk, index), rng, index))
    return rows


class _Files:
    """Where the pictures of a record go, as the record names them."""

    def __init__(self, chunk: Chunk, index: int) -> None:
        split, _, name = chunk.name.rpartition("/")
        self.held_out, self.name, self.index = bool(split), name, index
        self._folder = chunk.out / (split or "train")

    def write(self, picture: Image.Image, what: str) -> str:
        """A PNG; its name from the folder of the rows."""
        file = f"media/{self.name}/{self.index:06d}.{what}.png"
        (self._folder / file).write_bytes(png_bytes(picture))
        return file

    def row(self, prompt: str, answer: str, *, system: str = "", **fields: Any) -> Row:
        """A record of one question."""
        turns = [{"role": "system", "content": system}] * bool(system)
        turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return {"messages": turns, "id": f"{self.name}.{self.index:06d}"} | fields


def _draw(files: _Files, rng: np.random.Generator, index: int) -> Row:
    kinds = (("one",), ("two",))[index % 2] if files.held_out else ("one", "two", "two", "many")
    scene = draw_scene(rng, held_out=files.held_out, kinds=kinds)
    fields = {
        "targets": [files.write(paint(place(rng, scene)), "target")],
        "task": "text_to_image",
        "scene": asdict(scene),
    }
    said = {"said": {"caption": scene.caption, "instruction": INSTRUCTIONS["draw"]}}
    return files.row(f"draw {scene.caption}", "<generate>", **fields, **said)


def _edit(files: _Files, rng: np.random.Generator, index: int) -> Row:
    while True:
        scene = draw_scene(rng, held_out=False, kinds=("one", "two"))
        slot = int(rng.integers(len(scene.objects)))
        old, new = scene.objects[slot], int(rng.integers(NUM_OBJECTS))
        if new in scene.objects or is_held_out(old, new) != files.held_out:
            continue
        after = scene.with_object(old, new)
        if files.held_out or not after.held_out:  # training never shows a scene that is held out
            break
    placed = place(rng, scene)
    source, target = files.write(paint(placed), "source"), files.write(paint(placed.with_object(old, new)), "target")
    instruction = edit_instruction(old, new)
    edited = {"edit": {"old": old, "new": new, "slot": slot, "objects": placed.objects}}
    fields = {"images": [source], "targets": [target], "task": "edit", "scene": asdict(after)}
    said = {"said": {"caption": instruction, "instruction": instruction}}
    return files.row(f"<image> {instruction}", "<generate>", **fields, **(edited if files.held_out else {}), **said)


def _restore(files: _Files, rng: np.random.Generator, index: int) -> Row:
    kind = damage.KINDS[index % len(damage.KINDS)]
    said = {"said": {"caption": INSTRUCTIONS[kind], "instruction": INSTRUCTIONS[kind]}}
    prompt, common = f"<image> {INSTRUCTIONS[kind]}", {"task": TASKS[kind]}
    if not files.held_out:
        target = files.write(paint(place(rng, draw_scene(rng, held_out=False))), "target")
        settings = TRAINED_DAMAGE[kind]
        if kind == "rain" and rng.random() < 0.5:
            settings = {"kind": "rain", "file": "media/rain.png"}
        return files.row(prompt, "<generate>", targets=[target], **common, degrade=settings, **said)
    while True:
        scene = draw_scene(rng, held_out=True)
        clean = paint(place(rng, scene))
        broken, where = damage.damaged(np.asarray(clean) / 255, kind, index)
        if damage.INPUT_DB[0] <= damage.psnr(broken, np.asarray(clean) / 255, where) <= damage.INPUT_DB[1]:
            break
    source = files.write(Image.fromarray((broken * 255).round().astype(np.uint8)), "source")
    fields = {"images": [source], "targets": [files.write(clean, "target")], "damage": kind, "scene": asdict(scene)}
    return files.row(prompt, "<generate>", **fields, **common, **said)


def _edges(files: _Files, rng: np.random.Generator, index: int) -> Row:
    scene = draw_scene(rng, held_out=files.held_out)
    picture = paint(place(rng, scene))
    prompt, said = f"<image> {INSTRUCTIONS['edges']}", INSTRUCTIONS["edges"]
    fields: Row = {
        "targets": [files.write(picture, "target")],
        "task": "edges",
        "said": {"caption": said, "instruction": said},
    }
    if files.held_out:
        found = edges(np.asarray(picture) / 255)
        drawn = Image.fromarray(np.repeat(found[..., None], 3, axis=2).astype(np.uint8) * 255)
        fields |= {"images": [files.write(drawn, "source")], "scene": asdict(scene)}
    else:
        fields["degrade"] = {"kind": "edges"}
    return files.row(prompt, "<generate>", **fields)


def _think(files: _Files, rng: np.random.Generator, index: int) -> Row:
    riddle = clues.draw_riddle(rng, clues.KINDS[index % 2], held_out=files.held_out)
    thought = riddle.scene.caption
    fields = {"targets": [files.write(paint(place(rng, riddle.scene)), "target")], "task": "text_to_image"}
    fields |= {"thought": thought, "kind": riddle.kind, "scene": asdict(riddle.scene)}
    said = {"said": {"caption": thought, "instruction": INSTRUCTIONS["draw"]}}
    return files.row(riddle.prompt, thinking(thought), system=SYSTEM, **fields, **said)


def thinking(thought: str) -> str:
    """What the assistant says that thinks before it draws."""
    return f"{THINK}{thought}{THINK_END}<generate>"


def swapped(rows: list[Row]) -> list[Row]:
    """Each row with the thought of the next of its kind that means another scene."""
    found = []
    for number, row in enumerate(rows):
        others = (rows[(number + step) % len(rows)] for step in range(1, len(rows)))
        other = next(one for one in others if one["kind"] == row["kind"] and one["scene"] != row["scene"])
        turns = [*row["messages"][:-1], {"role": "assistant", "content": thinking(other["thought"])}]
        found.append(row | {"messages": turns, "thought": other["thought"], "id": f"{row['id']}.swapped"})
    return found


def bare(row: Row) -> Row:
    """A row without its thought: no system turn, and the answer is the picture."""
    asked, _ = row["messages"][-2:]
    return row | {"messages": [asked, {"role": "assistant", "content": "<generate>"}], "id": f"{row['id']}.bare"}


_MAKERS: dict[str, Callable[[_Files, np.random.Generator, int], Row]] = {
    "draw": _draw, "edit": _edit, "restore": _restore, "edges": _edges, "think": _think,
}  # fmt: skip


def scene_of(row: Row) -> Scene:
    """What the judge should see."""
    return Scene(**row["scene"] | {"objects": tuple(row["scene"]["objects"])})


def compose(out: Path, *, seed: int, sizes: dict[str, int], processes: int) -> dict[str, int]:
    """Write everything; how many records each set has."""
    from examples.draw.taught import teach

    for name in sizes:
        split, _, stem = name.rpartition("/")
        (out / (split or "train") / "media" / stem).mkdir(parents=True, exist_ok=True)
    for split in ("train", "eval"):
        (out / split / "media" / "rain.png").write_bytes(damage.RAIN.read_bytes())
    chunks = [
        Chunk(out, seed, name, start, stop)
        for name, size in sizes.items()
        for start, stop in pairwise([*range(0, size, CHUNK), size])
    ]
    sets: dict[str, list[Row]] = {name: [] for name in sizes}
    for chunk, made in zip(chunks, in_processes(compose_chunk, chunks, processes)):
        sets[chunk.name] += made
    sets["eval/bare"] = [bare(row) for row in sets["eval/think"]]
    sets["eval/swapped"] = swapped(sets["eval/think"])
    counts = {}
    for name, rows in sets.items():
        split, _, stem = name.rpartition("/")
        folder = out / (split or "train")
        if not split and "said" in rows[0]:
            teach(folder, stem, rows)
        lines = (json.dumps({key: value for key, value in row.items() if key != "said"}) + "\n" for row in rows)
        (folder / f"{stem}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[name] = len(rows)
    (out / "manifest.json").write_text(json.dumps({"seed": seed, "records": counts}, indent=1) + "\n", encoding="utf-8")
    return counts


def main() -> None:
    """Parse the command line and compose."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--fast", action="store_true", help="few records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    options = parser.parse_args()
    sizes = FAST_SIZES if options.fast else SIZES
    counts = compose(options.out, seed=options.seed, sizes=sizes, processes=options.processes)
    print(f"{options.out}: {sum(counts.values())} records")


if __name__ == "__main__":
    main()
