"""The sound of one recording: whether anybody could learn from it, and its codes.

Sound above ``WINDOW_SECONDS`` is encoded in windows with sound on both sides, of which the middle is kept: an encoder holds
some kilobytes for each millisecond. ``Encoder`` is what a codec has to do; the data layer knows no model.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_omni.data.errors import RecordError

WINDOW_SECONDS, BEFORE_SECONDS, AFTER_SECONDS = 60.0, 2.0, 1.0
_SILENT, _FULL, _MOST_FULL = 1e-3, 0.999, 0.005
"""Largest sample of a silent recording; a sample that is clipped, and the share of them in a recording that counts as clipped."""


class Encoder(Protocol):
    """A codec."""

    sample_rate: int
    hop_size: int
    num_codes: int
    codes_per_second: float
    fingerprint: str

    def encode(self, waves: NDArray[np.float32]) -> NDArray[np.int64]:
        """[B, n] codes of [B, n hop] sounds."""
        ...


def check_sound(wave: NDArray[np.float32], rate: int, shortest_seconds: float, *, where: str) -> None:
    """RecordError for sound that nobody could learn from."""

    def refuse(problem: str, reason: str) -> RecordError:
        return RecordError(
            where, field="sound", value=f"{len(wave) / rate:.2f} s", problem=problem, fix="record it again or drop the row",
            reason=reason,
        )  # fmt: skip

    if not np.isfinite(wave).all():
        raise refuse("holds samples that are NaN or infinite", "not_finite")
    if len(wave) < shortest_seconds * rate:
        raise refuse(f"is shorter than {shortest_seconds:g} s", "too_short")
    loud = np.abs(wave)
    if loud.max() < _SILENT:
        raise refuse("is silent", "silent")
    if (loud >= _FULL).mean() > _MOST_FULL:
        raise refuse(f"is clipped: {(loud >= _FULL).mean():.1%} of its samples are at the limit", "clipped")


def encode_long(wave: NDArray[np.float32], encoder: Encoder) -> NDArray[np.int64]:
    """[n] codes of a long sound, window by window."""
    hop, rate = encoder.hop_size, encoder.codes_per_second
    total, step = len(wave) // hop, round(WINDOW_SECONDS * rate)
    parts = []
    for start in range(0, total, step):
        first, last = max(0, start - round(BEFORE_SECONDS * rate)), start + step + round(AFTER_SECONDS * rate)
        codes = encoder.encode(wave[None, first * hop : last * hop])[0]
        parts.append(codes[start - first : start - first + step])
    return np.concatenate(parts)
