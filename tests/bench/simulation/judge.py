"""Trains a variant and judges it against the truth of the test day."""

from __future__ import annotations

import numpy as np
import torch

from gpl_core.conf.sections import Prerank
from gpl_core.prerank import metrics
from gpl_core.prerank.bootstrap import replicates
from gpl_core.prerank.early_stopping import BestWeights, held_out
from gpl_core.prerank.features import TowerBatch
from gpl_core.prerank.loss import dual_label_loss
from gpl_core.prerank.two_tower import TowerConfig, TwoTower, build_model, content_basis, parameter_groups
from tests.bench.simulation import diversity
from tests.bench.simulation.variants import Rows
from tests.bench.simulation.world import L, World

SHIPPED = Prerank()


class Arena:
    """Towers' inputs of one world, and the loop that every variant goes through alike."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.seed = world, seed
        self.vectors = torch.from_numpy(world.vectors)
        self.sids = torch.from_numpy(world.sids.astype(np.int64))
        profile = np.zeros((world.users, world.vectors.shape[1]), dtype=np.float32)
        for user, items in world.known.history.items():
            mean = world.vectors[items].mean(axis=0)
            profile[user] = mean / max(float(np.linalg.norm(mean)), 1e-12)
        self.profile = torch.from_numpy(profile)
        self.basis = content_basis(self.vectors, SHIPPED.dimension)

    def batch(self, user: np.ndarray, item: np.ndarray, with_content: bool = True) -> TowerBatch:
        """Model inputs of (user, item) pairs."""
        u, i = torch.from_numpy(user), torch.from_numpy(item)
        profile, content, sid = self.profile[u], self.vectors[i], self.sids[i]
        if not with_content:
            profile, content, sid = torch.zeros_like(profile), torch.zeros_like(content), torch.full_like(sid, -1)
        return TowerBatch(u, profile, i, content, sid, torch.zeros(len(user), 0))

    def train(self, rows: Rows) -> TwoTower:
        """As `train_preranker` does under its defaults: the same initial weights, exposed batches and steps for all.

        Each variant keeps the weights with the best AUC on the exposed rows of held-out requests.
        """
        world = self.world
        sizes = TowerConfig(
            user_buckets=world.users, item_buckets=len(world.vectors), dimension=SHIPPED.dimension, hidden=64,
            content_width=world.vectors.shape[1], levels=L, codes=world.size.codes,
            prior_rate=float(np.clip(world.train.clicked[world.train.is_exposed].mean(), 1e-3, 0.5)),
        )  # fmt: skip
        model = build_model(sizes, self.seed, self.basis)
        groups = parameter_groups(model, SHIPPED.learning_rate)
        optimizer = torch.optim.AdamW(groups, weight_decay=1e-4, fused=True)
        apart = held_out(map(str, rows.request))
        exposed, other = np.flatnonzero(rows.is_exposed & ~apart), np.flatnonzero(~rows.is_exposed & ~apart)
        # Exposed rows come in the same order to every variant, whatever it holds beside them.
        seen, unseen = (_stream(of, np.random.default_rng([self.seed, n])) for n, of in ((5, exposed), (6, other)))
        judge = world.train.take(world.train.is_exposed & held_out(map(str, world.train.request)))
        best = BestWeights()
        for step in range(1, world.size.steps + 1):
            chosen = np.concatenate([seen(SHIPPED.batch_size), unseen(SHIPPED.batch_size)])
            loss = dual_label_loss(
                model(self.batch(rows.user[chosen], rows.item[chosen], rows.with_content)),
                torch.from_numpy(rows.target[chosen].astype(np.float32)),
                torch.from_numpy(rows.is_exposed[chosen]),
                torch.from_numpy(rows.weight[chosen].astype(np.float32)),
                rows.lambda_,
                torch.from_numpy(rows.sampling_probability[chosen].astype(np.float32)),
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % max(1, world.size.steps // 8) == 0 or step == world.size.steps:
                best.offer(step, model, self.predict(model, judge.user, judge.item, rows.with_content), judge.clicked)
        best.restore(model)
        return model.eval()

    def predict(self, model: TwoTower, user: np.ndarray, item: np.ndarray, with_content: bool = True) -> np.ndarray:
        """Logits float64 [n]."""
        with torch.no_grad():
            parts = [
                model(self.batch(user[s : s + 8192], item[s : s + 8192], with_content)).double().numpy()
                for s in range(0, len(user), 8192)
            ]
        return np.concatenate(parts)

    def judge(self, scores: np.ndarray) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """(`slice/metric` -> figure on the test day, replicates over users of those that have them).

        A figure that is undefined is left out.
        """
        world, test = self.world, self.world.test
        exposures = np.bincount(world.train.item[world.train.is_exposed], minlength=len(world.vectors))
        head = np.zeros(len(exposures), dtype=bool)
        head[np.argsort(-exposures, kind="stable")[: len(exposures) // 5]] = True
        tail = ~head
        drawn = (np.random.default_rng([self.seed, 7]).random(len(test)) < test.probability).astype(np.float64)
        slices = {
            "unexposed": ~test.is_exposed,
            "exposed": test.is_exposed,
            "recalled": np.ones(len(test), dtype=bool),
            "tail": tail[test.item] & ~test.is_exposed,
            "new": world.is_new[test.item],
        }
        out: dict[str, float | None] = {}
        replicated: dict[str, np.ndarray] = {}
        for name, chosen in slices.items():
            s, p, user = scores[chosen], test.probability[chosen], test.user[chosen]
            for figure in (metrics.auc(s, p, user), metrics.gauc(s, p, user)):
                out[f"{name}/{figure.metric}"] = figure.value
                if figure.sums is not None:
                    replicated[f"{name}/{figure.metric}"] = replicates([figure.sums])[:, 0].astype(np.float32)
        uniform = test.is_random & test.is_exposed
        out["uniform/auc"] = metrics.auc(scores[uniform], test.clicked[uniform]).value
        for kind in ("hr", "ndcg"):
            figure = metrics.ranked(kind, scores, drawn, test.request, _hash(test.item), 10)
            out[f"recalled/{figure.metric}"] = figure.value
            out["recalled/candidates"] = figure.candidate_set_size
        top = diversity.top_of_lists(scores, test.item, test.request, 10)
        out["top10/coverage"] = diversity.coverage(top, len(world.vectors))
        out["top10/gini"] = diversity.gini(top, len(world.vectors))
        out["top10/diversity"] = diversity.intra_list_diversity(top, world.vectors)
        out["top10/tail_share"] = diversity.share_of(top, tail)
        return {key: value for key, value in out.items() if value is not None}, replicated


def _stream(rows: np.ndarray, rng: np.random.Generator):  # type: ignore[no-untyped-def]
    """A function n -> the next n of `rows`, reshuffled every epoch; nothing when there are none."""
    held = np.empty(0, dtype=np.int64)

    def take(count: int) -> np.ndarray:
        nonlocal held
        while len(rows) and len(held) < count:
            held = np.concatenate([held, rng.permutation(rows)])
        out, held = held[:count], held[count:]
        return out

    return take


def _hash(item: np.ndarray) -> np.ndarray:
    return (item * 2_654_435_761) % 2**32
