"""The step loader: same steps on any layout and after any resume, balance, stand-ins for bad records, threads."""

import logging
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_omni.batch import OmniBatch
from megatron_omni.data import loader as loader_module
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.mixture import Component, DataEnded, Mixture
from megatron_omni.data.sample import SampleBuilder
from megatron_omni.data.sizes import MediaFacts, measure
from tests.unit.tiny_data import (
    indexed,
    row,
    three_sources,
    tiny_recipe,
    write_clip,
    write_image,
    write_sound,
    write_source,
)


@pytest.fixture
def sources(tmp_path):
    return three_sources(tmp_path)


def ids_of(batches: list[OmniBatch]) -> list[list[int]]:
    """Sample ids of each micro-batch, by row."""
    return [batch.sample_ids[:, 0].tolist() for batch in batches]


def rows_of(batches: list[OmniBatch]) -> dict[int, tuple]:
    """What each sample looks like, without padding."""
    return {
        int(batch.sample_ids[i, 0]): (int(batch.source_ids[i, 0]), *batch.input_ids[i][~batch.padding_mask[i]].tolist())
        for batch in batches
        for i in range(len(batch.input_ids))
    }


def assert_equal(a: list[OmniBatch], b: list[OmniBatch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b):
        for name, tensor in vars(x).items():
            other = getattr(y, name)
            assert (tensor is None) == (other is None) and (tensor is None or torch.equal(tensor, other)), name


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
            held = [t for batch in batches for t in vars(batch).values() if isinstance(t, torch.Tensor)]
            width = max(batch.input_ids.shape[1] for batch in batches)
            padded = 80 * sum(width - batch.input_ids.shape[1] for batch in batches)
            assert planned == sum(t.nbytes for t in held) + padded
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
    import json

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


def bad_source(tmp_path) -> list:
    """24 records: 2 bad rows, 1 missing file, 1 too long, and 2 pictures with a whole header and half of the pixels."""
    write_image(tmp_path / "ok.png", size=(56, 56))
    Image.effect_noise((56, 56), 50).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "damaged.png").write_bytes(data[: len(data) // 2])
    rows: list[dict | str] = [row("<image>", f"a{i}", images=["ok.png"]) for i in range(24)]
    rows[3], rows[4] = "{broken", row("<image>", "b")
    rows[9] = row("<image>", "c", images=["gone.png"])
    rows[10] = row("q" * 300, "d")
    rows[15] = row("<image>", "e", images=["damaged.png"])
    rows[16] = row("<image>", "f", images=["damaged.png"])
    return [write_source(tmp_path, "pictures", rows)]


BAD_ROWS = {
    3: "not_json",
    4: "marker_count",
    9: "missing_media",
    10: "too_long",
    15: "unreadable_media",
    16: "unreadable_media",
}


def test_bad_records_give_way_to_the_next_ones_alike_on_every_layout(tmp_path):
    recipe = tiny_recipe(tmp_path, bad_source(tmp_path), max_bad_fraction=1.0)
    loaders = {size: [StepLoader(recipe, data_rank=r, data_size=size) for r in range(size)] for size in (1, 2, 4)}
    seen = {}
    for _ in range(3):  # one epoch
        steps = {s: rows_of([b for loader in group for b in loader.next_step()]) for s, group in loaders.items()}
        assert steps[1] == steps[2] == steps[4]
        seen |= steps[1]
    alone = loaders[1][0]
    order = [alone.mixture.sample_at(i).row for i in range(24)]
    good = [
        alone.builder.build_sample(alone.sources[0][r]).input_ids.tolist() if r not in BAD_ROWS else None
        for r in range(24)
    ]
    for place in range(24):
        stand_in = next(r for r in (*order[place:], *order[:place]) if r not in BAD_ROWS)
        assert seen[place] == (0, *good[stand_in])
    # Counted once each, unless a bad row is also met as a stand-in for the bad row before it.
    assert set(alone.report()) == set(BAD_ROWS.values())
    assert sum(alone.report().values()) >= len(BAD_ROWS)


def test_skips_survive_a_resume_and_name_the_record(tmp_path, caplog):
    recipe = tiny_recipe(tmp_path, bad_source(tmp_path), max_bad_fraction=1.0)
    loader = StepLoader(recipe, data_rank=0, data_size=1)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            loader.next_step()
    text = caplog.text
    assert "skipped a record of pictures (not_json): " in text and "pictures.jsonl:4: row = " in text
    assert "pictures.jsonl:10: media file" in text and "gone.png': no such file" in text
    assert len([r for r in caplog.records if "unreadable_media" in r.message]) <= 3
    caplog.clear()
    second = StepLoader(recipe, data_rank=1, data_size=2)
    for _ in range(3):
        second.next_step()
    assert "not_json" in second.report() and "not_json" not in caplog.text  # what headers show is said once, by rank 0
    other = StepLoader(recipe, data_rank=0, data_size=1)
    other.load_state_dict(loader.state_dict())
    assert other.report() == loader.report() and other.report() is not loader.report()


def test_too_many_bad_records_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "MIN_TRIED", 24)
    loader = StepLoader(tiny_recipe(tmp_path, bad_source(tmp_path), max_bad_fraction=0.05), data_rank=0, data_size=1)
    message = (
        r"\d+ of \d+ records could not be used, more than data.max_bad_fraction = 0.05 \(.*\d\); the last one: .*Repair"
    )
    with pytest.raises(ValueError, match=message) as caught:
        for _ in range(4):
            loader.next_step()
    assert "pictures.jsonl" in str(caught.value)
    assert loader.consumed_samples in (16, 24)  # the step that fails is not consumed


def test_a_source_without_a_usable_record_is_an_error_at_once(tmp_path):
    sources = [write_source(tmp_path, "gone", [row("<image>", images=["gone.png"])] * 5)]
    loader = StepLoader(tiny_recipe(tmp_path, sources, max_bad_fraction=1.0), data_rank=0, data_size=1)
    with pytest.raises(
        ValueError, match=r"data source 'gone': 5 records in a row cannot be used; the last one: .*gone.png"
    ):
        loader.next_step()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_threads_change_neither_order_nor_state(tmp_path, sources, num_workers):
    plain = StepLoader(tiny_recipe(tmp_path, sources), data_rank=0, data_size=1)
    ahead = StepLoader(tiny_recipe(tmp_path, sources, num_workers=num_workers), data_rank=0, data_size=1)
    for _ in range(4):
        assert_equal(ahead.next_step(), plain.next_step())
        assert ahead.state_dict() == plain.state_dict()  # prepared steps are not consumed
    state = ahead.state_dict()
    fifth = ahead.next_step()
    ahead.load_state_dict(state)
    assert_equal(ahead.next_step(), fifth)
    ahead.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("data")]


def test_an_error_in_a_thread_surfaces_in_the_step_it_belongs_to(tmp_path, sources, monkeypatch):
    loader = StepLoader(tiny_recipe(tmp_path, sources, num_workers=2), data_rank=0, data_size=1)
    reference = StepLoader(tiny_recipe(tmp_path, sources), data_rank=0, data_size=1)
    load = StepLoader._load

    def failing(self, plan):
        if plan.after.next_sample == 24 and self is loader and not healed:
            raise RuntimeError("disk on fire")
        return load(self, plan)

    healed = False
    monkeypatch.setattr(StepLoader, "_load", failing)
    for _ in range(2):
        assert_equal(loader.next_step(), reference.next_step())
    with pytest.raises(RuntimeError, match="disk on fire"):
        loader.next_step()
    assert loader.consumed_samples == 16
    healed = True
    assert_equal(loader.next_step(), reference.next_step())  # nothing was lost
    loader.close()


def test_the_cache_decodes_nothing_twice_and_changes_nothing(tmp_path, monkeypatch):
    for i in range(5):
        write_clip(tmp_path / f"{i}.mp4", [30 * i, 30 * i + 20], sound=True)
    sources = [write_source(tmp_path, "clips", [row("<video>", f"v{i}", videos=[f"{i}.mp4"]) for i in range(5)])]
    plain = StepLoader(tiny_recipe(tmp_path, sources), data_rank=0, data_size=1)
    cached = StepLoader(tiny_recipe(tmp_path, sources, cache_gib=0.1), data_rank=0, data_size=1)
    decoded = []
    build = SampleBuilder.build_sample

    def counting(self, record):
        if self is cached.builder:
            decoded.append(record.where)
        return build(self, record)

    monkeypatch.setattr(SampleBuilder, "build_sample", counting)
    for _ in range(5):
        assert_equal(cached.next_step(), plain.next_step())
    assert len(decoded) == len(set(decoded)) == 5


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


def packed(tmp_path, sources, **data):
    data = {"packing": True, "seq_length": 200, "micro_batch_size": 1, "global_batch_size": 8} | data
    return tiny_recipe(tmp_path, sources, **data)


def samples_in(batches: list[OmniBatch]) -> list[int]:
    """Sample ids of packed micro-batches, in the order in which they lie there."""
    found = []
    for batch in batches:
        for ids, segments in zip(batch.sample_ids, batch.segment_ids):
            found += [int(ids[segments == s][0]) for s in range(int(segments.max()) + 1)]
    return found


def test_packed_rows_hold_each_sample_whole_and_once(tmp_path, sources):
    loader = StepLoader(packed(tmp_path, sources), data_rank=0, data_size=1)
    seen: list[int] = []
    for _ in range(12):
        batches = loader.next_step()
        assert len(batches) == 8 and all(batch.input_ids.shape[1] <= 200 for batch in batches)
        for batch in batches:
            for s in range(batch.num_samples):
                here = batch.segment_ids[0] == s
                (sample_id,) = batch.sample_ids[0][here].unique().tolist()
                draw = loader.mixture.sample_at(sample_id)
                alone = loader.builder.build_sample(loader.sources[draw.source][draw.row])
                assert batch.input_ids[0][here].tolist() == alone.input_ids.tolist()
                assert torch.equal(batch.position_ids[:, 0, here], alone.position_ids)  # restarts in each sample
                assert batch.sample_positions[0][here].tolist() == list(range(alone.length))
        seen += samples_in(batches)
        waiting = loader.state_dict()["waiting"]
        assert sorted(seen + waiting) == list(range(max(seen + waiting) + 1))
        assert loader.consumed_samples == len(seen)
    assert len(seen) > 12 * 8  # rows are shared


@pytest.mark.parametrize("num_workers", [0, 2])
def test_packed_steps_resume_anywhere_on_any_number_of_ranks(tmp_path, sources, num_workers):
    recipe = packed(tmp_path, sources, num_workers=num_workers)
    reference = StepLoader(recipe, data_rank=0, data_size=1)
    steps, states = [], []
    for _ in range(14):
        states.append(reference.state_dict())
        steps.append(reference.next_step())
    assert any(state["waiting"] for state in states)
    rng = random.Random(3)
    for size in (1, 2, 4, 8):
        at = rng.randrange(1, 12)
        loaders = [StepLoader(recipe, data_rank=r, data_size=size) for r in range(size)]
        for loader in loaders:
            loader.load_state_dict(states[at])
        for step in steps[at : at + 2]:
            batches = [loader.next_step() for loader in loaders]
            together = [batches[r][j] for j in range(8 // size) for r in range(size)]
            assert sorted(samples_in(together)) == sorted(samples_in(step))
            assert sorted(map(samples_in, ([b] for b in together))) == sorted(map(samples_in, ([b] for b in step)))
        for loader in loaders:
            assert loader.state_dict()["waiting"] == states[at + 2]["waiting"]
            loader.close()
    reference.close()


def test_a_packed_run_may_be_resumed_without_packing(tmp_path, sources):
    loader = StepLoader(packed(tmp_path, sources), data_rank=0, data_size=1)
    seen: list[int] = []
    while not loader.state_dict()["waiting"]:
        seen += samples_in(loader.next_step())
    plain = StepLoader(packed(tmp_path, sources, packing=False), data_rank=0, data_size=1)
    plain.load_state_dict(loader.state_dict())
    for _ in range(12):
        seen += samples_in(plain.next_step())
    assert sorted(seen) == list(range(len(seen))) and not plain.state_dict()["waiting"]


def test_a_record_that_fails_while_decoding_leaves_or_fills_its_packed_place(tmp_path):
    recipe = packed(tmp_path, bad_source(tmp_path), max_bad_fraction=1.0, global_batch_size=4)
    loaders = {size: [StepLoader(recipe, data_rank=r, data_size=size) for r in range(size)] for size in (1, 2, 4)}
    for _ in range(3):
        steps = {s: [b for loader in group for b in loader.next_step()] for s, group in loaders.items()}
        contents = {s: sorted(samples_in(batches)) for s, batches in steps.items()}
        assert contents[1] == contents[2] == contents[4]
        assert all(batch.input_ids.shape[1] <= 200 for batch in steps[1])
    assert loaders[1][0].report()["unreadable_media"] >= 1


def test_a_stalled_decode_costs_its_record_and_nothing_else(tmp_path, monkeypatch):
    rows = [row("what?", f"a{i}") for i in range(16)]
    recipe = tiny_recipe(
        tmp_path, [write_source(tmp_path, "text", rows)], num_workers=2, stall_seconds=0.3, max_bad_fraction=1.0
    )
    loader = StepLoader(recipe, data_rank=0, data_size=1)
    build, released = SampleBuilder.build_sample, threading.Event()

    def hanging(self, record):
        if record.answer == "a5":
            released.wait()
        return build(self, record)

    monkeypatch.setattr(SampleBuilder, "build_sample", hanging)
    steps = [rows_of(loader.next_step()) for _ in range(2)]
    released.set()
    loader.close()
    assert sorted(i for step in steps for i in step) == list(range(16))
    assert loader.report() == {"stalled": 1} and loader.num_skipped == 1
    assert loader.worker_restarts == 2


def test_a_header_that_stalls_on_one_rank_is_skipped_by_all(tmp_path, monkeypatch):
    """Rank 0 cannot read one header in time, rank 1 can: their micro-batches still are the parts of one step."""
    rows = [row("what?", f"a{i}") for i in range(32)]
    settings = dict(stall_seconds=1.5, max_bad_fraction=1.0)
    recipe = tiny_recipe(tmp_path, [write_source(tmp_path, "text", rows)], num_workers=1, **settings)
    told, meet, released = [[], []], threading.Barrier(2, timeout=60), threading.Event()

    def agree(rank):
        def exchange(found):
            told[rank] = list(found)
            meet.wait()
            everything = [*told[0], *told[1]]
            meet.wait()
            return everything

        return exchange

    ranks = [StepLoader(recipe, data_rank=rank, data_size=2, agree=agree(rank)) for rank in range(2)]
    alone = StepLoader(tiny_recipe(tmp_path, recipe.data.sources, **settings), data_rank=0, data_size=1)

    def hanging(record, tokenizer):
        if record.answer == "a5" and tokenizer is ranks[0].builder.tokenizer:
            released.wait()
        return measure(record, tokenizer)

    monkeypatch.setattr("megatron_omni.data.loader.measure", hanging)
    steps = [[], []]

    def run(rank):
        for _ in range(4):
            steps[rank].append(rows_of(ranks[rank].next_step()))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    released.set()
    for rank in ranks:
        rank.close()
    alone._stalls.add((0, 5))
    for first, second in zip(*steps, strict=True):
        assert first | second == rows_of(alone.next_step())
    assert ranks[0]._cursor == ranks[1]._cursor == alone._cursor
    assert [rank.report() for rank in ranks] == [alone.report()] * 2 == [{"stalled": 1}] * 2
    assert [rank.num_skipped for rank in ranks] == [1, 0]  # counted once over all ranks


def test_a_file_longer_than_its_header_said_does_not_overfill_a_packed_row(tmp_path, monkeypatch):
    write_sound(tmp_path / "long.wav", 3.0)
    write_sound(tmp_path / "short.wav", 0.5)
    rows = [row("<audio>", f"s{i}", audios=["long.wav" if i == 3 else "short.wav"]) for i in range(12)]
    sources = indexed(tmp_path, [write_source(tmp_path, "sound", rows)])
    recipe = packed(tmp_path, sources, seq_length=120, global_batch_size=2, max_bad_fraction=1.0)
    loader = StepLoader(recipe, data_rank=0, data_size=1)
    facts = loader.sources[0].facts
    monkeypatch.setattr(
        loader.sources[0], "facts", lambda i: facts(i)._replace(media=(MediaFacts("audio", samples=8000),))
    )
    for _ in range(4):
        assert all(batch.input_ids.shape[1] <= 120 for batch in loader.next_step())
    assert loader.report().keys() == {"wrong_header"}


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
