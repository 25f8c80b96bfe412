"""Batches: padding, masks, identities, and media joined in the order of their placeholders."""

import pytest
import torch

from megatron_omni.batch import IGNORE_LABEL, Modality
from megatron_omni.data.collate import collate
from megatron_omni.data.sample import Sample


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
    assert {tensor.dtype for name, tensor in vars(batch).items() if tensor is not None} == {torch.int64}


def test_media_follow_the_rows():
    batch = collate(
        [sample(9, tiles=2, value=1.0), sample(9, chunks=1, value=2.0), sample(9, tiles=1, chunks=2, value=3.0)],
        pad_id=0,
    )
    assert batch.pixel_values is not None and batch.audio_features is not None
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [1.0, 1.0, 3.0]
    assert batch.audio_features[:, 0, 0].tolist() == [2.0, 3.0, 3.0]
    rows = (batch.modality == Modality.IMAGE).nonzero()[:, 0].tolist()
    assert rows == [0, 0, 2]


@pytest.mark.parametrize(("lengths", "multiple", "expected"), [([8, 3], 8, 8), ([9], 8, 16), ([3], 1, 3), ([5], 6, 6)])
def test_the_length_is_the_longest_row_rounded_up(lengths, multiple, expected):
    assert collate([sample(n) for n in lengths], pad_id=0, multiple_of=multiple).input_ids.shape[1] == expected


def test_nothing_to_collate_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        collate([], pad_id=0)
