"""The towers: deterministic start, learning, profiles, and an export that plain numpy serves alike."""

import json
import zlib

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gpl_core.errors import ContractError
from gpl_core.prerank.export import export_bundle, load_variant
from gpl_core.prerank.features import TowerBatch, UserProfiles, item_buckets, user_buckets
from gpl_core.prerank.loss import dual_label_loss
from gpl_core.prerank.serving import ServedModel
from gpl_core.prerank.two_tower import TowerConfig, TwoTower, build_model, content_basis, parameter_groups

CONFIG = TowerConfig(
    user_buckets=50,
    item_buckets=40,
    dimension=8,
    hidden=16,
    content_width=12,
    levels=3,
    codes=5,
    pair_features=("bid",),
)
USERS = ["u1", "ü2", "u3", "u1"]


def _world(seed: int = 0, items: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray, UserProfiles]:
    rng = np.random.default_rng(seed)
    content = rng.normal(size=(items, CONFIG.content_width)).astype(np.float32)
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    has_vector = np.ones(items, dtype=bool)
    has_vector[3] = False
    content[3] = np.nan
    sids = rng.integers(0, CONFIG.codes, (items, 3))
    sids[5] = -1
    profiles = UserProfiles(CONFIG.user_buckets, CONFIG.content_width)
    profiles.add(["u1", "ü2"], np.array([[1, 2, -1], [4, -1, -1]]), content)
    profiles.close_slice()
    return content, has_vector, sids, profiles


def _content(world):
    content, has_vector, _, _ = world
    return lambda index: np.where(has_vector[index, None], content[index], 0).astype(np.float32)


def _batch(users: list[str], items: np.ndarray, world, pair: np.ndarray) -> TowerBatch:
    _, _, sids, profiles = world
    bucket = user_buckets(users, CONFIG.user_buckets)
    return TowerBatch(
        torch.from_numpy(bucket),
        torch.from_numpy(profiles.of(bucket)),
        torch.from_numpy(item_buckets(items, CONFIG.item_buckets)),
        torch.from_numpy(_content(world)(items)),
        torch.from_numpy(sids[items]),
        torch.from_numpy(pair.astype(np.float32)),
    )


def test_equal_seeds_build_equal_models_and_other_seeds_do_not() -> None:
    one, same, other = (dict(build_model(CONFIG, seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["item.id.weight"], other["item.id.weight"])


def test_the_untrained_model_answers_the_prior_and_prefers_like_content() -> None:
    world = _world()
    model = build_model(CONFIG, 0)
    logits = model(_batch(["u3"] * 20, np.arange(6, 26), world, np.zeros((20, 1))))
    assert torch.sigmoid(logits).mean().item() == pytest.approx(CONFIG.prior_rate, abs=0.02)
    own, strange = model(_batch(["u1"] * 2, np.array([1, 20]), world, np.zeros((2, 1)))).tolist()
    content, _, _, profiles = world
    cosines = content[[1, 20]] @ profiles.of(user_buckets(["u1"], CONFIG.user_buckets))[0]
    assert (own > strange) == (cosines[0] > cosines[1])


def test_a_basis_starts_the_logit_at_the_cosine_inside_it() -> None:
    world = _world()
    content = torch.from_numpy(np.delete(world[0], 3, axis=0))
    basis = content_basis(content, CONFIG.dimension)
    torch.testing.assert_close(basis @ basis.T, torch.eye(CONFIG.dimension), atol=1e-5, rtol=0)
    model = build_model(CONFIG, 0, basis)
    items = np.array([1, 20, 11])
    batch = _batch(["u1"] * 3, items, world, np.zeros((3, 1)))
    inside = (batch.profile @ basis.T * (batch.content @ basis.T)).sum(dim=1)
    logits = model(batch)
    assert (logits - 2.0 * inside - logits[0] + 2.0 * inside[0]).abs().max() < 0.1


def test_a_basis_of_few_items_is_padded_with_zeros() -> None:
    basis = content_basis(torch.randn(3, 12), 8)
    assert torch.linalg.matrix_rank(basis) == 2  # three centered points span two directions
    assert (basis[2:] == 0).all()
    assert torch.isfinite(build_model(CONFIG, 0, basis).user.project.weight).all()


def test_id_and_code_embeddings_learn_at_a_tenth_of_the_rate() -> None:
    model = build_model(CONFIG, 0)
    full, tenth = parameter_groups(model, 1e-2)
    assert {id(p) for p in tenth["params"]} == {
        id(model.user.id.weight),
        id(model.item.id.weight),
        id(model.item.sid.weight),
    }
    assert len(full["params"]) + len(tenth["params"]) == len(list(model.parameters()))
    assert (full["lr"], tenth["lr"]) == (1e-2, 1e-3)


def test_training_separates_two_kinds_of_items() -> None:
    world = _world()
    model = build_model(CONFIG, 0)
    items = np.arange(6, 26)
    batch = _batch(["u1"] * 20, items, world, np.zeros((20, 1)))
    label = torch.from_numpy((items % 2).astype(np.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    exposed = torch.ones(20, dtype=torch.bool)
    for _ in range(200):
        optimizer.zero_grad()
        dual_label_loss(model(batch), label, exposed, torch.ones(20), 2.0).backward()
        optimizer.step()
    scores = model(batch).detach()
    assert scores[label == 1].min() > scores[label == 0].max()
    assert (model.item.sid.weight[0] == 0).all()


def test_lambda_zero_trains_the_exposed_only_model_bit_for_bit() -> None:
    world = _world()
    g = torch.Generator().manual_seed(3)
    items = np.arange(6, 30)
    batch = _batch(["u1", "ü2", "u3"] * 8, items, world, np.zeros((24, 1)))
    exposed = torch.rand(24, generator=g) < 0.5
    target = torch.rand(24, generator=g)

    def train(lambda_: float, weight: torch.Tensor) -> TwoTower:
        model = build_model(CONFIG, 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            dual_label_loss(model(batch), target, exposed, weight, lambda_).backward()
            optimizer.step()
        return model

    def same(left: TwoTower, right: TwoTower) -> bool:
        return all(torch.equal(a, b) for a, b in zip(left.parameters(), right.parameters()))

    weight = torch.rand(24, generator=g)
    exposed_only = train(0.0, weight)
    assert same(exposed_only, train(0.0, torch.ones(24)))
    assert same(exposed_only, train(2.0, torch.zeros(24)))
    assert not same(exposed_only, train(2.0, weight))


def test_profiles_are_unit_means_and_a_later_date_replaces_a_bucket() -> None:
    content, _, _, profiles = _world()
    bucket = user_buckets(["u1", "ü2", "u9"], CONFIG.user_buckets)
    assert len(set(bucket.tolist())) == 3
    mean = content[1] + content[2]
    assert profiles.of(bucket)[0] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)
    assert profiles.of(bucket)[1] == pytest.approx(content[4], abs=1e-6)
    assert (profiles.of(bucket)[2] == 0).all()
    profiles.add(["u1"], np.array([[7, -1, -1]]), content)
    profiles.close_slice()
    assert profiles.of(bucket)[0] == pytest.approx(content[7], abs=1e-6)
    assert profiles.of(bucket)[1] == pytest.approx(content[4], abs=1e-6)


def test_export_is_served_alike_by_the_reader_and_by_a_few_lines_without_this_project(tmp_path) -> None:
    world = _world()
    _, _, sids, profiles = world
    model = build_model(CONFIG, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        model.item.sid.weight[0].zero_()
    export_bundle(tmp_path, {"gpl": model}, profiles.table, sids, _content(world), {"run_date": "2026-01-04"})
    items, pair = np.array([3, 5, 29, 0]), np.array([[0.1], [0.0], [-2.0], [1.0]], dtype=np.float32)
    expected = model(_batch(USERS, items, world, pair)).detach().numpy()

    loaded = load_variant(tmp_path, "gpl")
    assert torch.equal(loaded(_batch(USERS, items, world, pair)), torch.from_numpy(expected))
    served = ServedModel(tmp_path, "gpl")
    assert served.score_pairs(USERS, items, pair) == pytest.approx(expected, abs=1e-5)
    for n, user in enumerate(served.users(USERS)):
        assert served.score(user, items, pair)[n] == pytest.approx(expected[n], abs=1e-5)

    about = json.loads((tmp_path / "serving.json").read_text())
    tower, table = (
        load_file(tmp_path / "gpl/user_tower.safetensors"),
        load_file(tmp_path / "profiles.safetensors")["table"],
    )
    vectors = load_file(tmp_path / "gpl/items.safetensors")["vectors"]
    for n, user in enumerate(USERS):
        b = zlib.crc32(user.encode()) % about["model"]["user_buckets"]
        taste = tower["project.weight"] @ table[b]
        hidden = tower["hidden.weight"] @ np.concatenate([tower["id.weight"][b], taste]) + tower["hidden.bias"]
        u = taste + tower["out.weight"] @ np.maximum(hidden, 0) + tower["out.bias"]
        v = vectors[items[n]]
        logit = u @ v[:-1] / np.sqrt(len(u)) + v[-1] + tower["pair.weight"][0] @ pair[n]
        assert logit == pytest.approx(expected[n], abs=1e-5)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]


def test_serving_refuses_what_it_does_not_know(tmp_path) -> None:
    world = _world()
    export_bundle(tmp_path, {"gpl": build_model(CONFIG, 0)}, world[3].table, world[2], _content(world), {})
    with pytest.raises(ContractError, match="no variant 'exposed_only'"):
        ServedModel(tmp_path, "exposed_only")
    with pytest.raises(ContractError, match="no variant 'exposed_only'"):
        load_variant(tmp_path, "exposed_only")
    with pytest.raises(ContractError, match="pair features bid"):
        ServedModel(tmp_path, "gpl").score_pairs(["u1"], np.array([1]))
    (tmp_path / "serving.json").write_text('{"format": "other"}')
    with pytest.raises(ContractError, match="format 'other'"):
        ServedModel(tmp_path, "gpl")
