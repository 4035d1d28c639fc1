"""The data dictionary of the tables, from their contracts."""

from __future__ import annotations

from gpl_core.contracts.contract import all_contracts


def data_dictionary() -> str:
    """The data dictionary as Markdown, one section per table."""
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
            bounds = "" if bounds == "… to …" else bounds
            parts.append(f"| {c.name} | {kind} | {'yes' if c.nullable else 'no'} | {c.comment} | {c.unit} | {bounds} |")
        parts.append("")
    return "\n".join(parts)
