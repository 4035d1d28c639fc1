"""Run configuration: frozen pydantic models, unknown keys refused, every error in one message.

A configuration is a YAML file, or the name of a shipped one (`gpl_core/conf/*.yaml`), plus `--set section.key=value`
overrides that pass the same checks. No secrets belong in it: engines take credentials from their environment.
"""

import hashlib
import json
from collections.abc import Sequence
from datetime import date, timedelta
from importlib import resources
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ValidationError, model_validator

from gpl_core.conf import sections
from gpl_core.conf.sections import Knob, Section, shapes_results
from gpl_core.contracts.contract import Column, Contract, load_contract
from gpl_core.contracts.yaml_problems import problems_of
from gpl_core.contracts.yaml_text import InvalidYamlError, read_yaml
from gpl_core.errors import UsageError, counted, did_you_mean

_MOST_CHARACTERS = 4096  # of a text that is passed through


class Config(Section):
    """A whole run configuration."""

    lakehouse: sections.Lakehouse
    run: sections.Run
    launch: sections.LaunchSettings = Knob(sections.LaunchSettings())
    ingest: sections.Ingest = sections.Ingest()
    encoder: sections.Encoder = sections.Encoder()
    tokenizer: sections.TokenizerSettings = sections.TokenizerSettings()
    samples: sections.Samples = sections.Samples()
    sequences: sections.Sequences = sections.Sequences()
    interest: sections.Interest = sections.Interest()
    anchors: sections.AnchorSettings = sections.AnchorSettings()
    labels: sections.Labels = sections.Labels()
    feed: sections.Feed = sections.Feed()
    monitors: sections.Monitors = Knob(sections.Monitors())
    prerank: sections.Prerank = sections.Prerank()

    @model_validator(mode="after")
    def _passed_through(self) -> Self:
        numbers = {n for n, kind in self.feed.passthrough.items() if kind not in ("string", "boolean")}
        for name in self.prerank.pair_features:
            if name not in numbers:
                raise ValueError(
                    f"prerank.pair_features holds '{name}', which feed.passthrough does not hold as a number; add "
                    f"feed.passthrough.{name}: double, or leave it out"
                )
        name = self.prerank.propensity
        if name and self.feed.passthrough.get(name) not in ("float", "double"):
            raise ValueError(
                f"prerank.propensity is '{name}', which feed.passthrough does not hold as float or double; add "
                f"feed.passthrough.{name}: double, or leave prerank.propensity empty"
            )
        return self

    def dims(self, **known: int) -> dict[str, int]:
        """Named array dimensions of the contracts; `known` adds those that only data tell (d, C)."""
        return {
            "H": self.sequences.max_length,
            "L": self.tokenizer.levels,
            "K": self.anchors.count,
            "P": self.anchors.prefixes,
            "B": self.labels.block_size,
            "E": max(1, self.ingest.image_embedding_length),
            **known,
        }


def with_passthrough(table: str, config: Config) -> Contract:
    """The contract of `table` with the columns of `feed.passthrough`."""
    comment = "Passed through from the raw tables (feed.passthrough)"
    extra = [
        Column(n, kind, True, comment, max_length=_MOST_CHARACTERS if kind == "string" else None)
        for n, kind in config.feed.passthrough.items()
    ]
    return load_contract(table).with_columns(tuple(extra))


def hash_of(settings: object) -> str:
    """Hash of what shapes results in `settings` (sections, values, or a list of them): part of a fingerprint."""
    text = json.dumps(shaping(settings), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shaping(value: object) -> object:
    """`value` for JSON without the fields that are a `Knob`, at any depth."""
    if isinstance(value, BaseModel):
        names = [name for name, field in type(value).model_fields.items() if shapes_results(field)]
        return {name: shaping(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {key: shaping(inner) for key, inner in value.items()}
    return [shaping(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def shipped_configs() -> tuple[str, ...]:
    """Names of the shipped configurations."""
    folder = resources.files("gpl_core.conf")
    return tuple(sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")))


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Load a shipped configuration by name or a YAML file by path, apply `section.key=value` overrides, check it all.

    UsageError names the file and lists every wrong key and value at once.
    """
    if source in shipped_configs():
        text = (resources.files("gpl_core.conf") / f"{source}.yaml").read_text(encoding="utf-8")
    elif Path(source).is_file():
        try:
            text = Path(source).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"config '{source}': not text in UTF-8 ({error.reason} at byte {error.start})") from None
    else:
        shipped = shipped_configs()
        hint = did_you_mean(source, shipped)
        raise UsageError(f"config '{source}': no such file, nor a shipped one ({', '.join(shipped)}){hint}")
    try:
        body = read_yaml(text) or {}
    except InvalidYamlError as error:
        raise UsageError(f"config '{source}': not valid YAML: {error}") from None
    if not isinstance(body, dict):
        raise UsageError(f"config '{source}': expected a mapping of sections, found {type(body).__name__}")
    problems = [p for o in overrides if (p := _override(body, o))]
    try:
        config = Config.model_validate(body)
    except ValidationError as error:
        problems += problems_of(error, Config, body, REMOVED)
    if problems:
        listing = "\n".join(f"  - {p}" for p in problems)
        raise UsageError(f"config '{source}': {counted(len(problems), 'problem')}:\n{listing}")
    return config


def _override(body: dict[str, Any], text: str) -> str | None:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        return f"--set {text}: expected section.key=value"
    *parents, last = key.strip().split(".")
    target = body
    for parent in parents:
        nested = target.setdefault(parent, {})
        if not isinstance(nested, dict):
            return f"--set {text}: '{parent}' is a value, not a section"
        target = nested
    try:
        target[last] = read_yaml(value)
    except InvalidYamlError as error:
        return f"--set {text}: the value is not valid YAML: {error}"
    return None


_FIXED = "fixed at its default: delete the key"
# Settings of earlier releases, and what to do about them; CHANGELOG.md names each.
REMOVED = {
    "tokenizer.method": "every tokenizer is an RQ-VAE: delete the key",
    **dict.fromkeys((
        "tokenizer.learning_rate", "tokenizer.hidden", "tokenizer.latent", "tokenizer.warmup_epochs",
        "tokenizer.commitment", "tokenizer.relational", "tokenizer.ema_decay", "ingest.text_max_chars",
        "interest.warmup_share", "interest.patience", "prerank.hidden", "prerank.weight_decay",
    ), _FIXED),
    "sids": _FIXED.replace("key", "section"),
    "interest.tiny": "without interest.base_model the model has one small shape: delete the section",
    "interest.lora_dropout": "it is now interest.dropout: rename the key",
    "interest.lora_alpha": "it is twice interest.lora_rank: delete the key",
    "interest.prompt": "a history has no text before it: delete the key",
    "interest.init": "new token rows start from the codebooks: delete the key",
    **dict.fromkeys(("interest.title_to_sid", "interest.sid_to_title"), "no title is learned: delete the key"),
    "anchors.widths": "anchors.count beams are kept at each level: delete the key",
    "cache": "move its retention_days to the section anchors",
    "labels.weights": "all three factors count alike, and weights have mean 1: delete the section",
    "labels.calibrator.family": "quantile labels are logit-normal: delete the key",
    "labels.calibrator.largest_rate_change": "a factor of 3 is the limit; delete the key, on_rate_change stays",
    "labels.calibrator.allow_exposed": "delete the key; score: exposed_clicks ranks by exposed clicks",
    "monitors.least_impressions": "calibration_error needs 1,000 uniformly exposed impressions: delete the key",
    **dict.fromkeys(("prerank.user_buckets", "prerank.item_buckets"), "set prerank.buckets, for both tables"),
    "maintenance": "move its file_mb to the section lakehouse",
}  # fmt: skip


def date_range(start: date, end: date) -> list[date]:
    """The dates start … end, both included."""
    return [start + timedelta(days=i) for i in range((end - start).days + 1)]
