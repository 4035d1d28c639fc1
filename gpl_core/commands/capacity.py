"""`gpl capacity`: how many GPUs a day's anchors take, extrapolated from a benchmark's measured users per second.

The measurement is the result of `tests/bench/bench_search.py`: users per second of the beam search on one device, per
prompt length and number of beams. Everything here is ours, and a rule of three.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpl_core.errors import ContractError, MissingInputError, UsageError

RESULTS = Path(__file__).parents[1] / "tests" / "bench" / "results"
"""Where a checkout keeps what its benchmarks measured; an installed wheel has no such folder."""

_RATE = re.compile(r"P (\d+), K (\d+): users per second")
_REMEDY = "run `python -m tests.bench.bench_search` on the device in question, or give its result as --measurement FILE"


@dataclass(frozen=True)
class Measurement:
    """Users per second of one device, and what they were measured under."""

    source: Path
    device: str
    """`cpu-<cores>core`, or the accelerator's name."""
    about: str
    commit: str
    when: str
    quick: bool
    """Measured with `--quick`: a smaller model than the one planned for."""
    rates: dict[tuple[int, int], float]
    """(prompt tokens P, beams K) -> users per second."""

    @property
    def on_cpu(self) -> bool:
        """Whether the device is no accelerator."""
        return self.device.startswith("cpu-")

    def point(self, prompt: int | None, beams: int | None) -> tuple[int, int]:
        """The measured (P, K) that was asked for; the most expensive one among those that fit.

        Raises:
            UsageError: no such point was measured; names those that were.
        """
        fitting = [(p, k) for p, k in self.rates if prompt in (None, p) and beams in (None, k)]
        if not fitting:
            known = ", ".join(f"P {p} K {k}" for p, k in sorted(self.rates))
            raise UsageError(f"--prompt {prompt} --beams {beams}: not measured in {self.source}; it has {known}")
        return min(fitting, key=lambda point: self.rates[point])


def read_measurement(path: Path) -> Measurement:
    """The result of a search benchmark.

    Raises:
        MissingInputError: there is no such file.
        ContractError: it is no JSON, or holds no figure of users per second.
    """
    if not path.is_file():
        raise MissingInputError(f"measurement {path}: no such file; {_REMEDY}")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        rates = {
            (int(found[1]), int(found[2])): float(figure["value"])
            for key, figure in body["figures"].items()
            if (found := _RATE.fullmatch(key))
        }
        measurement = Measurement(
            path,
            body["device"],
            body.get("about", ""),
            body["commit"],
            body["when"],
            "--quick" in body["command"],
            rates,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ContractError(f"measurement {path}: not a benchmark's result ({error!r}); {_REMEDY}") from None
    if not rates or not all(math.isfinite(r) and r > 0 for r in rates.values()):
        raise ContractError(f"measurement {path}: no figure 'P …, K …: users per second' above 0; {_REMEDY}")
    return measurement


def newest_measurement() -> Measurement:
    """The newest full search result in RESULTS, one of an accelerator before any of a CPU.

    Raises:
        MissingInputError: there is none; a `--quick` result is of another model and does not count.
    """
    found = [m for p in sorted(RESULTS.glob("search.*.json")) if not (m := read_measurement(p)).quick]
    if not found:
        raise MissingInputError(f"no measurement of the search in {RESULTS}; {_REMEDY}")
    return max(found, key=lambda m: (not m.on_cpu, m.when))


def capacity(
    measurement: Measurement,
    users: float,
    hours: float,
    *,
    gpus: int | None = None,
    prompt: int | None = None,
    beams: int | None = None,
    gpu_hour_cost: float | None = None,
) -> Iterator[str]:
    """Lines that say what `users` within `hours` take: devices, or with `gpus` hours; cost; measurement; caveats.

    Raises:
        UsageError: a number that is none above 0, or a point that was not measured.
    """
    for name, value in (("users", users), ("hours", hours), ("gpus", gpus), ("gpu-hour-cost", gpu_hour_cost)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(f"--{name} {value}: expected a number above 0")
    point = measurement.point(prompt, beams)
    rate = measurement.rates[point]
    device_hours = users / rate / 3600
    needed = math.ceil(device_hours / hours)
    yield f"{users:,.0f} users in {hours:g} h: {needed:,} devices ({device_hours:,.1f} device hours)"
    if gpus is not None:
        takes = device_hours / gpus
        yield f"with {gpus:,}: {takes:,.2f} h, which {'fits' if takes <= hours else 'does not fit'} into {hours:g} h"
    if gpu_hour_cost is not None:
        yield f"cost: {device_hours * gpu_hour_cost:,.2f} at {gpu_hour_cost:g} per device hour"
    yield (
        f"measured: {rate:,.4g} users/s on one {measurement.device}, prompt of {point[0]} tokens, {point[1]} beams "
        f"({measurement.about}; {measurement.source.name}, commit {measurement.commit}, {measurement.when[:10]})"
    )
    yield (
        "this is an extrapolation: the search alone on one device, times users and devices; reading and writing "
        "tables, loading the model, stragglers and failures come on top"
    )
    if measurement.on_cpu:
        yield f"warning: measured on {measurement.device}, no accelerator: it says nothing about GPUs; {_REMEDY}"
    if measurement.quick:
        yield "warning: a --quick measurement, of a smaller model than the one to be run"
