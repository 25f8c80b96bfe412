"""Conversion and training together: the whole model through a resharded run and back, bit for bit; the recorded loss."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_omni.checkpoint.convert import import_checkpoint
from megatron_omni.checkpoint.export import export_checkpoint, open_ours
from megatron_omni.checkpoint.families import FAMILIES, OpenedSources, open_sources
from megatron_omni.checkpoint.layout import Layout
from megatron_omni.checkpoint.ledger import recorded_loss
from megatron_omni.checkpoint.names import expand
from megatron_omni.checkpoint.sources import HuggingFaceSource
from megatron_omni.checkpoint.verify import compare, roundtrip
from megatron_omni.config.load import recipe_to_yaml
from megatron_omni.config.run import Recipe
from megatron_omni.training.setup import save
from tests.distributed.harness import Rank
from tests.distributed.tiny_run import make_corpus, prepare, run_ranks, run_tiny, tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
PP2 = {"parallel__pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def whole_model(directory: Path, recipe: Recipe) -> Path:
    """Random weights of ``recipe``'s model in the released layout."""
    directory.mkdir()
    family, generator = FAMILIES["uni_moe"], torch.Generator().manual_seed(8)
    assert family.config is not None and family.wants is not None
    shapes = {k: s for e in expand(family.rows(recipe.model, {})) for k, s in zip(e.theirs, e.shapes)}
    config = family.config(recipe.model, recipe.data, {}, "float32")
    unused = {k: s if "embed_tokens" not in k else (60, s[1]) for k, s in family.wants(recipe.model).items()}
    save_file(
        {k: 0.05 * torch.randn(s, generator=generator) for k, s in (shapes | unused).items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def imported(opened: OpenedSources, out: Path, layout: Layout) -> None:
    recipe = Recipe(model=opened.model)
    import_checkpoint(opened.parts, recipe, out, wanted=opened.wanted, layout=layout)


def save_again(rank: Rank, recipe: Recipe) -> str:
    """A run that loads the weights and saves them, with its optimizer, as its own checkpoint."""
    return str(save(prepare(rank, recipe)))


def test_whole_model_through_a_resharded_run_is_bitwise(tmp_path: Path, corpus: Path) -> None:
    """Hugging Face -> TP2 x EP2 on disk -> loaded and saved by a run at PP2 -> Hugging Face."""
    hf = whole_model(tmp_path / "hf", tiny_recipe(corpus, tmp_path / "run"))
    opened = open_sources(language=hf)
    assert opened.parts[0].family == "uni_moe"
    imported(opened, tmp_path / "ours", Layout(tp=2, ep=2))
    assert len(list((tmp_path / "ours").rglob("*.distcp"))) == 2
    recipe = tiny_recipe(corpus, tmp_path / "run", init_from=str(tmp_path / "ours"), **PP2)
    directory = Path(run_ranks(save_again, 2, recipe)[0])
    assert len(list(directory.glob("*.distcp"))) == 2
    back = export_checkpoint(open_ours(tmp_path / "run", like=tmp_path / "ours"), tmp_path / "back")
    assert compare(HuggingFaceSource(hf), HuggingFaceSource(back)) == len(opened.parts[0].source.infos())


def test_whole_model_at_expert_tensor_parallel_sizes(tmp_path: Path, corpus: Path) -> None:
    hf = whole_model(tmp_path / "hf", tiny_recipe(corpus, tmp_path / "run"))
    opened = open_sources(language=hf)
    for layout in (Layout(ep=4), Layout(tp=2, pp=2, ep=2, etp=2)):
        assert len(roundtrip(opened.parts, Recipe(model=opened.model), wanted=opened.wanted, layout=layout)) == 1


def test_a_run_logs_the_recorded_first_loss_beside_its_own(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Recorded on one rank, then started on another layout with routing noise on: the same loss to rounding."""
    hf = whole_model(tmp_path / "hf", tiny_recipe(corpus, tmp_path / "unused"))
    imported(open_sources(language=hf), tmp_path / "ours", Layout())
    recipe = tiny_recipe(corpus, tmp_path / "run", init_from=str(tmp_path / "ours"), train_iters=1)
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    assert run_ranks(record_rank, 1, tmp_path) == [0]
    recorded = recorded_loss(tmp_path / "ours" / "checkpoints" / "iter_0000000")
    assert recorded is not None and 3.0 < recorded < 9.0
    recipe = tiny_recipe(corpus, tmp_path / "run", init_from=str(tmp_path / "ours"), train_iters=2, **PP2)
    first, second = run_tiny(recipe, 2)
    assert first["recorded first-step loss"] == recorded
    assert abs(first["lm loss"] - recorded) < 1e-5 * recorded
    assert "recorded first-step loss" not in second
    assert re.search(
        rf"first step: lm loss .*; recorded with the checkpoint: {recorded:.6f}", "".join(capfd.readouterr())
    )


def record_rank(rank: Rank, place: Path) -> int:
    """``convert.py verify --record-loss`` starts a process group of its own: this rank has none."""
    main = runpy.run_path(str(ROOT / "tools" / "convert.py"))["main"]
    arguments = ["verify", str(place / "ours"), "--record-loss", str(place / "recipe.yaml"), "train_iters=1"]
    return main(arguments)
