"""Residual quantization with EMA codebooks: the few tensor formulas, each usable without a training loop.

Legend for shapes: B rows, L levels, C codes per level, k latent width.

Sources: residual quantization (Lee 2022, RQ-VAE), straight-through gradient, commitment loss and EMA codebooks with
Laplace smoothing (van den Oord 2017; Razavi 2019). tests/gpl_core/sids holds them against vector-quantize-pytorch.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

_SMOOTHING = 1e-5


class Assignment(NamedTuple):
    """Codes of a batch and how they came about."""

    codes: Tensor  # int64 [B x L]
    residuals: Tensor  # [B x L x k]: the input of each level; residuals[:, 0] is the latent itself
    quantized: Tensor  # [B x k]: the sum of the chosen codes


class Quantized(NamedTuple):
    """The training view of an assignment."""

    latent: Tensor  # [B x k]: the quantized latent with the straight-through gradient
    commitment: Tensor  # scalar: sum over levels of the mean squared distance between the level's input and its code
    assignment: Assignment


@torch.no_grad()
def assign(latent: Tensor, codebooks: Tensor) -> Assignment:
    """Greedy residual codes of ``latent`` [B x k] by ``codebooks`` [L x C x k], for training and inference alike."""
    residual, codes, residuals = latent, [], []
    for codebook in codebooks:
        residuals.append(residual)
        # The least squared distance, less the row's own square.
        code = torch.argmin(torch.addmm(codebook.square().sum(-1), residual, codebook.T, alpha=-2.0), dim=-1)
        codes.append(code)
        residual = residual - codebook[code]
    return Assignment(torch.stack(codes, dim=1), torch.stack(residuals, dim=1), latent - residual)


class ResidualQuantizer(nn.Module):
    """L EMA codebooks. Buffers, not parameters: saved and loaded, but never touched by the optimizer."""

    codebooks: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, levels: int, codes: int, width: int) -> None:
        super().__init__()
        self.register_buffer("codebooks", torch.zeros(levels, codes, width))
        self.register_buffer("counts", torch.ones(levels, codes))  # EMA of rows per code and step
        self.register_buffer("sums", torch.zeros(levels, codes, width))  # EMA of their sum

    def forward(self, latent: Tensor) -> Quantized:
        """Quantizes ``latent`` [B x k]; ``statistics`` and ``ema_step`` move the codebooks."""
        found = assign(latent.detach(), self.codebooks)
        # Every level's input is the latent minus constants, so every level's commitment reaches the encoder.
        chosen = torch.stack([book[code] for book, code in zip(self.codebooks, found.codes.T, strict=True)], dim=1)
        before = torch.cumsum(chosen, dim=1) - chosen
        commitment = functional.mse_loss(latent[:, None] - before, chosen, reduction="none").mean(dim=(0, 2)).sum()
        return Quantized(latent + (found.quantized - latent).detach(), commitment, found)

    @torch.no_grad()
    def statistics(self, found: Assignment) -> Tensor:
        """Rows per code and their sum, [L x C x (1 + k)]: additive over shards and ranks."""
        levels, codes, width = self.codebooks.shape
        rows = torch.cat([found.residuals.new_ones(*found.residuals.shape[:2], 1), found.residuals], dim=2)
        flat = found.codes + torch.arange(levels, device=rows.device) * codes
        out = rows.new_zeros(levels * codes, width + 1)
        out.index_add_(0, flat.reshape(-1), rows.reshape(-1, width + 1))
        return out.view(levels, codes, width + 1)

    @torch.no_grad()
    def ema_step(self, statistics: Tensor, decay: float) -> None:
        """Moves the codebooks toward the means of one step's ``statistics``, summed over ranks."""
        self.counts.lerp_(statistics[..., 0], 1 - decay)
        self.sums.lerp_(statistics[..., 1:], 1 - decay)
        total = self.counts.sum(dim=1, keepdim=True)
        smooth = (self.counts + _SMOOTHING) / (total + self.counts.shape[1] * _SMOOTHING) * total
        self.codebooks.copy_(self.sums / smooth[..., None])

    @torch.no_grad()
    def set_codes(self, level: int, codes: Tensor, vectors: Tensor, counts: Tensor) -> None:
        """Sets ``codes`` int [m] of one level to ``vectors`` [m x k], as if ``counts`` [m] rows were in the EMA."""
        self.codebooks[level, codes] = vectors
        self.counts[level, codes] = counts
        self.sums[level, codes] = vectors * counts[:, None]
