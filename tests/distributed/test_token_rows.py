"""Rows of new tokens in frozen vocabulary matrices, as a parameter of their own, against the definition: the whole matrix is
trained and its gradient masked to these rows. Earlier versions did it so: the definition's checkpoints are theirs, and a
resume goes on from them.
"""

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_omni.checkpoint.commit import iteration_dir, write_manifest
from megatron_omni.checkpoint.shards import boxes
from megatron_omni.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from megatron_omni.checkpoint.untrusted import read_metadata
from megatron_omni.config.parts import frozen_matrices
from megatron_omni.config.run import Recipe
from megatron_omni.models.omni import OmniModel
from megatron_omni.models.parts import apply_freeze, part_of
from megatron_omni.parallel import groups
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.training import optimizer, setup
from megatron_omni.training.loop import train
from tests.distributed.harness import Rank
from tests.distributed.tiny_run import PP, TP, make_corpus, prepare, records, run_ranks, tiny_recipe

EMBEDDING, OUTPUT = "language.embedding.word_embeddings.weight", "language.output_layer.weight"
HOLDERS = {EMBEDDING: "language.embedding", OUTPUT: "language.output_layer"}
TIED = {"model__untie_embeddings_and_output_weights": False}
BF16 = {"optim__precision": "bf16"}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "fp32": (1, {}, {}, {}),
    "tied-bf16-plain-adam": (2, TIED | BF16 | {"optim__use_distributed_optimizer": False}, {}, PP),
    "dp2-bf16": (2, BF16, {}, TP),
    "tp2-bf16": (2, BF16, TP, {}),
    "tied-pp2": (2, TIED, PP, {}),
}
"""Ranks, settings, layout, and another layout that resumes as well."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def train_masked(model: OmniModel, recipe: Recipe) -> None:
    """The definition, in place of ``setup.freeze``."""
    matrices = frozen_matrices(recipe)
    apply_freeze(model, set(recipe.freeze) - matrices)
    for name, weight in model.named_parameters():
        if part_of(name) in matrices:
            first = dist.get_rank() * len(weight) if recipe.parallel.tensor_model_parallel_size > 1 else 0
            local = [row - first for row in setup.new_token_ids(recipe) if 0 <= row - first < len(weight)]
            mask = torch.zeros(len(weight), 1)
            mask[local] = 1
            weight.register_hook(lambda grad, mask=mask: grad * mask.to(grad.dtype))
            weight.masked = True  # type: ignore[attr-defined]


@contextmanager
def masked(wanted: bool) -> Iterator[None]:
    """Inside the block the definition is in force, if it is wanted: masked matrices, without weight decay."""
    ours = setup.freeze, optimizer._undecayed
    if wanted:
        setup.freeze = train_masked
        optimizer._undecayed = lambda param, name: hasattr(param, "masked") or ours[1](param, name)
    try:
        yield
    finally:
        setup.freeze, optimizer._undecayed = ours


def run_all(rank: Rank, recipes: dict[str, Recipe]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Train each; shapes of what is trained by run. A name that starts with ``masked`` is the definition."""
    results = {}
    for name, recipe in recipes.items():
        with masked(name.startswith("masked")):
            run = prepare(replace(rank, store=dist.PrefixStore(name, rank.store)), recipe)
            assert train(run) == 0
        named = unwrap_model(run.model).named_parameters()
        results[name] = {key: tuple(p.shape) for key, p in named if p.requires_grad}
        groups.destroy()
    return results


def with_whole_matrices(directory: Path, target: Path, ids: list[int]) -> None:
    """Copy a checkpoint as an earlier version would have written it: the optimizer's state of the rows within the matrix's,
    whose other rows have no moments and the frozen weights as master weights; cut in the middle of a new token's row.
    """
    shutil.copytree(directory, target)
    (aside := target / "aside").mkdir()
    reader, writer, whole = TorchDistReader(directory), TorchDistWriter(aside), {}
    for key, holder in HOLDERS.items():
        for name in [name for name in reader.tensors if name.endswith(f"{holder}.new_token_rows.weight")]:
            state = name.split(".")[2]
            matrix = reader.read(key).to(reader.tensors[name].dtype)
            if state.startswith("exp"):
                matrix.zero_()
            matrix[ids] = reader.read(name)
            rows, width = matrix.shape
            for start, end in ((0, cut := ids[len(ids) // 2] * width + 5), (cut, rows * width)):
                for offsets, sizes in boxes((rows, width), (width, 1), start, end):
                    block = matrix[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].contiguous()
                    shape = (rows, width)
                    writer.write(f"optimizer.state.{state}.{key}", block, shape=shape, offsets=offsets, rank=90)
            whole[name] = key
    writer.finish()
    table, added = read_metadata(target / ".metadata"), read_metadata(aside / ".metadata")
    for name in whole:
        del table.state_dict_metadata[name]
    table.storage_data = {index: info for index, info in table.storage_data.items() if index.fqn not in whole}
    table.state_dict_metadata |= added.state_dict_metadata
    table.storage_data |= added.storage_data
    (target / ".metadata").write_bytes(pickle.dumps(table))
    (aside / "__90_0.distcp").rename(target / "__90_0.distcp")
    shutil.rmtree(aside)
    write_manifest(target)


def assert_same_step(one: dict[str, float], other: dict[str, float], saved: Path, others: Path) -> None:
    """Bit for bit: what was logged of it, and all tensors of the checkpoint after it."""
    for metric in ("lm loss", "grad-norm"):
        assert one[metric] == other[metric], (others, metric)
    readers = TorchDistReader(saved), TorchDistReader(others)
    assert readers[0].tensors.keys() == readers[1].tensors.keys()
    for key in readers[0].tensors:
        assert torch.equal(*(reader.read(key) for reader in readers)), (others, key)


@pytest.mark.parametrize("case", CASES)
def test_one_parameter_for_the_rows_is_the_masked_matrix(corpus: Path, tmp_path: Path, case: str) -> None:
    world_size, changes, layout, other = CASES[case]

    def recipe(name: str, layout: dict[str, Any] = layout, **more: Any) -> Recipe:
        return tiny_recipe(
            corpus,
            tmp_path / name,
            train_iters=3,
            freeze=["embeddings", "output"],
            checkpoint__save_interval=2,
            checkpoint__keep=0,
            optim__weight_decay=0.5,
            optim__clip_grad=0.0,  # the norm is a sum in another order
            **changes,
            **layout,
            **more,
        )

    def saved(name: str, step: int) -> Path:
        return iteration_dir(tmp_path / name / "checkpoints", step)

    recipes = {"masked": recipe("masked"), "rows": recipe("rows")}
    ranks = run_ranks(run_all, world_size, recipes)
    ids = setup.new_token_ids(recipes["rows"])
    old = tmp_path / "old" / "iter_0000002"
    with_whole_matrices(saved("rows", 2), old, ids)
    resumes = {
        "resumed_old": recipe("resumed_old", load=str(old)),
        "of_masked": recipe("of_masked", load=str(saved("masked", 2))),
    }
    if other:
        resumes["elsewhere"] = recipe("elsewhere", other, load=str(saved("rows", 2)))
        resumes["elsewhere_old"] = recipe("elsewhere_old", other, load=str(old))
    else:
        resumes["resumed"] = recipe("resumed", load=str(saved("rows", 2)))
        resumes["from_masked"] = recipe("from_masked", init_from=str(saved("masked", 2)))
        resumes["from_rows"] = recipe("from_rows", init_from=str(saved("rows", 2)))
    run_ranks(run_all, world_size, resumes)
    recipes |= resumes
    logged = {name: {int(r["step"]): r for r in records(recipes[name])} for name in recipes}
    bf16 = "bf16" in case
    tied = not recipes["rows"].model.untie_embeddings_and_output_weights

    # The forward of the first step, and all gradients below it, are bit for bit the definition's.
    assert logged["rows"][1]["lm loss"] == logged["masked"][1]["lm loss"]
    for step in (1, 2, 3):
        for metric in ("lm loss", "grad-norm"):
            expected = pytest.approx(logged["masked"][step][metric], rel=1e-3 if bf16 else 1e-6)
            assert logged["rows"][step][metric] == expected, (step, metric)
    # A resume goes on bit for bit, on another layout to rounding.
    for metric in ("lm loss", "grad-norm"):
        close = {"rel": 1e-3 if bf16 else 1e-5}
        for name in {"elsewhere", "of_masked"} & logged.keys():
            assert logged[name][3][metric] == pytest.approx(logged["masked"][3][metric], **close), (name, metric)
        if not other:
            assert logged["from_masked"][1][metric] == pytest.approx(logged["from_rows"][1][metric], **close), metric
    assert logged["of_masked"][3]["lm loss"] == logged["masked"][3]["lm loss"], "not the weights that were saved"
    for name, same in (("rows", "resumed"), ("rows", "resumed_old"), ("elsewhere", "elsewhere_old")):
        if {name, same} <= logged.keys():
            assert_same_step(logged[name][3], logged[same][3], saved(name, 3), saved(same, 3))
    for rank in ranks:
        # What is trained of the matrices is [R, H].
        new = rank["rows"].keys() - rank["masked"].keys()
        assert {rank["rows"][name] for name in new} == {(len(ids), 32)}, new
        assert not rank["rows"].keys() & {EMBEDDING, OUTPUT}

    theirs, ours = (TorchDistReader(saved(name, 3)) for name in ("masked", "rows"))
    start = TorchDistReader(saved("rows", 2))
    weights = {key for key in theirs.tensors if not key.startswith("optimizer.")}
    assert weights == {key for key in ours.tensors if not key.startswith("optimizer.")}, "checkpoints differ in form"
    for key in {EMBEDDING, OUTPUT} & weights:
        frozen = torch.ones(ours.tensors[key].shape[0], dtype=torch.bool)
        frozen[ids] = False
        assert torch.equal(ours.read(key)[frozen], theirs.read(key)[frozen])
        assert (ours.read(key)[ids] != start.read(key)[ids]).any(), "the last update is not in the matrix"
        torch.testing.assert_close(ours.read(key)[ids], theirs.read(key)[ids], atol=2e-3 if bf16 else 1e-5, rtol=0)
        holder = "embedding" if key == EMBEDDING else "output_layer"
        states = [name.split(".")[2] for name in theirs.tensors if name.endswith(key) and name.startswith("optimizer.")]
        assert {"exp_avg", "exp_avg_sq"} < set(states)
        for state in states:
            rows = ours.read(f"optimizer.state.{state}.language.{holder}.new_token_rows.weight")
            whole = theirs.read(f"optimizer.state.{state}.{key}")
            assert rows.shape == (len(ids), 32)
            scale = whole[ids].abs().max().item()
            torch.testing.assert_close(rows, whole[ids], atol=(2e-2 if bf16 else 1e-4) * scale, rtol=0)
            if not state.startswith("exp"):
                assert torch.equal(rows.to(ours.read(key).dtype), ours.read(key)[ids])
            else:
                assert not whole[frozen].any()
    assert (OUTPUT in weights) == (not tied)
