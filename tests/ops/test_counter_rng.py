"""Counter-based draws: the hash in plain integers, uniformity, independence, the same values in any arrangement."""

import math

import pytest
import torch

from megatron_omni.ops import counter_rng
from megatron_omni.ops.counter_rng import Purpose, gumbel, uniform
from megatron_omni.ops.extension import use_cpu_engine
from tests.ops.ragged import ENGINES

KEY = {"seed": 1234, "step": 7, "layer": 3, "purpose": Purpose.GUMBEL}
M64 = (1 << 64) - 1
M32 = (1 << 32) - 1


def draws(num_tokens=4000, num_draws=64, sample=None, start=0, **changes):
    sample_ids = torch.arange(num_tokens) // 100 if sample is None else torch.full((num_tokens,), sample)
    positions = (
        torch.arange(start, start + num_tokens) % 100 if sample is None else torch.arange(start, start + num_tokens)
    )
    return uniform(sample_ids, positions, num_draws=num_draws, **(KEY | changes))


def splitmix(x):
    x &= M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def one_draw(seed, step, layer, purpose, sample, position, column):
    golden = 0x9E3779B97F4A7C15
    call = 0
    for part in (seed, step, layer, purpose):
        call = splitmix(call + golden + splitmix(part + golden))
    key = splitmix(splitmix(sample + call) + position * golden)
    x = ((key & M32) + column * 0x9E3779B9) & M32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & M32
    x ^= key >> 32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & M32
    x ^= x >> 16
    # the 23 highest bits, read as a signed number around one half
    high = x >> 9
    signed = high - (1 << 23) if high >= (1 << 22) else high
    return 0.5 + (signed + 0.5) * 2.0**-23


def test_equals_the_hash_in_unbounded_integers():
    samples, positions = torch.tensor([0, 5, 5, 2**40 + 3, -1]), torch.tensor([0, 0, 9, 123456, 17])
    got = uniform(samples, positions, num_draws=3, seed=2**33 + 5, step=10**6, layer=55, purpose=Purpose.BERNOULLI)
    for t, (sample, position) in enumerate(zip(samples.tolist(), positions.tolist(), strict=True)):
        for column in range(3):
            expected = one_draw(2**33 + 5, 10**6, 55, Purpose.BERNOULLI, sample, position, column)
            assert got[t, column].item() == expected


def test_values_lie_strictly_inside_the_unit_interval():
    u = draws(num_tokens=40_000, num_draws=128)
    assert u.dtype == torch.float32
    assert 0.0 < u.min().item() < 1e-5 and 1 - 1e-5 < u.max().item() < 1.0
    # every value is an odd multiple of 2^-24, so 0 and 1 cannot occur whatever the hash gives
    odd = u.double() * 2**24
    assert torch.equal(odd, odd.round()) and bool((odd.long() % 2 == 1).all())


def test_uniform_by_chi_square():
    u = draws(num_tokens=8000, num_draws=64)
    counts = torch.bincount((u.flatten().double() * 256).long(), minlength=256).double()
    expected = u.numel() / 256
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)  # mean and deviation of chi-square with 255 degrees of freedom


@pytest.mark.parametrize("pair", ["columns", "positions", "samples"])
def test_neighbours_are_independent(pair):
    """Joint 16 x 16 histogram of neighbouring draws by chi-square (255 degrees of freedom)."""
    if pair == "columns":
        u = draws(num_tokens=8000)
        a, b = u[:, :-1], u[:, 1:]
    elif pair == "positions":
        u = draws(num_tokens=8000, sample=4)
        a, b = u[:-1], u[1:]
    else:
        a, b = draws(num_tokens=8000, sample=4), draws(num_tokens=8000, sample=5)
    joint = torch.bincount((a.flatten().double() * 16).long() * 16 + (b.flatten().double() * 16).long(), minlength=256)
    expected = a.numel() / 256
    chi2 = ((joint.double() - expected) ** 2 / expected).sum().item()
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize(
    "change", [{"seed": 1235}, {"step": 8}, {"layer": 4}, {"purpose": Purpose.BERNOULLI}, {"seed": 7, "step": 1234}]
)
def test_every_part_of_the_key_gives_fresh_draws(change):
    a, b = draws().flatten().double(), draws(**change).flatten().double()
    assert (a == b).float().mean().item() < 1e-4
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_a_token_keeps_its_draws_wherever_it_lies():
    sample_ids, positions = torch.arange(300) // 10, torch.arange(300) % 10
    whole = uniform(sample_ids, positions, num_draws=300, **KEY)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(sample_ids[order], positions[order], num_draws=300, **KEY), whole[order])
    assert torch.equal(uniform(sample_ids[140:150], positions[140:150], num_draws=300, **KEY), whole[140:150])
    assert torch.equal(uniform(sample_ids, positions, num_draws=5, **KEY), whole[:, :5])


def test_gumbel_argmax_draws_from_softmax():
    z = torch.tensor([1.0, 0.0, -1.0, 0.5, 0.2])
    num = 200_000
    noise = gumbel(uniform(torch.zeros(num, dtype=torch.long), torch.arange(num), num_draws=5, **KEY))
    frequency = torch.bincount((z + noise).argmax(1), minlength=5).double() / num
    p = torch.softmax(z.double(), 0)
    assert bool(((frequency - p).abs() < 5 * (p * (1 - p) / num).sqrt()).all())


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match=r"sample_ids \(2,\) and positions \(3,\)"):
        uniform(torch.zeros(2), torch.zeros(3), num_draws=1, **KEY)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("num_draws", [0, 1, 5, 16, 133])
def test_kernel_equals_reference_bit_for_bit(engine, num_draws):
    generator = torch.Generator().manual_seed(num_draws)
    sample_ids, positions = torch.randint(-(2**62), 2**62, (2, 700), generator=generator)
    for call in (0, -1, 2**63 - 1, -(2**63)):
        expected = counter_rng._uniform_reference(sample_ids, positions, num_draws, call)
        with use_cpu_engine(engine):
            got = torch.ops.megatron_omni.counter_uniform(sample_ids, positions, num_draws, call)
        assert torch.equal(got, expected)


def test_kernel_is_registered_and_names_bad_arguments():
    op, ids = torch.ops.megatron_omni.counter_uniform.default, torch.arange(6)
    torch.library.opcheck(op, (ids, ids, 3, 5))
    for name, arguments in {
        "sample_ids": (ids.int(), ids, 3, 5),
        "positions": (ids, ids[1:], 3, 5),
        "num_draws": (ids, ids, -1, 5),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: "):
            op(*arguments)
