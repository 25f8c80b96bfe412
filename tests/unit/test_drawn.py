"""Pictures to be drawn in a micro-batch: where their blocks stand, which rows of the encoder are their sources', what is there."""

from dataclasses import replace

import pytest
import torch

from megatron_omni.data.collate import collate
from megatron_omni.data.sample import Sample
from megatron_omni.drawn import Drawn, DrawnPicture
from tests.unit.test_collate import sample


def picture(*offsets: int, **more) -> DrawnPicture:
    return DrawnPicture(offsets=torch.tensor(offsets), **more)


def drawing(length: int, *pictures: DrawnPicture, tiles: int = 0) -> Sample:
    return replace(sample(length, tiles=tiles), drawn=pictures)


def collated(*samples: Sample, **more) -> Drawn:
    drawn = collate(samples, pad_id=0, **more).drawn
    assert drawn is not None
    return drawn


def test_blocks_are_found_in_the_grid_of_hidden_states():
    """Two samples share a row, a third has its own and draws twice; each token's id is its place in its sample, from 1 on."""
    first, second = drawing(5), drawing(7, picture(4, 5))
    third = drawing(9, picture(2, 3, task="blur"), picture(6, 7))
    batch = collate([first, second, third], pad_id=0, sample_ids=[70, 71, 72], row_of=[0, 0, 1])
    drawn = batch.drawn
    assert drawn is not None and batch.num_images == len(drawn) == 3
    hidden = batch.input_ids.t().unsqueeze(-1)  # [S, B, 1]
    assert hidden.flatten(0, 1)[drawn.places].squeeze(-1).tolist() == [[5, 6], [3, 4], [7, 8]]
    owners = batch.sample_ids.t().flatten()[drawn.places]
    assert owners.tolist() == [[71, 71], [72, 72], [72, 72]]
    assert drawn.sample_ids.tolist() == [71, 72, 72] and drawn.numbers.tolist() == [0, 0, 1]
    assert drawn.tasks == ["", "blur", ""] and drawn.teachers is None and drawn.hidden is None


def test_sources_are_counted_in_the_rows_of_the_micro_batch():
    """Of three samples with 2, 0 and 3 placeholders the last is drawn from its second and third."""
    drawn = collated(drawing(6, tiles=2), drawing(6), drawing(8, picture(6, 7, vision_rows=(1, 3)), tiles=3))
    assert drawn.vision_rows == [(3, 5)] and drawn.wants_pixels
    kept = collated(drawing(8, picture(6, 7, vision_rows=(0, 3), vision=torch.ones(3, 4)), tiles=3))
    assert not kept.wants_pixels


def test_rows_of_teachers_are_padded_under_a_mask():
    short, long = torch.randn(2, 4), torch.randn(5, 4)
    drawn = collated(
        drawing(5, picture(1, 2, teachers={"task": torch.ones(1, 6), "caption": short})),
        drawing(5, picture(1, 2), picture(3, 4, teachers={"caption": long})),
    )
    assert drawn.teachers is not None and sorted(drawn.teachers) == ["caption", "caption_mask", "task", "task_mask"]
    assert drawn.teachers["task_mask"].tolist() == [[True, False, False], [False] * 3, [False] * 3]
    assert drawn.teachers["caption_mask"].sum(dim=1).tolist() == [2, 0, 5]
    assert torch.equal(drawn.teachers["caption"][0, :2], short) and torch.equal(drawn.teachers["caption"][2], long)
    assert not drawn.teachers["caption"][0, 2:].any() and not drawn.teachers["caption"][1].any()


def test_hidden_states_are_of_all_or_of_none():
    hidden = torch.randn(2, 8)
    both = collated(drawing(5, picture(1, 2, hidden=hidden)), drawing(5, picture(1, 2, hidden=-hidden)))
    assert both.hidden is not None and torch.equal(both.hidden, torch.stack([hidden, -hidden]))
    with pytest.raises(ValueError, match="1 of 2 drawn pictures have hidden states"):
        collated(drawing(5, picture(1, 2, hidden=hidden)), drawing(5, picture(1, 2)))
    with pytest.raises(ValueError, match="blocks of \\[1, 2\\] tokens"):
        collated(drawing(5, picture(1, 2)), drawing(5, picture(1)))
    with pytest.raises(ValueError, match="teachers' task: widths \\[3, 4\\]"):
        collated(*(drawing(5, picture(1, teachers={"task": torch.ones(1, width)})) for width in (3, 4)))


def test_what_fills_a_step_up_draws_nothing():
    filler = drawing(5, picture(1, 2)).without_labels()
    assert collate([filler], pad_id=0).drawn is None


def test_tensors_and_what_the_host_knows_are_everything():
    pixels = torch.ones(3, 4, 6, dtype=torch.uint8)
    first = picture(
        1, 2, target=pixels, source=pixels, vision_rows=(0, 1), task="edit", teachers={"visual": torch.ones(2, 3)}
    )
    drawn = collated(drawing(6, first, picture(4, 5, target=torch.zeros(4, 2, 2)), tiles=1))
    again = Drawn.of_tensors(
        drawn.tensors(), tasks=drawn.tasks, vision_rows=[rows or (-1, -1) for rows in drawn.vision_rows]
    )
    assert (again.tasks, again.vision_rows) == (drawn.tasks, drawn.vision_rows) == (["edit", ""], [(0, 1), None])
    for name in ("targets", "sources", "vision"):
        assert [None if t is None else t.tolist() for t in getattr(again, name)] == [
            None if t is None else t.tolist() for t in getattr(drawn, name)
        ]
    assert torch.equal(again.places, drawn.places) and again.teachers is not None and drawn.teachers is not None
    assert again.teachers.keys() == drawn.teachers.keys()
    assert drawn.to("meta").targets[0].is_meta  # type: ignore[union-attr]
