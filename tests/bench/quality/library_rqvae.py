"""The yardstick of the quantizer: our layers and steps around vector-quantize-pytorch's ResidualVQ.

Its best fair setting: k-means start, dead codes replaced, `rotation_trick=False` (with it gradients reach 1e6). EMA
codebooks, or codebooks that the optimizer trains.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional
from vector_quantize_pytorch import ResidualVQ

from gpl_core.sids.rqvae import RqVaeSettings, one_cycle
from gpl_core.sids.tokenizer import Tokenizer, mlp


def fit_library(x: np.ndarray, settings: RqVaeSettings, codebooks: str, device: torch.device) -> Tokenizer:
    """A tokenizer of embeddings ``x`` [N x d]; ``codebooks``: ema or gradient. Warm-up, optimizer and rate are ours."""
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    widths = (x.shape[1], *settings.hidden, settings.latent)
    encoder, decoder = mlp(widths).to(device), mlp(widths[::-1]).to(device)
    by_gradient = {"learnable_codebook": True, "ema_update": False} if codebooks == "gradient" else {}
    quantizer = ResidualVQ(
        dim=settings.latent, num_quantizers=settings.levels, codebook_size=settings.codes, kmeans_init=True,
        kmeans_iters=50, decay=settings.ema_decay, threshold_ema_dead_code=1, rotation_trick=False,
        commitment_weight=settings.commitment, **by_gradient,
    ).to(device)  # fmt: skip
    mean, scale = torch.as_tensor(x.mean(axis=0)).to(device), float(1 / x.std())
    rows = (torch.as_tensor(x).to(device) - mean) * scale
    parameters = [p for part in (encoder, decoder, quantizer) for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    batches = -(-len(x) // settings.batch_size)
    for step in range(settings.epochs * batches):
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, settings.epochs * batches, settings.learning_rate)
        if step % batches == 0:
            order = np.array_split(rng.permutation(len(x)), batches)
        batch = rows[torch.as_tensor(order[step % batches])]
        latent, extra = encoder(batch), torch.zeros((), device=device)
        if step >= settings.warmup_epochs * batches:
            if step == settings.warmup_epochs * batches:  # the k-means start sees all items, as ours does
                with torch.no_grad():
                    quantizer(encoder(rows)[None])
            quantized, _, losses = quantizer(latent[None])
            latent, extra = quantized[0], losses.sum()
        loss = functional.mse_loss(decoder(latent), batch) + extra
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    books = quantizer.codebooks.detach().reshape(settings.levels, settings.codes, settings.latent).clone()
    return Tokenizer(encoder, decoder, books, mean, scale, {"method": f"vector-quantize-pytorch, {codebooks}"})
