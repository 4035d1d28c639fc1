"""Trains variants of the reference pre-ranker side by side; called by `train_preranker` and `evaluate_controls`.

Each step takes a batch of exposed rows, the same for every variant, plus an equal number of unexposed rows. A variant
with lambda 0 is exposed-only training as one would run it in practice: one full batch of exposed rows per step. All
variants start from the same weights, and each keeps the weights of the step with the best AUC on held-out exposed
requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import deepspeed
import numpy as np
import torch

from gpl_core.graph.step_run import StepContext, log
from gpl_core.prerank.early_stopping import BestWeights
from gpl_core.prerank.loss import RowMass, dual_label_loss
from gpl_core.prerank.two_tower import TowerConfig, TwoTower, build_model, content_basis, parameter_groups
from gpu_workers.inputs.prerank import FeedRows, TowerInputs, score_rows
from gpu_workers.inputs.shuffled_rows import Rows
from gpu_workers.ranks import Ranks, one_thread

_HIDDEN = 64  # width of each tower's hidden layer
_WEIGHT_DECAY = 1e-4
_LOOKS = 8  # evaluations on held-out rows during training


@dataclass(frozen=True)
class Variant:
    """A pre-ranker to train.

    lambda_: weight of the unexposed rows. labels, weights: the columns of the unexposed rows that hold theirs.
    """

    name: str
    lambda_: float
    labels: str = "target"
    weights: str = "sample_weight"


class Trained(NamedTuple):
    """A trained variant. loss: mean over the last 100 steps."""

    model: TwoTower
    loss: float


def train_seeds(
    context: StepContext, variants: Sequence[Variant], rows: FeedRows, inputs: TowerInputs, ranks: Ranks
) -> dict[tuple[str, int], Trained]:
    """Every variant and seed; their batches go to the details of the run: `gpl evaluate` tells how long one takes."""
    settings = inputs.settings
    exposed, pass_over_all = rows.exposed.rows, -(-rows.exposed.rows // settings.batch_size)
    if settings.steps < pass_over_all and ranks.is_main:
        log.warning(  # no alarm: of a large feed a part may do for a baseline
            "prerank.steps is %s: batches of %s read only %.1f %% of the %s exposed rows; %s steps read each once",
            *(f"{n:,}" for n in (settings.steps, settings.batch_size)),
            100 * settings.steps / pass_over_all,
            *(f"{n:,}" for n in (exposed, pass_over_all)),
        )
    with one_thread():
        of_seed = {seed: train_variants(variants, rows, inputs, ranks, seed) for seed in settings.seeds}
    kinds = sum(1 + bool(v.lambda_) for v in variants)  # of rows: exposed ones, and unexposed ones
    context.counts.details["trained_batches"] = kinds * len(settings.seeds) * settings.steps
    return {(name, seed): one for seed, found in of_seed.items() for name, one in found.items()}


def train_variants(
    variants: Sequence[Variant], rows: FeedRows, inputs: TowerInputs, ranks: Ranks, seed: int
) -> dict[str, Trained]:
    """Every variant by name, trained for `prerank.steps` steps."""
    steps = inputs.settings.steps
    engines = _engines(variants, rows, inputs, ranks, seed)
    losses: dict[str, list[float]] = {v.name: [] for v in variants}
    best = {v.name: BestWeights() for v in variants}
    batches = rows.batches(seed)
    for step in range(1, steps + 1):
        exposed, unexposed = next(batches)
        for variant in variants:
            loss = _loss(variant, engines[variant.name], exposed, unexposed, inputs, ranks)
            engines[variant.name].backward(loss)
            engines[variant.name].step()
            losses[variant.name].append(loss.item())
        if step % max(1, steps // _LOOKS) == 0 or step == steps:
            for name, engine in engines.items():
                scores = score_rows(engine.module, inputs, rows.held_out)
                best[name].offer(step, engine.module, scores, rows.held_out["target"])
        if ranks.is_main and step % 100 == 0:
            means = ", ".join(f"{name} {np.mean(values[-100:]):.4f}" for name, values in losses.items())
            log.info("pre-ranker: step %d of %d, mean loss: %s", step, steps, means)
    trained = {}
    for name, engine in engines.items():
        best[name].restore(engine.module)
        if ranks.is_main:
            log.info("pre-ranker %s keeps step %d, held-out AUC %s", name, best[name].step, best[name].value)
        trained[name] = Trained(engine.module, float(np.mean(losses[name][-100:])))
    return trained


def _engines(
    variants: Sequence[Variant], rows: FeedRows, inputs: TowerInputs, ranks: Ranks, seed: int
) -> dict[str, Any]:
    """One DeepSpeed engine per variant, all from the same initial weights."""
    settings = inputs.settings
    sizes = TowerConfig(
        user_buckets=settings.buckets, item_buckets=settings.buckets, dimension=settings.dimension,
        hidden=_HIDDEN, content_width=inputs.items.vectors.shape[1], levels=inputs.sids.shape[1],
        codes=int(inputs.sids.max()) + 1,
        prior_rate=rows.prior, pair_features=settings.pair_features,
    )  # fmt: skip
    own = {
        "train_micro_batch_size_per_gpu": max(1, settings.batch_size // ranks.size),
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 0},  # the model is small compared with its batches
        "steps_per_print": 1_000_000,
    }
    # At most 20,000 vectors, evenly spaced over the rows: the same on every rank and machine.
    usable = inputs.items.row_of[inputs.items.row_of >= 0]
    chosen = np.unique(np.linspace(0, len(usable) - 1, min(20_000, len(usable))).astype(np.int64))
    basis = content_basis(inputs.items.take(usable[chosen]), settings.dimension)
    engines = {}
    for variant in variants:
        model = build_model(sizes, seed, basis).to(ranks.device)
        groups = parameter_groups(model, settings.learning_rate)
        optimizer = torch.optim.AdamW(groups, weight_decay=_WEIGHT_DECAY)
        engines[variant.name], *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(own))
    return engines


def _loss(
    variant: Variant, engine: Any, exposed: Rows, unexposed: Rows, inputs: TowerInputs, ranks: Ranks
) -> torch.Tensor:
    """The dual-label loss of this rank's part of a batch.

    Both kinds of rows go through the model by themselves, so that nothing unexposed changes a bit of the exposed rows'
    logits; with lambda 0 they do not go at all.
    """
    kinds = [(exposed, "target", "sample_weight")]
    if variant.lambda_:
        kinds.append((unexposed, variant.labels, variant.weights))
    logits, targets, weights, is_exposed, sampled = [], [], [], [], []
    for rows, label, weight in kinds:
        mine = rows[ranks.rank :: ranks.size]
        logits.append(engine(inputs.batch(mine["user"], mine["item_index"], mine["pair"])))
        targets.append(_tensor(mine[label], ranks))
        weights.append(_tensor(mine[weight], ranks))
        sampled.append(_tensor(mine["sampling_probability"], ranks))
        is_exposed.append(torch.full((len(mine),), rows is exposed, device=ranks.device))
    mass: RowMass | None = None
    if ranks.size > 1:  # means are over the whole batch, not over each rank's part of it
        candidates = (1.0 / unexposed["sampling_probability"].astype(np.float64)).sum()  # that the rows stand for
        mass = RowMass(*(torch.tensor(n / ranks.size, device=ranks.device) for n in (len(exposed), float(candidates))))
    return dual_label_loss(
        torch.cat(logits), torch.cat(targets), torch.cat(is_exposed), torch.cat(weights), variant.lambda_,
        torch.cat(sampled), mass,
    )  # fmt: skip


def _tensor(values: np.ndarray, ranks: Ranks) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(ranks.device)
