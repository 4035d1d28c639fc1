"""SID codes are single tokens, in one block of ids, whatever surrounds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from gpl_core.errors import ContractError, UsageError
from gpl_core.interest.vocabulary import check_single_tokens, extend_tokenizer, sid_tokens


@pytest.fixture
def tokenizer(checkpoint: Path):
    return AutoTokenizer.from_pretrained(checkpoint)


def test_every_code_is_one_token_in_context_and_round_trips(tokenizer) -> None:
    vocabulary = extend_tokenizer(tokenizer, 2, 5)
    text = "<|sid_1_3|><|sid_2_4|><|sid_1_0|>, then"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids[:3] == [*vocabulary.ids(np.array([3, 4])), vocabulary.first_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_ids_are_level_after_level(tokenizer) -> None:
    vocabulary = extend_tokenizer(tokenizer, 3, 4)
    np.testing.assert_array_equal(
        vocabulary.ids(np.array([[[0, 0, 0], [3, 2, 1]]])) - vocabulary.first_id, [[[0, 4, 8], [3, 6, 9]]]
    )
    assert tokenizer.convert_ids_to_tokens(vocabulary.token_indices) == sid_tokens(vocabulary.levels, vocabulary.codes)


def test_extending_twice_changes_nothing_and_another_shape_is_refused(tokenizer) -> None:
    first = extend_tokenizer(tokenizer, 2, 5)
    assert extend_tokenizer(tokenizer, 2, 5) == first
    with pytest.raises(UsageError, match="not one block"):
        extend_tokenizer(tokenizer, 2, 6)


@pytest.mark.parametrize("sid", [[[0, 5]], [[-1, 0]]])
def test_codes_outside_the_vocabulary_are_refused(tokenizer, sid) -> None:
    with pytest.raises(ContractError, match=r"expected \[0, 5\)"):
        extend_tokenizer(tokenizer, 2, 5).ids(np.array(sid))


def test_a_code_that_is_split_is_noticed(tokenizer, checkpoint: Path) -> None:
    vocabulary = extend_tokenizer(tokenizer, 2, 5)
    untouched = AutoTokenizer.from_pretrained(checkpoint)
    with pytest.raises(UsageError, match="not one token"):
        check_single_tokens(untouched, vocabulary)
