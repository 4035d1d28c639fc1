"""The reference pre-ranker: two towers joined by a dot product (torch).

The architecture is ours, of standard parts (two-tower retrieval: Yi et al., RecSys 2019). The item side can be computed
once per item, the user side once per request, so that a candidate costs one dot product online.

Legend for shapes: n pairs, m dimension of the towers, d width of the item embedding, L levels of the semantic ID.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpl_core.prerank.features import TowerBatch

_START_GAIN = 2.0


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of the model."""

    user_buckets: int  # rows of the hashed id embeddings, as item_buckets
    item_buckets: int
    dimension: int  # m, width of embeddings and tower outputs
    hidden: int  # width of each tower's one hidden layer
    content_width: int  # d
    levels: int  # L of the semantic IDs
    codes: int  # C of the semantic IDs; 0 leaves them out
    pair_features: tuple[str, ...] = ()  # names of the passthrough features, a linear term added to the dot product
    prior_rate: float = 0.05  # click rate that the untrained model predicts


class UserTower(nn.Module):
    """u = W p + MLP([id; W p]): a user's vector [n x m] from the hashed id and the profile p."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.id = nn.Embedding(config.user_buckets, config.dimension)
        self.project = nn.Linear(config.content_width, config.dimension, bias=False)
        self.hidden = nn.Linear(2 * config.dimension, config.hidden)
        self.out = nn.Linear(config.hidden, config.dimension)

    def forward(self, bucket: Tensor, profile: Tensor) -> Tensor:
        """bucket int64 [n], profile [n x d] -> [n x m]."""
        taste = self.project(profile)
        return taste + self.out(torch.relu(self.hidden(torch.cat([self.id(bucket), taste], dim=1))))


class ItemTower(nn.Module):
    """v = [W e + MLP([id; W e; s]), bias]: an item's vector [n x (m + 1)]; s sums one embedding per SID level."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.codes = config.codes
        self.id = nn.Embedding(config.item_buckets, config.dimension)
        # One row per level and code; row 0, for "no semantic ID", stays 0.
        self.sid = nn.Embedding(config.levels * config.codes + 1, config.dimension, padding_idx=0)
        self.project = nn.Linear(config.content_width, config.dimension, bias=False)
        self.hidden = nn.Linear(3 * config.dimension, config.hidden)
        self.out = nn.Linear(config.hidden, config.dimension + 1)

    def forward(self, bucket: Tensor, content: Tensor, sid: Tensor) -> Tensor:
        """bucket int64 [n], content [n x d], sid int64 [n x L] (-1: none) -> [n x (m + 1)], the last column a bias."""
        look = self.project(content)
        level = torch.arange(sid.shape[1], device=sid.device) * self.codes + 1
        rows = torch.where((sid >= 0) & (self.codes > 0), sid + level, torch.zeros_like(sid))
        side = torch.cat([self.id(bucket), look, self.sid(rows).sum(dim=1)], dim=1)
        out = self.out(torch.relu(self.hidden(side)))
        return torch.cat([look + out[:, :-1], out[:, -1:]], dim=1)


class TwoTower(nn.Module):
    """logit = <u, v> / sqrt(m) + item bias + w . pair features; click probability = sigmoid(logit)."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        self.user = UserTower(config)
        self.item = ItemTower(config)
        self.pair = nn.Linear(max(1, len(config.pair_features)), 1, bias=False)

    def forward(self, batch: TowerBatch) -> Tensor:
        """Logits [n]."""
        user = self.user(batch.user_bucket, batch.profile)
        item = self.item(batch.item_bucket, batch.content, batch.sid)
        logits = (user * item[:, :-1]).sum(dim=1) / math.sqrt(self.config.dimension) + item[:, -1]
        if self.config.pair_features:
            logits = logits + self.pair(batch.pair).squeeze(1)
        return logits


def content_basis(vectors: Tensor, dimension: int) -> Tensor:
    """The first principal directions of item embeddings, float32 [m x d]: the start of both projections.

    vectors: a sample [n x d] of the catalog. Missing directions (n or d below m) are 0.
    """
    centered = vectors.double() - vectors.double().mean(dim=0)
    _, values, directions = torch.linalg.svd(centered, full_matrices=False)
    basis = torch.zeros(dimension, vectors.shape[1])
    there = min(dimension, int((values > 1e-9).sum()))
    # The sign of a singular vector is arbitrary: a positive largest entry makes runs agree.
    largest = directions[:there].gather(1, directions[:there].abs().argmax(dim=1, keepdim=True))
    basis[:there] = (directions[:there] * torch.sign(largest)).float()
    return basis


def build_model(config: TowerConfig, seed: int, basis: Tensor | None = None) -> TwoTower:
    """A TwoTower with deterministic initial weights: equal (config, seed, basis) give equal weights on every rank.

    Both projections start as the same matrix, so that before training the logit already grows with the cosine of
    profile and content: every variant, exposed-only included, starts from content. basis [m x d]: `content_basis`;
    without it, a random matrix. Hidden outputs and id embeddings start small.
    """
    generator = torch.Generator().manual_seed(seed)
    model = TwoTower(config)
    random = torch.randn(config.dimension, config.content_width, generator=generator) / math.sqrt(config.content_width)
    # <W p, W e> / sqrt(m) is then _START_GAIN times the cosine within the basis.
    shared = (random if basis is None else basis) * math.sqrt(_START_GAIN * math.sqrt(config.dimension))
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("project.weight"):
                parameter.copy_(shared)
            elif name.startswith("pair") or name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("id.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
            else:
                bound = 1.0 / math.sqrt(parameter.shape[1])
                parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
        model.item.sid.weight[0].zero_()
        model.user.out.weight.mul_(0.1)
        model.item.out.weight.mul_(0.1)
        model.item.out.bias[-1] = math.log(config.prior_rate / (1 - config.prior_rate))
    return model


def parameter_groups(model: TwoTower, learning_rate: float) -> list[dict[str, object]]:
    """Optimizer groups: embeddings of ids and codes learn at a tenth of the rate.

    Adam moves a row at full rate whenever it occurs, so embeddings memorize a handful of clicks: on a simulated day,
    exposed-only training then fell below plain content within one epoch.
    """
    tables = {"user.id.weight", "item.id.weight", "item.sid.weight"}
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if name not in tables], "lr": learning_rate},
        {"params": [p for name, p in named if name in tables], "lr": learning_rate * 0.1},
    ]
