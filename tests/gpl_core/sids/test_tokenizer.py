"""Training, saving and using tokenizers: the bugs that public code of this kind has, one test each."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import OneCycleLR
from vector_quantize_pytorch import ResidualVQ

from gpl_core.conf.sections import TokenizerGates
from gpl_core.errors import ContractError, GateError
from gpl_core.sids.health import (
    check_gates,
    collision_share,
    level_usage,
    mean_cosine,
    measure,
)
from gpl_core.sids.kmeans import residual_kmeans
from gpl_core.sids.quantizer import ResidualQuantizer, assign
from gpl_core.sids.rqvae import (
    RqVae,
    RqVaeSettings,
    codes_for,
    epochs_for,
    one_cycle,
    relational_loss,
)
from gpl_core.sids.tokenizer import load_tokenizer
from tests.bench.quality.neighbors import neighbor_recall
from tests.bench.quality.rq_kmeans import fit_rq_kmeans
from tests.gpl_core.sids.plain_torch import LocalEngine, fit

GATES = TokenizerGates().model_dump()
SMALL = RqVaeSettings(codes=16, hidden=(32,), latent=8, batch_size=64, epochs=30, warmup_epochs=5)


def embeddings(count: int, dim: int = 12, seed: int = 0) -> np.ndarray:
    """Unit vectors around 20 center."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(20, dim))[rng.integers(20, size=count)] + 0.5 * rng.normal(size=(count, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def catalog() -> np.ndarray:
    return embeddings(300)


@pytest.fixture(scope="module")
def tokenizer(catalog):
    return fit(catalog, SMALL)


# ---- the quantizer's formulas against vector-quantize-pytorch
# ----------------------------------------------------------


def twins() -> tuple[ResidualQuantizer, ResidualVQ, torch.Tensor]:
    """Our quantizer and the library's with the same codebooks, and a batch."""
    generator = torch.Generator().manual_seed(0)
    books = torch.randn(3, 8, 4, generator=generator) * torch.tensor([1.0, 0.5, 0.25])[:, None, None]
    ours = ResidualQuantizer(3, 8, 4)
    theirs = ResidualVQ(
        dim=4, num_quantizers=3, codebook_size=8, decay=0.9, commitment_weight=1.0, rotation_trick=False,
        threshold_ema_dead_code=0, kmeans_init=False,
    )  # fmt: skip
    for level in range(3):
        ours.set_codes(level, torch.arange(8), books[level], torch.ones(8))
        book = theirs.layers[level]._codebook
        book.embed.data.copy_(books[level])
        book.embed_avg.data.copy_(books[level])
    return ours, theirs, torch.randn(50, 4, generator=generator)


def test_codes_output_loss_and_gradient_equal_the_librarys():
    ours, theirs, x = twins()
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = ours(mine)
    output, codes, losses = theirs(other[None])
    torch.testing.assert_close(got.assignment.codes, codes[0])
    torch.testing.assert_close(got.latent, output[0])
    torch.testing.assert_close(got.commitment, losses.sum())
    (gradient,) = torch.autograd.grad(got.commitment, mine, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(losses.sum(), other, retain_graph=True)[0])
    # Straight through: the decoder's gradient reaches the latent once. The library adds it once per level.
    weight = torch.linspace(-1, 1, 4).expand(50, 4)
    torch.testing.assert_close(torch.autograd.grad(got.latent, mine, weight)[0], weight)
    torch.testing.assert_close(torch.autograd.grad(output[0], other, weight)[0], 3 * weight)


def test_an_ema_step_equals_the_librarys_whatever_the_shards():
    ours, theirs, x = twins()
    theirs(x[None])
    parts = [ours.statistics(assign(part, ours.codebooks)) for part in x.split(17)]
    ours.ema_step(sum(parts), decay=0.9)
    for level in range(3):
        torch.testing.assert_close(ours.codebooks[level], theirs.layers[level]._codebook.embed[0])


def test_every_level_pulls_the_encoder_towards_its_code():
    # Public code detaches the running residual, so that only level 1 has a gradient.
    ours, _, x = twins()
    for level in range(1, 4):
        latent = x.clone().requires_grad_()
        part = ResidualQuantizer(level, 8, 4)
        for n in range(level):
            part.set_codes(n, torch.arange(8), ours.codebooks[n], torch.ones(8))
        found = part(latent)
        (gradient,) = torch.autograd.grad(found.commitment, latent)
        after = torch.cat([found.assignment.residuals[:, 1:], (x - found.assignment.quantized)[:, None]], dim=1)
        torch.testing.assert_close(gradient, 2 * after.sum(dim=1) / x.numel())


def test_training_and_inference_assign_alike(catalog, tokenizer):
    model = RqVae(12, SMALL)
    model.encoder.load_state_dict(tokenizer.encoder.state_dict())
    model.decoder.load_state_dict(tokenizer.decoder.state_dict())
    model.quantizer.codebooks.copy_(tokenizer.codebooks)
    x = (torch.as_tensor(catalog) - tokenizer.mean) * tokenizer.scale
    _, _, found = model(x, True)
    np.testing.assert_array_equal(found.codes.numpy(), tokenizer.encode(catalog)[0])


def test_codes_are_the_nearest_level_by_level(catalog, tokenizer):
    full = tokenizer.encode(catalog)
    residual = tokenizer.encoder((torch.as_tensor(catalog) - tokenizer.mean) * tokenizer.scale).numpy().astype(float)
    for level, book in enumerate(tokenizer.codebooks.numpy().astype(float)):
        distance = np.square(residual[:, None] - book[None]).sum(-1)
        chosen = full.codes[:, level]
        np.testing.assert_allclose(distance[np.arange(len(chosen)), chosen], distance.min(axis=1), atol=1e-5)
        if level == 2:
            np.testing.assert_allclose(full.last_residual, residual, atol=1e-5)
        residual = residual - book[chosen]
    np.testing.assert_allclose(full.residual_norm, np.linalg.norm(residual, axis=1), atol=1e-5)


# ---- training
# ---------------------------------------------------------------------------------------------------------


def test_training_learns_and_uses_the_codes(catalog, tokenizer):
    health = measure(tokenizer, catalog)
    assert health.reconstruction > 0.7
    assert min(health.perplexity) > 0.5 * 16
    untrained = fit(catalog, dataclasses.replace(SMALL, epochs=6))
    assert measure(untrained, catalog).reconstruction < health.reconstruction


def test_same_seed_same_bits_another_seed_others(catalog, tokenizer):
    again = fit(catalog, SMALL)
    assert torch.equal(again.codebooks, tokenizer.codebooks)
    assert not torch.equal(fit(catalog, dataclasses.replace(SMALL, seed=1)).codebooks, tokenizer.codebooks)


KILLED_AT_17 = """
import os, signal, sys
import numpy as np, torch
from gpl_core.sids.rqvae import RqVaeSettings
from tests.gpl_core.sids.plain_torch import fit

def kill(epoch, figures):
    if epoch == 17:
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
fit(np.load(sys.argv[1]), eval(sys.argv[2]), progress=kill, checkpoint_dir=sys.argv[3])
"""


def test_kill_9_in_mid_training_then_again_gives_the_undisturbed_result(catalog, tokenizer, tmp_path: Path):
    np.save(tmp_path / "catalog.npy", catalog)
    command = [sys.executable, "-c", KILLED_AT_17, str(tmp_path / "catalog.npy"), repr(SMALL), str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        command, cwd=Path(__file__).parents[3], env=env, capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    done = []
    resumed = fit(catalog, SMALL, progress=lambda epoch, _: done.append(epoch), checkpoint_dir=tmp_path)
    assert done[0] == 18
    assert torch.equal(resumed.codebooks, tokenizer.codebooks)
    for a, b in zip(resumed.encoder.parameters(), tokenizer.encoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_run_is_not_continued(catalog, tmp_path: Path):
    short = dataclasses.replace(SMALL, epochs=8)
    fit(catalog, short, checkpoint_dir=tmp_path)
    done = []
    fit(catalog, dataclasses.replace(short, seed=5), progress=lambda e, _: done.append(e), checkpoint_dir=tmp_path)
    assert done[0] == 1


def test_the_relational_loss_is_the_divergence_of_similarity_distributions():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 4)), rng.normal(size=(5, 4))
    expected = 0.0
    for n in range(5):
        others = [m for m in range(5) if m != n]
        p, q = (
            np.exp([a[n] @ a[m] / np.linalg.norm(a[n]) / np.linalg.norm(a[m]) / 0.1 for m in others]) for a in (x, y)
        )
        p, q = p / p.sum(), q / q.sum()
        expected += (p * np.log(p / q)).sum() / 5
    found = relational_loss(torch.as_tensor(x), torch.as_tensor(y), 0.1)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert float(relational_loss(torch.as_tensor(x), torch.as_tensor(3 * x), 0.1)) == pytest.approx(0, abs=1e-9)
    assert float(relational_loss(torch.as_tensor(x[:2]), torch.as_tensor(y[:2]), 0.1)) == 0


def test_the_relational_loss_keeps_neighbors_through_quantization(catalog):
    def recall(weight: float) -> float:
        found = fit(catalog, dataclasses.replace(SMALL, relational=weight))
        return float(neighbor_recall(catalog, found.decode(found.encode(catalog)[0])).mean())

    assert recall(0.3) > recall(0.0) + 0.01


class TwoRanksInTurn(LocalEngine):
    """Counts what a rank would add up: gradients and statistics must be sums over shards, never means of means."""

    def prepare(self, model, optimizer, parts, batch_size):
        super().prepare(model, optimizer, parts, batch_size)
        assert parts == 2


def test_shards_add_up_to_the_batch(catalog):
    # An odd batch: shards of unequal size must not weigh alike.
    model = RqVae(12, SMALL)
    x = torch.as_tensor(catalog[:7])
    whole, *_ = model(x, False)
    parts = [model(x[n::2], False)[0] * (len(x[n::2]) / 7) for n in range(2)]
    torch.testing.assert_close(whole, sum(parts))
    fit(catalog[:63], dataclasses.replace(SMALL, epochs=7), engine=TwoRanksInTurn())


def test_the_learning_rate_is_torchs_one_cycle():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    schedule = OneCycleLR(optimizer, 2e-3, total_steps=50, cycle_momentum=False)
    for step in range(50):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(one_cycle(step, 50, 2e-3), rel=1e-9)
        optimizer.step()
        if step < 49:
            schedule.step()


def test_dead_codes_come_back_to_life(catalog):
    # Two clumps far apart and then one outlier region: without revival most codes would stay unused.
    x = np.concatenate([np.tile(catalog[:1], (200, 1)) + 1e-3 * embeddings(200, seed=3), catalog[:100]])
    alive = fit(x, dataclasses.replace(SMALL, epochs=40))
    still = fit(x, dataclasses.replace(SMALL, epochs=40, revive_until=0.0))
    used = [sum(level_usage(t.encode(x)[0], 16)[1]) for t in (alive, still)]
    assert used[0] > used[1]
    assert used[0] >= 0.9 * 48


# ---- small, doubled and broken catalogs
# --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 10, 15, 16])
@pytest.mark.parametrize("method", ["rqvae", "rq_kmeans"])
def test_catalogs_with_fewer_items_than_codes_work(count, method, catalog):
    x = catalog[:count]
    settings = dataclasses.replace(SMALL, epochs=8, warmup_epochs=2)
    found = fit(x, settings) if method == "rqvae" else fit_rq_kmeans(x, settings)
    codes, norms, _ = found.encode(x)
    assert codes.shape == (count, 3)
    assert np.isfinite(norms).all()
    assert np.isfinite(found.decode(codes)).all()
    if method == "rq_kmeans":
        assert len(np.unique(codes, axis=0)) == count
        np.testing.assert_allclose(found.decode(codes), x, atol=0.2)


def test_duplicates_get_one_sid(catalog):
    x = np.repeat(catalog[:30], 5, axis=0)
    codes = fit(x, dataclasses.replace(SMALL, epochs=10)).encode(x).codes
    assert (codes.reshape(30, 5, 3) == codes[::5][:, None]).all()
    fit(np.tile(catalog[:1], (40, 1)), dataclasses.replace(SMALL, epochs=8)).encode(catalog)


@pytest.mark.parametrize(("value", "said"), [(np.nan, "not finite"), (np.inf, "not finite"), (0.0, "is zero")])
def test_zero_and_nan_embeddings_are_refused_by_row(value, said, catalog, tokenizer):
    x = catalog.copy()
    x[41] = value
    for use in (lambda: fit(x, SMALL), lambda: fit_rq_kmeans(x, SMALL), lambda: tokenizer.encode(x)):
        with pytest.raises(ContractError, match=f"row 41 {said}|row 41 is {said}"):
            use()


def test_no_items_and_wrong_widths_are_refused(catalog, tokenizer):
    with pytest.raises(ContractError, match="0 items"):
        fit(catalog[:0], SMALL)
    with pytest.raises(ContractError, match=r"expected \[N x 12\]"):
        tokenizer.encode(catalog[:, :5])


# ---- the baseline
# -------------------------------------------------------------------------------------------------------


def test_rq_kmeans_reduces_the_residual_at_every_level(catalog):
    books, counts = residual_kmeans(catalog, 3, 16, seed=0)
    residual, before = catalog.copy(), np.square(catalog).sum()
    for level in range(3):
        chosen = np.square(residual[:, None] - books[level][None]).sum(-1).argmin(1)
        np.testing.assert_array_equal(np.bincount(chosen, minlength=16), counts[level])
        residual = residual - books[level][chosen]
        assert np.square(residual).sum() < before
        before = np.square(residual).sum()


def test_pca_keeps_what_it_can(catalog):
    full, cut = fit_rq_kmeans(catalog, SMALL), fit_rq_kmeans(catalog, SMALL, pca=6)
    assert cut.codebooks.shape[2] == 6
    cosine = [mean_cosine(catalog, t.decode(t.encode(catalog)[0])) for t in (full, cut)]
    assert cosine[1] > 0.7
    assert cosine[0] > 0.9


# ---- saving
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rqvae", "rq_kmeans", "pca"])
def test_save_and_load_give_identical_sids(method, catalog, tokenizer, tmp_path: Path):
    made = {"rqvae": lambda: tokenizer, "rq_kmeans": lambda: fit_rq_kmeans(catalog, SMALL),
            "pca": lambda: fit_rq_kmeans(catalog, SMALL, pca=4)}[method]()  # fmt: skip
    made.save(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json"}
    loaded = load_tokenizer(tmp_path)
    other = embeddings(200, seed=9)
    for a, b in zip(made.encode(other), loaded.encode(other), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(made.decode(made.encode(other)[0]), loaded.decode(loaded.encode(other)[0]))
    assert loaded.description["method"] == made.description["method"]


# ---- health
# --------------------------------------------------------------------------------------------------------------


@hypothesis_settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 30))
def test_figures_equal_plain_loops(seed, count):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3, size=(count, 2))
    identity = rng.integers(0, 4, size=count)
    rows = [tuple(r) for r in codes.tolist()]
    colliding = sum(any(rows[j] == rows[i] and identity[j] != identity[i] for j in range(count)) for i in range(count))
    assert collision_share(codes, identity) == pytest.approx(colliding / count)
    perplexity, used = level_usage(codes, 3)
    for level in range(2):
        column = codes[:, level].tolist()
        shares = [column.count(c) / count for c in set(column)]
        assert perplexity[level] == pytest.approx(np.exp(-sum(p * np.log(p) for p in shares)))
        assert used[level] == len(shares)


def test_neighbor_recall_of_the_truth_is_one_and_of_noise_is_chance(catalog):
    assert neighbor_recall(catalog, catalog * 3).mean() == 1
    noise = np.random.default_rng(0).normal(size=catalog.shape)
    assert neighbor_recall(catalog, noise).mean() < 0.1
    # Equal decoded vectors: table order must not look like knowledge.
    assert neighbor_recall(catalog, np.ones_like(catalog)).mean() < 0.1


def test_gates_name_every_figure_and_the_remedy(catalog, tokenizer):
    health = measure(tokenizer, catalog)
    check_gates(health, **GATES)
    collapsed = dataclasses.replace(health, perplexity=(1.0, *health.perplexity[1:]), used=(1, *health.used[1:]))
    with pytest.raises(GateError, match=r"(?s)level 1: perplexity 1\.0.*level 1: 15 of 16 codes dead") as error:
        check_gates(collapsed, **GATES)
    assert "level 2" not in str(error.value)
    assert error.value.exit_code == 3
    # Collisions alone would have hidden it.
    assert collapsed.collision_share < GATES["max_collision_share"]
    for change, said in ({"collision_share": 0.9}, "tokenizer.codes"), ({"reconstruction": float("nan")}, "cosine nan"):
        with pytest.raises(GateError, match=said):
            check_gates(dataclasses.replace(health, **change), **GATES)


def test_gates_judge_a_small_catalog_by_what_it_can_reach(catalog):
    x = catalog[:5]
    health = measure(fit_rq_kmeans(x, SMALL), x)
    assert health.reachable == (5, 5, 5)


def test_sizes_follow_the_catalog():
    assert [codes_for(n) for n in (1, 3_686, 100_000, 100_001, 10**6, 10**8, 10**9)] == [
        256, 256, 256, 512, 1024, 8192, 8192,
    ]  # fmt: skip
    assert [epochs_for(n) for n in (1, 3_686, 10**6)] == [400, 400, 20]
