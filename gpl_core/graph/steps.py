"""The graph as data: every step with what it reads, in which scope, what it writes, and which settings shape it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from operator import attrgetter
from typing import Literal

from gpl_core.config import Config, hash_of
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import UsageError, did_you_mean

Scope = Literal["slice", "next", "before", "through", "window", "as_of", "whole", "lookup"]
ONE_DAY = timedelta(days=1)

# References into the configuration are functions of it, for which mypy finds a key that was renamed, or names, which
# every evaluation of a step looks up.
Days = Callable[[Config], int]
Condition = Callable[[Config], bool]


@dataclass(frozen=True)
class Read:
    """One input of a step. A table may be read in two scopes: a change in either makes the step stale.

    Scopes, for run date D: `slice` dt = D · `next` dt = D + 1 · `before` the `days` dates before D · `through` every
    slice up to D · `window` the `days` dates up to D · `as_of` files with something before D + 1 by `column` ·
    `whole` all of it · `lookup` read by key, never a reason to run again.
    """

    table: str
    scope: Scope
    days: Days | None = None
    column: str = ""
    optional: bool = False  # the table need not exist
    when: Condition = lambda config: True  # whether it is read at all
    may_lack: Condition = lambda config: False  # whether the step runs without the slice of D when it is missing

    def span(self, config: Config, run_date: date) -> tuple[date | None, date | None]:
        """First and last date of the scope, both included; None: no limit."""
        days = timedelta(days=self.days(config)) if self.days else ONE_DAY
        spans: dict[Scope, tuple[date | None, date | None]] = {
            "slice": (run_date, run_date),
            "next": (run_date + ONE_DAY, run_date + ONE_DAY),
            "before": (run_date - days, run_date - ONE_DAY),
            "through": (None, run_date),
            "window": (run_date - days + ONE_DAY, run_date),
        }
        return spans.get(self.scope, (None, None))


@dataclass(frozen=True)
class Step:
    """One step of the graph."""

    name: str
    launcher: Literal["spark", "deepspeed"]  # what starts it
    reads: tuple[Read, ...]
    writes: tuple[str, ...] = ()  # tables whose slice it replaces or appends to: done when each was, from its inputs
    also_writes: tuple[str, ...] = ()  # tables merged or appended to as well, committed first
    writes_page: bool = False  # it leaves an HTML page that carries its fingerprint
    uses: tuple[str, ...] = ()  # artifacts in force for the run date that it needs
    publishes: str = ""  # artifact that it trains
    settings: tuple[str, ...] = ()  # names of the settings and sections that shape its result
    method: int = 1  # one more when a release makes another result of the same inputs and settings
    follows: Mapping[str, str] = field(default_factory=dict)  # artifact -> lineage key that must match to stay in force
    refresh: Days = lambda config: 1  # after how many days the artifact is trained again
    # Tables that training sees whole, and a dated one whose commits say what their slice was made of. An artifact that
    # is due by its age is kept while all are as they were; none: it is never kept.
    sees: tuple[str, ...] = ()
    sees_made_from: str = ""
    retrains_on_new_data: bool = True  # whether changed inputs make an artifact stale that was trained for this date
    trains_on_run_date: bool = False  # the artifact has seen the run date's own events, not only those before it
    idle_without: str = ""  # an input slice; when it is empty there is nothing to do and nothing to commit
    # Output -> the inputs that shape it, where that is not all of them: a run leaves an output alone whose own inputs
    # are the same, so that what is built on it does not turn stale.
    shaped_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    takes_history: bool = False  # the dates before the first run date go through it too, in one commit per table
    takes_day_after: bool = False  # so does the day after the last one, once its raw slice exists: evaluation needs it
    compacts: bool = False  # it regroups the rows of what Spark steps write
    stamp: str = ""  # a version, other than a table's or an artifact's, that its rows carry
    command: str = ""  # the command of `gpl` that runs it, for a step outside the graph

    @property
    def script(self) -> str:
        """Its entry point, relative to the project root."""
        return f"{'spark_jobs' if self.launcher == 'spark' else 'gpu_workers'}/{self.name}.py"

    def config_hash(self, config: Config) -> str:
        """Hash of the settings that shape its result, and of its method."""
        return hash_of([attrgetter(name)(config) for name in self.settings] + [self.method] * (self.method > 1))

    def trained_through(self, run_date: date) -> date:
        """Last date whose events the artifact that it trains for `run_date` has seen."""
        return run_date if self.trains_on_run_date else run_date - ONE_DAY


def _is_fitted(config: Config) -> bool:
    # A `quantile` calibrator takes the order from earlier dates' pairs as well, but no more than that: late candidates
    # of one date are no reason to label the next two weeks again. `gpl run --force` does.
    return config.labels.calibrator.kind != "quantile"


def _uses_all_features(config: Config) -> bool:
    return config.labels.calibrator.uses_all_features


# Why an unexposed pair has no label: looked up, never a reason to build the feed again.
FOR_REASONS = ("user_sequences", "score_requests", "worker_rejects")
# Thresholds are judged when the feed is built; what they look at is no reason to build it again.
FOR_MONITORS = ("quarantine", "impressions", "candidates", "interactions")
FOR_REPORT = (
    "monitors", "impressions", "candidates", "interactions", "exposed_samples", "unexposed_samples", "user_sequences",
    "anchor_requests", "interest_anchors", "score_requests", "pair_scores", "item_stats", "user_stats",
    "item_sids", "items", "job_runs",
)  # fmt: skip

# Whose pairs are not labeled, and which items are no longer candidates: see spark_jobs/common/exclusions.py.
# A withdrawal reaches a date through its candidates, which `ingest` writes again.
EXCLUDED = (Read("raw_opt_outs", "as_of", column="opted_out_at", optional=True), Read("items", "lookup", optional=True))

# What the pre-ranker learns from, and is judged on.
FOR_PRERANKER = (
    Read("training_feed", "window", days=lambda c: c.prerank.train_days), Read("impressions", "next", optional=True),
    Read("item_embeddings", "lookup"), Read("item_sids", "lookup"), Read("user_sequences", "lookup", optional=True),
)  # fmt: skip

STEPS: tuple[Step, ...] = (
    Step(
        "ingest", "spark",
        reads=(Read("raw_impressions", "slice"), Read("raw_candidates", "slice"),
               Read("raw_interactions", "slice", optional=True), Read("raw_items", "as_of", column="updated_at"),
               Read("raw_opt_outs", "lookup", optional=True)),
        writes=("quarantine", "impressions", "candidates", "interactions"), also_writes=("items",),
        settings=("ingest", "feed.passthrough", "lakehouse.columns"),
        shaped_by={"impressions": ("raw_impressions", "raw_items"), "candidates": ("raw_candidates", "raw_items"),
                   "interactions": ("raw_interactions", "raw_impressions", "raw_items")},
        takes_history=True, takes_day_after=True,
    ),
    Step(
        "encode_items", "deepspeed",
        reads=(Read("items", "whole"),),
        writes=("item_embeddings",), also_writes=("worker_rejects",), settings=("encoder",),
        stamp="encoder_version",
    ),
    Step(
        "train_tokenizer", "deepspeed",
        reads=(Read("item_embeddings", "lookup"),),
        publishes="tokenizer", settings=("tokenizer", "run.seed", "encoder.parts"),
        refresh=lambda c: c.tokenizer.refresh_days, retrains_on_new_data=False,
        sees=("item_embeddings",),
    ),
    Step(
        "assign_sids", "deepspeed",
        reads=(Read("item_embeddings", "whole"),), uses=("tokenizer",),
        writes=("item_sids",), also_writes=("worker_rejects",),
    ),
    Step(
        "samples", "spark",
        reads=(Read("impressions", "window", days=lambda c: c.samples.exposure_window_days),
               Read("candidates", "slice"), *EXCLUDED),
        writes=("unexposed_samples", "exposed_samples"),
        settings=("samples.unexposed_per_request", "samples.exposure_window_days", "run.seed", "feed.passthrough"),
    ),
    Step(
        "sequences", "spark",
        reads=(Read("interactions", "before", days=lambda c: c.sequences.history_days),
               Read("impressions", "before", days=lambda c: c.sequences.stats_days), Read("item_sids", "lookup")),
        uses=("tokenizer",), writes=("user_sequences", "item_stats", "user_stats"),
        settings=("sequences", "run.seed"),
    ),
    Step(
        "train_interest_model", "deepspeed",
        reads=(Read("user_sequences", "through"), Read("item_stats", "slice"), Read("item_sids", "lookup"),
               Read("item_embeddings", "lookup")),
        uses=("tokenizer",), publishes="interest_model", settings=("interest", "run.seed"), method=2,
        follows={"tokenizer": "sid_version"}, refresh=lambda c: c.interest.refresh_days,
        sees=("item_sids", "item_embeddings"), sees_made_from="user_sequences",
    ),
    Step(
        "anchor_requests", "spark",
        reads=(Read("exposed_samples", "slice"), Read("unexposed_samples", "slice"),
               Read("user_sequences", "through"), Read("interest_anchors", "lookup", optional=True), *EXCLUDED),
        uses=("tokenizer", "interest_model"), writes=("anchor_requests",),
        settings=("samples.scored_exposed_share", "anchors.count", "anchors.prefixes", "run.seed"),
    ),
    Step(
        "generate_anchors", "deepspeed",
        reads=(Read("anchor_requests", "slice"), Read("item_sids", "lookup"), Read("item_embeddings", "lookup"),
               Read("interest_anchors", "lookup", optional=True)),
        uses=("tokenizer", "interest_model"), writes=("interest_anchors",), also_writes=("worker_rejects",),
        settings=("anchors",), idle_without="anchor_requests",
    ),
    Step(
        "score_requests", "spark",
        reads=(Read("exposed_samples", "slice"), Read("unexposed_samples", "slice"), Read("anchor_requests", "slice"),
               Read("user_sequences", "through"), Read("interest_anchors", "lookup"), *EXCLUDED),
        uses=("tokenizer", "interest_model"), writes=("score_requests",),
        settings=("samples.scored_exposed_share", "labels.block_size", "anchors.count", "anchors.prefixes", "run.seed"),
    ),
    Step(
        "score_candidates", "deepspeed",
        reads=(Read("score_requests", "slice"), Read("item_embeddings", "lookup"), Read("item_sids", "lookup")),
        uses=("tokenizer", "interest_model"), writes=("pair_scores",), also_writes=("worker_rejects",),
        settings=("labels.item_vectors",),
    ),
    Step(
        "fit_calibrator", "spark",
        reads=(Read("pair_scores", "slice"), Read("unexposed_samples", "slice"),
               Read("user_stats", "slice"), Read("item_stats", "slice", when=_uses_all_features),
               Read("pair_scores", "before", days=lambda c: c.labels.calibrator.window_days, when=_is_fitted),
               Read("impressions", "before", days=lambda c: c.labels.calibrator.window_days, optional=True)),
        uses=("interest_model",), publishes="calibrator", settings=("labels.calibrator",),
        follows={"interest_model": "model_version"}, method=2,
    ),
    Step(
        "pseudo_labels", "spark",
        reads=(Read("pair_scores", "slice"), Read("item_stats", "slice"), Read("user_stats", "slice"),
               Read("items", "lookup")),
        uses=("interest_model", "calibrator"), writes=("pseudo_labels",), settings=("labels.weight",),
    ),
    Step(
        "training_feed", "spark",
        reads=(Read("exposed_samples", "slice"), Read("unexposed_samples", "slice"),
               Read("pseudo_labels", "slice", may_lack=lambda c: c.feed.publish == "exposed_only_on_failure"),
               Read("item_sids", "lookup"), *(Read(t, "lookup", optional=True) for t in (*FOR_REASONS, *FOR_MONITORS))),
        uses=("tokenizer",), writes=("training_feed",), also_writes=("monitors",), settings=("feed",),
    ),
    Step(
        "train_preranker", "deepspeed",
        reads=FOR_PRERANKER,
        uses=("tokenizer",), writes=("evaluations",), publishes="preranker", settings=("prerank",), method=2,
        trains_on_run_date=True,
    ),
    Step(
        "report", "spark",
        reads=(Read("training_feed", "slice"), Read("pseudo_labels", "slice"), Read("quarantine", "slice"),
               Read("evaluations", "slice"), *(Read(t, "lookup", optional=True) for t in FOR_REPORT)),
        uses=("calibrator",), writes_page=True,
    ),
)  # fmt: skip

# Outside the graph. Judges a simulated marketplace: no step of the graph reads what it reads or writes.
JUDGE = Step(
    "evaluate_truth", "deepspeed",
    reads=(Read("truth", "slice"), Read("item_embeddings", "lookup"), Read("items", "lookup"),
           Read("item_sids", "lookup")),
    uses=("preranker",), writes=("truth_metrics",), command="gpl judge",
)  # fmt: skip
# Trains the pre-ranker on labels that need no language model beside ours, to compare.
WITH_CONTROLS = Step(
    "evaluate_controls", "deepspeed",
    reads=(*FOR_PRERANKER, Read("pseudo_labels", "window", days=lambda c: c.prerank.train_days),
           Read("item_stats", "lookup"), Read("user_stats", "lookup")),
    uses=("tokenizer",), writes=("control_evaluations",), settings=("prerank", "labels.calibrator.spread"),
    method=2, command="gpl evaluate --controls",
)  # fmt: skip
# Compacts what Spark writes; runs ingest for repaired rows. No table says that they are done: they run when asked to.
OPTIMIZE = Step("optimize", "spark", reads=(), compacts=True, command="gpl optimize")
RETRY = Step("retry_quarantine", "spark", reads=(), command="gpl quarantine retry")

_BY_NAME = {step.name: step for step in (*STEPS, JUDGE, WITH_CONTROLS, OPTIMIZE, RETRY)}

RAW_TABLES = tuple(dict.fromkeys(r.table for s in STEPS for r in s.reads if load_contract(r.table).owner == "platform"))

# Small tables of Spark steps, whose rows the driver commits through delta-rs.
_WITHOUT_SPARK = ("monitors",)


def find_step(name: str) -> Step:
    """The step called `name`; UsageError when there is none."""
    if name not in _BY_NAME:
        listing = "; the steps are " + ", ".join(_BY_NAME)
        raise UsageError(f"no step '{name}'" + (did_you_mean(name, _BY_NAME) or listing))
    return _BY_NAME[name]


def owner_step(table: str) -> Step | None:
    """The step that writes our table `table`; None for a table that no step owns."""
    return _BY_NAME.get(load_contract(table).owner)


def engine_of(table: str) -> Literal["spark", "delta-rs"]:
    """The one engine that commits to the log of our table `table`: the two do not agree about locks."""
    owner = owner_step(table)
    by_spark = owner is not None and owner.launcher == "spark" and table not in _WITHOUT_SPARK
    return "spark" if by_spark else "delta-rs"


def start_of(day: date) -> datetime:
    """Midnight UTC at the start of `day`."""
    return datetime.combine(day, time(), UTC)
