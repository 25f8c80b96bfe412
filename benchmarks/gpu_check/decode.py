"""Generation with a cache: milliseconds a decoded token at several batch sizes, and what reading the weights once would take.

    python -m benchmarks.gpu_check.decode --out decode.json [--tokens 32] [--batches 1 8]

The model is model.py's with drawn weights; the prompt has a picture and a sound. A token's time is that of ``--tokens``
more of them over their number, so the prompt does not count. Steps are computed as one ragged row, in fixed shapes, and on
a GPU in those as CUDA graphs (``EngineLimits.decoding``); a graph must give the tokens of the same step without one. A
decoded token cannot be faster than one read of the weights that it uses; that bound is of all weights of the language
model, so experts that no token takes make it too high.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

ROUNDS = 3


def main(arguments: list[str] | None = None) -> int:
    """Parse, generate, write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON of the figures")
    parser.add_argument("--tokens", type=int, default=32, help="decoded tokens that are timed (default 32)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="prompts at a time (default 1 8)")
    options = parser.parse_args(arguments)
    from megatron_omni.platform.device import install

    install()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        found = measure(Path(folder), tokens=options.tokens, batches=options.batches)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return 0


def measure(folder: Path, *, tokens: int, batches: list[int]) -> dict[str, Any]:
    """Figures by batch size."""
    import torch

    from benchmarks.gpu_check.model import make_job, parameters
    from benchmarks.measure import copy_ceiling
    from megatron_omni.data.record import parse_record
    from megatron_omni.data.sample import SampleBuilder
    from megatron_omni.generation.engine import Engine, EngineLimits
    from megatron_omni.generation.extents import extent_size
    from megatron_omni.generation.fixed_steps import Decoding
    from megatron_omni.models.build import build_model
    from megatron_omni.parallel.groups import destroy, initialize
    from megatron_omni.platform.device import accelerator_present, device
    from megatron_omni.platform.seeds import seed_everything
    from tests.recipes.miniature_data import question

    job = make_job(folder)
    pg = initialize(job.recipe.parallel)
    seed_everything(job.recipe.seed, tp_rank=0, ep_rank=0, expert_tp_rank=0)
    builder = SampleBuilder(job.recipe)
    prompt = builder.build_prompt(parse_record(question(job.data)))
    model = build_model(job.recipe, pg).to(device())
    language = sum(p.numel() * p.element_size() for p in model.language.parameters())

    rows = []
    ways: list[Decoding] = ["ragged", "fixed", "captured"] if accelerator_present() else ["ragged", "fixed"]
    for batch in batches:
        said: dict[str, list[list[int]]] = {}
        for way in ways:
            limits = EngineLimits(
                max_running=batch, cache_tokens=batch * extent_size(prompt.length + tokens + 1), decoding=way
            )
            with Engine(model, tokenizer=builder.tokenizer, pg=pg, limits=limits) as engine:
                _, said[way] = answers(engine, prompt, batch, 1 + tokens)  # graphs are recorded here
                spent = [
                    (answers(engine, prompt, batch, 1 + tokens)[0] - answers(engine, prompt, batch, 1)[0]) / tokens
                    for _ in range(ROUNDS)
                ]
                prompts, _ = answers(engine, prompt, batch, 1)
            same = sum(a == b for a, b in zip(said[way], said["ragged"])) / batch
            rows.append(
                {"batch": batch, "decoding": way, "ms_a_token": 1e3 * statistics.median(spent),
                 "prompt_ms": 1e3 * prompts, "same_answers": same}
            )  # fmt: skip
        if "captured" in said and said["captured"] != said["fixed"]:
            raise ValueError(f"{batch} answers by CUDA graphs: {said['captured']}, without: {said['fixed']}")
    read = copy_ceiling(device=torch.device(device().type), threads=1) / 2
    destroy()
    return {
        "sizes": job.sizes,
        **parameters(model),
        "prompt_tokens": prompt.length,
        "decode": rows,
        "weights_read_ms": 1e3 * language / read,
    }


def answers(engine: Any, prompt: Any, batch: int, count: int) -> tuple[float, list[list[int]]]:
    """Seconds of ``batch`` answers of ``count`` tokens, and the tokens; drawn weights do not end one earlier."""
    from megatron_omni.generation.batches import answered
    from megatron_omni.generation.request import Request
    from megatron_omni.platform.device import synchronize

    asked = {"prompt": prompt, "max_new_tokens": count, "ignore_eos": True, "reuse_prefix": False}
    synchronize()
    start = time.perf_counter()
    results = list(answered(engine, (Request(name=str(i), **asked) for i in range(batch))))
    synchronize()
    spent = time.perf_counter() - start
    ids = [result.ids for result in sorted(results, key=lambda result: int(result.name))]
    assert [len(own) for own in ids] == [count] * batch, ids
    return spent, ids


if __name__ == "__main__":
    raise SystemExit(main())
