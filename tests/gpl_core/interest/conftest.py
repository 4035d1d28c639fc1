"""Tiny checkpoints of every family, made once per session, and small worlds of SIDs to search in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gpl_core.interest.base_model import FAMILIES, TinySettings, make_tiny_checkpoint
from gpl_core.interest.interest_model import InterestModel, ModelSettings, build_interest_model
from gpl_core.interest.trie_scoring import DeviceTrie
from gpl_core.sids.trie import Trie

TINY = TinySettings(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=48, max_positions=256)
SHAPES = {family: replace(TINY, family=family, head_dim=16 * (family == "qwen3")) for family in FAMILIES}
each_family = pytest.mark.parametrize("family", FAMILIES, indirect=True, scope="session")
"""Runs a test of the fixtures below on a model of each family; the others run on Qwen2 alone."""


@dataclass(frozen=True)
class World:
    """A model, a catalog's trie and some histories over it."""

    model: InterestModel
    trie: DeviceTrie
    histories: list[np.ndarray]


@pytest.fixture(scope="session")
def family(request: pytest.FixtureRequest) -> str:
    return getattr(request, "param", "qwen2")


@pytest.fixture(scope="session")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder with random weights."""
    folder = tmp_path_factory.mktemp(f"tiny_{family}")
    make_tiny_checkpoint(folder, SHAPES[family])
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> InterestModel:
    """L = 3, C = 8, in float64: the tests compare orders, and rounding must not decide them.

    LoRA's B matrices and the SID rows are drawn at random, as if trained: an untrained B is 0 and would hide LoRA.
    """
    model = build_interest_model(checkpoint, ModelSettings(3, 8, lora_rank=4), dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)
    return model.eval()


@pytest.fixture(scope="session")
def world(model: InterestModel) -> World:
    """60 distinct SIDs out of 512, five users with 1 to 9 events."""
    return make_world(model, np.random.default_rng(7), items=60)


def make_world(model: InterestModel, rng: np.random.Generator, items: int, users: int = 5) -> World:
    """A random catalog of ``items`` items (SIDs may repeat) and ``users`` histories of 1 to 9 events."""
    sids = rng.integers(0, model.vocabulary.codes, (items, model.vocabulary.levels))
    histories = [sids[rng.integers(0, items, rng.integers(1, 10))] for _ in range(users)]
    return World(model, DeviceTrie(Trie.build(sids, model.vocabulary.codes)), histories)


def changed_tensors(model: InterestModel, checkpoint: Path) -> list[str]:
    """The stored tensors of the base at ``checkpoint`` that the model no longer holds bit for bit."""
    whole = model.body.get_base_model().state_dict()
    whole = {name.replace(".token_adapter", "").replace(".base_layer", ""): w for name, w in whole.items()}
    stored = load_file(checkpoint / "model.safetensors")
    return [name for name, w in stored.items() if not torch.equal(whole[name][: len(w)], w)]
