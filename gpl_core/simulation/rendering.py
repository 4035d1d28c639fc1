"""Small rendered pictures: color follows the department, shape the topic, stripes the material."""

import colorsys
import io

import numpy as np
from PIL import Image, ImageDraw


def render(
    department: int, topic: int, product: int, material: int, rng: np.random.Generator, pixels: int = 32
) -> bytes:
    """One PNG of `pixels` x `pixels`; the same arguments and generator state give the same bytes."""
    jitter = rng.normal(0, 0.02, 4)
    background = _rgb((department / 12 + jitter[0]) % 1.0, 0.35, 0.92 + jitter[1])
    foreground = _rgb((department / 12 + 0.35 + 0.06 * product + jitter[2]) % 1.0, 0.8, 0.6)
    image = Image.new("RGB", (pixels, pixels), background)
    draw = ImageDraw.Draw(image)
    for offset in range(0, pixels, 4 + 2 * material):
        draw.line([(offset, 0), (offset, pixels)], fill=_rgb((department / 12) % 1.0, 0.45, 0.8))
    low, high = pixels * (0.18 + jitter[3]), pixels * 0.82
    middle = pixels / 2
    box = [low, low, high, high]
    shape = topic % 5
    if shape == 0:
        draw.ellipse(box, fill=foreground)
    elif shape == 1:
        draw.rectangle(box, fill=foreground)
    elif shape == 2:
        draw.polygon([(middle, low), (high, high), (low, high)], fill=foreground)
    elif shape == 3:
        draw.polygon([(middle, low), (high, middle), (middle, high), (low, middle)], fill=foreground)
    else:
        draw.rectangle([low, middle - pixels / 8, high, middle + pixels / 8], fill=foreground)
        draw.rectangle([middle - pixels / 8, low, middle + pixels / 8, high], fill=foreground)
    noisy = np.asarray(image, dtype=np.int16) + rng.integers(-6, 7, (pixels, pixels, 1))
    out = io.BytesIO()
    # Not compressed: zlib's bytes depend on its build and the CPU.
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(out, format="PNG", compress_level=0)
    return out.getvalue()


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, min(max(value, 0.0), 1.0))
    return int(red * 255), int(green * 255), int(blue * 255)
