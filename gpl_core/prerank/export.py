"""What a serving system gets: item vectors and a user tower per variant, as safetensors and JSON.

Nothing of this project is needed to serve: see `serving.py` for a reader in plain numpy, or repeat its formula:

    bucket = crc32(user id) mod user_buckets;  taste = W p[bucket]
    u = taste + O relu(M [id[bucket]; taste] + a) + b        (the user tower's tensors, names as below)
    logit = <u, v[:m]> / sqrt(m) + v[m] + w . pair features;  probability = sigmoid(logit)

Files of a bundle: `serving.json`; `profiles.safetensors` (`table` [user_buckets x d]); per variant
`<variant>/items.safetensors` (`vectors` [N x (m + 1)], row = item_index), `<variant>/user_tower.safetensors`
(`id.weight`, `project.weight`, `hidden.weight`, `hidden.bias`, `out.weight`, `out.bias`, `pair.weight`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from gpl_core.prerank.features import item_buckets
from gpl_core.prerank.model import TwoTower

FORMAT = "gpl-preranker-1"
_ROWS = 65_536  # items computed at a time: bounds memory whatever the catalogue


def item_vectors(
    model: TwoTower, content: npt.NDArray[np.floating], has_vector: npt.NDArray[np.bool_], sids: npt.NDArray[np.integer]
) -> torch.Tensor:
    """Vectors [N x (m + 1)] of all items, float32 on the CPU.

    content: [N x d] by item_index (a memory map will do), has_vector: bool [N]; sids: int [N x L], -1 where none.
    """
    device = next(model.parameters()).device
    out = torch.empty(len(content), model.config.dimension + 1)
    model.eval()
    with torch.no_grad():
        for start, stop in _ranges(len(content)):
            vectors = np.where(has_vector[start:stop, None], content[start:stop], 0.0).astype(np.float32)
            bucket = item_buckets(np.arange(start, stop), model.config.item_buckets)
            out[start:stop] = model.item(
                torch.from_numpy(bucket).to(device),
                torch.from_numpy(vectors).to(device),
                torch.from_numpy(np.asarray(sids[start:stop], dtype=np.int64)).to(device),
            ).cpu()
    return out


def export_bundle(
    folder: Path,
    variants: Mapping[str, TwoTower],
    profiles: npt.NDArray[np.float32],
    content: npt.NDArray[np.floating],
    has_vector: npt.NDArray[np.bool_],
    sids: npt.NDArray[np.integer],
    about: Mapping[str, object],
) -> None:
    """Writes the bundle of the module's docstring into `folder`; `about`: JSON-able lineage and training facts."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"table": torch.from_numpy(profiles)}, str(folder / "profiles.safetensors"))
    for name, model in variants.items():
        (folder / name).mkdir(exist_ok=True)
        save_file({"vectors": item_vectors(model, content, has_vector, sids)}, str(folder / name / "items.safetensors"))
        tower = {key: value.detach().cpu().contiguous() for key, value in model.user.state_dict().items()}
        tower["pair.weight"] = model.pair.weight.detach().cpu().contiguous()
        save_file(tower, str(folder / name / "user_tower.safetensors"))
    first = next(iter(variants.values()))
    description = {
        "format": FORMAT,
        "variants": sorted(variants),
        "user_hash": "crc32(utf-8 user id) mod user_buckets",
        "model": first.config.to_dict(),
        "items": len(content),
        **about,
    }
    (folder / "serving.json").write_text(json.dumps(description, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _ranges(rows: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, _ROWS):
        yield start, min(rows, start + _ROWS)
