"""What autograd keeps of one long row on each context-parallel rank: the activation memory that the cut is for.

    python -m benchmarks.bench_context_parallel --json FILE [--length 16384] [--ranks 1 2] [--blocks 2]

A language model with a 32nd of the full model's widths (hidden 112, its ratio of query to key channels, four routed experts,
two shared, one null), fp32, no recomputation, one row of random tokens of which the second half has labels. Bytes: every
storage that the forward leaves with autograd, once each, parameters not counted; MiB on the fullest rank. Seconds: of the
forward, wall clock, the ranks on the cores that there are.
The file holds [{machine, torch, length, ..}, {ranks, tokens_per_rank, kept_mib, of_one, seconds}, ..].
"""

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VALUES: dict[str, Any] = {
    "model": {
        "num_layers": 2, "hidden_size": 112, "ffn_hidden_size": 224, "num_attention_heads": 7, "num_query_groups": 1,
        "kv_channels": 16, "mrope_section": [4, 2, 2], "vocab_size": 1024, "make_vocab_size_divisible_by": 8,
        "vision": None, "audio": None,
        "moe": {"moe_ffn_hidden_size": 148, "moe_shared_expert_intermediate_size": 16},
    },
    "optim": {"precision": "fp32", "use_distributed_optimizer": False},
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--blocks", type=int, default=2)
    options = parser.parse_args(arguments)
    import torch

    from megatron_omni.platform.device import install

    torch.set_num_threads(1)
    install()
    from megatron_omni.models import build  # noqa: F401  before ranks are forked, so that all have it

    rows: list[dict[str, Any]] = []
    for ranks in options.ranks:
        found = on_ranks(ranks, options.length, options.blocks)
        fullest = max(found, key=lambda one: one["kept"])
        one = rows[0]["kept_mib"] if rows else fullest["kept"] / 2**20
        rows.append(
            {"ranks": ranks, "tokens_per_rank": fullest["tokens"], "kept_mib": round(fullest["kept"] / 2**20, 1)}
            | {"of_one": round(fullest["kept"] / 2**20 / one, 3), "seconds": round(fullest["seconds"], 1)}
        )
        print(rows[-1], flush=True)
    facts = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    options.json.write_text(json.dumps([facts | {"length": options.length, "blocks": options.blocks}, *rows], indent=1))
    return 0


def on_ranks(ranks: int, length: int, blocks: int) -> list[dict[str, float]]:
    """What each of ``ranks`` processes measures."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory, context.Pool(ranks) as pool:
        tasks = [(rank, ranks, length, blocks, f"{directory}/store") for rank in range(ranks)]
        return pool.starmap(_rank, tasks, chunksize=1)


def _rank(rank: int, ranks: int, length: int, blocks: int, store: str) -> dict[str, float]:
    import torch.distributed as dist

    from megatron_omni.config.parallel import ParallelConfig
    from megatron_omni.parallel import groups

    parallel = ParallelConfig(context_parallel_size=ranks, distributed_timeout_seconds=7200)
    pg = groups.initialize(parallel, store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    return measured(pg, parallel, length=length, blocks=blocks)


def measured(pg: Any, parallel: Any, *, length: int, blocks: int) -> dict[str, float]:
    """Bytes that autograd keeps, tokens and seconds of a forward on this rank of ``pg``."""
    import torch

    from megatron_omni.config.load import recipe_from_dict
    from megatron_omni.models.build import build_model

    recipe = recipe_from_dict(VALUES | {"model": VALUES["model"] | {"num_layers": blocks}})
    recipe.parallel = parallel
    model = build_model(recipe, pg)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    tokens: list[int] = []
    model.language.decoder.layers[0].register_forward_pre_hook(
        lambda module, inputs, named: tokens.append(named["hidden_states"].shape[0]), with_kwargs=True
    )

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch, start = text_row(length), time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch, step=1, stochastic=True, aux_loss_scale=0.01)
    seconds = time.perf_counter() - start
    assert loss.shape == (1, length)
    return {"kept": sum(kept.values()), "tokens": tokens[0], "seconds": seconds}


def text_row(length: int) -> Any:
    """A row of random tokens, its second half with labels."""
    import torch

    from megatron_omni.batch import IGNORE_LABEL, OmniBatch
    from megatron_omni.segments import packed

    ids = torch.randint(0, VALUES["model"]["vocab_size"], (1, length), generator=torch.Generator().manual_seed(0))
    zeros, places = torch.zeros_like(ids), torch.arange(length)
    return OmniBatch.of(
        input_ids=ids,
        labels=torch.where(places >= length // 2, ids.roll(-1), IGNORE_LABEL),
        position_ids=places.expand(3, 1, -1),
        segment_ids=zeros,
        sample_ids=zeros,
        sample_positions=places.unsqueeze(0),
        modality=zeros,
        source_ids=zeros,
        attention=packed([[length]], length),
    )


if __name__ == "__main__":
    sys.exit(main())
