"""The step loader: threads and the cache change nothing; what stalls is left out, on every rank."""

import threading

import pytest

from megatron_omni.data.loader import StepLoader
from megatron_omni.data.sample import SampleBuilder
from megatron_omni.data.sizes import measure
from tests.unit.tiny_data import (
    assert_equal,
    hang_until,
    row,
    rows_of,
    three_sources,
    tiny_recipe,
    write_clip,
    write_source,
)


@pytest.fixture
def sources(tmp_path):
    return three_sources(tmp_path)


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


def test_closing_waits_for_crews_that_a_load_of_state_left_behind(tmp_path, sources, monkeypatch):
    load, slow = StepLoader._load, threading.Event()

    def slowly(self, plan):
        slow.wait(0.5)
        return load(self, plan)

    loader = StepLoader(tiny_recipe(tmp_path, sources, num_workers=3), data_rank=0, data_size=1)
    loader.next_step()
    monkeypatch.setattr(StepLoader, "_load", slowly)
    loader.next_step()
    loader.load_state_dict(loader.state_dict())  # its crew is at work, and is not the loader's any more
    loader.close()
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


def test_a_stalled_decode_costs_its_record_and_nothing_else(tmp_path, monkeypatch):
    rows = [row("what?", f"a{i}") for i in range(16)]
    recipe = tiny_recipe(tmp_path, [write_source(tmp_path, "text", rows)], num_workers=2, max_bad_fraction=1.0)
    loader = StepLoader(recipe, data_rank=0, data_size=1)
    build, released = SampleBuilder.build_sample, threading.Event()

    def hanging(self, record):
        if record.answer == "a5":
            hang_until(released)
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
    recipe = tiny_recipe(tmp_path, [write_source(tmp_path, "text", rows)], num_workers=1, max_bad_fraction=1.0)
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
    alone = StepLoader(tiny_recipe(tmp_path, recipe.data.sources, max_bad_fraction=1.0), data_rank=0, data_size=1)

    def hanging(record, tokenizer):
        if record.answer == "a5" and tokenizer is ranks[0].builder.tokenizer:
            hang_until(released)
        return measure(record, tokenizer)

    monkeypatch.setattr("megatron_omni.data.sample.measure", hanging)
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
