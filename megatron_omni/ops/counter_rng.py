"""Counter-based uniform draws: every random number is a hash of what it is for, never of when or where it is drawn.

``u[t, i] = hash(seed, step, layer, purpose, sample_ids[t], positions[t], i)`` in (0, 1). A token therefore meets the
same jitter, Gumbel noise and Bernoulli draws on every device, under every layout (TP/SP, PP, EP, micro-batch order)
and again when a layer is recomputed; there is no generator state to save in a checkpoint.

Method: a 64-bit key per token by chained splitmix64 finalisers (Steele, Lea, Flood 2014), then a 32-bit finaliser
("lowbias32" constants, C. Wellons) over key and column, fed with both halves of the key. Integer arithmetic wraps and
is therefore exact everywhere. Values are ``(m + 1/2) * 2^-23`` for a 23-bit integer m: exactly representable in
float32, never 0 nor 1, so ``log(u)`` and ``log(1 - u)`` are finite.

``megatron_omni::counter_uniform`` is the same hash in one pass over the result (csrc/cpu/counter_rng.cpp), bit for bit;
``uniform`` takes it where the kernels of the device are built.

T tokens, n draws per token.
"""

from enum import IntEnum

import torch
from torch import Tensor

from megatron_omni.ops import extension

_GOLDEN_64 = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_GOLDEN_32 = 0x9E3779B9
_LOW_1 = 0x7FEB352D
_LOW_2 = 0x846CA68B
_MASK_64 = (1 << 64) - 1
_ELEMENTS_PER_BLOCK = 1 << 16
"""Elements hashed at a time: the scratch of a block (256 KiB) stays in the L2 cache."""


class Purpose(IntEnum):
    """What a draw is for; draws with different purposes are independent."""

    INPUT_JITTER = 1
    GUMBEL = 2
    BERNOULLI = 3
    ADAPTER_DROPOUT = 4


def _signed(value: int, bits: int) -> int:
    """``value`` modulo 2^bits as the signed integer with the same bits (torch has no unsigned arithmetic)."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _mix64_int(value: int) -> int:
    """splitmix64 finaliser of a Python integer."""
    value &= _MASK_64
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK_64
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK_64
    return value ^ (value >> 31)


def _mix64(x: Tensor) -> Tensor:
    """splitmix64 finaliser of an int64 tensor (shifts are made logical by masking the sign extension away)."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_MIX_1, 64)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_MIX_2, 64)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _call_key(*, seed: int, step: int, layer: int, purpose: Purpose) -> int:
    """The constants of a call as one signed 64-bit number."""
    call = 0
    for part in (seed, step, layer, int(purpose)):
        call = _mix64_int(call + _GOLDEN_64 + _mix64_int(part + _GOLDEN_64))
    return _signed(call, 64)


def token_keys(sample_ids: Tensor, positions: Tensor, *, call: int) -> Tensor:
    """One 64-bit key per token, [T] int64, from the key of the call and the token's identity."""
    return _mix64(_mix64(sample_ids.long() + call) + positions.long() * _signed(_GOLDEN_64, 64))


def _fill_block(out: Tensor, keys: Tensor) -> None:
    """Uniform draws of [t, n] ``out`` for ``keys`` [t], in place."""
    low = (keys & 0xFFFFFFFF).to(torch.int32)  # wraps to the signed value with the same bits
    high = (keys >> 32).to(torch.int32)
    columns = torch.arange(out.shape[1], device=keys.device, dtype=torch.int32) * _signed(_GOLDEN_32, 32)
    x = low[:, None] + columns
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _LOW_1
    x ^= high[:, None]
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(_LOW_2, 32)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x >>= 9  # arithmetic: 23 bits, signed
    out.copy_(x).mul_(2.0**-23).add_(0.5 + 2.0**-24)


def _uniform_reference(sample_ids: Tensor, positions: Tensor, num_draws: int, call: int) -> Tensor:
    """``counter_uniform`` in plain torch."""
    keys = token_keys(sample_ids, positions, call=call)
    out = torch.empty(keys.shape[0], num_draws, device=keys.device, dtype=torch.float32)
    if keys.device.type != "cpu":
        _fill_block(out, keys)
        return out
    rows = max(1, _ELEMENTS_PER_BLOCK // max(1, num_draws))
    for start in range(0, keys.shape[0], rows):
        _fill_block(out[start : start + rows], keys[start : start + rows])
    return out


_counter_uniform = extension.op("counter_uniform")


@extension.register_fake("counter_uniform")
def _(sample_ids: Tensor, positions: Tensor, num_draws: int, call: int) -> Tensor:
    return sample_ids.new_empty(sample_ids.shape[0], num_draws, dtype=torch.float32)


def uniform(
    sample_ids: Tensor,
    positions: Tensor,
    *,
    num_draws: int,
    seed: int,
    step: int,
    layer: int,
    purpose: Purpose,
) -> Tensor:
    """Draws in (0, 1), [T, num_draws] float32, keyed by everything that is passed (see the module docstring)."""
    if sample_ids.shape != positions.shape or sample_ids.dim() != 1:
        raise ValueError(
            f"sample_ids {tuple(sample_ids.shape)} and positions {tuple(positions.shape)} must be [T]; flatten them"
        )
    call = _call_key(seed=seed, step=step, layer=layer, purpose=purpose)
    missing = extension.CPU_ERROR if sample_ids.device.type == "cpu" else extension.CUDA_ERROR
    if missing is None:
        return _counter_uniform(sample_ids.long().contiguous(), positions.long().contiguous(), num_draws, call)
    return _uniform_reference(sample_ids, positions, num_draws, call)


def gumbel(uniforms: Tensor) -> Tensor:
    """Standard Gumbel noise from uniform draws: ``-log(-log u)``."""
    return -torch.log(-torch.log(uniforms))
