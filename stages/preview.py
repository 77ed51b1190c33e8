"""How a picture looks before it is decoded: each latent pixel's colour as a linear function of its channels.

The function is fitted by least squares to the pictures that were decoded with the same VAE, one fit for all runs: real
latents fill a small part of their space, and a fit to random ones is poor there. It is for looking at while denoising
goes on, and for nothing else: no result depends on it.
"""

import contextlib
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts_schema import cache, disk
from stages.backend import prepare_mlx
from stages.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    import numpy as np

EVERY_SECONDS = 2.0
SHARE = 0.01  # of the time may go into previews, where a disk is slow
LONGER_SIDE = 384  # pixels
ENOUGH = 1 << 18  # latent pixels: more would teach nothing that shows
RIDGE = 1e-3  # of a normalized latent's variance: keeps channels quiet that the pictures so far did not use
MADE_UP = 0.05  # what a pixel of a made-up picture counts beside one of a real picture


class Fit:
    """rgb = W·latent + b, as the sums that it is solved from: to them every decoded picture adds."""

    def __init__(self, vae: str, moments: "np.ndarray | None") -> None:
        self.vae = vae  # fingerprint
        self.moments = moments  # float64 [C + 1, C + 4]: over all latent pixels, [z, 1] times [z, 1, r, g, b]
        self.has_learned = False

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Fit":
        """What is stored, or an empty one if nothing is, or nothing whole."""
        import numpy as np

        vae = checkpoint.fingerprint("vae")
        moments = cache.find_moments(vae) or ()
        whole = len(moments) > 1 and all(len(row) == len(moments) + 3 for row in moments)
        return cls(vae, np.array(moments) if whole else None)

    def store(self) -> None:
        if self.moments is not None and self.has_learned:
            cache.put_moments(self.vae, tuple(map(tuple, self.moments.tolist())))

    def add(self, latents: "np.ndarray", pixels: "np.ndarray", weight: float = 1.0) -> None:
        """Learns from a picture: normalized latents [C, h, w], and what they were decoded to, uint8 [H, W, 3]."""
        import numpy as np

        channels, h, w = latents.shape
        if self.moments is None or self.moments.shape != (channels + 1, channels + 4):
            self.moments = np.zeros((channels + 1, channels + 4))
        if self.moments[-1, channels] < ENOUGH:
            rgb = pixels.reshape(h, pixels.shape[0] // h, w, pixels.shape[1] // w, 3).mean((1, 3)) / 255
            z = _with_one(latents)
            self.has_learned = True
            self.moments += weight * z.T @ np.concatenate([z, rgb.reshape(h * w, 3)], axis=1)

    def rgb(self, latents: "np.ndarray") -> "np.ndarray":
        """Normalized latents [C, h, w] -> uint8 [h, w, 3]. Raises ValueError if nothing was learned of such."""
        import numpy as np

        if self.moments is None:
            raise ValueError("nothing was learned yet")
        zz, zrgb = self.moments[:, :-3], self.moments[:, -3:]
        weights = np.linalg.solve(zz + RIDGE * zz[-1, -1] * np.eye(len(zz)), zrgb)
        rgb = (_with_one(latents) @ weights).reshape(*latents.shape[1:], 3)
        return (np.clip(np.nan_to_num(rgb), 0, 1) * 255).round().astype(np.uint8)


def fit_made_up(model: str | None) -> None:
    """Begins a fit with made-up latents if there is none, so that the very first picture can be previewed."""
    prepare_mlx("denoise")  # whose worker does it
    import mlx.core as mx
    import numpy as np

    from stages.models.vae import AutoencoderKLQwenImage, VAEConfig
    from stages.weights import Loading, load_model

    checkpoint = open_checkpoint(model)
    fit = Fit.of(checkpoint)
    if fit.moments is None:
        vae = load_model(Loading(checkpoint, "vae", AutoencoderKLQwenImage, VAEConfig, "float32"))
        latents = _made_up_latents(vae.config.z_dim)
        pictures = np.array(((vae.decode(mx.array(latents)) * 0.5 + 0.5) * 255).astype(mx.uint8))
        for each, pixels in zip(latents, pictures, strict=True):
            fit.add(each, pixels, MADE_UP)
        fit.store()


class Preview:
    """Shows in a file how a picture looks by now; within `with`, as long as it is being denoised."""

    def __init__(self, path: Path, fit: Fit) -> None:
        self.path, self.fit = path, fit
        self.shown_at = time.monotonic()
        self.showing_took = 0.0

    @classmethod
    def of(cls, path: Path, checkpoint: Checkpoint) -> "Preview | None":
        """None if nothing was learned of the checkpoint's VAE yet."""
        if not checkpoint.has("vae"):  # denoising needs none
            return None
        fit = Fit.of(checkpoint)
        return None if fit.moments is None else cls(path, fit)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        disk.remove(self.path)

    def is_due(self) -> bool:
        return time.monotonic() - self.shown_at >= max(EVERY_SECONDS, self.showing_took / SHARE)

    def show(self, latents: "np.ndarray") -> None:
        """Writes the estimate of a picture from its normalized latents [C, h, w]. What fails is left for the next."""
        started = time.monotonic()
        with contextlib.suppress(OSError, ValueError):
            disk.publish(self.path.parent, self.path.name, _webp(self.fit.rgb(latents)))
        self.shown_at = time.monotonic()
        self.showing_took = self.shown_at - started


def _made_up_latents(channels: int) -> "np.ndarray":
    """[8, C, 8, 8], to begin a fit with before there is a picture: smooth fields of several scales, unit variance."""
    import numpy as np

    random = np.random.RandomState(0)  # the legacy generator's stream never changes
    fields = []
    for scale in (1, 2, 4, 8) * 2:
        field = random.standard_normal((channels, 8 // scale, 8 // scale)).repeat(scale, 1).repeat(scale, 2)
        padded = np.pad(field, ((0, 0), (1, 1), (1, 1)), mode="edge")
        if scale > 1:
            field = np.sum([padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)], axis=0)
        fields.append(field / field.std())
    return np.stack(fields).astype(np.float32)


def _with_one(latents: "np.ndarray") -> "np.ndarray":
    """[C, h, w] -> float64 [h·w, C + 1], the last column ones."""
    import numpy as np

    z = latents.reshape(len(latents), -1).T.astype(np.float64)
    return np.concatenate([z, np.ones((len(z), 1))], axis=1)


def _webp(rgb: "np.ndarray") -> bytes:
    """At latent resolution it is tiny: it is enlarged here, smoothly."""
    from PIL import Image

    height, width, _ = rgb.shape
    scale = LONGER_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    file = io.BytesIO()
    Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC).save(file, format="WEBP", quality=80)
    return file.getvalue()
