"""Attention by lengths against the masked product that it replaced: the product alone, and whole training steps.

    python -m benchmarks.bench_attention --json FILE [--cases packed10_4096,single_4096] [--repeats 7]

    packed10_4096    the product, forward and backward: 7 heads of 128 in one group, a row of 4,096 tokens, 10 samples
    single_4096      the same with one sample
    quickstart       a step of recipes/tiny/quickstart.yaml: 2 micro-batches of 2 rows of 216 tokens, pictures and sound
    miniature_sft    a step of recipes/3_sft.yaml in the miniature's proportions (tests/recipes/miniature.py) at 4,096
                     tokens, width 512, 4 blocks: 2 rows of 10 samples each

All fp32, one thread; thread CPU time on a CPU. A step is zeroing gradients, forward, backward and update. Contenders take
turns and the median counts. FILE gets [{case, contender, median_ms, ratio_to_masked}]; a ratio above 1 is faster.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import seconds
from megatron_omni.platform.device import device, install

REPEATS, WARM_UP = 7, 1
LEAST_SAMPLE = 100
PROPORTIONS = 16
"""Of the miniature's widths."""
MINIATURE = [
    "model.num_layers=4", "model.hidden_size=512", f"model.ffn_hidden_size={48 * PROPORTIONS}",
    "model.num_attention_heads=4", "model.num_query_groups=2", f"model.kv_channels={8 * PROPORTIONS}",
    "model.mrope_section=[32, 16, 16]", "model.vocab_size=300", f"model.moe.moe_ffn_hidden_size={32 * PROPORTIONS}",
    f"model.moe.moe_shared_expert_intermediate_size={16 * PROPORTIONS}", "model.vision=null", "model.audio=null",
    "parallel.tensor_model_parallel_size=1", "parallel.expert_model_parallel_size=1", "data.seq_length=4096",
    "data.micro_batch_size=1", "data.global_batch_size=2", "optim.precision=fp32",
    "optim.use_distributed_optimizer=false", "optim.lr_warmup_iters=1",
]  # fmt: skip


def sample_lengths(total: int, number: int, *, least: int, generator: torch.Generator) -> list[int]:
    """``number`` lengths of at least ``least`` that fill ``total`` tokens, cut at random places."""
    cuts = torch.randperm(total - number * least + number - 1, generator=generator)[: number - 1].sort().values
    ends = [*cuts.tolist(), total - number * least + number - 1]
    return [end - start - 1 + least for start, end in zip([-1, *ends], ends)]


def product(rows: list[list[int]]) -> Callable[[], Any]:
    """Forward and backward of one attention layer over rows of samples."""
    from megatron.core.transformer import TransformerConfig

    from megatron_omni.models.attention import CoreAttention
    from megatron_omni.segments import packed

    size = sum(rows[0])
    config = TransformerConfig(
        num_layers=1, hidden_size=896, num_attention_heads=7, num_query_groups=1, kv_channels=128, attention_dropout=0.0
    )
    attention, segments = CoreAttention(config, 1), packed(rows, size)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(size, len(rows), heads, 128, generator=generator).to(device()).requires_grad_()
        for heads in (7, 1, 1)
    ]
    grad = torch.randn(size, len(rows), 896, generator=generator).to(device())
    return lambda: torch.autograd.grad(attention(*inputs, segments), inputs, grad) and None


def step(recipe: Any, batches: list[Any]) -> Callable[[], Any]:
    """A training step of ``recipe`` from random weights."""
    from megatron_omni.models.build import build_model
    from megatron_omni.models.parts import apply_freeze
    from megatron_omni.parallel import groups
    from megatron_omni.parallel.schedule import run_step
    from megatron_omni.parallel.wrap import wrap_model
    from megatron_omni.tasks.supervised import SupervisedTask
    from megatron_omni.training.optimizer import build_optimizer, update
    from megatron_omni.training.task import StepInfo

    pg = groups.initialize(recipe.parallel)
    built = build_model(recipe, pg)
    apply_freeze(built, set(recipe.freeze))
    model = wrap_model(built, recipe, pg)
    optimizer, scheduler = build_optimizer(model, recipe, pg)
    task, labels = SupervisedTask(recipe.data.sources), sum(batch.num_label_tokens for batch in batches)
    info = StepInfo(step=1, training=True, divisor=labels, aux_loss_scale=0.02, stats=None)
    batches = [batch.to(device()) for batch in batches]

    def run() -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        run_step(partial(task.forward_step, info=info), batches, model, pg=pg, recipe=recipe)
        update(optimizer, scheduler, clip_grad=recipe.optim.clip_grad)

    return run


def batch_of(model: Any, rows: list[list[int]], *, media: bool, generator: torch.Generator) -> Any:
    """Samples of random ids, the second half of each learned; in turns with a picture, with sound and with text alone."""
    from megatron_omni.batch import IGNORE_LABEL, Modality
    from megatron_omni.data.collate import collate
    from megatron_omni.data.sample import Sample

    samples, row_of = [], []
    for row, lengths in enumerate(rows):
        for length in lengths:
            ids = torch.randint(0, model.vocab_size, (length,), generator=generator)
            modality, tiles, chunks, kind = torch.zeros_like(ids), None, None, len(samples) % 3 if media else 2
            if kind == 0:
                modality[: model.vision.pooled_side**2] = Modality.IMAGE
                tiles = torch.randint(256, (1, 3, *2 * [model.vision.image_size]), generator=generator).byte()
            elif kind == 1:
                modality[: model.audio.num_query_tokens] = Modality.AUDIO
                frames = int(model.audio.chunk_seconds * 100)
                chunks = torch.randn(1, model.audio.num_mel_bins, frames, generator=generator)
            labels = ids.roll(-1)
            labels[: length // 2] = IGNORE_LABEL
            positions = torch.arange(length).expand(3, -1)
            samples.append(
                Sample(
                    input_ids=ids, labels=labels, position_ids=positions, next_position=length, modality=modality,
                    tiles=tiles, chunks=chunks,
                )
            )  # fmt: skip
            row_of.append(row)
    return collate(samples, pad_id=0, row_of=row_of)


def case(name: str) -> Callable[[], Any]:
    """What is measured, built anew."""
    from megatron_omni.config.load import load_recipe

    generator = torch.Generator().manual_seed(0)
    packed_row = sample_lengths(4096, 10, least=LEAST_SAMPLE, generator=generator)
    if name == "packed10_4096":
        return product([packed_row])
    if name == "single_4096":
        return product([[4096]])
    recipes = Path(__file__).resolve().parents[1] / "recipes"
    if name == "quickstart":
        recipe = load_recipe(recipes / "tiny" / "quickstart.yaml")
        lengths = [[sample_lengths(216, 4, least=30, generator=generator) for _ in range(2)] for _ in range(2)]
    else:
        recipe = load_recipe(recipes / "3_sft.yaml", MINIATURE)
        lengths = [[packed_row], [sample_lengths(4096, 10, least=LEAST_SAMPLE, generator=generator)]]
    media = name == "quickstart"
    return step(recipe, [batch_of(recipe.model, rows, media=media, generator=generator) for rows in lengths])


CASES = ("packed10_4096", "single_4096", "quickstart", "miniature_sft")


def measured(name: str, *, repeats: int) -> list[dict[str, Any]]:
    """The rows of one case."""
    from benchmarks.masked_attention import masked

    run = case(name)
    contenders: dict[str, Callable[[], Any]] = {"masked": masked, "lengths": nullcontext}
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    for repeat in range(WARM_UP + repeats):
        for contender, patched in contenders.items():
            with patched():
                duration, _ = seconds(run, device=device(), threads=1)
            if repeat >= WARM_UP:
                times[contender].append(duration)
    median = {contender: statistics.median(values) for contender, values in times.items()}
    return [
        {
            "case": name,
            "contender": contender,
            "median_ms": round(1e3 * seconds, 3),
            "ratio_to_masked": round(median["masked"] / seconds, 3),
        }
        for contender, seconds in median.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated (default: all)")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    options = parser.parse_args(arguments)
    names = options.cases.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"--cases {', '.join(sorted(unknown))}: use some of {', '.join(CASES)}")
    install()
    torch.set_num_threads(1)
    from megatron_omni.parallel import groups

    rows = []
    for name in names:
        rows += measured(name, repeats=options.repeats)
        groups.destroy()
        for row in rows[-2:]:
            print("{case:>14} {contender:>8} {median_ms:10.1f} ms {ratio_to_masked:6.2f} x".format(**row), flush=True)
    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
