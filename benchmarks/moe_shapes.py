"""Shapes to measure an MoE layer on, without torch.

A token draws ``mean_k`` slots on average, of which the share ``null_share`` is null: the number of assignments A is
exactly round(T mean_k (1 - null_share)). Their number per token varies (``fixed_k`` makes it equal), and experts are
drawn without replacement with probability proportional to rank^-skew.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a user asks for on the command line."""

    hidden: int
    ffn: int
    experts: int
    tokens: int
    mean_k: float
    null_share: float = 0.0
    skew: float = 0.0
    fixed_k: bool = False

    @property
    def assignments(self) -> int:
        """A."""
        return round(self.tokens * self.mean_k * (1 - self.null_share))

    def check(self) -> None:
        """ValueError where no routing map has these counts."""
        real = self.mean_k * (1 - self.null_share)
        if real > self.experts:
            raise ValueError(f"--mean-k {self.mean_k:g}: {real:g} real experts per token of {self.experts}; lower it")
        if self.fixed_k and self.assignments % self.tokens:
            raise ValueError(f"--fixed-k with {real:g} real experts per token: give a whole number, or --no-fixed-k")

    def scaled(self, scale: int) -> "Shape":
        """Hidden and expert width divided by ``scale``, kept multiples of 8."""
        hidden, ffn = (max(8, size // scale // 8 * 8) for size in (self.hidden, self.ffn))
        return replace(self, hidden=hidden, ffn=ffn)

    def __str__(self) -> str:
        text = f"T{self.tokens} H{self.hidden} F{self.ffn} E{self.experts} k{self.mean_k:g}"
        text += "" if not self.null_share else f" null{self.null_share:g}"
        text += "" if not self.skew else f" skew{self.skew:g}"
        return text + (" fixed" if self.fixed_k else "")


NAMED = {
    "uni-moe-2": Shape(hidden=3584, ffn=18944, experts=4, tokens=4096, mean_k=1.5),
    "qwen3-30b": Shape(hidden=2048, ffn=768, experts=128, tokens=4096, mean_k=8, fixed_k=True),
    "deepseek-fine": Shape(hidden=7168, ffn=2048, experts=256, tokens=4096, mean_k=8, fixed_k=True),
}
"""Uni-MoE-2.0-Omni's routed experts; Qwen3-30B-A3B's; DeepSeek-V3's."""

GOALS = {
    "coarse": Shape(hidden=1024, ffn=2816, experts=4, tokens=2048, mean_k=1.5),
    "fine": replace(NAMED["qwen3-30b"].scaled(4), tokens=2048, mean_k=6, fixed_k=False),
    "linear": replace(NAMED["uni-moe-2"].scaled(8), tokens=2048),
}
"""What the goals of the kernels on a CPU are measured on (bench_kernels.py)."""
