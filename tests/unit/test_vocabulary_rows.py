"""Rows of new tokens are read out of the optimizer's state of a whole matrix: any part of them, and no byte beside them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_omni.checkpoint import torch_dist
from megatron_omni.checkpoint.torch_dist import TorchDistWriter
from megatron_omni.checkpoint.vocabulary_rows import RowsReader, in_whole_matrices

ROWS, WIDTH = 40, 6
IDS = [3, 17, 18, 19, 31]
STATE = "optimizer.state.exp_avg.language"


@pytest.mark.parametrize(
    ("matrix", "rows"),
    [
        ("embedding.word_embeddings.weight", "embedding.new_token_rows.weight"),
        ("output_layer.weight", "output_layer.new_token_rows.weight"),
    ],
)
def test_any_part_of_the_rows_is_read_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrix: str, rows: str
) -> None:
    whole = torch.randn(ROWS, WIDTH)
    writer = TorchDistWriter(tmp_path)
    # As two data-parallel ranks that meet in row 18, in its third column.
    for rank, (start, size) in enumerate([((0, 0), (18, 6)), ((18, 0), (1, 2)), ((18, 2), (1, 4)), ((19, 0), (21, 6))]):
        block = whole[start[0] : start[0] + size[0], start[1] : start[1] + size[1]]
        writer.write(f"{STATE}.{matrix}", block, shape=(ROWS, WIDTH), offsets=start, rank=rank)
    writer.write("weights", whole, shape=(ROWS, WIDTH), offsets=(0, 0), rank=0)
    writer.finish()
    reader, count, read_into = RowsReader(tmp_path, IDS), [], torch_dist.read_into

    def counted(file: Any, target: memoryview, *args: Any, **kwargs: Any) -> None:
        count.append(len(target))
        read_into(file, target, *args, **kwargs)

    monkeypatch.setattr(torch_dist, "read_into", counted)
    for first in range(len(IDS)):
        for last in range(first + 1, len(IDS) + 1):
            for start, end in [(0, WIDTH), (1, 4), (3, 4)] if last == first + 1 else [(0, WIDTH)]:
                count.clear()
                target = torch.full((last - first, end - start), torch.nan)
                reader.fill(f"{STATE}.{rows}", (first, start), target)
                assert torch.equal(target, whole[IDS[first:last], start:end])
                assert sum(count) == target.nbytes
    target = torch.empty(ROWS, WIDTH)
    reader.fill("weights", (0, 0), target)
    assert torch.equal(target, whole)


def test_state_of_the_rows_themselves_comes_first() -> None:
    rows, matrix = f"{STATE}.output_layer.new_token_rows.weight", f"{STATE}.output_layer.weight"
    stored: Any = dict.fromkeys([rows, matrix])
    assert in_whole_matrices(stored, rows) is None
    del stored[rows]
    assert in_whole_matrices(stored, rows) == matrix
    assert in_whole_matrices(stored, matrix) is None
    assert in_whole_matrices({}, rows) is None
