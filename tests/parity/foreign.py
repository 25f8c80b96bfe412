"""Random tiny Hugging Face directories, and what a converted checkpoint computes on any layout."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from megatron_omni.batch import OmniBatch
from megatron_omni.checkpoint.distributed import load_weights
from megatron_omni.config.load import load_recipe
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.models.build import build_model
from megatron_omni.parallel import groups
from megatron_omni.parallel.schedule import run_step
from megatron_omni.segments import packed
from tests.distributed.harness import Rank

VOCAB = 310
IDS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))


def randomized(model: torch.nn.Module, *, seed: int = 0) -> Any:
    """Every parameter N(0, 0.15), norms around 1: nothing is zero, nothing is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = 0.15 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(value + 1 if "norm" in name and name.endswith("weight") else value)
    return model.eval()


def qwen2(directory: Path, *, tied: bool = False, heads: int = 14, groups_: int = 2, **save: Any) -> Qwen2ForCausalLM:
    """Seven queries a group, as in the 7B."""
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=112, intermediate_size=96, num_hidden_layers=4, num_attention_heads=heads,
        num_key_value_heads=groups_, head_dim=8, max_position_embeddings=64, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )  # fmt: skip
    model = randomized(Qwen2ForCausalLM(config)).to(save.pop("dtype", torch.float32))
    model.save_pretrained(directory, **save)
    return model


def siglip(directory: Path) -> SiglipVisionModel:
    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=30, patch_size=6
    )
    model = randomized(SiglipVisionModel(config), seed=1)
    model.save_pretrained(directory)
    return model


def whisper(directory: Path) -> WhisperForConditionalGeneration:
    config = WhisperConfig(
        vocab_size=60, num_mel_bins=8, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=40, decoder_ffn_dim=40, max_source_positions=30,
        max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = randomized(WhisperForConditionalGeneration(config), seed=2)
    model.save_pretrained(directory)
    return model


def text_batch() -> OmniBatch:
    rows, size = IDS.shape
    zeros = torch.zeros_like(IDS)
    positions = torch.arange(size).expand(rows, size)
    return OmniBatch.of(
        input_ids=IDS, labels=IDS, position_ids=positions.expand(3, rows, size), segment_ids=zeros,
        sample_ids=zeros + torch.arange(rows)[:, None], sample_positions=positions, modality=zeros, source_ids=zeros,
        attention=packed([[size]] * rows, size),
    )  # fmt: skip


def computed(
    rank: Rank | None, directory: str, sizes: dict[str, int], inputs: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """``logits`` on the last stage; ``vision``, ``frames`` and ``queries`` where the encoders are; of eval mode."""
    recipe = load_recipe(Path(directory) / "run_config.yaml")
    recipe.parallel = ParallelConfig(**sizes)
    pg = groups.initialize(recipe.parallel) if rank is None else rank.initialize(recipe.parallel)
    layout = groups.place_in(pg)
    model = build_model(recipe, pg)
    load_weights(Path(directory), model=model, pg=pg)
    model.eval()
    found: dict[str, Any] = {}

    def forward(batch: OmniBatch, model: Any) -> Any:
        logits = model(batch, step=0, stochastic=False, compute_loss=False)
        return logits, lambda logits: (logits.sum(), logits)

    reports = run_step(forward, [text_batch()], model, pg=pg, recipe=recipe, forward_only=True)
    if layout.is_last_stage:
        found["logits"] = reports[0].numpy()
    with torch.no_grad():
        if model.vision is not None and "pixels" in inputs:
            found["vision"] = model.vision.tower(inputs["pixels"]).numpy()
        if model.audio is not None and "sound" in inputs:
            frames = model.audio._encode(inputs["sound"])
            found |= {"frames": frames.numpy(), "queries": model.audio.qformer(frames).numpy()}
            found["query_tokens"] = model.audio.qformer.query_tokens.numpy()
    if rank is None:
        groups.destroy()
    return found


def relative_error(found: Any, expected: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    expected = expected.detach()
    return float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
