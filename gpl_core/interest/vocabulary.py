"""SID codes as new single tokens of a language model's tokenizer.

The code c of level l is the token ``<|sid_{l}_{c}|>`` (levels counted from 1, as in c_1 .. c_L; codes from 0). The new
ids are one contiguous block, level after level, so that (level, code) <-> token id is plain arithmetic.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken

from gpl_core.errors import ContractError, UsageError


@dataclass(frozen=True)
class SidVocabulary:
    """The place of the SID codes in a tokenizer's vocabulary."""

    levels: int  # L, the number of codes in a SID
    codes: int  # C, the number of codes per level
    first_id: int  # token id of level 1, code 0; ids run to first_id + L * C

    @property
    def size(self) -> int:
        """L * C, the number of SID tokens."""
        return self.levels * self.codes

    @property
    def token_indices(self) -> list[int]:
        """All SID token ids, ascending."""
        return list(range(self.first_id, self.first_id + self.size))

    def ids(self, sids: np.ndarray) -> np.ndarray:
        """Token ids of ``sids`` (int [... x L]), int64 of the same shape; ContractError on a code outside [0, C)."""
        rows = np.asarray(sids)
        if rows.ndim < 1 or rows.shape[-1] != self.levels:
            raise ContractError(f"sid: shape {rows.shape}, expected [... x {self.levels}]; unflatten the column first.")
        if rows.size and (rows.min() < 0 or rows.max() >= self.codes):
            bad = rows[(rows < 0) | (rows >= self.codes)].flat[0]
            raise ContractError(
                f"sid: code {bad}, expected [0, {self.codes}); drop padding (-1), and check that the sequences carry "
                "the sid_version this model was made for."
            )
        return rows.astype(np.int64) + self.first_id + np.arange(self.levels) * self.codes


def sid_tokens(levels: int, codes: int) -> list[str]:
    """The text of every SID token, in id order."""
    return [f"<|sid_{level + 1}_{code}|>" for level in range(levels) for code in range(codes)]


def extend_tokenizer(tokenizer: Any, levels: int, codes: int) -> SidVocabulary:
    """Add the L * C SID tokens to ``tokenizer`` (in place) and return their place.

    A tokenizer that already holds exactly these tokens stays as it is. Raises UsageError when SID tokens of another
    shape are in the way, or when a code is not one token in context.
    """
    texts = sid_tokens(levels, codes)
    # Not `special`: skip_special_tokens would drop them when a sequence is decoded for a report.
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in texts])
    ids = np.array(tokenizer.convert_tokens_to_ids(texts))
    if (np.diff(ids) != 1).any():
        raise UsageError(
            f"tokenizer: SID tokens for L = {levels}, C = {codes} are not one block of ids (another tokenizer's SIDs "
            "were added before); start from the base checkpoint."
        )
    vocabulary = SidVocabulary(levels, codes, first_id=int(ids[0]))
    check_single_tokens(tokenizer, vocabulary)
    return vocabulary


def check_single_tokens(tokenizer: Any, vocabulary: SidVocabulary) -> None:
    """Raise UsageError unless every SID code is one token in context (between other codes).

    Tokenized alone, a code may look right and still merge with its neighbors, so all of them go into one text.
    """
    text = "".join(sid_tokens(vocabulary.levels, vocabulary.codes)) + " end"
    got = tokenizer.encode(text, add_special_tokens=False)
    if got[: vocabulary.size] != vocabulary.token_indices:
        raise UsageError("tokenizer: a SID code is not one token in context; use the checkpoint's own fast tokenizer.")
