"""Choice of the next token from logits: greedy, temperature and top-p (nucleus), as pure functions.

p = softmax(z / temperature) over the real vocabulary (columns added to make the table divisible are never chosen). The
nucleus is the shortest prefix of the tokens, sorted by falling p (ties: lower id first), whose sum reaches ``top_p``
(Holtzman et al. 2019). A token is drawn by inverting the cumulative sum of the nucleus *in the order of token ids*,
with one uniform number per (seed, row, step): the draw does not depend on what else is in the batch nor on the layout
of the model, and a rounding difference in the logits moves it only when it falls on a boundary.

Shapes: B rows, V columns of the logits (padded vocabulary). Arithmetic is float64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_omni.generation.request import Sampling
from megatron_omni.platform.seeds import named_seed

INVALID_TOKEN = -1
"""Returned in place of a token where a row's logits are not finite."""


def uniform_draw(seed: int, row: int, step: int) -> float:
    """A number in [0, 1) that belongs to (seed, row, step) for all time, with 53 bits."""
    return (named_seed(seed, "sampling", row, step) >> 10) / 2**53


def nucleus_mask(probabilities: Tensor, top_p: float) -> Tensor:
    """[B, V] bool: the smallest set of most likely tokens whose probability reaches ``top_p``; at least one token."""
    if top_p >= 1.0:
        return torch.ones_like(probabilities, dtype=torch.bool)
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    kept[:, 1:] = ordered.cumsum(-1)[:, :-1] < top_p
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def next_token_probabilities(logits: Tensor, sampling: Sampling, *, vocab_size: int) -> Tensor:
    """[B, vocab_size] float64 distribution that a temperature above 0 samples from; rows sum to 1."""
    assert sampling.temperature > 0.0, "greedy decoding has no distribution"
    probabilities = torch.softmax(logits[:, :vocab_size].double() / sampling.temperature, dim=-1)
    kept = probabilities * nucleus_mask(probabilities, sampling.top_p)
    return kept / kept.sum(-1, keepdim=True)


def next_tokens(
    logits: Tensor, sampling: Sampling, *, vocab_size: int, seed: int, rows: Sequence[int], step: int
) -> Tensor:
    """[B] int64: the token that follows each row of ``logits`` [B, V]; INVALID_TOKEN where they are not finite.

    ``rows`` names each row of the batch (the prompt's number in the caller's list), ``step`` counts generated tokens.
    """
    assert logits.size(0) == len(rows), "one row name for each row of logits"
    real = logits[:, :vocab_size]
    if sampling.temperature == 0.0:
        tokens = real.argmax(-1)
    else:
        cumulative = next_token_probabilities(logits, sampling, vocab_size=vocab_size).cumsum(-1)
        total = cumulative[:, -1:]
        draws = [uniform_draw(seed, row, step) for row in rows]
        point = total * torch.tensor(draws, dtype=torch.float64, device=logits.device).unsqueeze(-1)
        point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
        # right=True: the first token whose cumulative sum exceeds the point, hence one of positive probability.
        tokens = torch.searchsorted(cumulative, point, right=True).squeeze(-1).clamp_(max=vocab_size - 1)
    return torch.where(torch.isfinite(real).all(-1), tokens, INVALID_TOKEN)
