"""Delta features that delta-rs' SQL engine cannot read."""

from deltalake import DeltaTable, QueryBuilder

from gpl_core.errors import ContractError
from gpl_core.lakehouse.deletion_vectors import deletion_vectors

_UNKNOWN = {"typeWidening"}
_MOST_VECTORS = 500  # it never returns from more than 512, see `deletion_vectors`


class UnreadableError(ContractError):
    """A table that Spark can read but delta-rs cannot."""


def register(engine: QueryBuilder, name: str, uri: str, table: DeltaTable) -> None:
    """Make the opened `table` at `uri` known to `engine` as `name`; UnreadableError when the engine cannot read it."""
    features = {f.removesuffix("-preview") for f in table.protocol().reader_features or ()}
    if unknown := sorted(features & _UNKNOWN):
        raise UnreadableError(
            f"table {name} at {uri} uses {', '.join(unknown)}, which delta-rs does not read; ask Spark, or "
            f"ALTER TABLE delta.`{uri}` DROP FEATURE {unknown[0]}"
        )
    found = deletion_vectors(uri, table.version()) if "deletionVectors" in features else {}
    if len(found) > _MOST_VECTORS:
        raise UnreadableError(
            f"table {name} at {uri} has deletion vectors on {len(found):,} files, and delta-rs reads at most "
            f"{_MOST_VECTORS}; ask Spark, or REORG TABLE delta.`{uri}` APPLY (PURGE)"
        )
    engine.register(name, table)
