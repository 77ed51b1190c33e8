"""Kernels for CUDA: compiled by NVRTC, run by MLX.

MLX compiles kernels too, but with headers that take it more than a second for each, and in every process anew. These
include none: they know the three kinds of numbers themselves, and are compiled in a few hundredths of a second.
"""

import ctypes
import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import mlx.core as mx

NVRTC = ("libnvrtc.so.13", "libnvrtc.so.12")  # one of them MLX itself has opened; that comes before any other
TYPES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16", mx.uint32: "unsigned"}

HEADER = """
struct half { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(half x) {
  float made;
  asm("cvt.f32.f16 %0, %1;" : "=f"(made) : "h"(x.bits));
  return made;
}
__device__ inline float to_float(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ inline void round_to(float* to, float x) { *to = x; }
__device__ inline void round_to(half* to, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
__device__ inline void round_to(bfloat16* to, float x) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
  const unsigned bits = __float_as_uint(x);  // to the nearest, halves to even; a NaN stays one
  to->bits = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
#endif
}

template <int N, typename T>
struct alignas(N * sizeof(T)) Pack { T numbers[N]; };

template <int N, typename T>
__device__ inline void load(const T* from, float* to) {
  const Pack<N, T> pack = *reinterpret_cast<const Pack<N, T>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(pack.numbers[i]);
}

template <int N, typename T>
__device__ inline void store(const float* from, T* to) {
  Pack<N, T> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) round_to(&pack.numbers[i], from[i]);
  *reinterpret_cast<Pack<N, T>*>(to) = pack;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
  return x;
}
"""


class Kernel:
    """A CUDA function: what it takes and gives, and what it does. T is the type of its outputs."""

    def __init__(self, name: str, inputs: Sequence[str], outputs: Sequence[str], scalars: Sequence[str], body: str):
        """Scalars are given with their types, and told at run time; inputs are of any type that arrays have."""
        self.name, self.inputs, self.outputs, self.scalars, self.body = name, inputs, outputs, scalars, body
        self.made: dict[Any, tuple[str, bytes]] = {}

    def __call__(
        self,
        inputs: list[mx.array],
        scalars: list[int],
        outputs: list[tuple[int, ...]],
        dtype: mx.Dtype,
        *,
        threads: int,
        block: int,
        **constants: int,
    ) -> list[mx.array]:
        """Its outputs, of these shapes and `dtype`, by so many threads in blocks of so many."""
        dtypes = (*[each.dtype for each in inputs], dtype)
        key = (dtypes, *constants.values())
        if key not in self.made:
            name, source = self.source(dtypes, constants)
            self.made[key] = name, compiled(source, _architecture())
        name, code = self.made[key]
        return list(
            mx.fast.precompiled_cuda_kernel(
                name=name,
                compiled_source=code,
                inputs=inputs,
                output_shapes=outputs,
                output_dtypes=[dtype] * len(outputs),
                scalars=scalars,
                grid=(threads, 1, 1),
                threadgroup=(block, 1, 1),
                ensure_row_contiguous=True,
            )
        )

    def source(self, dtypes: Sequence[mx.Dtype], constants: Mapping[str, int]) -> tuple[str, str]:
        """A name that only this function has, since MLX tells them apart by that, and the whole of its source."""
        types = [TYPES[dtype] for dtype in dtypes]
        told = [f"constexpr int {name} = {value};\n" for name, value in constants.items()]
        parameters = [
            *(f"const {each}* {name}" for each, name in zip(types[:-1], self.inputs, strict=True)),
            *(f"T* {name}" for name in self.outputs),
            *self.scalars,
        ]
        before = f"{HEADER}\nusing T = {types[-1]};\n{''.join(told)}"
        after = f"({', '.join(parameters)}) {{{self.body}}}\n"
        name = f"{self.name}_{hashlib.sha256((before + after).encode()).hexdigest()[:12]}"
        return name, f'{before}extern "C" __global__ void {name}{after}'


@cache
def _architecture() -> str:
    info = mx.device_info()
    return f"sm_{info['compute_capability_major']}{info['compute_capability_minor']}"


def compiled(source: str, architecture: str) -> bytes:
    """CUDA C++ -> the machine code of a GPU such as sm_90."""
    nvrtc, program = _nvrtc(), ctypes.c_void_p()

    def check(status: int) -> None:
        if status:
            raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")

    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        options = [f"--gpu-architecture={architecture}".encode()]
        status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        size = ctypes.c_size_t()
        if status:
            check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            check(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"a CUDA kernel cannot be compiled for {architecture}: {log.value.decode()}")
        check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        binary = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, binary))
        return binary.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def _nvrtc() -> ctypes.CDLL:
    for name, mode in ((name, mode) for mode in (os.RTLD_NOLOAD, ctypes.DEFAULT_MODE) for name in NVRTC):
        try:
            library = ctypes.CDLL(name, mode=mode)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise RuntimeError(f"none of {', '.join(NVRTC)} is there, which come with MLX for CUDA")
