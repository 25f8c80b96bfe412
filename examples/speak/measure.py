"""Measure what a speech generator of `make speak` says, or what nature and the codec say of the same texts.

    torchrun --nproc-per-node 2 -m examples.speak.measure CHECKPOINT --data DIR --out FILE [--parts ..] [--limit N]
    torchrun --nproc-per-node 2 -m examples.speak.measure --reference --data DIR --out FILE [--codec DIR]

FILE is a JSON object {"checkpoint", part: rows}; sounds to listen to lie beside it. Parts:

    named    held-out words in the voice of the prompt, greedy: words, voice, words of the prompt, codes
    swapped  the same texts with the name of the next voice
    styled   styles that training does not describe: pitch, rate and loudness against the natural recording
    joins    texts of three pieces, sampled at 0.7: prompt `any` and a voice, with the second of sound before and without
    whole    one text of 150 s on one rank: pieces that are cut, the voice of its two ends, memory
    stream   one text after the other on one rank: the streamed sound against that of all codes at once, seconds

--reference has named, styled, joins (neighbours of recordings) and planted (recordings of prompts that are read aloud), each of
``natural`` and, but planted, of ``codec``.
"""

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

from examples.speak.sounds import CODEC
from megatron_omni.platform.device import install

PARTS = ("named", "swapped", "styled", "joins", "whole", "stream")
REMEMBERED = "judged.jsonl"
"""Verdicts on sounds, beside the folders of runs: recordings are the same in all of them."""


def main() -> None:
    """Measure on all ranks; rank 0 writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?", help="run directory or checkpoint")
    parser.add_argument("--reference", action="store_true", help="natural recordings and the codec instead")
    parser.add_argument("--data", type=Path, required=True, help="the corpus")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--codec", type=Path, default=CODEC)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--planted", type=int, default=50, help="recordings of prompts that are read aloud")
    parser.add_argument("--limit", type=int, default=None, help="texts of each set (default all)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    install()

    import torch.distributed as dist

    from examples.speak.listen import Listener
    from examples.speak.parts import Questions, gathered, reference, write_sounds
    from megatron_omni.config.parallel import ParallelConfig
    from megatron_omni.models.generators.codec import load_codec
    from megatron_omni.parallel.groups import destroy, initialize

    pg = initialize(ParallelConfig())
    codec = load_codec(options.codec)
    questions = Questions(options.data, codec, options.limit)
    listener = Listener(options.out.parent.parent.parent / REMEMBERED)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if options.reference:
        mine, shown = reference(questions, listener, codec, share=slice(rank, None, ranks), planted=options.planted)
        all_found = gathered(mine)
        result: dict[str, Any] = {
            kind: {part: [r for found in all_found for r in found[kind][part]] for part in parts}
            for kind, parts in mine.items()
        }
    else:
        result, shown = _measured(options, pg, codec, questions, listener)
    write_sounds(options.out.parent / options.out.stem, shown, codec.sample_rate)
    if rank == 0:
        options.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    destroy()


def _measured(
    options: argparse.Namespace, pg: Any, codec: Any, questions: Any, listener: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of the parts, and sounds to listen to."""
    from examples.speak.parts import Measure, gathered, speaking
    from megatron_omni.generation.load import open_checkpoint

    checkpoint = open_checkpoint(options.checkpoint, pg=pg)
    measured = Measure(speaking(checkpoint, codec), questions, listener, codec)
    result: dict[str, Any] = {"checkpoint": str(options.checkpoint)}
    for part in options.parts:
        start = time.perf_counter()
        rows = gathered(getattr(measured, part)())
        result[part] = sorted((r for some in rows for r in some), key=lambda r: r["number"])
        print(f"{options.checkpoint}: {part}: {len(result[part])}, {time.perf_counter() - start:.0f} s", flush=True)
    return result, measured.shown


if __name__ == "__main__":
    main()
