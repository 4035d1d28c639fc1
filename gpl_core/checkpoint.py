"""Resumable state in one file of tensors and JSON: there whole or not at all, checked when read, never unpickled."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger("gpl")


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path``, aside and renamed: a kill leaves the file before, or the new one.

    Any nesting of dicts, lists, tuples, tensors and what JSON knows; TypeError for anything else.
    """
    tensors: dict[str, Tensor] = {}
    outline = json.dumps(_outline(state, tensors))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, aside, metadata={"outline": outline, "sha256": _digest(outline, tensors)})
        os.replace(aside, path)
    except BaseException:  # a full disk
        aside.unlink(missing_ok=True)
        raise


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """What `write_checkpoint` was given, tensors on the CPU; None without a file or, logged, when it is damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as held:
            facts = held.metadata()
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 (safe_open is no mapping)
        if facts["sha256"] != _digest(facts["outline"], tensors):
            raise ValueError("it differs from its checksum")
        state: dict[str, Any] = _restored(json.loads(facts["outline"]), tensors)
        return state
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): what it held is computed again", path, error)
        return None


def _outline(value: Any, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; its tensors go to ``tensors``, under the names that stand in their places."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):  # as pairs: JSON would turn the keys of an optimizer's state into text
        return {"dict": [[key, _outline(held, tensors)] for key, held in value.items()]}
    if isinstance(value, list | tuple):
        items = [_outline(held, tensors) for held in value]
        return items if isinstance(value, list) else {"tuple": items}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"checkpoint: expected tensors and what JSON knows, got {type(value).__name__}")


def _restored(outline: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The reverse of `_outline`."""
    if isinstance(outline, list):
        return [_restored(held, tensors) for held in outline]
    if not isinstance(outline, dict):
        return outline
    ((kind, held),) = outline.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "tuple":
        return tuple(_restored(one, tensors) for one in held)
    return {key: _restored(one, tensors) for key, one in held}


def _digest(outline: str, tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(outline.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
