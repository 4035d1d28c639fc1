"""`gpl tables`: the data dictionary, docs/tables.md."""

from __future__ import annotations

import argparse

from gpl_core.commands.command import Command
from gpl_core.contracts.contract import data_dictionary
from gpl_core.lakehouse.views import all_views


def run(args: argparse.Namespace) -> int:
    print(dictionary())
    return 0


def dictionary() -> str:
    """The data dictionary as Markdown: tables, then views."""
    parts = [data_dictionary(), "# Views\n", "From `schemas/views/`: plain SQL for Spark and for `gpl sql`.\n"]
    for view in sorted(all_views().values(), key=lambda v: v.name):
        parts.append(f"## {view.name}\n\n{view.description}\n\nReads {', '.join(view.reads)}.\n")
        parts.append("| column | meaning |\n|---|---|")
        parts += [f"| {name} | {meaning} |" for name, meaning in view.columns]
        parts.append("")
    return "\n".join(parts)


COMMAND = Command("tables", "print the data dictionary, views included, as Markdown", run, needs_config=False)
