"""Pictures to begin with: files of any kind that Pillow reads -> what the VAE's encoder takes."""

import io
import warnings
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from artifacts_schema import disk, keys
from artifacts_schema.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

MAX_BYTES = 256 << 20
WHITE = (255, 255, 255)  # what shows through where a picture is transparent


class Picture(NamedTuple):
    """A picture's file, which was read whole once."""

    data: bytes
    format: str  # as a suffix: png, jpeg
    width: int  # in pixels, as it is to be looked at
    height: int

    @property
    def sha256(self) -> str:
        return keys.sha256(self.data)


def read(path: Path) -> Picture:
    """Raises UserError for what is no picture, or not whole."""
    if path.is_dir():
        raise UserError(f"image {path} is a directory")
    try:
        data = disk.read(path, MAX_BYTES)
    except OSError as error:
        raise UserError(f"image {path}: {error.strerror or error}") from None
    image = _opened(data, str(path))
    return Picture(data, (image.format or "picture").lower(), *_upright(image).size)


def rgb(data: bytes, width: int, height: int, name: str) -> "np.ndarray":
    """Its colours in [-1, 1], float32 [height, width, 3]: cropped to that shape around its middle, then resampled.

    As diffusers' `VaeImageProcessor` does it, which does not crop.
    """
    import numpy as np
    from PIL.Image import Resampling

    image = _in_rgb(_upright(_opened(data, name)))
    scale = min(image.width / width, image.height / height)
    across, down = round(scale * width), round(scale * height)
    left, top = (image.width - across) // 2, (image.height - down) // 2
    image = image.crop((left, top, left + across, top + down)).resize((width, height), Resampling.LANCZOS)
    return np.asarray(image, np.float32) / np.float32(255) * 2 - 1


def size_like(width: int, height: int, area: int, unit: int) -> tuple[int, int]:
    """The size of about `area` pixels, in multiples of `unit`, that has a picture's shape."""
    ratio = sqrt(area / (width * height))
    across, down = (max(unit, round(side * ratio / unit) * unit) for side in (width, height))
    return across, down


def _opened(data: bytes, name: str) -> "Image":
    """Read whole: what is cut off shows."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            image.load()
    except UnidentifiedImageError:
        raise UserError(f"image {name} is no picture, or of a kind that is not known") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"image {name} has more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # Pillow's, by the format
        raise UserError(f"image {name} cannot be read: {error}") from None
    return image


def _upright(image: "Image") -> "Image":
    """As a camera says that it was held."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _in_rgb(image: "Image") -> "Image":
    from PIL import Image

    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):  # 16 bits, which Pillow would cut off
        image = image.convert("I").point(lambda value: value / 257).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image).convert("RGB")
