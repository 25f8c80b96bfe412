"""Batches: padding, masks, identities, and media joined in the order of their placeholders."""

from dataclasses import replace

import pytest
import torch

from megatron_omni.batch import GRIDS, IGNORE_LABEL, INDICES, Modality
from megatron_omni.data.collate import collate
from megatron_omni.data.sample import Sample
from megatron_omni.positions import PositionRule


def sample(length: int, *, tiles: int = 0, chunks: int = 0, value: float = 0.0) -> Sample:
    modality = torch.zeros(length, dtype=torch.int64)
    modality[1 : 1 + tiles] = Modality.IMAGE
    modality[1 + tiles : 1 + tiles + chunks] = Modality.AUDIO
    labels = torch.full((length,), IGNORE_LABEL)
    labels[-2:] = 5
    return Sample(
        input_ids=torch.arange(1, length + 1),
        labels=labels,
        position_ids=torch.arange(length).expand(3, -1) + torch.tensor([[0], [100], [200]]),
        next_position=length,
        modality=modality,
        tiles=torch.full((tiles, 3, 2, 2), value) if tiles else None,
        chunks=torch.full((chunks, 4, 6), value) if chunks else None,
    )


def test_rows_are_padded_and_named():
    batch = collate([sample(5), sample(3)], pad_id=9, sample_ids=[70, 71], source_ids=[2, 0], multiple_of=4)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 9, 9, 9], [1, 2, 3, 9, 9, 9, 9, 9]]
    assert batch.labels.tolist() == [[-100] * 3 + [5, 5] + [-100] * 3, [-100, 5, 5] + [-100] * 5]
    assert batch.segment_ids.tolist() == [[0] * 5 + [-1] * 3, [0] * 3 + [-1] * 5]
    assert batch.sample_ids.tolist() == [[70] * 5 + [-1] * 3, [71] * 3 + [-1] * 5]
    assert batch.source_ids.tolist() == [[2] * 5 + [-1] * 3, [0] * 3 + [-1] * 5]
    assert batch.sample_positions.tolist() == [[0, 1, 2, 3, 4, 0, 0, 0], [0, 1, 2, 0, 0, 0, 0, 0]]
    assert batch.position_ids.shape == (3, 2, 8)
    assert batch.position_ids[1].tolist() == [[100, 101, 102, 103, 104, 0, 0, 0], [100, 101, 102, 0, 0, 0, 0, 0]]
    assert batch.padding_mask.sum() == 8 and batch.num_label_tokens == 4
    assert batch.pixel_values is None and batch.audio_features is None
    assert {getattr(batch, name).dtype for name in (*GRIDS, *INDICES)} == {torch.int64}
    assert (batch.num_samples, batch.num_tokens) == (2, 8)


def test_media_follow_the_rows():
    batch = collate(
        [sample(9, tiles=2, value=1.0), sample(9, chunks=1, value=2.0), sample(9, tiles=1, chunks=2, value=3.0)],
        pad_id=0,
    )
    assert batch.pixel_values is not None and batch.audio_features is not None
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [1.0, 1.0, 3.0]
    assert batch.audio_features[:, 0, 0].tolist() == [2.0, 3.0, 3.0]
    assert batch.picture_places.tolist() == [1 * 3 + 0, 2 * 3 + 0, 1 * 3 + 2]  # (s, b) of [S, B], row by row
    assert batch.sound_places.tolist() == [1 * 3 + 1, 2 * 3 + 2, 3 * 3 + 2]


@pytest.mark.parametrize(("lengths", "multiple", "expected"), [([8, 3], 8, 8), ([9], 8, 16), ([3], 1, 3), ([5], 6, 6)])
def test_the_length_is_the_longest_row_rounded_up(lengths, multiple, expected):
    assert collate([sample(n) for n in lengths], pad_id=0, multiple_of=multiple).input_ids.shape[1] == expected


def test_nothing_to_collate_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        collate([], pad_id=0)


RULE = PositionRule(pooled_side=2, num_query_tokens=3, audio_group_seconds=1.0, theta=2.0)


@pytest.mark.parametrize(
    ("tiles", "chunks", "rule", "said"),
    [
        (1, 0, RULE, r"has 1 IMAGE/VIDEO placeholders but its 1 encoder inputs give 4 rows.*model\.vision"),
        (0, 2, RULE, r"has 2 AUDIO placeholders but its 2 encoder inputs give 6 rows.*model\.audio"),
        (0, 1, replace(RULE, num_query_tokens=0), r"1 AUDIO placeholders but model\.audio is null"),
        (2, 0, replace(RULE, pooled_side=0), r"2 IMAGE/VIDEO placeholders but model\.vision is null"),
    ],
)
def test_the_reader_refuses_placeholders_that_the_encoders_do_not_fill(tiles, chunks, rule, said):
    with pytest.raises(ValueError, match=said):
        collate([sample(9, tiles=tiles, chunks=chunks)], pad_id=0, rule=rule)
    without = replace(sample(9, chunks=chunks, tiles=tiles), tiles=None, chunks=None)
    with pytest.raises(ValueError, match="nothing for the encoder" if rule is RULE else "is null"):
        collate([without], pad_id=0, rule=rule)


def test_placeholders_that_the_encoders_fill_pass():
    one_row = replace(RULE, pooled_side=1, num_query_tokens=1)
    assert collate([sample(9, tiles=2, chunks=1)], pad_id=0, rule=one_row).pixel_values is not None
    assert collate([sample(9)], pad_id=0, rule=replace(RULE, pooled_side=0, num_query_tokens=0)).pixel_values is None
