"""Which rank of a layout holds which block of a tensor: what a distributed checkpoint written by a run would contain.

A pipeline stage has max(tp, ep etp) ranks. Tensor-parallel tensors are cut over its first ``tp``; expert e belongs to
expert-parallel rank e // (experts / ep), and its matrices are cut over ``etp``. Everything else is on a stage's first
rank.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron_omni.checkpoint.names import Entry
from megatron_omni.checkpoint.tensor_files import ConversionError
from megatron_omni.config.model import ModelConfig
from megatron_omni.estimate import padded_vocab_size


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel sizes of the checkpoint that is written; it loads at any other."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def ranks_per_stage(self) -> int:
        """Ranks of one pipeline stage without data parallelism."""
        return max(self.tp, self.ep * self.etp)


def check_layout(layout: Layout, model: ModelConfig) -> None:
    """ConversionError for sizes that do not divide the model, naming the option, both numbers and the fix."""
    moe = model.moe
    if moe is None and (layout.ep > 1 or layout.etp > 1):
        raise ConversionError(f"--ep {layout.ep} --etp {layout.etp}: a dense model has no experts; leave them out")
    sizes = [
        ("--tp", layout.tp, "attention heads", model.num_attention_heads),
        ("--tp", layout.tp, "query groups", model.num_query_groups),
        ("--tp", layout.tp, "rows of the padded vocabulary", padded_vocab_size(model)),
        ("--pp", layout.pp, "blocks", model.num_layers),
    ]
    if moe is None:
        sizes.append(("--tp", layout.tp, "columns of the feed-forward part", model.ffn_hidden_size))
    else:
        sizes += [
            ("--ep", layout.ep, "routed experts", moe.num_routed_experts),
            ("--etp", layout.etp, "columns of an expert", moe.moe_ffn_hidden_size),
        ]
    for option, size, what, count in sizes:
        if size < 1 or count % size:
            any_size = "; what is written loads at every layout" if what in ("query groups", "blocks") else ""
            raise ConversionError(
                f"{option} {size}: does not divide {count} {what}; choose a divisor of {count}{any_size}"
            )


def blocks(
    entry: Entry, tensor: Tensor, *, layout: Layout, num_layers: int
) -> Iterator[tuple[Tensor, tuple[int, ...], int]]:
    """(block, offsets in our whole tensor, rank) of ``tensor``, the entry's; blocks are views."""
    first_rank = stage_of(entry.ours, num_layers=num_layers, num_stages=layout.pp) * layout.ranks_per_stage
    leading: tuple[int, ...] = ()
    if entry.expert is not None:
        leading = (entry.expert,)
        first_rank += entry.expert // (entry.num_experts // layout.ep) * layout.etp
        tensor = tensor.unsqueeze(0)
    if entry.cut is None:
        yield tensor, (*leading, *(0 for _ in tensor.shape[len(leading) :])), first_rank
        return
    axis, by, parts = entry.cut
    axis += len(leading)
    size = layout.tp if by == "tp" else layout.etp
    width = tensor.shape[axis] // (parts * size)
    for part in range(parts):
        for share in range(size):
            start = (part * size + share) * width
            offsets = [*leading, *(0 for _ in tensor.shape[len(leading) :])]
            offsets[axis] = start
            yield tensor.narrow(axis, start, width), tuple(offsets), first_rank + share


def stage_of(ours: str, *, num_layers: int, num_stages: int) -> int:
    """Pipeline stage that holds our tensor: blocks in equal runs, encoders and embedding first, output and what draws last."""
    found = re.match(r"language\.decoder\.layers\.(\d+)\.", ours)
    if found:
        return int(found[1]) * num_stages // (2 * num_layers)
    last = ("language.output_layer", "language.decoder.final_norm", "image.")
    return num_stages - 1 if ours.startswith(last) else 0
