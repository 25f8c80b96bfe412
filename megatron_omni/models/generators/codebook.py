"""The codec's codebook: C vectors of width D; a vector becomes the number of the nearest.

    c(x) = argmin_i |x - e_i|^2,    q(x) = x + stop(e_c - x),    commitment = mean |stop(e_c) - x|^2

q passes the decoder's gradient to the encoder as it is (straight-through). Entries have no gradient; they are running
means of the vectors that chose them. With n_i and s_i the number and sum of a step's vectors of code i,

    N_i <- d N_i + (1 - d) n_i,    S_i <- d S_i + (1 - d) s_i,    e_i = S_i / N'_i,    N'_i = (N_i + eps) / (N + C eps) N

(N the sum of all N_i: Laplace smoothing). A code whose N_i has fallen below ``dead_below`` starts again at a vector of the
step. (WavTokenizer's own replacement writes e_i and then overwrites it by S_i / N'_i; here N_i and S_i are replaced, so
that it stays.) The codebook begins as k-means of encoder vectors. Nothing here communicates: the caller adds n and s up over the
ranks that see different data, so that all of them hold the same codebook.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

LAPLACE = 1e-5
CHUNK_DISTANCES = 1 << 24
"""Vectors are compared with the codebook in pieces of so many distances (64 MiB)."""


@dataclass
class Quantised:
    """Vectors [B, n, D] and what became of them."""

    codes: Tensor
    """[B, n], int64."""
    vectors: Tensor
    """[B, n, D]: the entries, with the gradient of what was quantised."""
    commitment: Tensor
    """Mean squared distance of what was quantised to its entries."""


class Codebook(nn.Module):
    """Buffers by WavTokenizer's names."""

    embed: Tensor
    embed_avg: Tensor
    cluster_size: Tensor
    inited: Tensor

    def __init__(self, num_codes: int, code_size: int) -> None:
        super().__init__()
        self.register_buffer("embed", torch.zeros(num_codes, code_size))
        self.register_buffer("embed_avg", torch.zeros(num_codes, code_size))
        self.register_buffer("cluster_size", torch.zeros(num_codes))
        self.register_buffer("inited", torch.zeros(1))

    @property
    def num_codes(self) -> int:
        """C."""
        return self.embed.shape[0]

    @property
    def is_started(self) -> bool:
        """Whether it has entries: :meth:`start` ran, or weights were loaded."""
        return bool(self.inited.item())

    def nearest(self, vectors: Tensor) -> Tensor:
        """Codes [...] of ``vectors`` [..., D]."""
        flat = vectors.detach().reshape(-1, vectors.shape[-1]).float()
        pieces = flat.split(max(1, CHUNK_DISTANCES // self.num_codes))
        squares = self.embed.pow(2).sum(1)
        codes = [(squares - 2 * piece @ self.embed.T).argmin(1) for piece in pieces]
        return torch.cat(codes).reshape(vectors.shape[:-1])

    def forward(self, vectors: Tensor) -> Quantised:
        """Quantise ``vectors`` [B, n, D]. Changes nothing: :meth:`learn` does."""
        codes = self.nearest(vectors)
        entries = self.lookup(codes).to(vectors.dtype)
        commitment = nn.functional.mse_loss(vectors.float(), entries.float())
        return Quantised(codes, vectors + (entries - vectors).detach(), commitment)

    def lookup(self, codes: Tensor) -> Tensor:
        """Entries [..., D] of ``codes`` [...]."""
        return nn.functional.embedding(codes, self.embed)

    # -------------------------------------------------------------------------------------------- training

    @torch.no_grad()
    def start(self, vectors: Tensor, *, generator: torch.Generator, num_iterations: int = 10) -> None:
        """Entries by k-means of ``vectors`` [n, D], at least one; with fewer than C some entries begin equal."""
        flat = vectors.reshape(-1, vectors.shape[-1]).float()
        self.embed.copy_(draw_vectors(flat, self.num_codes, generator))
        for _ in range(num_iterations):
            counts, sums = self.statistics(flat, self.nearest(flat))
            means = sums / counts.clamp(min=1)[:, None]
            self.embed.copy_(torch.where(counts[:, None] > 0, means, self.embed))
        counts, _ = self.statistics(flat, self.nearest(flat))
        self.cluster_size.copy_(counts)
        self.embed_avg.copy_(self.embed * counts[:, None])
        self.inited.fill_(1.0)

    @torch.no_grad()
    def statistics(self, vectors: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """n [C] and s [C, D] of ``vectors`` [..., D] that chose ``codes`` [...]; over steps and ranks they add up."""
        flat, chosen = vectors.detach().reshape(-1, vectors.shape[-1]).float(), codes.reshape(-1)
        counts = torch.bincount(chosen, minlength=self.num_codes).float()
        return counts, torch.zeros_like(self.embed).index_add_(0, chosen, flat)

    @torch.no_grad()
    def learn(
        self, counts: Tensor, sums: Tensor, candidates: Tensor, *, decay: float = 0.99, dead_below: float = 2.0
    ) -> int:
        """One step of the running means; how many dead codes were replaced by ``candidates`` [C, D].

        ``candidates`` are vectors of the step (:func:`draw_vectors`), the same on all ranks.
        """
        self.cluster_size.mul_(decay).add_(counts, alpha=1 - decay)
        self.embed_avg.mul_(decay).add_(sums, alpha=1 - decay)
        dead = self.cluster_size < dead_below
        self.cluster_size.masked_fill_(dead, dead_below)
        self.embed_avg.copy_(torch.where(dead[:, None], candidates * dead_below, self.embed_avg))
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + LAPLACE) / (total + self.num_codes * LAPLACE) * total
        self.embed.copy_(self.embed_avg / smoothed[:, None])
        return int(dead.sum())


def draw_vectors(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of ``vectors`` [..., D] by a CPU ``generator``; without repetition where there are so many."""
    flat = vectors.detach().reshape(-1, vectors.shape[-1]).float()
    if flat.shape[0] >= count:
        chosen = torch.randperm(flat.shape[0], generator=generator)[:count]
    else:
        chosen = torch.randint(flat.shape[0], (count,), generator=generator)
    return flat[chosen.to(flat.device)]
