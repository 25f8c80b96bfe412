"""A background save writes what the run was when it began, whatever training does meanwhile, save after save."""

from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.serialization import load_plain_tensors
from torch import Tensor

from megatron_omni.checkpoint.memory import SaveMemory
from megatron_omni.config.run import Recipe
from megatron_omni.training.setup import Run, begin_save, save
from tests.distributed.harness import Rank
from tests.distributed.tiny_run import make_corpus, prepare, run_ranks, tiny_recipe


def state_of(run: Run) -> Iterator[Tensor]:
    """Every tensor that a training step changes."""
    yield from (parameter.data for parameter in run.model.parameters())
    for member in run.optimizer.chained_optimizers:
        for group in member.optimizer.param_groups:
            yield from (parameter.data for parameter in group["params"])
        for values in member.optimizer.state.values():
            yield from (value for value in values.values() if isinstance(value, Tensor))


def move(run: Run, seed: int) -> None:
    """As a step would: every value becomes another."""
    noise = torch.Generator().manual_seed(seed)
    for tensor in state_of(run):
        tensor.add_(torch.rand(tensor.shape, generator=noise) + 0.5)


def tensors_in(directory: Path) -> dict[str, Tensor]:
    """What a checkpoint holds, by name."""
    found: dict[str, Tensor] = {}

    def walk(name: str, value: object) -> None:
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}" if name else str(key), inner)

    walk("", load_plain_tensors(str(directory)))
    return found


def save_and_move(rank: Rank, recipe: Recipe) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(saved at once, saved in the background while everything changed) of the same state, twice with the same memory."""
    run, memory, found = prepare(rank, recipe), SaveMemory(), []
    for number in range(2):
        move(run, number)
        run.state.step += 1
        at_once = tensors_in(save(run))
        run.state.step += 1
        pending = begin_save(run, background=True, memory=memory)
        move(run, 2 + number)
        found.append((at_once, tensors_in(pending.finish())))
    return found


def test_a_background_save_holds_the_state_it_began_with(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    recipe = tiny_recipe(corpus, tmp_path / "run", optim__precision="bf16", parallel__expert_model_parallel_size=2)
    first, second = run_ranks(save_and_move, 2, recipe)[0]
    for at_once, meanwhile in (first, second):
        assert at_once.keys() == meanwhile.keys() and any(key.startswith("optimizer.") for key in at_once)
        assert all(torch.equal(at_once[key], meanwhile[key]) for key in at_once)
    changed = [key for key in first[0] if first[0][key].is_floating_point()]
    assert changed and not any(torch.equal(first[0][key], second[0][key]) for key in changed)
