"""Logs of real data: later likes are of the same user, after the request; clicks follow wishes as the dial says."""

from __future__ import annotations

from datetime import date
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tests.bench.simulation import purchases
from tests.bench.simulation.log import Memory
from tests.bench.simulation.movielens import movielens_log


def _time(text: str) -> pd.Timestamp:
    return pd.Timestamp(f"2025-10-{text}", tz="UTC")


def test_an_unexposed_candidate_is_positive_when_its_user_likes_it_later(tmp_path) -> None:
    """u1 likes b before, c after the request of the 5th, and d only badly; u2 likes e."""
    shown = pd.DataFrame(
        [("r0", "u1", "b", "01 10:00", 1, 1), ("r1", "u1", "a", "05 10:00", 1, 0), ("r2", "u1", "c", "09 10:00", 1, 1),
         ("r2", "u1", "d", "09 10:01", 2, 0), ("r3", "u2", "e", "09 10:00", 1, 1)],
        columns=["request_id", "user_id", "item_id", "event_time", "position", "clicked"],
    )  # fmt: skip
    shown["event_time"] = shown["event_time"].map(_time)
    recalled = pd.DataFrame(
        {"request_id": "r1", "user_id": "u1", "item_id": list("abcde"), "event_time": _time("05 09:59")}
    )
    items = pd.DataFrame({"item_id": list("abcde"), "title": "t", "category": None, "description": None,
                          "updated_at": _time("01 00:00")})  # fmt: skip
    for name, frame in (("impressions", shown), ("candidates", recalled), ("items", items)):
        frame.to_parquet(tmp_path / f"raw_{name}.parquet")
    log = movielens_log(tmp_path)
    assert log.pairs["is_exposed"].tolist() == [True, False, False, False, False]
    assert log.pairs["probability"].tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert log.events.to_dict("list") == {
        "user": [0, 0, 1], "item": [1, 2, 4], "dt": [date(2025, 10, 1), date(2025, 10, 9), date(2025, 10, 9)],
    }  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_clicks_follow_wishes_as_far_as_the_dial_says(monkeypatch, share: float) -> None:
    """Items on a circle; each user takes one item later. Nearness to it is what clicks should rise with."""
    rng = np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    monkeypatch.setattr(purchases, "_vectors", lambda: np.stack([np.cos(angle), np.sin(angle)], axis=1))
    monkeypatch.setattr(
        purchases, "_reviews", lambda: SimpleNamespace(items=[SimpleNamespace(item_id=n) for n in range(40)])
    )
    users, wish = np.repeat(np.arange(600), 20), np.repeat(rng.integers(40, size=600), 20)
    item = rng.integers(40, size=len(users))
    clicked = (rng.random(len(users)) < 0.1).astype(np.int32)
    memory = Memory()
    noon, later = pd.Timestamp("2026-01-01 12:00"), pd.Timestamp("2026-01-02")
    memory.write("raw_impressions", date(2026, 1, 1), pa.table({
        "user_id": users, "item_id": item, "event_time": pa.array([noon] * len(users)), "clicked": clicked,
    }))  # fmt: skip
    memory.write("raw_interactions", date(2026, 1, 2), pa.table({
        "user_id": np.arange(600), "item_id": wish[::20], "event_time": pa.array([later] * 600),
    }))  # fmt: skip
    purchases._follow_wishes(memory, share, np.random.default_rng(1))
    found = memory.frame("raw_impressions")["clicked"].to_numpy()
    assert found.mean() == pytest.approx(0.1, abs=0.01)
    nearness = np.corrcoef(found, np.cos(angle[item] - angle[wish]))[0, 1]
    assert nearness == pytest.approx(0.33 * share, abs=0.06)
    if share == 0.0:
        assert (found == clicked).all()
