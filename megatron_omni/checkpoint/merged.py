"""A checkpoint with low-rank adapters, read as the plain one that it computes: W + (alpha / r) A B (models/lora.py).

Each weight is merged when it is read, in fp32, and rounded once to its stored type; adapters are not listed. So export and
upcycling need not know of adapters.
"""

import logging
import re
from pathlib import Path

from torch import Tensor

from megatron_omni.checkpoint.means import MeansReader
from megatron_omni.checkpoint.torch_dist import TorchDistReader
from megatron_omni.config.model import LoraConfig

logger = logging.getLogger(__name__)

_PAIRS = (
    (re.compile(r"(.*\.self_attention)\.(linear_qkv|linear_proj)\.weight$"), r"\1.lora_\2.a", r"\1.lora_\2.b"),
    (re.compile(r"(.*\.experts)\.experts\.linear_fc([12])\.weight$"), r"\1.lora_experts.a\2", r"\1.lora_experts.b\2"),
)  # fmt: skip
"""Name of a weight, of its A and of its B, as stored. Attention: A [r, in], B [out, r]; experts: [E, in, r], [E, r, out]."""


class MergedReader(MeansReader):
    """As :class:`MeansReader`, adapters added to the weights."""

    def __init__(self, directory: Path, lora: LoraConfig) -> None:
        super().__init__(directory)
        self._scale = lora.scale
        self._adapters: dict[str, tuple[str, str]] = {}
        for key in self.tensors:
            for pattern, a, b in _PAIRS:
                if (found := pattern.match(key)) and found.expand(a) in self.tensors:
                    self._adapters[key] = found.expand(a), found.expand(b)
        self._whole = TorchDistReader(directory)
        for pair in self._adapters.values():
            for name in pair:
                del self.tensors[name]

    @property
    def num_merged(self) -> int:
        """Weights that have adapters."""
        return len(self._adapters)

    def read(self, key: str, *, index: int | None = None) -> Tensor:
        """Tensor ``key`` with its adapter added, or its entry ``index`` on the leading axis."""
        weight = super().read(key, index=index)
        if key not in self._adapters:
            return weight
        a, b = (self._whole.read(name, index=index).float() for name in self._adapters[key])
        product = b @ a if ".self_attention." in key else a @ b
        return (weight.float() + product * self._scale).to(weight.dtype)


def open_reader(directory: Path, lora: LoraConfig | None) -> TorchDistReader:
    """The reader of a checkpoint of a model with these adapters, or none."""
    if lora is None:
        return MeansReader(directory)
    reader = MergedReader(directory, lora)
    logger.warning("%s: low-rank adapters merged into %d weights", directory, reader.num_merged)
    return reader
