"""Frozen item encoders: the fusion of several parts, and how a configuration becomes an encoder.

Legend for shapes: N items, d width of the fused vector, d_p width of part p.

An encoder's version is a hash of its weights (file contents), its preprocessing and its configuration. Nothing here
trains.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpl_core.errors import MissingInputError, UsageError
from gpl_core.sids.item_content import ItemContent, PartEncoder, PartVectors
from gpl_core.sids.words import WordsEncoder

_OPTIONS: Mapping[str, Mapping[str, type]] = {
    "precomputed": {"dim": int},
    "words": {"dim": int, "max_words": int},
    "minilm": {"max_tokens": int, "pooling": str},
    "hf_text": {"max_tokens": int, "pooling": str},
    "hf_clip": {"text_weight": float, "image_weight": float, "max_bytes": int, "max_pixels": int},
    "hog_color": {"size": int, "max_bytes": int, "max_pixels": int},
    "efficientnet_lite0": {"max_bytes": int, "max_pixels": int},
}
"""Every known part and its options."""


@dataclass(frozen=True)
class EncodedItems:
    """The fused vectors of N items."""

    vectors: np.ndarray  # float32 [N x d], unit rows; rows of rejected items are zero
    rejected: Mapping[int, str]  # position in the batch -> why this item has no vector
    missing: Mapping[str, int]  # part name -> encoded items that lack this modality
    complete: np.ndarray  # bool [N]: encoded, and lacking none


@dataclass(frozen=True)
class EncoderPart:
    """Configuration of one part."""

    name: str
    weight: float = 1.0
    path: str | None = None
    options: Mapping[str, int | float | str] = field(default_factory=dict)


class FusionEncoder:
    """Weighted concatenation of unit parts, renormalized (ours).

    A missing part is imputed from the complete item that is nearest by the other parts (hot-deck imputation): with a
    zero part, the item would be far from every complete item. An item is rejected if a part rejects its content (broken
    image, NaN) or if all parts are missing. Each part runs in its own thread, so that images are decoded while the text
    model is running.
    """

    dim: int  # d
    version: str  # 12 hex digits: equal versions give equal vectors, but for borrowed parts

    def __init__(self, parts: Sequence[PartEncoder], weights: Sequence[float]) -> None:
        """``weights`` > 0, one per part. A single part of weight 1 is the part itself."""
        self._parts, self._weights = tuple(parts), tuple(float(w) for w in weights)
        self.dim = sum(p.dim for p in self._parts)
        identity = {
            "fusion": min(len(parts), 2),
            "weights": self._weights,
            "parts": [{p.name: dict(p.identity)} for p in self._parts],
        }
        self.version = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]

    def encode(self, items: Sequence[ItemContent], donors: Callable[[], np.ndarray] | None = None) -> EncodedItems:
        """Encodes ``items``; content that cannot be used is reported, never raised.

        donors: gives vectors [D x d] of complete items, asked for when an item lacks a part; without any it stays zero.
        """
        out = np.zeros((len(items), self.dim), dtype=np.float32)
        rejected: dict[int, str] = {}
        present = np.zeros((len(self._parts), len(items)), dtype=bool)
        with ThreadPoolExecutor(len(self._parts)) as pool:
            results = list(pool.map(lambda part: part.encode(items), self._parts))
        start, length_of_all = 0, float(np.linalg.norm(self._weights))
        part_of = np.repeat(np.arange(len(self._parts)), [p.dim for p in self._parts])
        for number, (part, weight, result) in enumerate(zip(self._parts, self._weights, results, strict=True)):
            length = np.linalg.norm(result.vectors, axis=1)
            for position in np.flatnonzero(~np.isfinite(length)):
                rejected.setdefault(int(position), f"{part.name}: the vector is not finite")
            for position, reason in result.rejected.items():
                rejected.setdefault(position, f"{part.name}: {reason}")
            present[number] = np.isfinite(length) & (length > 0.5)  # a part is unit or zero
            unit = np.where(present[number][:, None], result.vectors, 0.0)
            out[:, start : start + part.dim] = weight / length_of_all * unit
            start += part.dim
        for position in np.flatnonzero(~present.any(axis=0)):
            rejected.setdefault(int(position), " and ".join(p.lacking for p in self._parts))
        kept = np.ones(len(items), dtype=bool)
        kept[list(rejected)] = False
        out[~kept] = 0.0
        poor = np.flatnonzero(kept & ~present.all(axis=0))
        if len(poor) and donors is not None and len(lent := donors()):
            nearest = lent[(out[poor] @ lent.T).argmax(axis=1)]
            out[poor] = np.where(present[part_of][:, poor].T, out[poor], nearest)
        out[kept] /= np.linalg.norm(out[kept], axis=1, keepdims=True)
        missing = {p.name: int((~present[n] & kept).sum()) for n, p in enumerate(self._parts)}
        return EncodedItems(out, dict(sorted(rejected.items())), missing, kept & present.all(axis=0))


class PrecomputedEncoder:
    """The platform's own embedding column, normalized. A zero vector of any length means that there is none."""

    name = "precomputed"
    lacking = "no precomputed embedding"

    def __init__(self, dim: int) -> None:
        self.dim = dim

    @property
    def identity(self) -> Mapping[str, object]:
        return {"dim": self.dim}

    def encode(self, items: Sequence[ItemContent]) -> PartVectors:
        out = np.zeros((len(items), self.dim), dtype=np.float32)
        rejected = {}
        for position, item in enumerate(items):
            if item.embedding is None:
                continue
            vector = np.asarray(item.embedding, dtype=np.float64).reshape(-1)
            if not np.isfinite(vector).all():
                rejected[position] = "the precomputed embedding holds NaN or infinity"
            elif not vector.any():
                continue
            elif len(vector) != self.dim:
                rejected[position] = f"the precomputed embedding has {len(vector)} entries, expected {self.dim}"
            else:
                out[position] = vector / np.linalg.norm(vector)
        return PartVectors(out, rejected)


def build_encoder(
    parts: Sequence[EncoderPart], *, batch_size: int = 64, device: str = "cpu", prefixes: Sequence[str] = ()
) -> FusionEncoder:
    """The encoder that ``parts`` describe; models are loaded from local files only, pictures from under ``prefixes``.

    Raises UsageError for an unknown or missing option, MissingInputError where a model's files are absent.
    """
    return FusionEncoder([_build_part(p, batch_size, device, prefixes) for p in parts], [p.weight for p in parts])


def _build_part(part: EncoderPart, batch_size: int, device: str, prefixes: Sequence[str]) -> PartEncoder:
    # Models are imported here: a precomputed column needs neither transformers nor scikit-image.
    options = _options(part)
    if part.path and part.name not in ("hf_text", "hf_clip"):
        raise UsageError(
            f"encoder.parts.{part.name}.path: '{part.path}', expected none; a model of your own is read by hf_text or "
            "hf_clip."
        )
    if part.name == "precomputed":
        if "dim" not in options:
            raise UsageError("encoder.parts.precomputed.options.dim: missing, expected the column's length, e.g. 768.")
        return PrecomputedEncoder(**options)
    if part.name == "words":
        return WordsEncoder(**options)
    from gpl_core.sids.pictures import HogColorEncoder, PictureReader

    reader = PictureReader(prefixes, **{n: options.pop(n) for n in ("max_bytes", "max_pixels") if n in options})
    if part.name == "hog_color":
        return HogColorEncoder(reader, **options)
    options |= {"batch_size": batch_size, "device": device}
    if part.name == "efficientnet_lite0":
        from gpl_core.sids.picture_models import EfficientNetEncoder

        return EfficientNetEncoder(reader, **options)
    from gpl_core.sids.text_models import ClipEncoder, TextEncoder, minilm_folder

    if part.name == "hf_clip":
        return ClipEncoder(_folder(part), reader, **options)
    if part.name == "hf_text":
        return TextEncoder("hf_text", _folder(part), **options)
    return TextEncoder("minilm", minilm_folder(), **{"max_tokens": 256, **options})


def _options(part: EncoderPart) -> dict[str, Any]:
    """The part's options, converted to their types; UsageError for an unknown name or a value that does not convert."""
    known = _OPTIONS[part.name]
    unknown = sorted(set(part.options) - set(known))
    if unknown:
        raise UsageError(
            f"encoder.parts.{part.name}.options: unknown {', '.join(unknown)}, expected any of {', '.join(known)}."
        )
    options = {}
    for name, value in part.options.items():
        kind = known[name]
        try:
            options[name] = kind(value)
            if kind is not str and not options[name] == float(value) >= 0:
                raise ValueError("a fraction, or below 0")
        except ValueError as error:
            expected = kind.__name__ if kind is str else f"{kind.__name__} of 0 or more"
            raise UsageError(f"encoder.parts.{part.name}.options.{name}: '{value}', expected {expected}.") from error
    return options


def _folder(part: EncoderPart) -> Path:
    if not part.path:
        raise UsageError(f"encoder.parts.{part.name}.path: missing, expected the local folder of the model.")
    folder = Path(part.path)
    if not folder.is_dir():
        raise MissingInputError(
            f"encoder.parts.{part.name}.path: {folder} is not a folder; download the model there first."
        )
    return folder
