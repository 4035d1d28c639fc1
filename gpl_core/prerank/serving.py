"""Scores candidates from an exported bundle with numpy alone: all that the pre-ranker costs online."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from gpl_core.errors import ContractError
from gpl_core.prerank.features import user_buckets

Float32 = npt.NDArray[np.float32]

FORMAT = "gpl-preranker-1"


class ServedModel:
    """One variant of a bundle written by `gpl_core.prerank.export`."""

    def __init__(self, folder: Path, variant: str) -> None:
        about = self.describe(folder, variant)
        self.buckets = int(about["model"]["user_buckets"])
        self.dimension = int(about["model"]["dimension"])
        self.pair_features = tuple(about["model"]["pair_features"])
        self._profiles: Float32 = load_file(folder / "profiles.safetensors")["table"]
        self._tower: dict[str, Float32] = load_file(folder / variant / "user_tower.safetensors")
        self.items: Float32 = load_file(folder / variant / "items.safetensors")["vectors"]
        """float32 [N x (m + 1)], row = item_index; the last column is the item's bias."""

    @staticmethod
    def describe(folder: Path, variant: str = "") -> dict[str, Any]:
        """`serving.json` of a bundle: variants, sizes, lineage. ContractError for another format or no such variant."""
        about: dict[str, Any] = json.loads((folder / "serving.json").read_text(encoding="utf-8"))
        if about.get("format") != FORMAT:
            raise ContractError(f"{folder}: serving.json has format {about.get('format')!r}; expected {FORMAT!r}")
        if variant and variant not in about["variants"]:
            raise ContractError(f"{folder}: no variant {variant!r}; the bundle holds {', '.join(about['variants'])}")
        return about

    def users(self, user_ids: list[str]) -> Float32:
        """User vectors float32 [n x m]."""
        bucket = user_buckets(user_ids, self.buckets)
        tower = self._tower
        taste = self._profiles[bucket] @ tower["project.weight"].T
        side = np.concatenate([tower["id.weight"][bucket], taste], axis=1)
        hidden = np.maximum(side @ tower["hidden.weight"].T + tower["hidden.bias"], 0.0)
        return np.asarray(taste + hidden @ tower["out.weight"].T + tower["out.bias"], dtype=np.float32)

    def score(self, user: Float32, candidates: npt.NDArray[np.integer], pair: Float32 | None = None) -> Float32:
        """Logits [B] of item_index candidates [B] for one user vector [m]; pair: passthrough features [B x F]."""
        vectors = np.take(self.items, candidates, axis=0)  # several times as fast as items[candidates]
        return self._logits(vectors[:, :-1] @ user, vectors, pair)

    def score_pairs(
        self, user_ids: list[str], item_index: npt.NDArray[np.integer], pair: Float32 | None = None
    ) -> Float32:
        """Logits [n] of n (user, item) pairs."""
        row_of = {user: row for row, user in enumerate(dict.fromkeys(user_ids))}
        row = np.fromiter((row_of[user] for user in user_ids), np.int64, len(user_ids))
        users, vectors = self.users(list(row_of))[row], np.take(self.items, item_index, axis=0)
        return self._logits(np.einsum("nm,nm->n", users, vectors[:, :-1]), vectors, pair)

    def _logits(self, products: Float32, vectors: Float32, pair: Float32 | None) -> Float32:
        logits = products / math.sqrt(self.dimension) + vectors[:, -1]
        if self.pair_features:
            if pair is None or pair.shape[1] != len(self.pair_features):
                raise ContractError(f"scoring needs the pair features {', '.join(self.pair_features)}")
            logits = logits + pair @ self._tower["pair.weight"][0]
        return np.asarray(logits, dtype=np.float32)
