"""A trained tokenizer: frozen encoder, codebooks and decoder that turn embeddings into SIDs and back.

Legend for shapes: N items, d embedding width, k latent width, L levels, C codes per level.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gpl_core.errors import ContractError
from gpl_core.sids.quantizer import assign

_ROWS = 16_384  # rows on the device at a time
_WEIGHTS, _DESCRIPTION = "tokenizer.safetensors", "tokenizer.json"


class TokenizedItems(NamedTuple):
    """SIDs of N items, and what collision repair needs."""

    codes: np.ndarray  # int32 [N x L]
    residual_norm: np.ndarray  # float32 [N]: length of the latent minus the sum of its L codes
    last_residual: np.ndarray  # float32 [N x k]: the input of the last level


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers of the given widths with GELU between them; one width alone is the identity."""
    layers: list[nn.Module] = []
    for left, right in itertools.pairwise(widths):
        layers += [nn.Linear(left, right), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class Tokenizer(nn.Module):
    """Embeddings [N x d] to SIDs [N x L] and back. Immutable in use; made by ``fit`` or ``load_tokenizer``."""

    codebooks: Tensor
    mean: Tensor

    def __init__(
        self,
        encoder: nn.Sequential,
        decoder: nn.Sequential,
        codebooks: Tensor,
        mean: Tensor,
        scale: float,
        description: Mapping[str, object],
    ) -> None:
        """``codebooks`` [L x C x k]; input and output are (e - ``mean`` [d]) * ``scale``; ``description``: facts."""
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("codebooks", codebooks.detach())
        self.register_buffer("mean", mean.detach())
        self.scale, self.description = float(scale), dict(description)
        self.eval().requires_grad_(False)

    @property
    def levels(self) -> int:
        """L"""
        return self.codebooks.shape[0]

    @property
    def codes(self) -> int:
        """C"""
        return self.codebooks.shape[1]

    @property
    def dim(self) -> int:
        """d"""
        return self.mean.shape[0]

    @torch.no_grad()
    def encode(self, x: np.ndarray) -> TokenizedItems:
        """SIDs of embeddings ``x`` [N x d], in float32. Raises ContractError for wrong width, zero or NaN rows."""
        checked_embeddings(x, self.dim)
        codes = np.empty((len(x), self.levels), dtype=np.int32)
        norms = np.empty(len(x), dtype=np.float32)
        last = np.empty((len(x), self.codebooks.shape[2]), dtype=np.float32)
        for start in range(0, len(x), _ROWS):
            part = torch.as_tensor(np.array(x[start : start + _ROWS], dtype=np.float32), device=self.mean.device)
            latent = self.encoder((part - self.mean) * self.scale)
            found = assign(latent, self.codebooks)
            stop = start + len(part)
            codes[start:stop] = found.codes.cpu().numpy()
            norms[start:stop] = torch.linalg.vector_norm(latent - found.quantized, dim=1).cpu().numpy()
            last[start:stop] = found.residuals[:, -1].cpu().numpy()
        return TokenizedItems(codes, norms, last)

    @torch.no_grad()
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The embedding each SID stands for, float32 [N x d], of ``codes`` int [N x L]. Not of unit length."""
        out = np.empty((len(codes), self.dim), dtype=np.float32)
        for start in range(0, len(codes), _ROWS):
            part = torch.as_tensor(codes[start : start + _ROWS].astype(np.int64), device=self.mean.device)
            latent = torch.stack([book[code] for book, code in zip(self.codebooks, part.T, strict=True)]).sum(dim=0)
            out[start : start + len(part)] = (self.decoder(latent) / self.scale + self.mean).cpu().numpy()
        return out

    def save(self, folder: str | Path) -> None:
        """Writes weights (safetensors) and description (JSON) into ``folder``; same tokenizer, same bytes."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        save_file({name: t.cpu().contiguous() for name, t in self.state_dict().items()}, target / _WEIGHTS)
        facts = {
            "encoder": _widths(self.encoder, self.dim),
            "decoder": _widths(self.decoder, self.codebooks.shape[2]),
            "scale": self.scale,
            "description": self.description,
        }
        (target / _DESCRIPTION).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that ``Tokenizer.save`` wrote; it gives identical SIDs. The artifact store checks the files."""
    facts = json.loads(Path(folder, _DESCRIPTION).read_text())
    tensors = load_file(Path(folder, _WEIGHTS))
    encoder, decoder = (mlp(tuple(facts[part])) for part in ("encoder", "decoder"))
    made = Tokenizer(encoder, decoder, tensors["codebooks"], tensors["mean"], facts["scale"], facts["description"])
    made.load_state_dict(tensors)
    return made


def checked_embeddings(x: np.ndarray, dim: int | None = None) -> None:
    """Raises ContractError unless ``x`` [N x d] has finite rows of nonzero length; reads ``_ROWS`` at a time."""
    if x.ndim != 2 or (dim is not None and x.shape[1] != dim):
        expected = "[N x d]" if dim is None else f"[N x {dim}]"
        raise ContractError(
            f"embeddings: shape {x.shape}, expected {expected}; use the encoder_version this tokenizer was trained on."
        )
    for start in range(0, len(x), _ROWS):
        length = np.linalg.norm(np.asarray(x[start : start + _ROWS], dtype=np.float32), axis=1)
        bad = np.flatnonzero(~(np.isfinite(length) & (length > 1e-12)))
        if len(bad):
            what = "zero" if length[bad[0]] == 0 else "not finite or vanishing"
            raise ContractError(
                f"embeddings: row {start + bad[0]} is {what}, expected finite values and a direction; "
                "such items belong in worker_rejects, encode them again."
            )


def _widths(layers: nn.Sequential, first: int) -> list[int]:
    return [first, *(layer.out_features for layer in layers if isinstance(layer, nn.Linear))]
