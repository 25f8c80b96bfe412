"""The loss curve of the whole omni MoE model does not depend on the layout: sampled routing and auxiliary loss on, in
fp32.

Measured differences are about 1e-8 relative in the loss and 2e-7 in the gradient norm; the tests allow 1e-5 and 1e-4.
"""

from pathlib import Path
from typing import Any

import pytest

from megatron_omni.config.run import Recipe
from megatron_omni.data.collate import collate
from megatron_omni.data.loader import StepLoader
from megatron_omni.parallel.wrap import unwrap_model
from tests.distributed.harness import Rank, run_ranks
from tests.distributed.tiny_run import CP, EP, OVERLAP, PP, TP, make_corpus, prepare, run_tiny, tiny_recipe

ALL_GATHER = {"model__moe__moe_token_dispatcher_type": "allgather"}
STEPS = 8
RUN = {"train_iters": STEPS, "optim__lr": 5e-3, "log__eval_interval": STEPS // 2, "log__eval_iters": 1}

Records = list[dict[str, float]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def curve(corpus: Path, run_dir: Path, world_size: int, **overrides: Any) -> Records:
    held_out = [{"name": "held_out", "path": str(corpus / "held_out.jsonl")}]
    recipe = tiny_recipe(corpus, run_dir, data__eval_sources=held_out, **RUN | overrides)
    return run_tiny(recipe, world_size)


@pytest.fixture(scope="module")
def control(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Records:
    """One rank."""
    return curve(corpus, tmp_path_factory.mktemp("control"), 1)


def names(record: dict[str, Any]) -> set[str]:
    """Metrics that any number of ranks has; which rank is slow is said of several only."""
    return {name for name in record if not name.startswith("time/slow")}


def assert_same_curve(test: Records, control: Records) -> None:
    assert [names(record) for record in test] == [names(record) for record in control]
    for mine, theirs in zip(test, control, strict=True):
        for name, value in theirs.items():
            if name.startswith(("lm loss", "loss/", "eval/", "moe/aux", "learning-rate", "consumed")):
                assert mine[name] == pytest.approx(value, rel=1e-5), f"step {theirs['step']}: {name}"
            elif name == "grad-norm":
                assert mine[name] == pytest.approx(value, rel=1e-4), f"step {theirs['step']}: {name}"
            elif name.startswith("moe/"):  # every routing decision is the same one
                assert mine[name] == pytest.approx(value, rel=1e-12), f"step {theirs['step']}: {name}"


def test_the_control_learns_and_sees_every_modality(control: Records) -> None:
    steps = [record for record in control if "lm loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["lm loss"] < steps[0]["lm loss"] - 0.5
    for name in ("text", "image", "audio"):
        assert f"loss/modality/{name}" in steps[-1] and f"loss/source/{name}" in steps[-1]
    held_out = [record["eval/loss/held_out"] for record in control if "eval/loss/held_out" in record]
    assert len(held_out) == 2 and held_out[1] < held_out[0]


def test_micro_batches_without_a_modality_occur(corpus: Path, tmp_path: Path) -> None:
    loader = StepLoader(tiny_recipe(corpus, tmp_path), data_rank=0, data_size=1)
    batches = [batch for _ in range(5) for batch in loader.next_step()]
    assert any(batch.pixel_values is None and batch.audio_features is None for batch in batches)
    assert any(batch.pixel_values is None and batch.audio_features is not None for batch in batches)
    assert any(batch.pixel_values is not None and batch.audio_features is None for batch in batches)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(2, TP, id="tp2"),
        pytest.param(2, PP | {"parallel__recompute": "full"} | ALL_GATHER, id="pp2-recompute-full-allgather"),
        pytest.param(2, EP | {"parallel__recompute": "moe"}, id="ep2-recompute-moe"),
        pytest.param(2, EP | ALL_GATHER | {"optim__use_distributed_optimizer": False}, id="ep2-allgather-plain-adam"),
        # The held-out set's media differ between the ranks, and every encoder has buckets of its own: an evaluation whose
        # forwards gathered weights would hang.
        pytest.param(2, OVERLAP, id="dp2-overlap"),
        pytest.param(2, TP | EP, id="tp2-ep2"),
        pytest.param(4, TP | PP | EP, id="tp2-pp2-ep2"),
    ],
)
def test_same_curve_on_every_layout(
    control: Records, corpus: Path, tmp_path: Path, world_size: int, layout: dict[str, Any]
) -> None:
    assert_same_curve(curve(corpus, tmp_path, world_size, **layout), control)


def test_context_parallel_ranks_have_the_first_steps_of_the_curve(
    control: Records, corpus: Path, tmp_path: Path
) -> None:
    """Beneath them sequence parallelism, over them experts; pictures and sound in rows of a few dozen tokens."""
    test = curve(corpus, tmp_path, 4, **CP, **TP, **EP, train_iters=2, log__eval_interval=0)
    assert_same_curve(test, control[:2])
    assert [record["layout"] for record in test] == 2 * [{"tp": 2, "cp": 2, "ep": 2, "pp": 1, "dp": 1}]
    assert all(0 < mine["tokens_per_rank"] < theirs["tokens_per_rank"] for mine, theirs in zip(test, control))


def test_same_curve_when_each_step_has_one_modality(corpus: Path, tmp_path: Path) -> None:
    by_source = {"data__batch_by": "source"}
    one = curve(corpus, tmp_path / "one", 1, **by_source)
    present = [{name for name in record if name.startswith("loss/source/")} for record in one if "lm loss" in record]
    assert all(len(names) == 1 for names in present) and len(set.union(*present)) == 3
    assert_same_curve(curve(corpus, tmp_path / "four", 4, **TP, **EP, **by_source), one)


def test_lm_loss_does_not_depend_on_the_partition_into_micro_batches(corpus: Path, tmp_path: Path) -> None:
    no_aux = {"model__moe__moe_aux_loss_coeff": 0.0, "model__moe__moe_aux_loss_coeff_min": 0.0}
    whole, halves, singles = (
        curve(corpus, tmp_path / str(size), 1, data__micro_batch_size=size, **no_aux) for size in (8, 4, 1)
    )
    for other in (halves, singles):
        for mine, theirs in zip(other, whole, strict=True):
            for name in ("lm loss", "grad-norm", "moe/mean_k"):
                if name in theirs:
                    assert mine[name] == pytest.approx(theirs[name], rel=1e-5), f"step {theirs['step']}: {name}"


PACKED = {"data__packing": True, "data__micro_batch_size": 1, "data__global_batch_size": 4, "train_iters": 5}


def test_packed_rows_give_the_same_curve_on_every_layout(corpus: Path, tmp_path: Path) -> None:
    one = curve(corpus, tmp_path / "one", 1, **PACKED)
    per_step = [record["consumed samples"] for record in one if "lm loss" in record]
    assert per_step[-1] > 5 * 4  # several samples a row
    for world_size, layout in ((2, TP), (2, PP), (4, TP | EP)):
        assert_same_curve(curve(corpus, tmp_path / f"{world_size}-{len(layout)}", world_size, **layout, **PACKED), one)
    assert_same_curve(curve(corpus, tmp_path / "dp2", 2, **PACKED), one)


def test_a_packed_batch_gives_the_losses_of_its_samples_alone(corpus: Path, tmp_path: Path) -> None:
    (differences,) = run_ranks(packed_against_alone, 1, tiny_recipe(corpus, tmp_path, **PACKED))
    assert len(differences) >= 8 and max(differences) < 1e-5


def packed_against_alone(rank: Rank, recipe: Recipe) -> list[float]:
    """Relative difference of each sample's summed loss, in a packed row with sampled routing and by itself."""
    run = prepare(rank, recipe)
    model, loader, differences = unwrap_model(run.model), run.loader, []
    assert loader is not None
    facts = {"step": 3, "stochastic": True}
    for batch in loader.next_step():
        losses = model(batch, **facts)
        for s in range(batch.num_samples):
            here = batch.segment_ids[0] == s
            (sample_id,) = batch.sample_ids[0][here].unique().tolist()
            draw = loader.mixture.sample_at(sample_id)
            sample = loader.builder.build_sample(loader.sources[draw.source][draw.row])
            pad_id = loader.builder.tokenizer.pad_id
            alone = model(collate([sample], pad_id=pad_id, sample_ids=[sample_id]), **facts).sum()
            differences.append(float((losses[0][here].sum() - alone).abs() / alone.abs()))
    return differences
