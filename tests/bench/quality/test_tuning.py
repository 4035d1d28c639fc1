"""The climb finds a peak, spends no more than it may, and says where it has not looked."""

from __future__ import annotations

from tests.bench.quality.tuning import climb

AXES = {"a": (0, 1, 2, 3, 4), "b": (10, 20, 30)}


def test_a_peak_inside_the_grid_is_found_and_known_to_be_one() -> None:
    asked = []

    def score(setting: dict) -> float:
        asked.append((setting["a"], setting["b"]))
        return -((setting["a"] - 3) ** 2) - abs(setting["b"] - 20)

    tuned = climb({"a": 1, "b": 20, "other": "kept"}, AXES, score, most=20)
    assert tuned.chosen == {"a": 3, "b": 20, "other": "kept"}
    assert tuned.open_axes == []
    assert len(asked) == len(set(asked)) == tuned.tries


def test_an_edge_or_an_untried_neighbor_leaves_its_axis_open() -> None:
    at_the_edge = climb({"a": 3, "b": 20}, AXES, lambda s: s["a"] - abs(s["b"] - 20), most=20)
    assert (at_the_edge.chosen["a"], at_the_edge.open_axes) == (4, ["a"])
    poor = climb({"a": 2, "b": 20}, AXES, lambda s: -abs(s["a"] - 2), most=3)
    assert (poor.chosen, poor.tries, poor.open_axes) == ({"a": 2, "b": 20}, 3, ["b"])
