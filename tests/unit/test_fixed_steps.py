"""Sizes of decoding steps of fixed shapes, where they are refused, and their attention against that of a ragged row."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_omni.generation.cache import KVCache
from megatron_omni.generation.extents import Extent
from megatron_omni.generation.fixed_steps import LEAST_KEYS, check_decoding, keys_of, rows_of
from megatron_omni.generation.scheduler import Chunk
from megatron_omni.platform.device import accelerator_present


def test_sizes_are_few_and_hold_what_they_must() -> None:
    assert [rows_of(n) for n in (1, 2, 3, 4, 5, 8, 9, 31, 32, 33)] == [1, 4, 4, 4, 8, 8, 16, 32, 32, 64]
    assert [keys_of(n) for n in (1, LEAST_KEYS, LEAST_KEYS + 1, 3000, 4096, 4097)] == [256, 256, 512, 4096, 4096, 8192]
    assert len({(rows_of(n), keys_of(k)) for n in range(1, 65) for k in range(1, 32_769, 7)}) == 6 * 8


def groups(model: int, expert: int) -> SimpleNamespace:
    sizes = {"mp": model, "cp": 1, "ep": expert}
    return SimpleNamespace(**{name: SimpleNamespace(size=lambda size=size: size) for name, size in sizes.items()})


def test_where_steps_cannot_be_fixed_is_said() -> None:
    check_decoding("ragged", deterministic=False, pg=groups(2, 2))
    check_decoding("ragged", deterministic=True, pg=groups(1, 1))
    with pytest.raises(ValueError, match=r"deterministic is True .* expert = 2"):
        check_decoding("ragged", deterministic=True, pg=groups(1, 2))
    check_decoding("fixed", deterministic=False, pg=groups(1, 1))
    for deterministic, model, expert in ((True, 1, 1), (False, 2, 1), (False, 1, 2)):
        with pytest.raises(ValueError, match=r"decoding is 'fixed'.*set it to 'ragged'"):
            check_decoding("fixed", deterministic=deterministic, pg=groups(model, expert))
    if not accelerator_present():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            check_decoding("captured", deterministic=False, pg=groups(1, 1))


def attended(fixed: bool, dtype: torch.dtype) -> Tensor:
    """The same three answers after their prompts: lengths 5, 40 and 64, extents of three sizes, the last one at the end."""
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(192)
    extents, lengths = [Extent(128, 32), Extent(0, 64), Extent(64, 64)], [5, 40, 64]

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    prompts = [Chunk(i, 0, n - 1, e, True) for i, (n, e) in enumerate(zip(lengths, extents))]
    places = torch.cat([torch.arange(c.extent.offset, c.extent.offset + c.length) for c in prompts])
    cache.begin(prompts, places)
    cache.attend(0, drawn(len(places), 2, 3, 16), drawn(len(places), 2, 16), drawn(len(places), 2, 16), 0.3)
    order = [0, 1, 2]
    if fixed:
        cache.reach(160)
        columns = [[e.offset + n - 1, e.offset, n] for n, e in zip(lengths, extents)]
        table = torch.tensor([columns[i] for i in [*order, 0]])  # the row that is left over
        cache.begin_fixed(*table.t(), 256)
        order.append(0)
    else:
        cache.begin(
            [Chunk(i, n - 1, 1, e, True) for i, (n, e) in enumerate(zip(lengths, extents))],
            torch.tensor([e.offset + n - 1 for n, e in zip(lengths, extents)]),
        )
    query, key, value = drawn(3, 2, 3, 16), drawn(3, 2, 16), drawn(3, 2, 16)
    return cache.attend(0, query[order], key[order], value[order], 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_of_a_ragged_row(dtype: torch.dtype) -> None:
    expected, got = attended(False, dtype), attended(True, dtype)
    # torch's product rounds the weights to bf16, of values of about 1; the ragged row's kernel keeps them in fp32.
    rounding = {"rtol": 1.6e-2, "atol": 2**-8} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got[:3], expected, **rounding)
    assert torch.equal(got[3], got[0]), "a row that is left over repeats the first one"
