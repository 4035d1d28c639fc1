"""The raw tables of docs/own-tables.md: their DDL and configuration, as the page shows them, filled from other rows."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

_PAGE = Path(__file__).parents[1] / "docs" / "own-tables.md"
_PLACE = "/data/shop"


@dataclass(frozen=True)
class Layout:
    """One of the page's layouts."""

    title: str
    ddl: str
    settings: dict[str, Any]

    def placed(self, root: Path) -> dict[str, Any]:
        """The section `lakehouse` of the page, the raw tables under `root`."""
        settings: dict[str, Any] = yaml.safe_load(self._placed(yaml.safe_dump(self.settings["lakehouse"]), root))
        return settings

    def overrides(self, root: Path) -> list[str]:
        """The same as values of `--set`."""
        return [f"lakehouse.{key}={json.dumps(value)}" for key, value in self.placed(root).items()]

    def location(self, root: Path, table: str) -> str:
        """Where a raw table lies under `root`."""
        return str(self.placed(root)["tables"][table])

    def create(self, spark: SparkSession, root: Path) -> None:
        """Create the tables under `root`."""
        for statement in filter(str.strip, self.ddl.split(";")):
            spark.sql(self._placed(statement, root))

    def append(self, root: Path, table: str, rows: DataFrame) -> None:
        """Append `rows`, whose columns have our names, in the layout's names and types."""
        target = rows.sparkSession.read.format("delta").load(self.location(root, table))
        values = []
        for field in target.schema:
            our = next((o for o in _ours(self.settings, table, field.name) if o in rows.columns), None)
            value = F.lit(None) if our is None else F.col(our)
            value = F.date_format(value, "yyyyMMdd") if field.name == "ds" else value
            values.append(value.cast(field.dataType).alias(field.name))
        rows.select(*values).write.format("delta").mode("append").save(self.location(root, table))

    def _placed(self, text: str, root: Path) -> str:
        return text.replace(_PLACE, str(root))


def _ours(settings: dict[str, Any], table: str, theirs: str) -> list[str]:
    """Our names of the platform's column; that of its day comes last."""
    mapped = [our for our, name in settings["lakehouse"]["columns"].get(table, {}).items() if name == theirs]
    return sorted([*mapped, theirs], key=lambda our: our == "dt")


def _layouts() -> dict[str, Layout]:
    section = _PAGE.read_text(encoding="utf-8").split("## Three layouts")[1].split("\n## ")[0]
    found = {}
    for part in section.split("\n### ")[1:]:
        ddl, settings = (re.findall(rf"```{kind}\n(.*?)```", part, re.S)[0] for kind in ("sql", "yaml"))
        title = part.splitlines()[0]
        found[title] = Layout(title, ddl, yaml.safe_load(settings))
    return found


LAYOUTS = _layouts()
