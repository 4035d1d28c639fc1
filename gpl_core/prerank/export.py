"""The bundle for a serving system: item vectors and a user tower per variant, as safetensors and JSON.

Serving needs nothing of this project: see `serving.py` for a reader in plain numpy, or implement its formula:

    bucket = crc32(user id) mod user_buckets;  taste = W p[bucket]
    u = taste + O relu(M [id[bucket]; taste] + a) + b        (the user tower's tensors, names as below)
    logit = <u, v[:m]> / sqrt(m) + v[m] + w . pair features;  probability = sigmoid(logit)

Files of a bundle: `serving.json`; `profiles.safetensors` (`table` [user_buckets x d]); per variant
`<variant>/items.safetensors` (`vectors` [N x (m + 1)], row = item_index), `<variant>/user_tower.safetensors`
(`id.weight`, `project.weight`, `hidden.weight`, `hidden.bias`, `out.weight`, `out.bias`, `pair.weight`);
`<variant>/item_tower.safetensors`, from which `load_variant` restores the whole model, to embed later items.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from gpl_core.prerank.features import item_buckets
from gpl_core.prerank.serving import FORMAT, ServedModel
from gpl_core.prerank.two_tower import TowerConfig, TwoTower

ContentOf = Callable[[npt.NDArray[np.integer]], npt.NDArray[np.float32]]
"""item_index [n] -> embeddings float32 [n x d], 0 for an item without one."""

_ROWS = 65_536  # items computed at a time: bounds memory


@torch.no_grad()
def item_vectors(model: TwoTower, sids: npt.NDArray[np.integer], content: ContentOf) -> torch.Tensor:
    """Vectors [N x (m + 1)] of all items, float32 on the CPU; sids: int [N x L] by item_index, -1 where none."""
    device = next(model.parameters()).device
    out = torch.empty(len(sids), model.config.dimension + 1)
    model.eval()
    for start in range(0, len(sids), _ROWS):
        stop = min(len(sids), start + _ROWS)
        index = np.arange(start, stop)
        out[start:stop] = model.item(
            torch.from_numpy(item_buckets(index, model.config.item_buckets)).to(device),
            torch.from_numpy(content(index)).to(device),
            torch.from_numpy(np.asarray(sids[start:stop], dtype=np.int64)).to(device),
        ).cpu()
    return out


def export_bundle(
    folder: Path,
    variants: Mapping[str, TwoTower],
    profiles: npt.NDArray[np.float32],
    sids: npt.NDArray[np.integer],
    content: ContentOf,
    about: Mapping[str, object],
) -> None:
    """Writes the bundle of the module's docstring into `folder`.

    profiles: [user_buckets x d]; sids, content: as `item_vectors`; about: JSON-able lineage and training facts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"table": torch.from_numpy(profiles)}, folder / "profiles.safetensors")
    for name, model in variants.items():
        (folder / name).mkdir(exist_ok=True)
        save_file({"vectors": item_vectors(model, sids, content)}, folder / name / "items.safetensors")
        save_file({**_weights(model.user), "pair.weight": _weights(model.pair)["weight"]}, _path(folder, name, "user"))
        save_file(_weights(model.item), _path(folder, name, "item"))
    first = next(iter(variants.values()))
    description = {
        "format": FORMAT,
        "variants": sorted(variants),
        "user_hash": "crc32(utf-8 user id) mod user_buckets",
        "model": asdict(first.config),
        "items": len(sids),
        **about,
    }
    (folder / "serving.json").write_text(json.dumps(description, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_variant(folder: Path, name: str) -> TwoTower:
    """The model of one variant of a bundle, with exactly the exported weights."""
    about = ServedModel.describe(folder, name)
    sizes = {**about["model"], "pair_features": tuple(about["model"]["pair_features"])}
    model = TwoTower(TowerConfig(**sizes))
    tower = load_file(_path(folder, name, "user"))
    model.pair.load_state_dict({"weight": tower.pop("pair.weight")})
    model.user.load_state_dict(tower)
    model.item.load_state_dict(load_file(_path(folder, name, "item")))
    return model.eval()


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}


def _path(folder: Path, name: str, side: str) -> Path:
    return folder / name / f"{side}_tower.safetensors"
