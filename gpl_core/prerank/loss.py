"""The dual-label loss: observed clicks for exposed pairs, pseudo-labels for unexposed ones.

    L = mean_{exposed} BCE(y, f) + lambda * mean_{unexposed} w * BCE(y~, f)

The fusion of the two label sources is the paper's (arXiv 2602.20995); that the weighted mean divides by the number of
rows, not by the sum of the weights, is ours: lambda keeps its meaning whatever the level of the weights, and weights of
zero give exactly exposed-only training. In use:

    loss = dual_label_loss(logits, target, is_exposed, sample_weight, 4.0, sampling_probability)
    loss.backward()
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpl_core.errors import ContractError


class RowMass(NamedTuple):
    """The divisors of the two means, scalars; see `row_mass`."""

    exposed: Tensor
    unexposed: Tensor


def row_mass(is_exposed: Tensor, sampling_probability: Tensor | None = None) -> RowMass:
    """Rows of each kind in a batch: exposed rows, and unexposed rows (or the sum of their 1 / pi).

    is_exposed: bool [n]; sampling_probability: [n] in (0, 1], given when the unexposed rows' weights are to be divided
    by it (self-normalized per batch). Under several ranks: all-reduce the mean of both and pass the result to
    `dual_label_loss`: gradients averaged over ranks are then those of the whole batch on one rank.
    """
    exposed = is_exposed.sum().float()
    if sampling_probability is None:
        return RowMass(exposed, (~is_exposed).sum().float())
    return RowMass(exposed, (1.0 / sampling_probability[~is_exposed].float()).sum())


def dual_label_loss(
    logits: Tensor,
    target: Tensor,
    is_exposed: Tensor,
    sample_weight: Tensor,
    lambda_: float,
    sampling_probability: Tensor | None = None,
    mass: RowMass | None = None,
) -> Tensor:
    """Scalar loss of one mixed batch, in the type of the logits.

    logits, target, sample_weight: [n], target in [0, 1] (the click of an exposed row, the pseudo-label of an unexposed
    one); is_exposed: bool [n]. sample_weight of exposed rows is not used. A kind without rows adds 0.
    sampling_probability: [n]; None counts every unexposed row once, else it counts 1 / pi, self-normalized.
    mass: divisors to use instead of this batch's own `row_mass`.

    With lambda_ = 0, or sample_weight all 0, value and gradients equal exposed-only BCE bit for bit.
    Raises ContractError when lambda_ is negative or not finite, shapes disagree, or is_exposed is not bool.
    """
    if not 0.0 <= lambda_ < float("inf"):
        raise ContractError(f"prerank.lambda is {lambda_!r}; expected a finite value >= 0")
    if is_exposed.dtype != torch.bool:  # of uint8, `~` gives numbers that select every row
        raise ContractError(
            f"dual_label_loss: is_exposed has type {is_exposed.dtype}; expected torch.bool: pass is_exposed.bool() "
            "(Petastorm makes uint8 of booleans)"
        )
    for name, tensor in (("target", target), ("is_exposed", is_exposed), ("sample_weight", sample_weight)):
        if tensor.shape != logits.shape:
            raise ContractError(
                f"dual_label_loss: {name} has shape {tuple(tensor.shape)}; expected {tuple(logits.shape)}"
            )
    # Rows are selected, not masked by 0, and without `mass` the mean is torch's own: exactly the exposed-only loss.
    if mass is None:
        loss = exposed_only_loss(logits, target, is_exposed)
        mass = row_mass(is_exposed, sampling_probability)
    else:
        seen = F.binary_cross_entropy_with_logits(logits[is_exposed], target[is_exposed], reduction="sum")
        loss = seen / mass.exposed.clamp(min=1e-12)
    if lambda_ == 0.0:
        return loss
    unseen = ~is_exposed
    errors = F.binary_cross_entropy_with_logits(logits[unseen], target[unseen], reduction="none")
    weighted = sample_weight[unseen] * errors
    if sampling_probability is not None:
        weighted = weighted / sampling_probability[unseen]
    return loss + lambda_ * (weighted.sum() / mass.unexposed.clamp(min=1e-12))


def exposed_only_loss(logits: Tensor, target: Tensor, is_exposed: Tensor) -> Tensor:
    """Mean BCE over the exposed rows alone, the usual pre-ranker's loss; [n] each, 0 without an exposed row."""
    if not bool(is_exposed.any()):
        return logits.sum() * 0.0
    return F.binary_cross_entropy_with_logits(logits[is_exposed], target[is_exposed])
