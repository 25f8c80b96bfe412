"""Rotary angles against their definition in float64 and against Qwen2-VL's own multimodal rotary embedding."""

from types import SimpleNamespace

import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

from megatron_omni.models.rope import rotary_angles

HEAD_DIM, BASE, SECTIONS = 128, 1_000_000.0, [16, 24, 24]


def _positions() -> torch.Tensor:
    """[3, 1, 5]: two text tokens, then an image row and a far text token."""
    return torch.tensor([[0, 1, 2, 2, 30_000], [0, 1, 2, 3, 30_000], [0, 1, 2, 4, 30_000]]).unsqueeze(1)


def test_angles_follow_the_definition_by_section() -> None:
    angles = rotary_angles(_positions(), head_dim=HEAD_DIM, base=BASE, sections=SECTIONS)
    assert angles.shape == (5, 1, 1, HEAD_DIM) and angles.dtype == torch.float32
    axis_of = [0] * 16 + [1] * 24 + [2] * 24
    for s in range(5):
        for i in range(HEAD_DIM // 2):
            expected = _positions()[axis_of[i], 0, s].item() * BASE ** (-2 * i / HEAD_DIM)
            for half in (i, i + HEAD_DIM // 2):
                assert abs(angles[s, 0, 0, half].item() - expected) <= 3e-7 * max(1.0, expected)


def test_cosines_and_sines_equal_qwen2_vl() -> None:
    positions = torch.randint(0, 500, (3, 2, 7), generator=torch.Generator().manual_seed(0))
    rope = {"rope_type": "default", "rope_theta": BASE, "mrope_section": SECTIONS}
    theirs = Qwen2VLRotaryEmbedding(
        SimpleNamespace(max_position_embeddings=512, rope_parameters=rope, head_dim=HEAD_DIM)
    )
    cosines, sines = theirs(torch.zeros(1), positions)
    ours = rotary_angles(positions, head_dim=HEAD_DIM, base=BASE, sections=SECTIONS).squeeze(2).transpose(0, 1)
    # Angles reach 500 rad, where one fp32 step is 3e-5.
    torch.testing.assert_close(ours.cos(), cosines, rtol=0, atol=5e-5)
    torch.testing.assert_close(ours.sin(), sines, rtol=0, atol=5e-5)


def test_text_gets_the_ordinary_rotary_embedding() -> None:
    text = torch.arange(9).expand(3, 1, 9)
    sectioned = rotary_angles(text, head_dim=HEAD_DIM, base=BASE, sections=SECTIONS)
    plain = rotary_angles(text, head_dim=HEAD_DIM, base=BASE, sections=[64, 0, 0])
    assert torch.equal(sectioned, plain)


def test_angles_stay_fp32_under_bf16_default() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        angles = rotary_angles(_positions(), head_dim=HEAD_DIM, base=BASE, sections=SECTIONS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert angles.dtype == torch.float32
    assert torch.equal(angles, rotary_angles(_positions(), head_dim=HEAD_DIM, base=BASE, sections=SECTIONS))
