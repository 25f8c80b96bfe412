"""Recomputation of encoder layers (``parallel.recompute: full``): a layer keeps its inputs and runs again in the backward.

Without it a trained tower keeps some 35 KB for each of a tile's 729 patches and each layer: 43 GB for a video of 64 frames
at full size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_layer(layer: nn.Module, hidden: Tensor, *others: Any, recompute: bool, **settings: Any) -> Tensor:
    """``layer(hidden, *others, **settings)``, replayed in the backward with ``recompute``."""
    if not (recompute and torch.is_grad_enabled()):
        return layer(hidden, *others, **settings)
    # No dropout in any encoder: there is no random state to restore.
    return checkpoint(layer, hidden, *others, use_reentrant=False, preserve_rng_state=False, **settings)
