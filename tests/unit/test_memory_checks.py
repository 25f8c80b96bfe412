"""Settings that make what a rank holds smaller: each that cannot work, or does nothing, is refused by field, value and fix."""

from typing import Any

import pytest

from megatron_omni.config.load import recipe_from_dict
from megatron_omni.config.validate import validate

OFFLOAD = {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn"]}
LEAN = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"optim": {"precision": "fp32", "grad_reduce_in_fp32": False}},
            "grad_reduce_in_fp32=False: no effect with optim.precision=fp32",
        ),
        ({"optim": {"exp_avg_dtype": "bf16"}}, "optim.exp_avg_dtype=bf16: only Megatron's precision-aware"),
        (
            {"optim": LEAN | {"use_distributed_optimizer": False}},
            "use_precision_aware_optimizer=True: Megatron has it with the distributed optimizer alone",
        ),
        ({"optim": LEAN | {"adam_beta2": 0.999}}, "optim.adam_beta2=0.999: a mean that loses less than 1/256"),
        (
            {"optim": {"precision": "fp32", "use_precision_aware_optimizer": True}},
            "use_precision_aware_optimizer=True: needs master weights",
        ),
        (
            {"optim": {"use_precision_aware_optimizer": True}},
            "=True: no effect while gradients and both moments are",
        ),
        (
            {"optim": {"optimizer_offload_fraction": 0.5}},
            "optimizer_offload_fraction=0.5, .*: no effect without optimizer_cpu_offload",
        ),
        ({"optim": {"optimizer_cpu_offload": True}}, "set optim.use_precision_aware_optimizer=true"),
        ({"optim": LEAN | {"optimizer_cpu_offload": True}}, "no effect with optimizer_cpu_offload=true"),
        ({"parallel": {"offload_modules": ["core_attn"]}}, "no effect without fine_grained_activation_offloading"),
        ({"parallel": OFFLOAD | {"offload_modules": []}}, "of which modules"),
        ({"parallel": OFFLOAD | {"offload_modules": ["moe_act"]}}, "no module 'moe_act' that can be offloaded"),
        ({"parallel": OFFLOAD | {"offload_modules": ["attn_proj"]}}, "add core_attn"),
        ({"parallel": OFFLOAD | {"recompute": "full"}}, "nothing to offload with parallel.recompute=full"),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        validate(recipe_from_dict(values), world_size=1, check_files=False)
