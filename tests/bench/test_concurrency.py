"""The short form of `concurrency`: some of its pairs, on a lakehouse that only workers write.

`python -m tests.bench.concurrency` does this to every step and command, through the launchers too.
"""

from __future__ import annotations

from datetime import date

import pytest

from tests.bench.pairs import Pair, Pairs, is_clear, line
from tests.gpu_workers.test_sid_workers import DAY, House, clustered, item
from tests.support import put

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A tokenizer, the SIDs of sixty items, and a person with two rows."""
    house = House(tmp_path_factory.mktemp("house"))
    house.write_items([item(n, v) for n, v in enumerate(clustered(60))])
    put(house.lake, "user_stats", 3)
    made = Pairs(house.config_file(), house.folder / "lake", house.folder, date.fromisoformat(DAY))
    for step in ("encode_items", "train_tokenizer", "assign_sids"):
        end = made.start(step, made.lake, step).end(120)
        assert end.word == "done", (made.work / f"{step}.log").read_text()
    return made


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("step", ["encode_items", "train_tokenizer", "assign_sids"])
def test_a_step_twice_at_once(pairs, step, share):
    check(pairs.meet(Pair(step, step, step), share))


def test_commands_beside_steps_and_each_other(pairs):
    (version,) = (p.parent.name for p in pairs.lake.glob("artifacts/tokenizer/*/manifest.json"))
    rollback, promote = (f"{action} tokenizer {version}" for action in ("rollback", "promote"))
    for pair in (
        Pair("repair", "repair", "repair"), Pair("repair", "repair", "vacuum"),
        Pair("encode_items", "encode_items", "repair"), Pair("assign_sids", "assign_sids", "vacuum"),
        Pair("done", rollback, rollback), Pair("done", rollback, promote),
    ):  # fmt: skip
        check(pairs.meet(pair, 0.3))


def check(outcome) -> None:
    wrong = [outcome["twice"], outcome["unlike"], outcome["again"] not in ("done", "noop"), not is_clear(outcome)]
    assert not any(wrong), line({"number": 0, **outcome})
