"""Parts of the picture generator's blocks (models/generators/dit.py), each with its gradients in one pass over memory on a CPU.

    modulated_norm    y = residual + factor[b] weight x / sqrt(mean x^2 + eps)                  RMSNorm, and what modulates it
    rotary_norm       LayerNorm of whole rows, then channel pairs of every head turn             [B, T, heads d] to [B, heads, T, d]
    swiglu            y = silu(gate) up
    joint_attention   out[t] = sum over segments s of gate_s softmax(scale_s q[t] keys_s^T) values_s
                      segments: patches (no gate), vision rows, caption rows; each a softmax of its own over rows that its mask
                      has, and nothing where it has none

The plain torch of each is here, too: what is computed where the kernels do not run, on any device and in any dtype. They
take fp32 on a CPU, widths and heads that are multiples of 16, and run on engines that were timed (extension.py) or named.
Gradients are in csrc/bindings_dit.cpp; they are once differentiable.

B pictures, T patches, H width, h heads in g groups, d width of a head, N and R rows of vision and caption.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention, silu

from megatron_omni.ops import extension

LANES = 16


class Rows(NamedTuple):
    """What the patches attend to beside themselves."""

    keys: Tensor
    """[B, n, g d], as values."""
    values: Tensor
    mask: Tensor | None = None
    """[B, n] bool, true where a row counts."""


def is_ours(x: Tensor, *widths: int) -> bool:
    """Whether the kernels take ``x`` with rows of these ``widths``."""
    if x.dtype != torch.float32 or x.device.type != "cpu" or any(width % LANES for width in widths):
        return False
    if extension.missing("joint_attention") is not None:
        return False
    return extension.cpu_engine() in extension.MEASURED_ENGINES or extension.cpu_engine_is_forced()


# ------------------------------------------------------------------------------------------------------- modulated_norm


def modulated_norm_reference(
    x: Tensor, weight: Tensor, factor: Tensor | None, residual: Tensor | None, eps: float
) -> Tensor:
    """:func:`modulated_norm` in plain torch."""
    y = rms_norm(x, x.shape[-1:], weight, eps)
    if factor is not None:
        y = y * factor.unsqueeze(1)
    return y if residual is None else residual + y


_modulated_norm = extension.op("modulated_norm")


@extension.register_fake("modulated_norm")
def _(x: Tensor, weight: Tensor, factor: Tensor | None, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:2])


@extension.register_fake("modulated_norm_backward")
def _(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2])


def modulated_norm(
    x: Tensor, weight: Tensor, *, factor: Tensor | None = None, residual: Tensor | None = None, eps: float
) -> Tensor:
    """[B, T, H] of ``x`` and ``residual`` [B, T, H], ``weight`` [H] and ``factor`` [B, H]."""
    if not is_ours(x, x.shape[-1]):
        return modulated_norm_reference(x, weight, factor, residual, eps)
    factor, residual = (None if part is None else part.contiguous() for part in (factor, residual))
    y: Tensor = _modulated_norm(x.contiguous(), weight, factor, residual, eps)[0]
    return y


# ---------------------------------------------------------------------------------------------------------- rotary_norm


def rotate(rows: Tensor, turns: Tensor) -> Tensor:
    """Neighbouring channels of ``rows`` [B, h, T, d] as complex numbers, times ``turns`` [T, d / 2]."""
    pairs = rows.to(turns.real.dtype).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2).to(rows.dtype)


def rotary_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, turns: Tensor, heads: int, eps: float) -> Tensor:
    """:func:`rotary_norm` in plain torch."""
    normed = layer_norm(x, x.shape[-1:], weight, bias, eps)
    return rotate(normed.unflatten(-1, (heads, -1)).transpose(1, 2), turns)


_rotary_norm = extension.op("rotary_norm")


@extension.register_fake("rotary_norm")
def _(x: Tensor, weight: Tensor, bias: Tensor, turns: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], heads, x.shape[1], x.shape[2] // heads), x.new_empty(*x.shape[:2], 2)


@extension.register_fake("rotary_norm_backward")
def _(grad: Tensor, x: Tensor, stats: Tensor, weight: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2]), x.new_empty(x.shape[0], x.shape[2])


def rotary_norm(x: Tensor, weight: Tensor, bias: Tensor, *, turns: Tensor, heads: int, eps: float) -> Tensor:
    """[B, heads, T, d] of ``x`` [B, T, heads d], ``weight`` and ``bias`` [heads d], complex ``turns`` [T, d / 2]."""
    if not is_ours(x, x.shape[-1] // heads):
        return rotary_norm_reference(x, weight, bias, turns, heads, eps)
    y: Tensor = _rotary_norm(x.contiguous(), weight, bias, torch.view_as_real(turns), heads, eps)[0]
    return y


# --------------------------------------------------------------------------------------------------------------- swiglu


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """:func:`swiglu` in plain torch."""
    return silu(gate) * up


_swiglu = extension.op("swiglu")


@extension.register_fake("swiglu")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@extension.register_fake("swiglu_backward")
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) up, of one shape."""
    if not is_ours(gate):
        return swiglu_reference(gate, up)
    y: Tensor = _swiglu(gate.contiguous(), up.contiguous())
    return y


# ------------------------------------------------------------------------------------------------------ joint_attention


def joint_attention_reference(
    query: Tensor, keys: Tensor, values: Tensor, *others: tuple[Rows, Tensor], scale: float
) -> Tensor:
    """:func:`joint_attention` in plain torch."""
    heads, width = query.shape[1], query.shape[3]

    def split(rows: Tensor) -> Tensor:
        return spread(rows.unflatten(-1, (-1, width)).transpose(1, 2))

    def spread(rows: Tensor) -> Tensor:
        """Each group of keys or values for the heads that use it."""
        return rows if rows.shape[1] == heads else rows.repeat_interleave(heads // rows.shape[1], dim=1)

    out = scaled_dot_product_attention(query, spread(keys), split(values), scale=scale)
    for rows, gate in others:
        mask = None if rows.mask is None else rows.mask[:, None, None, :]
        read = scaled_dot_product_attention(query, split(rows.keys), split(rows.values), attn_mask=mask)
        out = out + gate[:, None, None] * read
    return out.transpose(1, 2).flatten(2)


_joint_attention = extension.op("joint_attention")


@extension.register_fake("joint_attention")
def _(query: Tensor, *others: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1] * query.shape[3])


@extension.register_fake("joint_attention_backward")
def _(grad: Tensor, query: Tensor, keys: Tensor, values: Tensor, *rest: Tensor | None) -> list[Tensor]:
    found = [torch.empty_like(part) for part in (query, keys, values)]
    for of_keys, of_values in (rest[:2], rest[4:6]):
        for part in (of_keys, of_values):
            found.append(query.new_empty(0) if part is None else torch.empty_like(part))
        found.append(query.new_empty(0) if of_keys is None else query.new_empty(query.shape[:2]))
    return found


def joint_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    vision: tuple[Rows, Tensor] | None = None,
    caption: tuple[Rows, Tensor] | None = None,
) -> Tensor:
    """[B, T, h d] of ``query`` [B, h, T, d], ``keys`` [B, g, n, d] and ``values`` [B, n, g d] whose scores are times ``scale``;
    those of ``vision`` and ``caption``, rows with their gates [h], times 1 / sqrt(d)."""
    if not is_ours(query, query.shape[-1]):
        others = [part for part in (vision, caption) if part is not None]
        return joint_attention_reference(query, keys, values, *others, scale=scale)
    rest = [*_arguments(vision), *_arguments(caption)]
    out: Tensor = _joint_attention(query.contiguous(), keys.contiguous(), values.contiguous(), *rest, scale)
    return out


def _arguments(part: tuple[Rows, Tensor] | None) -> tuple[Tensor | None, ...]:
    if part is None:
        return (None,) * 4
    rows, gate = part
    mask = None if rows.mask is None else rows.mask.contiguous()
    return rows.keys.contiguous(), rows.values.contiguous(), gate, mask
