"""A run that was stopped and resumed equals one that never stopped: bit for bit on the same layout, to rounding on
another.
"""

import os
import resource
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_omni.checkpoint import commit
from megatron_omni.checkpoint.commit import CheckpointError
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.config.load import load_recipe
from megatron_omni.config.parts import PARTS
from megatron_omni.config.run import Recipe
from megatron_omni.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_omni.parallel.wrap import unwrap_model
from megatron_omni.tasks.supervised import SupervisedTask
from megatron_omni.training.loop import train
from megatron_omni.training.setup import Run, begin_save, save, setup
from tests.distributed import tiny_run
from tests.distributed.harness import COLLECTIVE_TIMEOUT_SECONDS, Rank
from tests.distributed.tiny_run import make_corpus, prepare, records, run_ranks, run_tiny, train_rank

STEPS, STOP = 4, 2
TP, PP = {"parallel__tensor_model_parallel_size": 2}, {"parallel__pipeline_model_parallel_size": 2}
CP = {"parallel__context_parallel_size": 2}
EP = {"parallel__expert_model_parallel_size": 2}
BF16 = {"optim__precision": "bf16"}
DENSE_TEXT = {
    "model__moe": None,
    "model__vision": None,
    "model__audio": None,
    "model__untie_embeddings_and_output_weights": False,
}
LEAN = BF16 | {
    "optim__grad_reduce_in_fp32": False,
    "optim__use_precision_aware_optimizer": True,
    "optim__exp_avg_dtype": "bf16",
    "optim__exp_avg_sq_dtype": "bf16",
}
PLAIN = {"optim__use_distributed_optimizer": False}
OVERLAP_GRADS = {"parallel__overlap_grad_reduce": True, "parallel__bucket_size": 3_000}
OVERLAP = OVERLAP_GRADS | {"parallel__overlap_param_gather": True}
TIMES = ("time/", "step time", "tokens/s", "TFLOP/s")


tiny_recipe = partial(tiny_run.tiny_recipe, data__micro_batch_size=4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """One rank, fp32, never stopped."""
    return run_tiny(tiny_recipe(corpus, tmp_path_factory.mktemp("undisturbed"), train_iters=STEPS), 1)


def stop_at(step: int, *, rank: int = 0, number: int = signal.SIGTERM) -> Callable[[Run], None]:
    """Send this process a signal while ``rank`` reads the data of ``step``."""

    def before(run: Run) -> None:
        if dist.get_rank() != rank or run.loader is None:
            return
        read = run.loader.next_step

        def next_step() -> Any:
            if run.state.step + 1 == step:
                os.kill(os.getpid(), number)
            return read()

        run.loader.next_step = next_step  # type: ignore[method-assign]

    return before


def stop_and_resume(
    corpus: Path, run_dir: Path, first: tuple[int, dict[str, Any]], second: tuple[int, dict[str, Any]], **settings: Any
) -> list[dict[str, float]]:
    """Stop after ``STOP`` on one layout, finish on another; the records of both parts."""
    stopped = readable(tiny_recipe(corpus, run_dir, train_iters=STEPS, **first[1], **settings))
    assert set(run_ranks(train_rank, first[0], stopped, stop_at(STOP, rank=first[0] - 1 if not first[1] else 0))) == {
        75
    }
    assert (run_dir / "requeue").read_text() == f"{STOP}\n"
    assert records(stopped)[-1]["step"] == STOP
    resumed = readable(tiny_recipe(corpus, run_dir, train_iters=STEPS, load="auto", **second[1], **settings))
    result = run_tiny(resumed, second[0])
    assert not (run_dir / "requeue").exists()
    return result


def readable(recipe: Recipe) -> Recipe:
    """Without the sources that the model has no encoder for."""
    present = {"text": True, "image": recipe.model.vision is not None, "audio": recipe.model.audio is not None}
    recipe.data.sources = [source for source in recipe.data.sources if present[source.name]]
    return recipe


def exact(run: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if not name.startswith(TIMES)} for record in run]


@pytest.mark.parametrize("settings", [{}, PLAIN], ids=["distributed", "plain"])
def test_rates_of_parts_that_are_those_of_the_others_are_continued(
    corpus: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """A factor of 1 takes back that of the recipe which is extended."""
    rates = settings | {"optim__lr_scale": {"vision": 2.0, "gate": 1.0, "shared_experts": 1.0}}
    straight = run_tiny(tiny_recipe(corpus, tmp_path / "straight", train_iters=STEPS, **rates), 1)
    resumed = stop_and_resume(corpus, tmp_path / "resumed", (1, {}), (1, {}), **rates)
    assert exact(resumed) == exact(straight)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(2, EP | BF16, id="ep2-bf16"),
        pytest.param(2, PP | BF16 | PLAIN, id="pp2-bf16-plain-adam"),
        pytest.param(2, TP, id="tp2-fp32"),
        # Without a gather before the save, the weights saved are rank 0's mixture of two steps' weights.
        pytest.param(2, OVERLAP | BF16, id="dp2-bf16-overlap"),
        pytest.param(2, OVERLAP | BF16 | EP, id="ep2-bf16-overlap"),
        # The tied matrix gets a gradient bucket of its own: several buckets, with padding between them.
        pytest.param(2, PP | DENSE_TEXT, id="pp2-several-buckets"),
    ],
)
def test_bit_equal_on_the_same_layout(corpus: Path, tmp_path: Path, world_size: int, layout: dict[str, Any]) -> None:
    straight = run_tiny(readable(tiny_recipe(corpus, tmp_path / "straight", train_iters=STEPS, **layout)), world_size)
    resumed = stop_and_resume(corpus, tmp_path / "stopped", (world_size, layout), (world_size, layout))
    assert exact(resumed) == exact(straight)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param((1, {}), (2, EP), id="ep1-to-ep2"),
        pytest.param((2, EP), (1, {}), id="ep2-to-ep1"),
        pytest.param((2, EP | PLAIN), (1, PLAIN), id="ep2-to-ep1-plain-adam"),
        pytest.param((4, TP | PP | EP), (2, {}), id="tp2pp2ep2-to-dp2"),
        pytest.param((2, CP), (1, {}), id="cp2-to-one"),
        pytest.param((1, {}), (2, CP), id="one-to-cp2"),
        # Parameters are registered in another order: encoders first where messages overlap.
        pytest.param((2, {}), (2, OVERLAP), id="dp2-to-dp2-overlap"),
        pytest.param((2, OVERLAP_GRADS | PLAIN), (2, PLAIN), id="dp2-overlap-to-dp2-plain-adam"),
    ],
)
def test_equal_to_rounding_on_another_layout(
    undisturbed: list[dict[str, float]],
    corpus: Path,
    tmp_path: Path,
    first: tuple[int, dict[str, Any]],
    second: tuple[int, dict[str, Any]],
) -> None:
    assert_equal_to_rounding(stop_and_resume(corpus, tmp_path, first, second), undisturbed)


def assert_equal_to_rounding(resumed: list[dict[str, float]], undisturbed: list[dict[str, float]]) -> None:
    for mine, theirs in zip(resumed, undisturbed, strict=True):
        assert mine["lm loss"] == pytest.approx(theirs["lm loss"], rel=1e-6)
        assert mine["grad-norm"] == pytest.approx(theirs["grad-norm"], rel=1e-5)
        assert mine["learning-rate"] == theirs["learning-rate"]
        assert mine["consumed samples"] == theirs["consumed samples"]


def one_after_the_other(rank: Rank, recipes: list[Recipe]) -> list[int]:
    """Runs that continue each other, in one process."""
    pg = rank.initialize(recipes[0].parallel)
    return [train(setup(recipe, SupervisedTask(recipe.data.sources), pg=pg)) for recipe in recipes]


def test_equal_to_rounding_where_stages_are_cut_anew(corpus: Path, tmp_path: Path) -> None:
    """Four blocks: two and two, then one and three, then two and two."""
    settings = {"model__num_layers": 4, "checkpoint__save_interval": 1}
    straight = run_tiny(tiny_recipe(corpus, tmp_path / "straight", train_iters=3, **settings), 1)
    recipes = [
        tiny_recipe(
            corpus, tmp_path / "cut", train_iters=step, load="auto", parallel__pipeline_layout=cut, **PP, **settings
        )
        for step, cut in enumerate(([], [1, 3], []), 1)
    ]
    assert run_ranks(one_after_the_other, 2, recipes) == [[0, 0, 0]] * 2
    assert_equal_to_rounding(records(recipes[-1]), straight)


def test_bf16_gradients_and_moments_are_continued(corpus: Path, tmp_path: Path) -> None:
    """On the same layout bit for bit; another one takes over every bit of the state."""
    settings = LEAN | {"train_iters": STEPS, "checkpoint__save_interval": STOP}
    run_ranks(go_on_twice, 2, tiny_recipe(corpus, tmp_path, load="auto", **settings | EP | OVERLAP))
    run_ranks(save_again, 1, tiny_recipe(corpus, tmp_path, load="auto", **settings))
    written, again = (TorchDistReader(commit.iteration_dir(tmp_path / "checkpoints", n)) for n in (STEPS, STEPS + 1))
    assert written.tensors.keys() == again.tensors.keys()
    for name in written.tensors:
        moment = name.startswith("optimizer.state.exp_avg")
        dtype = torch.float32 if name.startswith("optimizer.") and not moment else torch.bfloat16
        assert written.tensors[name].dtype == dtype, name
        assert torch.equal(written.read(name), again.read(name)), name


def go_on_twice(rank: Rank, recipe: Recipe) -> None:
    """Train straight on, and once more from the checkpoint in the middle."""
    pg, ends, logs = rank.initialize(recipe.parallel), [], []
    for start in (0, STOP):
        run = setup(recipe, SupervisedTask(recipe.data.sources), pg=pg)
        assert run.state.step == start
        assert {buffer.grad_dtype for buffer in run.model.buffers} == {torch.bfloat16}
        assert train(run) == 0
        ends.append([p.detach().clone() for p in unwrap_model(run.model).parameters()])
        dist.barrier()
        logs.append(exact(records(recipe)))
        dist.barrier()
        if rank.index == 0 and start == 0:
            commit.write_text(run.checkpoints / commit.TRACKER, f"{STOP}\n")
        dist.barrier()
    assert logs[0] == logs[1] and logs[0][-1]["step"] == STEPS
    for straight, resumed in zip(*ends, strict=True):
        assert torch.equal(straight, resumed)


def save_again(rank: Rank, recipe: Recipe) -> None:
    run = prepare(rank, recipe)
    assert run.state.step == STEPS
    run.state.step += 1
    save(run)


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_is_complete_and_describes_itself(corpus: Path, tmp_path: Path, background: bool) -> None:
    recipe = tiny_recipe(
        corpus,
        tmp_path,
        train_iters=4,
        checkpoint__save_interval=1,
        checkpoint__keep=2,
        checkpoint__async_save=background,
    )
    recipe.parallel.distributed_timeout_seconds = COLLECTIVE_TIMEOUT_SECONDS  # as the harness sets it
    run_tiny(recipe, 1)
    root = tmp_path / "checkpoints"
    assert sorted(commit.steps(root)) == [3, 4] and not list(root.glob(".*"))  # nothing half, nothing to be deleted
    newest = commit.find(tmp_path)
    assert newest == root / "iter_0000004"
    assert load_recipe(newest / "run_config.yaml") == recipe
    assert load_tokenizer(newest / "tokenizer" / "tokenizer.model").vocab_size == 300


# ---------------------------------------------------------------------------------------------------- refusals


def refusals(rank: Rank, recipes: list[Recipe]) -> list[str]:
    """Why each of them cannot start, one after the other in one process."""
    pg, messages = rank.initialize(recipes[0].parallel), []
    for recipe in recipes:
        with pytest.raises(ValueError) as caught:
            setup(recipe, SupervisedTask(recipe.data.sources), pg=pg)
        messages.append(str(caught.value))
    return messages


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a finished one-step run."""
    run_dir = tmp_path_factory.mktemp("finished")
    run_tiny(tiny_recipe(corpus, run_dir, train_iters=1), 1)
    return run_dir


def test_weights_of_another_model_are_refused_by_name(corpus: Path, tmp_path: Path, finished: Path) -> None:
    other = make_other_tokenizer(tmp_path)
    changed = {"init_allow_changed": ["model.moe.moe_ffn_hidden_size", "model.num_layers"]}
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        # By what gives weights their meaning: of the first, a tensor's shape would tell, of the others nothing.
        (
            {"model__moe__moe_ffn_hidden_size": 40},
            ("model.moe.moe_ffn_hidden_size=40", "made with 32", "allow_changed"),
        ),
        ({"model__rotary_base": 500.0}, ("model.rotary_base=500.0", f"{finished}", "made with 1000000.0")),
        ({"model__mrope_section": [1, 1, 2]}, ("model.mrope_section=[1, 1, 2]", "made with [2, 1, 1]")),
        ({"model__vision__num_attention_heads": 4}, ("model.vision.num_attention_heads=4", "made with 2")),
        ({"data__tokenizer": str(other)}, ("data.tokenizer", str(other), "another tokenizer", "init_allow_changed")),
        # By tensors.
        (changed | {"model__moe__moe_ffn_hidden_size": 40}, ("experts.linear_fc1.weight", "64]", "80]")),
        (changed | {"model__num_layers": 3}, ("has no tensor", "layers.4")),
        ({"optim__precision": "bf16"}, ("torch.float32", "torch.bfloat16", "optim.precision")),
        ({"model__vision": None}, ("vision.", "does not have")),
    ]
    recipes = [readable(tiny_recipe(corpus, tmp_path, init_from=str(finished), **change)) for change, _ in cases]
    for message, (change, named) in zip(run_ranks(refusals, 1, recipes)[0], cases, strict=True):
        assert all(text in message for text in named), (change, message)


def make_other_tokenizer(directory: Path) -> Path:
    text = "pack my box with five dozen liquor jugs"
    train_sentencepiece([text] * 20, directory / "other.model", vocab_size=294)
    return directory / "other.model"


def test_a_resumed_run_may_not_change_what_its_optimizer_belongs_to(
    corpus: Path, tmp_path: Path, finished: Path
) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"optim__lr": 1e-4}, "optim.lr=0.0001"),
        ({"model__moe__top_p": 0.5}, "model.moe"),
        ({"freeze": ["vision"]}, "freeze"),
        ({"load": "nowhere"}, "load='nowhere'"),
        ({"data__tokenizer": str(make_other_tokenizer(tmp_path))}, "data.tokenizer"),
    ]
    recipes = [tiny_recipe(corpus, finished, train_iters=2, **{"load": str(finished), **change}) for change, _ in cases]
    for message, (_, named) in zip(run_ranks(refusals, 1, recipes)[0], cases, strict=True):
        assert (named in message and "init_from" in message) or "run directory" in message


def test_what_would_fail_at_the_first_save_or_evaluation_fails_at_the_start(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "unusable.jsonl").write_text("[1]\n" * 5)
    held_out = [{"name": "held_out", "path": str(tmp_path / "unusable.jsonl")}]
    everything = [part for part in PARTS if part != "new_token_rows"]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model__moe__moe_shared_expert_intermediate_size": 0}, "shared_experts.weight1 has the shape [32, 0]"),
        ({"model__moe__moe_ffn_hidden_size": 0}, "experts.weight1 has the shape [4, 32, 0]: a width of the model is 0"),
        ({"freeze": [*everything, "new_token_rows"]}, "every part of this model is frozen"),
        (
            {"data__eval_sources": held_out, "log__eval_interval": 5},
            "data source 'held_out': 5 records in a row cannot be used",
        ),
    ]
    recipes = [tiny_recipe(corpus, tmp_path, **change) for change, _ in cases]
    for message, (_, named) in zip(run_ranks(refusals, 1, recipes)[0], cases, strict=True):
        assert named in message


def weights(rank: Rank, recipe: Recipe) -> dict[str, torch.Tensor]:
    run = prepare(rank, recipe)
    assert run.state.step == 0
    return {name: p.detach().clone() for name, p in unwrap_model(run.model).named_parameters()}


def test_init_from_takes_the_weights_and_starts_at_step_0(corpus: Path, tmp_path: Path, finished: Path) -> None:
    trained = run_ranks(weights, 1, tiny_recipe(corpus, tmp_path, init_from=str(finished), seed=99))[0]
    fresh = run_ranks(weights, 1, tiny_recipe(corpus, tmp_path, seed=99))[0]
    again = run_ranks(weights, 2, tiny_recipe(corpus, tmp_path, init_from=str(finished), **EP))[0]
    assert all(not torch.equal(trained[name], fresh[name]) for name in trained if name.endswith("mlp.router.weight"))
    for name, value in again.items():
        expected = trained[name]
        assert torch.equal(value, expected[: len(value)] if ".experts.weight" in name else expected), name


# ---------------------------------------------------------------------------------------------------- disk full


def fill_the_disk_of_one_rank(rank: Rank, recipe: Recipe) -> tuple[str, list[int], int]:
    """Save twice with a small file-size limit on the last rank in between; (error, checkpoints then, status after)."""
    run = prepare(rank, recipe)
    run.state.step = 1
    save(run)
    run.state.step = 2
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank.index == rank.world_size - 1:
        # Less than the rank's share of the checkpoint, more than the file that is the ranks' store here.
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    with pytest.raises(CheckpointError) as caught:
        save(run)
    dist.barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found = sorted(commit.steps(run.checkpoints))
    assert not list(run.checkpoints.glob(".*")), "something was left behind"
    assert commit.find(run.checkpoints) == run.checkpoints / "iter_0000001"
    dist.barrier()
    return str(caught.value), found, train(run)


@pytest.mark.parametrize("world_size", [1, 2])
def test_disk_full_is_one_error_on_every_rank_and_costs_nothing(corpus: Path, tmp_path: Path, world_size: int) -> None:
    recipe = tiny_recipe(corpus, tmp_path, train_iters=3)
    results = run_ranks(fill_the_disk_of_one_rank, world_size, recipe)
    errors, found, statuses = zip(*results, strict=True)
    assert len(set(errors)) == 1
    assert f"[rank {world_size - 1}] saving: [Errno 27] File too large" in errors[0]
    assert found[0] == [1] and set(statuses) == {0}
    assert commit.find(tmp_path) == tmp_path / "checkpoints" / "iter_0000003"


def fill_the_disk_before_metadata(rank: Rank, recipe: Recipe) -> tuple[str, list[int]]:
    """The same, full on the first rank once all files but ``.metadata`` are written."""
    run = prepare(rank, recipe)
    pending = begin_save(run)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank.index == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    with pytest.raises(CheckpointError) as caught:
        pending.finish()
    dist.barrier()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return str(caught.value), commit.steps(run.checkpoints)


def test_disk_full_for_the_metadata_is_heard_by_every_rank(corpus: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(corpus, tmp_path, train_iters=3)
    for error, found in run_ranks(fill_the_disk_before_metadata, 2, recipe):
        assert error == "[rank 0] saving: OSError: [Errno 27] File too large" and found == []
    assert not list((tmp_path / "checkpoints").glob(".*"))
