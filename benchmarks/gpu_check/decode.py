"""Generation with a cache: milliseconds a decoded token at several batch sizes, and what reading the weights once would take.

    python -m benchmarks.gpu_check.decode --out decode.json [--tokens 32] [--batches 1 8]

The model is model.py's with drawn weights; the prompt has a picture and a sound. A token's time is that of ``--tokens``
more of them over their number, so the prompt does not count. A decoded token cannot be faster than one read of the weights
that it uses; that bound is of all weights of the language model, so experts that no token takes make it too high.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

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
    from megatron_omni.data.tokenizer import Tokenizer
    from megatron_omni.generation.engine import generate
    from megatron_omni.models.build import build_model
    from megatron_omni.parallel.groups import destroy, initialize
    from megatron_omni.platform.device import device, synchronize
    from megatron_omni.platform.seeds import seed_everything
    from tests.recipes.miniature_data import question

    job = make_job(folder)
    pg = initialize(job.recipe.parallel)
    seed_everything(job.recipe.seed, tp_rank=0, ep_rank=0, expert_tp_rank=0)
    builder = SampleBuilder(job.recipe)
    prompt = builder.build_prompt(parse_record(question(job.data)))
    model = build_model(job.recipe, pg).to(device())
    inner = builder.tokenizer
    endless = cast(Tokenizer, SimpleNamespace(pad_id=inner.pad_id, vocab_size=inner.vocab_size, eos_ids=()))
    # ``endless``: drawn weights must not end an answer early.
    language = sum(p.numel() * p.element_size() for p in model.language.parameters())

    def seconds(batch: int, count: int) -> float:
        synchronize()
        start = time.perf_counter()
        answers = generate(model, [prompt] * batch, tokenizer=endless, max_new_tokens=count, pg=pg)
        synchronize()
        assert [len(answer) for answer in answers] == [count] * batch, [len(answer) for answer in answers]
        return time.perf_counter() - start

    rows = []
    for batch in batches:
        seconds(batch, 2)
        spent = [(seconds(batch, 1 + tokens) - seconds(batch, 1)) / tokens for _ in range(ROUNDS)]
        rows.append(
            {"batch": batch, "ms_a_token": 1e3 * statistics.median(spent), "prompt_ms": 1e3 * seconds(batch, 1)}
        )
    read = copy_ceiling(device=torch.device(device().type), threads=1) / 2
    destroy()
    return {
        "sizes": job.sizes,
        **parameters(model),
        "prompt_tokens": prompt.length,
        "decode": rows,
        "weights_read_ms": 1e3 * language / read,
    }


if __name__ == "__main__":
    raise SystemExit(main())
