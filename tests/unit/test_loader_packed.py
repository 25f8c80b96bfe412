"""The step loader with packing: sequences hold each sample whole and once, over any stops and layouts."""

import random

import pytest
import torch

from megatron_omni.batch import OmniBatch
from megatron_omni.data.loader import StepLoader
from megatron_omni.data.sizes import MediaFacts
from tests.unit.tiny_data import bad_source, indexed, row, three_sources, tiny_recipe, write_sound, write_source


@pytest.fixture
def sources(tmp_path):
    return three_sources(tmp_path)


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


def test_packed_sequences_hold_each_sample_whole_and_once(tmp_path, sources):
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
    assert len(seen) > 12 * 8  # sequences are shared


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


def test_a_file_longer_than_its_header_said_does_not_overfill_a_packed_sequence(tmp_path, monkeypatch):
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
