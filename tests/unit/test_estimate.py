"""Parameter counts and FLOPs against the paper's Table 1 figures as worked out in docs/model.md; what a plan says."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_omni.cli.plan import main
from megatron_omni.config.load import load_recipe, recipe_from_dict
from megatron_omni.config.model import AudioConfig, ModelConfig, MoEConfig, VisionConfig
from megatron_omni.config.parallel import ParallelConfig
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import num_micro_batches, validate
from megatron_omni.estimate import ParameterCount, count_parameters, flops_per_token, weight_bytes_per_rank
from megatron_omni.estimate.activations import Activations, MicroBatch
from megatron_omni.estimate.flops import chunk_forward, tile_forward
from megatron_omni.estimate.hardware import GPUS, STATED, Efficiency, with_measured_experts
from megatron_omni.estimate.memory import offloaded_bytes, replicas, static_bytes, tensor_reduced_bytes
from megatron_omni.estimate.parameters import stage_weights
from megatron_omni.estimate.plan import GIB, Plan, alternatives, expected_mean_k, heaviest_batch, make_plan
from megatron_omni.estimate.scale import AtBatch, at_batch, at_batches, fewest_sequences
from megatron_omni.models.encoders.audio import AudioEncoder
from megatron_omni.models.encoders.vision import VisionEncoder
from megatron_omni.platform.peak import PEAK_TFLOPS

ROOT = Path(__file__).resolve().parents[2]
OFFLOADED = ["optim.optimizer_cpu_offload=true", "optim.optimizer_offload_fraction=0.5"]


def test_full_model_counts() -> None:
    counts = count_parameters(ModelConfig())
    assert counts.language == 26_151_734_784
    assert counts.attention == 822_212_608
    assert counts.embeddings == counts.output == 544_997_376
    assert counts.gate == 702_464
    assert counts.experts == 4 * 5_703_204_864
    assert counts.shared_experts == 2 * 712_900_608
    assert counts.audio == 636_968_960  # Whisper-large-v3's encoder, as in the paper's Table 1
    # The paper's 398M keeps the tower's post-layernorm, which nothing uses.
    assert counts.vision == 397_747_744 - 2 * 1152


def test_null_slots_cost_nothing_and_routed_flops_follow_mean_k() -> None:
    one = flops_per_token(ModelConfig(moe=MoEConfig(num_null_experts=1)), 4096, mean_k=1.0)
    two = flops_per_token(ModelConfig(moe=MoEConfig(num_null_experts=1)), 4096, mean_k=2.0)
    assert two - one == 6.0 * 3 * 3584 * 18944 * 28


def test_bytes_shrink_with_the_layout() -> None:
    whole = weight_bytes_per_rank(recipe_from_dict({"optim": {"use_distributed_optimizer": False}}), 1)
    split = weight_bytes_per_rank(
        recipe_from_dict({"parallel": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}}), 8
    )
    total = count_parameters(ModelConfig()).total
    sinusoids = 1500 * 1280  # Whisper's positions are never trained
    assert whole == {
        "weights": 2 * total,
        "gradients": 4 * (total - sinusoids),
        "optimizer": 12 * (total - sinusoids),
    }
    assert split["weights"] < whole["weights"] / 2
    # Distributed optimizer: 12 bytes a parameter over the ranks that hold replicas of it.
    assert split["optimizer"] < whole["optimizer"] / 6


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 4, 1), (2, 4, 2, 1), (4, 2, 2, 2)])
def test_the_ranks_of_a_layout_hold_the_whole_model(sizes: tuple[int, int, int, int]) -> None:
    tp, pp, ep, etp = sizes
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    copies = {"embeddings": tp, "output": tp, "attention": tp, "experts": ep * etp}
    counts = dict.fromkeys(vars(ParameterCount()), 0)
    for stage in range(pp):
        for weight in stage_weights(Recipe(parallel=parallel), stage=stage):
            counts[weight.part] += weight.numel * copies.get(weight.part, 1)
    assert counts == vars(count_parameters(ModelConfig()))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("world_size", [8, 24])
def test_optimizer_shards_add_up_to_what_is_trained(world_size: int, overlap: bool) -> None:
    """Summed over the ranks of the groups that share it, every trained element is updated exactly once."""
    recipe = recipe_from_dict(
        {
            "freeze": ["vision", "audio", "attention"],
            "parallel": {"expert_model_parallel_size": 4, "overlap_grad_reduce": overlap},
        }
    )
    dense_ranks, expert_ranks = replicas(recipe, world_size)
    # Varying one rank while the other stands still leaves the still group's bytes in every term.
    base = static_bytes(recipe, world_size, stage=0).optimizer
    along_dense = sum(static_bytes(recipe, world_size, stage=0, dp_rank=r).optimizer for r in range(dense_ranks))
    along_experts = sum(
        static_bytes(recipe, world_size, stage=0, expert_dp_rank=r).optimizer for r in range(expert_ranks)
    )
    counts = count_parameters(recipe.model)
    frozen = counts.vision + counts.audio + counts.attention
    experts = 12 * counts.experts // 4
    dense = 12 * (counts.total - frozen - counts.experts)
    dense_here = (along_experts - experts) // expert_ranks
    assert along_dense == dense + dense_ranks * (base - dense_here)
    assert along_experts == experts + expert_ranks * dense_here
    assert dense_here * dense_ranks == pytest.approx(dense, rel=0.01)


def full_plan(name: str, gpus: int, *overrides: str) -> Plan:
    recipe = load_recipe(ROOT / "recipes" / name, list(overrides))
    validate(recipe, world_size=gpus, check_files=False)
    return make_plan(recipe, world_size=gpus, gpu=GPUS["H100-80GB"])


@pytest.mark.parametrize("gpus", [8, 32, 64])
@pytest.mark.parametrize("stage", ["1_pretrain", "2_expert_warmup_vision", "3_sft", "4_anneal"])
def test_every_stage_of_the_full_model_has_a_layout_that_fits(stage: str, gpus: int) -> None:
    """The dense stages as they are, those of the mixture by a layout recipe."""
    name = f"layout/{stage[2:]}_{gpus}x80gb" if stage in ("3_sft", "4_anneal") else stage
    plan = full_plan(f"{name}.yaml", gpus)
    language = 26_151_734_784 if stage in ("3_sft", "4_anneal") else 7_615_616_512
    assert count_parameters(plan.recipe.model).language == language
    assert plan.fits and plan.usable_bytes <= 73.6 * GIB
    assert 0.05 < plan.mfu < 0.6
    whole = load_recipe(ROOT / "recipes" / f"{stage}.yaml")
    assert plan.tokens_per_step == whole.data.global_batch_size * whole.data.seq_length
    assert plan.recipe.freeze == whole.freeze and plan.recipe.task == whole.task


def test_every_stage_has_a_job_script_that_asks_for_as_many_gpus_as_its_recipe_needs() -> None:
    scripts = sorted((ROOT / "examples" / "slurm").glob("[0-9]*.sbatch"))
    assert [script.stem for script in scripts] == sorted(
        recipe.stem for recipe in (ROOT / "recipes").glob("[0-9]*.yaml")
    )
    for script in scripts:
        text = script.read_text()
        assert f'\ntrain recipes/{script.stem}.yaml "$@"\n' in text and f"--job-name={script.stem}\n" in text
        nodes, ranks = (int(re.search(rf"--{name}=(\d+)", text)[1]) for name in ("nodes", "ntasks-per-node"))  # type: ignore[index]
        assert full_plan(f"{script.stem}.yaml", nodes * ranks).fits, script.name


def test_the_stage_recipe_does_not_fit_one_machine_and_no_layout_saves_it() -> None:
    plan = full_plan("3_sft.yaml", 8)
    assert not plan.fits and alternatives(plan) == []


def test_bf16_gradients_and_moments_make_a_machine_enough_for_the_stage_recipe() -> None:
    """18 bytes a trained parameter are 12; half of the optimizer's state goes when half of it is offloaded."""
    lean = ["optim.grad_reduce_in_fp32=false", "optim.use_precision_aware_optimizer=true"]
    moments = ["optim.exp_avg_dtype=bf16", "optim.exp_avg_sq_dtype=bf16"]
    file = ROOT / "recipes" / "layout" / "sft_8x80gb.yaml"
    held = {}
    for name, more in (("wide", []), ("lean", lean + moments), ("half", [*lean[1:], *OFFLOADED])):
        recipe = load_recipe(file, more)
        held[name] = make_plan(recipe, world_size=8, gpu=GPUS["H100-80GB"]).stages[0].held
        state = offloaded_bytes(recipe, 8)
        assert state == (0 if name != "half" else held["half"].optimizer * 16 // 12)
    assert held["lean"].weights == held["wide"].weights and held["lean"].gradients * 2 == held["wide"].gradients
    assert (
        held["lean"].optimizer * 12 == held["wide"].optimizer * 8
        and held["half"].optimizer * 2 == held["wide"].optimizer
    )
    assert [round(held[name].total / GIB, 1) for name in ("wide", "lean")] == [64.7, 44.4]
    layout = [f"parallel.{axis}_model_parallel_size={n}" for axis, n in (("tensor", 2), ("pipeline", 2), ("expert", 4))]
    layout += ["parallel.recompute=full"]
    stage = ROOT / "recipes" / "3_sft.yaml"
    plans = [
        make_plan(load_recipe(stage, [*layout, *more]), world_size=8, gpu=GPUS["H100-80GB"])
        for more in ([], lean + moments)
    ]
    assert [plan.fits for plan in plans] == [False, True]


def test_alternatives_fit_and_come_fastest_first() -> None:
    plan = full_plan("3_sft.yaml", 32)
    others = alternatives(plan)
    assert others and all(other.fits for other in others)
    speeds = [other.tokens_per_second for other in others]
    assert speeds == sorted(speeds, reverse=True)
    layouts = [replace(other.recipe.parallel) for other in others]
    assert all(layouts.count(layout) == 1 for layout in layouts)


def test_memory_answers_to_what_should_lower_it() -> None:
    base = full_plan("3_sft.yaml", 64)
    for override in (
        "parallel.recompute=moe",
        "parallel.recompute=none",
        "parallel.tensor_model_parallel_size=2",
        "data.seq_length=32768",
    ):
        assert full_plan("3_sft.yaml", 64, override).peak_bytes > base.peak_bytes, override
    for override in ("model.vision=null", "parallel.pipeline_model_parallel_size=2"):
        assert full_plan("3_sft.yaml", 64, override).peak_bytes < base.peak_bytes, override
    shorter, stage = full_plan("3_sft.yaml", 64, "data.seq_length=8192").stages[0], base.stages[0]
    for part in ("language", "encoders", "loss", "working"):
        assert getattr(shorter, part) < getattr(stage, part) or part == "encoders", part
    stages = full_plan("3_sft.yaml", 64, "parallel.pipeline_model_parallel_size=4").stages
    in_flight = [round(stage.language / stages[-1].language) for stage in stages]
    assert in_flight == [4, 3, 2, 1]  # 1F1B, 4 micro-batches a step


def test_gradients_that_tensor_parallel_ranks_sum_are_counted() -> None:
    """3_sft trains gate, shared experts, projectors and new token rows, whole on each of its four ranks: a rank sends and
    receives its share among 16 data-parallel ranks, in place."""
    plan = full_plan("3_sft.yaml", 64)
    counts = count_parameters(plan.recipe.model)
    whole = 4 * (counts.gate + counts.shared_experts + counts.projectors + 2 * 42 * 3584)
    assert tensor_reduced_bytes(plan.recipe, 64, stage=0) == whole / 16
    plain = replace(plan.recipe, optim=replace(plan.recipe.optim, use_distributed_optimizer=False))
    assert tensor_reduced_bytes(plain, 64, stage=0) == whole
    alone = replace(plan.recipe.parallel, tensor_model_parallel_size=1)
    assert tensor_reduced_bytes(replace(plan.recipe, parallel=alone), 64, stage=0) == 0


def test_tensor_parallel_ranks_share_the_encoders() -> None:
    """Of 64 tiles and 2 chunks each of four ranks computes 16 and 1: a quarter of the time of the tiles, half of the chunks'.
    It keeps as much less, but for the gathered rows of all."""
    recipe = full_plan("4_anneal.yaml", 64).recipe
    batch = replace(heaviest_batch(recipe), tiles=64.0, chunks=2.0)

    def seconds(tp: int, batch: MicroBatch) -> float:
        layout = replace(recipe, parallel=replace(recipe.parallel, tensor_model_parallel_size=tp))
        shares = replace(STATED, memory=1e9)
        world = 16 * tp  # as many micro-batches a rank
        return make_plan(layout, world_size=world, gpu=GPUS["H100-80GB"], batch=batch, efficiency=shares).step.encoders

    for medium, kept in (({"chunks": 0.0}, 16), ({"tiles": 0.0}, 1)):
        some = replace(batch, **medium)
        alone = replace(some, **{name: kept for name in ("tiles", "chunks") if getattr(some, name)})
        assert seconds(4, some) == pytest.approx(seconds(1, alone), rel=1e-6)
    one, four = (
        Activations(replace(recipe, parallel=replace(recipe.parallel, tensor_model_parallel_size=tp)), batch)
        for tp in (1, 4)
    )
    model = recipe.model
    assert model.vision is not None and model.audio is not None
    for whole, share, parts, rows in (
        (one.vision(), four.vision(), 4, 64 * model.vision.pooled_side**2),
        (one.audio(), four.audio(), 2, 2 * model.audio.num_query_tokens),
    ):
        places, gathered = rows * 8, rows * model.hidden_size * 2
        filled = gathered * 4 / 2 if parts == 2 else gathered  # two of four ranks have no chunk, and send fill-up
        assert share - filled - places == pytest.approx((whole - gathered - places) / parts)


def test_a_loss_of_many_labels_keeps_no_logits() -> None:
    """Twice the labels: twice the rows that are kept, the same chunk of logits."""
    recipe = full_plan("3_sft.yaml", 64).recipe
    few, many = (
        make_plan(recipe, world_size=64, gpu=GPUS["H100-80GB"], batch=heaviest_batch(recipe, label_share=share))
        for share in (0.5, 1.0)
    )
    norm = Activations(recipe, few.batch).norm()
    assert many.stages[0].loss - norm == pytest.approx(2 * (few.stages[0].loss - norm), rel=0.01)
    assert few.stages[0].loss < 2**30 and few.stages[0].working == many.stages[0].working


def test_step_time_by_hand() -> None:
    """One dense layer of known sizes on one GPU whose every share is 1: forward, two backward products, half a square."""
    recipe = recipe_from_dict(
        {
            "model": {"num_layers": 1, "moe": None, "vision": None, "audio": None, "vocab_size": 1280},
            "data": {"seq_length": 1024, "micro_batch_size": 2, "global_batch_size": 4},
        }
    )
    shares = Efficiency(dense=1.0, experts=1.0, attention=1.0, encoders=1.0, memory=1e9, links=1.0)
    batch = MicroBatch(rows=2, length=1024, label_tokens=100)
    plan = make_plan(recipe, world_size=1, gpu=GPUS["H100-80GB"], batch=batch, efficiency=shares)
    tokens, width, ffn = 2048, 3584, 18944
    flops = 6 * tokens * (width * (2 * 3584 + 2 * 512) + 3 * width * ffn) + 6 * 100 * width * 1280
    flops += 3 * 4 * tokens * 1025 / 2 * 3584
    assert plan.step.total == pytest.approx(2 * flops / 989e12, rel=1e-3)
    assert plan.step.messages == plan.step.gradients == plan.step.bubble == plan.step.encoders == 0.0


def test_packed_samples_have_the_pairs_of_their_lengths() -> None:
    recipe = full_plan("3_sft.yaml", 64).recipe
    assert recipe.data.packing and recipe.data.seq_length == 16384
    whole, packed = heaviest_batch(recipe), heaviest_batch(recipe, sample_length=1560)
    assert whole.pairs == whole.rows * 16384 * 16385 / 2
    assert packed.lengths == packed.rows * (*[1560] * 10, 784)
    assert packed.pairs == packed.rows * (10 * 1560 * 1561 + 784 * 785) / 2
    plans = [make_plan(recipe, world_size=64, gpu=GPUS["H100-80GB"], batch=batch) for batch in (whole, packed)]
    assert plans[1].step.attention < plans[0].step.attention and plans[1].mfu < plans[0].mfu * 1.2


def test_expected_mean_k_is_that_of_independent_logits() -> None:
    """Of 5 slots 2.92 are drawn by sampling and 2.46 by sorting; four fifths of them are real."""
    assert expected_mean_k(MoEConfig()) == pytest.approx(0.8 * 2.92, abs=0.05)
    assert expected_mean_k(MoEConfig(sample_experts=False)) == pytest.approx(0.8 * 2.46, abs=0.05)
    assert expected_mean_k(MoEConfig(top_k=2, num_null_experts=0)) == 2.0


def batches_of(name: str, gpus: int) -> list[AtBatch]:
    recipe = load_recipe(ROOT / "recipes" / name, [])
    return list(at_batches(recipe, world_size=gpus, batch_of=heaviest_batch, gpu=GPUS["H100-80GB"]))


def test_a_batch_bounds_the_replicas_and_a_larger_one_is_faster() -> None:
    first, *_, last = batches_of("3_sft.yaml", 512)
    assert (first.sequences, first.factor) == (32, 1)
    for plan in first.plans:  # 512 GPUs for at most 32 replicas
        p = plan.recipe.parallel
        ranks = p.tensor_model_parallel_size * p.context_parallel_size * p.pipeline_model_parallel_size
        assert ranks >= 512 / 32 and num_micro_batches(plan.recipe, 512) == 32 * ranks / 512
        assert (plan.step.bubble > 0) == (p.pipeline_model_parallel_size > 1)
    assert last.plans[0].tokens_per_second > 1.5 * first.plans[0].tokens_per_second


def test_more_gpus_than_the_model_and_the_batch_can_be_cut_into() -> None:
    recipe = load_recipe(ROOT / "recipes" / "3_sft.yaml", [])
    assert fewest_sequences(recipe, 4096) == 4096 // (4 * 4 * 4)  # TP, CP, PP: of 28 blocks 1, 2 and 4 divide 4,096
    none = at_batch(recipe, factor=1, world_size=4096, batch_of=heaviest_batch, gpu=GPUS["H100-80GB"])
    assert none.plans == [] and none.tightest is None
    (tight,) = batches_of("3_sft.yaml", 4)
    assert tight.plans == [] and tight.tightest is not None and not tight.tightest.fits


def test_the_short_search_finds_what_all_layouts_hold() -> None:
    recipe = load_recipe(ROOT / "recipes" / "3_sft.yaml", [])
    everything = alternatives(full_plan("3_sft.yaml", 64))
    found = at_batch(recipe, factor=1, world_size=64, batch_of=heaviest_batch, gpu=GPUS["H100-80GB"])
    whole = [plan for plan in found.plans if plan.recipe.parallel.context_parallel_size == 1]
    assert whole[0].recipe.parallel == everything[0].recipe.parallel


def test_plan_of_a_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "recipes" / "tiny" / "1_pretrain.yaml"
    stages = [{"name": "first", "recipe": str(recipe), "init_from": "somewhere"}]
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump({"run_dir": "run", "nproc_per_node": 2, "stages": stages}))
    assert main([str(tmp_path / "chain.yaml"), "--gpus", "16"]) == 0
    said = capsys.readouterr().out
    assert "first (" in said and "12 (x 2)  TP1 CP4 PP1 DP4 EP1, recompute none" in said
    assert main([str(tmp_path / "chain.yaml"), "--gpus", "8", "--tokens", "1e9"]) == 2


def test_measured_experts_replace_the_stated_share(tmp_path: Path) -> None:
    rows = [
        {"op": "expert_mlp", "contender": "omni", "dtype": "bf16", "direction": way, "gflops": rate}
        for way, rate in (("forward", 500e3), ("backward", 400e3))
    ]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, {**rows[0], "contender": "torch", "gflops": 1.0}]))
    gpu = GPUS["H100-80GB"]
    measured = with_measured_experts(STATED, tmp_path / "rows.json", gpu)
    assert measured.experts == pytest.approx(450e3 / 989e3) and measured.measured == ("experts",)
    (tmp_path / "none.json").write_text(json.dumps(rows[:0]))
    with pytest.raises(ValueError, match="no bf16 row"):
        with_measured_experts(STATED, tmp_path / "none.json", gpu)


def test_flops_of_the_encoders_are_those_of_their_products() -> None:
    """Counted by torch while they run: all but the patch embedding, the convolutions and the last projection."""
    vision = VisionConfig(
        image_size=56, hidden_size=64, ffn_hidden_size=192, num_layers=24, num_attention_heads=2, pooled_side=2
    )
    audio = AudioConfig(
        num_mel_bins=16, chunk_seconds=3.0, hidden_size=64, ffn_hidden_size=192, num_encoder_layers=6,
        num_decoder_layers=6, num_attention_heads=2, num_query_tokens=20, max_target_positions=20,
    )  # fmt: skip
    model = ModelConfig(hidden_size=96, vision=vision, audio=audio)
    for encoder, media, expected in (
        (VisionEncoder(vision, 96), torch.randn(2, 3, 56, 56), tile_forward(model)),
        (AudioEncoder(audio, 96), torch.randn(2, 16, 300), chunk_forward(model)),
    ):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(media)
        assert sum(expected) < counter.get_total_flops() / 2 < 1.06 * sum(expected)


def test_rates_agree_with_those_that_a_run_divides_by() -> None:
    for gpu in GPUS.values():
        assert PEAK_TFLOPS[gpu.name.partition("-")[0]] == gpu.tflops


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["recipes/layout/sft_64x80gb.yaml", "--gpus", "64"], 0, "fits"),
        (["recipes/3_sft.yaml", "--gpus", "8"], 1, "DOES NOT FIT"),
        (["recipes/3_sft.yaml", "--gpus", "6"], 2, "parallel.tensor_model_parallel_size=4"),
        (["recipes/3_sft.yaml", "--gpus", "512"], 2, "32  TP4 CP4 PP4 DP8 EP4, recompute none"),
        (["recipes/3_sft.yaml", "--gpus", "0"], 2, "--gpus 0: must be positive"),
        (["recipes/3_sft.yaml", "--gpus", "32", "--mean-k", "nan"], 2, "--mean-k nan: must be positive"),
        (["recipes/3_sft.yaml", "--gpus", "32", "--tiles=-1"], 2, "--tiles -1.0: must not be negative"),
    ],
)
def test_plan_command(arguments: list[str], status: int, said: str) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['tools/plan.py', *{arguments}]\n"
        "try:\n"
        "    runpy.run_path('tools/plan.py', run_name='__main__')\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr
