"""What each stage would do with a model on this machine: which way it goes, what that needs, how long reading takes."""

import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from artifacts_schema.errors import UserError
from stages import memory
from stages.backend import PACKAGE, open_blas
from stages.checkpoint import Checkpoint, default_dtype, weight_files
from stages.decode import DEFAULT_DTYPE
from stages.denoise import Resolved
from stages.measure import gigabytes
from stages.memory import Budget, Weights

PROMPT_TOKENS = 100  # of a prompt and of its negative prompt, the template included
SAMPLE_BYTES = 256 << 20  # read to measure the disk
READ_BYTES = 8 << 20


class Way(NamedTuple):
    """One way in which a stage may go."""

    stage: str
    way: str
    needs: int  # bytes of memory
    reads: int  # bytes from disk
    how_often: str
    chosen: bool


def diagnose(checkpoint: Checkpoint, settings: Resolved, dtype: str | None, budget: int | None) -> Iterator[str]:
    """Lines for people. Nothing is loaded; a part of the model is read, to see how fast that is."""
    checkpoint.check_size(settings.width, settings.height, PROMPT_TOKENS)
    blas = open_blas()
    within = memory.budget(budget)
    yield f"machine    {_machine()}"
    yield f"memory     {gigabytes(memory.total())}, {gigabytes(memory.available())} free" + (
        f"; {within} is what stages may use" if within.promised else ""
    )
    if blas is False:
        yield f"products   by MLX's own BLAS; with OpenBLAS they are thirty times faster: `apt install {PACKAGE}`"
    rate = _reading_rate(checkpoint)
    if rate:
        yield f"disk       reads {gigabytes(int(rate))} a second, measured on the model's own files"
    yield f"model      {checkpoint.name}, pictures of {settings.width}x{settings.height} in {settings.steps} steps"
    yield ""
    ways = list(_ways(checkpoint, settings, dtype or default_dtype(), within))
    rows = [("", "stage", "way", "needs", "reads")]
    for way in ways:
        seconds = f", {way.reads / rate:.1f} s" if rate else ""
        reads = f"{gigabytes(way.reads)} {way.how_often}{seconds}"
        fits = "" if way.needs <= within.size else " (too much)"
        rows.append(("->" if way.chosen else "", way.stage, way.way, gigabytes(way.needs) + fits, reads))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()
    hopeless = [way.stage for way in ways if way.chosen and way.needs > within.size]
    if hopeless:
        yield f"too little memory for {' and '.join(hopeless)}: make smaller pictures, quantize, or free some memory"


def _ways(checkpoint: Checkpoint, settings: Resolved, dtype: str, within: Budget) -> Iterator[Way]:
    from stages.models.text_encoder import TextEncoder, TextEncoderConfig
    from stages.models.transformer import Modulator, QwenImageTransformer2DModel, TransformerConfig
    from stages.models.vae import AutoencoderKLQwenImage, VAEConfig
    from stages.weights import Loading

    def both(stage: str, weights: Weights, states: int, how_often: str, once: bool, suffix: str = "") -> Iterator[Way]:
        resident, streamed = memory.needs(weights, states)
        streams = memory.had_better_stream(weights, states, within, once)
        yield Way(stage, f"in memory{suffix}", resident, weights.stored, "once", not streams and not suffix)
        yield Way(stage, f"streamed{suffix}", streamed, weights.stored, how_often, streams and not suffix)

    text_config = checkpoint.config("text_encoder", TextEncoderConfig)
    text = Loading(checkpoint, "text_encoder", TextEncoder, TextEncoderConfig, dtype).weights()
    yield from both(
        "encode", text, memory.text_states(text_config, PROMPT_TOKENS, 8 * PROMPT_TOKENS, dtype), "once", True
    )

    config = checkpoint.config("transformer", TransformerConfig)
    modulator = Loading(checkpoint, "transformer", Modulator, TransformerConfig, dtype).weights()
    _, streamed = memory.needs(modulator, 0)
    yield Way("modulation", "streamed, then cached", streamed, modulator.stored, "for a new schedule", True)

    unit = 2 * checkpoint.vae_scale_factor
    tokens = (settings.height // unit) * (settings.width // unit) + PROMPT_TOKENS
    waiting = 2 * tokens if settings.guided else tokens
    states = memory.image_states(config, tokens, waiting, tokens, settings.steps, dtype)
    for bits in (None, 8, 4):
        loading = Loading(checkpoint, "transformer", QwenImageTransformer2DModel, TransformerConfig, dtype, bits)
        try:
            weights = loading.weights()
        except UserError:  # quantized already
            break
        yield from both("denoise", weights, states, "a step", False, f", --quantize {bits}" if bits else "")

    vae_config = checkpoint.config("vae", VAEConfig)
    vae = Loading(checkpoint, "vae", AutoencoderKLQwenImage, VAEConfig, DEFAULT_DTYPE).weights()
    needs = {}
    for edge in memory.TILES:
        states = memory.picture_states(vae_config, settings.height, settings.width, edge, DEFAULT_DTYPE)
        needs[edge], _ = memory.needs(vae, states)
    chosen = memory.largest_tile(needs, within)
    for edge, size in needs.items():
        yield Way("decode", f"tiles of {edge}", size, vae.stored, "once", edge == chosen)


def _machine() -> str:
    import mlx.core as mx

    info = mx.device_info()
    device = "CPU" if mx.default_device() == mx.Device(mx.cpu) else "GPU"
    return f"{platform.system()}, MLX {mx.__version__} on {device}: {info.get('device_name', platform.machine())}"


def _reading_rate(checkpoint: Checkpoint) -> float:
    """Bytes a second; 0 where a model is too small to tell."""
    sizes = {path: path.stat().st_size for path in weight_files(checkpoint.component("transformer"))}
    largest = max(sizes, key=lambda path: sizes[path])
    if sizes[largest] < SAMPLE_BYTES:
        return 0.0
    return _read(largest, sizes[largest] - SAMPLE_BYTES)


def _read(path: Path, start: int) -> float:
    file = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):  # from the disk, not from memory, where the system can be asked for that
            os.posix_fadvise(file, start, SAMPLE_BYTES, os.POSIX_FADV_DONTNEED)
        elif sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(file, fcntl.F_NOCACHE, 1)
        began = time.perf_counter()
        for offset in range(start, start + SAMPLE_BYTES, READ_BYTES):
            os.pread(file, READ_BYTES, offset)
        return SAMPLE_BYTES / (time.perf_counter() - began)
    finally:
        os.close(file)
