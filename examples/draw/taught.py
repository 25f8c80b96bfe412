"""What the teachers of ``make draw`` say of rows: embeddings of the pair, in files that rows name.

    teachers.NAME.safetensors   caption rows and task vectors of each text once, visual rows of each source

Task vectors are those of the instruction and, for the branches of guidance without words, twice of the empty text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from examples.draw.nets import sha256
from examples.draw.pair import FOLDER, load_pair, taught_pictures, taught_texts
from megatron_omni.data.row_files import write_rows

CHUNK = 500


def teach(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Give ``rows`` of ``folder``/``name``.jsonl their ``teachers``; ``said`` of a row has its texts."""
    pair, file = load_pair(), f"teachers.{name}.safetensors"
    captions = sorted({row["said"]["caption"] for row in rows})
    instructions = sorted({row["said"]["instruction"] for row in rows})
    arrays: list[torch.Tensor] = []
    rows_of, masks, _ = taught_texts(pair, captions)
    caption_at = {text: number for number, text in enumerate(captions)}
    arrays += [torch.from_numpy(one[mask]) for one, mask in zip(rows_of, masks)]
    *pooled, empty = taught_texts(pair, [*instructions, ""])[2]
    task_at = {text: len(arrays) + number for number, text in enumerate(instructions)}
    arrays += [torch.from_numpy(np.stack([one, empty, empty])) for one in pooled]
    with_source = [row for row in rows if row.get("images")]
    source_at = {row["id"]: len(arrays) + number for number, row in enumerate(with_source)}
    for start in range(0, len(with_source), CHUNK):
        files = [folder / row["images"][0] for row in with_source[start : start + CHUNK]]
        pictures = np.stack([np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1) for file in files])
        arrays += list(torch.from_numpy(taught_pictures(pair, pictures)))
    for row in rows:
        numbers = {"caption": caption_at[row["said"]["caption"]], "task": task_at[row["said"]["instruction"]]}
        if row["id"] in source_at:
            numbers["visual"] = source_at[row["id"]]
        row["teachers"] = {kind: f"{file}#{number}" for kind, number in numbers.items()}
    fingerprint = sha256(FOLDER / f"{FOLDER.name}.safetensors")
    write_rows(folder / file, [one.half().contiguous() for one in arrays], kind="teachers", fingerprint=fingerprint)
