"""Attention of single tokens over a cache: every engine against float64, at lengths around its blocks and vectors."""

import pytest
import torch
from torch import Tensor

from megatron_omni.ops.cached_attention import cached_attention, cached_attention_reference
from megatron_omni.ops.extension import use_cpu_engine
from tests.ops.ragged import ENGINES

COUNTS = torch.tensor([0, 1, 2, 15, 16, 17, 63, 64, 65, 128, 333, 690])
POSITIONS = 700
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-14}
"""Of values of about 1: the result is rounded once."""


def drawn(groups: int, heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query (its heads a part of longer rows, two tokens more than there are counts), keys, values, places."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(len(COUNTS) + 2, groups, heads + 1, width, generator=generator).to(dtype)[:, :, :heads]
    keys, values = torch.randn(2, POSITIONS, groups, width, generator=generator).to(dtype)
    places = torch.randint(POSITIONS, COUNTS.shape, generator=generator).maximum(COUNTS - 1)
    places[0] = POSITIONS + 5  # of a token that sees nothing
    return query, keys, values, places


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("sizes", [(2, 2, 32), (1, 7, 128), (3, 1, 40), (2, 3, 5)])
def test_it_is_softmax_over_what_a_token_sees(engine: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    query, keys, values, places = drawn(*sizes, dtype)
    with use_cpu_engine(engine):
        got = cached_attention(query, keys, values, places, COUNTS)
    assert got.dtype == dtype and got.is_contiguous() and got.shape == query.shape
    expected = cached_attention_reference(
        query.double(), keys.double(), values.double(), places, COUNTS, sizes[2] ** -0.5
    )
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    assert not got[0].any() and not got[len(COUNTS) :].any(), "who sees nothing gets zeros"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_token_does_not_depend_on_what_is_computed_beside_it(engine: str) -> None:
    """Bit for bit: another row of the step, other places in the cache."""
    query, keys, values, places = drawn(2, 3, 40, torch.float32)
    moved = torch.cat([torch.full_like(keys[:3], torch.nan), keys]), torch.cat([torch.zeros_like(values[:3]), values])
    with use_cpu_engine(engine):
        together = cached_attention(query, keys, values, places, COUNTS)
        for t in range(1, len(COUNTS)):
            one = slice(t, t + 1)
            alone = cached_attention(query[one], *moved, places[one] + 3, COUNTS[one])
            assert torch.equal(alone[0], together[t]), t


@pytest.mark.parametrize("engine", ENGINES)
def test_large_scores_and_what_is_not_finite(engine: str) -> None:
    """Scores of thousands do not overflow; a NaN that a token sees is in its output and in no other's."""
    query, keys, values, places = drawn(1, 2, 32, torch.float32)
    with use_cpu_engine(engine):
        got = cached_attention(query, keys, values, places, COUNTS, scale=1000.0)
        expected = cached_attention_reference(query.double(), keys.double(), values.double(), places, COUNTS, 1000.0)
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)
        for broken in (keys, values):
            broken[places[5]] = torch.nan
            got = cached_attention(query, keys, values, places, COUNTS)
            sees = [bool(c) and int(p) - int(c) < int(places[5]) <= int(p) for p, c in zip(places, COUNTS)]
            assert got[: len(COUNTS)].isnan().flatten(1).any(1).tolist() == sees
            broken[places[5]] = 1.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda a: a | {"keys": a["keys"].double()}, "keys: dtype"),
        (lambda a: a | {"values": a["values"][:-1]}, "values: has 699 positions"),
        (lambda a: a | {"keys": a["keys"][:, :, :3]}, r"keys: is \[700, 2, 3\], must be"),
        (lambda a: a | {"counts": a["counts"] + 1}, r"counts: .*outside 0\.\.699"),
        (lambda a: a | {"places": a["places"][:3]}, "counts: has 12 entries, must have 3"),
        (lambda a: a | {"query": a["query"][:5]}, "places: has 12 entries for 5 tokens"),
        (lambda a: a | {"query": a["query"].flatten(1, 2)}, "query: has 3 dimensions"),
        (lambda a: a | {"query": a["query"].transpose(2, 3)}, "query: its rows"),
    ],
)
def test_wrong_arguments_are_named(change, named: str) -> None:
    query, keys, values, places = drawn(2, 3, 5, torch.float32)
    arguments = {"query": query, "keys": keys, "values": values, "places": places, "counts": COUNTS}
    with pytest.raises(ValueError, match=named):
        cached_attention(**change(arguments))


def test_its_fake_kernel_gives_its_shape() -> None:
    query, keys, values, places = drawn(2, 3, 5, torch.float32)
    torch.library.opcheck(torch.ops.megatron_omni.cached_attention.default, (query, keys, values, places, COUNTS, 0.5))
