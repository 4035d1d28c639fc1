"""Pictures: safe decoding from bytes or a URI, and a classical frozen descriptor (HOG and color, scikit-image)."""

import io
import logging
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import fsspec
import numpy as np
from PIL import Image
from skimage.color import rgb2gray, rgb2hsv
from skimage.feature import hog

from gpl_core.errors import UsageError
from gpl_core.sids.item_content import ItemContent, PartVectors

log = logging.getLogger("gpl")

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_CELLS = 4
_BINS = 4
# What leads out of a prefix: chained file systems, relative paths, `..` that a server may resolve.
_ESCAPES = re.compile(r"(?i)::|^file:|(\.|%2e){2}(/|\\|%2f|$)")
_SECONDS = 30.0  # a location that has not answered by then is given up
Prepared = TypeVar("Prepared")


class PictureError(ValueError):
    """A picture that cannot be used; its text is the reason written to worker_rejects."""


class PictureReader:
    """Decodes pictures under limits: where they may lie, bytes and seconds of reading, and pixels before they are
    decoded (the decode bomb guard).

    ``prefixes``: folders and URIs; what does not lie under one of them is not opened.
    """

    def __init__(self, prefixes: Sequence[str] = (), max_bytes: int = 8_000_000, max_pixels: int = 32_000_000) -> None:
        self.max_bytes, self.max_pixels, self._prefixes = max_bytes, max_pixels, tuple(prefixes)

    @property
    def limits(self) -> dict[str, int]:
        """What decides, beside the bytes, whether a picture is used."""
        return {"max_bytes": self.max_bytes, "max_pixels": self.max_pixels}

    def read(self, item: ItemContent) -> Image.Image | None:
        """The item's picture in RGB over white, None where it has none. Raises PictureError."""
        data = item.image or None
        if data is None and item.image_uri:
            data = self._fetch(item.image_uri)
        if data is None:
            return None
        if len(data) > self.max_bytes:
            raise PictureError(f"the picture has more than {self.max_bytes} bytes")
        try:
            with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked next
                if picture.width * picture.height > self.max_pixels:
                    raise PictureError(
                        f"the picture has {picture.width} x {picture.height} pixels, more than {self.max_pixels}"
                    )
                shown: Image.Image = picture
                if picture.mode.startswith("I"):  # 16-bit grays, which `convert` would clip to white
                    shown = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
                rgba = shown.convert("RGBA")
        except PictureError:
            raise
        except Exception as error:  # decoders raise many types on broken files
            raise PictureError(f"the picture cannot be decoded ({type(error).__name__})") from error
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")

    def read_all(
        self, items: Sequence[ItemContent], prepare: Callable[[Image.Image], Prepared], ahead: int = 4
    ) -> Iterator[Prepared | PictureError | None]:
        """``prepare`` of each item's picture in order, errors as values, None where there is none.

        ``ahead`` threads decode and prepare while the caller works: at most ``ahead`` decoded pictures are in memory.
        """

        def prepared(item: ItemContent) -> Prepared | PictureError | None:
            try:
                picture = self.read(item)
            except PictureError as error:
                return error
            return None if picture is None else prepare(picture)

        with ThreadPoolExecutor(ahead) as pool:
            for start in range(0, len(items), 16 * ahead):  # bounds what is prepared and not yet taken
                yield from pool.map(prepared, items[start : start + 16 * ahead])

    def read_batches(
        self,
        items: Sequence[ItemContent],
        prepare: Callable[[Image.Image], Prepared],
        size: int,
        rejected: dict[int, str],
    ) -> Iterator[tuple[list[int], list[Prepared]]]:
        """Positions and prepared pictures of up to ``size`` items at a time; errors go to ``rejected``, by position."""
        where: list[int] = []
        held: list[Prepared] = []
        for position, picture in enumerate(self.read_all(items, prepare)):
            if isinstance(picture, PictureError):
                rejected[position] = str(picture)
            elif picture is not None:
                where.append(position)
                held.append(picture)
            if held and (len(held) == size or position == len(items) - 1):
                yield where, held
                where, held = [], []

    def _fetch(self, uri: str) -> bytes:
        """The bytes at ``uri``. Every failure raises the same error: a row must not reveal which files exist."""
        found: list[bytes] = []

        def read() -> None:
            try:
                found.append(self._bytes_at(uri))
            except Exception as error:  # each file system has its own
                log.debug("%s: %r", uri, error)

        thread = threading.Thread(target=read, daemon=True)  # a read that hangs cannot be ended
        thread.start()
        thread.join(_SECONDS)
        if not found:
            raise PictureError("the picture's location cannot be read, or is not under encoder.image_prefixes")
        return found[0]

    def _bytes_at(self, uri: str) -> bytes:
        path = local_path(uri)
        if path is None:
            if not any(uri.startswith(p.rstrip("/") + "/") for p in self._prefixes) or _ESCAPES.search(uri):
                raise PermissionError
            options = {"allow_redirects": False} if uri.startswith("http") else {}  # to what no prefix allows
            with fsspec.open(uri, "rb", **options) as file:
                return file.read(self.max_bytes + 1)
        path = os.path.realpath(path)
        folders = [os.path.realpath(folder) for p in self._prefixes if (folder := local_path(p)) is not None]
        if not any(os.path.commonpath([path, folder]) == folder for folder in folders):
            raise PermissionError
        if not stat.S_ISREG(os.stat(path).st_mode):  # a FIFO would wait, a device never end
            raise PermissionError
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
            return file.read(self.max_bytes + 1)


def local_path(location: str) -> str | None:
    """The path of an absolute location on this machine, None for any other."""
    path = location.removeprefix("file://")
    return path if path.startswith("/") else None


class HogColorEncoder:
    """Shape and color of a picture: histogram of oriented gradients (Dalal & Triggs 2005), an HSV histogram and a
    coarse color layout, each of unit length, concatenated and renormalized (the combination: ours)."""

    name = "hog_color"
    lacking = "no picture"

    def __init__(self, reader: PictureReader, size: int = 64) -> None:
        """``size``: pictures are scaled to size x size pixels. Raises UsageError below 8."""
        if size < 2 * _CELLS:
            raise UsageError(f"encoder.parts.hog_color.options.size: {size}, expected at least {2 * _CELLS} pixels.")
        self._size, self._reader = size, reader
        self.dim = len(self._describe(Image.new("RGB", (size, size), "red")))

    @property
    def identity(self) -> Mapping[str, object]:
        """See PartEncoder."""
        return {"hog_color": 1, "size": self._size, **self._reader.limits}

    def encode(self, items: Sequence[ItemContent]) -> PartVectors:
        """See PartEncoder."""
        out = np.zeros((len(items), self.dim), dtype=np.float32)
        rejected: dict[int, str] = {}
        for where, pictures in self._reader.read_batches(items, self._shrink, 64, rejected):
            out[where] = [self._describe(picture) for picture in pictures]
        return PartVectors(out, rejected)

    def _shrink(self, picture: Image.Image) -> Image.Image:
        return picture.resize((self._size, self._size), Image.Resampling.BILINEAR, reducing_gap=2.0)

    def _describe(self, small: Image.Image) -> np.ndarray:
        rgb = np.asarray(small, dtype=np.float64) / 255.0
        cell = self._size // _CELLS
        shape = hog(rgb2gray(rgb), orientations=9, pixels_per_cell=(cell, cell), cells_per_block=(2, 2))
        hsv = rgb2hsv(rgb).reshape(-1, 3)
        colors = np.histogramdd(hsv, bins=_BINS, range=((0, 1),) * 3)[0].reshape(-1)
        layout = np.asarray(small.resize((_CELLS, _CELLS), Image.Resampling.BOX), dtype=np.float64).reshape(-1) / 255.0
        parts = [_unit(shape), _unit(np.sqrt(colors)), _unit(layout)]
        return _unit(np.concatenate(parts)).astype(np.float32)


def _unit(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x)
    return x / length if length > 0 else x
