"""The speech generator computes what its formula says: Hugging Face's Qwen2 under the mask of the prefix for the dense one,
float64 with DeepSpeed's top-2 gate for the mixture.

The mask is written from the published training code: prompt, prefix and text see each other, codes see these and the codes
before them, a packed sequence's samples never each other.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from transformers import Qwen2Config, Qwen2Model

from megatron_omni.batch import IGNORE_LABEL, OmniBatch
from megatron_omni.checkpoint.names import expand
from megatron_omni.checkpoint.uni_moe_speech import speech_rows
from megatron_omni.config.model import ModelConfig
from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.parts import parts_of
from megatron_omni.config.run import Recipe
from megatron_omni.data.collate import collate
from megatron_omni.generation.cache import KVCache
from megatron_omni.generation.extents import Extent
from megatron_omni.generation.scheduler import Chunk
from megatron_omni.models.attention import kv_cache
from megatron_omni.models.build import build_model
from megatron_omni.models.language import LanguageModel
from megatron_omni.models.omni import OmniModel
from megatron_omni.models.parts import part_of
from megatron_omni.parallel import groups
from megatron_omni.segments import packed
from tests.distributed.tiny_speech import DENSE, MIXTURE, SPEECH, said, speech
from tests.parity.speech_reference import released_logits
from tests.unit.test_router import context

SIZES = [(3, 4, 5, 7), (2, 0, 4, 6), (1, 3, 1, 1)]
"""Tokens of prompt, prefix, text and codes."""
SAMPLES = [speech(*of) for of in SIZES]
CONDITIONS = [3 + 2 + 4 + 2 + 5 + 2, 2 + 2 + 4 + 2, 1 + 2 + 3 + 2 + 1 + 2]
"""Tokens before ``codes_start``: prompt, prefix and text with their marks."""


@pytest.fixture(scope="module")
def pg() -> Iterator[ProcessGroupCollection]:
    yield groups.initialize(Recipe().parallel)
    groups.destroy()


def built(config: ModelConfig, pg: ProcessGroupCollection) -> OmniModel:
    """With biases and norms that are not those of the start."""
    model = build_model(Recipe(model=config, optim=OptimConfig(precision="fp32")), pg)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def released(model: OmniModel, config: ModelConfig) -> dict[str, Tensor]:
    """The weights by the released keys."""
    ours = dict(model.named_parameters())
    for kind in ("1", "2"):  # as a checkpoint calls them
        ours |= {name.replace(f"weight{kind}", f"experts.linear_fc{kind}.weight"): p for name, p in ours.items()}
    theirs: dict[str, Tensor] = {}
    for entry in expand(speech_rows(config, {"prefix": ""})):
        tensor = ours[entry.ours].detach()
        tensor = tensor if entry.expert is None else tensor[entry.expert]
        theirs |= dict(zip(entry.theirs, entry.transform.to_theirs(tensor), strict=True))
    return theirs


def visible(lengths: list[tuple[int, int]], total: int) -> Tensor:
    """[S, S] bool for samples (condition, length) one behind the other."""
    mask = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for condition, length in lengths:
        query, key = torch.arange(length).unsqueeze(1), torch.arange(length)
        mask[start : start + length, start : start + length] = (key <= query) | (key < condition)
        start += length
    return mask


def embedded(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The sequence that the trunk gets."""
    rows = []
    for i in ids.tolist():
        if i >= SPEECH.ids.num_outputs:
            row = weights["qwenvl_embed_tokens.weight"][i - SPEECH.ids.num_outputs]
            rows.append(weights["in_fnn.weight"] @ row + weights["in_fnn.bias"])
        else:
            rows.append(weights["audio_embedding.weight"][i])
    return torch.stack(rows)


def scored(weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    return F.linear(hidden, weights["out_fnn.weight"], weights["out_fnn.bias"])


def by_qwen2(weights: dict[str, Tensor], ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """[S, C + 9] logits in the dtype of the weights."""
    config = Qwen2Config(
        vocab_size=1, hidden_size=DENSE.hidden_size, intermediate_size=DENSE.ffn_hidden_size,
        num_hidden_layers=DENSE.num_layers, num_attention_heads=DENSE.num_attention_heads,
        num_key_value_heads=DENSE.num_query_groups, head_dim=DENSE.kv_channels, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    qwen2 = Qwen2Model(config).to(ids.device, weights["norm.weight"].dtype).eval()
    left = qwen2.load_state_dict({k: v for k, v in weights.items() if k.startswith(("layers.", "norm."))}, strict=False)
    assert left.missing_keys == ["embed_tokens.weight"] and not left.unexpected_keys
    added = torch.zeros(mask.shape, dtype=qwen2.dtype).masked_fill(~mask, torch.finfo(qwen2.dtype).min)
    with torch.no_grad():
        hidden = qwen2(
            inputs_embeds=embedded(weights, ids)[None], attention_mask=added[None, None], position_ids=positions[None]
        ).last_hidden_state[0]
        return scored(weights, hidden)


def by_formula(weights: dict[str, Tensor]) -> Tensor:
    """The logits of the codes of every sample, one behind the other."""
    return torch.cat([released_logits(weights, heads=DENSE.num_attention_heads, **said(*of)) for of in SIZES])


def top_2_gates(logits: Tensor) -> Tensor:
    """[T, E] DeepSpeed's gate of two without noise and capacity: the softmax of the first and of the best of the others,
    divided by their sum."""
    gates = logits.softmax(1)
    first = F.one_hot(gates.argmax(1), gates.shape[1]).to(gates.dtype)
    second = F.one_hot(logits.masked_fill(first.bool(), -torch.inf).argmax(1), gates.shape[1]).to(gates.dtype)
    one, two = (gates * first).sum(1, keepdim=True), (gates * second).sum(1, keepdim=True)
    denominator = (one + two).clamp(min=torch.finfo(gates.dtype).eps)
    return first * one / denominator + second * two / denominator


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm())


def ours(model: OmniModel, batch: OmniBatch) -> Tensor:
    with torch.no_grad():
        return model(batch, step=0, stochastic=False, compute_loss=False)


def in_one_sequence() -> OmniBatch:
    return collate(SAMPLES, pad_id=SPEECH.ids.padding, row_of=[0] * len(SAMPLES))


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "mixture"])
def test_logits_of_a_packed_sequence_are_those_of_the_formula(pg: ProcessGroupCollection, moe: bool) -> None:
    """In fp32 against float64, the dense one to 1e-6 of Qwen2's; a causal mask is far off, and so is no bias."""
    config = MIXTURE if moe else DENSE
    model = built(config, pg)
    assert {part_of(name) for name, _ in model.named_parameters()} == parts_of(config)
    weights = {name: value.double() for name, value in released(model, config).items()}
    batch = in_one_sequence()
    ids, positions = batch.input_ids[0], batch.position_ids[0, 0]
    lengths = [(condition, sample.length) for condition, sample in zip(CONDITIONS, SAMPLES, strict=True)]
    places = batch.labels[0] != IGNORE_LABEL if moe else torch.ones(len(ids), dtype=torch.bool)
    right = by_formula(weights) if moe else by_qwen2(weights, ids, visible(lengths, len(ids)), positions)
    found = ours(model, batch)[0, places]
    assert found.shape == right.shape == (int(places.sum()), SPEECH.ids.num_outputs)
    assert error(found, right) < (3e-6 if moe else 1e-6)
    causal = replace(batch, attention=packed([[sample.length for sample in SAMPLES]], len(ids)))
    assert error(ours(model, causal)[0, places], right) > 0.1
    with torch.no_grad():
        model.language.output_layer.bias.zero_()
    assert error(ours(model, batch)[0, places], right) > 0.01


def test_the_gate_is_deepspeeds(pg: ProcessGroupCollection) -> None:
    """2,000 tokens: weights to 1e-6, two experts each, and never another number of them in evaluation."""
    model = built(MIXTURE, pg)
    router = model.language.decoder.layers[1].mlp.router
    hidden = torch.randn(2000, MIXTURE.hidden_size, generator=torch.Generator().manual_seed(0))
    right = top_2_gates((hidden @ router.weight.detach().t()).double())
    for stochastic in (False, True):
        routing = router(hidden, ctx=context(stochastic, len(hidden))).routing
        assert torch.equal(routing.mask, right > 0)
        torch.testing.assert_close((routing.weights * routing.scale).double(), right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "mixture"])
def test_a_sample_computes_alike_alone_and_packed(pg: ProcessGroupCollection, moe: bool) -> None:
    """Losses and the gradient of the projection; padding and neighbours do not matter."""
    model = built(MIXTURE if moe else DENSE, pg)

    def run(batches: list[OmniBatch]) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        grids = [(model(batch, step=0, stochastic=True), batch.labels) for batch in batches]
        losses = torch.cat([grid[labels != IGNORE_LABEL] for grid, labels in grids])
        losses.sum().backward()
        return losses.detach(), model.text_projection.weight.grad.clone()

    def alone(multiple_of: int) -> list[OmniBatch]:
        return [
            collate([s], pad_id=SPEECH.ids.padding, sample_ids=[i], multiple_of=multiple_of)
            for i, s in enumerate(SAMPLES)
        ]

    losses, gradient = run([in_one_sequence()])
    assert gradient.any() and model.text_table.weight.grad is None
    for batches in (alone(1), alone(16)):
        theirs, their_gradient = run(batches)
        torch.testing.assert_close(theirs, losses, rtol=1e-5, atol=1e-6)
        assert error(their_gradient, gradient) < 1e-5


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "mixture"])
def test_cached_decoding_computes_the_same_codes(pg: ProcessGroupCollection, moe: bool) -> None:
    """The condition and the start of the codes at once, then code by code: the logits of the whole, bias included."""
    model = built(MIXTURE if moe else DENSE, pg).eval()
    sample, condition = SAMPLES[0], CONDITIONS[0]
    whole = ours(model, collate([sample], pad_id=0))[0, condition:]
    cache, pieces = KVCache(64), []
    for start, end in pairwise([0, *range(condition + 1, sample.length + 1)]):
        part = slice(start, end)
        piece = replace(
            sample,
            input_ids=sample.input_ids[part],
            labels=sample.labels[part],
            position_ids=sample.position_ids[:, part],
            modality=sample.modality[part],
            attention=None,
        )
        chunk = Chunk(0, start, end - start, Extent(0, 64), ends=True, whole=condition if start == 0 else 0)
        cache.begin([chunk], torch.arange(start, end))
        with kv_cache(cache):
            pieces.append(ours(model, collate([piece], pad_id=0))[0, -1:])
    assert error(torch.cat(pieces), whole) < 1e-5


def test_loss_in_chunks_has_the_gradient_of_the_bias(
    pg: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(DENSE, pg)

    def gradient() -> Tensor:
        model.zero_grad()
        model(in_one_sequence(), step=0, stochastic=False).sum().backward()
        return model.language.output_layer.bias.grad.clone()

    whole = gradient()
    monkeypatch.setattr(LanguageModel, "logits_chunk", 3 * 48)
    assert error(gradient(), whole) < 1e-6 and whole.any()
    assert not whole[SPEECH.ids.num_outputs :].any(), "padding columns got a gradient"
