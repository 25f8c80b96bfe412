"""The Adam of a machine that has none of the libraries whose Adam Megatron-Core expects.

Megatron takes Transformer Engine's FusedAdam or Apex's, and without them torch's AdamW. With that its distributed optimizer
does not work as it is used here: the step count lies in the state of each parameter, where state that is made before the
first update lacks it, and where a resume gives all parameters one count. So where neither library is importable, on any
device, ``FusedAdam`` below takes the place, with Transformer Engine's interface: the step count is kept in ``param_groups``,
the layout that Megatron saves and restores correctly.
"""

import importlib
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_omni.platform.patch import Patch


class FusedAdam(torch.optim.Optimizer):
    """AdamW (or Adam with L2) as Transformer Engine's FusedAdam: ``step`` lives in the parameter group, state holds
    tensors only.

    Parameters are updated by torch's fused kernel of their device. With ``master_weights`` a 16-bit parameter has an fp32
    ``master_param`` in its state, which is updated and then rounded into it. Moments of another dtype than the parameter
    (or its master) are widened for an update, one parameter at a time, and rounded to the nearest again; arithmetic is fp32.
    ``use_decoupled_grad``: gradients are read from ``decoupled_grad``, which may have another dtype than the parameter.
    What it has not is refused when set.
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
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        if capturable or not bias_correction:
            raise ValueError(
                f"FusedAdam: capturable={capturable} and bias_correction={bias_correction} are not supported"
            )
        if store_param_remainders or master_weight_dtype != torch.float32:
            raise ValueError(
                f"FusedAdam: store_param_remainders={store_param_remainders} and master_weight_dtype={master_weight_dtype} "
                "are not supported; master weights are whole fp32 numbers"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode
        self.master_weights, self.use_decoupled_grad = master_weights, use_decoupled_grad
        self.moment_dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        if not set(self.moment_dtypes.values()) <= {torch.float32, torch.bfloat16}:
            raise ValueError(f"FusedAdam: moments are fp32 or bf16, not {self.moment_dtypes}")

    def initialize_state(self, param: Tensor, store_param_remainders: bool = False) -> None:
        """State of ``param`` before its first update: zeros, and its master weight."""
        assert not store_param_remainders
        self.state[param] = {name: torch.zeros_like(param, dtype=dtype) for name, dtype in self.moment_dtypes.items()}
        if self.master_weights:
            self.state[param]["master_param"] = param.detach().float()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but tensors of the state keep their dtypes, where torch's gives them their parameter's."""
        super().load_state_dict(state_dict | {"state": {}})
        numbers = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        states = state_dict["state"]
        self.state.update({p: dict(states[n]) for n, p in zip(numbers, params, strict=True) if n in states})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; groups without gradients keep their state, but their step count advances with the others'."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if self._gradient(p) is not None]
            for p in params:
                if not self.state[p]:
                    self.initialize_state(p)
            # Two parameters of a group may have gradients of different dtypes; the kernel wants one dtype a call.
            for dtype in {p.dtype for p in params}:
                same = [p for p in params if p.dtype == dtype]
                if self.master_weights or set(self.moment_dtypes.values()) != {dtype}:
                    for p in same:
                        self._update_widened(group, p)
                else:
                    moments = [[self.state[p][name] for p in same] for name in self.moment_dtypes]
                    self._update(group, same, [self._gradient(p) for p in same], *moments)
        return loss

    def _gradient(self, param: Tensor) -> Any:
        return getattr(param, "decoupled_grad", None) if self.use_decoupled_grad else param.grad

    def _update_widened(self, group: dict[str, Any], param: Tensor) -> None:
        state = self.state[param]
        wide = state.get("master_param", param).float()
        moments = [state[name].float() for name in self.moment_dtypes]
        self._update(group, [wide], [self._gradient(param).float()], *([moment] for moment in moments))
        # Nothing is done where they are the same tensor.
        for name, moment in zip(self.moment_dtypes, moments):
            state[name].copy_(moment)
        param.copy_(wide)

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], mean: list[Tensor], square: list[Tensor]
    ) -> None:
        """torch's kernel on tensors of one dtype, in place."""
        update = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        # The CUDA kernel reads the count on its device, without a host wait.
        count = torch.full((), float(group["step"]), device=params[0].device)
        update(
            params,
            grads,
            mean,
            square,
            [],
            [count] * len(params),
            amsgrad=False,
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


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


def check_precision_aware() -> None:
    """ValueError where the Adam that Megatron took cannot keep its moments in another dtype than fp32."""
    adam = importlib.import_module("megatron.core.optimizer").Adam
    if "exp_avg_dtype" not in inspect.signature(adam).parameters:
        raise ValueError(
            f"optim.use_precision_aware_optimizer=True: the Adam of {name()} that is installed here keeps fp32 moments only; "
            "install Transformer Engine 2.1 or newer, or set it to false"
        )
