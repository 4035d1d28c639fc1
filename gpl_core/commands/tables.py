"""`gpl tables`: the data dictionary, docs/tables.md."""

import argparse

from gpl_core.commands.command import Command
from gpl_core.contracts.contract import all_contracts
from gpl_core.lakehouse.views import all_views


def run(args: argparse.Namespace) -> int:
    print(dictionary())
    return 0


def dictionary() -> str:
    """The data dictionary as Markdown: tables, then views, one section each."""
    parts = [*_tables(), "# Views\n", "From `schemas/views/`: plain SQL for Spark and for `gpl sql`.\n"]
    for view in sorted(all_views().values(), key=lambda v: v.name):
        parts.append(f"## {view.name}\n\n{view.description}\n\nReads {', '.join(view.reads)}.\n")
        parts.append("| column | meaning |\n|---|---|")
        parts += [f"| {name} | {meaning} |" for name, meaning in view.columns]
        parts.append("")
    return "\n".join(parts)


def _tables() -> list[str]:
    parts = ["# Tables\n", "Generated from `schemas/` by `gpl tables`; do not edit.\n"]
    for contract in all_contracts().values():
        parts.append(f"## {contract.name}\n\n{contract.description}.\n")
        partition = f" · partitioned by {', '.join(contract.partition_by)}" if contract.partition_by else ""
        parts.append(
            f"Version {contract.version} · written by {contract.owner} · {contract.grain} "
            f"(key: {', '.join(contract.primary_key)}){partition} · read by {', '.join(contract.consumers)}\n"
        )
        parts.append("| column | type | null | meaning | unit | range |\n|---|---|---|---|---|---|")
        for c in contract.columns:
            kind = c.type.replace("|", "\\|") + (f" of {c.length}" if c.length else "")
            bounds = ", ".join(c.allowed) or " to ".join("…" if v is None else f"{v:g}" for v in (c.min, c.max))
            size = "bytes" if c.type == "binary" else "characters"
            longest = f"at most {c.max_length:,} {size}" if c.max_length is not None else ""
            bounds = longest if bounds == "… to …" else bounds
            parts.append(f"| {c.name} | {kind} | {'yes' if c.nullable else 'no'} | {c.comment} | {c.unit} | {bounds} |")
        parts.append("")
    return parts


COMMAND = Command(
    "tables", "print the data dictionary, views included, as Markdown", run, needs_config=False,
    examples=("> tables.md",),
)  # fmt: skip
