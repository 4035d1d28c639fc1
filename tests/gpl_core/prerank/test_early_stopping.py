"""Early stopping: whole requests are held out, the best weights come back, an undefined AUC keeps the last ones."""

import numpy as np
import torch

from gpl_core.prerank.early_stopping import HELD_OUT_SHARE, BestWeights, held_out


def test_whole_requests_are_held_out_at_the_stated_share() -> None:
    names = [f"r{n // 4}" for n in range(40_000)]
    out = held_out(names)
    assert abs(out.mean() - HELD_OUT_SHARE) < 0.01
    assert (out.reshape(-1, 4).all(axis=1) | ~out.reshape(-1, 4).any(axis=1)).all()
    assert (held_out(names[::-1])[::-1] == out).all()


def _model(value: float) -> torch.nn.Module:
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, value)
    return model


def test_the_best_weights_come_back() -> None:
    clicks = np.array([0.0, 1.0, 0.0, 1.0])
    best = BestWeights()
    for step, scores in enumerate(([1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 1, 0]), start=1):
        best.offer(step, _model(step), np.array(scores, dtype=float), clicks)
    assert (best.step, best.value) == (2, 1.0)
    model = _model(9)
    best.restore(model)
    assert model.weight.item() == 2.0


def test_an_undefined_auc_keeps_the_last_weights() -> None:
    best = BestWeights()
    for step in (1, 2):
        best.offer(step, _model(step), np.zeros(3), np.zeros(3))
    assert (best.step, best.value) == (2, None)
