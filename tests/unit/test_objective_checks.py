"""Objectives in a recipe: what cannot work is refused by name, and settings of a task that is not chosen are no decoration."""

from typing import Any

import pytest

from megatron_omni.config.load import recipe_from_dict, recipe_from_overrides
from megatron_omni.config.validate import validate

REWARD = {"rewards": [{"function": "accuracy"}]}


def reinforce(values: dict[str, Any] | None = None, **recipe: Any) -> dict[str, Any]:
    return {"task": "reinforce", "reinforce": REWARD | (values or {})} | recipe


def test_the_defaults_of_each_task_are_a_recipe() -> None:
    for values in (
        reinforce(),
        {"task": "preference", "init_from": "runs/6_gspo"},
        reinforce({"overlong": "penalize", "overlong_tokens": 64}),
    ):
        validate(recipe_from_dict(values), check_files=False)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            reinforce({"group_size": 1}),
            "reinforce.group_size=1: must be at least 2 .* compares responses to one prompt",
        ),
        (reinforce({"mini_batches": 0}), "reinforce.mini_batches=0: must be at least 1"),
        (reinforce({"temperature": 0.0}), "reinforce.temperature=0.0: must be above 0"),
        (reinforce({"top_p": 0.9}), "reinforce.top_p=0.9: a nucleus samples from another distribution .* set it to 1"),
        (reinforce({"rewards": []}), "reinforce.rewards is empty"),
        (
            reinforce({"rewards": [{"function": "mine.txt:f"}]}),
            "function='mine.txt:f': give the name of a reward, or FILE",
        ),
        (reinforce({"rewards": [{"function": "mine.py:f g"}]}), "function='mine.py:f g'"),
        (reinforce({"overlong": "penalize"}), "overlong=penalize, overlong_tokens=None"),
        (reinforce({"overlong_tokens": 9}), "overlong=none, overlong_tokens=9"),
        (
            reinforce({"overlong": "penalize", "overlong_tokens": 4096}),
            "overlong_tokens=4096: above max_new_tokens=2048",
        ),
        (reinforce({"max_new_tokens": 8192}), "max_new_tokens=8192: data.seq_length=8192 has to hold a prompt"),
        (reinforce({"resample": 1}, data={"batch_by": "source"}), "resample=1: data.batch_by=source deals whole steps"),
        (reinforce({"kl_coeff": 0.1}), "kl_coeff=0.1: .* init_from, which is not set"),
        (reinforce({"routes": "old"}, model={"moe": None}), "routes=old: no effect in a dense model"),
        (
            reinforce(
                {"routes": "rollout"}, model={"moe": {"routing_weight_mode": "release", "gradient_estimator": "grin"}}
            ),
            "routes=rollout: model.moe.routing_weight_mode=release weighs experts by the order",
        ),
        (reinforce(data={"packing": True}), "data.packing=True: with task=reinforce a sequence is one prompt"),
        (reinforce(model={"hidden_dropout": 0.1}), "model.hidden_dropout=0.1: with task=reinforce .* set it to 0"),
        ({"task": "preference", "model": {"lora": {}}}, "model.lora.dropout=0.05: with task=preference"),
        ({"reinforce": {"group_size": 4}}, "reinforce: no effect with task=supervised"),
        ({"task": "preference", "reinforce": {"clip_low": 0.2}}, "reinforce: no effect with task=preference"),
        ({"task": "preference"}, "init_from is null: with task=preference its weights are the reference"),
        (
            reinforce(data={"sources": [{"name": "a", "path": "a.jsonl", "loss_weight": 2.0}]}),
            "data.sources: loss_weight of a: no effect with task=reinforce",
        ),
        (reinforce(preference={"beta": 0.2}), "preference: no effect with task=reinforce"),
    ],
)
def test_what_cannot_work_is_refused_by_name(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        validate(recipe_from_dict(values), check_files=False)


def test_rewards_are_a_list_and_have_no_names() -> None:
    with pytest.raises(ValueError, match=r"reinforce\.rewards: its items have no names; give the whole list"):
        recipe_from_overrides(["reinforce.rewards.accuracy.weight=2"])
    recipe = recipe_from_overrides(["reinforce.rewards=[{function: think_format, weight: 0.5, settings: {a: [1]}}]"])
    assert (recipe.reinforce.rewards[0].weight, recipe.reinforce.rewards[0].settings) == (0.5, {"a": [1]})


def codec(**recipe: Any) -> dict[str, Any]:
    plain = {"moe": None, "vision": None, "audio": None, "codec": {}}
    model = plain | recipe.pop("model", {})
    return {"task": "codec", "optim": {"precision": "fp32"}} | recipe | {"model": model}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"task": "codec"}, "task=codec, model.codec null: .* set both or neither"),
        (codec(task="supervised"), "task=supervised, model.codec set"),
        (codec(model={"moe": {}}), "model.moe: no effect in a codec"),
        (
            codec(parallel={"tensor_model_parallel_size": 2}),
            "tensor_model_parallel_size=2: a codec is whole on every rank",
        ),
        (
            codec(parallel={"pipeline_model_parallel_size": 2}),
            "pipeline_model_parallel_size=2: a codec is whole on every rank",
        ),
        (codec(optim={"precision": "bf16"}), "optim.precision=bf16: .* set it to fp32"),
        (codec(init_from="runs/a"), "init_from='runs/a': a codec starts from nothing"),
        (codec(data={"packing": True}), "data.packing=True: no effect with task=codec"),
        (codec(data={"seq_length": 100}), "codec.crop_codes=120: above data.seq_length=100"),
        (codec(codec={"mel_bins": [16]}), "mel_bins=\\[16\\]: give as many of the one as of the other"),
        (codec(codec={"crop_codes": 1, "mel_fft_sizes": [2048], "mel_bins": [8]}), "longer than twice a crop"),
        (
            codec(codec={"adversarial_weight": 1.0, "adversarial_fft_sizes": [514]}),
            "adversarial_fft_sizes=\\[514\\]: give one or more multiples of 4",
        ),
        (codec(codec={"gain_db": [3.0, -3.0]}), "gain_db=\\[3.0, -3.0\\]: give the lowest and the highest"),
        ({"codec": {"crop_codes": 10}}, "codec: no effect with task=supervised"),
    ],
)
def test_a_codec_that_cannot_be_trained_is_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        validate(recipe_from_dict(values), check_files=False, world_size=2)


def test_a_codec_is_a_recipe() -> None:
    validate(recipe_from_dict(codec()), check_files=False)
