"""The plain baseline of the RQ-VAE: residual k-means on the embeddings themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from gpl_core.errors import ContractError
from gpl_core.sids.kmeans import residual_kmeans
from gpl_core.sids.rqvae import RqVaeSettings, sample_rows
from gpl_core.sids.tokenizer import Tokenizer, checked_embeddings, mlp


def fit_rq_kmeans(embeddings: np.ndarray, settings: RqVaeSettings, *, pca: int | None = None) -> Tokenizer:
    """A tokenizer of codebooks fitted to the embeddings [N x d], after PCA to ``pca`` dimensions if given.

    Uses ``levels``, ``codes``, ``sample_rows`` and ``seed`` of the settings. Raises ContractError as ``fit`` does.
    """
    checked_embeddings(embeddings)
    if not len(embeddings):
        raise ContractError("embeddings: 0 items, expected at least one; run encode_items first.")
    rows = sample_rows(embeddings, settings.sample_rows, settings.seed)
    mean = rows.mean(axis=0)
    width = embeddings.shape[1]
    encoder, decoder = mlp((width,)), mlp((width,))
    latent = rows - mean
    if pca is not None:
        axes = torch.as_tensor(np.linalg.svd(latent, full_matrices=False)[2][:pca].copy())
        encoder, decoder = mlp((width, len(axes))), mlp((len(axes), width))
        encoder.load_state_dict({"0.weight": axes, "0.bias": torch.zeros(len(axes))})
        decoder.load_state_dict({"0.weight": axes.T.contiguous(), "0.bias": torch.zeros(width)})
        latent = latent @ axes.numpy().T
    books, _ = residual_kmeans(latent, settings.levels, settings.codes, settings.seed)
    description = {
        "method": "rq_kmeans",
        "items": len(embeddings),
        "pca": pca,
        "settings": dataclasses.asdict(settings),
    }
    return Tokenizer(encoder, decoder, torch.as_tensor(books), torch.as_tensor(mean), 1.0, description)
