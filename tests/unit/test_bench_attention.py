"""The benchmark of attention compares equal things: both contenders give the same outputs and gradients."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from benchmarks.bench_attention import CASES, LEAST_SAMPLE, main, sample_lengths
from benchmarks.masked_attention import masked, packing_mask
from megatron_omni.models.attention import CoreAttention
from megatron_omni.segments import packed


@pytest.mark.parametrize("rows", [[[5, 1, 6], [12]], [[12], [12]], [[3, 9]]])
def test_contenders_compute_the_same(rows: list[list[int]]) -> None:
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2)
    attention, segments = CoreAttention(config, 1).eval(), packed(rows, 12)
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, len(rows), heads, 8) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    grad = torch.randn(12, len(rows), 32, generator=generator, dtype=torch.float64)

    def results() -> list[torch.Tensor]:
        output = attention(*inputs, segments)
        return [output, *torch.autograd.grad(output, inputs, grad)]

    own = CoreAttention.forward
    with masked():
        assert CoreAttention.forward is not own
        expected = results()
    assert CoreAttention.forward is own
    assert (packing_mask(segments, len(rows)) is None) == all(len(row) == 1 for row in rows)
    for got, want in zip(results(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_lengths_fill_the_row() -> None:
    for seed in range(20):
        lengths = sample_lengths(4096, 10, least=LEAST_SAMPLE, generator=torch.Generator().manual_seed(seed))
        assert len(lengths) == 10 and sum(lengths) == 4096 and min(lengths) >= LEAST_SAMPLE


def test_an_unknown_case_is_named(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--json", str(tmp_path / "rows.json"), "--cases", "packed10_4096,other"])
    assert "--cases other: use some of " + ", ".join(CASES) in capsys.readouterr().err
