"""Choice of the next token: every rule against its definition in float64, and draws that belong to their answer."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from megatron_omni.generation.request import GREEDY, Sampling
from megatron_omni.generation.sampling import (
    _FEW_COLUMNS,
    INVALID_TOKEN,
    Choice,
    History,
    choose,
    derived_seed,
    next_token_probabilities,
    smallest_upper_set,
    token_log_probabilities,
    uniform_draw,
)


def upper_set_by_definition(values: list[float], weights: list[float], goal: float) -> set[int]:
    """Add places from the largest value down, the lower place first, until the weights reach the goal."""
    chosen: set[int] = set()
    mass = 0.0
    for place in sorted(range(len(values)), key=lambda t: (-values[t], t)):
        chosen.add(place)
        mass += weights[place]
        if mass >= goal:
            break
    return chosen


MANY = _FEW_COLUMNS + 5


def rows_of_probabilities(rows: int = 50, columns: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    scales = torch.linspace(0.01, 8.0, rows).unsqueeze(1)  # from flat ones to one token that has nearly all
    return torch.softmax(scales * torch.randn(rows, columns, generator=generator), dim=-1)


@pytest.mark.parametrize("rows, columns", [(50, 300), (3, MANY)])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.9, 0.999, 1.5])
def test_the_nucleus_equals_its_definition(top_p: float, rows: int, columns: int) -> None:
    values = rows_of_probabilities(rows, columns)
    goal = top_p * values.sum(-1, keepdim=True, dtype=torch.float64)
    kept = smallest_upper_set(values, values.double(), goal)
    for row in range(len(values)):
        # What is summed in another order may differ in the last bits, and so in the token that reaches the goal exactly.
        expected = upper_set_by_definition(values[row].tolist(), values[row].double().tolist(), float(goal[row]))
        assert set(kept[row].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("k", [1, 2, 17, 299, 300, 400])
def test_the_most_likely_tokens_equal_their_definition(k: int) -> None:
    values = rows_of_probabilities()
    values[:, 40:90] = values[:, 7:8]  # fifty equals, through which some k cut
    kept = smallest_upper_set(values, torch.ones_like(values).double(), torch.full((50, 1), float(k)).double())
    for row in range(len(values)):
        order = sorted(range(300), key=lambda t: (-float(values[row, t]), t))
        assert set(kept[row].nonzero().flatten().tolist()) == set(order[:k])


@pytest.mark.parametrize("columns", [5, MANY])
def test_values_that_differ_in_their_last_bit_are_told_apart(columns: int) -> None:
    one = torch.tensor(0.25)
    more = torch.nextafter(one, torch.tensor(1.0))
    values = torch.stack([one, more, one, more, *[torch.tensor(0.0)] * (columns - 4)]).unsqueeze(0)
    weights = torch.ones(1, columns, dtype=torch.float64)
    for goal, expected in enumerate([[1], [1, 3], [0, 1, 3], [0, 1, 2, 3]], 1):
        kept = smallest_upper_set(values, weights, torch.tensor([[float(goal)]], dtype=torch.float64))
        assert kept[0].nonzero().flatten().tolist() == expected


def test_a_sum_that_reaches_top_p_exactly_ends_the_nucleus() -> None:
    values = torch.tensor([[0.125, 0.5, 0.25, 0.125]])
    assert smallest_upper_set(values, values.double(), torch.tensor([[0.75]]).double()).sum() == 2
    assert smallest_upper_set(torch.full((1, 4), 0.25), torch.full((1, 4), 0.25).double(),
                              torch.tensor([[0.5]]).double()).tolist() == [[True, True, False, False]]  # fmt: skip


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_divides_the_logits(temperature: float) -> None:
    logits = [2.0, -1.0, 0.5, 0.0]
    weights = [math.exp(z / temperature) for z in logits]
    expected = [w / sum(weights) for w in weights]
    got = next_token_probabilities(torch.tensor(logits), choice(Sampling(temperature=temperature)))
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


def test_limits_act_in_their_order_each_on_what_the_one_before_left() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64))

    def kept(**limits: float) -> list[float]:
        return next_token_probabilities(logits, choice(Sampling(temperature=1.0, **limits))).tolist()

    assert kept(top_p=0.7) == pytest.approx([0.625, 0.375, 0.0, 0.0], rel=1e-12)
    assert kept(min_p=0.3) == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0.0], rel=1e-12)
    assert kept(top_k=2, top_p=0.6) == pytest.approx([1.0, 0.0, 0.0, 0.0]), "0.5 is 0.625 of what two tokens have"


def test_penalties_by_hand() -> None:
    history = History(torch.tensor([0, 3, 99]), 5, torch.device("cpu"))
    for token in (1, 1, 3):
        history.add(token)
    logits = torch.tensor([2.0, 4.0, 6.0, -3.0, 1.0])
    settings = Sampling(temperature=1.0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, seed=1)
    history.penalise(logits, settings)
    assert logits.tolist() == [1.0, 2.0 - 0.5 - 0.5, 6.0, -6.0 - 0.5 - 0.25, 1.0]


def choice(sampling: Sampling, step: int = 0, **more: object) -> Choice:
    return Choice(sampling=sampling, step=step, **more)


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [2.0, -1.0, 0.0, 1.0]])
    assert choose(logits, [choice(GREEDY)] * 2).tolist() == [1, 0]


def test_forbidden_tokens_are_never_chosen() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0]])
    choices = [choice(GREEDY, forbidden=(1,)), choice(Sampling(temperature=1e-3), forbidden=(1, 2))]
    assert choose(logits, choices).tolist() == [2, 0]
    assert logits[0, 1] == 3.0, "the logits are the caller's"


LIMITS = {
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "top_k": {"temperature": 1.3, "top_k": 6},
    "min_p": {"temperature": 1.0, "min_p": 0.2},
    "penalties": {"temperature": 1.0, "repetition_penalty": 1.7, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "all": {"temperature": 1.2, "top_p": 0.9, "top_k": 9, "min_p": 0.05, "repetition_penalty": 1.3,
            "presence_penalty": -0.4, "frequency_penalty": 0.3},
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_frequencies_follow_the_distribution(name: str) -> None:
    """Chi-square of 20,000 draws against the reference."""
    n, vocabulary, at_once = 20_000, 24, 500
    logits = 1.5 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(8))
    sampling = Sampling(seed=3, **LIMITS[name])
    history = None
    if sampling.penalised:
        history = History(torch.tensor([1, 4, 4]), vocabulary, torch.device("cpu"))
        for token in (2, 2, 4, 9):
            history.add(token)
    rule = choice(sampling, history=history)
    expected = next_token_probabilities(logits, rule)
    tokens = torch.cat(
        [
            choose(
                logits.expand(at_once, -1),
                [choice(sampling, step, history=history) for step in range(a, a + at_once)],
            )
            for a in range(0, n, at_once)
        ]
    )
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - n * expected).square()[possible] / (n * expected)[possible]).sum()
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 4.5 * math.sqrt(2 * freedom) + 4.5, f"{chi_square} with {freedom} degrees of freedom"


def test_every_draw_is_the_one_that_the_reference_gives() -> None:
    """The token is where the reference's cumulative sum passes the draw, boundaries within rounding aside."""
    vocabulary, rows = 2_000, 30
    generator = torch.Generator().manual_seed(6)
    logits = torch.linspace(0.1, 6, rows).unsqueeze(1) * torch.randn(rows, vocabulary, generator=generator)
    settings = [Sampling(seed=i, **limits) for i, limits in zip(range(rows), itertools.cycle(LIMITS.values()))]
    choices = [choice(s, step=7) for s in settings]
    tokens = choose(logits, choices).tolist()
    for row, rule in enumerate(choices):
        before = next_token_probabilities(logits[row], rule).cumsum(-1)
        draw = uniform_draw(rule.sampling.seed, 7)
        low = float(before[tokens[row] - 1]) if tokens[row] else 0.0
        assert low - 1e-5 <= draw <= float(before[tokens[row]]) + 1e-5


def test_a_row_is_chosen_as_if_it_were_alone() -> None:
    logits = torch.randn(12, 100, generator=torch.Generator().manual_seed(2))
    kinds = [GREEDY, *(Sampling(seed=3, **limits) for limits in LIMITS.values())]
    choices = [
        choice(kind, step, history=History(torch.tensor([step]), 100, torch.device("cpu")) if kind.penalised else None)
        for step, kind in zip(range(12), itertools.cycle(kinds))
    ]
    together = choose(logits, choices)
    assert together.tolist() == [int(choose(logits[i : i + 1], [choices[i]])) for i in range(12)]
    assert choose(logits.flip(0), choices[::-1]).flip(0).tolist() == together.tolist()


def test_draws_differ_between_seeds_samples_and_steps() -> None:
    draws = {
        uniform_draw(derived_seed(seed, sample), step)
        for seed in range(8) for sample in range(8) for step in range(8)
    }  # fmt: skip
    assert len(draws) == 512
    assert all(0.0 <= u < 1.0 for u in draws)
    assert abs(sum(draws) / 512 - 0.5) < 0.07  # 5 standard errors of a uniform mean
    assert uniform_draw(-1, 0) != uniform_draw(1, 0)
    assert derived_seed(5, 0) == 5, "the first sample of a request is the request's only one"


def test_a_rounding_difference_in_the_logits_does_not_move_the_draw() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(500, 64, generator=generator)
    noisy = logits + 1e-6 * torch.randn(500, 64, generator=generator)
    choices = [choice(Sampling(temperature=1.0), step) for step in range(500)]
    first, second = (choose(z, choices) for z in (logits, noisy))
    assert (first != second).sum() <= 1


def test_a_draw_near_an_edge_is_told() -> None:
    # Two tokens of one half each: the edge lies where the draw is, moved by the logit of the first.
    sampling = Sampling(temperature=1.0, seed=3)
    point = uniform_draw(3, 0)
    for distance, told in ((2e-6, True), (-2e-6, True), (5e-5, False), (-5e-5, False)):
        logits = torch.tensor([[math.log((point + distance) / (1 - point - distance)), 0.0]])
        near = torch.zeros(1, dtype=torch.bool)
        token = choose(logits, [choice(sampling)], near_edge=near)
        assert (int(token), bool(near)) == (0 if distance > 0 else 1, told)
    near = torch.zeros(2, dtype=torch.bool)
    choose(
        torch.tensor([[0.0, 0.0], [math.log(point / (1 - point)), 0.0]]),
        [choice(GREEDY), choice(sampling)],
        near_edge=near,
    )
    assert near.tolist() == [False, True]


def test_draws_near_an_edge_are_those_of_the_definition() -> None:
    """Edges lie between two tokens that can be drawn: neither 0 nor 1 is one, and what is forbidden has none."""
    logits, forbidden = rows_of_probabilities(4000).log(), [0, 1, 2, 100, 298, 299]
    near = torch.zeros(len(logits), dtype=torch.bool)
    drawn = [choice(Sampling(temperature=1.0), step, forbidden=forbidden) for step in range(len(logits))]
    choose(logits, drawn, near_edge=near)
    logits[:, forbidden] = -torch.inf
    edges = torch.softmax(logits.double(), -1).cumsum(-1)[:, 3:297]
    points = torch.tensor([[uniform_draw(0, step)] for step in range(len(logits))], dtype=torch.float64)
    assert near.tolist() == ((edges - points).abs().amin(-1) < 1e-5).tolist()
    assert 10 < near.sum() < 50


@pytest.mark.parametrize("point", [0.0, 5e-6, 1 - 5e-6, 1 - 2**-53])
@pytest.mark.parametrize("forbidden", [(), (0, 2)])
def test_the_ends_of_all_probabilities_are_no_edges(
    point: float, forbidden: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_omni.generation.sampling.uniform_draw", lambda seed, step: point)
    near = torch.ones(1, dtype=torch.bool)
    token = choose(torch.zeros(1, 3), [choice(Sampling(temperature=1.0), forbidden=forbidden)], near_edge=near)
    assert (int(token), bool(near)) == (1 if forbidden else 2 * round(point), False)


def test_rows_without_finite_logits_are_reported_and_leave_the_others_alone() -> None:
    logits = torch.tensor([[0.0, 1.0], [math.nan, 1.0], [1.0, 0.0], [math.inf, 0.0], [0.0, -math.inf]])
    for sampling in (GREEDY, Sampling(temperature=1e-3)):
        tokens = choose(logits, [choice(sampling)] * 5)
        assert tokens.tolist() == [1, INVALID_TOKEN, 0, INVALID_TOKEN, INVALID_TOKEN]


def test_log_probabilities_are_those_of_the_model() -> None:
    logits = 3 * torch.randn(7, 50, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([0, 49, 3, INVALID_TOKEN, 9, 9, 20])
    chosen, ids, values = token_log_probabilities(logits, tokens, top=5)
    expected = torch.log_softmax(logits.double(), -1)
    known = tokens >= 0
    torch.testing.assert_close(
        chosen[known].double(), expected[known].gather(1, tokens[known].unsqueeze(1)).squeeze(1), rtol=0, atol=1e-6
    )
    best, places = expected.sort(descending=True)
    torch.testing.assert_close(values.double(), best[:, :5], rtol=0, atol=1e-6)
    assert torch.equal(ids, places[:, :5])


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
