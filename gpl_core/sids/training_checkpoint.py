"""Checkpoints of a training run (safetensors), replaced atomically: a kill leaves the old or the new one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

_NAME = "checkpoint.safetensors"


def save_checkpoint(
    folder: str | Path, identity: Mapping[str, object], model: nn.Module, optimizer: torch.optim.Optimizer, done: int
) -> None:
    """Writes the state after ``done`` epochs; ``identity`` says which run it belongs to."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{number}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    partial = target / f".{_NAME}.{os.getpid()}"
    save_file(tensors, partial, metadata={"done": str(done), "identity": _canonical(identity)})
    os.replace(partial, target / _NAME)


def finished_epochs(folder: str | Path, identity: Mapping[str, object]) -> int:
    """Finished epochs of the checkpoint in ``folder``; 0 without one, or where it is another run's."""
    path = Path(folder) / _NAME
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as held:
        facts = held.metadata()
    return int(facts["done"]) if facts["identity"] == _canonical(identity) else 0


def load_checkpoint(folder: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores model and optimizer in place from the checkpoint in ``folder``."""
    with safe_open(Path(folder) / _NAME, framework="pt") as held:
        tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 (safe_open is no mapping)
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            states.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _canonical(identity: Mapping[str, object]) -> str:
    return json.dumps(identity, sort_keys=True)
