"""Train the tokenizer on item content and publish it if it is healthy: item_embeddings -> artifact tokenizer.

    deepspeed --num_accelerators 1 gpu_workers/train_tokenizer.py --config quickstart --run-date 2026-01-02

It sees each item's newest content from before the run date. Curves go to work/train_tokenizer/*/tensorboard.
"""

import hashlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpl_core.config import Config
from gpl_core.contracts.raw_values import midnight
from gpl_core.errors import UsageError
from gpl_core.graph.step_run import StepContext, log
from gpl_core.lakehouse.scratch import scratch_folder
from gpl_core.lakehouse.storage import local_folder
from gpl_core.sids.health import check_gates, measure
from gpl_core.sids.rqvae import RqVaeSettings, codes_for, epochs_for, fit
from gpl_core.sids.tokenizer import Tokenizer
from gpl_core.sids.trie import are_too_many
from gpu_workers.inputs.embeddings import encoder_version_of, item_vectors
from gpu_workers.outputs import alone_in
from gpu_workers.ranks import Ranks, one_thread
from gpu_workers.worker import worker_main


class DeepSpeedEngine:
    """The training engine of ``fit`` on DeepSpeed: data parallelism, gradient sums and monitors."""

    def __init__(self, ranks: Ranks, tensorboard: Path) -> None:
        self.rank, self.world, self.device = ranks.rank, ranks.size, ranks.device
        self._tensorboard = tensorboard

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, parts: int, batch_size: int) -> None:
        config = {
            "train_micro_batch_size_per_gpu": max(1, batch_size // (parts * self.world)),
            "gradient_accumulation_steps": parts,
            "zero_optimization": {"stage": 0},  # the model is small; codebooks are buffers, summed by the loop
            "steps_per_print": 1_000_000,
            "tensorboard": {"enabled": True, "output_path": str(self._tensorboard.parent), "job_name": "tensorboard"},
        }
        model.to(self.device)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        # DeepSpeed takes the mean over ranks and accumulation steps; the loop wants the sum.
        self._parts = parts * self.world

    def forward(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def step(self, loss: Tensor) -> None:
        self._engine.backward(loss * self._parts)
        self._engine.step()

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> None:
        if self.world > 1:
            dist.broadcast(tensor, 0)

    def scalars(self, figures: Mapping[str, float], step: int) -> None:
        """Writes figures to TensorBoard through DeepSpeed's monitor."""
        self._engine.monitor.write_events([(f"tokenizer/{name}", value, step) for name, value in figures.items()])


_WARMUP_EPOCHS = 20  # of a plain autoencoder, before the k-means start
_RELATIONAL = 0.3  # weight of the relational loss: decision 009


def settings_of(config: Config, items: int) -> RqVaeSettings:
    """The configured settings for a catalog of ``items``: C and the number of epochs follow its size."""
    own = config.tokenizer
    codes, epochs = own.codes or codes_for(items), min(own.epochs, epochs_for(items, own.batch_size))
    if are_too_many(codes, own.levels):
        raise UsageError(f"tokenizer.levels: {own.levels} levels of {codes} codes are too many SIDs; set fewer levels")
    return RqVaeSettings(
        levels=own.levels,
        codes=codes,
        batch_size=own.batch_size,
        epochs=epochs,
        warmup_epochs=min(_WARMUP_EPOCHS, epochs // 5),
        relational=_RELATIONAL,
        seed=config.run.seed,
    )


def run(context: StepContext, ranks: Ranks) -> None:
    """Train, check the result against the gates, publish."""
    with ranks.together():
        snapshot = context.snapshot("item_embeddings")
        encoder_version = encoder_version_of(snapshot)
        folder = local_folder(context.lake.root, context.step.name, context.artifact_digest[:16])
    before = midnight(context.run_date)
    with alone_in(folder, ranks), item_vectors(snapshot, encoder_version, ranks, before=before) as items:
        with ranks.together():
            settings = settings_of(context.config, len(items.vectors))
        log.info("train_tokenizer: %d items, C = %d, %d epochs", len(items.vectors), settings.codes, settings.epochs)
        started = time.monotonic()
        tokenizer = _train(ranks, settings, items.vectors, folder)
        seconds = time.monotonic() - started
        codebooks = hashlib.sha256(tokenizer.codebooks.cpu().numpy().tobytes()).hexdigest()
        held = ranks.gather_text(codebooks)
        with ranks.together():
            if len(set(held)) > 1:
                raise RuntimeError(f"tokenizer: ranks ended with different codebooks: {held}; this is a bug")
            if ranks.is_main:
                health = measure(tokenizer, items.vectors)
                figures = asdict(health)
                context.counts.rows_in = len(items.vectors)
                context.counts.details = {
                    "encoder_version": encoder_version, "codebooks": codebooks, "seconds": round(seconds, 1),
                    **figures,
                }  # fmt: skip
                log.info("train_tokenizer: %s", figures)
                check_gates(health, **context.config.tokenizer.gates.model_dump())
                with scratch_folder() as scratch:
                    tokenizer.save(scratch)
                    lineage = {"encoder_version": encoder_version}
                    manifest = context.publish(scratch, lineage, figures, saw_all=not items.left_out)
                log.info("train_tokenizer: published %s", manifest.version)
                shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def _train(ranks: Ranks, settings: RqVaeSettings, vectors: Any, folder: Path) -> Tokenizer:
    engine = DeepSpeedEngine(ranks, folder / "tensorboard")

    def progress(done: int, figures: Mapping[str, float]) -> None:
        engine.scalars(figures, done)
        if done % max(1, settings.epochs // 10) == 0:
            shown = " ".join(f"{name}={value:.4g}" for name, value in figures.items())
            log.info("train_tokenizer: epoch %d of %d %s", done, settings.epochs, shown)

    with one_thread():
        return fit(vectors, settings, progress=progress, checkpoint_dir=folder / "checkpoint", engine=engine)


if __name__ == "__main__":
    worker_main("train_tokenizer", run)
