"""Pictures for tests, drawn here."""

import io

from PIL import Image


def picture(color="red", size=(40, 30), kind="PNG") -> bytes:
    """A white picture with a bar of ``color`` in its left half."""
    out = io.BytesIO()
    drawn = Image.new("RGB", size, "white")
    drawn.paste(color, (5, 5, size[0] // 2, size[1] - 5))
    drawn.save(out, kind)
    return out.getvalue()
