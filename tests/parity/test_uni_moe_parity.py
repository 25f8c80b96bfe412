"""The whole Uni-MoE there and back, and upcycling where it keeps the function.

A tiny mixture (4 routed, 1 null, 2 shared experts, both encoders) is made by upcycling random dense models, written in the
released layout, and imported again: the same tensors bit for bit, and the same logits on every layout.
"""

import json
import pickle
import queue
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from transformers import AutoModelForCausalLM

from megatron_omni.checkpoint.commit import CheckpointError, find, write_manifest
from megatron_omni.checkpoint.convert import import_checkpoint
from megatron_omni.checkpoint.distributed import load_weights, sharding_metadata
from megatron_omni.checkpoint.export import export_checkpoint, open_ours
from megatron_omni.checkpoint.families import open_language
from megatron_omni.checkpoint.layout import Layout
from megatron_omni.checkpoint.names import expand
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.checkpoint.uni_moe import uni_moe_rows, unused_shapes
from megatron_omni.checkpoint.untrusted import read_metadata
from megatron_omni.checkpoint.upcycle import upcycle
from megatron_omni.config.load import load_recipe
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.models.build import build_model
from megatron_omni.parallel import groups
from megatron_omni.parallel.schedule import run_step
from tests.distributed.harness import Rank, RankFailure, run_ranks
from tests.distributed.test_omni_layouts import MODEL as TINY_OMNI
from tests.distributed.test_omni_layouts import batch_of
from tests.unit.dense_checkpoints import FIRST_NEW, MODEL, WHISPER_TABLE, omni, tensors_of, write_dense

BOUND = 1e-5
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one rank": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "TP2xPP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}


def logits_of(rank: Rank, directory: str, sizes: dict[str, int], batch: str) -> Any:
    """Logits of the mixed batch in evaluation mode; None on earlier stages."""
    recipe = load_recipe(Path(directory) / "run_config.yaml")
    recipe.parallel = ParallelConfig(**sizes)
    pg = rank.initialize(recipe.parallel)
    model = build_model(recipe, pg)
    load_weights(Path(directory), model=model, pg=pg)
    model.eval()

    def forward(given: Any, model: Any) -> Any:
        logits = model(given, step=0, stochastic=False, compute_loss=False)
        return logits, lambda logits: (logits.sum(), logits)

    reports = run_step(forward, [batch_of(batch)], model, pg=pg, recipe=recipe, forward_only=True)
    return reports[0].numpy() if groups.place_in(pg).is_last_stage else None


@cache
def logits(directory: Path, layout: str = "one rank", batch: str = "mixed") -> torch.Tensor:
    world, sizes = LAYOUTS[layout]
    answers = [a for a in run_ranks(logits_of, world, str(directory), sizes, batch) if a is not None]
    assert all((a == answers[0]).all() for a in answers), "ranks disagree"
    return torch.from_numpy(answers[0])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def tensors_of_ours(directory: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(directory)
    return {key: reader.read(key) for key in reader.tensors}


# ------------------------------------------------------------------------------------------------ there and back


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mixture, as a checkpoint of ours."""
    root = tmp_path_factory.mktemp("original")
    dense = omni(MODEL, TINY_OMNI)
    base = write_dense(root / "base", dense)
    paths = {name: write_dense(root / name, dense, seed=i, like=base) for i, name in ((1, "vision"), (2, "speech1"))}
    return upcycle({**paths, "speech2": write_dense(root / "s2", dense, seed=3, like=base), "base": base}, root / "out")


@pytest.fixture(scope="module")
def exported(original: Path) -> Path:
    return export_checkpoint(open_ours(original), original.parents[1] / "hf")


@pytest.fixture(scope="module")
def imported(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written for TP2 x EP2."""
    model, part = open_language(exported)
    out = tmp_path_factory.mktemp("imported")
    return import_checkpoint(
        [part], Recipe(model=model), out, wanted=part.rows, layout=Layout(tp=2, ep=2), tokenizer=exported
    )


def test_the_exported_directory_is_whole(original: Path, exported: Path) -> None:
    model = open_ours(original).recipe.model
    expected = {k: tuple(s) for e in expand(uni_moe_rows(model)) for k, s in zip(e.theirs, e.shapes)}
    expected |= unused_shapes(model, whisper_vocabulary=WHISPER_TABLE)
    assert {key: tuple(value.shape) for key, value in tensors_of(exported).items()} == expected
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "grin_qwen2_vl_out" and config["audio_token_id"] == FIRST_NEW + 2
    names = {path.name for path in exported.iterdir()}
    assert names >= {"preprocessor_config.json", "chat_template.json", "tokenizer.json", "conversion.json"}


def test_import_of_the_export_is_the_original(original: Path, imported: Path) -> None:
    ours, back = tensors_of_ours(original), tensors_of_ours(imported)
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[key], back[key]) for key in ours)
    before, after = open_ours(original).recipe.model, open_ours(imported).recipe.model
    assert before == after


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_the_import_equal_the_original(original: Path, imported: Path, layout: str) -> None:
    expected = logits(original)
    assert expected.std() > 0.3
    found = logits(imported, layout)
    assert torch.equal(found, expected) if layout == "one rank" else relative_error(found, expected) < BOUND


def save_weights(rank: Rank, directory: str, sizes: dict[str, int], out: str) -> None:
    """Load at one layout, save at another."""
    recipe = load_recipe(Path(directory) / "run_config.yaml")
    recipe.parallel = ParallelConfig(**sizes)
    pg = rank.initialize(recipe.parallel)
    model = build_model(recipe, pg)
    load_weights(Path(directory), model=model, pg=pg)
    state = {"model": model.sharded_state_dict(prefix="", metadata=sharding_metadata(pg))}
    filesystem_async._results_queue = queue.Queue()  # instead of a helper process, which a rank here may not start
    dist_checkpointing.save(state, out)


def test_through_another_layout_every_tensor_is_the_same(imported: Path, exported: Path, tmp_path: Path) -> None:
    """Hugging Face -> TP2 x EP2 -> loaded and saved by a PP2 run -> Hugging Face."""
    resharded = tmp_path / "resharded"
    resharded.mkdir()
    run_ranks(
        save_weights, 2, str(imported), {"pipeline_model_parallel_size": 2}, str(resharded), timeout_seconds=120.0
    )
    shutil.copyfile(imported / "run_config.yaml", resharded / "run_config.yaml")
    shutil.copytree(imported / "tokenizer", resharded / "tokenizer")
    write_manifest(resharded)
    back = tensors_of(export_checkpoint(open_ours(resharded, like=imported), tmp_path / "back"))
    before = tensors_of(exported)
    assert back.keys() == before.keys()
    for key, value in before.items():
        assert back[key].dtype == value.dtype and torch.equal(back[key], value), key


class Payload:
    """Unpickling this creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_checkpoint_that_was_made_to_run_code_is_refused_by_every_reader(imported: Path, tmp_path: Path) -> None:
    """Its manifest is right: whoever makes such a file computes the hashes again."""
    evil, marker = tmp_path / "iter_0000000", tmp_path / "ran"
    shutil.copytree(imported, evil)
    metadata = read_metadata(evil / ".metadata")
    metadata.planner_data = Payload(marker)
    (evil / ".metadata").write_bytes(pickle.dumps(metadata))
    write_manifest(evil)
    assert find(evil) == evil
    with pytest.raises(RankFailure, match=r"CheckpointError: .*\.metadata: refused"):
        logits(evil)
    with pytest.raises(CheckpointError, match="refused"):
        open_ours(evil)
    assert not marker.exists()
    pickle.loads((evil / ".metadata").read_bytes())
    assert marker.exists(), "the payload is a dud"


# ------------------------------------------------------------------------------------------------ upcycling


PRESERVING = ["model.moe.num_null_experts=0", "model.moe.num_shared_experts=0"]


@cache
def dense_logits(directory: Path) -> torch.Tensor:
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return theirs(input_ids=batch_of("text").input_ids[:1]).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(tmp_path_factory.mktemp("base"), std=0.15)


def from_one(base: Path, out: Path, overrides: list[str]) -> Path:
    """Every routed expert is the base's feed-forward part."""
    paths = {"vision": base, "speech1": base, "speech2": base, "base": base}
    return upcycle(paths, out, overrides=overrides, token_rows="keep")


@pytest.mark.parametrize(("top_p", "layouts"), [(1.0, tuple(LAYOUTS)), (0.7, ("one rank",))])
def test_without_null_and_shared_experts_the_dense_model_is_reproduced(
    base: Path, tmp_path: Path, top_p: float, layouts: tuple[str, ...]
) -> None:
    """Routed weights are a softmax over the selection, so they sum to 1 whatever was selected."""
    made = from_one(base, tmp_path / "out", [*PRESERVING, f"model.moe.top_p={top_p}"])
    expected = dense_logits(base)
    assert expected.std() > 0.3
    for layout in layouts:
        assert relative_error(logits(made, layout, "text")[:1], expected) < BOUND, layout


def test_the_default_setting_does_not_preserve_the_function(base: Path, tmp_path: Path) -> None:
    """What docs/upcycling.md says of the default: null and shared experts take part of the weight."""
    made = from_one(base, tmp_path / "out", [])
    expected = dense_logits(base)
    found = logits(made, "one rank", "text")[:1]
    distance = float((found - expected).norm() / expected.norm())
    print(f"relative difference of the logits at the default setting: {distance:.3f}")
    assert 0.1 < distance < 0.4
