"""Names of the beginnings of a prompt, equal only where keys and values are equal.

Keys and values of a token depend on it, on its position and on everything before it. So the name of the first n blocks
of :data:`BLOCK` tokens is a hash over the name of those before and, of the block, the token ids, the three positions of
each, and at placeholders a digest of the encoder's input (a tile's pixels, a chunk's spectrum): of the medium as it was
decoded and processed, not of its file. ``salt`` keeps those apart who must not learn of each other.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_omni.batch import Modality
from megatron_omni.data.sample import Sample
from megatron_omni.generation.scheduler import Prefix
from megatron_omni.segments import prefix_length

BLOCK = 64
"""Tokens of a block."""
_DIGEST_BYTES = 16


def prefixes(ids: np.ndarray, positions: np.ndarray, media: np.ndarray, *, salt: str = "") -> list[Prefix]:
    """Whole blocks of ``ids`` [L] at ``positions`` [3, L] int64, the shortest first; ``media`` [L] from
    :func:`media_digests`."""
    found: list[Prefix] = []
    name = salt.encode()
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        block = slice(start, start + BLOCK)
        content = hashlib.blake2b(name, digest_size=_DIGEST_BYTES)
        for part in (ids[block], positions[:, block], media[block]):
            content.update(np.ascontiguousarray(part).tobytes())
        name = content.digest()
        found.append(Prefix(name, start + BLOCK))
    return found


def media_digests(sample: Sample) -> np.ndarray:
    """[L] int64: at each placeholder a digest of its tile or chunk and of the rows before it there, 0 at text."""
    digests = np.zeros(sample.length, dtype=np.int64)
    modality = sample.modality.numpy()
    for kinds, inputs in (
        ((Modality.IMAGE, Modality.VIDEO), sample.tiles),
        ((Modality.AUDIO,), sample.chunks),
    ):
        places = np.flatnonzero(np.isin(modality, kinds))
        if inputs is None or not len(places):
            continue
        each = np.array([_digest(one) for one in inputs], dtype=np.int64)
        digests[places] = each.repeat(len(places) // len(each))
    return digests


def _digest(values: Tensor) -> int:
    content = values.contiguous().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def whole_prompt(blocks: Sequence[Prefix], *, request: int, num_tokens: int) -> list[Prefix]:
    """``blocks`` and the whole prompt of a request, which its samples alone share."""
    name = b"request" + request.to_bytes(8, "little")
    return [*(block for block in blocks if block.num_tokens < num_tokens), Prefix(name, num_tokens)]


def whole_tokens(prompt: Sample) -> int:
    """First tokens of a prompt that all see each other. ValueError where others do than :func:`segments.prefix` says."""
    if prompt.attention is None:
        return 0
    whole = prefix_length(prompt.attention, prompt.length)
    if whole is None:
        raise ValueError(
            "prompt.attention is neither causal nor segments.prefix(n, rest), which is all that a prompt can be; give the "
            "responses to a prompt as requests"
        )
    return whole
