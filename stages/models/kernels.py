"""What lies between matrix products and between convolutions: as plain operations, and for CUDA as kernels.

Each function is written twice, and says the same twice. The plain operations are what Metal and CPUs run; on CUDA they
would take a third of a step, most of it for reading and writing the same numbers again and again. A kernel reads them
once, adds the bias of what came before, computes in float32, and rounds once, at the end. A size is a constant in it
only where that makes it faster.
"""

from collections.abc import Iterator
from itertools import accumulate
from math import prod
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from stages.models.cuda import Kernel

NORM_EPS = 1e-6  # of every norm in the transformer, as in the kernels
RMS_EPS = 1e-24  # of the VAE's: the reference normalizes by max(norm, 1e-12); this only guards the all-zero vector
WARP = 32
HEAD_DIM = 128  # a warp's, four numbers for each of its threads
AT_ONCE = 8  # numbers for each thread of a row: 16 bytes of bfloat16
MAX_THREADS = 1024
BLOCK_THREADS = 256

JOINT_HEADS = Kernel(
    "joint_heads",
    [f"{stream}_{part}" for stream in ("img", "txt") for part in ("qkv", "bias", "q_norm", "k_norm", "turns")],
    ["q", "k", "v"],
    ["int texts", "int tokens"],
    """
  const int lane = threadIdx.x % 32;
  const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (warp >= tokens * HEADS) return;
  const int token = warp / HEADS, column = (warp % HEADS) * 128 + 4 * lane;
  const bool is_text = token < texts;
  const int own = is_text ? token : token - texts;
  constexpr int DIM = HEADS * 128;
  const T* from = (is_text ? txt_qkv : img_qkv) + size_t(own) * 3 * DIM + column;
  const T* biases = (is_text ? txt_bias : img_bias) + column;
  const size_t to = size_t(token) * DIM + column;

  float turn[4];  // two angles: their cosine and sine
  load<4>((is_text ? txt_turns : img_turns) + size_t(own) * 128 + 4 * lane, turn);
  float query[4], key[4], value[4];  // all are on their way before the first is needed
  load<4>(from, query);
  load<4>(from + DIM, key);
  load<4>(from + 2 * DIM, value);
  auto rotated = [&](float* v, const T* bias, const T* norm, T* out) {
    float b[4], w[4];
    load<4>(bias, b);
    load<4>(norm + 4 * lane, w);
    float squares = 0;
    for (int i = 0; i < 4; ++i) {
      v[i] += b[i];
      squares += v[i] * v[i];
    }
    const float scale = rsqrtf(warp_sum(squares) / 128 + 1e-6f);
    for (int i = 0; i < 4; ++i) v[i] *= scale * w[i];
    const float turned[4] = {
        v[0] * turn[0] - v[1] * turn[1], v[0] * turn[1] + v[1] * turn[0],
        v[2] * turn[2] - v[3] * turn[3], v[2] * turn[3] + v[3] * turn[2]};
    store<4>(turned, out + to);
  };
  rotated(query, biases, is_text ? txt_q_norm : img_q_norm, q);
  rotated(key, biases + DIM, is_text ? txt_k_norm : img_k_norm, k);
  float bias[4];
  load<4>(biases + 2 * DIM, bias);
  for (int i = 0; i < 4; ++i) value[i] += bias[i];
  store<4>(value, v + to);
""",
)

GATED_NORM = Kernel(
    "gated_norm",
    ["x", "y", "bias", "gate", "norm"],
    ["out", "normed"],
    ["int gate_at", "int shift_at", "int scale_at"],
    """
  __shared__ float sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = 8 * threadIdx.x;
  const size_t at = size_t(blockIdx.x) * DIM + column;
  auto row_sum = [&](float x) {
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    return warp_sum(lane < DIM / 256 ? sums[lane] : 0.0f);
  };
  float v[8], a[8], b[8], g[8];
  load<8>(x + at, v);
  load<8>(y + at, a);
  load<8>(bias + column, b);
  load<8>(gate + gate_at * DIM + column, g);
  float sum = 0;
  for (int i = 0; i < 8; ++i) {
    T rounded;  // as it is kept
    round_to(&rounded, v[i] + g[i] * (a[i] + b[i]));
    v[i] = to_float(rounded);
    sum += v[i];
  }
  store<8>(v, out + at);
  const float mean = row_sum(sum) / DIM;
  float squares = 0;
  for (int i = 0; i < 8; ++i) {
    v[i] -= mean;
    squares += v[i] * v[i];
  }
  const float inverse = rsqrtf(row_sum(squares) / DIM + 1e-6f);
  load<8>(norm + scale_at * DIM + column, a);
  load<8>(norm + shift_at * DIM + column, b);
  for (int i = 0; i < 8; ++i) v[i] = v[i] * inverse * (1 + a[i]) + b[i];
  store<8>(v, normed + at);
""",
)

GELU = Kernel(
    "gelu",
    ["x", "bias"],
    ["out"],
    ["int rows", "int columns"],
    """
  const size_t at = 8 * (size_t(blockIdx.x) * blockDim.x + threadIdx.x);
  if (at >= size_t(rows) * columns) return;
  float v[8], b[8];
  load<8>(x + at, v);
  load<8>(bias + at % columns, b);
  for (int i = 0; i < 8; ++i) {
    v[i] += b[i];
    const float inner = v[i] * (1.5957691216057308f + 0.07135481627159f * v[i] * v[i]);
    v[i] = __fdividef(v[i], 1 + __expf(-inner));
  }
  store<8>(v, out + at);
""",
)

UNPACKED = Kernel(
    "unpacked",
    ["packed", "scales", "biases"],
    ["out"],
    ["int groups"],
    """
  const size_t index = size_t(blockIdx.x) * blockDim.x + threadIdx.x;  // of eight numbers: BITS bytes of packed ones
  if (index >= size_t(groups) * (GROUP / 8)) return;
  const Pack<BITS / 4, unsigned> words = reinterpret_cast<const Pack<BITS / 4, unsigned>*>(packed)[index];
  const size_t group = 8 * index / GROUP;
  const float scale = to_float(scales[group]), bias = to_float(biases[group]);
  float v[8];
  for (int i = 0; i < 8; ++i) {
    const unsigned word = words.numbers[i * BITS / 32];
    v[i] = scale * static_cast<float>((word >> (i * BITS % 32)) & ((1u << BITS) - 1)) + bias;
  }
  store<8>(v, out + 8 * index);
""",
)

NORM_SILU = Kernel(
    "norm_silu",
    ["x", "gamma", "bias"],
    ["out"],
    ["int pixels", "int channels", "bool biased"],
    """
  const int parts = channels / 8;
  __shared__ float sums[1024];
  const size_t at = 8 * (size_t(blockIdx.x) * blockDim.x + threadIdx.x);
  const bool inside = at < size_t(pixels) * channels;
  const int column = 8 * (threadIdx.x % parts);
  float v[8], other[8], squares = 0;
  if (inside) {
    load<8>(x + at, v);
    if (biased) load<8>(bias + column, other);
    for (int i = 0; i < 8; ++i) {
      if (biased) v[i] += other[i];
      squares += v[i] * v[i];
    }
  }
  sums[threadIdx.x] = squares;
  __syncthreads();
  if (!inside) return;
  const float* own = sums + threadIdx.x / parts * parts;
  squares = 0;
  for (int i = 0; i < parts; ++i) squares += own[i];
  const float scale = rsqrtf(squares / channels + 1e-24f);
  load<8>(gamma + column, other);
  for (int i = 0; i < 8; ++i) {
    v[i] *= scale * other[i];
    v[i] = __fdividef(v[i], 1 + __expf(-v[i]));
  }
  store<8>(v, out + at);
""",
)

SUM = Kernel(
    "sum",
    ["x", "y", "bias"],
    ["out"],
    ["int pixels", "int channels"],
    """
  const size_t at = 8 * (size_t(blockIdx.x) * blockDim.x + threadIdx.x);
  if (at >= size_t(pixels) * channels) return;
  float v[8], other[8];
  load<8>(x + at, v);
  load<8>(y + at, other);
  for (int i = 0; i < 8; ++i) v[i] += other[i];
  load<8>(bias + at % channels, other);
  for (int i = 0; i < 8; ++i) v[i] += other[i];
  store<8>(v, out + at);
""",
)

DOUBLED = Kernel(
    "doubled",
    ["x", "bias"],
    ["out"],
    ["int images", "int h", "int w", "int channels"],
    """
  const int parts = channels / 8;
  const size_t index = size_t(blockIdx.x) * blockDim.x + threadIdx.x, pixel = index / parts;
  const size_t column = 8 * (index % parts), row = pixel / (2 * w), image = row / (2 * h);
  if (image >= images) return;
  const int across = pixel % (2 * w), down = row % (2 * h), i = down % 2, j = across % 2;
  const size_t corner = (image * (h + 1) + down / 2 + i) * (w + 1) + across / 2 + j;
  float v[8], b[8];
  load<8>(x + ((corner * 2 + i) * 2 + j) * channels + column, v);
  load<8>(bias + column, b);
  for (int i = 0; i < 8; ++i) v[i] += b[i];
  store<8>(v, out + 8 * index);
""",
)


class Rotary(NamedTuple):
    """One stream's angles on the unit circle: their cosines and sines in turn, [tokens, 1, head_dim], float32."""

    turns: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """Rotates the interleaved pairs of x [..., tokens, heads, head_dim], in float32 as the reference does."""
        rotated = x.astype(mx.float32).view(mx.complex64) * self.turns.view(mx.complex64)
        return rotated.view(mx.float32).astype(x.dtype)


class ImageTextRotary(NamedTuple):
    img: Rotary
    txt: Rotary


class Part(NamedTuple):
    """One of the vectors [dim] that a modulation [n * dim] holds. Kernels find it themselves: a slice takes Python
    about as long as a kernel takes the GPU."""

    modulation: mx.array
    number: int

    def alone(self, dim: int) -> mx.array:
        return self.modulation[self.number * dim : (self.number + 1) * dim]


class Norm(NamedTuple):
    """LayerNorm without affine, then x * (1 + scale) + shift; all tokens share one timestep, so it is one affine."""

    modulation: mx.array  # [n * dim], and which of the n they are
    shift: int
    scale: int

    def __call__(self, x: mx.array) -> mx.array:
        shift, scale = (Part(self.modulation, number).alone(x.shape[-1]) for number in self[1:])
        return mx.fast.layer_norm(x, 1 + scale, shift, NORM_EPS)


def product(layer: nn.Linear | nn.QuantizedLinear, x: mx.array) -> mx.array:
    """What a layer makes of x [..., in] but for its bias: [..., out]."""
    if isinstance(layer, nn.QuantizedLinear):
        return with_lora(layer, x, x @ unpacked(layer).T)
    return x @ layer.weight.T


def with_lora(layer: nn.QuantizedLinear, x: mx.array, made: mx.array) -> mx.array:
    """What a quantized layer has made of x, and what the LoRAs beside it add."""
    return made + (x @ layer["lora_a"].T) @ layer["lora_b"].T if "lora_a" in layer else made


def _is_cuda() -> bool:
    return bool(mx.cuda.is_available()) and mx.default_device() != mx.Device(mx.cpu)


def _runs_on_cuda(dim: int) -> bool:
    return _is_cuda() and dim % (AT_ONCE * WARP) == 0 and dim <= AT_ONCE * MAX_THREADS


class Heads(NamedTuple):
    """The layers that make one stream's queries, keys and values."""

    qkv: nn.Linear  # all three, one after the other
    norm_q: nn.RMSNorm
    norm_k: nn.RMSNorm

    def weights(self) -> list[mx.array]:
        return [self.qkv.bias, self.norm_q.weight, self.norm_k.weight]


def joint_heads(
    img_heads: Heads, img: mx.array, txt_heads: Heads, txt: mx.array, txt_seq_lens: list[int], rotary: ImageTextRotary
) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
    """Queries, keys and values, normed and rotated, of each image behind its own prompt: [1, heads, T + S, head_dim].

    img [B, S, dim]; txt [sum(txt_seq_lens), dim], the prompts one after the other.
    """
    head_dim = img_heads.norm_q.weight.shape[0]
    fused = head_dim == HEAD_DIM and _runs_on_cuda(img.shape[-1])
    made = _kernel_heads if fused else _plain_heads
    yield from made(img_heads, img, txt_heads, txt, txt_seq_lens, rotary)


def _plain_heads(
    img_heads: Heads, img: mx.array, txt_heads: Heads, txt: mx.array, txt_seq_lens: list[int], rotary: ImageTextRotary
) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
    def stream(heads: Heads, x: mx.array, turned: Rotary) -> tuple[mx.array, mx.array, mx.array]:
        qkv = heads.qkv(x).reshape(*x.shape[:-1], 3, -1, heads.norm_q.weight.shape[0])
        q, k, v = (qkv[..., number, :, :] for number in range(3))
        return turned(heads.norm_q(q)), turned(heads.norm_k(k)), v

    of_images, of_texts = stream(img_heads, img, rotary.img), stream(txt_heads, txt, rotary.txt)
    for own, *image in zip(spans(txt_seq_lens), *of_images, strict=True):
        q, k, v = (mx.concatenate([t[own], x])[None].swapaxes(1, 2) for t, x in zip(of_texts, image, strict=True))
        yield q, k, v


def _kernel_heads(
    img_heads: Heads, img: mx.array, txt_heads: Heads, txt: mx.array, txt_seq_lens: list[int], rotary: ImageTextRotary
) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
    dim, dtype = img.shape[-1], img.dtype
    heads = dim // HEAD_DIM
    img_qkv, txt_qkv = product(img_heads.qkv, img), product(txt_heads.qkv, txt)
    txt_turns = rotary.txt.turns
    for image, own in zip(img_qkv, spans(txt_seq_lens), strict=True):  # views, where indexing would gather
        texts = own.stop - own.start
        tokens = texts + img.shape[1]
        prompt, turns = txt_qkv, txt_turns
        if len(txt_seq_lens) > 1:
            prompt, turns = txt_qkv[own], txt_turns[own]
        made = JOINT_HEADS(
            [image, *img_heads.weights(), rotary.img.turns, prompt, *txt_heads.weights(), turns],
            [texts, tokens],
            [(1, tokens, heads, HEAD_DIM)] * 3,
            dtype,
            threads=tokens * heads * WARP,
            block=BLOCK_THREADS,
            HEADS=heads,
        )
        q, k, v = (each.swapaxes(1, 2) for each in made)
        yield q, k, v


def gated_norm(x: mx.array, layer: nn.Linear, h: mx.array, gate: Part, norm: Norm) -> tuple[mx.array, mx.array]:
    """x + gate * layer(h), and that normed for the next layer. x [..., dim]."""
    dim = x.shape[-1]
    if not _runs_on_cuda(dim):
        x = x + gate.alone(dim) * layer(h)
        return x, norm(x)
    x, normed = GATED_NORM(
        [x, product(layer, h), layer.bias, gate.modulation, norm.modulation],
        [gate.number, norm.shift, norm.scale],
        [x.shape] * 2,
        x.dtype,
        threads=x.size // AT_ONCE,
        block=dim // AT_ONCE,
        DIM=dim,
    )
    return x, normed


def gelu(layer: nn.Linear, h: mx.array) -> mx.array:
    """GELU, approximated with tanh, of layer(h) [..., columns]."""
    if not _runs_on_cuda(h.shape[-1]):
        return nn.gelu_approx(layer(h))
    x = product(layer, h)
    columns = x.shape[-1]
    sizes, threads = [x.size // columns, columns], x.size // AT_ONCE
    (made,) = GELU([x, layer.bias], sizes, [x.shape], x.dtype, threads=threads, block=BLOCK_THREADS)
    return made


def norm_silu(x: mx.array, gamma: mx.array, bias: mx.array | None = None) -> mx.array:
    """RMSNorm over the channels of x [B, H, W, C], and of `bias` that x lacks so far; then SiLU."""
    channels = x.shape[-1]
    if not _has_kernels(channels):
        return nn.silu(mx.fast.rms_norm(x if bias is None else x + bias, gamma, RMS_EPS))
    return _by_channels(NORM_SILU, [x, gamma, gamma if bias is None else bias], bias is not None)


def sum_of(x: mx.array, y: mx.array, bias: mx.array) -> mx.array:
    """x + y + bias, for x and y [B, H, W, C]."""
    if not _has_kernels(x.shape[-1]):
        return x + (y + bias)
    return _by_channels(SUM, [x, y, bias])


def _has_kernels(channels: int) -> bool:
    return _is_cuda() and channels % AT_ONCE == 0 and channels <= AT_ONCE * BLOCK_THREADS


def _by_channels(kernel: Kernel, arrays: list[mx.array], *told: bool) -> mx.array:
    """A kernel on the first array's pixels, whole ones in every block of threads."""
    x, channels = arrays[0], arrays[0].shape[-1]
    parts = channels // AT_ONCE
    (made,) = kernel(
        arrays,
        [x.size // channels, channels, *told],
        [x.shape],
        x.dtype,
        threads=x.size // AT_ONCE,
        block=BLOCK_THREADS // parts * parts,
    )
    return made


def doubled(x: mx.array, bias: mx.array) -> mx.array:
    """[B, H + 1, W + 1, 2, 2, C] -> [B, 2H, 2W, C]: the pixels at even and odd rows and columns, from their own last
    dimensions; odd ones begin one later. Then the bias [C]."""
    b, h, w, channels = x.shape[0], x.shape[1] - 1, x.shape[2] - 1, x.shape[-1]
    if not _has_kernels(channels):
        quarters = [x[:, i : i + h, j : j + w, i, j] for i in (0, 1) for j in (0, 1)]
        rows = mx.stack(quarters, axis=3).reshape(b, h, w, 2, 2, channels).swapaxes(2, 3)
        return rows.reshape(b, 2 * h, 2 * w, channels) + bias
    shape = (b, 2 * h, 2 * w, channels)
    threads = prod(shape) // AT_ONCE
    (made,) = DOUBLED([x, bias], [b, h, w, channels], [shape], x.dtype, threads=threads, block=BLOCK_THREADS)
    return made


def unpacked(layer: nn.QuantizedLinear) -> mx.array:
    """The weight [out, in] of a quantized layer."""
    packed, scales, biases = layer["weight"], layer["scales"], layer["biases"]
    bits, group_size = layer.bits, layer.group_size
    if not (_is_cuda() and bits in (4, 8) and group_size % AT_ONCE == 0):
        made: mx.array = mx.dequantize(packed, scales, biases, group_size=group_size, bits=bits, mode=layer.mode)
        return made
    outputs, inputs = packed.shape[0], scales.shape[1] * group_size
    (made,) = UNPACKED(
        [packed, scales, biases],
        [scales.size],
        [(outputs, inputs)],
        scales.dtype,
        threads=outputs * inputs // AT_ONCE,
        block=BLOCK_THREADS,
        BITS=bits,
        GROUP=group_size,
    )
    return made


def begin(*arrays: mx.array) -> None:
    """On CUDA, lets the GPU begin with these while Python goes on to describe what comes next: that takes as long as
    a small picture's block does."""
    if _is_cuda():
        mx.async_eval(arrays)


def spans(lengths: list[int]) -> Iterator[slice]:
    """Where each of so many rows is that are packed one after the other."""
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        yield slice(end - length, end)
