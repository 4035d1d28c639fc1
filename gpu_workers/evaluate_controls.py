"""Train the pre-ranker on control labels beside ours and compare: training_feed -> control_evaluations.

deepspeed --num_accelerators 1 gpu_workers/evaluate_controls.py --config quickstart --run-date 2026-01-03

Not a step of the graph (`gpl evaluate --controls`), and it publishes no model. `exposed_only`, `gpl` and one variant
per control of `gpl_core.labels.controls` train on the same rows, with the same lambda, from the same weights.
"""

from typing import Any

from gpl_core.errors import MissingInputError, counted
from gpl_core.graph.step_run import StepContext
from gpl_core.labels.controls import CONTROLS
from gpl_core.lakehouse.scratch import scratch_folder
from gpl_core.prerank.comparison import BASELINE, OURS
from gpu_workers.inputs.control_rows import EVEN, with_controls
from gpu_workers.inputs.prerank import FeedRows, tower_inputs
from gpu_workers.outputs import commit_rows
from gpu_workers.prerank_evaluation import evaluation_rows, impressions_after
from gpu_workers.prerank_training import Variant, train_seeds
from gpu_workers.ranks import Ranks
from gpu_workers.worker import worker_main


def run(context: StepContext, ranks: Ranks) -> None:
    """Train and judge all variants; nothing while there is no day after to judge on."""
    rows: list[dict[str, Any]] = []
    if impressions_after(context):
        with tower_inputs(context, ranks) as inputs, scratch_folder() as folder:
            with ranks.together():
                feed = FeedRows(context, inputs, context.artifact("tokenizer").version, folder)
                if not feed.unexposed.rows:
                    raise MissingInputError(
                        f"table training_feed: no unexposed rows in {counted(inputs.settings.train_days, 'day')} "
                        f"(prerank.train_days) up to {context.run_date}, so there are no labels to compare; run "
                        "pseudo_labels and training_feed for these dates"
                    )
                feed.unexposed = with_controls(context, feed.unexposed, folder / "controls")
            lambda_ = inputs.settings.lambda_
            variants = [
                Variant(BASELINE, 0.0),
                Variant(OURS, lambda_),
                *(Variant(name, lambda_, labels=name, weights=EVEN) for name in CONTROLS),
            ]
            models = {key: one.model for key, one in train_seeds(context, variants, feed, inputs, ranks).items()}
            pairs = [(v.name, BASELINE) for v in variants[1:]] + [(OURS, name) for name in CONTROLS]
            with ranks.together():
                if ranks.is_main:
                    rows = evaluation_rows(context, inputs, models, feed.counts.exposures, pairs)
    commit_rows(context, ranks, "control_evaluations", rows)


if __name__ == "__main__":
    worker_main("evaluate_controls", run)
