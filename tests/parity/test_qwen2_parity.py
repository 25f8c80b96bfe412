"""The dense trunk computes what Hugging Face's Qwen2 computes: logits, loss, gradients, packing and cached decoding."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_omni.batch import IGNORE_LABEL, label_places
from megatron_omni.config.model import ModelConfig
from megatron_omni.config.optim import OptimConfig
from megatron_omni.config.run import Recipe
from megatron_omni.generation.cache import KVCache
from megatron_omni.generation.extents import Extent
from megatron_omni.generation.scheduler import Chunk
from megatron_omni.models.attention import kv_cache
from megatron_omni.models.build import build_language_model
from megatron_omni.models.language import LanguageModel
from megatron_omni.parallel import groups
from megatron_omni.segments import AttentionSegments, packed

VOCAB, LAYERS, HEADS, KV_GROUPS, HEAD_DIM, WIDTH, FFN = 250, 3, 4, 2, 16, 64, 96


@pytest.fixture(scope="module")
def pg() -> Iterator[ProcessGroupCollection]:
    yield groups.initialize(Recipe().parallel)
    groups.destroy()


def _recipe(**model: object) -> Recipe:
    sizes = {
        "num_layers": LAYERS, "hidden_size": WIDTH, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
        "num_query_groups": KV_GROUPS, "kv_channels": HEAD_DIM, "vocab_size": VOCAB, "make_vocab_size_divisible_by": 64,
        "mrope_section": [2, 3, 3], "moe": None, "vision": None, "audio": None,
    }  # fmt: skip
    return Recipe(model=ModelConfig(**(sizes | model)), optim=OptimConfig(precision="fp32"))


def _reference(*, tied: bool = False) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_GROUPS, head_dim=HEAD_DIM, max_position_embeddings=64, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0}, tie_word_embeddings=tied,
        initializer_range=0.2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _fused_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Megatron's order: for each group its queries, its key, its value."""
    parts = [t.unflatten(0, (KV_GROUPS, -1)) for t in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def _copy_weights(reference: Qwen2ForCausalLM, ours: LanguageModel) -> None:
    theirs = reference.state_dict()
    mapped = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "decoder.final_norm.weight": theirs["model.norm.weight"],
        "output_layer.weight": theirs["lm_head.weight"],
    }
    for i in range(LAYERS):
        hf, attention, ffn = f"model.layers.{i}.", f"decoder.layers.{2 * i}.", f"decoder.layers.{2 * i + 1}."
        mapped[attention + "input_layernorm.weight"] = theirs[hf + "input_layernorm.weight"]
        for kind in ("weight", "bias"):
            qkv = [theirs[f"{hf}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            mapped[f"{attention}self_attention.linear_qkv.{kind}"] = _fused_qkv(*qkv)
        mapped[attention + "self_attention.linear_proj.weight"] = theirs[hf + "self_attn.o_proj.weight"]
        mapped[ffn + "pre_mlp_layernorm.weight"] = theirs[hf + "post_attention_layernorm.weight"]
        gate_up = [theirs[f"{hf}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        mapped[ffn + "mlp.linear_fc1.weight"] = torch.cat(gate_up)
        mapped[ffn + "mlp.linear_fc2.weight"] = theirs[hf + "mlp.down_proj.weight"]
    parameters = dict(ours.named_parameters())
    if ours.share_embeddings_and_output_weights:
        del mapped["output_layer.weight"]
    assert set(parameters) == set(mapped)
    with torch.no_grad():
        for name, value in mapped.items():
            parameters[name][: value.shape[0]].copy_(value)


def _inputs(rows: int = 2, size: int = 24) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (rows, size), generator=torch.Generator().manual_seed(3))
    return {
        "input_ids": ids,
        "position_ids": torch.arange(size).expand(3, rows, size),
        "attention": packed([[size]] * rows, size),
    }


@pytest.mark.parametrize("tied", [False, True])
def test_logits_loss_and_gradients_equal_qwen2(pg: ProcessGroupCollection, tied: bool) -> None:
    reference = _reference(tied=tied)
    ours = build_language_model(_recipe(untie_embeddings_and_output_weights=not tied), pg)
    _copy_weights(reference, ours)
    inputs = _inputs()
    expected = reference(input_ids=inputs["input_ids"]).logits
    logits = ours(**inputs, ctx=None)
    assert logits.shape == expected.shape == (2, 24, VOCAB)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())

    labels = inputs["input_ids"].roll(-1, dims=1)
    labels[:, -1] = labels[0, :7] = IGNORE_LABEL
    per_token = ours(**inputs, ctx=None, labels=labels, label_places=label_places(labels))
    reference_loss = torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE_LABEL
    ).view_as(labels)
    torch.testing.assert_close(per_token, reference_loss, rtol=1e-5, atol=1e-5)
    per_token.sum().backward()
    reference_loss.sum().backward()
    ours_grad = ours.embedding.word_embeddings.weight.grad[:VOCAB]
    reference_grad = reference.model.embed_tokens.weight.grad
    torch.testing.assert_close(ours_grad, reference_grad, rtol=1e-4, atol=1e-5 * reference_grad.abs().max().item())
    assert ours.embedding.word_embeddings.weight.grad[VOCAB:].abs().max() == 0, "padding rows of the vocabulary move"


def test_packed_row_equals_its_samples_alone(pg: ProcessGroupCollection) -> None:
    ours = build_language_model(_recipe(), pg)
    ids = _inputs(rows=1)["input_ids"]
    alone = [ours(**_slice(ids[:, part]), ctx=None) for part in (slice(0, 9), slice(9, 24))]
    together = ours(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(9), torch.arange(15)]).expand(3, 1, 24),
        attention=packed([[9, 15]], 24),
        ctx=None,
    )
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=1e-5, atol=1e-6)


def _slice(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    size = ids.shape[1]
    return {
        "input_ids": ids,
        "position_ids": torch.arange(size).expand(3, 1, size),
        "attention": packed([[size]], size),
    }


def test_cached_decoding_equals_the_whole_sequence(pg: ProcessGroupCollection) -> None:
    """Two prompts of different length in one row, one of them in two parts, then a token of each and padding a step."""
    ours = build_language_model(_recipe(), pg).eval()
    ids, lengths = _inputs()["input_ids"], [12, 8]
    expected = ours(**_inputs(), ctx=None)
    cache = KVCache(128)
    extents = [Extent(32, 32), Extent(64, 32)]

    def compute(parts: list[tuple[int, int, int]]) -> None:
        """(row, start, length) of each part; every logit is compared."""
        chunks = [Chunk(row, start, length, extents[row], False) for row, start, length in parts]
        tokens = [(row, i) for row, start, length in parts for i in range(start, start + length)]
        padding = 4 - len(tokens) % 4
        rows, places = (torch.tensor([t[i] for t in tokens]) for i in (0, 1))
        cache.begin(chunks, places + 32 * (rows + 1))
        size = len(tokens) + padding
        with kv_cache(cache):
            logits = ours(
                input_ids=F.pad(ids[rows, places], (0, padding))[None],
                position_ids=F.pad(places, (0, padding)).expand(3, 1, size),
                attention=AttentionSegments((), size),  # the cache knows
                ctx=None,
            )
        torch.testing.assert_close(logits[0, : len(tokens)], expected[rows, places], rtol=1e-4, atol=1e-5)

    compute([(0, 0, 7)])
    compute([(1, 0, 8), (0, 7, 5)])
    for step in range(5):
        compute([(row, lengths[row] + step, 1) for row in (0, 1)])


def test_recompute_gives_the_same_gradients(pg: ProcessGroupCollection) -> None:
    gradients = []
    for recompute in ("none", "full"):
        recipe = _recipe()
        recipe.parallel.recompute = recompute
        ours = build_language_model(recipe, pg)
        # No gradient flows below the first layer then: replay must still reach its weights.
        ours.embedding.requires_grad_(False)
        labels = _inputs()["input_ids"]
        ours(**_inputs(), ctx=None, labels=labels, label_places=label_places(labels)).sum().backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters() if p.requires_grad})
    assert all(g is not None for g in gradients[1].values())
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name
