"""Recipes: loading, overrides, and every refusal names the field, the value and the fix."""

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_omni.chain import ChainConfig
from megatron_omni.config.data import EvalSourceConfig, SourceConfig
from megatron_omni.config.generators import CodecConfig, PictureCodecConfig, SpeechConfig
from megatron_omni.config.load import load_recipe, recipe_from_dict, recipe_to_dict, recipe_to_yaml
from megatron_omni.config.model import LoraConfig
from megatron_omni.config.parts import PARTS
from megatron_omni.config.pictures import ImageGeneratorConfig
from megatron_omni.config.ranges import RANGE
from megatron_omni.config.run import Recipe
from megatron_omni.config.shards import expand_braces
from megatron_omni.config.validate import data_parallel_size, fewest_ranks, num_micro_batches, validate
from tools import config_docs

SOURCES = "data: {sources: [{name: a, path: a.jsonl, weight: 3, reweight: {10: 0.5}}, {name: b, path: b.jsonl}]}\n"


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


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.learning_rate=1", "unknown field 'optim.learning_rate'"),
        ("lr=1", "did you mean 'optim.lr'"),
        ("model.moe.topp=0.5", "did you mean 'top_p'"),
        ("parallel.num_distributed_optimizer_instances=2", "always cut over all data-parallel ranks"),
        ("parallel.nccl_communicator_config_path=nccl.yaml", "NCCL_MAX_CTAS"),
        ("parallel.context_parallel=2", "did you mean 'context_parallel_size'"),
        ("optim.main_grads_dtype=bf16", "set optim.grad_reduce_in_fp32"),
        ("optim.exp_avg_dtype=fp8", "optim.exp_avg_dtype"),
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
        ({"model": {"moe": {"top_p": 0.0}}}, 1, "model.moe.top_p=0.0: must be above 0 and at most 1"),
        ({"model": {"moe": {"top_p": 1.2}}}, 1, r"model.moe.top_p=1.2"),
        ({"parallel": {"tensor_model_parallel_size": 3}}, 6, "does not divide model.num_attention_heads=28"),
        (
            {"parallel": {"tensor_model_parallel_size": 7}},
            7,
            "num_query_groups=4: key and value heads are cut, never copied",
        ),
        ({"parallel": {"tensor_model_parallel_size": 2}}, 3, r"does not divide the 3 rank\(s\)"),
        (
            {"parallel": {"context_parallel_size": 2, "tensor_model_parallel_size": 2}},
            6,
            r"tensor_model_parallel_size=2 x context_parallel_size=2 .* = 4 does not divide the 6 rank\(s\)",
        ),
        (
            {"parallel": {"context_parallel_size": 2, "tensor_model_parallel_size": 2}, "data": {"seq_length": 4100}},
            4,
            "data.seq_length=4100: parallel.context_parallel_size=2 .* a multiple of 8, such as 4104",
        ),
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
        ({"model": {"moe": {"top_k": 6}}}, 1, r"moe.top_k=6: must lie in 1..5"),
        ({"model": {"moe": {"max_routed": 0}}}, 1, "moe.max_routed=0: must be at least 1"),
        ({"model": {"moe": {"max_routed": 5}}}, 1, r"moe.max_routed=5: must lie in 1..4"),
        ({"model": {"moe": {"capacity_factor": 0.0}}}, 1, "moe.capacity_factor=0.0: must be above 0"),
        ({"model": {"moe": {"input_jitter": 1.0}}}, 1, "moe.input_jitter=1.0: must be at least 0 and below 1"),
        ({"model": {"moe": {"num_routed_experts": 0}}}, 1, "moe.num_routed_experts=0: must be at least 1"),
        ({"freeze": ["audo"]}, 1, r"unknown part 'audo'; did you mean 'audio'\? parts are"),
        ({"optim": {"lr_warmup_iters": 5000}}, 1, "lr_warmup_iters"),
        ({"optim": {"lr_warmup_iters": -1}}, 1, "optim.lr_warmup_iters=-1: must be at least 0"),
        ({"optim": {"clip_grad": -1.0}}, 1, "optim.clip_grad=-1.0: must be at least 0"),
        ({"optim": {"adam_beta2": 1.0}}, 1, "optim.adam_beta2=1.0: must be at least 0 and below 1"),
        ({"optim": {"lr": float("nan")}}, 1, "optim.lr=nan: must be a finite number"),
        (
            {"data": {"sources": [{"name": "s", "path": "x", "loss_weight": float("inf")}]}},
            1,
            r"data.sources.s.loss_weight=inf: must be a finite number",
        ),
        (
            {"optim": {"lr_scale": {"gate": -1.0}}},
            1,
            "optim.lr_scale.gate=-1.0: must be above 0 and at most 1,000,000; freeze",
        ),
        (
            {"parallel": OVERLAP, "optim": {"use_distributed_optimizer": False}},
            2,
            "overlap_param_gather=True: only with",
        ),
        (
            {"parallel": {"overlap_param_gather": True}},
            2,
            "overlap_param_gather=True: no effect without overlap_grad_red",
        ),
        (
            {"parallel": {"bucket_size": 9}, "optim": {"use_distributed_optimizer": False}},
            2,
            "bucket_size=9: no effect",
        ),
        ({"parallel": {"bucket_size": 0}}, 2, "parallel.bucket_size=0"),
        ({"optim": {"lr_scale": {"new_token_rows": 2.0}}}, 1, "lr_scale.new_token_rows: no effect"),
        ({"log": {"eval_iters": 0}}, 1, "log.eval_iters=0: must be at least 1"),
        (
            {"optim": {"lr_decay_style": "WSD"}},
            1,
            "lr_wsd_decay_iters=None: WSD needs the steps of its decay, 1 to 1000",
        ),
        ({"optim": {"lr_wsd_decay_iters": 5}}, 1, "lr_wsd_decay_iters=5: no effect with lr_decay_style=cosine"),
        ({"load": "x", "init_from": "y"}, 1, "load and init_from"),
        ({"init_allow_extra": ["audio.*"]}, 1, "no effect without init_from"),
        ({"init_allow_changed": ["model.rotary_base"]}, 1, "no effect without init_from"),
        ({"init_from": "x", "init_allow_changed": ["rotary_base"]}, 1, "init_allow_changed: 'rotary_base' is no field"),
        ({"load": "auto", "overwrite": True}, 1, "overwrite=true, load=auto: one deletes"),
        ({"model": {"lora": {}}, "freeze": ["vision"]}, 1, r"freeze=\['vision'\]: no effect with model.lora"),
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
        ({"model": {"mrope_section": [64]}}, 1, "must be three numbers"),
        (
            {"model": {"megatron": {"hidden_size": 7}}},
            1,
            "megatron.hidden_size=7: decided by .*; set model.hidden_size",
        ),
        (
            {"model": {"megatron": {"bf16": False}}},
            1,
            "megatron.bf16=False: decided by .*; it follows from optim.precision",
        ),
        ({"model": {"megatron": {"nonsense": 1}}}, 1, "TransformerConfig has no such field"),
        ({"model": {"megatron": {"qk_layernrm": True}}}, 1, "did you mean 'qk_layernorm'"),
        (
            {"model": {"audio": {"hidden_size": 1285, "num_attention_heads": 5}}},
            1,
            "audio.hidden_size=1285: must be even",
        ),
        ({"data": {"min_frames": 40}}, 1, "data.min_frames=40: above data.max_frames_with_audio=32"),
        ({"freeze": list(PARTS)}, 1, "nothing is left to train"),
        (
            {"model": {"moe": None}, "freeze": [p for p in PARTS if "expert" not in p]},
            1,
            "nothing is left to train",
        ),
        (
            {"data": {"eval_sources": [{"name": "e", "path": "a"}, {"name": "e", "path": "b"}]}},
            1,
            "data.eval_sources: names must differ",
        ),
        ({"data": {"sources": [{"name": "../a", "path": "a"}]}}, 1, "name='../a': names are words without '/'"),
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


# ------------------------------------------------------------------------------------------------ text of files and words


@pytest.mark.parametrize(
    ("word", "field", "value"),
    [
        ("train_iters=010", "train_iters", 10),
        ("train_iters=0100", "train_iters", 100),
        ("train_iters=0x10", "train_iters", 16),
        ("train_iters=0o17", "train_iters", 15),
        ("optim.lr=1e-5", "optim.lr", 1e-5),
        ("optim.lr=+.5", "optim.lr", 0.5),
        ("run_dir=no", "run_dir", "no"),
        ("run_dir=010", "run_dir", "010"),
        ("run_dir=1e3", "run_dir", "1e3"),
        ("run_dir=2026-01-02", "run_dir", "2026-01-02"),
        ("run_dir='a: b'", "run_dir", "a: b"),
        ("load=null", "load", None),
        ("load=", "load", None),
        ("data.system_prompt=", "data.system_prompt", ""),
        ("model.moe.gradient_estimator=none", "model.moe.gradient_estimator", "none"),
        ("model.moe=null", "model.moe", None),
        ("log.tensorboard=false", "log.tensorboard", False),
    ],
)
@pytest.mark.parametrize("where", ["override", "file"])
def test_values_are_read_as_they_were_typed(tmp_path: Path, word: str, field: str, value: Any, where: str) -> None:
    key, _, text = word.partition("=")
    written = text
    for part in reversed(key.split(".")):
        written = f"{{{part}: {written}}}"
    recipe = load_recipe(
        write(tmp_path / "r.yaml", "seed: 1\n" if where == "override" else written), [word] * (where == "override")
    )
    for name in field.split("."):
        recipe = getattr(recipe, name)
    assert recipe == value and type(recipe) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.lr=1:30", "optim.lr: Value '1:30'"),
        ("train_iters=10:00", "train_iters: Value '10:00'"),
        ("train_iters=1.5", "train_iters"),
        ("train_iters=", "train_iters"),
        ("run_dir=null", "run_dir"),
        ("run_dir=$HOME/x", r"run_dir=\$HOME/x: '\$' and zero bytes are refused"),
        ("run_dir=~nobody_of_this_name/x", "no such user"),
        ("run_dir=???", "not expanded"),
        ("seed=" + "9" * 5000, "seed"),
        ("optim=[", "not a value that YAML can read"),
        ("optim=" + "[" * 2000, "nested too deeply"),
        ("freeze=[&a vision, *a]", "an alias"),
        ("optim={lr: 1, lr: 2}", "'lr' is there twice"),
        ("data.sources.c.weight=2", "data.sources.c: has no path; give it one .there are a, b"),
        ("data.sources.0.path=", "items go by their names, not by their places; there are a, b"),
        ("data.sources[0].path=x", "items of a list go by their names"),
        ("data.sources.c=null", "no such item to take out; there are a, b"),
        ("data.sources.a=3", "give fields of it"),
        ("data.sources.a.wait=3", "unknown field 'data.sources.a.wait'; did you mean 'weight'"),
        ("data.sources.a.reweight={x: 1}", "data.sources"),
        ("data.sources=[{path: x}]", r"data.sources\[0\]: has no name; give it one"),
        ("data.eval_sources=[{name: x}]", r"data.eval_sources\[0\]: has no path; give it one"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_place(tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(write(tmp_path / "r.yaml", SOURCES), [word])
    text = str(caught.value)
    assert text.startswith("override '") and "\n" not in text and len(text) < 600


def test_a_file_with_the_same_faults_is_named(tmp_path: Path) -> None:
    for text in ("data: {sources: [{path: x}]}", "a: &a 1\nb: *a", "seed: 1\nseed: 2", "seed: [1", "run_dir: ???"):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "r.yaml"))):
            load_recipe(write(tmp_path / "r.yaml", text))


def test_home_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/of/me")
    words = ["run_dir=~/run", "init_from=~/in", "load=~/there", "data.tokenizer=~/t", "data.sources.a.path=~/a/{0..3}"]
    recipe = load_recipe(write(tmp_path / "r.yaml", SOURCES), words)
    found = [recipe.run_dir, recipe.init_from, recipe.load, recipe.data.tokenizer, recipe.data.sources[0].path]
    assert found == ["/of/me/run", "/of/me/in", "/of/me/there", "/of/me/t", "/of/me/a/{0..3}"]
    assert load_recipe(tmp_path / "r.yaml", ["data.system_prompt=~/x $5"]).data.system_prompt == "~/x $5"


def test_sources_are_changed_added_and_taken_out_by_name(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", SOURCES)
    child = "extends: base.yaml\ndata: {sources: {b: {weight: 2}, c: {path: c.jsonl}}, eval_sources: {e: {path: e}}}\n"
    recipe = load_recipe(
        write(tmp_path / "r.yaml", child), ["data.sources.a.reweight.20=0.1", "data.sources.b.epochs=2"]
    )
    a, b, c = recipe.data.sources
    assert (a.name, a.weight, a.reweight) == ("a", 3.0, {10: 0.5, 20: 0.1})
    assert (b.name, b.path, b.weight, b.epochs) == ("b", "b.jsonl", 2.0, 2.0)
    assert c == SourceConfig(name="c", path="c.jsonl")
    assert recipe.data.eval_sources == [EvalSourceConfig(name="e", path="e")]
    assert [s.name for s in load_recipe(tmp_path / "r.yaml", ["data.sources.a=null"]).data.sources] == ["b", "c"]
    assert [s.name for s in load_recipe(tmp_path / "r.yaml", ["data.sources=[{name: z, path: z}]"]).data.sources] == [
        "z"
    ]


# ------------------------------------------------------------------------------------------------ ranges


def schemas(of: Any) -> Iterator[type]:
    """Every dataclass in the tree of a schema, once each place."""
    if isinstance(of, type) and dataclasses.is_dataclass(of):
        yield of
        for hint in typing.get_type_hints(of).values():
            yield from schemas(hint)
    for inner in typing.get_args(of):
        yield from schemas(inner)


def holds_numbers(hint: Any) -> bool:
    return hint in (int, float) or (
        typing.get_origin(hint) is not typing.Literal and any(map(holds_numbers, typing.get_args(hint)))
    )


@pytest.mark.parametrize(
    "schema", [*dict.fromkeys([*schemas(Recipe), *schemas(ChainConfig)])], ids=lambda s: s.__name__
)
def test_every_number_has_a_range_that_its_default_is_in(schema: type) -> None:
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        numbers, allowed = holds_numbers(hints[item.name]), item.metadata.get(RANGE)
        assert numbers == (allowed is not None), f"{schema.__name__}.{item.name}: give it a range by config/ranges.py"
        default = item.default_factory() if callable(item.default_factory) else item.default
        for value in default if isinstance(default, list) else [default]:
            assert not numbers or value is None or isinstance(value, dict) or value in allowed, item.name


def test_every_field_says_what_it_is() -> None:
    for name, schema in config_docs.GROUPS:
        for field, text in config_docs.field_docs(schema).items():
            assert text, f"{name}.{field} has no docstring"
            assert "spec " not in text, f"{name}.{field} points to a document that users do not have"


def outside(recipe: Recipe) -> Iterator[tuple[str, float]]:
    """(dotted field, value just outside its range) for both ends of every range of scalar fields."""
    for group, schema in (("", Recipe), *((n, s) for n, s in config_docs.GROUPS if n[0] not in "(" and "[" not in n)):
        for item in dataclasses.fields(schema):
            allowed = item.metadata.get(RANGE)
            if allowed is None or item.default is dataclasses.MISSING:
                continue
            step = 1 if "int" in str(typing.get_type_hints(schema)[item.name]) else 1e-3
            name = f"{group}.{item.name}".lstrip(".")
            yield name, allowed.above if allowed.above is not None else allowed.at_least - step
            yield name, allowed.below if allowed.below is not None else allowed.at_most + step


@pytest.mark.parametrize(("name", "value"), [*outside(Recipe())])
def test_a_number_outside_its_range_is_refused_by_name(name: str, value: float) -> None:
    recipe = Recipe()
    recipe.model.lora, recipe.model.speech, recipe.model.codec = LoraConfig(), SpeechConfig(), CodecConfig()
    recipe.model.image, recipe.model.picture_codec = ImageGeneratorConfig(), PictureCodecConfig()
    *groups, last = name.split(".")
    place: Any = recipe
    for group in groups:
        place = getattr(place, group)
    setattr(place, last, value)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}=\S+: must be "):
        validate(recipe, check_files=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.mrope_section", [65, -1, 0]),
        ("optim.lr_scale", {"vision": 1e300}),
        ("log.profile_steps", [0, 1]),
        ("data.sources", [{"name": "s", "path": "x", "reweight": {-1: 1.0}}]),
        ("data.sources", [{"name": "s", "path": "x", "reweight": {1: -1.0}}]),
        ("data.eval_sources", [{"name": "s", "path": "x", "weight": -1.0}]),
        ("seed", 10**400),
        ("model.megatron", {"softmax_scale": float("nan")}),
    ],
)
def test_numbers_in_lists_and_mappings_have_ranges_too(field: str, value: Any) -> None:
    for part in reversed(field.split(".")):
        value = {part: value}
    with pytest.raises(ValueError, match=rf"{field}\S*=\S+: must be "):
        validate(recipe_from_dict(value), check_files=False)


# ------------------------------------------------------------------------------------------------ files, ranks, sizes


def test_braces_are_counted_before_they_are_written_out() -> None:
    assert expand_braces("{0..2}{a,b}") == ["0a", "0b", "1a", "1b", "2a", "2b"]
    for pattern in ("{0..9}" * 7, "{0..99999999999999999}", "{a,b}" * 30, "{5..2}"):
        with pytest.raises(ValueError, match=re.escape(repr(pattern))):
            expand_braces(pattern)


@pytest.mark.parametrize("run_dir", ["/dev/null", "/dev/null/run", "FILE/run"])
def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path: Path, run_dir: str) -> None:
    write(tmp_path / "FILE", "")
    run_dir = str(tmp_path / run_dir) if run_dir.startswith("FILE") else run_dir
    with pytest.raises(ValueError, match=rf"run_dir='{run_dir}': '.*' is no directory"):
        validate(recipe_from_dict({"run_dir": run_dir}))


@pytest.mark.parametrize(
    ("sizes", "expected"), [((1, 1, 1, 1), 1), ((4, 1, 4, 1), 4), ((2, 3, 4, 1), 12), ((4, 1, 3, 2), 12)]
)
def test_fewest_ranks_of_a_layout(sizes: tuple[int, ...], expected: int) -> None:
    names = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")
    parallel = {f"{name}_parallel_size": size for name, size in zip(names, sizes, strict=True)}
    assert fewest_ranks(recipe_from_dict({"parallel": parallel}).parallel) == expected
