"""A trained codec whose decoder hears only what is near, so that sound is the same streamed and whole.

The decoder's GroupNorms normalise by statistics of the whole input and its attention sees all of it; a stream knows neither
what comes nor, from windows, what was long ago. :func:`localise` gives each GroupNorm the statistics of some recordings as
fixed numbers, as a batch norm's are after training, and limits attention to ``decoder_span``. Encoder and codebook stay: the
codes are the same. The sound is a little different. A codec that is trained with ``decoder_span`` from its first step loses
nothing by it: its norms take their numbers when its codebook starts (:func:`fix_statistics`), and it learns on with them.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_omni.models.generators.codec import Codec
from megatron_omni.models.generators.wave_decoder import NUM_GROUPS, WaveDecoder

CLIPS_AT_ONCE = 32


@torch.no_grad()
def localise(codec: Codec, waves: Iterable[Tensor], span: Sequence[int]) -> Codec:
    """A copy of ``codec`` with ``decoder_span`` ``span`` and the statistics of ``waves`` [T] of its sample rate.

    ValueError for a codec that is local already, or no recording.
    """
    if codec.config.decoder_span:
        raise ValueError(f"decoder_span is {codec.config.decoder_span} already: a codec is made local once")
    statistics: list[Tensor] = []
    was_training = codec.training
    codec.eval()
    try:
        for wave in waves:
            codes = codec.encode(wave[None])
            statistics.append(_sums(codec.decoder, codec.codebook.lookup(codes)))
    finally:
        codec.train(was_training)
    if not statistics:
        raise ValueError("no recording to take statistics from")
    local = Codec(dataclasses.replace(codec.config, decoder_span=list(span)))
    local.load_state_dict(codec.state_dict(), strict=False)
    _fix(local.decoder, torch.stack(statistics).sum(0))
    return local.eval()


@torch.no_grad()
def fix_statistics(decoder: WaveDecoder, vectors: Tensor) -> None:
    """Give the norms of a decoder with a span the statistics of ``vectors`` [B, n, D], each clip normalised by its own."""
    _fix(decoder, torch.stack([_sums(decoder, some) for some in vectors.split(CLIPS_AT_ONCE)]).sum(0))


def _fix(decoder: WaveDecoder, sums: Tensor) -> None:
    for norm, (count, total, squares) in zip(decoder.norms(), sums.unbind(), strict=True):
        norm.mean.copy_(total / count)
        norm.variance.copy_(squares / count - (total / count).square())


def _sums(decoder: WaveDecoder, vectors: Tensor) -> Tensor:
    """Number, sum and sum of squares of each group of each norm, [norms, 3, groups] float64, where norms go by their input."""
    seen: list[Tensor] = []
    norms = decoder.norms()
    were_fixed = [norm.is_fixed for norm in norms]
    hooks = [norm.register_forward_pre_hook(partial(_note, seen)) for norm in norms]
    decoder.by_input(True)
    try:
        decoder.spectrum(vectors.to(decoder.out.weight.dtype))
    finally:
        for norm, fixed, hook in zip(norms, were_fixed, hooks):
            norm.is_fixed = fixed
            hook.remove()
    return torch.stack(seen)


def _note(sums: list[Tensor], module: Any, inputs: tuple[Tensor, ...]) -> None:
    groups = inputs[0].double().reshape(inputs[0].shape[0], NUM_GROUPS, -1).transpose(0, 1).flatten(1)
    count = torch.full_like(groups[:, 0], groups.shape[1])
    sums.append(torch.stack([count, groups.sum(1), groups.square().sum(1)]))
