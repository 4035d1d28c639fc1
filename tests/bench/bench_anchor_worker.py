"""generate_anchors on real Delta tables: work grows with the *changed* users, and linearly with their number.

Ours at 1x, 4x and 16x users (growth of time, peak memory of the process); then the same users again with nothing
changed, where the worker's own look at the cache has to find them, and with 1 % changed, as anchor_requests leaves it.
About 3 minutes of one core's time, `--quick` half a minute.
Yardstick: the search alone (no tables), with the same settings, on the same users, in turn with the worker, as a core's
speed changes by the minute. A tiny model, so that the worker's own cost shows.

    python -m tests.bench.bench_anchor_worker [--quick]
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np

from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import StepContext
from gpl_core.graph.steps import find_step
from gpl_core.interest.content import leaf_content
from gpl_core.interest.model_files import load_bundle
from gpl_core.interest.search import BeamSearch, SearchSettings
from gpl_core.interest.trie_scoring import DeviceTrie
from gpl_core.lakehouse.artifacts import ArtifactStore
from gpl_core.sids.content_table import ContentTable
from gpl_core.sids.item_catalog import ItemCatalog
from gpu_workers import generate_anchors, train_interest_model
from gpu_workers.inputs.interest import base_checkpoint
from gpu_workers.ranks import Ranks, start_ranks
from tests.bench.harness import Figure, at_least, at_most, growth_exponent, is_quick, report
from tests.gpu_workers.interest_lake import CODES, DAY, LENGTH, InterestLake, User

REPEATS = 5  # of the largest size


def call(lake: InterestLake, worker, ranks: Ranks, day=DAY) -> float:
    """Seconds of CPU time of a worker's body."""
    planner = Planner(lake.config("interest.epochs=1"))
    state = planner.state(find_step(worker.STEP), day)
    start = time.process_time()
    worker.run(StepContext(planner, worker.STEP, day, state, "bench"), ranks)
    return time.process_time() - start


def search_alone(lake: InterestLake, users: Sequence[User]) -> float:
    """Seconds of the search, model loaded, without any table."""
    store = ArtifactStore(str(lake.root))
    folder = store.fetch(store.manifests("interest_model")[-1])
    model = load_bundle(folder, base_checkpoint(lake.config()), sid_version=lake.version)
    model.merge()
    content = ContentTable(lake.vectors, np.arange(len(lake.vectors)))
    catalog = ItemCatalog(np.arange(len(lake.sids)), lake.sids, CODES)
    trie = DeviceTrie(catalog.trie, content=leaf_content(catalog, content))
    settings = lake.config().anchors
    limits = SearchSettings(settings.count, LENGTH, settings.tokens_per_batch, settings.prefixes)
    search = BeamSearch(model, trie, limits, content)
    histories, items = [lake.sids[list(u.items)] for u in users], [np.array(u.items) for u in users]
    start = time.process_time()
    for first in range(0, len(users), 4096):
        search.search(histories[first : first + 4096], items[first : first + 4096])
    return time.process_time() - start


def main() -> None:
    """Measure, print, write."""
    quick = is_quick()
    base = 500 if quick else 4_000
    ranks = start_ranks()
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as folder:
        lake = InterestLake(Path(folder))
        few = lake.users(200)
        lake.write_users(few)
        call(lake, train_interest_model, ranks)
        version = ArtifactStore(folder).manifests("interest_model")[-1].version
        lake.write_requests(few[:10], version, DAY)
        fixed = call(lake, generate_anchors, ranks)  # loading, warm-up
        sizes, seconds, peaks, shares = [1, 4, 16], [], [], []
        for turn, size in enumerate([*sizes, *sizes[-1:] * (REPEATS - 1)]):
            users = [User(f"{turn}-{u.user_id}", u.items) for u in lake.users(base * size, seed=turn)]
            day = DAY + timedelta(days=1 + turn)
            lake.write_requests(users, version, day)
            seconds.append(call(lake, generate_anchors, ranks, day))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
            if size == sizes[-1]:
                shares.append(search_alone(lake, users) / (seconds[-1] - fixed))
        same, changed = day + timedelta(days=1), day + timedelta(days=2)
        lake.write_requests(users, version, same)
        unchanged = call(lake, generate_anchors, ranks, same)
        one_percent = [User(u.user_id, [*u.items[:-1], 95 - u.items[-1]]) for u in users[::100]]
        known = lake.lake.open("interest_anchors").version
        lake.write_requests(one_percent, version, changed, cache_version=known)
        few_changed = call(lake, generate_anchors, ranks, changed)
    count = base * sizes[-1]
    work = seconds[-1] - fixed
    figures["users per second, with tables"] = Figure(count / seconds[-1], "users/s")
    figures["share of the search's speed, median"] = at_least(float(np.median(shares)), 0.8, "ratio")
    figures["share of the search's speed, least"] = Figure(min(shares), "ratio")
    figures["share of the search's speed, most"] = Figure(max(shares), "ratio")
    figures["growth exponent, 1x 4x 16x"] = at_most(growth_exponent(sizes, seconds[: len(sizes)]), 1.1, "")
    figures["peak memory, 16x over 1x"] = at_most(peaks[len(sizes) - 1] / peaks[0], 1.25, "ratio")
    figures["fixed cost (load, commit)"] = Figure(fixed, "s")
    figures["nothing changed, worker's own check, share of the work"] = at_most(unchanged / seconds[-1], 0.2, "ratio")
    figures["1 % changed, share of the work beyond the fixed cost"] = at_most(
        max(0.0, few_changed - fixed) / work, 0.05, "ratio"
    )
    report("anchor_worker", figures, quick, f"generate_anchors, tiny model, K 5, up to {count} users, one rank")


if __name__ == "__main__":
    main()
