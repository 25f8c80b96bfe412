"""OmniModel around a language model that only embeds and records: what is placed where, and who gets a gradient."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from megatron_omni.batch import IGNORE_LABEL, Modality, OmniBatch
from megatron_omni.config.model import AudioConfig, ModelConfig, VisionConfig
from megatron_omni.models.moe.context import RoutingStats
from megatron_omni.models.omni import OmniModel
from megatron_omni.segments import packed

T, P, V, A = Modality
WIDTH = 12
MODEL = ModelConfig(
    hidden_size=WIDTH,
    vision=VisionConfig(
        image_size=8, patch_size=2, hidden_size=8, ffn_hidden_size=8, num_layers=1, num_attention_heads=2, pooled_side=2
    ),
    audio=AudioConfig(
        num_mel_bins=6, chunk_seconds=0.2, hidden_size=8, ffn_hidden_size=8, num_encoder_layers=1, num_decoder_layers=1,
        num_attention_heads=2, num_query_tokens=3, max_target_positions=3,
    ),
)  # fmt: skip


class EmbeddingOnly(nn.Module):
    """Stands for the language model: returns what it was given and remembers the call."""

    def __init__(self, *, pre_process: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH)
        self.pre_process, self.post_process = pre_process, True
        self.share_embeddings_and_output_weights = False
        self.words = nn.Embedding(50, WIDTH)
        self.calls: list[dict] = []
        self.input_tensor: object = None

    def embed(self, input_ids: Tensor) -> Tensor:
        return self.words(input_ids).transpose(0, 1).contiguous()

    def set_input_tensor(self, input_tensor: object) -> None:
        self.input_tensor = input_tensor

    def tied_parameter(self) -> Tensor:
        return self.words.weight

    def forward(self, **inputs) -> Tensor:
        self.calls.append(inputs)
        return inputs["decoder_input"]


def omni(model: ModelConfig = MODEL, *, pre_process: bool = True, seed: int = 5) -> OmniModel:
    torch.manual_seed(0)
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return OmniModel(EmbeddingOnly(pre_process=pre_process), model, seed=seed, pg=SimpleNamespace(tp=alone, cp=alone))


def batch_of(modality: list[list[int]], *, tiles: int = 0, chunks: int = 0) -> OmniBatch:
    kinds = torch.tensor(modality)
    rows, length = kinds.shape
    generator = torch.Generator().manual_seed(1)
    grid = torch.arange(rows * length).view(rows, length)
    return OmniBatch.of(
        input_ids=torch.randint(0, 50, (rows, length), generator=generator),
        labels=torch.where(grid % 3 == 0, grid, IGNORE_LABEL),
        position_ids=torch.arange(length).expand(3, rows, -1),
        segment_ids=torch.where(grid % length == length - 1, -1, 0),
        sample_ids=torch.arange(rows)[:, None].expand(-1, length) + 100,
        sample_positions=torch.arange(length).expand(rows, -1),
        modality=kinds,
        source_ids=torch.zeros_like(grid),
        attention=packed([[length - 1]] * rows, length),
        pixel_values=torch.randn(tiles, 3, 8, 8, generator=generator) if tiles else None,
        audio_features=torch.randn(chunks, 6, 20, generator=generator) if chunks else None,
    )


def run(model: OmniModel, batch: OmniBatch) -> Tensor:
    return model(batch, step=3, stochastic=True, aux_loss_scale=0.25)


MIXED = batch_of(
    [[T, P, P, P, P, T, A, A, A, T, T, T, T, T, T, T], [V, V, V, V, A, A, A, T, P, P, P, P, A, A, A, T]],
    tiles=3,
    chunks=3,
)


def test_rows_go_to_placeholders_in_the_order_of_the_flattened_batch() -> None:
    model = omni()
    hidden = run(model, MIXED).transpose(0, 1)  # [B, S, H]
    tiles, chunks = model.vision(MIXED.pixel_values), model.audio(MIXED.audio_features)
    for got, expected in (
        (hidden[0, 1:5], tiles[0]),
        (hidden[1, 0:4], tiles[1]),
        (hidden[1, 8:12], tiles[2]),
        (hidden[0, 6:9], chunks[0]),
        (hidden[1, 4:7], chunks[1]),
        (hidden[1, 12:15], chunks[2]),
    ):
        torch.testing.assert_close(got, expected)
    text = MIXED.modality == T
    torch.testing.assert_close(hidden[text], model.language.words(MIXED.input_ids)[text])


def test_gradients_of_everything_equal_a_plain_assignment() -> None:
    weight = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(2))
    model = omni()
    (run(model, MIXED).transpose(0, 1) * weight).sum().backward()
    got = {n: p.grad for n, p in model.named_parameters()}

    reference = omni()
    words = reference.language.words(MIXED.input_ids)
    tiles = list(reference.vision(MIXED.pixel_values).flatten(0, 1))
    chunks = list(reference.audio(MIXED.audio_features).flatten(0, 1))
    total = torch.zeros(())
    for b in range(2):
        for s in range(16):
            kind = MIXED.modality[b, s]
            row = chunks.pop(0) if kind == A else tiles.pop(0) if kind in (P, V) else words[b, s]
            total = total + (row * weight[b, s]).sum()
    total.backward()
    for name, parameter in reference.named_parameters():
        if parameter.grad is None:
            assert got[name] is None
        else:
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-5, rtol=1e-5)
    placeholders = MIXED.input_ids[MIXED.modality != T].unique()
    only_placeholders = [int(i) for i in placeholders if i not in MIXED.input_ids[MIXED.modality == T]]
    assert only_placeholders and model.language.words.weight.grad[only_placeholders].eq(0).all()


@pytest.mark.parametrize(
    ("batch", "silent"),
    [
        (batch_of([[T, T, T, T]]), ("vision", "audio")),
        (batch_of([[P, P, P, P]], tiles=1), ("audio",)),
        (batch_of([[A, A, A, T]], chunks=1), ("vision",)),
    ],
)
def test_an_encoder_without_input_still_takes_part_with_zero_gradients(batch: OmniBatch, silent: tuple) -> None:
    model = omni()
    run(model, batch).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name == "audio.tower.embed_positions.weight":
            continue
        assert parameter.grad is not None, name
        if name.startswith(silent):
            assert parameter.grad.eq(0).all(), name
    for part in {"vision", "audio"} - set(silent):
        assert (
            model.get_submodule(part).projector.get_parameter("bias" if part == "audio" else "2.bias").grad.ne(0).all()
        )


def test_the_empty_input_does_not_change_the_result() -> None:
    batch = batch_of([[T, T, T, T]])
    model = omni()
    with torch.no_grad():
        without = run(model, batch)
    assert torch.equal(run(model, batch), without)


class Counted:
    """Counts forwards of the encoders."""

    def __init__(self, model: OmniModel) -> None:
        self.calls: list[str] = []
        for name in ("vision", "audio"):
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: self.calls.append(name))


def test_encoders_run_once_and_not_at_all_where_nothing_needs_them() -> None:
    text = batch_of([[T, T, T, T]])
    model = omni()
    counted = Counted(model)
    run(model, MIXED)
    assert counted.calls == ["vision", "audio"]
    with torch.no_grad():
        run(model, text)
    assert len(counted.calls) == 2
    model.vision.requires_grad_(False)
    run(model, text)
    assert counted.calls[2:] == ["audio"]


def test_a_frozen_encoder_builds_no_graph() -> None:
    model = omni()
    model.requires_grad_(False)
    assert not run(model, MIXED).requires_grad
    model.audio.projector.requires_grad_(True)
    run(model, MIXED).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "audio.projector.weight",
        "audio.projector.bias",
    ]


def test_token_facts_follow_the_order_of_hidden_states() -> None:
    model, stats = omni(), RoutingStats()
    model(MIXED, step=3, stochastic=True, aux_loss_scale=0.25, stats=stats)
    facts = model.language.calls[-1]["ctx"]
    for name in ("sample_ids", "sample_positions", "modality"):
        per_token = getattr(MIXED, name)
        assert getattr(facts, name).tolist() == [int(per_token[b, s]) for s in range(16) for b in range(2)]
    assert facts.padding.view(16, 2)[-1].all() and not facts.padding.view(16, 2)[:-1].any()
    assert facts.has_label.view(16, 2)[:, 0].tolist() == [s % 3 == 0 for s in range(16)]
    assert (facts.seed, facts.step, facts.stochastic, facts.aux_loss_scale) == (5, 3, True, 0.25)
    assert facts.stats is stats


def test_labels_and_logit_positions_reach_the_language_model() -> None:
    model, where = omni(), torch.tensor([2, 3])
    run(model, MIXED)
    assert model.language.calls[-1]["labels"] is MIXED.labels
    model(MIXED, step=0, stochastic=False, compute_loss=False, logits_positions=where)
    assert model.language.calls[-1]["labels"] is None and model.language.calls[-1]["logits_positions"] is where


def test_a_later_stage_has_no_encoders_and_embeds_nothing() -> None:
    model = omni(pre_process=False)
    run(model, MIXED)
    assert model.language.calls[-1]["decoder_input"] is None
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"language"}
    model.set_input_tensor("hidden states")
    assert model.language.input_tensor == "hidden states"
    assert model.shared_embedding_or_output_weight() is model.language.words.weight


def test_encoder_weights_follow_the_seed_alone() -> None:
    first = {n: p for n, p in omni().named_parameters() if not n.startswith("language")}
    torch.manual_seed(99)
    same, other = dict(omni().named_parameters()), dict(omni(seed=6).named_parameters())
    assert all(p.equal(same[n]) for n, p in first.items())
    assert not first["vision.projector.0.weight"].equal(other["vision.projector.0.weight"])
    assert not first["vision.tower.encoder.layers.0.self_attn.q_proj.weight"].equal(
        first["vision.tower.encoder.layers.0.self_attn.k_proj.weight"]
    )


def test_parts_can_be_told_apart_by_parameter_name() -> None:
    parts = {".".join(n.split(".")[:2]) for n, _ in omni().named_parameters() if not n.startswith("language")}
    assert parts == {"vision.tower", "vision.projector", "audio.tower", "audio.qformer", "audio.projector"}


def test_bf16_weights_take_fp32_inputs_and_stay_close() -> None:
    expected = run(omni(), MIXED)
    hidden = run(omni().bfloat16(), MIXED)
    assert hidden.dtype == torch.bfloat16
    error = (hidden.float() - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.02
