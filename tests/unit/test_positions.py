"""Positions against the worked examples of the specification and an independent token-by-token reference."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_omni.config.load import load_recipe
from megatron_omni.config.model import ModelConfig
from megatron_omni.positions import (
    AudioSpan,
    FrameSelection,
    ImageSpan,
    PositionRule,
    Span,
    TextSpan,
    VideoSpan,
    audio_chunks,
    audio_tokens,
    frame_count,
    image_tokens,
    position_ids,
    select_frames,
    span_length,
    video_tokens,
)

ROOT = Path(__file__).resolve().parents[2]


def rule(
    side: int, theta: float = 2.0, *, queries: int = 200, chunk: float = 30.0, plain: bool = False, shared: int = 20
) -> PositionRule:
    return PositionRule(
        pooled_side=side,
        num_query_tokens=queries,
        audio_group_seconds=chunk * shared / queries,
        theta=theta,
        tokens_per_position=shared,
        audio_only_1d=plain,
    )


def test_fewer_audio_tokens_may_share_a_position() -> None:
    """The quickstart's clips last 2.1 s, 14 tokens: 20 to a position would leave them all at one."""
    at = [row[0] for row in position_ids([AudioSpan(1)], rule(4, queries=14, chunk=2.1, shared=2))[0].T.tolist()]
    assert at == [p for p in (0, 1, 1, 2, 2, 3, 4) for _ in range(2)]  # 0.3 s a pair, 2 positions a second, halves up
    assert set(position_ids([AudioSpan(1)], rule(4, queries=14, chunk=2.1))[0].flatten().tolist()) == {0}
    recipe = load_recipe(ROOT / "recipes/tiny/quickstart.yaml")
    assert len(set(position_ids([AudioSpan(1)], PositionRule.from_config(recipe.model))[0][0].tolist())) > 1


def test_worked_example_of_text_video_and_audio() -> None:
    spans = [TextSpan(5), VideoSpan((0.0, 2.0, 4.0, 6.0)), TextSpan(3), AudioSpan(1), TextSpan(4)]
    ids, following = position_ids(spans, rule(2))
    triples = [tuple(column) for column in ids.T.tolist()]
    assert triples[:5] == [(i, i, i) for i in range(5)]
    assert triples[5:9] == [(5, 5, 5), (5, 5, 6), (5, 6, 5), (5, 6, 6)]
    assert triples[9:13] == [(9, 5, 5), (9, 5, 6), (9, 6, 5), (9, 6, 6)]
    assert [t for t, _, _ in triples[13:21]] == [13] * 4 + [17] * 4
    assert [(h, w) for _, h, w in triples[13:21]] == [(5, 5), (5, 6), (6, 5), (6, 6)] * 2
    assert triples[21:24] == [(18,) * 3, (19,) * 3, (20,) * 3]
    assert triples[24:224] == [(21 + 6 * g,) * 3 for g in range(10) for _ in range(20)]
    assert triples[224:] == [(76,) * 3, (77,) * 3, (78,) * 3, (79,) * 3]
    assert ids.dtype == torch.int64 and ids.shape == (3, 228)
    assert following == 80 and following - ids.shape[1] == -148


def test_image_positions_are_global_over_the_picture_and_ordered_tile_by_tile() -> None:
    ids, following = position_ids([TextSpan(3), ImageSpan(1, 2)], rule(2))
    assert [tuple(c) for c in ids.T.tolist()[3:]] == [
        (3, 3, 3), (3, 3, 4), (3, 4, 3), (3, 4, 4), (3, 3, 5), (3, 3, 6), (3, 4, 5), (3, 4, 6),
    ]  # fmt: skip
    assert following == 7


@pytest.mark.parametrize(
    ("theta", "video_end", "audio_start", "audio_end"), [(2.0, 246, 249, 483), (1.0, 128, 131, 248)]
)
def test_paper_example(theta: float, video_end: int, audio_start: int, audio_end: int) -> None:
    """10 text, 60 frames every 2 s, 2 text, 120 s of audio, 1 text at s = 12."""
    spans = [TextSpan(10), VideoSpan(tuple(2.0 * i for i in range(60))), TextSpan(2), AudioSpan(4), TextSpan(1)]
    ids, following = position_ids(spans, rule(12, theta))
    times = ids[0].tolist()
    video, audio = 10, 10 + 60 * 144 + 2
    assert (times[video], times[video + 60 * 144 - 1]) == (10, video_end)
    assert times[video + 60 * 144 : audio] == [video_end + 1, video_end + 2]
    assert (times[audio], times[audio + 800 - 1]) == (audio_start, audio_end)
    assert times[-1] == audio_end + 1 and following == audio_end + 2
    assert ids[1, video : video + 144 * 60].max() == 10 + 11


def test_times_count_from_the_first_sampled_frame_and_halves_round_up() -> None:
    ids, _ = position_ids([VideoSpan((7.25, 7.5, 8.0, 8.24))], rule(1))
    assert ids[0].tolist() == [0, 1, 2, 2]  # 0, 0.25 s -> 0.5 -> 1, 0.75 s -> 1.5 -> 2, 0.99 s -> 1.98 -> 2


@pytest.mark.parametrize("theta", [0.7, 1.0, 2.0])
def test_exact_halves_round_up_wherever_the_first_frame_lies(theta: float) -> None:
    """(0.313, 0.563) at theta 2: the difference of the floats is a hair below 0.25 s."""
    half = 0.5 / theta if theta != 0.7 else 5.0  # 5 s at 0.7 are 3.5 steps
    firsts = [ms / 1000 for ms in range(4000)]
    steps = [position_ids([VideoSpan((t, round(t + half, 3)))], rule(1, theta))[0][0, 1].item() for t in firsts]
    assert set(steps) == ({1} if theta != 0.7 else {4})
    noise = sum((round(t + half, 3) - t) * theta + 0.5 < (1 if theta != 0.7 else 4) for t in firsts)
    assert noise > 10, "floats would have rounded some of them down"


def test_released_positions_round_halves_to_even() -> None:
    times = tuple(0.25 * i for i in range(8))  # 0, 0.5, 1, 1.5, ... steps
    ids, _ = position_ids([VideoSpan(times)], replace(rule(1), half_even=True))
    assert ids[0].tolist() == [0, 0, 1, 2, 2, 2, 3, 4] == [round(0.5 * i) for i in range(8)]
    assert position_ids([VideoSpan(times)], rule(1))[0][0].tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    sound, _ = position_ids([AudioSpan(2)], replace(rule(1, 0.5), half_even=True))  # 1.5 steps a group
    assert sound[0, ::20].tolist() == [round(1.5 * g) for g in range(20)]
    assert PositionRule.from_config(ModelConfig(half_even_positions=True)).half_even


def test_large_image_after_a_short_one_starts_after_its_extent() -> None:
    ids, following = position_ids([ImageSpan(1, 6), TextSpan(1)], rule(12))
    assert ids[:, -1].tolist() == [72, 72, 72] and following == 73


def test_short_chunks_keep_three_seconds_per_group() -> None:
    """3 s chunks of 20 queries advance exactly as 30 s chunks of 200."""
    long, _ = position_ids([AudioSpan(1)], rule(2))
    short, _ = position_ids([AudioSpan(10)], rule(2, queries=20, chunk=3.0))
    assert torch.equal(long, short)


def test_groups_of_twenty_tokens_run_across_short_chunks() -> None:
    """1.5 s chunks of 10 queries: three of them are one whole group and a half."""
    ids, following = position_ids([AudioSpan(3)], rule(2, queries=10, chunk=1.5))
    assert ids[0].tolist() == [0] * 20 + [6] * 10 and following == 7


def test_audio_only_1d_applies_only_without_pictures() -> None:
    spans: list[Span] = [TextSpan(2), AudioSpan(1), TextSpan(1)]
    plain, following = position_ids(spans, rule(2, plain=True), start=4)
    assert torch.equal(plain, torch.arange(4, 207).expand(3, -1)) and following == 207
    spans.append(ImageSpan(1, 1))
    assert torch.equal(position_ids(spans, rule(2, plain=True))[0], position_ids(spans, rule(2))[0])


def test_start_shifts_every_position() -> None:
    spans = [TextSpan(2), ImageSpan(2, 1), AudioSpan(1), VideoSpan((0.0, 1.0))]
    base, following = position_ids(spans, rule(3))
    moved, moved_following = position_ids(spans, rule(3), start=11)
    assert torch.equal(moved, base + 11) and moved_following == following + 11


def test_nothing_has_no_positions() -> None:
    ids, following = position_ids([TextSpan(0)], rule(2), start=9)
    assert ids.shape == (3, 0) and following == 9


def nearest_step(seconds: Fraction, r: PositionRule) -> int:
    """In exact numbers; times and theta are what their decimals say."""
    return math.floor(seconds * Fraction(str(r.theta)) + Fraction(1, 2))


def reference(spans: list[Span], r: PositionRule) -> tuple[list[tuple[int, int, int]], int]:
    """Token by token, from the text of the specification."""
    out: list[tuple[int, int, int]] = []

    def after() -> int:
        return 1 + max((max(p) for p in out), default=-1)

    for span in spans:
        begin = after()
        if isinstance(span, TextSpan):
            out += [(begin + i, begin + i, begin + i) for i in range(span.length)]
        elif isinstance(span, ImageSpan):
            for pa in range(span.rows):
                for pb in range(span.cols):
                    for row in range(r.pooled_side):
                        for col in range(r.pooled_side):
                            out.append((begin, begin + pa * r.pooled_side + row, begin + pb * r.pooled_side + col))
        elif isinstance(span, VideoSpan):
            for t in span.times_seconds:
                step = nearest_step(Fraction(str(t)) - Fraction(str(span.times_seconds[0])), r)
                for row in range(r.pooled_side):
                    for col in range(r.pooled_side):
                        out.append((begin + step, begin + row, begin + col))
        else:
            for token in range(span.num_chunks * r.num_query_tokens):
                p = begin + nearest_step(
                    (token // r.tokens_per_position) * Fraction(r.audio_group_seconds).limit_denominator(10**6), r
                )
                out.append((p, p, p))
    return out, after()


span_strategy = st.one_of(
    st.builds(TextSpan, st.integers(0, 9)),
    st.builds(ImageSpan, st.integers(1, 3), st.integers(1, 3)),
    st.lists(st.integers(0, 90_000).map(lambda ms: ms / 1000), min_size=1, max_size=6).map(
        lambda ts: VideoSpan(tuple(sorted(ts)))
    ),
    st.builds(AudioSpan, st.integers(1, 3)),
)


@given(
    spans=st.lists(span_strategy, max_size=6),
    side=st.integers(1, 4),
    theta=st.sampled_from([0.5, 0.7, 1.0, 2.0, 12.5]),
    queries=st.sampled_from([10, 20, 30, 200]),
    chunk=st.sampled_from([1.0, 3.0, 30.0]),
    shared=st.sampled_from([1, 3, 20]),
)
def test_positions_equal_the_reference(
    spans: list[Span], side: int, theta: float, queries: int, chunk: float, shared: int
) -> None:
    r = rule(side, theta, queries=queries, chunk=chunk, shared=shared)
    expected, following = reference(spans, r)
    ids, got_following = position_ids(spans, r)
    assert [tuple(c) for c in ids.T.tolist()] == expected
    assert got_following == following
    assert ids.shape[1] == sum(span_length(span, r) for span in spans)


def test_token_counts() -> None:
    assert image_tokens(2, 3, pooled_side=12) == 864
    assert video_tokens(60, pooled_side=12) == 8640
    assert [audio_chunks(n, chunk_seconds=30.0) for n in (0, 1, 480_000, 480_001)] == [1, 1, 1, 2]
    assert audio_chunks(96_001, chunk_seconds=3.0) == 3
    assert audio_tokens(4, num_query_tokens=200) == 800


def test_rule_follows_the_model_configuration() -> None:
    full = PositionRule.from_config(ModelConfig())
    assert (full.pooled_side, full.num_query_tokens, full.audio_group_seconds, full.theta) == (12, 200, 3.0, 2.0)
    text_only = PositionRule.from_config(ModelConfig(vision=None, audio=None))
    assert position_ids([TextSpan(3)], text_only)[1] == 3
    with pytest.raises(ValueError, match=r"model\.vision=null"):
        position_ids([ImageSpan(1, 1)], text_only)
    with pytest.raises(ValueError, match=r"model\.audio=null"):
        position_ids([AudioSpan(1)], text_only)


@pytest.mark.parametrize(
    ("span", "said"),
    [(ImageSpan(0, 1), "0x1 tiles"), (VideoSpan(()), "no frames"), (VideoSpan((1.0, 0.0)), "times in order"),
     (AudioSpan(0), "0 chunks")],
)  # fmt: skip
def test_impossible_spans_say_what_is_wrong(span: Span, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        position_ids([span], rule(2))


def test_rules_that_cannot_place_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="rope_theta_seconds=0"):
        rule(2, theta=0.0)


# ------------------------------------------------------------------------------------------------ frames


def constant_rate(seconds: float, rate: float) -> list[float]:
    return [i / rate for i in range(round(seconds * rate))]


def select(times: list[float], duration: float, **changed: Any) -> FrameSelection:
    bounds: dict[str, Any] = {"fps": 1.0, "min_frames": 8, "max_frames": 64} | changed
    return select_frames(times, duration_seconds=duration, **bounds)


def test_one_frame_a_second_within_the_bounds() -> None:
    chosen = select(constant_rate(20.0, 30.0), 20.0)
    assert chosen.indices == tuple(range(0, 600, 30))
    assert chosen.times_seconds == tuple(float(i) for i in range(20))


def test_a_long_video_is_spread_over_its_duration_and_matches_the_paper_times() -> None:
    """120 s at 60 frames: one every 2 s, the last at 118 s (not at the last frame, as a linspace would put it)."""
    chosen = select(constant_rate(120.0, 25.0), 120.0, max_frames=60)
    assert chosen.times_seconds == tuple(2.0 * i for i in range(60))


def test_a_short_video_gives_the_lower_bound() -> None:
    chosen = select(constant_rate(4.0, 30.0), 4.0)
    assert chosen.times_seconds == tuple(0.5 * i for i in range(8))


def test_never_more_frames_than_there_are() -> None:
    chosen = select([0.0, 0.5, 1.0], 1.5)
    assert chosen == FrameSelection((0, 1, 2), (0.0, 0.5, 1.0))


def test_true_times_are_returned_and_the_nearest_frame_is_taken() -> None:
    times = [10.0, 10.4, 10.9, 11.2, 11.9, 12.05]
    assert select(times, 3.0, min_frames=1).times_seconds == (10.0, 10.9, 12.05)


def test_a_tie_goes_to_the_earlier_frame_whatever_the_float_noise() -> None:
    thirds = [i / 3 for i in range(12)]  # 0.5 s lies between 1/3 and 2/3
    assert select(thirds, 4.0, fps=2.0, min_frames=1).indices[:2] == (0, 1)


def test_a_held_frame_is_taken_once() -> None:
    assert select([0.0, 0.1, 0.2, 10.0], 10.1, min_frames=1).indices == (0, 2, 3)


def test_a_duration_that_float_noise_makes_short_keeps_its_last_second() -> None:
    assert 4.35 * 100 < 435
    assert frame_count(4.35, fps=100.0, min_frames=1, max_frames=999, num_available=999) == 435


@pytest.mark.parametrize("changed", [{"fps": 0.0}, {"min_frames": 0}, {"min_frames": 65}])
def test_impossible_bounds_are_refused(changed: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="1 <= min_frames <= max_frames"):
        select([0.0, 1.0], 2.0, **changed)


@given(
    num=st.integers(1, 400), rate=st.sampled_from([1.0, 12.5, 24.0, 29.97, 60.0]), fps=st.sampled_from([0.5, 1.0, 2.0])
)
def test_selection_at_a_constant_rate_equals_the_definition(num: int, rate: float, fps: float) -> None:
    duration = num / rate
    chosen = select([i / rate for i in range(num)], duration, fps=fps)
    wanted = math.floor(duration * fps + 1e-9)
    count = min(max(wanted, 8), 64, num)
    assert len(chosen.indices) == count
    for i, time in enumerate(chosen.times_seconds):
        target = i / fps if count == wanted else i * duration / count
        assert abs(time - target) <= 0.5 / rate + 1e-9


def test_released_choice_is_even_and_ends_with_the_last_frame() -> None:
    """round(linspace(0, N - 1, n)), n even; what its code takes the times of the frames for is i duration / n."""
    chosen = select(constant_rate(20.4, 10.0), 20.4, choice="release")  # 204 frames, 20 of them
    assert chosen.indices == tuple(round(i * 203 / 19) for i in range(20)) and chosen.indices[-1] == 203
    assert chosen.times_seconds == pytest.approx([1.02 * i for i in range(20)])
    assert select(constant_rate(21.4, 10.0), 21.4).indices[-1] == 200, "ours ends at 20 s"


@pytest.mark.parametrize(
    ("seconds", "available", "bounds", "expected"),
    [
        (21.4, 642, {}, 20),
        (3.0, 90, {}, 8),
        (3.0, 90, {"min_frames": 5}, 6),
        (500.0, 9999, {"max_frames": 33}, 32),
        (60.0, 7, {}, 6),
        (0.1, 1, {}, 1),
    ],
)
def test_number_of_released_frames(seconds: float, available: int, bounds: dict[str, int], expected: int) -> None:
    limits = {"fps": 1.0, "min_frames": 8, "max_frames": 64} | bounds
    assert frame_count(seconds, num_available=available, choice="release", **limits) == expected  # type: ignore[arg-type]


@given(num=st.integers(2, 400), seconds=st.floats(0.1, 300), choice=st.sampled_from(["rate", "release"]))
def test_frames_exist_and_ascend(num: int, seconds: float, choice: str) -> None:
    times = [i * seconds / num for i in range(num)]
    chosen = select(times, seconds, choice=choice)
    assert list(chosen.indices) == sorted(set(chosen.indices)) and 0 <= chosen.indices[0] <= chosen.indices[-1] < num
    assert list(chosen.times_seconds) == sorted(chosen.times_seconds) and len(chosen.times_seconds) == len(
        chosen.indices
    )
