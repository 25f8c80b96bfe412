"""The step loader: records that cannot be used give way to others, alike on every layout, and are counted."""

import logging

import pytest

from megatron_omni.data import loader as loader_module
from megatron_omni.data.loader import StepLoader
from tests.unit.tiny_data import BAD_ROWS, bad_source, row, rows_of, tiny_recipe, write_source


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
