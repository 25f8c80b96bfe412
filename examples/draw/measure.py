"""Measure what a checkpoint of ``make draw`` draws, or what the codec and the classical ways reach.

    torchrun --nproc-per-node 2 -m examples.draw.measure CHECKPOINT --data DIR --out FILE [--parts ..] [--limit N]
    python -m examples.draw.measure --reference --data DIR --out FILE

FILE is a JSON object {"checkpoint", part: rows}; the pictures lie in the .npz beside it. Parts:

    draw           held-out captions; also fd_judge, the Frechet distance on the judge's features, and grid
    edit, restore, edges
    think_with, think_swapped, think_without    riddles with their thought, with another's, without any
    sweep          text to picture at other guidances and numbers of steps
    understanding  the quickstart's held-out scores now (``--quickstart``: before), and what of the model has changed

--reference has ``judge`` (real, codec, psnr) and ``settings``, those of the classical ways that are best on training pictures.
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_omni.platform.device import install

PARTS = ("draw", "edit", "restore", "edges", "think_with", "think_swapped", "sweep", "understanding")
CONTROLS = ("think_without",)
FILES = {"think_with": "think", "think_swapped": "swapped", "think_without": "bare"}
"""Part -> set, where it is not called so."""
CODEC = Path("examples/draw/assets/vae")
GUIDANCES, STEPS = (1.0, 2.0, 3.0, 4.0, 6.0), (4, 8, 16, 32)
SETTINGS: dict[str, dict[str, Any]] = {"restore": {"guidance": 1.0, "steps": 4}}
"""Of parts that are not drawn as usual: what is restored shall be close, and a few large steps are close to the mean of what it
can have been."""
SWEPT = 60
"""Captions at each point of the sweep."""
NUM_TUNED, NUM_REFERENCE = 24, 600


def main() -> None:
    """Measure on all ranks; rank 0 writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", help="run directory or checkpoint")
    parser.add_argument("--reference", action="store_true", help="codec and classical ways instead")
    parser.add_argument("--data", type=Path, required=True, help="the corpus")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--codec", type=Path, default=CODEC)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, *CONTROLS], default=list(PARTS))
    parser.add_argument("--limit", type=int, default=None, help="rows of each set (default all)")
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"), help="of understanding")
    options = parser.parse_args()
    if options.reference:
        found = reference(options)
    else:
        warnings.filterwarnings("ignore")
        logging.getLogger("megatron").setLevel(logging.ERROR)
        install()
        found = _measured(options)
    if found is not None:
        options.out.write_text(json.dumps(found, allow_nan=False) + "\n", encoding="utf-8")


def pictures_of(folder: Path, rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    """The first file of ``key`` of each row, [3, 64, 64]."""
    return [np.asarray(Image.open(folder / row[key][0]).convert("RGB")).transpose(2, 0, 1) for row in rows]


def rows_of(data: Path, name: str, limit: int | None) -> list[dict[str, Any]]:
    """Rows of a set of evaluation."""
    lines = (data / "eval" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:limit]]


def reference(options: argparse.Namespace) -> dict[str, Any]:
    """The judge on held-out scenes as they are and through the codec, the codec's PSNR, settings of the classical ways."""
    import torch

    from examples.draw import damage
    from examples.draw.judge import load_judge
    from examples.draw.nets import scenes_of
    from examples.draw.scoring import judged, mean, through
    from megatron_omni.evaluation.pictures import psnr
    from megatron_omni.models.generators.vae import load_picture_codec

    judge, codec = load_judge(), load_picture_codec(options.codec)
    scenes, pixels = scenes_of(62, 0, options.limit or NUM_REFERENCE, held_out=True)
    real = list((pixels * 255).round().to(torch.uint8).numpy())
    coded = through(codec, real)
    right = {
        name: mean([seen.right(scene) for seen, scene in zip(judged(judge, some), scenes)])
        for name, some in (("real", real), ("codec", coded))
    }
    decibels = psnr(torch.from_numpy(np.stack(coded)), torch.from_numpy(np.stack(real)))
    _, clean = scenes_of(63, 0, min(NUM_TUNED, options.limit or NUM_TUNED))
    tuning = [one.permute(1, 2, 0).double().numpy() for one in clean]
    settings = {kind: damage.tuned(tuning, kind) for kind in damage.KINDS}
    return {"judge": right | {"psnr": round(float(decibels.mean()), 3), "count": len(real)}, "settings": settings}


def _measured(options: argparse.Namespace) -> dict[str, Any] | None:
    """Rows of the parts, on rank 0; the pictures are written there."""
    import torch.distributed as dist

    from examples.draw.artist import Artist
    from megatron_omni.generation.load import open_checkpoint
    from megatron_omni.models.generators.vae import load_picture_codec
    from megatron_omni.parallel.groups import destroy

    checkpoint = open_checkpoint(options.checkpoint)
    artist = Artist(checkpoint, load_picture_codec(options.codec))
    result: dict[str, Any] = {"checkpoint": str(options.checkpoint)}
    pictures: dict[str, Any] = {}
    for part in options.parts:
        start = time.perf_counter()
        if part == "sweep":
            result[part] = _sweep(artist, options)
        elif part == "understanding":
            result[part] = _understanding(artist, options)
        else:
            _part(part, artist, options, result, pictures)
        if dist.get_rank() == 0:
            print(f"{options.checkpoint}: {part}: {time.perf_counter() - start:.0f} s", flush=True)
    rank = dist.get_rank()
    if rank == 0:
        np.savez_compressed(options.out.with_suffix(".npz"), **pictures)
    destroy()
    return result if rank == 0 else None


def _part(
    part: str, artist: Any, options: argparse.Namespace, result: dict[str, Any], pictures: dict[str, Any]
) -> None:
    """Draw a set and score it."""
    import torch

    from examples.draw import scoring
    from examples.draw.corpus import scene_of
    from examples.draw.judge import features, load_judge
    from megatron_omni.evaluation.pictures import frechet

    name, folder = FILES.get(part, part), options.data / "eval"
    rows, judge = rows_of(options.data, name, options.limit), load_judge()
    drawn = artist.draw(folder / f"{name}.jsonl", limit=options.limit, **SETTINGS.get(part, {}))
    targets, scenes = pictures_of(folder, rows, "targets"), [scene_of(row) for row in rows]
    pictures[part] = np.stack(drawn)
    if part in ("edit", "restore", "edges"):
        sources, coded = pictures_of(folder, rows, "images"), scoring.through(artist.codec, targets)
        pictures[f"{part}_source"] = np.stack(sources)
    if part == "edit":
        result[part] = scoring.edit_rows(judge, rows, scenes, drawn, targets, coded)
    elif part == "restore":
        measured = json.loads((options.out.parent / "reference.json").read_text(encoding="utf-8"))
        result[part] = scoring.restore_rows(rows, drawn, sources, targets, coded, measured["settings"])
    elif part == "edges":
        result[part] = scoring.edge_rows(drawn, sources, coded)
    else:
        result[part] = scoring.drawn_rows(judge, scenes, drawn)
    if part == "draw":
        both = [features(judge, torch.from_numpy(np.stack(some))) for some in (drawn, targets)]
        result |= {"fd_judge": round(frechet(*both), 4), "grid": scoring.grid(drawn, artist.codec.downsampling)}


def _sweep(artist: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Scores of the first captions at each guidance and each number of steps, the other as usual."""
    from examples.draw import scoring
    from examples.draw.corpus import scene_of
    from examples.draw.judge import load_judge

    count = min(SWEPT, options.limit or SWEPT)
    scenes = [scene_of(row) for row in rows_of(options.data, "draw", count)]
    usual = artist.config.sampling
    points = [("guidance", one, usual.steps) for one in GUIDANCES] + [
        ("steps", usual.text_guidance, one) for one in STEPS
    ]
    found = []
    for varied, guidance, steps in points:
        drawn = artist.draw(options.data / "eval" / "draw.jsonl", limit=count, steps=steps, guidance=guidance)
        scores = scoring.text_scores(scoring.drawn_rows(load_judge(), scenes, drawn))
        found.append({"varied": varied, "guidance": guidance, "steps": steps} | scores)
    return found


def _understanding(artist: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Held-out scores of the quickstart's tasks before (its scores.json) and now, and tensors that differ."""
    from examples.quickstart.score import score_all
    from megatron_omni.generation.load import open_checkpoint

    data = options.quickstart / "data"
    scores = options.quickstart / "scores.json"
    known = json.loads(scores.read_text(encoding="utf-8")) if scores.exists() else {}
    tasks = list(json.loads((data / "manifest.json").read_text(encoding="utf-8"))["chance"])
    after = score_all(artist.checkpoint, artist.model, tasks, "held_out", data, options.limit)
    first = open_checkpoint(options.quickstart, pg=artist.checkpoint.pg).load_model()
    return {
        "before": {task: known[task]["held_out"] for task in tasks if task in known},
        "after": {task: round(score.score, 4) for task, score in after.items()},
        "frozen": compared(
            first.state_dict(), artist.model.state_dict(), new=new_ids(artist.checkpoint.builder.tokenizer)
        ),
    }


def new_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens that a picture's block is made of, and of the other new ones, whose rows may change."""
    from megatron_omni.data.tokenizer import NEW_SPECIALS

    return [tokenizer.specials[name] for name in NEW_SPECIALS if name in tokenizer.specials]


def compared(before: Any, after: Any, *, new: Sequence[int]) -> dict[str, Any]:
    """How many tensors of ``before`` are the same, bit for bit, in ``after``, rows ``new`` of vocabulary matrices left out; names
    of the others."""
    import torch

    changed, same = [], 0
    for name, one in before.items():
        if not isinstance(one, torch.Tensor):
            continue
        other = after.get(name)
        if (
            other is not None
            and other.shape == one.shape
            and name.endswith(("word_embeddings.weight", "output_layer.weight"))
        ):
            kept = torch.ones(len(one), dtype=torch.bool)
            kept[list(new)] = False
            one, other = one[kept], other[kept]
        if other is not None and torch.equal(one, other):
            same += 1
        else:
            changed.append(name)
    return {"same": same, "changed": changed}


if __name__ == "__main__":
    main()
