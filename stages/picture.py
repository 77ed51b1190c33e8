"""Pictures to begin with: files that Pillow reads -> what the VAE's encoder takes."""

import io
import warnings
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from artifacts_schema import disk
from artifacts_schema.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

MAX_BYTES = 256 << 20
# of what Pillow knows: no format that is a program, as PostScript is, or that nobody has
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")
MAX_RATIO = 4  # of the longer side to the shorter, where the size is up to the picture; beyond, it is cropped
WHITE = (255, 255, 255, 255)  # what shows through where a picture is transparent


class Picture(NamedTuple):
    """A picture's file, which was read whole once."""

    data: bytes
    format: str  # as a suffix: png, jpeg
    width: int  # in pixels, as it is to be looked at
    height: int


def read(path: Path) -> Picture:
    """Raises UserError for what is no picture, or not whole."""
    name = repr(str(path))
    try:
        path = path.resolve()
        if not path.is_file():
            path.stat()  # says that it is not there
            raise UserError(f"image {name} is no file")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"image {name} is larger than {MAX_BYTES >> 20} MiB")
        data = disk.read(path, MAX_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"image {name}: {getattr(error, 'strerror', None) or error}") from None
    image = _opened(data, name)
    return Picture(data, (image.format or "picture").lower(), *_upright(image).size)


def rgb(data: bytes, width: int, height: int, name: str) -> "np.ndarray":
    """Its colours in [-1, 1], float32 [height, width, 3]: cropped to that shape around its middle, then resampled.

    As diffusers' `VaeImageProcessor` does it, which does not crop. UserError for what is no picture.
    """
    import numpy as np
    from PIL.Image import Resampling

    image = _in_rgb(_upright(_opened(data, repr(name))))
    scale = min(image.width / width, image.height / height)
    across, down = (max(1, round(scale * side)) for side in (width, height))
    left, top = (image.width - across) // 2, (image.height - down) // 2
    image = image.crop((left, top, left + across, top + down)).resize((width, height), Resampling.LANCZOS)
    return np.asarray(image, np.float32) / np.float32(255) * 2 - 1


def size_like(width: int, height: int, area: int, unit: int) -> tuple[int, int]:
    """The size of about `area` pixels, in multiples of `unit`, that has a picture's shape, or nearly so."""
    width, height = min(width, MAX_RATIO * height), min(height, MAX_RATIO * width)
    ratio = sqrt(area / (width * height))
    across, down = (max(unit, round(side * ratio / unit) * unit) for side in (width, height))
    return across, down


def _opened(data: bytes, name: str) -> "Image":
    """Read whole: what is cut off shows."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.load()
    except UnidentifiedImageError:
        raise UserError(f"image {name} is no picture, or of a kind that is not known") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"image {name} has more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller") from None
    except Exception as error:  # Pillow's formats raise what they like
        raise UserError(f"image {name} cannot be read: {error}") from None
    depth = {"F": "floating-point numbers", "I": "32 bits"}.get(image.mode)
    if depth:
        raise UserError(f"image {name} holds {depth}, of which nobody says what is white; save it with 8 or 16 bits")
    return image


def _upright(image: "Image") -> "Image":
    """As a camera says that it was held, if that can be read."""
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ImageOps.exif_transpose(image)
    except Exception:  # what is said beside a picture may be anything
        return image


def _in_rgb(image: "Image") -> "Image":
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I;16"):  # which Pillow would cut off at 255
        grey = np.asarray(image).astype(np.float32)
        shown = Image.fromarray(np.round(grey / 257).astype(np.uint8))
        if (hidden := image.info.get("transparency")) is not None:
            shown.putalpha(Image.fromarray(np.where(grey == hidden, 0, 255).astype(np.uint8)))
        image = shown
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
