"""Training of the residual-quantized VAE that turns item embeddings into SIDs.

Legend for shapes: N items, d embedding width, k latent width, L levels, C codes per level, B rows of a batch.

The recipe is the project's own (ours), measured on Amazon Industrial: autoencoder warm-up, residual k-means start on
all items, EMA codebooks, revival of dead codes from items with a large residual, AdamW with a one-cycle learning
rate.

One rank and two give the same bits: a batch is always cut into the same shards, gradients and codebook statistics are
summed over shards in the same order, and rank 0 makes the single decisions (k-means, revival) and broadcasts them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gpl_core.checkpoint import read_checkpoint, write_checkpoint
from gpl_core.errors import ContractError
from gpl_core.sids.kmeans import residual_kmeans
from gpl_core.sids.quantizer import Assignment, ResidualQuantizer, assign
from gpl_core.sids.tokenizer import Tokenizer, checked_embeddings, mlp

Progress = Callable[[int, Mapping[str, float]], None]
"""Called on rank 0 after each epoch with the number of finished epochs and its figures."""

_CHECKPOINT = "checkpoint.safetensors"
_SHARDS = 2
_QUERIES = 128  # rows of a shard that enter the relational loss as queries; all rows would cost half as much again


@dataclass(frozen=True)
class RqVaeSettings:
    """All that decides the trained tokenizer, apart from the embeddings."""

    levels: int = 3
    codes: int = 256
    hidden: tuple[int, ...] = (512,)  # widths between d and k; the decoder mirrors them
    latent: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    batch_size: int = 1024
    epochs: int = 400
    warmup_epochs: int = 20  # epochs of a plain autoencoder before the k-means start; part of ``epochs``
    ema_decay: float = 0.95
    commitment: float = 0.25
    revive_until: float = 0.8  # share of the epochs during which dead codes are revived
    dead_share: float = 0.25  # a code is dead when its EMA count is below this share of the mean count
    relational: float = 0.0  # weight of the KL of similarity distributions before and after quantization (0: off)
    relational_temperature: float = 0.1
    sample_rows: int = 262_144  # most items used for the k-means start and for revival
    seed: int = 0


def codes_for(items: int) -> int:
    """C by catalog size (ours): 256 up to 10^5 items, doubled for each factor of four, 8192 from about 10^8 on."""
    doublings = math.ceil(math.log(max(items, 1) / 1e5, 4)) if items > 1e5 else 0
    return 256 * 2 ** min(doublings, 5)


def epochs_for(items: int, batch_size: int = 1024) -> int:
    """Epochs by catalog size (ours): about 1,600 steps, within 20 to 400 epochs."""
    return min(400, max(20, 1600 // max(1, math.ceil(items / batch_size))))


class TrainEngine(Protocol):
    """Forward, backward and optimizer steps of one model on all ranks.

    An optimizer step is made of ``parts`` calls of ``step`` on each rank; the applied gradient is the sum of the
    gradients of all parts on all ranks.
    """

    rank: int
    world: int
    device: torch.device

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, parts: int, batch_size: int) -> None:
        """Takes the model (moved to ``device`` in place) and its optimizer; called once, before anything else."""

    def forward(self, *inputs: Any) -> Any:
        """The model's output."""

    def step(self, loss: Tensor) -> None:
        """Adds one part's gradient; every ``parts``-th call applies the sum."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks."""

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrites ``tensor`` with rank 0's."""


class RqVae(nn.Module):
    """Encoder, residual quantizer and mirrored decoder."""

    def __init__(self, dim: int, settings: RqVaeSettings) -> None:
        super().__init__()
        widths = (dim, *settings.hidden, settings.latent)
        self.encoder = mlp(widths)
        self.quantizer = ResidualQuantizer(settings.levels, settings.codes, settings.latent)
        self.decoder = mlp(widths[::-1])
        self._settings = settings

    def forward(self, x: Tensor, quantize: bool) -> tuple[Tensor, Tensor, Assignment | None]:
        """Loss and detached reconstruction loss (scalars) of ``x`` [B x d], and its assignment when ``quantize``."""
        latent = self.encoder(x)
        if not quantize:
            loss = functional.mse_loss(self.decoder(latent), x)
            return loss, loss.detach(), None
        quantized = self.quantizer(latent)
        output = self.decoder(quantized.latent)
        reconstruction = functional.mse_loss(output, x)
        loss = reconstruction + self._settings.commitment * quantized.commitment
        if self._settings.relational:
            loss = loss + self._settings.relational * relational_loss(x, output, self._settings.relational_temperature)
        return loss, reconstruction.detach(), quantized.assignment


def relational_loss(x: Tensor, output: Tensor, temperature: float) -> Tensor:
    """Mean KL(p || q) of the softmax over a row's cosines to the other rows (ours): p by ``x``, q by ``output``.

    Both [B x d], in random order; about ``_QUERIES`` evenly spaced rows are compared with all others. Keeps neighbors
    close after quantization. 0 for fewer than three rows.
    """
    if len(x) < 3:
        return output.sum() * 0.0
    asked = torch.arange(0, len(x), math.ceil(len(x) / _QUERIES), device=x.device)
    own = (torch.arange(len(asked), device=x.device), asked)
    unit, unit_out = functional.normalize(x, dim=1), functional.normalize(output, dim=1)
    p = (unit[asked] @ unit.T / temperature).index_put(own, x.new_tensor(-1e9)).log_softmax(dim=1)
    q = (unit_out[asked] @ unit_out.T / temperature).index_put(own, x.new_tensor(-1e9)).log_softmax(dim=1)
    return functional.kl_div(q, p, reduction="batchmean", log_target=True)


def one_cycle(step: int, total: int, peak: float) -> float:
    """The one-cycle learning rate (Smith 2018; torch's OneCycleLR with cosine annealing) at ``step`` of ``total``."""
    up = 0.3 * total - 1
    first, last = peak / 25, peak / 25 / 1e4
    start, end, share = (first, peak, step / up) if step <= up else (peak, last, (step - up) / (total - 1 - up))
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def fit(
    embeddings: np.ndarray,
    settings: RqVaeSettings,
    *,
    engine: TrainEngine,
    progress: Progress | None = None,
    checkpoint_dir: str | Path | None = None,
) -> Tokenizer:
    """Trains an RQ-VAE on ``embeddings`` float32 [N x d] (may be a memory map); every rank gets the tokenizer.

    ``engine`` runs forward, backward and the optimizer step. With ``checkpoint_dir``, a killed run started again with
    the same input continues to the same result. Raises ContractError for zero or NaN rows, for N = 0, and for fewer
    items than ranks.
    """
    checked_embeddings(embeddings)
    if len(embeddings) < max(1, engine.world):
        raise ContractError(
            f"embeddings: {len(embeddings)} items for {engine.world} ranks, expected one each or more; use fewer ranks."
        )
    run = _Training(embeddings, settings, engine)
    first_epoch = run.resume(checkpoint_dir) if checkpoint_dir is not None else 0
    for epoch in range(first_epoch, settings.epochs):
        figures = run.epoch(epoch)
        if engine.rank == 0:
            # About forty checkpoints a run, none after the last epoch, whose result is the artifact.
            due = (epoch + 1) % max(1, settings.epochs // 40) == 0 and epoch + 1 < settings.epochs
            if checkpoint_dir is not None and due:
                run.save(checkpoint_dir, epoch + 1)
            if progress is not None:
                progress(epoch + 1, figures)
    model = run.model
    return Tokenizer(
        model.encoder, model.decoder, model.quantizer.codebooks, run.mean, run.scale,
        {"method": "rqvae", "items": len(embeddings), "settings": dataclasses.asdict(settings)},
    )  # fmt: skip


class _Training:
    """The state of one training: model, optimizer, order of rows. An epoch depends only on its number and the state."""

    def __init__(self, embeddings: np.ndarray, settings: RqVaeSettings, engine: TrainEngine) -> None:
        self.embeddings, self.settings, self.engine = embeddings, settings, engine
        self.sample = sample_rows(embeddings, settings.sample_rows, settings.seed)
        # Centered and scaled to unit variance per coordinate: layers and commitment weight then fit any encoder.
        mean = self.sample.mean(axis=0)
        self.scale = float(1.0 / max(self.sample.std(), 1e-6)) if len(self.sample) > 1 else 1.0
        self.mean = torch.as_tensor(mean)
        self.sample = (self.sample - mean) * np.float32(self.scale)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = RqVae(embeddings.shape[1], settings)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        batches = math.ceil(len(embeddings) / settings.batch_size)
        self.sizes = np.diff(np.linspace(0, len(embeddings), batches + 1).astype(np.int64))
        self.shards = _SHARDS if _SHARDS % engine.world == 0 else engine.world
        engine.prepare(self.model, self.optimizer, self.shards // engine.world, settings.batch_size)
        self.mean = self.mean.to(engine.device)

    @property
    def identity(self) -> dict[str, object]:
        """What a checkpoint must match to be continued."""
        mean = [round(float(v), 6) for v in self.mean[:8]]
        return dataclasses.asdict(self.settings) | {"shape": self.embeddings.shape, "sample_mean": mean}

    def save(self, folder: str | Path, done: int) -> None:
        """Writes the state after `done` epochs."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        write_checkpoint(Path(folder) / _CHECKPOINT, {"identity": self.identity, "done": done, **state})

    def resume(self, folder: str | Path) -> int:
        """Restores a checkpoint that all ranks see; returns the finished epochs, 0 to start from the beginning."""
        state = read_checkpoint(Path(folder) / _CHECKPOINT)
        done = int(state["done"]) if state and state["identity"] == self.identity else 0
        first = torch.tensor([float(done)], device=self.engine.device)
        self.engine.broadcast(first)
        # Without a shared disk only rank 0's machine has the file: then no rank may use it.
        alike = self.engine.sum(torch.tensor([float(first.item() == done)], device=self.engine.device))
        if not state or not done or int(alike.item()) != self.engine.world:
            return 0
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        return done

    def epoch(self, epoch: int) -> dict[str, float]:
        """Runs one epoch over all rows; returns its figures (equal on all ranks)."""
        settings, quantizer = self.settings, self.model.quantizer
        quantize = epoch >= settings.warmup_epochs
        if epoch == settings.warmup_epochs:
            self._start_codebooks()
        figures = torch.zeros(2, device=self.engine.device)  # summed reconstruction loss, rows
        total = settings.epochs * len(self.sizes)
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(self.embeddings))
        for number, batch in enumerate(np.split(order, np.cumsum(self.sizes)[:-1])):
            rate = one_cycle(epoch * len(self.sizes) + number, total, settings.learning_rate)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            statistics = torch.zeros(*quantizer.counts.shape, settings.latent + 1, device=self.engine.device)
            for shard in range(self.engine.rank, self.shards, self.engine.world):
                rows = np.sort(batch[shard :: self.shards])
                if not len(rows):  # a catalog of fewer rows than shards, on one rank
                    self.engine.step(sum((p.sum() for p in self.model.parameters()), figures.new_zeros(())) * 0.0)
                    continue
                x = (torch.as_tensor(np.array(self.embeddings[rows])).to(self.engine.device) - self.mean) * self.scale
                loss, reconstruction, found = self.engine.forward(x, quantize)
                # Shard means weighted by shard size add up to the batch mean.
                self.engine.step(loss * (len(rows) / len(batch)))
                figures += torch.stack([reconstruction * len(rows), reconstruction.new_tensor(float(len(rows)))])
                if quantize:
                    statistics = statistics + quantizer.statistics(found)
            if quantize:
                quantizer.ema_step(self.engine.sum(statistics), settings.ema_decay)
        revived = self._revive(epoch) if quantize and epoch + 1 < settings.revive_until * settings.epochs else 0
        figures = self.engine.sum(figures)
        out = {"reconstruction": float(figures[0] / figures[1]), "revived": float(revived), "learning_rate": rate}
        if quantize:
            share = quantizer.counts / quantizer.counts.sum(dim=1, keepdim=True)
            perplexity = torch.exp(-(share * share.clamp(min=1e-12).log()).sum(dim=1))
            out |= {f"perplexity_{level}": float(value) for level, value in enumerate(perplexity, start=1)}
        return out

    @torch.no_grad()
    def _sample_latents(self) -> Tensor:
        parts = torch.from_numpy(self.sample).split(16_384)
        return torch.cat([self.model.encoder(part.to(self.engine.device)) for part in parts])

    def _start_codebooks(self) -> None:
        settings, quantizer = self.settings, self.model.quantizer
        if self.engine.rank == 0:
            latents = self._sample_latents()
            books, counts = residual_kmeans(latents.cpu().numpy(), settings.levels, settings.codes, settings.seed)
            # A code's EMA weight is what it would collect in one step; codes without rows get a dead code's share.
            weights = counts * (self.sizes.mean() / len(self.sample))
            weights = np.maximum(weights, settings.dead_share * self.sizes.mean() / settings.codes)
            everything = torch.arange(settings.codes, device=latents.device)
            for level, (book, weight) in enumerate(zip(books, weights.astype(np.float32), strict=True)):
                vectors, count = (torch.as_tensor(array, device=latents.device) for array in (book, weight))
                quantizer.set_codes(level, everything, vectors, count)
        self._broadcast_codebooks()

    def _revive(self, epoch: int) -> int:
        """Moves dead codes to rows drawn by squared residual, level by level; returns the number moved (on rank 0)."""
        quantizer = self.model.quantizer
        dead = quantizer.counts < self.settings.dead_share * quantizer.counts.mean(dim=1, keepdim=True)
        if not bool(dead.any()):
            return 0
        moved = 0
        if self.engine.rank == 0:
            rng = np.random.default_rng([self.settings.seed, epoch, 1])
            latents = self._sample_latents()
            for level in range(self.settings.levels):
                codes = torch.nonzero(dead[level])[:, 0]
                if not len(codes):
                    continue
                found = assign(latents, quantizer.codebooks[: level + 1])
                after = found.residuals[:, level] - quantizer.codebooks[level][found.codes[:, level]]
                far = after.square().sum(dim=1).double().cpu().numpy()
                candidates = np.flatnonzero(far > 1e-10)
                codes = codes[: len(candidates)]
                if not len(codes):
                    continue
                share = far[candidates] / far[candidates].sum()
                rows = rng.choice(candidates, size=len(codes), replace=False, p=share)
                vectors = found.residuals[torch.as_tensor(rows, device=latents.device), level]
                quantizer.set_codes(level, codes, vectors, quantizer.counts[level].mean().expand(len(codes)))
                moved += len(codes)
        self._broadcast_codebooks()
        return moved

    def _broadcast_codebooks(self) -> None:
        for tensor in self.model.quantizer.buffers():
            self.engine.broadcast(tensor)


def sample_rows(embeddings: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """At most ``rows`` rows, drawn without replacement, as float32 in memory."""
    if len(embeddings) <= rows:
        return np.array(embeddings, dtype=np.float32)
    chosen = np.random.default_rng([seed, 2]).choice(len(embeddings), size=rows, replace=False)
    return np.array(embeddings[np.sort(chosen)], dtype=np.float32)
