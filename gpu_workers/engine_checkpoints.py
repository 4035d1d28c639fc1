"""Checkpoints of a DeepSpeed training: each rank's share in a file of its own, without DeepSpeed's pickles."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpl_core.checkpoint import read_checkpoint, write_checkpoint
from gpu_workers.ranks import Ranks

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_SCALER = "loss_scaler"
_OBJECTS = (_SCALER, "param_slice_mappings")  # the scaler's figures are kept; the mappings are rebuilt


class EngineCheckpoints:
    """The checkpoints of one training: `<folder>/<tag>/rank-<n>.safetensors`; a later one has a higher tag.

    Only one that is whole on every rank counts.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder, self._ranks = folder, ranks

    def save(self, tag: str, engine: Any, facts: Mapping[str, Any]) -> None:
        """Write every rank's file, then remove earlier checkpoints. ``facts``: what this rank keeps with it."""
        with self._ranks.together(), _at_rest(engine):
            write_checkpoint(self._file(tag), {"engine": _state_of(engine), "facts": facts})
        self._remove(t for t in self._tags() if t < tag)

    def restore(self, engine: Any) -> dict[str, Any] | None:
        """Put the newest whole checkpoint into ``engine``; returns this rank's facts, None without one."""
        mine = {tag: state for tag in self._tags() if (state := read_checkpoint(self._file(tag)))}
        held = [set(json.loads(text)) for text in self._ranks.gather_text(json.dumps([*mine]))]
        newest = max(set.intersection(*held), default=None)
        self._remove(t for t in self._tags() if t != newest)
        if newest is None:
            return None
        with _at_rest(engine):
            _restore(engine, mine[newest]["engine"], self._ranks)
        facts: dict[str, Any] = mine[newest]["facts"]
        return facts

    def remove(self) -> None:
        """Delete all checkpoints."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _remove(self, tags: Iterable[str]) -> None:
        for tag in tags:  # the ranks of a machine share the folder: any of them may be first
            shutil.rmtree(self._folder / tag, ignore_errors=True)

    def _tags(self) -> list[str]:
        return [path.name for path in self._folder.glob("*")]

    def _file(self, tag: str) -> Path:
        return self._folder / tag / f"rank-{self._ranks.rank}.safetensors"


@contextmanager
def _at_rest(engine: Any) -> Iterator[None]:
    """ZeRO 3 holds no parameter but its own share meanwhile; nothing for the other stages."""
    getattr(engine.optimizer, "checkpoint_event_prologue", lambda: None)()
    yield
    getattr(engine.optimizer, "checkpoint_event_epilogue", lambda: None)()


def _state_of(engine: Any) -> dict[str, Any]:
    """This rank's part of all that the next optimizer step depends on."""
    scaler = getattr(engine.optimizer, _SCALER, None)
    # DeepSpeed leaves out one name of a frozen weight: tied embeddings have two.
    frozen = {n for n, p in engine.module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    module = engine.module_state_dict(exclude_frozen_parameters=True)
    return {
        "module": {name: value for name, value in module.items() if name not in frozen},
        "optimizer": {k: v for k, v in engine.optimizer.state_dict().items() if k not in _OBJECTS},
        "scaler": {k: v for k, v in vars(scaler).items() if isinstance(v, bool | int | float)} if scaler else {},
        "schedule": engine.lr_scheduler.state_dict(),
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
    }


def _restore(engine: Any, state: Mapping[str, Any], ranks: Ranks) -> None:
    """The reverse of `_state_of`; as DeepSpeed's own loading, which cannot do without pickle."""
    engine.module.load_state_dict(state["module"], strict=False)
    optimizer, held = engine.optimizer, dict(state["optimizer"])
    if scaler := getattr(optimizer, _SCALER, None):
        vars(scaler).update(state["scaler"])
        held[_SCALER] = scaler
    if engine.zero_optimization():
        shares: list[Any] = [None] * ranks.size
        shares[ranks.rank] = held
        optimizer.load_state_dict(shares, load_from_fp32_weights=engine.zero_load_from_fp32_weights())
    else:
        optimizer.load_state_dict(held)
    engine.lr_scheduler.load_state_dict(state["schedule"])
    for name, value in state["counters"].items():
        setattr(engine, name, value)
