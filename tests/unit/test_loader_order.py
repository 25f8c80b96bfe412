"""Which samples a run takes: shares by tokens, balance of modalities, and each sample once over any stops and layouts."""

import random
from collections import Counter

import numpy as np
import pytest

from megatron_omni.data.loader import StepLoader
from tests.unit.tiny_data import indexed, row, three_sources, tiny_recipe, write_source


@pytest.fixture
def sources(tmp_path):
    return three_sources(tmp_path)


def test_weights_by_tokens_are_shares_of_the_tokens(tmp_path, sources):
    loader = StepLoader(tiny_recipe(tmp_path, indexed(tmp_path, sources), weight_by="tokens"), data_rank=0, data_size=1)
    tokens = np.zeros(3)
    for i in range(64 * 60):
        draw = loader.mixture.sample_at(i)
        size = loader.builder.sizes.size(loader.sources[draw.source].facts(draw.row))
        tokens[draw.source] += size.tokens
    assert tokens / tokens.sum() == pytest.approx([0.5, 0.25, 0.25], abs=0.01)  # the weights are 2 : 1 : 1
    with pytest.raises(
        ValueError, match=r"data.weight_by = 'tokens': source 'bare' has no index; run megatron-omni prepare"
    ):
        StepLoader(
            tiny_recipe(tmp_path, [write_source(tmp_path, "bare", [row("x")])], weight_by="tokens"),
            data_rank=0, data_size=1,
        )  # fmt: skip


def test_annealing_draws_every_modality_equally_often(tmp_path, sources):
    rows = [row("both <image>", f"m{i}", images=["0.png"]) if i % 5 else row("only text", f"m{i}") for i in range(25)]
    rows += [row("<audio> <image>", f"m{i}", audios=["0.wav"], images=["0.png"]) for i in range(3)] + ["{broken"]
    sources = indexed(tmp_path, [*sources, write_source(tmp_path, "mixed", rows)])
    loader = StepLoader(tiny_recipe(tmp_path, sources, balance="modality"), data_rank=0, data_size=1)
    classes: Counter[str] = Counter()
    for i in range(64 * 30):
        draw = loader.mixture.sample_at(i)
        record = loader.sources[draw.source][draw.row]
        classes["image" if record.images else "audio" if record.audios else "text"] += 1
    assert all(abs(count - 640) <= 1 for count in classes.values()) and len(classes) == 3
    assert {int(batch.source_ids.max()) for batch in loader.next_step()} <= set(range(4))


@pytest.mark.parametrize(
    "settings", [{"global_batch_size": 16}, {"packing": True, "seq_length": 200, "micro_batch_size": 1}]
)
def test_any_sequence_of_stops_and_layouts_gives_each_sample_once(tmp_path, sources, settings):
    """Random stops, 1 to 8 ranks, 0 to 2 threads, with and without the index, through a source's last epoch."""
    sources[0].epochs = 1.5
    order = StepLoader(tiny_recipe(tmp_path, sources, **settings), data_rank=0, data_size=1)
    rng, state, seen = random.Random(7), order.state_dict(), list[int]()
    for segment in range(8):
        if segment == 4:
            indexed(tmp_path, sources)
        size = rng.choice([1, 2, 4, 8])
        recipe = tiny_recipe(tmp_path, sources, num_workers=rng.randrange(3), **settings)
        ranks = [StepLoader(recipe, data_rank=r, data_size=size) for r in range(size)]
        for loader in ranks:
            loader.load_state_dict(state)
        for _ in range(rng.randrange(1, 4)):
            batches = [batch for loader in ranks for batch in loader.next_step()]
            for batch in batches:
                for ids, segments, tokens, source in zip(
                    batch.sample_ids, batch.segment_ids, batch.input_ids, batch.source_ids
                ):
                    for s in range(int(segments.max()) + 1):
                        (sample_id,) = ids[segments == s].unique().tolist()
                        draw = order.mixture.sample_at(sample_id)
                        alone = order.builder.build_sample(order.sources[draw.source][draw.row])
                        assert tokens[segments == s].tolist() == alone.input_ids.tolist()
                        assert set(source[segments == s].tolist()) == {draw.source}
                        seen.append(sample_id)
        states = [loader.state_dict() for loader in ranks]
        assert len({(other["consumed_samples"], *other["waiting"]) for other in states}) == 1
        state = states[0]
        for loader in ranks:
            loader.close()
    assert sorted([*seen, *state["waiting"]]) == list(range(len(seen) + len(state["waiting"]))) and len(seen) > 60
