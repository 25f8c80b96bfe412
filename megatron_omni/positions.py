"""Token counts of media, choice of video frames, and 3D position ids (paper section 2.2, "Omni-Modality 3D RoPE").

Every token has three integer positions: time T, height H, width W. With ``start`` one more than the largest position
used so far (all three channels), s the pooled side of a tile and theta position steps per second:

* text token i:            T = H = W = start + i
* image token (pa, pb, r, c), tile row pa, tile column pb, row r and column c inside the tile:
                           T = start, H = start + pa s + r, W = start + pb s + c; order: tiles row-major, then r, then c
* video frame i, token (r, c):  T = start + floor(t_i theta + 0.5), H = start + r, W = start + c;
                           t_i = true time of the frame in seconds after the first sampled frame
* audio token j of a clip: g = j // n, T = H = W = start + floor(g u theta + 0.5), u = seconds that n tokens stand for,
                           n = 20 unless ``model.audio.tokens_per_position`` says otherwise

So audio and video advance at the same rate. The published code rounds halves to the even step, which
``half_even_positions`` reproduces, and picks other frames (:func:`select_frames`). Pure functions of sizes and times, used
by data, models and generation.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor

import torch
from torch import Tensor

from megatron_omni.config.data import FrameChoice
from megatron_omni.config.model import ModelConfig

SAMPLE_RATE = 16_000
"""Hz; the only rate the audio encoder knows."""
_TIE_SECONDS = 1e-9
"""Differences below this are float noise of a time base, not a difference in time."""
_TICKS_PER_SECOND = round(1 / _TIE_SECONDS)


@dataclass(frozen=True)
class TextSpan:
    """``length`` tokens of text, special tokens around media included."""

    length: int


@dataclass(frozen=True)
class ImageSpan:
    """An image of ``rows`` x ``cols`` tiles."""

    rows: int
    cols: int


@dataclass(frozen=True)
class VideoSpan:
    """Frames of one tile each, at these times in seconds (any origin, not decreasing)."""

    times_seconds: tuple[float, ...]


@dataclass(frozen=True)
class AudioSpan:
    """A clip of ``num_chunks`` encoder inputs."""

    num_chunks: int


Span = TextSpan | ImageSpan | VideoSpan | AudioSpan


@dataclass(frozen=True, kw_only=True)
class PositionRule:
    """What the model's configuration says about media tokens and positions."""

    pooled_side: int
    num_query_tokens: int
    audio_group_seconds: float
    """Seconds that the audio tokens of one position stand for."""
    theta: float
    tokens_per_position: int = 20
    """Neighbouring audio tokens that share one position."""
    audio_only_1d: bool = False
    """Audio without any picture gets plain positions start, start + 1, ... (released weights only)."""
    half_even: bool = False
    """Half a position step rounds to the even one instead of up (released weights only)."""

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise ValueError(f"model.rope_theta_seconds={self.theta}: must be positive (2.0 in the paper's MoE model)")

    @classmethod
    def from_config(cls, model: ModelConfig) -> "PositionRule":
        """The rule of a model; a modality that the model lacks gets sizes of zero and may not appear in its spans."""
        audio = model.audio
        of_audio = {} if audio is None else {"tokens_per_position": audio.tokens_per_position}
        return cls(
            pooled_side=model.vision.pooled_side if model.vision else 0,
            num_query_tokens=audio.num_query_tokens if audio else 0,
            audio_group_seconds=audio.chunk_seconds * audio.tokens_per_position / audio.num_query_tokens
            if audio
            else 0.0,
            theta=model.rope_theta_seconds,
            **of_audio,
            audio_only_1d=model.audio_only_1d,
            half_even=model.half_even_positions,
        )


# ------------------------------------------------------------------------------------------------ token counts


def image_tokens(rows: int, cols: int, *, pooled_side: int) -> int:
    """Placeholders of an image of ``rows`` x ``cols`` tiles."""
    return rows * cols * pooled_side**2


def video_tokens(num_frames: int, *, pooled_side: int) -> int:
    """Placeholders of a video of one tile per frame."""
    return num_frames * pooled_side**2


def audio_chunks(num_samples: int, *, chunk_seconds: float) -> int:
    """Encoder inputs of a mono 16 kHz clip; the last is zero-padded, and a clip is never less than one chunk."""
    return max(1, ceil(num_samples / round(chunk_seconds * SAMPLE_RATE)))


def audio_tokens(num_chunks: int, *, num_query_tokens: int) -> int:
    """Placeholders of a clip: a short last chunk has as many tokens as a full one."""
    return num_chunks * num_query_tokens


def span_length(span: Span, rule: PositionRule) -> int:
    """Tokens of a span. ValueError for a medium that the model has no encoder for, or an empty one."""
    match span:
        case TextSpan(length):
            return length
        case ImageSpan(rows, cols):
            _require(rows >= 1 and cols >= 1, "an image", f"{rows}x{cols} tiles", "at least one tile")
            _require(rule.pooled_side > 0, "an image", "model.vision=null", "a model with a vision encoder")
            return image_tokens(rows, cols, pooled_side=rule.pooled_side)
        case VideoSpan(times):
            _require(len(times) >= 1, "a video", "no frames", "at least one frame")
            _require(all(a <= b for a, b in pairwise(times)), "a video", "frame times", "times in order")
            _require(rule.pooled_side > 0, "a video", "model.vision=null", "a model with a vision encoder")
            return video_tokens(len(times), pooled_side=rule.pooled_side)
        case AudioSpan(num_chunks):
            _require(num_chunks >= 1, "an audio clip", f"{num_chunks} chunks", "at least one chunk")
            _require(rule.num_query_tokens > 0, "an audio clip", "model.audio=null", "a model with an audio encoder")
            return audio_tokens(num_chunks, num_query_tokens=rule.num_query_tokens)


def _require(condition: bool, what: str, value: str, need: str) -> None:
    if not condition:
        raise ValueError(f"{what} with {value} has no positions: needs {need}")


# ------------------------------------------------------------------------------------------------ video frames


@dataclass(frozen=True)
class FrameSelection:
    """Frames taken from a video, in order and without repeats."""

    indices: tuple[int, ...]
    times_seconds: tuple[float, ...]
    """Times of those frames: true ones, as given, or those that ``release`` takes them for."""


def frame_count(
    duration_seconds: float,
    *,
    fps: float,
    min_frames: int,
    max_frames: int,
    num_available: int,
    choice: FrameChoice = "rate",
) -> int:
    """Frames that are wanted of a video: floor(duration fps), within [min_frames, max_frames] and what exists.

    ``release``: an even number, as the published code has it (its bounds are made even inwards); the one frame of a
    video that has no more.
    """
    if fps <= 0 or not 1 <= min_frames <= max_frames:
        raise ValueError(
            f"video_fps={fps}, min_frames={min_frames}, max_frames={max_frames}: "
            "need video_fps > 0 and 1 <= min_frames <= max_frames"
        )
    wanted = floor(duration_seconds * fps + _TIE_SECONDS)
    if choice == "rate":
        return min(max(wanted, min_frames), max_frames, num_available)
    lower, upper = min_frames + min_frames % 2, min(max_frames, num_available)
    return max(1, min(max(wanted, lower), upper) // 2 * 2)


def select_frames(
    frame_times_seconds: Sequence[float],
    *,
    duration_seconds: float,
    fps: float,
    min_frames: int,
    max_frames: int,
    choice: FrameChoice = "rate",
) -> FrameSelection:
    """Which frames of a video are taken; ``frame_times_seconds`` are the true times of all N frames, ascending.

    ``rate``: f_n frames, nearest to i / fps, or to i duration / f_n where a bound changed the count from
    f_s = floor(duration fps). A tie goes to the earlier frame. Two wanted times can fall on one frame only where the
    frame rate varies; it is then taken once, so such a video may yield fewer frames than ``min_frames``.
    ``release``: n frames at round(linspace(0, N - 1, n)), the last one among them, whose times are said to be
    i duration / n.
    """
    if not frame_times_seconds:
        raise ValueError("a video without frames: nothing to select")
    origin, num_available = frame_times_seconds[0], len(frame_times_seconds)
    count = frame_count(
        duration_seconds,
        fps=fps,
        min_frames=min_frames,
        max_frames=max_frames,
        num_available=num_available,
        choice=choice,
    )
    if choice == "release":
        indices = torch.linspace(0, num_available - 1, count).round().long().tolist()
        return FrameSelection(tuple(indices), tuple(origin + i * duration_seconds / count for i in range(count)))
    regular = count == floor(duration_seconds * fps + _TIE_SECONDS)
    chosen: list[int] = []
    for i in range(count):
        index = _nearest(frame_times_seconds, origin + (i / fps if regular else i * duration_seconds / count))
        if not chosen or index > chosen[-1]:
            chosen.append(index)
    return FrameSelection(tuple(chosen), tuple(float(frame_times_seconds[i]) for i in chosen))


def _nearest(times: Sequence[float], target: float) -> int:
    after = min(bisect_left(times, target), len(times) - 1)
    before = max(after - 1, 0)
    return before if target - times[before] <= times[after] - target + _TIE_SECONDS else after


# ------------------------------------------------------------------------------------------------ position ids


def position_ids(spans: Sequence[Span], rule: PositionRule, *, start: int = 0) -> tuple[Tensor, int]:
    """[3, L] int64 ids (T, H, W) of one sample's spans in order, and the position of the token that would follow."""
    has_picture = any(isinstance(span, ImageSpan | VideoSpan) for span in spans)
    if rule.audio_only_1d and not has_picture and any(isinstance(span, AudioSpan) for span in spans):
        length = sum(span_length(span, rule) for span in spans)
        return _line(torch.arange(start, start + length)), start + length
    blocks = [torch.empty(3, 0, dtype=torch.int64)]
    for span in spans:
        length = span_length(span, rule)
        if length:
            blocks.append(start + _offsets(span, rule))
            start = int(blocks[-1].max()) + 1
    return torch.cat(blocks, dim=1), start


def _offsets(span: Span, rule: PositionRule) -> Tensor:
    """[3, L] ids of one span relative to its start."""
    side = rule.pooled_side
    match span:
        case TextSpan(length):
            return _line(torch.arange(length))
        case ImageSpan(rows, cols):
            pa, pb, r, c = torch.meshgrid(*(torch.arange(n) for n in (rows, cols, side, side)), indexing="ij")
            return torch.stack([torch.zeros_like(pa), pa * side + r, pb * side + c]).flatten(1)
        case VideoSpan(times):
            steps = _time_steps((t - times[0] for t in times), rule)
            t, r, c = torch.meshgrid(steps, torch.arange(side), torch.arange(side), indexing="ij")
            return torch.stack([t, r, c]).flatten(1)
        case AudioSpan(num_chunks):
            num_tokens = audio_tokens(num_chunks, num_query_tokens=rule.num_query_tokens)
            groups = range(ceil(num_tokens / rule.tokens_per_position))
            steps = _time_steps((g * rule.audio_group_seconds for g in groups), rule)
            return _line(steps.repeat_interleave(rule.tokens_per_position)[:num_tokens])


def _time_steps(seconds: Iterable[float], rule: PositionRule) -> Tensor:
    """Whole position steps nearest to times theta, halves up or to even.

    In whole numbers, theta as it is written: 0.563 s - 0.313 s is a hair less than 0.25 s, and half a step must not fall
    because of it.
    """
    theta = Fraction(str(rule.theta))
    top, bottom = theta.numerator, theta.denominator * _TICKS_PER_SECOND
    steps = [round(s * _TICKS_PER_SECOND) * top for s in seconds]
    if rule.half_even:
        return torch.tensor([round(Fraction(step, bottom)) for step in steps])
    return torch.tensor([(2 * step + bottom) // (2 * bottom) for step in steps])


def _line(positions: Tensor) -> Tensor:
    return positions.expand(3, -1)
