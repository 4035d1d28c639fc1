"""Which tables `gpl optimize` compacts, and with which engine."""

from gpl_core.contracts.contract import Contract, all_contracts
from gpl_core.graph.steps import engine_of
from gpl_core.lakehouse.lake import Lake

# Already written in files of equal size, its rows shuffled across them, which joining files would undo.
LEFT_ALONE = ("training_feed",)
# Table -> column and value of rows whose file a later commit replaces: it must still be there then.
IN_PROGRESS = {"job_runs": ("status", "running")}


def compactable(lake: Lake, engine: str) -> list[Contract]:
    """The contracts of the existing tables that `gpl optimize` compacts with `engine`."""
    return [
        c for n, c in all_contracts().items()
        if c.owner not in ("platform", "simulation") and n not in LEFT_ALONE and engine_of(n) == engine
        and lake.exists(n)
    ]  # fmt: skip
