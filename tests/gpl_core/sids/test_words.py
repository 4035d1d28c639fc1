"""Hashed words: what two texts have in common."""

import hashlib

import numpy as np
import pytest

from gpl_core.sids.encoders import EncoderPart, build_encoder
from gpl_core.sids.item_content import ItemContent


def test_words_in_common_are_what_makes_texts_alike():
    texts = [
        "Hex bolt M8 x 40",
        "bolt, hex; m8 X 40!",
        "Hex bolt M8 x 60",
        "Hex bolt M6 x 60",
        "Glass beaker",
        "ｍ８",
        "M8",
    ]
    found = build_encoder([EncoderPart("words", options={"dim": 1024})]).encode(
        [ItemContent(n, text) for n, text in enumerate(texts)]
    ).vectors  # fmt: skip
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(found[0], found[1])  # neither order nor case
    np.testing.assert_array_equal(found[5], found[6])  # nor width
    np.testing.assert_allclose(found[0] @ found[2:5].T, [4 / 5, 3 / 5, 0], atol=4 / 1024**0.5)


def test_words_are_the_same_on_every_machine_and_later_ones_are_not_read():
    encoder = build_encoder([EncoderPart("words", options={"dim": 8, "max_words": 2})])
    one, two, long = encoder.encode(
        [ItemContent(n, t) for n, t in enumerate(["bolt", "bolt hex", "bolt hex m8"])]
    ).vectors
    signs = np.unpackbits(np.frombuffer(hashlib.shake_256(b"bolt").digest(1), dtype=np.uint8)) * 2.0 - 1
    np.testing.assert_allclose(one, signs / 8**0.5, rtol=1e-6)
    np.testing.assert_array_equal(two, long)


@pytest.mark.parametrize("text", ["हिन्दी किताब", "ภาษาไทย ที่ดี", "İstanbul’da çay", "hex_bolt"])
def test_marks_belong_to_their_word(text):
    """The first word is all that both have; cut at its vowel signs it would share consonants with any other."""
    encoder = build_encoder([EncoderPart("words", options={"dim": 4096})])
    texts = [text, text.replace("_", " ").replace("’", " ").split()[0]]
    whole, first = encoder.encode([ItemContent(n, t) for n, t in enumerate(texts)]).vectors
    words = 3 if "’" in text else 2
    assert whole @ first == pytest.approx(words**-0.5, abs=0.05)


def test_a_word_said_again_adds_less():
    found = build_encoder([EncoderPart("words", options={"dim": 4096})]).encode(
        [ItemContent(0, "bolt bolt bolt hex"), ItemContent(1, "bolt")]
    ).vectors  # fmt: skip
    weight = 1 + np.log(3)
    assert found[0] @ found[1] == pytest.approx(weight / np.hypot(weight, 1), abs=0.05)


def test_a_text_without_words_has_no_vector():
    encoder = build_encoder([EncoderPart("words")])
    found = encoder.encode([ItemContent(0, "…!"), ItemContent(1), ItemContent(2, "saw")])
    assert found.rejected == {0: "text without words", 1: "text without words"}
