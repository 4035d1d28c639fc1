"""Early stopping by held-out exposed requests: one rule for all variants, which any user of the feed can apply."""

import zlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from gpl_core.prerank.metrics import auc

HELD_OUT_SHARE = 0.1
_BUCKETS = 1000


def held_out(request_ids: Iterable[str]) -> npt.NDArray[np.bool_]:
    """bool [n]: rows of the held-out requests: whole requests, chosen by hash, the same in every run."""
    limit = int(HELD_OUT_SHARE * _BUCKETS)
    return np.fromiter((zlib.crc32(b"held-out:" + r.encode()) % _BUCKETS < limit for r in request_ids), dtype=bool)


class BestWeights:
    """Keeps the weights with the highest AUC on held-out exposed rows.

    Where that AUC is undefined (no held-out click, say) it keeps the last weights offered.
    """

    def __init__(self) -> None:
        self.step = 0
        self.value: float | None = None
        self._weights: dict[str, Tensor] = {}

    def offer(self, step: int, model: nn.Module, scores: npt.ArrayLike, clicks: npt.ArrayLike) -> None:
        """Considers the model after `step` steps; scores and clicks (0/1) are [n] over the held-out exposed rows."""
        # Rounded, so that rows of one pair tie and float noise (of another number of ranks, say) decides nothing.
        value = auc(np.round(np.asarray(scores, dtype=np.float64), 4), clicks).value
        if self._weights and value is not None and self.value is not None and value <= self.value + 1e-9:
            return
        self.step, self.value = step, value
        self._weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def restore(self, model: nn.Module) -> None:
        """Puts the best weights into `model`."""
        if self._weights:
            model.load_state_dict(self._weights)
