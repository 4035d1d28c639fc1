"""Fine-tune the interest model on users' SID sequences and publish the best epoch.

deepspeed --num_gpus 8 gpu_workers/train_interest_model.py --config production --run-date 2026-01-02
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import repeat
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from tqdm import tqdm

from gpl_core.conf.sections import Interest
from gpl_core.errors import GateError
from gpl_core.graph.step_run import StepContext, log
from gpl_core.interest.alignment import TitlePack, Titles, alignment_losses
from gpl_core.interest.bundle import save_bundle
from gpl_core.interest.content import ContentTable, NeighborGraph
from gpl_core.interest.interest_model import InterestModel, ModelSettings, build_interest_model
from gpl_core.interest.objective import target_log_probs
from gpl_core.interest.packing import History, Pack, most_events, training_packs
from gpl_core.interest.search import BeamSearch, SearchSettings
from gpl_core.interest.targets import keep_probability
from gpl_core.interest.trie_scoring import DeviceTrie
from gpl_core.lakehouse.artifacts import Manifest
from gpl_core.sids.item_catalog import ItemCatalog
from gpl_core.sids.tokenizer import load_tokenizer
from gpu_workers.inputs.feed import read_batches
from gpu_workers.inputs.interest import (
    HELD_OUT,
    TRAIN,
    LatestSequences,
    base_checkpoint,
    content_table,
    log_found,
    read_catalogue,
)
from gpu_workers.inputs.item_tables import end_of
from gpu_workers.outputs import local_folder
from gpu_workers.ranks import Ranks, seed_everything
from gpu_workers.worker import worker_main

STEP = "train_interest_model"
_HIT_USERS = 1_000  # held-out users whose next SID is searched each epoch
_HIT_AT = 10
_WALKS_AT_A_TIME = 4_096
_TITLE_SHARE = 0.25  # tokens of alignment per token of sequences
_MOST_TITLES = 50_000  # items whose titles are learnt: bounds a rank's memory


class TrainingObjective(torch.nn.Module):
    """What DeepSpeed wraps: a pack of sequences to the summed log p of its targets, in nats, and their number."""

    def __init__(
        self, model: InterestModel, trie: DeviceTrie, content: ContentTable | None, weights: tuple[float, float]
    ) -> None:
        """``weights``: of the tasks title -> SID and SID -> title."""
        super().__init__()
        self.model = model
        self.trie = trie
        self.content = content
        self.weights = weights

    def forward(self, pack: Pack, titles: TitlePack | None = None) -> tuple[torch.Tensor, int, int, torch.Tensor]:
        """(scalar, targets in the catalogue, targets outside it: retired items, left out, weighted alignment loss)."""
        scores = target_log_probs(self.model, self.trie, pack, self.content)
        total = scores.log_prob.sum()
        aligned = total.new_zeros(())
        if titles:
            losses = alignment_losses(self.model, self.trie, titles)
            aligned = sum((w * x for w, x in zip(self.weights, losses, strict=True) if w), aligned)
        return total, len(scores.log_prob), scores.outside, aligned


@dataclass(frozen=True)
class Walks:
    """Synthetic users who walk between items of like content, mixed among the real ones."""

    graph: NeighborGraph
    catalogue: ItemCatalog
    per_user: float

    def mixed(self, histories: Iterator[History], seed: Sequence[int]) -> Iterator[History]:
        """Each of ``histories``, followed by ``per_user`` walks on average."""
        due, turn = 0.0, 0
        ready: list[History] = []
        for history in histories:
            yield history
            due += self.per_user
            while due >= 1:
                if not ready:
                    items = self.graph.walks(_WALKS_AT_A_TIME, seed=[*seed, turn])
                    sids = self.catalogue.sids_of(items)
                    all_of_it = np.ones(items.shape[1], dtype=bool)
                    ready = [History(s, all_of_it, i) for s, i in zip(sids, items, strict=True)]
                    turn += 1
                yield ready.pop()
                due -= 1


@dataclass(frozen=True)
class Progress:
    """Where a training run stands; saved with every checkpoint."""

    epoch: int = 0
    """Finished epochs."""
    best_epoch: int = -1
    """The one to be published: of the lowest loss, because scores become probabilities, and HR@10 of few is noise."""
    best_loss: float = math.inf
    best_hit_rate: float = -1.0
    better_epoch: int = -1
    """The last one with a lower loss or a higher hit rate than all before it."""
    history: tuple[dict[str, float], ...] = ()
    step: int = 0
    """Optimizer steps of the unfinished epoch."""
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Of these steps, over all ranks: loss, targets, targets outside the catalogue."""

    def after(self, loss: float, hit_rate: float, figures: dict[str, float]) -> Progress:
        """One epoch later, judged by held-out ``loss`` and ``hit_rate``."""
        lower, higher = loss < self.best_loss, hit_rate > self.best_hit_rate
        return Progress(
            self.epoch + 1,
            self.epoch if lower else self.best_epoch,
            loss if lower else self.best_loss,
            max(hit_rate, self.best_hit_rate),
            self.epoch if lower or higher else self.better_epoch,
            (*self.history, figures),
        )

    def is_over(self, patience: int) -> bool:
        """Whether neither loss nor hit rate has been better for ``patience`` epochs."""
        return self.epoch > 0 and self.epoch - 1 - self.better_epoch >= patience


def run(context: StepContext, ranks: Ranks) -> None:
    """Setup, epochs, publish."""
    settings = context.config.interest
    seed_everything(context.config.run.seed)
    tokenizer = context.artifact("tokenizer")
    uses_content = settings.content or settings.walks > 0
    with (
        content_table(context, tokenizer.lineage["encoder_version"], ranks)
        if uses_content
        else nullcontext() as content
    ):
        _train_and_publish(context, ranks, tokenizer, content)


def _train_and_publish(context: StepContext, ranks: Ranks, tokenizer: Manifest, content: ContentTable | None) -> None:
    config, settings = context.config, context.config.interest
    with ranks.together():
        codebooks = load_tokenizer(context.artifacts.fetch(tokenizer)).codebooks.cpu().numpy()
        levels, codes = codebooks.shape[:2]
        catalogue = read_catalogue(context, tokenizer.version, codes)
        snapshot = context.snapshot("user_sequences")
        sequences = LatestSequences(
            snapshot, snapshot.select(end=context.run_date), tokenizer.version, settings.valid_share
        )
        keep = keep_probability(_positives(context, int(catalogue.item_index.max()) + 1), settings.keep_target_share)
        checkpoint = base_checkpoint(config)
        model = build_interest_model(
            checkpoint,
            ModelSettings(
                levels,
                codes,
                settings.prompt,
                settings.lora_rank,
                settings.lora_alpha,
                settings.lora_dropout,
                config.run.seed,
                content.width if content and settings.content else 0,
            ),
            codebooks if settings.init == "codebook" else None,
        ).to(ranks.device)
        if settings.recompute != "nothing":
            model.recompute(settings.recompute)
        most_events(model.vocabulary, config.sequences.max_length, model.config.max_position_embeddings)
    if ranks.is_main:
        log_found(sequences.found)
    trie = DeviceTrie(catalogue.trie, ranks.device)
    walks = None
    if content and settings.walks:
        with ranks.together():
            graph = NeighborGraph.build(content, catalogue.item_index, seed=config.run.seed, device=ranks.device)
            walks = Walks(graph, catalogue, settings.walks)
    weights = (settings.title_to_sid, settings.sid_to_title)
    titles = None
    if any(weights):
        with ranks.together():
            titles = Titles.of(model, *_titles(context, catalogue))
    objective = TrainingObjective(model, trie, content if settings.content else None, weights)
    run_ = _Run(context, ranks, objective, sequences, keep, walks, titles)
    progress = run_.resume()
    while progress.epoch < settings.epochs and not progress.is_over(settings.patience):
        progress = run_.epoch(progress)
    found = sequences.found
    context.counts.rows_in = found.train + found.held_out + found.superseded + found.other_sid_version
    context.counts.rows_dropped = found.superseded + found.other_sid_version
    with ranks.together():
        if ranks.is_main:
            if not math.isfinite(progress.best_loss):
                raise GateError(
                    f"interest model: held-out loss {progress.best_loss} after {progress.epoch} epochs, expected a "
                    "finite one; lower interest.learning_rate"
                )
            best = progress.history[progress.best_epoch]
            manifest = context.artifacts.publish(
                "interest_model",
                run_.folder / "best",
                trained_through=context.run_date - timedelta(days=1),
                fingerprint=context.artifact_fingerprint,
                config_hash=context.step.config_hash(context.config),
                lineage={**tokenizer.lineage, "sid_version": tokenizer.version},
                metrics={**best, "epochs": progress.epoch, "best_epoch": progress.best_epoch, **asdict(found)},
            )
            context.counts.outputs["interest_model"] = {"version": manifest.version}
            context.counts.details.update(best)
            shutil.rmtree(run_.folder / "checkpoints", ignore_errors=True)


class _Run:
    """One training run under DeepSpeed: its engine, its folder, its epochs."""

    def __init__(
        self,
        context: StepContext,
        ranks: Ranks,
        objective: TrainingObjective,
        data: LatestSequences,
        keep: np.ndarray,
        walks: Walks | None,
        titles: Titles | None,
    ) -> None:
        self.titles = titles
        self.config, self.settings, self.ranks = context.config, context.config.interest, ranks
        self.data, self.keep, self.walks = data, keep, walks
        self.seed = self.config.run.seed
        self.sid_version = context.artifact("tokenizer").version
        # A forced run starts afresh; ZeRO's optimizer shards fit one number of ranks only.
        key = context.artifact_fingerprint[:16]
        self.folder = local_folder(self.config, STEP, key, f"ranks-{ranks.size}")
        self.objective = objective
        self.max_events = self.config.sequences.max_length
        # The budget is of an optimizer step over all ranks, so that ranks change the speed and not the training.
        self.budget = max(1, self.settings.tokens_per_batch // ranks.size)
        self.held_out = self._held_out()
        vocabulary = objective.model.vocabulary
        prompts = data.found.train * (1 + (walks.per_user if walks else 0))
        events = data.found.events + (3 * walks.per_user * data.found.train if walks else 0)
        tokens = events * vocabulary.levels + prompts * len(vocabulary.prompt_ids)
        steps = max(1, math.ceil(1.1 * tokens / self.settings.tokens_per_batch)) * self.settings.epochs
        seed_everything(self.seed)
        self.engine, *_ = deepspeed.initialize(
            model=objective,
            model_parameters=[p for p in objective.parameters() if p.requires_grad],
            config=deepspeed_config(self.settings, ranks, steps, self.folder / "logs"),
        )

    def resume(self) -> Progress:
        """The state of the last checkpoint, restored; a fresh one where there is none."""
        path, state = self.engine.load_checkpoint(str(self.folder / "checkpoints"), load_module_strict=False)
        if path is None:
            return Progress()
        progress = Progress(**json.loads(state["progress"]))
        log.info("resumed after epoch %d, step %d from %s", progress.epoch, progress.step, path)
        return replace(progress, history=tuple(progress.history), sums=tuple(progress.sums))

    def epoch(self, progress: Progress) -> Progress:
        """Train one epoch, judge it, keep it when it is the best so far, save a checkpoint."""
        number = progress.epoch
        figures = {"epoch": number, **self._train(progress), **self._judge()}
        judged = figures["valid_loss" if self.ranks.sum(len(self.held_out)) else "train_loss"]
        if self.ranks.is_main:
            log.info(
                "epoch %d: train loss %.4f, held-out loss %.4f, held-out HR@%d %.4f (of %d SIDs); left out: %d targets "
                "outside the catalogue, %d users without a target",
                number, figures["train_loss"], figures["valid_loss"], _HIT_AT, figures["valid_hr10"],
                self.objective.trie.size, figures["targets_outside"], figures["users_without_target"],
            )  # fmt: skip
            names = ("train_loss", "valid_loss", "valid_hr10")
            self.engine.monitor.write_events([(f"Epoch/{n}", figures[n], number) for n in names])
        after = progress.after(judged, figures["valid_hr10"], figures)
        if after.best_epoch == number:
            with self.ranks.together():
                if self.ranks.is_main:
                    save_bundle(
                        self.objective.model,
                        self.folder / "best",
                        base_checkpoint(self.config),
                        sid_version=self.sid_version,
                        max_events=self.max_events,
                    )
        self._save(after)
        return after

    def _save(self, progress: Progress) -> None:
        folder = self.folder / "checkpoints"
        tag = f"epoch-{progress.epoch}" + (f"-step-{progress.step}" if progress.step else "")
        self.engine.save_checkpoint(
            str(folder),
            tag=tag,
            client_state={"progress": json.dumps(asdict(progress))},
            exclude_frozen_parameters=True,
        )
        if self.ranks.is_main:  # `latest` points to the new one by now
            for old in folder.glob("epoch-*"):
                if old.name != tag:
                    shutil.rmtree(old)

    def _train(self, progress: Progress) -> dict[str, float]:
        """One pass over all training users; the mean loss per target, in nats, and what was left out.

        Steps that a checkpoint holds are read over, not computed: the rest sees the data and the dropout of an
        undisturbed run.
        """
        epoch, every = progress.epoch, self.settings.checkpoint_steps
        self.engine.train()
        share = self.data.shares(self.ranks.size, seed=self.seed, epoch=epoch)[self.ranks.rank]
        turn = epoch * self.ranks.size + self.ranks.rank
        histories = self.data.histories(share, TRAIN, self.keep, self._levels, seed=self.seed, epoch=turn)
        if self.walks:
            histories = self.walks.mixed(histories, [self.seed, turn])
        titles: Iterator[TitlePack | None] = repeat(None)
        if self.titles:
            titles = self.titles.packs(int(_TITLE_SHARE * self.budget), seed=[self.seed, turn])
        users = 0
        # A checkpoint holds the sums of all ranks: one rank takes them over.
        total_loss, total_targets, outside = progress.sums if self.ranks.is_main else (0.0, 0.0, 0.0)

        def counted() -> Iterator[History]:
            nonlocal users
            for history in histories:
                users += 1
                yield history

        packs = training_packs(self.objective.model.vocabulary, counted(), self.max_events, self.budget)
        hidden = None if self.ranks.is_main else True  # None: where there is no terminal
        with tqdm(desc=f"epoch {epoch}", unit="target", disable=hidden, mininterval=1.0) as bar:
            for step, (pack, targets) in enumerate(self._in_step(packs)):
                title_pack = next(titles)
                users -= len(pack.lengths) if len(pack.target_sids) else 0
                bar.update(int(targets))
                if step < progress.step:
                    continue
                if step == 0 or (every and step % every == 0):
                    if step > progress.step:
                        sums = tuple(self.ranks.sum(x) for x in (total_loss, total_targets, outside))
                        self._save(replace(progress, step=step, sums=sums))
                    seed_everything(hash((self.seed, epoch, step)) % 2**31)  # dropout after a resume as without one
                log_prob, mine, left_out, aligned = self.engine(pack, title_pack)
                # DeepSpeed averages gradients over ranks; the loss is the mean over the targets of all ranks.
                loss = -log_prob * (self.ranks.size / targets) + aligned
                self.engine.backward(loss)
                self.engine.step()
                total_loss -= float(log_prob.detach())
                total_targets += mine
                outside += left_out
        return {
            "train_loss": self.ranks.sum(total_loss) / max(1.0, self.ranks.sum(total_targets)),
            "targets_outside": self.ranks.sum(outside),
            "users_without_target": self.ranks.sum(users),
        }

    def _in_step(self, packs: Iterator[Pack]) -> Iterator[tuple[Pack, float]]:
        """Packs with the number of targets of all ranks; ends when every rank has run out.

        A rank that runs out early goes on with an emptied copy of its last pack, which adds nothing: no rank waits for
        ever and nothing is dropped.
        """
        idle: Pack | None = None
        while True:
            with self.ranks.together():
                pack = next(packs, None)
            targets = self.ranks.sum(len(pack.target_sids) if pack else 0)
            if not targets:
                return
            if pack is None:
                pack = idle or _empty_pack(self.objective.model)
            idle = _without_targets(pack)
            yield pack, targets

    @torch.no_grad()
    def _judge(self) -> dict[str, float]:
        """Held-out loss per target over all held-out events, and HR@10 of the last one, over SIDs."""
        self.engine.eval()
        log_prob = targets = 0.0
        for pack in training_packs(self.objective.model.vocabulary, self.held_out, self.max_events, self.budget):
            found, number, *_ = self.objective(pack)
            log_prob, targets = log_prob + float(found), targets + number
        users = [h for h in self.held_out if len(h.sids) > 1][: -(-_HIT_USERS // self.ranks.size)]
        search = BeamSearch(
            self.objective.model,
            self.objective.trie,
            SearchSettings(_HIT_AT, self.max_events, token_budget=max(self.budget, 4096)),
            self.objective.content,
        )
        anchors = search.search([h.sids[:-1] for h in users], [h.items[:-1] for h in users])
        hits = sum((found == h.sids[-1]).all(axis=1).any() for found, h in zip(anchors.sids, users, strict=True))
        return {
            "valid_loss": -self.ranks.sum(log_prob) / max(1.0, self.ranks.sum(targets)),
            "valid_hr10": self.ranks.sum(int(hits)) / max(1.0, self.ranks.sum(len(users))),
        }

    def _held_out(self) -> Sequence[History]:
        with self.ranks.together():
            share = self.data.shares(self.ranks.size, seed=self.seed, epoch=0)[self.ranks.rank]
            return list(self.data.histories(share, HELD_OUT, self.keep, self._levels, seed=self.seed, epoch=0))

    @property
    def _levels(self) -> int:
        return self.objective.trie.levels


def deepspeed_config(settings: Interest, ranks: Ranks, steps: int, logs: Path) -> dict[str, Any]:
    """The DeepSpeed configuration of a run of about ``steps`` steps; `interest.deepspeed` is merged over it."""
    on_gpu = ranks.device.type == "cuda"
    warmup = max(2, round(settings.warmup_share * steps))
    made = {
        "train_batch_size": ranks.size,
        "train_micro_batch_size_per_gpu": 1,  # one pack
        "gradient_clipping": 1.0,
        "bf16": {"enabled": on_gpu},
        "zero_optimization": {"stage": 2, "overlap_comm": on_gpu},
        # DeepSpeed's own Adam kernels are compiled on first use; torch's needs no compiler.
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": settings.learning_rate, "weight_decay": 0.0, "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": steps,
                "warmup_num_steps": warmup,
                # Not 0: DeepSpeed takes its first two steps at this rate.
                "warmup_min_lr": settings.learning_rate / warmup,
                "warmup_max_lr": settings.learning_rate,
                "warmup_type": "linear",
            },
        },
        "tensorboard": {"enabled": True, "output_path": str(logs), "job_name": "tensorboard"},
        "csv_monitor": {"enabled": True, "output_path": str(logs), "job_name": "csv"},
        "steps_per_print": 2**31 - 1,
    }
    return _merged(made, settings.deepspeed)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else value
    return out


def _titles(context: StepContext, catalogue: ItemCatalog) -> tuple[list[str], np.ndarray]:
    """Titles and SIDs of at most _MOST_TITLES items, the same on every rank; a title of after the run date is not read.

    MissingInputError where there is no table items.
    """
    items = np.sort(catalogue.item_index)
    if len(items) > _MOST_TITLES:
        items = np.sort(np.random.default_rng(context.config.run.seed).choice(items, _MOST_TITLES, replace=False))
    snapshot, found = context.snapshot("items"), {}
    for batch in read_batches(snapshot, snapshot.files, ["item_index", "title", "updated_at"]):
        chosen = np.isin(batch["item_index"], items) & (batch["updated_at"] < end_of(context.run_date))
        found.update(zip(batch["item_index"][chosen].tolist(), batch["title"][chosen], strict=True))
    known = np.array(sorted(found), dtype=np.int64)
    return [str(found[i]) for i in known], catalogue.sids_of(known)


def _positives(context: StepContext, items: int) -> np.ndarray:
    """Positives per item_index in the window before the run date, float64 [items]."""
    snapshot = context.snapshot("item_stats")
    counts = np.zeros(items)
    files = snapshot.select(start=context.run_date, end=context.run_date)
    for batch in read_batches(snapshot, files, ["item_index", "positives"]):
        known = batch["item_index"] < items
        counts[batch["item_index"][known]] = batch["positives"][known]
    return counts


def _without_targets(pack: Pack) -> Pack:
    return replace(pack, target_sids=pack.target_sids[:0], target_places=pack.target_places[:0])


def _empty_pack(model: InterestModel) -> Pack:
    """One token and no target: what a rank without any file computes."""
    nothing = np.empty((0, model.vocabulary.levels), dtype=np.int64)
    one = np.ones(1, dtype=np.int64)
    return Pack(one * model.vocabulary.first_id, one * 0, one, nothing, nothing, one[:0], one[:0])


if __name__ == "__main__":
    worker_main(STEP, run)
