"""What MLX is to be told before it is imported, by the machine it runs on."""

import ctypes
import os
import sys

from stages.checkpoint import has_cuda

OPENBLAS = "libopenblas.so.0"
PACKAGE = "libopenblas0-pthread"  # what Debian and Ubuntu have it in
CUDA = {
    # a GPU lags behind by buffers of so many operations, whose memory is held meanwhile: few cost no time
    "MLX_MAX_OPS_PER_BUFFER": "8",
    # or MLX gives up for good after some hundred sizes of pictures and lengths of prompts: it counts what it prepared
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
}
# what a buffer's operations read, or they would be eight layers of a large tile; and how to convolve what shapes
VAE = {"MLX_MAX_MB_PER_BUFFER": "256", "MLX_CUDA_CONV_CACHE_SIZE": "1024"}
CUDA_STAGES = {
    "denoise": {"MLX_MAX_OPS_PER_BUFFER": "4"},  # or too many unpacked layers of a quantized model would wait
    "decode": VAE,
    "encode-image": VAE,
}


def prepare_mlx(stage: str | None = None) -> None:
    """To be called before MLX is first imported; later, it changes nothing.

    On Linux CPUs MLX then computes with the system's OpenBLAS, if there is one: its own is the reference
    implementation, thirty times slower. On CUDA it commits small buffers, smaller ones in some stages.
    """
    if has_cuda():
        for name, value in (CUDA | CUDA_STAGES.get(stage or "", {})).items():
            os.environ.setdefault(name, value)
    else:
        open_blas()


def open_blas() -> bool | None:
    """Whether MLX's matrix products are OpenBLAS's from now on; None where they do not need that."""
    if sys.platform != "linux" or has_cuda():
        return None
    try:
        ctypes.CDLL(OPENBLAS, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True
