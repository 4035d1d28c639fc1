"""The body is frozen, the SID rows and LoRA learn, and a bundle gives back the same model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gpl_core.errors import LineageError, MissingInputError, UsageError
from gpl_core.interest.attention import CausalPlan
from gpl_core.interest.base_model import TinySettings, load_base, make_tiny_checkpoint
from gpl_core.interest.content import leaf_content
from gpl_core.interest.interest_model import (
    InterestModel,
    ModelSettings,
    adapter_state,
    build_interest_model,
    load_adapter_state,
)
from gpl_core.interest.model_files import DESCRIPTION, WEIGHTS, load_bundle, read_description, save_bundle
from gpl_core.interest.packing import UserHistory, pack_targets
from gpl_core.interest.training import target_log_probs
from gpl_core.interest.trie_scoring import DeviceTrie, level_logits
from gpl_core.sids.content_table import ContentTable
from gpl_core.sids.item_catalog import ItemCatalog
from gpl_core.sids.trie import Trie
from tests.gpl_core.interest.conftest import TINY, changed_tensors, each_family
from tests.gpl_core.interest.oracle import interest_loss

SETTINGS = ModelSettings(levels=3, codes=8, lora_rank=4)


def histories(rng: np.random.Generator, users: int = 6) -> list[UserHistory]:
    return [UserHistory(rng.integers(0, 8, (n, 3)), np.ones(n, dtype=bool)) for n in rng.integers(2, 8, users)]


def train_a_little(model: InterestModel, steps: int = 3) -> list[float]:
    rows = histories(np.random.default_rng(0))
    trie = DeviceTrie(Trie.build(np.concatenate([h.sids for h in rows]), 8))
    pack = pack_targets(model.vocabulary, rows, 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = interest_loss(target_log_probs(model, trie, pack))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def hidden_of(model: InterestModel) -> torch.Tensor:
    ids = torch.tensor([*model.vocabulary.token_indices[::5], 3, 7])
    with torch.no_grad():
        return model.hidden(ids, torch.arange(len(ids)), CausalPlan(np.array([len(ids)])))


@each_family
def test_training_moves_new_rows_and_lora_and_no_other_bit(checkpoint: Path) -> None:
    model = build_interest_model(checkpoint, SETTINGS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train_a_little(model)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, before[name])
        learns = "trainable_tokens_delta" in name or "lora_" in name or name == "scale"
        assert same != learns, name
    assert changed_tensors(model, checkpoint) == []
    assert (model.input_rows != before[next(n for n in before if "tokens_delta" in n)]).any(dim=1).all()


@each_family
def test_every_linear_layer_has_lora(checkpoint: Path) -> None:
    model = build_interest_model(checkpoint, SETTINGS)
    names = {name.split(".lora_A")[0].rsplit(".", 1)[1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_tied_embeddings_stay_tied(checkpoint: Path) -> None:
    model = build_interest_model(checkpoint, SETTINGS)
    train_a_little(model)
    assert model.output_rows is model.input_rows
    model.merge()
    base = model.body.get_base_model()
    first, size = model.vocabulary.first_id, model.vocabulary.size
    merged = base.get_output_embeddings().weight[first : first + size]
    torch.testing.assert_close(merged, model.input_rows, rtol=0, atol=0)


def test_an_untied_base_trains_output_rows_of_its_own(tmp_path: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "untied")
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    base.config.tie_word_embeddings = False
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach() * 2)
    base.save_pretrained(tmp_path / "untied")
    model = build_interest_model(tmp_path / "untied", SETTINGS)
    start = model.output_rows.detach().clone()
    train_a_little(model)
    assert model.output_rows is not model.input_rows
    assert not torch.equal(model.output_rows, start)


@each_family
def test_packed_hidden_states_equal_the_library_s_own_forward(checkpoint: Path) -> None:
    """The model as Hugging Face runs it, one user at a time and with its own attention, is the oracle."""
    model = build_interest_model(checkpoint, SETTINGS, dtype=torch.float64)
    plain, _ = load_base(checkpoint, torch.float64, "sdpa")  # "eager" takes its softmax in float32
    plain.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    first, size = model.vocabulary.first_id, model.vocabulary.size
    with torch.no_grad():
        plain.get_input_embeddings().weight[first : first + size] = model.input_rows
    lengths = np.array([7, 1, 30, 2, 7, 25])
    ids = torch.randint(0, first + size, (int(lengths.sum()),), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths])
    packed = model.hidden(ids, positions, CausalPlan(lengths))
    start = 0
    for length in lengths:
        alone = plain.model(input_ids=ids[None, start : start + length]).last_hidden_state[0]
        torch.testing.assert_close(packed[start : start + length], alone, rtol=0, atol=1e-10)
        start += length


@each_family
def test_merging_lora_keeps_the_function(model: InterestModel, checkpoint: Path) -> None:
    copy = build_interest_model(checkpoint, model.settings, dtype=torch.float64)
    load_adapter_state(copy, adapter_state(model))
    expected = [level_logits(copy, hidden_of(copy), level) for level in range(3)]
    copy.merge()
    merged = [level_logits(copy, hidden_of(copy), level) for level in range(3)]
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-10)


def test_codebook_rows_keep_the_codebooks_geometry_and_the_base_s_scale(checkpoint: Path) -> None:
    codebooks = np.random.default_rng(0).normal(size=(3, 8, 5))
    codebooks[0, 1] = codebooks[0, 0] + 1e-3  # two near codes must start near
    model = build_interest_model(checkpoint, SETTINGS, codebooks)
    base = load_base(checkpoint, torch.float32, "eager")[0].get_input_embeddings().weight.detach()
    rows = model.input_rows.detach()
    spread = (base - base.mean(0)).norm(dim=1).mean()
    for level in range(3):
        mine = rows[level * 8 : (level + 1) * 8] - base.mean(0)
        torch.testing.assert_close(mine.norm(dim=1).mean(), spread, rtol=0.01, atol=0)
    distance = torch.cdist(rows[:8], rows[:8])
    assert distance[0, 1] < 0.05 * distance[0, 2:].min()


@each_family
@pytest.mark.parametrize(("rows", "norm"), [(1, 1), (100, 30), (0.01, 0.05)], ids=["plain", "large", "small"])
def test_the_first_loss_is_near_the_uniform_one_on_any_base(tmp_path, checkpoint, rows: float, norm: float) -> None:
    """Whatever the norms of the base's rows and of what its body puts out, with content and without it.

    Every SID of 512 is in the catalog, one item each.
    """
    shutil.copytree(checkpoint, tmp_path / "base")
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.embed_tokens.weight"] *= rows
    weights["model.norm.weight"] *= norm
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    random = np.random.default_rng(0)
    catalog = ItemCatalog(np.arange(512), np.stack(np.unravel_index(np.arange(512), (8, 8, 8)), axis=1), 8)
    vectors = random.normal(size=(512, 64)).astype(np.float32)  # nearly orthogonal, as an encoder's are
    cone = np.where(np.arange(512) % 100, np.float32(8), np.float32(-8))[:, None]  # a few lie opposite
    tables = [
        ContentTable(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.arange(512))
        for rows in (vectors, vectors + cone)
    ]
    bought = [random.integers(0, 512, n) for n in random.integers(2, 8, 30)]
    rows_of = [UserHistory(catalog.sids_of(items), np.ones(len(items), dtype=bool), items) for items in bought]
    for content in (None, *tables):
        settings = replace(SETTINGS, content_width=64 if content else 0)
        model = build_interest_model(tmp_path / "base", settings, random.normal(size=(3, 8, 5)))
        trie = DeviceTrie(catalog.trie, content=leaf_content(catalog, content))
        pack = pack_targets(model.vocabulary, rows_of, 20)
        loss = interest_loss(target_log_probs(model, trie, pack, content)).item()
        assert loss <= 1.05 * np.log(512)
    with torch.no_grad():
        spread = level_logits(model, hidden_of(model), 0).std(dim=1).mean()
    assert 0.05 < spread < 1, "neither far from uniform nor flat"


def test_the_same_settings_make_the_same_checkpoint_and_model(tmp_path: Path) -> None:
    tiny = TinySettings(hidden=16, layers=1, heads=2, kv_heads=1, intermediate=16, max_positions=64)
    for name in "ab":
        make_tiny_checkpoint(tmp_path / name, tiny)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    one, two = (adapter_state(build_interest_model(tmp_path / name, SETTINGS)) for name in "ab")
    assert all(torch.equal(one[key], two[key]) for key in one)


# --- a small body that trains whole


WHOLE = ModelSettings(levels=3, codes=8, lora_rank=0, dropout=0.4)


def test_a_small_body_trains_whole_but_for_its_words(checkpoint: Path) -> None:
    model = build_interest_model(checkpoint, WHOLE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train_a_little(model, 5)
    assert losses[-1] < losses[0]
    frozen = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert frozen == ["body.base_model.model.model.embed_tokens.token_adapter.base_layer.weight"]
    assert not any("lora_" in name for name in before)


def test_a_body_trained_whole_comes_back_from_its_bundle(checkpoint: Path, tmp_path: Path) -> None:
    model = build_interest_model(checkpoint, WHOLE)
    train_a_little(model)
    save_bundle(model, tmp_path, checkpoint, sid_version="sid-1", max_events=20)
    again = load_bundle(tmp_path, checkpoint, sid_version="sid-1")
    assert torch.equal(hidden_of(again), hidden_of(model.eval()))
    again.merge()
    torch.testing.assert_close(hidden_of(again), hidden_of(model))


def test_dropout_is_in_the_body_and_in_training_only(checkpoint: Path) -> None:
    model = build_interest_model(checkpoint, WHOLE)
    assert not torch.equal(hidden_of(model.train()), hidden_of(model))
    assert torch.equal(hidden_of(model.eval()), hidden_of(model))
    off = build_interest_model(checkpoint, replace(WHOLE, dropout=0.0))
    assert torch.equal(hidden_of(off.train()), hidden_of(model))


# --- bundles


@pytest.fixture
def bundle(tmp_path: Path, checkpoint: Path) -> tuple[Path, InterestModel]:
    model = build_interest_model(checkpoint, SETTINGS)
    train_a_little(model)
    save_bundle(model, tmp_path / "bundle", checkpoint, sid_version="sid-1", max_events=20)
    return tmp_path / "bundle", model.eval()


def test_a_reload_gives_identical_hidden_states_and_rows(bundle, checkpoint: Path) -> None:
    folder, model = bundle
    again = load_bundle(folder, checkpoint, sid_version="sid-1")
    assert torch.equal(hidden_of(again), hidden_of(model))
    assert torch.equal(again.output_rows, model.output_rows)


def test_the_bundle_holds_no_row_of_the_base(bundle) -> None:
    folder, model = bundle
    state = load_file(folder / WEIGHTS)
    rows = [value for name, value in state.items() if "token" in name]
    assert [tuple(r.shape) for r in rows] == [(24, 32)]
    assert all("lora_" in name or "trainable_tokens" in name or name == "scale" for name in state)
    assert sum(v.numel() for v in state.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_another_sid_version_or_base_is_refused_naming_both(bundle, tmp_path: Path, checkpoint: Path) -> None:
    folder, _ = bundle
    with pytest.raises(LineageError, match=r"sid-1.*sid-2"):
        load_bundle(folder, checkpoint, sid_version="sid-2")
    make_tiny_checkpoint(tmp_path / "other", replace(TINY, seed=1))  # the same shape
    with pytest.raises(LineageError, match="trained on the base"):
        load_bundle(folder, tmp_path / "other", sid_version="sid-1")


def test_a_bundle_of_an_earlier_release_is_refused_with_what_to_do(bundle) -> None:
    body = json.loads((bundle[0] / DESCRIPTION).read_text())
    del body["format"]  # format 1 did not say
    (bundle[0] / DESCRIPTION).write_text(json.dumps(body))
    with pytest.raises(LineageError, match=r"format 1, .* format 4; train the model again"):
        read_description(bundle[0])


def test_a_tokenizer_of_another_checkpoint_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    """Ten tokens more than the model has rows for: their rows would be made up."""
    shutil.copytree(checkpoint, tmp_path / "mixed")
    tokenizer = load_base(checkpoint, torch.float32, "eager")[1]
    tokenizer.add_tokens([f"<word_{n}>" for n in range(10)])
    tokenizer.save_pretrained(tmp_path / "mixed")
    with pytest.raises(UsageError, match=r"tokenizer at .*mixed has \d+ tokens, the model \d+ rows"):
        build_interest_model(tmp_path / "mixed", SETTINGS)


def test_a_checkpoint_that_is_none_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(MissingInputError, match="expected a checkpoint folder"):
        build_interest_model(tmp_path, SETTINGS)
    shutil.copytree(checkpoint, tmp_path / "other")
    (tmp_path / "other/tokenizer.json").rename(tmp_path / "away")
    with pytest.raises(MissingInputError, match=r"other has no tokenizer\.json"):
        build_interest_model(tmp_path / "other", SETTINGS)
    (tmp_path / "away").rename(tmp_path / "other/tokenizer.json")
    config = json.loads((tmp_path / "other/config.json").read_text())
    for change, said in (
        ({"model_type": "mistral"}, "'mistral'.*qwen2, qwen3, llama"),
        ({"use_sliding_window": True}, "sliding windows"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding windows"),
    ):
        (tmp_path / "other/config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UsageError, match=said):
            build_interest_model(tmp_path / "other", SETTINGS)
