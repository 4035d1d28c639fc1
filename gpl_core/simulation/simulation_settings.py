"""Settings of a simulated marketplace: sizes, dates and the honest defaults of its behavior."""

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import date
from math import inf

from gpl_core.errors import UsageError
from gpl_core.simulation.recall import CHANNELS

# Part of every fingerprint: raise it whenever the same settings give other rows.
GENERATOR_VERSION = 2


@dataclass(frozen=True)
class Behavior:
    """How the simulated world behaves. The defaults are honest: docs/decisions/008 lists what would rig a comparison.

    All strengths are in logits of the true click probability unless said otherwise.
    """

    taste_strength: float = 7.0  # weight of the user's affinity (0..1) in the true logit
    quality_strength: float = 0.7  # weight of the item's hidden quality (standard normal), invisible in its content
    user_bias: float = 0.3  # spread of how readily a user clicks at all
    random_pair_rate: float = 0.035  # true click probability averaged over uniformly random (user, item) pairs
    hidden_content: float = 0.5  # length of the part of true content that texts and pictures do not show
    position_decay: float = 0.15  # a result at position p (from 1) is looked at with probability p ** -position_decay
    popularity_exponent: float = 0.8  # Zipf exponent of the items' appeal
    quality_in_popularity: float = 0.4  # correlation of log appeal with hidden quality
    policy_popularity: float = 0.6  # the logging policy's weight of log popularity (standardized)
    policy_history: float = 1.0  # ... of observed similarity to the user's history (standardized)
    policy_noise: float = 0.8  # ... of the ranker's persistent error per (user, item)
    policy_insight: float = 0.0  # ... correlation of that error with the true click logit, which no feature shows
    drift_per_day: float = 0.015  # probability that one of a user's interests is replaced overnight
    drift_to_related: float = 0.6  # ... and that the new one is a topic related to the old
    interests: int = 3  # interests of a user at a time


WORLDS: dict[str, Behavior] = {
    "plain": Behavior(),
    "popularity_bias": Behavior(popularity_exponent=0.9, policy_popularity=1.2, policy_history=0.7),
    "fast_drift": Behavior(drift_per_day=0.08),
    "user_bias": Behavior(user_bias=1.2),
    "confounded": Behavior(policy_insight=0.6),
}

# Share of each recall channel in a request's candidates; in the worlds that are not named, the first.
_CHANNEL_SHARES = {"plain": (0.40, 0.25, 0.15, 0.20), "popularity_bias": (0.30, 0.20, 0.35, 0.15)}


@dataclass(frozen=True)
class SimulationSettings:
    """All that decides the bytes of a simulated marketplace."""

    users: int = 1500
    items: int = 1200  # released before `start_date`; `new_items_per_day` come on top
    days: int = 4  # request days from `start_date` on
    new_items_per_day: int = 10
    updated_items_per_day: int = 2
    candidates_per_request: int = 60
    exposed_per_request: int = 10
    requests_per_user_day: float = 1.0  # mean of a Poisson number
    random_share: float = 0.02  # of requests that show a uniform sample of their candidates in random order
    organic_per_user_day: float = 0.5
    warmup_days: int = 25  # of organic behavior before the request days
    seed: int = 7
    world: str = "plain"  # a key of WORLDS
    start_date: date = date(2026, 1, 1)
    pictures: bool = True
    picture_pixels: int = 32
    batch_users: int = 1024  # simulated at once; bounds memory, and is part of the seed's meaning

    def __post_init__(self) -> None:
        problems = []
        if self.world not in WORLDS:
            problems.append(f"world={self.world!r}: expected one of {', '.join(WORLDS)}")
        if self.candidates_per_request * 2 > self.items:
            problems.append(
                f"items={self.items}: expected at least twice candidates_per_request={self.candidates_per_request}, "
                "so that recall has a choice"
            )
        ranges = {
            **dict.fromkeys(("users", "items", "days", "candidates_per_request", "batch_users"), (1, inf)),
            **dict.fromkeys(("new_items_per_day", "updated_items_per_day", "warmup_days"), (0, inf)),
            "exposed_per_request": (1, self.candidates_per_request),
            "random_share": (0, 1),
        }
        for name, (low, high) in ranges.items():
            if not low <= (value := getattr(self, name)) <= high:
                expected = f"{low:g} to {high:g}" if high < inf else f"{low} or more"
                problems.append(f"{name}={value!r}: expected {expected}")
        if problems:
            raise UsageError("the simulation cannot run with these settings: " + "; ".join(problems))

    @property
    def rules(self) -> Behavior:
        """How this world behaves."""
        return WORLDS[self.world]

    @property
    def channel_shares(self) -> dict[str, float]:
        """Share of the candidates that each recall channel fills."""
        return dict(zip(CHANNELS, _CHANNEL_SHARES.get(self.world, _CHANNEL_SHARES["plain"])))

    def fingerprint(self) -> str:
        """Hash of everything that decides the bytes, generator version included."""
        # Spelled as in the first fingerprints, so that tables made then are still recognized.
        return fingerprint_of({**asdict(self), "behaviour": asdict(self.rules)})


def fingerprint_of(values: dict[str, object]) -> str:
    """A short stable hash of plain values (dates as ISO text) and of the generator's version."""
    text = json.dumps({"generator": GENERATOR_VERSION, **values}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
