"""The step loader: a step is the next stretch of the order, the same micro-batches on any layout and after any resume."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_omni.batch import GRIDS, INDICES, MEDIA, OmniBatch
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.mixture import Component, DataEnded, Mixture
from megatron_omni.data.sample import SampleBuilder
from tests.unit.tiny_data import assert_equal, rows_of, three_sources, tiny_recipe


@pytest.fixture
def sources(tmp_path):
    return three_sources(tmp_path)


def ids_of(batches: list[OmniBatch]) -> list[list[int]]:
    """Sample ids of each micro-batch, by row."""
    return [batch.sample_ids[:, 0].tolist() for batch in batches]


@pytest.mark.parametrize("batch_by", ["mixed", "source"])
def test_a_step_is_the_next_stretch_of_the_global_order(tmp_path, sources, batch_by):
    recipe = tiny_recipe(tmp_path, sources, batch_by=batch_by)
    loader = StepLoader(recipe, data_rank=0, data_size=1)
    parts = [Component(name=s.name, num_rows=n, weight=s.weight) for s, n in zip(sources, (30, 12, 7))]
    order = Mixture(parts, seed=recipe.seed, batch_by=batch_by, global_batch_size=8)
    for step in range(12):
        batches = loader.next_step()
        expected = {
            i: loader.builder.build_sample(loader.sources[order.sample_at(i).source][order.sample_at(i).row])
            for i in range(8 * step, 8 * step + 8)
        }
        assert rows_of(batches) == {i: (order.sample_at(i).source, *s.input_ids.tolist()) for i, s in expected.items()}
        assert sum(b.num_label_tokens for b in batches) == sum(int((s.labels >= 0).sum()) for s in expected.values())
    assert loader.consumed_samples == 96 and loader.report() == {}


def test_micro_batches_are_the_same_sets_on_any_number_of_ranks(tmp_path, sources):
    recipe = tiny_recipe(tmp_path, sources, global_batch_size=16)
    loaders = {size: [StepLoader(recipe, data_rank=r, data_size=size) for r in range(size)] for size in (1, 2, 4)}
    for _ in range(5):
        steps = {size: [loader.next_step() for loader in group] for size, group in loaders.items()}
        for size, ranks in steps.items():
            assert [len(batches) for batches in ranks] == [8 // size] * size
        alone = sorted(map(tuple, ids_of(steps[1][0])))
        for size in (2, 4):
            assert sorted(tuple(ids) for batches in steps[size] for ids in ids_of(batches)) == alone
        contents = [rows_of([b for batches in ranks for b in batches]) for ranks in steps.values()]
        assert contents[0] == contents[1] == contents[2] and len(contents[0]) == 16


def test_lengths_are_alike_in_a_round_and_level_between_ranks(tmp_path, sources):
    recipe = tiny_recipe(tmp_path, sources, global_batch_size=32, micro_batch_size=2, pad_to_multiple_of=1)
    ranks = [StepLoader(recipe, data_rank=r, data_size=2).next_step() for r in range(2)]
    widths = np.array([[batch.input_ids.shape[1] for batch in batches] for batches in ranks])  # [rank, round]
    assert (np.diff(widths.max(axis=0)) <= 0).all()  # longest first: a step that does not fit fails at once
    assert (widths.min(axis=0)[:-1] >= widths.max(axis=0)[1:]).all()  # rounds do not overlap
    totals = widths.sum(axis=1)
    assert abs(totals[0] - totals[1]) <= 0.1 * totals.mean()
    for size in (2, 4):  # dealt in a snake, so that the longer one of a round is not always the same rank's
        whole = ids_of(StepLoader(recipe, data_rank=0, data_size=1).next_step())
        rounds = [whole[j : j + size] if j // size % 2 == 0 else whole[j : j + size][::-1] for j in range(0, 16, size)]
        for rank in range(size):
            dealt = ids_of(StepLoader(recipe, data_rank=rank, data_size=size).next_step())
            assert dealt == [round_[rank] for round_ in rounds]
    unsorted = Mixture(
        [Component(name=s.name, num_rows=n, weight=s.weight) for s, n in zip(sources, (30, 12, 7))], seed=11
    )
    builder = SampleBuilder(recipe)
    loader = StepLoader(recipe, data_rank=0, data_size=1)
    lengths = [builder.size(loader.sources[d.source][d.row]).tokens for d in (unsorted.sample_at(i) for i in range(32))]
    padding = sum(max(lengths[i : i + 2]) * 2 for i in range(0, 32, 2)) - sum(lengths)
    assert 2 * (widths.sum() * 2 - sum(lengths)) < padding  # less than half the padding of the order as it comes


@pytest.mark.parametrize("packing", [False, True])
def test_planned_bytes_are_those_of_the_batches(tmp_path, sources, packing):
    """Pictures and sound are nearly all of them; data.prefetch_gib bounds what is prepared by this number."""
    recipe = tiny_recipe(tmp_path, sources, packing=packing, micro_batch_size=1, pad_to_multiple_of=1)
    media = set()
    for rank in range(2):
        loader = StepLoader(recipe, data_rank=rank, data_size=2)
        for _ in range(4):
            planned = loader._planned_bytes(loader.plan(loader._cursor))
            batches = loader.next_step()
            held = [getattr(batch, name) for batch in batches for name in (*GRIDS, *MEDIA)]
            places = sum(getattr(batch, name).nbytes for batch in batches for name in INDICES)
            width = max(batch.input_ids.shape[1] for batch in batches)
            padded = 88 * sum(width - batch.input_ids.shape[1] for batch in batches)
            most = 8 * width * len(batches)
            assert planned == sum(t.nbytes for t in held if t is not None) + padded + most and places <= most
            media |= {batch.pixel_values is not None or batch.audio_features is not None for batch in batches}
    assert media == {False, True}


@pytest.mark.parametrize("batch_by", ["mixed", "source"])
def test_resume_at_any_step_on_any_layout(tmp_path, sources, batch_by):
    recipe = tiny_recipe(tmp_path, sources, batch_by=batch_by)
    reference = StepLoader(recipe, data_rank=0, data_size=1)
    steps, states = [], []
    for _ in range(20):
        states.append(reference.state_dict())
        steps.append(reference.next_step())
    rng = random.Random(0)
    for size in (1, 2, 4):
        at = rng.randrange(1, 18)
        loaders = [StepLoader(recipe, data_rank=r, data_size=size) for r in range(size)]
        for loader in loaders:
            loader.next_step()  # a loader that was somewhere else
            loader.load_state_dict(states[at])
        for step in steps[at : at + 2]:
            batches = [loader.next_step() for loader in loaders]
            assert rows_of([b for rank in batches for b in rank]) == rows_of(step)
            if size == 1:
                assert_equal(batches[0], step)
    assert_equal(StepLoader(recipe, data_rank=0, data_size=1, consumed_samples=8 * 7).next_step(), steps[7])


def test_the_state_is_small_and_plain(tmp_path, sources):
    loader = StepLoader(tiny_recipe(tmp_path, sources), data_rank=0, data_size=1)
    loader.next_step()
    state = loader.state_dict()
    assert json.loads(json.dumps(state)) == state and state["consumed_samples"] == 8
    assert len(json.dumps(state)) < 500


def test_a_state_of_other_data_is_refused(tmp_path, sources):
    loader = StepLoader(tiny_recipe(tmp_path, sources), data_rank=0, data_size=1)
    loader.next_step()
    state = loader.state_dict()
    for recipe, key in [
        (tiny_recipe(tmp_path, sources, seed=12), "seed was 11, is 12"),
        (tiny_recipe(tmp_path, sources[:2]), "its sources were"),
        (tiny_recipe(tmp_path, sources, batch_by="source"), "batch_by was mixed, is source"),
    ]:
        with pytest.raises(ValueError, match=f"data changed since this state was saved: {key}"):
            StepLoader(recipe, data_rank=0, data_size=1).load_state_dict(state)
    with pytest.raises(ValueError, match=r"consumed_samples = 12 is no whole number of steps"):
        StepLoader(tiny_recipe(tmp_path, sources, batch_by="source"), data_rank=0, data_size=1, consumed_samples=12)


def test_evaluation_repeats_itself(tmp_path, sources):
    recipe = tiny_recipe(tmp_path, sources[:2])
    loader = StepLoader(recipe, data_rank=0, data_size=1, sources=[sources[2]])
    first = [loader.next_step() for _ in range(3)]
    loader.load_state_dict({"consumed_samples": 0})
    second = [loader.next_step() for _ in range(3)]
    assert len(first) == 3
    for a, b in zip(first, second):
        assert_equal(a, b)
    assert {int(b.source_ids.max()) for step in first for b in step} == {0}
    assert all(b.audio_features is not None for step in first for b in step)


def test_the_length_fits_tensor_parallelism(tmp_path, sources):
    recipe = tiny_recipe(tmp_path, sources, pad_to_multiple_of=6)
    recipe.parallel.tensor_model_parallel_size = 4
    loader = StepLoader(recipe, data_rank=0, data_size=1)
    assert all(batch.input_ids.shape[1] % 12 == 0 for _ in range(3) for batch in loader.next_step())


def test_a_batch_size_that_does_not_divide_is_named(tmp_path, sources):
    with pytest.raises(ValueError, match=r"data.global_batch_size = 8 is no positive multiple of .* = 2 x 3 = 6"):
        StepLoader(tiny_recipe(tmp_path, sources), data_rank=0, data_size=3)


@pytest.mark.parametrize("packing", [False, True])
def test_the_last_step_of_a_held_out_set_is_filled_up_without_labels(tmp_path, sources, packing):
    """12 records in steps of 8 rows (unpacked): all of them are given once, the rest of the rows counts nothing."""
    recipe = tiny_recipe(tmp_path, sources, packing=packing)
    held_out = recipe.data.sources[0]
    held_out.epochs = 12 / len(Path(held_out.path).read_text().splitlines())
    whole = StepLoader(recipe, data_rank=0, data_size=1, sources=[held_out])
    answers = {i: whole.builder.build_sample(whole.sources[0][whole.mixture.sample_at(i).row]) for i in range(12)}
    ranks = [StepLoader(recipe, data_rank=i, data_size=2, sources=[held_out]) for i in range(2)]
    labels, steps = 0, 0
    while True:
        try:
            batches = [batch for loader in ranks for batch in loader.next_step()]
        except DataEnded:
            break
        steps += 1
        labels += sum(batch.num_label_tokens for batch in batches)
    assert labels == sum(int((sample.labels != -100).sum()) for sample in answers.values())
    assert steps == (1 if packing else 2)
    with pytest.raises(DataEnded):  # training's own order has no such rows
        trained = StepLoader(tiny_recipe(tmp_path, [held_out], packing=packing), data_rank=0, data_size=1)
        for _ in range(steps):
            trained.next_step()
