"""Whether a tokenizer may be published: metrics of code usage, collisions and reconstruction, and gates on them.

Legend for shapes: N items, L levels, C codes per level, d embedding width.
"""

from dataclasses import dataclass

import numpy as np

from gpl_core.errors import GateError
from gpl_core.sids.collisions import duplicates, row_numbers
from gpl_core.sids.tokenizer import Tokenizer


@dataclass(frozen=True)
class Health:
    """Figures of one tokenizer on one catalog; shares are in [0, 1]."""

    items: int
    codes: int
    perplexity: tuple[float, ...]  # per level, exp of the entropy of code usage: that many evenly used codes have it
    used: tuple[int, ...]  # per level, the number of codes that occur
    reachable: tuple[int, ...]  # per level, the most codes this catalog could use: min(C, distinct embeddings)
    collision_share: float  # share of the items that share their SID with an item of another embedding
    reconstruction: float  # mean cosine between an embedding and its SID's decoded vector


def level_usage(codes: np.ndarray, size: int) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Perplexity and number of used codes per level of ``codes`` int [N x L] with C = ``size``."""
    perplexity, used = [], []
    for level in range(codes.shape[1]):
        counts = np.bincount(codes[:, level], minlength=size)
        share = counts[counts > 0] / max(1, len(codes))
        perplexity.append(float(np.exp(-(share * np.log(share)).sum())))
        used.append(int((counts > 0).sum()))
    return tuple(perplexity), tuple(used)


def collision_share(codes: np.ndarray, identity: np.ndarray) -> float:
    """Share of the items [N] that share their SID with an item of another ``identity`` [N]."""
    if not len(codes):
        return 0.0
    sid = row_numbers(codes)
    # One number per (SID, content); the contents of a SID are then counted once each.
    _, one = np.unique(row_numbers(np.stack([sid, identity], axis=1)), return_index=True)
    return float((np.bincount(sid[one])[sid] > 1).mean())


def mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean cosine of the rows of ``a`` and ``b``, both [N x d]."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / np.maximum(lengths, 1e-12)).mean())


def measure(tokenizer: Tokenizer, embeddings: np.ndarray, rows: int = 65_536) -> Health:
    """Health of ``tokenizer`` on a catalog [N x d] (may be a memory map); reads ``rows`` at a time."""
    codes = np.empty((len(embeddings), tokenizer.levels), dtype=np.int32)
    cosine = 0.0
    for start in range(0, len(embeddings), rows):
        part = np.asarray(embeddings[start : start + rows], dtype=np.float32)
        codes[start : start + len(part)] = tokenizer.encode(part).codes
        cosine += mean_cosine(part, tokenizer.decode(codes[start : start + len(part)])) * len(part)
    first = duplicates(codes, embeddings)
    distinct = int((first == np.arange(len(first))).sum())
    perplexity, used = level_usage(codes, tokenizer.codes)
    reachable = tuple(min(tokenizer.codes, distinct) for _ in used)
    return Health(
        len(embeddings), tokenizer.codes, perplexity, used, reachable, collision_share(codes, first),
        cosine / max(1, len(embeddings)),
    )  # fmt: skip


def check_gates(
    health: Health, *, min_perplexity_share: float, max_dead_share: float, max_collision_share: float,
    min_reconstruction_cosine: float,
) -> None:  # fmt: skip
    """Raises GateError that names every figure out of bounds and what to change.

    Perplexity and dead codes are judged per level, as shares of the reachable codes.
    """
    faults = []
    levels = zip(health.perplexity, health.used, health.reachable, strict=True)
    for level, (perplexity, used, reachable) in enumerate(levels, start=1):
        if perplexity < min_perplexity_share * reachable:
            faults.append(
                f"level {level}: perplexity {perplexity:.1f}, expected at least {min_perplexity_share:g} of "
                f"{reachable} codes (lower tokenizer.codes)"
            )
        dead = 1 - used / reachable
        if dead > max_dead_share:
            faults.append(
                f"level {level}: {reachable - used} of {reachable} codes dead ({dead:.1%}), expected at most "
                f"{max_dead_share:.1%} (lower tokenizer.codes)"
            )
    if health.collision_share > max_collision_share:
        faults.append(
            f"collisions: {health.collision_share:.1%} of the items share a SID, expected at most "
            f"{max_collision_share:.1%} (raise tokenizer.codes or tokenizer.levels)"
        )
    if not health.reconstruction >= min_reconstruction_cosine:
        faults.append(
            f"reconstruction: mean cosine {health.reconstruction:.3f}, expected at least "
            f"{min_reconstruction_cosine:g} (raise tokenizer.codes; look at the encoder's vectors)"
        )
    if faults:
        raise GateError("tokenizer: not published, the current one stays in force:\n  " + "\n  ".join(faults))
