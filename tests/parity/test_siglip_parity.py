"""The vision encoder against transformers' SigLIP, and its full size against the specification."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from megatron_omni.checkpoint.names import siglip_rows
from megatron_omni.config.model import ModelConfig, VisionConfig
from megatron_omni.models.encoders.vision import VisionEncoder
from tests.parity.loading import load_rows

TINY = VisionConfig(
    image_size=30, patch_size=6, hidden_size=24, ffn_hidden_size=40, num_layers=3, num_attention_heads=3, pooled_side=2
)


def generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)


def siglip_config(config: VisionConfig, *, layers: int) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=config.num_attention_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )


def random_siglip(*, layers: int = 4) -> SiglipVisionModel:
    torch.manual_seed(0)
    model = SiglipVisionModel(siglip_config(TINY, layers=layers))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def load_siglip(ours: VisionEncoder, theirs: SiglipVisionModel) -> list[str]:
    return load_rows(ours, siglip_rows(TINY, prefix=""), theirs.state_dict(), prefix="vision.")


def test_tower_equals_the_hidden_states_before_the_last_layer() -> None:
    """Four layers in the checkpoint, three kept: hidden_states[-2] of the whole, no post-layernorm."""
    theirs, ours = random_siglip(), VisionEncoder(TINY, 16)
    used = load_siglip(ours, theirs)
    pixels = torch.randn(3, 3, 30, 30, generator=generator("pixels"))
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(ours.tower(pixels), expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 0.5
    assert len(used) == len(list(ours.tower.parameters()))


def test_gradients_equal_transformers() -> None:
    theirs, ours = random_siglip(layers=3), VisionEncoder(TINY, 16)
    load_siglip(ours, theirs)
    pixels = torch.randn(2, 3, 30, 30, generator=generator("pixels"))
    ours.tower(pixels).square().mean().backward()
    theirs(pixels, output_hidden_states=True).hidden_states[-1].square().mean().backward()
    expected = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in ours.tower.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4)
        compared += 1
    assert compared == 3 + 3 * 16


def test_pooling_before_the_second_matrix_is_the_papers_order() -> None:
    """Rows and every gradient, in float64, against the projector on every patch with the pooling after it. Odd grid (5 x 5
    to 2 x 2): cell (i, j) averages rows floor(5i/2)..ceil(5(i+1)/2); the cells overlap."""
    encoder = VisionEncoder(TINY, 16).double()
    encoder.draw_weights(generator)
    first, _, second = encoder.projector
    with torch.no_grad():  # drawn as zeros, which would hide what an average does to it
        second.bias.copy_(torch.randn(16, generator=generator("bias")))
    pixels = torch.randn(2, 3, 30, 30, generator=generator("pixels"), dtype=torch.float64)
    rows = F.linear(F.gelu(F.linear(encoder.tower(pixels), first.weight, first.bias)), second.weight, second.bias)
    grid = rows.view(2, 5, 5, 16)
    cells = [grid[:, a, b].mean(dim=(1, 2)) for a in (slice(0, 3), slice(2, 5)) for b in (slice(0, 3), slice(2, 5))]
    expected, got = torch.stack(cells, 1), encoder(pixels)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    weight = torch.randn(expected.shape, generator=generator("weight"), dtype=torch.float64)
    parameters = dict(encoder.named_parameters())
    wanted, grads = (torch.autograd.grad((x * weight).sum(), [*parameters.values()]) for x in (expected, got))
    for name, want, grad in zip(parameters, wanted, grads):
        torch.testing.assert_close(grad, want, atol=1e-12, rtol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_pooling_of_the_full_grid_is_the_adaptive_average_of_27_by_27() -> None:
    config = VisionConfig(
        image_size=54,
        patch_size=2,
        hidden_size=8,
        ffn_hidden_size=8,
        num_layers=1,
        num_attention_heads=1,
        pooled_side=12,
    )
    encoder = VisionEncoder(config, 4)
    encoder.draw_weights(generator)
    pixels = torch.randn(1, 3, 54, 54, generator=generator("pixels"))
    with torch.no_grad():
        grid = encoder.projector(encoder.tower(pixels)).view(27, 27, 4)  # the paper's order
        pooled = encoder(pixels).view(12, 12, 4)
        for row, col in ((0, 0), (5, 7), (11, 11)):
            (top, bottom), (left, right) = ((27 * i // 12, -(-27 * (i + 1) // 12)) for i in (row, col))
            torch.testing.assert_close(pooled[row, col], grid[top:bottom, left:right].mean(dim=(0, 1)))


def test_a_frozen_tower_costs_no_backward_and_the_projector_still_learns() -> None:
    encoder = VisionEncoder(TINY, 16)
    encoder.draw_weights(generator)
    pixels = torch.randn(1, 3, 30, 30, generator=generator("pixels"))
    encoder(pixels).square().sum().backward()
    with_tower = [p.grad.clone() for p in encoder.projector.parameters()]
    encoder.zero_grad()
    encoder.tower.requires_grad_(False)
    encoder(pixels).square().sum().backward()
    assert all(p.grad is None for p in encoder.tower.parameters())
    assert all(torch.equal(p.grad, q) for p, q in zip(encoder.projector.parameters(), with_tower))


def test_full_size_counts_398_million_parameters() -> None:
    """26 layers + post-layernorm = 397,747,744; the post-layernorm (2 x 1152) is carried, not computed with."""
    config = ModelConfig()
    with torch.device("meta"):
        encoder = VisionEncoder(config.vision, config.hidden_size)
    tower = sum(p.numel() for p in encoder.tower.parameters())
    assert tower + 2 * 1152 == 397_747_744
    assert sum(p.numel() for p in encoder.projector.parameters()) == 16_980_992


def test_drawn_weights_depend_on_the_name_alone() -> None:
    first, second = VisionEncoder(TINY, 16), VisionEncoder(TINY, 16)
    first.draw_weights(generator)
    torch.manual_seed(123)
    second.draw_weights(generator)
    assert all(p.equal(q) for p, q in zip(first.parameters(), second.parameters()))
    position = first.tower.embeddings.position_embedding.weight
    assert abs(position.std().item() * 24**0.5 - 1) < 0.15
    assert first.projector[0].bias.eq(0).all() and first.tower.encoder.layers[0].layer_norm1.weight.eq(1).all()


def test_convolutional_stem_is_strided_convolutions_and_gelu() -> None:
    """Patches of 8: three convolutions, 16 px to 2 x 2 positions of widths 12, 24, 24, in place of the patch matrix."""
    config = replace(TINY, image_size=16, patch_size=8, stem="conv")
    encoder = VisionEncoder(config, 16).double()
    encoder.draw_weights(generator)
    stem, pixels = encoder.tower.embeddings.patch_embedding, torch.randn(2, 3, 16, 16, dtype=torch.float64)
    kernels = [p for p in stem.parameters() if p.ndim == 4]
    assert [tuple(k.shape) for k in kernels] == [(12, 3, 3, 3), (24, 12, 3, 3), (24, 24, 3, 3)]
    expected = pixels
    for i, kernel in enumerate(kernels):
        expected = F.conv2d(F.gelu(expected) if i else expected, kernel, stride=2, padding=1)
    torch.testing.assert_close(stem(pixels), expected, atol=1e-12, rtol=0)
    rows = encoder(pixels)
    assert rows.shape == (2, 4, 16)
    rows.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stem.parameters())
    with pytest.raises(ValueError, match="no place for a convolutional stem"):
        siglip_rows(config)


def test_convolutional_stem_starts_with_a_gain_of_two() -> None:
    """Kernels N(0, 4 / fan-in)."""
    encoder = VisionEncoder(replace(TINY, image_size=64, patch_size=8, stem="conv", hidden_size=96), 16)
    encoder.draw_weights(generator)
    for kernel in encoder.tower.embeddings.patch_embedding.parameters():
        if kernel.ndim == 4:
            assert abs(kernel.std().item() * kernel[0].numel() ** 0.5 / 2 - 1) < 0.1  # 1,296 draws and more
        else:
            assert kernel.eq(0).all()
