"""Fine-tune the interest model on users' SID sequences and publish the best epoch.

deepspeed --num_gpus 8 gpu_workers/train_interest_model.py --config shop.yaml --run-date 2026-01-02
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from tqdm import tqdm

from gpl_core.errors import GateError
from gpl_core.graph.step_run import StepContext, log
from gpl_core.interest.content import NeighborGraph, leaf_content
from gpl_core.interest.down_sampling import keep_probability
from gpl_core.interest.interest_model import ModelSettings, adapter_state, build_interest_model, load_adapter_state
from gpl_core.interest.model_files import FORMAT, save_bundle
from gpl_core.interest.packing import Pack, UserHistory, most_events, training_packs
from gpl_core.interest.search import BeamSearch, SearchSettings
from gpl_core.interest.training import (
    TEMPERATURES,
    TrainingObjective,
    TrainingProgress,
    Walks,
    empty_pack,
    tempered_losses,
    without_targets,
)
from gpl_core.interest.trie_scoring import DeviceTrie
from gpl_core.lakehouse.artifacts import Manifest
from gpl_core.lakehouse.scratch import scratch_folder
from gpl_core.lakehouse.storage import local_folder
from gpl_core.sids.content_table import ContentTable
from gpl_core.sids.tokenizer import load_tokenizer
from gpu_workers.deepspeed_config import deepspeed_config
from gpu_workers.engine_checkpoints import EngineCheckpoints
from gpu_workers.inputs.interest import (
    HELD_OUT,
    TRAIN,
    LatestSequences,
    base_checkpoint,
    positives_of,
    read_catalog,
)
from gpu_workers.inputs.item_tables import content_table
from gpu_workers.outputs import alone_in
from gpu_workers.ranks import Ranks
from gpu_workers.worker import worker_main

STEP = "train_interest_model"
_HIT_USERS = 1_000  # held-out users whose next SID is searched each epoch
_HIT_AT = 10
_WALKED_USERS = 200_000  # users whose events walks may follow: bounds what every rank reads before it trains
_PATIENCE = 3  # epochs without a better held-out loss or hit rate before training stops


def run(context: StepContext, ranks: Ranks) -> None:
    """Set up, then train, validate and save a checkpoint per epoch until nothing improves; publish the best epoch."""
    settings = context.config.interest
    tokenizer = context.artifact("tokenizer")
    wanted = settings.content or settings.walks > 0
    # A forced run starts from scratch; ZeRO's optimizer shards fit one number of ranks only.
    digest = f"{context.artifact_digest[:16]}-{FORMAT}"  # a checkpoint of an earlier release is another model
    folder = local_folder(context.lake.root, STEP, digest, f"ranks-{ranks.size}")
    with alone_in(folder, ranks), content_table(context, ranks) if wanted else nullcontext() as content:
        training = setup(context, ranks, tokenizer, content, folder)
        progress = load_checkpoint(training)
        while progress.epoch < settings.epochs and not progress.is_over(_PATIENCE):
            figures = {"epoch": progress.epoch, **train(training, progress), **validate(training)}
            loss = figures["tempered_loss" if figures["valid_targets"] else "train_loss"]
            progress = progress.after(loss, figures["valid_hr10"], figures)
            log_epoch(training, figures)
            if progress.best_epoch == figures["epoch"] and ranks.is_main:
                training.best.update(adapter_state(training.objective.model))
            save_checkpoint(training, progress)
        publish(training, tokenizer, progress)


@dataclass(frozen=True)
class Training:
    """What `setup` prepares and the phases share."""

    context: StepContext
    ranks: Ranks
    objective: TrainingObjective
    engine: Any
    folder: Path  # local, for checkpoints and curves
    checkpoints: EngineCheckpoints
    # `interest.tokens_per_batch` is the budget of all ranks' step, so that their number does not change the training.
    budget: int  # tokens of this rank's pack
    data: LatestSequences
    keep: np.ndarray  # p_keep by item_index, float64 [N]
    held_out: Sequence[UserHistory]
    walks: Walks | None
    max_events: int  # `sequences.max_length`
    best: dict[str, torch.Tensor] = field(default_factory=dict)  # the best epoch's `adapter_state`, on rank 0


def setup(
    context: StepContext, ranks: Ranks, tokenizer: Manifest, content: ContentTable | None, folder: Path
) -> Training:
    """Read the inputs, build the model and wrap it into a DeepSpeed engine."""
    config, settings = context.config, context.config.interest
    with ranks.together():
        codebooks = load_tokenizer(context.artifacts.fetch(tokenizer)).codebooks.cpu().numpy()
        levels, codes = codebooks.shape[:2]
        catalog = read_catalog(context, tokenizer.version, codes)
        snapshot = context.snapshot("user_sequences")
        first = context.run_date - timedelta(days=config.sequences.snapshot_every - 1)  # one of them has all users
        files = snapshot.select(start=first, end=context.run_date)
        data = LatestSequences(snapshot, files, tokenizer.version, settings.valid_share)
        keep = keep_probability(positives_of(context, int(catalog.item_index.max()) + 1), settings.keep_target_share)
        rank = settings.lora_rank if settings.base_model else 0
        model = build_interest_model(
            base_checkpoint(config),
            ModelSettings(
                levels,
                codes,
                lora_rank=rank,
                lora_alpha=2 * rank,
                dropout=settings.dropout,
                seed=config.run.seed,
                content_width=content.width if content and settings.content else 0,
            ),
            codebooks,
        ).to(ranks.device)
        if settings.recompute != "nothing":
            model.recompute(settings.recompute)
        max_events = most_events(model.vocabulary, config.sequences.max_length, model.config.max_position_embeddings)
    if ranks.is_main:
        log.info(
            "user_sequences: %d users to train on, %d held out; left out: %d superseded rows, "
            "%d of another sid_version",
            data.found.train, data.found.held_out, data.found.superseded, data.found.other_sid_version,
        )  # fmt: skip
    walks = None
    with ranks.together():
        trie = DeviceTrie(catalog.trie, ranks.device, leaf_content(catalog, content if settings.content else None))
        share = data.shares(ranks.size, seed=config.run.seed, epoch=0)[ranks.rank]
        if content and settings.walks:
            whole = data.shares(1, seed=config.run.seed, epoch=0)[0]  # one graph for all ranks
            users = islice(data.histories(whole, TRAIN, keep, levels, seed=config.run.seed, epoch=0), _WALKED_USERS)
            histories = [user.items for user in users if user.items is not None]
            graph = NeighborGraph.build(
                content, catalog.item_index, histories, seed=config.run.seed, device=ranks.device
            )
            walks = Walks(graph, catalog, settings.walks)
        held_out = list(data.histories(share, HELD_OUT, keep, levels, seed=config.run.seed, epoch=0))
    objective = TrainingObjective(model, trie, content if settings.content else None)
    per_user = settings.walks if walks else 0
    events = data.found.events + 3 * per_user * data.found.train
    steps = max(1, math.ceil(1.1 * events * levels / settings.tokens_per_batch)) * settings.epochs
    torch.manual_seed(config.run.seed)
    engine, *_ = deepspeed.initialize(
        model=objective,
        model_parameters=[p for p in objective.parameters() if p.requires_grad],
        config=deepspeed_config(settings, ranks, steps, folder / "logs"),
    )
    budget = max(1, settings.tokens_per_batch // ranks.size)
    checkpoints = EngineCheckpoints(folder / "checkpoints", ranks)
    return Training(
        context, ranks, objective, engine, folder, checkpoints, budget, data, keep, held_out, walks, max_events
    )


def train(training: Training, progress: TrainingProgress) -> dict[str, float]:
    """One pass over all training users; the mean loss per target, in nats, and what was left out.

    Steps that a checkpoint contains are read but not computed: the rest sees the data and the dropout of an
    uninterrupted run.
    """
    ranks, engine, config = training.ranks, training.engine, training.context.config
    epoch, every, seed = progress.epoch, config.interest.checkpoint_steps, config.run.seed
    engine.train()
    turn = epoch * ranks.size + ranks.rank
    data, levels = training.data, training.objective.trie.levels
    share = data.shares(ranks.size, seed=seed, epoch=epoch)[ranks.rank]
    histories = data.histories(share, TRAIN, training.keep, levels, seed=seed, epoch=turn)
    users = 0
    # Loss, targets, targets outside. A checkpoint has the sums over all ranks: one rank takes them over.
    sums = np.array(progress.sums) if ranks.is_main else np.zeros(3)

    def counted() -> Iterator[UserHistory]:
        nonlocal users
        for history in training.walks.mixed(histories, [seed, turn]) if training.walks else histories:
            users += 1
            yield history

    packs = training_packs(training.objective.model.vocabulary, counted(), training.max_events, training.budget)
    hidden = None if ranks.is_main else True  # None: hidden unless there is a terminal
    with tqdm(desc=f"epoch {epoch}", unit="target", disable=hidden, mininterval=1.0) as bar:
        for step, (pack, targets) in enumerate(_in_step(training, packs)):
            users -= len(pack.lengths) if len(pack.target_sids) else 0
            bar.update(int(targets))
            if step < progress.step:
                continue
            if step == 0 or (every and step % every == 0):
                if step > progress.step:
                    save_checkpoint(training, replace(progress, step=step, sums=tuple(ranks.summed(sums).tolist())))
                torch.manual_seed(hash((seed, epoch, step)) % 2**31)  # the same dropout after a resume as without one
            log_prob, mine, left_out = engine(pack)
            # DeepSpeed averages gradients over ranks; the loss is the mean over the targets of all ranks.
            engine.backward(-log_prob * (ranks.size / targets))
            engine.step()
            sums += np.array([-float(log_prob.detach()), mine, left_out])
    loss, targets, outside = ranks.summed(sums).tolist()
    without = ranks.sum(users)
    return {"train_loss": loss / max(1.0, targets), "targets_outside": outside, "users_without_target": without}


def _in_step(training: Training, packs: Iterator[Pack]) -> Iterator[tuple[Pack, float]]:
    """Packs with the number of targets of all ranks; ends when every rank has run out.

    A rank that runs out early continues with an emptied copy of its last pack, which contributes nothing: no rank waits
    forever and nothing is dropped.
    """
    ranks, idle = training.ranks, None
    while True:
        with ranks.together():
            pack = next(packs, None)
        targets = ranks.sum(len(pack.target_sids) if pack else 0)
        if not targets:
            return
        pack = pack or idle or empty_pack(training.objective.model)
        idle = without_targets(pack)
        yield pack, targets


def validate(training: Training) -> dict[str, float]:
    """Held-out loss per target, also at the best temperature, and HR@10 of users' last events, over SIDs.

    Both losses are 0 where there are no `valid_targets`: held-out users of one event, or of retired items alone.
    """
    ranks, objective = training.ranks, training.objective
    model = objective.model
    training.engine.eval()
    losses, targets = np.zeros(len(TEMPERATURES)), 0.0
    for pack in training_packs(model.vocabulary, training.held_out, training.max_events, training.budget):
        found, number = tempered_losses(model, objective.trie, pack, objective.content)
        losses, targets = losses + found.numpy(), targets + number
    losses, targets = ranks.summed(losses), ranks.sum(targets)
    losses /= max(1.0, targets)
    users = [h for h in training.held_out if len(h.sids) > 1][: -(-_HIT_USERS // ranks.size)]
    limits = SearchSettings(_HIT_AT, training.max_events, token_budget=max(training.budget, 4096))
    search = BeamSearch(model, objective.trie, limits, objective.content)
    items = [h.items[:-1] for h in users if h.items is not None]
    anchors = search.search([h.sids[:-1] for h in users], items)
    hits = sum((found == h.sids[-1]).all(axis=1).any() for found, h in zip(anchors.sids, users, strict=True))
    return {
        "valid_loss": float(losses[TEMPERATURES.index(1.0)]),
        "tempered_loss": float(losses.min()),
        "valid_targets": targets,
        "valid_hr10": ranks.sum(int(hits)) / max(1.0, ranks.sum(len(users))),
    }


def log_epoch(training: Training, figures: dict[str, float]) -> None:
    """Say what an epoch achieved, and add it to the curves."""
    if not training.ranks.is_main:
        return
    number = int(figures["epoch"])
    log.info(
        "epoch %d: train loss %.4f, held-out loss %.4f (at the best temperature %.4f), held-out HR@%d %.4f (of %d "
        "SIDs); left out: %d targets outside the catalog, %d users without a target",
        number, figures["train_loss"], figures["valid_loss"], figures["tempered_loss"], _HIT_AT, figures["valid_hr10"],
        training.objective.trie.size, figures["targets_outside"], figures["users_without_target"],
    )  # fmt: skip
    if not figures["valid_targets"]:
        log.warning("no held-out target: the epoch with the lowest training loss is published")
    names = ("train_loss", "valid_loss", "tempered_loss", "valid_hr10")
    training.engine.monitor.write_events([(f"Epoch/{n}", figures[n], number) for n in names])


def load_checkpoint(training: Training) -> TrainingProgress:
    """Restore the last checkpoint; a fresh start where there is none, or none that is whole."""
    facts = training.checkpoints.restore(training.engine)
    if facts is None:
        for other in training.folder.parent.glob("ranks-*/checkpoints"):
            if other.parent != training.folder and any(other.iterdir()):
                log.info("begins again: %s is of another number of ranks", other)
        return TrainingProgress()
    progress = TrainingProgress(**facts["progress"])
    training.best.update(facts["best"])
    log.info("resumed after epoch %d, step %d from %s", progress.epoch, progress.step, training.folder)
    return progress


def save_checkpoint(training: Training, progress: TrainingProgress) -> None:
    """Save model, optimizer, progress and the best epoch's adapter; earlier checkpoints go."""
    tag = f"epoch-{progress.epoch:04d}-step-{progress.step:08d}"
    training.checkpoints.save(tag, training.engine, {"progress": asdict(progress), "best": training.best})


def publish(training: Training, tokenizer: Manifest, progress: TrainingProgress) -> None:
    """Publish the best epoch's bundle. Raises GateError when its loss is not finite."""
    context, found = training.context, training.data.found
    context.counts.rows_in = found.train + found.held_out + found.superseded + found.other_sid_version
    context.counts.rows_dropped = found.superseded + found.other_sid_version
    with training.ranks.together():
        if training.ranks.is_main:
            if not math.isfinite(progress.best_loss):
                raise GateError(
                    f"interest model: loss {progress.best_loss} after {progress.epoch} epochs, expected a "
                    "finite one; lower interest.learning_rate"
                )
            best = progress.history[progress.best_epoch]
            model, base = training.objective.model, base_checkpoint(context.config)
            load_adapter_state(model, training.best)
            with scratch_folder() as scratch:
                save_bundle(model, scratch, base, sid_version=tokenizer.version, max_events=training.max_events)
                size = sum(file.stat().st_size for file in scratch.iterdir())
                log.info("interest model: %.1f MB are published; the weights of %s are not in them", size / 1e6, base)
                lineage = {**tokenizer.lineage, "sid_version": tokenizer.version}
                metrics = {**best, "epochs": progress.epoch, "best_epoch": progress.best_epoch, **asdict(found)}
                context.publish(scratch, lineage, metrics)
            context.counts.details.update(best)
            training.checkpoints.remove()


if __name__ == "__main__":
    worker_main(STEP, run)
