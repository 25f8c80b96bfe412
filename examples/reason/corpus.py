"""Compose the questions of ``make reason``: media files and JSONL records, the same for the same seed.

    python -m examples.reason.corpus --out DIR [--demonstrations 120] [--prompts 2000] [--held-out 180] [--choice 96]

    DIR/demonstrations/<source>.jsonl   answers with a thought, and the same rows without one: the cold start
    DIR/prompts/<source>.jsonl          questions for reinforcement, other ones; the answer stands in ``solution``
    DIR/held_out/<source>.jsonl         what is reported: unseen pairs of concepts
    DIR/choice/<source>.jsonl           other questions by the rule of the held-out ones, to choose by
    DIR/manifest.json                   counts and the chance of a guess

The pairs of demonstrations and prompts are those that the quickstart trains on, the others those that it holds out.
Questions: questions.py. Every one is drawn from a generator seeded by (seed, set, source, index).
"""

import argparse
import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from examples.quickstart.assets import load_assets
from examples.quickstart.compose import in_processes, row_of
from examples.reason.questions import CHANCE, SOURCES, SYSTEM, compose_question, wanted, with_thought

SETS = {"demonstrations": "train", "prompts": "train", "held_out": "held_out", "choice": "choice"}
"""Set -> split of the quickstart's rule. The order is part of a question's seed."""
SIZES = {"demonstrations": 120, "prompts": 2000, "held_out": 180, "choice": 96}
"""Of each source."""
FIRST_ENTROPY = 20
"""Sets the draws apart from the quickstart's, whose seeds begin with its own."""
CHUNK = 100


@dataclass(frozen=True)
class Chunk:
    """Some consecutive questions: the unit of work of a process."""

    out: Path
    seed: int
    name: str
    source: str
    start: int
    stop: int


def compose_chunk(chunk: Chunk) -> list[str]:
    """Write the media of a chunk; returns its JSONL lines."""
    assets, lines = load_assets(), []
    for index in range(chunk.start, chunk.stop):
        entropy = [FIRST_ENTROPY, chunk.seed, list(SETS).index(chunk.name), SOURCES.index(chunk.source), index]
        rng = np.random.default_rng(entropy)
        question = compose_question(assets, rng, chunk.source, SETS[chunk.name], wanted(chunk.source, index))
        medium = f"media/{chunk.source}/{index:06d}{question.sample.suffix}"
        (chunk.out / chunk.name / medium).write_bytes(question.sample.data)
        row = row_of(question.sample, medium, source=chunk.source, id=f"{chunk.source}.{chunk.name}.{index:06d}")
        lines += rows(row, question.thought, demonstrated=chunk.name == "demonstrations")
    return lines


def rows(row: dict[str, Any], thought: str, *, demonstrated: bool) -> list[str]:
    """Lines of a question: what is demonstrated with a thought and without, what is asked with the answer beside it."""
    asked, answered = row["messages"]
    system = {"role": "system", "content": SYSTEM}
    if not demonstrated:
        extra = {"solution": answered["content"], "thought": thought}
        return [json.dumps({**row, "messages": [system, asked, answered], **extra})]
    thinking, at_once = ({**answered, "content": with_thought(one, answered["content"])} for one in (thought, ""))
    return [
        json.dumps({**row, "messages": [system, asked, thinking]}),
        json.dumps({**row, "messages": [asked, at_once], "id": f"{row['id']}.no_think"}),
    ]


def compose(out: Path, *, seed: int = 0, sizes: dict[str, int] | None = None, processes: int = 1) -> None:
    """Write all sets under ``out``; ``sizes`` gives the number of questions of each source, by set."""
    sizes = sizes or SIZES
    files: dict[Path, list[Chunk]] = {}
    for name, size in sizes.items():
        for source in SOURCES:
            (out / name / "media" / source).mkdir(parents=True, exist_ok=True)
            bounds = [*range(0, size, CHUNK), size]
            files[out / name / f"{source}.jsonl"] = [Chunk(out, seed, name, source, a, b) for a, b in pairwise(bounds)]
    chunks = [chunk for parts in files.values() for chunk in parts]
    written = iter(in_processes(compose_chunk, chunks, processes))
    for path, parts in files.items():
        path.write_text("".join(line + "\n" for _ in parts for line in next(written)), encoding="utf-8")
    manifest = {
        "seed": seed,
        "questions": {name: size * len(SOURCES) for name, size in sizes.items()},
        "chance": CHANCE,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and compose."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help=f"of each source ({size})")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in SIZES}
    compose(options.out, seed=options.seed, sizes=sizes, processes=min(8, os.cpu_count() or 1))
    print(f"composed {sum(sizes.values()) * len(SOURCES)} questions in {options.out}")


if __name__ == "__main__":
    main()
