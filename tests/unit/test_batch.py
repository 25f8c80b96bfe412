"""What follows from the tokens of a batch, against loops over its tokens."""

import torch

from megatron_omni.batch import IGNORE_LABEL, Modality, OmniBatch
from tests.attention import segments_of

TEXT, IMAGE, VIDEO, AUDIO = Modality
ROWS = [
    # (segment, modality, labelled); segment -1 is padding
    [(0, TEXT, False), (0, IMAGE, False), (0, TEXT, True), (1, TEXT, True), (1, TEXT, True), (2, AUDIO, False)],
    [(0, AUDIO, False), (0, VIDEO, False), (0, VIDEO, False), (0, TEXT, True), (-1, TEXT, False), (-1, TEXT, False)],
    [(-1, TEXT, False)] * 6,
]


def batch() -> OmniBatch:
    column = lambda i: torch.tensor([[int(token[i]) for token in row] for row in ROWS])  # noqa: E731
    zeros = torch.zeros(len(ROWS), len(ROWS[0]), dtype=torch.int64)
    return OmniBatch.of(
        input_ids=zeros,
        labels=torch.where(column(2) > 0, 7, IGNORE_LABEL),
        position_ids=zeros.expand(3, -1, -1),
        segment_ids=column(0),
        sample_ids=zeros,
        sample_positions=zeros,
        modality=column(1),
        source_ids=zeros,
        attention=segments_of(column(0)),
    )


def places(wanted, *, by_row: bool) -> list[int]:
    """Places in the flattened [S, B] grid of the tokens that are ``wanted``, row by row or ascending."""
    found = [s * len(ROWS) + b for b, row in enumerate(ROWS) for s, token in enumerate(row) if wanted(*token)]
    return found if by_row else sorted(found)


def test_places_are_those_of_the_flattened_grid_of_hidden_states() -> None:
    got = batch()
    assert got.picture_places.tolist() == places(lambda _, m, __: m in (IMAGE, VIDEO), by_row=True) == [3, 4, 7]
    assert got.sound_places.tolist() == places(lambda _, m, __: m == AUDIO, by_row=True) == [15, 1]
    assert got.label_places.tolist() == places(lambda _, __, labelled: labelled, by_row=False) == [6, 9, 10, 12]
    flat = got.labels.t().flatten()
    assert (flat[got.label_places] == 7).all() and int((flat == 7).sum()) == len(got.label_places)


def test_counts_are_known_on_the_host() -> None:
    got = batch()
    tokens = [token for row in ROWS for token in row]
    assert got.num_tokens == sum(segment >= 0 for segment, _, _ in tokens) == 10
    assert got.num_samples == 4 and got.num_label_tokens == 4


def test_a_modality_belongs_to_its_sample_not_to_its_row() -> None:
    for row, bits in zip(ROWS, batch().sample_modalities.tolist(), strict=True):
        for (segment, _, _), found in zip(row, bits, strict=True):
            media = {m for s, m, _ in row if s == segment and m != TEXT}
            expected = sum(1 << m for m in media or {TEXT})
            assert found == (0 if segment < 0 else expected)


def test_a_batch_moves_whole() -> None:
    moved = batch().to("meta")
    assert moved.num_tokens == 10 and moved.label_places.is_meta and moved.labels.is_meta and moved.pixel_values is None
