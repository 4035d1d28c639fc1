"""Where pictures come from, and which of them are read."""

import io
import os
import threading
from collections.abc import Sequence

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from gpl_core.sids import pictures
from gpl_core.sids.encoders import EncodedItems, EncoderPart, build_encoder
from gpl_core.sids.item_content import ItemContent
from gpl_core.sids.pictures import PictureReader
from tests.gpl_core.sids.drawn import picture


def test_pictures_of_one_color_are_nearer_than_pictures_of_two():
    encoder = build_encoder([EncoderPart("hog_color")])
    items = [ItemContent(n, image=picture(*of)) for n, of in enumerate([("red",), ("red", (60, 44)), ("blue",)])]
    found = encoder.encode(items).vectors
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert found[0] @ found[1] > found[0] @ found[2]
    np.testing.assert_array_equal(encoder.encode(items[2:]).vectors[0], found[2])


UNREADABLE = "hog_color: the picture's location cannot be read, or is not under encoder.image_prefixes"


def located(uris: Sequence[str], *prefixes: str, **options: int) -> EncodedItems:
    """Items whose pictures lie at `uris`, encoded with these prefixes allowed."""
    items = [ItemContent(n, image_uri=uri) for n, uri in enumerate(uris)]
    return build_encoder([EncoderPart("hog_color", options=options)], prefixes=prefixes).encode(items)


def test_pictures_come_from_bytes_or_a_location(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture(kind="JPEG"))
    inside = build_encoder([EncoderPart("hog_color")]).encode([ItemContent(0, image=picture(kind="JPEG"))])
    found = located([f"file://{tmp_path}/a.jpg", f"{tmp_path}/a.jpg"], str(tmp_path))
    assert not found.rejected
    for vector in found.vectors:
        np.testing.assert_array_equal(vector, inside.vectors[0])


def test_only_regular_files_under_an_allowed_folder_are_opened(tmp_path):
    """Whatever else a row names has one answer, that of a file that is not there; nothing waits, nothing is read."""
    allowed, other = tmp_path / "allowed", tmp_path / "allowed-not"
    for folder in (allowed / "deep", other):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(picture())
    (allowed / "link.png").symlink_to(allowed / "deep" / "a.png")
    (allowed / "out.png").symlink_to(other / "a.png")
    (allowed / "door").symlink_to(other)
    os.mkfifo(allowed / "fifo")
    good = [f"{allowed}/deep/a.png", f"file://{allowed}/link.png", f"{allowed}/deep/../deep/a.png"]
    bad = [
        f"{allowed}/none.png", f"{other}/a.png", f"{other}/none.png", f"{allowed}/out.png", f"{allowed}/door/a.png",
        f"{allowed}/../allowed-not/a.png", f"{allowed}/fifo", f"{allowed}/deep", "/dev/zero", "/proc/self/environ",
        "allowed/deep/a.png", f"file:{allowed}/deep/a.png", f"local://{allowed}/deep/a.png", "file://localhost/etc/passwd",
        f"simplecache::file://{allowed}/deep/a.png", "http://127.0.0.1:1/a.png", "s3://bucket/a.png", "nonsense://a",
        f"{allowed}/a\0.png", "\U0001f600", "x" * 10_000_000,
    ]  # fmt: skip
    found = located([*good, *bad], str(allowed))
    assert set(found.rejected) == set(range(len(good), len(good) + len(bad)))
    assert set(found.rejected.values()) == {UNREADABLE}
    assert set(located(good).rejected.values()) == {UNREADABLE}, "nothing is allowed by itself"


def test_other_stores_are_read_under_their_prefix_alone():
    store = fsspec.filesystem("memory")
    for path in ("/shop/a.png", "/shop-2/a.png", "/secret/a.png"):
        store.pipe_file(path, picture())
    uris = [
        "memory://shop/a.png", "memory://shop-2/a.png", "memory://secret/a.png", "memory://shop/../secret/a.png",
        "memory://shop/%2E%2e/secret/a.png", "memory://shop/x::memory://secret/a.png",
    ]  # fmt: skip
    for prefix in ("memory://shop", "memory://shop/"):
        assert located(uris, prefix).rejected == dict.fromkeys(range(1, len(uris)), UNREADABLE)


def test_a_location_that_does_not_answer_is_given_up(monkeypatch):
    held = threading.Event()

    class Hanging(MemoryFileSystem):
        protocol = "hanging"

        def _open(self, *args, **kwargs):
            held.wait()
            raise OSError

    fsspec.register_implementation("hanging", Hanging, clobber=True)
    monkeypatch.setattr(pictures, "_SECONDS", 0.01)
    try:
        assert located(["hanging://shop/a.png"], "hanging://shop").rejected == {0: UNREADABLE}
    finally:
        held.set()


def test_broken_and_oversized_pictures_are_rejected_before_they_are_decoded():
    options = {"max_bytes": 3000, "max_pixels": 2000}
    bomb = io.BytesIO()
    Image.new("1", (5000, 5000)).save(bomb, "PNG")  # few bytes, many pixels
    assert len(bomb.getvalue()) < 20_000
    items = [
        ItemContent(0, image=picture()),
        ItemContent(1, image=picture()[:60]),
        ItemContent(2, image=b"<svg/>"),
        ItemContent(3, image=bomb.getvalue()),
        ItemContent(4, image=np.random.default_rng(0).bytes(3001)),
        ItemContent(5, image=b""),
    ]
    found = build_encoder([EncoderPart("hog_color", options={**options, "max_bytes": 20_000})]).encode(items)
    assert sorted(found.rejected) == [1, 2, 3, 4, 5]
    assert "cannot be decoded" in found.rejected[1]
    assert "cannot be decoded" in found.rejected[2]
    assert "5000 x 5000 pixels" in found.rejected[3]
    assert found.rejected[5] == "no picture"
    small = build_encoder([EncoderPart("hog_color", options=options)]).encode(items)
    assert "more than 3000 bytes" in small.rejected[4]


def test_a_location_is_read_no_further_than_the_limit(tmp_path):
    (tmp_path / "big.png").write_bytes(picture() + b"x" * 5000)
    found = located([f"file://{tmp_path}/big.png"], str(tmp_path), max_bytes=3000)
    assert found.rejected == {0: "hog_color: the picture has more than 3000 bytes"}


@pytest.mark.parametrize("mode", ["CMYK", "P", "LA", "L", "1", "I;16"])
def test_every_kind_of_color_is_read(mode):
    gray = Image.radial_gradient("L").resize((40, 30))
    if mode == "I;16":  # grays of two bytes must not be clipped to white
        drawn = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    else:
        drawn = gray.convert(mode)
    out = io.BytesIO()
    drawn.save(out, "JPEG" if mode == "CMYK" else "PNG")
    found = PictureReader().read(ItemContent(0, image=out.getvalue()))
    assert found.mode == "RGB"
    expected = np.asarray(gray.convert("1").convert("L") if mode == "1" else gray, dtype=float)
    assert np.abs(np.asarray(found).astype(float).mean(axis=2) - expected).mean() < 6


def test_pictures_are_decoded_while_the_caller_works():
    items = [ItemContent(n, image=picture()) for n in range(3)]
    decoded = threading.Event()
    sizes = []

    def prepare(found):
        sizes.append(found.size)
        if len(sizes) == 3:
            decoded.set()
        return found.size

    reading = PictureReader().read_all(items, prepare)
    next(reading)
    assert decoded.wait(20)  # while the first is in our hands
    assert list(reading) == [(40, 30)] * 2
