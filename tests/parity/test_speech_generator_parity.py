"""What imported generators compute, against the formulas in float64; and that equal experts are the dense model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_omni.checkpoint.convert import import_checkpoint
from megatron_omni.checkpoint.distributed import load_weights
from megatron_omni.checkpoint.families import open_sources
from megatron_omni.checkpoint.layout import Layout
from megatron_omni.checkpoint.uni_moe_speech import PREFIX
from megatron_omni.checkpoint.upcycle import upcycle
from megatron_omni.config.load import load_recipe
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.data.collate import collate
from megatron_omni.data.speech_sequence import speech_sample
from megatron_omni.models.build import build_model
from megatron_omni.parallel import groups
from megatron_omni.training.initial_weights import load_initial_weights
from tests.parity import foreign
from tests.parity.speech_reference import released_logits
from tests.unit.dense_checkpoints import write_tokenizer
from tests.unit.test_speech_conversion import CODES, HEADS, WORDS, tiny_shapes, write_generator

ROOT = Path(__file__).resolve().parents[2]
SAID: dict[str, list[int]] = {
    "prompt": [5, 0, WORDS - 1],
    "prefix": [3, 19, 0],
    "text": [0, 7, 7, 31],
    "codes": [4, 0, 19, 11, 2],
}


def ours(directory: Path, said: Mapping[str, list[int]]) -> Tensor:
    """[n + 1, C + 9] in fp32, as :func:`released_logits`; without dropout, jitter or sampled experts."""
    recipe = load_recipe(directory / "run_config.yaml")
    recipe.parallel = ParallelConfig()
    pg = groups.initialize(recipe.parallel)
    try:
        model = build_model(recipe, pg)
        load_weights(directory, model=model, pg=pg)
        model.eval()
        speech = recipe.model.speech
        assert speech is not None
        sample = speech_sample(speech.ids, **said)  # type: ignore[arg-type]
        batch = collate([sample], pad_id=speech.ids.padding, sample_ids=[0], row_of=None, multiple_of=1)
        with torch.no_grad():
            logits = model(batch, step=0, stochastic=False, compute_loss=False)
    finally:
        groups.destroy()
    return logits[0, -len(said["codes"]) - 1 :]


def imported(folder: Path, out: Path) -> Path:
    opened = open_sources(language=None, speech=folder)
    return import_checkpoint(
        opened.parts, Recipe(model=opened.model), out, wanted=opened.wanted, layout=Layout(), tokenizer=folder
    )


def bare(folder: Path) -> dict[str, Tensor]:
    tensors = torch.load(folder / "speech_gen_ep2.bin", weights_only=True)
    return {key.removeprefix(PREFIX): value for key, value in tensors.items()}


@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "first piece"])
@pytest.mark.parametrize(
    "of", [{}, {"experts": 0}, {"experts": 0, "own_table": True}], ids=["mixture", "dense", "predecessor"]
)
def test_logits_are_those_of_the_formulas(tmp_path: Path, of: dict[str, Any], prefix: bool) -> None:
    folder = write_tokenizer(write_generator(tmp_path / "theirs", **of))
    said = SAID if prefix else SAID | {"prefix": []}
    expected = released_logits(bare(folder), heads=HEADS, **said)
    found = ours(imported(folder, tmp_path / "ours"), said)
    assert found.shape == expected.shape == (len(SAID["codes"]) + 1, CODES + 9)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_causal_mask_would_not_be_near(tmp_path: Path) -> None:
    """The reference tells masks apart: text that changes behind a token reaches it."""
    folder = write_generator(tmp_path / "theirs", experts=0)
    weights = bare(folder)
    changed = {**SAID, "text": [*SAID["text"][:-1], 300]}
    first, other = (released_logits(weights, heads=HEADS, **said) for said in (SAID, changed))
    assert float((first - other).abs().max() / first.abs().max()) > 0.01
    assert tiny_shapes(experts=0).keys() == weights.keys()


def test_a_mixture_of_four_equal_generators_is_the_dense_one(tmp_path: Path) -> None:
    """Right after upcycling, whatever its drawn gate says: two weights that sum to one, of one and the same expert."""
    folder = write_tokenizer(write_generator(tmp_path / "theirs", experts=0))
    dense = ours(imported(folder, tmp_path / "ours"), SAID)
    paths = {f"expert{i + 1}": folder for i in range(4)}
    mixture = ours(upcycle(paths, tmp_path / "mixture", trunk="expert4"), SAID)
    assert float((mixture - dense).abs().max() / dense.abs().max()) < 1e-5


def test_a_run_starts_from_a_text_model_and_draws_what_is_new(tmp_path: Path) -> None:
    """With what ``recipes/8_speech_1.yaml`` allows to be missing, and nothing less."""
    foreign.qwen2(tmp_path / "qwen", tied=True)
    write_tokenizer(tmp_path / "qwen")
    table = torch.randn(WORDS, 24)
    (tmp_path / "vl").mkdir()
    save_file({"model.embed_tokens.weight": table}, tmp_path / "vl" / "model.safetensors")
    opened = open_sources(language=tmp_path / "qwen", text_table=tmp_path / "vl")
    recipe = Recipe(model=opened.model)
    start = import_checkpoint(
        opened.parts, recipe, tmp_path / "ours", wanted=opened.wanted, tokenizer=tmp_path / "qwen"
    )
    recipe.data.tokenizer = str(start / "tokenizer")
    recipe.init_allow_missing = load_recipe(ROOT / "recipes" / "8_speech_1.yaml").init_allow_missing
    pg = groups.initialize(recipe.parallel)
    try:
        drawn, model = build_model(recipe, pg), build_model(recipe, pg, drawn=False)
        told = load_initial_weights(model, recipe, start, pg=pg)
        theirs, fresh = dict(model.named_parameters()), dict(drawn.named_parameters())
        recipe.init_allow_missing = recipe.init_allow_missing[:-1]
        with pytest.raises(ValueError, match="text_projection"):
            load_initial_weights(model, recipe, start, pg=pg)
    finally:
        groups.destroy()
    new = ("language.embedding.", "language.output_layer.", "text_projection.")
    assert "5 tensors that it lacks keep their initial values" in told
    assert torch.equal(theirs["text_table.weight"], table)
    for name, parameter in theirs.items():
        assert torch.equal(parameter.float(), fresh[name].float()) == name.startswith(new), name
