"""The sections of a configuration: frozen pydantic models, one field with a description per setting."""

import os
import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator
from pydantic.fields import FieldInfo

from gpl_core.contracts.contract import all_contracts

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1, strict=True)]  # strict: `true` and `"5"` are not numbers
ColumnName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]  # as SQL takes it unquoted
Days = Annotated[int, Field(ge=1, le=36_500, strict=True)]
EncoderName = Literal["precomputed", "words", "minilm", "hf_text", "hf_clip", "hog_color", "efficientnet_lite0"]
# Times are microseconds since 1970 in our tables, and a run date has days before and after it.
FIRST_DATE, LAST_DATE = date(1970, 1, 2), date(9999, 12, 29)
RunDate = Annotated[date, Field(ge=FIRST_DATE, le=LAST_DATE)]


def Knob(default: Any = ..., *, description: str = "", **rules: Any) -> Any:
    """A field that decides whether, when or how fast a step runs, not what it computes: not part of any fingerprint."""
    return Field(default, description=description, json_schema_extra={"shapes": False}, **rules)


def shapes_results(field: FieldInfo) -> bool:
    """Whether a setting is part of the fingerprints of the steps that read it; see `Knob`."""
    extra = field.json_schema_extra
    return not isinstance(extra, dict) or extra.get("shapes", True) is not False


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, no infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


CATALOG = "catalog://"
_CATALOG_NAME = re.compile(r"\w+(\.\w+){1,2}")


class Shadow(Section):
    """What a shadow run reads from another lakehouse without changing it; `gpl shadow` writes this section."""

    of: str = Field(default="", description="Root of the other lakehouse; empty: this is not a shadow run")
    tables: tuple[str, ...] = Field(default=(), description="Tables read from the other lakehouse")
    artifacts: dict[str, str] = Field(
        default={}, description="Artifact read from there -> version used here; empty: the version in force there"
    )


class Lakehouse(Section):
    """Where the tables are."""

    root: str = Knob(description="A local path or s3://bucket/prefix; holds tables/, artifacts/, reports/, work/")
    tables: dict[str, str] = Knob(
        default={}, description="Locations of tables stored elsewhere, e.g. raw_items; for a raw table also "
        "catalog://database.table, its name in Spark's catalog (gpl register looks it up)",
    )  # fmt: skip
    _is_relative: bool = PrivateAttr(False)
    database: str = Knob(
        default="", description="Database (or catalog.database) in Spark's catalog where gpl register adds our tables"
    )
    file_mb: Positive = Knob(
        default=128, description="gpl optimize merges files up to this size; workers read whole files, so not too large"
    )
    shadow: Shadow = Knob(Shadow())
    columns: dict[str, dict[str, str]] = Field(
        default={}, description="Raw table -> our column -> the platform's name, where they differ; dt may be a "
        "column of times, as in {dt: event_time}: its day (UTC) is then the row's date",
    )  # fmt: skip

    @field_validator("tables")
    @classmethod
    def _known(cls, tables: dict[str, str]) -> dict[str, str]:
        if unknown := sorted(set(tables) - set(all_contracts())):
            raise ValueError(f"no such table: {', '.join(unknown)}; the tables are {', '.join(all_contracts())}")
        for table, location in tables.items():
            if not location.startswith(CATALOG):
                continue
            if all_contracts()[table].owner != "platform":
                raise ValueError(f"{table}: {location}: only raw tables have a name in a catalog; give a location")
            if not _CATALOG_NAME.fullmatch(location.removeprefix(CATALOG)):
                raise ValueError(f"{table}: {location}: expected {CATALOG}database.table")
        return tables

    @field_validator("columns")
    @classmethod
    def _mapped(cls, columns: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
        raw = {n: c for n, c in all_contracts().items() if c.owner == "platform"}
        problems = [f"{t} is not a raw table; these are {', '.join(raw)}" for t in columns if t not in raw]
        for table in columns.keys() & raw.keys():
            ours = raw[table].column_names
            problems += [f"{table}.{c}: no such column; {', '.join(ours)}" for c in columns[table] if c not in ours]
            apart = [theirs for our, theirs in columns[table].items() if our != "dt"]  # may be the day of another
            if len(set(apart)) < len(apart):
                problems.append(f"{table}: two of our columns are mapped to one of the platform")
        if problems:
            raise ValueError("; ".join(problems))
        return columns

    @model_validator(mode="after")
    def _absolute(self) -> Self:
        # Launchers may change the working directory: fix relative paths where the configuration is read.
        self._is_relative = "://" not in self.root and not Path(self.root).is_absolute()
        object.__setattr__(self, "root", _absolute(self.root))
        object.__setattr__(self, "tables", {k: _absolute(v) for k, v in self.tables.items()})
        return self

    def lost(self) -> str:
        """If the root is a relative path to a missing folder, a note that says where we looked; otherwise ""."""
        if not self._is_relative or Path(self.root).is_dir():
            return ""
        given = os.path.relpath(self.root)
        return (
            f"note: lakehouse.root, {given}, is relative: it was looked for in {Path.cwd()}, which has no such folder. "
            "Start gpl in another one, or give the whole path: --set lakehouse.root=PATH"
        )


def _absolute(location: str) -> str:
    found = location if "://" in location else str(Path(location).expanduser().absolute())
    if wrong := sorted(set(found) & set("%#?`\\[]<>^|") | {c for c in found if not c.isprintable()}):
        raise ValueError(f"{found}: engines read {' '.join(map(repr, wrong))} in a path differently; rename the folder")
    return found


class Run(Section):
    """Which dates `gpl run` covers when no --run-date is given, and the seed of every random draw."""

    start_date: RunDate = Knob(description="First run date")
    end_date: RunDate = Knob(description="Last run date; the day after it is ingested too, for evaluation")
    history_start: RunDate | None = Knob(default=None, description="First date of the history to ingest in bulk")
    seed: int = Field(default=0, description="Random seed of every hash and draw: samples, targets, initial weights")

    @property
    def first_date(self) -> date:
        """The first date of all; raw rows with neither a date nor a time belong to it."""
        return self.history_start or self.start_date

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.end_date < self.start_date:
            raise ValueError(f"end_date {self.end_date} is before start_date {self.start_date}")
        if self.history_start is not None and self.history_start > self.start_date:
            raise ValueError(f"history_start {self.history_start} is after start_date {self.start_date}")
        return self


class LaunchSettings(Section):
    """How steps are started; everything here goes to the launchers unchanged."""

    spark_submit: tuple[str, ...] = Field(default=(), description="Arguments of spark-submit, e.g. --master yarn")
    deepspeed: tuple[str, ...] = Field(default=(), description="Arguments of deepspeed, e.g. --num_gpus 8")
    env: dict[str, str] = Field(default={}, description="Environment variables of the launched processes")


class Ingest(Section):
    """Checking and cleaning the raw tables."""

    max_quarantine_share: Share = Knob(
        default=0.05, description="Largest share of a raw table's rows that may be quarantined; above it, exit 3"
    )
    image_embedding_length: int = Field(
        default=0, ge=0, description="E: length of raw_items.image_embedding; 0: unused"
    )


class EncoderPartSettings(Section):
    """One of the encoders."""

    name: EncoderName = Field(description="Which encoder")
    weight: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Weight of this part in the fused vector")
    path: str = Field(default="", description="Local folder of the model, for hf_text and hf_clip")
    options: dict[str, int | float | str] = Field(default={}, description="Options of this encoder")


class Encoder(Section):
    """Frozen item encoders."""

    parts: tuple[EncoderPartSettings, ...] = Field(
        default=(EncoderPartSettings(name="minilm"),), min_length=1, description="Encoders whose vectors are fused"
    )
    batch_size: Positive = Knob(default=64, description="Items encoded at a time; affects vectors only by rounding")
    image_prefixes: tuple[str, ...] = Field(
        default=(),
        description="Folders and URIs, such as s3://bucket/pictures, that image_uri may point into, in addition to "
        "lakehouse.root; items with any other image_uri are rejected",
    )

    @field_validator("image_prefixes")
    @classmethod
    def _from_anywhere(cls, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_absolute, prefixes))


class TokenizerGates(Section):
    """A tokenizer that misses one of these is not published."""

    min_perplexity_share: Share = Field(default=0.3, description="At least, per level: perplexity / min(C, N)")
    max_dead_share: Share = Field(default=0.2, description="At most, per level: share of unused codes")
    max_collision_share: Share = Field(default=0.5, description="At most: share of items sharing a SID before repair")
    min_reconstruction_cosine: float = Field(default=0.5, ge=-1, le=1, description="At least: cosine to decoded SIDs")


class TokenizerSettings(Section):
    """The tokenizer that gives items their semantic IDs."""

    levels: Positive = Field(default=3, description="L: number of codes in a semantic ID")
    codes: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="C: codes per level; derived from the catalog's size if unset"
    )
    epochs: Positive = Field(default=400, description="Passes over all items, at most: about 1,600 steps, 20 or more")
    batch_size: Annotated[int, Field(ge=2, strict=True)] = Field(default=1024, description="Items per step")
    refresh_days: Positive = Knob(
        default=7, description="Days after which the tokenizer is retrained, unless the catalog is unchanged"
    )
    gates: TokenizerGates = Knob(TokenizerGates())


class Samples(Section):
    """Exposed and unexposed pairs."""

    unexposed_per_request: Positive = Field(default=20, description="n: at most this many unexposed candidates")
    exposure_window_days: Days = Field(default=1, description="A pair shown within this many days is not unexposed")
    scored_exposed_share: Share = Field(default=0.1, description="Share of exposed pairs scored for calibration")


class Sequences(Section):
    """Per-user histories."""

    max_length: Positive = Field(default=20, description="H: most recent positives kept per user")
    history_days: Days = Field(default=90, description="Positives older than this are ignored")
    stats_days: Days = Field(default=90, description="Window of item_stats and user_stats, in days")
    snapshot_every: Positive = Field(default=7, description="Days between slices that contain all users")


class Interest(Section):
    """The language model over SID sequences."""

    base_model: str = Field(
        default="", description="Folder of a Qwen2, Qwen3 or Llama checkpoint; empty: a small random model"
    )
    lora_rank: Positive = Field(
        default=64, description="LoRA rank for base_model (alpha: twice that); a small random model is trained in full"
    )
    dropout: Share = Field(default=0.0, description="Dropout in base_model's adapter, or in the small random model")
    epochs: Positive = Field(default=8, description="Maximum passes over the users")
    learning_rate: float = Field(default=2e-3, gt=0, description="Peak learning rate")
    tokens_per_batch: Positive = Field(default=4096, description="Token budget of a packed batch")
    keep_target_share: Share = Field(default=0.85, gt=0, description="Share of targets that down-sampling keeps")
    valid_share: Share = Field(default=0.05, description="Share of users held out for early stopping")
    content: bool = Field(default=True, description="Use items' content vectors, besides SIDs, as input and in scores")
    walks: float = Field(default=3.0, ge=0, description="Synthetic walks between related items, per real user; 0: none")
    refresh_days: Positive = Knob(
        default=7, description="Days after which the model is retrained, unless its training data is unchanged"
    )
    checkpoint_steps: int = Knob(default=2_000, ge=0, description="Steps between checkpoints; 0: only after each epoch")
    recompute: Literal["nothing", "elementwise", "layers"] = Knob(
        default="nothing", description="Activations recomputed in the backward pass to save memory: `elementwise`: all "
        "except attention and matrix products; `layers`: whole layers, slowest but least memory",
    )  # fmt: skip
    deepspeed: dict[str, Any] = Knob(default={}, description="Overrides for the generated DeepSpeed configuration")


class AnchorSettings(Section):
    """Interest anchors."""

    count: Positive = Field(default=20, description="K: anchors per user")
    prefixes: Positive = Field(default=256, description="P: most likely SID prefixes also cached, for prefix_log_prob")
    tokens_per_batch: Positive = Knob(default=8192, description="Token budget of a search batch")
    retention_days: Days = Knob(default=30, description="gpl evict removes entries that no run date needed this long")


class CalibratorSettings(Section):
    """From scores to click probabilities."""

    kind: Literal["quantile", "platt", "isotonic", "logistic"] = Field(
        default="quantile", description="Formula of the labels; see docs/method.md"
    )
    score: Literal["similarity", "prefix_log_prob", "exposed_clicks"] = Field(
        default="exposed_clicks",
        description="What quantile ranks a user's pairs by; platt and isotonic map similarity or else prefix_log_prob",
    )
    prefix_share: float = Field(
        default=0.25, ge=0, lt=1, description="Share of prefix_log_prob in exposed_clicks beyond its weight; 0: none"
    )
    across_users: Literal["user_rate", "global"] = Field(
        default="user_rate", description="Level of quantile labels: the user's own click rate, or one rate for all"
    )
    target_rate: float | Literal["auto", "uniform"] = Field(
        default="auto",
        description="Mean label of unexposed candidates; 'uniform': measured on uniform traffic; 'auto': the same "
        "if that has min_rows, else exposed_share times the click rate of exposed pairs",
    )
    exposed_share: Share = Field(default=1.0, gt=0, description="Factor on the exposed click rate; see target_rate")
    spread: float = Field(default=0.75, gt=0, description="Standard deviation of a user's quantile labels, as logits")
    window_days: Days = Field(default=14, description="Days before the run date that are used for fitting")
    min_rows: Positive = Field(default=1000, description="Minimum number of exposed rows for fitting")
    on_rate_change: Literal["warn", "refuse"] = Knob(
        default="warn", description="If the mean label changes more than threefold; refuse: publish nothing (exit 3)"
    )

    @model_validator(mode="after")
    def _rate(self) -> Self:
        if isinstance(self.target_rate, float) and not 0 < self.target_rate < 1:
            raise ValueError(f"target_rate {self.target_rate} must lie in (0, 1), or be 'auto' or 'uniform'")
        return self

    @property
    def uses_all_features(self) -> bool:
        """Whether a regression over all features is fitted: for the labels themselves, or to rank by."""
        return self.kind == "logistic" or (self.kind == "quantile" and self.score == "exposed_clicks")

    @property
    def variable(self) -> Literal["similarity", "prefix_log_prob"]:
        """The one score that platt and isotonic map to a label."""
        return "similarity" if self.score == "similarity" else "prefix_log_prob"


class Labels(Section):
    """Scores, labels and weights."""

    block_size: Positive = Field(default=128, description="B: candidates per row of score_requests")
    users_per_batch: Positive = Knob(default=256, description="Rows scored at a time")
    item_vectors: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Type of the item vectors in score_candidates; 16-bit types halve the memory but are less exact",
    )
    weight: Literal["none", "factors"] = Field(
        default="none",
        description="Weight of a label in training: none: 1; factors: from the confidence factors, with mean 1",
    )
    calibrator: CalibratorSettings = CalibratorSettings()


class Feed(Section):
    """The pre-ranker's training feed."""

    publish: Literal["complete", "exposed_only_on_failure"] = Knob(
        default="complete",
        description="If labels are late or a monitor refuses: withhold the slice, or publish only its exposed rows",
    )
    rows_per_file: Positive = Field(default=500_000, description="Approximate rows per file; decides the rows' order")
    passthrough: dict[ColumnName, Literal["int", "long", "float", "double", "string", "boolean"]] = Field(
        default={}, description="Extra columns of raw_impressions and raw_candidates that reach the feed"
    )


MonitorName = Literal["label_drift", "coverage", "quarantine_share", "anchors_per_user", "calibration_error"]


class Monitors(Section):
    """What `training_feed` checks of a run date before it publishes the slice; results: table monitors."""

    label_drift: float = Field(default=0.2, gt=0, description="At most: population stability index vs. the day before")
    coverage: Share = Field(default=0.5, description="At least: share of unexposed rows that have a label")
    quarantine_share: Share = Field(default=0.02, description="At most: share of raw event rows that ingest refused")
    anchors_per_user: float = Field(default=2.0, ge=0, description="At least: mean number of anchors per user")
    calibration_error: Share = Field(
        default=0.05, description="At most: expected calibration error on uniformly exposed pairs"
    )
    fail: tuple[MonitorName, ...] = Field(default=(), description="Monitors that block the feed on an alarm (exit 3)")
    ignore: tuple[MonitorName, ...] = Field(default=(), description="Monitors that are not measured; the others warn")

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if both := sorted(set(self.fail) & set(self.ignore)):
            raise ValueError(f"{', '.join(both)} are listed under both fail and ignore")
        return self


class Prerank(Section):
    """The reference pre-ranker."""

    train_days: Days = Field(default=1, description="Days of the feed to train on, up to the run date")
    dimension: Positive = Field(default=32, description="Width of both towers' vectors")
    buckets: Positive = Field(default=20_000, description="Rows in the hashed user table, and in the item table")
    batch_size: Positive = Field(default=512, description="Exposed rows per step, plus as many unexposed rows")
    steps: Positive = Field(default=400, description="Optimizer steps, the same for every variant")
    learning_rate: float = Field(default=3e-3, gt=0, description="AdamW's learning rate")
    lambda_: float = Field(default=4.0, ge=0, alias="lambda", description="Weight of the pseudo-label loss")
    lambda_sweep: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        default=(), description="Further lambdas to train and evaluate, as variants gpl@VALUE"
    )
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="Each variant trains once per seed")
    pair_features: tuple[str, ...] = Field(
        default=(),
        description="Numeric columns of feed.passthrough used as features; scale them to about 1; missing values: 0",
    )
    propensity: str = Field(
        default="",
        description="Float column of feed.passthrough with the logged probability of showing a pair; adds snips_auc",
    )

    model_config = ConfigDict(populate_by_name=True)
