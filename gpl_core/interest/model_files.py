"""A trained interest model on disk, without the weights of a base that stayed frozen.

``adapter.safetensors`` (what was trained: LoRA's matrices or a small body, SID rows, heads) and ``interest_model.json``
(format, settings, the base's fingerprint, the sid_version). The artifact store copies the folder and writes the
artifact's manifest last.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from gpl_core.errors import LineageError
from gpl_core.interest.base_model import base_fingerprint
from gpl_core.interest.interest_model import (
    InterestModel,
    ModelSettings,
    adapter_state,
    build_interest_model,
    load_adapter_state,
)

WEIGHTS = "adapter.safetensors"
DESCRIPTION = "interest_model.json"
FORMAT = 4  # of the bundle: 3 had no recent events, 2 scored by the mean content of nodes, 1 by SIDs alone


def save_bundle(
    model: InterestModel, folder: str | Path, checkpoint: str | Path, *, sid_version: str, max_events: int
) -> None:
    """Write the bundle to ``folder`` (created if absent), the description last.

    ``checkpoint``: the base it was trained on, recorded by its fingerprint; ``max_events``: the longest history it was
    trained on, which the search must not exceed.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_file(adapter_state(model), path / WEIGHTS)
    body = {
        "format": FORMAT,
        "settings": asdict(model.settings),
        "base_fingerprint": base_fingerprint(checkpoint),
        "sid_version": sid_version,
        "max_events": max_events,
    }
    (path / DESCRIPTION).write_text(json.dumps(body, indent=2, sort_keys=True) + "\n")


def read_description(folder: str | Path) -> dict[str, Any]:
    """The bundle's description, its `settings` as ModelSettings; LineageError where an earlier release wrote it."""
    file = Path(folder) / DESCRIPTION
    body: dict[str, Any] = json.loads(file.read_text())
    if body.get("format", 1) != FORMAT:
        raise LineageError(
            f"interest model: {file} is of format {body.get('format', 1)}, this release reads format {FORMAT}; "
            "train the model again: gpl run --only train_interest_model --force"
        )
    return body | {"settings": ModelSettings(**body["settings"])}


def load_bundle(folder: str | Path, checkpoint: str | Path, *, sid_version: str) -> InterestModel:
    """The trained model, in eval mode, with the logits it had when it was saved.

    The artifact store checks the files. Raises LineageError when the model was trained for another ``sid_version`` or
    on another base than ``checkpoint``.
    """
    body = read_description(folder)
    if body["sid_version"] != sid_version:
        raise LineageError(
            f"interest model: trained for sid_version {body['sid_version']}, asked to work on {sid_version}; "
            "train a model for this sid_version, or use the one that was."
        )
    found = base_fingerprint(checkpoint)
    if body["base_fingerprint"] != found:
        raise LineageError(
            f"interest model: trained on the base {body['base_fingerprint'][:16]}, the checkpoint at {checkpoint} is "
            f"{found[:16]}; point interest.base_model at the base it was trained on."
        )
    model = build_interest_model(checkpoint, body["settings"])
    load_adapter_state(model, load_file(Path(folder) / WEIGHTS))
    return model.eval()
