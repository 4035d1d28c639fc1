"""The mark that a commit of ours carries: which step wrote which slices, from inputs with which fingerprint.

It is JSON in the commit's `userMetadata`. The planner reads from it what is done or stale.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

WHOLE = "*"  # slice name of tables without a dt partition


@dataclass(frozen=True)
class SliceMark:
    """What a commit says about itself: `slices` maps a slice (an ISO date, or `*`) to the fingerprint of its inputs."""

    step: str
    slices: Mapping[str, str]
    run_id: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text for `userMetadata`."""
        body = {"step": self.step, "slices": dict(self.slices), "run_id": self.run_id, "details": dict(self.details)}
        return json.dumps({"gpl": body}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | None) -> Self | None:
        """Parse `userMetadata`; None when the commit is not one of ours."""
        try:
            body = json.loads(text or "")["gpl"]
            return cls(body["step"], body["slices"], body["run_id"], body.get("details", {}))
        except (ValueError, KeyError, TypeError):
            return None
