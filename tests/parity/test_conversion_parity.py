"""Converted checkpoints compute what transformers computes, on every layout, and what is exported loads there again."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_omni.checkpoint.convert import import_checkpoint
from megatron_omni.checkpoint.export import export_checkpoint, open_ours
from megatron_omni.checkpoint.families import open_sources
from megatron_omni.checkpoint.layout import Layout
from megatron_omni.checkpoint.upcycle import upcycle
from megatron_omni.config.run import Recipe
from tests.distributed.harness import run_ranks
from tests.parity import foreign
from tests.parity.foreign import IDS, relative_error
from tests.unit.dense_checkpoints import write_tokenizer

LAYOUTS = {
    "TP2": ({"tensor_model_parallel_size": 2}, 2),
    "PP2": ({"pipeline_model_parallel_size": 2}, 2),
    "TP2xPP2": ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 4),
}
BOUND = 1e-5


def converted(
    out: Path, layout: Layout | None = None, *, tokenizer: Path | None = None, **sources: Path | int | None
) -> str:
    opened = open_sources(**sources)  # type: ignore[arg-type]
    recipe = Recipe(model=opened.model)
    return str(import_checkpoint(opened.parts, recipe, out, wanted=opened.wanted, layout=layout, tokenizer=tokenizer))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_text_logits_equal_transformers_on_every_layout(tmp_path: Path, tied: bool) -> None:
    theirs = foreign.qwen2(tmp_path / "hf", tied=tied)
    directory = converted(tmp_path / "ours", language=tmp_path / "hf")
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
    assert expected.std() > 0.5
    assert relative_error(foreign.computed(None, directory, {}, {})["logits"], expected) < BOUND
    for sizes, world in LAYOUTS.values():
        answers = [a["logits"] for a in run_ranks(foreign.computed, world, directory, sizes, {}) if "logits" in a]
        assert len(answers) == sizes.get("tensor_model_parallel_size", 1)
        assert all(relative_error(answer, expected) < BOUND for answer in answers)


def test_many_groups_and_another_layout_on_disk(tmp_path: Path) -> None:
    """Plain multi-head attention; written for TP2 x PP2, read on one rank and on two."""
    theirs = foreign.qwen2(tmp_path / "hf", heads=14, groups_=14)
    directory = converted(tmp_path / "ours", Layout(tp=2, pp=2), language=tmp_path / "hf")
    assert len(list(Path(directory).glob("*.distcp"))) == 4
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
    assert relative_error(foreign.computed(None, directory, {}, {})["logits"], expected) < BOUND
    sizes, world = LAYOUTS["PP2"]
    answer = run_ranks(foreign.computed, world, directory, sizes, {})[1]["logits"]
    assert relative_error(answer, expected) < BOUND


def test_encoders_equal_transformers_on_every_layout(tmp_path: Path) -> None:
    """SigLIP without its last layer, Whisper's encoder, and its decoder over given query vectors.

    Expert parallelism is for models with experts, so EP2 runs the same towers in a mixture that was upcycled from them.
    """
    foreign.qwen2(tmp_path / "text")
    eyes, ears = foreign.siglip(tmp_path / "vision"), foreign.whisper(tmp_path / "audio")
    directory = converted(
        tmp_path / "ours", language=tmp_path / "text", vision=tmp_path / "vision", audio=tmp_path / "audio", draw_seed=7,
        tokenizer=write_tokenizer(tmp_path / "tokenizer"),
    )  # fmt: skip
    mixture = upcycle({"vision": tmp_path / "ours", "base": tmp_path / "ours"}, tmp_path / "mixture")
    noise = torch.Generator().manual_seed(5)
    inputs = {
        "pixels": torch.randn(2, 3, 30, 30, generator=noise),
        "sound": torch.randn(2, 8, 60, generator=noise),
    }
    answers = [foreign.computed(None, directory, {}, inputs)]
    for sizes, world in LAYOUTS.values():
        ranks = [a for a in run_ranks(foreign.computed, world, directory, sizes, inputs) if "vision" in a]
        assert len(ranks) == sizes.get("tensor_model_parallel_size", 1), "encoders are on the first stage"
        answers += ranks
    answers += run_ranks(foreign.computed, 2, str(mixture), {"expert_model_parallel_size": 2}, inputs)
    assert len(answers) == 1 + 2 + 1 + 2 + 2
    with torch.no_grad():
        seen = eyes(inputs["pixels"], output_hidden_states=True).hidden_states[-2]
        frames = ears.model.encoder(inputs["sound"]).last_hidden_state
        for answer in answers:
            queries = torch.from_numpy(answer["query_tokens"]).expand(2, -1, -1)
            decoded = ears.model.decoder(inputs_embeds=queries, encoder_hidden_states=frames).last_hidden_state
            assert relative_error(answer["vision"], seen) < BOUND
            assert relative_error(answer["frames"], frames) < BOUND
            assert relative_error(answer["queries"], decoded) < BOUND


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_exported_directory_generates_the_same_tokens(tmp_path: Path, tied: bool) -> None:
    theirs = foreign.qwen2(tmp_path / "hf", tied=tied)
    converted(tmp_path / "ours", Layout(tp=2), language=tmp_path / "hf")
    out = export_checkpoint(open_ours(tmp_path / "ours"), tmp_path / "back")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    wanted = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    assert torch.equal(loaded.generate(IDS, **wanted), theirs.generate(IDS, **wanted))


def test_config_made_from_our_model_alone_loads(tmp_path: Path) -> None:
    """Without the source's own config.json (a model trained here from the start)."""
    theirs = foreign.qwen2(tmp_path / "hf")
    converted(tmp_path / "ours", language=tmp_path / "hf")
    opened = open_ours(tmp_path / "ours")
    opened.documents = None
    loaded = AutoModelForCausalLM.from_pretrained(export_checkpoint(opened, tmp_path / "back"))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
