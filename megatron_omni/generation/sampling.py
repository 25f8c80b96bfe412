"""Choice of the next token from logits, for many answers at once, each with settings of its own.

For one row of logits z [V], V the model's vocabulary (the columns that the loss is over, models/language.py):

    z <- z / r where z > 0 else z r      tokens of the prompt or the answer, r = repetition_penalty (Keskar et al. 2019)
    z <- z - f count - p [count > 0]     count = times that the answer has the token, f frequency_, p presence_penalty
    z <- -inf                            tokens that may not be chosen (``banned_ids``), or not yet (``min_new_tokens``)
    greedy: the largest z, the lowest id among equals
    q = softmax(z / temperature)
    q <- 0 where q < min_p max q
    q <- 0 but the ``top_k`` most likely
    q <- 0 but the nucleus: the shortest run of the tokens, sorted by falling q, whose sum reaches top_p of the sum of q
                                         (Holtzman et al. 2019); among equals the lower id first

A token is drawn by inverting the cumulative sum of q *in the order of token ids*, with one uniform number for each
(seed, number of the token in the answer): the draw does not depend on what else is computed nor on the layout of the
model, and a rounding difference in the logits moves it only when it falls on a boundary.

Probabilities are float32, their sums float64. The k most likely tokens and the nucleus are found without sorting: both
are the smallest set of the largest values whose weights reach a goal. Histograms over the digits of a float32's bits, the
highest digit first, give it exactly (:func:`smallest_upper_set`). On an accelerator no shape depends on a value, so
nothing waits for it.

Shapes: R rows, V columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_omni.generation.request import Sampling
from megatron_omni.platform.seeds import named_seed

INVALID_TOKEN = -1
"""Returned in place of a token where a row's logits are not finite."""
EDGE = 1e-5
"""Of the probability of all tokens."""
_ALL_BITS = 30
"""Of a float32 from 0 to 2."""
_FEW_COLUMNS = 1 << 13
"""Up to so many, passing over them three times takes less than adding up two histograms of 2^15 places."""


def derived_seed(seed: int, number: int) -> int:
    """Seed of sample ``number`` of a request with ``seed``; its own is that of sample 0."""
    return seed if number == 0 else named_seed(seed, "sample", number)


def uniform_draw(seed: int, step: int) -> float:
    """A number in [0, 1) that belongs to (seed, step) for all time, with 53 bits."""
    return (named_seed(seed, "sampling", step) >> 10) / 2**53


class History:
    """What an answer with penalties has said: counts that grow by one token at a time."""

    def __init__(self, prompt: Tensor, vocab_size: int, device: torch.device) -> None:
        """``prompt`` [L] int64 ids, anywhere; ids from ``vocab_size`` on count nothing."""
        self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.in_prompt[prompt[prompt < vocab_size].to(device)] = True
        self.count = torch.zeros(vocab_size, dtype=torch.float32, device=device)

    def add(self, token: int) -> None:
        """The answer has one more token."""
        self.count[token] += 1.0

    def penalise(self, logits: Tensor, sampling: Sampling) -> None:
        """Apply the penalties to ``logits`` [V] in place."""
        said = self.count > 0
        if sampling.repetition_penalty != 1.0:
            penalised = torch.where(
                logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
            )
            logits.copy_(torch.where(said | self.in_prompt, penalised, logits))
        logits.sub_(sampling.frequency_penalty * self.count + sampling.presence_penalty * said)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How the token of one row is chosen."""

    sampling: Sampling
    step: int
    """Number of the token in the answer."""
    history: History | None = None
    """Of the answer, where there are penalties."""
    forbidden: Sequence[int] = field(default=())
    """Tokens that cannot be chosen."""


def choose(logits: Tensor, choices: Sequence[Choice], *, near_edge: Tensor | None = None) -> Tensor:
    """[R] int64: the token of each row of ``logits`` [R, V] float32; INVALID_TOKEN where they are not finite.

    ``near_edge`` [R] bool is set where a draw that is moved by :data:`EDGE`, up or down, is of another token: rounding may
    choose that one.
    """
    assert len(logits) == len(choices), "one choice for each row of logits"
    finite = logits.sum(-1).isfinite()  # one that is not makes the sum so
    changed = [i for i, c in enumerate(choices) if c.history is not None or c.forbidden]
    if changed:
        logits = logits.clone()
        for i in changed:
            if (history := choices[i].history) is not None:
                history.penalise(logits[i], choices[i].sampling)
            if choices[i].forbidden:
                logits[i, list(choices[i].forbidden)] = -torch.inf
    drawn = [i for i, c in enumerate(choices) if c.sampling.temperature > 0.0]
    if len(drawn) < len(choices):
        tokens = logits.argmax(-1)
        if drawn:
            tokens[drawn], near = _drawn(logits[drawn], [choices[i] for i in drawn], tell=near_edge is not None)
            if near_edge is not None:
                near_edge[drawn] = near
    else:
        tokens, near = _drawn(logits, choices, tell=near_edge is not None)
        if near_edge is not None:
            near_edge.copy_(near)
    return torch.where(finite, tokens, INVALID_TOKEN)


def token_log_probabilities(logits: Tensor, tokens: Tensor, *, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """[R] float32 log-probabilities of ``tokens`` [R] under the model, and the ``top`` most likely ids and theirs,
    [R, top] each, falling. A token of INVALID_TOKEN gets the value of any."""
    normalizer = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, tokens.clamp_min(0).unsqueeze(-1)) - normalizer
    values, ids = logits.topk(min(top, logits.shape[-1]), dim=-1)
    return chosen.squeeze(-1), ids, values - normalizer


def smallest_upper_set(values: Tensor, weights: Tensor, goal: Tensor) -> Tensor:
    """[R, V] bool: per row the smallest set of the largest ``values`` whose ``weights`` sum to ``goal`` or more.

    ``values`` [R, V] float32 from 0 to 1; ``weights`` [R, V] float64, not negative; ``goal`` [R, 1] float64, positive.
    Among equal values the lower index first; all where the sum of all is less than the goal.
    """
    bits = values.contiguous().view(torch.int32)  # as integers they are in the same order
    edge = torch.zeros_like(goal, dtype=torch.int32)
    narrowed, columns = bits, None
    width = 10 if values.shape[-1] <= _FEW_COLUMNS else 15
    for shift in range(_ALL_BITS - width, -1, -width):
        digits = narrowed >> shift & ((1 << width) - 1)
        digit, goal = _crossed(digits, width, weights, goal)
        edge = edge << width | digit
        inside = digits == digit
        if values.device.type == "cpu" and columns is None:  # fewer columns, and nothing waits
            columns = inside.view(torch.uint8).amax(0).nonzero().squeeze(1)  # `any` of booleans is forty times as slow
            narrowed, weights, inside = bits[:, columns], weights[:, columns], inside[:, columns]
        weights = weights * inside
    kept = values > edge.view(torch.float32)
    ties = narrowed == edge
    weights = weights * ties
    ties &= weights.cumsum(-1) - weights < goal  # ties have one value, so this is exact enough
    if columns is None:
        return kept | ties
    kept[:, columns] |= ties
    return kept


def _crossed(digits: Tensor, width: int, weights: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """[R, 1] int32: the digit of ``width`` bits, from the highest down, with which the sum of weights reaches the goal;
    what of the goal is left when all above it are taken."""
    sums = weights.new_zeros(len(weights), 1 << width).scatter_add_(-1, digits.long(), weights)
    sums = sums.flip(-1).cumsum(-1)
    place = torch.searchsorted(sums, goal).clamp_max_(sums.shape[-1] - 1)
    above = torch.where(place > 0, sums.gather(-1, (place - 1).clamp_min(0)), 0.0)
    return (sums.shape[-1] - 1 - place).int(), goal - above


def _drawn(logits: Tensor, choices: Sequence[Choice], *, tell: bool) -> tuple[Tensor, Tensor]:
    """[R] tokens of rows with a temperature, and with ``tell`` whether each was drawn near an edge (else False)."""

    def column(values: list[Any], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device).unsqueeze(-1)

    settings = [choice.sampling for choice in choices]
    scaled = logits / column([s.temperature for s in settings], torch.float32)
    weights = torch.softmax(scaled, -1)
    if any(s.min_p > 0.0 for s in settings):
        least = weights.amax(-1, keepdim=True) * column([s.min_p for s in settings], torch.float32)
        weights = weights * (weights >= least)  # `where` does not use vectors and takes four times as long
    if any(s.top_k > 0 for s in settings):
        goal = column([s.top_k or logits.shape[-1] for s in settings])
        weights = weights * smallest_upper_set(weights, (weights > 0).double(), goal)
    if any(s.top_p < 1.0 for s in settings):
        wide = weights.double()
        goal = wide.sum(-1, keepdim=True) * column([s.top_p if s.top_p < 1.0 else 2.0 for s in settings])
        weights = weights * smallest_upper_set(weights, wide, goal)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    point = total * column([uniform_draw(choice.sampling.seed, choice.step) for choice in choices])
    if tell:
        apart = EDGE * total
        point = torch.cat([point, point - apart, point + apart], -1).clamp_min_(0.0)
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
    # right=True: the first token whose cumulative sum exceeds the point, hence one of positive probability.
    tokens = torch.searchsorted(cumulative, point, right=True).clamp_(max=logits.shape[-1] - 1)
    return tokens[:, 0], (tokens != tokens[:, :1]).any(1)


def next_token_probabilities(logits: Tensor, choice: Choice) -> Tensor:
    """[V] float64 distribution of the next token after ``logits`` [V], straight from the definition above; the
    reference of :func:`choose`."""
    z, s = logits.double().clone(), choice.sampling
    assert s.temperature > 0.0, "greedy decoding has no distribution"
    if choice.history is not None:
        count, seen = choice.history.count, (choice.history.count > 0) | choice.history.in_prompt
        z[seen] = torch.where(z[seen] > 0, z[seen] / s.repetition_penalty, z[seen] * s.repetition_penalty)
        z -= s.frequency_penalty * count + s.presence_penalty * (count > 0)
    z[list(choice.forbidden)] = -torch.inf
    q = torch.softmax(z / s.temperature, -1)
    q[q < s.min_p * q.max()] = 0.0
    order = q.sort(descending=True, stable=True).indices
    q[order[s.top_k or len(q) :]] = 0.0
    reached = q[order].cumsum(-1) >= s.top_p * q.sum()
    q[order[int(reached.int().argmax()) + 1 :] if s.top_p < 1.0 else []] = 0.0
    return q / q.sum()
