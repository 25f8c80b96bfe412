"""Recipes: loading, overrides, and every refusal names the field, the value and the fix."""

from pathlib import Path

import pytest

from megatron_omni.config.load import load_recipe, recipe_from_dict, recipe_to_dict, recipe_to_yaml
from megatron_omni.config.run import Recipe
from megatron_omni.config.validate import data_parallel_size, num_micro_batches, validate


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_extends_file_and_override_apply_in_that_order(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "seed: 1\ntrain_iters: 5\noptim: {lr: 1e-3, clip_grad: 0.5}\n")
    recipe = load_recipe(
        write(tmp_path / "child.yaml", "extends: base.yaml\nseed: 2\noptim: {lr: 2e-3}\n"), ["optim.lr=3e-3"]
    )
    assert (recipe.seed, recipe.train_iters, recipe.optim.lr, recipe.optim.clip_grad) == (2, 5, 3e-3, 0.5)


def test_resolved_yaml_loads_to_the_same_recipe(tmp_path: Path) -> None:
    recipe = recipe_from_dict({"model": {"moe": {"top_p": 0.5}, "audio": None}, "freeze": ["vision"]})
    again = load_recipe(write(tmp_path / "r.yaml", recipe_to_yaml(recipe)))
    assert recipe_to_dict(again) == recipe_to_dict(recipe)
    assert again.model.audio is None and again.model.moe is not None and again.model.moe.top_p == 0.5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.learning_rate=1", "unknown field 'optim.learning_rate'"),
        ("lr=1", "did you mean 'optim.lr'"),
        ("model.moe.topp=0.5", "did you mean 'top_p'"),
        ("optim.lr=fast", "optim.lr"),
        ("model.moe.gradient_estimator=heun", "gradient_estimator"),
        ("train_iters", "write key=value"),
        ("run_dir=${oc.env:HOME}", "not expanded"),
    ],
)
def test_bad_overrides_are_named(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected.replace("$", "\\$").replace("{", "\\{")):
        load_recipe(write(tmp_path / "r.yaml", "seed: 1\n"), [override])


def test_missing_file_loop_and_non_mapping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such recipe"):
        load_recipe(tmp_path / "absent.yaml")
    write(tmp_path / "a.yaml", "extends: a.yaml\n")
    with pytest.raises(ValueError, match="extends"):
        load_recipe(tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="mapping"):
        load_recipe(write(tmp_path / "list.yaml", "- 1\n- 2\n"))


@pytest.mark.parametrize(
    ("values", "world_size", "expected"),
    [
        ({"model": {"moe": {"top_p": 0.0}}}, 1, r"model.moe.top_p=0.0: must lie in \(0, 1\]"),
        ({"model": {"moe": {"top_p": 1.2}}}, 1, r"model.moe.top_p=1.2"),
        ({"parallel": {"tensor_model_parallel_size": 3}}, 6, "does not divide model.num_attention_heads=28"),
        ({"parallel": {"tensor_model_parallel_size": 2}}, 3, r"does not divide the 3 rank\(s\)"),
        ({"parallel": {"pipeline_model_parallel_size": 3}}, 3, "does not divide model.num_layers=28"),
        ({"parallel": {"expert_model_parallel_size": 3}}, 3, "does not divide model.moe.num_routed_experts=4"),
        ({"model": {"moe": None}, "parallel": {"expert_model_parallel_size": 2}}, 2, "no effect in a dense model"),
        ({"data": {"global_batch_size": 2}}, 4, "more ranks than work"),
        ({"data": {"global_batch_size": 6}}, 4, "no multiple"),
        ({"model": {"mrope_section": [1, 2, 3]}}, 1, "mrope_section"),
        (
            {"model": {"vision": {"stem": "conv"}}},
            1,
            "model.vision.patch_size=14: model.vision.stem=conv .* power of two",
        ),
        ({"model": {"audio": {"num_query_tokens": 100}}}, 1, "20 tokens stand for 3 seconds"),
        ({"model": {"moe": {"routing_weight_mode": "release"}}}, 1, "gradient_estimator='paper'"),
        ({"freeze": ["audo"]}, 1, "unknown part 'audo'"),
        ({"optim": {"lr_warmup_iters": 5000}}, 1, "lr_warmup_iters"),
        ({"optim": {"lr_warmup_iters": -1}}, 1, "optim.lr_warmup_iters=-1: must not be negative"),
        ({"optim": {"clip_grad": -1.0}}, 1, "optim.clip_grad=-1.0: must not be negative"),
        ({"optim": {"adam_beta2": 1.0}}, 1, r"optim.adam_beta2=1.0: must lie in \[0, 1\)"),
        ({"optim": {"lr": float("nan")}}, 1, "optim.lr=nan: must be a finite number"),
        (
            {"data": {"sources": [{"name": "s", "path": "x", "loss_weight": float("inf")}]}},
            1,
            r"data.sources.0.loss_weight=inf: must be a finite number",
        ),
        ({"optim": {"lr_scale": {"gate": -1.0}}}, 1, "optim.lr_scale.gate=-1.0: must be positive"),
        ({"optim": {"lr_scale": {"new_token_rows": 2.0}}}, 1, "lr_scale.new_token_rows: no effect"),
        ({"log": {"eval_iters": 0}}, 1, "log.eval_iters=0: must be positive"),
        (
            {"optim": {"lr_decay_style": "WSD"}},
            1,
            "lr_wsd_decay_iters=None: WSD needs the steps of its decay, 1 to 1000",
        ),
        ({"optim": {"lr_wsd_decay_iters": 5}}, 1, "lr_wsd_decay_iters=5: no effect with lr_decay_style=cosine"),
        ({"load": "x", "init_from": "y"}, 1, "load and init_from"),
        ({"init_allow_extra": ["audio.*"]}, 1, "no effect without init_from"),
        ({"checkpoint": {"keep_best": "eval/loss"}}, 1, "keep_best=eval/loss: nothing is evaluated"),
        (
            {
                "data": {"eval_sources": [{"name": "held_out", "path": "x"}]},
                "checkpoint": {"keep_best": "eval/loss/other", "save_interval": 10},
                "log": {"eval_interval": 5},
            },
            1,
            "no such metric; choose one of eval/loss, eval/loss/held_out",
        ),
        (
            {
                "data": {"eval_sources": [{"name": "held_out", "path": "x"}]},
                "checkpoint": {"keep_best": "eval/loss", "save_interval": 10},
                "log": {"eval_interval": 4},
            },
            1,
            "save_interval=10 must be a multiple of log.eval_interval=4",
        ),
        ({"model": {"moe": None, "lora": {}}}, 1, r"set it to \[attention\]"),
        ({"model": {"lora": {"targets": ["gate"]}}}, 1, "name one or both of attention, experts"),
        ({"model": {"lora": {"dropout": 1.0}}}, 1, "model.lora.dropout=1.0"),
        (
            {"model": {"lora": {}, "moe": {"kernels": "megatron"}}},
            1,
            "model.moe.kernels='megatron': experts with adapters",
        ),
        ({"model": {"lora": {}}, "parallel": {"expert_tensor_parallel_size": 2}}, 2, "adapters of experts are whole"),
    ],
)
def test_impossible_recipes_are_refused(values: dict, world_size: int, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        validate(recipe_from_dict(values), world_size=world_size, check_files=False)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        validate(recipe_from_dict({"model": {"moe": {"top_p": 2.0}}, "train_iters": -1}), check_files=False)
    assert "top_p" in str(caught.value) and "train_iters" in str(caught.value)


def test_missing_data_files_are_named() -> None:
    recipe = recipe_from_dict(
        {"data": {"sources": [{"name": "s", "path": "absent.jsonl"}], "tokenizer": "absent.model"}}
    )
    with pytest.raises(ValueError) as caught:
        validate(recipe)
    assert "absent.jsonl" in str(caught.value) and "absent.model" in str(caught.value)


def test_data_parallel_size_and_micro_batches() -> None:
    recipe = recipe_from_dict(
        {"parallel": {"tensor_model_parallel_size": 2}, "data": {"global_batch_size": 16, "micro_batch_size": 2}}
    )
    assert data_parallel_size(recipe.parallel, 8) == 4
    assert num_micro_batches(recipe, 8) == 2


def test_defaults_are_the_full_model() -> None:
    validate(Recipe(), world_size=8, check_files=False)
