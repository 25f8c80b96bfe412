"""A trained codec whose decoder hears only what is near, so that sound is the same streamed and whole.

The decoder's GroupNorms normalise by statistics of the whole input and its attention sees all of it; a stream knows neither
what comes nor, from windows, what was long ago. :func:`localise` gives each GroupNorm the statistics of some recordings as
fixed numbers, as a batch norm's are after training, and limits attention to ``decoder_span``. Encoder and codebook stay: the
codes are the same. The sound is a little different; training the decoder on from there takes that back.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_omni.models.generators.codec import Codec
from megatron_omni.models.generators.wave_decoder import NUM_GROUPS, InputNorm


@torch.no_grad()
def localise(codec: Codec, waves: Iterable[Tensor], span: Sequence[int]) -> Codec:
    """A copy of ``codec`` with ``decoder_span`` ``span`` and the statistics of ``waves`` [T] of its sample rate.

    ValueError for a codec that is local already, or no recording.
    """
    if codec.config.decoder_span:
        raise ValueError(f"decoder_span is {codec.config.decoder_span} already: a codec is made local once")
    norms = {name: part for name, part in codec.decoder.named_modules() if isinstance(part, InputNorm)}
    seen: dict[str, list[Tensor]] = {name: [] for name in norms}
    hooks = [part.register_forward_pre_hook(partial(_note, seen[name])) for name, part in norms.items()]
    was_training = codec.training
    codec.eval()
    try:
        for wave in waves:
            codec.decode(codec.encode(wave[None]))
    finally:
        for hook in hooks:
            hook.remove()
        codec.train(was_training)
    local = Codec(dataclasses.replace(codec.config, decoder_span=list(span)))
    local.load_state_dict(codec.state_dict(), strict=False)
    for name, sums in seen.items():
        if not sums:
            raise ValueError("no recording to take statistics from")
        count, total, squares = torch.stack(sums).sum(0).unbind(1)
        norm = local.decoder.get_submodule(name)
        assert isinstance(norm, InputNorm)
        norm.mean.copy_(total / count)
        norm.variance.copy_(squares / count - (total / count).square())
    return local.eval()


def _note(sums: list[Tensor], module: Any, inputs: tuple[Tensor, ...]) -> None:
    """Number, sum and sum of squares of each group, [groups, 3], in float64."""
    groups = inputs[0].double().reshape(inputs[0].shape[0], NUM_GROUPS, -1).transpose(0, 1).flatten(1)
    count = torch.full_like(groups[:, 0], groups.shape[1])
    sums.append(torch.stack([count, groups.sum(1), groups.square().sum(1)], dim=1))
