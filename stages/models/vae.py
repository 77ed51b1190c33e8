"""The decoder half of diffusers' `AutoencoderKLQwenImage`, for single frames.

The reference is a causal video VAE: a 3-D kernel's last temporal slice is the only one that meets a single frame, the
others see the zero padding before it. So 2-D convolutions with that slice are exact, at a third of the arithmetic.
Everything is channels-last, [B, H, W, C].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from stages.models import kernels, tiles
from stages.models.kernels import RMS_EPS
from stages.models.tiles import Local, Tile

# of the middle attention's scores, of which two lots are there at a time; all of them would be 275 GB at 4096x4096
SCORE_BYTES = 128 << 20 if mx.cuda.is_available() else 32 << 20


@dataclass(frozen=True)
class VAEConfig:
    """The fields of `vae/config.json` that both halves need."""

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temperal_downsample: tuple[bool, ...]  # the checkpoint's spelling
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    input_channels: int = 3

    def __post_init__(self):
        if self.input_channels != 3:
            raise ValueError(f"input_channels {self.input_channels} is not supported, only 3 (RGB)")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise ValueError("temperal_downsample must have one entry less than dim_mult")
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise ValueError(f"latents_mean and latents_std must have z_dim = {self.z_dim} entries")

    @property
    def vae_scale_factor(self) -> int:
        return 2 ** len(self.temperal_downsample)

    @property
    def encoder_halo(self) -> int:
        """How many pixels around its own the encoder sees of a picture, each way, but for its attention."""
        levels = len(self.dim_mult)
        blocks = sum(2 * self.num_res_blocks * 2**level for level in range(levels))
        return 1 + blocks + sum(2**level for level in range(1, levels)) + 2 * 2 ** (levels - 1)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = mx.ones(dim)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.gamma, RMS_EPS)


class ResidualBlock(nn.Module):
    REACH = 2  # pixels, one for each convolution

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.norm1 = RMSNorm(in_dim)
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, padding=1)
        self.norm2 = RMSNorm(out_dim)
        self.conv2 = nn.Conv2d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = nn.Linear(in_dim, out_dim) if in_dim != out_dim else nn.Identity()

    def __call__(self, x: mx.array) -> mx.array:
        h = _convolved(kernels.norm_silu(x, self.norm1.gamma), self.conv1)
        tiles.settle(h)  # on CPUs a convolution unfolds its input to nine times the size: one at a time
        h = _convolved(kernels.norm_silu(h, self.norm2.gamma, self.conv1.bias), self.conv2)
        return kernels.sum_of(self.conv_shortcut(x), h, self.conv2.bias)


def _convolved(x: mx.array, conv: nn.Conv2d) -> mx.array:
    """Without the bias, which the kernel that follows adds at no cost."""
    return mx.conv2d(x, conv.weight, padding=1)


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels of the latent grid."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, C] -> the same, computed now: at its peak four times as large as x, and the scores."""
        shape, dim = x.shape, x.shape[-1]
        x = x.flatten(1, 2)
        to_q, to_k, to_v = zip(self.to_qkv.weight.split(3), self.to_qkv.bias.split(3), strict=True)
        normed = self.norm(x)
        tiles.settle(normed)
        k, v = _linear(normed, *to_k), _linear(normed, *to_v)
        tiles.settle(k, v)
        del normed
        queries = max(1, SCORE_BYTES // (x.shape[0] * x.shape[1] * x.itemsize))
        chunks = []
        for chunk in mx.split(x, range(queries, x.shape[1], queries), axis=1):
            q = _linear(self.norm(chunk), *to_q)
            # no fused kernel takes heads this wide, so the scores of a chunk become an array
            attended = mx.fast.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=dim**-0.5)
            chunks.append(chunk + self.proj(attended[:, 0]))
            mx.async_eval(chunks[-1])
            mx.eval(chunks[-2:-1])
        del k, v
        return mx.concatenate(chunks, axis=1).reshape(shape)


def _linear(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.addmm(bias, x, weight.T)


class MidBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.resnets = [ResidualBlock(dim, dim), ResidualBlock(dim, dim)]
        self.attentions = [AttentionBlock(dim)]


class Upsample(nn.Module):
    """Doubles height and width (nearest), then a 3x3 convolution that halves the channels.

    Of the 3x3 pixels that the convolution would see after doubling, only 2x2 differ: which, is up to whether a row and
    a column are even or odd. So it is four 2x2 convolutions before doubling, at 4/9 of the arithmetic.
    """

    REACH, SCALE = 1, 2

    def __init__(self, dim: int):
        super().__init__()
        self.resample = [nn.Identity(), nn.Conv2d(dim, dim // 2, 3, padding=1)]

    def __call__(self, x: mx.array) -> mx.array:
        b, h, w, _ = x.shape
        conv = self.resample[1]
        taps = [each for rows in _halves(conv.weight, axis=1) for each in _halves(rows, axis=2)]
        made = mx.conv2d(x, mx.concatenate(taps), padding=1).reshape(b, h + 1, w + 1, 2, 2, -1)
        return kernels.doubled(made, conv.bias)


def _halves(kernel: mx.array, axis: int) -> list[mx.array]:
    """Of a 3-tap kernel over doubled pixels, the two 2-tap kernels over the pixels themselves: for even, for odd."""
    before, here, after = kernel.split(3, axis)
    return [mx.concatenate([before, here + after], axis), mx.concatenate([before + here, after], axis)]


class UpBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, upsample: bool):
        super().__init__()
        self.resnets = [ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(num_res_blocks + 1)]
        self.upsamplers = [Upsample(out_dim)] if upsample else []

    def layers(self) -> list[Local]:
        return [
            *(Local(resnet, ResidualBlock.REACH) for resnet in self.resnets),
            *(Local(upsampler, Upsample.REACH, Upsample.SCALE) for upsampler in self.upsamplers),
        ]


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.base_dim * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))]
        last = len(config.dim_mult) - 1
        self.conv_in = nn.Conv2d(config.z_dim, dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = [
            # the upsampler before has halved the channels
            UpBlock(dims[i] // 2 if i else dims[i], dims[i + 1], config.num_res_blocks, upsample=i < last)
            for i in range(last + 1)
        ]
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = nn.Conv2d(dims[-1], config.input_channels, 3, padding=1)

    def __call__(self, x: mx.array, edge: int) -> Iterator[tuple[Tile, mx.array]]:
        """Latents [B, h, w, C] -> RGB [B, 8h, 8w, 3], in tiles of edge x edge latents.

        All is local except the attention in the middle, which sees every latent; it is on the smallest grid.
        """
        first, last = self.mid_block.resnets
        below = [Local(self.conv_in, 1), Local(first, ResidualBlock.REACH)]
        above = [Local(last, ResidualBlock.REACH)]
        for block in self.up_blocks:
            above += block.layers()
        above.append(Local(self._rgb, 1))

        x = self.mid_block.attentions[0](tiles.whole(below, x, edge))
        yield from tiles.in_tiles(above, x, edge)

    def _rgb(self, x: mx.array) -> mx.array:
        return self.conv_out(kernels.norm_silu(x, self.norm_out.gamma))


class AutoencoderKLQwenImage(nn.Module):
    OTHERS: ClassVar = ("encoder.", "quant_conv.")  # of the checkpoint, that this half does without

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.post_quant_conv = nn.Linear(config.z_dim, config.z_dim)
        self.decoder = Decoder(config)

    def decode(self, latents: mx.array) -> mx.array:
        """Normalized latents [B, C, h, w], float32 -> RGB in [-1, 1], [B, 8h, 8w, 3], in the weights' dtype."""
        edge = max(latents.shape[2:]) * self.config.vae_scale_factor
        ((_, rgb),) = self.decode_tiles(latents, edge)
        return rgb

    def decode_tiles(self, latents: mx.array, edge: int) -> Iterator[tuple[Tile, mx.array]]:
        """The same in tiles of edge x edge pixels, each with its place, as if cut from the whole.

        `edge` is a multiple of vae_scale_factor. It bounds the memory, up to that of the middle attention.
        """
        std, mean = (mx.array(values)[:, None, None] for values in (self.config.latents_std, self.config.latents_mean))
        z = (latents * std + mean).transpose(0, 2, 3, 1).astype(self.post_quant_conv.weight.dtype)
        for tile, rgb in self.decoder(self.post_quant_conv(z), edge // self.config.vae_scale_factor):
            yield tile, mx.clip(rgb, -1.0, 1.0)

    @classmethod
    def sanitize(cls, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return for_single_frames(weights, cls.OTHERS)


def for_single_frames(weights: dict[str, mx.array], others: tuple[str, ...]) -> dict[str, mx.array]:
    """Drops what begins with `others` and the convolutions over time, keeps the temporal slice that sees the frame."""
    kept = {}
    for key, weight in weights.items():
        if key.startswith(others) or ".time_conv." in key:
            continue
        if weight.ndim == 5:
            weight = weight[:, :, -1]
        if key.endswith(".gamma"):
            weight = weight.flatten()
        elif weight.ndim == 4:  # [out, in, h, w] -> MLX's [out, h, w, in]; 1x1 convolutions are Linear here
            weight = weight.transpose(0, 2, 3, 1)
            weight = weight[:, 0, 0] if weight.shape[1:3] == (1, 1) else weight
        kept[key] = weight
    return kept
