"""Cached generation on every layout: one forward of the right-padded prompts, then one token a call.

    prefill    the batch of prompts through the whole model; encoders run here and never again; keys and values of every
               attention layer go into a ``KVCache`` (models/attention.py)
    decode i   the chosen tokens [B, 1] alone; all three position channels of a row are p + i, p = one more than the
               largest position of its prompt (docs/model.md 3); finished rows are padding and cost no expert

Pipeline stages hand hidden states to the next by point-to-point messages. The last stage chooses the tokens and
broadcasts them to its pipeline and tensor groups: every rank of a model replica returns the same answers. Expert
parallelism makes data-parallel ranks meet in every MoE layer: with EP > 1 all of them must call :func:`generate` the
same number of times with the same settings, each with prompts of its own or none; the loop runs until the last of them
has finished.

Under tensor parallelism hidden states stay split over tokens (sequence parallelism), so a decoding step feeds one token
and fill-up to the size of the tensor group, which the cache does not keep. Routing is deterministic and drops none.

Shapes: B prompts, S longest prompt (padded), H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_omni.batch import IGNORE_LABEL, Modality, OmniBatch
from megatron_omni.data.collate import collate
from megatron_omni.data.sample import Sample
from megatron_omni.data.tokenizer import Tokenizer
from megatron_omni.generation.request import GREEDY, Sampling
from megatron_omni.generation.sampling import INVALID_TOKEN, next_tokens
from megatron_omni.models.attention import KVCache, kv_cache
from megatron_omni.models.omni import OmniModel
from megatron_omni.parallel.groups import place_in
from megatron_omni.platform.device import device
from megatron_omni.segments import packed


def generate(
    model: nn.Module,
    prompts: Sequence[Sample],
    *,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    pg: ProcessGroupCollection,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    rows: Sequence[int] | None = None,
) -> list[list[int]]:
    """Token ids of the answer to each prompt, without the token that ended it; the same on every rank of the replica.

    ``rows`` names the prompts for the sampler (default: their number in the list), so that an answer does not depend on
    the batch it was in. FloatingPointError where logits are not finite.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    names = list(range(len(prompts)) if rows is None else rows)
    assert len(names) == len(prompts), "one row name for each prompt"
    if not prompts and pg.ep.size() == 1:
        return []
    omni = _unwrap(model)
    if prompts:
        prompt = collate(prompts, pad_id=tokenizer.pad_id, multiple_of=pg.tp.size())
        ends = [(sample.length, sample.next_position) for sample in prompts]
    else:
        prompt, ends = _idle_prompt(pg.tp.size()), [(1, 1)]
    lengths, positions = torch.tensor(ends).unbind(1)
    answers: list[list[int]] = [[] for _ in prompts]
    active = [True] * len(prompts) or [False]
    with _evaluation_mode(omni), kv_cache(KVCache(len(active))) as cache:
        logits = _forward(omni, prompt, cache, pg, new=[length for length, _ in ends], last=lengths - 1)
        for step in range(max_new_tokens):
            chosen = torch.full_like(lengths, INVALID_TOKEN, device=device())
            if logits is not None:
                chosen = next_tokens(
                    logits, sampling, vocab_size=tokenizer.vocab_size, seed=seed, rows=names or [0], step=step
                )
            tokens = _broadcast_from_last_stage(chosen, pg).tolist()
            for row in (i for i, running in enumerate(active) if running):
                active[row] = tokens[row] not in tokenizer.eos_ids
                if active[row]:
                    answers[row].append(tokens[row])
            if not _anyone_continues(answers, active, pg) or step + 1 == max_new_tokens:
                break
            following = decode_batch(
                tokens, active, lengths=lengths + step, positions=positions + step, width=pg.tp.size()
            )
            new = [int(running) for running in active]
            logits = _forward(omni, following, cache, pg, new=new, last=torch.zeros_like(lengths))
    return answers


def decode_batch(
    tokens: Sequence[int], active: Sequence[bool], *, lengths: Tensor, positions: Tensor, width: int = 1
) -> OmniBatch:
    """The batch [B, width] of one decoding step: the token of each row, then padding; rows not active are all padding.

    In host memory. ``lengths`` [B] are the tokens before this one in each row, ``positions`` [B] its position in all
    three channels.
    """
    running = torch.zeros(len(tokens), width, dtype=torch.bool)
    running[:, 0] = torch.tensor(active)
    input_ids = torch.where(running, torch.tensor(tokens).unsqueeze(1), 0)
    return OmniBatch.of(
        input_ids=input_ids,
        labels=torch.full_like(input_ids, IGNORE_LABEL),
        position_ids=positions.unsqueeze(1).expand(3, -1, width),
        segment_ids=torch.where(running, 0, -1),
        sample_ids=torch.where(running, 0, -1),
        sample_positions=lengths.unsqueeze(1).expand(-1, width),
        modality=torch.full_like(input_ids, int(Modality.TEXT)),
        source_ids=torch.zeros_like(input_ids),
        attention=packed([[int(running)] for running in active], width),
    )


def _idle_prompt(width: int) -> OmniBatch:
    """One token, for a rank that has nothing to answer but whose experts are needed."""
    nothing = torch.zeros(1, dtype=torch.int64)
    return decode_batch([0], [True], lengths=nothing, positions=nothing, width=width)


def _forward(
    omni: OmniModel,
    batch: OmniBatch,
    cache: KVCache,
    pg: ProcessGroupCollection,
    *,
    new: Sequence[int],
    last: Tensor,
) -> Tensor | None:
    """This stage's part of one forward: logits [B, V] float32 at positions ``last`` [B], None before the last stage.

    Row b's first ``new[b]`` tokens follow those that slot b of the cache holds.
    """
    where = place_in(pg)
    rows, length = batch.input_ids.shape
    if not where.is_first_stage:
        batch = replace(batch, pixel_values=None, audio_features=None)
    tokens = [(row, row * length, number) for row, number in enumerate(new)]
    batch = replace(batch, attention=cache.extend(tokens, rows * length)).to(device())
    if not where.is_first_stage:
        shape = (length // where.tp_size, rows, omni.config.hidden_size)
        hidden = torch.empty(shape, dtype=next(omni.parameters()).dtype, device=device())
        dist.recv(hidden, group=pg.pp, group_src=where.pp_rank - 1)
        omni.set_input_tensor(hidden)
    where_asked = last.unsqueeze(1).to(device())
    output = omni(batch, step=0, stochastic=False, compute_loss=False, logits_positions=where_asked)
    if where.is_last_stage:
        return output.squeeze(1).float()
    dist.send(output.contiguous(), group=pg.pp, group_dst=where.pp_rank + 1)
    return None


def _broadcast_from_last_stage(tokens: Tensor, pg: ProcessGroupCollection) -> Tensor:
    """The last stage's tokens (those of its first tensor rank) on every rank of the replica."""
    if pg.pp.size() > 1:
        dist.broadcast(tokens, group=pg.pp, group_src=pg.pp.size() - 1)
    if pg.tp.size() > 1:
        dist.broadcast(tokens, group=pg.tp, group_src=0)
    return tokens


def _anyone_continues(answers: list[list[int]], active: list[bool], pg: ProcessGroupCollection) -> bool:
    """Whether a row is unfinished, here or (EP > 1) on any data-parallel rank; raises on all of them for bad logits."""
    broken = any(answer and answer[-1] == INVALID_TOKEN for answer in answers)
    state = torch.tensor([any(active), broken], dtype=torch.int32, device=device())
    if pg.ep.size() > 1:
        dist.all_reduce(state, op=dist.ReduceOp.MAX, group=pg.dp)
    if state[1]:
        raise FloatingPointError("the model's logits are not finite: the checkpoint is damaged or training diverged")
    return bool(state[0])


def _unwrap(model: nn.Module) -> OmniModel:
    """The OmniModel under data-parallel and precision wrappers."""
    while not isinstance(model, OmniModel):
        model = cast(nn.Module, model.module)
    return model


@contextmanager
def _evaluation_mode(omni: OmniModel) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode afterwards (frozen encoders may have been in it before)."""
    modes = [(module, module.training) for module in omni.modules()]
    omni.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
