"""`gpl capacity`: how many GPUs the anchors of a day take, extrapolated from the users per second of a benchmark.

The measurement is the result of `tests/bench/bench_search.py`: users per second of the beam search on one device, per
prompt length and number of beams. The extrapolation is linear, and ours.
"""

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from gpl_core.commands.command import Command
from gpl_core.errors import ContractError, MissingInputError, UsageError, counted

# Where a checkout keeps the results of its benchmarks; an installed wheel has no such folder.
RESULTS = Path(__file__).parents[2] / "tests" / "bench" / "results"
_RATE = re.compile(r"P (\d+), K (\d+): users per second")
_REMEDY = "run `python -m tests.bench.bench_search` on the device, or pass a result of it with --measurement FILE"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--users", type=float, required=True, help="users whose anchors are generated, e.g. 300e6")
    parser.add_argument("--hours", type=float, required=True, help="time available, in hours")
    parser.add_argument("--gpus", type=int, metavar="N", help="also print how long N devices take")
    parser.add_argument("--gpu-hour-cost", type=float, metavar="COST", help="cost of one device hour, in any currency")
    parser.add_argument("--prompt", type=int, metavar="TOKENS", help="a measured prompt length; default: the slowest")
    parser.add_argument("--beams", type=int, metavar="K", help="a measured number of anchors; default: the slowest")
    parser.add_argument(
        "--measurement",
        type=Path,
        metavar="FILE",
        help="result file of bench_search; default: the newest accelerator result in this checkout",
    )


def run(args: argparse.Namespace) -> int:
    """Say what the users take within the hours; warnings go to stderr."""
    for name in ("users", "hours", "gpus", "gpu_hour_cost"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: expected a number above 0")
    measured = read_measurement(args.measurement) if args.measurement else newest_measurement()
    prompt, beams = measured.point(args.prompt, args.beams)
    rate = measured.rates[prompt, beams]
    device_hours = args.users / rate / 3600
    needed = math.ceil(device_hours / args.hours)
    print(
        f"{args.users:,.0f} users in {args.hours:g} h: {counted(needed, 'device')} ({device_hours:,.1f} device hours)"
    )
    if args.gpus:
        takes = device_hours / args.gpus
        fits = "fits" if takes <= args.hours else "does not fit"
        print(f"with {args.gpus:,}: {takes:,.2f} h, which {fits} into {args.hours:g} h")
    if args.gpu_hour_cost:
        print(f"cost: {device_hours * args.gpu_hour_cost:,.2f} at {args.gpu_hour_cost:g} per device hour")
    print(
        f"measured: {rate:,.4g} users/s on one {measured.device}, prompt of {prompt} tokens, {beams} beams "
        f"({measured.about}; {measured.source.name}, commit {measured.commit}, {measured.when[:10]})\n"
        "this is an extrapolation from the search alone on one device; reading and writing tables, loading the model, "
        "a larger catalog than was measured, stragglers and failures are not included"
    )
    if measured.on_cpu:
        print(f"warning: measured on {measured.device}, not an accelerator: this says nothing about GPUs; {_REMEDY}",
              file=sys.stderr)  # fmt: skip
    if measured.quick:
        print("warning: this is a --quick measurement, made with a smaller model than the real one", file=sys.stderr)
    return 0


@dataclass(frozen=True)
class Measurement:
    """Users per second of one device, and the conditions of the measurement."""

    source: Path
    device: str  # `cpu-<cores>core`, or the accelerator's name
    about: str
    commit: str
    when: str
    quick: bool  # with `--quick`, so with a smaller model than the one to be run
    rates: dict[tuple[int, int], float]  # (prompt tokens P, beams K) -> users per second

    @property
    def on_cpu(self) -> bool:
        """Whether the device is not an accelerator."""
        return self.device.startswith("cpu-")

    def point(self, prompt: int | None, beams: int | None) -> tuple[int, int]:
        """The measured (P, K) that was asked for; if several match, the slowest. UsageError lists what was measured."""
        fitting = [(p, k) for p, k in self.rates if prompt in (None, p) and beams in (None, k)]
        if not fitting:
            known = ", ".join(f"P {p} K {k}" for p, k in sorted(self.rates))
            raise UsageError(f"--prompt {prompt} --beams {beams}: not measured in {self.source}; it has {known}")
        return min(fitting, key=lambda point: self.rates[point])


def read_measurement(path: Path) -> Measurement:
    """The result of a search benchmark; ContractError for a file that has no figure of users per second."""
    if not path.is_file():
        raise MissingInputError(f"measurement {path}: no such file; {_REMEDY}")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        found = ((_RATE.fullmatch(key), figure) for key, figure in body["figures"].items())
        rates = {(int(point[1]), int(point[2])): float(figure["value"]) for point, figure in found if point}
        if not rates or not all(0 < rate < math.inf for rate in rates.values()):
            raise ValueError("no figure 'P …, K …: users per second' above 0")
        return Measurement(
            path, body["device"], body.get("about", ""), body["commit"], body["when"], "--quick" in body["command"],
            rates,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ContractError(f"measurement {path}: not the result of a benchmark ({error!r}); {_REMEDY}") from None


def newest_measurement() -> Measurement:
    """The newest search result of an accelerator in RESULTS; `--quick` is of another model, a CPU says nothing."""
    found = [read_measurement(path) for path in sorted(RESULTS.glob("search.*.json"))]
    usable = [m for m in found if not m.quick and not m.on_cpu]
    if not usable:
        raise MissingInputError(f"no measurement of the search on an accelerator in {RESULTS}; {_REMEDY}")
    return max(usable, key=lambda m: m.when)


COMMAND = Command(
    "capacity", "estimate GPUs and cost of generating a day's anchors, from a measured search", run, add_arguments,
    needs_config=False,
    examples=("--users 300e6 --hours 6 --gpus 64",),
)  # fmt: skip
