"""The Adam of a machine that has none of the libraries whose Adam Megatron-Core expects.

Megatron takes Transformer Engine's FusedAdam or Apex's, and without them torch's AdamW. With that its distributed optimizer
does not work as it is used here: the step count lies in the state of each parameter, where state that is made before the
first update lacks it, and where a resume gives all parameters one count. So where neither library is importable, on any
device, ``FusedAdam`` below takes the place, with Transformer Engine's interface: the step count is kept in ``param_groups``,
the layout that Megatron saves and restores correctly.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from megatron_omni.platform.patch import Patch


class FusedAdam(torch.optim.Optimizer):
    """AdamW (or Adam with L2) as Transformer Engine's FusedAdam: ``step`` lives in the parameter group, state holds
    tensors only.

    Parameters are updated by torch's fused kernel of their device. What it has not is refused when set.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        if capturable or not bias_correction:
            raise ValueError(
                f"FusedAdam: capturable={capturable} and bias_correction={bias_correction} are not supported"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; groups without gradients keep their state, but their step count advances with the others'."""
        loss = None if closure is None else closure()
        update = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            # Two parameters of a group may have gradients of different dtypes; the kernel wants one dtype a call.
            for dtype in {p.dtype for p in params}:
                same = [p for p in params if p.dtype == dtype]
                # The CUDA kernel reads the count on its device, without a host wait.
                count = torch.full((), float(group["step"]), device=same[0].device)
                update(
                    same,
                    [p.grad for p in same],
                    [self.state[p]["exp_avg"] for p in same],
                    [self.state[p]["exp_avg_sq"] for p in same],
                    [],
                    [count] * len(same),
                    amsgrad=False,
                    lr=float(group["lr"]),
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
        return loss


PATCHES: tuple[Patch, ...] = (
    Patch("megatron.core.optimizer:Adam", FusedAdam, "step in param_groups, as Transformer Engine's"),
    Patch("megatron.core.optimizer:USING_PYTORCH_OPTIMIZER", False, "pass adam_w_mode, not a torch class"),
    Patch("megatron.core.optimizer.distrib_optimizer:Adam", FusedAdam, "step in param_groups, as Transformer Engine's"),
    Patch("megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE", True, "read the step from param_groups"),
    Patch("megatron.core.optimizer.distrib_optimizer:USING_APEX_OPTIMIZER", True, "read the step from param_groups"),
)


def install_where_missing() -> None:
    """Let Megatron use ``FusedAdam`` where it found neither Transformer Engine's nor Apex's; imports ``megatron.core``."""
    if importlib.import_module("megatron.core.optimizer").USING_PYTORCH_OPTIMIZER:
        for patch in PATCHES:
            patch.apply()


def name() -> str:
    """Which Adam this process trains with, for the log."""
    package = importlib.import_module("megatron.core.optimizer").Adam.__module__.partition(".")[0]
    return {"megatron_omni": "own"}.get(package, package)
