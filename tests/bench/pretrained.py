"""A pre-trained body, the same shape from random weights and the small body, on the real purchases.

The real pipeline trains them: `gpl run --only train_interest_model` with the configuration `amazon-smollm2`, one seed,
each in a copy of one lakehouse under `--work`. Judged: the test events with a history (`--events`: a random sample of
them), all 3,686 items as candidates. The two large ones take an hour each on two cores: a killed run goes on from the
last checkpoint of the model it was at. With `--only` or `--set` the figures are printed, and no result is written.

First the lakehouse and the checkpoint (docs/getting-started.md), as far as `sequences`:

    gpl import-reviews --config amazon-smollm2 --items ITEMS --sequences SEQUENCES
    gpl run --config amazon-smollm2 --run-date 2026-01-03 --only ingest --only encode_items --only train_tokenizer \
        --only assign_sids --only sequences
    python -m tests.bench.pretrained --work FOLDER [--events N] [--only MODEL ...] [--set SECTION.KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from gpl_core.cli import main as gpl
from gpl_core.config import Config, load_config
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import StepContext
from gpl_core.graph.steps import find_step
from gpl_core.interest.content import leaf_content
from gpl_core.interest.model_files import load_bundle
from gpl_core.interest.search import BeamSearch, SearchSettings
from gpl_core.interest.trie_scoring import DeviceTrie
from gpu_workers.inputs.feed import read_batches
from gpu_workers.inputs.interest import base_checkpoint, read_catalog
from gpu_workers.inputs.item_tables import content_table
from gpu_workers.ranks import Ranks, start_ranks
from tests.bench.harness import Figure, device_name, report
from tests.bench.quality.data import MOST_EVENTS, Task, item_ids, judge, load_task, ranked

LLM, SMALL, STEP, BEAMS = "amazon-smollm2", "amazon", "train_interest_model", 20
MODELS = {
    "pre-trained": (LLM, "itself"),
    "its shape from random weights": (LLM, "random"),
    "small body": (SMALL, ""),
}
"""Name -> configuration and body."""


def random_twin(base: Path, folder: Path) -> Path:
    """A checkpoint of ``base``'s shape and tokenizer with random weights."""
    if not folder.is_dir():
        aside = folder.with_suffix(".aside")
        shutil.copytree(base, aside, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        torch.manual_seed(0)
        weights = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).state_dict()
        if AutoConfig.from_pretrained(base).tie_word_embeddings:
            del weights["lm_head.weight"]
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        aside.rename(folder)
    return folder


def trained(name: str, configuration: str, work: Path, settings: tuple[str, ...]) -> Config:
    """The configuration of a lakehouse in which ``name`` has been trained."""
    root = work / re.sub("[^a-z]+", "-", name)
    if not root.is_dir():
        source = Path(load_config(LLM).lakehouse.root)
        shutil.copytree(source, root.with_suffix(".aside"), ignore=shutil.ignore_patterns("work", "interest_model"))
        root.with_suffix(".aside").rename(root)
    given = [f"lakehouse.root={root}", *settings]
    config = load_config(configuration, given)
    options = [word for setting in given for word in ("--set", setting)]
    if gpl(["run", "--config", configuration, *options, "--run-date", str(config.run.start_date), "--only", STEP]):
        raise SystemExit(f"{name}: training failed; start this benchmark again to go on")
    return config


def rankings(config: Config, task: Task, ranks: Ranks) -> np.ndarray:
    """int64 [T x RANKED] by the published model; items that share a SID follow each other by training frequency."""
    planner, day = Planner(config), config.run.start_date
    context = StepContext(planner, STEP, day, planner.state(find_step(STEP), day), "bench")
    store = context.artifacts
    manifest = store.find("interest_model", context.artifact_version)  # of these settings, not the last one made
    sid_version = manifest.lineage["sid_version"]
    model = load_bundle(store.fetch(manifest), base_checkpoint(config), sid_version=sid_version)
    model.merge()
    catalog = read_catalog(context, sid_version, model.settings.codes)
    numbers = numbers_of(context)
    with content_table(context, ranks) if model.settings.content_width else nullcontext() as content:
        trie = DeviceTrie(catalog.trie, content=leaf_content(catalog, content))
        search = BeamSearch(model, trie, SearchSettings(BEAMS, MOST_EVENTS), content)
        histories = [numbers[history] for history in task.histories]
        anchors = search.search([catalog.sids_of(history) for history in histories], histories)
    leaves = catalog.trie.leaf_of(anchors.sids.reshape(-1, anchors.sids.shape[2])).reshape(anchors.sids.shape[:2])
    items = np.argsort(numbers)[np.searchsorted(np.sort(numbers), catalog.leaf_items)]
    items_of = np.split(items, catalog.leaf_offsets[1:-1])
    return ranked(leaves, items_of, task)


def numbers_of(context: StepContext) -> np.ndarray:
    """The lakehouse's item_index of the task's items, in their order."""
    snapshot = context.lake.open("items")
    index: dict[str, int] = {}
    for batch in read_batches(snapshot, snapshot.files, ["item_index", "item_id"]):
        index.update(zip(batch["item_id"], batch["item_index"].tolist(), strict=True))
    return np.array([index[item] for item in item_ids()])


def main() -> None:
    """Train what is missing, judge, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True, help="a folder for the lakehouses; of one commit")
    parser.add_argument("--only", action="append", choices=MODELS, help="one model; repeatable")
    parser.add_argument("--set", action="append", default=[], help="a setting for all models; repeatable")
    parser.add_argument("--events", type=int, help="judge a random sample of that many test events")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    base = Path(load_config(LLM).interest.base_model).absolute()
    folders = {"itself": str(base)}
    task, ranks = load_task("test", arguments.events), start_ranks()
    figures: dict[str, Figure] = {}
    for name in arguments.only or MODELS:
        configuration, body = MODELS[name]
        if body == "random":
            folders[body] = str(random_twin(base, arguments.work / "random"))
        base_model = (f"interest.base_model={folders[body]}",) if body else ()
        given = (*base_model, *arguments.set)
        found = judge(rankings(trained(name, configuration, arguments.work, given), task, ranks), task)
        figures |= {f"{name}: {metric}": Figure(value, "share") for metric, value in found.items()}
        print(name, {metric: round(value, 4) for metric, value in found.items()}, flush=True)
    if not (arguments.only or arguments.set):
        title = f"next item, {len(task.targets)} test events, one seed, {device_name()}"
        option = "--work FOLDER" + f" --events {arguments.events}" * bool(arguments.events)
        report("pretrained", figures, False, title, module=f"pretrained {option}")


if __name__ == "__main__":
    main()
