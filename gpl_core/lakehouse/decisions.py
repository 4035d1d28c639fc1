"""What operators decided about artifacts: rows of the table `artifact_decisions`, made by `gpl promote|rollback`."""

import getpass
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Literal

from gpl_core.contracts.contract import load_contract
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark

Action = Literal["promote", "rollback"]
_TABLE = "artifact_decisions"


@dataclass(frozen=True)
class Decision:
    """The latest decision about one version: out of force (from a run date on, or for all), or in force again."""

    action: Action
    from_date: date | None
    decided_at: datetime

    def allows(self, run_date: date) -> bool:
        """Whether `run_date` may use the version."""
        return self.action == "promote" or (self.from_date is not None and run_date < self.from_date)


def latest_decisions(lake: Lake) -> dict[tuple[str, str], Decision]:
    """(kind, version) -> the latest decision about it."""
    table = lake.find(_TABLE)
    rows = sorted(table.read().to_pylist(), key=lambda r: r["number"]) if table else []
    return {(r["artifact"], r["version"]): Decision(r["action"], r["from_date"], r["decided_at"]) for r in rows}


def decision_count(lake: Lake, kind: str) -> int:
    """How many decisions about `kind` there are: `add_decision` refuses to be the next one of another number."""
    table = lake.find(_TABLE)
    return table.transaction_version(f"{_TABLE}:{kind}") + 1 if table else 0


def add_decision(
    lake: Lake, kind: str, version: str, action: Action, *, from_date: date | None, reason: str, count: int
) -> None:
    """Append a decision, which follows `count` earlier ones; ConflictError when another one was made meanwhile."""
    contract = load_contract(_TABLE)
    row = {
        "artifact": kind, "number": count + 1, "version": version, "action": action, "from_date": from_date,
        "reason": reason, "decided_by": account(), "decided_at": datetime.now(UTC),
    }  # fmt: skip
    with lake.writer(contract, {}, dims={}) as writer:
        writer.write_rows([row])
    app_id = f"{_TABLE}:{kind}"
    lake.commit(contract, writer.parts, mark=SliceMark(action, {}, ""), mode="append", app_id=app_id, last=count - 1)


def account() -> str:
    """The user's name; empty for one without a name, as in a container."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""
