"""What MLX is to be told before it is imported, by the machine it runs on."""

import ctypes
import os
import sys

from stages.checkpoint import has_cuda

OPENBLAS = "libopenblas.so.0"
PACKAGE = "libopenblas0-pthread"  # what Debian and Ubuntu have it in
# A GPU lags behind by buffers of so many operations, whose memory is held meanwhile: few cost no time. What a buffer's
# operations read is bounded where they would be eight layers of a large tile.
CUDA_BUFFERS = {"MLX_MAX_OPS_PER_BUFFER": "8"}
CUDA = {
    "encode": CUDA_BUFFERS,
    "denoise": {"MLX_MAX_OPS_PER_BUFFER": "4"},
    # and how to convolve is kept for every shape: tiles at borders and corners have their own, in every layer
    "decode": {**CUDA_BUFFERS, "MLX_MAX_MB_PER_BUFFER": "256", "MLX_CUDA_CONV_CACHE_SIZE": "2048"},
}


def prepare_mlx(stage: str | None = None) -> None:
    """To be called before MLX is first imported; later, it changes nothing.

    On Linux CPUs MLX then computes with the system's OpenBLAS, if there is one: its own is the reference
    implementation, thirty times slower. On CUDA it commits small buffers, smaller ones in some stages.
    """
    if has_cuda():
        for name, value in CUDA.get(stage or "", CUDA_BUFFERS).items():
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
