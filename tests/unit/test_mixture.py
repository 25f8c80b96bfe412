"""The global order: purity, exact weights, epochs without repeats, curriculum, one source per step."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_omni.data.mixture import BLOCK_SAMPLES, Component, Mixture, block_counts, permuted


def components(*rows_and_weights, from_sample=()) -> list[Component]:
    starts = [*from_sample, *[0] * len(rows_and_weights)]
    return [
        Component(name=f"s{i}", num_rows=rows, weight=weight, from_sample=starts[i])
        for i, (rows, weight) in enumerate(rows_and_weights)
    ]


def test_the_order_is_a_function_of_seed_and_index():
    parts = components((50, 3), (20, 1), (7, 2), from_sample=[0, 300, 0])
    forward = [Mixture(parts, seed=1).sample_at(i) for i in range(1000)]
    mixture = Mixture(parts, seed=1)
    order = np.random.default_rng(0).permutation(1000)
    assert {int(i): mixture.sample_at(int(i)) for i in order} == dict(enumerate(forward))
    assert [Mixture(parts, seed=2).sample_at(i) for i in range(1000)] != forward


def test_seeds_below_zero_are_seeds_of_their_own(recwarn):
    parts = components((50, 3), (20, 1))
    orders = {tuple(Mixture(parts, seed=seed).sample_at(i).source for i in range(60)) for seed in (-1, -2, -500, 1, 2)}
    assert len(orders) == 5 and not recwarn.list


def test_no_row_repeats_within_an_epoch_and_epochs_differ():
    mixture = Mixture(components((37, 1), (11, 2.5)), seed=3)
    draws = [mixture.sample_at(i) for i in range(4000)]
    for source, rows in enumerate((37, 11)):
        mine = [d for d in draws if d.source == source]
        assert [d.rank for d in mine] == list(range(len(mine)))
        epochs = [[d.row for d in mine[e * rows : (e + 1) * rows]] for e in range(len(mine) // rows)]
        assert len(epochs) > 20
        assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
        assert [d.epoch for d in mine] == [i // rows for i in range(len(mine))]


def test_weights_are_exact_in_every_period_and_within_one_item_at_every_block():
    mixture = Mixture(components((9, 0.5), (9, 0.3), (9, 0.2)), seed=0)
    sources = [mixture.sample_at(i).source for i in range(960)]
    for start in (0, 320, 640, 320 * 20_000):  # lcm(10, 64) items are a period
        draws = [mixture.sample_at(start + i) for i in range(320)]
        assert Counter(draw.source for draw in draws) == {0: 160, 1: 96, 2: 64}
        before = {s: min(draw.rank for draw in draws if draw.source == s) for s in range(3)}
        assert before == {0: start // 2, 1: start * 3 // 10, 2: start // 5}
    for end in range(BLOCK_SAMPLES, 961, BLOCK_SAMPLES):
        counts = Counter(sources[:end])
        assert all(abs(counts[s] - share * end) < 1 for s, share in enumerate((0.5, 0.3, 0.2)))


@given(weights=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), block=st.sampled_from([4, 16, 64]))
def test_block_counts_stay_within_one_of_the_exact_share(weights, block):
    table = block_counts([float(w) for w in weights], block=block)
    per_block = np.diff(table, axis=0)
    assert (per_block >= 0).all() and (per_block.sum(axis=1) == block).all()
    exact = np.outer(table.sum(axis=1), np.array(weights) / sum(weights))
    assert np.abs(table - exact).max() < 1
    assert np.allclose(table[-1], exact[-1], atol=1e-6)


def test_uneven_weights_are_rounded_to_the_longest_period_only():
    weights = [0.123457, 0.654321, 0.222222]
    table = block_counts(weights, block=64)
    assert np.abs(table[-1] / table[-1].sum() - np.array(weights) / sum(weights)).max() < 1e-5


def test_items_of_a_block_are_shuffled():
    sources = [Mixture(components((9, 1), (9, 1)), seed=5).sample_at(i).source for i in range(64 * 20)]
    blocks = [tuple(sources[i : i + 64]) for i in range(0, len(sources), 64)]
    assert len(set(blocks)) == 20
    runs = [len(list(group)) for _, group in itertools.groupby(sources)]
    assert 1.8 < np.mean(runs) < 2.2 and max(runs) >= 5  # neither alternating nor sorted: fair coin runs average 2


def test_a_source_joins_at_its_sample_and_counts_go_on_without_a_jump():
    parts = components((40, 1), (30, 1), (20, 2), from_sample=[0, 100, 333])
    mixture = Mixture(parts, seed=9)
    draws = [mixture.sample_at(i) for i in range(1333)]
    assert {d.source for d in draws[:100]} == {0}
    assert {d.source for d in draws[100:333]} == {0, 1}
    late = Counter(d.source for d in draws[333:1333])
    assert all(
        abs(late[s] - 1000 * share) <= 32 for s, share in enumerate((0.25, 0.25, 0.5))
    )  # part of a block is random
    for source in range(3):
        assert [d.rank for d in draws if d.source == source] == list(range(sum(d.source == source for d in draws)))


def test_a_step_has_one_source_and_steps_follow_the_weights():
    mixture = Mixture(
        components((50, 3), (20, 1), (5, 4), from_sample=[0, 0, 65]), seed=4, batch_by="source", global_batch_size=8
    )
    steps = [[mixture.sample_at(8 * t + j) for j in range(8)] for t in range(9 + 64)]
    assert all(len({d.source for d in step}) == 1 for step in steps)
    assert 2 not in {step[0].source for step in steps[:9]}  # joins with the first whole step after sample 65
    assert Counter(step[0].source for step in steps[9:]) == {0: 24, 1: 8, 2: 32}
    for source in range(3):
        ranks = [d.rank for step in steps for d in step if d.source == source]
        assert ranks == list(range(len(ranks)))


def test_stand_ins_walk_the_rest_of_the_epoch():
    mixture = Mixture(components((10, 1)), seed=0)
    draws = [mixture.sample_at(i) for i in range(20)]
    assert [mixture.next_in_epoch(draws[3], a).row for a in (1, 2, 6)] == [draws[4].row, draws[5].row, draws[9].row]
    assert mixture.next_in_epoch(draws[9], 1).row == draws[0].row  # past the end: the same epoch's start
    assert sorted(mixture.next_in_epoch(draws[13], a).row for a in range(1, 11)) == list(range(10))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 65537])
def test_permutation_is_one_to_one(size):
    image = permuted(np.arange(size, dtype=np.uint64), size, key=12345)
    assert sorted(image.tolist()) == list(range(size))


def test_permutation_is_the_network_it_says():
    """Against the definition in whole numbers: 8 rounds (l, r) -> (r, l ^ hash(r)), SplitMix64's finaliser, cycles walked."""

    def scalar(value: int, size: int, key: int) -> int:
        half, bits = max(((size - 1).bit_length() + 1) // 2, 2), (1 << 64) - 1
        while True:
            left, right = value >> half, value & ((1 << half) - 1)
            for number in range(8):
                x = (key + (number + 1) * 0x9E3779B97F4A7C15 + right * 0xD1B54A32D192ED03) & bits
                x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & bits
                x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & bits
                left, right = right, left ^ ((x ^ (x >> 31)) & ((1 << half) - 1))
            value = left << half | right
            if value < size:
                return value

    for size, key in ((3, 5), (1000, 2**64 - 1), (10**9, 77), (2**40 + 1, 2**63)):
        places = np.linspace(0, size - 1, 50).astype(np.uint64)
        assert permuted(places, size, key=key).tolist() == [scalar(int(place), size, key) for place in places]


def test_permutation_spreads_evenly():
    """Where row 0 of 10 goes over many keys: each place within five standard deviations of a tenth."""
    keys = np.random.default_rng(1).integers(0, 2**63, 4000)
    first = np.zeros(1, np.uint64)
    counts = np.bincount([int(permuted(first, 10, key=int(k))[0]) for k in keys], minlength=10)
    assert np.abs(counts - 400).max() < 5 * np.sqrt(4000 * 0.1 * 0.9)


def test_one_sample_costs_no_more_far_into_the_run():
    mixture = Mixture(components((10**9, 0.37), (10**7, 0.63)), seed=0)
    draw = mixture.sample_at(10**12)
    assert draw == Mixture(mixture.components, seed=0).sample_at(10**12)
    assert abs(draw.rank - (0.37, 0.63)[draw.source] * 10**12) < BLOCK_SAMPLES


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "data.sources is empty"),
        (components((0, 1)), r"data.sources\['s0'\] has 0 rows"),
        (components((1, -1.0)), r"data.sources\['s0'\].weight = -1.0 must be finite and not negative"),
        (components((1, float("nan"))), "must be finite and not negative"),
        (components((1, 1.0), from_sample=[-1]), r"from_sample = -1 must not be negative"),
        (components((1, 1.0), (1, 1.0), from_sample=[5, 6]), "no source with weight > 0 at sample 0"),
        (components((1, 0.0)), "no source with weight > 0 at sample 0"),
        (components((1, 1.0), (1, 1e-9)), r"data.sources\['s1'\].weight = 1e-09 is 1.0e-09 of the mixture"),
    ],
)
def test_impossible_mixtures_are_named(parts, message):
    with pytest.raises(ValueError, match=message):
        Mixture(parts, seed=0)


def test_reweight_changes_the_shares_from_its_place_on() -> None:
    """s0 : s1 is 3 : 1 until sample 384, 1 : 3 until 768, and s0 is out from there."""
    parts = [
        Component(name="s0", num_rows=1000, weight=3, reweight=((384, 1.0), (768, 0.0))),
        Component(name="s1", num_rows=1000, weight=1, reweight=((384, 3.0),)),
    ]
    mixture = Mixture(parts, seed=5)
    sources = [mixture.sample_at(i).source for i in range(960)]
    assert [sources[a:b].count(0) for a, b in ((0, 384), (384, 768), (768, 960))] == [288, 96, 0]
    # Rows go on where the source left off: no row twice in its first epoch.
    rows = [draw.row for i in range(960) if (draw := mixture.sample_at(i)).source == 0]
    assert len(set(rows)) == len(rows) == 384


def test_reweight_never_splits_a_step_and_is_checked() -> None:
    parts = [Component(name="s0", num_rows=90, reweight=((20, 0.0),)), Component(name="s1", num_rows=90, weight=1)]
    mixture = Mixture(parts, seed=5, batch_by="source", global_batch_size=8)
    steps = [{mixture.sample_at(8 * step + i).source for i in range(8)} for step in range(12)]
    assert all(len(step) == 1 for step in steps)
    assert all(step == {1} for step in steps[3:])  # sample 20 lies in step 2: the change takes effect at step 3
    with pytest.raises(ValueError, match="must ascend"):
        Mixture([Component(name="s0", num_rows=9, from_sample=0, reweight=((0, 1.0),))], seed=5)
    with pytest.raises(ValueError, match="no source with weight > 0 at sample 30"):
        Mixture([Component(name="s0", num_rows=9, reweight=((30, 0.0),))], seed=5)


def test_a_source_leaves_when_its_epochs_are_used_up_and_the_order_ends_with_the_last() -> None:
    parts = [
        Component(name="s0", num_rows=100, weight=1, epochs=2.5),
        Component(name="s1", num_rows=70, weight=3, epochs=1),
        Component(name="s2", num_rows=40, weight=2, epochs=3, from_sample=30),
    ]
    mixture = Mixture(parts, seed=2)
    assert mixture.num_samples == 250 + 70 + 120
    draws = [mixture.sample_at(i) for i in range(mixture.num_samples)]
    for source, epochs in enumerate((2.5, 1, 3)):
        rows = Counter(d.row for d in draws if d.source == source)
        assert sum(rows.values()) == epochs * parts[source].num_rows
        assert len(rows) == parts[source].num_rows and max(rows.values()) - min(rows.values()) <= (epochs % 1 > 0)
    assert len({(d.source, d.row, d.epoch) for d in draws}) == len(draws)
    last = max(i for i, d in enumerate(draws) if d.source == 1)
    first = Counter(d.source for d in draws[:30])
    assert 5 <= first[0] <= 10 and first[2] == 0  # 1 : 3 until s2 joins
    assert abs(sum(d.source == 0 for d in draws[30:last]) - (last - 30) / 6) < 16  # 1 : 3 : 2 while s1 lasts
    with pytest.raises(ValueError, match=r"the data ends after 440 samples: every source has used its epochs"):
        mixture.sample_at(440)
    again = Mixture(parts, seed=2)
    assert [again.sample_at(i) for i in reversed(range(440))] == draws[::-1]


def test_sources_without_epochs_go_on_after_the_others_left() -> None:
    parts = [Component(name="s0", num_rows=9, epochs=1), Component(name="s1", num_rows=5)]
    mixture = Mixture(parts, seed=0)
    assert mixture.num_samples is None
    sources = [mixture.sample_at(i).source for i in range(5000)]
    assert sources.count(0) == 9 and set(sources[64:]) == {1}
    assert Mixture([parts[1]], seed=0).sample_at(10**12).source == 0


def test_epochs_with_a_source_a_step_end_with_a_whole_step() -> None:
    parts = [Component(name="s0", num_rows=30, epochs=1), Component(name="s1", num_rows=16, epochs=2)]
    mixture = Mixture(parts, seed=1, batch_by="source", global_batch_size=8)
    assert mixture.num_samples == 24 + 32
    steps = [{mixture.sample_at(8 * step + i).source for i in range(8)} for step in range(7)]
    assert all(len(step) == 1 for step in steps) and Counter(next(iter(s)) for s in steps) == {0: 3, 1: 4}
    with pytest.raises(ValueError, match=r"data.sources\['s0'\].epochs = 0.2 of 30 rows is less than one step"):
        Mixture([Component(name="s0", num_rows=30, epochs=0.2)], seed=1, batch_by="source", global_batch_size=8)


def test_groups_have_equal_parts_whatever_their_members_weigh() -> None:
    parts = [
        Component(name="a/image", num_rows=50, weight=3, group="image", source=0, rows=np.arange(0, 100, 2)),
        Component(name="a/text", num_rows=50, weight=5, group="text", source=0, rows=np.arange(1, 100, 2)),
        Component(name="b/image", num_rows=20, weight=1, group="image", source=1, rows=np.arange(20)),
        Component(name="c/audio", num_rows=7, weight=0.01, group="audio", source=2, from_sample=384, rows=np.arange(7)),
    ]
    mixture = Mixture(parts, seed=3)
    draws = [mixture.sample_at(i) for i in range(384 + 64 * 12)]
    groups = [parts[d.component].group for d in draws]
    assert Counter(groups[:384]) == {"image": 192, "text": 192}
    later = Counter(groups[384:])
    assert all(abs(later[group] - 256) <= 1 for group in ("image", "text", "audio"))
    images = Counter(d.source for d in draws if parts[d.component].group == "image")
    assert abs(images[0] - 3 * images[1]) <= 8
    assert {d.row % 2 for d in draws if d.component == 0} == {0} and {d.row % 2 for d in draws if d.component == 1} == {
        1
    }
    assert {d.source for d in draws} == {0, 1, 2}
    stand_in = mixture.next_in_epoch(draws[0], 1)
    assert stand_in.component == draws[0].component and stand_in.row != draws[0].row
