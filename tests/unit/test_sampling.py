"""Choice of the next token: the nucleus against its definition, temperature, and draws that belong to their row."""

import math

import pytest
import torch

from megatron_omni.generation.request import GREEDY, Sampling
from megatron_omni.generation.sampling import (
    INVALID_TOKEN,
    next_token_probabilities,
    next_tokens,
    nucleus_mask,
    uniform_draw,
)


def nucleus_by_definition(probabilities: list[float], top_p: float) -> set[int]:
    """Add tokens from the most likely one down until the sum reaches ``top_p``."""
    chosen: set[int] = set()
    mass = 0.0
    for token in sorted(range(len(probabilities)), key=lambda t: (-probabilities[t], t)):
        chosen.add(token)
        mass += probabilities[token]
        if mass >= top_p:
            break
    return chosen


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_nucleus_equals_its_definition(top_p: float) -> None:
    generator = torch.Generator().manual_seed(5)
    probabilities = torch.softmax(3 * torch.randn(50, 37, dtype=torch.float64, generator=generator), dim=-1)
    mask = nucleus_mask(probabilities, top_p)
    for row in range(50):
        assert set(mask[row].nonzero().flatten().tolist()) == nucleus_by_definition(probabilities[row].tolist(), top_p)


def test_a_sum_that_reaches_top_p_exactly_ends_the_nucleus() -> None:
    assert nucleus_mask(torch.tensor([[0.15, 0.5, 0.3, 0.05]], dtype=torch.float64), 0.8).sum() == 2


def test_ties_of_the_nucleus_go_to_the_lower_token() -> None:
    assert nucleus_mask(torch.full((1, 4), 0.25, dtype=torch.float64), 0.5).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_divides_the_logits(temperature: float) -> None:
    logits = [2.0, -1.0, 0.5, 0.0]
    weights = [math.exp(z / temperature) for z in logits]
    expected = [w / sum(weights) for w in weights]
    got = next_token_probabilities(torch.tensor([logits]), Sampling(temperature=temperature), vocab_size=4)
    assert got[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_probabilities_outside_the_nucleus_are_zero_and_the_rest_sums_to_one() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64))
    got = next_token_probabilities(logits, Sampling(temperature=1.0, top_p=0.7), vocab_size=4)
    assert got[0].tolist() == pytest.approx([0.625, 0.375, 0.0, 0.0], rel=1e-12)


def test_greedy_takes_the_largest_real_column() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 99.0], [2.0, -1.0, 0.0, 99.0]])
    assert next_tokens(logits, GREEDY, vocab_size=3, seed=0, rows=[0, 1], step=0).tolist() == [1, 0]


def test_padded_columns_are_never_sampled() -> None:
    logits = torch.zeros(200, 8)
    logits[:, 5:] = 50.0
    tokens = next_tokens(logits, Sampling(temperature=1.0), vocab_size=5, seed=1, rows=range(200), step=3)
    assert set(tokens.tolist()) == {0, 1, 2, 3, 4}


def test_frequencies_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    n = 20_000
    logits = torch.log(probabilities + 1e-300).expand(n, 4)
    tokens = next_tokens(logits, Sampling(temperature=1.0), vocab_size=4, seed=11, rows=range(n), step=0)
    share = torch.bincount(tokens, minlength=4) / n
    # Five standard deviations of a binomial share with 20,000 draws is at most 0.018.
    assert torch.allclose(share.double(), probabilities, atol=0.018)
    assert share[1] == 0


def test_a_draw_belongs_to_its_seed_row_and_step() -> None:
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(2))
    sampling = Sampling(temperature=1.5, top_p=0.95)
    rows = [4, 9, 0, 17, 3, 8]
    together = next_tokens(logits, sampling, vocab_size=97, seed=3, rows=rows, step=5)
    for i, row in enumerate(rows):
        alone = next_tokens(logits[i : i + 1], sampling, vocab_size=97, seed=3, rows=[row], step=5)
        assert together[i] == alone[0]
    backwards = next_tokens(logits.flip(0), sampling, vocab_size=97, seed=3, rows=rows[::-1], step=5)
    assert backwards.flip(0).tolist() == together.tolist()


def test_draws_differ_between_seeds_rows_and_steps() -> None:
    draws = {uniform_draw(seed, row, step) for seed in range(8) for row in range(8) for step in range(8)}
    assert len(draws) == 512
    assert all(0.0 <= u < 1.0 for u in draws)
    assert abs(sum(draws) / 512 - 0.5) < 0.07  # 5 standard errors of a uniform mean
    assert uniform_draw(-1, 0, 0) != uniform_draw(1, 0, 0)


def test_a_rounding_difference_in_the_logits_does_not_move_the_draw() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(500, 64, generator=generator)
    noisy = logits + 1e-6 * torch.randn(500, 64, generator=generator)
    sampling = Sampling(temperature=1.0)
    first, second = (next_tokens(z, sampling, vocab_size=64, seed=0, rows=range(500), step=0) for z in (logits, noisy))
    assert (first != second).sum() <= 1


def test_rows_without_finite_logits_are_reported_and_leave_the_others_alone() -> None:
    logits = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [1.0, 0.0]])
    for sampling in (GREEDY, Sampling(temperature=1e-3)):
        tokens = next_tokens(logits, sampling, vocab_size=2, seed=0, rows=[0, 1, 2], step=0)
        assert tokens.tolist() == [1, INVALID_TOKEN, 0]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.01}, "top_p"),
        ({"top_p": 0.9}, "greedy"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, float], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Sampling(**settings)
