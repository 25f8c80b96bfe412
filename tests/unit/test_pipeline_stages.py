"""Pipeline stages of different lengths: what a recipe may ask for, the split that plan proposes, and what it says of it.

The proposal is held against every split there is, the step's formula against 1F1B played through event by event.
"""

import itertools
import random
from pathlib import Path

import pytest

from megatron_omni.cli.plan import pipeline
from megatron_omni.cli.train import main as train
from megatron_omni.config.load import load_recipe, recipe_from_dict
from megatron_omni.config.parallel import stage_blocks
from megatron_omni.config.validate import validate
from megatron_omni.estimate.hardware import GPUS
from megatron_omni.estimate.parameters import count_parameters, stage_weights
from megatron_omni.estimate.pipeline import balanced, bubble
from megatron_omni.estimate.plan import make_plan, splits

ROOT = Path(__file__).parents[2]
SFT = str(ROOT / "recipes" / "3_sft.yaml")
ANNEAL = str(ROOT / "recipes" / "4_anneal.yaml")  # its vision tower is trained


@pytest.mark.parametrize(
    ("stages", "cut", "expected"),
    [
        (
            2,
            [28, 0],
            "parallel.pipeline_layout.1=0: must be at least 1 .*; give every stage a block, or use fewer stages",
        ),
        (2, [-1, 29], "parallel.pipeline_layout.0=-1: must be at least 1"),
        (2, [9, 9, 10], r"parallel.pipeline_layout=\[9, 9, 10\]: 3 number.*=2 stages; give 2, such as \[14, 14\]"),
        (3, [9, 9, 9], r"parallel.pipeline_layout=\[9, 9, 9\]: 27 blocks, and model.num_layers=28; .* \[9, 9, 10\]"),
        (1, [28], r"parallel.pipeline_layout=\[28\]: no effect with pipeline_model_parallel_size=1; set it to \[\]"),
        (3, [], r"size=3 does not divide model.num_layers=28; choose .* parallel.pipeline_layout=\[9, 9, 10\]"),
        (29, [], "size=29 does not divide model.num_layers=28; choose a divisor of 28$"),
    ],
)
def test_a_cut_that_cannot_be_is_one_error_with_the_fix(stages: int, cut: list[int], expected: str) -> None:
    recipe = recipe_from_dict({"parallel": {"pipeline_model_parallel_size": stages, "pipeline_layout": cut}})
    recipe.data.global_batch_size = stages
    with pytest.raises(ValueError, match=expected) as caught:
        validate(recipe, world_size=stages, check_files=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", ["[14, 13.5]", "[14, x]", "14"])
def test_what_is_no_list_of_whole_numbers_is_refused_when_it_is_read(cut: str) -> None:
    with pytest.raises(ValueError, match=r"override 'parallel.pipeline_layout=.*pipeline_layout"):
        load_recipe(SFT, ["parallel.pipeline_model_parallel_size=2", f"parallel.pipeline_layout={cut}"])


def test_a_dry_run_refuses_it_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layout=[27, 2]"]
    assert train([SFT, "--dry-run", "--ranks", "16", *overrides]) == 2
    assert "parallel.pipeline_layout=[27, 2]: 29 blocks, and model.num_layers=28" in capsys.readouterr().err


def test_the_stages_hold_the_whole_model_however_they_are_cut() -> None:
    for cut in ([], [1, 26, 1], [9, 9, 10]):
        stages = len(cut) or 4
        recipe = recipe_from_dict({"parallel": {"pipeline_model_parallel_size": stages, "pipeline_layout": cut}})
        assert stage_blocks(recipe.parallel, 28) == (cut or [7] * 4)
        held = [sum(w.numel for w in stage_weights(recipe, stage=stage)) for stage in range(stages)]
        assert sum(held) == count_parameters(recipe.model).total
        if cut:
            block = held[1] // cut[1]
            assert held[1] == block * cut[1] and min(held[0] - block * cut[0], held[2] - block * cut[2]) > 0


def test_no_split_has_a_faster_slowest_stage_than_the_proposed_one() -> None:
    numbers = random.Random(0)
    for _ in range(60):
        stages = numbers.randint(2, 4)
        blocks, block = numbers.randint(stages, 10), numbers.choice((0.0, 0.3, 1.0))
        others = [numbers.choice((0.0, 0.5, 1.0, 4.0)) for _ in range(stages)]

        def slowest(split: tuple[int, ...]) -> float:
            return max(n * block + o for n, o in zip(split, others, strict=True))  # noqa: B023

        proposed = tuple(balanced(blocks, block=block, others=others))
        every = [s for s in itertools.product(range(1, blocks + 1), repeat=stages) if sum(s) == blocks]
        assert proposed in every and slowest(proposed) == min(map(slowest, every))


def played_through(stages: list[float], micro_batches: int) -> float:
    """Seconds of 1F1B whose backward takes twice as long as its forward: each pass begins when its stage is free and its
    neighbour's is done."""
    last = len(stages) - 1
    orders = []
    for stage in range(len(stages)):
        ahead = min(last - stage, micro_batches)
        both = [(kind, i + ahead * (kind == "f")) for i in range(micro_batches - ahead) for kind in "fb"]
        first = [("f", i) for i in range(ahead)]
        orders.append(first + both + [("b", i) for i in range(micro_batches - ahead, micro_batches)])
    done: dict[tuple[str, int, int], float] = {}
    free = [0.0] * len(stages)
    while any(orders):
        for stage, order in enumerate(orders):
            before = stage - 1 if order and order[0][0] == "f" else stage + 1
            if order and (not 0 <= before <= last or (*order[0], before) in done):
                kind, i = order.pop(0)
                start = max(free[stage], done.get((kind, i, before), 0.0))
                free[stage] = done[kind, i, stage] = start + stages[stage] * (1 if kind == "f" else 2) / 3
    return max(free)


def test_the_bubble_is_that_of_one_forward_one_backward() -> None:
    def share(stages: list[float], micro_batches: int) -> float:
        return 1 - micro_batches * sum(stages) / (len(stages) * played_through(stages, micro_batches))

    for stages, micro_batches in itertools.product((1, 2, 4, 7), (1, 3, 8, 32)):
        assert bubble([0.7] * stages, micro_batches) == pytest.approx((stages - 1) / (micro_batches + stages - 1))
        assert share([0.7] * stages, micro_batches) == pytest.approx(bubble([0.7] * stages, micro_batches), abs=1e-9)
    numbers = random.Random(0)
    for _ in range(50):
        stages, micro_batches = (
            sorted(numbers.uniform(0.5, 1.5) for _ in range(numbers.randint(2, 6))),
            numbers.randint(1, 40),
        )
        assert share(stages, micro_batches) == pytest.approx(
            bubble(stages, micro_batches), abs=1e-9
        )  # the last is slowest
        numbers.shuffle(stages)
        assert share(stages, micro_batches) <= bubble(stages, micro_batches) + 1e-9


def test_plan_proposes_fewer_blocks_where_the_encoders_are() -> None:
    words = ["parallel.pipeline_model_parallel_size=3", "parallel.tensor_model_parallel_size=1", "data.max_frames=32"]
    words += ["data.global_batch_size=96", "data.seq_length=4096", "parallel.pipeline_layout=[10, 9, 9]"]
    cuts = splits(make_plan(load_recipe(ANNEAL, words), world_size=24, gpu=GPUS["H100-80GB"]))
    given, proposed = cuts["as it is"], cuts["proposed"]
    assert sum(proposed.blocks) == 28 and proposed.blocks[0] < min(proposed.blocks[1:])
    assert max(proposed.stage_seconds) < max(given.stage_seconds)
    assert proposed.step.total < given.step.total and proposed.bubble < given.bubble
    block = proposed.stages[1].held.total / proposed.blocks[1]
    moved = given.stages[0].held.total - proposed.stages[0].held.total
    assert moved == pytest.approx(block * (10 - proposed.blocks[0]), rel=0.01)  # memory follows the cut
    assert pipeline(cuts)[-1].startswith(f"  'parallel.pipeline_layout={proposed.blocks}'")
    (again,) = splits(proposed).values()
    assert again is proposed
    assert pipeline({"as it is": given, "even": proposed})[-1] == pipeline(cuts)[-1]  # the best may be the even one
    assert pipeline({"as it is": proposed, "even": given})[-1] == "  the slowest stage is as fast as any cut makes it"
