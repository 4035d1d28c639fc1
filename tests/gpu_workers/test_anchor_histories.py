"""Which requests generate_anchors can search: the test of whole batches is that of single rows."""

from __future__ import annotations

import numpy as np
import pytest

from gpl_core.errors import ContractError
from gpl_core.interest.vocabulary import SidVocabulary
from gpu_workers.generate_anchors import history_of, sound


@pytest.mark.parametrize("width", [5, 6])
def test_a_row_is_sound_when_its_history_can_be_read(width):
    vocabulary, random = SidVocabulary(levels=2, codes=3, first_id=10), np.random.default_rng(0)
    length = random.integers(-1, 5, 4_000)
    sid = np.where(np.arange(width) < 2 * length[:, None], random.integers(0, 3, (4_000, width)), -1)
    damaged = random.random(4_000) < 0.5
    sid[damaged, random.integers(0, width, damaged.sum())] = random.integers(-2, 5, damaged.sum())
    found = sound(vocabulary, sid, length)
    for row, events, readable in zip(sid, length.tolist(), found, strict=True):
        if readable:
            np.testing.assert_array_equal(history_of(vocabulary, row, events), row.reshape(-1, 2)[:events])
        else:
            with pytest.raises(ContractError):
                history_of(vocabulary, row, events)
    assert 500 < found.sum() < 3_500 if width == 6 else not found.any()
